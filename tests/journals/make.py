"""Makes a journal with every kind of record, and what it has to be read as, for the format of this labtasker.py.

usage: python make.py    (writes format-N.jsonl and format-N.json beside itself; never changes one that is there)

A file made here is kept for ever: later versions must read it. Run it once for each new format.
"""
import json
import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import labtasker  # noqa: E402


def shown(path):
    """Return all that the store in the file `path` holds, in JSON types."""
    store = labtasker.Store(str(path))
    labtasker.answer_call(store, lambda: labtasker.LocalName("default"), "GET", "/api/v1/queues/me")
    return [{"queue": labtasker.in_json(queue.record, True),
             "workers": [labtasker.in_json(worker, True) for worker in queue.workers.values()],
             "tasks": [labtasker.in_json(task, True) for task in queue.tasks.values()]}
            for queue in store.state.queues.values()]


def fill(path):
    """Do one of each thing in the store in the file `path`."""
    store = labtasker.Store(str(path))

    def call(method, place, body=None, query=None):
        where = place if place.startswith("/") else "/api/v1/queues/me/" + place
        status, answer = labtasker.answer_call(store, lambda: labtasker.LocalName("default"), method, where, body, query)
        assert status < 400, answer
        return answer
    call("POST", "/api/v1/queues", {"queue_name": "other", "password": "secret", "metadata": {"a": {"b": [1, None]}}})
    worker_id = call("POST", "workers", {"worker_name": "w", "metadata": {"gpu": 0}})["worker_id"]
    gone_id = call("POST", "workers", {})["worker_id"]
    call("DELETE", "workers/" + gone_id)
    ids = call("POST", "tasks", [{"args": {"i": i, "opt": {"lr": 10.0 ** -i}}, "priority": i, "task_name": "t%d" % i,
                                  "metadata": {"text": "\u00e9\ud83d\ude00\n\"\\", "nan": float("nan")}}
                                 for i in range(8)])["task_ids"]
    labtasker.compact(str(path))
    call("DELETE", "workers/" + call("POST", "workers", {})["worker_id"])
    for status in ("success", "failed", "pending", "cancelled", "running"):
        task = call("POST", "tasks/next", {"worker_id": worker_id, "heartbeat_timeout": 60, "fetch_id": labtasker.new_id()})["task"]
        call("POST", "tasks/%s/status" % task["task_id"],
             {"status": status, "summary": {"acc": float("inf")}, "run_id": task["run_id"], "reason": "why"})
        if status == "pending":
            call("POST", "tasks/%s/status" % task["task_id"], {"status": "cancelled"})
    call("PUT", "tasks", [{"task_id": ids[0], "args": {"more": 1}, "priority": -3}], {"reset_pending": "true"})
    call("DELETE", "tasks/" + ids[1])
    call("POST", "tasks", {"args": {"after": "the fold"}})
    call("PUT", "/api/v1/queues/me", {"metadata_update": {"x": 1}})
    call("GET", "/api/v1/queues/me")


if __name__ == "__main__":
    target = HERE / ("format-%d.jsonl" % labtasker.FORMAT)
    assert not target.exists(), "%s is there and stays as it is" % target
    work = target.with_name("work.jsonl")
    fill(work)
    work.rename(target)
    target.with_suffix(".json").write_text(json.dumps(shown(target), indent=1, sort_keys=True) + "\n")
    for litter in HERE.glob("*.jsonl.*"):
        litter.unlink()
    shutil.rmtree(str(HERE / "beats"))
