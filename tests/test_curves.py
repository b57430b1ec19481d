"""Sections 5, 6 and 12: a task's history, the rules that stop it early, and reports that wait for a server."""
import collections
import fractions
import json
import math
import random
import statistics
import sys
import time
import types

import pytest

import faulty
import harness
import labtasker
import labtasker as L
from labtasker import Required
from test_service import clock, door  # noqa: F401 - fixtures
from test_signals import pass_time


def history(door, task, *names):
    """Return the points of a task as (step, value, ...) of these names, without their times."""
    points = door("GET", "tasks/%s/history" % (task["task_id"] if isinstance(task, dict) else task))["content"]
    return [(point["step"],) + tuple(point.get(name) for name in names) for point in points]


def test_a_report_with_a_step_is_a_point_and_is_merged_as_any_report(door):
    door.submit()
    task = door.fetch()
    answer = door.report(task, "running", summary={"loss": 0.5, "val.acc": 0.1}, step=1)
    assert answer == {"go": True, "status": "running", "reason": None}
    door.report(task, "running", summary={"note": "no point"})
    door.report(task, "running", summary={"loss": 0.4}, step=2.5)
    door.report(task, "running", summary={"loss": 0.6}, step=1)
    assert door("GET", "tasks/%s/history" % task["task_id"])["content"][0] == {
        "step": 1, "at": L.format_time(door.clock.day - 0.004), "loss": 0.5, "val": {"acc": 0.1}}
    assert history(door, task, "loss") == [(1, 0.5), (2.5, 0.4), (1, 0.6)]
    assert door.task(task["task_id"])["summary"] == {"loss": 0.6, "val": {"acc": 0.1}, "note": "no point"}
    assert door.report(task, "success", step=3, summary={"loss": 0.3})["go"] is False
    assert history(door, task, "loss")[-1] == (3, 0.3)
    assert door.report(task, "success", step=4, summary={"loss": 0.2}) and len(history(door, task)) == 4
    door("GET", "tasks/none/history", expect=404)


@pytest.mark.parametrize("step", [-1, "3", True, [1], {"a": 1}, float("nan"), float("inf"), -0.5])
def test_a_step_that_is_no_number_from_0_on_is_told_and_makes_no_point(door, step):
    door.submit()
    task = door.fetch()
    answer = door.report(task, "running", summary={"loss": 1}, step=step)
    assert "no number >= 0" in answer["notification"][0]["details"] and answer["go"] is True
    assert history(door, task) == [] and door.task(task["task_id"])["summary"] == {"loss": 1}


def test_a_repeated_point_adds_nothing(door):
    door.submit()
    task = door.fetch()
    for step in range(20):
        door.report(task, "running", summary={"loss": step}, step=step, point_id="p%d" % step)
    before = history(door, task, "loss")
    for step in (19, 7, 0):
        door.report(task, "running", summary={"loss": 100}, step=step, point_id="p%d" % step)
    assert history(door, task, "loss") == before and door.task(task["task_id"])["summary"] == {"loss": 19}
    door.report(task, "running", summary={"loss": 1}, step=1, point_id="another")
    assert history(door, task, "loss")[-1] == (1, 1)


def test_a_point_is_known_by_its_whole_digest_and_not_by_parts_of_two(monkeypatch):
    digests = {"ab": b"a" * 4 + b"b" * 4, "cd": b"c" * 4 + b"d" * 4, "bc": b"b" * 4 + b"c" * 4}
    monkeypatch.setattr(L, "_digest", lambda point_id: digests[point_id])
    monkeypatch.setattr(L, "ID_BYTES", 8)
    curve = L.NO_CURVE.plus(point(1, id="ab")).plus(point(2, id="cd"))
    assert curve.knows("ab") and curve.knows("cd") and not curve.knows("bc")
    assert curve.plus(point(3, id="bc")).knows("bc")


@pytest.mark.parametrize("values, mean", [([1, 2, 4.5], 2.5), ([math.inf, 1], math.inf), ([math.inf, -math.inf], math.nan), ([1e308, 1e308], math.inf)])
def test_numbers_without_a_finite_mean_have_one_too(values, mean):
    assert L._mean(values) == mean or math.isnan(mean) and math.isnan(L._mean(values))


def point(step, **fields):
    return dict({"step": step, "at": 1.0, "values": {"n": step}, "id": "p%s" % step}, **fields)


def test_a_history_keeps_at_most_1000_points_and_always_the_newest():
    curve, looks = L.NO_CURVE, 0
    for number in range(4500):
        curve = curve.plus(point(number))
        every = 1 if number < 1000 else 2 if number < 1999 else 4 if number < 3997 else 8
        if number % 100 in (0, 1) or number in (998, 999, 1002, 1003, 1998, 1999, 2003, 3996, 3997, 3998):
            wanted, looks = list(range(0, number + 1, every)), looks + 1
            assert [step for step, _, _ in curve.content()] == wanted + [number] * (wanted[-1] != number)
            assert len(curve.points) <= 1000 and curve.knows("p%d" % number) and not curve.knows("p%d" % (number + 1))
            assert L.Curve.of_json(json.loads(L.dump_json(curve.in_json()))) == curve
    assert looks > 90 and curve.knows("p3500") and not curve.knows("p3499")


def test_a_new_curve_begins_after_a_failed_run_and_a_run_handed_back_goes_on_with_its_own(door):
    task_id = door.submit(max_retries=5)
    task = door.fetch()
    for step in range(5):
        door.report(task, "running", summary={"n": step}, step=step)
    door.report(task, "pending", reason="preempted")
    assert len(history(door, task_id)) == 5
    task = door.fetch()
    assert len(history(door, task_id)) == 5
    door.report(task, "running", summary={"n": 33}, step=3)
    door.report(task, "running", summary={"n": 22}, step=2)
    assert history(door, task_id, "n") == [(0, 0), (1, 1), (2, 2), (3, 33), (2, 22)]
    door.report(task, "failed")
    assert len(history(door, task_id)) == 5
    task = door.fetch()
    assert history(door, task_id) == []
    door.report(task, "running", summary={"n": 1}, step=9)
    door.later(100)  # timed out
    assert history(door, task_id) == [(9,)]
    door.fetch()
    assert history(door, task_id) == []


def test_a_run_that_resumes_a_thinned_curve_drops_what_it_repeats():
    curve = L.NO_CURVE
    for step in range(1502):
        curve = curve.plus(point(step))
    curve = curve.plus(point(1400, run="second"))
    for step in range(1401, 1600):
        curve = curve.plus(point(step))
    found = [step for step, _, _ in curve.content()]
    assert found == list(range(0, 1400, 2)) + list(range(1401, 1600, 2))  # the newest is always there
    assert curve.plus(point(1600, run="third")).points[:-1] == curve.points[:-1] + curve.points[-1:]
    begun = curve.plus(point(0, run="fourth"))
    assert (begun.every, begun.since, len(begun.points)) == (1, 0, 1)


def test_a_curve_survives_a_compaction_and_a_repeat_is_known_after_it(door, tmp_path):
    door.submit()
    task = door.fetch()
    for step in range(30):
        door.report(task, "running", summary={"loss": 1 / (step + 1), "deep.er": "x"}, step=step, point_id="p%d" % step)
    before = door("GET", "tasks/%s/history" % task["task_id"])
    door.store.compact()
    assert door("GET", "tasks/%s/history" % task["task_id"]) == before
    door.report(task, "running", summary={"loss": 9}, step=29, point_id="p29")
    assert door("GET", "tasks/%s/history" % task["task_id"]) == before
    door.report(task, "running", summary={"loss": 9}, step=30, point_id="p30")
    assert history(door, task, "loss")[-2:] == [(29, 1 / 30), (30, 9)]


def test_a_plain_client_sees_nothing_of_points(door):
    door.submit()
    task = door.fetch()

    def ask(method, path, body=None):
        return L.answer_call(door.store, lambda: door.queue, method, "/api/v1/queues/me/tasks/" + path, body, None, False)
    body = {"status": "running", "summary": {"loss": 1}, "step": 1, "run_id": task["run_id"]}
    assert ask("POST", task["task_id"] + "/status", body) == (200, {})
    shown = ask("GET", task["task_id"])[1]
    assert shown["summary"] == {"loss": 1} and not {"curve", "stop"} & set(shown)
    assert "curve" not in door.task(task["task_id"])


def test_the_journal_is_refused_by_a_version_that_knows_no_points(door, monkeypatch):
    door.submit()
    door.report(door.fetch(), "running", summary={"loss": 1}, step=1)
    with monkeypatch.context() as older:
        older.setattr(L, "RECORDS", {name: row for name, row in L.RECORDS.items() if name != "point"})
        with pytest.raises(L.StoreDamaged, match="point"):
            L.check_known(door.path)


def test_report_feeds_the_history_and_should_stop_is_false_until_told(home):
    id_ = labtasker.submit_task(args={"n": 1}).task_id
    assert labtasker.should_stop() is False

    @labtasker.loop()
    def main(n=Required()):
        for step in range(3):
            assert labtasker.report(step=step, loss=1 - step / 4, **{"val.acc": step}) is True
        assert labtasker.should_stop() is False
    main()
    points = labtasker.get_history(id_)
    assert [(p["step"], p["loss"], p["val"]) for p in points] == [(0, 1, {"acc": 0}), (1, 0.75, {"acc": 1}), (2, 0.5, {"acc": 2})]
    assert labtasker.get_task(id_).summary == {"loss": 0.5, "val": {"acc": 2}}


def cli(capsys, *args):
    code = L.main(list(args))
    return code, capsys.readouterr()


def test_task_history_prints_the_points_in_each_format(home, capsys):
    id_ = labtasker.submit_task(args={"n": 1}).task_id
    assert cli(capsys, "task", "history", id_, "--json")[1].out == "[]\n"
    run = labtasker.fetch_task(required_fields=["n"]).task
    for step, loss in enumerate([0.5, 0.25, float("nan")]):
        L.send_report(id_, "running", {"loss": loss, "val.acc": 1}, run_id=run.run_id, step=step)
    table = cli(capsys, "task", "history", id_[:6])[1].out.splitlines()
    assert table[0].split() == ["step", "loss", "val.acc", "at"] and table[2].split()[:3] == ["1", "0.25", "1"]
    assert cli(capsys, "task", "history", id_, "--fmt", "csv")[1].out.splitlines()[0] == "step,at,loss,val.acc"
    assert json.loads(cli(capsys, "task", "history", id_, "--json")[1].out)[1]["loss"] == 0.25
    assert len(cli(capsys, "task", "history", id_, "--fmt", "jsonl")[1].out.splitlines()) == 3
    assert "loss: .nan" in cli(capsys, "task", "history", id_, "--fmt", "yaml")[1].out


def test_points_that_wait_for_the_server_are_delivered_in_order_once(home, monkeypatch):
    id_ = labtasker.submit_task(args={"n": 1}).task_id
    send, away = L.send_report, []

    def lost(*args, **named):
        if len(away) == 1:  # it arrives, the answer does not
            send(*args, **named)
        if away:
            away.append(1)
            raise L.LabtaskerConnectError("away")
        return send(*args, **named)
    monkeypatch.setattr(L, "send_report", lost)
    monkeypatch.setattr(L, "_AWAY_S", 0)
    monkeypatch.setattr(L, "_POINTS_A_FILE", 10)

    @labtasker.loop()
    def main(n=Required()):
        labtasker.report(step=0, loss=0)
        away.append(1)
        for step in range(1, 31):
            assert labtasker.report(step=step, loss=step)
            labtasker.report(other=step)
        labtasker.report(loss="last")
        waiting = L.outbox_reports()
        assert 4 <= len(waiting) <= 8
        del away[:]
    main()
    assert [(p["step"], p["loss"]) for p in labtasker.get_history(id_)] == [(step, step) for step in range(31)]
    task = labtasker.get_task(id_)
    assert task.summary == {"loss": "last", "other": 30} and task.status == "success" and not L.outbox_reports()


# ---- Rules: a plain model, written from the description alone, and the engine beside it


def better(one, other, mode):
    """Whether one value is better than another; NaN is worst."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(other) and not math.isnan(one)
    return one < other if mode == "min" else one > other


class Model:
    """Tasks as dicts: name, stop, status, points as [step, value or None] in their order; `run` counts runs."""

    def __init__(self):
        self.tasks = {}

    def group(self, task):
        return [other for other in self.tasks.values() if (other["name"], other["stop"]) == (task["name"], task["stop"])]

    def report(self, key, step, value):
        """Return the reason why the task is stopped at this point, or None."""
        task = self.tasks[key]
        if task.pop("is_new_run", False):
            task["points"] = [point for point in task["points"] if point[0] < step]
        task["points"].append([step, value])
        if not task["stop"] or value is None:
            return None
        kind, metric, mode, *rest = task["stop"].split(":")
        options = dict({"eta": 3, "from": 1, "after": 5}, **{name: float(number) for name, number in (word.split("=") for word in rest)})
        why = getattr(self, kind)(task, step, value, mode, options)
        return why and "stopped early: %s, step %s, %s %s" % (kind, step, metric, why)

    def record(self, task, rung):
        """The value of the first point at or beyond a rung, None without one."""
        return next((value for step, value in task["points"] if value is not None and step >= rung), None)

    def asha(self, task, step, value, mode, options):
        reached = []
        while options["from"] * options["eta"] ** len(reached) <= step:
            reached.append(options["from"] * options["eta"] ** len(reached))
        earlier = [at for at, one in task["points"][:-1] if one is not None]
        new = [rung for rung in reached if not any(at >= rung for at in earlier)]
        if not new:
            return None
        others = [self.record(other, new[-1]) for other in self.group(task) if other is not task]
        others = [other for other in others if other is not None]
        n, ahead = len(others) + 1, sum(better(other, value, mode) for other in others)
        return None if ahead < max(1, n // options["eta"]) else "%g is %s of %d" % (value, L.ordinal(ahead + 1), n)

    def median(self, task, step, value, mode, options):
        if step < options["from"]:
            return None
        means = []
        for other in self.group(task):
            seen = [one for at, one in other["points"] if one is not None and at <= step]
            if other["status"] == "success" and seen:
                means.append(math.nan if any(map(math.isnan, seen)) else statistics.mean(map(fractions.Fraction, seen)))
        if not means or len(means) < options["after"]:
            return None
        for at in range(len(means)):  # best first, by what `better` says alone
            for place in range(len(means) - 1 - at):
                if better(means[place + 1], means[place], mode):
                    means[place:place + 2] = means[place + 1], means[place]
        middle = float((means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2)
        best = task["points"][-1][1]
        for _, one in task["points"]:
            best = one if one is not None and better(one, best, mode) else best
        return "%g at best is worse than %g, the median of %d" % (best, middle, len(means)) if better(middle, best, mode) else None


TASKS = "/api/v1/queues/me/tasks"


class Engine:
    """The operations on a state in memory, without a store; `lines` is what a journal would hold."""

    def __init__(self):
        self.at, self.lines, self.store = 1e9, [], types.SimpleNamespace()
        self.restart([[["queue", {"queue_id": "q", "queue_name": "q", "created_at": 1, "last_modified": 1}]]])

    def restart(self, lines):
        self.state, self.lines = L.State(), lines
        for line in lines:
            self.state.apply("q", line)

    def fold(self):
        return [json.loads(line.decode())["changes"] for line in L._fold_lines(self.state)]

    def do(self, operation, key, body, **more):
        self.at += 0.01
        request = dict(L.checked(L.ROUTES[key].fields, json.loads(json.dumps(body)), ["body"]), **more)
        changes, answer = operation(self.store, self.state.queues["q"], request, L.Instant(self.at))
        if changes:
            self.lines.append(json.loads(L.dump_json(changes)))
            self.state.put_back(self.state.apply("q", json.loads(L.dump_json(changes))))  # as where the disk is full
            self.state.apply("q", changes)
        return answer

    def submit(self, name, stop):
        task = L.checked(L.ROUTES["POST " + TASKS].fields, {"args": {"a": 1}, "task_name": name, "stop": stop, "max_retries": 99}, ["body"])
        return self.do(L.submit_tasks_op, "GET " + TASKS + "/{task_id}", {}, tasks=[task], many=False)["task_id"]

    def fetch(self):
        return self.do(L.fetch_task_op, "POST " + TASKS + "/next", {})["task"]

    def report(self, task, status, **fields):
        return self.do(L.report_task_op, "POST " + TASKS + "/{task_id}/status", dict(fields, status=status, run_id=task.run_id),
                       task_id=task.task_id)

    def update(self, task_id, **fields):
        update = L.checked(L.ROUTES["PUT " + TASKS].fields, dict(fields, task_id=task_id), ["body"])
        self.do(L.update_tasks_op, "GET " + TASKS + "/{task_id}", {}, updates=[update], reset_pending=False)

    def delete(self, task_id):
        self.do(L.delete_task_op, "DELETE " + TASKS + "/{task_id}", {}, task_id=task_id)

    def tasks(self):
        return self.state.queues["q"].tasks


RULES = ["asha:loss:min", "asha:val.loss:max:eta=2", "asha:loss:max:from=2:eta=2.5", "asha:loss:min:from=0.5:eta=2", "median:loss:min:after=2",
         "median:loss:max:from=3:after=1", "median:val.loss:min:after=0", None]
VALUES = [0, 1, 2, 3, 0.5, 1.5, -1, 2.25, float("nan"), None]


def values_of(rule, value):
    """The summary of a report: the rule's metric, or another value where there is none."""
    if value is None:
        return {"other": 1}
    return {rule.split(":")[1] if rule else "loss": value, "other": 2}


def play(random, engine, model):
    """One random history of both; after each step they must be the same."""
    rules, running, stopped = random.sample(RULES, random.choice([1, 1, 2])), {}, 0
    steps = random.choice([[1, 2, 3, 4, 9], [0, 1, 2, 3, 5, 8, 13, 27, 28], [0.5, 1, 2.5, 4, 6.25]])

    def begin():
        if random.random() < 0.8 and len(model.tasks) < 12:
            key = engine.submit(random.choice([None, None, "a"]), random.choice(rules))
            task = engine.tasks()[key]
            model.tasks[key] = {"name": task.task_name, "stop": task.stop, "points": [], "status": "pending"}
        task = engine.fetch()
        if task:
            plain = running[task.task_id] = model.tasks[task.task_id]
            if not plain.pop("is_handed_back", False):
                plain["points"] = []
            plain.update(status="running", is_new_run=True)

    for _ in range(random.choice([20, 60])):
        what = random.random()
        if not running or what < 0.1:
            begin()
            continue
        key = random.choice(sorted(running))
        task, plain = engine.tasks()[key], running[key]
        if what < 0.78:
            step, value = random.choice(steps), random.choice(VALUES)
            if value is not None and not math.isnan(value) and plain["stop"] and "val" in plain["stop"]:
                value = value / 3
            reason = model.report(key, step, value)
            answer = engine.report(task, "running", summary=values_of(plain["stop"], value), step=step)
            assert (answer["go"], answer["reason"]) == (reason is None, reason)
            if reason:
                stopped += 1
                plain["status"] = running.pop(key)["status"] = "cancelled"
                assert engine.report(task, "running", summary={"loss": 9}, step=step + 1)["go"] is False
        elif what < 0.9:
            status = random.choice(["success", "success", "failed", "pending"])
            engine.report(task, status)
            plain["status"] = "success" if status == "success" else "pending"
            plain["is_handed_back"] = status == "pending"
            running.pop(key)
        elif what < 0.93:
            running.pop(key, None)
            model.tasks.pop(key)
            engine.delete(key)
        elif what < 0.95 and plain["stop"] in (None,) + tuple(rule for rule in rules if rule and "val" not in rule):
            plain["stop"] = random.choice([rule for rule in RULES if rule is None or "val" not in rule])
            engine.update(key, stop=plain["stop"])
        elif what < 0.97:
            plain["name"] = random.choice(["a", "b"])
            engine.update(key, task_name=plain["name"])
        else:
            engine.restart(engine.lines if random.random() < 0.5 else engine.fold())
        for key, plain in model.tasks.items():
            task = engine.tasks()[key]
            assert (task.status, task.stop, task.task_name) == (plain["status"], plain["stop"], plain["name"])
            assert [point[0] for point in (task.curve or L.NO_CURVE).points] == [step for step, _ in plain["points"]]
    return stopped


def test_rules_decide_as_a_plain_model_does_and_a_replay_gives_the_same():
    stopped, kinds = 0, collections.Counter()
    for seed in range(faulty.setting("CURVES")):
        engine, model = Engine(), Model()
        stopped += play(random.Random(seed), engine, model)
        now_are, lines = repr(list(engine.tasks().items())), engine.lines
        groups = {key: (group.rungs, sorted(group.succeeded), group.count) for key, group in engine.state.queues["q"].groups.items()}
        kinds.update(task.reason.split(",")[0] for task in engine.tasks().values() if task.run_end == "stopped")
        for again in (lines, engine.fold()):
            engine.restart(again)
            assert repr(list(engine.tasks().items())) == now_are
            found = {key: (group.rungs, sorted(group.succeeded), group.count) for key, group in engine.state.queues["q"].groups.items()}
            assert without_empty_rungs(found) == without_empty_rungs(groups)
    assert stopped > faulty.setting("CURVES") / 2 and len(kinds) == 2


def without_empty_rungs(groups):
    return {key: ([rung for rung in rungs if rung != [[], 0]], *rest) for key, (rungs, *rest) in groups.items()}


# ---- Rules: what is told and what follows


def test_the_reason_names_the_rung_and_the_rank(door):
    for loss in (1, 2, 3, 4, 5, 6, 7, 0.71, 0.5):
        door.submit(stop="asha:loss:min:from=9")
        task = door.fetch()
        answer = door.report(task, "running", step=9, summary={"loss": loss if loss != 7 else 0.3})
    assert answer["go"] is True
    door.submit(stop="asha:loss:min:from=9")
    task = door.fetch()
    answer = door.report(task, "running", step=9.0, summary={"loss": 5.5})
    assert answer == {"go": False, "status": "cancelled", "reason": "stopped early: asha, step 9, loss 5.5 is 9th of 10"}
    found = door.task(task["task_id"])
    assert (found["status"], found["reason"], found["summary"]) == ("cancelled", answer["reason"], {"loss": 5.5})
    assert found["worker_id"] is None and found["run_end"] == "stopped"


def test_a_report_after_the_stop_is_answered_and_changes_nothing_but_the_attempt(door):
    for loss in (1, 2):
        door.submit(stop="asha:loss:min")
        task = door.fetch(attempt={"host": "a"})
        answer = door.report(task, "running", step=1, summary={"loss": loss})
    before = door.task(task["task_id"])
    for status in ("running", "success", "failed", "pending", "cancelled"):
        assert door.report(task, status, step=2, summary={"loss": 0}, attempt={"exit_code": 1}) == answer
    assert door.report(task["task_id"], "running", step=2, summary={"loss": 0}) == answer
    after = json.loads(json.dumps(door.task(task["task_id"])))
    assert after["attempts"][-1].pop("exit_code") == 1 and after["attempts"][-1]["status"] == "cancelled"
    assert dict(after, last_modified=0) == dict(before, last_modified=0) and len(history(door, task)) == 1
    beat = "tasks/%s/heartbeat" % task["task_id"]
    assert door("POST", beat, query={"run_id": task["run_id"], "answer": "status"})["status"] == "stopped"
    door.update(task["task_id"], status="pending")
    again = door.fetch()
    assert history(door, again) == [] and again["reason"] is None
    door.report(task, "running", expect=409)


def test_a_rule_is_changed_and_cleared_while_its_task_waits_or_runs(door):
    door.submit(stop="asha:loss:min")
    door.report(door.fetch(), "running", step=1, summary={"loss": 1})
    task_id = door.submit(stop="asha:loss:min")
    door.update(task_id, stop=None)
    assert door.task(task_id)["stop"] is None
    task = door.fetch()
    assert door.report(task, "running", step=1, summary={"loss": 9})["go"] is True
    door.update(task_id, stop="asha:loss:min")  # it has passed this rung
    assert door.report(task, "running", step=2, summary={"loss": 9})["go"] is True
    assert "at rung 1 (step 1) its loss 9 is 2nd of 2" in door("GET", "tasks/%s/history" % task_id)["standing"]
    door.update(task_id, stop=None, replace_fields=["stop"])
    assert door("GET", "tasks/%s/history" % task_id)["standing"] is None
    for bad in ("asha", 5):
        door.update(task_id, expect=400 if bad == "asha" else 422, stop=bad)


def standing(door, task):
    return door("GET", "tasks/%s/history" % task["task_id"])["standing"]


def test_the_standing_names_what_a_rule_compares_with(door):
    rule = "median:loss:min:from=2:after=2"
    for losses in ((4, 2), (6, 4)):
        door.submit(stop=rule)
        task = door.fetch()
        for step, loss in enumerate(losses, 1):
            door.report(task, "running", step=step, summary={"loss": loss})
        door.report(task, "success")
    door.submit(stop=rule)
    task = door.fetch()
    assert standing(door, task) == rule + ": it has reported nothing with a step, so it is not compared."
    door.report(task, "running", step=1, summary={"other": 1})
    assert standing(door, task) == rule + ": none of its 1 points has a number loss, so it is not compared."
    door.report(task, "running", step=1, summary={"loss": 7})
    door.report(task, "running", step=2, summary={"loss": 3.5})
    assert standing(door, task) == rule + (
        ": its best loss is 3.5; 2 tasks that succeeded have points up to step 2, 2 are needed; the median of their means is 4.")
    door.submit(stop="median:loss:max:after=2")
    task = door.fetch()
    door.report(task, "running", step=1, summary={"loss": 7})
    assert standing(door, task).endswith("its best loss is 7; 0 tasks that succeeded have points up to step 1, 2 are needed.")
    door.submit(stop="asha:loss:min:from=9")
    task = door.fetch()
    door.report(task, "running", step=8, summary={"loss": 7})
    assert standing(door, task) == "asha:loss:min:from=9: it has reached no rung; the first is step 9."


def test_a_rung_beyond_all_numbers_is_reached_by_no_step(door):
    door.submit(stop="asha:loss:min:eta=9e99")
    task = door.fetch()
    door.report(task, "running", step=1.7e308, summary={"loss": 1})
    assert "at rung 7.29e+299 (step 1.7e+308)" in standing(door, task) and "the next rung is step inf" in standing(door, task)


def test_a_task_with_a_rule_of_a_newer_version_runs_as_one_without_a_rule(door, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(L, "parse_rule", lambda text: None)
        door.submit(stop="pbt:loss:min")
    task = door.fetch()
    assert door.report(task, "running", step=1, summary={"loss": 1})["go"] is True
    assert standing(door, task) is None and history(door, task, "loss") == [(1, 1)]
    door.report(task, "success")


@pytest.mark.parametrize("text, column, words", [
    ("", 0, "asha and median"), ("ash:loss:min", 0, "did you mean asha?"), ("asha", 4, "metric is missing"), ("asha::min", 5, "metric"),
    ("asha:a..b:min", 5, "metric"), ("asha:loss", 9, "min or max"), ("asha:loss:mean", 10, "min or max"),
    ("asha:loss:min:after=3", 14, "eta=3 and from=1"), ("asha:loss:min:eta=1.9", 18, "from 2 on"), ("asha:loss:min:eta=inf", 18, "from 2 on"),
    ("asha:loss:min:from=0", 19, "over 0"), ("asha:loss:min:eta=3:eta=3", 20, "twice"), ("median:loss:min:after=1.5", 22, "whole number"),
    ("median:loss:min:after=-1", 22, "whole number"), ("median:loss:min:", 16, "options"), ("asha:loss:min:eta", 14, "options")])
def test_a_rule_that_cannot_be_read_is_refused_with_a_caret(door, text, column, words):
    with pytest.raises(L.RuleError, match=words) as caught:
        L.parse_rule(text)
    assert caught.value.column == column and str(caught.value).split("\n")[2] == "  " + " " * column + "^"
    answer = door("POST", "tasks", {"args": {"a": 1}, "stop": text}, expect=400)
    assert words in answer["detail"] and "^" in answer["detail"]


def test_a_rule_is_given_to_every_way_of_submitting(home, capsys):
    assert cli(capsys, "task", "submit", "-q", "--stop", "asha:loss:min", "--", "--a=1")[0] == 0
    labtasker.submit_task(args={"a": 2}, stop="median:val.acc:max:after=2")
    code, out = cli(capsys, "task", "submit", "--stop", "asha:loss:mni", "--", "--a=1")
    assert code == 2 and out.err.rstrip().endswith("^")
    assert cli(capsys, "task", "submit", "--dry-run", "--stop", "asha", "--", "--a=1")[0] == 2
    with pytest.raises(L.RuleError):
        labtasker.submit_task(args={"a": 2}, stop="never")
    assert cli(capsys, "task", "update", "-y", "-f", "args.a == 1", "-u", "stop=asha")[0] == 2
    assert cli(capsys, "task", "update", "-y", "-f", "args.a == 1", "-u", "stop=None")[0] == 0
    assert [task.stop for task in labtasker.ls_tasks(sort=[("created_at", 1)]).content] == [None, "median:val.acc:max:after=2"]


def test_the_job_hears_the_stop_at_that_very_report_and_leaves(home, capfd):
    for loss in (1, 2, 0):
        labtasker.submit_task(args={"loss": loss}, stop="asha:loss:min")
    heard = []

    @labtasker.loop()
    def main(loss=Required()):
        assert labtasker.should_stop() is False
        heard.append((labtasker.report(step=1, loss=loss), labtasker.should_stop()))
    main()
    assert heard == [(True, False), (False, True), (True, False)]
    tasks = labtasker.ls_tasks(sort=[("created_at", 1)]).content
    assert [task.status for task in tasks] == ["success", "cancelled", "success"]
    err = capfd.readouterr().err
    assert "stopped early after" in err and "loss 2 is 2nd of 2" in err and "done: 3 tasks: 2 success, 1 stopped early" in err
    code, out = cli(capfd, "task", "why", tasks[1].task_id)
    assert "It was stopped early: asha, step 1, loss 2 is 2nd of 2." in out.out and "is 3rd of 3" in out.out
    silent = labtasker.submit_task(args={"loss": 0}, stop="asha:acc:max").task_id
    run = labtasker.fetch_task(required_fields=["loss"]).task
    L.send_report(silent, "running", {"loss": 1}, run_id=run.run_id, step=1)
    assert "none of its 1 points has a number acc, so it is not compared" in cli(capfd, "task", "why", silent)[1].out


STUBBORN = """
import labtasker, sys, time
go = labtasker.report(step=1, loss=float(sys.argv[1]))
print("go" if go else "stop", flush=True)
if sys.argv[1] != "1":
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_job_that_does_not_leave_is_ended_after_the_grace(both):
    for loss in (1, 2, 3):
        labtasker.submit_task(args={"loss": loss}, stop="asha:loss:min", max_retries=1)
    run = both.cli("loop", "--grace", "1s", "--", sys.executable, both.write("job.py", STUBBORN), "%(loss)")
    assert "done: 3 tasks: 1 success, 2 stopped early" in run.stderr
    stopped = [task for task in labtasker.ls_tasks(sort=[("created_at", 1)]).content if task.status == "cancelled"]
    assert [task.reason for task in stopped] == [
        "stopped early: asha, step 1, loss 2 is 2nd of 2", "stopped early: asha, step 1, loss 3 is 3rd of 3"]
    assert all(task.attempts[-1]["signal"] == "SIGTERM" and task.summary["loss"] > 1 for task in stopped)


FUNCTION = """
import labtasker, time
from labtasker import Required

@labtasker.loop(grace="1s")
def main(loss=Required()):
    if labtasker.report(step=1, loss=loss):
        return
    try:
        for _ in range(6000):
            time.sleep(0.1)
    except labtasker.TaskCancelled as error:
        print("cancelled:", error)
        raise
main()
"""


@pytest.mark.slow
def test_a_function_that_does_not_leave_gets_task_cancelled_after_the_grace(both):
    for loss in (1, 2):
        labtasker.submit_task(args={"loss": loss}, stop="asha:loss:min")
    run = both.python(FUNCTION)
    assert "cancelled: task " in run.stdout and "loss 2 is 2nd of 2" in run.stdout and "1 success, 1 stopped early" in run.stderr


PRINTS = """
import sys
from time import sleep
for epoch in range(1, 10):
    for part in (1, 2, 3):
        sys.stdout.write("\\rEpoch %d: %d0%% loss: 99" % (epoch, part))
    sys.stdout.write("\\rEpoch %d: loss: %s\\n" % (epoch, float(sys.argv[1]) + epoch / 100))
    sys.stdout.flush()
    if sys.argv[1] != "0" and epoch == 4:
        sleep(600)
"""


@pytest.mark.slow
def test_an_unchanged_script_has_a_curve_and_is_stopped_by_it(both):
    for loss in (0, 1, 2):
        labtasker.submit_task(args={"loss": loss}, stop="asha:loss:min:from=3")
    both.cli("loop", "--grace", "0.2s", "--metric", "loss=loss: ([0-9.]+)", "--step", r"Epoch (\d+)", "--", sys.executable,
             both.write("train.py", PRINTS), "%(loss)")
    tasks = labtasker.ls_tasks(sort=[("created_at", 1)]).content
    assert [task.status for task in tasks] == ["success", "cancelled", "cancelled"]
    for task, loss in zip(tasks, (0, 1, 2)):
        points = [(p["step"], p["loss"]) for p in labtasker.get_history(task.task_id)]
        assert points == [(n, loss + n / 100) for n in range(1, 4 if loss else 10)]
    assert "asha, step 3, loss 2.03 is 3rd of 3" in tasks[2].reason


@pytest.mark.parametrize("pieces, points", [
    ([b"step 1 loss 5\n", b"step 2 loss 4\nloss 3\n"], [(1, 5), (2, 4), (2, 3)]),
    ([b"loss 9\nstep 1\n", b"loss 5\r", b"loss 4\r", b"step 2\nloss 3\r\n"], [(1, 4), (2, 3)]),  # no value before the first step
    ([b"step 1 los", b"s 5\r", b"\nother\n"], [(1, 5)]),
    ([b"step 1\nloss 1\r\nloss x\nnothing\nstep 1e400 loss 2\nloss 3"], [(1, 1), (float("inf"), 2), (float("inf"), 3)])])
def test_lines_that_a_job_prints_become_points(pieces, points):
    printed = L.Printed({"loss": L.Metric(r"loss (\S+)", "--metric")}, L.Metric(r"step (\S+)", "--step"))
    feed = printed.channel()
    for piece in pieces + [None]:
        feed(piece)
    assert [(step, values["loss"]) for step, values in printed.take()] == points and printed.take() == []


def test_a_job_that_prints_faster_than_points_are_sent_keeps_the_newest_and_a_part_of_the_others():
    printed = L.Printed({"loss": L.Metric(r"loss (\S+)", "--metric")}, L.Metric(r"step (\S+)", "--step"))
    feed = printed.channel()
    for step in range(1000):
        feed(b"step %d loss 1\n" % step)
    found = [step for step, _ in printed.take()]
    assert found[-1] == 999 and 50 <= len(found) <= 100 and found == sorted(found)


def test_a_compaction_keeps_each_task_also_where_long_histories_part_its_lines():
    state = L.State()
    state.apply("q", [["queue", {"queue_id": "q", "queue_name": "q", "created_at": 1, "last_modified": 1}]])
    for number in range(350):
        state.apply("q", [["task", "t%d" % number, {"status": "pending", "created_at": number + 1, "args": {"a": 1}}, "created"]])
        for step in range(150 if number % 7 == 0 else number % 3):
            state.apply("q", [["point", "t%d" % number, {}, None, point(step)]])
    lines, again = [json.loads(line.decode()) for line in L._fold_lines(state)], L.State()
    for line in lines:
        again.apply("q", line["changes"])
    assert list(again.queues["q"].tasks.items()) == list(state.queues["q"].tasks.items())
    assert all(len(line["changes"]) <= 100 and len(json.dumps(line)) < 2e5 for line in lines)


REPORTER = """
import labtasker, os, time
from labtasker import Required

@labtasker.loop(heartbeat_timeout=3600)
def main(n=Required()):
    with open(os.path.join(os.environ["ACKED"], "%s" % labtasker.current_task_id()), "a") as acked:
        for step in range(200):
            time.sleep(0.05)
            if labtasker.report(step=step, loss=step / 3):
                acked.write("%d\\n" % step)
                acked.flush()
main()
"""


@pytest.mark.slow
def test_every_acknowledged_point_is_there_after_workers_and_server_were_killed(server_home, tmp_path):
    dice, place, server = faulty.dice("points"), server_home, server_home.server
    acked = tmp_path / "acked"
    acked.mkdir()
    labtasker.submit_tasks([{"args": {"n": n}} for n in range(2000)])
    script, port = place.write("reporter.py", REPORTER), int(server.url.rpartition(":")[2])

    def begin():
        return place.start(sys.executable, script, env={"ACKED": str(acked)})
    workers, kills = [begin() for _ in range(faulty.setting("CURVE_WORKERS"))], 0
    harness.wait_until(lambda: any(path.stat().st_size for path in acked.iterdir()), "a worker reports", 60)
    until = time.monotonic() + faulty.setting("CURVE_SOAK")
    while time.monotonic() < until or not kills:
        pass_time(dice.uniform(0.5, 1.5))
        workers = [one if one.poll() is None else begin() for one in workers]  # one that finds no server at its start ends
        if dice.random() < 0.2:
            server.kill()
            pass_time(dice.uniform(0, 0.5))
            server.start(port)
        else:
            at = dice.randrange(len(workers))
            harness.end_group(workers[at])
            workers[at], kills = begin(), kills + 1
    for worker in workers:
        harness.end_group(worker)
    harness.wait_until(lambda: labtasker.deliver_kept() is not None and not labtasker.outbox_reports(), "the outbox is empty", 60)
    told = 0
    for path in sorted(acked.iterdir()):
        there = [point["step"] for point in labtasker.get_history(path.name)]
        steps = [int(line) for line in path.read_text().split("\n")[:-1]]
        told += len(steps)
        assert there == sorted(set(there)) and not set(steps) - set(there), (path.name, len(steps), len(there))
    print("%d points of %d tasks, %d kills of workers" % (told, len(list(acked.iterdir())), kills))
    assert told > 100 and kills


def test_an_ordinal_number_has_its_ending():
    numbers = [1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 101, 111, 112, 113, 121]
    assert " ".join(map(L.ordinal, numbers)) == ("1st 2nd 3rd 4th 9th 10th 11th 12th 13th 14th 20th 21st 22nd 23rd 24th 101st "
                                                         "111th 112th 113th 121st")
