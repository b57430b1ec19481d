"""What a job prints and writes becomes its task's summary: --metric and --step, summary.json, report()."""
import json
import math
import random
import re
import sys

import pytest

import labtasker
from labtasker import Printed, Required, UsageError, read_metrics


def printed(chunks, *metrics, step=None):
    found = Printed(*read_metrics(metrics, step))
    feed = found.channel()
    for chunk in chunks:
        feed(chunk)
    feed(None)
    return found


LOSS = "loss=loss: ([^ ,]+)"


@pytest.mark.parametrize("text, values", [
    (b"loss: 0.5\n", {"loss": 0.5}), (b"loss: 0.5", {"loss": 0.5}), (b"loss: 3\nloss: 2\n", {"loss": 2}),
    (b"a\rloss: 1\rloss: 2\rb", {"loss": 2}), (b"loss: 1e-3, more loss: 2", {"loss": 0.001}),
    (b"loss: none\n", {}), (b"loss: 1_000\n", {}), (b"loss: 1\nloss: x\n", {"loss": 1}), (b"loss: -inf\n", {"loss": -math.inf}),
    (b"\xff\xfe loss: 0.25 \xf0\x9f\n", {"loss": 0.25}), (b"\x1b[32mloss: 7 \x1b[0m\r\n", {"loss": 7}),
    (b"loss:\n1\n", {}), (b"", {}), (b"loss: 12345678901234567890\n", {"loss": 12345678901234567890.0}),
    (b"x" * 70000 + b"loss: 1\n", {}), (b"x" * 70000 + b"\nloss: 1\n", {"loss": 1})])
def test_the_last_number_of_a_line_that_matches_is_the_value_wherever_the_stream_is_cut(text, values):
    assert printed([text], LOSS).values == values
    if len(text) < 100:
        for cut in range(len(text)):
            assert printed([text[:cut], text[cut:]], LOSS).values == values
        assert printed([text[i:i + 1] for i in range(len(text))], LOSS).values == values


def test_what_comes_is_searched_when_it_is_asked_for_or_much():
    told, lines = [], b"loss: 1\n" * 100
    found = Printed(*read_metrics([LOSS]), on_output=lambda: told.append(1))
    feed = found.channel()
    for _ in range(10):
        feed(lines)
    assert told == [1] and found.values == {}
    assert found.take() == [] and found.values == {"loss": 1}
    feed(b"loss: 2")
    assert told == [1, 1] and found.take() == [] and found.values == {"loss": 1}, "a line that has no end yet"
    feed(b"5\n" + b"x" * (1 << 21))
    assert found.values == {"loss": 25} and len(found.unread[0]) < 1 << 20


def test_the_end_of_one_stream_ends_no_line_of_another():
    found = Printed(*read_metrics([LOSS], r"step (.)"))
    out, err = found.channel(), found.channel()
    out(b"step 1 loss: 9\r")
    err(None)
    out(b"step 1 loss: 1\n")
    assert found.take() == [(1, {"loss": 1})]


def test_of_very_much_at_once_the_last_lines_are_points_and_all_have_values():
    text = b"acc: 3\nstep 0 loss: 9\n" + b"x" * 100 + b"".join(b"step %d loss: %d\n" % (n, n) for n in range(50000))
    found = printed([text], LOSS, "acc=acc: (.)", step=r"step (\d+)")
    points = found.take()
    assert points[-1] == (49999, {"loss": 49999}) and 50 <= len(points) <= 100 and found.values == {"acc": 3, "loss": 49999}


def test_nan_is_a_value():
    assert math.isnan(printed([b"loss: nan\n"], LOSS).values["loss"])


def test_a_metric_finds_what_a_search_in_each_line_finds():
    dice = random.Random(1)
    words = ["loss: ", "LOSS: ", "acc=", "3", "\n", "\r", " ", "\r\n", "loss", "acc", ":", "\u00e9", "0.5", "7"]
    for _ in range(300):
        text = "".join(dice.choice(words) for _ in range(dice.randrange(60)))
        for pattern in (r"loss: (\d\.\d|\d)", r"(?i)loss: (\d\.\d|\d)", r"^(?:loss|acc).*(\d)$", r"(\d)"):
            found = [re.search(pattern, line) for line in re.split("[\r\n]", text)]
            plain = [float(one.group(1)) for one in found if one]
            cut = dice.randrange(len(text) + 1)
            values = printed([text[:cut].encode(), text[cut:].encode()], "x=" + pattern).values
            assert values == ({"x": plain[-1]} if plain else {}), (pattern, text)


def test_the_step_is_the_last_one_seen():
    assert printed([b"epoch 1\nloss: 3\nepoch 2 loss: 4\nepoch x\n"], LOSS, step=r"epoch (\d+)").step == 2


@pytest.mark.parametrize("text, says", [
    ("acc", "NAME=REGEX"), ("acc=0.5", "no group"), ("acc=(", "can't be used"), ("acc=(a+)+$", "too long"), ("=(x)", "is empty"),
    ("a..b=(x)", "is empty"), ("acc=(x)\\1", "looks back")])
def test_a_metric_that_can_not_be_read_is_refused_by_name(text, says):
    with pytest.raises(UsageError, match=says) as refused:
        read_metrics([text])
    assert "--metric" in str(refused.value)


JOB = """
import json, os, sys
n, way = int(sys.argv[1]), sys.argv[2]
print("epoch 1: loss: %.1f acc=50%%\\repoch 2: loss: %.1f acc=%d%%" % (n, n / 2, 50 + n))
with open(os.path.join(os.environ["LABTASKER_LOG_DIR"], "summary.json"), "w") as file:
    file.write({"dict": json.dumps({"own": n, "deep": {"x": 1}}), "list": "[1]", "text": "no JSON"}[way])
sys.exit(n == 2)
"""


@pytest.fixture
def one(both):
    def submit(**args):
        return labtasker.submit_task(args=args, max_retries=1).task_id
    return submit


def test_what_a_script_prints_and_writes_is_in_its_summary_though_it_knows_nothing_of_us(both, one):
    ids = [one(n=1, way="dict"), one(n=2, way="dict"), one(n=3, way="list"), one(n=4, way="text")]
    run = both.cli("loop", "--metric", "loss=loss: ([0-9.]+)", "--metric", "acc.top1=acc=([0-9]+)%", "--step", r"epoch (\d+)",
                   "--", sys.executable, both.write("job.py", JOB), "%(n)", "%(way)")
    tasks = [labtasker.get_task(id_) for id_ in ids]
    assert [task.status for task in tasks] == ["success", "failed", "success", "success"]
    for n, task in enumerate(tasks, 1):
        assert task.summary["loss"] == n / 2 and task.summary["acc"] == {"top1": 50 + n}
        points = labtasker.get_history(task.task_id)
        assert [(point["step"], point["loss"]) for point in points] == [(1, n), (2, n / 2)]
    assert tasks[0].summary["own"] == 1 and tasks[1].summary["deep"] == {"x": 1} and "labtasker_error" in tasks[1].summary
    assert "own" not in tasks[2].summary and run.stderr.count("values are not reported") == 2


def test_harvest_reads_afterwards_what_was_printed_and_once_more_changes_nothing(both, one):
    ids = [one(n=1, way="dict"), one(n=3, way="dict")]
    waiting = one(n=5, way="dict", more=1)
    both.cli("loop", "--", sys.executable, both.write("job.py", JOB), "%(n)", "%(way)")
    both.cli("task", "harvest", "--metric", "loss=loss: ([0-9.]+)", "--dry-run", ids[0])
    assert "loss" not in labtasker.get_task(ids[0]).summary
    for changed in (2, 0):
        found = both.cli("task", "harvest", "--metric", "loss=loss: ([0-9.]+)")
        assert "Changed %d task" % changed in found.stderr
        assert [labtasker.get_task(id_).summary["loss"] for id_ in ids] == [0.5, 1.5]
    assert labtasker.get_task(ids[0]).summary["own"] == 1 and not labtasker.get_task(waiting).summary
    assert both.cli("task", "harvest", check=False).returncode == 2
    assert "the output of 2 has none" in both.cli("task", "harvest", "--metric", "x=never (.)").stderr


def test_metrics_of_the_configuration_hold_for_every_loop(home):
    home.folder.mkdir(exist_ok=True)
    with open(str(home.folder / "config.toml"), "w") as file:
        file.write('[metrics]\nloss = "loss: ([0-9.]+)"\n"val/acc" = "acc=([0-9]+)%"\nstep = "epoch (.)"\n')
    ids = [labtasker.submit_task(args={"n": 1, "way": "dict"}).task_id for _ in range(2)]
    words = [sys.executable, home.write("job.py", JOB), "%(n)", "%(way)"]
    home.cli("loop", "--max-tasks", "1", "--", *words)
    home.cli("loop", "--metric", "loss=loss: ([0-9])", "--", *words)
    assert [labtasker.get_task(id_).summary["loss"] for id_ in ids] == [0.5, 0]
    assert labtasker.get_task(ids[0]).summary["val/acc"] == 51
    with open(str(home.folder / "config.toml"), "a") as file:
        file.write("bad = 1\n")
    assert "metrics.bad should be a pattern" in home.cli("task", "ls", check=False).stderr


REPORTS = """
import labtasker, sys
assert labtasker.report(step=1, acc=0.5, **{"val/loss": 2}) is True
assert labtasker.report(acc=0.75) is True
assert labtasker.report() is True
labtasker.report(step=-1, odd=object())

class Several:
    def item(self):
        raise ValueError("only one element")
    __repr__ = item
assert labtasker.report(step=Several(), late=1) is True
(labtasker.task_dir() / "checkpoint").write_text("kept")
"""


def test_report_merges_into_the_summary_of_the_task_that_runs(both, one):
    id_ = one(n=1)
    run = both.cli("loop", "--", sys.executable, both.write("src/train.py", REPORTS), "%(n)")
    task = labtasker.get_task(id_)
    assert task.status == "success", run
    assert (task.summary["acc"], task.summary["val/loss"], task.summary["late"]) == (0.75, 2, 1) and "object" in task.summary["odd"]
    assert "a step is a number >= 0" in run.stderr


def test_outside_of_a_run_report_does_nothing(home, capfd):
    assert labtasker.report(step=1, acc=1) is True
    assert home.cli("report", "acc=1").stdout == ""
    assert home.cli("report", "acc", check=False).returncode == 2


def test_a_returned_dict_is_in_the_summary(home):
    id_ = labtasker.submit_task(args={"n": 1}).task_id

    @labtasker.loop()
    def main(n=Required()):
        labtasker.report(a=1, b=1)
        return {"b": 2, "deep.x": 3, 7: 8}
    main()
    assert labtasker.get_task(id_).summary == {"a": 1, "b": 2, "deep": {"x": 3}, "7": 8}


@pytest.mark.parametrize("ranks, reports", [
    ({}, True), ({"RANK": "0", "LOCAL_RANK": "0"}, True), ({"RANK": "1"}, False), ({"LOCAL_RANK": "3"}, False),
    ({"SLURM_PROCID": "2"}, False), ({"SLURM_PROCID": "2", "LABTASKER_PROCID": "2"}, True), ({"SLURM_PROCID": "0"}, True)])
def test_one_of_many_ranks_reports(home, monkeypatch, ranks, reports):
    task = labtasker.submit_task(args={"n": 1}).task_id
    run = labtasker.fetch_task(required_fields=["n"], heartbeat_timeout=60).task
    monkeypatch.setenv("LABTASKER_TASK_ID", task)
    monkeypatch.setenv("LABTASKER_RUN_ID", run.run_id)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "LABTASKER_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert labtasker.report(acc=1) is True
    assert labtasker.get_task(task).summary == ({"acc": 1} if reports else {})


def test_report_says_when_nobody_waits_for_the_run_any_more(home, monkeypatch):
    task = labtasker.submit_task(args={"n": 1}).task_id
    run = labtasker.fetch_task(required_fields=["n"], heartbeat_timeout=60).task
    monkeypatch.setenv("LABTASKER_TASK_ID", task)
    monkeypatch.setenv("LABTASKER_RUN_ID", run.run_id)
    assert labtasker.report(acc=1) is True
    labtasker.report_task_status(task, "cancelled")
    assert labtasker.report(acc=2) is False
    found = home.cli("report", "acc=3", check=False, env={"LABTASKER_TASK_ID": task, "LABTASKER_RUN_ID": run.run_id})
    assert found.returncode == 1 and "not run here any more" in found.stderr
    assert labtasker.get_task(task).summary == {"acc": 1}


PLACE = """
import json, os, sys
print(json.dumps([os.getcwd(), sys.argv[1:], os.environ["LABTASKER_TASK_DIR"], os.environ["LABTASKER_ATTEMPT"]]))
count = os.path.join(sys.argv[6], "count")
with open(count, "a") as file:
    file.write("x")
sys.exit(os.path.getsize(count) < 2)
"""


def test_each_run_has_its_facts_a_folder_to_work_in_and_one_that_its_task_keeps(both):
    id_ = labtasker.submit_task("grid", args={"lr": 0.1}).task_id
    script = both.write("job.py", PLACE)
    run = both.cli("loop", "--workdir", "runs/%(lr)-%(@name)", "--", sys.executable, script,
                   *["%%(@%s)" % name for name in ("task", "run", "name", "slot", "attempt", "dir")])
    task = labtasker.get_task(id_)
    assert task.status == "success", run
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    folder = str(both.cwd / "runs" / "0.1-grid")
    for number, (at, words, task_dir, attempt) in enumerate(lines, 1):
        assert at == folder and attempt == words[4] == str(number) and task_dir == words[5]
        assert words[0] == id_ and words[1] == task.attempts[number - 1]["run_id"] and words[2:4] == ["grid", "0"]
    assert len(lines) == 2 and [one["workdir"] for one in task.attempts] == [folder] * 2
    shown = json.loads(both.cli("task", "get", id_, "--fmt", "json").stdout)
    assert (shown["workdir"], shown["task_dir"]) == (folder, task_dir)
    row = json.loads(both.cli("task", "ls", "--columns", "workdir,task_dir", "--fmt", "jsonl").stdout)
    assert (row["workdir"], row["task_dir"]) == (folder, task_dir)


def test_a_program_is_found_from_the_loops_folder_wherever_the_job_runs(home):
    id_ = labtasker.submit_task(args={"n": 1}).task_id
    path = home.write("run.sh", "#!/bin/sh\npwd > here\n")
    labtasker.os.chmod(str(path), 0o700)
    home.cli("loop", "--workdir", "deep/%(n)", "--", "./run.sh")
    assert labtasker.get_task(id_).status == "success"
    assert (home.cwd / "deep" / "1" / "here").read_text().strip() == str(home.cwd / "deep" / "1")


def test_a_folder_that_can_not_be_made_fails_the_task_that_names_it_alone(home):
    bad = labtasker.submit_task(args={"n": "run.sh/x"}, max_retries=1).task_id
    good = labtasker.submit_task(args={"n": "fine"}).task_id
    home.write("run.sh", "")
    home.cli("loop", "--workdir", "%(n)", "--", "true", check=False)
    assert (labtasker.get_task(bad).status, labtasker.get_task(good).status) == ("failed", "success")
