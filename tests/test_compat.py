"""Labtasker 1.0.1 itself as the peer: its commands and scripts on our server, ours on its server, the same wire on both.

`tox -e compat` installs it, in an environment of its own, and says in LT_TEST_PEER where its commands are. Each
command's output is looked through for warnings, which 1.0.1 prints at each field that it does not know. Where 1.0.1
does other than the protocol's page says, the row or the line says how.
"""
import json
import os
import re
import signal
import sys
import textwrap

import pytest

import harness
import labtasker as L
from harness import PASSWORD, wait_until

PEER = os.environ.get("LT_TEST_PEER", "")
if not os.path.exists(os.path.join(PEER, "labtasker-server")):
    pytest.skip("LT_TEST_PEER names no folder with the commands of labtasker 1.0.1: tox -e compat",
                allow_module_level=True)
THEIRS = {"PYTHONPATH": "", "PYTHONWARNINGS": "", "PYTHONDEVMODE": ""}  # Python's warnings in what 1.0.1 imports are no fault of ours
ME = "/api/v1/queues/me"
COMPLAINT = re.compile(r"(?i)warning|unknown fields? |deprecat|mismatch|exception ignored|\bbug\b")


def quiet(result):
    """Return the result of a command that complained of nothing."""
    found = COMPLAINT.search((result.stdout + result.stderr).replace("Warning: Input is not a terminal", ""))  # theirs, of stdin
    assert not found, "%r in %r" % (found.group(), result)
    return result


class TheirServer:
    """A server of 1.0.1 on a free port, its database a file in `folder`."""

    def __init__(self, folder):
        import socket
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url, self.process = folder, "http://127.0.0.1:%d" % self.port, None
        self.start()

    def start(self):
        self.process = harness.start(
            [os.path.join(PEER, "labtasker-server"), "serve", "--host", "127.0.0.1", "--port", self.port, "--db-path",
             self.folder / "db.json"], self.folder, self.folder / "log", THEIRS)
        wait_until(self.answers, "their server answers", 60, never=lambda _: self.process.poll() is not None)

    def answers(self):
        try:
            return harness.http("GET", self.url + "/health")[0] == 200
        except OSError:
            return False

    def stop(self):
        harness.end_group(self.process)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    server = TheirServer(tmp_path_factory.mktemp("theirs"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with harness.Server(tmp_path_factory.mktemp("ours"), queue=None) as server:
        yield server
    harness.check_store(server.folder)


class Side:
    """A queue of its own on a server, and a folder to work on it with their client or with ours."""

    def __init__(self, folder, url, queue, is_theirs):
        self.folder, self.url, self.queue, self.is_theirs = folder, url, queue, is_theirs
        self.words = [os.path.join(PEER, "labtasker")] if is_theirs else [sys.executable, "-m", "labtasker"]
        self.env = THEIRS if is_theirs else {
            "LABTASKER_URL": url, "LABTASKER_QUEUE": queue, "LABTASKER_PASSWORD": PASSWORD}
        (folder / ".labtasker").mkdir(parents=True)
        (folder / ".labtasker" / "client.toml").write_text(textwrap.dedent("""\
            version_check = false
            [endpoint]
            api_base_url = "%s"
            [queue]
            queue_name = "%s"
            password = "%s"
            """) % (url, queue, PASSWORD))


    def cli(self, *args, **options):
        """Return the Result of the command, which must not complain."""
        return quiet(harness.run(self.words + list(args), self.folder, env=self.env, **options))

    def start(self, *args):
        log = self.folder / "started.log"
        process = harness.start(self.words + list(args), self.folder, log, self.env)
        process.log_path = log
        return process

    def python(self, text, *args, **options):
        """Return the Result of a script, which must not complain."""
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(text))
        python = os.path.join(PEER, "python") if self.is_theirs else sys.executable
        return quiet(harness.run([python, path] + list(args), self.folder, env=self.env, **options))

    def wire(self, method, path, body=None):
        """Return (status, answer) of a plain request."""
        return harness.http(method, self.url + path, body, (self.queue, PASSWORD))[:2]

    def tasks(self):
        """Return the queue's tasks, oldest first."""
        answer = self.wire("POST", ME + "/tasks/search", {"limit": 1000, "sort": [["created_at", 1]]})[1]
        return answer["content"]


def open_side(request, tmp_path, url, is_theirs, kind=Side):
    queue = re.sub(r"\W", "_", request.node.name)[-90:]
    side = kind(tmp_path / "side", url, queue, is_theirs)
    if "queues" not in queue:  # that test makes its own
        status, answer, _ = harness.http("POST", url + "/api/v1/queues", {"queue_name": queue, "password": PASSWORD})
        assert status == 201, answer
    return side


@pytest.fixture(params=["theirs_on_ours", "ours_on_theirs"])
def side(request, tmp_path):
    """Their client on our server, then our client on theirs."""
    is_theirs = request.param == "theirs_on_ours"
    return open_side(request, tmp_path, request.getfixturevalue("ours" if is_theirs else "theirs").url, is_theirs)


@pytest.fixture
def our_side(request, tmp_path, theirs):
    """Our client on their server."""
    return open_side(request, tmp_path, theirs.url, False)


# ---- The commands


def test_health_and_queues(side):
    assert "healthy" in side.cli("health").stdout
    assert side.queue in side.cli("queue", "create-from-config").stdout + side.cli("queue", "get").stdout
    status, queue = side.wire("GET", ME)
    assert (status, queue["queue_name"], queue["metadata"]) == (200, side.queue, {})
    side.cli("queue", "create", "--queue-name", side.queue + "2", "--password", "p", "--metadata", '{"a": {"b": 1}}')
    assert harness.http("GET", side.url + ME, auth=(side.queue + "2", "p"))[1]["metadata"] == {"a": {"b": 1}}
    side.cli("queue", "update", "--metadata", '{"x": 1, "y": {"z": 2}}')
    side.cli("queue", "update", "--metadata", '{"x": 3}')
    assert side.wire("GET", ME)[1]["metadata"] == {"x": 3, "y": {"z": 2}}
    side.cli("queue", "update", "--metadata", "{}")
    assert side.wire("GET", ME)[1]["metadata"] == {}
    again = side.cli("queue", "create", "--queue-name", side.queue, "--password", "p", check=False)
    assert again.returncode and "exists" in again.stdout + again.stderr
    side.cli("queue", "delete", "--cascade", "--yes")
    assert side.wire("GET", ME)[0] == 401
    if not side.is_theirs:  # theirs tries for ten seconds, prints nothing and exits with 0, whosever the server is
        refused = side.cli("task", "ls", check=False)
        assert refused.returncode == 3 and "Invalid credentials" in refused.stderr


def test_submitting_listing_updating_and_deleting(side):
    side.cli("task", "submit", "--name", "first", "--metadata", '{"tags": ["v1"]}', "--priority", "5", "--max-retries", "7",
             "--", "--lr=0.1", "--opt.m=x", "--flag=True")
    side.cli("task", "submit", "--args", '{"lr": 0.2, "opt": {"m": "y"}}')
    first, second = side.tasks()
    assert (first["args"], first["priority"], first["max_retries"], first["metadata"]) == (
        {"lr": 0.1, "opt": {"m": "x"}, "flag": True}, 5, 7, {"tags": ["v1"]})
    assert (second["args"], second["priority"], second["max_retries"]) == (
        {"lr": 0.2, "opt": {"m": "y"}}, 10 if side.is_theirs else 0, 3)
    for fmt in ["yaml", "jsonl"] + ([] if side.is_theirs else ["csv", "table"]):
        shown = side.cli("task", "ls", "--fmt", fmt, "--no-pager", "--no-ansi", "-S", "created_at:desc").stdout
        assert -1 < shown.find(second["task_id"][:8]) < shown.find(first["task_id"][:8]) and "v1" in shown or fmt == "table"
    ids = side.cli("task", "ls", "-q", "--no-pager", "-f", 'args.lr > 0.15 and status == "pending"', "--limit", "1000").stdout
    assert ids.split() == [second["task_id"]]
    assert side.cli("task", "ls", "-q", "--no-pager", "--id", first["task_id"]).stdout.split() == [first["task_id"]]
    side.cli("task", "update", "--id", first["task_id"], "-u", "args.opt.m=z", "-u", "metadata.note=hi", "--quiet")
    side.cli("task", "update", "-s", "pending", "-f", "args.lr == 0.2", "--quiet", "--", "priority=9", "status=cancelled")
    first, second = side.tasks()
    assert (first["args"]["opt"], first["metadata"], first["status"]) == ({"m": "z"}, {"tags": ["v1"], "note": "hi"}, "pending")
    assert (second["status"], second["priority"]) == ("cancelled", 9)
    side.cli("task", "update", "--name", "first", "--reset-pending", "-u", "task_name=renamed", "--quiet")
    side.cli("task", "update", "--id", second["task_id"], "--reset-pending", "-u", "priority=1", "--quiet")
    assert [(task["status"], task["task_name"]) for task in side.tasks()] == [("pending", "renamed"), ("pending", None)]
    side.cli("task", "delete", "-y", stdin=ids)
    side.cli("task", "delete", first["task_id"], "--yes")
    assert side.tasks() == []
    gone = side.cli("task", "update", "--id", first["task_id"], "-u", "priority=1", "--quiet", check=False)
    assert gone.returncode or side.is_theirs  # theirs finds nothing to update, which is no failure


def test_a_loop_of_the_command_line(side):
    side.python("""
        import labtasker
        for i in range(4):
            labtasker.submit_task(task_name="t%d" % i, args={"i": i, "deep": {"er": "a b"}}, metadata={"tags": ["even"] * (i % 2 == 0)})
        labtasker.submit_task(args={"other": 1})
    """)
    script = side.folder / "job.sh"
    script.write_text("test %(i) != 0 || exit 3\necho ran %(i) %(deep.er) > out-%(i)\n")
    side.cli("loop", "-f", '"even" in list(metadata.tags)', "--eta-max", "1h30m", "--script-path", str(script))
    failed, second, two, four, other = side.tasks()
    assert (failed["status"], failed["retries"], failed["worker_id"]) == ("failed", 3, None)
    assert (two["status"], two["task_timeout"], two["worker_id"], second["status"], other["status"]) == (
        "success", 5400, None, "pending", "pending")
    assert (side.folder / "out-2").read_text() == "ran 2 a b\n"
    side.cli("loop", "--", "sh", "-c", "echo again %(i) %(deep.er) >> out-%(i)")
    assert (side.folder / "out-3").read_text() == "again 3 a b\n"
    assert [task["status"] for task in side.tasks()] == ["failed", "success", "success", "success", "pending"]


def test_workers(side):
    worker = side.cli("worker", "create", "--name", "w1", "--metadata", '{"gpu": "a"}', "--max-retries", "2", "--quiet").stdout.strip()
    for fmt in ("yaml", "jsonl"):
        assert worker in side.cli("worker", "ls", "--fmt", fmt, "--no-pager", "--no-ansi", "-s", "active", "-f", 'metadata.gpu == "a"').stdout
    assert side.cli("worker", "ls", "-q", "--no-pager", "--name", "w2").stdout.strip() == ""
    side.cli("worker", "report", worker, "suspended")
    side.cli("task", "submit", "--", "--i=1")
    script = """
        import sys, labtasker
        try:
            labtasker.fetch_task(worker_id=sys.argv[1], heartbeat_timeout=9)
        except labtasker.WorkerSuspended:
            print("refused")
        """
    assert side.python(script, worker).stdout == "refused\n"
    side.cli("worker", "report", worker, "active")
    ran = side.cli("loop", "--worker-id", worker, "--", "sh", "-c", "exit %(i)", check=False)
    assert side.wire("GET", ME + "/workers/" + worker)[1]["status"] == "crashed", ran
    assert side.wire("GET", ME + "/workers/" + worker)[1]["retries"] == 2
    assert (side.tasks()[0]["status"], side.tasks()[0]["retries"]) == ("pending", 2)
    side.cli("worker", "delete", worker, "--yes")
    assert side.wire("GET", ME + "/workers/" + worker)[0] == 404


def test_event_listen(side):
    for words, pattern in ((["--compact"], r"created +-> pending"), (["--raw"], r"created"), ([], r"created")):
        process = side.start("event", "listen", *words)
        try:
            wait_until(lambda: "onnected" in process.log_path.read_text(), "it is connected", 30)
            task_id = side.wire("POST", ME + "/tasks", {"args": {"a": 1}})[1]["task_id"]
            wait_until(lambda: task_id in process.log_path.read_text().replace("\n", "").replace(" ", ""), "the event",
                       never=lambda _: process.poll() is not None)
            process.send_signal(signal.SIGINT)
            process.wait(20)
            assert re.search(pattern, process.log_path.read_text()) and not COMPLAINT.search(process.log_path.read_text())
        finally:
            harness.end_group(process)
            process.log_path.unlink()


# ---- The Python API


LOOPS = """
    import json, sys, warnings
    warnings.simplefilter("error", UserWarning)
    import labtasker
    from labtasker import Required
    from labtasker.api_models import TaskUpdateRequest

    def submit(name, **args):
        return labtasker.submit_task(task_name=name, args=args, metadata={"loop": name}, max_retries=2).task_id

    good, bad, ended = submit("fields", a=1, b="x"), submit("fields", a=0, b="x"), submit("fields", a=2, b="x")
    nested, loose, stopped = submit("nested", g={"m": 1, "n": 2}), submit("loose", lr=1, more=2), submit("stopped", a=1)

    @labtasker.loop(extra_filter='metadata.loop == "fields"')
    def fields(a: int = Required(), name=Required(alias="b")):
        task = labtasker.task_info()
        assert labtasker.current_task_id() == task.task_id and labtasker.is_enabled() and labtasker.current_worker_id()
        (labtasker.get_labtasker_log_dir() / "kept").write_text("x")
        labtasker.update_tasks([TaskUpdateRequest(task_id=task.task_id, metadata={"seen": {"a": a}})])
        labtasker.refresh_task_heartbeat(task.task_id)
        if a == 2:
            return labtasker.finish("success", {"by": "finish"})
        labtasker.update_tasks([TaskUpdateRequest(task_id=task.task_id, summary={"inverse": 1 / a})])
    fields()

    @labtasker.loop(extra_filter={"metadata.loop": "nested"}, create_worker_kwargs={"worker_name": "w"}, eta_max="1h")
    def nested_job(g=Required(resolver=lambda g: sum(g.values()))):
        labtasker.finish("success", {"sum": g})
    nested_job()

    @labtasker.loop(required_fields=["lr", "more"], pass_args_dict=True)
    def loose_job(args):
        labtasker.finish("success", dict(args))
    loose_job()

    @labtasker.loop(extra_filter='metadata.loop == "stopped"')
    def stopped_job(a=Required()):
        labtasker.report_task_status(task_id=labtasker.task_info().task_id, status="cancelled")
    stopped_job()

    rows = {task.task_id: task for task in labtasker.ls_tasks(limit=1000).content}
    print(json.dumps([[rows[i].status, rows[i].retries, rows[i].metadata.get("seen"), rows[i].summary]
                      for i in (good, bad, ended, nested, loose, stopped)]))
"""


def test_loops_of_scripts(side):
    rows = json.loads(side.python(LOOPS).stdout.splitlines()[-1])
    exception = rows[1][3]
    assert "ZeroDivisionError" in json.dumps(exception)
    rows[1][3] = None
    assert rows == [["success", 0, {"a": 1}, {"inverse": 1.0}], ["failed", 2, {"a": 0}, None], ["success", 0, {"a": 2}, {"by": "finish"}],
                    ["success", 0, None, {"sum": 3}], ["success", 0, None, {"lr": 1, "more": 2}], ["cancelled", 0, None, {}]]


API = """
    import sys, warnings
    warnings.simplefilter("error", UserWarning)
    import labtasker as L
    from labtasker.api_models import TaskUpdateRequest

    def refused(status, call, *args, **options):
        try:
            call(*args, **options)
        except L.LabtaskerHTTPStatusError as error:
            code = error.response.status_code if hasattr(error, "response") else error.status_code
            assert code == status, (code, error)
        except L.LabtaskerRuntimeError as error:  # 1.0.1's for a task of another worker
            assert status == 409 and "worker" in str(error)
        else:
            raise AssertionError("%s was not refused" % call)

    assert L.health_check().status == "healthy"
    queue = L.update_queue(metadata_update={"a": 1})
    assert queue.metadata == {"a": 1} and L.get_queue().queue_id == queue.queue_id and queue.created_at.year > 2000
    refused(409, L.create_queue, queue.queue_name, "p")
    worker = L.create_worker("w", {"gpu": 1}, max_retries=2)
    ids = [L.submit_task("t%d" % i, {"i": i, "n": {"x": i}}, {"odd": i % 2}, ["run", "me"], 60, 600, 3, i).task_id for i in range(4)]
    got = L.fetch_task(worker_id=worker, required_fields=["i", "n"], extra_filter="metadata.odd == 0", cmd="me", eta_max="10 min")
    assert got.found and got.task.task_id == ids[2] and got.task.args == {"i": 2, "n": {"x": 2}}
    assert (got.task.status, got.task.worker_id, got.task.heartbeat_timeout, got.task.task_timeout) == ("running", worker, 60.0, 600)
    assert not L.fetch_task(required_fields=["i"], heartbeat_timeout=9).found
    L.refresh_task_heartbeat(ids[2], worker)
    refused(403, L.refresh_task_heartbeat, ids[2], "00000000-0000-4000-8000-000000000000")
    refused(404, L.refresh_task_heartbeat, ids[0])
    refused(409, L.report_task_status, ids[2], "success", worker_id="00000000-0000-4000-8000-000000000000")
    refused(404, L.fetch_task, worker_id="00000000-0000-4000-8000-000000000000", heartbeat_timeout=9)
    L.report_task_status(ids[2], "failed", {"why": "x"}, worker)
    task, = L.ls_tasks(task_id=ids[2]).content
    assert (task.status, task.retries, task.worker_id, task.summary) == ("pending", 1, None, {"why": "x"})
    assert L.ls_workers(worker_id=worker).content[0].retries == 1
    changed = L.update_tasks([TaskUpdateRequest(task_id=ids[0], args={"n.y": 5}, priority=50),
                              TaskUpdateRequest(task_id=ids[1], args={"k": 1}, replace_fields=["args"])])
    assert [t.args for t in changed.content] == [{"i": 0, "n": {"x": 0, "y": 5}}, {"k": 1}]
    reset = L.update_tasks([TaskUpdateRequest(task_id=ids[2])], reset_pending=True).content[0]
    assert (reset.status, reset.retries) == ("pending", 0)
    refused(400, L.update_tasks, [TaskUpdateRequest(task_id="nosuch", priority=1)])
    refused(400, L.report_task_status, ids[0], "success")
    L.report_task_status(ids[3], "cancelled")
    assert [t.task_id for t in L.ls_tasks(status="cancelled").content] == [ids[3]]
    assert [t.task_id for t in L.ls_tasks(limit=2, offset=1, sort=[("task_name", -1)]).content] == [ids[2], ids[1]]
    L.report_worker_status(worker, "suspended")
    try:
        L.fetch_task(worker_id=worker, heartbeat_timeout=9)
        raise SystemExit("a suspended worker got a task")
    except L.WorkerSuspended:
        pass
    L.report_worker_status(worker, "active")
    listener = L.connect_events(timeout=10)
    assert listener.is_connected() and listener.get_client_id()
    L.delete_task(ids[3])
    refused(404, L.delete_task, ids[3])
    new = L.submit_task(args={"z": 1}).task_id
    event = listener.get_event(timeout=10) or listener.get_event(timeout=10)  # 1.0.1's first is None, at once
    assert (event.event.entity_id, event.event.old_state, event.event.new_state) == (new, "created", "pending")
    assert event.event.entity_data["args"] == {"z": 1} and event.sequence >= 1
    listener.stop()
    L.delete_worker(worker)
    assert L.ls_workers().content == []
    L.delete_queue(cascade_delete=True)
    refused(401, L.get_queue)
    print("done")
"""


OWN_STATUS = """
    import labtasker as L

    for status in ("success", "failed", "cancelled"):  # the skill document's way to add to a summary
        one = L.submit_task(args={"own": status}, max_retries=1).task_id
        task = L.fetch_task(required_fields=["own"], eta_max="1h", heartbeat_timeout=60, start_heartbeat=False).task
        assert task.task_id == one
        L.report_task_status(one, status, {"acc": 1})
        L.report_task_status(one, status, {"rank": 1})
        L.report_task_status(one, status)
        done = L.get_task(one)
        assert (done.status, done.summary) == (status, {"acc": 1, "rank": 1}), done
        try:
            L.report_task_status(one, "failed" if status == "success" else "success", {"no": 1})
        except L.LabtaskerHTTPStatusError as error:
            assert error.status_code == 400 and "no" not in L.get_task(one).summary
        else:
            raise AssertionError("a status that the task has not is taken")
    print("done")
"""


def test_a_report_of_a_finished_tasks_own_status_adds_to_its_summary(our_side):
    assert our_side.python(OWN_STATUS).stdout.splitlines()[-1] == "done"


def test_every_function_of_scripts(side):
    assert side.python(API).stdout.splitlines()[-1] == "done"


# ---- Filters

TASKS = [  # task_name, args, metadata
    ("g1", {"lr": 0.1, "a": 3, "b": 1, "model": "vit", "layers": [1, 2]}, {"tags": ["v1", "new"], "n": 1}),
    ("g2", {"lr": 0.01, "a": 1, "b": 1, "model": "resnet", "opt": {"k": None}}, {"tags": ["v2"]}),
    ("h1", {"lr": 1, "model": "vit"}, {}),
]
FILTERS = [  # filter text, the names of the tasks that match on both servers
    ("args.lr == 0.1", "g1"), ("args.lr > 0.01", "g1 h1"), ("0.05 < args.lr", "g1 h1"), ("args.lr >= 0.01 and args.lr <= 0.1", "g1 g2"),
    ('args.model == "vit" or task_name == "g2"', "g1 g2 h1"), ('task_name in ["g2", "h1"]', "g2 h1"), ('"v1" in list(metadata.tags)', "g1"),
    ('"k" in dict(args.opt)', "g2"), ("exists(metadata.tags)", "g1 g2"), ("exists(args.layers, False)", "g2 h1"),
    ('regex(task_name, "^g")', "g1 g2"), ('created_at >= date("3 hours ago")', "g1 g2 h1"), ('created_at < date("10 minutes ago")', ""),
    ("args.a > args.b + 1", "g1"), ('args.opt["k"] == None', "g1 g2 h1"), ("args.layers[1] == 2", "g1"), ('status == "pending" and priority < 99', "g1 g2 h1"),
    ("args.a % 2 == 1", "g1 g2"), ("-args.a == -1", "g2"), ("args.layers == [1, 2]", "g1"), ("args.a / args.b > 2", "g1"),
    ("args.a - args.b > 2 - 1", "g1"), ("1 in list(args.layers)", "g1"), ('"lr" in dict(args)', "g1 g2 h1"), ("args.layers[1] + 1 == 3", "g1"),
    ("args.model == metadata.model", ""), ("True", "g1 g2 h1"), ("False", ""), ("worker_id == None", "g1 g2 h1"),
    ('(args.lr == 1 or args.lr == 0.1) and regex(args.model, r"^v\\w+$")', "g1 h1"), ("summary.acc > 0", ""), ('"nosuch" in list(metadata.tags)', ""),
]


def test_filters(side):
    for name, args, metadata in TASKS:
        side.wire("POST", ME + "/tasks", {"task_name": name, "args": args, "metadata": metadata, "priority": 1})
    found = side.python("""
        import json, sys, labtasker
        for text in json.loads(sys.argv[1]):
            try:
                print(" ".join(sorted(task.task_name for task in labtasker.ls_tasks(extra_filter=text).content)))
            except Exception as error:
                print(type(error).__name__, " ".join(str(error).split()))
        """, json.dumps([text for text, _ in FILTERS])).stdout.splitlines()
    assert list(zip([text for text, _ in FILTERS], found)) == FILTERS


# ---- Our client on their server


class Recorded:
    """A transport that remembers what is sent."""

    def __init__(self, transport):
        self.transport, self.sent = transport, []

    def __getattr__(self, name):
        return getattr(self.transport, name)

    def call(self, method, path, query, body):
        self.sent.append((method, path, query or {}, json.loads(body) if body else {}))
        return self.transport.call(method, path, query, body)


def test_nothing_of_ours_is_sent_to_their_server(our_side, monkeypatch):
    for name, value in our_side.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(our_side.folder)
    monkeypatch.setattr(L, "PLAIN_LIMIT", 3)
    monkeypatch.setattr(L, "_client", None)
    transport = Recorded(L.transport_for(L.load_config()))
    L.use_client(L.Client(transport))
    ids = [L.submit_task(args={"i": 0}).task_id] + L.submit_tasks([{"args": {"i": i}} for i in range(1, 8)])
    assert {task["priority"] for task in our_side.tasks()} == {0}
    assert [t.task_id for t in L.ls_tasks(limit=10 ** 9, sort=[["args.i", -1]]).content] == ids[::-1]
    assert [t.task_id for t in L.ls_tasks(limit=4, offset=2).content] == ids[2:6]
    assert [t.task_id for t in L.ls_tasks(limit=99, status="pending", extra_filter='status == "failed" or args.i > 3').content] == ids[4:]
    assert L.ls_tasks(limit=99, extra_filter={"args.i": 99}).found is False
    updates = [L.TaskUpdateRequest(task_id=task_id, metadata={"n": 1}) for task_id in ids]
    assert [t.task_id for t in L.update_tasks(updates).content] == ids
    execute = {0: "success", 1: "pending"}

    def job(loop, run):
        loop.start_beats(run)
        L.deliver(run.task_id, "running", {"step": 1}, run.worker_id, run.run_id)
        return L.Outcome(execute.get(run.task.args["i"], "failed"), {"i": run.task.args["i"]}, "a reason")
    loop = L.Loop(job, {"required_fields": ["i"]}, max_tasks=3, idle_timeout_s=1)
    assert loop.run() == 0 and dict(loop.account.counts()) == {"success": 1, "pending": 1, "retry": 1}
    rows = our_side.tasks()
    assert [(t["status"], t["retries"], t["summary"]) for t in rows[:3]] == [
        ("success", 0, {"step": 1, "i": 0}), ("pending", 0, {"step": 1, "i": 1}), ("pending", 1, {"step": 1, "i": 2})]
    for method, path, query, body in transport.sent:
        ours = L.OUR_FIELDS.get((method, path.rsplit("/", 1)[-1]), ())
        assert isinstance(body, (dict, list)) and not set(ours) & (set(query) | set(body if isinstance(body, dict) else ())), (path, body)
    L.use_client(None)


def test_commands_of_ours_alone_on_their_server(our_side):
    """Those that 1.0.1 lacks are made of the plain protocol."""
    side = our_side
    side.cli("task", "submit", "--grid", "--name", "grid", "--", "--i=1,2,3", "--kind=a,b")
    assert re.search(r"pending +6\n", side.cli("task", "count", "--name", "grid").stdout)
    first = side.tasks()[0]["task_id"]
    assert "args:\n  i: 1" in side.cli("task", "get", first[:8]).stdout
    assert len(side.cli("task", "ls", "-q", "--limit", "100000", "-s", "pending").lines) == 6
    assert "Labtasker 1.0" in side.cli("health").stdout
    side.cli("loop", "--", "sh", "-c", "test %(i)%(kind) != 2b")
    assert side.cli("task", "wait", "--quiet", check=False).returncode == 4
    assert side.cli("task", "count", "--by", "status", "-s", "failed").lines[-1].split() == ["total", "1"]
    side.cli("task", "retry")
    side.cli("loop", "--", "true", "%(i)", "%(kind)")
    assert side.cli("task", "wait", "--quiet").returncode == 0
    side.cli("task", "delete", "--name", "grid", "-y")
    assert side.tasks() == []


def test_the_output_of_runs_is_kept_in_packs_and_found_though_their_server_knows_no_attempts(our_side):
    for number in range(3):
        our_side.cli("task", "submit", "--max-retries", "2", "--", "--i=%d" % number)
    ids = [task["task_id"] for task in our_side.tasks()]
    our_side.cli("loop", "--", "sh", "-c", "echo out %(i); test %(i) != 2")
    logs = our_side.folder / ".labtasker" / "logs"
    assert [path.suffix for path in logs.iterdir()] == [".pack"]
    runs = harness.packed(logs.parent)
    assert [[run["output"] for run in runs[one]] for one in ids] == [["out 0\n"], ["out 1\n"], ["out 2\n"] * 2]
    assert [our_side.cli("task", "logs", one).stdout for one in ids] == ["out 0\n", "out 1\n", "out 2\n"]
    refused = our_side.cli("task", "logs", ids[2], "--attempt", "1", check=False)
    assert refused.returncode == 1 and "keeps no attempts" in refused.stderr
    our_side.cli("task", "retry", ids[2])
    process = our_side.start("loop", "--", "sh", "-c", "echo again %(i); until test -e gate; do sleep 0.05; done; echo last")
    try:
        wait_until(lambda: "again 2" in process.log_path.read_text(), "the job runs")
        assert our_side.cli("task", "logs", ids[2]).stdout == "again 2\n"
        (our_side.folder / "gate").write_text("")
        assert process.wait(30) == 0
    finally:
        harness.end_group(process)
    assert our_side.cli("task", "logs", ids[2]).stdout == "again 2\nlast\n" and not (logs / ids[2]).exists()
    our_side.cli("task", "delete", "--yes", *ids)
    our_side.cli("task", "submit", "--", "--i=1")
    our_side.cli("loop", "--", "true", "%(i)")
    assert [list(harness.packed(logs.parent))] == [[our_side.tasks()[0]["task_id"]]]  # packs whose tasks are gone are removed


def test_tasks_come_as_they_end_from_either_server(our_side):
    assert our_side.python("""
        import threading, time, labtasker as L
        ids = L.submit_tasks([{"args": {"n": n}} for n in range(4)])
        L.delete_task(ids[2])
        coming = L.as_completed(ids, timeout=60)

        def end():
            for n in (3, 1):
                task = L.fetch_task(heartbeat_timeout=60, extra_filter={"_id": ids[n]}).task
                L.report_task_status(task.task_id, "success", {"n": n})
        threading.Thread(target=end).start()
        print(*sorted(next(coming).summary["n"] for _ in "12"))
        L.update_tasks([L.TaskUpdateRequest(task_id=ids[0], status="cancelled")])
        print(*(task.status for task in coming))
        """).stdout.splitlines()[-2:] == ["1 3", "cancelled"]


def test_a_loop_that_is_stopped_hands_its_task_back_to_their_server(our_side):
    our_side.cli("task", "submit", "--", "--i=1")
    process = our_side.start("loop", "--", "sh", "-c", "echo begun %(i); sleep 60")
    try:
        wait_until(lambda: "begun 1" in process.log_path.read_text(), "the job runs")
        beat = our_side.tasks()[0]["last_heartbeat"]
        wait_until(lambda: our_side.tasks()[0]["last_heartbeat"] > beat, "it beats")
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        harness.end_group(process)
    task, = our_side.tasks()
    assert (task["status"], task["retries"], task["worker_id"]) == ("pending", 0, None)


def test_a_task_that_is_cancelled_on_their_server_ends_its_job(our_side):
    our_side.cli("task", "submit", "--", "--i=1")
    process = our_side.start("loop", "--", "sh", "-c", "echo begun %(i); sleep 60")
    try:
        wait_until(lambda: "begun 1" in process.log_path.read_text(), "the job runs")
        our_side.cli("task", "update", "--id", our_side.tasks()[0]["task_id"], "-u", "status=cancelled", "--quiet")
        assert process.wait(30) == 0
    finally:
        harness.end_group(process)
    assert our_side.tasks()[0]["status"] == "cancelled"


def test_a_listener_says_that_it_may_have_missed_events_of_their_server(tmp_path, monkeypatch, capsys):
    """Their server gives events no ids."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    server = TheirServer(folder)
    try:
        side = Side(tmp_path / "side", server.url, "q", False)
        harness.http("POST", server.url + "/api/v1/queues", {"queue_name": "q", "password": PASSWORD})
        for name, value in side.env.items():
            monkeypatch.setenv(name, value)
        listener = L.connect_events()
        server.stop()
        server.start()
        harness.http("POST", server.url + "/api/v1/queues", {"queue_name": "q", "password": PASSWORD})
        wait_until(listener.is_connected, "it is connected again", 30)
        task_id = side.wire("POST", ME + "/tasks", {"args": {"a": 1}})[1]["task_id"]
        assert listener.get_event(timeout=20).event.entity_id == task_id
        listener.stop()
    finally:
        server.stop()
    assert "can't say which events came meanwhile" in capsys.readouterr().err


# ---- The same wire on both

NOBODY = "00000000-0000-4000-8000-000000000000"
REQUESTS = [  # method, path, body, status; {t}: a pending task, {r}: one that worker {w} runs. Where 1.0.1 does otherwise: its status, how
    ("GET", "/", None, 200), ("GET", "/health", None, 200), ("GET", "/health/full", None, 200), ("GET", "/api/v1/polling", None, 200),
    ("GET", "/nosuch", None, 404), ("PATCH", ME, None, 405), ("GET", ME + "/tasks", None, 405),
    ("POST", "/api/v1/queues", {"queue_name": "{q}", "password": "p"}, 409), ("POST", "/api/v1/queues", {"queue_name": "a b", "password": ""}, 422),
    ("GET", ME, None, 200), ("PUT", ME, {"metadata_update": {"a": 1}}, 200), ("PUT", ME, {"new_queue_name": "a b"}, 422),
    ("POST", ME + "/tasks", {}, 400), ("POST", ME + "/tasks", {"args": {}, "cmd": ""}, 400), ("POST", ME + "/tasks", {"cmd": "x"}, 201),
    ("POST", ME + "/tasks", {"args": {"$a": 1}}, 422), ("POST", ME + "/tasks", {"args": {".a": 1}}, 422), ("POST", ME + "/tasks", {"args": {"a b": 1}}, 422),
    ("POST", ME + "/tasks", {"args": {"a": 1}, "task_name": "a b"}, 422), ("POST", ME + "/tasks", {"args": {"a": 1}, "task_name": "x" * 101}, 422),
    ("POST", ME + "/tasks", {"args": {"a": 1}, "priority": "x"}, 422), ("POST", ME + "/tasks", {"args": 1}, 422),
    ("POST", ME + "/tasks", {"args": {"a": 1}, "shiny": 1, "client_version": "1.0.1"}, 201),
    ("POST", ME + "/tasks/search", {}, 200), ("POST", ME + "/tasks/search", {"offset": -1}, 422), ("POST", ME + "/tasks/search", {"limit": "x"}, 422),
    ("POST", ME + "/tasks/search", {"task_id": NOBODY}, 200),
    ("POST", ME + "/tasks/next", {"start_heartbeat": False}, 400), ("POST", ME + "/tasks/next", {"worker_id": NOBODY, "heartbeat_timeout": 9}, 404),
    ("POST", ME + "/tasks/next", {"required_fields": ["nosuch"], "heartbeat_timeout": 9}, 200),
    ("POST", ME + "/tasks/{t}/status", {"status": "xx"}, 422), ("POST", ME + "/tasks/{t}/status", {}, 422),
    ("POST", ME + "/tasks/{t}/status", {"status": "success"}, 400), ("POST", ME + "/tasks/nosuch/status", {"status": "success"}, 404),
    ("POST", ME + "/tasks/{r}/status", {"status": "success", "worker_id": NOBODY}, 409),
    ("POST", ME + "/tasks/{r}/heartbeat", None, 204), ("POST", ME + "/tasks/{r}/heartbeat?worker_id={w}", None, 204),
    ("POST", ME + "/tasks/{r}/heartbeat?worker_id=" + NOBODY, None, 403), ("POST", ME + "/tasks/{t}/heartbeat", None, 404),
    ("GET", ME + "/tasks/{t}", None, 200), ("GET", ME + "/tasks/nosuch", None, 404), ("DELETE", ME + "/tasks/nosuch", None, 404),
    ("PUT", ME + "/tasks?reset_pending=false", [{"_id": "{t}", "priority": 3}], 200), ("PUT", ME + "/tasks?reset_pending=false", [{"task_id": "{t}"}], 200),
    ("PUT", ME + "/tasks?reset_pending=false", [{"_id": "{t}", "status": "pending"}], 200), ("PUT", ME + "/tasks?reset_pending=maybe", [{"_id": "{t}"}], 422),
    ("PUT", ME + "/tasks", [{"_id": "nosuch"}], 400), ("PUT", ME + "/tasks", [{"priority": 1}], 422), ("PUT", ME + "/tasks", {}, 422),
    ("PUT", ME + "/tasks?reset_pending=false", [{"_id": "{t}", "status": "success"}], 400), ("PUT", ME + "/tasks?reset_pending=false", [{"_id": "{t}", "status": "xx"}], 422),
    ("POST", ME + "/workers", {}, 201), ("POST", ME + "/workers/search", {}, 200),
    ("POST", ME + "/workers/{w}/status", {"status": "xx"}, 422), ("POST", ME + "/workers/nosuch/status", {"status": "active"}, 404),
    ("POST", ME + "/workers/{w}/status", {"status": "active"}, 200), ("GET", ME + "/workers/{w}", None, 200), ("GET", ME + "/workers/nosuch", None, 404),
    ("DELETE", ME + "/workers/nosuch", None, 404),
    ("PUT", ME, {"new_queue_name": "{q}"}, 200, 400, "a queue's own name is taken"),
    ("POST", ME + "/tasks", {"args": {"a": 1, "a.b": 2}}, 422, 500, "keys that collide are a bug of the server's"),
    ("POST", ME + "/tasks", {"args": {"a": 1}, "max_retries": -1}, 422, 201, "max_retries below 0 is taken"),
    ("POST", ME + "/tasks", {"args": {"a": 1}, "heartbeat_timeout": -5}, 422, 201, "a time-out below 0 is taken"),
    ("POST", ME + "/tasks", [{"args": {"a": 1}}], 201, 422, "lacks submitting many at once"),
    ("POST", ME + "/tasks/search", {"limit": 1001}, 200, 422, "shows at most 1000"), ("POST", ME + "/tasks/search", {"limit": 0}, 200, 422, "shows at least 1"),
    ("POST", ME + "/tasks/search", {"status": "xx"}, 422),
    ("POST", ME + "/tasks/search", {"extra_filter": {"args.a": {"$foo": 1}}}, 400, 500, "an unknown operator is a bug of the server's"),
    ("POST", ME + "/tasks/search", {"extra_filter": {"task_name": {"$regex": "("}}}, 400, 500, "a bad pattern is a bug of the server's"),
    ("POST", ME + "/tasks/search", {"extra_filter": {"$and": [{"args.a": 1}, True]}}, 400, 500, "its client makes this of `args.a == 1 and True`"),
    ("POST", ME + "/tasks/search", {"extra_filter": "args.a == 1"}, 200, 422, "lacks filter text"),
    ("POST", ME + "/tasks/next", {"eta_max": "soon"}, 422, 500, "a bad duration is a bug of the server's"),
    ("POST", ME + "/tasks/{r}/status", {"status": "running", "summary": {"a": 1}}, 200, 422, "lacks reports of running; its client has none either"),
    ("POST", ME + "/tasks/{t}/status", {"status": "cancelled", "worker_id": "{w}"}, 409, 409),
    ("PUT", ME + "/tasks?reset_pending=false", [{"_id": "{t}", "status": "running"}], 400),
    ("POST", ME + "/workers", {"worker_name": "a b"}, 422, 201, "a worker's name is not looked at ..."),
    ("POST", ME + "/workers/search", {}, 200, 500, "... and then no worker can be listed"),
    ("DELETE", ME + "/tasks/{t}", None, 204), ("DELETE", ME + "/workers/{w}?cascade_update=true", None, 204),
    ("DELETE", ME + "?cascade_delete=maybe", None, 422), ("DELETE", ME + "?cascade_delete=true", None, 204), ("GET", ME, None, 401),
]


class Plain(Side):
    """A side whose answers may be no JSON."""

    def wire(self, method, path, body=None):
        try:
            return super().wire(method, path, body)
        except ValueError:
            return 500, "no JSON"


def spelled(value, names):
    """Return the value with {names} in its texts replaced."""
    return json.loads(re.sub(r"\{(\w)\}", lambda found: names.get(found.group(1), found.group()), json.dumps(value)))


def shape(answer):
    """Return what an answer looks like: the fields of its objects, errors by the fields that they name."""
    if isinstance(answer, dict) and isinstance(answer.get("detail"), list):
        return sorted({tuple(row["loc"][:2]) for row in answer["detail"]})
    if isinstance(answer, dict):
        return {name: shape(value) for name, value in answer.items() if name not in LOOSE and value is not None}
    return [shape(row) for row in answer[:1]] if isinstance(answer, list) else type(answer).__name__.replace("float", "int")


LOOSE = ("notification", "metadata", "args", "summary", "message", "docs", "version", "server", "prev_polling")


def test_the_same_requests_get_the_same_answers(request, tmp_path, ours, theirs):
    sides = [open_side(request, tmp_path / str(is_theirs), server.url, is_theirs, Plain)
             for server, is_theirs in ((ours, False), (theirs, True))]
    names = []
    for side in sides:
        worker = side.wire("POST", ME + "/workers", {})[1]["worker_id"]
        ids = [side.wire("POST", ME + "/tasks", {"args": {"a": i}, "priority": 1000 - i, "task_name": "n"})[1]["task_id"] for i in range(2)]
        side.wire("POST", ME + "/tasks/next", {"worker_id": worker, "heartbeat_timeout": 60})
        names.append({"q": side.queue, "w": worker, "r": ids[0], "t": ids[1]})
    wrong = []
    for method, path, body, status, *otherwise in REQUESTS:
        mine, other = [side.wire(method, spelled(path, known), spelled(body, known)) for side, known in zip(sides, names)]
        expected = otherwise[0] if otherwise else status
        same = (mine[0], other[0]) == (status, expected) and (expected != status or shape(mine[1] or None) == shape(other[1] or None))
        if not same:
            wrong.append((method, path, body, "expected", status, expected, "got", mine, other))
    assert not wrong, "\n".join(map(repr, wrong))


def test_what_is_refused_is_not_done_here_and_is_done_there(request, tmp_path, ours, theirs):
    """1.0.1 answers 400 to an illegal move by PUT, and makes it; of several updates it makes those that it can; and
    it merges the first level of args alone, but for dotted keys, which our client therefore sends it."""
    told = []
    for server, is_theirs in ((ours, False), (theirs, True)):
        side = open_side(request, tmp_path / str(is_theirs), server.url, is_theirs)
        task_id = side.wire("POST", ME + "/tasks", {"args": {"a": {"x": 1, "y": 2}}})[1]["task_id"]

        def put(*updates):
            return side.wire("PUT", ME + "/tasks?reset_pending=false", [dict({"_id": task_id}, **update) for update in updates])[0]
        told.append([put({"status": "success"}), side.tasks()[0]["status"], put({"priority": 77}, {"_id": "nosuch"}), side.tasks()[0]["priority"],
                     put({"args": {"a.x": 3}}), side.tasks()[0]["args"], put({"args": {"a": {"x": 4}}}), side.tasks()[0]["args"]])
    assert told == [[400, "pending", 400, 0, 200, {"a": {"x": 3, "y": 2}}, 200, {"a": {"x": 4, "y": 2}}],
                    [400, "success", 400, 77, 200, {"a": {"x": 3, "y": 2}}, 200, {"a": {"x": 4}}]]


def test_nan_becomes_null_on_their_server(ours, theirs, request, tmp_path):
    for server, is_theirs, kept in ((ours, False, "NaN"), (theirs, True, "null")):
        side = open_side(request, tmp_path / str(is_theirs), server.url, is_theirs)
        side.wire("POST", ME + "/tasks", {"args": {"a": float("nan")}})
        assert json.dumps(side.tasks()[0]["args"]) == '{"a": %s}' % kept


def test_a_complaint_would_be_seen(tmp_path):
    """1.0.1 warns of an answer's field that it does not know: the tests above would see it."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "healthy", "database": "connected", "shiny": 1}')

        def log_message(self, *words):
            pass
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        side = Side(tmp_path / "side", "http://127.0.0.1:%d" % server.server_port, "q", True)
        with pytest.raises(AssertionError, match="shiny"):
            side.cli("health")
        server.shutdown()
