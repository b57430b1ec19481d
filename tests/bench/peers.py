"""Our server and those it is measured against, each started in an empty folder. A peer that can't be had here raises
Missing with the reason."""
import functools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import clients

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # for `import labtasker` in client processes
PEERS = os.environ.get("LT_BENCH_PEERS") or os.path.join(tempfile.gettempdir(), "labtasker-bench-peers")
LOGIN = ("bench", "secret")
SIZES = {
    "rounds": 5,
    "settings": 200, "seeds": 10,  # of the sweeps that rules stop early
    "workers": 1000, "report_s": 60, "curves": 50,  # that report once a second, for so long; of 1,000 points each
    "seconds": 1.0,  # that clients submit for, in a round
    "tasks": {"First": (500, 1), "Second": (1000, 2)},  # of a slow peer: so many in all, rounds
    "batch": 25,  # requests of 1,000 tasks, by each of 4 clients
    "many": 1000000, "few": 1000,  # pending tasks
    "wide": 100000, "owners": 10000, "points": 1000,  # shapes of args; filters; points of each of 1,000 curves
    "cycles": 200,  # of submit, fetch and report, in a round
    "lines": 100000,  # of a journal that is opened; tasks in a store without a server
    "starts": 30,  # of each command
    "runs": 500,  # of jobs that do nothing, in a round
    "jobs": 5, "printed": 300000,  # jobs that print, of each kind, and their lines
    "idle_s": 60.0,
}
QUICK = {"rounds": 1, "settings": 20, "seeds": 2, "workers": 20, "report_s": 2, "curves": 2,
         "seconds": 0.1, "tasks": {"First": (8, 1), "Second": (8, 1)}, "batch": 1, "many": 4000,
         "few": 1000, "wide": 2000, "owners": 1000, "points": 2, "cycles": 4, "lines": 400, "starts": 2, "runs": 8, "jobs": 1,
         "printed": 2000, "idle_s": 1.0}


class Missing(Exception):
    """A peer that is not here; why."""


def environment(**more):
    """Return the environment of what is measured: no settings, and bytecode is kept."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith("LABTASKER_") and name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    return dict(kept, **more)


class Workshop:
    """The folder that everything is measured in, and the servers that several rows share; both are gone at the end."""

    folder, servers = None, []

    def __enter__(self):
        Workshop.folder = tempfile.mkdtemp(prefix="labtasker-bench-")
        return self

    def __exit__(self, *_):
        while self.servers:
            self.servers.pop().stop()
        shutil.rmtree(self.folder)

    @classmethod
    def place(cls):
        """Return the path of a new folder."""
        return tempfile.mkdtemp(dir=cls.folder)

    @classmethod
    def keep(cls, server):
        """Return a server that is ended with the workshop."""
        cls.servers.append(server)
        return server


class Peer:
    """A running server; a context that ends it. `startup_s` is how long it took until it listened."""

    login = None  # of a v1 server
    submitting, fetching = clients.submit, clients.pairs

    def __init__(self, folder=None):
        self.folder = folder or Workshop.place()
        os.makedirs(self.folder, exist_ok=True)
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.env = environment()
        words, log = self.words(), os.path.join(self.folder, "log")
        begin = time.perf_counter()
        with open(log, "ab") as out:
            self.process = subprocess.Popen(words, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                                            stdout=out, stderr=out)
        self.pid = self.process.pid
        while not self.listens():
            if self.process.poll() is not None or time.perf_counter() > begin + 120:
                self.stop()
                with open(log, errors="replace") as text:
                    raise AssertionError("%s did not start:\n%s" % (words, text.read()[-2000:]))
            time.sleep(0.005)
        self.startup_s = time.perf_counter() - begin
        self.prepare()

    def listens(self):
        """Return whether it takes connections."""
        try:
            clients.connect(self.port).close()
            return True
        except OSError:
            return False

    def prepare(self):
        """Make what the clients need."""
        if self.login:
            queue = dict(zip(("queue_name", "password"), self.login))
            clients.Http(self.port).call("POST", "/api/v1/queues", queue, 201)

    def submit(self, count, tasks=clients.FOREVER, seconds=clients.FOREVER):
        """Return the Load of so many clients that submit so many tasks each, or for so long."""
        return clients.together(type(self).submitting, count, self.port, self.login, tasks, seconds)

    def pairs(self, count):
        """Return the Load of so many clients that fetch and report until nothing is left."""
        return clients.together(type(self).fetching, count, self.port, self.login)

    def stop(self):
        """End it as a person would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Ours(Peer):
    """Labtasker as a user starts it; `more` options of `serve`."""

    login = LOGIN

    def words(self):
        self.env["PYTHONPATH"] = str(ROOT)
        return [sys.executable, "-m", "labtasker", "serve", "--port", str(self.port), "--db-path", self.journal]

    @property
    def journal(self):
        """The path of its journal."""
        return os.path.join(self.folder, "journal.jsonl")

    def prepare(self):
        """Make the queue, unless it is there since an earlier start."""
        http = clients.Http(self.port, self.login)
        if http.ask(http.request("GET", clients.ME))[0] == 401:
            super().prepare()

    def http(self):
        """Return a connection as the queue's user."""
        return clients.Http(self.port, self.login)

    def memory_bytes(self):
        """Return what it holds in memory now."""
        with open("/proc/%d/statm" % self.pid) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self):
        """Return the CPU-seconds that it has spent, to the nanosecond."""
        return time.clock_gettime(~self.pid << 3 | 2)  # Linux's number of the clock of a process


class Beanstalkd(Peer):
    """beanstalkd with a binlog that is synced before every answer."""

    submitting, fetching = clients.submit_beanstalk, clients.pairs_beanstalk

    def words(self):
        program = shutil.which("beanstalkd")
        if not program:
            raise Missing("no beanstalkd on the PATH")
        return [program, "-l", "127.0.0.1", "-p", str(self.port), "-b", self.folder, "-f0"]


@functools.lru_cache(None)
def installed(version, package="labtasker"):
    """Return the folder of the commands of a package from PyPI, installed at the first use, or raise Missing."""
    folder = os.path.join(PEERS, "%s-%s" % (package, version))
    done = os.path.join(folder, "installed")
    if not os.path.exists(done):
        python = os.path.join(folder, "bin", "python")
        try:
            for words in ([sys.executable, "-m", "venv", "--clear", folder],
                          [python, "-m", "pip", "install", "--quiet", "%s==%s" % (package, version)]):
                subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, env=environment())
        except (OSError, subprocess.CalledProcessError) as error:
            told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise Missing("%s %s can't be installed: %s" % (package, version, told[-1])) from None
        open(done, "w").close()
    return os.path.join(folder, "bin")


class First(Peer):
    """Labtasker 1.0.1 on its embedded database."""

    login = LOGIN

    def words(self):
        return [os.path.join(installed("1.0.1"), "labtasker-server"), "serve", "--host", "127.0.0.1",
                "--port", str(self.port), "--db-path", os.path.join(self.folder, "db.json")]


class Second(Peer):
    """Labtasker 2.8.0 on SQLite."""

    submitting, fetching = clients.submit_v2, clients.pairs_v2

    def words(self):
        return [os.path.join(installed("2.8.0"), "labtasker-server"), "serve", "--connection", "http",
                "--host", "127.0.0.1", "--port", str(self.port), "--labtasker-root", self.folder,
                "--database", os.path.join(self.folder, "server.db")]

    def prepare(self):
        http = clients.Http(self.port)
        status, answer = http.ask(http.request("PUT", clients.QUEUE_2))
        assert status in (200, 201), (status, answer)
