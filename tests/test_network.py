"""A network that breaks: a proxy that cuts connections before, within and after requests and answers.

Through it our client submits, fetches, reports, beats, updates, deletes, waits and listens, LT_TEST_CUTS_NET operations;
then the journal tells whether anything was doubled or lost, or a retry burnt."""
import base64
import collections
import contextlib
import http.client
import json
import re
import select
import socket
import struct
import threading

import pytest

import faulty
import harness
import labtasker as L

WHERE = ("before", "request", "no answer", "answer", "after")  # a connection is cut; the fourth is in the middle of an answer


class Cutter:
    """A TCP proxy before a server: `url`. With `dice` it cuts every connection, at one of WHERE, sooner or later.

    `plans`: [(where, number of the request)] for the next connections, instead of the dice; `cuts` counts what was done."""

    def __init__(self, url, dice=None):
        self.far, self.dice, self.plans = ("127.0.0.1", int(url.rpartition(":")[2])), dice, collections.deque()
        self.cuts, self.barren, self.lock = collections.Counter(), 0, threading.Lock()
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = "http://127.0.0.1:%d" % self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()

    def accept(self):
        while True:
            try:
                near = self.listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=Carried(self, near).carry, daemon=True).start()

    def plan(self):
        """Return (where, number); not for ever the worst, as a client asks again six times only."""
        with self.lock:
            if self.plans or not self.dice:
                return self.plans.popleft() if self.plans else (None, 0)
            self.barren += 1
            where = self.dice.choices(WHERE, (1, 3, 3, 3, 2))[0]
            return (where, self.dice.randrange(1, 9)) if self.barren < 3 else ("after", 3)

    def part(self, size):
        return self.dice.randrange(size) if self.dice else size // 2


class Carried:
    """A connection through a Cutter."""

    def __init__(self, cutter, near):
        self.cutter, self.near, self.far = cutter, near, None
        self.where, self.number = cutter.plan()
        self.count, self.asking, self.is_stream = 0, False, False  # requests so far; whether the last bytes were of one

    def carry(self):
        try:
            if self.where == "before":
                return self.cut()
            self.far = socket.create_connection(self.cutter.far)
            while self.step():
                pass
        except OSError:  # one side has gone
            pass
        finally:
            for side in (self.near, self.far):
                if side is not None:
                    side.close()

    def step(self):
        """Return whether to go on after one piece; who waits for an answer may be cut off while he does."""
        impatient = self.cutter.dice and self.asking and (self.where, self.number) == ("no answer", self.count)
        ready = select.select([self.near, self.far], [], [], 0.05 if impatient else None)[0]
        if not ready:
            return self.cut()
        side = ready[0]
        data = side.recv(1 << 16)
        if not data:
            return False
        return self.ask(data) if side is self.near else self.answer(data)

    def ask(self, data):
        self.count += not self.asking
        self.asking, self.is_stream = True, b"/events" in data[:100]
        if (self.where, self.number) == ("request", self.count):
            self.far.sendall(data[:self.cutter.part(len(data))])
            return self.cut()
        self.far.sendall(data)
        return True

    def answer(self, data):
        self.count += self.is_stream and not self.asking  # each of its pieces counts
        self.asking = False
        if self.where is None or self.count < self.number + (self.where == "request"):  # on a stream no request comes
            self.near.sendall(data)
            self.cutter.barren = 0
            return True
        if self.where != "no answer":
            self.near.sendall(data if self.where == "after" else data[:self.cutter.part(len(data))])
        return self.cut()

    def cut(self):
        """End the connection, some by a reset."""
        if self.cutter.dice and self.cutter.dice.random() < 0.5:
            self.near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cutter.cuts[self.where] += 1
        self.near.close()
        return False


@pytest.fixture
def cutter(server, monkeypatch, tmp_path):
    """A Cutter before a server, without dice; the client of this process goes through it."""
    with Cutter(server.url) as cutter:
        for name, value in dict(server.env, LABTASKER_URL=cutter.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        L.use_client(None)
        yield cutter
        L.use_client(None)


# One answer lost: what is asked again, and what is not


def a_run():
    L.submit_task(args={"a": 1})
    return L.fetch_task(heartbeat_timeout=600).task


def a_report(**given):
    run = a_run()
    return lambda: L.send_report(run.task_id, "failed", run_id=run.run_id if given.get("by_run") else None)


def a_beat():
    run = a_run()
    return lambda: L.send_heartbeat(run.task_id, run_id=run.run_id)


def a_deletion():
    task_id = L.submit_task(args={"a": 1}).task_id
    return lambda: L.delete_task(task_id)


def an_update():
    task_id = L.submit_task(args={"a": 1}).task_id
    return lambda: L.update_tasks([L.TaskUpdateRequest(task_id=task_id, metadata={"a": 1})], reset_pending=True)


def a_fetch():
    L.submit_tasks([{"args": {"a": 1}}] * 3)
    return lambda: L.fetch_task(heartbeat_timeout=600)


def with_worker(action):
    worker_id = L.create_worker("w")
    return lambda: action(worker_id)


SAFE = {  # route: a function that prepares and returns a call whose lost answer is asked for again; None: the same as another
    "GET /": lambda: lambda: L.client().call("GET", "/"),
    "GET /health": lambda: lambda: L.client().call("GET", "/health"),
    "GET /health/full": lambda: L.health_check,
    "GET /api/v1/polling": lambda: lambda: L.client().call("GET", "/api/v1/polling"),
    "GET /api/v1/queues/me": lambda: L.get_queue,
    "POST /api/v1/queues/me/tasks": lambda: lambda: L.submit_task(args={"a": 1}),
    "POST /api/v1/queues/me/tasks (list)": lambda: lambda: L.submit_tasks([{"args": {"a": i}, "priority": i} for i in range(10)]),
    "POST /api/v1/queues/me/tasks/rows": lambda: lambda: L.submit_tasks([{"args": {"a": i}} for i in range(10)]),
    "POST /api/v1/queues/me/tasks/search": lambda: L.ls_tasks,
    "POST /api/v1/queues/me/tasks/count": lambda: lambda: L.counted({}),
    "POST /api/v1/queues/me/tasks/table": lambda: lambda: L.table("args.a", "args.a"),
    "GET /api/v1/queues/me/tasks/{task_id}/history": lambda: (lambda run: lambda: L.get_history(run.task_id))(a_run()),
    "GET /api/v1/queues/me/mark": lambda: lambda: L.client().call("GET", "/api/v1/queues/me/mark"),
    "POST /api/v1/queues/me/tasks/next": a_fetch,
    "DELETE /api/v1/queues/me/tasks/next": lambda: (lambda fetch_id: lambda: L.end_fetch(fetch_id))(L.new_id()),
    "POST /api/v1/queues/me/tasks/{task_id}/status": lambda: a_report(by_run=True),
    "POST /api/v1/queues/me/tasks/{task_id}/heartbeat": a_beat,
    "GET /api/v1/queues/me/tasks/{task_id}": lambda: (lambda run: lambda: L.get_task(run.task_id))(a_run()),
    "DELETE /api/v1/queues/me/tasks/{task_id}": a_deletion,
    "POST /api/v1/queues/me/workers": lambda: lambda: L.create_worker("w"),
    "POST /api/v1/queues/me/workers/search": lambda: L.ls_workers,
    "GET /api/v1/queues/me/workers/{worker_id}": lambda: with_worker(lambda one: L.client().call("GET", L.WORKERS_PATH + "/" + one)),
    "DELETE /api/v1/queues/me/workers/{worker_id}": lambda: with_worker(L.delete_worker),
}
UNSAFE = {  # the same for calls whose lost answer is told
    "POST /api/v1/queues": lambda: lambda: L.create_queue("q2", "p"),
    "PUT /api/v1/queues/me": lambda: lambda: L.update_queue(metadata_update={"a": 1}),
    "PUT /api/v1/queues/me/tasks": an_update,
    "POST /api/v1/queues/me/tasks/{task_id}/status": a_report,
    "POST /api/v1/queues/me/workers/{worker_id}/status": lambda: with_worker(lambda one: L.report_worker_status(one, "active")),
    "DELETE /api/v1/queues/me": lambda: L.delete_queue,  # the last one
}


def test_every_route_is_tried():
    tried = {route.partition(" (")[0] for route in list(SAFE) + list(UNSAFE)}
    of_the_page = {"GET /page", "GET /page.css", "GET /page.js", "POST " + L.TASKS_PATH + "/view",
                   "POST " + L.TASKS_PATH + "/curves",
                   "GET " + L.TASKS_PATH + "/{task_id}/log"}  # which asks again by itself
    assert set(L.ROUTES) - tried == of_the_page | {"GET /api/v1/queues/me/events"} and tried <= set(L.ROUTES)
    assert set(UNSAFE) == {route for route, (field, _) in L.ONCE.items() if route not in SAFE} | {
        "POST /api/v1/queues/me/tasks/{task_id}/status"}


def lose(cutter, call, where):
    """Return what the call returns, or raises, when its first answer is lost."""
    L.client().transport.close()
    cutter.plans.append((where, 1))
    try:
        return call()
    except L.LabtaskerError as error:
        return error
    finally:
        assert not cutter.plans and cutter.cuts[where]


def lines(server):
    """Return the journal's lines but those about the time that has passed."""
    return [line for line in server.journal.read_text().splitlines() if '"changes"' in line]


@pytest.mark.parametrize("where", ["request", "no answer", "answer"])
def test_a_lost_answer_is_asked_for_again_where_that_does_nothing_twice(server, cutter, where):
    for route, prepare in SAFE.items():
        twin = prepare()  # how many lines the work takes when nothing is lost
        before = len(lines(server))
        twin()
        wanted, call = len(lines(server)) - before, prepare()
        before = len(lines(server))
        assert not isinstance(lose(cutter, call, where), L.LabtaskerError), route
        assert len(lines(server)) - before == wanted, route


def check_told(server, cutter, route, call):
    """The call is done once, and its lost answer told."""
    before = len(lines(server))
    told = lose(cutter, call, "no answer")
    assert isinstance(told, L.LabtaskerConnectError), route
    assert re.search("broke before the answer came .*: %s; check before you repeat it" % L.ONCE[route][1], str(told)), route
    assert len(lines(server)) - before == 1, route


def test_an_answer_lost_for_what_must_not_be_done_twice_is_told(server, cutter):
    for route, prepare in UNSAFE.items():
        check_told(server, cutter, route, prepare())


def test_a_server_without_the_extensions_does_not_know_the_ids(server, cutter):
    for route in [route for route, (field, _) in L.ONCE.items() if field]:
        call = SAFE[route]()
        L.client().transport.extensions = False
        check_told(server, cutter, route, call)


def test_whether_the_server_has_the_extensions_is_asked_when_the_very_first_answer_is_lost(server, cutter):
    cutter.plans.append(("no answer", 1))
    task_id = L.submit_task(args={"a": 1}).task_id
    assert [task.task_id for task in L.ls_tasks().content] == [task_id] and cutter.cuts["no answer"] == 1


def test_an_answer_cut_off_anywhere_is_no_answer(server, cutter, monkeypatch):
    """Also within the head, or where what follows it would be empty."""
    for size in range(0, 156, 11 if faulty.setting("CUTS_NET") < 1000 else 1):
        L.client().transport.extensions = None
        call = a_deletion()
        monkeypatch.setattr(cutter, "part", lambda _: min(size, 46))
        assert lose(cutter, call, "answer") is None, size
        monkeypatch.setattr(cutter, "part", lambda _: size)
        found = lose(cutter, lambda: L.submit_task("n%d" % size, args={"a": 1}), "answer")
        assert not isinstance(found, L.LabtaskerError), (size, found)
        assert [task.task_name for task in L.ls_tasks(task_name="n%d" % size).content] == ["n%d" % size]
        assert L.client().extensions is True


def test_a_connection_that_was_closed_meanwhile_is_opened_anew_for_whatever_there_is_to_ask(server, cutter):
    call = an_update()
    L.client().transport.close()
    cutter.plans.append(("after", 1))
    L.get_queue()
    harness.wait_until(lambda: cutter.cuts["after"], "the cut")
    sock = L.client().transport.kept.connection.sock
    harness.wait_until(lambda: L.ready([sock], 0), "the end of the connection is here")
    assert call().found


# Everything at once


class User(threading.Thread):
    """Somebody who uses a queue, and remembers what he was told: by run id, by task id."""

    def __init__(self, number, dice, steps):
        super().__init__(daemon=True)
        self.number, self.dice, self.steps = number, dice, steps
        self.tasks, self.runs, self.deleted, self.workers, self.done = {}, {}, set(), [], collections.Counter()
        self.updated, self.error, self.worker_id = {}, None, None

    def run(self):
        try:
            self.worker_id = self.register()
            for step in range(self.steps):
                name = self.dice.choice(self.OPERATIONS)
                getattr(self, name)()
                self.done[name] += 1
        except BaseException as error:
            self.error = error

    def register(self):
        self.workers.append(L.create_worker("user-%d" % self.number, max_retries=10 ** 6))
        return self.workers[-1]

    def submit(self):
        number = len(self.tasks)
        task_id = L.submit_task(args={"user": self.number, "n": number}, max_retries=1000).task_id
        self.tasks[task_id] = {"user": self.number, "n": number}

    def submit_many(self):
        args = [{"user": self.number, "n": len(self.tasks) + i} for i in range(self.dice.randrange(1, 20))]
        self.tasks.update(zip(L.submit_tasks({"args": one, "max_retries": 1000} for one in args), args))

    def work(self):
        """Fetch a task, maybe with a long poll, and end the run in one of the ways there are."""
        task = L.fetch_task(self.worker_id, heartbeat_timeout=600, wait_s=self.dice.choice([None, 0.1])).task
        if task is None:
            return
        assert task.run_id not in self.runs
        run = self.runs[task.run_id] = {"task_id": task.task_id, "summary": {}, "status": "running"}
        for word in self.dice.sample(["heartbeat", "summary"], self.dice.randrange(3)):
            if word == "heartbeat":
                assert L.send_heartbeat(task.task_id, self.worker_id, task.run_id) == "running"
            else:
                run["summary"]["x"] = self.dice.random()
                L.send_report(task.task_id, "running", run["summary"], self.worker_id, task.run_id)
        status = self.dice.choice(["success", "success", "failed", "pending", "cancelled"])
        run["summary"]["y"] = self.dice.random()
        try:
            L.send_report(task.task_id, status, {"y": run["summary"]["y"]}, self.worker_id, task.run_id)
        except L.LabtaskerHTTPStatusError as error:  # the repeat came after another's fetch: the first one was taken
            assert error.status_code == 409 and "the task was fetched" in str(error) and status in ("failed", "pending")
            self.done["late repeat"] += 1
        run["status"] = status

    def update(self):
        """Update a task of one's own; where that could not be repeated, look."""
        task_id = self.dice.choice(list(self.tasks) or [None])
        if task_id is None or task_id in self.deleted:
            return
        value = self.dice.random()
        try:
            L.update_tasks([L.TaskUpdateRequest(task_id=task_id, metadata={"k": value})])
        except L.LabtaskerConnectError as error:
            assert "the tasks may have been updated; check" in str(error)
            self.done["not repeated"] += 1
            found = L.get_task(task_id).metadata.get("k")
            assert found in (value, self.updated.get(task_id))
            value = found
        self.updated[task_id] = value

    def delete(self):
        """Delete a task that one has ended oneself."""
        ended = [run["task_id"] for run in self.runs.values() if run["status"] == "success"]
        task_id = self.dice.choice(ended or [None])
        if task_id is not None and task_id not in self.deleted and task_id in self.tasks:
            L.delete_task(task_id)
            self.deleted.add(task_id)
            with pytest.raises(L.LabtaskerHTTPStatusError, match="no task"):
                L.get_task(task_id)

    def look(self):
        found = L.ls_tasks(extra_filter="args.user == %d" % self.number, limit=10 ** 6).content
        assert {task.task_id for task in found} == set(self.tasks) - self.deleted

    OPERATIONS = ("submit", "submit", "submit_many", "work", "work", "work", "work", "work", "update", "delete", "look", "register")


class Listener(threading.Thread):
    """Hears the events of the queue from the first one on, over however many connections."""

    def __init__(self, url, auth):
        super().__init__(daemon=True)
        self.address, self.auth = url[7:], base64.b64encode(auth.encode()).decode()
        self.heard, self.last, self.connections, self.over = [], "0.0", 0, False

    def run(self):
        while not self.over:
            try:
                with contextlib.closing(http.client.HTTPConnection(self.address, timeout=60)) as connection:
                    self.listen(connection)
            except (OSError, http.client.HTTPException):
                pass

    def listen(self, connection):
        connection.request("GET", "/api/v1/queues/me/events", headers={
            "Authorization": "Basic " + self.auth, "Last-Event-ID": self.last})
        response, fields = connection.getresponse(), {}
        self.connections += 1
        for line in iter(response.readline, b""):
            if not line.endswith(b"\n"):  # cut off
                return
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name:
                fields[name] = value
                continue
            if fields.get("event") == "event":
                event = json.loads(fields["data"])["event"]
                self.heard.append((event["entity_id"], event["old_state"], event["new_state"]))
                self.last = fields["id"]
            fields = {}


Told = collections.namedtuple("Told", "created workers runs ends steps")


def read_journal(server):
    """Return what the journal has: tasks and workers as often as they were created, (run id, task) as often as fetched,
    (run id, how it ended), and every step in order."""
    told = Told([], [], [], {}, [])
    run_of = {}
    for text in lines(server):
        for kind, *rest in json.loads(text)["changes"]:
            if kind == "tasks":
                ids = [row[0] for row in rest[2]]
                told.created.extend(ids)
                told.steps.extend((key, "created", rest[0]["status"]) for key in ids)
            if kind in ("task", "worker") and len(rest) > 2 and rest[2]:
                key, fields, old = rest
                told.steps.append((key, old, fields["status"]))
                if old == "created":
                    (told.created if kind == "task" else told.workers).append(key)
                elif kind == "task" and fields["status"] == "running":
                    run_of[key] = fields["run_id"]
                    told.runs.append((fields["run_id"], key))
                elif kind == "task" and old == "running":
                    assert run_of[key] not in told.ends
                    told.ends[run_of[key]] = fields["run_end"]
    return told


def check(server, users):
    """The journal has what the users were told, each thing once; Return the tasks by id."""
    told, runs = read_journal(server), {key: run for user in users for key, run in user.runs.items()}
    assert sorted(told.created) == sorted(key for user in users for key in user.tasks)
    assert sorted(told.workers) == sorted(key for user in users for key in user.workers)
    assert sorted(told.runs) == sorted((key, run["task_id"]) for key, run in runs.items())
    assert told.ends == {key: run["status"] for key, run in runs.items()}
    tasks = harness.replayed(server.journal)[server.queue]
    assert set(tasks) == {key for user in users for key in set(user.tasks) - user.deleted}
    last = {task_id: runs[run_id]["summary"] for run_id, task_id in told.runs}
    ends = collections.Counter((run["task_id"], run["status"]) for run in runs.values())
    for user in users:
        for task_id in set(user.tasks) - user.deleted:
            task = tasks[task_id]
            assert (task["args"], task["metadata"].get("k")) == (user.tasks[task_id], user.updated.get(task_id))
            assert task["summary"] == last.get(task_id, {})
            assert (task["retries"], task["interruptions"]) == (ends[task_id, "failed"], ends[task_id, "pending"])
    return told


def test_nothing_is_doubled_lost_or_charged_through_a_network_that_breaks(server, cutter):
    """Three users and a listener, each with a history of his own."""
    cutter.dice = faulty.dice("network")
    users = [User(n, faulty.dice("network user %d" % n), faulty.setting("CUTS_NET") // 3) for n in range(3)]
    listener = Listener(cutter.url, "%s:%s" % (server.queue, server.password))
    for thread in users + [listener]:
        thread.start()
    for user in users:
        user.join()
        assert user.error is None, repr(user.error)
    told = check(server, users)
    harness.wait_until(lambda: len(listener.heard) >= len(told.steps), "all events are heard")
    listener.over = True
    assert listener.heard == told.steps
    print("done %s; cut %s; %d runs, %d steps heard over %d connections" % (
        dict(sum((user.done for user in users), collections.Counter())), dict(cutter.cuts), len(told.runs), len(told.steps),
        listener.connections))
    assert set(cutter.cuts) == set(WHERE) and listener.connections > 2


def test_a_long_poll_through_a_network_that_breaks(server, cutter):
    cutter.dice = faulty.dice("long poll")
    for number in range(max(4, faulty.setting("CUTS_NET") // 100)):
        found, name = [], "late-%d" % number
        waiting = threading.Thread(target=lambda: found.append(L.fetch_task(
            heartbeat_timeout=600, wait_s=20, extra_filter='task_name == "%s"' % name)), daemon=True)
        waiting.start()
        waiting.join(0.15)
        task_id = L.submit_task(name, args={"a": 1}).task_id
        waiting.join(20)
        assert [answer.task.task_id for answer in found] == [task_id]
    told = read_journal(server)
    assert len(told.runs) == len(set(told.runs)) == len(told.created) == number + 1


def test_a_loop_through_a_network_that_breaks(server, cutter):
    count, ran = max(20, faulty.setting("CUTS_NET") // 10), []
    cutter.dice = faulty.dice("loop")
    ids = L.submit_tasks({"args": {"n": n}} for n in range(count))

    @L.loop()
    def main(n=L.Required()):
        task = L.task_info()
        ran.append((task.task_id, task.retries))
        L.report_task_status(task.task_id, "running", {"half": n / 2})
        if n % 4 == 0 and task.retries == 0:
            raise ValueError("once")
    main()
    tasks = harness.replayed(server.journal)[server.queue]
    assert sorted(ran) == sorted([(key, 0) for key in ids] + [(key, 1) for key in ids[::4]])
    assert [tasks[key]["status"] for key in ids] == ["success"] * count
    assert [tasks[key]["retries"] for key in ids] == [int(n % 4 == 0) for n in range(count)]
    assert [tasks[key]["summary"] for key in ids] == [{"half": n / 2} for n in range(count)]
    told = read_journal(server)
    assert sorted(told.created) == sorted(ids) and len(told.workers) == 1 and len(told.runs) == len(ran)
    print("%d runs; cut %s" % (len(ran), dict(cutter.cuts)))
