"""Tasks that wait for others: who is blocked, what releases, what cancels, and what becomes of that on disk."""
import itertools
import json
import pathlib
import random

import pytest

import harness
import labtasker as L
from test_service import Door, clock, door  # noqa: F401


def chain(door, count, field="after", **fields):  # noqa: F811
    """Return the ids of tasks each of which waits for the one before it."""
    ids = []
    for _ in range(count):
        ids.append(door.submit(**dict(fields, **({field: ids[-1:]} if ids else {}))))
    return ids


def states(door, ids):  # noqa: F811
    return [door.task(task_id)["status"] for task_id in ids]


def fetched(door, **fields):  # noqa: F811
    task = door.fetch(**fields)
    return task and task["task_id"]


def test_a_task_is_given_to_nobody_until_all_that_it_waits_for_have_succeeded(door):  # noqa: F811
    one, other = door.submit(), door.submit()
    child = door.submit(after=[one, other], priority=9)
    task = door.fetch()
    assert task["task_id"] == one
    door.report(task, "success")
    task = door.fetch(extra_filter="priority == 9 or priority == 0")
    assert task["task_id"] == other and door.fetch() is None
    door.report(task, "success")
    assert fetched(door) == child


def test_what_waits_for_the_end_takes_any_end(door):  # noqa: F811
    for end in ("success", "failed", "cancelled", "deleted"):
        parent = door.submit(max_retries=1)
        child = door.submit(after_any=[parent])
        task = door.fetch()
        assert task["task_id"] == parent and door.fetch() is None
        if end == "deleted":
            door("DELETE", "tasks/" + parent)
        else:
            door.report(task, end)
        task = door.fetch()
        assert task["task_id"] == child, end
        door.report(task, "success")


def test_a_retry_is_no_end(door):  # noqa: F811
    parent, child = chain(door, 2, max_retries=2)
    door.report(door.fetch(), "failed")
    assert door.task(child)["status"] == "pending" and fetched(door) == parent and door.fetch() is None


@pytest.mark.parametrize("end, words", [("failed", "failed"), ("cancelled", "was cancelled"), ("deleted", "is not there"),
                                        ("timeout", "failed")])
def test_what_waits_in_vain_is_cancelled_with_all_that_is_behind_it_in_one_transaction(door, end, words):  # noqa: F811
    ids = chain(door, 4, max_retries=1)
    bystander = door.submit(after_any=[ids[1]])
    task = door.fetch(heartbeat_timeout=5)
    lines = door.store.journal.file.n
    if end == "deleted":
        door("DELETE", "tasks/" + ids[0])
    elif end == "timeout":
        door.clock.pass_s(100)
        door.store.look_for_timeouts(door.queue)
    else:
        door.report(task, end)
    assert door.store.journal.file.n == lines + 1
    assert states(door, ids[1:]) == ["cancelled"] * 3
    reasons = [door.task(task_id)["reason"] for task_id in ids[1:]]
    assert ids[0] in reasons[0] and words in reasons[0]
    assert all(before in reason and ids[0] in reason for before, reason in zip(ids[1:], reasons[1:]))
    assert fetched(door) == bystander, "a cancelled task has ended"
    assert [door.task(task_id)["failure"] for task_id in ids[1:]] == [None] * 3


def test_one_that_had_failed_before_cancels_the_new_task_at_once(door):  # noqa: F811
    failed = door.submit(max_retries=1)
    door.report(door.fetch(), "failed")
    ids = [L.new_id(), L.new_id(), L.new_id()]
    door("POST", "tasks", [{"args": {"a": 1}, "task_id": ids[0], "after": [failed]}, {
        "args": {"a": 1}, "task_id": ids[1], "after": [ids[0]]}, {"args": {"a": 1}, "task_id": ids[2], "after_any": [failed]}])
    assert states(door, ids) == ["cancelled", "cancelled", "pending"]
    assert failed in door.task(ids[0])["reason"] and failed in door.task(ids[1])["reason"]
    steps = [event for event in door.store.file.replica.events if event.record.task_id == ids[0]]
    assert [(step.old_state, step.record.status) for step in steps] == [("created", "pending"), ("pending", "cancelled")]


def test_what_is_not_there_is_refused_by_name_and_nothing_is_submitted(door):  # noqa: F811
    known, unknown = door.submit(), L.new_id()
    for field, others in itertools.product(L.WAITS, ([unknown], [known, unknown])):
        answer = door("POST", "tasks", [{"args": {"a": 1}}, {"args": {"a": 1}, field: others}], expect=404)
        assert unknown in answer["detail"] and field in answer["detail"]
    own = L.new_id()
    door("POST", "tasks", {"args": {"a": 1}, "task_id": own, "after": [own]}, expect=404)
    later = L.new_id()
    door("POST", "tasks", [{"args": {"a": 1}, "after": [later]}, {"args": {"a": 1}, "task_id": later}], expect=404)
    assert len(door("POST", "tasks/search", {})["content"]) == 1
    for odd in ("x", [1], [""], {"a": 1}, ["a/b"], [known] * 10001):
        door("POST", "tasks", {"args": {"a": 1}, "after": odd}, expect=422)


def test_a_submission_that_is_repeated_counts_once_also_when_what_it_waits_for_is_gone(door):  # noqa: F811
    parent, child = door.submit(), L.new_id()
    body = {"args": {"a": 1}, "task_id": child, "after_any": [parent, parent]}
    door("POST", "tasks", body)
    assert door.task(child)["after_any"] == [parent]
    door("DELETE", "tasks/" + parent)
    door("POST", "tasks", body)
    door("POST", "tasks", dict(body, after_any=[]), expect=409)


def test_a_task_that_has_succeeded_and_is_deleted_is_waited_for_no_more(door):  # noqa: F811
    done, other = door.submit(), door.submit()
    child = door.submit(after=[done, other])
    door.report(door.fetch(), "success")
    door("DELETE", "tasks/" + done)
    assert (door.task(child)["status"], door.task(child)["after"]) == ("pending", [other])
    door.report(door.fetch(), "success")
    assert fetched(door) == child


def test_a_reset_has_what_was_not_begun_wait_again_and_leaves_what_was(door):  # noqa: F811
    parent = door.submit()
    new, begun = door.submit(after=[parent]), door.submit(after=[parent], priority=1)
    door.report(door.fetch(), "success")
    task = door.fetch()
    assert task["task_id"] == begun
    door.update(parent, reset=True)
    assert fetched(door, required_fields=["a"]) == parent, "and not what waits for it"
    assert door.fetch() is None
    door.report(task, "pending")
    assert fetched(door) == begun, "it has begun before: it waits for nothing"
    door.report(parent, "cancelled")
    assert states(door, [new, begun]) == ["cancelled", "running"]
    door.report(door.task(begun), "failed")
    assert fetched(door) == begun


def test_a_reset_of_what_was_cancelled_waits_or_is_cancelled_again(door):  # noqa: F811
    parent, child, grandchild = chain(door, 3, max_retries=1)
    door.report(door.fetch(), "failed")
    answer = door.update(child, reset=True)
    assert answer["content"][0]["status"] == "cancelled" and parent in answer["content"][0]["reason"]
    door.update(parent, reset=True)
    assert states(door, [child, grandchild]) == ["cancelled"] * 2, "nobody has asked for it again"
    door.update(child, reset=True)
    assert states(door, [child]) == ["pending"] and door.task(child)["reason"] is None
    assert fetched(door) == parent and door.fetch() is None
    door.report(door.task(parent), "success")
    assert fetched(door) == child


def test_a_task_that_ran_once_minds_no_more_that_another_is_gone(door):  # noqa: F811
    parent, child = chain(door, 2, max_retries=1)
    door.report(door.fetch(), "success")
    door.report(door.fetch(), "failed")
    door("DELETE", "tasks/" + parent)
    door.update(child, reset=True)
    assert fetched(door) == child


def test_what_a_pending_task_waits_for_can_be_changed(door):  # noqa: F811
    one, other, child = door.submit(), door.submit(), door.submit(priority=9)
    door.update(child, after=[one, other])
    assert fetched(door) == one
    door.update(child, after=[one])
    assert fetched(door) == other and door.fetch() is None
    answer = door.update(one, after=[other], expect=400)
    assert "running" in answer["detail"]
    door.update(child, after=None, replace_fields=["after"])
    assert door.task(child)["after"] == [] and fetched(door) == child
    door.update(child, after=[], priority=2), "what changes nothing is no change"
    unknown = L.new_id()
    assert unknown in door.update(door.submit(), after=[unknown], expect=400)["detail"]


def test_an_update_to_what_has_failed_cancels(door):  # noqa: F811
    failed = door.submit(max_retries=1)
    door.report(door.fetch(), "failed")
    one, other = door.submit(), door.submit()
    answer = door("PUT", "tasks", [{"task_id": one, "after": [other]}, {"task_id": other, "after": [failed]}],
                  {"reset_pending": "false"})
    assert {task["task_id"]: task["status"] for task in answer["content"]} == {one: "cancelled", other: "cancelled"}


def test_a_circle_is_refused_and_named(door):  # noqa: F811
    ids = chain(door, 3)
    for name, others in ((ids[0], [ids[2]]), (ids[0], [ids[0]])):
        for field in L.WAITS:
            detail = door.update(name, expect=400, **{field: others})["detail"]
            assert "wait for itself" in detail and name in detail and others[0] in detail
    apart = [door.submit(), door.submit()]
    door("PUT", "tasks", [{"task_id": apart[0], "after": [apart[1]]}, {"task_id": apart[1], "after_any": [apart[0]]}],
         {"reset_pending": "false"}, expect=400)
    assert door.task(ids[0])["after"] == []
    door.update(ids[2], after=[ids[0]])
    door.update(ids[1], after=[ids[2]])


def test_a_long_chain_and_a_wide_fan_end_in_one_line_each(door):  # noqa: F811
    ids = [L.new_id() for _ in range(3000)]
    door("POST", "tasks", [dict({"args": {"a": 1}, "task_id": task_id}, **({"after": [before]} if before else {}))
                           for before, task_id in zip([None] + ids, ids)])
    fan = [L.new_id() for _ in range(3000)]
    door("POST", "tasks", [{"args": {"a": 1}, "task_id": task_id, "after": [ids[0]]} for task_id in fan])
    last = door.submit(after=fan)
    door.report(ids[0], "cancelled")
    assert {task["status"] for task in door("POST", "tasks/search", {"limit": 10000})["content"]} == {"cancelled"}
    assert fan[0] in door.task(last)["reason"]


def test_who_waits_for_a_task_is_woken_by_the_end_that_releases_it(door):  # noqa: F811
    parent, child = chain(door, 2)
    task = door.fetch()
    queue_id = door.store.state.id_of(door.queue)
    door.store.watched_keys = {(queue_id, "pending")}
    door.report(task, "success")
    door.store.journal.flush()
    assert door.store.changed_keys == {(queue_id, "pending")}


def checked_index(store):
    """AssertionError unless the indexes of a store are what its tasks tell."""
    for queue in store.state.queues.values():
        blocked = {}
        for task in queue.tasks.values():
            if L.waits(task):
                missing = sum(not L.is_done_for(field, task, queue.tasks.get(other))
                              for field in L.WAITS for other in getattr(task, field))
                blocked.update({task.task_id: missing} if missing else {})
        assert queue.blocked.missing == blocked
        free = sum(task.status == "pending" and task.task_id not in blocked for task in queue.tasks.values())
        assert sum(queue.pending.counts.values()) + len(queue.pending.resting) == free
        behind = {(field, other, task.task_id) for task in queue.tasks.values() if L.waits(task)
                  for field in L.WAITS for other in getattr(task, field)}
        assert behind == {(field, other, one) for field in L.WAITS for other in queue.blocked.behind[field]
                          for one in queue.blocked.those_behind(other, field)}


@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_what_the_tasks_tell_whatever_happens_to_them(tmp_path, clock, seed):  # noqa: F811
    """Random operations; a failed write among them, the file read anew, a compaction."""
    dice, ids = random.Random(seed), []
    door = Door(tmp_path, clock)  # noqa: F811
    for step in range(250):
        some = dice.sample(ids, min(len(ids), dice.randrange(3)))
        act = dice.choice(("submit", "submit", "fetch", "fetch", "end", "reset", "after", "delete", "undo"))
        if act == "submit":
            ids.append(door.submit(max_retries=dice.choice((1, 2)), **{dice.choice(L.WAITS): [
                one for one in some if one in door.store.state.queues[door.store.state.id_of(door.queue)].tasks]} if some else {}))
        elif act == "fetch":
            door.fetch()
        elif ids and act == "end":
            L.answer_call(door.store, lambda: door.queue, "POST", "/api/v1/queues/me/tasks/%s/status" % dice.choice(ids),
                          {"status": dice.choice(("success", "failed", "cancelled", "pending"))})
        elif ids:
            one = dice.choice(ids)
            body = [{"task_id": one, dice.choice(L.WAITS): some}] if act == "after" else [{"task_id": one}]
            call = ("DELETE", "/api/v1/queues/me/tasks/" + one, None, None) if act == "delete" else (
                "PUT", "/api/v1/queues/me/tasks", body, {"reset_pending": str(act == "reset")})
            if act != "undo":
                L.answer_call(door.store, lambda: door.queue, *call)
            else:
                state = door.store.state
                queue_id = state.id_of(door.queue)
                if one in state.queues[queue_id].tasks:
                    changes = [["task", one, {"status": dice.choice(L.TASK_STATES), "last_modified": float(L.now())}, None],
                               ["task-", dice.choice(ids)]]
                    state.put_back(state.apply(queue_id, changes))
        door.clock.pass_s(1)
        checked_index(door.store)
    again = Door(tmp_path, clock)
    again("GET", "/api/v1/queues/me")
    checked_index(again.store)
    assert [queue[1] for queue in again.state().values()] == [queue[1] for queue in door.state().values()]
    L.compact(door.path)
    last = Door(tmp_path, clock)
    last("GET", "/api/v1/queues/me")
    checked_index(last.store)
    assert last.store.state.queues.popitem()[1].blocked.missing == door.store.state.queues.popitem()[1].blocked.missing


def test_after_a_repair_that_lost_a_task_what_waits_for_its_success_waits_and_why_names_it(home):
    """What waits for its end goes on. Nothing runs before what it waits for: that can't be known any more."""
    ids = [L.submit_task(args={"n": n}).task_id for n in range(2)]
    waiting, going = L.submit_task(args={"n": 2}, after=ids[:1]), L.submit_task(args={"n": 3}, after_any=ids[:1])
    path = home.folder / "journal.jsonl"
    L.client().transport.close()
    L.use_client(None)
    text = path.read_text()
    line = next(line for line in text.splitlines() if '"created"' in line and ids[0] in line)
    path.write_text(text.replace(line, line.replace("created", "creat?d", 1)))
    assert home.cli("journal", "repair", "-y").returncode == 0
    assert L.get_task(waiting.task_id).status == L.get_task(going.task_id).status == "pending"
    assert {L.fetch_task(heartbeat_timeout=60).task.task_id for _ in range(2)} == {ids[1], going.task_id}
    assert not L.fetch_task(heartbeat_timeout=60).found
    said = home.cli("task", "why", waiting.task_id).stdout
    assert ids[0][:8] in said and "gone" in said
    L.update_tasks([L.TaskUpdateRequest(task_id=waiting.task_id, after=[])])
    assert L.fetch_task(heartbeat_timeout=60).task.task_id == waiting.task_id


# From Python and the command line


def test_python_takes_ids_tasks_and_answers(home):
    parent = L.submit_task(args={"n": 0})
    child = L.submit_task(args={"n": 1}, after=[parent, L.get_task(parent.task_id)], after_any=parent.task_id)
    task = L.get_task(child.task_id)
    assert task.after == task.after_any == [parent.task_id]
    ids = L.submit_tasks([{"args": {"n": 2}, "task_id": "made-here"}, {"args": {"n": 3}, "after": ["made-here"]}])
    assert L.get_task(ids[1]).after == ["made-here"]
    with pytest.raises(L.LabtaskerHTTPStatusError) as refused:
        L.submit_task(args={"n": 4}, after=["never-was"])
    assert refused.value.status_code == 404 and "never-was" in str(refused.value)


def cli(capsys, *words):
    """Return (exit code, stdout, stderr) of a command, run in this process."""
    code = L.main(list(words))
    said = capsys.readouterr()
    return code or 0, said.out, said.err


def test_the_command_line_takes_short_ids_and_why_and_ls_show_them(home, capsys):
    parent = cli(capsys, "task", "submit", "-q", "--", "--n=0")[1].strip()
    other = cli(capsys, "task", "submit", "-q", "--", "--n=1")[1].strip()
    child = cli(capsys, "task", "submit", "-q", "--after", "%s,%s" % (parent[:8], other), "--after-any", parent[:6], "--", "--n=2")[1].strip()
    task = L.get_task(child)
    assert (task.after, task.after_any) == ([parent, other], [parent])
    said = cli(capsys, "task", "why", child)[1]
    assert "each of these 2 tasks has succeeded: %s (pending), %s (pending)" % (parent[:8], other[:8]) in said
    assert "this task has ended: " + parent[:8] in said and "in line" not in said
    assert cli(capsys, "task", "submit", "--after", "00000000", "--", "--n=2")[0] == 1
    assert cli(capsys, "task", "update", "-y", "--id", child, "-u", "after=" + other[:8])[0] == 0
    assert L.get_task(child).after == [other]
    assert cli(capsys, "task", "cancel", other[:8])[0] == 0
    assert "it waited for task %s, which was cancelled" % other in cli(capsys, "task", "why", child)[1]
    code, out, err = cli(capsys, "task", "retry", child)
    assert (code, out) == (0, "0 tasks pending again\n") and "1 task cancelled again: it waited for task " + other in err
    shown = json.loads(cli(capsys, "task", "ls", "--json", "-f", '"%s" in list(after)' % other)[1])
    assert [row["task_id"] for row in shown] == [child]


def test_a_loop_that_ends_tells_of_those_that_wait(home, capfd):
    parent = L.submit_task(args={"other": 0}).task_id
    child = L.submit_task(args={"n": 1}, after=[parent])

    @L.loop(required_fields=["n"], pass_args_dict=True)
    def job(args):
        pass
    job()
    assert "1 pending task waits for others (task why %s)" % child.task_id[:8] in capfd.readouterr().err


def test_a_plain_server_is_sent_nothing_of_it(home, monkeypatch):
    parent = L.submit_task(args={"n": 0})
    sent = []
    monkeypatch.setattr(L.StoreTransport, "extensions", False)
    monkeypatch.setattr(L.StoreTransport, "call", lambda self, *words: sent.append(words) or (200, {}))
    for action in (lambda: L.submit_task(args={"n": 1}, after=[parent]), lambda: L.submit_tasks([{"args": {"n": 2}}, {
            "args": {"n": 1}, "after_any": [parent]}]),
            lambda: L.update_tasks([L.TaskUpdateRequest(task_id=parent.task_id, after=["x"])])):
        with pytest.raises(L.LabtaskerRuntimeError, match="1.0.1.*after"):
            action()
    assert sent == []


@pytest.mark.slow
def test_a_pipeline_in_shell_runs_in_its_order(home):
    said = home.bash("""
        teacher=$(labtasker task submit -q --name teacher -- --n=0)
        students=$(labtasker task submit -q --name student --after $teacher --grid -- --n=1:3:1)
        labtasker task submit -q --name report --after-any "$students" -- --n=4 > /dev/null
        labtasker loop -q -j 2 -- sh -c 'echo "ran %(n)"; test %(n) != 2' 2> said.txt""")
    names = [task["task_name"] for task in home.tasks("-S", "start_time:asc")]
    assert names == ["teacher", "student", "student", "student", "report"], said
    assert [task["status"] for task in home.tasks("--name", "report")] == ["success"]
    assert harness.run_cli(["help", "after"], home.cwd).stdout.count("--after") > 3


# A queue that is paused


def test_a_paused_queue_gives_out_nothing_and_forgets_nothing(door):  # noqa: F811
    task_id = door.submit()
    running = door.fetch(fetch_id="f")
    other = door.submit()
    door("PUT", L.QUEUE_PATH, {"paused": True})
    since = door("GET", L.QUEUE_PATH)["paused_at"]
    assert since and door("POST", "tasks/next", {"heartbeat_timeout": 60}) == {"found": False, "task": None, "paused": True}
    assert door.fetch(fetch_id="f")["run_id"] == running["run_id"], "what was given out already"
    door("PUT", L.QUEUE_PATH, {"paused": True, "metadata_update": {"k": 1}})
    assert door("GET", L.QUEUE_PATH)["paused_at"] == since and door("GET", L.QUEUE_PATH)["metadata"] == {"k": 1}
    door.report(running, "success")
    again = Door(pathlib.Path(door.path).parent, door.clock)
    assert again("POST", "tasks/next", {"heartbeat_timeout": 60})["paused"]
    door("PUT", L.QUEUE_PATH, {"paused": False})
    assert door("GET", L.QUEUE_PATH)["paused_at"] is None
    assert fetched(door) == other and door.task(task_id)["status"] == "success"
    status, answer = L.answer_call(door.store, lambda: door.queue, "PUT", "/api/v1/queues/me", {"paused": True}, extensions=False)
    assert status == 200 and "paused_at" not in answer


def test_a_resume_wakes_the_fetches_that_wait(door):  # noqa: F811
    door("PUT", L.QUEUE_PATH, {"paused": True})
    queue_id = door.store.state.id_of(door.queue)
    door.store.watched_keys = {(queue_id, "pending")}
    door("PUT", L.QUEUE_PATH, {"paused": False})
    door.store.journal.flush()
    assert door.store.changed_keys == {(queue_id, "pending")}


def test_a_loop_waits_for_a_paused_queue_within_its_idle_timeout_and_says_so_once(home, capfd):
    task_id = L.submit_task(args={"n": 0}).task_id
    assert L.main(["queue", "pause"]) in (0, None)
    assert L.command_loop(["true", "%(n)"], idle_timeout_s=1) == 0
    assert L.get_task(task_id).status == "pending"
    said = capfd.readouterr()
    assert said.err.count("the queue is paused") == 1 and "Paused queue default" in said.out
    assert L.main(["task", "why", task_id]) in (0, None)
    assert "The queue has been paused for" in capfd.readouterr().out
    assert L.main(["queue", "resume", "--json"]) in (0, None)
    assert json.loads(capfd.readouterr().out)["paused_at"] is None


def test_a_loop_without_an_idle_timeout_waits_for_the_resume(home, capfd):
    import threading
    task_id = L.submit_task(args={"n": 0}).task_id
    L.pause_queue()
    resume = threading.Timer(1.0, lambda: home.cli("queue", "resume"))
    resume.start()
    assert L.command_loop(["true", "%(n)"]) == 0
    resume.join()
    assert L.get_task(task_id).status == "success"
    assert "the queue goes on" in capfd.readouterr().err


def test_a_plain_server_is_asked_for_no_pause(home, monkeypatch):
    monkeypatch.setattr(L.StoreTransport, "extensions", False)
    monkeypatch.setattr(L.StoreTransport, "call", None)
    with pytest.raises(L.LabtaskerRuntimeError, match="can't pause"):
        L.pause_queue()
