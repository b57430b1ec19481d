"""Section 4: lines, opening, healing, failing disks, group commit."""
import errno
import json
import os
import stat
import threading
import types

import pytest

import labtasker as L


def journal(folder, **options):
    made = L.Journal(str(folder / "journal.jsonl"), threading.RLock(), **options)
    made.file.open()
    return made


def add(made, values, undone=None):
    """Append lines with these values, one batch each, and return the batches."""
    batches = []
    for value in values:
        batches.append(made.add(json.dumps({"value": value}).encode(), lambda value=value: undone.append(value)))
        made.flush()
    return batches


def read(folder):
    made = journal(folder)
    values = [line.get("value") for line in made.file.read_new() if "end" not in line]
    made.close()
    return values, made.file


def test_lines_are_read_back_in_order(tmp_path):
    made = journal(tmp_path)
    for batch in add(made, ["a", "\u00e9\ud800\n", {"x": float("inf")}, None]):
        made.wait(batch)
    made.close(clean=True)
    assert read(tmp_path)[0] == ["a", "\u00e9\ud800\n", {"x": float("inf")}, None]


def test_the_first_line_names_the_format_and_lines_count_without_gaps(tmp_path):
    made = journal(tmp_path)
    add(made, range(5))
    made.close()
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert lines[0]["journal"] == "labtasker" and lines[0]["format"] == L.FORMAT
    assert [line["n"] for line in lines[1:]] == [1, 2, 3, 4, 5]
    assert [line["durable"] for line in lines[1:]] == [0, 1, 2, 3, 4]


def test_the_file_is_for_its_owner_alone(tmp_path):
    journal(tmp_path).close()
    assert os.stat(str(tmp_path / "journal.jsonl")).st_mode & 0o777 == 0o600


def test_a_file_cut_at_any_byte_gives_the_lines_before_it(tmp_path):
    made = journal(tmp_path)
    add(made, ["one", "two", "three"])
    made.close()
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in range(header, len(whole) + 1):
        path.write_bytes(whole[:cut])
        values, opened = read(tmp_path)
        assert values == ["one", "two", "three"][:sum(1 for end in ends[1:] if end <= cut)]
        assert bool(opened.notices) == (cut not in ends)
        for aside in tmp_path.glob("*.torn-*"):
            assert aside.read_bytes() == whole[max(end for end in ends if end <= cut):cut]
            aside.unlink()


@pytest.mark.parametrize("tail", ["zeros", "a line's beginning, then zeros", "letters", "zeros, then a newline", "a newline read first"])
@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_RDWR | os.O_APPEND])
def test_a_long_end_without_a_newline_is_read_twice_at_most_and_never_held_as_a_whole(tmp_path, monkeypatch, tail, mode):
    made = journal(tmp_path)
    add(made, ["one", "two"])
    size, length, header = os.stat(made.path).st_size, 1 << 20, len(L._header_line(made.file.fd))
    made.close()
    content = {"zeros": b"", "a line's beginning, then zeros": b'{"n":3,"durable":2,', "letters": b"x" * length,
               "zeros, then a newline": b"\0" * (length - 1) + b"\n",
               "a newline read first": b"\0" * (length // 2 - size + header) + b"\n"}[tail].ljust(length, b"\0")
    with open(made.path, "ab") as file:
        file.write(content)
    monkeypatch.setattr(L, "READ_BYTES", 4096)
    read_bytes, largest, real = [], [], os.pread

    def pread(fd, count, offset):
        found = real(fd, count, offset)
        read_bytes.append(len(found))
        return found
    monkeypatch.setattr(L.os, "pread", pread)
    scanned = L._durable_in
    monkeypatch.setattr(L, "_durable_in", lambda data: largest.append(len(data)) or scanned(data))
    opened = L.JournalFile(made.path, threading.RLock())
    opened.mode = mode
    opened.open()
    assert [line["value"] for line in opened.read_new()] == ["one", "two"]
    assert sum(read_bytes) < 3.2 * length + 100000 and max(read_bytes) <= L.HEADER_BYTES
    assert max(largest, default=0) < 10000
    assert os.stat(made.path).st_size == (size + length if mode == os.O_RDONLY else size)
    assert opened.is_stale() is False
    opened.close()


def test_a_durable_line_is_found_behind_any_stretch_of_zeros(monkeypatch):
    line = L.sealed({"n": 9, "durable": 7, "text": '{"n":5' * 3})
    whole = b"ab" + b"\0" * 50 + line + b"\0" * 30 + b"\n" + b'{"n":1,' + line[:-3] + b"\n{"
    for size in (1, 2, 3, 7, 64, 1000):
        assert L.last_durable(whole[at:at + size] for at in range(0, len(whole), size)) == 7
        assert L.last_durable(whole[at:at + size] for at in range(len(line), len(whole), size)) == 0


def test_rot_in_what_was_acknowledged_is_refused_with_its_place_and_nothing_changes(tmp_path):
    made = journal(tmp_path)
    add(made, ["one", "two", "three"])
    made.close()
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"two")
    path.write_bytes(whole[:second] + b"tvo" + whole[second + 3:])
    with pytest.raises(L.StoreDamaged, match=r"journal\.jsonl: byte %d: line 2 " % (whole.rindex(b"\n", 0, second) + 1)):
        read(tmp_path)
    assert path.read_bytes() == whole[:second] + b"tvo" + whole[second + 3:]
    assert os.listdir(str(tmp_path)) == ["journal.jsonl"]


@pytest.mark.slow
def test_every_flipped_bit_is_found(tmp_path):
    made = journal(tmp_path)
    add(made, ["one", "two"])
    made.close(clean=True)
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1:])
            try:
                values, opened = read(tmp_path)
            except L.StoreDamaged:
                continue
            assert opened.notices and values == ["one", "two"][:len(values)], (at, bit)
            for aside in tmp_path.glob("*.torn-*"):
                aside.unlink()


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(L.seal(json.dumps({"journal": "labtasker", "format": L.FORMAT + 1})[:-1].encode()))
    with pytest.raises(L.StoreDamaged, match="newer Labtasker"):
        journal(tmp_path)


@pytest.mark.parametrize("content", [b"hello\n", b"\xef\xbb\xbf{}\n", b"{}\r\n", b"\0" * 4096, b"x"])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(L.StoreDamaged, match="byte 0"):
        journal(tmp_path)
    assert path.read_bytes() == content


class FailingDisk(L.Disk):
    """Fails the k-th call of `name` from now on with `number`, `times` times."""

    @classmethod
    def fail(cls, name, k, number, times=1):
        real, calls = getattr(L.Disk, name), [0]

        def call(*args):
            calls[0] += 1
            if k <= calls[0] < k + times:
                raise OSError(number, os.strerror(number))
            return real(*args)
        return type("Failing", (cls,), {name: staticmethod(call)})


@pytest.mark.parametrize("name", ["write", "sync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize("times", [1, 3])
def test_a_failing_disk_loses_nothing_acknowledged(tmp_path, name, number, k, times):
    made, undone, kept = journal(tmp_path), [], []
    made.file.disk = FailingDisk.fail(name, k, number, times)
    for value in range(8):
        try:
            batch = add(made, [value], undone)[0]
            made.wait(batch)
            kept.append(value)
        except L.StoreUnavailable as error:
            assert isinstance(error, L.StoreFull) == (number in (errno.ENOSPC, errno.EDQUOT))
            assert error.status == (507 if isinstance(error, L.StoreFull) else 503)
            assert str(tmp_path) in str(error)
    made.close()
    assert len(kept) < 8 and 7 in kept
    assert not set(undone) & set(kept)
    values, opened = read(tmp_path)
    assert values == kept and not opened.notices


def test_short_writes_are_continued(tmp_path):
    made = journal(tmp_path)
    made.file.disk = type("Short", (L.Disk,), {"write": staticmethod(lambda fd, data: os.write(fd, bytes(data[:7])))})
    for batch in add(made, ["one", "two"]):
        made.wait(batch)
    made.close()
    assert read(tmp_path)[0] == ["one", "two"]


def test_after_a_failed_sync_the_file_is_written_anew(tmp_path):
    made, undone = journal(tmp_path), []
    add(made, ["good"])
    inode = os.stat(made.path).st_ino
    made.file.disk = FailingDisk.fail("sync", 1, errno.EIO)
    with pytest.raises(L.StoreUnavailable):
        made.wait(add(made, ["bad"], undone)[0])
    assert undone == ["bad"]
    assert os.stat(made.path).st_ino != inode and not made.broken  # at once, as another process may write next
    made.wait(add(made, ["good again"])[0])
    made.close()
    assert read(tmp_path)[0] == ["good", "good again"]


def test_a_writer_that_finds_another_ones_bytes_stops(tmp_path):
    made, other = journal(tmp_path), journal(tmp_path)
    made.wait(add(made, ["one"])[0])
    with pytest.raises(L.StoreUnavailable, match="another writer"):
        other.wait(add(other, ["two"], [])[0])
    with pytest.raises(L.StoreUnavailable, match="another writer"):
        other.add(b"{}", None)
    assert read(tmp_path)[0] == ["one"]


def test_threads_share_syncs_and_each_knows_when_its_own_line_is_down(tmp_path):
    made, syncs = journal(tmp_path), []

    def slow_sync(fd):
        syncs.append(fd)
        os.fsync(fd)
    made.file.disk = type("Counting", (L.Disk,), {"sync": staticmethod(slow_sync)})

    def work(k):
        for i in range(50):
            with made.lock:
                batch = made.add(json.dumps({"value": [k, i]}).encode(), None)
            made.wait(batch)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    values = read(tmp_path)[0]
    assert sorted(values) == sorted([k, i] for k in range(8) for i in range(50))
    for k in range(8):
        assert [i for who, i in values if who == k] == list(range(50))
    assert len(syncs) < 400


class NotedDisk(L.Disk):
    """Notes in `calls` what was synced, "folder" or the inode of a file, and each ("write", inode)."""

    @classmethod
    def noting(cls):
        calls = []

        def sync(fd):
            kind = os.fstat(fd)
            calls.append("folder" if stat.S_ISDIR(kind.st_mode) else kind.st_ino)

        def write(fd, data):
            calls.append(("write", os.fstat(fd).st_ino))
            return os.write(fd, data)
        return type("Noted", (cls,), {"sync": staticmethod(sync), "write": staticmethod(write), "calls": calls})


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_is_on_disk_before_its_name_is_and_not_synced_where_it_may_be_lost(tmp_path, synced):
    disk, path = NotedDisk.noting(), str(tmp_path / "x.json")
    disk.rename = staticmethod(lambda source, target: disk.calls.append("rename") or os.replace(source, target))
    disk.create(path, [b"{}"], synced)
    inode = os.stat(path).st_ino
    assert disk.calls == [("write", inode)] + [inode] * synced + ["rename"] + ["folder"] * synced


def test_a_file_that_can_not_be_put_in_its_place_leaves_no_draft(tmp_path):
    with pytest.raises(OSError):
        FailingDisk.fail("rename", 1, errno.EIO).create(str(tmp_path / "x.json"), [b"{}"])
    assert os.listdir(str(tmp_path)) == []


def test_a_json_file_may_have_as_many_bytes_as_are_allowed_and_not_one_more(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert L.load_json(str(tmp_path / "x.json"), None, (), 8) == {"a": 1}
    with pytest.raises(L.OddFile, match="over 7 bytes"):
        L.load_json(str(tmp_path / "x.json"), None, (), 7)


def test_each_line_gives_one_value_also_beside_one_that_holds_two():
    good, two = L.sealed({"n": 1})[:-1], L.seal(b'{"n":2},{"n":3')[:-1]
    assert [value["n"] for value in L._unseal_all([good, two, good])] == [1, 2, 1]


def numbered(folder, *numbers):
    """Make a journal of an empty one's header and lines with these numbers, which say nothing of the disk."""
    made = journal(folder)
    made.close()
    with open(made.path, "ab") as file:
        file.write(b"".join(L.sealed({"n": n, "durable": 0, "value": n}) for n in numbers))


@pytest.mark.parametrize("numbers", [(1, 2, 4), (1, 2, 2, 3), (1, 2, 1), (1, 2, None, 3)])
def test_reading_ends_at_a_line_that_is_not_the_next_one(tmp_path, numbers):
    numbered(tmp_path, *numbers)
    assert read(tmp_path)[0] == [1, 2]
    assert len(list(tmp_path.glob("*.torn-*"))) == 1


def test_damage_where_a_piece_begins_to_be_read_is_set_aside_and_synced_before_the_journal_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(L, "READ_BYTES", 64)
    made = journal(tmp_path, disk=NotedDisk.noting())
    with open(made.path, "ab") as file:
        file.write(b"no line of ours\n")
    made.disk.calls.clear()
    assert list(made.file.read_new()) == [] and made.file.notices
    aside, = tmp_path.glob("*.torn-*")
    inode = os.stat(str(aside)).st_ino
    assert aside.read_bytes() == b"no line of ours\n"
    assert made.disk.calls == [("write", inode), inode, "folder", made.file.inode]
    made.close()


def test_a_file_is_written_as_it_is_however_many_pieces_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(L, "READ_BYTES", 5)
    L.Disk.create(str(tmp_path / "x"), [b"abc", b"def", b"", b"ghi", b"jklmnopq", b"r"])
    assert (tmp_path / "x").read_bytes() == b"abcdefghijklmnopqr"


@pytest.mark.parametrize("mode, syncs", [("always", 2), ("interval", 0), ("never", 0)])
def test_lines_that_a_dead_process_left_are_synced_once_before_others_are_written_behind_them(tmp_path, mode, syncs):
    numbered(tmp_path, 1, 2)
    made = journal(tmp_path, fsync=mode, disk=NotedDisk.noting())
    made.writer.synced_at = L.monotonic() + 99
    assert len(list(made.file.read_new())) == 2
    inode = made.file.inode
    add(made, ["new"])
    assert made.disk.calls == [inode] * (syncs // 2) + [("write", inode)] + [inode] * (syncs // 2)
    add(made, ["newer"])
    assert made.disk.calls[syncs + 1:] == [("write", inode)] + [inode] * (syncs // 2)
    made.close()
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["durable"] for line in lines[3:]] == ([2, 3] if syncs else [0, 0])


@pytest.mark.parametrize("mode, age_s, is_synced", [("always", -99, True), ("interval", -99, False), ("interval", 2, True),
                                                    ("never", 2, False)])
def test_a_write_is_synced_as_its_mode_says(tmp_path, mode, age_s, is_synced):
    made = journal(tmp_path, fsync=mode, disk=NotedDisk.noting())
    made.disk.calls.clear()
    made.writer.synced_at = L.monotonic() - age_s  # when the last sync was
    add(made, ["one"])
    assert made.disk.calls == [("write", made.file.inode)] + [made.file.inode] * is_synced
    assert made.file.durable == is_synced
    made.close()


@pytest.mark.parametrize("mode, state, is_synced", [("interval", None, True), ("interval", "broken", False), ("interval", "fenced", False),
                                                    ("never", None, False)])
def test_what_was_only_written_is_synced_later_unless_the_file_may_not_be_touched(tmp_path, mode, state, is_synced):
    made = journal(tmp_path, fsync=mode, disk=NotedDisk.noting())
    made.writer.synced_at = L.monotonic() + 99
    add(made, ["one"])
    made.disk.calls.clear()
    if state:
        setattr(made.writer, state, "why")
    for _ in range(2):
        made.settle()
    assert made.disk.calls == [made.file.inode] * is_synced and made.file.durable == is_synced
    made.close()


def test_each_line_of_a_batch_learns_its_number(tmp_path):
    made, numbers = journal(tmp_path), []
    for _ in range(3):
        made.add(b'{"value":1}', None, numbers.append)
    made.flush()
    assert numbers == [1, 2, 3]
    made.close()


def test_a_file_that_could_not_be_synced_is_never_synced_or_written_to_again(tmp_path):
    numbered(tmp_path, 1, 2)  # not on disk: so there is a sync before the first write
    made = journal(tmp_path, disk=NotedDisk.noting())
    assert len(list(made.file.read_new())) == 2
    old, works = made.file.inode, made.disk.sync
    made.disk.sync = staticmethod(FailingDisk.fail("sync", 1, errno.EIO, 9).sync)
    with pytest.raises(L.StoreUnavailable):
        made.wait(add(made, ["bad"], [])[0])
    assert made.broken
    made.disk.sync = staticmethod(works)
    made.disk.calls.clear()
    made.wait(add(made, ["good"])[0])
    assert made.disk.calls and old not in made.disk.calls and ("write", old) not in made.disk.calls
    assert made.file.inode != old
    made.close()
    assert read(tmp_path)[0] == [1, 2, "good"]


def test_a_process_that_loses_the_store_right_after_it_replaced_the_file_writes_no_more(tmp_path):
    made, asked = journal(tmp_path), []
    add(made, ["one"])
    made.writer.is_owned = lambda: asked.append("") or len(asked) < 3  # before the copy, before the rename, after it
    with pytest.raises(L.StoreUnavailable, match="got another owner"):
        made.writer.rewrite()
    with pytest.raises(L.StoreUnavailable, match="got another owner"):
        made.add(b"{}")
    made.close()
    assert read(tmp_path)[0] == ["one"]


def test_processes_that_share_a_file_sync_once_after_the_lock_is_released(tmp_path):
    numbered(tmp_path, 1, 2)
    lock = L.FileLock(str(tmp_path / "journal.jsonl.lock"))
    made = journal(tmp_path, disk=NotedDisk.noting(), shared=lock)
    made.disk.calls.clear()
    lock.release = lambda: made.disk.calls.append("release")
    assert len(list(made.file.read_new())) == 2
    add(made, ["new"])
    assert made.disk.calls == [("write", made.file.inode), "release", made.file.inode]
    made.close()


def test_a_clean_close_says_that_all_is_on_disk_and_each_closes_the_file(tmp_path):
    for clean, last in ((False, {"n": 1}), (True, {"n": 2, "durable": 1, "end": True})):
        made = journal(tmp_path)
        list(made.file.read_new())
        if made.file.n == 0:
            add(made, ["one"])
        made.close(clean)
        assert made.file.fd is None
        assert last.items() <= json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1]).items()
        made.close(clean)


# What a newer version wrote.


def call(store, method, path, body=None):
    return L.answer_call(store, lambda: L.LocalName("default"), method, ("/api/v1/queues/me/" + path).rstrip("/"), body)


def newer_journal(folder, change):
    """Return a Store on a journal in which a newer version wrote what `change(its lines as dicts)` does to them."""
    store = L.Store(str(folder / "journal.jsonl"))
    assert call(store, "POST", "tasks", {"task_id": "t", "args": {"a": 1}})[0] == 201
    assert call(store, "POST", "workers", {"worker_name": "w"})[0] == 201
    path = folder / "journal.jsonl"
    lines = [json.loads(line.decode()) for line in path.read_bytes().splitlines()]
    change(lines)
    path.write_bytes(b"".join(L.sealed(line) for line in lines))
    return L.Store(str(path))


def changes_of(lines, kind):
    return [change for line in lines for change in line.get("changes", ()) if change[0] == kind]


def following(lines, **more):
    """Add a line after the last one."""
    n = lines[-1]["n"]
    queue = next(line["queue"] for line in lines if "queue" in line)
    lines.append(dict({"n": n + 1, "durable": n, "at": 1.8e9, "queue": queue, "changes": []}, **more))


@pytest.mark.parametrize("name", ["future", "unknown", "needs"])
@pytest.mark.parametrize("kind", ["task", "queue", "worker"])
def test_a_field_that_only_a_newer_version_knows_is_kept_through_updates_and_compactions(tmp_path, kind, name):
    def change(lines):
        changes_of(lines, kind)[0][1 if kind == "queue" else 2][name] = {"a": 1}
    store = newer_journal(tmp_path, change)
    worker = call(store, "POST", "workers/search", {})[1]["content"][0]["worker_id"]
    for _ in range(2):
        assert call(store, "PUT", "tasks", [{"task_id": "t", "priority": 7}])[0] == 200
        assert call(store, "PUT", "", {"metadata_update": {"k": 1}})[0] == 200
        assert call(store, "POST", "workers/%s/status" % worker, {"status": "suspended"})[0] == 200
        assert call(store, "POST", "workers/%s/status" % worker, {"status": "active"})[0] == 200
        L.compact(store.path)
        store = L.Store(store.path)
        assert call(store, "GET", "tasks/t")[1]["priority"] == 7
    lines = [json.loads(line.decode()) for line in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    kept = [line for line in changes_of(lines, kind) if name in line[1 if kind == "queue" else 2]]
    assert [change[1 if kind == "queue" else 2][name] for change in kept] == [{"a": 1}]
    assert name not in call(store, "GET", "tasks/t")[1]


def put_status(lines, kind):
    changes_of(lines, kind)[0][2]["status"] = "frozen"


REFUSED = {
    "a change": lambda lines: following(lines, changes=[["pause", {"x": 1}]]),
    "a change without a name": lambda lines: following(lines, changes=[[]]),
    "a change that is no list": lambda lines: following(lines, changes=[7]),
    "changes that are no list": lambda lines: following(lines, changes=7),
    "a name that is a list": lambda lines: following(lines, changes=[[["task"], "t", {}]]),
    "an operand more": lambda lines: following(lines, changes=[["task", "t", {"priority": 1}, None, {"why": 1}]]),
    "an operand less": lambda lines: following(lines, changes=[["task", "t"]]),
    "fields of another type": lambda lines: following(lines, changes=[["task", "t", [1]]]),
    "a time of another type": lambda lines: following(lines, changes=[["task", "t", {"last_modified": "2030-01-01"}]]),
    "args of another type": lambda lines: following(lines, changes=[["task", "t", {"created_at": 1, "status": "pending", "args": 7}, None]]),
    "a status of a task": lambda lines: put_status(lines, "task"),
    "a status of a worker": lambda lines: put_status(lines, "worker"),
    "a line that needs a later format": lambda lines: following(lines, needs=L.FORMAT + 1),
    "a line that needs a name": lambda lines: following(lines, needs="pauses"),
    "the next format": lambda lines: lines[0].update(format=L.FORMAT + 1),
    "a format with a name": lambda lines: lines[0].update(format="2b"),
}


@pytest.mark.parametrize("says", [None, "9.1.0"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_may_not_be_ignored_is_refused_with_both_versions_and_the_way_out(tmp_path, what, says):
    import labtasker

    def change(lines):
        if says:
            lines[0]["version"] = says
        REFUSED[what](lines)
    store = newer_journal(tmp_path, change)
    content = (tmp_path / "journal.jsonl").read_bytes()
    for method, path, body in [("POST", "tasks/search", {}), ("POST", "tasks", {"args": {"b": 1}}), ("POST", "tasks/search", {})]:
        status, answer = call(store, method, path, body)
        assert status == 503 and "version " + L.__version__ in answer["detail"], answer
        assert ("Labtasker 9.1.0 wrote" if says else "a newer Labtasker wrote") in answer["detail"]
        assert "newer labtasker.py, copied here" in answer["detail"]
    with pytest.raises(L.LabtaskerRuntimeError, match="could not be compacted .*newer labtasker.py"):
        L.compact(store.path)
    with pytest.raises(L.StoreDamaged, match="newer labtasker.py"):
        labtasker.do_journal_verify(types.SimpleNamespace(db_path=store.path))
    assert (tmp_path / "journal.jsonl").read_bytes() == content
    if "format" in what and what.startswith(("the", "a format")):
        with pytest.raises(L.StoreDamaged, match="newer labtasker.py"):
            labtasker.repair_store(store.path)


def test_a_line_with_a_key_of_a_newer_version_is_read_but_not_compacted_away(tmp_path):
    store = newer_journal(tmp_path, lambda lines: lines[-1].update(future=1))
    assert call(store, "POST", "tasks", {"args": {"b": 1}})[0] == 201
    with pytest.raises(L.LabtaskerRuntimeError, match="would lose future"):
        L.compact(store.path)


def test_the_header_keeps_what_a_newer_version_put_there(tmp_path):
    store = newer_journal(tmp_path, lambda lines: lines[0].update(future=[1]))
    L.compact(store.path)
    assert L.unseal((tmp_path / "journal.jsonl").read_bytes().splitlines(True)[0])["future"] == [1]


def test_the_journal_says_which_version_was_the_newest_to_write_to_it(tmp_path, monkeypatch):
    store = newer_journal(tmp_path, lambda lines: lines[0].pop("version"))
    versions = ["0.1.0", "0.9.0", "0.10.0", "0.9.0"]
    for version in versions:
        monkeypatch.setattr(L, "__version__", version)
        assert call(L.Store(store.path), "POST", "tasks", {"args": {"b": 1}})[0] == 201
    told = [L.unseal(line).get("version") for line in (tmp_path / "journal.jsonl").read_bytes().splitlines(True)]
    assert [version for version in told if version] == versions[:3]
    L.compact(store.path)
    assert L.unseal((tmp_path / "journal.jsonl").read_bytes().splitlines(True)[0])["version"] == "0.10.0"


@pytest.mark.parametrize("refused", [None, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EIO])
def test_a_sync_on_macos_is_a_full_one_and_a_plain_one_where_the_file_system_refuses_that(tmp_path, monkeypatch, refused):
    calls = []

    def full(fd, command):
        calls.append(command)
        if refused:
            raise OSError(refused, os.strerror(refused))
    monkeypatch.setattr(L, "fcntl", types.SimpleNamespace(F_FULLFSYNC=51, fcntl=full))
    monkeypatch.delattr(L.os, "fdatasync")
    monkeypatch.setattr(L.os, "fsync", lambda fd: calls.append("fsync"))
    with open(str(tmp_path / "file"), "wb") as file:
        if refused == errno.EIO:
            with pytest.raises(OSError, match="Input/output"):
                L.Disk.sync(file.fileno())
        else:
            L.Disk.sync(file.fileno())
    assert calls == [51] + ["fsync"] * (refused not in (None, errno.EIO))


def test_a_file_in_the_way_of_a_folder_is_told_and_a_parent_that_is_not_ours_needs_no_sync(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        L.Disk.make_folder(str(tmp_path / "file"))

    def refuse(folder):
        raise PermissionError()
    monkeypatch.setattr(L.Disk, "sync_folder", staticmethod(refuse))
    L.Disk.make_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def lock(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(L.fcntl, "flock", lock)
    with pytest.raises(L.StoreUnavailable, match=r"can't lock files \(No locks available\): run one server for all"):
        L.FileLock(str(tmp_path / "lock")).acquire(0)


def test_json_is_the_same_without_the_encoder_in_c(monkeypatch):
    values = [{"b": [1, 2.5, None, True, "\u00e9\n"], "a": {}}, [], "x", 1e300]
    with monkeypatch.context() as without:
        without.setattr(L.json.encoder, "c_make_encoder", None)
        plain = L.json_writer(",", ":", sort_keys=True)
    assert [plain(value) for value in values] == [L.json_writer(",", ":", sort_keys=True)(value) for value in values]


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_repair_keeps_a_copy_where_there_are_no_hard_links_and_leaves_no_draft_where_it_is_refused(tmp_path, monkeypatch, is_refused):
    store = L.Store(str(tmp_path / "journal.jsonl"))
    for a in (1, 2, 3):
        L.answer_call(store, lambda: L.LocalName("default"), "POST", "/api/v1/queues/me/tasks", {"args": {"a": a}}, None)
    store.close()
    path = tmp_path / "journal.jsonl"
    damaged = path.read_bytes().replace(b'"a":2', b'"b":2')
    path.write_bytes(damaged)
    before = set(os.listdir(str(tmp_path)))

    def link(*_):
        raise OSError(errno.EPERM, "no hard links here")

    def ask():
        if is_refused:
            raise L.StoreUnavailable("somebody writes to it")
    monkeypatch.setattr(L.os, "link", link)
    if is_refused:
        with pytest.raises(L.StoreUnavailable):
            L.repair_file(L.Survey(str(path)), ask)
        assert set(os.listdir(str(tmp_path))) == before and path.read_bytes() == damaged
    else:
        kept, bad = L.repair_file(L.Survey(str(path)), ask)
        assert open_bytes(kept) == damaged and b'"b":2' in open_bytes(bad) and not L.Survey(str(path)).bad


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()
