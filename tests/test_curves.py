"""Sections 5, 6 and 12: a task's history, the rules that stop it early, and reports that wait for a server."""
import json

import pytest

import labtasker
import labtasker as L
from labtasker import Required
from test_service import clock, door  # noqa: F401: fixtures


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
