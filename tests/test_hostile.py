"""Who wants to stop other people's work: a thousand connections, bytes without end, pauses without end.

While each attack of the table goes on, others are answered, the server's memory stays what it was, and its log holds
no traceback. `Others` is one who works: it heartbeats and submits all the while."""
import base64
import collections
import heapq
import json
import os
import re
import selectors
import socket
import sys
import threading
import time

import pytest

import labtasker
from harness import PASSWORD, QUEUE, Server, http, wait_until

pytestmark = pytest.mark.slow

MANY = int(os.environ.get("LT_TEST_CONNECTIONS", "1000"))
WRONG = int(os.environ.get("LT_TEST_WRONG_PASSWORDS", "1000"))
TURNS_S = float(os.environ.get("LT_TEST_ATTACK_S", "0.5"))  # how long an attack goes on once it is under way
ME = "/api/v1/queues/me"
GROWTH_KIB = 3 * labtasker.HELD_BYTES >> 10  # of a server's memory under any attack: what it may hold, and its allocator


def login(name=QUEUE, password=PASSWORD):
    return "Authorization: Basic %s\r\n" % base64.b64encode(("%s:%s" % (name, password)).encode()).decode()


def request(method, path, body=None, headers="", auth=login()):
    """Return the bytes of a request."""
    body = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return ("%s %s HTTP/1.1\r\nHost: x\r\n%s%sContent-Length: %d\r\n\r\n" % (
        method, path, auth, headers, len(body))).encode() + body


class Peer:
    """A connection to a server."""

    def __init__(self, server):
        host, port = server.url.split("//")[1].split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=20)

    def send(self, data):
        """Send as much as the server takes; False once it has closed."""
        try:
            self.sock.sendall(data)
            return True
        except OSError:
            return False

    def answer(self):
        """Return (status, head and body) of the next answer, (None, what came) where the connection ends."""
        got = b""
        try:
            while b"\r\n\r\n" not in got:
                more = self.sock.recv(65536)
                if not more:
                    return None, got
                got += more
            head, _, body = got.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            while length and len(body) < int(length.group(1)):
                body += self.sock.recv(65536)
        except OSError:
            return None, got
        return int(head[9:12]), head + b"\r\n\r\n" + body

    def close(self):
        self.sock.close()


class Others:
    """One who works while others attack: the answers' statuses and the longest of them, in seconds."""

    def __init__(self, server):
        self.server, self.took, self.wrong, self.ended = server, [], [], threading.Event()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        peer = Peer(self.server)
        while not self.ended.wait(0.01):
            for asked in (request("GET", ME), request("POST", ME + "/tasks", {"args": {"i": 1}}), request("GET", "/health")):
                began = time.monotonic()
                peer.send(asked)
                status, answer = peer.answer()
                self.took.append(time.monotonic() - began)
                if status not in (200, 201):
                    self.wrong.append((status, answer))
                    return
        peer.close()

    def end(self):
        """End it; all it asked was answered, most of it at once, and nothing took long."""
        self.ended.set()
        self.thread.join(30)
        assert not self.wrong and self.took, self.wrong
        assert sorted(self.took)[len(self.took) * 9 // 10] < 1 and max(self.took) < 5, sorted(self.took)[-5:]
        return max(self.took)


def memory_kib(server):
    with open("/proc/%d/status" % server.process.pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))


def attacked(server, attack):
    """Run attack(server, until): the others must be answered, memory must stay flat, the log clean."""
    server.http("GET", ME)
    before, others = memory_kib(server), Others(server)
    try:
        wait_until(lambda: len(others.took) > 3 or others.wrong, "the others work")
        attack(server)
        peak = memory_kib(server)
    finally:
        longest = others.end()
    assert peak - before < GROWTH_KIB, "grew by %d KiB" % (peak - before)
    assert "Traceback" not in server.output(), server.output()
    assert server.http("GET", "/health")[0] == 200
    print("longest %.0f ms, grew by %d KiB" % (longest * 1e3, peak - before))


def hold(peers, send=lambda peer: True):
    """Have each peer send something again and again for a while."""
    until = time.monotonic() + TURNS_S
    wait_until(lambda: [send(peer) for peer in peers] and time.monotonic() > until, "the time passes", TURNS_S + 60)
    for peer in peers:
        peer.close()


def half_open(server):
    hold([Peer(server) for _ in range(MANY)])


def slow_heads(server):
    peers = [Peer(server) for _ in range(MANY)]
    for peer in peers:
        peer.send(b"POST /api/v1/queues HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    hold(peers, lambda peer: peer.send(b"a"))


def slow_bodies(server):
    peers = [Peer(server) for _ in range(MANY)]
    for peer in peers:
        peer.send(b"POST /api/v1/queues HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{" + b" " * 30000)
    hold(peers, lambda peer: peer.send(b" "))


def slow_readers(server):
    server.http("POST", ME + "/tasks", [{"args": {"text": "x" * 5000}} for _ in range(400)])
    peers = [Peer(server) for _ in range(30)]
    for peer in peers:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.send(request("POST", ME + "/tasks/search", {"limit": 1000}))
    hold(peers)


def slow_readers_of_one_task(server):
    task_id = server.http("POST", ME + "/tasks", {"args": {"text": "x" * 4000000}})[1]["task_id"]
    peers = [Peer(server) for _ in range(100)]
    for peer in peers:
        peer.send(request("GET", ME + "/tasks/" + task_id))
    hold(peers)


def heads_without_end(server):
    send_until_closed([Peer(server) for _ in range(20)], b"X-Header: %s\r\n" % (b"a" * 8000))


def send_until_closed(peers, data):
    until = time.monotonic() + 20
    while peers and time.monotonic() < until:
        peers = [peer for peer in peers if peer.send(data) or peer.close()]
    assert not peers, "more and more was taken"


def bodies_without_end(server):
    peers = [Peer(server) for _ in range(20)]
    for peer in peers:
        peer.send(b"POST /api/v1/queues HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
    send_until_closed(peers, b" " * 65536)


def bodies_of_strangers(server):
    """16 MB are not taken from who has not shown a right password."""
    for auth in ("", login("nosuch"), login(QUEUE, "wrong")):
        peers = [Peer(server) for _ in range(2)]
        for peer in peers:
            peer.send(request("POST", ME + "/tasks", auth=auth).replace(b"Content-Length: 0", b"Content-Length: 16000000"))
            peer.send(b" " * 100000)
        for peer in peers:
            assert peer.answer()[0] in (401, 503)
            peer.close()


def large_bodies_at_once(server):
    """More than there is room for are told to come again."""
    peers = [Peer(server) for _ in range(10)]
    for peer in peers:
        peer.send(request("POST", ME + "/tasks").replace(b"Content-Length: 0", b"Content-Length: 16000000") + b" " * 1000)
    refused = [peer for peer in peers[3:] if peer.answer()[0] == 503]
    assert refused
    hold(peers)


def ten_gigabytes(server):
    for auth in ("", login()):
        peer = Peer(server)
        peer.send(request("POST", ME + "/tasks", auth=auth).replace(b"Content-Length: 0", b"Content-Length: 10000000000"))
        peer.send(b" " * 1000000)
        assert peer.answer()[0] == 413
        peer.close()


def pipelined(server):
    """Thousands of requests in one breath wait for their turn."""
    peers = [Peer(server) for _ in range(10)]
    data = request("POST", ME + "/tasks", {"args": {"i": 1}}) * 300
    for peer in peers:
        peer.send(data)
    hold(peers)


def deep_json(server):
    for opening in (b"[", b'{"a":', b'[{"a":'):
        for depth in (150, 1000, 10000, 1000000):
            answer = server_says(server, request("POST", ME + "/tasks", opening * depth))
            assert answer in (413, 422), (opening, depth, answer)
    closed = b'{"args":' + b'{"a":' * 300 + b"1" + b"}" * 301
    assert server_says(server, request("POST", ME + "/tasks", closed)) == 422
    dots = json.dumps({"args": {".".join("a" * 30000): 1}}).encode()
    assert server_says(server, request("POST", ME + "/tasks", dots)) == 422


def server_says(server, data):
    peer = Peer(server)
    peer.send(data)
    status = peer.answer()[0]
    peer.close()
    return status


def explosive_patterns(server):
    server.http("POST", ME + "/tasks", [
        {"task_name": "long", "args": {"text": "a" * 5000 + "!"}} for _ in range(10)])
    for pattern in ("(a+)+$", "(a|a)*$", "(a*)*$", "(.*a){20}$", "a.*a.*a.*a.*b"):
        body = {"task_name": "long", "extra_filter": {"args.text": {"$regex": pattern}}}
        assert server.http("POST", ME + "/tasks/search", body)[0] == 400, pattern
    for pattern in ("a.*b.*c", "a\\w+a\\w+b", "\\w+?\\w+?b"):
        body = {"task_name": "long", "extra_filter": {"$or": [{"args.text": {"$regex": pattern}}] * 20}}
        assert server.http("POST", ME + "/tasks/search", body)[0] == 200, pattern


def silent_listeners(server):
    peers = [Peer(server) for _ in range(40)]
    for peer in peers:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.send(request("GET", ME + "/events"))
    for _ in range(5):
        server.http("POST", ME + "/tasks", [{"args": {"text": "x" * 20000}} for _ in range(20)])
    hold(peers)


def wrong_passwords(server):
    """They wait, each a second and all in one line; who is known does not, nor who comes with another right one."""
    name = "newcomer%d" % time.monotonic()
    assert http("POST", server.url + "/api/v1/queues", {"queue_name": name, "password": "p"})[0] == 201
    selector, asked, seen, began = selectors.DefaultSelector(), 0, collections.Counter(), time.monotonic()
    peers = [Peer(server) for _ in range(300)]
    for peer in peers:
        peer.sock.settimeout(20)
        selector.register(peer.sock, selectors.EVENT_READ, peer)
    ready = list(peers)
    while sum(seen.values()) < WRONG:
        for peer in ready:
            asked += 1
            assert peer.send(request("GET", ME, auth=login(QUEUE if asked % 2 else "q%d" % asked, "no%d" % asked)))
        ready = [key.data for key, _ in selector.select(20)]
        assert ready, "nobody is answered any more"
        for peer in ready:
            status, answer = peer.answer()
            assert status == 401 or b"Retry-After: " in answer, (status, answer)
            seen[status] += 1
    newcomer = Peer(server)
    for _ in range(2):
        newcomer.send(request("GET", ME, auth=login(name, "p")))
        assert newcomer.answer()[0] == 200
    for peer in peers + [newcomer]:
        peer.close()
    print(dict(seen))
    assert seen[401] < 20 + 30 * (time.monotonic() - began), "they are not slowed down"


def new_queues_without_end(server):
    def make(number):
        for i in range(2):
            name = "n%d-%d" % (number, i)
            status = http("POST", server.url + "/api/v1/queues", {"queue_name": name, "password": "p"})[0]
            assert status in (201, 503)
    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def many_listings(server):
    server.http("POST", ME + "/tasks", [{"args": {"i": i}} for i in range(2000)])
    peers = [Peer(server) for _ in range(200)]
    for peer in peers:
        peer.send(request("POST", ME + "/tasks/search", {"extra_filter": "args.i > 5", "limit": 5}))
    for peer in peers[:20]:
        assert peer.answer()[0] in (200, 503)
    for peer in peers:
        peer.close()


ATTACKS = [half_open, slow_heads, slow_bodies, slow_readers, slow_readers_of_one_task, heads_without_end,
           bodies_without_end, bodies_of_strangers, large_bodies_at_once, ten_gigabytes, pipelined, deep_json,
           explosive_patterns, silent_listeners, wrong_passwords, new_queues_without_end, many_listings]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("victim")) as server:
        yield server


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_others_work_on_under(attack, victim):
    attacked(victim, attack)


def test_it_ends_in_time_whatever_goes_on(tmp_path):
    """SIGTERM while all kinds of requests are under way: exit 0 within 5 s, with an end line in the journal."""
    with Server(tmp_path / "server") as server:
        server.http("POST", ME + "/tasks", [{"args": {"i": i}} for i in range(3000)])
        search = request("POST", ME + "/tasks/search", {"extra_filter": "regex(task_id, '[0-9a-f]+$')", "limit": 9999})
        asked = [b"", b"GET ", request("GET", ME + "/events"), search, search,
                 request("POST", ME + "/tasks/next", {"heartbeat_timeout": 9, "required_fields": ["z"], "wait_s": 50}),
                 request("GET", ME, auth=login(QUEUE, "no")), request("POST", ME + "/tasks", [{"args": {"i": 1}}] * 500)]
        peers = [Peer(server) for _ in asked * 3]
        for peer, data in zip(peers, asked * 3):
            peer.send(data)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5 + 5  # what was promised, and as much for a busy machine
        for peer in peers:
            peer.close()
        assert json.loads(server.journal.read_text().splitlines()[-1])["end"] is True
        assert "Traceback" not in server.output()


def few_files(folder, count):
    """Return the path of a Python that may open so few files."""
    path = folder / "few_files"
    path.write_text('#!/bin/sh\nulimit -n %d\nexec "%s" "$@"\n' % (count, sys.executable))
    path.chmod(0o700)
    return str(path)


def test_a_server_with_few_files_answers_all_and_has_some_left_for_its_journal(tmp_path):
    """Who keeps a connection that the answer closes would wait for ever; who is silent makes room."""
    with Server(tmp_path / "server", python=few_files(tmp_path, 48), args=["--log-level", "warning"]) as server:
        silent, asked, answered = [Peer(server) for _ in range(30)], 0, []
        for _ in range(2):
            peers = [Peer(server) for _ in range(40)]
            for peer in peers:
                peer.send(request("POST", ME + "/tasks", {"args": {"i": asked}}))
                asked += 1
            answered += [peer.answer()[0] for peer in peers]
            silent += peers
        assert answered == [201] * asked
        assert server.output().count("connections are taken") == 1 and "Traceback" not in server.output()
        for peer in silent:
            peer.close()


WORKERS = int(os.environ.get("LT_TEST_WORKERS", "100"))
BEATS_S = float(os.environ.get("LT_TEST_BEATS_S", "1.5"))
BEAT_EVERY_S = 2.0  # five times as often as workers do


def test_connected_workers_beat(tmp_path):
    """Each has a connection of its own and a running task; no heartbeat is refused, and none takes long."""
    with Server(tmp_path / "server") as server:
        server.http("POST", ME + "/tasks", [{"args": {"i": i}} for i in range(WORKERS)])
        workers, selector = [], selectors.DefaultSelector()
        for at in range(WORKERS):
            peer = Peer(server)
            peer.send(request("POST", ME + "/tasks/next", {"heartbeat_timeout": 60}))
            task = json.loads(peer.answer()[1].partition(b"\r\n\r\n")[2].decode())["task"]
            peer.beat, peer.sent_at = request("POST", ME + "/tasks/%s/heartbeat" % task["task_id"]), None
            selector.register(peer.sock, selectors.EVENT_READ, peer)
            workers.append(peer)
        began, took = time.monotonic(), []
        due = [(began + BEAT_EVERY_S * at / WORKERS, at) for at in range(WORKERS)]
        while due[0][0] < began + BEATS_S or any(peer.sent_at for peer in workers):
            while due[0][0] <= min(time.monotonic(), began + BEATS_S):
                at = due[0][1]
                heapq.heapreplace(due, (due[0][0] + BEAT_EVERY_S, at))
                if not workers[at].sent_at:
                    workers[at].sent_at = time.monotonic()
                    workers[at].send(workers[at].beat)
            for key, _ in selector.select(max(0.001, due[0][0] - time.monotonic())):
                assert key.data.answer()[0] == 204
                took.append(time.monotonic() - key.data.sent_at)
                key.data.sent_at = None
        took.sort()
        print("%d heartbeats: p50 %.1f ms, p99 %.1f ms, longest %.1f ms" % (
            len(took), took[len(took) // 2] * 1e3, took[len(took) * 99 // 100] * 1e3, took[-1] * 1e3))
        assert took[len(took) * 99 // 100] < 0.5
        for key in list(selector.get_map().values()):
            key.data.close()
        assert "Traceback" not in server.output()
