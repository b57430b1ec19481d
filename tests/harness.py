"""What the tests share: waiting, running the command line, servers, and the places that a test works in.

`run_cli` runs the checkout's labtasker.py, as `python -m labtasker` so that it is compiled once. A `Place` is a working folder with a store behind
it, embedded or on a server, with the same calls for both. The only `time.sleep` of the tests is in `wait_until`.
"""
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = ROOT / "labtasker.py"
TESTS = ROOT / "tests"
QUEUE, PASSWORD = "test-queue", "test-password"
STRICT = {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1", "PYTHONMALLOC": "pymalloc"}  # as python -W error -X dev, see setup.cfg

OTHERS = {"PYTHONWARNINGS": "ignore"}  # the same for pip, mypy and the like, whose warnings are not ours to mend


def wait_until(function, what, timeout_s=20, never=None):
    """Return the first true value of `function()`; AssertionError with the last value where none comes.

    `never(value)` true says that the awaited state can't come any more: then it fails at once."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.002
    while True:
        value = function()
        if value:
            return value
        if never is not None and never(value):
            raise AssertionError("%s: can't come any more. Last value: %r" % (what, value))
        if time.monotonic() > deadline:
            raise AssertionError("%s: not within %s s. Last value: %r" % (what, timeout_s, value))
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.1)


def packed(folder):
    """Return {task id: [{run, output, report, path}]} of the runs in the packs of a store's folder, as a reader of the format would."""
    found = {}
    for path in sorted(pathlib.Path(str(folder)).glob("logs/*.pack")):
        with open(str(path), "rb") as file:
            assert json.loads(file.readline().decode())["pack"] == 1
            for line in iter(file.readline, b""):
                head = json.loads(line.decode())
                output, report = [file.read(head[part] + 1) for part in ("length", "report")]
                assert output[-1:] == report[-1:] == b"\n" and int(head["crc"], 16) == zlib.crc32(output[:-1])
                found.setdefault(head["task"], []).append({
                    "run": head["run"], "output": output[:-1].decode(), "report": json.loads(report.decode()), "path": path})
    return found


def clean_env(env=None):
    """Return this process's environment without LABTASKER_* and with `import labtasker` made possible, then `env`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LABTASKER_", "COV_", "SLURM_", "PBS_"))}
    kept.update(PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8", NO_COLOR="1", TERM="dumb", PAGER="cat")
    kept.update(env or {})
    return kept


def check_no_warning(text):
    """AssertionError where the output of a process has a warning of Python, such as of a file left open. Where the process
    is strict, that of a file is an error in a destructor, which changes no exit code."""
    found = WARNING.search(text)
    assert not found, text[max(0, found.start() - 2000):found.end() + 2000]


# A signal that comes as a job forks is an exception in `_after_fork`, where its handler raises one; that is no fault of ours.
WARNING = re.compile(r"(?m)^Exception ignored in(?!: <function _after_fork )|\b(Bytes|Deprecation|Encoding|Future|Import|Resource|Runtime|Syntax|Unicode)Warning: ")


class Result:
    """What a finished command left: `stdout`, `stderr`, `returncode`."""

    def __init__(self, args, returncode, stdout, stderr):
        self.args, self.returncode, self.stdout, self.stderr = args, returncode, stdout, stderr

    def __repr__(self):
        return "%s\n-> exit %d\n--- stdout\n%s\n--- stderr\n%s" % (
            " ".join(shlex.quote(a) for a in self.args), self.returncode, self.stdout, self.stderr)

    @property
    def lines(self):
        return self.stdout.splitlines()


def run(args, cwd, stdin=None, check=True, env=None, timeout_s=120):
    """Return the Result of a command; AssertionError with its output where `check` and it failed.

    `stdin` is text, or None for nothing there."""
    args = [str(a) for a in args]
    process = subprocess.Popen(args, cwd=str(cwd), env=clean_env(env), universal_newlines=True,
                               stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end_group(process)
        stdout, stderr = process.communicate()
        raise AssertionError("not done within %s s: %r" % (timeout_s, Result(args, -9, stdout, stderr)))
    result = Result(args, process.returncode, stdout, stderr)
    check_no_warning(stderr)
    if check and result.returncode:
        raise AssertionError(repr(result))
    return result


def install(source, venv, env):
    """Install the package in `source` into a new environment, by this Python's pip: a pip of its own takes as long again."""
    run([sys.executable, "-m", "venv", "--without-pip", venv], source)
    run([sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet", "."], source, env=env, timeout_s=300)


def run_cli(args, cwd, stdin=None, check=True, python=sys.executable, env=None, timeout_s=120):
    """Return the Result of `python -m labtasker ARGS` in the folder `cwd`."""
    return run([python, "-m", "labtasker"] + list(args), cwd, stdin, check, env, timeout_s)


def start(args, cwd, log, env=None):
    """Return the Popen of a command, in a process group of its own, that writes all its output to the file `log`."""
    with open(str(log), "ab") as out:
        return subprocess.Popen([str(a) for a in args], cwd=str(cwd), env=clean_env(env), stdin=subprocess.DEVNULL,
                                stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def start_cli(args, cwd, log, env=None, python=sys.executable):
    """Return the Popen of `python -m labtasker ARGS`; `log` takes its output. End it with `end_group`."""
    return start([python, "-m", "labtasker"] + list(args), cwd, log, env)


def end_group(process):
    """Kill the process and what it started, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def can_unshare():
    """Return whether a process can be the first one of a pid namespace here."""
    try:
        return subprocess.call(["unshare", "--pid", "--fork", "--mount-proc", "true"], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def http(method, url, body=None, auth=None, headers=None, timeout_s=30):
    """Return (status, decoded JSON or None, headers) of one plain request; `auth` is (queue, password)."""
    import base64
    request = urllib.request.Request(url, method=method, data=None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    if auth:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(auth).encode()).decode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        answer = opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        content = answer.read()
        return answer.getcode(), json.loads(content.decode()) if content else None, answer.headers


class Server:
    """A server of its own on a free port: `url`, `env`, `folder`; a context that ends with `stop`."""

    def __init__(self, folder, queue=QUEUE, password=PASSWORD, args=(), python=sys.executable):
        self.folder = pathlib.Path(str(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal, self.log = self.folder / "journal.jsonl", self.folder / "server.log"
        self.queue, self.password, self.args, self.python = queue, password, list(args), python
        self.process = self.url = None
        self.start()
        if queue:
            status, answer, _ = self.http("POST", "/api/v1/queues", {"queue_name": queue, "password": password})
            assert status == 201, answer

    def start(self, port=0):
        """Start it, also again on the same store; return once it listens."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        self.process = start_cli(["serve", "--host", "127.0.0.1", "--port", str(port), "--db-path", self.journal]
                                 + self.args, self.folder, self.log, python=self.python)
        text = wait_until(lambda: re.search(r"listening on (https?://[\w.]+:\d+)", self.output(begin)),
                          "the server listens", 120, never=lambda _: self.ended(begin))
        self.url = text.group(1)

    def ended(self, begin):
        assert self.process.poll() is None, "the server ended:\n" + self.output(begin)

    def output(self, begin=0):
        return self.log.read_bytes()[begin:].decode("utf-8", "replace")

    @property
    def env(self):
        return {"LABTASKER_URL": self.url, "LABTASKER_QUEUE": self.queue, "LABTASKER_PASSWORD": self.password}

    def http(self, method, path, body=None, headers=None):
        """Return (status, JSON, headers) of a request as the server's queue."""
        return http(method, self.url + path, body, (self.queue, self.password) if self.queue else None, headers)

    def stop(self, timeout_s=20):
        """End it as a person would (SIGTERM) and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError("the server does not stop:\n" + self.output()) from None
        finally:
            self.kill()

    def kill(self):
        """End it as a crash would."""
        end_group(self.process)
        check_no_warning(self.output())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class FarAway:
    """A TCP proxy before a Server, which seems so many seconds away: each piece of an answer comes so much later. `url`.

    `hold()` keeps all answers back until `let_go()`, or until they are lost by `lose()`, with the connections. It goes
    where the server is at the time. `asked` are the beginnings of the requests that went through; `refused` counts the
    connections that found no server."""

    def __init__(self, server, delay_s=0.0):
        self.server, self.delay_s, self.may_pass = server, delay_s, threading.Event()
        self.losses, self.asked, self.refused = 0, [], 0
        self.let_go()
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = "http://127.0.0.1:%d" % self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def hold(self):
        self.may_pass.clear()

    def let_go(self):
        self.may_pass.set()

    def lose(self):
        self.losses += 1
        self.let_go()

    def accept(self):
        while True:
            try:
                near = self.listening.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", int(self.server.url.rpartition(":")[2])))
            except OSError:
                self.refused += 1
                near.close()
                continue
            threading.Thread(target=self.carry, args=(near, far), daemon=True).start()

    def carry(self, near, far):
        with near, far:
            answers = threading.Thread(target=self.pump, args=(far, near, True), daemon=True)
            answers.start()
            self.pump(near, far, False)
            answers.join()

    def pump(self, source, sink, is_answer):
        try:
            data = True
            while data:
                data, losses = source.recv(1 << 16), self.losses
                if is_answer:
                    threading.Event().wait(self.delay_s)
                    self.may_pass.wait()
                if losses != self.losses:
                    break
                self.asked += [data[:150]] if not is_answer else []
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.let_go()
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()


class Place:
    """A working folder `cwd` with a store behind it: embedded, or on `server`. The same calls for both.

    `env` is what subprocesses get on top of `clean_env`; `folder` is where the journal lies. With `delay_s` the server
    seems to be so far away: `proxy`, at `url`, is what stands between."""

    def __init__(self, cwd, server=None, delay_s=0.0):
        self.cwd, self.server = pathlib.Path(str(cwd)), server
        self.proxy = FarAway(server, delay_s) if delay_s else None
        self.kind = "server" if server else "embedded"
        self.folder = server.folder if server else self.cwd / ".labtasker"
        self.url = self.proxy.url if self.proxy else server.url if server else None
        self.env = dict(server.env, LABTASKER_URL=self.url) if server else {}
        self.started = []

    def cli(self, *args, **options):
        """Return the Result of the command line with these arguments; options as for `run_cli`."""
        return run_cli(args, self.cwd, env=self._env(options), **options)

    def python(self, text, *args, **options):
        """Return the Result of a script with this text."""
        return run([sys.executable, self.write("script-%d.py" % len(os.listdir(str(self.cwd))), text)] + list(args),
                   self.cwd, env=self._env(options), **options)

    def bash(self, text, **options):
        """Return the Result of bash with this text, with `labtasker`, `lt` and this `python` on its PATH."""
        env = self._env(options)
        env["PATH"] = self.path()
        return run(["bash", "-e", "-o", "pipefail", "-c", text], self.cwd, env=env, **options)

    def start_cli(self, *args, **options):
        """Return the Popen of the command line; its output is in the file `.log_path`; ended with the test."""
        return self.start(sys.executable, "-m", "labtasker", *args, **options)

    def start(self, *args, **options):
        """Return the Popen of any command, as `start_cli` does."""
        log = self.cwd / ("started-%d.log" % len(self.started))
        process = start(args, self.cwd, log, self._env(options))
        process.log_path = log
        self.started.append(process)
        return process

    def _env(self, options):
        return dict(self.env, **(options.pop("env", None) or {}))

    def write(self, name, text):
        """Return the path of a new file in the working folder."""
        path = self.cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def bin(self):
        """Return the folder with the commands that an installation has, made on first use."""
        folder = self.cwd.parent / (self.cwd.name + "-bin")
        if not folder.exists():
            folder.mkdir()
            for name, line in COMMANDS.items():
                path = folder / name
                path.write_text("#!/bin/sh\nexec %s \"$@\"\n" % line)
                path.chmod(0o755)
        return folder

    def path(self):
        """Return a PATH on which an installation's commands and this Python are found first."""
        return "%s:%s" % (self.bin(), os.environ["PATH"])

    def tasks(self, *args):
        """Return the tasks that `task ls ARGS` finds, oldest first, as dicts."""
        args = list(args) if "-S" in args else list(args) + ["-S", "created_at:asc"]
        result = self.cli("task", "ls", "--fmt", "jsonl", "--no-pager", "--limit", "10000", *args)
        return [json.loads(line) for line in result.lines]

    def task(self, task_id):
        """Return the one task with this id as a dict."""
        found = self.tasks("--id", task_id)
        assert len(found) == 1, found
        return found[0]

    def submit(self, *args):
        """Return the id of a task submitted with these arguments of `task submit`."""
        return self.cli("task", "submit", "--quiet", *args).stdout.strip()

    def close(self):
        """End what was started here, then the server."""
        for process in self.started:
            end_group(process)
        if self.proxy:
            self.proxy.close()
        if self.server:
            self.server.stop()
        for path in list(self.cwd.glob("started-*.log")) + [self.folder / "server.log"]:
            if path.exists():
                check_no_warning(path.read_text(encoding="utf-8", errors="replace"))


_PYTHON = shlex.quote(sys.executable)
_LABTASKER = "%s -m labtasker" % _PYTHON
COMMANDS = {"labtasker": _LABTASKER, "lt": _LABTASKER, "labtasker-server": _LABTASKER,
            "python": _PYTHON, "python3": _PYTHON}


def check_store(folder):
    """Replay the journal in `folder`; what comes of it must be what a living server of that folder says."""
    path = pathlib.Path(str(folder)) / "journal.jsonl"
    if not path.exists():
        return
    import labtasker
    content = path.read_bytes()
    assert content.endswith(b"\n"), "%s ends in the middle of a line: %r" % (path, content[-80:])
    found = labtasker.Survey(str(path))
    assert not found.bad and not found.lost, (found.bad, found.lost)
    told = labtasker.read_server_file(str(folder)) or {"addresses": ()}
    for url in told["addresses"]:
        compare_with_server(path, url, told["key"])


def replayed(path):
    """Return {queue name: {task id: task as a dict}} of a journal, read without its lock."""
    import labtasker
    state, source = labtasker.State(), labtasker.JournalFile(str(path), mode=os.O_RDONLY)
    source.open()
    for line in source.read_new():
        if "changes" in line:
            state.apply(line["queue"], line["changes"])
    return {queue.record.queue_name: {key: labtasker.in_json(task, True) for key, task in queue.tasks.items()}
            for queue in state.queues.values()}


def compare_with_server(path, url, key):
    """The server's memory must be what its journal gives, but for heartbeats, which are not written."""
    while True:  # until nothing is written in between: what was under way may still end, a run be given up
        size, queues = path.stat().st_size, replayed(path)
        try:
            shown = {name: tasks_of(url, name, key) for name in queues}
        except urllib.error.URLError:  # it is gone, killed by a test
            return
        if path.stat().st_size == size:
            break
    for tasks in list(shown.values()) + list(queues.values()):
        for task in tasks.values():
            task.pop("last_heartbeat")
    assert json.dumps(shown) == json.dumps(queues), "memory and journal differ"  # text, in which NaN equals NaN


def tasks_of(url, name, key):
    """Return {task id: task as a dict} of a server's queue."""
    status, answer, _ = http("POST", url + "/api/v1/queues/me/tasks/search", {"limit": 10 ** 9}, (name, key),
                             {"Labtasker-Extensions": "1"})
    assert status == 200, answer
    return {task["task_id"]: task for task in answer["content"]}
