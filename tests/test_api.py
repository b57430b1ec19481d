"""Section 6: the table of routes, what a request may hold, what bad ones get, what answers show."""
import itertools
import json

import labtasker_cli  # noqa: F401 - it enters the page into ROUTES
import pytest

import labtasker as L
from test_service import clock, door  # noqa: F401 (fixtures)

ME = "/api/v1/queues/me"


@pytest.fixture
def call(tmp_path):
    """Return a function that sends a request through the door and returns (status, answer)."""
    store = L.Store(str(tmp_path / "journal.jsonl"))

    def call(method, path, body=None, query=None, extensions=True):
        body = None if body is None else L.parse_json(json.dumps(body))
        return L.answer_call(store, lambda: L.LocalName(L.DEFAULT_QUEUE), method, path, body, query, extensions)
    return call


def test_every_route_says_what_it_does_and_its_fields_have_kinds():
    assert len(L.ROUTES) == 34
    for key, route in L.ROUTES.items():
        assert route.meaning and key.split(" ")[0] in ("GET", "POST", "PUT", "DELETE")
        for arg in list(route.fields.values()) + list(route.query.values()):
            assert arg.kind in L.KINDS


def test_every_route_can_be_found_with_an_id_in_its_path():
    for key, route in L.ROUTES.items():
        method, template = key.split(" ")
        found, ids = L.find_route(method, template.replace("{task_id}", "abc").replace("{worker_id}", "abc"))
        assert found is route and set(ids.values()) <= {"abc"} and len(ids) == template.count("{")


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/nosuch", 404), ("GET", ME + "/tasks/", 405), ("GET", ME + "/tasks", 405), ("PATCH", ME, 405), ("PUT", ME + "/tasks/x/status", 405),
    ("GET", ME + "/tasks/x/y", 404), ("GET", "", 404), ("GET", ME + "/tasks/nosuch", 404), ("GET", ME + "/workers/nosuch", 404),
])
def test_unknown_paths_and_methods(call, method, path, status):
    got, answer = call(method, path)
    if path.endswith("tasks/"):
        assert got in (404, 405)
    else:
        assert got == status
    assert isinstance(answer["detail"], str)


BAD = [  # body of a submission, the field that is named, words about it
    ({"args": 1}, "args", "an object"),
    ({"args": {"a": 1}, "task_name": "a b"}, "task_name", "letters"),
    ({"args": {"a": 1}, "task_name": ""}, "task_name", "letters"),
    ({"args": {"a": 1}, "task_name": "x" * 101}, "task_name", "100"),
    ({"args": {"a": 1}, "task_name": "a\n"}, "task_name", "letters"),
    ({"args": {"a": 1}, "priority": "high"}, "priority", "whole number"),
    ({"args": {"a": 1}, "priority": 1.5}, "priority", "whole number"),
    ({"args": {"a": 1}, "priority": True}, "priority", "whole number"),
    ({"args": {"a": 1}, "max_retries": -1}, "max_retries", "from 0"),
    ({"args": {"a": 1}, "heartbeat_timeout": 0}, "heartbeat_timeout", "over 0"),
    ({"args": {"a": 1}, "task_timeout": float("inf")}, "task_timeout", "over 0"),
    ({"args": {"a": 1}, "task_timeout": float("nan")}, "task_timeout", "over 0"),
    ({"args": {"a": 1}, "cmd": 5}, "cmd", "list of text"),
    ({"args": {"a b": 1}}, "args", "'a b'"),
    ({"args": {"$where": 1}}, "args", "$where"),
    ({"args": {".a": 1}}, "args", ".a"),
    ({"args": {"a": 1, "a.b": 2}}, "args", "'a' and 'a.b' collide"),
    ({"args": {"x": [{"a": 1, "a.b": 2}]}}, "args", "collide"),
    ({"args": {"a": 1}, "metadata": []}, "metadata", "an object"),
    ([], "", "object"),
]


@pytest.mark.parametrize("body, field, words", BAD)
def test_a_bad_submission_is_a_422_that_names_the_field(call, body, field, words):
    status, answer = call("POST", ME + "/tasks", body)
    if body == []:
        assert status in (201, 400, 422)
        return
    assert status == 422, answer
    row = answer["detail"][0]
    assert row["loc"][:2] == ["body", field] and words in row["msg"] and row["type"]
    assert call("POST", ME + "/tasks/search", {})[1]["content"] == []


def test_each_bad_field_has_its_own_entry(call):
    status, answer = call("POST", ME + "/tasks", {"args": 1, "priority": "x", "max_retries": "y"})
    assert status == 422 and sorted(row["loc"][1] for row in answer["detail"]) == ["args", "max_retries", "priority"]


@pytest.mark.parametrize("text, words", [
    ('{"a": 1, "a": 2}', "twice"), ("{", "is not JSON"), ("[" * 100000, "nested too deep"), ('{"a": 1' + "0" * 4000 + "}", "outside"),
    ("18446744073709551616", "outside"), ("-9223372036854775809", "outside"), ("\xff", "not JSON"),
])
def test_json_that_cannot_be_taken(text, words):
    with pytest.raises(L.InvalidFields, match=words):
        L.parse_json(text)


def test_the_largest_integers_and_nan_are_kept():
    text = "[18446744073709551615, -9223372036854775808, NaN, Infinity, -Infinity]"
    assert json.dumps(L.parse_json(text)) == text


@pytest.mark.parametrize("item", ['{"a": %d}', '{"a": ":%d"}', '{"a": {"b": "%d"}, "\\u003a": ":"}', '{"a": [], "b": {}, "c": %d}'])
def test_a_key_that_is_twice_in_one_of_many_objects_is_refused(item):
    items = [item % number for number in range(2 * L.MAX_DEPTH)]
    assert L.parse_json("[%s]" % ",".join(items)) == [json.loads(each) for each in items]
    for twice in ('{"a": 1, "a": 2}', '{"a" :1,"a":2}', r'{"a": {"\u0062": ":", "b": 0}}'):
        for place in (0, 77, len(items)):
            with pytest.raises(L.InvalidFields, match="twice"):
                L.parse_json("[%s]" % ",".join(items[:place] + [twice] + items[place:]))


def test_unknown_fields_are_ignored_and_null_is_not_given(call):
    status, answer = call("POST", ME + "/tasks", {"args": {"a": 1}, "client_version": "1.0.1", "shiny": 1, "priority": None,
                                                  "max_retries": None, "task_name": None})
    assert status == 201
    task = call("GET", ME + "/tasks/" + answer["task_id"])[1]
    assert (task["priority"], task["max_retries"], task["task_name"]) == (0, 3, None)


TASK = {"task_id", "queue_id", "status", "task_name", "created_at", "start_time", "last_heartbeat", "last_modified", "heartbeat_timeout",
        "task_timeout", "max_retries", "retries", "priority", "metadata", "args", "cmd", "summary", "worker_id"}


def test_fields_beyond_the_protocol_are_shown_to_those_who_ask_for_them(call):
    call("POST", ME + "/tasks", {"args": {"a": 1}})
    plain = call("POST", ME + "/tasks/next", {"heartbeat_timeout": 9}, extensions=False)[1]["task"]
    assert set(plain) == TASK
    extended = call("POST", ME + "/tasks/search", {})[1]["content"][0]
    assert set(extended) - TASK == {"run_id", "run_end", "interruptions", "reason", "not_before", "attempts", "git", "retry_delay",
                                    "stop", "after", "after_any", "failure"}
    queue = {"queue_id", "queue_name", "created_at", "last_modified", "metadata"}
    assert set(call("GET", ME)[1]) == queue | {"paused_at"}
    assert set(call("GET", ME, extensions=False)[1]) == queue


def test_times_are_iso_with_a_zone(call):
    call("POST", ME + "/tasks", {"args": {"a": 1}})
    task = call("POST", ME + "/tasks/search", {})[1]["content"][0]
    assert task["created_at"].endswith("+00:00") and L.parse_time(task["created_at"]) > 1.6e9


def test_empty_tasks_and_fetches_that_could_hang_are_refused(call):
    assert call("POST", ME + "/tasks", {})[0] == 400
    assert call("POST", ME + "/tasks", {"args": {}, "cmd": ""})[0] == 400
    assert call("POST", ME + "/tasks", {"cmd": "python train.py"})[0] == 201
    assert call("POST", ME + "/tasks/next", {"start_heartbeat": False})[0] == 400
    assert call("POST", ME + "/tasks/next", {"start_heartbeat": False, "eta_max": "1h"})[1]["found"]
    assert call("POST", ME + "/tasks/next", {"eta_max": "soon"})[0] == 422
    assert call("POST", ME + "/tasks/next", {"worker_id": "nosuch"})[0] == 404


def test_search_offsets_limits_sorts_and_ands(call):
    for i in range(10):
        call("POST", ME + "/tasks", {"args": {"i": i, "even": i % 2 == 0}, "task_name": "t%d" % (i % 3)})

    def found(**body):
        return [task["args"]["i"] for task in call("POST", ME + "/tasks/search", body)[1]["content"]]
    assert found() == list(range(10))
    assert found(offset=3, limit=2) == [3, 4]
    assert found(limit=0) == []
    assert found(sort=[["args.even", -1], ["args.i", -1]]) == [8, 6, 4, 2, 0, 9, 7, 5, 3, 1]
    assert found(task_name="t1", extra_filter={"args.even": True}) == [4]
    by_id = sorted(range(10), key=lambda i: call("POST", ME + "/tasks/search", {"extra_filter": {"args.i": i}})[1]["content"][0]["task_id"])
    assert found(sort=[["_id", 1]]) == found(sort=[["task_id", 1]]) == by_id == found(sort=[["_id", -1]])[::-1]
    assert found(status="running") == []
    assert found(extra_filter='args.i > 7 or task_name == "t0"') == [0, 3, 6, 8, 9]
    assert found(task_name="nosuch", extra_filter={"task_name": "t1"}) == []
    assert call("POST", ME + "/tasks/search", {"extra_filter": {"args.i": {"$where": 1}}})[0] == 400
    assert call("POST", ME + "/tasks/search", {"extra_filter": "nosuch == 1"})[0] == 400
    assert call("POST", ME + "/tasks/search", {"status": "done"})[0] == 422


@pytest.mark.parametrize("path", ["/tasks/search", "/workers/search"])
def test_a_listing_is_sorted_by_fields_that_clients_see_and_by_no_more_than_sixteen(call, path):
    for field in ("count", "index", "_replace", "password", "digest", "fetch_id", "__class__", "count.x", "nosuch", ""):
        status, answer = call("POST", ME + path, {"sort": [["status", 1], [field, 1]]})
        assert status == 422 and answer["detail"][0]["loc"] == ["body", "sort"], field
    own = path.split("/")[1][:-1]
    assert call("POST", ME + path, {"sort": [["_id", 1], [own + "_id", -1], [own + "_name", 1], ["metadata.a.b", -1]]})[0] == 200
    assert call("POST", ME + path, {"sort": [["status", 1]] * 16})[0] == 200
    assert call("POST", ME + path, {"sort": [["status", 1]] * 17})[0] == 422


@pytest.mark.parametrize("number", [2 ** 31, 2 ** 53, 2 ** 62, 2 ** 63 - 1, 2 ** 63, 2 ** 63 + 1, 1e30, float("inf"), float("nan"), -1, 1.5, True, "1"])
def test_an_offset_or_a_limit_of_any_size_has_an_answer(call, number):
    call("POST", ME + "/tasks", {"args": {"a": 1}})
    wanted = 200 if type(number) is int and 0 <= number <= 2 ** 63 else 422
    for body in ({"limit": number}, {"offset": number}, {"offset": number, "limit": number}):
        for path in ("/tasks/search", "/tasks/view", "/workers/search"):
            for more in ({}, {"sort": [["status", 1]]}, {"extra_filter": {"status": "pending"}}):
                status, answer = call("POST", ME + path, dict(body, **more))
                assert status == wanted, (path, body, more, answer)
        if wanted == 200:
            found = call("POST", ME + "/tasks/search", body)[1]["content"]
            assert len(found) == ("offset" not in body)


def test_a_view_has_times_as_text_and_at_most_200_columns(call):
    call("POST", ME + "/tasks", {"args": {"a": 1}})
    at = call("POST", ME + "/tasks/search", {})[1]["content"][0]["created_at"]
    assert call("POST", ME + "/tasks/view", {"columns": ["created_at"] * 200})[1]["rows"][0][2:] == [at] * 200
    status, answer = call("POST", ME + "/tasks/view", {"columns": ["created_at"] * 201})
    assert status == 400 and "201 columns: at most 200" in answer["detail"]


def test_the_last_line_of_a_failed_run_is_read_once_and_few_are_kept(door, monkeypatch):
    read = []

    def tail(store, task_id, run_id, attempt, size):
        read.append(task_id)
        return (b"" if task_id == ids[0] else b"first\nthe end\n\n"), 0
    monkeypatch.setattr(labtasker_cli, "tail_of", tail)
    monkeypatch.setattr(labtasker_cli, "MOST_ROWS", 2)
    monkeypatch.setattr(labtasker_cli, "LAST_WORDS", {})
    ids = [door.submit(max_retries=1) for _ in range(4)]
    for _ in ids:
        door.report(door.fetch(), "failed", summary={"labtasker_error": "exit code 1"})

    def shown(task_id):
        (_, _, error), = door("POST", "tasks/view", {"columns": ["error"], "extra_filter": {"task_id": task_id}})["rows"]
        return error
    assert shown(ids[0]) == "exit code 1" and [shown(task_id) for task_id in ids[1:3] * 2] == ["the end"] * 4
    assert read == ids[:3] and len(labtasker_cli.LAST_WORDS) == 2
    assert shown(ids[3]) == "the end" and len(labtasker_cli.LAST_WORDS) == 1


def test_queues(call):
    assert call("POST", "/api/v1/queues", {"queue_name": "q", "password": "p", "metadata": {"a.b": 1}})[0] == 201
    assert call("POST", "/api/v1/queues", {"queue_name": "q", "password": "x"})[0] == 409
    assert call("POST", "/api/v1/queues", {"queue_name": "q q", "password": "x"})[0] == 422
    assert call("POST", "/api/v1/queues", {"queue_name": "r"})[1]["detail"][0]["loc"] == ["body", "password"]
    call("PUT", ME, {"metadata_update": {"a": {"b": 1}}})
    assert call("PUT", ME, {"metadata_update": {"a": {"c": 2}}})[1]["metadata"] == {"a": {"b": 1, "c": 2}}
    assert call("PUT", ME, {})[1]["metadata"] == {"a": {"b": 1, "c": 2}}
    assert call("PUT", ME, {"metadata_update": {}})[1]["metadata"] == {}
    assert call("PUT", ME, {"new_queue_name": "q"})[0] == 400


def test_a_transaction_is_bounded(call):
    status, answer = call("POST", ME + "/tasks", [{"args": {"a": 1}}] * (L.TRANSACTION_TASKS + 1))
    assert status == 413 and "10000" in answer["detail"]
    for rows, more in ((L.TRANSACTION_TASKS + 1, {}), (2000, {"cmd": "x" * 9000}), (2000, {"metadata": {"a": [[]] * 150}}), (1200, {"args": ["a" * 7000, "b" * 7000]})):
        body = dict({"args": ["a"]}, **more)
        status, answer = call("POST", ME + "/tasks/rows", dict(body, rows=[[1] * len(body["args"])] * rows))
        assert status == 413 and ("10000" in answer["detail"] or "together" in answer["detail"]), more
        assert call("POST", ME + "/tasks/rows", dict(body, rows=[[1] * len(body["args"])] * 20))[0] == 201


@pytest.mark.parametrize("body, loc, words", [
    ({"args": ["a", "b", "a"], "rows": [[1, 2, 3]]}, ["body", "a"], "twice"),
    ({"args": ["a", "b"], "rows": [[1, 2], [1]]}, ["body", "rows", 1], "a list of 2 values, one for each of args, not [1]"),
    ({"args": ["a"], "rows": [[1], {"a": 1}]}, ["body", "rows", 1], "a list of 1 values"),
    ({"args": ["a"], "rows": [[1], [2]], "task_ids": ["x", "a b"]}, ["body", "task_ids", 1], "not 'a b'"),
    ({"args": ["a"], "rows": [[1], [2]], "task_ids": ["x"]}, ["body", "task_ids"], "should be 2 ids"),
    ({"args": ["a"], "rows": [[{"x": 1}], [{"$x": 1}]]}, ["body", 1, "args", "a"], "$x"),
    ({"args": ["a"], "rows": [[1]], "metadata": {"a": 1, "a.b": 2}}, ["body", 0, "metadata"], "collide"),
])
def test_what_is_wrong_in_rows_is_named_with_its_place(call, body, loc, words):
    status, answer = call("POST", ME + "/tasks/rows", body)
    assert status == 422 and [row["loc"][:len(loc)] for row in answer["detail"]] == [loc] and words in answer["detail"][0]["msg"], answer
    assert call("POST", ME + "/tasks/search", {})[1]["content"] == []


def test_what_is_wrong_in_an_item_of_a_list_is_named_with_its_place(call):
    one = {"args": {"a": 1}}
    status, answer = call("POST", ME + "/tasks", [one, one, one, {"args": {"a b": 1}}])
    assert (status, answer["detail"][0]["loc"]) == (422, ["body", 3, "args"])
    assert call("POST", ME + "/tasks", [one, {"cmd": "x"}, {}]) == (400, {"detail": "item 2 of the list: a task needs args or cmd: both are empty"})
    assert call("POST", ME + "/tasks/rows", {"args": ["a"], "rows": []}) == call("POST", ME + "/tasks", []) == (201, {"task_ids": []})


# ---- Both state machines: what every event does in every state, over the wire

# A word: the state after it. =: it is taken and the state stays. A number: it is refused so, and nothing changes.
TASK_TABLE = """
event             pending    running    success    failed     cancelled
fetch             running    =          =          =          =
report_success    400        success    =          400        400
report_failed     400        pending    400        =          400
report_cancelled  cancelled  cancelled  cancelled  cancelled  =
report_running    400        =          400        400        400
report_pending    =          pending    400        400        400
put_pending       =          pending    pending    pending    pending
put_success       400        success    =          400        400
put_failed        400        failed     400        =          400
put_cancelled     cancelled  cancelled  cancelled  cancelled  =
put_running       400        =          400        400        400
put_fields        =          =          =          =          =
reset             pending    pending    pending    pending    pending
heartbeat         404        =          404        404        404
silence           =          pending    =          =          =
too_long          =          pending    =          =          =
other_worker      409        409        409        409        409
delete            gone       gone       gone       gone       gone
"""
WORKER_TABLE = """
event             active     suspended  crashed
report_active     active     active     active
report_suspended  suspended  400        400
report_crashed    crashed    400        crashed
fetch             =          403        403
fail              active     =          =
last_fail         crashed    =          =
silence           active     =          =
last_silence      crashed    =          =
delete            gone       gone       gone
"""


def cells(table):
    """Return [(event, state, what it does)] of a table's text."""
    head, *rows = [line.split() for line in table.strip().split("\n")]
    return [(row[0], state, cell) for row in rows for state, cell in zip(head[1:], row[1:])]


def task_event(door, task_id, event):
    """Return the status of the answer to the event."""
    verb, _, status = event.partition("_")
    if event in ("silence", "too_long"):
        door.later(61 if event == "silence" else 601)
        return 200
    method, path, body, query = {
        "fetch": ("POST", "/tasks/next", {"heartbeat_timeout": 60}, {}),
        "report": ("POST", "/tasks/%s/status" % task_id, {"status": status, "summary": {"told": 1}}, {}),
        "other": ("POST", "/tasks/%s/status" % task_id, {"status": "success", "worker_id": L.new_id()}, {}),
        "put": ("PUT", "/tasks", [{"_id": task_id, **({"priority": 7} if status == "fields" else {"status": status})}], {"reset_pending": "false"}),
        "reset": ("PUT", "/tasks", [{"_id": task_id}], {}),
        "heartbeat": ("POST", "/tasks/%s/heartbeat" % task_id, None, {}),
        "delete": ("DELETE", "/tasks/" + task_id, None, {}),
    }[verb]
    door.clock.pass_s(0.001)
    status, answer = L.answer_call(door.store, lambda: door.queue, method, ME + path, body, query, False)
    if status == 400:
        assert "InvalidStateTransition" in answer["detail"]
    assert status < 400 or isinstance(answer["detail"], str)
    return status


@pytest.mark.parametrize("fields", [{}, {"priority": 0}, {"status": "pending"}, {"task_name": None}])
def test_a_put_moves_last_modified_also_where_it_changes_nothing_else(door, fields):
    task_id = door.submit(priority=0)
    before = door.task(task_id)
    door.clock.pass_s(1)
    L.answer_call(door.store, lambda: door.queue, "PUT", ME + "/tasks", [dict(fields, _id=task_id)], {"reset_pending": "false"}, False)
    after = door.task(task_id)
    assert after["last_modified"] > before["last_modified"]
    assert dict(after, last_modified=None) == dict(before, last_modified=None)


def task_in(door, state):
    """Return the id of a task in this state that has failed once before."""
    task_id = door.submit(max_retries=3, task_timeout=600)
    door.report(door.fetch(), "failed")
    if state in ("running", "success", "failed"):
        task = door.fetch()
    if state in ("success", "failed"):
        door.update(task_id, max_retries=2)
        door.report(task, state)
        door.update(task_id, max_retries=3)
    if state == "cancelled":
        door.report(task_id, "cancelled")
    return task_id


@pytest.mark.parametrize("event, state, then", cells(TASK_TABLE))
def test_every_event_in_every_state_of_a_task(door, event, state, then):
    task_id = task_in(door, state)
    before = door.task(task_id)
    assert before["status"] == state
    status = task_event(door, task_id, event)
    if then == "gone":
        door("GET", "tasks/" + task_id, expect=404)
        return
    task = door.task(task_id)
    assert task["status"] == (then if then.isalpha() else state)
    if then.isdigit():
        assert (status, task) == (int(then), before)
        return
    failed = state == "running" and event in ("report_failed", "silence", "too_long")
    assert status in (200, 204) and task["retries"] == (0 if event == "reset" else before["retries"] + failed)
    assert task["start_time"] is not None and (event == "fetch" or task["worker_id"] is None)
    assert ("labtasker_error" in task["summary"]) == (state == "running" and event in ("silence", "too_long"))
    assert ("told" in task["summary"]) == event.startswith("report_")


@pytest.mark.parametrize("event, state, then", cells(WORKER_TABLE))
def test_every_event_in_every_state_of_a_worker(door, event, state, then):
    worker_id = door.worker(max_retries=2 if event.startswith("last_") else 9)
    for _ in range(2):
        door.submit(max_retries=9)
    for _ in range(1 + event.startswith("last_")):
        task = door.fetch(worker_id=worker_id)
        if event.startswith("last_") and not door("POST", "workers/search", {"worker_id": worker_id})["content"][0]["retries"]:
            door.report(task, "failed", worker_id=worker_id)
    if state != "active":
        door("POST", "workers/%s/status" % worker_id, {"status": state})
    retries = door("POST", "workers/search", {"worker_id": worker_id})["content"][0]["retries"]
    verb, _, wanted = event.partition("_")
    if verb == "report":
        status, answer = L.answer_call(door.store, lambda: door.queue, "POST", ME + "/workers/%s/status" % worker_id, {"status": wanted})
    elif event == "fetch":
        status, answer = L.answer_call(door.store, lambda: door.queue, "POST", ME + "/tasks/next", {"worker_id": worker_id})
    elif event.endswith("fail"):
        status, answer = 200, door.report(task["task_id"], "failed", worker_id=worker_id)
    elif event.endswith("silence"):
        status, answer = 200, door.later(61)
    else:
        door("DELETE", "workers/" + worker_id)
        assert door.task(task["task_id"])["worker_id"] is None
        door("GET", "workers/" + worker_id, expect=404)
        return
    assert status == (int(then) if then.isdigit() else 200)
    assert "InvalidStateTransition" in answer["detail"] if status == 400 else True
    worker, = door("POST", "workers/search", {"worker_id": worker_id})["content"]
    assert worker["status"] == (then if then.isalpha() else state)
    struck = event.endswith(("fail", "silence"))
    assert worker["retries"] == (0 if event == "report_active" else retries + struck)


def test_the_tables_have_every_state_and_every_status_that_can_be_told():
    for table, states, told in ((TASK_TABLE, L.TASK_STATES, "report put".split()), (WORKER_TABLE, L.WORKER_STATES, ["report"])):
        rows = cells(table)
        assert {state for _, state, _ in rows} == set(states)
        assert len(rows) == len({row[:2] for row in rows})
        assert {"%s_%s" % pair for pair in itertools.product(told, states)} <= {event for event, _, _ in rows}


# ---- Every field of every route

BAD_VALUES = {  # kind of field: values that are none
    "text": [1, []], "id": [1, {}], "name": ["", "a b", "x" * 101, "a\n", "\xe4", 1], "password": ["", "x" * 101, 1], "dict": [1, [], "x"],
    "filter": [1, []], "seconds": [0, -1, "60", True, float("inf"), float("nan")], "duration": ["soon", "", 0, [], "-1h"], "wait": ["x", []],
    "bool": ["maybe", 2, [], ""], "int": ["x", 1.5, True, 2 ** 63], "count": [-1, 1.5, "3", 2 ** 31 + 1], "whole": [-1, "x", 1.5, "-1"],
    "status": ["done", 1, "created"], "worker_status": ["failed", 1, "ended"], "worker_report": ["failed", 1],
    "event_id": ["x", "1", "1.x"], "answer": ["x"], "extreme": ["best", 1], "texts": ["x", [1]],
    "attempt": [1, [], "x", {"a": {}}, {"a": "x" * 3000}], "commit": [1, [], "x" * 1000], "log": [1, [], "x" * 10 ** 6],
    "ids": ["x", [1], [""], ["a/b"], {}], "failure": ["hunger", 1, "", "OOM"],
    "list": [1, {}, "x"],
    "step": [],  # what is none is told as a warning
    "stop": [1, [], {}],
    "cmd": [1, [1], {}], "sort": ["x", [["a", 2]], [["a"]], [[1, 1]], {}],
}


def every_field():
    """Return (route, place, field, kind) of every field that a request may have."""
    return [(key, place, name, arg.kind) for key, route in L.ROUTES.items()
            for place, fields in (("query", route.query), ("body", route.fields)) for name, arg in fields.items()]


@pytest.mark.parametrize("key, place, name, kind", every_field())
def test_a_bad_field_is_a_422_that_names_it(call, key, place, name, kind):
    method, path = key.split(" ")
    route = L.ROUTES[key]
    for value in BAD_VALUES[kind]:
        body, query = ({}, {name: value}) if place == "query" else ({name: value}, {})
        loc = [place, name]
        if route.body == "list":
            body, loc = [body], loc if place == "query" else ["body", 0, name]
        status, answer = L.answer_call(None, lambda: None, method, path, body, query)
        rows = [row for row in answer["detail"] if row["loc"] == loc]
        assert status == 422 and len(rows) == 1 and rows[0]["msg"] and rows[0]["type"], (value, answer)
        assert rows[0]["msg"] != "is required"


def test_every_kind_of_field_has_bad_values():
    assert set(BAD_VALUES) == set(L.KINDS) >= {kind for _, _, _, kind in every_field()}


DEFAULTS = {  # the page's; what is not here has none
    "DELETE " + ME: {"cascade_delete": False}, "PUT " + ME + "/tasks": {"reset_pending": True},
    "POST " + ME + "/tasks": {"max_retries": 3, "priority": 0}, "POST " + ME + "/tasks/search": {"offset": 0, "limit": 100},
    "POST " + ME + "/tasks/rows": {"max_retries": 3, "priority": 0},
    "POST " + ME + "/tasks/view": {"offset": 0, "limit": 100, "spread": False, "choose": False},
    "POST " + ME + "/tasks/curves": {"limit": 1000, "points": 200000},
    "POST " + ME + "/tasks/count": {"by": "status"}, "GET " + ME + "/mark": {"wait_s": 0},
    "POST " + ME + "/tasks/table": {"mode": "max"},
    "POST " + ME + "/tasks/next": {"start_heartbeat": True, "wait_s": 0, "heartbeat_default": False, "left": False},
    "POST " + ME + "/tasks/{task_id}/heartbeat": {"wait_s": 0},
    "POST " + ME + "/workers": {"max_retries": 3}, "POST " + ME + "/workers/search": {"offset": 0, "limit": 100},
    "DELETE " + ME + "/workers/{worker_id}": {"cascade_update": True}, "DELETE " + ME + "/tasks/next": {"hand_back": False},
}
REQUIRED = {"POST " + ME + "/tasks/table": {"by", "of"}, "POST " + ME + "/tasks/rows": {"args", "rows"},
            "POST /api/v1/queues": {"queue_name", "password"}, "POST " + ME + "/tasks/{task_id}/status": {"status"},
            "POST " + ME + "/workers/{worker_id}/status": {"status"}, "DELETE " + ME + "/tasks/next": {"fetch_id"}}


def test_defaults_and_required_fields_are_those_of_the_page(call):
    for key, route in L.ROUTES.items():
        fields = dict(route.fields, **route.query)
        required = {name for name, arg in fields.items() if arg.default is L.REQUIRED}
        assert required == REQUIRED.get(key, set()), key
        assert {name: arg.default for name, arg in fields.items() if arg.default is not None and name not in required} == DEFAULTS.get(key, {}), key
        if required:
            status, answer = L.answer_call(None, lambda: None, *key.split(" "), {})
            assert status == 422 and {row["loc"][1] for row in answer["detail"]} == required
    status, answer = call("PUT", ME + "/tasks", [{"priority": 1}])
    assert status == 422 and answer["detail"][0]["loc"] == ["body", 0, "task_id"]


# ---- Every route's answer

WORKER = {"worker_id", "queue_id", "status", "worker_name", "metadata", "retries", "max_retries", "created_at", "last_modified"}
QUEUE = {"queue_id", "queue_name", "created_at", "last_modified", "metadata"}
ANSWERS = [  # route, body or query, status, what the answer's objects hold; in this order. {t}: a task, {w}: a worker
    ("GET /", {}, 200, {"message", "versions", "version", "server"}), ("GET /health", {}, 200, {"connection"}),
    ("GET /health/full", {}, 200, {"status", "database"}), ("GET /api/v1/polling", {}, 200, {"prev_polling", "next_eta", "polling_interval"}),
    ("POST /api/v1/queues", {"queue_name": "q", "password": "p", "metadata": {}}, 201, {"queue_id"}),
    ("GET " + ME, {}, 200, QUEUE), ("PUT " + ME, {"metadata_update": {"a": 1}}, 200, QUEUE),
    ("POST " + ME + "/workers", {"worker_name": "w"}, 201, {"worker_id"}), ("POST " + ME + "/tasks", {"args": {"a": 1}}, 201, {"task_id"}),
    ("POST " + ME + "/tasks", [{"args": {"a": 2}}], 201, {"task_ids"}),
    ("POST " + ME + "/tasks/rows", {"args": ["a"], "rows": [[2], [3]]}, 201, {"task_ids"}),
    ("POST " + ME + "/tasks/view", {"columns": ["args.a"]}, 200, {"rows", "found", "counts", "pace", "queue", "fields", "at"}),
    ("POST " + ME + "/tasks/table", {"by": ["args.a"], "of": "args.a"}, 200, {"content", "found"}),
    ("POST " + ME + "/tasks/curves", {}, 200, {"rows", "names", "value", "found", "until", "counts", "pace", "queue", "fields", "at"}),
    ("POST " + ME + "/tasks/count", {}, 200, {"counts", "ended", "took_s", "mark"}), ("GET " + ME + "/mark", {}, 200, {"mark"}),
    ("POST " + ME + "/tasks/search", {}, 200, {"found", "content"}), ("POST " + ME + "/tasks/next", {"worker_id": "{w}"}, 200, {"found", "task"}),
    ("DELETE " + ME + "/tasks/next", {"fetch_id": "f"}, 204, None),
    ("POST " + ME + "/tasks/{t}/heartbeat", {}, 204, None), ("POST " + ME + "/tasks/{t}/heartbeat", {"answer": "status"}, 200, {"status"}),
    ("POST " + ME + "/tasks/{t}/status", {"status": "success"}, 200, set()), ("GET " + ME + "/tasks/{t}", {}, 200, TASK),
    ("GET " + ME + "/tasks/{t}/history", {}, 200, {"content", "standing"}),
    ("GET " + ME + "/tasks/{t}/log", {}, 200, {"run_id", "text", "size", "host", "path"}),
    ("PUT " + ME + "/tasks", [{"_id": "{t}"}], 200, {"found", "content"}), ("DELETE " + ME + "/tasks/{t}", {}, 204, None),
    ("POST " + ME + "/workers/search", {}, 200, {"found", "content"}), ("POST " + ME + "/workers/{w}/status", {"status": "suspended"}, 200, set()),
    ("GET " + ME + "/workers/{w}", {}, 200, WORKER - {"worker_id"} | {"_id"}), ("DELETE " + ME + "/workers/{w}", {}, 204, None),
    ("DELETE " + ME, {"cascade_delete": "true"}, 204, None),
]


ODD = [True, 1, 1.0, "1", None, [1], {"b": {"c": 2}}, {"b": {"c": "2"}}, "x", "x", "null"]


@pytest.mark.parametrize("asked", [{}, {"status": "pending"}, {"status": "failed"}, {"task_name": "odd"}, {"task_name": "nosuch"},
                                   {"task_id": "t3"}, {"task_id": "nosuch"}, {"extra_filter": 'exists(args.a.b)'},
                                   {"extra_filter": {"task_id": {"$in": ["t1", "t2", "t11"]}}, "status": "running"}], ids=json.dumps)
def test_tasks_are_counted_as_they_are_listed(door, asked):  # noqa: F811
    for i, value in enumerate(ODD):
        door.submit(task_id="t%d" % i, task_name="odd" if i % 2 else None, args={"a": value})
    door.fetch(), door.report(door.fetch(), "success"), door.report(door.fetch(), "failed")
    listed = door("POST", "tasks/search", dict(asked, limit=99))["content"]
    for by in ("status", "task_name", "args.a", "args.a.b", "args.a.b.c", "args", "priority", "created_at", "start_time",
               "attempts", "status.x", "args.nosuch"):
        wished = []  # [JSON text of the value, number], in the order of the list
        for task in listed:
            text = json.dumps(L.get_path(task, by.split(".")))
            rows = [row for row in wished if row[0] == text]
            rows[0].__setitem__(1, rows[0][1] + 1) if rows else wished.append([text, 1])
        counts = door("POST", "tasks/count", dict(asked, by=by))["counts"]
        assert [[json.dumps(value), number] for value, number in counts] == wished, by


def test_all_that_is_no_number_is_counted_as_one_value(call):
    call("POST", ME + "/tasks", [{"args": {"a": float("nan")}}, {"args": {"a": 1}}, {"args": {"a": float("nan")}}])
    assert json.dumps(call("POST", ME + "/tasks/count", {"by": "args.a"})[1]["counts"]) == "[[NaN, 2], [1, 1]]"


def test_a_count_tells_how_fast_tasks_end(door):  # noqa: F811
    assert door("POST", "tasks/count", {})["ended"] == 0
    for i in range(L.RECENT + 2):
        door.submit()
    runs = [door.fetch() for _ in range(L.RECENT + 1)]
    for run in runs:
        door.report(run, "success")
    door.clock.pass_s(100)
    found = door("POST", "tasks/count", {})
    began = min(L.parse_time(run["start_time"]) for run in runs[1:])  # the first of those that ended last
    assert (found["ended"], found["took_s"]) == (L.RECENT, pytest.approx(door.clock.day - began))
    assert door("POST", "tasks/count", {"status": "pending"})["took_s"] == 0


@pytest.mark.parametrize("by", ["nosuch", "", "argz.x", "digest", "fetch_id"])
def test_only_fields_that_are_shown_are_counted_by(call, by):
    status, answer = call("POST", ME + "/tasks/count", {"by": by})
    assert status == 422 and answer["detail"][0]["loc"] == ["body", "by"] and "task_name" in answer["detail"][0]["msg"]


def test_the_mark_is_another_after_each_change_and_the_same_as_long_as_there_is_none(door):  # noqa: F811
    def mark():
        return door("GET", "mark")["mark"]
    first, run = door.submit(), []
    steps = {"submit": door.submit, "fetch": lambda: run.append(door.fetch()),
             "report": lambda: door.report(run[0], "running", summary={"a": 1}), "end": lambda: door.report(run[0], "failed"),
             "update": lambda: door.update(first, priority=3), "delete": lambda: door("DELETE", "tasks/" + first)}
    seen = [mark()]
    for name, step in steps.items():
        step()
        assert mark() not in seen, name
        seen.append(mark())
    run = [door.submit(), door.fetch()]
    before = mark()
    door("POST", "tasks/search", {})
    door("POST", "tasks/%s/heartbeat" % run[1]["task_id"])
    assert mark() == before == door("POST", "tasks/count", {})["mark"]


PAGES = {"GET /page", "GET /page.css", "GET /page.js"}


@pytest.mark.parametrize("key", sorted(PAGES))
def test_the_parts_of_the_page_are_no_json(call, key):
    status, answer = call(*key.split(" "))
    assert status == 200 and isinstance(answer, L.Page) and len(answer.body) > 1000 and answer.etag in answer.head


def test_every_route_answers_with_its_status_and_fields(call):
    known, seen = {}, {"GET " + ME + "/events"} | PAGES
    for key, given, status, fields in ANSWERS:
        method, path = key.split(" ")
        seen.add(key.replace("{t}", "{task_id}").replace("{w}", "{worker_id}"))
        for name, value in known.items():
            path, given = path.replace(name, value), json.loads(json.dumps(given).replace(name, value))
        is_query = method == "DELETE" or path.endswith("heartbeat")
        got, answer = call(method, path, None if is_query else given, given if is_query else None, extensions=False)
        assert (got, answer if answer is None else set(answer)) == (status, fields), key
        known.setdefault("{t}", answer.get("task_id")) if answer and "task_id" in answer else None
        known.setdefault("{w}", answer.get("worker_id")) if answer and "worker_id" in answer else None
        for one in () if path.endswith("/table") else (answer or {}).get("content") or ([answer["task"]] if answer and answer.get("task") else []):
            assert set(one) == (WORKER if "workers" in path else TASK)
    assert seen == set(L.ROUTES)


@pytest.mark.parametrize("key", sorted(L.ROUTES))
def test_who_has_no_password_is_let_in_nowhere_but_where_the_page_says(call, key):
    def login():
        raise L.Unauthorized("Invalid credentials")
    method, path = key.split(" ")
    is_open = key in PAGES | {"GET /", "GET /health", "GET /health/full", "GET /api/v1/polling", "POST /api/v1/queues"}
    if not is_open:
        assert L.answer_call(None, login, method, path, None, {}) == (401, {"detail": "Invalid credentials"})
    assert L.ROUTES[key].open is is_open


def test_help_api_prints_every_route_with_all_its_fields(capsys):
    assert L.main(["help", "api"]) in (0, None)
    pieces = dict(zip(L.ROUTES, capsys.readouterr().out.split("\n\n")[0].replace("\n    ", "\t").splitlines()))
    assert len(pieces) == len(L.ROUTES)
    for key, route in L.ROUTES.items():
        head, meaning, *fields = pieces[key].split("\t")
        assert head.startswith("%s -> %d" % (key, route.status)) and ("no password" in head) == route.open and meaning == route.meaning
        shown = [field for line in fields for field in line.partition(": ")[2].split(", ")]
        spec = list(route.query.items()) + list(route.fields.items())
        assert [field.split(" ")[0] for field in shown] == [name + "*" * arg.is_ours for name, arg in spec]
        for field, (_, arg) in zip(shown, spec):
            assert field.split(" ", 1)[1] == arg.kind + (
                " (required)" if arg.default is L.REQUIRED else "" if arg.default is None else "=" + json.dumps(arg.default))


def test_a_report_of_any_client_may_have_any_key_in_its_summary(call):
    one = call("POST", ME + "/tasks", {"args": {"a": 1}, "metadata": {"by/whom": 1}})[1]["task_id"]
    call("POST", ME + "/tasks/next", {"required_fields": ["a"]})
    assert call("POST", ME + "/tasks/%s/status" % one, {"status": "success", "summary": {"val/acc": 0.5, "x y.z": 1}})[0] == 200
    found = call("POST", ME + "/tasks/search", {"extra_filter": {"summary.val/acc": 0.5, "metadata.by/whom": 1}, "sort": [["summary.val/acc", 1]]})[1]
    assert [task["summary"] for task in found["content"]] == [{"val/acc": 0.5, "x y": {"z": 1}}]
    assert call("POST", ME + "/tasks/search", {"extra_filter": 'summary["val/acc"] > 0.1 and summary["x y"].z == 1'})[1]["found"]
    status, answer = call("POST", ME + "/tasks/%s/status" % one, {"status": "success", "summary": {"a\x00": 1}})[:2]
    assert status == 422 and "control characters" in str(answer)
