"""What pip's console scripts import, and the home of the comforts of a terminal that work can do without.

`labtasker` and `lt` start `main`, `labtasker-server` starts `server_main`. labtasker.py alone does all the work; where
this file lies beside it, it imports it when one of the commands here is typed or listed. Each enters itself into the
table `COMMANDS`; what it is for stands in `COMFORTS`. Tests: test_cli.py.
"""
import json
import os
import re
import sys
import time

from labtasker import (
    ARITHMETIC, CALLS, COMFORTS, COMMANDS, COMPARISONS, CONFIG_NAME, DATE_FORMS, ID, IDS, INSTEAD, LOGIC,
    OPERATORS, QUIET, RECORDS, REQUIRED, ROUTES, SELECT, SETTINGS, TASK_FIELDS, Command, LabtaskerError,
    LabtaskerRuntimeError, LabtaskerValueError, TaskUpdateRequest, ask, chosen_tasks, clean, connect_events, count,
    find_root, format_time, full_id, get_task, is_terminal, load_config, main, note, option, pairs, read_text, say,
    seconds, show, show_listing, some, table, update_tasks, visible)

__all__ = ["main", "server_main"]

server_main = main  # `labtasker-server serve` is `labtasker serve`


def page(text):
    """Return whether $PAGER (else `less -R`) showed `text`."""
    import shlex
    import signal
    import subprocess
    command = shlex.split(os.environ.get("PAGER", "less -R"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pager's
    try:
        pager = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict({"LESS": "FRX"}, **os.environ))
        pager.communicate((text + "\n").encode("utf-8", "backslashreplace"))
        return True
    except (OSError, IndexError):  # no such pager, or PAGER is empty
        return False
    finally:
        signal.signal(signal.SIGINT, before)


def do_task_retry(options):
    if not options.ids and options.task_id is None and options.status is None:
        options.status = "failed"
    tasks = chosen_tasks(options, options.ids)
    if options.dry_run:
        show_listing(tasks, options)
        return note("Would retry %s." % some(tasks))
    if tasks:
        update_tasks([TaskUpdateRequest(_id=task.task_id) for task in tasks], reset_pending=True)
    if not options.quiet:
        say("%s pending again" % some(tasks))


# ---- Events


def do_event_listen(options):
    listener = connect_events(options.timeout)
    note("Connected; Ctrl-C ends it.")
    for event in listener.iter_events():
        if options.raw:
            say(json.dumps(event.to_dict()))
        else:
            say(clean(event_line(event) if options.compact else event_text(event)))
        sys.stdout.flush()


def event_line(response):
    """Return an event as one line: when, what, its id, and the step."""
    event = response.event
    return "%s  %-6s  %s  %s -> %s" % (format_time(event.timestamp.timestamp())[:19].replace("T", " "),
                                       event.entity_type, event.entity_id, event.old_state, event.new_state)


def event_text(response):
    """Return an event with what there is to know of its task or worker."""
    data = response.event.entity_data
    known = [data.get("task_name") or data.get("worker_name"), pairs(data.get("args") or {}),
             pairs(data.get("summary") or {})]
    return event_line(response) + "\n    " + "  ".join(text for text in known if text)


# ---- Logs


def do_task_logs(options):
    task = get_task(full_id(options.task_id))
    attempt = chosen_attempt(task, options.attempt)
    path = log_path(task, attempt)
    is_there = os.path.exists(path)
    if not is_there and not (options.follow and attempt and "end" not in attempt):
        raise LabtaskerRuntimeError("the output is not here: %s%s" % (path, attempt.get("host") and (
            " on the host %s" % attempt["host"]) or ""))
    if attempt:
        note("task %s, attempt %d of %d on %s: %s" % (
            task.task_id, task.attempts.index(attempt) + 1, len(task.attempts), attempt.get("host"),
            attempt.get("status", "running")))
    follow_log(path, lambda: options.follow and is_under_way(task.task_id, attempt.get("run_id")))


def chosen_attempt(task, number):
    """Return a task's last attempt or the `number`th that it keeps, {} where none is kept; raises where it has none."""
    if number is not None and not 1 <= number <= len(task.attempts):
        raise LabtaskerValueError("task %s has %d attempts, and no %d" % (task.task_id, len(task.attempts), number))
    if not task.attempts and not task.start_time:
        raise LabtaskerRuntimeError("task %s has not been run yet" % task.task_id)
    return task.attempts[(number or 0) - 1] if task.attempts else {}


def log_path(task, attempt):
    """Return where a run's output is: where its worker said, or in the configuration's folder here."""
    here = os.path.join(os.path.abspath(find_root()), "logs", task.task_id, attempt.get("run_id") or task.run_id or "",
                        "run.log")
    told = attempt.get("log")
    return told if told and (os.path.exists(told) or not os.path.exists(here)) else here


def is_under_way(task_id, run_id):
    """Return whether the run goes on."""
    task = get_task(task_id)
    return task.status == "running" and task.run_id == run_id


def follow_log(path, goes_on):
    """Print a file, and what is added to it while `goes_on()`; a person gets no control characters but colours."""
    position, look_at, is_going = 0, 0, True
    while is_going:
        if time.monotonic() >= look_at:  # before the reading: what came until the end is printed too
            is_going, look_at = goes_on(), time.monotonic() + LOOK_S
        position = print_from(path, position)
        time.sleep(POLL_S if is_going else 0)


POLL_S, LOOK_S = 0.2, 1.0  # between two looks at a file that grows, and at the task whose output it is
COLOURS = re.compile("\x1b\\[[0-9;]*m")


def print_from(path, position):
    """Return the new position after printing what is in the file from there on."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            for data in iter(lambda: file.read(1 << 20), b""):
                print_output(data)
            position = file.tell()
    except FileNotFoundError:  # not yet
        pass
    sys.stdout.flush()
    return position


def print_output(data):
    """Write a job's bytes to stdout: as they are, but to a terminal without what could play with it."""
    if is_terminal(sys.stdout):
        text = data.decode("utf-8", "replace")
        pieces = re.split("(%s)" % COLOURS.pattern, text)
        sys.stdout.write("".join(piece if COLOURS.match(piece) else clean(piece) for piece in pieces))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)


# ---- Editing


def do_config(options):
    import shutil
    import tempfile
    path = os.path.join(find_root(), CONFIG_NAME)
    if not os.path.exists(path):
        raise LabtaskerValueError("there is no %s: labtasker init writes it" % path)
    folder = tempfile.mkdtemp(prefix="config-", dir=os.path.dirname(path))
    try:
        draft = os.path.join(folder, CONFIG_NAME)
        shutil.copy2(path, draft)
        if not edited(draft):
            note("Nothing was changed.")
            return 1
        os.replace(draft, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say("Wrote %s" % path)


def edited(path):
    """Return whether a person edited the configuration at `path` into one that can be read; they may try again."""
    before = read_text(path)
    while True:
        run_editor(path)
        if read_text(path) == before:
            return False
        try:
            os.environ["LABTASKER_ROOT"] = os.path.dirname(path)
            load_config()
            return True
        except LabtaskerError as error:
            if not is_terminal(sys.stdin):
                raise
            note(error)
            if ask("Edit it again? [Y/n]", "", "y").lower() not in ("y", "yes"):
                return False


def run_editor(path):
    """Return when $VISUAL, $EDITOR or vi was closed; raises LabtaskerRuntimeError where it failed."""
    import shlex
    import subprocess
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi") + [path]
    try:
        code = subprocess.call(command)
    except OSError as error:
        raise LabtaskerRuntimeError("can't start the editor %s: %s; set $EDITOR" % (command[0], error.strerror))
    if code:
        raise LabtaskerRuntimeError("the editor %s ended with %d: nothing was changed" % (command[0], code))


# ---- References, printed from the tables


def filter_reference():
    """Return the filter language, from the tables of section 2, and a task's fields."""
    fields = [["field", "kind", "meaning"]]
    fields += [[name, row.kind, row.meaning] for name, row in visible(TASK_FIELDS).items()]
    return "\n".join([
        "A filter is a line of Python over a task's fields:", "",
        "    labtasker task ls -f 'args.lr > 0.01 and \"v1\" in list(metadata.tags)'",
        "    labtasker task ls -f 'created_at >= date(\"3 hours ago\") and regex(task_name, \"^grid-\")'", "",
        "Compare       " + " ".join(COMPARISONS),
        "Contain       field in [...], \"v\" in list(field), \"k\" in dict(field)",
        "Join          and or (...)",
        "Calculate     " + " ".join(ARITHMETIC),
        "Call          " + " ".join(name + "(...)" for name in CALLS),
        "Dates         " + "\n              ".join(DATE_FORMS),
        "Nested        args.optimizer.lr, summary.acc, args.layers[0]", "",
        "Instead of"] + ["  %-11s %s" % (word, text) for word, text in INSTEAD.items()] + [
        "", "A query document may stand for it: -f '{\"args.lr\": {\"$gt\": 0.1}}', with",
        " ".join(tuple(OPERATORS) + LOGIC + ("$expr",)), "", table(fields)])


def settings_reference():
    """Return the settings: their place in config.toml, and the variables that win over it."""
    rows = [[name, variable or "", meaning] for name, (_, variable, _, meaning) in SETTINGS.items()]
    return "\n".join([
        "The configuration is %s in the nearest folder .labtasker from here upward," % CONFIG_NAME,
        "or in the folder that LABTASKER_ROOT names. Variables win over it.", "",
        table([["setting", "variable", "meaning"]] + rows)])


def journal_reference():
    """Return the format of the journal: its lines, and the changes that stand on them."""
    rows = [["change", "followed by", "meaning"]] + [[name, row.fields, row.meaning] for name, row in RECORDS.items()]
    return "\n".join([
        "A journal is a file of JSON lines. The first names the format; each other one is a transaction:", "",
        '    {"n":18,"durable":17,"at":1763800000.1,"queue":"ID",'
        '"changes":[["task","ID",{"status":"running"},"pending"]],"crc":"89abcdef"}', "",
        "n        counts the lines without gaps; a line with lost:K stands for K lines that a repair could not save",
        "durable  the last n that was known to be on disk when the line was written",
        "at       when, in seconds since 1970, UTC",
        "crc      zlib.crc32 of the line's bytes before it",
        "changes  new values, not commands; what is not named stays as it was:", "", table(rows), "",
        "After a compaction the first line has folded: N and tail: BYTE; the lines up to that byte, each with fold: K",
        "for a number, make the state that the lines up to N had made. A line with epoch: E begins another owner's",
        "time, one with end: true a clean close."])


def api_reference():
    """Return the routes of the REST API, each with the fields that it takes."""
    def shown(name, arg):
        default = "" if arg.default is None else "=" + json.dumps(arg.default) if arg.default is not REQUIRED else None
        return "%s%s %s%s" % (name, "*" if arg.is_ours else "", arg.kind, " (required)" if default is None else default)
    lines = []
    for name, route in ROUTES.items():
        lines.append("%s -> %d%s\n    %s" % (name, route.status, " (no password)" if route.open else "", route.meaning))
        lines += ["    %s: %s" % (what, ", ".join(shown(*field) for field in fields.items()))
                  for what, fields in (("URL", route.query), ("body", route.fields)) if fields]
    lines += ["", "* An extension: servers that know it answer with the header Labtasker-Extensions: 1."]
    return "\n".join(lines)


# ---- The table


def comfort(path, run, example, options=()):
    """Enter a command into the table of labtasker.py."""
    COMMANDS[path] = Command(run, COMFORTS[path], example, options)


comfort("task retry", do_task_retry, "labtasker task retry -f 'args.model == \"vit\"' --dry-run",
        [IDS] + SELECT + [option("--dry-run", "only show which"), QUIET])
comfort("task logs", do_task_logs, "labtasker task logs 3f2a -f",
        [ID, option("-f --follow", "go on printing while it runs"),
         option("--attempt N", "the Nth of the attempts that the task keeps (the last)", type=count)])
comfort("config", do_config, "EDITOR=nano labtasker config")
comfort("event listen", do_event_listen, "labtasker event listen --compact", [
    option("-c --compact", "one line for each"), option("--raw", "JSON as it came, one line for each"),
    option("--timeout TIME", "how long to try to connect at first (10)", type=seconds, default=10)])
comfort("help filter", lambda options: show(filter_reference()), "labtasker help filter")
comfort("help settings", lambda options: show(settings_reference()), "labtasker help settings")
comfort("help journal", lambda options: show(journal_reference()), "labtasker help journal")
comfort("help api", lambda options: show(api_reference()), "labtasker help api")
