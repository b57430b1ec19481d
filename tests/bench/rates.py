"""Rates: what client processes get done in a second, ours and theirs in alternating rounds."""
import functools
import os
import time

import clients
import peers
from peers import SIZES, Workshop


@functools.lru_cache(None)
def race(kind, count):
    """Return {"submit": [(our Load, theirs) of a round], "pairs": ...} against a kind of peer with so many clients.

    Each round is on new stores. Every task must come out exactly once."""
    total, rounds = SIZES["tasks"].get(kind.__name__, (None, SIZES["rounds"]))
    limits = {"seconds": SIZES["seconds"]} if total is None else {"tasks": total // count}
    found = {"submit": [], "pairs": []}
    for number in range(rounds):
        loads = {}
        for each in (peers.Ours, kind)[::1 if number % 2 else -1]:
            with each() as peer:
                loads[each] = peer.submit(count, **limits), peer.pairs(count)
            check(*loads[each])
        for at, what in enumerate(found):
            found[what].append((loads[peers.Ours][at], loads[kind][at]))
    return found


def check(submitted, worked):
    """Raise AssertionError where not each task came out exactly once."""
    ids = set(submitted.ids)
    assert ids and len(ids) == len(submitted.ids), "an id was given twice"
    assert len(worked.ids) == len(ids) and set(worked.ids) == ids, "not each task exactly once: %d in, %d out" % (
        len(ids), len(worked.ids))


def against(what, kind, count):
    """Return our rates and theirs."""
    return tuple([load.rate for load in loads] for loads in zip(*race(kind, count)[what]))


@functools.lru_cache(None)
def joined_rounds(count):
    """Return [{"rate": (of one request a task, of two), "cpu": the server's microseconds a task} of a round]."""
    found = []
    for number in range(SIZES["rounds"]):
        done = {}
        for each in (clients.joined, clients.pairs)[::1 if number % 2 else -1]:
            with peers.Ours() as server:
                submitted, spent_s = server.submit(count, seconds=SIZES["seconds"]), server.cpu_s()
                load = clients.together(each, count, server.port, server.login)
                done[each] = load.rate, (server.cpu_s() - spent_s) / len(load.ids) * 1e6
                check(submitted, load)
        found.append(dict(zip(("rate", "cpu"), zip(done[clients.joined], done[clients.pairs]))))
    return found


def joined(what, count):
    """Return what one request a task makes, and two, with so many clients."""
    return tuple(map(list, zip(*(each[what] for each in joined_rounds(count)))))


def our_loads(what):
    """Return what 4 clients did with our server, in the rounds that are also run against beanstalkd where it is."""
    try:
        return [ours for ours, _ in race(peers.Beanstalkd, 4)[what]]
    except peers.Missing:
        return [ours for ours, _ in race(peers.Ours, 4)[what]]


def fairness(what):
    """Return how much the slowest of 4 clients did, and the fastest."""
    done = [load.counts if what == "pairs" else load.pace for load in our_loads(what)]
    return [min(counts) for counts in done], [max(counts) for counts in done]


def tails(what):
    """Return the milliseconds in which 99 of 100 requests, or pairs, were answered, and those for half of them."""
    return tuple([load.percentile(part) * 1000 for load in our_loads(what)] for part in (0.99, 0.5))


def batch(write=clients.in_list):
    """Return tasks a second that 4 clients submit in requests of 1,000."""
    found = []
    for _ in range(SIZES["rounds"]):
        with peers.Ours() as server:
            load = clients.together(clients.batches, 4, server.port, server.login, SIZES["batch"], 1000, write)
            assert len(set(load.ids)) == len(load.ids) == 4000 * SIZES["batch"]
            assert server.http().call("POST", clients.ME + "/tasks/search", {"limit": 1})["found"]
        found.append(load.rate)
    return found, 100000


def append_and_sync(seconds):
    """Return how often a second 300 bytes can be appended to a file and synced."""
    path = os.path.join(Workshop.place(), "file")
    fd, line, count = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), b"x" * 299 + b"\n", 0
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        os.write(fd, line)
        os.fdatasync(fd)
        count += 1
    rate = count / (time.perf_counter() - begin)
    os.close(fd)
    return rate


def in_store(k, go, folder, work):
    """Do `work(labtasker, k, number)`, which returns a task's id, again and again, over the store in `folder`."""
    os.environ.update(LABTASKER_ROOT=folder, LABTASKER_QUEUE=peers.LOGIN[0])
    import labtasker
    labtasker.ls_tasks(limit=1)  # the store is read before the time counts
    worker, share = labtasker.create_worker(), clients.Share()
    go()
    share.begin = started = time.perf_counter()
    while started - share.begin < SIZES["seconds"]:
        share.did(started, work(labtasker, worker, len(share.ids)))
        started = share.end
    return share


def submit_one(labtasker, worker, number):
    return labtasker.submit_task(args={"i": number, "k": 1, "lr": 0.1}, metadata={"tags": ["v1"]}).task_id


def work_one(labtasker, worker, number):
    task = labtasker.fetch_task(worker_id=worker, required_fields=["i", "k", "lr"], heartbeat_timeout=60).task
    labtasker.send_report(task.task_id, "success", {"acc": 0.5}, worker, task.run_id)
    return task.task_id


@functools.lru_cache(None)
def embedded_rounds():
    """Return {"submit": [(rate of 4 processes, of the disk) of a round], "pairs": ...} without a server."""
    with peers.Ours() as server:
        clients.together(clients.batches, 1, server.port, server.login, max(1, SIZES["lines"] // 1000), 1000)
    found, worked = {"submit": [], "pairs": []}, []
    for _ in range(SIZES["rounds"]):
        for what, work in (("submit", submit_one), ("pairs", work_one)):
            limit = append_and_sync(SIZES["seconds"])
            load = clients.together(in_store, 4, server.folder, work)
            found[what].append((load.rate, limit))
            assert len(set(load.ids)) == len(load.ids), "an id was given twice"
            worked += load.ids if what == "pairs" else []
    assert len(set(worked)) == len(worked), "a task was fetched twice"
    return found


def embedded(what):
    """Return the rates of 4 processes that share a store of 100,000 tasks, and those of the disk beneath it."""
    return tuple(map(list, zip(*embedded_rounds()[what])))
