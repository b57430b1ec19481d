"""Section 3: the fields and the two state machines."""
import inspect
import itertools
import re

import pytest

import labtasker as L

TASK_TABLE = {  # what the protocol page says a status may become; summaries apart
    "created": {"pending"},
    "pending": {"running", "pending", "cancelled", "success"},  # success: late, of a run that was given up on
    "running": {"success", "failed", "pending", "cancelled"},
    "success": {"pending", "cancelled"},
    "failed": {"pending", "cancelled", "success"},  # success: as above
    "cancelled": {"pending"},
}


def test_task_moves_lead_where_the_protocol_says():
    assert {state: set(row.values()) for state, row in L.TASK_MOVES.items()} == TASK_TABLE


def test_every_state_a_move_leads_to_has_a_row():
    for moves in (L.TASK_MOVES, L.WORKER_MOVES):
        assert {state for row in moves.values() for state in row.values()} <= set(moves)


def test_a_move_that_is_not_in_the_table_is_refused():
    events = {event for row in L.TASK_MOVES.values() for event in row}
    refused = 0
    for state, event in itertools.product(L.TASK_MOVES, events):
        if event in L.TASK_MOVES[state]:
            assert L.move(L.TASK_MOVES, state, event, "task") == L.TASK_MOVES[state][event]
        else:
            refused += 1
            with pytest.raises(L.InvalidStateTransition, match="InvalidStateTransition: .*" + state):
                L.move(L.TASK_MOVES, state, event, "task")
    assert refused > 10


COVERS = [  # required fields, args, whether the fetch takes the task
    (["lr"], {"lr": 1}, True),
    (["lr"], {"lr": None}, True),
    (["lr"], {"lr": 1, "model": "a"}, False),
    (["lr", "model"], {"lr": 1}, False),
    (["lr", "*"], {"lr": 1, "model": "a"}, True),
    (["lr", "*"], {"model": "a"}, False),
    (["*"], {"model": "a"}, True),
    ([], {"model": "a"}, True),
    (["a"], {"a": {"b": 1, "c": {"d": 2}}}, True),
    (["a.b"], {"a": {"b": 1, "c": 2}}, False),
    (["a.b", "a.c"], {"a": {"b": 1, "c": 2}}, True),
    (["a.b", "*"], {"a": {"b": 1, "c": 2}}, True),
    (["a.b.c"], {"a": {"b": 1}}, False),
    (["a"], {"a": {}}, True),
    (["a.b"], {"a": {}}, False),
    (["a", "a.b"], {"a": {"b": 1, "c": 2}}, True),
]


@pytest.mark.parametrize("required, args, taken", COVERS)
def test_no_more_no_less(required, args, taken):
    assert L.covers(required, L.paths_of(args)) is taken


def test_records_have_a_field_for_each_row_of_their_table():
    for record, fields in ((L.TaskRecord, L.TASK_FIELDS), (L.WorkerRecord, L.WORKER_FIELDS), (L.QueueRecord, L.QUEUE_FIELDS)):
        assert record._fields == tuple(fields) + ("unknown",)  # the last: what a newer version wrote
        assert all(field.meaning for field in fields.values())


def test_what_takes_a_task_field_follows_from_its_row():
    rows = L.TASK_FIELDS.items()
    assert {field.submitted for _, field in rows} == {None, "set", "unflatten", "id", "note"}
    assert {field.updated for _, field in rows} == {None, "set", "merge", "move"}
    submitted = {name for name, field in rows if field.submitted}
    updated = {name for name, field in rows if field.updated}
    assert set(L.ROUTES["POST /api/v1/queues/me/tasks"].fields) == submitted
    assert set(L.ROUTES["PUT /api/v1/queues/me/tasks"].fields) == updated | {"task_id", "_id", "replace_fields"}
    assert set(L.UPDATABLE) == updated and set(L.TaskUpdateRequest.FIELDS) == updated | {"replace_fields"}
    flags = {flag: settings for flags, settings in L.COMMANDS["task submit"].options for flag in flags}
    for name, field in rows:
        for flag in (field.flag or "").split()[:-1]:
            assert flags[flag]["dest"] == name and field.submitted
    assert "--retry-delay" in flags and "retry_delay" in submitted & updated


def test_submit_task_has_the_parameters_of_labtasker_1_0_1_and_takes_what_is_new_as_keywords():
    *parameters, ours = inspect.signature(L.submit_task).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("task_name", None), ("args", None), ("metadata", None), ("cmd", None), ("heartbeat_timeout", None),
        ("task_timeout", None), ("max_retries", 3), ("priority", 0)]
    assert ours.kind is ours.VAR_KEYWORD
    assert all((p.default or None) == (L.TASK_FIELDS[p.name].default or None) for p in parameters)


def test_a_status_that_may_not_be_set_is_told_with_those_that_may():
    """In words that a person sets, not the state machine's: no event `succeed_late` is named."""
    events = {"task": L.UPDATE_EVENTS.values(), "worker": L.WORKER_EVENTS.values()}
    refused = 0
    for kind, moves in (("task", L.TASK_MOVES), ("worker", L.WORKER_MOVES)):
        for state, row in moves.items():
            for event in events[kind] if state != "created" else ():
                if event not in row:
                    with pytest.raises(L.InvalidStateTransition) as found:
                        L.move(moves, state, event, kind)
                    may = set(re.search("can be set to (.*), not to", str(found.value)).group(1).split(" or "))
                    assert may == {row[each] for each in [*events[kind], "reset"] if each in row} - {state}, (state, event)
                    assert not {"succeed", "requeue", "late", "hand"} & set(re.findall("[a-z]+", str(found.value)))
                    refused += 1
    assert refused > 5


@pytest.mark.parametrize("held, value, way_out", [
    ("a time", "2026-01-01", 'date("2026-01-01")'), ("a time", 5, 'date("1 hour ago")'), ("a number", "1.5e3", "1.5e3"),
    ("a number", "one", None), ("true or false", "True", "True"), ("true or false", 0, "False"), ("true or false", 2, None),
    ("a text", 5, '"5"'), ("a text", [5], None)])
def test_a_comparison_that_is_never_true_is_said_with_the_one_that_may_be_meant(held, value, way_out):
    said = L.never("x", held, "==", value)
    assert said.startswith("x == ") and ", and this is " in said
    assert said.partition("; write x == ")[2] == (way_out or "")
    assert L.never("x", held, "regex", "5").endswith("x is %s, and regex() is for texts" % held)
