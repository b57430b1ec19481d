"""What is handed back, kept, delivered late and ended: signals, heartbeats, a server that is away. Real processes, real signals.

The soak at the end kills and stops workers, jobs and the server at random; LT_TEST_SOAK is for how many seconds."""
import collections
import errno
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

import faulty
import harness
import labtasker
from harness import wait_until
from test_worker import (
    beat_fast, cancel, children, is_alive, output, start_job, start_script, submit, task, wait_for_end, wait_for_line,
    wait_for_task)

pytestmark = pytest.mark.slow

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
GATED = ("sh", "-c", "echo begins $0; until test -e gate; do sleep 0.05; done; exit $0")


LEAVES_SOON = ("-c", "import sys, labtasker; labtasker.LEAVING_S = 2; sys.exit(labtasker.main())")  # not ten seconds


def start_gated(place, *options, words=("-m", "labtasker")):
    """Return the Popen of a loop whose jobs, once they have begun, end when the file `gate` is there."""
    loop = place.start(sys.executable, *(words + ("loop",) + options + ("--",) + GATED + ("%(n)",)))
    wait_for_line(loop, "begins")
    return loop


def open_gate(place):
    (place.cwd / "gate").write_text("")


def pass_time(seconds):
    """Return after so many seconds, in which what should not happen could."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until, "the time passes", timeout_s=seconds + 60)


def outbox(place):
    """Return the paths of the reports that wait."""
    return sorted((place.cwd / ".labtasker" / "outbox").glob("*.json"))


def port_of(server):
    return int(server.url.rpartition(":")[2])


def beats_of(loop):
    """Return the pid of a loop's heartbeats."""
    def find():
        return [pid for pid in children(loop.pid) if b"heartbeat_main" in pathlib.Path("/proc/%d/cmdline" % pid).read_bytes()]
    return wait_until(find, "the loop has its heartbeats")[0]


# Signals


def test_a_job_that_dies_of_the_signal_before_the_loop_hears_of_it_is_handed_back(both):
    one, = submit(max_retries=1)
    loop, pids = start_job(both, "plain")
    os.killpg(pids[0], signal.SIGTERM)
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop) == 143, output(loop)
    back = task(one)
    assert (back.status, back.retries, back.interruptions) == ("pending", 0, 1), output(loop)
    assert back.attempts[0]["signal"] == "SIGTERM" and back.attempts[0]["status"] == "pending"


def test_a_job_that_is_killed_by_another_failed(home):
    one, = submit(max_retries=1)
    loop, pids = start_job(home, "plain")
    os.killpg(pids[0], signal.SIGTERM)
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).status, task(one).summary) == (
        "failed", {"labtasker_error": "killed by signal 15 (SIGTERM)"})


def test_how_long_it_takes_to_hand_back_and_to_end_what_was_cancelled(both):
    """Printed, not asserted: a second or so at most, most of it for what ignores the signal."""
    for name in ("SIGTERM", "SIGUSR1"):
        one, = submit()
        loop, pids = start_job(both, "polite")
        loop.send_signal(getattr(signal, name))
        wait_until(lambda: not is_alive(pids[0]), "the job is gone")
        began = time.monotonic()
        wait_for_task(one, "pending")
        print("%s, %s: pending %.3f s after the job's end" % (both.kind, name, time.monotonic() - began))
        assert wait_for_end(loop) == 128 + getattr(signal, name)
        labtasker.delete_task(one)
    for mode in ("plain", "deaf"):
        one, = submit()
        loop, pids = start_job(both, mode)
        began = time.monotonic()
        cancel(one)
        wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "the job and its child are gone")
        print("%s, %s: group gone %.3f s after the cancelling" % (both.kind, mode, time.monotonic() - began))
        assert wait_for_end(loop) == 0


def test_a_script_keeps_its_own_use_of_a_user_signal(home):
    submit()
    loop = start_script(home, """
signal.signal(signal.SIGUSR1, lambda *_: print("checkpoint", flush=True))
@labtasker.loop()
def main(n=Required()):
    os.kill(os.getpid(), signal.SIGUSR1)
    print("goes on", flush=True)
main()
""")
    assert wait_for_end(loop) == 0, output(loop)
    assert "checkpoint\ngoes on" in output(loop)


# HeartbeatProcess


def test_a_job_that_holds_the_interpreter_for_three_time_outs_is_not_declared_dead(both):
    beat_fast(both)
    one, = submit(max_retries=1)
    loop = start_script(both, """
import ctypes
@labtasker.loop()
def main(n=Required()):
    print("holds it", flush=True)
    ctypes.PyDLL(None).sleep(10)
main()
""")
    wait_for_line(loop, "holds it")
    other = both.start_cli("loop", "--idle-timeout", "600", "--", "true", "%(n)")  # looks for time-outs all the while
    assert wait_for_end(loop) == 0, output(loop)
    done = task(one)
    assert (done.status, done.retries, done.heartbeat_timeout) == ("success", 0, 3), output(loop)
    other.terminate()
    assert wait_for_end(other) == 143


@pytest.mark.parametrize("how", ["stopped", "restarted"])
def test_a_server_that_was_away_expires_nothing(server_home, how):
    beat_fast(server_home)
    one, = submit(max_retries=1)
    server, loop = server_home.server, start_gated(server_home)
    run_id = task(one).run_id
    if how == "stopped":
        server.process.send_signal(signal.SIGSTOP)
        pass_time(10)
        server.process.send_signal(signal.SIGCONT)
    else:
        server.kill()
        pass_time(10)
        server.start(port_of(server))
    pass_time(5)  # in which time-outs are looked for, and heartbeats come again
    now = task(one)
    assert (now.status, now.run_id, now.retries) == ("running", run_id, 0), output(loop)
    open_gate(server_home)
    assert wait_for_end(loop) == 0, output(loop)
    assert (task(one).status, task(one).retries) == ("success", 0)


def test_a_job_whose_heartbeats_failed_to_come_is_ended(both):
    beat_fast(both)
    one, = submit(max_retries=2)
    loop, pids = start_job(both, "deaf")
    beats = beats_of(loop)
    os.kill(beats, signal.SIGSTOP)
    other = both.start_cli("loop", "--idle-timeout", "600", "--", "sleep", "600", "%(n)")
    wait_until(lambda: task(one).retries == 1, "the run is given up", timeout_s=40)
    os.kill(beats, signal.SIGCONT)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "the job and its child are gone")
    attempts = wait_for_task(one, "running").attempts
    assert [a.get("status") for a in attempts] == ["timeout", None] and "heartbeat" in attempts[0]["reason"]
    assert wait_for_end(loop) == 0, output(loop)
    other.terminate()
    assert wait_for_end(other) == 143


def test_a_job_that_takes_longer_than_it_may_is_ended(both):
    one, = submit(max_retries=1)
    loop = both.start_cli("loop", "--eta-max", "2s", "--", "sh", "-c", "echo pids $$; sleep 600", "%(n)")
    pid = int(wait_for_line(loop, "pids ").split("pids ")[1].split()[0])
    other = both.start_cli("loop", "--idle-timeout", "600", "--", "true", "%(n)")
    assert wait_for_end(loop) == 0, output(loop)
    assert not is_alive(pid)
    done = task(one)
    assert (done.status, done.retries, done.run_end) == ("failed", 1, "timeout") and "task_timeout" in str(done.summary)
    other.terminate()
    assert wait_for_end(other) == 143


# The report of a run with which the next task is fetched


FUNCTION = """
import os, time, labtasker
@labtasker.loop(heartbeat_timeout=1)
def main(n=labtasker.Required()):
    print("begins %d" % n)
    while not os.path.exists("gate-%d" % n):
        time.sleep(0.02)
main()
"""
COMMAND = ("--heartbeat-timeout", "1", "--", "sh", "-c", "echo begins $0; until test -e gate-$0; do sleep 0.02; done", "%(n)")
WAYS = {"function": lambda place: place.start(sys.executable, "-u", place.write("main.py", FUNCTION)),
        "command": lambda place: place.start_cli("loop", *COMMAND),
        "slots": lambda place: place.start_cli("loop", "-j", "2", *COMMAND)}


@pytest.mark.parametrize("way, how, answer", [
    ("function", "SIGINT", "lost"), ("command", "SIGTERM", "late"), ("slots", "SIGTERM", "lost"), ("slots", "SIGKILL", "lost")])
def test_a_signal_before_the_answer_to_a_report_with_a_fetch_loses_no_task_and_counts_the_report_once(
        server_home, way, how, answer):
    ids, taken = submit(4), 3 if way == "slots" else 2  # how many have been fetched by then

    def status(task_id):  # not by the proxy
        return server_home.server.http("GET", "/api/v1/queues/me/tasks/" + task_id)[1]["status"]
    loop = WAYS[way](server_home)
    wait_for_line(loop, "begins %d" % (taken - 2))
    server_home.proxy.hold()
    server_home.write("gate-0", "")
    wait_until(lambda: status(ids[taken - 1]) == "running", "the next task is fetched with the report")
    assert status(ids[0]) == "success"
    loop.send_signal(getattr(signal, how))
    if how == "SIGKILL":
        wait_for_end(loop)
    else:
        wait_until(lambda: outbox(server_home), "the loop keeps the report")
    server_home.proxy.lose() if answer == "lost" else server_home.proxy.let_go()
    assert wait_for_end(loop, timeout_s=60) == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[how], output(loop)
    wait_until(lambda: how != "SIGKILL" or all(status(one) == "pending" for one in ids[1:]), "the runs of the killed time out")
    first, *others = map(task, ids)
    assert (first.status, first.retries, first.interruptions, len(first.attempts)) == ("success", 0, 0, 1)
    assert not outbox(server_home) and [(one.status, one.retries) for one in others] == [
        ("pending", int(how == "SIGKILL" and number < taken)) for number in (1, 2, 3)]
    for number in range(4):
        server_home.write("gate-%d" % number, "")
    server_home.cli("loop", "-q", *COMMAND)
    assert [task(one).status for one in ids] == ["success"] * 4 and len(task(ids[0]).attempts) == 1


# A server that is away


def test_a_result_is_kept_and_the_same_loop_delivers_it(server_home):
    first, second = submit(2, max_retries=1)
    server, loop = server_home.server, start_gated(server_home)
    server.kill()
    open_gate(server_home)
    kept, = wait_until(lambda: outbox(server_home), "the result is kept")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert json.loads(kept.read_text())["task_id"] == first and harness.PASSWORD not in kept.read_text()
    took_s = json.loads(kept.read_text())["took_s"]
    server.start(port_of(server))
    assert wait_for_end(loop) == 0, output(loop)
    assert [(task(i).status, task(i).retries) for i in (first, second)] == [("success", 0), ("failed", 1)]
    assert abs(labtasker.spent_s(task(first)) - took_s) < 0.001, "without the time that the server was away"
    assert not outbox(server_home) and "saved in" in output(loop)


def test_what_is_handed_back_while_a_stopped_server_is_asked_is_not_lost_with_the_loop(server_home):
    one, = submit(max_retries=1)
    server, loop = server_home.server, start_gated(server_home)
    server.process.send_signal(signal.SIGSTOP)
    loop.send_signal(signal.SIGTERM)
    wait_until(lambda: outbox(server_home), "the report is kept", timeout_s=10)
    os.kill(loop.pid, signal.SIGKILL)
    server.process.send_signal(signal.SIGCONT)
    assert server_home.cli("task", "ls", "-s", "pending", "-q").lines == [one]
    assert (task(one).retries, task(one).interruptions) == (0, 1)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_result_that_a_loop_left_is_delivered_by_the_next_command_wherever_the_server_is(server_home, how, monkeypatch):
    first, second = submit(2)
    server, loop = server_home.server, start_gated(server_home, words=LEAVES_SOON)
    server.kill()
    open_gate(server_home)
    wait_for_line(loop, "waiting for it to come back")
    loop.send_signal(getattr(signal, how))
    assert wait_for_end(loop, timeout_s=60) == (143 if how == "SIGTERM" else -9)
    assert "delivers it once the server is back" in output(loop) or how == "SIGKILL"
    refused = server_home.cli("task", "ls", check=False)
    assert refused.returncode == 3 and len(outbox(server_home)) == 1
    server.start()  # on another port, as it would be on another host
    server_home.env.update(server.env)
    monkeypatch.setenv("LABTASKER_URL", server.url)
    labtasker.use_client(None)
    run = server_home.cli("task", "ls", "-s", "success", "-q")
    assert run.lines == [first] and "Delivered" in run.stderr and not outbox(server_home)
    assert (task(first).retries, task(second).status) == (0, "pending")


def test_a_result_is_kept_when_a_signal_comes_while_a_stopped_server_is_asked(server_home):
    one, _ = submit(2, max_retries=1)
    server, loop = server_home.server, start_gated(server_home)
    server.process.send_signal(signal.SIGSTOP)
    open_gate(server_home)
    pass_time(2)  # in which the job ends, and the loop waits for an answer
    loop.send_signal(signal.SIGTERM)
    wait_until(lambda: outbox(server_home), "the result is kept", timeout_s=10)
    os.kill(loop.pid, signal.SIGKILL)
    server.process.send_signal(signal.SIGCONT)
    assert server_home.cli("task", "ls", "-s", "success", "-q").lines == [one]


def test_a_loop_waits_no_longer_for_a_server_than_it_was_told(server_home):
    submit(2)
    loop = start_gated(server_home, "--server-lost", "2s")
    server_home.server.kill()
    open_gate(server_home)
    assert wait_for_end(loop) == 1, output(loop)
    assert len(outbox(server_home)) == 1 and "delivers it once the server is back" in output(loop)


def test_a_task_is_handed_back_while_the_server_is_away_though_it_times_out_meanwhile(server_home):
    beat_fast(server_home)
    one, = submit(max_retries=1)
    server, loop = server_home.server, start_gated(server_home, words=LEAVES_SOON)
    port = port_of(server)
    server.kill()
    loop.send_signal(signal.SIGTERM)
    assert wait_for_end(loop, timeout_s=60) == 143, output(loop)
    server.start(port)
    assert wait_for_task(one, "failed").run_end == "timeout"
    assert server_home.cli("task", "get", one[:8]).stdout
    back = task(one)
    assert (back.status, back.retries, back.interruptions, back.summary) == ("pending", 0, 1, {})
    assert "SIGTERM" in back.reason and back.attempts[-1]["status"] == "pending"


def test_a_kept_result_is_not_counted_where_the_task_was_taken_meanwhile(server_home):
    beat_fast(server_home)
    one, = submit()
    server, loop = server_home.server, start_gated(server_home)
    port = port_of(server)
    server.kill()
    open_gate(server_home)
    wait_until(lambda: outbox(server_home), "the result is kept")
    os.kill(loop.pid, signal.SIGKILL)
    (server_home.cwd / "gate").unlink()
    kept, = outbox(server_home)
    aside = kept.with_suffix(".aside")
    kept.rename(aside)
    server.start(port)
    wait_until(lambda: task(one).retries == 1, "the run is given up")
    other = start_gated(server_home)
    aside.rename(kept)
    run = server_home.cli("task", "count")
    assert "was refused" in run.stderr and not outbox(server_home)
    assert (task(one).status, task(one).retries) == ("running", 1)
    open_gate(server_home)
    assert wait_for_end(other) == 0
    assert (task(one).status, task(one).retries) == ("success", 1)


def test_what_a_job_reports_while_the_server_is_away_waits_in_order(server_home):
    one, = submit(max_retries=1)
    server, loop = server_home.server, start_script(server_home, """
@labtasker.loop()
def main(n=Required()):
    print("begins", flush=True)
    while not os.path.exists("away"):
        time.sleep(0.02)
    for step in range(20):
        labtasker.report_task_status(labtasker.current_task_id(), "running", {"step": step, "at%d" % step: 1})
    labtasker.finish("success", {"acc": 0.5})
    print("finished", flush=True)
main()
""")
    wait_for_line(loop, "begins")
    server.kill()
    (server_home.cwd / "away").write_text("")
    wait_for_line(loop, "finished")
    assert len(outbox(server_home)) <= 3
    server.start(port_of(server))
    assert wait_for_end(loop) == 0, output(loop)
    done = task(one)
    assert (done.status, done.summary["step"], done.summary["acc"], len(done.summary)) == ("success", 19, 0.5, 22)


def test_a_loop_finds_the_server_of_its_folder_where_it_moved(home):
    ids = submit(2)
    labtasker.use_client(None)
    server = harness.Server(home.cwd / ".labtasker", queue=None)
    try:
        loop = start_gated(home)
        server.kill()
        open_gate(home)
        wait_for_line(loop, "waiting for it to come back")
        server.start()
        assert wait_for_end(loop) == 0, output(loop)
        assert [task(i).status for i in ids] == ["success", "pending"] or task(ids[1]).retries
        assert task(ids[0]).retries == 0
    finally:
        labtasker.use_client(None)
        server.stop()


def test_a_loop_without_a_server_goes_on_with_one_that_took_its_store(home):
    one, = submit()
    labtasker.use_client(None)
    loop = start_gated(home)
    with harness.Server(home.cwd / ".labtasker", queue=None):
        open_gate(home)
        assert wait_for_end(loop) == 0, output(loop)
        assert (task(one).status, task(one).retries) == ("success", 0)
    labtasker.use_client(None)


# The soak


class Soak:
    """Loops, their jobs, and a hand that kills and stops any of them, the server too where there is one."""

    JOB = "sleep 0.$1; echo $LABTASKER_TASK_ID $LABTASKER_RUN_ID >> ledger"

    def __init__(self, place, dice):
        self.place, self.dice, self.done = place, dice, collections.Counter()
        self.loops, self.stopped, self.submitted = [], {}, 0
        self.port, self.server_back_at = place.server and port_of(place.server), None
        place.env["LT_SOAK"] = str(place.cwd)  # by which whatever is left running is found
        beat_fast(place)

    def begin(self, workers):
        self.feed(workers * 4)
        for _ in range(workers):
            self.loops.append(self.new_loop())

    def feed(self, count):
        """Have so many more tasks; what fails for the job's own reasons is tried without end."""
        submissions = [{"args": {"n": self.dice.randrange(1, 9)}, "max_retries": 10000} for _ in range(count)]
        labtasker.submit_tasks(submissions)
        self.submitted += count

    def keep_fed(self):
        """Have more tasks where there are few, unless the server can't be asked."""
        if not self.is_server_away() and len(
                labtasker.ls_tasks(status="pending").content) < 2 * len(self.loops):
            self.feed(2 * len(self.loops))

    def is_server_away(self):
        return self.place.server and (self.server_back_at or self.place.server.process.pid in [
            pid for pid, _ in self.stopped.values()])

    def new_loop(self):
        return self.place.start_cli("loop", "--idle-timeout", "600", "--grace", "1s", "--",
                                    "sh", "-c", self.JOB, "job", "%(n)")

    def step(self):
        """Do one bad thing, and what is due of the repairs."""
        for at, (pid, _) in [item for item in self.stopped.items() if item[0] < time.monotonic()]:
            del self.stopped[at]
            self.send(pid, signal.SIGCONT)
        if self.server_back_at and time.monotonic() > self.server_back_at:
            self.server_back_at = None
            self.place.server.start(self.port)
        for place, loop in enumerate(self.loops):
            if loop.poll() is not None:
                self.loops[place] = self.new_loop()
        what = self.dice.choice(sorted(self.DEEDS) + ["end a loop", "kill a job", "kill a loop", "kill heartbeats"] * 3)
        if self.DEEDS[what](self):
            self.done[what] += 1

    def send(self, pid, signum):
        try:
            os.kill(pid, signum)
            return True
        except ProcessLookupError:
            return False

    def stop_for(self, pid, seconds):
        self.stopped[time.monotonic() + seconds] = (pid, seconds)
        return self.send(pid, signal.SIGSTOP)

    def some_loop(self):
        return self.dice.choice(self.loops).pid

    def some_child(self, is_beats):
        """Return the pid of a loop's job, or of its heartbeats, or None."""
        try:
            found = [pid for pid in children(self.some_loop())
                     if (b"heartbeat_main" in pathlib.Path("/proc/%d/cmdline" % pid).read_bytes()) == is_beats]
        except OSError:
            found = []
        return self.dice.choice(found) if found else None

    def kill_job(self):
        pid = self.some_child(False)
        return pid and self.send(pid, signal.SIGKILL)

    def kill_beats(self):
        pid = self.some_child(True)
        return pid and self.send(pid, signal.SIGKILL)

    def end_loop(self):
        return self.send(self.some_loop(), getattr(signal, self.dice.choice(SIGNALS)))

    def kill_server(self):
        if not self.place.server or self.is_server_away():
            return False
        getattr(self.place.server, self.dice.choice(("kill", "stop")))()
        self.server_back_at = time.monotonic() + self.dice.uniform(0, 4)
        return True

    def stop_server(self):
        return self.place.server and not self.is_server_away() and self.stop_for(self.place.server.process.pid, self.dice.uniform(0.5, 4))

    DEEDS = {
        "kill a loop": lambda self: self.send(self.some_loop(), signal.SIGKILL),
        "end a loop": end_loop,
        "stop a loop": lambda self: self.stop_for(self.some_loop(), self.dice.uniform(0.5, 6)),
        "kill a job": kill_job, "kill heartbeats": kill_beats, "kill the server": kill_server,
        "stop the server": stop_server,
    }

    def end(self):
        """Return when all is repaired, every task is done and every loop has left."""
        for pid, _ in self.stopped.values():
            self.send(pid, signal.SIGCONT)
        if self.server_back_at:
            self.place.server.start(self.port)
        self.loops = [self.new_loop() if loop.poll() is not None else loop for loop in self.loops]
        wait_until(lambda: labtasker.ls_tasks(status="success", limit=10 ** 6).content[
            self.submitted - 1:], "every task is done", timeout_s=180)
        for loop in self.loops:
            self.send(loop.pid, signal.SIGTERM)
        numbers = [getattr(signal, name) for name in SIGNALS]
        for loop in self.loops:  # one that has only just been started dies of it without a word
            assert wait_for_end(loop, timeout_s=60) in [128 + n for n in numbers] + [-n for n in numbers], output(loop)[-3000:]

    def left(self):
        """Return what still runs of all that was started, but for the server."""
        mark, found = b"LT_SOAK=" + self.place.env["LT_SOAK"].encode(), []
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0") and is_alive(int(folder.name)):
                    found.append((folder.name, (folder / "cmdline").read_bytes()))
            except OSError:
                pass
        return found


def successes(journal):
    """Return {task id: how often it became a success} as the journal has it, compacted or not."""
    counts = collections.Counter()
    for line in journal.read_text().splitlines()[1:]:
        for change in json.loads(line).get("changes", ()):
            if change[0] == "task" and change[2].get("status") == "success":
                counts[change[1]] += 1
    return counts


@pytest.mark.parametrize("share", [pytest.param(1, id="server"), pytest.param(2, id="embedded")])
def test_whatever_is_killed_or_stopped_every_task_is_done_and_counted_once(request, share):
    place = request.getfixturevalue("server_home" if share == 1 else "home")  # the embedded store has half the time
    soak = Soak(place, faulty.dice("soak"))
    soak.begin(faulty.setting("SOAK_WORKERS") // share)
    until = time.monotonic() + faulty.setting("SOAK") / share
    while time.monotonic() < until:
        soak.step()
        soak.keep_fed()
        pass_time(soak.dice.uniform(0.05, 0.4))
    soak.end()
    wait_until(lambda: not soak.left(), "no process is left", never=None)
    tasks = labtasker.ls_tasks(limit=10 ** 6).content
    counted = successes(place.folder / "journal.jsonl")
    ledger = {tuple(line.split()) for line in (place.cwd / "ledger").read_text().splitlines()}
    print("soak: %s; %d tasks, %d runs, %d retries, %d interruptions" % (
        dict(soak.done), len(tasks), sum(len(t.attempts) for t in tasks), sum(t.retries for t in tasks),
        sum(t.interruptions for t in tasks)))
    assert len(tasks) == soak.submitted and {t.status for t in tasks} == {"success"}
    assert set(counted.values()) == {1} and len(counted) == len(tasks)
    assert {(t.task_id, t.run_id) for t in tasks} <= ledger, "a run that did not end is counted"
    assert not outbox(place)
    for t in tasks:
        assert [a["status"] for a in t.attempts].count("success") == 1 and "end" in t.attempts[-1]


# The outbox: what waits there is delivered in its order, and what is no report is no bug


@pytest.fixture
def running(home):
    """A Run of a task that this process has fetched, with a store without a server."""
    labtasker.submit_task(args={"n": 1})
    worker = labtasker.create_worker()
    found = labtasker.fetch_task(worker_id=worker, required_fields=["n"]).task
    return labtasker.Run(found.task_id, found.run_id, worker, found)


def keep(run, status, **more):
    labtasker.keep_report(run, dict({"status": status, "summary": None, "worker_id": run.worker_id}, **more))


@pytest.mark.parametrize("shifts", [(60, 0), (0, -3600), (1e6, 1e6), (0, 0)])
def test_what_waits_is_delivered_in_the_order_in_which_it_was_kept_whatever_the_clock(running, monkeypatch, shifts):
    real = labtasker.now
    monkeypatch.setattr(labtasker, "now", lambda: labtasker.Instant(real() + shifts[0]))
    job = labtasker.Run(running.task_id, running.run_id, running.worker_id)  # in the job's process
    keep(job, "running", summary={"acc": 0.9})
    monkeypatch.setattr(labtasker, "now", lambda: labtasker.Instant(real() + shifts[1]))
    keep(running, "success")
    monkeypatch.setattr(labtasker, "now", real)
    assert labtasker.deliver_kept() == 2 and not labtasker.outbox_reports()
    got = task(running.task_id)
    assert (got.status, got.summary) == ("success", {"acc": 0.9})


def test_where_a_report_has_to_stay_what_came_later_of_its_run_stays_too(running, monkeypatch):
    job = labtasker.Run(running.task_id, running.run_id, running.worker_id)
    keep(job, "running", summary={"acc": 0.9})
    keep(running, "success")
    send, answers = labtasker.deliver, [500]

    def refuse_once(*given, **named):
        if answers:
            raise labtasker.LabtaskerHTTPStatusError(answers.pop(), "out of order", None)
        return send(*given, **named)
    monkeypatch.setattr(labtasker, "deliver", refuse_once)
    assert labtasker.deliver_kept() == 0 and len(labtasker.outbox_reports()) == 2
    answers.append(500)
    assert labtasker.post(running, {"status": "success", "summary": {"late": 1}, "worker_id": running.worker_id}) is False
    assert labtasker.deliver_kept() == 2
    assert (task(running.task_id).status, task(running.task_id).summary["acc"]) == ("success", 0.9)


REPORT = {"task_id": "t", "run_id": "r", "worker_id": None, "status": "success", "summary": None, "queue": "default", "store": "s"}
ODD_REPORTS = {
    "empty": b"", "no JSON": b"\0\xff", "a list": b"[]", "null": b"null", "a text": b'"report"', "deep": b"[" * 100000,
    "no report": b"{}", "another version's": json.dumps(dict(REPORT, later=1)).encode(),
    "a path for a task": json.dumps(dict(REPORT, task_id="../../queues/me")).encode(),
    "a status of another version": json.dumps(dict(REPORT, status="paused")).encode(),
    "a summary that is a list": json.dumps(dict(REPORT, summary=[1])).encode(),
    "a task that is a number": json.dumps(dict(REPORT, task_id=7)).encode(),
    "a point that is none": json.dumps(dict(REPORT, points=[{"step": "3"}])).encode(),
}


@pytest.mark.parametrize("name", ODD_REPORTS)
def test_what_is_no_report_is_set_aside_named_once_and_holds_up_nothing(running, name, capsys):
    os.makedirs(labtasker.outbox())
    path = pathlib.Path(labtasker.outbox(), "1000000000.000000-x-1.json")
    path.write_bytes(ODD_REPORTS[name])
    keep(running, "success")
    labtasker.deliver_outbox()
    assert task(running.task_id).status == "success" and path.with_suffix(".json.aside").read_bytes() == ODD_REPORTS[name]
    assert "renamed to %s.aside" % path.name in capsys.readouterr().err
    labtasker.deliver_outbox()
    assert capsys.readouterr().err == "" and not labtasker.outbox_reports()


def test_a_file_that_another_process_has_just_taken_or_that_can_not_be_renamed_holds_up_nothing(home, monkeypatch, capsys):
    (home.cwd / "odd.json").write_text("x")

    def refuse(*_):
        raise OSError(errno.EROFS, "the disk is read-only")
    labtasker._set_aside("gone.json", "gone.json is no report")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(os, "rename", refuse)
    labtasker._set_aside("odd.json", "odd.json is no report")
    assert "odd.json is no report; it can't be set aside: the disk is read-only" in capsys.readouterr().err


@pytest.mark.parametrize("error, is_left", [(None, False), (labtasker.LabtaskerHTTPStatusError(404, "no", None), False), (labtasker.LabtaskerHTTPStatusError(401, "no", None), True),
                                            (labtasker.LabtaskerHTTPStatusError(503, "no", None), True)])
def test_the_end_of_a_worker_stays_in_the_outbox_while_the_server_is_away(home, monkeypatch, error, is_left):
    def end(worker_id):
        if error:
            raise error
    monkeypatch.setenv("LABTASKER_URL", "http://127.0.0.1:9")
    os.makedirs(labtasker.outbox())
    path = pathlib.Path(labtasker.outbox(), labtasker._END_FILE + "w")
    path.write_text(json.dumps({"worker_id": "w", "queue": "default", "store": labtasker._store_name(labtasker.load_config())}))
    monkeypatch.setattr(labtasker, "end_worker", end)
    if is_left:
        with pytest.raises(labtasker.LabtaskerError):
            labtasker.deliver_ends()
    else:
        labtasker.deliver_ends()
    assert path.exists() == is_left


@pytest.mark.parametrize("found, status", [("running", "taken"), ("success", "success"), (labtasker.LabtaskerHTTPStatusError(404, "no", None), "deleted"),
                                           (labtasker.LabtaskerHTTPStatusError(401, "no", None), "running"), (labtasker.LabtaskerConnectError("no answer"), "running")])
def test_after_a_refused_heartbeat_the_server_is_asked_what_became_of_the_task(monkeypatch, found, status):
    def get_task(task_id):
        if isinstance(found, Exception):
            raise found
        return labtasker.Task({"task_id": task_id, "status": found})
    monkeypatch.setattr(labtasker, "get_task", get_task)
    assert labtasker.RunBeater({"task_id": "t"}, None).status_after_refusal() == status


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "device"])
def test_what_is_no_plain_file_in_the_outbox_is_set_aside_and_never_waited_for(running, kind, capsys):
    os.makedirs(labtasker.outbox())
    path = pathlib.Path(labtasker.outbox(), "odd.json")
    {"pipe": lambda: os.mkfifo(str(path)), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero"),
     "link to nothing": lambda: path.symlink_to("nowhere")}[kind]()
    path.with_suffix(".json.aside").write_text("of an earlier one")
    labtasker.deliver_outbox()
    assert "odd.json.aside-2" in capsys.readouterr().err and not labtasker.outbox_reports()
    assert path.with_suffix(".json.aside").read_text() == "of an earlier one"


def test_an_odd_file_in_the_outbox_ends_no_command_and_no_loop(home):
    submit()
    (home.folder / "outbox").mkdir()
    (home.folder / "outbox" / "a.json").write_text('{"task_id": "x", "status": "success", "queue": "default", "store": "s", "step": 1}')
    run = home.cli("task", "count")
    assert "a.json.aside" in run.stderr and "bug" not in run.stderr and "a.json" not in home.cli("task", "count").stderr
    os.mkfifo(str(home.folder / "outbox" / "b.json"))
    assert "b.json.aside" in home.cli("loop", "--", "true", "%(n)").stderr


# A folder that is away is a server that is away


@pytest.mark.parametrize("instead", [None, "an empty folder", "another store"])
def test_a_job_lives_and_is_reported_though_the_folder_is_away_when_its_heartbeats_start(home, instead):
    one, = submit(max_retries=1)
    loop, away = start_gated(home), home.cwd / "away"
    home.folder.rename(away)
    if instead:
        home.folder.mkdir()
    if instead == "another store":
        home.cli("task", "submit", "--", "--n=7")
    os.kill(beats_of(loop), signal.SIGKILL)  # those that are started now have never seen the store
    pass_time(4)
    assert loop.poll() is None and "begins" in output(loop)
    left = sorted(path.name for path in home.folder.glob("*")) if instead else home.folder.exists()
    assert left == {None: False, "an empty folder": []}.get(instead, left)
    if instead:
        home.folder.rename(home.cwd / "instead")
    away.rename(home.folder)
    open_gate(home)
    assert wait_for_end(loop, timeout_s=60) == 0, output(loop)
    done = task(one)
    assert (done.status, done.retries, done.interruptions, len(done.attempts)) == ("success", 0, 0, 1)


def test_what_a_job_reports_while_the_folder_is_away_is_delivered_and_raises_nothing(home):
    one, = submit(max_retries=1)
    home.write("job.py", "import labtasker, os, time\nprint('begins', flush=True)\n"
               "while not os.path.exists('gate'): time.sleep(0.05)\n"
               "labtasker.report_task_status(%r, 'running', {'acc': 0.9})\nprint('ends', flush=True)\n" % one)
    loop, away = home.start_cli("loop", "--", sys.executable, "job.py", "%(n)"), home.cwd / "away"
    wait_for_line(loop, "begins")
    home.folder.rename(away)
    open_gate(home)
    wait_until(lambda: "waiting for it to come back" in output(loop), "the job has met that the folder is away")
    assert not home.folder.exists() and "ends" not in output(loop)
    away.rename(home.folder)
    assert wait_for_end(loop, timeout_s=60) == 0, output(loop)
    done = task(one)
    assert (done.status, done.retries, done.summary) == ("success", 0, {"acc": 0.9})


def test_a_loop_whose_folder_is_away_waits_and_goes_on_when_it_is_back(home):
    one, = submit(max_retries=1)
    loop, away = start_gated(home, "--idle-timeout", "60s"), home.cwd / "away"
    home.folder.rename(away)
    open_gate(home)
    wait_until(lambda: "waiting for it to come back" in output(loop), "the loop has met that the folder is away")
    assert not home.folder.exists()
    away.rename(home.folder)
    assert wait_for_task(one, "success").retries == 0
    two, = submit()
    assert wait_for_task(two, "success")
    loop.terminate()
    wait_for_end(loop)


def test_the_job_dies_with_its_loop_and_the_heartbeats(both):
    submit()
    loop, pids = start_job(both, "deaf")
    for pid in [loop.pid, beats_of(loop)]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "no process of the job is left")


# As process 1 of a container


# The child of a shell that ends at once goes to process 1 of its namespace.
LEAVE_ORPHANS = "for i in 1 2 3; do (until test -e gate; do sleep 0.05; done) > /dev/null 2>&1 & done; echo left"


def is_shell(pid):
    try:
        return pathlib.Path("/proc/%d/cmdline" % pid).read_bytes().startswith(b"sh\0")
    except OSError:
        return False


@pytest.mark.parametrize("words, code", [
    (["loop", "--idle-timeout", "1h", "--", "setsid", "sh", "-c", LEAVE_ORPHANS, "%(n)"], 143),
    (["serve", "--host", "127.0.0.1", "--port", "0"], 0)], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_process_1_of_a_container_reaps_what_becomes_an_orphan_and_ends_as_its_command_does(home, words, code):
    if not harness.can_unshare():
        pytest.skip("process 1 of a pid namespace can't be made here (unshare --pid)")
    home.submit("--", "--n=1")  # by a process that ends: a namespace counts as another host, which waits for its store
    outer = home.start("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m", "labtasker", *words)
    wait_until(lambda: "left" in output(outer) or "listening" in output(outer), "it has begun",
               never=lambda _: outer.poll() is not None)
    first, = children(outer.pid)
    if words[0] == "serve":  # a person looks around in its container
        subprocess.check_call(["nsenter", "--pid", "--target", str(first), "sh", "-c", LEAVE_ORPHANS], cwd=str(home.cwd),
                              stdout=subprocess.DEVNULL)

    def orphans():
        return [pid for pid in children(first) if is_shell(pid)]
    mine = wait_until(lambda: len(orphans()) == 3 and orphans(), "three orphans are its own")
    open_gate(home)
    wait_until(lambda: not set(mine) & set(children(first)), "no orphan is left, not even as a zombie")
    os.kill(first, signal.SIGTERM)
    assert wait_for_end(outer) == code, output(outer)
