"""`pip install .` gives the three commands, one version, no dependency."""
import shutil
import sys

import pytest

import labtasker
from harness import ROOT, run


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the bin folder of a fresh environment with the checkout installed."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in ("labtasker.py", "labtasker_cli.py", "setup.cfg", "pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(str(ROOT / name), str(source))
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    run([folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "."], source, env={"PYTHONPATH": ""})
    return folder / "venv" / "bin"


@pytest.mark.slow
def test_install_gives_three_commands(installed, home):
    env = {"PYTHONPATH": ""}
    for name in ("labtasker", "lt"):
        assert labtasker.__version__ in run([installed / name, "--version"], home.cwd, env=env).stdout
    assert "--port" in run([installed / "labtasker-server", "serve", "--help"], home.cwd, env=env).stdout
    run([installed / "labtasker", "task", "submit", "--", "--lr=0.1"], home.cwd, env=env)
    assert [t["args"] for t in home.tasks()] == [{"lr": 0.1}]


@pytest.mark.slow
def test_install_brings_the_module_and_nothing_else(installed, home):
    shown = run([installed / "python", "-c", """
import importlib.metadata as metadata
print(metadata.version("labtasker"), metadata.requires("labtasker"))
import labtasker
from labtasker.api_models import TaskUpdateRequest
print(labtasker.__version__)
"""], home.cwd, env={"PYTHONPATH": ""}).lines
    assert shown == ["%s None" % labtasker.__version__, labtasker.__version__]


def test_the_version_is_written_in_one_place():
    found = [name for name in ("labtasker.py", "labtasker_cli.py", "setup.cfg", "pyproject.toml", "tox.ini")
             if (ROOT / name).exists() and '"%s"' % labtasker.__version__ in (ROOT / name).read_text()]
    assert found == ["labtasker.py"]
