"""Sections 15 and 16: the command line for programs. One walk over the table of commands for each rule, in this process."""
import io
import json
import os
import shlex
import signal
import sys

import harness
import labtasker
import pytest

labtasker.extras()
WORDS = {  # what stands behind a command to have it do something here; ONE is a pending task, BAD one that has failed
    "task submit": "-- --lr=9", "task get": "ONE", "task update": "-y -s pending -u priority=5", "task delete": "-y -s pending",
    "task retry": "-s failed", "task cancel": "-y -s pending", "task why": "ONE", "task wait": "--timeout 0", "task logs": "ONE",
    "task harvest": "--metric acc=([0-9.]+)", "task table": "--by args.lr --of summary.acc", "task history": "ONE",
    "queue create": "--queue-name other --password secret", "queue update": "--new-queue-name other", "queue delete": "-y --cascade",
    "worker create": "--worker-name w", "worker report": "WORKER suspended", "worker delete": "-y WORKER", "journal repair": "-y",
    "loop": "-- true %(lr)", "init": "--yes", "report": "a=1", "completion": "bash", "sbatch": "--dry-run -- true", "config": "--show",
}
LISTED = "submit ls get count update delete retry cancel wait why table history".split()  # of `task`, which have --json
ENDLESS = ("serve", "event listen", "demo", "server wait", "help")  # what starts others, or goes on for ever; `help` has an own test
UNDONE = ("journal compact", "queue pause", "queue resume")  # they change no task; what they do can be done again, or undone


class Silent(io.TextIOWrapper):
    """A pipe that nobody writes to and nobody closes, in place of stdin."""

    def __init__(self):
        read, self.held = os.pipe()
        super().__init__(open(read, "rb"))  # noqa: SIM115

    def close(self):
        super().close()
        os.close(self.held)


@pytest.fixture
def unattended(home, monkeypatch):
    """A Place with a few tasks, stdin a silent pipe; returns run(path, *more words) -> exit code, under a time limit."""
    ids = labtasker.submit_tasks([{"args": {"lr": lr}, "max_retries": 1} for lr in (1, 2, 3)])
    bad = labtasker.fetch_task().task.task_id
    labtasker.report_task_status(bad, "failed", {"acc": 0.5})
    names = {"ONE": ids[1], "BAD": bad, "WORKER": labtasker.create_worker("given")}
    monkeypatch.setattr(sys, "stdin", Silent())
    monkeypatch.setattr(labtasker, "_SILENCE_S", 0.01)
    monkeypatch.setattr(labtasker, "PATIENCE_S", 0.01)
    monkeypatch.setenv("COLUMNS", "80")

    def late(*_):
        raise AssertionError("it waits for somebody")

    def run(path, *more, words=None):
        words = [names.get(word, word) for word in shlex.split(WORDS.get(path, "") if words is None else words)]
        signal.setitimer(signal.ITIMER_REAL, 60)
        try:
            return labtasker.main(path.split() + list(more) + words)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, late)
    run.journal = home.folder / "journal.jsonl"
    yield run
    signal.signal(signal.SIGALRM, before)
    sys.stdin.close()


def one_error(text):
    """Return the error that is all of stderr."""
    error, = [json.loads(line) for line in text.splitlines()]
    assert set(error) == {"error", "kind", "exit", "hint"} and error["error"] and error["kind"] in labtasker.ERROR_KINDS
    assert error["exit"] == labtasker.ERROR_KINDS[error["kind"]]
    return error


def flags_of(path):
    return [flag for flags, _ in labtasker.COMMANDS[path].options for flag in flags]


def test_what_programs_read_is_json_in_both_forms(unattended, capsys):
    with_json = [path for path in labtasker.COMMANDS if "--json" in flags_of(path) and path not in ENDLESS]
    assert set(with_json) >= {"task " + word for word in LISTED} | {"worker ls", "queue get", "health"}
    for path in sorted(with_json, key=lambda path: path.split()[-1] in ("delete", "cancel")):  # these last
        for form in ("--json", "--fmt=json", "--fmt=jsonl"):
            code = unattended(path, form)
            out, err = capsys.readouterr()
            if code:
                assert one_error(err)["exit"] == code, path
            rows = [json.loads(out)] if form != "--fmt=jsonl" and (out or not code) else [json.loads(line) for line in out.splitlines()]
            assert rows or code or path.endswith((" ls", " table", " history")), path
            assert all(isinstance(row, (dict, list)) for row in rows), path


def test_a_mistake_with_json_among_the_words_is_one_line_of_json(unattended, capsys):
    for path in set(labtasker.COMMANDS) - {"sbatch"}:  # which passes on what it does not know
        for form in (["--json"], ["--fmt", "jsonl"], ["--fmt=json"]):
            assert unattended(path, "--nonsense", *form) == 2
            out, err = capsys.readouterr()
            assert out == "" and one_error(err)["kind"] == "usage", path
    for words in (["tsak", "ls", "--json"], ["task", "lss", "--json"], ["task", "ls", "--limit", "x", "--json"], ["--json", "task", "ls"],
                  ["task", "get", "--json"], ["task", "ls", "--json", "--fmt"]):
        assert labtasker.main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and one_error(err)["kind"] == "usage", words
    assert labtasker.main(["loop", "-j", "x", "--", "echo", "--json"]) == 2, "those are words of another command"
    assert capsys.readouterr().err.startswith("labtasker: error: loop: argument")


@pytest.mark.parametrize("words, kind, hint", [
    ("task get 00000000-0000-4000-8000-000000000000", "not_found", "labtasker task ls lists them"),
    ("task delete -y 00000000-0000-4000-8000-000000000000", "not_found", "labtasker task ls lists them"),
    ("task submit --from nothere.csv", "not_found", None),
    ("task update -y -s pending -u status=success", "refused", None),
    ("task ls -f 'args.x == resnet'", "usage", "In a shell the whole filter stands in single quotes"),
    ("task ls -s faild", "usage", "did you mean failed?"),
    ("task delete -s pending", "usage", "pass -y (--yes)"),
    ("task wait --timeout 0", "timeout", "no loop runs: start one"),
    ("task wait -s failed", "tasks_failed", "labtasker task ls -s failed"),
    ("task wait --expect 9", "refused", None),
    ("task delete", "usage", None)])
def test_an_error_has_its_kind_and_the_way_out(unattended, capsys, words, kind, hint):
    code = labtasker.main(shlex.split(words) + ["--json"])
    lines = capsys.readouterr().err.splitlines()
    error = one_error(lines[-1])
    assert error["kind"] == kind and error["exit"] == code != 0
    assert (hint or "") in (error["hint"] or "").replace(labtasker.program(), "labtasker"), error
    assert (hint is None) == (error["hint"] is None), error
    assert len(lines) == 1 or words == "task delete", "what was waited for is told as it is waited for"


@pytest.mark.parametrize("error, kind", [
    (labtasker.UsageError("x"), "usage"), (labtasker.FilterError("x", "y", 0), "usage"), (labtasker.LabtaskerConnectError("x"), "unreachable"),
    (labtasker.StoreDamaged("x"), "damaged"), (labtasker.StoreFull("x"), "refused"), (labtasker.StoreUnavailable("x"), "unreachable"),
    (labtasker.LabtaskerHTTPStatusError(401, "x"), "unauthorized"), (labtasker.LabtaskerHTTPStatusError(404, "x"), "not_found"),
    (labtasker.LabtaskerHTTPStatusError(409, "x"), "refused"), (ZeroDivisionError("x"), "bug"), (PermissionError(13, "no", "f"), "refused")])
def test_each_error_is_of_a_kind(home, monkeypatch, capsys, error, kind):
    def fail(options):
        raise error
    monkeypatch.setitem(labtasker.COMMANDS, "health", labtasker.COMMANDS["health"]._replace(run=fail))
    assert labtasker.main(["health", "--json"]) == labtasker.ERROR_KINDS[kind]
    assert one_error(capsys.readouterr().err)["kind"] == kind
    assert labtasker.main(["health"]) == labtasker.ERROR_KINDS[kind]
    assert capsys.readouterr().err.startswith("labtasker: error: ")


def test_error_kinds_have_exit_codes_that_help_tells_of():
    assert set(labtasker.ERROR_KINDS.values()) == set(labtasker.EXIT_CODES) - {0, 130}


def test_no_command_asks_or_waits_where_nobody_is(unattended, capsys):
    for path in labtasker.COMMANDS:
        if path not in ENDLESS:
            for words in ("", WORDS.get(path, "")):
                code = unattended(path, words=words)
                out, err = capsys.readouterr()
                assert code in set(labtasker.EXIT_CODES) - {130} and "Traceback" not in err, (path, code, err)
                assert code != 2 or out == "", path


def test_what_reads_ids_without_being_asked_to_gives_up_and_with_a_dash_reads_on(unattended, capsys, monkeypatch):
    for words in ("task delete -y", "task cancel", "task update -u priority=1", "loop"):
        assert labtasker.main(words.split()) == 2
        assert "nothing came from standard input" in capsys.readouterr().err
    for words in ("task cancel --json -", "task update -u priority=1 --id - --json"):
        read, write = os.pipe()
        os.write(write, labtasker.ls_tasks(status="pending").content[0].task_id.encode() + b"\n")
        os.close(write)
        with monkeypatch.context() as fed, open(read) as stdin:
            fed.setattr(sys, "stdin", stdin)
            assert labtasker.main(words.split()) == 0
        assert json.loads(capsys.readouterr().out)["changed"] == 1


def test_a_dry_run_writes_nothing_and_says_what_it_would_do(unattended, capsys):
    nouns = ("task", "queue", "worker", "journal")
    reads = [noun + " " + verb for noun in nouns for verb in "ls get count wait why logs table history verify stats".split()]
    changing = [path for path in labtasker.COMMANDS if path.split()[0] in nouns and path not in reads and path not in UNDONE]
    assert [path for path in changing if "--dry-run" not in flags_of(path)] == []
    before, names = unattended.journal.read_bytes(), sorted(os.listdir(str(unattended.journal.parent)))
    for path in changing:
        for form in [[]] + [["--json"]] * ("--json" in flags_of(path)):
            assert unattended(path, "--dry-run", *form) == 0, path
            out, err = capsys.readouterr()
            assert unattended.journal.read_bytes() == before, path
            assert "ould" in out + err or form or path == "journal repair", path
            assert not form or json.loads(out).get("changed", 0) == 0, path
    assert sorted(os.listdir(str(unattended.journal.parent))) == names


def test_counts_of_changes_are_those_of_what_was_changed(unattended, capsys):
    def run(words):
        assert labtasker.main(words.replace(" --", " --json --", 1).split() if " -- " in words else words.split() + ["--json"]) == 0
        return json.loads(capsys.readouterr().out)
    pending = sorted(labtasker.ids_of(labtasker.ls_tasks(status="pending").content))
    dry = run("task update -y -s pending -u priority=7 --dry-run")
    assert (dry["matched"], dry["changed"], sorted(dry["task_ids"])) == (2, 0, pending)
    assert run("task update -y -s pending -u priority=7") == {"matched": 2, "changed": 2}
    assert run("task cancel -y -f lr==1 --dry-run".replace("lr", "args.lr")) == {"matched": 1, "changed": 0, "task_ids": []}
    assert run("task cancel -y -f args.lr>0") == {"matched": 3, "changed": 2}
    assert run("task retry -s cancelled") == {"matched": 2, "changed": 2}
    assert run("task delete -y -s pending") == {"matched": 2, "changed": 2}
    for words in ("update -y -s running -u priority=1", "delete -y -s running", "retry -s running", "cancel -y -s running"):
        assert run("task " + words) == {"matched": 0, "changed": 0}
    assert run("task submit -- --lr=1.5")["submitted"] == 1
    again = run("task submit --unique --grid -- --lr=1.5,2.5")
    assert (again["submitted"], again["already_there"], len(again["task_ids"])) == (1, 1, 1)
    assert run("task submit --dry-run --grid -- --lr=1,2") == {"tasks": [{"args": {"lr": 1}}, {"args": {"lr": 2}}]}
    assert run("task count --by args.lr") == {"total": 3, "by": "args.lr", "counts": [[1, 1], [1.5, 1], [2.5, 1]]}
    assert dict(run("task count")["counts"]) == {"pending": 2, "running": 0, "success": 0, "failed": 1, "cancelled": 0}
    assert run("task wait -s success") == {"pending": 0, "running": 0, "success": 0, "failed": 0, "cancelled": 0, "timed_out": False}
    assert [row["task_id"] for row in run("task ls -q -s failed")] == labtasker.ids_of(labtasker.ls_tasks(status="failed").content)
    why = run("task why " + again["task_ids"][0])
    assert (why["task_id"], why["status"]) == (again["task_ids"][0], "pending") and "Pending for" in why["reasons"][0]


def test_a_result_stands_beside_its_error(unattended, capsys):
    for words, code, field in (("task wait --json --timeout 0", 124, "pending"), ("task wait --json -s failed", 4, "failed")):
        assert labtasker.main(words.split()) == code
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found[field] and found["timed_out"] is (code == 124) and one_error(err)["exit"] == code


def test_cells_of_csv_that_are_dicts_or_lists_are_json(home, capsys):
    labtasker.submit_task(args={"layers": [1, None, True, {"k": "\u00e9"}], "opt": {"lr": 0.1}}, metadata={"tags": ["a", "b"]})
    assert labtasker.main(["task", "ls", "--fmt", "csv", "--columns", "metadata,args.layers"]) == 0
    import csv
    _, (tags, layers) = csv.reader(io.StringIO(capsys.readouterr().out))
    assert json.loads(tags) == {"tags": ["a", "b"]} and json.loads(layers) == [1, None, True, {"k": "\u00e9"}]
    assert labtasker.main(["task", "ls", "--fmt", "csv"]) == 0
    again, = labtasker.tasks_of_csv("x", capsys.readouterr().out)
    assert again["args"]["layers"] == [1, None, True, {"k": "\u00e9"}] and again["metadata"] == {"tags": ["a", "b"]}


def test_config_show_tells_where_each_value_is_from_and_no_password(home, capsys, monkeypatch):
    assert labtasker.main(["config", "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queue.queue_name"] == {"value": "default", "from": "default"}
    path = str(labtasker.write_config(str(home.folder), "http://127.0.0.1:9", "filed", "hidden-one"))
    monkeypatch.setenv("LABTASKER_QUEUE", "asked")
    assert labtasker.main(["config", "--show", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {
        "folder": {"value": str(home.folder), "from": "the nearest .labtasker from here upward"},
        "endpoint.api_base_url": {"value": "http://127.0.0.1:9", "from": path}, "endpoint.ca_file": {"value": None, "from": "default"},
        "queue.queue_name": {"value": "asked", "from": "LABTASKER_QUEUE"}, "queue.password": {"value": "***", "from": path},
        "task.heartbeat_interval": {"value": 10.0, "from": path}}
    assert labtasker.main(["config", "--show"]) == 0
    out += capsys.readouterr().out
    assert "hidden-one" not in out and "setting" in out


@pytest.mark.parametrize("data", [b"", b"one", b"one\n", b"\n\n", b"a\nb\nc\n", b"a\nb\nc", b"x" * 200000 + b"\n" + b"y\n" * 100000, b"a\r\nb\r\n"])
def test_the_tail_of_a_log_is_its_last_lines(data):
    lines = data.splitlines(True) if b"\r" not in data else [b"a\r\n", b"b\r\n"]
    for number in (0, 1, 2, 3, 99999, 10 ** 6):
        begin = labtasker._begin_of_tail(io.BytesIO(data), number)
        assert data[begin:] == b"".join(lines[-number:] if number else []), number


def test_logs_print_the_end_that_was_asked_for(home, capfd):
    task_id = labtasker.submit_task(args={"x": 1}).task_id
    assert labtasker.command_loop(shell="printf 'a%(x)\\nb\\nc\\n'") == 0
    capfd.readouterr()
    for number, shown in ((0, ""), (1, "c\n"), (2, "b\nc\n"), (9, "a1\nb\nc\n")):
        assert labtasker.main(["task", "logs", task_id, "--tail", str(number)]) == 0
        assert capfd.readouterr().out.replace("\r", "") == shown


def test_a_list_of_failed_tasks_tells_the_last_line_of_a_command_that_says_only_its_exit_code(home, capsys):
    task = labtasker.submit_task(args={"x": 1}, max_retries=1)
    assert labtasker.command_loop(shell="echo OutOfMemory: tried to allocate %(x) GiB; exit 3") == 0
    capsys.readouterr()
    assert labtasker.main(["task", "ls", "-s", "failed"]) == 0
    assert "exit code 3: OutOfMemory: tried to allocate 1 GiB" in capsys.readouterr().out
    found = labtasker.ls_tasks().content
    assert "exit code 3: OutOfMemory: tried" in labtasker.telling_table(found, [task.task_id[:8]], labtasker.parse("task ls", []), 80)


def test_a_loop_that_leaves_while_its_server_is_away_has_ended_once_the_server_is_back(home, capsys, monkeypatch):
    def away(worker_id):
        raise labtasker.LabtaskerConnectError("no answer")
    labtasker.submit_task(args={"x": 1})
    with monkeypatch.context() as broken:
        broken.setattr(labtasker, "end_worker", away)
        assert labtasker.command_loop(shell="true %(x)") == 0
        assert labtasker.main(["worker", "ls", "-q"]) == 0
        worker_id = capsys.readouterr().out.strip()
    assert os.listdir(labtasker.outbox()) == ["ended-" + worker_id], "it is kept until it can be told"
    (home.folder / "outbox" / "ended-odd").write_text("{}")
    (home.folder / "outbox" / "ended-other").write_text(json.dumps({"worker_id": "x", "queue": "another", "store": "elsewhere"}))
    assert labtasker.main(["worker", "ls", "-q"]) == 0
    assert capsys.readouterr().out == "" and labtasker.ls_workers().content[0].ended_at
    assert os.listdir(labtasker.outbox()) == ["ended-other"], "another store's waits for a command there"


def test_a_listener_ends_after_so_many_events_or_once_nothing_is_to_be_done(home, capsys, monkeypatch):
    monkeypatch.setattr(labtasker, "_QUIET_S", 0.05)
    ids = labtasker.submit_tasks([{"args": {"x": x}} for x in (1, 2)])
    listen = ["event", "listen", "--after", "0.0", "--json"]
    assert labtasker.main(listen + ["--max", "0"]) == 0 and capsys.readouterr().out == ""
    assert labtasker.main(listen + ["--max", "2"]) == 0
    assert [json.loads(line)["event"]["entity_id"] for line in capsys.readouterr().out.splitlines()] == ids
    assert labtasker.main(["task", "cancel", "-q"] + ids) == 0
    assert labtasker.main(listen + ["--until-idle"]) == 0
    assert [json.loads(line)["event"]["new_state"] for line in capsys.readouterr().out.splitlines()] == ["pending"] * 2 + ["cancelled"] * 2


def runs(pid):
    try:
        return labtasker.process_stat(pid)[0] not in "ZX"
    except OSError:
        return False


def test_a_command_gets_each_event_and_one_that_fails_or_hangs_is_told_of(home, capfd, monkeypatch):
    ids = labtasker.submit_tasks([{"args": {"x": x}} for x in (1, 2)])
    listen = ["event", "listen", "--after", "0.0", "--max", "2", "--exec"]
    assert labtasker.main(listen + ["cat"]) == 0
    out, err = capfd.readouterr()
    assert [json.loads(line)["event"]["entity_id"] for line in out.splitlines()] == ids and "failed" not in err
    assert labtasker.main(listen + ["grep -q %s" % ids[0]]) == 1, "the others go on after one that failed"
    assert capfd.readouterr().err.count("the command failed, exit code 1") == 1
    assert labtasker.main(listen + ["true"]) == 0, "a command need not read"
    home.write("hang.sh", "sleep 1000 & echo $! >> pids; wait\n")
    assert labtasker.main(listen + ["sh hang.sh", "--exec-timeout", "0.2"]) == 1
    assert capfd.readouterr().err.count("it took longer than") == 2

    def interrupted(self, *_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(labtasker.sys.modules["subprocess"].Popen, "communicate", interrupted)
    assert labtasker.main(listen + ["exec sh hang.sh"]) == 130, "Ctrl-C"
    monkeypatch.undo()
    pids = [int(pid) for pid in (home.cwd / "pids").read_text().split()]
    assert len(pids) >= 2
    harness.wait_until(lambda: not any(map(runs, pids)), "what a command started has ended with it")
