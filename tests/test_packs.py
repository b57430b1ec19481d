"""Packs: what is left of runs that are over, wherever a loop was killed, and what goes when its tasks go (sections 8 and 14)."""
import contextlib
import io
import os
import pathlib
import signal

import pytest

import faulty
import harness
import labtasker as L
from faulty import setting
from test_faults import in_child

LOG = "/api/v1/queues/me/tasks/%s/log"


@pytest.fixture(autouse=True)
def without_heartbeats(monkeypatch):
    """The runs here are too short for a heartbeat: no process is started for them."""
    monkeypatch.setattr(L.HeartbeatProcess, "add", lambda *_: None)


def submit(count=1, **fields):
    return [L.submit_task(args={"n": number}, **fields).task_id for number in range(count)]


def run_loop(function=None, **options):
    """Run a decorated loop to its end; without a function it prints two lines a run."""
    @L.loop(quiet=True, **options)
    def work(n=L.Required()):
        (function or talk)(n)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        work()
    return said.getvalue()


def talk(n):
    print("first %d" % n)
    print("last %d" % n)


def begun(home, output):
    """Return a Run that a loop has begun, and whose job has written this."""
    task = L.fetch_task(fetch_id=L.new_id(), attempt=L._attempt_facts()).task
    run = L.Run(task.task_id, task.run_id, None, task)
    run.packs = L.Packs(str(home.cwd / ".labtasker"))
    run.begin()
    pathlib.Path(run.path("run.log")).write_text(output)
    return run


def end_run(run):
    run.leave_folder()
    run.packs.close()


def output_of(task_id, run_id=None):
    """Return what `task logs` reads of a run, the last one by default, as text."""
    task = L.get_task(task_id)
    with L.RunOutput(task, L.attempt_of(task, run_id or task.run_id)).open() as file:
        return file.read(10 ** 9).decode()


def logs(home):
    return pathlib.Path(str(home.cwd)) / ".labtasker" / "logs"


def left_of(home):
    """Return the names of what is there of runs, but for packs."""
    return sorted(path.relative_to(logs(home)).as_posix() for path in logs(home).rglob("*") if path.suffix != ".pack")


def test_many_short_runs_leave_few_files_and_all_their_output(home):
    count, ids = setting("SHORT_RUNS"), []
    for begin in range(0, count, 1000):
        ids += L.submit_tasks([{"args": {"n": number}} for number in range(begin, min(count, begin + 1000))])
    ids = [getattr(each, "task_id", each) for each in ids]
    assert len(ids) == count
    run_loop()
    there = list((home.cwd / ".labtasker").rglob("*"))
    assert len(there) < 10 and left_of(home) == []
    for number, task_id in enumerate(ids):
        assert output_of(task_id) == "first %d\nlast %d\n" % (number, number)
        assert L.get_log(task_id, None)["text"] == output_of(task_id)


def test_a_pack_can_be_read_without_the_store(home):
    one, two = submit(2)
    run_loop()
    found = harness.packed(home.cwd / ".labtasker")
    assert set(found) == {one, two} and [run["output"] for run in found[two]] == ["first 1\nlast 1\n"]
    assert found[one][0]["report"]["status"] == "success" and found[one][0]["run"] == L.get_task(one).run_id


def test_loops_at_once_have_packs_of_their_own_and_the_next_one_goes_on_with_one(home):
    submit(3)
    first, second = begun(home, "1"), begun(home, "2")
    seen = {first.packs.path, second.packs.path}
    for run in (first, second):
        assert run.pack({})["log"]["file"] == "logs/" + os.path.basename(run.packs.path)
        end_run(run)
    third = begun(home, "3")
    assert len(seen) == 2 and third.packs.path in seen and third.pack({})
    end_run(third)
    assert len(list(logs(home).glob("*.pack"))) == 2 and left_of(home) == []


def test_files_that_a_job_keeps_in_its_folders_stay_there(home):
    one, two = submit(2)

    def keep(n):
        if n == 0:
            (L.get_labtasker_log_dir() / "plot.png").write_text("kept")
            (L.get_labtasker_log_dir() / "summary.json").write_text('{"acc": 1}')
        else:
            (L.task_dir() / "model").write_text("kept")
    run_loop(keep)
    run_id = L.get_task(one).run_id
    assert left_of(home) == sorted([one, one + "/" + run_id, one + "/%s/plot.png" % run_id, two, two + "/files", two + "/files/model"])
    assert L.get_task(one).summary == {"acc": 1}
    assert L.folders_of(L.get_task(one))["task_dir"] is None
    assert L.folders_of(L.get_task(two))["task_dir"] == str(logs(home) / two / "files")


def test_an_output_that_is_too_long_is_a_file_of_its_own_and_a_full_pack_is_left(home, monkeypatch):
    monkeypatch.setattr(L, "PACK_BYTES", 4000)
    ids = submit(12)
    run_loop(lambda n: print("%02d" % n + "x" * (5000 if n == 1 else 500)))
    own = logs(home) / ("%s.%s.log" % (ids[1], L.get_task(ids[1]).run_id))
    assert own.exists() and L.get_task(ids[1]).attempts[-1]["log"] == {"file": "logs/" + own.name, "offset": 0, "length": 5003}
    packs = list(logs(home).glob("*.pack"))
    assert len(packs) > 2 and all(path.stat().st_size <= 4000 for path in packs) and left_of(home) == [own.name]
    for number, task_id in enumerate(ids):
        assert output_of(task_id).startswith("%02dxxx" % number) and L.get_log(task_id, None)["text"] == output_of(task_id)
    for task_id in ids:
        L.delete_task(task_id)
    new, = submit(1)
    run_loop()
    assert set(harness.packed(home.cwd / ".labtasker")) == {new} and left_of(home) == []


def test_a_pack_stays_while_one_of_its_tasks_is_there(home):
    ids = submit(20)
    run_loop()
    before, = logs(home).glob("*.pack")
    for task_id in ids[:7] + ids[8:]:
        L.delete_task(task_id)
    more = submit(1)
    run_loop()
    assert [before] == list(logs(home).glob("*.pack")) and output_of(ids[7]) == "first 7\nlast 7\n"
    L.delete_task(ids[7])
    L.delete_task(more[0])
    last, = submit(1)
    run_loop()
    assert not before.exists() and output_of(last) == "first 0\nlast 0\n"


def test_packs_of_other_queues_and_those_in_use_stay_whatever_is_deleted(home, monkeypatch):
    one, = submit()
    run_loop()
    other_pack, = logs(home).glob("*.pack")
    L.create_queue("other", "password")
    monkeypatch.setenv("LABTASKER_QUEUE", "other")
    L.use_client(None)
    two, = submit()
    run_loop()
    assert other_pack.exists() and len(list(logs(home).glob("*.pack"))) == 2
    L.delete_task(two)
    fd = os.open(str(next(path for path in logs(home).glob("*.pack") if path != other_pack)), os.O_RDWR)
    L.fcntl.flock(fd, L.fcntl.LOCK_EX)  # a loop has it
    submit()
    run_loop()
    os.close(fd)
    assert len(list(logs(home).glob("*.pack"))) == 3


def test_an_old_stores_folders_are_read(home):
    one, = submit()
    task = L.fetch_task(fetch_id=L.new_id(), attempt=L._attempt_facts()).task
    folder = logs(home) / one / task.run_id
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("of old\n")
    (folder / "status.json").write_text("{}")
    L.report_task_status(one, "success")
    submit()
    run_loop()
    assert output_of(one) == "of old\n" == L.get_log(one, None)["text"] and (folder / "status.json").exists()


def test_a_place_is_believed_only_where_the_pack_says_the_same(home):
    one, two = submit(2)
    run_loop()
    place, three = L.get_task(two).attempts[0]["log"], submit()[0]
    run = L.client().call("POST", "/api/v1/queues/me/tasks/next", {"fetch_id": L.new_id(), "attempt": {"host": "x"}})["task"]
    for change in ({}, {"offset": 10}, {"length": 5}, {"length": 2 ** 62}, {"offset": 2 ** 62}, {"file": "logs/../journal.jsonl"},
                   {"file": "journal.jsonl", "offset": 0}, {"file": "logs/none.pack"}, {"file": "logs/\0.pack"}, {"file": "/etc/passwd"}):
        for task_id, run_id in [(three, run["run_id"])] + [(two, L.get_task(two).run_id)] * bool(change):
            L.client().call("POST", "/api/v1/queues/me/tasks/%s/status" % task_id, {
                "status": L.get_task(task_id).status, "run_id": run_id, "attempt": {"log": dict(place, **change)}})
            assert L.get_task(task_id).attempts[-1]["log"] == dict(place, **change)
            assert L.get_log(task_id, run_id)["text"] is None
            with pytest.raises(FileNotFoundError):
                output_of(task_id)


def test_an_output_of_which_no_place_is_known_is_searched(home, monkeypatch):
    """A server that keeps no attempts, a loop that was killed before its report."""
    root, (one, two) = str(home.cwd / ".labtasker"), submit(2)
    run_loop()
    first, last = (L.get_task(task_id).run_id for task_id in (one, two))

    def found(task_id, run_id=""):
        part = L._open_searched(root, task_id, run_id)
        if part is not None:
            with part:
                return part.read(100)
    assert found(two, last) == found(two) == b"first 1\nlast 1\n" and found(one, first) == b"first 0\nlast 0\n"
    assert found(one, last) is None and found("none") is None
    (logs(home) / L.own_log_name(one, first)).write_bytes(b"a long one")
    assert found(one, first) == b"a long one" and found(one) == b"first 0\nlast 0\n"
    with monkeypatch.context() as gone:  # by another process, at that moment
        gone.setattr(L, "open_plain", lambda path, real=L.open_plain: real(path + ".gone"))
        assert found(one, first) is None
    for path in logs(home).glob("*.pack"):
        path.unlink()
        (logs(home) / path.name).mkdir()
    assert found(two, last) is None


def test_what_is_no_place_is_refused(home):
    submit()
    for wrong in ({}, {"file": "x"}, {"file": 1, "offset": 0, "length": 0}, {"file": "x", "offset": -1, "length": 0},
                  {"file": "x", "offset": 0, "length": True}, {"file": "x", "offset": 0, "length": 0, "more": 1}):
        with pytest.raises(L.LabtaskerHTTPStatusError, match="attempt"):
            L.fetch_task(heartbeat_timeout=60, attempt={"log": wrong})


def test_what_was_cut_off_is_not_read_and_what_follows_is(tmp_path):
    def entry(task_id, output):
        return L.pack_head(task_id, "run", len(output), 2, L.zlib.crc32(output)) + output + b"\n{}\n"
    first, whole = b'{"pack":1,"queue":"q"}\n', entry("b", b"out\n")
    for cut in range(len(whole)):
        path = tmp_path / "one.pack"
        path.write_bytes(first + entry("a", b"") + whole[:cut] + b"\n" + entry("c", b"x" * 99) + entry("d", b"last"))
        with open(str(path), "rb") as file:
            found = [(task_id, file.seek(at) and file.read(length)) for task_id, _, at, length in L.read_packed(file)]
        assert [row for row in found if row[0] != "b"] == [("a", b""), ("c", b"x" * 99), ("d", b"last")], cut


def test_a_full_disk_leaves_the_output_in_its_folder_for_a_later_loop(home, monkeypatch):
    one, two = submit(2)
    write = L.Disk.write

    def full(fd, data):
        if b"first 0" in bytes(data):
            write(fd, bytes(data)[:30])
            raise OSError(28, "No space left on device")
        return write(fd, data)
    monkeypatch.setattr(L.Disk, "write", staticmethod(full))
    assert "stays in" in run_loop()
    assert L.get_task(one).status == "success" and output_of(one) == "first 0\nlast 0\n" == L.get_log(one, None)["text"]
    assert output_of(two) == "first 1\nlast 1\n" and one in left_of(home)
    monkeypatch.setattr(L.Disk, "write", write)
    submit()
    run_loop()
    assert left_of(home) == [] and output_of(one) == "first 0\nlast 0\n" == L.get_log(one, None)["text"]
    assert set(harness.packed(home.cwd / ".labtasker")) > {one, two}


def test_a_report_that_waits_keeps_the_place(home, monkeypatch):
    one, = submit()
    run = begun(home, "half\n")
    facts = run.pack({"status": "success"})
    L.keep_report(run, {"status": "success", "attempt": facts})
    end_run(run)
    assert left_of(home) == [] and L.deliver_kept() == 1
    assert L.get_task(one).status == "success" and output_of(one) == "half\n" == L.get_log(one, None)["text"]


def test_who_follows_an_output_reads_on_in_the_pack(home):
    one, = submit()
    run = begun(home, "first\n")
    output = L.RunOutput(L.get_task(one), L.get_task(one).attempts[0])
    with output.open() as file:
        position = len(file.read(100))
    with open(run.path("run.log"), "a") as file:
        file.write("last\n")
    L.post(run, {"status": "success", "attempt": run.pack({})})
    end_run(run)
    with output.open() as file:
        assert file.seek(position) == 6 and file.read(100) == b"last\n" and file.read(1) == b""
        assert file.seek(0, os.SEEK_END) == file.tell() == 11
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        shown.buffer = io.BytesIO()
        assert L.main(["task", "logs", one, "--tail", "1"]) == 0
    assert shown.buffer.getvalue() == b"last\n"


def test_elsewhere_the_end_of_the_output_comes_with_a_late_report_too(home, monkeypatch):
    folder = home.cwd.parent / "elsewhere"
    folder.mkdir()
    (home.cwd / ".labtasker").mkdir()
    monkeypatch.setenv("LABTASKER_URL", "file:%s" % folder)
    L.use_client(None)
    one, two = submit(2)
    run_loop()
    place = L.get_task(one).attempts[0]["log"]
    assert os.path.isabs(place["file"]) and output_of(one) == "first 0\nlast 0\n" == L.get_log(one, None)["text"]
    packed, size = L.end_of_log(two, L.get_task(two).run_id, L.get_task(two).attempts[0])
    assert size == 15 and L._unpacked_log(packed) == b"first 1\nlast 1\n"


def test_a_run_that_someone_else_has_ended_is_packed_and_its_attempt_says_where(home):
    one, = submit()
    run = begun(home, "half\n")
    L.update_tasks([L.TaskUpdateRequest(task_id=one)], reset_pending=True)
    run_loop()  # it is fetched again, and has ended
    facts = run.pack({"status": "failed"})
    L.send_log_of_lost(run)
    end_run(run)
    first, second = L.get_task(one).attempts
    assert first["log"] == facts["log"] and first["status"] == "reset" and "end" in first
    assert output_of(one, run.run_id) == "half\n" == L.get_log(one, run.run_id)["text"]
    assert L.get_task(one).status == "success" and output_of(one) == "first 0\nlast 0\n" and left_of(home) == []


# Kills


class KillingSteps:
    """Kills its own process at the k-th change of files below a folder: before it, after it, or where half of a write is done."""

    NAMES = ("unlink", "rmdir", "mkdir", "pwrite")

    def __init__(self, k, when):
        self.disk, self.calls = faulty.KillingDisk(k, when), 0
        for name, function in self.disk.functions.items():
            setattr(L.Disk, name, staticmethod(function))
        for name in self.NAMES:
            setattr(os, name, self._function(getattr(os, name)))

    def _function(self, real):
        def call(*args, **named):
            self.disk.calls += 1
            if self.disk.calls == self.disk.k:
                if self.disk.when == "after":
                    real(*args, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)
        return call


def test_no_kill_between_two_steps_loses_a_line_that_was_written(home):
    dice, killed, lines = faulty.dice("kills of packing"), 0, 0
    for number in range(setting("PACK_KILLS")):
        submit(2)
        L.client().transport.close()  # the child opens the store itself
        L.use_client(None)

        def work(say):
            def speak(n):
                run = L._find_run()
                print("line of %s" % run.run_id)
                with open(run.path("run.log")) as file:  # it is written: nothing may lose it now
                    assert run.run_id in file.read()
                say("%s %s" % (run.task_id, run.run_id))
            L.use_client(None)
            L.RUNS.clear()
            KillingSteps(dice.randrange(1, 90), dice.choice(["before", "half", "after"]))
            run_loop(speak)
        said, status = in_child(work)
        dice.random()
        killed += status == signal.SIGKILL
        assert not [line for line in said if line.startswith("child:")], said
        lines += len(said)
        check_lines(said)
        L.update_tasks([L.TaskUpdateRequest(task_id=task.task_id) for task in L.ls_tasks(status="running").content], reset_pending=True)
        submit()
        run_loop(lambda n: None)
        check_lines(said)
        assert left_of(home) == [], (number, said)
        for line in said:
            assert L.get_log(*line.split())["text"] == "line of %s\n" % line.split()[1]
    assert killed > setting("PACK_KILLS") // 3 and lines > killed // 2
    print("kills: %d, lines written: %d, lost: 0" % (killed, lines))


def check_lines(said):
    for task_id, run_id in map(str.split, said):
        assert output_of(task_id, run_id) == "line of %s\n" % run_id


@pytest.mark.slow
def test_the_first_run_in_a_folder_without_settings_is_listed_too(both):
    task_id = L.submit_task(args={"n": 1}).task_id
    both.cli("loop", "-q", "--", "sh", "-c", "cat $LABTASKER_LOG_DIR/../../*.runs > listed", "%(n)")
    assert (both.cwd / "listed").read_text().split() == [task_id, L.ls_tasks().content[0].attempts[0]["run_id"]]


JOB = """#!/bin/sh
echo "line of $LABTASKER_RUN_ID"
while [ -d "$LABTASKER_LOG_DIR" ]; do
    text=$(cat "$LABTASKER_LOG_DIR/run.log" 2> /dev/null)
    [ -z "$text" ] || { echo "$LABTASKER_TASK_ID $LABTASKER_RUN_ID" >> "$ACKNOWLEDGED"; exit 0; }
done
exit 1
"""


@pytest.mark.slow
def test_a_loop_with_four_slots_killed_at_any_time_loses_no_line_that_was_written(both):
    dice, kills = faulty.dice("kills of a loop"), setting("LOOP_KILLS")
    job, acknowledged = both.write("job.sh", JOB), both.cwd / "acknowledged"
    acknowledged.write_text("")
    words = ["loop", "-q", "-j", "4", "--heartbeat-timeout", "1", "--max-consecutive-failures", "0", "--", "sh", str(job), "%(n)"]
    for kill in range(kills):
        L.submit_tasks([{"args": {"n": number}, "max_retries": 1000} for number in range(20)])
        loop, before = both.start_cli(*words, env={"ACKNOWLEDGED": str(acknowledged)}), len(acknowledged.read_text())
        wanted = before + 74 * dice.randrange(1, 15)
        harness.wait_until(lambda: len(acknowledged.read_text()) >= wanted or loop.poll() is not None, "some lines are written", 60)
        loop.kill()
        loop.wait()
    both.cli(*words, env={"ACKNOWLEDGED": str(acknowledged)}, timeout_s=300)
    both.cli("loop", "-q", "--idle-timeout", "4", "--", "true", "%(n)")
    L.submit_task(args={"n": 1})
    both.cli("loop", "-q", "--", "true", "%(n)")
    rows = [line.split() for line in acknowledged.read_text().splitlines()]
    for task_id, run_id in rows:
        assert "line of %s" % run_id in output_of(task_id, run_id), (task_id, run_id)
    assert left_of(both) == [] and len(rows) > kills
    print("kills: %d, lines written: %d, lost: 0" % (kills, len(rows)))
