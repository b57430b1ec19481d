"""Section 4: one owner a store, also where a lock that one host takes is not seen on another."""
import contextlib
import json
import os
import signal
import socket
import stat
import sys
import threading
import time

import pytest

import harness
import labtasker as L
from faulty import setting
from harness import end_group, start, wait_until


class Host:
    """Stands for a host: what runs `as_me` believes to be there. Its locks are not seen elsewhere."""

    def __init__(self, name, monkeypatch):
        self.name, self.monkeypatch = name, monkeypatch

    def __enter__(self):
        self.monkeypatch.setattr(L, "host_id", lambda: self.name)

    def __exit__(self, *_):
        self.monkeypatch.setattr(L, "host_id", lambda: "nobody")


@pytest.fixture
def hosts(monkeypatch):
    """Return two hosts on a file system whose locks lie."""
    def acquire(lock, timeout_s):
        if lock.fd is None:
            lock._open()
        return True
    monkeypatch.setattr(L.FileLock, "acquire", acquire)
    monkeypatch.setattr(L.FileLock, "release", lambda lock: None)
    monkeypatch.setattr(L, "OWNER_LAPSE_S", 0.5)
    return Host("one", monkeypatch), Host("two", monkeypatch)


def server(tmp_path, **options):
    store = L.Store(str(tmp_path / "journal.jsonl"), is_server=True)
    store.file.open(**options)
    return store


def submit(store):
    """Return (status, answer) of a submission to the store's first queue."""
    if not store.state.queues and store.is_server:
        assert L.answer_call(store, None, "POST", "/api/v1/queues", {"queue_name": "default", "password": "p"})[0] == 201
    return L.answer_call(store, lambda: L.LocalName("default"), "POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})


def replayed(tmp_path):
    """Return the ids of the tasks that the file holds."""
    state, source = L.State(), L.JournalFile(str(tmp_path / "journal.jsonl"), mode=os.O_RDONLY)
    source.open()
    for line in source.read_new():
        if "changes" in line:
            state.apply(line["queue"], line["changes"])
    assert source.size == os.stat(source.path).st_size
    return {task_id for queue in state.queues.values() for task_id in queue.tasks}


def test_a_store_of_another_living_host_is_refused_with_its_name(hosts, tmp_path):
    one, two = hosts
    with one:
        first = server(tmp_path)
        stop = threading.Event()
    (tmp_path / "server.json").write_text(json.dumps({"addresses": ["http://one:9321"]}))

    def live():
        while not stop.wait(0.05):
            first.owner.moved_at = -1e9
            first.owner.move()
    alive = threading.Thread(target=live)
    alive.start()
    with two:
        with pytest.raises(L.StoreUnavailable, match="on host %s, at http://one:9321: .*--takeover" % os.uname().nodename):
            server(tmp_path)
        embedded = L.Store(str(tmp_path / "journal.jsonl"))
        status, answer = submit(embedded)
        assert status == 503 and "--takeover" in answer["detail"]
        assert L.answer_call(embedded, lambda: L.LocalName("default"), "GET", "/api/v1/queues/me")[0] == 200
    stop.set()
    alive.join()


def test_a_silent_owner_is_taken_over_and_writes_no_more(hosts, tmp_path):
    one, two = hosts
    with one:
        first = server(tmp_path)
        known = submit(first)[1]["task_id"]
    with two:
        second = server(tmp_path)
        task_id = submit(second)[1]["task_id"]
    with one:
        status, answer = submit(first)
        assert status == 503 and "another owner" in answer["detail"]
        assert submit(first)[0] == 503
    with two:
        last = submit(second)[1]["task_id"]
    assert replayed(tmp_path) == {known, task_id, last}


def test_takeover_does_not_wait_and_a_released_store_needs_none(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(L, "OWNER_LAPSE_S", 1e9)
    one, two = hosts
    with one:
        server(tmp_path)
    with two:
        store = server(tmp_path, takeover=True)
        store.file.close()
    with one:
        server(tmp_path).file.close()


def test_a_write_that_was_under_way_when_the_store_was_taken_is_not_acknowledged(hosts, tmp_path):
    """The first server looks, is stopped, and writes when it wakes."""
    one, two = hosts
    with one:
        first = server(tmp_path)
        known = submit(first)[1]["task_id"]
    taken = []

    class Stopped(L.Disk):
        @staticmethod
        def write(fd, data):
            if not taken:
                with two:
                    taken.append(server(tmp_path, takeover=True))
            return os.write(fd, data)
    first.journal.file.disk = Stopped
    with one:
        assert submit(first)[0] == 503
        assert submit(first)[0] == 503
    assert known in replayed_before_damage(tmp_path)


def replayed_before_damage(tmp_path):
    """Return the ids of the tasks in the good part of the file; what comes after was never acknowledged."""
    text = (tmp_path / "journal.jsonl").read_text()
    return {change[1] for line in text.splitlines() for change in json.loads(line).get("changes", ()) if change[0] == "task"}


class Away(L.Disk):
    """A disk that fails every sync and rename while it `is_away`."""

    is_away = True

    @classmethod
    def sync(cls, fd):
        if cls.is_away:
            raise OSError(5, "Input/output error")
        L.Disk.sync(fd)

    @classmethod
    def rename(cls, source, path):
        if cls.is_away:
            raise OSError(5, "Input/output error")
        os.replace(source, path)


def test_a_superseded_server_whose_disk_comes_back_puts_no_copy_in_the_new_owners_files_place(hosts, tmp_path, monkeypatch):
    one, two = hosts
    with one:
        first = server(tmp_path)
        known = submit(first)[1]["task_id"]
        first.journal.file.disk = Away
        assert submit(first)[0] == 503 and first.journal.writer.broken
    with two:
        second = server(tmp_path, takeover=True)
        task_id = submit(second)[1]["task_id"]
    monkeypatch.setattr(Away, "is_away", False)
    with one:
        status, answer = submit(first)
        assert status == 503 and "another owner" in answer["detail"]
    with two:
        last = submit(second)[1]["task_id"]
    assert replayed(tmp_path) == {known, task_id, last}


@pytest.mark.parametrize("submits_before", [0, 2])
def test_a_superseded_server_puts_no_fold_in_the_new_owners_files_place(hosts, tmp_path, monkeypatch, submits_before):
    one, two = hosts
    with one:
        first = server(tmp_path)
        ids = {submit(first)[1]["task_id"] for _ in range(3)}
    real, second = L.fold, []

    def fold(function, path, draft):
        with two:
            second.append(server(tmp_path, takeover=True))
            ids.update(submit(second[0])[1]["task_id"] for _ in range(submits_before))
        return json.dumps(real(path, draft))
    monkeypatch.setattr(L, "in_other_process", fold)
    with one:
        with pytest.raises(L.LabtaskerRuntimeError, match="could not be compacted .*another owner"):
            first.file.compact()
        assert submit(first)[0] == 503
    with two:
        ids.add(submit(second[0])[1]["task_id"])
    assert replayed(tmp_path) == ids
    assert not [name for name in os.listdir(str(tmp_path)) if ".fold" in name or ".new-" in name]


def test_a_server_that_was_stopped_within_a_replacement_keeps_what_the_new_owner_wrote_meanwhile(hosts, tmp_path):
    one, two = hosts
    with one:
        first = server(tmp_path)
        ids = {submit(first)[1]["task_id"] for _ in range(3)}

    class Stopped(L.Disk):
        @staticmethod
        def rename(source, path):
            if path == first.path:
                with two:
                    second = server(tmp_path, takeover=True)
                    ids.add(submit(second)[1]["task_id"])
            os.replace(source, path)
    first.journal.file.disk = Stopped
    _, offset = L.fold(first.path, str(tmp_path / "draft"))
    with one:
        with pytest.raises(L.StoreUnavailable, match="another owner"):
            first.journal.writer.adopt(str(tmp_path / "draft"), offset)
        assert submit(first)[0] == 503
    assert replayed(tmp_path) == ids


def test_a_journal_copied_from_a_folder_of_later_epochs_can_be_written(tmp_path):
    for _ in range(3):
        store = server(tmp_path)
        submit(store)
        store.file.close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "journal.jsonl").write_bytes((tmp_path / "journal.jsonl").read_bytes())
    for _ in range(3):
        assert submit(L.Store(str(elsewhere / "journal.jsonl")))[0] == 201
    assert len(replayed(elsewhere)) == 6


def test_an_epoch_of_another_host_in_the_journal_stops_a_process_that_does_not_see_its_owner_file_yet(hosts, tmp_path, monkeypatch):
    one, two = hosts
    with one:
        first = L.Store(str(tmp_path / "journal.jsonl"))
        assert submit(first)[0] == 201
    with two:
        server(tmp_path, takeover=True)
    with one:
        monkeypatch.setattr(first.owner, "holds", lambda: True)
        status, answer = submit(first)
        assert status == 503 and "taken over by another host" in answer["detail"]


@pytest.mark.slow
def test_a_server_that_was_stopped_and_superseded_does_not_write_when_it_wakes(hosts, tmp_path, monkeypatch):
    from harness import Server
    one, two = hosts
    with Server(tmp_path) as first:
        known = first.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})[1]["task_id"]
        os.kill(first.process.pid, signal.SIGSTOP)
        with two:
            second = server(tmp_path, takeover=True)
            queue_id = next(iter(second.state.queues))
            status, answer = L.answer_call(second, lambda: queue_id, "POST", "/api/v1/queues/me/tasks", {"args": {"a": 2}})
            assert status == 201
        size = os.stat(second.path).st_size
        os.kill(first.process.pid, signal.SIGCONT)
        try:
            status, told, _ = first.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 3}})
            assert status == 503 and "another owner" in told["detail"]
        except OSError:  # it saw at once that it was superseded, and ended
            pass
        assert first.process.wait(30) == 1 and "another owner" in first.output()
        assert os.stat(second.path).st_size == size
        assert replayed(tmp_path) == {known, answer["task_id"]}


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(setting("RACES") // 2))
def test_of_two_servers_started_at_once_where_locks_lie_one_serves(tmp_path, round_):
    program = ("import sys, labtasker as L\nL.FileLock.acquire = lambda lock, timeout_s: True\n"
               "try:\n    L.serve(sys.argv[1], port=0)\nexcept L.LabtaskerError as error:\n    sys.exit('refused: %s' % error)\n")
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    both = [start([sys.executable, "-c", program, tmp_path / "journal.jsonl"], tmp_path, log) for log in logs]
    try:
        wait_until(lambda: all("listening" in log.read_text() or "refused" in log.read_text() for log in logs), "both have decided")
        assert sorted("listening" in log.read_text() for log in logs) == [False, True], [log.read_text() for log in logs]
        assert "is in use by a server: process" in "".join(log.read_text() for log in logs)
    finally:
        for process in both:
            end_group(process)


def test_processes_of_one_host_share_an_epoch_without_a_server(tmp_path):
    stores = [L.Store(str(tmp_path / "journal.jsonl")) for _ in range(3)]
    for _ in range(3):
        for store in stores:
            assert submit(store)[0] == 201
    assert {store.owner.epoch for store in stores} == {1}
    assert (tmp_path / "journal.jsonl").read_text().count('"epoch"') == 1


def test_a_server_after_embedded_commands_and_the_other_way_round(tmp_path):
    embedded = L.Store(str(tmp_path / "journal.jsonl"))
    submit(embedded)
    for epoch in (2, 3):
        store = server(tmp_path)
        assert store.owner.epoch == epoch and submit(store)[0] == 201
        store.file.close()
    assert submit(embedded)[0] == 201
    assert len(replayed(tmp_path)) == 4


def test_an_owner_file_that_is_gone_or_garbage_keeps_nobody_out(tmp_path):
    embedded = L.Store(str(tmp_path / "journal.jsonl"))
    submit(embedded)
    os.unlink(str(tmp_path / "journal.jsonl.owner-1"))
    assert submit(embedded)[0] == 201
    (tmp_path / "journal.jsonl.owner-7").write_text("garbage")
    again = L.Store(str(tmp_path / "journal.jsonl"))
    again.owner._is_silent = lambda epoch, told: True
    assert submit(again)[0] == 201 and again.owner.epoch == 8


def test_what_is_collected_after_the_modules_names_are_gone_closes_its_descriptor_and_raises_nothing(tmp_path, monkeypatch):
    store = L.Store(str(tmp_path / "journal.jsonl"))
    submit(store)
    held = [store.file.file, store.file.file_lock, store.file.owner]
    numbers = [held[0].fd, held[1].fd, held[2].used[0]]
    with monkeypatch.context() as end_of_process:
        end_of_process.setattr(L, "os", None)
        for thing in held:
            thing.__del__()
    for number in numbers:
        pytest.raises(OSError, os.fstat, number)


def test_a_process_that_died_and_one_that_lives_are_told_apart():
    assert L.process_start(os.getpid()) == L.process_start(os.getpid()) is not None
    pid = os.fork()
    if not pid:
        os._exit(0)
    wait_until(lambda: L.process_start(pid) is None, "a zombie counts as dead")
    os.waitpid(pid, 0)
    assert L.process_start(pid) is None


@pytest.mark.parametrize("error, lives", [(None, True), (PermissionError, True), (ProcessLookupError, False)])
def test_without_proc_a_process_lives_unless_the_system_knows_none_even_if_it_is_another_users(monkeypatch, error, lives):
    def kill(pid, signum):
        if error:
            raise error()
    monkeypatch.setattr(L.os.path, "isdir", lambda path: False)
    monkeypatch.setattr(L.os, "kill", kill)
    assert (L.process_start(1) is not None) == lives


def test_a_full_disk_for_owner_and_lock_file_does_not_spoil_what_was_written(tmp_path, monkeypatch):
    store = L.Store(str(tmp_path / "journal.jsonl"))
    assert submit(store)[0] == 201

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(L.Owner, "_content", full)
    monkeypatch.setattr(L.os, "pwrite", full)
    store.owner.moved_at = -1e9
    assert submit(store)[0] == 201 and len(replayed(tmp_path)) == 2


def test_drafts_of_processes_that_died_are_removed_when_a_server_opens(tmp_path):
    for name in ("journal.jsonl.new-1", "journal.jsonl.fold", "journal.jsonl.fold.new-7", "journal.jsonl.owner.new-3"):
        (tmp_path / name).write_text("half")
    (tmp_path / "journal.jsonl.torn-5-5").write_text("kept")
    store = server(tmp_path)
    assert sorted(os.listdir(str(tmp_path))) == ["journal.jsonl", "journal.jsonl.lock", "journal.jsonl.owner-1", "journal.jsonl.torn-5-5"]
    store.file.close()


def device(folder):
    """Return the path of a device as /dev/zero is, beside a folder where root may make one: a fault in the code under test would
    have root replace the system's own."""
    path = "%s.zero" % folder
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.stat("/dev/zero").st_rdev)
        with open(path, "rb"):
            return path
    except OSError:  # not root, or no devices in this file system
        return "/dev/zero"


def odd(path, kind):
    """Put what another program might leave under a name of ours there."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(str(path))
    elif kind == "device":
        path.symlink_to(device(path.parent))
    elif kind == "socket":
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
            made.bind(path.name)  # in the working folder: the whole path may be too long for a socket
    elif kind == "huge":
        with open(str(path), "wb") as file:
            file.truncate(L.MOST_FILE_BYTES + 1)
    elif kind == "nothing behind the link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(kind)
    return path


ODD = ["folder", "pipe", "device", "socket", "huge", b"", b"\0" * 100, b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b"[" * 100000,
       b'{"n": ' + b"[" * 100000, b"7" * 10000]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket"])
def test_what_is_no_plain_file_is_never_read_locked_or_replaced_as_a_journal(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = str(odd(tmp_path / "journal.jsonl", kind))
    before = os.lstat(path)
    for use in (L.Survey, L.compact, L.repair_store, L.check_known, lambda path: L.Store(path, is_server=True).file.open(),
                lambda path: put(L.Store(path), 1), lambda path: held(L.Store(path))):
        with pytest.raises((L.LabtaskerError, AssertionError), match="plain file"):
            use(path)
    assert "plain file" in L.answer_call(L.Store(path), None, "GET", "/health/full")[1]["database"]
    assert os.lstat(path) == before and os.listdir(str(tmp_path)) == ["journal.jsonl"]


@pytest.mark.parametrize("kind", ODD, ids=repr)
def test_a_file_of_ours_that_is_no_plain_small_json_object_is_named_and_never_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = odd(tmp_path / "server.json", kind)
    with pytest.raises(L.OddFile, match="server.json"):
        L.load_json(str(path), {})
    assert L.read_json(str(path)) == {} and L.read_server_file(str(tmp_path)) is None


@pytest.mark.parametrize("told", [
    {"addresses": "http://h:1"}, {"addresses": [1]}, {"addresses": {"a": 1}}, {"pid": "7"}, {"pid": True}, {"key": ["k"]},
    {"host_id": 1}, {"ca_file": 7}], ids=repr)
def test_a_server_file_with_a_field_of_another_type_is_none(tmp_path, told):
    (tmp_path / "server.json").write_text(json.dumps(dict({"server": "s", "addresses": ["http://h:1"]}, later=[1])))
    assert L.read_server_file(str(tmp_path))["addresses"] == ["http://h:1"]
    (tmp_path / "server.json").write_text(json.dumps(dict({"server": "s", "addresses": ["http://h:1"]}, **told)))
    assert L.read_server_file(str(tmp_path)) is None


def test_a_file_of_ours_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "told.json"
    L.Disk.create(str(path), [b"{}"])
    L.write_json(str(path), {"a": 1})

    def full(fd, data):
        os.write(fd, bytes(data)[:3])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(L.Disk, "write", staticmethod(full))
    L.write_json(str(path), {"a": 2})
    assert L.read_json(str(path)) == {"a": 1} and os.listdir(str(tmp_path)) == ["told.json"]
    assert open_files(tmp_path) == 0


@pytest.mark.parametrize("name, kind", [("owner-7", "folder"), ("owner-7", b"{}"), ("owner-7", "device"), ("owner-\xb2", b""),
                                        ("owner-" + "9" * 40, b"")])
def test_an_odd_owner_file_keeps_nobody_out(tmp_path, name, kind):
    odd(tmp_path / ("journal.jsonl." + name), kind)
    store = L.Store(str(tmp_path / "journal.jsonl"))
    store.owner._is_silent = lambda epoch, told: True
    assert submit(store)[0] == 201 and store.owner.holds()


@pytest.mark.parametrize("kind", ["folder", "device", b"", b"nothing of ours", b"x" * 100000, b"\xff 1 2"])
def test_an_odd_beat_file_is_that_of_a_run_which_is_not_known(tmp_path, kind):
    (tmp_path / "beats").mkdir()
    odd(tmp_path / "beats" / "run", kind)
    assert L.BeatFiles(str(tmp_path)).get("run") is None


# The file is another one, or has another content, than the one that was read.


def held(store):
    """Return the arguments `a` of the tasks that a store sees, sorted."""
    status, answer = L.answer_call(store, lambda: L.LocalName("default"), "POST", "/api/v1/queues/me/tasks/search", {"limit": 1000})
    assert status == 200, answer
    return sorted(task["args"]["a"] for task in answer["content"])


def put(store, *numbers):
    """Submit a task for each number; all are acknowledged."""
    for number in numbers:
        answer = L.answer_call(store, lambda: L.LocalName("default"), "POST", "/api/v1/queues/me/tasks", {"args": {"a": number}})
        assert answer[0] == 201, answer


def copied(path, content):
    """Write other content into the file in place, as `cp` does."""
    with open(path, "wb") as file:
        file.write(content)


def renamed(path, content):
    """Put another file in the file's place, as `mv`, `rsync` and `git checkout` do."""
    copied(path + ".other", content)
    os.rename(path + ".other", path)


def grown(count):
    """Return the function that has another process add so many tasks to what it is given."""
    def grow(folder, content):
        other = L.Store(str(folder / "journal.jsonl"))
        folder.mkdir()
        copied(other.path, content)
        put(other, *range(1000, 1000 + count))
        return (folder / "journal.jsonl").read_bytes()
    return grow


def another(count):
    """Return the function that makes another store with so many tasks, whatever it is given."""
    return lambda folder, content: grown(count)(folder, b"")


OTHER_CONTENTS = {
    "a backup": lambda folder, content: content,
    "a backup that grew shorter than what was read": grown(2),
    "a backup that grew to as many lines": grown(4),
    "a backup that grew longer": grown(9),
    "another, shorter store": another(2),
    "another store with as many lines": another(7),
    "another, longer store": another(20),
    "cut after a line": lambda folder, content: content[:content.rindex(b"\n", 0, -1) + 1],
}


@pytest.mark.parametrize("way", [copied, renamed])
@pytest.mark.parametrize("what", OTHER_CONTENTS)
@pytest.mark.parametrize("first", ["reads", "writes"])
def test_a_process_reads_anew_what_was_put_in_its_files_place_and_says_so(tmp_path, capfd, way, what, first):
    living = L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 0, 1, 2)
    backup = (tmp_path / "journal.jsonl").read_bytes()
    put(living, 50, 51, 52, 53)
    content = OTHER_CONTENTS[what](tmp_path / "elsewhere", backup)
    way(living.path, content)
    wanted = held(L.Store(living.path))
    if first == "writes":
        put(living, 99)
        wanted = wanted + [99]
    assert held(living) == sorted(wanted)
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(content), "lines that others wrote were cut"
    assert capfd.readouterr().err.count("is not the file that this process had read") == 1
    put(living, 100)
    assert held(L.Store(living.path)) == held(living) == sorted(wanted + [100])
    assert not list(tmp_path.glob("*.torn-*"))


def test_a_content_of_the_same_length_is_told_by_its_last_line(tmp_path, capfd):
    living = L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 1, 2)
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(True)
    changed = L.sealed(json.loads(lines[-1].decode().replace('"a":2', '"a":3')))
    assert len(changed) == len(lines[-1])
    copied(living.path, b"".join(lines[:-1]) + changed)
    assert held(living) == [1, 3]
    put(living, 4)
    assert held(L.Store(living.path)) == [1, 3, 4] and "read from its beginning" in capfd.readouterr().err


@pytest.mark.parametrize("way", [copied, renamed])
@pytest.mark.parametrize("what", OTHER_CONTENTS)
def test_a_server_writes_nothing_into_what_was_put_in_its_files_place(tmp_path, way, what):
    store = server(tmp_path)
    known = [submit(store) for _ in range(3)]
    backup = (tmp_path / "journal.jsonl").read_bytes()
    known += [submit(store) for _ in range(4)]
    assert {status for status, _ in known} == {201}
    content = OTHER_CONTENTS[what](tmp_path / "elsewhere", backup)
    way(store.path, content)
    for _ in range(2):
        status, answer = submit(store)
        assert status == 503 and "start it again" in answer["detail"]
    with pytest.raises(L.LabtaskerRuntimeError, match="could not be compacted"):
        store.file.compact()
    store.file.close()
    assert (tmp_path / "journal.jsonl").read_bytes() == content


@pytest.mark.parametrize("way", [copied, renamed])
@pytest.mark.parametrize("what", OTHER_CONTENTS)
def test_a_compaction_leaves_a_file_alone_that_it_did_not_fold(tmp_path, monkeypatch, way, what):
    living = L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 0, 1, 2)
    backup = (tmp_path / "journal.jsonl").read_bytes()
    put(living, 50, 51, 52, 53)
    content, real = OTHER_CONTENTS[what](tmp_path / "elsewhere", backup), L.fold

    def fold(path, draft):
        answer = real(path, draft)
        way(path, content)
        return answer
    monkeypatch.setattr(L, "fold", fold)
    with pytest.raises(L.LabtaskerRuntimeError, match="could not be compacted .*another file was put in the place"):
        L.compact(living.path)
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(content)
    assert b'"folded"' not in (tmp_path / "journal.jsonl").read_bytes()


@pytest.mark.parametrize("grow", [0, 1, 4, 5, 20])
def test_a_fold_of_another_history_is_not_taken_for_ones_own(tmp_path, grow):
    """As many lines, fewer, more: the header keeps the checksum of the last line that was folded."""
    living = L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 0, 1, 2)
    backup = (tmp_path / "journal.jsonl").read_bytes()
    put(living, 50, 51, 52, 53)
    content = grown(grow)(tmp_path / "elsewhere", backup)
    renamed(living.path, content)
    L.compact(living.path)
    L.compact(living.path)
    assert held(living) == held(L.Store(living.path)) == [0, 1, 2] + list(range(1000, 1000 + grow))


@pytest.mark.parametrize("way", ["removed", "emptied"])
def test_a_process_whose_file_is_gone_makes_no_new_one_and_goes_on_when_it_is_back(tmp_path, way):
    living = L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 1)
    content = (tmp_path / "journal.jsonl").read_bytes()
    os.rename(living.path, living.path + ".away")
    if way == "emptied":
        (tmp_path / "journal.jsonl").write_bytes(b"")
    for _ in range(2):
        status, answer = submit(living)
        assert status == 503 and "removed or emptied" in answer["detail"]
    assert not living.journal.file.exists()
    os.rename(living.path + ".away", living.path)
    put(living, 2)
    assert held(living) == [1, 2] and (tmp_path / "journal.jsonl").read_bytes().startswith(content)


def test_damage_in_what_was_put_in_its_files_place_leaves_no_half_read_state(tmp_path):
    living = L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 1, 2, 3)
    good = (tmp_path / "journal.jsonl").read_bytes()
    content = grown(9)(tmp_path / "elsewhere", good[:good.rindex(b"\n", 0, -1) + 1])
    renamed(living.path, content.replace(b'"a":1002', b'"a":1992'))
    for _ in range(2):
        status, answer = submit(living)
        assert status == 503 and "damaged" in answer["detail"]
    renamed(living.path, content)
    put(living, 4)
    assert held(living) == [1, 2, 4] + list(range(1000, 1009))


def test_another_process_that_writes_the_file_anew_is_followed_without_a_word(tmp_path, capfd):
    living, other = L.Store(str(tmp_path / "journal.jsonl")), L.Store(str(tmp_path / "journal.jsonl"))
    put(living, 1, 2)
    capfd.readouterr()  # that the store was created
    put(other, 3)
    other.journal.writer.broken = "a sync failed"
    put(other, 4)
    L.compact(living.path)
    put(living, 5)
    assert held(living) == held(other) == [1, 2, 3, 4, 5] and not capfd.readouterr().err


# Several hosts without a server: who lives is never silent, and who ends leaves the store to others at once


def embedded(tmp_path):
    return L.Store(str(tmp_path / "journal.jsonl"))


def ask(store, method, path, body=None, query=None):
    status, answer = L.answer_call(store, lambda: L.LocalName("default"), method, path, body, query)
    assert status < 300, answer
    return answer


def begin_run(store, **fields):
    """Return the task of a new run in the store."""
    worker = ask(store, "POST", "/api/v1/queues/me/workers", {})["worker_id"]
    return ask(store, "POST", "/api/v1/queues/me/tasks/next", dict({"worker_id": worker, "required_fields": ["a"],
                                                                    "heartbeat_timeout": 30.0}, **fields))["task"]


def status_of(store, task):
    return ask(store, "GET", "/api/v1/queues/me/tasks/" + task["task_id"])["status"]


class Clock:
    """Stands for the monotonic clock."""

    def __init__(self, monkeypatch):
        self.shift_s, real = 0, L.monotonic
        monkeypatch.setattr(L, "monotonic", lambda: real() + self.shift_s)


def test_a_process_that_ends_leaves_its_store_to_other_hosts_at_once(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(L, "OWNER_LAPSE_S", 1e9)
    one, two = hosts
    for _ in range(3):
        for host in (one, two, two):
            with host:
                store = embedded(tmp_path)
                assert submit(store)[0] == 201
                store.file.close()
    assert len(replayed(tmp_path)) == 9


def test_a_store_that_another_process_of_the_host_uses_is_not_released(hosts, tmp_path):
    one, two = hosts
    with one:
        stays, ends = embedded(tmp_path), embedded(tmp_path)
        assert submit(stays)[0] == submit(ends)[0] == 201
        ends.file.close()
    told = L.read_json(stays.owner._file(1))
    assert told["count"] and "released" not in told
    with one:
        stays.file.close()
    assert L.read_json(stays.owner._file(1))["released"] is True


def test_a_store_that_was_released_is_owned_again_by_the_next_process_of_the_host(hosts, tmp_path):
    one, two = hosts
    with one:
        store = embedded(tmp_path)
        submit(store)
        store.file.release()
        assert submit(store)[0] == 201 and store.owner.epoch == 1
    assert "released" not in L.read_json(store.owner._file(1))


@pytest.mark.slow
def test_commands_and_scripts_release_the_store_when_they_end(home):
    home.cli("task", "submit", "--", "--a=1")
    owner = home.folder / "journal.jsonl.owner-1"
    assert L.read_json(str(owner))["released"] is True
    home.python("import labtasker as L; L.submit_task(args={'a': 2}); assert 'released' not in L.read_json(%r)" % str(owner))
    assert L.read_json(str(owner))["released"] is True


def test_the_heartbeats_of_a_run_keep_the_store_for_their_host(hosts, tmp_path, monkeypatch):
    """They only read, and come from a process of their own."""
    one, two = hosts
    with one:
        store = embedded(tmp_path)
        submit(store)
        run, beats = begin_run(store), embedded(tmp_path)
    stop = threading.Event()

    def live():
        while not stop.wait(0.05):
            beats.beats.runs.show(run["run_id"])
            beats.owner.show()
    alive = threading.Thread(target=live)
    alive.start()
    try:
        with two:
            for _ in range(3):
                status, answer = submit(embedded(tmp_path))
                assert status == 503 and "belongs to" in answer["detail"]
    finally:
        stop.set()
        alive.join()


def test_a_heartbeat_moves_the_owners_counter(hosts, tmp_path):
    one, _ = hosts
    with one:
        store = embedded(tmp_path)
        submit(store)
        run, beats = begin_run(store), embedded(tmp_path)
        before, beats.owner.count = store.owner.read(1)["count"], 7  # in another process the pid would tell them apart
        ask(beats, "POST", "/api/v1/queues/me/tasks/%s/heartbeat" % run["task_id"], query={"run_id": run["run_id"]})
    assert store.owner.read(1)["count"] != before and store.owner.read(1)["server"] is False


def test_another_hosts_owner_and_a_server_are_never_written_over_by_who_only_shows_life(hosts, tmp_path):
    one, two = hosts
    with one:
        first = embedded(tmp_path)
        submit(first)
        first.file.release()
    with two:
        submit(embedded(tmp_path))
    before = L.read_json(first.owner._file(2))
    first.owner.moved_at = -1e9
    first.owner.show()
    assert L.read_json(first.owner._file(2)) == before and first.owner.epochs() == [2]


def test_a_host_that_is_watched_can_work_meanwhile(tmp_path, monkeypatch):
    """Where locks hold over hosts, as those of two containers on a machine do, the watcher's must not stop who is watched."""
    monkeypatch.setattr(L, "OWNER_LAPSE_S", 2.0)
    with Host("one", monkeypatch):
        first = embedded(tmp_path)
        assert submit(first)[0] == 201
    with Host("two", monkeypatch):
        second, results = embedded(tmp_path), []
    watcher = threading.Thread(target=lambda: results.append(submit(second)))
    watcher.start()
    with Host("one", monkeypatch):
        while watcher.is_alive():
            first.owner.moved_at = -1e9
            assert submit(first)[0] == 201
    watcher.join()
    assert results[0][0] == 503 and "belongs to" in results[0][1]["detail"]


def test_a_run_of_another_host_is_over_only_when_its_beats_stand_still_for_its_whole_timeout(hosts, tmp_path, monkeypatch):
    one, two = hosts
    with one:
        first = embedded(tmp_path)
        submit(first)
        run = begin_run(first)
        first.file.release()
    clock = Clock(monkeypatch)
    with two:
        second = embedded(tmp_path)
        for _ in range(5):  # it lives, and its clock may say anything
            second.look_for_timeouts(L.LocalName("default"))
            assert status_of(second, run) == "running"
            clock.shift_s += 29
            with one:
                L.BeatFiles(str(tmp_path)).write(run["run_id"], (5.0, 6.0 + clock.shift_s), 0)
        second.look_for_timeouts(L.LocalName("default"))
        for shift_s, status in ((29, "running"), (2, "pending")):
            clock.shift_s += shift_s
            second.look_for_timeouts(L.LocalName("default"))
            assert status_of(second, run) == status


def test_a_run_of_another_host_has_run_for_as_long_as_its_beats_say(hosts, tmp_path, monkeypatch):
    one, two = hosts
    with one:
        first = embedded(tmp_path)
        submit(first)
        run = begin_run(first, eta_max="100s")
        first.file.release()
        L.BeatFiles(str(tmp_path)).write(run["run_id"], (1e7, 1e7 + 99), 0)
    clock = Clock(monkeypatch)
    with two:
        second = embedded(tmp_path)
        second.look_for_timeouts(L.LocalName("default"))
        assert status_of(second, run) == "running"
        clock.shift_s += 2
        second.look_for_timeouts(L.LocalName("default"))
        assert status_of(second, run) == "pending"


def test_the_runs_of_an_owner_that_was_silent_are_over_at_once_and_those_that_beat_meanwhile_are_not(hosts, tmp_path, monkeypatch):
    one, two = hosts
    with one:
        first = embedded(tmp_path)
        submit(first), submit(first)
        dead, alive = begin_run(first), begin_run(first)
    watch = L.time.sleep

    def sleep(seconds):
        L.BeatFiles(str(tmp_path)).write(alive["run_id"], (1.0, L.monotonic()), 0)
        watch(seconds)
    with two:
        second = embedded(tmp_path)
        monkeypatch.setattr(L.time, "sleep", sleep)
        assert submit(second)[0] == 201
        second.look_for_timeouts(L.LocalName("default"))
        assert (status_of(second, dead), status_of(second, alive)) == ("pending", "running")


@pytest.mark.parametrize("text", ["nan nan", "inf inf", "5 4", "1 inf", "-inf 1", "1e400 1e400"])
def test_a_beat_file_with_times_that_can_not_be_is_that_of_a_run_which_is_not_known(tmp_path, text):
    (tmp_path / "beats").mkdir()
    (tmp_path / "beats" / "run").write_text("%s %s\n" % (L.host_id(), text))
    assert L.BeatFiles(str(tmp_path)).get("run") is None


def test_a_beat_file_is_closed_once_it_is_written(tmp_path, monkeypatch):
    beats, open_fd, close_fd, opened, closed = L.BeatFiles(str(tmp_path)), os.open, os.close, [], []

    def open_(path, *words):
        fd = open_fd(path, *words)
        opened.extend([fd] * path.endswith("/run"))
        return fd
    monkeypatch.setattr(L.os, "open", open_)
    monkeypatch.setattr(L.os, "close", lambda fd: closed.append(fd) or close_fd(fd))
    beats["run"] = (1.0, 2.0)
    assert opened and set(opened) <= set(closed)


def test_a_time_of_this_host_that_lies_ahead_is_watched_as_it_is_of_an_earlier_boot(tmp_path, monkeypatch):
    beats = L.BeatFiles(str(tmp_path))
    clock = Clock(monkeypatch)
    beats["run"] = (L.monotonic() + 1e6, L.monotonic() + 1e6)
    assert beats.get("run")[1] <= L.monotonic()
    clock.shift_s += 50
    assert L.monotonic() - beats.get("run")[1] >= 50


def test_nothing_is_left_of_the_runs_of_a_queue_that_is_deleted(tmp_path):
    store = embedded(tmp_path)
    submit(store), submit(store)
    begin_run(store), begin_run(store)
    assert len(os.listdir(str(tmp_path / "beats"))) == 2
    ask(store, "DELETE", "/api/v1/queues/me", query={"cascade_delete": "true"})
    assert os.listdir(str(tmp_path / "beats")) == []


def test_a_server_remembers_nothing_of_the_runs_of_a_queue_that_is_deleted(tmp_path):
    store = server(tmp_path)
    submit(store), submit(store)
    begin_run(store)
    store.look_for_timeouts()
    ask(store, "DELETE", "/api/v1/queues/me", query={"cascade_delete": "true"})
    assert store.beats.runs == {} and not store.timeouts_at
    store.file.close()


@pytest.mark.slow
def test_a_loop_with_long_jobs_keeps_its_store_and_its_runs_though_another_host_tries_to_work_there(home):
    if not harness.can_unshare():
        pytest.skip("a second host is simulated by a pid namespace, which can't be made here (unshare --pid)")
    other = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m", "labtasker")
    first, second = home.submit("--", "--n=1"), home.submit("--", "--n=2")
    loop = home.start_cli("loop", "--", "sh", "-c", "echo begins; until test -e gate; do sleep 0.05; done", "%(n)")
    wait_until(lambda: "begins" in loop.log_path.read_text(), "the job runs")
    until = time.monotonic() + 1.5 * L.OWNER_LAPSE_S

    def refused():
        run = harness.run(other + ("loop", "--", "true", "%(n)"), home.cwd, check=False)
        assert run.returncode != 0 and "belongs to" in run.stderr, run
        return time.monotonic() > until
    wait_until(refused, "the other host was refused for longer than a silent owner is waited for", timeout_s=60)
    home.write("gate", "")
    wait_until(lambda: loop.poll() is not None, "the loop ends", timeout_s=40)
    assert {key: (task["status"], task["retries"], len(task["attempts"])) for key, task in (
        (task["task_id"], task) for task in home.tasks())} == dict.fromkeys((first, second), ("success", 0, 1))
    run = harness.run(other + ("task", "submit", "--", "--n=3"), home.cwd)
    assert run.returncode == 0 and len(home.tasks()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the folder is gone", "another file is in its place", "another owner took over", "the owner file is gone"])
def test_a_server_that_can_not_write_to_its_store_any_more_says_so_and_ends_with_1(tmp_path, what):
    folder = tmp_path / "store"
    with harness.Server(folder) as running:
        if what == "the folder is gone":
            folder.rename(tmp_path / "gone")
            running.log = tmp_path / "gone" / "server.log"
        elif what == "another file is in its place":
            (folder / "copy").write_bytes(running.journal.read_bytes())
            (folder / "copy").rename(running.journal)
        elif what == "another owner took over":
            (folder / "journal.jsonl.owner-2").write_text(json.dumps({"host_id": "elsewhere", "count": "1"}))
        else:
            (folder / "journal.jsonl.owner-1").unlink()
        try:
            status, told, _ = running.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})
            assert status == 503 and running.http("GET", "/health/full")[1]["status"] == "unhealthy", told
        except OSError:  # it has seen it and ended
            pass
        assert running.process.wait(30) == 1
        log = running.log.read_text()
        assert "ERROR" in log.upper() and "stopped: " in log and str(folder) in log, log


@pytest.mark.slow
def test_a_server_whose_folder_is_away_for_a_moment_says_so_and_goes_on(tmp_path):
    folder, away = tmp_path / "store", tmp_path / "away"
    with harness.Server(folder) as running:
        folder.rename(away)
        assert running.http("GET", "/health/full")[1]["status"] == "unhealthy"
        assert running.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})[0] == 503
        away.rename(folder)
        assert running.http("GET", "/health/full")[1] == {"status": "healthy", "database": "connected"}
        assert running.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})[0] == 201


def test_a_host_that_lost_its_store_while_it_was_silent_reports_once_the_other_is_done(hosts, tmp_path, monkeypatch):
    one, two = hosts
    with one:
        first = embedded(tmp_path)
        submit(first)
        run = begin_run(first, heartbeat_timeout=3600.0)
    report = {"status": "success", "run_id": run["run_id"], "summary": {"acc": 1}}
    path = "/api/v1/queues/me/tasks/%s/status" % run["task_id"]
    with two:
        second = embedded(tmp_path)
        assert submit(second)[0] == 201
        living = threading.Event()

    def live():
        while not living.wait(0.02):
            second.owner.moved_at = -1e9
            second.owner.move()
    alive = threading.Thread(target=live)
    alive.start()
    with one:
        status, answer = L.answer_call(first, lambda: L.LocalName("default"), "POST", path, report)
    living.set()
    alive.join()
    assert status == 503 and "belongs to" in answer["detail"]
    with two:
        second.file.close()
    with one:
        ask(first, "POST", path, report)
        assert status_of(first, run) == "success"


# Names, owners and modes of files; stores that may only be read.


@pytest.mark.parametrize("there", [True, False], ids=["with a journal", "to nothing yet"])
def test_a_journal_behind_a_symbolic_link_stays_there_and_shares_its_lock_with_every_link(tmp_path, there):
    for name in ("one", "two", "scratch"):
        (tmp_path / name).mkdir()
    target = tmp_path / "scratch" / "kept.jsonl"
    if there:
        put(L.Store(str(target)), 0)
    for name in ("one", "two"):
        (tmp_path / name / "journal.jsonl").symlink_to("../scratch/kept.jsonl")
    one, two = (L.Store(str(tmp_path / name / "journal.jsonl")) for name in ("one", "two"))
    put(one, 1)
    put(two, 2)
    L.compact(one.path)
    two.journal.writer.broken = "a sync failed"
    put(two, 3)
    wanted = [0] * there + [1, 2, 3]
    assert held(one) == held(two) == held(L.Store(str(target))) == wanted
    assert all(os.readlink(store.path) == "../scratch/kept.jsonl" for store in (one, two)) and not target.is_symlink()
    assert not [name for name in os.listdir(str(tmp_path / "one")) if name.endswith(".lock")]


def test_a_configuration_behind_a_symbolic_link_stays_there_and_is_never_for_everybody(tmp_path):
    (tmp_path / "dotfiles.toml").write_text("")
    os.chmod(str(tmp_path / "dotfiles.toml"), 0o644)
    (tmp_path / "config.toml").symlink_to("dotfiles.toml")
    L.write_config(str(tmp_path), "http://127.0.0.1:9", "q", "secret")
    assert (tmp_path / "config.toml").is_symlink() and "secret" in (tmp_path / "dotfiles.toml").read_text()
    assert os.stat(str(tmp_path / "dotfiles.toml")).st_mode & 0o777 == 0o640


def test_a_link_to_what_is_no_file_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "server.json").symlink_to(device(tmp_path))
    L.Disk.create(str(tmp_path / "server.json"), [b"{}"], keep=0o7777)
    assert (tmp_path / "server.json").read_bytes() == b"{}" and not (tmp_path / "server.json").is_symlink()


def test_the_journals_mode_survives_its_replacement_and_its_lock_files_have_it_too(tmp_path):
    store = L.Store(str(tmp_path / "journal.jsonl"))
    put(store, 1)
    os.chmod(store.path, 0o660)
    L.compact(store.path)
    store.journal.writer.broken = "a sync failed"
    put(store, 2)
    assert os.stat(store.path).st_mode & 0o777 == os.stat(store.path + ".compact").st_mode & 0o777 == 0o660


def test_a_file_that_can_not_keep_its_owner_is_left_as_it_is(tmp_path, monkeypatch):
    store = L.Store(str(tmp_path / "journal.jsonl"))
    put(store, 1)
    content = (tmp_path / "journal.jsonl").read_bytes()
    real = os.stat

    def stat(path, **options):
        found = real(path, **options)
        return os.stat_result(found[:4] + (found.st_uid + (path == store.path), found.st_gid) + found[6:])

    def chown(*_):
        raise PermissionError(1, "Operation not permitted")
    draft = L.Disk.draft(store.path, [b"other"])
    with monkeypatch.context() as patched:
        patched.setattr(L.os, "stat", stat)
        patched.setattr(L.os, "chown", chown)
        with pytest.raises(PermissionError):
            L.Disk.replace(draft, store.path)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


def test_the_names_of_new_folders_are_on_disk_before_a_task_is_acknowledged(tmp_path, monkeypatch):
    synced = []
    real = L.Disk.sync_folder
    monkeypatch.setattr(L.Disk, "sync_folder", classmethod(lambda cls, path: synced.append(os.path.dirname(path)) or real(path)))
    put(L.Store(str(tmp_path / "a" / "b" / ".labtasker" / "journal.jsonl")), 1)
    assert {str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path / "a" / "b" / ".labtasker")} <= set(synced)
    (tmp_path / "made by one that died").mkdir()
    put(L.Store(str(tmp_path / "made by one that died" / "journal.jsonl")), 1)
    assert str(tmp_path) in synced


def test_a_store_that_may_only_be_read_is_read_and_said_to_be_so_and_is_written_again_when_it_may(tmp_path, monkeypatch):
    put(L.Store(str(tmp_path / "journal.jsonl")), 1)
    with open(str(tmp_path / "journal.jsonl"), "ab") as file:
        file.write(b'{"n":9,"half')
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(str(tmp_path))}
    real_open, real_access, refused = os.open, os.access, [True]

    def read_only(path, flags, *mode, **more):
        if refused[0] and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system", path)
        return real_open(path, flags, *mode, **more)
    monkeypatch.setattr(L.os, "open", read_only)
    monkeypatch.setattr(L.Disk, "open", staticmethod(read_only))
    monkeypatch.setattr(L.os, "access", lambda path, mode: real_access(path, mode) and not (refused[0] and mode & os.W_OK))
    store = L.Store(str(tmp_path / "journal.jsonl"))
    for _ in range(2):
        assert held(store) == [1]
        assert submit(store)[0] == 503
    health = L.answer_call(store, None, "GET", "/health/full")[1]
    assert health["status"] == "unhealthy" and "only read it" in health["database"]
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(str(tmp_path))} == before
    refused[0] = False
    put(store, 2)
    assert held(store) == held(L.Store(store.path)) == [1, 2]


# What a process does when it takes the store, replaces its file, or finds it replaced


def open_files(folder):
    """Return how many descriptors this process has of files in a folder, also of files that were removed."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).startswith(str(folder)) for link in links)


@pytest.mark.parametrize("fails", ["open", "flock"])
def test_where_an_owner_file_can_not_be_locked_the_store_works_and_no_descriptor_is_left_open(tmp_path, monkeypatch, fails):
    store = embedded(tmp_path)
    put(store, 1)
    store.file.close()
    flock, before = L.fcntl.flock, open_files(tmp_path)

    def refused(fd, kind):
        if kind & L.fcntl.LOCK_SH:
            raise OSError(37, "No locks available")
        flock(fd, kind)
    monkeypatch.setattr(L.fcntl, "flock", refused)
    owner = L.Owner(store.path, False)
    owner.epoch = 1 if fails == "flock" else 9
    owner._use()
    assert owner.used == (None, None) and open_files(tmp_path) == before
    put(store, 2)
    assert held(store) == [1, 2]
    store.file.close()


def test_an_owner_moves_its_counter_well_before_it_counts_as_silent_and_no_more_once_it_has_released(tmp_path, monkeypatch):
    clock, store = Clock(monkeypatch), server(tmp_path)
    path, counts, before = store.owner._file(1), [store.owner.read(1)["count"]], open_files(tmp_path)
    for _ in range(3):
        clock.shift_s += L.OWNER_LAPSE_S / 3
        store.owner.move()
        counts.append(L.read_json(path)["count"])
    assert len(set(counts)) == 4 and open_files(tmp_path) == before
    store.file.close()
    clock.shift_s += L.OWNER_LAPSE_S
    store.owner.move()
    assert L.read_json(path)["released"] is True


def test_a_server_puts_the_name_of_a_journal_on_disk_whose_maker_died_before_that(tmp_path, monkeypatch):
    L.JournalFile(str(tmp_path / "journal.jsonl")).open()
    synced, real = [], L.Disk.sync_folder
    monkeypatch.setattr(L.Disk, "sync_folder", classmethod(lambda cls, path: synced.append(path) or real(path)))
    store = server(tmp_path)
    assert store.path in synced and store.journal.file.named == os.stat(store.path).st_ino
    store.file.close()


def test_a_lock_file_that_somebody_removed_is_made_and_locked_again(tmp_path):
    store = embedded(tmp_path)
    put(store, 1)
    lock = tmp_path / "journal.jsonl.lock"
    lock.unlink()
    other = L.FileLock(str(lock))
    assert store.file.with_file_lock(lambda: other.acquire(0)) is False
    assert other.acquire(0)
    other.close()
    store.file.close()


@pytest.mark.parametrize("lives", [False, True])
@pytest.mark.parametrize("is_server", [False, True])
def test_only_a_process_that_finds_a_server_does_not_wait_for_the_lock(tmp_path, lives, is_server):
    """A server waits for another one too: that may be about to end."""
    store, waits_s = L.Store(str(tmp_path / "journal.jsonl"), is_server), []
    if lives:
        L.write_json(str(tmp_path / "server.json"), {"host_id": L.host_id(), "pid": os.getpid()})
    store.file.file_lock.acquire = lambda timeout_s: waits_s.append(timeout_s) or len(waits_s) == 2
    if lives and not is_server:
        with pytest.raises(L.StoreUnavailable, match="a server on"):
            store.file.lock_file(30)
    else:
        store.file.lock_file(30)
    assert waits_s == [1, 29][:1 if lives and not is_server else 2]


def test_only_who_knows_of_no_other_user_is_the_last_one(tmp_path):
    with open(str(tmp_path / "owner"), "wb") as file:
        for is_server, used, is_last in ((True, (None, None), True), (False, (None, None), False),
                                         (False, (file.fileno(), os.getpid() + 1), False), (False, (file.fileno(), os.getpid()), True)):
            owner = L.Owner(str(tmp_path / "journal.jsonl"), is_server)
            owner.used = used
            assert owner.is_last() is is_last
            owner.used = None, None


def test_a_forked_process_leaves_the_descriptor_of_its_parents_lock_alone(tmp_path):
    with open(str(tmp_path / "owner"), "wb") as file:
        owner = L.Owner(str(tmp_path / "journal.jsonl"), False)
        owner.used = file.fileno(), os.getpid() + 1
        owner._drop_use()
        assert owner.used == (None, None) and os.fstat(file.fileno())


def test_a_store_that_was_released_can_be_locked_by_others(tmp_path):
    store, other = embedded(tmp_path), L.FileLock(str(tmp_path / "journal.jsonl.lock"))
    put(store, 1)
    store.file.release()
    assert other.acquire(0)
    other.close()
    store.file.close()


def test_a_server_that_closes_writes_what_it_could_not_sync_before(tmp_path):
    store = server(tmp_path)
    store.journal.writer.broken = "a sync failed"
    store.file._add_line(owner="last")
    store.file.close()
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line.get("owner") for line in lines[-2:]] == ["last", None] and lines[-1]["end"] is True


def test_a_process_that_may_write_reads_with_the_lock_held(tmp_path):
    put(embedded(tmp_path), 1)
    store, other = embedded(tmp_path), L.FileLock(str(tmp_path / "journal.jsonl.lock"))
    assert store.file.with_file_lock(lambda: other.acquire(0), writes=False) is False
    other.close()
    store.file.close()


def test_a_process_with_the_number_of_a_server_that_died_keeps_nobody_out(tmp_path):
    dead = {"host_id": L.host_id(), "server": True, "pid": os.getppid(), "started": "before"}
    (tmp_path / "journal.jsonl.owner-1").write_text(json.dumps(dead))
    store = server(tmp_path)
    assert store.owner.epoch == 2
    store.file.close()


def test_an_owner_file_appears_with_all_that_it_says(tmp_path, monkeypatch):
    linked, link = [], os.link
    monkeypatch.setattr(L.os, "link", lambda draft, path: linked.append(L.read_json(draft)) or link(draft, path))
    store = server(tmp_path)
    assert [content["pid"] for content in linked] == [os.getpid()]
    store.file.close()


def test_a_server_does_not_look_for_problems_while_it_writes(tmp_path):
    store = server(tmp_path)
    assert store.file.problem() is None
    with store.journal.writer.io:
        assert store.file.problem() is None and store.journal.writer.io.locked()
    store.file.close()


def test_a_queue_is_open_to_those_who_still_know_it(tmp_path):
    store = embedded(tmp_path)
    put(store, 1)
    queue_id, = store.state.queues
    for caller, asks_for, is_open in ((L.CallerQueueId(queue_id, None), queue_id, True), (L.CallerQueueId(queue_id, "old"), queue_id, False),
                                      (L.CallerQueueId("gone", "x"), "gone", False), (L.LocalName("default"), queue_id, True),
                                      (L.LocalName("other"), queue_id, False), (L.LocalName("default"), "gone", False)):
        assert store.is_open_to(caller, asks_for) is is_open, (caller, asks_for)
    store.file.close()


def test_a_repair_that_is_refused_leaves_the_store_unlocked(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(L.sealed({"journal": "labtasker", "format": L.FORMAT + 1}))
    with pytest.raises(L.StoreDamaged) as refused:
        L.repair_store(str(tmp_path / "journal.jsonl"))
    other = L.FileLock(str(tmp_path / "journal.jsonl.lock"))
    assert other.acquire(0), refused
    other.close()


def test_a_run_reports_into_no_other_store_that_lies_where_its_own_was(tmp_path):
    store = embedded(tmp_path)
    put(store, 1)
    store.file.expected = store.journal.file.header["store"]
    store.file.check_expected()
    L.compact(store.path)  # another file, the same store
    store.file.check_expected()
    os.rename(store.path, store.path + ".away")
    with pytest.raises(L.StoreUnavailable, match="is not there"):
        store.file.check_expected()
    L.JournalFile(store.path).open()
    with pytest.raises(L.StoreUnavailable, match="another store"):
        store.file.check_expected()
    os.rename(store.path + ".away", store.path)
    store.file.check_expected()
    store.file.close()


def test_a_server_waits_no_longer_than_it_was_asked_to(tmp_path):
    store, asked = server(tmp_path), []

    def is_there():
        asked.append(1)
        assert len(asked) < 100, "it goes on waiting"
    store.wait_for(is_there, 0.01)
    assert asked
    store.file.close()


def test_a_compaction_closes_what_it_opened(tmp_path):
    store = embedded(tmp_path)
    put(store, *range(5))
    before = open_files(tmp_path)
    store.compact()
    assert open_files(tmp_path) == before and held(store) == list(range(5))
    store.file.close()


def test_folded_records_do_not_name_their_queue_again(tmp_path):
    store = embedded(tmp_path)
    put(store, 1)
    begin_run(store)
    put(store, 2)  # what is before it is on disk, and will be folded
    L.compact(store.path)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    queue, worker, task = [change for line in lines if "fold" in line for change in line["changes"]]
    assert (queue[0], worker[0], task[0]) == ("queue", "worker", "task") and "queue_id" in queue[1]
    assert "queue_id" not in worker[2] and "queue_id" not in task[2]
    store.file.close()


@pytest.mark.parametrize("keeps_it", [True, False])
def test_a_line_whose_sync_failed_counts_if_and_only_if_another_process_has_put_it_into_a_new_file(tmp_path, keeps_it):
    store, other = embedded(tmp_path), embedded(tmp_path)
    put(store, 1)
    before = (tmp_path / "journal.jsonl").read_bytes()

    def sync(fd):
        store.journal.disk = L.Disk
        if keeps_it:
            other.compact()
        else:
            renamed(store.path, before)
            put(other, 7)
        raise OSError(5, "Input/output error")
    store.journal.disk = type("Failing", (L.Disk,), {"sync": staticmethod(sync)})
    if keeps_it:
        put(store, 2)
    else:
        assert submit(store)[0] == 503
    assert held(store) == held(other) == ([1, 2] if keeps_it else [1, 7])
    put(store, 3)
    assert held(store) == held(embedded(tmp_path)) == ([1, 2, 3] if keeps_it else [1, 3, 7])
    for one in (store, other):
        one.file.close()
