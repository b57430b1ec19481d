"""A real sweep, submitted, run by two workers at once and ranked: from the shell and from Python."""
import itertools
import json
import os
import shutil
import sys

import pytest

from harness import ROOT, TESTS, wait_until

SWEEP = TESTS / "sweep"
GRID = list(itertools.product([0.01, 0.1, 1.0, 10.0], [0.0, 0.001, 0.01]))

RANKING = """
import labtasker

# Fetch all successful tasks and rank them by a metric in their summaries
response = labtasker.ls_tasks(status="success", limit=1000)
results = [
    {"lr": t.args["lr"], "l2": t.args["l2"], "acc": t.summary.get("acc")}
    for t in response.content
]
results.sort(key=lambda x: x["acc"] or 0, reverse=True)
for r in results:
    print(r["lr"], r["l2"], r["acc"])
"""


def truth():
    """Return {(lr, l2): (accuracy, loss)} computed here, without any queue."""
    sys.path.insert(0, str(SWEEP))
    try:
        from train import train
    finally:
        sys.path.remove(str(SWEEP))
    return {(lr, l2): train(lr=lr, epochs=100, seed=1, l2=l2) for lr, l2 in GRID}


def best_of(results):
    ranked = sorted(results, key=lambda setting: results[setting][0], reverse=True)
    assert results[ranked[0]][0] > results[ranked[1]][0], "the grid has one best setting"
    return ranked[0]


def folder(place):
    """Return a copy of the sweep in the working folder, so that nothing is written in the checkout."""
    copy = place.cwd / "sweep"
    copy.mkdir()
    for path in SWEEP.iterdir():
        if path.is_file():
            shutil.copy(str(path), str(copy))
    return copy


def run_by_two_workers(place, command):
    place.bash("%s & first=$!\n%s & second=$!\nwait $first && wait $second" % (command, command))


def check_results(place, expected):
    tasks = place.tasks()
    assert {(t["args"]["lr"], t["args"]["l2"]): (t["summary"]["acc"], t["summary"]["loss"]) for t in tasks} == expected
    assert len(tasks) == len(GRID)
    assert {(t["status"], t["retries"], t["task_name"]) for t in tasks} == {("success", 0, "iris")}


def check_rankings(place, expected):
    best = best_of(expected)
    shell = place.bash("labtasker task ls -s success -S summary.acc:desc --no-pager --fmt jsonl").lines
    first = json.loads(shell[0])
    assert (first["args"]["lr"], first["args"]["l2"]) == best
    accuracies = [json.loads(line)["summary"]["acc"] for line in shell]
    assert accuracies == sorted((acc for acc, _ in expected.values()), reverse=True)
    python = place.python(RANKING).lines
    assert len(python) == len(GRID)
    assert python[0] == "%s %s %s" % (best + (expected[best][0],))


SCRIPTS = {"shell": ("sh sweep/submit.sh", "sh sweep/run.sh"),
           "python": ("python sweep/submit.py", "python sweep/run.py")}


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(2 if os.environ.get("LT_TEST_SWEEPS") else 1))
def test_two_workers_run_the_sweep_and_the_ranking_finds_the_best_setting(both, turn):
    """The scripts of one language without a server, those of the other with one; in the second turn the other way."""
    folder(both)
    submit, run = SCRIPTS[sorted(SCRIPTS)[(both.server is None) ^ turn]]
    both.bash(submit)
    assert [t["status"] for t in both.tasks()] == ["pending"] * len(GRID)
    run_by_two_workers(both, run)
    expected = truth()
    check_results(both, expected)
    check_rankings(both, expected)


@pytest.mark.slow
def test_two_workers_are_at_work_at_once(both):
    """Each of two jobs waits for the other: only two workers at once can finish them."""
    both.write("meet.py", """
import os, sys
from harness import wait_until
mine, other = sys.argv[1:]
open(mine, "w").close()
wait_until(lambda: os.path.exists(other), "the other job runs", 60)
""")
    both.submit("--", "--mine=a", "--other=b")
    both.submit("--", "--mine=b", "--other=a")
    loops = [both.start_cli("loop", "--", sys.executable, "meet.py", "%(mine)", "%(other)",
                            env={"PYTHONPATH": "%s:%s" % (ROOT, TESTS)}) for _ in range(2)]
    for loop in loops:
        wait_until(lambda: loop.poll() is not None, "the loop ends", 60)
        assert loop.returncode == 0, loop.log_path.read_text()
    assert [t["status"] for t in both.tasks()] == ["success"] * 2


def test_a_setting_trained_alone_prints_its_result(home):
    folder(home)
    accuracy, loss = truth()[0.1, 0.001]
    shown = home.bash("python sweep/train.py --lr 0.1 --l2 0.001 --epochs 100 --seed 1").stdout
    assert shown == "acc=%s loss=%s\n" % (accuracy, loss)
