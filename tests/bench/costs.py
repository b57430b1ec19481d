"""Costs: of a command, as a whole process; of a server that has nothing to do."""
import functools
import json
import os
import selectors
import subprocess
import sys
import time

import clients
import peers
from peers import SIZES, Workshop

LABTASKER = [sys.executable, "-m", "labtasker"]
COMMANDS = {  # what is started, and whether in a folder whose server runs
    "pass": ([sys.executable, "-c", "pass"], False),
    "import": ([sys.executable, "-c", "import labtasker"], False),
    "embedded": (LABTASKER + ["task", "submit", "--", "--lr=0.1"], False),
    "server": (LABTASKER + ["task", "submit", "--", "--lr=0.1"], True),
    "help": (LABTASKER + ["--help"], False),
}


@functools.lru_cache(None)
def starts():
    """Return {command: [milliseconds of a whole process]}, run in turn; the stores are empty at first."""
    found = {name: [] for name in COMMANDS}
    with peers.Ours(os.path.join(Workshop.place(), ".labtasker")) as server:
        alone, served = Workshop.place(), os.path.dirname(server.folder)
        for number in range(SIZES["starts"] + 2):
            for name, (words, with_server) in COMMANDS.items():
                begin = time.perf_counter()
                done = subprocess.run(words, cwd=served if with_server else alone, stdin=subprocess.DEVNULL, check=True,
                                      env=peers.environment(PYTHONPATH=str(peers.ROOT)), stdout=subprocess.PIPE)
                if number >= 2:  # the first ones write the bytecode, and make the store
                    found[name].append((time.perf_counter() - begin) * 1000)
                assert bool(done.stdout) == (name not in ("pass", "import")), done
    return found


def command(name):
    """Return the milliseconds of a command, and of the interpreter that does nothing."""
    return starts()[name], starts()["pass"]


def importing():
    """Return the milliseconds that `import labtasker` adds to an interpreter's start, and the goal."""
    return [one - other for one, other in zip(starts()["import"], starts()["pass"])], 20


PRINTS = """
import json, os, sys, time
lines, per_s = int(sys.argv[1]), float(sys.argv[2])
begin = time.perf_counter()
for number in range(lines):
    print("step %d: train loss %.4f, val loss %.4f, 12.3 ms" % (number, 1 / (number + 1), 2 / (number + 1)))
    if per_s and number % 1000 == 999:
        time.sleep(max(0, begin + number / per_s - time.perf_counter()))
sys.stdout.flush()
took_s = time.perf_counter() - begin
with open(os.path.join(os.environ["LABTASKER_LOG_DIR"], "summary.json"), "w") as file:
    json.dump({"lines_per_s": lines / took_s}, file)
"""
METRICS = ["--metric", "loss=val loss ([0-9.]+)", "--metric", "train=train loss ([0-9.]+)", "--step", "step ([0-9]+)"]


def printing(end, per_s=0):
    """Return the lines a second of a job that prints `per_s` (0: what it can) into a pipe or a pty, with and without
    --metric, in turn."""
    place = Workshop.place()
    with open(os.path.join(place, "prints.py"), "w") as file:
        file.write(PRINTS)
    found = {True: [], False: []}
    for number in range(2 * SIZES["jobs"]):
        with_metric = number % 2 == 0
        run_in(place, ["task", "submit", "--name", "job%d" % number, "--", "--lines=%d" % SIZES["printed"]])
        run_in(place, ["loop", "--use-pty" if end == "pty" else "--no-use-pty"] + METRICS * with_metric + [
            "--", sys.executable, "prints.py", "%(lines)", str(per_s)])
        summary = json.loads(run_in(place, ["task", "ls", "--name", "job%d" % number, "--fmt", "jsonl"]))["summary"]
        assert ("loss" in summary) == with_metric, summary
        found[with_metric].append(summary["lines_per_s"])
    return found[True], found[False]


def run_in(place, words):
    """Return what one of our commands prints."""
    return subprocess.run(LABTASKER + words, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
                          stderr=subprocess.DEVNULL, env=peers.environment(PYTHONPATH=str(peers.ROOT))).stdout


def spent(pid):
    """Return (CPU-seconds, times that a thread of it went to sleep) of a process so far."""
    cpu_s = sleeps = 0
    for thread in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/schedstat" % (pid, thread)) as file:
            cpu_s += int(file.read().split()[0]) / 1e9
        with open("/proc/%d/task/%s/status" % (pid, thread)) as file:
            sleeps += int(next(line for line in file if line.startswith("voluntary_ctxt")).split()[1])
    return cpu_s, sleeps


def spent_in(pid, seconds, wait):
    """Return {"cpu_s": CPU-seconds a day, "wakes": a second} of a process, measured while `wait(seconds)` runs."""
    before, begin = spent(pid), time.perf_counter()
    wait(seconds)
    took_s = time.perf_counter() - begin
    cpu_s, sleeps = (now - then for now, then in zip(spent(pid), before))
    return {"cpu_s": cpu_s / took_s * 86400, "wakes": sleeps / took_s}


@functools.lru_cache(None)
def idle_server():
    with peers.Ours() as server:
        time.sleep(min(2, SIZES["idle_s"]))
        return spent_in(server.pid, SIZES["idle_s"], time.sleep)


def idle(what):
    """Return what a server costs to which nobody speaks, and the goal."""
    return [idle_server()[what]], {"cpu_s": 10, "wakes": 1}[what]


class Beating:
    """Workers that each run a task and ask every ten seconds, as our own do, to be told when it is over."""

    WAIT_S = 10

    def __init__(self, server, count):
        self.selector, self.answers = selectors.DefaultSelector(), 0
        for number in range(count):
            http = server.http()
            worker = http.call("POST", clients.ME + "/workers", {}, 201)["worker_id"]
            http.call("POST", clients.ME + "/tasks", {"args": {"i": number}}, 201)
            task = http.call("POST", clients.ME + "/tasks/next", {"worker_id": worker, "heartbeat_timeout": 60})["task"]
            beat = http.request("POST", "%s/tasks/%s/heartbeat?worker_id=%s&answer=status&wait_s=%d" % (
                clients.ME, task["task_id"], worker, self.WAIT_S))
            self.selector.register(http.connection, selectors.EVENT_READ, (http, beat))
        self.count = count

    def begin(self):
        """Send the first of each, spread over the time between two."""
        for key in list(self.selector.get_map().values()):
            key.fileobj.sendall(key.data[1])
            self.run(min(self.WAIT_S, SIZES["idle_s"]) / self.count)

    def run(self, seconds):
        """Answer each answer with the next heartbeat, for so long."""
        give_up_at = time.perf_counter() + seconds
        while time.perf_counter() < give_up_at:
            for key, _ in self.selector.select(max(0, give_up_at - time.perf_counter())):
                got = key.fileobj.recv(65536)
                assert got.startswith(b"HTTP/1.1 200") and b"running" in got, got
                key.fileobj.sendall(key.data[1])
                self.answers += 1


def heartbeats():
    """Return the CPU-seconds a day of a server with 100 workers that beat, and the goal."""
    with peers.Ours() as server:
        beating = Beating(server, 100)
        beating.begin()
        before = beating.answers
        found = spent_in(server.pid, SIZES["idle_s"], beating.run)
        expected = 100 * SIZES["idle_s"] / Beating.WAIT_S
        assert beating.answers - before >= 0.8 * expected - 20, "%d answers" % (beating.answers - before)
        return [found["cpu_s"]], 120
