"""Reports with a step: how long a server of many workers takes for each, and what a point takes in memory.

    python tests/bench/points.py [WORKERS [SECONDS]]

prints the percentiles of WORKERS (1,000) that report once a second for SECONDS (60)."""
import heapq
import json
import multiprocessing
import os
import random
import resource
import selectors
import sys
import time

import clients
import peers
from peers import SIZES

PROCESSES = 2


def runs(server, count):
    """Return [(task id, run id)] of so many tasks that were fetched."""
    http, found = server.http(), []
    for begin in range(0, count, 1000):
        http.call("POST", clients.ME + "/tasks", [{"args": {"k": k}, "stop": "asha:loss:min:from=1e9"}
                                                   for k in range(begin, min(count, begin + 1000))], 201)
    for _ in range(count):
        task = http.call("POST", clients.ME + "/tasks/next", {"heartbeat_timeout": 3600, "fetch_id": "f%d" % len(found)})["task"]
        found.append((task["task_id"], None))
    return found


class Worker:
    """A connection of its own that reports on one task."""

    def __init__(self, port, login, task_id):
        self.http, self.path, self.step, self.sent_at = clients.Http(port, login), "%s/tasks/%s/status" % (clients.ME, task_id), 0, None

    def send(self, due):
        self.step += 1
        body = {"status": "running", "summary": {"loss": 1 / self.step, "acc": 0.5}, "step": self.step, "point_id": "p%d" % self.step}
        self.sent_at = due
        self.http.connection.sendall(self.http.request("POST", self.path, json.dumps(body)))


def report(pipe, port, login, ids, seconds, ready, start):
    """Send the seconds from when each report was due to its answer."""
    look, found, dice = selectors.DefaultSelector(), [], random.Random(os.getpid())
    workers = [Worker(port, login, task_id) for task_id in ids]
    for worker in workers:
        look.register(worker.http.connection, selectors.EVENT_READ, worker)
    ready.wait()
    start.wait()
    begin = time.perf_counter()
    due = [(begin + dice.random(), k) for k in range(len(workers))]
    heapq.heapify(due)
    waiting = 0
    while due or waiting:
        now = time.perf_counter()
        while due and due[0][0] <= now:
            at, k = heapq.heappop(due)
            workers[k].send(at)
            waiting += 1
        for key, _ in look.select(max(0, min(due[0][0] - time.perf_counter(), 1)) if due else 1):
            worker = key.data
            answer = key.fileobj.recv(65536)
            assert answer[9:12] == b"200", answer[:300]
            found.append(time.perf_counter() - worker.sent_at)
            waiting -= 1
            at = worker.sent_at + 1
            if at < begin + seconds:
                heapq.heappush(due, (max(at, time.perf_counter()), workers.index(worker)))
    pipe.send(found)


def measured(server, count, seconds):
    """Return the sorted seconds of all reports of so many workers, one a second each."""
    fork, ids = multiprocessing.get_context("fork"), [task_id for task_id, _ in runs(server, count)]
    ready, start, pipes = fork.Barrier(PROCESSES + 1), fork.Event(), []
    for k in range(PROCESSES):
        mine, its = fork.Pipe(False)
        fork.Process(target=report, args=(its, server.port, server.login, ids[k::PROCESSES], seconds, ready, start), daemon=True).start()
        pipes.append(mine)
    ready.wait(120)
    start.set()
    found = sorted(one for pipe in pipes for one in pipe.recv())
    for task_id in ids[:: max(1, count // 10)]:
        assert server.http().call("POST", clients.ME + "/tasks/search", {"task_id": task_id})["content"][0]["summary"]["acc"] == 0.5
    return found


def p99():
    """Return the milliseconds within which 99 of 100 reports are answered, and the goal."""
    with peers.Ours() as server:
        found = measured(server, SIZES["workers"], SIZES["report_s"])
        return [found[int(len(found) * 0.99)] * 1000], 250


def bytes_a_point():
    """Return what a point takes in a server that has opened a store of many, and the goal."""
    folder = peers.Workshop.place()
    with peers.Ours(folder) as server:
        http, ids = server.http(), [task_id for task_id, _ in runs(server, SIZES["curves"])]
    with peers.Ours(folder) as server:
        before = server.memory_bytes()
    with peers.Ours(folder) as server:
        http = server.http()
        for task_id in ids:
            for step in range(1000):
                http.call("POST", "%s/tasks/%s/status" % (clients.ME, task_id), {
                    "status": "running", "summary": {"loss": 1 / (step + 1), "acc": step / 1000}, "step": step, "point_id": "p%d" % step})
    with peers.Ours(folder) as server:
        return [(server.memory_bytes() - before) / (1000 * len(ids))], 300


def main(words):
    """Print the percentiles."""
    count, seconds = (list(map(int, words)) + [1000, 60][len(words):])[:2]
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with peers.Workshop(), peers.Ours() as server:
        begin, before = time.perf_counter(), cpu_s(server)
        found = measured(server, count, seconds)
        print("%d workers for %d s: %d reports (%.0f/s), p50 %.1f ms, p90 %.1f ms, p99 %.1f ms, max %.0f ms; server: %.0f us of CPU a "
              "report, %.0f MB; %.0f s in all; load %.1f" % (
                  count, seconds, len(found), len(found) / seconds, *(found[int(len(found) * part)] * 1000 for part in (0.5, 0.9, 0.99)),
                  found[-1] * 1000, (cpu_s(server) - before) / len(found) * 1e6, server.memory_bytes() / 1e6,
                  time.perf_counter() - begin, os.getloadavg()[0]))


def cpu_s(server):
    """Return the CPU-seconds that a server has spent."""
    with open("/proc/%d/stat" % server.pid) as file:
        words = file.read().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(sys.argv[1:])
