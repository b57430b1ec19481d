"""Section 7: a real server and real sockets."""
import base64
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

import harness
import labtasker as L
from harness import MODULE, PASSWORD, QUEUE, Server, clean_env, end_group, http, run_cli, start, wait_until

pytestmark = pytest.mark.slow


def talk(server, data, replies=1):
    """Return all that the server sends on one connection after these bytes, until it closes or has said enough."""
    host, port = server.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        got = b""
        while got.count(b"HTTP/1.1 ") < replies or not got.endswith((b"}", b"\r\n\r\n")):
            more = connection.recv(65536)
            if not more:
                break
            got += more
        return got


def test_a_connection_is_kept_for_many_requests(server):
    got = talk(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3, replies=3)
    assert got.count(b"HTTP/1.1 200 OK") == 3 and got.count(b'{"connection":"ok"}') == 3


BAD_REQUESTS = [
    (b"GET /health HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    (b"GET /health HTTP/1.1\r\nContent-Length: +5\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /api/v1/queues HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /api/v1/queues HTTP/1.1\r\nContent-Length: 10000000000\r\n\r\n", 413),
    (b"nonsense\r\n\r\n", 400),
    (b"GET /\r\n\r\n", 400),
    (b"GET / HTTP/0.9\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nX: a\rSet: b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nContent-Length: " + b"0" * 5000 + b"1\r\n\r\n", 413),
    (b"POST /api/v1/queues HTTP/1.1\r\nContent-Length: 70000\r\n\r\n", 413),
    (b"GET http://x/nosuch HTTP/1.1\r\n\r\n", 404),
    (b"OPTIONS * HTTP/1.1\r\n\r\n", 404),
    (b"CONNECT x:1 HTTP/1.1\r\n\r\n", 404),
    (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nbad : header\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", 431),
    (b"GET /nosuch HTTP/1.1\r\n\r\n", 404),
    (b"BREW / HTTP/1.1\r\n\r\n", 405),
    (b"POST /api/v1/queues HTTP/1.1\r\nContent-Length: 1\r\n\r\n{", 422),
    (b"GET /api/v1/queues/me HTTP/1.1\r\n\r\n", 401),
    (b"GET /api/v1/queues/me HTTP/1.1\r\nAuthorization: Basic !!!\r\n\r\n", 401),
    (b"GET /api/v1/queues/me HTTP/1.1\r\nAuthorization: Bearer eDp5\r\n\r\n", 401),
]


def test_bad_requests_get_their_status_and_the_server_goes_on(server):
    for data, status in BAD_REQUESTS:
        got = talk(server, data)
        assert got.startswith(b"HTTP/1.1 %d " % status), (data[:80], got[:200])
        assert json.loads(got.split(b"\r\n\r\n")[-1].decode())["detail"]
        assert (b"WWW-Authenticate: Basic" in got) == (status == 401)
    assert server.http("GET", "/health")[0] == 200
    assert "Traceback" not in server.output()


def test_older_and_longer_forms_of_requests_are_understood(server):
    assert b"200 OK" in talk(server, b"GET http://any.host:1/health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"Connection: close" in talk(server, b"GET /health HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize("version, headers, is_kept", [
    ("1.1", "", True), ("1.1", "Connection: keep-alive, Upgrade\r\n", True), ("1.1", "Connection: close, TE\r\n", False),
    ("1.1", "Connection: TE ,\tClose\r\n", False), ("1.1", "Connection: close\r\nConnection: TE\r\n", False),
    ("1.1", "Connection: TE\r\nConnection: close\r\n", False), ("1.1", "Connection: closed\r\n", True),
    ("1.1", "Connection: keep-alive, close\r\n", False), ("1.0", "", False), ("1.0", "Connection: Keep-Alive\r\n", True),
    ("1.0", "Connection: keep-alive, Upgrade\r\n", True), ("1.0", "Connection: keep-alive, close\r\n", False),
])
def test_a_connection_is_kept_as_the_list_of_its_options_says(server, version, headers, is_kept):
    """HTTP/1.0 closes unless both sides say otherwise, so there the answer says that it is kept."""
    asked = ("GET /health HTTP/%s\r\n%s\r\n" % (version, headers)).encode()
    host, port = server.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        reader = connection.makefile("rb")
        for turn in range(2 if is_kept else 1):
            connection.sendall(asked)
            lines = [line.strip() for line in iter(reader.readline, b"\r\n")]
            reader.read(int([line for line in lines if line.startswith(b"Content-Length")][0][15:]))
            assert lines[0] == b"HTTP/1.1 200 OK"
            assert (b"Connection: close" in lines, b"Connection: keep-alive" in lines) == (
                not is_kept, is_kept and version == "1.0")
        assert is_kept or reader.read() == b""


def test_a_proxy_is_told_to_pass_events_on_at_once(server):
    head = b"GET /api/v1/queues/me/events HTTP/1.1\r\nAuthorization: Basic %s\r\n\r\n" % (
        base64.b64encode(("%s:%s" % (QUEUE, PASSWORD)).encode()))
    host, port = server.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head)
        told = connection.recv(65536).partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert b"X-Accel-Buffering: no" in told and any(
        line.startswith(b"Cache-Control: ") and b"no-transform" in line for line in told)


def test_a_client_that_waits_for_the_challenge_gets_in(server):
    """urllib's own handler sends its password only for a challenge with a realm."""
    known = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    known.add_password(None, server.url, QUEUE, PASSWORD)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(known))
    with opener.open(server.url + "/api/v1/queues/me", timeout=20) as answer:
        assert json.loads(answer.read().decode())["queue_name"] == QUEUE


def test_one_who_asks_first_is_told_that_its_body_is_welcome(server):
    body = json.dumps([{"args": {"text": "x" * 1000}}] * 100).encode()
    head = b"POST /api/v1/queues/me/tasks HTTP/1.1\r\nAuthorization: Basic %s\r\nExpect: 100-continue\r\n" % (
        base64.b64encode(("%s:%s" % (QUEUE, PASSWORD)).encode()))
    host, port = server.url[7:].split(":")
    for data in (body, body[:2] + body[-2:].replace(b"}", b"")):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data))
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(data)
            assert connection.recv(65536).startswith(b"HTTP/1.1 201 " if data is body else b"HTTP/1.1 422 ")


def test_wrong_and_right_passwords(server):
    assert http("GET", server.url + "/api/v1/queues/me", auth=(QUEUE, PASSWORD))[0] == 200
    queue_id = http("GET", server.url + "/api/v1/queues/me", auth=(QUEUE, PASSWORD))[1]["queue_id"]
    assert http("GET", server.url + "/api/v1/queues/me", auth=(queue_id, PASSWORD))[0] == 200
    for auth in ((QUEUE, "wrong"), (QUEUE, ""), ("nosuch", PASSWORD), (QUEUE, PASSWORD + "x"), ("", "")):
        status, answer, headers = http("GET", server.url + "/api/v1/queues/me", auth=auth)
        assert (status, answer) == (401, {"detail": "Invalid credentials"}) and headers["WWW-Authenticate"].startswith('Basic realm="labtasker"')
    server.http("PUT", "/api/v1/queues/me", {"new_password": "other"})
    assert http("GET", server.url + "/api/v1/queues/me", auth=(QUEUE, PASSWORD))[0] == 401
    assert http("GET", server.url + "/api/v1/queues/me", auth=(QUEUE, "other"))[0] == 200


def test_no_password_is_stored_or_logged(server):
    server.http("POST", "/api/v1/queues", {"queue_name": "q2", "password": "topsecret"})
    assert "topsecret" not in server.journal.read_text() and PASSWORD not in server.journal.read_text()
    assert PASSWORD not in server.output()


def test_it_says_where_it_is_and_takes_that_back_when_it_ends(server):
    path = server.folder / "server.json"
    told = json.loads(path.read_text())
    assert os.stat(str(path)).st_mode & 0o777 == 0o600
    assert told["addresses"] == [server.url] and told["pid"] == server.process.pid
    assert http("GET", server.url + "/")[1]["server"] == told["server"]
    assert server.stop() == 0
    assert not path.exists()
    assert json.loads(server.journal.read_text().splitlines()[-1])["end"] is True


def test_a_client_that_knows_only_the_folder_finds_the_server(server, tmp_path):
    env = {"LABTASKER_ROOT": str(server.folder)}
    task_id = run_cli(["task", "submit", "-q", "--", "--a=1"], tmp_path, env=env).stdout.strip()
    assert run_cli(["task", "ls", "-q"], tmp_path, env=env).stdout.strip() == task_id
    assert server.url in run_cli(["health"], tmp_path, env=env).stdout
    server.kill()  # its server.json is left over
    assert (server.folder / "server.json").exists()
    assert run_cli(["task", "ls", "-q"], tmp_path, env=env).stdout.strip() == task_id


def test_a_second_server_on_the_store_is_refused_and_the_first_is_named(server):
    done = run_cli(["serve", "--port", "0", "--db-path", server.journal], server.folder, check=False)
    assert done.returncode == 1 and server.url in done.stderr and "Traceback" not in done.stderr


def test_a_busy_port_is_a_clear_error(server, tmp_path):
    done = run_cli(["serve", "--port", server.url.rsplit(":", 1)[1], "--db-path", tmp_path / "j.jsonl"], tmp_path, check=False)
    assert done.returncode == 1 and "can't listen on 127.0.0.1 port" in done.stderr and "Traceback" not in done.stderr


def test_what_was_acknowledged_is_there_after_kill_9(server):
    ids = []
    for i in range(20):
        ids.append(server.http("POST", "/api/v1/queues/me/tasks", {"args": {"i": i}})[1]["task_id"])
    task = server.http("POST", "/api/v1/queues/me/tasks/next", {"heartbeat_timeout": 60})[1]["task"]
    server.kill()
    server.start()
    found = server.http("POST", "/api/v1/queues/me/tasks/search", {})[1]["content"]
    assert sorted(t["task_id"] for t in found) == sorted(ids)
    assert [t["task_id"] for t in found if t["status"] == "running"] == [task["task_id"]]
    assert server.http("POST", "/api/v1/queues/me/tasks/%s/status" % task["task_id"], {"status": "success"})[0] == 200


def test_threads_fetch_each_task_once(server):
    server.http("POST", "/api/v1/queues/me/tasks", [{"args": {"i": i}} for i in range(200)])
    fetched = []

    def work():
        while True:
            task = server.http("POST", "/api/v1/queues/me/tasks/next", {"heartbeat_timeout": 60})[1]["task"]
            if task is None:
                return
            fetched.append(task["task_id"])
            server.http("POST", "/api/v1/queues/me/tasks/%s/status" % task["task_id"], {"status": "success"})
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(set(fetched)) == 200


def test_a_waiting_fetch_gets_the_task_that_comes(server):
    got = []
    waiting = threading.Thread(target=lambda: got.append(
        server.http("POST", "/api/v1/queues/me/tasks/next", {"heartbeat_timeout": 60, "wait_s": 20})[1]))
    waiting.start()
    task_id = server.http("POST", "/api/v1/queues/me/tasks", {"args": {"i": 1}})[1]["task_id"]
    waiting.join(15)
    assert got and got[0]["task"]["task_id"] == task_id


def test_silent_runs_are_given_up_by_the_servers_own_clock(server):
    task_id = server.http("POST", "/api/v1/queues/me/tasks", {"args": {"i": 1}, "max_retries": 1})[1]["task_id"]
    server.http("POST", "/api/v1/queues/me/tasks/next", {"heartbeat_timeout": 0.5})
    task = wait_until(lambda: (lambda t: t if t["status"] != "running" else None)(
        server.http("GET", "/api/v1/queues/me/tasks/" + task_id)[1]), "the silent run is given up")
    assert task["status"] == "failed" and "heartbeat" in task["summary"]["labtasker_error"]


def test_a_daemon_tells_the_way_in_and_is_found_and_stopped_again(home):
    """Of a store that was used without a server: the command that is printed gives its queue a password, which opens it."""
    home.submit("--", "--lr=0.1")
    done = home.cli("serve", "--daemon", "--host", "0.0.0.0", "--port", "0")
    told = json.loads((home.folder / "server.json").read_text())
    try:
        url = told["addresses"][-1]
        shown = done.stdout + done.stderr
        assert told["addresses"][0] in shown and "Queue default has no password yet" in shown and "0.0.0.0" not in shown
        command, = re.findall(r"^ +python3 (.*)", shown, re.M)
        password = harness.run([sys.executable] + shlex.split(command), home.cwd).stdout.split()[-1]
        assert http("GET", url + "/api/v1/queues/me", auth=("default", password))[0] == 200

        second = home.cli("serve", "--daemon", "--port", "0", check=False)
        assert second.returncode == 1 and "did not start" in second.stderr and "process %d" % told["pid"] in second.stderr
        assert told["addresses"][0] in second.stderr and not second.stdout
        port = url.rpartition(":")[2]
        other = home.cli("serve", "--daemon", "--port", port, "--db-path", "other/journal.jsonl", check=False)
        assert other.returncode == 1 and "port %s: Address already in use; process %d" % (port, told["pid"]) in other.stderr

        status = home.cli("server", "status", "--fmt", "jsonl")
        assert json.loads(status.stdout) == {
            "status": "running", "url": told["addresses"][0], "store": str(home.folder / "journal.jsonl"), "pid": told["pid"],
            "host": os.uname().nodename, "version": L.__version__, "since": told["started_at"]}
        stopped = home.cli("server", "stop")
        assert stopped.stdout.startswith("Stopped") and L.process_start(told["pid"]) is None
    finally:
        if L.process_start(told["pid"]):
            os.kill(told["pid"], 9)
    assert not (home.folder / "server.json").exists()
    assert "Traceback" not in (home.folder / "server.log").read_text()
    none = [home.cli("server", word, check=False) for word in ("status", "stop")]
    assert [each.returncode for each in none] == [3, 1] and "no server runs on" in none[1].stderr
    assert none[0].stdout.splitlines() == ["status: not running", "store: %s" % (home.folder / "journal.jsonl")]


def owner_of(home, **facts):
    """Write who owns the store, as a server of any host does, and its server.json."""
    (home.folder / "server.json").write_text(json.dumps(dict(facts, addresses=["http://127.0.0.1:1"], key="k")))
    (home.folder / "journal.jsonl.owner-9").write_text(json.dumps(dict(facts, server=True, count="1")))


def test_what_is_left_of_a_server_is_not_taken_for_one(home, capsys, monkeypatch):
    home.submit("--", "--lr=0.1")
    capsys.readouterr()

    def said(*words):
        code = L.main(["server"] + list(words))
        return code, "".join(capsys.readouterr())
    here = {"pid": os.getpid(), "host": "one", "host_id": L.host_id()}
    owner_of(home, **dict(here, started="another process with its number"))
    code, shown = said("status")
    assert code == 3 and "status: not running" in shown and "server.json was left by a server that was killed" in shown
    code, shown = said("stop")
    assert code == 1 and "no server runs on" in shown  # and this process lives
    owner_of(home, **dict(here, started=L.process_start(os.getpid())))
    code, shown = said("status")
    assert code == 3 and "status: hung" in shown and "does not answer at http://127.0.0.1:1" in shown

    monkeypatch.setattr(L, "OWNER_LAPSE_S", 0.1)
    owner_of(home, pid=os.getpid(), host="far", host_id="another", started=L.process_start(os.getpid()))
    code, shown = said("status")
    assert code == 3 and "status: lost" in shown and "on host far served it" in shown
    code, shown = said("stop")
    assert code == 1 and "on host far: stop it there" in shown
    monkeypatch.setattr(L, "shows_life", lambda path: True)
    code, shown = said("status")
    assert code == 3 and "status: elsewhere" in shown and "on host far serves it" in shown


def test_tls(tmp_path):
    openssl = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2",
                              "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], cwd=str(tmp_path), stderr=subprocess.DEVNULL)
    if openssl.returncode:
        pytest.skip("openssl, which makes the certificate, is not there")
    with Server(tmp_path / "s", queue=None, args=["--certfile", tmp_path / "cert.pem", "--keyfile", tmp_path / "key.pem"]) as server:
        assert server.url.startswith("https://")
        env = dict(LABTASKER_URL=server.url, LABTASKER_QUEUE="q", LABTASKER_PASSWORD="p", SSL_CERT_FILE=str(tmp_path / "cert.pem"))
        run_cli(["queue", "create-from-config"], tmp_path, env=env)
        run_cli(["task", "submit", "--", "--a=1"], tmp_path, env=env)
        assert run_cli(["task", "ls", "-q"], tmp_path, env=env).lines
        env.pop("SSL_CERT_FILE")
        done = run_cli(["task", "ls"], tmp_path, env=env, check=False)
        assert done.returncode == 3 and "certificate" in done.stderr and "Traceback" not in done.stderr


def test_embedded_commands_and_a_server_do_not_meet(server, tmp_path):
    """A command that goes to the file while a server holds it is told who has it."""
    store = L.Store(str(server.journal))
    store.file.LOCK_TIMEOUT_S = 0.2
    status, answer = L.answer_call(store, lambda: L.LocalName("default"), "POST", "/api/v1/queues/me/tasks", {"args": {"a": 1}})
    assert status == 503 and server.url in answer["detail"]


def test_hosts_with_a_proxy_set_still_reach_the_server(server, tmp_path):
    env = dict(server.env, http_proxy="http://127.0.0.1:1", HTTP_PROXY="http://127.0.0.1:1")
    assert run_cli(["task", "ls"], tmp_path, env=env).returncode == 0


def test_the_file_alone_is_enough(tmp_path):
    copy = tmp_path / "only"
    copy.mkdir()
    (copy / "labtasker.py").write_bytes(MODULE.read_bytes())
    env = clean_env()
    del env["PYTHONPATH"]
    for args in (["task", "submit", "--", "--a=1"], ["loop", "--", "echo", "%(a)"], ["task", "ls", "-s", "success"]):
        done = subprocess.run([sys.executable, "-m", "labtasker"] + args, cwd=str(copy), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True)
        assert done.returncode == 0, done.stderr
    assert "a=1" in done.stdout


@pytest.mark.parametrize("how", ["a full disk", "a reader who left", "a reader who reads no more"])
def test_a_server_goes_on_whatever_becomes_of_its_log(tmp_path, how):
    """Also where its pipe is full: a write would wait for ever."""
    reader, writer = os.pipe()
    log = os.open("/dev/full", os.O_WRONLY) if how == "a full disk" else writer
    process = subprocess.Popen([sys.executable, "-m", "labtasker", "serve", "--port", "0", "--log-level", "debug", "--db-path",
                                str(tmp_path / "journal.jsonl")], cwd=str(tmp_path), env=clean_env(), stdout=log, stderr=log, start_new_session=True)
    try:
        told = wait_until(lambda: (tmp_path / "server.json").exists() and json.loads((tmp_path / "server.json").read_text()),
                          "the server listens", never=lambda _: process.poll() is not None)
        if how == "a reader who left":
            os.close(reader)
        host, port = told["addresses"][0][7:].split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            lines = connection.makefile("rb")
            for asked in range(1500):  # some 60 bytes of log each: more than a pipe holds
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert lines.readline() == b"HTTP/1.1 200 OK\r\n", asked
                lines.read(sum(int(line[15:]) for line in iter(lines.readline, b"\r\n") if line.startswith(b"Content-Length")))
        if how == "a reader who reads no more":
            assert len(os.read(reader, 1 << 20)) > 1 << 14, "the pipe was filled"
            http("GET", told["addresses"][0] + "/health")
            assert re.search(rb"\d+ lines of this log could not be written", os.read(reader, 1 << 20))
        process.terminate()
        assert process.wait(20) == 0
    finally:
        end_group(process)
        for fd in {reader, writer, log} - ({reader} if how == "a reader who left" else set()):
            os.close(fd)


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "x", "", "1" * 400, "\u0661", "1e3", "9321 "])
def test_what_is_no_port_is_a_usage_error(tmp_path, port):
    done = run_cli(["serve", "--port=" + port, "--db-path", tmp_path / "j.jsonl"], tmp_path, check=False)
    assert done.returncode == 2 and "--port" in done.stderr and "from 0 to 65535" in done.stderr
    assert not (tmp_path / "j.jsonl").exists()


@pytest.mark.parametrize("host, port", [("127.0.0.1", 99999), ("127.0.0.1", -1), ("x" * 300, 0), ("a..b", 0), ("a\0b", 0), ("::x", 0)])
def test_an_address_that_is_none_is_a_clear_error(tmp_path, host, port):
    with pytest.raises(L.LabtaskerRuntimeError, match="can't listen on"):
        L.serve(str(tmp_path / "journal.jsonl"), host=host, port=port)


def test_a_bug_is_a_500_with_its_place_in_the_log(tmp_path):
    program = ("import sys, labtasker as L\n"
               "def bug(*_): raise ValueError('boom')\n"
               "L.ROUTES['GET /health'] = L.ROUTES['GET /health']._replace(run=bug)\n"
               "sys.exit(L.serve(sys.argv[1], port=0))\n")
    log = tmp_path / "log"
    process = start([sys.executable, "-c", program, tmp_path / "journal.jsonl"], tmp_path, log)
    try:
        wait_until(lambda: "listening on" in log.read_text(), "the server listens")
        url = json.loads((tmp_path / "server.json").read_text())["addresses"][0]
        status, answer, _ = http("GET", url + "/health")
        assert status == 500 and "bug" in answer["detail"] and "boom" not in answer["detail"]
        assert "boom" in log.read_text()
        assert http("GET", url + "/")[0] == 200
    finally:
        end_group(process)
