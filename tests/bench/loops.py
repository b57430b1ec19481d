"""Loops of jobs that do nothing: what a task costs beside its job, with ours and with those that run lists of commands."""
import functools
import json
import os
import resource
import shutil
import subprocess
import time

import costs
import peers
from peers import SIZES, Missing, Workshop

HYPERQUEUE = """
import sys, time
from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig
with LocalCluster(sys.argv[1], WorkerConfig(cores=2)) as cluster:
    job, client = Job(sys.argv[1]), cluster.client()
    for _ in range(int(sys.argv[2])):
        job.program(["true"])
    begin = time.perf_counter()
    client.wait_for_jobs([client.submit(job)])
    print(time.perf_counter() - begin)
"""


def timed(words, place):
    """Return (seconds, CPU-seconds) of a command and all that it has started."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   check=True, env=peers.environment(PYTHONPATH=str(peers.ROOT)))
    took_s, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_loop(place, server=None):
    """Return what `timed` does of a loop of two slots for SIZES["runs"] tasks, with what its server has spent."""
    with open(os.path.join(place, "tasks.jsonl"), "w") as file:
        file.writelines('{"args": {"i": %d}}\n' % number for number in range(SIZES["runs"]))
    costs.run_in(place, ["task", "submit", "--from", "tasks.jsonl"])
    before_s = server.cpu_s() if server else 0
    took_s, cpu_s = timed(costs.LABTASKER + ["loop", "-j", "2", "--quiet", "--", "true"], place)
    cpu_s += server.cpu_s() - before_s if server else 0
    counts = dict(json.loads(costs.run_in(place, ["task", "count", "--json"]))["counts"])
    assert counts["success"] == SIZES["runs"], counts
    return took_s, cpu_s


def embedded():
    """Return what `timed` does of a loop without a server."""
    return run_loop(Workshop.place())


def served():
    """Return what `timed` does of a loop with a server."""
    with peers.Ours(os.path.join(Workshop.place(), ".labtasker")) as server:
        return run_loop(os.path.dirname(server.folder), server)


def parallel():
    """Return what `timed` does of GNU parallel, which notes the end of each job and keeps its output."""
    if not shutil.which("parallel"):
        raise Missing("no parallel on the PATH")
    return timed(["parallel", "-j", "2", "--joblog", "jobs", "--results", "results", "true", ":::"] + [
        str(number) for number in range(SIZES["runs"])], Workshop.place())


def hyperqueue():
    """Return the seconds of HyperQueue, from the submission to the last end, and None. The package from PyPI starts a
    server and a worker, and can't have that server keep a journal."""
    place = Workshop.place()
    python = os.path.join(peers.installed("0.27.0", "hyperqueue"), "python")
    done = subprocess.run([python, "-c", HYPERQUEUE, place, str(SIZES["runs"])], stdin=subprocess.DEVNULL, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=place, env=peers.environment())
    return float(done.stdout.split()[-1]), None


KINDS = {"embedded": embedded, "served": served, "parallel": parallel, "hyperqueue": hyperqueue}


@functools.lru_cache(None)
def rounds():
    """Return {kind: [(seconds, CPU-seconds)], or why it is missing}, measured in turn."""
    found = {kind: [] for kind in KINDS}
    for _ in range(SIZES["rounds"]):
        for kind, measure in KINDS.items():
            try:
                found[kind] = found[kind] if isinstance(found[kind], Missing) else found[kind] + [measure()]
            except Missing as missing:
                found[kind] = missing
    return found


def of(kind):
    """Return the rounds of a kind, or raise Missing."""
    if isinstance(rounds()[kind], Missing):
        raise rounds()[kind]
    return rounds()[kind]


def rate(ours, theirs):
    """Return the tasks a second of two kinds."""
    return tuple([SIZES["runs"] / took_s for took_s, _ in of(kind)] for kind in (ours, theirs))


def cpu_ms(ours, theirs):
    """Return the CPU-milliseconds a task of two kinds, the job's own included."""
    return tuple([cpu_s / SIZES["runs"] * 1000 for _, cpu_s in of(kind)] for kind in (ours, theirs))
