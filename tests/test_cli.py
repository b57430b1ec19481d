"""Section 10: the command line. Real processes in real folders; the pure parts by import."""
import csv
import decimal
import fcntl
import glob
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import types

import harness
import labtasker
import labtasker_cli
import pytest
from conftest import forget_client
from hypothesis import given
from hypothesis import strategies as st
from labtasker import UsageError

MISSING = "00000000-0000-4000-8000-000000000000"


def submit_some(place):
    """Submit three tasks and return their ids in that order."""
    place.cli("task", "submit", "--name", "sweep", "--metadata", '{"tags": ["v1"]}', "--", "--lr=0.1", "--model=vit")
    place.cli("task", "submit", "--name", "sweep", "--", "--lr=0.2", "--model=resnet")
    place.cli("task", "submit", "--", "--lr=0.3", "--opt.name=adam")
    return [task["task_id"] for task in place.tasks()]


# ---- what bad input gets: exit code, words on stderr; never a traceback, nothing on stdout, nothing done

BAD = [
    # command line, exit code, words in the message
    ("", 2, ["usage", "task submit"]),
    ("tsak ls", 2, ["no command tsak", "task"]),
    ("task lss", 2, ["no command task lss", "did you mean ls"]),
    ("task", 2, ["submit, ls", "logs"]),
    ("task watch", 2, ["did you mean watch"]),
    ("ls", 2, ["did you mean task ls"]),
    ("task ls --staus pending", 2, ["--staus", "did you mean --status"]),
    ("task ls -s faild", 2, ["faild", "did you mean failed", "pending, running"]),
    ("task ls --limit ten", 2, ["--limit", "ten"]),
    ("task ls --limit -5", 2, ["--limit"]),
    ("task ls --fmt xml", 2, ["xml", "table, json, jsonl, yaml, csv"]),
    ("task ls --fmt", 2, ["--fmt"]),
    ("task ls extra", 2, ["unexpected argument extra"]),
    ("task ls -S argz.lr:desc", 2, ["argz.lr", "did you mean args", "task_name"]),
    ("task ls -S args.lr:down", 2, ["asc or desc", "down"]),
    ("task ls -f args.lr=1", 2, ["equality is written ==", "\n         ^"]),
    ("task ls -f argz.lr==1", 2, ["argz", "args", "^"]),
    ("task ls -f 'status != \"failed\"'", 2, ["there is no !="]),
    ("task ls -f 'not status'", 2, ["there is no not"]),
    ("task ls -f 'created_at > date(\"3 blue moons ago\")'", 2, ["3 blue moons ago", "3 hours ago"]),
    ("task ls -f '{\"args.lr\": {\"$grt\": 1}}'", 1, ["$grt"]),
    ("task ls -f '{\"args.lr\": '", 2, ["--extra-filter", "JSON or a Python literal"]),
    ("task ls --id nothere", 1, ["no task nothere"]),
    ("task get " + MISSING, 1, ["no task " + MISSING]),
    ("task ls --id ''", 1, ['no task ""']),
    ("task ls -f ''", 2, ["filter"]),
    ("task delete -y -s pending -f ''", 2, ["filter"]),
    ("task update -q --name '' -u priority=1", 0, ["Nothing matches"]),
    ("task submit --args '' -- --lr=1", 2, ["--args"]),
    ("task get", 2, ["ID"]),
    ("task count --by argz.lr", 2, ["argz.lr", "args"]),
    ("task submit", 2, ["needs arguments or a command"]),
    ("task submit --", 2, ["needs arguments or a command"]),
    ("task submit --lr=0.1", 2, ["--lr", "goes after --"]),
    ("task submit lr=0.1", 2, ["unexpected lr", "goes after --"]),
    ("task submit --nmae x -- --lr=1", 2, ["--nmae", "did you mean --name"]),
    ("task submit -- lr=0.1", 2, ["--name=value", "lr=0.1"]),
    ("task submit -- --lr=1 --lr=2", 2, ["--lr", "twice"]),
    ("task submit -- --a-b=1 --a_b=2", 2, ["--a_b", "twice"]),
    ("task submit -- --a=1 --a.b=2", 2, ["--a and --a.b collide"]),
    ("task update 8cdb6aaa -u priority=1", 2, ["a single task is chosen by --id 8cdb6aaa"]),
    ("task submit -- '--a b=1'", 2, ["the key 'a b'"]),
    ("task submit -- --a..b=1", 2, ["a..b"]),
    ("task submit --args '{\"a\": 1}' -- --a=2", 2, ["a", "twice"]),
    ("task submit --args '{\"a\": {\"b\": 1}}' -- --a.b=2", 2, ["collide"]),
    ("task submit --args '{\"a\": 1, \"a\": 2}'", 2, ["--args", "'a'", "twice"]),
    ("task submit --args '[1]'", 2, ["--args", "dict", "[1]"]),
    ("task submit --args '{a: 1}'", 2, ["--args", "JSON or a Python literal"]),
    ("task submit --metadata nonsense -- --lr=1", 2, ["--metadata", "JSON or a Python literal"]),
    ("task submit --name 'two words' -- --lr=1", 2, ["task_name", "two words"]),
    ("task submit --priority high -- --lr=1", 2, ["--priority", "high"]),
    ("task submit --max-retries -1 -- --lr=1", 2, ["--max-retries"]),
    ("task submit --task-timeout soon -- --lr=1", 2, ["--task-timeout", "soon", "1h30m"]),
    ("task submit --grid -- --lr=5:1:1", 2, ["--lr=5:1:1", "range"]),
    ("task submit --grid -- --lr=1:5:0", 2, ["--lr=1:5:0", "range"]),
    ("task submit --from nothere.csv", 1, ["nothere.csv", "No such file"]),
    ("task submit --from bad.jsonl", 2, ["bad.jsonl line 2", "JSON"]),
    ("task submit --from wide.csv", 2, ["wide.csv line 3", "3 cells"]),
    ("task submit --from odd.jsonl", 2, ["odd.jsonl line 1", "proirity", "did you mean priority"]),
    ("task submit --from empty.csv", 2, ["empty.csv", "no task"]),
    ("task submit --grid --from wide.csv", 2, ["exclude"]),
    ("task submit --sample 2 --grid -- --x=0:1", 2, ["--grid and --sample exclude"]),
    ("task submit --sample 2 --from wide.csv", 2, ["--sample and --from exclude"]),
    ("task submit --sample 0 -- --x=0:1", 2, ["1 to 1000000 tasks, not 0"]),
    ("task submit --sample 2", 2, ["needs something to draw", "--lr=log:"]),
    ("task submit --seed 3 -- --x=1", 2, ["belongs to --sample", "-- --seed=3"]),
    ("task update -u priority=1", 0, ["Nothing matches"]),
    ("task update -s failed", 2, ["-u field=value"]),
    ("task update -s failed -u nosuch=1", 2, ["nosuch", "priority", "args"]),
    ("task update -s failed -u created_at=1", 2, ["created_at", "priority"]),
    ("task update -s failed -u priority", 2, ["field=value"]),
    ("task update -s failed -u priority.x=1", 2, ["priority.x"]),
    ("task update -s failed -u args.a=1 -u args.a=2", 2, ["args.a", "twice"]),
    ("task update -s failed -u args.a=1 -u args.a.b=2", 2, ["collide"]),
    ("task update -q -s pending -u priority=high", 2, ["priority", "high"]),
    ("task update -q -s pending -u args=3", 2, ["args"]),
    ("task update -q -s pending -u status=done", 2, ["status", "done", "cancelled"]),
    ("task update -q -s pending -u status=running", 1, ["can be set to cancelled, not to running, which only a loop does"]),
    ("task update -q -s pending -u status=success", 1, ["error: task ", "is pending; its status can be set to cancelled, not to success"]),
    ("task update --id %s -u priority=1" % MISSING, 1, ["no task " + MISSING]),
    ("task delete " + MISSING, 1, ["no task " + MISSING]),
    ("task delete -s pending", 2, ["--yes"]),
    ("task delete abc --status failed", 2, ["not both"]),
    ("worker report nothere crashed", 1, ["nothere"]),
    ("worker report nothere broken", 2, ["broken", "crashed"]),
    ("queue create --queue-name 'a b' --password x", 2, ["queue_name"]),
    ("queue create --password x", 2, ["--queue-name"]),
    ("queue create --queue-name x", 2, ["--password"]),
    ("queue update", 2, ["--new-queue-name"]),
    ("queue delete", 2, ["--yes"]),
    ("init", 2, ["--url"]),
    ("init --url ftp://x --yes", 2, ["ftp://x", "http://"]),
    ("init --url http://127.0.0.1:9 --yes", 2, ["--password"]),
    ("init --url http://127.0.0.1:9 --queue-name 'a b' --password x", 2, ["a b"]),
    ("config", 2, ["no terminal is here", "labtasker config --show", "labtasker init"]),
    ("help nosuch", 2, ["nosuch", "api, events, exit, filter, journal, settings"]),
    ("task ls -f 'args.model == resnet'", 2, ["unknown field resnet", 'a text is written in quotes: "resnet"', "In a shell", "^"]),
    ("task ls -f 'args.model in [resnet-50]'", 2, ['in quotes: "resnet-50"']),
    ("task ls -f 'resnet == args.model'", 2, ['in quotes: "resnet"']),
    ("task ls -f 'args.path == /data/x'", 2, ['in quotes: "/data/x"']),
    ("task ls -f 'args.model == 3dunet'", 2, ['in quotes: "3dunet"']),
    ("task ls -f 'args.version == 1.2.3'", 2, ['in quotes: "1.2.3"']),
    ("task ls -f 'args.url == http://x'", 2, ["':' means nothing", "in quotes"]),
    ("task ls -f 'created_at > yesterday'", 2, ['date("yesterday")']),
    ("task ls -f 'args.my-key == 1'", 2, ['args["my-key"]']),
    ("task ls -f 'tags == 1'", 2, ["did you mean args.tags, summary.tags or metadata.tags?"]),
    ("task ls -f 'name == 1'", 2, ["did you mean task_name"]),
    ("task ls -f args.lr == 1", 2, ["unexpected == after -f args.lr", "in single quotes"]),
    ("worker ls -f 'gpu == 1'", 2, ["did you mean metadata.gpu?"]),
    ("task count --by lr", 2, ["--by", "no field lr; did you mean args.lr?"]),
    ("task ls --columns lr", 2, ["--columns", "did you mean args.lr?"]),
    ("task ls -S lr:desc", 2, ["--sort", "did you mean args.lr?"]),
    ("task ls -S acc", 2, ["did you mean args.acc, summary.acc or metadata.acc?"]),
    ("task ls -S statsu", 2, ["did you mean status?"]),
    ("task update -y -s pending -u lr=1", 2, ["can't update lr; did you mean args.lr?"]),
    ("task update -y -s pending -- args.lr=1 --reset-pending", 2, ["--reset-pending is an option: it goes before --"]),
    ("task update -y -s pending -u created_at=1", 2, ["created_at; labtasker alone sets it"]),
    ("task update -s pending -u priority=1", 2, ["-y (--yes)"]),
    ("task cancel -s pending", 2, ["Cancel 3 tasks?", "-y (--yes)"]),
    ("task cancel " + MISSING, 1, ["no task " + MISSING]),
    ("task cancel -y -s success", 0, ["Nothing matches: nothing was cancelled"]),
    ("task submit -- --lr=1 --dry-run", 2, ["--dry-run after --", "task submit --dry-run -- ...", "--dry-run=True"]),
    ("task submit -- --lr=1 -q", 2, ["-q after --"]),
    ("task submit -- --grid --lr=1,2", 2, ["--grid after --"]),
    ("task submit -- --help", 2, ["--help after --"]),
    ("task logs x --fmt json", 2, ["unknown option --fmt, an option of task submit, task ls, task get"]),
    ("task count --dry-run", 2, ["unknown option --dry-run, an option of task submit, task update, task delete"]),
    ("task update -y -s pending --dry-run -u status=success", 1, ["can be set to cancelled, not to success"]),
    ("task update -s pending --dry-run -u lr=1", 2, ["can't update lr; did you mean args.lr?"]),
    ("task update -s pending --dry-run", 2, ["-u field=value"]),
    ("task update -s pending --dry-run --editor", 2, ["--editor goes without"]),
    ("task ls --fmt jsno", 2, ["did you mean json?"]),
    ("task rm", 2, ["did you mean task delete?"]),
    ("list", 2, ["did you mean task ls or worker ls?"]),
    ("cancel x", 2, ["did you mean task cancel?"]),
    ("--fmt json task ls", 2, ["options go after the command"]),
    ("loop -- -j 2 python train.py", 2, ["-j is no program", "before --"]),
    ("loop", 2, ["what to run"]),
    ("loop python train.py", 2, ["goes after --"]),
    ("loop -c 'echo %(lr)' -- echo", 2, ["exclude"]),
    ("loop -- echo '%(lr'", 2, ["%(lr", "^"]),
    ("loop -c 'echo %(lr'", 2, ["%(lr", "^"]),
    ("loop --script-path nothere.sh", 1, ["nothere.sh"]),
    ("loop -f 'argz.lr > 1' -- echo", 2, ["argz", "^"]),
    ("loop --eta-max soon -- echo", 2, ["--eta-max", "soon"]),
    ("loop --heartbeat-timeout soon -- echo", 2, ["--heartbeat-timeout", "soon"]),
]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A Place with three pending tasks, that no command line of BAD may change."""
    place = harness.Place(tmp_path_factory.mktemp("crowded"))
    submit_some(place)
    place.write("bad.jsonl", '{"lr": 1}\n{"lr": \n')
    place.write("odd.jsonl", '{"args": {"lr": 1}, "proirity": 3}\n')
    place.write("wide.csv", "lr,model\n1,vit\n2,vit,3\n")
    place.write("empty.csv", "lr,model\n")
    yield place
    place.close()


@pytest.mark.parametrize("line, code, words", BAD, ids=[row[0] or "nothing" for row in BAD])
def test_bad_input_gets_one_clear_message(crowded, monkeypatch, capsys, line, code, words):
    journal = crowded.folder / "journal.jsonl"
    before = journal.read_bytes()
    monkeypatch.chdir(crowded.cwd)
    monkeypatch.setattr(sys, "argv", ["labtasker"])
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        returned = labtasker.main(shlex.split(line))
    forget_client()
    result = harness.Result([line], returned, *capsys.readouterr())
    assert result.returncode == code, result
    for word in words:
        assert word in result.stderr, result
    assert "Traceback" not in result.stderr and "bug" not in result.stderr, result
    assert result.stdout == "", result
    assert journal.read_bytes() == before
    assert not (crowded.folder / "config.toml").exists()


@pytest.mark.parametrize("line, code, words", [row for row in BAD if row[0] in ("", "tsak ls", "task ls -f argz.lr==1", "task update -q -s pending -u status=success")])
def test_the_message_of_a_process_goes_to_stderr_alone(crowded, line, code, words):
    result = crowded.cli(*shlex.split(line), check=False)
    assert result.returncode == code and result.stdout == "" and all(word in result.stderr for word in words), result


@pytest.mark.slow
def test_a_wrong_password_says_where_it_comes_from(server_home):
    result = server_home.cli("task", "ls", check=False, env={"LABTASKER_PASSWORD": "wrong"})
    assert result.returncode == 3, result
    for word in (server_home.server.queue, "password", "LABTASKER_", server_home.server.url):
        assert word in result.stderr, result


def test_a_server_that_is_not_there_is_named(home):
    result = home.cli("task", "ls", check=False, env={"LABTASKER_URL": "http://127.0.0.1:9", "LABTASKER_QUEUE": "q",
                                                      "LABTASKER_PASSWORD": "p"})
    assert result.returncode == 3 and "http://127.0.0.1:9" in result.stderr, result
    assert "Traceback" not in result.stderr, result


# ---- help

@pytest.mark.parametrize("path", [""] + sorted({path.split()[0] for path in labtasker.COMMANDS if " " in path}) + [
    path for path, row in labtasker.COMMANDS.items() if row.help])
def test_help_fits_a_screen_and_ends_with_an_example(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = labtasker.help_of(path).split("\n")
    example = [line for line in lines if line.startswith("example: ")]
    assert len(example) == 1 and ("labtasker " + path).rstrip() in example[0]
    assert all(line.startswith(" " * 9) for line in lines[lines.index(example[0]) + 1:])
    assert len(lines) <= (34 if path in ("loop", "task submit") else 23), len(lines)  # of 24: the prompt comes after them
    assert max(map(len, lines)) <= 80, max(lines, key=len)


@pytest.mark.parametrize("path", [path for path, row in labtasker.COMMANDS.items() if row.help])
def test_help_tells_every_option(path):
    words = re.split(r"[\s,]+", labtasker.help_of(path))
    for flags, settings in labtasker.COMMANDS[path].options:
        for name in flags if flags[0].startswith("-") else [settings["metavar"]]:
            assert name in words or re.sub("^--(no-)?", "--[no-]", name) in words, name


def test_help_on_retry_says_what_it_does_without_ids():
    """It reads no ids from stdin, unlike the other commands that take some."""
    text = " ".join(labtasker.help_of("task retry").split())
    assert "without ids and selectors, all failed ones" in text and "stdin" not in text


def test_help_settings_names_every_variable_that_is_read_from_the_environment_of_a_user():
    """Those of a job and of its loop are set by the loop; nobody sets them by hand."""
    text = labtasker.settings_reference()
    read = set(re.findall(r'environ(?:\.get\(|\[)"(LABTASKER_[A-Z_]+)', harness.MODULE.read_text(encoding="utf-8")))
    set_by_the_loop = {"LABTASKER_" + name for name in ("TASK_ID", "RUN_ID", "STORE", "CURRENT", "END_CLOCK", "END_TIME", "PROCID", "TASK_DIR", "SOURCE")}
    assert read > {"LABTASKER_TRUST", "LABTASKER_DEBUG"} | set_by_the_loop
    assert not [name for name in read - set_by_the_loop if name not in text]


def listed():
    """Return the commands that `labtasker --help` tells of: on a line of their own, or with others."""
    found = set()
    for line in labtasker.help_of("").split("\n"):
        row, *more = re.split(" {2,}", line.strip())
        for words in row.split("; "):
            first, *others = words.split(", ")
            found.update([first] + others + [first.split()[0] + " " + other for other in others] * (not more))
    return found


@pytest.mark.parametrize("path", [path for path, row in labtasker.COMMANDS.items() if row.help])
def test_every_command_is_found_from_the_list(path):
    assert path in listed() or path == "help"


@pytest.mark.parametrize("flags, value", [([], None), (["--ansi"], True), (["--no-ansi"], False), (["--ansi", "--no-ansi"], False)])
def test_a_switch_has_two_flags_in_one_row(flags, value):
    assert labtasker.parse("task ls", flags).ansi is value
    assert labtasker.help_of("task ls").count("ansi") == 1


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["task", "--help"], ["task", "submit", "--help"], ["help"],
                                   ["help", "task"], ["help", "task", "submit"]])
def test_help_is_found_everywhere(home, words):
    result = home.cli(*words)
    assert "task submit" in result.stdout and "example:" in result.stdout


@pytest.mark.parametrize("topic, words", [
    ("filter", ["$regex", "date(...)", "summary", "==", "3 hours ago"]),
    ("settings", ["LABTASKER_URL", "heartbeat_interval"]),
    ("events", ["with labtasker.connect_events() as listener:", "Last-Event-ID", "event listen --raw", "0.0"]),
    ("exit", ["    %d  %s" % row for row in labtasker.EXIT_CODES.items() if row[0] < 10] + ["  124  ", "  130  "]),
    ("api", ["POST /api/v1/queues/me/tasks/next", "required_fields"])])
def test_references_are_printed_from_the_tables(home, topic, words):
    text = home.cli("help", topic).stdout
    for word in words:
        assert word in text


def test_version(home):
    assert home.cli("--version").stdout == "labtasker %s\n" % labtasker.__version__


def test_every_command_line_in_help_and_examples_can_be_parsed():
    import shlex
    examples = [line for row in labtasker.COMMANDS.values() for line in row.example.split("\n") if row.help]
    assert len(examples) > 20
    for line in examples:
        for part in line.split(" | "):
            words = shlex.split(part.split(" && ")[0])
            words = words[words.index("labtasker") + 1:]
            path, rest = labtasker.find_command(words)
            labtasker.parse(path, rest)


def test_only_the_parser_of_the_typed_command_is_built(monkeypatch):
    import argparse
    built = []
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument",
                        lambda self, *flags, **_: built.append(flags), raising=True)
    labtasker.make_parser("journal stats")
    assert [flags for flags in built if flags != ("-h", "--help")] == [("--db-path",)]


# ---- values and arguments

@pytest.mark.parametrize("text, value", [
    ("1", 1), ("-1", -1), ("0.1", 0.1), ("1e-3", 0.001), ("1e3", 1000.0), ("True", True), ("None", None),
    ("resnet", "resnet"), ("", ""), ("[1,2]", [1, 2]), ("(1, 2)", [1, 2]), ("{'a': 1}", {"a": 1}), ("{1: 2}", {"1": 2}),
    ("'7'", "7"), ('"x y"', "x y"), ("hello world", "hello world"), ("007", "007"), ("1+1", "1+1"), ("1j", "1j"),
    ("b'x'", "b'x'"), ("{1, 2}", "{1, 2}"), ("...", "..."), ("#fff", "#fff"), (" 3", 3), ("nan", "nan"), ("[" * 500, "[" * 500),
    ("1is", "1is"), (r"'\d'", r"\d"), ("{[]: 1}", "{[]: 1}"), ("/a/b.txt", "/a/b.txt"), ("true", "true"),
    ("日本", "日本"), ("a=b", "a=b")])
def test_literal(text, value):
    found = labtasker.literal(text)
    assert found == value and type(found) is type(value)


KEPT_AS_TEXT = ["31e8473", "1e-400", "2024_01_15", "0x1F", "0b1", "00", "00123e4", "1e400", "-1e400", "18446744073709551616",
                "0.1234567890123456789", "2.5e-324", "1" * 5000, " 1_0"]
KEPT_AS_NUMBERS = [("1e23", 1e23), ("1.10", 1.1), ("18446744073709551615", 2 ** 64 - 1), ("-9223372036854775808", -2 ** 63), ("5e-324", 5e-324),
                   ("9007199254740993", 9007199254740993), ("+0.1", 0.1), ("1E5", 100000.0), ("-.5", -0.5), ("5.", 5.0),
                   ("0.30000000000000004", 0.1 + 0.2)]


@pytest.mark.parametrize("text, value", [(text, text) for text in KEPT_AS_TEXT] + KEPT_AS_NUMBERS)
def test_a_number_that_would_come_out_as_another_text_stays_text_by_every_way_in(text, value):
    ways = {"flag": labtasker.literal(text), "update": labtasker.typed_value(text, "x"),
            "grid": labtasker.grid_values("x", text)[0], "csv": labtasker.tasks_of_csv("x", 'a\n"%s"\n' % text)[0]["args"]["a"],
            "python": labtasker.typed_value("{'a': [%s]}" % text, "x")["a"][0]}
    assert {way: (type(found), found) for way, found in ways.items()} == dict.fromkeys(ways, (type(value), value)) or (
        text.startswith(" ") and ways.pop("python") == text.strip() and set(ways.values()) == {text})


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-2 ** 63, 2 ** 64 - 1)))
def test_every_number_comes_out_as_it_was_written(number):
    for text in (repr(number), json.dumps(number)):
        for read in (labtasker.literal, lambda text: labtasker.typed_value(text, "x"), lambda text: labtasker.dict_of('{"a": %s}' % text, "x")["a"]):
            assert (type(read(text)), repr(read(text))) == (type(number), repr(number))


@given(st.text("0123456789.eE_+-x", min_size=1, max_size=9))
def test_what_is_read_as_a_number_is_that_number(text):
    found = labtasker.literal(text)
    assert found == text or decimal.Decimal(text) == decimal.Decimal(repr(found))


@pytest.mark.parametrize("text, found", [
    ("[31e8473, 1e-400, 2024_01_15, 1]", ["31e8473", "1e-400", "2024_01_15", 1]), ("['1_0', 1_0]", ["1_0", "1_0"]),
    ('{"a": 1e400, "b": NaN}', {"a": "1e400", "b": float}), ("{1: 2, '1': 3}", "{1: 2, '1': 3}")])
def test_numbers_within_a_literal_are_kept_as_those_alone_are(text, found):
    value = labtasker.typed_value(text, "x")
    assert value == found or value["a"] == found["a"] and value["b"] != value["b"]


def test_a_range_without_an_end_is_refused():
    with pytest.raises(labtasker.UsageError, match="is no range"):
        labtasker.grid_values("x", "0:1e400:1e399")


def submitted(capsys, *words):
    """Return the id of a task submitted by the command line in this process."""
    assert labtasker.main(["task", "submit", "--quiet"] + list(words)) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("words, args", [
    (["--lr=0.1", "--model=resnet"], {"lr": 0.1, "model": "resnet"}),
    (["--lr", "0.1", "-m", "vit"], {"lr": 0.1, "m": "vit"}),
    (["--flag"], {"flag": True}),
    (["--flag", "--lr=1"], {"flag": True, "lr": 1}),
    (["--lr", "-1"], {"lr": -1}),
    (["--lr", "-.5"], {"lr": -0.5}),
    (["--lr", "-"], {"lr": "-"}),
    (["--value=-1", "--label=", "--desc=hello world"], {"value": -1, "label": "", "desc": "hello world"}),
    (["--label", ""], {"label": ""}),
    (["--batch-size=4"], {"batch_size": 4}),
    (["--a.b=1", "--a.c.d=2"], {"a": {"b": 1, "c": {"d": 2}}}),
    (["--a.b-c=1"], {"a": {"b_c": 1}}),
    (["--opt={'x.y': 1}"], {"opt": {"x": {"y": 1}}}),
    (["--expr=a=b"], {"expr": "a=b"}),
    (["--text=two\nlines"], {"text": "two\nlines"}),
    (["-lr=0.1"], {"lr": 0.1}),
])
def test_typed_arguments_become_args(home, capsys, words, args):
    assert labtasker.get_task(submitted(capsys, "--", *words)).args == args


def test_args_and_typed_arguments_are_joined(home):
    task_id = home.submit("--args", '{"a": {"x": 1}, "n": NaN}', "--", "--a.y=2", "--b=3")
    args = home.task(task_id)["args"]
    assert args["n"] != args.pop("n") and args == {"a": {"x": 1, "y": 2}, "b": 3}


def test_metadata_and_args_may_be_python_literals(home):
    task_id = home.submit("--metadata", "{'tags': ['v1'], 'note': None}", "--args", "{'a': (1, 2)}")
    task = home.task(task_id)
    assert task["metadata"] == {"tags": ["v1"], "note": None} and task["args"] == {"a": [1, 2]}


def test_submit_sets_every_field(home):
    task = home.task(home.submit("--name", "n", "--priority", "-5", "--max-retries", "7", "--cmd", "echo hi",
                                 "--heartbeat-timeout", "1 min", "--task-timeout", "1h30m"))
    assert (task["task_name"], task["priority"], task["max_retries"], task["cmd"]) == ("n", -5, 7, "echo hi")
    assert (task["heartbeat_timeout"], task["task_timeout"], task["args"]) == (60, 5400, {})
    task = home.task(home.submit("--retry-delay", "1.5 min", "--", "--lr=1"))
    assert task["retry_delay"] == 90
    home.cli("task", "update", "--id", task["task_id"], "-u", "retry_delay=20", "--quiet")
    assert home.task(task["task_id"])["retry_delay"] == 20
    home.cli("task", "update", "--id", task["task_id"], "-u", "retry_delay=None", "--quiet")
    assert home.task(task["task_id"])["retry_delay"] is None


def test_submit_says_the_id_and_quiet_says_nothing_else(home):
    first = home.cli("task", "submit", "--", "--lr=1")
    second = home.cli("task", "submit", "-q", "--", "--lr=2")
    ids = [task["task_id"] for task in home.tasks()]
    assert first.stdout == "Submitted task %s\n" % ids[0] and second.stdout == ids[1] + "\n"
    assert first.stderr == "labtasker: created the store %s\n" % home.folder and second.stderr == ""


@pytest.mark.parametrize("text, values", [
    ("0.1,0.01", [0.1, 0.01]), ("vit,resnet", ["vit", "resnet"]), ("1:5:1", [1, 2, 3, 4, 5]), ("0:10:5", [0, 5, 10]),
    ("0.1:0.3:0.1", [0.1, 0.2, 0.3]), ("3:1:-1", [3, 2, 1]), ("1:4:2", [1, 3]), ("1,5:6:1,x", [1, 5, 6, "x"]),
    ("[1,2],[3,4]", [[1, 2], [3, 4]]), ("'a,b',c", ["a,b", "c"]), ("1:2", ["1:2"]), ("a:b:c", ["a:b:c"]), ("", [""]),
    ("1e-3:3e-3:1e-3", [0.001, 0.002, 0.003]), ("1,", [1, ""]), (True, [True])])
def test_grid_values(text, values):
    assert labtasker.grid_values("k", text) == values


SAMPLE = {"lr": "log:1e-4:1e-1", "wd": "0:0.1", "layers": "2:8", "width": "log:16:1024", "model": "a,b", "opt.x": ["q", None]}


def test_a_sample_draws_each_kind_of_range_within_its_ends_and_reaches_them():
    rows = labtasker.drawn(SAMPLE, 3000, 7)
    column = {key: [row[key] for row in rows] for key in SAMPLE}
    assert set(column["layers"]) == set(range(2, 9)) and set(column["model"]) == {"a", "b"} and set(column["opt.x"]) == {"q", None}
    assert all(type(x) is float and 0 <= x <= 0.1 for x in column["wd"]) and all(type(x) is int for x in column["width"])
    assert min(column["width"]) == 16 and 900 < max(column["width"]) <= 1024
    for key, low, high in (("lr", 1e-4, 1e-1), ("width", 16, 1024)):
        assert low <= min(column[key]) and max(column[key]) <= high
        assert 1400 < sum(x < (low * high) ** 0.5 for x in column[key]) < 1600, "half of them below the middle of the logarithms"
    assert 1400 < sum(x < 0.05 for x in column["wd"]) < 1600
    assert all(float(labtasker.brief(x)) == x for key in ("lr", "wd") for x in column[key]), "what a table shows reads back the same"
    assert len(set(map(tuple, zip(column["lr"], column["wd"])))) == 3000
    narrow = [row["n"] for row in labtasker.drawn({"n": "1000:1000.001"}, 100, 0)]
    assert len(set(narrow)) == 100 and 1000 <= min(narrow) and max(narrow) <= 1000.001
    fixed = labtasker.drawn({"flag": True, "a": "5:5", "b": "resnet", "c": "'16:9',4.5", "d": [[1]], "e": "1:5:4", "f": "-1e308:1e308"}, 50, 1)
    assert {(row["flag"], row["a"], row["b"], row["d"][0]) for row in fixed} == {(True, 5, "resnet", 1)}
    assert {row["c"] for row in fixed} == {"16:9", 4.5} and {row["e"] for row in fixed} == {1, 5} and len({row["f"] for row in fixed}) == 50


def test_a_seed_draws_the_same_everywhere_whatever_is_drawn_beside():
    """The values are written out here, so that each Python that runs this test must draw these."""
    assert labtasker.drawn(SAMPLE, 2, 7) == [
        {"lr": 0.00099143, "wd": 0.0573894, "layers": 3, "width": 553, "model": "b", "opt.x": None},
        {"lr": 0.0840369, "wd": 0.00717071, "layers": 8, "width": 32, "model": "b", "opt.x": None}]
    assert labtasker.drawn(SAMPLE, 20, 7)[:2] == labtasker.drawn(SAMPLE, 2, 7) != labtasker.drawn(SAMPLE, 2, 8)
    assert labtasker.drawn({"wd": "0:0.1"}, 1, 7) == [{"wd": 0.0573894}]


@pytest.mark.parametrize("given, words", [(text, words) for words, texts in (
    ("above 0", ("log:0:1", "log:-1:1")), ("wrong way round", ("0.1:0", "16:9", "log:2:1")), ("too large", ("1e999:1", "0:1e999")),
    ("64 bits", ("0:99999999999999999999",)), ("start:stop:step", ("1:5:0",)), ("a range stands alone", ("0:1,5", "a,log:1:2")),
    ("nothing to draw from", ("", " ", "log:1", "log:", "1:", ":1", ":", "log:x:2", "nan:1", "0:inf", "1:2:3:4", "1_0:2_0", [])),
) for text in texts], ids=repr)
def test_what_can_not_be_drawn_from_is_refused(given, words):
    with pytest.raises(labtasker.UsageError, match=words):
        labtasker.drawn({"lr": "0:1", "x": given}, 3, 1)


@pytest.mark.parametrize("call, words", [
    (lambda: labtasker.submit_sample([1], 2), "takes a dict"), (lambda: labtasker.submit_sample({"a": 5}, 2), r"did you mean \[5\]"),
    (lambda: labtasker.submit_sample({"a": {1, 2}}, 2), "or a list"), (lambda: labtasker.submit_sample({"a": "0:1"}, 1.5), "n is a whole number"),
    (lambda: labtasker.submit_sample({"a": "0:1"}, 0), "not 0"), (lambda: labtasker.submit_sample({"a": "0:1"}, 1, seed="x"), "seed is a whole"),
    (lambda: labtasker.submit_sample({}, 2), "something to draw"), (lambda: labtasker.submit_sample({"a": "0:1"}, 2, lr=1), "did you mean args=")])
def test_a_mistake_in_a_sample_submits_nothing(home, call, words):
    with pytest.raises(labtasker.LabtaskerError, match=words):
        call()
    assert not labtasker.ls_tasks().content


def test_a_sample_is_submitted_as_it_is_drawn_from_the_command_line_and_from_python(home, capsys):
    words = ["--lr=log:1e-4:1e-1", "--opt-x=1,2"]
    assert labtasker.main(["task", "submit", "--sample", "3", "--seed", "5", "--name", "s", "--"] + words) == 0
    drawn = [task.args for task in labtasker.ls_tasks()]
    assert drawn == labtasker.drawn({"lr": "log:1e-4:1e-1", "opt_x": "1,2"}, 3, 5) and "--seed" not in capsys.readouterr().err
    ids = labtasker.submit_sample({"lr": "log:1e-4:1e-1", "opt_x": [1, 2]}, 5, seed=5, unique=True, task_name="s")
    assert [labtasker.get_task(one).args for one in ids[:3]] == drawn and len(labtasker.ls_tasks().content) == 5
    more = labtasker.submit_sample({"lr": "0:1"}, 2, args={"n": 1}, metadata={"m": 2})
    assert [(task.args["n"], task.metadata) for task in map(labtasker.get_task, more)] == [(1, {"m": 2})] * 2
    labtasker.main(["task", "submit", "--sample", "2", "--dry-run", "--"] + words)
    shown = capsys.readouterr()
    seed = re.search(r"Drawn with --seed (\d+), which", shown.err).group(1)
    labtasker.main(["task", "submit", "--sample", "2", "--dry-run", "--seed", seed, "--"] + words)
    assert capsys.readouterr().out.splitlines()[-2:] == shown.out.splitlines()[-2:] and len(labtasker.ls_tasks().content) == 7
    labtasker.main(["task", "submit", "--dry-run", "--", "--seed=1"])
    assert "--seed" not in capsys.readouterr().err, "an argument of that name is as usual as any"


def test_grid_is_the_product_in_one_transaction(home):
    lines = len((home.folder / "journal.jsonl").read_bytes().splitlines()) if home.folder.exists() else 0
    result = home.cli("task", "submit", "--grid", "--name", "g", "--args", '{"epochs": 3}', "--", "--lr=0.1,0.2",
                      "--seed=1:3:1", check=False)
    assert result.returncode == 0, result
    assert result.stdout == "Submitted 6 tasks\n"
    assert sorted((t["args"]["lr"], t["args"]["seed"]) for t in home.tasks()) == [
        (lr, seed) for lr in (0.1, 0.2) for seed in (1, 2, 3)]
    assert {t["args"]["epochs"] for t in home.tasks()} == {3} and {t["task_name"] for t in home.tasks()} == {"g"}
    journal = (home.folder / "journal.jsonl").read_text().splitlines()
    ids = [t["task_id"] for t in home.tasks()]
    assert lines == 0 and sum(all(i in line for i in ids) for line in journal) == 1


@pytest.mark.slow
def args_of(text, read=labtasker.tasks_of_csv):
    return [task["args"] for task in read("x.csv", text)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_the_ends_of_lines_end_a_row(end):
    odd = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
    assert args_of(end.join(["text,n", odd + ",1", '"a%sb",2' % end, '"say ""hi"", c",3', "", "d,4"])) == [
        {"text": odd, "n": 1}, {"text": "a%sb" % end, "n": 2}, {"text": 'say "hi", c', "n": 3}, {"text": "d", "n": 4}]


@pytest.mark.parametrize("text, words", [
    ('prompt,lr\n1,2\n"half open,0.1\n3,4\n', "x.csv line 4, in the row that begins in line 3"), ('a\n"x"y\n', "x.csv line 2"), ('"a', "x.csv line 1"),
    ('a,b\n"x\ny",1\n1,2,3\n', "x.csv line 4 has 3 cells"), ('a\n"x\n\n', "row that begins in line 2"), ("a,b,a\n", "twice: a, b, a"),
])
def test_a_mistake_in_csv_is_named_with_its_line(text, words):
    with pytest.raises(labtasker.UsageError, match=words):
        labtasker.tasks_of_csv("x.csv", text)


def test_a_cell_may_have_any_size():
    assert args_of("text,n\n%s,1\n" % ("x" * 300000)) == [{"text": "x" * 300000, "n": 1}]


ODD_CELLS = ["a\rb", "a\nb", "a\r\nb", 'a"b', '"', "a,b", "\u2028", "\x85\x0b\x0c", " a", "a ", "a\n", "'", "#", "[", "{", "%(x)", "\ufeff", "é", "\t"]


@pytest.mark.parametrize("text", ODD_CELLS, ids=ascii)
def test_csv_that_is_written_is_read_back(text):
    rows = [{"a": text, "b": 1}, {"a": "x", "b": None}, {"a": text, "b": [1, text, None]}]
    written = labtasker.as_csv(rows)
    assert list(csv.reader(io.StringIO(written, newline=""), strict=True)) == [
        ["a", "b"], [text, "1"], ["x", ""], [text, json.dumps([1, text, None])]]
    assert labtasker.as_csv([{"a": text}, {"a": None}, {"a": text}]).count('""') >= 1
    assert [task["args"]["a"] for task in labtasker.tasks_of_csv("x", written)] == [text, "x", text]


def test_json_is_taken_as_lines_and_as_a_list():
    rows = [{"lr": 1, "text": "a\u2028b\r\n"}, {"args": {"lr": 2}, "task_name": "two"}]
    wanted = [{"args": rows[0]}, rows[1]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for end in ("\n", "\r\n", "\r"):
        assert labtasker.tasks_of_json("x", end.join(lines + ["", ""])) == wanted
    for indent in (None, 2):
        assert labtasker.tasks_of_list("x", json.dumps(rows, indent=indent)) == wanted


@pytest.mark.parametrize("text, words", [("[1]", "item 1 of the list is 1"), ('[{"a": 1},\n{"a": ]', "line 2"), ('[{"args": {}, "x": 1}]', "item 1: a task has no field x"),
                                         ('[{"a": 1, "a": 2}]', "twice"), ("[{}", "x takes JSON")])
def test_a_mistake_in_a_list_is_named(text, words):
    with pytest.raises(labtasker.UsageError, match=words):
        labtasker.tasks_of_list("x", text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_input_with_a_byte_order_mark_is_taken(home, encoding):
    (home.cwd / "in.csv").write_bytes("text\né\n".encode(encoding))
    (home.cwd / "in.json").write_bytes('[{"text": "ü"}]'.encode(encoding))
    (home.cwd / "job.sh").write_bytes("#!/bin/sh\r\necho 'ä %(text)'\r\n".encode(encoding))
    for name in ("in.csv", "in.json"):
        home.cli("task", "submit", "--from", name)
    assert sorted(task["args"]["text"] for task in home.tasks()) == ["é", "ü"]
    assert sorted(home.cli("loop", "--script-path", "job.sh").lines) == ["ä é", "ä ü"]


def test_input_in_another_encoding_is_named_with_its_line(home):
    (home.cwd / "in.csv").write_bytes(b"text\na\n\xe9\n")
    (home.cwd / "wide.csv").write_bytes("text\na\n".encode("utf-16-le"))
    for name, words in (("in.csv", "in.csv line 3 is not UTF-8"), ("wide.csv", "wide.csv line 1 has a null character")):
        result = home.cli("task", "submit", "--from", name, check=False)
        assert result.returncode == 2 and words in result.stderr, result
    assert not home.tasks()


@pytest.mark.parametrize("fmt", ["csv", "jsonl"])
def test_what_a_listing_prints_can_be_submitted_again(both, fmt):
    texts = [text for text in ODD_CELLS if text.strip() == text and text != "#"]
    for number, text in enumerate(texts):
        labtasker.submit_task(args={"text": text, "opt": {"lr": 0.1, "list": [1, None, text]}, "n": number}, task_name="odd-%d" % number, priority=number,
                      metadata={"tag": text}, max_retries=2)
    before = both.tasks()
    harness.run(["sh", "-c", '"$0" -m labtasker task ls --fmt %s | "$0" -m labtasker task submit --from -' % fmt, sys.executable], both.cwd, env=both.env)
    after = [task for task in both.tasks() if task["task_id"] not in {one["task_id"] for one in before}]
    assert len(after) == len(texts)
    for name in ("args", "task_name", "priority", "metadata", "max_retries"):
        assert sorted(json.dumps(one[name], sort_keys=True) for one in after) == sorted(json.dumps(one[name], sort_keys=True) for one in before)


def test_from_json_lines_and_csv_and_stdin(home):
    home.write("a.jsonl", '{"lr": 1}\n\n{"args": {"lr": 2}, "task_name": "two", "priority": 9}\n')
    home.write("b.csv", "\ufefflr,opt.name,seed\n3,adam,\n4,sgd,7\n")
    home.cli("task", "submit", "--from", "a.jsonl", "--", "--epochs=5")
    home.cli("task", "submit", "--from", "b.csv")
    home.cli("task", "submit", "--from", "-", stdin='{"lr": 5}\n')
    tasks = sorted(home.tasks(), key=lambda t: t["args"]["lr"])
    assert [t["args"] for t in tasks] == [
        {"lr": 1, "epochs": 5}, {"lr": 2, "epochs": 5}, {"lr": 3, "opt": {"name": "adam"}},
        {"lr": 4, "opt": {"name": "sgd"}, "seed": 7}, {"lr": 5}]
    assert tasks[1]["task_name"] == "two" and tasks[1]["priority"] == 9


def test_dry_run_submits_nothing_and_prints_what_from_takes(home):
    result = home.cli("task", "submit", "--grid", "--dry-run", "--name", "g", "--", "--lr=1,2", "--opt.m=3")
    assert "Would submit 2 tasks" in result.stderr and home.tasks() == []
    home.cli("task", "submit", "--from", "-", stdin=result.stdout)
    assert [(t["task_name"], t["args"]) for t in home.tasks("-S", "args.lr")] == [
        ("g", {"lr": 1, "opt": {"m": 3}}), ("g", {"lr": 2, "opt": {"m": 3}})]


@pytest.mark.slow
def test_what_ls_prints_can_be_submitted_again(home):
    submit_some(home)
    home.cli("task", "submit", "--from", "-", stdin=home.cli("task", "ls", "--fmt", "jsonl").stdout)
    args = [json.dumps(t["args"]) for t in home.tasks()]
    assert sorted(args) == sorted(2 * sorted(set(args))) and len(args) == 6


# ---- listing

@pytest.mark.slow
def test_table_has_a_line_a_task_and_short_ids_that_can_be_used(home):
    ids = submit_some(home)
    header, *rows = home.cli("task", "ls").lines
    assert header.split() == ["id", "status", "name", "age", "args.lr", "args.model", "args.opt.name"]
    assert [row.split()[0] for row in rows] == [i[:8] for i in ids]
    assert rows[0].endswith("0.1      vit") and rows[2].endswith("adam")
    assert json.loads(home.cli("task", "get", ids[1][:8], "--fmt", "jsonl").stdout)["task_id"] == ids[1]
    assert [t["task_id"] for t in home.tasks("--id", ids[2][:9])] == [ids[2]]


@pytest.mark.slow
def test_quiet_prints_ids_alone(home):
    ids = submit_some(home)
    assert home.cli("task", "ls", "-q", "--no-pager").lines == ids


@pytest.mark.slow
def test_selectors_are_anded(home):
    ids = submit_some(home)
    for words, found in [(["-s", "pending"], ids), (["-s", "failed"], []), (["--name", "sweep"], ids[:2]),
                         (["-f", "args.lr > 0.15", "--name", "sweep"], ids[1:2]), (["--task-id", ids[0]], ids[:1]),
                         (["-f", '{"args.lr": {"$gt": 0.15}}'], ids[1:]), (["-f", "{'args.lr': 0.1}"], ids[:1]),
                         (["-f", '"v1" in list(metadata.tags)', "-s", "pending"], ids[:1])]:
        assert home.cli("task", "ls", "-q", *words).lines == found, words


@pytest.mark.slow
def test_sort_limit_offset_and_what_was_left_out(home):
    ids = submit_some(home)
    result = home.cli("task", "ls", "-q", "-S", "args.lr:desc", "--limit", "2")
    assert result.lines == ids[:0:-1] and result.stderr == "", "who gives a limit wants no more"
    result = home.cli("task", "ls", "-q", "-S", "args.lr", "--offset", "1", "--limit", "2")
    assert result.lines == ids[1:] and result.stderr == ""
    assert home.cli("task", "ls", "-q", "-S", "task_name:desc", "-S", "args.lr:desc").lines == [ids[1], ids[0], ids[2]]


@pytest.mark.slow
def test_piped_in_lists_the_ids_on_stdin(home):
    ids = submit_some(home)
    assert home.cli("task", "ls", "-q", "--piped-in", stdin="\n".join(ids[1:])).lines == ids[1:]
    assert home.cli("task", "ls", "-q", "--piped-in", "--name", "sweep", stdin="\n".join(ids[1:])).lines == ids[1:2]
    result = home.cli("task", "ls", "--piped-in", stdin="id status\n", check=False)
    assert result.returncode == 2 and "no task's id" in result.stderr


@pytest.mark.slow
def test_nothing_found_is_said_on_stderr_only(home):
    result = home.cli("task", "ls")
    assert (result.stdout, result.stderr) == ("", "No tasks yet: python3 -m labtasker task submit -- --lr=0.1\n")
    assert home.cli("task", "ls", "-s", "failed").stderr == "Nothing matches.\n"
    assert home.cli("task", "retry").stderr == "Nothing matches: nothing was retried.\n"
    assert home.cli("task", "ls", "--fmt", "yaml").stdout == "[]\n"
    assert home.cli("task", "ls", "-q").stderr == ""


@pytest.mark.slow
def test_csv_has_a_column_for_each_argument(home):
    ids = submit_some(home)
    rows = list(csv.DictReader(io.StringIO(home.cli("task", "ls", "--fmt", "csv").stdout)))
    assert [row["task_id"] for row in rows] == ids
    assert [row["args.lr"] for row in rows] == ["0.1", "0.2", "0.3"] and rows[2]["args.opt.name"] == "adam"
    assert rows[2]["args.model"] == "" and rows[0]["metadata.tags"] == '["v1"]'


@pytest.mark.slow
def test_get_prints_every_field(home):
    text = home.cli("task", "get", submit_some(home)[0]).stdout
    shown = [name for name, row in labtasker.TASK_FIELDS.items() if row.extension is not None]
    assert [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"] == shown


VALUES = [None, True, False, 0, -1, 1.5, 1e-05, 1e300, 2 ** 63, float("inf"), "", " ", "x", "two words", "true", "No", "null",
          "~", "1", "1.5", "-", "- a", "a: b", "a #b", "#a", "a:b", "[x]", "{x}", "*a", "&a", "!a", "|", ">", "%x", "@a", "`a",
          "'q'", '"q"', "a\nb", "a\nb\n", "a\nb\n\n", "\na\nb", " a\nb", "a\n\n  b", "tab\tin", "\ttab\nx", "é", "日本", "\x1b[31m",
          "\x85", "\u2028", "\x7f", "😀", "2026-11-22", "1:30", "0x10", "1_000", "=", "<<", "y", "on", "a\r\nb", "x ", "a \nb",
          [], {}, [1, [2, [3]], {"a": [{"b": 1, "c": []}]}], {"a": {"b": {}}}, [[], {}], ["a\nb"], {"1": 2, "true": 3, "a-b": 4}]


def test_yaml_reads_back_as_what_was_written():
    yaml = pytest.importorskip("yaml")
    rows = [{"value": value, "in": {"a": value, "b": [value, {"c": value}]}} for value in VALUES]
    assert yaml.safe_load(labtasker.as_yaml(rows)) == rows
    text = labtasker.as_yaml(rows)
    assert "\x1b" not in text and "\x7f" not in text and "value: x\n" in text and "value: |-\n" in text
    assert yaml.safe_load(labtasker.as_yaml([{"x": float("nan")}]))[0]["x"] != 0


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\u202eevil\x9b"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["task", "ls"], ["task", "ls", "--fmt", "yaml"], ["task", "ls", "--fmt", "jsonl"],
                                   ["task", "ls", "--verbose"], ["task", "ls", "--fmt", "csv"], ["task", "get", "ID"],
                                   ["task", "count", "--by", "args.x"], ["task", "ls", "-f", "args.x == '\x1b[2J"]])
def test_no_control_character_of_a_value_reaches_the_terminal(home, words):
    task_id = home.submit("--args", json.dumps({"x": HOSTILE}))
    shown = on_terminal(home, [task_id if word == "ID" else word for word in words])[1]
    for letter in "\x1b\x07\x9b\u202e":
        assert letter not in shown, repr(shown)
    assert "owned" in shown or "2J" in shown


@pytest.mark.slow
def test_wide_and_long_values_fit_the_terminal(home):
    home.submit("--", "--text=" + "日本語" * 40, "--other=" + "x" * 200)
    home.submit("--name", "n" * 90, "--", "--lr=1")
    shown = on_terminal(home, ["task", "ls"], columns=60)[1].splitlines()
    assert len(shown) == 5 and shown[0] == "same in all: status=pending" and all(labtasker.cells_wide(line) <= 60 for line in shown), shown
    assert "x" * 200 in home.cli("task", "ls").stdout
    home.submit("--", "--long=" + "x" * 50000)
    assert len(home.cli("task", "ls").stdout) < 5000 and "x" * 50000 in home.cli("task", "ls", "--verbose").stdout


def test_output_survives_a_terminal_without_unicode(home):
    home.submit("--", "--text=日本")
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    assert "text=\\u65e5\\u672c" in home.cli("task", "ls", env=env).stdout
    assert home.tasks()[0]["args"] == {"text": "日本"}


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(home):
    home.cli("task", "submit", "--grid", "--", "--x=1:3000:1")
    result = home.bash("labtasker task ls --limit 3000 | head -1", check=False)
    assert result.stderr == "" and result.stdout.startswith("id "), result


@pytest.mark.slow
@pytest.mark.parametrize("line", ["labtasker task ls >&-", "labtasker task ls 2>&-", "labtasker task ls <&-",
                                  "labtasker task update -u priority=1 <&-"])
def test_closed_streams_are_no_bug(home, line):
    home.submit("--", "--x=1")
    assert "bug" not in home.bash(line, check=False).stderr


def test_a_full_disk_under_stdout_is_one_message(home):
    home.submit("--", "--x=1")
    result = home.bash("labtasker task ls > /dev/full", check=False)
    assert (result.returncode, result.stderr) == (1, "labtasker: error: No space left on device\n")


@pytest.mark.slow
def test_count_by_status_and_by_field(both):
    home = both
    submit_some(home)
    assert home.cli("task", "count").stdout.split() == "status tasks pending 3 running 0 success 0 failed 0 " \
                                                       "cancelled 0 total 3".split()
    assert home.cli("task", "count", "--by", "args.model").stdout.split() == "args.model tasks vit 1 resnet 1 " \
                                                                             "None 1 total 3".split()
    assert home.cli("task", "count", "-q", "--name", "sweep").stdout == "2\n"
    assert home.cli("task", "count", "-q", "-f", "args.lr > 0.15").stdout == "2\n"
    assert home.cli("task", "count", "-q", "-s", "failed").stdout == "0\n"
    assert home.cli("task", "count", "-q", "--id", home.tasks()[0]["task_id"][:8]).stdout == "1\n"
    assert home.cli("task", "count", "--by", "args.lr", "--name", "sweep").stdout.split()[2:] == "0.1 1 0.2 1 total 2".split()


# ---- changing

@pytest.mark.parametrize("updates, field, value", [
    (["-u", "args.lr=0.005"], "args", {"lr": 0.005, "opt": {"name": "adam", "m": 1}}),
    (["-u", "args.opt.m=2"], "args", {"lr": 0.3, "opt": {"name": "adam", "m": 2}}),
    (["-u", "args.lr=0.5", "-u", "args.new.deep=[1]"], "args", {"lr": 0.5, "opt": {"name": "adam", "m": 1}, "new": {"deep": [1]}}),
    (["-u", 'args.opt={"name": "sgd"}'], "args", {"lr": 0.3, "opt": {"name": "sgd"}}),
    (["-u", 'args.opt={"name": "sgd"}', "-u", "args.lr=1"], "args", {"lr": 1, "opt": {"name": "sgd"}}),
    (["-u", 'args={"only": 1}'], "args", {"only": 1}),
    (["-u", "args.lr.deep=1"], "args", {"lr": {"deep": 1}, "opt": {"name": "adam", "m": 1}}),
    (["-u", "args.opt=None"], "args", {"lr": 0.3, "opt": None}),
    (["-u", 'metadata.tags=["v2"]'], "metadata", {"tags": ["v2"], "note": "n"}),
    (["-u", "metadata={}"], "metadata", {}),
    (["-u", "metadata.note=two words"], "metadata", {"tags": ["v1"], "note": "two words"}),
    (["-u", "metadata.note=a=b"], "metadata", {"tags": ["v1"], "note": "a=b"}),
    (["-u", "status=cancelled"], "status", "cancelled"),
    (["-u", "priority=100"], "priority", 100),
    (["-u", "task_name=123"], "task_name", "123"),
    (["-u", "summary.acc=NaN"], "summary", {"acc": "NaN"}),
    (["-u", "summary.val/acc=0.5", "-u", "summary.x y.z@10=1"], "summary", {"val/acc": 0.5, "x y": {"z@10": 1}}),
    (["-u", "args.commit=31e8473"], "args", {"lr": 0.3, "opt": {"name": "adam", "m": 1}, "commit": "31e8473"}),
    (["--", "priority=7"], "priority", 7),
    (["-u", "priority=7", "--", "max_retries=9"], "max_retries", 9),
])
def test_update_sets_what_was_typed_and_leaves_the_rest(home, capsys, updates, field, value):
    task_id = submitted(capsys, "--args", '{"lr": 0.3, "opt": {"name": "adam", "m": 1}}', "--metadata", '{"tags": ["v1"], "note": "n"}')
    assert labtasker.main(["task", "update", "--id", task_id] + updates) == 0
    assert capsys.readouterr().out == "Updated 1 task\n"
    found = labtasker.get_task(task_id).to_dict()[field]
    assert json.loads(json.dumps(found).replace("NaN", '"NaN"')) == value


@pytest.mark.slow
def test_update_by_selectors_is_one_transaction(home):
    ids = submit_some(home)
    before = len((home.folder / "journal.jsonl").read_text().splitlines())
    result = home.cli("task", "update", "--name", "sweep", "-f", "args.lr > 0", "-u", "args.lr=9", "--quiet")
    assert result.stdout == result.stderr == ""
    assert [t["args"]["lr"] for t in home.tasks()] == [9, 9, 0.3]
    lines = (home.folder / "journal.jsonl").read_text().splitlines()[before:]
    assert sum(ids[0] in line for line in lines) == 1 and sum(ids[0] in line and ids[1] in line for line in lines) == 1


@pytest.mark.slow
def test_update_takes_ids_from_stdin_only_without_selectors(home):
    ids = submit_some(home)
    home.cli("task", "update", "-u", "priority=1", "--quiet", stdin="\n".join(ids[:2]))
    home.cli("task", "update", "--id", ids[2], "-u", "priority=2", "--quiet", stdin="\n".join(ids[:2]))
    assert [t["priority"] for t in home.tasks()] == [1, 1, 2]
    home.bash("labtasker task ls -q | xargs -I{} labtasker task update --id {} -u priority=5 --quiet")
    assert [t["priority"] for t in home.tasks()] == [5, 5, 5]
    assert "Nothing matches" in home.cli("task", "update", "-u", "priority=1").stderr


@pytest.mark.slow
def test_update_has_no_limit_unless_one_is_given(home):
    home.cli("task", "submit", "--grid", "--", "--x=1:150:1")
    home.cli("task", "update", "-s", "pending", "-u", "priority=3", "--quiet")
    assert {t["priority"] for t in home.tasks()} == {3}
    home.cli("task", "update", "-s", "pending", "-u", "priority=4", "--quiet", "--limit", "50")
    assert sum(t["priority"] == 4 for t in home.tasks()) == 50


@pytest.mark.slow
def test_all_of_an_update_or_nothing(home):
    ids = submit_some(home)
    result = home.cli("task", "update", "-u", "priority=1", "-q", stdin="\n".join(ids + [MISSING]), check=False)
    assert result.returncode == 1 and MISSING in result.stderr
    assert [t["priority"] for t in home.tasks()] == [0, 0, 0]


def fail_all(home):
    home.cli("loop", "-c", "false", check=False)


@pytest.mark.slow
def test_retry_makes_failed_tasks_pending_with_no_retries(home):
    ids = [home.submit("--max-retries", "1", "--", "--x=%d" % x) for x in (1, 2)]
    home.cli("loop", "--", "sh", "-c", "exit %(x)", check=False)
    assert [t["status"] for t in home.tasks()] == ["failed", "failed"]
    result = home.cli("task", "retry", "--dry-run", "-f", "args.x == 1")
    assert ids[0][:8] in result.stdout and "Would retry 1 task" in result.stderr
    assert [t["status"] for t in home.tasks()] == ["failed", "failed"]
    assert home.cli("task", "retry", "-f", "args.x == 1").stdout == "1 task pending again\n"
    assert [(t["status"], t["retries"]) for t in home.tasks()] == [("pending", 0), ("failed", 1)]
    home.cli("task", "retry")
    assert [(t["status"], t["retries"]) for t in home.tasks()] == [("pending", 0), ("pending", 0)]
    home.cli("task", "update", "--id", ids[0], "-u", "status=cancelled")
    home.cli("task", "retry", ids[0])
    assert home.task(ids[0])["status"] == "pending"


@pytest.mark.slow
def test_delete_by_ids_selectors_and_stdin(home):
    ids = submit_some(home)
    assert home.cli("task", "delete", ids[0], "-y").stdout == "Deleted 1 task\n"
    assert home.cli("task", "delete", "-y", "--name", "sweep").stdout == "Deleted 1 task\n"
    home.bash("labtasker task ls -q | labtasker task delete -y")
    assert home.tasks() == []
    result = home.bash("labtasker task ls -q | labtasker task delete -y")
    assert result.stdout == "" and "Nothing matches" in result.stderr


@pytest.mark.slow
def test_delete_with_an_unknown_id_deletes_nothing(home):
    ids = submit_some(home)
    result = home.cli("task", "delete", "-y", ids[0], MISSING, ids[1], check=False)
    assert result.returncode == 1 and MISSING in result.stderr and ids[0] not in result.stderr
    assert len(home.tasks()) == 3
    home.cli("task", "delete", ids[0], "-y", ids[1])
    assert [t["task_id"] for t in home.tasks()] == ids[2:]


@pytest.mark.slow
def test_wait_ends_when_nothing_is_left_to_do(both):
    home = both
    assert "Nothing matches" in home.cli("task", "wait").stderr
    submit_some(home)
    waiting = home.start_cli("task", "wait")
    home.cli("loop", "-f", "args.lr < 0.25", "--", "echo", "%(lr)", "%(model)")
    assert waiting.poll() is None
    home.cli("task", "update", "--name", "sweep", "-u", "priority=1", "-q")
    home.cli("loop", "--", "echo", "%(lr)", "%(opt.name)")
    assert waiting.wait(20) == 0
    home.submit("--max-retries", "1", "--", "--bad=1")
    home.cli("loop", "--", "false", "%(bad)", check=False)
    result = home.cli("task", "wait", check=False)
    assert result.returncode == 4 and "1 failed" in result.stderr
    assert home.cli("task", "wait", "--name", "sweep").returncode == 0


@pytest.mark.slow
def test_wait_has_a_time_limit_and_says_that_no_loop_runs(both):
    home = both
    submit_some(home)
    short = home.cli("task", "wait", "--timeout", "0", check=False)
    assert short.returncode == 124 and "The time is up: " in short.stderr
    assert re.search(r"\d+ pending, no loop runs: start one, such as \S+ -m labtasker loop -- python train.py --", short.stderr)
    waiting = home.start_cli("task", "wait")
    harness.wait_until(lambda: "no loop runs" in waiting.log_path.read_text(), "it is said once it lasts")
    few = home.cli("task", "wait", "--expect", "1000", check=False)
    assert few.returncode == 1 and "tasks match, and 1000 are expected" in few.stderr
    assert home.cli("task", "wait", "-s", "failed,success", "--expect", "0").returncode == 0
    home.cli("task", "update", "-f", "status == 'pending'", "-u", "status=cancelled", "-q")
    assert waiting.wait(20) == 0 and waiting.log_path.read_text().count("no loop runs") == 1


def test_several_statuses_are_joined_by_commas(home, capsys):
    one, two, three = [labtasker.submit_task(args={"n": n}, task_name="s").task_id for n in range(3)]
    labtasker.update_tasks([{"task_id": two, "status": "cancelled"}])
    labtasker.fetch_task(extra_filter="args.n == 2", heartbeat_timeout=60)

    def shown(*words):
        assert labtasker.main(list(words)) == 0
        return set(capsys.readouterr().out.split())
    assert shown("task", "ls", "-q", "-s", "pending,cancelled") == {one, two}
    assert shown("task", "ls", "-q", "-s", "running, cancelled", "-f", "args.n == 2") == {three}
    assert shown("task", "ls", "-q", "-s", "pending") == {one}
    assert shown("task", "count", "-q", "-s", "running,pending", "--name", "s") == {"2"}
    assert shown("task", "retry", "-q", "-s", "cancelled,failed") == set() and labtasker.get_task(two).status == "pending"
    assert shown("worker", "ls", "-q", "-s", "crashed,active") == set()
    assert labtasker.main(["task", "ls", "-s", "failed,pendng"]) == 2
    assert "pendng is none of" in capsys.readouterr().err


def test_workers_of_loops_that_have_ended_are_listed_with_all(home, capsys):
    lives, ended = labtasker.create_worker("lives"), labtasker.create_worker("gone")
    labtasker.end_worker(ended)

    def listed(*words):
        assert labtasker.main(["worker", "ls"] + list(words)) == 0
        return capsys.readouterr().out
    assert listed("-q").split() == [lives] and set(listed("-q", "--all").split()) == {lives, ended}
    assert re.search("ended +gone", listed("--all")) and listed("-q", "--id", ended[:8]).split() == [ended]
    assert listed("-q", "-f", "worker_name == 'gone'") == "" and listed("-q", "--all", "-f", "worker_name == 'gone'").split() == [ended]


@pytest.mark.slow
@pytest.mark.parametrize("words, what", [(["task", "update", "-u", "priority=3"], "task ids"), (["task", "delete", "-y"], "task ids"),
                                         (["task", "ls", "--piped-in", "-q"], "task ids"), (["task", "submit", "--from", "-"], "tasks"), (["loop"], "a script")])
def test_a_pipe_from_which_nothing_comes_is_told_of(home, words, what):
    one, other = home.submit("--", "--lr=1"), home.submit("--", "--lr=2")
    process = subprocess.Popen([sys.executable, str(harness.MODULE)] + words, cwd=str(home.cwd), env=harness.clean_env(home.env), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr.readline().decode() == "reading %s from standard input ...\n" % what
        assert process.poll() is None
        sent = {"task ids": one, "tasks": "lr\n3\n", "a script": "true %(lr)"}[what]
        out, err = process.communicate(sent.encode(), timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    left = {task["task_id"]: task for task in home.tasks()}
    assert other in left and {"update": lambda: left[one]["priority"] == 3, "delete": lambda: one not in left, "ls": lambda: out.decode().split() == [one],
                              "submit": lambda: len(left) == 3, "loop": lambda: left[one]["status"] == "success"}[(words + ["", ""])[words[0] == "task"]]()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["task", "update", "-u", "priority=3"], ["task", "delete", "-y"]])
@pytest.mark.parametrize("typed", ["", "\n \n"])
def test_a_stdin_without_ids_is_told_of_and_changes_nothing(home, words, typed):
    home.submit("--", "--lr=1")
    before = home.tasks()
    result = home.cli(*words, stdin=typed)
    assert result.stderr.startswith("No task ids came from standard input.\n") and "Nothing matches" in result.stderr
    assert home.tasks() == before


# ---- asking

def on_terminal(place, words, answers=(), columns=100, env=None, module=harness.MODULE):
    """Return (exit code, what was shown) of a command on a real terminal.

    `answers` are (prompt, text): the text is typed once the prompt is seen."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = harness.clean_env(dict(place.env, COLUMNS="", **(env or {})))
    process = subprocess.Popen([sys.executable, str(module)] + words, cwd=str(place.cwd), env=env, stdin=side,
                               stdout=side, stderr=side, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(side)
    shown, answers = b"", list(answers)
    while select.select([main], [], [], 30)[0]:
        try:
            shown += os.read(main, 65536)
        except OSError:  # so says Linux when the other side is closed
            break
        if answers and shown.rstrip().endswith(answers[0][0].encode()):
            os.write(main, answers.pop(0)[1].encode())
    os.close(main)
    assert not answers, (answers, shown)
    return process.wait(30), shown.decode("utf-8", "replace").replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize("typed, code, left", [("y\n", 0, 2), ("yes\n", 0, 2), ("n\n", 1, 3), ("\n", 1, 3), ("\x04", 1, 3)])
def test_delete_asks_on_a_terminal(home, typed, code, left):
    ids = submit_some(home)
    found, shown = on_terminal(home, ["task", "delete", ids[0]], [("[y/N]", typed)])
    assert found == code and "Delete 1 task for good? [y/N]" in shown
    assert len(home.tasks()) == left


@pytest.mark.slow
def test_update_asks_on_a_terminal(home):
    ids = submit_some(home)
    code, shown = on_terminal(home, ["task", "update", "-s", "pending", "-u", "priority=1"], [("[y/N]", "n\n")])
    assert code == 1 and "Update 3 tasks? [y/N]" in shown
    assert on_terminal(home, ["task", "update", "--id", ids[0], "-u", "priority=1"], [("[y/N]", "y\n")])[0] == 0
    assert on_terminal(home, ["task", "update", "--id", ids[1], "-u", "priority=1", "-q"])[0] == 0
    assert [t["priority"] for t in home.tasks()] == [1, 1, 0]


@pytest.mark.slow
def test_colour_only_on_a_terminal_and_never_with_no_color(home):
    submit_some(home)
    assert "\x1b[" in on_terminal(home, ["task", "ls"], env={"TERM": "xterm", "NO_COLOR": ""})[1]
    assert "\x1b[" not in on_terminal(home, ["task", "ls"], env={"TERM": "xterm", "NO_COLOR": "1"})[1]
    assert "\x1b[" not in on_terminal(home, ["task", "ls", "--no-ansi"], env={"TERM": "xterm", "NO_COLOR": ""})[1]
    assert "\x1b[" not in home.cli("task", "ls", env={"TERM": "xterm", "NO_COLOR": ""}).stdout
    assert "\x1b[36mpending" in home.cli("task", "ls", "--ansi").stdout


@pytest.mark.slow
def test_a_pager_only_on_a_terminal_and_only_for_what_does_not_fit(home):
    home.cli("task", "submit", "--grid", "--", "--x=1:60:1")
    pager = home.write("pager.sh", "#!/bin/sh\necho PAGED\ncat\n")
    pager.chmod(0o755)
    env = {"PAGER": str(pager)}
    assert "PAGED" in on_terminal(home, ["task", "ls"], env=env)[1]
    assert "PAGED" not in on_terminal(home, ["task", "ls", "--no-pager"], env=env)[1]
    assert "PAGED" not in on_terminal(home, ["task", "ls", "--limit", "5"], env=env)[1]
    assert "PAGED" not in home.cli("task", "ls", env=env).stdout
    assert on_terminal(home, ["task", "ls"], env={"PAGER": "no-such-pager"})[1].splitlines()[-1].split()[1] == "60"


# ---- setting up

@pytest.mark.slow
def test_init_by_flags_asks_nothing(server, home):
    words = ["init", "--url", server.url, "--queue-name", "mine", "--password", "secret"]
    result = home.cli(*words)
    assert "Created queue mine" in result.stdout and "Next: python3 -m labtasker task submit" in result.stdout
    path = home.folder / "config.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    home.submit("--", "--lr=1")
    assert server.http("POST", "/api/v1/queues/me/tasks/search", {})[1]["found"] is False
    assert "exists already" in home.cli("queue", "create-from-config").stdout
    refused = home.cli(*words, check=False)
    assert refused.returncode == 2 and "Overwrite" in refused.stderr and "--yes" in refused.stderr
    home.cli(*(words + ["--yes"]))
    wrong = home.cli("init", "--url", server.url, "--queue-name", "mine", "--password", "wrong", "--yes", check=False)
    assert wrong.returncode == 1 and "another password" in wrong.stderr
    assert len(home.tasks()) == 1, "the configuration that works was kept"


@pytest.mark.slow
def test_init_asks_on_a_terminal(server, home):
    code, shown = on_terminal(home, ["init"], [("[none]", server.url + "\n"), ("[default]", "mine\n"),
                                               ("queue:", "secret\n")])
    assert code == 0, shown
    assert "URL" in shown and "Queue name [default]" in shown and "Password" in shown
    assert "secret" not in shown.split("Password", 1)[1]
    assert home.cli("queue", "get").stdout.count("queue_name: mine") == 1
    code, shown = on_terminal(home, ["init"], [("[y/N]", "n\n")])
    assert code == 1 and "Overwrite it? [y/N]" in shown


@pytest.mark.slow
def test_init_without_a_server(home):
    code, shown = on_terminal(home, ["init"], [("[none]", "\n"), ("[default]", "\n")])
    assert code == 0 and "Password" not in shown, shown
    home.submit("--", "--lr=1")
    assert len(home.tasks()) == 1 and (home.folder / "journal.jsonl").exists()


@pytest.mark.slow
def test_init_where_nobody_answers(home):
    words = ["init", "--url", "http://127.0.0.1:9", "--queue-name", "q", "--password", "p"]
    result = home.cli(*words, check=False)
    assert result.returncode == 2 and "http://127.0.0.1:9" in result.stderr and "--yes" in result.stderr
    assert not (home.folder / "config.toml").exists()
    result = home.cli(*(words + ["--yes"]))
    assert "start the server" in result.stdout and (home.folder / "config.toml").exists()


@pytest.mark.slow
def test_config_is_kept_only_where_it_can_be_read(home):
    home.cli("init", "--yes")
    path = home.folder / "config.toml"
    before = path.read_text()
    home.write("good.sh", "#!/bin/sh\nsed -i s/default/other/ \"$1\"\n").chmod(0o755)
    home.write("bad.sh", "#!/bin/sh\necho '= broken' >> \"$1\"\n").chmod(0o755)
    code, shown = on_terminal(home, ["config"], [("[Y/n]", "n\n")], env={"EDITOR": "./bad.sh"})
    assert code == 1 and "config.toml line 10" in shown and path.read_text() == before, shown
    assert [on_terminal(home, ["config"], env={"EDITOR": name})[0] for name in ("true", "no-such-editor")] == [1, 1]
    assert on_terminal(home, ["config"], env={"EDITOR": "./good.sh"})[0] == 0
    assert path.read_text() == before.replace("default", "other") and path.stat().st_mode & 0o777 == 0o600
    assert [name for name in os.listdir(str(home.folder)) if name.startswith("config-")] == []


@pytest.mark.slow
def test_a_broken_configuration_can_be_edited_until_it_is_right(home):
    home.cli("init", "--yes")
    home.write("twice.sh", "#!/bin/sh\nif grep -q broken \"$1\"; then sed -i '/broken/d' \"$1\"; echo '# fine' >> \"$1\"\n"
                           "else echo '= broken' >> \"$1\"; fi\n").chmod(0o755)
    code, shown = on_terminal(home, ["config"], [("[Y/n]", "\n")], env={"EDITOR": "./twice.sh"})
    assert code == 0 and "Edit it again?" in shown, shown
    assert "# fine" in (home.folder / "config.toml").read_text()


def test_a_configuration_that_is_checked_leaves_the_environment_as_it_is(home, monkeypatch):
    with pytest.raises(labtasker.LabtaskerValueError, match="there is no .*config.toml: labtasker init writes it"):
        monkeypatch.setattr(labtasker_cli, "is_terminal", lambda stream: True)
        labtasker_cli.do_config(labtasker.parse("config", []))
    (home.cwd / "root").mkdir()
    for root in (None, str(home.cwd / "root")):
        monkeypatch.delenv("LABTASKER_ROOT", raising=False)
        if root:
            monkeypatch.setenv("LABTASKER_ROOT", root)
        (home.cwd / ".labtasker").mkdir(exist_ok=True)
        for text, mistake in (('[queue]\nqueue_name = "q"\n', None), ("[queue]\nqueue_name = \n", 2)):
            try:
                assert labtasker_cli.checked_config(text) == text and mistake is None
            except labtasker_cli.Mistakes as error:
                assert list(error.args[0]) == [mistake]
            assert os.environ.get("LABTASKER_ROOT") == root and os.listdir(root or str(home.cwd / ".labtasker")) == []


def test_health(both):
    result = both.cli("health")
    assert result.stdout.startswith("healthy") and "ms" in result.stdout
    assert (both.server.url if both.server else "journal.jsonl") in result.stdout


@pytest.mark.parametrize("variable, named", [
    ("LABTASKER_URL", "http://127.0.0.1:9"), ("LABTASKER_URL", "{}/gone"), ("LABTASKER_URL", "file:{}/gone"),
    ("LABTASKER_URL", "file:{}/a file"), ("LABTASKER_ROOT", "{}/gone"), ("LABTASKER_ROOT", "{}/read only")])
def test_health_of_what_is_not_there_ends_with_3_and_makes_nothing(tmp_path, monkeypatch, capsys, variable, named):
    (tmp_path / "a file").touch()
    (tmp_path / "read only").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "read only" not in str(path) and real(path, mode))
    for name, value in (("LABTASKER_ROOT", str(tmp_path)), ("LABTASKER_PASSWORD", "p"), (variable, named.format(tmp_path))):
        monkeypatch.setenv(name, value)
    labtasker.use_client(None)
    try:
        assert labtasker.main(["health"]) == 3
        if "http" not in named:
            assert labtasker.health_check().status == "unhealthy"
    finally:
        labtasker.use_client(None)
    said = "".join(capsys.readouterr())
    assert "healthy" not in said.replace("unhealthy", "") and os.environ[variable].replace("file:", "") in said
    assert sorted(os.listdir(str(tmp_path))) == ["a file", "read only"] and not os.listdir(str(tmp_path / "read only"))


@pytest.mark.slow
def test_queue_commands(server, home):
    env = {"LABTASKER_URL": server.url, "LABTASKER_QUEUE": "q", "LABTASKER_PASSWORD": "p"}
    created = home.cli("queue", "create", "--queue-name", "q", "--password", "p", "--metadata", '{"a": 1}', "-q", env=env)
    text = home.cli("queue", "get", env=env).stdout
    assert "queue_name: q\n" in text and "metadata:\n  a: 1\n" in text and created.stdout.strip() in text
    again = home.cli("queue", "create", "--queue-name", "q", "--password", "p", env=env, check=False)
    assert again.returncode == 1 and "q" in again.stderr
    result = home.cli("queue", "update", "--new-queue-name", "r", "--new-password", "s", "--metadata", '{"b": 2}', env=env)
    assert "labtasker config" in result.stderr
    env.update(LABTASKER_QUEUE="r", LABTASKER_PASSWORD="s")
    assert "metadata:\n  a: 1\n  b: 2\n" in home.cli("queue", "get", env=env).stdout
    home.cli("queue", "delete", "--cascade", "-y", env=env)
    assert home.cli("queue", "get", env=env, check=False).returncode == 3


@pytest.mark.slow
def test_worker_commands(both):
    worker_id = both.cli("worker", "create", "--worker-name", "w", "--metadata", '{"gpu": 0}', "-q").stdout.strip()
    assert "gpu=0" in both.cli("worker", "ls").stdout
    assert both.cli("worker", "ls", "-q", "-s", "active").lines == [worker_id]
    both.cli("worker", "report", worker_id, "suspended")
    assert both.cli("worker", "ls", "-q", "-s", "active").lines == []
    assert both.cli("worker", "ls", "-q", "-f", 'status == "suspended"').lines == [worker_id]
    both.cli("worker", "delete", worker_id, "-y")
    assert both.cli("worker", "ls", "-q").lines == []


@pytest.mark.slow
def test_loop_takes_a_script_from_stdin(home):
    home.submit("--", "--text=a b")
    result = home.cli("loop", stdin="printf '<%s>' %(text) > out.txt\n")
    assert (home.cwd / "out.txt").read_text() == "<a b>", result


@pytest.mark.slow
def test_the_demo_shows_a_sweep_and_leaves_nothing_behind(home):
    result = home.cli("demo", env={"TMPDIR": str(home.cwd)})
    commands = [line for line in result.lines if line.startswith("$ ")]
    assert len(commands) == 5 and all("labtasker" in line for line in commands), result
    assert "[worker 1]" in result.stdout and "[worker 2]" in result.stdout
    assert "8 of 8 tasks done" in result.lines[-1]
    assert os.listdir(str(home.cwd)) == []


# ---- the second file

def test_commands_can_be_imported_from_the_second_file():
    assert labtasker_cli.main is labtasker.main is labtasker_cli.server_main


@pytest.mark.parametrize("name", labtasker.EXTRA_COMMANDS)
def test_the_second_file_enters_its_commands_into_the_table(name):
    assert labtasker.COMMANDS[name].help == labtasker.EXTRA_COMMANDS[name]
    assert name in listed()


@pytest.fixture
def alone(tmp_path):
    """A folder with nothing but labtasker.py, for tests that put more into it."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(str(harness.MODULE), str(folder))
    return folder


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """A folder with nothing but labtasker.py; it is compiled once for all tests."""
    folder = tmp_path_factory.mktemp("one-file")
    shutil.copy(str(harness.MODULE), str(folder))
    return folder


def run_alone(folder, home, *words, **options):
    return harness.run([sys.executable, "-m", "labtasker"] + list(words), home.cwd, env={"PYTHONPATH": str(folder)}, **options)


def run_script(folder, home, *words, **options):
    return harness.run([sys.executable, folder / "labtasker.py"] + list(words), home.cwd, env={"PYTHONPATH": ""}, **options)


@pytest.mark.parametrize("words", [name.split() + more for name in labtasker.EXTRA_COMMANDS for more in ([], ["--help"])],
                         ids=" ".join)
def test_without_the_second_file_its_commands_say_what_they_need(one_file, home, words):
    result = run_alone(one_file, home, *words, check=False)
    assert result.returncode == 1 and result.stdout == "", result
    assert " ".join(words[:2]).replace(" --help", "") in result.stderr
    assert "needs labtasker_cli.py beside labtasker.py" in result.stderr and str(one_file) in result.stderr


def test_labtasker_alone_does_the_work_and_says_what_it_lacks(one_file, home):
    (home.cwd / "labtasker_cli.py").write_text("raise SystemExit('only the file beside labtasker.py is taken')")
    run_script(one_file, home, "task", "submit", "--", "--lr=1")
    assert run_script(one_file, home, "task", "ls", "-q").lines == [t["task_id"] for t in home.tasks()]
    for words in (["help"], ["--help"], ["help", "task"], ["task", "--help"], ["task", "ls", "--help"]):
        assert "task ls" in run_script(one_file, home, *words).stdout
    assert "labtasker_cli.py beside labtasker.py there are also: watch, config, sbatch" in run_script(one_file, home, "help").stdout
    assert "did you mean config" in run_script(one_file, home, "confg", check=False).stderr


@pytest.mark.slow
def test_labtasker_alone_runs_a_cluster(one_file, home, server):
    """Each command of the work, by flags alone; a listing is a plain table, and what only people need is told of."""
    words = ["init", "--url", server.url, "--queue-name", "mine", "--password", "secret"]
    assert "Created queue mine" in run_alone(one_file, home, *words).stdout
    refused = run_alone(one_file, home, *words, check=False)
    assert refused.returncode == 2 and "Overwrite" in refused.stderr and "--yes" in refused.stderr
    run_alone(one_file, home, "queue", "create", "--queue-name", "other", "--password", "p")
    run_alone(one_file, home, "task", "submit", "--grid", "--name", "g", "--max-retries", "1", "--", "--lr=0.1,0.2", "--opt.name=a b")
    run_alone(one_file, home, "task", "submit", "--args", json.dumps({"text": HOSTILE}))
    run_alone(one_file, home, "loop", "-c", "echo %(opt.name); test %(lr) = 0.1", check=False)
    shown = run_alone(one_file, home, "task", "ls", "-f", "exists(args.lr)", "-S", "args.lr", "--columns", "id,status,name,args.lr")
    ids = [task["task_id"] for task in home.tasks("-f", "exists(args.lr)", "-S", "args.lr")]
    assert [line.split() for line in shown.lines] == [
        ["id", "status", "name", "args.lr"], [ids[0][:8], "success", "g", "0.1"], [ids[1][:8], "failed", "g", "0.2"]]
    text = run_alone(one_file, home, "task", "ls", "-s", "pending").stdout
    assert "owned" in text and not set("\x1b\x07\x9b\u202e") & set(text)
    assert "    lr: 0.1" in run_alone(one_file, home, "task", "get", ids[0][:8]).stdout.replace("  lr", "    lr")
    assert "failed     1" in run_alone(one_file, home, "task", "count").stdout
    run_alone(one_file, home, "task", "update", "--name", "g", "-u", "args.lr=9", "--reset-pending", "-q")
    assert run_alone(one_file, home, "task", "delete", "-y", ids[0]).stdout == "Deleted 1 task\n"
    assert run_alone(one_file, home, "task", "wait", "-f", "exists(args.nosuch)").returncode == 0
    worker = run_alone(one_file, home, "worker", "create", "--worker-name", "w", "--metadata", '{"gpu": 0}', "-q").stdout.strip()
    assert "gpu=0" in run_alone(one_file, home, "worker", "ls").stdout
    run_alone(one_file, home, "worker", "report", worker, "crashed")
    run_alone(one_file, home, "worker", "delete", worker, "--yes")
    assert run_alone(one_file, home, "health").stdout.startswith("healthy")
    result = run_alone(one_file, home, "task", "update", "--editor", check=False)
    assert result.returncode == 1 and "--editor needs labtasker_cli.py beside" in result.stderr, result


# Each command of labtasker.py alone: words, stdin, exit code, what stdout has. ID is the first task's id.
ALONE = [
    ("task submit --name a --max-retries 1 -- --lr=0.5 --b=0", None, 0, "Submitted task"),
    ("task submit --grid --unique --name a -- --lr=0.5,1 --b=0", None, 0, "1 already there"),
    ("task why ID -- train %(lr)", None, 0, "the command lacks %(b)"),
    ("loop -- sh -c 'echo out; exit 3' %(lr) %(b)", None, 0, ""),
    ("task ls -s failed --fmt yaml", None, 0, "status: failed"),
    ("task ls --fmt csv", None, 0, "args.lr"),
    ("task ls --columns name,args.lr", None, 0, "args.lr"),
    ("task get ID --fmt csv", None, 0, "failed"),
    ("task logs ID", None, 0, "out"),
    ("task count --by args.lr", None, 0, "total"),
    ("task table --by args.lr --of summary.acc", None, 0, "failed"),
    ("task history ID --fmt json", None, 0, "[]"),
    ("task harvest ID --metric acc=nothing:([0-9]+)", None, 0, ""),
    ("report acc=1", None, 0, ""),
    ("task why ID", None, 0, "It failed for good"),
    ("task retry ID --dry-run", None, 0, "0.5"),
    ("task retry ID", None, 0, "1 task pending again"),
    ("task update ID-ON-STDIN -u priority=3", "ID", 0, "Updated 1 task"),
    ("task wait -s success", None, 0, ""),
    ("task cancel ID", None, 0, "Cancelled 1 task"),
    ("task delete -y ID", None, 0, "Deleted 1 task"),
    ("worker create --worker-name w", None, 0, "Created worker"),
    ("worker ls --fmt jsonl", None, 0, "active"),
    ("queue get", None, 0, "queue_name: default"),
    ("queue pause", None, 0, "Paused queue default"),
    ("queue resume --json", None, 0, '"paused_at": null'),
    ("queue update --metadata {}", None, 0, "Updated the queue"),
    ("journal stats", None, 0, "known to be on disk"),
    ("journal compact", None, 0, "bytes, now"),
    ("journal verify", None, 0, "fine"),
    ("journal repair --yes", None, 0, "nothing was changed"),
    ("health", None, 0, "healthy"),
    ("server status", None, 3, "not running"),
    ("server stop", None, 1, ""),
    ("queue delete --cascade --yes", None, 0, "Deleted queue default"),
    ("queue create-from-config", None, 0, "Created queue default"),
    ("help filter", None, 0, "regex(...)"),
    ("help events", None, 0, "connect_events"),
    ("help exit", None, 0, "Ctrl-C"),
    ("help after", None, 0, "--after-any"),
    ("help template", None, 0, "%(--key)"),
    ("help settings", None, 0, "LABTASKER_URL"),
    ("help journal", None, 0, "durable"),
    ("help", None, 0, "watch, config"),
    ("demo", None, 0, "8 of 8 tasks done"),
]
# These are tried elsewhere with labtasker.py alone, or serve until they are stopped.
ELSEWHERE = {"init", "queue create", "serve", "worker report", "worker delete", "event listen"}


def pythons():
    """Return the interpreters that the one file is tried with: this one, and the oldest where pyenv has it."""
    oldest = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.6*/bin/python3")))[:1]
    return [sys.executable] + oldest


@pytest.mark.slow
@pytest.mark.parametrize("python", pythons(), ids=lambda path: "this" if path == sys.executable else "3.6")
def test_every_command_of_the_one_file_works_without_the_other(one_file, home, python):
    ids = []
    for words, stdin, code, shown in ALONE:
        words = [ids[0] if word == "ID" else word for word in shlex.split(words) if word != "ID-ON-STDIN"]
        result = harness.run([python, "-m", "labtasker"] + words, home.cwd, env={"PYTHONPATH": str(one_file)}, check=False,
                             stdin=ids[0] if stdin else None)
        assert result.returncode == code and shown in result.stdout, result
        ids = ids or [task["task_id"] for task in home.tasks()]
    tried = {" ".join(words.split()[:size]) for words, _, _, _ in ALONE for size in (1, 2)}
    assert set(labtasker.COMMANDS) - set(labtasker.EXTRA_COMMANDS) - ELSEWHERE <= tried


@pytest.mark.slow
@pytest.mark.parametrize("typed, code, shown", [
    ("a secret\n", 0, "Updated the queue"), ("\n", 0, "The password of queue default is now: "), ("\x04", 2, "no answer")])
def test_a_new_password_is_asked_for_unseen_or_made_up(home, typed, code, shown):
    done = on_terminal(home, ["queue", "update", "--new-password"], [("made up):", typed)])
    assert done[0] == code and shown in done[1] and "a secret" not in done[1]
    password = done[1].split()[-1] if "now" in shown else typed.strip()
    stored, = [queue["password"] for queue in json.loads(harness.run([sys.executable, "-c", PASSWORDS], home.cwd).stdout)] or [None]
    assert labtasker.is_password(password, stored) == (code == 0)


PASSWORDS = """if True:
    import json, labtasker
    store = labtasker.Store(".labtasker/journal.jsonl")
    store.file.open()
    print(json.dumps([{"password": queue.record.password} for queue in store.state.queues.values()]))
"""


@pytest.mark.slow
def test_the_one_file_asks_before_it_deletes_for_good(one_file, home):
    home.submit("--", "--lr=1")
    code, shown = on_terminal(home, ["task", "delete", "-f", "True"], [("[y/N]", "n\n")], module=one_file / "labtasker.py")
    assert code == 1 and "Delete 1 task for good? [y/N]" in shown and len(home.tasks()) == 1


def test_hints_name_the_program_as_it_was_started(alone, home):
    (alone / "lt").write_text("import sys; sys.argv[0] = 'lt'; import labtasker; sys.exit(labtasker.main())")
    starts = {"python3 -m labtasker": ["-m", "labtasker"], "python3 %s/labtasker.py" % alone: [alone / "labtasker.py"],
              "lt": [alone / "lt"]}
    for shown, words in starts.items():
        result = harness.run([sys.executable] + words + ["task", "ls"], home.cwd, env={"PYTHONPATH": str(alone)})
        assert result.stderr == "No tasks yet: %s task submit -- --lr=0.1\n" % shown
        result = harness.run([sys.executable] + words + ["task", "ls", "--help"], home.cwd, env={"PYTHONPATH": str(alone)})
        assert result.lines[0].startswith("usage: %s task ls" % shown) and "example: labtasker task ls" in result.stdout


def test_every_noun_of_a_command_is_named_as_started_in_hints():
    for path in set(labtasker.COMMANDS).union(labtasker.EXTRA_COMMANDS):
        assert labtasker.as_started("labtasker %s" % path) != "labtasker %s" % path


def test_a_second_file_of_another_version_does_not_stop_the_work(alone, home):
    (alone / "labtasker_cli.py").write_text("from labtasker import no_such_name")
    run_alone(alone, home, "task", "submit", "--", "--lr=1")
    result = run_alone(alone, home, "help")
    assert "another version" in result.stderr and "no_such_name" in result.stderr and "task ls" in result.stdout
    assert "needs labtasker_cli.py" in run_alone(alone, home, "config", check=False).stderr


ONE_MODULE = """
import runpy, sys
sys.argv = ["labtasker", "help", "api"]
try:
    {start}
except SystemExit as end:
    assert not end.code, end.code
copies = [m for m in list(sys.modules.values()) if hasattr(m, "EXTRA_COMMANDS") and hasattr(m, "ROUTES") and
          m.__name__ != "labtasker_cli"]
import labtasker, labtasker_cli
assert labtasker_cli.COMMANDS is labtasker.COMMANDS and "config" in labtasker.COMMANDS
assert len(set(map(id, copies))) == 1, copies
"""


@pytest.mark.parametrize("start", [
    "import labtasker_cli; sys.exit(labtasker_cli.main())", "import labtasker; sys.exit(labtasker.main())",
    "import labtasker, labtasker_cli; sys.exit(labtasker_cli.server_main())"])
def test_there_is_one_copy_of_the_module_however_it_is_started(home, start):
    assert "GET /health" in home.python(ONE_MODULE.format(start=start)).stdout


@pytest.mark.parametrize("words", [[str(harness.MODULE)], ["-m", "labtasker"]], ids=["file", "module"])
def test_the_second_file_is_found_by_the_file_and_by_the_module(home, words):
    seen = home.write("sitecustomize.py", """
import atexit, sys
def tell():
    found = {id(m) for m in list(sys.modules.values()) if hasattr(m, "ROUTES") and m.__name__ != "labtasker_cli"}
    print("copies:", len(found), sys.modules["labtasker_cli"].COMMANDS is sys.modules["labtasker"].COMMANDS)
atexit.register(tell)
""")
    path = "%s:%s" % (seen.parent, harness.ROOT)
    result = harness.run([sys.executable] + words + ["help", "api"], home.cwd, env={"PYTHONPATH": path})
    assert "GET /health" in result.stdout and result.lines[-1] == "copies: 1 True", result


def test_work_does_not_read_the_second_file(alone, home):
    (alone / "labtasker_cli.py").write_text("raise SystemExit('not needed')")
    run_alone(alone, home, "task", "submit", "--", "--lr=1")
    run_alone(alone, home, "loop", "--", "echo", "%(lr)")
    run_alone(alone, home, "task", "ls", "--fmt", "jsonl")
    run_alone(alone, home, "task", "ls", "-q")


def test_help_of_serve_tells_what_each_way_to_sync_may_lose():
    text = " ".join(labtasker.help_of("serve").split())
    for mode, meaning in labtasker.FSYNC_MODES.items():
        assert "%s: %s" % (mode, meaning) in text


def test_an_unexpected_error_is_one_line_unless_asked(home, monkeypatch, capsys):
    def burst(options):
        raise ZeroDivisionError("by zero")
    monkeypatch.setitem(labtasker.COMMANDS, "health", labtasker.COMMANDS["health"]._replace(run=burst))
    assert labtasker.main(["health"]) == 1
    assert "bug" in capsys.readouterr().err
    monkeypatch.setenv("LABTASKER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        labtasker.main(["health"])


@pytest.mark.parametrize("error, code", [(UsageError("x"), 2), (labtasker.FilterError("x", "y", 0), 2),
                                         (labtasker.LabtaskerConnectError("x"), 3), (labtasker.StoreDamaged("x"), 1), (labtasker.StoreFull("x"), 1),
                                         (labtasker.StoreUnavailable("x"), 3), (labtasker.NotFound("x"), 1),
                                         (labtasker.LabtaskerHTTPStatusError(401, "x"), 3),
                                         (labtasker.LabtaskerHTTPStatusError(503, str(labtasker.newer("j", "9.9", "w"))), 1),
                                         (labtasker.LabtaskerHTTPStatusError(400, "x"), 1), (KeyboardInterrupt(), 130),
                                         (FileNotFoundError(2, "No such file", "f"), 1)])
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(options):
        raise error
    monkeypatch.setitem(labtasker.COMMANDS, "health", labtasker.COMMANDS["health"]._replace(run=fail))
    assert labtasker.main(["health"]) == code
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_journal_commands(home):
    home.cli("task", "submit", "--", "--a=1")
    home.cli("task", "submit", "--", "--a=2")
    path = home.cwd / ".labtasker" / "journal.jsonl"
    assert re.search(r": fine, 4 lines, %d bytes" % path.stat().st_size, home.cli("journal", "verify").stdout)
    assert "lines since" in home.cli("journal", "stats").stdout
    assert home.cli("journal", "repair").stdout.endswith("fine, nothing was changed\n")
    assert re.search(r": \d+ bytes, now \d+", home.cli("journal", "compact").stdout)
    for a in (3, 4, 5):
        home.cli("task", "submit", "--", "--a=%d" % a)
    content = path.read_bytes()
    at = content.index(b'"a":4')
    path.write_bytes(content[:at] + b'"b":4' + content[at + 5:])
    for command in (["task", "ls"], ["task", "submit", "--", "--a=6"]):
        done = home.cli(*command, check=False)
        assert done.returncode == 1 and "labtasker journal repair" in done.stderr and "Traceback" not in done.stderr
    found = home.cli("journal", "verify", check=False)
    assert found.returncode == 1 and "byte %d: " % (content.rindex(b"\n", 0, at) + 1) in found.stdout
    refused = home.cli("journal", "repair", check=False)
    assert refused.returncode == 2 and "--yes" in refused.stderr
    mended = home.cli("journal", "repair", "--yes").stdout
    assert "lost: lines 6 to 6" in mended and ".damaged-" in mended and ".bad-" in mended
    assert [task["args"] for task in home.tasks()] == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 5}]


@pytest.mark.slow
def test_journal_commands_beside_a_server(server_home):
    server_home.submit("--", "--a=1")
    path = str(server_home.folder / "journal.jsonl")
    assert "fine" in server_home.cli("journal", "verify", "--db-path", path).stdout
    for command in ("compact", "repair"):
        done = server_home.cli("journal", command, "--db-path", path, check=False)
        assert done.returncode == 1 and server_home.server.url in done.stderr if command == "compact" else "fine" in done.stdout
    assert server_home.cli("journal", "stats", "--db-path", "nosuch", check=False).returncode == 1


def test_what_was_cut_off_is_no_damage_and_a_dry_repair_says_what_it_would_do(home, capsys):
    for a in (1, 2, 3):
        labtasker.submit_task(args={"a": a})
    forget_client()
    path = home.folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert labtasker.main(["journal", "verify"]) == 0
    said = capsys.readouterr().out
    assert "a line that is cut off\nThose bytes were never acknowledged" in said and ": fine, " in said
    assert labtasker.main(["journal", "repair", "--dry-run"]) == 0
    assert re.search(r": would be replaced by a file of its %d good lines; the damaged file would be kept" % (whole.count(b"\n") - 2), capsys.readouterr().out)
    assert path.read_bytes() == whole[:-9]
    path.write_bytes(whole)


def test_a_task_that_somebody_else_has_deleted_meanwhile_is_no_error(home, capsys, monkeypatch):
    ids = [labtasker.submit_task(args={"a": a}).task_id for a in (1, 2)]
    monkeypatch.setattr(labtasker, "_chosen_tasks", lambda *_: [labtasker.Task({"task_id": "gone", "args": {}})] + [
        labtasker.get_task(task_id) for task_id in ids])
    capsys.readouterr()
    assert labtasker.main(["task", "delete", "-y", "--json", "gone"]) == 0
    assert json.loads(capsys.readouterr().out) == {"matched": 3, "changed": 2} and labtasker.ls_tasks().content == []


def test_ids_that_are_no_one_s_or_several_s_are_refused(home, monkeypatch):
    found = [labtasker.Task({"task_id": "ab%d" % at}) for at in range(2)]
    with pytest.raises(UsageError, match="more than one task id starts with ab"):
        monkeypatch.setattr(labtasker, "ls_tasks", lambda **_: types.SimpleNamespace(content=found))
        labtasker._id_that_starts("ab", labtasker.ls_tasks)
    with pytest.raises(labtasker.NotFound, match="no worker nosuch-worker"):
        labtasker._worker_named("nosuch-worker")


def test_counts_of_a_field_are_written_as_csv_with_its_name(home, capsys):
    labtasker.submit_tasks([{"args": {"a": a}} for a in (1, 1, 2)])
    capsys.readouterr()
    assert labtasker.main(["task", "count", "--by", "args.a", "--fmt", "csv"]) == 0
    assert list(csv.DictReader(io.StringIO(capsys.readouterr().out))) == [{"args.a": "1", "tasks": "2"}, {"args.a": "2", "tasks": "1"}]
    assert labtasker.main(["task", "table", "--by", "args.a", "--of", "priority", "--name", "none"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "none" in shown.err


@pytest.mark.parametrize("typed, url", [("head:9321", "http://head:9321"), (" 10.0.0.1:80 ", "http://10.0.0.1:80"), ("https://h/x/", "https://h/x"),
                                        ("/a/folder/", "/a/folder/"), ("", "")])
def test_a_host_with_a_port_is_a_server_and_anything_else_a_folder(typed, url):
    assert labtasker._base_url(typed) == url


def test_a_list_of_submissions_is_a_list(home):
    for text, words in (('{"a": 1}', "takes a list of dicts"), ("[1]", "item 1 of the list is 1, not a dict")):
        with pytest.raises(UsageError, match=words):
            labtasker.tasks_of_list("tasks.json", text)


def test_a_server_that_is_away_is_not_idle(home, monkeypatch):
    def counted(query):
        if isinstance(found, Exception):
            raise found
        return types.SimpleNamespace(counts=found)
    monkeypatch.setattr(labtasker, "counted", counted)
    for found, idle in (({"pending": 0, "running": 0}, True), ({"pending": 1, "running": 0}, False), ({"pending": 0, "running": 1}, False),
                        (labtasker.LabtaskerConnectError("no answer"), False)):
        assert labtasker._is_idle() is idle
    found = labtasker.NotFound("no such queue")
    with pytest.raises(labtasker.NotFound):
        labtasker._is_idle()


def test_ids_that_begin_alike_are_shown_until_they_differ(home, capsys):
    for task_id in ("0123456789ab-1", "0123456789ab-2"):
        labtasker.submit_task(args={"a": 1}, task_id=task_id)
    capsys.readouterr()
    assert labtasker.main(["task", "ls"]) == 0
    assert sorted(line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]) == ["0123456789ab-1", "0123456789ab-2"]


def test_an_input_that_can_not_be_waited_for_is_read_at_once(monkeypatch):
    for stdin in (None, io.StringIO("x")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert labtasker._wait_for_stdin("ids", 0) is None


def test_a_server_that_does_not_stop_is_told_and_what_is_another_user_s_left(home, monkeypatch, tmp_path):
    owner = {"pid": os.getpid(), "host": "h", "started": labtasker.process_start(os.getpid())}
    monkeypatch.setattr(labtasker, "serving", lambda path: labtasker.Serving({}, owner, "here"))
    sent = []
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    options = labtasker.parse("server stop", ["--timeout", "0"])
    with pytest.raises(labtasker.LabtaskerRuntimeError, match="has not ended yet. kill -9 %d ends it" % os.getpid()):
        labtasker.do_server_stop(options)
    assert sent == [(os.getpid(), 15)]

    def refuse(error):
        raise error
    monkeypatch.setattr(os, "kill", lambda *_: refuse(PermissionError()))
    with pytest.raises(labtasker.LabtaskerRuntimeError, match="another user's: only that user can stop it"):
        labtasker.do_server_stop(options)
    monkeypatch.setattr(os, "kill", lambda *_: refuse(ProcessLookupError()))
    assert labtasker.stop_process(owner, 0) is True


def test_serve_help_says_what_each_fsync_may_lose(home):
    text = " ".join(home.cli("serve", "--help").stdout.split())
    for words in ("a power cut loses up to a second", "up to half a minute"):
        assert words in text


@pytest.mark.parametrize("use", [
    lambda tmp_path: labtasker.main(["task", "ls"]), lambda tmp_path: labtasker.Store(str(tmp_path / "journal.jsonl")), lambda tmp_path: labtasker.loop()(lambda lr: None)()])
def test_a_system_without_fcntl_is_told_what_is_missing_and_what_to_do(tmp_path, monkeypatch, capsys, use):
    monkeypatch.setattr(labtasker, "fcntl", None)
    try:
        assert use(tmp_path) == 1
        message = capsys.readouterr().err
    except labtasker.LabtaskerRuntimeError as error:
        message = str(error)
    assert re.search("needs the module fcntl, .*run it in WSL", message) and not os.listdir(str(tmp_path))


SLOW_TO_IMPORT = {"argparse", "ast", "asyncio", "base64", "email", "gettext", "hashlib", "http", "inspect", "locale",
                  "logging", "pathlib", "random", "selectors", "shutil", "socket", "ssl", "subprocess", "tempfile",
                  "typing", "urllib", "uuid"}
STARTS = {  # what is started: what it may import of those, having no other way
    "import labtasker": set(),
    "import labtasker; labtasker.main(['task', 'submit', '--', '--lr=0.1', '--model=resnet-50'])":
        {"argparse", "gettext", "locale"} | ({"shutil"} if sys.version_info < (3, 9) else set()),  # by argparse of 3.8
    "import labtasker; labtasker.main(['--help'])": {"typing"},  # by importlib.util of Python 3.9
}


@pytest.mark.parametrize("text", STARTS)
def test_a_start_imports_nothing_that_is_slow(both, text):
    """A timing depends on the machine; what makes a start slow does not."""
    program = "import sys; %s; print(*{name.split('.')[0] for name in sys.modules})" % text
    found = harness.run([sys.executable, "-S", "-c", program], both.cwd, env=both.env).lines[-1].split()
    assert "json" in found
    allowed = STARTS[text] | ({"socket", "selectors"} if both.kind == "server" and "submit" in text else set())
    assert not (SLOW_TO_IMPORT - allowed).intersection(found)


# ---- mistakes that are no errors: what is said beside the result

NOTED = [  # a command line, what a note on stderr says
    ("task ls -f 'created_at > \"2026-01-01\"'", ['created_at > "2026-01-01" is never true', 'write created_at > date("2026-01-01")']),
    ("task ls -f '\"2026\" < start_time'", ['write start_time > date("2026")']),
    ("task count -f 'priority >= \"1\"'", ["is never true: priority is a number", "write priority >= 1"]),
    ("task wait -f 'status == \"pendng\"'", ['status == "pendng" is never true; did you mean pending?']),
    ("task ls -f 'status in [\"success\", \"done\"]'", ['status == "done" is never true. The statuses are pending, running']),
    ("task ls -f 'regex(status, \"^PEND\")'", ['regex(status, "^PEND") is never true']),
    ("task ls -f '{\"status\": \"failde\"}'", ["did you mean failed?"]),
    ("task ls -f 'task_name == 3'", ['write task_name == "3"']),
    ("task ls -f 'last_modified - created_at > 60'", ["last_modified is a time, and only numbers can be calculated with"]),
    ("task ls -f 'status.x == 1'", ["status.x is never there"]),
    ("task ls -f 'args == 1'", ["args is a dict"]),
    ("worker ls -f 'status == \"activ\"'", ["did you mean active?"]),
    ("task ls -f 'args.lr > \"1\"'", ["args.lr is a number in each task that has it", "write args.lr > 1"]),
    ("task delete -y -f 'args.lr == \"0.1\"'", ["nothing was deleted", "write args.lr == 0.1"]),
    ("task update -y -f 'args.model > 3' -u priority=1", ["args.model is a text", "nothing was updated"]),
    ("task retry -s pending -f 'regex(args.lr, \"1\")'", ["regex() is for texts", "nothing was retried"]),
    ("task cancel -y -f 'args.modle == \"vit\"'", ["no task has args.modle; did you mean args.model?"]),
    ("task ls -f 'args.model == \"VIT\"'", ['did you mean "vit"?']),
    ("task ls -f 'summary.model == \"vit\"'", ["no task has summary.model; did you mean args.model?"]),
    ("task ls --name swepe", ["No task is named swepe; did you mean sweep?"]),
    ("task count --by args.modle", ["no task has args.modle; did you mean args.model?"]),
    ("task ls -S args.lrr", ["no task has args.lrr; did you mean args.lr?"]),
    ("task ls --columns args.lrr", ["no task has args.lrr; did you mean args.lr?"]),
    ("task submit --dry-run -- --lr=0.1,0.2", ["task submit --grid -- --lr=0.1,0.2"]),
    ("task submit --dry-run -- --seed=1:5:1", ["task submit --grid -- --seed=1:5:1"]),
    ("task submit --dry-run -- --model=vit,resnet", ["task submit --grid"]),
    ("task submit --dry-run -- --lr=log:1e-4:1", ["task submit --sample 20 -- --lr=log:1e-4:1"]),
    ("task submit --dry-run -- --lr=1 --priority=3", ["--priority after -- is an argument of the task"]),
]
UNNOTED = [  # what is right as it stands, or plain enough
    "task ls -f 'start_time == None'", "task ls -f 'created_at > date(\"1 hour ago\")'", "task ls -f 'priority > -0.5'",
    "task ls -f 'regex(status, \"pend|run\")'", "task ls -f 'status == \"pending\"'", "task ls -S args.lr",
    "task submit --dry-run -- --desc='hello, world'", "task submit --dry-run -- '--lr=[0.1, 0.2]'",
    "task submit --dry-run --grid -- --lr=0.1,0.2", "task submit --dry-run --name a -- --lr=1 --name=x", "task count --by args.lr"]


def test_what_can_never_be_true_and_what_was_perhaps_meant_is_said(crowded, monkeypatch, capsys):
    monkeypatch.chdir(crowded.cwd)
    before = (crowded.folder / "journal.jsonl").read_bytes()
    for line, words in NOTED + [(line, []) for line in UNNOTED]:
        labtasker._DOUBTED.clear()
        assert labtasker.main(shlex.split(line)) == 0, line
        told = capsys.readouterr().err
        assert all(word in told for word in words), (line, told)
        said = [text for text in told.split("\n") if text.startswith(("Note", "Filter", "No task is", "labtasker: filter"))]
        assert said if words else not said, (line, told)
    assert (crowded.folder / "journal.jsonl").read_bytes() == before
    labtasker.use_client(None)


def test_a_doubt_is_told_once_a_process(home, capsys):
    for _ in "12":
        labtasker.ls_tasks(extra_filter='retries > "once"')
    assert capsys.readouterr().err.count("retries is a number") == 1


def test_yes_and_json_are_taken_everywhere():
    """-y wherever something is asked or changed at once; --json wherever there is --fmt."""
    asks = ["task update", "task delete", "task retry", "task cancel", "queue delete", "worker delete", "journal repair", "init"]
    for path in asks:
        words = ["x"] if path == "worker delete" else []
        assert labtasker.parse(path, words + ["-y"]).yes is labtasker.parse(path, words + ["--yes"]).yes is True
    for path, row in labtasker.COMMANDS.items():
        flags = [flag for names, _ in row.options for flag in names]
        assert ("--fmt" in flags) == ("--json" in flags) or path == "event listen", path
    assert labtasker.parse("task ls", ["--json"]).fmt == "json" and labtasker.parse("task ls", []).fmt == "table"
    assert labtasker.parse("task get", ["x", "--json"]).fmt == "json" and labtasker.parse("task get", ["x"]).fmt == "yaml"


def test_json_is_one_document(home, monkeypatch, capsys):
    ids = labtasker.submit_tasks([{"args": {"x": x}} for x in (1, 2)])
    assert labtasker.main(["task", "ls", "--json"]) == 0
    assert [task["task_id"] for task in json.loads(capsys.readouterr().out)] == ids
    assert labtasker.main(["task", "get", ids[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["args"] == {"x": 1}
    assert labtasker.main(["worker", "ls", "--fmt", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_cancel_takes_ids_stdin_and_selectors_and_leaves_what_is_over(home, capsys, monkeypatch):
    ids = labtasker.submit_tasks([{"args": {"x": x}} for x in range(6)])
    assert labtasker.fetch_task().task.task_id == ids[0]
    assert labtasker.fetch_task().task.task_id == ids[1]
    labtasker.report_task_status(ids[1], "success")

    def statuses():
        return [{task.task_id: task for task in labtasker.ls_tasks()}[each].status for each in ids]
    assert labtasker.main(["task", "cancel", "--dry-run", "-f", "args.x < 3"]) == 0
    assert "Would cancel 2 tasks" in capsys.readouterr().err
    assert statuses() == ["running", "success"] + ["pending"] * 4
    assert labtasker.main(["task", "cancel", "-y", "-f", "args.x < 3"]) == 0
    assert capsys.readouterr().out == "Cancelled 2 tasks; over already: 1 success\n"
    assert statuses() == ["cancelled", "success", "cancelled"] + ["pending"] * 3
    assert labtasker.main(["task", "cancel", ids[3][:13], ids[1]]) == 0
    assert statuses() == ["cancelled", "success", "cancelled", "cancelled", "pending", "pending"]
    assert home.cli("task", "cancel", "-q", stdin=ids[4] + "\n").stdout == ""
    assert statuses()[4:] == ["cancelled", "pending"]
    assert home.cli("task", "cancel", ids[5], MISSING, check=False).returncode == 1
    assert statuses()[5] == "pending"


def test_what_ends_while_a_person_thinks_is_not_cancelled(home, monkeypatch):
    ids = labtasker.submit_tasks([{"args": {"x": x}} for x in range(2)])
    task_id = labtasker.fetch_task().task.task_id
    monkeypatch.setattr(labtasker, "confirm", lambda *_: labtasker.report_task_status(task_id, "success"))
    assert labtasker.main(["task", "cancel", "-s", "running"]) == 0
    assert {task.task_id: task.status for task in labtasker.ls_tasks()} == {task_id: "success", ids[1]: "pending"}


@pytest.mark.parametrize("words, code, said", [
    (["queue", "get", "-q"], 1, "has no id yet"), (["task", "submit", "--metadata=--", "--", "--a=1"], 2, "-- is no value"),
    (["task", "submit", "--from", "/dev/zero"], None, "is a device"), (["loop", "--script-path", "/dev/full"], None, "is a device"),
    (["journal", "verify", "--db-path", "a\x1b[31m"], 1, "\\x1b")], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_can_not_be_meant_is_refused_with_a_word(tmp_path, monkeypatch, capsys, words, code, said):
    monkeypatch.setenv("LABTASKER_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\x1b[31m").write_text("no journal\n")
    labtasker.use_client(None)
    ended = labtasker.main(words)
    labtasker.use_client(None)
    told = "".join(capsys.readouterr())
    assert ended == (code or ended) != 0 and said in told and "\x1b" not in told and "bug" not in told


@pytest.mark.parametrize("asked", [None, "ascii"])
def test_a_listing_never_fails_for_an_encoding_and_what_is_piped_comes_back_unless_that_encoding_was_asked_for(
        tmp_path, monkeypatch, asked):
    args = {"a": "x\u00fc \U0001f600", "b": "\u65e5, '\"\n"}
    monkeypatch.setenv("LABTASKER_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", asked or "")
    labtasker.use_client(None)
    labtasker.submit_task(args=args)
    for fmt in labtasker.FORMATS + ("table",):
        out = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
        with monkeypatch.context() as piped:
            piped.setattr(sys, "stdout", out)
            assert labtasker.main(["task", "ls", "--fmt", fmt]) == 0
        out.flush()
        said = out.buffer.getvalue()
        assert said.isascii() if asked else (fmt in ("json", "jsonl") or "\u65e5".encode() in said)
        if fmt in ("json", "jsonl"):
            found = json.loads(said.decode())
            assert (found if fmt == "jsonl" else found[0])["args"] == args
        elif fmt == "csv" and not asked:
            row, = csv.DictReader(io.StringIO(said.decode(), newline=""))
            assert {"a": row["args.a"], "b": row["args.b"]} == args
    labtasker.use_client(None)
