"""Events: one for each step of a state machine, in order, none lost over a reconnect while the log has it."""
import io
import json
import re
import signal
import threading

import pytest

import labtasker as L
from harness import http, wait_until
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
    door.store.file.with_file_lock(lambda: None)
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
        door.store.file.replica.events = type(door.store.file.replica.events)(door.store.file.replica.events, maxlen=size)
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
        for _ in range(5):
            stream.readline()
        http("POST", server.url + "/api/v1/queues/me/tasks", {"args": {"a": 1}}, auth=("other", "p"))
        task_id = server.http("POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})[1]["task_id"]
        lines = [stream.readline().decode() for _ in range(3)]
        assert lines[1] == "event: event\n" and json.loads(lines[2][6:])["event"]["entity_id"] == task_id
        assert server.stop() == 0
        assert stream.read() in (b"", b"\n")


@pytest.mark.parametrize("size", [1, 3, 10000])
def test_a_stream_is_read_whole_byte_by_byte_and_with_a_torn_end(size):
    text = b"retry: 3000\nevent: connection\ndata: {}\n\n: a comment\r\n\r\nid: 1.0\ndata: a\ndata:b\nshiny\n\nevent: ping\n\ndata: cut"
    lines = io.BufferedReader(io.BytesIO(text), size)
    assert list(L.parse_events(lines)) == [{"retry": "3000", "event": "connection", "data": "{}"},
                                           {"id": "1.0", "data": "a\nb", "shiny": ""}]


def heard(listener, count):
    """Return the next `count` events as (entity type, old state, new state)."""
    found = []
    while len(found) < count:
        event = listener.get_event(timeout=20)
        assert event is not None, found
        found.append((event.event.entity_type, event.event.old_state, event.event.new_state))
    return found


def run_one():
    """Submit a task and run it to its success."""
    task_id = L.submit_task(task_name="heard", args={"a": 1}).task_id
    L.fetch_task(heartbeat_timeout=60)
    L.report_task_status(task_id, "success", {"acc": 1})
    return task_id


RAN = [("task", "created", "pending"), ("task", "pending", "running"), ("task", "running", "success")]


def test_a_script_hears_events_with_and_without_a_server(both):
    listener = L.connect_events()
    assert listener.is_connected() and listener.get_client_id()
    assert listener.get_event(timeout=0) is None
    task_id = run_one()
    first = listener.get_event(timeout=20)
    assert (first.event.entity_id, first.event.type, first.event.entity_data["args"]) == (task_id, "state_transition", {"a": 1})
    assert first.timestamp.tzinfo and first.event.timestamp.tzinfo and first.to_dict()["event"]["entity_type"] == "task"
    assert heard(listener, 2) == RAN[1:]
    run_one()
    events = listener.iter_events()
    assert [next(events).event.new_state for _ in range(3)] == ["pending", "running", "success"]
    listener.stop()
    assert not listener.is_connected() and listener.get_event() is None and list(events) == []


def test_a_listener_that_cannot_be_raises_at_once(home, monkeypatch):
    with pytest.raises(L.LabtaskerRuntimeError, match="was not started"):
        L.EventListener().get_event()
    monkeypatch.setenv("LABTASKER_QUEUE", "nosuch")
    with pytest.raises(L.LabtaskerHTTPStatusError, match="no queue 'nosuch'"):
        L.connect_events()
    monkeypatch.setenv("LABTASKER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    with pytest.raises(L.LabtaskerConnectError):
        L.connect_events(timeout=1)


def test_other_queues_events_are_no_sign_of_life(door):
    """A listener of a quiet queue gets its pings also where another queue is busy."""
    L.answer_call(door.store, None, "POST", "/api/v1/queues", {"queue_name": "busy", "password": "p"})
    pieces = L._event_pieces(L.follow(door.store, "busy's id", (0, 0), 0.1), (0, 0))
    next(pieces)
    ended = threading.Event()

    def be_busy():
        while not ended.wait(0.01):
            door.submit(args={"a": 1})
    thread = threading.Thread(target=be_busy)
    thread.start()
    try:
        assert next(pieces).startswith(b"event: ping\n")
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
def test_a_listener_misses_nothing_while_its_server_is_away_or_another_process_takes_the_store(server_home, monkeypatch):
    """Also one that has heard no event yet, and one that goes on with the store's file, then with its next server."""
    server, folder = server_home.server, server_home.server.folder
    port = int(server.url.rpartition(":")[2])
    by_url = L.connect_events()
    for name in server_home.env:
        monkeypatch.delenv(name)
    config = L.Config(str(folder), None, server.queue, None, 10, None)
    monkeypatch.setattr(L, "load_config", lambda: config)
    by_folder = L.connect_events()
    listeners = [by_url, by_folder]
    for turn in range(3):
        (server.stop if turn != 1 else server.kill)()
        L.use_client(None)
        run_one()  # by the file, which no server has now
        assert heard(by_folder, 3) == RAN
        L.client().transport.close()
        server.start(port)
        assert heard(by_url, 3) == RAN
        L.use_client(None)
        run_one()
        assert [heard(listener, 3) for listener in listeners] == [RAN, RAN]
    for listener in listeners:
        listener.stop()


@pytest.mark.slow
def test_a_queue_that_is_deleted_ends_its_listener(server_home):
    listener = L.connect_events()
    L.delete_queue()
    server_home.server.stop()
    server_home.server.start(int(server_home.server.url.rpartition(":")[2]))
    with pytest.raises(L.LabtaskerHTTPStatusError, match="Invalid credentials"):
        listener.get_event(timeout=20)


@pytest.mark.parametrize("words, line", [
    (["--compact"], r"[\d-]{10} [\d:]{8}  task    ID  created -> pending"), (["--raw"], r'\{"sequence": 1, .*"entity_id": "ID".*\}'),
    ([], r"[\d-]{10} [\d:]{8}  task    ID  created -> pending\n    heard  a=1")])
def test_event_listen(home, words, line):
    process = home.start_cli("event", "listen", *words)
    wait_until(lambda: "Connected" in process.log_path.read_text(), "it is connected")
    task_id = home.submit("--name", "heard", "--", "--a=1")
    pattern = re.compile(line.replace("ID", task_id) + "\n")
    wait_until(lambda: pattern.search(process.log_path.read_text()), "the event", never=lambda _: process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and "Traceback" not in process.log_path.read_text()


def test_events_from_before_are_had_by_the_id_of_one_seen(both):
    """Also all that are kept, with "0.0"; and a listener ends with its `with`."""
    with L.connect_events() as listener:
        run_one()
        ids = [listener.get_event(timeout=20).id for _ in RAN]
    assert not listener.is_connected()
    with L.EventListener(after=ids[0]) as again:
        assert heard(again, 2) == RAN[1:]
        run_one()
        assert heard(again, 3) == RAN
    with L.connect_events(after="0.0") as every:
        assert heard(every, 6) == RAN * 2
        with every:  # what was started goes on
            assert every.is_connected()


@pytest.mark.parametrize("after", ["", "x", "17", "1.x", " 1.0", "1.0\n", 17, 1.5, b"1.0"])
def test_an_id_that_is_none_of_an_event_is_refused_at_once(after):
    with pytest.raises(L.LabtaskerValueError, match="is no event's id"):
        L.connect_events(after=after)


def test_an_id_that_the_store_does_not_have_is_told_of_and_what_follows_is_heard(door):
    do_steps(door)
    listener = Listener(door, "999.0")
    first = threading.Timer(0.2, do_steps, [door])
    first.start()
    assert len(listener.read(6)) == 6
    assert "there is no event 999.0" in [data for kind, data in listener.other if kind == "too_old"][0]["detail"]


def test_events_from_before_are_refused_where_the_server_gives_them_no_ids(home, monkeypatch):
    lines = L.Lines(iter([b'event: connection\n', b'data: {"client_id": "c"}\n', b"\n"]), lambda: None)
    monkeypatch.setattr(L.Client, "listen", lambda self, after, timeout_s: lines)
    with pytest.raises(L.LabtaskerRuntimeError, match="gives events no ids"):
        L.connect_events(after="1.0")


def test_help_events_fits_a_terminal_and_its_python_hears_events(home, capsys):
    text = L.events_reference()
    assert max(map(len, text.split("\n"))) <= 80
    code = re.search(r"(?s)\n    import labtasker\n.*?(?=\n\n)", text).group().replace("\n    ", "\n")
    heard = []

    class Ended(Exception):
        pass

    class Print:
        def __call__(self, *words):
            heard.append(words)
            if len(heard) == 3:
                raise Ended
    timer = threading.Timer(0.2, run_one)
    timer.start()
    with pytest.raises(Ended):
        exec(code, {"print": Print()})
    assert [state for _, _, state in heard] == [step[2] for step in RAN]


@pytest.mark.parametrize("kept", [10000, 1])
def test_the_last_event_before_a_compaction_is_known_after_it(door, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(L, "MAX_EVENTS", kept)
    worker_id = door.worker()
    door.submit(args={"a": 1})
    door.report(door.fetch(worker_id=worker_id), "failed", worker_id=worker_id)  # two steps on a line
    door("PUT", "/api/v1/queues/me", {"metadata": {"a": 1}})  # a line without one, as the last line is not compacted
    last = Listener(door, "0.0")
    last.read(6)
    assert last.events[-1]["id"].endswith(".1")
    L.compact(door.path)
    fresh = Door(tmp_path, door.clock)
    fresh("GET", "/api/v1/queues/me")
    listener = Listener(fresh, last.events[-1]["id"])
    do_steps(fresh)
    assert listener.read(7) and [kind for kind, _ in listener.other] == ["connection"]


def test_what_stands_behind_a_point_on_its_line_is_an_event_of_its_own():
    task, other = (L.TaskRecord(task_id=name, status="cancelled") for name in ("one", "two"))
    changes = [["point", "one", {}, None, {"step": 1}], ["task", "one", {}, "running"], ["task", "two", {}, "pending"]]
    steps = L.transitions_of(7, 5.0, "q", changes, [(None, None, None, new) for new in (task, task, other)])
    assert [(step.k, step.kind, step.old_state, step.record.task_id) for step in steps] == [
        (0, "task", "running", "one"), (1, "task", "pending", "two")]


def with_queue(folder, is_server):
    """Return a store with a queue named default."""
    store = L.Store(str(folder / "journal.jsonl"), is_server=is_server)
    if is_server:
        store.file.open()
    assert L.answer_call(store, None, "POST", "/api/v1/queues", {"queue_name": "default", "password": "p"})[0] == 201
    return store


@pytest.mark.parametrize("is_server", [True, False])
def test_a_listener_that_waits_looks_seldom_and_writes_nothing(tmp_path, monkeypatch, is_server):
    store, looked, news = with_queue(tmp_path, is_server), [], L._news
    monkeypatch.setattr(store.owner, "move", None)
    monkeypatch.setattr(L, "_news", lambda *words: looked.append(0) or news(*words))
    assert next(L.follow(store, L.LocalName("default"), (0, 0), 0.1)) is None
    assert len(looked) < 20


@pytest.mark.parametrize("method, body", [("PUT", {"new_password": "other"}), ("DELETE", None)])
def test_a_stream_ends_once_its_caller_may_no_longer_use_the_queue(tmp_path, method, body):
    store = with_queue(tmp_path, True)
    (queue_id, queue), = store.state.queues.items()
    caller = L.CallerQueueId(queue_id, queue.record.password)
    events = L.follow(store, caller, L.last_event(store), 0.01)
    assert next(events) is None
    assert L.answer_call(store, lambda: caller, method, "/api/v1/queues/me", body)[0] in (200, 204)
    assert next(events, "the end") == "the end"
