"""What was promised of speed and size, measured against the peers and limits of this machine in the same run.

    python tests/bench/bench.py [--quick] [ROW ...]

Prints a line a goal: ours, theirs (a peer, a limit of the machine, or the number that was promised), the ratio with
its spread over the rounds, the goal, and ok or SHORT. Rounds alternate between ours and theirs, so that whatever else
the machine does meets both. Exits with 1 only where a measurement failed or a result was wrong: nothing else here is
right or wrong, and a busy machine makes everything slow. `--quick` measures next to nothing; it tries the measuring."""
import argparse
import collections
import datetime
import os
import platform
import statistics
import sys
import traceback

import clients
import costs
import loops
import peers
import points
import rates
import sizes
import stopping

Goal = collections.namedtuple("Goal", "row what sign limit measure arguments")

GOALS = [Goal(*goal[:5], goal[5:]) for goal in (
    # row, what is compared (ours / theirs), at least or at most so much, measured by: returns [ours], [theirs] or one
    ("submit", "submits/s, 16 clients / beanstalkd -f0", ">=", 1.3, rates.against, "submit", peers.Beanstalkd, 16),
    ("submit", "submits/s, 4 clients / beanstalkd -f0", ">=", 0.8, rates.against, "submit", peers.Beanstalkd, 4),
    ("submit", "submits/s, 4 clients, N=500 / 1.0.1", ">=", 150, rates.against, "submit", peers.First, 4),
    ("submit", "submits/s, 4 clients / 2.8.0", ">=", 20, rates.against, "submit", peers.Second, 4),
    ("pairs", "fetch+report/s, 16 clients / beanstalkd", ">=", 0.8, rates.against, "pairs", peers.Beanstalkd, 16),
    ("pairs", "fetch+report/s, 4 clients / beanstalkd", ">=", 0.5, rates.against, "pairs", peers.Beanstalkd, 4),
    ("pairs", "fetch+report/s, 4 clients, N=500 / 1.0.1", ">=", 150, rates.against, "pairs", peers.First, 4),
    ("pairs", "fetch+report/s, 4 clients / 2.8.0", ">=", 30, rates.against, "pairs", peers.Second, 4),
    ("joined", "tasks/s, report with fetch / alone, 4 clients", ">=", 1.3, rates.joined, "rate", 4),
    ("joined", "... 16 clients", ">=", 1.3, rates.joined, "rate", 16),
    ("joined", "... the server's CPU a task, us, 4 clients", "<=", 0.8, rates.joined, "cpu", 4),
    ("joined", "... 16 clients", "<=", 0.8, rates.joined, "cpu", 16),
    ("fairness", "submit: slowest / fastest of 4 clients", ">=", 0.7, rates.fairness, "submit"),
    ("fairness", "fetch+report: slowest / fastest of 4", ">=", 0.7, rates.fairness, "pairs"),
    ("fairness", "submit: p99 / p50, ms", "<=", 4, rates.tails, "submit"),
    ("fairness", "fetch+report: p99 / p50, ms", "<=", 4, rates.tails, "pairs"),
    ("batch", "tasks/s in requests of 1,000 / 100,000", ">=", 1, rates.batch),
    ("batch", "... as rows", ">=", 1, rates.batch, clients.in_rows),
    ("growth", "submit, CPU us: a million pending / a thousand", "<=", 1.3, sizes.growth, "plain", "submit"),
    ("growth", "fetch", "<=", 1.3, sizes.growth, "plain", "fetch"),
    ("growth", "report", "<=", 1.3, sizes.growth, "plain", "report"),
    ("growth", "fetch by a filter, 1 of 1,000 match", "<=", 1.3, sizes.growth, "filter", "fetch"),
    ("growth", "... all three", "<=", 1.3, sizes.growth, "filter", "all"),
    ("growth", "... the first fetch by it, s / 2", "<=", 1, sizes.first_ask),
    ("growth", "fetch, a hundred argument shapes", "<=", 1.3, sizes.growth, "shapes", "fetch"),
    ("growth", "... all three", "<=", 1.3, sizes.growth, "shapes", "all"),
    ("growth", "fetch, while a million tasks wait for one", "<=", 1.3, sizes.growth, "blocked", "fetch"),
    ("growth", "... all three", "<=", 1.3, sizes.growth, "blocked", "all"),
    ("growth", "fetch, a hundred filters in turn", "<=", 1.3, sizes.growth, "filters", "fetch"),
    ("growth", "... all three", "<=", 1.3, sizes.growth, "filters", "all"),
    ("growth", "submit, CPU us: 100,000 shapes / a hundred", "<=", 1.3, sizes.growth, "own shapes", "submit"),
    ("growth", "fetch", "<=", 1.3, sizes.growth, "own shapes", "fetch"),
    ("growth", "report", "<=", 1.3, sizes.growth, "own shapes", "report"),
    ("growth", "fetch of any shape", "<=", 1.3, sizes.growth, "any shape", "fetch"),
    ("growth", "count, CPU ms", "<=", 1.3, sizes.counting, "own shapes"),
    ("growth", "submit, CPU us: 10,000 filters in turn / ten", "<=", 1.3, sizes.growth, "owners", "submit"),
    ("growth", "fetch", "<=", 1.3, sizes.growth, "owners", "fetch"),
    ("growth", "report", "<=", 1.3, sizes.growth, "owners", "report"),
    ("growth", "count, CPU ms", "<=", 1.3, sizes.counting, "owners"),
    ("growth", "submit, CPU us: curves of 1,000 points / of one", "<=", 1.3, sizes.growth, "curves", "submit"),
    ("growth", "fetch", "<=", 1.3, sizes.growth, "curves", "fetch"),
    ("growth", "report", "<=", 1.3, sizes.growth, "curves", "report"),
    ("growth", "report of a point", "<=", 1.3, sizes.growth, "curves", "point"),
    ("growth", "count, CPU ms", "<=", 1.3, sizes.counting, "curves"),
    ("growth", "count, CPU ms: a million blocked / pending", "<=", 1.3, sizes.counting, "waiting"),
    ("listing", "filter over a million, s / 2", "<=", 1, sizes.listing, "filter_s"),
    ("listing", "p99 of fetches meanwhile, ms / 50", "<=", 1, sizes.listing, "fetch_p99_ms"),
    ("listing", "first 100 of a listing, ms / 50", "<=", 1, sizes.listing, "first_ms"),
    ("listing", "table of a million by model, s / 2", "<=", 1, sizes.listing, "table_s"),
    ("listing", "p99 of fetches meanwhile, ms / 50", "<=", 1, sizes.listing, "table_p99_ms"),
    ("memory", "bytes a task, a million of 5 args / 1,200", "<=", 1, sizes.memory, "task"),
    ("memory", "... after opening the store again / 1,200", "<=", 1, sizes.memory, "task, opened"),
    ("memory", "an empty server, MB / 30", "<=", 1, sizes.memory, "empty"),
    ("opening", "a store of a million tasks, s / 10", "<=", 1, sizes.opening, "tasks"),
    ("opening", "a store of 100,000 lines, s / 0.8", "<=", 1, sizes.opening, "lines"),
    ("points", "1,000 workers, a point a second: p99, ms / 250", "<=", 1, points.p99),
    ("points", "bytes a point of 2 values, opened / 300", "<=", 1, points.bytes_a_point),
    ("stop", "epochs of 200 settings, asha / all run", "<=", 0.3, stopping.spent, "asha"),
    ("stop", "... regret of the best loss / 0.02", "<=", 1, stopping.regret, "asha"),
    ("stop", "epochs, median / all run", "<=", 0.6, stopping.spent, "median"),
    ("stop", "... regret / 0.02", "<=", 1, stopping.regret, "median"),
    ("stop", "epochs, no rule / all run", "<=", 1, stopping.spent, "none"),
    ("embedded", "submits/s, 4 processes / append and sync", ">=", 0.5, rates.embedded, "submit"),
    ("embedded", "fetch+report/s, 4 processes / same", ">=", 0.25, rates.embedded, "pairs"),
    ("loop", "runs of true/s, no server / GNU parallel", ">=", 1.5, loops.rate, "embedded", "parallel"),
    ("loop", "... with a server / GNU parallel", ">=", 1.5, loops.rate, "served", "parallel"),
    ("loop", "... no server / HyperQueue, without a journal", ">=", 1, loops.rate, "embedded", "hyperqueue"),
    ("loop", "... with a server / HyperQueue, same", ">=", 1, loops.rate, "served", "hyperqueue"),
    ("loop", "CPU ms a run, no server / GNU parallel", "<=", 0.67, loops.cpu_ms, "embedded", "parallel"),
    ("loop", "... with a server / GNU parallel", "<=", 0.67, loops.cpu_ms, "served", "parallel"),
    ("cli", "task submit, no server, ms / python -c pass", "<=", 5, costs.command, "embedded"),
    ("cli", "task submit, with a server, ms / same", "<=", 5, costs.command, "server"),
    ("cli", "--help, ms / same", "<=", 4, costs.command, "help"),
    ("cli", "import labtasker, ms / 20", "<=", 1, costs.importing),
    ("printing", "lines/s with --metric / without, pipe, 100,000", ">=", 0.9, costs.printing, "pipe", 100000),
    ("printing", "... on a pseudo-terminal", ">=", 0.9, costs.printing, "pty", 100000),
    ("printing", "... pipe, as fast as the job can", ">=", 0.9, costs.printing, "pipe"),
    ("printing", "... on a pseudo-terminal", ">=", 0.9, costs.printing, "pty"),
    ("idle", "wakes a second of an idle server / 1", "<=", 1, costs.idle, "wakes"),
    ("idle", "its CPU-seconds a day / 10", "<=", 1, costs.idle, "cpu_s"),
    ("idle", "100 workers' heartbeats, CPU-s a day / 120", "<=", 1, costs.heartbeats),
)]


def spread(values):
    """Return the median of numbers, and their range where there are several, as text."""
    if len(values) == 1:
        return number(values[0])
    return "%s (%s-%s)" % tuple(map(number, (statistics.median(values), min(values), max(values))))


def number(value):
    """Return a number with three digits that count."""
    return "%.0f" % value if abs(value) >= 100 else "%.3g" % value


def figure(goal):
    """Return the line that says how a goal is met; raises Missing, or AssertionError where a result was wrong."""
    ours, theirs = goal.measure(*goal.arguments)
    theirs = theirs if isinstance(theirs, list) else [theirs] * len(ours)
    ratios = [one / other for one, other in zip(ours, theirs)]
    met = statistics.median(ratios) >= goal.limit if goal.sign == ">=" else statistics.median(ratios) <= goal.limit
    return FORMAT % (goal.row, goal.what, number(statistics.median(ours)), number(statistics.median(theirs)),
                     spread(ratios), "%s %s" % (goal.sign, goal.limit), "ok" if met else "SHORT")


FORMAT = "%-8s  %-46s %9s %9s  %-20s %-7s %s"


def main(words):
    """Print the table, or the rows that were asked for; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure what was promised of speed and size.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(dict.fromkeys(goal.row for goal in GOALS)))
    parser.add_argument("--quick", action="store_true", help="measure next to nothing: it tries the measuring")
    asked = parser.parse_args(words)
    unknown = set(asked.rows) - {goal.row for goal in GOALS}
    if unknown:
        parser.error("no row " + ", ".join(sorted(unknown)))
    if asked.quick:
        peers.SIZES.update(peers.QUICK)
    print("Python %s, %d cores, %s; %s" % (platform.python_version(), os.cpu_count(), platform.platform(),
                                           datetime.date.today()))
    print(FORMAT % ("row", "ours / theirs", "ours", "theirs", "ratio (range)", "goal", ""), flush=True)
    failed = 0
    with peers.Workshop():
        for goal in GOALS:
            if asked.rows and goal.row not in asked.rows:
                continue
            try:
                print(figure(goal), flush=True)
            except peers.Missing as missing:
                print("%-8s  %-46s not measured: %s" % (goal.row, goal.what, missing), flush=True)
            except Exception:
                failed = 1
                print("%-8s  %-46s FAILED" % (goal.row, goal.what), flush=True)
                traceback.print_exc()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
