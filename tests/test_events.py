"""Events: one for each step of a state machine, in order, none lost over a reconnect while the log has it."""
import json
import threading

import pytest

import labtasker as L
from harness import http
from test_service import Clock, Door


class Listener:
    """Takes the events of a door's queue from the stream, as text pieces."""

    def __init__(self, door, after=None):
        status, stream = L.answer_call(door.store, lambda: door.queue, "GET", "/api/v1/queues/me/events",
                                       query={"last_event_id": after} if after else {})
        assert status == 200
        self.pieces, self.events, self.other = stream.pieces, [], []

    def read(self, count):
        """Return the next `count` events as (entity type, old state, new state)."""
        found = []
        while len(found) < count:
            fields = dict(line.split(": ", 1) for line in next(self.pieces).decode().strip().split("\n"))
            if fields["event"] == "event":
                event = dict(json.loads(fields["data"])["event"], id=fields["id"])
                self.events.append(event)
                found.append((event["entity_type"], event["old_state"], event["new_state"]))
            else:
                self.other.append((fields["event"], json.loads(fields["data"])))
        return found


@pytest.fixture
def door(tmp_path, monkeypatch):
    monkeypatch.setattr(L, "PING_S", 0.3)
    door = Door(tmp_path, Clock())
    door.worker()
    return door


STEPS = [("task", "created", "pending"), ("task", "pending", "running"), ("task", "running", "pending"), ("worker", "active", "active"),
         ("task", "pending", "running"), ("task", "running", "success")]


def do_steps(door):
    worker_id = door.worker()
    door.submit(args={"a": float("nan")})
    door.report(door.fetch(worker_id=worker_id), "failed", worker_id=worker_id)
    task = door.fetch()
    door.report(task, "running", summary={"only": "a summary"})
    door.report(task, "success", summary={"acc": 1})


def test_every_step_is_an_event_and_a_summary_is_none(door):
    listener = Listener(door)
    assert next(listener.pieces).startswith(b"retry: 3000\nevent: connection\n")
    door.store.alone(lambda: None)
    first = threading.Timer(0.2, do_steps, [door])
    first.start()
    assert listener.read(7) == [("worker", "created", "active")] + STEPS
    last = listener.events[-1]
    assert last["entity_data"]["summary"] == {"only": "a summary", "acc": 1} and last["entity_data"]["_id"] == last["entity_id"]
    assert "run_id" not in last["entity_data"] and last["type"] == "state_transition"
    ids = [tuple(map(int, event["id"].split("."))) for event in listener.events]
    assert ids == sorted(set(ids)) and ids[2][0] + 1 == ids[3][0] and ids[3][0] == ids[4][0]


def test_a_reconnect_goes_on_after_the_last_event_seen_wherever_that_is(door, monkeypatch):
    do_steps(door)
    do_steps(door)
    every = Listener(door, "0.0")
    steps = every.read(15)
    for size in (10000, 4, 1):
        monkeypatch.setattr(L, "MAX_EVENTS", size)
        door.store.events = type(door.store.events)(door.store.events, maxlen=size)
        for at, event in enumerate(every.events[:-1]):
            again = Listener(door, event["id"])
            assert again.read(len(steps) - at - 1) == steps[at + 1:]
            assert [e["id"] for e in again.events] == [e["id"] for e in every.events[at + 1:]]


def test_events_from_before_a_compaction_are_said_to_be_too_old(door, tmp_path):
    do_steps(door)
    L.compact(door.path)
    do_steps(door)
    fresh = Door(tmp_path, door.clock)
    fresh("GET", "/api/v1/queues/me")
    listener = Listener(fresh, "2.0")
    listener.read(7)
    kind, data = listener.other[1]
    assert kind == "too_old" and "compacted away" in data["detail"]


def test_a_quiet_stream_pings(door):
    listener = Listener(door)
    next(listener.pieces)
    assert next(listener.pieces).startswith(b"event: ping\n")


def test_a_bad_id_is_refused(door):
    for bad in ("x", "1", "1.x", "-1.0", "1.0.0", "9" * 40 + ".0"):
        assert L.answer_call(door.store, lambda: door.queue, "GET", "/api/v1/queues/me/events", query={"last_event_id": bad})[0] == 422


@pytest.mark.slow
def test_over_http_other_queues_are_not_heard_and_a_stopping_server_ends_the_stream(server):
    import urllib.request
    server.http("POST", "/api/v1/queues", {"queue_name": "other", "password": "p"})
    request = urllib.request.Request(server.url + "/api/v1/queues/me/events")
    import base64
    request.add_header("Authorization", "Basic " + base64.b64encode(("%s:%s" % (server.queue, server.password)).encode()).decode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        for _ in range(4):
            stream.readline()
        http("POST", server.url + "/api/v1/queues/me/tasks", {"args": {"a": 1}}, auth=("other", "p"))
        task_id = server.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})[1]["task_id"]
        lines = [stream.readline().decode() for _ in range(3)]
        assert lines[1] == "event: event\n" and json.loads(lines[2][6:])["event"]["entity_id"] == task_id
        assert server.stop() == 0
        assert stream.read() in (b"", b"\n")
