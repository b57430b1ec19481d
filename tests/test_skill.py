"""The skill document: every block of it is run, every promise of its prose, tables and signatures is tested.

`skill/` holds the document's blocks word for word, one a file. A test names the piece that it runs by its first
line; the last test sees to it that no piece is left out.
"""
import inspect
import itertools
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading

import pytest

import labtasker
from harness import TESTS, end_group, clean_env, wait_until
from labtasker.api_models import TaskUpdateRequest

SKILL = TESTS / "skill"

# What the document's jobs call. Each leaves a line in ran.jsonl.
TRAIN_SCRIPT = """
import json, os, sys
with open("ran.jsonl", "a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}) + "\\n")
"""
PRELUDE = """
import json, math
import labtasker
from labtasker import Required

def note(**what):
    with open("ran.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")

def train(lr, model):
    note(lr=lr, model=model)
    return 1 - lr, lr
"""


def block(name):
    """Return a block of the document."""
    return (SKILL / name).read_text(encoding="utf-8")


def pieces(name):
    """Return {first line: text} of a block's pieces: each begins with a comment after an empty line."""
    found, text = {}, ""
    for part in re.split(r"(?:\A|\n\n)(?=# )", block(name)):
        if part.startswith("# "):
            found[part.split("\n", 1)[0]] = part + "\n"
        else:
            text = part
    return found or {None: text}


def piece(name, first_line):
    """Return the piece of a block that begins with this line."""
    return pieces(name)[first_line]


def submit(args, **options):
    """Return the id of a new task."""
    return labtasker.submit_task(args=args, **options).task_id


def get(task_id):
    return labtasker.ls_tasks(task_id=task_id).content[0]


def listed(**options):
    return labtasker.ls_tasks(limit=10000, **options).content


def fetch(task_id):
    """Make this task run, for nobody."""
    answer = labtasker.fetch_task(extra_filter='task_id == "%s"' % task_id, eta_max="1h", start_heartbeat=False)
    assert answer.found and answer.task.task_id == task_id
    return answer.task


def bring_to(status, task_id, summary=None):
    """Bring a new task to this status."""
    if status == "cancelled":
        update(task_id, status="cancelled")
    elif status != "pending":
        fetch(task_id)
        if status != "running":
            labtasker.report_task_status(task_id=task_id, status=status, summary=summary)
    assert get(task_id).status == status
    return task_id


def update(task_id, reset_pending=False, **fields):
    return labtasker.update_tasks([TaskUpdateRequest(task_id=task_id, **fields)], reset_pending=reset_pending)


def ran(place):
    """Return what the jobs noted, in order."""
    path = place.cwd / "ran.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_loop(place, text, **options):
    """Return the Result of a script of the document with what it calls around it; its last `main` is run."""
    return place.python(PRELUDE + text + "\n\nmain()\n", **options)


def statuses(**options):
    return [task.status for task in listed(**options)]


# Core concepts ################################################################

# "# Task fields (on objects from ls_tasks and task_info):"
FIELDS = {"task_id", "task_name", "status", "args", "metadata", "summary", "priority", "max_retries", "retries",
          "created_at", "last_modified", "start_time", "worker_id"}


def test_a_new_task_has_every_field_and_the_defaults(both):
    task = get(submit({"lr": 0.1}))
    assert FIELDS <= set(vars(task) if hasattr(task, "__dict__") else task.to_dict())
    assert task.task_name is None and task.status == "pending" and task.args == {"lr": 0.1}
    assert task.priority == 0 and task.max_retries == 3 and task.retries == 0
    assert task.created_at.tzinfo is not None and task.last_modified >= task.created_at


def test_summary_is_a_dict_even_where_nothing_was_written(both):
    task_id = submit({"lr": 0.1})
    assert get(task_id).summary == {} and get(task_id).metadata == {}
    bring_to("success", task_id)
    assert get(task_id).summary == {}
    assert get(task_id).summary.get("acc") is None


@pytest.mark.slow
def test_start_time_and_worker_are_none_until_a_worker_has_it(both):
    task_id = submit({"lr": 0.1, "model": "vit"})
    assert get(task_id).start_time is None and get(task_id).worker_id is None
    run_loop(both, """
@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    task = labtasker.task_info()
    note(started=task.start_time is not None, worker=task.worker_id, same=task.worker_id == labtasker.ls_tasks(
        task_id=task.task_id).content[0].worker_id, status=task.status)
""")
    seen, = ran(both)
    assert seen["started"] and seen["worker"] and seen["same"] and seen["status"] == "running"
    assert get(task_id).start_time is not None


def test_loop_takes_the_highest_priority_first_and_then_the_oldest(both):
    for number, priority in enumerate([0, 10, -5, 10, 3]):
        submit({"lr": number, "model": "m"}, priority=priority)
    run_loop(both, piece("22-loop.py", "# Access args as dict instead of keyword args"))
    assert [line["lr"] for line in ran(both)] == [1, 3, 4, 0, 2]


def test_command_loop_takes_the_highest_priority_first(both):
    both.write("train.py", TRAIN_SCRIPT)
    for lr, priority in [(0.1, 1), (0.2, 3), (0.3, 2)]:
        submit({"lr": lr}, priority=priority)
    both.bash("labtasker loop -- python train.py '%(lr)'")
    assert [line["argv"] for line in ran(both)] == [["0.2"], ["0.3"], ["0.1"]]


def test_loop_ends_when_no_pending_task_matches(both):
    submit({"other": 1})
    bring_to("success", submit({"lr": 1, "model": "m"}))
    run_loop(both, piece("22-loop.py", "# Access args as dict instead of keyword args"))
    both.bash("labtasker loop -- python train.py '%(lr)'")
    assert ran(both) == []
    assert sorted(statuses()) == ["pending", "success"]


FAILING = """
@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    note(retries=labtasker.task_info().retries)
    raise RuntimeError("diverged")
"""


@pytest.mark.slow
def test_each_failure_counts_a_retry_and_the_last_one_is_final(both):
    task_id = submit({"lr": 0.1, "model": "m"}, max_retries=3)
    run_loop(both, FAILING, check=False)
    assert [line["retries"] for line in ran(both)] == [0, 1, 2]
    task = get(task_id)
    assert (task.status, task.retries) == ("failed", 3)
    assert task.summary["labtasker_exception"]["message"] == "diverged"


@pytest.mark.slow
def test_a_failing_command_is_retried_until_max_retries(both):
    task_id = submit({"lr": 0.1}, max_retries=2)
    both.bash("labtasker loop -- sh -c \"echo {} >> ran.jsonl; exit 3\" '%(lr)'", check=False)
    assert len(ran(both)) == 2
    assert (get(task_id).status, get(task_id).retries) == ("failed", 2)


def test_reset_pending_resets_status_and_retries(both):
    task_id = bring_to("failed", submit({"lr": 0.1}, max_retries=1))
    assert get(task_id).retries == 1
    update(task_id, reset_pending=True)
    assert (get(task_id).status, get(task_id).retries) == ("pending", 0)


def test_status_pending_alone_does_not_reset_the_retries(both):
    task_id = bring_to("failed", submit({"lr": 0.1}, max_retries=1))
    update(task_id, status="pending")
    assert (get(task_id).status, get(task_id).retries) == ("pending", 1)


@pytest.mark.parametrize("args", [{"lr": 0.1}, {"lr": 0.1, "model": "m", "extra": 1}, {"LR": 0.1, "model": "m"}],
                         ids=["missing", "extra", "other name"])
def test_no_more_no_less(both, args):
    submit(args)
    run_loop(both, piece("22-loop.py", "# Access args as dict instead of keyword args").replace(
        "required_fields=[\"lr\", \"model\"], pass_args_dict=True", "").replace(
        "(args)", "(lr=Required(), model=Required())").replace("args[\"lr\"]", "lr").replace("args[\"model\"]", "model"))
    both.write("train.py", TRAIN_SCRIPT)
    both.bash(piece("21-loop.sh", "# Basic — %(key) interpolates TOP-LEVEL task args at runtime"))
    assert ran(both) == [] and statuses() == ["pending"]


def test_pass_args_dict_with_required_fields_allows_extra_keys(both):
    submit({"lr": 0.1, "model": "m", "warmup": 5})
    submit({"lr": 0.2, "model": "m"})
    submit({"lr": 0.3})
    run_loop(both, """
@labtasker.loop(required_fields=["lr", "model"], pass_args_dict=True)
def main(args):
    note(lr=args["lr"], warmup=args.get("warmup", "default"))
""")
    assert ran(both) == [{"lr": 0.1, "warmup": 5}, {"lr": 0.2, "warmup": "default"}]
    assert statuses(status="pending") == ["pending"]


# Setup ########################################################################


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def talk(args, place, answers):
    """Run a command on a terminal of its own, type each answer once its prompt is shown; return what it printed.

    `answers` is a list of (pattern of a prompt, answer)."""
    ours, its = pty.openpty()
    process = subprocess.Popen(args, cwd=str(place.cwd), stdin=its, stdout=its, stderr=its, start_new_session=True,
                               env=clean_env(dict(place.env, PATH=place.path())))
    os.close(its)
    shown, left = "", list(answers)
    try:
        while True:
            assert select.select([ours], [], [], 30)[0], "no prompt for %r in:\n%s" % (left, shown)
            try:
                shown += os.read(ours, 4096).decode("utf-8", "replace")
            except OSError:  # how Linux says that the other end closed it
                break
            if left and re.search(left[0][0], shown.rsplit("\n", 1)[-1], re.I):
                os.write(ours, (left.pop(0)[1] + "\n").encode())
                shown += "\n"
    finally:
        os.close(ours)
        end_group(process)
    assert not left, "%r was not asked:\n%s" % (left, shown)
    return shown


@pytest.mark.slow
def test_setup_serve_init_and_create_from_config(home):
    """The block 00-setup.sh, with a port that is free; test_install.py does its first line."""
    lines = [line.split("#")[0].strip(" &") for line in block("00-setup.sh").splitlines()]
    assert lines == ["pip install labtasker", "labtasker-server serve", "labtasker init",
                     "labtasker queue create-from-config"]
    server_folder, port = home.cwd / "on-the-server", free_port()
    server_folder.mkdir()
    serve = home.start_cli("serve", "--port", str(port), "--db-path", str(server_folder / "journal.jsonl"))
    wait_until(lambda: "listening on" in serve.log_path.read_text(), "the server listens",
               never=lambda _: serve.poll() is not None)
    talk(["labtasker", "init"], home, [("url|server", "http://127.0.0.1:%d" % port), ("queue", "my-queue"),
                                       ("password", "secret")])
    config = home.cwd / ".labtasker" / "config.toml"
    assert config.stat().st_mode & 0o777 == 0o600
    home.bash("labtasker queue create-from-config")
    task_id = home.submit("--", "--lr=0.1")
    assert home.task(task_id)["args"] == {"lr": 0.1}
    assert task_id in (server_folder / "journal.jsonl").read_text()
    assert not (home.cwd / ".labtasker" / "journal.jsonl").exists()


# 1. Submitting tasks ##########################################################


def test_submit_basic(both):
    both.bash(piece("11-submit.sh", "# Basic"))
    task, = listed()
    assert (task.args, task.status, task.priority, task.max_retries) == ({"lr": 0.001, "model": "resnet"}, "pending", 0, 3)


def test_submit_with_name_metadata_priority_and_max_retries(both):
    both.bash(piece("11-submit.sh", "# With name, metadata, priority, max-retries"))
    task, = listed()
    assert task.task_name == "grid_search" and task.args == {"lr": 0.001, "model": "resnet"}
    assert task.metadata == {"tags": ["v1", "experimental"], "note": "baseline run"}
    assert (task.priority, task.max_retries) == (10, 5)


@pytest.mark.slow
def test_submit_a_batch_in_a_shell_loop(home):
    home.bash(piece("11-submit.sh", "# Batch submit in a loop"))
    assert [(t.args["lr"], t.args["model"]) for t in sorted(listed(), key=lambda t: t.created_at)] == list(
        itertools.product([0.001, 0.01, 0.1], ["resnet", "vit"]))
    assert {(t.task_name, str(t.metadata)) for t in listed()} == {("grid_search", "{'tags': ['v1']}")}


def test_submit_args_as_a_json_dict(both):
    both.bash(piece("11-submit.sh", "# Alternative: pass args as JSON dict string"))
    assert [t.args for t in listed()] == [{"arg1": 0, "arg2": 3}]


def test_submit_nested_args_by_dots(both):
    both.bash(piece("11-submit.sh", '# Nested args via dot-notation — --foo.bar=1 becomes args["foo"]["bar"] = 1'))
    assert [t.args for t in listed()] == [{"optimizer": {"lr": 0.01, "momentum": 0.9}}]


def test_submit_special_characters(both):
    both.bash(block("12-special-characters.sh"))
    assert [t.args for t in listed()] == [{"value": -1, "label": "", "desc": "hello world"}]


def test_submit_from_python(both):
    both.python(block("13-submit.py"))
    *grid, nested = sorted(listed(), key=lambda t: t.created_at)
    assert [(t.args["arg1"], t.args["arg2"]) for t in grid] == list(
        itertools.product([0.001, 0.01, 0.1], ["resnet", "vit"]))
    assert {(t.task_name, t.max_retries, t.priority) for t in grid} == {("grid_search", 3, 0)}
    assert all(t.metadata == {"tags": ["v1", "experimental"], "note": "baseline run"} for t in grid)
    assert nested.args == {"args_a": {"a": 1, "b": "boy"}, "args_b": {"foo": 2, "bar": "baz"}}
    assert piece("13-submit.py", "# Nested args as dict (use Python loop to access nested values)")


def test_submit_task_answers_with_the_id(both):
    answer = labtasker.submit_task(args={"lr": 1})
    assert isinstance(answer.task_id, str) and [t.task_id for t in listed()] == [answer.task_id]


# 2. Running tasks #############################################################


@pytest.fixture
def sweep(both):
    """Two tasks tagged v1 and one that is not, and the document's train.py."""
    both.write("train.py", TRAIN_SCRIPT)
    submit({"lr": 0.1, "model": "resnet"}, metadata={"tags": ["v1"]})
    submit({"lr": 0.01, "model": "vit"}, metadata={"tags": ["v1", "experimental"]})
    submit({"lr": 0.001, "model": "resnet"}, metadata={"tags": ["v2"]})
    return both


RESNET, VIT = ["--lr", "0.1", "--model", "resnet"], ["--lr", "0.01", "--model", "vit"]
UNTAGGED = ["--lr", "0.001", "--model", "resnet"]


def test_loop_over_a_command(sweep):
    sweep.bash(piece("21-loop.sh", "# Basic — %(key) interpolates TOP-LEVEL task args at runtime"))
    assert [line["argv"] for line in ran(sweep)] == [RESNET, VIT, UNTAGGED]
    assert statuses() == ["success"] * 3


def test_loop_over_a_command_with_a_metadata_filter(sweep):
    sweep.bash(piece("21-loop.sh", '# With metadata filter (only run tasks tagged "v1")'))
    assert [line["argv"] for line in ran(sweep)] == [RESNET, VIT]
    assert sorted(statuses()) == ["pending", "success", "success"]


def test_loop_hands_the_environment_to_its_command(both):
    both.write("train.py", TRAIN_SCRIPT)
    submit({"lr": 0.1})
    both.bash(piece("21-loop.sh", "# Env vars MUST go outside the loop command"))
    assert ran(both) == [{"argv": ["--lr", "0.1"], "gpu": "0"}]


@pytest.mark.slow
def test_loops_on_four_gpus_at_once_run_each_task_once(both):
    both.write("train.py", TRAIN_SCRIPT)
    for lr in range(12):
        submit({"lr": lr, "model": "m"})
    both.bash(piece("21-loop.sh",
                    "# Multiple parallel GPU workers — run the same command in the background per GPU"))
    assert sorted(line["argv"][1] for line in ran(both)) == sorted(str(lr) for lr in range(12))
    assert {line["gpu"] for line in ran(both)} <= {"0", "1", "2", "3"}
    assert statuses() == ["success"] * 12


@pytest.mark.slow
def test_loop_over_a_script_with_placeholders(both):
    both.write("train.py", TRAIN_SCRIPT)
    submit({"dataset": "cifar", "model": "it's big"})
    both.bash(piece("21-loop.sh", "# Complex scripts where %(var) appears inside multi-line logic — use --script-path"))
    assert [line["argv"] for line in ran(both)] == [
        ["--dataset", "cifar", "--model", "it's big", "--log-dir", "/logs/cifar/it's", "big"]]  # $LOG_DIR has no quotes
    assert statuses() == ["success"]


def test_a_placeholder_takes_a_whole_top_level_value(both):
    both.write("train.py", TRAIN_SCRIPT)
    submit({"optimizer": {"lr": 0.01}})
    both.bash("labtasker loop -- python train.py '%(optimizer)'")
    assert [json.loads(line["argv"][0]) for line in ran(both)] == [{"lr": 0.01}]


FILLED = '# Required() fields are auto-filled from task args; types are cast automatically.'


@pytest.mark.slow
def test_decorated_loop_fills_in_required_arguments_and_casts_them(both):
    submit({"arg1": 1, "arg2": 2})
    submit({"arg1": "20", "arg2": 3.0})
    shown = both.python("import labtasker\nfrom labtasker import Required\n" + piece("22-loop.py", FILLED)).stdout
    assert re.findall(r"The result is (\d+)", shown) == ["3", "23"]
    assert statuses() == ["success"] * 2


def test_decorated_loop_needs_the_very_names(both):
    submit({"Arg1": 1, "arg2": 2})
    shown = both.python("import labtasker\nfrom labtasker import Required\n" + piece("22-loop.py", FILLED)).stdout
    assert "The result" not in shown and statuses() == ["pending"]


@pytest.mark.slow
def test_decorated_loop_with_a_filter(sweep):
    run_loop(sweep, piece("22-loop.py", "# With extra_filter (Python query string)"))
    assert ran(sweep) == [{"lr": 0.1, "model": "resnet"}, {"lr": 0.01, "model": "vit"}]


@pytest.mark.slow
def test_decorated_loop_with_args_as_a_dict(sweep):
    run_loop(sweep, piece("22-loop.py", "# Access args as dict instead of keyword args"))
    assert [line["lr"] for line in ran(sweep)] == [0.1, 0.01, 0.001]


def annotated(text):
    """Return a program that imports Annotated from where it is: an install has no typing_extensions of its own."""
    assert "from typing_extensions import Annotated" in text
    return text.replace("from typing_extensions import", "from labtasker import")


def test_decorated_loop_with_resolvers_for_nested_args(both):
    submit({"args_a": {"a": 1, "b": "boy"}, "args_b": {"foo": 2, "bar": "baz"}})
    text = piece("22-loop.py", "# Nested args — param name must match the args key; resolver receives args[param_name]")
    shown = run_loop(both, annotated(text)).stdout
    assert "got args_a: ArgsGroupA(a=1, b='boy')\n" in shown
    assert "got args_b: ArgsGroupB(foo=2, bar='baz')\n" in shown
    assert statuses() == ["success"]


def test_decorated_loop_with_the_raw_nested_dict(both):
    submit({"optimizer": {"lr": 0.001}})
    run_loop(both, piece("22-loop.py",
                         "# Simple nested dict access — use identity resolver to receive the raw dict")
             + "    note(lr=lr, momentum=momentum)\n")
    assert ran(both) == [{"lr": 0.001, "momentum": 0.9}]


def test_dotted_keys_are_nested_in_task_info(both):
    both.bash("labtasker task submit -- --foo.bar=1")
    run_loop(both, """
@labtasker.loop(required_fields=["foo"])
def main():
    note(nested=labtasker.task_info().args["foo"]["bar"], dotted="foo.bar" in labtasker.task_info().args)
""")
    assert ran(both) == [{"nested": 1, "dotted": False}]


# 3. Querying tasks ############################################################

TASKS = {  # key: status, name, args, metadata, summary
    "best": ("success", "grid_search", {"lr": 0.02, "model": "resnet"}, {"tags": ["v1", "urgent"]}, {"acc": 0.95}),
    "worst": ("success", "grid_search", {"lr": 0.001, "model": "vit"}, {"tags": ["v1"]}, {"acc": 0.5}),
    "broken": ("failed", "grid-2", {"lr": 0.1, "model": "resnet"}, {"tags": ["v2"], "group": "A"}, {"loss": 9}),
    "fresh": ("pending", "debug-1", {"lr": 0.5, "model": "vit"}, {"tags": ["v1", "urgent"], "group": "A"}, None),
    "busy": ("running", "grid-3", {"lr": 0.005, "model": "vit"}, {}, None),
    "bare": ("pending", None, {"model": "resnet"}, {"group": "B"}, None),
}
KEYS = set(TASKS)


@pytest.fixture
def tasks(both):
    """One task a row of TASKS; returns {key: id}, with the Place as its attribute."""
    ids = Ids()
    ids.place = both
    for key, (status, name, args, metadata, summary) in TASKS.items():
        ids[key] = submit(args, task_name=name, metadata=metadata, max_retries=1)
        bring_to(status, ids[key], summary)
    return ids


class Ids(dict):
    def named(self, text):
        """Return the keys of the tasks whose ids a text shows, in its order."""
        found = [(text.find(task_id[:8]), key) for key, task_id in self.items()]
        return [key for place, key in sorted(found) if place >= 0]

    def keys_of(self, content):
        return {key for key, task_id in self.items() if task_id in [t.task_id for t in content]}


LISTINGS = {  # the command, as in the document: what it shows
    "labtasker task ls -s pending": {"fresh", "bare"},
    "labtasker task ls -s running": {"busy"},
    "labtasker task ls -s failed": {"broken"},
    "labtasker task ls -s success": {"best", "worst"},
    "labtasker task ls -f 'args.lr > 0.01' -q --no-pager": {"best", "broken", "fresh"},
    "labtasker task ls -f 'task_name == \"grid_search\"' -q --no-pager": {"best", "worst"},
    "labtasker task ls -f '\"v1\" in list(metadata.tags)' -q --no-pager": {"best", "worst", "fresh"},
    "labtasker task ls -f 'created_at >= date(\"3 hours ago\")' -q --no-pager": KEYS,
    "labtasker task ls -f 'args.lr > 0.01 and \"v1\" in list(metadata.tags)' -q --no-pager": {"best", "fresh"},
    "labtasker task ls -f 'regex(task_name, \"^grid-.*\")' -q --no-pager": {"broken", "busy"},
    "labtasker task ls -s success -f 'summary.acc > 0.9' --no-pager": {"best"},
    "labtasker task ls -f 'status == \"failed\" or status == \"pending\"' --no-pager": {"broken", "fresh", "bare"},
    "labtasker task ls -s success -S 'created_at:desc' --no-pager": ["worst", "best"],
    "labtasker task ls -s success -S 'summary.acc:desc' --no-pager": ["best", "worst"],
}
LISTING_PIECES = ["# By status", "# Python-native filter syntax",
                  "# Filter by summary fields — same dot-notation works on any field", "# Filter with OR",
                  "# Sort results (CLI only — Python requires manual sorting)",
                  "# -q prints only task IDs (useful for piping); --no-pager disables pager"]


def test_every_listing_of_the_document_is_tested():
    assert list(pieces("31-ls.sh")) == LISTING_PIECES
    assert [line for line in block("31-ls.sh").splitlines() if line.startswith("labtasker")] == list(LISTINGS)


@pytest.mark.slow
def test_listings_show_what_they_say(tasks):
    for command, expected in LISTINGS.items():
        shown = tasks.place.bash(command).stdout
        found = tasks.named(shown)
        assert (found if isinstance(expected, list) else set(found)) == expected, command
        if "-q" in command:
            assert set(shown.split()) == {tasks[key] for key in expected}, command


def test_python_listings_show_what_they_say(tasks):
    shown = tasks.place.python(block("32-ls.py") + """
print("SORTED", [t.task_id for t in tasks_sorted])
for text in [dict(status="failed"), dict(extra_filter='args.lr > 0.01 and "v1" in list(metadata.tags)')]:
    print("FOUND", [t.task_id for t in labtasker.ls_tasks(**text).content])
""").stdout
    assert tasks.named(re.search("^SORTED.*", shown, re.M).group()) == ["best"]
    assert [set(tasks.named(line)) for line in re.findall("^FOUND.*", shown, re.M)] == [{"broken"}, {"best", "fresh"}]
    assert re.search("^%s success .*0.95" % tasks["best"], shown, re.M)
    for first_line in ["# List by status", "# With filter (Python query string)",
                       "# Filter by summary field (same dot-notation)",
                       "# ls_tasks() has NO sort parameter — sort results manually in Python", "# Access task fields"]:
        assert piece("32-ls.py", first_line)


def test_status_and_filter_are_anded(tasks):
    both = labtasker.ls_tasks(status="success", extra_filter='status == "failed" or args.lr > 0.01').content
    assert tasks.keys_of(both) == {"best"}
    shown = tasks.place.bash("labtasker task ls -q -s success -f 'status == \"failed\" or args.lr > 0.01'").stdout
    assert tasks.named(shown) == ["best"]
    assert labtasker.ls_tasks(status="success", extra_filter='status == "failed"').content == []


@pytest.mark.parametrize("text, instead", [
    ('status != "failed"', "!="), ('not (status == "failed")', "not"), ('status not in ["failed"]', "not in")])
def test_negation_is_an_error_that_says_what_to_write(home, text, instead):
    submit({"lr": 1})
    with pytest.raises(labtasker.LabtaskerValueError) as caught:
        labtasker.ls_tasks(extra_filter=text)
    assert instead in str(caught.value) and text in str(caught.value) and "^" in str(caught.value)
    result = home.cli("task", "ls", "-f", text, check=False)
    assert result.returncode in (1, 2) and result.stdout == ""
    assert "^" in result.stderr and "Traceback" not in result.stderr


def test_the_default_limit_is_100(both):
    labtasker.submit_tasks([{"args": {"number": number}} for number in range(105)])
    assert len(labtasker.ls_tasks().content) == 100
    assert len(labtasker.ls_tasks(limit=10000).content) == 105
    assert len(set(both.bash("labtasker task ls -q --no-pager").lines)) == 100
    assert len(set(both.bash("labtasker task ls -q --no-pager --limit 10000").lines)) == 105


FILTERS = {  # text, as in the document or with its placeholders filled in: what it finds
    'task_name == "debug-1"': {"fresh"},
    "args.lr > 0.02": {"broken", "fresh"},
    "args.lr >= 0.02": {"best", "broken", "fresh"},
    "args.lr < 0.005": {"worst"},
    "args.lr <= 0.005": {"worst", "busy"},
    '"v2" in list(metadata.tags)': {"broken"},
    'args.lr > 0.01 and metadata.group == "A"': {"broken", "fresh"},
    'metadata.group == "B" or args.lr == 0.02': {"bare", "best"},
    'status in ["failed", "running"]': {"broken", "busy"},
    'created_at >= date("3 hours ago")': KEYS,
    'created_at < date("3 hours ago")': set(),
    'created_at >= date("7 days ago")': KEYS,
    'regex(task_name, "^grid.*")': {"best", "worst", "broken", "busy"},
    "args.lr > 0.01": {"best", "broken", "fresh"},
    'metadata.group == "A"': {"broken", "fresh"},
    "summary.acc > 0.9": {"best"},
    'status == "pending" or status == "failed"': {"fresh", "bare", "broken"},
}


def test_every_line_of_the_filter_reference_finds_what_it_says(tasks):
    for text, expected in FILTERS.items():
        assert tasks.keys_of(labtasker.ls_tasks(extra_filter=text).content) == expected, text
    for first_line in ["# Comparison", "# Membership (array field)", "# Logic", "# Functions",
                       "# Dot-notation works on any field:", "# NOT supported: !=  not  not in"]:
        assert piece("74-filters.txt", first_line)
    for line in piece("74-filters.txt", "# Dot-notation works on any field:").splitlines()[1:]:
        assert not line or line in FILTERS


# 4. Summaries #################################################################


def test_summary_is_written_inside_the_loop_and_success_follows(both):
    submit({"lr": 0.1, "model": "m"})
    both.python(PRELUDE + block("41-write-summary.py") + "\nmain()\n")
    task, = listed()
    assert (task.status, task.summary) == ("success", {"acc": 0.9, "loss": 0.1})


def test_a_loop_that_reports_nothing_ends_in_success_without_summary(both):
    submit({"lr": 0.1, "model": "m"})
    run_loop(both, piece("22-loop.py", "# Access args as dict instead of keyword args"))
    assert [(t.status, t.summary) for t in listed()] == [("success", {})]


def test_reporting_running_keeps_the_task_alive_and_merges(both):
    submit({"lr": 0.1, "model": "m"})
    run_loop(both, """
@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    task_id = labtasker.task_info().task_id
    for summary in ({"acc": 1, "loss": 2}, {"loss": 3, "step": 1}, None):
        labtasker.report_task_status(task_id=task_id, status="running", summary=summary)
        task = labtasker.ls_tasks(task_id=task_id).content[0]
        note(status=task.status, summary=task.summary)
""")
    first, second, third = ran(both)
    assert first == {"status": "running", "summary": {"acc": 1, "loss": 2}}
    assert second == third == {"status": "running", "summary": {"acc": 1, "loss": 3, "step": 1}}
    assert [(t.status, t.summary) for t in listed()] == [("success", second["summary"])]


CANCEL_PRELUDE = PRELUDE + """
def expensive_preprocess():
    note(data="preprocessed", lr=labtasker.task_info().args["lr"])
    return labtasker.task_info()

def load_cached_data():
    note(data="cached", lr=labtasker.task_info().args["lr"])
    return labtasker.task_info()

def train_step(task):
    if task.args["lr"] == 0.5 and task.retries == 0:
        raise RuntimeError("first attempt fails")
    return float("nan") if task.args["lr"] > 1 else 0.1

"""


@pytest.mark.slow
def test_a_task_cancelled_inside_the_loop_stays_cancelled_and_is_not_retried(both):
    diverging, next_one = submit({"lr": 10.0, "model": "m"}), submit({"lr": 0.1, "model": "m"})
    both.python(CANCEL_PRELUDE + block("42-cancel.py") + "\nmain()\n")
    assert (get(diverging).status, get(diverging).retries) == ("cancelled", 0)
    assert get(next_one).status == "success"
    assert [line["lr"] for line in ran(both)] == [10.0, 0.1]


def test_a_retry_knows_that_it_is_one(both):
    task_id = submit({"lr": 0.5, "model": "m"})
    both.python(CANCEL_PRELUDE + block("42-cancel.py") + "\nmain()\n", check=False)
    assert [line["data"] for line in ran(both)] == ["preprocessed", "cached"]
    assert (get(task_id).status, get(task_id).retries) == ("success", 1)


@pytest.mark.slow
def test_an_exception_after_cancelling_leaves_it_cancelled(both):
    task_id = submit({"lr": 0.1, "model": "m"})
    run_loop(both, """
@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    labtasker.report_task_status(task_id=labtasker.task_info().task_id, status="cancelled")
    raise RuntimeError("too late")
""", check=False)
    assert (get(task_id).status, get(task_id).retries) == ("cancelled", 0)


def test_summaries_are_read_and_ranked(both):
    for lr, acc in [(0.1, 0.5), (0.2, 0.9), (0.3, None)]:
        bring_to("success", submit({"lr": lr, "model": "m"}), acc and {"acc": acc})
    bring_to("failed", submit({"lr": 0.4, "model": "m"}, max_retries=1))
    shown = both.python(block("43-read-summaries.py")).stdout
    assert re.findall(r"^\{'lr': (\S+),.*'acc': (\S+)\}", shown, re.M) == [("0.2", "0.9"), ("0.1", "0.5"), ("0.3", "None")]
    assert len(re.findall(r"^task_id=\S+ args=\{.*\} summary=\{.*\}$", shown, re.M)) == 3
    for first_line in ["# Fetch all successful tasks and print their summaries",
                       "# Aggregate: collect metric from summary and rank"]:
        assert piece("43-read-summaries.py", first_line)


@pytest.mark.parametrize("status", ["success", "failed", "cancelled"])
def test_outside_the_loop_a_report_of_the_same_status_updates_the_summary_only(both, status):
    task_id = submit({"lr": 0.1}, max_retries=1)
    bring_to(status, task_id, {"acc": 0.5})
    before = get(task_id)
    labtasker.report_task_status(task_id=task_id, status=status, summary={"rank": 1})
    after = get(task_id)
    assert after.summary == dict(before.summary, rank=1)
    assert (after.status, after.retries, after.args, after.start_time) == (
        before.status, before.retries, before.args, before.start_time)


@pytest.mark.slow
def test_task_info_is_there_inside_the_loop_only(both):
    submit({"lr": 0.1, "model": "m"}, task_name="t", priority=4, metadata={"a": 1})
    run_loop(both, """
@labtasker.loop()
def main(lr: float = Required(), model: str = Required()):
    task = labtasker.task_info()
    note(fields=[task.task_name, task.args, task.metadata, task.summary, task.status, task.retries, task.priority,
                 task.max_retries, str(task.created_at) <= str(task.last_modified), task.start_time is not None])
""")
    assert ran(both) == [{"fields": ["t", {"lr": 0.1, "model": "m"}, {"a": 1}, {}, "running", 0, 4, 3, True, True]}]
    with pytest.raises(labtasker.LabtaskerError):
        labtasker.task_info()


@pytest.mark.slow
def test_task_info_is_there_in_a_job_of_the_command_loop(both):
    submit({"lr": 0.1})
    both.write("job.py", """
import labtasker
task = labtasker.task_info()
labtasker.report_task_status(task_id=task.task_id, status="running", summary={"twice": 2 * task.args["lr"]})
""")
    both.bash("labtasker loop -- python job.py '%(lr)'")
    assert [(t.status, t.summary) for t in listed()] == [("success", {"twice": 0.2})]


# 5. Updating tasks ############################################################


def test_update_patches_one_arg(tasks):
    both = tasks.place
    both.bash(piece("51-update.sh", "# Update a specific task's args (patches only args.lr; other args unchanged)")
              .replace("<task_id>", tasks["fresh"]), check=True)
    assert get(tasks["fresh"]).args == {"lr": 0.005, "model": "vit"}
    assert get(tasks["bare"]).args == TASKS["bare"][2]


def test_update_several_fields(tasks):
    tasks.place.bash(piece("51-update.sh", "# Update multiple fields").replace("<task_id>", tasks["fresh"]))
    task = get(tasks["fresh"])
    assert task.args == {"lr": 0.005, "model": "vit"}
    assert task.metadata == {"tags": ["v2"], "group": "A"}


@pytest.mark.parametrize("first_line", [
    "# Batch update: fix args and reset to pending (also resets retries)",
    "# Alternative: task update supports filter flags directly (no pipe needed)"])
def test_update_a_batch_and_reset_it(tasks, first_line):
    assert get(tasks["broken"]).retries == 1
    tasks.place.bash(piece("51-update.sh", first_line))
    task = get(tasks["broken"])
    assert (task.status, task.retries, task.args) == ("pending", 0, {"lr": 0.005, "model": "resnet"})
    assert get(tasks["best"]).status == "success" and get(tasks["best"]).args["lr"] == 0.02


def test_update_cancels_pending_tasks(tasks):
    tasks.place.bash(piece("51-update.sh", "# Cancel pending tasks (keep records, mark as cancelled)"))
    assert get(tasks["fresh"]).status == "cancelled" and get(tasks["bare"]).status == "pending"
    assert get(tasks["broken"]).status == "failed" and len(listed()) == len(TASKS)


def test_update_bumps_priority(tasks):
    tasks.place.bash(piece("51-update.sh", "# Bump priority on urgent pending tasks"))
    assert {key for key in TASKS if get(tasks[key]).priority == 100} == {"fresh"}


def test_update_with_fields_after_the_dashes(tasks):
    tasks.place.bash("labtasker task update --id %s --quiet -- args.lr=0.7 priority=3" % tasks["fresh"])
    task = get(tasks["fresh"])
    assert (task.args, task.priority) == ({"lr": 0.7, "model": "vit"}, 3)


def test_update_by_name(tasks):
    tasks.place.bash("labtasker task update --name grid_search -u metadata.seen=True --quiet")
    assert {key for key in TASKS if get(tasks[key]).metadata.get("seen")} == {"best", "worst"}


def test_update_from_python_merges(tasks):
    tasks.place.python("task_id = %r\nimport labtasker\nfrom labtasker.api_models import TaskUpdateRequest\n" % tasks["fresh"]
                       + piece("52-update.py", "# Update a single task — only specified keys are merged/updated"))
    task = get(tasks["fresh"])
    assert task.args == {"lr": 0.005, "model": "vit"}
    assert task.metadata == TASKS["fresh"][3] and task.priority == 0 and task.status == "pending"


IMPORTS = "import labtasker\nfrom labtasker.api_models import TaskUpdateRequest\n"


def test_update_a_batch_from_python_and_reset_it(tasks):
    tasks.place.python(IMPORTS + piece("52-update.py", "# Batch: fix lr and reset to pending (also resets retries=0)"))
    task = get(tasks["broken"])
    assert (task.status, task.retries, task.args) == ("pending", 0, {"lr": 0.005, "model": "resnet"})
    assert statuses(status="failed") == []


def test_update_cancels_pending_tasks_from_python(tasks):
    tasks.place.python(IMPORTS + piece("52-update.py", "# Cancel pending tasks matching a filter"))
    assert {key for key in TASKS if get(tasks[key]).status == "cancelled"} == {"fresh"}


def test_update_metadata_from_inside_a_loop(both):
    task_id = submit({"lr": 0.1, "model": "m"}, metadata={"tags": ["v1"]})
    run_loop(both, "from labtasker.api_models import TaskUpdateRequest\n" + piece(
        "52-update.py", "# Update metadata from inside a loop (merges new field without losing existing ones)"))
    assert get(task_id).metadata == {"tags": ["v1"], "run_note": "done"} and get(task_id).status == "success"


def test_replace_fields_replaces_a_whole_dict(both):
    task_id = submit({"lr": 0.1, "model": "m"}, metadata={"a": 1, "b": 2})
    labtasker.update_tasks([TaskUpdateRequest(**{"_id": task_id, "args": {"lr": 0.2}, "metadata": {"a": 9},
                                                 "replace_fields": ["args"]})])
    assert get(task_id).args == {"lr": 0.2} and get(task_id).metadata == {"a": 9, "b": 2}


@pytest.mark.parametrize("field", ["args", "metadata", "summary"])
def test_update_merges_dicts_at_every_level(both, field):
    task_id = submit({"x": 1})
    update(task_id, **{field: {"a": {"b": 1, "c": 2}, "d": 3}})
    update(task_id, **{field: {"a": {"b": 9}}})
    assert getattr(get(task_id), field)["a"] == {"b": 9, "c": 2}
    assert getattr(get(task_id), field)["d"] == 3


def test_update_leaves_what_was_not_given(both):
    task_id = submit({"lr": 0.1}, task_name="n", metadata={"m": 1}, priority=7, max_retries=9)
    update(task_id, max_retries=4)
    task = get(task_id)
    assert (task.args, task.metadata, task.priority, task.task_name, task.max_retries) == (
        {"lr": 0.1}, {"m": 1}, 7, "n", 4)


def test_update_answers_with_the_tasks_as_they_are_now(both):
    task_id = submit({"lr": 0.1, "model": "m"})
    answer = update(task_id, args={"lr": 0.2}, priority=5)
    assert [(t.task_id, t.args, t.priority) for t in answer.content] == [(task_id, {"lr": 0.2, "model": "m"}, 5)]


def test_update_request_takes_either_name_of_the_id(both):
    one, other = submit({"lr": 0.1}), submit({"lr": 0.2})
    labtasker.update_tasks([TaskUpdateRequest(**{"_id": one, "priority": 1}),
                            TaskUpdateRequest(task_id=other, priority=2)])
    assert (get(one).priority, get(other).priority) == (1, 2)


def test_update_request_refuses_a_field_that_it_does_not_know():
    with pytest.raises(labtasker.LabtaskerError, match="prioritty"):
        TaskUpdateRequest(**{"_id": "x", "prioritty": 1})


JOB_THAT_STAYS = """
import signal
open("started", "w").close()
while True:
    signal.pause()
"""
LOOP_THAT_STAYS = """
import threading
import labtasker

@labtasker.loop(required_fields=["lr"])
def main():
    open("started", "w").close()
    while True:
        threading.Event().wait(0.05)

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["command", "decorated"])
def test_a_running_task_is_cancelled_from_outside(both, kind):
    task_id = submit({"lr": 0.1})
    path = both.write("job.py", JOB_THAT_STAYS if kind == "command" else LOOP_THAT_STAYS)
    if kind == "command":
        loop = both.start_cli("loop", "--", sys.executable, path, "%(lr)")
    else:
        loop = both.start(sys.executable, path)
    wait_until((both.cwd / "started").exists, "the job runs", never=lambda _: loop.poll() is not None)
    snippet = piece("73-functions.txt",
                    "# To force-cancel a running task from OUTSIDE the loop (e.g., hung job detection):")
    both.python(IMPORTS + "task_id = %r\n" % task_id + snippet)
    wait_until(lambda: loop.poll() is not None, "the loop has ended its job and found nothing more")
    assert (get(task_id).status, get(task_id).retries) == ("cancelled", 0)


# 6. Deleting tasks ############################################################


def test_delete_by_id(tasks):
    """Asked on a terminal, with -y not."""
    text = piece("61-delete.sh", "# Delete by id (positional argument)").replace("<task_id>", tasks["best"])
    talk(["bash", "-c", text], tasks.place, [(r"\[y/N\]", "y")])
    assert tasks.keys_of(listed()) == KEYS - {"best"}
    tasks.place.bash("labtasker task delete -y %s %s" % (tasks["worst"], tasks["busy"]))
    assert tasks.keys_of(listed()) == KEYS - {"best", "worst", "busy"}


def test_delete_asks_nobody_where_nobody_is(tasks):
    result = tasks.place.bash("labtasker task delete " + tasks["best"], check=False)
    assert result.returncode == 2 and "-y" in result.stderr and len(listed()) == len(TASKS)


OLD = '# Batch delete via pipe: -q prints only ids, -y skips confirmation'


def test_delete_what_is_older_than_a_date(tasks):
    text = piece("61-delete.sh", OLD)
    tasks.place.bash(text)
    assert len(listed()) == len(TASKS)
    tasks.place.bash(text.replace("10 minutes ago", "0 seconds ago"))
    assert listed() == []


def test_delete_all_failed_tasks(tasks):
    tasks.place.bash(piece("61-delete.sh", "# Delete all failed tasks"))
    assert tasks.keys_of(listed()) == KEYS - {"broken"}


def test_delete_by_a_pattern_of_the_name(tasks):
    tasks.place.bash(piece("61-delete.sh", "# Delete by task name pattern"))
    assert tasks.keys_of(listed()) == KEYS - {"fresh"}


def test_delete_one_from_python(tasks):
    text = piece("62-delete.py", "# Delete a single task").replace("<task_id>", tasks["best"])
    tasks.place.python("import labtasker\n" + text)
    assert tasks.keys_of(listed()) == KEYS - {"best"}


def test_delete_a_batch_from_python(tasks):
    text = "import labtasker\n" + piece("62-delete.py", "# Batch delete matching a filter")
    tasks.place.python(text)
    assert len(listed()) == len(TASKS)
    tasks.place.python(text.replace("10 minutes ago", "0 seconds ago"))
    assert listed() == []


def test_delete_task_answers_nothing_and_a_second_time_it_is_not_there(both):
    task_id = submit({"lr": 1})
    assert labtasker.delete_task(task_id=task_id) is None
    with pytest.raises(labtasker.LabtaskerHTTPStatusError) as caught:
        labtasker.delete_task(task_id=task_id)
    assert caught.value.status_code == 404


# Quick reference ##############################################################

QUICK = {  # operation: what its row's command becomes with names filled in
    "Submit": "labtasker task submit -- --k=v",
    "Submit with tags": "labtasker task submit --metadata '{\"tags\": [\"v1\"]}' -- --k=v",
    "Run loop": "labtasker loop -- echo '%(model)'",
    "Run with filter": "labtasker loop --extra-filter 'args.lr > 1' -- echo '%(model)'",
    "Parallel workers": "CUDA_VISIBLE_DEVICES=1 labtasker loop -- echo '%(model)' & wait",
    "List by status": "labtasker task ls -s failed",
    "List with filter": "labtasker task ls -f 'args.lr > 1'",
    "Sort": "labtasker task ls -S created_at:desc",
    "Write summary": None,
    "Update": "labtasker task update --id ID -u 'args.k=v'",
    "Cancel": "labtasker task ls -s pending -q | xargs -I{} labtasker task update --id {} -u 'status=cancelled'",
    "Retry failed": "labtasker task update -s failed --reset-pending -q",
    "Delete": "labtasker task ls -s failed -q | labtasker task delete -y",
    "Current task": None,
}


def test_every_row_of_the_quick_reference_is_tried():
    rows = [row.split("|")[1].strip() for row in block("71-quick-reference.txt").splitlines()[2:]]
    assert rows == list(QUICK)


@pytest.mark.parametrize("operation", [name for name, command in QUICK.items() if command])
def test_quick_reference(home, operation):
    task_id = submit({"lr": 0.1, "model": "m"})
    result = home.bash(QUICK[operation].replace("ID", task_id))
    assert "rror" not in result.stderr


# API signatures ###############################################################


def documented_options():
    """Yield (command, option) of every option that the document's list of commands names."""
    command = None
    for line in block("72-commands.txt").splitlines():
        if line.startswith("labtasker"):
            command = line.split()[1:]
        for option in re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", line.split("#")[0].split("'")[0]):
            yield tuple(command), option


OPTIONS = sorted(set(documented_options()))


@pytest.mark.parametrize("command", sorted({command for command, _ in OPTIONS}), ids=" ".join)
def test_help_lists_every_documented_option(home, command):
    shown = home.cli(*command, "--help").stdout
    options = [option for of, option in OPTIONS if of == command]
    assert options
    assert not [o for o in options if not re.search(r"(?<![\w-])%s(?![\w-])" % re.escape(o), shown)]
    assert re.search("example", shown, re.I)


SIGNATURES = {
    "submit_task": {"task_name": None, "args": None, "metadata": None, "max_retries": 3, "priority": 0},
    "loop": {"extra_filter": None, "required_fields": None, "pass_args_dict": False},
    "report_task_status": {"task_id": inspect.Parameter.empty, "status": inspect.Parameter.empty, "summary": None},
    "ls_tasks": {"task_id": None, "task_name": None, "status": None, "extra_filter": None, "limit": 100},
    "update_tasks": {"task_updates": inspect.Parameter.empty, "reset_pending": False},
    "delete_task": {"task_id": inspect.Parameter.empty},
    "task_info": {},
}


def test_every_function_of_the_document_is_in_the_table():
    assert set(re.findall(r"^@?labtasker\.(\w+)\(", block("73-functions.txt"), re.M)) == set(SIGNATURES)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature(name):
    parameters = inspect.signature(getattr(labtasker, name)).parameters
    assert {key: parameters[key].default for key in SIGNATURES[name]} == SIGNATURES[name]
    assert getattr(labtasker, name).__doc__


def test_required_as_an_annotation(both):
    """`param: Annotated[T, Required(resolver=fn)]`, without a default."""
    submit({"a": 2, "b": "3"})
    run_loop(both, annotated("""
from typing_extensions import Annotated

@labtasker.loop()
def main(a: Annotated[int, Required(resolver=lambda value: value * 10)], b: Annotated[int, Required()]):
    note(a=a, b=b)
"""))
    assert ran(both) == [{"a": 20, "b": 3}]


def test_loops_run_each_task_once_whoever_takes_it(both):
    """All workers pull from the same queue; threads in one process stand for them here."""
    ids = [submit({"number": number}) for number in range(20)]
    seen = []

    def work():
        while True:
            answer = labtasker.fetch_task(eta_max="1h", start_heartbeat=False)
            if not answer.found:
                return
            seen.append(answer.task.task_id)
            labtasker.report_task_status(task_id=answer.task.task_id, status="success")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(seen) == sorted(ids) and set(statuses()) == {"success"}


# The whole document ###########################################################


def test_no_piece_of_the_document_is_left_out():
    source = (TESTS / "test_skill.py").read_text(encoding="utf-8")
    names = sorted(path.name for path in SKILL.iterdir())
    assert len(names) == 19
    missing = [name for name in names if '"%s"' % name not in source]
    for name in names:
        missing += [first for first in pieces(name) if first and first not in source]
    assert not missing
