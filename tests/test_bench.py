"""The benchmark counts right. How fast anything is, no test says."""
import sys

import pytest

from harness import TESTS

sys.path.insert(0, str(TESTS / "bench"))
import bench
import clients
import peers
import rates


def share(begin, end, ids):
    one = clients.Share()
    one.begin, one.end, one.ids, one.seconds = begin, end, ids, [0.1] * len(ids)
    return one


def test_a_load_counts_from_the_first_start_to_the_last_end():
    load = clients.Load([share(1.0, 3.0, [1, 2]), share(2.0, 5.0, [3, 4, 5, 6, 7, 8])])
    assert (load.rate, load.counts, load.pace) == (2.0, [2, 6], [1.0, 2.0])


@pytest.mark.parametrize("given, worked", [
    ([1, 1], [1, 1]), ([1, 2], [1]), ([1, 2], [1, 2, 2]), ([1, 2], [1, 3]), ([], [])])
def test_tasks_that_do_not_come_out_exactly_once_fail_a_measurement(given, worked):
    with pytest.raises(AssertionError):
        rates.check(*(clients.Load([share(0, 1, ids)]) for ids in (given, worked)))


def test_a_goal_is_met_by_the_median_of_the_rounds():
    def line(sign, limit, ours, theirs):
        return bench.figure(bench.Goal("row", "what", sign, limit, lambda: (ours, theirs), ())).split()[-1]
    assert line(">=", 2, [10, 20, 90], [10, 10, 10]) == "ok"
    assert line(">=", 2, [10, 19, 90], 10) == "SHORT"
    assert line("<=", 1, [10, 30], 25) == "ok"


@pytest.mark.slow
def test_our_server_gives_each_task_once(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.Workshop, "folder", str(tmp_path))
    with peers.Ours() as server:
        submitted, worked = server.submit(2, tasks=5), server.pairs(2)
        rates.check(submitted, worked)
        assert len(worked.ids) == 10
        load = clients.together(clients.batches, 2, server.port, server.login, 3, 4)
        assert len(set(load.ids)) == 24


@pytest.mark.slow
def test_a_client_that_fails_fails_the_measurement(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(peers.Workshop, "folder", str(tmp_path))
    with peers.Ours() as server:
        with pytest.raises(AssertionError, match="client process"):
            clients.together(clients.submit, 2, server.port, ("bench", "wrong"), 1)
    assert "401" in capfd.readouterr().err
