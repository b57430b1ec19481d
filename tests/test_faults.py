"""The journal under fire: failing disks, power cuts, kills between any two calls, damage, a server killed under load.

How long each runs is said in faulty.py, SETTINGS."""
import errno
import itertools
import json
import math
import os
import pathlib
import re
import resource
import signal
import subprocess
import threading
import time
import uuid

import pytest

import faulty
import harness
import labtasker as L
from faulty import ME, STEPS, Caller, FailingDisk, Killed, KillingDisk, PowerDisk, check_same, contents, play, setting

pytestmark = pytest.mark.slow  # they run on one Python, the others have the quick part of the rest

ERRNOS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, errno.EFBIG]


@pytest.fixture(autouse=True)
def cheap_passwords(monkeypatch):
    """A queue is made in no time."""
    monkeypatch.setattr(L, "PASSWORD_ROUNDS", 1)


@pytest.fixture
def file(tmp_path):
    """Where the journal of a test lies."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "journal.jsonl"


# A failing disk


def refusals():
    """Return [(words, function of (k, error number, times) -> faults)] of the ways in which a disk refuses."""
    return [
        ("write", lambda k, number, times: {"write": (k, times, number, 0)}),
        ("short write", lambda k, number, times: {"write": (k, max(times, 2), number, 9)}),
        ("short write, truncate", lambda k, number, times: {"write": (k, max(times, 2), number, 9),
                                                            "truncate": (1, times, number, 0)}),
        ("sync", lambda k, number, times: {"sync": (k, times, number, 0)}),
        ("sync, open", lambda k, number, times: {"sync": (k, 1, errno.EIO, 0), "open": (1, times, number, 0)}),
        ("sync, second open", lambda k, number, times: {"sync": (k, 1, errno.EIO, 0), "open": (2, times, number, 0)}),
        ("sync, write", lambda k, number, times: {"sync": (k, 1, errno.EIO, 0), "write": (k + 1, times, number, 0)}),
        ("sync, rename", lambda k, number, times: {"sync": (k, 1, errno.EIO, 0), "rename": (1, times, number, 0)}),
        ("sync, sync of the new file", lambda k, number, times: {"sync": (k, min(times, 2), number, 0)}),
        ("sync, sync of the folder", lambda k, number, times: {"sync": (k, min(times, 3), number, 0)}),
    ]


FOR_EVER = 10 ** 9


def failing_history(call, disk, file):
    """Play the history on a failing disk, then on one that works again, and check what every promise says.

    Returns how many requests were refused."""
    made, refused, kept = {}, 0, contents(call.store.state)
    for name, step in STEPS:
        failed_before = disk.failed
        status, answer = step(call, made)
        if status in (503, 507):
            refused += 1
            full = any(words in answer["detail"] for words in ("No space left", "quota", "File too large"))
            assert (status == 507) == full and str(file) in answer["detail"], (name, answer)
            assert disk.failed > failed_before, "%s was refused though nothing failed: %s" % (name, answer)
            if call("GET", "")[0] != 200:  # what can't be cut, or opened, can't be read either
                assert {"truncate", "open"} & set(disk.faults), name
                continue
            check_same(contents(call.store.state), kept, "%s was refused and is there after all" % name)
        kept = contents(call.store.state)
    disk.heal()
    for place in range(2):
        status, answer = call("POST", "tasks", {"args": {"healed": place}})
        assert status == 201, answer
    check_same(contents(call.store.state), faulty.replayed(file), "memory and file")
    faulty.lines_of(file.read_bytes())
    return refused


def start_failing(monkeypatch, file, is_server, faults):
    """Return (Caller, FailingDisk): the store is there, with a task, before the disk begins to fail."""
    faulty.without_sync(monkeypatch)
    call = Caller(file, is_server, timeout_s=20)
    assert call("POST", "tasks", {"args": {"early": 1}})[0] == 201
    disk = FailingDisk(faults)
    faulty.put_in(monkeypatch, disk.functions)
    return call, disk


@pytest.mark.parametrize("is_server", [False, True], ids=["embedded", "server"])
@pytest.mark.parametrize("words, faults", refusals(), ids=[words for words, _ in refusals()])
def test_a_disk_that_fails_at_any_call(monkeypatch, tmp_path, words, faults, is_server):
    tried = refused = 0
    for times in (1, FOR_EVER):
        for k in itertools.count(1):
            failed = 0
            for turn in range(setting("ERRNOS")):
                number = ERRNOS[(k + turn) % len(ERRNOS)]
                if number == errno.EINTR and times == FOR_EVER and "write" in words:
                    number = errno.EIO  # a write that is interrupted is made again, for as long as it is
                folder = tmp_path / ("%d-%d-%d" % (times, k, turn))
                folder.mkdir()
                call, disk = start_failing(monkeypatch, folder / "journal.jsonl", is_server, faults(k, number, times))
                try:
                    refused += failing_history(call, disk, folder / "journal.jsonl")
                except AssertionError as error:
                    raise AssertionError("call %d, %s, %d times: %s" % (k, errno.errorcode[number], times, error)) from error
                finally:
                    disk.heal()
                    call.close()
                failed += disk.failed
                tried += 1
            if k > 3 and not failed:
                break
    print("%s: %d histories, %d requests refused" % (words, tried, refused))
    assert tried > 30 and refused > 30


def test_a_refused_request_leaves_the_order_of_listings_as_it_was(monkeypatch, file):
    call = Caller(file)
    play(call, STEPS[:3])
    assert call("PUT", "tasks", [{"task_id": "list-%d" % i, "priority": 1} for i in (3, 1, 2)], {"reset_pending": "false"})[0] == 200
    before = call("POST", "tasks/search", {})[1]["content"]
    disk = FailingDisk({"write": (1, 1, errno.ENOSPC, 0)})
    faulty.put_in(monkeypatch, disk.functions)
    assert call("POST", "tasks/list-1/status", {"status": "cancelled"})[0] == 507
    assert call("POST", "tasks/search", {})[1]["content"] == before


@pytest.mark.parametrize("name", ["open", "write", "sync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_the_store_is_made(monkeypatch, file, name, number):
    disk = FailingDisk({name: (1, 2, number, 0)})
    faulty.put_in(monkeypatch, disk.functions)
    call = Caller(file, timeout_s=20)
    for _ in range(2):
        status, answer = call("POST", "tasks", {"args": {"a": 1}})
        assert status in ((507,) if number == errno.ENOSPC else (503,)), answer
    assert call("POST", "tasks", {"args": {"a": 1}})[0] == 201
    check_same(contents(call.store.state), faulty.replayed(file), "memory and file")


@pytest.mark.parametrize("is_server", [False, True], ids=["embedded", "server"])
def test_reading_where_a_torn_tail_can_not_be_cut_off_is_no_crash(monkeypatch, file, is_server):
    faults = {"write": (1, FOR_EVER, errno.ENOSPC, 9), "truncate": (1, FOR_EVER, errno.EIO, 0)}
    call, disk = start_failing(monkeypatch, file, is_server, faults)
    assert call("POST", "tasks", {"args": {"a": 1}})[0] == 507
    status, answer = call("POST", "tasks/search", {})
    assert status in (200, 503, 507), answer
    disk.heal()
    status, answer = call("POST", "tasks/search", {})
    assert status == 200 and len(answer["content"]) == 1
    call.close()


def test_another_process_never_takes_a_line_whose_sync_failed_for_one_on_disk(monkeypatch, file):
    call, disk = start_failing(monkeypatch, file, False, {"sync": (1, 1, errno.EIO, 0)})
    size = os.stat(str(file)).st_size
    assert call("POST", "tasks", {"task_id": "refused", "args": {"a": 1}})[0] == 503
    other = Caller(file)
    assert other("POST", "tasks", {"task_id": "later", "args": {"a": 1}})[0] == 201
    assert b"refused" not in file.read_bytes()[size:]
    check_same(contents(other.store.state), faulty.replayed(file), "memory and file")


def test_a_full_disk_for_the_heartbeats_of_embedded_runs_is_told_like_any_other(monkeypatch, file):
    call = Caller(file, timeout_s=20)
    for place in range(2):
        call("POST", "tasks", {"args": {"i": place}})
    task = call("POST", "tasks/next", {"heartbeat_timeout": 60})[1]["task"]

    def full(self, run_id, times):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(L.BeatFiles, "__setitem__", full)
    beat = call("POST", "tasks/%s/heartbeat" % task["task_id"], None, {"run_id": task["run_id"]})
    assert beat[0] in (204, 507)
    status, answer = call("POST", "tasks/next", {"heartbeat_timeout": 60})
    state, journal = faulty.opened(file)
    journal.close()
    running = sum(len(queue.running) for queue in state.queues.values())
    assert (status, running) in ((200, 2), (507, 1)), "answered %d, and %d tasks are running" % (status, running)
    assert call("POST", "tasks/search", {})[0] == 200
    check_same(contents(call.store.state), faulty.replayed(file), "memory and file")


def in_child(work):
    """Return (lines that `work(say)` said, wait status) of a forked process in which it ran."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read_fd)
            work(lambda text: os.write(write_fd, text.encode() + b"\n"))
            os._exit(0)
        except BaseException as error:
            os.write(write_fd, ("child: %r\n" % error).encode())
            os._exit(1)
    os.close(write_fd)
    with os.fdopen(read_fd) as said:
        lines = said.read().splitlines()
    return lines, os.waitpid(pid, 0)[1]


def test_a_real_limit_on_the_size_of_files(file):
    def work(say):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        call = Caller(file)
        call("POST", "tasks", {"args": {"i": -1}})
        for room in (1, 100, 333, 700):
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(str(file)).st_size + room, resource.RLIM_INFINITY))
            statuses = [call("POST", "tasks", {"args": {"i": i, "room": room}})[0] for i in range(4)]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            say(json.dumps([room, statuses, call("POST", "tasks", {"args": {"i": 9}})[0]]))
        check_same(contents(call.store.state), faulty.replayed(file), "memory and file")
    lines, status = in_child(work)
    assert status == 0, lines
    assert [json.loads(line)[2] for line in lines] == [201] * 4
    given = [code for line in lines for code in json.loads(line)[1]]
    assert set(given) <= {201, 503, 507} and given.count(201) >= 2 and given[0] != 201
    state, journal = faulty.opened(file)
    journal.close()
    assert sum(len(queue.tasks) for queue in state.queues.values()) == 1 + 4 + given.count(201)


# Power cuts


def check_image(image, acknowledged, attempted, folder):
    """Open the files as a power cut left them and check what is promised; return how many bytes were set aside."""
    folder.mkdir()
    for path, content in image.items():
        (folder / os.path.basename(path)).write_bytes(content)
    file = folder / "journal.jsonl"
    before = file.read_bytes() if file.exists() else b""
    assert before or not acknowledged, "the journal is gone"
    state, journal = faulty.opened(file)
    journal.close()
    after = file.read_bytes()
    assert after.startswith(acknowledged), "acknowledged lines are gone: %d bytes of %d" % (len(after), len(acknowledged))
    if before:
        assert before.startswith(after)
        assert set(after.splitlines(True)) <= attempted
    asides = [one.read_bytes() for one in folder.glob("*.torn-*") if str(one) not in image]
    new = [one for one in asides if one == before[len(after):]]
    assert bool(journal.notices) == bool(before[len(after):]) == bool(new)
    check_same(contents(state), faulty.replayed(file), "opened and replayed")
    call = Caller(file)
    assert call("POST", "tasks", {"args": {"after": 1}})[0] == 201
    check_same(contents(call.store.state), faulty.replayed(file), "memory and file")
    call.close()
    return len(before) - len(after)


def attempted_lines(disk):
    """Return the set of the lines that were ever written, whole."""
    written = [event[3] for event in disk.events if event[0] == "write"]
    return set(b"".join(written).splitlines(True)).union(*(data.splitlines(True) for data in written))


def cut_everywhere(disk, file, tmp_path, monkeypatch, choices):
    """Check a cut after each event, with each of `choices(count)`; return how many were tried."""
    faulty.put_in(monkeypatch, faulty.REAL)
    faulty.without_sync(monkeypatch)
    attempted, tried, torn = attempted_lines(disk), 0, 0
    for count in range(1, len(disk.events) + 1):
        seen = set()
        for choose in choices(count):
            image, acknowledged = disk.image(count, choose)
            key = hash(tuple(sorted(image.items())))
            if key in seen:
                continue
            seen.add(key)
            tried += 1
            try:
                torn += check_image(image, acknowledged, attempted, tmp_path / ("cut-%d" % tried)) > 0
            except (AssertionError, L.LabtaskerError) as error:
                raise AssertionError("cut after event %d, %r; files %r: %s" % (
                    count, disk.events[count - 1][:3], {os.path.basename(k): len(v) for k, v in image.items()}, error)) from error
    print("%d power cuts, %d with a torn tail" % (tried, torn))
    assert torn, "no cut tore anything: nothing was tested"
    return tried


def powered(monkeypatch, file, **options):
    disk = PowerDisk(file.parent, **options)
    faulty.put_in(monkeypatch, disk.functions)
    return disk


def played_until(disk, call, file, steps):
    """Play the steps, noting what was acknowledged, until they end or the process is Killed."""
    made = {}
    try:
        for _, step in steps:
            if step(call, made)[0] < 400:
                disk.acknowledge(file)
    except Killed:
        call.store.file.file_lock.close()
    return made


def test_a_power_cut_anywhere_in_a_short_history_every_way_it_can_go(monkeypatch, file, tmp_path):
    disk = powered(monkeypatch, file)
    played_until(disk, Caller(file), file, STEPS[:4])
    assert cut_everywhere(disk, file, tmp_path, monkeypatch, lambda count: faulty.every_choice(512)) > 50


def test_a_power_cut_anywhere_in_a_long_history(monkeypatch, file, tmp_path):
    disk, dice = powered(monkeypatch, file), faulty.dice("power cuts")
    played_until(disk, Caller(file), file, STEPS)
    ways = max(2, setting("CUTS") // len(disk.events))
    cut_everywhere(disk, file, tmp_path, monkeypatch, lambda count: [dice.randrange] * ways)


def test_a_power_cut_while_threads_share_syncs(monkeypatch, file, tmp_path):
    disk, dice = powered(monkeypatch, file), faulty.dice("power cuts under threads")
    call, turn = Caller(file, is_server=True), threading.Lock()

    def work(who):
        for i in range(6):
            assert call("POST", "tasks", {"task_id": "%d-%d" % (who, i), "args": {"text": "x" * dice.randrange(900)}})[0] == 201
            with turn, call.store.journal.writer.io:
                disk.acknowledge(file)
    threads = [threading.Thread(target=work, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call.close()
    ways = max(2, setting("CUTS") // len(disk.events))
    cut_everywhere(disk, file, tmp_path, monkeypatch, lambda count: [dice.randrange] * ways)


@pytest.mark.parametrize("is_server", [False, True], ids=["embedded", "server"])
def test_a_power_cut_after_a_kill(monkeypatch, file, tmp_path, is_server):
    """A line that a killed process wrote and never synced is read by the next one; it may still be lost."""
    dice = faulty.dice("power cuts after a kill")
    for killed_at in (4, 6, 8):
        store = file.parent.parent / ("killed-%d" % killed_at) / "journal.jsonl"
        store.parent.mkdir()
        disk = powered(monkeypatch, store, killed_at=killed_at)
        played_until(disk, Caller(store), store, STEPS)
        call = Caller(store, is_server)
        played_until(disk, call, store, STEPS[-3:])
        call.close()
        ways = max(3, setting("CUTS") // len(disk.events))
        (tmp_path / str(killed_at)).mkdir()
        cut_everywhere(disk, store, tmp_path / str(killed_at), monkeypatch, lambda count: [dice.randrange] * ways)


def test_a_power_cut_during_recovery_from_a_power_cut(monkeypatch, file, tmp_path):
    disk, dice, tried = powered(monkeypatch, file), faulty.dice("power cuts during recovery"), 0
    played_until(disk, Caller(file), file, STEPS[:8])
    attempted = attempted_lines(disk)
    for number in range(max(20, setting("CUTS") // 10)):
        faulty.put_in(monkeypatch, faulty.REAL)
        image, acknowledged = disk.image(dice.randrange(len(disk.events)), dice.randrange)
        folder = tmp_path / ("again-%d" % number)
        folder.mkdir()
        second = powered(monkeypatch, folder / "journal.jsonl")
        for inode, (path, content) in enumerate(sorted(image.items()), 1):
            second_path = str(folder / os.path.basename(path))
            pathlib.Path(second_path).write_bytes(content)
            real = os.stat(second_path).st_ino
            second.events += [("create", second_path, real), ("write", real, 0, content), ("sync", real), ("sync", None)]
        second.events.append(("acknowledged", acknowledged))
        first = len(second.events)
        played_until(second, Caller(folder / "journal.jsonl"), folder / "journal.jsonl", STEPS[-2:])
        faulty.put_in(monkeypatch, faulty.REAL)
        faulty.without_sync(monkeypatch)
        every = attempted | attempted_lines(second)
        for count in range(first, len(second.events) + 1):
            again, acknowledged_then = second.image(count, dice.randrange)
            tried += 1
            check_image(again, acknowledged_then, every, folder / str(count))
    assert tried > 100


FAILED_SYNCS = [[("sync", 5)], [("sync", 5), ("rename", 2)], [("sync", 7)], [("sync", 5), ("sync", 6)], [("sync", 5), ("sync", 7)]]


@pytest.mark.parametrize("who", ["one process", "two processes", "server"])
@pytest.mark.parametrize("fails", FAILED_SYNCS, ids=str)
def test_a_power_cut_around_a_failed_sync(monkeypatch, file, tmp_path, fails, who):
    """After a failed sync the file is written anew: cut anywhere there. What it did not sync no later sync does."""
    disk, dice = powered(monkeypatch, file, fails=fails), faulty.dice("power cuts around a failed sync")
    calls = [Caller(file, who == "server") for _ in range(2 if who == "two processes" else 1)]
    made, statuses = {}, []
    for place, (_, step) in enumerate(STEPS[:10]):
        statuses.append(step(calls[place % len(calls)], made)[0])
        if statuses[-1] < 400:
            disk.acknowledge(file)
    assert 503 in statuses and min(statuses[statuses.index(503) + 1:]) == 200, statuses
    ways = max(3, setting("CUTS") // len(disk.events))
    cut_everywhere(disk, file, tmp_path, monkeypatch, lambda count: [dice.randrange] * ways)


# Processes without a server, killed between any two calls


def killed_child(file, k, when):
    """Return (name of each step done, whether it was killed) of a process killed at its k-th call of the disk."""
    def work(say):
        for name, function in KillingDisk(k, when).functions.items():
            setattr(L.Disk, name, staticmethod(function))
        call, made = Caller(file), {}
        for place, (name, step) in enumerate(STEPS):
            status, answer = step(call, made)
            say(json.dumps([place, status, os.stat(str(file)).st_size, made]))
    lines, status = in_child(work)
    assert status in (0, signal.SIGKILL), lines
    return [json.loads(line) for line in lines], status == signal.SIGKILL


def check_after_kill(file, done):
    """Go on in another process where the killed one was, check that nothing is lost or doubled."""
    size = done[-1][2] if done else 0
    acknowledged = file.read_bytes()[:size] if size else b""
    call, made = Caller(file), done[-1][3] if done else {}
    place = len(done)
    name, step = STEPS[place]
    status, answer = step(call, made)
    assert status < 400 or name.startswith("again"), (name, status, answer)
    assert file.read_bytes().startswith(acknowledged)
    assert all(status < 400 for _, status, _, _ in done), done
    found = {task["task_id"]: task for task in call("POST", "tasks/search", {"limit": 1000})[1]["content"]}
    expected = {"first"} | {"list-%d" % i for i in range(5)} if place >= 2 else {"first"}
    expected -= {"list-4"} if place >= 11 else set()
    expected |= {"last"} if place >= 20 else set()
    assert set(found) == expected, (name, sorted(found))
    assert sum(task["interruptions"] for task in found.values()) == (1 if place >= 8 else 0)
    assert sum(task["retries"] for task in found.values()) == (1 if 4 <= place < 10 else 0)
    runs = [task for task in found.values() if task["status"] == "running"]
    assert len(runs) <= 1
    call("POST", "tasks", {"args": {"goes": "on"}})
    check_same(contents(call.store.state), faulty.replayed(file), "memory and file")
    call.close()


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_process_killed_at_any_call_of_the_disk_leaves_a_store_that_goes_on(tmp_path, when):
    killed = 0
    for k in itertools.count(1):
        file = tmp_path / str(k) / "journal.jsonl"
        file.parent.mkdir()
        done, was_killed = killed_child(file, k, when)
        if not was_killed and len(done) == len(STEPS):
            break
        killed += 1
        try:
            check_after_kill(file, done)
        except (AssertionError, L.LabtaskerError) as error:
            raise AssertionError("killed %s call %d, after %d steps: %s" % (when, k, len(done), error)) from error
    print("killed %s a call: %d processes" % (when, killed))
    assert killed > 40


def test_several_processes_killed_one_after_the_other_on_one_store(file):
    dice, done = faulty.dice("kills on one store"), 0
    for number in range(setting("KILLS")):
        def work(say, number=number):
            for name, function in KillingDisk(dice.randrange(1, 60), dice.choice(["before", "half", "after"])).functions.items():
                setattr(L.Disk, name, staticmethod(function))
            call = Caller(file)
            for i in range(30):
                task_id = "%d-%d" % (number, i)
                assert call("POST", "tasks", {"task_id": task_id, "args": {"i": i}})[0] == 201
                say(task_id)
        dice.random()
        said, _ = in_child(work)
        done += len(said)
        call = Caller(file)
        for task_id in said:
            assert call("GET", "tasks/" + task_id)[0] == 200, "lost %s" % task_id
        call.close()
    assert done > setting("KILLS")
    print("kills: %d, submissions acknowledged: %d, lost: 0" % (setting("KILLS"), done))


def test_a_request_that_is_refused_leaves_nothing_behind_that_hides_the_work_of_others(file):
    """The first request of a process makes the default queue and is then refused: others come in between."""
    one, other = Caller(file), Caller(file)
    assert one("POST", "tasks/none/status", {"status": "success"})[0] == 404
    assert other("POST", "tasks", {"task_id": "mine", "args": {"a": 1}})[0] == 201
    assert one("GET", "tasks/mine")[0] == 200
    check_same(contents(one.store.state), faulty.replayed(file), "memory and file")


# Compaction


@pytest.fixture
def in_this_process(monkeypatch):
    """What a server has another process do is done here, where the disk can be made to fail."""
    monkeypatch.setattr(L, "in_other_process", lambda function, *words: json.dumps(getattr(L, function)(*words)))


def compact(call):
    """Compact the store, as whoever has it does."""
    call.store.file.compact() if call.store.is_server else L.compact(call.store.path)


@pytest.mark.parametrize("is_server", [False, True], ids=["embedded", "server"])
def test_a_power_cut_anywhere_in_a_compaction(monkeypatch, file, tmp_path, in_this_process, is_server):
    disk, dice = powered(monkeypatch, file), faulty.dice("power cuts in a compaction")
    call, made, held = Caller(file, is_server), {}, []

    def go(steps):
        for _, step in steps:
            assert step(call, made)[0] < 400
            held.append(contents(call.store.state))
            disk.events.append(("acknowledged", len(held)))
    go(STEPS[:9])
    first = len(disk.events)
    compact(call)
    go(STEPS[9:12])
    compact(call)
    go(STEPS[-1:])
    faulty.put_in(monkeypatch, faulty.REAL)
    faulty.without_sync(monkeypatch)
    ways, tried = max(4, setting("CUTS") // (len(disk.events) - first)), 0
    for count in range(first, len(disk.events) + 1):
        for _ in range(ways):
            image, acknowledged = disk.image(count, dice.randrange)
            tried += 1
            folder = tmp_path / ("cut-%d" % tried)
            folder.mkdir()
            for path, content in image.items():
                (folder / os.path.basename(path)).write_bytes(content)
            state, journal = faulty.opened(folder / "journal.jsonl")
            journal.close()
            assert contents(state) in held[acknowledged - 1:acknowledged + 1], "cut after event %d, %r" % (
                count, disk.events[count - 1][:3])
    print("%d power cuts during compaction" % tried)


@pytest.mark.parametrize("is_server", [False, True], ids=["embedded", "server"])
@pytest.mark.parametrize("name", ["open", "write", "sync", "rename"])
def test_a_disk_that_fails_at_any_call_of_a_compaction(monkeypatch, tmp_path, in_this_process, name, is_server):
    failed = 0
    for k in itertools.count(1):
        file = tmp_path / str(k) / "journal.jsonl"
        file.parent.mkdir()
        faulty.without_sync(monkeypatch)
        call = Caller(file, is_server, timeout_s=20)
        play(call, STEPS[:9])
        before = contents(call.store.state)
        disk = FailingDisk({name: (k, 1, ERRNOS[k % 2], 0)})
        faulty.put_in(monkeypatch, disk.functions)
        try:
            compact(call)
        except (L.LabtaskerError, OSError) as error:
            assert disk.failed, error
        disk.heal()
        failed += disk.failed
        check_same(contents(call.store.state), before, "call %d of %s, after the compaction" % (k, name))
        play(call, STEPS[-1:])
        compact(call)
        play(call, [("submit", faulty.submission("more"))])
        assert call("GET", "tasks/last")[0] == 200
        call.close()
        check_same(contents(call.store.state), faulty.replayed(file), "call %d of %s, memory and file" % (k, name))
        if not disk.failed:
            break
    assert failed > 1


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_process_killed_at_any_call_of_a_compaction(tmp_path, when):
    killed = 0
    for k in itertools.count(1):
        file = tmp_path / str(k) / "journal.jsonl"
        file.parent.mkdir()

        def work(say):
            call = Caller(file)
            play(call, STEPS[:9])
            say(json.dumps(contents(call.store.state)))
            for name, function in KillingDisk(k, when).functions.items():
                setattr(L.Disk, name, staticmethod(function))
            L.compact(str(file))
        lines, status = in_child(work)
        assert status in (0, signal.SIGKILL), lines
        call = Caller(file)
        assert call("GET", "")[0] == 200
        check_same(contents(call.store.state), json.loads(lines[0]), "killed %s call %d" % (when, k))
        L.compact(str(file))
        play(call, STEPS[-1:])
        check_same(contents(call.store.state), faulty.replayed(file), "killed %s call %d, memory and file" % (when, k))
        call.close()
        if not status:
            break
        killed += 1
    assert killed > 5


# Damage


def journal_bytes(folder, clean, rounds=1):
    """Return the bytes of a journal with every kind of line, closed cleanly or not."""
    folder.mkdir()
    call = Caller(folder / "journal.jsonl", is_server=clean)
    play(call)
    for number in range(1, rounds):
        play(call, [("submit", faulty.submission("round-%d-%d" % (number, i), metadata={"i": i})) for i in range(number * 4)])
    call.close()
    return (folder / "journal.jsonl").read_bytes()


class Damage:
    """Opens a journal with other bytes than it had, and judges what the opening does with them."""

    def __init__(self, folder, content):
        folder.mkdir()
        self.file, self.content, self.counts = folder / "journal.jsonl", content, {"refused": 0, "set aside": 0}
        self.lines = content.splitlines(True)
        self.ends = set(itertools.accumulate(len(line) for line in self.lines))
        self.is_clean = bool(L.unseal(self.lines[-1]).get("end"))

    def try_(self, damaged, what):
        """Open a journal of the bytes `damaged`; AssertionError unless the damage is found and told."""
        if damaged == self.content:
            return
        if self.file.exists():
            self.file.unlink()  # much cheaper than to cut it
        self.file.write_bytes(damaged)
        try:
            _, journal = faulty.opened(self.file)
        except L.StoreDamaged as error:
            assert re.search(r"journal\.jsonl(: byte \d+: | was written by a newer)", str(error)), (what, error)
            assert self.file.read_bytes() == damaged, "%s: refused, and yet changed" % (what,)
            assert not list(self.file.parent.glob("*.torn-*"))
            self.counts["refused"] += 1
            return
        journal.close()
        self.check_set_aside(damaged, journal, what)

    def check_set_aside(self, damaged, journal, what):
        left = self.file.read_bytes()
        asides = list(self.file.parent.glob("*.torn-*"))
        assert journal.notices and len(asides) == 1, "%s: opened as if nothing were wrong" % (what,)
        assert asides[0].read_bytes() == damaged[len(left):] and damaged.startswith(left)
        assert self.content.startswith(left) and (len(left) in self.ends), "%s: a wrong state" % (what,)
        gone = self.content[len(left):].splitlines(True)
        there = set(damaged[len(left):].splitlines(True))
        later = [line for line in gone[1:] if line in there]
        assert not later, "%s: line %d was acknowledged and set aside" % (what, len(self.lines) - len(gone))
        self.counts["set aside"] += 1
        asides[0].unlink()


@pytest.fixture(params=[True, False], ids=["closed", "not closed"])
def damage(request, tmp_path, monkeypatch):
    """A Damage of a journal with every kind of line; at its end it prints what was found."""
    faulty.without_sync(monkeypatch)
    made = Damage(tmp_path / "damaged", journal_bytes(tmp_path / "whole", request.param, 3))
    yield made
    print(made.counts)
    assert sum(made.counts.values()) > 10


def flipped(content, bit):
    return content[:bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1:]


def test_every_bit_at_the_end(damage):
    size = len(damage.content) * 8
    assert len(damage.content) > setting("LAST_BYTES") or setting("LAST_BYTES") == 4096
    for bit in range(max(0, size - 8 * setting("LAST_BYTES")), size):
        damage.try_(flipped(damage.content, bit), "bit %d" % bit)


def test_random_bits(damage):
    dice = faulty.dice("random bits")
    for _ in range(setting("BITS")):
        bit = dice.randrange(len(damage.content) * 8)
        damage.try_(flipped(damage.content, bit), "bit %d" % bit)
    assert damage.counts["refused"] > setting("BITS") // 2


@pytest.mark.parametrize("size", [512, 4096])
def test_blocks_zeroed_doubled_swapped_and_gone(damage, size):
    content = damage.content
    blocks = [content[at:at + size] for at in range(0, len(content), size)]
    for at, block in enumerate(blocks):
        def put(*new, at=at):
            return b"".join(blocks[:at] + list(new) + blocks[at + 1:])
        damage.try_(put(bytes(len(block))), "block %d zeroed" % at)
        damage.try_(put(block, block), "block %d doubled" % at)
        damage.try_(put(), "block %d gone" % at) if at < len(blocks) - 1 else None
        for other in range(at + 1, len(blocks)):
            swapped = list(blocks)
            swapped[at], swapped[other] = blocks[other], block
            damage.try_(b"".join(swapped), "blocks %d and %d swapped" % (at, other))


def test_lines_doubled_swapped_and_gone(damage):
    lines = damage.lines
    for at, line in enumerate(lines):
        damage.try_(b"".join(lines[:at + 1] + lines[at:]), "line %d doubled" % at)
        damage.try_(b"".join(lines[:at] + lines[at + 1:]), "line %d gone" % at) if at < len(lines) - 1 else None
        for other in range(at + 1, len(lines)):
            swapped = list(lines)
            swapped[at], swapped[other] = lines[other], line
            damage.try_(b"".join(swapped), "lines %d and %d swapped" % (at, other))


GARBAGE = [b"\0", b"\0" * 4096, b"garbage", b"garbage\n", b"\n", b"\n\n", b"{}\n", b"{\"n\":1}\n", b"\r\n", b"\xff" * 100,
           b"\xef\xbb\xbf", b"null\n", b"[" * 100000 + b"\n", b"," + b'"crc":"00000000"}\n', L.seal(b'{"n":"x"'),
           L.seal(b'{"n":null'), L.seal(b'{"n":true'), L.seal(b"[1"), L.seal(b'{"fold":1')]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:20]))
def test_appended_garbage(damage, garbage):
    for at in range(11):
        damage.try_(damage.content + b"\0" * at + garbage, "%d NULs and %r" % (at, garbage[:30]))


def test_garbage_before_and_between_and_other_line_ends(damage):
    content, lines = damage.content, damage.lines
    damage.try_(b"\xef\xbb\xbf" + content, "a byte order mark")
    damage.try_(content.replace(b"\n", b"\r\n"), "CRLF")
    damage.try_(content.replace(b"\n", b"\r"), "CR")
    damage.try_(content.decode().encode("utf-16"), "UTF-16")
    for garbage in GARBAGE:
        damage.try_(garbage + content, "before all: %r" % garbage[:20])
        for at in range(1, len(lines), 7):
            damage.try_(b"".join(lines[:at] + [garbage] + lines[at:]), "before line %d: %r" % (at, garbage[:20]))


def test_a_store_that_was_closed_loses_nothing_to_damage_in_a_single_place(tmp_path, monkeypatch):
    faulty.without_sync(monkeypatch)
    content = journal_bytes(tmp_path / "whole", True)
    file = tmp_path / "journal.jsonl"
    last = content.rindex(b"\n", 0, -1) + 1
    for at in range(content.rindex(b"\n", 0, last - 1) + 1, len(content)):
        file.write_bytes(flipped(content, at * 8 + 1))
        try:
            faulty.opened(file)[1].close()
        except L.StoreDamaged:
            assert at < last
            continue
        assert at >= last and file.read_bytes() == content[:last]


@pytest.mark.parametrize("lines", range(3))
@pytest.mark.parametrize("header", ["newer", "damaged"])
def test_a_file_that_is_refused_is_refused_again_by_the_same_process_and_stays_as_it_is(file, lines, header):
    play(Caller(file), STEPS[:1])
    whole = file.read_bytes().splitlines(True)
    first = L.unseal(whole[0])
    first["format"] = L.FORMAT + (header == "newer")
    del first["crc"]
    first = L.seal(json.dumps(first)[:-1].encode())
    content = (first if header == "newer" else b"x" + first[1:]) + b"".join(whole[1:1 + lines])
    file.write_bytes(content)
    call = Caller(file)
    for _ in range(3):
        for request in (("POST", "tasks", {"args": {"a": 1}}), ("GET", "")):
            status, answer = call(*request)
            assert status == 503 and str(file) in answer["detail"]
            assert file.read_bytes() == content
    assert not list(file.parent.glob("*.torn-*"))


def test_a_process_that_is_refused_does_not_keep_others_out(file, monkeypatch):
    monkeypatch.setattr(L.StoreFile, "LOCK_TIMEOUT_S", 0.2)
    play(Caller(file), STEPS[:6])
    whole = file.read_bytes()
    call = Caller(file)
    file.write_bytes(flipped(whole, whole.index(b"\n") * 8 + 200))
    assert call("GET", "")[0] == 503
    file.write_bytes(whole)
    assert Caller(file)("GET", "")[0] == 200


# A server that is killed under load


class Lost(Exception):
    """The answer to a request was lost, and the checker is told to stop."""


class Line:
    """A connection of one client of the checker; repeats a request until it has an answer, as any client of ours may."""

    def __init__(self, checker):
        self.checker, self.connection, self.key = checker, None, None

    def ask(self, method, path, body=None):
        """Return (status, answer) of a request; Lost where there is none and the checker has ended."""
        import http.client
        while not self.checker.over.is_set():
            try:
                return self.once(method, ME + "/" + path, body)
            except (OSError, http.client.HTTPException, ValueError):
                self.hang_up()
                self.checker.repeated += 1
                self.checker.up.wait(1)
        raise Lost()

    def hang_up(self):
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    __del__ = hang_up

    def once(self, method, path, body):
        import base64
        import http.client
        if self.connection is None:
            self.checker.up.wait(1)
            self.connection = http.client.HTTPConnection("127.0.0.1", self.checker.port, timeout=20)
            self.key = json.loads((self.checker.folder / "server.json").read_text())["key"]
        packed = base64.b64encode(("%s:%s" % (harness.QUEUE, self.key)).encode()).decode()
        headers = {"Authorization": "Basic " + packed, "Labtasker-Extensions": "1", "Content-Type": "application/json"}
        self.connection.request(method, path, json.dumps(body or {}), headers)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status in (401, 503, 507):  # the key of the server before, or one that is just ending
            raise ValueError("status %d" % answer.status)
        self.checker.note_answer()
        return answer.status, json.loads(content.decode()) if content else None


class Checker:
    """Submitters and workers against a server that is killed and started again, and what they know for certain.

    `submitted` has {task id: place} of acknowledged submissions, `runs` {run id: Run} of answered fetches."""

    def __init__(self, folder, dice):
        self.server = harness.Server(folder, args=["--log-level", "error"])
        self.folder, self.port = self.server.folder, int(self.server.url.rpartition(":")[2])
        self.dice, self.lock = dice, threading.Lock()
        self.over, self.up, self.submitting = threading.Event(), threading.Event(), True
        self.tried, self.submitted, self.runs, self.reports, self.problems = set(), {}, {}, {}, []
        self.answers = self.kill_at = self.repeated = self.kills = 0
        self.kill_now = threading.Event()
        self.up.set()
        self.threads = [threading.Thread(target=self.guarded, args=(work, number), daemon=True)
                        for work in (self.submit, self.work) for number in range(8)]

    def note_answer(self):
        with self.lock:
            self.answers += 1
            if self.answers >= self.kill_at:
                self.kill_now.set()

    def guarded(self, work, number):
        try:
            work(Line(self), number)
        except Lost:
            pass
        except Exception as error:
            self.problems.append("client %d: %r" % (number, error))

    def submit(self, line, number):
        """The life of a submitter: one task after the other, now and then a list; many wait for the one before them."""
        import random
        dice, place, before = random.Random("%s %d" % (self.dice, number)), 0, None
        while self.submitting and not self.over.is_set():
            ids = [str(uuid.UUID(int=dice.getrandbits(128), version=4)) for _ in range(dice.choice((1, 1, 1, 3)))]
            tasks = [{"task_id": one, "args": {"who": number, "place": place + i}, "max_retries": 100000}
                     for i, one in enumerate(ids)]
            for task, other in zip(tasks, [before] + ids):
                if other and dice.random() < 0.5:
                    task["after"] = [other]
            before = ids[-1]
            place += len(ids)
            with self.lock:
                self.tried.update(ids)
            status, answer = line.ask("POST", "tasks", tasks[0] if len(tasks) == 1 else tasks)
            assert status == 201 and answer in ({"task_id": ids[0]}, {"task_ids": ids}), (status, answer)
            with self.lock:
                self.submitted.update((one, (number, place)) for one in ids)

    def work(self, line, number):
        """The life of a worker: fetch, then report, hand back, or forget the run."""
        import random
        dice, report = random.Random("%s worker %d" % (self.dice, number)), None  # of the run before, to come with the fetch
        while not self.over.is_set():
            forgets = dice.random() < 0.05
            asked_at = time.monotonic()
            fetch = {"fetch_id": str(uuid.UUID(int=dice.getrandbits(128), version=4)),
                     "heartbeat_timeout": 0.5 if forgets else 600, "wait_s": 0.2}
            if report:
                fetch["report"] = report
            status, answer = line.ask("POST", "tasks/next", fetch)
            assert status == 200, (status, answer)
            if report:
                self.note_report(report, status, answer)
            report = None
            if not answer["found"]:
                continue
            task, end = answer["task"], dice.choices(("success", "failed", "pending"), (6, 1, 1))[0]
            run = {"task": task["task_id"], "asked_at": asked_at, "had_at": time.monotonic(), "forgets": forgets, "end": None}
            with self.lock:
                self.runs.setdefault(task["run_id"], []).append(run)
            if forgets:
                continue
            run["end"], run["told_at"] = end, time.monotonic()
            report = {"status": end, "run_id": task["run_id"], "summary": {"run": task["run_id"]}, "task_id": task["task_id"]}
            if dice.random() < 0.5:
                self.note_report(report, *line.ask("POST", "tasks/%s/status" % task["task_id"], report))
                report = None

    def note_report(self, report, status, answer):
        if status != 200:
            self.problems.append("report %s: %s %s" % (report, status, answer))
        with self.lock:
            self.reports[report["run_id"]] = (report["task_id"], report["status"])

    def run(self, kills):
        """Kill the server so many times at random moments, then let the workers finish what there is."""
        for thread in self.threads:
            thread.start()
        for self.kills in range(1, kills + 1):
            with self.lock:
                self.kill_at = self.answers + self.dice.randrange(1, 200)
                self.kill_now.clear()
            assert self.kill_now.wait(60), "no progress: %r" % self.problems
            self.up.clear()
            self.server.kill()
            if self.dice.random() < 0.2:
                self.kill_while_starting()
            self.server.start(self.port)
            self.up.set()
        self.submitting = False
        self.drain()
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        assert not self.problems, self.problems[:5]

    def drain(self):
        """Return once no task is left to do. What is left may be many and the machine slow, but some get done."""
        def fewer():
            now = self.unfinished()
            return [now] if now < left else None
        left = math.inf
        while left:
            left, = harness.wait_until(fewer, "fewer than %s tasks are left" % left, 120, never=lambda _: bool(self.problems))

    def unfinished(self):
        """Return how many tasks are not done, as the server sees it."""
        query = {"extra_filter": {"status": {"$in": ["pending", "running"]}}, "by": "status"}
        return sum(n for _, n in Line(self).ask("POST", "tasks/count", query)[1]["counts"])  # one look: a task goes to and fro

    def kill_while_starting(self):
        process = harness.start_cli(["serve", "--host", "127.0.0.1", "--port", str(self.port), "--db-path",
                                     self.server.journal], self.folder, self.server.log)
        try:
            process.wait(self.dice.random() * 0.4)
        except subprocess.TimeoutExpired:
            pass
        harness.end_group(process)

    def check(self):
        """Return the figures, after comparing what the clients know with what the store and its lines say."""
        state, journal = faulty.opened(self.server.journal)
        journal.close()
        tasks = next(iter(state.queues.values())).tasks
        places = [tuple(sorted(task.args.items())) for task in tasks.values()]
        figures = {"kills": self.kills, "submitted": len(self.submitted), "runs": len(self.runs), "repeats": self.repeated,
                   "reports": len(self.reports), "lost": len(set(self.submitted) - set(tasks)),
                   "unknown": len(set(tasks) - self.tried), "doubled": len(places) - len(set(places))}
        print(figures)
        assert (figures["lost"], figures["doubled"], figures["unknown"]) == (0, 0, 0)
        assert {task.status for task in tasks.values()} == {"success"}
        self.check_runs(tasks)
        return figures

    def check_runs(self, tasks):
        """Every acknowledged report is on a line; a task was claimed again only after its run had ended, and first after
        the line on which the one that it waits for has succeeded."""
        ended, started, current, after, succeeded = {}, {}, {}, {}, set()
        for line in self.server.journal.read_bytes().splitlines():
            for change in json.loads(line.decode()).get("changes", ()):
                if change[0] != "task":
                    continue
                task_id, fields = change[1], change[2]
                after.update({task_id: fields["after"]} if fields.get("after") else {})
                succeeded.update([task_id] if fields.get("status") == "success" else ())
                if fields.get("status") == "running":
                    run_id = fields["run_id"]
                    assert succeeded.issuperset(after.get(task_id, ())), "%s began before what it waits for" % task_id
                    assert task_id not in current, "%s was claimed while its run was not over" % task_id
                    current[task_id] = run_id
                    assert run_id not in started
                    started[run_id] = task_id
                elif fields.get("run_end"):
                    ended.setdefault(current.pop(task_id, None), []).append(fields["run_end"])
        ended.pop(None, None)
        assert len(after) > len(started) // 20, "chains were tried"
        assert set(started) == set(self.runs), "runs that no worker knows, or the other way round"
        for run_id, answers in self.runs.items():
            assert len(answers) == 1, "two fetches were answered with run %s" % run_id
            run = answers[0]
            expected = ["timeout"] if run["forgets"] else [run["end"]]
            assert ended.get(run_id) == expected, (run, ended.get(run_id))


@pytest.mark.slow
def test_a_server_killed_under_load_loses_doubles_and_invents_nothing(tmp_path):
    dice, kills, number = faulty.dice("kills"), setting("KILLS"), 0
    while kills > 0:  # each store takes at most 250 kills: its journal is read again at each
        number += 1
        checker = Checker(tmp_path / ("store-%d" % number), dice)
        try:
            checker.run(min(kills, 250))
        finally:
            checker.over.set()
            checker.server.stop()
        figures = checker.check()
        assert figures["submitted"] > figures["kills"] and figures["repeats"] > figures["kills"]
        kills -= 250


# Two servers


def race(folder, round_):
    """Start two servers on the store in `folder` at once; return (the process that serves, what the other said)."""
    logs = [folder / ("round-%d-%d.log" % (round_, i)) for i in range(2)]
    both = [harness.start_cli(["serve", "--host", "127.0.0.1", "--port", "0", "--db-path", folder / "journal.jsonl"],
                              folder, log) for log in logs]
    try:
        harness.wait_until(lambda: any(p.poll() is not None for p in both), "one server gives up")
        winner = 0 if both[1].poll() is not None else 1
        harness.wait_until(lambda: "listening on" in logs[winner].read_text(), "the other serves",
                           never=lambda _: both[winner].poll() is not None)
        return both[winner], both[1 - winner], logs[winner].read_text(), logs[1 - winner].read_text()
    except BaseException:
        for process in both:
            harness.end_group(process)
        raise


def again(folder):
    """Return (a server that has ended, what it said), started on a store that has a server."""
    loser = harness.start_cli(["serve", "--port", "0", "--db-path", folder / "journal.jsonl"], folder, folder / "again.log")
    try:
        loser.wait(120)
    finally:
        harness.end_group(loser)
    return loser, (folder / "again.log").read_text().splitlines()[-1]


@pytest.mark.slow
def test_of_two_servers_started_at_once_one_serves_and_the_other_says_who(tmp_path):
    problems, rounds = [], setting("RACES")

    def slot(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        for round_ in range(number, rounds, 4):
            winner, loser, served, said = race(folder, round_)
            try:
                url = re.search(r"listening on (http://[\w.]+:\d+)", served).group(1)
                if "in use" in said and url not in said:  # it gave up before the other listened
                    loser, said = again(folder)
                if loser.returncode == 0 or "in use" not in said or str(winner.pid) not in said or url not in said:
                    problems.append("round %d: %d at %s serves, the other said (exit %s): %s" % (
                        round_, winner.pid, url, loser.returncode, said))
                if harness.http("GET", url + "/health")[0] != 200 or "listening" in said:
                    problems.append("round %d: %s" % (round_, served + said))
            finally:
                harness.end_group(winner)

    def guarded(number):
        try:
            slot(number)
        except BaseException as error:
            problems.append("slot %d: %r" % (number, error))
    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("%d rounds of two servers" % rounds)
    assert not problems, "\n".join(problems[:5])
