"""Small faults put into labtasker.py, one at a time: does a test see each? `tox -e mutants`.

`python tests/mutants.py [COUNT [SEED [SECTION ...]]]`: COUNT faults, drawn by SEED from the sections' functions. First the sections' quick
tests run without a fault, and what each calls is noted. Then each fault gets a process, forked from this one, in which the tests
run that call its function, the quickest first. A fault that no test sees is printed with its line, for a person to read: a test has to
kill it, or it changes nothing and gets a row in EQUIVALENT.
"""
import ast
import collections
import contextlib
import gc
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time

import hypothesis  # noqa: F401  what the tests import is imported once, before the forks
import pytest
from harness import wait_until

ROOT = pathlib.Path(__file__).resolve().parent.parent
BANNER = re.compile(r"^# \d+\. (\w[\w ]*?) #+$", re.M)
SECTIONS = ("Values", "Filters", "Model", "Journal", "State", "Operations", "Store")
FILES = ("after api cli client curves dates events failures filters journal logs loop metrics model owner packs pipeline required security"
         " server service sweep table template terminal values").split()  # whose quick tests are to see the faults
EQUIVALENT = {  # (the source's line, what was there -> what is there now): why no test can see it
    ('line = text[start:].split("\\n", 1)[0]', "1 -> 2"): "only the first part is used",
    ("left = max(0, column - start - 60)", "60 -> 61"): "how much of a long line is shown before the caret is no rule",
    ("last = (first + datetime.timedelta(days=31)).replace(day=1) - datetime.timedelta(days=1)", "31 -> 32"):
        "both days are in the next month",
    ('raise LabtaskerRuntimeError("%s failed: %s" % (function, problem.strip()[-500:]))', "500 -> 501"):
        "how much of a long text is shown is no rule",
    ("self.taking.keep(required, heaps, _weight_bytes(required) + 8 * len(heaps))", "8 -> 9"): "the weight is an estimate",
    ("_PLAIN_KEYS.add(key)", "_PLAIN_KEYS.add(key) -> pass"): "a key that is not remembered is looked at again",
    ('if len(text) == 32 and text[4] + text[7] + text[10] + text[26:] == "--T+00:00" and _from_own_text:', "7 -> 8"):
        "the slower way gives the same time",
    ("if self.logged > _MAX_LOG // 2:", "self.logged > _MAX_LOG // 2 -> self.logged >= _MAX_LOG // 2"):
        "how much is dropped beyond what has to be is no rule",
    ("self.forget(lambda standing: standing.cursor < standing.log.start)",
     "standing.cursor < standing.log.start -> standing.cursor <= standing.log.start"): "what is dropped is made again",
    ("standing.purge_at = 100 + 3 * len(standing.heap)", "3 -> 4"): "how often is looked for what may go is no rule",
    ("return list(heapq.merge(*parts, key=key, reverse=reverse)) if len(parts) > 1 else parts[0] if parts else []",
     "len(parts) > 1 -> len(parts) >= 1"): "a single part is merged with no other",
    ("return sum(map(len, texts)) + 100 * len(texts) + 100",
     "sum(map(len, texts)) + 100 * len(texts) + 100 -> sum(map(len, texts)) + 100 * len(texts) - 100"): "the weight is an estimate",
    ("elif task.task_timeout is not None and ran_s > task.task_timeout:",
     "ran_s > task.task_timeout -> ran_s >= task.task_timeout"): "an instant more or less is no rule",
    ("return key.isdecimal() and len(key) < 10 and int(key) < len(array)", "len(key) < 10 -> len(key) <= 10"):
        "no array is so long",
    ("row.append((1, 1, True, []))", "True -> False"): "it has one round, which ends in one place",
    ("self.most_bytes, self.held_bytes = most_bytes, 0", "0 -> 1"): "the weight is an estimate",
    ('fields["not_before"] = Instant(round(at + min(delay_s, _MAX_RETRY_DELAY_S), 6))', "6 -> 7"): "times are shown to a microsecond",
    ("direction < 0)", "direction < 0 -> direction <= 0"): "a direction is 1 or -1",
    ("encode({}, 0)", "0 -> 1"): "it only shows whether the encoder can be called",
    ("self.named = 0  # the inode of which it is known that its name in the folder is on disk", "0 -> 1"): "no plain file has this inode",
    ('if self.size < self.header.get("tail", 0) or last_durable(self.bytes(self.size, end)) >= bad_n:', "0 -> 1"):
        "the header is longer than 1 byte",
    ("if monotonic() - checked_at > _CHECK_HOLDS_S:",
     "monotonic() - checked_at > _CHECK_HOLDS_S -> monotonic() - checked_at >= _CHECK_HOLDS_S"): "the limit is no exact one",
    ("self.state, self.version_seen, self.epoch_seen = State(), None, 0", "0 -> 1"): "the first epoch is 1",
    ("self.reads_only = False  # whether the file is open for reading only", "False -> True"): "opening the file sets it",
    ("for tail in range(body, body + 1000):  # `tail` includes the header, whose length depends on the digits of `tail`", "1000 -> 1001"):
        "a header is shorter",
    ("time.sleep(pause_s)", "time.sleep(pause_s) -> pass"): "who waits without a pause only works more",
    ("gc.disable()", "gc.disable() -> pass"): "it only saves time",
    ('is_synced, data = False, b""', "False -> True"): "it is set before it is used",
    ("table, begin = form and len(some) > 1 and _table_of(some), some[0].created_at", "1 -> 2"):
        "two tasks are read the same from a table and from changes of their own",
    ("found = sum(len(dump_json(change)) for change, _ in changes) + sum(20 + _curve_bytes(task.curve) for task in sample)", "20 -> 21"):
        "the length is an estimate",
}
TESTS_S = 30  # so long may the tests take that are run for a fault
LIMIT_S = 180  # a fault that makes them run longer is seen
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


def faults_of(node):
    """Return functions that each put one fault into a node of this kind."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        return [lambda n: setattr(n, "ops", [COMPARED[type(n.ops[0])]()])]
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not isinstance(node.left, ast.Constant):
        return [lambda n: setattr(n, "op", COMPUTED[type(n.op)]())]
    if isinstance(node, ast.BoolOp):
        return [lambda n: setattr(n, "op", ast.And() if isinstance(n.op, ast.Or) else ast.Or()),
                lambda n: setattr(n, "values", n.values[:-1])]
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        return [lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))]
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        return [lambda n: setattr(n, "value", not n.value if type(n.value) is bool else n.value + 1)]
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        return [lambda n: setattr(n, "value", ast.Constant(None))]
    if isinstance(node, (ast.Expr, ast.AugAssign)) and isinstance(getattr(node, "value", None), (ast.Call, ast.Constant)) \
            and not isinstance(getattr(node.value, "value", None), str):
        return [None]  # the statement is left out
    return []


class Source:
    """labtasker.py's tree: where faults can be put, and the module with one of them."""

    def __init__(self, path):
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)
        self.nodes = list(ast.walk(self.tree))
        self.sections = [(self.text.count("\n", 0, m.start()) + 1, m.group(1)) for m in BANNER.finditer(self.text)]
        self.functions = {}  # id of a node: the first lines of the functions around it, the innermost last
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno] + [one.lineno for one in node.decorator_list])
                for statement in node.body:
                    for one in ast.walk(statement):
                        self.functions.setdefault(id(one), []).append(first)

    def places(self, sections):
        """Return [(section, number of the node, number of its fault)]."""
        found = []
        for number, node in enumerate(self.nodes):
            if id(node) in self.functions and hasattr(node, "lineno"):
                section = [name for line, name in self.sections if line <= node.lineno][-1:]
                if section and section[0] in sections:
                    found += [(section[0], number, k) for k in range(len(faults_of(node)))]
        return found

    def put(self, number, k):
        """Put a fault into the tree; return (line, what was there, what is there now)."""
        node, before = self.nodes[number], ast.unparse(self.nodes[number])
        change = faults_of(node)[k]
        if change:
            change(node)
            after = ast.unparse(node)
        else:
            after = "pass"
            for parent in self.nodes:
                for field in ("body", "orelse", "finalbody"):
                    body = getattr(parent, field, None)
                    if isinstance(body, list) and node in body:
                        body[body.index(node)] = ast.copy_location(ast.Pass(), node)
        ast.fix_missing_locations(self.tree)
        return node.lineno, before.split("\n")[0][:110], after.split("\n")[0][:110]

    def load(self):
        """Import the tree as it is now as `labtasker`."""
        spec = importlib.util.spec_from_file_location("labtasker", str(self.path))
        module = sys.modules["labtasker"] = importlib.util.module_from_spec(spec)
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


class Noted:
    """A plugin: what each test calls of labtasker.py, as the first lines of functions, and how long it takes."""

    def __init__(self, path):
        self.path, self.calls, self.took_s, self.failed = str(path), {}, {}, []

    @contextlib.contextmanager
    def noting(self):
        """A context that yields the set of the lines, which grows as functions are called."""
        called, path = set(), self.path

        def trace(frame, event, arg):
            if frame.f_code.co_filename == path:
                called.add(frame.f_code.co_firstlineno)
        threading.settrace(trace)
        sys.settrace(trace)
        try:
            yield called
        finally:
            sys.settrace(None)
            threading.settrace(None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        started = time.monotonic()
        with self.noting() as called:
            yield
        self.calls[item.nodeid], self.took_s[item.nodeid] = sorted(called), time.monotonic() - started

    def pytest_runtest_logreport(self, report):
        self.failed += [report.nodeid] if report.failed else []


class Chosen:
    """A plugin: of the collected tests, those named run, in the order of the names."""

    def __init__(self, names):
        self.place = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid])


def pytest_main(folder, files, plugin, *words):
    return pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--basetemp", str(folder / "tests"),
                        "-W", "ignore:Module already imported"]  # hypothesis, above
                       + list(words) + ["tests/test_%s.py" % name for name in files], plugins=[plugin])


def note(source, folder, name):
    """Return {"calls": {test: lines}, "took_s": {test: seconds}, "failed": [test]} of a file's tests without a fault.

    A test that is run by itself makes the calls that importing makes too."""
    plugin = Noted(source.path)
    with plugin.noting() as imported:
        source.load()
    pytest_main(folder, [name], plugin)
    return {"calls": plugin.calls, "imported": sorted(imported), "took_s": plugin.took_s, "failed": plugin.failed}


def file_of(name):
    """Return the name of a test's file as FILES has it."""
    return re.match(r"tests/test_(\w+)", name).group(1)


def chosen_for(line, notes):
    """Return the names of the tests that call the function at this line, the quickest first."""
    names, left_s = [name for name, lines in notes["calls"].items() if line in lines or line in notes["imported"]], TESTS_S
    chosen = []
    for name in sorted(names, key=notes["took_s"].get):
        left_s -= notes["took_s"][name]
        chosen += [name] if left_s >= 0 or not chosen else []
    return chosen


def in_parts(names):
    """Return the tests of the two files that have most of them, as few files are collected soon, and the others."""
    most = {name for name, _ in collections.Counter(map(file_of, names)).most_common(2)}
    return [[name for name in names if (file_of(name) in most) is is_first] for is_first in (True, False)]


def try_fault(source, folder, place, notes):
    """Return {"line", "before", "after", "tests", "seen"}: whether one of so many tests fails with the fault."""
    _, number, k = place
    names = chosen_for(max(source.functions[id(source.nodes[number])]), notes)
    line, before, after = source.put(number, k)
    answer = {"line": line, "before": before, "after": after, "tests": len(names), "seen": False}
    try:
        source.load()
        answer["seen"] = any(pytest_main(folder, sorted(set(map(file_of, some))), Chosen(some), "-x") for some in in_parts(names) if some)
    except BaseException:
        answer["seen"] = True
    return answer


class Forks:
    """Functions run in forked processes, some at a time; each answers with JSON, or None where it died or did not end."""

    def __init__(self, folder, number):
        self.folder, self.number, self.running, self.started = folder, number, {}, 0

    def start(self, key, limit_s, function, *words):
        self.started += 1
        folder = self.folder / str(self.started)
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            try:
                answer = function(folder, *words)
                (folder / "answer").write_text(json.dumps(answer), encoding="utf-8")
            finally:
                os._exit(0)
        self.running[pid] = (key, folder, time.monotonic() + limit_s)

    def answers(self):
        """Yield (key, answer or None) of those that have ended or are past their limit; their groups are killed."""
        wait_until(lambda: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) or any(
            time.monotonic() > ends_at for _, _, ends_at in self.running.values()), "a fork ends", timeout_s=10 ** 6)
        for pid, (key, folder, ends_at) in list(self.running.items()):
            ended, _ = os.waitpid(pid, os.WNOHANG)
            if ended or time.monotonic() > ends_at:
                try:
                    os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                if not ended:
                    os.waitpid(pid, 0)
                del self.running[pid]
                answer = folder / "answer"
                yield key, json.loads(answer.read_text(encoding="utf-8")) if ended and answer.exists() else None
                shutil.rmtree(str(folder), ignore_errors=True)

    def map(self, jobs):
        """Yield (key, answer) for each job (key, limit in seconds, function, words...)."""
        jobs = collections.deque(jobs)
        while jobs or self.running:
            while jobs and len(self.running) < self.number:
                self.start(*jobs.popleft())
            yield from self.answers()


def noted(source, forks):
    """Return what `note` found for all FILES; SystemExit where a test fails without a fault."""
    notes = {"calls": {}, "took_s": {}}
    for name, answer in forks.map([(name, 10 * LIMIT_S, lambda folder, one: note(source, folder, one), name) for name in FILES]):
        if not answer or answer["failed"]:
            sys.exit("tests/test_%s.py fails without a fault: %s" % (name, answer and answer["failed"]))
        notes["calls"].update(answer["calls"])
        notes["took_s"].update(answer["took_s"])
        notes["imported"] = set(answer["imported"])
    return notes


def main(count="50", seed="1", *sections):
    sections = sections or SECTIONS
    source = Source(ROOT / "labtasker.py")
    drawn = source.places(sections)
    random.Random(int(seed)).shuffle(drawn)
    os.chdir(str(ROOT))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        forks = Forks(pathlib.Path(folder), max(2, os.cpu_count() or 1))
        notes = noted(source, forks)
        gc.freeze()
        jobs = [(place, LIMIT_S, lambda folder, one: try_fault(source, folder, one, notes), place) for place in drawn[:int(count)]]
        for number, ((section, node, k), answer) in enumerate(forks.map(jobs), 1):
            if answer is None:
                word, answer = "killed (no end)", dict(zip(("line", "before", "after"), source.put(node, k)), tests=0)
            else:
                word = "killed" if answer["seen"] else "SURVIVED"
            if (source.lines[answer["line"] - 1].strip(), "%(before)s -> %(after)s" % answer) in EQUIVALENT:
                word = "equivalent"
            counts[section, word.split()[0]] += 1
            print("%d %s %s:%d  %s  ->  %s  (%d tests)" % (
                number, word, section, answer["line"], answer["before"], answer["after"], answer["tests"]), flush=True)
    for section in sections:
        print("%s: %s" % (section, ", ".join("%d %s" % (n, word) for (where, word), n in sorted(counts.items()) if where == section)))


if __name__ == "__main__":
    main(*sys.argv[1:])
