"""What of a sweep is better, by groups: `labtasker.table`, `task table` and the rows that both are made of."""
import collections
import json
import math
import random
import statistics

import pytest

import labtasker
from labtasker import TABLE_COLUMNS, group_rows

Row = collections.namedtuple("Row", "task_id status args summary")


def rows_of(values, by=("args.lr",), mode="max", statuses=("success",)):
    """Return the table of (lr, value, status) triples; a value of None is missing."""
    records = [Row("id%d" % i, status, {"lr": lr}, {} if value is None else {"acc": value})
               for i, (lr, value, status) in enumerate(values)]
    return group_rows(records, list(by), "summary.acc", mode, statuses)


def test_a_row_has_what_the_statistics_module_computes_of_its_group():
    dice = random.Random(3)
    for _ in range(300):
        values = [(dice.choice([0.1, 1, "x", None]), dice.choice([None, math.nan, dice.gauss(0, 10), dice.randrange(9)]),
                   dice.choice(["success", "success", "failed", "pending", "cancelled"])) for _ in range(dice.randrange(30))]
        statuses = dice.choice([None, ["success"], ["success", "failed"], ["pending"]])
        table = rows_of(values, statuses=statuses)
        assert {row["args.lr"] for row in table} == {
            lr for lr, _, status in values if statuses is None or status in statuses or status == "failed"}
        for row in table:
            group = [(value, status) for lr, value, status in values if lr == row["args.lr"]]
            asked = [value for value, status in group if statuses is None or status in statuses]
            numbers = [value for value in asked if value is not None and value == value]
            assert (row["n"], row["missing"]) == (len(numbers), asked.count(None))
            assert row["nan"] == len(asked) - len(numbers) - row["missing"]
            assert row["failed"] == [status for _, status in group].count("failed")
            assert (row["min"], row["max"]) == ((min(numbers), max(numbers)) if numbers else (None, None))
            assert row["mean"] == (pytest.approx(statistics.mean(numbers)) if numbers else None)
            assert row["std"] == (pytest.approx(statistics.stdev(numbers)) if numbers[1:] else None)
            if numbers:
                assert values[int(row["best"][2:])][1] == max(numbers)


def test_the_best_mean_comes_first_then_nan_then_groups_without_a_number():
    values = [("a", 1, "success"), ("b", 3, "success"), ("c", None, "success"), ("d", 2, "failed"), ("e", math.inf, "success"),
              ("e", -math.inf, "success"), ("f", 2, "success")]
    assert [row["args.lr"] for row in rows_of(values)] == ["b", "f", "a", "e", "c", "d"]
    assert [row["args.lr"] for row in rows_of(values, mode="min")] == ["a", "f", "b", "e", "c", "d"]


@pytest.mark.parametrize("numbers", [[math.inf, 1], [-math.inf, math.inf], [1e308, 1e308, 1e308], [10 ** 400, 1], [1e200, -1e200]])
def test_numbers_that_no_float_can_sum_leave_a_row(numbers):
    row, = rows_of([(1, number, "success") for number in numbers])
    assert row["n"] == len(numbers) and row["min"] == min(numbers) and row["max"] == max(numbers)


def test_true_is_no_1_but_1_is_1_0_and_what_is_missing_is_null():
    keys = [True, 1, 1.0, False, 0, None, "1", [1], [1], {"a": 1}, math.nan, math.nan]
    table = rows_of([(key, 1, "success") for key in keys])
    assert [row["n"] for row in table] == [1, 2, 1, 1, 1, 1, 2, 1, 2]
    assert sum(row["args.lr"] is None for row in table) == 1


def test_an_answer_has_the_best_groups_and_tells_how_many_there_are(tmp_path):
    store = labtasker.Store(str(tmp_path / "journal.jsonl"), fsync="never")

    def ask(path, body):
        return labtasker.answer_call(store, lambda: labtasker.LocalName(labtasker.DEFAULT_QUEUE), "POST",
                                     "/api/v1/queues/me/tasks" + path, body)[1]
    ask("", [{"args": {"lr": lr}} for lr in (3, 1, 2)])
    for limit, wanted in ((2, [3, 2]), (0, []), (None, [3, 2, 1])):
        found = ask("/table", {"by": ["args.lr"], "of": "args.lr", "statuses": ["pending"], "limit": limit})
        assert ([row["args.lr"] for row in found["content"]], found["found"]) == (wanted, 3)


def test_a_truth_value_is_no_number():
    row, = rows_of([(1, True, "success")])
    assert (row["n"], row["missing"], row["mean"], row["best"]) == (0, 1, None, None)


def sweep():
    """Store six tasks of two groups: one failed, one without a value."""
    ids = []
    for lr, seed, acc in ((0.1, 0, 0.5), (0.1, 1, 0.7), (0.1, 2, None), (0.01, 0, 0.9), (0.01, 1, "failed"), (0.01, 2, math.nan)):
        ids.append(labtasker.submit_task("sweep", args={"lr": lr, "seed": seed}, max_retries=1).task_id)
        labtasker.fetch_task(heartbeat_timeout=60)
        labtasker.report_task_status(ids[-1], "failed" if acc == "failed" else "success",
                                     {"val/acc": acc} if isinstance(acc, float) else None)
    return ids


def test_a_table_is_the_same_from_a_store_and_a_server(both):
    ids = sweep()
    assert labtasker.table("args.lr", "summary.val/acc", task_name="sweep") == [
        {"args.lr": 0.01, "n": 1, "mean": 0.9, "std": None, "min": 0.9, "max": 0.9, "best": ids[3], "failed": 1,
         "missing": 0, "nan": 1},
        {"args.lr": 0.1, "n": 2, "mean": 0.6, "std": pytest.approx(0.1414, abs=1e-4), "min": 0.5, "max": 0.7,
         "best": ids[1], "failed": 0, "missing": 1, "nan": 0}]
    assert labtasker.table(["args.lr"], "summary.val/acc", mode="min", extra_filter="args.lr > 0.05")[0]["best"] == ids[0]
    assert sorted(row["n"] for row in labtasker.table(["args.lr", "status"], "args.seed", status=None)) == [1, 2, 3]
    assert labtasker.table("args.lr", "summary.val/acc", task_name="other") == []


@pytest.mark.parametrize("wrong, words", [
    ({"by": []}, "by"), ({"by": ["lr"]}, "by"), ({"of": "acc"}, "of"), ({"mode": "best"}, "max or min"),
    ({"by": ["args.lr", "args.lr"]}, "twice"), ({"status": ["done"]}, "statuses"), ({"extra_filter": "args.lr >"}, "")])
def test_a_table_that_can_t_be_made_is_refused_by_name(home, wrong, words):
    with pytest.raises((labtasker.LabtaskerError, SyntaxError)) as caught:
        labtasker.table(**dict({"by": ["args.lr"], "of": "summary.acc"}, **wrong))
    assert words in str(caught.value)


def test_the_command_prints_the_table_for_a_person_a_paper_and_a_program(home, capsys):
    sweep()

    def printed(*words):
        assert labtasker.main(["task", "table", "--by", "args.lr", "--of", "summary.val/acc"] + list(words)) in (0, None)
        return capsys.readouterr().out
    lines = printed().splitlines()
    assert lines[0].split() == ["lr"] + list(TABLE_COLUMNS) and lines[1].split()[:3] == ["0.01", "1", "0.9"]
    assert lines[1].split()[7:] == ["1", "(33%)", "0", "1"], "one of three failed"
    assert printed("--fmt", "md").splitlines()[1].strip("|-") == "" and printed("--fmt", "md").count("|") == 44
    assert json.loads(printed("--json")) == labtasker.table("args.lr", "summary.val/acc")
    assert printed("--fmt", "csv").splitlines()[0] == "args.lr," + ",".join(TABLE_COLUMNS)
    assert printed("--min").splitlines()[1].split()[0] == "0.1"
    assert printed("-s", "success,failed").splitlines()[1].split()[7:9] == ["1", "(33%)"]
    assert json.loads(printed("--json", "-f", "args.lr > 5")) == []
    assert printed("--by", "args.seed, status").splitlines()[0].split()[:3] == ["lr", "seed", "status"]
