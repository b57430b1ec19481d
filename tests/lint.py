"""What linters find: `tox -e lint`. In Python, in the page's script, in the shell that we print and that the pages have.

`python tests/lint.py FOLDER`: npm installs eslint into the folder on first use. A check whose program is missing is
skipped and says why; a check that finds something ends this with 1. What ruff looks for: pyproject.toml; eslint:
eslint.config.mjs beside this file.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RST = re.compile(r"^\.\. code-block:: (sh|console)\n(?:    :name: \S+\n)?\n((?:    .*\n|\n)+)", re.M)
MARKDOWN = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.M | re.S)
NOT_FAULTS = [
    "SC2016",  # $ in single quotes: a job's text is expanded by the shell that the loop starts
    "SC2046",  # $(...) as words is how ids of one command are arguments of another
    "SC2207",  # words split into COMPREPLY: at newlines, as IFS says
]
SBATCH = [["-t", "1:00"], ["--array=0-7", "-n", "4", "--server", "--signal=B:USR1@60"], ["--gpus-per-task=1", "-n", "2", "--server"]]


class Skipped(Exception):
    """A check can't be made here."""


def run(*words, **options):
    """Return (exit code, all that the command printed)."""
    try:
        done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, **options)
    except FileNotFoundError:
        raise Skipped("there is no %s here" % pathlib.Path(words[0]).name) from None
    return done.returncode, done.stdout


def labtasker(folder, *words):
    """Return what the command line prints."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), LABTASKER_ROOT=str(folder / ".labtasker"))
    done = subprocess.run([sys.executable, "-m", "labtasker"] + list(words), cwd=str(folder), env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, check=True)
    return done.stdout


def shell_of(page):
    """Return the shell blocks of a page as texts; of a console block the commands."""
    text = page.read_text(encoding="utf-8")
    found = MARKDOWN.findall(text)
    for kind, block in RST.findall(text):
        block = re.sub(r"^    ", "", block, flags=re.M)
        if kind == "console":
            block = "\n".join(line[2:] for line in block.splitlines() if line.startswith(("$ ", "> ")))
        found.append(block)
    return found


def shell_texts(folder):
    """Return {file name: text} of the shell that we print, run and show."""
    sys.path.insert(0, str(ROOT))
    import labtasker as L
    texts = {"guard.sh": L._Guard.PROGRAM, "completion.bash": labtasker(folder, "completion", "bash")}
    for i, options in enumerate(SBATCH):
        texts["sbatch-%d.bash" % i] = labtasker(folder, "sbatch", "--dry-run", *options + ["--", "python", "train.py", "--lr", "%(lr)"])
    pages = [ROOT / "README.rst"] + sorted((ROOT / "docs").glob("*.rst")) + sorted((ROOT / "skills").rglob("*.md"))
    for page in pages:
        for i, text in enumerate(shell_of(page)):
            texts["%s-%d.bash" % (page.name, i)] = text
    assert len(texts) > 40, sorted(texts)
    return texts


def check_python(folder, tools):
    """Return what ruff finds in all Python of the checkout."""
    return run(sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", "--output-format=concise", ROOT)


def page(folder):
    sys.path.insert(0, str(ROOT))
    import labtasker_cli
    path = folder / "page.js"
    path.write_text(labtasker_cli.PAGE_JS, encoding="utf-8")
    (folder / "package.json").write_text('{"type": "module"}')
    return path


def check_script_syntax(folder, tools):
    """Return what node says of the page's script."""
    return run("node", "--check", page(folder))


def check_script(folder, tools):
    """Return what eslint finds in the page's script."""
    run("node", "--version")
    eslint = tools / "node_modules" / "eslint" / "bin" / "eslint.js"
    if not eslint.exists():
        tools.mkdir(parents=True, exist_ok=True)
        code, shown = run("npm", "install", "--prefix", tools, "--no-audit", "--no-fund", "--no-update-notifier", "--prefer-offline", "eslint@10")
        if code or not eslint.exists():
            raise Skipped("npm can't install eslint: " + shown)
    shutil.copy(str(ROOT / "tests" / "eslint.config.mjs"), str(folder))
    return run("node", eslint, page(folder), cwd=str(folder))


def check_shell(folder, tools):
    """Return what shellcheck finds in the shell that we print, run and show."""
    texts = shell_texts(folder)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = [run("shellcheck", "--shell", shell, "--exclude", ",".join(NOT_FAULTS), *sorted(folder.glob("*." + shell)))
             for shell in ("sh", "bash")]
    return max(code for code, _ in found), "".join(text for _, text in found)


CHECKS = {"ruff": check_python, "node --check": check_script_syntax, "eslint": check_script, "shellcheck": check_shell}


def main():
    tools, codes, skipped = pathlib.Path(sys.argv[1]).resolve(), [], 0
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                code, shown = check(pathlib.Path(folder), tools)
            except Skipped as why:
                skipped += 1
                print("%s: skipped: %s" % (name, why))
                continue
        codes.append(bool(code))
        print("%s: %s" % (name, "failed\n" + shown if code else "passed"))
    print("%d passed, %d failed, %d skipped" % (codes.count(False), codes.count(True), skipped))
    return any(codes)


if __name__ == "__main__":
    sys.exit(main())
