"""What a person at a terminal sees: columns, `--unique`, why, the wait's bar, watch, the editor, completion, init.

`watch` and the bar are looked at in tmux, as a person would; what a screen shows is tested without one too.
"""
import csv
import datetime
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading

import harness
import labtasker
import labtasker_cli
import pytest
from harness import wait_until
from test_cli import on_terminal

GRID = ["task", "submit", "--grid", "--name", "g", "--max-retries", "1", "--", "--lr=0.1,0.2", "--model=vit,cnn", "--steps=3"]


def editor(home, script):
    """Return an environment whose editor does this to the file $1."""
    home.write("editor.sh", "#!/bin/sh\ncp \"$1\" seen-$(ls seen-* 2>/dev/null | wc -l)\n%s\n" % script).chmod(0o755)
    return {"EDITOR": "./editor.sh"}


# ---- listings


@pytest.mark.slow
def test_arguments_that_differ_are_columns_and_those_that_do_not_are_left_out(home):
    home.cli(*GRID)
    header, first = home.cli("task", "ls").lines[:2]
    assert header.split() == ["id", "status", "name", "age", "args.lr", "args.model"]
    assert first.split()[-2:] == ["0.1", "vit"]
    assert home.cli("task", "ls", "-f", 'args.lr == 0.1 and args.model == "vit"').lines[1].endswith("lr=0.1 model=vit steps=3")
    assert "steps" in home.cli("task", "ls", "-v").stdout


def listed(tasks, width, *sort):
    """Return the lines that `task ls -S ...` shows of tasks on a terminal: (those above the table, [cells of a line])."""
    options = labtasker.parse("task ls", [word for field in sort for word in ("-S", field)])
    lines = labtasker.telling_table(tasks, [task.task_id[:8] for task in tasks], options, width).split("\n")
    assert all(labtasker.cells_wide(line) <= width for line in lines), lines
    at = next(number for number, line in enumerate(lines) if re.match("id( |$)", line))
    return lines[:at], [re.split("  +", line.rstrip()) for line in lines[at:]]


def sweep_of(count=100, **fixed):
    """Return Tasks of a sweep of six arguments that have ended, the best first."""
    def when(second):
        return labtasker.format_time(labtasker.now() - 3600 + second)
    return [labtasker.Task({
        "task_id": "%08d" % at, "status": "success", "task_name": "sweep", "created_at": when(0), "start_time": when(at),
        "last_modified": when(at + 60), "max_retries": 3, "retries": 0, "priority": 0, "worker_id": None,
        "args": dict({"lr": (1e-4, 3e-4, 0.001, 0.01)[at % 4], "model": ("resnet50", "vit_b16", "mlp")[at % 3], "seed": at % 5,
                      "batch_size": 32 << at % 2, "weight_decay": (0, 1e-4)[at // 9 % 2], "dropout": at % 7 / 10}, **fixed),
        "summary": {"loss": 0.1234567 + at / 7, "epochs": 10, "acc": 0.987654321 - at / 1000}}) for at in range(count)]


def test_which_one_won_is_seen_at_80_columns():
    above, (heads, *rows) = listed(sweep_of(), 80, "summary.acc:desc")
    assert above[0] == "same in all: status=success name=sweep epochs=10"
    assert {"lr", "model", "seed", "acc"} <= set(heads) and heads.index("acc") > heads.index("seed") > heads.index("lr")
    best = dict(zip(heads, rows[0]))
    assert [best[name] for name in ("id", "lr", "model", "seed", "acc")] == ["00000000", "0.0001", "resnet50", "0", "0.987654"]
    assert not any(cell.endswith("..") for row in rows for cell in row) and "retries" not in heads
    missing = {"batch_size", "weight_decay", "dropout", "loss"} - set(heads)
    assert above[1:] == ["no room for: %s (--columns chooses)" % name for name in missing], "what has no place is named"
    assert dict(zip(*listed(sweep_of(), 40, "summary.acc:desc")[1][:2]))["acc"] == "0.987654"
    assert "loss" in listed(sweep_of(), 40, "summary.loss")[1][0]
    wide = listed(sweep_of(), 200, "summary.acc")[1][0]
    assert wide == ["id", "lr", "model", "seed", "batch_size", "weight_decay", "dropout", "acc", "loss", "duration", "age"]


def test_what_is_the_same_in_all_rows_is_said_once_and_wrapped():
    above, (heads, *_) = listed(sweep_of(9, model="vit", **{"fixed_%d" % at: at for at in range(20)}), 60)
    assert above[0].startswith("same in all: status=success name=sweep model=vit") and "model" not in heads
    assert all(line.startswith("  ") for line in above[1:-1]) and "fixed_19=19" in " ".join(above)
    one, (heads, row) = listed(sweep_of(1), 200)
    assert one == [] and dict(zip(heads, row))["model"] == "resnet50" and "name" in heads, "a single row has all as columns"
    two = sweep_of(1) * 2
    assert "lr=0.0001 model=resnet50" in listed(two, 80)[0][0] and listed(two, 80)[1][0] == ["id", "duration", "age"]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_columns_of_odd_arguments_fit_and_tell_rows_apart(width):
    tasks = sweep_of(4)
    for at, task in enumerate(tasks):
        task.args = {"opt": {"name": ["adam", "sgd"][at % 2], "deep": {"lr": 0.1}}, "prompt": "You are an assistant " * 20 + str(at),
                     "wide": "日本語のモデル%d" % at, "near": 0.12345671 + at * 1e-8, "status": at, "flag": [True, 1, 1.0, "True"][at]}
        task.args.update({"only_%d" % at: None} if at else {"escape": "\x1b[31m"})
    heads, *rows = listed(tasks, width)[1]
    assert len(set(map(tuple, rows))) == 4 and "status" not in heads
    if width == 200:
        columns = dict(zip(heads, zip(*rows)))
        assert len(set(columns["near"])) == 4 and columns["opt.name"] == ("adam", "sgd", "adam", "sgd")
        assert set(columns["args.status"]) == set("0123") and columns["wide"][3] == "日本語のモデル3"
    assert not any("\x1b" in cell for row in rows for cell in row)
    heads, *_, last = listed(tasks, width, "args.prompt")[1]
    assert dict(zip(heads, last))["prompt"].endswith('3"'), "a long text is cut where it is alike"


def test_what_failed_is_told_by_the_last_line_of_its_error():
    tasks = sweep_of(3)
    for task, summary in zip(tasks, ({"labtasker_error": "exit code 1\nout of memory"}, {"labtasker_exception": {
            "type": "ValueError", "message": "loss:\nnot finite\n", "traceback": "..."}}, {})):
        task.status, task.summary = "failed" if summary else "success", summary
    heads, *rows = listed(tasks, 80)[1]
    assert [row[heads.index("error")] for row in rows[:2]] == ["out of memory", "ValueError: not finite"]
    assert "error" in listed(tasks[:2], 40)[1][0]


@pytest.mark.slow
def test_on_a_terminal_a_listing_has_what_differs_and_piped_all_that_it_had(home):
    home.cli(*GRID)
    code, shown = on_terminal(home, ["task", "ls"], columns=80)
    above, header, *rows = shown.splitlines()
    assert (code, above, header.split()) == (0, "same in all: status=pending name=g steps=3", ["id", "lr", "model", "age"])
    assert len(rows) == 4 and "Nothing matches" in on_terminal(home, ["task", "ls", "-s", "failed"])[1]
    piped = [home.cli("task", "ls", env={"COLUMNS": width}).lines[0].split() for width in ("40", "200")]
    assert piped == [["id", "status", "name", "age", "args.lr", "args.model"]] * 2
    assert on_terminal(home, ["task", "ls", "--columns", "args.steps"])[1].split()[:2] == ["id", "args.steps"]


@pytest.mark.slow
def test_chosen_columns_in_every_format(home):
    home.cli(*GRID)
    home.cli("loop", "-f", "args.lr < 0.2", "-c", "true %(lr) %(model) %(steps)")
    words = ["task", "ls", "-s", "success", "--columns", "args.lr,summary.acc,name,duration", "-S", "args.model"]
    assert home.cli(*words).lines[0].split() == ["id", "args.lr", "summary.acc", "name", "duration"]
    rows = list(csv.DictReader(io.StringIO(home.cli(*(words + ["--fmt", "csv"])).stdout)))
    assert [sorted(row) for row in rows] == [["args.lr", "duration", "name", "summary.acc"]] * 2
    row = json.loads(home.cli(*(words + ["--fmt", "jsonl"])).lines[0])
    assert row["name"] == "g" and row["args.lr"] == 0.1 and row["summary.acc"] is None and row["duration"] >= 0
    assert "args.lr: 0.1" in home.cli(*(words + ["--fmt", "yaml"])).stdout
    refused = home.cli("task", "ls", "--columns", "argz.lr", check=False)
    assert refused.returncode == 2 and "did you mean args" in refused.stderr


@pytest.mark.slow
def test_a_running_task_shows_its_worker_and_for_how_long(home):
    home.submit("--", "--x=1")
    labtasker.use_client(None)
    worker = labtasker.create_worker("w", {})
    labtasker.fetch_task(worker_id=worker, eta_max="1h", start_heartbeat=False)
    header, row = home.cli("task", "ls").lines
    assert header.split()[:5] == ["id", "status", "age", "duration", "worker"] and worker[:8] in row
    assert home.cli("worker", "ls", "-q", "--id", worker[:6]).lines == [worker]
    home.cli("worker", "report", worker[:6], "suspended")
    assert home.cli("worker", "delete", worker[:6], "-y").stdout == "Deleted worker %s\n" % worker


def test_a_duration_ends_with_the_attempt():
    times = ["2026-11-22T06:0%d:00+00:00" % minute for minute in range(4)]
    row = {"status": "success", "start_time": times[0], "last_modified": times[3], "created_at": times[0], "run_id": "r"}
    assert labtasker.spent_s(labtasker.Task(row)) == 180
    task = labtasker.Task(row)
    task.attempts = [{"run_id": "r", "end": times[1]}]
    assert labtasker.spent_s(task) == 60


@pytest.mark.parametrize("ends, shown, why", [
    (["pending", "timeout", "success"], "13m, last 10m", "success after 13m in 3 runs, the last 10m"),
    (["pending", "failed", "success"], "10m", "success after 10m"), (["reset", "pending", "success"], "12m, last 10m", "12m in 2 runs"),
])
def test_a_resumed_task_s_duration_is_that_of_all_its_runs(ends, shown, why):
    times = [(0, 60), (100, 220), (300, 900)]
    attempts = [{"run_id": str(at), "status": end, "start": labtasker.format_time(begin_s), "end": labtasker.format_time(end_s)}
                for at, (end, (begin_s, end_s)) in enumerate(zip(ends, times))]
    task = labtasker.Task({"task_id": "a" * 36, "status": "success", "start_time": labtasker.format_time(300), "run_id": "2",
                           "last_modified": labtasker.format_time(5000), "attempts": attempts})
    assert labtasker.TASK_COLUMNS["duration"](task) == shown and why in labtasker._what_became(task)
    task.run_id = None  # it was cancelled since
    assert labtasker.TASK_COLUMNS["duration"](task) == shown
    task.status = "pending"
    assert labtasker.TASK_COLUMNS["duration"](task) == ""


# ---- sweeps


@pytest.mark.slow
def test_unique_leaves_out_what_is_there(home):
    words = ["task", "submit", "--grid", "--unique", "--", "--lr=0.1,0.2", "--seed"]
    assert home.cli(*(words + ["1,2"])).stdout == "Submitted 4 tasks; 0 already there\n"
    dry = home.cli(*(words[:4] + ["--dry-run"] + words[4:] + ["1:3:1"]))
    assert "Would submit 2 tasks; 4 already there" in dry.stderr and len(dry.lines) == 2
    assert home.cli(*(words + ["1:3:1"])).stdout == "Submitted 2 tasks; 4 already there\n"
    assert home.cli(*(words + ["1:3:1"])).stdout == "Submitted 0 tasks; 6 already there\n"
    one = home.submit("--unique", "--", "--lr=0.1", "--seed=1")
    assert one in {task["task_id"] for task in home.tasks()} and len(home.tasks()) == 6
    home.cli("loop", "--max-tasks", "3", "-f", "args.seed == 1 and args.lr == 0.1", "--", "false", "%(lr)", "%(seed)")
    again = home.cli(*(words + ["1:3:1"]))
    assert "1 of those already there has failed; to run it again: " in again.stderr and again.stderr.endswith(" task retry %s\n" % one[:8])
    named = home.cli("task", "submit", "--unique", "--name", "n", "--", "--lr=0.1", "--seed=1")
    assert named.stdout.startswith("Submitted task ") and "0 already there" in named.stdout and named.stderr == ""
    assert "1 already there" in home.cli("task", "submit", "--unique", "--name", "n", "--", "--lr=0.1", "--seed=1").stdout


@pytest.mark.slow
def test_sweeps_in_python(both):
    ids = labtasker.submit_grid({"lr": [0.1, 0.2], "opt.name": ["adam"], "seed": range(2)}, task_name="g", args={"n": 3})
    assert len(set(ids)) == 4
    found = sorted((t.args["lr"], t.args["seed"], t.args["opt"]["name"], t.args["n"]) for t in labtasker.ls_tasks())
    assert found == [(0.1, 0, "adam", 3), (0.1, 1, "adam", 3), (0.2, 0, "adam", 3), (0.2, 1, "adam", 3)]
    again = labtasker.submit_grid({"lr": [0.2, 0.3], "seed": [0, 1]}, unique=True, task_name="g",
                                  args={"n": 3, "opt": {"name": "adam"}})
    assert again[:2] == ids[2:] and len(labtasker.ls_tasks().content) == 6
    same = {"task_name": "g", "args": {"lr": 0.3, "seed": 0, "n": 3, "opt": {"name": "adam"}}}
    assert labtasker.submit_tasks([same] * 2, unique=True) == [again[2]] * 2
    labtasker.update_tasks([labtasker.TaskUpdateRequest(task_id=again[2], args={"lr": 9})])
    other, = labtasker.submit_tasks([same], unique=True)
    assert other not in again, "the one that had these arguments was changed since"
    assert labtasker.submit_tasks([dict(same, task_name="other")], unique=True) != [other], "another name is another sweep"
    for grid in ({"model": "vit"}, {"lr": 0.1}):
        with pytest.raises(labtasker.LabtaskerTypeError):
            labtasker.submit_grid(grid)


@pytest.mark.slow
def test_two_who_submit_the_same_at_once_submit_it_once(home, monkeypatch):
    monkeypatch.setattr(labtasker, "ls_tasks", lambda **_: labtasker.TaskLsResponse(found=False, content=[]))
    first, second = (labtasker.submit_tasks([{"args": {"a": 1}}, {"args": {"a": 2}}], unique=True) for _ in "12")
    assert first == second and len(home.tasks()) == 2


@pytest.mark.slow
def test_listings_iterate_to_their_end_and_become_records(both):
    labtasker.submit_grid({"x": range(230)}, task_name="g")
    found = labtasker.ls_tasks()
    assert len(found.content) == 100 and sorted(task.args["x"] for task in found) == list(range(230))
    assert len(list(labtasker.ls_tasks(limit=100))) == 100 and len(list(labtasker.ls_tasks(limit=10 ** 4))) == 230
    assert [task.args["x"] for task in labtasker.ls_tasks(sort=[["args.x", -1]])] == list(range(229, -1, -1))
    records = labtasker.ls_tasks(extra_filter="args.x < 120").to_records()
    assert len(records) == 120 and records[0]["args.x"] == 0 and records[0]["task_name"] == "g"
    assert isinstance(records[0]["created_at"], datetime.datetime) and "args" not in records[0]
    assert "_rest" not in repr(found) and set(found.to_dict()) == {"found", "content"}
    assert len(list(labtasker.ls_workers())) == 0
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert pandas.DataFrame(records)["args.x"].sum() == sum(range(120))


# ---- why


@pytest.mark.slow
def test_why_says_what_is_in_the_way(home):
    home.cli(*GRID)
    last = home.tasks()[-1]["task_id"]
    shown = home.cli("task", "why", last[:8]).stdout
    assert "4th of 4 in line" in shown and "Nothing runs in this queue" in shown and "'%(lr)'" in shown
    shown = home.cli("task", "why", last, "-f", 'args.lr > 0.15 and args.model == "vit"', "--", "t.py", "%(lr)", "%(bs)").stdout
    for words in ("the task lacks bs", "the command lacks %(model)", 'filter\'s {"args.model"'):
        assert words in shown
    assert "args.lr" not in shown
    assert "it would take the task" in home.cli("task", "why", last, "--", "t", "%(lr)", "%(model)", "%(steps)").stdout
    labtasker.use_client(None)
    labtasker.fetch_task(eta_max="1h", start_heartbeat=False, cmd=["t.py", "%(lr)", "%(model)"], extra_filter="args.lr < 0.2")
    worker = labtasker.create_worker("w", {})
    labtasker.report_worker_status(worker, "suspended")
    shown = home.cli("task", "why", last).stdout
    assert "runs t.py '%(lr)' '%(model)' now: the command lacks %(steps)" in shown and "Worker w is suspended" in shown


@pytest.mark.slow
def test_why_tells_what_became_of_a_task(home):
    home.cli(*GRID)
    home.cli("loop", "-c", "test %(lr) = 0.1 %(model) %(steps)", check=False)
    ids = {task["status"]: task["task_id"] for task in home.tasks()}
    assert re.search(r"failed for good, after 1 of 1 runs: exit code \d.* task retry %s" % ids["failed"][:8],
                     home.cli("task", "why", ids["failed"]).stdout)


def test_why_tells_what_a_task_has_been_through(home, capsys):
    def why():
        capsys.readouterr()
        assert labtasker.main(["task", "why", task_id]) == 0
        return capsys.readouterr().out.splitlines()

    def run(status, summary=None, **more):
        task = labtasker.fetch_task(heartbeat_timeout=60).task
        labtasker.send_report(task_id, status, summary, run_id=task.run_id, **more)
    task_id = labtasker.submit_task(args={"a": 1}).task_id
    assert [line.split()[0] for line in why()] == ["Pending", "Nothing"]
    run("pending", reason="the disk was full")
    assert "Its last run was requeued: the disk was full." in why()
    run("failed", {"labtasker_error": "exit code 3"})
    assert "It failed 1 of 3 times: exit code 3." in why()
    labtasker.update_tasks([labtasker.TaskUpdateRequest(task_id=task_id, retry_delay=3600)])
    run("failed")
    assert any(re.match(r"It can start in (60|59)m: its job asked for a pause, or a run failed", line) for line in why()), why()


# ---- waiting and watching


def some_tasks(spec, begin=1000.0):
    """Return Tasks of (status, start, end) in seconds."""
    def when(second):
        return labtasker.format_time(begin + second)
    return [labtasker.Task({"task_id": "%08d" % at, "status": status, "created_at": when(0), "args": {"x": at},
                            "start_time": start and when(start), "last_modified": when(end), "max_retries": 3, "retries": 0,
                            "priority": 0})
            for at, (status, start, end) in enumerate(spec)]


def test_pace_and_progress():
    done = [("success", 10 * at + 1, 10 * at + 10) for at in range(10)]
    found = labtasker.pace(some_tasks(done + [("failed", 101, 101), ("running", 100, 100)] + [("pending", None, 0)] * 8), 1101.0)
    assert found.per_s == pytest.approx(0.11) and found.eta_s == pytest.approx(9 / 0.11)
    assert labtasker.progress(found, 100) == \
        "[################..............] 11 of 20 done, 1 failed, 1 running, 6.6/min, ETA 81s"
    assert len(labtasker.progress(found, 62)) == 62 and len(labtasker.progress(found, 30)) == 30
    nobody = labtasker.pace(some_tasks([("pending", None, 0)] * 3), 1000.0)
    assert nobody.per_s == 0 and nobody.eta_s is None and "0 of 3 done" in labtasker.progress(nobody, 80)
    assert "0 of 0" in labtasker.progress(labtasker.pace([], 0.0), 80)


@pytest.mark.slow
def test_a_sweep_asks_only_for_what_changed(home, monkeypatch):
    labtasker.submit_grid({"x": range(50)}, task_name="g")
    sweep, asked, real = labtasker.Sweep({"task_name": "g"}), [], labtasker.ls_tasks
    monkeypatch.setattr(labtasker, "ls_tasks", lambda **query: asked.append(real(**query)) or asked[-1])
    sweep.refresh()
    home.cli("task", "update", "-f", "args.x == 7", "-u", "status=cancelled", "-q")
    home.submit("--name", "g", "--", "--x=99")
    sweep.refresh()
    assert [len(one.content) for one in asked] in ([50, 2], [50, 3])  # the last one known is asked for again
    assert len(sweep.tasks) == 51 and sum(task.status == "cancelled" for task in sweep.tasks.values()) == 1
    labtasker.delete_task(asked[0].content[3].task_id)
    sweep.whole_at -= labtasker.WHOLE_S + 1
    sweep.refresh()
    assert len(sweep.tasks) == 50


def test_a_sparkline_ends_with_the_last_number_and_does_without_blocks_where_they_are_lacking():
    line = labtasker.sparkline
    assert line([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█" and line([2, float("nan"), None, 1, float("inf")]) == "█  ▁ "
    assert line([]) == "" and line([3]) == line([3, 3])[0] == "▅" and line([-1e308, 1e308]) == "▁█"
    assert [len(line(range(number), 10)) for number in (9, 10, 11, 19, 1000)] == [9, 10, 10, 10, 10] and line([0] * 999 + [1], 10)[-1] == "█"
    assert line([0, 1, 7], stream=io.TextIOWrapper(io.BytesIO(), "ascii")) == "_.#"


def test_a_task_is_shown_with_its_curves_as_comments(home, capsys):
    task_id = labtasker.submit_task(args={"lr": 1}).task_id
    task = labtasker.fetch_task(eta_max="1h").task
    for step, loss in enumerate([3, 2.5, 1.125]):
        labtasker.send_report(task_id, "running", {"loss": loss, "val": {"acc": step / 10}}, run_id=task.run_id, step=step)
    assert labtasker.main(["task", "get", task_id]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["# loss     █▆▁  1.125 at step 2", "# val.acc  ▁▄█  0.2 at step 2"]
    labtasker.main(["task", "get", task_id, "--json"])
    assert "#" not in capsys.readouterr().out


class Still:
    """A Feed that looked once."""

    def __init__(self, tasks, workers=(), error=None):
        self.found, self.asked = (tasks, {one.worker_id: one for one in workers}, error, 1), []
        self.curves, self.wanted = (None, {}), []

    def seen(self):
        return self.found

    def ask(self, query):
        self.asked.append(query)

    def want_curves(self, ids):
        self.wanted = ids


def plain(lines):
    return [re.sub("\x1b\\[[0-9;]*m", "", line) for line in lines]


MANY = [("running", 1, 1), ("running", 2, 2), ("failed", 1, 5), ("success", 1, 3)] + [("pending", None, 0)] * 60


def test_what_runs_has_its_curve_beside_it_and_an_open_task_above_all():
    feed = Still(some_tasks(MANY))
    watch = labtasker_cli.Watch(feed, {}, "q")
    assert "loss" not in "".join(plain(watch.lines(100, 24))) and feed.wanted == ["00000000", "00000001"]
    feed.curves = "loss", {"00000001": [3, None, 2, 0.123456]}
    shown = plain(watch.lines(100, 24))
    assert any(line.rstrip().endswith("loss") for line in shown) and all(labtasker.cells_wide(line) <= 100 for line in shown)
    assert [line.split()[0] for line in shown if line.rstrip().endswith("█ ▆▁ 0.1235")] == ["00000001"]
    assert "0.1235" not in "".join(plain(watch.lines(50, 24))), "a narrow screen keeps its columns"
    watch.press("down"), watch.lines(100, 24), watch.press("enter")
    assert "loss  █ ▆▁ 0.1235" in plain(watch.lines(100, 24)) and feed.wanted == ["00000001"]


def test_the_curves_of_what_runs_are_one_request(home, monkeypatch):
    ids = labtasker.submit_tasks([{"args": {"i": i}} for i in range(3)])
    for task_id in ids[:2]:
        task = labtasker.fetch_task(eta_max="1h", extra_filter={"task_id": task_id}).task
        for step in range(40):
            labtasker.send_report(task_id, "running", {"loss": 40 - step}, run_id=task.run_id, step=step)
    value, curves = labtasker_cli.curves_of(ids)
    assert value == "loss" and set(curves) == set(ids[:2]) and all(numbers[-1] == 1 and len(numbers) <= 20 for numbers in curves.values())
    assert labtasker_cli.curves_of([]) == (None, {})
    monkeypatch.setattr(labtasker_cli, "ask_route", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        labtasker_cli.curves_of(ids)


@pytest.mark.parametrize("width, height", [(80, 24), (40, 12), (200, 60), (20, 8), (80, 400)])
def test_a_screen_fits_whatever_its_size(width, height):
    watch = labtasker_cli.Watch(Still(some_tasks(MANY)), {}, "q at http://head:9321")
    for key in [None, "down", "down", "s", "s", "s", "down", "s", "s", "s", "enter", "q", "l", "q", "c"]:
        if key:
            watch.press(key)
        lines = plain(watch.lines(width, height))
        assert len(lines) == height and all(labtasker.cells_wide(line) <= width for line in lines), lines


def test_keys_choose_filter_and_ask(monkeypatch):
    feed = Still(some_tasks(MANY))
    watch = labtasker_cli.Watch(feed, {}, "q")
    shown = plain(watch.lines(100, 40))
    assert shown[5].split() == ["id", "x", "duration"]
    assert shown[6] == "Running: 2" and shown[7].startswith("> 00000000") and shown[7].split()[2] == "0"
    assert "Failed, the last first: 1" in shown and "Pending, the next first: 60" in shown
    watch.press("j")
    assert plain(watch.lines(100, 40))[8].startswith("> 00000001")
    watch.press("c")
    assert "Cancel task 00000001? [y/N] _" in plain(watch.lines(100, 40))[-2]
    changes = []
    monkeypatch.setattr(labtasker_cli, "update_tasks", lambda updates, reset_pending: changes.append(updates))
    watch.press("enter")
    assert changes == [] and "Nothing was changed" in plain(watch.lines(100, 40))[-2]
    for key in "/" + "argz.x > 1":
        watch.press(key)
    watch.press("enter")
    assert feed.asked == [] and "filter: argz.x > 1_" in plain(watch.lines(100, 40))[-2]
    watch.press("esc")
    watch.press("/")
    for key in ["backspace"] * 20 + list("args.x > 1") + ["enter"]:
        watch.press(key)
    assert feed.asked == [{"extra_filter": "args.x > 1"}]
    for key in ["s", "enter", "q", "q"]:
        assert not watch.over
        watch.press(key)
    assert watch.over


def test_keys_move_scroll_and_close_a_page(home, monkeypatch):
    worker = labtasker.Worker({"worker_id": "w-1", "worker_name": "gpu7", "status": "active"})
    tasks = some_tasks(MANY)
    tasks[0].worker_id, tasks[1].worker_id = "w-1", "w-2"
    watch = labtasker_cli.Watch(Still(tasks, [worker]), {"extra_filter": "args.x > 1"}, "q")

    def press(*keys):
        for key in keys:
            watch.press(key)
            shown = plain(watch.lines(100, 12))
        return shown
    shown = press("j", "k", "k", "nosuch")
    assert watch.current == "00000000" and [line.split()[-1] for line in shown if "0000000" in line][:2] == ["gpu7", "w-2"]
    first = press("enter")
    assert press("down") != first and watch.top == 1 and press("up", "up") == first and watch.top == 0
    watch.press("up"), watch.press("up")
    assert press("down") != first, "faster than they are shown"
    assert press("esc")[5:] == shown[5:] and watch.page is None and not watch.over
    assert press("/", *["backspace"] * 20, "enter") and watch.feed.asked == [{}], "no filter is none"
    monkeypatch.setattr(labtasker_cli, "update_tasks", lambda *_, **__: (_ for _ in ()).throw(labtasker.NotFound("there is no such task")))
    watch.feed.wake = threading.Event()
    assert "there is no such task" in press("r", "y", "enter")[-2] and watch.feed.wake.is_set()
    nothing = labtasker_cli.Watch(Still([]), {}, "q")
    for key in ("j", "c", "r", "enter"):
        nothing.lines(100, 12), nothing.press(key)
    assert nothing.line is None and nothing.page is None and "No task matches." in plain(nothing.lines(100, 12))


def test_watch_shows_the_last_lines_of_a_task_s_output(home, monkeypatch):
    monkeypatch.setattr(labtasker.HeartbeatProcess, "add", lambda *_: None)  # the run is too short for a heartbeat
    task_id = labtasker.submit_task(args={"a": 1}).task_id

    @labtasker.loop(quiet=True)
    def work(a=labtasker.Required()):
        print("first")
        print("last")
    work()
    watch = labtasker_cli.Watch(Still([labtasker.get_task(task_id)]), {}, "q")
    watch.lines(200, 12), watch.press("l")
    for height, last in ((9, ["last"]), (10, ["first", "last"]), (12, ["first", "last"])):
        assert [line for line in plain(watch.lines(200, height)) if line in ("first", "last")] == last


def test_a_watch_goes_on_after_a_mistake_and_shows_what_was_asked_for_last(home, monkeypatch):
    class Thread:
        def __init__(self, target, **_):
            self.start = lambda: None
    monkeypatch.setattr(labtasker_cli.threading, "Thread", Thread)
    feed, looks = labtasker_cli.Feed({}, 5), []
    task_id = labtasker.submit_task(args={"a": 1}).task_id

    def wait(seconds):
        looks.append((feed.seen(), seconds))
        steps.pop(0)()
    real, ask_by = labtasker_cli.ls_workers, lambda function: monkeypatch.setattr(labtasker_cli, "ls_workers", function)
    steps = [lambda: ask_by(lambda **_: 1 / 0), lambda: ask_by(lambda **query: feed.ask({"task_name": "none"}) or real(**query)),
             lambda: ask_by(real), lambda: 1 / 0]
    feed.wake.wait = wait
    with pytest.raises(ZeroDivisionError):
        feed._run()
    assert [[task.task_id for task in tasks] for (tasks, *_), _ in looks] == [[task_id], [task_id], [], []]
    assert [type(error) for (_, _, error, _), _ in looks] == [type(None), ZeroDivisionError, ZeroDivisionError, type(None)]
    assert [number for (_, _, _, number), _ in looks] == [1, 2, 2, 3] and all(seconds >= 5 for _, seconds in looks)


@pytest.mark.parametrize("typed, words, place", [
    ("argz.x > 1", "argz", 0), ("args.x >", "", 8), ("args.x > 1 and", "", 14), ('{"args.x": {"$no": 1}}', "$no", None), ("{", "takes JSON", None),
    ('{"args.x": 1, "args.x": 2}', "twice", None), ('regex(name, "((a+)+)+")', "", None),
])
def test_a_mistake_in_a_filter_is_shown_where_it_is_typed_and_the_keys_work_on(typed, words, place):
    feed = Still(some_tasks(MANY))
    watch = labtasker_cli.Watch(feed, {}, "q")
    for key in ["/"] + list(typed) + ["enter"]:
        watch.press(key)
    *_, said, above, prompt, _ = shown = plain(watch.lines(100, 40))
    assert len(shown) == 40 and feed.asked == [] and prompt.startswith("filter: %s_" % typed)
    if place is not None:
        assert above.rstrip() == " " * (len("filter: ") + place) + "v"
    said = said if above.strip() == "v" else above
    assert words in said and said.strip() and "trying again" not in said
    watch.press("x")  # it stays until what is typed is asked for
    assert plain(watch.lines(100, 40))[-2].startswith("filter: %sx_" % typed) and said in plain(watch.lines(100, 40))
    for size in ((80, 24), (40, 12), (20, 8), (20, 5)):
        assert plain(watch.lines(*size))[-2].startswith("filter: "[:size[0]])
    watch.press("esc")
    assert said not in plain(watch.lines(100, 40)) and "filter:" not in plain(watch.lines(100, 40))[-2]
    watch.press("q")
    assert watch.over


def test_a_screen_of_80_columns_tells_all_keys_and_what_went_wrong_beside_long_arguments():
    assert len("  ".join(words for _, words in labtasker_cli.KEYS.values() if words)) <= 80
    tasks = some_tasks(MANY)
    for at, task in enumerate(tasks):
        task.task_name, task.args = "a-name-that-is-rather-long", {"prompt": "%d " % at + "x" * 100, "seed": at}
        task.summary = {"acc": 0.5, "labtasker_error": "exit code 1\nmore"} if task.status == "failed" else {}
    shown = plain(labtasker_cli.Watch(Still(tasks), {}, "q").lines(80, 24))
    at = next(at for at, line in enumerate(shown) if "00000002" in line)
    assert shown[5].split() == ["same", "in", "all:", "name=a-name-that-is-rather-long"] and "q: back" in shown[-1]
    assert shown[6].split() == ["id", "prompt", "seed", "acc", "duration"]
    assert shown[at].split()[-3:-1] == ["2", "0.5"] and shown[at + 1].strip() == "more", "the last line of the error"
    assert "none running" in labtasker.progress(labtasker.pace(tasks[2:], 1000.0), 80)
    assert "none running" not in shown[1]


def test_a_summary_begins_with_what_went_wrong():
    for summary, text in [({"acc": 1}, "acc=1"), ({"labtasker_error": "exit code 1", "acc": 1}, "exit code 1 acc=1"), ({}, ""),
                          ({"labtasker_exception": {"type": "KeyError", "message": "x", "traceback": "..."}}, "KeyError: x")]:
        assert labtasker.outcome(labtasker.Task({"summary": summary})) == text


def test_bytes_of_a_terminal_become_keys():
    assert list(labtasker_cli.keys_of("j\x1b[A\x1bOB\r\x7f\x1b[5~\x1b")) == ["j", "up", "down", "enter", "backspace", "esc"]


def test_last_lines_of_a_log_are_what_a_terminal_would_show(tmp_path):
    path = tmp_path / "run.log"
    path.write_bytes(b"x\n" * 50000 + b"\x1b[31mred\x1b[0m\n 10%\r 50%\r100%\r\nend \x1b]0;owned\x07\xff\n")
    lines = labtasker_cli.last_lines(lambda: labtasker.open_plain(str(path)), 3)
    assert lines[:2] == ["red", "100%"] and lines[2].startswith("end \\x1b]0;owned\\x07")
    assert labtasker_cli.last_lines(lambda: labtasker.open_plain(str(tmp_path / "none")), 3) == []


def test_watch_without_a_terminal_prints_once_what_it_would_show_and_ends(home, capsys):
    labtasker.submit_grid({"lr": [1, 2, 3]}, max_retries=1)
    task = labtasker.fetch_task().task
    labtasker.report_task_status(task.task_id, "failed", {"labtasker_error": "exit code 1"})
    for words in ([], ["--once"]):
        assert labtasker.main(["watch"] + words) == 0
        shown = capsys.readouterr().out
        for text in ("1 of 3 done, 1 failed", "Failed, the last first: 1", "exit code 1", "Pending, the next first: 2"):
            assert text in shown
        assert "\x1b" not in shown and "q: back" not in shown and "\n> " not in shown and not shown.endswith("\n\n")
    running = labtasker.fetch_task(eta_max="1h").task
    for step in range(3):
        labtasker.send_report(running.task_id, "running", {"loss": 3 - step}, run_id=running.run_id, step=step)
    labtasker.main(["watch"])
    assert "█▄▁ 1" in capsys.readouterr().out
    assert labtasker.main(["watch", "--name", "none"]) == 0
    assert "No task matches." in capsys.readouterr().out


def test_watch_on_a_terminal_that_can_not_move_the_cursor_prints_what_changes(home, capsys, monkeypatch):
    """A line when the counts change, and one for each task that fails from then on."""
    labtasker.submit_grid({"lr": [1, 2, 3, 4]}, max_retries=1)
    shown, slept = [], []

    def end(status, error):
        task = labtasker.fetch_task(heartbeat_timeout=60).task
        labtasker.report_task_status(task.task_id, status, {"labtasker_error": error} if error else {})
    end("failed", "before")
    steps = [lambda: end("failed", "exit code 1\nout of luck"), lambda: None, lambda: end("success", None), lambda: 1 / 0]

    def sleep(seconds):
        slept.append(seconds)
        shown.append(capsys.readouterr().out.splitlines())
        steps.pop(0)()
    monkeypatch.setattr(labtasker_cli.time, "sleep", sleep)
    monkeypatch.setattr(labtasker_cli, "is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(ZeroDivisionError):
        labtasker_cli.do_watch(labtasker.parse("watch", ["--interval", "7"]))
    assert ["1 of 4 done, 1 failed" in shown[0][0], "2 of 4 done, 2 failed" in shown[1][0], shown[2], "3 of 4 done, 2 failed" in shown[3][0]] == [
        True, True, [], True]
    assert [len(lines) for lines in shown] == [1, 2, 0, 1] and min(slept) >= 7
    assert re.match("    failed: [0-9a-f]{8}  lr=2  .*out of luck$", shown[1][1]), shown


@pytest.fixture
def tmux(home, tmp_path):
    """Return a function: start a command in a terminal of that size, of which `show()` is what it shows."""
    if not shutil.which("tmux"):
        pytest.skip("tmux is not installed")
    base = ["tmux", "-S", str(tmp_path / "tmux.sock")]
    env = harness.clean_env(dict(home.env, TERM="xterm-256color", NO_COLOR="", COLUMNS=""))

    class Pane:
        def __init__(self, words, width=100, height=30):
            line = "%s; echo EXIT $?; stty -a | grep -o -- '-\\?icanon'; sleep 60" % " ".join(
                shlex.quote(word) for word in [sys.executable, str(harness.MODULE)] + words)
            subprocess.check_call(base + ["-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height), line],
                                  cwd=str(home.cwd), env=env)

        def show(self):
            return subprocess.check_output(base + ["capture-pane", "-p"], env=env).decode()

        def type(self, *keys):
            subprocess.check_call(base + ["send-keys"] + list(keys), env=env)

        def resize(self, width, height):
            subprocess.check_call(base + ["resize-window", "-x", str(width), "-y", str(height)], env=env)

        def until(self, words):
            return wait_until(lambda: words in self.show() and self.show(), "%r on the screen" % words,
                              never=lambda _: print(self.show()))
    yield Pane
    subprocess.call(base + ["kill-server"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_watch_in_a_terminal(home, tmux):
    """Look, choose, open, resize, filter, cancel, retry; Ctrl-C gives the terminal back."""
    home.cli(*GRID)
    home.cli("loop", "-c", "test %(lr)%(model) != 0.2vit || exit %(steps)", check=False)
    pending = home.submit("--name", "later", "--", "--lr=5")
    pane = tmux(["watch", "--interval", "0.3"])
    shown = pane.until("4 of 5 done, 1 failed")
    for words in ("pending 1  running 0  success 3  failed 1", "Failed, the last first: 1", "exit code 3", "> ", "q: back"):
        assert words in shown
    pane.type("Enter")
    assert "task_name: g" in pane.until("labtasker_error: exit code 3")
    pane.resize(60, 14)
    pane.type("q")
    pane.until("Failed, the last first: 1")
    pane.type("r")
    pane.until("Retry task")
    pane.type("y", "Enter")
    pane.until("Pending, the next first: 2")
    pane.type("/", "args.lr > 1", "Enter")
    assert "> " + pending[:8] in pane.until("0 of 1 done")
    pane.type("c", "y", "Enter")
    pane.until("cancelled 1")
    assert home.task(pending)["status"] == "cancelled"
    pane.type("C-c")
    shown = pane.until("icanon")
    assert "EXIT 130" in shown and "-icanon" not in shown and "Pending" not in shown


@pytest.mark.slow
def test_wait_shows_a_bar_on_a_terminal(home, tmux):
    home.cli(*GRID)
    pane = tmux(["task", "wait"], width=80)
    pane.until("] 0 of 4 done")
    home.cli("loop", "-c", "test %(lr)%(model) != 0.2vit || exit %(steps)", check=False)
    assert re.search(r"\[#{20,}\] 4 of 4 done, 1 failed, [\d.]+/s", pane.until("EXIT 4"))


@pytest.mark.slow
def test_watch_gives_the_terminal_back_while_it_is_suspended_and_as_it_is_ended(home):
    labtasker.submit_task(args={"a": 1})
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before, process = termios.tcgetattr(side), subprocess.Popen(
        [sys.executable, str(harness.MODULE), "watch"], cwd=str(home.cwd), env=harness.clean_env(dict(home.env, TERM="xterm")),
        stdin=side, stdout=side, stderr=subprocess.PIPE)

    shown = bytearray()

    def until(text):
        while text not in shown:
            assert select.select([main], [], [], 20)[0], shown
            shown.extend(os.read(main, 65536))
        del shown[:shown.index(text) + len(text)]  # what follows may have come with it
    other, own = b"\x1b[?1049h", b"\x1b[?1049l"
    until(other), until(b"Pending, the next first: 1")
    process.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    until(own)
    assert termios.tcgetattr(side) == before
    process.send_signal(signal.SIGCONT)
    until(other), until(b"Pending, the next first: 1")
    process.send_signal(signal.SIGTERM)
    assert (process.wait(20), process.communicate()[1]) == (128 + signal.SIGTERM, b"")
    until(own)
    assert termios.tcgetattr(side) == before
    os.close(main), os.close(side)


# ---- editing


@pytest.mark.slow
def test_tasks_are_edited_in_one_transaction(home):
    home.cli(*GRID)
    env = editor(home, "sed -i 's/^args.lr = 0.1/args.lr = 0.7/; /args.steps/d; s/^priority = 0/priority = 5/' \"$1\"")
    before = len((home.folder / "journal.jsonl").read_text().splitlines())
    result = home.cli("task", "update", "-f", 'args.model == "vit"', "--editor", env=env)
    assert result.stdout == "Updated 2 tasks\n"
    lines = (home.folder / "journal.jsonl").read_text().splitlines()[before:]
    assert sum('"priority"' in line for line in lines) == 1
    assert sorted((t["args"]["lr"], t["priority"]) for t in home.tasks("-f", 'args.model == "vit"')) == [(0.2, 5), (0.7, 5)]
    assert all(("steps" in t["args"]) == (t["args"]["model"] == "cnn") for t in home.tasks())
    form = (home.cwd / "seen-0").read_text()
    assert "# created_at: " in form and "\nargs.lr = 0.1\n" in form and '\nargs.model = "vit"\n' in form
    assert os.listdir(str(home.folder)) == ["journal.jsonl"] or not [n for n in os.listdir(str(home.folder)) if "edit" in n]


@pytest.mark.parametrize("script", ["true", "exit 0 # saved as it was"])
@pytest.mark.slow
def test_nothing_saved_nothing_changed(home, script):
    home.cli(*GRID)
    before = home.tasks()
    result = home.cli("task", "update", "-s", "pending", "--editor", env=editor(home, script))
    assert "Nothing was changed" in result.stderr and home.tasks() == before


WRONG = [  # what the editor does; words of the message; the line that they stand below
    ("s/^priority = 0/priority = high/", "priority", "priority = high"),
    ("s/^args.lr = .*/args.lr/", "write field = value", "args.lr"),
    ("s/^# created_at: .*/created_at = 1/", "can't update created_at", "created_at = 1"),
    ("s/^task_name = g/task_name = two words/", "two words", "task_name = two words"),
    ("s/^max_retries = .*/max_retries = 2\\nmax_retries = 3/", "max_retries is there twice", "max_retries = 3"),
    ("s/^task .*/task nobody/", "no task nobody", "task nobody"),
    ("/^priority/d", "the line of priority is missing", "status = pending"),
    ("s/^status = .*/status = running/", "InvalidStateTransition", None),
    ("s/^args.lr = .*/args.lr = 1\\nargs.lr.x = 2/", "args.lr.x collides with args.lr", "args.lr.x = 2"),
]


@pytest.mark.parametrize("change, words, line", WRONG, ids=[row[1] for row in WRONG])
@pytest.mark.slow
def test_what_is_wrong_is_told_below_its_line_and_nothing_is_changed(home, change, words, line):
    task_id = home.submit("--name", "g", "--", "--lr=1")
    before = home.task(task_id)
    result = home.cli("task", "update", "--id", task_id, "--editor", env=editor(home, "sed -i '%s' \"$1\"" % change), check=False)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result
    task, text = labtasker.Task(before), (home.cwd / "seen-0").read_text()
    (home.cwd / "f").write_text(text)
    subprocess.check_call(["sed", "-i", change, str(home.cwd / "f")])
    text = (home.cwd / "f").read_text()
    if line:
        with pytest.raises(labtasker_cli.Mistakes) as error:
            labtasker_cli.read_form(text, [task])
        marked = labtasker_cli.with_marks(text, error.value.args[0])
        at = marked.split("\n").index(line)
        assert words in marked.split("\n")[at + 1] and labtasker_cli.without_marks(marked) == text
    assert home.task(task_id) == before


def test_a_form_reads_back_as_what_was_written():
    values = [None, True, 0, -1.5, 1e300, "", "x", "two words", "a = b", "a\nb", "#x", "日本", "\x1b[31m", [1, [2]], [], {}, {"a": {"b": 1}}, "null", "1"]
    args = {"k%d" % at: value for at, value in enumerate(values)}
    row = {"task_id": labtasker.new_id(), "task_name": None, "status": "pending", "args": args, "metadata": {}, "summary": {"a-b": 1},
           "cmd": ["x", "%(a)"], "heartbeat_timeout": None, "task_timeout": 1.5, "max_retries": 3, "priority": -1, "retries": 0}
    task = labtasker.Task(row)
    text = labtasker_cli.form_of([task])
    assert labtasker_cli.read_form(text, [task]) == []
    for value in values[1:]:
        changed = text.replace("args.k0 = null", "args.k0 = " + json.dumps(value))
        update, = labtasker_cli.read_form(changed, [task])
        assert update.to_dict()["args"]["k0"] == value and type(update.to_dict()["args"]["k0"]) is type(value)


def test_a_mistake_in_a_form_is_told_once_whatever_else_was_changed():
    """Also where a line was deleted, so that all of its field is put together anew."""
    row = {"task_id": labtasker.new_id(), "status": "pending", "args": {"a": 1, "b": 2}, "metadata": {}, "summary": {}, "priority": 0}

    def mistakes(before, after, **fields):
        task = labtasker.Task(dict(row, **fields))
        text = labtasker_cli.form_of([task])
        assert before in text
        with pytest.raises(labtasker_cli.Mistakes) as error:
            labtasker_cli.read_form(text.replace(before, after), [task])
        lines = text.replace(before, after).split("\n")
        return {lines[number - 1]: words for number, words in error.value.args[0].items()}
    for left in ("args.a = 1\n", ""):
        found = mistakes("args.a = 1\nargs.b = 2\n", left + "args..c = 1\n")
        assert list(found) == ["args..c = 1"] and "the key 'args..c' may only have letters" in found["args..c = 1"]
    found = mistakes("args.b = 2\n", "", args={"two words": 1, "b": 2})  # another server took it
    assert list(found) == ["status = pending"] and "'two words'" in found["status = pending"]


@pytest.mark.slow
def test_the_editor_opens_again_with_the_mistake_in_it(home):
    task_id = home.submit("--name", "g", "--", "--lr=1")
    env = editor(home, "grep -q '^#! ' \"$1\" && sed -i 's/high/9/' \"$1\" || sed -i 's/^priority = 0/priority = high/' \"$1\"")
    code, shown = on_terminal(home, ["task", "update", "--id", task_id], [("[Y/n]", "\n")], env=env)
    assert code == 0 and "Updated 1 task" in shown, shown
    assert home.task(task_id)["priority"] == 9
    again = (home.cwd / "seen-1").read_text().split("\n")
    assert again[again.index("priority = high") + 1].startswith("#! ")


@pytest.mark.slow
def test_without_updates_and_without_a_terminal_it_says_what_to_give(home):
    home.cli(*GRID)
    result = home.cli("task", "update", "-s", "pending", check=False)
    assert result.returncode == 2 and "-u field=value" in result.stderr and "--editor" in result.stderr


def test_an_editor_that_can_not_run_or_fails_is_named(home, monkeypatch):
    monkeypatch.setattr(labtasker_cli, "is_terminal", lambda stream: False)
    for editor, words in ((None, "no terminal for an editor"), ("false -x", "the editor false ended with 1: nothing was changed"),
                          ("/no/such/editor", "can't start the editor /no/such/editor")):
        monkeypatch.delenv("VISUAL", raising=False)
        monkeypatch.setenv("EDITOR", editor or "")
        with pytest.raises(labtasker.LabtaskerError, match=words):
            labtasker_cli.run_editor("form.txt")


def test_quietly_edited_tasks_are_not_told(home, capsys, monkeypatch):
    def editor(path):
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text.replace("priority = 0", "priority = 5"))
    task_id = labtasker.submit_task(args={"a": 1}).task_id
    monkeypatch.setattr(labtasker_cli, "run_editor", editor)
    capsys.readouterr()
    assert labtasker.main(["task", "update", "--id", task_id, "--editor", "-q"]) == 0
    assert capsys.readouterr().out == "" and labtasker.get_task(task_id).priority == 5


# ---- init


@pytest.mark.slow
def test_init_tests_what_is_typed_as_it_comes(server, home):
    code, shown = on_terminal(home, ["init"], [
        ("[none]", "http://127.0.0.1:9\n"), ("anyway? [y/N]", "n\n"), ("[none]", server.url + "\n"), ("[default]", "two words\n"),
        ("[default]", "test-queue\n"), ("queue:", "wrong\n"), ("own password:", "test-password\n")])
    assert code == 0, shown
    for words in ("no answer from http://127.0.0.1:9", server.url + " answers, in", "not \"two words\"", "another password",
                  "Queue test-queue exists already", "Next: python3 %s task submit" % harness.MODULE):
        assert words in shown, shown
    assert "test-password" in (home.folder / "config.toml").read_text()


# ---- completion


@pytest.mark.parametrize("typed, words", [
    (["ta"], ["task"]), (["task", "co"], ["count"]), (["task", "ls", "-s", "f"], ["failed"]), (["task", "ls", "--status=f"], ["--status=failed"]),
    (["task", "ls", "--sta"], ["--status"]), (["completion", ""], ["bash", "zsh", "fish"]), (["help", "jo"], ["journal"]), (["help", "journal", "st"], ["stats"]),
    (["task", "count", "--by", "args."], ["args.lr", "args.model"]), (["task", "ls", "--columns", "name,args.l"], ["name,args.lr"]),
    (["task", "update", "-u", "prio"], ["priority="]), (["task", "submit", "--name", ""], ["g"]), (["loop", "--", "pyt"], []),
    (["serve", "--fsync", "n"], ["never"]), (["nosuch", "x"], []), (["worker", "report", ""], [])])
@pytest.mark.slow
def test_what_completion_offers(home, typed, words):
    labtasker.submit_task("g", {"lr": 1, "model": "vit"})
    found = labtasker_cli.completions(typed[:-1], typed[-1])
    assert found[:len(words)] == words and (words or not found or typed[0] == "worker")


@pytest.mark.slow
def test_completion_of_live_ids_and_of_nobody(home):
    task_id = home.submit("--", "--x=1")
    assert home.cli("completion", "fish", "--", "labtasker", "task", "get", task_id[:3]).lines == [task_id]
    gone = home.cli("completion", "zsh", "--", "labtasker", "task", "get", "", env={"LABTASKER_URL": "http://127.0.0.1:9", "LABTASKER_PASSWORD": "x"})
    assert (gone.stdout, gone.stderr) == ("", "")


def shell(name):
    if not shutil.which(name):
        pytest.skip("%s is not installed" % name)
    return name


@pytest.mark.slow
def test_bash_completes(home):
    home.submit("--name", "sweep-1", "--", "--x=1")
    result = home.bash("""
eval "$(labtasker completion bash)"
try() { COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _labtasker; echo "${COMPREPLY[*]}"; }
try labtasker task co; try labtasker task ls -s f; try labtasker task ls --status = f; try labtasker task wait --name sw""")
    assert result.lines == ["count", "failed", "failed", "sweep-1"] and result.stderr == "", result


@pytest.mark.parametrize("name", ["zsh", "fish"])
@pytest.mark.slow
def test_other_shells_can_read_their_script(home, name):
    script = home.write("script", home.cli("completion", name).stdout)
    result = harness.run([shell(name), "-n", script], home.cwd)
    assert result.stderr == ""
