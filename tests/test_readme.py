"""README.rst: its commands are run, in order and in one empty folder, and must print what it says that they print.

A `console` block has commands after `$` and their output; `...` on a line of its own stands for any lines. A `python`
block with a name is a file. `sh` blocks are not run. Ids, times and ports are the only things that may differ.
`python3 tests/test_readme.py` writes the outputs of today into it.
"""
import pathlib
import re
import shutil
import tempfile

import pytest

from harness import MODULE, ROOT, Place, run

TEXT = (ROOT / "README.rst").read_text(encoding="utf-8")
LINES = TEXT.splitlines()
BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n(?:    :name: (\S+)\n)?\n((?:    .*\n|\n)+)", re.M)


def blocks():
    """Return [(language, name or None, text without indent)]."""
    return [(language, name or None, re.sub(r"^    ", "", text, flags=re.M).strip("\n") + "\n")
            for language, name, text in BLOCK.findall(TEXT)]


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


def test_first_screen_has_what_style_asks_for():
    head = "\n".join(LINES[:40])
    assert "$ python3 labtasker.py demo\n" in head
    assert "@labtasker.loop()" in head and "not for" in head and "No dependencies" in head


def test_the_script_of_the_first_screen_has_eight_lines():
    name, text = next((name, text) for language, name, text in blocks() if language == "python")
    assert len(text.splitlines()) == 8 and name


def test_ci_runs_the_test_commands_of_the_readme():
    lines = next(text for language, _, text in blocks() if language == "sh" and "tox" in text).splitlines()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line.replace("--quiet ", "") for line in ci if line.startswith("python3 -m") and "venv " not in line] == lines


def played(place):
    """Yield (command, expected lines, lines that it prints) of each command, run in order in the place's folder."""
    for path in (MODULE, ROOT / "labtasker_cli.py"):
        shutil.copy(str(path), str(place.cwd))
    for language, name, text in blocks():
        if language == "python" and name:
            place.write(name, text)
        for command, expected in commands(text) if language == "console" else []:
            result = run(["bash", "-c", "exec 2>&1; " + command], place.cwd, env={
                "PATH": place.path(), "PYTHONPATH": "", "COLUMNS": "110", "TMPDIR": str(place.cwd.parent)})
            yield command, expected, result.lines


def indented(command, lines):
    return "".join(("    " + line).rstrip() + "\n" for line in ["$ " + command.replace("\n", "\n    > ")] + lines)


@pytest.mark.slow
def test_commands_print_what_the_readme_says(home):
    results = list(played(home))
    assert len(results) >= 10
    wrong = [indented(command, shown) for command, expected, shown in results if not agrees(expected, shown)]
    assert not wrong, "`python3 tests/test_readme.py` writes into README.rst:\n\n" + "\n".join(wrong)


@pytest.mark.slow
def test_the_eight_line_script_runs(home):
    shutil.copy(str(MODULE), str(home.cwd))
    text = next(text for language, name, text in blocks() if name == "double.py")
    home.write("double.py", text)
    home.submit("--", "--x=21")
    home.bash("python double.py")
    assert [(t["status"], t["summary"]) for t in home.tasks()] == [("success", {"doubled": 42.0})]


def test_agreement_is_strict_but_for_what_varies():
    assert agrees(["a", "...", "z  12 ms"], ["a", "b", "c", "z 7.5 ms"])
    assert not agrees(["a", "z"], ["a", "b", "z"])
    assert not agrees(["a", "..."], ["b", "a"])


def main():
    """Write into README.rst what its commands print now, all of one run, so that an id shown twice is the same; those
    whose output has `...` are left for a person."""
    text = TEXT
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder) / "home"
        home.mkdir()
        for command, expected, shown in played(Place(home)):
            text = text.replace(indented(command, expected), indented(command, expected if "..." in expected else shown))
    (ROOT / "README.rst").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
