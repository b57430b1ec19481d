"""tests/smoke.py on the Pythons for which pytest has no environment here, and on this one; warnings in what tests start."""
import subprocess
import sys

import pytest

from harness import TESTS, check_no_warning, run


def works(name):
    """Return whether there is such a Python: a name on the PATH may be a shim for one that is not switched on."""
    try:
        return subprocess.call([name, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python3.6", "python3.7", sys.executable], ids=["3.6", "3.7", "this one"])
def test_main_job_from_end_to_end(name, tmp_path):
    if not works(name):
        pytest.skip("%s is not on this machine" % name)
    shown = run([name, TESTS / "smoke.py"], tmp_path, env={"TMPDIR": str(tmp_path)}).stdout
    assert shown.endswith("passed\n")


@pytest.mark.slow
def test_a_file_that_a_process_leaves_open_fails_the_test_that_has_started_it(tmp_path):
    with pytest.raises(AssertionError, match="ResourceWarning: unclosed file"):
        run([sys.executable, "-c", "open('left', 'w')"], tmp_path)
    assert (tmp_path / "left").exists()
    for text in ("sys:1: DeprecationWarning: old", "Exception ignored in: <function f at 0x1>\n"):
        with pytest.raises(AssertionError):
            check_no_warning("labtasker: started\n" + text)
    check_no_warning("labtasker: warning: no Warning of Python's\n")
