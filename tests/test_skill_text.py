"""The skill for coding agents, `skills/labtasker`: what it says works, names what exists, and is the same in all copies.

Every block is run, in order and in one empty folder for each page, as an agent's shell would run it: no terminal, an
open pipe on stdin, a limit of time, and nothing but this package. `python3 tests/test_skill_text.py` writes the pages
into labtasker_cli.py, from where `labtasker help skill` and `labtasker skill install` have them.
"""
import ast
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import labtasker
from harness import MODULE, ROOT

CLI = ROOT / "labtasker_cli.py"
SKILL = ROOT / "skills" / "labtasker"
PAGES = ["SKILL.md", "references/cluster.md", "references/filters.md", "references/python.md"]
LIMIT_S = 300  # for a page; each command in it ends by itself
EMBEDDED = re.compile(r"(?s)(# ---- The skill: .*?\n\nSKILL = )\{.*\Z")
BLOCK = re.compile(r"(?ms)^```(\w+)\n(.*?)^```$")


def text_of(page):
    return (SKILL / page).read_text(encoding="utf-8")


def blocks(page):
    """Return [(language, text)] of a page."""
    return BLOCK.findall(text_of(page))


# The copies ###################################################################


def embedded():
    """Return the end of labtasker_cli.py with the pages as they are today."""
    def lines(text):
        """Return a text as the inside of three quotes; long lines go on in the next one."""
        text = text.replace("\\", "\\\\").replace('"""', '\\"""')
        return re.sub(r"(?m)^.{120,}$", lambda line: re.sub(r"(.{90,110}) ", r"\1 \\\n", line.group()), text)
    return "{\n%s\n}\n" % "\n".join('"%s": """\\\n%s""",' % (page, lines(text_of(page))) for page in PAGES)


def test_the_command_prints_and_installs_the_files_of_the_checkout():
    """Run this file as a script after a change."""
    assert labtasker.extras().SKILL == {page: text_of(page) for page in PAGES}
    assert EMBEDDED.search(CLI.read_text(encoding="utf-8")).group() == EMBEDDED.sub(
        lambda found: found.group(1) + embedded(), EMBEDDED.search(CLI.read_text(encoding="utf-8")).group())


def install(*words):
    return labtasker.main(["skill", "install"] + list(words))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that is the working folder, and an empty home beside it."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("words, folder", [
    ([], "here/.claude/skills/labtasker"), (["--global"], "home/.claude/skills/labtasker"),
    (["--dest", "../mine/skills"], "mine/skills/labtasker"), (["--dest=~/mine"], "home/mine/labtasker")])
def test_install_writes_the_pages_where_it_is_told(here, capsys, words, folder):
    assert install(*words) == 0
    assert {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()} == {folder + "/" + page for page in PAGES}
    for page in PAGES:
        assert (here / folder / page).read_text(encoding="utf-8") == text_of(page)
        assert (here / folder / page).stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert str(here / folder) in capsys.readouterr().out
    assert install(*words) == 0 and "there already" in capsys.readouterr().out


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_install_overwrites_another_text_only_when_told_to(here, capsys):
    """Such as the skill of Labtasker 2.x, whose folder has the same name; what else is in the folder stays."""
    path = here / "here/.claude/skills/labtasker/SKILL.md"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    path.with_name("notes.md").write_text("mine too")
    assert install() == 2
    shown = capsys.readouterr()
    assert shown.out == "" and str(path.parent) in shown.err and "SKILL.md" in shown.err and "--yes" in shown.err
    assert path.read_text() == "mine" and sorted(os.listdir(str(path.parent))) == ["SKILL.md", "notes.md"]
    path.chmod(0o640)
    assert install("--yes") == 0
    assert path.read_text(encoding="utf-8") == text_of("SKILL.md") and path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(str(path.parent))) == ["SKILL.md", "notes.md", "references"]
    (path.parent / PAGES[1]).unlink()  # what is missing needs no leave
    assert install() == 0 and (path.parent / PAGES[1]).is_file()


def test_install_says_what_is_in_its_way_and_leaves_no_part_of_a_file(here, capsys, monkeypatch):
    assert install("--global", "--dest", "x") == 2 and install("--dest", "") == 2
    (here / "here/file").write_text("")
    assert install("--dest", "file") == 1
    folder = here / "here/odd/labtasker"
    (folder / "SKILL.md").mkdir(parents=True)
    assert install("--dest", "odd", "--yes") == 1 and os.listdir(str(folder)) == ["SKILL.md"]
    monkeypatch.setenv("HOME", str(here / "none"))
    assert install("--global") == 1
    monkeypatch.setenv("HOME", "")
    assert install("--global") == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 6 and all("--dest" in line for line in shown) and "home" in shown[-1], shown
    assert sorted(os.listdir(".")) == ["file", "odd"]

    monkeypatch.setattr(labtasker.Disk, "sync", no_space)
    assert install() == 1 and "No space left" in capsys.readouterr().err
    assert [path for path in here.joinpath("here/.claude").rglob("*") if path.is_file()] == []


def no_space(fd):
    raise OSError(28, "No space left on device")


def test_help_prints_the_pages(capsys):
    for words, page in [([], "SKILL.md"), (["python"], "references/python.md"), (["references/filters.md"], "references/filters.md")]:
        assert labtasker.main(["help", "skill"] + words) == 0
        assert capsys.readouterr().out == text_of(page)
    assert labtasker.main(["help", "skill", "clusters"]) == 2
    assert "did you mean cluster?" in capsys.readouterr().err


def test_those_who_install_from_the_repository_get_the_same_files():
    """The plugin is the checkout: its skills are those of the folder skills/."""
    plugin, market = (json.loads((ROOT / ".claude-plugin" / name).read_text()) for name in ("plugin.json", "marketplace.json"))
    listed, = market["plugins"]
    assert plugin["name"] == listed["name"] == "labtasker" and re.fullmatch("[a-z0-9-]+", market["name"])
    assert listed["source"] == "./" and "skills" not in plugin and market["owner"]["name"]
    assert plugin["version"] == labtasker.__version__ and "version" not in listed
    assert [str(path.relative_to(ROOT)) for path in (ROOT / "skills").rglob("SKILL.md")] == ["skills/labtasker/SKILL.md"]
    assert sorted(str(path.relative_to(SKILL)) for path in SKILL.rglob("*") if path.is_file()) == PAGES


# The form #####################################################################


def test_the_skill_keeps_the_limits_of_its_form():
    head, body = re.fullmatch(r"(?s)---\n(.*?\n)---\n(.*)", text_of("SKILL.md")).groups()
    fields = dict(re.findall(r"(?m)^ *([\w-]+): ?(.*)$", head))
    assert fields["name"] == SKILL.name == "labtasker" and fields["version"] == labtasker.__version__
    assert list(fields) == ["name", "description", "license", "metadata", "version"]
    said = fields["description"]
    assert 100 < len(said) <= 1024 and "Use when" in said and "Not for Labtasker 2.x" in said
    assert not re.search(r": | #|[<>]|^[`'\"\[{&*!|%@-]", said), "a plain YAML text, and no tag"
    assert len(text_of("SKILL.md").splitlines()) <= 300 and len(body.split()) <= 3000
    for page in PAGES[1:]:
        name, text = re.escape(page), text_of(page)
        assert re.search(r"(?m)^- \[%s\]\(%s\): when " % (name, name), body), "it is said when to read " + page
        assert "Read this when " in text and len(text.splitlines()) < 150
        assert set(re.findall(r"\]\(([^)]+)\)", text)) <= {os.path.basename(other) for other in PAGES[1:]}


# What it names ################################################################


OF_OTHERS = set("--lr --model --aug --no-aug --modle --learning-rate --key --opt --layers "  # of jobs
                "--array --gpus-per-task --mem -t -p -c".split())  # of Slurm
TAKES = {"sbatch": ["sbatch", "loop"]}  # whose options a command takes, where not just its own
SPAN = re.compile(r"`([^`\n]+)`")


def spans(page):
    """Return what stands in backticks in the prose of a page, and the lines of its shell blocks."""
    prose = BLOCK.sub("", text_of(page))
    return SPAN.findall(prose.replace("\n", " ")), [line for language, text in blocks(page) if language in ("bash", "text")
                                                   for line in text.replace("\\\n", " ").splitlines()]


def command_of(words):
    """Return (path of COMMANDS, the words after it) where these words begin with a command, else (None, words)."""
    for size in (2, 1):
        if " ".join(words[:size]) in labtasker.COMMANDS:
            return " ".join(words[:size]), words[size:]
    return None, words


def unknown_options(text):
    """Return what a piece of shell names as options of a command that the command lacks."""
    labtasker.extras()
    every = {flag for command in labtasker.COMMANDS.values() for flags, _ in command.options for flag in flags}
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    path, rest = command_of(words[words[:1] == ["labtasker"]:])
    known = set.union(*({flag for flags, _ in labtasker.COMMANDS[name].options for flag in flags}
                        for name in TAKES.get(path, [path]))) if path else every
    known = known | OF_OTHERS | {"--help", "--version"}
    found = [re.match(r"--?[a-zA-Z][\w-]*", word) for word in itertools.takewhile(lambda word: word != "--", rest)]
    return [match.group() for match in found if match and match.group() not in known]
OTHERS = set("date regex exists list main print".split())  # of filters, and of the user's own


def unknown_names(text):
    """Return what a piece of Python names that `labtasker` lacks: functions, and parameters of its functions."""
    found = [name for name in re.findall(r"labtasker\.(\w+)(?!\.\w)", text) if name not in labtasker.__all__ + ["py"]]
    for name in re.findall(r"(?<![\w.])(\w+)\(", text):
        found += [name] if name not in labtasker.__all__ and name not in OTHERS else []
    try:
        tree = ast.parse(text.lstrip("@").replace("=...", "=None"))
    except SyntaxError:
        return found
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        if name in labtasker.__all__ and name not in ("report", "TaskUpdateRequest"):  # they take any, or say so themselves
            takes = set(inspect.signature(getattr(labtasker, name)).parameters) | (
                set(labtasker.SUBMITTED) if name.startswith("submit_") else set())
            found += ["%s(%s=)" % (name, word.arg) for word in call.keywords if word.arg and word.arg not in takes]
    return found


def test_every_option_function_and_variable_that_it_names_exists():
    assert unknown_options("labtasker task ls --nmae x") == ["--nmae"] and unknown_options("--no-such") == ["--no-such"]
    assert unknown_options("task wait --limit 3 -- --nothing") == ["--limit"] and unknown_options("loop --gpus 0") == []
    assert unknown_names("labtasker.nothing") == ["nothing"] and unknown_names("ls_tasks(order=1)") == ["ls_tasks(order=)"]
    source = MODULE.read_text(encoding="utf-8")
    for page in PAGES:
        said, typed = spans(page)
        said = list(itertools.chain.from_iterable(text.split(" | ") for text in said))
        commands = [text for text in said if command_of(text.replace("labtasker ", "", 1).split())[0] or text.startswith("-")]
        typed = re.sub(r'"\$\((.*?)\)"(.*)', r"ID\2\n\1", "\n".join(typed))  # a command within another on a line of its own
        commands += re.findall(r"(?:^|[|;] *)(labtasker [^|;<>\n]*)", typed, re.M)
        assert len(commands) > 2
        assert {text: unknown_options(text) for text in commands if unknown_options(text)} == {}, page
        for text in commands:
            words = text.replace("labtasker ", "", 1).split() if text.startswith("labtasker ") else []
            assert not words or words[0].startswith("-") or words[0] in ("COMMAND",) or command_of(words)[0], (page, text)
        for text in [text for text in said if "(" in text and not text.startswith("%")] + re.findall(r"labtasker\.\w+", text_of(page)):
            assert unknown_names(text) == [], (page, text)
        assert [name for name in set(re.findall(r"LABTASKER_\w+", text_of(page))) if name not in source] == [], page


# Its blocks are run ###########################################################


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The environment of an agent's shell: `labtasker` and `python3` without site-packages, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("bin", "module", "home"):
        (folder / name).mkdir()
    for path in (MODULE, CLI):
        shutil.copy(str(path), str(folder / "module"))
    for name, more in (("python3", ""), ("labtasker", " -m labtasker")):
        path = folder / "bin" / name
        path.write_text("#!/bin/sh\nexec %s -S%s \"$@\"\n" % (shlex.quote(sys.executable), more))
        path.chmod(0o755)
    return {"PATH": "%s:/usr/bin:/bin" % (folder / "bin"), "HOME": str(folder / "home"), "PYTHONPATH": str(folder / "module"),
            "PYTHONPYCACHEPREFIX": os.environ["PYTHONPYCACHEPREFIX"]}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_by_itself(page, bare, tmp_path, monkeypatch):
    """In the page's order; after it the tasks are as its prose says."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    assert subprocess.call(["python3", "-c", "import pytest"], env=bare, stderr=subprocess.DEVNULL, executable=shutil.which(
        "python3", path=bare["PATH"])) == 1, "it is not bare"
    run = [(language, text) for language, text in blocks(page) if language != "text"]
    assert {language for language, _ in run} <= {"bash", "python"} and len(run) > 1
    shown = [played(language, text, folder, bare) for language, text in run]
    assert not [text for text in shown if "Traceback" in text and "no-such" not in text or "labtasker: error" in text], shown
    assert labtasker.Survey(str(folder / ".labtasker" / "journal.jsonl")).bad == []
    CHECKS[page](folder, "".join(shown))


def played(language, text, folder, env):
    """Return what a block prints; its stdin is a pipe that stays open, its processes end with it or within the limit."""
    args = ["bash", "-e", "-o", "pipefail", "-c", text]
    if language == "python":
        (folder / "block.py").write_text(text, encoding="utf-8")
        args = ["python3", "block.py"]
    ours, its = os.pipe()
    with open(str(folder.parent / "shown"), "w+b") as output:
        process = subprocess.Popen(args, cwd=str(folder), env=env, stdin=ours, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True, executable=shutil.which(args[0], path=env["PATH"]))
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        finally:
            os.close(ours)
            os.close(its)
        output.seek(0)
        shown = output.read().decode("utf-8")
    assert code == 0, "exit code %d of\n%s\n%s" % (code, text, shown)
    return shown


def tasks_in(folder, **query):
    labtasker.use_client(None)
    os.environ["LABTASKER_ROOT"] = str(folder / ".labtasker")
    try:
        return labtasker.ls_tasks(limit=1000, **query).content
    finally:
        del os.environ["LABTASKER_ROOT"]
        labtasker.use_client(None)
def check_skill(folder, shown):
    sweep = tasks_in(folder, task_name="sweep1", sort=[["summary.acc", -1]])
    assert len(sweep) == 8 and {task.status for task in sweep} == {"success"}
    assert sweep[0].args == {"lr": 0.01, "model": "vit", "aug": True} and sweep[0].summary == {"acc": 0.85}
    assert len((folder / "results.csv").read_text().splitlines()) == 9
    for text in ("exit code 0\n", "KeyError: 'no-such'", "it lacks model"):
        assert text in shown, shown
    assert {task.args["model"]: task.status for task in tasks_in(folder, task_name="bad")} == {"vit": "success"}
    assert [task.status for task in tasks_in(folder, task_name="typo")] == ["cancelled"]
    assert {task.args["lr"]: task.status for task in tasks_in(folder, task_name="early")} == {0.5: "success", 0.1: "cancelled"}
    assert "stopped early: asha, step 3, loss 0.729 is 2nd of 2" in shown
    assert {task.status for task in tasks_in(folder, task_name="sweep2")} == {"success"}


def check_cluster(folder, shown):
    assert {task.summary["gpu"] for task in tasks_in(folder, task_name="gpus")} == {0, 1}
    assert [task.status for task in tasks_in(folder, task_name="shared")] == ["success"]
    assert "listening on http://" in shown and "Stopped the server" in shown and "#SBATCH --array=0-7" in shown


def check_filters(folder, shown):
    assert sorted(task.priority for task in tasks_in(folder)) == [3, 100, 100, 100, 100]
    assert [task.args for task in tasks_in(folder, status="cancelled")] == [{"lr": 0.1, "model": "resnet"}]
    assert len((folder / "all.csv").read_text().splitlines()) == 6


def check_python(folder, shown):
    assert [task.summary["loss"] for task in tasks_in(folder, task_name="nested", sort=[["args.seed", 1]])] == [0.1, 0.2]
    assert [round(task.summary["loss"], 5) for task in tasks_in(folder, task_name="steps", sort=[["args.lr", 1]])] == [0.59049, 0.03125]
    assert tasks_in(folder, task_name="edit") == [] and "created -> pending" in shown and "5,2" in shown
    assert [task.summary for task in tasks_in(folder, task_name="wait", sort=[["args.x", 1], ["args.y", 1]])][1:3] == [
        {"z": 1, "w": 2}, {"z": 2, "w": 1}]


CHECKS = dict(zip(PAGES, (check_skill, check_cluster, check_filters, check_python)))


if __name__ == "__main__":
    source = CLI.read_text(encoding="utf-8")
    assert EMBEDDED.search(source), "labtasker_cli.py has no place for the skill"
    CLI.write_text(EMBEDDED.sub(lambda found: found.group(1) + embedded(), source), encoding="utf-8")
