"""Mutated requests, filters and bodies: no 500, nothing that takes long, nothing that stays behind.

Each round has a number, from which alone it is made: a failure names it, and it is kept in FOUND or a round of its own
is asked for with LT_TEST_FUZZ_FROM. What is typed is drawn from all that there is to try; LT_TEST_FUZZ_WORDS=30000 tries
it all. tox's environment `fuzz` runs many more."""
import json
import os
import random
import time

import pytest

import faulty
import labtasker as L
from test_loop import ME, Loop, Wire

pytestmark = pytest.mark.slow
REQUESTS = int(os.environ.get("LT_TEST_FUZZ_REQUESTS", "1000"))
FILTERS = int(os.environ.get("LT_TEST_FUZZ_FILTERS", "2500"))
FIRST = int(os.environ.get("LT_TEST_FUZZ_FROM", "0"))
LONG_S = 0.1  # of the processor, for anything asked
GROWTH_KIB = 64 << 10

BODIES = [
    {"args": {"lr": 0.1, "model": "vit", "opt": {"momentum": 0.9, "betas": [0.9, 0.99]}}, "task_name": "a", "priority": 3},
    [{"args": {"i": 1}}, {"cmd": ["a", "b"], "task_id": "x"}, {"args": {"a.b": None}, "metadata": {"tags": ["v1"]}}],
    {"heartbeat_timeout": 60, "required_fields": ["lr", "*"], "extra_filter": "args.lr > 0.05", "worker_id": None, "eta_max": "1h30m"},
    {"extra_filter": {"$and": [{"args.lr": {"$gt": 0.05}}, {"task_name": {"$regex": "^a"}}]}, "limit": 5, "sort": [["args.lr", -1]]},
    {"status": "success", "summary": {"loss": float("nan"), "a.b": [1, {"c": 2}]}, "run_id": "r", "reason": "why"},
    [{"task_id": "x", "status": "pending", "args": {"a": 1}, "replace_fields": ["args"]}],
    {"queue_name": "q2", "password": "p", "metadata": {"a": 1}}, {"new_queue_name": "q3", "metadata_update": {}},
    {"worker_name": "w", "max_retries": 2}, {"status": "suspended"}, None, {}, [],
]
FILTER_TEXTS = [
    "args.lr == 0.1 and status in [\"pending\", \"running\"]", "0.1 < args.a + 2 * args.b % 3 or not_there", "exists(args.lr, False)",
    "regex(task_name, \"^g(a|b)+.*x{2,3}[^a-z]$\") and created_at >= date(\"3 hours ago\")", "\"v1\" in list(metadata.tags)",
    "args.x[\"k\"][0] == -1 or \"k\" in dict(args.opt)", "(((args.a == None))) and True", "last_modified < date(\"2026-11-22 10:00\")",
    "regex(args.model, '(\\\\w+-)*\\\\d+(?=x)|[[:a-c]]')", "args.a == 'it\\'s \\u00e9 \\x41'",
]
DOCUMENTS = [
    {"$and": [{"args.lr": {"$gt": 0.1, "$lte": 5}}, {"$or": [{"status": {"$in": ["a", None, 1]}}, {"$nor": [{"a": 1}]}]}]},
    {"args.x": {"$not": {"$regex": "a.*b", "$options": "ims"}}, "created_at": {"$gte": {"_dt": "2026-11-22T06:00:00+00:00"}}},
    {"$expr": {"$gt": [{"$add": ["$args.a", 1, {"$multiply": ["$args.b", -2]}]}, {"$literal": {"a": [1]}}]}},
    {"args.t": {"$all": [1, {"$regex": "x"}], "$exists": True, "$nin": [[1, {"a": 2}], 2.5]}},
]
BITS = [b"\x00", b"\xff", b"\r\n", b"\r\n\r\n", b"\n", b" ", b"%00", b"%2e%2e/", b"../", b"(", b")" * 50, b"[" * 300, b'{"a":' * 120, b"{", b"}", b"\\ud800",
        b"-1", b"1" + b"0" * 4000, b"1e999", b"NaN", b"null", b"true", b'""', b'"\\u0000"', b"Content-Length: 5\r\n", b"Content-Length: +5\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Host: x\r\n", b"Origin: null\r\n", b"HTTP/1.0", b"HTTP/0.9", b"http://x/",
        b"a" * 2000, b"\xe2\x80\xae", b"\xc2\xb2", b"$where", b"$regex", b"(a+)+$", b".*" * 5, b"'", b'"', b"date('x')", b"regex(args.a, '",
        b"args.", b"in [", b"not ", b"-" * 100, b"9" * 400, b"_dt", b"Last-Event-ID: 99999.1\r\n", b"?wait_s=", b"&limit=\xc2\xb2", b"\x1b[31m"]
FOUND = [  # what failed once
    b"GET /health HTTP/1.1\r\nContent-Length: " + b"0" * 5000 + b"1\r\n\r\n",
    b"POST /api/v1/queues HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
]
FOUND_BODIES = [b'{"args":{"%s":1}}' % b".".join([b"a"] * 3000), b'{"extra_filter":{"args.a.\xc2\xb2":1}}', b'{"args":{"a":%s1%s}}' % (b"[" * 400, b"]" * 400)]


def mutated(dice, data):
    """Return bytes with a few changes: some cut, doubled, replaced or put in."""
    data = bytearray(data)
    for _ in range(dice.choice((0, 1, 1, 2, 3, 6))):
        at = dice.randrange(len(data) + 1)
        size = dice.choice((1, 1, 2, 8, 40))
        kind = dice.randrange(5)
        if kind == 0:
            del data[at:at + size]
        elif kind == 1:
            data[at:at] = data[at:at + size] * dice.choice((1, 2, 30))
        elif kind == 2:
            data[at:at + size] = bytes(dice.randrange(256) for _ in range(size))
        else:
            data[at:at + dice.choice((0, size))] = dice.choice(BITS)
    return bytes(data)


class SilentWire(Wire):
    """A socket's place for connections that are handed to threads and back."""

    def setblocking(self, _):
        pass

    settimeout = shutdown = setblocking

    def sendall(self, data):
        raise OSError("a listener who goes at once")


class Selector:
    """A selector's place that knows nobody."""

    def register(self, *_):
        pass

    unregister = modify = register

    def close(self):
        pass


@pytest.fixture
def fuzzed(tmp_path, monkeypatch):
    """A Loop whose threads are run in place, and whose passwords cost nothing."""
    for name, value in (("WRONG_PASSWORD_S", 0), ("REST_S", 0), ("PASSWORD_ROUNDS", 1)):
        monkeypatch.setattr(L, name, value)
    loop = Loop(tmp_path, fsync="never")
    server = loop.server
    server.connections.selector.close()
    server.connections.selector, server.turn = Selector(), None
    server.threads.start = lambda gate: [server.threads.run(job) for job in gate.begin()]
    server.problems = []
    server.log.bug = lambda error: server.problems.append(error) or {"detail": repr(error)}
    server.log.note = lambda *_: None
    yield loop
    server.connections.selector = Selector()
    loop.close()


def ask(loop, data):
    """Return the statuses of the answers to these bytes on a new connection."""
    client = L.Connection(SilentWire(), "test", False)
    loop.server.connections.all.add(client)
    client.inbox += data
    loop.server.requests.read(client)
    loop.server.connections.count(client)
    for _ in range(30):
        loop.server.settle()
        loop.server.take_back()
        connections = loop.server.connections
        eager, connections.eager = connections.eager, []
        for conn in eager:
            loop.server.requests.read(conn)
    loop.server.requests.give_up(float("inf"))
    loop.server.settle()
    loop.server.connections.drop(client)
    return [int(part[:3]) for part in client.sock.sent.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


def seed_requests(loop):
    paths = ["", "/events", "/tasks", "/tasks/search", "/tasks/next", "/tasks/x", "/tasks/x/status", "/workers", "/workers/search", "/workers/w",
             "/tasks/x/heartbeat?answer=status&wait_s=5", "?cascade_delete=false", "/tasks?reset_pending=true", "/../api/v1/queues", "/workers/w/status"]
    targets = [("BREW", ME), ("HEAD", ME), ("OPTIONS", "*")]
    for path in [ME + path for path in paths] + ["/", "/health", "/health/full", "/api/v1/polling", "/api/v1/queues"]:
        for method in ("GET", "POST", "PUT", "DELETE"):
            try:
                L.find_route(method, path.partition("?")[0])
            except L.MethodNotAllowed:
                continue
            except L.NotFound:
                pass
            targets.append((method, path))
    return [loop.bytes(method, path, body) for method, path in targets for body in BODIES]


def usage_kib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_mutated_requests(fuzzed):
    seeds, worst, sizes = seed_requests(fuzzed), (0, None), []
    for data in FOUND + [fuzzed.bytes("POST", "/tasks/search").replace(b"Length: 0", b"Length: %d" % len(body)) + body for body in FOUND_BODIES]:
        ask(fuzzed, data)
    answered, statuses = 0, {}
    for number in range(FIRST, FIRST + REQUESTS):
        dice = random.Random(number)
        data = mutated(dice, dice.choice(seeds))
        if dice.random() < 0.7:  # the length is right: it is the rest that is looked at
            head, end, body = data.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
            data = b"\r\n".join(lines + [b"Content-Length: %d" % len(body)]) + end + body
        if "q" not in fuzzed.store.state.names:  # a round deleted or renamed it
            L.answer_call(fuzzed.store, None, "POST", "/api/v1/queues", {"queue_name": "q", "password": "p"})
            fuzzed.store.login("q", "p")
        began = time.process_time()
        found = ask(fuzzed, data)
        worst = max(worst, (time.process_time() - began, number))
        assert not fuzzed.server.problems and 500 not in found, (number, data, fuzzed.server.problems)
        answered += bool(found)
        for status in found:
            statuses[status] = statuses.get(status, 0) + 1
        if number % 500 == 499:  # what was submitted goes, else that grows
            for queue_id in list(fuzzed.store.state.queues):
                fuzzed.store.transact(L.delete_queue_op, queue_id, {"cascade_delete": True})
            sizes.append(usage_kib())
    print("%d answered, %s; the longest took %.1f ms (round %d), memory %s KiB" % (
        answered, statuses, worst[0] * 1e3, worst[1], sizes[::max(1, len(sizes) // 8)]))
    assert answered > REQUESTS / 2 and {200, 201, 400, 401, 404, 422} <= set(statuses)
    again = min(took(lambda: ask(fuzzed, data)) for _ in range(3)) if worst[0] > LONG_S else 0
    assert again < LONG_S, worst
    server = fuzzed.server
    assert (server.connections.held_bytes, server.connections.large_bytes, server.parked.by_key) == (0, 0, {}) and not server.connections.all
    assert not any(gate.count or gate.in_line or gate.running or gate.waiting for gate in server.threads.gates.values())
    assert sizes[-1] - sizes[len(sizes) // 2] < GROWTH_KIB, sizes


def took(function):
    began = time.process_time()
    function()
    return time.process_time() - began


RECORD = L.TaskRecord(task_id="x", task_name="gaaab-12x", status="pending", args={
    "lr": 0.1, "model": "vit-12x", "opt": {"k": 1}, "a": 1, "b": 2.5, "x": [{"k": [0, -1]}, "ab" * 3000], "t": ["x", 1]},
    metadata={"tags": ["v1"]}, created_at=L.Instant(1e9), last_modified=L.Instant(1e9))


def look_at(text):
    """Read text as a filter, as a query document and as a body; what is right is used."""
    try:
        L.compile_query(L.parse_filter(text, L.TASK_FIELDS, L.Instant(1.8e9)), L.TASK_FIELDS)(RECORD)
    except L.LabtaskerError:
        pass
    try:
        value = L.parse_json(text.encode("utf-8", "surrogatepass"))
        L.checked(L.ROUTES["POST " + ME + "/tasks"].fields, value, ["body"])
        L.dump_json(L.unflatten(value))
        L.compile_query(value, L.TASK_FIELDS)(RECORD)
    except L.LabtaskerError:
        pass


def test_mutated_filters_and_bodies():
    seeds = [text.encode() for text in FILTER_TEXTS] + [json.dumps(value).encode() for value in DOCUMENTS + BODIES]
    worst, before = (0, None, None), None
    for body in FOUND_BODIES:
        look_at(body.decode())
    for number in range(FIRST, FIRST + FILTERS):
        dice = random.Random(number)
        text = mutated(dice, dice.choice(seeds)).decode("utf-8", dice.choice(("replace", "surrogateescape")))
        began = time.process_time()
        try:
            look_at(text)
        except Exception as error:
            raise AssertionError("round %d: %r of %r" % (number, error, text)) from error
        spent = time.process_time() - began
        if spent > worst[0]:
            worst = spent, number, text
        if number == FIRST + FILTERS // 2:
            before = usage_kib()
    print("the longest took %.1f ms (round %d)" % (worst[0] * 1e3, worst[1]))
    assert min(took(lambda: look_at(worst[2])) for _ in range(3)) < LONG_S, worst
    assert usage_kib() - before < GROWTH_KIB


# The command line: each option of each command with odd values, through main() in this process

WORDS = int(os.environ.get("LT_TEST_FUZZ_WORDS", "350"))
ODD_WORDS = [
    "", " ", "0", "-1", "1" + "0" * 30, "9" * 500, str(2 ** 63), "-" + "9" * 400, "nan", "-inf", "1e999", "1e400s", "0.0000001", "\n", "a\nb", "\r",
    "\x1b[31m", "\x01\x7f", "\u202e", "\u2028", "\udcff", "a\udc80b", "\u00e9", "\u00b2", "\u0663", "/nowhere/at/all", "/", ".", "--", "-", "=", "a=b", "a.b=1", ",",
    "0,0", ":", "a:desc", "[]", "{}", "{", "None", "[" * 500, "(" * 300, "%(x)", "%(", "%", "'", "*", "..", "http://", "http://x:99999", "127.0.0.1:0",
    "x" * 3000, "1h" * 50, "99999999999999 days", "1" + "0" * 18 + "y", "args.a == ", "@", "$", "__class__", "/dev/null", "/dev/full", "/proc/self/mem"]
CODES = {0, 1, 2, 3, 4, 124, 130}  # labtasker help exit
# These may wait for ever: only what they are told is read, but for what begins to wait.
WAITING = {"event listen", "server wait", "task wait", "watch", "demo"}


def typed_words():
    """Yield (command, words): for each option and argument each odd value."""
    for path in sorted(L.COMMANDS):
        row = L.COMMANDS[path]
        places = ["x" for flags, settings in row.options if not flags[0].startswith("-") and "nargs" not in settings]
        for flags, settings in row.options:
            if not flags[0].startswith("-"):
                ways = [lambda value: [value] + places[1:]]
            elif settings.get("action") in (None, "append"):
                ways = [lambda value, flag=flag: [flag, value] + places for flag in flags]
                ways += [lambda value, flag=flag: [flag + "=" + value] + places for flag in flags[-1:]]
            else:
                ways = [lambda value, flag=flag: [flag] + places + [value] * bool(value) for flag in flags]
            yield from ((path, way(value)) for way in ways for value in ODD_WORDS)
        ways = ["--x=%s", "--%s=1", "%s", "%%(%s)"] if row.rest else []
        yield from ((path, places + ["--", way % value]) for way in ways for value in ODD_WORDS)


@pytest.fixture
def typed(tmp_path, monkeypatch, capfdbinary):
    """A function that runs main(words) in an empty folder and returns (exit code, all that it printed)."""
    L.extras()
    for name in [name for name in os.environ if name.startswith(("LABTASKER_", "SLURM_"))]:
        monkeypatch.delenv(name)
    for name in ("EDITOR", "VISUAL", "PAGER"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr(L, "_run_server", lambda *_: None)
    monkeypatch.setattr(L, "_to_background", lambda log: None)
    monkeypatch.setattr(L.Loop, "_supervise", lambda loop: None)
    for path in WAITING:
        monkeypatch.setitem(L.COMMANDS, path, L.COMMANDS[path]._replace(run=lambda options: 0))
    faulty.without_sync(monkeypatch)
    (tmp_path / "typed").mkdir()
    monkeypatch.chdir(tmp_path / "typed")
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield lambda words: (L.main(words), b"".join(capfdbinary.readouterr()).decode())
    L.use_client(None)


def test_whatever_is_typed_is_done_or_refused_with_a_code_of_the_table_and_is_no_bug(typed):
    everything = list(typed_words())
    assert len(everything) > 10000 and {path for path, _ in everything} > {"task submit", "loop", "serve", "init"}
    for path, words in random.Random("words %d" % FIRST).sample(everything, min(WORDS, len(everything))):
        code, said = typed(path.split() + words)
        assert code in CODES and "This is a bug" not in said and "Traceback" not in said, (path, words, code, said[-2000:])
        assert not set("\x01\x7f\u202e") & set(said), (path, words, said[-2000:])
