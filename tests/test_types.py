"""The types of the public names: the stubs are those of the source, and mypy and pyright read users' scripts as they should."""
import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

import labtasker
import stubs
from harness import OTHERS, ROOT, TESTS, install, run
from test_install import copy_sources
from test_readme import PAGES, blocks

pytestmark = pytest.mark.skipif(sys.version_info < (3, 9), reason="the stubs are made with ast.unparse, which is there from 3.9")
TYPED = TESTS / "typed"
OPTUNA = """
class Trial:
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = ...) -> float: ...
    def report(self, value: float, step: int) -> None: ...
class Study:
    trials: list[object]
    best_value: float
    def ask(self) -> Trial: ...
    def tell(self, trial: Trial, value: float | None = ..., state: object = ...) -> object: ...
class _States:
    FAIL: object
    PRUNED: object
class trial:
    TrialState: _States
def create_study(*, direction: str) -> Study: ...
"""  # what docs/optuna.rst uses of it


def declared(name):
    """Return {attribute: its type as text} of a class in the stub."""
    tree = ast.parse((stubs.FOLDER / "__init__.pyi").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id: ast.unparse(node.annotation) for node in found.body if isinstance(node, ast.AnnAssign)}


def test_the_stubs_are_what_the_source_says():
    """If this fails: python3 tests/stubs.py"""
    assert {path.name: path.read_text(encoding="utf-8") for path in stubs.FOLDER.iterdir()} == stubs.stub_files()


TYPE_OF = {"id": "str", "name": "str", "text": "str", "stop": "str", "failure": "str", "commit": "str", "seconds": "float", "count": "int",
           "int": "int", "time": "datetime.datetime", "dict": "dict[str, Any]", "ids": "list[str]", "list": "list[dict[str, Any]]",
           "cmd": "_Command", "status": "_Status", "worker_status": "Literal['active', 'suspended', 'crashed']"}


@pytest.mark.parametrize("kind", [labtasker.Task, labtasker.Worker, labtasker.Queue], ids=lambda kind: kind.__name__)
def test_an_answer_has_its_fields_as_attributes_with_their_types(kind):
    """What a server need not give is None there."""
    types, tree = declared(kind.__name__), kind.FIELDS
    assert list(types) == list(tree)
    assert {name: text.replace(" | None", "") for name, text in types.items()} == {name: TYPE_OF[f.kind] for name, f in tree.items()}
    always = {name for name, text in types.items() if not text.endswith(" | None")}
    assert {name for name in tree if tree[name].extension} & always == set()
    answer = kind({name: field.default for name, field in tree.items()})
    assert always - {name for name, value in vars(answer).items() if value is not None} <= {
        "task_id", "worker_id", "queue_id", "queue_name", "status", "created_at", "last_modified"}


def test_the_fields_of_requests_are_those_that_a_type_checker_knows():
    submitted = {name for name, field in labtasker.SUBMITTED.items() if field.flag}
    assert set(declared("_Submission")) | set(declared("_Further")) == submitted
    assert set(declared("_Update")) == set(labtasker.TaskUpdateRequest.FIELDS) | {"_id", "task_id"}
    text = (stubs.FOLDER / "__init__.pyi").read_text(encoding="utf-8")
    assert "_Status = Literal[%s]" % ", ".join(map(repr, labtasker.TASK_STATES)) in text
    assert "Literal[%s]" % ", ".join(map(repr, labtasker.WORKER_STATES)) in text


# ---- The type checkers, over users' scripts

needs_checkers = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("mypy", "pyright"))), reason="needs mypy and pyright: tox -e types")


def mypy(folder, python, names):
    """Return {(file, line)} of mypy's errors in its strict mode."""
    words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder / ".cache", "--python-executable", python, "--no-error-summary",
             "--hide-error-context", "--no-pretty", "--no-color-output", "--show-error-codes"] + names
    shown = subprocess.run([str(word) for word in words], cwd=str(folder), stdout=subprocess.PIPE, universal_newlines=True, timeout=600,
                           env=dict(os.environ, **OTHERS)).stdout
    found = [line.split(":", 3) for line in shown.splitlines() if ": note: " not in line]
    return {(name, int(line)): text for name, line, _, text in found}


def pyright(folder, python, names):
    """Return {(file, line)} of pyright's errors in its strict mode; a warning is none."""
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "include": names}))
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python]
    shown = subprocess.run([str(word) for word in words], cwd=str(folder), stdout=subprocess.PIPE, universal_newlines=True, timeout=600,
                           env=dict(os.environ, **OTHERS)).stdout
    return {(entry["file"].rpartition("/")[2], entry["range"]["start"]["line"] + 1): entry["message"]
            for entry in json.loads(shown)["generalDiagnostics"] if entry["severity"] == "error"}


def write_scripts(folder):
    """Write the users' scripts and the Python blocks of the pages; return their names."""
    (folder / "optuna").mkdir()
    (folder / "optuna" / "__init__.pyi").write_text(OPTUNA)
    names = ["right.py", "wrong.py"]
    for name in names:
        shutil.copy(str(TYPED / name), str(folder))
    for page in PAGES:
        for language, name, text in blocks([page]):
            if language == "python" and name:
                names.append("%s_%s" % (page.rpartition("/")[2].replace(".rst", "").replace("-", "_"), name))
                (folder / names[-1]).write_text(text, encoding="utf-8")
    assert len(names) > 7
    return names


WRONG = {("wrong.py", number): None for number, line in enumerate((TYPED / "wrong.py").read_text().splitlines(), 1) if line.endswith("# wrong")}


@needs_checkers
@pytest.mark.slow
@pytest.mark.parametrize("check", [mypy, pyright], ids=["mypy", "pyright"])
def test_a_script_beside_the_copied_file_is_checked_and_the_file_is_not(tmp_path, check):
    """Both read the types of labtasker.py and have no complaint about it; it is too long to have pyright go through it here, so
    that its first lines alone, above text full of faults, show that."""
    for name in ("labtasker.py", "labtasker_cli.py"):
        shutil.copy(str(ROOT / name), str(tmp_path))
        head = (ROOT / name).read_text(encoding="utf-8").partition('"""')[0]
        (tmp_path / ("head_of_" + name)).write_text(head + '"""Faulty."""\ndef f(x):\n    return nowhere + 1 / "a" + x.y\n')
    (tmp_path / "faulty.py").write_text("1 / 'a'\n")
    names = write_scripts(tmp_path) + ["head_of_labtasker.py", "head_of_labtasker_cli.py", "faulty.py"]
    found = check(tmp_path, sys.executable, names + ["labtasker.py", "labtasker_cli.py"] * (check is mypy))
    assert {place: found[place] for place in found if place not in WRONG} == {("faulty.py", 1): found.get(("faulty.py", 1))}
    assert WRONG.keys() <= found.keys()
    shutil.copytree(str(ROOT / "labtasker-stubs"), str(tmp_path / "labtasker"))  # as docs/labtasker-1.rst says
    shutil.copy(str(TYPED / "models.py"), str(tmp_path))
    assert check(tmp_path, sys.executable, ["models.py"]) == {}
    run([sys.executable, "-c", "import labtasker, labtasker.api_models; labtasker.Required"], tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the Python of an environment in which a wheel of this project is installed."""
    folder = tmp_path_factory.mktemp("installed")
    copy_sources(folder / "source")
    install(folder / "source", folder / "venv", OTHERS)
    return folder / "venv" / "bin" / "python"


@needs_checkers
@pytest.mark.slow
@pytest.mark.parametrize("check", [mypy, pyright], ids=["mypy", "pyright"])
def test_a_script_of_who_installed_it_is_checked(tmp_path, check, installed):
    shutil.copy(str(TYPED / "models.py"), str(tmp_path))
    found = check(tmp_path, installed, write_scripts(tmp_path) + ["models.py"])
    assert {place: found[place] for place in found if place not in WRONG} == {}
    assert WRONG.keys() <= found.keys()
