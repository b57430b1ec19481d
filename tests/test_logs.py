"""The output of runs whose folder is not the store's: its end comes with the report and is kept beside the store (sections 8 and 12)."""
import base64
import json
import os
import signal
import zlib

import pytest

import faulty
import labtasker as L
from faulty import setting
from test_faults import in_child

STATUS = "/api/v1/queues/me/tasks/%s/status"


@pytest.fixture
def store(home, monkeypatch):
    """The folder of a store without a server, which the configuration's folder is not."""
    folder = home.cwd.parent / "elsewhere"
    folder.mkdir()
    monkeypatch.setenv("LABTASKER_URL", "file:%s" % folder)
    L.use_client(None)
    home.folder = folder
    return folder


def begun(home, output=None):
    """Return the Run of a new task that was fetched here and has written `output` (bytes)."""
    (home.cwd / ".labtasker").mkdir(exist_ok=True)
    task = L.fetch_task(fetch_id=L.new_id(), attempt=L._attempt_facts()).task
    run = L.Run(task.task_id, task.run_id, None, task)
    if output is not None:
        with open(os.path.join(run.make_log_dir(), "run.log"), "wb") as file:
            file.write(output)
    return run


def report(run, status="success", **more):
    assert L.post(run, dict({"status": status, "log": True}, **more))


def kept(store):
    """Return {run id: bytes} of what is kept beside a store."""
    found = {}
    for path in store.glob("logs/*.tails"):
        with open(str(path), "rb") as file:
            for _, run_id, at, length in list(L.read_packed(file)):
                file.seek(at)
                found[run_id] = file.read(length)
    return found


@pytest.mark.parametrize("data, end", [
    (b"abc", b"abc"), (b"", b""), (b"12345678", b"12345678"),
    (b"0\n12345678", b"12345678"), (b"one\ntwo\nthree\n", b"three\n"), (b"x" * 20, b"x" * 8),
    (b"x" * 20 + b"\n", b"x" * 7 + b"\n"), (b"x" * 20 + b"\nend", b"xxxx\nend"), ("é".encode() * 10 + b"x", "éééx".encode()),
    (b"\x80" * 20, b"\x80" * 5), (b"a\x1b[31m\x00\xff\rb", b"[31m\x00\xff\rb")])
def test_an_end_begins_with_a_whole_line_or_character(data, end):
    assert L.end_of_text(data, 8) == end


def test_what_is_kept_of_a_run_elsewhere_is_its_end_as_it_was(home, store, capsys):
    line = b"\x1b[31mred\x1b[0m \xff\x00 caf\xc3\xa9 %05d\r\n"
    whole = b"".join(line % number for number in range(5000))
    L.submit_task(args={"n": 1})
    run = begun(home, whole)
    assert run.has_log_elsewhere()
    report(run)
    end, = kept(store).values()
    assert whole.endswith(end) and end.startswith(b"\x1b[31m") and L.TAIL_BYTES - 40 < len(end) <= L.TAIL_BYTES
    assert b"[31mred" not in (store / "journal.jsonl").read_bytes()

    found = L.get_log(run.task_id, None)
    assert found["size"] == len(whole) and found["text"] == end.decode("utf-8", "replace") and found["run_id"] == run.run_id
    L.Disk.rename(str(home.cwd / ".labtasker" / "logs"), str(home.cwd / "hidden"))
    capsys.readouterr()
    assert L.main(["task", "logs", run.task_id]) == 0
    shown = capsys.readouterr()
    assert "04999" in shown.out[-20:]
    assert "only the end of %d bytes" % len(whole) in shown.err

    assert L.main(["task", "harvest", "--metric", "n=caf. (0[0-9]+)"]) == 0
    said = capsys.readouterr().err
    assert "Changed 1 task;" in said and "Of the output of 1 task only the last 64 KiB are here" in said
    assert L.get_task(run.task_id).summary == {"n": 4999}

    L.delete_task(run.task_id)
    assert os.listdir(str(store / "logs")) == []


def test_harvest_counts_apart_what_is_not_here_and_says_nothing_of_an_end_that_is_all(home, store, capsys):
    for output in (b"acc 0.5\n", b"nothing\n", None):
        L.submit_task(args={"n": 1})
        report(begun(home, output))
    L.Disk.rename(str(home.cwd / ".labtasker" / "logs"), str(home.cwd / "hidden"))
    assert L.main(["task", "harvest", "--metric", "acc=acc ([0-9.]+)"]) == 0
    said = capsys.readouterr().err
    assert "Changed 1 task; 0 had the values already; the output of 1 has none" in said
    assert "; the output of 1 is not here (task logs " in said and "KiB" not in said


def test_the_output_of_a_run_that_goes_on_elsewhere_is_shown_once_it_has_ended(home, store, capsys, monkeypatch):
    """Without --follow, and where the end has not come with the report, words tell where the output is."""
    here, hidden = str(home.cwd / ".labtasker" / "logs"), str(home.cwd / "hidden")

    def shown(run, *options, code=0):
        capsys.readouterr()
        assert L.main(["task", "logs", run.task_id] + list(options)) == code
        return capsys.readouterr()

    def end(run, **more):  # at the first look
        monkeypatch.setattr(L.time, "sleep", lambda seconds: None)
        L.Disk.rename(hidden, here)
        report(run, **more)
        L.Disk.rename(here, hidden)
    L.submit_tasks([{"args": {"n": 1}}, {"args": {"n": 2}}])
    first, second = begun(home, b"one\ntwo\n"), begun(home, b"three\n")
    L.Disk.rename(here, hidden)
    host = L.get_task(first.task_id).attempts[0]["host"]
    told = shown(first, code=1).err
    assert "the output is not on this host: " in told and "; the task ran on %s; the server gets the end of it when the run ends" % host in told
    monkeypatch.setattr(L, "_ASK_S", 0)
    monkeypatch.setattr(L.time, "sleep", lambda seconds: end(first))
    said = shown(first, "-f", "--tail", "1")
    assert said.out == "two\n" and "attempt 1 of 1 on %s: running" % host in said.err
    monkeypatch.setattr(L.time, "sleep", lambda seconds: end(second, log=False))
    told = shown(second, "-f", code=1).err
    assert "the task ran on " + host in told and "the server gets the end" not in told


def test_on_a_terminal_colours_of_an_output_are_kept_and_other_codes_are_shown_as_text(home, capsys, monkeypatch):
    L.submit_task(args={"n": 1})
    run = begun(home, b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \xff\n")
    monkeypatch.setattr(L, "is_terminal", lambda stream: True)
    assert L.main(["task", "logs", run.task_id]) == 0
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \ufffd\n"


def test_packs_of_ends_go_with_their_tasks_and_with_later_runs(home, store, monkeypatch):
    monkeypatch.setattr(L, "PACK_BYTES", 200)  # one end in each
    task_id = L.submit_task(args={"n": 1}, max_retries=50).task_id
    runs = []
    for number in range(L.MOST_TAILS + 2):
        runs.append(begun(home, b"run %d\n" % number))
        report(runs[-1], "failed")
    last = runs[-L.MOST_TAILS:]
    assert kept(store) == {run.run_id: b"run %d\n" % (number + 2) for number, run in enumerate(last)}
    L.update_tasks([L.TaskUpdateRequest(task_id=task_id, status="cancelled")])
    other = L.submit_task(args={"n": 2}).task_id
    report(begun(home, b"other\n"))
    L.delete_task(task_id)
    assert list(kept(store).values()) == [b"other\n"] and L.get_log(other, None)["text"] == "other\n"
    L.delete_queue(cascade_delete=True)
    assert os.listdir(str(store / "logs")) == []


def test_many_runs_elsewhere_leave_few_files_in_the_store(home, store):
    ids = L.submit_tasks([{"args": {"n": number}} for number in range(setting("SHORT_RUNS") // 10)])
    ids = [getattr(each, "task_id", each) for each in ids]
    for number in range(len(ids)):
        report(begun(home, b"run %d\n" % number))
    assert len(list((store / "logs").iterdir())) == 1
    for _ in range(2):
        for number, task_id in enumerate(ids):
            assert L.get_log(task_id, None)["text"] == "run %d\n" % number
        L.client().transport.close()  # the next one opens the store anew
        L.use_client(None)
    for task_id in ids:
        L.delete_task(task_id)
    assert os.listdir(str(store / "logs")) == []


def test_ends_that_an_older_version_kept_are_read_and_go_with_their_task(home, store):
    task_id = L.submit_task(args={"n": 1}).task_id
    run = begun(home, b"new\n")
    folder = store / "logs" / task_id / run.run_id
    folder.mkdir(parents=True)
    (folder / "tail.log").write_text("old\n")
    report(run)
    assert L.get_log(task_id, None)["text"] == "old\n" and kept(store) == {}
    L.delete_task(task_id)
    assert os.listdir(str(store / "logs")) == []


def test_an_end_that_was_cut_off_costs_no_other_one(tmp_path):
    """A process may be killed at any byte; others that have the store open find what it has added, and what follows."""
    def add(tails, name, data):
        return tails.add("queue", (name, "run"), data)
    for at in range(0, 140, 3):
        folder = tmp_path / str(at)
        folder.mkdir()
        one, other = L._Tails(str(folder)), L._Tails(str(folder))
        assert add(one, "first", b"1\n") and other.find(("first", "run")) == b"1\n"
        path = folder / "logs" / "queue-0.tails"
        before = path.read_bytes()
        add(one, "second", b"2\n")
        cut = path.read_bytes()[:len(before) + at]
        path.write_bytes(cut)
        is_whole = cut.endswith(b"2\n\n{}\n")
        assert other.find(("second", "run")) == (b"2\n" if is_whole else None)
        assert not add(other, "third", b"3\n")
        for tails in (other, L._Tails(str(folder))):
            assert [tails.find((name, "run")) for name in ("first", "third", "none")] == [b"1\n", b"3\n", None], at


def test_no_kill_loses_an_end_that_was_acknowledged(home, store, monkeypatch):
    monkeypatch.setattr(L, "PACK_BYTES", 400)  # two ends in each
    killed, lines = 0, 0
    for number in range(setting("PACK_KILLS") // 2):
        L.submit_tasks([{"args": {"n": n}} for n in range(3)])
        L.client().transport.close()  # the child opens the store itself
        L.use_client(None)

        def work(say):
            L.use_client(None)
            disk = faulty.KillingDisk(1 + number % 12, ("before", "half", "after")[number % 3])
            for name, function in disk.functions.items():
                setattr(L.Disk, name, staticmethod(function))
            for _ in range(3):
                run = begun(home, b"output\n")
                report(run)
                say("%s %s" % (run.task_id, run.run_id))
        said, status = in_child(work)
        assert not [line for line in said if line.startswith("child:")], said
        killed, lines = killed + (status == signal.SIGKILL), lines + len(said)
        assert [L.get_log(*line.split())["text"] for line in said] == ["output\n"] * len(said)
        L.update_tasks([L.TaskUpdateRequest(task_id=task.task_id, status="cancelled") for task in L.ls_tasks(limit=100).content
                        if task.status in ("pending", "running")])
    assert killed > setting("PACK_KILLS") // 4 and lines


def test_a_pack_to_which_another_process_has_just_added_stays(tmp_path):
    one, other = L._Tails(str(tmp_path)), L._Tails(str(tmp_path))
    one.add("queue", ("a", "run"), b"1")
    one.find(("a", "run"))
    other.add("queue", ("b", "run"), b"2")
    one.drop("queue", lambda keys: keys.index(("b", "run")))
    assert other.find(("b", "run")) == b"2" == one.find(("b", "run"))
    other.drop("queue", len)
    assert one.find(("b", "run")) is None and os.listdir(str(tmp_path / "logs")) == []
    assert one.add("queue", ("c", "run"), b"3") and other.find(("c", "run")) == b"3"


def test_nothing_is_sent_where_the_output_lies_beside_the_store(home, monkeypatch):
    monkeypatch.setattr(L, "end_of_log", None)
    L.submit_task(args={"n": 1})
    run = begun(home, b"here\n")
    assert L.is_beside_store() and not run.has_log_elsewhere()
    assert L.post(run, {"status": "success"}) and kept(home.folder) == {}
    assert L.get_log(run.task_id, run.run_id)["text"] == "here\n"
    assert "log" in L.OUR_FIELDS["POST", "status"]  # others are not sent it


def test_what_can_not_be_kept_fails_no_report(home, store, capsys):
    def reported(output, **more):
        task_id = L.submit_task(args={"n": 1}).task_id
        capsys.readouterr()
        report(begun(home, output), **more)
        assert L.get_task(task_id).status == "success"
        return task_id, capsys.readouterr().err
    (store / "logs").write_text("in the way")
    assert "is not kept" in reported(b"output\n")[1]
    (store / "logs").unlink()
    assert reported(None)[1] == "" and kept(store) == {}  # there was none

    task_id = L.submit_task(args={"n": 1}).task_id
    secret = home.cwd / "secret"
    secret.mkdir()
    (store / "logs").mkdir(exist_ok=True)
    (store / "logs" / task_id).symlink_to(secret)
    (store / "logs" / (L.get_task(task_id).queue_id + "-0.tails")).symlink_to(secret / "other")
    run = begun(home, b"output\n")
    report(run)
    assert "is not kept" in capsys.readouterr().err and os.listdir(str(secret)) == []
    (secret / run.run_id).mkdir()
    (secret / run.run_id / "tail.log").write_text("a secret")
    assert L.get_log(task_id, run.run_id)["text"] is None
    L.delete_task(task_id)
    assert (secret / run.run_id / "tail.log").exists()


def test_a_full_disk_loses_the_output_and_leaves_no_part_of_it(home, store, capsys, monkeypatch):
    L.submit_task(args={"n": 1})
    run, write = begun(home, b"o" * 700), L.Disk.write

    def full(fd, data):
        if b"ooooo" in bytes(data):
            if not bytes(data).startswith(b"{"):
                raise OSError(28, "No space left on device")
            return write(fd, data[:300])
        return write(fd, data)
    monkeypatch.setattr(L.Disk, "write", full)
    report(run)
    assert L.get_task(run.task_id).status == "success" and kept(store) == {}
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("sent", ["", "no base64!", "YWJj", base64.b64encode(zlib.compress(b"x" * 10 ** 8)).decode(), "x" * 10 ** 6, 3])
def test_output_that_is_none_is_refused_or_bounded(home, store, sent, capsys):
    L.submit_task(args={"n": 1})
    run = begun(home)
    status, answer = L.client().transport.call("POST", STATUS % run.task_id, None, json.dumps(
        {"status": "success", "run_id": run.run_id, "log": sent}))
    is_bad = not isinstance(sent, str) or len(sent) > L.LOG_LETTERS
    assert status == (422 if is_bad else 200), answer
    assert L.get_task(run.task_id).status == ("running" if is_bad else "success")
    assert all(len(data) <= L.TAIL_BYTES for data in kept(store).values())
    assert bool(kept(store)) == (len(str(sent)) > 10 ** 4 and not is_bad)


def test_a_report_that_waits_brings_the_output_later(home, store):
    L.submit_task(args={"n": 1})
    run = begun(home, b"output\n")
    L.keep_report(run, {"status": "success", "summary": {"acc": 1}, "log": True})
    path, = L.outbox_reports()
    assert os.path.getsize(path) < 1000  # the output lies beside it already
    assert L.deliver_kept() == 1 and L.outbox_reports() == []
    assert list(kept(store).values()) == [b"output\n"] and L.get_task(run.task_id).summary == {"acc": 1}


def test_a_run_that_others_have_ended_has_its_output_kept_and_changes_nothing(home, store):
    for number, end in enumerate((lambda task_id: L.report_task_status(task_id, "cancelled"),
                                  lambda task_id: L.update_tasks([L.TaskUpdateRequest(task_id=task_id, status="pending")]),
                                  L.delete_task)):
        task_id = L.submit_task(args={"n": number}, priority=number).task_id
        run = begun(home, b"output\n")
        assert run.task_id == task_id
        end(task_id)
        before = [task.to_dict() for task in L.ls_tasks(task_id=task_id).content]
        L.send_log_of_lost(run)
        assert [task.to_dict() for task in L.ls_tasks(task_id=task_id).content] == before
        assert (run.run_id in kept(store)) == bool(before)


def test_another_queue_does_not_reach_it(home, store, monkeypatch):
    task_id = L.submit_task(args={"n": 1}).task_id
    run = begun(home, b"output\n")
    report(run)
    L.create_queue("other", "password")
    monkeypatch.setenv("LABTASKER_QUEUE", "other")
    L.use_client(None)
    with pytest.raises(L.LabtaskerHTTPStatusError, match="no task"):
        L.get_log(task_id, run.run_id)
    L.client().call("POST", "/api/v1/queues/me/tasks", {"args": {"n": 1}, "task_id": task_id})
    for run_id in (run.run_id, "..", "."):
        with pytest.raises(L.LabtaskerHTTPStatusError, match="no run|an id"):
            L.get_log(task_id, run_id)
    other = L.client().call("POST", "/api/v1/queues/me/tasks/next", {"fetch_id": run.run_id, "attempt": {"run_id": run.run_id}})["task"]
    assert other["task_id"] == task_id and other["run_id"] != run.run_id
    L.client().call("POST", STATUS % task_id, {"status": "success", "run_id": other["run_id"], "log": L.packed_log(b"other\n")})
    L.delete_task(task_id)
    assert list(kept(store).values()) == [b"output\n"]


@pytest.mark.slow
def test_loops_of_another_folder_leave_their_output_with_the_server(server_home, server):
    """Two folders on one host: a command, a function, and what they printed, by HTTP and the command line, where their own
    folder is away."""
    home = server_home
    ids = [home.submit("--", "--n=%d" % number) for number in (1, 2)]
    home.cli("loop", "-f", "args.n == 1", "--", "sh", "-c", "echo out of $0; exit 3", "%(n)")
    home.python("import labtasker\n\n@labtasker.loop()\ndef work(n=labtasker.Required()):\n    print('function', n)\n"
                "    labtasker.finish('success')\nwork()\n", env={"PYTHONPATH": str(L.THIS_FILE).rpartition("/")[0]})
    (home.cwd / ".labtasker" / "logs").rename(home.cwd / "hidden")
    for task_id, text in zip(ids, ("out of 1\n", "function 2\n")):
        assert home.cli("task", "logs", task_id).stdout == text
        status, found, _ = server.http("GET", "/api/v1/queues/me/tasks/%s/log" % task_id)
        assert (status, found["text"]) == (200, text) and found["path"].startswith(str(home.cwd))
    assert not (server.folder / "outbox").exists() and "not kept" not in server.output()
    home.cli("task", "delete", "-y", *ids)
    assert os.listdir(str(server.folder / "logs")) == []
