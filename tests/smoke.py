#!/usr/bin/env python3
"""The main job from end to end, with the standard library alone: `python3.6 tests/smoke.py`.

By the command line and by import, on the embedded store and over a server, in a temporary folder to which labtasker.py
alone is copied: as a module, so that Python compiles it once, and once as a script. Prints a line a step; a step that
goes wrong ends it with exit code 1.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

MODULE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "labtasker.py")

JOB = """
import sys
import labtasker
lr = float(sys.argv[1])
labtasker.report_task_status(task_id=labtasker.task_info().task_id, status="running", summary={"acc": 1 - lr})
"""

DECORATED = """
import labtasker
from labtasker import Required

for value in (1, 2, 3):
    labtasker.submit_task(task_name="sum", args={"a": value, "b": str(value)}, priority=value)

seen = []

@labtasker.loop(required_fields=["a", "b"])
def main(a: labtasker.Annotated[int, Required()], b: int = Required()):
    seen.append(a)
    labtasker.report_task_status(task_id=labtasker.task_info().task_id, status="running", summary={"sum": a + b})

main()
assert seen == [3, 2, 1], seen
found = labtasker.ls_tasks(status="success", extra_filter='task_name == "sum"').content
assert sorted(t.summary["sum"] for t in found) == [2, 4, 6], found

from labtasker.api_models import TaskUpdateRequest
labtasker.update_tasks([TaskUpdateRequest(**{"_id": found[0].task_id, "args": {"b": 9}})], reset_pending=True)
again = labtasker.ls_tasks(task_id=found[0].task_id).content[0]
assert again.status == "pending" and again.args["b"] == 9 and again.args["a"] == found[0].args["a"], again
assert {t.task_id for t in labtasker.as_completed(found[1:])} == {t.task_id for t in found[1:]}
for task in found:
    labtasker.delete_task(task_id=task.task_id)
assert labtasker.ls_tasks(extra_filter='task_name == "sum"').content == []
drawn = labtasker.drawn({"lr": "log:1e-4:1e-1", "layers": "2:8", "model": ["a", "b"]}, 2, 7)  # the same on every Python
assert drawn == [{"lr": 0.00099143, "layers": 3, "model": "b"}, {"lr": 0.0840369, "layers": 8, "model": "b"}], drawn
"""


def command(args, stdin=None, **env):
    """Return what the command line prints with these arguments, or end with its output."""
    return python(["-m", "labtasker"] + args, stdin, **env)


def python(args, stdin=None, **env):
    process = subprocess.Popen([sys.executable] + args, env=dict(environment(), **env), universal_newlines=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(stdin or "")
    if process.returncode or "Warning: " in stderr:
        sys.exit("failed: %s\n%s%s" % (" ".join(args), stdout, stderr))
    return stdout


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LABTASKER_") and k != "PYTHONDONTWRITEBYTECODE"}
    return dict(kept, PYTHONPATH=os.path.abspath("module"), PYTHONIOENCODING="utf-8", PYTHONWARNINGS="error", PYTHONDEVMODE="1")


def check(what, is_true, shown):
    if not is_true:
        sys.exit("failed: %s: %r" % (what, shown))
    print("  " + what)


def listing(*args, **env):
    shown = command(["task", "ls", "--no-pager", "--fmt", "jsonl"] + list(args), **env)
    return [json.loads(line) for line in shown.splitlines()]


def main_job(**env):
    """Submit, run, list, update, delete: by the command line, then by import."""
    with open("job.py", "w") as file:
        file.write(JOB)
    for lr in ("0.1", "0.2", "0.3"):
        command(["task", "submit", "--name", "smoke", "--metadata", '{"tags": ["v1"]}', "--", "--lr=" + lr], **env)
    check("three tasks are pending", [t["status"] for t in listing(**env)] == ["pending"] * 3, listing(**env))
    command(["loop", "--", sys.executable, "job.py", "%(lr)"], **env)
    ranked = listing("-s", "success", "-S", "summary.acc:desc", **env)
    check("a loop ran them; the best is first", [t["summary"]["acc"] for t in ranked] == [0.9, 0.8, 0.7], ranked)
    found = listing("-f", 'args.lr > 0.15 and "v1" in list(metadata.tags)', **env)
    check("a filter finds two", [t["args"]["lr"] for t in found] == [0.2, 0.3], found)
    best = ranked[0]["task_id"]
    command(["task", "update", "--id", best, "-u", "args.lr=0.5", "--reset-pending", "--quiet"], **env)
    changed = listing("--id", best, **env)[0]
    check("an update puts one back", (changed["status"], changed["args"]) == ("pending", {"lr": 0.5}), changed)
    ids = command(["task", "ls", "-q", "--no-pager"], **env)
    command(["task", "delete", "-y"], stdin=ids, **env)
    check("ids on standard input are deleted", listing(**env) == [], listing(**env))
    with open("decorated.py", "w") as file:
        file.write(DECORATED)
    python(["decorated.py"], **env)
    check("a decorated loop ran, highest priority first", True, None)


def serve():
    """Return (process, URL) of a server that listens."""
    with open("server.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "labtasker", "serve", "--port", "0", "--db-path", "server/journal.jsonl"],
                                   env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with open("server.log") as log:
            shown = log.read()
        if "listening on " in shown:
            return process, shown.split("listening on ", 1)[1].split()[0].rstrip(",")
        time.sleep(0.02)
    process.kill()
    sys.exit("failed: the server does not listen\n" + shown)


def main():
    print("Python %s.%s.%s" % sys.version_info[:3])
    before, folder = os.getcwd(), tempfile.mkdtemp(prefix="labtasker-smoke-")
    os.chdir(folder)
    try:
        os.mkdir("module")
        shutil.copy(MODULE, "module")
        check("the script runs", "task ls" in python([os.path.join("module", "labtasker.py"), "--help"]), None)
        print("embedded store")
        main_job()
        os.mkdir("server")
        process, url = serve()
        try:
            print("server on " + url)
            env = {"LABTASKER_URL": url, "LABTASKER_QUEUE": "smoke", "LABTASKER_PASSWORD": "secret"}
            command(["queue", "create-from-config"], **env)
            main_job(**env)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
        with open("server.log") as log:
            shown = log.read()
        check("the server ended well, without a warning of Python", process.returncode == 0 and "Warning: " not in shown, shown)
    finally:
        os.chdir(before)
        shutil.rmtree(folder)
    print("passed")


if __name__ == "__main__":
    main()
