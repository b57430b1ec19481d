"""Many workers on one server: a connection each, a report every second, a task that ends after ten minutes.

    python tests/bench/workers.py [--workers 10000] [--seconds 60] [--every 1] [--task 600] [--files N] [--syncs]

prints what they asked for and what they got: requests a second, their milliseconds, the server's CPU, bytes, file
descriptors and memory. A worker whose connection is closed connects again. `--files` gives the server so few file
descriptors; `--syncs` has strace count its syncs, which costs it some speed."""
import argparse
import heapq
import json
import multiprocessing
import os
import random
import resource
import selectors
import shutil
import time

import clients
import peers

PROCESSES = 2
FILES = 65536 + 64


class Server(peers.Ours):
    """Our server with so many file descriptors, if that is given; its syncs are counted, if that is asked."""

    files, counts_syncs = None, False

    def words(self):
        words = super().words()
        if self.counts_syncs:
            words = ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-c", "-e", "trace=fsync,fdatasync",
                     "-o", os.path.join(self.folder, "syncs")] + words
        return ["bash", "-c", 'ulimit -n %s; exec "$@"' % self.files, "server"] + words if self.files else words

    def open_files(self):
        """Return how many file descriptors it holds."""
        return len(os.listdir("/proc/%d/fd" % self.pid))

    def syncs(self):
        """Return how many syncs there were, once it has ended."""
        give_up_at = time.monotonic() + 20
        while time.monotonic() < give_up_at:
            try:
                with open(os.path.join(self.folder, "syncs")) as file:
                    rows = [line.split() for line in file if line.split()[-1:] in (["fsync"], ["fdatasync"])]
                if rows:
                    return sum(int(row[3]) for row in rows)
            except FileNotFoundError:
                pass
            time.sleep(0.1)
        return -1


def extended(http):
    """Return a connection whose requests are those of a peer that knows runs."""
    http.head += "Labtasker-Extensions: 1\r\n"
    return http


class Worker:
    """One that runs a task: it reports, and at the task's end says so and fetches the next."""

    def __init__(self, server, task, number, ends_at):
        (self.port, self.login), self.number, self.ends_at = server, number, ends_at
        self.take(task)
        self.connect()

    def connect(self):
        """Connect, again if need be."""
        self.http = extended(clients.Http(self.port, self.login))

    def take(self, task):
        """Run this task from now on."""
        self.path, self.run_id, self.step = "%s/tasks/%s/status" % (clients.ME, task["task_id"]), task["run_id"], 0
        self.doing = "report"

    def request(self, now):
        """Return the bytes of the next request."""
        if self.doing == "fetch":
            return self.http.request("POST", clients.ME + "/tasks/next", json.dumps(
                {"required_fields": ["i"], "heartbeat_timeout": 600, "fetch_id": "f%d-%d" % (self.number, self.step)}))
        self.step += 1
        body = {"status": "running", "summary": {"loss": 1 / self.step, "acc": 0.5}, "run_id": self.run_id,
                "step": self.step, "point_id": "p%d" % self.step}
        if now >= self.ends_at:
            self.doing, body = "finish", {"status": "success", "summary": {"loss": 0.1}, "run_id": self.run_id}
        return self.http.request("POST", self.path, json.dumps(body))


class Crowd:
    """The workers of one process, and what they saw."""

    def __init__(self, workers, every_s, task_s):
        self.workers, self.every_s, self.task_s = workers, every_s, task_s
        self.look, self.due, self.sent = selectors.DefaultSelector(), [], {}
        self.found = {"seconds": [], "sent_bytes": 0, "got_bytes": 0, "tasks": 0, "closed": 0}
        for worker in workers:
            self.look.register(worker.http.connection, selectors.EVENT_READ, worker)

    def run(self, seconds):
        """Work for so long; return what was found, with the time that it took until the last answer came."""
        begin = time.monotonic()
        for worker in self.workers:
            worker.ends_at += begin
            heapq.heappush(self.due, (begin + random.random() * self.every_s, worker.number, worker))
        while self.due or self.sent:
            now = time.monotonic()
            while self.due and self.due[0][0] <= now:
                self.send(heapq.heappop(self.due)[2])
            wait_s = self.due[0][0] - time.monotonic() if self.due else 1
            for key, _ in self.look.select(max(0, min(wait_s, 1))):
                self.receive(key.data, begin + seconds)
        return dict(self.found, took_s=time.monotonic() - begin)

    def send(self, worker):
        """Send a worker's next request; once more, on a new connection, where the old one is closed."""
        now = time.monotonic()
        request = worker.request(now)
        self.sent.setdefault(worker.number, now)
        try:
            worker.http.connection.sendall(request)
        except OSError:
            self.again(worker, request)
        worker.last = request
        self.found["sent_bytes"] += len(request)

    def again(self, worker, request):
        """Connect again and repeat what was not answered."""
        self.found["closed"] += 1
        self.look.unregister(worker.http.connection)
        worker.http.connection.close()
        worker.connect()
        self.look.register(worker.http.connection, selectors.EVENT_READ, worker)
        if request:
            worker.http.connection.sendall(request)

    def receive(self, worker, over_at):
        """Note an answer; say when the worker's next request is due."""
        try:
            got = worker.http.connection.recv(65536)
        except OSError:
            got = b""
        if not got:
            self.again(worker, worker.last if worker.number in self.sent else None)
            return
        assert got[9:12] == b"200", (worker.last[-300:], got[:500])
        now, began = time.monotonic(), self.sent.pop(worker.number)
        self.found["seconds"].append(now - began)
        self.found["got_bytes"] += len(got)
        due = max(began + self.every_s, now)
        if worker.doing == "finish":
            worker.doing, due = "fetch", now
            self.found["tasks"] += 1
        elif worker.doing == "fetch":
            worker.take(json.loads(got.partition(b"\r\n\r\n")[2])["task"])
            worker.ends_at = now + self.task_s
        if due < over_at:
            heapq.heappush(self.due, (due, worker.number, worker))


def crowd(pipe, server, tasks, options, ready, start):
    """Send what the workers of these tasks found; in a process of its own."""
    try:
        workers = [Worker(server, task, number, random.random() * options.task) for number, task in tasks]
        one = Crowd(workers, options.every, options.task)
    except BaseException:
        ready.abort()
        raise
    ready.wait()
    start.wait()
    pipe.send(one.run(options.seconds))


def running(server, count, more):
    """Return [(number, task)] of so many tasks that were fetched; `more` tasks are pending besides."""
    http = extended(server.http())
    for begin in range(0, count + more, 1000):
        http.call("POST", clients.ME + "/tasks", [{"args": {"i": i}} for i in range(begin, min(count + more, begin + 1000))], 201)
    ask = {"required_fields": ["i"], "heartbeat_timeout": 600}
    return [(i, http.call("POST", clients.ME + "/tasks/next", dict(ask, fetch_id="f%d" % i))["task"]) for i in range(count)]


def measure(server, options):
    """Return (what all workers found, the server's CPU-seconds, its most open files)."""
    fork, pipes = multiprocessing.get_context("fork"), []
    tasks = running(server, options.workers, int(options.workers * options.seconds / options.task * 1.5) + 10)
    ready, start = fork.Barrier(PROCESSES + 1), fork.Event()
    for k in range(PROCESSES):
        mine, its = fork.Pipe(False)
        fork.Process(target=crowd, args=(its, (server.port, server.login), tasks[k::PROCESSES], options, ready, start),
                     daemon=True).start()
        its.close()
        pipes.append(mine)
    ready.wait(300)
    files, spent_s = server.open_files(), server.cpu_s()
    start.set()
    found = [pipe.recv() for pipe in pipes]
    return found, server.cpu_s() - spent_s, files


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, value in (("workers", int, 10000), ("seconds", float, 60), ("every", float, 1), ("task", float, 600),
                              ("files", int, None)):
        parser.add_argument("--" + name, type=kind, default=value)
    parser.add_argument("--syncs", action="store_true")
    options = parser.parse_args()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    except (ValueError, OSError):  # not root
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Server.files, Server.counts_syncs = options.files, options.syncs and bool(shutil.which("strace"))
    with peers.Workshop():
        with Server() as server:
            began_bytes = os.path.getsize(server.journal)
            found, cpu_s, files = measure(server, options)
            journal_bytes, memory_bytes = os.path.getsize(server.journal) - began_bytes, server.memory_bytes()
        print(text_of(options, found, cpu_s, files, journal_bytes, memory_bytes))
        if Server.counts_syncs:
            print("syncs in all, with those of the beginning: %d" % server.syncs())


def text_of(options, found, cpu_s, files, journal_bytes, memory_bytes):
    """Return the figures as text."""
    seconds = sorted(one for each in found for one in each["seconds"])
    took_s, count = max(each["took_s"] for each in found), len(seconds)
    total = {key: sum(each[key] for each in found) for key in ("sent_bytes", "got_bytes", "tasks", "closed")}
    return ("%d workers, a report every %g s (%.0f/s asked for): %d requests in %.1f s, %.0f/s; p50 %.1f ms, p99 %.1f ms, max %.0f ms\n"
            "%d tasks ended; %d connections closed by the server; %d open files\n"
            "server: %.1f CPU-s, %.0f us a request; %.0f bytes in and %.0f out a request; journal %.0f bytes a request, %.0f KB/s; "
            "%.0f MB of memory\nload of the machine %.1f on %d cores" % (
                options.workers, options.every, options.workers / options.every, count, took_s, count / took_s,
                *(seconds[int(count * part)] * 1e3 for part in (0.5, 0.99)), seconds[-1] * 1e3,
                total["tasks"], total["closed"], files, cpu_s, cpu_s / count * 1e6, total["sent_bytes"] / count,
                total["got_bytes"] / count, journal_bytes / count, journal_bytes / took_s / 1000, memory_bytes / 1e6,
                os.getloadavg()[0], os.cpu_count()))


if __name__ == "__main__":
    main()
