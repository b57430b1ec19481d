"""README.rst and docs/*.rst: each page's commands are run, in order and in one empty folder, and must print what it says.

A `console` block has commands after `$` and their output; `...` on a line of its own stands for any lines. A `python`
block with a name is a file. `sh` and `yaml` blocks are not run. Ids, times and ports are the only things that may differ.
`python3 tests/test_readme.py [PAGE ...]` writes the outputs of today into the pages.
"""
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sys
import tempfile

import pytest

from harness import MODULE, ROOT, Place, run, wait_until

README = (ROOT / "README.rst").read_text(encoding="utf-8")
PAGES = ["README.rst"] + sorted("docs/" + path.name for path in (ROOT / "docs").glob("*.rst"))
BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n(?:    :name: (\S+)\n)?\n((?:    .*\n|\n)+)", re.M)
PORT = "9321"  # what the pages have; the tests take a free one


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(pages=PAGES):
    """Return [(language, name or None, text without indent)]."""
    return [(language, name or None, re.sub(r"^    ", "", text, flags=re.M).strip("\n") + "\n")
            for page in pages for language, name, text in BLOCK.findall(text_of(page))]


def commands(text):
    """Return [(command, expected output lines)] of a console block."""
    found = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found[-1][0].endswith("\\") and line.startswith("> "):
            found[-1] = (found[-1][0] + "\n" + line[2:], [])
        else:
            found[-1][1].append(line)
    return found


VARYING = [  # what may differ from run to run: what stands for it
    (r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", "<id>"),
    (r"\b[0-9a-f]{8}\b", "<id>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)?", "<time>"),
    (r"\b\d+(\.\d+)? ?(ms|s)\b", "<duration>"),
    (r"127\.0\.0\.1:\d+", "<address>"),
    (r"/[\w.-]+/\S+", "<path>"),
    (r"(attempt \d+ of \d+ on )\S+", r"\1<host>"),
    (r"\d+ bytes", "<bytes>"),
    (r"[ \t]+", " "),
]


def same(line):
    """Return a line without what may differ."""
    for pattern, name in VARYING:
        line = re.sub(pattern, name, line)
    return line.strip()


def agrees(expected, shown):
    """Return whether the lines shown are those expected, `...` standing for any."""
    pattern = "".join("(?:.*\n)*?" if line.strip() == "..." else re.escape(same(line)) + "\n" for line in expected)
    return re.fullmatch(pattern, "".join(same(line) + "\n" for line in shown)) is not None


def test_the_readme_takes_five_minutes():
    """A sentence and what it is not for, the demo, and a sweep in ten lines, each before what takes longer."""
    lines = README.splitlines()
    assert len(lines) < 300
    head = "\n".join(lines[:40])
    assert "$ python3 -m labtasker demo\n" in head and "not for" in head and "No dependencies" in head
    script, sweep = [text for language, name, text in blocks(["README.rst"])][1:3]
    assert "@labtasker.loop()" in script
    assert len(re.findall(r"^\S|^ +\S", script, re.M)) + len(commands(sweep)) <= 10
    order = ["demo", "**A task's arguments must be exactly", "Optuna", "--gpus all", "python3 -m tox", "Licence"]
    assert order == sorted(order, key=README.index)


def test_the_readme_calls_the_program_as_a_module_and_links_what_is_there():
    for page in PAGES:
        text = text_of(page)
        assert "python3 labtasker.py" not in text.replace("As ``python3 labtasker.py`` the whole file is compiled", "")
        for target in re.findall(r"<([^<>\s]+\.rst)>`_", text) + re.findall(r"^\.\. image:: (\S+)", text, re.M):
            assert (ROOT / page).parent.joinpath(target).is_file(), (page, target)
        for target in re.findall(r"`([^`<>]+\.rst)`_\b", text):
            assert "`%s <" % target in text, (page, target)
    assert all("`%s <%s>`_" % (page, page) in README for page in PAGES[1:])


def test_ci_runs_the_test_commands_of_the_readme():
    lines = next(text for language, _, text in blocks() if language == "sh" and "tox" in text).splitlines()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line.replace("--quiet ", "") for line in ci
            if line.startswith("python3 -m") and "venv " not in line and "--notest" not in line] == lines


OPTUNA = '''"""What docs/optuna.rst uses of Optuna, for where it is not installed: it tries numbers from low to high."""
import types


class Study:
    def __init__(self):
        self.trials = []

    def ask(self):
        trial = types.SimpleNamespace(number=len(self.trials), value=None)
        trial.suggest_float = lambda name, low, high, log: low * (high / low) ** (trial.number / 12)
        trial.report = lambda value, step: (value + 1.0, range(step))
        self.trials.append(trial)
        return trial

    def tell(self, trial, value=None, state=None):
        assert (value is None) == (state in ("fail", "pruned")), (value, state)
        trial.value = value

    @property
    def best_value(self):
        return max(trial.value for trial in self.trials if trial.value is not None)


trial = types.SimpleNamespace(TrialState=types.SimpleNamespace(FAIL="fail", PRUNED="pruned"))


def create_study(direction):
    return Study()
'''


ON_TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(['bash', '-c', sys.argv[1]])"]  # as a reader sees it


def played(page, place):
    """Yield (command, expected lines, lines that it prints) of each command, run in order in the place's folder."""
    for path in (MODULE, ROOT / "labtasker_cli.py"):
        shutil.copy2(str(path), str(place.cwd))
        compiled = pathlib.Path(importlib.util.cache_from_source(str(path)))
        if compiled.exists():  # else each page compiles them anew
            place.write("__pycache__/" + compiled.name, "")
            shutil.copy2(str(compiled), str(place.cwd / "__pycache__" / compiled.name))
    if "import optuna" in text_of(page) and not os.environ.get("LT_TEST_OPTUNA") and run([sys.executable, "-c", "import optuna"], place.cwd, check=False).returncode:
        place.write("optuna.py", OPTUNA)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"PATH": place.path(), "PYTHONPATH": "", "COLUMNS": "110", "NO_COLOR": "1", "TMPDIR": str(place.cwd.parent),
           "PYTHONPYCACHEPREFIX": ""}
    try:
        for language, name, text in blocks([page]):
            if language == "python" and name:
                place.write(name, text)
            for command, expected in commands(text) if language == "console" else []:
                start = ON_TERMINAL if command.startswith("python3 -m labtasker task ls ") else ["bash", "-c"]
                result = run(start + ["exec 2>&1; " + command.replace(PORT, port)], place.cwd, env=env)
                yield command, expected, [line.replace(":" + port, ":" + PORT).rstrip() for line in result.lines]
    finally:
        end_server(place)


def end_server(place):
    """End the server that a page may have left in the background."""
    path = place.folder / "server.json"
    if path.exists():
        os.kill(json.loads(path.read_text())["pid"], signal.SIGTERM)
        wait_until(lambda: not path.exists(), "the server ends")


def indented(command, lines):
    return "".join(("    " + line).rstrip() + "\n" for line in ["$ " + command.replace("\n", "\n    > ")] + lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "\n    $ " in text_of(page)])
def test_commands_print_what_the_page_says(page, home):
    results = list(played(page, home))
    wrong = [indented(command, shown) for command, expected, shown in results if not agrees(expected, shown)]
    assert not wrong, "`python3 tests/test_readme.py %s` writes into it:\n\n%s" % (page, "\n".join(wrong))


def test_there_are_pages_and_commands():
    assert len(PAGES) >= 6
    assert sum(len(commands(text)) for language, _, text in blocks() if language == "console") >= 30


def test_agreement_is_strict_but_for_what_varies():
    assert agrees(["a", "...", "z  12 ms"], ["a", "b", "c", "z 7.5 ms"])
    assert not agrees(["a", "z"], ["a", "b", "z"])
    assert not agrees(["a", "..."], ["b", "a"])


def rewrite(page, place):
    """Write into a page what its commands print now, if that differs; all of one run, so that an id shown twice is the
    same. Outputs that have `...` are left for a person."""
    results = list(played(page, place))
    if all(agrees(expected, shown) for _, expected, shown in results):
        return
    results = iter(results)

    def anew(match):
        if match.group(1) != "console":
            return match.group()
        head, text = match.group()[:-len(match.group(3))], match.group(3)
        count = len(commands(re.sub(r"^    ", "", text, flags=re.M).strip("\n")))
        shown = [indented(command, expected if "..." in expected else [line.replace(str(place.cwd), "/home/me/sweep") for line in shown])
                 for command, expected, shown in (next(results) for _ in range(count))]
        return head + "".join(shown) + "\n"
    (ROOT / page).write_text(BLOCK.sub(anew, text_of(page)).rstrip("\n") + "\n", encoding="utf-8")


def main():
    for page in sys.argv[1:] or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            home = pathlib.Path(folder) / "home"
            home.mkdir()
            rewrite(page, Place(home))


if __name__ == "__main__":
    main()
