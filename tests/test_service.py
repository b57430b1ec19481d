"""Section 5: the operations, the indexes and the time-outs, through the one door and without a socket."""
import itertools
import json
import random
import sys

import pytest

import labtasker as L


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self):
        self.day, self.mono = 1.7e9, 1000.0

    def pass_s(self, seconds):
        self.day += seconds
        self.mono += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(L, "now", lambda: L.Instant(clock.day))
    monkeypatch.setattr(L, "monotonic", lambda: clock.mono)
    return clock


class Door:
    """Calls on a store in a folder; every time a thing is done the clock moves a little."""

    def __init__(self, folder, clock, queue=L.DEFAULT_QUEUE):
        self.path, self.clock, self.queue = str(folder / "journal.jsonl"), clock, L.LocalName(queue)
        self.store = L.Store(self.path)

    def __call__(self, method, path, body=None, query=None, expect=None):
        self.clock.pass_s(0.001)
        path = path if path.startswith("/") else "/api/v1/queues/me/" + path
        status, answer = L.answer_call(self.store, lambda: self.queue, method, path, body, query)
        assert status == expect if expect else status < 400, (status, answer)
        return answer

    def submit(self, **fields):
        fields.setdefault("args", {"a": 1})
        return self("POST", "tasks", fields)["task_id"]

    def fetch(self, expect=None, **fields):
        fields.setdefault("heartbeat_timeout", 60)
        return self("POST", "tasks/next", fields, expect=expect).get("task")

    def report(self, task, status, expect=None, **fields):
        """Report on a fetched task as its run does, or on a task id as anybody does."""
        if isinstance(task, dict):
            fields.setdefault("run_id", task["run_id"])
            task = task["task_id"]
        return self("POST", "tasks/%s/status" % task, dict(fields, status=status), expect=expect)

    def update(self, task_id, expect=None, reset=False, **fields):
        return self("PUT", "tasks", [dict(fields, task_id=task_id)], {"reset_pending": str(reset)}, expect=expect)

    def task(self, task_id):
        return self("GET", "tasks/" + task_id)

    def worker(self, **fields):
        return self("POST", "workers", fields)["worker_id"]

    def later(self, seconds):
        """Let time pass and have the time-outs looked for."""
        self.clock.pass_s(seconds)
        self.fetch(required_fields=["no-such-field"])

    def state(self):
        """Return all that is in memory, as plain values."""
        return {queue_id: (queue.record, dict(queue.tasks), list(queue.tasks), dict(queue.workers), sorted(queue.running))
                for queue_id, queue in self.store.state.queues.items()}


@pytest.fixture
def door(tmp_path, clock):
    """A Door; when the test ends its file is replayed and compared with its memory."""
    door = Door(tmp_path, clock)
    yield door
    again = Door(tmp_path, clock)
    again("GET", "/api/v1/queues/me")
    assert again.state() == door.state()


def test_a_failed_run_is_retried_until_max_retries(door):
    task_id = door.submit(max_retries=3)
    seen = []
    for _ in range(3):
        door.report(door.fetch(), "failed")
        seen.append((door.task(task_id)["status"], door.task(task_id)["retries"]))
    assert seen == [("pending", 1), ("pending", 2), ("failed", 3)]
    assert door.fetch() is None


def test_max_retries_0_and_1_fail_at_the_first_failure(door):
    for count in (0, 1):
        task_id = door.submit(max_retries=count)
        door.report(door.fetch(), "failed")
        assert door.task(task_id)["status"] == "failed"


def test_higher_priority_first_then_least_recently_changed_then_created(door):
    ids = [door.submit(priority=p) for p in (0, 5, 0, 5, -1)]
    door.update(ids[1], metadata={"touched": 1})
    assert [door.fetch()["task_id"] for _ in ids] == [ids[3], ids[1], ids[0], ids[2], ids[4]]


def test_a_fetch_clears_the_summary_and_names_the_worker_and_the_start(door):
    worker_id = door.worker()
    task_id = door.submit()
    before = door.task(task_id)
    assert before["start_time"] is None and before["worker_id"] is None and before["summary"] == {}
    door.update(task_id, summary={"old": 1})
    task = door.fetch(worker_id=worker_id)
    assert task["summary"] == {} and task["worker_id"] == worker_id and task["start_time"] is not None
    door.report(task, "success", summary={"acc": 1})
    assert door.task(task_id)["worker_id"] is None


EVENTS = ("success", "failed", "cancelled", "running", "pending")


def in_state(door, state):
    """Return (task id, the fetched task or None) of a task that is in this state, the only one."""
    task_id = door.submit(max_retries=1)
    task = door.fetch() if state in ("running", "success", "failed") else None
    if state not in ("pending", "running"):
        door.report(task or task_id, state)
    assert door.task(task_id)["status"] == state
    return task_id, task


@pytest.mark.parametrize("state, reported", list(itertools.product(L.TASK_STATES, EVENTS)))
def test_reports_without_a_run_over_the_product_of_states(door, state, reported):
    task_id, _ = in_state(door, state)
    allowed = {"running": {"success", "failed", "cancelled", "pending"}, "pending": {"cancelled"},
               "success": {"cancelled"}, "failed": {"cancelled"}, "cancelled": set()}[state]
    fine = reported in allowed or reported == state
    answer = door.report(task_id, reported, expect=200 if fine else 400, summary={"k": 1})
    task = door.task(task_id)
    assert task["status"] == (reported if fine else state)
    assert task["summary"] == ({"k": 1} if fine else {})
    if not fine:
        assert answer["detail"].startswith("InvalidStateTransition: ")


@pytest.mark.parametrize("state, wanted", list(itertools.product(L.TASK_STATES, L.TASK_STATES)))
def test_updates_of_the_status_over_the_product_of_states(door, state, wanted):
    task_id, _ = in_state(door, state)
    allowed = {"pending": {"cancelled"}, "running": {"success", "failed", "pending", "cancelled"},
               "success": {"pending", "cancelled"}, "failed": {"pending", "cancelled"}, "cancelled": {"pending"}}[state]
    fine = wanted in allowed or wanted == state
    door.update(task_id, expect=200 if fine else 400, status=wanted)
    assert door.task(task_id)["status"] == (wanted if fine else state)


@pytest.mark.parametrize("state", L.TASK_STATES)
def test_a_reset_goes_to_pending_from_any_state_and_zeroes_retries(door, state):
    task_id, task = in_state(door, state)
    door.update(task_id, retries=2)
    door.update(task_id, reset=True)
    found = door.task(task_id)
    assert (found["status"], found["retries"], found["worker_id"]) == ("pending", 0, None)
    if task:
        door.report(task, "success", expect=409)


def test_status_pending_alone_keeps_the_retries(door):
    task_id = door.submit(max_retries=2)
    door.report(door.fetch(), "failed")
    door.report(door.fetch(), "failed")
    door.update(task_id, status="pending")
    assert (door.task(task_id)["status"], door.task(task_id)["retries"]) == ("pending", 2)


def test_updates_merge_and_replace_fields_replaces(door):
    task_id = door.submit(args={"a": 1, "b": {"c": 2, "d": 3}}, metadata={"x": 1})
    door.update(task_id, args={"b.c": 5}, metadata={"y": 2})
    assert door.task(task_id)["args"] == {"a": 1, "b": {"c": 5, "d": 3}}
    assert door.task(task_id)["metadata"] == {"x": 1, "y": 2}
    door.update(task_id, args={"z": 1}, metadata={}, replace_fields=["args", "metadata"])
    assert door.task(task_id)["args"] == {"z": 1} and door.task(task_id)["metadata"] == {}


def test_updates_are_all_done_or_none_and_each_that_cannot_be_is_named(door):
    good, bad = door.submit(), door.submit()
    answer = door("PUT", "tasks", [{"task_id": good, "priority": 9}, {"task_id": bad, "status": "success"},
                                   {"task_id": "nosuch", "priority": 1}], {"reset_pending": "false"}, expect=400)
    assert bad in answer["detail"] and "nosuch" in answer["detail"] and good not in answer["detail"]
    assert door.task(good)["priority"] == 0


def test_a_task_updated_twice_in_one_request_gets_both(door):
    task_id = door.submit(args={"a": 1})
    answer = door("PUT", "tasks", [{"task_id": task_id, "args": {"b": 2}}, {"_id": task_id, "args": {"c": 3}}],
                  {"reset_pending": "false"})
    assert answer["content"][0]["args"] == door.task(task_id)["args"] == {"a": 1, "b": 2, "c": 3}


def test_a_task_handed_back_with_a_pause_is_given_to_nobody_before_and_blocks_no_other(door):
    first, other = door.submit(args={"a": 1}), door.submit(args={"a": 2})
    assert door.fetch(required_fields=["a"])["task_id"] == first
    door.report(first, "pending", delay_s=20)
    assert door.task(first)["not_before"] is not None and door.task(first)["status"] == "pending"
    assert door.fetch(required_fields=["a"])["task_id"] == other
    told = door("POST", "tasks/next", {"heartbeat_timeout": 60, "required_fields": ["a"]})
    assert told["found"] is False and 19 < told["retry_in_s"] < 20
    for fits_not in ({"required_fields": ["b"]}, {"extra_filter": {"args.a": 2}}):
        assert door("POST", "tasks/next", dict(fits_not, heartbeat_timeout=60)) == {"found": False, "task": None}
    assert door("POST", "tasks/next", {"heartbeat_timeout": 60, "extra_filter": {"args.a": 1}})["retry_in_s"] < 20
    door.clock.pass_s(20)
    run = door.fetch(extra_filter={"args.a": 1})
    assert run["task_id"] == first and run["not_before"] is None


def test_time_outs_are_found_in_one_queue_or_in_all(door):
    for queue in (None, door.queue):
        door.submit()
        door.fetch(heartbeat_timeout=10)
        door.clock.pass_s(11)
        assert [len(queue.running) for queue in door.store.state.queues.values()] == [1]
        door.store.look_for_timeouts(queue)
        assert [len(queue.running) for queue in door.store.state.queues.values()] == [0]


def test_a_server_looks_for_the_ends_of_pauses_when_the_next_one_is_over_and_now_and_then(door):
    first, woken = door.submit(), []
    door.store.release_delayed()
    assert door.store.next_release_at == door.clock.mono + L._MAX_RELEASE_S
    door.fetch()
    door.report(first, "pending", delay_s=20)
    door.store.wake = woken.append
    door.store.release_delayed()
    assert door.store.next_release_at - door.clock.mono == pytest.approx(20, abs=0.01) and not woken
    door.clock.pass_s(21)
    door.store.release_delayed()
    assert [key for _, key in woken] == ["pending"] and door.store.next_release_at == door.clock.mono + L._MAX_RELEASE_S


@pytest.mark.parametrize("end", [lambda door, one: door.update(one, reset=True), lambda door, one: (
    door.report(one, "cancelled"), door.update(one, status="pending"))])
def test_a_pause_ends_with_a_reset(door, end):
    one = door.submit()
    door.report(door.fetch(), "pending", delay_s=3600)
    assert door.fetch() is None
    door.update(one, priority=5)
    assert door.fetch() is None
    end(door, one)
    assert door.fetch()["task_id"] == one


def test_a_pause_is_over_at_the_same_time_in_another_process_and_a_long_one_has_a_bound(door):
    one = door.submit()
    door.report(door.fetch(), "pending", delay_s=20)
    door.store = L.Store(door.path)
    assert door.fetch() is None
    door.clock.pass_s(20)
    door.report(door.fetch(), "pending", delay_s=1e300)
    assert door.fetch() is None
    door.clock.pass_s(L.MAX_DELAY_S)
    assert door.fetch()["task_id"] == one


def test_of_pauses_that_are_over_a_bounded_number_is_kept(door):
    ids = [door.submit() for _ in range(25)]
    for _ in ids:
        door.report(door.fetch(), "pending", delay_s=3600)
    for one in ids:
        door.update(one, reset=True)  # it ends the pause
    assert len(pending_of(door).delayed) == 25
    for _ in range(20):
        door.report(door.fetch(), "pending", delay_s=3600)
        door.update(next(iter(pending_of(door).resting)), reset=True)
        assert len(pending_of(door).delayed) < 25


def pause_after_a_failed_run(door):
    """Have the next task's run fail; return its pause in seconds, and let that pass."""
    task_id = door.fetch()["task_id"]
    door.report(task_id, "failed")
    not_before = door.task(task_id)["not_before"]
    if not_before is None:
        return None
    pause_s = L.parse_time(not_before) - L.parse_time(door.task(task_id)["last_modified"])
    door.clock.pass_s(pause_s - 0.5)
    assert door.fetch() is None
    door.clock.pass_s(0.5)
    return round(pause_s, 3)


@pytest.mark.parametrize("retry_delay, pauses", [
    (30, [30, 60, 120]), (1000, [1000, 2000, 3600, 3600]), (1e300, [3600]), (0.5, [0.5, 1, 2, 4]), (None, [None, None])])
def test_the_pause_after_a_failed_run_doubles_up_to_an_hour(door, retry_delay, pauses):
    door.submit(retry_delay=retry_delay, max_retries=len(pauses) + 1)
    assert [pause_after_a_failed_run(door) for _ in pauses] == pauses
    assert pause_after_a_failed_run(door) is None and door("POST", "tasks/search", {})["content"][0]["status"] == "failed"


def test_after_ever_so_many_failed_runs_the_pause_is_an_hour(door):
    task_id = door.submit(retry_delay=1e-9, max_retries=2 ** 31)
    door("PUT", "tasks", [{"task_id": task_id, "retries": 2 ** 31 - 2}], {"reset_pending": "false"})
    assert pause_after_a_failed_run(door) == 3600


def test_a_run_that_is_given_up_has_its_task_wait_and_one_that_ends_late_does_not(door):
    task_id = door.submit(retry_delay=100)
    run = door.fetch(heartbeat_timeout=5)
    door.clock.pass_s(6)
    assert door.fetch() is None and door.task(task_id)["status"] == "pending"
    door.report(task_id, "pending", run_id=run["run_id"])
    assert door.task(task_id)["not_before"] is None and door.fetch()["task_id"] == task_id


def test_retry_delay_is_updated_and_cleared_as_every_field(door):
    task_id = door.submit(retry_delay=5)
    door("PUT", "tasks", [{"task_id": task_id, "retry_delay": 7}], {"reset_pending": "false"})
    assert door.task(task_id)["retry_delay"] == 7
    door("PUT", "tasks", [{"task_id": task_id, "retry_delay": None, "replace_fields": ["retry_delay"]}], {"reset_pending": "false"})
    assert door.task(task_id)["retry_delay"] is None


def test_who_can_not_know_of_pauses_hears_nothing_of_them(door):
    door.submit()
    door.report(door.fetch(), "pending", delay_s=20)
    _, answer = L.answer_call(door.store, lambda: door.queue, "POST", "/api/v1/queues/me/tasks/next", {"heartbeat_timeout": 60},
                              extensions=False)
    assert answer == {"found": False, "task": None}


def test_of_many_tasks_with_a_pause_a_fetch_looks_at_few(door, monkeypatch):
    monkeypatch.setattr(L, "MOST_LOOKED_AT", 2)
    for n in range(3):
        door.submit(args={"b": n})
        door.report(door.fetch(), "pending", delay_s=10 + n)
    told = door("POST", "tasks/next", {"heartbeat_timeout": 60, "required_fields": ["a"]})
    assert told["found"] is False and told["retry_in_s"] < 10
    door.clock.pass_s(20)
    assert door.fetch(required_fields=["a"]) is None and [door.fetch()["args"]["b"] for _ in range(3)] == [0, 1, 2]


def test_a_loops_default_leaves_a_task_its_own_heartbeat_timeout_and_a_wish_does_not(door):
    own, none = door.submit(heartbeat_timeout=6), door.submit()
    for fields, seen in (({"heartbeat_default": True}, {own: 6, none: 60}), ({}, {own: 60, none: 60})):
        runs = [door.fetch(heartbeat_timeout=60, **fields) for _ in range(2)]
        assert {run["task_id"]: run["heartbeat_timeout"] for run in runs} == seen
        for run in runs:
            door.report(run, "pending")


def test_a_silent_run_fails_after_its_heartbeat_timeout_and_says_so(door):
    task_id = door.submit()
    task = door.fetch(heartbeat_timeout=30)
    for _ in range(5):
        door.later(20)
        door("POST", "tasks/%s/heartbeat" % task_id, query={"run_id": task["run_id"]})
    assert door.task(task_id)["status"] == "running"
    door.later(31)
    found = door.task(task_id)
    assert (found["status"], found["retries"]) == ("pending", 1)
    assert "heartbeat" in found["summary"]["labtasker_error"]


def test_a_run_fails_after_its_task_timeout_in_spite_of_heartbeats(door):
    task_id = door.submit(max_retries=1)
    task = door.fetch(eta_max="1m")
    for _ in range(4):
        door.later(14)
        door("POST", "tasks/%s/heartbeat" % task_id, query={"run_id": task["run_id"]})
    assert door.task(task_id)["status"] == "running"
    door.later(10)
    assert door.task(task_id)["status"] == "failed" and "task_timeout" in door.task(task_id)["summary"]["labtasker_error"]


def test_a_jump_of_the_time_of_day_changes_no_state(door, clock):
    task_id = door.submit()
    door.fetch(heartbeat_timeout=30)
    for jump in (-86400, 3600, -3600, 365 * 86400):
        clock.day += jump
        door.later(2)
        assert door.task(task_id)["status"] == "running"


def test_looking_changes_nothing(door, clock, tmp_path):
    task_id = door.submit()
    door.fetch(heartbeat_timeout=5)
    clock.pass_s(1000)
    size = (tmp_path / "journal.jsonl").stat().st_size
    door("POST", "tasks/search", {})
    door("POST", "workers/search", {})
    assert door.task(task_id)["status"] == "running"
    assert (tmp_path / "journal.jsonl").stat().st_size == size


def test_a_task_that_runs_shows_when_its_last_heartbeat_came(door, clock):
    task_id = door.submit()
    run = door.fetch(heartbeat_timeout=60)
    clock.pass_s(20)
    door("POST", "tasks/%s/heartbeat" % task_id, query={"run_id": run["run_id"]})
    clock.pass_s(10)
    for found in (door.task(task_id), door("POST", "tasks/search", {})["content"][0]):
        assert 19.9 < L.parse_time(found["last_heartbeat"]) - L.parse_time(found["start_time"]) < 20.1
    door.report(run, "pending")
    door.fetch(start_heartbeat=False, eta_max=60, heartbeat_timeout=None)
    assert door.task(task_id)["last_heartbeat"] is None


def test_a_late_success_counts_while_nobody_has_taken_the_task_and_gives_the_retry_back(door):
    task_id = door.submit()
    task = door.fetch(heartbeat_timeout=5)
    door.later(10)
    assert door.task(task_id)["retries"] == 1
    door.report(task, "success", summary={"acc": 0.5})
    found = door.task(task_id)
    assert (found["status"], found["retries"], found["summary"]) == ("success", 0, {"acc": 0.5})
    assert door.fetch() is None


@pytest.mark.parametrize("max_retries, status", [(1, "failed"), (3, "pending")])
def test_a_late_handing_back_counts_as_the_late_success_does(door, max_retries, status):
    task_id = door.submit(max_retries=max_retries)
    run = door.fetch(heartbeat_timeout=5, attempt={"host": "there"})
    door.later(10)
    assert door.task(task_id)["status"] == status
    for _ in range(2):  # the second is the repeat of the first
        door.report(run, "pending", reason="preempted", attempt={"signal": "SIGTERM"})
        task = door.task(task_id)
        assert (task["status"], task["retries"], task["interruptions"], task["summary"]) == ("pending", 0, 1, {})
        attempt, = task["attempts"]
        assert (attempt["status"], attempt["reason"], attempt["signal"]) == ("pending", "preempted", "SIGTERM")


@pytest.mark.parametrize("given, took_s", [({}, 100), ({"took_s": 7}, 7), ({"took_s": 1e9}, 100), ({"took_s": 1e-9}, 0)])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_report_that_comes_late_says_how_long_its_run_took(door, given, took_s, is_late):
    task_id = door.submit()
    run = door.fetch(heartbeat_timeout=5 if is_late else 600, attempt={"host": "there"})
    door.later(100)
    door.report(run, "success", **given)
    task = door.task(task_id)
    attempt, = task["attempts"]
    assert task["status"] == "success" and abs(L.spent_s(L.Task(task)) - took_s) < 0.1
    assert attempt["start"] <= attempt["end"] <= task["last_modified"]


def test_a_duration_of_no_length_or_of_another_kind_is_refused(door):
    door.submit()
    run = door.fetch()
    for took_s in (0, -1, "7", float("inf"), float("nan"), True):
        door.report(run, "success", took_s=took_s, expect=422)


def test_a_fetch_that_asks_is_told_how_many_tasks_are_left(door):
    for n in range(4):
        door.submit(args={"n": n})
    door.submit(args={"n": 9, "m": 0})
    door.submit(args={"n": 4}, task_name="x")

    def left(**fields):
        return door("POST", "tasks/next", dict(fields, heartbeat_timeout=60, required_fields=["n"], left=True)).get("left")
    assert left() == 4 and left(extra_filter={"task_name": "x"}) == 0 and left(extra_filter={"args.n": {"$lt": 9}}) == 2
    assert "left" not in door("POST", "tasks/next", {"heartbeat_timeout": 60, "required_fields": ["n"]})
    assert left() == 0 and left() is None
    door.submit(args={"n": 1}, retry_delay=100)
    door.report(door.fetch(), "failed")
    door.submit(args={"n": 2})
    assert left(extra_filter={"args.n": 2}) == 0 and door.submit(args={"n": 2}) and left() == 1, "one has a pause"


def test_the_worker_of_a_loop_that_has_ended_says_so_until_it_works_again(door):
    worker_id = door.worker()

    def ended_at():
        return door("POST", "workers/search", {"worker_id": worker_id})["content"][0]["ended_at"]
    assert ended_at() is None
    for again in (lambda: door("POST", "workers/%s/status" % worker_id, {"status": "active"}),
                  lambda: door.fetch(worker_id=worker_id)):
        door("POST", "workers/%s/status" % worker_id, {"status": "suspended"})
        door("POST", "workers/%s/status" % worker_id, {"status": "ended"})
        assert ended_at() and door("GET", "workers/" + worker_id)["status"] == "suspended"
        assert not door("POST", "workers/search", {"extra_filter": {"ended_at": None}})["content"]
        door("POST", "workers/%s/status" % worker_id, {"status": "active"})
        door("POST", "workers/%s/status" % worker_id, {"status": "ended"})
        door.submit()
        again()
        assert ended_at() is None


def test_what_happens_to_a_task_after_a_run_is_no_end_of_that_run(door):
    task_id = door.submit()
    door.report(door.fetch(attempt={"host": "here"}), "failed", attempt={"exit_code": 1})
    attempts = door.task(task_id)["attempts"]
    door.report(task_id, "cancelled", reason="not wanted")
    assert door.task(task_id)["status"] == "cancelled" and door.task(task_id)["attempts"] == attempts


def test_attempts_are_kept_where_a_worker_tells_of_them_and_only_there(door):
    task_id = door.submit()
    door.report(door.fetch(), "failed", attempt={"exit_code": 1})
    assert door.task(task_id)["attempts"] == []
    run = door.fetch(attempt={"host": "h", "log": "/{task_id}/{run_id}"})
    assert run["attempts"][0]["log"] == "/%s/%s" % (task_id, run["run_id"])
    door.report(run, "failed", attempt={"exit_code": 1, "reason": "no luck"})
    door.report(run, "failed", attempt={"more": 2})
    attempt, = door.task(task_id)["attempts"]
    assert (attempt["status"], attempt["exit_code"], attempt["reason"], attempt["more"]) == ("failed", 1, "no luck", 2)
    door.report(door.fetch(), "success", attempt={"exit_code": 0})
    assert [a["exit_code"] for a in door.task(task_id)["attempts"]] == [1], "that run's worker had told nothing"


def test_a_submission_says_which_commit_it_was_and_that_makes_it_no_other(door):
    task_id = door.submit(task_id="6f1c1e9e-5a0e-4b7c-8a51-0f6d3c6f9b11", git="0123abcd-dirty")
    assert door.submit(task_id=task_id, git="4567abcd") == task_id and door.task(task_id)["git"] == "0123abcd-dirty"
    door("POST", "tasks", {"args": {"a": 1}, "git": "; rm"}, expect=422)


def test_a_late_report_is_refused_once_the_task_was_taken(door):
    door.submit()
    first = door.fetch(heartbeat_timeout=5)
    door.later(10)
    second = door.fetch()
    assert second["task_id"] == first["task_id"] and second["run_id"] != first["run_id"]
    door.report(first, "success", expect=409)
    assert door.task(first["task_id"])["status"] == "running"


@pytest.mark.parametrize("status", ["success", "failed", "pending", "cancelled"])
def test_the_repeat_of_a_report_is_taken_and_changes_nothing(door, status):
    task_id = door.submit()
    task = door.fetch()
    door.report(task, status, summary={"k": 1})
    once = door.task(task_id)
    door.report(task, status, summary={"k": 1})
    twice = door.task(task_id)
    assert {k: v for k, v in once.items() if k != "last_modified"} == {k: v for k, v in twice.items() if k != "last_modified"}


def test_other_reports_on_a_run_that_ended_are_refused(door):
    door.submit(max_retries=5)
    for end, other in (("success", "failed"), ("failed", "success"), ("pending", "success"), ("cancelled", "success"),
                       ("cancelled", "failed")):
        door.submit(max_retries=5, priority=9)
        task = door.fetch()
        door.report(task, end)
        door.report(task, other, expect=409)
        door.report(task["task_id"], "cancelled")


def test_the_same_fetch_id_gets_the_same_task(door):
    for _ in range(2):
        door.submit()
    worker_id, other = door.worker(), door.worker()
    first = door.fetch(worker_id=worker_id, fetch_id="f1")
    assert door.fetch(worker_id=worker_id, fetch_id="f1")["run_id"] == first["run_id"]
    assert door.fetch(worker_id=other, fetch_id="f1")["task_id"] != first["task_id"]


def test_the_same_submission_again_is_the_same_task_and_another_is_a_conflict(door):
    made = L.new_id()
    assert door.submit(task_id=made, args={"a": 1}) == made
    assert door.submit(task_id=made, args={"a": 1}) == made
    door.update(made, args={"a": 2})
    assert door.submit(task_id=made, args={"a": 1}) == made
    door("POST", "tasks", {"task_id": made, "args": {"a": 3}}, expect=409)
    assert len(door("POST", "tasks/search", {})["content"]) == 1


def test_a_list_is_one_transaction(door, tmp_path):
    door.submit()
    lines = (tmp_path / "journal.jsonl").read_text().count("\n")
    ids = door("POST", "tasks", [{"args": {"i": i}} for i in range(100)])["task_ids"]
    assert len(set(ids)) == 100 and (tmp_path / "journal.jsonl").read_text().count("\n") == lines + 1
    door("POST", "tasks", [{"args": {"i": 1}}, {"args": {"$bad": 1}}], expect=422)
    assert len(door("POST", "tasks/search", {"limit": 1000})["content"]) == 101


def in_tables(folder):
    """Return how many tasks of a journal were submitted as rows of tables."""
    return sum(len(change[3]) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]
               for change in json.loads(line).get("changes", ()) if change[0] == "tasks")


def submissions(random, ids):
    """Return a list of submissions of which many are alike; `ids`: those of tasks to wait for, or to submit again."""
    forms = [{}, {"priority": 1}, {"metadata": {"n": 1}}, {"metadata": {"n": True}}, {"metadata": {"n": 1.0, "tags": ["a"]}},
             {"stop": "asha:loss:min"}, {"cmd": ["a", "b"]}, {"git": "abcdef1"}, {"after": ids[:1]}, {"after_any": ids[:2]}]
    keys = [("a",), ("a", "b"), ("b", "a"), ("a.b",), ()]
    values = [1, True, 1.0, None, "0", [1, 2], [{"x": 1}], {"x": 1}, {}]
    made = []
    while len(made) < 30:
        form, names = random.choice(forms), random.choice(keys)
        for _ in range(random.choice((1, 1, 2, 5))):
            made.append(dict(form, args={name: random.choice(values) for name in names}))
            if random.random() < 0.5:
                made[-1]["task_id"] = random.choice(ids) if random.random() < 0.1 else L.new_id()
    return [one for one in made if one["args"] or one.get("cmd")]


@pytest.mark.parametrize("seed", range(40))
def test_a_table_of_tasks_is_what_the_single_tasks_are(tmp_path, clock, monkeypatch, seed):
    counter = itertools.count()
    monkeypatch.setattr(L, "new_id", lambda: L.as_uuid("%032x" % (next(counter) * 0x9E3779B97F4A7C15 % 2 ** 128)))
    dice, seen = random.Random(seed), []
    first = [{"args": {"a": 0}, "task_id": L.new_id()} for _ in range(3)]
    lists = [submissions(dice, [one["task_id"] for one in first]) for _ in range(4)]
    lists[2] += [dict(one, retries=0) for one in lists[1] if "task_id" in one]  # the same once more
    for is_table in (True, False):
        counter, clock.day, clock.mono = itertools.count(1 << 20), 1.7e9, 1000.0
        folder = tmp_path / str(is_table)
        folder.mkdir()
        with monkeypatch.context() as only:
            if not is_table:
                only.setattr(L, "_form", lambda submission: None)
            door = Door(folder, clock)
            answers = [L.answer_call(door.store, lambda: door.queue, "POST", "/api/v1/queues/me/tasks", one)
                       for one in [first] + lists]
            last = door.fetch()
            again = Door(folder, clock)
            again("GET", "/api/v1/queues/me")
            states = [repr((sorted(one.state().items()), [
                [type(task.created_at) for task in queue.tasks.values()] for queue in one.store.state.queues.values()]))
                      for one in (door, again)]
            events = [[tuple(event)[:6] + (repr(event.record),) for event in one.store.file.replica.events]
                      for one in (door, again)]
            assert states[0] == states[1] and events[0] == events[1] and bool(in_tables(folder)) == is_table
            seen.append(repr((answers, states[0], events[0], last)))
    assert seen[0] == seen[1]


def rows_of(tasks):
    """Return a list of submissions of one form as the body of tasks/rows."""
    rest = {name: value for name, value in tasks[0].items() if name not in ("args", "task_id")}
    body = dict(rest, args=list(tasks[0]["args"]), rows=[list(one["args"].values()) for one in tasks])
    return dict(body, task_ids=[one["task_id"] for one in tasks]) if "task_id" in tasks[0] else body


def alike(random, ids):
    """Return a list of submissions of one form, some of them wrong or there already."""
    odd = random.choice((0, 0, 0, 1, 2))  # how often something is wrong
    forms = [{}, {"priority": 1}, {"metadata": {"n": 1.0, "a.b": [1]}}, {"stop": "asha:loss:min"}, {"cmd": ["a", "b"]}, {"after": ids[:1]}, {"retries": 3}]
    wrong = [{"priority": "x"}, {"metadata": {"a b": 1}}, {"stop": "asha"}, {"after": ["nosuch"]}, {"task_name": "a b", "max_retries": -1}]
    names = random.choice([("a",), ("b", "a"), ("a", "c-d"), ("a.b", "c")] + [("a b",), ("a", "a.b"), ("$a", "b"), ()] * odd)
    values = [1, True, 1.0, float("nan"), None, "0", [1, 2], [[]]] + [[{"x": 1}], {"x.y": 1}, {}, [{"x.y": 1}]] * random.randrange(2)
    values += [{"a b": 1}, {"a": 1, "a.b": 2}] if odd > 1 else []
    form = dict(random.choice(forms), **random.choice([{}] + wrong * odd))
    made = [dict(form, args={name: random.choice(values) for name in names}) for _ in range(random.choice((1, 2, 5, 9)))]
    if random.random() < 0.6:
        made = [dict(one, task_id=L.new_id() if random.random() < 0.9 else random.choice(ids + ["a/b"] * odd)) for one in made]
        made += random.choices(made, k=random.choice((0, 0, 2)))
    return made


def as_of_rows(answer):
    """Return the answer to a list, with places of errors as in that to rows where all tasks have the same fields."""
    status, answer = answer
    return status, answer if status < 400 or isinstance(answer["detail"], str) else [
        [[{"task_ids": "task_id"}.get(part, part) for part in row["loc"] if type(part) is not int], row["msg"]] for row in answer["detail"]]


@pytest.mark.parametrize("seed", range(40))
def test_rows_do_what_the_list_does_that_they_stand_for(tmp_path, clock, monkeypatch, seed):
    counter = itertools.count()
    monkeypatch.setattr(L, "new_id", lambda: L.as_uuid("%032x" % (next(counter) * 0x9E3779B97F4A7C15 % 2 ** 128)))
    dice, seen = random.Random(seed), []
    first = [{"args": {"a": 0}, "task_id": L.new_id()} for _ in range(3)]
    lists = [first] + [alike(dice, [one["task_id"] for one in first]) for _ in range(8)]
    lists += dice.choices(lists, k=3)
    for is_rows in (True, False):
        counter, clock.day, clock.mono = itertools.count(1 << 20), 1.7e9, 1000.0
        folder = tmp_path / str(is_rows)
        folder.mkdir()
        door = Door(folder, clock)

        def submit(tasks, in_rows):
            body = L.parse_json(json.dumps(rows_of(tasks) if in_rows else tasks))
            return as_of_rows(L.answer_call(door.store, lambda: door.queue, "POST", "/api/v1/queues/me/tasks" + "/rows" * in_rows, body))
        answers = [submit(one, is_rows) for one in lists]
        for tasks, answer in zip(lists, answers):
            if answer[0] == 201 and "task_id" in tasks[0]:
                assert submit(tasks, not is_rows) == answer  # the same once more, the other way
        again = Door(folder, clock)
        again("GET", "/api/v1/queues/me")
        states = [repr(sorted(one.state().items())) for one in (door, again)]
        assert states[0] == states[1]
        seen.append((answers, states[0]))
    for one, by_rows, by_list in zip(lists, seen[0][0], seen[1][0]):
        assert by_rows == by_list, one
    assert seen[0][1] == seen[1][1]


def test_the_tasks_of_a_table_are_found_again_by_the_content_of_each(door, tmp_path):
    ids = [L.new_id() for _ in range(4)]
    tasks = [{"task_id": one, "args": {"lr": place, "b": "x"}, "metadata": {"n": 0}} for place, one in enumerate(ids)]
    assert door("POST", "tasks", tasks)["task_ids"] == ids and in_tables(tmp_path) == 4
    assert door("POST", "tasks", tasks[1:])["task_ids"] == ids[1:]
    assert door.submit(**tasks[2]) == ids[2]
    assert "other content" in door("POST", "tasks", dict(tasks[2], args={"lr": 2.0, "b": "x"}), expect=409)["detail"]
    lines = (tmp_path / "journal.jsonl").read_text()
    for change in ({"args": {"lr": True, "b": "x"}}, {"metadata": {"n": False}}, {"task_name": "other"}):
        door("POST", "tasks", [{"args": {"lr": 7, "b": "x"}}, dict(tasks[1], **change)], expect=409)
    door("POST", "tasks", [dict(tasks[0], task_id=None), {"args": {}}], expect=400)
    assert (tmp_path / "journal.jsonl").read_text() == lines  # all or none
    assert [door.fetch()["args"]["lr"] for _ in ids] == [0, 1, 2, 3]


def test_an_id_twice_in_a_list_is_one_task_or_a_conflict_also_in_tables(door, tmp_path):
    ids = [L.new_id() for _ in range(4)]
    tasks = [{"task_id": one, "args": {"lr": place}} for place, one in enumerate(ids)]
    urgent = [dict(one, priority=1) for one in tasks]
    for wrong in (tasks[:2] + [dict(tasks[1], args={"lr": 7})], tasks[:2] + urgent[1:3], tasks[:2] + urgent[2:] + [urgent[0]]):
        door("POST", "tasks", wrong, expect=409)
    assert door("POST", "tasks", tasks[:2] + urgent[2:] + tasks[1::-1])["task_ids"] == ids and in_tables(tmp_path) == 4
    assert [task["task_id"] for task in door("POST", "tasks/search", {"sort": [["created_at", 1]]})["content"]] == ids


def test_the_rows_of_a_table_are_waited_for_and_reach_fetches_that_wait(door, tmp_path):
    ids = [L.new_id() for _ in range(3)]
    door.submit(args={"b": 1}, priority=9)
    assert door.fetch(required_fields=["b"], extra_filter={"args.b": 1}) and not door.fetch(extra_filter={"args.a": 2})
    tasks = [{"task_id": one, "args": {"a": place}} for place, one in enumerate(ids)]
    child = door("POST", "tasks", tasks + [{"args": {"a": 3}, "after": ids[:1]}])["task_ids"][3]
    assert in_tables(tmp_path) == 3 and door.task(child)["status"] == "pending"
    assert door.fetch(extra_filter={"args.a": 2})["task_id"] == ids[2]
    door("DELETE", "tasks/" + ids[0])
    assert door.task(child)["status"] == "cancelled"


def test_handing_back_charges_no_retry_and_ends_after_a_hundred_times(door):
    task_id = door.submit()
    for count in range(1, L.MAX_INTERRUPTIONS):
        door.report(door.fetch(), "pending", reason="SIGTERM")
        found = door.task(task_id)
        assert (found["status"], found["retries"], found["interruptions"], found["reason"]) == ("pending", 0, count, "SIGTERM")
    door.report(door.fetch(), "pending", reason="SIGTERM")
    assert door.task(task_id)["status"] == "failed"


def test_a_worker_that_registers_again_with_its_id_and_name_is_the_one_that_is_there(door):
    worker_id = L.new_id()
    for _ in range(2):
        assert door("POST", "workers", {"worker_id": worker_id, "worker_name": "gpu1"}, expect=201) == {"worker_id": worker_id}
    assert "with another name" in door("POST", "workers", {"worker_id": worker_id, "worker_name": "gpu2"}, expect=409)["detail"]
    assert [worker["worker_name"] for worker in door("POST", "workers/search", {})["content"]] == ["gpu1"]


def test_what_is_left_of_a_queue_whose_creation_is_lost_has_a_name_made_of_its_id():
    state = L.State()
    for task_id in ("one", "two"):
        state.apply("x", [["task", task_id, {"created_at": 5.0}, "created"]])
    assert state.names == {"recovered-x": "x"} and sorted(state.queues["x"].tasks) == ["one", "two"]


def test_a_worker_is_crashed_at_its_max_retries_and_gets_tasks_again_once_active(door):
    worker_id = door.worker(max_retries=2)
    door.submit(max_retries=10)
    for state in ("active", "crashed"):
        door.report(door.fetch(worker_id=worker_id), "failed", worker_id=worker_id)
        assert door("GET", "workers/" + worker_id)["status"] == state
    assert "crashed" in door("POST", "tasks/next", {"worker_id": worker_id}, expect=403)["detail"]
    door("POST", "workers/%s/status" % worker_id, {"status": "active"})
    assert door("GET", "workers/" + worker_id)["retries"] == 0
    assert door.fetch(worker_id=worker_id)


@pytest.mark.parametrize("state, wanted", list(itertools.product(L.WORKER_STATES, L.WORKER_STATES)))
def test_worker_reports_over_the_product_of_states(door, state, wanted):
    worker_id = door.worker()
    if state != "active":
        door("POST", "workers/%s/status" % worker_id, {"status": state})
    allowed = {"active": {"active", "suspended", "crashed"}, "suspended": {"active"}, "crashed": {"active", "crashed"}}
    fine = wanted in allowed[state]
    answer = door("POST", "workers/%s/status" % worker_id, {"status": wanted}, expect=200 if fine else 400)
    assert fine or "InvalidStateTransition" in answer["detail"]


def test_the_tasks_side_counts_when_the_worker_is_suspended_or_gone(door):
    for last in ("suspended", "deleted"):
        worker_id = door.worker()
        task_id = door.submit(priority=1)
        task = door.fetch(worker_id=worker_id)
        if last == "deleted":
            door("DELETE", "workers/" + worker_id)
        else:
            door("POST", "workers/%s/status" % worker_id, {"status": last})
        door.report(task, "failed")
        assert door.task(task_id)["retries"] == 1
        door.report(task_id, "cancelled")


def test_a_report_by_another_worker_is_refused(door):
    worker_id, other = door.worker(), door.worker()
    task_id = door.submit()
    door.fetch(worker_id=worker_id)
    door.report(task_id, "success", worker_id=other, expect=409)
    door("POST", "tasks/%s/heartbeat" % task_id, query={"worker_id": other}, expect=403)
    door.report(task_id, "success", worker_id=worker_id)


def test_a_heartbeat_that_asks_is_told_what_became_of_the_task(door):
    task_id = door.submit()
    task = door.fetch()
    def beat():
        return door("POST", "tasks/%s/heartbeat" % task_id, query={"run_id": task["run_id"], "answer": "status"})
    assert beat() == {"status": "running"}
    door.update(task_id, status="cancelled")
    assert beat() == {"status": "cancelled"}
    door("POST", "tasks/%s/heartbeat" % task_id, expect=404)


def test_two_stores_on_one_file_see_each_others_work(door, tmp_path, clock):
    other = Door(tmp_path, clock)
    task_id = door.submit()
    task = other.fetch()
    assert task["task_id"] == task_id and door.task(task_id)["status"] == "running"
    assert door.fetch() is None
    other.report(task, "success")
    assert door.task(task_id)["status"] == "success"
    door.task(task_id)


FILTERS = [None, {"args.a": {"$gt": 3}}, {"metadata.tags": "x"}, {"$or": [{"args.b": 1}, {"retries": {"$gt": 0}}]}]
REQUIRED = [[], ["a"], ["a", "*"], ["a", "b"], ["b"]]


def slow_choice(tasks, required, predicate):
    """Return the id of the task to be fetched next, by looking at all of them."""
    found = [(-t.priority, t.last_modified, t.created_at, t.task_id) for t in tasks
             if t.status == "pending" and L.covers(required, L.paths_of(t.args)) and (not predicate or predicate(t))]
    return min(found)[3] if found else None


@pytest.mark.parametrize("seed", range(8))
def test_fetching_by_the_indexes_is_fetching_by_looking_at_all(door, seed):
    dice = random.Random(seed)
    ids = []
    for step in range(250):
        act = dice.random()
        if act < 0.4 or not ids:
            args = {key: dice.randrange(8) for key in ("a", "b", "c") if dice.random() < 0.6} or {"a": 1}
            ids.append(door.submit(args=args, priority=dice.randrange(3), metadata={"tags": ["x"]} if step % 2 else None))
        elif act < 0.5:
            door.update(dice.choice(ids), reset=dice.random() < 0.5, priority=dice.randrange(3), args={"a": dice.randrange(8)})
        elif act < 0.55:
            gone = ids.pop(dice.randrange(len(ids)))
            door("DELETE", "tasks/" + gone)
        else:
            query, required = dice.choice(FILTERS), dice.choice(REQUIRED)
            queue = next(iter(door.store.state.queues.values()))
            predicate = query and L.compile_query(query, L.TASK_FIELDS)
            expected = slow_choice(queue.tasks.values(), required, predicate)
            task = door.fetch(required_fields=required, extra_filter=query)
            assert (task and task["task_id"]) == expected
            if task and dice.random() < 0.8:
                door.report(task, dice.choice(["success", "failed", "pending", "failed"]))


def test_a_failed_write_leaves_memory_as_the_file_is(door, tmp_path, clock):
    task_id = door.submit()
    first = door.state()

    class Full(L.Disk):
        write = staticmethod(lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    door.store.journal.file.disk = Full
    assert "No space left" in door("POST", "tasks", {"args": {"a": 2}}, expect=507)["detail"]
    door("POST", "tasks/next", {}, expect=507)
    door("DELETE", "tasks/" + task_id, expect=507)
    assert door.state() == first
    door.store.journal.file.disk = L.Disk
    assert door.fetch()["task_id"] == task_id


def test_every_journal_record_kind_is_documented_and_written(door, tmp_path):
    worker_id = door.worker()
    task_id = door.submit()
    door.report(door.fetch(), "running", step=1)
    door("POST", "tasks", [{"args": {"a": 1}}, {"args": {"a": 2}}])
    door("DELETE", "tasks/" + task_id)
    door("DELETE", "workers/" + worker_id)
    door("DELETE", "/api/v1/queues/me")
    kinds = {change[0] for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:]
             for change in json.loads(line).get("changes", ())}
    assert kinds == set(L.RECORDS) and all(row.meaning for row in L.RECORDS.values())


def test_listing_writes_no_file_also_where_a_runs_beats_are_missing(door, tmp_path):
    door.submit()
    task = door.fetch()
    beat = tmp_path / "beats" / task["run_id"]
    beat.unlink()
    door("POST", "tasks/search", {})
    assert not beat.exists()
    door.later(5)
    assert beat.exists() and door.task(task["task_id"])["status"] == "running"


def pending_of(door):
    return door.store.state.queues[door.store.state.names[L.DEFAULT_QUEUE]].pending


def test_a_shape_of_args_goes_with_its_last_task_and_takes_its_heap_along(door):
    keep = door.submit(args={"kept": 1})
    pending = pending_of(door)
    before = len(pending.heaps), len(pending.counts), pending.paths
    ids = [door.submit(args={"run_%d" % i: {"x": 1, "y": i}, "z": 2}) for i in range(30)]
    assert len(pending.heaps) == 31
    for task_id in ids[:10]:
        door("DELETE", "tasks/" + task_id)
    for task_id in ids[10:20]:
        door.update(task_id, status="cancelled")
    for _ in range(10):
        door.report(door.fetch(required_fields=["*", "z"]), "success")
    assert (len(pending.heaps), len(pending.counts), pending.paths) == before
    assert door.fetch()["task_id"] == keep and not pending.heaps and pending.paths == 0


def test_heaps_hold_no_more_than_is_alive_a_few_times_over(door):
    kept = [door.submit(args={"a": 1}, priority=9) for _ in range(3)]
    pending = pending_of(door)
    for _ in range(60):
        door("DELETE", "tasks/" + door.submit(args={"a": 2}, priority=-1))
        door.update(kept[0], metadata={"x": 1})
        assert door.fetch(required_fields=["b"], extra_filter={"args.a": {"$gt": 0}}) is None
    for heap in list(pending.heaps.values()) + [asked.heap for asked in pending.standing.values()]:
        assert len(heap) <= 100 + 3 * len(kept)


@pytest.mark.parametrize("few", [0, 10, 10 ** 6])
def test_fetches_find_the_same_task_among_few_shapes_and_among_many(door, monkeypatch, few):
    """Beyond FEW_PATHS a fetch by fields alone is kept current as one by a filter is."""
    monkeypatch.setattr(L, "FEW_PATHS", few)
    ids = [door.submit(args={"i": i, "only_%d" % (i % 7): 1}, priority=i % 3) for i in range(40)]
    wanted = sorted(range(40), key=lambda i: (-(i % 3), i))
    assert [door.fetch(required_fields=["i", "only_3"])["task_id"] for _ in range(5)] == [ids[i] for i in wanted if i % 7 == 3][:5]
    late = door.submit(args={"i": 99, "only_3": 1}, priority=5)
    assert door.fetch(required_fields=["i", "only_3"])["task_id"] == late
    assert door.fetch(required_fields=["only_3"]) is None
    assert door.fetch(required_fields=["*"])["task_id"] == [ids[i] for i in wanted if i % 7 != 3 or i not in wanted][0]
    assert (few >= 10 ** 6) == (not pending_of(door).standing)


def test_a_fetch_is_quick_while_its_standing_request_has_few_entries_to_read(door, monkeypatch):
    monkeypatch.setattr(L, "_QUICK_ENTRIES", 5)
    door.submit(args={"a": 1})
    assert door.fetch(extra_filter={"args.a": {"$gt": 5}}) is None
    ((required, text), standing), = pending_of(door).standing.items()
    for _ in range(3):
        for is_quick in (True,) * 6 + (False,):
            assert pending_of(door).is_quick(required, text) is is_quick
            door.submit(args={"a": 2})
        assert door.fetch(extra_filter={"args.a": {"$gt": 5}}) is None


def test_a_filter_that_requires_several_values_reads_the_log_of_a_field_that_has_logs(door, monkeypatch):
    monkeypatch.setattr(L, "FEW_PATHS", 0)
    door.submit(args={"a": 1, "b": 1})
    for query in ({"args.b": 5}, {"args.a": 5, "args.b": 6}, {"args.b": 7, "args.a": 6}):
        assert door.fetch(extra_filter=query) is None
    assert list(pending_of(door).routes) == ["args.b"]


WANTED = [  # filters in turn: of one value, of several, of none
    {"args.a": 1}, {"args.a": 2}, {"args.a": "1"}, {"args.a": True}, {"args.a": {"$eq": 1.0}}, {"args.a": {"$in": [2]}},
    {"args.a": {"$in": [1, 2]}}, {"args.a": None}, {"args.a": [1]}, {"args.a": {"$gt": 0}}, {"args.a.b": 1}, {"args.a.0": 1},
    {"args.a": {"b": 1}}, {"$and": [{"args.a": 1}, {"args.c": 2}]}, {"$and": [{"args.c": 2}, {"args.a": {"$gt": 0}}]},
    {"$or": [{"args.a": 1}, {"args.c": 2}]}, {"task_name": "n"}, {"metadata.tags": "x"}, {"status": "pending"}, {"_id": "none"}]
VALUES = [1, 2, 1.0, True, "1", None, [1], [1, 2, 1], [], [[1]], {"b": 1}, [{"b": 1}, {"b": [1, 2]}], [3, {"b": 1}]]


@pytest.mark.parametrize("most", [("_MAX_LOG", 6), ("MAX_STANDING", 3), ("_MAX_ROUTES", 1), ("FEW_PATHS", 0), ("UNUSED_S", 1800.0)])
@pytest.mark.parametrize("seed", range(2))
def test_many_filters_in_turn_find_what_a_search_of_all_tasks_finds(door, clock, monkeypatch, most, seed):
    """Whatever of their logs and indexes is dropped meanwhile."""
    monkeypatch.setattr(L, *most)
    dice, pending, fetched = random.Random(seed), pending_of(door) if door.submit() else None, 0
    for _ in range(150):
        for _ in range(dice.randrange(3)):
            door.submit(args={key: dice.choice(VALUES) for key in "ac" if dice.random() < 0.8}, priority=dice.randrange(3), cmd="true",
                        task_name=dice.choice(["n", None]), metadata=dice.choice([{}, {"tags": ["x", "y"]}]))
        left = door("POST", "tasks/search", {"status": "pending"})["content"]
        if left and dice.random() < 0.3:
            door.update(dice.choice(left)["task_id"], priority=dice.randrange(3), args={"a": dice.choice(VALUES)})
        query, required = dice.choice(WANTED), dice.choice([["a", "c"], ["a"], ["*", "a"], ["a.b", "c"], []])
        found = door("POST", "tasks/search", {"status": "pending", "extra_filter": query})["content"]
        fits = [task for task in found if L.covers(tuple(required), L.paths_of(task["args"]))]
        task = door.fetch(extra_filter=query, required_fields=required)
        fetched += task is not None
        wanted = min(fits, key=lambda task: (-task["priority"], task["last_modified"], task["created_at"]), default=None)
        assert (task and task["task_id"]) == (wanted and wanted["task_id"]), (query, required)
        held = [pending.log] + [log for _, logs in pending.routes.values() for log in logs.values()]
        assert pending.logged == sum(len(log.entries) for log in held) <= L._MAX_LOG
        assert len(pending.standing) == sum(log.readers for log in held) <= L.MAX_STANDING
        assert pending.held_bytes == sum(asked.held_bytes for asked in pending.standing.values())
        assert all(log.readers for log in held[1:]) and len(pending.routes) <= L._MAX_ROUTES
        clock.pass_s(0.01)
    assert fetched > 30
    pending.forget(lambda standing: True)
    assert not pending.standing and not pending.routes and pending.logged == pending.held_bytes == 0


def test_a_filter_that_requires_a_value_reads_only_the_tasks_that_have_it(door):
    for n in range(20):
        assert door.fetch(extra_filter="args.project == 'p' and args.owner == %d" % n) is None
    logs, pending = {}, pending_of(door)
    for n in range(20):
        door.submit(args={"project": "p", "owner": n})
    for field, (_, found) in pending.routes.items():
        logs.update({(field, value): len(log.entries) for value, log in found.items()})
    assert sorted(logs.values()) == [1] * 19 + [20] and not pending.log.entries, "the first one had no field to choose"
    assert [door.fetch(extra_filter="args.project == 'p' and args.owner == %d" % n)["args"]["owner"] for n in range(20)] == list(range(20))


def test_a_fetch_by_all_fields_examines_no_tasks_of_other_shapes(door, monkeypatch):
    monkeypatch.setattr(L, "FEW_PATHS", 20)
    ids = [door.submit(args={"i": i, "n": {"x": 1, "only_%d" % i: 1}} if i % 2 else {"i": i, "only_%d" % i: 1}) for i in range(10)]
    examined = []
    monkeypatch.setattr(L, "takes", lambda required, shape: examined.append(shape) or L.covers(required, shape))
    assert door.fetch(required_fields=["i", "only_4"])["task_id"] == ids[4] and len(examined) == 1
    assert door.fetch(required_fields=["i", "n.x", "n.only_3"])["task_id"] == ids[3] and len(examined) == 6
    assert door.fetch(required_fields=["i", "n"])["task_id"] == ids[1]
    assert door.fetch(required_fields=["i", "only_5"]) is None and not pending_of(door).standing


def test_what_fetches_asked_for_is_dropped_when_nobody_asks_any_more(door, clock):
    door.submit(args={"a": 1})
    for n in range(3):
        assert door.fetch(extra_filter={"args.a": {"$gt": 5 + n}}) is None
        clock.pass_s(L.UNUSED_S / 2 - 1)
    door.submit(args={"a": 2})
    pending = pending_of(door)
    assert len(pending.standing) == 3 and pending.logged
    door.store.forget_unused()
    assert len(pending.standing) == 1 or len(pending.standing) == 2
    clock.pass_s(L.UNUSED_S * 2)
    door.store.forget_unused()
    assert not pending.standing and not pending.logged
    assert door.fetch(extra_filter={"args.a": 2})["args"] == {"a": 2}


def test_what_is_remembered_is_bounded_in_bytes(door, monkeypatch):
    monkeypatch.setattr(door.store.filters, "most_bytes", 100000)
    monkeypatch.setattr(L._TAKEN, "most_bytes", 20000)
    monkeypatch.setattr(L._SHAPES, "most_bytes", 20000)
    for n in range(50):
        door.submit(args={"x%d" % n + "y" * 500: 1})
        door("POST", "tasks/search", {"extra_filter": {"args.a": {"$in": list(range(n, n + 100))}}})
        assert door.fetch(required_fields=["n%d" % n + "z" * 500]) is None
        for held in (door.store.filters, L._TAKEN, L._SHAPES, pending_of(door).taking):
            assert held.held_bytes <= held.most_bytes
    assert len(door.store.filters) < 10 and len(L._SHAPES) < 20 and len(L._TAKEN) < 20
    big = {"extra_filter": {"args.a": {"$in": list(range(100000))}}}
    before = len(door.store.filters)
    door("POST", "tasks/search", big)
    assert len(door.store.filters) <= before


def test_standing_requests_of_all_queues_are_bounded_together(door, monkeypatch):
    door.submit(args={"a": 1})
    monkeypatch.setattr(L, "STANDING_BYTES", 100000)
    monkeypatch.setattr(L, "FEW_PATHS", 0)
    pending = pending_of(door)
    for n in range(40):
        request = {"required_fields": ["f%d" % n], "extra_filter": {"args.a": {"$in": list(range(n, n + 60))}}}
        call = L.read_call(door.store, door.queue, *L.find_route("POST", "/api/v1/queues/me/tasks/next"), dict(request, heartbeat_timeout=9), {})
        door.store.stand(door.queue, call.request)
        assert pending.is_quick(("f%d" % n,), call.request["filter_text"]), "the latest one stays"
        assert sum(asked.weight_bytes() for asked in pending.standing.values()) <= 100000
    assert len(pending.standing) < 10


@pytest.mark.parametrize("fields", [["a%d" % i for i in range(1001)], ["a" * 20001], ["a" * 50] * 900])
def test_what_a_fetch_asks_for_has_a_bound(door, fields):
    door("POST", "tasks/next", {"required_fields": fields, "heartbeat_timeout": 9}, expect=422)
    door("POST", "tasks/next", {"extra_filter": {"args.a": {"$in": list(range(60000))}}, "heartbeat_timeout": 9}, expect=413)


def test_a_reset_task_tells_no_more_of_the_run_that_failed(door):
    """Its attempts do; and what else its summary has stays."""
    task_id = door.submit(max_retries=1)
    door.report(door.fetch(attempt={"host": "h"}), "failed", summary={"acc": 1, "labtasker_error": "exit code 3"},
                attempt={"reason": "exit code 3"})
    door.update(task_id, reset=True, summary={"labtasker_exception": {"type": "E"}, "b": 2})
    task = door.task(task_id)
    assert (task["status"], task["summary"], task["retries"]) == ("pending", {"acc": 1, "b": 2}, 0)
    assert task["attempts"][-1]["reason"] == "exit code 3"
    door.report(door.fetch(), "pending", reason="preempted")
    door.update(task_id, reset=True)
    assert door.task(task_id)["reason"] is None


# ---- A report that comes with the next fetch


def both(door, task, status, expect=None, **fields):
    """Report on a fetched task and fetch the next one with the same request."""
    report = {"task_id": task["task_id"], "run_id": task["run_id"], "status": status, **fields.pop("report", {})}
    return door("POST", "tasks/next", dict({"heartbeat_timeout": 60, "fetch_id": L.new_id()}, report=report, **fields), expect=expect)


def test_a_report_comes_with_the_next_fetch_on_one_line(door, tmp_path):
    first, second = door.submit(), door.submit(args={"a": 2})
    task = door("POST", "tasks/next", {"heartbeat_timeout": 60})
    assert task["report"] is None, "which says that a report may come with the next fetch"
    lines = len((tmp_path / "journal.jsonl").read_bytes().splitlines())
    answer = both(door, task["task"], "success", report={"summary": {"loss": 1}})
    assert answer["report"] == {"go": False, "status": "success", "reason": None} and answer["task"]["task_id"] == second
    assert len((tmp_path / "journal.jsonl").read_bytes().splitlines()) == lines + 1
    assert door.task(first)["status"] == "success" and door.task(first)["summary"] == {"loss": 1}
    plain = L.answer_call(door.store, lambda: door.queue, "POST", "/api/v1/queues/me/tasks/next", {"heartbeat_timeout": 60},
                          extensions=False)[1]
    assert plain == {"found": False, "task": None}
    answer = both(door, answer["task"], "failed", wait_s=60, report={"step": "first"})  # on disk now, not after the wait
    assert not answer["found"] or answer["task"]["task_id"] == second  # it failed and is to be run again
    assert answer["report"]["status"] == "pending" and "first" in answer["notification"][0]["details"]


def test_a_repeat_of_a_report_with_a_fetch_is_counted_once_and_gets_the_same_task(door):
    for n in range(3):
        door.submit(args={"a": n}, max_retries=5)
    first = door.fetch()
    request = {"fetch_id": "f"}
    answers = [both(door, first, "failed", **request) for _ in range(2)]
    assert answers[0]["task"] == answers[1]["task"] and door.task(first["task_id"])["retries"] == 1
    again = door.fetch(required_fields=["a"])  # the third; then the first once more
    assert door.fetch()["task_id"] == first["task_id"]
    assert both(door, first, "failed", **request)["task"] == answers[0]["task"], "its run is over, and was counted"
    assert door.task(first["task_id"])["status"] == "running" and door.task(first["task_id"])["retries"] == 1
    own = both(door, again, "failed", fetch_id="g", worker_id=None)
    assert own["task"]["task_id"] == again["task_id"], "nothing else is pending: the same task, another run"
    nameless = {"fetch_id": "g", "report": {"task_id": again["task_id"], "status": "failed"}, "heartbeat_timeout": 60}
    assert door("POST", "tasks/next", nameless)["task"] == own["task"] and door.task(again["task_id"])["retries"] == 1


def test_a_report_that_is_refused_gives_out_nothing(door, tmp_path):
    door.submit()
    door.submit(args={"a": 2})
    task, before = door.fetch(), None
    over = dict(task, run_id=L.new_id())
    for status, expect, report in (
            ("success", 409, {"run_id": over["run_id"]}), ("success", 409, {"task_id": "nobody"}),
            ("success", 409, {"summary": {"a": 1, "a.b": 2}}), ("done", 422, {}), ("success", 422, {"task_id": None}),
            ("success", 422, {"summary": 1})):
        before = before or (tmp_path / "journal.jsonl").read_bytes()
        detail = both(door, task, status, expect, report=report)["detail"]
        assert expect == 409 or detail[0]["loc"][:2] == ["body", "report"], detail
    assert door("POST", "tasks/next", {"heartbeat_timeout": 60, "report": {}}, expect=422)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    assert both(door, task, "success")["found"]


def test_a_report_counts_although_nothing_is_given_with_it(door):
    parent = door.submit()
    child = door.submit(args={"b": 1}, after=[parent])
    door.submit(args={"c": 1})
    task = door.fetch(required_fields=["a"])
    assert both(door, task, "success", required_fields=["b"])["task"]["task_id"] == child, "released by this very report"
    worker_id = door.worker(max_retries=1)
    task = door.fetch(worker_id=worker_id)
    answer = both(door, task, "failed", worker_id=worker_id)
    assert not answer["found"] and answer["report"]["status"] == "pending"
    assert door("GET", "workers/" + worker_id)["status"] == "crashed"
    assert "crashed" in door("POST", "tasks/next", {"worker_id": worker_id}, expect=403)["detail"]
    task = door.fetch()
    door("PUT", "/api/v1/queues/me", {"paused": True})
    answer = both(door, task, "success")
    assert answer["paused"] and not answer["found"] and door.task(task["task_id"])["status"] == "success"


def test_a_full_disk_takes_back_a_report_and_its_fetch_together(door):
    door.submit()
    door.submit(args={"a": 2})
    task, first = door.fetch(), None

    class Full(L.Disk):
        write = staticmethod(lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    first, door.store.journal.file.disk = door.state(), Full
    both(door, task, "failed", 507)
    assert door.state() == first
    door.store.journal.file.disk = L.Disk
    assert both(door, task, "failed")["found"]


def test_tasks_that_are_read_from_the_file_share_the_text_of_their_status(door, tmp_path):
    for _ in range(3):
        door.submit()
    door.report(door.fetch(), "success")
    again = Door(tmp_path, door.clock)
    again("GET", "/api/v1/queues/me")
    (queue,) = again.store.state.queues.values()
    assert {id(task.status) for task in queue.tasks.values()} == {id(status) for status in map(sys.intern, ("pending", "success"))}
