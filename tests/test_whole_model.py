"""The whole service against a model of plain dicts, written from the protocol page: random operations, every answer compared.

An episode is some thousand operations on a fresh store, by processes without a server (two take turns), by a server, and by
both one after the other, with restarts and compactions in between; now and then all that is there is compared, and the
memory with the file. A disagreement names its episode: add its number to KEPT once it is mended."""
import json
import random

import pytest

import faulty
import labtasker as L

pytestmark = pytest.mark.slow  # they run on one Python, the others have the quick part of the rest

EPISODE = 2500  # operations
KEPT = [1006, 5001007, 29001002]  # episodes that found something
STEP_S = 1e-3  # by which the clock moves at each request
BIG_STEP_S = 400.0  # time passes in multiples of this, and time-outs are in between: nothing hangs on STEP_S


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self):
        self.day, self.mono = 1.7e9, 1000.0

    def pass_s(self, seconds):
        self.day, self.mono = round(self.day + seconds, 6), self.mono + seconds


# The model. A task, worker or queue is a dict with the fields of the protocol page; the model adds `_began`, `_heard` (of
# a run, on the monotonic clock), `_content` (what was submitted), `_fetch` and `_end` (how the last run ended).


class No(Exception):
    """The request is refused with this status."""


FILTERS = [  # (as sent, the same in Python)
    ({"args.a": {"$gt": 3}}, lambda task: task["args"].get("a", 0) > 3),
    ({"metadata.tags": "x"}, lambda task: "x" in task["metadata"].get("tags", ())),
    ({"$or": [{"args.b": 1}, {"retries": {"$gt": 0}}]}, lambda task: task["args"].get("b") == 1 or task["retries"] > 0),
    ({"args.c": {"$exists": False}}, lambda task: "c" not in task["args"]),
    ("args.a == 2 and priority < 2", lambda task: task["args"].get("a") == 2 and task["priority"] < 2),
    ({"args.n.x": 1, "args.a": {"$in": [1]}}, lambda task: task["args"].get("n", {}).get("x") == 1 == task["args"].get("a")),
    ("args.a >= 2 and priority < 2", lambda task: task["args"].get("a", 0) >= 2 and task["priority"] < 2),
    ("exists(args.n.x) or status == \"success\"", lambda task: "x" in task["args"].get("n", {}) or task["status"] == "success"),
    ({"failure": {"$in": ["exit", "lost"]}}, lambda task: task["failure"] in ("exit", "lost")),
    ({"interruptions": 0, "summary.k": {"$ne": 1}}, lambda task: task["interruptions"] == 0 and task["summary"].get("k") != 1),
]
MOVES = {"pending": {"cancelled"}, "running": {"success", "failed", "pending", "cancelled"}, "success": {"cancelled"},
         "failed": {"cancelled"}, "cancelled": set()}  # by a report; by PUT what has ended may become pending too
WORKER_MOVES = {"active": {"active", "suspended", "crashed"}, "suspended": {"active"}, "crashed": {"active", "crashed"}}


def merged(old, new):
    """Return nested dicts merged at every level."""
    both = dict(old)
    for key, value in new.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def leaves(args, path=()):
    """Return the list of the paths of `args`, as tuples."""
    found = []
    for key, value in args.items():
        found += leaves(value, path + (key,)) if isinstance(value, dict) and value else [path + (key,)]
    return found


def takes(required, args):
    """Return whether a fetch takes a task of these args: no more, no less."""
    paths, keys = leaves(args), [tuple(key.split(".")) for key in required if key != "*"]
    there = all(any(path[:len(key)] == key for path in paths) for key in keys)
    covered = "*" in required or all(any(path[:len(key)] == key for key in keys) for path in paths)
    return not required or (there and covered)


def waits(task):
    """Return whether a task may have to wait for others: no run of it has begun."""
    return task["status"] == "pending" and task["run_id"] is None


class Model:
    """What the service should hold. Each method is an operation: it returns the answer expected, or raises No(status).

    Ids that the service makes are given to the method by `ids`, what the answer told."""

    def __init__(self, clock):
        self.clock, self.queues = clock, {}

    def queue(self, name):
        if name not in self.queues:
            raise No(401)
        return self.queues[name]

    def task(self, name, task_id):
        return self.queue(name)["tasks"].get(task_id) or self.refuse(404)

    def refuse(self, status):
        raise No(status)

    # queues

    def create_queue(self, name, metadata):
        if name in self.queues:
            raise No(409)
        self.queues[name] = {"metadata": metadata, "tasks": {}, "workers": {}, "paused": False}

    def pause(self, name, paused):
        self.queue(name)["paused"] = paused

    def update_queue(self, name, new_name, metadata):
        queue = self.queue(name)
        if new_name is not None and new_name != name and new_name in self.queues:
            raise No(400)
        if metadata is not None:
            queue["metadata"] = merged(queue["metadata"], metadata) if metadata else {}
        if new_name is not None:
            self.queues[new_name] = self.queues.pop(name)

    def delete_queue(self, name):
        self.queue(name)
        del self.queues[name]

    # tasks

    def submit(self, name, tasks):
        """Take all or none; the same id with the same content was there before."""
        queue, new = self.queue(name), {}
        for place, one in enumerate(tasks):
            if not one.get("args") and not one.get("cmd"):
                raise No(400)
            there = new.get(one["task_id"]) or queue["tasks"].get(one["task_id"])
            if there and there["_content"] != one:
                raise No(409)
            if not there:
                if any(other not in queue["tasks"] and other not in new for other in one.get("after", []) + one.get("after_any", [])):
                    raise No(404)
                new[one["task_id"]] = self.new_task(one, place)
        queue["tasks"].update(new)
        self.settle(queue)

    def new_task(self, one, place):
        at = round(self.clock.day + place * 1e-6, 6)
        task = {"task_id": one["task_id"], "status": "pending", "task_name": None, "created_at": at, "start_time": None,
                "last_modified": at, "heartbeat_timeout": None, "task_timeout": None, "max_retries": 3, "retries": 0,
                "priority": 0, "metadata": {}, "args": {}, "cmd": "", "summary": {}, "worker_id": None, "run_id": None,
                "interruptions": 0, "after": [], "after_any": [], "retry_delay": None, "not_before": None, "failure": None, "_content": one, "_fetch": None, "_end": None, "_began": 0, "_heard": 0}
        task.update(one)
        return task

    def fetch(self, name, request, answer):
        """Return the task to be fetched, changed as it is, or None; its run's id is what the answer says."""
        queue = self.queue(name)
        if not request.get("start_heartbeat", True) and request.get("eta_max") is None:
            raise No(400)
        worker_id = request.get("worker_id")
        if worker_id is not None:
            worker = queue["workers"].get(worker_id) or self.refuse(404)
            if worker["status"] != "active":
                raise No(403)
        for task in queue["tasks"].values():
            if request.get("fetch_id") and task["_fetch"] == request["fetch_id"] and task["status"] == "running":
                return task
        task = None if queue["paused"] else self.choice(queue, request)
        if task:
            self.begin(task, request, answer)
        return task

    def report_and_fetch(self, name, request, answer):
        """The same for a fetch with a report of the run before. What was given by this fetch already was counted then."""
        queue, report = self.queue(name), request["report"]
        if not request.get("start_heartbeat", True) and request.get("eta_max") is None:
            raise No(400)
        is_repeat = any(task["_fetch"] == request["fetch_id"] and task["status"] == "running" for task in queue["tasks"].values())
        try:
            if "run_id" in report or not is_repeat:
                self.report(name, report["task_id"], report)
        except No:
            if not is_repeat:
                raise No(409)
        try:
            task = self.fetch(name, request, answer)
        except No:  # its worker gets none, which is no reason to refuse the report
            return None
        if task:
            at = float(L.parse_time(answer["task"]["start_time"]))
            assert 0 <= at - task["start_time"] < STEP_S, (at, task)
            if task["start_time"] == self.clock.day:
                task.update(start_time=at, last_modified=at)
        return task

    def choice(self, queue, request):
        wanted = next((test for sent, test in FILTERS if sent == request.get("extra_filter")), lambda task: True)
        found = [task for task in queue["tasks"].values() if task["status"] == "pending" and not self.is_held(queue, task)
                 and takes(request.get("required_fields") or (), task["args"]) and wanted(task)]
        return min(found, key=lambda task: (-task["priority"], task["last_modified"], task["created_at"]), default=None)

    # tasks that wait for others

    def is_held(self, queue, task):
        """Return whether a pending task has a pause, or waits for others."""
        others = [queue["tasks"].get(other) for other in task["after_any"]] if waits(task) else ()
        return (task["not_before"] or 0) > self.clock.day or any(
            other and other["status"] in ("pending", "running") for other in others) or waits(task) and any(
            other["status"] != "success" if other else task["start_time"] is None
            for other in map(queue["tasks"].get, task["after"]))

    def settle(self, queue):
        """Cancel what waits in vain, until nothing does."""
        def in_vain(task):
            others = map(queue["tasks"].get, task["after"])
            return waits(task) and any(other["status"] in ("failed", "cancelled") if other else task["start_time"] is None
                                       for other in others)
        found = True
        while found:
            found = [task for task in queue["tasks"].values() if in_vain(task)]
            for task in found:
                task.update(status="cancelled", last_modified=self.clock.day, _settled=True)

    def check_waits(self, tasks, new, task, one, fields):
        for key in ("after", "after_any"):
            if key in fields and fields[key] != task[key]:
                status = fields.get("status", task["status"])
                if status != "pending" or any(other not in tasks for other in fields[key]):
                    raise No(400)

    def check_circles(self, tasks, begin):
        def ahead(task_id):
            task = tasks.get(task_id)
            return task["after"] + task["after_any"] if task else []
        for task_id in begin:
            seen, rest = set(), ahead(task_id)
            while rest:
                one = rest.pop()
                if one == task_id:
                    raise No(400)
                if one not in seen:
                    seen.add(one)
                    rest += ahead(one)

    def begin(self, task, request, answer):
        beats = request.get("start_heartbeat", True)
        task.update(status="running", start_time=self.clock.day, last_modified=self.clock.day, summary={},
                    failure=None, not_before=None, worker_id=request.get("worker_id"), run_id=(answer.get("task") or {}).get("run_id"), _end=None,
                    _fetch=request.get("fetch_id"), _began=self.clock.mono, _heard=self.clock.mono)
        if request.get("cmd"):
            task["cmd"] = request["cmd"]
        if request.get("eta_max") is not None:
            task["task_timeout"] = float(request["eta_max"])
        task["_beats"] = beats
        if request.get("heartbeat_timeout") is not None:
            task["heartbeat_timeout"] = request["heartbeat_timeout"]

    def report(self, name, task_id, request):
        task, status, run_id = self.task(name, task_id), request["status"], request.get("run_id")
        summary = request.get("summary") or {}
        if run_id is not None and run_id != task["run_id"]:
            raise No(409)
        if run_id is None and request.get("worker_id") not in (None, task["worker_id"]):
            raise No(409)
        is_late = run_id is not None and task["status"] != "running" and status != "cancelled"
        if status == task["status"] and not (is_late and task["_end"] == "timeout"):
            if summary:
                self.change(task, summary=merged(task["summary"], summary))
        elif is_late:
            self.report_late(task, status, summary, request.get("delay_s"))
        else:
            if status not in MOVES[task["status"]]:
                raise No(400)
            self.end(name, task, status, merged(task["summary"], summary), request.get("delay_s"))
            self.settle(self.queues[name])

    def report_late(self, task, status, summary, delay_s):
        """A report on a run that is over: its repeat, or the late success or handing back of one that was given up on."""
        if status == task["_end"] or (status, task["_end"]) == ("failed", "timeout"):
            return
        if task["_end"] != "timeout" or status not in ("success", "pending"):
            raise No(409)
        kept = {key: value for key, value in task["summary"].items() if key != "labtasker_error"}
        self.change(task, status=status, _end=status, summary=merged(kept, summary), retries=max(0, task["retries"] - 1),
                    failure=None, not_before=None)
        if status == "pending":
            task["interruptions"] += 1
            self.pause_task(task, delay_s)

    def pause_task(self, task, delay_s):
        task["not_before"] = round(task["last_modified"] + delay_s, 6) if delay_s else None

    def end(self, name, task, status, summary, delay_s):
        """End the run of a task, or cancel it."""
        worker_id = task["worker_id"]
        self.change(task, worker_id=None, _end=status, summary=summary)
        if status == "failed":
            self.fail(name, task, worker_id, "exit")
        elif status == "pending":
            task["interruptions"] += 1
            task["status"] = "failed" if task["interruptions"] >= 100 else "pending"
            self.pause_task(task, delay_s if task["status"] == "pending" else None)
        else:
            task["status"] = status

    def fail(self, name, task, worker_id, failure):
        task["retries"] += 1
        task["status"] = "pending" if task["retries"] < task["max_retries"] else "failed"
        task["failure"] = failure
        if task["status"] == "pending":
            self.pause_task(task, min(3600, (task["retry_delay"] or 0) * 2 ** (task["retries"] - 1)))
        worker = self.queues[name]["workers"].get(worker_id)
        if worker:
            worker["retries"] += 1
            worker["last_modified"] = self.clock.day
            if worker["status"] == "active" and worker["retries"] >= worker["max_retries"]:
                worker["status"] = "crashed"

    def change(self, task, place=0, **fields):
        """Change a task, the `place`-th of a transaction."""
        task.update(fields, last_modified=round(self.clock.day + place * 1e-6, 6))

    def heartbeat(self, name, task_id, query):
        task, asks = self.task(name, task_id), query.get("answer") == "status"
        if task["status"] != "running" or query.get("run_id") not in (None, task["run_id"]):
            if not asks:
                raise No(404)
            return {"status": "taken" if task["status"] == "running" else task["status"]}
        if query.get("worker_id") not in (None, task["worker_id"]):
            raise No(403)
        task["_heard"] = self.clock.mono
        return {"status": "running"} if asks else None

    def update(self, name, updates, reset):
        """Change all of the tasks or none."""
        tasks, new = self.queue(name)["tasks"], {}
        self.changed = 0
        for one in updates:
            task = new.get(one["task_id"]) or tasks.get(one["task_id"])
            if not task:
                raise No(400)
            new[one["task_id"]] = self.updated(dict(task), one, reset, tasks)
        self.check_circles(dict(tasks, **new), [one["task_id"] for one in updates if {"after", "after_any"}.intersection(one)])
        tasks.update(new)
        self.settle(self.queue(name))
        return list(new)

    def updated(self, task, one, reset, tasks):
        fields = {key: value for key, value in one.items() if key not in ("task_id", "replace_fields", "status")}
        for key in ("args", "metadata", "summary"):
            if key in fields and key not in one.get("replace_fields", ()):
                fields[key] = merged(task[key], fields[key])
        status = one.get("status")
        if reset:
            summary = fields.get("summary", task["summary"])
            fields.update(status="pending", retries=0, worker_id=None, run_id=None, _end=None, not_before=None, failure=None, summary={
                key: value for key, value in summary.items() if not key.startswith("labtasker_e")})
        elif status not in (None, task["status"]):
            if status == "running" or status not in MOVES[task["status"]] | ({"pending"} - {task["status"]}):
                raise No(400)
            fields.update(status=status, worker_id=None, run_id=None, _end=None, not_before=None)
        self.check_waits(tasks, None, task, one, fields)
        self.change(task, self.changed, **fields)  # `last_modified` moves also where nothing else does
        self.changed += 1
        return task

    def delete(self, name, task_id):
        gone, queue = self.task(name, task_id), self.queues[name]
        del queue["tasks"][task_id]
        for task in queue["tasks"].values():
            if gone["status"] == "success" and waits(task) and task_id in task["after"]:
                task.update(after=[one for one in task["after"] if one != task_id], last_modified=self.clock.day, _settled=True)
        self.settle(queue)

    # workers

    def create_worker(self, name, request, answer):
        worker = {"worker_name": None, "metadata": {}, "max_retries": 3, "status": "active", "retries": 0,
                  "created_at": self.clock.day, "last_modified": self.clock.day}
        worker.update(request)
        self.queue(name)["workers"][answer.get("worker_id")] = worker

    def report_worker(self, name, worker_id, status):
        worker = self.queue(name)["workers"].get(worker_id) or self.refuse(404)
        if status not in WORKER_MOVES[worker["status"]]:
            raise No(400)
        worker.update(status=status, last_modified=self.clock.day)
        if status == "active":
            worker["retries"] = 0

    def delete_worker(self, name, worker_id, cascade):
        queue = self.queue(name)
        if queue["workers"].pop(worker_id, None) is None:
            raise No(404)
        theirs = [task for task in queue["tasks"].values() if cascade and task["worker_id"] == worker_id]
        for place, task in enumerate(sorted(theirs, key=lambda task: (task["created_at"], task["task_id"]))):
            self.change(task, place, worker_id=None)

    # time

    def expire(self, name):
        """Give up on the runs of a queue whose time is over."""
        place = 0
        for task in sorted(self.queues[name]["tasks"].values(), key=lambda task: task["created_at"]):
            silent, ran = self.clock.mono - task["_heard"], self.clock.mono - task["_began"]
            if task["status"] != "running":
                continue
            if (task["_beats"] and task["heartbeat_timeout"] or silent) < silent or (task["task_timeout"] or ran) < ran:
                worker_id, text = task["worker_id"], {"labtasker_error": None}
                self.change(task, place, worker_id=None, _end="timeout", summary=dict(task["summary"], **text))
                place += 1
                self.fail(name, task, worker_id, "lost" if task["_beats"] and (task["heartbeat_timeout"] or silent) < silent
                          else "timeout")
        self.settle(self.queues[name])

    def restart(self):
        """A server starts: every run has its full time again."""
        for queue in self.queues.values():
            for task in queue["tasks"].values():
                task["_began"] = task["_heard"] = self.clock.mono


# The service, in this process, behind the one door.


class Service:
    """One store and who has it open: `places` are the Callers that take turns."""

    def __init__(self, path, clock):
        self.path, self.clock, self.places, self.is_server = path, clock, [], False
        self.turn = 0

    def open(self, is_server):
        self.close()
        self.is_server = is_server
        self.places = [faulty.Caller(self.path, is_server) for _ in range(1 if is_server else 2)]

    def close(self):
        for place in self.places:
            place.close()
        self.places = []

    def __call__(self, name, method, path, body=None, query=None):
        self.turn += 1
        place = self.places[self.turn % len(self.places)]
        place.queue = name
        if self.is_server and path == "tasks/next":  # what a server's loop does when a run may be over
            place.store.look_for_timeouts(L.LocalName(name))
        return place(method, path, body, query)

    def compact(self):
        self.places[0].store.file.compact() if self.is_server else L.compact(str(self.path))

    def look(self, name):
        """Have each place look for time-outs in a queue."""
        for place in self.places:
            self.clock.pass_s(1.01)
            place.queue = name
            if self.is_server:
                place.store.look_for_timeouts(L.LocalName(name))
            assert place("POST", "tasks/next", {"required_fields": ["nothing-has-this"]})[0] == 200


class Episode:
    """A course of random operations, each done by the service and by the model, and the answers compared."""

    def __init__(self, seed, path, clock):
        self.seed, self.dice, self.clock = seed, random.Random(seed), clock
        self.model, self.service, self.done = Model(clock), Service(path, clock), []
        self.known = {"tasks": [], "workers": [], "runs": [], "fetches": [], "queues": ["q0", "q1", "q2"], "old": []}
        self.service.open(is_server=seed % 2 == 1)

    def run(self, steps):
        for self.step in range(steps):
            self.clock.pass_s(STEP_S)
            name, queue = self.dice.choice(ACTS), self.dice.choice(self.known["queues"][:2] * 5 + self.known["queues"])
            name = name if queue in self.model.queues else "create_queue" if self.dice.random() < 0.2 else "get"
            try:
                getattr(self, name)(queue)
                self.learn_order()
                if self.step % 400 == 399:
                    self.compare_all()
            except Exception as error:
                raise AssertionError("episode %d, step %d, %s: %s\nbefore it: %s" % (
                    self.seed, self.step, name, error, "\n  ".join(map(str, self.done[-8:])))) from error
        self.compare_all()
        self.service.close()

    def both(self, expected, name, method, path, body=None, query=None):
        """Ask the service, then the model, and compare; return (the service's answer, what the model returned)."""
        status, answer = self.service(name, method, path, body, query)
        self.done.append((name, method, path, body, query, status, json.dumps(answer)[:300]))
        try:
            wanted = expected(answer)
        except No as no:
            assert status == no.args[0], "status %d, the model says %d: %s" % (status, no.args[0], answer)
            return None, None
        assert status < 400, "status %d, the model takes it: %s" % (status, answer)
        return answer, wanted

    def learn_order(self):
        """Take over when the tasks changed that others' ends have changed, all at the same moment: in whatever order."""
        for name, queue in self.model.queues.items():
            for task in [task for task in queue["tasks"].values() if task.pop("_settled", False)]:
                found = self.service(name, "GET", "tasks/" + task["task_id"])[1]
                self.compare(dict(task, last_modified=None), dict(found, last_modified=None))
                at = float(L.parse_time(found["last_modified"]))
                assert 0 <= at - task["last_modified"] < STEP_S, (at, task)
                task["last_modified"] = at

    def pick(self, kind, name):
        """Return an id that is or was there, now and then one that never was."""
        found = [one for queue, one in self.known[kind][-60:] if queue == name]
        return self.dice.choice(found) if found and self.dice.random() < 0.97 else "never-was"

    def some_args(self):
        args = {key: self.dice.randrange(8) for key in "abc" if self.dice.random() < 0.5}
        if self.dice.random() < 0.2:
            args["n"] = {self.dice.choice("xy"): 1}
        return args

    def some_task(self, name=None):
        dice, task = self.dice, {"args": self.some_args()}
        for key, value in (("priority", dice.randrange(-1, 4)), ("max_retries", dice.randrange(4)), ("cmd", ["run", "it"]),
                           ("metadata", {"tags": ["x", "y"]}), ("heartbeat_timeout", 1000.0), ("task_timeout", 3000.0),
                           ("task_name", "name-%d" % dice.randrange(3)), ("retry_delay", 150.0)):
            if dice.random() < 0.3:
                task[key] = value
        for key in ("after", "after_any"):
            if name and dice.random() < 0.25:
                task[key] = list(dict.fromkeys(self.pick("tasks", name) for _ in range(dice.choice((1, 1, 2)))))
        return dict(task, task_id=self.new_id())

    def new_id(self):
        return "%032x" % self.dice.getrandbits(128)

    # operations

    def submit(self, name):
        tasks = [self.some_task(name) for _ in range(self.dice.choice((1, 1, 1, 2, 4)))]
        if self.seed % 2 and self.dice.random() < 0.4:  # rows of a table; the same as before in every other episode
            tasks += [dict(tasks[-1], args={key: self.dice.randrange(8) for key in tasks[-1]["args"] if key != "n"},
                           task_id=self.new_id()) for _ in range(self.dice.choice((1, 2, 5)))]
        if len(tasks) > 1 and self.dice.random() < 0.5:  # a list may name its own earlier tasks
            tasks[-1].setdefault("after", []).append(tasks[0]["task_id"])
        if self.known["old"] and self.dice.random() < 0.1:
            tasks.append(dict(self.dice.choice(self.known["old"])))
        if self.dice.random() < 0.03:
            tasks[-1] = dict(tasks[-1], args={"other": 1})
        body = tasks[0] if len(tasks) == 1 else tasks
        answer, _ = self.both(lambda answer: self.model.submit(name, tasks), name, "POST", "tasks", body)
        if answer:
            ids = [task["task_id"] for task in tasks]
            assert answer == ({"task_id": ids[0]} if len(tasks) == 1 else {"task_ids": ids})
            self.known["tasks"] += [(name, one) for one in ids]
            self.known["old"] = self.known["old"][-20:] + tasks

    def submit_unnamed(self, name):
        """Without an id of the client's: the service makes one."""
        task = self.some_task(name)
        del task["task_id"]
        answer, _ = self.both(lambda answer: self.model.submit(name, [dict(task, task_id=(answer or {}).get("task_id"))]),
                              name, "POST", "tasks", task)
        if answer:
            self.known["tasks"].append((name, answer["task_id"]))

    def fetch(self, name):
        dice, request = self.dice, {"fetch_id": self.new_id()}
        for key, value, chance in (
                ("worker_id", self.pick("workers", name), 0.4), ("required_fields", dice.choice(REQUIRED), 0.4),
                ("extra_filter", dice.choice(FILTERS)[0], 0.3), ("heartbeat_timeout", dice.choice((1000.0, 2500.0)), 0.8),
                ("eta_max", "5000", 0.2), ("start_heartbeat", False, 0.1), ("cmd", "from the worker", 0.1)):
            if dice.random() < chance:
                request[key] = value
        if dice.random() < 0.4:
            task_id, report = self.some_report(name)
            request["report"] = dict(report, task_id=task_id)
        if self.known["fetches"] and dice.random() < 0.1:
            name, request = dice.choice(self.known["fetches"][-10:])
        plain = dict(request, report=plainly(request["report"])) if "report" in request else request
        expected = self.model.report_and_fetch if "report" in request else self.model.fetch
        answer, task = self.both(lambda answer: expected(name, plain, answer), name, "POST", "tasks/next", request)
        if answer is not None:
            there = self.model.queues[name]["tasks"].get((answer["task"] or {}).get("task_id"))
            assert answer["task"] is None and task is None or there is task, "got %s, the model has %s" % (there, task)
            self.known["fetches"] = self.known["fetches"][-20:] + [(name, request)]
            if task:
                self.compare(task, answer["task"])
                self.known["runs"] = self.known["runs"][-40:] + [(name, (task["task_id"], task["run_id"]))]

    def some_report(self, name):
        """Return the id of a task and a report on it."""
        dice, request = self.dice, {"status": self.dice.choice(STATUSES)}
        task_id, run = self.pick("tasks", name), self.pick("runs", name)
        if run != "never-was" and dice.random() < 0.8:
            task_id, request["run_id"] = run
        elif dice.random() < 0.3:
            request["worker_id"] = self.pick("workers", name)
        if dice.random() < 0.4:
            request["summary"] = dice.choice(({"k": 1}, {"k": 2, "deep": {"a": 1}}, {"deep.b": 2}, {}))
        if request["status"] == "pending" and dice.random() < 0.3:
            request["delay_s"] = 300.0
        return task_id, request

    def report(self, name):
        task_id, request = self.some_report(name)
        self.both(lambda answer: self.model.report(name, task_id, plainly(request)), name, "POST", "tasks/%s/status" % task_id,
                  request)

    def heartbeat(self, name):
        run, query = self.pick("runs", name), {}
        task_id = run[0] if run != "never-was" else self.pick("tasks", name)
        if run != "never-was" and self.dice.random() < 0.8:
            query["run_id"] = run[1]
        if self.dice.random() < 0.5:
            query["answer"] = "status"
        if self.dice.random() < 0.1:
            query["worker_id"] = self.pick("workers", name)
        answer, wanted = self.both(lambda answer: self.model.heartbeat(name, task_id, query), name, "POST",
                                   "tasks/%s/heartbeat" % task_id, None, query)
        assert answer == wanted

    def update(self, name):
        dice, updates = self.dice, []
        for _ in range(dice.choice((1, 1, 2, 3))):
            one = {"task_id": self.pick("tasks", name)}
            for key, value in (("args", {"c": 1, "n": {"x": 2}}), ("metadata", {"tags": ["z"]}), ("summary", {"k": 3}),
                               ("priority", dice.randrange(4)), ("retries", dice.randrange(3)), ("status", dice.choice(STATUSES)),
                               ("max_retries", 5), ("cmd", "new"), ("heartbeat_timeout", 1500.0), ("task_name", "renamed")):
                if dice.random() < 0.2:
                    one[key] = value
            for key in ("after", "after_any"):
                if dice.random() < 0.15:
                    one[key] = list(dict.fromkeys(self.pick("tasks", name) for _ in range(dice.randrange(3))))
            if dice.random() < 0.2:
                one["replace_fields"] = ["args", "metadata"]
            updates.append(one)
        reset = dice.random() < 0.3
        answer, ids = self.both(lambda answer: self.model.update(name, updates, reset), name, "PUT", "tasks", updates,
                                {"reset_pending": "true" if reset else "false"})
        if answer:
            self.learn_order()
            assert [task["task_id"] for task in answer["content"]] == ids
            for task in answer["content"]:
                self.compare(self.model.task(name, task["task_id"]), task)
            if any("heartbeat_timeout" in one for one in updates):
                self.look()  # a run's time may be over by this

    def delete(self, name):
        task_id = self.pick("tasks", name)
        self.both(lambda answer: self.model.delete(name, task_id), name, "DELETE", "tasks/" + task_id)

    def tidy(self, name):
        """Delete what has ended, so that an episode stays small."""
        for task_id, task in list(self.model.queues.get(name, {"tasks": {}})["tasks"].items()):
            if task["status"] in ("success", "failed", "cancelled") and self.dice.random() < 0.7:
                self.clock.pass_s(STEP_S)  # the changes of a transaction take a microsecond each
                self.both(lambda answer: self.model.delete(name, task_id), name, "DELETE", "tasks/" + task_id)

    def get(self, name):
        task_id = self.pick("tasks", name)
        answer, task = self.both(lambda answer: self.model.task(name, task_id), name, "GET", "tasks/" + task_id)
        if answer:
            self.compare(task, answer)

    def search(self, name):
        """Listings: by status and filter, in the default order or another, a page of them."""
        sent, test = self.dice.choice(FILTERS + [(None, lambda task: True)])
        status, offset = self.dice.choice((None,) + STATUSES), self.dice.choice((0, 0, 3))
        body = {"status": status, "extra_filter": sent, "offset": offset, "limit": 7, "sort": [["created_at", -1]]}
        answer, tasks = self.both(lambda answer: self.model.queue(name)["tasks"], name, "POST", "tasks/search", body)
        if answer:
            wanted = [task for task in tasks.values() if test(task) and status in (None, task["status"])]
            wanted.sort(key=lambda task: task["created_at"], reverse=True)
            assert [one["task_id"] for one in answer["content"]] == [one["task_id"] for one in wanted[offset:offset + 7]]

    def create_worker(self, name):
        request = {"worker_name": "w", "max_retries": self.dice.randrange(4), "metadata": {"gpu": 1}}
        answer, _ = self.both(lambda answer: self.model.create_worker(name, request, answer), name, "POST", "workers", request)
        if answer:
            self.known["workers"] = self.known["workers"][-12:] + [(name, answer["worker_id"])]

    def report_worker(self, name):
        worker_id, status = self.pick("workers", name), self.dice.choice(("active", "active", "suspended", "crashed"))
        self.both(lambda answer: self.model.report_worker(name, worker_id, status), name, "POST",
                  "workers/%s/status" % worker_id, {"status": status})

    def delete_worker(self, name):
        worker_id, cascade = self.pick("workers", name), self.dice.random() < 0.7
        self.both(lambda answer: self.model.delete_worker(name, worker_id, cascade), name, "DELETE", "workers/" + worker_id,
                  None, {"cascade_update": "true" if cascade else "false"})

    def create_queue(self, name):
        body = {"queue_name": name, "password": "p", "metadata": {"made": self.step}}
        self.both(lambda answer: self.model.create_queue(name, {"made": self.step}), name, "POST", "/api/v1/queues", body)

    def update_queue(self, name):
        new_name = self.dice.choice(self.known["queues"]) if self.dice.random() < 0.3 else None
        metadata = self.dice.choice((None, {}, {"k": self.step}))
        self.both(lambda answer: self.model.update_queue(name, new_name, metadata), name, "PUT", "",
                  {"new_queue_name": new_name, "metadata_update": metadata})

    def pause(self, name):
        paused = self.dice.random() < 0.3
        self.both(lambda answer: self.model.pause(name, paused), name, "PUT", "", {"paused": paused})

    def delete_queue(self, name):
        if self.dice.random() < 0.2:
            self.both(lambda answer: self.model.delete_queue(name), name, "DELETE", "")

    def time_passes(self, name):
        self.done.append("time passes")
        self.clock.pass_s(self.dice.randrange(1, 6) * BIG_STEP_S)
        self.look()

    def look(self):
        for name in sorted(self.model.queues):
            first = self.clock.day + 1.01  # when the first that looks does
            self.clock.day, kept = round(first, 6), self.clock.day
            self.model.expire(name)
            self.clock.day = kept
            self.service.look(name)

    def restart(self, name):
        """Start anew, the same way or the other; a server gives every run its full time again."""
        is_server = self.dice.random() < 0.5
        self.done.append("restart as %s" % ("server" if is_server else "embedded"))
        self.compare_file()
        if is_server or self.service.is_server:  # a server keeps in its memory alone when runs were last heard of
            self.model.restart()
        self.service.open(is_server)
        self.look()
        self.compare_all()

    def compact(self, name):
        self.done.append("compact")
        if self.model.queues:
            self.service.compact()

    # comparing

    def compare(self, wanted, found):
        """AssertionError unless a task as it was answered is the model's."""
        for key, value in wanted.items():
            got = found.get(key) if not key.startswith("_") else value
            if key in ("created_at", "start_time", "last_modified", "not_before") and value is not None:
                assert got and abs(L.parse_time(got) - value) < 3e-6, "%s is %s, the model has %s: %s" % (
                    key, got, L.format_time(L.Instant(value)), found)
            elif key == "summary" and "labtasker_error" in value:
                assert got.get("labtasker_error") and dict(got, labtasker_error=None) == value, (found, value)
            else:
                assert got == value, "%s is %r, the model has %r: %s" % (key, got, value, found)

    def compare_all(self):
        """Compare all tasks and workers, and the memory of each place with the file."""
        for name, queue in self.model.queues.items():
            found = self.service(name, "POST", "tasks/search", {"limit": 10 ** 6})[1]["content"]
            assert {one["task_id"] for one in found} == set(queue["tasks"])
            times = [L.parse_time(one["last_modified"]) for one in found]
            assert times == sorted(times), "the default order is not that of the last change"
            for one in found:
                self.compare(queue["tasks"][one["task_id"]], one)
            found = self.service(name, "POST", "workers/search", {"limit": 10 ** 6})[1]["content"]
            assert {one["worker_id"] for one in found} == set(queue["workers"])
            for one in found:
                self.compare(queue["workers"][one["worker_id"]], one)
            assert self.service(name, "GET", "")[1]["metadata"] == queue["metadata"]
        self.compare_file()

    def compare_file(self):
        if not self.service.is_server:
            for place in self.service.places:
                place.queue = "q0"
                place("GET", "")
                faulty.check_same(faulty.contents(place.store.state), faulty.replayed(self.service.path), "memory and file")
        elif self.service.path.exists():
            store = self.service.places[0].store
            faulty.check_same(faulty.contents(store.state), faulty.replayed(self.service.path), "memory and file")


def plainly(report):
    """Return a report with its dotted keys as nested ones."""
    return dict(report, summary={"deep": {"b": 2}} if "deep.b" in report.get("summary", ()) else report.get("summary"))


STATUSES = ("pending", "running", "success", "failed", "cancelled")
REQUIRED = [["a"], ["a", "*"], ["a", "b"], ["b", "c"], ["*"], ["n"], ["n.x", "*"], ["a", "b", "c", "n"], []]
ACTS = (["submit"] * 14 + ["submit_unnamed"] * 4 + ["fetch"] * 22 + ["report"] * 20 + ["heartbeat"] * 6 + ["update"] * 6
        + ["delete"] * 3 + ["tidy"] + ["get"] * 4 + ["search"] * 4 + ["create_worker"] * 2 + ["report_worker"] * 2
        + ["delete_worker"] + ["create_queue", "update_queue", "delete_queue", "time_passes", "time_passes"] + ["pause"] * 2)
ACTS = ACTS * 10 + ["restart"] * 2 + ["compact"] * 3


@pytest.fixture
def clock(monkeypatch):
    """The clocks stand still but for what an episode lets pass; nothing waits for a disk or another process."""
    clock = Clock()
    monkeypatch.setattr(L, "now", lambda: L.Instant(clock.day))
    monkeypatch.setattr(L, "monotonic", lambda: clock.mono)
    monkeypatch.setattr(L, "PASSWORD_ROUNDS", 1)
    monkeypatch.setattr(L, "in_other_process", lambda function, *words: json.dumps(getattr(L, function)(*words)), raising=False)
    faulty.without_sync(monkeypatch)
    return clock


def rows():
    """Return the numbers of the episodes that rows begin with: eight where there are STEPS for them."""
    first = faulty.setting("SEED") * 1000
    return range(first, first + max(1, min(8, faulty.setting("STEPS") // EPISODE)))


@pytest.mark.parametrize("seed", sorted(set(KEPT) | set(rows())))
def test_the_service_is_equal_to_the_model(tmp_path, clock, seed):
    """Eight rows, each so many episodes that all STEPS are made; the later ones' numbers are a million apart."""
    rounds = max(1, faulty.setting("STEPS") // EPISODE // 8) if seed in rows() else 1
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        Episode(seed + number * 10 ** 6, folder / "journal.jsonl", clock).run(EPISODE)


def test_runs_go_on_when_a_server_takes_a_store_over_and_gives_it_back(tmp_path, clock):
    """A run that beat to the server all the time is not taken for silent by the processes that follow it."""
    service, path = Service(tmp_path / "journal.jsonl", clock), "tasks/%s/heartbeat"
    service.open(False)
    service("default", "POST", "tasks", {"args": {"a": 1}})
    task = service("default", "POST", "tasks/next", {"heartbeat_timeout": 1000})[1]["task"]
    service.open(True)
    for _ in range(5):
        clock.pass_s(500)
        assert service("default", "POST", path % task["task_id"], None, {"run_id": task["run_id"]})[0] == 204
    service.open(False)
    service.look("default")
    assert service("default", "GET", "tasks/" + task["task_id"])[1]["status"] == "running"
    service.close()


def test_a_run_without_a_limit_that_is_given_one_has_its_time_from_the_servers_start(tmp_path, clock):
    """As every other run; were it timed from the update on, a silent one would be noticed later."""
    service = Service(tmp_path / "journal.jsonl", clock)
    service.open(True)
    service("default", "POST", "tasks", {"args": {"a": 1}})
    task = service("default", "POST", "tasks/next", {})[1]["task"]
    service.open(True)
    service.look("default")
    clock.pass_s(500)
    service.look("default")
    change = [{"task_id": task["task_id"], "heartbeat_timeout": 600}]
    assert service("default", "PUT", "tasks", change, {"reset_pending": "false"})[0] == 200
    for passed_s, status in ((90, "running"), (20, "pending")):
        clock.pass_s(passed_s)
        service.look("default")
        assert service("default", "GET", "tasks/" + task["task_id"])[1]["status"] == status
    service.close()


def test_a_busy_queue_does_not_keep_the_time_outs_of_another_from_being_looked_for(tmp_path, clock):
    service = Service(tmp_path / "journal.jsonl", clock)
    service.open(True)
    for name in ("busy", "other"):
        assert service(name, "POST", "/api/v1/queues", {"queue_name": name, "password": "p"})[0] == 201
    service("other", "POST", "tasks", {"args": {"a": 1}})
    task = service("other", "POST", "tasks/next", {"heartbeat_timeout": 5})[1]["task"]
    for _ in range(100):
        clock.pass_s(0.9999)
        service("busy", "POST", "tasks/next", {})
        clock.pass_s(0.0002)
        service("busy", "POST", "tasks/next", {})
        service.places[0].store.look_for_timeouts()  # as the server's clock does, once a second
    assert service("other", "GET", "tasks/" + task["task_id"])[1]["status"] == "pending"
    service.close()
