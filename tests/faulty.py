"""What the fault tests share: how long they run, a history of every kind of change, disks that fail, lose power or kill.

The long versions are chosen by the environment, one variable a row of SETTINGS, read by `setting` alone:
LT_TEST_KILLS=1000 LT_TEST_STEPS=1000000 LT_TEST_CUTS=20000 LT_TEST_BITS=20000 LT_TEST_LAST_BYTES=4096 LT_TEST_RACES=100
LT_TEST_ERRNOS=5 LT_TEST_QUERIES=5000 LT_TEST_DATES=3000 LT_TEST_CUTS_NET=6000 LT_TEST_SOAK=600 LT_TEST_SOAK_WORKERS=50. LT_TEST_SEED=n is another course of things; each test
that rolls dice prints its seed.
"""
import errno
import itertools
import json
import os
import random
import signal
import stat
import threading

import labtasker as L

SETTINGS = {  # name: (value of the quick version, meaning)
    "KILLS": (10, "times that the server of the crash checker is killed"),
    "STEPS": (12500, "operations compared with the model"),
    "CUTS": (150, "power cuts tried on each long history"),
    "BITS": (500, "random bits of a journal flipped, one at a time"),
    "LAST_BYTES": (48, "bytes at a journal's end of which every bit is flipped"),
    "RACES": (10, "rounds of two servers started at once"),
    "ERRNOS": (1, "errors, of five, tried at each call that fails"),
    "GONE": (30000, "tasks submitted, cancelled and deleted, of which a journal must keep no weight"),
    "QUERIES": (60, "query documents that each seed asks of mongomock too"),
    "DATES": (40, "dates made at random that dateparser reads too, in each zone"),
    "CUTS_NET": (80, "operations through a proxy that cuts connections"),
    "SOAK": (12, "seconds in which workers, jobs and server are killed and stopped"),
    "SOAK_WORKERS": (8, "loops that run at once meanwhile"),
    "CURVES": (60, "random histories of which rules and a plain model judge the points"),
    "CURVE_SOAK": (5, "seconds in which the workers that report points, and their server, are killed"),
    "CURVE_WORKERS": (5, "loops that report points meanwhile"),
    "PACK_KILLS": (30, "kills of a loop between two steps of packing a run"),
    "LOOP_KILLS": (5, "kills of a loop with four slots, whose output is looked for"),
    "SHORT_RUNS": (150, "short runs whose files are counted"),
    "SEED": (1, "where the dice start"),
}
ME = "/api/v1/queues/me"


def setting(name):
    """Return the number that LT_TEST_<name> asks for, or that of the quick version."""
    return int(os.environ.get("LT_TEST_" + name, SETTINGS[name][0]))


def dice(what):
    """Return a random.Random for the test `what`, and print its seed, which pytest shows when the test fails."""
    print("%s: LT_TEST_SEED=%d" % (what, setting("SEED")))
    return random.Random("%s %d" % (what, setting("SEED")))


class Caller:
    """Requests through the one door on a store of its own: caller(method, path, body, query) -> (status, answer).

    Bodies and answers pass through JSON, as if they had come over a wire. What is no answer (an OSError, a hang)
    fails the test that asked."""

    def __init__(self, path, is_server=False, timeout_s=None):
        self.store, self.queue, self.timeout_s = L.Store(str(path), is_server=is_server), L.DEFAULT_QUEUE, timeout_s
        if is_server:
            self.store.file.open()

    def __call__(self, *request):
        return self.within(self.timeout_s, *request) if self.timeout_s else self.ask(*request)

    def ask(self, method, path, body=None, query=None):
        """Return the answer, from this very thread."""
        path = path if path.startswith("/") else (ME + "/" + path).rstrip("/")
        body = None if body is None else L.parse_json(json.dumps(body))
        status, answer = L.answer_call(self.store, lambda: L.LocalName(self.queue), method, path, body, query)
        return status, json.loads(json.dumps(answer))

    def within(self, timeout_s, *request):
        """Return the answer; AssertionError where none comes in time, as when the writer's thread is dead."""
        found = []

        def ask():
            try:
                found.append(self.ask(*request))
            except Exception as error:  # shown where the test can see it, not in a thread
                found.append(error)
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout_s)
        assert found, "no answer within %s s to %.100r" % (timeout_s, request)
        if isinstance(found[0], Exception):
            raise AssertionError("%.100r got no answer but %r" % (request, found[0])) from found[0]
        return found[0]

    def close(self):
        self.store.file.close()


# A history with every kind of change. Each step is a function of (call, made) that makes one request and returns its
# (status, answer); `made` is a dict in which a step keeps what later ones need. A step can be repeated with the same
# effect as once, as the protocol promises, where its name does not begin with "again".


def _register(call, made):
    status, answer = call("POST", "workers", {"worker_name": "w", "max_retries": 2})
    made["worker"] = answer.get("worker_id")
    return status, answer


def submission(task_id, **fields):
    """Return the step that submits a task under this id."""
    return lambda call, made: call("POST", "tasks", dict({"args": {"lr": 0.1, "id": task_id}}, task_id=task_id, **fields))


def _submit_list(call, made):
    return call("POST", "tasks", [{"task_id": "list-%d" % i, "args": {"i": i, "text": "x" * 200}} for i in range(5)])


def _fetch(run):
    def step(call, made):
        request = {"heartbeat_timeout": 600, "worker_id": made.get("worker"), "fetch_id": "fetch-" + run}
        status, answer = call("POST", "tasks/next", request)
        made[run] = answer.get("task") or {}
        return status, answer
    return step


def _report(run, status, **fields):
    def step(call, made):
        task = made.get(run) or {}
        path = "tasks/%s/status" % task.get("task_id", "none")
        return call("POST", path, dict({"status": status, "run_id": task.get("run_id")}, **fields))
    return step


def _update(reset, *updates):
    return lambda call, made: call("PUT", "tasks", list(updates), {"reset_pending": reset})


def _worker(status):
    return lambda call, made: call("POST", "workers/%s/status" % made.get("worker"), {"status": status})


def _other_queue(method, path, **body):
    def step(call, made):
        call.queue = "other" if path == "" else L.DEFAULT_QUEUE
        try:
            return call(method, path, body or None)
        finally:
            call.queue = L.DEFAULT_QUEUE
    return step


STEPS = [
    ("submit", submission("first", metadata={"tags": ["a"]})),
    ("again register", _register),
    ("submit a list", _submit_list),
    ("fetch", _fetch("one")),
    ("report failed", _report("one", "failed", summary={"why": "nan"})),
    ("fetch", _fetch("two")),
    ("report success", _report("two", "success", summary={"loss": float("inf")})),
    ("fetch", _fetch("three")),
    ("hand back", _report("three", "pending", reason="SIGTERM")),
    ("update", _update("false", {"task_id": "list-1", "priority": 5, "args": {"b.c": 1}}, {"task_id": "list-2", "cmd": "x"})),
    ("reset", _update("true", {"task_id": "first"})),
    ("again delete a task", lambda call, made: call("DELETE", "tasks/list-4")),
    ("again suspend", _worker("suspended")),
    ("again activate", _worker("active")),
    ("again make a queue", _other_queue("POST", "/api/v1/queues", queue_name="other", password="p")),
    ("update a queue", _other_queue("PUT", "", metadata_update={"k": 1})),
    ("again delete a queue", _other_queue("DELETE", "")),
    ("cancel", lambda call, made: call("POST", "tasks/list-3/status", {"status": "cancelled"})),
    ("fetch", _fetch("four")),
    ("again delete a worker", lambda call, made: call("DELETE", "workers/%s" % made.get("worker"))),
    ("submit", submission("last", priority=3)),
]


def play(call, steps=STEPS, made=None):
    """Make the requests of `steps`; AssertionError where one is refused."""
    made = {} if made is None else made
    for name, step in steps:
        status, answer = step(call, made)
        assert status < 400, (name, status, answer)
    return made


# What a store holds, and what its file says.


def contents(state):
    """Return all that is in a State, indexes too, as plain values that can be compared (NaN is told apart by text)."""
    for queue in state.queues.values():
        times = [task.last_modified for task in queue.tasks.values()]
        assert times == sorted(times), "the tasks are not in the order of their last change"
        queue.pending.release(L.now())  # as the next fetch does
    return {queue_id: [repr(part) for part in (
        queue.record, sorted(queue.tasks.items(), key=lambda item: (item[1].last_modified, item)), sorted(queue.workers.items()), sorted(queue.running),
        sorted(queue.fetches.items()), sorted(queue.blocked.missing.items()), queue.pending.first(()),
        sorted((sorted(shape), count) for shape, count in queue.pending.counts.items()), sorted(queue.pending.resting),
        sorted((key, group.count, group.rungs, sorted(group.succeeded)) for key, group in queue.groups.items() if group.count))] for queue_id, queue in state.queues.items()}


def check_same(found, wanted, words):
    """AssertionError, with what differs and `words`, unless two `contents` are the same."""
    for queue_id in sorted(set(found) | set(wanted)):
        for one, other in itertools.zip_longest(found.get(queue_id, ()), wanted.get(queue_id, ())):
            at = len(os.path.commonprefix([str(one), str(other)]))
            assert one == other, "%s: ...%.300s... instead of ...%.300s..." % (
                words, str(one)[max(0, at - 60):], str(other)[max(0, at - 60):])


def opened(path):
    """Return (State, JournalFile) of a file that is opened and replayed as any process would; the caller closes it."""
    journal, state = L.JournalFile(str(path), threading.RLock()), L.State(is_indexed=False)
    try:
        journal.open()
        for line in journal.read_new():
            if "changes" in line:
                state.apply(line.get("queue"), line["changes"])
        state.index()
    except BaseException:
        journal.close()
        raise
    return state, journal


def replayed(path):
    """Return the contents that the file says, which has to be sound."""
    state, journal = opened(path)
    journal.close()
    assert not journal.notices, journal.notices
    return contents(state)


def lines_of(content):
    """Return the lines of a journal's bytes, header first; AssertionError where one is not sound or is out of order."""
    lines = content.splitlines(True)
    numbers = [(L.unseal(line) or {}).get("n") for line in lines]
    assert numbers == [None] + list(range(1, len(lines))) and L.unseal(lines[0]), numbers
    return lines


# Disks. Each is a dict of functions to put in the place of those of labtasker.Disk.

REAL = {name: getattr(L.Disk, name) for name in ("open", "write", "sync", "truncate", "rename")}


def put_in(monkeypatch, functions):
    """Have every store of this process use these functions of the disk."""
    for name, function in functions.items():
        monkeypatch.setattr(L.Disk, name, staticmethod(function))


def without_sync(monkeypatch):
    """Syncs take no time: for tests in which nothing but this process can go wrong."""
    put_in(monkeypatch, {"sync": lambda fd: None})


class FailingDisk:
    """Fails as `faults` says: {name: (first call that fails, how many, error number, bytes written before it fails)}.

    Calls are counted from the making on, or from `reset`. `failed` counts the failures."""

    def __init__(self, faults):
        self.faults, self.calls, self.failed = faults, dict.fromkeys(REAL, 0), 0
        self.functions = {name: self._function(name) for name in REAL}

    def _function(self, name):
        def call(*args):
            self.calls[name] += 1
            first, times, number, written = self.faults.get(name, (0, 0, 0, 0))
            if first <= self.calls[name] < first + times:
                self.failed += 1
                if name == "write" and written and self.calls[name] == first:
                    return os.write(args[0], bytes(args[1][:written]))
                raise OSError(number, os.strerror(number))
            return None if name == "sync" else REAL[name](*args)
        return call

    def heal(self):
        """The disk works from now on."""
        self.faults = {}


class KillingDisk:
    """Kills its own process at the k-th call: before it, after it, or where half of a write is done."""

    def __init__(self, k, when):
        self.k, self.when, self.calls = k, when, 0
        self.functions = {name: self._function(name) for name in REAL}

    def _function(self, name):
        def call(*args):
            self.calls += 1
            if self.calls != self.k:
                return None if name == "sync" else REAL[name](*args)
            if self.when == "half" and name == "write":
                os.write(args[0], bytes(args[1][:len(args[1]) // 2]))
            if self.when == "after" and name != "sync":
                REAL[name](*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return call


PIECE = 512


class Killed(BaseException):
    """Stands for a kill -9 in the middle of a call of the disk, where the same process plays the next one."""


class PowerDisk:
    """Writes to the real files and notes every change, so that `image` can say what a power cut would have left.

    `events` has ("write", file, offset, bytes), ("truncate", file, size), ("create", path, file),
    ("rename", source, path), ("sync" or "failed sync", file or None for the folder), ("acknowledged", what).
    `killed_at` is the count of the sync, `fails` has the counts of the (name, call), that raise instead of doing it."""

    def __init__(self, folder, killed_at=None, fails=()):
        self.folder, self.events, self.killed_at, self.fails = str(folder), [], killed_at, fails
        self.calls = dict.fromkeys(REAL, 0)
        self.functions = {name: getattr(self, name) for name in REAL}

    def open(self, path, flags, mode=0o777):
        there = os.path.exists(path)
        fd = REAL["open"](path, flags, mode)
        if not there:
            self.events.append(("create", path, os.fstat(fd).st_ino))
        elif flags & os.O_TRUNC:
            self.events.append(("truncate", os.fstat(fd).st_ino, 0))
        return fd

    def write(self, fd, data):
        offset, data = os.fstat(fd).st_size, bytes(data)
        self.events.append(("write", os.fstat(fd).st_ino, offset, data))
        return REAL["write"](fd, data)

    def _is_failing(self, name):
        self.calls[name] += 1
        return (name, self.calls[name]) in self.fails

    def sync(self, fd):
        kind, failing = os.fstat(fd), self._is_failing("sync")
        if self.calls["sync"] == self.killed_at:
            raise Killed()
        self.events.append(("failed sync" if failing else "sync", None if stat.S_ISDIR(kind.st_mode) else kind.st_ino))
        if failing:
            raise OSError(errno.EIO, "Input/output error")

    def truncate(self, fd, size):
        self.events.append(("truncate", os.fstat(fd).st_ino, size))
        REAL["truncate"](fd, size)

    def rename(self, source, path):
        if self._is_failing("rename"):
            raise OSError(errno.EIO, "Input/output error")
        self.events.append(("rename", source, path))
        REAL["rename"](source, path)

    def acknowledge(self, path):
        """Note that all that stands in the journal now was acknowledged."""
        with open(str(path), "rb") as file:
            self.events.append(("acknowledged", file.read()))

    def image(self, count, choose):
        """Return ({path: bytes}, what was acknowledged last) after a cut that follows the first `count` events.

        `choose(number)` returns from 0 to number - 1: what of the unsynced becomes of each piece and of the names. What
        was written before a sync that failed is never durable by a later one: the system calls it clean."""
        files, names, unnamed, acknowledged = {}, {}, [], b""
        for event in self.events[:count]:
            kind = event[0]
            if kind == "acknowledged":
                acknowledged = event[1]
            elif kind in ("create", "rename"):
                unnamed.append(event)
            elif kind in ("write", "truncate"):
                files.setdefault(event[1], []).append([event, "pending"])
            elif event[1] is None:
                names, unnamed = (named(names, unnamed), []) if kind == "sync" else (names, unnamed)
            else:
                for change in files.get(event[1], ()):
                    change[1] = ("durable" if kind == "sync" else "dropped") if change[1] == "pending" else change[1]
        names = named(names, unnamed[:choose(len(unnamed) + 1)])
        return {path: built(files.get(file, ()), choose) for path, file in names.items()}, acknowledged


def named(names, events):
    """Return the names {path: file} after these changes of the folder."""
    names = dict(names)
    for kind, one, other in events:
        names[other if kind == "rename" else one] = names.pop(one, None) if kind == "rename" else other
    return names


def built(changes, choose):
    """Return the bytes of a file after these changes: the durable ones, and of the others the pieces that `choose` picks.

    What is missing before a piece that is there is zeros; so may be what is missing at the end."""
    content = b""
    for (kind, _, offset, *data), state in changes:
        pick = (lambda number: number - 1) if state == "durable" else choose
        if kind == "truncate":
            content = content[:offset].ljust(offset, b"\0") if pick(2) else content
            continue
        data, end = data[0], offset + len(data[0])
        while offset < end:
            size = min(end, offset - offset % PIECE + PIECE) - offset
            if pick(2):
                content = content[:offset].ljust(offset, b"\0") + data[:size] + content[offset + size:]
            data, offset = data[size:], offset + size
        if len(content) < end and pick(2):
            content = content.ljust(end, b"\0")
    return content


def every_choice(limit):
    """Yield functions `choose` that together make every choice there is, at most `limit` of them."""
    made = []
    for _ in range(limit):
        taken, at = list(made), [0]

        def choose(number, taken=taken, at=at):
            if at[0] == len(taken):
                taken.append((0, number))
            at[0] += 1
            return taken[at[0] - 1][0]
        yield choose
        made = taken[:at[0]]
        while made and made[-1][0] == made[-1][1] - 1:
            made.pop()
        if not made:
            return
        made[-1] = made[-1][0] + 1, made[-1][1]
