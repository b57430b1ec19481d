"""Sections 4 and 5: a journal that is folded, surveyed and repaired."""
import json
import os
import pathlib
import random
import subprocess
import sys
import threading

import pytest

import labtasker
import labtasker as L
from faulty import setting
from harness import TESTS, clean_env, wait_until
from test_service import Clock, Door

pytestmark = [pytest.mark.usefixtures("real_path"), pytest.mark.slow]


@pytest.fixture
def real_path(monkeypatch):
    """What is started here in other processes is the module under test."""
    monkeypatch.setenv("PYTHONPATH", clean_env()["PYTHONPATH"])


@pytest.fixture
def door(tmp_path):
    return Door(tmp_path, Clock())


def busy(door, rounds=60, seed=1):
    """Leave a store with tasks in every state, workers, another queue, and much that is gone."""
    dice = random.Random(seed)
    worker_id = door.worker(metadata={"gpu": 1}, max_retries=1000)
    door("POST", "/api/v1/queues", {"queue_name": "other%d" % seed, "password": "p", "metadata": {"k": "v"}})
    for i in range(rounds):
        door.submit(args={"i": i, "opt": {"lr": 0.1 * i}}, priority=dice.randrange(3), metadata={"tags": ["x"]})
        if i % 2:
            task = door.fetch(worker_id=worker_id if i % 3 else None)
            door.report(task, dice.choice(["success", "failed", "pending", "running"]), summary={"acc": float("nan"), "i": i})
        if i % 5 == 0:
            door("DELETE", "tasks/" + door.submit())
    return door


def same(one, other):
    return repr(one.state()) == repr(other.state())  # by their text, in which NaN equals NaN


def test_a_fold_is_the_same_state_in_fewer_lines(door, tmp_path):
    busy(door)
    before = door.store.journal.file.size
    was, is_ = L.compact(door.path)
    assert was == before > is_ == os.stat(door.path).st_size
    again = Door(tmp_path, door.clock)
    again("GET", "/api/v1/queues/me")
    assert same(again, door)
    header = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert header["folded"] == door.store.journal.file.n - 1 and header["tail"] < is_  # all that is known to be on disk


def list_of_tasks(dice):
    """Return a list of submissions, most of which have one form."""
    form = dice.choice([{}, {"priority": 2}, {"metadata": {"k": dice.choice([1, True, 1.0])}}, {"max_retries": 0}, {"cmd": "x"}])
    tasks = [dict(form, args={"lr": dice.choice([0.1, 1, True, None, [1, {"a": 2}], "é"]), "seed": i}) for i in range(dice.randrange(1, 250))]
    if dice.random() < 0.3:
        tasks[dice.randrange(len(tasks))]["args"] = dice.choice([{"deep": {"lr": 1}, "seed": 1}, {"seed": 1, "lr": 2}])
    return tasks


@pytest.mark.parametrize("seed", range(6))
def test_a_fold_of_lists_keeps_every_task_as_it_is_in_its_place(door, tmp_path, seed):
    dice = random.Random(seed)
    for _ in range(4):
        ids = door("POST", "tasks", list_of_tasks(dice))["task_ids"]
        some = [dice.choice(ids) for _ in range(5)]
        door("DELETE", "tasks/" + some[0])
        door("PUT", "tasks", [{"task_id": task_id, "priority": 7} for task_id in sorted(set(some) - {some[0]})])
        door.report(door.fetch(), dice.choice(["success", "running"]))
        door("POST", "tasks", {"args": {"lr": 1, "seed": 1}, "after": [ids[-1]] if ids[-1] != some[0] else []})
    L.compact(door.path)
    again = Door(tmp_path, door.clock)
    again("GET", "/api/v1/queues/me")
    assert same(again, door)
    L.compact(door.path)
    last = Door(tmp_path, door.clock)
    last("GET", "/api/v1/queues/me")
    assert same(last, door)


def test_a_grid_that_is_partly_worked_off_stays_a_table(door, tmp_path):
    door("POST", "tasks", [{"args": {"lr": i / 8, "seed": i}} for i in range(1000)])
    was, is_ = L.compact(door.path)
    assert is_ < 1.1 * was
    for _ in range(50):
        door.report(door.fetch(), "success")
    folded, _ = L.compact(door.path)
    lines = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
    rows = [len(change[3]) for line in lines if "fold" in line for change in line["changes"] if change[0] == "tasks"]
    assert sum(rows) == 950 and max(rows) == L.FOLD_CHANGES


def test_processes_that_have_the_file_open_go_on_in_the_folded_one(door, tmp_path):
    busy(door)
    behind = Door(tmp_path, door.clock)
    behind("GET", "/api/v1/queues/me")
    behind_more = Door(tmp_path, door.clock)
    behind_more("GET", "/api/v1/queues/me")
    last = door.submit(args={"last": 1})
    behind_more.task(last)
    L.compact(door.path)
    for one in (door, behind, behind_more):
        one.task(one.submit(args={"after": 1}))
        assert one.task(last)["args"] == {"last": 1}
    again = Door(tmp_path, door.clock)
    for one in (door, behind, behind_more, again):
        one("GET", "/api/v1/queues/me")
    assert same(door, behind) and same(door, behind_more) and same(door, again)


def test_folding_twice_and_going_on(door, tmp_path):
    for seed in (1, 2, 3):
        busy(door, 20, seed)
        L.compact(door.path)
    again = Door(tmp_path, door.clock)
    again("GET", "/api/v1/queues/me")
    assert same(again, door)
    assert not labtasker.Survey(door.path).bad and not labtasker.Survey(door.path).lost


def test_writers_go_on_while_a_server_compacts(tmp_path):
    store = L.Store(str(tmp_path / "journal.jsonl"), is_server=True)
    store.file.open()
    queue_id = L.answer_call(store, None, "POST", "/api/v1/queues", {"queue_name": "q", "password": "p"})[1]["queue_id"]
    acknowledged, stop = [], threading.Event()

    def write():
        while not stop.is_set():
            status, answer = L.answer_call(store, lambda: queue_id, "POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})
            assert status == 201
            acknowledged.append(answer["task_id"])
            if len(acknowledged) % 2:
                L.answer_call(store, lambda: queue_id, "DELETE", "/api/v1/queues/me/tasks/" + acknowledged.pop())
    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(3):
        seen = store.journal.file.n
        wait_until(lambda: store.journal.file.n > seen + 50, "there are new lines")
        store.file.compact()
    stop.set()
    for writer in writers:
        writer.join()
    live = list(store.state.queues[queue_id].tasks)
    store.file.close()
    again = L.Store(str(tmp_path / "journal.jsonl"))
    L.answer_call(again, lambda: L.LocalName("q"), "GET", "/api/v1/queues/me")
    assert list(again.state.queues[queue_id].tasks) == live and set(acknowledged) <= set(live)
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["folded"] > 50


def test_a_store_that_is_mostly_dead_weight_compacts_itself(door, tmp_path, monkeypatch):
    monkeypatch.setattr(L, "SPARE_BYTES", 20000)
    monkeypatch.setattr(L, "LOOK_BYTES", 5000)
    door.store.file.look_again_bytes = 20000
    started = []
    monkeypatch.setattr(L.StoreFile, "start_compaction", lambda store: started.append(L.compact(store.path)))
    for _ in range(400):
        door("DELETE", "tasks/" + door.submit(metadata={"note": "x" * 100}))
    assert len(started) >= 2 and os.stat(door.path).st_size < 30000


def test_the_process_that_compacts_does(door):
    busy(door, 20)
    before = os.stat(door.path).st_size
    assert json.loads(L.in_other_process("compact", door.path))[0] == before > os.stat(door.path).st_size


@pytest.mark.parametrize("leads_here", ["cwd", "PYTHONPATH"])
def test_no_process_of_ours_imports_from_the_working_folder_or_pythonpath(door, tmp_path, monkeypatch, leads_here):
    busy(door, 5)
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("json", "labtasker", "heapq", "importlib"):
        (trap / (name + ".py")).write_text("raise SystemExit('imported from the wrong folder: ' + __file__)")
    monkeypatch.chdir(trap if leads_here == "cwd" else tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(trap) if leads_here == "PYTHONPATH" else "")
    assert json.loads(L.in_other_process("compact", door.path))
    beats = subprocess.run(L.in_python("heartbeat_main"), input=b'{"end": true}\n', stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (beats.returncode, beats.stdout, beats.stderr) == (0, b"", b"")


def test_there_is_one_way_to_start_a_python():
    source = (TESTS.parent / "labtasker.py").read_text(encoding="utf-8")
    assert source.count("[sys.executable,") == 1 and "[sys.executable, \"-I\"]" in source


def test_two_compactions_at_once_are_one(door):
    busy(door, 5)
    guard = L.FileLock(door.path + ".compact")
    guard.acquire(0)
    with pytest.raises(L.StoreUnavailable, match="being compacted already"):
        L.compact(door.path)
    guard.close()


def test_lines_not_known_to_be_on_disk_are_not_folded(door, tmp_path):
    busy(door, 5)
    n, offset = L.fold(door.path, str(tmp_path / "draft"))
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(True)
    assert n == len(lines) - 2 and offset == sum(map(len, lines[:-1]))


def spoil(path, number, change):
    """Change a line, counted from 1 after the header, by a function of its bytes."""
    lines = path.read_bytes().splitlines(True)
    lines[number] = change(lines[number])
    path.write_bytes(b"".join(lines))


SPOILS = [
    ("a flipped byte", lambda line: line[:30] + bytes([line[30] ^ 1]) + line[31:]),
    ("zeros", lambda line: b"\0" * len(line)),
    ("gone", lambda line: b""),
    ("twice", lambda line: line * 2),
    ("garbage before", lambda line: b"xx\r\n" + line),
    ("newline in the middle", lambda line: line[:20] + b"\n" + line[20:]),
]


@pytest.mark.parametrize("number", [3, 12, -3])
@pytest.mark.parametrize("what, change", SPOILS)
@pytest.mark.parametrize("folded", [False, True])
def test_rot_is_refused_surveyed_and_repaired(door, tmp_path, number, what, change, folded):
    busy(door, 10)
    if folded:
        L.compact(door.path)
        number = 1 if number == 3 else number
        for i in range(14):
            door.submit(args={"more": i})
    tasks = {task_id for queue in door.store.state.queues.values() for task_id in queue.tasks}
    path = tmp_path / "journal.jsonl"
    spoil(path, number, change)
    content = path.read_bytes()
    fresh = Door(tmp_path, door.clock)
    status, answer = L.answer_call(fresh.store, lambda: fresh.queue, "GET", "/api/v1/queues/me")
    assert status == 503 and "byte" in answer["detail"] and "labtasker journal repair" in answer["detail"]
    found = labtasker.Survey(door.path)
    assert found.rotten and path.read_bytes() == content
    survey, damaged, aside, ids = labtasker.repair_store(door.path)
    assert pathlib.Path(damaged).read_bytes() == content
    assert pathlib.Path(aside).read_bytes() == b"".join(piece.data for piece in found.bad)
    assert not labtasker.Survey(door.path).rotten and not labtasker.Survey(door.path).bad
    mended = Door(tmp_path, door.clock)
    mended("GET", "/api/v1/queues/me")
    kept = {task_id for queue in mended.store.state.queues.values() for task_id in queue.tasks}
    lost_creations = tasks - kept
    assert len(lost_creations) <= (L.FOLD_CHANGES if folded else 1)
    mended.submit()


def test_a_repair_of_what_is_whole_changes_nothing(door, tmp_path):
    busy(door, 5)
    content = (tmp_path / "journal.jsonl").read_bytes()
    assert labtasker.repair_store(door.path)[1:3] == (None, None)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


@pytest.mark.parametrize("folded", [False, True])
def test_a_lost_header_is_repaired(door, tmp_path, folded):
    busy(door, 5)
    if folded:
        L.compact(door.path)
        busy(door, 3, seed=2)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\0" * 50 + path.read_bytes()[50:])
    assert labtasker.Survey(door.path).bad
    labtasker.repair_store(door.path)
    mended = Door(tmp_path, door.clock)
    mended("GET", "/api/v1/queues/me")
    assert same(mended, door)


def test_reading_leaves_a_torn_end_where_it_is_and_the_next_write_sets_it_aside(door, tmp_path):
    busy(door, 3)
    path = tmp_path / "journal.jsonl"
    with open(str(path), "ab") as file:
        file.write(b'{"n":99,"durable":1,"half')
    content = path.read_bytes()
    reader = Door(tmp_path, door.clock)
    reader("POST", "tasks/search", {})
    assert same(reader, door) and path.read_bytes() == content
    reader.submit()
    assert path.read_bytes().startswith(content[:-25]) and b"half" not in path.read_bytes()
    assert [aside.read_bytes() for aside in tmp_path.glob("*.torn-*")] == [content[-25:]]


def test_what_fsync_interval_leaves_is_synced_a_second_later(tmp_path, monkeypatch):
    monkeypatch.setattr(L, "_SYNC_INTERVAL_S", 1000)  # the requests below do not last so long
    store = L.Store(str(tmp_path / "journal.jsonl"), is_server=True, fsync="interval")
    store.file.open()
    for name in ("a", "b"):
        assert L.answer_call(store, None, "POST", "/api/v1/queues", {"queue_name": name, "password": "p"})[0] == 201
    assert store.journal.file.durable < store.journal.file.n
    store.journal.settle()
    assert store.journal.file.durable == store.journal.file.n
    store.file.close()


def test_a_file_system_without_hard_links_will_do(door, monkeypatch):
    def link(source, target):
        raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(L.os, "link", link)
    door.submit()
    assert door.store.owner.holds() and door.store.owner.read(1)["pid"] == os.getpid()


DYING = """
import os, sys, labtasker as L
k, calls = int(sys.argv[3]), [0]
def dying(real):
    def call(*args):
        calls[0] += 1
        if calls[0] == k:
            os._exit(9)
        return real(*args)
    return staticmethod(call)
for name in ("open", "write", "sync", "truncate", "rename"):
    setattr(L.Disk, name, dying(getattr(L.Disk, name)))
import labtasker
getattr(labtasker, sys.argv[1])(sys.argv[2])
"""


def die_in(function, path, k):
    """Return the exit code of a process that calls the function and is gone before its k-th call of the disk."""
    return subprocess.run([sys.executable, "-c", DYING, function, path, str(k)], env=clean_env()).returncode


def test_a_repair_killed_at_any_moment_loses_no_good_line(door, tmp_path):
    busy(door, 10)
    path = tmp_path / "journal.jsonl"
    spoil(path, 7, lambda line: line[:30] + bytes([line[30] ^ 1]) + line[31:])
    content = path.read_bytes()
    good = content.splitlines(True)[:7] + content.splitlines(True)[8:]
    codes = []
    for k in range(1, 40):
        path.write_bytes(content)
        codes.append(die_in("repair_store", door.path, k))
        there = path.read_bytes()
        assert there == content or all(line in there for line in good[1:])
        if codes[-1] == 0:
            break
        labtasker.repair_store(door.path)
        assert all(line in path.read_bytes() for line in good[1:]) and not labtasker.Survey(door.path).bad
    assert codes[-1] == 0 and len(codes) > 6


@pytest.mark.slow
def test_a_compaction_killed_at_any_moment_leaves_the_store_as_it_was(door, tmp_path):
    busy(door, 20)
    for k in range(1, 40):
        code = die_in("compact", door.path, k)
        again = Door(tmp_path, door.clock)
        again("GET", "/api/v1/queues/me")
        assert same(again, door)
        if code == 0:
            break
        door.submit(args={"k": k})
    assert code == 0 and k > 5


def test_journals_of_every_format_that_ever_was_are_read_the_same(tmp_path):
    folder = TESTS / "journals"
    kept = sorted(folder.glob("format-*.jsonl"))
    assert [path.name for path in kept] == ["format-%d.jsonl" % number for number in range(1, L.FORMAT + 1)]
    sys.path.insert(0, str(folder))
    try:
        import make
    finally:
        sys.path.remove(str(folder))
    for path in kept:
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        found, told = make.shown(copy), json.loads(path.with_suffix(".json").read_text())
        for kind, fields in (("queue", L.QUEUE_FIELDS), ("tasks", L.TASK_FIELDS), ("workers", L.WORKER_FIELDS)):
            items = [[queue[kind]] if kind == "queue" else queue[kind] for queue in told + found]
            known = {name for of_queue in items[:len(told)] for item in of_queue for name in item}
            for item in [item for of_queue in items[len(told):] for item in of_queue]:
                for name in set(item) - known:  # a field that came later has its default
                    assert item.pop(name) == fields[name].default
        assert json.dumps(found, sort_keys=True) == json.dumps(told, sort_keys=True)
        assert copy.read_bytes() == path.read_bytes()


def test_a_process_too_far_behind_reads_a_folded_file_from_its_start(door, tmp_path):
    busy(door, 5)
    behind = Door(tmp_path, door.clock)
    behind("GET", "/api/v1/queues/me")
    busy(door, 30, seed=2)
    L.compact(door.path)
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["folded"] > behind.store.journal.file.n
    behind.submit(args={"late": 1})
    door("GET", "/api/v1/queues/me")
    assert same(behind, door)
    ids = [(event.n, event.k) for event in behind.store.file.replica.events]
    assert ids == sorted(set(ids))


def test_a_process_goes_on_when_another_store_was_put_in_its_files_place(door, tmp_path):
    busy(door, 5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = Door(elsewhere, door.clock)
    task_id = other.submit(args={"from": "elsewhere"})
    os.replace(other.path, door.path)
    assert door.task(task_id)["args"] == {"from": "elsewhere"}
    door.submit()
    fresh = Door(tmp_path, door.clock)
    fresh("GET", "/api/v1/queues/me")
    assert same(fresh, door)


def test_tasks_that_are_finished_and_deleted_leave_a_small_file(tmp_path):
    store = L.Store(str(tmp_path / "journal.jsonl"), is_server=True)
    store.file.open()
    queue_id = L.answer_call(store, None, "POST", "/api/v1/queues", {"queue_name": "q", "password": "p"})[1]["queue_id"]

    def call(method, path, body=None, query=None):
        status, answer = L.answer_call(store, lambda: queue_id, method, "/api/v1/queues/me/" + path, body, query)
        assert status < 400, answer
        return answer
    kept, compactions = call("POST", "tasks", {"args": {"kept": True}})["task_id"], 0
    for _ in range(setting("GONE") // 1000):
        ids = call("POST", "tasks", [{"args": {"i": i, "model": "resnet"}, "metadata": {"i": i, "text": "x" * 300}} for i in range(1000)])["task_ids"]
        call("PUT", "tasks", [{"task_id": one, "status": "cancelled"} for one in ids], {"reset_pending": "false"})
        with store.lock:
            batch = store._commit(queue_id, [["task-", one] for one in ids], L.now())
        store.journal.wait(batch)
        if store.file.is_bloated():
            store.file.compact()
            compactions += 1
            assert store.journal.file.size < 2 ** 20  # the last line, not yet known to be on disk when folding, stands
    assert compactions and os.stat(store.path).st_size < L.SPARE_BYTES + L.LOOK_BYTES + 2 ** 20
    store.file.close()
    again = L.Store(store.path)
    L.answer_call(again, lambda: L.LocalName("q"), "GET", "/api/v1/queues/me")
    assert list(again.state.queues[queue_id].tasks) == [kept]
