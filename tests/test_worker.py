"""The loop: what it runs, what it reports, how it stops. Real stores, real processes, real signals."""
import errno
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import types

import hypothesis
import pytest
from hypothesis import strategies

import harness
import labtasker
from harness import wait_until
from labtasker import Required, TaskUpdateRequest

FAST_BEATS = "[task]\nheartbeat_interval = 1\n"


def submit(count=1, **options):
    """Return the ids of tasks with args {"n": 0}, {"n": 1}, ..."""
    return [labtasker.submit_task(args={"n": n}, **options).task_id for n in range(count)]


def task(task_id):
    return labtasker.get_task(task_id)


def start_script(place, text, **options):
    """Return the Popen of a Python script with this text; its output is in the file `.log_path`."""
    script = place.write("script-%d.py" % len(place.started), "import labtasker, os, signal, subprocess, sys, time\n"
                         "from labtasker import Required\n" + text)
    log = place.cwd / ("started-%d.log" % len(place.started))
    process = harness.start([sys.executable, script], place.cwd, log, dict(place.env, **options.get("env", {})))
    process.log_path = log
    place.started.append(process)
    return process


def output(process):
    return process.log_path.read_text(encoding="utf-8", errors="replace")


def wait_for_line(process, text):
    """Return the output once it has the text; fails at once when the process ends without."""
    def ended(_):
        return process.poll() is not None and text not in output(process)
    wait_until(lambda: text in output(process), "%r in the output" % text, never=ended)
    return output(process)


def wait_for_end(process, timeout_s=30):
    """Return the exit code."""
    wait_until(lambda: process.poll() is not None, "the loop ends", timeout_s=timeout_s)
    return process.returncode


def children(pid):
    """Return the pids of a process' children."""
    folder = pathlib.Path("/proc/%d/task" % pid)
    return [int(child) for path in folder.glob("*/children") for child in path.read_text().split()]


def is_alive(pid):
    try:
        return pathlib.Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_task(task_id, status):
    """Return the task once it has the status."""
    def look():
        found = task(task_id)
        return found if found.status == status else None
    return wait_until(look, "task is %s" % status)


# The states of a loop and of its slots

STATES = {"Loop": labtasker.LOOP_MOVES, "Slot": labtasker.SLOT_MOVES, "Run": labtasker.RUN_MOVES}


@pytest.mark.parametrize("name", STATES)
def test_the_diagram_in_the_docstring_is_made_from_the_table(name):
    width = max(map(len, STATES[name])) + 2
    rows = ["        " + state.ljust(width) + ", ".join("%s -> %s" % pair for pair in row.items()) for state, row in STATES[name].items()]
    assert len(rows) > 4 and [row.strip() for row in rows] == [
        line.strip() for line in getattr(labtasker, name).__doc__.rstrip().split("\n")[-len(rows):]]  # 3.13 takes indents away


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_a_row_and_is_reached(name):
    first = next(iter(STATES[name]))
    assert {state for row in STATES[name].values() for state in row.values()} | {first} == set(STATES[name])


def test_an_event_without_a_row_is_refused(home):
    loop = labtasker.Loop(None, {})
    slot, = loop.slots
    with pytest.raises(labtasker.InvalidStateTransition, match="the loop is starting, which does not allow 'emptied'"):
        loop.move("emptied")
    slot.move("wait")
    with pytest.raises(labtasker.InvalidStateTransition, match="slot 0 is waiting, which does not allow 'begin'"):
        slot.move("begin")
    run = labtasker.Run("t1", "r1", "w1")
    with pytest.raises(labtasker.InvalidStateTransition, match="the run of task t1 is fetched, which does not allow 'raise'"):
        run.move("raise")
    assert (loop.state, slot.state, run.state) == ("starting", "waiting", "fetched")


def test_a_run_keeps_every_event_of_its_threads(home):
    """What a function's thread and a signal bring at the same time is legal in either order, and neither is lost."""
    table = labtasker.RUN_MOVES
    for one, other in itertools.combinations(("ask", "stop", "insist", "raise"), 2):
        both = [row for row in table.values() if one in row and other in row]
        assert both or (one, other) == ("ask", "insist")
        for row in both:
            after = {table[row[one]].get(other), table[row[other]].get(one)}
            assert None not in after
    run = labtasker.Run("t1", "r1", "w1")
    for event in ["begin"] + ["ask"] * 1000 + ["stop"] * 1000:
        run.move(event)
    assert (run.state, run.events) == ("notified", ["begin", "ask", "stop"])


def test_a_loop_that_has_failed_stays_so_until_its_time_is_up(home):
    loop = labtasker.Loop(None, {})
    for event, state in (("answered", "working"), ("failed", "failed"), ("answered", "failed"), ("time_up", "timed_out"), ("failed", "timed_out")):
        loop.move(event)
        assert loop.state == state


# What a decorated loop runs and reports


def test_every_pending_task_is_run_once_by_priority(both):
    ids = submit(3)
    urgent = labtasker.submit_task(args={"n": 9}, priority=5).task_id
    seen = []

    @labtasker.loop()
    def main(n: str = Required()):
        seen.append((labtasker.current_task_id(), n))
    assert main() is None
    assert seen == [(urgent, "9")] + list(zip(ids, ["0", "1", "2"]))
    assert [task(i).status for i in ids + [urgent]] == ["success"] * 4
    assert main() is None and len(seen) == 4


def test_tasks_of_another_shape_are_left(both):
    more = labtasker.submit_task(args={"n": 1, "lr": 2}).task_id
    less = labtasker.submit_task(args={"m": 1}).task_id
    right, = submit()
    seen = []

    @labtasker.loop()
    def exactly(n=Required()):
        seen.append(labtasker.current_task_id())

    @labtasker.loop(required_fields=["n"], pass_args_dict=True)
    def at_least(args, note):
        seen.append((args, note))
    exactly()
    assert seen == [right]
    at_least("x")
    assert seen[1:] == [({"n": 1, "lr": 2}, "x")]
    assert task(more).status == "success" and task(less).status == "pending"


def test_a_filter_chooses(both):
    submit(4)
    seen = []

    @labtasker.loop(extra_filter='args.n > 1 and created_at > date("1 hour ago")')
    def main(n=Required()):
        seen.append(n)
    main()
    assert seen == [2, 3]


def test_dates_of_a_filter_are_settled_once():
    request = labtasker.fetch_request(["n"], 'created_at > date("1 hour ago")', None, None, "1h", None)
    assert "_dt" in json.dumps(request["extra_filter"])


def test_an_exception_fails_the_task_and_never_the_loop(home, capfd):
    bad, good = submit(2, max_retries=2)

    @labtasker.loop()
    def main(n=Required()):
        if n == 0:
            raise ValueError("no luck")
    main()
    assert task(good).status == "success"
    failed = task(bad)
    assert (failed.status, failed.retries) == ("failed", 2)
    noted = failed.summary["labtasker_exception"]
    assert (noted["type"], noted["message"]) == ("ValueError", "no luck")
    assert 'raise ValueError("no luck")' in noted["traceback"] and "in run_function" not in noted["traceback"]
    assert noted["traceback"] in capfd.readouterr().err


def test_a_cast_that_fails_fails_the_task_with_the_place(home):
    bad = labtasker.submit_task(args={"n": "x"}, max_retries=1).task_id

    @labtasker.loop()
    def main(n: int = Required()):
        raise AssertionError("not to be run")
    main()
    assert task(bad).summary["labtasker_exception"]["message"] == "parameter 'n': expected int, got 'x' (str)"


@pytest.mark.parametrize("code, status", [
    ("sys.exit()", "success"), ("sys.exit(0)", "success"), ("sys.exit(3)", "failed"), ("sys.exit('why')", "failed"),
    ("raise BaseException('x')", "failed"), ("raise GeneratorExit", "failed"), ("raise labtasker.TaskCancelled", "failed"),
    ("raise UnicodeDecodeError('utf-8', b'x', 0, 1, '\\ud800\\x1b')", "failed"), ("1 / 0", "failed"), ("pass", "success"),
])
def test_whatever_a_function_does_the_loop_goes_on(home, code, status):
    first, second = submit(2, max_retries=1)
    done = []

    @labtasker.loop()
    def main(n=Required()):
        done.append(n)
        if n == 0:
            exec(code, {"sys": sys, "labtasker": labtasker})
    main()
    assert done == [0, 1]
    assert (task(first).status, task(second).status) == (status, "success")


# Between a function's end and its report


class NoText(Exception):
    def __str__(self):
        return None


class Fails(Exception):
    def __str__(self):
        raise KeyError("in __str__")
    __repr__ = __str__


class Leaves(BaseException):
    def __str__(self):
        sys.exit(0)


class OfNoClass(Exception):
    @property
    def __class__(self):
        raise RuntimeError("no class")


class Nameless(type):
    __name__ = property(lambda self: 1 / 0)


class OfNameless(Exception, metaclass=Nameless):
    pass


class NoCode(SystemExit):
    code = property(lambda self: 1 / 0)


class OddText(str):
    def __getitem__(self, key):
        raise IndexError(key)


def caused(error, cause):
    error.__cause__ = cause
    return error


def endless():
    return endless()


ODD_ERRORS = [NoText(), Fails(), Leaves(), OfNoClass(), OfNameless(), NoCode(), GeneratorExit(), MemoryError(), SystemExit("text"),
              Exception("\ud800 half"), Exception("x" * 10 ** 6), Exception(OddText("odd")), caused(ValueError("v"), Fails()),
              SyntaxError("no", (3, 4, 5, object())), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), Exception(Fails())]
if sys.version_info >= (3, 11):
    ODD_ERRORS.append(BaseExceptionGroup("group", [Fails(), KeyboardInterrupt()]))  # noqa: F821


def test_an_exception_of_whatever_kind_fails_its_task_and_the_loop_goes_on(home):
    ids, seen = submit(len(ODD_ERRORS) + 2, max_retries=1), []

    @labtasker.loop(max_consecutive_failures=0)
    def main(n=Required()):
        seen.append(n)
        if n < len(ODD_ERRORS):
            raise ODD_ERRORS[n]
        if n == len(ODD_ERRORS):
            endless()
    main()
    assert sorted(seen) == list(range(len(ids)))
    found = [task(one) for one in ids]
    assert [one.status for one in found] == ["failed"] * (len(ids) - 1) + ["success"]
    raised = [one.summary["labtasker_exception"] for one in found[:-1]]
    assert all(one["type"] and one["message"] is not None and one["traceback"] for one in raised)
    assert "RecursionError" in raised[-1]["traceback"]


def test_no_exit_code_of_a_function_is_taken_for_another():
    codes = {None: 0, 0: 0, 3: 3, True: 1, 256: 0, -1: 255, 2 ** 70: 255, "text": None}
    assert {code: labtasker._code_of_exit(SystemExit(code)) for code in codes} == codes
    assert labtasker._code_of_exit(NoCode()) is None and labtasker._code_of_exit(OfNoClass()) is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["return", "sys.exit(0)", "sys.exit('text')", "raise ValueError('in the child')", "1 / 0"])
def test_a_child_that_the_function_forks_ends_where_it_comes_back(home, how):
    ids = submit(2, max_retries=1)
    loop = start_script(home, """
@labtasker.loop()
def main(n=Required()):
    pid = os.fork()
    if pid == 0:
        %s
    code = os.waitpid(pid, 0)[1]
    labtasker.report_task_status(labtasker.current_task_id(), "running", {"pid": os.getpid(), "code": code})
main()
""" % how)
    assert wait_for_end(loop) == 0, output(loop)
    found = [task(one) for one in ids]
    assert [one.status for one in found] == ["success"] * 2, output(loop)
    assert {one.summary["pid"] for one in found} == {loop.pid}
    assert {one.summary["code"] for one in found} == {0 if how in ("return", "sys.exit(0)") else 256}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["os.closerange(3, 256)", "os.closerange(0, 256)",
                                 "n or (os.closerange(3, 256), kept.extend(open('own-%d' % i, 'w') for i in range(60)))",
                                 "labtasker.finish('success'); os.closerange(3, 256)"])
def test_a_function_that_closes_descriptors_takes_none_of_the_loops(both, how):
    ids = submit(3, max_retries=1)
    loop = start_script(both, """
kept = []
@labtasker.loop()
def main(n=Required()):
    if n < 2:
        %s
main()
for file in kept:
    file.write("x")
    file.close()
""" % how)
    wait_until(lambda: loop.poll() is not None, "the loop ends")
    assert [task(one).status for one in ids] == ["success"] * 3, output(loop)
    assert loop.returncode == 0, output(loop)
    assert {path.read_text() for path in both.cwd.glob("own-*")} <= {"x"}


@pytest.mark.parametrize("make, word", [
    (lambda: a_generator(), "a generator"), (lambda: a_coroutine(), "a coroutine"), (lambda: an_async_generator(), "an async generator"),
    (lambda: Awaited(), "an awaitable")])
def test_a_function_that_returns_what_nobody_runs_has_failed(home, make, word):
    one, = submit(max_retries=1)

    @labtasker.loop()
    def main(n=Required()):
        return make()
    main()
    found = task(one)
    assert found.status == "failed" and "the function returned %s" % word in found.summary["labtasker_error"]


def a_generator():
    yield 1


async def a_coroutine():
    pass


async def an_async_generator():
    yield 1


class Awaited:
    def __await__(self):
        return iter(())


def test_what_a_function_returns_otherwise_does_not_matter(home):
    ids, answers = submit(4), [OfNoClass(), object(), 0, iter([1])]

    @labtasker.loop()
    def main(n=Required()):
        return answers[n]
    main()
    assert [task(one).status for one in ids] == ["success"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["{} | head -1", "{} 2>&1 | true", "{} >&-", "{} >&- 2>&-", "{} > /dev/full",
                                   "PYTHONUNBUFFERED=1 {} > /dev/full", "{} 2> /dev/full > /dev/full", "{} < /dev/null 2>&1 >&- | head -1"])
def test_a_decorated_run_is_nothing_the_worse_where_its_output_goes_nowhere(home, shell):
    ids = submit(6, max_retries=1)
    script = home.write("script.py", """
import labtasker, sys
from labtasker import Required
@labtasker.loop()
def main(n=Required()):
    for i in range(2000):
        print("line", i, flush=i % 100 == 0)
    print("to stderr", file=sys.stderr)
    sys.stderr.flush()
main()
""")
    found = home.bash("set +o pipefail; " + shell.format("%s %s" % (sys.executable, script)), check=False)
    assert [task(one).status for one in ids] == ["success"] * 6, found
    text = home.cli("task", "logs", ids[-1]).stdout
    assert "line 0\n" in text and "line 1999\n" in text and "to stderr\n" in text, found
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr


@pytest.mark.slow
def test_what_is_printed_with_stdout_closed_never_goes_into_a_file_of_ours(home):
    submit(2)
    script = home.write("script.py", """
import os, labtasker
from labtasker import Required
@labtasker.loop()
def main(n=Required()):
    os.system("echo ZQ-OUT; echo ZQ-OUT >&2")
    try: os.write(1, b"ZQ-OUT")
    except OSError: pass
main()
""")
    home.bash("%s %s >&- 2>&- <&-" % (sys.executable, script))
    assert "ZQ-OUT" not in (home.folder / "journal.jsonl").read_text()
    assert {one["status"] for one in home.tasks()} == {"success"}


def without_threads(monkeypatch, *names):
    """Have the threads whose target has one of these names fail to start, as where `ulimit -u` is reached."""
    start = threading.Thread.start

    def refuse(thread):
        if any(name in repr(thread._target) for name in names):
            raise RuntimeError("can't start new thread")
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("names", [["_read"], ["live"]])
@pytest.mark.parametrize("command", [True, False])
def test_where_no_thread_is_to_be_had_the_task_is_handed_back_and_the_loop_says_so(home, monkeypatch, capfd, names, command):
    one, = submit(max_retries=1)
    without_threads(monkeypatch, *names)
    if command:
        code = labtasker.main(["loop", "--", "echo", "%(n)"])
    else:
        @labtasker.loop()
        def main(n=Required()):
            pass
        try:
            code = main() or 0
        except SystemExit as error:
            code = error.code
    found = task(one)
    assert (code, found.status, found.retries) == (1, "pending", 0)
    assert "no more threads can be had here" in capfd.readouterr().err


def test_output_is_copied_without_a_thread_of_its_own_where_none_is_to_be_had(home, monkeypatch, capfd):
    one, = submit()
    without_threads(monkeypatch, "_copy")
    ours, theirs = os.pipe()  # whose reader may be slow: with a file nobody would ask for a thread
    kept = os.dup(1)
    os.dup2(theirs, 1)
    try:
        assert labtasker.main(["loop", "--", "echo", "ZQ-%(n)"]) == 0
    finally:
        os.dup2(kept, 1)
        os.close(theirs)
        os.close(kept)
    assert os.read(ours, 100) == b"ZQ-0\n" and task(one).status == "success"
    os.close(ours)


def test_a_program_that_moves_while_the_loop_runs_is_found_again(home, tmp_path, monkeypatch):
    ids, (first, second) = submit(2), [tmp_path / name for name in ("first", "second")]
    for folder in (first, second):
        folder.mkdir()
        (folder / "ZQ-job").write_text("#!/bin/sh\nrm -f %s/ZQ-job\n" % first)
        (folder / "ZQ-job").chmod(0o700)
    monkeypatch.setenv("PATH", "%s:%s:%s" % (first, second, os.environ["PATH"]))
    assert labtasker.main(["loop", "--", "ZQ-job", "%(n)"]) == 0
    assert [task(one).status for one in ids] == ["success"] * 2 and not (first / "ZQ-job").exists()


@pytest.mark.parametrize("has_descriptors", [True, False])
def test_the_end_of_a_job_wakes_its_slot_with_a_descriptor_or_a_signal(home, monkeypatch, has_descriptors):
    ids, heard = submit(3), []
    opened = getattr(os, "pidfd_open", None)
    if has_descriptors and not opened:
        pytest.skip("this Python has no descriptors of processes")

    def open_descriptor(pid):
        if not has_descriptors:
            raise OSError(errno.ENOSYS, "not on this system")
        return opened(pid)
    monkeypatch.setattr(os, "pidfd_open", open_descriptor, raising=False)
    monkeypatch.setattr(labtasker.Wake, "on_child", lambda wake, *_: heard.append(1))
    assert labtasker.main(["loop", "-j", "2", "--", "true", "%(n)"]) == 0
    assert [task(one).status for one in ids] == ["success"] * 3 and bool(heard) is not has_descriptors


def test_a_loop_goes_on_with_the_slots_that_it_has_threads_for(home, monkeypatch, capfd):
    ids, start, count = submit(4), threading.Thread.start, []

    def refuse(thread):
        count.append(1) if "live" in repr(thread._target) else None
        if len(count) == 2 and "live" in repr(thread._target):
            raise RuntimeError("can't start new thread")
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert labtasker.main(["loop", "-j", "3", "--", "true", "%(n)"]) == 0
    assert [task(one).status for one in ids] == ["success"] * 4 and len(count) == 3


@pytest.mark.parametrize("finish", ["finish", "report", "update"])
def test_a_run_never_fails_for_what_its_summary_holds(both, finish, capfd):
    one, = submit(max_retries=1)
    summary = {"val/acc": Scalar(0.5), "mrr@10": {1: 2}, "loss": 1, "loss.val": 2, "model": object, "raw": b"x", "set": {1}}

    @labtasker.loop()
    def main(n=Required()):
        if finish == "finish":
            labtasker.finish("success", summary)
        elif finish == "report":
            labtasker.report_task_status(labtasker.current_task_id(), "success", summary)
        else:
            labtasker.update_tasks([TaskUpdateRequest(task_id=one, summary=summary)])
    main()
    found = task(one)
    assert (found.status, found.retries) == ("success", 0)
    assert found.summary == {"val/acc": 0.5, "mrr@10": {"1": 2}, "loss": 1, "loss_val": 2, "model": "<class 'object'>", "raw": "b'x'",
                             "set": [1]}
    assert "summary.model is kept as text" in capfd.readouterr().err
    assert [each["task_id"] for each in both.tasks("-f", 'summary["val/acc"] >= 0.5 and summary["mrr@10"]["1"] == 2')] == [one]


class Scalar:
    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


def test_what_is_no_json_in_args_is_refused_by_name_and_nothing_is_sent(both):
    for send in (lambda: labtasker.submit_task(args={"n": 1, "opt": {"f": len}}), lambda: labtasker.submit_tasks([{"args": {"n": 1}}, {"args": {"opt": {"f": len}}}]),
                 lambda: labtasker.submit_grid({"n": [1], "opt.f": [len]}), lambda: labtasker.submit_grid({"n": [1], "opt.f": [len]}, unique=True),
                 lambda: labtasker.submit_task(args={"n": 1}, metadata={"opt.f": len})):
        with pytest.raises(labtasker.LabtaskerTypeError, match="opt.f: <built-in function len> can't be sent"):
            send()
    assert labtasker.ls_tasks().content == []
    one = labtasker.submit_task(args={"n": Scalar(1), "m": {2: (3, {4})}}, metadata={"by/whom": pathlib.Path("me")}).task_id
    assert (task(one).args, task(one).metadata) == ({"n": 1, "m": {"2": [3, [4]]}}, {"by/whom": "me"})
    assert labtasker.submit_grid({"n": [Scalar(1)], "m.2": [(3, {4})]}, unique=True) == [one]


def test_what_was_reported_is_no_error_where_the_disk_can_not_take_the_runs_own_notes(home, monkeypatch, capfd):
    ids = submit(2, max_retries=1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    @labtasker.loop()
    def main(n=Required()):
        monkeypatch.setattr(labtasker.Run, "make_log_dir", fail)
        labtasker.finish("success", {"acc": n})
    main()
    assert [(task(one).status, task(one).summary) for one in ids] == [("success", {"acc": n}) for n in (0, 1)]
    assert "can't write" in capfd.readouterr().err


def test_a_summary_is_merged_while_the_task_runs(both):
    one, = submit()

    @labtasker.loop()
    def main(n=Required()):
        labtasker.report_task_status(labtasker.task_info().task_id, "running", {"loss": 2, "steps": 1})
        labtasker.report_task_status(labtasker.task_info().task_id, "running", {"loss": 1})
        assert task(one).status == "running"
    main()
    assert (task(one).status, task(one).summary) == ("success", {"loss": 1, "steps": 1})


@pytest.mark.parametrize("status, then", [("cancelled", "pass"), ("success", "raise ValueError"), ("failed", "pass")])
def test_a_status_that_the_function_sets_is_kept(both, status, then):
    one, = submit(max_retries=1)

    @labtasker.loop()
    def main(n=Required()):
        labtasker.report_task_status(one, status, {"why": "nan"})
        exec(then)
    main()
    assert (task(one).status, task(one).summary) == (status, {"why": "nan"})


def test_finish_counts_once(both):
    one, = submit(max_retries=1)

    @labtasker.loop()
    def main(n=Required()):
        labtasker.finish("failed", {"a": 1})
        labtasker.finish("success", {"a": 2})
    main()
    assert (task(one).status, task(one).summary) == ("failed", {"a": 1})


def test_a_failure_that_the_function_reports_is_retried(home):
    one, = submit(max_retries=3)
    runs = []

    @labtasker.loop()
    def main(n=Required()):
        runs.append(labtasker.task_info().retries)
        labtasker.finish("success" if len(runs) == 2 else "failed")
    main()
    assert runs == [0, 1] and task(one).status == "success"


def test_what_is_known_inside_a_run_and_outside(home):
    one, = submit(task_name="name")
    seen = {}

    @labtasker.loop(create_worker_kwargs={"worker_name": "me", "metadata": {"gpu": 1}, "max_retries": 7})
    def main(n=Required()):
        info = labtasker.task_info()
        seen.update(info=(info.task_id, info.task_name, info.args, info.status, info.retries, info.worker_id),
                    ids=(labtasker.current_task_id(), labtasker.current_worker_id()), on=labtasker.is_enabled())
        in_thread = threading.Thread(target=lambda: seen.update(thread=labtasker.current_task_id()))
        in_thread.start()
        in_thread.join()
        folder = labtasker.get_labtasker_log_dir()
        assert folder.is_dir() and os.environ["LABTASKER_LOG_DIR"] == str(folder)
    main()
    worker, = labtasker.ls_workers().content
    assert (worker.worker_name, worker.metadata, worker.max_retries) == ("me", {"gpu": 1}, 7)
    assert seen == {"info": (one, "name", {"n": 0}, "running", 0, worker.worker_id), "ids": (one, worker.worker_id),
                    "on": True, "thread": one}
    assert not labtasker.is_enabled() and "LABTASKER_TASK_ID" not in os.environ
    assert labtasker.finish("success") is None
    for outside in (labtasker.task_info, labtasker.current_task_id, labtasker.current_worker_id,
                    labtasker.get_labtasker_log_dir, lambda: labtasker.finish("success", skip_if_no_labtasker=False)):
        with pytest.raises(labtasker.LabtaskerRuntimeError, match="no task is running here"):
            outside()
    with pytest.raises(labtasker.LabtaskerValueError, match='"success" or "failed"'):
        labtasker.finish("done")


def test_a_report_outside_of_a_run_merges_the_summary(home):
    one, = submit()
    labtasker.loop()(lambda n=Required(): None)()
    labtasker.report_task_status(one, "success", {"rank": 1})
    assert (task(one).status, task(one).summary) == ("success", {"rank": 1})


CHILD = "import labtasker; t = labtasker.task_info(); labtasker.finish('success', {'child': t.args['n']}); " \
        "labtasker.finish('failed')"


def test_children_of_a_decorated_run_take_part(both):
    one, = submit()

    @labtasker.loop()
    def main(n=Required()):
        subprocess.check_call([sys.executable, "-c", CHILD], env=harness.clean_env(dict(os.environ)), cwd="/")
    main()
    assert (task(one).status, task(one).summary) == ("success", {"child": 0})


def test_forked_and_spawned_processes_take_part(both):
    ids = submit(2)
    process = start_script(both, """
import multiprocessing
def work(n):
    assert labtasker.task_info().args == {"n": n}
    labtasker.report_task_status(labtasker.current_task_id(), "running", {"by": os.getpid()})
    labtasker.finish("failed" if n else "success")
@labtasker.loop()
def main(n=Required()):
    child = multiprocessing.get_context(["fork", "spawn"][n]).Process(target=work, args=(n,))
    child.start()
    child.join()
    assert child.exitcode == 0
if __name__ == "__main__":
    main()
""")
    assert wait_for_end(process) == 0, output(process)
    first, second = task(ids[0]), task(ids[1])
    assert first.status == "success" and first.summary["by"] != process.pid
    assert (second.status, second.retries) == ("failed", 3), output(process)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_that_lives_on_sees_the_task_that_runs_now_or_none(home, method):
    """Whatever started a process, and when: it never takes part in a task that is over."""
    ids = submit(3)
    process = start_script(home, """
import multiprocessing
def look(_=None):
    return labtasker.is_enabled() and (labtasker.current_task_id(), labtasker.task_info().args["n"])
def tell(pipe):
    pipe.send(look())
def reported(ran):
    labtasker.report_task_status(labtasker.current_task_id(), "running", {"by": os.getpid()})
    program = "import labtasker; print(labtasker.current_task_id() if labtasker.is_enabled() else '')"
    return subprocess.check_output([sys.executable, "-c", program], universal_newlines=True).strip()
seen = []
@labtasker.loop()
def main(n=Required()):
    if n == 0:
        seen.append(context.Pool(1))
        seen.append(seen[0].apply(os.getpid))
    ours, theirs = context.Pipe()
    child = context.Process(target=tell, args=(theirs,))
    child.start()
    now = labtasker.current_task_id(), n
    assert ours.recv() == now and seen[0].apply(look) == now
    child.join()
    assert seen[0].apply(os.getpid) == seen[1]
    assert seen[0].apply(reported, (n,)) == (now[0] if n == 0 else ""), "a program that an old worker starts has no task of another run"
if __name__ == "__main__":
    context = multiprocessing.get_context(%r)
    main()
    assert seen[0].apply(look) is False and not labtasker.is_enabled()
    print("pool", seen[1])
    seen[0].terminate()
""" % method)
    assert wait_for_end(process, 60) == 0, output(process)
    pool = int(output(process).split("pool ")[1].split()[0])
    assert [(task(i).status, task(i).summary) for i in ids] == [("success", {"by": pool})] * 3, output(process)
    assert not list((home.cwd / ".labtasker" / "logs").glob("*/*/current.json"))


def test_a_program_that_outlives_its_run_takes_part_in_no_other(home):
    submit(2)
    home.write("late.py", "import labtasker, sys\nfor line in sys.stdin:\n"
               "    print(labtasker.current_task_id() if labtasker.is_enabled() else 'none', flush=True)\n")
    programs, seen = [], []

    @labtasker.loop()
    def main(n=Required()):
        if not programs:
            programs.append(subprocess.Popen([sys.executable, "late.py"], env=harness.clean_env(dict(os.environ)), universal_newlines=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1))
        programs[0].stdin.write("\n")
        seen.append((labtasker.current_task_id(), programs[0].stdout.readline().strip()))
    main()
    programs[0].communicate()
    assert seen[0][1] == seen[0][0] and seen[1][1] == "none"


def test_two_loops_in_threads_know_their_own_tasks(home):
    submit(6)
    meet, seen, problems = threading.Barrier(2), [], []

    @labtasker.loop()
    def main(n=Required()):
        if len(seen) < 2:
            meet.wait(20)
        if labtasker.task_info().args["n"] != n:
            problems.append(n)
        seen.append(n)
    threads = [threading.Thread(target=main) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seen) == list(range(6)) and not problems
    assert {t.status for t in labtasker.ls_tasks().content} == {"success"}


def test_a_suspended_worker_ends_the_loop(both, capfd):
    submit(2)
    worker_id = labtasker.create_worker("w", {})
    seen = []

    @labtasker.loop(worker_id=worker_id)
    def main(n=Required()):
        seen.append(n)
        labtasker.report_worker_status(worker_id, "suspended")
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1 and seen == [0]
    assert "is suspended and gets no tasks" in capfd.readouterr().err


def test_no_server_at_the_start_is_an_error_at_once(home, monkeypatch, capfd):
    monkeypatch.setenv("LABTASKER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LABTASKER_PASSWORD", "x")
    with pytest.raises(SystemExit) as left:
        labtasker.loop()(lambda n=Required(): None)()
    assert left.value.code == 1
    assert "http://127.0.0.1:9" in capfd.readouterr().err


def test_errors_of_the_loop_itself_go_to_the_handler(home, monkeypatch):
    submit(2)
    calls, seen, report = [], [], labtasker.deliver

    def sometimes(*args, **named):
        if len(calls) < 2:
            raise OSError("disk")
        return report(*args, **named)
    monkeypatch.setattr(labtasker, "deliver", sometimes)
    monkeypatch.setattr(labtasker.Wake, "pause", lambda wake, seconds: None)
    monkeypatch.setitem(labtasker.LOOP_SETTINGS, "on_internal_error", None)
    labtasker.set_loop_internal_error_handler(lambda error, count: calls.append((str(error), count)))
    labtasker.loop()(lambda n=Required(): seen.append(n))()
    assert calls == [("disk", 1), ("disk", 2)] and seen == [0, 1]


# What a command loop runs and reports


def test_a_command_gets_its_values_as_words(both):
    both.cli("task", "submit", "--args", json.dumps({"a": "x y;$HOME", "b": {"c": [1]}, "d": True, "e": ""}))
    run = both.cli("loop", "--", sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))",
                   "%(a)", "--c=%(b)", "%(b.c)", "%(d)", "%(e)", "%%(x)")
    assert json.loads(run.stdout) == ["x y;$HOME", '--c={"c": [1]}', "[1]", "True", "", "%(x)"]
    one, = both.tasks()
    assert (one["status"], one["cmd"][:1]) == ("success", [sys.executable])


@pytest.mark.parametrize("how", ["--cmd", "--script-path", "stdin"])
def test_a_text_for_the_shell_gets_its_values_quoted(home, how):
    home.cli("task", "submit", "--args", json.dumps({"a": "it's $HOME; x", "n": 3}))
    text = "V=%(a)\necho \"$V\" $((%(n) + 1))\n"
    options = ["--cmd", text] if how == "--cmd" else ["--script-path", home.write("job.sh", text)]
    run = home.cli("loop", *options) if how != "stdin" else home.cli("loop", stdin=text)
    assert run.stdout == "it's $HOME; x 4\n"
    assert not list((home.folder / "logs").glob("*/*/script-*"))


@pytest.mark.parametrize("options, text, shown", [
    ([], "#!/usr/bin/env bash\necho ${BASH_VERSION:+bash} %(n)", "bash 0"),
    (["--executable", sys.executable], "print('python', %(n))", "python 0"),
])
def test_a_script_is_run_by_what_it_asks_for(home, options, text, shown):
    submit()
    assert home.cli("loop", "--script-path", home.write("job", text), *options).lines == [shown]


@pytest.mark.parametrize("command, status, summary", [
    ("exit 0", "success", {}), ("exit 3", "failed", {"labtasker_error": "exit code 3"}),
    ("kill -9 $$", "failed", {"labtasker_error": "killed by signal 9 (SIGKILL)"}),
])
def test_the_exit_code_is_the_result(both, command, status, summary):
    one, = submit(max_retries=1)
    both.cli("loop", "--", "sh", "-c", command, "%(n)")
    assert (task(one).status, task(one).summary) == (status, summary)


def test_exit_code_75_hands_the_task_back(home):
    one, = submit(max_retries=1)
    home.cli("loop", "--", "sh", "-c", "test -e been || { touch been; exit 75; }", "%(n)")
    done = task(one)
    assert (done.status, done.retries, done.interruptions) == ("success", 0, 1)
    assert [(a["status"], a["exit_code"]) for a in done.attempts] == [("pending", 75), ("success", 0)]
    assert "75" in done.attempts[0]["reason"]


def attempt(status, began_s, took_s):
    return {"status": status, "start": labtasker.format_time(1.7e9 + began_s),
            "end": labtasker.format_time(1.7e9 + began_s + took_s)}


@pytest.mark.parametrize("before, pause_s", [
    ([], 0), ([attempt("pending", 0, 1)], 1), ([attempt("pending", i, 1) for i in range(3)], 4),
    ([attempt("pending", i, 1) for i in range(15)], 60), ([attempt("pending", 0, 1), attempt("failed", 2, 1)], 0),
    ([attempt("failed", 0, 1), attempt("pending", 2, 1)], 1), ([attempt("pending", 0, 1), attempt("pending", 2, 3600)], 0),
    ([{"status": "pending"}], 0)])
def test_a_pause_doubles_with_each_time_that_a_task_comes_back_soon(before, pause_s):
    task = labtasker.Task({"attempts": before + [{"start": labtasker.format_time(1.7e9)}]})
    assert labtasker.pause_before(task) == pause_s
    assert labtasker.pause_before(labtasker.Task({})) == 0  # a server of the plain protocol


AGAIN = "test $0 != 0 -o $(ls starts-$0-* 2>/dev/null | wc -l) = 3 || { mktemp starts-$0-XXXXXX >/dev/null; exit 75; }; echo did $0"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-j", "3"]])
def test_others_are_run_while_a_task_that_can_not_work_now_has_its_pauses_and_the_loop_waits_for_it(both, options):
    ids = submit(4, max_retries=1)
    run = both.cli("loop", *(options + ["--", "sh", "-c", AGAIN, "%(n)"]))
    assert [line[-1] for line in run.lines][-1] == "0" and len(run.lines) == 4, run
    assert [(task(one).status, task(one).interruptions) for one in ids] == [("success", 3)] + [("success", 0)] * 3
    ends, begins = [[labtasker.parse_time(a[name]) for a in task(ids[0]).attempts] for name in ("end", "start")]
    assert all(begin - end >= pause_s for begin, end, pause_s in zip(begins[1:], ends, (1, 2, 4)))


@pytest.mark.slow
def test_a_pause_is_kept_by_the_loop_where_the_server_knows_none(plain_home):
    ids = submit(3, max_retries=1)
    run = plain_home.cli("loop", "-j", "2", "--", "sh", "-c", AGAIN.replace("= 3", "= 2"), "%(n)")
    assert run.lines[-1] == "[slot 0] did 0" or run.lines[-1] == "[slot 1] did 0", run
    assert [task(one).status for one in ids] == ["success"] * 3 and len(list(plain_home.cwd.glob("starts-0-*"))) == 2


def test_a_loop_with_an_idle_time_out_waits_no_longer_for_a_pause(home):
    one, = submit()
    run = home.cli("loop", "--idle-timeout", "1s", "--", "sh", "-c", "echo starts; exit 75; : $0", "%(n)")
    assert run.lines in (["starts"], ["starts"] * 2) and task(one).status == "pending" and task(one).not_before


def test_a_task_that_a_signal_handed_back_has_no_pause(home):
    one, = submit()
    loop = home.start_cli("loop", "--", "sh", "-c", "echo begins; sleep 600", "%(n)")
    wait_for_line(loop, "begins")
    loop.terminate()
    assert wait_for_end(loop) == 143 and task(one).status == "pending" and task(one).not_before is None


def test_a_job_sees_its_run_and_speaks_for_itself(both):
    one, = submit()
    script = both.write("elsewhere/job.py", "import os, json\n" + CHILD + "\n"
                        "names = [n for n in sorted(os.environ) if n.startswith('LABTASKER_')]\n"
                        "assert os.path.isdir(os.environ['LABTASKER_LOG_DIR'])\n"
                        "print(json.dumps({n: os.environ[n] for n in names}))\nraise SystemExit(1)\n")
    run = both.cli("loop", "--", "sh", "-c", 'cd elsewhere && exec "$0" "$1"', sys.executable, script, "%(n)")
    seen = json.loads(run.stdout)
    assert seen["LABTASKER_TASK_ID"] == one and seen["LABTASKER_ROOT"] == str(both.cwd / ".labtasker")
    assert {"LABTASKER_WORKER_ID", "LABTASKER_RUN_ID", "LABTASKER_LOG_DIR"} < set(seen)
    assert (task(one).status, task(one).summary) == ("success", {"child": 0})
    assert re.search(r"success in [\d.]+ s, child=0, as reported by the job itself", run.stderr)


def test_a_command_that_is_not_there_burns_no_task(both):
    ids = submit(2)
    run = both.cli("loop", "--", "./no-such-program", "%(n)", check=False)
    assert run.returncode == 1 and "can't start the command" in run.stderr and "no-such-program" in run.stderr
    assert [(task(i).status, task(i).retries) for i in ids] == [("pending", 0)] * 2


def test_a_program_named_by_the_task_fails_that_task_alone(home):
    bad = labtasker.submit_task(args={"n": "./no-such-program"}, max_retries=1).task_id
    good = labtasker.submit_task(args={"n": "true"}).task_id
    home.cli("loop", "--", "%(n)")
    assert (task(bad).status, task(good).status) == ("failed", "success")


def test_a_value_that_no_command_can_have_fails_that_task_alone(home):
    bad = labtasker.submit_task(args={"n": "a\0b"}, max_retries=1).task_id
    good, = submit()
    home.cli("loop", "--", "true", "%(n)")
    assert "null" in task(bad).summary["labtasker_error"]
    assert (task(bad).status, task(good).status) == ("failed", "success")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("how", [["--", "sh", "-c", "printf %s \"$1\" | tee seen", "sh", "%(n)"], ["-c", "printf %s %(n) | tee seen"],
                                 ["--script-path", "gr\u00f6\u00dfe.sh"], ["--", "./gr\u00f6\u00dfe.sh", "%(n)"]])
def test_values_and_output_are_the_bytes_that_were_submitted_where_the_locale_is_ascii(home, how):
    env = dict(ASCII, LABTASKER_ROOT=str(home.cwd / "d\u00e9p\u00f4t"))
    home.write("gr\u00f6\u00dfe.sh", "#!/bin/sh\n" + ("printf %s %(n) | tee seen" if "--script-path" in how else "printf %s \"$1\" | tee seen"))
    (home.cwd / "gr\u00f6\u00dfe.sh").chmod(0o755)
    one = home.cli("task", "submit", "-q", "--", "--n=gr\u00f6\u00dfe \u6570", env=env).stdout.strip()
    assert "1 success" in home.cli("loop", *how, env=env).stderr
    assert (home.cwd / "seen").read_bytes() == "gr\u00f6\u00dfe \u6570".encode()
    for words in (["task", "ls"], ["task", "get", one], ["task", "ls", "--fmt", "csv"]):
        assert "gr\\xf6\\xdfe \\u6570" in home.cli(*words, env=env).stdout
    seen = subprocess.check_output([sys.executable, "-m", "labtasker", "task", "logs", one], cwd=str(home.cwd), env=harness.clean_env(env))
    assert seen in ("gr\u00f6\u00dfe \u6570".encode(), "gr\\xf6\\xdfe \\u6570".encode())


def test_a_password_and_a_file_with_letters_are_what_they_are_where_the_locale_is_ascii(server_home):
    server_home.server.http("PUT", "/api/v1/queues/me", {"new_password": "gr\u00f6\u00dfe"})
    env = dict(ASCII, LABTASKER_PASSWORD="gr\u00f6\u00dfe")
    server_home.write("gr\u00f6\u00dfe.csv", "n\n\u00e9\n")
    server_home.cli("task", "submit", "--from", "gr\u00f6\u00dfe.csv", env=env)
    assert server_home.cli("task", "count", "-q", "-f", "args.n == '\u00e9'", env=env).stdout == "1\n"


def fails_once(monkeypatch, owner, name, error):
    """Have `owner.name(...)` raise at its first call, and do what it does afterwards."""
    real, errors = getattr(owner, name), [error]

    def first(*given, **named):
        if errors:
            raise errors.pop()
        return real(*given, **named)
    monkeypatch.setattr(owner, name, first)


@pytest.mark.parametrize("name, error", [
    ("start_job", OSError(errno.EAGAIN, "no process is left")), ("start_job", OSError(errno.EMFILE, "no descriptor is left")),
    ("start_job", MemoryError()), ("start_job", OSError(errno.ENOSPC, "the disk is full")), ("_open_pty", OSError(errno.EMFILE, "none")),
    ("Labelled", RuntimeError("can't start new thread")), ("watch", RuntimeError("can't start new thread"))])
def test_what_the_machine_is_short_of_for_a_moment_hands_the_task_back(home, monkeypatch, name, error):
    one, = submit()
    monkeypatch.setattr(labtasker, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(labtasker, "make_slots", lambda *_: [labtasker.SlotSpec({}, {}, "[x] ")])
    fails_once(monkeypatch, labtasker, name, error)
    assert labtasker.command_loop(["true", "%(n)"]) == 0
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("success", 0, 1)


def test_the_heartbeat_process_is_told_of_a_job_that_goes_on_and_the_guard_of_each_at_once(monkeypatch):
    beats, said, guarded = labtasker.HeartbeatProcess(lambda *_: None), [], []
    monkeypatch.setattr(beats, "_send", said.append)
    monkeypatch.setattr(beats.guard, "_send", lambda *groups: guarded.append(groups))
    beats.process, beats.guard.pipe = object(), -1
    short, long = (labtasker.Run(i, i, None, log_dir="there") for i in ("short", "long"))
    beats.add(short, 1, 7)
    beats.add(long, 1, 8)
    assert (said, guarded) == ([], [(None, 7), (None, 8)])
    beats.tell(long)
    beats.tell(long)
    beats.drop(short)
    beats.tell(short)
    assert [message["key"] for message in said] == ["long"]
    beats.add(long, 1)  # its report waits
    beats.drop(long)
    assert [message.get("group") for message in said[1:]] == [None, None]
    assert said[-1] == {"drop": "long"}
    beats.guard.pipe = None
    monkeypatch.setattr(beats.guard, "_start", lambda: None)
    beats.add(short, 1, 9)
    assert said[-1]["group"] == 9, "there is no guard, so the process is told at once"


@pytest.mark.slow
@pytest.mark.parametrize("is_spawned", [True, False])
def test_a_job_has_its_standard_files_alone_no_ignored_sigpipe_and_a_session_of_its_own(monkeypatch, is_spawned):
    if not is_spawned:
        monkeypatch.delattr(os, "posix_spawn", raising=False)
    given, (ours, theirs) = os.open(os.devnull, os.O_RDONLY), os.pipe()
    os.set_inheritable(given, True)
    labtasker._inherited.cache_clear()
    try:
        job = labtasker.start_job(["/bin/sh", "-c", "ls /proc/$$/fd; readlink /proc/$$/fd/0; ps -o sid= -p $$; "
                                   "sed -n 's/SigIgn:.//p' /proc/$$/status; kill -9 $$"], dict(os.environ), [theirs, theirs])
        assert isinstance(job, subprocess.Popen) != (is_spawned and sys.version_info >= (3, 8))
        os.close(theirs)
        with open(ours) as file:
            *found, session, ignored = file.read().split()
        assert (found, int(session)) == (["0", "1", "2", "/dev/null"], job.pid)
        assert not int(ignored, 16) & 1 << signal.SIGPIPE - 1
        assert (job.wait(), job.poll(), job.returncode) == (-signal.SIGKILL,) * 3
    finally:
        os.close(given)
        labtasker._inherited.cache_clear()


def test_a_script_runs_where_the_folder_of_the_run_takes_none(home):
    ids = submit(2)
    home.write(".labtasker/logs", "no folder")
    home.write("job.sh", "echo says %(n)")
    assert home.cli("loop", "--script-path", "job.sh").lines == ["says 0", "says 1"]
    assert [task(i).status for i in ids] == ["success"] * 2


@pytest.mark.parametrize("harm", ["rm -rf $D", "rm -rf $D; touch $D", "echo [1] > $D/status.json; echo 7 > $D/summary.json",
                                  "rm $0", "rm -rf $D; ln -s /dev/full $D", "exec >&- 2>&-; rm -rf $D", "mkdir $D/status.json $D/summary.json"])
@pytest.mark.parametrize("code, status", [(0, "success"), (3, "failed")])
def test_whatever_a_job_does_to_its_folder_its_run_is_reported_and_the_loop_goes_on(home, harm, code, status):
    ids = submit(2, max_retries=1)
    home.write("job.sh", "D=$LABTASKER_LOG_DIR\n: %%(n)\n%s\nexit %d\n" % (harm, code))
    run = home.cli("loop", "--script-path", "job.sh")
    assert [task(i).status for i in ids] == [status] * 2 and "Traceback" not in run.stderr and "bug" not in run.stderr


def test_a_value_too_long_for_a_command_fails_that_task_alone(home):
    bad = labtasker.submit_task(args={"n": "x" * 200000}, max_retries=1).task_id
    good, = submit()
    home.cli("loop", "--", "true", "%(n)")
    assert (task(bad).status, task(good).status) == ("failed", "success")


def test_a_job_that_stopped_itself_is_asked_to_end_as_others_are(home):
    one, = submit()
    loop = home.start_cli("loop", "--", "sh", "-c", "trap 'echo saved; exit 1' TERM; echo begins $$; kill -STOP $$; sleep 600", "%(n)")
    wait_for_line(loop, "begins")
    pid = int(output(loop).split("begins ")[1].split()[0])
    wait_until(lambda: labtasker.is_stopped(pid), "the job is stopped")
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 143
    assert "saved" in output(loop) and task(one).status == "pending"


MANY_FILES = """
import os, resource, sys, labtasker
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
@labtasker.loop(extra_filter="args.n == 0")
def main(n=labtasker.Required()):
    print("function", n)
main()
labtasker.command_loop(["echo", "command", "%(n)"])
"""


def test_a_process_with_more_than_1024_descriptors_runs_loops(home):
    ids = submit(2)
    assert home.python(MANY_FILES).lines == ["function 0", "command 1"]
    assert [task(i).status for i in ids] == ["success"] * 2


@pytest.mark.parametrize("pipe", ["2>&1 | head -n 1", "| head -n 1", "2>&1 | true"])
def test_a_loop_whose_output_nobody_reads_any_more_runs_all_tasks(home, pipe):
    ids = submit(4)
    run = home.bash("set +e +o pipefail\nlabtasker loop -- sh -c 'echo a; echo b >&2; sleep 0.1' '%%(n)' %s\necho ${PIPESTATUS[0]}" % pipe)
    assert run.lines[-1] == "0" and [task(i).status for i in ids] == ["success"] * 4


@pytest.mark.parametrize("words, message", [
    (["--", "echo", "%(nosuch"], "is not closed"), (["--cmd", "echo %(a b)"], "is no key"),
    (["-f", "stats == 1", "--", "echo", "%(n)"], "stats"), (["--eta-max", "soon", "--", "echo", "%(n)"], "soon"),
    (["--script-path", "none.sh"], "none.sh"), (["--executable", "/bin/bash", "--", "echo"], "executable"),
])
def test_a_mistake_is_found_before_any_task_is_fetched(home, words, message):
    one, = submit()
    run = home.cli("loop", *words, check=False)
    assert run.returncode in (1, 2) and message in run.stderr and "Traceback" not in run.stderr
    assert task(one).start_time is None and not labtasker.ls_workers().content


@pytest.mark.parametrize("words, shown", [
    (["--cmd", "echo $(echo %(n))"], "  echo $(echo %(n))\n              ^"), (["--cmd", "cat <<E\n%(n)\nE\n"], "  %(n)\n  ^"),
    (["--executable", "perl", "--cmd", "print '%(n)'"], "perl"), (["--cmd", "echo `%(n)`"], "  echo `%(n)`\n        ^"),
])
def test_a_place_where_no_value_can_be_put_is_refused_before_any_task_is_fetched(home, words, shown):
    one, = submit()
    run = home.cli("loop", *words, check=False)
    assert run.returncode == 2 and shown in run.stderr, run
    assert task(one).start_time is None and not labtasker.ls_workers().content


def test_a_value_that_a_shell_would_calculate_fails_that_task_alone(home):
    bad = labtasker.submit_task(args={"n": "a[$(touch ran)]"}, max_retries=1).task_id
    good, = submit()
    run = home.cli("loop", "--executable", "bash", "--cmd", "[[ %(n) -eq 0 ]] && echo $((%(n) + 1))")
    assert run.stdout == "1\n" and not (home.cwd / "ran").exists()
    assert "takes a number" in task(bad).summary["labtasker_error"]
    assert (task(bad).status, task(good).status) == ("failed", "success")


def test_a_null_character_never_reaches_a_script(home):
    bad = labtasker.submit_task(args={"n": "a\0b"}, max_retries=1).task_id
    home.cli("loop", stdin="echo %(n)")
    home.cli("loop", "--script-path", home.write("job.sh", "echo %(n)"))
    assert "null" in task(bad).summary["labtasker_error"] and task(bad).status == "failed"


def test_a_command_without_placeholders_takes_every_task_and_says_so(home):
    submit(2)
    run = home.cli("loop", "--", "echo", "x")
    assert run.lines == ["x", "x"] and "every task matches" in run.stderr


def test_max_tasks_is_where_it_stops(home):
    ids = submit(3)
    run = home.cli("loop", "--max-tasks", "2", "--", "true", "%(n)")
    assert [task(i).status for i in ids] == ["success", "success", "pending"]
    assert "--max-tasks reached: 2 tasks: 2 success" in run.stderr


def test_failures_are_counted_and_are_no_failure_of_the_loop(home):
    submit(2, max_retries=2)
    run = home.cli("loop", "--", "sh", "-c", "exit $0", "%(n)")
    assert run.returncode == 0
    assert run.stderr.splitlines()[-1] == "labtasker: done: 2 tasks: 1 success, 1 failed (3 runs)"


# What a loop says


def asked(task_id, name=None, retries=0, **args):
    """Return a Task as a fetch gives it."""
    return labtasker.Task({"task_id": task_id, "task_name": name, "args": args, "retries": retries, "max_retries": 3,
                           "interruptions": 0, "cmd": "train"})


def test_a_task_keeps_its_number_and_its_arguments_their_order_unless_the_line_is_cut():
    account = labtasker.Account()
    account.begin(asked("a" * 36, model="vit", lr=0.1, seed=1), 2, 0)
    assert account.line(asked("a" * 36, model="vit", lr=0.1, seed=1)) == "[1/3] aaaaaaaa model=vit lr=0.1 seed=1"
    account.end("a" * 36, "retry")
    account.begin(asked("b" * 36, model="vit", lr=0.1, seed=2), None, 0)
    assert account.line(asked("b" * 36, model="vit", lr=0.1, seed=2)) == "[2/3] bbbbbbbb model=vit lr=0.1 seed=2"
    assert account.line(asked("b" * 36, model="vit", lr=0.1, seed=2), width=40) == "[2/3] bbbbbbbb model=vit lr=0.1 seed=2"
    assert account.line(asked("b" * 36, model="vit", lr=0.1, seed=2), ": failed", width=45) == "[2/3] bbbbbbbb seed=2 model=vit lr=0.1: failed"[:43] + ".."
    account.end("b" * 36, "success")
    account.begin(asked("a" * 36, model="vit", lr=0.1, seed=1), 1, 9)
    assert account.line(asked("a" * 36, model="vit", lr=0.1, seed=1)).startswith("[1/3] aaaaaaaa model=vit ")
    account.end("a" * 36, "failed")
    account.begin(asked("c" * 36, "other", extra=1), 1, 99)  # one more has come meanwhile
    assert account.line(asked("c" * 36, "other", extra=1)) == "[3/4] cccccccc other extra=1"
    assert account.tally() == "2 tasks: 1 success, 1 failed (3 runs)"


def test_the_number_of_tasks_is_left_out_where_no_server_tells_it():
    account = labtasker.Account()
    account.begin(asked("a" * 36, lr=0.1), None, 0)
    assert account.line(asked("a" * 36, lr=0.1), ": x") == "aaaaaaaa lr=0.1: x"
    account.end("a" * 36, "success")
    assert account.tally() == "1 task: 1 success"


def test_a_loop_tells_only_the_latest_tasks_apart_and_counts_all(monkeypatch):
    monkeypatch.setattr(labtasker.Account, "LATEST", 3)
    account = labtasker.Account()
    for number in range(9):
        account.begin(asked(str(number), lr=0.1), 0, 0)
        account.end(str(number), "failed" if number == 4 else "success")
    assert account.tally() == "9 tasks: 8 success, 1 failed" and len(account.tasks) == 3


@hypothesis.given(strategies.dictionaries(strategies.text("ab", min_size=1), strategies.text() | strategies.floats(), min_size=1),
                  strategies.text(max_size=200), strategies.integers(60, 200))
def test_the_lines_of_a_loop_fit_the_terminal(args, error, width):
    one, account = asked("1f2e3d4c" * 4, **args), labtasker.Account()
    account.begin(one, 10 ** 6, 0)
    for state in ("success", "failed", "retry", "pending", "taken", "cancelled"):
        tail = labtasker.ending(one, state, 100.0, {"acc": 0.91, "text": error}, error)
        line = account.line(one, tail, "[slot 12] ", width)
        assert labtasker.cells_wide(line) <= width and line.startswith("[slot 12] [1/1000001] 1f2e3d4c "), line
        assert labtasker.clean(line, "") == line


@pytest.mark.parametrize("state, took_s, why, shown", [
    ("success", 12.3, None, ": success in 12 s, acc=0.91"), ("retry", 0.517, "exit code 3\nmore", ": failed in 0.52 s, attempt 1 of 3: exit code 3"),
    ("failed", 300, "", ": failed in 5 min, attempt 1 of 3 and no more, as each would fail"), ("pending", 9, "exit code 75", ": requeued after 9.0 s, uncharged: exit code 75"),
    ("taken", 10000, "its job was stopped", ": taken over by another worker after 2.8 h: its job was stopped"),
])
def test_a_run_s_line_tells_its_end(state, took_s, why, shown):
    assert labtasker.ending(asked("a", lr=1), state, took_s, {"acc": 0.91}, why) == shown


def train(lr=Required(), data="here", *, steps: int = 5):
    pass


@pytest.mark.parametrize("required, why_not, rows, lines", [
    (["lr"], labtasker.JobCommand(["x", "%(lr)"]).why_not, [{"lr": 1, "steps": n} for n in range(6)],
     ["6 pending tasks were not taken: they also have steps, which the command lacks (task why 0000)"]),
    (["modle", "lr"], labtasker.JobCommand(["x"]).why_not, [{"model": "vit", "lr": 1}],
     ["1 pending task was not taken: it lacks modle but has model: is one of these names misspelt? (task why 0000)"]),
    (["opt"], labtasker.JobCommand(["x"]).why_not, [{"a": {"b": 1}}, {"opt": {"lr": 1}}, {"opt": 3, "z": 1}],
     ["1 pending task was not taken: it lacks opt; it also has a.b, which the command lacks (task why 0000)",
      "1 pending task was not taken: it also has z, which the command lacks (task why 0002)"]),
    (["lr"], labtasker.BoundFunction(train).why_not, [{"lr": 1, "steps": 5}, {"lr": 1, "wd": 5}],
     ["1 pending task was not taken: it also has steps, which train() does not take from tasks: mark steps with Required() in place of "
      "its default (task why 0000)",
      "1 pending task was not taken: it also has wd, which train() lacks (task why 0001)"]),
    (["lr", "*"], None, [{"lr": 1, "z": 1}], []), ((), None, [{"lr": 1}], []),
])
def test_a_loop_says_why_it_leaves_pending_tasks(required, why_not, rows, lines):
    pending = [asked("%04d" % at, **args) for at, args in enumerate(rows)]
    assert list(labtasker.left_tasks(required, pending, [], why_not)) == lines
    fits = not lines or {"opt": {"lr": 1}} in rows
    assert list(labtasker.left_tasks(required, pending, [], why_not, is_paused=True)) == (
        ["1 pending task was not started: its queue is paused (labtasker queue resume)"] * fits + lines)


@pytest.mark.slow
def test_what_a_loop_prints_of_its_tasks(both):
    for n in (1, 2):
        labtasker.submit_task("s", {"n": n, "m": "vit"}, max_retries=2)
    labtasker.submit_task("other", {"n": 0, "m": "vit"})
    labtasker.submit_task("s", {"n": 0, "steps": 0})
    words = ["--", "sh", "-c", "echo did $0; exit $(($0 > 1))", "%(n)", "%(m)"]
    run = both.cli("loop", "--name", "s", "--quiet", "--fail", *words, check=False)
    assert run.returncode == 4 and run.stdout == ""
    line = r"\[%d/2\] [0-9a-f]{8} n=%d m=vit: %s"
    fails = line % (2, 2, r"failed in [\d.]+ s, attempt %d of 2: exit code 1\n")
    start = r"(labtasker: no heart.*\n)?\[1/2\] [0-9a-f]{8} (n=1 m=vit|m=vit n=1): success in [\d.]+ s\n"
    assert re.match(start + fails % 1 + fails % 2 + r"labtasker: 1 pending task was not taken: it lacks m; it also has steps, which "
                    r"the command lacks \(task why [0-9a-f]{8}\)\nlabtasker: done: 2 tasks: 1 success, 1 failed \(3 runs\)\n\Z", run.stderr), run
    none = both.cli("loop", "--name", "nosuch", *words)
    assert none.returncode == 0 and "4" not in none.stdout
    assert "2 pending tasks were not taken: the loop's name or filter leaves out all that are pending" in none.stderr
    assert both.cli("loop", "--name", "no such", *words, check=False).returncode == 2
    rest = both.cli("loop", "--verbose", "-f", "args.n == 0", *words, check=False)
    other, = labtasker.ls_tasks(task_name="other").content
    assert rest.stdout == "did 0\n" and "labtasker: task %s (other): {" % other.task_id in rest.stderr
    assert "labtasker: task %s: success in" % other.task_id in rest.stderr and rest.returncode == 0


@pytest.mark.slow
def test_a_decorated_loop_takes_a_name_and_may_be_quiet(home):
    labtasker.submit_task("s", {"n": 1}, max_retries=1)
    labtasker.submit_task("other", {"n": 2})
    run = home.python("import labtasker\n@labtasker.loop(task_name='s', quiet=True, fail=True)\ndef f(n=labtasker.Required()):\n"
                      "    print('did', n)\n    raise ValueError('no')\nf()\n", check=False)
    assert run.returncode == 4 and run.stdout == "" and "Traceback" not in run.stderr
    assert re.search(r"^\[1/1\] [0-9a-f]{8} n=1: failed in [\d.]+ s, attempt 1 of 1: ValueError: no$", run.stderr, re.M), run
    one, = labtasker.ls_tasks(task_name="s").content
    assert packed_run(home)["output"].startswith("did 1\n") and one.attempts[0]["log"]["offset"] > 0
    assert [w.ended_at is None for w in labtasker.ls_workers()] == [False]


@pytest.mark.slow
def test_a_loop_stays_for_tasks_to_come(both):
    loop = both.start_cli("loop", "--idle-timeout", "600", "--", "echo", "had", "%(n)")
    wait_until(lambda: labtasker.ls_workers().content, "the loop has its worker")
    one, = submit()
    wait_for_task(one, "success")
    two, = submit()
    wait_for_task(two, "success")
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: 2 tasks: 2 success" in output(loop)


def test_what_a_task_holds_can_not_play_with_the_terminal(home):
    labtasker.submit_task(args={"n": "\x1b[2J\x07"})
    run = home.cli("loop", "--", "true", "%(n)")
    assert "\x1b" not in run.stderr and "\x07" not in run.stderr


# What a run leaves on disk and on its task


def packed_run(place):
    """Return what the packs have of the only run, of which nothing else is left."""
    found = harness.packed(place.cwd / ".labtasker")
    (run,), = found.values()
    assert os.listdir(str(run["path"].parent)) == [run["path"].name]
    return run


TALKER = """
import json, os, sys, labtasker
print("out", sys.stdout.isatty(), sys.stderr.isatty(), flush=True)
folder = os.environ["LABTASKER_LOG_DIR"]
with open(os.path.join(folder, "task.json")) as file:
    written = json.load(file)
assert (written["task_id"], written["status"]) == (os.environ["LABTASKER_TASK_ID"], "running")
assert {os.stat(os.path.join(folder, name)).st_mode & 0o077 for name in [""] + os.listdir(folder)} == {0}
for percent in range(50):
    sys.stderr.write("\\rstep %d" % percent)
    sys.stderr.flush()
sys.stderr.write("\\n")
labtasker.report_task_status(labtasker.current_task_id(), "running", {"acc": {"top1": 0.5}})
labtasker.report_task_status(labtasker.current_task_id(), "running", {"acc": {"top5": 0.9}})
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("option, is_terminal", [("--use-pty", True), ("--no-use-pty", False)])
def test_a_command_run_leaves_its_files_and_shows_its_output(both, option, is_terminal):
    one = labtasker.submit_task(args={"n": 3}, max_retries=1).task_id
    script = both.write("job.py", TALKER)
    run = both.cli("loop", option, "--", sys.executable, script, "%(n)")
    assert run.stdout == "out %s %s\n" % (is_terminal, is_terminal) and "step 0\nstep 1\n" in run.stderr  # read as text, \r is \n
    kept = packed_run(both)
    log, report = kept["output"], kept["report"]
    assert run.lines[0] in log.splitlines() and "\r" not in log
    assert "step 0\n" in log and "step 49\n" in log and log.count("step") < 10
    assert task(one).summary == {"acc": {"top1": 0.5, "top5": 0.9}, "labtasker_error": "exit code 3"}
    assert (report["status"], report["reason"], report["facts"]) == ("failed", "exit code 3", {"exit_code": 3})
    assert report["summary"] == task(one).summary and kept["path"].stat().st_mode & 0o077 == 0
    shown = both.cli("task", "logs", one).stdout
    assert shown == log and kept["run"] == task(one).run_id and "out %s" % is_terminal in shown


def test_without_a_pseudo_terminal_pipes_do(home, monkeypatch, capfd):
    def none_left():
        raise OSError("out of pty devices")
    monkeypatch.setattr(os, "openpty", none_left)
    submit()
    assert labtasker.command_loop([sys.executable, "-c", "import sys; print(sys.stdout.isatty())", "%(n)"]) == 0
    assert capfd.readouterr().out == "False\n"


def test_stdout_and_stderr_that_go_to_one_place_stay_in_order(home):
    submit()
    script = home.write("job.py", "import os\nfor i in range(500):\n    os.write(1 + i % 2, b'%d\\n' % i)\n")
    loop = home.start_cli("loop", "--", sys.executable, script, "%(n)")
    assert wait_for_end(loop) == 0
    wanted = [str(i) for i in range(500)]
    assert [line for line in output(loop).splitlines() if line.isdigit()] == wanted
    assert packed_run(home)["output"].split() == wanted


def test_a_job_that_leaves_a_process_behind_is_over_when_it_ends(home):
    one, = submit()
    loop = home.start_cli("loop", "--", "sh", "-c", "sleep 600 & echo pid $!", "%(n)")
    assert wait_for_end(loop) == 0
    assert task(one).status == "success"
    os.kill(int(output(loop).split("pid ")[1].split()[0]), signal.SIGKILL)


def test_a_decorated_run_leaves_its_files_too(home, capfd):
    submit(max_retries=1)

    @labtasker.loop()
    def main(n=Required()):
        print("prints")
        print("complains", file=sys.stderr)
        labtasker.report_task_status(labtasker.current_task_id(), "running", {"acc": 1})
        raise ValueError("no luck")
    main()
    kept = packed_run(home)
    log, report = kept["output"], kept["report"]
    assert log.startswith("prints\ncomplains\n") and "ValueError: no luck" in log
    assert report["status"] == "failed" and report["summary"]["labtasker_exception"]["type"] == "ValueError"
    shown = capfd.readouterr()
    assert shown.out == "prints\n" and "complains\n" in shown.err


def test_a_function_that_changes_the_folder_changes_nothing_for_the_loop(home, tmp_path):
    ids = submit(2)

    @labtasker.loop()
    def main(n=Required()):
        os.chdir(str(tmp_path))
    main()
    assert "LABTASKER_ROOT" not in os.environ
    os.chdir(str(home.cwd))
    assert [task(i).status for i in ids] == ["success"] * 2 and len(harness.packed(home.cwd / ".labtasker")) == 2


CHANGES = ["os.environ.clear()", "os.environ.update(LABTASKER_ROOT=elsewhere, LABTASKER_URL='http://127.0.0.1:9')",
           "os.umask(0o777)", "sys.stdout = sys.stderr = None", "sys.stderr = Deaf()", "locale.setlocale(locale.LC_ALL, 'C')",
           "[signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)]",
           "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])"]
CHANGER = """
import os, signal, locale, sys, labtasker
from labtasker import Required
elsewhere = os.path.abspath("elsewhere")
class Deaf:
    def write(self, text):
        raise RuntimeError("no")
    def flush(self):
        pass
@labtasker.loop()
def main(n: int = Required()):
    if n == 0:
        os.chdir(elsewhere)
        %s
main()
"""


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_function_does_to_its_process_changes_nothing_for_the_loop(home, change):
    (home.cwd / "elsewhere" / ".labtasker").mkdir(parents=True)
    ids = submit(3)
    loop = home.start(sys.executable, home.write("loop.py", CHANGER % change))
    assert wait_for_end(loop) == 0, output(loop)
    assert [task(i).status for i in ids] == ["success"] * 3
    assert set(harness.packed(home.cwd / ".labtasker")) == set(ids)
    assert [path.stat().st_mode & 0o777 for path in (home.cwd / ".labtasker" / "logs").iterdir()] == [0o600]
    assert not list((home.cwd / "elsewhere" / ".labtasker").iterdir())


@pytest.mark.parametrize("change", CHANGES[-2:])
def test_a_loop_hears_of_signals_again_once_the_function_that_took_them_is_over(home, change):
    def main(n):
        exec(change, {"signal": signal})
    submit(2)
    heard, before = [], signal.getsignal(signal.SIGTERM)

    @labtasker.loop()
    def run(n=Required()):
        heard.append(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL and
                     signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        main(n)
    run()
    assert heard == [True, True] and signal.getsignal(signal.SIGTERM) == before


def test_a_job_of_a_loop_finds_the_store_of_the_loop_whatever_an_earlier_function_cleared(server_home):
    ids = submit(2)

    @labtasker.loop()
    def main(n=Required()):
        text = "import labtasker; labtasker.report_task_status(%r, 'running', {'from': 'a child'})" % ids[n]
        child = {"PYTHONPATH": str(harness.ROOT), **{k: v for k, v in os.environ.items() if k.startswith("LABTASKER_")}}
        assert subprocess.run([sys.executable, "-c", text], env=child).returncode == 0
        for name in [name for name in os.environ if name.startswith("LABTASKER_")]:
            del os.environ[name]
    main()
    os.environ.update(server_home.env)
    assert [task(i).summary for i in ids] == [{"from": "a child"}] * 2


def test_a_job_that_finds_no_file_of_its_task_asks_for_it(home):
    one, = submit()
    text = ("import labtasker, os; path = labtasker.get_labtasker_log_dir() / 'task.json'; %s; "
            "labtasker.report_task_status(labtasker.current_task_id(), 'running', labtasker.task_info().args)")
    for damage in ("os.unlink(str(path))", "path.write_text('[1]')", "path.write_text('{')", "path.write_text('{\"task_id\": 1}')"):
        home.cli("loop", "--", sys.executable, "-c", text % damage, "%(n)")
        assert (task(one).status, task(one).summary) == ("success", {"n": 0})
        labtasker.update_tasks([TaskUpdateRequest(task_id=one, replace_fields=["summary"], summary={})], reset_pending=True)


def test_every_attempt_is_kept_on_the_task(both):
    one, = submit(max_retries=30)
    both.cli("loop", "--max-tasks", "24", "--", "sh", "-c", "exit 3", "%(n)")
    both.cli("loop", "--", "true", "%(n)")
    attempts = task(one).attempts
    assert len(attempts) == 20 and attempts[-1]["run_id"] == task(one).run_id
    last, before = attempts[-1], attempts[-2]
    assert (last["status"], last["exit_code"], before["status"], before["exit_code"]) == ("success", 0, "failed", 3)
    assert before["reason"] == "exit code 3" and "reason" not in last
    assert last["host"] == os.uname().nodename and last["pid"] > 0 and before["start"] < before["end"] < last["start"]
    assert {a["worker_id"] for a in attempts} == {w.worker_id for w in labtasker.ls_workers().content}
    assert set(last["log"]) == {"file", "offset", "length"} and (both.folder / last["log"]["file"]).exists()
    found = labtasker.ls_tasks(extra_filter='attempts[19].exit_code == 0').content
    assert [t.task_id for t in found] == [one]


def test_a_job_that_ends_its_run_itself_leaves_its_exit_code(both):
    one, = submit()
    both.cli("loop", "--", sys.executable, "-c", "import labtasker, sys; labtasker.finish('success'); sys.exit(4)", "%(n)")
    last, = task(one).attempts
    assert (task(one).status, last["status"], last["exit_code"]) == ("success", "success", 4)


def test_cancelled_and_reset_runs_are_closed_attempts(home):
    one, two = submit(2)
    attempt = {"host": "here", "log": "/logs/{task_id}/{run_id}"}
    for _ in range(2):
        labtasker.fetch_task(heartbeat_timeout=60, attempt=attempt)
    cancel(one)
    labtasker.update_tasks([TaskUpdateRequest(task_id=two)], reset_pending=True)
    assert [a["status"] for t in (one, two) for a in task(t).attempts] == ["cancelled", "reset"]
    assert task(one).attempts[0]["log"].startswith("/logs/%s/" % one) and "end" in task(one).attempts[0]


@pytest.mark.parametrize("attempt", [{"a b": 1}, {"a": {}}, {"a": "x" * 3000}, ["a"]])
def test_what_is_no_attempt_is_refused(home, attempt):
    submit()
    with pytest.raises(labtasker.LabtaskerHTTPStatusError, match="attempt"):
        labtasker.fetch_task(heartbeat_timeout=60, attempt=attempt)


def git(place, *words):
    return harness.run(["git", "-c", "user.name=x", "-c", "user.email=x@y"] + list(words), place.cwd).stdout.strip()


def test_the_commit_is_kept_at_submission_and_at_each_start(home):
    one, = submit()
    assert task(one).git is None
    home.write("train.py", "1")
    home.write(".gitignore", ".labtasker\n")
    git(home, "init", "-q")
    git(home, "add", "train.py")
    git(home, "commit", "-qm", "first")
    commit = git(home, "rev-parse", "HEAD")
    two = home.submit("--", "--n=1")
    home.write("train.py", "2")
    three = home.submit("--", "--n=1")
    assert [task(i).git for i in (two, three)] == [commit, commit + "-dirty"]
    home.cli("loop", "--", "true", "%(n)")
    assert {a["git"] for i in (one, two, three) for a in task(i).attempts} == {commit + "-dirty"}
    assert labtasker.ls_tasks(extra_filter='regex(git, "dirty")').content[0].task_id == three
    assert task(three).metadata == {}
    home.cli("task", "submit", "--", "--n=1", env={"PATH": "/nowhere"})
    assert task(home.tasks()[-1]["task_id"]).git is None


def test_logs_are_printed_and_followed(both):
    one, = submit(max_retries=2)
    loop = both.start_cli("loop", "--", "sh", "-c", "echo begins; until test -e gate; do sleep 0.05; done; echo ends; exit 3",
                          "%(n)")
    wait_for_line(loop, "begins")
    follower = both.start_cli("task", "logs", one[:8], "-f")
    wait_for_line(follower, "begins")
    assert "ends" not in both.cli("task", "logs", one).stdout
    both.write("gate", "")
    assert wait_for_end(follower) == 0
    assert output(follower).splitlines()[-2:] == ["begins", "ends"] and "attempt 1 of 1" in output(follower)
    assert wait_for_end(loop) == 0
    run = both.cli("task", "logs", one, "--attempt", "1")
    assert run.stdout == "begins\nends\n" and "attempt 1 of 2" in run.stderr and "failed" in run.stderr
    assert both.cli("task", "logs", one, "--attempt", "3", check=False).returncode == 1
    never, = submit()
    assert "has not been run" in both.cli("task", "logs", never, check=False).stderr


def test_lines_that_are_overwritten_become_lines_of_their_own():
    def made(*pieces):
        line = labtasker.Progress()
        return b"".join(line.feed(data, at) for at, data in pieces) + line.rest()
    assert made((0, b"a\r"), (0, b"\nb\r\r\nc")) == b"a\nb\nc"
    assert made((0, b"\r1%"), (0.5, b"\r2%"), (1.5, b"\r3%"), (1.6, b"\r4%"), (1.7, b"\r5%\nend\n")) == b"1%\n3%\n5%\nend\n"
    assert made((0, b"1%\r"), (0.1, b"2%\r"), (0.2, b"3%")) == b"1%\n2%\n3%"
    assert made((0, b"\r\r\r"), (0, b"x")) == b"x"
    assert made((0, b"a\rb\rc\nd\re\rf\n"), (0, b"g\rh\r\n\ri")) == b"a\nb\nc\nd\nf\ng\nh\ni"


@hypothesis.given(strategies.lists(strategies.sampled_from([b"\r", b"\n", b"\r\n", b"a", b"bc", b"\x1b[2K", b"\xc3"]), max_size=30))
def test_what_is_kept_of_output_does_not_depend_on_the_pieces_in_which_it_comes(pieces):
    whole, parts = labtasker.Progress(), labtasker.Progress()
    one = whole.feed(b"".join(pieces), 0) + whole.rest()
    assert one == b"".join(parts.feed(piece, 0) for piece in pieces) + parts.rest()
    assert b"\r" not in one


def test_a_state_longer_than_a_progress_bar_is_kept_as_it_comes_and_not_in_memory():
    line, kept = labtasker.Progress(), b""
    line.feed(b"1%\r2%\r", 0)
    for count in range(1, 500):
        kept += line.feed(b"z" * 1000, 0.1)
        assert 1000 * count - len(kept) <= line.LONGEST_BYTES
    assert kept + line.rest() == b"\n" + b"z" * 499000


# Signals


JOB = """
import os, signal, subprocess, sys, time
mode = sys.argv[1]
if mode == "deaf":
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
if mode == "polite":
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        signal.signal(s, lambda s, f: (os.write(1, ("job got %d" % s).encode() + bytes([10])), sys.exit(0)))
child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600")
print("pids %d %d" % (os.getpid(), child), flush=True)
time.sleep(600)
"""


def start_job(place, mode, grace_s=None):
    """Return (loop process, pids of job and its child) once the job runs."""
    words = [sys.executable, str(place.write("job.py", JOB)), mode, "%(n)"]
    loop = start_script(place, "sys.exit(labtasker.command_loop(%r, grace_s=%r))" % (words, grace_s)) \
        if grace_s else place.start_cli("loop", "--", *words)
    line = [line for line in wait_for_line(loop, "pids ").splitlines() if line.startswith("pids ")][0]
    return loop, [int(word) for word in line.split()[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_hands_the_task_back_uncharged(both, name):
    one, = submit()
    loop, pids = start_job(both, "polite")
    helpers = children(loop.pid)
    loop.send_signal(getattr(signal, name))
    assert wait_for_end(loop) == 128 + getattr(signal, name), output(loop)
    back = task(one)
    assert (back.status, back.retries, back.interruptions) == ("pending", 0, 1)
    assert name in back.reason and "job got %d" % getattr(signal, name) in output(loop)
    wait_until(lambda: not [pid for pid in pids + helpers if is_alive(pid)], "nothing is left running")


@pytest.mark.slow
def test_a_second_signal_kills_a_deaf_job_at_once(both):
    one, = submit()
    loop, pids = start_job(both, "deaf", 600)
    loop.send_signal(signal.SIGINT)
    wait_for_line(loop, "again kills it")
    assert is_alive(pids[0])
    loop.send_signal(signal.SIGINT)
    assert wait_for_end(loop) == 130
    assert (task(one).status, task(one).retries) == ("pending", 0)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "nothing is left running")


@pytest.mark.slow
def test_after_the_grace_a_deaf_job_is_killed(home):
    one, = submit()
    loop, pids = start_job(home, "deaf", 0.3)
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 143
    assert task(one).status == "pending" and not [pid for pid in pids if is_alive(pid)]


def test_a_signal_that_was_ignored_stays_ignored(home):
    one, = submit()
    log = home.cwd / "nohup.log"
    loop = harness.start(["nohup", sys.executable, harness.MODULE, "loop", "--", "sh", "-c",
                          "kill -HUP $PPID; echo sent; exit 0", "%(n)"], home.cwd, log)
    home.started.append(loop)
    assert wait_for_end(loop) == 0, log.read_text()
    assert task(one).status == "success"


SLEEPER = """
@labtasker.loop()
def main(n=Required()):
    try:
        print("runs", n, flush=True)
        time.sleep(600 if n == 0 else 0)
    except %s as error:
        print("function got", type(error).__name__, error, flush=True)
        %s
main()
print("after main")
"""


@pytest.mark.parametrize("name, then", [
    ("SIGINT", "raise"), ("SIGINT", "return"), ("SIGINT", "raise ValueError('in cleaning up')"), ("SIGTERM", "raise"),
    ("SIGTERM", "return"), ("SIGHUP", "raise"), ("SIGUSR1", "raise"), ("SIGUSR2", "return"), ("SIGXCPU", "raise")])
def test_a_signal_is_an_exception_in_the_function(home, name, then):
    one, two = submit(2)
    loop = start_script(home, SLEEPER % ("KeyboardInterrupt", then))
    wait_for_line(loop, "runs 0")
    loop.send_signal(getattr(signal, name))
    assert wait_for_end(loop) == 128 + getattr(signal, name), output(loop)
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("pending", 0, 1)
    assert task(two).status == "pending"
    assert "function got KeyboardInterrupt %s" % name in output(loop) and "after main" not in output(loop)
    assert "Traceback" not in output(loop)


def test_a_server_hears_of_a_signal_to_a_decorated_loop(server_home):
    one, = submit()
    loop = start_script(server_home, SLEEPER % ("ZeroDivisionError", "pass"))
    wait_for_line(loop, "runs 0")
    loop.send_signal(signal.SIGINT)
    assert wait_for_end(loop) == 130
    assert (task(one).status, task(one).retries, task(one).interruptions) == ("pending", 0, 1)


def test_what_the_function_forks_dies_of_signals_as_ever(home):
    submit()
    loop = start_script(home, """
import multiprocessing
@labtasker.loop()
def main(n=Required()):
    ready = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=lambda: (ready.set(), time.sleep(600)))
    child.start()
    ready.wait()
    child.terminate()
    child.join()
    print("child ended by", child.exitcode)
main()
""")
    assert wait_for_end(loop) == 0
    assert "child ended by -15" in output(loop)


def test_handlers_are_as_before_once_the_loop_is_over(home):
    submit()
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)]
    labtasker.loop()(lambda n=Required(): None)()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)] == before
    assert signal.set_wakeup_fd(-1) == -1


# HeartbeatProcess, and what they bring


def cancel(task_id):
    labtasker.update_tasks([TaskUpdateRequest(task_id=task_id, status="cancelled")])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "deaf"])
def test_a_job_that_is_cancelled_from_outside_is_ended_with_its_group(both, mode):
    one, two = submit(2)
    loop, pids = start_job(both, mode)
    cancel(one)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "the job and its child are gone")
    wait_for_task(two, "running")
    assert (task(one).status, task(one).retries) == ("cancelled", 0)
    cancel(two)
    assert wait_for_end(loop) == 0
    assert "2 cancelled" in output(loop)


@pytest.mark.slow
@pytest.mark.parametrize("then", ["raise", "return"])
def test_a_function_that_is_cancelled_from_outside_gets_task_cancelled(both, then):
    one, two = submit(2)
    loop = start_script(both, SLEEPER % ("labtasker.TaskCancelled", then))
    wait_for_line(loop, "runs 0")
    cancel(one)
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).status, task(two).status) == ("cancelled", "success")
    assert "function got TaskCancelled" in output(loop) and "after main" in output(loop)


@pytest.mark.slow
def test_a_job_that_cancels_itself_may_clean_up(both):
    one, = submit()
    script = both.write("job.py", "import labtasker, os, time\n"
                        "labtasker.report_task_status(labtasker.current_task_id(), 'cancelled')\n"
                        "time.sleep(4)\nprint('cleaned up', flush=True)\n")
    run = both.cli("loop", "--", sys.executable, script, "%(n)")
    assert run.lines == ["cleaned up"] and task(one).status == "cancelled"


def beat_fast(place):
    """Have loops here beat each second, so that a task is given up after three."""
    place.write(".labtasker/config.toml", FAST_BEATS)


@pytest.mark.slow
def test_a_run_longer_than_its_time_out_is_kept_alive(both):
    beat_fast(both)
    one, = submit(max_retries=1)
    loop = both.start_cli("loop", "--", "sleep", "5", "%(n)", "0")
    assert wait_for_end(loop) == 0, output(loop)
    done = task(one)
    assert (done.status, done.retries, done.heartbeat_timeout) == ("success", 0, 3)


@pytest.mark.slow
def test_kill_9_of_the_loop_ends_beats_and_job_and_the_task_is_tried_again(both):
    beat_fast(both)
    one, = submit()
    loop, pids = start_job(both, "deaf")
    helpers = children(loop.pid)
    assert len(helpers) == 2
    os.kill(loop.pid, signal.SIGKILL)
    wait_until(lambda: not [pid for pid in pids + helpers if is_alive(pid)], "nothing is left running")
    again = both.start_cli("loop", "--idle-timeout", "600", "--", "true", "%(n)")
    assert wait_for_task(one, "success").retries == 1
    again.terminate()
    assert wait_for_end(again) == 143


@pytest.mark.slow
def test_beats_that_die_are_started_again(home):
    beat_fast(home)
    one, = submit(max_retries=1)
    loop = home.start_cli("loop", "--", "sh", "-c", "echo pids; sleep 6", "%(n)")
    wait_for_line(loop, "pids")
    beats, = wait_until(lambda: [pid for pid in children(loop.pid) if b"heartbeat_main" in pathlib.Path(
        "/proc/%d/cmdline" % pid).read_bytes()], "the loop has its heartbeats")
    os.kill(beats, signal.SIGKILL)
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).status, task(one).retries) == ("success", 0)


def test_no_password_is_in_the_arguments_of_a_process(server_home):
    submit()
    loop, pids = start_job(server_home, "plain")
    for pid in children(loop.pid) + [loop.pid]:
        assert harness.PASSWORD.encode() not in pathlib.Path("/proc/%d/cmdline" % pid).read_bytes()


@pytest.mark.slow
def test_a_loop_that_was_stopped_past_its_lease_loses_the_run_and_goes_on(both):
    beat_fast(both)
    one, = submit()
    loop, pids = start_job(both, "plain")
    os.kill(loop.pid, signal.SIGSTOP)
    other = both.start_cli("loop", "--idle-timeout", "600", "--", "sh", "-c", "sleep 600", "%(n)")
    wait_until(lambda: (task(one).retries, task(one).status) == (1, "running"), "another took the task", timeout_s=40)
    os.kill(loop.pid, signal.SIGCONT)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "the stale job is gone")
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).retries, task(one).status) == (1, "running")
    other.terminate()
    assert wait_for_end(other) == 143


# A server that is away


@pytest.mark.slow
def test_a_result_waits_for_the_server_and_the_loop_goes_on_when_it_is_back(server_home):
    ids = submit(2)
    server = server_home.server
    gate = server_home.cwd / "gate"
    loop = server_home.start_cli("loop", "--", "sh", "-c", "echo begins; until test -e gate; do sleep 0.05; done", "%(n)")
    wait_for_line(loop, "begins")
    port = int(server.url.rpartition(":")[2])
    server.kill()
    gate.write_text("")
    wait_for_line(loop, "waiting for it to come back")
    server.start(port)
    assert wait_for_end(loop) == 0, output(loop)
    assert [(task(i).status, task(i).retries) for i in ids] == [("success", 0)] * 2
    assert output(loop).count("waiting for it to come back") == 1 and "it is back" in output(loop)


@pytest.mark.slow
def test_a_job_knows_its_task_and_reports_while_the_server_is_away(server_home):
    one, = submit(max_retries=1)
    text = ("import labtasker; task = labtasker.task_info(); assert labtasker.is_enabled() and labtasker.current_worker_id(); "
            "labtasker.report_task_status(labtasker.current_task_id(), 'running', {'acc': task.args['n']}); "
            "labtasker.finish('success', {'done': task.task_id}); print('knows', task.args)")
    loop = server_home.start_cli("loop", "--", "sh", "-c", 'echo begins; until test -e gate; do sleep 0.05; done; exec "$@"',
                                 "sh", sys.executable, "-c", text, "%(n)")
    wait_for_line(loop, "begins")
    port = int(server_home.server.url.rpartition(":")[2])
    server_home.server.kill()
    server_home.write("gate", "")
    wait_for_line(loop, "knows {'n': 0}")
    server_home.server.start(port)
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).status, task(one).summary, task(one).retries) == ("success", {"acc": 0, "done": one}, 0)


@pytest.mark.slow
def test_a_signal_while_the_server_is_away_ends_the_loop(server_home):
    submit(2)
    loop = server_home.start_cli("loop", "--", "sh", "-c", "echo begins; until test -e gate; do sleep 0.05; done", "%(n)")
    wait_for_line(loop, "begins")
    server_home.server.kill()
    (server_home.cwd / "gate").write_text("")
    wait_for_line(loop, "waiting for it to come back")
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop, timeout_s=60) == 143
    assert "stopped by SIGTERM" in output(loop)


# A server that speaks the plain protocol only


@pytest.fixture
def plain_home(server_home):
    """A Place whose own copy of the module, here first on the path, never speaks of extensions."""
    source = harness.MODULE.read_text(encoding="utf-8")
    for line, instead in (('EXTENSIONS = "Labtasker-Extensions"', 'EXTENSIONS = "X-Nothing"'),
                          ('answer="status", **locals())', "worker_id=worker_id, task_id=task_id)")):
        assert source.count("\n" + line) == 1 or source.count(line) == 1
        source = source.replace(line, instead)
    server_home.write("labtasker.py", source)
    return server_home


@pytest.mark.slow
def test_a_plain_server_is_asked_in_its_own_words(plain_home):
    beat_fast(plain_home)
    one, two, three = submit(3, max_retries=1)
    loop = start_script(plain_home, """
@labtasker.loop()
def main(n=Required()):
    assert labtasker.task_info().run_id is None and labtasker.client().extensions is False
    labtasker.report_task_status(labtasker.current_task_id(), "running", {"loss": n})
    print("runs", n, flush=True)
    try:
        time.sleep([0, 600, 600][n])
    except labtasker.TaskCancelled:
        print("cancelled", flush=True)
        raise
main()
""")
    wait_for_line(loop, "runs 1")
    assert (task(one).status, task(one).summary) == ("success", {"loss": 0})
    assert (task(two).status, task(two).summary) == ("running", {"loss": 1})
    cancel(two)
    wait_for_line(loop, "cancelled")
    wait_for_line(loop, "runs 2")
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 143, output(loop)
    assert (task(two).status, task(three).status, task(three).retries) == ("cancelled", "pending", 0)


@pytest.mark.parametrize("is_plain, took_s, next_s", [
    (True, 0.01, 10), (True, 2, 10), (True, 11, 10),  # it answers at once
    (False, 10, 10), (False, 0.01, 1.01), (False, 60, 60)])  # it waits with its answer; it is away, or about to stop
def test_beats_come_at_the_interval_whoever_waits_for_that_long(is_plain, took_s, next_s):
    heart = labtasker.RunBeater.__new__(labtasker.RunBeater)
    heart.message, heart.is_plain = {"interval_s": 10}, is_plain
    assert heart.next_at(100, 100 + took_s) == pytest.approx(100 + next_s)


@pytest.mark.slow
def test_a_plain_server_gets_one_beat_an_interval(plain_home):
    plain_home.write(".labtasker/config.toml", FAST_BEATS.replace("1", "4"))
    one, = submit(max_retries=1)
    loop = plain_home.start_cli("loop", "--", "sleep", "7", "%(n)")
    assert wait_for_end(loop) == 0 and task(one).status == "success"
    beats = sum(b"/heartbeat" in asked for asked in plain_home.proxy.asked)
    assert 1 <= beats <= 3, "after 1 s, after 5 s"


def test_what_was_taken_by_another_is_not_handed_back_to_a_plain_server(server_home, monkeypatch):
    one, = submit()
    mine, other = labtasker.create_worker("mine", {}), labtasker.create_worker("other", {})
    labtasker.fetch_task(worker_id=other, heartbeat_timeout=60)
    monkeypatch.setattr(labtasker.client().transport, "extensions", False)
    with pytest.raises(labtasker.LabtaskerHTTPStatusError, match="is not run by worker"):
        labtasker.deliver(one, "pending", worker_id=mine)
    assert task(one).status == "running"


# Asking a person


def test_after_a_failure_a_person_on_a_terminal_is_asked(home):
    import pty
    submit(3, max_retries=1)
    script = home.write("job.py", "import labtasker\nlabtasker.set_prompt_on_task_failure(True)\n"
                        "@labtasker.loop()\ndef main(n=labtasker.Required()):\n    1 / 0\nmain()\n")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(script)], stdin=theirs, stdout=theirs, stderr=theirs,
                               env=harness.clean_env(), cwd=str(home.cwd), start_new_session=True)
    home.started.append(process)
    os.close(theirs)
    shown = b""
    for answer, seen in ((b"y\n", 1), (b"n\n", 2)):
        while shown.count(b"[Y/n]") < seen:
            shown += os.read(ours, 4096)
        os.write(ours, answer)
    assert wait_for_end(process) == 1
    assert sorted(t.status for t in labtasker.ls_tasks().content) == ["failed", "failed", "pending"]
    os.close(ours)


def test_nobody_is_asked_where_there_is_no_terminal(home, monkeypatch):
    monkeypatch.setitem(labtasker.LOOP_SETTINGS, "prompt_on_failure", False)
    labtasker.set_prompt_on_task_failure(True)
    assert labtasker.ask_to_go_on()


def test_a_log_that_is_no_plain_file_is_refused_and_never_waited_for(home):
    one, = submit(max_retries=1)
    assert home.cli("loop", "--", "sh", "-c", "echo words; exit 1", "%(n)").returncode == 0
    log, = (home.folder / "logs").glob("*.pack")
    assert "words" in home.cli("task", "logs", one).stdout
    log.unlink()
    os.mkfifo(str(log))
    run = home.cli("task", "logs", one, check=False, timeout_s=20)
    assert run.returncode == 1 and "is not a plain file" in run.stderr


# Without a server, and with many files


@pytest.mark.slow
@pytest.mark.parametrize("options, fields", [(["--eta-max", "2s"], {}), ([], {"task_timeout": 2})], ids=["eta-max", "task-timeout"])
@pytest.mark.parametrize("is_function", [False, True])
def test_a_job_that_hangs_is_ended_at_its_time_out_though_the_loop_is_alone(both, options, fields, is_function):
    one = labtasker.submit_task(args={"n": 1}, max_retries=1, **fields).task_id
    if is_function:
        loop = start_script(both, """
@labtasker.loop(%s)
def main(n=Required()):
    time.sleep(600)
main()
""" % ("eta_max='2s'" if options else ""))
    else:
        loop = both.start_cli("loop", *(options + ["--", "sleep", "600", "%(n)"]))
    assert wait_for_end(loop) == 0, output(loop)
    done = task(one)
    assert done.status == "failed" and "task_timeout" in done.summary["labtasker_error"]


@pytest.mark.slow
def test_a_loop_that_works_without_a_server_gives_up_the_run_of_one_that_was_killed(home):
    one = labtasker.submit_task(args={"n": 1}, heartbeat_timeout=3).task_id
    killed = home.start_cli("loop", "--", "sleep", "600", "%(n)")
    wait_for_task(one, "running")
    other = labtasker.submit_task(args={"m": 1}).task_id
    works = home.start_cli("loop", "--", "sh", "-c", "until test -e gate; do sleep 0.1; done; : %(m)")
    wait_for_task(other, "running")
    os.kill(killed.pid, signal.SIGKILL)
    journal = home.folder / "journal.jsonl"
    wait_until(lambda: "no heartbeat for 3 seconds" in journal.read_text(), "nobody else looks at the store")
    (home.cwd / "gate").write_text("")
    assert wait_for_end(works) == 0, output(works)


def test_a_loop_runs_in_a_process_with_more_files_than_select_takes(home):
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] != resource.RLIM_INFINITY and (
            resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000):
        pytest.skip("no process may have so many files here")
    submit(2)
    run = home.python("""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
import labtasker
from labtasker import Required
@labtasker.loop()
def main(n=Required()):
    print("runs", n)
main()
labtasker.submit_task(args={"n": 2})
labtasker.command_loop(["sh", "-c", "echo runs $0; echo to stderr >&2", "%(n)"])
""")
    assert run.lines == ["runs 0", "runs 1", "runs 2"] and "to stderr" in run.stderr


@pytest.mark.parametrize("jump_s", [-86400, 86400])
def test_what_is_left_of_the_time_does_not_follow_a_clock_that_is_set(home, monkeypatch, jump_s):
    limit = labtasker.Limit(1000, 10, 0, 0)
    told, read = limit.environment(), labtasker.now
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(labtasker, "now", lambda: labtasker.Instant(read() + jump_s))
    assert 900 < labtasker.time_left() < 1001 and 900 < labtasker.seconds_left() < 1001  # of a job; of a loop in one
    run = labtasker.Run("a", "b", "c", task=object())
    run.limit = limit
    monkeypatch.setitem(labtasker.RUNS, threading.get_ident(), run)
    assert 900 < labtasker.time_left() < 1001
    monkeypatch.delitem(labtasker.RUNS, threading.get_ident())
    monkeypatch.setenv("LABTASKER_END_CLOCK", "elsewhere/1 5.000")  # a job on another host: its wall's clock is all there is
    assert abs((labtasker.time_left() or 0) - max(0, 1000 - jump_s)) < 100


@pytest.mark.parametrize("name", ["LABTASKER_END_TIME", "LABTASKER_END_CLOCK"])
@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "-5", "1e400", "x 5", " "])
def test_an_end_that_can_not_be_read_is_none(home, monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    assert labtasker.time_left() is None


def test_args_that_no_function_takes_fail_for_good_at_once_and_a_raising_function_is_retried(both):
    """A cast that can't succeed is not tried again; what a resolver raises may pass."""
    good, bad = (labtasker.submit_task(args={"lr": lr, "n": 1}).task_id for lr in (0.1, "fast"))
    raises = labtasker.submit_task(args={"m": {"k": "x"}}).task_id

    @labtasker.loop()
    def main(lr: float = Required(), n: int = Required()):
        pass

    @labtasker.loop(required_fields=["m"])
    def other(value=Required(alias="m.k", resolver=int)):
        pass
    for run in (main, other):
        run()
    assert [(task(each).status, task(each).retries) for each in (good, bad, raises)] == [
        ("success", 0), ("failed", 1), ("failed", 3)]
    assert "'lr': expected float, got 'fast'" in task(bad).summary["labtasker_exception"]["message"]
    labtasker.update_tasks([labtasker.TaskUpdateRequest(_id=bad, args={"lr": "0.5"})], reset_pending=True)
    main()
    assert task(bad).status == "success" and task(bad).summary == {}


def test_a_server_without_the_extensions_is_told_by_an_update_that_a_task_failed_for_good(home, monkeypatch):
    task_id = labtasker.submit_task(args={"lr": 1}).task_id
    labtasker.fetch_task()
    monkeypatch.setattr(labtasker.Client, "extensions", False)
    labtasker.deliver(task_id, "failed", {"labtasker_error": "no float"}, final=True)
    assert (task(task_id).status, task(task_id).summary) == ("failed", {"labtasker_error": "no float"})


def test_a_report_that_waits_in_the_outbox_is_as_final_as_one_that_is_sent(home):
    task_id = labtasker.submit_task(args={"lr": 1}).task_id
    fetched = labtasker.fetch_task().task
    run = labtasker.Run(task_id, fetched.run_id, None)
    labtasker.keep_report(run, {"status": "failed", "summary": None, "final": True})
    assert labtasker.deliver_kept() and task(task_id).status == "failed"


def test_a_loop_whose_filter_matches_nothing_says_what_in_it_cannot(home, capsys):
    labtasker.submit_task(args={"lr": 1, "model": "vit"})

    def ends(extra_filter):
        @labtasker.loop(extra_filter=extra_filter)
        def main(lr=Required(), model=Required()):
            raise AssertionError("not to be run")
        main()
        return capsys.readouterr().err
    assert "did you mean pending" in ends('status == "pendng"')
    assert "args.lr is a number in each task that has it" in ends('args.lr == "1"')
    assert "no task has args.modle; did you mean args.model?" in ends('args.modle == "vit"')
    assert "filter: " not in ends("args.lr > 5")


# ---- One request a task: the report of a run's end brings the next task


@pytest.fixture
def exchanged(monkeypatch):
    """The requests about runs: "fetch", "report" or "both"."""
    names, call = [], labtasker.Client.call

    def noted(client, method, path, body=None, query=None):
        if method == "POST" and path.endswith("/tasks/next"):
            names.append("both" if "report" in body else "fetch")
        elif method == "POST" and path.endswith("/status") and "/tasks/" in path:
            names.append("report")
        return call(client, method, path, body, query)
    monkeypatch.setattr(labtasker.Client, "call", noted)
    return names


def run_all(way, fails=lambda n: False, **options):
    """Run what is pending, by a function or by a command; return the exit code of the command loop."""
    if way == "command":
        return labtasker.command_loop(["sh", "-c", "exit 0" if not fails(0) else "exit 1", "x", "%(n)"], use_pty=False, **options)

    def function(n=Required()):
        assert not fails(n)
    return labtasker.loop()(function)()


@pytest.mark.parametrize("way", ["function", "command"])
def test_the_report_of_a_run_brings_the_next_task(home, exchanged, way):
    ids = submit(3)
    run_all(way)
    assert exchanged == ["fetch", "both", "both", "both", "fetch"] and [task(one).status for one in ids] == ["success"] * 3
    with open(os.path.join(labtasker.load_config().root, "journal.jsonl")) as file:
        lines = [json.loads(line)["changes"] for line in file if '"run_end":"success"' in line]
    assert [[change[2]["status"] for change in line] for line in lines] == [["success", "running"]] * 2 + [["success"]]
    if way == "command":
        del exchanged[:]
        ids = submit(3)
        run_all(way, max_tasks=2)
        assert exchanged == ["fetch", "both", "report"] and [task(one).status for one in ids] == ["success", "success", "pending"]


def test_a_loop_that_ends_after_this_run_fetches_nothing_with_its_report(home, exchanged):
    ids = submit(4, max_retries=1)
    assert run_all("command", lambda n: True, max_consecutive_failures=2) == 4
    assert exchanged == ["fetch", "both", "report"]
    assert [(one.status, one.interruptions) for one in map(task, ids)] == [("failed", 0)] * 2 + [("pending", 0)] * 2
    del exchanged[:]

    @labtasker.loop()
    def fatal(n=Required()):
        raise labtasker.FatalWorkerError("no GPU")
    with pytest.raises(SystemExit):
        fatal()
    assert exchanged == ["fetch", "report"] and [task(one).status for one in ids[2:]] == ["pending"] * 2


def test_a_server_that_knows_no_reports_in_fetches_gets_them_alone(home, exchanged, monkeypatch):
    call, is_older = labtasker.Client.call, [True]

    def older(client, method, path, body=None, query=None):
        if is_older[0] and path.endswith("/tasks/next"):
            body = {name: value for name, value in body.items() if name != "report"}
        answer = call(client, method, path, body, query)
        if is_older[0] and path.endswith("/tasks/next"):
            answer.pop("report", None)
        return answer
    monkeypatch.setattr(labtasker.Client, "call", older)
    ids = submit(3)
    run_all("function")
    assert exchanged == ["fetch", "report"] * 3 + ["fetch"] and [task(one).status for one in ids] == ["success"] * 3
    del exchanged[:]
    ids, is_older[0] = submit(3), False

    @labtasker.loop()
    def replaced(n=Required()):
        is_older[0] = True  # the server is: it was exchanged for reports in fetches, and takes none
    replaced()
    assert exchanged == ["fetch", "fetch", "report", "report", "fetch", "report", "fetch"][:len(exchanged)] and len(exchanged) >= 6
    assert [(one.status, one.retries, one.interruptions) for one in map(task, ids)] == [("success", 0, 0)] * 3


@pytest.mark.parametrize("arrives", [True, False])
def test_the_lost_answer_to_a_report_with_a_fetch_loses_and_doubles_nothing(home, exchanged, monkeypatch, arrives):
    fetch, lost, began = labtasker.fetch_task, [], []

    def losing(**request):
        if request.get("report") and len(lost) < 2:
            lost.append(request["fetch_id"])
            fetch(**request) if arrives else None
            raise labtasker.LabtaskerConnectError("the connection broke")
        return fetch(**request)
    monkeypatch.setattr(labtasker, "fetch_task", losing)
    monkeypatch.setattr(labtasker, "_AWAY_S", 0)
    ids = submit(4)
    labtasker.loop()(lambda n=Required(): began.append(n))()
    assert len(lost) == 2 and began == [0, 1, 2, 3] and not labtasker.outbox_reports()
    for one in map(task, ids):
        assert (one.status, one.retries, one.interruptions, len(one.attempts)) == ("success", 0, 0, 1)


def test_a_task_that_came_with_a_report_is_handed_back_by_a_loop_that_must_leave(home, exchanged, monkeypatch):
    ids, close = submit(2), labtasker.Slot.close

    def fails(slot, run, outcome):
        close(slot, run, outcome)
        if outcome.status == "success":
            raise OSError("no space left")
    monkeypatch.setattr(labtasker.Slot, "close", fails)
    assert run_all("command") == 1
    first, second = map(task, ids)
    assert first.status == "success" and (second.status, second.interruptions) == ("pending", 1)
    assert exchanged == ["fetch", "both", "report"]


def test_a_refused_report_is_told_and_the_loop_goes_on(home, exchanged, capsys):
    ids = submit(2)

    @labtasker.loop()
    def main(n=Required()):
        if n == 0:
            labtasker.update_tasks([TaskUpdateRequest(task_id=ids[0], status="cancelled")])
    main()
    assert exchanged[:3] == ["fetch", "both", "report"] and exchanged[-3:] == ["fetch", "both", "fetch"]
    assert "was refused" in capsys.readouterr().err and [task(one).status for one in ids] == ["cancelled", "success"]


def test_jobs_of_an_installed_copy_find_it_by_themselves(monkeypatch):
    folder = os.path.dirname(labtasker.THIS_FILE)
    python_path = labtasker._python_path.__wrapped__
    for given, path in ((None, folder), ("/a", "/a" + os.pathsep + folder), (folder, folder)):
        assert python_path(given) == path
    monkeypatch.setattr(labtasker, "THIS_FILE", os.path.join(os.sep, "x", "site-packages", "labtasker.py"))
    assert python_path(None) is None and python_path("/a") == "/a"


def test_an_exception_that_is_its_own_cause_is_looked_at_to_an_end():
    error = ValueError("x")
    error.__cause__ = error
    assert labtasker.failure_of_error(error) == "exception"
    error.__cause__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert labtasker.failure_of_error(error) == "oom"


def test_a_signal_without_a_name_has_its_number():
    assert labtasker.signal_name(15) == "SIGTERM" and labtasker.signal_name(99) == "signal 99"


def test_a_log_whose_file_a_function_has_closed_is_opened_again(tmp_path):
    log = labtasker.RunLog(str(tmp_path / "run.log"))
    write = log.channel()
    write(b"one\n")
    os.close(log.fd)
    write(b"two\n")
    assert (tmp_path / "run.log").read_bytes() == b"one\ntwo\n"
    os.close(log.fd)
    with open(str(tmp_path / "other"), "wb") as file:  # it has the number that the log had
        log.close()
        file.write(b"x")
    assert (tmp_path / "other").read_bytes() == b"x"


def test_what_a_function_writes_goes_on_into_the_log_when_its_stream_is_closed_and_its_own_mistakes_are_told(tmp_path):
    fed = []
    with open(str(tmp_path / "ascii"), "w", encoding="ascii") as stream:
        tee = labtasker._Tee(stream, fed.append, False)
        with pytest.raises(UnicodeEncodeError):
            tee.write("\u00e9")
        tee.writelines(["a\n", "b\n"])
    assert tee.write("late") == 4 and fed == [b"a\n", b"b\n", b"late"] and (tmp_path / "ascii").read_text() == "a\nb\n"


def test_a_workdir_that_is_no_path_is_refused(home):
    command = labtasker.JobCommand(["true"], workdir="%(d)")
    for path in ("", "a\0b"):
        with pytest.raises(labtasker.LabtaskerValueError, match="--workdir: .* is no folder"):
            command.folder({"d": path})
    assert os.path.isdir(command.folder({"d": "new/one"}))


@pytest.mark.parametrize("status, retries, interruptions, is_final, after", [
    ("failed", 0, 0, False, "retry"), ("failed", 2, 0, False, "failed"), ("failed", 0, 0, True, "failed"), ("success", 0, 0, False, "success"),
    ("pending", 0, labtasker.MAX_INTERRUPTIONS - 2, False, "pending"), ("pending", 0, labtasker.MAX_INTERRUPTIONS - 1, False, "failed")])
def test_what_a_loop_says_of_a_run_is_what_becomes_of_its_task(status, retries, interruptions, is_final, after):
    task = labtasker.Task({"task_id": "t", "retries": retries, "max_retries": 3, "interruptions": interruptions})
    run = types.SimpleNamespace(task=task, lost=None)
    assert labtasker._state_after(run, status, is_final) == after
    assert labtasker._state_after(run, None, False) == "lost"


def test_a_loop_for_a_worker_that_is_there_already_does_not_set_its_retries(home):
    with pytest.raises(labtasker.UsageError, match="worker w has its own"):
        labtasker.command_loop(["true", "%(n)"], worker_id="w", worker_max_retries=2)
