"""`pip install .` gives the three commands, one version, no dependency but those of an extra that is asked for."""
import json
import re
import shutil

import pytest

import labtasker
from harness import OTHERS, ROOT, install, run


def copy_sources(folder):
    """Copy what an installation needs: a build in the checkout would leave folders there."""
    folder.mkdir()
    for name in ("labtasker.py", "labtasker_cli.py", "setup.cfg", "pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(str(ROOT / name), str(folder))
    shutil.copytree(str(ROOT / "labtasker-stubs"), str(folder / "labtasker-stubs"))


@pytest.mark.slow
def test_install_gives_three_commands_one_module_and_nothing_else(tmp_path, home):
    source, bin_folder, env = tmp_path / "source", tmp_path / "venv" / "bin", {"PYTHONPATH": ""}
    copy_sources(source)
    install(source, bin_folder.parent, dict(env, **OTHERS))

    for name in ("labtasker", "lt"):
        assert labtasker.__version__ in run([bin_folder / name, "--version"], home.cwd, env=env).stdout
    assert "--port" in run([bin_folder / "labtasker-server", "serve", "--help"], home.cwd, env=env).stdout
    skill = (ROOT / "skills" / "labtasker" / "SKILL.md").read_text(encoding="utf-8")
    assert run([bin_folder / "labtasker", "help", "skill"], home.cwd, env=env).stdout == skill
    run([bin_folder / "labtasker", "task", "submit", "--", "--lr=0.1"], home.cwd, env=env)
    assert [t["args"] for t in home.tasks()] == [{"lr": 0.1}]
    shown = run([bin_folder / "python", "-c", """
import importlib.metadata as metadata
print(metadata.version("labtasker"), metadata.requires("labtasker"))
import labtasker
from labtasker.api_models import TaskUpdateRequest
print(labtasker.__version__)
"""], home.cwd, env=env).lines
    wanted, version = shown
    assert wanted.startswith(labtasker.__version__ + " ['typing_extensions") and wanted.count("extra == ") == 1, wanted
    assert version == labtasker.__version__


def test_the_version_is_written_in_one_place():
    found = [name for name in ("labtasker.py", "labtasker_cli.py", "setup.cfg", "pyproject.toml", "tox.ini")
             if (ROOT / name).exists() and '"%s"' % labtasker.__version__ in (ROOT / name).read_text()]
    assert found == ["labtasker.py"]


def test_what_else_names_the_version_and_the_oldest_python_agrees():
    """uv reads the oldest Python of a script in its head."""
    changes = (ROOT / "CHANGES.rst").read_text(encoding="utf-8")
    assert re.search(r"^(\S+) \(.*\)\n-+\n", changes, re.M).group(1) == labtasker.__version__
    assert json.loads((ROOT / ".claude-plugin" / "plugin.json").read_text())["version"] == labtasker.__version__
    head = re.search(r"(?m)^# /// script$\s((?:^#(?: .*)?$\s)+?)^# ///$", (ROOT / "labtasker.py").read_text(encoding="utf-8")).group(1)
    oldest = re.search(r"^python_requires = (.*)$", (ROOT / "setup.cfg").read_text(), re.M).group(1)
    assert head == '# requires-python = "%s"\n' % oldest
