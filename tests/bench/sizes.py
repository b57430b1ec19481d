"""Sizes: what a million tasks cost, in time, in memory and at the next start."""
import collections
import functools
import json
import multiprocessing
import statistics
import time

import clients
import peers
from peers import SIZES, Workshop


def like_all(number):
    """Return the text of a task as all are: five args, of which `group` is the same in one of 1,000."""
    return '{"args": {"i": %d, "group": %d, "lr": %r, "model": "resnet-%d", "seed": %d}}' % (
        number, number % 1000, 1 / (number + 1), number % 50, number % 7)


def like_few(number, shapes=100):
    """Return the text of a task that has the keys of one in so many."""
    return '{"args": {"i": %d, "lr": %r, "only_%d": 1}}' % (number, 1 / (number + 1), number % shapes)


def like_none(number):
    """Return the text of a task that has keys of its own, until there are SIZES["wide"] shapes."""
    return like_few(number, SIZES["wide"])


def like_one_owner(owners, number):
    """Return the text of a task of one of so many owners."""
    return '{"args": {"i": %d, "owner": %d}}' % (number, number % owners())


ROOT = "00000000-0000-4000-a000-000000000000"


def like_blocked(number):
    """Return the text of a task that waits for the first one, which nobody fetches."""
    task = {"args": {"root": 1}, "task_id": ROOT} if number == 0 else dict(json.loads(like_all(number)), after=[ROOT])
    return json.dumps(task)


class Case:
    """What is measured in a store: `fill` makes its tasks, `size` names their number; each turn submits what `make` (or
    `fill`) gives for `number(n)`, and fetches it as `ask(n)` says. The first `warm` turns are not measured."""

    def __init__(self, fill, size, ask, number=lambda n: n % 100, make=None, warm=lambda: 100):
        self.fill, self.size, self.ask, self.number, self.warm = fill, size, ask, number, warm
        self.make = make or fill

    def server(self):
        """Return the server of the store."""
        return filled(self.fill, SIZES[self.size])


class CurvesCase(Case):
    """Beside 1,000 pending tasks as many are running, with so many points each."""

    def __init__(self, points):
        super().__init__(like_all, "few", by_keys)
        self.points = points

    def server(self):
        """Return the server of the store."""
        return with_curves(SIZES["points"] if self.points is None else self.points)


def by_keys(n):
    """Return the fetch that takes every task."""
    return {"required_fields": ["i", "group", "lr", "model", "seed"]}


def by_group(groups, first=0):
    """Return the fetches of tasks that are alike, by one of so many filters."""
    return lambda n: dict(by_keys(n), extra_filter={"args.group": first + n % groups})


def by_shape(n):
    """Return the fetch that names the keys of one in a hundred shapes."""
    return {"required_fields": ["i", "lr", "only_%d" % (n % 100)]}


def by_any(n):
    """Return the fetch that takes every shape."""
    return {"required_fields": ["i", "*"]}


def by_owner(owners):
    """Return the fetches by one of so many filters."""
    return lambda n: {"required_fields": ["i", "owner"], "extra_filter": {"args.owner": n % owners()}}


def owned(owners):
    """Return the case of a store whose tasks are asked for by so many filters in turn."""
    return Case(functools.partial(like_one_owner, owners), "few", by_owner(owners), lambda n: n % owners(),
                warm=lambda: SIZES["owners"])  # of both: a count has as many tasks that ended to pass


KINDS = {  # the large case and the small one
    "plain": [Case(like_all, size, by_keys) for size in ("many", "few")],
    "filter": [Case(like_all, size, by_group(1, 7), lambda n: 7) for size in ("many", "few")],
    "shapes": [Case(like_few, size, by_shape) for size in ("many", "few")],
    "blocked": [Case(like_blocked, size, by_keys, make=like_all) for size in ("many", "few")],
    "filters": [Case(like_all, size, by_group(100)) for size in ("many", "few")],
    # the same number of tasks:
    "own shapes": [Case(fill, "wide", by_shape) for fill in (like_none, like_few)],
    "any shape": [Case(fill, "wide", by_any) for fill in (like_none, like_few)],
    "owners": [owned(owners) for owners in (lambda: SIZES["owners"], lambda: 10)],
    "curves": [CurvesCase(None), CurvesCase(1)],
    "waiting": [Case(like_blocked, "many", by_keys, make=like_all), Case(like_all, "many", by_keys)],
}


@functools.lru_cache(None)
def filled(make, size):
    """Return a server with so many pending tasks, submitted, and then opened again; its figures stand beside it."""
    folder = Workshop.place()
    with peers.Ours(folder) as server:
        empty_bytes = server.memory_bytes()
        load = clients.together(clients.batches, 1, server.port, server.login, size // 1000, 1000,
                                functools.partial(clients.in_list, make=make))
        assert len(set(load.ids)) == size
        filled_bytes = server.memory_bytes()
    server = Workshop.keep(peers.Ours(folder))
    assert len(server.http().call("POST", clients.ME + "/tasks/search", {"limit": 1000})["content"]) == min(size, 1000)
    server.found = {"empty": empty_bytes, "task": (filled_bytes - empty_bytes) / size,
                    "task, opened": (server.memory_bytes() - empty_bytes) / size}
    return server


@functools.lru_cache(None)
def with_curves(points):
    """Return a server with 1,000 pending tasks and 1,000 running ones, each of which has reported so many points."""
    server = Workshop.keep(peers.Ours())
    clients.together(clients.batches, 1, server.port, server.login, SIZES["few"] // 500, 1000,
                     functools.partial(clients.in_list, make=like_all))
    http = server.http()
    server.running = [http.call("POST", clients.ME + "/tasks/next", dict(
        by_keys(n), heartbeat_timeout=9999))["task"]["task_id"] for n in range(SIZES["few"])]
    for step in range(points):
        for begin in range(0, len(server.running), 50):
            clients.pipelined(http, [point_on(http, task_id, step) for task_id in server.running[begin:begin + 50]])
    return server


def point_on(http, task_id, step):
    """Return the request that reports a point."""
    return http.request("POST", "%s/tasks/%s/status" % (clients.ME, task_id), json.dumps(
        {"status": "running", "summary": {"loss": 1 / (step + 1)}, "step": step, "point_id": "p%d" % step}))


class Cycle:
    """Submits, fetches and reports one task after another; the number of pending ones stays as it is."""

    def __init__(self, case):
        self.case, self.server, self.n = case, case.server(), 0
        self.http = self.server.http()
        self.worker = self.http.call("POST", clients.ME + "/workers", {}, 201)["worker_id"]

    def timed(self, request):
        """Return (the answer, the CPU-seconds that it took the server, those that passed)."""
        begin, spent_s = time.perf_counter(), self.server.cpu_s()
        status, answer = self.http.ask(request)
        took_s, spent_s = time.perf_counter() - begin, self.server.cpu_s() - spent_s
        assert status in (200, 201), (status, answer[:500])
        return json.loads(answer), spent_s, took_s

    def turn(self):
        """Return {operation: the server's CPU-seconds} of a submission, of the fetch that can take it, and of the report."""
        n, self.n, me = self.n, self.n + 1, clients.ME
        _, submit_s, _ = self.timed(self.http.request("POST", me + "/tasks", self.case.make(self.case.number(n))))
        ask = dict(self.case.ask(n), worker_id=self.worker, heartbeat_timeout=60)
        answer, fetch_s, self.fetch_took_s = self.timed(self.http.request("POST", me + "/tasks/next", json.dumps(ask)))
        assert answer["found"], "no task for %s" % ask
        _, report_s, _ = self.timed(self.http.request("POST", "%s/tasks/%s/status" % (
            me, answer["task"]["task_id"]), json.dumps({"status": "success", "worker_id": self.worker})))
        found = {"submit": submit_s, "fetch": fetch_s, "report": report_s, "all": submit_s + fetch_s + report_s}
        if isinstance(self.case, CurvesCase):
            task_id = self.server.running[n % len(self.server.running)]
            found["point"] = self.timed(point_on(self.http, task_id, SIZES["points"] + n))[1]
        return found

    def count(self):
        """Return the server's CPU-seconds of a count of all tasks."""
        return self.timed(self.http.request("POST", clients.ME + "/tasks/count", "{}"))[1]


first_fetches = {}  # kind: the seconds of the first fetch in the large store


@functools.lru_cache(None)
def warmed(kind):
    """Return the cycles of a kind, large and small. What a filter is first asked for is looked for in all tasks, once:
    that is over."""
    both = [Cycle(case) for case in KINDS[kind]]
    for cycle in both:
        for number in range(cycle.case.warm()):
            cycle.turn()
            if number == 0 and cycle is both[0]:
                first_fetches[kind] = cycle.fetch_took_s
    return both


@functools.lru_cache(None)
def cycles(kind):
    """Return [({"submit": mean microseconds of the server's CPU, ...} in the large store, the same in the small one) of
    a round]. The turns alternate, so that whatever else the machine does meets both."""
    found = []
    for _ in range(SIZES["rounds"]):
        turns = zip(*[[cycle.turn() for cycle in warmed(kind)] for _ in range(SIZES["cycles"])])
        found.append([{what: statistics.mean(turn[what] for turn in one) * 1e6 for what in one[0]} for one in turns])
    return found


def growth(kind, what):
    """Return the microseconds of an operation in the large store, and in the small one."""
    return [[each[what] for each in means] for means in zip(*cycles(kind))]


def counting(kind):
    """Return the milliseconds of the server's CPU that a count takes in the large store, and in the small one."""
    rounds = [[min(cycle.count() for _ in range(3)) * 1e3 for cycle in warmed(kind)] for _ in range(SIZES["rounds"])]
    return [list(one) for one in zip(*rounds)]


def first_ask():
    """Return the seconds of the first fetch by a filter, for which all tasks are looked through, and the goal."""
    warmed("filter")
    return [first_fetches["filter"]], 2


def fetch_always(server, started, ended, pipe):
    """Fetch, until told to stop, and send the seconds of each."""
    cycle, found = Cycle(KINDS["plain"][0]), []
    cycle.turn()
    started.set()
    while not ended.is_set():
        cycle.turn()
        found.append(cycle.fetch_took_s)
    pipe.send(found)


def with_fetches(server, path, body):
    """Return (the content of the answer, its seconds, the p99 in seconds of the fetches that another client makes)."""
    fork, http = multiprocessing.get_context("fork"), server.http()
    started, ended, (mine, its) = fork.Event(), fork.Event(), fork.Pipe(False)
    process = fork.Process(target=fetch_always, args=(server, started, ended, its), daemon=True)
    process.start()
    started.wait()
    begin = time.perf_counter()
    answer = http.call("POST", clients.ME + path, body)
    took_s = time.perf_counter() - begin
    ended.set()
    fetches = sorted(mine.recv())
    process.join()
    return answer["content"], took_s, fetches[int(len(fetches) * 0.99)]


@functools.lru_cache(None)
def listings():
    """Return {figure: [its value in a round]} of listings and tables over a million tasks, with fetches meanwhile."""
    server = filled(like_all, SIZES["many"])
    http, found = server.http(), collections.defaultdict(list)
    for number in range(SIZES["rounds"]):
        begin = time.perf_counter()
        answer = http.call("POST", clients.ME + "/tasks/search", {"limit": 100})
        found["first_ms"].append((time.perf_counter() - begin) * 1000)
        assert len(answer["content"]) == 100
        rows, took_s, p99_s = with_fetches(server, "/tasks/search", {
            "limit": SIZES["many"], "extra_filter": {"$and": [{"args.group": 100 + number}, {"args.lr": {"$lt": 0.9}}]}})
        assert len(rows) == SIZES["many"] // 1000, len(rows)
        found["filter_s"].append(took_s)
        found["fetch_p99_ms"].append(p99_s * 1000)
        rows, took_s, p99_s = with_fetches(server, "/tasks/table", {
            "by": ["args.model"], "of": "args.lr", "mode": "max", "statuses": None})
        assert len(rows) == 50 and sum(row["n"] for row in rows) >= SIZES["many"], rows[:2]
        found["table_s"].append(took_s)
        found["table_p99_ms"].append(p99_s * 1000)
    return found


GOALS = {"filter_s": 2, "fetch_p99_ms": 50, "first_ms": 50, "table_s": 2, "table_p99_ms": 50, "task": 1200,
         "task, opened": 1200, "empty": 30}


def listing(what):
    """Return a figure of `listings`, and its goal."""
    return listings()[what], GOALS[what]


def memory(what):
    """Return how much a task, or the server before any (in MB), holds; and the goal."""
    if what == "empty":
        with peers.Ours() as server:
            return [server.memory_bytes() / 1e6], GOALS[what]
    return [filled(like_all, SIZES["many"]).found[what]], GOALS[what]


def opening(what):
    """Return the seconds from a server's start until it listens, over a million tasks or so many lines; the goal."""
    if what == "tasks":
        return [filled(like_all, SIZES["many"]).startup_s], 10
    folder, found = Workshop.place(), []
    with peers.Ours(folder) as server:
        server.submit(4, SIZES["lines"] // 4)
    for _ in range(min(3, SIZES["rounds"])):
        with peers.Ours(folder) as server:
            found.append(server.startup_s)
    return found, 0.8
