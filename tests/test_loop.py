"""Section 7's loop: what waits, what takes long, what arrives in pieces, and what fails while it is written."""
import base64
import errno
import gc
import http.client
import json
import socket
import threading
import types

import pytest

import labtasker as L
from test_journal import FailingDisk

ME = "/api/v1/queues/me"


class Wire:
    """Stands for a socket: takes `room` bytes a send."""

    def __init__(self, room=10 ** 9):
        self.room, self.sent, self.has_left = room, b"", False

    def send(self, data):
        self.sent += data[:self.room]
        return min(len(data), self.room)

    def fileno(self):
        return -1

    def close(self):
        pass


class Loop:
    """A server in this process whose loop is turned by hand, and clients whose bytes are put into it."""

    def __init__(self, folder, **options):
        self.store = L.Store(str(folder / "journal.jsonl"), is_server=True, **options)
        self.store.file.open()
        self.server = L.Server("127.0.0.1", 0, self.store, None, "warning")
        self.server.requests.has_left = lambda conn: conn.sock.has_left
        L.answer_call(self.store, None, "POST", "/api/v1/queues", {"queue_name": "q", "password": "p"})
        self.store.login("q", "p")
        self.auth = base64.b64encode(b"q:p").decode()

    def client(self):
        return L.Connection(Wire(), "test", False)

    def bytes(self, method, path, body=None, extensions=True):
        data = b"" if body is None else json.dumps(body).encode()
        return ("%s %s HTTP/1.1\r\nHost: x\r\nAuthorization: Basic %s\r\n%sContent-Length: %d\r\n\r\n" % (
            method, path if path.startswith("/api") else ME + path, self.auth,
            "Labtasker-Extensions: 1\r\n" if extensions else "", len(data))).encode() + data

    def say(self, client, data):
        client.inbox += data
        if client.state in L.READING:
            self.server.requests.read(client)
        self.server.settle()
        while self.server.connections.eager:
            self.server.turn(0)

    def call(self, client, *request):
        """Return (status, answer), or None where the answer has not come yet."""
        client.sock.sent = b""
        self.say(client, self.bytes(*request))
        return self.answer(client)

    def answer(self, client):
        head, _, body = client.sock.sent.partition(b"\r\n\r\n")
        return (int(head[9:12]), json.loads(body.decode()) if body else None) if head else None

    def close(self):
        self.server.close()
        self.store.file.close()


@pytest.fixture
def loop(tmp_path):
    made = Loop(tmp_path)
    yield made
    made.close()


def fetch(wait_s=0, **more):
    return "POST", "/tasks/next", dict(more, heartbeat_timeout=60, wait_s=wait_s)


def submit(**args):
    return "POST", "/tasks", {"args": args}


def test_the_states_of_a_connection_are_those_of_its_table():
    lines = ["        %s: %s" % (state, ", ".join("%s -> %s" % move for move in row.moves.items() if move[0] != "drop"))
             for state, row in L.CONNECTION_STATES.items() if set(row.moves) > {"drop"}]
    assert len(lines) == 10 and [line.strip() for line in lines] == [
        line.strip() for line in L.Connection.__doc__.split("\n") if line.strip() in {one.strip() for one in lines}]
    assert all(row.moves["drop"] == "closed" and set(row.moves.values()) <= set(L.CONNECTION_STATES) for row in L.CONNECTION_STATES.values())
    conn = L.Connection(Wire(), "test", False)
    for event in ("sent", "reply", "nosuch"):
        with pytest.raises(RuntimeError, match="'idle' does not allow the event '%s'" % event):
            conn.move(event)
    assert conn.state == "idle"


def test_a_connection_is_closed_after_the_time_that_its_state_may_last(loop, clock):
    for state, row in L.CONNECTION_STATES.items():
        if state == "closed":
            continue
        conn = loop.client()
        conn.state, loop.server.connections.all = state, {conn}
        loop.server.connections.unregister = loop.server.connections.all.discard
        most_s = min(row.most_s, 1e6)
        clock.at += most_s
        loop.server.connections.sweep()
        assert conn.state == state
        clock.at += 1
        loop.server.connections.sweep()
        assert (conn.state == "closed") == (row.most_s < 1e6)


def test_requests_that_come_together_are_answered_in_order(loop):
    client = loop.client()
    loop.say(client, loop.bytes("POST", "/tasks", {"args": {"i": 1}}) + loop.bytes("GET", "") + loop.bytes("GET", "/nosuch"))
    assert [part[:3] for part in client.sock.sent.split(b"HTTP/1.1 ")[1:]] == [b"201", b"200", b"404"]


def chores(**store):
    """Return an _Upkeep of a store like this, and the list of what it logs."""
    said = []
    journal = types.SimpleNamespace(settle=lambda: None, fsync="always", writer=types.SimpleNamespace(fenced=False), file=types.SimpleNamespace(size=9))
    file = types.SimpleNamespace(is_bloated=lambda: False, problem=lambda: None)
    store = types.SimpleNamespace(**dict(dict(
        release_delayed=lambda: None, look_for_timeouts=lambda: None, owner=types.SimpleNamespace(move=lambda: None), journal=journal, file=file,
        path="j", next_timeout_at=0), **store))
    return L._Upkeep(store, types.SimpleNamespace(say=lambda level, text: said.append((level, text)), bug=lambda error: said.append(("bug", error)))), said


@pytest.mark.parametrize("error", [L.StoreUnavailable("the disk is full"), OSError(errno.ENOSPC, "full")])
def test_chores_that_a_full_disk_stops_are_done_at_the_next_turn(error):
    def look():
        if errors:
            raise errors.pop()
    errors = [error]
    upkeep, said = chores(look_for_timeouts=look)
    began = L.monotonic()
    upkeep.run()
    assert upkeep.store.next_timeout_at >= began + L.LOOK_INTERVAL_S and upkeep.due_at > began and said == []
    upkeep.run()


def test_a_store_that_is_back_is_logged_once_and_ends_no_server():
    upkeep, said = chores()
    for problem in ("gone", "gone", None, None):
        upkeep.store.file.problem = lambda: problem
        upkeep.check_store()
    assert said == [("error", "gone"), ("info", "j is there again")] and upkeep.failure is None and upkeep.problem_since is None


def test_what_became_of_a_compaction_is_logged_and_the_next_one_may_begin():
    bug, full = ValueError("x"), L.StoreUnavailable("the disk is full")
    for error in (None, full, bug):
        upkeep, said = chores()
        upkeep.is_compacting = True

        def compact():
            if error:
                raise error
            upkeep.store.journal.file.size = 5
        upkeep.store.file.compact = compact
        upkeep.compact()
        assert said == [{None: ("info", "compacted the journal from 9 to 5 bytes"), full: ("warning", "the disk is full"), bug: ("bug", bug)}[error]]
        assert upkeep.is_compacting is False


def test_of_too_much_that_is_held_the_strangers_and_the_longest_silent_go_first_and_one_stays(loop, monkeypatch):
    monkeypatch.setattr(L, "HELD_BYTES", 1000)
    monkeypatch.setattr(L, "_keep_order", lambda conn: conn.rank)
    said, dropped, conns = [], [], loop.server.connections
    conns.log = types.SimpleNamespace(say=lambda *words: said.append(words))
    for held, wanted in (((400, 300, 200, 150, 0), [400]), ((2000, 0, 500), [2000]), ((5000,), [])):
        conns.all, dropped[:], conns.held_bytes = [types.SimpleNamespace(held_bytes=size, rank=at) for at, size in enumerate(held)], [], sum(held)

        def drop(conn):
            dropped.append(conn.held_bytes)
            conns.held_bytes -= conn.held_bytes
        monkeypatch.setattr(conns, "drop", drop)
        conns.drop_slowest()
        assert dropped == wanted and "the slowest connections were closed" in said.pop()[1]
    conns.all, conns.held_bytes = set(), 0


def test_an_option_that_a_server_does_not_have_is_named():
    with pytest.raises(L.LabtaskerTypeError, match="there is no option 'prot'; did you mean port"):
        L.Options(L.SERVE_OPTIONS, {"prot": 1})


def test_who_has_ended_its_sending_hears_what_was_done_for_it(loop):
    client, loop.server.writer.is_writing = loop.client(), True  # the writer is at work on what came before
    assert loop.call(client, *submit(a=1)) is None
    client.sock.recv = lambda size: b""
    loop.server.attend(client, 1)
    loop.server.settle()
    assert loop.answer(client)[0] == 201 and b"Connection: close" in client.sock.sent and client.state == "closed"


def test_a_request_may_come_byte_by_byte(loop):
    client = loop.client()
    for byte in loop.bytes(*submit(text="\u00e9\u4e2d")):
        assert client.sock.sent == b""
        loop.say(client, bytes([byte]))
    assert loop.answer(client)[0] == 201


def test_an_answer_goes_out_as_the_peer_reads(loop):
    client = loop.client()
    client.sock.room = 10
    loop.server.connections.all.add(client)
    loop.server.connections.selector.modify = lambda *_: None  # there is no real socket to wait for
    loop.say(client, loop.bytes("GET", ""))
    while client.outbox:
        size = len(client.sock.sent)
        loop.server.connections.send(client, b"")
        assert len(client.sock.sent) <= size + 10
    loop.server.connections.all.discard(client)
    assert loop.answer(client)[1]["queue_name"] == "q"


def test_of_many_that_wait_one_gets_the_task_that_comes(loop):
    waiting = [loop.client() for _ in range(50)]
    for client in waiting:
        assert loop.call(client, *fetch(30)) is None
    task_id = loop.call(loop.client(), *submit(i=1))[1]["task_id"]
    found = [loop.answer(client) for client in waiting]
    assert found[0][1]["task"]["task_id"] == task_id and found[1:] == [None] * 49
    loop.call(loop.client(), "POST", "/tasks", [{"args": {"i": i}} for i in range(60)])
    found = [loop.answer(client)[1]["task"]["task_id"] for client in waiting]
    assert len(set(found)) == 50
    assert not loop.server.parked.by_key and not loop.store.watched_keys


def test_each_that_waits_gets_what_it_asked_for(loop):
    wishes = [{"required_fields": ["a"]}, {"required_fields": ["b"]}, {"extra_filter": "args.a == 3"}]
    waiting = [loop.client() for _ in wishes]
    for client, wish in zip(waiting, wishes):
        loop.store.stand(loop.store.state.names["q"], L.read_call(
            loop.store, None, *L.find_route("POST", ME + "/tasks/next"), dict(wish, heartbeat_timeout=60), {}).request) \
            if "extra_filter" in wish else None
        assert loop.call(client, *fetch(30, **wish)) is None
    loop.call(loop.client(), *submit(b=1))
    assert [bool(loop.answer(client)) for client in waiting] == [False, True, False]
    loop.call(loop.client(), *submit(a=3))
    assert [bool(loop.answer(client)) for client in waiting] == [True, True, False]
    loop.call(loop.client(), *submit(a=3))
    assert [loop.answer(client)[1]["task"]["args"] for client in waiting] == [{"a": 3}, {"b": 1}, {"a": 3}]


def test_who_left_gets_no_task(loop):
    gone, there = loop.client(), loop.client()
    assert loop.call(gone, *fetch(30)) is None and loop.call(there, *fetch(30)) is None
    loop.server.connections.drop(gone)
    loop.call(loop.client(), *submit(i=1))
    assert loop.answer(gone) is None and loop.answer(there)[1]["found"]


def test_who_left_before_its_fetch_was_read_has_its_report_counted_and_gets_no_task(loop):
    client, gone = loop.client(), loop.client()
    for n in range(2):
        loop.call(client, *submit(i=n))
    task = loop.call(client, *fetch())[1]["task"]
    gone.sock.has_left = True
    loop.say(gone, loop.bytes(*fetch(report={"task_id": task["task_id"], "run_id": task["run_id"], "status": "success"})))
    assert loop.call(client, "GET", "/tasks/" + task["task_id"])[1]["status"] == "success"
    left = loop.call(client, *fetch())[1]["task"]
    assert left["args"] == {"i": 1} and left["retries"] == 0
    report = {"task_id": left["task_id"], "run_id": left["run_id"], "status": "failed"}
    gone, other = loop.client(), loop.client()
    assert loop.call(other, *fetch(50, report=report))[1]["task"]["task_id"] == left["task_id"], "its next attempt"
    assert loop.call(other, *fetch(50, report=dict(report, run_id=None, status="success")))[1]["found"] is False, "at once"


def test_who_left_before_its_fetch_was_read_gets_no_task(loop):
    loop.call(loop.client(), *submit(i=1))
    gone = loop.client()
    gone.sock.has_left = True
    assert loop.call(gone, *fetch()) is None and loop.call(loop.client(), *fetch())[1]["found"]


def end_fetch(fetch_id, **more):
    return "DELETE", "/tasks/next?fetch_id=%s%s" % (fetch_id, "".join("&%s=%s" % pair for pair in more.items()))


def test_a_fetch_that_is_ended_is_answered_at_once_and_gets_nothing_any_more(loop):
    ended, other, id = loop.client(), loop.client(), L.new_id()
    assert loop.call(other, *fetch(30)) is None and loop.call(ended, *fetch(30, fetch_id=id)) is None
    assert loop.call(loop.client(), *end_fetch(id))[0] == 204
    assert loop.answer(ended) == (200, {"found": False, "task": None}) and loop.answer(other) is None
    loop.call(loop.client(), *submit(i=1))
    loop.call(loop.client(), *submit(i=2))
    assert loop.answer(other)[1]["found"]
    assert loop.call(loop.client(), *fetch(30, fetch_id=id))[1] == {"found": False, "task": None}  # it arrives late
    assert loop.call(loop.client(), *fetch(30))[1]["task"]["args"] == {"i": 2}


def test_what_a_fetch_got_before_it_was_ended_is_answered_and_handed_back_when_asked_for(loop):
    loop.call(loop.client(), *submit(i=1))
    id, worker = L.new_id(), loop.call(loop.client(), "POST", "/workers", {})[1]["worker_id"]
    run = loop.call(loop.client(), *fetch(fetch_id=id, worker_id=worker, attempt={"host": "here"}))[1]["task"]
    for _ in range(2):
        loop.call(loop.client(), *end_fetch(id))
        again = loop.call(loop.client(), *fetch(30, fetch_id=id, worker_id=worker))[1]["task"]
        assert (again["run_id"], again["status"]) == (run["run_id"], "running")
    for _ in range(2):
        assert loop.call(loop.client(), *end_fetch(id, hand_back="true"))[0] == 204
        back = loop.call(loop.client(), "GET", "/tasks/" + run["task_id"])[1]
        assert (back["status"], back["retries"], back["interruptions"]) == ("pending", 0, 1)
        assert back["attempts"][0]["status"] == "pending" and "worker left" in back["reason"]
    assert loop.call(loop.client(), *end_fetch(L.new_id(), hand_back="true"))[0] == 204


def test_ended_fetches_are_not_remembered_for_ever(loop):
    for _ in range(L.MAX_ENDED_FETCHES + 10):
        loop.call(loop.client(), *end_fetch(L.new_id()))
    queue, = loop.store.state.queues.values()
    assert len(queue.ended_fetches) == L.MAX_ENDED_FETCHES


def test_who_has_waited_long_enough_hears_that_there_is_nothing(loop, clock):
    first, second = loop.client(), loop.client()
    assert loop.call(first, *fetch(0.05)) is None and loop.call(second, *fetch(30)) is None
    clock.at += 0.06
    loop.server.settle()
    assert loop.answer(first) == (200, {"found": False, "task": None}) and loop.answer(second) is None
    assert loop.server.parked.give_up_at > L.monotonic() + 20


def test_a_waiting_heartbeat_hears_at_once_of_the_end_of_its_run(loop):
    task_id = loop.call(loop.client(), *submit(i=1))[1]["task_id"]
    run_id = loop.call(loop.client(), *fetch())[1]["task"]["run_id"]
    beating = loop.client()
    path = "/tasks/%s/heartbeat?answer=status&wait_s=30&run_id=%s" % (task_id, run_id)
    assert loop.call(beating, "POST", path) is None
    assert loop.call(loop.client(), "POST", "/tasks/%s/status" % task_id, {"status": "cancelled"})[0] == 200
    assert loop.answer(beating) == (200, {"status": "cancelled"})


def test_who_waits_for_another_mark_is_woken_by_the_own_queue_only(loop):
    other = L.answer_call(loop.store, None, "POST", "/api/v1/queues", {"queue_name": "other", "password": "p"})[1]["queue_id"]
    seen, waiting = loop.call(loop.client(), "GET", "/mark")[1]["mark"], loop.client()
    assert loop.call(loop.client(), "GET", "/mark?seen=another&wait_s=30") == (200, {"mark": seen})
    assert loop.call(waiting, "GET", "/mark?seen=%s&wait_s=30" % seen) is None
    assert L.answer_call(loop.store, lambda: other, "POST", ME + "/tasks", {"args": {"i": 1}})[0] == 201
    loop.server.turn(0)
    assert loop.answer(waiting) is None
    assert loop.call(loop.client(), *submit(i=1))[0] == 201
    assert loop.answer(waiting) == loop.call(loop.client(), "GET", "/mark") != (200, {"mark": seen})


def test_a_thread_that_submits_wakes_who_waits(loop):
    client = loop.client()
    assert loop.call(client, *fetch(30)) is None
    queue_id = loop.store.state.names["q"]
    thread = threading.Thread(target=L.answer_call, args=(
        loop.store, lambda: queue_id, "POST", ME + "/tasks", {"args": {"i": 1}}))
    thread.start()
    thread.join()
    assert loop.answer(client) is None
    loop.server.turn(5)
    assert loop.answer(client)[1]["found"]


@pytest.mark.parametrize("name", ["write", "sync"])
@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 507), (errno.EIO, 503)])
def test_all_that_was_decided_in_a_turn_fails_with_its_line(loop, name, number, status):
    clients = [loop.client() for _ in range(3)]
    loop.store.journal.file.disk = FailingDisk.fail(name, 1, number)
    for client, request in zip(clients, (submit(i=1), submit(i=2), ("GET", "/tasks/none"))):
        client.inbox += loop.bytes(*request)
        loop.server.requests.read(client)
    loop.server.settle()
    assert [loop.answer(client)[0] for client in clients] == [status, status, 404]
    assert not next(iter(loop.store.state.queues.values())).tasks
    assert loop.call(clients[0], *submit(i=3))[0] == 201
    assert [task.args["i"] for task in next(iter(loop.store.state.queues.values())).tasks.values()] == [3]


def test_what_a_connection_sends_while_it_waits_for_an_answer_is_counted(loop):
    client = loop.client()
    assert loop.call(client, *fetch(30)) is None and loop.server.connections.held_bytes == 0
    client.inbox += b"x" * 1000
    loop.server.requests.read(client)
    assert loop.server.connections.held_bytes == 1000
    loop.server.connections.drop(client)
    loop.server.requests.read(client)  # it had its turn in this one
    assert loop.server.connections.held_bytes == 0


def test_requests_leave_no_cycles_behind(loop):
    """The server runs without Python's search for cycles."""
    def round_of(client):
        loop.call(client, *submit(i=1))
        task = loop.call(client, *fetch())[1]["task"]
        loop.call(client, "POST", "/tasks/%s/heartbeat?run_id=%s" % (task["task_id"], task["run_id"]))
        loop.call(client, "POST", "/tasks/%s/status" % task["task_id"], {"status": "success"})
        loop.call(client, "POST", "/tasks/%s/status" % task["task_id"], {"status": "running"})
        loop.call(client, "POST", "/tasks", {"args": 3})
        loop.call(client, "GET", "/nosuch")
        waiting = loop.client()
        loop.call(waiting, *fetch(30))
        loop.server.connections.drop(waiting)
        bad = loop.client()
        loop.say(bad, b"nonsense\r\n\r\n")
    client = loop.client()
    round_of(client)
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            round_of(client)
        assert gc.collect() < 20
    finally:
        gc.enable()


class Clock:
    """The monotonic clock of a server whose loop is turned by hand: what is due is done, a little late."""

    def __init__(self, loop, monkeypatch):
        self.loop, self.at = loop, 1000.0
        monkeypatch.setattr(L, "monotonic", lambda: self.at)
        loop.server.upkeep.due_at = loop.server.connections.swept_at = self.at

    def serve_for(self, seconds, before=lambda: None):
        """Return how often the server woke; `before` is done at each time."""
        server, end, wakes = self.loop.server, self.at + seconds, 0
        while self.at < end:
            self.loop.store.awake_until = max(self.at, min(server.due_at(), end))
            self.at = self.loop.store.awake_until + 0.01
            before()
            self.loop.store.notice_sleep()
            server.do_chores()
            wakes += 1
        return wakes

    def status(self, task_id):
        return self.loop.call(self.loop.client(), "GET", "/tasks/" + task_id)[1]["status"]


@pytest.fixture
def clock(loop, monkeypatch):
    return Clock(loop, monkeypatch)


def connect(loop, count):
    """Return so many sockets that are connected to the server, accepted or not."""
    loop.server.requests.has_left = lambda conn: False
    return [socket.create_connection(loop.server.listener.server_address) for _ in range(count)]


def turn(loop, peers=()):
    """Have the server take turns until nothing has changed; return what each peer got, None where nothing came."""
    while loop.server.connections.eager or loop.server.connections.selector.select(0.05):
        loop.server.turn(0)
    got = []
    for peer in peers:
        peer.setblocking(False)
        try:
            got.append(peer.recv(65536))
        except BlockingIOError:
            got.append(None)
        peer.setblocking(True)
    return got


def test_when_all_connections_are_busy_others_wait_until_an_answer_closes_one(loop, clock):
    """Those who wait cost no turns, and no connection is closed without the answer that says so."""
    loop.server.connections.most = 3
    peers = connect(loop, 8)
    turn(loop)
    assert len(loop.server.connections.all) == 3 and not loop.server.connections.selector.select(0)
    assert loop.server.due_at() <= clock.at + 1  # it looks again whether one of them has become silent
    got = []
    for peer in peers:
        peer.sendall(loop.bytes("GET", ""))
        got += turn(loop, [peer])
    assert [answer[9:12] + answer[-1:] for answer in got] == [b"200}"] * 8
    assert all(b"Connection: close" in answer for answer in got) and not loop.server.connections.all
    loop.server.connections.sweep()
    peers += connect(loop, 1)
    peers[-1].sendall(loop.bytes("GET", ""))
    assert b"Connection: close" not in turn(loop, peers[-1:])[0]  # there is room again
    for peer in peers:
        peer.close()


def test_where_there_is_no_room_the_longest_silent_are_closed_and_those_who_wait_hear_that_there_is_nothing(loop, clock):
    loop.server.connections.most = 3
    asked, silent, busy = connect(loop, 3)
    asked.sendall(loop.bytes(*fetch(50)))
    silent.sendall(loop.bytes("GET", ""))
    assert [part and part[9:12] for part in turn(loop, [asked, silent])] == [None, b"200"]
    clock.at += 10
    busy.sendall(loop.bytes("GET", ""))
    assert turn(loop, [busy])[0][9:12] == b"200"
    late = connect(loop, 2)
    turn(loop)
    for peer in late + [busy]:
        peer.sendall(loop.bytes("GET", ""))
    peers = [asked, silent, busy] + late
    got = turn(loop, peers)
    assert b"Connection: close" in got[0] and b'"found":false' in got[0], got[0]
    assert got[1] == b"" and [answer[9:12] for answer in got[2:]] == [b"200"] * 3
    for peer in peers:
        peer.close()


def test_a_client_that_was_introduced_keeps_its_connection_for_its_request_where_there_is_no_room(loop):
    (peer,), loop.server.connections.is_crowded = connect(loop, 1), True
    turn(loop)
    peer.sendall(b"GET /?nonce=%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"0" * 32))
    first, = turn(loop, [peer])
    peer.sendall(loop.bytes("GET", ""))
    second, = turn(loop, [peer])
    assert [answer[9:12] for answer in (first, second)] == [b"200", b"200"]
    assert [b"Connection: close" in answer for answer in (first, second)] == [False, True]
    peer.close()


def test_a_quiet_server_gives_up_a_silent_run_in_time_and_one_that_was_stopped_does_not(loop, clock):
    ids = [loop.call(loop.client(), *submit(i=i))[1]["task_id"] for i in range(2)]
    loop.call(loop.client(), *fetch())
    assert clock.serve_for(55) < 20 and clock.status(ids[0]) == "running"
    clock.serve_for(10)
    assert clock.status(ids[0]) == "pending"
    loop.call(loop.client(), *fetch())
    clock.serve_for(30)
    clock.at += 600
    loop.store.look_for_timeouts(next(iter(loop.store.state.queues)))  # as a fetch in a thread does, before the loop wakes
    clock.serve_for(55)
    assert "running" in (clock.status(ids[1]), clock.status(ids[0]))
    clock.serve_for(10)
    assert clock.status(ids[0]) == clock.status(ids[1]) == "pending"


@pytest.mark.parametrize("every_s", [0.3, 2.5, 7])
@pytest.mark.parametrize("times, given_up_s", [({"heartbeat_timeout": 60}, 60), ({"eta_max": "90"}, 90)], ids=["silent", "long"])
def test_a_run_is_given_up_in_time_however_often_others_begin(loop, clock, every_s, times, given_up_s):
    """Only a clock that shows a gap tells that the server slept, not the schedule, which each new run changes."""
    dead = loop.call(loop.client(), *submit(i=0))[1]["task_id"]
    loop.call(loop.client(), "POST", "/tasks/next", dict({"start_heartbeat": "heartbeat_timeout" in times}, **times))
    last = [clock.at]

    def others_work():
        if clock.at >= last[0] + every_s:
            last[0] = clock.at
            other = loop.call(loop.client(), *submit(j=1))[1]["task_id"]
            loop.call(loop.client(), *fetch(required_fields=["j"]))
            loop.call(loop.client(), "POST", "/tasks/%s/status" % other, {"status": "success"})
    clock.serve_for(given_up_s - 1, others_work)
    assert clock.status(dead) == "running"
    clock.serve_for(5, others_work)
    assert clock.status(dead) == "pending"


def test_who_waits_gets_a_task_when_its_pause_is_over(loop, clock, monkeypatch):
    monkeypatch.setattr(L, "now", lambda: L.Instant(1.7e9 + clock.at))
    one = loop.call(loop.client(), *submit(i=0))[1]["task_id"]
    other = loop.call(loop.client(), *submit(i=1))[1]["task_id"]
    for _ in range(2):
        task_id = loop.call(loop.client(), *fetch())[1]["task"]["task_id"]
        loop.call(loop.client(), "POST", "/tasks/%s/status" % task_id, {"status": "pending", "delay_s": 10})
    waiting = [loop.client() for _ in range(2)]
    assert [loop.call(client, *fetch(50)) for client in waiting] == [None, None]
    clock.serve_for(9, loop.server.settle)
    assert [loop.answer(client) for client in waiting] == [None, None]
    clock.serve_for(2, loop.server.settle)
    loop.server.settle()
    assert {loop.answer(client)[1]["task"]["task_id"] for client in waiting} == {one, other}


def test_a_time_out_that_is_shortened_while_the_task_runs_is_kept(loop, clock):
    one = loop.call(loop.client(), *submit(i=0))[1]["task_id"]
    loop.call(loop.client(), *fetch())
    clock.serve_for(20)
    queue = next(iter(loop.store.state.queues))
    L.answer_call(loop.store, lambda: queue, "PUT", ME + "/tasks", [{"task_id": one, "heartbeat_timeout": 5}],
                  {"reset_pending": "false"})
    clock.serve_for(3)
    assert clock.status(one) == "pending"


@pytest.mark.parametrize("line", [1, 0], ids=["a-thread-is-free", "none-is"])
def test_a_large_answer_is_made_by_a_thread_from_its_second_time_on(loop, line):
    queue = next(iter(loop.store.state.queues))
    task = {"args": {"text": "x" * 2 * L.LARGE_ANSWER_BYTES}}
    _, answer = L.answer_call(loop.store, lambda: queue, "POST", ME + "/tasks", task)
    path, handed = "/tasks/" + answer["task_id"], []
    loop.server.threads.start = lambda gate: handed.extend(gate.begin())
    loop.server.threads.gates["answers"] = L.Gate(line, line, 0, 0)
    assert loop.call(loop.client(), "GET", path)[0] == 200 and not handed
    client = loop.client()
    assert loop.call(client, "GET", path) is None
    assert len(handed) == line and (client.state == "closed") == (not line)


def test_listings_of_one_queue_leave_room_for_anothers_however_the_queue_is_named(loop):
    queue_id = loop.store.state.names["q"]
    L.answer_call(loop.store, None, "POST", "/api/v1/queues", {"queue_name": "other", "password": "p"})
    for name in (queue_id, "other"):
        loop.store.login(name, "p")
    handed, clients = [], []
    loop.server.threads.start = lambda gate: handed.extend(gate.begin())
    for login in ("q:p", queue_id + ":p", "q:" + loop.server.key, queue_id + ":p", "other:p", "other:p", "other:p"):
        loop.auth = base64.b64encode(login.encode()).decode()
        clients.append(loop.client())
        assert loop.call(clients[-1], "POST", "/tasks/search", {}) is None
    assert [job[0] for job in handed] == clients[:2] + clients[4:6]


def refuse_threads(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", start)


def test_a_server_that_gets_no_thread_writes_in_its_loop_and_compacts_later(loop, monkeypatch, capsys):
    refuse_threads(monkeypatch)
    monkeypatch.setattr(loop.store.file, "is_bloated", lambda: True)
    loop.server.do_chores()
    loop.server.upkeep.due_at = 0
    loop.server.do_chores()
    assert capsys.readouterr().err.count("is not compacted now: no thread could be started") == 2
    client = loop.client()
    loop.server.connections.all.update(loop.client() for _ in range(9))  # among so many the writer's thread would write
    loop.server.turn = lambda timeout_s: setattr(loop.server, "stopping", loop.call(client, *submit(i=1)))
    monkeypatch.setattr(L, "STOP_GRACE_S", 0)
    monkeypatch.setattr(L.sys, "setswitchinterval", lambda _: None)
    try:
        loop.server.serve_forever()
    finally:
        gc.enable()
        loop.server.connections.all.clear()
    assert loop.answer(client)[0] == 201


def test_a_connection_that_can_not_be_watched_again_is_the_end_of_no_other(loop, monkeypatch):
    client, other = loop.client(), loop.client()
    loop.server.threads.start = lambda gate: [loop.server.threads.run(job) for job in gate.begin()]
    client.sock.setblocking = lambda _: None
    assert loop.call(client, "POST", "/tasks/search", {}) is None

    def register(*_):
        raise OSError(errno.ENOSPC, "no more watches")
    monkeypatch.setattr(loop.server.connections.selector, "register", register)
    loop.server.take_back()
    assert client.state == "closed" and not loop.server.threads.gates["work"].count
    assert loop.call(other, "GET", "")[0] == 200


@pytest.mark.slow
def test_others_are_answered_while_a_listing_runs(server):
    server.http("POST", ME + "/tasks", [{"args": {"i": i}} for i in range(5000)])
    ended = []

    def search():
        for _ in range(5):
            body = {"extra_filter": "args.i >= 0 and regex(task_id, '[0-9a-f]+')", "limit": 5000, "sort": [["args.i", -1]]}
            ended.append(server.http("POST", ME + "/tasks/search", body)[0])
    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    count = 0
    while any(thread.is_alive() for thread in threads):
        assert server.http("GET", "/health")[0] == 200
        count += 1
    assert ended == [200] * 10 and count > 10


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_answers_those_who_wait(server):
    assert server.http("POST", ME + "/tasks/next", {"heartbeat_timeout": 60})[0] == 200  # login and request are known
    host, port = server.url[7:].split(":")
    login = base64.b64encode(("%s:%s" % (server.queue, server.password)).encode()).decode()
    waiting = [http.client.HTTPConnection(host, int(port), timeout=30) for _ in range(3)]
    for conn in waiting:
        conn.request("POST", ME + "/tasks/next", json.dumps({"heartbeat_timeout": 60, "wait_s": 50}), {
            "Authorization": "Basic " + login, "Content-Type": "application/json"})
    assert server.http("GET", "/health")[0] == 200  # it was sent later, so the server has read the others
    half = socket.create_connection((host, int(port)))
    half.sendall(b"POST /api/v1/queues/me/tasks HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
    began = L.monotonic()
    server.stop()
    assert L.monotonic() - began < 10
    half.close()
    answers = [conn.getresponse() for conn in waiting]
    assert [answer.status for answer in answers] == [200] * 3
    assert [json.loads(answer.read().decode())["found"] for answer in answers] == [False] * 3
