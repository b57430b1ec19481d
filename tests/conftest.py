"""Fixtures: `home` (embedded store), `server_home` (a server), `both` (each in turn), `server`.

What loops do with a server is tried with one that seems far away (FAR): by default as far as a host of the same site, with
LT_TEST_DELAYS=0,5,30,300 (milliseconds; `tox -e slow` sets it) at each of these distances."""
import os
import pathlib
import sys

import hypothesis
import pytest

hypothesis.settings.register_profile("labtasker", database=None, deadline=None, derandomize=True)
hypothesis.settings.load_profile("labtasker")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import harness  # noqa: E402


def pytest_configure():
    """Have xdist's workers, which start later, run in the development mode."""
    os.environ.update({name: value for name, value in harness.STRICT.items() if name != "PYTHONWARNINGS"})


@pytest.fixture(scope="session", autouse=True)
def clean_world(tmp_path_factory):
    """Tests start outside the checkout, without settings of the person who runs them."""
    for name in [n for n in os.environ if n.startswith("LABTASKER_")]:
        del os.environ[name]
    folder = tmp_path_factory.getbasetemp()
    above = [str(p) for p in folder.resolve().parents if (p / ".labtasker").exists()]
    assert not above, "a .labtasker folder above the tests' folders would be found by them: remove it from %s" % above
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each subprocess would compile the module anew
    os.environ.pop("PYTHONUNBUFFERED", None)  # what is printed comes in other pieces
    os.environ.update(harness.STRICT)  # of the processes that tests start
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # compiled once for all of xdist's workers
    os.environ["PYTHONPYCACHEPREFIX"] = str(shared / "pycache")
    before = os.getcwd()
    os.chdir(str(folder))
    yield
    os.chdir(before)


FAR = ("test_slots", "test_worker", "test_signals")  # slots, decorated loops, heartbeats, the outbox
DELAYS_MS = [int(text) for text in os.environ.get("LT_TEST_DELAYS", "30").split(",")]


def pytest_generate_tests(metafunc):
    """Have tests with `both` run with each kind of store, and those of FAR with a server at each distance."""
    delays = [("server" if ms == 0 else "server-%dms" % ms, ms) for ms in (
        DELAYS_MS if metafunc.module.__name__ in FAR else [0])]
    if "both" in metafunc.fixturenames:
        metafunc.parametrize("both", [pytest.param(None, id="embedded")] + [
            pytest.param(ms, id=name, marks=pytest.mark.slow) for name, ms in delays], indirect=True)
    elif "server_home" in metafunc.fixturenames:
        metafunc.parametrize("server_home", [pytest.param(ms, id=name) for name, ms in delays], indirect=True)


def open_place(folder, monkeypatch, server=None, delay_ms=0):
    folder.mkdir(exist_ok=True)
    place = harness.Place(folder, server, delay_ms / 1000)
    monkeypatch.chdir(folder)
    for name in [n for n in os.environ if n.startswith("LABTASKER_")]:
        monkeypatch.delenv(name)
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    return place


def close_place(place):
    """End the place; what its store holds must be what its journal says."""
    forget_client()
    try:
        harness.check_store(place.folder)
    finally:
        place.close()
    harness.check_store(place.folder)


def forget_client():
    """Close what this process's calls went by; the next test's read their own configuration."""
    module = sys.modules.get("labtasker")
    if module is not None and module._client is not None:
        module._client.transport.close()
        module.use_client(None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A Place: an empty working folder with nothing started, for the embedded store."""
    place = open_place(tmp_path / "home", monkeypatch)
    yield place
    close_place(place)


@pytest.fixture
def server(tmp_path):
    """A Server with one queue."""
    with harness.Server(tmp_path / "server") as server:
        yield server
    harness.check_store(server.folder)


@pytest.fixture
def server_home(request, tmp_path, monkeypatch, server):
    """A Place whose store is on a server; this process's environment leads there too."""
    place = open_place(tmp_path / "home", monkeypatch, server, getattr(request, "param", 0))
    yield place
    close_place(place)


@pytest.fixture
def both(request, tmp_path, monkeypatch):
    """A Place, once with the embedded store and once with a server (that half is not in the quick part)."""
    server = None if request.param is None else request.getfixturevalue("server")
    place = open_place(tmp_path / "home", monkeypatch, server, request.param or 0)
    yield place
    close_place(place)
