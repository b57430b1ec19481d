"""Small faults put into labtasker.py, one at a time: does a test see each? `tox -e mutants`.

`python tests/mutants.py [COUNT [SEED [SECTION ...]]]`: COUNT faults, drawn by SEED from the sections' functions. The section's quick
tests run in a process of their own on a copy of the checkout. A fault that no test sees is printed with its line, for a
person to read: it is to be killed by a test, or it changes nothing.
"""
import ast
import copy
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BANNER = re.compile(r"^# \d+\. (\w[\w ]*?) #+$", re.M)
TESTS = {  # section: the files whose quick tests are to see its faults; the most telling first
    "Values": "test_values test_dates test_required test_filters",
    "Filters": "test_filters test_security",
    "Model": "test_model test_service test_api test_after",
    "Journal": "test_journal test_compaction test_faults",
    "State": "test_service test_after test_failures test_curves test_journal test_api",
    "Operations": "test_service test_api test_after test_failures test_curves test_table",
    "Store": "test_service test_journal test_compaction test_owner",
}
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



def places(source, sections):
    """Return [(section, number of the node in the order of ast.walk, number of its fault)]."""
    starts, found = [(source.count("\n", 0, m.start()) + 1, m.group(1)) for m in BANNER.finditer(source)], []
    in_functions = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            in_functions.update(id(one) for statement in node.body for one in ast.walk(statement))
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in in_functions and hasattr(node, "lineno"):
            section = [name for line, name in starts if line <= node.lineno][-1:]
            found += [(section[0], number, k) for k in range(len(faults_of(node))) if section and section[0] in sections]
    return found


def mutant(tree, number, k):
    """Return (source with the fault, line, what was there, what is there now)."""
    tree = copy.deepcopy(tree)
    nodes = list(ast.walk(tree))
    node = nodes[number]
    line, before, change = node.lineno, ast.unparse(node), faults_of(node)[k]
    if change:
        change(node)
        after = ast.unparse(node)
    else:
        after = "pass"
        for parent in nodes:
            for field in ("body", "orelse", "finalbody"):
                body = getattr(parent, field, None)
                if isinstance(body, list) and node in body:
                    body[body.index(node)] = ast.Pass()
    return ast.unparse(ast.fix_missing_locations(tree)), line, before.split("\n")[0][:110], after.split("\n")[0][:110]


def is_seen(folder, files, limit_s):
    """Return whether a test fails, or hangs, on the checkout's copy in the folder."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--no-header",
             "--basetemp", str(folder / "tmp")]
    process = subprocess.Popen(words + ["tests/%s.py" % name for name in files.split()], cwd=str(folder), env=dict(
        os.environ, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE=""), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(limit_s) != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
        process.wait()


def main(count="50", seed="1", *sections):
    source = (ROOT / "labtasker.py").read_text(encoding="utf-8")
    tree, sections = ast.parse(source), sections or tuple(TESTS)
    drawn = places(source, sections)
    random.Random(int(seed)).shuffle(drawn)
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder) / "checkout"
        shutil.copytree(str(ROOT), str(folder), ignore=shutil.ignore_patterns(".git", ".tox", "__pycache__"))
        (folder / "labtasker.py").write_text(ast.unparse(tree), encoding="utf-8")
        for section in sections:
            if is_seen(folder, TESTS[section], 900):
                sys.exit("the tests of %s fail without a fault" % section)
        for number, (section, node, k) in enumerate(drawn[:int(count)], 1):
            text, line, before, after = mutant(tree, node, k)
            (folder / "labtasker.py").write_text(text, encoding="utf-8")
            seen = is_seen(folder, TESTS[section], 300)
            survived += [] if seen else [line]
            print("%d %s %s:%d  %s  ->  %s" % (number, "killed" if seen else "SURVIVED", section, line, before, after), flush=True)
    print("%d of %d tried, %d killed, %d survived" % (min(int(count), len(drawn)), len(drawn), min(int(count), len(drawn)) - len(survived), len(survived)))


if __name__ == "__main__":
    main(*sys.argv[1:])
