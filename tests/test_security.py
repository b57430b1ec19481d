"""What must be refused, and must not get out: patterns that explode, cross-site requests, secrets, paths, escapes."""
import base64
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import labtasker as L
from harness import PASSWORD, Server, http, run, run_cli
from test_loop import ME, fetch, loop, submit  # noqa: F401 (a fixture)

# Patterns that people write -> what they find, what they don't.
ACCEPTED = [
    (r"^resnet.*", "resnet50", "my-resnet"), ("a|b", "xb", "c"), (r"(foo|bar)-\d+", "x bar-12", "bar-"),
    (r".*lr.*0\.1.*", "the lr is 0.1!", "lr 0.2"), (r"^exp_\d+_seed\d+_lr[\d.]+_bs\d+$", "exp_1_seed2_lr0.1_bs64", "exp_1"),
    (r"(\d{1,3}\.){3}\d{1,3}", "at 10.0.0.1", "10.0"), (r"CUDA.*memory", "CUDA out of memory", "CUDA"),
    (r"a.*b.*c", "aabbcc", "cba"), (r"(\w+/)*\w+", "a/b/c", "/"), (r"epoch=\d+ loss=\d+\.\d+", "epoch=3 loss=0.25", "epoch=3"),
    ("", "x", None), (".*", "", None), ("^$", "", "x"), (r"\bfoo\b", "a foo", "food"), ("(?i)ResNet|ViT", "VIT", "bert"),
    (r"^(?!.*test)", "train", "my test"), (r"^(?=.*foo)(?=.*bar)", "bar foo", "foo"), (r"v\d+\.\d+$", "v1.2", "v1."),
    (r"^(train|val|test)(_\w+)?$", "val_1", "valid_"), ("s?ample", "ample", "simple"), (r"^.*/.*/.*$", "a/b/c", "a/b"),
    ("x{3,5}y", "xxxy", "xxy"), ("(ab)*c", "ababc", "ab"), (r"\s+$", "x \n", "x"), ("(?:a|b)+c", "abac", "ab"),
    (r"[A-Z]+[a-z]+\d+", "ABab1", "AB1"), (r"(?P<key>\w+)=(?P<value>\S+)", "a=b", "a="), (r"(a+)-(b*)", "aa-", "bb"),
    (r"^.*\.(py|sh)$", "x.py", "x.pyc"), (r"[^,]+,[^,]+,[^,]+", "a,b,c", "a,b"), (r"\w+?\w+?!", "ab!", "a!"),
    (r"(?i)[a-z]+-\d{4}", "Run-2026", "Run-26"), (r"model=(vit|swin)_(tiny|small)", "model=swin_tiny", "model=vit"),
]
REFUSED = [
    "(a+)+$", "(a+)+", "(a*)*b", "(a|a)*$", "(a|aa)+$", "([a-zA-Z]+)*$", "(.*a){20}", "(x+x+)+y", r"(\w+\s?)*$", r"(a)\1",
    "(?P<x>a+)(?P=x)", "a.*b.*c.*d.*e", "(a?){50}a{50}", "((a{1,30}){1,30}){1,30}b", "(?i)[\\x00-\U0010ffff]", "(.*)*",
    "(a)?(?(1)b|c)", r"\w+\w+\w+\w+\w+!", "(|a)+b", "(" * 300, "a" * 1001, "(?=(a+)+b)", "(a|b|ab)*c", "^(([a-z])+.)+[A-Z]$",
    r"(?:\d+)*x", r"^(\s*\w*)*$", "x(?:(?:a{0,9}){0,9}){0,9}z", r"(.*)(.*)(.*)(.*)(.*)[^a]", "(?:a.?b?)*c",
    "a(?:a|bb)+c", r"v\d+(\.\d+)*$", "(?:a|bb)*(?:a|bb)*c", r"(_\w+)*$", "(a[ab]+)*c", "((){1000}){1000}", "x" + "a?" * 30 + "b", "(?:a{1,9}){9}b", r"\d+\s*\d+\s*\d+\s*\d+\s*\d+x", r"(\d+\s*)+x", r"\S+\w+\S+\w+\S+x", r"\w+\d+\w+\d+\w+x",
    r"[^a]+[^b]+[^c]+[^d]+x", r"^[^,]+\d[^,]+\d[^,]+\d[^,]+\dx", r"(?i)[a-z]+[0-9K]+[a-z]+[0-9K]+[a-z]+x",
]
HARD = [("a" * 300000, (r"a.*aaaab", r"a\w+a\w+b", r"(?i)a\w+a\w+b", r"\w+?\w+?!", "a{1,100}a{1,100}b", "^a.*a.*a.*b", "(?:a?a?a?b?){2}c")),
        ("abb" * 100000, ("a[ab]+(?:a|bb)c", "a(?:abb)*(?:abb)*c")), ("a/" * 100000, (r"(\w+/)*\w+!", "^.*/.*/.*!$")),
        ("1 " * 100000, (r"\d+\s+\d+\s+\d+\s+x", r"^\S+\s+\S+\s+\S+\s+x"))]


@pytest.mark.parametrize("pattern, there, missing", ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_an_ordinary_pattern_is_accepted_and_finds_what_re_finds(pattern, there, missing):
    import re

    def test(text):
        return L.compile_query({"task_name": {"$regex": pattern}}, L.TASK_FIELDS)(L.TaskRecord(task_name=text))
    assert test(there) and re.search(pattern, there)
    assert missing is None or not test(missing) and not re.search(pattern, missing)


@pytest.mark.parametrize("pattern", REFUSED, ids=[pattern[:20] for pattern in REFUSED])
def test_a_pattern_that_can_explode_is_refused(pattern):
    with pytest.raises(L.LabtaskerValueError, match="can't be used"):
        L.compile_pattern(pattern)


def test_classes_of_letters_that_are_held_to_be_apart_share_none():
    import re
    for pair in L._APART:
        first, second = (re.compile(L._CATEGORIES[name] + r"+") for name in pair)
        assert not second.search("".join(first.findall("".join(map(chr, range(0x110000)))))), pair


def test_the_worst_that_is_accepted_takes_no_second():
    took = []
    for text, patterns in HARD:
        for pattern in patterns:
            began = time.process_time()
            matches = L.compile_query({"task_name": {"$regex": pattern}}, L.TASK_FIELDS)
            matches(L.TaskRecord(task_name=text))
            took.append((time.process_time() - began, pattern))
    print(sorted(took)[-3:])
    assert max(took)[0] < 1


def test_patterns_share_what_they_may_take_on_a_record():
    matches = L.compile_query({"$or": [{"args.x": {"$regex": "a.*b.*c"}}] * 50}, L.TASK_FIELDS)
    began = time.process_time()
    assert not matches(L.TaskRecord(args={"x": ["a" * 1000] * 1000}))
    assert time.process_time() - began < 1
    assert matches(L.TaskRecord(args={"x": "abc"}))


OWN = {"head", "head.cluster"}
SITES = [  # headers -> whether a page of another site may have sent it
    ({}, False), ({"host": "anything:9321"}, False), ({"host": "head:1", "origin": "http://head:1"}, False),
    ({"host": "127.0.0.1:9321", "origin": "http://127.0.0.1:9321"}, False), ({"host": "[::1]:9", "origin": "http://[::1]:9"}, False),
    ({"host": "localhost:9321", "origin": "http://localhost:9321"}, False), ({"host": "HEAD.cluster", "origin": "https://head.cluster"}, False),
    ({"host": "head:1", "origin": "http://evil.example"}, True), ({"host": "head:1", "origin": "null"}, True),
    ({"host": "evil.example:9321", "origin": "http://evil.example:9321"}, True),  # its name was made to lead here
    ({"host": "head:1", "origin": "http://head:2"}, True), ({"origin": "http://head"}, True), ({"host": "", "origin": ""}, True),
    ({"host": "head", "sec-fetch-site": "cross-site"}, True), ({"host": "head", "sec-fetch-site": "same-origin"}, False),
    ({"host": "1.2.3.4.evil.example", "origin": "http://1.2.3.4.evil.example"}, True),
    ({"host": "127.0.0.1:9", "origin": "https://hub", "sec-fetch-site": "same-origin"}, False),  # a proxy has changed Host
    ({"host": "evil.example", "origin": "http://evil.example", "sec-fetch-site": "same-origin"}, True),
    ({"host": "127.0.0.1:9", "origin": "http://127.0.0.1:8", "sec-fetch-site": "same-site"}, True),
    ({"host": "127.0.0.1:9", "origin": "http://evil.example", "sec-fetch-site": "none"}, True),
]


@pytest.mark.parametrize("headers, is_foreign", SITES)
def test_what_a_browser_sends_for_another_site_is_told(headers, is_foreign):
    block = "\r\n".join("%s: %s" % row for row in headers.items()).encode()
    assert bool(L.read_head(block, OWN).foreign) == is_foreign


def test_every_method_that_changes_something_is_refused_to_other_sites(loop):
    changing = [key.split(" ") for key in L.ROUTES if not key.startswith("GET ")]
    assert len(changing) > 10
    for method, path in changing:
        client = loop.client()
        data = loop.bytes(method, path, {}).replace(b"Host: x", b"Host: x\r\nOrigin: http://evil.example")
        loop.say(client, data)
        assert loop.answer(client)[0] == 403, (method, path)


ODD_TEXTS = ["../../etc/passwd", "a/b", "..", "a\nb", "a\r\nX: y", "\x1b[31mred", "a\0b", "\u202eabc", "\ud800", "a b", "%2e%2e",
             "$(id)", "", "x" * 101 + "!"]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
def test_names_and_ids_that_are_paths_lines_or_escapes_are_refused(loop, text):
    for path, body in (("/tasks", {"task_id": text, "args": {"a": 1}}), ("/tasks", {"task_name": text, "args": {"a": 1}}),
                       ("/workers", {"worker_id": text}), ("/workers", {"worker_name": text}),
                       ("/tasks", {"args": {text: 1}})):
        status, answer = loop.call(loop.client(), "POST", path, body)
        assert status == 422, (path, body, answer)
    assert not next(iter(loop.store.state.queues.values())).tasks


def test_a_log_line_is_one_line_of_plain_text_and_holds_no_secret(loop, capsys):
    loop.server.log.level = "debug"
    client = loop.client()
    loop.say(client, loop.bytes("GET", "/tasks/\x1b[31m\nx\u202e"))
    loop.say(client, loop.bytes("GET", "/tasks/a%0Ab%1b"))
    loop.say(loop.client(), b"GE\x1bT /\x07 HTTP/1.1\r\n\r\n")
    loop.call(loop.client(), "POST", "/tasks", {"args": {"password": "topsecret"}})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and all(line.isprintable() and line.isascii() for line in lines)
    assert not [line for line in lines if "topsecret" in line or loop.auth in line]
    assert any(" test q POST /api/v1/queues/me/tasks -> 201 in " in line for line in lines), lines


def test_what_is_refused_does_not_fill_the_log(loop, capsys):
    loop.server.log.level = "info"
    for _ in range(300):
        loop.say(loop.client(), b"GET /api/v1/queues/me HTTP/1.1\r\n\r\n")
    assert len(capsys.readouterr().err.splitlines()) <= 4 * (L.LOG_LINES_S + 1)


def test_odd_bodies_are_refused_at_once(loop):
    keys = b",".join(b'"k%d":1' % i for i in range(5000))
    for body in (b'{"args":{%s,"k4999":2}}' % keys, b'{"args":{"a":1%s}}' % (b"0" * 4000), b'{"args":{"%s":1}}' % b".".join([b"a"] * 20000),
                 b'{"args":' * 200 + b"{}" + b"}" * 200, b"[" * 60000, b'{"args":{"a":' + b"[" * 150 + b"]" * 150 + b"}}", b"\xff\xfe", b"\0"):
        client, began = loop.client(), time.process_time()
        loop.say(client, loop.bytes("POST", "/tasks").replace(b"Content-Length: 0", b"Content-Length: %d" % len(body)) + body)
        assert loop.answer(client)[0] == 422, body[:60]
        assert time.process_time() - began < 1
    assert loop.call(loop.client(), *submit(a="\ud800"))[0] == 201  # JSON may hold half a pair; it stays an escape


def test_a_filter_is_bounded(loop):
    for text in ("(" * 10000, "a" * 200000, "not " * 10000, "-" * 10000, "args.a in [" + "1," * 60000, "args.\u00b2 == 1"):
        with pytest.raises(L.FilterError):
            L.parse_filter(text, L.TASK_FIELDS, 0)
    matches = L.compile_query({"args.a.\u00b2": 1}, L.TASK_FIELDS)
    assert not matches(L.TaskRecord(args={"a": [1]}))


def test_users_take_turns_and_lines_end():
    gate = L.Gate(2, 1, 4, 3)
    gate.enter("greedy", "g0")
    assert gate.begin() == ["g0"]
    for name in ("g1", "g2", "g3"):
        gate.enter("greedy", name)
    with pytest.raises(L.Busy):
        gate.enter("greedy", "g4")
    gate.enter("other", "o0")
    assert gate.begin() == ["o0"]
    gate.enter("other", "o1")
    with pytest.raises(L.Busy):
        gate.enter("third", "t0")
    gate.leave("greedy")
    assert gate.begin() == ["g1"] and gate.begin() == []
    gate.leave("other")
    assert gate.begin() == ["o1"]


def test_an_unknown_queue_costs_what_a_wrong_password_does(loop, monkeypatch):
    hashed = []
    real = L.hash_password
    monkeypatch.setattr(L, "hash_password", lambda *given: hashed.append(given) or real(*given))
    for login in (("q", "wrong"), ("nosuch", "wrong")):
        with pytest.raises(L.Unauthorized, match="Invalid credentials"):
            loop.store.login(*login)
    assert len(hashed) == 2 and all(len(bytes.fromhex(salt)) == 16 and rounds == L.PASSWORD_ROUNDS for _, salt, rounds in hashed)
    loop.store.login("q", "p")
    assert len(hashed) == 2  # it was right before


def test_a_password_is_checked_with_the_rounds_that_it_was_hashed_with(loop, monkeypatch):
    loop.store.logins.clear()
    monkeypatch.setattr(L, "PASSWORD_ROUNDS", 1000)
    assert loop.store.login("q", "p") == loop.store.state.names["q"]
    L.answer_call(loop.store, None, "POST", "/api/v1/queues", {"queue_name": "later", "password": "p"})
    monkeypatch.setattr(L, "PASSWORD_ROUNDS", 2000)
    assert loop.store.login("later", "p") == loop.store.state.names["later"]
    with pytest.raises(L.Unauthorized):
        loop.store.login("later", "wrong")
    assert L.is_password("p", L.hash_password("p")) and not L.is_password("p", None)
    with pytest.raises(L.Unauthorized, match="hashed by 'scrypt': update it"):
        L.is_password("p", "scrypt$1$00$00")


def wait_for_a_task(loop, auth):
    """Return a client whose fetch waits, with this Authorization."""
    loop.auth, waiting = auth, loop.client()
    assert loop.call(waiting, *fetch(50)) is None
    return waiting


def login_of(name, password):
    return base64.b64encode(("%s:%s" % (name, password)).encode()).decode()


def test_a_queue_named_like_anothers_id_takes_nothing_of_it(loop):
    victim = loop.store.state.names["q"]
    L.answer_call(loop.store, None, "POST", "/api/v1/queues", {"queue_name": victim, "password": "evil"})
    evil = loop.store.login(victim, "evil")
    assert evil != victim and loop.store.login(victim, "p") == victim == loop.store.login("q", "p")
    with pytest.raises(L.Unauthorized):
        loop.store.login("q", "evil")
    own, theirs = wait_for_a_task(loop, login_of("q", "p")), wait_for_a_task(loop, login_of(victim, "evil"))
    mark = L.answer_call(loop.store, lambda: victim, "GET", ME + "/mark")[1]["mark"]
    loop.auth = login_of(victim, "p")  # by its id
    assert loop.call(loop.client(), *submit(a=1))[0] == 201
    assert loop.answer(own)[1]["found"] and loop.answer(theirs) is None
    assert L.answer_call(loop.store, lambda: victim, "GET", ME + "/mark", query={"seen": mark})[1]["mark"] != mark
    loop.auth = login_of(victim, "evil")
    assert loop.call(loop.client(), *submit(b=1))[0] == 201
    assert loop.answer(theirs)[1]["task"]["args"] == {"b": 1}
    assert [len(loop.store.state.queues[one].tasks) for one in (victim, evil)] == [1, 1]


@pytest.mark.parametrize("method, body", [("PUT", {"new_password": "other"}), ("DELETE", None)])
def test_what_waits_for_a_queue_ends_with_its_password_and_with_the_queue(loop, method, body):
    old = loop.auth
    loop.call(loop.client(), *submit(a=1))
    task = loop.call(loop.client(), *fetch())[1]["task"]
    waiting = [wait_for_a_task(loop, old), loop.client(), loop.client()]
    assert loop.call(waiting[1], "POST", "/tasks/%s/heartbeat?answer=status&wait_s=50" % task["task_id"]) is None
    mark = loop.call(loop.client(), "GET", "/mark")[1]["mark"]
    assert loop.call(waiting[2], "GET", "/mark?wait_s=50&seen=" + mark) is None
    stream = L.answer_call(loop.store, lambda: loop.store.login("q", "p"), "GET", ME + "/events")[1].pieces
    next(stream)
    status = L.answer_call(loop.store, lambda: loop.store.login("q", "p"), method, ME, body)[0]
    loop.server.settle()
    assert status < 300 and [loop.answer(one)[0] for one in waiting] == [401] * 3 and not loop.server.parked.by_key
    if method == "PUT":
        loop.auth = login_of("q", "other")
        loop.store.login("q", "other")
        assert loop.call(loop.client(), *submit(secret=42))[0] == 201
    assert list(stream) == []


def test_metadata_and_name_of_a_queue_change_under_those_who_wait(loop):
    waiting = wait_for_a_task(loop, loop.auth)
    stream = L.answer_call(loop.store, lambda: loop.store.login("q", "p"), "GET", ME + "/events")[1].pieces
    next(stream)
    L.answer_call(loop.store, lambda: loop.store.login("q", "p"), "PUT", ME, {"metadata_update": {"a": 1}, "new_queue_name": "r"})
    loop.server.settle()
    assert loop.answer(waiting) is None
    loop.auth = login_of("r", "p")
    loop.store.login("r", "p")
    assert loop.call(loop.client(), *submit(a=1))[0] == 201
    assert loop.answer(waiting)[1]["found"] and b'"new_state": "pending"' in next(stream)


def test_files_are_their_owners_alone(tmp_path):
    with Server(tmp_path / "s") as server:
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in server.folder.iterdir() if path != server.log}
        assert {"journal.jsonl", "server.json"} <= set(modes)
        assert not {name: oct(mode) for name, mode in modes.items() if mode & 0o077 and not stat.S_ISDIR(mode)}


def test_no_secret_is_in_arguments_logs_or_the_journal(tmp_path):
    with Server(tmp_path / "s", args=["--log-level", "debug"]) as server:
        server.http("POST", "/api/v1/queues", {"queue_name": "other", "password": "topsecret"})
        http("GET", server.url + ME, auth=("other", "topsecret-wrong"))
        server.http("PUT", ME, {"new_password": "evenmore"})
        with open("/proc/%d/cmdline" % server.process.pid, "rb") as file:
            told = file.read().decode()
        told += server.output() + server.journal.read_text()
        assert "other" in told and not [word for word in ("topsecret", "evenmore", PASSWORD) if word in told]


def test_a_busy_port_is_named_with_its_owner(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        done = run_cli(["serve", "--port", taken.getsockname()[1], "--db-path", tmp_path / "j.jsonl"], tmp_path, check=False)
    assert done.returncode == 1 and "process %d has it" % os.getpid() in done.stderr


def test_terminal_escapes_stay_text_in_listings(home):
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r"
    home.python("import labtasker as L\nL.submit_task(args={'a': %r}, cmd=%r)" % (evil, evil))
    for args in (["task", "ls"], ["task", "ls", "-v"], ["task", "ls", "--fmt", "yaml"], ["task", "ls", "--fmt", "jsonl"], ["task", "count", "--by", "args.a"]):
        shown = home.cli(*args).stdout
        assert not [letter for letter in evil if letter in shown and not letter.isprintable()], (args, shown)
        assert "owned" in shown


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2",
                           "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], cwd=str(folder), stderr=subprocess.DEVNULL)
    if made.returncode:
        pytest.skip("openssl, which makes the certificate, is not there")
    return folder / "cert.pem", folder / "key.pem"


def test_tls_with_a_ca_file_and_silent_clients(certificate, tmp_path):
    certfile, keyfile = certificate
    with Server(tmp_path / "s", queue=None, args=["--certfile", certfile, "--keyfile", keyfile]) as server:
        host, port = server.url[8:].split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(100)]
        for number, sock in enumerate(silent):
            sock.sendall((b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n")[number % 3])
        env = {"LABTASKER_URL": server.url, "LABTASKER_QUEUE": "q", "LABTASKER_PASSWORD": "p", "LABTASKER_CA_FILE": str(certfile)}
        run_cli(["queue", "create-from-config"], tmp_path, env=env)
        run_cli(["task", "submit", "--", "--a=1"], tmp_path, env=env)
        assert run_cli(["task", "ls", "-q"], tmp_path, env=env).lines
        folder = {"LABTASKER_ROOT": str(server.folder), "LABTASKER_QUEUE": "q"}  # server.json names the certificate
        assert run_cli(["task", "ls", "-q"], tmp_path, env=folder).lines
        missing = run_cli(["task", "ls"], tmp_path, env=dict(env, LABTASKER_CA_FILE="/nosuch.pem"), check=False)
        assert missing.returncode == 1 and "ca_file" in missing.stderr
        old = run([sys.executable, "-c", OLD_TLS, host, port], tmp_path, check=False)
        assert "refused" in old.stdout, old
        for sock in silent:
            sock.close()
        assert "Traceback" not in server.output()


OLD_TLS = """
import socket, ssl, sys, warnings
warnings.simplefilter("ignore")
context = ssl.SSLContext(ssl.PROTOCOL_TLS)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
try:
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.wrap_socket(socket.create_connection((sys.argv[1], int(sys.argv[2]))))
    print("taken")
except (OSError, AttributeError, ValueError):
    print("refused")
"""


def test_help_shows_the_limits_that_can_be_set():
    text = run_cli(["serve", "--help"], "/").stdout
    assert "--max-connections" in text and "--allow-host" in text and str(L.MAX_CONNECTIONS) in text


def test_a_cross_site_request_is_answered_403_by_a_server(server):
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        status, answer, _ = server.http("POST", ME + "/tasks", {"args": {"a": 1}}, headers)
        assert status == 403 and "sent by a page of another site" in answer["detail"]
    assert server.http("POST", ME + "/tasks", {"args": {"a": 1}}, {"Origin": server.url})[0] == 201


class Impostor:
    """Listens where a server did, or elsewhere, and notes what it hears; `answer(request's bytes)` is what it says.

    With `real`, an address, it passes everything on to who listens there, and back."""

    def __init__(self, port=0, answer=None, real=None):
        self.heard, self.answer, self.real = [], answer, real
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.socket.listen(20)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.live, daemon=True).start()

    def live(self):
        try:
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self.pass_on if self.real else self.speak, args=(connection,), daemon=True).start()
        except OSError:  # closed
            pass

    def speak(self, connection):
        with connection:
            data = connection.recv(65536)
            self.heard.append(data)
            connection.sendall(self.answer(data))

    def pass_on(self, connection):
        with connection, socket.create_connection(self.real) as far:
            data = connection.recv(65536)
            while data:
                self.heard.append(data)
                far.sendall(data)
                connection.sendall(far.recv(65536))
                data = connection.recv(65536)

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who accepts
        self.socket.close()


def in_http(answer):
    body = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\nLabtasker-Extensions: 1\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def nothing_but_numbers(heard):
    return heard and all(data.startswith(b"GET /?nonce=") and b"Authorization" not in data for data in heard)


def at_port(server, port):
    """Have server.json name another port."""
    path = server.folder / "server.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(dict(told, addresses=["http://127.0.0.1:%d" % port])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["old answers", "a proof of its own", "no JSON", "a relay"])
def test_who_has_not_the_key_of_a_store_gets_neither_a_task_nor_a_login(server, tmp_path, kind):
    port = int(server.url.rsplit(":", 1)[1])
    old = http("GET", server.url + "/?nonce=" + "0" * 32)[1]
    assert old["proof"]
    impostor = Impostor(real=("127.0.0.1", port)) if kind == "a relay" else Impostor(answer=lambda data: {
        "old answers": in_http(old), "no JSON": b"nonsense", "a proof of its own": in_http(dict(old, proof=L.prove(
            "its own key", "server", (data[12:44].decode(), old["nonce"]), ("127.0.0.1", impostor.port))))}[kind])
    at_port(server, impostor.port)
    if kind != "a relay":  # which needs the real one
        server.kill()
    done = run_cli(["task", "submit", "--", "--secret=hunter2"], tmp_path, check=False, env={"LABTASKER_ROOT": str(server.folder)})
    impostor.close()
    assert nothing_but_numbers(impostor.heard), impostor.heard
    if kind == "a relay":
        assert done.returncode == 3 and "does not prove" in done.stderr and "in use by another process" in done.stderr
    else:  # the store is free, and opened itself
        assert done.returncode == 0 and ("does not prove" in done.stderr) == (kind != "no JSON"), done


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1, 5])
def test_a_client_that_was_let_in_asks_for_a_proof_on_each_new_connection(server, asked):
    transport = L.living_server(str(server.folder), server.queue)
    for _ in range(asked):
        assert transport.call("GET", ME, None, None)[0] == 200
    old = http("GET", server.url + "/?nonce=" + "0" * 32)[1]
    server.kill()
    impostor = Impostor(int(server.url.rsplit(":", 1)[1]), lambda data: in_http(old))
    for attempt in (lambda: transport.call("POST", ME + "/tasks", None, '{"args": {"secret": "hunter2"}}'), lambda: transport.listen(None, 5)):
        with pytest.raises(L.NotOurServer, match="does not prove"):
            attempt()
    impostor.close()
    assert nothing_but_numbers(impostor.heard), impostor.heard


@pytest.mark.slow
def test_the_key_of_a_store_is_never_sent_and_a_login_holds_on_one_connection(server, monkeypatch):
    sent, connect = [], socket.create_connection

    made_here = []

    class Recorded(socket.socket):
        def sendall(self, data, *flags):
            sent.append(bytes(data))
            return super().sendall(data, *flags)

    def recorded(*given, **more):
        made = connect(*given, **more)
        timeout_s, again = made.gettimeout(), Recorded(made.family, made.type, made.proto, made.detach())
        again.settimeout(timeout_s)
        made_here.append(again)
        return again
    monkeypatch.setattr(socket, "create_connection", recorded)
    key = json.loads((server.folder / "server.json").read_text())["key"]
    transport = L.living_server(str(server.folder), server.queue)
    for _ in range(4):  # two of a connection each, and two over one that is kept
        assert transport.call("GET", ME, None, None)[1]["queue_name"] == server.queue and transport.extensions
    status, lines = transport.listen(None, 5)
    lines.close()
    transport.close()
    for one in made_here:
        one.close()
        if one.fileno() >= 0:  # an answer of which nobody reads the rest holds it
            os.close(one.detach())
    logins = re.findall(rb"Authorization: Basic (\S+)", b"".join(sent))
    assert status == 200 and len(logins) == 5 and len(set(logins)) == 4
    for data in [b"".join(sent)] + [base64.b64decode(login) for login in logins]:
        assert key.encode() not in data
    for login in logins:
        assert http("GET", server.url + ME, headers={"Authorization": "Basic " + login.decode()})[0] == 401
    assert http("GET", server.url + ME, auth=("nosuch", key))[0] == 401


def test_both_ends_of_a_connection_are_a_part_of_a_proof(monkeypatch):
    def proof(host, port=1):
        return L.prove("key", "server", ("a", "b"), (host, port))
    assert proof("10.0.0.1") == proof("::ffff:10.0.0.1") and proof("fe80::1%eth0") == proof("fe80::1")
    assert len({proof("10.0.0.1"), proof("10.0.0.2"), proof("10.0.0.1", 2), L.prove("key", "client", ("a", "b"), ("10.0.0.1", 1))}) == 4
    here = proof("127.0.0.1"), proof("::1"), proof("10.0.0.1")
    monkeypatch.setattr(L.os, "readlink", lambda path: "net:[another container]")
    there = proof("127.0.0.1"), proof("::1"), proof("10.0.0.1")
    assert [one == other for one, other in zip(here, there)] == [False, False, True]


def test_an_empty_key_or_none_lets_nobody_be_the_server(tmp_path):
    impostor = Impostor(answer=lambda data: in_http({}))
    for told in ({}, {"key": ""}, {"key": None}):
        (tmp_path / "server.json").write_text(json.dumps(dict(told, addresses=["http://127.0.0.1:%d" % impostor.port])))
        assert L.living_server(str(tmp_path), "q") is None
    impostor.close()
    assert not impostor.heard


def test_every_message_passes_one_filter(capsys):
    evil = "a\x1b[2J\x9b31m\u202e\u2066\u061c\u200f\ufeff\r\x07\ud800 see http://user:hunter2@host/x and ftp://u:hunt/er2@x@h"
    for speak in (L.tell, L.note, L.remark, L.Log("info").write):
        speak(evil)
        shown = capsys.readouterr().err
        assert shown.rstrip("\n").isprintable() and "hunter2" not in shown and "er2" not in shown, (speak, shown)
        assert "see http://***@host/x and ftp://***@h" in shown, (speak, shown)
    L.tell("two\nlines\tof text \u00e9 \u4e2d, mail me@host, http://host/@me")
    assert capsys.readouterr().err == "two\nlines\tof text \u00e9 \u4e2d, mail me@host, http://***@me\n"
