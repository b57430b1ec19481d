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


def like_few(number):
    """Return the text of a task that has the keys of one in a hundred."""
    return '{"args": {"i": %d, "lr": %r, "only_%d": 1}}' % (number, 1 / (number + 1), number % 100)


ROOT = "00000000-0000-4000-a000-000000000000"


def like_blocked(number):
    """Return the text of a task that waits for the first one, which nobody fetches."""
    task = {"args": {"root": 1}, "task_id": ROOT} if number == 0 else dict(json.loads(like_all(number)), after=[ROOT])
    return json.dumps(task)


ALL_KEYS = ["i", "group", "lr", "model", "seed"]
KINDS = {  # how tasks are made, and what the n-th of them is fetched with
    "plain": (like_all, lambda n: {"required_fields": ALL_KEYS}),
    "filter": (like_all, lambda n: {"required_fields": ALL_KEYS, "extra_filter": {"args.group": 7}}),
    "shapes": (like_few, lambda n: {"required_fields": ["i", "lr", "only_%d" % (n % 100)]}),
    "blocked": (like_blocked, lambda n: {"required_fields": ALL_KEYS}),
    "filters": (like_all, lambda n: {"required_fields": ALL_KEYS, "extra_filter": {"args.group": n % 100}}),
}


@functools.lru_cache(None)
def filled(make, size):
    """Return a server with so many pending tasks, submitted, and then opened again; its figures stand beside it."""
    folder = Workshop.place()
    with peers.Ours(folder) as server:
        empty_bytes = server.memory_bytes()
        load = clients.together(clients.batches, 1, server.port, server.login, size // 1000, 1000, make)
        assert len(set(load.ids)) == size
        filled_bytes = server.memory_bytes()
    server = Workshop.keep(peers.Ours(folder))
    assert len(server.http().call("POST", clients.ME + "/tasks/search", {"limit": 1000})["content"]) == min(size, 1000)
    server.found = {"empty": empty_bytes, "task": (filled_bytes - empty_bytes) / size,
                    "task, opened": (server.memory_bytes() - empty_bytes) / size}
    return server


class Cycle:
    """Submits, fetches and reports one task after another; the number of pending ones stays as it is."""

    def __init__(self, server, kind):
        self.http, self.make, self.ask = server.http(), *KINDS[kind]
        self.worker = self.http.call("POST", clients.ME + "/workers", {}, 201)["worker_id"]

    def timed(self, method, path, text):
        """Return (the answer, the seconds that it took)."""
        request = self.http.request(method, path, text)
        begin = time.perf_counter()
        status, answer = self.http.ask(request)
        took_s = time.perf_counter() - begin
        assert status in (200, 201), (status, answer[:500])
        return json.loads(answer), took_s

    def turn(self, n):
        """Return the seconds of a submission, of the fetch that can take it, and of the report."""
        number = 7 if self.make is like_all and self.ask(0) == self.ask(1) else n % 100  # one that the filter takes
        make = like_all if self.make is like_blocked else self.make  # else it waits too
        _, submit_s = self.timed("POST", clients.ME + "/tasks", make(number))
        answer, fetch_s = self.timed("POST", clients.ME + "/tasks/next", json.dumps(
            dict(self.ask(n), worker_id=self.worker, heartbeat_timeout=60)))
        assert answer["found"], "no task for %s" % self.ask(n)
        _, report_s = self.timed("POST", "%s/tasks/%s/status" % (clients.ME, answer["task"]["task_id"]), json.dumps(
            {"status": "success", "worker_id": self.worker}))
        return submit_s, fetch_s, report_s


first_fetches = {}  # kind: [seconds of each of the first fetches among a million]


@functools.lru_cache(None)
def cycles(kind):
    """Return [({"submit": mean microseconds, ...} with a million tasks, the same with a thousand) of a round].

    What a filter is first asked for is looked for in all tasks, once: that is before the rounds."""
    make = KINDS[kind][0]
    both = [Cycle(filled(make, SIZES[size]), kind) for size in ("many", "few")]
    for cycle in both:
        cycle.first_s = [cycle.turn(n)[1] for n in range(100)]
    first_fetches[kind] = both[0].first_s
    found = []
    for _ in range(SIZES["rounds"]):
        means = []
        for cycle in both:
            columns = zip(*[cycle.turn(n) for n in range(SIZES["cycles"])])
            means.append(dict(zip(("submit", "fetch", "report"), (statistics.mean(one) * 1e6 for one in columns))))
            means[-1]["all"] = sum(means[-1].values())
        found.append(means)
    return found


def growth(kind, what):
    """Return the microseconds of an operation with a million pending tasks, and with a thousand."""
    return tuple([each[what] for each in means] for means in zip(*cycles(kind)))


def first_ask():
    """Return the seconds of the first fetch by a filter, for which all tasks are looked through, and the goal."""
    cycles("filter")
    return first_fetches["filter"][:1], 2


def fetch_always(server, started, ended, pipe):
    """Fetch, until told to stop, and send the seconds of each."""
    cycle, found = Cycle(server, "plain"), []
    cycle.turn(0)
    started.set()
    while not ended.is_set():
        found.append(cycle.turn(0)[1])
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
