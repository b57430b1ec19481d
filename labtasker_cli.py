# mypy: ignore-errors
# Type checkers check nothing here.  # type: ignore
"""What needs a rich terminal, an editor, a browser or a cluster's submit command; pip's console scripts import it.

labtasker.py alone is the whole tool. Where this file lies beside it, it adds the commands of the table EXTRA_COMMANDS,
the server's page, colours and the pager. `labtasker` and `lt` start `main`, `labtasker-server` starts `server_main`.
Tests: test_cli.py, test_terminal.py, test_page.py, test_slurm.py.
"""
import bisect
import collections
import itertools
import json
import math
import operator
import os
import re
import sys
import threading
import time
import zlib

from labtasker import (
    COMMANDS, CONFIG_NAME, CONTROL, EVERY, EXTRA_COMMANDS, NAMED_FAILURES, NOT_ENDED, REFRESH_S, REQUIRED, ROUTES,
    SELECT,
    SETTINGS, TASK_FIELDS, TASK_STATES, UPDATABLE, Command, Disk, Instant, JobCommand, LabtaskerError,
    LabtaskerHTTPStatusError, LabtaskerRuntimeError, LabtaskerValueError, OddFile, Page, RunOutput, Sweep,
    SyntaxMistake, TaskUpdateRequest, UsageError, order_key, last_seen, alike_lines, as_typed, ask, ask_route,
    attempt_of, brief, cells_wide, change_of, choice, choose_columns, clean, client, compile_query, confirm, duration,
    enter_page, error_of, exact, filter_of, find_root, fitted, flatten, folders_of, for_system, format_time, get_path,
    group, health_check, hint, ids_of, in_order, is_away, is_terminal, joined, lay_out, load_config, ls_tasks,
    ls_workers, main, monotonic, note, now, open_plain, option, pace, pace_of, pairs, parse, parse_filter, progress,
    read_end, read_server_file, read_text, result_or, recent_ends, record_text, row_of, say, screen_size, seconds,
    selectors, sparkline, show, spent_s, store_folder, tail_of, tasks_in_words, typed_filter, typed_value, update_tasks,
    updates_of,
    use_client, visible, METRICS, config_sources, formats, render_table, show_result)

__all__ = ["main", "server_main"]

server_main = main  # `labtasker-server serve` is `labtasker serve`


# ---- The terminal: colours, its size, pages

STATUS_COLOURS = {"pending": "36", "running": "34", "success": "32", "failed": "31", "cancelled": "33",
                  "active": "32", "suspended": "33", "crashed": "31"}


def wants_colour(options):
    """Return whether to colour: --ansi and --no-ansi decide, else a terminal does, and NO_COLOR forbids."""
    if options.ansi is not None:
        return options.ansi
    return is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(cell, padded):
    """Return a padded cell of a table, coloured if it names a status."""
    return "\x1b[%sm%s\x1b[0m" % (STATUS_COLOURS[cell], padded) if cell in STATUS_COLOURS else padded


def page(text):
    """Show a text in $PAGER (else `less -R`); return False if that failed or the text fits the screen."""
    import shlex
    import signal
    import subprocess
    if text.count("\n") + 2 <= screen_size()[1]:  # the last line of the screen is for the prompt
        return False
    command = shlex.split(os.environ.get("PAGER", "less -R"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pager
    try:
        pager = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict({"LESS": "FRX"}, **os.environ))
        pager.communicate((text + "\n").encode("utf-8", "backslashreplace"))
        return True
    except (OSError, IndexError):  # no such pager, or PAGER is empty
        return False
    finally:
        signal.signal(signal.SIGINT, before)


# ---- Logs


def last_log(task):
    """Return the RunOutput of a task's last run, or None if it is not on this host."""
    output = RunOutput(task, (task.attempts or [{}])[-1])
    return output if result_or(output.is_here, False) else None


def last_lines(opener, limit, tail_bytes=65536):
    """Return the last lines of the file that `opener()` opens as a terminal would show them; [] if it can't be read."""
    data, _ = read_end(opener, tail_bytes)
    return [] if data is None else shown_lines(data.decode("utf-8", "replace"), limit)


def shown_lines(text, limit):
    """Return the last lines of a terminal's output as it would show them."""
    lines = [line.rstrip("\r").split("\r")[-1] for line in text.rstrip("\n").split("\n")]  # \r rewrites a line
    return [clean(re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line), "").expandtabs(4) for line in lines[-limit:]]


def is_named(task):
    """Return whether more than an exit code is known of the error of a task's last run."""
    is_raised = isinstance(task.summary.get("labtasker_exception"), dict)
    return is_raised or getattr(task, "failure", None) in NAMED_FAILURES


def last_words(task):
    """Return the last line of the exception of a failed task, else of its log, else of the error in its summary."""
    output = None if is_named(task) else last_log(task)
    lines = [line for line in last_lines(output.open, 20, 4096) if line.strip()] if output else []
    return lines[-1].strip() if lines else clean(error_of(task), "")

# ---- Watching


BOLD, FAINT, INVERSE = "1", "2", "7"
STATES = (None, "running", "failed", "pending", "success", "cancelled")
KEYS = {  # key: (method of Watch, words in the last line)
    "up": ("go_up", ""), "k": ("go_up", ""), "down": ("go_down", ""), "j": ("go_down", "arrows"),
    "enter": ("open_task", "Enter: open"), "l": ("open_log", "l: log"), "c": ("ask_cancel", "c: cancel"),
    "r": ("ask_retry", "r: retry"), "s": ("next_state", "s: status"), "/": ("edit_filter", "/: filter"),
    "esc": ("go_back", ""), "backspace": ("go_back", ""), "q": ("quit", "q: back"),
}
UNWATCHED = ("status", "error", "created_at")  # fields that are no columns: they stand in titles and last lines
CURVE_SIGNS, LEAST_ROOM, MOST_CURVES = 12, 60, 100  # of a curve; columns of a terminal with curves; that are asked for
SAMPLE_ROWS = 100  # so many rows, beside those shown, determine the widths of columns
SECTIONS = (  # status, title, the time by which the tasks are sorted, whether the latest is first
    ("running", "Running", "start_time", False), ("failed", "Failed, the last first", "last_modified", True),
    ("pending", "Pending, the next first", "last_modified", False),
    ("success", "Done, the last first", "last_modified", True),
    ("cancelled", "Cancelled, the last first", "last_modified", True))


def curve_text(numbers):
    """Return numbers as a sparkline and the last of them; "" without any."""
    there = [number for number in numbers if number is not None]
    return "%s %s" % (sparkline(numbers, CURVE_SIGNS), brief(there[-1], 4)) if there else ""


def styled(text, *styles):
    """Return a text with a terminal's codes for colours and other styles."""
    styles = [style for style in styles if style]
    return "\x1b[%sm%s\x1b[0m" % (";".join(styles), text) if styles and not os.environ.get("NO_COLOR") else text


class Feed:
    """Fetches the tasks again and again, in a thread of its own, so that keys are handled at once."""

    def __init__(self, query, interval_s):
        self.sweep, self.interval_s = Sweep(query), interval_s
        self.lock = threading.Lock()  # guards the next line and `sweep`
        self.tasks, self.workers, self.error, self.looks = {}, {}, None, 0
        self.wanted, self.curves = [], (None, {})  # ids of tasks; (a value, {id: its numbers by steps})
        self.wake = threading.Event()
        threading.Thread(target=self._run, name="labtasker watch", daemon=True).start()

    def _run(self):
        while True:
            began, sweep = monotonic(), self.sweep
            self.wake.clear()
            try:
                sweep.refresh()
                workers, error = {worker.worker_id: worker for worker in ls_workers(
                    extra_filter=NOT_ENDED, limit=EVERY).content}, None
                self.curves = curves_of(self.wanted)
            except Exception as problem:  # the next attempt may succeed
                workers, error = self.workers, problem
            with self.lock:
                if sweep is self.sweep:
                    self.tasks, self.workers, self.error, self.looks = sweep.tasks, workers, error, self.looks + 1
            self.wake.wait(max(self.interval_s, 10 * (monotonic() - began)))

    def seen(self):
        """Return (tasks, {id: worker}, error or None, how often they were fetched)."""
        with self.lock:
            return list(self.tasks.values()), self.workers, self.error, self.looks

    def want_curves(self, ids):
        """Fetch the curves of these tasks from now on; at once if there were none before."""
        is_first, self.wanted = bool(ids and not self.wanted), ids
        if is_first:
            self.wake.set()

    def ask(self, query):
        """Fetch other tasks from now on."""
        with self.lock:
            self.sweep, self.tasks = Sweep(query), {}
        self.wake.set()


def curves_of(ids):
    """Return (the value that most of these tasks report by steps or None, {task id: [number]})."""
    if not ids or not client().extensions:
        return None, {}
    try:
        found = ask_route("POST /api/v1/queues/me/tasks/curves", limit=len(ids), points=CURVE_SIGNS * len(ids),
                          extra_filter={"task_id": {"$in": ids}})
    except (LabtaskerHTTPStatusError, ValueError):  # a server without this file
        return None, {}
    return found["value"], {row[0]: row[3] for row in found["rows"] if row[3]}


class View:
    """What a person sees, as lines of text. `line` is the input line at the bottom: (prompt, text, action)."""

    def __init__(self, feed, query, where):
        self.feed, self.query, self.where, self.looks = feed, query, where, None
        self.state, self.page, self.top, self.line, self.words, self.over = None, None, 0, None, "", False
        self.order = []  # ids of the tasks that are shown
        self.chosen = self.current = None  # the task that a person has moved to; that one, or else the first

    def lines(self, width, height):
        """Return `height` lines, or fewer, of at most `width` cells each."""
        tasks, self.workers, error, looks = self.feed.seen()
        if looks != self.looks:
            self._look(tasks, looks)
        head = self._head(looks, width)
        foot = [self.words or ("%s; trying again" % str(error).split("\n")[0] if error else "")]
        if self.line:  # a mistake in it is shown above it
            foot = (self.words.split("\n") if self.words else []) + [self.line[0] + self.line[1] + "_"]
            foot = foot[-max(1, height - len(head) - 2):]
        room = height - len(head) - len(foot) - 1
        body = (self._list if self.page is None else self._task if self.page == "task" else self._log)(width, room)
        body += [""] * (room - len(body))
        keys = "  ".join(words for _, words in KEYS.values() if words)
        return head + body + [styled(fitted(clean(line, ""), width), BOLD) for line in foot] + [
            styled(fitted(keys, width).rstrip(), FAINT)]

    def _look(self, tasks, looks):
        """Sort the tasks that were fetched last. Doing this at every key would be too slow with many tasks."""
        self.tasks, self.looks, self.pace = {task.task_id: task for task in tasks}, looks, pace(tasks, now())
        self.rows = {task.task_id: self._row_of(task) for task in tasks}
        self.layout = choose_columns(list(self.rows.values()))
        self.sample = list(self.rows.values())[::len(tasks) // SAMPLE_ROWS + 1]
        self.sorted = {}
        for status, _, field, is_latest_first in SECTIONS:
            self.sorted[status] = sorted(
                (task for task in tasks if task.status == status),
                key=lambda task: getattr(task, field) or task.created_at, reverse=is_latest_first)
        self.sorted["pending"].sort(key=lambda task: -task.priority)

    def _head(self, looks, width):
        counts_now = self.pace.counts
        title = "%s   %s" % (self.where, self.query.get("extra_filter") or "")
        counts, room = [], width
        for state in TASK_STATES:
            text = "%s %d" % (state, counts_now[state])
            text = fitted(text, min(room, len(text) + 2))
            counts.append(styled(text, STATUS_COLOURS[state]))
            room -= len(text)
        busy = {task.worker_id for task in self.sorted["running"]}
        idle = [worker for worker in self.workers.values() if worker.status != "active"]
        workers = "%d busy" % len(busy) + "".join(
            ", %s %s" % (worker.worker_name or worker.worker_id[:8], worker.status) for worker in idle)
        return [styled(fitted(clean(title, ""), width).rstrip(), BOLD),
                progress(self.pace, width) if looks else "loading ...",
                "".join(counts), fitted("workers: " + clean(workers, ""), width).rstrip(), ""]

    def _sections(self, room):
        """Yield (title, tasks to show) of the sections with tasks: up to three in each, and as many as fit in the first
        ones."""
        shown = [row for row in SECTIONS if self.sorted[row[0]] and self.state in (None, row[0])]
        sizes = {status: 1 + (status == "failed") for status, _, _, _ in shown}
        left = room - sum(1 + min(3, len(self.sorted[status])) * size for status, size in sizes.items())
        for status, title, _, _ in shown:
            tasks = self.sorted[status]
            more = len(tasks) if self.state else max(0, min(len(tasks) - 3, left // sizes[status]))
            left -= more * sizes[status]
            yield "%s: %d" % (title, len(tasks)), tasks[:3 + more]

    def _shown_rows(self, room):
        """Return the rows that fit, with the current task among them: (title, None), (None, task), and below a failed
        task (True, task) for its last line."""
        self.order, rows = [], []
        for title, tasks in self._sections(room):
            rows.append((title, None))
            self.order += [task.task_id for task in tasks]
            for task in tasks:
                rows += [(None, task)] + [(True, task)] * (task.status == "failed")
        self.current = self.chosen if self.chosen in self.order else self.order[0] if self.order else None
        at = next((at for at, (_, task) in enumerate(rows) if task and task.task_id == self.current), 0)
        begin = max(0, min(at - room // 2, len(rows) - room)) if at >= room - 1 else 0
        return rows[begin:begin + room]

    def _list(self, width, room):
        """Return the tasks in sections, below the values that all have in common and the heads of the columns."""
        if not self.tasks:
            return ["No task matches."[:width]]
        above = alike_lines(self.layout, self.layout.columns, width)[:max(0, min(2, room - 5))]
        rows = self._shown_rows(room - len(above) - 1)
        head, columns = self._columns([task for title, task in rows if title is None], width - 2)
        return [styled(line, FAINT) for line in above + [fitted("  " + head, width).rstrip()]] + [
            self._row(title, task, columns, width) for title, task in rows]

    def _columns(self, tasks, room):
        """Return (the line of heads, {task id: line}), aligned, with the columns in which tasks differ."""
        rows = [self.rows[task.task_id] for task in tasks]
        curves = self._curves_of(tasks, room)
        width = max(map(cells_wide, curves), default=-2) + 2
        columns = lay_out(rows + self.sample, self.layout, room - 10 - width)
        table = [["id"] + [task.task_id[:8] for task in tasks]] + [cells[:1 + len(tasks)] for cells in columns.values()]
        table += [curves] if curves else []
        widths = [8] + [max(map(cells_wide, cells)) for cells in table[1:]]
        head, *lines = ["  ".join(map(fitted, line, widths)) for line in zip(*table)]
        return head, {task.task_id: line for task, line in zip(tasks, lines)}

    def _curves_of(self, tasks, room):
        """Return the cells of a column: the name of a value and its curve in each running task; or []."""
        self.feed.want_curves([task.task_id for task in tasks if task.status == "running"][:MOST_CURVES])
        value, curves = self.feed.curves
        shown = [curve_text(curves.get(task.task_id, ())) for task in tasks]
        return [value] + shown if any(shown) and room >= LEAST_ROOM else []

    def _row_of(self, task):
        """Return {field: value} of a task's row, with its worker's name."""
        row, worker = row_of(task), self.workers.get(task.worker_id)
        if worker and worker.worker_name:
            row["worker_id"] = worker.worker_name
        return {field: value for field, value in row.items() if field not in UNWATCHED}

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
        fields = task.to_dict().items() if task else ()
        text = record_text({name: value for name, value in fields if value not in (None, [], {}, "")})
        lines = (text if task else "It is gone.").split("\n")
        self.feed.want_curves([self.chosen])
        value, curves = self.feed.curves
        if self.chosen in curves:
            lines.insert(0, "%s  %s" % (value, curve_text(curves[self.chosen])))
        self.top = max(0, min(self.top, len(lines) - room))
        return [fitted(clean(line, ""), width).rstrip() for line in lines[self.top:self.top + room]]

    def _log(self, width, room):
        task = self.tasks.get(self.chosen)
        output = last_log(task) if task else None
        if output is None:
            return [fitted("There is no log of task %s on this host." % str(self.chosen)[:8], width).rstrip()]
        return [styled(output.path()[-width:], FAINT)] + [
            fitted(line, width).rstrip() for line in last_lines(output.open, room - 1)]


def check_filter(query):
    """Raise LabtaskerError unless a server would accept a filter over tasks, a text or a document."""
    fields = visible(TASK_FIELDS)
    compile_query(parse_filter(query, fields, now()) if isinstance(query, str) else query, fields)


class Watch(View):
    """A View with keys."""

    def press(self, key):
        """Do what a key stands for."""
        if not self.line or key in ("esc", "enter"):
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
        """Move to the task above."""
        self._go(-1)

    def go_down(self):
        """Move to the task below."""
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
        """Close the page that is open; if none is, end."""
        self.over, self.page = self.page is None, None

    def next_state(self):
        """Show only the next status, or all again."""
        self.state, self.page = STATES[(STATES.index(self.state) + 1) % len(STATES)], None

    def edit_filter(self):
        """Let a person type another filter."""
        self.line = "filter: ", str(self.query.get("extra_filter") or ""), self._filter

    def _filter(self, text):
        try:
            query = dict(self.query, extra_filter=typed_filter(text.strip() or None))
            if query["extra_filter"] is not None:
                check_filter(query["extra_filter"] if isinstance(query["extra_filter"], dict) else text)
        except Exception as error:  # whatever was typed, the keys must still work
            self.line = "filter: ", text, self._filter
            self.words = str(error).split("\n")[0]
            if isinstance(error, SyntaxMistake):  # a mark above the text shows where it is
                self.words += "\n" + " " * (len(self.line[0]) + error.column) + "v"
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
    """Yield the keys in a terminal's decoded input; unknown escape sequences are ignored."""
    for match in re.finditer("\x1b([\\[O][0-9;]*[A-Za-z~])|\x1b|.", text, re.S):
        if match.group(1):
            if match.group(1) in ESCAPES:
                yield ESCAPES[match.group(1)]
        else:
            yield "esc" if match.group() == "\x1b" else CONTROLS.get(match.group(), match.group())


class Screen:
    """A terminal in full-screen mode. It is a context manager, which restores the terminal whatever happens."""

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
        """Show lines, unless they are shown already."""
        if lines != self.shown:
            self.shown = lines
            self._write("\x1b[H" + "\r\n".join(line + "\x1b[K" for line in lines) + "\x1b[J")

    def keys(self, timeout_s):
        """Return the keys pressed within `timeout_s`; raises EOFError if the terminal is gone."""
        import select
        if not select.select([0], [], [], timeout_s)[0]:
            return []
        data = os.read(0, 1024)
        if not data:
            raise EOFError
        return list(keys_of(self.decoder.decode(data)))


def do_watch(options):
    query, where = selectors(options), "%s at %s" % (load_config().queue_name, client().where)
    if options.once or not all(map(is_terminal, (sys.stdin, sys.stdout))):
        return say("\n".join(picture(query, where, screen_size()[0] if is_terminal(sys.stdout) else 100)))
    if os.environ.get("TERM", "dumb") == "dumb":
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


class Look:
    """What a Feed has after fetching once; raises as `ls_tasks` does."""

    def __init__(self, query):
        sweep = Sweep(query)
        sweep.refresh()
        self.tasks = list(sweep.tasks.values())
        workers = ls_workers(extra_filter=NOT_ENDED, limit=EVERY).content
        self.workers = {worker.worker_id: worker for worker in workers}

    def seen(self):
        return self.tasks, self.workers, None, 1

    def want_curves(self, ids):
        """Fetch the curves of these tasks."""
        self.curves = curves_of(ids)


def picture(query, where, width, height=40):
    """Return the lines that `watch` shows at first on a terminal of that size, without the line of keys."""
    lines = View(Look(query), query, where).lines(width, height)[:-2]
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in lines]
    while not lines[-1]:
        lines.pop()
    return ["  " + line[2:] if line.startswith("> ") else line for line in lines]


def watch_plainly(sweep, interval_s):
    """Print a line whenever the counts change, and one for each task that has failed since; never returns."""
    last, failed = None, None
    while True:
        began = monotonic()
        sweep.refresh()
        now_is = pace(sweep.tasks.values(), now())
        if now_is.counts != last:
            say(format_time(now())[:19] + "  " + (progress(now_is, 100) if sweep.tasks else "no task matches"))
        for task in sweep.tasks.values():
            if task.status == "failed" and failed is not None and task.task_id not in failed:
                say(clean("    failed: %s  %s  %s" % (task.task_id[:8], pairs(task.args), last_words(task)), ""))
        last, failed = now_is.counts, {task.task_id for task in sweep.tasks.values() if task.status == "failed"}
        sys.stdout.flush()
        time.sleep(max(interval_s, 10 * (monotonic() - began)))


# ---- Editing


class Mistakes(Exception):
    """The mistakes in an edited text: {line number from 1 on, or 0 for the whole text: message}."""


MARK = "#! "  # begins a line that describes a mistake in the line above


def edited(text, name, read):
    """Let a person edit a text; return read(the edited text), or None if nothing was changed.

    `read` may raise Mistakes. They are written below their lines, and the editor opens again if the person wants it."""
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
            content = read_text(path).replace("\r\n", "\n")
            if content == marked or without_marks(content) == text:
                return None
            try:
                return read(without_marks(content))
            except Mistakes as error:
                mistakes = error.args[0]
            for number, words in sorted(mistakes.items()):
                note("line %d: %s" % (number, words) if number else words)
            if not is_terminal(sys.stdin):
                raise LabtaskerRuntimeError("the edited %s has mistakes: nothing was changed" % name)
            if ask("Edit it again? [Y/n]", "", default="y").lower() not in ("y", "yes"):
                return None
            marked = with_marks(without_marks(content), mistakes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_marks(text, mistakes):
    """Return a text with each mistake below its line."""
    lines = [""] + text.split("\n")
    for number, words in sorted(mistakes.items(), reverse=True):
        lines[number + 1:number + 1] = [MARK + line for line in str(words).split("\n")]
    return "\n".join(lines[1:])


def without_marks(text):
    """Return a text without the lines that `with_marks` has added."""
    return "\n".join(line for line in text.split("\n") if not line.startswith(MARK))


def do_config(options):
    if options.show:
        return show_config(options)
    if not is_terminal(sys.stdin):
        raise UsageError("config opens an editor, and no terminal is here: labtasker config --show prints the "
                         "settings; labtasker init --url URL --queue-name NAME writes them")
    path = os.path.join(find_root(), CONFIG_NAME)
    if not os.path.exists(path):
        raise LabtaskerValueError("there is no %s: labtasker init writes it" % path)
    text = edited(read_text(path).replace("\r\n", "\n"), CONFIG_NAME, checked_config)
    if text is None:
        note("Nothing was changed.")
        return 1
    Disk.create(path, [text.encode("utf-8")], keep=0o770)
    say("Wrote %s" % path)


def show_config(options):
    """Print the current settings and where each comes from, without the password."""
    config, sources = load_config(), config_sources()
    values = {key: getattr(config, row[0]) for key, row in SETTINGS.items()}
    values.update((METRICS + "." + name, text) for name, text in (config.metrics or {}).items())
    values["queue.password"] = config.password and "***"
    from_root = "LABTASKER_ROOT" if os.environ.get("LABTASKER_ROOT") else (
        "the nearest .labtasker from here upward" if os.path.isdir(config.root) else "default: the first task makes it")
    rows = [("folder", config.root, from_root)] + [
        (key, value, sources.get(key) or "default") for key, value in values.items()]
    cells = [(key, "-" if value is None else str(value), source) for key, value, source in rows]
    show_result(options, {key: {"value": value, "from": source} for key, value, source in rows},
                render_table([("setting", "value", "from")] + cells))


def checked_config(text):
    """Return the text of a configuration if it is valid; raises Mistakes."""
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
    made = []

    def save(text):
        updates = read_form(text, tasks)
        try:
            update_tasks(updates, reset_pending=options.reset_pending)
        except LabtaskerHTTPStatusError as error:  # a transition that is not allowed, a task that is gone
            raise Mistakes({0: str(error)}) from None
        made.extend(updates)
        return True
    if not edited(form_of(tasks), "tasks.txt", save):
        note("Nothing was changed.")
        return 0
    if not options.quiet:
        say("Updated %s" % tasks_in_words(made) if made else "Nothing was changed.")


def form_of(tasks):
    """Return tasks as text for an editor: a block for each, read-only fields as comments, a line for each value."""
    lines = [FORM_HEAD % tasks_in_words(tasks)]
    for task in tasks:
        row = task.to_dict()
        lines.append("task " + task.task_id)
        lines += ["# %s: %s" % (name, json.dumps(value)) for name, value in row.items()
                  if name not in UPDATABLE and name != "task_id" and value not in (None, [])]
        lines += ["%s = %s" % pair for pair in values_of(row).items()] + [""]
    return "\n".join(lines)


def values_of(row):
    """Return {dotted field: text as `task update -u` takes it} of the values of a task, a dict, that can be edited."""
    texts = {}
    for name in (name for name in UPDATABLE if name in row):  # tasks of a 1.0.1 server lack some fields
        if name in ("task_name", "status") and row[name] is not None:
            texts[name] = row[name]
        elif TASK_FIELDS[name].kind == "dict" and row[name]:
            texts.update((name + "." + key, form_text(value)) for key, value in flatten(row[name]))
        elif TASK_FIELDS[name].kind != "dict":
            texts[name] = form_text(row[name])
    return texts


def form_text(value):
    """Return a value as JSON on one line; all characters that an editor could take for a line end are escaped."""
    return CONTROL.sub(lambda match: "\\u%04x" % ord(match.group()), json.dumps(value, ensure_ascii=False))


def read_form(text, tasks):
    """Return the TaskUpdateRequests for an edited form; raises Mistakes."""
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
    """Return the TaskUpdateRequest for what was changed in a block of a form, or None; adds to `mistakes`."""
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
    if mistakes:  # nothing will be changed
        return None
    try:
        for name in gone:  # a field of which a line was deleted is replaced as a whole
            left = {field: text for field, (_, text) in block.items() if field.startswith(name + ".")}
            updates = {field: value for field, value in updates.items() if field not in left}
            updates[name] = joined({field.partition(".")[2]: typed_value(text, field)
                                    for field, text in left.items()}, {})
        return change_of(task, updates) if updates else None
    except LabtaskerError as error:
        mistakes[first] = str(error)


def run_editor(path):
    """Run $VISUAL, $EDITOR or vi until it is closed; raises LabtaskerRuntimeError if it fails."""
    import shlex
    import subprocess
    chosen = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not (chosen or is_terminal(sys.stdin)):
        raise UsageError("there is no terminal for an editor: set $EDITOR to a command that needs none")
    command = shlex.split(chosen or "vi") + [path]
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
    before, word = [part for part in typed[:-1] if part != "="], typed[-1]  # for bash a = is a word of its own
    words = completions(before, "" if word == "=" else word)
    if words:
        say(clean("\n".join(words)))


def completions(before, word):
    """Return the words that `word`, typed after the words `before`, can be completed to."""
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
        return [begin + value for value in starting(values_for(path, flags[last][1], word), word)]
    if word.startswith("-"):
        return starting(["--help"] + [flag for flag in flags if flag.startswith("--")] + ["--"] * bool(row.rest), word)
    places = [settings for names, settings in row.options if not names[0].startswith("-")]
    return starting([value for settings in places for value in values_for(path, settings, word)], word)


def starting(words, begin):
    """Return the words that start with `begin`."""
    return [word for word in words if word.startswith(begin)]


def values_for(path, settings, word):
    """Return possible values of an option: its choices, or fields, ids and names that exist."""
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
    except LabtaskerError:  # the server is away: there is nothing to offer
        return []


def field_values(name, word):
    """Return the fields that are possible there, also the nested ones in args, metadata and summary of tasks."""
    head, comma, _ = word.rpartition(",") if name.endswith("...") else ("", "", "")
    tops = UPDATABLE if "=" in name else list(visible(TASK_FIELDS))
    deep = dict.fromkeys("%s.%s" % (top, key) for task in ls_tasks(limit=100).content
                         for top in ("args", "metadata", "summary") for key, _ in flatten(getattr(task, top)))
    return [head + comma + field + ("=" if "=" in name else "") for field in tops + list(deep)]


# ---- Slurm: a job of loops
#
# An option is this command's, the loop's or sbatch's. The script has the loop's options and the job's command as they
# were typed, and sbatch's options on #SBATCH lines.

NOT_OF_LOOP = ("-c", "-q", "--quiet")  # these are sbatch's: CPUs, --qos, and its own output
SBATCH_SWITCHES = frozenset(  # sbatch's options that take no value, or one after = alone
    "-H --hold -k --no-kill -O --overcommit -Q --quiet -s --oversubscribe --share -V --version -W --wait --contiguous "
    "--exclusive --get-user-env --ignore-pbs --nice --no-requeue --parsable --propagate --reboot --requeue "
    "--spread-job --test-only --usage --use-min-nodes --x11".split())
SBATCH_ONCE = frozenset(  # these are about one submission: they are given to sbatch and not in the script
    "-b --begin -d --dependency -H --hold -Q --quiet -W --wait --parsable --test-only".split())
SBATCH_PARALLEL = frozenset(  # with more than 1 srun starts a loop for each Slurm task
    "-n --ntasks -N --nodes --ntasks-per-node --ntasks-per-socket --ntasks-per-core --ntasks-per-gpu".split())

JobScript = collections.namedtuple("JobScript", "lines once signal srun array")
# lines: of #SBATCH; once: words for sbatch; signal: the name in --signal, or None; srun: its words or []


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
        if name == "--gpus" and value != "all":  # a number of GPUs, of which Slurm decides which ones
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
    """Return the JobScript for sbatch's options [(name, value)]; raises UsageError."""
    names = dict(given)
    if "--wrap" in names:
        raise UsageError("sbatch: instead of --wrap the command goes after --")
    if "\\" in os.getcwd() and not {"-o", "--output"} & set(names):
        raise UsageError("sbatch: Slurm can't keep a log in %s, because of the backslash: say where with --output=FILE"
                         % os.getcwd())
    array = bool({"-a", "--array"} & set(names))
    srun = ["srun"] if any(name in SBATCH_PARALLEL and value != "1" for name, value in given) else []
    cpus = names.get("--cpus-per-task", names.get("-c"))
    srun += ["--cpus-per-task=" + cpus] if srun and cpus else []  # srun does not inherit this from sbatch
    signal = names.get("--signal")
    if signal and not srun and ":" not in signal:  # without B: the signal would not reach the loop
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
    """Return the --output of a job in a folder. A % in the folder's name is doubled, as Slurm would interpret it."""
    name = "labtasker-%s.log" % ("%A_%a" if array else "%j")
    return os.path.join(folder.replace("%", "%%"), name) if "%" in folder else name


def sbatch_words(name, value):
    """Return an option as words for sbatch: --mem=4G; -p gpu; --hold."""
    return [name] if value is None else ["%s=%s" % (name, value)] if name.startswith("--") else [name, value]


def quoted_for_sbatch(value):
    """Return a value for a #SBATCH line, where a backslash is special also within quotes; raises UsageError."""
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
        note("labtasker: options that are not in the script: sbatch " + as_typed(job.once))


def check_loop(options):
    """Raise the errors that the job's loops would raise for their options and command."""
    loop = parse("loop", options.loop + (["--"] + options.rest if options.rest else []))
    if not (loop.rest or loop.shell or loop.script_path):
        raise UsageError("sbatch: what should the loops run? " + COMMANDS["sbatch"].example.split("\n")[0])
    JobCommand(loop.rest, loop.shell, loop.script_path, loop.executable)
    query = filter_of(loop)
    if isinstance(query, str):
        parse_filter(query, visible(TASK_FIELDS), now())


def script_text(job, options, config):
    """Return the script. It never has a password."""
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

# The first task also runs the server, which writes its address into the folder above, where all others find it. If no
# server appears (the first task has ended, or has not begun), a waiting task starts one. The store refuses a second.
serve() {{
    "${{labtasker[@]}}" serve --host {host} --port {port} &
    server=$!
}}
if [ "${{SLURM_ARRAY_TASK_ID-}}" = "${{SLURM_ARRAY_TASK_MIN-}}" ]; then serve; fi
"${{labtasker[@]}}" server wait --timeout {wait} || serve
"${{labtasker[@]}}" server wait --timeout {wait} > /dev/null || exit
kill -0 "${{server-none}}" 2> /dev/null || exec "${{loop[@]}}"

# The loop beside the server. SIGTERM reaches all processes. The server stays as long as any task runs. The second round
# is for tasks that were handed back meanwhile.
trap 'stopped=yes' TERM
{pass_on}for _ in 1 2; do
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
trap 'stopped=yes; kill -{0} "$pid" 2> /dev/null' {0}  # the signal of --signal reaches only this shell
"""
UNNEEDED = """\
if [ "$("${labtasker[@]}" task count --quiet --status pending)" = 0 ]; then
    scancel --quiet --state=PENDING "$SLURM_ARRAY_JOB_ID"  # array tasks that have not begun have nothing to do
fi
while kill -0 "$server" 2> /dev/null &&
    [ "$(squeue --noheader --array --states=RUNNING --jobs="$SLURM_ARRAY_JOB_ID" | wc -l)" -gt 1 ]; do
    sleep 1  # array tasks that have begun still need the server, to learn that nothing is left
done
"""


# sbatch passes its environment on to the job that it submits, and srun in that job takes SLURM_* for options. So the
# variables that this process has as part of a job, Slurm's or a loop's, are not passed on. By Slurm's manuals sbatch,
# salloc and srun set all of SLURM_* for what they run, except those below, which only the cluster or a person sets. Of
# SBATCH_*, a person's options for sbatch, Slurm sets those about binding. A loop's own jobs keep all of these
# variables: they are in the loop's allocation, which srun finds by them.
OF_CLUSTER = frozenset(
    "SLURM_CONF SLURM_CLUSTERS SLURM_JWT SLURM_TIME_FORMAT SLURM_DEBUG_FLAGS SLURM_EXIT_ERROR SLURM_EXIT_IMMEDIATE "
    "SLURM_MPI_TYPE SLURM_STEP_KILLED_MSG_NODE_ID SLURM_UNBUFFEREDIO SLURM_THREADS SLURM_WAIT SLURM_BITSTR_LEN".split())
OF_LOOP = frozenset("LABTASKER_" + name for name in (
    "TASK_ID RUN_ID WORKER_ID LOG_DIR TASK_DIR END_TIME SLOT ATTEMPT PROCID".split()))


def of_a_job(name):
    """Return whether a variable describes the job that this process is part of."""
    if name.startswith(("SLURM_", "SLURMD_")):
        return name not in OF_CLUSTER and not name.startswith("SLURM_SACK_")
    return name in OF_LOOP or name == "SRUN_DEBUG" or name.startswith(("SBATCH_CPU_BIND", "SBATCH_MEM_BIND"))


def submit_script(text, words):
    """Submit a script and print the job's id; return sbatch's exit code. sbatch prints its errors itself. Raises
    LabtaskerRuntimeError if there is no sbatch."""
    import subprocess
    try:
        process = subprocess.Popen(["sbatch", "--parsable"] + words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env={name: value for name, value in os.environ.items() if not of_a_job(name)})
    except FileNotFoundError:
        raise LabtaskerRuntimeError("there is no sbatch on this host's PATH: run this where jobs are submitted, or "
                                    "print the script with --dry-run and submit it there")
    try:
        with process.stdin:
            process.stdin.write(text.encode())
    except BrokenPipeError:  # sbatch has ended, after printing why
        pass
    with process.stdout:
        for line in process.stdout:  # the id is printed at once, even if --wait makes sbatch stay
            say(line.decode("utf-8", "replace").rstrip("\n"))
            sys.stdout.flush()
    return process.wait()


def listening(text):
    """Return (host, port) of HOST:PORT; the type of such an option."""
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


SERVER_LOOK_S = 1.0  # between attempts to reach a server


def living_server():
    """Return the URL of the configured server, or of the one that the configured folder names; None if it does not
    answer. The store itself is not touched."""
    use_client(None)
    try:
        where = client().where
        return where if re.match("https?://", where) and health_check().status == "healthy" else None
    except LabtaskerError as error:
        if not is_away(error):
            raise


# ---- References, printed from the tables


def api_reference():
    """Return the reference of the REST API: each route with its fields."""
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


# ---- The skill for coding agents


def do_help_skill(options):
    show(SKILL[skill_page(options.page)].rstrip("\n"))


def skill_page(name):
    """Return the skill's page for a name such as `references/python.md`, `python.md` or `python`; SKILL.md for None."""
    pages = {re.sub(r".*/|\.md\Z", "", path).lower(): path for path in SKILL}
    word = re.sub(r".*/|\.md\Z", "", name or "skill").lower()
    if word not in pages:
        raise UsageError("the skill has no page %s%s (there are %s)" % (
            brief(name), hint(word, pages), ", ".join(sorted(pages))))
    return pages[word]


def do_skill_install(options):
    folder = os.path.join(os.path.abspath(skills_folder(options)), "labtasker")
    try:
        texts = {name: skill_text(os.path.join(folder, name)) for name in SKILL}
        others = [name for name in SKILL if texts[name] not in (None, SKILL[name])]
        if others:
            confirm("%s has another text already, of another version or somebody's own. Replace it?" % " and ".join(
                os.path.join(folder, name) for name in others),
                "--yes to replace it, or --dest DIR to write elsewhere", options.yes)
        written = [name for name in SKILL if texts[name] != SKILL[name]]
        for name in sorted(written, key="SKILL.md".__eq__):  # SKILL.md last: it names the others
            write_skill(os.path.join(folder, name), SKILL[name])
    except (OSError, OddFile) as error:
        raise LabtaskerRuntimeError("the skill can't be written to %s: %s. --dest DIR writes it elsewhere" % (
            folder, getattr(error, "strerror", None) or error)) from None
    say("%s: %s" % (folder, "wrote " + ", ".join(written) if written else "the skill of this version is there already"))


def skills_folder(options):
    """Return the folder of skills: --dest, that of --global, or the one here; raises UsageError, or LabtaskerValueError
    if there is no home folder."""
    if options.dest is not None and options.is_global:
        raise UsageError("--dest says where, and so does --global: give one of them")
    if options.dest is not None:
        if not options.dest.strip():
            raise UsageError("--dest takes a folder")
        return os.path.expanduser(options.dest)
    home = os.path.expanduser("~") if options.is_global else "."
    if options.is_global and not (os.environ.get("HOME", home) and os.path.isabs(home) and os.path.isdir(home)):
        raise LabtaskerValueError("there is no home folder %s: set HOME, or say where with --dest DIR" % brief(home))
    return os.path.join(home, ".claude", "skills")


def skill_text(path):
    """Return the text of a file, or None if there is none; raises OddFile if it is no plain file."""
    try:
        with open_plain(path) as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except FileNotFoundError:
        return None


def write_skill(path, text):
    """Write a file completely or not at all. The umask decides who may read a new one."""
    is_new = not os.path.exists(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Disk.create(path, [text.encode("utf-8")], keep=0o777)
    if is_new:
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(path, 0o666 & ~mask)


# ---- The page: what the server answers a browser

SAMPLE, MOST_PATHS = 300, 400  # tasks that are examined to find out which fields there are; fields that are sent
MOST_ALIKE = 60  # at most so many fields are listed as the same in all tasks
MOST_CHOSEN_OF = 100  # tasks, beside those shown, that are examined to choose the columns
MOST_LEVELS, LEAST_ALIKE = 6, 20  # values that colours tell apart; tasks a value of the horizontal field that has more
MOST_EXPLAINING, LEAST_SHARE = 40, 0.5  # fields that may explain a result's spread; how much one has to explain of it
CELL, MOST_ROWS, MOST_COLUMNS = 300, 20000, 200  # characters of a cell; rows, columns of a view
LEAST_POINTS, MOST_POINTS = 20, 1000  # of each curve, however many are shown

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; " \
         "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page_of(kind, text):
    """Return the Page of a text that never changes while the server runs."""
    body = text.encode()
    return Page("Content-Type: %s; charset=utf-8\r\nCache-Control: no-cache\r\nETag: \"%08x-%x\"\r\n"
                "Content-Security-Policy: %s\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
                "Cross-Origin-Opener-Policy: same-origin\r\nCross-Origin-Resource-Policy: same-origin\r\n" % (
                    kind, zlib.crc32(body), len(body), POLICY), body, "\"%08x-%x\"" % (zlib.crc32(body), len(body)))


def page_html(store, caller, request):
    """Return the page's HTML."""
    return page_of("text/html", PAGE_HTML)


def page_css(store, caller, request):
    """Return the page's style sheet."""
    return page_of("text/css", PAGE_CSS)


def page_js(store, caller, request):
    """Return the page's script."""
    return page_of("text/javascript", PAGE_JS)


def view_tasks(store, caller, request):
    """Return columns of the tasks that match: {rows: [[task id, status, cell...]], counts: {status: number}, queue:
    {counts, paused}, pace: {per_s, eta_s}, fields: {dotted path: whether of numbers}, found: number}.

    A cell is null, true, false, a number or text of bounded length. `counts` and `pace` are of the tasks that the
    filter matches, whatever their status. With `spread` the rows are a sample of the tasks with values in the first
    two columns. With `choose` there is {chosen: {columns, telling, same, letters}} as `chosen_of` returns it, for the
    rows and others; with both, `chosen` has what `explaining` returns for these two columns as `explains`."""
    return store.transact(lambda store, queue, request, at: (
        [], lambda records=list(queue.tasks.values()): viewed(store, queue.record, records, request, at)),
        caller, request, False)


def viewed(store, of_queue, records, request, at):
    """Return the answer of `view_tasks` for a queue's record and its tasks' records, in the order of their last change.
    It is called outside the lock."""
    chosen, overview = matched(store, of_queue, records, request, at)
    names = request["columns"] or []
    if request["spread"]:
        both = [value_of(name) for name in names[:2]]
        chosen = [record for record in chosen if all(get(record) is not None for get in both)]
    getters, shown = [column_of(name, store) for name in names], rows_of(store, chosen, request)
    answer = dict(overview, found=len(chosen),
                  rows=[[record.task_id, record.status] + [get(record) for get in getters] for record in shown])
    if request["choose"]:
        others = chosen[::len(chosen) // MOST_CHOSEN_OF + 1]
        looked_at = {record.task_id: record for record in shown + others}
        answer["chosen"] = chosen_of(store, looked_at.values(), request["sort"] or ())
        if request["spread"] and names[1:]:
            others = [name for name in answer["chosen"]["telling"] if name.startswith("args.")]
            across, results, *values = ([value_of(name)(record) for record in shown]
                                        for name in names[:2] + others[:MOST_EXPLAINING])
            answer["chosen"]["explains"] = explaining(across, results, {
                name: some for name, some in zip(others, values) if name not in names[:2]})
    return answer


def matched(store, of_queue, records, request, at):
    """Return (the records that match filter and status, the part of the answer that all views have); raises
    LabtaskerValueError for too many columns."""
    chosen, fields = records, fields_of(records)
    counts = everything = collections.Counter(record.status for record in records)
    if request["extra_filter"] is not None:
        seen = (last_seen(store, record) if record.status == "running" else record for record in records)
        chosen = list(filter(request["predicate"], seen))
        counts = collections.Counter(record.status for record in chosen)
        fields = dict(fields_of(chosen), **fields)  # fields of the matching tasks come first
    pace = pace_of(counts, *recent_ends(chosen, at))
    if request["status"]:
        chosen = [record for record in chosen if record.status == request["status"]]
    if len(request["columns"] or ()) > MOST_COLUMNS:
        raise LabtaskerValueError("%d columns: at most %d are shown" % (len(request["columns"]), MOST_COLUMNS))
    return chosen, {"counts": counts, "fields": fields, "at": at, "pace": {"per_s": pace.per_s, "eta_s": pace.eta_s},
                    "queue": {"counts": everything, "paused": of_queue.paused_at is not None}}


def view_curves(store, caller, request):
    """Return the curves of the tasks that match: {rows: [[task id, status, cell..., [step], [value]]], names: [name of
    a value], value: the one that is shown, found: how many tasks have it, until: a time} and what all views have.

    If more than `limit` tasks have the value, the answer is a sample, always the same, and with `best` the best tasks.
    The curves share the number of `points`. `since` is an earlier `until`: the steps and values of a task that has not
    changed since then are null."""
    def decide(store, queue, request, at):
        records = list(queue.tasks.values())
        return [], lambda: curves_viewed(store, queue.record, records, request, at)
    return store.transact(decide, caller, request, False)


def curves_viewed(store, of_queue, records, request, at):
    """Return the answer of `view_curves` for a queue's record and its tasks' records; called outside the lock."""
    chosen, overview = matched(store, of_queue, records, request, at)
    chosen = [record for record in chosen if record.curve and record.curve.points]
    names = names_of_curves(chosen)
    value = request["value"] or next(iter(names), None)
    path = value.split(".") if value else []
    chosen = [record for record in chosen
              if value and any(path[0] in point[2] for point in reversed(record.curve.points))]
    getters = [column_of(name, store) for name in request["columns"] or ()]
    shown = sampled_curves(chosen, path, request)
    most, since = min(MOST_POINTS, max(LEAST_POINTS, request["points"] // max(1, len(shown)))), request["since"]
    return dict(overview, names=names, value=value, found=len(chosen), until=float(at), rows=[
        [record.task_id, record.status] + [get(record) for get in getters]
        + ([None, None] if since is not None and record.last_modified < since
           else series_of(record.curve, path, most)) for record in shown])


def keys_of_curve(curve):
    """Return the set of the keys that a curve's points have."""
    return {point[2] for point in curve.points}


def names_of_curves(records):
    """Return the dotted names of the numbers in points: those that rules stop by come first, then the most common."""
    uses, stopping = collections.Counter(), collections.Counter()
    for record in records[::len(records) // SAMPLE + 1]:
        for keys in keys_of_curve(record.curve):
            point = next(point for point in record.curve.points if point[2] is keys or point[2] == keys)
            for name, value in flatten(dict(zip(keys, point[3:]))):
                uses[name] += type(value) in (int, float)
        rule = (getattr(record, "stop", None) or "").split(":")
        stopping.update(rule[1:2])
    names = sorted((name for name in uses if uses[name]), key=lambda name: (-stopping[name], -uses[name]))
    return names[:MOST_PATHS]


def sampled_curves(records, path, request):
    """Return the records whose curves are shown: all, or a sample with the best among them."""
    import heapq
    limit, mode = min(request["limit"], MOST_ROWS), request["best"]
    if len(records) <= limit:
        return records

    def key(record):
        value = get_path(record.summary, path)
        return (value if mode == "min" else -value) if type(value) in (int, float) and value == value else float("inf")
    best = heapq.nsmallest(limit // 10, records, key) if mode else []
    best_ids = {record.task_id for record in best}
    sample = heapq.nsmallest(limit, records, lambda record: zlib.crc32(record.task_id.encode()))
    return (best + [record for record in sample if record.task_id not in best_ids])[:limit]


def series_of(curve, path, most):
    """Return [[step], [value]] of one value of a curve, sorted by steps: at most about `most` of its points, with the
    newest among them. A value that is no finite number is null."""
    top, rest = path[0], path[1:]
    points = [point for point in curve.points if top in point[2]]
    points = points[::-(-(-len(points) // most) or 1)][::-1]
    if any(one[0] > other[0] for one, other in zip(points, points[1:])):
        points.sort(key=operator.itemgetter(0))
    values = [get_path(point[3 + point[2].index(top)], rest) for point in points]
    return [[point[0] for point in points], [
        value if type(value) in (int, float) and value - value == 0 else None for value in values]]


def chosen_of(store, records, sort):
    """Return the columns that `choose_columns` chooses, as for `task ls`: {columns, telling: [field], same: {field:
    cell}, letters: {field: length of its longest cell}}."""
    kept, rows = [field for field, _ in sort if field not in ("task_id", "created_at")], []
    for record in records:
        row = row_of(record, MOST_PATHS)
        if "error" in row:
            row["error"] = failure_of(store, record)
        for field in kept:
            value = value_of(field)(record)
            if value is not None and not isinstance(value, dict):
                row.setdefault(field, value)
        rows.append({field: value[:CELL] + [len(value)] if isinstance(value, list) and len(value) > CELL else value
                     for field, value in row.items()})
    chosen = choose_columns(rows, kept)
    telling = [field for field in chosen.telling if len(field) <= CELL][:MOST_COLUMNS]
    same = [(field, cell(value)) for field, value in chosen.same.items() if len(field) <= CELL]
    return {"columns": [field for field in chosen.columns if field in telling], "telling": telling,
            "same": dict(same[:MOST_ALIKE]), "letters": {
                field: min(CELL, max(letters_of(row[field]) for row in rows if field in row))
                for field in telling if field.startswith(("args.", "summary.", "metadata."))}}


def explaining(across, results, fields):
    """Return [field, share] of the field that explains most of the results' spread; None if none explains LEAST_SHARE.

    `fields` is {field: values}; `across` has the values against which the results are drawn. Tasks that are alike in
    `across` are compared: the share is the part of the variance among them that is gone where they are alike in the
    field too. Variances are by degrees of freedom, so that a field that differs in all tasks explains nothing. Of
    fields that explain as much, the first wins."""
    kept = [at for at, value in enumerate(results) if type(value) in (int, float) and value - value == 0]
    drawn = levels_of([across[at] for at in kept], max(MOST_LEVELS, len(kept) // LEAST_ALIKE))
    numbers = [results[at] for at in kept]
    before, best = drawn and variance_within(drawn, numbers), None
    for field, values in fields.items() if before else ():
        levels = levels_of([values[at] for at in kept])
        after = levels and variance_within(list(zip(drawn, levels)), numbers)
        share = math.floor(100 * (1 - after / before)) / 100 if after is not None else 0
        if share >= LEAST_SHARE and (best is None or share > best[1]):
            best = [field, share]
    return best


def levels_of(values, most=MOST_LEVELS):
    """Return a level for each value: the value itself where there are at most so many, else of numbers one of
    MOST_LEVELS ranges with as many tasks each; None where texts differ in more ways."""
    numbers = sorted(value for value in values if type(value) in (int, float, Instant) and value == value)
    different = set(map(exact, values))
    if len(different) <= most:
        return list(map(exact, values))
    if not numbers or len(different) > len(set(map(exact, numbers))) + 1:
        return None
    bounds = sorted({numbers[len(numbers) * part // MOST_LEVELS] for part in range(1, MOST_LEVELS)})
    return [bisect.bisect_right(bounds, value) if type(value) in (int, float, Instant) and value == value else -1
            for value in values]


def variance_within(groups, numbers):
    """Return the variance of numbers within their groups; None with fewer than two numbers to a group."""
    by_group = collections.defaultdict(list)
    for one, number in zip(groups, numbers):
        by_group[one].append(number)
    if len(numbers) < 2 * len(by_group):
        return None
    means = {one: math.fsum(some) / len(some) for one, some in by_group.items()}
    squares = math.fsum((number - means[one]) ** 2 for one, number in zip(groups, numbers))
    return squares / (len(numbers) - len(by_group))


def rows_of(store, records, request):
    """Return the records to show: a page of them in the requested order, or a sample, always the same."""
    offset, limit = request["offset"], min(request["limit"], MOST_ROWS)
    if request["spread"]:  # not every k-th record, as the args of a sweep repeat at regular distances
        import heapq
        shown = heapq.nsmallest(limit, records, lambda record: zlib.crc32(record.task_id.encode()))
    elif not request["sort"]:
        shown = records[::-1][offset:offset + limit]
    else:
        shown = sorted_page(records, request["sort"], offset, limit)
    return [last_seen(store, record) if record.status == "running" else record for record in shown]


def sorted_page(records, sort, offset, limit):
    """Return a page of the records sorted by a field, up or down; records without a value, or with NaN, come last."""
    (field, direction), = sort[:1]
    get, end, is_last = value_of(field), offset + limit, direction > 0

    def key(record):
        value = get(record)
        return (value is None or value != value) == is_last, order_key(value), record.created_at, record.task_id
    if end > MOST_ROWS // 10:  # then sorting all of them is faster
        return in_order(records, key, direction < 0)[offset:end]
    import heapq
    first = heapq.nsmallest(end, records, key) if direction > 0 else heapq.nlargest(end, reversed(records), key)
    return first[offset:end]


def value_of(field):
    """Return a function that returns a column's value of a record; raises LabtaskerValueError for an unknown column."""
    if field in MADE_UP:
        return MADE_UP[field]
    top, *path = field.split(".")
    if top not in visible(TASK_FIELDS):
        raise LabtaskerValueError("there is no column %s: fields of tasks are %s; made up are %s" % (
            brief(field), ", ".join(visible(TASK_FIELDS)), ", ".join(MADE_UP)))
    get = operator.attrgetter(top)
    return (lambda record: get_path(get(record), path)) if path else get


def letters_of(value):
    """Return about how many characters the page shows of a value; never too few."""
    return len(value if isinstance(value, str) else brief(value, 5))


def column_of(field, store):
    """Return a function that returns a column's cell for a record."""
    get = (lambda record: failure_of(store, record)) if field == "error" else value_of(field)
    return lambda record: cell(get(record))


def failure_of(store, record):
    """Return the last line of the exception of a record's last run, else of its output, else of its error; None without
    an error."""
    error = error_of(record) or None
    if not error or is_named(record):
        return error
    key = (store.folder, record.task_id, record.run_id)
    if key not in LAST_WORDS and record.run_id:
        data, _ = tail_of(store, record.task_id, record.run_id, attempt_of(record, record.run_id), 4096)
        text = (data or b"").decode("utf-8", "replace")
        lines = [line.strip() for line in shown_lines(text, 20) if line.strip()]
        if not lines:
            return error
        if len(LAST_WORDS) >= MOST_ROWS:
            LAST_WORDS.clear()
        LAST_WORDS[key] = lines[-1]
    return LAST_WORDS.get(key, error)


LAST_WORDS = {}  # (folder, task id, run id): the last line of a failed run's log, which is read only once


def cell(value):
    """Return a value for a table: long text is cut, and nested values become text."""
    if isinstance(value, Instant):
        return format_time(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value else ""
    return text if len(text) <= CELL else text[:CELL - 1] + "…"


MADE_UP = {  # columns that are no fields of a task
    "duration": spent_s,
    "error": lambda record: error_of(record) or None,
    "host": lambda record: record.attempts[-1].get("host") if record.attempts else None,
    "workdir": lambda record: folders_of(record)["workdir"],
    "task_dir": lambda record: folders_of(record)["task_dir"],
}


def fields_of(records):
    """Return {dotted path: whether all its values are numbers} of args, summary and metadata in a sample of the tasks,
    the most common first."""
    uses, others = collections.Counter(), set()
    for at in range(0, len(records), max(1, len(records) // SAMPLE)):
        for top in ("args", "summary", "metadata"):
            for key, value in itertools.islice(flatten(getattr(records[at], top)), MOST_PATHS):
                path = (top + "." + key)[:CELL]
                uses[path] += 1
                if type(value) not in (int, float):
                    others.add(path)
    return {path: path not in others for path, _ in uses.most_common(MOST_PATHS)}


# ---- The table


def enter(path, run, example, options=(), rest=None, sort=None):
    """Add a command to the table of labtasker.py."""
    COMMANDS[path] = Command(run, EXTRA_COMMANDS[path], example, options, rest, sort)


enter("watch", do_watch, "labtasker watch --name grid", SELECT + [
    option("--interval TIME", "time between two updates (2 s)", type=seconds, default=REFRESH_S),
    option("--once", "print once and end; the default without a terminal")])
enter("config", do_config, "EDITOR=nano labtasker config", [
    option("--show", "print the current settings and where each comes from"), *formats("table")])
enter("sbatch", do_sbatch, "labtasker sbatch --array=0-7 -t 4:00:00 -- python train.py --lr '%(lr)'", [
            option("--dry-run", "print the script and submit nothing"),
            option("--server", "the first task also runs the server of the configured folder's store"),
            option("--listen HOST:PORT", "where that server listens (0.0.0.0:0; port 0 picks one)", type=listening,
                   default=("0.0.0.0", 0)),
            option("--server-wait TIME", "how long the others wait for it; then one of them runs it (2m)",
                   type=duration, default="2m")],
        "[of sbatch or loop] -- COMMAND ...", sort_sbatch)
enter("server wait", do_server_wait, "labtasker server wait --timeout 10m && labtasker task ls", [
    option("--timeout TIME", "give up after this time (10m)", type=seconds, default=600)])
enter("completion", do_completion, "labtasker completion bash", [
    choice("SHELL", tuple(SHELLS), dest="shell")], "[-- WORD ...]")
enter("skill install", do_skill_install, "labtasker skill install --global", [
    option("--global", "to ~/.claude/skills, for all projects (default: .claude/skills here)", dest="is_global"),
    option("--dest DIR", "to this folder of skills", type=for_system),
    option("-y --yes", "replace other files of those names without asking")])
enter("help skill", do_help_skill, "labtasker help skill", [
    option("PAGE", "python, cluster or filters; without it: the skill", dest="page", nargs="?")])
enter("help api", lambda options: show(api_reference()), "labtasker help api")
enter_page("GET /page", page_html)
enter_page("GET /page.css", page_css)
enter_page("GET /page.js", page_js)
enter_page("POST /api/v1/queues/me/tasks/view", view_tasks)
enter_page("POST /api/v1/queues/me/tasks/curves", view_curves)


# ---- The page: its parts, as the browser gets them

PAGE_HTML = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Labtasker</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'
%3E%3Crect width='16' height='16' rx='3' fill='%232b5bcc'/%3E%3Cpath d='M4 4h2v6h6v2H4z' fill='%23fff'/%3E%3C/svg%3E">
<link rel="stylesheet" href="page.css">
<script type="module" src="page.js"></script>
</head>
<body>
<noscript><p class="alone">This page needs JavaScript. Without it there are <code>labtasker task ls</code> and
  <code>labtasker watch</code>.</p></noscript>

<main id="login" class="alone" hidden>
  <form id="login-form" autocomplete="on">
    <h1>Labtasker</h1>
    <p id="login-where" class="quiet"></p>
    <label>Queue <input id="login-queue" name="username" autocomplete="username" required autocapitalize="none"
      spellcheck="false"></label>
    <label>Password <input id="login-password" name="password" type="password" autocomplete="current-password"
      required></label>
    <label class="tick"><input id="login-stay" type="checkbox"> Stay logged in on this computer</label>
    <p id="login-error" role="alert"></p>
    <button type="submit" class="main">Log in</button>
    <p class="quiet">What <code>labtasker serve</code> has printed names the queue and says whether it has a password.
      <code>labtasker queue update --new-password</code>, in the server's folder, sets one, or another. For a queue that
      <code>labtasker init</code> created, both are in <code>.labtasker/config.toml</code>. Unless you ask to stay
      logged in, both are forgotten with this tab.</p>
  </form>
</main>

<div id="app" hidden>
  <a class="skip" href="#main">Skip to the content</a>
  <header>
    <h1><bdi id="queue-name"></bdi></h1>
    <nav aria-label="Views">
      <a id="to-tasks" href="#view=tasks">Tasks</a>
      <a id="to-groups" href="#view=groups">Table</a>
      <a id="to-plot" href="#view=plot">Plot</a>
      <a id="to-grid" href="#view=grid">Grid</a>
      <a id="to-parallel" href="#view=parallel">Parallel</a>
      <a id="to-curves" href="#view=curves">Curves</a>
      <a id="to-workers" href="#view=workers">Workers</a>
    </nav>
    <p id="connection" class="away"><span class="dot"></span><span id="connection-text">Connecting</span></p>
    <button id="pause" type="button" title="A paused queue gives out no task; what runs goes on" hidden>Pause</button>
    <button id="help" type="button" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)">?</button>
    <button id="logout" type="button">Log out</button>
  </header>

  <section id="away" aria-label="Connection lost" hidden><span id="away-text"></span> <span id="away-wait"></span>
    <button id="away-now" type="button">Try now</button></section>

  <section id="overview" aria-label="Overview">
    <div id="states" role="group" aria-label="Show by status"></div>
    <dl>
      <div><dt>Done</dt><dd id="done">–</dd></div>
      <div><dt>Rate</dt><dd id="rate">–</dd></div>
      <div><dt>ETA</dt><dd id="eta">–</dd></div>
    </dl>
    <div id="bar" role="img" aria-label="Progress"></div>
  </section>

  <form id="filter-form" role="search">
    <label for="filter" class="sr">Filter</label>
    <div id="filter-box">
      <input id="filter" type="text" autocomplete="off"
        placeholder="Filter, such as  args.lr &gt; 0.01 and status == &quot;failed&quot;" autocapitalize="none"
        autocorrect="off" spellcheck="false" aria-describedby="filter-error">
      <button id="filter-clear" type="button" aria-label="Clear the filter" title="Clear the filter" hidden>×</button>
    </div>
    <button type="submit">Filter</button>
    <button id="views" type="button" title="Saved views, and a link to this one (v)">Views…</button>
    <div id="filter-error" role="alert" hidden></div>
  </form>

  <main id="main" tabindex="-1">
    <section id="tasks" aria-label="Tasks" hidden>
      <div class="tools">
        <div role="group" aria-label="Selected tasks" id="selection" class="none">
          <span id="selected">None selected</span>
          <button id="select-none" type="button">Clear selection</button>
          <button id="do-cancel" type="button" data-action="cancel">Cancel…</button>
          <button id="do-retry" type="button" data-action="retry">Retry…</button>
          <button id="do-priority" type="button" data-action="priority">Priority…</button>
          <button id="do-delete" type="button" data-action="delete">Delete…</button>
          <button id="select-all" type="button" hidden></button>
        </div>
        <div role="group" aria-label="Pages" id="pages">
          <button id="columns" type="button">Columns…</button>
          <span id="range"></span>
          <button id="previous" type="button" aria-label="Previous page" title="Previous page (p)">‹</button>
          <button id="next" type="button" aria-label="Next page" title="Next page (n)">›</button>
        </div>
      </div>
      <p id="same" class="quiet"></p>
      <div class="split">
        <div class="scroll" tabindex="0" role="region" aria-label="Table of tasks">
          <table id="table">
            <caption class="sr">Tasks</caption><colgroup></colgroup><thead><tr></tr></thead><tbody></tbody>
          </table>
          <p id="empty" class="quiet" hidden></p>
        </div>
        <article id="task" aria-label="Task" tabindex="-1" hidden></article>
      </div>
    </section>

    <section id="groups" aria-label="Table" hidden>
      <form class="tools">
        <button id="groups-by" type="button">Group by…</button>
        <label>Value <select id="groups-of"></select></label>
        <label>Best <select id="groups-mode"><option value="max">Highest</option><option value="min">Lowest</option>
          </select></label>
      </form>
      <p id="groups-note" class="quiet note"></p>
      <div class="scroll" tabindex="0" role="region" aria-label="Table of groups">
        <table id="group-table">
          <caption class="sr">Groups</caption><colgroup></colgroup><thead><tr></tr></thead><tbody></tbody>
        </table>
        <p><button id="groups-more" type="button" class="plain" hidden>Show more</button></p>
      </div>
    </section>

    <section id="plot" aria-label="Plot" hidden>
      <form class="tools">
        <label>Vertical <select id="plot-y"></select></label>
        <label>Horizontal <select id="plot-x"></select></label>
        <label>Colour <select id="plot-colour"></select></label>
        <label class="tick"><input id="plot-logy" type="checkbox"> Log vertical</label>
        <label class="tick"><input id="plot-logx" type="checkbox"> Log horizontal</label>
      </form>
      <p id="plot-note" class="quiet note"></p>
      <p id="plot-legend" class="quiet"></p>
      <div id="plot-drawing" class="drawing"></div>
      <div class="below"><details id="plot-data"><summary>The data as a table</summary></details>
        <div class="saves" data-of="plot" role="group" aria-label="Save"></div></div>
    </section>

    <section id="grid" aria-label="Grid" hidden>
      <form class="tools">
        <label>Rows <select id="grid-y"></select></label>
        <label>Columns <select id="grid-x"></select></label>
        <label>Metric <select id="grid-metric"></select></label>
        <label>Shown <select id="grid-how"><option value="mean">Mean</option><option value="min">Lowest</option>
          <option value="max">Highest</option><option value="count">Number of tasks</option></select></label>
      </form>
      <p id="grid-note" class="quiet note"></p>
      <div id="grid-drawing" class="drawing"></div>
      <div class="below"><details id="grid-data"><summary>The data as a table</summary></details>
        <div class="saves" data-of="grid" role="group" aria-label="Save"></div></div>
    </section>

    <section id="parallel" aria-label="Parallel" hidden>
      <form class="tools">
        <button id="parallel-axes" type="button">Axes…</button>
        <label>Result <select id="parallel-of"></select></label>
        <label>Best <select id="parallel-mode"><option value="max">Highest</option><option value="min">Lowest</option>
          </select></label>
        <p id="parallel-chosen" class="quiet"></p>
      </form>
      <p id="parallel-note" class="quiet note"></p>
      <p id="parallel-legend" class="quiet"></p>
      <div id="parallel-drawing" class="drawing"></div>
      <div class="below"><details id="parallel-data"><summary>The data as a table</summary></details>
        <div class="saves" data-of="parallel" role="group" aria-label="Save"></div></div>
    </section>

    <section id="curves" aria-label="Curves" hidden>
      <form class="tools">
        <label>Value <select id="curves-value"></select></label>
        <label>Colour <select id="curves-colour"></select></label>
        <label>Best <select id="curves-best"><option value="max">Highest</option><option value="min">Lowest</option>
          </select></label>
        <label class="tick"><input id="curves-logy" type="checkbox"> Log vertical</label>
        <label class="tick"><input id="curves-logx" type="checkbox"> Log horizontal</label>
      </form>
      <p id="curves-note" class="quiet note"></p>
      <p id="curves-legend" class="quiet"></p>
      <div id="curves-drawing" class="drawing"></div>
      <div class="below"><details id="curves-data"><summary>The data as a table</summary></details>
        <div class="saves" data-of="curves" role="group" aria-label="Save"></div></div>
    </section>

    <section id="workers" aria-label="Workers" hidden>
      <p id="workers-note" class="quiet note"></p>
      <div class="scroll" tabindex="0" role="region" aria-label="Table of workers">
        <table id="worker-table">
          <caption class="sr">Workers</caption><colgroup></colgroup><thead><tr></tr></thead><tbody></tbody>
        </table>
      </div>
    </section>
  </main>
</div>

<div id="toasts" role="region" aria-label="Notifications"></div>
<div id="tip" aria-hidden="true" hidden></div>
<p id="said" class="sr" role="status"></p>
<dialog id="dialog" aria-labelledby="dialog-title"></dialog>
</body>
</html>
"""

PAGE_CSS = r"""/* Colours: greys, one accent, and one a status; text has a contrast of 4.5 and more. */
:root {
  --ground: #fff; --raised: #f6f7f9; --line: #dfe3e8; --strong: #8a94a0; --text: #1a1f26; --quiet: #57606a;
  --accent: #2b5bcc; --on-accent: #fff; --tint: #eaf0fd;
  --pending: #8a94a0; --running: #2b5bcc; --success: #1f8a4c; --failed: #c93434; --cancelled: #b7791f;
  --failed-text: #b42626; --failed-ground: #fdf0f0;
  --c0: #2b5bcc; --c1: #c2571a; --c2: #1f8a4c; --c3: #8b45b5; --c4: #0d8597; --c5: #b0346f; --c6: #7a828c;
  --worst: #e6c84f; --midst: #2f9b8c; --best: #3b1d6e;
  --deepest: 0.7;  /* the deepest colour that text can be read on */
  --mono: ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace;
  --row: 2.125rem; --stretch: 1rem;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #101216; --raised: #181b21; --line: #2a2f38; --strong: #6b7582; --text: #e2e6eb; --quiet: #9aa4af;
    --accent: #84a9ff; --on-accent: #0c1630; --tint: #1b2740;
    --pending: #78828e; --running: #84a9ff; --success: #4fbf7d; --failed: #f07171; --cancelled: #d9a441;
    --failed-text: #ff9a9a; --failed-ground: #2c1719;
    --worst: #5b4590; --midst: #3aa596; --best: #f5e86b;
    --deepest: 0.5;
    --c0: #84a9ff; --c1: #f0975c; --c2: #4fbf7d; --c3: #c792ea; --c4: #4cc3d4; --c5: #f07fb0; --c6: #98a2ad;
  }
}

/* The page */
*, ::before, ::after { box-sizing: border-box; }
[hidden] { display: none !important; }
html { font-size: clamp(14px, 11.6px + 0.17vw, 19px); color-scheme: light dark; }
body { margin: 0; background: var(--ground); color: var(--text); line-height: 1.45;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
h1, h2, h3, p, dl, dd, pre { margin: 0; font-weight: inherit; font-size: inherit; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre, .mono { font-family: var(--mono); font-size: 0.923em; }
.quiet { color: var(--quiet); }
.sr { position: absolute; width: 1px; height: 1px; margin: -1px; padding: 0; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; border: 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; border-radius: 3px; }
#main:focus, article:focus { outline: none; }
.skip { position: absolute; left: 0.5rem; top: -4rem; background: var(--ground); padding: 0.5rem 0.75rem;
  z-index: 9; }
.skip:focus { top: 0.25rem; }
.dot { display: inline-block; width: 0.571rem; height: 0.571rem; border-radius: 50%;
  background: var(--dot, var(--pending)); flex: none; }
.pending { --dot: var(--pending); } .running { --dot: var(--running); } .success { --dot: var(--success); }
.failed { --dot: var(--failed); } .cancelled { --dot: var(--cancelled); }
.active { --dot: var(--success); } .suspended { --dot: var(--cancelled); } .crashed { --dot: var(--failed); }
.pending > .dot, .cancelled > .dot { background: none; border: 0.143rem solid var(--dot); }

/* Controls */
button, input, select, textarea { font: inherit; color: inherit; }
button, select, input:not([type=checkbox], [type=radio]) { height: 2rem; border: 1px solid var(--line);
  border-radius: 5px; background: var(--ground); padding: 0 0.643rem; }
input:not([type=checkbox], [type=radio]), select { border-color: var(--strong); }
select { padding: 0 0.286rem; max-width: 14rem; }
button { cursor: pointer; white-space: nowrap; }
button:hover:not(:disabled) { background: var(--raised); border-color: var(--strong); }
button:disabled { color: var(--quiet); cursor: default; opacity: 0.75; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.main:hover:not(:disabled) { background: var(--accent); filter: brightness(1.08); }
button.danger { background: var(--failed-text); border-color: var(--failed-text); color: var(--ground); }
button.danger:hover:not(:disabled) { background: var(--failed-text); filter: brightness(1.08); }
button.plain { border: 0; background: none; padding: 0 0.25rem; height: auto; color: var(--accent); }
button.plain:hover:not(:disabled) { background: none; text-decoration: underline; }
input[type=checkbox] { width: 1.071rem; height: 1.071rem; margin: 0; accent-color: var(--accent);
  vertical-align: middle; }
label { display: inline-flex; align-items: center; gap: 0.5rem; }
label.tick { gap: 0.429rem; }

/* Log in */
.alone { max-width: 24rem; margin: 12vh auto 2rem; padding: 0 1.25rem; }
#login form { display: grid; gap: 1rem; }
#login h1 { font-size: 1.571rem; font-weight: 600; letter-spacing: -0.01em; }
#login label:not(.tick) { display: grid; gap: 0.286rem; font-weight: 500; }
#login input:not([type=checkbox]) { height: 2.429rem; font-weight: 400; }
#login button { height: 2.429rem; }
#login-error { color: var(--failed-text); min-height: 1.45em; }

/* The frame */
#app { display: flex; flex-direction: column; min-height: 100vh; min-height: 100dvh; }
header { display: flex; align-items: center; gap: 0.25rem 1rem; padding: 0 1rem; height: 3.143rem;
  border-bottom: 1px solid var(--line); }
header h1 { font-weight: 600; max-width: 16rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
nav { display: flex; align-self: stretch; gap: 0.25rem; }
nav a { display: flex; align-items: center; padding: 0 0.643rem; color: var(--quiet);
  border-bottom: 2px solid transparent; margin-bottom: -1px; }
nav a:hover { color: var(--text); text-decoration: none; }
nav a[aria-current] { color: var(--text); border-color: var(--accent); font-weight: 500; }
nav a:focus-visible { outline-offset: -3px; }
#connection { margin-left: auto; display: flex; align-items: center; gap: 0.5rem; color: var(--quiet);
  white-space: nowrap; }
#connection.live { --dot: var(--success); } #connection.away { --dot: var(--failed); }
#away { background: var(--failed-ground); color: var(--failed-text); padding: 0.429rem 1rem;
  border-bottom: 1px solid var(--line); }
#away-wait { margin: 0 0.5rem; }
#away button { height: 1.714rem; margin-left: 0.5rem; color: var(--text); }

/* Counts, rate, progress */
#overview { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; padding: 0 1rem;
  gap: 0 1.5rem; }
#states { display: flex; gap: 0.143rem; padding: 0.5rem 0; margin-left: -0.643rem; }
#states button { display: flex; align-items: center; gap: 0.429rem; border-color: transparent; }
#states button b { font-weight: 600; min-width: var(--digits, 3ch); text-align: left; }
#states button[aria-pressed=true] { background: var(--tint); border-color: var(--tint); }
#overview dl { display: flex; gap: 1.5rem; }
#overview dl div { display: flex; gap: 0.5rem; align-items: baseline; }
dt { color: var(--quiet); }
#overview dd { font-weight: 600; text-align: right; }
#done { min-width: 4ch; } #rate { min-width: 9ch; } #eta { min-width: 8ch; }
#bar { flex: 1 0 100%; margin-top: 0.3rem; display: flex; height: 0.286rem; border-radius: 2px; overflow: hidden;
  background: var(--line); }

/* Filter and tools */
#filter-form { display: grid; grid-template-columns: 1fr auto auto; gap: 0 0.5rem; padding: 0.714rem 1rem 0; }
#filter-box { position: relative; }
#filter { width: 100%; font-family: var(--mono); font-size: 0.923rem; padding-right: 2rem; }
#filter::placeholder { color: var(--quiet); opacity: 1; }
#filter[aria-invalid=true] { border-color: var(--failed-text); }
#filter-clear { position: absolute; right: 0.214rem; top: 0.214rem; height: 1.571rem; width: 1.571rem; padding: 0;
  border: 0; background: none; color: var(--quiet); font-size: 1.143rem; line-height: 1; }
#filter-error { grid-column: 1 / -1; color: var(--failed-text); padding-top: 0.357rem; }
#filter-error pre { overflow-x: auto; color: var(--text); padding: 0.286rem 0.643rem;
  background: var(--failed-ground); border-radius: 4px; margin-top: 0.286rem; }
#filter-error pre mark { background: none; color: var(--failed-text); font-weight: 700; }
main#main { flex: 1; display: flex; flex-direction: column; min-height: 0; padding: 0 1rem 1rem; }
#workers .note { padding-top: 0.714rem; }
#main > section { display: flex; flex-direction: column; flex: 1; min-height: 0; }
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center; justify-content: space-between;
  padding: 0.714rem 0; }
form.tools { justify-content: flex-start; }
form.tools select { width: 12rem; }  /* whatever fields come and go */
.tools [role=group] { display: flex; flex-wrap: wrap; gap: 0.286rem; align-items: center; }
#selected { min-width: 8.5rem; color: var(--quiet); }
#selection.none button { visibility: hidden; }  /* their room stays: what is below does not move under the pointer */
#range { min-width: 12rem; text-align: right; padding-right: 0.286rem; color: var(--quiet); }
#previous, #next { width: 2rem; padding: 0; font-size: 1.143rem; line-height: 1; }
.note { min-height: 1.45em; padding-bottom: 0.5rem; }
#same { min-height: 1.45em; max-height: 4.35em; margin-bottom: 0.5rem; overflow: auto; }
#same span { margin-right: 0.643rem; overflow-wrap: anywhere; } #same b { font-weight: inherit; color: var(--text); }

/* Tables */
.split { flex: 1; display: flex; gap: 1rem; min-height: 0; }
.scroll { flex: 1; overflow: auto; border: 1px solid var(--line); border-radius: 6px; min-width: 0;
  min-height: 12rem; position: relative; }
.scroll:focus-visible { outline-offset: -2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
#table, #group-table, #worker-table { table-layout: fixed; min-width: calc(var(--width) * var(--stretch)); }
col { width: calc(var(--width) * var(--stretch)); }
col:not([style]) { width: auto; }
th, td { padding: 0 0.643rem; text-align: left; height: var(--row); border-bottom: 1px solid var(--line);
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-weight: inherit; }
tbody tr:last-child > * { border-bottom-color: transparent; }
thead th, thead td { position: sticky; top: 0; background: var(--raised); color: var(--quiet); z-index: 2;
  font-weight: 500; }
thead button { border: 0; background: none; padding: 0; height: 100%; width: 100%; text-align: inherit;
  overflow: hidden; text-overflow: ellipsis; }
thead button:hover:not(:disabled) { background: none; color: var(--text); }
thead button:focus-visible { outline-offset: -2px; }
[aria-sort=ascending] button::after { content: " ↑"; } [aria-sort=descending] button::after { content: " ↓"; }
[aria-sort] button { color: var(--text); }
.number { text-align: right; }
tbody tr:hover { background: var(--raised); }
tbody tr.chosen, tbody tr:has(input:checked) { background: var(--tint); }
td.status { text-overflow: clip; }
td.status .dot { margin-right: 0.5rem; }
.winner::before { content: "★ "; color: var(--accent); }
.winner + * { font-weight: 600; }
td.pick, th.pick { padding: 0; text-align: center; text-overflow: clip; }
td.pick label { display: flex; width: 100%; height: 100%; justify-content: center; }
#groups-more { margin: 0.429rem; }
#group-table tbody tr { cursor: pointer; }
#group-table tr.leader .number.mean { font-weight: 600; }
#group-table .spread { padding: 0 0.286rem; text-overflow: clip; }
.spread div { position: relative; height: 1.286rem; }
td.spread:not(thead *) { background: var(--ticks, none); background-origin: content-box; }
.spread span { position: absolute; }
#spread-head span { transform: translateX(-50%); }
.spread .mean { top: 0.143rem; bottom: 0.143rem; background: var(--c0); opacity: 0.5; min-width: 2px; }
.leader .spread .mean { opacity: 0.9; }
.spread .whisker { top: 0.357rem; bottom: 0.357rem; border: solid var(--text); border-width: 0 1.5px; min-width: 3px;
  background: linear-gradient(var(--text), var(--text)) center / 100% 1.5px no-repeat; }
#empty { position: sticky; left: 0; padding: 2.5rem 1rem; text-align: center; }

/* A task */
article { flex: 0 0 min(40rem, 46%); overflow: auto; border: 1px solid var(--line); border-radius: 6px;
  padding: 0 1rem 1rem; }
article > [data-key=head] { position: sticky; top: 0; background: var(--ground); display: flex; gap: 0.5rem;
  align-items: center; padding: 0.643rem 0; z-index: 1; border-bottom: 1px solid var(--line); }
article h2 { flex: 1; font-weight: 600; font-size: 1.071rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
article h3 { font-weight: 600; padding: 1.143rem 0 0.357rem; }
h3 + div > .facts { padding-top: 0; }
article .buttons { display: flex; gap: 0.286rem; flex-wrap: wrap; padding-top: 0.714rem; }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: 0.214rem 1.143rem;
  padding-top: 0.714rem; }
.facts dt, .facts dd { overflow-wrap: anywhere; min-width: 0; }
.facts dt { max-width: 14rem; }
.long { white-space: pre-wrap; overflow-wrap: anywhere; }
pre.block { background: var(--raised); border: 1px solid var(--line); border-radius: 5px;
  padding: 0.571rem 0.714rem; overflow: auto; max-height: 26rem; line-height: 1.4; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.table-box { overflow-x: auto; border: 1px solid var(--line); border-radius: 5px; }
.table-box th, .table-box td { height: 1.857rem; }
.table-box .kept { position: sticky; right: 0; background: var(--ground); border-left: 1px solid var(--line); }
.table-box th.kept { background: var(--raised); z-index: 3; }
tr:hover > .kept { background: var(--raised); }

/* Drawings */
.drawing { position: relative; flex: 1; min-height: 24rem; }
.drawing svg { display: block; width: 100%; height: 100%; position: absolute; inset: 0; }
.drawing text { fill: var(--quiet); font-size: 0.857rem; }
.drawing .title { fill: var(--text); }
.drawing .axis { stroke: var(--strong); } .drawing .tick { stroke: var(--line); }
.drawing canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.drawing .line { fill: none; stroke: var(--c, var(--c0)); stroke-width: 2; stroke-linejoin: round;
  pointer-events: none; }
.drawing .line.best { stroke-width: 3.5; } .drawing .line.pointed { stroke: var(--text); stroke-width: 2.5; }
.drawing a { outline: none; cursor: pointer; text-decoration: none; }
#plot-legend, #parallel-legend, #curves-legend { display: flex; flex-wrap: wrap; gap: 0.214rem 1.286rem; }
#plot-legend:not(:empty), #parallel-legend:not(:empty), #curves-legend:not(:empty) { padding-bottom: 0.643rem; }
#plot-legend span, #parallel-legend span, #curves-legend span { display: inline-flex; align-items: center;
  gap: 0.429rem; white-space: nowrap; }
.drawing canvas.behind { opacity: 0.1; }
#parallel-drawing text { paint-order: stroke; stroke: var(--ground); stroke-width: 3px; stroke-linejoin: round;
  pointer-events: none; }
#parallel-drawing .title { stroke-width: 0; }
#parallel-drawing .axis { stroke-width: 1.5; }
#parallel-chosen { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: center; min-height: 2rem; }
.drawing .hit { fill: transparent; touch-action: none; cursor: crosshair; }
.drawing .span { fill: var(--accent); fill-opacity: 0.3; touch-action: none; cursor: move; }
.drawing .grip { fill: var(--strong); outline: none; touch-action: none; cursor: ns-resize; }
.drawing .grip .hit { cursor: inherit; } .drawing .grip.set { fill: var(--accent); }
.drawing .grip:hover path, .drawing .grip:focus path { fill: var(--text); }
.drawing .grip:focus-visible path { stroke: var(--accent); stroke-width: 3; }
.worst { stop-color: var(--worst); } .midst { stop-color: var(--midst); } .best { stop-color: var(--best); }
.drawing .off .mark { fill-opacity: 0.1; }
.mark { fill: var(--c, var(--c0)); fill-opacity: 0.62; }
.mark.deep { fill-opacity: 1; }
#grid-note { display: flex; flex-wrap: wrap; gap: 0.214rem 1.286rem; }
.ramp .cell { fill: var(--accent); } .ramp .cell.none { fill: var(--raised); } .ramp .depth { opacity: var(--deepest); }
.ramp { display: inline-flex; align-items: center; gap: 0.429rem; }
.ramp svg { width: 7rem; height: 0.857rem; }
td button.plain { padding: 0; }
.drawing a:hover .mark, .drawing a:focus .mark { fill-opacity: 1; stroke: var(--text); stroke-width: 2; }
.k0 { --c: var(--c0); } .k1 { --c: var(--c1); } .k2 { --c: var(--c2); } .k3 { --c: var(--c3); }
.k4 { --c: var(--c4); } .k5 { --c: var(--c5); } .k6 { --c: var(--c6); }
.drawing .cell { stroke-width: 0; fill: var(--accent); }
.drawing .depth { opacity: var(--deepest); }
.drawing .none { fill: var(--raised); }
.drawing a:hover .cell, .drawing a:focus .cell { stroke: var(--text); stroke-width: 2; }
.drawing .value { fill: var(--text); }
details { padding-top: 0.714rem; }
.below { display: flex; flex-wrap: wrap-reverse; justify-content: space-between; gap: 0 1rem; }
.below details { flex: 1 1 16rem; min-width: 0; }
.below details[open] { flex-basis: 100%; }
.saves { display: flex; flex-wrap: wrap; align-items: center; gap: 0.286rem; padding-top: 0.5rem; }
.saves span { padding-right: 0.286rem; }
.drawing:empty + .below .saves { display: none; }
.saves button { height: 1.714rem; }
summary { cursor: pointer; color: var(--quiet); width: max-content; }
details .table-box { max-height: 24rem; overflow: auto; margin-top: 0.5rem; }
#tip { position: fixed; z-index: 20; background: var(--text); color: var(--ground); padding: 0.357rem 0.571rem;
  border-radius: 4px; pointer-events: none; max-width: 22rem; white-space: pre-line; overflow-wrap: anywhere;
  font-size: 0.923rem; }

/* Dialogs and notifications */
dialog { border: 1px solid var(--line); border-radius: 8px; background: var(--ground); color: var(--text);
  padding: 1.25rem; width: min(32rem, calc(100vw - 2rem)); max-height: calc(100vh - 2rem); overflow: auto;
  box-shadow: 0 12px 40px rgb(0 0 0 / 25%); }
dialog::backdrop { background: rgb(10 12 16 / 45%); }
dialog h2 { font-weight: 600; font-size: 1.143rem; padding-bottom: 0.5rem; }
dialog form { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.857rem; }
dialog .buttons { display: flex; justify-content: flex-end; gap: 0.5rem; }
dialog .choices { display: grid; gap: 0.286rem; border: 1px solid var(--line); border-radius: 5px; margin: 0;
  padding: 0.571rem; max-height: 50vh; overflow: auto; }
dialog .choices label { overflow-wrap: anywhere; }
dialog .views { display: grid; gap: 0.286rem; margin: 0; padding: 0; list-style: none; max-height: 40vh;
  overflow: auto; }
dialog .views li { display: flex; gap: 0.571rem; align-items: center; min-height: 2.286rem; padding: 0 0.286rem; }
dialog .views li > :first-child { flex: 1; min-width: 0; overflow-wrap: anywhere; }
dialog .views [aria-current] { font-weight: 600; }
dialog .line { flex-wrap: wrap; } dialog .line > span { flex: 0 0 9rem; }
dialog .line input { flex: 1 1 10rem; min-width: 0; }
dialog kbd { font-family: var(--mono); border: 1px solid var(--line); border-radius: 3px; padding: 0 0.357rem;
  background: var(--raised); }
#toasts { position: fixed; left: 1rem; bottom: 1rem; display: grid; gap: 0.5rem; z-index: 30;
  max-width: min(34rem, calc(100vw - 2rem)); }
.toast { background: var(--text); color: var(--ground); border-radius: 6px;
  padding: 0.571rem 0.571rem 0.571rem 0.857rem; display: flex; gap: 0.857rem; align-items: center;
  box-shadow: 0 6px 24px rgb(0 0 0 / 25%); overflow-wrap: anywhere; }
.toast span { flex: 1; }
.toast button { background: none; border-color: var(--strong); color: var(--ground); height: 1.714rem; flex: none; }
.toast button:hover:not(:disabled) { background: rgb(128 128 128 / 30%); }
.toast :focus-visible { outline-color: var(--ground); }

@media (min-width: 130rem) { :root { --stretch: 1.4rem; } }

/* From a tablet on the tables scroll within the window, and a task stands beside them */
@media (min-width: 50rem) and (min-height: 34rem) {
  #app { height: 100vh; height: 100dvh; }
}
@media (max-width: 68rem) {
  .split.with-task .scroll { display: none; }
  article { flex: 1; }
}
@media (max-width: 50rem) {
  header { flex-wrap: wrap; height: auto; padding: 0.357rem 0.75rem 0; gap: 0 0.5rem; }
  header h1 { flex: 1; max-width: none; }
  nav { order: 5; flex: 1 0 100%; height: 2.571rem; margin: 0 -0.286rem; gap: 0; justify-content: space-between; }
  nav a { padding: 0 0.286rem; }
  #overview { display: block; padding: 0 0.75rem; }
  #states { display: grid; grid-template-columns: repeat(auto-fit, minmax(calc(var(--digits, 3ch) + 6.1rem), 1fr));
    gap: 0; margin: 0 -0.357rem; }
  #states button { padding: 0 0.214rem; gap: 0.286rem; }
  #overview dl { justify-content: space-between; gap: 0.357rem; padding-bottom: 0.5rem; }
  #overview dl div { gap: 0.357rem; }
  #rate, #eta { min-width: 7ch; }
  #filter-form { padding: 0.714rem 0.75rem 0; }
  main#main { padding: 0 0.75rem 0.75rem; }
  #selection { position: fixed; left: 0; right: 0; bottom: 0; z-index: 5; padding: 0.5rem 0.75rem;
    background: var(--raised); border-top: 1px solid var(--line); }
  #selection.none { display: none; }
  #selected { min-width: 0; flex: 1 0 40%; color: var(--text); }
  #selection [data-action] { padding: 0 0.5rem; flex: 1 0 auto; }
  body:has(#selection:not(.none)) main#main { padding-bottom: 8.5rem; }
  body:has(#selection:not(.none)) #toasts { bottom: 8.5rem; }
  #pages { flex: 1 0 100%; }
  #range { flex: 1; min-width: 0; }
  form.tools label { flex: 1 1 16rem; justify-content: space-between; }
  form.tools label.tick { flex: 0 0 auto; }
  select { max-width: 60vw; }
  .scroll { min-height: 24rem; }
  #table th, #table td { padding: 0 0.393rem; }
  #table th.pick, #table td.pick { padding: 0; }
  #tasks:has(.with-task) .tools { display: none; }
  .with-task { padding-top: 0.714rem; }
  article { padding: 0 0.75rem 0.75rem; }
  article .buttons button { padding: 0 0.5rem; flex: 1 0 auto; }
  .drawing { min-height: 21rem; }
}
@media (max-width: 30rem) { form.tools label:not(.tick) { flex: 1 1 100%; } }
@media (forced-colors: active) { .dot { forced-color-adjust: none; } }
"""

PAGE_JS = r"""// The page of a Labtasker server. Reads downward: what a section needs stands above it, but for what is
// called back later (the views, and what shows the login).
//
//    1. Elements   making and filling them; never from text as HTML, so that nothing a job reported is more than text
//    2. Words      numbers, times, values as people read them
//    3. Server     the login, requests, a server that is away
//    4. Address    what is looked at stands behind the # of the address: never a secret
//    5. Frame      counts, rate, filter; when to ask again
//    6. Dialogs    questions, notifications, the tooltip
//    7. Actions    cancel, retry, priority, delete, and their undoing
//    8. Tasks      the table
//    9. Task       one of them: args, summary, attempts, error, log
//   10. Drawings   what plot and grid share: scales, axes, points to walk through
//   11. Files      a drawing as a picture, its data as CSV
//   12. Plot       a field against an arg
//   13. Grid       two args, coloured by a metric
//   14. Curves     a value over steps, a line for each task
//   15. Table      groups of tasks: mean, spread and best of a value
//   16. Parallel   an axis for each arg and one for the result, a line for each task
//   17. Saved      views that have a name, in this browser
//   18. Workers    and what each runs
//   19. Views      the table that names them, keys, start

// 1. Elements #################################################################

const $ = (id) => document.getElementById(id);

/** Returns an element with attributes, listeners (functions) and children: elements or text. */
function el(name, attributes = {}, ...children) {
  return dressed(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return dressed(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function dressed(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...present(children));
  return node;
}

/** Children as a plain list, without those that are null. */
function present(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined);
}

/** Sets a text only where it differs: what stays the same is not drawn again. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function fill(node, ...children) {
  node.replaceChildren(...present(children));
}

/** Makes a node's children one for each item, keeping those that are there: no flicker, and the focus stays. */
function sync(...words) {
  const work = syncing(...words);
  while (!work.next().done);
}

/** As sync, some children a frame where they are many, so that nothing waits for them; calls `done` at the end, unless
    another of the same parent has begun. */
function syncInFrames(parent, items, keyOf, make, update, some, done) {
  const work = syncing(parent, items, keyOf, make, update);
  works.set(parent, work);
  const step = () => {
    for (let left = some; left && works.get(parent) === work; left--) if (work.next().done) return done();
    if (works.get(parent) === work) requestAnimationFrame(step);
    return undefined;
  };
  step();
}

const works = new WeakMap();  // a parent: the work on its children that began last

/** Yields after each child that is as its item says. */
function* syncing(parent, items, keyOf, make, update) {
  const there = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = new Set(items.map((item) => String(keyOf(item))));
  for (const [key, child] of there) if (!wanted.has(key)) child.remove();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = there.get(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    there.delete(key);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
    yield;
  }
  for (const child of there.values()) child.remove();
}

/** Fills a select with [value, text]s and shows the wanted one; a value that is not among them is offered too. */
function setOptions(select, options, wanted) {
  if (wanted && !options.some(([value]) => value === wanted)) options = [...options, [wanted, wanted]];
  const text = JSON.stringify(options);
  if (select.dataset.options !== text) {
    select.dataset.options = text;
    fill(select, options.map(([value, shown]) => el("option", {value}, cut(shown, 60))));
  }
  if (select.value !== wanted) select.value = wanted;
}

/** Fills a table's thead and colgroup: columns are [title, class, width in rem or null for what is left]. Returns
    whether they are others than before. */
function setHead(table, columns, cellOf) {
  const text = JSON.stringify(columns);
  if (table.dataset.head === text) return false;
  table.dataset.head = text;
  fill(table.tHead.rows[0], columns.map(cellOf));
  fill(table.querySelector("colgroup"), columns.map(([, , width]) => sized(el("col"), width)));
  sized(table, columns.reduce((sum, [, , width]) => sum + (width || 1), 0));
  return true;
}

function sized(node, width) {
  if (width) node.style.setProperty("--width", width);
  return node;
}

// 2. Words ####################################################################

const CONTROLS = /[\u0000-\u001f\u007f-\u009f]/g;

/** What a table has under a key of its own: a field may be called `constructor`. */
const own = (table, key) => (Object.hasOwn(table, key) ? table[key] : undefined);

const capital = (word) => word[0].toUpperCase() + word.slice(1);

function cut(text, most) {
  return text.length > most ? text.slice(0, most - 1) + "…" : text;
}

/** Text on one line: what would not be seen has a sign. */
function oneLine(text) {
  return text.replace(CONTROLS, (sign) => sign < " " ? String.fromCharCode(0x2400 + sign.charCodeAt(0)) : "\ufffd");
}

/** A value of any kind, whole; texts as they are. */
function asText(value) {
  return typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value);
}

/** Is a number written with a power, as 2e-5? Python's bounds, or nearly. */
const isFar = (value) => value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e15);

/** A number with all its digits. */
function wholeNumber(value, hasPower = isFar(value)) {
  return hasPower && value ? value.toExponential().replace("e+", "e") : String(value);
}

/** A number to look at: five digits that count, or what stands before the point. */
function shortNumber(value, hasPower = isFar(value)) {
  const size = Math.abs(value), isWhole = Number.isInteger(value) && size < 1e15;
  return wholeNumber(isWhole ? value : Number(value.toPrecision(size >= 1e5 ? 7 : 5)), hasPower);
}

/** Returns what writes numbers that stand together, in one way: all with a power where one of them needs it. */
function writerOf(numbers) {
  const hasPower = numbers.some(isFar);
  return (value) => shortNumber(value, hasPower);
}

/** Returns what writes numbers that are compared, with as many digits behind the point each: three digits of the
    largest, and two of what lies between lowest and highest. */
function alignedWriter(numbers) {
  if (numbers.every(Number.isInteger)) return String;
  const low = Math.min(...numbers), high = Math.max(...numbers), size = Math.max(Math.abs(low), Math.abs(high));
  const below = (number, digits) => (number ? digits - 1 - Math.floor(Math.log10(number)) : 0);
  if (size < 1e-4 || size >= 1e15) {
    const digits = Math.min(6, Math.max(2, below((high - low) / size, 2)));
    return (value) => value.toExponential(digits).replace("e+", "e");
  }
  const digits = Math.min(7, Math.max(0, below(size, 3), below(high - low, 2)));
  return (value) => value.toFixed(digits);
}

function shortValue(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "number" ? shortNumber(value) : cut(oneLine(asText(value)), 300);
}

const grouped = new Intl.NumberFormat("en").format;
const many = (number, noun) => `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Seconds as "1h 05m", "5m 12s", "12 s", "0.3 s". */
function span(seconds) {
  if (seconds === null || seconds === undefined || !isFinite(seconds)) return "";
  const pair = (big, small) => (a, b) => `${a}${big} ${String(b).padStart(2, "0")}${small}`;
  const whole = Math.round(seconds);
  if (whole >= 172800) return pair("d", "h")(Math.floor(whole / 86400), Math.floor(whole % 86400 / 3600));
  if (whole >= 3600) return pair("h", "m")(Math.floor(whole / 3600), Math.floor(whole % 3600 / 60));
  if (whole >= 60) return pair("m", "s")(Math.floor(whole / 60), whole % 60);
  return seconds < 9.95 ? `${seconds.toFixed(1)} s` : `${whole} s`;
}

/** A rate in a unit in which it is a number to read. */
function rate(perSecond) {
  const perMinute = perSecond * 60;
  if (!perMinute) return "–";
  if (perMinute >= 1) return `${grouped(perMinute >= 100 ? Math.round(perMinute) : Number(perMinute.toFixed(1)))}/min`;
  return `${(perMinute * 60).toFixed(1)}/h`;
}

const two = (number) => String(number).padStart(2, "0");

const isToday = (time) => new Date(time).toDateString() === new Date().toDateString();

/** A time in this computer's zone: "whole", "time" of the day alone, or with a short "day"; at first the day of what
    was not today. */
function moment(iso, form = isToday(iso) ? "time" : "day") {
  const at = new Date(iso);
  if (!iso || isNaN(at)) return "";
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  return {whole: `${day} ${time}`, time, day: `${day.slice(5)} ${time.slice(0, 5)}`}[form];
}

function bytes(size) {
  const [unit, name] = size >= 1e6 ? [1e6, "MB"] : size >= 1e3 ? [1e3, "kB"] : [1, "bytes"];
  return `${unit === 1 ? size : (size / unit).toFixed(1)} ${name}`;
}

/** [dotted path, value] of each leaf of nested objects. */
function* leaves(value, path = "") {
  for (const [key, item] of Object.entries(value)) {
    const isDict = item !== null && typeof item === "object" && !Array.isArray(item) && Object.keys(item).length;
    if (isDict) yield* leaves(item, `${path}${key}.`);
    else yield [path + key, item];
  }
}

/** A dotted path as the filter language has it. */
function inFilter(path) {
  const [top, ...keys] = path.split(".");
  return top + keys.map((key) => /^[A-Za-z_]\w*$/.test(key) ? `.${key}` : `[${JSON.stringify(key)}]`).join("");
}

/** A value as the filter language has it; it has no dicts. */
function literal(value) {
  if (value === null || value === undefined) return "None";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
}

const hasDict = (value) => (Array.isArray(value) ? value.some(hasDict) : value !== null && typeof value === "object");

/** What may be meant by a value that was sent as text: that text, or the long number or the list that it writes. */
function literals(value) {
  const text = literal(value);
  if (typeof value !== "string" || !/^(-?\d{16,}|\[[^]*\])$/.test(value)) return [text];
  if (!value.startsWith("[")) return [text, value];
  try {
    const list = JSON.parse(value);
    return hasDict(list) ? [text] : [text, literal(list)];
  } catch {
    return [text];
  }
}

/** The condition that a field has one of these values. */
function isAmong(path, values) {
  const all = values.filter((value) => !hasDict(value)).flatMap(literals), name = inFilter(path);
  return all.length > 1 ? `${name} in [${all.join(", ")}]` : all.length ? `${name} == ${all[0]}` : `exists(${name})`;
}

/** The condition that a field has a value: of nested values, that all their leaves do. */
function isEqual(path, value) {
  const isDict = value !== null && typeof value === "object" && !Array.isArray(value), name = inFilter(path);
  if (!isDict) return isAmong(path, [value]);
  return [...leaves(value, `${path}.`)].map(([leaf, item]) => isEqual(leaf, item)).join(" and ") || `exists(${name})`;
}

const NAMES = {task_name: "Name", status: "Status", created_at: "Created", last_modified: "Changed",
  start_time: "Started", last_heartbeat: "Last heard of", duration: "Took", error: "Error", host: "Host",
  priority: "Priority", retries: "Retries", task_id: "ID", worker_id: "Worker", cmd: "Command",
  interruptions: "Interruptions", git: "Commit", max_retries: "Max retries"};
const titleOf = (field) => own(NAMES, field) || field.replace(/^(args|summary)\./, "");

// 3. Server ###################################################################

const UNDER = new URL(".", import.meta.url).pathname;  // "/", or the path under which a proxy serves this server
const ME = `${UNDER}api/v1/queues/me`;
const KEPT = `labtasker-login${UNDER.slice(0, -1)}`;  // a proxy may serve several under one name
const RETRY_MS = [1000, 2000, 4000, 8000, 15000, 30000];  // between attempts at a server that is away
const SILENT_MS = 45000;  // it sends a ping every 15 s

const REASON = `${KEPT}-ended`;  // why the login ended, for the document that follows
let login = null;  // {queue, authorization}
let isLeaving = false;  // whether the next document is on its way

/** An answer that is an error: its status, and what the server says. */
class Refused extends Error {
  constructor(status, detail) {
    super(Array.isArray(detail) ? detail.map((row) => `${(row.loc || []).slice(1).join(".")}: ${row.msg}`).join("; ")
      : String(detail));
    this.status = status;
  }
}

/** Nobody answered. */
class Away extends Error {}

function basic(queue, password) {
  return "Basic " + btoa(String.fromCharCode(...new TextEncoder().encode(`${queue}:${password}`)));
}

/** JSON as Python writes it: NaN and Infinity, and integers that a browser would round, become text. */
function readJson(text) {
  return JSON.parse(text.replace(/"[^"\\]*(?:\\.[^"\\]*)*"|-?Infinity|NaN|-?\d[\d.eE+-]*/g,
    (piece) => /^"|^-?\d{1,15}$|^-?\d.*[.eE]/.test(piece) ? piece : `"${piece}"`));
}

/** JSON of many numbers: as readJson where it has what JavaScript does not know. */
function readNumbers(text) {
  try {
    return JSON.parse(text);
  } catch {
    return readJson(text);
  }
}

/** Returns the answer to a request; throws Refused or Away. */
async function ask(method, path, body, {signal, as = login, read = readJson} = {}) {
  let answer, text;
  try {
    answer = await fetch(path, {method, signal, credentials: "omit", cache: "no-store",
      headers: {"Authorization": as.authorization, "Content-Type": "application/json", "Labtasker-Extensions": "1"},
      body: body === undefined ? undefined : JSON.stringify(body)});
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (isLeaving) await new Promise(() => {});
    throw new Away("the server does not answer");
  }
  if (isLeaving) await new Promise(() => {});  // nobody is there any more to take the answer
  if (!answer.ok) {
    let detail = text.slice(0, 500);
    try { detail = readJson(text).detail; } catch { /* it is no JSON: something stands between */ }
    if (answer.status === 401 && as === login) {
      forget("The queue is gone, or its password is another now.");
      await new Promise(() => {});
    }
    throw new Refused(answer.status, detail);
  }
  return text ? read(text) : null;
}

const view = (request, options) => ask("POST", `${ME}/tasks/view`, request, options);

/** What the browser keeps for this page, in this tab ("session") or for good ("local"). It may keep nothing. */
const kept = {
  get(kind, key) { try { return window[`${kind}Storage`].getItem(key); } catch { return null; } },
  set(kind, key, value) { try { window[`${kind}Storage`].setItem(key, value); return true; } catch { return false; } },
  remove(kind, key) { try { window[`${kind}Storage`].removeItem(key); } catch { /* it was never there */ } },
};

/** Logs in, or throws. What is kept is kept for this tab, or where a person ticked so on this computer. */
async function enter(queue, password, stays) {
  const as = {queue, authorization: basic(queue, password)};
  await ask("GET", ME, undefined, {as});
  login = as;
  kept.set(stays ? "local" : "session", KEPT, JSON.stringify(as));
}

function remembered() {
  for (const kind of ["session", "local"]) {
    try {
      const as = JSON.parse(kept.get(kind, KEPT));
      if (as && as.authorization) return as;
    } catch { /* nothing to go by */ }
  }
  return null;
}

/** Ends the login. Whoever comes next in this tab gets another document, without anything of this queue in it, in its
    memory or in its address; until the server has sent that there is none. */
function forget(why = "") {
  login = null;
  isLeaving = true;
  for (const kind of ["session", "local"]) kept.remove(kind, KEPT);
  stream.stop();
  refresher.stop();
  if (why) kept.set("session", REASON, why);
  history.replaceState(null, "", location.pathname + location.search);
  document.title = "Labtasker";
  document.body.replaceChildren();
  location.replace(location.href);
}

/** The server's events: that something has changed, and whether it is there. Resumes where it was cut off. */
const stream = {
  last: null, stopper: null, failures: 0, since: null, timer: null, clock: null, heardAt: 0, retryAt: 0,

  start() {
    if (this.stopper || !login || document.hidden) return;
    clearTimeout(this.timer);
    clearInterval(this.clock);
    this.clock = setInterval(() => this.watch(), 1000);
    const stopper = this.stopper = new AbortController();
    this.listen(stopper).catch(() => { if (stopper === this.stopper) this.lost(); });
  },

  stop() {
    clearTimeout(this.timer);
    clearInterval(this.clock);
    if (this.stopper) this.stopper.abort();
    this.stopper = null;
  },

  async listen(stopper) {
    const headers = {"Authorization": login.authorization, "Accept": "text/event-stream"};
    if (this.last) headers["Last-Event-ID"] = this.last;
    this.heardAt = Date.now();
    const answer = await fetch(`${ME}/events`, {headers, signal: stopper.signal, credentials: "omit",
        cache: "no-store"});
    if (answer.status === 401) return forget("The queue is gone, or its password is another now.");
    if (!answer.ok) throw new Refused(answer.status, "");
    this.there();
    const reader = answer.body.getReader(), decoder = new TextDecoder();
    for (let rest = "";;) {
      const {value, done} = await reader.read();
      if (stopper !== this.stopper) return;
      if (done) throw new Away("the stream ended");
      this.heardAt = Date.now();
      rest = this.take(rest + decoder.decode(value, {stream: true}));
    }
  },

  /** Notes what came, and returns what is not whole yet. The events' data is not read: views ask for what they show. */
  take(text) {
    const end = text.lastIndexOf("\n\n") + 2;
    if (end < 2) return text;
    const whole = text.slice(0, end), ids = whole.match(/^id: \d+\.\d+$/gm);
    if (ids) this.last = ids[ids.length - 1].slice(4);
    if (/^event: (event|too_old)$/m.test(whole)) refresher.stir();
    return text.slice(end);
  },

  there() {
    const wasAway = this.since !== null;
    this.failures = 0;
    this.since = null;
    showConnection();
    if (wasAway) announce("The server is back.");
    refresher.stir();
  },

  lost() {
    this.stop();
    if (!login) return;
    this.since = this.since || new Date();
    const wait = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
    if (this.failures === 2) announce("The server does not answer. What is shown may be old.");
    this.retryAt = Date.now() + wait;
    this.timer = setTimeout(() => this.start(), wait);
    this.clock = setInterval(() => this.watch(), 1000);
    showConnection();
  },

  /** Once a second: a connection that is silent for too long leads nowhere. */
  watch() {
    if (this.stopper && Date.now() - this.heardAt > SILENT_MS) this.lost();
    if (this.since) showConnection();
  },
};

function showConnection() {
  const away = stream.since !== null, place = $("connection");
  place.className = away ? "away" : "live";
  setText($("connection-text"), away ? "Away" : "Live");
  $("away").hidden = !away || stream.failures < 2;
  if (!away) return;
  const wait = Math.max(0, Math.ceil((stream.retryAt - Date.now()) / 1000));
  setText($("away-text"), `No answer from the server since ${moment(stream.since)}. What is shown is from then.`);
  setText($("away-wait"), wait ? `Next attempt in ${wait} s` : "Trying");
}

// 4. Address ##################################################################

const DEFAULTS = {view: "tasks", filter: "", status: "", sort: "created_at", way: "-1", page: "1", columns: "",
  task: "", run: "", x: "", y: "", colour: "", logx: "", logy: "", gx: "", gy: "", metric: "", how: "mean",
  curve: "", best: "", clogx: "", clogy: "", by: "", of: "", mode: "", tsort: "", tway: "",
  axes: "", brush: ""};
let at = {...DEFAULTS};

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  at = {...DEFAULTS};
  for (const [key, value] of given) if (Object.hasOwn(DEFAULTS, key)) at[key] = value;
  if (!Object.hasOwn(VIEWS, at.view)) at.view = "tasks";
  if (!(Number.isSafeInteger(Number(at.page)) && at.page >= 1)) at.page = "1";
}

/** The address of what is looked at, with changes. */
function address(changes) {
  const asked = new URLSearchParams();
  for (const [key, value] of Object.entries({...at, ...changes})) {
    if (value !== DEFAULTS[key]) asked.set(key, value);
  }
  return "#" + (asked.toString() || "view=tasks");
}

/** The address of those of the matching tasks that meet conditions too. */
function addressOfThose(conditions, changes = {}) {
  const condition = conditions.join(" and "), filter = at.filter ? `(${at.filter}) and ${condition}` : condition;
  return address({view: "tasks", task: "", run: "", page: "1", filter, ...changes});
}

function go(changes, {replace = false} = {}) {
  const target = address(changes);
  if (replace) history.replaceState(null, "", target);
  else if (target !== location.hash) history.pushState(null, "", target);
  arrive();
}

/** Shows what the address says. */
function arrive() {
  const before = at;
  readAddress();
  if (!login) return;
  for (const name of Object.keys(VIEWS)) {
    $(name).hidden = name !== at.view;
    const link = $(`to-${name}`);
    link.href = address({view: name, task: "", run: ""});
    if (name === at.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("filter-form").hidden = at.view === "workers";
  if (document.activeElement !== $("filter")) $("filter").value = at.filter;
  $("filter-clear").hidden = !$("filter").value;
  hideTip();
  if (before.view !== at.view) announce(`${VIEWS[at.view].title} shown`);
  if (VIEWS[at.view].arrive) VIEWS[at.view].arrive(before);
  refresher.now();
}

// 5. Frame ####################################################################

const STATES = ["pending", "running", "success", "failed", "cancelled"];
const MOST_OFTEN_MS = 500;  // between two looks, and three times what the last one took
const GLANCE_MS = 1500;  // between glances while nothing happens
const IDLE_MS = 15000;  // between looks then: rates and durations go on

let fields = [], numeric = new Set();  // dotted paths that tasks have, and those of numbers
let latest = null;  // the last answer of the server to the view

/** Says something to who listens to the page. */
function announce(text) {
  $("said").textContent = "";
  setTimeout(() => { if (login) $("said").textContent = text; }, 50);
}

/** Asks the server for what is shown: at once when a person did something, at most twice a second when events come.
    Not all that others change is an event: a glance every now and then asks whether anything was written. */
const refresher = {
  timer: null, running: null, isStale: true, readyAt: 0, dueAt: 0, mark: null, failures: 0,

  now() {
    if (this.running) this.running.abort();
    this.isStale = true;
    this.run();
  },

  stir() {
    this.isStale = true;
    if (!this.running && login && !document.hidden) this.runIn(this.readyAt - Date.now());
  },

  stop() {
    clearTimeout(this.timer);
    if (this.running) this.running.abort();
    this.running = null;
  },

  runIn(wait) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.run(), Math.max(0, wait));
  },

  async run() {
    clearTimeout(this.timer);
    const stopper = this.running = new AbortController(), {signal} = stopper;
    let wait = GLANCE_MS;
    try {
      if (this.isStale || Date.now() >= this.dueAt || await this.glance(signal)) await this.look(signal);
      if (stopper !== this.running) return;
      this.failures = 0;
    } catch (error) {
      if (stopper !== this.running || error.name === "AbortError") return;
      wait = this.failed(error);
    }
    if (!login) return;
    this.running = null;
    const untilReady = this.readyAt - Date.now();
    if (!document.hidden) this.runIn(this.isStale ? untilReady : Math.max(wait, untilReady));
  },

  /** Returns whether anything was written since the last glance: one before a look, so that nothing is missed. */
  async glance(signal) {
    const {mark} = await ask("GET", `${ME}/mark`, undefined, {signal}), isOther = mark !== this.mark;
    this.mark = mark;
    return isOther;
  },

  async look(signal) {
    const began = Date.now();
    this.isStale = false;
    this.dueAt = 0;
    try {
      await VIEWS[at.view].load(signal);
      if (!signal.aborted) this.dueAt = Date.now() + IDLE_MS;
    } finally {
      this.readyAt = Date.now() + Math.max(MOST_OFTEN_MS, 3 * (Date.now() - began));
    }
  },

  /** Shows what went wrong; returns when to try again, in ms. */
  failed(error) {
    if (error instanceof Refused && error.status === 400 && at.filter) showFilterError(error.message);
    else if (error instanceof Refused && error.status < 500) {
      if (!this.failures) notify(error.message);
    } else if (!(error instanceof Away || error instanceof Refused)) console.error(error);
    return RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
  },
};

/** Shows what every view's answer tells: counts and rate of the tasks that the filter matches, and fields. */
function showOverview(answer) {
  latest = answer;
  fields = Object.keys(answer.fields);
  numeric = new Set(fields.filter((name) => answer.fields[name]));
  const {counts, pace: {per_s: perSecond, eta_s: eta}, queue: {paused}} = answer;
  const total = sum(counts), done = total - (counts.pending || 0) - (counts.running || 0);
  $("states").style.setProperty("--digits", `${grouped(sum(answer.queue.counts)).length}ch`);
  for (const button of $("states").children) {
    const state = button.dataset.state;
    setText(button.querySelector("b"), grouped(state ? counts[state] || 0 : total));
    button.setAttribute("aria-pressed", String(at.status === state));
  }
  const share = total ? Math.floor(100 * done / total) : 0;
  setText($("done"), total ? `${share}%` : "–");
  setText($("rate"), counts.running ? rate(perSecond) : "–");
  setText($("eta"), paused ? "paused" : eta === null ? "–" : span(eta));
  $("pause").hidden = false;
  setText($("pause"), paused ? "Resume" : "Pause");
  $("bar").style.background = barOf(counts, total);
  $("bar").setAttribute("aria-label", `${done} of ${total} done: ` +
    STATES.map((state) => `${counts[state] || 0} ${state}`).join(", "));
  document.title = `${total ? `${share}% · ` : ""}${login.queue} · Labtasker`;
  clearFilterError();
}

/** Pauses the queue, or lets it go on. */
async function switchPause() {
  const paused = !latest.queue.paused;
  try {
    await ask("PUT", ME, {paused});
    notify(paused ? "The queue is paused: no task is given out." : "The queue goes on.");
    refresher.now();
  } catch (error) {
    complain(error);
  }
}

/** The bar: how much of the whole has which status, in colours. */
function barOf(counts, total) {
  let from = 0;
  const parts = ["success", "failed", "cancelled", "running"].map((state) => {
    const to = from + (total ? 100 * (counts[state] || 0) / total : 0), part = `var(--${state}) ${from}% ${to}%`;
    from = to;
    return part;
  });
  return `linear-gradient(to right, ${parts.join(", ")}, var(--line) ${from}%)`;
}

/** What a view asks for: the tasks that the filter and the status leave. */
const matching = () => ({status: at.status || null, extra_filter: at.filter || null});

const sum = (counts) => Object.values(counts).reduce((one, other) => one + other, 0);

/** Asks what fields tasks have, where that is not known yet. */
async function knowFields(signal) {
  if (!fields.length) showOverview(await view({limit: 0}, {signal}));
}

function makeStates() {
  const press = (state) => go({status: at.status === state ? "" : state, page: "1", view: "tasks", task: ""});
  fill($("states"), ["", ...STATES].map((state) => el("button", {type: "button", class: state, "data-state": state,
    "aria-pressed": "false", click: () => press(state)}, state ? el("span", {class: "dot"}) : null,
  state ? capital(state) : "All", " ", el("b", {}, "0"))));
}

/** The filter's error with the place marked: the server sends the text and a caret below it. */
function showFilterError(detail) {
  const [message, line, mark] = detail.split("\n");
  const column = mark === undefined ? -1 : mark.indexOf("^");
  const children = [el("span", {}, message)];
  if (column >= 0) {
    const shown = line.slice(2) || "", place = column - 2;
    children.push(el("pre", {}, shown, "\n", " ".repeat(place), el("mark", {}, "^")));
    const input = $("filter"), begin = Math.max(0, input.value.indexOf(shown.trimEnd())) + place;
    if (document.activeElement === input) input.setSelectionRange(begin, begin);
  }
  fill($("filter-error"), children);
  $("filter-error").hidden = false;
  $("filter").setAttribute("aria-invalid", "true");
}

function clearFilterError() {
  $("filter-error").hidden = true;
  $("filter").removeAttribute("aria-invalid");
}

// 6. Dialogs ##################################################################

const TOAST_MS = 20000;

/** Opens the dialog with a form; resolves to the value of the button that closed it, "" when it was left. */
function openDialog(title, children, buttons) {
  const dialog = $("dialog");
  return new Promise((resolve) => {
    const form = el("form", {method: "dialog"}, el("h2", {id: "dialog-title"}, title), children,
      el("div", {class: "buttons"}, buttons));
    fill(dialog, form);
    dialog.returnValue = "";
    dialog.onclose = () => resolve(dialog.returnValue);
    dialog.showModal();
  });
}

const closing = (text, value, more = {}) => el("button", {type: "submit", value, ...more}, text);
const leaving = (text = "Cancel") => el("button", {type: "button", click: () => $("dialog").close("")}, text);

/** Shows a notification, which may have a button; it goes by itself, but not under a pointer or the focus. */
function notify(text, button = null, action = null) {
  const toast = el("div", {class: "toast"}, el("span", {dir: "auto"}, text));
  let timer = null;
  const stay = () => clearTimeout(timer);
  const wait = () => { stay(); timer = setTimeout(() => toast.remove(), TOAST_MS); };
  if (button) {
    toast.append(el("button", {type: "button", "data-undo": true, click: () => { toast.remove(); action(); }},
        button));
  }
  toast.append(el("button", {type: "button", "aria-label": "Dismiss", click: () => toast.remove()}, "×"));
  toast.addEventListener("pointerenter", stay);
  toast.addEventListener("pointerleave", wait);
  toast.addEventListener("focusin", stay);
  toast.addEventListener("focusout", wait);
  $("toasts").append(toast);
  while ($("toasts").children.length > 3) $("toasts").firstElementChild.remove();
  announce(text);
  wait();
}

function showTip(text, left, top) {
  const {width, height} = fillTip(text);
  moveTip(Math.min(left + 12, innerWidth - width - 4), top + 16 + height > innerHeight ? top - height - 10 : top + 14);
}

/** Shows the tip beside a box: at its right or left, else below or above it; never over it where there is room. */
function showTipBeside(text, box) {
  const {width, height} = fillTip(text), middle = box.top + (box.height - height) / 2;
  const side = box.right + 8 + width < innerWidth ? box.right + 8 : box.left - 8 - width;
  if (side >= 4) moveTip(side, Math.min(middle, innerHeight - height - 4));
  else {
    moveTip(Math.min(box.left, innerWidth - width - 4), box.bottom + 8 + height < innerHeight ? box.bottom + 8
      : box.top - 8 - height);
  }
}

function fillTip(text) {
  setText($("tip"), text);
  $("tip").hidden = false;
  return $("tip").getBoundingClientRect();
}

function moveTip(left, top) {
  Object.assign($("tip").style, {left: `${Math.max(4, left)}px`, top: `${Math.max(4, top)}px`});
}

const hideTip = () => { $("tip").hidden = true; };

async function showHelp() {
  const rows = KEYS.map(([key, what]) => [el("dt", {}, key.split(" ").map((one) => el("kbd", {}, one))),
      el("dd", {}, what)]);
  await openDialog("Keyboard shortcuts", el("dl", {class: "facts"}, rows), [closing("Close", "")]);
}

/** Asks for some of the offered fields, in their order; resolves to their names, null where it was left, "" for what
    was there at first. */
async function askFields(title, offered, chosen) {
  const boxes = [...new Set([...chosen, ...offered])].map((field) => el("label", {class: "tick"},
    el("input", {type: "checkbox", value: field, checked: chosen.includes(field)}),
    el("bdi", {}, own(NAMES, field) || field)));
  const list = el("fieldset", {class: "choices"}, el("legend", {class: "sr"}, title), boxes);
  const answer = await openDialog(title, [list],
    [leaving(), closing("Reset", "reset"), closing("Apply", "show", {class: "main"})]);
  const names = boxes.map((label) => label.firstElementChild).filter((box) => box.checked).map((box) => box.value);
  return answer === "reset" ? "" : answer === "show" ? names.join(",") : null;
}

async function chooseColumns() {
  const columns = columnsShown();
  const offered = [...new Set([...columns, ...Object.keys(NAMES), ...fields])];
  const boxes = offered.map((field) => el("label", {class: "tick"},
    el("input", {type: "checkbox", value: field, checked: columns.includes(field)}),
    el("bdi", {}, own(NAMES, field) || field)));
  const other = el("input", {id: "other-columns", autocapitalize: "none", spellcheck: "false",
      placeholder: "args.opt.lr, summary.acc"});
  const list = el("fieldset", {class: "choices"}, el("legend", {class: "sr"}, "Columns"), boxes);
  const answer = await openDialog("Columns", [list, el("label", {for: "other-columns"}, "Others "), other],
    [leaving(), closing("Reset", "reset", {formnovalidate: true}), closing("Apply", "show", {class: "main"})]);
  if (answer === "reset") go({columns: ""});
  if (answer !== "show") return;
  const more = other.value.split(",").map((name) => name.trim()).filter(Boolean);
  const names = boxes.map((label) => label.firstElementChild).filter((box) => box.checked).map((box) => box.value);
  go({columns: [...new Set([...names, ...more])].join(",")});
}

// 7. Actions ##################################################################

const MOST_CHOSEN = 10000;  // tasks in one transaction of the server
const AT_ONCE = 6;  // deletions under way

const chosen = new Set();  // ids of the tasks that are ticked

/** Returns [{id, status, priority}] of tasks as they are now; those that are gone are not among them. */
async function statesOf(ids) {
  const answer = await view({extra_filter: {task_id: {$in: ids}}, columns: ["priority", "task_name"],
      limit: MOST_CHOSEN});
  return answer.rows.map(([id, status, priority, name]) => ({id, status, priority, name}));
}

const update = (tasks, changes, reset = false) => tasks.length ? ask("PUT", `${ME}/tasks?reset_pending=${reset}`,
  tasks.map((task) => ({task_id: task.id, ...(typeof changes === "function" ? changes(task) : changes)}))) : null;

const tally = (tasks) => STATES.map((state) => [tasks.filter((task) => task.status === state).length, state])
  .filter(([number]) => number).map(([number, state]) => `${grouped(number)} ${state}`).join(", ");

/** Puts tasks back that are still as an action left them; says what of it could not be done. */
async function undo(tasks, isStill, back) {
  const before = new Map(tasks.map((task) => [task.id, task]));
  const now = (await statesOf([...before.keys()])).filter((task) => isStill(task));
  await back(now.map((task) => before.get(task.id)));
  const moved = tasks.length - now.length;
  notify(`Undone for ${many(now.length, "task")}.` + (moved
      ? ` ${grouped(moved)} went on meanwhile and stayed as they are.` : ""));
}

const is = (...states) => (task) => states.includes(task.status);

// What can be done to tasks: on which, what is asked before, how it is done, and undone where that is possible.
const ACTIONS = {
  cancel: {
    title: "Cancel", applies: is("pending", "running"), none: "Only pending and running tasks can be cancelled.",
    words: (tasks) => tasks.some(is("running")) ? "What runs is stopped." : "Cancelled tasks are not run.",
    run: (tasks) => update(tasks, {status: "cancelled"}), done: () => "cancelled",
    undo: (tasks) => undo(tasks, is("cancelled"), (left) => update(left, {status: "pending"})),
    back: (tasks) => tasks.some(is("running")) ? "Undo (pending again)" : "Undo",
  },
  retry: {
    title: "Retry", applies: is("failed", "cancelled", "success"), none: "Only tasks that are over can be run again.",
    words: (tasks) => "Pending again, with retries at 0." + (tasks.some(is("success"))
        ? " A new run replaces what was reported." : ""),
    run: (tasks) => update(tasks, {}, true), done: () => "pending again",
    undo: (tasks) => undo(tasks, is("pending"), (left) => update(left, {status: "cancelled"})),
    back: (tasks) => tasks.every(is("cancelled")) ? "Undo" : "Cancel them",
  },
  priority: {
    title: "Set the priority of", applies: () => true, none: "",
    words: () => "Tasks of higher priority are run first.",
    run: (tasks, value) => update(tasks, {priority: value}), done: (value) => `now of priority ${value}`,
    undo: (tasks) => undo(tasks, () => true, (left) => update(left, (task) => ({priority: task.priority}))),
    back: () => "Undo",
  },
  delete: {
    title: "Delete", applies: () => true, none: "",
    words: (tasks) => "What was reported goes too. This can't be undone."
        + (tasks.some(is("running")) ? " What runs is stopped." : ""),
    run: deleteEach, done: () => "deleted",
  },
};

/** Deletes tasks one by one; where that fails, says how far it came. */
async function deleteEach(tasks) {
  const left = [...tasks];
  let gone = 0;
  const work = async () => {
    while (left.length) {
      const task = left.pop();
      try {
        await ask("DELETE", `${ME}/tasks/${task.id}`);
      } catch (error) {
        if (error.status !== 404) throw new Refused(error.status || 0,
            `${grouped(gone)} of ${many(tasks.length, "task")} deleted, then: ${error.message}`);
      }
      gone += 1;
      chosen.delete(task.id);
    }
  };
  await Promise.all(Array.from({length: AT_ONCE}, work));
}

/** Asks whether to do something to the tasks with these ids, does it, offers to undo it. */
async function act(name, ids) {
  const action = ACTIONS[name];
  try {
    const all = await statesOf(ids), tasks = all.filter(action.applies);
    if (!tasks.length) return notify(all.length ? action.none : "These tasks are gone.");
    const value = await (name === "priority" ? askPriority(tasks) : askFirst(name, tasks, all.length - tasks.length));
    if (value === null) return;
    await action.run(tasks, value);
    const text = `${many(tasks.length, "task")} ${action.done(value)}.`;
    if (action.undo) notify(text, action.back(tasks), () => action.undo(tasks).catch(complain));
    else notify(text);
    if (name === "delete" && ids.includes(at.task)) go({task: "", run: ""});
  } catch (error) {
    complain(error);
  }
  refresher.now();
}

function complain(error) {
  notify(error instanceof Away ? "The server does not answer: nothing is known to have been changed."
      : error.message);
}

/** Resolves to true or null. */
async function askFirst(name, tasks, others) {
  const action = ACTIONS[name], count = String(tasks.length), isGrave = name === "delete" && tasks.length > 1;
  const typed = el("input", {id: "typed", inputmode: "numeric", autocomplete: "off", required: true, pattern: count});
  const answer = await openDialog(`${action.title} ${many(tasks.length, "task")}?`, [
    el("p", {}, tasks.length === 1 ? el("bdi", {}, nameOf(tasks[0]), ` is ${tasks[0].status}. `)
        : `${tally(tasks)}. `,
      action.words(tasks),
      others ? ` ${many(others, "other")} of those selected can't be, and stay as they are.` : ""),
    isGrave ? el("label", {for: "typed"}, `Type ${count} to confirm `, typed) : null],
  [leaving("Back"), closing(`${action.title} ${many(tasks.length, "task")}`, "yes",
      {class: name === "retry" ? "main" : "danger"})]);
  return answer === "yes" && (!isGrave || typed.value.trim() === count) ? true : null;
}

/** Resolves to a priority or null. */
async function askPriority(tasks) {
  const values = [...new Set(tasks.map((task) => task.priority))];
  const input = el("input", {id: "new-priority", type: "number", step: "1", required: true, value: values[0]});
  const answer = await openDialog(`Set the priority of ${many(tasks.length, "task")}`, [
    el("p", {}, ACTIONS.priority.words(), values.length > 1
        ? ` Now they are from ${Math.min(...values)} to ${Math.max(...values)}.` : ""),
    el("label", {for: "new-priority"}, "Priority ", input)],
        [leaving(), closing("Set priority", "yes", {class: "main"})]);
  return answer === "yes" && input.value !== "" ? Number(input.value) : null;
}

const nameOf = (task) => task.name || task.id.slice(0, 8);

// 8. Tasks ####################################################################

const PAGE_SIZE = 100;
const ROWS_A_FRAME = 16;
const WIDTHS = {status: 7.4, task_name: 12, error: 22, created_at: 8.2, last_modified: 8.2,
  start_time: 8.2, last_heartbeat: 8.2, duration: 6.5, priority: 5.2, retries: 5.2, task_id: 20, worker_id: 20,
  host: 9, cmd: 18};
const NARROW = {...WIDTHS, task_name: 8.5, error: 12};  // on a phone
const SHORT_ID = 7;  // the width of eight letters of an id
const PICK = 2.6;
const TIMES = new Set(["created_at", "last_modified", "start_time", "last_heartbeat"]);

let choice = null;  // the server's: columns, the most telling first, what is the same in all, and for what it was made
let announceFound = false;  // after a filter, how many tasks it found

const isNarrow = () => matchMedia("(max-width: 50rem)").matches;

/** Takes the server's choice of columns. One that only lacks some of those before changes nothing: columns stay while
    one looks. */
function settle(found) {
  const key = JSON.stringify([at.filter, at.status, at.sort]);
  const isOther = !choice || choice.key !== key || found.columns.some((name) => !choice.columns.includes(name));
  choice = isOther ? {...found, key} : {...choice, same: found.same};
}

/** The columns that have a place: the most telling first, and those of `kept` in any case. The rule of `task ls`. */
function fitting(telling, widthIn, room, kept) {
  const found = [];
  for (const name of telling) {
    const width = widthIn(name);
    if (width > room && !kept.includes(name) && found.length) continue;
    found.push(name);
    room -= width;
  }
  return found;
}

/** How many rem of columns have a place in the table. */
function roomForColumns() {
  const style = getComputedStyle(document.documentElement), main = getComputedStyle($("main"));
  const width = $("main").clientWidth - parseFloat(main.paddingLeft) - parseFloat(main.paddingRight) - 20;
  return width / parseFloat(style.fontSize) / parseFloat(style.getPropertyValue("--stretch")) - PICK;
}

/** The columns that are shown: those chosen, else what tells tasks apart, as many as have a place. On a phone the
    result stands first, and the error of tasks that all failed. */
function columnsShown() {
  if (at.columns) return at.columns.split(",");
  if (!choice) return [];
  const link = choice.columns.includes("task_name") ? "task_name" : "task_id";
  const results = choice.columns.filter((name) => name.startsWith("summary.") || name === "error");
  const error = choice.same.status === "failed" && results.includes("error") ? ["error"] : [];
  const first = isNarrow() ? [...error, ...results].slice(0, 1) : [];
  const isSorted = choice.columns.includes(at.sort) && at.sort !== "created_at" && at.sort !== link;
  const kept = [...new Set([...first, ...error, ...(isSorted ? [at.sort] : [])])];
  const found = fitting([...kept, ...choice.telling.filter((name) => name !== link && !kept.includes(name))],
      (name) => widthOf(name, false), roomForColumns() - widthOf(link, false), kept);
  return [...first, link, ...choice.columns.filter((name) => found.includes(name) && !first.includes(name))];
}

/** Which column leads to the task. */
const linkIn = (columns) => ["task_name", "task_id", columns[0]].find((name) => columns.includes(name));

async function loadTasks(signal) {
  const page = Number(at.page), look = (columns) => view({columns: [...columns, "task_name"], limit: PAGE_SIZE,
    offset: (page - 1) * PAGE_SIZE, sort: [[at.sort, Number(at.way)]], choose: true, ...matching()}, {signal});
  let columns = columnsShown();
  let [answer] = await Promise.all([look(columns), at.task ? loadTask(signal) : null]);
  settle(answer.chosen);
  if (columns.join() !== columnsShown().join()) answer = await look(columns = columnsShown());
  showOverview(answer);
  const pages = Math.max(1, Math.ceil(answer.found / PAGE_SIZE));
  if (page > pages) return go({page: String(pages)}, {replace: true});
  showTable(columns, answer);
}

/** Is a column one of numbers, so that it stands at the right: are most of its values? */
function areNumbers(values) {
  const there = values.filter((value) => value !== null && value !== undefined);
  const numbers = there.filter((value) => typeof value === "number" || /^(NaN|-?Infinity|-?\d{16,})$/.test(value));
  return numbers.length > there.length / 2;
}

const LOW_IS_GOOD = new RegExp("loss|error|perplexity|time|second|memory|latency|"
  + "(?:^|[^a-z])(?:r?mse|mae|mape|err|ppl|nll|fid|kid|wer|cer|eer|bp[bc])(?:[^a-z]|$)", "i");

/** The order in which a field is sorted at first: results of which a low one is good from the lowest on. */
const firstWay = (field) => (field.startsWith("summary.") && LOW_IS_GOOD.test(field) ? "1" : "-1");

/** Returns {value, word} of the tasks that win: the first of those sorted by a result, unless its worst come first. */
function winnerOf(columns, {rows}) {
  const index = columns.indexOf(at.sort), numbers = rows.map((row) => row[index + 2]).filter(Number.isFinite);
  const isFirstPage = at.sort.startsWith("summary.") && at.page === "1";
  if (!isFirstPage || numbers.every((number) => number === numbers[0])) return null;
  if (at.way === "1") return {value: numbers[0], word: "lowest"};
  return firstWay(at.sort) === "1" ? null : {value: numbers[0], word: "highest"};
}

/** A column's width in rem: by what it is, else by the letters of its head and its cells. */
function widthOf(name, isNumber) {
  const letters = choice && own(choice.letters, name), less = isNarrow() ? 0.5 : 0;
  if (name.endsWith("_id") && !at.columns) return SHORT_ID - 2 * less;
  if (own(WIDTHS, name)) return (isNarrow() ? NARROW : WIDTHS)[name] - less;
  if (!letters) return isNumber ? 7 : 9.5;
  const [arrow, star] = name === at.sort ? [2, 3.5] : [0, 0];  // beside the head; beside the winner, which is bold
  const widest = Math.max(0.57 * (letters + star), 0.62 * (titleOf(name).length + arrow));
  return Math.min(20, Math.max(4, 1.5 + widest)) - less;
}

/** Shows what is the same in all tasks, but for what has a column. */
function showSame(columns) {
  const pairs = Object.entries(choice.same).filter(([name]) => !columns.includes(name));
  const text = JSON.stringify(pairs);
  if ($("same").dataset.text === text) return;
  $("same").dataset.text = text;
  fill($("same"), pairs.length ? "Same in all: " : "", pairs.map(([name, value]) => [" ", el("span", {},
    `${(own(NAMES, name) || "").toLowerCase() || titleOf(name)}=`,
    el("b", {}, el("bdi", {}, shortValue(value))))]));
}

/** Sets the head of the table of tasks. What of it had the focus has it again: sorting may change the columns. Rows of
    other columns go, so that not all are laid out anew at once, unless one has the focus. */
function setTaskHead(heads) {
  const focused = document.activeElement, before = focused.closest("#table thead th"), body = $("table").tBodies[0];
  if (setHead($("table"), heads, headCell) && !body.contains(focused)) fill(body);
  if (!before || before.isConnected) return;
  const again = [...$("table").tHead.rows[0].cells].find((cell) => cell.dataset.field === before.dataset.field);
  if (again && again.querySelector("button, input")) again.querySelector("button, input").focus();
}

function showTable(columns, answer) {
  const isNumber = columns.map((name, index) => name === "duration" || numeric.has(name)
    || areNumbers(answer.rows.map((row) => row[index + 2])));
  const heads = columns.map((name, index) => [name, isNumber[index] ? "number" : "", widthOf(name, isNumber[index])]);
  const takesRest = !at.columns && heads.find(([name]) => name === "error");  // its lines are long
  if (takesRest) takesRest[2] = null;
  setTaskHead([["", "pick", PICK], ...heads, ["rest", "rest", takesRest ? 0.01 : null]]);
  showSame(columns);
  for (const cell of $("table").tHead.rows[0].cells) {
    if (cell.dataset.field === at.sort) cell.setAttribute("aria-sort", at.way === "1" ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  }
  const winner = winnerOf(columns, answer);
  syncInFrames($("table").tBodies[0], answer.rows, (row) => row[0], makeRow,
      (node, row) => fillRow(node, row, columns, isNumber, winner), ROWS_A_FRAME, () => showRange(answer));
}

/** Shows what of the tasks the table has, once its rows are there. */
function showRange(answer) {
  const first = (Number(at.page) - 1) * PAGE_SIZE;
  setText($("range"), answer.found
      ? `${grouped(first + 1)}–${grouped(first + answer.rows.length)} of ${grouped(answer.found)}` : "0 tasks");
  $("previous").disabled = at.page === "1";
  $("next").disabled = first + PAGE_SIZE >= answer.found;
  $("empty").hidden = answer.rows.length > 0;
  setText($("empty"), sum(answer.queue.counts) ? "No task matches."
      : "No tasks yet. labtasker task submit -- --lr=0.1 submits one.");
  showSelection(answer);
  if (announceFound) {
    announceFound = false;
    announce(`${many(answer.found, "task")} found`);
  }
}

function headCell([name, kind]) {
  if (kind === "rest") return el("td");
  if (!name) {
    return el("th", {scope: "col", class: kind}, el("input",
        {type: "checkbox", id: "pick-all", "aria-label": "Select all on this page",
      change: (event) => pickAll(event.target.checked)}));
  }
  return el("th", {scope: "col", class: kind, "data-field": name}, el("button", {type: "button", title: name,
    click: () => go({sort: name, way: at.sort === name ? String(-at.way) : firstWay(name), page: "1"})},
  titleOf(name)));
}

function makeRow([id]) {
  const box = el("input", {type: "checkbox", change: () => { pick(id, box.checked); showSelection(latest); }});
  return el("tr", {}, el("td", {class: "pick"}, el("label", {}, box)));
}

function fillRow(node, row, columns, isNumber, winner) {
  const [id, status] = row, name = row[row.length - 1] || id.slice(0, 8);
  const box = node.cells[0].querySelector("input");
  box.checked = chosen.has(id);
  if (box.getAttribute("aria-label") !== `Select ${name}`) box.setAttribute("aria-label", `Select ${name}`);
  node.classList.toggle("chosen", id === at.task);
  while (node.cells.length < columns.length + 2) node.insertCell();  // the last one takes what room is left
  while (node.cells.length > columns.length + 2) node.deleteCell(node.cells.length - 2);
  const link = linkIn(columns);
  columns.forEach((column, index) => {
    const cell = node.cells[index + 1], isLink = column === link;
    const best = winner && column === at.sort && row[index + 2] === winner.value ? winner.word : "";
    fillCell(cell, column, row[index + 2], {id, status, name, isLink, isNumber: isNumber[index], best});
  });
}

function fillCell(cell, column, value, {id, status, name, isLink, isNumber, best}) {
  const told = column === "task_name" ? oneLine(name) : TIMES.has(column) ? moment(value)
    : column === "duration" ? span(value) : shortValue(column.endsWith("_id") && !at.columns && value
      ? value.slice(0, 8) : value);
  const text = told || (isLink ? id.slice(0, 8) : "");
  const kind = column === "status" ? `status ${status}` : isNumber ? "number" : "";
  if (cell.className !== kind) cell.className = kind;
  if (cell.dataset.column !== column || cell.dataset.link !== String(isLink) || cell.dataset.best !== best) {
    Object.assign(cell.dataset, {column, link: isLink, best});
    const before = column === "status" ? el("span", {class: "dot"})
      : best ? el("span", {class: "winner", role: "img", "aria-label": best}) : null;
    fill(cell, before, isLink ? el("a", {}, el("bdi")) : el("bdi"));
  }
  setText(cell.querySelector("bdi"), text);
  if (isLink) cell.firstElementChild.href = address({task: id, run: ""});
  const title = TIMES.has(column) ? moment(value, "whole") : text && asText(value) !== text || text.length > 12
      ? asText(value) || text : "";
  if (cell.title !== title) cell.title = title;
}

function pick(id, isChosen) {
  if (isChosen) chosen.add(id);
  else chosen.delete(id);
}

/** Ticks what is chosen. */
function showChosen() {
  for (const row of $("table").tBodies[0].rows) {
    row.cells[0].querySelector("input").checked = chosen.has(row.dataset.key);
  }
  showSelection(latest);
}

function pickAll(isChosen) {
  for (const row of $("table").tBodies[0].rows) pick(row.dataset.key, isChosen);
  showChosen();
}

async function pickMatching() {
  const answer = await view({limit: MOST_CHOSEN, ...matching()});
  for (const [id] of answer.rows) chosen.add(id);
  if (answer.found > MOST_CHOSEN) {
    notify(`The ${grouped(MOST_CHOSEN)} that changed last are selected: no more go in one transaction.`);
  }
  showChosen();
}

function showSelection(answer) {
  const rows = [...$("table").tBodies[0].rows], here = rows.filter((row) => chosen.has(row.dataset.key)).length;
  setText($("selected"), chosen.size ? `${grouped(chosen.size)} selected` : "None selected");
  for (const button of $("selection").querySelectorAll("[data-action], #select-none")) button.disabled = !chosen.size;
  const hadFocus = $("selection").contains(document.activeElement);
  $("selection").classList.toggle("none", !chosen.size);
  if (hadFocus && !chosen.size) $("main").focus();
  const all = $("pick-all");
  if (all) {
    all.checked = rows.length > 0 && here === rows.length;
    all.indeterminate = here > 0 && here < rows.length;
  }
  $("select-all").hidden = !(all && all.checked && answer.found > rows.length && chosen.size < answer.found);
  setText($("select-all"), `Select all ${grouped(answer.found)}`);
}

// 9. Task #####################################################################

const LONG = 400;  // letters of a value that are shown before one asks for all
const MOST_ROWS = 200;  // values of a task that are shown before one asks for all

let shownLog = null;  // which run's log is shown, and how much of it
const drawn = new WeakMap();  // what a part of the task was drawn from

async function loadTask(signal) {
  let task = null;
  try {
    task = await ask("GET", `${ME}/tasks/${encodeURIComponent(at.task)}`, undefined, {signal});
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404)) throw error;
  }
  showTask(task);
  if (task) await loadLog(task, signal);
}

function arriveAtTasks(before) {
  $("task").hidden = !at.task;
  document.querySelector(".split").classList.toggle("with-task", Boolean(at.task));
  if (at.task === before.task) return;
  for (const row of $("table").tBodies[0].rows) row.classList.toggle("chosen", row.dataset.key === at.task);
  if (at.task) {
    fill($("task"), el("p", {class: "quiet"}, "Loading…"));
    $("task").focus();
    $("task").scrollTop = 0;
  } else if (before.task) {
    const row = [...$("table").tBodies[0].rows].find((one) => one.dataset.key === before.task);
    ((row && row.querySelector("a")) || $("main")).focus();
  }
}

const closeTask = () => go({task: "", run: ""});

/** Shows a task, or that it is gone (null). A part that tells the same as before stays as it is, with its focus. */
function showTask(task) {
  const focused = $("task").contains(document.activeElement) ? document.activeElement.id : "";
  sync($("task"), task ? partsOf(task) : partsOfNone(), ([name]) => name, () => el("div"), (node, [, told, make]) => {
    const text = JSON.stringify(told);
    if (drawn.get(node) === text) return;
    drawn.set(node, text);
    fill(node, make());
  });
  if (focused && $(focused) && document.activeElement !== $(focused)) $(focused).focus();
}

/** The parts of a task: [name, what it tells, function that makes its elements of that]. */
function partsOf(task) {
  const {args, summary, metadata, attempts: runs, ...rest} = task, attempts = runs || [];
  const title = task.task_name || task.task_id.slice(0, 8), hasRun = Boolean(task.start_time || attempts.length);
  return [["head", title, () => taskHead(title)], ["facts", [rest, foldersOf(attempts)],
    () => [taskButtons(task), taskFacts(task, foldersOf(attempts))]],
    ["error", summary, () => errorOf(summary)], ["args", args, () => valuesOf("Args", args)],
    ["summary", summary, () => valuesOf("Summary", reported(summary))],
    ["metadata", metadata, () => valuesOf("Metadata", metadata)],
    ["attempts", attempts.map((one) => [one, tookOf(one), address({run: one.run_id})]), () => attemptsOf(attempts)],
    ["log", hasRun, () => (hasRun ? logPlace() : null)]];
}

const partsOfNone = () => [["head", at.task, () => taskHead("Not there")],
  ["facts", at.task, () => el("p", {class: "facts"}, `There is no task ${at.task} in this queue: it was deleted.`)]];

const taskHead = (title) => [el("h2", {}, el("bdi", {}, title)), el("button", {type: "button", id: "close-task",
  "aria-label": "Close the task", title: "Close (Esc)", click: closeTask}, "×")];

function taskButtons(task) {
  const one = (name) => el("button", {type: "button", id: `task-${name}`, "data-one": name,
    disabled: !ACTIONS[name].applies(task), click: () => act(name, [task.task_id])}, `${capital(name)}…`);
  return el("div", {class: "buttons", role: "group", "aria-label": "This task"}, Object.keys(ACTIONS).map(one));
}

/** A list of [name, text or element]s; those without anything are left out. */
function facts(rows) {
  return el("dl", {class: "facts"}, rows.filter(([, value]) => value !== null && value !== "" && value !== undefined)
    .map(([name, value]) => [el("dt", {}, el("bdi", {}, oneLine(name))), el("dd", {}, value)]));
}

/** The folder in which the last run ran, if it was given one, and the folder that all runs share. */
function foldersOf(attempts) {
  const {workdir, log, task_dir: folder} = attempts[attempts.length - 1] || {};
  const shared = typeof log === "string" ? log.replace(/[^/\\]+[/\\]run\.log$/, "files") : asText(folder || "");
  return {workdir, shared};
}

function taskFacts(task, folders) {
  const time = (iso) => iso && moment(iso, "whole"), fixed = (text) => text && el("span", {class: "mono"}, text);
  const limits = [task.task_timeout && `${span(task.task_timeout)} for a run`,
    task.heartbeat_timeout && `${span(task.heartbeat_timeout)} of silence`];
  const command = Array.isArray(task.cmd) ? task.cmd.join(" ") : task.cmd;
  return facts([["Status", el("span", {class: task.status}, el("span", {class: "dot"}), ` ${task.status}`)],
    ["ID", fixed(task.task_id)], ["Created", time(task.created_at)], ["Started", time(task.start_time)],
    ["Changed", time(task.last_modified)],
    ["Last heard of", task.status === "running" ? time(task.last_heartbeat) : ""],
    ["Priority", String(task.priority)], ["Failed runs", `${task.retries} of ${task.max_retries}`],
    ["Interruptions", task.interruptions ? String(task.interruptions) : ""], ["Failure", task.failure],
    ["Reason", task.reason], ["After", waitsFor(task.after)], ["After the end of", waitsFor(task.after_any)],
    ["Worker", fixed(task.worker_id)], ["Commit", fixed(task.git)],
    ["Ran in", fixed(folders.workdir && asText(folders.workdir))], ["Folder of its runs", fixed(folders.shared)],
    ["Command", command && longText(command, "mono")], ["Time limits", limits.filter(Boolean).join(", ")]]);
}

/** Links to the tasks that one waits for. */
function waitsFor(ids) {
  if (!ids || !ids.length) return "";
  const more = ids.length > MOST_ROWS ? `and ${grouped(ids.length - MOST_ROWS)} more` : "";
  return el("span", {}, ...ids.slice(0, MOST_ROWS).flatMap((id) => [taskLink(id), " "]), more);
}

/** A summary without what is shown as the error. */
function reported(summary) {
  const {labtasker_exception: raised, labtasker_error: said, ...others} = summary;
  return others;
}

function errorOf(summary) {
  const {labtasker_exception: raised, labtasker_error: said} = summary, lines = [];
  if (said) lines.push(asText(said));
  if (raised && typeof raised === "object") {
    lines.push(raised.traceback ? asText(raised.traceback) : `${asText(raised.type)}: ${asText(raised.message)}`);
  } else if (raised) lines.push(asText(raised));
  if (!lines.length) return null;
  return [el("h3", {}, "Error"), el("pre", {class: "block", tabindex: "0", role: "region", "aria-label": "Error",
    dir: "auto"}, cut(lines.join("\n"), 20000))];
}

/** A text of any length: its begin, and a button for the rest. */
function longText(text, kind = "") {
  const shown = el("bdi", {class: `long ${kind}`}, cut(text, LONG));
  if (text.length <= LONG) return shown;
  const more = el("button", {type: "button", class: "plain", click: () => { setText(shown, text); more.remove(); }},
    `Show all (${bytes(text.length)})`);
  return el("span", {}, shown, " ", more);
}

function valuesOf(title, values) {
  const rows = [...leaves(values)];
  if (!rows.length) return null;
  const shown = (some) => facts(some.map(([name, value]) => [name, typeof value === "number" ? wholeNumber(value)
    : longText(asText(value), typeof value === "string" ? "" : "mono")]));
  const box = el("div", {}, shown(rows.slice(0, MOST_ROWS)));
  if (rows.length > MOST_ROWS) {
    box.append(el("button", {type: "button", class: "plain", click: () => fill(box, shown(rows))},
      `Show all ${grouped(rows.length)} values`));
  }
  return [el("h3", {}, title), box];
}

/** A table of its own that scrolls sideways where it has to. */
function tableBox(label, head, rows) {
  return el("div", {class: "table-box", tabindex: "0", role: "region", "aria-label": label},
    el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)));
}

function attemptsOf(attempts) {
  if (!attempts.length) return null;
  const titles = [["#", "number"], ["Status"], ["Started"], ["Took", "number"], ["Host"], ["Exit", "number"],
    ["Reason"], ["Log", "kept"]];
  const head = titles.map(([title, kind = ""]) => el("th", {scope: "col", class: kind}, title));
  return [el("h3", {}, "Attempts"), tableBox("Attempts", head, attempts.map(attemptRow).reverse())];
}

/** How long a run took, or takes by now, in words. */
const tookOf = (one) => one.start ? span((new Date(one.end || Date.now()) - new Date(one.start)) / 1000) : "";

function attemptRow(one, index) {
  const status = one.status || "running", reason = shortValue(one.reason);
  return el("tr", {}, el("td", {class: "number"}, String(index + 1)),
    el("td", {class: `status ${status}`}, el("span", {class: "dot"}), el("bdi", {}, shortValue(status))),
    el("td", {}, moment(one.start)), el("td", {class: "number"}, tookOf(one)),
    el("td", {}, el("bdi", {}, shortValue(one.host))), el("td", {class: "number"}, shortValue(one.exit_code)),
    el("td", {title: reason}, el("bdi", {}, reason)),
    el("td", {class: "kept"}, el("a", {id: `log-of-${index + 1}`, href: address({run: one.run_id}),
      "aria-label": `Log of attempt ${index + 1}`}, "Log")));
}

/** Where `loadLog` puts it. */
function logPlace() {
  shownLog = null;
  return [el("h3", {id: "log-title"}, "Log"), el("p", {id: "log-note", class: "quiet"}, "Loading…"),
    el("pre", {id: "log", class: "block", tabindex: "0", role: "region", "aria-labelledby": "log-title"})];
}

/** A terminal's output as text: without colours, and of a line that was written over, what stood there last. */
function plainLog(text) {
  return text.replace(/\u001b\[[0-9;?]*[ -/]*[@-~]|\u001b\][^\u0007\u001b]*(\u0007|\u001b\\)|\u001b./g, "")
    .replace(/\r+\n/g, "\n").replace(/^.*\r(?=[^\n])/gm, "")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "");
}

async function loadLog(task, signal) {
  if (!$("log")) return;
  const query = at.run ? `?run_id=${encodeURIComponent(at.run)}` : "";
  let found;
  try {
    found = await ask("GET", `${ME}/tasks/${task.task_id}/log${query}`, undefined, {signal});
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    found = {text: null, why: error.message};
  }
  const attempts = task.attempts || [];
  const number = attempts.findIndex((one) => one.run_id === found.run_id) + 1;
  const key = `${found.run_id} ${found.size} ${found.why} ${number} ${attempts.length}`;
  if (key === shownLog || !$("log")) return;
  shownLog = key;
  const log = $("log"), isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  const which = number ? `Attempt ${number} of ${attempts.length}` : "The last run";
  log.hidden = found.text === null;
  if (found.text === null) {
    setText($("log-note"), found.why
        || (found.path ? `${which} writes its log on ${found.host || "its worker's host"}, to ${found.path}. ` +
        "Its end comes here with the run's report." : `${which} left no log beside this server's store.`));
    return;
  }
  setText(log, plainLog(found.text));
  const isEnd = new TextEncoder().encode(found.text).length < found.size - 4;
  const share = `${isEnd ? "the end of " : ""}${bytes(found.size)}`;
  setText($("log-note"), `${which}, ${share}${found.host ? `, on ${found.host}` : ""}`);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

// 10. Drawings ################################################################

const MOST_POINTS = 2000;  // of a sample of the tasks that match: each is a link
const MOST_READ = 20000;  // that a grid is made of
const LOG_DECADES = 2;  // numbers that span more are drawn on a log scale unless one says otherwise
const LEAST_MS = 10000;  // times that are nearer to each other than that are drawn with as much around them
const MOST_BANDS = 60;
const LISTED = 500;  // rows of the table below a drawing

/** The number that a cell stands for, or null. */
function numberOf(cell) {
  return typeof cell === "number" && isFinite(cell) ? cell : typeof cell === "boolean" ? Number(cell) : null;
}

/** Values in order: numbers by size, then texts. */
function inOrder(values) {
  return [...new Set(values)].sort((one, other) => typeof one === typeof other
    ? (one < other ? -1 : one > other ? 1 : 0) : typeof one === "number" ? -1 : typeof other === "number" ? 1 : 0);
}

/** Round numbers from low to high, some `count` of them. */
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 2.5, 5, 10].find((factor) => factor * size >= rough * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

/** Round times of this zone from low to high, in ms. */
function timeTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), days = Math.ceil(rough / 864e5);
  const step = 1000 * ([1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200]
    .find((seconds) => 1000 * seconds >= rough) || 86400 * days);
  const offset = new Date(low).getTimezoneOffset() * 60000, ticks = [];
  for (let tick = Math.ceil((low - offset) / step) * step + offset; tick <= high; tick += step) ticks.push(tick);
  return ticks;
}

function logTicks(low, high, count) {
  const first = Math.ceil(Math.log10(low * 0.999)), last = Math.floor(Math.log10(high * 1.001)), ticks = [];
  const powers = last - first + 1, factors = 3 * powers <= Math.max(6, count) ? [1, 2, 5] : [1];
  const each = Math.max(1, Math.ceil(powers / Math.max(1, count)));
  for (let power = factors.length > 1 ? first - 1 : first; power <= last; power += each) {
    for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(3)));
  }
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

/** Returns {place(value), ticks: [[value, text]], log} that maps values to 0 to 1; texts get a band each. `wish`: is a
    log scale wanted ("1"), not wanted ("0"), or where it is apt (""); of times (in ms) there is none. */
function scaleOf(values, wish, count, areTimes = false) {
  const numbers = values.filter((value) => typeof value === "number");
  if (numbers.length < values.length) return bandScale(values);
  let low = Math.min(...numbers), high = Math.max(...numbers);
  const canLog = low > 0 && !areTimes, log = canLog && (wish ? wish === "1" : high / low >= 10 ** LOG_DECADES);
  if (areTimes && high - low < LEAST_MS) [low, high] = [low - LEAST_MS, high + LEAST_MS];
  else if (low === high) {
    const around = (Math.abs(low) || 1) / 2;
    [low, high] = log ? [low / 2, high * 2] : [low - around, high + around];
  }
  const [from, to] = log ? [Math.log10(low), Math.log10(high)] : [low, high], margin = (to - from) * 0.04;
  const begin = from - margin, size = to - from + 2 * margin;
  const ticks = log ? logTicks(10 ** begin, 10 ** (begin + size), count)
    : (areTimes ? timeTicks : linearTicks)(begin, begin + size, count);
  const form = ticks.every(isToday) ? "time" : "day", write = areTimes ? (tick) => moment(tick, form) : writerOf(ticks);
  return {log, canLog, place: (value) => ((log ? Math.log10(value) : value) - begin) / size,
    value: (share) => (log ? 10 ** (begin + share * size) : begin + share * size),
    ticks: ticks.map((tick) => [tick, write(tick)])};
}

function bandScale(values) {
  const shown = inOrder(values).slice(0, MOST_BANDS), isNumber = (value) => typeof value === "number";
  const places = new Map(shown.map((value, index) => [value, (index + 0.5) / shown.length]));
  const write = writerOf(shown.filter(isNumber));
  return {log: false, canLog: false, band: 1 / shown.length, place: (value) => places.get(value),
    ticks: shown.map((value) => [value, isNumber(value) ? write(value) : cut(shortValue(value), 16)])};
}

/** The axes of a drawing: lines, ticks, titles. */
function axes(box, scaleX, scaleY, titleX, titleY) {
  const {left, top, width, height, unit} = box, bottom = top + height, parts = [];
  const widest = Math.max(...scaleX.ticks.map(([, text]) => text.length));
  const everyX = Math.ceil(scaleX.ticks.length * (widest * 7 + 12) * unit / width);
  const everyY = Math.ceil(scaleY.ticks.length * 16 * unit / height);
  for (const [value, text] of scaleX.ticks.filter((tick, index) => index % everyX === 0)) {
    const x = left + width * scaleX.place(value);
    parts.push(svg("line", {class: "tick", x1: x, x2: x, y1: top, y2: bottom}),
      svg("text", {x, y: bottom + 17 * unit, "text-anchor": "middle"}, text));
  }
  for (const [value, text] of scaleY.ticks.filter((tick, index) => index % everyY === 0)) {
    const y = top + height * (1 - scaleY.place(value));
    parts.push(svg("line", {class: "tick", x1: left, x2: left + width, y1: y, y2: y}),
      svg("text", {x: left - 8 * unit, y: y + 4 * unit, "text-anchor": "end"}, text));
  }
  parts.push(svg("path", {class: "axis", fill: "none", d: `M${left} ${top}V${bottom}H${left + width}`}),
    svg("text", {class: "title", x: left + width / 2, y: bottom + 38 * unit, "text-anchor": "middle"}, titleX),
    svg("text", {class: "title", x: left, y: top - 10 * unit}, titleY));
  return svg("g", {"aria-hidden": "true"}, parts);
}

/** The room for a drawing: its element's size less that for ticks and titles. */
function roomIn(place, scaleY) {
  const {width, height} = place.getBoundingClientRect();
  const unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 14;  // what fits 14 px grows along
  const widest = Math.max(3, ...scaleY.ticks.map(([, text]) => text.length));
  const left = Math.min(width * 0.35, (20 + widest * 7.5) * unit);
  return {left, top: 26 * unit, width: Math.max(80, width - left - 18 * unit), height: Math.max(80, height - 74 * unit),
    unit, whole: {width, height}};
}

const walks = new WeakMap();  // a drawing's place: its group of links, and `next(index, key)`, which returns where to

/** Has a drawing's place listen for its links: one stop for Tab, from which arrows walk on, and a tip for each. A group
    within the drawing that listened would take the focus. */
function makeWalkable(place) {
  const tipAt = (link, x, y) => {
    const words = link.getAttribute("aria-label"), cell = link.querySelector(".cell");
    if (cell) showTipBeside(words, cell.getBoundingClientRect());
    else showTip(words, x, y);
  };
  const linkOf = (event) => event.target.closest("a");
  const on = (kind, action) => place.addEventListener(kind, (event) => { if (linkOf(event)) action(event); });
  on("focusin", (event) => {
    const link = linkOf(event), box = link.getBoundingClientRect();
    for (const stop of place.querySelectorAll("a[tabindex='0']")) stop.setAttribute("tabindex", "-1");
    link.setAttribute("tabindex", "0");
    tipAt(link, box.left + box.width / 2, box.top + box.height / 2);
  });
  on("focusout", hideTip);
  on("keydown", (event) => {
    const {group, next} = walks.get(place), links = [...group.querySelectorAll("a")];
    const to = links[next(links.indexOf(linkOf(event)), event.key)];
    if (!to) return;
    event.preventDefault();
    to.focus();
  });
  on("pointerover", (event) => tipAt(linkOf(event), event.clientX, event.clientY));
  on("pointerout", hideTip);
}

/** Sees to it that Tab leads to one of the links of a group. */
function keepStop(group) {
  const first = group.querySelector("a");
  if (first && !group.querySelector("a[tabindex='0']")) first.setAttribute("tabindex", "0");
}

/** Draws: axes and the like, then a group of links to walk through; the focus stays on the same one. `under` lies below
    all. */
function drawIn(place, room, title, parts, group, next, under = null) {
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const titleId = `${place.id}-title`;
  hideTip();
  for (const link of group.querySelectorAll("a")) link.setAttribute("tabindex", "-1");
  keepStop(group);
  walks.set(place, {group, next});
  fill(place, under, svg("svg", {viewBox: `0 0 ${room.whole.width} ${room.whole.height}`, role: "group",
    "aria-labelledby": titleId}, svg("title", {id: titleId}, title), parts, group));
  const again = focused && [...group.querySelectorAll("a")].find((link) => link.dataset.id === focused);
  if (again) again.focus();
}

/** A task in the data of a drawing: a link in its table. */
class Task {
  constructor({id, name}) {
    Object.assign(this, {id, name});
  }
}

const listed = new WeakMap();  // a drawing's table: its columns and rows, whether it is open or not

/** Fills the table below a drawing when it is opened. */
function listData(details, columns, rows) {
  listed.set(details, {columns, rows});
  details.ontoggle = () => {
    [...details.children].slice(1).forEach((child) => child.remove());
    if (!details.open) return;
    const inColumns = columns.map((_, index) => rows.map((row) => row[index]));
    const kinds = inColumns.map((values) => (areNumbers(values) ? "number" : ""));
    const writers = inColumns.map((values) => writerOf(values.filter((value) => typeof value === "number")));
    const textOf = (value, index) => (typeof value === "number" ? writers[index](value) : shortValue(value));
    const cellOf = (value, index) => el("td", {class: kinds[index]},
      value instanceof Task ? taskLink(value.id, value.name) : el("bdi", {}, textOf(value, index)));
    const head = columns.map((name, index) => el("th", {scope: "col", class: kinds[index]}, name));
    details.append(tableBox("The data", head, rows.slice(0, LISTED).map((row) => el("tr", {}, row.map(cellOf)))));
    if (rows.length <= LISTED) return;
    details.append(el("p", {class: "quiet"}, `The first ${LISTED} of ${grouped(rows.length)} rows.`));
  };
  details.ontoggle();
}

const taskLink = (id, name) => el("a", {href: address({view: "tasks", task: id, run: ""})},
    el("bdi", {}, name || id.slice(0, 8)));

/** A field's first choice in a select, and that chosen. */
function chooseField(select, options, wish, fallback) {
  const value = wish || fallback || "";
  setOptions(select, options, value);
  return value;
}

/** The fields under these names, those of numbers first. */
function ofKind(...tops) {
  const found = fields.filter((name) => tops.some((top) => name.startsWith(`${top}.`))
      && !name.includes("labtasker_"));
  return [...found.filter((name) => numeric.has(name)), ...found.filter((name) => !numeric.has(name))];
}

/** How many tasks are drawn, in words. */
const shareOf = ({found, rows}, drawnCount) => (found > rows.length
  ? `${grouped(rows.length)} of ${grouped(found)} tasks, a fair sample` : many(drawnCount, "task"));

const asOptions = (names) => names.map((name) => [name, name]);

// 11. Files ###################################################################

const SCALE = 2;  // of a picture's pixels
const AROUND = 12;  // px around what is drawn
const STYLED = ["fill", "stroke", "stroke-width", "stroke-linejoin", "fill-opacity", "opacity", "font-family",
  "font-size"];
const KEPT_OF_SVG = ["d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "rx", "transform", "text-anchor",
  "opacity", "fill-opacity", "stroke-opacity", "id", "offset"];
const ALSO_STYLED = {text: ["paint-order"], stop: ["stop-color"]};

/** A cell of CSV. */
function csvCell(value) {
  const text = value instanceof Task ? value.id : asText(value ?? "");
  return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** What a drawing was made of: {columns, rows}. */
const dataOf = (view) => (view === "curves" ? pointsOfCurves() : listed.get($(`${view}-data`)));

/** The data of a drawing as CSV: all rows, numbers with all digits. */
function csvOf(view) {
  const {columns, rows} = dataOf(view);
  const head = columns.map((name) => (name === "Task" ? "task_id" : name));
  return [head, ...rows].map((row) => row.map(csvCell).join(",") + "\n").join("");
}

/** A copy of a drawing's element that needs no style sheet; `known` has the styles of those alike. */
function standalone(node, known) {
  const name = node.localName === "a" ? "g" : node.localName, copy = svg(name);
  for (const key of KEPT_OF_SVG) if (node.hasAttribute(key)) copy.setAttribute(key, node.getAttribute(key));
  if (name === "title" || name === "text") copy.textContent = node.textContent;
  if (name !== "g" && name !== "title") {
    const kind = [name, node.getAttribute("class"), node.closest("a, [class]").getAttribute("class"),
      node.parentNode.getAttribute("class"), node.parentNode.parentNode.getAttribute("class")].join("|");
    if (!known.has(kind)) known.set(kind, getComputedStyle(node));
    const style = known.get(kind);
    for (const key of [...STYLED, ...own(ALSO_STYLED, name) || []]) {
      if (!copy.hasAttribute(key)) copy.setAttribute(key, style.getPropertyValue(key));
    }
  }
  const words = node.localName === "a" && node.getAttribute("aria-label");
  if (words) copy.append(svg("title", {}, words));
  if (name !== "text" && name !== "title") copy.append(...[...node.children].map((child) => standalone(child, known)));
  return copy;
}

/** The legend above a drawing as elements of its picture, where they stand on the page. */
function captionOf(legend, {left, top}, known) {
  const parts = [], walker = document.createTreeWalker(legend, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (walker.nextNode()) {
    const node = walker.currentNode, style = getComputedStyle(node.parentNode);
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    const font = {fill: style.color, "font-family": style.fontFamily, "font-size": style.fontSize};
    if (node.parentNode.closest(".sr")) continue;
    parts.push(svg("text", {x: box.left - left, y: box.bottom - top - box.height / 4, ...font}, node.data));
  }
  for (const one of legend.querySelectorAll("svg")) {
    const box = one.getBoundingClientRect();
    parts.push(svg("svg", {x: box.left - left, y: box.top - top, width: box.width, height: box.height,
      viewBox: one.getAttribute("viewBox")}, [...one.children].map((child) => standalone(child, known))));
  }
  return parts;
}

/** The drawing of a view, with its legend, as an SVG element with the size of both. */
function pictureOf(view) {
  const place = $(`${view}-drawing`), box = place.getBoundingClientRect(), known = new Map();
  const legend = $(`${view}-legend`) || $(`${view}-note`), top = Math.min(box.top, legend.getBoundingClientRect().top);
  const width = box.width + 2 * AROUND, height = box.bottom - top + AROUND;
  const left = box.left - AROUND, above = top - AROUND, painted = view === "parallel" ? linesAsPaths : curvesAsPaths;
  const parts = [...place.children].map((child) => (child.localName === "canvas" ? painted(child)
    : [...child.children].map((one) => standalone(one, known))));
  return svg("svg", {width, height, viewBox: `0 0 ${width} ${height}`},
    svg("rect", {width, height, fill: getComputedStyle(document.body).backgroundColor}),
    captionOf(legend, {left, top: above}, known),
    svg("g", {transform: `translate(${AROUND} ${box.top - above})`}, parts));
}

const asFile = (picture) => new XMLSerializer().serializeToString(picture);

/** Resolves to the picture as a PNG. */
async function pixelsOf(view) {
  const picture = pictureOf(view), [width, height] = ["width", "height"].map((name) => picture.getAttribute(name));
  const image = el("img", {src: `data:image/svg+xml,${encodeURIComponent(asFile(picture))}`});
  await image.decode();
  const canvas = el("canvas", {width: Math.round(SCALE * width), height: Math.round(SCALE * height)});
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}

function download(view, ending, blob) {
  const address = URL.createObjectURL(blob), name = `${login.queue} ${view}`.replace(/[^\p{L}\p{N}.-]+/gu, "-");
  el("a", {href: address, download: `${name}.${ending}`}).click();
  setTimeout(() => URL.revokeObjectURL(address), TOAST_MS);
}

/** Puts text on the clipboard, also where a browser has none for a page that came without TLS. */
async function toClipboard(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = el("textarea", {class: "sr", "aria-hidden": "true"}), focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  focused.focus();
  if (!isDone) throw new Error("The browser does not let the page copy: save the CSV.");
}

const SAVES = [  // what a drawing is saved as: the button, what it says of it, how
  ["SVG", "Save the picture as SVG", (view) => download(view, "svg",
    new Blob([asFile(pictureOf(view))], {type: "image/svg+xml"}))],
  ["PNG", "Save the picture as PNG", async (view) => download(view, "png", await pixelsOf(view))],
  ["CSV", "Save the data as CSV", (view) => download(view, "csv", new Blob([csvOf(view)], {type: "text/csv"}))],
  ["Copy CSV", "Copy CSV of the data", async (view) => {
    await toClipboard(csvOf(view));
    notify(`${many(dataOf(view).rows.length, "row")} copied.`);
  }],
];

function makeSaves() {
  for (const place of document.querySelectorAll(".saves")) {
    const save = (run) => async () => {
      try {
        await run(place.dataset.of);
      } catch (error) {
        notify(error.message);
      }
    };
    fill(place, el("span", {class: "quiet"}, "Save as"), SAVES.map(([text, title, run]) =>
      el("button", {type: "button", title, click: save(run)}, text)));
  }
}

// 12. Plot ####################################################################

const MOST_TOLD = 8;  // arguments in a tip
const POINTS_A_FRAME = 100;
const LEAST_SHARING = 3;  // so many points a place, and they are spread sideways
const MOST_WIDE = 0.06;  // of the axis that those of one place take

let plotted = null;  // what was asked and answered last, to draw it again in another size
let telling = null;  // the arguments that differ among the points, and the one that explains them: for what, and which

async function loadPlot(signal) {
  await knowFields(signal);
  const results = [...ofKind("summary"), "duration"];
  const others = [...ofKind("args", "metadata", "summary"), "created_at", "start_time", "duration", "host"];
  const y = chooseField($("plot-y"), asOptions(results), at.y, results[0]);
  const x = chooseField($("plot-x"), asOptions(others), at.x, ofKind("args")[0] || "created_at");
  const key = JSON.stringify([at.filter, at.status, x, y]);
  if (!telling || telling.key !== key) telling = {key, fields: [], explains: null};
  const more = () => [...new Set([...telling.fields, ...(plotColour() ? [plotColour()] : [])])];
  const look = () => view({columns: [x, y, "task_name", ...more()], spread: true, choose: true, limit: MOST_POINTS,
    ...matching()}, {signal});
  const before = more().join();
  let answer = await look();
  settleTelling(answer.chosen, [x, y]);
  if (more().join() !== before) answer = await look();
  showOverview(answer);
  const colour = plotColour(), explains = at.colour ? null : telling.explains;
  const byItself = explains ? `Automatic (${titleOf(explains[0])})` : "Automatic";
  chooseField($("plot-colour"), [["", byItself], ["none", "None"], ...asOptions(["status", ...others])], at.colour, "");
  const text = JSON.stringify([x, y, colour, at.logx, at.logy, answer.rows, answer.found]);
  if (plotted && plotted.text === text) return;
  plotted = {text, x, y, colour, explains, answer, fields: more()};
  drawPlot();
}

/** The field that colours the points, or "": that chosen, else the argument that explains most of their spread. */
const plotColour = () => (at.colour === "none" ? "" : at.colour || (telling.explains ? telling.explains[0] : ""));

/** Takes what the server finds telling of the points. What colours them stays while one looks. */
function settleTelling({telling: fields, explains}, axes) {
  const found = fields.filter((name) => name.startsWith("args.") && !axes.includes(name)).slice(0, MOST_TOLD);
  if (found.some((name) => !telling.fields.includes(name))) telling.fields = found;
  telling.explains = telling.explains || explains;
}

/** Returns the points of an answer's rows, from left to right: {id, name, x, y, shownX, shade, told: values of the
    `fields` that tell points apart}. */
function pointsOf({x, colour, answer, fields}) {
  const points = answer.rows.map(([id, status, cellX, cellY, name, ...told]) => ({id, name: name || id.slice(0, 8),
    x: TIMES.has(x) && cellX ? new Date(cellX).getTime() : cellX, y: numberOf(cellY), shownX: cellX, told,
    shade: colour === "status" ? status : told[fields.indexOf(colour)]}));
  return points.filter((point) => point.y !== null && point.x !== null && typeof point.x !== "boolean")
    .sort((one, other) => (one.x < other.x ? -1 : one.x > other.x ? 1 : one.y - other.y));
}

function drawPlot() {
  if (!login || !plotted || at.view !== "plot") return;
  const points = pointsOf(plotted), place = $("plot-drawing");
  if (!points.length) {
    setText($("plot-note"), "No task has both yet.");
    fill($("plot-legend"));
    fill(place);
    return listData($("plot-data"), [], []);
  }
  const {x, y, colour, fields} = plotted, scaleY = scaleOf(points.map((point) => point.y), at.logy, 6);
  const room = roomIn(place, scaleY);
  const count = Math.max(3, room.width / room.unit / 90);
  const scaleX = scaleOf(points.map((point) => point.x), at.logx, count, TIMES.has(x));
  showScale($("plot-logx"), scaleX);
  showScale($("plot-logy"), scaleY);
  const shades = shadesOf(colour, points);
  fill($("plot-legend"), colour ? el("span", {}, titleOf(colour)) : null, shades.legend);
  const wide = scaleX.band ? 0.6 * scaleX.band : widthBetween(points, scaleX);
  setText($("plot-note"), plotNote(points, wide > 0));
  const draw = {...plotted, room, scaleX, scaleY, shades, aside: sideways(wide, shades)};
  const group = pointsGroup(place, room, `${titleOf(y)} against ${titleOf(x)}, ${many(points.length, "task")}`,
      axes(room, scaleX, scaleY, x, y));
  syncInFrames(group, points.filter((point) => isFinite(scaleX.place(point.x))), (point) => point.id, makePoint,
      (node, point) => fillPoint(node, point, draw), POINTS_A_FRAME, () => keepStop(group));
  const others = [...(colour === "status" ? ["status"] : []), ...fields];
  listData($("plot-data"), ["Task", x, y, ...others], points.map((point) => [new Task(point),
    point.shownX, point.y, ...(colour === "status" ? [point.shade] : []), ...point.told]));
}

/** Returns the group of points of a drawing with these axes: that which is there, where its size is the same. */
function pointsGroup(place, room, title, lines) {
  const size = JSON.stringify(room.whole), there = place.dataset.size === size && place.querySelector("g[role=list]");
  if (there) {
    setText(place.querySelector("title"), title);
    there.previousElementSibling.replaceWith(lines);
    return there;
  }
  const group = svg("g", {role: "list", "aria-label": "Points"});
  place.dataset.size = size;
  drawIn(place, room, title, [lines], group, (index, key) => stepAlong(group.childElementCount, index, key));
  return group;
}

function plotNote(points, isSpread) {
  const {answer, explains, x} = plotted, odd = answer.rows.length - points.length;
  const which = shareOf(answer, points.length);
  const why = explains ? ` Coloured by ${titleOf(explains[0])}, which explains `
    + `${Math.round(100 * explains[1])}% of the spread where ${titleOf(x)} is the same.` : "";
  const sides = isSpread ? ` Points of one ${titleOf(x)} stand side by side.` : "";
  return `${which}${odd ? `; ${grouped(odd)} without a number to draw` : ""}.${why}${sides} `
    + "Enter opens a task, arrows walk on.";
}

function showScale(box, scale) {
  box.disabled = !scale.canLog;
  box.checked = scale.log;
}

const stepAlong = (length, index, key) => ({ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1,
  ArrowUp: index - 1, Home: 0, End: length - 1})[key];

const SHAPES = [  // of a point of radius r: so that no one has to tell colours apart
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.3 * r}L${1.2 * r} ${r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0z`,
  (r) => `M0 ${1.3 * r}L${1.2 * r} ${-r}H${-1.2 * r}z`,
  (r) => `M${-r} 0L0 ${-r}L${r} 0L0 ${r}zM${-r} ${-r}L${r} ${r}M${-r} ${r}L${r} ${-r}`,
];
const RAMP_PARTS = 8;
const OTHER = SHAPES.length;  // the colour of values that have none of their own

/** Returns {of(value), legend}: colour and shape of points by a field. The most common values have one each;
    numbers of many values differ in depth. */
function shadesOf(colour, points) {
  if (!colour) return {of: () => ({kind: 0, shape: 0}), legend: []};
  const counts = new Map();
  for (const {shade} of points) counts.set(shade, (counts.get(shade) || 0) + 1);
  const values = inOrder([...counts.keys()].filter((value) => value !== null && value !== undefined));
  if (values.length > SHAPES.length && values.every((value) => typeof value === "number")) return depths(values);
  const often = [...values].sort((one, other) => counts.get(other) - counts.get(one)).slice(0, SHAPES.length);
  const named = values.filter((value) => often.includes(value));
  const write = writerOf(named.filter((value) => typeof value === "number"));
  const rows = named.map((value, index) => [typeof value === "number" ? write(value) : cut(shortValue(value), 18),
    index]);
  if (named.length < counts.size) rows.push(["other", OTHER]);
  const places = new Map(named.map((value, index) => [value, {kind: index, shape: index}]));
  return {of: (value) => places.get(value) || {kind: OTHER, shape: 0}, legend: legendOf(rows),
    lanes: named.length < counts.size ? 1 : named.length};
}

function legendOf(rows) {
  return rows.map(([text, index]) => el("span", {class: `k${index}`},
    svg("svg", {width: "1em", height: "1em", viewBox: "-7 -7 14 14", "aria-hidden": "true"},
      svg("path", {class: "mark", d: SHAPES[index % SHAPES.length](5)})), el("bdi", {}, text)));
}

/** A legend of colours from that of the lowest number to that of the highest. `rectOf` makes a part of it, 0 to 1. */
function ramp(low, high, rectOf) {
  const parts = Array.from({length: RAMP_PARTS}, (_, index) => {
    const rects = [rectOf(index / (RAMP_PARTS - 1))].flat();
    for (const rect of rects) dressed(rect, {x: 10 * index, width: 10.2, height: 10}, []);
    return rects;
  });
  return el("span", {class: "ramp"}, el("bdi", {}, low), el("span", {class: "sr"}, " to "),
    svg("svg", {viewBox: `0 0 ${10 * RAMP_PARTS} 10`, "aria-hidden": "true"}, parts), el("bdi", {}, high));
}

function depths(values) {
  const low = values[0], high = values[values.length - 1], isWide = low > 0 && high / low >= 100;
  const write = writerOf([low, high]);
  const share = (value) => (isWide ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
  return {of: (value) => ({kind: 0, shape: 0, opacity: typeof value === "number" ? 0.2 + 0.8 * share(value) : 0.1}),
    legend: [ramp(write(low), write(high), (part) => svg("rect", {class: "mark deep", opacity: 0.2 + 0.8 * part}))]};
}

/** Returns a function: how far from its place a point is drawn, so that those of one place can be told apart. Those of
    a colour stand together, and each always at the same place. */
function sideways(width, {lanes = 1, of}) {
  const lane = width / lanes;
  return (point) => {
    const chance = parseInt(point.id.slice(0, 4), 16) / 65535 - 0.5 || 0;
    return (lanes > 1 ? (of(point.shade).kind + 0.5) * lane - width / 2 : 0) + 0.7 * chance * lane;
  };
}

/** How much of the axis the points of one number may take: nothing where few share one. */
function widthBetween(points, scale) {
  const places = [...new Set(points.map((point) => point.x))].map(scale.place).sort((one, other) => one - other);
  if (points.length < LEAST_SHARING * places.length) return 0;
  return 0.6 * Math.min(MOST_WIDE / 0.6, ...places.slice(1).map((place, index) => place - places[index]));
}

/** What is said of a point: its name, what is drawn, and the arguments that tell it apart. */
function pointWords(point, {x, y, colour, fields}) {
  const shownX = TIMES.has(x) ? moment(point.shownX, "whole") : shortValue(point.shownX);
  const words = [oneLine(point.name), `${titleOf(x)} ${shownX}`, `${titleOf(y)} ${shortNumber(point.y)}`];
  if (colour) words.push(`${titleOf(colour)} ${shortValue(point.shade)}`);
  fields.forEach((name, index) => {
    const value = point.told[index], isThere = value !== null && value !== undefined;
    if (name !== colour && name !== y && isThere) words.push(`${titleOf(name)} ${cut(shortValue(value), 60)}`);
  });
  return words.join("\n");
}

const makePoint = (point) => svg("g", {role: "listitem"},
  svg("a", {"data-id": point.id, tabindex: "-1"}, svg("path")));

/** Makes a point what its task says; what is so already stays untouched. */
function fillPoint(node, point, draw) {
  const {room, scaleX, scaleY, shades, aside} = draw, link = node.firstElementChild;
  const left = room.left + room.width * (scaleX.place(point.x) + aside(point));
  const top = room.top + room.height * (1 - scaleY.place(point.y));
  const {kind, shape, opacity} = shades.of(point.shade);
  const change = (one, attributes) => Object.entries(attributes).forEach(([name, value]) => {
    if (one.getAttribute(name) !== value) one.setAttribute(name, value);
  });
  change(link, {href: address({view: "tasks", task: point.id, run: ""}), "aria-label": pointWords(point, draw),
    class: `k${kind}`, transform: `translate(${left.toFixed(1)} ${top.toFixed(1)})`});
  change(link.firstElementChild, {class: opacity === undefined ? "mark" : "mark deep",
    d: SHAPES[shape](4.5 * room.unit), opacity: String(opacity ?? 1)});
}

// 13. Grid ####################################################################

let gridded = null;  // what was asked and answered last

async function loadGrid(signal) {
  await knowFields(signal);
  const args = ofKind("args", "metadata"), metrics = [...ofKind("summary"), "duration"];
  const y = chooseField($("grid-y"), asOptions(args), at.gy, args.find((name) => !numeric.has(name)) || args[0]);
  const x = chooseField($("grid-x"), asOptions(args), at.gx, args.find((name) => name !== y));
  const metric = chooseField($("grid-metric"), asOptions(metrics), at.metric, metrics[0]);
  $("grid-how").value = at.how;
  if (!x || !y) return setText($("grid-note"), "A grid needs tasks with two args.");
  const answer = await view({columns: [y, x, metric], spread: true, limit: MOST_READ, ...matching()}, {signal});
  showOverview(answer);
  const text = JSON.stringify([x, y, metric, at.how, answer.rows]);
  if (gridded && gridded.text === text) return;
  gridded = {text, x, y, metric, answer, how: Object.hasOwn(HOW, at.how) ? at.how : "mean"};
  drawGrid();
}

// What a cell shows of its tasks: words, and the number from their numbers and ids.
const HOW = {
  mean: ["mean", (numbers) => numbers.reduce((one, other) => one + other, 0) / numbers.length],
  min: ["lowest", (numbers) => numbers.reduce((one, other) => Math.min(one, other))],
  max: ["highest", (numbers) => numbers.reduce((one, other) => Math.max(one, other))],
  count: ["", (numbers, ids) => ids.length],
};

/** Returns {rows, columns, isCut, cells: Map of "row column" to {down, across, ids, numbers, value}}. */
function cellsOf({answer, how}) {
  const [rows, columns] = [2, 3].map((index) => inOrder(answer.rows.map((row) => row[index])));
  const [rowAt, columnAt] = [rows, columns].map((values) =>
    new Map(values.slice(0, MOST_BANDS).map((value, index) => [value, index])));
  const cells = new Map();
  for (const [id, , rowValue, columnValue, metric] of answer.rows) {
    const down = rowAt.get(rowValue), across = columnAt.get(columnValue), key = `${down} ${across}`;
    if (down === undefined || across === undefined) continue;
    const cell = cells.get(key) || {down, across, ids: [], numbers: []};
    cells.set(key, cell);
    cell.ids.push(id);
    if (numberOf(metric) !== null) cell.numbers.push(numberOf(metric));
  }
  for (const cell of cells.values()) {
    cell.value = cell.numbers.length || how === "count" ? HOW[how][1](cell.numbers, cell.ids) : null;
  }
  return {rows: rows.slice(0, MOST_BANDS), columns: columns.slice(0, MOST_BANDS), cells,
    isCut: Math.max(rows.length, columns.length) > MOST_BANDS};
}

function drawGrid() {
  if (!login || !gridded || at.view !== "grid") return;
  const {x, y, metric, how} = gridded, place = $("grid-drawing");
  const found = cellsOf(gridded), {rows, columns, cells} = found;
  const shown = how === "count" ? "number of tasks" : `${HOW[how][0]} ${titleOf(metric)}`;
  const values = [...cells.values()].map((cell) => cell.value).filter((value) => value !== null);
  const range = {low: Math.min(...values), high: Math.max(...values)}, write = alignedWriter(values);
  fill($("grid-note"), gridNote(found, capital(shown), values.length ? ramp(write(range.low), write(range.high),
      (part) => cellRects(depthOf(part))) : null));
  if (!rows.length) {
    fill(place);
    return listData($("grid-data"), [], []);
  }
  const scaleY = bandScale(rows), scaleX = bandScale(columns), room = roomIn(place, scaleY), order = [];
  const size = {width: room.width / columns.length, height: room.height / rows.length};
  const widest = Math.max(...[...cells.values()].map((cell) => cellText(cell.value, write).length)) * 7 * room.unit;
  const hasText = size.width > widest + 6 * room.unit && size.height > 16 * room.unit;
  const draw = {...found, ...range, x, y, shown, write, room, size, widest: hasText ? widest : null};
  const parts = rows.flatMap((row, down) => columns.map((column, across) => {
    const cell = cells.get(`${down} ${across}`);
    if (cell) order.push(cell);
    return cell ? gridCell(cell, draw) : svg("rect", {class: "cell none", ...boxAt(down, across, draw)});
  }));
  drawIn(place, room, `${shown} by ${titleOf(y)} and ${titleOf(x)}`, [axes(room, scaleX, scaleY, x, y)],
    svg("g", {role: "list", "aria-label": "Cells"}, parts), (index, key) => stepInGrid(order, index, key));
  listData($("grid-data"), [y, x, shown, "tasks"],
    order.map(({down, across, value, ids}) => [rows[down], columns[across], value, ids.length]));
}

function gridNote({rows, isCut}, shown, legend) {
  const {answer, how} = gridded;
  if (!rows.length) return "No task has both yet.";
  const without = how === "count" ? 0 : answer.rows.filter((row) => numberOf(row[4]) === null).length;
  return [el("span", {}, `${shown} of ${shareOf(answer, answer.found)}` +
    `${without ? `, ${grouped(without)} without it` : ""}.` +
    (isCut ? ` The first ${MOST_BANDS} values of each are drawn.` : "")), legend];
}

/** The index of the next cell in the direction of an arrow, undefined where there is none. */
function stepInGrid(order, index, key) {
  const along = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[key];
  const here = order[index];
  if (!along) return {Home: 0, End: order.length - 1}[key];
  for (let step = 1; step <= MOST_BANDS; step++) {
    const found = order.findIndex(({down, across}) =>
      down === here.down + along[0] * step && across === here.across + along[1] * step);
    if (found >= 0) return found;
  }
  return undefined;
}

/** The place of a cell, with a line of ground around it. */
function boxAt(down, across, {room, rows, size}) {
  return {x: room.left + across * size.width + 1, y: room.top + (rows.length - 1 - down) * size.height + 1,
    width: Math.max(1, size.width - 2), height: Math.max(1, size.height - 2), rx: 2};
}

const cellText = (value, write) => (value === null ? "–" : write(value));

/** How much of the colour a cell has, by its place between the lowest and the highest: never nothing. */
const depthOf = (share) => 0.04 + 0.96 * share;

const cellRects = (depth, box = {}) => [svg("rect", {class: "cell none", ...box}),
  svg("rect", {class: "cell depth", "fill-opacity": depth.toFixed(3), ...box})];

function gridCell(cell, draw) {
  const {down, across, ids, value} = cell, {low, high, widest, shown, x, y} = draw, box = boxAt(down, across, draw);
  const depth = value === null ? 0 : depthOf(high > low ? (value - low) / (high - low) : 0.5);
  const text = cellText(value, draw.write);
  const [row, column] = [draw.rows[down], draw.columns[across]];
  const words = [`${titleOf(y)} ${shortValue(row)}`, `${titleOf(x)} ${shortValue(column)}`,
    `${shown} ${value === null ? "none" : text}`, many(ids.length, "task")];
  const right = {x: box.x + (box.width + widest) / 2, y: box.y + box.height / 2 + 4 * draw.room.unit,
    "text-anchor": "end"};  // points stand below each other
  return svg("g", {role: "listitem"}, svg("a", {href: addressOf(cell, [[y, row], [x, column]]),
    "aria-label": words.join("\n"), "data-id": `${down} ${across}`},
  cellRects(depth, box), widest === null ? null : svg("text", {class: "value", ...right}, text)));
}

/** Where a cell leads: to its task, or to the list of its tasks. */
function addressOf({ids}, pairs) {
  if (ids.length === 1) return address({view: "tasks", task: ids[0], run: ""});
  return addressOfThose(pairs.map(([path, value]) => isEqual(path, value)));
}

// 14. Curves ##################################################################

const MOST_CURVES = 1000;
const MOST_WALKED = 200;  // curves, the best first, whose ends are links
const PAINT_MS = 8;  // of a frame: many curves are painted in several
const NEAR = 24;  // px between a pointer and the curve that it points to
const STOPPED = /^stopped early/;  // the reason of tasks that a rule has ended

let curving = null;  // what was asked and answered last, with what is drawn of it
let painting = 0;  // which painting is under way: an older one ends

async function loadCurves(signal) {
  await knowFields(signal);
  const others = [...ofKind("args", "metadata"), "host"], colour = at.colour === "none" ? "" : at.colour;
  chooseField($("curves-colour"), [["", "None"], ...asOptions(["status", ...others])], colour, "");
  const key = JSON.stringify([at.filter, at.status, at.curve, at.best, colour]);
  const before = curving && curving.key === key ? curving : null;
  const best = at.best || (LOW_IS_GOOD.test(at.curve || (before && before.value) || "") ? "min" : "max");
  const look = (since) => ask("POST", `${ME}/tasks/curves`, {value: at.curve || null, limit: MOST_CURVES, since, best,
    columns: ["task_name", "reason", ...(colour ? [colour] : [])], ...matching()}, {signal, read: readNumbers});
  let answer = await look(before && before.until);
  const isKnown = (row) => row[row.length - 1] || before.curves.has(row[0]);
  if (before && !answer.rows.every(isKnown)) answer = await look(null);
  showOverview(answer);
  const text = JSON.stringify([answer.rows, at.clogx, at.clogy, [...chosen]]);
  if (before && before.text === text && answer.rows.every((row) => !row[row.length - 1])) {
    before.until = answer.until;
    return;
  }
  const found = apart(answer.rows.map((row) => curveOf(row, before, colour)));
  curving = {key, text, colour, until: answer.until, found: answer.found, value: answer.value, names: answer.names,
    curves: new Map(found.map((curve) => [curve.id, curve]))};
  drawCurves();
}

/** A row of the answer as a curve; its points are those from before where the answer has none. */
function curveOf(row, before, colour) {
  const [id, status, name, reason] = row, values = row[row.length - 1], steps = row[row.length - 2];
  const isStopped = status === "cancelled" && STOPPED.test(reason || "");
  const shade = colour === "status" ? status : colour ? row[4] : null;
  const head = {id, status, name: name || id.slice(0, 8), isStopped, reason, shade};
  if (!values) return {...before.curves.get(id), ...head};
  const there = values.map((value, index) => index).filter((index) => typeof values[index] === "number");
  const numbers = there.map((index) => values[index]);
  const last = there.length ? there[there.length - 1] : -1;
  return {...head, steps, values, numbers: there.length, low: Math.min(...numbers), high: Math.max(...numbers),
    last: last < 0 ? null : values[last], lastStep: last < 0 ? null : steps[last]};
}

/** Returns the curves, or lines; where tasks share a name, their ids tell them apart. */
function apart(curves) {
  const names = new Set(curves.map((curve) => curve.name));
  if (names.size === curves.length) return curves;
  return curves.map((curve) => ({...curve, name: `${curve.name} ${curve.id.slice(0, 8)}`}));
}

/** Does a lower value mean a better one? */
const isLowBest = () => (at.best ? at.best === "min" : LOW_IS_GOOD.test(curving.value || ""));

/** The curves that have a number, the best first, by their last values. */
function rankedCurves() {
  const way = isLowBest() ? 1 : -1;
  return [...curving.curves.values()].filter((curve) => curve.numbers)
    .sort((one, other) => way * (one.last - other.last) || (one.id < other.id ? -1 : 1));
}

function drawCurves() {
  if (!login || !curving || at.view !== "curves") return;
  const ranked = rankedCurves(), place = $("curves-drawing"), {value, colour} = curving;
  chooseField($("curves-value"), asOptions(curving.names), at.curve, value);
  $("curves-best").value = isLowBest() ? "min" : "max";
  setText($("curves-note"), curvesNote(ranked));
  if (!ranked.length) {
    painting += 1;
    curving.drawing = null;
    fill(place);
    fill($("curves-legend"));
    return listData($("curves-data"), [], []);
  }
  const scaleY = curvesScale(ranked, (curve) => curve.values, at.clogy, 6, $("curves-logy"));
  const room = roomIn(place, scaleY), count = Math.max(3, room.width / room.unit / 90);
  const scaleX = curvesScale(ranked, (curve) => curve.steps, at.clogx || "0", count, $("curves-logx"));
  const shades = shadesOf(colour, ranked), draw = {room, scaleX, scaleY, shades, value, colour, ranked};
  for (const curve of ranked) placeCurve(curve, draw);
  curving.drawing = draw;
  fill($("curves-legend"), curvesLegend(ranked, draw));
  const group = svg("g", {role: "list", "aria-label": "Curves"}, ranked.slice(0, MOST_WALKED).map(
    (curve, index) => curveLink(curve, index, draw)));
  const canvas = place.querySelector("canvas") || el("canvas", {"aria-hidden": "true"});
  const under = [svg("svg", {viewBox: `0 0 ${room.whole.width} ${room.whole.height}`, "aria-hidden": "true"},
    axes(room, scaleX, scaleY, "step", value)), canvas];
  drawIn(place, room, `${value} over steps, ${many(ranked.length, "task")}`,
    [broughtForward(ranked, draw)], group,
    (index, key) => stepAlong(Math.min(MOST_WALKED, ranked.length), index, key), under);
  paintCurves(canvas, draw);
  listCurves(ranked);
}

/** The scale of an axis; on a log scale what is not above 0 has no place. */
function curvesScale(ranked, numbersOf, wish, count, box) {
  let low = Infinity, lowAbove = Infinity, high = -Infinity;
  for (const curve of ranked) {
    for (const number of numbersOf(curve)) {
      if (typeof number !== "number") continue;
      if (number < low) low = number;
      if (number > high) high = number;
      if (number > 0 && number < lowAbove) lowAbove = number;
    }
  }
  const scale = scaleOf([wish === "1" && high > 0 ? lowAbove : low, high], wish, count);
  box.disabled = high <= 0;
  box.checked = scale.log;
  return scale;
}

function curvesNote(ranked) {
  if (!curving.value) return "No task has reported a value with its step yet: labtasker.report(step=3, loss=0.7).";
  if (!ranked.length) return `No task has a number of ${curving.value} yet.`;
  const shown = ranked.length, of = curving.found > curving.curves.size
    ? `${grouped(shown)} of ${grouped(curving.found)} tasks, a fair sample` : many(shown, "task");
  const stopped = ranked.filter((curve) => curve.isStopped).length;
  return `${of}${stopped ? `; ${grouped(stopped)} stopped early, which are pale` : ""}. ` +
    "Enter opens a task, arrows walk from the best on.";
}

function curvesLegend(ranked, {shades, value}) {
  const [best] = ranked;
  return [el("span", {}, "best ", taskLink(best.id, best.name), ` ${value} ${shortNumber(best.last)} at step ` +
    shortNumber(best.lastStep)), shades.legend];
}

/** Where the points of a curve are, in px. */
function placeCurve(curve, {room, scaleX, scaleY}) {
  const x = new Float32Array(curve.steps.length), y = new Float32Array(curve.steps.length);
  curve.steps.forEach((step, index) => {
    const value = curve.values[index];
    x[index] = room.left + room.width * scaleX.place(step);
    y[index] = typeof value === "number" ? room.top + room.height * (1 - scaleY.place(value)) : NaN;
  });
  Object.assign(curve, {x, y});
}

/** Calls move(x, y) or line(x, y) along a curve; a point that stands alone is a short line. */
function trace({x, y}, move, line) {
  for (let index = 0, isDown = false; index < x.length; index++) {
    if (!isFinite(x[index]) || !isFinite(y[index])) {
      isDown = false;
      continue;
    }
    if (isDown) line(x[index], y[index]);
    else move(x[index], y[index]);
    if (!isDown && !(index + 1 < x.length && isFinite(y[index + 1]))) line(x[index] + 1.5, y[index]);
    isDown = true;
  }
}

function pathOf(curve) {
  const parts = [];
  const say = (letter) => (x, y) => parts.push(`${letter}${x.toFixed(1)} ${y.toFixed(1)}`);
  trace(curve, say("M"), say("L"));
  return parts.join("");
}

/** The best curve and those of selected tasks, above all others. */
function broughtForward(ranked, {shades}) {
  const line = (curve, kind) => svg("path", {class: `line ${kind} k${shades.of(curve.shade).kind}`, d: pathOf(curve)});
  const selected = ranked.filter((curve) => chosen.has(curve.id));
  return svg("g", {"aria-hidden": "true"}, selected.map((curve) => line(curve, "selected")), line(ranked[0], "best"),
    svg("path", {id: "curve-pointed", class: "line pointed", d: ""}));
}

/** All points of the curves, the best curve first: {columns, rows}. */
function pointsOfCurves() {
  const {value, colour} = curving, others = colour ? [colour] : [];
  const rows = rankedCurves().flatMap((curve) => curve.steps.map((step, index) => [curve.id, curve.name,
    ...(colour ? [curve.shade] : []), step, curve.values[index]]));
  return {columns: ["task_id", "task_name", ...others, "step", value], rows};
}

/** How strongly each of so many curves is painted. */
const strengthOf = (count) => Math.max(0.2, Math.min(0.9, 12 / count ** 0.6));

/** The curves as a picture has them: what the canvas shows, from the worst to the best. */
function curvesAsPaths() {
  const {ranked, shades} = curving.drawing, style = getComputedStyle(document.documentElement);
  return [...ranked].reverse().map((curve) => {
    const {kind, opacity = 1} = shades.of(curve.shade);
    return svg("path", {d: pathOf(curve), fill: "none", stroke: style.getPropertyValue(`--c${kind}`),
      "stroke-width": 1.3, opacity: strengthOf(ranked.length) * opacity * (curve.isStopped ? 0.35 : 1)});
  });
}

/** Paints all curves, a few at a time so that nothing waits for them; what was there stays until all are painted. */
function paintCurves(canvas, {room, shades, ranked}) {
  const turn = ++painting, ratio = devicePixelRatio || 1, {width, height} = room.whole;
  const style = getComputedStyle(document.documentElement);
  const sheet = el("canvas", {width: Math.round(width * ratio), height: Math.round(height * ratio)});
  const pen = sheet.getContext("2d"), colours = SHAPES.map((_, kind) => style.getPropertyValue(`--c${kind}`));
  colours.push(style.getPropertyValue(`--c${OTHER}`));
  const strength = strengthOf(ranked.length);
  pen.scale(ratio, ratio);
  pen.lineJoin = "round";
  pen.lineWidth = 1.3;
  let left = ranked.length;  // the best is painted last, above the others
  const paint = () => {
    if (turn !== painting) return;
    for (const until = performance.now() + PAINT_MS; left && performance.now() < until;) {
      const curve = ranked[--left], {kind, opacity = 1} = shades.of(curve.shade);
      pen.strokeStyle = colours[kind];
      pen.globalAlpha = strength * opacity * (curve.isStopped ? 0.35 : 1);
      pen.beginPath();
      trace(curve, (x, y) => pen.moveTo(x, y), (x, y) => pen.lineTo(x, y));
      pen.stroke();
    }
    if (left) return requestAnimationFrame(paint);
    canvas.width = sheet.width;
    canvas.height = sheet.height;
    canvas.getContext("2d").drawImage(sheet, 0, 0);
    canvas.dataset.painted = String(ranked.length);
  };
  paint();
}

/** What is said of a curve. */
function curveWords(curve, {value, colour}) {
  const shade = colour && colour !== "status" ? `${titleOf(colour)} ${shortValue(curve.shade)}` : "";
  return [curve.name, `${value} ${shortNumber(curve.last)} at step ${shortNumber(curve.lastStep)}`,
    curve.isStopped ? curve.reason : curve.status, shade].filter(Boolean).join("\n");
}

/** The end of a curve: a link to its task, which brings the curve forward while it has the focus. */
function curveLink(curve, index, draw) {
  const {kind, shape, opacity = 1} = draw.shades.of(curve.shade);
  const last = curve.values.lastIndexOf(curve.last), hasPlace = isFinite(curve.x[last]) && isFinite(curve.y[last]);
  const end = hasPlace ? last : curve.x.findIndex((x, index) => isFinite(x) && isFinite(curve.y[index]));
  const words = curveWords(curve, draw);
  const link = svg("a", {href: address({view: "tasks", task: curve.id, run: ""}), "aria-label": words,
    "data-id": curve.id, focus: () => pointTo(curve), blur: () => pointTo(null)},
  end < 0 ? null : svg("path", {class: "mark", d: SHAPES[shape](3), opacity: opacity * (curve.isStopped ? 0.35 : 1),
    transform: `translate(${curve.x[end]} ${curve.y[end]})`}));
  return svg("g", {role: "listitem", class: `k${kind}`}, link);
}

function pointTo(curve) {
  const line = $("curve-pointed");
  if (line) line.setAttribute("d", curve ? pathOf(curve) : "");
}

/** The curve that is nearest to a place in the drawing, or null. */
function curveAt(left, top) {
  const {ranked, room} = curving.drawing;
  let nearest = null, least = NEAR * room.unit;
  for (const curve of ranked) {
    const {x, y} = curve;
    let low = 0, high = x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (x[middle] < left) low = middle + 1;
      else high = middle;
    }
    const before = Math.max(0, low - 1), width = x[low] - x[before];
    const share = width > 0 ? Math.min(1, Math.max(0, (left - x[before]) / width)) : 0;
    const height = isFinite(y[before]) ? y[before] + share * (y[low] - y[before]) : y[low];
    const across = Math.max(0, x[0] - left, left - x[x.length - 1]), far = Math.hypot(across, height - top);
    if (far < least) [nearest, least] = [curve, far];
  }
  return nearest;
}

function onCurves(event) {
  if (!curving || !curving.drawing || event.target.closest("a")) return;
  const box = $("curves-drawing").getBoundingClientRect();
  const curve = event.type === "pointerleave" ? null : curveAt(event.clientX - box.left, event.clientY - box.top);
  if (event.type === "click") {
    if (curve) go({view: "tasks", task: curve.id, run: ""});
    return;
  }
  pointTo(curve);
  if (curve) showTip(curveWords(curve, curving.drawing), event.clientX, event.clientY);
  else hideTip();
  $("curves-drawing").style.cursor = curve ? "pointer" : "";
}

/** Fills the table below the curves: where it is closed, once it is opened. */
function listCurves(ranked) {
  const {value, colour} = curving, isLow = isLowBest(), isOfArg = colour && colour !== "status";
  $("curves-data").ontoggle = () => listCurves(ranked);
  if (!$("curves-data").open) return;
  listData($("curves-data"), ["Task", "Status", ...(isOfArg ? [colour] : []), value, "At step",
    isLow ? "Lowest" : "Highest", "Points"], ranked.map((curve) => [new Task(curve),
    curve.isStopped ? "stopped early" : curve.status, ...(isOfArg ? [curve.shade] : []), curve.last, curve.lastStep,
    isLow ? curve.low : curve.high, curve.numbers]));
}

// 15. Table ###################################################################

const MOST_GROUPS = 2000;  // that are asked for, the best first
const GROUPS_DRAWN = 40;  // more when asked for: to sort them must not take longer than a frame
const MOST_KEYS = 4;  // fields that tasks are grouped by unless one says otherwise
const MOST_ARGS = 60;  // whose values are looked at to choose among them
const SOME = 300;  // tasks in which they are looked at
const REPEATS = /(^|[._])((seed|repeat|replica|replicate|trial|fold|run)s?(_?(id|no|num|number|index))?|i|index)$/i;
const GROUP_COLUMNS = {mean: ["Mean", 6.2], spread: ["", 14], std: ["Std", 6], n: ["n", 3.6], min: ["Min", 6.2],
  max: ["Max", 6.2], best: ["Best", 6.4], failed: ["Failed", 6.2], missing: ["Missing", 5.2], nan: ["NaN", 4.2]};
const OF_NUMBERS = new Set(["mean", "std", "n", "min", "max"]);  // columns in which a group without a number is last

let sampled = null;  // how many values each arg has among some of the tasks that match, and of which selection
let grouping = null;  // what was asked and answered last
let groupsDrawn = GROUPS_DRAWN;

/** Learns how many values args have among some of the tasks that match. What it found stays while one looks. */
async function sampleArgs(signal) {
  await knowFields(signal);
  const names = ofKind("args").slice(0, MOST_ARGS), key = JSON.stringify([at.filter, at.status, [...names].sort()]);
  if (sampled && sampled.key === key) return;
  const answer = await view({columns: ["task_id", "status", ...names], spread: true, limit: SOME, ...matching()},
    {signal});
  const rows = answer.rows.map((row) => row.slice(4)), valuesOf = (index) => rows.map((row) => row[index]);
  const countOf = (index) => new Set(valuesOf(index).filter((value) => value !== null).map(asText)).size;
  const varying = names.map((name, index) => ({name, index, count: countOf(index)})).filter(({count}) => count > 1);
  sampled = {key, rows, names, varying};
}

/** Are groups of these args of several tasks, and nearly all of them of about as many? So those of a grid are. */
function areEven(args) {
  const sizes = new Map();
  for (const row of sampled.rows) {
    const values = args.map(({index}) => row[index]), key = JSON.stringify(values);
    if (!values.includes(null)) sizes.set(key, (sizes.get(key) || 0) + 1);
  }
  const mean = sum([...sizes.values()]) / sizes.size, small = [...sizes.values()].filter((size) => size < mean / 2);
  return mean >= 2 && small.length <= Math.max(1, sizes.size / 20);
}

/** The args to group by at first: those of few values, and none that only tells repeats apart. */
function firstKeys() {
  const {varying, names} = sampled, found = [];
  const able = varying.filter(({name}) => !REPEATS.test(name)).sort((one, other) => one.count - other.count);
  for (const arg of able) if (found.length < MOST_KEYS && areEven([...found, arg])) found.push(arg);
  const first = found.length ? found : able.slice(0, 1);
  const keys = first.sort((one, other) => one.index - other.index).map(({name}) => name);
  return keys.length ? keys : names.length ? names.slice(0, 1) : ["task_name"];
}

/** The result that groups and lines are about, and whether a low one is good: [field, "max" or "min"]. */
function resultOf(select) {
  const of = chooseField(select, asOptions(ofKind("summary")), at.of, ofKind("summary")[0]);
  return [of, ["max", "min"].includes(at.mode) ? at.mode : LOW_IS_GOOD.test(of) ? "min" : "max"];
}

async function loadGroups(signal) {
  await sampleArgs(signal);
  const by = at.by ? at.by.split(",") : firstKeys(), [of, mode] = resultOf($("groups-of"));
  $("groups-mode").value = mode;
  if (!of) {
    grouping = null;
    showOverview(await view({limit: 0, ...matching()}, {signal}));
    return showNoGroups("No task has reported a value yet: labtasker.report(acc=0.9).");
  }
  const [found, overview] = await Promise.all([ask("POST", `${ME}/tasks/table`, {by, of, mode, limit: MOST_GROUPS,
    statuses: [at.status || "success"], extra_filter: at.filter || null}, {signal}),
  view({limit: 0, ...matching()}, {signal})]);
  showOverview(overview);
  const text = JSON.stringify([by, of, mode, at.tsort, at.tway, address({}), found]);
  if (grouping && grouping.text === text) return;
  if (!grouping || grouping.by.join() !== by.join()) groupsDrawn = GROUPS_DRAWN;
  grouping = {text, by, of, mode, rows: found.content, found: found.found};
  showGroups();
}

function showNoGroups(words) {
  setText($("groups-note"), words);
  delete $("group-table").dataset.head;
  fill($("group-table").tHead.rows[0]);
  fill($("group-table").tBodies[0]);
  $("groups-more").hidden = true;
}

const isNothing = (value) => value === null || value === undefined || value === "NaN";

/** The groups in the order that is asked for: those without what they are sorted by are last, whichever way. */
function sortedGroups({rows, mode}) {
  const sort = at.tsort || "mean", way = Number(at.tway) || (mode === "min" ? 1 : -1);
  if (!at.tsort && !at.tway) return {rows, sort, way};
  const rank = new Map(inOrder(rows.map((row) => row[sort]).filter((value) => !isNothing(value)))
    .map((value, index) => [value, index]));
  const isLast = (row) => isNothing(row[sort]) || OF_NUMBERS.has(sort) && !row.n;
  return {sort, way, rows: [...rows].sort((one, other) => isLast(one) - isLast(other)
    || (isLast(one) ? 0 : way * (rank.get(one[sort]) - rank.get(other[sort]))))};
}

/** The columns of the table: the keys, then what is counted; on a phone the mean stands first. */
function groupColumns({by, rows}) {
  const some = (name) => rows.some((row) => row[name]);
  const counted = Object.entries(GROUP_COLUMNS).filter(([name]) => !["missing", "nan"].includes(name) || some(name));
  const kindOf = (field) => (areNumbers(rows.map((row) => row[field])) ? "number" : "");
  const letters = (field) => Math.max(titleOf(field).length + 2, ...rows.map((row) => shortValue(row[field]).length));
  const keys = by.map((field) => [field, kindOf(field), Math.min(16, 1.6 + 0.6 * letters(field))]);
  const others = counted.map(([name, [, width]]) => [name, name === "spread" ? "spread" : `number ${name}`, width]);
  const columns = [...others.splice(0, isNarrow() ? 1 : 0), ...keys, ...others];
  const room = roomForColumns() - sum(columns.map(([, , width]) => width));
  if (room > 0) columns.find(([name]) => name === "spread")[2] += Math.floor(room);
  return [...columns, ["rest", "rest", null]];
}

function showGroups() {
  const {by, rows: all, found} = grouping, {rows, sort, way} = sortedGroups(grouping);
  const shown = rows.slice(0, groupsDrawn), columns = groupColumns(grouping);
  setHead($("group-table"), columns, groupHead);
  for (const cell of $("group-table").tHead.rows[0].cells) {
    if (cell.dataset.field === sort) cell.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  }
  const scale = spreadScale(all), writers = Object.fromEntries(["mean", "std", "min", "max"].map((name) =>
    [name, writerOf(all.map((row) => row[name]).filter((value) => typeof value === "number"))]));
  showSpreadHead(scale);
  const draw = {by, columns, scale, writers, best: all[0] && all[0].n ? all[0] : null};
  sync($("group-table").tBodies[0], shown, (row) => JSON.stringify(by.map((field) => row[field])), () => el("tr"),
      (node, row) => fillGroup(node, row, draw));
  $("groups-more").hidden = shown.length === rows.length;
  setText($("groups-note"), groupsNote(shown.length, all.length, found));
}

function groupsNote(shown, sent, found) {
  const {by, of} = grouping, whose = !at.status || at.status === "success" ? "done" : at.status;
  if (!found) return `No ${whose} task matches.`;
  const which = shown === found ? many(found, "group") : `The first ${shown} of ${many(found, "group")}` +
    (sent < found ? `, of which the best ${grouped(sent)} are sorted,` : "");
  return `${which} by ${by.map(titleOf).join(", ")}; ${titleOf(of)} of ${whose} tasks. Bars are means, whiskers one ` +
    "standard deviation each way. Enter leads to a group's tasks.";
}

function groupHead([name, kind]) {
  if (name === "rest") return el("td");
  if (name === "spread") return el("td", {class: kind}, el("div", {id: "spread-head", "aria-hidden": "true"}));
  const first = name === "std" || !kind.includes(" ") ? "1" : ["mean", "min", "max"].includes(name) ? "" : "-1";
  const turn = () => {
    const isHere = (at.tsort || "mean") === name, way = at.tway || (grouping.mode === "min" ? "1" : "-1");
    go({tsort: name, tway: isHere ? String(-way) : first || (grouping.mode === "min" ? "1" : "-1")});
  };
  return el("th", {scope: "col", class: kind, "data-field": name},
    el("button", {type: "button", title: name, click: turn}, (own(GROUP_COLUMNS, name) || [titleOf(name)])[0]));
}

/** The scale of the bars: from 0 where that is not far, else from where the whiskers begin. */
function spreadScale(rows) {
  const ends = rows.flatMap((row) => {
    const mean = numberOf(row.mean), std = numberOf(row.std) || 0;
    return mean === null ? [] : [mean - std, mean + std];
  }).filter(isFinite);
  if (!ends.length) return null;
  const low = Math.min(...ends), high = Math.max(...ends);
  return scaleOf(low > 0 && low < high / 2 && high / low < 100 ? [0, high] : [low, high], "", 3);
}

/** Writes the scale's numbers above the bars. */
function showSpreadHead(scale) {
  const ticks = scale ? scale.ticks.filter((tick, index, all) => index % Math.ceil(all.length / 4) === 0) : [];
  const text = JSON.stringify([ticks, scale && scale.place(1)]), place = $("spread-head");
  if (place.dataset.text === text) return;
  place.dataset.text = text;
  fill(place, ticks.map(([value, words]) => placed(el("span", {}, words), scale.place(value))));
  $("group-table").style.setProperty("--ticks", ticks.map(([value]) => "linear-gradient(var(--line), var(--line)) " +
    `${(100 * scale.place(value)).toFixed(2)}% 0 / 1px 100% no-repeat`).join(", ") || "none");
}

/** Sets where a part of a bar lies, from 0 to 1. */
function placed(node, from, to = null) {
  node.style.left = `${(100 * from).toFixed(2)}%`;
  if (to !== null) node.style.width = `${(100 * (to - from)).toFixed(2)}%`;
  return node;
}

/** A bar for a group's mean, from 0 where that is drawn, and a whisker of one standard deviation each way. */
function spreadBar(row, scale) {
  const mean = numberOf(row.mean), std = numberOf(row.std);
  if (mean === null) return null;
  const place = (value) => Math.min(1, Math.max(0, scale.log && value <= 0 ? 0 : scale.place(value)));
  const [from, to] = [place(0), place(mean)].sort((one, other) => one - other);
  return el("div", {"aria-hidden": "true"}, placed(el("span", {class: "mean"}), from, to),
    std === null ? null : placed(el("span", {class: "whisker"}), place(mean - std), place(mean + std)));
}

function fillGroup(node, row, draw) {
  const {by, columns, scale, best, writers} = draw, href = addressOfGroup(row, by);
  const text = JSON.stringify([row, columns, scale && scale.ticks, row === best, href, scale && scale.place(0)]);
  if (drawn.get(node) === text) return;
  drawn.set(node, text);
  const focused = [...node.querySelectorAll("a")].indexOf(document.activeElement);
  node.classList.toggle("leader", row === best);
  const titleIn = (name) => (by.includes(name) || typeof row[name] === "number" ? asText(row[name] ?? "") : "");
  fill(node, columns.map(([name, kind]) => el("td", {class: kind, title: titleIn(name) || null}, by.includes(name)
    ? groupKey(row, name, name === by[0] && {href, by}) : groupCell(row, name, scale, writers))));
  if (focused >= 0 && node.querySelectorAll("a")[focused]) node.querySelectorAll("a")[focused].focus();
}

const keyText = (value) => (isNothing(value) ? "–" : shortValue(value) || "\"\"");

/** The value of a field that a group is made by; the first one leads to the group's tasks. */
function groupKey(row, field, link) {
  const text = el("bdi", {}, keyText(row[field]));
  if (!link) return text;
  const words = link.by.map((name) => `${titleOf(name)} ${keyText(row[name])}`).join(", ");
  return el("a", {href: link.href, "aria-label": `${words}: the tasks`}, text);
}

/** What stands in a column of a group beside its keys. */
function groupCell(row, name, scale, writers) {
  const value = row[name];
  if (name === "rest") return null;
  if (name === "spread") return scale && spreadBar(row, scale);
  if (name === "best") {
    const href = address({view: "tasks", task: value, run: "", tsort: "", tway: ""});
    return value ? el("a", {href}, value.slice(0, 8)) : "–";
  }
  if (name === "failed") {
    const total = row.n + row.missing + row.nan + (at.status === "failed" ? 0 : row.failed);
    return value ? `${grouped(value)} (${Math.round(100 * value / total)}%)` : "0";
  }
  if (name === "n" || name === "missing" || name === "nan") return grouped(value);
  if (typeof value !== "number") return value === null ? "–" : value;
  return writers[name](Number(value.toPrecision(name === "std" ? 3 : 5)));
}

/** Where a group leads: to its tasks, the best first. */
function addressOfGroup(row, by) {
  const {of, mode} = grouping, conditions = by.map((field) => isEqual(field, row[field]));
  return addressOfThose(conditions, {sort: of, way: mode === "min" ? "1" : "-1", tsort: "", tway: ""});
}

/** A click anywhere on a row does what its link does, unless one marks text. */
function onGroup(event) {
  const row = event.target.closest("tr");
  if (row && !event.target.closest("a") && !String(getSelection())) row.querySelector("a").click();
}

async function chooseGroups() {
  const keys = at.by ? at.by.split(",") : grouping ? grouping.by : [];
  const names = await askFields("Group by", [...ofKind("args", "metadata"), "task_name", "git", "failure"], keys);
  if (names !== null) go({by: names, tsort: "", tway: ""});
}

// 16. Parallel ################################################################

const MOST_LINES = 2000;  // the best by the result
const MOST_AXES = 9;  // beside the result unless others are chosen
const MOST_KINDS = 30;  // texts on an axis that is there at first
const AXIS_PX = 75;  // that an axis takes at least
const GRIP_PX = 14;  // on each side of an axis, where it is grabbed
const HUES = 32;
const LINES_A_FRAME = 200;
const RANGES = 8;  // of an axis of numbers
const STOPS = 40;  // values of an axis at each of which its handles stop; of more, at as many equal steps

let lined = null;  // what was asked and answered last, with what is drawn of it
let brushes = new Map();  // field: {low, high}; on an axis of texts the places of the first and the last
let dragging = null;  // the name of an axis, which part of it, where its range was and the pointer began
let isGrabbed = false;  // whether the pointer went down on an axis: then its click is none on a line
let keeping = 0;  // the timer that puts brushes into the address

/** The args that differ and do not only tell repeats apart, as many as have a place. */
function firstAxes() {
  const place = $("parallel-drawing").getBoundingClientRect().width || innerWidth;
  const most = Math.max(2, Math.min(MOST_AXES, Math.floor(place / AXIS_PX) - 1));
  return sampled.varying.filter(({name, count}) => !REPEATS.test(name) && (numeric.has(name) || count <= MOST_KINDS))
    .slice(0, most).map(({name}) => name);
}

async function loadParallel(signal) {
  await sampleArgs(signal);
  const [of, mode] = resultOf($("parallel-of")), names = at.axes ? at.axes.split(",") : firstAxes();
  $("parallel-mode").value = mode;
  const answer = await view({columns: [...(of ? [of] : []), ...names, "task_name"], limit: of ? MOST_LINES : 0,
    sort: of ? [[of, mode === "min" ? 1 : -1]] : null, ...matching()}, {signal, read: readNumbers});
  showOverview(answer);
  const text = JSON.stringify([names, of, mode, address({brush: ""}), answer.rows, answer.found]);
  if (lined && lined.text === text) return takeBrushes();
  const lines = apart(answer.rows.map(([id, , result, ...cells]) => ({id, name: cells.pop() || id.slice(0, 8),
    cells: [...cells, result]})).filter((line) => typeof line.cells[names.length] === "number"));
  lined = {text, names: [...names, of], of, mode, lines, found: answer.found, sent: answer.rows.length};
  drawParallel();
}

/** Do numbers spread over decades? Numbers from 0.001 to 0.5 do not where half of them are above 0.25. */
function isSkewed(numbers) {
  const sorted = [...numbers].sort((one, other) => one - other), [low, middle, high] = [sorted[0],
    sorted[sorted.length >> 1], sorted[sorted.length - 1]];
  return low > 0 && Math.log(middle / low) <= 0.8 * Math.log(high / low);
}

/** The scale of an axis: of numbers, or with a place for each text; what is missing lies below. */
function axisOf(name, index, {lines, of}) {
  const there = lines.map((line) => line.cells[index]).filter((value) => value !== null);
  const numbers = there.filter((value) => typeof value === "number");
  const isBand = numbers.length < there.filter((value) => !/^(NaN|-?Infinity)$/.test(value)).length;
  const values = inOrder(isBand ? there : numbers);
  if (isBand) {
    const places = new Map(values.map((value, at) => [value, (at + 0.5) / values.length]));
    return {name, index, isBand, values, place: (value) => places.get(value),
      ticks: values.map((value) => [value, cut(shortValue(value), 14)])};
  }
  const scale = scaleOf(values.length ? values : [0], isSkewed(numbers) ? "" : "0", 6);
  const write = writerOf(values.slice(0, 9));
  return {name, index, isBand, values, ...scale, ticks: values.length < 9 && name !== of
    ? values.map((value) => [value, write(value)]) : scale.ticks};
}

/** How much of the variance of the results is gone among tasks that are alike on an axis, from 0 to 1; null where too
    few are. Of many numbers those are alike that lie in one of RANGES with as many tasks each. */
function explainedBy({index, isBand, values}, {lines, names}) {
  const sorted = lines.map(({cells}) => cells[index]).filter(Number.isFinite).sort((one, other) => one - other);
  const bounds = Array.from({length: RANGES - 1}, (_, at) => sorted[Math.floor((at + 1) * sorted.length / RANGES)]);
  const levelOf = (value) => (isBand || values.length <= RANGES || value === null ? value
    : bounds.filter((bound) => value >= bound).length);
  const groups = new Map(), results = lines.map(({cells}) => cells[names.length - 1]);
  lines.forEach(({cells}, at) => {
    const level = levelOf(cells[index]);
    if (groups.has(level)) groups.get(level).push(results[at]);
    else groups.set(level, [results[at]]);
  });
  const freedom = lines.length - groups.size, whole = squares(results) / (lines.length - 1);
  if (freedom < 2 * groups.size || !whole) return null;
  return Math.max(0, 1 - sum([...groups.values()].map(squares)) / freedom / whole);
}

/** The sum of the squared distances of numbers from their mean. */
function squares(numbers) {
  const mean = sum(numbers) / numbers.length;
  return sum(numbers.map((number) => (number - mean) ** 2));
}

/** The places of all axes and lines, in px. */
function placeLines(place) {
  const {width, height} = place.getBoundingClientRect();
  const unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 14;
  const axes = lined.names.map((name, index) => axisOf(name, index, lined));
  const widest = (axis) => Math.max(3, ...axis.ticks.map(([, text]) => text.length)) * 7 * unit;
  const left = Math.min(width * 0.25, widest(axes[0]) + 14 * unit), right = widest(axes[axes.length - 1]) + 18 * unit;
  const room = {left, top: 54 * unit, width: Math.max(80, width - left - right), unit, whole: {width, height},
    height: Math.max(80, height - 90 * unit)};
  room.none = room.top + room.height + 14 * unit;
  axes.forEach((axis, index) => { axis.x = left + room.width * index / Math.max(1, axes.length - 1); });
  for (const line of lined.lines) {
    line.y = axes.map((axis) => {
      const share = line.cells[axis.index] === null ? NaN : axis.place(line.cells[axis.index]);
      return isFinite(share) ? room.top + room.height * (1 - share) : room.none;
    });
  }
  for (const axis of axes.slice(0, -1)) axis.share = explainedBy(axis, lined);
  Object.assign(lined, {room, axes});
}

/** Returns the colour of a line by the rank of its result: most results of a sweep lie near to the best. */
function huesOf({lines, axes}) {
  const style = getComputedStyle(document.documentElement), {index} = axes[axes.length - 1];
  const ends = ["--best", "--midst", "--worst"].map((name) => style.getPropertyValue(name).match(/[0-9a-f]{2}/gi)
    .map((part) => parseInt(part, 16)));
  const hues = Array.from({length: HUES}, (_, at) => {
    const share = 2 * at / (HUES - 1), from = Math.min(1, Math.floor(share)), rest = share - from;
    const mix = (part, which) => Math.round(part + (ends[from + 1][which] - part) * rest);
    return `rgb(${ends[from].map(mix).join(" ")})`;
  });
  const ranks = new Map();
  for (const {cells} of lines) if (!ranks.has(cells[index])) ranks.set(cells[index], ranks.size);
  return ({cells}) => hues[Math.round((HUES - 1) * ranks.get(cells[index]) / Math.max(1, ranks.size - 1))];
}

function drawParallel() {
  if (!login || !lined || at.view !== "parallel") return;
  const place = $("parallel-drawing"), {lines, names} = lined;
  setText($("parallel-note"), linesNote());
  if (!lines.length || names.length < 2) {
    for (const one of [place, $("parallel-legend"), $("parallel-chosen")]) fill(one);
    return listData($("parallel-data"), [], []);
  }
  placeLines(place);
  lined.hueOf = huesOf(lined);
  fill($("parallel-legend"), linesLegend());
  const focused = document.activeElement.dataset.grip, {axes, room} = lined;
  const canvases = ["all", "front"].map((kind) => place.querySelector(`.${kind}`)
    || el("canvas", {class: kind, "aria-hidden": "true"}));
  const walked = lines.slice(0, MOST_WALKED);
  drawIn(place, room, `${many(lines.length, "task")} across ${names.map(titleOf).join(", ")}`,
    [svg("path", {id: "line-pointed", class: "line pointed", d: ""}), axes.map((axis) => axisParts(axis, lined)),
      svg("g", {role: "group", "aria-label": "Ranges"}, axes.map(gripsOf))],
    svg("g", {role: "list", "aria-label": "Lines"}, walked.map(lineLink)),
    (index, key) => stepAlong(walked.length, index, key), canvases);
  paintLines(canvases[0], lines);
  const again = focused && place.querySelector(`[data-grip="${focused}"]`);
  if (again) again.focus();
  if (dragging || keeping) showBrushes();
  else takeBrushes(true);
  listData($("parallel-data"), ["Task", ...names], lines.map((line) => [new Task(line), ...line.cells]));
}

function linesNote() {
  const {lines, found, sent, of, names} = lined, title = of && titleOf(of);
  if (!of) return "No task has reported a value yet: labtasker.report(acc=0.9).";
  if (names.length < 2) return "No argument differs: there is nothing to compare. Choose axes to draw others.";
  if (!lines.length) return `No task has a number of ${title} yet.`;
  const isCut = sent === MOST_LINES && lines.length === sent && found > sent, others = found - lines.length;
  const which = isCut ? `The ${grouped(MOST_LINES)} tasks with the best ${title}, of ${grouped(found)}.`
    : many(lines.length, "task") + (others ? `; ${grouped(others)} without a number of ${title}.` : ".");
  return `${which} Below a name: how much of the spread of ${title} that argument explains by itself.`;
}

/** What colours tell: a strip from the worst result to the best one. */
function linesLegend() {
  const {lines, axes, of} = lined, {index} = axes[axes.length - 1];
  const [best, worst] = [lines[0], lines[lines.length - 1]].map((line) => line.cells[index]);
  const write = writerOf([best, worst]), stops = ["worst", "midst", "best"];
  return [el("span", {}, `Rank by ${titleOf(of)}: ${write(worst)}`, svg("svg", {width: "8em", height: "0.857em",
    viewBox: "0 0 80 8", preserveAspectRatio: "none", "aria-hidden": "true"}, svg("linearGradient", {id: "hues"},
    stops.map((name, at) => svg("stop", {class: name, offset: at / 2}))),
  svg("rect", {width: 80, height: 8, rx: 2, fill: "url(#hues)"})), write(best)),
  el("span", {}, "Best: ", taskLink(lines[0].id, lines[0].name))];
}

/** An axis: a line, its ticks as many as have a place, its name. */
function axisParts(axis, {room, axes}) {
  const {top, height, unit} = room, isLast = axis.index === axes.length - 1, bottom = top + height;
  const every = Math.max(1, Math.ceil(axis.ticks.length * 16 * unit / height));
  const beside = isLast ? {x: axis.x + 9 * unit} : {x: axis.x - 7 * unit, "text-anchor": "end"};
  const ticks = axis.ticks.filter((tick, index) => index % every === 0).map(([value, text]) =>
    svg("text", {...beside, y: top + height * (1 - axis.place(value)) + 4 * unit}, text));
  const isMissing = lined.lines.some((line) => line.y[axis.index] === room.none);
  const letters = Math.max(4, Math.floor(room.width / Math.max(1, axes.length - 1) / 7.5 / unit));
  const anchor = isLast && axes.length > 1 ? {x: room.whole.width - 2, "text-anchor": "end"}
    : axis.index ? {x: axis.x, "text-anchor": "middle"} : {x: 2};
  return svg("g", {"aria-hidden": "true"}, svg("path", {class: "axis", d: `M${axis.x} ${top}V${bottom}`}), ticks,
    isMissing ? svg("text", {...beside, y: room.none + 4 * unit}, "none") : null,
    svg("text", {class: "title", ...anchor, y: 16 * unit}, cut(titleOf(axis.name), letters)),
    Number.isFinite(axis.share) ? svg("text", {...anchor, y: 30 * unit}, `${Math.round(100 * axis.share)}%`) : null);
}

/** What an axis is grabbed by: itself, its range, and a handle at each end of that, which is a slider. */
function gripsOf(axis) {
  const {top, height, unit} = lined.room, wide = GRIP_PX * unit, size = 6 * unit, title = titleOf(axis.name);
  const part = (name) => ({"data-axis": axis.index, "data-part": name});
  const grip = (name, d) => svg("g", {class: "grip", role: "slider", tabindex: "0", "aria-orientation": "vertical",
    "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": `${name === "low" ? "Lowest" : "Highest"} ${title}`,
    "data-grip": `${name} ${axis.name}`, keydown: (event) => onGripKey(event, axis, name), ...part(name)},
  svg("rect", {x: -wide, width: 2 * wide, y: name === "low" ? -4 * unit : -12 * unit, height: 16 * unit, class: "hit"}),
  svg("path", {d}));
  axis.nodes = {low: grip("low", `M0 0L${size} ${1.4 * size}H${-size}z`),
    high: grip("high", `M0 0L${size} ${-1.4 * size}H${-size}z`),
    span: svg("rect", {class: "span", x: axis.x - wide / 2, width: wide, height: 0, ...part("span")})};
  const whole = svg("rect", {class: "hit", x: axis.x - wide, width: 2 * wide, y: top, height, ...part("axis")});
  return axis.values.length ? svg("g", {}, whole, axis.nodes.span, axis.nodes.low, axis.nodes.high) : null;
}

/** The link of a line, at its result; it brings the line forward while it has the focus. */
function lineLink(line) {
  const {axes, room} = lined, last = axes.length - 1;
  return svg("g", {role: "listitem"}, svg("a", {href: address({view: "tasks", task: line.id, run: ""}),
    "aria-label": lineWords(line), "data-id": line.id, focus: () => pointToLine(line), blur: () => pointToLine(null),
    transform: `translate(${axes[last].x} ${line.y[last].toFixed(1)})`},
  svg("path", {class: "mark", d: SHAPES[0](2.5 * room.unit)})));
}

function lineWords(line) {
  const last = lined.names.length - 1, order = [last, ...lined.names.keys()].slice(0, -1);
  const words = (index) => `${titleOf(lined.names[index])} ${shortValue(line.cells[index]) || "none"}`;
  return [line.name, ...order.map(words)].join("\n");
}

const pathAcross = (line, axes) => line.y.map((y, index) =>
  `${index ? "L" : "M"}${axes[index].x.toFixed(1)} ${y.toFixed(1)}`).join("");

function pointToLine(line) {
  const path = $("line-pointed");
  if (path) path.setAttribute("d", line ? pathAcross(line, lined.axes) : "");
}

/** Paints lines on a canvas. What was there stays until all are painted; then those that are wanted by now are. */
function paintLines(canvas, some) {
  const isPainting = Boolean(canvas.wanted);
  canvas.wanted = {...lined, some};
  if (!isPainting) paintWanted(canvas);
}

/** Paints the worst line first, the best one above all, some in each frame so that nothing waits for them. */
function paintWanted(canvas) {
  const job = canvas.wanted, {room, axes, hueOf, some} = job, ratio = devicePixelRatio || 1;
  const [width, height] = [room.whole.width, room.whole.height].map((size) => Math.round(size * ratio));
  const sheet = el("canvas", {width, height}), pen = sheet.getContext("2d");
  pen.scale(ratio, ratio);
  pen.globalAlpha = strengthOfLines(some.length);
  pen.lineWidth = 1.4;
  let left = some.length;
  const paint = () => {
    const end = Math.max(0, left - LINES_A_FRAME);
    for (const until = performance.now() + PAINT_MS; left > end && performance.now() < until;) {
      const line = some[--left];
      pen.strokeStyle = hueOf(line);
      pen.beginPath();
      line.y.forEach((y, index) => (index ? pen.lineTo(axes[index].x, y) : pen.moveTo(axes[index].x, y)));
      pen.stroke();
    }
    if (left) return requestAnimationFrame(paint);
    Object.assign(canvas, {width, height}).getContext("2d").drawImage(sheet, 0, 0);
    if (canvas.wanted !== job) return paintWanted(canvas);
    canvas.wanted = null;
    canvas.dataset.painted = String(some.length);
  };
  delete canvas.dataset.painted;
  paint();
}

const strengthOfLines = (count) => Math.max(0.3, Math.min(0.9, 12 / count ** 0.6));

/** What one of the two canvases shows, as a picture has it. */
function linesAsPaths(canvas) {
  const {lines, chosen: some, axes, hueOf} = lined, isFront = canvas.className === "front";
  const shown = isFront ? some : lines;
  if (isFront && !brushes.size) return [];
  const opacity = strengthOfLines(shown.length) * (brushes.size && !isFront ? 0.1 : 1);
  return [...shown].reverse().map((line) => svg("path", {d: pathAcross(line, axes), fill: "none", stroke: hueOf(line),
    "stroke-width": 1.4, opacity}));
}

/** The ranges as the address has them: two numbers, or the texts. */
function brushText() {
  const found = {};
  for (const axis of lined.axes) {
    const brush = brushes.get(axis.name);
    if (brush) found[axis.name] = axis.isBand ? axis.values.slice(brush.low, brush.high + 1) : [brush.low, brush.high];
  }
  return Object.keys(found).length ? JSON.stringify(found) : "";
}

/** Takes the ranges that the address has, where they are others than those that are shown. */
function takeBrushes(isNew = false) {
  if (!lined.axes || dragging || keeping || !isNew && at.brush === brushText()) return;
  let found = {};
  try { found = JSON.parse(at.brush) || {}; } catch { /* there are none */ }
  brushes = new Map();
  for (const axis of lined.axes) {
    const given = own(found, axis.name);
    if (!Array.isArray(given) || !given.length) continue;
    const places = given.map((value) => axis.values.indexOf(value)).filter((place) => place >= 0);
    if (axis.isBand && places.length) brushes.set(axis.name, {low: Math.min(...places), high: Math.max(...places)});
    if (!axis.isBand && given.length === 2 && given.every(Number.isFinite)) {
      brushes.set(axis.name, {low: Math.min(...given), high: Math.max(...given)});
    }
  }
  showBrushes();
}

/** The place of an end of a range on its axis, from 0 to 1. */
function endOf(axis, part) {
  const brush = brushes.get(axis.name);
  if (!brush) return part === "low" ? 0 : 1;
  const share = axis.isBand ? (brush[part] + (part === "high")) / axis.values.length : axis.place(brush[part]);
  return Math.min(1, Math.max(0, isFinite(share) ? share : part === "low" ? 0 : 1));
}

/** The lines within all ranges. */
function linesWithin() {
  const tests = lined.axes.filter((axis) => brushes.has(axis.name)).map(({name, index, isBand, values}) => {
    const {low, high} = brushes.get(name), texts = isBand && new Set(values.slice(low, high + 1));
    return ({cells}) => (texts ? texts.has(cells[index])
      : typeof cells[index] === "number" && cells[index] >= low && cells[index] <= high);
  });
  return tests.length ? lined.lines.filter((line) => tests.every((test) => test(line))) : lined.lines;
}

/** Shows the ranges and the lines within them. */
function showBrushes() {
  const {axes, room} = lined, {top, height} = room;
  for (const axis of axes) {
    const isBrushed = brushes.has(axis.name), [low, high] = ["low", "high"].map((part) => endOf(axis, part));
    const brush = brushes.get(axis.name) || (axis.isBand ? {low: 0, high: axis.values.length - 1}
      : {low: axis.values[0], high: axis.values[axis.values.length - 1]});
    for (const [part, share] of [["low", low], ["high", high]]) {
      const node = axis.nodes[part];
      node.setAttribute("transform", `translate(${axis.x} ${top + height * (1 - share)})`);
      node.setAttribute("aria-valuenow", String(Math.round(100 * share)));
      node.setAttribute("aria-valuetext", shortValue(axis.isBand ? axis.values[brush[part]] : brush[part]));
      node.classList.toggle("set", isBrushed);
    }
    axis.nodes.span.setAttribute("y", top + height * (1 - high));
    axis.nodes.span.setAttribute("height", isBrushed ? height * (high - low) : 0);
  }
  const [all, front] = $("parallel-drawing").querySelectorAll("canvas");
  lined.chosen = linesWithin();
  all.classList.toggle("behind", brushes.size > 0);
  front.hidden = !brushes.size;
  if (brushes.size) paintLines(front, lined.chosen);
  else front.width = 0;
  const within = new Set(lined.chosen.map((line) => line.id));
  for (const link of $("parallel-drawing").querySelectorAll("a")) {
    link.classList.toggle("off", !within.has(link.dataset.id));
  }
  showChosenLines();
}

function showChosenLines() {
  const {lines, chosen: some} = lined, place = $("parallel-chosen"), words = $("parallel-words");
  if (!words) {
    fill(place, el("span", {id: "parallel-words"}), el("a", {id: "parallel-those"}, "Show these tasks"),
      el("button", {id: "parallel-clear", type: "button", class: "plain", click: clearBrushes}, "Clear"));
    return showChosenLines();
  }
  setText(words, brushes.size ? `${grouped(some.length)} of ${grouped(lines.length)} selected`
    : "Drag along an axis, or move its ends by the arrow keys, to select.");
  $("parallel-those").hidden = !brushes.size || !some.length;
  $("parallel-those").href = addressOfLines();
  $("parallel-clear").hidden = !brushes.size;
}

/** Where the selected lines lead: to their tasks, and those only. */
function addressOfLines() {
  const {axes, of, mode, lines} = lined, worst = lines[lines.length - 1].cells[axes.length - 1];
  const conditions = axes.filter((axis) => brushes.has(axis.name)).map((axis) => {
    const {low, high} = brushes.get(axis.name), name = inFilter(axis.name);
    if (axis.isBand) return isAmong(axis.name, axis.values.slice(low, high + 1));
    return low === high ? `${name} == ${low}` : `${name} >= ${low} and ${name} <= ${high}`;
  });
  if (!brushes.has(of)) conditions.push(`${inFilter(of)} ${mode === "min" ? "<=" : ">="} ${worst}`);
  return addressOfThose(conditions, {sort: of, way: mode === "min" ? "1" : "-1", brush: ""});
}

/** Sets a range by its ends on the axis, from 0 to 1. */
function setBrush(axis, low, high) {
  const [from, to] = [low, high].map((share) => Math.min(1, Math.max(0, share))).sort((one, other) => one - other);
  const {values} = axis, last = values.length - 1;
  const first = Math.min(last, Math.floor(from * values.length + 1e-6));  // of texts
  putBrush(axis, axis.isBand ? {low: first, high: Math.max(first, Math.ceil(to * values.length - 1e-6) - 1)}
    : {low: Math.max(values[0], roundOn(axis, from)), high: Math.min(values[last], roundOn(axis, to))});
}

/** Takes a range; one that has all is none. */
function putBrush(axis, brush) {
  const {values, isBand} = axis, last = values.length - 1;
  const isAll = isBand ? !brush.low && brush.high === last : brush.low <= values[0] && brush.high >= values[last];
  if (isAll) brushes.delete(axis.name);
  else brushes.set(axis.name, brush);
}

/** The value at a place of an axis, with no more digits than one can point at. */
function roundOn(axis, share) {
  const [low, high] = [axis.value(0), axis.value(1)], most = Math.max(Math.abs(low), Math.abs(high));
  const digits = axis.log ? 3 : Math.ceil(Math.log10(most / (high - low))) + 3;
  return Number(axis.value(share).toPrecision(Math.min(15, Math.max(3, digits))));
}

function clearBrushes() {
  brushes = new Map();
  showBrushes();
  keepBrushes();
  $("main").focus();
}

/** Puts the ranges into the address once they stay, and says how many they have. */
function keepBrushes() {
  clearTimeout(keeping);
  keeping = setTimeout(() => {
    keeping = 0;
    if (!login || at.view !== "parallel" || !lined.axes) return;
    if (brushes.size) announce($("parallel-words").textContent);
    go({brush: brushText()}, {replace: true});
  }, 300);
}

/** Moves an end of a range to the next value, or by a step where there are many. */
function onGripKey(event, axis, part) {
  const by = {ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10}[event.key];
  const end = {Home: 0, End: 1}[event.key], isClear = ["Escape", "Delete", "Backspace"].includes(event.key);
  if (by === undefined && end === undefined && !isClear || !axis.values.length) return;
  event.preventDefault();
  event.stopPropagation();
  if (isClear) brushes.delete(axis.name);
  else moveEnd(axis, part, by, end);
  showBrushes();
  keepBrushes();
}

function moveEnd(axis, part, by, end) {
  const {values} = axis, last = values.length - 1, isFew = axis.isBand || values.length <= STOPS;
  const before = brushes.get(axis.name) || (axis.isBand ? {low: 0, high: last} : {low: values[0], high: values[last]});
  let to;
  if (isFew) {
    const stops = axis.isBand ? [...values.keys()] : values;
    const here = stops.findIndex((value) => value >= before[part]);
    to = stops[Math.min(last, Math.max(0, end === undefined ? (here < 0 ? last : here) + by : end * last))];
  } else {
    const share = end === undefined ? axis.place(before[part]) + by / STOPS : end;
    to = Math.min(values[last], Math.max(values[0], roundOn(axis, share)));
  }
  putBrush(axis, {...before, [part]: part === "low" ? Math.min(to, before.high) : Math.max(to, before.low)});
}

/** Where a pointer is on an axis, from 0 at its lower end to 1. */
function shareAt(event) {
  const {top, height} = lined.room;
  return 1 - (event.clientY - $("parallel-drawing").getBoundingClientRect().top - top) / height;
}

function onGrab(event) {
  const node = event.target.closest("[data-part]");
  isGrabbed = Boolean(node);
  if (!node || event.button || !lined || !lined.axes) return;
  const axis = lined.axes[Number(node.dataset.axis)], {part} = node.dataset;
  event.preventDefault();
  if (part === "low" || part === "high") node.focus();
  $("parallel-drawing").setPointerCapture(event.pointerId);
  dragging = {name: axis.name, part, from: shareAt(event), low: endOf(axis, "low"), high: endOf(axis, "high")};
  hideTip();
  pointToLine(null);
}

function onDrag(event) {
  const axis = lined.axes.find(({name}) => name === dragging.name), here = shareAt(event);
  const {part, from, low, high} = dragging;
  if (!axis || !dragging.isMoved && Math.abs(here - from) * lined.room.height < 3) return;
  dragging.isMoved = true;
  if (part === "low") setBrush(axis, Math.min(here, high), high);
  else if (part === "high") setBrush(axis, low, Math.max(here, low));
  else if (part === "axis") setBrush(axis, from, here);
  else {
    const by = Math.min(1 - high, Math.max(-low, here - from));
    setBrush(axis, low + by, high + by);
  }
  if (!dragging.frame) dragging.frame = requestAnimationFrame(() => {
    if (dragging) dragging.frame = 0;
    if (login && lined && lined.axes) showBrushes();
  });
}

function onRelease() {
  const {name, part, isMoved} = dragging;
  dragging = null;
  if (!isMoved && (part === "axis" || part === "span")) brushes.delete(name);
  showBrushes();
  keepBrushes();
}

/** The line that is nearest to a place in the drawing, of those that are selected; or null. */
function lineAt(left, top) {
  const {axes, room, chosen: some} = lined;
  const next = axes.findIndex((axis, index) => index && axis.x >= left);
  if (next < 0 || left < axes[0].x) return null;
  const share = (left - axes[next - 1].x) / (axes[next].x - axes[next - 1].x);
  let nearest = null, least = NEAR / 2 * room.unit;
  for (const line of some) {
    const far = Math.abs(line.y[next - 1] + share * (line.y[next] - line.y[next - 1]) - top);
    if (far < least) [nearest, least] = [line, far];
  }
  return nearest;
}

function onLines(event) {
  if (!lined || !lined.axes || !lined.chosen) return;
  if (dragging) return event.type === "pointermove" ? onDrag(event) : null;
  if (event.target.closest("a")) return;
  const place = $("parallel-drawing"), box = place.getBoundingClientRect();
  const isOff = event.type === "pointerleave" || event.target.closest("[data-part]");
  const line = isOff ? null : lineAt(event.clientX - box.left, event.clientY - box.top);
  if (event.type === "click") {
    if (line && !isGrabbed) go({view: "tasks", task: line.id, run: ""});
    return;
  }
  pointToLine(line);
  if (line) showTip(lineWords(line), event.clientX, event.clientY);
  else hideTip();
  place.style.cursor = line ? "pointer" : "";
}

function arriveAtParallel(before) {
  if (before.view !== "parallel") drawParallel();
}

async function chooseAxes() {
  const shown = lined ? lined.names.slice(0, -1) : [];
  const names = await askFields("Axes", [...ofKind("args", "metadata", "summary"), "duration", "host"], shown);
  if (names !== null) go({axes: names, brush: ""});
}

// 17. Saved ###################################################################

const MOST_VIEWS = 200;
const VIEWS_KEPT = `labtasker-views${UNDER.slice(0, -1)}`;  // [{queue, name, address}]: no address has a secret

/** The views that this browser keeps: of all queues of this server. */
function allViews() {
  try {
    return JSON.parse(kept.get("local", VIEWS_KEPT)).filter((one) => [one.queue, one.name, one.address].every((text) =>
      typeof text === "string") && one.address.startsWith("#"));
  } catch {
    return [];
  }
}

const viewsHere = () => allViews().filter((one) => one.queue === login.queue);

/** Keeps this queue's views, in the order of their names; says so where the browser keeps nothing. */
function keepViews(views) {
  const others = allViews().filter((one) => one.queue !== login.queue);
  const sorted = [...views].sort((one, other) => one.name.localeCompare(other.name)).slice(0, MOST_VIEWS);
  const isKept = kept.set("local", VIEWS_KEPT, JSON.stringify([...others, ...sorted]));
  if (!isKept) notify("This browser keeps nothing for this page. Bookmark the view: its address has all of it.");
  return isKept;
}

/** What a saved view is: all of what is looked at but for the task that is open. */
const addressToKeep = () => address({page: "1", task: "", run: ""});

/** Asks what to do with views: opens, renames, deletes, copies a link to this one, or saves it by a name. */
async function showViews() {
  const list = el("ul", {class: "views"}), name = el("input", {id: "view-name", maxlength: "80", autocomplete: "off"});
  const link = el("input", {id: "view-link", readonly: true, value: location.href.split("#")[0] + address({}),
    focus: () => link.select()});
  const copy = el("button", {type: "button", hidden: !navigator.clipboard, click: async () => {
    await navigator.clipboard.writeText(link.value).catch(() => link.select());
    setText(copy, "Copied");
  }}, "Copy");
  listViews(list);
  const answer = await openDialog("Views", [list,
    el("label", {class: "line", for: "view-name"}, el("span", {}, "Save this view as"), name),
    el("label", {class: "line", for: "view-link"}, el("span", {}, "Link to send"), link, copy),
    el("p", {class: "quiet"}, "A view is its filter, columns, order and axes. The link has all of it and no " +
      "password. Saved views stay in this browser, also after logging out.")],
  [leaving("Close"), closing("Save", "save", {class: "main"})]);
  if (answer === "save" && name.value.trim()) saveView(name.value.trim());
}

function saveView(name) {
  const before = viewsHere(), replaced = before.some((one) => one.name === name);
  const saved = [...before.filter((one) => one.name !== name), {queue: login.queue, name, address: addressToKeep()}];
  if (!keepViews(saved)) return;
  if (replaced) notify(`The view ${name} is another now.`, "Undo", () => keepViews(before));
  else notify(`Saved as ${name}.`);
}

function listViews(list) {
  const views = viewsHere(), here = addressToKeep();
  fill(list, views.map((one) => viewRow(one, here, list)));
  if (!views.length) fill(list, el("li", {class: "quiet"}, "None saved yet."));
}

function viewRow(one, here, list) {
  const link = el("a", {href: one.address, "aria-current": one.address === here && "true",
    click: () => $("dialog").close("")}, el("bdi", {}, one.name));
  const row = el("li", {}, link,
    el("button", {type: "button", class: "plain", "aria-label": `Rename ${one.name}`,
      click: () => renameView(one, row, list)}, "Rename"),
    el("button", {type: "button", class: "plain", "aria-label": `Delete ${one.name}`,
      click: () => deleteView(one, row, list)}, "Delete"));
  return row;
}

/** Puts a field in the place of a view's name; Enter takes it, Escape leaves it. */
function renameView(one, row, list) {
  const input = el("input", {value: one.name, maxlength: "80", "aria-label": `New name of ${one.name}`});
  const end = (name) => {
    const views = viewsHere().filter((other) => other.name !== one.name && other.name !== name);
    if (name && name !== one.name) keepViews([...views, {...one, name}]);
    listViews(list);
    const again = [...list.querySelectorAll("a")].find((link) => link.textContent === (name || one.name));
    if (again) again.focus();
  };
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter" ? input.value.trim() : "");
  });
  fill(row, input, el("button", {type: "button", click: () => end(input.value.trim())}, "Rename"));
  input.select();
  input.focus();
}

function deleteView(one, row, list) {
  const before = viewsHere();
  if (!keepViews(before.filter((other) => other.name !== one.name))) return;
  const undo = () => { keepViews(before); listViews(list); };
  const back = el("button", {type: "button", class: "plain", click: undo}, "Undo");
  fill(row, el("span", {class: "quiet"}, el("bdi", {}, one.name), " is deleted."), back);
  back.focus();
}

// 18. Workers #################################################################

const MOST_WORKERS = 200;
const WORKER_COLUMNS = [["Worker", "", innerWidth < 800 ? 9 : 12], ["Runs", "", innerWidth < 800 ? 9 : 14],
  ["For", "number", 6], ["Status", "", 8], ["Host", "", 9], ["Failures", "number", 6.5], ["Changed", "", 8.2],
  ["Change", "", 8], ["", "rest", null]];

async function loadWorkers(signal) {
  const [found, answer] = await Promise.all([
    ask("POST", `${ME}/workers/search`, {limit: MOST_WORKERS, sort: [["created_at", -1]],
      extra_filter: {ended_at: null}}, {signal}),
    view({columns: ["worker_id", "task_name", "duration", "host"], status: "running", limit: 1000}, {signal})]);
  showOverview(answer);
  const runs = new Map();
  for (const [id, , worker, name, took, host] of answer.rows) {
    runs.set(worker, [...(runs.get(worker) || []), {id, name: name || id.slice(0, 8), took, host}]);
  }
  const rows = found.content.map((worker) => ({...worker, runs: runs.get(worker.worker_id) || []}));
  const known = new Set(rows.map((row) => row.worker_id));
  for (const [id, theirs] of [...runs].sort()) if (!known.has(id)) rows.push(strayWorker(id, theirs));
  showWorkers(rows, found.content.length === MOST_WORKERS);
}

/** A row for runs of nobody that is listed. */
const strayWorker = (id, runs) => ({worker_id: id || "", worker_name: id ? null : "no worker", status: "", runs,
  metadata: {}});

function showWorkers(rows, isCut) {
  const busy = rows.filter((row) => row.runs.length).length;
  const others = isCut ? `; the ${MOST_WORKERS} newest are shown` : `, ${grouped(rows.length - busy)} idle`;
  setText($("workers-note"), rows.length ? `${grouped(busy)} busy${others}.`
    : "No workers yet. labtasker loop -- python train.py --lr '%(lr)' starts one.");
  setHead($("worker-table"), WORKER_COLUMNS, ([name, kind]) => (name ? el("th", {scope: "col", class: kind}, name)
    : el("td")));
  sync($("worker-table").tBodies[0], rows, (row) => row.worker_id, () => el("tr", {}), fillWorker);
}

function fillWorker(node, row) {
  const text = JSON.stringify([row, address({})]), focused = document.activeElement, hadFocus = node.contains(focused);
  if (node.dataset.text === text) return;
  node.dataset.text = text;
  const run = row.runs[0] || {}, next = row.status === "active" ? "suspended" : "active", name = workerName(row);
  const word = next === "active" ? "Activate" : "Suspend";
  const runs = row.runs.slice(0, 8).map((one, index) => [index ? ", " : "", taskLink(one.id, one.name)]);
  const button = () => el("button", {type: "button", class: "plain", click: () => changeWorker(row, next),
    "aria-label": `${word} ${name}`}, next === "active" ? word : `${word}…`);
  fill(node, el("td", {title: row.worker_id}, el("bdi", {}, name)),
    el("td", {}, row.runs.length ? runs : el("span", {class: "quiet"}, "nothing")),
    el("td", {class: "number"}, span(run.took)),
    el("td", {class: `status ${row.status}`}, row.status ? [el("span", {class: "dot"}), row.status] : null),
    el("td", {}, el("bdi", {}, shortValue(run.host || row.metadata.host))),
    el("td", {class: "number"}, shortValue(row.retries)), el("td", {}, moment(row.last_modified)),
    el("td", {}, row.status ? button() : null), el("td"));
  if (!hadFocus) return;
  const same = [...node.querySelectorAll("a")].find((link) => link.href === focused.href);
  const again = same || node.querySelector("button");
  if (again) again.focus();
}

const workerName = (row) => row.worker_name || row.worker_id.slice(0, 8);

async function changeWorker(row, status) {
  const name = workerName(row), set = (to) => ask("POST", `${ME}/workers/${row.worker_id}/status`, {status: to});
  const question = () => openDialog(`Suspend ${name}?`, [el("p", {}, "It gets no more tasks; what it runs goes on.")],
    [leaving(), closing("Suspend", "yes", {class: "danger"})]);
  if (status === "suspended" && await question() !== "yes") return;
  try {
    await set(status);
    if (status === "active") notify(`${name} is active again.`);
    else notify(`${name} is suspended.`, "Undo", () => set("active").then(() => refresher.now()).catch(complain));
  } catch (error) {
    complain(error);
  }
  refresher.now();
}

// 19. Views ###################################################################

const VIEWS = {
  tasks: {title: "Tasks", load: loadTasks, arrive: arriveAtTasks},
  groups: {title: "Table", load: loadGroups},
  plot: {title: "Plot", load: loadPlot, arrive: () => drawPlot()},
  grid: {title: "Grid", load: loadGrid, arrive: () => drawGrid()},
  parallel: {title: "Parallel", load: loadParallel, arrive: arriveAtParallel},
  curves: {title: "Curves", load: loadCurves, arrive: () => drawCurves()},
  workers: {title: "Workers", load: loadWorkers},
};

const press = (id) => () => { if (!$(id).disabled) $(id).click(); };

function stepRows(by) {
  const {rows} = document.querySelector(`#${at.view} table`).tBodies[0];
  const links = [...rows].map((row) => row.querySelector("td > a")).filter(Boolean);
  const here = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
  const to = links[here < 0 ? (by > 0 ? 0 : links.length - 1) : Math.min(links.length - 1, Math.max(0, here + by))];
  if (to) to.focus();
}

function tickRow() {
  const row = document.activeElement.closest("#table tbody tr");
  if (row) row.querySelector("input").click();
}

const KEYS = [  // keys, what they do, how; in tasks alone where the last is true, or in tables of links
  ["/", "Go to the filter", () => { $("filter").focus(); $("filter").select(); }],
  ...Object.entries(VIEWS).map(([name, {title}], index) => [String(index + 1), title, () => go({view: name})]),
  ["v", "Saved views", press("views")],
  ["j", "Next row", () => stepRows(1), "rows"], ["k", "Row before", () => stepRows(-1), "rows"],
  ["x", "Select the task, or not", tickRow, true], ["a", "Select all on this page, or none", press("pick-all"), true],
  ["n", "Next page", press("next"), true], ["p", "Previous page", press("previous"), true],
  ["c", "Cancel the selected", press("do-cancel"), true], ["r", "Retry the selected", press("do-retry"), true],
  ["y", "Priority of the selected", press("do-priority"), true],
      ["d", "Delete the selected", press("do-delete"), true],
  ["u", "Undo", () => { const all = document.querySelectorAll("[data-undo]");
      if (all.length) all[all.length - 1].click(); }],
  ["Escape", "Close the task"], ["?", "These shortcuts", showHelp],
];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !login || $("dialog").open) return;
  if (event.key === "Escape" && at.task && at.view === "tasks") return closeTask();
  if (event.target.closest("input:not([type=checkbox]), select, textarea")) return;
  const row = KEYS.find(([key, , run, where]) => key === event.key && run
    && (!where || at.view === "tasks" || where === "rows" && at.view === "groups"));
  if (!row) return;
  event.preventDefault();
  row[2]();
}

function showLogin(why) {
  $("app").hidden = true;
  $("login").hidden = false;
  $("toasts").replaceChildren();
  if ($("dialog").open) $("dialog").close("");
  setText($("login-where"), location.host);
  setText($("login-error"), why);
  document.title = "Labtasker";
  ($("login-queue").value ? $("login-password") : $("login-queue")).focus();
}

function showApp() {
  $("login").hidden = true;
  $("app").hidden = false;
  $("login-password").value = "";
  setText($("queue-name"), login.queue);
  fields = [];
  choice = telling = latest = plotted = gridded = curving = sampled = grouping = lined = null;
  chosen.clear();
  stream.last = null;
  stream.start();
  arrive();
}

async function onLogin(event) {
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  setText($("login-error"), "");
  try {
    await enter($("login-queue").value, $("login-password").value, $("login-stay").checked);
    showApp();
    $("main").focus();
  } catch (error) {
    setText($("login-error"), error.status === 401
        ? "There is no such queue, or its password is another, or it has none yet."
        : `That did not work: ${error.message}.`);
    $("login-password").select();
  }
  button.disabled = false;
}

function onFilter(event) {
  event.preventDefault();
  announceFound = true;
  clearFilterError();
  go({filter: $("filter").value.trim(), page: "1"});
  if (at.filter === $("filter").value.trim()) refresher.now();
}

const on = (id, event, action) => $(id).addEventListener(event, action);

function start() {
  makeStates();
  makeSaves();
  for (const place of document.querySelectorAll(".drawing")) makeWalkable(place);
  on("login-form", "submit", onLogin);
  on("logout", "click", () => forget());
  on("pause", "click", switchPause);
  on("help", "click", showHelp);
  on("away-now", "click", () => { stream.stop(); stream.start(); });
  on("filter-form", "submit", onFilter);
  on("filter", "input", () => { $("filter-clear").hidden = !$("filter").value; });
  on("filter-clear", "click", () => { $("filter").value = ""; $("filter").focus(); $("filter-form").requestSubmit();
      });
  on("columns", "click", () => chooseColumns());
  on("previous", "click", () => go({page: String(Number(at.page) - 1)}));
  on("next", "click", () => go({page: String(Number(at.page) + 1)}));
  on("select-all", "click", () => pickMatching().catch(complain));
  on("select-none", "click", () => { chosen.clear(); showChosen(); });
  for (const button of $("selection").querySelectorAll("[data-action]")) button.addEventListener("click",
      () => act(button.dataset.action, [...chosen]));
  on("views", "click", () => showViews());
  on("groups-more", "click", () => { groupsDrawn += 2 * GROUPS_DRAWN; showGroups(); });
  on("parallel-axes", "click", () => chooseAxes());
  on("parallel-of", "change", () => go({of: $("parallel-of").value, mode: "", brush: ""}));
  on("parallel-mode", "change", () => go({mode: $("parallel-mode").value}));
  on("parallel-drawing", "pointerdown", onGrab);
  for (const kind of ["pointermove", "pointerleave", "click"]) on("parallel-drawing", kind, onLines);
  for (const kind of ["pointerup", "pointercancel"]) on("parallel-drawing", kind, () => { if (dragging) onRelease(); });
  on("groups-by", "click", () => chooseGroups());
  on("groups-of", "change", () => go({of: $("groups-of").value, mode: "", tsort: "", tway: ""}));
  on("groups-mode", "change", () => go({mode: $("groups-mode").value, tsort: "", tway: ""}));
  $("group-table").tBodies[0].addEventListener("click", onGroup);
  for (const [id, key] of [["plot-x", "x"], ["plot-y", "y"], ["plot-colour", "colour"], ["grid-x", "gx"],
      ["grid-y", "gy"], ["grid-metric", "metric"], ["grid-how", "how"], ["curves-value", "curve"],
      ["curves-colour", "colour"], ["curves-best", "best"]]) {
    const also = own({x: {logx: ""}, y: {logy: ""}, curve: {clogy: "", best: ""}}, key);
    on(id, "change", () => go({[key]: $(id).value, ...also}));
  }
  for (const key of ["logx", "logy"]) {
    on(`plot-${key}`, "change", () => go({[key]: $(`plot-${key}`).checked ? "1" : "0"}));
    on(`curves-${key}`, "change", () => go({[`c${key}`]: $(`curves-${key}`).checked ? "1" : "0"}));
  }
  for (const kind of ["pointermove", "pointerleave", "click"]) on("curves-drawing", kind, onCurves);
  for (const form of document.querySelectorAll("form.tools")) form.addEventListener("submit",
      (event) => event.preventDefault());
  addEventListener("hashchange", arrive);
  addEventListener("resize", () => { if (login && at.view === "groups" && grouping) showGroups(); });
  addEventListener("resize", () => { if (login && at.view === "tasks" && !at.columns) refresher.stir(); });
  addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", onVisibility);
  new ResizeObserver(() => drawPlot()).observe($("plot-drawing"));
  new ResizeObserver(() => drawGrid()).observe($("grid-drawing"));
  new ResizeObserver(() => drawParallel()).observe($("parallel-drawing"));
  new ResizeObserver(() => drawCurves()).observe($("curves-drawing"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
    () => { drawCurves(); drawParallel(); });
  login = remembered();
  if (login) showApp();
  else showLogin(kept.get("session", REASON) || "");
  kept.remove("session", REASON);
}

/** A tab that nobody sees asks for nothing: browsers keep six connections to a server, for all its tabs together. */
function onVisibility() {
  if (!login) return;
  if (document.hidden) {
    stream.stop();
    refresher.stop();
  } else {
    stream.start();
    refresher.now();
  }
}

start();
"""

# ---- The skill: its pages, as in skills/labtasker. `python3 tests/test_skill_text.py` writes them here

SKILL = {
"SKILL.md": """\
---
name: labtasker
description: Queue, run, watch, fix and rank machine-learning experiments with Labtasker in one file \
(labtasker.py, version 0.x). Use when a user has a for-loop or shell script of training runs, wants a \
hyperparameter sweep or grid search run on several GPUs, hosts or Slurm jobs, wants failed runs retried or \
resumed, hung ones cancelled, bad ones stopped early, results collected, filtered, ranked or exported, or \
mentions labtasker, `labtasker loop`, `task submit` or a .labtasker folder. Works on one machine without a \
server. Not for Labtasker 2.x, whose commands and skill differ although it bears the same name; `labtasker \
--version` tells which one is there.
license: Apache-2.0
metadata:
  version: 0.1.0
---

# Labtasker

A **task** is one run's settings (`args`), with a status: pending, running, success, failed or cancelled. A \
**loop** takes
pending tasks one after another, runs a command or function for each, and ends when none is left that fits. What a run
measures goes into the task's `summary`, by which tasks are ranked. Any number of loops share one queue.

Without any setup all commands below a folder share the store `.labtasker/` there; the first submission makes it. No
server is needed on one machine.

**The rule that most mistakes break:** a task's args must be *exactly* the keys that the command or function takes, no
more and no fewer. A loop leaves other tasks alone. It ends with exit code 0, and says why at its end.

## First: which program, which store

```bash
labtasker --version
labtasker health
```

- No `labtasker`? Use `python3 -m labtasker` in the folder where `labtasker.py` lies, in place of `labtasker` \
everywhere.
- `health` prints the store or server. If it is not the one you expect, you are in the wrong folder, or \
`LABTASKER_URL` or
  `LABTASKER_ROOT` is set. Exit code 3: it can't be reached.
- `labtasker COMMAND --help` ends with an example. `labtasker help template`, `filter`, `exit`, `settings`: \
the reference.

## The workflow

The user's script stays as it is: it takes its settings as arguments and prints its result. For example:

```bash
cat > train.py <<'EOF'
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--model", default="vit")
parser.add_argument("--aug", action="store_true")
args = parser.parse_args()
print("acc=%.3f" % ({"vit": 0.8, "resnet": 0.7}[args.model] + 0.05 * args.aug - abs(args.lr - 0.01)))
EOF
```

**1. Submit.** Nested loops become `--grid`: commas separate values, `a:b:step` is a range that includes its end. With
`--unique` the command can be repeated after it has grown. Give each sweep a `--name`. Check with `--dry-run` first.

```bash
labtasker task submit --grid --dry-run -- --lr=1e-3,0.01 --model=vit,resnet --aug=True,False
labtasker task submit --grid --unique --name sweep1 -- --lr=1e-3,0.01 --model=vit,resnet --aug=True,False
```

No grid? `--sample 20 --seed 1 -- --lr=log:1e-4:1e-1 --layers=2:8 --model=vit,resnet` draws 20 random tasks. \
`--from FILE` takes
JSON lines (`{"lr": 0.1, "opt": {"name": "adam"}}`) or CSV with a header; `-` is stdin.

**2. Try one.** `'%(--*)'` passes all args as `--key=VALUE`, True as a bare `--key`, False and None not at all.
`--metric NAME=REGEX` takes the result from the output (group 1, a number).

```bash
labtasker loop --name sweep1 --max-tasks 1 --metric 'acc=acc=([0-9.]+)' -- python3 train.py '%(--*)'
labtasker task ls --name sweep1 -s success,failed --columns id,status,args,summary
```

Go on only when the summary has the metric. Otherwise see *Fix and run again*, *When a loop ran nothing*.

**3. Run in the background**, with stdin and output redirected, so that it outlives your shell:

```bash
nohup labtasker loop --name sweep1 -j 2 --metric 'acc=acc=([0-9.]+)' -- python3 train.py '%(--*)' \\
    > loop.log 2>&1 < /dev/null &
```

`-j 2` runs two at once; `--gpus all` one a GPU (it sets `CUDA_VISIBLE_DEVICES`), `--gpus 0,1 --per-gpu 2` \
four. On Slurm
`labtasker sbatch --dry-run --server --array=0-7 -t 4:00:00 --name sweep1 -- python3 train.py '%(--*)'` prints \
the job's script,
without `--dry-run` it submits it; see references/cluster.md.

**4. Wait with a limit**, never without. `--expect N` fails where fewer than N tasks match, as with a mistyped name.

```bash
labtasker task wait --name sweep1 --expect 8 --timeout 5m; echo "exit code $?"
tail -n 3 loop.log
labtasker task count --name sweep1
```

Exit codes of `wait`: 0 none failed, 4 some failed, 124 time is up: wait again if something runs, read `loop.log` if
nothing does. Where it may take longer than your shell lets a command run, wait in several calls.

**5. Rank and export.**

```bash
labtasker task ls --name sweep1 -s success -S summary.acc:desc --limit 5 --columns id,args,summary.acc
labtasker task ls --name sweep1 -s success -S summary.acc:desc --limit 100000 --fmt csv > results.csv
labtasker task ls --name sweep1 -s success -S summary.acc:desc --limit 1 --json
labtasker task table --name sweep1 --by args.model,args.lr --of summary.acc
```

`task table` compares groups, such as all seeds of a setting: number, mean, deviation and best of each, the \
best mean first
(`--min` where less is better).

For programs: `submit`, `ls`, `get`, `count`, `update`, `delete`, `retry`, `cancel`, `wait`, `why`, `table`, \
`history` and `health` take `--json`,
also `--fmt jsonl` and `csv`. Results are on stdout, notes on stderr; an error is then one JSON line on \
stderr, with `error`, `kind` and `exit`.

## The same in Python

Use this for nested configurations, for functions, and where the caller is a script anyway. Parameters marked \
with `Required()` are
filled from the task's args and cast to their annotation. The dict that the function returns is the task's summary.

```python
import labtasker
from labtasker import Required

labtasker.submit_grid({"lr": [1e-3, 0.01, 0.1], "model": ["vit", "resnet"]}, task_name="sweep2", unique=True)
labtasker.submit_task(task_name="sweep2", args={"lr": 0.02, "model": "vit"}, priority=10)  # runs first

@labtasker.loop(task_name="sweep2")
def train(lr: float = Required(), model: str = Required()):
    return {"acc": {"vit": 0.8, "resnet": 0.7}[model] - abs(lr - 0.01)}

train()  # runs all that is pending, then returns
best = labtasker.ls_tasks(task_name="sweep2", status="success", sort=[["summary.acc", -1]], limit=3)
for task in best.content:
    print(task.task_id[:8], task.args, task.summary["acc"])
```

A nested configuration is one arg that is a dict: `{"opt": {"name": "adam", "lr": 0.1}}`. On the command line submit it
as `--opt.name=adam --opt.lr=0.1` and use it as `'%(opt.lr)'`; `'%(--*)'` writes `--opt.lr=0.1`, `'%(*)'` \
`opt.lr=0.1` (Hydra).

## Curves and early stopping

A script that prints a value with each epoch can be stopped when it does worse than the others. `--step` finds \
the epoch:

```bash
cat > curve.py <<'EOF'
import sys
loss = 1.0
for epoch in range(1, 10):
    loss *= 1 - float(sys.argv[1])
    print("epoch %d loss %.4f" % (epoch, loss))
EOF
labtasker task submit --grid --name early --stop asha:loss:min:from=3 -- --lr=0.5,0.1
labtasker loop --name early --metric 'loss=loss ([0-9.]+)' --step 'epoch (\\d+)' -- python3 curve.py '%(lr)' > \
early.log 2>&1 < /dev/null
labtasker task ls --name early --columns id,status,args,summary,reason
labtasker task history "$(labtasker task ls --name early -s success --limit 1 -q)" --fmt csv
```

- `asha:METRIC:min:eta=3:from=1` compares at the steps 1, 3, 9, ... with the tasks of the same name and rule \
that came there before,
  and lets the best third go on, of fewer than six only the best. So the order counts: use `--sample`, or \
shuffle the values; a sweep
  from worst to best stops nothing. `from=3` spares slow starters. `median:METRIC:min:from=1:after=5` stops \
what is worse than the median of those that have
  ended. `max` where more is better. `from` is the first step at which a run can be judged.
- What was stopped is `cancelled`, its `reason` says why, its summary stays: rank with `-s success,cancelled`.
- A script that may be changed does without patterns: `if not labtasker.report(step=epoch, loss=loss): break`. \
`report` does
  nothing where the script runs by itself.

## Fix and run again

A run fails by its exit code or an exception. The loop tries it again until it has failed `--max-retries` times (3).

```bash
labtasker task submit --name bad --max-retries 1 -- --lr=0.1 --model=no-such
labtasker loop --name bad -- python3 train.py '%(--*)' > bad.log 2>&1 < /dev/null
labtasker task ls -s failed
labtasker task logs "$(labtasker task ls -s failed --limit 1 -q)" --tail 20
labtasker task update -s failed --name bad -u args.model=vit --reset-pending --dry-run
labtasker task update -s failed --name bad -u args.model=vit --reset-pending -y
labtasker loop --name bad -- python3 train.py '%(--*)' > bad.log 2>&1 < /dev/null
```

- The script was wrong, the args are right: mend it, then `labtasker task retry --name bad` (failed ones \
only), run the loop.
- `task update` changes just the field named: `-u args.lr=0.05 -u priority=10 -u 'metadata.tags=["v2"]'`.
- A crashed or killed loop, or host, needs no repair: start the loop again, with `--idle-timeout 1m`. What ran \
is pending again half
  a minute after its last heartbeat, and counts one failed run; without that option the loop would end before. \
The job begins
  anew unless it keeps checkpoints in `$LABTASKER_TASK_DIR`, a folder that all runs of the task share. The loop
  idles for that minute at its end, too.
- Ctrl-C, SIGTERM and time limits hand back what runs at once, and charge no retry.
- To stop something: `labtasker task cancel ID` or `task cancel --name sweep1 -s pending -y`. A running job is \
ended in seconds. The
  longest running: `task ls -s running -S start_time:asc --columns id,args,start_time`. Hung ones: `task \
cancel --name sweep1 -s running -f 'start_time < date("2 hours ago")' -y`; the loop goes on with the \
next.
- To act on each change: `timeout 1h labtasker event listen --until-idle --compact`, or with `--exec 'CMD'`, \
which gets each event as
  JSON on stdin (`.event.entity_type` is task or worker, `.event.entity_id`, `.event.new_state`, \
`.event.entity_data` the task). A task
  becomes `failed` once, after its last attempt. It ends once nothing is pending or running. It begins with \
now; `--after 0.0` begins with all that is kept.
- What needs another task's result: `task submit --after ID` waits until it has succeeded, and is cancelled if it
  fails (`--after-any ID`: runs in any case); `task why ID` says what is waited for.
- `queue pause` hands out nothing more until `queue resume`; what runs goes on. After ten quick failures in a \
row a loop stops (exit
  code 4): read its last lines, mend what is wrong with the command or the host, start it again.
- What must run first: `--priority 10` at submission, or `task update --name sweep1 -f 'args.lr < 0.01' -u \
priority=10 -y`.

## When a loop ran nothing

```bash
labtasker task submit --name typo -- --lr=0.1 --modle=vit
labtasker loop --name typo -- python3 train.py --lr '%(lr)' --model '%(model)' < /dev/null
labtasker task why "$(labtasker task ls --name typo --limit 1 -q)" -- python3 train.py --lr '%(lr)' --model '%(model)'
labtasker task cancel --name typo -y
```

The loop's last lines and `task why` say what does not fit: a key that is missing or too many, the wrong \
`--name`, `-f` or
queue. Correct the command, or the tasks: `-u 'args={"lr": 0.1, "model": "vit"}'` replaces all args. With
`'%(--*)'` in the command every pending task fits: then name the sweep with `--name`.

## Gotchas

- **Options of labtasker stand before `--`**, the task's args or the job's command after it.
- **A command without placeholders takes every task**, and runs the same for each. Write `'%(--*)'` or each key.
- **Quote placeholders** (`'%(lr)'`) and filters (`-f 'args.model == "vit"'`: the text inside in double quotes).
- **A switch** (`action="store_true"`) is `'%(--aug)'` or in `'%(--*)'`, with values True and False. `--aug \
'%(aug)'` would pass the
  word False, `--aug=` an empty text. `--no-aug` at submission is an arg named `no_aug`. A pair \
`--aug/--no-aug` that is on by
  default: `'%(--[no-]aug)' '%(--*)'`, since False alone passes nothing.
- **Values are read as Python**: `1e-3` is the number 0.001 and comes out as `0.001`; `True`, `None` and \
`[1,2]` are not text.
  A comma separates values only with `--grid`; without it `--lr=1,2` is one task with a list. In a grid lists have
  brackets: `--layers='[1,2],[3,4]'` is two values. `nargs="+"` takes `--layers '%(layers...)'` beside `'%(--*)'`.
- `%(key)` for a key with a dash: submitted as `--learning-rate=1`, the arg is `learning_rate`.
- **`--max-retries 3` means three runs** in all, not three more. Where an error would only come back: \
`--max-retries 1`.
- **A loop exits with 0 even if all its tasks failed**; ask `task wait` or `task count`, or use `loop --fail` \
(4). `task wait` takes
  cancelled ones for done.
- **`task ls` shows 100** unless `--limit` says more, the least recently changed first unless `-S` says otherwise.
- **`update`, `cancel` and `delete` by selectors need `-y`** where no terminal is. Without it: exit code 2, \
and nothing is changed.
- **Filters alone do not widen `retry`**: it takes failed ones. For others: `task update -s success ... \
--reset-pending`.
- **There is no `!=` and no `not` in filters**; dates are `date("3 hours ago")`. See references/filters.md.
- **Never unattended**: `watch` without `--once`, `config` without `--show`, `task update` without an update, \
`event listen` without
  `--until-idle` or `--max`, `task logs -f`, `serve` without `--daemon`, `wait` without `--timeout`. They \
don't end, or want a
  terminal.
- **Environment variables stand before the loop**: `OMP_NUM_THREADS=1 labtasker loop -- ...`. Pipes and `&&` inside the
  job: `loop -c 'python3 a.py --lr %(lr) && python3 b.py'`; values need no quotes there.
- **A result that is not reported is not there**: check the summary of the first task before running the rest. Output
  already there is read afterwards by `labtasker task harvest --metric 'acc=acc=([0-9.]+)' --name sweep1`.
- Ids can be shortened to their first letters. `-q` prints ids alone, for pipes: `task ls -s failed -q | \
labtasker task delete -y`.
- Do not edit or delete files in `.labtasker/`; `git` should ignore that folder.

## Read when needed

Only this text at hand? `labtasker help skill python` prints the page.

- [references/python.md](references/python.md): when you write Python: nested configurations, dataclasses, \
checkpoints and
  resuming, reports by step, events, many tasks at once.
- [references/cluster.md](references/cluster.md): when there are several GPUs or hosts, Slurm, PBS or \
Kubernetes, a server, a
  time limit or preemption.
- [references/filters.md](references/filters.md): when you select tasks by anything but name and status, or \
look for hung
  ones, or need the fields that a task has.
""",
"references/cluster.md": """\
# Several GPUs, several hosts, clusters

Read this when there are several GPUs or hosts, Slurm, PBS or Kubernetes, a server, a time limit or preemption.

## GPUs of one host

```bash
labtasker task submit --grid --name gpus -- --lr=0.1,0.01,0.001
labtasker loop --name gpus --gpus 0,1 --metric 'gpu=gpu=(\\d+)' -- sh -c 'echo "gpu=$CUDA_VISIBLE_DEVICES \
lr=$1"' job '%(lr)' < /dev/null
labtasker task ls --name gpus -s success --columns id,args.lr,summary.gpu
```

- `--gpus all` gives each GPU of the host (within what Slurm allows) a slot, `--per-gpu 2` two. `-j N` makes \
slots without GPUs.
- A job sees its GPU as device 0: write `cuda:0`, do not pass a number. `LABTASKER_SLOT` tells the slots apart.

## Several hosts

Without a server only one host at a time can use a store. Start one in the folder whose tasks it shall have. \
`--port 0` picks a
free port; who uses the same folder, on any host, finds the server by itself:

```bash
labtasker serve --daemon --host 0.0.0.0 --port 0
labtasker server wait --timeout 1m
labtasker task submit --name shared -- --lr=0.1
labtasker loop --name shared -- echo '%(lr)' < /dev/null
labtasker server status
labtasker server stop
```

Hosts that do not share that folder need the URL and the queue's password, once, in their own folder. Set a \
password with `labtasker
queue update --new-password secret` before; the queue is `default` unless another one was configured. Then on \
each host:

```text
LABTASKER_PASSWORD=secret labtasker init --url http://head:9321 --queue-name default --yes
labtasker health
```

In containers, the variables `LABTASKER_URL`, `LABTASKER_QUEUE` and `LABTASKER_PASSWORD` do the same. \
Passwords and tasks travel in the clear
unless the server has `--certfile` and `--keyfile`. Without them use a trusted network, or `ssh -L \
9321:127.0.0.1:9321 head`.

Loops survive a server that is away (`--server-lost`, 1h): results are kept and delivered. Start it again in \
the same folder.

## Slurm

`labtasker sbatch` writes a job script of loops and submits it. Look at the script first, without `--dry-run` \
it is submitted:

```bash
labtasker task submit --grid --name slurm -- --lr=0.1,0.01 --model=vit,resnet
labtasker sbatch --dry-run --array=0-7 -t 4:00:00 -p gpu --gpus-per-task=1 --server --name slurm --drain-before 10m \\
    -- python3 train.py '%(--*)'
```

- Run it in a folder that all nodes see. Options that neither it nor `loop` has go to Slurm's sbatch: `-t`, \
`-p`, `-c`, `--mem`.
- An array of 8 is eight loops, not eight tasks: submit as many tasks as you like, before or after.
- `--server`: the first task of the array also runs the server. Leave it out where a server runs already.
- Lines such as `module load` or `source venv/bin/activate`: run them before `sbatch`, the job inherits the \
environment.
- Time is up, `scancel`, preemption, requeue: jobs get a signal and `--grace` seconds, their tasks are pending \
again and no retry is charged.
  Submit the same array once more to go on.

## PBS and others

Any scheduler can start loops. Tell them how long they may run:

```text
#!/bin/bash
#PBS -J 0-7
#PBS -l select=1:ncpus=8:ngpus=1
#PBS -l walltime=04:00:00
cd "$PBS_O_WORKDIR" || exit
exec labtasker loop --name sweep1 --time-limit 4h --drain-before 10m -- python3 train.py '%(--*)'
```

Kubernetes: a Job with `parallelism`, the three variables above from a secret, command `labtasker loop --grace \
45 -- ...`, and a
`terminationGracePeriodSeconds` longer than the grace.

## Time limits and long jobs

- `loop --time-limit 4h` ends by then and hands back what runs; `--drain-before 10m` starts nothing in the \
last ten minutes. Within Slurm the
  limit is known.
- A job that saves its state asks `labtasker.preempted()` or traps SIGTERM, keeps its checkpoint in \
`$LABTASKER_TASK_DIR`, and exits with 75: see
  [python.md](python.md). The folder is on the loop's host, or where the loop's folder is shared, on all.
- `task submit --task-timeout 2h` or `loop --eta-max 2h` ends a run that takes longer, and counts it as failed.
- `loop --idle-timeout 30m` keeps a loop for tasks that are still to be submitted.
- `--retry-delay 1m` at submission waits before a failed task's next run.
""",
"references/filters.md": """\
# Filters, fields, selecting tasks

Read this when you select tasks by anything but name and status, look for hung ones, or need the fields that a \
task has.

`-f` takes a line of Python, the same in `task ls`, `count`, `update`, `delete`, `retry`, `cancel`, `wait`, \
`loop` and in Python's `extra_filter`.
`--name`, `-s` and `-f` together narrow each other.

```bash
labtasker task submit --grid --name grid-a --metadata '{"tags": ["v1", "urgent"]}' -- --lr=0.1,0.01 --model=vit,resnet
labtasker task submit --name grid-b --priority 3 -- --opt.name=adam --opt.lr=0.1 --model=vit
labtasker task ls -f 'args.lr > 0.05 and args.model == "vit"' --columns id,args
labtasker task ls -f 'args.model in ["vit", "mlp"] or priority >= 3' -q
labtasker task ls -f '"urgent" in list(metadata.tags)' -q
labtasker task ls -f 'regex(task_name, "^grid-") and args.opt.name == "adam"' -q
labtasker task ls -f 'exists(args.opt) and created_at >= date("3 hours ago")' -q
labtasker task count --by args.model -f 'regex(task_name, "^grid-")'
```

- Operators: `== > >= < <= in`, `and`, `or`, parentheses, `+ - * / %`. Functions: `date("...")`, `regex(field, \
"...")`, `exists(field)`, and
  `"x" in list(field)` for a list.
- Not there: `!=`, `not`, `is`, `&&`. For "other than": `args.lr < 0.1 or args.lr > 0.1`, a list of the rest, \
or `-s` for statuses
  (`-s pending,running`). For "has no such field": `exists(args.warmup, False)`.
- A field that a task lacks fits no comparison, so `summary.acc < 0.5` leaves out tasks without `acc`.
- Text stands in double quotes, the whole filter in single quotes. `True`, `False`, `None` as in Python.
- Dates: `date("2 hours ago")`, `date("yesterday")`, `date("2026-11-28 14:00")`, `date("1h30m")` (from now).
- A key with other letters: `summary["val/acc"]`.
- The same as a query document: `-f '{"args.lr": {"$gt": 0.05}, "status": {"$ne": "failed"}}'`. There `$ne` \
and `$not` exist.

## Hung, urgent, unwanted, old

```bash
labtasker task ls -s running -f 'start_time < date("2 hours ago")' --columns id,name,start_time,last_heartbeat,worker_id
labtasker task cancel -s running -f 'start_time < date("2 hours ago")' -y
labtasker task update -s pending -f '"urgent" in list(metadata.tags)' -u priority=100 -y
labtasker task cancel -s pending -f 'args.lr > 0.05 and args.model == "resnet"' -y
labtasker task retry -f 'args.model == "vit"'
labtasker task delete -s failed,cancelled -f 'last_modified < date("7 days ago")' -y
labtasker task ls -S priority:desc -S created_at:asc --fmt csv --limit 100000 > all.csv
```

- A cancelled task that runs is ended within seconds; its summary stays. To run it again: `task update --id ID \
--reset-pending -y`.
- A task whose loop was killed is not hung: it is given out again half a minute after its last heartbeat.
- `--dry-run` of `update`, `delete`, `retry` and `cancel` shows which tasks match, and changes nothing.
- Higher `priority` runs first, then the task that has waited longest.

## Fields

`task_id`, `task_name`, `status`, `args`, `metadata`, `summary`, `priority`, `max_retries`, `retries` (failed \
runs so far), `created_at`, `start_time`,
`last_heartbeat`, `last_modified`, `worker_id`, `attempts` (the last runs: host, log, status, exit code), \
`task_timeout`, `heartbeat_timeout`, `cmd`, `git`, `reason`
(why it was handed back). `labtasker help filter` has them all with their meaning; `labtasker task get ID` \
prints one task. `-S FIELD:desc` sorts by any of
them, `--columns id,args.lr,summary.acc,duration` shows them.
""",
"references/python.md": """\
# Labtasker from Python

Read this when you write Python: nested configurations, dataclasses, checkpoints and resuming, reports by step, events,
many tasks at once. `import labtasker` finds the module where it is installed, or where `labtasker.py` lies \
beside the script.

## A function as the job

```python
import labtasker
from labtasker import Annotated, Required

labtasker.submit_tasks([
    {"task_name": "nested", "args": {"opt": {"name": "adam", "lr": 0.1}, "data": "cifar", "seed": seed},
     "metadata": {"tags": ["v1"]}} for seed in range(2)], unique=True)

class Optimizer:
    def __init__(self, name, lr):
        self.name, self.lr = name, lr

@labtasker.loop(task_name="nested", extra_filter='"v1" in list(metadata.tags)')
def main(opt: Annotated[dict, Required(resolver=lambda config: Optimizer(**config))],
         seed: int = Required(), data: str = Required()):
    return {"loss": opt.lr * (seed + 1), "curve": {"best": 0.5}}

main()
for task in labtasker.ls_tasks(task_name="nested", sort=[["summary.loss", 1]]):
    print(task.args["opt"]["name"], task.summary["loss"])
```

- The parameters' names are the args' top-level keys, exactly. `Required(alias="opt.lr")` takes a nested value \
for a parameter
  of another name. A `resolver` gets the value as it was submitted; what it returns is not cast.
- Casts follow the annotation: `int`, `float`, `bool`, `str`, `Path`, `Optional`, `List`, `Dict`, `Tuple`, \
`Literal`, enums, dataclasses
  (nested too) and NamedTuples. A value that does not fit fails the task, with the parameter's name.
- Parameters without `Required()` are given at the call: `main(device="cuda:0")`.
- `@labtasker.loop(required_fields=["lr"], pass_args_dict=True)` passes all args as one dict, and allows further keys.
- An exception fails the run (`task.summary["labtasker_exception"]`), and it is tried again until \
`max_retries` runs have failed.
- The script is the worker: start it as often as runs should go on at once, `CUDA_VISIBLE_DEVICES=0 python3 \
sweep.py &`.

Submitting: `submit_task(args=..., task_name=..., metadata=..., priority=..., max_retries=...)` returns an \
object with `.task_id`;
`submit_tasks([...])`, `submit_grid({...})` and `submit_sample({"lr": "log:1e-4:1e-1"}, 20, seed=1)` return \
lists of ids and are one
transaction each: use them for more than a few tasks. Skip what is there already with `unique=True`.

## Reports, checkpoints, resuming

`report` also works in a script that a command loop starts, and does nothing where the script runs by itself:

```bash
cat > steps.py <<'EOF'
import json, sys
import labtasker

lr = float(sys.argv[1]) if sys.argv[1:] else 0.1
state = {"step": 0, "loss": 1.0}
saved = labtasker.task_dir() / "state.json" if labtasker.is_enabled() else None
if saved and saved.exists():
    state = json.loads(saved.read_text())
while state["step"] < 5:
    state = {"step": state["step"] + 1, "loss": state["loss"] * (1 - lr)}
    if not labtasker.report(step=state["step"], loss=state["loss"]):
        break
    if saved:
        (saved.parent / "new").write_text(json.dumps(state))
        (saved.parent / "new").replace(saved)  # all of it or none
    if labtasker.preempted():
        sys.exit(75)
EOF
python3 steps.py
labtasker task submit --grid --name steps -- --lr=0.1,0.5
labtasker loop --name steps -- python3 steps.py '%(lr)' < /dev/null
labtasker task ls --name steps -S summary.loss --columns id,args,summary
labtasker task history "$(labtasker task ls --name steps -S summary.loss --limit 1 -q)" --fmt csv
```

- `report(step=None, **values)` merges the values into the summary and returns False when the job should end. \
It never raises because
  a server is away: what it is given is kept and delivered later. With a `step` the values are also a point of \
the task's
  history (`get_history(task_id)`). For a script that nobody changes: `loop --metric 'loss=loss ([0-9.]+)' \
--step 'epoch (\\d+)'`.
- `task_dir()` (`LABTASKER_TASK_DIR` for other programs) is a folder that all attempts of a task share. Write \
checkpoints there.
- `preempted()` is True once the loop was told to stop: save, then exit with 75. That hands the task back and \
charges no retry.
- `time_left()`: seconds until the loop's time limit, or None. `task_info()`: the Task that runs here \
(`.args`, `.retries`, ...).
- In a shell job: `labtasker report acc=0.9 --step 3`. Without either, a `summary.json` (a dict) written to \
`$LABTASKER_LOG_DIR`.
- `submit_grid(..., stop="asha:loss:min:from=3")` stops bad ones early: `report` then returns False, \
`should_stop()` True. To give up a task
  yourself: `report_task_status(task_info().task_id, "cancelled")`.

## Listing, changing, deleting

```python
import labtasker
from labtasker import TaskUpdateRequest

task_id = labtasker.submit_task(task_name="edit", args={"lr": 0.1, "opt": {"name": "sgd"}}).task_id
task = labtasker.get_task(task_id)
print(task.status, task.args, task.metadata, task.summary, task.retries, task.created_at)

labtasker.update_tasks([TaskUpdateRequest(task_id=task_id, args={"lr": 0.2}, priority=5)])  # merged into the args
labtasker.update_tasks([TaskUpdateRequest(task_id=task_id, args={"lr": 0.3}, replace_fields=["args"])])  # all of them

failed = labtasker.ls_tasks(status="failed", extra_filter="args.lr > 0.2", limit=10000).content
labtasker.update_tasks([TaskUpdateRequest(task_id=one.task_id, args={"lr": 0.1}) for one in failed], \
reset_pending=True)
rows = labtasker.ls_tasks(task_name="edit").to_records()  # flat dicts: pandas.DataFrame(rows)
labtasker.update_tasks([TaskUpdateRequest(task_id=task_id, status="cancelled")])
labtasker.delete_task(task_id)
```

- `ls_tasks(...)` in a `for` goes through all that match; its `.content` has at most `limit` (100).
- `summary`, `args` and `metadata` are always dicts: `task.summary.get("acc")`.
- `reset_pending=True` also sets the retries to 0; `status="pending"` alone does not.
- Errors are `labtasker.LabtaskerError`; `LabtaskerConnectError` where no server answers.

## Waiting for results, comparing them

Where a loop runs elsewhere, here in the background, `as_completed` yields the tasks as they end, in whatever way:

```python
import subprocess
import labtasker

ids = labtasker.submit_grid({"x": [1, 2], "y": [1, 2]}, task_name="wait")
loop = subprocess.Popen(["labtasker", "loop", "--name", "wait", "--", "labtasker", "report", "z=%(x)", \
"w=%(y)"], stdin=subprocess.DEVNULL)
for task in labtasker.as_completed(ids, timeout=120):  # TimeoutError at the end of the time
    print(task.status, task.args, task.summary)
loop.wait()
for row in labtasker.table(by=["args.x"], of="summary.z", mode="max", task_name="wait"):
    print(row["args.x"], row["n"], row["mean"], row["std"], row["best"])
```

## Events

Every change of a task's status is an event. Give every wait a time:

```python
import labtasker

with labtasker.connect_events() as listener:
    labtasker.submit_task(task_name="event", args={"lr": 0.1})
    while True:
        response = listener.get_event(timeout=2)  # None after two quiet seconds
        if response is None:
            break
        print(response.event.entity_id, response.event.old_state, "->", response.event.new_state)
```

`connect_events(after=response.id)` goes on where another listener stopped; `after="0.0"` begins with the \
oldest event that is kept.
""",
}
