"""What pip's console scripts import, and the home of the comforts of a terminal that work can do without.

`labtasker` and `lt` start `main`, `labtasker-server` starts `server_main`. labtasker.py alone does all the work; where
this file lies beside it, it imports it when one of the commands here is typed or listed, a table is shown, or a person
asked. Each command enters itself into the table `COMMANDS`; what it is for stands in `COMFORTS`. Tests: test_cli.py,
test_terminal.py, test_slurm.py.
"""
import collections
import itertools
import json
import os
import re
import sys
import threading
import time

from labtasker import (
    ARITHMETIC, CALLS, COMFORTS, COMMANDS, COMPARISONS, CONFIG_NAME, CONTROL, DATE_FORMS, DEFAULT_QUEUE, EVERY, FILTER,
    FORMAT, ID, IDS, INSTEAD, JOURNAL, LOGIC, METADATA, OPERATORS, QUIET, RECORDS, REQUIRED, ROUTES, SELECT, SETTINGS,
    SILENT, TASK_FIELDS, TASK_STATES, UPDATABLE, YES, Client, Command, Disk, HttpTransport, JobCommand,
    LabtaskerConnectError, LabtaskerError, LabtaskerHTTPStatusError, LabtaskerRuntimeError, LabtaskerValueError,
    NotFound, Store, StoreTransport, Task, TaskUpdateRequest, Template, UsageError, as_jsonl, ask, base_url, brief,
    change_of, check_field, check_queue_name, choice, chosen_tasks, clean, client, compact, confirm, connect_events,
    count, covers, delete_queue, dig, duration, filter_of, find_root, flat, format_time, full_id, get_queue, get_task,
    given_settings, group, health_check, ids_of, is_away, is_terminal, joined, journal_header, journal_path,
    last_durable, load_config, ls_tasks, ls_workers, main, metadata_of, monotonic, new_id, note, now, opened_queue,
    option, pairs, parse, parse_filter, parse_time, paths_of, read_server_file, read_text, record_text, say, sealed,
    seconds, selectors, show, show_listing, some, store_error, store_folder, tasks_named, typed_filter, typed_value,
    unseal, update_queue, update_tasks, updates_of, use_client, visible)

__all__ = ["main", "server_main"]

server_main = main  # `labtasker-server serve` is `labtasker serve`


# ---- The terminal: colours, its size, pages

STATUS_COLOURS = {"pending": "36", "running": "34", "success": "32", "failed": "31", "cancelled": "33",
                  "active": "32", "suspended": "33", "crashed": "31"}


def screen_size(stream=None):
    """Return (columns, lines) of the terminal; COLUMNS wins, as everywhere. (shutil's takes 3 ms to import.)"""
    try:
        columns, lines = os.get_terminal_size((stream or sys.stdout).fileno())
    except (OSError, ValueError):
        columns = lines = 0
    wished = os.environ.get("COLUMNS", "")
    return wished.isdigit() and int(wished) or columns or 80, lines or 24


def wants_colour(options):
    """Return whether to colour: --ansi and --no-ansi decide, else a terminal does, and NO_COLOR forbids."""
    if options.ansi is not None:
        return options.ansi
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def page(text):
    """Return whether $PAGER (else `less -R`) showed `text`; one that fits the screen needs none."""
    import shlex
    import signal
    import subprocess
    if text.count("\n") + 2 < screen_size()[1]:
        return False
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


# ---- What a person is asked, and what he types in short


def answer_to(question, default="", secret=False):
    """Return a person's answer."""
    if secret:
        import getpass
        return getpass.getpass(question + " ")
    sys.stderr.write(clean(question) + " ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        sys.stderr.write("\n")
    return line.strip() or default


def id_that_starts(word, find):
    """Return the id of the one thing that `find` lists whose id starts with `word`; raises NotFound, UsageError."""
    is_hex, what = re.match("[0-9a-f][0-9a-f-]*\\Z", word), "task" if find is ls_tasks else "worker"
    found = find(extra_filter={"_id": {"$regex": "^" + word}}, limit=2).content if is_hex else []
    if len(found) > 1:
        raise UsageError("more than one %s's id starts with %s: give more of it" % (what, word))
    if not found:
        raise NotFound("there is no %s %s (labtasker %s ls shows what there is)" % (what, brief(word), what))
    return ids_of(found)[0]


# ---- Listings


def span(seconds):
    """Return a length of time in its two leading digits or so: 45s, 12m, 3h, 5d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return "%d%s" % (seconds // size, unit)
    return "%ds" % max(0, seconds)


def age(moment):
    """Return how long ago an aware datetime was, as `span` does."""
    return span(now() - moment.timestamp())


def spent_s(task):
    """Return the seconds that a task's run takes by now, or took until the task last changed; None without a run."""
    if task.start_time is None or task.status == "pending":
        return None
    last = (vars(task).get("attempts") or [{}])[-1]
    told = last.get("end") if last.get("run_id") == vars(task).get("run_id") else None
    end = now() if task.status == "running" else parse_time(told) if told else task.last_modified.timestamp()
    return max(0.0, end - task.start_time.timestamp())


def cells_wide(text):
    """Return how many terminal cells `text` takes: East Asian wide characters take two."""
    if len(text.encode("utf-8", "replace")) == len(text):
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitted(text, width):
    """Return `text` cut and padded to exactly `width` cells."""
    if cells_wide(text) > width:
        text = text[:width]
        while text and cells_wide(text) > width - 2:
            text = text[:-1]
        text += ".."[:width]
    return text + " " * (width - cells_wide(text))


def table(rows, room=10 ** 9, colour=False):
    """Return rows of texts, the first the header, as aligned lines; columns with nothing in them are left out.

    The widest column is made narrower until all fit in `room`."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    rows = [[clean(row[i], "") for i in kept] for row in rows]
    widths = [min(room, max(map(cells_wide, column))) for column in zip(*rows)]
    while sum(widths) + 2 * len(widths) - 2 > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    return "\n".join(_table_line(row, widths, colour) for row in rows)


def _table_line(row, widths, colour):
    cells = [fitted(cell, width) for cell, width in zip(row, widths)]
    cells[-1] = cells[-1].rstrip()
    if colour:
        cells = ["\x1b[%sm%s\x1b[0m" % (STATUS_COLOURS[cell], padded) if cell in STATUS_COLOURS else padded
                 for cell, padded in zip(row, cells)]
    return "  ".join(cells).rstrip()


TASK_COLUMNS = {
    "status": lambda task: task.status,
    "name": lambda task: task.task_name or "",
    "age": lambda task: age(task.created_at),
    "duration": lambda task: "" if spent_s(task) is None else span(spent_s(task)),
    "worker": lambda task: (task.worker_id or "")[:8],
    "retries": lambda task: "%d/%d" % (task.retries, task.max_retries) if task.retries else "",
    "args": lambda task: pairs(task.args) or brief(task.cmd or ""),
    "summary": lambda task: pairs(task.summary),
}
TASK_COLUMNS_MORE = {
    "priority": lambda task: str(task.priority),
    "worker": lambda task: task.worker_id or "",
    "metadata": lambda task: pairs(task.metadata),
}
WORKER_COLUMNS = {
    "status": lambda worker: worker.status,
    "name": lambda worker: worker.worker_name or "",
    "age": lambda worker: age(worker.created_at),
    "retries": lambda worker: "%d/%d" % (worker.retries, worker.max_retries),
    "metadata": lambda worker: pairs(worker.metadata),
}
SHORT = {"id": "task_id", "name": "task_name", "worker": "worker_id"}  # what a table calls these fields
WIDEST = 20  # cells that an argument's column may want; wider ones share a column


def item_table(items, options):
    """Return tasks or workers as a table that fits the terminal; --verbose cuts nothing."""
    is_task, size, ids = isinstance(items[0], Task), 36, ids_of(items)
    room = 10 ** 9 if options.verbose else screen_size()[0] if is_terminal(sys.stdout) else 1000
    columns = WORKER_COLUMNS
    if is_task:
        size = 36 if options.verbose else 8
        columns = chosen_columns(column_names(options)) if options.columns else dict(
            TASK_COLUMNS, **TASK_COLUMNS_MORE) if options.verbose else TASK_COLUMNS
    while len({text[:size] for text in ids}) < len(ids):
        size += 1
    heads = [text[:size] for text in ids]
    if columns is TASK_COLUMNS:
        for columns in apart(items):
            if _width([heads] + [list(map(cell, items)) for cell in columns.values()]) <= room:
                break
    rows = [["id"] + list(columns)]
    rows += [[head] + [cell(item) for cell in columns.values()] for head, item in zip(heads, items)]
    return table(rows, room, wants_colour(options))


def _width(columns):
    """Return the cells that columns of texts want, none more than WIDEST; empty ones are left out."""
    return sum(2 + min(WIDEST, max(map(len, column))) for column in columns if any(column)) - 2


def apart(tasks):
    """Return the TASK_COLUMNS in two ways: each argument in which tasks differ in a column, or these in one column.

    Where they differ in none, all their arguments stand in one column."""
    rows = [{key: brief(value) for key, value in flat(task.args)} for task in tasks]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row)
            if len({row.get(key) for row in rows}) > 1]
    if not keys or not all(rows):
        return [TASK_COLUMNS]
    wide, cells = {}, {id(task): row for task, row in zip(tasks, rows)}
    for name, cell in TASK_COLUMNS.items():
        wide.update({"args." + key: lambda task, key=key: cells[id(task)].get(key, "") for key in keys}
                    if name == "args" else {name: cell})
    return [wide, dict(TASK_COLUMNS, args=lambda task: " ".join(
        "%s=%s" % (key, text) for key, text in cells[id(task)].items() if key in keys))]


def column_names(options):
    """Return the words of --columns, or []; raises UsageError for one that is no field of a task."""
    words = [word.strip() for word in (options.columns or "").split(",") if word.strip()]
    for word in words:
        if word not in SHORT and word not in TASK_COLUMNS:
            check_field(word, "--columns", list(SHORT) + ["age", "duration"])
    return words


def chosen_columns(words):
    """Return {word: function of a task} of the columns that --columns names."""
    return {word: TASK_COLUMNS.get(word) or (lambda task, word=word: brief_cell(field_of(task, word)))
            for word in words if word != "id"}


def brief_cell(value):
    """Return a value for a table; what is not there is a dash."""
    return "-" if value is None else pairs(value) if isinstance(value, dict) else brief(value)


def field_of(task, word):
    """Return what a task has at a field, a dotted one too, or by one of the names in its table; JSON types."""
    computed = {"age": lambda: round(now() - task.created_at.timestamp(), 3), "duration": lambda: spent_s(task)}
    return computed[word]() if word in computed else dig(task.to_dict(), SHORT.get(word, word).split("."))


def listing_text(items, options):
    """Return tasks or workers as a table, or in another format, with the columns that were chosen; UsageError where a
    column is no field."""
    columns = column_names(options)
    if options.fmt == "table":
        return item_table(items, options) if items else ""
    rows = [{word: field_of(item, word) for word in columns} if columns else item.to_dict() for item in items]
    return WRITERS[options.fmt](rows, columns)


def coloured(rows, options):
    """Return rows of texts, the first the header, as aligned lines, coloured where that is wanted."""
    return table(rows, colour=wants_colour(options))


# ---- Formats: yaml, csv

YAML_PLAIN = r"(?ai)(?!(?:true|false|yes|no|on|off|null|y|n)\Z)[a-z_/][\w./@+-]*(?: [\w./@+-]+)*\Z"


def yaml_scalar(value, indent=""):
    """Return a JSON value that is no filled dict or list as YAML 1.1 and 1.2 both read it."""
    if isinstance(value, str) and re.match(YAML_PLAIN, value):
        return value
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)
        return _yaml_block(value, indent) or CONTROL.sub(lambda m: "\\u%04x" % ord(m.group()), quoted)
    if isinstance(value, float):
        return re.sub("(nan|inf)", r".\1", re.sub(r"\A(-?\d+)e", r"\1.0e", repr(value)))
    return json.dumps(value)


def _yaml_block(text, indent):
    """Return text of several lines as a block that reads as it was written, or None where YAML would change it."""
    if "\n" not in text[:-1] or text[0] in " \n\t" or text.endswith("\n\n") or CONTROL.search(text.replace("\n", "")):
        return None
    lines = text.rstrip("\n").split("\n")
    return "\n".join([("|" if text.endswith("\n") else "|-")] + [line and indent + "  " + line for line in lines])


def yaml_lines(value, indent=""):
    """Yield a dict or a list as the lines of a YAML block; nothing where it is empty."""
    is_dict = isinstance(value, dict)
    for key, item in value.items() if is_dict else enumerate(value):
        head = indent + (yaml_scalar(key) + ":" if is_dict else "-")
        if not isinstance(item, (dict, list)) or not item:
            yield "%s %s" % (head, yaml_scalar(item, indent))
            continue
        lines = yaml_lines(item, indent + ("" if is_dict and isinstance(item, list) else "  "))
        yield head if is_dict else "%s %s" % (head, next(lines).lstrip(" "))
        yield from lines


def as_yaml(rows):
    """Return dicts as a YAML list."""
    return "\n".join(yaml_lines(rows)) or "[]"


def as_csv(rows, columns=()):
    """Return dicts as CSV: a column for each field, `args.lr` and the like for what is nested, or `columns`."""
    import csv
    import io
    fields = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        rows = [{key: value for key, value in flat(row) if value != {}} for row in rows]
        columns = sorted({key for row in rows for key in row}, key=lambda key: (fields.index(key.split(".")[0]), key))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text = out.getvalue().rstrip("\n")
    return clean(text) if is_terminal(sys.stdout) else text


WRITERS = {"jsonl": lambda rows, columns: as_jsonl(rows), "yaml": lambda rows, columns: as_yaml(rows), "csv": as_csv}
RECORD_WRITERS = {"yaml": lambda row: "\n".join(yaml_lines(row)), "csv": lambda row: as_csv([row])}


# ---- Journals

# A line of a file that may be damaged: its `value`, or the `problem` with it. `due` is the number that had to come
# there, `lost` how many lines are missing before it. Numbers of folded lines are 0.
Piece = collections.namedtuple("Piece", "offset data value problem due lost")


def walk(path):
    """Yield a Piece for each line of a journal file, the header included; reads only, also while others write."""
    folds = n = offset = tail = 0  # n None: the header is lost, and with it where the numbers begin
    with open(path, "rb") as file:
        for data in file:
            value = unseal(data)
            is_fold = 0 < offset < tail or n is None and "fold" in (value or {})
            count = (value or {}).get("fold" if is_fold else "n")
            if n is None and type(count) is int and not is_fold:
                n = count - value.get("lost", 1)
            due = folds + 1 if is_fold else (n or 0) + (value or {}).get("lost", 1)
            problem = None
            if offset == 0 and value is not None and value.get("journal") == "labtasker":
                count = due = n = value.get("folded", 0)
                tail = value.get("tail", 0)
            elif type(count) is not int or not (is_fold or type(value.get("durable")) is int):
                problem = "no line with a checksum that fits" if data.endswith(b"\n") else "a line that is cut off"
            elif count < due:
                problem = "line %d once more" % count
            elif is_fold:
                folds = count
            else:
                n = count
            if offset == 0 and problem:
                n = None
            lost = 0 if problem else count - due
            yield Piece(offset, data, value, problem, 0 if is_fold else due, lost)
            offset += len(data)


class Survey:
    """What is in a journal file: counts, `bad` pieces, `lost` ranges of line numbers; reads only.

    `rotten` are those of both that had been acknowledged; other damage, in a tail that was never known to be on
    disk, is set aside at the next opening."""

    def __init__(self, path):
        self.path, self.size, self.lines, self.n, self.durable = path, 0, 0, 0, 0
        self.bad, self.lost, self.ended, self.header = [], [], False, {}
        for piece in walk(path):
            self.size = piece.offset + len(piece.data)
            if piece.problem:
                self.bad.append(piece)
            else:
                self._count(piece)
        self.durable = max([self.durable] + [last_durable(piece.data) for piece in self.bad])
        self.rotten = [piece for piece in self.bad if piece.due <= self.durable]
        self.rotten += [numbers for numbers in self.lost if numbers[0] <= self.durable]

    def _count(self, piece):
        if piece.lost:
            self.lost.append((piece.due, piece.due + piece.lost - 1))
        if piece.offset == 0:
            self.header = piece.value
        elif "n" in piece.value:
            self.lines += 1
            self.n, self.ended = piece.value["n"], bool(piece.value.get("end"))
            self.durable = max(self.durable, piece.value["durable"])


def repair_store(path):
    """Put a file of all good lines in the place of a damaged one. Return (survey of what was there, where the damaged
    file is kept, where the bad bytes are, ids that stand in these); None for both paths where nothing is damaged.

    Never in place: the damaged file keeps its bytes under another name. A line {"n":9,"lost":2,...} stands where
    lines 8 and 9 were."""
    store = Store(path)
    store.lock_file(2.0)
    try:
        store.owner.claim()
        found = Survey(path)
        damaged, aside = _repair(found) if found.bad or found.lost else (None, None)
    except OSError as error:
        raise store_error(path, error)
    finally:
        store.file_lock.close()
    text = b"".join(piece.data for piece in found.bad).decode("latin-1")
    ids = re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)
    return found, damaged, aside, list(collections.OrderedDict.fromkeys(ids))


def _repair(found):
    """Return (where the damaged file is kept now, where the bad bytes are) of the file that was surveyed."""
    path, stamp = found.path, int(time.time() * 1000)
    damaged, aside, draft = ("%s.%s-%d" % (path, word, stamp) for word in ("damaged", "bad", "repaired"))
    Disk.create(aside, (piece.data for piece in walk(path) if piece.problem))
    body = sum(len(data) for data, is_fold in _good_lines(path) if is_fold)
    first = next((piece.value["n"] for piece in walk(path) if not piece.problem and "n" in piece.value), 1)
    header = found.header or {"journal": "labtasker", "format": FORMAT, "store": new_id(), "folded": first - 1}
    header = dict(header, repaired_at=time.time())
    Disk.create(draft, itertools.chain([journal_header(header, body)], (data for data, _ in _good_lines(path))))
    os.link(path, damaged)
    Disk.rename(draft, path)
    Disk.sync_folder(path)
    return damaged, aside


def _good_lines(path):
    """Yield (bytes, whether folded) of the good lines and of those that mark where lines were lost."""
    folds = 0
    for piece in walk(path):
        if piece.problem or piece.offset == 0:
            continue
        if "fold" in piece.value:
            folds += 1
            yield piece.data if piece.value["fold"] == folds else sealed(dict(piece.value, fold=folds)), True
            continue
        if piece.lost:
            yield sealed({"n": piece.due + piece.lost - 1, "durable": 0, "lost": piece.lost, "at": time.time()}), False
        yield piece.data, False


def do_journal_verify(options):
    found = Survey(journal_path(options))
    for piece in found.bad:
        say("byte %d: %d bytes are %s" % (piece.offset, len(piece.data), piece.problem))
    for first, last in found.lost:
        say("lines %d to %d are missing" % (first, last))
    if found.rotten:
        say("%s is damaged: 'labtasker journal repair' saves what can be saved" % found.path)
        return 1
    if found.bad or found.lost:
        say("That was never acknowledged, or is being written just now; the next opening sets it aside.")
    say("%s: fine, %d lines, %d bytes" % (found.path, found.lines, found.size))


def do_journal_repair(options):
    path = journal_path(options)
    if not (Survey(path).bad or Survey(path).lost):
        return say("%s: fine, nothing was changed" % path)
    confirm("Put a file of all good lines in the place of %s? The damaged one is kept." % path, "--yes", options.yes)
    found, damaged, aside, ids = repair_store(path)
    say("%s: %d good lines are kept" % (path, found.lines))
    for first, last in found.lost:
        say("lost: lines %d to %d" % (first, last))
    for one in ids:
        say("named in the bad bytes: " + one)
    say("the damaged file: %s\nthe bad bytes: %s" % (damaged, aside))


def do_journal_compact(options):
    path = journal_path(options)
    say("%s: %d bytes, now %d" % ((path,) + compact(path)))


def do_journal_stats(options):
    found = Survey(journal_path(options))
    rows = [["file", found.path], ["bytes", found.size], ["bytes of folded lines", found.header.get("tail", 0)],
            ["lines since", found.lines], ["last line", found.n], ["known to be on disk", found.durable],
            ["closed cleanly", "yes" if found.ended else "no"], ["bad pieces", len(found.bad)]]
    say(table([[str(cell) for cell in row] for row in rows]))


# ---- Queues


def do_queue_get(options):
    queue = get_queue()
    say(queue.queue_id if options.quiet else record_text(queue.to_dict()))


def do_queue_update(options):
    if options.new_queue_name is options.new_password is options.metadata is None:
        raise UsageError("what to change? Give --new-queue-name, --new-password or --metadata")
    update_queue(options.new_queue_name, options.new_password, metadata_of(options))
    if not options.quiet:
        say("Updated the queue")
    if options.new_queue_name or options.new_password:
        note("The configuration still has the old name or password: labtasker config changes it.")


def do_queue_delete(options):
    name = get_queue().queue_name
    what = ", its tasks and its workers" if options.cascade else ""
    confirm("Delete the queue %s%s for good?" % (name, what), "--yes", options.yes)
    delete_queue(cascade_delete=options.cascade)
    say("Deleted queue %s" % name)


# ---- Setting up: what `init` asks


def asked_settings(options):
    """Return (url, queue name, password) from the options and, for what they lack, from a person, tested at once."""
    while options.url is None:
        url = base_url(ask("Server's URL, or nothing for a store in this folder [none]", "--url"))
        options.url = url if is_reached(url) else None
    while options.queue_name is None:
        options.queue_name = ask("Queue name [%s]" % DEFAULT_QUEUE, "--queue-name", default=DEFAULT_QUEUE)
        try:
            check_queue_name(options.queue_name)
        except UsageError as error:
            note(error)
            options.queue_name = None
    return given_settings(options)


def is_reached(url):
    """Return whether a server answers at a URL that a person typed, or is wanted although none does."""
    if not re.match("https?:", url):
        return True
    began = monotonic()
    try:
        HttpTransport(url, DEFAULT_QUEUE, "").call("GET", "/health", None, None)
        note("%s answers, in %.0f ms." % (url, 1000 * (monotonic() - began)))
        return True
    except LabtaskerConnectError as error:
        note(error)
        return ask("Take this URL all the same? [y/N]", "--yes").lower() in ("y", "yes")


def asked_queue(config, options):
    """Return as `opened_queue` does, with another password where a person had to be asked for it again."""
    while True:
        try:
            return opened_queue(config, options)
        except LabtaskerRuntimeError as error:  # it is there, with another password
            if options.password or os.environ.get("LABTASKER_PASSWORD"):
                raise
            note(error)
        config = config._replace(password=ask("Its own password:", "--password", secret=True))


# ---- Demo

DEMO_SCRIPT = '''\
"""Teaches one neuron to tell two clouds of points apart, and reports how well it does."""
import math, random, sys
import labtasker

lr, steps = float(sys.argv[1]), int(sys.argv[2])
if (lr, steps) == (1.0, 3000) and labtasker.task_info().retries == 0:
    sys.exit("out of memory (not really: the demo wants to show a retry)")

dice = random.Random(1)
points = [(dice.gauss(x, 1.6), dice.gauss(x / 2, 1.0), x > 3) for x in (2, 4) for _ in range(150)]
a = b = c = 0.0
for step in range(steps):
    x, y, is_far = dice.choice(points)
    error = is_far - 1 / (1 + math.exp(-(a * x + b * y + c)))
    a, b, c = a + lr * error * x, b + lr * error * y, c + lr * error
acc = sum((a * x + b * y + c > 0) == is_far for x, y, is_far in points) / len(points)
labtasker.report_task_status(labtasker.task_info().task_id, "running", summary={"acc": acc})
print("lr=%g steps=%d: accuracy %.3f" % (lr, steps, acc))
'''
DEMO_STEPS = (
    ["task", "submit", "--grid", "--name", "demo", "--", "--lr=0.003,0.03,0.3,1.0", "--steps=30,3000"],
    ["loop", "--", "python3", "train.py", "%(lr)", "%(steps)"],  # done by two workers at once
    ["task", "count"],
    ["task", "ls", "-s", "success", "-S", "summary.acc:desc", "--no-pager"],
)


def do_demo(options):
    import shutil
    import tempfile
    folder = tempfile.mkdtemp(prefix="labtasker-demo-")
    try:
        for name in ("labtasker", "labtasker_cli"):
            shutil.copy(os.path.realpath(sys.modules[name].__file__), os.path.join(folder, name + ".py"))
        run_demo(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_demo(folder):
    """Run a sweep in `folder`: two workers, one failure, one ranking; raises LabtaskerRuntimeError where it fails."""
    began = monotonic()
    with open(os.path.join(folder, "train.py"), "w") as file:
        file.write(DEMO_SCRIPT)
    say("A sweep in %s, which is removed at the end. The script:\n\n%s" % (
        folder, re.sub("(?m)^", "    ", DEMO_SCRIPT.rstrip())))
    codes = []
    for words in DEMO_STEPS:
        codes += demo_workers(folder, words) if words[0] == "loop" else [demo_start(folder, words).wait()]
    store = StoreTransport(os.path.join(folder, ".labtasker"), DEFAULT_QUEUE)
    tasks = Client(store).call("POST", "/api/v1/queues/me/tasks/search", {})["content"]
    store.close()
    done = sum(task["status"] == "success" for task in tasks)
    retried = sum(task["retries"] == 1 for task in tasks)
    say("\n%d of %d tasks done by two workers, %d after a retry, in %.1f s." % (
        done, len(tasks), retried, monotonic() - began))
    if any(codes) or (done, retried) != (8, 1):
        raise LabtaskerRuntimeError("the demo did not go as it should; exit codes: %s" % codes)


def demo_start(folder, words, suffix="", **streams):
    """Return the process of a command of this program, shown first as one would type it."""
    import shlex
    import subprocess
    words = ["python3", "-m", "labtasker"] + words
    say("\n$ " + " ".join(shlex.quote(word) for word in words) + suffix)
    sys.stdout.flush()
    env = {key: value for key, value in os.environ.items() if not key.startswith("LABTASKER_")}
    env.update(LABTASKER_ROOT=os.path.join(folder, ".labtasker"), PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable if word == "python3" else word for word in words], cwd=folder, env=env,
                            stdin=subprocess.DEVNULL, **streams)


def demo_workers(folder, words):
    """Return the exit codes of two workers that run at once, their lines shown as they come."""
    import subprocess
    workers = []

    def echo(number, worker):
        try:
            for line in worker.stdout:
                say("[worker %d] %s" % (number, clean(line.rstrip("\n"))))
                sys.stdout.flush()
        except BrokenPipeError:  # who reads the demo has seen enough; the main thread says so
            pass
    try:
        for _ in (1, 2):
            workers.append(demo_start(folder, words, " &", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      universal_newlines=True))
        readers = [threading.Thread(target=echo, args=pair) for pair in enumerate(workers, 1)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


# ---- Tasks: retry, why


def do_task_retry(options):
    if not options.ids and options.task_id is None and options.status is None:
        options.status = "failed"
    tasks = chosen_tasks(options, options.ids)
    if options.dry_run:
        show_listing(tasks, options)
        return note("Would retry %s." % some(tasks))
    if not tasks:
        return note("Nothing matches: nothing was retried.")
    update_tasks([TaskUpdateRequest(_id=task.task_id) for task in tasks], reset_pending=True)
    if not options.quiet:
        say("%s pending again" % some(tasks))



def do_task_why(options):
    task, = tasks_named([options.task_id])
    lines = in_the_way(task, options) if task.status == "pending" else [what_became(task)]
    for line in lines:
        say(clean(line))


def what_became(task):
    """Return what there is to say of a task that does not wait to be run."""
    if task.status == "running":
        return "It runs, for %s by now, on worker %s%s." % (
            span(spent_s(task) or 0), task.worker_id or "unknown",
            "; last heard of %s ago" % age(task.last_heartbeat) if task.last_heartbeat else "")
    again = "labtasker task retry %s makes it pending again." % task.task_id[:8]
    if task.status == "failed":
        return "It failed for good, after %d of %d runs%s. %s" % (
            task.retries, task.max_retries, with_error(task), again)
    return "It is over: %s. %s" % (task.status, again)


def with_error(task):
    """Return ": why" of a task that failed, or nothing."""
    error = error_of(task)
    return ": " + error if error else ""


def error_of(task):
    """Return the error that a task's summary tells of, in a line, or nothing."""
    raised = task.summary.get("labtasker_exception")
    if isinstance(raised, dict):
        return ("%s: %s" % (raised.get("type"), raised.get("message"))).split("\n")[0]
    return str(task.summary.get("labtasker_error") or "").split("\n")[0]


def in_the_way(task, options):
    """Yield what keeps a pending task from being run: its place, the loops that run now, workers, the one asked for."""
    queued = sorted(ls_tasks(status="pending", limit=EVERY).content,
                    key=lambda one: (-one.priority, one.last_modified, one.created_at))
    ahead = next((at for at, one in enumerate(queued) if one.task_id == task.task_id), 0)
    yield "It waits for %s, as number %d of %d in line (higher priority first, then the longest unchanged)." % (
        age(task.last_modified), ahead + 1, len(queued))
    if task.retries:
        yield "It failed %d of %d times%s." % (task.retries, task.max_retries, with_error(task))
    if vars(task).get("reason"):
        yield "Its last run was handed back: %s." % task.reason
    running = ls_tasks(status="running", limit=EVERY).content
    if not running:
        yield "Nothing runs in this queue: start a loop, such as labtasker loop -- %s" % example_command(task)
    shown = set()
    for one in running:
        text = as_typed(one.cmd)
        if text and text not in shown:
            shown.add(text)
            yield "A loop that runs now, %s: %s." % (text, "; ".join(mismatches(one.cmd, task)) or "would take it")
    for worker in ls_workers(limit=EVERY).content:
        if worker.status != "active":
            yield "Worker %s is %s and gets no tasks: labtasker worker report %s active" % (
                worker.worker_name or worker.worker_id[:8], worker.status, worker.worker_id[:8])
    if options.rest or options.extra_filter:
        found = mismatches(options.rest, task) + unmet(task, filter_of(options))
        yield "The loop asked for: %s." % ("; ".join(found) or "it would take it")


def as_typed(cmd):
    """Return a command as one types it."""
    import shlex
    return cmd if isinstance(cmd, str) else " ".join(map(shlex.quote, cmd or ()))


def example_command(task):
    """Return a command that takes just the task's arguments."""
    return "python train.py " + " ".join("--%s '%%(%s)'" % (key, key) for key, _ in flat(task.args))


def mismatches(cmd, task):
    """Return what keeps a command with placeholders from taking the task: no more, no less."""
    try:
        keys = [key for text in ([cmd] if isinstance(cmd, str) else cmd or ()) for key in Template(text).keys]
    except LabtaskerError as error:
        return [str(error).split("\n")[0]]
    has = [".".join(path) for path in paths_of(task.args)]
    if not keys or covers(keys, paths_of(task.args)):
        return []

    def within(inner, outer):
        return inner == outer or inner.startswith(outer + ".")
    missing = [key for key in keys if not any(within(path, key) for path in has)]
    extra = sorted(path for path in has if not any(within(path, key) for key in keys))
    return ["it wants %s, which the task lacks" % key for key in missing] + [
        "the task has %s, which it does not take (%%(%s))" % (path, path) for path in extra]


def unmet(task, query):
    """Return the parts of a filter, text or document, that the task does not match."""
    if not query:
        return []
    if isinstance(query, str):
        query = parse_filter(query, visible(TASK_FIELDS), now())
    parts = query["$and"] if list(query) == ["$and"] else [query]
    return ["the filter's %s does not match" % json.dumps(part) for part in parts
            if not ls_tasks(task_id=task.task_id, extra_filter=part).content]


# ---- Waiting: how far it is

Pace = collections.namedtuple("Pace", "counts per_s eta_s")
RECENT = 50  # tasks that ended last, by which the rate goes
REFRESH_S, WHOLE_S = 2.0, 30.0  # between looks; between looks at everything, since deleted tasks tell nobody


class Sweep:
    """The tasks that a query matches; after the first look only what changed is asked for."""

    def __init__(self, query):
        self.query, self.tasks, self.whole_at = query, {}, None

    def refresh(self):
        """Look; raises what `ls_tasks` does."""
        is_plain = set(self.query) <= {"task_name", "task_id"}  # others may cease to match
        if not is_plain or not self.tasks or monotonic() - self.whole_at > WHOLE_S:
            found = {}
            self.whole_at, query = monotonic(), self.query
        else:
            found = dict(self.tasks)
            latest = max(task.last_modified for task in found.values())
            query = dict(self.query, extra_filter={"last_modified": {"$gte": {"_dt": latest.isoformat()}}})
        found.update((task.task_id, task) for task in ls_tasks(limit=EVERY, **query).content)
        self.tasks = found


def pace(tasks, moment):
    """Return the Pace of tasks at a moment: {status: count}, tasks ended a second lately, seconds to go (or None)."""
    counts = collections.Counter(task.status for task in tasks)
    ended = sorted((task.last_modified.timestamp(), task.start_time.timestamp()) for task in tasks
                   if task.status in ("success", "failed") and task.start_time)[-RECENT:]
    left, spent_s = counts["pending"] + counts["running"], moment - min(begin for _, begin in ended) if ended else 0
    per_s = len(ended) / spent_s if spent_s > 0 else 0.0
    return Pace(counts, per_s, left / per_s if left and per_s and counts["running"] else None)


def per_time(per_s):
    """Return a rate in a unit in which it is a number to read."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if per_s * size >= 1 or unit == "h":
            return "%.1f/%s" % (per_s * size, unit)


def progress(found, width):
    """Return a Pace as a bar and words, at most `width` cells."""
    total = sum(found.counts.values())
    done = total - found.counts["pending"] - found.counts["running"]
    words = ["%d of %d done" % (done, total)] + [
        "%d %s" % (found.counts[state], state) for state in ("failed", "running") if found.counts[state]]
    if found.per_s:
        words.append(per_time(found.per_s))
    if found.eta_s is not None:
        words.append("ETA " + span(found.eta_s))
    text = ", ".join(words)
    room = min(30, width - len(text) - 3)
    full = room * done // total if total else 0
    return "[%s%s] %s" % ("#" * full, "." * (room - full), text) if room >= 5 else text[:width]


def wait_with_bar(query):
    """Return the exit code of `task wait`, with a bar that moves on the terminal at stderr."""
    sweep, began = Sweep(query), monotonic()
    while True:
        look_at = monotonic()
        sweep.refresh()
        found, left_s = pace(sweep.tasks.values(), now()), max(0.5, 10 * (monotonic() - look_at))
        if not sweep.tasks:
            note("Nothing matches.")
            return 0
        over = not found.counts["pending"] and not found.counts["running"]
        sys.stderr.write("\r\x1b[K" + progress(found, screen_size(sys.stderr)[0] - 1) + "\n" * over)
        sys.stderr.flush()
        if over:
            return 1 if found.counts["failed"] else 0
        time.sleep(min(30, left_s, REFRESH_S if monotonic() - began > 5 else 0.5))


# ---- Logs


def last_log(task):
    """Return the file with the output of a task's last run, or None where it is not on this host."""
    path = log_path(task, (task.attempts or [{}])[-1])
    return path if os.path.isfile(path) else None


def last_lines(path, limit, tail_bytes=65536):
    """Return the last lines of a file as a terminal would show them, or [] where it can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - tail_bytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").split("\r")[-1] for line in text.rstrip("\n").split("\n")]  # bars go back to the start
    return [clean(re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line), "").expandtabs(4) for line in lines[-limit:]]


def last_words(task):
    """Return the last line of a failed task's log, else the error in its summary."""
    path = last_log(task)
    lines = [line for line in last_lines(path, 20, 4096) if line.strip()] if path else []
    return lines[-1].strip() if lines else clean(error_of(task), "")

# ---- Watching


BOLD, FAINT, INVERSE = "1", "2", "7"
STATES = (None, "running", "failed", "pending", "success", "cancelled")
KEYS = {  # key: (method of Watch, words in the last line)
    "up": ("go_up", ""), "k": ("go_up", ""), "down": ("go_down", ""), "j": ("go_down", "up, down: choose"),
    "enter": ("open_task", "Enter: open"), "l": ("open_log", "l: log"), "c": ("ask_cancel", "c: cancel"),
    "r": ("ask_retry", "r: retry"), "s": ("next_state", "s: status"), "/": ("edit_filter", "/: filter"),
    "esc": ("go_back", ""), "backspace": ("go_back", ""), "q": ("quit", "q: back"),
}
WATCHED = ("id", "worker", "duration", "name", "retries", "args", "summary")
SECTIONS = (  # status, title, the time by which they stand, whether the latest is first
    ("running", "Running", "start_time", False), ("failed", "Failed, the last first", "last_modified", True),
    ("pending", "Pending, the next first", "last_modified", False),
    ("success", "Done, the last first", "last_modified", True),
    ("cancelled", "Cancelled, the last first", "last_modified", True))


def styled(text, *styles):
    """Return a text in colours and the like of a terminal."""
    styles = [style for style in styles if style]
    return "\x1b[%sm%s\x1b[0m" % (";".join(styles), text) if styles and not os.environ.get("NO_COLOR") else text


class Feed:
    """Looks again and again, in a thread of its own, so that keys are answered at once."""

    def __init__(self, query, interval_s):
        self.sweep, self.interval_s = Sweep(query), interval_s
        self.lock = threading.Lock()  # guards the next line, and which sweep is the present one
        self.tasks, self.workers, self.error, self.looks = {}, {}, None, 0
        self.wake = threading.Event()
        threading.Thread(target=self._run, name="labtasker watch", daemon=True).start()

    def _run(self):
        while True:
            began, sweep = monotonic(), self.sweep
            self.wake.clear()
            try:
                sweep.refresh()
                workers, error = {one.worker_id: one for one in ls_workers(limit=EVERY).content}, None
            except Exception as problem:  # the next look may go well
                workers, error = self.workers, problem
            with self.lock:
                if sweep is self.sweep:
                    self.tasks, self.workers, self.error, self.looks = sweep.tasks, workers, error, self.looks + 1
            self.wake.wait(max(self.interval_s, 10 * (monotonic() - began)))

    def seen(self):
        """Return (tasks, {id: worker}, error or None, how many looks there were)."""
        with self.lock:
            return list(self.tasks.values()), self.workers, self.error, self.looks

    def ask(self, query):
        """Look for other tasks from now on."""
        with self.lock:
            self.sweep, self.tasks = Sweep(query), {}
        self.wake.set()


class View:
    """What a person sees; knows no terminal. `line` is what is typed at the bottom: (prompt, text, action)."""

    def __init__(self, feed, query, where):
        self.feed, self.query, self.where, self.looks = feed, query, where, None
        self.state, self.page, self.top, self.line, self.words, self.over = None, None, 0, None, "", False
        self.order, self.chosen, self.current = [], None, None  # ids shown; the one gone to; else the first is meant

    def lines(self, width, height):
        """Return `height` lines, or fewer, of at most `width` cells each."""
        tasks, self.workers, error, looks = self.feed.seen()
        if looks != self.looks:
            self._look(tasks, looks)
        head = self._head(looks, width)
        body = (self._list if self.page is None else self._task if self.page == "task" else self._log)(
            width, height - len(head) - 2)
        foot = self.words or ("%s; trying again" % str(error).split("\n")[0] if error else "")
        if self.line:
            foot = self.line[0] + self.line[1] + "_"
        body += [""] * (height - len(head) - 2 - len(body))
        keys = "  ".join(words for _, words in KEYS.values() if words)
        return head + body + [styled(fitted(clean(foot, ""), width), BOLD),
                              styled(fitted(keys, width).rstrip(), FAINT)]

    def _look(self, tasks, looks):
        """Take what was seen last; sorting ten thousand tasks at every key would be felt."""
        self.tasks, self.looks, self.pace = {task.task_id: task for task in tasks}, looks, pace(tasks, now())
        self.cells = dict(apart(tasks)[-1], id=lambda task: task.task_id[:8], worker=self._worker) if tasks else {}
        self.sorted = {}
        for status, _, field, is_latest_first in SECTIONS:
            self.sorted[status] = sorted(
                (task for task in tasks if task.status == status),
                key=lambda task: getattr(task, field) or task.created_at, reverse=is_latest_first)
        self.sorted["pending"].sort(key=lambda task: -task.priority)

    def _head(self, looks, width):
        found = self.pace
        title = "%s   %s" % (self.where, self.query.get("extra_filter") or "")
        counts, room = [], width
        for state in TASK_STATES:
            text = "%s %d" % (state, found.counts[state])
            text = fitted(text, min(room, len(text) + 2))
            counts.append(styled(text, STATUS_COLOURS[state]))
            room -= len(text)
        busy = {task.worker_id for task in self.sorted["running"]}
        idle = [one for one in self.workers.values() if one.status != "active"]
        workers = "%d at work" % len(busy) + "".join(
            ", %s %s" % (one.worker_name or one.worker_id[:8], one.status) for one in idle)
        return [styled(fitted(clean(title, ""), width).rstrip(), BOLD),
                progress(found, width) if looks else "looking ...",
                "".join(counts), fitted("workers: " + clean(workers, ""), width).rstrip(), ""]

    def _sections(self, room):
        """Yield (title, tasks to show) of the sections that have any: three each, and of the first ones what fits."""
        shown = [row for row in SECTIONS if self.sorted[row[0]] and self.state in (None, row[0])]
        sizes = {status: 1 + (status == "failed") for status, _, _, _ in shown}
        left = room - sum(1 + min(3, len(self.sorted[status])) * size for status, size in sizes.items())
        for status, title, _, _ in shown:
            tasks = self.sorted[status]
            more = len(tasks) if self.state else max(0, min(len(tasks) - 3, left // sizes[status]))
            left -= more * sizes[status]
            yield "%s: %d" % (title, len(tasks)), tasks[:3 + more]

    def _list(self, width, room):
        """Return the tasks in sections, so that the current one is seen; under a failed one its last words."""
        self.order, rows = [], []  # rows: (title, None), (None, task), or (True, task) for its last words
        for title, tasks in self._sections(room):
            rows.append((title, None))
            self.order += [task.task_id for task in tasks]
            for task in tasks:
                rows += [(None, task)] + [(True, task)] * (task.status == "failed")
        self.current = self.chosen if self.chosen in self.order else self.order[0] if self.order else None
        at = next((at for at, (_, task) in enumerate(rows) if task and task.task_id == self.current), 0)
        begin = max(0, min(at - room // 2, len(rows) - room)) if at >= room - 1 else 0
        rows = rows[begin:begin + room]
        columns = self._columns([task for title, task in rows if title is None])
        return [self._row(title, task, columns, width) for title, task in rows] or ["No task matches."[:width]]

    def _columns(self, tasks):
        """Return {task id: line}, aligned."""
        rows = [[self.cells[name](task) for name in WATCHED] for task in tasks]
        widths = [max(map(cells_wide, column)) for column in zip(*rows)]
        return {task.task_id: "  ".join(fitted(cell, width) for cell, width in zip(row, widths) if width)
                for task, row in zip(tasks, rows)}

    def _worker(self, task):
        worker = self.workers.get(task.worker_id)
        return "" if task.worker_id is None else worker and worker.worker_name or task.worker_id[:8]

    def _row(self, title, task, columns, width):
        if task is None:
            return styled(fitted(title, width).rstrip(), BOLD)
        if title:
            return styled(fitted("      " + last_words(task), width).rstrip(), FAINT)
        is_current = task.task_id == self.current
        text = fitted(clean(("> " if is_current else "  ") + columns[task.task_id], ""), width).rstrip()
        return styled(text, STATUS_COLOURS[task.status], INVERSE if is_current else "")

    def _task(self, width, room):
        task = self.tasks.get(self.chosen)
        lines = (record_text(task.to_dict()) if task else "It is gone.").split("\n")
        self.top = max(0, min(self.top, len(lines) - room))
        return [fitted(clean(line, ""), width).rstrip() for line in lines[self.top:self.top + room]]

    def _log(self, width, room):
        task = self.tasks.get(self.chosen)
        path = last_log(task) if task else None
        if path is None:
            return [fitted("There is no log of task %s on this host." % str(self.chosen)[:8], width).rstrip()]
        return [styled(path[-width:], FAINT)] + [
            fitted(line, width).rstrip() for line in last_lines(path, room - 1)]


class Watch(View):
    """What a person does."""

    def press(self, key):
        """Do what a key asks for."""
        self.words = ""
        if self.line:
            return self._type(key)
        if key in KEYS:
            getattr(self, KEYS[key][0])()

    def _type(self, key):
        prompt, text, action = self.line
        if key in ("esc", "enter"):
            self.line = None
            if key == "enter":
                action(text)
        else:
            text = text[:-1] if key == "backspace" else text + key if len(key) == 1 else text
            self.line = prompt, text, action

    def go_up(self):
        """Choose the task above."""
        self._go(-1)

    def go_down(self):
        """Choose the task below."""
        self._go(1)

    def _go(self, step):
        if self.page:
            self.top = max(0, self.top + step)
        elif self.current in self.order:
            at = self.order.index(self.current) + step
            self.chosen = self.order[max(0, min(at, len(self.order) - 1))]

    def _open(self, page):
        self.chosen = self.current
        self.page, self.top = page if self.chosen else None, 0

    def open_task(self):
        """Show all fields of the current task."""
        self._open("task")

    def open_log(self):
        """Follow the output of the current task."""
        self._open("log")

    def go_back(self):
        """Close the page that is open."""
        self.page = None

    def quit(self):
        """Close the page that is open, or end."""
        self.over, self.page = self.page is None, None

    def next_state(self):
        """Show another status alone, or all again."""
        self.state, self.page = STATES[(STATES.index(self.state) + 1) % len(STATES)], None

    def edit_filter(self):
        """Have another filter typed."""
        self.line = "filter: ", str(self.query.get("extra_filter") or ""), self._filter

    def _filter(self, text):
        try:
            query = dict(self.query, extra_filter=typed_filter(text.strip() or None))
            if isinstance(query["extra_filter"], str):
                parse_filter(text, visible(TASK_FIELDS), now())
        except LabtaskerError as error:
            self.words, self.line = str(error).split("\n")[0], ("filter: ", text, self._filter)
            return
        self.query = {name: value for name, value in query.items() if value is not None}
        self.feed.ask(self.query)

    def ask_cancel(self):
        """Cancel the current task, once it is confirmed."""
        self._confirm("Cancel", {"status": "cancelled"}, False)

    def ask_retry(self):
        """Make the current task pending again, once it is confirmed."""
        self._confirm("Retry", {}, True)

    def _confirm(self, verb, change, reset_pending):
        task_id = self.current
        if task_id:
            self.line = "%s task %s? [y/N] " % (verb, task_id[:8]), "", lambda text: self._change(
                text, task_id, change, reset_pending)

    def _change(self, text, task_id, change, reset_pending):
        if text.strip().lower() not in ("y", "yes"):
            self.words = "Nothing was changed."
            return
        try:
            task, = update_tasks([TaskUpdateRequest(_id=task_id, **change)], reset_pending=reset_pending).content
            self.words = "Task %s is %s." % (task_id[:8], task.status)
        except LabtaskerError as error:
            self.words = str(error).split("\n")[0]
        self.feed.wake.set()


ESCAPES = {"[A": "up", "[B": "down", "OA": "up", "OB": "down"}
CONTROLS = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace"}


def keys_of(text):
    """Yield the keys that a terminal's bytes, decoded, stand for; sequences that are not known are no key."""
    for match in re.finditer("\x1b([\\[O][0-9;]*[A-Za-z~])|\x1b|.", text, re.S):
        if match.group(1):
            if match.group(1) in ESCAPES:
                yield ESCAPES[match.group(1)]
        else:
            yield "esc" if match.group() == "\x1b" else CONTROLS.get(match.group(), match.group())


class Screen:
    """A terminal in full-screen mode; a context that gives it back as it was, whatever happens."""

    def __init__(self):
        import codecs
        import signal
        import termios
        self.termios, self.signal, self.shown = termios, signal, None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self):
        signal = self.signal
        self.before = self.termios.tcgetattr(0)
        self.handlers = {number: signal.signal(number, handler) for number, handler in (
            (signal.SIGTERM, self._end), (signal.SIGHUP, self._end), (signal.SIGTSTP, self._stop))}
        self._take()
        return self

    def __exit__(self, *_):
        self._give_back()
        for number, handler in self.handlers.items():
            self.signal.signal(number, handler)

    def _take(self):
        import tty
        tty.setcbreak(0)
        self.shown = None
        self._write("\x1b[?1049h\x1b[?25l\x1b[?7l")  # the other screen, no cursor, no wrapping

    def _give_back(self):
        self._write("\x1b[?7h\x1b[?25h\x1b[?1049l")
        self.termios.tcsetattr(0, self.termios.TCSADRAIN, self.before)

    def _end(self, number, _):
        raise SystemExit(128 + number)

    def _stop(self, number, _):
        self._give_back()
        os.kill(os.getpid(), self.signal.SIGSTOP)
        self._take()

    def _write(self, text):
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(1, data):]

    def draw(self, lines):
        """Show lines, where they are others than before."""
        if lines != self.shown:
            self.shown = lines
            self._write("\x1b[H" + "\r\n".join(line + "\x1b[K" for line in lines) + "\x1b[J")

    def keys(self, timeout_s):
        """Return the keys pressed within so many seconds; raises EOFError where the terminal is gone."""
        import select
        if not select.select([0], [], [], timeout_s)[0]:
            return []
        data = os.read(0, 1024)
        if not data:
            raise EOFError
        return list(keys_of(self.decoder.decode(data)))


def do_watch(options):
    query, where = selectors(options), "%s at %s" % (load_config().queue_name, client().where)
    if not all(map(is_terminal, (sys.stdin, sys.stdout))) or os.environ.get("TERM", "dumb") == "dumb":
        return watch_plainly(Sweep(query), options.interval)
    watch = Watch(Feed(query, options.interval), query, where)
    with Screen() as screen:
        while not watch.over:
            width, height = os.get_terminal_size(1)  # as it is now, whatever COLUMNS says
            screen.draw(watch.lines(width, height))
            try:
                for key in screen.keys(0.25):
                    watch.press(key)
            except EOFError:
                return 1


def watch_plainly(sweep, interval_s):
    """Print a line whenever the counts change, and one for each task that failed since; for ever."""
    last, failed = None, None
    while True:
        began = monotonic()
        sweep.refresh()
        found = pace(sweep.tasks.values(), now())
        if found.counts != last:
            say(format_time(now())[:19] + "  " + (progress(found, 100) if sweep.tasks else "no task matches"))
        for task in sweep.tasks.values():
            if task.status == "failed" and failed is not None and task.task_id not in failed:
                say(clean("    failed: %s  %s  %s" % (task.task_id[:8], pairs(task.args), last_words(task)), ""))
        last, failed = found.counts, {task.task_id for task in sweep.tasks.values() if task.status == "failed"}
        sys.stdout.flush()
        time.sleep(max(interval_s, 10 * (monotonic() - began)))


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


class Mistakes(Exception):
    """What is wrong in an edited text: {line number from 1 on, or 0 for the whole: message}."""


MARK = "#! "  # begins a line that tells of a mistake in the line above it


def edited(text, name, read):
    """Return read(what a person made of `text` in an editor), None where nothing was changed.

    `read` raises Mistakes; they are shown below their lines, and the editor opens again where a person wants that."""
    import shutil
    import tempfile
    folder = tempfile.mkdtemp(prefix="edit-", dir=None if not os.path.isdir(find_root()) else find_root())
    path, marked = os.path.join(folder, name), text
    try:
        while True:
            with open(path, "w", encoding="utf-8") as file:
                os.chmod(path, 0o600)
                file.write(marked)
            run_editor(path)
            found = read_text(path)
            if found == marked or without_marks(found) == text:
                return None
            try:
                return read(without_marks(found))
            except Mistakes as error:
                mistakes = error.args[0]
            for number, words in sorted(mistakes.items()):
                note("line %d: %s" % (number, words) if number else words)
            if not is_terminal(sys.stdin):
                raise LabtaskerRuntimeError("%s, as it was edited, can't be taken: nothing was changed" % name)
            if ask("Edit it again? [Y/n]", "", default="y").lower() not in ("y", "yes"):
                return None
            marked = with_marks(without_marks(found), mistakes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_marks(text, mistakes):
    """Return a text with each mistake below its line."""
    lines = [""] + text.split("\n")
    for number, words in sorted(mistakes.items(), reverse=True):
        lines[number + 1:number + 1] = [MARK + line for line in str(words).split("\n")]
    return "\n".join(lines[1:])


def without_marks(text):
    """Return a text without the lines that tell of mistakes."""
    return "\n".join(line for line in text.split("\n") if not line.startswith(MARK))


def do_config(options):
    path = os.path.join(find_root(), CONFIG_NAME)
    if not os.path.exists(path):
        raise LabtaskerValueError("there is no %s: labtasker init writes it" % path)
    text = edited(read_text(path), CONFIG_NAME, checked_config)
    if text is None:
        note("Nothing was changed.")
        return 1
    Disk.create(path, [text.encode("utf-8")])
    say("Wrote %s" % path)


def checked_config(text):
    """Return the text of a configuration that can be read; raises Mistakes."""
    import shutil
    import tempfile
    folder, root = tempfile.mkdtemp(prefix="check-", dir=find_root()), os.environ.get("LABTASKER_ROOT")
    path = os.path.join(folder, CONFIG_NAME)
    try:
        Disk.create(path, [text.encode("utf-8")])
        os.environ["LABTASKER_ROOT"] = folder
        load_config()
        return text
    except LabtaskerError as error:
        line = re.search(r"\bline (\d+)", str(error))
        raise Mistakes({int(line.group(1)) if line else 0: str(error).replace(path, CONFIG_NAME)}) from None
    finally:
        os.environ.pop("LABTASKER_ROOT")
        if root is not None:
            os.environ["LABTASKER_ROOT"] = root
        shutil.rmtree(folder, ignore_errors=True)


FORM_HEAD = """\
# %s. Change what stands after the =, add or delete lines of args, metadata and summary.
# Values are JSON or Python literals, else text. Lines that begin with # are read-only and not looked at.
# A task whose lines are all deleted stays as it is. Close the editor without saving: nothing is changed.
"""


def edit_tasks(tasks, options):
    """Return the exit code of `task update` in the editor: all changes are one transaction, or none is made."""
    counted = []

    def save(text):
        updates = read_form(text, tasks)
        try:
            update_tasks(updates, reset_pending=options.reset_pending)
        except LabtaskerHTTPStatusError as error:  # a step that is not allowed, a task that is gone
            raise Mistakes({0: str(error)}) from None
        counted.extend(updates)
        return True
    if not edited(form_of(tasks), "tasks.txt", save):
        note("Nothing was changed.")
        return 0
    if not options.quiet:
        say("Updated %s" % some(counted) if counted else "Nothing was changed.")


def form_of(tasks):
    """Return tasks as text to be edited, a block each: read-only fields as notes, a line for each value."""
    lines = [FORM_HEAD % some(tasks)]
    for task in tasks:
        row = task.to_dict()
        lines.append("task " + task.task_id)
        lines += ["# %s: %s" % (name, json.dumps(value)) for name, value in row.items()
                  if name not in UPDATABLE and name != "task_id" and value not in (None, [])]
        lines += ["%s = %s" % pair for pair in values_of(row).items()] + [""]
    return "\n".join(lines)


def values_of(row):
    """Return {dotted field: text} of what can be edited in a task, a dict; the text is as `task update -u` takes it."""
    found = {}
    for name in UPDATABLE:
        if name in ("task_name", "status") and row[name] is not None:
            found[name] = row[name]
        elif TASK_FIELDS[name].kind == "dict" and row[name]:
            found.update((name + "." + key, json.dumps(value, ensure_ascii=False)) for key, value in flat(row[name]))
        elif TASK_FIELDS[name].kind != "dict":
            found[name] = json.dumps(row[name], ensure_ascii=False)
    return found


def read_form(text, tasks):
    """Return the TaskUpdateRequests that an edited form asks for; raises Mistakes."""
    known, blocks, mistakes, block = {task.task_id: task for task in tasks}, {}, {}, None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith("task ") and "=" not in line:
            task_id = line[5:].strip()
            if task_id not in known or task_id in blocks:
                mistakes[number] = "there is %s task %s here" % ("another" if task_id in blocks else "no", task_id)
            block = blocks.setdefault(task_id, {})
        elif line and not line.startswith("#"):
            field, equals, value = map(str.strip, line.partition("="))
            if block is None or not equals:
                mistakes[number] = "write field = value, below the line of its task"
            elif field in block:
                mistakes[number] = "%s is there twice" % field
            else:
                block[field] = number, value
    if mistakes:
        raise Mistakes(mistakes)
    for block in blocks.values():
        for field, (number, _) in block.items():
            above = [field[:dot.start()] for dot in re.finditer("\\.", field) if field[:dot.start()] in block]
            if above:
                mistakes[number] = "%s collides with %s" % (field, above[0])
    found = [change_in(known[task_id], block, mistakes) for task_id, block in blocks.items() if block]
    if mistakes:
        raise Mistakes(mistakes)
    return [change for change in found if change]


def change_in(task, block, mistakes):
    """Return the TaskUpdateRequest of what differs in a block of a form, or None; notes mistakes by their lines."""
    before, updates = values_of(task.to_dict()), {}
    for field, (number, value) in block.items():
        if before.get(field) != value:
            try:
                update = updates_of(["%s=%s" % (field, value)])
                change_of(task, update)
                updates.update(update)
            except LabtaskerError as error:
                mistakes[number] = str(error)
    gone = {field.split(".")[0] for field in before if field not in block and "." in field}
    first = min(number for number, _ in block.values())
    for field in before:
        if field not in block and "." not in field:
            mistakes[first] = "the line of %s is missing" % field
    for name in gone:  # a field with a line less is replaced as a whole
        left = {field: text for field, (_, text) in block.items() if field.startswith(name + ".")}
        updates = {field: value for field, value in updates.items() if field not in left}
        try:
            updates[name] = joined({field.partition(".")[2]: typed_value(text, field)
                                    for field, text in left.items()}, {})
        except LabtaskerError as error:
            mistakes[first] = str(error)
    try:
        return change_of(task, updates) if updates else None
    except LabtaskerError as error:
        mistakes[first] = str(error)


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


# ---- Completion

SHELLS = {
    "bash": """\
# source <(labtasker completion bash), or in ~/.bashrc: eval "$(labtasker completion bash)"
_labtasker() {
    local IFS=$'\\n' words=("${COMP_WORDS[@]:0:COMP_CWORD+1}")
    words[0]=labtasker
    COMPREPLY=($("${COMP_WORDS[0]/#\\~/$HOME}" completion bash -- "${words[@]}" 2>/dev/null))
}
complete -o default -o nosort -F _labtasker labtasker lt 2>/dev/null || complete -o default -F _labtasker labtasker lt
""",
    "zsh": """\
#compdef labtasker lt
# in ~/.zshrc, after compinit: eval "$(labtasker completion zsh)"
_labtasker() {
    local -a found
    found=("${(@f)$(${words[1]} completion zsh -- labtasker "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -Q -- "${found[@]}"; else _files; fi
}
compdef _labtasker labtasker lt
""",
    "fish": """\
# labtasker completion fish > ~/.config/fish/completions/labtasker.fish
function __labtasker
    set -l typed (commandline -opc) (commandline -ct)
    $typed[1] completion fish -- labtasker $typed[2..-1] 2>/dev/null
end
complete -c labtasker -a '(__labtasker)'
complete -c lt -a '(__labtasker)'
"""}


def do_completion(options):
    if options.rest is None:
        return say(SHELLS[options.shell].rstrip("\n"))
    typed = options.rest[1:] or [""]
    before, word = [one for one in typed[:-1] if one != "="], typed[-1]  # to bash a = is a word of its own
    found = completions(before, "" if word == "=" else word)
    if found:
        say(clean("\n".join(found)))


def completions(before, word):
    """Return what `word`, typed after the words `before`, can become."""
    path = next((" ".join(before[:size]) for size in (2, 1) if " ".join(before[:size]) in COMMANDS), None)
    if path is None or before[:1] == ["help"]:
        given = before[1:] if before[:1] == ["help"] else before
        names = [name.split() for name in group(" ".join(given))] if len(given) < 2 else []
        words = [name[len(given)] for name in names]
        return starting(list(dict.fromkeys(words)), word)
    before = before[len(path.split()):]
    if "--" in before:
        return []
    row = COMMANDS[path]
    flags = {flag: (flags, settings) for flags, settings in row.options for flag in flags if flag.startswith("-")}
    last, begin = before[-1] if before else "", ""
    if word.startswith("--") and "=" in word:
        last, _, word = word.partition("=")
        begin = last + "="
    if last in flags and "metavar" in flags[last][1]:
        return [begin + one for one in starting(values_for(path, flags[last][1], word), word)]
    if word.startswith("-"):
        return starting(["--help"] + [flag for flag in flags if flag.startswith("--")] + ["--"] * bool(row.rest), word)
    places = [settings for names, settings in row.options if not names[0].startswith("-")]
    return starting([value for settings in places for value in values_for(path, settings, word)], word)


def starting(words, begin):
    """Return the words that begin so."""
    return [word for word in words if word.startswith(begin)]


def values_for(path, settings, word):
    """Return what can stand for an option's value: its choices, fields, live ids and names."""
    choices = getattr(settings.get("type"), "choices", None)
    name = settings["metavar"]
    if choices:
        return list(choices)
    try:
        if name == "ID":
            find = ls_workers if path.startswith("worker") or settings.get("dest") == "worker_id" else ls_tasks
            query = {"_id": {"$regex": "^" + word}} if re.match("[0-9a-f-]+\\Z", word) else None
            return ids_of(find(extra_filter=query, limit=100).content)
        if name == "NAME" and path.startswith("task"):
            return sorted({task.task_name for task in ls_tasks(limit=1000).content if task.task_name})
        if name.startswith("FIELD"):
            return field_values(name, word)
        return list(SHELLS) if name == "SHELL" else []
    except LabtaskerError:  # nobody answers: nothing to offer
        return []


def field_values(name, word):
    """Return the fields that can stand there, those in args, metadata and summary of tasks too."""
    head, comma, _ = word.rpartition(",") if name.endswith("...") else ("", "", "")
    tops = UPDATABLE if "=" in name else list(visible(TASK_FIELDS))
    deep = dict.fromkeys("%s.%s" % (top, key) for task in ls_tasks(limit=100).content
                         for top in ("args", "metadata", "summary") for key, _ in flat(getattr(task, top)))
    return [head + comma + field + ("=" if "=" in name else "") for field in tops + list(deep)]


# ---- Slurm: a job of loops
#
# What is typed is sbatch's, the loop's, or this command's own; the loop's and the job's command stand in the script as
# they were typed, sbatch's options on #SBATCH lines.

NOT_OF_LOOP = ("-c",)  # sbatch's own, for CPUs
SBATCH_SWITCHES = frozenset(  # sbatch's options that take no value, or one after = alone
    "-H --hold -k --no-kill -O --overcommit -Q --quiet -s --oversubscribe --share -V --version -W --wait --contiguous "
    "--exclusive --get-user-env --ignore-pbs --nice --no-requeue --parsable --propagate --reboot --requeue "
    "--spread-job --test-only --usage --use-min-nodes --x11".split())
SBATCH_ONCE = frozenset(  # these are about a submission: given to sbatch, they are not in the script
    "-b --begin -d --dependency -H --hold -Q --quiet -W --wait --parsable --test-only".split())
SBATCH_PARALLEL = frozenset(  # with more than 1 the loop has to be started by srun, once a task
    "-n --ntasks -N --nodes --ntasks-per-node --ntasks-per-socket --ntasks-per-core --ntasks-per-gpu".split())

JobScript = collections.namedtuple("JobScript", "lines once signal srun array")
# lines: of #SBATCH; once: words for sbatch itself; signal: the name of --signal's, or None; srun: its words, [] without


def sort_sbatch(words):
    """Return (this command's words, {"sbatch": [(name, value or None)], "loop": words}); raises UsageError."""
    own, loop = switches_of("sbatch"), switches_of("loop")
    found, words = {"own": [], "loop": [], "sbatch": []}, list(words)
    while words:
        word = words.pop(0)
        name, value = name_and_value(word)
        if not name.startswith("-"):
            raise UsageError("sbatch: unexpected argument %s: the command goes after --, as in: %s" % (
                word, COMMANDS["sbatch"].example.split("\n")[0]))
        owner = "own" if name in own else "loop" if name in loop and name not in NOT_OF_LOOP else "sbatch"
        takes = {"own": own, "loop": loop}[owner][name] if owner != "sbatch" else (
            name not in SBATCH_SWITCHES and words and not words[0].startswith("-"))
        taken = [word] + ([words.pop(0)] if value is None and takes and words else [])
        value = taken[-1] if taken[1:] else value
        if name == "--gpus" and value != "all":  # a number of them; which ones they are Slurm decides
            owner = "sbatch"
        found[owner] += [(name, value)] if owner == "sbatch" else taken
    return found.pop("own"), found


def name_and_value(word):
    """Return an option's name and the value that is attached to it, or None: --mem=4G, -N2, --hold, -p."""
    if word.startswith("--") or not word.startswith("-"):
        name, equals, value = word.partition("=")
        return name, value if equals else None
    return word[:2], word[2:] or None


def switches_of(path):
    """Return {option: whether it takes a value} of a command's options."""
    found = {flag: "metavar" in settings for flags, settings in COMMANDS[path].options for flag in flags}
    return dict(found, **{"-h": False, "--help": False})


def job_script(given):
    """Return the JobScript that sbatch's options [(name, value)] ask for; raises UsageError."""
    names = dict(given)
    if "--wrap" in names:
        raise UsageError("sbatch: instead of --wrap the command goes after --")
    if "\\" in os.getcwd() and not {"-o", "--output"} & set(names):
        raise UsageError("sbatch: Slurm can't keep a log in %s, because of the backslash: say where with --output=FILE"
                         % os.getcwd())
    array = bool({"-a", "--array"} & set(names))
    srun = ["srun"] if any(name in SBATCH_PARALLEL and value != "1" for name, value in given) else []
    cpus = names.get("--cpus-per-task", names.get("-c"))
    srun += ["--cpus-per-task=" + cpus] if srun and cpus else []  # which srun does not take from sbatch
    signal = names.get("--signal")
    if signal and not srun and ":" not in signal:  # without B: it would go to steps, and not to the loop
        signal = "B:" + signal
    lines = [text for spellings, text in (
        ("-J --job-name", "--job-name=labtasker"), ("-D --chdir", "--chdir=" + quoted_for_sbatch(os.getcwd())),
        ("-o --output", "--output=" + quoted_for_sbatch(log_name(os.getcwd(), array))),
        ("--open-mode", "--open-mode=append"), ("--requeue --no-requeue", "--requeue"),
        ("" if srun else "-n --ntasks", "--ntasks=1"),
    ) if spellings and not set(spellings.split()) & set(names)]
    lines += [" ".join(sbatch_words(name, value and quoted_for_sbatch(value))) for name, value in given
              if name not in SBATCH_ONCE and not (name == "--signal" and value)]
    lines += ["--signal=" + quoted_for_sbatch(signal)] if signal else []
    once = [word for name, value in given if name in SBATCH_ONCE for word in sbatch_words(name, value)]
    return JobScript(lines, once, signal and signal.split(":")[-1].split("@")[0], srun, array)


def log_name(folder, array):
    """Return the --output of a job in a folder, whose own name Slurm looks through for % too."""
    name = "labtasker-%s.log" % ("%A_%a" if array else "%j")
    return os.path.join(folder.replace("%", "%%"), name) if "%" in folder else name


def sbatch_words(name, value):
    """Return an option as words for sbatch: --mem=4G; -p gpu; --hold."""
    return [name] if value is None else ["%s=%s" % (name, value)] if name.startswith("--") else [name, value]


def quoted_for_sbatch(value):
    """Return a value for a #SBATCH line, where a backslash counts also between quotes; raises UsageError."""
    if re.search("[\r\n]", value):
        raise UsageError("sbatch: a value can't have more than one line: %s" % json.dumps(value))
    if re.match(r"[\w@%+=:,./*~!&|()\[\]{}^-]+\Z", value):
        return value
    return "'%s'" % re.sub(r"(['\\])", r"\\\1", value)


def do_sbatch(options):
    check_loop(options)
    config, job = load_config(), job_script(options.sbatch)
    folder = store_folder(config)
    if options.server and not folder:
        raise UsageError("sbatch: --server is for a store in a folder that the hosts share, but %s is configured"
                         % config.url)
    if folder and not options.server and not read_server_file(folder):
        note("labtasker: no server has the store in %s, so the loops can use it on one host only: add --server, or "
             "start labtasker serve --host 0.0.0.0 first" % folder)
    text = script_text(job, options, config)
    if not options.dry_run:
        return submit_script(text, job.once)
    say(text.rstrip("\n"))
    if job.once:
        note("labtasker: not in the script, as of one submission: sbatch " + as_typed(job.once))


def check_loop(options):
    """Raise here, instead of in each of the job's loops, what they would say of their options and command."""
    loop = parse("loop", options.loop + (["--"] + options.rest if options.rest else []))
    if not (loop.rest or loop.cmd or loop.script_path):
        raise UsageError("sbatch: what are the loops to run? " + COMMANDS["sbatch"].example.split("\n")[0])
    JobCommand(loop.rest, loop.cmd, loop.script_path, loop.executable)
    query = filter_of(loop)
    if isinstance(query, str):
        parse_filter(query, visible(TASK_FIELDS), now())


def script_text(job, options, config):
    """Return the script; no password is ever in it."""
    program = as_typed([sys.executable, os.path.abspath(sys.modules["labtasker"].__file__)])
    loop = "loop" + "".join(" " + as_typed([word]) for word in options.loop)
    loop += " \\\n    -- " + as_typed(options.rest) if options.rest else ""
    head = ["#!/bin/bash"] + ["#SBATCH " + line for line in job.lines] + ["", as_export("LABTASKER_ROOT", config.root)]
    head += [as_export(name, os.environ[name]) for _, name, _, _ in SETTINGS.values()
             if name and os.environ.get(name) and not is_secret(name, os.environ[name])]
    srun = as_typed(job.srun) + " " * bool(job.srun)
    if not options.server:
        head += ["", "# exec: %s takes this shell's place, so that signals reach it." % (job.srun or ["the loop"])[0]]
        return "\n".join(head + ["exec %s%s %s" % (srun, program, loop), ""])
    host, port = options.listen
    return "\n".join(head) + "\n" + SERVER_SCRIPT.format(
        program=program, loop=srun + '"${labtasker[@]}" ' + loop, host=as_typed([host]), port=port,
        wait=as_typed([options.server_wait]), pass_on=PASS_ON.format(as_typed([job.signal])) if job.signal else "",
        unneeded=UNNEEDED if job.array else "")


def as_export(name, value):
    """Return the line of a script that sets a variable."""
    return "export %s=%s" % (name, as_typed([value]))


def is_secret(name, value):
    """Return whether a variable's value is for nobody else: a password, or a URL that has one."""
    return name == "LABTASKER_PASSWORD" or bool(re.search("//[^/]*@", value))


SERVER_SCRIPT = """\
labtasker=({program})
loop=({loop})

# The first task runs the server too, which leaves its address in the folder above, where all others find it. Where none
# comes (the first task has ended, or has not begun), who waits for it runs it; the store takes no second one.
serve() {{
    "${{labtasker[@]}}" serve --host {host} --port {port} &
    server=$!
}}
if [ "${{SLURM_ARRAY_TASK_ID-}}" = "${{SLURM_ARRAY_TASK_MIN-}}" ]; then serve; fi
"${{labtasker[@]}}" server wait --timeout {wait} || serve
"${{labtasker[@]}}" server wait --timeout {wait} > /dev/null || exit
kill -0 "${{server-none}}" 2> /dev/null || exec "${{loop[@]}}"

# The loop beside the server. SIGTERM comes to all processes. The server stays as long as any task runs; the second
# round is for what was handed back meanwhile.
trap 'stopped=yes' TERM
{pass_on}for round in 1 2; do
    if [ -z "${{stopped-}}" ]; then
        "${{loop[@]}}" &
        pid=$!
        while kill -0 "$pid" 2> /dev/null; do
            wait "$pid"
            code=$?
        done
        [ "$code" = 0 ] || stopped=yes
    fi
    kill -0 "$server" 2> /dev/null && "${{labtasker[@]}}" task wait --quiet --status running
done
{unneeded}kill "$server" 2> /dev/null
wait "$server"
exit "$code"
"""
PASS_ON = """\
trap 'stopped=yes; kill -{0} "$pid" 2> /dev/null' {0}  # of --signal: it comes to this shell alone
"""
UNNEEDED = """\
if [ "$("${labtasker[@]}" task count --quiet --status pending)" = 0 ]; then
    scancel --quiet --state=PENDING "$SLURM_ARRAY_JOB_ID"  # nothing is left for what has not begun
fi
while kill -0 "$server" 2> /dev/null &&
    [ "$(squeue --noheader --array --states=RUNNING --jobs="$SLURM_ARRAY_JOB_ID" | wc -l)" -gt 1 ]; do
    sleep 1  # what has begun finds the server, and that nothing is left
done
"""


def submit_script(text, words):
    """Return sbatch's exit code, the job's id printed; what it refuses it says itself. Raises LabtaskerRuntimeError."""
    import subprocess
    try:
        process = subprocess.Popen(["sbatch", "--parsable"] + words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise LabtaskerRuntimeError("there is no sbatch on this host's PATH: type this where jobs are submitted, or "
                                    "print the script with --dry-run and submit that there")
    try:
        process.stdin.write(text.encode())
        process.stdin.close()
    except BrokenPipeError:  # it does not want the script, and says why
        pass
    for line in process.stdout:  # at once, though --wait may have sbatch stay
        say(line.decode("utf-8", "replace").rstrip("\n"))
        sys.stdout.flush()
    return process.wait()


def listening(text):
    """Return (host, port) of HOST:PORT; the type of the option that takes that."""
    import argparse
    host, colon, port = text.rpartition(":")
    if not (host and port.isdigit() and int(port) < 65536):
        raise argparse.ArgumentTypeError("%s is no HOST:PORT, such as 0.0.0.0:9321" % json.dumps(text))
    return host.strip("[]"), int(port)


def do_server_wait(options):
    give_up_at = monotonic() + options.timeout
    while True:
        url = living_server()
        if url:
            return say(url)
        if monotonic() >= give_up_at:
            note("labtasker: no server of %s answers" % (client().where))
            return 1
        time.sleep(min(SERVER_LOOK_S, max(0, give_up_at - monotonic())))


SERVER_LOOK_S = 1.0  # between looks for a server


def living_server():
    """Return the URL of the server that is configured, or that the configured folder names, or None where it does not
    answer; the store itself is not touched."""
    use_client(None)
    try:
        where = client().where
        return where if re.match("https?://", where) and health_check().status == "healthy" else None
    except LabtaskerError as error:
        if not is_away(error):
            raise


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
        " ".join(tuple(OPERATORS) + tuple(LOGIC) + ("$expr",)), "", table(fields)])


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


def comfort(path, run, example, options=(), rest=None, sort=None):
    """Enter a command into the table of labtasker.py."""
    COMMANDS[path] = Command(run, COMFORTS[path], example, options, rest, sort)


comfort("task retry", do_task_retry, "labtasker task retry -f 'args.model == \"vit\"' --dry-run",
        [IDS] + SELECT + [option("--dry-run", "only show which"), QUIET])
comfort("task logs", do_task_logs, "labtasker task logs 3f2a -f",
        [ID, option("-f --follow", "go on printing while it runs"),
         option("--attempt N", "the Nth of the attempts that the task keeps (the last)", type=count)])
comfort("task why", do_task_why, "labtasker task why 3f2a -- python train.py --lr '%(lr)'", [ID, FILTER],
        "[-- COMMAND ...]")
comfort("watch", do_watch, "labtasker watch --name grid", SELECT + [
    option("--interval TIME", "between looks (2 s)", type=seconds, default=REFRESH_S)])
comfort("config", do_config, "EDITOR=nano labtasker config")
comfort("demo", do_demo, "labtasker demo")
comfort("queue get", do_queue_get, "labtasker queue get", [option("-q --quiet", "print its id alone")])
comfort("queue update", do_queue_update, "labtasker queue update --new-queue-name sweep2", [
    option("--new-queue-name NAME", "letters, digits, _ and -"),
    option("--new-password PASSWORD", "1 to 100 letters"), METADATA, SILENT])
comfort("queue delete", do_queue_delete, "labtasker queue delete --cascade --yes",
        [option("--cascade", "its tasks and workers too"), YES])
comfort("journal verify", do_journal_verify, "labtasker journal verify --db-path old/journal.jsonl", [JOURNAL])
comfort("journal repair", do_journal_repair, "labtasker journal repair", [JOURNAL, YES])
comfort("journal compact", do_journal_compact, "labtasker journal compact", [JOURNAL])
comfort("journal stats", do_journal_stats, "labtasker journal stats", [JOURNAL])
comfort("event listen", do_event_listen, "labtasker event listen --compact", [
    option("-c --compact", "one line for each"), option("--raw", "JSON as it came, one line for each"),
    option("--timeout TIME", "how long to try to connect at first (10)", type=seconds, default=10)])
comfort("sbatch", do_sbatch, "labtasker sbatch --array=0-7 -t 4:00:00 --gpus-per-task=1 --server -- "
        "python train.py --lr '%(lr)'", [
            option("--dry-run", "print the script instead; it can be kept, and submitted by sbatch"),
            option("--server", "the first task of the array runs the server of the configured folder's store, too"),
            option("--listen HOST:PORT", "where that server listens (0.0.0.0:0; port 0 picks one)", type=listening,
                   default=("0.0.0.0", 0)),
            option("--server-wait TIME", "how long the others wait for it, before one of them runs it (2m)",
                   type=duration, default="2m")],
        "[sbatch's and the loop's options] -- COMMAND ...", sort_sbatch)
comfort("server wait", do_server_wait, "labtasker server wait --timeout 10m && labtasker task ls", [
    option("--timeout TIME", "for so long at most (10m)", type=seconds, default=600)])
comfort("completion", do_completion, "labtasker completion bash", [
    choice("SHELL", tuple(SHELLS), dest="shell")], "[-- WORD ...]")
comfort("help filter", lambda options: show(filter_reference()), "labtasker help filter")
comfort("help settings", lambda options: show(settings_reference()), "labtasker help settings")
comfort("help journal", lambda options: show(journal_reference()), "labtasker help journal")
comfort("help api", lambda options: show(api_reference()), "labtasker help api")
