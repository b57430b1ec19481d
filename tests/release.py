"""Makes a release: `tox -e release` builds both artefacts of the last commit, checks them, and runs the demo from each.

`python tests/release.py FOLDER` leaves them in FOLDER. It stops with what failed at the first check that fails.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATING = 8  # of pyroma's 10: the project has neither a home page nor a mail address yet


def run(*words, **options):
    """Run a command and return what it printed; end with that if it fails."""
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True, **options)
    if done.returncode:
        sys.exit("%s\nrelease: failed (exit code %d): %s" % (done.stdout, done.returncode, " ".join(map(str, words))))
    return done.stdout


def released_version(source):
    """Return the version; end with a message where CHANGES.rst does not begin with it and a day."""
    version = re.search(r'^__version__ = "(.*)"$', (source / "labtasker.py").read_text(encoding="utf-8"), re.M).group(1)
    title = re.search(r"^(.*)\n-+\n", (source / "CHANGES.rst").read_text(encoding="utf-8"), re.M).group(1)
    if not re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", title):
        sys.exit("release: CHANGES.rst begins with %r; write the version and the day: %s (YYYY-MM-DD)" % (title, version))
    return version


def check(wheel, sdist):
    """Run what checks artefacts before they are uploaded, and print what pyroma misses."""
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    run(sys.executable, "-m", "check_wheel_contents", "--config", ROOT / "pyproject.toml", wheel)
    lines = run(sys.executable, "-m", "pyroma", "--min", RATING, sdist).splitlines()
    print("\n".join("pyroma: " + line for line in lines[lines.index("Found labtasker") + 1:] if line.strip("-")))


def try_out(artefact, version, folder):
    """Install the artefact in a new environment and run what it installs, in an empty folder."""
    python, home = folder / "venv" / "bin" / "python", folder / "home"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LABTASKER"))}
    home.mkdir(parents=True)
    run(sys.executable, "-m", "venv", folder / "venv")
    run(python, "-m", "pip", "install", "--quiet", artefact, env=env)
    for words in (["labtasker", "--version"], ["lt", "--version"], ["python", "-m", "labtasker", "--version"]):
        assert run(folder / "venv" / "bin" / words[0], *words[1:], cwd=home, env=env).split()[-1] == version, words
    run(python, "-c", "from labtasker.api_models import TaskUpdateRequest", cwd=home, env=env)
    assert list(folder.glob("venv/lib/*/site-packages/labtasker-stubs/__init__.pyi"))
    print("%s: %s" % (artefact.name, run(folder / "venv" / "bin" / "labtasker", "demo", cwd=home, env=env).splitlines()[-1]))


def main(folder):
    shutil.rmtree(str(folder), ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        place = pathlib.Path(made)
        run("git", "archive", "--output", place / "source.tar", "HEAD", cwd=str(ROOT))
        run("tar", "-x", "-f", "source.tar", "--one-top-level", cwd=str(place))
        version = released_version(place / "source")
        run(sys.executable, "-m", "build", "--outdir", folder, place / "source")
        wheel, sdist = folder / ("labtasker-%s-py3-none-any.whl" % version), folder / ("labtasker-%s.tar.gz" % version)
        assert sorted(folder.iterdir()) == [wheel, sdist]
        check(wheel, sdist)
        for artefact in (wheel, sdist):
            try_out(artefact, version, place / artefact.name)
        with tarfile.open(str(sdist)) as packed:
            names = {name.partition("/")[2] for name in packed.getnames()}
        missing = set(run("git", "ls-files", cwd=str(ROOT)).splitlines()) - names - {".gitignore", ".ci/run"}
        assert not missing, missing
    print("release: %s of commit %s is in %s" % (version, run("git", "rev-parse", "--short", "HEAD", cwd=str(ROOT)).strip(), folder))
    if run("git", "status", "--porcelain", cwd=str(ROOT)):
        print("release: files that are not committed are not a part of it")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
