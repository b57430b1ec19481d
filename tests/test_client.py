"""Section 8: configuration, transports, answers."""
import datetime
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

import labtasker as L
from harness import MODULE, clean_env


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, empty, with a clean environment."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    L.use_client(None)


def write(folder, text, name="config.toml"):
    (folder / ".labtasker").mkdir(exist_ok=True)
    (folder / ".labtasker" / name).write_text(text)


FULL = """
# a comment
[endpoint]
api_base_url = "http://h:1"   # and another
[queue]
queue_name = 'q'
password = "p\\"\\u00e9"
[task]
heartbeat_interval = 2.5
"""


def test_nothing_configured_is_the_default_queue_here(folder):
    config = L.load_config()
    assert config == L.Config(str(folder / ".labtasker"), None, "default", None, 10.0, None, None, {})
    assert not (folder / ".labtasker").exists()


def test_the_file_is_found_upward_and_the_environment_wins(folder, monkeypatch):
    write(folder, FULL)
    (folder / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(folder / "a" / "b")
    config = L.load_config()
    assert (config.url, config.queue_name, config.password, config.heartbeat_interval_s) == ("http://h:1", "q", 'p"\u00e9', 2.5)
    assert config.root == str(folder / ".labtasker")
    for name, value in (("URL", "http://other"), ("QUEUE", "q2"), ("PASSWORD", "p2")):
        monkeypatch.setenv("LABTASKER_" + name, value)
    config = L.load_config()
    assert (config.url, config.queue_name, config.password) == ("http://other", "q2", "p2")
    monkeypatch.setenv("LABTASKER_ROOT", str(folder / "elsewhere"))
    assert L.load_config().root == str(folder / "elsewhere") and L.load_config().heartbeat_interval_s == 10.0


def test_the_old_clients_file_is_read_where_there_is_no_other(folder):
    write(folder, FULL, "client.toml")
    assert L.load_config().queue_name == "q"
    write(folder, '[queue]\nqueue_name = "new"\n')
    assert L.load_config().queue_name == "new"


def test_what_is_written_is_read_back(folder):
    path = L.write_config(str(folder / ".labtasker"), "http://h:1", "q", 'p"\\\u00e9\n')
    assert os.stat(path).st_mode & 0o777 == 0o600
    config = L.load_config()
    assert (config.url, config.queue_name, config.password) == ("http://h:1", "q", 'p"\\\u00e9\n')


ODD_TOML = r"""
[a.b]
x = [1, {y = 2}, # z
  "]"]
d = 2020-01-01 10:00:00Z
[[plugins]]
exclude = ["a", 'b']
[queue]
queue_name = "\u00e9\U0001F600\t\"" # c
"password" = '''
a\b"'''
'literal' = QUOTES x\
   yQUOTES
[task]
heartbeat_interval = 1_0.5e0
z = 0x1F
plus = +7
deep.er = true
""".replace("QUOTES", '"' * 3)


@pytest.mark.parametrize("text", [FULL, ODD_TOML, ODD_TOML.replace("\n", "\r\n"), "", "a = 1", "[x] # y\n\n", "a = 'x\u2028\x0c\x85y'\nb = 2\n"])
def test_the_reader_agrees_with_tomllib(text):
    """Where the values are texts, numbers and booleans: it leaves out lists, dates and tables in a line."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    text = text.replace("\x0c", " ")
    known = {key: value for key, value in L.flatten(tomllib.loads(text)) if type(value) in (str, int, float, bool)}
    assert L.read_toml(text, "x") == known


@pytest.mark.parametrize("text, line", [
    ("x", 1), ("x = ", 1), ('x = "a', 1), ("x = 1\nx = 2", 2), ("[a]\n[a]", 2), ("a = 1\n[a.b]", 2), ("x = 007", 1), ("x = 1__0", 1), ("x = 1 y", 1),
    ('\nx = "\\ud800"', 2), ('x = "\\q"', 1), ("\n\n[[queue]]", 3), ("x = [\n1,\n", 3), ("x = " + "[" * 100000, 1), ("é = 1", 1), ("x = {a = [1}", 1),
    ("[task]\n\nheartbeat_interval = [\n1]", 3), ("queue = {}", 1), ("[queue]\nqueue_name = 2026-01-01", 2), ("x = \"\"\"\nopen\n", 1),
])
def test_what_is_no_toml_is_named_with_its_line_on_every_python(text, line):
    with pytest.raises(L.LabtaskerValueError, match="^x line %d can't be read" % line):
        L.read_toml(text, "x")


ODD_TEXTS = ["p\r\nq", "\u2028\x85\x0b\x0c\x1c", "'\"\\", "\U0001f600", "\x7f\x00\x1b", " # = [", "é", "\ufeff", "\t"]


@pytest.mark.parametrize("password", ODD_TEXTS, ids=ascii)
def test_any_password_that_is_written_is_read_back(folder, password):
    L.write_config(str(folder / ".labtasker"), "http://h:1", "q", password)
    assert L.load_config().password == password


def test_a_password_that_is_no_text_is_refused_before_anything_is_written(folder):
    with pytest.raises(L.LabtaskerValueError, match="not UTF-8"):
        L.write_config(str(folder / ".labtasker"), "http://h:1", "q", "p\udcff")
    assert not list((folder / ".labtasker").iterdir())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_configuration_with_a_byte_order_mark_is_taken(folder, encoding):
    write(folder, "")
    (folder / ".labtasker" / "config.toml").write_bytes(FULL.replace("\\u00e9", "é").encode(encoding))
    assert L.load_config().password == 'p"é'


@pytest.mark.parametrize("encoding, words", [("latin-1", "line 7 is not UTF-8"), ("utf-16-le", "line . has a null character"), ("cp1252", "line 7")])
def test_a_configuration_in_another_encoding_is_named_with_its_line(folder, encoding, words):
    write(folder, "")
    (folder / ".labtasker" / "config.toml").write_bytes(FULL.replace("\\u00e9", "é").encode(encoding))
    with pytest.raises(L.LabtaskerValueError, match="config.toml " + words):
        L.load_config()


@pytest.mark.parametrize("line", ["key", "key = ", "key = 'a", 'key = "a', "key = [1, 2]", "key = {a = 1}", "[a", "key = 2026-01-01", "= 3"])
def test_what_the_small_reader_does_not_know_it_refuses_with_the_line(line):
    with pytest.raises(L.LabtaskerValueError, match="x line 2"):
        L.read_toml("[queue]\n" + line, "x")


@pytest.mark.parametrize("text, words", [
    ("[endpoint", "config.toml"), ("[queue]\nqueue_name = 5", "queue_name"), ("[task]\nheartbeat_interval = 'x'", "heartbeat_interval"),
    ("[task]\nheartbeat_interval = 0", "over 0"), ("[endpoint]\napi_base_url = true", "api_base_url"),
])
def test_a_broken_configuration_is_named(folder, text, words):
    write(folder, text)
    with pytest.raises(L.LabtaskerValueError, match=words):
        L.load_config()


def test_folders_and_file_urls_lead_to_a_store_without_a_server(folder, monkeypatch):
    there = str(folder / "shared")
    for url in ("file:shared", "file://" + there, "file:" + there, "file://localhost" + there, "FILE:shared", "shared", "./shared", there):
        monkeypatch.setenv("LABTASKER_URL", url)
        L.use_client(None)
        if url == "shared":  # only what says that it is a URL may lead to what is not there yet
            with pytest.raises(L.LabtaskerValueError, match="LABTASKER_URL: shared is neither a URL .* nor a folder that is there"):
                L.client()
            (folder / "shared").mkdir()
        assert L.client().where == str(folder / "shared" / "journal.jsonl")


NO_URLS = ["http://", "https://", "http:", "http:/host", "http:///path", "http://?x", "http://#x", "http://:9321", "http://[::1", "http://[zz]:1",
           "http://::1", "http://localhost:99999", "http://localhost:0", "http://localhost:abc", "http://local host:1", "http://host?query",
           "http://host:", "http://a:1:2", " http://127.0.0.1:9", '"http://127.0.0.1:9"', "htp://127.0.0.1:9", "tcp://127.0.0.1:9", "127.0.0.1:9",
           "localhost:9", "ftp:folder", "file://host/folder", "file:", "file://", " ", "nosuch", "/nosuch/folder", "./config.toml", "<http://h:1>"]


@pytest.mark.parametrize("url", NO_URLS, ids=ascii)
@pytest.mark.parametrize("source", ["environment", "file"])
def test_what_is_neither_a_url_nor_a_folder_that_is_there_is_refused_by_its_name(folder, monkeypatch, url, source):
    where = "LABTASKER_URL"
    if source == "environment":
        monkeypatch.setenv("LABTASKER_URL", url)
    else:
        where = write(folder, '[endpoint]\napi_base_url = %s\n' % json.dumps(url)) or "config.toml: endpoint.api_base_url"
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    with pytest.raises(L.LabtaskerValueError) as refused:
        L.submit_task(args={"a": 1})
    assert where in str(refused.value) and url in str(refused.value)
    assert not list(folder.rglob("journal.jsonl"))


@pytest.mark.parametrize("url", ["http://host", "HTTPS://Host:1/a/b/", "http://[::1]:80", "http://[fe80::1%eth0]:80", "http://10.0.0.1:65535/",
                                 "http://h\u00f6st:1", "http://a_b.c-d:1/x@y"])
def test_urls_of_servers_are_taken(url):
    assert L.checked_url(url, "x") == url.replace("HTTPS", "https")


@pytest.mark.parametrize("url", ["http://%s", "https://%s", "http://%s/a", "%s", "ftp://%s"])
@pytest.mark.parametrize("login", ["user:hunter2@host:9", "hunter2@host:9", "user:hunt/hunter2@host", "u:hunter2@x@host", ":hunter2@host:1"])
def test_a_url_with_a_login_in_it_is_refused_without_that(url, login):
    with pytest.raises(L.LabtaskerValueError, match="LABTASKER_PASSWORD") as refused:
        L.checked_url(url % login, "LABTASKER_URL")
    assert "hunter2" not in str(refused.value) and "host" in str(refused.value)


def test_an_odd_host_is_a_server_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    for url in ("https://%s:1" % ("a" * 70), "https://a..b:1", "http://a..b:1", "http://h\u00f6st.invalid:1"):
        monkeypatch.setenv("LABTASKER_URL", url)
        L.use_client(None)
        with pytest.raises(L.LabtaskerConnectError):
            L.ls_tasks()


def test_a_loop_keeps_to_its_folder_also_while_that_is_away(folder, monkeypatch):
    (folder / "shared").mkdir()
    monkeypatch.setenv("LABTASKER_URL", "shared")
    with L.PinnedConfig() as pinned:
        assert pinned.environ["LABTASKER_URL"] == L.load_config().url == "file:" + str(folder / "shared")


SHAPES = [  # a configuration, the line that is wrong, what is said of it
    ("[queue]\nqueue_name = 'q'\npasword = 'p'", 3, "queue.pasword; did you mean queue.password"), ("queue_name = 'q'", 1, "did you mean queue.queue_name"),
    ("\n[server]\nurl = 'x'", 2, "there is no setting server; there are: endpoint.api_base_url"), ("[endpoint]\n[endpoints]", 2, "endpoints"), ("[queue]\n\npassword = 7", 3, "should be text, not 7"),
    ("[endpoint]\napi_base_url = true", 2, "should be text"), ("[task]\nheartbeat_interval = '5'", 2, "a number over 0"),
    ("queue = 'q'", 1, "queue"), ("[task]\nheartbeat_interval = true", 2, "a number over 0"), ("# \ufeff\n[queue]\nqueue_name = -1", 3, "should be text"),
    ("[queue]\nqueue_name = 'a'\nqueue_name = 'b'", 3, ""), ("[queue]\nqueue_name = ['q']", 2, ""), ("[queue]\nqueue_name = {a = 1}", 2, ""),
    ("[[queue]]\nqueue_name = 'q'", 1, ""), ("{\"queue\": 1}", 1, ""), ("queue_name: q", 1, ""), ("[queue]\nqueue_name = 'q", 2, ""),
]


@pytest.mark.parametrize("text, line, words", SHAPES, ids=[row[0][-30:] for row in SHAPES])
def test_a_configuration_of_another_shape_is_refused_with_its_line(folder, text, line, words):
    write(folder, text)
    with pytest.raises(L.LabtaskerValueError, match=r"config\.toml.* line %d\b" % line) as refused:
        L.load_config()
    assert words in str(refused.value)


def test_a_configuration_that_can_not_be_read_is_refused_not_taken_for_none(folder):
    path = folder / ".labtasker" / "config.toml"
    write(folder, "[queue]\n\nqueue_name = 'q'\n")
    path.write_bytes(path.read_bytes() + b"# \xff\n")
    with pytest.raises(L.LabtaskerValueError, match="config.toml line 4 is not UTF-8"):
        L.load_config()
    path.write_bytes(b"\xef\xbb\xbf[queue]\r\nqueue_name = 'q'\r\n")
    assert L.load_config().queue_name == "q"
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(str(path)), lambda: path.symlink_to("nosuch")):
        make()
        with pytest.raises(L.LabtaskerValueError, match="config.toml"):
            L.load_config()
        path.rmdir() if path.is_dir() else path.unlink()


def test_settings_of_the_old_clients_file_that_are_not_ours_are_left_alone(folder):
    write(folder, "version_check = false\n[queue]\nqueue_name = 'q'\n[other]\nx = 1\n", "client.toml")
    assert L.load_config().queue_name == "q"


needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="root alone can give files away")


@needs_root
@pytest.mark.parametrize("name", [".labtasker", ".labtasker/config.toml", ".labtasker/client.toml", ".labtasker/server.json"])
def test_what_belongs_to_another_user_does_not_decide_for_us(folder, monkeypatch, name):
    write(folder, '[endpoint]\napi_base_url = "http://127.0.0.1:9"\n' if name == ".labtasker" else "", "client.toml" if "client" in name else "config.toml")
    (folder / ".labtasker" / "server.json").write_text("{}")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    if name.endswith("server.json"):
        L.ls_tasks()
    os.chown(str(folder / name), 4321, 4321)
    L.use_client(None)
    for use in (L.ls_tasks, L.submit_task):
        with pytest.raises(L.LabtaskerValueError, match="%s belongs to another user, 4321.*LABTASKER_TRUST=%s" % (folder / name, folder / ".labtasker")):
            use(**({} if use is L.ls_tasks else {"args": {"a": 1}}))
    assert not list(folder.rglob("journal.jsonl"))
    for trust, is_trusted in (("", False), (":", False), (str(folder / "below"), False), (str(folder.parent), False),
                              ("/x:%s" % folder, True), ("%s/:" % (folder / ".labtasker"), True)):
        monkeypatch.setenv("LABTASKER_TRUST", trust)
        if is_trusted:
            assert L.load_config().root == str(folder / ".labtasker") and L.living_server(str(folder / ".labtasker"), "q") is None
        else:
            with pytest.raises(L.LabtaskerValueError, match="belongs to another user"):
                L.client()
    monkeypatch.delenv("LABTASKER_TRUST")
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    os.chown(str(folder / name), 0, 0)
    assert L.client()


@needs_root
def test_a_link_of_another_user_to_a_folder_of_ours_is_theirs_and_a_folder_that_is_named_is_trusted(folder, monkeypatch):
    write(folder, '[queue]\nqueue_name = "q"\n')
    (folder / "deep").mkdir()
    monkeypatch.chdir(folder / "deep")
    os.symlink(str(folder / ".labtasker"), ".labtasker")
    assert L.load_config().queue_name == "q"
    os.lchown(".labtasker", 4321, 4321)
    with pytest.raises(L.LabtaskerValueError, match="another user"):
        L.load_config()
    for name in (".labtasker", ".labtasker/config.toml"):
        os.chown(str(folder / name), 4321, 4321)
    monkeypatch.setenv("LABTASKER_ROOT", str(folder / ".labtasker"))
    assert L.load_config().queue_name == "q"  # its files are its owner's
    os.chown(str(folder / ".labtasker" / "config.toml"), 4322, 4322)
    with pytest.raises(L.LabtaskerValueError, match="config.toml belongs to another user, 4322"):
        L.load_config()


def test_a_store_that_a_first_write_makes_is_named_once(folder, capsys):
    L.ls_tasks()
    assert capsys.readouterr().err == ""
    L.submit_task(args={"a": 1})
    L.submit_task(args={"a": 2})
    assert capsys.readouterr().err == "labtasker: created the store %s\n" % (folder / ".labtasker")


def test_a_server_without_a_password_is_refused_before_anything_is_sent(folder, monkeypatch):
    monkeypatch.setenv("LABTASKER_URL", "http://127.0.0.1:1")
    with pytest.raises(L.LabtaskerValueError, match="LABTASKER_PASSWORD"):
        L.ls_tasks()


def test_a_server_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("LABTASKER_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    with pytest.raises(L.LabtaskerConnectError, match="http://127.0.0.1:1 .*refused.*labtasker serve"):
        L.ls_tasks()


class Canned:
    """A server that answers each connection with the next of these bytes; `heads` are the request lines it saw."""

    def __init__(self, *answers):
        self.heads, self.socket = [], socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(5)
        self.url = "http://127.0.0.1:%d" % self.socket.getsockname()[1]
        threading.Thread(target=self.live, args=(answers,), daemon=True).start()

    def live(self, answers):
        for answer in answers:
            connection, _ = self.socket.accept()
            with connection:
                self.heads.append(connection.recv(65536).split(b"\r\n")[0].decode())
                connection.sendall(answer)
        self.socket.close()


FINE = b'HTTP/1.1 200 OK\r\nlabtasker-extensions: 1\r\nContent-Length: 2\r\n\r\n{}'


@pytest.mark.parametrize("extensions, minors", [(b"1", (0, 0, 0)), (b"0", (0, 0, 1))])
def test_the_first_requests_of_a_process_and_all_to_a_server_with_the_extensions_do_without_http_client(extensions, minors):
    server = Canned(*[FINE.replace(b": 1", b": " + extensions)] * 3)
    transport = L.HttpTransport(server.url + "/prefix/", "q", "p")
    for _ in range(3):
        assert transport.call("GET", "/health", {"a": "b c", "none": None}, None) == (200, {})
        assert transport.extensions == (extensions == b"1")
    assert server.heads == ["GET /prefix/health?a=b+c HTTP/1.%d" % minor for minor in minors]
    transport.close()


def test_a_plain_connection_is_used_again_where_the_answer_says_that_it_stays():
    kept = FINE.replace(b"\r\nC", b"\r\nConnection: Keep-Alive\r\nC")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        connection = L._PlainConnection("http://127.0.0.1:%d" % listener.getsockname()[1], None, 5)
        with listener.accept()[0] as peer:
            for answer, content, stays in ((b"HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n", b"", True),
                                           (kept, b"{}", True), (FINE, b"{}", False)):
                assert connection.is_usable()
                connection.send("GET", "/", {}, None, 5, is_last=False)
                assert b" HTTP/1.0\r\n" in peer.recv(4096)
                peer.sendall(answer)
                assert connection.answer()[2] == content
                assert connection.is_usable() is stays
        connection.close()
        assert not connection.is_usable()


def connected(socks):
    """Return a transport after a request over a connection that it keeps, and append the connection's socket to `socks`."""
    transport = L.HttpTransport(Canned(FINE).url, "q", "p")
    transport.asked = transport.SINGLE
    assert transport.call("GET", "/health", None, None) == (200, {})
    socks.append(transport.kept.connection.sock)
    return transport


def test_a_connection_is_closed_with_its_thread_and_with_its_client():
    socks = []
    thread = threading.Thread(target=lambda: transports.append(connected(socks)))
    transports = []
    thread.start()
    thread.join()
    connected(socks)
    assert [sock.fileno() for sock in socks] == [-1, -1] and transports


def test_a_stream_of_events_is_read_though_the_server_would_keep_the_connection(folder, monkeypatch):
    server = Canned(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                    b"10\r\ndata: {\"a\": 1}\n\n\r\n")
    monkeypatch.setenv("LABTASKER_URL", server.url)
    monkeypatch.setenv("LABTASKER_PASSWORD", "p")
    lines = L.client().listen(None, 10)
    sock = lines.sock
    assert list(lines) == [b'data: {"a": 1}\n', b"\n"] and sock.fileno() == -1


def test_a_number_that_another_file_has_by_now_is_not_closed_for_a_connection(tmp_path):
    socks = []
    for end in (lambda transport: transport.close(), lambda transport: None):
        transport = connected(socks)
        number = socks[-1].fileno()
        with open(str(tmp_path / "other"), "w") as other:
            os.dup2(other.fileno(), number)
        end(transport)
        del transport
        os.write(number, b"kept")
        os.close(number)
        assert (tmp_path / "other").read_text() == "kept"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", FINE[:-1], b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nno JSON"])
def test_half_an_answer_is_none(answer):
    with pytest.raises(L.LabtaskerConnectError, match="http://127.0.0.1:"):
        L.HttpTransport(Canned(answer).url, "q", "p").call("GET", "/health", None, None)


def of_a_stranger(status, body=b"", *headers):
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body)] + list(headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@pytest.mark.parametrize("first", [0, 9], ids=["plainly", "kept"])
@pytest.mark.parametrize("answer", [
    of_a_stranger(b"200 OK"), of_a_stranger(b"302 Found", b"", b"Location: /login"), of_a_stranger(b"304 Not Modified"),
    of_a_stranger(b"202 Accepted"), of_a_stranger(b"200 OK", b"{}"), of_a_stranger(b"302 Found", b"{}"),
    of_a_stranger(b"200 OK", b"null"), of_a_stranger(b"200 OK", b"<html>")])
def test_what_no_labtasker_server_answers_is_never_taken_for_done(answer, first):
    transport = L.HttpTransport(Canned(answer).url, "q", "p")
    transport.asked = first
    with pytest.raises(L.LabtaskerConnectError, match="is it a Labtasker server"):
        transport.call("DELETE", "/api/v1/queues/me/tasks/x", None, None)
    transport.close()


@pytest.mark.parametrize("answer", [of_a_stranger(b"204 No Content"), of_a_stranger(b"200 OK", b'"ok"'), of_a_stranger(b"200 OK", b"[]"),
                                    of_a_stranger(b"200 OK"), of_a_stranger(b"301 Moved", b"{}", b"Location: /")])
def test_an_answer_has_the_kind_of_content_that_was_asked_for(answer):
    with pytest.raises(L.LabtaskerConnectError, match="is it a Labtasker server"):
        L.HttpTransport(Canned(answer).url, "q", "p").call("GET", "/api/v1/queues/me/tasks/x", None, None)


@pytest.mark.parametrize("answer", [of_a_stranger(b"204 No Content"), of_a_stranger(b"302 Found"),
                                    of_a_stranger(b"200 OK", b"<html>", b"Content-Type: text/html")])
def test_what_is_no_stream_of_events_is_not_listened_to(answer):
    with pytest.raises(L.LabtaskerConnectError, match="is it a Labtasker server"):
        L.HttpTransport(Canned(answer).url, "q", "p").listen(None, 20)


@pytest.mark.parametrize("url, found", [
    ("http://host", ("host", None, None)), ("http://10.0.0.1:9321", ("10.0.0.1", "9321", None)),
    ("http://[::1]:80/a/b-c", ("[::1]", "80", "/a/b-c")), ("https://host", None), ("http://user:word@host", None),
    ("http://h\u00f6st", None), ("http://host/a?b", None), ("http://host:http", None)])
def test_what_only_http_client_can_read_is_left_to_it(url, found):
    match = L.HttpTransport(url, "q", "p").plain
    assert (match and match.groups()) == found


@pytest.mark.parametrize("task_id", ["a b", "a\r\nX: y", "a\x00"])
def test_an_id_can_not_end_the_line_of_a_request(task_id):
    server = Canned(FINE)
    with pytest.raises(L.LabtaskerConnectError):
        L.HttpTransport(server.url, "q", "p").call("GET", "/api/v1/queues/me/tasks/" + task_id, None, None)
    assert not server.heads


def test_reading_makes_nothing(folder):
    assert L.ls_tasks().content == [] and L.ls_workers().content == []
    assert os.listdir(str(folder)) == []


def test_tasks_are_objects_with_aware_times_and_dicts(folder):
    task_id = L.submit_task(args={"a": {"b": 1}}).task_id
    task = L.ls_tasks(task_id=task_id).content[0]
    assert task.args["a"]["b"] == 1 and task.summary == {} == task.metadata and task.start_time is None
    assert task.created_at.tzinfo is not None and abs(task.created_at - datetime.datetime.now(datetime.timezone.utc)).seconds < 60
    assert json.loads(json.dumps(task.to_dict())) == task.to_dict()
    assert repr(task).startswith("Task(task_id='%s'" % task_id) and "status='pending'" in repr(task)


def test_what_json_cannot_hold_is_a_clear_error(folder):
    with pytest.raises(L.LabtaskerTypeError, match="Send dicts, lists, text"):
        L.submit_task(args={"a": object()})


def test_the_callers_dict_is_not_kept_nor_changed(folder):
    args = {"a.b": [1]}
    task_id = L.submit_task(args=args).task_id
    args["a.b"].append(2)
    assert args == {"a.b": [1, 2]} and L.get_task(task_id).args == {"a": {"b": [1]}}


@pytest.mark.parametrize("given, words", [
    ({"args": {}}, "id"), ({"_id": "x", "arg": {}}, "did you mean args"), ({"_id": "x", "args": 1}, "args: should be an object"),
    ({"_id": "x", "status": "done"}, "status"), ({"task_id": 5}, "id"), ({"_id": "x", "worker_id": "y"}, "worker_id"),
])
def test_an_update_request_is_checked_at_once(given, words):
    with pytest.raises((L.LabtaskerTypeError, L.LabtaskerValueError), match=words):
        L.TaskUpdateRequest(**given)


@pytest.mark.parametrize("submit", [
    lambda name: L.submit_task(args={"a": 1}, **{name: 5}), lambda name: L.submit_tasks([{"args": {"a": 1}, name: 5}]),
    lambda name: L.submit_grid({"a": [1, 2]}, **{name: 5})], ids=["task", "tasks", "grid"])
def test_every_way_to_submit_takes_the_fields_of_the_table_and_no_other(folder, submit):
    submit("retry_delay")
    assert all(task.retry_delay == 5 for task in L.ls_tasks())
    number = len(L.ls_tasks().content)
    for name, words in (("retry_dealy", "did you mean retry_delay="), ("retries", "no field 'retries'"), ("status", "no field")):
        with pytest.raises(L.LabtaskerTypeError, match=words):
            submit(name)
    assert len(L.ls_tasks().content) == number > 0


def test_submit_tasks_is_one_transaction(folder):
    ids = L.submit_tasks({"args": {"i": i}, "priority": i} for i in range(50))
    assert [t.args["i"] for t in L.ls_tasks(sort=[["priority", 1]]).content] == list(range(50)) and len(set(ids)) == 50
    with pytest.raises(L.LabtaskerHTTPStatusError):
        L.submit_tasks([{"args": {"i": 1}}, {"args": {}}])
    assert len(L.ls_tasks().content) == 50


def test_tasks_of_one_form_are_sent_as_rows_where_these_are_known_and_fit(folder, monkeypatch):
    sent, call = [], L.StoreTransport.call

    def noted(self, method, path, query, body):
        sent.append(path.rsplit("/", 1)[-1]) if method == "POST" else None
        return call(self, method, path, query, body)
    monkeypatch.setattr(L.StoreTransport, "call", noted)

    def check(ways, tasks, values=None):
        del sent[:]
        ids = L.submit_tasks(tasks)
        assert sent == ways and [task.task_id for task in L.ls_tasks(limit=len(ids), sort=[["created_at", -1]]).content] == ids[::-1]
        assert [L.get_task(task_id).args for task_id in ids] == (values or [task["args"] for task in tasks])
        assert L.get_task(ids[-1]).priority == tasks[-1].get("priority", 0)
    rows = [{"args": {"a": i, "b": [i]}, "task_name": "n%d" % 7, "priority": 70000} for i in range(3)]
    check(["rows"], rows)
    check(["rows"], [{"args": {"a.b": i, "c": {"d": i}}} for i in range(2)], [{"a": {"b": i}, "c": {"d": i}} for i in range(2)])
    for other in ({"args": {"a": 1}}, {"args": {"b": 1, "a": 1}}, dict(rows[0], priority=1), dict(rows[0], task_name="m")):
        check(["tasks"], rows + [other])
    check(["tasks"], rows[:1])
    check(["tasks"], [{"args": {1: i}} for i in range(2)], [{"1": i} for i in range(2)])
    check(["tasks"], [{"args": {"a": i}, "metadata": {"x": i == 1}} for i in range(2)])
    with pytest.raises(L.LabtaskerTypeError, match="^1.args.a: .* can't be sent"):
        L.submit_tasks([{"args": {"a": 0}}, {"args": {"a": object()}}])
    with pytest.raises(L.LabtaskerHTTPStatusError, match="^(.*: )?1.args.a: the key .a b. may"):
        L.submit_tasks([{"args": {"a": {}}}, {"args": {"a": {"b": 1, "a b": 0}}}])
    monkeypatch.setattr(L, "MAX_BODY_BYTES", 1000)  # of the journal's lines that a compaction would make of rows
    metadata = {"text": "x" * 600}
    check(["rows", "tasks"], [{"args": {"a": i}, "metadata": metadata} for i in range(2)])
    monkeypatch.delitem(L.ROUTES, "POST /api/v1/queues/me/tasks/rows")  # an older server
    check(["rows", "tasks"], rows)


def test_importing_has_no_side_effects_and_is_one_module(folder):
    text = ("import sys, threading; before = set(sys.modules); import labtasker; from labtasker.api_models import TaskUpdateRequest as A\n"
            "assert A is labtasker.TaskUpdateRequest and threading.active_count() == 1\n"
            "slow = {'argparse', 'subprocess', 'socket', 'ssl', 'uuid', 'http', 'urllib.request', 'inspect', 'typing'} & (set(sys.modules) - before)\n"
            "print(sorted(slow))")
    done = subprocess.run([sys.executable, "-c", text], env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "[]" and os.listdir(str(folder)) == []


def test_run_as_a_script_there_is_no_second_copy(folder):
    script = folder / "probe.py"
    script.write_text("import runpy, sys\nsys.argv = ['labtasker', '--version']\n"
                      "try:\n    runpy.run_path(%r, run_name='__main__')\nexcept SystemExit:\n    pass\n" % str(MODULE))
    done = subprocess.run([sys.executable, str(MODULE), "--version"], env=clean_env(), stdout=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0 and L.__version__ in done.stdout


def test_a_child_after_fork_has_a_client_of_its_own(folder):
    L.submit_task(args={"a": 1})
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        L.submit_task(args={"a": 2})
        os.write(write_fd, str(L.client().pid).encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and int(os.read(read_fd, 100)) == pid != L.client().pid
    assert len(L.ls_tasks().content) == 2


@pytest.mark.slow
def test_two_processes_share_a_store_without_a_server(folder):
    text = "import labtasker\nfor i in range(100): labtasker.submit_task(args={'i': i})"
    workers = [subprocess.Popen([sys.executable, "-c", text], env=clean_env(), cwd=str(folder)) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert len(L.ls_tasks(limit=1000).content) == 300


class PlainTransport(L.StoreTransport):
    """The store behind a server that speaks the plain protocol: shows 1000 tasks at most, takes one at a time, and is
    sent no field of ours."""

    extensions, url, most = None, "http://plain", 4

    def call(self, method, path, query, body):
        self.extensions = False
        given = json.loads(body) if body else {}
        names = set(query or {}) | set(given if isinstance(given, dict) else ())
        assert not names & set(L.OUR_FIELDS.get((method, path.rsplit("/", 1)[-1]), ())), (path, names)
        assert not (method == "POST" and isinstance(given, list)) and len(given) <= max(self.most, len(names))
        assert path[-7:] != "/search" or given["limit"] <= self.most
        return super().call(method, path, query, body)


@pytest.fixture
def plain(folder, monkeypatch):
    monkeypatch.setattr(L, "PLAIN_LIMIT", PlainTransport.most)
    L.use_client(L.Client(PlainTransport(str(folder / ".labtasker"), "default")))


def test_a_server_without_the_extensions_is_sent_and_asked_what_it_knows(plain, capsys):
    ids = [L.submit_task(args={"i": 0, "deep": {"x": 1, "y": 1}}).task_id]
    ids += L.submit_tasks([{"args": {"i": i}, "priority": i} for i in range(1, 11)])
    assert "10 tasks, 1 at a time" in capsys.readouterr().err
    for task_id in (L.submit_task(args={"i": 0}, retry_delay=5).task_id, L.submit_tasks([{"args": {"i": 0}, "retry_delay": 5}])[0]):
        L.update_tasks([L.TaskUpdateRequest(task_id=task_id, retry_delay=7)])
        L.delete_task(task_id)
    assert [task.task_id for task in L.ls_tasks(limit=4, offset=3).content] == ids[3:7]
    assert [task.task_id for task in L.ls_tasks(limit=10 ** 9).content] == ids
    assert [task.task_id for task in L.ls_tasks(limit=5, offset=2, sort=[["args.i", -1]]).content] == ids[::-1][2:7]
    assert [task.task_id for task in L.ls_tasks(limit=99, sort=[["_id", -1]], extra_filter="args.i > 5", status="pending").content] == sorted(ids[6:])[::-1]
    assert L.ls_tasks(limit=99, task_name="nosuch").content == [] and L.ls_tasks(limit=99, task_name="nosuch").found is False
    updates = [L.TaskUpdateRequest(task_id=task_id, args={"deep": {"x": 2}}, priority=1) for task_id in ids]
    changed = L.update_tasks(updates).content
    assert [task.task_id for task in changed] == ids and changed[0].args["deep"] == {"x": 2, "y": 1}
    assert "11 tasks, 4 at a time" in capsys.readouterr().err
    task = L.fetch_task(heartbeat_timeout=60, fetch_id=L.new_id(), wait_s=30).task
    L.deliver(task.task_id, "running", {"a": 1}, None, task.run_id)
    assert L.send_heartbeat(task.task_id, run_id=task.run_id, wait_s=30) is None
    L.deliver(task.task_id, "pending", {"b": {"c": 2}}, None, task.run_id, "a reason")
    after = L.get_task(task.task_id)
    assert (after.status, after.retries, after.summary) == ("pending", 0, {"a": 1, "b": {"c": 2}})
    assert L.create_worker("w") and len(L.ls_workers(limit=99).content) == 1


def test_a_server_without_the_extensions_is_not_asked_to_count(plain, monkeypatch):
    asked, call = [], PlainTransport.call
    monkeypatch.setattr(PlainTransport, "call", lambda self, *words: asked.append(words[1]) or call(self, *words))
    monkeypatch.setattr(L.time, "sleep", lambda seconds: None)
    L.submit_tasks([{"args": {"i": i % 2}} for i in range(9)])
    looks = L.poll_counts({"extra_filter": "args.i == 1"}, 60)
    assert next(looks).counts == {"pending": 4} and L.counted({}, "args.i").counts == {"0": 5, "1": 4}
    L.fetch_task(heartbeat_timeout=60, extra_filter="args.i == 1")
    assert next(looks).counts == {"pending": 3, "running": 1}
    assert any(path.endswith("/search") for path in asked)
    assert [(row["args.i"], row["n"], row["mean"]) for row in L.table("args.i", "priority", status=None)] == [(0, 5, 0), (1, 4, 0)]
    assert not any(path.endswith(("/count", "/mark", "/table")) for path in asked), asked


def test_the_bar_of_a_wait_needs_no_extensions(plain, monkeypatch):
    L.submit_tasks([{"args": {"i": i}} for i in range(3)])
    paces = L._paces({"extra_filter": "args.i < 2"})
    assert next(paces).counts == {"pending": 2}
    slept = []
    monkeypatch.setattr(L.time, "sleep", lambda seconds: slept.append(seconds) or L.report_task_status(
        L.fetch_task(heartbeat_timeout=60).task.task_id, "success"))
    assert [next(paces).counts for _ in range(2)] == [{"pending": 1, "success": 1}, {"success": 2}]
    assert len(slept) == 2 and all(L.REFRESH_S <= seconds <= 30 for seconds in slept)
    assert len(list(L._paces({}, L.monotonic()))) == 1, "the last one is yielded when the time is up"


def test_what_a_server_may_have_done_is_not_repeated_where_it_can_not_be_asked_what_it_knows(monkeypatch):
    transport, path = L.HttpTransport("http://h:1", "q", "p"), "/api/v1/queues/me/tasks"

    def health(error):
        def call(method, path, query, body):
            assert path == "/health"
            transport.extensions = True
            if error:
                raise error
        transport.extensions, transport.call = None, call
        return transport._risk("POST", path, json.dumps({"args": {}, "task_id": "t"}))
    assert health(None) is None and health(L.LabtaskerConnectError("no answer"))


def test_a_folder_that_was_removed_has_no_version(folder, monkeypatch):
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert L.code_version() is None


def test_a_folder_is_the_stores_if_its_path_is_or_the_key_in_it_is_the_servers(folder, monkeypatch):
    def is_beside(url, root=folder / ".labtasker", answer=None):
        def prove(transport):
            assert (transport.url, transport.key) == ("http://h:1", "secret")
            if isinstance(answer, Exception):
                raise answer
            return answer
        monkeypatch.setattr(L.HttpTransport, "is_of_store", prove)
        return L._is_beside_store(L.load_config()._replace(url=url, root=str(root)))
    (folder / "link").symlink_to(folder / ".labtasker")
    assert is_beside(None) and is_beside("file:.labtasker") and is_beside("file:link") and not is_beside("file:elsewhere")
    assert not is_beside("http://h:1")  # no server has written here
    about = {"pid": 1, "host_id": "h", "address": "127.0.0.1:1", "url": "http://h:1", "key": "secret"}
    write(folder, json.dumps(dict(about, key=None)), "server.json")
    assert not is_beside("http://h:1", answer=True)
    write(folder, json.dumps(about), "server.json")
    assert is_beside("http://h:1", answer=True) and not is_beside("http://h:1", answer=False)
    assert not is_beside("http://h:1", answer=L.NotOurServer("another store's"))


def test_looks_count_again_only_when_something_has_changed(folder, monkeypatch):
    counted, count, slept = [], L.counted, []
    monkeypatch.setattr(L, "counted", lambda query: counted.append(query) or count(query))
    monkeypatch.setattr(L.time, "sleep", slept.append)
    L.submit_task(args={"a": 1}, task_name="mine")
    looks = L.poll_counts({"task_name": "mine"}, 0)
    assert [next(looks).counts for _ in range(5)] == [{"pending": 1}] * 5 and len(counted) == 1
    L.submit_task(args={"a": 2}, task_name="mine")
    assert next(looks).counts == {"pending": 2} and len(counted) == 2
    assert [next(looks).counts for _ in range(5)] == [{"pending": 2}] * 5 and len(counted) == 2
    assert len(slept) == 10 and min(slept) >= 0.5


def end(task_id, status="success"):
    """End a task; a pending one by hand."""
    if status == "deleted":
        L.delete_task(task_id)
    elif status == "cancelled":
        L.update_tasks([L.TaskUpdateRequest(task_id=task_id, status=status)])
    else:
        task = L.fetch_task(heartbeat_timeout=60, extra_filter={"_id": task_id}).task
        L.deliver(task_id, status, {"acc": 1}, None, task.run_id)


def meanwhile(monkeypatch, kind, path, *steps):
    """Do one of the steps before each request to a path, as another process would; return the paths that are asked."""
    asked, left, call = [], list(steps), kind.call

    def hear(self, *words):
        asked.append(words[1].rsplit("/", 1)[-1])
        if words[1].endswith(path) and left:
            step, path_is = left.pop(0), len(asked)
            step()
            del asked[path_is:]
        return call(self, *words)
    monkeypatch.setattr(kind, "call", hear)
    return asked


def test_tasks_come_as_they_end_each_once_however_they_end(folder, monkeypatch):
    answers = [L.submit_task(args={"i": i}, max_retries=1) for i in range(6)]
    ids = [answer.task_id for answer in answers]
    end(ids[5]), end(ids[0], "cancelled"), end(ids[2], "deleted")
    coming = L.as_completed(answers + [ids[0], L.get_task(ids[1])] + ids)
    found = [next(coming), next(coming)]
    assert [(task.task_id, task.status) for task in found] == [(ids[5], "success"), (ids[0], "cancelled")] and found[0].summary == {"acc": 1}
    asked = meanwhile(monkeypatch, L.StoreTransport, "/mark", lambda: L.submit_task(args={"other": 1}), lambda: end(ids[3], "failed"),
                      lambda: end(ids[4], "deleted"), lambda: end(ids[1]))
    assert [(task.task_id, task.status) for task in coming] == [(ids[3], "failed"), (ids[1], "success")]
    assert asked == ["mark", "count", "mark", "count", "search", "mark", "count", "count", "mark", "count", "search"]
    assert list(L.as_completed([])) == [] and [task.task_id for task in L.as_completed({ids[1]: "a trial"}, timeout=0)] == [ids[1]]


def test_while_nothing_changes_only_the_mark_is_waited_for_and_the_time_is_kept(folder, monkeypatch):
    one, two = (L.submit_task(args={"i": i}).task_id for i in "ab")
    end(one)
    asked = meanwhile(monkeypatch, L.StoreTransport, "/mark")
    coming = L.as_completed([one, two], timeout=0.05)
    assert next(coming).task_id == one
    with pytest.raises(TimeoutError, match="1 of 2 tasks have not ended within 0.05 s"):
        next(coming)
    assert asked == ["count", "search", "mark"]
    with pytest.raises(TimeoutError):
        next(L.as_completed([two], timeout="0s"))


def test_tasks_come_as_they_end_from_a_server_that_has_no_mark(plain, monkeypatch):
    ids = L.submit_tasks([{"args": {"i": i}} for i in range(9)])
    slept = []
    steps = [lambda: end(ids[7]), lambda: end(ids[2], "deleted"), lambda: None, lambda: end(ids[0], "cancelled")]
    monkeypatch.setattr(L.time, "sleep", lambda seconds: slept.append(seconds) or (steps.pop(0)() if steps else None))
    asked = meanwhile(monkeypatch, PlainTransport, "nothing")
    coming = L.as_completed([ids[0], ids[2], ids[7]])
    assert [next(coming).task_id for _ in "12"] == [ids[7], ids[0]] and list(coming) == []
    assert len(slept) == 4 and min(slept) >= 0.5 and not {"mark", "count"} & set(asked)


def test_tasks_come_though_the_server_is_away_meanwhile(folder, monkeypatch, capsys):
    ids, slept = L.submit_tasks([{"args": {"i": i}} for i in range(2)]), []
    coming = L.as_completed(ids, timeout=60)
    end(ids[0])
    next(coming)

    def away():
        raise L.LabtaskerConnectError("no answer")
    monkeypatch.setattr(L.time, "sleep", slept.append)
    meanwhile(monkeypatch, L.StoreTransport, "/mark", away, away, away, lambda: end(ids[1]))
    assert next(coming).task_id == ids[1] and len(slept) >= 3
    assert capsys.readouterr().err.count("no answer") == 1
    with pytest.raises(L.LabtaskerConnectError):  # at the first look it may never have been there
        meanwhile(monkeypatch, L.StoreTransport, "/count", away)
        next(L.as_completed(ids))


@pytest.mark.parametrize("given, words", [("3f2a", "did you mean as_completed\\(\\['3f2a'\\]"), (5, "takes a list"), ([5], "not 5"),
                                          ([None], "not None"), (["a b"], "not 'a b'")])
def test_what_is_no_task_is_not_waited_for(folder, given, words):
    with pytest.raises(L.LabtaskerTypeError, match=words):
        L.as_completed(given)
    with pytest.raises(L.NotFound, match="no task 3f2a; as_completed takes whole ids"):
        next(L.as_completed(["3f2a"]))
    with pytest.raises(L.LabtaskerValueError, match="not a duration"):
        L.as_completed([], timeout="soon")


def test_looks_wait_for_a_server_that_went_away(folder, monkeypatch, capsys):
    slept, call = [], L.StoreTransport.call

    def away(*words):
        if len(slept) < 4:
            raise L.LabtaskerConnectError("no answer")
        return call(*words)
    monkeypatch.setattr(L.time, "sleep", slept.append)
    L.submit_task(args={"a": 1})
    looks = L.poll_counts({}, 0)
    next(looks)
    monkeypatch.setattr(L.StoreTransport, "call", away)
    assert next(looks).counts == {"pending": 1} and len(slept) == 4
    shown = capsys.readouterr().err
    assert shown.count("no answer") == 1 and "it is back" in shown
    slept.clear()
    with pytest.raises(L.LabtaskerConnectError):  # at the first look it may never have been there
        next(L.poll_counts({}, 0))


def test_a_filter_of_a_field_that_is_selected_too_is_anded_everywhere(folder):
    L.submit_task(args={"a": 1}, task_name="x")
    sent = []
    L.client().transport.call, call = lambda *words: sent.append(words) or call(*words), L.client().transport.call
    assert L.ls_tasks(task_name="x", extra_filter='task_name == "y"').content == []
    assert json.loads(sent[0][3])["extra_filter"] == {"$and": [{"task_name": "y"}]}


def test_a_listing_is_a_sequence_of_all_that_iterating_gives(home):
    L.submit_tasks([{"args": {"x": x}} for x in range(150)])
    found = L.ls_tasks()
    assert len(found.content) == 100 and repr(found) == "<TaskLsResponse: 100 pending and more>"
    assert len(found) == len(list(found)) == 150 and len(found.content) == 100
    xs = [task.args["x"] for task in found]
    assert [found[at].args["x"] for at in (0, 99, 100, 149, -1, -150)] == [xs[at] for at in (0, 99, 100, 149, -1, -150)]
    for part in (slice(2), slice(-2, None), slice(95, 105), slice(None, None, -40), slice(500, 600)):
        assert [task.args["x"] for task in found[part]] == xs[part]
        assert found[part] == list(found)[part] and type(found[part]) is type(found)
    assert found[0] in found and next(reversed(found)) == found[149] and found != found[1:]
    for place in (150, -151):
        with pytest.raises(IndexError):
            found[place]
    with pytest.raises(TypeError):
        found["x"]
    some = L.ls_tasks(limit=7)
    assert len(some) == 7 and some and repr(some) == "<TaskLsResponse: 7 pending>"


def test_an_empty_listing_is_false_and_says_so(home):
    for found in (L.ls_tasks(), L.ls_workers(), L.update_tasks([])):
        assert not found and len(found) == 0 and found[:1] == [] and "nothing" in repr(found)
        assert "nothing" in found._repr_html_()


def test_a_notebook_shows_a_table_in_which_nothing_is_markup(home):
    evil = "<script>alert(1)</script>&\x1b[31m\""
    task_id = L.submit_task(task_name="n", args={"lr": 0.1, "opt": {"k": evil}, "empty": {}, "long": "x" * 999}).task_id
    L.update_tasks([L.TaskUpdateRequest(_id=task_id, summary={"<script>": 1, "acc": 0.123456789, "labtasker_exception": {"type": "E", "traceback": "T b"}})])
    L.create_worker("w", {"gpu": evil})
    text = L.ls_tasks()._repr_html_()
    for shown in (task_id, "args.lr", "0.1", "summary.acc", "0.123457", "<th>summary.&lt;script&gt;</th>", "<td>&lt;script&gt;alert", "1 pending", "summary.labtasker_exception.type"):
        assert shown in text
    assert "T b" not in text and "x" * 999 not in text
    assert "gpu" in L.ls_workers()._repr_html_()
    for shown in (text, L.ls_workers()._repr_html_()):
        assert "<script" not in shown and "\x1b" not in shown and shown.count("<tr>") == shown.count("</tr>") == 2


MISTAKES = [  # what somebody writes; what the error says
    (lambda task: L.submit_task({"lr": 1}), "did you mean submit_task\\(args={'lr': 1}\\)"),
    (lambda task: L.submit_task(lr=0.1), "no field 'lr'; did you mean args={'lr': 0.1}"),
    (lambda task: L.submit_task(name="x", args={"lr": 1}), "did you mean task_name=..., or args={'name': 'x'}"),
    (lambda task: L.submit_tasks([{"lr": 1}]), "did you mean args={'lr': 1}"),
    (lambda task: L.submit_tasks({"args": {"lr": 1}}), "takes a list of dicts"),
    (lambda task: L.submit_grid({"lr": [1]}, model="vit"), "did you mean args={'model': 'vit'}"),
    (lambda task: L.submit_grid([{"lr": 1}]), "takes a dict of lists"),
    (lambda task: L.submit_grid({"lr": 0.1}), r"did you mean \[0.1\]"),
    (lambda task: L.ls_tasks("args.lr > 0.1"), "did you mean extra_filter='args.lr > 0.1'"),
    (lambda task: L.ls_tasks({"args.lr": 1}), "did you mean extra_filter={'args.lr': 1}"),
    (lambda task: L.ls_workers("gpu == 1"), "worker_id='gpu == 1' is no id"),
    (lambda task: L.ls_tasks(status="pendng"), "not 'pendng'; did you mean pending"),
    (lambda task: L.ls_tasks(sort=[["lr", -1]]), "did you mean args.lr"),
    (lambda task: L.ls_tasks(extra_filter="lr > 0.1"), "did you mean args.lr"),
    (lambda task: L.ls_workers(extra_filter="gpu > 0.1"), "did you mean metadata.gpu"),
    (lambda task: L.update_tasks([{"_id": task.task_id, "lr": 0.1}]), "did you mean args={'lr': 0.1}"),
    (lambda task: L.update_tasks(L.TaskUpdateRequest(_id=task.task_id)), r"takes a list; did you mean update_tasks\(\["),
    (lambda task: L.update_tasks([task.task_id]), "takes TaskUpdateRequests, not '"),
    (lambda task: L.update_tasks([{"_id": task.task_id, "status": "success"}]), "can be set to cancelled, not to success$"),
    (lambda task: L.update_tasks([{"_id": task.task_id, "status": "running"}]), "not to running, which only a loop does"),
    (lambda task: L.report_task_status(task.task_id, "failed"), "can be set to cancelled, not to failed"),
    (lambda task: L.delete_task(task), "did you mean its .task_id"),
]


def test_a_mistake_in_a_call_leads_to_what_was_meant_and_changes_nothing(home):
    L.submit_task(args={"lr": 1})
    task = L.ls_tasks()[0]
    for call, words in MISTAKES:
        with pytest.raises(L.LabtaskerError, match=words):
            call(task)
    assert L.ls_tasks().content == [task]


@pytest.mark.parametrize("gone", ["the folder", "what is in it"])
def test_a_job_whose_configuration_of_a_server_is_gone_asks_no_new_store_instead(tmp_path, monkeypatch, gone):
    root = tmp_path / ".labtasker"
    L.write_config(str(root), "http://127.0.0.1:9", "q", "p")
    for name, value in (("ROOT", str(root)), ("SOURCE", str(root / "config.toml")), ("RUN_ID", "r"), ("TASK_ID", "t")):
        monkeypatch.setenv("LABTASKER_" + name, value)
    L.use_client(None)
    assert L.client().where == "http://127.0.0.1:9"
    L.use_client(None)
    (root / "config.toml").unlink()
    if gone == "the folder":
        root.rmdir()
    with pytest.raises(L.StoreUnavailable, match="config.toml is not there at the moment"):
        L.submit_task(args={"a": 1})
    assert not root.exists() or not list(root.iterdir())
