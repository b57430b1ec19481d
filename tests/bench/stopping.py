"""What rules that stop tasks early spend and lose: random settings of the sweep's job, by asha, by median, and all run.

The curves are computed once; the decisions are those of a store with so many workers, which report an epoch in turn."""
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile

from peers import ROOT, SIZES

sys.path[:0] = [str(ROOT), os.path.join(str(ROOT), "tests", "sweep")]
import labtasker as L  # noqa: E402
from curve import epochs  # noqa: E402

WORKERS, EPOCHS = 16, 27
RULES = {"asha": "asha:loss:min", "median": "median:loss:min:from=3", "none": None}


def curve(seed):
    """Return the loss after each epoch of a random setting."""
    dice = random.Random(seed)
    lr, l2 = 10 ** dice.uniform(-4, 1), 10 ** dice.uniform(-6, 0)
    return [loss for _, loss in itertools.islice(epochs(lr, int(seed.split()[0]), l2), EPOCHS)]


@functools.lru_cache(None)
def curves():
    """Return {seed: [the curve of each setting]}."""
    names = [["%d %d" % (seed, k) for k in range(SIZES["settings"])] for seed in range(SIZES["seeds"])]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return [pool.map(curve, row, 10) for row in names]


class Sweep:
    """A store in a folder of its own with a task for each curve."""

    def __init__(self, found, rule):
        self.folder, self.found, self.spent, self.ended = tempfile.mkdtemp(), found, 0, []
        self.store = L.Store(os.path.join(self.folder, "journal.jsonl"), is_server=True, fsync="never")
        self.store.open()
        self.ask("POST", "", [{"args": {"k": k}, "stop": rule, "heartbeat_timeout": 1e6} for k in range(len(found))])

    def ask(self, method, path, body=None):
        status, answer = L.answer_call(self.store, lambda: L.LocalName(L.DEFAULT_QUEUE), method, L.TASKS_PATH + path, body)
        assert status < 300, answer
        return json.loads(json.dumps(answer))

    def job(self):
        """Run one task after another, an epoch at a time."""
        while True:
            task = self.ask("POST", "/next", {"heartbeat_timeout": 1e6})["task"]
            if task is None:
                return
            end = {"status": "success", "run_id": task["run_id"]}
            for step, loss in enumerate(self.found[task["args"]["k"]], 1):
                self.spent += 1
                yield
                if not self.ask("POST", "/%s/status" % task["task_id"], dict(
                        end, status="running", summary={"loss": loss}, step=step))["go"]:
                    break
            else:
                self.ended.append(loss)
            self.ask("POST", "/%s/status" % task["task_id"], end)

    def run(self):
        """Return (epochs spent, the best loss of the tasks that were not stopped)."""
        jobs = [self.job() for _ in range(WORKERS)]
        while jobs:
            jobs = [job for job in jobs if next(job, self) is not self]
        self.store.close()
        shutil.rmtree(self.folder)
        return self.spent, min(self.ended)


@functools.lru_cache(None)
def results(name):
    """Return [(epochs spent, epochs of all, regret)] of a rule, one for each seed."""
    rows = []
    for found in curves():
        spent, best = Sweep(found, RULES[name]).run()
        rows.append((spent, len(found) * EPOCHS, best - min(one[-1] for one in found)))
    return rows


def spent(name):
    """Return the epochs that a rule spends, and those of all."""
    return [row[0] for row in results(name)], [row[1] for row in results(name)]


def regret(name):
    """Return how much worse the best loss is than that of all, and the goal."""
    return [row[2] for row in results(name)], 0.02
