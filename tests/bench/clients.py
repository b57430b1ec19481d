"""Load from client processes: all start together, each measures every request of its own, and says what it got.

A client is a plain socket with requests made by hand, so that on a machine which the clients share with the server the
server is measured and not `http.client`."""
import base64
import json
import multiprocessing
import re
import socket
import sys
import threading
import time

TASK = '{"args": {"i": %d, "k": %d, "lr": 0.1}, "metadata": {"tags": ["v1"]}}'
FOREVER = float("inf")
ME = "/api/v1/queues/me"
_ID = re.compile(rb'"task_id": ?"([^"]+)"')


class Share:
    """What one client did: `begin` and `end` on the monotonic clock, `seconds` of each request, `ids` of the tasks."""

    def __init__(self):
        self.begin = self.end = 0.0
        self.seconds, self.ids = [], []

    def did(self, started, task_id):
        """Count a request, or a pair of them, that began at `started`."""
        self.end = time.perf_counter()
        self.seconds.append(self.end - started)
        self.ids.append(task_id)


class Load:
    """What all clients did together; `pace` is each client's number of requests a second."""

    def __init__(self, shares):
        self.ids = [one for share in shares for one in share.ids]
        self.wall_s = max(share.end for share in shares) - min(share.begin for share in shares)
        self.rate = len(self.ids) / self.wall_s
        self.seconds = sorted(one for share in shares for one in share.seconds)
        self.counts = [len(share.ids) for share in shares]
        self.pace = [len(share.ids) / (share.end - share.begin) for share in shares]

    def percentile(self, part):
        """Return the seconds within which this part (0 to 1) of the requests was answered."""
        return self.seconds[min(len(self.seconds) - 1, int(len(self.seconds) * part))]


def together(function, clients, *args):
    """Return the Load of `function(k, go, *args)` run in so many processes; it calls go() when it is ready, and
    returns its Share."""
    fork = multiprocessing.get_context("fork")
    barrier, processes, pipes = fork.Barrier(clients), [], []
    for k in range(clients):
        mine, its = fork.Pipe(False)
        process = fork.Process(target=_client, args=(function, k, barrier, its, args), daemon=True)
        process.start()
        its.close()
        processes.append(process)
        pipes.append(mine)
    try:
        return Load([pipe.recv() for pipe in pipes])
    except EOFError:
        raise AssertionError("a client process failed") from None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _client(function, k, barrier, pipe, args):
    try:
        pipe.send(function(k, barrier.wait, *args))
    except threading.BrokenBarrierError:  # another failed, and says why
        sys.exit(1)
    except BaseException:
        barrier.abort()
        raise


def connect(port):
    """Return a connected socket that sends at once."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=300)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Http:
    """One kept connection to a server: `ask(request)` with what `request()` made."""

    def __init__(self, port, login=None):
        self.connection = connect(port)
        self.head = "Host: localhost\r\nContent-Type: application/json\r\n"
        if login:
            self.head += "Authorization: Basic %s\r\n" % base64.b64encode(":".join(login).encode()).decode()

    def __del__(self):
        self.connection.close()

    def request(self, method, path, body=""):
        """Return the bytes of a request with this text for a body."""
        return ("%s %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (
            method, path, self.head, len(body), body)).encode()

    def ask(self, request):
        """Return (status, body) of the answer."""
        self.connection.sendall(request)
        got = self.connection.recv(65536)
        while b"\r\n\r\n" not in got:
            got += self._more()
        head, _, body = got.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15:].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(body) < length:
            pieces = [body]
            while length > sum(map(len, pieces)):
                pieces.append(self._more())
            body = b"".join(pieces)
        return int(got[9:12]), body

    def call(self, method, path, body=None, expect=200):
        """Return the decoded answer to a request, or raise AssertionError where its status is another."""
        status, answer = self.ask(self.request(method, path, "" if body is None else json.dumps(body)))
        assert status == expect, (method, path, status, answer[:500])
        return json.loads(answer) if answer else None

    def _more(self):
        more = self.connection.recv(1 << 20)
        assert more, "the server closed the connection"
        return more


# The v1 wire: our server and Labtasker 1.0.1


def pipelined(http, requests):
    """Send requests without waiting for answers, and read these: all must be 200."""
    http.connection.sendall(b"".join(requests))
    got = b""
    while True:
        got += http._more()
        head, _, body = got[got.rfind(b"HTTP/1.1 "):].partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15:].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if got.count(b"HTTP/1.1 ") == len(requests) and b"\r\n\r\n" in got and len(body) >= length:
            break
    assert got.count(b"HTTP/1.1 200") == len(requests), got[:500]


def submit(k, go, port, login, count=FOREVER, seconds=FOREVER):
    """Submit tasks one a request: so many, or for so long."""
    http, share = Http(port, login), Share()
    http.call("GET", ME)  # the password is checked before the time counts
    go()
    share.begin = started = time.perf_counter()
    while len(share.ids) < count and started - share.begin < seconds:
        status, answer = http.ask(http.request("POST", ME + "/tasks", TASK % (len(share.ids), k)))
        assert status == 201, (status, answer)
        share.did(started, _ID.search(answer).group(1))
        started = share.end
    return share


def pairs(k, go, port, login):
    """Fetch tasks and report each a success, until there is none."""
    http, share = Http(port, login), Share()
    worker = http.call("POST", ME + "/workers", {}, expect=201)["worker_id"]
    fetch = http.request("POST", ME + "/tasks/next", json.dumps(
        {"worker_id": worker, "required_fields": ["i", "k", "lr"], "heartbeat_timeout": 60}))
    report = json.dumps({"status": "success", "summary": {"acc": 0.5}, "worker_id": worker})
    go()
    share.begin = started = share.end = time.perf_counter()
    while True:
        status, answer = http.ask(fetch)
        assert status == 200, (status, answer)
        found = _ID.search(answer)
        if not found:
            return share
        task_id = found.group(1)
        status, answer = http.ask(http.request("POST", "%s/tasks/%s/status" % (ME, task_id.decode()), report))
        assert status == 200, (status, answer)
        share.did(started, task_id)
        started = share.end


def joined(k, go, port, login):
    """Do what `pairs` does, but each report comes with the fetch of the next task."""
    http, share = Http(port, login), Share()
    worker = http.call("POST", ME + "/workers", {}, expect=201)["worker_id"]
    wish = {"worker_id": worker, "required_fields": ["i", "k", "lr"], "heartbeat_timeout": 60}
    report = {"status": "success", "summary": {"acc": 0.5}, "worker_id": worker, "task_id": "%s"}
    body, after = json.dumps(wish), json.dumps(dict(wish, report=report))
    go()
    share.begin = started = share.end = time.perf_counter()
    task_id = None
    while True:
        status, answer = http.ask(http.request("POST", ME + "/tasks/next", body))
        assert status == 200, (status, answer)
        if task_id:
            share.did(started, task_id)
            started = share.end
        found = _ID.search(answer)
        if not found:
            return share
        task_id = found.group(1)
        body = after % task_id.decode()


def in_rows(numbers):
    """Return the path and the body of the request for tasks as `TASK % (number, 0)`, sent as rows."""
    return "/tasks/rows", '{"metadata": {"tags": ["v1"]}, "args": ["i", "k", "lr"], "rows": [%s]}' % ", ".join(
        "[%d, 0, 0.1]" % number for number in numbers)


def in_list(numbers, make=lambda number: TASK % (number, 0)):
    """Return the path and the body of the request for tasks, each the text that `make(number)` gives."""
    return "/tasks", "[%s]" % ", ".join(map(make, numbers))


def batches(k, go, port, login, requests, size, write=in_list):
    """Submit so many requests of `size` tasks, of which `write` returns the path and the body; a share's ids are all."""
    http, share = Http(port, login), Share()
    http.call("GET", ME)
    made = []
    for number in range(requests):
        path, body = write(range(number * size, number * size + size))
        made.append(http.request("POST", ME + path, body))
    go()
    share.begin = started = time.perf_counter()
    for request in made:
        status, answer = http.ask(request)
        assert status == 201, (status, answer[:500])
        share.did(started, None)
        share.ids[-1:] = re.findall(rb"[0-9a-f-]{36}", answer)
        started = share.end
    return share


# The v2 wire: Labtasker 2.8.0

QUEUE_2 = "/api/v2/queues/bench"


def submit_v2(k, go, port, _, count=FOREVER, seconds=FOREVER):
    """As `submit`; the client chooses the ids."""
    http, share = Http(port), Share()
    http.call("GET", "/health")
    go()
    share.begin = started = time.perf_counter()
    while len(share.ids) < count and started - share.begin < seconds:
        task_id = "t_%06x%06x" % (k, len(share.ids))
        status, answer = http.ask(http.request("PUT", "%s/tasks/%s" % (QUEUE_2, task_id), TASK % (len(share.ids), k)))
        assert status == 201, (status, answer)
        share.did(started, task_id.encode())
        started = share.end
    return share


def pairs_v2(k, go, port, _):
    """As `pairs`: claim and complete. A 503 says that it is busy, and is asked again."""
    http, share, runs = Http(port), Share(), 0
    http.call("GET", "/health")
    go()
    share.begin = started = share.end = time.perf_counter()
    while True:
        runs += 1
        run_id = "r_%06x%06x" % (k, runs)
        status, answer = http.ask(http.request("POST", QUEUE_2 + "/tasks/claim",
                                               json.dumps({"route": "default", "run_id": run_id})))
        if status == 503:
            continue
        if status == 204:
            return share
        assert status == 200, (status, answer)
        task_id = json.loads(answer)["task"]["id"]
        request = http.request("POST", "%s/tasks/%s/complete" % (QUEUE_2, task_id),
                               json.dumps({"run_id": run_id, "result": {"acc": 0.5}}))
        status, answer = http.ask(request)
        while status == 503:
            status, answer = http.ask(request)
        assert status == 204, (status, answer)
        share.did(started, task_id.encode())
        started = share.end


# beanstalkd's protocol


class Lines:
    """One connection to beanstalkd."""

    def __init__(self, port):
        self.connection = connect(port)

    def ask(self, request):
        """Return the words of the answer's first line; the body of a job is read too."""
        self.connection.sendall(request)
        got = self.connection.recv(65536)
        while not got.endswith(b"\r\n"):
            got += self.connection.recv(65536)
        words = got.split(b"\r\n", 1)[0].split()
        while words[0] == b"RESERVED" and len(got) < got.index(b"\r\n") + 4 + int(words[2]):
            got += self.connection.recv(65536)
        return words


def submit_beanstalk(k, go, port, _, count=FOREVER, seconds=FOREVER):
    """As `submit`: put."""
    lines, share = Lines(port), Share()
    go()
    share.begin = started = time.perf_counter()
    while len(share.ids) < count and started - share.begin < seconds:
        job = (TASK % (len(share.ids), k)).encode()
        words = lines.ask(b"put 0 0 60 %d\r\n%s\r\n" % (len(job), job))
        assert words[0] == b"INSERTED", words
        share.did(started, words[1])
        started = share.end
    return share


def pairs_beanstalk(k, go, port, _):
    """As `pairs`: reserve and delete."""
    lines, share = Lines(port), Share()
    go()
    share.begin = started = share.end = time.perf_counter()
    while True:
        words = lines.ask(b"reserve-with-timeout 0\r\n")
        if words[0] == b"TIMED_OUT":
            return share
        assert words[0] == b"RESERVED", words
        assert lines.ask(b"delete %s\r\n" % words[1]) == [b"DELETED"]
        share.did(started, words[1])
        started = share.end
