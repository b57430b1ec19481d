"""Section 6: the table of routes, what a request may hold, what bad ones get, what answers show."""
import json

import pytest

import labtasker as L

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
    assert len(L.ROUTES) == 22
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
    assert status == 422 and [row["loc"][1] for row in answer["detail"]] == ["args", "max_retries", "priority"]


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
    assert set(extended) - TASK == {"run_id", "run_end", "interruptions", "reason"}
    assert set(call("GET", ME)[1]) == {"queue_id", "queue_name", "created_at", "last_modified", "metadata"}


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
    assert found(status="running") == []
    assert found(extra_filter='args.i > 7 or task_name == "t0"') == [0, 3, 6, 8, 9]
    assert found(task_name="nosuch", extra_filter={"task_name": "t1"}) == []
    assert call("POST", ME + "/tasks/search", {"extra_filter": {"args.i": {"$where": 1}}})[0] == 400
    assert call("POST", ME + "/tasks/search", {"extra_filter": "nosuch == 1"})[0] == 400
    assert call("POST", ME + "/tasks/search", {"status": "done"})[0] == 422


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
