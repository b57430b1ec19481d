#!/usr/bin/env python3
# /// script
# requires-python = ">=3.6"
# ///
# mypy: ignore-errors
# Type checkers read the types of the public names here, and check nothing else.  # type: ignore
"""Labtasker in one file: a task queue for machine-learning experiments.

Copy this file to wherever there is a Python 3.6 or newer and go:

    python3 labtasker.py task submit -- --lr=0.1            # queue a task
    python3 labtasker.py loop -- python3 train.py --lr '%(lr)'   # run what is queued
    python3 labtasker.py task ls                            # look at the results
    python3 labtasker.py serve                              # let several hosts share a queue

The same file is the server, the command line and `import labtasker`. The house has eighteen floors; each uses
only those below it, so the file reads from here to its end.

    1. Values         errors, ids, names, dotted keys, times, durations, relative dates
    2. Filters        text -> query document -> predicate; sorting
    3. Model          task, worker, queue: their fields; the two state machines as tables
    4. Journal        the append-only file: lock, append, sync, replay, heal
    5. State          the queues in memory, their indexes, events
    6. Operations     what each request decides, and time-outs
    7. Store          its folder, one transaction after another, compaction, repair
    8. API            every request as one row of a table: method, path, fields, operation
    9. Server         HTTP over the API: a loop, and threads for what takes long
    10. Client        configuration, and the two transports that carry requests
    11. Functions     the public functions and their answers
    12. Jobs          what a job gets of its task: casts and Required, templates
    13. Output        what comes of a job: its end, its processes, its output, its log
    14. Runs          the run under way, its reports and the outbox where they wait, its heartbeats
    15. Loops         a loop and its slots: fetch, have a function or a command run, report
    16. Text          what a person reads and types: tables, formats, values, task arguments
    17. Commands      what each command does
    18. Command line  commands as one table, parsers and help made from it, main()

A task goes this way from `task submit` to its stored report; the number is the section of the function:

    do_task_submit (17)   reads what was typed
    submit_task (11)      gives the task its id
    Client.call (10)      asks the server over HTTP, or the store in this process
    answer_call (8)       finds the row of ROUTES and checks the fields
    Store.begin (7)       runs the operation under the store's lock
    submit_tasks_op (6)   decides: returns the changes and touches nothing
    State.apply (5)       changes the state, here and at replay; nothing else does
    Journal.add (4)       has the changes written as a line; where that fails they are taken back
    Journal.wait (4)      returns once the line is on disk
    fetch_task (11)       asks for the next task, from a slot of a loop
    fetch_task_op (6)     decides which one
    deliver (14)          reports how the run ended, once it has
    report_task_op (6)    decides what becomes of the task; the line is written as above
"""
import sys

if __name__ == "__main__":  # `import labtasker` in this process finds this very module, never a second copy
    sys.modules["labtasker"] = sys.modules["__main__"]

import collections
import datetime
import errno
import functools
import gc
import heapq
import itertools
import json
import math
import operator
import os
import re
import threading
import time
import zlib

try:
    import fcntl
except ImportError:  # Windows: the client and the worker work, the store says what it needs
    fcntl = None

TYPE_CHECKING = False  # True for type checkers alone: what only they read costs an import of this file nothing
if TYPE_CHECKING:
    import pathlib
    from typing import Any, Callable, Iterable, Iterator, Mapping, SupportsFloat, Union, overload
    from typing_extensions import Literal, TypedDict, Unpack

__version__ = "0.1.0"
THIS_FILE = os.path.abspath(__file__)  # now: a later change of the working folder would make it another

# 1. Values ###################################################################
#
# What all other sections use: errors, ids, names, dotted keys, messages, instants, durations, relative
# dates. Knows nothing of tasks. The only section that reads a clock. Tests: test_values.py,
# test_dates.py, test_dateparser.py.


class LabtaskerError(Exception):
    """The root of all errors of this module. `status` is the HTTP status of the answer that a server makes of it.

    All of them survive pickle and copy, so that a `multiprocessing.Pool` can hand them to the process that waits."""

    status = 500

    def __reduce__(self):
        return _remade, (type(self), self.args, vars(self))


def _remade(kind, args, attributes):
    """Return the error that was pickled or copied, without calling its `__init__`, which takes other arguments."""
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class LabtaskerRuntimeError(LabtaskerError, RuntimeError):
    """An operation failed, although what was asked for is valid."""


class LabtaskerValueError(LabtaskerError, ValueError):
    """An invalid value."""

    status = 400


class LabtaskerTypeError(LabtaskerError, TypeError):
    """A value of the wrong type."""

    status = 400


class LabtaskerNetworkError(LabtaskerError):
    """A request to a server failed."""


class LabtaskerHTTPStatusError(LabtaskerNetworkError):
    """The server (or the store, without a server) refused a request.

    `status_code` is the HTTP status, `detail` the reason (text, or the list of a 422), `url` the server's or None."""

    if TYPE_CHECKING:
        status_code: "int"
        detail: "Any"

    def __init__(self, status_code: "int", detail: "Any", url: "str | None" = None) -> "None":
        self.status_code = self.status = status_code
        self.detail = detail
        super().__init__(detail_text(detail) + (" (HTTP %d, %s)" % (status_code, url) if url else ""))


class LabtaskerConnectError(LabtaskerNetworkError):
    """The server could not be reached, or went away before it answered."""

    is_sent = True  # whether the server may have carried out the request


class NotOurServer(LabtaskerConnectError):
    """Another program, or another store's server, answers at the address of a store's server."""


class WorkerSuspended(LabtaskerRuntimeError):
    """The worker is suspended or crashed and gets no tasks until it is set active."""


class TaskCancelled(LabtaskerError):
    """Raised in a running job when its task is cancelled, or given to another worker, from outside."""


class TransientError(LabtaskerError):
    """Raised in a job: what it needs is missing for now. Its task is pending again without a charged retry, and no loop
    gets it within `delay_s`: a number of seconds, or text like "10 min"."""

    if TYPE_CHECKING:
        delay_s: "float"

    def __init__(self, text: "str" = "", delay_s: "float | str" = 0) -> "None":
        super().__init__(text)
        self.delay_s = float(parse_duration(delay_s)) if delay_s else 0.0


class TaskError(LabtaskerError):
    """Raised in a job: its task can't succeed. It fails for good, whatever its max_retries."""


class FatalWorkerError(LabtaskerError):
    """Raised in a job: this machine can't run any task. The task is handed back, and the loop ends with 1."""


class UsageError(LabtaskerValueError):
    """An invalid command line: exit code 2."""


class SyntaxMistake(LabtaskerValueError):
    """A mistake in a text that a person typed: shows the line and a caret under the 0-based `column`."""

    def __init__(self, message, text, column):
        self.message, self.text, self.column = message, text, column
        start = text.rfind("\n", 0, column) + 1
        line = text[start:].split("\n", 1)[0]
        left = max(0, column - start - 60)
        shown = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", line[left:left + 100])
        super().__init__("%s\n  %s\n  %s^" % (message, shown, " " * (column - start - left)))


class FilterError(SyntaxMistake):
    """A mistake in a filter."""


class RuleError(SyntaxMistake):
    """A mistake in a rule that stops tasks early."""


class TemplateError(SyntaxMistake):
    """A mistake in a command template with its `%(key)` placeholders."""


# Refusals of a server or a store, one class for each HTTP status.
class BadRequest(LabtaskerError): status = 400
class Unauthorized(LabtaskerError): status = 401
class Forbidden(LabtaskerError): status = 403
class NotFound(LabtaskerError): status = 404
class MethodNotAllowed(LabtaskerError): status = 405
class Conflict(LabtaskerError): status = 409
class TooLarge(LabtaskerError): status = 413
class StoreUnavailable(LabtaskerRuntimeError): status = 503
class StoreFull(StoreUnavailable): status = 507


class StoreDamaged(StoreUnavailable):
    """A journal that can't be opened. The message has its path, the byte offset and the command that repairs it."""


class InvalidStateTransition(BadRequest):
    def __init__(self, text):
        super().__init__("InvalidStateTransition: " + text)


class InvalidFields(LabtaskerValueError):
    """Invalid fields of a request: `problems` is a list of (field path, message), `detail` the same as in a 422
    answer."""

    status = 422

    def __init__(self, problems):
        self.problems = [(list(where), message) for where, message in problems]
        self.detail = [{"loc": where, "msg": message, "type": "value_error"} for where, message in self.problems]
        super().__init__(detail_text(self.detail))


def detail_text(detail):
    """Return the `detail` of an error answer, which is text or the list of a 422, as one line of text."""
    if not isinstance(detail, list):
        return str(detail)
    rows = [d if isinstance(d, dict) else {"msg": str(d)} for d in detail]
    return "; ".join(": ".join(filter(None, (".".join(str(p) for p in row.get("loc", ())[1:]), str(row.get("msg")))))
                     for row in rows)


def nearest(word, choices, least=0.6):
    """Return the choice that is most similar to `word`, or None."""
    import difflib
    return next(iter(difflib.get_close_matches(str(word)[:100], [str(c) for c in choices], 1, least)), None)


def cut(text, size=60):
    """Return text of at most `size` characters."""
    return text if len(text) <= size else text[:size - 3] + "..."


def hint(word, choices):
    """Return "; did you mean X?" with the choice that is most similar to `word`; "" if none is."""
    best = nearest(word, choices)
    return "; did you mean %s?" % best if best else ""


def field_hint(name, fields):
    """Return "; did you mean args.lr or summary.lr?" for a dotted name that starts with none of the fields: it may be
    one of these misspelled, or a key within one."""
    top, dot, rest = name[:100].partition(".")
    like = next((prefix + top for prefix in ("task_", "worker_") if prefix + top in fields), None)
    near = nearest(top, fields, 0.6 if dot else 0.8)
    homes = [home for home in ("args", "summary", "metadata") if home in fields and not near]
    meant = [found + dot + rest for found in (like or near,) if found] + ["%s.%s" % (home, name[:60]) for home in homes]
    return "; did you mean %s?" % " or ".join(filter(None, (", ".join(meant[:-1]), meant[-1]))) if meant else ""


def as_uuid(digits):
    """Return a UUID4 as text, made of 32 hexadecimal digits."""
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], "a" + digits[17:20], digits[20:32]))


def new_id():
    """Return a random UUID4 as text. It comes from a batch of 32, and not from `uuid`, which is slow to import."""
    ids = _IDS.get(os.getpid())  # a forked child must not use its parent's ids
    if not ids:
        _IDS.clear()
        text = os.urandom(16 * 32).hex()
        pieces = [text[at:at + 32] for at in range(0, len(text), 32)]
        ids = _IDS[os.getpid()] = list(map(as_uuid, pieces))
    try:
        return ids.pop()
    except IndexError:  # another thread took the last one
        return new_id()


_IDS = {}  # pid: [ids that are not used yet]
MAX_DEPTH = 100  # levels of nested dicts and lists; the functions that walk them recurse
_MAX_KEYS = 100000  # keys of one dict, nested ones included


class Pattern:
    """A regular expression that is compiled at the first use of its `match`, `sub`, ...: importing compiles none."""

    def __init__(self, text, flags=0):
        self.text, self.flags = text, flags

    def __getattr__(self, name):
        method = getattr(re.compile(self.text, self.flags), name)
        setattr(self, name, method)  # the next use finds it without __getattr__
        return method


class _Row(tuple):
    """What the types of `row_type` share."""

    __slots__ = ()
    _fields = _defaults = ()
    _make = classmethod(tuple.__new__)  # of an iterable of all values

    def __new__(cls, *values, **named):
        lack = len(cls._fields) - len(values)
        if named or lack:
            values = cls._completed(values, named, lack)
        return tuple.__new__(cls, values)

    @classmethod
    def _completed(cls, values, named, lack):
        """Return all values, given some by place and some by name."""
        if not named and 0 < lack <= len(cls._defaults):
            return values + cls._defaults[-lack:]
        given = dict(zip(reversed(cls._fields), reversed(cls._defaults)), **named)
        given.update(zip(cls._fields, values))
        if lack < 0 or given.keys() != set(cls._fields) or not named.keys().isdisjoint(cls._fields[:len(values)]):
            raise TypeError("%s has the fields %s" % (cls.__name__, ", ".join(cls._fields)))
        return map(given.get, cls._fields)

    def __getnewargs__(self):
        return tuple(self)

    def __repr__(self):
        return "%s(%s)" % (type(self).__name__, ", ".join("%s=%r" % pair for pair in zip(self._fields, self)))

    def _asdict(self):
        return dict(zip(self._fields, self))

    def _replace(self, **named):
        return type(self)(**dict(self._asdict(), **named))


_value_at = getattr(collections, "_tuplegetter",  # as `namedtuple` does; it came with Python 3.8
                    lambda place, doc: property(operator.itemgetter(place), doc))


def row_type(name, fields, defaults=()):
    """Return a type of named tuples, as `collections.namedtuple` does; `defaults` are those of the last fields.

    That one compiles a text for each type, which would be a large part of what importing this module takes."""
    fields = fields.split() if isinstance(fields, str) else fields
    content = {field: _value_at(place, None) for place, field in enumerate(fields)}
    content.update(__slots__=(), _fields=tuple(fields), _defaults=tuple(defaults))
    return type(name, (_Row,), content)


NAME = Pattern(r"[a-zA-Z0-9_-]{1,100}\Z")
KEY = Pattern(r"[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*\Z")


FREE_KEY = Pattern("[^.\x00-\x1f\x7f-\x9f\ud800-\udfff]+(?:\\.[^.\x00-\x1f\x7f-\x9f\ud800-\udfff]+)*\\Z")
_FREE_FIELDS = ("summary", "metadata", "metadata_update")  # whose keys are the user's: `val/acc`, `mrr@10`


def _is_free(where):
    """Return whether the keys at `where` may be any text."""
    return where[0] in _FREE_FIELDS or where[0] == "updates" and ".".join(where[1:]).split(".")[0] in _FREE_FIELDS


def check_key(key, where):
    """Raise InvalidFields unless `key` consists of letters, digits, `_` and `-`, with single dots between them.

    In a summary and in metadata a key may be any text without control characters."""
    if isinstance(key, str) and _is_free(where if where[0] != "updates" else where + [key]):
        if not FREE_KEY.match(key):
            raise InvalidFields([(["body"] + where, "the key %.120r is empty, has an empty part before, between or "
                                  "after its dots, or has control characters" % (key,))])
    elif not isinstance(key, str) or not KEY.match(key):
        raise InvalidFields([(["body"] + where, "the key %.120r may only have letters, digits, '_' and '-', "
                              "with dots between nested keys" % (key,))])


def unflatten(mapping, where="args"):
    """Return `mapping` with dotted keys as nested dicts at every level, or raise InvalidFields.

    Paths merge in any order. A path that is set twice, or to a value and to a dict, is refused, naming both keys.
    """
    return dict(mapping) if _is_plain(mapping, where in _FREE_FIELDS) else _nested(mapping, [where])


def _is_plain(value, is_free=False):
    """Return whether a dict has only plain keys and no dict inside. This is the common case and quick to check."""
    for key, item in value.items():
        if type(item) is dict or type(item) is list and any(type(each) in (dict, list) for each in item):
            return False
        if key not in _PLAIN_KEYS and not is_plain_key(key):
            if not (is_free and type(key) is str and "." not in key and FREE_KEY.match(key)):
                return False
    return True


def is_plain_key(key):
    """Return whether a key is a text of letters, digits, `_` and `-`. Keys that are, are remembered: all tasks of a
    sweep have the same ones."""
    if key not in _PLAIN_KEYS:
        if not (type(key) is str and NAME.match(key)):
            return False
        if len(_PLAIN_KEYS) < 10000:
            _PLAIN_KEYS.add(key)
    return True


_PLAIN_KEYS = set()


def _nested(value, where):
    """Return a value with dotted keys as nested dicts at every level; `where` is the list of keys that lead to it."""
    if isinstance(value, list):
        return [_nested(item, where + [str(place)]) for place, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    tree, setters = {}, {}  # path: (the key that set it, as spelled; whether it set a value)
    for path, spelled, leaf in _leaves(value, where, ()):
        if len(path) > MAX_DEPTH or len(setters) > _MAX_KEYS:
            raise InvalidFields([(["body"] + where[:1], "more than %d levels or %d keys" % (MAX_DEPTH, _MAX_KEYS))])
        for size in range(1, len(path) + 1):
            mine = spelled, size == len(path)
            other = setters.setdefault(path[:size], mine)
            if other is not mine and (other[1] or mine[1]):
                raise InvalidFields([(["body"] + where[:1], "the keys %r and %r collide: both set %r"
                                      % (other[0], spelled, ".".join(path[:size])))])
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def _leaves(mapping, where, prefix):
    """Yield (path, keys as spelled, value) of each value in a dict; an empty dict counts as a value."""
    for key, value in mapping.items():
        check_key(key, where)
        path = prefix + tuple(key.split("."))
        if isinstance(value, dict) and value:
            yield from _leaves(value, where + [key], path)
        else:
            yield path, ".".join(where[1:] + [key]), _nested(value, where + [key])


def get_path(value, path, default=None):
    """Return the value at `path` (a list of keys) in nested dicts, or `default`."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def merge(old, new):
    """Return `old` with `new` merged in at every level; neither is changed."""
    if not old:
        return new
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


# All text for people passes these functions, whoever wrote it: a terminal obeys control characters, and
# bidirectional overrides change the order in which it shows text.

CONTROL = Pattern("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LOGIN_IN_URL = Pattern(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s\"'<>]*@")


def clean(text, spare="\n\t"):
    """Return `text` with escapes in place of control characters, except those in `spare`."""
    return CONTROL.sub(lambda m: m.group() if m.group() in spare else
                       m.group().encode("unicode_escape").decode("ascii"), text)


def without_login(text):
    """Return `text` with `***` in place of the names and passwords in its URLs."""
    return _LOGIN_IN_URL.sub(r"\1***@", text)


def silence(number=1):
    """Discard what stdout (or stderr) still buffers, so that the interpreter does not complain about it at its end."""
    empty = os.open(os.devnull, os.O_WRONLY)
    os.dup2(empty, number)
    os.close(empty)


def program():
    """Return the command that starts this program, as the user typed it: `labtasker`, `lt`, `python3 -m labtasker` or
    `python3 labtasker.py`. In a user's script it is `python3 -m labtasker`."""
    path = sys.argv[0] if sys.argv else ""
    name, python = os.path.basename(path), "python3" if os.name == "posix" else "python"
    if name in ("labtasker", "lt", "labtasker-server"):
        return name.replace("-server", "")
    is_file = name == os.path.basename(THIS_FILE) and not getattr(sys.modules["__main__"], "__spec__", None)
    return "%s %s" % (python, path if is_file else "-m labtasker")


_COMMAND_HINT = Pattern(r"\blabtasker(?= (?:task|loop|serve|init|health|queue|worker|journal|event|watch|config|demo|"
                        r"server|sbatch|completion|help|skill|report|COMMAND|--help)\b)")


def as_started(text):
    """Return a message in which the commands to type name the program as it was started."""
    return _COMMAND_HINT.sub(lambda _: program(), text)


def tell(text):
    """Write a message for people to stderr, cleaned, with escapes for characters that its encoding lacks.

    Where stderr is closed, full or missing, the message is dropped and nothing fails."""
    _to_stderr(clean(without_login(as_started(str(text)))) + "\n")


def tell_json(document):
    """Write a dict to stderr as one line of JSON, its texts as `tell` writes them, in ASCII."""
    _to_stderr(json.dumps({key: without_login(as_started(value)) if isinstance(value, str) else value
                           for key, value in document.items()}) + "\n")


def _to_stderr(text):
    try:
        try:
            sys.stderr.write(text)
        except UnicodeEncodeError:
            sys.stderr.write(text.encode(sys.stderr.encoding, "backslashreplace").decode(sys.stderr.encoding))
        sys.stderr.flush()
    except BrokenPipeError:  # the reader is gone; text left in the buffer would make the exit code 120
        silence(2)
    except (OSError, ValueError, AttributeError):  # AttributeError: there is no stderr
        pass


class Plain:
    """Converts Python values to JSON types: numbers of numpy, torch and the like, dataclasses, paths, sets, tuples.

    `odd(value, where, why)` returns the replacement for a value or key that can't be JSON, or raises; `where` is the
    list of keys that lead to it."""

    def __init__(self, odd):
        self.odd, self.above = odd, []  # the ids of the containers around the value

    def value(self, value, where):
        """Return the value in JSON types."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if issubclass(kind, int):
            number = int.__int__(value)
            return number if -2 ** 63 <= number < 2 ** 64 else self.odd(value, where, "it is outside -2^63 to 2^64-1")
        if issubclass(kind, (float, str)):
            return float.__float__(value) if issubclass(kind, float) else str.__str__(value)
        if len(self.above) >= MAX_DEPTH - 5 or id(value) in self.above:  # a request adds some levels around it
            return self.odd(value, where, "it contains itself" if id(value) in self.above else "it is nested too deep")
        self.above.append(id(value))
        try:
            return self.held(value, kind, where)
        except (LabtaskerError, MemoryError):
            raise
        except Exception as error:  # the user's own methods
            return self.odd(value, where, "it can't be read: " + type(error).__name__)
        finally:
            self.above.pop()

    def held(self, value, kind, where):
        """Return a value that is not a scalar in JSON types; raises what the value's own methods raise."""
        if issubclass(kind, dict):
            return self.items(value.items(), where)
        if issubclass(kind, (list, tuple)):
            return [self.value(item, where + [str(place)]) for place, item in enumerate(value)]
        if issubclass(kind, (set, frozenset)):
            return self.in_order([self.value(item, where) for item in value])
        if hasattr(kind, "__dataclass_fields__"):
            names = [field.name for field in sys.modules["dataclasses"].fields(value)]
            return self.items([(name, getattr(value, name)) for name in names], where)
        if issubclass(kind, os.PathLike) and isinstance(os.fspath(value), str):
            return os.fspath(value)
        number = self.number(value)
        if number is not self:
            return self.value(number, where)
        return self.odd(value, where, "it is of the type %.100s" % kind.__name__)

    def number(self, value):
        """Return the result of `item()` or `tolist()` of a number, array or tensor; self for any other value."""
        if isinstance(value, type):
            return self
        for name, kinds in (("item", _SCALARS), ("tolist", _SCALARS + (list, tuple))):
            try:
                found = getattr(value, name)()
                if type(found) is type(value) and hasattr(found, "__float__"):  # such as numpy.longdouble
                    found = float(found)
            except Exception:  # there is no such method, or the array has more than one item
                continue
            if type(found) in kinds:
                return found
        return self

    def items(self, pairs, where):
        """Return a dict in JSON types; its keys become text, as `json.dumps` does it."""
        found = {}
        for key, item in pairs:
            name = self.key(key, where)
            if name in found:
                self.odd(key, where, "the key %s is there twice" % name)
                name = next(each for each in map((name.replace("%", "%%") + "_%d").__mod__, itertools.count(2))
                            if each not in found)
            found[name] = self.value(item, where + [name])
        return found

    def key(self, key, where):
        """Return a key of a dict as text."""
        plain = Plain(lambda *_: self).value(key, where)
        if isinstance(plain, str):
            return plain
        if type(plain) in _SCALARS:
            return json.dumps(plain)
        return self.odd(key, where, "it can't be a key, which is text")

    @staticmethod
    def in_order(items):
        """Return the items of a set in an order that is the same in each process."""
        try:
            return sorted(items)
        except TypeError:
            return sorted(items, key=json.dumps)


_SCALARS = (type(None), bool, int, float, str)


def refuse_odd(value, where, why):
    """Raise LabtaskerTypeError for a value that can't be JSON."""
    raise LabtaskerTypeError("%s: %s can't be sent: %s. Send dicts, lists, text, numbers, booleans, None, or objects "
                             "with .item() or .tolist()" % (".".join(where) or "it", repr_of(value), why))


def repr_of(value):
    """Return the repr of a value, cut to REPR_LIMIT characters; it never raises."""
    try:
        return str.encode(repr(value), "utf-8", "backslashreplace").decode("utf-8")[:REPR_LIMIT]
    except Exception:
        return "<%.100s without a repr>" % type.__repr__(type(value))


REPR_LIMIT = 1000


class Instant(float):
    """Seconds since the epoch, UTC. A type of its own, so that filters can tell times from numbers."""

    __slots__ = ()


def now():
    """Return the current time as an Instant, for people to read. Time-outs use `monotonic`."""
    return Instant(int(time.time() * 1e6) / 1e6)  # no finer than its text, so that a parsed text compares equal


def monotonic():
    """Return the seconds of a clock that never jumps. Time-outs are decided by it."""
    return time.monotonic()


# Requests and answers have times as ISO 8601 in UTC; people type durations and dates. Days to years keep the time of
# day in the machine's zone; hours and smaller units are exact.

UTC = datetime.timezone.utc
_from_own_text = getattr(datetime.datetime, "fromisoformat", None)  # not in Python 3.6
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=UTC)
_ISO = Pattern(r"(\d{4})([-/])(\d\d?)\2(\d\d?)(?:[T ](\d\d?):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?)?"
               r" ?(Z|UTC|[+-]\d\d(?::?\d\d)?)?\Z", re.IGNORECASE | re.ASCII)


def to_datetime(instant):
    """Return an instant as an aware datetime in UTC."""
    return datetime.datetime.fromtimestamp(instant, UTC)


@functools.lru_cache(1000)  # a retried task repeats the same timestamps
def format_time(instant):
    """Return an instant as ISO 8601 text in UTC, always with microseconds."""
    fraction, second = math.modf(instant)
    micro = round(fraction * 1000000)
    if not 0 <= micro < 1000000:  # rounded up to a whole second, or before 1970
        second, micro = second + micro // 1000000, micro % 1000000
    return "%s.%06d+00:00" % (_second_text(second), micro)


@functools.lru_cache(1000)  # most times in an answer lie in the same few seconds
def _second_text(second):
    return (_EPOCH + datetime.timedelta(seconds=second)).isoformat()[:19]


@functools.lru_cache(1000)  # as `format_time`
def parse_time(text):
    """Return the Instant that ISO 8601 text means, or raise ValueError. Without a zone it is UTC."""
    if len(text) == 32 and text[4] + text[7] + text[10] + text[26:] == "--T+00:00" and _from_own_text:
        try:
            return Instant(_from_own_text(text).timestamp())  # as `format_time` writes it
        except ValueError:  # the rest of it is something else
            pass
    found = _ISO.match(text)
    if not found:
        raise ValueError("%r is not an ISO 8601 time, such as 2026-11-22T06:00:00+00:00" % text)
    year, _, month, day, hour, minute, second, fraction, zone = found.groups("")
    wall = datetime.datetime(int(year), int(month), int(day), *_clock(hour, minute, second, fraction))  # noqa: DTZ001
    return _instant(wall, _zone(zone) or UTC)


@functools.lru_cache(1000)  # as parse_time
def datetime_of(text):
    """Return the aware datetime that ISO 8601 text means."""
    return to_datetime(parse_time(text))


def _clock(hour, minute, second, fraction):
    """Return (hour, minute, second, microsecond) from texts, of which the last ones may be empty."""
    return int(hour or 0), int(minute or 0), int(second or 0), int(((fraction or "") + "000000")[:6])


def _zone(text):
    """Return the tzinfo for `Z`, `UTC`, `+02:00`, `+0200` or `+02`; None (the machine's zone) for an empty text."""
    if not text:
        return None
    if text[0] not in "+-":
        return UTC
    ahead = datetime.timedelta(hours=int(text[1:3]), minutes=int(text[3:].lstrip(":") or 0))
    return datetime.timezone(-ahead if text[0] == "-" else ahead)


def _instant(wall, zone):
    """Return the Instant at which the clocks of `zone` (None: this machine's) show `wall`."""
    return Instant(wall.replace(tzinfo=zone).timestamp())


UNITS = {  # unit: (its spellings, (months, days, seconds))
    "second": ("s sec secs second seconds", (0, 0, 1)),
    "minute": ("m min mins minute minutes", (0, 0, 60)),
    "hour": ("h hr hrs hour hours", (0, 0, 3600)),
    "day": ("d day days", (0, 1, 0)),
    "week": ("w wk wks week weeks", (0, 7, 0)),
    "month": ("mo mos month months", (1, 0, 0)),
    "year": ("y yr yrs year years", (12, 0, 0)),
}
_SPELLINGS = {word: parts for _spellings, parts in UNITS.values() for word in _spellings.split()}
_COUNTS = dict(zip("one two three four five six seven eight nine ten eleven twelve".split(), range(1, 13)), a=1, an=1)
_QUANTITY = Pattern(r"(\d+(?:\.\d+)?|(?:%s)\b) ?([a-z]+) ?(?:(?:, ?and\b|,|and\b) ?(?=.))?" % "|".join(_COUNTS),
                    re.ASCII)
DURATIONS = ("90", "50s", "10 min", "1.5h", "1h30m", "1 hour, 30 minutes")


def _amounts(text):
    """Return [months, days, seconds] of a text like "1h30m" or "a day, 2 hours"; None for any other text."""
    total, end = [0, 0, 0], 0
    while end < len(text):
        found = _QUANTITY.match(text, end)
        parts = found and _SPELLINGS.get(found.group(2))
        amount = parts and float(_COUNTS.get(found.group(1)) or found.group(1))
        if not parts or parts[0] and not amount.is_integer():  # half a month is not a fixed number of days
            return None
        total = [whole + amount * part for whole, part in zip(total, parts)]
        end = found.end()
    return total if end else None


def after(at, place):
    """Return the time of the place-th change of a transaction. The times differ, which keeps the changes in order."""
    return Instant(round(at + place * 1e-6, 6)) if place else at


def parse_duration(value):
    """Return the seconds that a number, or text like "90", "10 min" or "1h30m", means; LabtaskerValueError else."""
    seconds = value if type(value) in (int, float) else None
    if isinstance(value, str):
        text = " ".join(value.lower().split())
        is_number = re.match(r"\d+(\.\d*)?\Z|\.\d+\Z", text)
        months, days, exact = (0, 0, float(text)) if is_number else _amounts(text) or (1, 0, 0)
        seconds = None if months else days * 86400 + exact
    if seconds is None or not 0 <= seconds < math.inf:
        raise LabtaskerValueError("%r is not a duration; understood are seconds or text such as %s"
                                  % (value, ", ".join('"%s"' % shown for shown in DURATIONS)))
    return float(seconds)


WEEKDAY_NAMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTH_NAMES = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
               "november", "december")
_WEEKDAYS = {name[:size]: place for place, name in enumerate(WEEKDAY_NAMES) for size in range(3, len(name) + 1)}
_MONTHS = {name[:size]: place for place, name in enumerate(MONTH_NAMES, 1) for size in range(3, len(name) + 1)}
_DAYS = {None: 0, "today": 0, "yesterday": -1, "tomorrow": 1}
_SAME_AS = {"now": "0s", "last week": "1 week ago", "last month": "1 month ago", "last year": "1 year ago",
            "next week": "in 1 week", "next month": "in 1 month", "next year": "in 1 year"}
DATE_FORMS = (  # examples for the help and for the error about an unknown date
    "now", "3 hours ago, two days ago", "in 2 days, 2 days from now", "1h30m", "last week, next month",
    "2026-11-22 06:00, 2026/11/22 06:00 UTC",
    "today, yesterday at 3pm, last monday, 11:25, 28 July, Jul 28 2025 11:25 +02:00", "1753701930")
_MOMENT = Pattern(r"""
    (?P<date> (?P<day>today|yesterday|tomorrow)
      | (?: (?P<side>last|next)\ )? (?P<weekday>%(weekday)s)
      | (?P<y>\d{4}) (?P<dash>[-/.]) (?P<m>\d\d?) (?P=dash) (?P<d>\d\d?)
      | (?: (?:%(weekday)s),?\ )?
        (?: (?P<month>%(month)s)\.?\ (?P<nth>\d\d?)%(th)s | (?P<nth_>\d\d?)%(th)s[ -](?P<month_>%(month)s)\.? )
        (?: (?:,?\ |-) (?P<year>\d{4}) )? )?
    (?: (?:^|,?\ at\ |,?\ |(?<=\d)t)
        (?P<hour>\d\d?) (?=:|\ ?[ap]m) (?: :(?P<minute>\d\d) (?: :(?P<second>\d\d) (?: [.,](?P<fraction>\d+) )? )? )?
        (?: \ ?(?P<half>[ap]m) )? )?
    (?: \ ?(?P<zone>z|utc|gmt|[+-]\d\d(?::?\d\d)?) )?
    (?: \ (?P<year_>\d{4}) )? \Z""" % {
    "weekday": "|".join(_WEEKDAYS), "month": "|".join(_MONTHS), "th": "(?:st|nd|rd|th)?"}, re.VERBOSE | re.ASCII)


def parse_date(text, now):
    """Return the Instant that a person means by `text` at the time `now`, or raise LabtaskerValueError."""
    words = " ".join(text.lower().split())
    words = _SAME_AS.get(words, words)
    try:
        found = _shifted(words, now)
        found = _moment(words, now) if found is None else found
    except (ValueError, OverflowError):
        raise LabtaskerValueError("the date %r does not exist" % text)
    if found is None:
        raise LabtaskerValueError("the date %r is not understood; understood are %s"
                                  % (text, ", ".join('"%s"' % shown for shown in DATE_FORMS)))
    return found


# Both return None for a text of another form, and raise ValueError or OverflowError for a date that does not exist.


def _shifted(text, now):
    """Return the Instant that "3 hours ago", "1h30m" or "in 2 days" is away from `now`.

    A day that its month lacks becomes the month's last."""
    found = re.match(r"(?:in (.*)|(.*) from now|(.*) ago|-?(.*))\Z", text)
    amounts = _amounts(found.group(found.lastindex))
    if not amounts:
        return None
    months, days, seconds = amounts if found.lastindex < 3 else [-amount for amount in amounts]
    if months or days:
        wall = datetime.datetime.fromtimestamp(now)  # noqa: DTZ006
        year, month = divmod(wall.year * 12 + wall.month - 1 + int(months), 12)
        first = wall.replace(year=year, month=month + 1, day=1)
        last = (first + datetime.timedelta(days=31)).replace(day=1) - datetime.timedelta(days=1)
        wall = min(first + datetime.timedelta(days=wall.day - 1), last)
        now = _instant(wall + datetime.timedelta(days=days), None)
    to_datetime(now + seconds)
    return Instant(now + seconds)


def _moment(text, now):
    """Return the Instant of a day, a time of day, or both.

    Missing parts are today's, in the given zone; without a time of day it is midnight. "monday" is the latest Monday,
    today included."""
    if re.match(r"\d{10}\Z", text):
        return Instant(text)
    found = _MOMENT.match(text.replace("midnight", "00:00").replace("noon", "12:00"))
    part = found.groupdict() if found else {}
    month, year = part.get("month") or part.get("month_"), part.get("year") or part.get("year_")
    if not (part.get("date") or part.get("hour")) or part["year_"] and (part["year"] or not month):
        return None
    zone = _zone(part["zone"])
    today = datetime.datetime.fromtimestamp(now, zone)
    if month:
        date = datetime.date(int(year or today.year), _MONTHS[month], int(part["nth"] or part["nth_"]))
    elif part["y"]:
        date = datetime.date(int(part["y"]), int(part["m"]), int(part["d"]))
    else:
        ahead = _DAYS[part["day"]]
        if part["weekday"]:
            back = (today.weekday() - _WEEKDAYS[part["weekday"]]) % 7
            ahead = 7 - back if part["side"] == "next" else -(back or 7 * (part["side"] == "last"))
        date = today.date() + datetime.timedelta(days=ahead)
    hour, minute, second, micro = _clock(part["hour"], part["minute"], part["second"], part["fraction"])
    if part["half"]:
        hour = hour % 12 + 12 * (part["half"] == "pm") if 1 <= hour <= 12 else 24
    return _instant(datetime.datetime.combine(date, datetime.time(hour, minute, second, micro)), zone)


# 2. Filters ##################################################################
#
# Filter text -> query document -> predicate of a record; and the sort order of values. Knows nothing of
# the journal, of HTTP and of the fields that a record has. Grammar: the docstrings of _Parser. Uses 1.
# Tests: test_filters.py, test_mongomock.py; patterns that explode: test_security.py.

_MAX_FILTER_CHARS = 100000  # of a filter's text; its tokens take a thousand times as many bytes
_MAX_NESTING = 40      # levels of brackets and arithmetic in a filter's text
MAX_LEVELS = 100      # levels of dicts and lists in a query document
_MAX_PARTS = 2000      # comparisons and calculations in a query document; each is evaluated for each record

TOKEN = Pattern(r"""
    (?P<space>\s+)
  | (?P<string>[rR]?(?P<quote>["'])(?:\\.|(?!(?P=quote))[^\\])*(?P=quote))
  | (?P<octal>0\d)
  | (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<sign><=|>=|==|!=|<>|&&|\|\||//|\*\*|[-+*/%<>=!&|~()\[\].,])
  | (?P<open>["']) | (?P<brace>[{}]) | (?P<odd>.)
""", re.VERBOSE | re.DOTALL | re.ASCII)
ESCAPE = Pattern(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-3]?[0-7]{1,2}|[abfnrtv\\'\"\n])")


def parse_filter(text, fields, now):
    """Return the query document of filter text over records with these top-level `fields`, or raise FilterError.

    Dates such as "3 hours ago" are resolved here, from `now`.
    """
    if len(text) > _MAX_FILTER_CHARS:
        raise FilterError("a filter of over %d characters; split it" % _MAX_FILTER_CHARS, text, _MAX_FILTER_CHARS)
    return _Parser(text, list(fields), now).filter()


class _Tokens:
    """The tokens of a filter's text. `kind`, `word` and `column` are those of the next token."""

    def __init__(self, text):
        self.text, self.word = text, None
        self.tokens = iter(list(self.split()))
        self.take()

    def split(self):
        """Yield (kind, text, column) of each token; raise FilterError for an unknown one, or if nested too deep."""
        brackets, signs, last = 0, 0, None
        for found in TOKEN.finditer(self.text):
            kind, word, column = found.lastgroup, found.group(), found.start()
            brackets += (word in "([") - (word in ")]")
            signs = 0 if word in ("and", "or", ",") else signs + (word in ARITHMETIC)
            self.require(brackets + signs <= _MAX_NESTING, "this is nested more than %d deep" % _MAX_NESTING, column)
            self.require(word not in INSTEAD or last == ".", INSTEAD.get(word), column)
            self.require(kind not in _UNREADABLE, _UNREADABLE.get(kind, "").format(word), column)
            if kind != "space":
                last = word
                yield kind, word, column
        yield "end", "the end", len(self.text)

    def take(self):
        """Return the text of the next token and advance to the one after it."""
        taken = self.word
        self.kind, self.word, self.column = next(self.tokens, (None, None, None))
        return taken

    def expect(self, word, wanted):
        """Take `word`, or raise FilterError with `wanted`: what the text must have here."""
        self.require(self.word == word, "%s expected, not %s%s" % (wanted, self.shown(), self.if_text()))
        self.take()

    def around(self, column):
        """Return what stands around a column, from blank to blank, bracket, comma or sign of comparison."""
        begin = column - len(re.search(r"[^\s()\[\],<>=!\"']*\Z", self.text[max(0, column - 100):column]).group())
        return re.match(r"[^\s()\[\],<>=!\"']*", self.text[begin:column + 100]).group()

    def if_text(self):
        """Return what to write where the next token goes on, or begins, a text without quotes; else nothing."""
        before, word = self.text[:self.column], self.around(self.column)
        is_going_on = word and not word.startswith(self.word) and self.kind in ("name", "number")
        is_begin = self.word in ("/", "*", "%", ".") and before.rstrip().endswith(tuple("=<>"))
        return "; a text is written in quotes: \"%.60s\"" % word if is_going_on or is_begin else ""

    def string(self):
        """Take a quoted text and return its value. As in Python, an unknown escape stays as it is."""
        try:
            text = self.word[2:-1] if self.word[0] in "rR" else ESCAPE.sub(
                lambda found: found.group().encode().decode("unicode_escape"), self.word[1:-1])
        except ValueError:
            self.fail("there is no such character as one of the escapes here means")
        self.take()
        return text

    def number(self):
        text = self.take()
        return int(text) if text.isdigit() and len(text) < 400 else float(text)

    def fail(self, message, column=None):
        raise FilterError(message, self.text, self.column if column is None else column)

    def require(self, is_right, message, column=None):
        if not is_right:
            self.fail(message, column)

    def shown(self):
        return "a text in quotes" if self.kind == "string" else "%.60s" % self.word


class _Parser:
    """A recursive-descent parser: each method reads what its docstring says and returns (kind, node, column).

    The node of a "test" is a query document; of a "const" the constant, a date as {"_dt": ...}; of a "path" its dotted
    keys; of a "sum" a value for $expr. A mistake raises FilterError at its column, and the message says what to
    write."""

    def __init__(self, text, fields, now):
        self.next, self.fields, self.now, self.arrays = _Tokens(text), fields, now, 0  # arrays it is in just now

    def filter(self):
        """filter: expression END"""
        self.next.require(self.next.kind != "end", "the filter is empty; write for example status == \"pending\"")
        found = self.expression()
        self.next.require(self.next.word != ")", "this parenthesis was never opened")
        self.next.expect("the end", "and, or, or a comparison")
        return self.tested(found)

    def expression(self, binding=0):
        """expression: operand (SIGN operand | "in" members)*; BINDING has the precedence"""
        left, last = self.operand(), None
        while _BINDING.get(self.next.word, 0) > binding:
            column, sign = self.next.column, self.next.take()
            right = None if sign == "in" else self.expression(_BINDING[sign])
            if sign in ("and", "or"):
                if sign != last:
                    left = "test", {"$" + sign: [self.tested(left)]}, left[2]
                left[1]["$" + sign].append(self.tested(right))
            elif sign in ARITHMETIC:
                left = self.calculated(left, sign, right, column)
            else:
                found = self.members(*left) if sign == "in" else self.compared(left, sign, right, column)
                left = "test", found, left[2]
                self.next.require(_BINDING.get(self.next.word) != _BINDING[sign],
                                  "comparisons can't be chained; write a < b and b < c")
            last = sign
        return left

    def members(self, kind, node, column):
        """members: array | ("list" | "dict") "(" path ")" """
        if self.next.word in ("[", "("):
            self.next.require(kind == "path", "only a field can stand before in [...]", column)
            return {node: {"$in": self.array()}}
        self.next.require(
            self.next.word in ("list", "dict"),
            "after in comes a list such as [\"a\", \"b\"], or list(field), or dict(field); for a part of a text "
            "write regex(field, \"part\")")
        name = self.next.take()
        self.next.expect("(", "( after %s" % name)
        path = self.argument(name)
        self.next.expect(")", "%s(...) takes one field: )" % name)
        self.next.require(kind == "const", "only a constant can stand before in %s(...)" % name, column)
        if name == "list":
            return {path: node}
        is_key = isinstance(node, str) and FREE_KEY.match(node)
        self.next.require(is_key, "a key is text without control characters, with something before and after each dot",
                          column)
        return {path + "." + node: {"$exists": True}}

    def operand(self):
        """operand: "-" operand | "(" expression ")" | array | STRING | NUMBER | CONSTANT | call | path"""
        column = self.next.column
        if self.next.word == "-":
            self.next.take()
            return self.calculated(("const", -1, column), "*", self.operand(), column)
        if self.next.word == "(":
            self.next.take()
            kind, node, _ = self.expression()
            self.next.require(self.next.kind != "end", "this parenthesis is never closed", column)
            self.next.expect(")", "and, or, or a comparison")
            return kind, node, column
        if self.next.word == "[":
            return "const", self.array(), column
        if self.next.kind in ("string", "number"):
            return "const", self.next.string() if self.next.kind == "string" else self.next.number(), column
        if self.next.word in _CONSTANTS:
            return "const", _CONSTANTS[self.next.take()], column
        self.next.require(self.next.kind == "name" and self.next.word not in _KEYWORDS,
                          "a field or a value expected, not %s%s" % (self.next.shown(), self.next.if_text()))
        name = self.next.take()
        return self.call(name, column) if self.next.word == "(" else ("path", self.path(name, column), column)

    def array(self):
        """array: "[" [expression ("," expression)* [","]] "]"; after `in` the brackets may be round"""
        column, closing, items = self.next.column, {"[": "]", "(": ")"}[self.next.take()], []
        while self.next.word != closing:
            self.arrays += 1
            kind, item, at = self.expression()
            self.arrays -= 1
            self.next.require(kind == "const", "a list can only hold constants", at)
            items.append(item)
            self.next.require(self.next.kind != "end", "this list is never closed by %s" % closing, column)
            if self.next.word != closing:
                self.next.expect(",", ", or %s" % closing)
        self.next.take()
        return items

    def path(self, name, column):
        """path: FIELD ("." NAME | "[" (STRING | NUMBER) "]")*"""
        if name not in self.fields:
            self.unknown(name, column)
        keys = [name]
        while self.next.word in (".", "["):
            if self.next.take() == "[":
                keys.append(self.subscript())
                continue
            self.next.require(self.next.kind == "name", "a key expected after the dot, not %s" % self.next.shown())
            keys.append(self.next.take())
        self.next.require(self.next.kind != "number" or self.next.word[0] != ".",
                          "a key that starts with a digit is written in brackets: [\"0x\"], an index [0]")
        self.next.require(self.next.word != "(", "%.60s can't be called; there are only %s" % (".".join(keys), _CALLED))
        return ".".join(keys)

    def unknown(self, name, column):
        """Fail at a name that is no field: say whether it may be a text without quotes, and which field was meant."""
        before, after = self.next.text[:column].rstrip(), self.next.text[column + len(name):]
        word = self.next.around(column)
        is_field = word.startswith(tuple(field + "." for field in self.fields))
        found = re.match(r"\s*(?:==|[<>]=?)\s*(\w+)", after)
        is_value = before.endswith(tuple("=<>")) or self.arrays or found and found.group(1) in self.fields
        meant = field_hint(re.match(r"\w+(\.\w+)*", self.next.text[column:]).group(), self.fields) or "."
        if is_field:
            meant = "; such a key is written %s[\"%.60s\"]%s" % (tuple(word.split(".", 1)) + (meant,))
        elif is_value:
            meant = "; a text is written in quotes: \"%.60s\"%s" % (
                word, ", an argument args.%.60s." % name if "args" in self.fields else ".")
            meant = "; a date is written date(\"%.60s\")." % word if self.is_date(word) else meant
        self.next.fail("unknown field %.60s%s The fields are %s" % (name, meant, ", ".join(self.fields)), column)

    def is_date(self, word):
        """Return whether a word is one that date() takes."""
        try:
            return bool(parse_date(word, self.now))
        except LabtaskerValueError:
            return False

    def subscript(self):
        column, shown = self.next.column, self.next.shown()
        key = self.next.string() if self.next.kind == "string" else self.next.take() if self.next.word.isdigit() else ""
        self.next.require(FREE_KEY.match(key),
                          "in brackets comes a key such as [\"lr\"] or an index such as [0], not %s" % shown, column)
        self.next.expect("]", "] after the key")
        return key

    def call(self, name, column):
        """call: "exists" "(" exists ")" | "regex" "(" regex ")" | "date" "(" date ")" """
        self.next.require(name not in ("list", "dict"),
                          "%s(...) only comes after in, as in \"v1\" in %s(metadata.tags)" % (name, name), column)
        if name not in CALLS:
            self.next.fail("unknown function %.60s; there are %s%s" % (name, _CALLED, hint(name, CALLS)), column)
        self.next.take()
        kind, node = CALLS[name](self)
        self.next.expect(")", ") to close %s(...)" % name)
        return kind, node, column

    def exists(self):
        """exists: path ["," ("True" | "False")]"""
        path, wanted = self.argument("exists"), True
        if self.next.word == ",":
            self.next.take()
            self.next.require(self.next.word in ("True", "False"),
                              "exists(field, ...) takes True or False, not %s" % self.next.shown())
            wanted = _CONSTANTS[self.next.take()]
        return "test", {path: {"$exists": wanted}}

    def regex(self):
        """regex: path "," STRING"""
        path = self.argument("regex")
        self.next.expect(",", "a comma and a pattern in quotes")
        pattern, _ = self.quoted("regex(field, ...) takes a pattern in quotes", compile_pattern)
        return "test", {path: {"$regex": pattern}}

    def date(self):
        """date: STRING"""
        _, found = self.quoted("date(...) takes a date in quotes, such as date(\"3 hours ago\")",
                               lambda text: parse_date(text, self.now))
        return "const", {"_dt": to_datetime(found).isoformat()}

    def argument(self, name):
        """Return the path that is the argument of a call."""
        self.next.require(self.next.kind == "name" and self.next.word not in _KEYWORDS,
                          "%s(...) takes a field, not %s" % (name, self.next.shown()))
        column = self.next.column
        return self.path(self.next.take(), column)

    def quoted(self, otherwise, read):
        """Return the quoted text that is the argument of a call, and the result of `read` for it."""
        self.next.require(self.next.kind == "string", otherwise)
        column, text = self.next.column, self.next.string()
        try:
            return text, read(text)
        except LabtaskerValueError as mistake:
            self.next.fail(str(mistake), column)

    # From what was parsed to a query document

    def tested(self, found):
        """Return the query document of an operand, or fail if the operand is a value and not a test."""
        kind, node, column = found
        if kind == "const" and type(node) is bool:
            return {"$expr": node}
        self.next.require(kind == "test", "this is a value and not a test; compare it, as in args.lr == 0.1", column)
        return node

    def value(self, found):
        """Return the value for $expr of an operand, or fail if the operand is a test."""
        kind, node, column = found
        self.next.require(kind != "test", "a comparison is not a value; join comparisons with and, or", column)
        if kind == "path":
            return "$" + node
        is_special = isinstance(node, list) or isinstance(node, str) and node.startswith("$")
        return {"$literal": node} if is_special else node

    def compared(self, left, sign, right, column):
        value = {COMPARISONS[sign]: [self.value(left), self.value(right)]}
        kinds = left[0], right[0]
        self.next.require(set(kinds) != {"const"}, "this compares two constants; one side has to be a field", column)
        if kinds == ("const", "path"):
            left, sign, right = right, _MIRRORED[sign], left
        if set(kinds) == {"const", "path"}:
            return {left[1]: right[1] if sign == "==" else {COMPARISONS[sign]: right[1]}}
        return {"$and": [{path: {"$exists": True}} for path in dict.fromkeys(_paths(value))] + [{"$expr": value}]}

    def calculated(self, left, sign, right, column):
        name, values = ARITHMETIC[sign], [self.value(left), self.value(right)]
        for kind, node, at in (left, right):
            self.next.require(kind != "const" or type(node) in _NUMBERS, "%s needs numbers" % self.next.text[column],
                              at)
        if left[0] != "const" or right[0] != "const":
            return "sum", {name: values}, left[2]
        result = EXPRESSIONS[name](*values)
        self.next.require(result is not MISSING, "this can't be calculated", column)
        return "const", result, left[2]


def _paths(value):
    """Yield each path in a value of $expr."""
    if isinstance(value, str) and value.startswith("$"):
        yield value[1:]
    elif isinstance(value, (list, dict)) and "$literal" not in value:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)


CALLS = {"exists": _Parser.exists, "regex": _Parser.regex, "date": _Parser.date}
_CALLED = ", ".join("%s()" % name for name in CALLS)
COMPARISONS = {"==": "$eq", ">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte"}
_MIRRORED = {"==": "==", ">": "<", ">=": "<=", "<": ">", "<=": ">="}
ARITHMETIC = {"+": "$add", "-": "$subtract", "*": "$multiply", "/": "$divide", "%": "$mod"}
_BINDING = dict(dict.fromkeys(COMPARISONS, 3), **{"or": 1, "and": 2, "in": 3, "+": 4, "-": 4, "*": 5, "/": 5, "%": 5})
_CONSTANTS = {"True": True, "False": False, "None": None}
_KEYWORDS = frozenset("and or in not is if else lambda True False None".split())
_UNREADABLE = {  # kinds of tokens that a filter can't have: the message
    "octal": "a number can't start with 0; a date is written date(\"2026-11-22\")",
    "open": "this quote is never closed",
    "brace": "{!r} means nothing in a filter; compare a dict key by key: args.opt.k == 1",
    "odd": "{!r} means nothing in a filter, but in a text in quotes: \"...\""}
INSTEAD = {word: message.format(word) for words, message in (  # words that people write: what to write instead
    ("!=", "there is no {}; write field < value or field > value, list the values with in [...], or use a regex() that "
           "excludes it"),
    ("not !", "there is no not, nor not in; write the opposite comparison (a <= 1 for a > 1), list the values with in "
              "[...], use exists(field, False), or a regex() that excludes it"),
    ("=", "equality is written =="),
    ("is", "equality is written ==, also with None"),
    ("&& &", "write and instead of {}"), ("|| |", "write or instead of {}"),
    ("// ** ~", "there is no {}; the arithmetic is + - * / %"),
    ("AND", "write and instead of {}"), ("OR", "write or instead of {}"), ("IN", "write in instead of {}"),
    ("true", "write True instead of {}"), ("false", "write False instead of {}"),
    ("null none nil", "write None instead of {}"),
) for word in words.split()}
INSTEAD["<>"] = INSTEAD["!="].replace("!=", "<>")


# Query documents ---------------------------------------------------------------


def compile_query(document, fields, id_field="task_id"):
    """Return a predicate that tells whether a record matches a MongoDB-style query document, and never raises.

    Raises LabtaskerValueError for what is not supported. `_id` means `id_field`; a field that is not one of `fields`
    is missing in every record."""
    has_pattern = "$regex" in set(_keys(document, 0))
    matches = _Query(fields, id_field).matching(document)

    def metered(record):
        _METER.left = _PATTERN_STEPS
        return matches(record)
    return metered if has_pattern else matches


def _keys(value, level):
    """Yield the keys of all dicts in a query document, or raise LabtaskerValueError if it is nested too deep."""
    _require(level <= MAX_LEVELS, "the query is nested more than %d deep" % MAX_LEVELS)
    if isinstance(value, dict):
        yield from value
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _keys(item, level + 1)


class _Query:
    """Makes the predicates of a query document's parts."""

    def __init__(self, fields, id_field):
        self.fields, self.id_field, self.parts = frozenset(fields), id_field, 0

    def count(self, number=1):
        """Add to the number of parts, or raise LabtaskerValueError if there are too many."""
        self.parts += number
        _require(self.parts <= _MAX_PARTS, "the query has over %d comparisons and calculations; to compare a field "
                 "with many values takes one $in (in filter text: field in [...])", _MAX_PARTS)

    def matching(self, document):
        """Return the predicate of a document: all of its entries have to match."""
        _require(isinstance(document, dict), "a query has to be a document {...}, not %.100r", document)
        self.count(len(document) or 1)
        return _all_of([self.entry(key, operand) for key, operand in document.items()])

    def entry(self, key, operand):
        if key == "$expr":
            read = self.value(operand)
            return lambda record: _is_true(read(record))
        if key in LOGIC:
            _require(operand and isinstance(operand, list), _FILLED_LIST, key, operand)
            return LOGIC[key]([self.matching(part) for part in (operand if key == "$and" else _joined(operand))])
        _require(isinstance(key, str) and not key.startswith("$"), _UNSUPPORTED, key, ", ".join([*LOGIC, "$expr"]))
        return self.conditions(self.path(key), operand)

    def path(self, text):
        """Return the keys of a dotted field; the first is "" if there is no such field."""
        first, *keys = text.split(".")
        first = self.id_field if first == "_id" else first
        return [first] + keys if first in self.fields else ["", first] + keys

    def conditions(self, path, operand):
        """Return the predicate of a field's condition: a constant, or a document of operators."""
        if not _has_operators(operand):
            return _reaching(path, _equal_test(operand))
        _require("$options" not in operand or "$regex" in operand, "$options has to stand beside $regex")
        self.count(len(operand) - 1)
        return _all_of([self.condition(path, key, operand) for key in operand if key != "$options"])

    def condition(self, path, key, document):
        """Return the predicate of one operator of a document."""
        operand = document[key]
        _require(key in OPERATORS, _UNSUPPORTED, key, ", ".join(OPERATORS))
        if key in ("$in", "$nin", "$all"):
            _require(isinstance(operand, list), "%s has to be a list, not %.100r", key, operand)
            self.count(sum(key == "$all" or not _kinds(item) for item in operand))  # the others are a set
        if key == "$not":
            _require(_has_operators(operand), "$not takes operators, as in {$not: {$gt: 1}}, not %.100r", operand)
            return _none_of([self.conditions(path, operand)])
        if key == "$all":
            return _all_of([_reaching(path, _in_test([item])) for item in operand] or [_any_of([])])
        found = _reaching(path, OPERATORS[key](document if key == "$regex" else operand))
        return _none_of([found]) if key in ("$ne", "$nin") or key == "$exists" and not operand else found

    def value(self, operand):
        """Return a function of a record that computes a value of $expr, or MISSING if the record has none."""
        self.count()
        if isinstance(operand, str) and operand.startswith("$"):
            first, *keys = self.path(operand[1:])
            return lambda record: _reached(getattr(record, first, MISSING), keys)
        for item in operand if isinstance(operand, list) else ():
            _require(not isinstance(item, (list, dict)) and not str(item).startswith("$"),
                     "a list in $expr holds plain constants; else write {\"$literal\": [...]}")
        name = ", ".join(map(str, operand)) if isinstance(operand, dict) else ""
        if name in ("", "_dt", "$literal") and operand != {}:
            constant = _constant(operand[name] if name == "$literal" else operand)
            return lambda record: constant
        _require(name in EXPRESSIONS, _UNSUPPORTED, name, ", ".join([*EXPRESSIONS, "$literal"]))
        values = operand[name]
        _require(values and isinstance(values, list), _FILLED_LIST, name, values)
        _require(name in _ANY_NUMBER or len(values) == 2, "%s takes two values, not %d", name, len(values))
        calculate, readers = EXPRESSIONS[name], [self.value(item) for item in values]
        if len(readers) != 2:
            return lambda record: calculate(*[read(record) for read in readers])
        left, right = readers
        return lambda record: calculate(left(record), right(record))


def _joined(documents):
    """Return alternatives, with equalities of one field joined to one $in: a set is as fast as a single value."""
    joined, rest = {}, []
    for document in documents:
        (key, operand), = document.items() if isinstance(document, dict) and len(document) == 1 else [(None, None)]
        values = [operand["$eq"]] if operand and isinstance(operand, dict) and list(operand) == ["$eq"] else [operand]
        if isinstance(operand, dict) and list(operand) == ["$in"] and isinstance(operand["$in"], list):
            values = operand["$in"]
        if isinstance(key, str) and not key.startswith("$") and all(map(_kinds, values)):
            joined.setdefault(key, []).extend(values)
        else:
            rest.append(document)
    return rest + [{key: {"$in": values}} for key, values in joined.items()]


def _has_operators(operand):
    return isinstance(operand, dict) and any(isinstance(key, str) and key.startswith("$") for key in operand)


def _require(is_right, message, *shown):
    if not is_right:
        raise LabtaskerValueError(message % shown)


_UNSUPPORTED = "the operator %s is not supported in a query; supported here are %s"
_FILLED_LIST = "%s has to be a list that is not empty, not %.100r"


def _constant(value):
    """Return a constant of a query with each {"_dt": ...} replaced by its Instant."""
    if isinstance(value, list):
        return [_constant(item) for item in value]
    _require(type(value) in _BRACKETS, "%.100r can't stand in a query", value)
    if not isinstance(value, dict):
        return value
    if list(value) == ["_dt"]:
        try:
            return parse_time(value["_dt"])
        except (ValueError, TypeError, OverflowError):
            raise LabtaskerValueError("%.100r is not a time; write for example {\"_dt\": \"2026-11-22T06:00:00+00:00\"}"
                                      % (value,))
    for key in value:
        _require(isinstance(key, str) and not key.startswith("$"), "the key %.100r can't stand in a constant", key)
    return {key: _constant(item) for key, item in value.items()}


# Predicates --------------------------------------------------------------------

MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING", "__slots__": ()})()
_NUMBERS = (int, float)


def _settled(answer, tests):
    """Return a predicate that returns `answer` as soon as one of the tests does, else the opposite."""
    if len(tests) == 1:
        return tests[0]

    def matches(record):
        for test in tests:
            if test(record) is answer:
                return answer
        return not answer
    return matches


_all_of, _any_of = functools.partial(_settled, False), functools.partial(_settled, True)


def _none_of(tests):
    found = _any_of(tests)
    return lambda record: not found(record)


def _reaching(path, test):
    """Return a predicate that tells whether some value at `path` passes `test`, traversing arrays as MongoDB does."""
    first, keys = path[0], tuple(path[1:])

    def matches(record):
        value = getattr(record, first, MISSING)
        for key in keys:
            if type(value) is dict:
                value = value.get(key, MISSING)
            elif type(value) is list:
                return any(map(test, _spread(getattr(record, first), keys, set())))
            else:
                return test(MISSING)
        if type(value) is list:
            return test(value) or any(map(test, value))
        return test(value)
    return matches


def _spread(value, keys, seen):
    """Yield each value that a dotted path reaches from `value`: through an array's dicts, and by index.

    A path beyond a scalar reaches MISSING; beyond a scalar picked by an index it reaches nothing, as in MongoDB.
    `seen` is the set of places reached so far: nested arrays offer exponentially many ways to the same place."""
    place = id(value), len(keys)
    if place in seen:
        return
    if type(value) in (dict, list):
        seen.add(place)
    if not keys:
        yield value
        if type(value) is list:
            yield from value
    elif type(value) is dict:
        yield from _spread(value.get(keys[0], MISSING), keys[1:], seen)
    elif type(value) is list:
        picked = value[int(keys[0])] if _is_index(keys[0], value) else MISSING
        if picked is not MISSING and (len(keys) == 1 or type(picked) in (dict, list)):
            yield from _spread(picked, keys[1:], seen)
        for item in value:
            if type(item) is dict:
                yield from _spread(item, keys, seen)
    else:
        yield MISSING


def _reached(value, keys):
    """Return the value at `keys` for $expr; an array gives its item at an index, else the list of its dicts' values."""
    for place, key in enumerate(keys):
        if type(value) is dict:
            value = value.get(key, MISSING)
        elif type(value) is list and _is_index(key, value):
            value = value[int(key)]
        elif type(value) is list:
            found = [_reached(item, keys[place:]) for item in value if type(item) is dict]
            return [item for item in found if item is not MISSING]
        else:
            return MISSING
    return value


def _is_index(key, array):
    return key.isdecimal() and len(key) < 10 and int(key) < len(array)


# Makers: each takes an operator's operand and returns a function (value) -> bool. A value is what a path reached, an
# item of it if it is an array, or MISSING.


def _equal_test(operand):
    operand = _constant(operand)
    kinds, order = _kinds(operand), order_key(operand, sorted)
    if kinds:
        return lambda value: value == operand and type(value) in kinds
    if operand is None:
        return lambda value: value is None or value is MISSING
    return lambda value: order_key(value, sorted) == order


def _in_test(operands):
    """Return the test of membership: in one set for each type; patterns and values that a set can't hold one by one."""
    sets, rest = {}, []
    for item in operands:
        is_pattern = isinstance(item, dict) and "$regex" in item
        item = item if is_pattern else _constant(item)
        for kind in _kinds(item):
            sets.setdefault(kind, set()).add(item)
        if not _kinds(item):
            rest.append(_pattern_test(item) if is_pattern else _equal_test(item))
    if not rest:
        return lambda value: type(value) in sets and value in sets[type(value)]
    return lambda value: type(value) in sets and value in sets[type(value)] or any(test(value) for test in rest)


def _ordering_test(compare):
    """Return the maker of an ordering, in which only values of the constant's own kind compare."""
    ordered = _ordered(compare)

    def make(operand):
        operand = _constant(operand)
        kinds = _kinds(operand)
        if kinds:
            return lambda value: type(value) in kinds and compare(value, operand)
        return lambda value: ordered(value, operand)
    return make


def _kinds(value):
    """Return the types that Python and queries compare alike with this value: none for null, NaN, dicts and lists."""
    return _COMPARABLE.get(type(value), ()) if value == value else ()


def _exists_test(operand):
    _require(isinstance(operand, (bool, int, float)), "$exists has to be true or false, not %.100r", operand)
    return lambda value: value is not MISSING


# Calculations of $expr with values of all kinds; the result is MISSING if there is none.


def _is_true(value):
    return value is not None and value is not MISSING and not (type(value) in (bool, int, float) and value == 0)


def _ordered(compare):
    """Return a function of two values: whether they are of one kind and `compare` holds; it never does for NaN."""
    def calculate(left, right):
        if type(left) in _NUMBERS and type(right) in _NUMBERS:
            return compare(left, right)
        first, second = order_key(left), order_key(right)
        return left is not MISSING and first[0] == second[0] and compare(first, second)
    return calculate


def _equality(is_equal):
    """Return a function of two values: whether both are there and are equal (or, without `is_equal`, differ)."""
    return lambda left, right: MISSING not in (left, right) and (
        order_key(left, sorted) == order_key(right, sorted)) is is_equal


def _numbers(calculate):
    """Return `calculate` for two numbers, as a function that returns MISSING for other values and without a result.

    An integer beyond 64 bits becomes a float, as in MongoDB: integers could grow without bound."""
    def result(left, right):
        if type(left) not in _NUMBERS or type(right) not in _NUMBERS:
            return MISSING
        try:
            found = calculate(left, right)
            return found if type(found) is float or abs(found) < 1 << 64 else float(found)
        except (ZeroDivisionError, OverflowError, ValueError):
            return MISSING
    return result


def _folded(calculate, total):
    """Return a function that folds any number of values into `total`."""
    pairwise = _numbers(calculate)
    return lambda *values: functools.reduce(pairwise, values, total)


def _remainder(left, right):
    """Return the remainder with the sign of `left`, as MongoDB has it."""
    rest = abs(left) % abs(right)
    return -rest if left < 0 else rest


# Sorting -----------------------------------------------------------------------


SORTED_AT_ONCE = 20000  # records


def sort_records(records, sort, ties):
    """Return the records sorted by [[dotted field, 1 or -1], ...]; `ties` is the key that orders equal records."""
    found = in_order(list(records), ties)
    first = {}
    for field, direction in sort:
        first.setdefault(field, direction)  # the same field again changes nothing
    for field, direction in reversed(list(first.items())):
        keys, last = field.split("."), _NAN_LAST[direction]
        found = in_order(found, lambda record: order_key(get_path(getattr(record, keys[0], None), keys[1:]), nan=last),
                         direction < 0)
    return found


def in_order(records, key, reverse=False):
    """Return a list as `sorted` does. One call of `sorted` holds the interpreter until it is done, so a long list is
    sorted in parts, which are merged."""
    parts = [sorted(records[at:at + SORTED_AT_ONCE], key=key, reverse=reverse)
             for at in range(0, len(records), SORTED_AT_ONCE)]
    return list(heapq.merge(*parts, key=key, reverse=reverse)) if len(parts) > 1 else parts[0] if parts else []


def order_key(value, arranged=iter, nan=(2, 0)):
    """Return the key that sorts values of all kinds, in the order of BRACKETS; `nan` is the key of NaN.

    Dicts compare pair by pair, as in MongoDB: by the kind of the value, then by the key, then by the value. Where only
    equality counts, `arranged` puts the pairs into one order."""
    kind = type(value)
    if kind is list:
        return _BRACKETS[kind], tuple(order_key(each, arranged, nan) for each in value)
    if kind is dict:
        return _BRACKETS[kind], tuple((_BRACKETS[type(each)], key, order_key(each, arranged, nan))
                                      for key, each in arranged(value.items()))
    if value is None or value is MISSING:
        return _NULL_ORDER
    return (_BRACKETS[kind], value) if value == value else nan


# Patterns ----------------------------------------------------------------------
#
# `re` holds the interpreter, and with it every thread, while it backtracks, and `(a+)+$` backtracks exponentially. So
# re's own parser reads a pattern, and the ways in which it can match are counted: those of parts in a row multiply,
# those of alternatives add up, a repeat may end after each round. Only so much of a text is searched as this allows.

_PATTERN_CHARS = 1000      # of a pattern
_PATTERN_STEPS = 10000000  # that all patterns together may take on one record
_FOLDED_RANGE = 2000       # characters of a range like [a-z] under $options i, which re unfolds one by one
PARSER, _COMPILER = (re._parser, re._compiler) if hasattr(re, "_parser") else (re.sre_parse, re.sre_compile)
LETTERS, _REPEATS = ("LITERAL", "NOT_LITERAL", "ANY", "IN"), ("MAX_REPEAT", "MIN_REPEAT")  # the parser's names
_METER = threading.local()  # `left`: the steps that patterns may still take on this thread's current record
_REGEX_OPTIONS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}


@functools.lru_cache(500)
def compile_pattern(pattern, options=""):
    """Return (compiled pattern, [most steps in a text of under 1, 2, 4, 8, ... letters]), or raise LabtaskerValueError.

    The pattern only tells whether a text matches, so repeats at its edges are cut to their minimum."""
    try:
        return _bounded(pattern, options)
    except (re.error, ValueError, OverflowError, RecursionError) as mistake:
        raise LabtaskerValueError("the pattern %.100r can't be used: %s" % (pattern, mistake)) from None


def compile_search(pattern):
    """Return (compiled pattern, characters that it can search in bounded time), or raise LabtaskerValueError.

    Unlike that of `compile_pattern` it finds its groups."""
    try:
        compiled, costs = _bounded(pattern, "", is_trimmed=False)
    except (re.error, ValueError, OverflowError, RecursionError) as mistake:
        raise LabtaskerValueError("the pattern %.100r can't be used: %s" % (pattern, mistake)) from None
    return compiled, 1 << len(costs) - 1


def _bounded(pattern, options, is_trimmed=True):
    unknown = set(options) - set(_REGEX_OPTIONS)
    if unknown:
        raise ValueError("the option %r of $options is not one of i, m, s, x" % min(unknown))
    if len(pattern) > _PATTERN_CHARS:
        raise ValueError("it has over %d characters" % _PATTERN_CHARS)
    tree = PARSER.parse(pattern, sum(_REGEX_OPTIONS[letter] for letter in set(options)))
    flags = (tree.state if hasattr(tree, "state") else tree.pattern).flags
    for end in (0, -1) * is_trimmed:
        _trim(tree, end)
    is_anchored = tree.data and str(tree[0][1]).startswith("AT_BEGINNING") and not flags & re.MULTILINE
    row, costs = _row(tree, flags, None), []
    for size in (1 << power for power in range(18)):
        cost = size + _counted(row, size, 0)[1] if is_anchored else size * _counted(row, size, 1)[1]
        if not cost <= _PATTERN_STEPS:
            break
        costs.append(cost)
    if len(costs) < 8:  # a text of 100 letters, the length of a name, must be affordable
        raise ValueError("it can take too long: it repeats what has repeats or alternatives in it, as (a+)+ does, or "
                         "too much in a row, as .*a.*b.*c.*d does; write fewer repeats, or start it with ^")
    return _COMPILER.compile(tree, flags), costs


def _is_letter(nodes):
    return len(nodes) == 1 and nodes[0][0].name in LETTERS


def _trim(tree, end):
    """Cut the repeats at one end of a parsed pattern to their minimum: `.*lr.*` matches wherever `lr` does."""
    while tree.data and tree[end][0].name in _REPEATS and _is_letter(tree[end][1][2]):
        kind, (low, _, body) = tree[end]
        if low:
            tree[end] = kind, (low, low, body)
            return
        del tree[end]


def _row(nodes, flags, after):
    """Return [(least rounds, most rounds, whether they can end in one place only, alternatives)] of nodes in a row.

    Groups are replaced by their nodes; an alternative is a row again. `after` is the node that follows."""
    row = []
    for (op, value), following in zip(nodes, list(nodes)[1:] + [after]):
        kind = op.name
        if kind == "SUBPATTERN":
            inner = (flags | value[1]) & ~value[2]
            row += _row(value[-1], inner, following if inner == flags else None)
        elif kind in LETTERS or kind == "AT":
            row.append((1, 1, True, []))
            if kind == "IN" and flags & re.IGNORECASE and any(
                    op.name == "RANGE" and item[1] - item[0] > _FOLDED_RANGE for op, item in value):
                raise ValueError("a range of over %d characters where case is nothing" % _FOLDED_RANGE)
        elif kind == "BRANCH":
            row.append((1, 1, False, [_row(each, flags, None) for each in value[1]]))
        elif kind in ("ASSERT", "ASSERT_NOT"):
            row.append((1, 1, True, [_row(value[1], flags, None)]))
        elif kind in _REPEATS:
            low, high, body = value
            row.append((low, int(high), _is_clear(body, flags, following), [_row(body, flags, None)]))
        else:
            raise ValueError("it looks back at a group, or forbids to")
    return row


def _is_clear(body, flags, after):
    """Return whether a repeat can end only where the next node begins, as in `\\d+-` or `\\d+\\s+`."""
    begins = None if not _is_letter(body) or not after or flags & re.IGNORECASE else _begins_with(after)
    if begins is None:
        return False
    own, matches = _begins_with(body[0]), _COMPILER.compile(body, flags).match
    return all(_is_apart(own, matches, item, flags & re.ASCII) for item in begins)


def _begins_with(node):
    """Return the items of the set from which a node takes its first letter; None if it may be empty, or any other."""
    kind, value = node[0].name, node[1]
    if kind == "LITERAL":
        return [node]
    if kind == "IN":
        return None if value[0][0].name == "NEGATE" else list(value)
    inner = value[2] if kind in _REPEATS and value[0] else value[-1] if kind == "SUBPATTERN" and not (
        value[1] or value[2]) else ()
    return _begins_with(inner[0]) if len(inner) else None


def _is_apart(own, matches, item, ascii_flag):
    """Return whether a set, with the items `own`, surely has none of the letters of an item of another set."""
    kind, value = item[0].name, item[1]
    if kind != "CATEGORY":
        first, last = value if kind == "RANGE" else (value, value)
        return last - first <= _FOLDED_RANGE and not any(matches(chr(letter)) for letter in range(first, last + 1))
    if own is None:
        return False
    belongs = re.compile(_CATEGORIES.get(str(value), r"(?s)."), ascii_flag).match
    return all(frozenset((str(value), str(other[1]))) in _APART if other[0].name == "CATEGORY" else _is_apart(
        None, belongs, other, 0) for other in own)


_CATEGORIES = {"CATEGORY_" + ("NOT_" if letter.isupper() else "") + name: "\\" + letter for name, letters in (
    ("DIGIT", "dD"), ("SPACE", "sS"), ("WORD", "wW")) for letter in letters}  # of the parser: what has their letters
_APART = {frozenset("CATEGORY_" + name for name in pair.split()) for pair in (
    "DIGIT NOT_DIGIT", "SPACE NOT_SPACE", "WORD NOT_WORD", "DIGIT SPACE", "WORD SPACE", "DIGIT NOT_WORD")}


def _counted(row, size, ends):
    """Return the most (ways, steps) in which a row can match from one place in a text of `size` letters.

    `ends` counts the repeats before it that may end anywhere; they share the text with those in the row."""
    ways, steps = 1.0, 1.0
    for low, high, is_clear, alternatives in row:
        found = [_counted(each, size, 0) for each in alternatives] or [(1.0, 1.0)]
        ends += high > size and not is_clear
        rounds = max(low, min(high, size / max(ends, 1)))
        inner = min(sum(each for each, _ in found), 1e9) ** min(rounds, 30)
        steps += ways * inner * rounds * sum(each for _, each in found)
        if not is_clear:
            ways *= inner * (rounds - low + 1)
    return ways, steps


def _pattern_test(document):
    """Return the test of a pattern. It searches as much of a text as is affordable, and nothing more once a record has
    cost too much."""
    pattern, options = document["$regex"], document.get("$options", "")
    _require(isinstance(pattern, str) and isinstance(options, str), "$regex and $options have to be text")
    compiled, costs = compile_pattern(pattern, options)
    search, most = compiled.search, len(costs) - 1

    def test(value):
        if type(value) is not str:
            return False
        _METER.left -= costs[min(len(value).bit_length(), most)]
        return _METER.left >= 0 and search(value[:1 << most]) is not None
    return test


_BRACKETS = {type(MISSING): 0, type(None): 0, int: 1, float: 1, str: 3, dict: 4, list: 5, bool: 6, Instant: 7}
_NULL_ORDER = (0, 0)
_NAN_LAST = {1: (2, 0), -1: (0.5, 0)}  # direction of a sort: the key of NaN, which follows the numbers in both
_COMPARABLE = {int: _NUMBERS, float: _NUMBERS, str: (str,), bool: (bool,), Instant: (Instant,)}
LOGIC = {"$and": _all_of, "$or": _any_of, "$nor": _none_of}

OPERATORS = {  # of a field in a query document -> maker of its test; None: it is made of others
    "$eq": _equal_test, "$ne": _equal_test,
    "$gt": _ordering_test(operator.gt), "$gte": _ordering_test(operator.ge),
    "$lt": _ordering_test(operator.lt), "$lte": _ordering_test(operator.le),
    "$in": _in_test, "$nin": _in_test, "$all": None,
    "$exists": _exists_test, "$regex": _pattern_test, "$options": None, "$not": None,
}
EXPRESSIONS = {  # in $expr: what it makes of two values, or of ANY_NUMBER
    "$eq": _equality(True), "$ne": _equality(False),
    "$gt": _ordered(operator.gt), "$gte": _ordered(operator.ge),
    "$lt": _ordered(operator.lt), "$lte": _ordered(operator.le),
    "$add": _folded(operator.add, 0), "$subtract": _numbers(operator.sub),
    "$multiply": _folded(operator.mul, 1), "$divide": _numbers(operator.truediv), "$mod": _numbers(_remainder),
    "$and": lambda *values: all(map(_is_true, values)), "$or": lambda *values: any(map(_is_true, values)),
}
_ANY_NUMBER = ("$add", "$multiply", "$and", "$or")


# 3. Model ####################################################################
#
# Task, worker and queue: their fields as tables, and the two state machines as tables. Knows
# nothing of files and sockets. A record is a named tuple that is never changed: a change makes a
# new one. Uses 1. Tests: test_model.py.

Field = row_type("Field", "kind default extension meaning submitted updated flag", (None, None, None))

# A task field is one row here. The record, the journal, the wire, the filters, the Python functions, `task submit`,
# `task update` and the help derive from it.
#   kind       the kind of its values: a row of KINDS if a request can have it
#   extension  False: every client sees it; True: only a client that asks for extensions; None: no client
#   meaning    its help; that of the flag is the part before the first semicolon
#   submitted  how a submission sets it. "set": as it is. "unflatten": dotted keys become dicts. "id": made by the
#              client. "note": added by the client, and left out when two submissions are compared. None: never
#   updated    how an update sets it. "set": as it is. "merge": into the old value. "move": by TASK_MOVES. None: never
#   flag       its option of `task submit`
TASK_FIELDS = {
    "task_id": Field("id", None, False, "UUID4", "id"),
    "queue_id": Field("id", None, False, "the queue it is in"),
    "status": Field("status", None, False, "pending, running, success, failed or cancelled", None, "move"),
    "task_name": Field("name", None, False, "letters, digits, _ and -, at most 100; or null", "set", "set",
                       "--name --task-name NAME"),
    "created_at": Field("time", None, False, "when it was submitted"),
    "start_time": Field("time", None, False, "when its last run began; null until then"),
    "last_heartbeat": Field("time", None, False, "when its run last sent a heartbeat"),
    "last_modified": Field("time", None, False, "when anything but a heartbeat last changed it"),
    "heartbeat_timeout": Field("seconds", None, False, "give up a run without a heartbeat for this long; null: never",
                               "set", "set", "--heartbeat-timeout TIME"),
    "task_timeout": Field("seconds", None, False, "give up a run that takes longer; null: never", "set", "set",
                          "--task-timeout TIME"),
    "max_retries": Field("count", 3, False, "failed runs after which it fails for good", "set", "set",
                         "--max-retries N"),
    "retries": Field("count", 0, False, "failed runs so far", None, "set"),
    "priority": Field("int", 0, False, "higher is fetched first", "set", "set", "--priority N"),
    "retry_delay": Field("seconds", None, True, "pause before its first retry; doubles with each further one, up to "
                         "an hour; null: none", "set", "set", "--retry-delay TIME"),
    "stop": Field("stop", None, True, "rule that stops it early, such as asha:loss:min; in full asha:METRIC:"
                  "min|max[:eta=3][:from=1] or median:METRIC:min|max[:from=1][:after=5]; null: none", "set",
                  "set", "--stop RULE"),
    "after": Field("ids", [], True, "ids of tasks that have to succeed first; help after", "set", "set",
                   "--after ID,..."),
    "after_any": Field("ids", [], True, "ids of tasks that have to end first, however", "set", "set",
                       "--after-any ID,..."),
    "metadata": Field("dict", {}, False, "the submitter's notes: tags and the like", "unflatten", "merge",
                      "--metadata DICT"),
    "args": Field("dict", {}, False, "the job's arguments", "unflatten", "merge", "--args DICT"),
    "cmd": Field("cmd", "", False, "the command that it is submitted or run with: text or list", "set", "set",
                 "--cmd TEXT"),
    "summary": Field("dict", {}, False, "what the job reported", None, "merge"),
    "worker_id": Field("id", None, False, "the worker that runs it; null when none does"),
    "run_id": Field("id", None, True, "its current run; the last one until the task is reset, cancelled or fetched"),
    "run_end": Field("text", None, True, "how that run ended: success, failed, cancelled, pending, timeout or "
                     "stopped"),
    "interruptions": Field("count", 0, True, "runs that were handed back; they charge no retry"),
    "reason": Field("text", None, True, "why the last run failed, was handed back or stopped early, or why it "
                    "was cancelled"),
    "failure": Field("failure", None, True, "how its last run failed: oom, killed, signal, exit, timeout, exception or "
                     "lost; null: it did not"),
    "not_before": Field("time", None, True, "no loop gets it before then: its job asked so, or a run failed"),
    "attempts": Field("list", [], True, "its last runs: host, pid, worker_id, git, log, start, end, status, exit_code"),
    "git": Field("commit", None, True, "the commit it was submitted from, with -dirty where files were changed since",
                 "note"),
    "curve": Field("curve", None, None, "its history: the points that it reported with a step, at most 1,000"),
    "rungs": Field("list", None, None, "what its rule asha has recorded: [value, step of its point] for each rung"),
    "fetch_id": Field("id", None, None, "the client's id of the fetch that started the run"),
    "digest": Field("int", None, None, "checksum of the submission, by which a repeat of it is known"),
}
WORKER_FIELDS = {
    "worker_id": Field("id", None, False, "UUID4"),
    "queue_id": Field("id", None, False, "the queue it serves"),
    "status": Field("worker_status", None, False, "active, suspended or crashed"),
    "worker_name": Field("name", None, False, "letters, digits, _ and -, at most 100; or null"),
    "metadata": Field("dict", {}, False, "notes"),
    "retries": Field("count", 0, False, "failed runs since it was last set active"),
    "max_retries": Field("count", 3, False, "failed runs at which it is crashed and gets no more tasks"),
    "created_at": Field("time", None, False, "when it was registered"),
    "last_modified": Field("time", None, False, "when it last changed"),
    "ended_at": Field("time", None, True, "when the loop that had made it for itself ended; null: that was not told"),
}
QUEUE_FIELDS = {
    "queue_id": Field("id", None, False, "UUID4"),
    "queue_name": Field("name", None, False, "letters, digits, _ and -, at most 100"),
    "created_at": Field("time", None, False, "when it was created"),
    "last_modified": Field("time", None, False, "when its name, password or metadata last changed, or it was paused"),
    "metadata": Field("dict", {}, False, "notes"),
    "paused_at": Field("time", None, True, "since when it gives out no task; null: it does"),
    "password": Field("text", None, None, "PBKDF2 of its password; null: the store's own users only"),
}


def visible(fields):
    """Return the part of a table of fields that clients can see, sort by and filter by."""
    return {name: field for name, field in fields.items() if field.extension is not None}


SUBMITTED = {name: field for name, field in TASK_FIELDS.items() if field.submitted}
UPDATED = {name: field for name, field in TASK_FIELDS.items() if field.updated}


def _record_type(name, fields):
    """Return the type of a record with these fields and `unknown`: those of a newer version, a dict or None."""
    record = row_type(name, list(fields) + ["unknown"], [field.default for field in fields.values()] + [None])
    record.places = {key: at for at, key in enumerate(fields)}
    record.times = {key for key, field in fields.items() if field.kind == "time"}
    return record


TaskRecord = _record_type("TaskRecord", TASK_FIELDS)
WorkerRecord = _record_type("WorkerRecord", WORKER_FIELDS)
QueueRecord = _record_type("QueueRecord", QUEUE_FIELDS)

# state: {event: next state}. A move that is not here is illegal.
TASK_MOVES = {
    "created": {"submit": "pending"},
    "pending": {"fetch": "running", "reset": "pending", "cancel": "cancelled", "succeed_late": "success",
                "hand_back_late": "pending"},
    "running": {"succeed": "success", "retry": "pending", "fail": "failed", "hand_back": "pending",
                "requeue": "pending", "reset": "pending", "cancel": "cancelled"},
    "success": {"requeue": "pending", "reset": "pending", "cancel": "cancelled"},
    "failed": {"requeue": "pending", "reset": "pending", "cancel": "cancelled", "succeed_late": "success",
               "hand_back_late": "pending"},
    "cancelled": {"requeue": "pending", "reset": "pending"},
}
WORKER_MOVES = {
    "created": {"register": "active"},
    "active": {"activate": "active", "suspend": "suspended", "strike": "active", "crash": "crashed"},
    "suspended": {"activate": "active"},
    "crashed": {"activate": "active", "crash": "crashed"},
}
FAILURES = (  # how a run fails
    "oom",  # out of memory on a GPU, or killed by the kernel for that
    "killed",  # by SIGKILL otherwise
    "signal",  # by another one
    "exit",  # with an exit code
    "timeout",  # it took longer than its task_timeout
    "exception",  # that nobody caught
    "lost")  # its worker was not heard of any more
NAMED_FAILURES = ("oom", "exception")  # whose reason says more than the exit code
TASK_STATES = tuple(state for state in TASK_MOVES if state != "created")
WORKER_STATES = tuple(state for state in WORKER_MOVES if state != "created")


def move(moves, state, event, what):
    """Return the state that `event` leads to, or raise InvalidStateTransition."""
    if event in moves[state]:
        return moves[state][event]
    if event in _BY_HAND:
        raise illegal(moves, state, _BY_HAND[event], what)
    raise InvalidStateTransition("%s is %s, which does not allow %r (allowed: %s)" % (
        what, state, event.replace("_", " "), ", ".join(sorted(moves[state]))))


_BY_HAND = {  # event of what a person sets, or a job reports: the status, which is what a message about it speaks of
    "succeed": "success", "fail": "failed", "retry": "failed", "requeue": "pending", "reset": "pending",
    "hand_back": "pending", "cancel": "cancelled", "succeed_late": "success", "hand_back_late": "pending",
    "activate": "active", "suspend": "suspended", "crash": "crashed"}


WAITS = ("after", "after_any")  # the fields in which a task names those that it waits for
_OVER = ("success", "failed", "cancelled")


def waits(task):
    """Return whether a task may have to wait for others: it is pending, names some, and no run of it has begun."""
    return task.status == "pending" and task.run_id is None and bool(task.after or task.after_any)


def is_done_for(field, task, other):
    """Return whether what a task waits for in a field of WAITS has come: `other` is that task, None where it is gone.

    A task that ran once before minds no more that one that it waited for is gone."""
    if other is None:
        return field == "after_any" or task.start_time is not None
    return other.status in (_OVER if field == "after_any" else ("success",))


def illegal(moves, state, wanted, what):
    """Return the error that a status can't be set, which names those that can."""
    events = [event for event in moves[state] if event in _BY_HAND and not event.endswith("_late")]
    may = sorted({_BY_HAND[event] for event in events} - {state})
    return InvalidStateTransition("%s is %s; its status can be set to %s, not to %s%s" % (
        what, state, " or ".join(may), wanted, ", which only a loop does" if wanted == "running" else ""))


def paths_of(args):
    """Return the shape of a task: the set of paths, as tuples of keys, of the values in its nested `args`."""
    found = set()
    for key, value in args.items():
        if isinstance(value, dict) and value:
            found.update((key,) + path for path in paths_of(value))
        else:
            found.add((key,))
    return frozenset(found)


def covers(required, shape):
    """Return whether a fetch with these `required` dotted fields takes tasks of this `shape`.

    Every required key must be there, and every key must be covered by a required one ("no more, no less"). "*" allows
    further keys. An empty `required` takes every task."""
    prefixes = {tuple(key.split(".")) for key in required if key != "*"}
    heads = {path[:size] for path in shape for size in range(1, len(path) + 1)}
    if not required:
        return True
    if not prefixes <= heads:
        return False
    return "*" in required or all(
        any(path[:size] in prefixes for size in range(1, len(path) + 1)) for path in shape)


# Rules that stop a task early, in comparison with the tasks that have the same name and the same rule.

# `metric`: the dotted key; `path`: its parts; `is_max`: the larger value is the better one; `options`: {name: number}
Rule = row_type("Rule", "kind metric path is_max options")
_RULE_OPTIONS = {  # kind of rule: {option: (default, what its value has to be, whether it is that)}
    "asha": {"eta": (3, "a number from 2 on", lambda value: value >= 2),
             "from": (1, "a number over 0", lambda value: value > 0)},
    "median": {"from": (1, "a number over 0", lambda value: value > 0),
               "after": (5, "a whole number from 0 on", lambda value: type(value) is int and value >= 0)},
}
_RULE_FORM = "write asha:METRIC:min|max[:eta=3][:from=1] or median:METRIC:min|max[:from=1][:after=5]"


@functools.lru_cache(1000)
def parse_rule(text):
    """Return the Rule that the text of `stop` means, or raise RuleError."""
    words, columns = text.split(":"), [0]
    for word in words:
        columns.append(columns[-1] + len(word) + 1)

    def refuse(place, why, within=0):
        raise RuleError("%s; %s" % (why, _RULE_FORM), text, min(len(text), columns[place] + within))
    kind = words[0]
    if kind not in _RULE_OPTIONS:
        refuse(0, "the rules are asha and median, not %s%s" % (cut(repr(kind)), hint(kind, _RULE_OPTIONS)))
    path = words[1].split(".") if words[1:] else []
    if not all(path) or not path:
        refuse(1, "a metric is missing: the key of a value that is reported, such as loss")
    if words[2:3] not in (["min"], ["max"]):
        refuse(2, "min or max expected: which values of %s are better" % cut(words[1]))
    options = {name: row[0] for name, row in _RULE_OPTIONS[kind].items()}
    for place, word in enumerate(words[3:], 3):
        name, equals, number = word.partition("=")
        if name not in options or not equals:
            refuse(place, "%s has the options %s, not %s%s" % (
                kind, " and ".join("%s=%s" % (key, row[0]) for key, row in _RULE_OPTIONS[kind].items()),
                cut(repr(word)), hint(name, options)))
        if any(other.startswith(name + "=") for other in words[3:place]):
            refuse(place, "%s is there twice" % name)
        _, wanted, fits = _RULE_OPTIONS[kind][name]
        is_number = re.match(r"[0-9]{1,15}(\.[0-9]{1,15})?(e[+-]?[0-9]{1,2})?\Z", number, re.ASCII)
        value = (int if number.isdigit() else float)(number) if is_number else None
        if value is None or not fits(value):
            refuse(place, "%s should be %s" % (name, wanted), len(name) + 1)
        options[name] = value
    return Rule(kind, words[1], tuple(path), words[2] == "max", options)


def rule_of(text):
    """Return the Rule that a task has; None without one, and for one that only a newer version knows."""
    try:
        return None if text is None else parse_rule(text)
    except RuleError:
        return None


# Comparisons of a filter that can never be true: their author is told, since all that is seen of them is nothing.

_SORTS_OF_KIND = {kind: sort for sort, kinds in (  # kind of a field: what its values are
    ("a time", "time"), ("a number", "seconds count int"), ("a dict", "dict"), ("a list", "list ids"),
    ("a text", "id name status worker_status failure text commit")) for kind in kinds.split()}
_SORTS = {bool: "true or false", int: "a number", float: "a number", str: "a text", dict: "a dict", list: "a list",
          Instant: "a time"}
_ORDERINGS = {"$eq": "==", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
MOST_COMPARED = 1000  # comparisons of a filter that are looked at


def comparisons(document, level=0):
    """Yield (field, "==" or another sign or "regex", constant) for each comparison of a query document that a record
    has to pass, or may pass beside others. What excludes is left out."""
    for key, operand in document.items() if isinstance(document, dict) and level < MAX_LEVELS else ():
        if key in ("$and", "$or"):
            for each in operand if isinstance(operand, list) else ():
                yield from comparisons(each, level + 1)
        elif isinstance(key, str) and not key.startswith("$"):
            is_plain = not isinstance(operand, dict) or list(operand) == ["_dt"]
            for name, value in [("$eq", operand)] if is_plain else operand.items():
                for each in value if name in ("$in", "$all") and isinstance(value, list) else [value]:
                    if name in _ORDERINGS or name in ("$in", "$all", "$regex"):
                        yield key, _ORDERINGS.get(name, "regex" if name == "$regex" else "=="), each


def _calculated_with(value, level=0, is_inner=False):
    """Yield each field that a query document calculates with."""
    if isinstance(value, str) and is_inner and value.startswith("$"):
        yield value[1:]
    for key, each in value.items() if isinstance(value, dict) and level < MAX_LEVELS else ():
        for one in () if key in ("$in", "$nin", "$all") else each if isinstance(each, list) else [each]:
            yield from _calculated_with(one, level + 1, key in ARITHMETIC.values())


def sort_of(value):
    """Return "a number", "a text", ... for a constant of a query document or a value of a record, None for null."""
    return "a time" if isinstance(value, dict) and list(value) == ["_dt"] else _SORTS.get(type(value))


def doubts(document, fields, states):
    """Return a sentence for each comparison of a query document that can't be true, as the fields' kinds tell.

    `states` are those that a status may be."""
    found = []
    for field, sign, value in itertools.islice(comparisons(document), MOST_COMPARED):
        top, dot, _ = field.partition(".")
        held, given = _SORTS_OF_KIND.get(fields[top].kind) if top in fields else None, sort_of(value)
        if dot:
            found += ["%s is never there: %s is %s, which has no keys" % (field, top, held)] * (
                held not in ("a dict", "a list", None))
        elif given and top in fields and fields[top].kind in ("status", "worker_status", "failure"):
            known = FAILURES if fields[top].kind == "failure" else states
            found += _unknown_status(field, sign, value, known)
        elif held not in (None, "a list") and given not in (None, held):
            found.append(never(field, held, sign, value))
    for field in itertools.islice(_calculated_with(document), MOST_COMPARED):
        held = _SORTS_OF_KIND.get(fields[field].kind) if field in fields else None
        found += ["%s is %s, and only numbers can be calculated with: this is never true" % (field, held)] * (
            held not in ("a number", None))
    return list(dict.fromkeys(found))


def _unknown_status(field, sign, value, states):
    """Return [a sentence] where a status is compared with none of the states, or with a pattern that fits none."""
    try:
        is_known = any(re.search(value, one) for one in states) if sign == "regex" else sign != "==" or value in states
    except Exception:  # it is no pattern, or none that can be compiled: who does that tells it
        return []
    return [] if is_known else ["%s is never true%s The %s are %s" % (
        as_compared(field, sign, value), hint(value, states) or ".", "failures" if states is FAILURES else "statuses",
        ", ".join(states))]


def as_compared(field, sign, value):
    """Return a comparison as it stands in a filter."""
    shown = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    shown = "date(%s)" % json.dumps(str(value["_dt"])) if sort_of(value) == "a time" else shown
    return "regex(%s, %s)" % (field, shown) if sign == "regex" else "%s %s %s" % (field, sign, cut(str(shown)))


def never(field, held, sign, value, where=""):
    """Return why a comparison with a constant of another sort than a field's values is never true, and the way out."""
    text = "%s is never true: %s is %s%s, and this is %s" % (
        as_compared(field, sign, value), field, held, where, "for texts" if sign == "regex" else sort_of(value))
    text = text.replace(", and this is for texts", ", and regex() is for texts")
    meant = None
    if sign != "regex" and held == "a time":
        meant = "date(%s)" % json.dumps(value if isinstance(value, str) else "1 hour ago")
    elif sign != "regex" and held == "a number" and isinstance(value, str):
        meant = value if re.match(r"-?\d+(\.\d*)?(e[+-]?\d+)?\Z", value, re.I | re.ASCII) else None
    elif sign != "regex" and held == "true or false" and str(value).lower() in ("true", "false", "0", "1"):
        meant = str(str(value).lower() in ("true", "1"))
    elif sign != "regex" and held == "a text" and isinstance(value, (int, float)):
        meant = json.dumps(str(value))
    return text + ("; write %s %s %s" % (field, sign, meant) if meant else "")


def misfits(required, shape):
    """Return (the required dotted keys that tasks of this `shape` lack, the dotted keys that they have besides). Both
    are empty where `covers` is true."""
    def within(inner, outer):
        return inner == outer or inner.startswith(outer + ".")
    has, keys = sorted(".".join(path) for path in shape), [key for key in required if key != "*"]
    missing = [key for key in keys if not any(within(path, key) for path in has)]
    extra = [path for path in has if not any(within(path, key) for key in keys)]
    return tuple(missing), () if "*" in required or not required else tuple(extra)


# 4. Journal ##################################################################
#
# An append-only file of JSON lines: lock, append, sync, replay, replace, verify, repair. A line is a transaction:
#   {"n":18,"durable":17,"at":1763800000.1,...,"crc":"89abcdef"}
# `n` counts without gaps, `durable` is the last n known to be on disk when the line was written, `crc` is
# the zlib.crc32 of the bytes before it. The first line names the format. After a compaction it also says
# that the lines up to byte `tail`, {"fold":1,...} and so on, replace lines 1 to `folded`.
# Knows nothing of what a line means. Uses 1. Tests: test_journal.py, test_faults.py.

FORMAT = 1
FSYNC_MODES = {
    "always": "answer once the change is on disk (the default)",
    "interval": "answer once it is written, sync each second; a power cut loses up to a second",
    "never": "answer once it is written, let the system sync; a power cut loses up to half a minute on Linux",
}
_SYNC_INTERVAL_S = 1.0  # between syncs with --fsync interval
READ_BYTES = 1 << 20  # how much is read at once when a journal is replayed
_OWNER_BYTES = 512  # length of an owner file; its JSON is padded with blanks
_BEAT_BYTES = 4096  # how much of a beat file is read; it has one line
_MOST_NOTE_BYTES = 64 << 10  # how much is read of a file in which a process says who it is
MOST_FILE_BYTES = 64 << 20  # how much is read of any other JSON file: four times the largest request to a server
OWNER_LAPSE_S = 12.0  # how long another host's counter must stand still before its store is taken over
HEADER_BYTES = 64 << 10  # more than the length of a journal's first line
_MARK_BYTES = 10  # at the end of a line: the end of its checksum, which identifies the line
_ADOPT_BYTES = 256 << 10  # at most so many bytes of new lines are copied by a compaction while writers wait
_CHECK_HOLDS_S = 0.02  # a process that writes later than this after it looked looks again: it may have been stopped


class Disk:
    """The calls that change files of the store. Tests replace them to make a disk fail."""

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    truncate = staticmethod(os.ftruncate)
    rename = staticmethod(os.replace)

    @staticmethod
    def sync(fd):
        """Return once the file's data is on the disk itself. macOS has a call of its own for that."""
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    @classmethod
    def write_all(cls, fd, data):
        """Write all of `data`; short writes are continued."""
        view = memoryview(data)
        while view:
            view = view[cls.write(fd, view):]

    @classmethod
    def sync_folder(cls, path):
        """Return once the names in the folder of `path` are on disk."""
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            cls.sync(fd)
        except OSError as error:  # some file systems can't sync a folder and need not
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(fd)

    @classmethod
    def create(cls, path, pieces, synced=True, keep=None):
        """Put a file of these byte `pieces` on disk as `path`, completely or not at all.

        A power cut may lose a file that is not `synced`. `keep`: see `replace`."""
        path = path if keep is None else real_path(path)
        draft = cls.draft(path, pieces, synced)
        try:
            cls.replace(draft, path, keep)
        except OSError:
            os.unlink(draft)
            raise
        if synced:
            cls.sync_folder(path)

    @classmethod
    def draft(cls, path, pieces, synced=True):
        """Return the path of a new file of these byte `pieces`, on disk, in the folder of the file at `path`."""
        draft = "%s.new-%d" % (path, os.getpid())
        fd = cls.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            try:
                buffer = bytearray()
                for piece in pieces:
                    buffer += piece
                    if len(buffer) >= READ_BYTES:
                        cls.write_all(fd, bytes(buffer))
                        buffer.clear()
                cls.write_all(fd, bytes(buffer))
                if synced:
                    cls.sync(fd)
            finally:
                os.close(fd)
        except OSError:
            os.unlink(draft)
            raise
        return draft

    @classmethod
    def replace(cls, draft, path, keep=0o7777, ask=None):
        """Rename the file `draft` to `path`; the caller has to sync the folder.

        Owner, group and the bits `keep` of the mode stay those of the file that was there. PermissionError is raised if
        this user may not set them. With `keep` None they are those of the draft. `ask` is called right before the
        rename; it raises if the file must not be replaced."""
        if keep is not None and os.path.exists(path):
            cls.make_like(draft, path, keep)
        if ask:
            ask()
        cls.rename(draft, path)

    @staticmethod
    def make_like(path, model, keep=0o7777):
        """Give a file the owner, the group and the bits `keep` of the mode of the file `model`."""
        now_is, wanted = os.stat(path), os.stat(model)
        if (now_is.st_mode ^ wanted.st_mode) & 0o7777:
            os.chmod(path, wanted.st_mode & keep)
        if (now_is.st_uid, now_is.st_gid) != (wanted.st_uid, wanted.st_gid):
            os.chown(path, wanted.st_uid, wanted.st_gid)

    @classmethod
    def make_folder(cls, path):
        """Make a folder that only its owner can use, and put its name on disk; one that exists stays as it is."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            os.makedirs(parent, exist_ok=True)
            cls.sync_name(parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        cls.sync_name(path)

    @classmethod
    def sync_name(cls, folder):
        """Put the name of a folder on disk, if this process may."""
        try:
            cls.sync_folder(os.path.abspath(folder))
        except PermissionError:  # this user can't open the parent, so somebody else has made and synced it
            pass


def real_path(path):
    """Return the path of a file with symbolic links followed, also of one to be made; a link to a folder or a device
    is not followed."""
    is_followed = os.path.islink(path) and (os.path.isfile(path) or not os.path.exists(path))
    return os.path.realpath(path) if is_followed else os.path.abspath(path)


def discard(path):
    """Remove a file if it exists."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


class FileLock:
    """An exclusive `flock` on a file of its own, which is never renamed or removed.

    Not `lockf`: that lock is lost as soon as this process closes any other descriptor of the file."""

    fd = identity = None  # identity: (device, inode) of the file when it was opened

    def __init__(self, path):
        if fcntl is None:
            raise StoreUnavailable("the store needs POSIX locks, which %s lacks: use a server on another host "
                                   "(labtasker init --url http://host:9321)" % sys.platform)
        self.path = path

    def _open(self):
        """Open the file; a new one gets the owner and mode of the file that it locks."""
        is_new, locked = not os.path.exists(self.path), self.path.rpartition(".")[0]
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        opened = os.fstat(self.fd)
        self.identity = opened.st_dev, opened.st_ino
        if is_new and os.path.exists(locked):
            try:
                Disk.make_like(self.path, locked)
            except OSError:  # this process can use the file anyway
                pass

    def acquire(self, timeout_s):
        """Return whether the lock was taken within `timeout_s`; raise StoreUnavailable if locks don't work here."""
        if self.fd is None:
            self._open()
        give_up_at, pause_s = monotonic() + timeout_s, 0.00005
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if monotonic() >= give_up_at:
                    return False
            except OSError as error:
                raise StoreUnavailable("the file system of %s can't lock files (%s): run one server for all, on a "
                                       "folder that can, with --db-path" % (self.path, error.strerror))
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, 0.005)

    def is_in_place(self):
        """Return whether the locked file is the one that others would lock; True if its folder is missing."""
        if self.fd is None:
            return True
        try:
            status = os.stat(self.path)
            return self.identity in (None, (status.st_dev, status.st_ino))
        except FileNotFoundError:
            return not os.path.isdir(os.path.dirname(self.path))

    def noted(self):
        """Return (last durable line, inode whose name is synced) as the last holder has noted them; else zeros."""
        if self.fd is None:
            return 0, 0
        text, _, check = os.pread(self.fd, 50, 0).rpartition(b" ")
        return tuple(map(int, text.split())) if text and check == b"%08x" % zlib.crc32(text) else (0, 0)

    def note(self, number, inode):
        """Write into the lock's file what `noted` returns to the next holder.

        A note that is lost or out of date only costs that holder a sync, so it is neither locked nor synced."""
        text = b"%020d %020d" % (number, inode)
        try:
            os.pwrite(self.fd, b"%s %08x" % (text, zlib.crc32(text)), 0)
        except OSError:  # a full disk
            pass

    def release(self):
        """Let others take the lock."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self, close=os.close):  # a default value: at the end of the process the module's names can be gone
        """Release the lock and close its file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            close(fd)

    __del__ = close


def host_id():
    """Return a text that identifies this host since its last boot, and the pid namespace of this process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return "%s/%s" % (file.read().strip(), os.readlink("/proc/self/ns/pid"))
    except OSError:
        return os.uname().nodename if hasattr(os, "uname") else "host"


def process_stat(pid):
    """Return (state, process group, start time) of a process of this host: a letter, a number, and a text in the
    kernel's clock ticks. Raises OSError if there is no such process, or no /proc."""
    with open("/proc/%s/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    if len(fields) < 20:
        raise ProcessLookupError(errno.ESRCH, "no process %s" % pid)
    return fields[0], int(fields[2]), fields[19]


def process_start(pid):
    """Return when a living process of this host started, in the kernel's clock ticks; None if there is none."""
    try:
        if not os.path.isdir("/proc/self"):
            os.kill(pid, 0)
            return "unknown"
        state, _, start = process_stat(pid)
        return None if state in "ZX" else start
    except OSError:
        return None


class OddFile(LabtaskerValueError):
    """A file that does not hold what it should: another program, or another version, wrote it."""


def open_plain(path):
    """Return a binary file to read from, or raise OddFile if the path is a pipe, a device or a folder: reading those
    may block or never end."""
    import stat
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                     | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except (IsADirectoryError, ValueError):  # ValueError: a path with a zero byte
        raise OddFile("%r is not a plain file" % path) from None
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket, a device without a driver
            raise
        raise OddFile("%r is not a plain file" % path) from None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise OddFile("%r is not a plain file" % path)


def load_json(path, kinds, needed=(), most_bytes=MOST_FILE_BYTES):
    """Return the dict that a JSON file holds. `kinds`: {field: its type, or [type] for a list}. A field may be missing
    or None unless it is `needed`; other fields are allowed.

    Raises OSError if the file can't be read, OddFile if it holds anything else."""
    with open_plain(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OddFile("%s is over %d bytes" % (path, most_bytes))
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise OddFile("%s is not JSON: %s" % (path, error)) from None
    if not isinstance(content, dict):
        raise OddFile("%s is not a JSON object" % path)
    for name, kind in (kinds or {}).items():
        value = content.get(name)
        if name in needed if value is None else not _is_kind(value, kind):
            raise OddFile("%s: %s %s" % (path, name, "is missing" if value is None else "has the wrong type"))
    return content


def _is_kind(value, kind):
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(item) is kind[0] for item in value)
    return type(value) is kind


def read_json(path, kinds=None, most_bytes=MOST_FILE_BYTES):
    """Return what load_json does, or {} if that raises."""
    try:
        return load_json(path, kinds, (), most_bytes)
    except (OSError, OddFile):
        return {}


_SERVER_KINDS = {"server": str, "key": str, "pid": int, "host": str, "host_id": str, "addresses": [str], "ca_file": str,
                 "started_at": str, "version": str}
_OWNER_KINDS = {"host_id": str, "host": str, "pid": int, "started": str, "server": bool, "count": str, "released": bool}


def read_server_file(folder):
    """Return what the server of the store in `folder` has written about itself into server.json, or None."""
    return read_json(os.path.join(folder, "server.json"), _SERVER_KINDS, _MOST_NOTE_BYTES) or None


def read_beat(path):
    """Return the text of a run's beat file, or None if it can't be read."""
    try:
        with open_plain(path) as file:
            return file.read(_BEAT_BYTES).decode("ascii")
    except (OSError, ValueError):
        return None


class Owner:
    """Which host may write to a store. File locks are not enough: on some file systems other hosts don't see them.

    The file PATH.owner-EPOCH of the highest epoch names the owner. It is made by link(), so that only one process can
    make it. It holds host, process and a counter that changes while the owner lives. An owner stops once its file is
    gone or there is a file of the next epoch. The processes of one host without a server share an epoch."""

    def __init__(self, path, is_server):
        self.path, self.is_server, self.host_id = path, is_server, host_id()
        self.epoch, self.count, self.moved_at = None, 0, -math.inf
        self.process = None, None  # the id of this process, and when it started
        self.files = {}  # epoch: the path of its owner file
        self.used = None, None  # (descriptor of the owner file, which has a shared lock; process that took the lock)
        self.stood_still = {}  # {run id: its beat file} of runs without a beat while a silent owner was watched
        self.unlock = self.lock = lambda: None  # release and take the journal's lock, while another owner is watched

    def _file(self, epoch):
        if epoch not in self.files:
            self.files[epoch] = "%s.owner-%d" % (self.path, epoch)
        return self.files[epoch]

    def epochs(self):
        """Return the epochs for which there is an owner file, lowest first."""
        folder, prefix = os.path.split(self.path + ".owner-")
        ends = [name[len(prefix):] for name in os.listdir(folder) if name.startswith(prefix)]
        return sorted(int(end) for end in ends if re.match(r"[0-9]{1,15}\Z", end))

    def read(self, epoch):
        """Return what the owner of an epoch has written about itself; {} if it can't be read."""
        return read_json(self._file(epoch), _OWNER_KINDS, _MOST_NOTE_BYTES)

    def holds(self):
        """Return whether this process still owns the store."""
        return (self.epoch is not None and os.access(self._file(self.epoch), os.F_OK)
                and not os.access(self._file(self.epoch + 1), os.F_OK))

    def claim(self, takeover=False):
        """Take the store for this host; return whether that began a new epoch; raise StoreUnavailable if another owner
        lives.

        Call it with the lock held; then another server of this host can only live if locks don't work. Another host's
        counter is watched by this host's clock; during that time the lock is released."""
        while True:
            last = (self.epochs() or [0])[-1]
            owner = self.read(last) if last else {"released": True}
            pid, is_server, here = owner.get("pid", 0), owner.get("server"), owner.get("host_id") == self.host_id
            if here and is_server and pid != os.getpid() and process_start(pid) == owner.get("started"):
                raise StoreUnavailable("%s is in use by a server: process %s on this host" % (self.path, pid))
            if here and not self.is_server:
                self.epoch, self.moved_at = last, -math.inf
                self._use()
                self.move()  # at once: the last owner may have released it
                if self.holds():
                    return False
                continue
            if not (here or takeover or owner.get("released") or self._is_silent(last, owner)):
                urls = (read_server_file(os.path.dirname(self.path)) or {}).get("addresses", ())
                raise StoreUnavailable(
                    "%s belongs to %s %s on host %s%s: run commands there, or point them at a server there that "
                    "other hosts can reach (labtasker serve --host 0.0.0.0); if that host is gone for good: labtasker "
                    "serve --takeover" % (self.path, "the server" if is_server else "process", pid, owner.get("host"),
                                          "".join(", at " + url for url in urls)))
            if self._take(last + 1):
                return True

    def _is_silent(self, epoch, owner):
        """Return whether the counter of another host's owner stands still for OWNER_LAPSE_S. That host's runs whose
        beats stand still too are over; they are noted in `stood_still`."""
        def is_still():
            return self.read(epoch).get("count") == owner.get("count")
        give_up_at, before = monotonic() + OWNER_LAPSE_S, self._beats()
        self.unlock()
        try:
            while monotonic() < give_up_at and is_still():
                time.sleep(OWNER_LAPSE_S / 50)
        finally:
            self.lock()
        if not is_still():
            return False
        host = owner.get("host_id", "") + " "
        self.stood_still.update((run_id, text) for run_id, text in self._beats().items()
                                if before.get(run_id) == text and text.startswith(host))
        return self.epochs()[-1:] == [epoch]

    def _beats(self):
        """Return {run id: text} of the beat files beside the journal."""
        folder = os.path.join(os.path.dirname(self.path), "beats")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        texts = ((name, read_beat(os.path.join(folder, name))) for name in names)
        return {name: text for name, text in texts if text}

    def _take(self, epoch):
        """Make the owner file of this epoch and remove older ones; return False if another process has made it."""
        draft = "%s.owner.new-%d" % (self.path, os.getpid())
        self._write(draft, os.O_CREAT | os.O_TRUNC)
        try:
            os.link(draft, self._file(epoch))
        except FileExistsError:
            return False
        except OSError:  # this file system has no hard links
            try:
                self._write(self._file(epoch), os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                return False
        finally:
            if os.path.exists(draft):  # another server that starts removes it
                os.unlink(draft)
        self.epoch = epoch
        self._use()
        for old in self.epochs():
            if old < epoch:
                try:
                    os.unlink(self._file(old))
                except OSError:  # it is gone, or it is a folder that another program has made
                    pass
        return True

    def renew(self, epoch):
        """Own the store in this epoch, which a line of the journal names; return whether that succeeded.

        It fails if another host has taken the store over: then the owner file exists, even if this host's listing of
        the folder is out of date. It succeeds for a journal that was copied here from another folder."""
        return self._take(epoch) and self.epochs()[-1:] == [epoch]

    def _content(self, **more):
        """Return the content of an owner file of this process, always of the same length."""
        self.count, self.moved_at, pid = self.count + 1, monotonic(), os.getpid()
        if self.process[0] != pid:
            self.process = pid, process_start(pid)
        content = dict(host_id=self.host_id, host=os.uname().nodename, pid=pid, started=self.process[1],
                       server=self.is_server, count="%d-%d" % (pid, self.count), **more)
        return json.dumps(content).encode().ljust(_OWNER_BYTES)

    def _write(self, path, flags=0, **more):
        """Write into a file who this process is. It is rewritten in place, which costs less than a new file. A reader
        may see half of it, which still counts as a change."""
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
        try:
            os.write(fd, self._content(**more))
        finally:
            os.close(fd)

    def move(self):
        """Show that the owner lives: change its counter, at most every few seconds."""
        if monotonic() - self.moved_at > OWNER_LAPSE_S / 4 and self.holds():
            try:
                self._write(self._file(self.epoch))
            except OSError:
                pass

    def show(self):
        """Change the counter for this host's processes without a server, from a process that only reads.

        Raises nothing: a file that can't be reached now may be back soon, and another host waits longer than that."""
        if monotonic() - self.moved_at <= OWNER_LAPSE_S / 4:
            return
        try:
            last = (self.epochs() or [0])[-1]
            owner = self.read(last) if last else {}
            if owner.get("host_id") == self.host_id and not owner.get("server"):
                self._write(self._file(last))
        except OSError:
            pass

    def _use(self):
        """Take a shared lock on the owner file. It shows this host's other processes that the store is in use.

        Call it with the journal's lock held. A server needs no such lock: it shares its epoch with no process."""
        self._drop_use()
        if self.is_server:
            return
        fd = None
        try:
            fd = os.open(self._file(self.epoch), os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self.used = fd, os.getpid()
        except OSError:  # without such locks no process here releases the store to other hosts
            if fd is not None:
                os.close(fd)

    def _drop_use(self, close=os.close, getpid=os.getpid):  # bound as in FileLock
        (fd, pid), self.used = self.used, (None, None)
        if fd is not None and pid == getpid():
            close(fd)

    __del__ = _drop_use

    def is_last(self):
        """Return whether no other process of this host uses the store. Call it with the journal's lock held."""
        fd, pid = self.used
        if self.is_server or fd is None or pid != os.getpid():  # a forked process shares the lock of its parent
            return self.is_server
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def release(self):
        """Let another host take the store at once, unless another process of this host uses it."""
        try:
            if self.holds() and self.is_last():
                self._write(self._file(self.epoch), released=True)
        finally:
            self.epoch = None
            self._drop_use()


def json_writer(item_separator=", ", key_separator=": ", sort_keys=False):
    """Return a function from a value to its JSON text. It does not look for circles: one raises RecursionError.

    `JSONEncoder.encode` makes its C encoder anew at each call; here it is made once."""
    plain = json.JSONEncoder(separators=(item_separator, key_separator), sort_keys=sort_keys, check_circular=False)
    try:
        encode = json.encoder.c_make_encoder(None, plain.default, json.encoder.encode_basestring_ascii, None,
                                             key_separator, item_separator, sort_keys, False, True)
        encode({}, 0)
    except (TypeError, AttributeError):  # another Python's encoder, or none
        return plain.encode
    return lambda value: "".join(encode(value, 0))


def seal(text):
    """Return the bytes of a line with its checksum; `text` is its JSON text without the closing brace."""
    return b'%s,"crc":"%08x"}\n' % (text, zlib.crc32(text))


def sealed(value):
    """Return the bytes of a line, with its checksum, that holds a JSON object."""
    kept = {key: item for key, item in value.items() if key != "crc"}
    return seal(json.dumps(kept, separators=(",", ":"))[:-1].encode())


def unseal(line):
    """Return the JSON value of a line, or None if the line is damaged."""
    if line[-19:-11] != b',"crc":"' or line[-3:] != b'"}\n' or b"%08x" % zlib.crc32(line[:-19]) != line[-11:-3]:
        return None
    try:
        value, _ = _read_json(line.decode("ascii"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


_read_json = json.JSONDecoder().raw_decode  # faster than json.loads, as it looks for no white space around the value


def _unseal_all(lines):
    """Return the JSON value of each line, given without its newline; None for a damaged one.

    If none is damaged, all lines are parsed as one text, which is faster."""
    if all([line[-18:-10] == b',"crc":"' and line[-2:] == b'"}' and b"%08x" % zlib.crc32(line[:-18]) == line[-10:-2]
            for line in lines]):
        try:
            values, _ = _read_json("[%s]" % b",".join(lines).decode("ascii"))
            if len(values) == len(lines) and all([type(value) is dict for value in values]):
                return values
        except ValueError:
            pass
    return [unseal(line + b"\n") for line in lines]


def last_durable(pieces):
    """Return the highest `durable` of the complete lines within damaged bytes, wherever they start; 0 if there is none.

    Only bytes that may belong to a line are kept in memory: a crash can leave gigabytes of zeros."""
    highest, held, begun = 0, bytearray(), False
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            held += part + b"\n"
            highest = max(highest, _durable_in(bytes(held)))
            held, begun = bytearray(), False
        cut = rest.rfind(b"\0") + 1
        if cut:  # no line contains a zero byte
            held, begun = bytearray(), False
        held += rest[cut:]
        begin = 0 if begun else held.find(_LINE_BEGINS)
        begun = begin >= 0
        del held[:begin if begun else max(0, len(held) - len(_LINE_BEGINS))]
    return highest


_LINE_BEGINS = b'{"n":'


def _durable_in(data):
    """Return the `durable` of the complete line at the end of these bytes; 0 if there is none."""
    begin = data.find(_LINE_BEGINS) if data[-19:-11] == b',"crc":"' else -1
    while begin >= 0:
        durable = (unseal(data[begin:]) or {}).get("durable")
        if type(durable) is int:
            return durable
        begin = data.find(_LINE_BEGINS, begin + 1)
    return 0


def is_newer(version, other):
    """Return whether a version comes after another one, or after None."""
    if version == other:
        return False
    numbers, other_numbers = (list(map(int, re.findall("[0-9]+", str(text or "")))) for text in (version, other))
    return numbers > other_numbers


def newest(version, other):
    """Return the later one of two versions, each of which may be None."""
    return version if is_newer(version, other) else other


def newer(path, version, what):
    """Return the error for a journal that holds something this version does not know; it says what to do."""
    wrote = "Labtasker %s wrote" % version if is_newer(version, __version__) else "a newer Labtasker wrote"
    return StoreDamaged("%s: %s to it what this one, version %s, does not know (%s). Nothing was changed: go on with "
                        "the newer labtasker.py, copied here in this one's place" % (path, wrote, __version__, what))


def check_format(path, header):
    """Raise StoreDamaged if a journal's header names a format that this version does not know."""
    number = header.get("format", FORMAT)
    if type(number) is not int or number > FORMAT:
        raise newer(path, header.get("version"), "journal format %s; it reads up to %d" % (number, FORMAT))


def mark_text(mark):
    """Return the checksum in the last bytes of a line as text for a header; None if there are none."""
    return mark[:8].decode("latin-1") or None


class _Batch:
    """Lines that go to disk together. Once it is `done` they are there, unless `error` says why they are not."""

    __slots__ = ("lines", "done", "error")

    def __init__(self):
        self.lines, self.done, self.error = [], False, None  # lines: (body, on_failed, on_written), see Journal


def _header_line(fd):
    """Return the first line of an open journal, whatever it holds."""
    return os.pread(fd, HEADER_BYTES, 0).partition(b"\n")[0] + b"\n"


class JournalFile:
    """The file for reading: it is opened, read from where the last read ended, and healed. `lock` guards every
    attribute."""

    def __init__(self, path, lock=None, disk=Disk, mode=os.O_RDWR | os.O_APPEND):
        self.path, self.lock, self.disk, self.mode = os.path.abspath(path), lock, disk, mode
        self.fd = self.inode = None
        self.size = self.n = self.durable = 0  # bytes applied, last line's number, last number on disk
        self.mark = b""  # the end of the last line applied: its checksum identifies what was read so far
        self.remains = b""  # what this process wrote after `size` and could not remove again
        self.seen = 0  # the file's length when it was last read, with a torn end that was reported then
        self.folds = 0  # how many folded lines were read
        self.heals = True  # whether a torn end is cut off; False for a process that only reads
        self.reads_only = False  # whether the file is open for reading only
        self.named = 0  # the inode of which it is known that its name in the folder is on disk
        self.header, self.notices = {}, []

    def exists(self):
        """Return whether there is a journal to read; raise StoreDamaged if the path is a folder, a pipe or a device:
        it must not be replaced by a journal, and reading it may never end."""
        import stat
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(status.st_mode):
            raise StoreDamaged("%s is not a plain file, as a journal is" % self.path)
        return status.st_size > 0

    def open(self):
        """Open the file and read its header, or raise StoreDamaged; a missing or empty file gets a header."""
        is_new = not self.exists() and bool(self.mode & os.O_RDWR)
        if is_new:
            self._make()
        fd = self._open()
        try:
            line = _header_line(fd)
            header = unseal(line) or {}
            if header.get("journal") != "labtasker":
                raise StoreDamaged("%s: byte 0: its first line is not the header of a Labtasker journal; nothing was "
                                   "changed. 'labtasker journal repair' saves what follows, if it is one" % self.path)
            check_format(self.path, header)
        except BaseException:
            os.close(fd)
            raise
        self.use(fd, header)
        self.named = self.inode if is_new else self.named
        if not self.size:
            self.size, self.n, self.mark = len(line), header.get("folded", 0), line[-1 - _MARK_BYTES:-1]

    def _open(self):
        """Return a descriptor of the file. It is for reading only if this process may not write and need not."""
        self.reads_only = False
        try:
            return self.disk.open(self.path, self.mode | os.O_CLOEXEC)
        except OSError as error:
            if self.heals or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        self.reads_only = True
        return self.disk.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def _make(self):
        """Make an empty journal and put its name on disk, or raise OSError and leave no file."""
        line = sealed({"journal": "labtasker", "format": FORMAT, "version": __version__, "store": new_id(),
                       "created_at": time.time()})
        try:
            self.disk.create(self.path, [line], keep=0o7777)
            self.disk.sync_name(os.path.dirname(real_path(self.path)))  # who made the folder may have died before that
        except OSError:
            if self.exists():  # its name may not be on disk
                with open(self.path, "rb") as file:
                    is_ours = file.read() == line
                if is_ours:
                    os.unlink(real_path(self.path))
            raise

    def use(self, fd, header):
        """Continue with another descriptor, of this file or of the one that has replaced it."""
        old, self.fd, self.header, self.inode = self.fd, fd, header, os.fstat(fd).st_ino
        if old is not None:
            os.close(old)

    def close(self, close=os.close):  # bound as in FileLock
        """Close the file."""
        fd, self.fd = self.fd, None
        if fd is not None:
            close(fd)

    __del__ = close

    def read_new(self):
        """Yield the value of each line after the last one read. Damage is set aside, or raises StoreDamaged.

        Call it with the file's lock held. Then a half-written line was left by a process that has died."""
        start = offset = self.size  # where the next line begins, and where its end is looked for
        self.seen, self.remains = os.fstat(self.fd).st_size, b""
        while offset < self.seen:
            chunk = os.pread(self.fd, min(READ_BYTES, self.seen - offset), offset)
            if not chunk or self._is_no_line(start, offset, chunk.find(b"\n")):
                break
            last = chunk.rfind(b"\n") + 1
            lines = (os.pread(self.fd, offset - start, start) + chunk[:last]).split(b"\n")[:-1] if last else []
            for line, value in zip(lines, _unseal_all(lines)):
                if value is None or not self._is_next(value):
                    return self._heal()
                self.size += len(line) + 1
                self.mark = line[-_MARK_BYTES:]
                yield value
            start, offset = offset + last if last else start, offset + len(chunk)
        if start < offset:
            self._heal()

    def _is_no_line(self, start, offset, at):
        """Return whether the bytes from `start` to a newline, `at` bytes after `offset`, are long and no line.

        This recognises damage without holding it in memory: such bytes do not end with a checksum."""
        return at >= 0 and offset - start > READ_BYTES and os.pread(self.fd, 8, offset + at - 18) != b',"crc":"'

    def _is_next(self, value):
        """Return whether this line is the one that must come next; if so, count it."""
        if self.size < self.header.get("tail", 0):
            self.folds += value.get("fold") == self.folds + 1
            return value.get("fold") == self.folds
        n, durable = value.get("n"), value.get("durable")
        if type(n) is not int or type(durable) is not int or n != self.n + value.get("lost", 1):
            return False  # `lost`: this line stands for so many lines that a repair could not save
        self.n = n
        if durable > self.durable:
            self.durable = durable
        return True

    def length(self):
        """Return the file's length in bytes; None if the path names another file than the open one, or if the last
        line applied is no longer where it was.

        Inode and length alone don't show that: somebody may copy a backup into the file."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return None
        if status.st_ino != self.inode or os.pread(self.fd, _MARK_BYTES, self.size - 1 - _MARK_BYTES) != self.mark:
            return None
        return status.st_size

    def is_stale(self):
        """Return whether others have written since this process read the file; needs no lock."""
        return self.fd is not None and self.exists() and self.length() not in (self.size, self.seen)

    def follow(self):
        """Open the file that has replaced the one read here; return whether this process can continue with it.

        It can if that is the same store and holds all that was read here, as lines or folded. The checksum of the
        last line read here shows it; after a compaction the header has that of the last folded line."""
        store, n, durable, mark = self.header.get("store"), self.n, self.durable, self.mark
        self.rewind()
        if self.header.get("store") != store or self.n > n:
            return False
        is_same = self.n == n and self.header.get("folded_crc") == mark_text(mark)
        self.size = max(self.size, self.header.get("tail", 0))
        lines = self.read_new()
        while self.n < n:
            if next(lines, None) is None:
                return False
            is_same = self.mark == mark
        lines.close()
        if is_same and self.n == n:
            self.durable = durable
        return is_same

    def forget(self):
        """Close the file; the next use opens it and reads it from its first line."""
        self.close()
        self.mark = self.remains = b""
        self.size = self.n = self.folds = self.durable = 0

    def rewind(self):
        """Open the file that is there now, to be read from its first line."""
        self.forget()
        self.open()

    def bytes(self, offset, end):
        """Yield the file's bytes from `offset` to `end` in pieces."""
        while offset < end:
            piece = os.pread(self.fd, min(READ_BYTES, end - offset), offset)
            if not piece:
                raise OSError(errno.EIO, "the file is shorter than it was")
            offset += len(piece)
            yield piece

    def _heal(self):
        """Set a damaged end aside, or raise StoreDamaged if acknowledged lines are damaged.

        Lines up to the `durable` of any later line were acknowledged. A process that only reads leaves the end where
        it is: another process may be writing it."""
        bad_n, end = self.n + 1, os.fstat(self.fd).st_size
        if self.size < self.header.get("tail", 0) or last_durable(self.bytes(self.size, end)) >= bad_n:
            raise StoreDamaged("%s: byte %d: line %d is damaged, and was on disk when later lines were written; "
                               "nothing was changed. 'labtasker journal verify' shows all damage, 'labtasker journal "
                               "repair' saves what can be saved" % (self.path, self.size, bad_n))
        if not self.heals or self.mode == os.O_RDONLY:
            return
        aside = "%s.torn-%d-%d" % (self.path, self.size, time.time() * 1000)
        self.disk.create(aside, self.bytes(self.size, end))
        self.disk.truncate(self.fd, self.size)
        self.disk.sync(self.fd)
        self.notices.append(
            "%s: the last %d bytes, from byte %d, were never acknowledged (a process or the machine died while writing "
            "them); they are kept in %s" % (self.path, end - self.size, self.size, aside))


class _JournalWriter:
    """Writes to a journal's file: appends, syncs, truncates, and replaces it by another file.

    Nothing is written unless this process owns the store and the file is the one that was read."""

    def __init__(self, file, stops):
        self.file, self.lock = file, file.lock
        self.io = threading.Lock()  # held while the file is written to or replaced; taken before `lock`
        self.is_owned = lambda: True  # returns whether this process still owns the store; called around every write
        self.stops = stops  # whether this process never writes again once another writer has changed the file
        self.fenced = None  # why this process must never write again
        self.broken = None  # why the page cache can't be trusted, until the file is rewritten
        self.synced_at = 0.0
        self.checked_at = -math.inf  # when a process that has the file lock last began to check the same as `check`

    def fence(self, text):
        """Raise StoreUnavailable, now and at every later write: the file belongs to another writer."""
        self.fenced = text
        raise StoreUnavailable(text)

    def check(self, end=None):
        """Return the file's length; raise StoreUnavailable unless this process owns the store and the file is the one
        it knows. Up to byte `end` it must hold all that was applied, and after that only what this process wrote."""
        file = self.file
        end = file.size if end is None else end
        try:
            is_there = os.stat(file.path).st_ino == file.inode
        except OSError:
            raise _StoreAway(AWAY % file.path) from None
        data = os.pread(file.fd, _MARK_BYTES + 2 + len(file.remains), file.size - 1 - _MARK_BYTES)
        mark, rest = data[:_MARK_BYTES], data[_MARK_BYTES + 1:]
        if end != file.size:
            rest = os.pread(file.fd, len(file.remains) + 1, end)
        if is_there and mark == file.mark and file.remains.startswith(rest) and self.is_owned():
            return end + len(rest)
        text = ("%s has another owner, another writer or other content now: this process must not write to it; "
                "start it again to continue with what is there" % file.path)
        if self.stops:
            self.fence(text)
        raise StoreUnavailable(text)

    def write(self, data):
        """Append `data`; return whether nobody else has appended too; raise OSError or StoreUnavailable."""
        if self.broken:
            self.rewrite()
        checked_at, self.checked_at = self.checked_at, -math.inf
        if monotonic() - checked_at > _CHECK_HOLDS_S:
            self.check()
        file = self.file
        file.remains = data
        file.disk.write_all(file.fd, data)
        return os.fstat(file.fd).st_size == file.size + len(data)

    def sync(self):
        """Return once what was written is on disk; after an OSError the file has to be rewritten."""
        try:
            self.file.disk.sync(self.file.fd)
        except OSError as error:
            self.broken = "a sync failed: %s" % error
            raise
        self.synced_at = monotonic()

    def cut_back(self):
        """Remove what was written after the lines that count; if that fails, `broken` says why.

        It is done at once, because without a server another process reads the file next."""
        try:
            self.check()
            self.file.disk.truncate(self.file.fd, self.file.size)
            self.file.remains = b""
            if self.broken:
                self.rewrite()
        except StoreUnavailable:  # the file belongs to another writer now
            pass
        except OSError as problem:
            self.broken = self.broken or "the file could not be cut back: %s" % problem

    def rewrite(self, end=None):
        """Replace the file by a copy of its good lines, up to byte `end`.

        After a failed sync the system may have dropped written pages and count them as clean. So the old file is not
        written to again."""
        self.check(end)
        file, end = self.file, self.file.size if end is None else end
        draft = file.disk.draft(real_path(file.path), file.bytes(0, end))
        try:
            fd = file.disk.open(draft, file.mode | os.O_CLOEXEC)
            try:
                self._replace(draft, fd, end, file.size)
            finally:
                os.close(fd)
        finally:
            discard(draft)
        self.broken, file.remains = None, b""

    def adopt(self, draft, offset):
        """Replace the journal by `draft`, a file of folded lines, after appending the lines from byte `offset` on.

        Writers wait only while the last piece is copied. Raises OSError, or StoreUnavailable if the journal is not the
        file that was folded; then it stays as it was."""
        file = self.file
        fd = file.disk.open(draft, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            mark = os.pread(file.fd, _MARK_BYTES, offset - 1 - _MARK_BYTES)
            if mark_text(mark) != unseal(_header_line(fd))["read_crc"]:
                raise StoreUnavailable("another file was put in the place of %s while it was compacted" % file.path)
            while file.size - offset > _ADOPT_BYTES:
                offset = self._append_to(fd, offset)
            with self.io:
                end = self._append_to(fd, offset)
                self._replace(draft, fd, end, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def _append_to(self, fd, offset):
        """Append this file's bytes from `offset` on to the file `fd` and sync that; return where they end."""
        end = self.file.size
        self._copy(fd, offset, end)
        return end

    def _copy(self, fd, offset, end):
        for piece in self.file.bytes(offset, end):
            self.file.disk.write_all(fd, piece)
        self.file.disk.sync(fd)

    def _replace(self, draft, fd, end, size):
        """Replace the journal by the file `draft`, open as `fd`. There is no other way to replace it.

        The draft holds what the journal holds up to byte `end`; the lines applied here are its first `size` bytes.
        Raises StoreUnavailable as `check` does, or OSError. If the rename was not reached, the journal is unchanged."""
        file, known = self.file, []
        file.disk.replace(draft, real_path(file.path), ask=lambda: known.append(self.check(end)))
        length = os.fstat(file.fd).st_size
        is_late = length > known[0]
        if is_late:  # this process was suspended, and another owner has written lines that only the old file has
            self._copy(fd, end, length)
        header = unseal(_header_line(fd))
        with self.lock:
            file.use(os.dup(fd), header)
            file.size, file.mark = size, os.pread(fd, _MARK_BYTES, size - 1 - _MARK_BYTES)
        try:
            file.disk.sync_folder(real_path(file.path))
        except OSError as error:  # a crash might bring the old file back, so nothing more may be acknowledged
            self.broken = "the folder could not be synced: %s" % error
            raise
        file.named = file.inode
        if is_late or not self.is_owned():
            self.fence("%s got another owner while this process replaced it: was it suspended?" % file.path)


class Journal:
    """The journal of a store, for the threads of one process: its file, its writer, and the batch of new lines.

    A line that can't be made durable is taken back: its `on_failed` is called, newest line first, so that memory and
    file agree before the next operation. Once a line is durable, its `on_written` is called with the line's number.
    Both are called with the lock held.

    `shared`: the FileLock of processes that take turns at writing. It is held when `flush` is called, and released
    before the sync, so that the next process can work; that one's sync covers these lines too."""

    def __init__(self, path, lock, fsync="always", disk=Disk, shared=None):
        self.path, self.lock, self.fsync, self.shared = os.path.abspath(path), lock, fsync, shared
        self.file = JournalFile(path, lock, disk)
        self.writer = _JournalWriter(self.file, stops=not shared)  # if shared, the next operation reads the file again
        self.batch = _Batch()  # the lines to write next
        self.writing = None  # the batch that is just being written

    @property
    def broken(self):
        """Why the page cache can't be trusted, or None; see JournalWriter."""
        return self.writer.broken

    @property
    def disk(self):
        """The object that reads and writes the file. A test replaces it to make the disk fail."""
        return self.file.disk

    @disk.setter
    def disk(self, disk):
        self.file.disk = disk

    def add(self, body, on_failed=None, on_written=None):
        """Add a line, a JSON object as bytes, to the batch to write next; return that, or raise StoreUnavailable.

        Call it with the lock held."""
        if self.writer.fenced:
            raise StoreUnavailable(self.writer.fenced)
        self.file.n += 1
        self.batch.lines.append((body, on_failed, on_written))
        return self.batch

    def wait(self, batch):
        """Return once the batch is on disk, or raise what went wrong.

        Threads share syncs: while one of them syncs, the others add to the next batch."""
        if not batch.done:
            self.flush()
        if batch.error:
            raise batch.error

    def flush(self):
        """Return once all lines that were added are on disk or taken back; the batch's `error` says which."""
        with self.writer.io:
            self._flush()

    def _flush(self):
        file = self.file
        with self.lock:
            if not self.batch.lines:
                return self._sync_read() if self.shared else None
            batch, self.batch = self.batch, _Batch()
            self.writing = batch
            first = file.n - len(batch.lines) + 1
        is_synced, data = False, b""
        try:
            if self.fsync == "always" and file.durable < first - 1 and not (self.writer.broken or self.shared):
                self.writer.sync()  # for lines of a process that died before its sync: they are not durable yet
                file.durable = first - 1
            data = b"".join(seal(b'{"n":%d,"durable":%d,' % (first + i, file.durable) + body[1:-1])
                            for i, (body, _, _) in enumerate(batch.lines))
            is_synced = self._write(data)
        except Exception as error:  # whatever it is, the waiting threads must get it
            with self.lock:
                is_synced = self._is_saved(data) or self._take_back(batch, first, error)
        with self.lock:
            if not batch.error:
                file.size, file.mark, file.remains = file.size + len(data), data[-1 - _MARK_BYTES:-1], b""
                for i, (_, _, on_written) in enumerate(batch.lines):
                    if on_written:
                        on_written(first + i)
            if is_synced:
                file.durable = first + len(batch.lines) - 1
            self.writing = None
        batch.done = True

    def _write(self, data):
        """Write `data`; return whether it was also synced; raise OSError or StoreUnavailable."""
        is_alone = self.writer.write(data)
        if self.shared:
            self.shared.release()
        is_due = self.fsync == "interval" and monotonic() - self.writer.synced_at >= _SYNC_INTERVAL_S
        if self.fsync == "always" or is_due:
            self.writer.sync()
        if not (is_alone and self.writer.is_owned()):
            self.writer.fence("%s got another owner or another writer while this process wrote to it: was it "
                              "suspended?" % self.path)
        return self.fsync == "always" or is_due

    def _sync_read(self):
        """Return once the lines of others that this process has read are on disk: their writer may have died before
        its sync."""
        self.shared.release()
        if self.file.durable < self.file.n and not self.writer.fenced:
            try:
                self.writer.sync()
            except OSError as error:
                raise store_error(self.path, error)
            self.file.durable = self.file.n

    def _is_saved(self, data):
        """Return whether lines that could not be synced are on disk after all.

        If others have written after them, they can't be taken back. Then the file is rewritten with all that it
        holds."""
        if not self.shared or self.writer.fenced:
            return False
        file = self.file
        self.shared.acquire(math.inf)
        try:
            if not self.writer.broken:
                return False
            if file.length() is None:  # another process may have rewritten the file already
                return self._is_in_new_file(data)
            added = os.pread(file.fd, os.fstat(file.fd).st_size - file.size, file.size).split(b"\n")[:-1]
            end = file.size + sum(len(line) + 1 for line in added)
            if end <= file.size + len(data) or None in _unseal_all(added):
                return False
            self.writer.rewrite(end)
        except (OSError, StoreUnavailable):
            return False
        self.writer.broken = None
        return True

    def _is_in_new_file(self, data):
        """Return whether these lines are in the file that has replaced the one they were written to."""
        file, last = JournalFile(self.path, mode=os.O_RDONLY), unseal(data[data.rfind(b"\n", 0, -1) + 1:])["n"]
        file.open()
        for _ in file.read_new():
            if file.n >= last:
                return file.n == last and file.mark == data[-1 - _MARK_BYTES:-1]
        return False

    def _take_back(self, batch, first, error):
        """Remove the lines of `batch`, and those added since, from memory and from the file."""
        newer, self.batch = self.batch, _Batch()
        for _, on_failed, _ in reversed(batch.lines + newer.lines):
            if on_failed:
                on_failed()
        self.file.n = first - 1
        if isinstance(error, OSError):
            error = store_error(self.path, error)
        elif not isinstance(error, LabtaskerError):
            error = StoreUnavailable("%s can't be written: %s: %s" % (self.path, type(error).__name__, error))
        batch.error = newer.error = error
        newer.done = True
        if not (self.writer.fenced or isinstance(error, _StoreAway)):
            self.writer.cut_back()

    def settle(self):
        """Sync lines that were only written, with `--fsync interval`; called once a second."""
        with self.writer.io:
            with self.lock:
                written = self.file.n - len(self.batch.lines)
            if self.fsync == "interval" and self.file.durable < written and not (
                    self.writer.broken or self.writer.fenced):
                self.writer.sync()
                self.file.durable = written

    def close(self, clean=False):
        """Close the file. A clean close adds a line that says that all before it is on disk."""
        if self.file.fd is None:
            return
        if clean and not (self.writer.broken or self.writer.fenced) and self.file.n:
            with self.lock:
                self.fsync = "always"
                self.add(json.dumps({"at": now(), "end": True}, separators=(",", ":")).encode())
            self.flush()
        self.file.close()


class _StoreAway(StoreUnavailable):
    """The journal's file is not there; nothing was written."""


AWAY = "%s is not there at the moment: was its folder removed, or is its file system away?"


def store_error(path, error):
    """Return the error to answer with if a line could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull("no room for %s (%s): nothing of this request was kept; free some space and it goes on "
                         "by itself" % (path, error.strerror))
    return StoreUnavailable("%s can't be written (%s): nothing of this request was kept" % (path, error.strerror))


def journal_header(fields, body):
    """Return the header line of a journal whose folded lines have `body` bytes."""
    for tail in range(body, body + 1000):  # `tail` includes the header, whose length depends on the digits of `tail`
        line = sealed(dict(fields, tail=tail) if body else fields)
        if not body or len(line) + body == tail:
            return line


# ---- Verify and repair: read a journal, however damaged it is


# A line of a file that may be damaged: its `value`, or the `problem` with it. `due` is the line number expected there
# (0 for a folded line), `lost` the number of lines that are missing before it.
Piece = row_type("Piece", "offset data value problem due lost")


def walk(path):
    """Yield a Piece for each line of a journal file and its header. Only reads; others may write at the same time."""
    folds = n = offset = tail = 0  # n is None if the header is lost, so that the first line's number is unknown
    with open_plain(path) as file:
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
                problem = "no line with a correct checksum" if data.endswith(b"\n") else "a line that is cut off"
            elif count < due:
                problem = "line %d again" % count
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
    """The content of a journal file: counts, `bad` pieces, `lost` ranges of line numbers. Only reads.

    `rotten` has the bad pieces and lost ranges that had been acknowledged. Other damage is in an end that was never
    known to be on disk; the next opening sets it aside."""

    def __init__(self, path):
        self.path, self.size, self.lines, self.n, self.durable = path, 0, 0, 0, 0
        self.bad, self.lost, self.ended, self.header = [], [], False, {}
        for piece in walk(path):
            self.size = piece.offset + len(piece.data)
            if piece.problem:
                self.bad.append(piece)
            else:
                self._count(piece)
        self.durable = max([self.durable] + [last_durable([piece.data]) for piece in self.bad])
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


def file_identity(path):
    """Return a tuple that changes when a file, or its content, is replaced."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def repair_file(survey, ask):
    """Repair the file of a Survey; return (path of the damaged file, path of the bad bytes).

    `ask` is called right before the file is replaced; it raises if that must not happen."""
    path, stamp = survey.path, int(time.time() * 1000)
    damaged, aside, draft = ("%s.%s-%d" % (real_path(path), word, stamp)
                             for word in ("damaged", "bad", "repaired"))
    Disk.create(aside, (piece.data for piece in walk(path) if piece.problem))
    body = sum(len(data) for data, is_fold in _good_lines(path) if is_fold)
    first = next((piece.value["n"] for piece in walk(path) if not piece.problem and "n" in piece.value), 1)
    header = survey.header or {"journal": "labtasker", "format": FORMAT, "store": new_id(), "folded": first - 1}
    header = dict(header, repaired_at=time.time())
    Disk.create(draft, itertools.chain([journal_header(header, body)], (data for data, _ in _good_lines(path))))
    try:
        os.link(real_path(path), damaged)
    except OSError:  # this file system has no hard links
        Disk.create(damaged, (piece.data for piece in walk(path)))
    try:
        Disk.replace(draft, real_path(path), ask=ask)
    except LabtaskerError:
        for made in (draft, damaged, aside):
            os.unlink(made)
        raise
    Disk.sync_folder(real_path(path))
    return damaged, aside


def _good_lines(path):
    """Yield (bytes, whether it is folded) of each good line, and of a line that stands for each gap."""
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


# 5. State ####################################################################
#
# The queues in memory and their indexes, how a line of the journal changes them, and the events that result.
# Only `State.apply` changes them, live and at replay. Uses 1 to 4. Tests: test_service.py, test_curves.py.

MOST_LOOKED_AT = 1000  # up to so many tasks with a pause are examined one by one by a fetch that finds nothing
MAX_STANDING = 200  # standing requests of a queue
PREDICATE_BYTES = 64  # memory of a compiled filter for each character of its text
_TAKING_BYTES = 200000  # memory of the cache `Pending.taking`
FEW_PATHS = 5000  # up to so many paths in the shapes of a queue's args are searched at each fetch
_QUICK_ENTRIES = 500  # up to so many new tasks are examined by a fetch in the loop's thread
MAX_EVENTS = 10000  # latest events that are kept in memory for listeners
_MAX_LOG = 100000  # newly pending tasks that are kept for the standing requests to read

dump_json = json_writer(",", ":")


class Beats:
    """When each run began and when its last heartbeat came, on the monotonic clock.

    `runs` is {run id: (began, last heartbeat)}. A run that is not known, as after a server's start, counts as new."""

    def __init__(self, runs):
        self.runs = runs

    def start(self, run_id):
        """Record that a run began. On a full disk its time starts when writing works again."""
        try:
            self.runs[run_id] = monotonic(), monotonic()
        except OSError:
            pass

    def touch(self, run_id):
        """Record a heartbeat of a run, or raise StoreUnavailable."""
        try:
            self.runs[run_id] = (self.runs.get(run_id) or (monotonic(),))[0], monotonic()
        except OSError as error:
            raise store_error("the heartbeat of " + run_id, error)

    def extend(self, slept_s):
        """Give every run its full time again, after `slept_s` in which no heartbeat could be received."""
        self.runs.update([(run_id, (began + slept_s, monotonic())) for run_id, (began, _) in self.runs.items()])

    def ages(self, run_id):
        """Return (seconds since the run began, seconds since its last heartbeat), or None for an unknown run."""
        known = self.runs.get(run_id)
        return known and (monotonic() - known[0], monotonic() - known[1])


class BeatFiles:
    """The `runs` of Beats for the processes that share a store without a server: a small file for each run.

    The file holds a host's id and times of that host's monotonic clock. They mean nothing to another host, which
    measures with its own clock how long the file stays unchanged. `stood_still`: see Owner."""

    MOST_SEEN = 10000

    def __init__(self, folder, stood_still=None):
        self.folder, self.host_id = os.path.join(folder, "beats"), host_id()
        self.stood_still = {} if stood_still is None else stood_still
        self.seen = {}  # {run id of another host: (its file, since when that is unchanged)}

    def get(self, run_id):
        """Return (began, last heartbeat), or None."""
        text = read_beat(os.path.join(self.folder, run_id))
        try:
            host, began, last = (text or "").split()
            began, last = float(began), float(last)
        except ValueError:
            return None
        if not -math.inf < began <= last < math.inf:
            return None
        if host == self.host_id and last <= monotonic():
            return began, last
        if self.stood_still.get(run_id) == text:
            return -math.inf, -math.inf
        since = self._unchanged_since(run_id, text)
        return since - (last - began), since

    def _unchanged_since(self, run_id, text):
        known, since = self.seen.get(run_id, (None, None))
        if known != text:
            if len(self.seen) >= self.MOST_SEEN:  # forget runs that are over: they have no file
                self.seen = {key: seen for key, seen in self.seen.items()
                             if os.path.exists(os.path.join(self.folder, key))}
            since = monotonic()
            self.seen[run_id] = text, since
        return since

    def __setitem__(self, run_id, times):
        try:
            self.write(run_id, times, os.O_CREAT)
        except FileNotFoundError:
            try:
                os.mkdir(self.folder, 0o700)  # not makedirs: it must fail if the store's folder is missing
            except FileExistsError:  # another process was faster
                pass
            self.write(run_id, times, os.O_CREAT)

    def write(self, run_id, times, flags):
        """Write a run's times.

        The file is rewritten in place with the same length, which works on a full disk. A reader that sees half of it
        gets a time in between, or none, as for an unknown run."""
        fd = os.open(os.path.join(self.folder, run_id), os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600)
        try:
            os.write(fd, ("%s %20.6f %20.6f\n" % ((self.host_id,) + times)).encode())
        finally:
            os.close(fd)

    def show(self, run_id):
        """Record that a run with a file is alive. It takes no lock: another process may hold that for long."""
        known = self.get(run_id)
        if known and math.isfinite(known[0]):
            try:
                self.write(run_id, (known[0], monotonic()), 0)
            except OSError:  # the run is over, or the folder is missing
                pass

    def pop(self, run_id, default=None):
        """Forget a run."""
        self.seen.pop(run_id, None)
        self.stood_still.pop(run_id, None)
        try:
            os.unlink(os.path.join(self.folder, run_id))
        except OSError:
            pass

    def clear(self):
        """Forget all runs: a server has taken the store and keeps their times in memory."""
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            self.pop(name)


class BoundedCache(dict):
    """A cache: a dict that is emptied when its values take too many bytes."""

    def __init__(self, most_bytes):
        super().__init__()
        self.most_bytes, self.held_bytes = most_bytes, 0

    def keep(self, key, value, size_bytes):
        """Return the value; keep it unless it is too large for the cache."""
        if self.held_bytes + size_bytes > self.most_bytes:
            self.clear()
            self.held_bytes = 0
        if size_bytes <= self.most_bytes:
            self[key] = value
            self.held_bytes += size_bytes
        return value


def _weight_bytes(texts):
    """Return about how many bytes a collection of texts takes."""
    return sum(map(len, texts)) + 100 * len(texts) + 100


_SHAPES = BoundedCache(4 << 20)  # keys of args without nested dicts: their shape
_TAKEN = BoundedCache(4 << 20)  # (required fields, shape): whether a fetch with the former takes the latter


def shape_of(args):
    """Return the set of paths in `args`."""
    for value in args.values():
        if type(value) is dict and value:
            return paths_of(args)
    keys = tuple(args)
    return _SHAPES.get(keys) or _SHAPES.keep(keys, paths_of(args), 3 * _weight_bytes(keys))


def takes(required, shape):
    """Return whether a fetch with these required fields takes tasks of this shape."""
    known = _TAKEN.get((required, shape))
    if known is None:
        size_bytes = _weight_bytes(required) + sum(map(_weight_bytes, shape))
        known = _TAKEN.keep((required, shape), covers(required, shape), size_bytes)
    return known


class _Standing:
    """A fetch that workers repeat: the tasks that match it, in order, and how far it has read the log.

    With `predicate` None all tasks with the required fields match."""

    __slots__ = ("required", "predicate", "heap", "cursor", "ready", "size_bytes", "purge_at", "used_at")

    def __init__(self, required, text, predicate, cursor):
        self.required, self.predicate, self.heap, self.cursor, self.ready = required, predicate, [], cursor, False
        self.size_bytes = _weight_bytes(required) + PREDICATE_BYTES * len(text or "")  # without its heap
        self.purge_at, self.used_at = 100, monotonic()

    def weight_bytes(self):
        """Return about how many bytes of memory it takes."""
        return self.size_bytes + 16 * len(self.heap)


class Pending:
    """The pending tasks of a queue that wait for no others: for each shape of args a heap in the order of fetching.

    Entries are deleted lazily: an entry is valid while its task is pending and still has the entry's priority and
    times. Entries hold ids, not tasks, so that deleted tasks don't stay in memory. A heap is rebuilt when most of it is
    stale, and removed with its last task."""

    def __init__(self, tasks, blocked=()):
        self.tasks = tasks  # the queue's {task id: record}
        self.blocked = blocked  # ids of those that wait for others
        self.heaps = {}  # shape: heap of (-priority, last_modified, created_at, task id)
        self.counts = {}  # shape: how many tasks are pending
        self.paths = 0  # the number of paths in all shapes: what searching the shapes costs
        self.taking = BoundedCache(_TAKING_BYTES)  # required fields: the heaps of the shapes that they take
        self.standing = collections.OrderedDict()  # (required fields, filter): Standing, the latest used last
        self.log, self.log_start = [], 0  # entries that became pending, for the standing requests
        self.resting = {}  # {task id: entry} of the tasks that can't be fetched before their not_before
        self.delayed = []  # a heap of (not_before, entry) of these tasks

    def alive(self, entry):
        """Return the task of an entry that can be fetched; None if the entry is stale or the task's pause is not
        over."""
        task = self.tasks.get(entry[3])
        if task is None or task.status != "pending" or task.last_modified != entry[1] or task.priority != -entry[0]:
            return None
        return None if entry[3] in self.resting or entry[3] in self.blocked else task

    def withdraw(self, task):
        """Take back a record that was offered: it waits for others now."""
        if not self.resting.pop(task.task_id, None):
            self.retire(task)

    def offer(self, task):
        """Add a record that became, or stays, pending."""
        entry = (-task.priority, task.last_modified, task.created_at, task.task_id)
        if task.not_before is None:
            return self._add(entry, task)
        self.resting[task.task_id] = entry
        heapq.heappush(self.delayed, (task.not_before, entry))
        if len(self.delayed) > 20 + 3 * len(self.resting):
            self.delayed = [row for row in self.delayed if self.rests(row[1])]
            heapq.heapify(self.delayed)

    def rests(self, entry):
        """Return whether the pause of an entry's task is not over."""
        return self.resting.get(entry[3]) is entry

    def release(self, at):
        """Make the tasks available whose pause is over at the time `at`."""
        while self.delayed and self.delayed[0][0] <= at:
            entry = heapq.heappop(self.delayed)[1]
            if self.rests(entry):
                del self.resting[entry[3]]
                self._add(entry, self.tasks[entry[3]])

    def next_release(self):
        """Return when the next pause is over, or None."""
        while self.delayed and not self.rests(self.delayed[0][1]):
            heapq.heappop(self.delayed)
        return self.delayed[0][0] if self.delayed else None

    def next_delayed(self, required, predicate):
        """Return when the first pause of a task that fits a fetch is over; None if there is none.

        If many tasks have a pause, it may be that of a task which does not fit; then the fetch is repeated in vain."""
        if len(self.resting) > MOST_LOOKED_AT:
            return self.next_release()
        tasks = map(self.tasks.get, self.resting)
        return min((task.not_before for task in tasks if (predicate is None or predicate(task)) and takes(
            required, shape_of(task.args))), default=None)

    def _add(self, entry, task):
        shape = shape_of(task.args)
        heap = self.heaps.get(shape)
        if heap is None:
            heap = self.heaps[shape] = []
            self.counts[shape] = 0
            self.paths += 1 + len(shape)
            self.taking.clear()
        self.counts[shape] += 1
        heapq.heappush(heap, entry)
        if self.standing:
            self.log.append(entry)
            if len(self.log) > _MAX_LOG:
                self._trim()

    def retire(self, task):
        """Remove a record that is no longer pending or was replaced."""
        shape = shape_of(task.args)
        count = self.counts[shape] = self.counts[shape] - 1
        heap = self.heaps[shape]
        if not count:
            del self.heaps[shape], self.counts[shape]
            self.paths -= 1 + len(shape)
            self.taking.clear()
        elif len(heap) > 20 + 3 * count:
            self._purge(heap)

    def _purge(self, heap):
        heap[:] = set(filter(self.alive, heap))
        heapq.heapify(heap)

    def _trim(self):
        """Drop the older half of the log, and the standing requests that have not read it."""
        cut = len(self.log) // 2
        self.log_start += cut
        del self.log[:cut]
        self.forget(lambda standing: standing.cursor < self.log_start)

    def forget(self, is_over):
        """Drop the standing requests that are over, and with the last of them the log."""
        for key in [key for key, standing in self.standing.items() if is_over(standing)]:
            del self.standing[key]
        if not self.standing:
            self.log_start += len(self.log)
            self.log.clear()

    def _top(self, heap):
        while heap and not self.alive(heap[0]):
            heapq.heappop(heap)
        return heap[0] if heap else None

    def is_quick(self, required, text):
        """Return whether finding the next task examines only a few: without a filter if there are few shapes, else if a
        standing request has read nearly all of the log."""
        if text is None and self.paths <= FEW_PATHS:
            return True
        standing = self.standing.get((required, text))
        unread = standing and self.log_start + len(self.log) - standing.cursor
        return bool(standing and standing.ready and unread <= _QUICK_ENTRIES)

    def first(self, required):
        """Return the next pending record that a fetch with these required fields takes, or None."""
        if self.paths > FEW_PATHS:
            return self.first_matching(required, None, None)
        heaps = self.taking.get(required)
        if heaps is None:
            heaps = [heap for shape, heap in self.heaps.items() if takes(required, shape)]
            self.taking.keep(required, heaps, _weight_bytes(required) + 8 * len(heaps))
        tops = [top for top in map(self._top, heaps) if top]
        return self.tasks[min(tops)[3]] if tops else None

    def first_matching(self, required, text, predicate):
        """Return the next record that also matches `predicate`, whose document as text is `text`."""
        self.catch_up(*self.begin_standing(required, text, predicate))
        standing = self.standing[required, text]
        top = self._top(standing.heap)
        return self.tasks[top[3]] if top else None

    def begin_standing(self, required, text, predicate):
        """Return (the request's Standing, whether it is new, [(shape or None, entries to read)], the cursor after
        these)."""
        standing, end = self.standing.get((required, text)), self.log_start + len(self.log)
        if standing is not None:
            self.standing.move_to_end((required, text))
            standing.used_at = monotonic()
            if standing.ready:
                return standing, False, [(None, self.log[standing.cursor - self.log_start:])], end
        if len(self.standing) >= MAX_STANDING:
            self.standing.popitem(last=False)
        standing = self.standing[required, text] = _Standing(required, text, predicate, end)
        return standing, True, [(shape, list(heap)) for shape, heap in self.heaps.items()], end

    def matches(self, standing, lists):
        """Return the entries in `lists` that match. Needs no lock: tasks that change meanwhile are in the log."""
        matching = []
        for shape, entries in lists:
            if shape is not None and not takes(standing.required, shape):
                continue
            for entry in entries:
                task = self.alive(entry)
                if task and (standing.predicate is None or standing.predicate(task)) and (
                        shape is not None or takes(standing.required, shape_of(task.args))):
                    matching.append(entry)
        return matching

    def catch_up(self, standing, is_new, lists, end, matching=None):
        """Add to a Standing the matching entries that it had not read; `matching`: these, if they are known."""
        matching = self.matches(standing, lists) if matching is None else matching
        if is_new:
            standing.heap, standing.ready = matching, True
            heapq.heapify(standing.heap)
        elif standing.cursor < end:
            for entry in matching:
                heapq.heappush(standing.heap, entry)
        standing.cursor = max(standing.cursor, end)
        if len(standing.heap) > standing.purge_at:
            self._purge(standing.heap)
            standing.purge_at = 100 + 3 * len(standing.heap)


class _Blocked:
    """Which pending tasks of a queue wait for others, and which others. What a task waits for is found when it becomes
    pending; each end of a task releases those that it was the last for. So they cost a fetch nothing."""

    def __init__(self, tasks):
        self.tasks = tasks  # the queue's {task id: record}
        self.missing = {}  # task id: for how many others it waits; without those that wait for none any more
        self.behind = {field: {} for field in WAITS}  # id: the one task that waits for it, or a dict of several

    def enter(self, task):
        """Add a task that `waits`; return whether it is blocked."""
        missing = 0
        for field in WAITS:
            behind = self.behind[field]
            for other_id in dict.fromkeys(getattr(task, field)):
                missing += not is_done_for(field, task, self.tasks.get(other_id))
                there = behind.setdefault(other_id, task.task_id)
                if type(there) is dict:
                    there[task.task_id] = None
                elif there != task.task_id:
                    behind[other_id] = {there: None, task.task_id: None}
        if missing:
            self.missing[task.task_id] = missing
        return missing > 0

    def leave(self, task):
        """Remove a task that was added; return whether it was blocked."""
        for field in WAITS:
            behind = self.behind[field]
            for other_id in dict.fromkeys(getattr(task, field)):
                there = behind.get(other_id)
                if type(there) is dict:
                    there.pop(task.task_id, None)
                if there == task.task_id or there == {}:
                    del behind[other_id]
        return self.missing.pop(task.task_id, 0) > 0

    def those_behind(self, task_id, field):
        """Return the ids of the tasks that wait for one, and were not begun; a list."""
        there = self.behind[field].get(task_id, ())
        return [there] if type(there) is str else list(there)

    def is_waited_for(self, task_id):
        """Return whether a task waits for this one."""
        return task_id in self.behind["after"] or task_id in self.behind["after_any"]

    def follow(self, task_id, old, new):
        """Return [(task, whether it is blocked now)] of those for which that changes as a task became another record;
        None is one that is gone."""
        changed = []
        for field in WAITS:
            for child_id in self.those_behind(task_id, field):
                child = self.tasks.get(child_id)
                if child is None or child_id == task_id:  # itself, in a journal that no version has written
                    continue
                step = is_done_for(field, child, new) - is_done_for(field, child, old)
                was = self.missing.pop(child_id, 0)
                if was - step:
                    self.missing[child_id] = was - step
                if (was > 0) != (was - step > 0):
                    changed.append((child, was - step > 0))
        return changed


class LocalName(str):
    """The name of a queue, from a caller that needs no password because it can read the store's file."""


class CallerQueueId(str):
    """The id of a queue, from a caller that gave its password; `stored` is the hash that the password matched.

    It becomes invalid when the queue gets another password."""

    def __new__(cls, queue_id, stored):
        made = super().__new__(cls, queue_id)
        made.stored = stored
        return made


_MOST_POINTS = 1000  # of a task's history
ID_BYTES = 8  # how much is kept of a point's id, to recognise one that is sent again


class Curve(row_type("Curve", "points every since run ids")):
    """A task's history. It is never changed: a new point makes a new Curve.

    `points`: a tuple of (step, at, keys, value, ...), in the order in which they came; points with the same keys share
    `keys`. `every`: only each `every`-th new point stays for good; `since`: how many came after the last that stays.
    The newest point is always there. `run`: the id of the newest point's run. `ids`: digests of the ids of the latest
    points, joined."""

    __slots__ = ()

    def knows(self, point_id):
        """Return whether a point with this id was added already."""
        digest = _digest(point_id)
        at = self.ids.find(digest)
        while at % ID_BYTES and at >= 0:
            at = self.ids.find(digest, at + 1)
        return at >= 0

    def plus(self, point):
        """Return the curve with another point, a dict of step, at, values, and its id if it has one.

        If it has a `run`, it is that run's first point: then points at or beyond its step are dropped."""
        curve = self._resumed(point["run"], point["step"]) if "run" in point else self
        points, every, since = curve.points, curve.every, curve.since
        kept, distance = points[:-1] if since else points, since + 1
        if len(kept) >= _MOST_POINTS:
            kept, distance, every = kept[::2], distance + every, 2 * every
        ids = curve.ids[-ID_BYTES * (_MOST_POINTS - 1):] + _digest(point["id"]) if "id" in point else curve.ids
        kept += (_packed(point["step"], point["at"], point["values"]),)
        return Curve(kept, every, distance % every, curve.run, ids)

    def _resumed(self, run, step):
        kept = tuple(point for point in self.points if not point[0] >= step)
        has_newest = bool(kept) and kept[-1] is self.points[-1]
        return Curve(kept, self.every if kept else 1, self.since if has_newest else 0, run, self.ids)

    def content(self, most=None):
        """Return [(step, at, values)] of the points, or of so many of the latest."""
        points = self.points if most is None else self.points[-most:]
        return [(point[0], point[1], dict(zip(point[2], point[3:]))) for point in points]

    def in_json(self):
        """Return the curve as a compacted journal holds it; `of_json` reads it."""
        return {"points": self.content(), "every": self.every, "since": self.since, "run": self.run,
                "ids": self.ids.hex()}

    @staticmethod
    def of_json(value):
        """Return the Curve for a value that `in_json` has returned."""
        return Curve(tuple(_packed(*point) for point in value["points"]), value["every"], value["since"], value["run"],
                     bytes.fromhex(value["ids"]))


NO_CURVE = Curve((), 1, 0, None, b"")
_KEYS = BoundedCache(1 << 20)  # keys of a point's values: the one tuple that all points with these keys share


def _digest(point_id):
    import hashlib
    return hashlib.blake2b(point_id.encode("utf-8", "surrogatepass"), digest_size=ID_BYTES).digest()


def _packed(step, at, values):
    """Return a point as a Curve holds it."""
    keys = tuple(values)
    keys = _KEYS.get(keys) or _KEYS.keep(keys, keys, _weight_bytes(keys))
    return (step, float(at), keys) + tuple(values.values())


class _Peers:
    """The tasks of a queue that a rule compares: those with the same name and the same text of `stop`."""

    def __init__(self):
        self.count = 0  # tasks
        self.rungs = []  # for each rung what is recorded there: [numbers, sorted; how many NaN]
        self.succeeded = {}  # {task id: record} of those that have
        self.means, self.medians = {}, {}  # what was computed of these: {task id: ...} and {step: ...}

    def record(self, rungs, count):
        """Add the records of a task (count 1), or take them out (-1)."""
        from bisect import bisect_left
        for place, (value, _) in enumerate(rungs or ()):
            if place == len(self.rungs):
                self.rungs.append([[], 0])
            numbers = self.rungs[place][0]
            if value != value:
                self.rungs[place][1] += count
            elif count > 0:
                numbers.insert(bisect_left(numbers, value), value)
            else:
                del numbers[bisect_left(numbers, value)]

    def succeed(self, task_id, record):
        """Put the record of a task that has succeeded, or None."""
        if record is not None:
            self.succeeded[task_id] = record
        elif self.succeeded.pop(task_id, None) is None:
            return
        self.means.pop(task_id, None)
        self.medians.clear()

    def rank(self, place, value, is_max):
        """Return (how many records at a rung are better than a value, how many there are). NaN is worst."""
        from bisect import bisect_left, bisect_right
        numbers, number_nan = self.rungs[place] if place < len(self.rungs) else ((), 0)
        better = len(numbers) if value != value else (
            len(numbers) - bisect_right(numbers, value) if is_max else bisect_left(numbers, value))
        return better, len(numbers) + number_nan


class QueueState:
    """A queue in memory: its record, its tasks in the order of their last change, its workers, and the indexes.

    Only `put_task` and `put_worker` change it. They keep the indexes up to date and return the old record."""

    def __init__(self, record):
        self.record = record
        self.tasks, self.workers = {}, {}
        self.running = {}  # task id: record
        self.fetches = {}  # fetch id: task id, of running tasks
        self.ended_fetches = collections.OrderedDict()  # ids of fetches that were given up: they get no task
        self.blocked = _Blocked(self.tasks)
        self.pending = Pending(self.tasks, self.blocked.missing)
        self.groups = {}  # {(task name, stop): _Peers} of the tasks that have a rule

    def put_task(self, task_id, new):
        """Replace the record with this id by another one, or by None; return the old one."""
        old, is_held, was = self.tasks.pop(task_id, None), False, None
        if (old is not None and old.stop) or (new is not None and new.stop):
            self._regroup(task_id, old, new)
        if old is not None:
            was, is_held = old.status, self.pending.resting.pop(task_id, None)
            if waits(old):
                is_held = self.blocked.leave(old) or is_held
            if was == "running":
                del self.running[task_id]
                self.fetches.pop(old.fetch_id, None)
        if new is not None:
            self.tasks[task_id] = new
            if new.status == "pending":
                if not (waits(new) and self.blocked.enter(new)):
                    self.pending.offer(new)
            elif new.status == "running":
                self.running[task_id] = new
                if new.fetch_id:
                    self.fetches[new.fetch_id] = task_id
        if was == "pending" and not is_held:  # after adding the new one, so that a shape that both have stays
            self.pending.retire(old)
        for child, is_blocked in self.blocked.follow(task_id, old, new) if self.blocked.is_waited_for(task_id) else ():
            (self.pending.withdraw if is_blocked else self.pending.offer)(child)
        return old

    def _regroup(self, task_id, old, new):
        """Keep the groups current where a record takes the place of another."""
        was, now_is = (record and record.stop and (record.task_name, record.stop) for record in (old, new))
        if was == now_is and old.rungs is new.rungs and "success" not in (old.status, new.status):
            return
        if was:
            self.groups[was].record(old.rungs, -1)
            self.groups[was].count -= 1
            self.groups[was].succeed(task_id, None)
        if now_is:
            group = self.groups.setdefault(now_is, _Peers())
            group.record(new.rungs, 1)
            group.count += 1
            if new.status == "success":
                group.succeed(task_id, new)
        if was and not self.groups[was].count:
            del self.groups[was]

    def put_worker(self, worker_id, new):
        """Replace the record with this id by another one, or by None; return the old one."""
        old = self.workers.pop(worker_id, None)
        if new is not None:
            self.workers[worker_id] = new
        return old

    def with_record(self, record):
        """Return the same queue with another record."""
        other = QueueState(record)
        other.__dict__.update(self.__dict__, record=record)
        return other


def revised(record, fields):
    """Return a copy of a record with these fields changed; numbers become Instants if the field is a time.

    It is faster than namedtuple's `_replace`."""
    values = list(record)
    _set_fields(values, record, fields)
    return record._make(values)


def _set_fields(values, record, fields):
    """Set fields in the list of a record's values, as `revised` does. Those of a newer version go into the last value,
    `unknown`."""
    places, times = record.places, record.times
    for name, value in fields.items():
        if name in times and value is not None:
            value = Instant(value)
        if name in places:
            values[places[name]] = value
        else:
            values[-1] = dict(values[-1] or {}, **{name: value})


def new_task(queue_id, task_id, fields):
    """Return the record of a new task with these fields."""
    values = list(_BLANK_TASK)
    _set_fields(values, TaskRecord, fields)
    values[:2] = task_id, queue_id
    if values[_MODIFIED_AT] is None:
        values[_MODIFIED_AT] = values[_CREATED_AT]
    if values[_CURVE_AT] is not None:
        values[_CURVE_AT] = Curve.of_json(values[_CURVE_AT])
    return TaskRecord._make(values)


_BLANK_TASK = TaskRecord()
_CREATED_AT, _MODIFIED_AT, _CURVE_AT = map(TaskRecord._fields.index, ("created_at", "last_modified", "curve"))


class State:
    """All queues. Only `apply` changes them, live and at replay."""

    def __init__(self):
        self.queues, self.names = {}, {}  # {queue id: QueueState}, {queue name: queue id}

    def clear(self):
        """Forget all queues."""
        self.queues.clear()
        self.names.clear()

    def id_of(self, caller):
        """Return the id of a caller's queue, or None if no queue has that LocalName.

        The type tells names from ids, because a queue's name may be equal to the id of another queue."""
        return self.names.get(caller) if isinstance(caller, LocalName) else caller

    def put_queue(self, queue_id, new):
        """Replace the queue with this id by another one, or by None; return the old one."""
        old = self.queues.pop(queue_id, None)
        if old is not None:
            self.names.pop(old.record.queue_name, None)
        if new is not None:
            self.queues[queue_id] = new
            self.names[new.record.queue_name] = queue_id
        return old

    def apply(self, queue_id, changes):
        """Apply changes; return [(put, id, old record, new record)], oldest first, with which they can be undone."""
        done = []
        for kind, *rest in changes:
            put, key, new = RECORDS[kind].apply(self, queue_id, *rest)
            done.append((put, key, put(key, new), new))
        return done

    @staticmethod
    def put_back(done):
        """Undo what `apply` did; `done` is what it returned. The tasks are sorted by their last change again."""
        queues = {}
        for put, key, old, _ in reversed(done):
            put(key, old)
            if isinstance(old, TaskRecord):
                queues[id(put.__self__)] = put.__self__
        for queue in queues.values():
            ordered = sorted(queue.tasks.items(), key=lambda item: item[1].last_modified)
            queue.tasks.clear()
            queue.tasks.update(ordered)


def has_pending(queue, done):
    """Return whether what `State.apply` did may have made a task of the queue one that can be fetched."""
    return any(isinstance(new, TaskRecord) and new.status == "pending" or queue and queue.blocked.is_waited_for(key)
               for _, key, _, new in done)


def _apply_queue(state, queue_id, fields):
    queue = state.queues.get(queue_id)
    if queue is None:
        return state.put_queue, queue_id, QueueState(revised(QueueRecord(queue_id=queue_id), fields))
    return state.put_queue, queue_id, queue.with_record(revised(queue.record, fields))


def _queue_of(state, queue_id):
    """Return the queue of a line. If a repair could not save its creation, a queue with a made-up name is created."""
    queue = state.queues.get(queue_id)
    if queue is None:
        queue = QueueState(QueueRecord(queue_id=queue_id, queue_name="recovered-" + queue_id))
        state.put_queue(queue_id, queue)
    return queue


def _apply_task(state, queue_id, task_id, fields, old_state=None):
    queue = _queue_of(state, queue_id)
    record = queue.tasks.get(task_id)
    if fields.get("status", "pending") not in TASK_MOVES:
        raise ValueError("the status %s of a task" % fields["status"])
    if record is not None:
        record = revised(record, fields)
    elif "created_at" in fields:
        record = new_task(queue_id, task_id, fields)
    return queue.put_task, task_id, record  # record is None if a repair could not save the task's creation


def _apply_point(state, queue_id, task_id, fields, old_state, point):
    task = _queue_of(state, queue_id).tasks.get(task_id)
    curve = (task and task.curve or NO_CURVE).plus(point)
    return _apply_task(state, queue_id, task_id, dict(fields, curve=curve))


def _apply_worker(state, queue_id, worker_id, fields, old_state=None):
    queue = _queue_of(state, queue_id)
    record = queue.workers.get(worker_id)
    if fields.get("status", "active") not in WORKER_MOVES:
        raise ValueError("the status %s of a worker" % fields["status"])
    if record is None and "created_at" in fields:
        record = WorkerRecord(worker_id, queue_id)
    return queue.put_worker, worker_id, record and revised(record, fields)


# The changes that a line may hold. `apply`: (state, queue id, the rest of the change) -> (put, id, new record or None).
# `fields`: what follows the name of the change. `meaning`: for the documentation.
Record = row_type("Record", "apply fields meaning")
RECORDS = {
    "queue": Record(_apply_queue, "fields", "the line's queue was created, or these fields of it are new"),
    "queue-": Record(lambda state, queue_id: (state.put_queue, queue_id, None),
                     "", "the line's queue is gone, with its tasks and workers"),
    "task": Record(_apply_task, "task id, fields, state before the transition or null",
                   "a task was submitted, or these fields of it are new"),
    "point": Record(_apply_point, "task id, fields, null, point",
                    "these fields of a task are new, and its history has another point: step, at, values, its id, and "
                    "the id of the run if it is the run's first, which drops the points at or beyond its step"),
    "task-": Record(lambda state, queue_id, task_id: (_queue_of(state, queue_id).put_task, task_id, None),
                    "task id", "a task is gone"),
    "worker": Record(_apply_worker, "worker id, fields, state before the transition or null",
                     "a worker was registered, or these fields of it are new"),
    "worker-": Record(lambda state, queue_id, worker_id: (_queue_of(state, queue_id).put_worker, worker_id, None),
                      "worker id", "a worker is gone"),
}


# The keys of a line. A newer version may write other keys: a process that does not know a key ignores it, but does not
# compact its line away. A line that must not be ignored has `needs`: the format that a reader has to know.
LINE_KEYS = {"n", "durable", "at", "queue", "changes", "crc", "fold", "lost", "end", "epoch", "owner", "version",
             "needs"}


def replay_line(state, line, path, version):
    """Apply the changes of a journal's line; return what State.apply does. `version`: the newest one that wrote to the
    file.

    Raises StoreDamaged if this version does not understand the line; then the state must not be used any more."""
    needs = line.get("needs", 0)
    if type(needs) is int and needs <= FORMAT:
        try:
            return state.apply(line["queue"], line["changes"])
        except Exception as error:  # whatever a newer version may write
            what = "something named %s" % error if isinstance(error, KeyError) else str(error)
    else:
        what = "journal format %s" % needs
    raise newer(path, version, "line %s needs %s" % (line.get("n", "fold %s" % line.get("fold")), what))


def check_known(path):
    """Raise StoreDamaged if this version can't open the journal, or does not understand a line of it."""
    source, state = JournalFile(path, mode=os.O_RDONLY), State()
    source.open()
    for line, version in lines_with_versions(source):
        if "changes" in line:
            replay_line(state, line, path, version)


def lines_with_versions(source):
    """Yield (line, version) for each new line of a journal; the version is the newest one named so far."""
    version = source.header.get("version")
    for line in source.read_new():
        version = newest(line.get("version"), version)
        yield line, version


# The k-th transition on line n: a task or worker went from `old_state` to the status of `record`.
Transition = row_type("Transition", "n k at queue_id kind old_state record")


def transitions_of(n, at, queue_id, changes, done):
    """Return the Transitions on a line; `done` is what State.apply has returned for its changes."""
    if n is None:  # a folded line has the state, not the transitions
        return []
    steps = [(change, new) for change, (_, _, _, new) in zip(changes, done) if len(change) > 3 and change[3] and new]
    return [Transition(n, k, at, queue_id, change[0], change[3], new) for k, (change, new) in enumerate(steps)]


def follow(store, queue_id, after, pause_s):
    """Yield the Transitions of a queue, given as an id or a LocalName, after the event `after`, (n, k).

    Yields None after every `pause_s` without an event. If events were compacted away, yields a Transition with a text
    instead of a record. Ends when the store closes, the queue is deleted, or it gets another password."""
    quiet_since, known_id = monotonic(), store.state.id_of(queue_id)

    def is_over():
        has_login = isinstance(queue_id, (CallerQueueId, LocalName)) and known_id is not None
        return store.closing or has_login and not store.is_open_to(queue_id, known_id)
    while not is_over():
        gap, news, last = _news(store, after)
        for event in _older_events(store.path, after, last) if gap else news:
            after = (event.n, event.k)
            known_id = known_id or store.state.id_of(queue_id)  # the queue of a LocalName may be created later
            if is_over():
                return
            if event.queue_id in (known_id, None):
                yield event
                quiet_since = monotonic()
        if not gap and not news:
            store.wait_for(lambda: _news(store, after)[2] > after or is_over(), quiet_since + pause_s - monotonic())
            if not store.is_server and store.journal.file.exists():
                store.file.with_file_lock(lambda: None, writes=False)
        if monotonic() - quiet_since >= pause_s:  # events of other queues don't count
            yield None
            quiet_since = monotonic()


def last_event(store):
    """Return the id (n, k) of the last event."""
    n, k = _news(store, (math.inf, 0))[2]
    return n, max(k, 0)


def _news(store, after):
    """Return (whether only the file has the events after `after`, the events in memory, the last event's id)."""
    with store.lock:
        events = store.file.replica.events
        last = (events[-1].n, events[-1].k) if events else (store.journal.file.header.get("folded", 0), -1)
        if events and (events[0].n, events[0].k) <= after or after >= last:
            news = list(itertools.takewhile(lambda event: (event.n, event.k) > after, reversed(events)))
            return False, news[::-1], last
        gap = len(events) == MAX_EVENTS or store.journal.file.header.get("folded", 0) > after[0]
        return gap, [] if gap else list(events), last


def _older_events(path, after, last):
    """Yield the Transitions after `after` up to `last` from the journal's file.

    If some are gone, the first one says so: it has no queue, and a text instead of a record."""
    source, state = JournalFile(path, mode=os.O_RDONLY), State()
    source.open()  # it is closed with the object
    folded = source.header.get("folded", 0)
    if folded > after[0]:
        text = ("the events after %d.%d up to line %d were compacted away; list the tasks to see what became of them"
                % (after[0], after[1], folded))
        yield Transition(folded, math.inf, now(), None, "too old", None, text)
    for line, version in lines_with_versions(source):
        if "changes" in line:
            done = replay_line(state, line, path, version)
            for event in transitions_of(line.get("n"), line.get("at"), line["queue"], line["changes"], done):
                if after < (event.n, event.k) <= last:
                    yield event
        if line.get("n", 0) > last[0]:
            return


# 6. Operations ###############################################################
#
# What every request does. An operation decides: it gets (store, queue, request, at) and returns (changes,
# answer), touching nothing. The answer may be a function: it is called outside the lock, for what takes long.
# Time-outs are decided here too. Uses 1 to 5. Tests: test_service.py, test_curves.py.

MAX_INTERRUPTIONS = 100  # after so many runs that were handed back a task fails, as it would never end
_MAX_ATTEMPTS = 20  # how many of its latest runs a task keeps
MAX_DELAY_S = 30 * 86400.0  # the longest pause that a job may ask for
_MAX_RETRY_DELAY_S = 3600.0  # the longest pause after a failed run
MAX_ENDED_FETCHES = 1000  # how many ended fetches a queue remembers, as a fetch may arrive after its end
RECENT = 50  # tasks that ended last, from which the rate is computed


def same_secret(one, other):
    """Return whether two secrets are equal, in constant time."""
    import hmac
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))


def _overdue(store, queue):
    """Return ([(task, its failure, words)] of the running tasks whose time is over, seconds until the next run can time
    out)."""
    overdue, next_in_s = [], math.inf
    for task in queue.running.values():
        ages = store.beats.ages(task.run_id)
        if ages is None:  # it began before this server: it gets its full time again, or that of a limit given later
            store.beats.start(task.run_id)
            ages = 0.0, 0.0
        ran_s, silent_s = ages
        has_beats = task.heartbeat_timeout is not None and task.last_heartbeat is not None
        if has_beats and silent_s > task.heartbeat_timeout:
            overdue.append((task, "lost", "no heartbeat for %g seconds (heartbeat_timeout)" % task.heartbeat_timeout))
        elif task.task_timeout is not None and ran_s > task.task_timeout:
            overdue.append((task, "timeout", "still running after %g seconds (task_timeout)" % task.task_timeout))
        else:
            next_in_s = min(next_in_s, task.heartbeat_timeout - silent_s if has_beats else math.inf,
                            math.inf if task.task_timeout is None else task.task_timeout - ran_s)
    return overdue, next_in_s


def expire_runs_op(store, queue, request, at):
    """Decide that the overdue runs have failed; answer the seconds until the next run can time out."""
    changes, strikes, (overdue, next_in_s) = [], collections.Counter(), _overdue(store, queue)
    for task, failure, words in sorted(overdue, key=lambda row: row[0].created_at):
        fields = {"summary": dict(task.summary, labtasker_error=words), "run_end": "timeout", "failure": failure,
                  "reason": words}
        fields.update(_attempt_over(task, at, "timeout", words))
        changes.append(_failed(task, fields, after(at, len(changes))))
        strikes[task.worker_id] += 1
    for worker_id, count in strikes.items():
        changes += _strike(queue, worker_id, count, at)
    return changes, next_in_s


def _failed(task, fields, at, is_final=False):
    """Return the change of a task whose run failed: it is pending again, or failed if its retries are used up or
    another run would be useless (`is_final`)."""
    retries = task.retries + 1
    event = "retry" if retries < task.max_retries and not is_final else "fail"
    status = move(TASK_MOVES, task.status, event, "task " + task.task_id)
    fields = dict(fields, status=status, retries=retries, worker_id=None, last_modified=at)
    if task.retry_delay and event == "retry":  # 2^1000 is the largest factor that is sure to stay a float
        delay_s = math.ldexp(min(task.retry_delay, _MAX_RETRY_DELAY_S), min(retries - 1, 1000))
        fields["not_before"] = Instant(round(at + min(delay_s, _MAX_RETRY_DELAY_S), 6))
    return ["task", task.task_id, fields, task.status]


def _strike(queue, worker_id, count, at):
    """Return the changes of a worker with `count` more failed runs: it counts as crashed at its max_retries."""
    worker = queue.workers.get(worker_id)
    if worker is None:
        return []
    retries = worker.retries + count
    fields = {"retries": retries, "last_modified": at}
    if worker.status == "active":
        event = "crash" if retries >= worker.max_retries else "strike"
        fields["status"] = move(WORKER_MOVES, "active", event, "worker " + worker_id)
        return [["worker", worker_id, fields, "active"]]
    return [["worker", worker_id, fields, None]]


def decide(operation, store, queue, request, at):
    """Return (changes, answer) of an operation, with the changes that follow for tasks that wait for others."""
    changes, answer = operation(store, queue, request, at)
    return changes + (settle(queue, changes, at) if changes and queue else []), answer


# Operations: queues


def hash_password(password, salt=None, rounds=None):
    """Return the PBKDF2 hash of a password as text, with its rounds and salt."""
    import hashlib
    salt, rounds = salt or os.urandom(16).hex(), rounds or PASSWORD_ROUNDS
    key = hashlib.pbkdf2_hmac("sha256", password.encode("utf-8", "surrogatepass"), bytes.fromhex(salt), rounds)
    return "pbkdf2_sha256$%d$%s$%s" % (rounds, salt, key.hex())


def is_password(password, stored):
    """Return whether this is the password of a stored hash; for None it takes the same time to return False.

    The hash's own rounds are used, so that the constant can change while stored passwords stay valid."""
    kind, rounds, salt = (stored or "pbkdf2_sha256$%d$%s$" % (PASSWORD_ROUNDS, "00" * 16)).split("$")[:3]
    if kind != "pbkdf2_sha256":
        raise Unauthorized("labtasker %s can't check this queue's password, which is hashed by %.40r: update it"
                           % (__version__, kind))
    return same_secret(hash_password(password, salt, int(rounds)), stored or "")


PASSWORD_ROUNDS = 100000


def create_queue_op(store, _, request, at):
    """Decide to create a queue."""
    name = request["queue_name"]
    if name in store.state.names:
        raise Conflict("a queue named %r is there already" % name)
    fields = {"queue_id": new_id(), "queue_name": name, "created_at": at, "last_modified": at,
              "password": request.get("password_hash")}
    if request.get("metadata"):
        fields["metadata"] = unflatten(request["metadata"], "metadata")
    return [["queue", fields]], {"queue_id": fields["queue_id"]}


def get_queue_op(store, queue, request, at):
    """Answer the queue; changes nothing."""
    return [], queue.record


def update_queue_op(store, queue, request, at):
    """Decide to change a queue's name, password or metadata, or to pause it. A second pause changes nothing."""
    fields, is_paused = {"last_modified": at}, queue.record.paused_at is not None
    if request.get("paused") not in (None, is_paused):
        fields["paused_at"] = at if request["paused"] else None
    new_name = request.get("new_queue_name")
    if new_name is not None:
        if store.state.names.get(new_name, queue.record.queue_id) != queue.record.queue_id:
            raise BadRequest("a queue named %r is there already" % new_name)
        fields["queue_name"] = new_name
    if request.get("password_hash"):
        fields["password"] = request["password_hash"]
    update = request.get("metadata_update")
    if update is not None:
        fields["metadata"] = merge(queue.record.metadata, unflatten(update, "metadata_update")) if update else {}
    return [["queue", fields]], revised(queue.record, dict(fields))


def delete_queue_op(store, queue, request, at):
    """Decide to delete a queue with its tasks and workers."""
    return [["queue-"]], None


# Operations: tasks


_sorted_json = json_writer(sort_keys=True)


def _submission(request, at):
    """Return (task id, fields) of a task to create."""
    if not request.get("args") and not request.get("cmd"):
        raise BadRequest("a task needs args or cmd: both are empty")
    fields, notes, task_id = {"status": "pending", "created_at": at}, {}, request.get("task_id")
    for name, value in request.items():
        how, default = _INPUT[name]
        if value is not None and value != default:
            if how == "unflatten":
                fields[name] = unflatten(value, name)
            elif how == "set":
                fields[name] = value
            elif how == "note":
                notes[name] = value
    if task_id:
        content = dict(fields)
        del content["created_at"]
        fields["digest"] = zlib.crc32(_sorted_json(content).encode())
    fields.update(notes)
    return task_id or new_id(), fields


_INPUT = {name: (field.submitted, field.default) for name, field in SUBMITTED.items()}


# Tasks that wait for others. What a task waits for is decided here, in the transaction that brings it about; which of
# them are blocked is for State alone.


class _Over:
    """The tasks of a queue as they will be after the changes of a transaction."""

    def __init__(self, queue, changes):
        self.queue, self.fields = queue, {}  # {task id: its new fields, None where it is gone}
        for change in changes:
            if change[0] == "task":
                self.note(change[1], change[2])
            elif change[0] == "task-":
                self.fields[change[1]] = None

    def note(self, task_id, fields):
        """Note new fields of a task."""
        self.fields[task_id] = dict(self.fields.get(task_id) or {}, **fields)

    def get(self, task_id, name):
        """Return a field of a task; its default where the task has none or is not there."""
        fields = self.fields.get(task_id, {})
        there = fields is not None and name not in fields and self.queue.tasks.get(task_id)
        return getattr(there, name) if there else (fields or {}).get(name, TASK_FIELDS[name].default)

    def can_wait(self, task_id):
        """Return whether a task is pending, and no run of it has begun."""
        return self.get(task_id, "status") == "pending" and self.get(task_id, "run_id") is None

    def why_in_vain(self, task_id, other_id):
        """Return why it is in vain that a task waits for the success of another, or None."""
        status = self.get(other_id, "status")
        if status is None:
            return "is not there any more" if self.get(task_id, "start_time") is None else None
        return {"failed": "failed", "cancelled": "was cancelled"}.get(status)


def settle(queue, changes, at):
    """Return the changes that follow from those of a transaction for the tasks that wait for others.

    A task that waits in vain for the success of another, as that failed for good, was cancelled or is gone, is
    cancelled with that as its reason; then so are those that wait for it. A task that waits for one which has succeeded
    and is deleted now does not name it any more."""
    waiting = [change[1] for change in changes if change[0] == "task" and _is_to_wait(queue, *change[1:3])]
    if not (waiting or queue.blocked.behind["after"]):
        return []
    over, added, behind = _Over(queue, changes), [], {}  # behind: what is not in the index yet
    for task_id in waiting:
        for other_id in over.get(task_id, "after"):
            behind.setdefault(other_id, []).append(task_id)

    def change(task_id, old_state, **fields):
        fields["last_modified"] = after(at, len(changes) + len(added))
        added.append(["task", task_id, fields, old_state])
        over.note(task_id, fields)

    def look(task_id, other_id):
        """Cancel a task that waits in vain for another."""
        why = over.why_in_vain(task_id, other_id)
        if not why or not over.can_wait(task_id) or other_id not in over.get(task_id, "after"):
            return
        root = roots.get(other_id)
        words = "it waited for task %s, which %s%s" % (other_id, why, " as " + root if root else "")
        roots[task_id] = root or "task %s %s" % (other_id, why)
        change(task_id, "pending", status=move(TASK_MOVES, "pending", "cancel", "task"), reason=words)
        agenda.append(task_id)

    agenda, roots = collections.deque(over.fields), {}  # roots: {cancelled here: the end that began it}
    for task_id in waiting:
        for other_id in over.get(task_id, "after"):
            look(task_id, other_id)
    while agenda:
        other_id = agenda.popleft()
        there = queue.tasks.get(other_id)
        has_succeeded = over.fields[other_id] is None and there is not None and there.status == "success"
        for task_id in queue.blocked.those_behind(other_id, "after") + behind.get(other_id, []):
            names = over.get(task_id, "after")
            if has_succeeded and over.can_wait(task_id) and other_id in names:
                change(task_id, None, after=[name for name in names if name != other_id])
            else:
                look(task_id, other_id)
    return added


def _is_to_wait(queue, task_id, fields):
    """Return whether a change may make a task wait: it names others, or is pending again."""
    if fields.get("after"):
        return True
    there = queue.tasks.get(task_id) if fields.get("status") == "pending" else None
    return bool(there and there.after)


def _check_waits(queue, task, fields):
    """Raise BadRequest where an update makes a task wait that is not pending, or for one that is not there; an update
    that changes nothing is dropped from `fields`."""
    for field in [field for field in WAITS if field in fields]:
        if fields[field] == getattr(task, field):
            del fields[field]
            continue
        if fields.get("status", task.status) != "pending":
            raise BadRequest("it is %s: only a pending task can wait for others (%s)" % (task.status, field))
        for other_id in fields[field]:
            if other_id not in queue.tasks:
                raise BadRequest("%s names task %s, which is not in queue %s" % (
                    field, other_id, queue.record.queue_name))


def _circle(queue, now_are, begin):
    """Return the ids of a circle of tasks that would wait for each other, None without one. Only updates of the tasks
    `begin` can have closed it."""
    def names(task_id):
        task = now_are.get(task_id) or queue.tasks.get(task_id)
        return iter(list(task.after) + list(task.after_any) if task else ())
    done = set()
    for task_id in begin:
        path, way = {task_id: None}, [(task_id, names(task_id))]  # path: an ordered set
        while way:
            at_id, rest = way[-1]
            next_id = next(rest, None)
            if next_id in path:
                ids = list(path)
                return ids[ids.index(next_id):] + [next_id]
            if next_id is None:
                done.add(at_id)
                del path[at_id]
                way.pop()
            elif next_id not in done:
                path[next_id] = None
                way.append((next_id, names(next_id)))
    return None


def submit_tasks_op(store, queue, request, at):
    """Decide to create tasks, all or none. A task that exists with the same content was submitted before: no error."""
    changes, ids = [], {}
    for place, submission in enumerate(request["tasks"]):
        task_id, fields = _submission(submission, after(at, place))
        existing = queue.tasks.get(task_id)
        digest = ids.get(task_id) if task_id in ids else existing and existing.digest
        if task_id in ids or existing:
            if digest != fields.get("digest"):
                raise Conflict("task %s is there already, with other content" % task_id)
        else:
            for field in WAITS:
                for other_id in fields.get(field, ()):
                    if other_id not in queue.tasks and other_id not in ids:
                        raise NotFound("%s: there is no task %s in queue %s; nothing was submitted" % (
                            field, other_id, queue.record.queue_name))
            changes.append(["task", task_id, fields, "created"])
        ids[task_id] = fields.get("digest")
    return changes, {"task_ids": list(ids)} if request["many"] else {"task_id": next(iter(ids))}


def _tests(request, id_field, name_field):
    """Return the predicates that a request's records must satisfy."""
    tests = [lambda record, get=operator.attrgetter(field), value=request[field]: get(record) == value
             for field in (id_field, name_field, "status") if request[field] is not None]
    return tests + ([] if request["extra_filter"] is None else [request["predicate"]])


def _matching(store, records, tests):
    """Return an iterator of the records that pass all tests; running tasks have the time of their last heartbeat."""
    matching = map(lambda record: last_seen(store, record) if record.status == "running" else record, records)
    for test in tests:
        matching = filter(test, matching)
    return matching


def _selected(store, records, request, id_field, name_field):
    """Return a function that answers a search in a list of records: filtered, sorted, one page of them."""
    tests, offset, limit = _tests(request, id_field, name_field), request["offset"], request["limit"]

    def answer():
        matching = _matching(store, records, tests)
        if request.get("sort"):
            sort = [[id_field if field == "_id" else field, direction] for field, direction in request["sort"]]
            matching = sort_records(matching, sort, lambda record: (record.created_at, getattr(record, id_field)))
        content = list(itertools.islice(matching, offset, offset + limit))
        return {"found": bool(content), "content": content}
    return answer


def search_tasks_op(store, queue, request, at):
    """Answer the tasks that match, outside the lock; changes nothing."""
    if request.get("task_id") is not None:
        records = [queue.tasks[request["task_id"]]] if request["task_id"] in queue.tasks else []
    else:
        records = queue.tasks.values()
        if not any(request.get(name) for name in ("task_name", "status", "extra_filter", "sort")):
            records = itertools.islice(records, request["offset"] + request["limit"])
        records = list(records)
    return [], _selected(store, records, request, "task_id", "task_name")


def recent_ends(records, at, start_of=operator.attrgetter("start_time")):
    """Return (the number of tasks that ended last, at most RECENT, the seconds since the earliest start of these).

    The records are in the order of their last change."""
    starts = (start_of(record) for record in reversed(records)
              if record.status in ("success", "failed") and record.start_time is not None)
    latest = list(itertools.islice(starts, RECENT))
    return len(latest), max(0.0, at - min(latest)) if latest else 0.0


def count_tasks_op(store, queue, request, at):
    """Answer, outside the lock, how many tasks match for each value of a field, what `recent_ends` returns, and the
    mark of the state that was counted; changes nothing."""
    tests, mark = _tests(request, "task_id", "task_name"), _mark(store)
    records = list(queue.tasks.values())
    top, *path = request["by"].split(".")

    def value(record):
        content = getattr(record, top)
        content = get_path(format_time(content) if isinstance(content, Instant) else content, path)
        return content if type(content) is str else (dump_json(content),)  # as True == 1, and a dict is no key

    def answer():
        matching = list(_matching(store, records, tests))
        counts = collections.Counter(value(record) for record in matching)
        ended, took_s = recent_ends(matching, at)
        return {"counts": [[key if type(key) is str else json.loads(key[0]), number] for key, number in counts.items()],
                "ended": ended, "took_s": took_s, "mark": mark}
    return [], answer


TABLE_COLUMNS = ("n", "mean", "std", "min", "max", "best", "failed", "missing", "nan")


class _Group:
    """What is known of the records that share the values of the fields by which a table is made."""

    __slots__ = ("keys", "numbers", "records", "failed", "missing", "nan")

    def __init__(self, keys):
        self.keys, self.numbers, self.records, self.failed, self.missing, self.nan = keys, [], [], 0, 0, 0

    def add(self, value, record, statuses):
        """Count a record: as failed, and by its value if its status is one of the `statuses`."""
        if record.status == "failed":
            self.failed += 1
            if "failed" not in statuses:
                return
        kind = type(value)
        if kind is not float and kind is not int:
            self.missing += 1
        elif value != value:
            self.nan += 1
        else:
            self.numbers.append(value)
            self.records.append(record)

    def row(self, by, best_of):
        """Return the row of the table, a dict; `best_of` is min or max."""
        numbers, mean, std = self.numbers, None, None
        if numbers:
            mean = _finite_or_nan(lambda: math.fsum(numbers) / len(numbers))
            std = _finite_or_nan(lambda: math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (
                len(numbers) - 1))) if numbers[1:] else None
        best = self.records[numbers.index(best_of(numbers))].task_id if numbers else None
        return dict(zip(by, self.keys), n=len(numbers), mean=mean, std=std, min=min(numbers, default=None),
                    max=max(numbers, default=None), best=best, failed=self.failed, missing=self.missing, nan=self.nan)


def _finite_or_nan(compute):
    """Return what `compute` does; NaN where infinite or far too large numbers leave no result."""
    try:
        return compute()
    except (OverflowError, ValueError):
        return math.nan


def _values_at(records, field):
    """Return the values that the records have for a dotted field; None where one has no such field."""
    top, *path = field.split(".")
    values = map(operator.attrgetter(top), records)
    if len(path) == 1:  # the quick way to what get_path returns
        key = path[0]
        return [value.get(key) if type(value) is dict else get_path(value, path) for value in values]
    return [get_path(format_time(value) if isinstance(value, Instant) else value, path) for value in values]


def _grouped(column):
    """Return what two values of a column have in common if they belong to one group: True is no 1, but 1.0 is."""
    return [value if type(value) is str or type(value) is int or type(value) is float and value == value
            else (dump_json(value),) for value in column]


def group_rows(records, by, of, mode, statuses):
    """Return a row for each group of the records with the same values of the fields `by`: a dict of these values and of
    n, mean, std (of a sample; None for one), min, max, best (a task's id), failed, missing and nan.

    All but `failed` are about the records with one of the `statuses` (None: any). The best mean comes first, the
    largest one for the `mode` "max"; a group without a number comes last."""
    statuses, groups = frozenset(TASK_STATES if statuses is None else statuses), {}
    records = [record for record in records if record.status in statuses or record.status == "failed"]
    columns = [_values_at(records, field) for field in by]
    group_keys = zip(*map(_grouped, columns))
    for group_key, keys, value, record in zip(group_keys, zip(*columns), _values_at(records, of), records):
        group = groups.get(group_key)
        if group is None:
            group = groups[group_key] = _Group(keys)
        group.add(value, record, statuses)
    sign, best_of = (-1, max) if mode == "max" else (1, min)
    rows = [group.row(by, best_of) for group in groups.values()]
    return sorted(rows, key=lambda row: (row["mean"] is None, row["mean"] != row["mean"], sign * (row["mean"] or 0)))


def table_op(store, queue, request, at):
    """Answer, outside the lock, at most `limit` rows of the table of the tasks that match; changes nothing."""
    tests, records = _tests(request, "task_id", "task_name"), list(queue.tasks.values())

    def answer():
        rows = group_rows(_matching(store, records, tests), request["by"], request["of"], request["mode"],
                          request["statuses"])
        return {"content": rows[:request["limit"]], "found": len(rows)}
    return [], answer


def _mark(store):
    return "%s-%d" % (store.server_id, store.journal.file.n)  # if a line fails, no answer about it is sent


def get_mark_op(store, queue, request, at):
    """Answer the mark of the state; changes nothing."""
    return [], {"mark": _mark(store)}


def last_seen(store, task):
    """Return the record of a task; if it is running, with the time of its last heartbeat."""
    if task.status != "running" or task.last_heartbeat is None:
        return task
    ages = store.beats.ages(task.run_id)
    if ages is None or math.isinf(ages[1]):
        return task
    return task._replace(last_heartbeat=Instant(max(task.last_heartbeat, round(now() - ages[1], 6))))


def _task(queue, task_id):
    try:
        return queue.tasks[task_id]
    except KeyError:
        raise NotFound("no task %s in queue %s" % (task_id, queue.record.queue_name)) from None


def get_task_op(store, queue, request, at):
    """Answer the task; changes nothing."""
    return [], last_seen(store, _task(queue, request["task_id"]))


def required_of(request):
    """Return the required fields of a fetch as a tuple in a fixed order."""
    return tuple(sorted(set(request["required_fields"] or ())))


def _next_task(store, queue, request):
    required = required_of(request)
    if request["extra_filter"] is None:
        return queue.pending.first(required)
    return queue.pending.first_matching(required, request["filter_text"], request["predicate"])


def fetch_task_op(store, queue, request, at):
    """Decide that a worker runs the next task that matches. A repeated fetch_id gets the same task."""
    worker_id = request.get("worker_id")
    if worker_id is not None:
        worker = queue.workers.get(worker_id)
        if worker is None:
            raise NotFound("no worker %s in queue %s" % (worker_id, queue.record.queue_name))
        if worker.status != "active":
            raise Forbidden("worker %s is %s and gets no tasks; set it active again with: labtasker worker report %s "
                            "active" % (worker_id, worker.status, worker_id))
    repeated = queue.running.get(queue.fetches.get(request.get("fetch_id")))
    if repeated is not None and repeated.worker_id == worker_id:
        return [], {"found": True, "task": repeated}
    is_ended = request.get("fetch_id") in queue.ended_fetches
    if queue.record.paused_at is not None:
        return [], {"found": False, "task": None, "paused": True}
    queue.pending.release(at)
    task = None if is_ended else _next_task(store, queue, request)
    if task is None:
        return [], _nothing_found(queue, request, at)
    fields = {"status": move(TASK_MOVES, task.status, "fetch", "task"), "start_time": at, "last_modified": at,
              "summary": {}, "worker_id": worker_id, "run_id": new_id(), "run_end": None,
              "fetch_id": request.get("fetch_id"), "last_heartbeat": at if request["start_heartbeat"] else None}
    fields.update(_without_pause(task), **{name: None for name in ("reason", "failure") if getattr(task, name)})
    if task.curve and task.run_end != "pending":  # only a run that was handed back is resumed
        fields.update(curve=None, rungs=None)
    if request.get("cmd"):
        fields["cmd"] = request["cmd"]
    is_wished = not (request.get("heartbeat_default") and task.heartbeat_timeout is not None)
    if request.get("heartbeat_timeout") is not None and is_wished:
        fields["heartbeat_timeout"] = request["heartbeat_timeout"]
    if request.get("eta_max") is not None:
        fields["task_timeout"] = request["eta_max"]
    if request.get("attempt"):
        fields["attempts"] = _attempts_begun(task, request["attempt"], fields)
    back = [["worker", worker_id, {"ended_at": None}, None]] if worker_id and worker.ended_at else []
    return [["task", task.task_id, fields, task.status]] + back, {"found": True, "task": revised(task, dict(fields))}


def _nothing_found(queue, request, at):
    """Return the answer to a fetch that gets no task; `retry_in_s`: until the first pause of a fitting task is over."""
    answer, next_at = {"found": False, "task": None}, None
    if queue.pending.delayed:
        next_at = queue.pending.next_delayed(required_of(request), request.get("predicate"))
    return answer if next_at is None else dict(answer, retry_in_s=max(0.0, round(next_at - at, 3)))


def _without_pause(task):
    """Return the field that ends a task's pause, or {} if it has none."""
    return {} if task.not_before is None else {"not_before": None}


def _pause(request, at):
    """Return the field with the end of the pause that a job has asked for with its report, or {}."""
    delay_s = min(request.get("delay_s") or 0, MAX_DELAY_S)
    return {"not_before": Instant(round(at + delay_s, 6))} if delay_s else {}


def end_fetch_op(store, queue, request, at):
    """Decide to end a fetch. It gets no task, even if it arrives later; if it waits, it is answered at once.

    With `hand_back` a task that it got and that still runs is handed back, which costs no retry."""
    fetch_id = request["fetch_id"]
    queue.ended_fetches[fetch_id] = None
    if len(queue.ended_fetches) > MAX_ENDED_FETCHES:
        queue.ended_fetches.popitem(last=False)
    store.wake((queue.record.queue_id, "pending"))
    task = queue.running.get(queue.fetches.get(fetch_id))
    if task is None or not request["hand_back"]:
        return [], None
    reason = "the worker left before it received this task"
    fields = _attempt_over(task, at, "pending", reason) if task.attempts else {}
    return _report_pending(queue, task, fields, {"reason": reason}, at), None


def _attempts_begun(task, words, run):
    """Return a task's attempts with the one that begins: the facts that its worker reports, and those known here.

    `{task_id}` and `{run_id}` in the worker's texts are filled in, as the run gets its id only now."""
    words = {key: value.replace("{task_id}", task.task_id).replace("{run_id}", run["run_id"])
             if isinstance(value, str) else value for key, value in words.items()}
    known = {"run_id": run["run_id"], "worker_id": run["worker_id"], "start": format_time(run["start_time"])}
    return task.attempts[1 - _MAX_ATTEMPTS:] + [dict(words, **known)]


def _attempt_with(task, facts):
    """Return the field `attempts` with these facts about the task's run; {} if its worker has announced no attempt."""
    if not facts or not task.attempts or task.attempts[-1]["run_id"] != task.run_id:
        return {}
    known = dict(task.attempts[-1], **facts)
    return {"attempts": task.attempts[:-1] + [{key: value for key, value in known.items() if value is not None}]}


def _attempt_over(task, at, status, reason=None, facts=None):
    """Return the field `attempts` with the end of the task's run; {} if its worker has announced no attempt."""
    return _attempt_with(task, dict({"reason": reason}, **dict(facts or {}, end=format_time(at), status=status)))


class ForExtended(dict):
    """An answer for clients that ask for extensions; others get {}."""


def report_task_op(store, queue, request, at):
    """Decide what a report does: end a run, hand it back, cancel a task, or merge its summary and add a point to its
    history. Answer whether the job should go on, and the status and reason of the task after it."""
    task = _task(queue, request["task_id"])
    if _is_of_stopped(task, request):  # its values don't count any more; how its process ended is kept
        changes, point, doubt = _changed(task, _attempt_with(task, request.get("attempt")), None, at), None, None
    else:
        changes = _reported(queue, task, request, at)
        point, doubt = _point_of(task, request, at)
    if point and "id" in point and task.curve and task.curve.knows(point["id"]):
        changes = []
    elif point:
        changes = _with_point(queue, task, changes, point, at)
    now_is = dict({"status": task.status, "reason": task.reason}, **dict(
        pair for change in changes if change[1] == task.task_id for pair in change[2].items()))
    answer = ForExtended(go=now_is["status"] == "running", status=now_is["status"], reason=now_is["reason"])
    if doubt:
        answer["notification"] = [{"type": "warning", "details": doubt}]
    return changes, answer


def _is_of_stopped(task, request):
    """Return whether a report is of the run that was stopped early."""
    return task.run_end == "stopped" and (request.get("run_id") == task.run_id or (
        request.get("run_id") is None and request["status"] == "running"))


def step_of(value):
    """Return a step, None for what is no finite number >= 0."""
    return value if type(value) in (int, float) and 0 <= value < math.inf else None


def _point_of(task, request, at):
    """Return (the point of a report with a step, what is wrong with the step); each may be None."""
    step = step_of(request.get("step"))
    if step is None or task.status != "running":
        return None, None if request.get("step") is None or step is not None else (
            "the step %.100s is no number >= 0: the values are merged, no point is made" % json.dumps(request["step"]))
    point = {"step": step, "at": float(_ended(task, request, at)),
             "values": unflatten(request.get("summary") or {}, "summary")}
    if request.get("point_id"):
        point["id"] = request["point_id"]
    if task.curve is None or task.curve.run != task.run_id:
        point["run"] = task.run_id
    return point, None


def _with_point(queue, task, changes, point, at):
    """Return the changes of a report with its point, and with what follows from that by the task's rule."""
    fields, stopped = {}, None
    if task.stop:
        fields, stopped = _judged(queue, task, point)
    if changes and changes[0][3] is not None:  # it ends the run
        return [["point", task.task_id, fields, None, point]] + changes
    fields = dict(changes[0][2] if changes else {"last_modified": at}, **fields)
    changes = [["point", task.task_id, fields, None, point]]
    if stopped:
        end = {"status": move(TASK_MOVES, task.status, "cancel", "task " + task.task_id), "worker_id": None,
               "reason": stopped, "run_end": "stopped", "last_modified": after(at, 1)}
        changes.append(["task", task.task_id, dict(end, **_attempt_over(task, at, "cancelled", stopped)), task.status])
    return changes


# Rules that stop a task early. A rule is a function (queue, task, rule, point, value of the metric) that returns
# (fields of the task that are new, why it is stopped or None).

STOPPED = "stopped early: "  # how the reason of a task begins that a rule has stopped


def _judged(queue, task, point):
    """Return (fields of the task that are new, the reason why it is stopped or None) for a point that is added."""
    rule, fields = rule_of(task.stop), {}
    if "run" in point and task.rungs:  # the points at or beyond this step are dropped, and what they had recorded
        kept = [row for row in task.rungs if row[1] < point["step"]]
        fields = {"rungs": _rungs_of(task.stop, task.curve, kept, point["step"])}
    value = _number_at(point["values"], rule.path) if rule else None
    if value is None:
        return fields, None
    added, why = _RULES[rule.kind](queue, revised(task, fields) if fields else task, rule, point, value)
    text = why and "%s%s, step %s, %s %s" % (STOPPED, rule.kind, _shown_number(point["step"]), rule.metric, why)
    return dict(fields, **added), text


def _number_at(values, path):
    """Return the number at a path in the values of a point, None without one."""
    value = get_path(values, path)
    return value if type(value) in (int, float) else None


def _shown_number(value):
    """Return a number as a reason shows it."""
    return str(value) if type(value) is int else "%.6g" % value


def _recorded(rungs, rule, step, value):
    """Return the records of a task with those of another point: one at each rung that it is the first to reach."""
    rungs = list(rungs or ())
    while _rung(rule, len(rungs)) <= step:
        rungs.append([value, step])
    return rungs


def _rung(rule, place):
    """Return the step of a rung."""
    try:
        return rule.options["from"] * rule.options["eta"] ** place
    except OverflowError:
        return math.inf


def _rungs_of(stop, curve, rungs=None, before=math.inf):
    """Return the records of a history's points at steps `before` one, after those that are known; None without any."""
    rule = rule_of(stop)
    for step, _, values in curve.content() if curve and rule and rule.kind == "asha" else ():
        value = _number_at(values, rule.path)
        if value is not None and step < before:
            rungs = _recorded(rungs, rule, step, value)
    return rungs or None


def _asha(queue, task, rule, point, value):
    """The point is recorded at the rungs that it is the first to reach. The highest decides: the task goes on if fewer
    than one of eta of the records there are better."""
    rungs = _recorded(task.rungs, rule, point["step"], value)
    if len(rungs) == len(task.rungs or ()):
        return {}, None
    group, before = queue.groups[task.task_name, task.stop], queue.tasks[task.task_id].rungs or ()
    better, others = group.rank(len(rungs) - 1, value, rule.is_max)
    if len(before) >= len(rungs):  # what it had recorded here is dropped with this point, and is still in the group
        better -= _is_worse(value, before[len(rungs) - 1][0], rule.is_max)
        others -= 1
    if better < max(1, (others + 1) // rule.options["eta"]):
        return {"rungs": rungs}, None
    return {"rungs": rungs}, "%s is %s of %d" % (_shown_number(value), ordinal(better + 1), others + 1)


def ordinal(number):
    """Return "1st", "2nd", "11th"."""
    is_th = number % 100 in (11, 12, 13) or number % 10 not in (1, 2, 3)
    return "%d%s" % (number, "th" if is_th else ("st", "nd", "rd")[number % 10 - 1])


def _is_worse(value, other, is_max):
    """Return whether a value is worse than another; NaN is worst."""
    return other == other and (value != value or (value < other if is_max else value > other))


def _median(queue, task, rule, point, value):
    """The task is stopped if its best value is worse than the median of the means of those that succeeded."""
    if point["step"] < rule.options["from"]:
        return {}, None
    count, median = _median_at(queue.groups[task.task_name, task.stop], rule, point["step"])
    if count < max(1, rule.options["after"]) or not _is_worse(value, median, rule.is_max):
        return {}, None
    best = _best((task.curve or NO_CURVE).plus(point), rule)
    if not _is_worse(best, median, rule.is_max):
        return {}, None
    return {}, "%s at best is worse than %s, the median of %d" % (_shown_number(best), _shown_number(median), count)


def _best(curve, rule):
    """Return the best value of a rule's metric in a history; None without any."""
    values = [_number_at(values, rule.path) for _, _, values in curve.content()]
    values = [value for value in values if value is not None]
    numbers = [value for value in values if value == value]
    return (max if rule.is_max else min)(numbers) if numbers else values[0] if values else None


def _median_at(group, rule, step):
    """Return (of how many tasks that succeeded there are points up to a step, the median of their means or None)."""
    if step not in group.medians:
        if len(group.medians) > _MOST_MEDIANS:
            group.medians.clear()
        means = [_mean_up_to(group, task, rule, step) for task in group.succeeded.values()]
        numbers = sorted(mean for mean in means if mean is not None and mean == mean)
        nans = [mean for mean in means if mean is not None and mean != mean]
        ordered = nans + numbers if rule.is_max else numbers + nans
        middle = ordered[(len(ordered) - 1) // 2:len(ordered) // 2 + 1]
        group.medians[step] = len(ordered), _mean(middle) if middle else None
    return group.medians[step]


_MOST_MEDIANS = 10000  # steps for which a group's median is kept


def _mean(values):
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # infinite, of both signs or in between
        return sum(values) / len(values)


def _mean_up_to(group, task, rule, step):
    """Return the mean of a task's values at steps up to this one, None where it has none."""
    from bisect import bisect_right
    if task.task_id not in group.means:
        rows = [(at, _number_at(values, rule.path)) for at, _, values in (task.curve or NO_CURVE).content()]
        rows = sorted((row for row in rows if row[1] is not None), key=operator.itemgetter(0))
        group.means[task.task_id] = [row[0] for row in rows], [row[1] for row in rows], {}
    steps, values, known = group.means[task.task_id]
    count = bisect_right(steps, step)
    if count and count not in known:
        known[count] = _mean(values[:count])
    return known.get(count)


_RULES = {"asha": _asha, "median": _median}


def _standing(queue, task):
    """Return what a task's rule has to say of it now, None without a rule."""
    rule, curve = rule_of(task.stop), task.curve or NO_CURVE
    if rule is None:
        return None
    group, best = queue.groups[task.task_name, task.stop], _best(curve, rule)
    if best is None:
        text = "none of its %d points has a number %s" % (len(curve.points), rule.metric) if curve.points else (
            "it has reported nothing with a step")
        return "%s: %s, so it is not compared." % (task.stop, text)
    return "%s: %s." % (task.stop, _STANDINGS[rule.kind](group, task, rule, best))


def _asha_standing(group, task, rule, best):
    rungs = task.rungs or ()
    next_rung = _shown_number(_rung(rule, len(rungs)))
    if not rungs:
        return "it has reached no rung; the first is step " + next_rung
    value, step = rungs[-1]
    better, count = group.rank(len(rungs) - 1, value, rule.is_max)
    return "at rung %s (step %s) its %s %s is %s of %d, of which %s on; the next rung is step %s" % (
        _shown_number(_rung(rule, len(rungs) - 1)), _shown_number(step), rule.metric, _shown_number(value),
        ordinal(better + 1), count, "1 goes" if count < 2 * rule.options["eta"] else "%d go" % (
            count // rule.options["eta"]), next_rung)


def _median_standing(group, task, rule, best):
    step = max(point[0] for point in task.curve.points)
    count, median = _median_at(group, rule, step)
    return "its best %s is %s; %d tasks that succeeded have points up to step %s, %d are needed%s" % (
        rule.metric, _shown_number(best), count, _shown_number(step), rule.options["after"],
        "; the median of their means is " + _shown_number(median) if count else "")


_STANDINGS = {"asha": _asha_standing, "median": _median_standing}


def _reported(queue, task, request, at):
    """Return the changes of a report, without its point; raise Conflict if its run is over."""
    status, run_id = request["status"], request.get("run_id")
    if run_id is not None and run_id != task.run_id:
        raise Conflict("run %s of task %s is over: the task was fetched, reset or cancelled since (it is %s)"
                       % (run_id, task.task_id, task.status))
    fields, ended = _summarised(task, request), _ended(task, request, at)
    if run_id is None and request.get("worker_id") not in (None, task.worker_id):
        raise Conflict("task %s is not run by worker %s (it is %s)" % (task.task_id, request["worker_id"], task.status))
    is_late = run_id is not None and task.status != "running" and status != "cancelled"
    if status == task.status and not (is_late and task.run_end == "timeout"):
        fields.update(_attempt_with(task, request.get("attempt")) if run_id else {})
        return _changed(task, fields, None, at)
    if is_late:
        return _report_late(task, request, at)
    if task.attempts and task.status == "running":
        fields.update(_attempt_over(task, ended, status, request.get("reason"), request.get("attempt")))
    return REPORTS[status](queue, task, fields, request, at)


def _summarised(task, request):
    summary = request.get("summary")
    return {"summary": merge(task.summary, unflatten(summary, "summary"))} if summary else {}


def _ended(task, request, at):
    """Return when the run of a report has ended, at the latest at `at`: the report may come late."""
    return min(at, Instant(round((task.start_time or at) + request["took_s"], 6))) if request.get("took_s") else at


def _changed(task, fields, old_state, at):
    return [["task", task.task_id, dict(fields, last_modified=at), old_state]] if fields else []


def _report_late(task, request, at):
    """Return the changes of a report on a run that has ended already, or raise Conflict.

    If the report that ended the run is repeated, it can only add facts about the attempt. A run that timed out may
    still succeed or be handed back until the task is fetched again; then the time-out costs no retry."""
    status, facts = request["status"], request.get("attempt")
    if status == task.run_end or (status, task.run_end) == ("failed", "timeout"):
        return _changed(task, _attempt_with(task, facts), None, at)
    if task.run_end != "timeout" or status not in _LATE_REPORTS:
        raise Conflict("run %s of task %s has ended already: %s" % (task.run_id, task.task_id, task.run_end))
    next_status = move(TASK_MOVES, task.status, _LATE_REPORTS[status], "task " + task.task_id)
    summary = {key: value for key, value in task.summary.items() if key != "labtasker_error"}
    fields = dict(_summarised(task._replace(summary=summary), request), status=next_status, run_end=status,
                  retries=max(0, task.retries - 1), failure=None, reason=None, **_without_pause(task))
    fields.setdefault("summary", summary)
    if status == "pending":
        fields.update(interruptions=task.interruptions + 1, reason=request.get("reason"), **_pause(request, at))
    fields.update(_attempt_over(task, _ended(task, request, at), status, request.get("reason"), facts))
    return _changed(task, fields, task.status, at)


# status in a report on a run that had timed out: event of TASK_MOVES
_LATE_REPORTS = {"success": "succeed_late", "pending": "hand_back_late"}


def _report_over(queue, task, fields, request, at):
    status = move(TASK_MOVES, task.status, UPDATE_EVENTS[request["status"]], "task " + task.task_id)
    return _changed(task, dict(fields, status=status, worker_id=None, run_end=status), task.status, at)


def _report_failed(queue, task, fields, request, at):
    change = _failed(task, dict(fields, run_end="failed", **_why_failed(request)), at, request.get("final"))
    return [change] + (_strike(queue, task.worker_id, 1, at) if task.worker_id else [])


def _why_failed(request):
    """Return the fields that say how a run failed. A worker that knows no failures has told it in the summary, or not
    at all."""
    summary = request.get("summary") or {}
    raised, failure = summary.get("labtasker_exception"), "exception" if "labtasker_exception" in summary else "exit"
    words = summary.get("labtasker_error") or (raised.get("type") if isinstance(raised, dict) else raised)
    return {"failure": request.get("failure") or failure, "reason": request.get("reason") or (
        words if isinstance(words, str) else None)}


def _report_running(queue, task, fields, request, at):
    raise illegal(TASK_MOVES, task.status, "running", "task " + task.task_id)


def _report_pending(queue, task, fields, request, at):
    """Decide to hand a run back: it costs no retry and counts as an interruption."""
    count, reason = task.interruptions + 1, request.get("reason")
    if count >= MAX_INTERRUPTIONS:
        status = move(TASK_MOVES, task.status, "fail", "task " + task.task_id)
        error = "interrupted %d times, the last time: %s" % (count, reason or "no reason given")
        fields = dict(fields, summary=dict(fields.get("summary", task.summary), labtasker_error=error))
    else:
        status = move(TASK_MOVES, task.status, "hand_back", "task " + task.task_id)
        fields = dict(fields, **_pause(request, at))
    fields = dict(fields, status=status, worker_id=None, run_end="pending", interruptions=count, reason=reason)
    return _changed(task, fields, task.status, at)


# status in a report, if the task has another status: the function that decides
REPORTS = {
    "running": _report_running,
    "pending": _report_pending,
    "success": _report_over,
    "failed": _report_failed,
    "cancelled": _report_over,
}


def heartbeat_op(store, queue, request, at):
    """Record, only in memory, that a run is alive; answer the task's status."""
    task = _task(queue, request["task_id"])
    run_id, worker_id = request.get("run_id"), request.get("worker_id")
    if task.status != "running" or (run_id is not None and run_id != task.run_id):
        if request.get("answer") == "status":
            is_stopped = task.run_end == "stopped" and run_id == task.run_id
            return [], {"status": "stopped" if is_stopped else task.status if task.status != "running" else "taken"}
        raise NotFound("task %s is not running (it is %s)" % (task.task_id, task.status))
    if worker_id is not None and worker_id != task.worker_id:
        raise Forbidden("task %s is not run by worker %s" % (task.task_id, worker_id))
    store.beats.touch(task.run_id)
    store.owner.show() if not store.is_server else None
    return [], {"status": "running"} if request.get("answer") == "status" else None


ERRORS = ("labtasker_error", "labtasker_exception")  # keys of a summary: a job's end and `finish` write them
# status in an update: the event of TASK_MOVES that leads to it
UPDATE_EVENTS = {"pending": "requeue", "success": "succeed", "failed": "fail", "cancelled": "cancel"}
_RESET = {"retries": 0, "worker_id": None, "run_id": None, "run_end": None, "reason": None, "failure": None}


def _updated(task, request, reset):
    """Return (new fields, old state or None) for an update, or raise InvalidStateTransition or InvalidFields."""
    replaced = request.get("replace_fields") or ()
    fields = {}
    for name, field in UPDATED.items():
        value = request.get(name)
        if field.updated == "merge" and value is not None:
            new = unflatten(value, name)
            fields[name] = new if name in replaced else merge(getattr(task, name), new)
        elif field.updated == "set" and (value is not None or name in replaced and name in request):
            fields[name] = field.default if value is None else value
    if fields.get("stop", task.stop) != task.stop:
        fields["rungs"] = _rungs_of(fields["stop"], task.curve)
    if reset:
        fields.update(_RESET, **_without_pause(task))
        summary = fields.get("summary", task.summary)
        if any(key in summary for key in ERRORS):  # its attempts keep what went wrong
            fields["summary"] = {key: value for key, value in summary.items() if key not in ERRORS}
        fields.update(status=move(TASK_MOVES, task.status, "reset", "task " + task.task_id))
        return fields, task.status
    status = request.get("status")
    if status is None or status == task.status:
        return fields, None
    fields.update(_without_pause(task))
    fields.update(status=set_by_hand(task, status), worker_id=None, run_id=None, run_end=None)
    return fields, task.status


def set_by_hand(task, status):
    """Return the status that a task, or its record, gets by an update to `status`, or raise InvalidStateTransition."""
    if status == "running":
        raise illegal(TASK_MOVES, task.status, "running", "task " + task.task_id)
    return move(TASK_MOVES, task.status, UPDATE_EVENTS[status], "task " + task.task_id)


def update_tasks_op(store, queue, request, at):
    """Decide a list of updates, all or none. The error names each that can't be made."""
    changes, now_are, problems = [], {}, []
    for update in request["updates"]:
        task_id = update["task_id"]
        try:
            task = now_are.get(task_id) or _task(queue, task_id)
            fields, old_state = _updated(task, update, request["reset_pending"])
            _check_waits(queue, task, fields)
        except LabtaskerError as error:
            problems.append("task %s: %s" % (task_id, error))
            continue
        if old_state == "running" and fields["status"] != "running":
            fields.update(_attempt_over(task, at, "reset" if request["reset_pending"] else fields["status"]))
        fields["last_modified"] = after(at, len(changes))  # even if nothing else changes, as in 1.0.1
        changes.append(["task", task_id, fields, old_state])
        now_are[task_id] = revised(task, dict(fields))
    named = [change[1] for change in changes if not change[2].keys().isdisjoint(WAITS)]
    circle = _circle(queue, now_are, named) if not problems else None
    if circle:
        problems.append("task %s would wait for itself: %s" % (circle[0], " after ".join(circle)))
    if problems:
        raise BadRequest("; ".join(problems) + (" (nothing was updated)" if len(request["updates"]) > 1 else ""))
    settled = settle(queue, changes, at)
    for _, task_id, fields, _ in settled:
        if task_id in now_are:
            now_are[task_id] = revised(now_are[task_id], dict(fields))
    return changes + settled, {"found": bool(now_are), "content": list(now_are.values())}


def delete_task_op(store, queue, request, at):
    """Decide to delete a task."""
    return [["task-", _task(queue, request["task_id"]).task_id]], None


# Operations: workers


def _worker(queue, worker_id):
    try:
        return queue.workers[worker_id]
    except KeyError:
        raise NotFound("no worker %s in queue %s" % (worker_id, queue.record.queue_name)) from None


def create_worker_op(store, queue, request, at):
    """Decide to register a worker. If its id exists with the same name, it was registered before: no error."""
    worker_id = request.get("worker_id") or new_id()
    if worker_id in queue.workers:
        if queue.workers[worker_id].worker_name != request.get("worker_name"):
            raise Conflict("worker %s is there already, with another name" % worker_id)
        return [], {"worker_id": worker_id}
    fields = {"status": move(WORKER_MOVES, "created", "register", "worker"), "created_at": at, "last_modified": at}
    if request.get("metadata"):
        fields["metadata"] = unflatten(request["metadata"], "metadata")
    for name in ("worker_name", "max_retries"):
        if request.get(name) is not None:
            fields[name] = request[name]
    return [["worker", worker_id, fields, "created"]], {"worker_id": worker_id}


def search_workers_op(store, queue, request, at):
    """Answer the workers that match; changes nothing."""
    return [], _selected(store, list(queue.workers.values()), request, "worker_id", "worker_name")


def get_worker_op(store, queue, request, at):
    """Answer the worker; changes nothing."""
    return [], _worker(queue, request["worker_id"])


WORKER_EVENTS = {"active": "activate", "suspended": "suspend", "crashed": "crash"}


def get_history_op(store, queue, request, at):
    """Answer, outside the lock, the points of a task's history and how it stands by its rule; changes nothing."""
    task = _task(queue, request["task_id"])
    curve, standing = task.curve or NO_CURVE, _standing(queue, task)
    return [], lambda: {"standing": standing, "content": [
        {"step": step, "at": format_time(at), **{key: value for key, value in values.items() if key not in _POINTS_OWN}}
        for step, at, values in curve.content()]}


_POINTS_OWN = ("step", "at")  # a reported value with such a name is only in the summary


def report_worker_op(store, queue, request, at):
    """Decide a worker's new status. "active" resets its retries; "ended" only notes that its loop has ended."""
    worker, status = _worker(queue, request["worker_id"]), request["status"]
    if status == "ended":
        return [["worker", worker.worker_id, {"ended_at": at, "last_modified": at}, None]], None
    move(WORKER_MOVES, worker.status, WORKER_EVENTS[status], "worker " + worker.worker_id)
    fields = {"status": status, "last_modified": at}
    if status == "active":
        fields.update(retries=0, ended_at=None)
    return [["worker", worker.worker_id, fields, worker.status]], None


def delete_worker_op(store, queue, request, at):
    """Decide to delete a worker. With cascade_update its running tasks no longer name it."""
    worker_id = _worker(queue, request["worker_id"]).worker_id
    changes = [["worker-", worker_id]]
    if request["cascade_update"]:
        theirs = sorted((task.created_at, task.task_id) for task in queue.running.values()
                        if task.worker_id == worker_id)
        changes += [["task", task_id, {"worker_id": None, "last_modified": after(at, place)}, None]
                    for place, (_, task_id) in enumerate(theirs)]
    return changes, None


# 7. Store ####################################################################
#
# A store in its folder: who holds it, one transaction after another, compaction and repair. `Store.transact` runs an
# operation, applies its changes and has the journal make them durable. Uses 1 to 6. Tests: test_service.py,
# test_owner.py, test_compaction.py.

TRANSACTION_TASKS = 10000  # at most so many tasks in one transaction: it keeps a line readable and a lock short
_SLEPT_S = 2.0  # a server that wakes later than planned by so much was suspended, and received no heartbeats
STANDING_BYTES = 128 << 20  # memory for the standing requests of all queues
UNUSED_S = 1800.0  # after which an unused standing request is dropped
_FILTERS_BYTES = 32 << 20  # memory for compiled filters
SPARE_BYTES = 16 << 20  # a journal is compacted when it is longer than twice its live data and this
LOOK_BYTES = 4 << 20  # how far a journal grows before its live data is estimated again
FOLD_CHANGES = 100  # changes on a line of a folded journal; few, so that a person can read it
DEFAULT_QUEUE = "default"  # the queue of a store without a server, made at the first write
_RELEASE_TRY_S = 0.2  # how long a process that ends tries to release its store
_SERVER_LOCK_S = 1.0  # a file that stays locked for longer may be a server's
_EMBEDDED_POLL_S = 0.1  # how often a waiting process without a server checks the file for changes
_MAX_RELEASE_S = 60.0  # how often the ends of pauses are computed again, as the wall clock may be set
LOOK_INTERVAL_S = 1.0  # the shortest time between two searches for time-outs


_CALL_FUNCTION = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("labtasker", sys.argv[1])
module = sys.modules["labtasker"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
answer = getattr(module, sys.argv[2])(*sys.argv[3:])
if answer is not None:
    print(json.dumps(answer))
"""


def in_python(function, *words):
    """Return the words of a command that calls a function of this file and prints its answer, unless None, as JSON.

    All processes of this program are started in this way: isolated (-I) and with this very file. They never import a
    module from the working folder or from PYTHONPATH."""
    options = ["-B"] if sys.dont_write_bytecode else []
    if getattr(sys, "pycache_prefix", None):
        options += ["-X", "pycache_prefix=" + sys.pycache_prefix]
    return [sys.executable, "-I"] + options + ["-c", _CALL_FUNCTION, THIS_FILE, function] + list(words)


PIPE = -1  # subprocess.PIPE, without importing subprocess


def start_program(words, **options):
    """Return the Popen of a program in a process group of its own. A stream that is not given is /dev/null."""
    import subprocess
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(words, start_new_session=True, **dict(streams, **options))


def _start_process(function, words, has_pipes):
    """Return the Popen of a process that calls a function of this file; its answer can be read if it `has_pipes`."""
    output = {"stdout": PIPE, "stderr": PIPE} if has_pipes else {}
    return start_program(in_python(function, *words), universal_newlines=True, **output)


def in_other_process(function, *words):
    """Call a function of this file in another process; return its answer as JSON text, or raise its error."""
    process = _start_process(function, words, True)
    answer, problem = process.communicate()
    if process.returncode:
        raise LabtaskerRuntimeError("%s failed: %s" % (function, problem.strip()[-500:]))
    return answer


def refusal(path):
    """Return why this process may not write to the store at `path`, or create it; None if it may."""
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    needed = {existing, os.path.dirname(os.path.realpath(existing)) if os.path.isfile(existing) else existing}
    if all(os.access(name, os.W_OK) for name in needed):
        return None
    is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
    return "%s can't be written: %s" % (path, "its file system is mounted read-only" if is_read_only
                                        else "this user may only read it")


class _Replica:
    """What a process has read of a journal: the state, the latest events, the newest version and epoch."""

    def __init__(self):
        self.state, self.version_seen, self.epoch_seen = State(), None, 0
        self.events = collections.deque(maxlen=MAX_EVENTS)  # the latest Transitions that are on disk

    def clear(self):
        """Forget everything."""
        self.version_seen, self.epoch_seen = None, 0
        self.state.clear()
        self.events.clear()

    def read(self, file):
        """Apply the new lines of a JournalFile."""
        latest, count = collections.deque(), 0  # the lines of the last MAX_EVENTS events
        for line in file.read_new():
            if "changes" in line:
                done = replay_line(self.state, line, file.path, self.version_seen)
                if len(done) == 1 and line["changes"][0][0] == "point":  # no event; and it would keep each older curve
                    continue
                latest.append((line, done))
                count += len(done)
                if count > 3 * MAX_EVENTS:
                    while count - len(latest[0][1]) >= MAX_EVENTS:
                        count -= len(latest.popleft()[1])
            else:
                self.epoch_seen = max(self.epoch_seen, line.get("epoch", 0))
                self.version_seen = newest(line.get("version"), self.version_seen)
        for line, done in latest:
            self.events.extend(transitions_of(line.get("n"), line.get("at"), line["queue"], line["changes"], done))


class StoreFile:
    """A store in its folder: the lock, the owner, the journal, and the state that results from the journal.

    `lock` guards all attributes. A server holds the file's lock as long as it lives. Without a server the lock is taken
    for one operation, which first reads what others have added."""

    LOCK_TIMEOUT_S = 30.0  # without a server others hold the lock only briefly

    def __init__(self, path, is_server=False, fsync="always"):
        self.path, self.is_server = os.path.abspath(path), is_server
        self.folder = os.path.dirname(self.path)
        self.lock = threading.RLock()
        self.real_path = real_path(self.path)  # two links to one journal share its lock and its owner
        self.file_lock = FileLock(self.real_path + ".lock")
        self.journal = Journal(self.path, self.lock, fsync, shared=None if is_server else self.file_lock)
        self.file = self.journal.file
        self.owner = Owner(self.real_path, is_server)
        self.owner.unlock = self.file_lock.release
        self.replica, self.look_again_bytes = _Replica(), SPARE_BYTES
        self.expected = None  # the id that the store must have; see check_expected

    def open(self, takeover=False):
        """Take the store for a server, or raise StoreUnavailable if another process has it."""
        self.owner.lock = lambda: self.lock_file(2.0)
        self.owner.lock()
        folder, name = os.path.split(self.real_path)
        drafts = tuple(name + end for end in (".new-", ".fold", ".owner.new-", ".repaired-"))
        try:
            self.owner.claim(takeover)
            for other in os.listdir(folder):
                if other.startswith(drafts):  # left by a process that died
                    os.unlink(os.path.join(folder, other))
            self.file.open()
            self.replica.version_seen = self.file.header.get("version")
            self.catch_up()
            self._name_file()
        except OSError as error:
            raise store_error(self.path, error)
        self._begin_epoch()
        self.journal.flush()
        BeatFiles(os.path.dirname(self.real_path)).clear()

    def _begin_epoch(self):
        """Write into the journal that it has a new owner. A former owner that reads this stops."""
        self.journal.writer.is_owned = self.owner.holds
        self.replica.epoch_seen = self.owner.epoch
        self._add_line(epoch=self.owner.epoch, owner=os.uname().nodename)

    def _add_line(self, **line):
        """Write a line without changes. It names this version if that is newer than all before."""
        if is_newer(__version__, self.replica.version_seen):
            self.replica.version_seen = line["version"] = __version__
        self.journal.add(dump_json(dict({"at": now()}, **line)).encode(), None)

    def close(self):
        """Put everything on disk and release the store."""
        if self.is_server:
            self.journal.flush()
            self.journal.close(clean=True)
            self.owner.release()
        self.release()
        self.journal.close()
        self.file_lock.close()

    def release(self):
        """Release the store for other hosts if no other process of this host uses it without a server."""
        if self.owner.used[1] != os.getpid() or not self.lock.acquire(timeout=_RELEASE_TRY_S):
            return
        try:
            if self.file_lock.acquire(_RELEASE_TRY_S):  # else another process of this host uses it
                try:
                    self.owner.release()
                finally:
                    self.file_lock.release()
        except (OSError, StoreUnavailable):  # the folder is gone
            pass
        finally:
            self.lock.release()

    def catch_up(self):
        """Apply the lines that others have added.

        Records form no cycles, so the cyclic garbage collector is off meanwhile and ignores what was loaded."""
        was_on, before = gc.isenabled(), self.file.size
        gc.disable()
        try:
            self.replica.read(self.file)
        except StoreDamaged:  # the next operation reads the file from its beginning and fails in the same way
            self._forget_all()
            raise
        finally:
            if self.file.size - before > READ_BYTES and hasattr(gc, "freeze"):  # not in Python 3.6
                gc.freeze()
            if was_on:
                gc.enable()

    def with_file_lock(self, action, writes=True):
        """Take the file's lock, read what others have written, and return action(). For stores without a server.

        Reading does not need to own the store, and needs no lock if this process may not write."""
        with self.lock:
            if not writes and self.file_lock.fd is None and refusal(self.path):
                return self._unlocked(action)
            self.owner.lock = lambda: self.lock_file(self.LOCK_TIMEOUT_S)
            self.owner.lock()
            try:
                checked_at = monotonic()
                begun = writes and not self.owner.holds() and self.owner.claim()
                self.file.heals = writes
                self._read_new(writes and self.file.fd is None and not self.file.exists())
                if writes:
                    self.journal.writer.is_owned, self.journal.writer.checked_at = self.owner.holds, checked_at
                    self._name_file()
                if begun:
                    self._begin_epoch()
                elif writes and self.replica.epoch_seen > self.owner.epoch:
                    if not self.owner.renew(self.replica.epoch_seen):
                        raise StoreUnavailable("%s was taken over by another host" % self.path)
                    self._begin_epoch()
                elif writes and is_newer(__version__, self.replica.version_seen):
                    self._add_line()
                answer = action()
                if writes:
                    self.owner.move()
                return answer
            except OSError as error:
                raise store_error(self.path, error)
            finally:
                try:
                    self.journal.flush()
                    self.file_lock.note(self.file.durable, self.file.named)
                finally:
                    self.file_lock.release()

    def _unlocked(self, action):
        """Read the file without its lock and return action(); a line that is just being written is read next time."""
        try:
            self.file.heals = False
            self._read_new()
            return action()
        except OSError as error:
            raise LabtaskerRuntimeError("%s can't be read (%s)" % (self.path, error.strerror))

    def check_expected(self):
        """Raise StoreUnavailable if the store from which this process has a run is missing or replaced by another.

        Then it counts as away, as a server would: its tasks still exist."""
        try:
            inode, store_id = os.stat(self.path).st_ino, self.file.header.get("store")
            if self.file.fd is None or inode != self.file.inode:
                source = JournalFile(self.path, mode=os.O_RDONLY)
                source.open()
                store_id = source.header.get("store")
        except (OSError, StoreDamaged):
            raise StoreUnavailable(AWAY % self.path) from None
        if store_id != self.expected:
            raise StoreUnavailable("%s is another store than the one that this process has a run of: its file system "
                                   "may be away" % self.path)

    def lock_file(self, timeout_s):
        """Take the file's lock, or raise a StoreUnavailable that says who has it or what is wrong with the folder.

        A server of this host holds the lock as long as it lives, so there is no point in waiting for it."""
        try:
            if self.file_lock.fd is None and not self.expected:
                self.file.exists()
                Disk.make_folder(self.folder)
            if self.file_lock.acquire(min(timeout_s, _SERVER_LOCK_S)):
                return None if self.file_lock.is_in_place() else self._lock_again(timeout_s)
            server = read_server_file(self.folder) or {}
            is_served = server.get("host_id") == host_id() and process_start(server.get("pid", 0)) is not None
            if not (is_served and not self.is_server) and self.file_lock.acquire(timeout_s - _SERVER_LOCK_S):
                return
        except OSError as error:
            raise store_error(self.path, error)
        who = ": a server on %s, process %s, at %s (labtasker server status tells more)" % (
            server.get("host"), server.get("pid"), " ".join(server.get("addresses", ())))
        may_live = server and (is_served or server.get("host_id") != host_id())  # else server.json is a dead server's
        raise StoreUnavailable("%s is in use by another process%s" % (self.path, who if may_live else ""))

    def _lock_again(self, timeout_s):
        """Open and lock the lock's file again: the one that is open was removed, or its folder was replaced."""
        self.file_lock.close()
        self.lock_file(timeout_s)

    def problem(self):
        """Return why a server can't write to its store, or None. If the writer is `fenced`, it never can again.

        While the file is written to or replaced nothing is checked: the writer itself checks it then."""
        journal = self.journal
        if journal.writer.fenced or not self.is_server or not journal.writer.io.acquire(False):
            return journal.writer.fenced
        try:
            journal.writer.check()
        except StoreUnavailable as error:
            return str(error)
        except OSError as error:
            return str(store_error(self.path, error))
        finally:
            journal.writer.io.release()
        return journal.writer.fenced

    def _name_file(self):
        """Put the file's name on disk: the process that created the file may have died before that."""
        if self.file.named != self.file.inode:
            self.file.disk.sync_folder(real_path(self.path))
            self.file.named = self.file.inode

    def _read_new(self, is_new=False):
        """Read what others have added to the file, or the file that has replaced it. The file's lock is held."""
        if self.file.reads_only and self.file.heals:  # it is open for reading only, and will be written now
            self._forget_all()
        length = None if self.file.fd is None else self.file.length()
        if length is None:
            self._change_file() if self.file.fd is not None else self.file.open()
            self.replica.version_seen = newest(self.file.header.get("version"), self.replica.version_seen)
        if length != self.file.size:
            self.catch_up()
        durable, self.file.named = self.file_lock.noted()
        if self.file.named == self.file.inode:
            self.file.durable = max(self.file.durable, min(self.file.n, durable))
        for notice in self.file.notices:
            tell("labtasker: " + notice)
        if is_new:
            tell("labtasker: created the store " + self.folder)
        self.file.notices = []

    def _change_file(self):
        """Continue with the file that has replaced the one read here.

        If it holds all that was read, as after a compaction, the state is kept. Else the file is read from its
        beginning."""
        file, lines, last = self.file, self.file.n, self.file.header
        if not file.exists():
            raise StoreUnavailable("%s was removed or emptied while this process had it open: put it back, or start "
                                   "the process again for a new store" % self.path)
        self.look_again_bytes, has_all = SPARE_BYTES, False
        try:
            has_all = file.follow()
        finally:
            if not has_all:
                is_later = file.header.get("store") == last.get("store") and file.header.get("folded", 0) > lines
                self._forget_all()
        if has_all:
            return
        if not is_later:  # a later one is no surprise: others have written to the store and compacted it
            file.notices.append("%s is not the file that this process had read: it was replaced, or its content "
                                "changed; it is read from its beginning" % self.path)
        file.open()

    def _forget_all(self):
        """Forget what was read."""
        self.replica.clear()
        self.file.forget()

    def is_bloated(self):
        """Return whether most of the file is stale. This is estimated each time the file has grown by LOOK_BYTES."""
        with self.lock:
            if self.file.size < self.look_again_bytes:
                return False
            self.look_again_bytes = self.file.size + LOOK_BYTES
            live = sum(_live_bytes(queue) for queue in self.replica.state.queues.values())
            return self.file.size > 2 * live + SPARE_BYTES

    def compact(self):
        """Compact the file. A server has another process fold the lines."""
        draft = "%s.fold-%d" % (self.real_path, os.getpid())  # a name of its own, as other processes may compact too
        try:
            if self.is_server:
                _, offset = json.loads(in_other_process("fold", self.path, draft))
                self.journal.writer.adopt(draft, offset)
            else:
                _, offset = fold(self.path, draft)
                self.with_file_lock(lambda: self.journal.writer.adopt(draft, offset))
        except (OSError, StoreUnavailable) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise LabtaskerRuntimeError("%s could not be compacted (%s); it is unchanged" % (self.path, why))
        finally:
            if os.path.exists(draft):
                os.unlink(draft)
        self.look_again_bytes = self.file.size + LOOK_BYTES

    def start_compaction(self):
        """Start a process that compacts the store; don't wait for it."""
        _start_process("compact", [self.path], False)


class Store:
    """The operations on a store, for the threads of this process."""

    def __init__(self, path, is_server=False, fsync="always"):
        file = self.file = StoreFile(path, is_server, fsync)
        self.path, self.folder, self.lock, self.is_server = file.path, file.folder, file.lock, is_server
        self.journal, self.owner, self.state = file.journal, file.owner, file.replica.state
        self.server_id = None  # the id of the server that holds the store
        self.changed, self.closing = threading.Condition(self.lock), False
        self.beats = Beats({} if is_server else BeatFiles(os.path.dirname(file.real_path), self.owner.stood_still))
        # Instants on the monotonic clock:
        self.looked_at = -math.inf  # when time-outs were last looked for
        self.timeouts_at, self.next_timeout_at = {}, -math.inf  # {queue id: its earliest time-out}; the earliest of all
        self.next_release_at = -math.inf  # the earliest end of a task's pause
        self.awake_until = math.inf  # the latest instant at which a server planned to wake; set before it waits
        self.filters = BoundedCache(_FILTERS_BYTES)  # (document as text, names of fields): predicate
        self.logins = {}  # (name or id of a queue, its password): the CallerQueueId of the queue
        self.watched_keys, self.changed_keys = set(), set()  # keys that parked requests wait for; those that changed
        self.on_wake, self.warn = lambda: None, tell
        self.collecting = threading.Lock()  # held while all tasks are searched for a new standing request

    def open(self, takeover=False):
        """Open the file and become its owner; raises as `StoreFile.open` does."""
        self.file.open(takeover)

    def close(self):
        """Close the file and release the store."""
        self.file.close()

    def compact(self):
        """Compact the file; raises as `StoreFile.compact` does."""
        return self.file.compact()

    def begin(self, operation, queue_id, request, writes=True):
        """Run an operation; return (batch, answer). The answer, or what it returns if it is a function, may be sent
        once the batch is on disk, or at once if the batch is None."""
        def decide():
            return self._decide(operation, queue_id, request, writes)
        if self.file.expected:
            self.file.check_expected()
        if self.is_server or not (writes or self.journal.file.fd is not None or self.journal.file.exists()):
            with self.lock:
                return decide()
        return self.file.with_file_lock(decide, writes)

    def transact(self, operation, queue_id, request, writes=True):
        """Run an operation; return its answer once all that it changed or saw is on disk; or raise."""
        return self.finish(*self.begin(operation, queue_id, request, writes))

    def finish(self, batch, answer):
        """Return the answer that `begin` returned, once its batch is on disk; or raise."""
        if callable(answer):
            answer = answer()
        if batch:
            self.journal.wait(batch)
        if not self.is_server and not self.journal.file.reads_only and self.file.is_bloated():
            self.file.start_compaction()
        return answer

    def _queue(self, queue_id, writes):
        """Return the queue of an id or a LocalName, or raise Unauthorized; a first write creates the default queue."""
        known_id = self.state.id_of(queue_id)
        if known_id is not None:
            queue = self.state.queues[known_id] if self.is_open_to(queue_id, known_id) else None
        elif queue_id != DEFAULT_QUEUE:
            raise Unauthorized("no queue %r in %s: create it with 'labtasker queue create-from-config'"
                               % (str(queue_id), self.path))
        elif not writes:
            queue = QueueState(QueueRecord(queue_name=str(queue_id)))
        else:
            at = now()
            changes, answer = create_queue_op(self, None, {"queue_name": str(queue_id)}, at)
            self._commit(answer["queue_id"], changes, at)
            queue = self.state.queues[answer["queue_id"]]
        if queue is None:
            raise Unauthorized("Invalid credentials")
        return queue

    def _decide(self, operation, queue_id, request, writes):
        queue = None if queue_id is None else self._queue(queue_id, writes)
        at = now()
        changes, answer = decide(operation, self, queue, request, at)
        if changes:
            return self._commit(queue.record.queue_id if queue else changes[0][1]["queue_id"], changes, at), answer
        journal = self.journal
        return (journal.batch if journal.batch.lines else journal.writing), answer

    def _commit(self, queue_id, changes, at):
        """Apply changes to the state; return the batch that makes them durable."""
        body = dump_json({"at": at, "queue": queue_id, "changes": changes}).encode()
        done = self.state.apply(queue_id, changes)

        def on_written(n):
            self.file.replica.events.extend(transitions_of(n, at, queue_id, changes, done))
            self.changed.notify_all()
            if self.watched_keys:
                self._wake(queue_id, done)
        try:
            batch = self.journal.add(body, lambda: self.state.put_back(done), on_written)
        except LabtaskerError:
            self.state.put_back(done)
            raise
        for put, _, old, new in done:
            if put.__func__ is QueueState.put_task:
                self._note_run(old, new)
            elif put.__func__ is State.put_queue and new is None and old is not None:
                self._forget_runs(queue_id, old)
        return batch

    def _forget_runs(self, queue_id, queue):
        """Forget the runs of a queue that is deleted."""
        self.timeouts_at.pop(queue_id, None)
        for task in queue.running.values():
            self.beats.runs.pop(task.run_id, None)

    def _wake(self, queue_id, done):
        """Wake the requests that wait for a task in `done`, for its queue, or for a pending task of the queue. If the
        queue's own record has changed, wake all of its requests: its password may be another one now."""
        keys = {(queue_id, key) for _, key, _, _ in done} | {(queue_id, "change")}
        if has_pending(self.state.queues.get(queue_id), done):
            keys.add((queue_id, "pending"))
        if (queue_id, queue_id) in keys:
            keys |= {key for key in self.watched_keys if key and key[0] in (queue_id, None)}
        self.wake(*keys)

    def wake(self, *keys):
        """Have a server run the requests again that wait for one of these keys."""
        self.changed_keys |= self.watched_keys.intersection(keys)
        if self.changed_keys:
            self.on_wake()

    def _note_run(self, old, new):
        """Start and end a run's beats with the run, and note when it can time out at the earliest."""
        before = old.run_id if old is not None and old.status == "running" else None
        after = new.run_id if new is not None and new.status == "running" else None
        if new is not None and new.not_before is not None:
            self.next_release_at = min(self.next_release_at, monotonic() + max(0.0, new.not_before - now()))
        if after != before:
            if before:
                self.beats.runs.pop(before, None)
            if after:
                self.beats.start(after)
                limits_s = [limit_s for limit_s in (new.heartbeat_timeout, new.task_timeout) if limit_s is not None]
                self._look_by(new.queue_id, max(LOOK_INTERVAL_S, min(limits_s, default=math.inf)))
        elif after and (old.heartbeat_timeout, old.task_timeout) != (new.heartbeat_timeout, new.task_timeout):
            self._look_by(new.queue_id, LOOK_INTERVAL_S)

    def _look_by(self, queue_id, in_s):
        """Look for the time-outs of a queue within `in_s` seconds."""
        at = monotonic() + in_s
        self.timeouts_at[queue_id] = min(at, self.timeouts_at.get(queue_id, -math.inf))
        self.next_timeout_at = min(at, self.next_timeout_at)

    def wait_for(self, is_there, timeout_s):
        """Return once is_there() is true, the store closes, or `timeout_s` is over; without a server also once others
        have written to the file, which is not read here."""
        give_up_at = monotonic() + timeout_s
        with self.lock:
            while self.is_server and not (is_there() or self.closing or monotonic() >= give_up_at):
                self.changed.wait(give_up_at - monotonic())
        while not (self.is_server or is_there() or self.journal.file.is_stale() or monotonic() >= give_up_at):
            time.sleep(max(0, min(_EMBEDDED_POLL_S, give_up_at - monotonic())))

    def notice_sleep(self):
        """Give every run its full time again if this process woke much later than planned: then it was suspended and
        could not receive heartbeats."""
        late_s = monotonic() - self.awake_until
        if late_s > _SLEPT_S:
            with self.lock:
                self.beats.extend(late_s)
                self.awake_until = monotonic()

    def look_for_timeouts(self, queue_id=None):
        """Fail the runs of a queue, or of all queues, that have timed out; at most every LOOK_INTERVAL_S."""
        if isinstance(queue_id, LocalName):
            queue_id = self.state.id_of(queue_id) or queue_id
        elif queue_id is not None:
            queue_id = str(queue_id)
        with self.lock:
            self.notice_sleep()
            self.looked_at, seen = monotonic(), self.journal.file.n
            if queue_id is None:
                due = [queue_id for queue_id, queue in self.state.queues.items() if queue.running]
            else:
                due = [queue_id]
            due = [queue_id for queue_id in due if self.timeouts_at.get(queue_id, -math.inf) <= self.looked_at]
            self.timeouts_at.update((queue_id, self.looked_at + LOOK_INTERVAL_S) for queue_id in due)
        for queue_id in due:
            try:
                next_in_s = self.transact(expire_runs_op, queue_id, None)
            except Unauthorized:  # the queue was deleted in between
                continue
            with self.lock:
                if self.is_server and self.journal.file.n == seen:  # else a run that has just begun may end earlier
                    self.timeouts_at[queue_id] = monotonic() + max(LOOK_INTERVAL_S, next_in_s)
        if queue_id is None:
            with self.lock:
                queues = self.state.queues
                self.timeouts_at = {queue_id: at for queue_id, at in self.timeouts_at.items() if queue_id in queues}
                self.next_timeout_at = min((self.timeouts_at.get(queue_id, -math.inf)
                                            for queue_id, queue in queues.items() if queue.running), default=math.inf)

    def due_at(self):
        """Return when the next run may time out or the next task's pause ends."""
        return min(self.next_timeout_at, self.next_release_at)

    def release_delayed(self):
        """Make the tasks available whose pause is over, and wake the fetches that wait for them."""
        with self.lock:
            at, ends = now(), []
            for queue_id, queue in self.state.queues.items():
                if queue.pending.delayed:
                    if queue.pending.delayed[0][0] <= at:
                        queue.pending.release(at)
                        self.wake((queue_id, "pending"))
                    ends.append(queue.pending.next_release())
            in_s = min((end - at for end in ends if end is not None), default=math.inf)
            self.next_release_at = monotonic() + min(in_s, _MAX_RELEASE_S)

    def is_quick(self, queue_id, request):
        """Return whether a fetch is answered without examining many tasks."""
        queue = self.state.queues.get(self.state.id_of(queue_id))
        return not queue or queue.pending.is_quick(required_of(request), request.get("filter_text"))

    def stand(self, queue_id, request):
        """Make a fetch quick: keep its matches up to date from now on. Tasks are searched without the lock."""
        with self.collecting:
            if self.is_quick(queue_id, request):
                return
            with self.lock:
                pending = self._queue(queue_id, False).pending
                begun = pending.begin_standing(
                    required_of(request), request.get("filter_text"), request.get("predicate"))
            matching = pending.matches(begun[0], begun[2])
            with self.lock:
                pending.catch_up(*begun, matching=matching)
                self._bound_standing(pending)

    def _bound_standing(self, latest):
        """If the standing requests of all queues take too much memory, drop those that are unused for longest."""
        held = [(standing.used_at, standing.weight_bytes(), queue.pending, key) for queue in self.state.queues.values()
                for key, standing in queue.pending.standing.items()]
        total_bytes = sum(weight_bytes for _, weight_bytes, _, _ in held)
        if total_bytes > STANDING_BYTES:
            for _, weight_bytes, pending, key in sorted(held, key=operator.itemgetter(0))[:-1]:
                if total_bytes > STANDING_BYTES // 2:
                    pending.standing.pop(key, None)
                    total_bytes -= weight_bytes

    def forget_unused(self):
        """Drop the standing requests that were not used for UNUSED_S."""
        with self.lock:
            for queue in self.state.queues.values():
                if queue.pending.standing:
                    queue.pending.forget(lambda standing: monotonic() - standing.used_at > UNUSED_S)

    def predicate(self, document, fields):
        """Return (predicate, text) of a query document."""
        text = json.dumps(document, sort_keys=True)
        known = self.filters.get((text, tuple(fields)))
        if known is None:
            known = compile_query(document, fields, "task_id" if "task_id" in fields else "worker_id")
            self.filters.keep((text, tuple(fields)), known, PREDICATE_BYTES * len(text))
        return known, text

    def login(self, name, password):
        """Return the CallerQueueId of the queue, or raise Unauthorized.

        A correct login is remembered, so that its password is hashed only once. It is valid while the queue has that
        password. A queue's name may be the id of another queue: then the password tells which of the two is meant."""
        known = self.known_login(name, password)
        if known:
            return known
        queues = [self.state.queues.get(key) for key in (self.state.names.get(name), name)]
        for queue in [queue for queue in queues if queue] or [None]:
            stored = queue.record.password if queue else None
            if is_password(password, stored):
                if len(self.logins) > MAX_STANDING:
                    self.logins.clear()
                self.logins[name, password] = known = CallerQueueId(queue.record.queue_id, stored)
                return known
        raise Unauthorized("Invalid credentials")

    def known_login(self, name, password):
        """Return the CallerQueueId of a remembered login that is still valid, or None."""
        known = self.logins.get((name, password))
        if known is not None and self.is_open_to(known, known):
            if name == known or name == self.state.queues[known].record.queue_name:
                return known
        return None

    def is_open_to(self, caller, queue_id):
        """Return whether the queue exists and its caller may use it: its name must still be the LocalName, or its
        password hash the one that the CallerQueueId has matched."""
        queue = self.state.queues.get(queue_id)
        if queue is None or isinstance(caller, LocalName):
            return queue is not None and queue.record.queue_name == caller
        return not isinstance(caller, CallerQueueId) or queue.record.password == caller.stored


# Compaction


def _kept(record):
    """Return the fields of a record that differ from their defaults, without its own id and its queue's."""
    rows = list(zip(record._fields, record, record._defaults))[1:]
    kept = {name: value for name, value, default in rows if value != default and name != "queue_id"}
    kept.update(kept.pop("unknown", None) or {})
    if "curve" in kept:
        kept["curve"] = record.curve.in_json()
    return kept


def _curve_bytes(curve):
    """Return about how many bytes a history takes in a folded journal."""
    return len(curve.points) * (len(dump_json(curve.content(1))) + 2 * ID_BYTES) if curve else 0


def _live_bytes(queue):
    """Return about how many bytes a queue takes in a folded journal, estimated from a sample of its tasks."""
    sample = list(itertools.islice(queue.tasks.values(), 200))
    mean = sum(len(dump_json(_kept(task._replace(curve=None)))) + 60 + _curve_bytes(task.curve) for task in sample
               ) / max(1, len(sample))
    return int(mean * len(queue.tasks)) + 400 * len(queue.workers)


def _fold_lines(state):
    """Yield the lines, as bytes, whose replay gives this state."""
    count = 0
    for queue_id, queue in state.queues.items():
        changes = [["queue", dict(_kept(queue.record), queue_id=queue_id)]]
        changes += [["worker", key, _kept(worker), None] for key, worker in queue.workers.items()]
        tasks = iter(queue.tasks.items())
        while changes:
            count += 1
            yield sealed({"fold": count, "queue": queue_id, "changes": changes})
            changes, weight = [], 0
            for key, task in tasks:
                changes.append(["task", key, _kept(task), None])
                weight += 1 + (len(task.curve.points) // 10 if task.curve else 0)
                if weight >= FOLD_CHANGES:
                    break


def fold(path, draft):
    """Write the file `draft`, which can replace lines 1 to n of the journal; return (n, the offset of line n + 1).

    The journal is read without the lock. Lines that may not be on disk yet are not folded."""
    source, state, waiting = JournalFile(path, mode=os.O_RDONLY), State(), collections.deque()
    source.open()
    n, offset, mark = source.n, source.size, source.mark
    last_crc, newest = source.header.get("folded_crc"), source.header.get("version")
    for line, version in lines_with_versions(source):
        waiting.append((line, source.n, source.size, source.mark, version))
        while waiting and ("fold" in line or waiting[0][1] <= line["durable"]):
            value, n, offset, mark, newest = waiting.popleft()
            last_crc = last_crc if "fold" in value else mark_text(mark)
            if not LINE_KEYS.issuperset(value):
                raise newer(path, newest, "a compaction would lose %s" % ", ".join(sorted(set(value) - LINE_KEYS)))
            if "changes" in value:
                replay_line(state, value, path, newest)
    body = sum(map(len, _fold_lines(state)))
    added = dict(folded=n, folded_crc=last_crc, read_crc=mark_text(mark), folded_at=time.time())
    header = journal_header(dict(source.header, **dict(added, **({"version": newest} if newest else {}))), body)
    Disk.create(draft, itertools.chain([header], _fold_lines(state)))
    return n, offset


def compact(path):
    """Compact a store that no server holds; return (bytes before, bytes after)."""
    JournalFile(path).exists()  # raises for a path that is no file, before other files are made beside it
    before = os.stat(path).st_size
    guard = FileLock(real_path(path) + ".compact")
    if not guard.acquire(0):
        raise StoreUnavailable("%s is being compacted already" % path)
    try:
        StoreFile(path).compact()
        return before, os.stat(path).st_size
    finally:
        guard.close()


def repair_store(path):
    """Replace a damaged journal by a file of its good lines. Return (Survey of the journal as it was, path of the
    damaged file, path of the bad bytes, ids found in these). Both paths are None if nothing is damaged.

    The damaged file is kept under another name. If lines 8 and 9 are lost, a line {"n":9,"lost":2,...} stands for
    them."""
    file = StoreFile(path)
    file.lock_file(2.0)
    try:
        file.owner.claim()
        surveyed = file_identity(path)
        survey = Survey(path)
        check_format(path, survey.header)

        def check_unchanged():
            if file_identity(path) != surveyed or not file.owner.holds():
                raise StoreUnavailable("%s was changed by others while it was repaired; it is as they left it" % path)
        damaged, aside = repair_file(survey, check_unchanged) if survey.bad or survey.lost else (None, None)
    except OSError as error:
        raise store_error(path, error)
    finally:
        file.file_lock.close()
    text = b"".join(piece.data for piece in survey.bad).decode("latin-1")
    ids = re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)
    return survey, damaged, aside, list(collections.OrderedDict.fromkeys(ids))


# 8. API ######################################################################
#
# Every request is a row of ROUTES, whether it came over HTTP or from this process. This section checks
# the request's fields, runs the operation, and converts the answer. Knows nothing of how the request
# arrived. Uses 1 to 7. Tests: test_api.py.

MAX_BODY_BYTES = 16 << 20  # of a request: ten times as much as a thousand large tasks
MAX_CONTAINERS = 300000  # lists and objects in a body; each takes a hundred bytes or more in memory
_MAX_WAIT_S = 60  # a long poll
_MAX_REQUIRED, _REQUIRED_BYTES = 1000, 20000  # required fields of a fetch, and their total length
_FETCH_FILTER_BYTES = 256 << 10  # of a fetch's filter, which is kept for the next fetch
_MOST_WAITED_FOR = 10000  # others that a task may wait for
_MAX_SORTS = 16  # fields that a listing is sorted by; each of them sorts the whole list
_ATTEMPT_BYTES = 2000  # of what a worker reports about a run
TAIL_BYTES, MOST_TAILS = 1 << 16, 5  # kept of a run's output; runs of a task for which it is kept
LOG_LETTERS = 1 << 17  # of a packed log, more than TAIL_BYTES can need
PING_S = 15.0  # between the pings in a stream of events
QUICK_BYTES = 65536  # a longer body is read by a thread, and only after the password was checked
_LIGHT_BODY_BYTES = 2048  # a longer body may have a filter that takes long to parse
HEADER_FIELDS = {"last-event-id": "last_event_id"}  # header: the URL's field that it sets, for browsers' event sources
_WAIT_SLICE_S = 1.0  # between two looks for time-outs by a waiting request without a server


def parse_json(text):
    """Return the value of JSON text (bytes or str), or raise TooLarge or InvalidFields."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        containers = text.count("{") + text.count("[")  # brackets within texts count too
        if containers > MAX_CONTAINERS:
            raise TooLarge("a body of over %d lists and objects: send it in parts" % MAX_CONTAINERS)
        if containers > MAX_DEPTH:
            value = _decode_json(text)
            if text.count(":") == _count_keys(value):  # a colon follows each key: with a key twice they are more
                return value
        return _decode_checked(text)
    except RecursionError:
        raise InvalidFields([(["body"], "nested too deep")]) from None
    except InvalidFields:
        raise
    except ValueError as error:
        raise InvalidFields([(["body"], "is not JSON: %s" % error)]) from None


def _count_keys(value):
    """Return the number of keys in all dicts of a value; raise InvalidFields if it is nested too deep."""
    level, depth, keys = [value], 0, 0
    while level:
        dicts, lists = ([each for each in level if type(each) is kind] for kind in (dict, list))
        keys += sum(map(len, dicts))
        level = list(itertools.chain.from_iterable(itertools.chain(map(dict.values, dicts), lists)))
        depth += 1
        if depth > MAX_DEPTH and any(type(each) in (dict, list) for each in level):  # later functions recurse
            raise InvalidFields([(["body"], "nested more than %d deep" % MAX_DEPTH)])
    return keys


def no_duplicates(pairs):
    """Return the dict of these pairs; raises InvalidFields for a key that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0][:100]
        raise InvalidFields([(["body", twice], "the key %r stands twice in one object" % twice)])
    return found


def _bounded_int(text):
    value = int(text) if len(text) <= 20 else None
    if value is None or not -2 ** 63 <= value < 2 ** 64:
        raise InvalidFields([(["body"], "the integer %.30s is outside -2^63 to 2^64-1" % text)])
    return value


_decode_json = json.JSONDecoder(parse_int=_bounded_int).decode
_decode_checked = json.JSONDecoder(object_pairs_hook=no_duplicates, parse_int=_bounded_int).decode


# Kinds of fields: each takes a value and returns it, or raises ValueError with what it should be.


def _kind(words, fits, is_shown=True):
    def check(value):
        if not fits(value):
            raise ValueError("should be " + words + (", not %.120r" % (value,) if is_shown else ""))
        return value
    return check


def _type(words, *types):
    def check(value):
        if type(value) not in types:
            raise ValueError("should be %s, not %.120r" % (words, value))
        return value
    return check


def _text(words, pattern):
    return _kind(words, lambda value: isinstance(value, str) and pattern.match(value))


def _one_of(choices):
    def check(value):
        if value not in choices:
            raise ValueError("should be one of %s, not %.120r%s" % (
                ", ".join(choices), value, hint(value, choices) if isinstance(value, str) else ""))
        return value
    return check


def _int_between(low, high):
    words = "a whole number from %d to %d" % (low, high)
    whole = _kind(words, lambda value: type(value) is int and low <= value <= high)
    return lambda value: whole(int(value) if type(value) is float and value.is_integer() else value)


def _whole(value, check=_int_between(0, 2 ** 63)):
    return min(check(value), 1 << 53)  # so that the sum of two can still index a list


def _is_texts(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _ids(value):
    """Return a list of ids, each once."""
    if not isinstance(value, list) or not all(isinstance(item, str) and NAME.match(item) for item in value):
        raise ValueError("should be a list of ids, not %.120r" % (value,))
    if len(value) > _MOST_WAITED_FOR:
        raise ValueError("should be at most %d ids, not %d" % (_MOST_WAITED_FOR, len(value)))
    return list(dict.fromkeys(value))


def _is_sort(value):
    return isinstance(value, list) and len(value) <= _MAX_SORTS and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) and pair[1] in (1, -1)
        for pair in value)


def _is_attempt(value):
    return isinstance(value, dict) and all(
        NAME.match(key) and isinstance(item, (str, int, float, type(None))) for key, item in value.items()
    ) and len(json.dumps(value)) <= _ATTEMPT_BYTES


_seconds = _kind("a number of seconds over 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
_true_or_false = _type("true or false", bool)


def _bool(value):
    words = {"true": True, "1": True, "false": False, "0": False}
    return _true_or_false(words.get(value.lower(), value) if isinstance(value, str) else value)


def _wait(value):
    try:
        return min(max(float(value), 0.0), _MAX_WAIT_S)
    except (TypeError, ValueError):
        raise ValueError("should be a number of seconds") from None


EVENT_ID = Pattern(r"[0-9]{1,15}\.[0-9]{1,6}\Z")
KINDS = {
    "text": _type("text", str), "dict": _type("an object", dict), "bool": _bool,
    "id": _text("an id: 1 to 100 letters, digits, '_' and '-'", NAME),  # it becomes part of paths and logs
    "name": _text("1 to 100 letters, digits, '_' and '-'", NAME),
    "password": _kind("text of 1 to 100 characters", lambda value: isinstance(value, str) and 1 <= len(value) <= 100,
                      is_shown=False),
    "filter": _type("a query document or filter text", dict, str),
    "seconds": _seconds, "wait": _wait,
    "duration": lambda value: _seconds(parse_duration(value) if isinstance(value, str) else value),
    "int": _int_between(-2 ** 63, 2 ** 63 - 1), "count": _int_between(0, 2 ** 31),
    "whole": _whole,
    "status": _one_of(TASK_STATES), "failure": _one_of(FAILURES), "worker_status": _one_of(WORKER_STATES),
    "extreme": _one_of(("max", "min")),
    "worker_report": _one_of(WORKER_STATES + ("ended",)), "answer": _one_of(("status",)),
    "texts": _kind("a list of text", _is_texts), "ids": _ids,
    "cmd": _kind("text or a list of text", lambda value: isinstance(value, str) or _is_texts(value)),
    "sort": _kind("a list of at most %d [field, 1 or -1]" % _MAX_SORTS, _is_sort),
    "attempt": _kind("an object of names with texts and numbers, of at most %d bytes" % _ATTEMPT_BYTES, _is_attempt),
    "log": _kind("text of at most %d letters" % LOG_LETTERS, lambda value: isinstance(value, str)
                 and len(value) <= LOG_LETTERS, is_shown=False),
    "stop": _type("text", str),  # its content is checked by `parse_rule`
    "step": lambda value: value,  # what is none is told as a warning: no run ends for it
    "commit": _text("a commit's id, with -dirty where files were changed since", Pattern(r"[0-9a-f]{7,64}(-dirty)?\Z")),
    "event_id": _text("an event's id, like 17.0", EVENT_ID),
}

REQUIRED = object()

# A field of a request: its kind, its default (REQUIRED: it has none), and whether it is an extension, which is not sent
# to a server that speaks the plain protocol.
Arg = row_type("Arg", "kind default is_ours", (None, False))


def _ours(kind, default=None):
    return Arg(kind, default, True)


class Fields(dict):
    """The fields of a request by name, with their defaults. What is not given is left out unless it `fills`."""

    def __init__(self, fields, fills=True):
        super().__init__(fields)
        self.checks = {name: KINDS[arg.kind] for name, arg in fields.items()}
        self.defaults = {name: arg.default for name, arg in fields.items()} if fills else {}
        self.required = [name for name, arg in fields.items() if arg.default is REQUIRED]


def checked(spec, given, where):
    """Return the fields of `given` that `spec` knows, checked, with defaults; or raise InvalidFields with all problems.

    null means not given. Fields that `spec` does not know are ignored."""
    if not isinstance(given, dict):
        raise InvalidFields([(where, "should be an object, not %s" % type(given).__name__)])
    found, problems = spec.defaults.copy(), []
    if not (given or spec.required):
        return found
    for name, value in given.items():
        check = spec.checks.get(name)
        if value is None or check is None:
            continue
        try:
            found[name] = check(value)
        except ValueError as error:
            problems.append((where + [name], str(error)))
            found[name] = None
    if given.get("stop", "") is None and "replace_fields" in spec:  # plain clients, whose null means nothing, lack it
        found["replace_fields"] = (found["replace_fields"] or []) + ["stop"]
    for name in spec.required:
        if found[name] is REQUIRED:
            problems.append((where + [name], "is required"))
    if problems:
        raise InvalidFields(sorted(problems, key=lambda problem: list(spec).index(problem[0][-1])))
    return found


# Preparations of a request before its operation decides. They run outside the lock.


def _hash_new_password(store, request):
    password = request.pop("password", None) or request.pop("new_password", None)
    if password is not None:
        request["password_hash"] = hash_password(password)


def _read_filter(fields):
    def prepare(store, request):
        given = request["extra_filter"]
        if isinstance(given, str):
            given = request["extra_filter"] = parse_filter(given, fields, now())
        if given is not None:
            request["predicate"], request["filter_text"] = store.predicate(given, fields)
    return prepare


def _prepare_search(fields):
    read_filter, known = _read_filter(fields), set(fields) | {"_id"}

    def prepare(store, request):
        for field, _ in request["sort"] or ():
            if field.split(".")[0] not in known:
                words = "there is no field %.100r%s The fields are %s" % (
                    field, field_hint(field, fields) or ".", ", ".join(fields))
                raise InvalidFields([(["body", "sort"], words)])
        read_filter(store, request)
    return prepare


_read_task_filter = _read_filter(visible(TASK_FIELDS))


def _prepare_fetch(store, request):
    if not request["start_heartbeat"] and request["eta_max"] is None:
        raise BadRequest("a fetch needs heartbeats (start_heartbeat) or eta_max: else a dead run is never noticed")
    required = request["required_fields"] or ()
    if len(required) > _MAX_REQUIRED or sum(map(len, required)) > _REQUIRED_BYTES:
        raise InvalidFields([(["body", "required_fields"], "should be at most %d fields of %d letters together" % (
            _MAX_REQUIRED, _REQUIRED_BYTES))])
    for key in required:
        if key != "*" and not is_plain_key(key):
            check_key(key, ["required_fields"])
    _read_task_filter(store, request)
    if len(request.get("filter_text", "")) > _FETCH_FILTER_BYTES:
        raise TooLarge("a fetch's filter may have at most %d bytes" % _FETCH_FILTER_BYTES)


def _prepare_count(store, request):
    known = visible(TASK_FIELDS)
    if request["by"].split(".")[0] not in known:
        raise InvalidFields([(["body", "by"], "should be a field of tasks: %s" % ", ".join(known))])
    _read_task_filter(store, request)


def _prepare_table(store, request):
    known, by = visible(TASK_FIELDS), request["by"]
    for name, fields in (("by", by), ("of", [request["of"]])):
        if not fields or any(field.split(".")[0] not in known for field in fields):
            raise InvalidFields([(["body", name], "should be of the fields of tasks: %s" % ", ".join(known))])
    taken = [field for field in by if field in TABLE_COLUMNS or by.count(field) > 1]
    if taken:
        raise InvalidFields([(["body", "by"], "%s is given twice, or is a column of the table" % taken[0])])
    if request["mode"] not in ("max", "min"):
        raise InvalidFields([(["body", "mode"], "should be max or min")])
    if not set(request["statuses"] or ()) <= set(TASK_STATES):
        raise InvalidFields([(["body", "statuses"], "should be of %s" % ", ".join(TASK_STATES))])
    _read_task_filter(store, request)


def _prepare_submission(store, request):
    for task in request["tasks"]:
        if "stop" in task:
            parse_rule(task["stop"])


def _prepare_updates(store, request):
    for at, update in enumerate(request["updates"]):
        parse_rule(update["stop"]) if update["stop"] is not None else None
        update["task_id"] = update["task_id"] or update.pop("_id")
        if not update["task_id"]:
            raise InvalidFields([(["body", at, "task_id"], "is required")])


# How a request runs. Each returns (batch, answer); the answer is sent once the batch is on disk (None: at once).


def _run(store, caller, request, route):
    return store.begin(route.operation, caller, request, route.writes)


def _run_outside(store, caller, request, route):
    """Run an operation that is no transaction on a queue."""
    return None, route.operation(store, caller, request)


# Without a server the loops themselves look for runs that have timed out.


def _run_fetch(store, caller, request, route):
    if not store.is_server:
        store.look_for_timeouts(caller)
    batch, answer = _run(store, caller, request, route)
    if request["left"] and answer["found"]:
        answer["left"] = _left(store.state.queues[store.state.id_of(caller)].pending, request)
    return batch, answer


def _left(pending, request):
    """Return how many pending tasks fit a fetch, those with a pause too. It is asked outside the lock, and of many with
    a filter or a pause the rest is estimated."""
    required, predicate = required_of(request), request.get("predicate")
    asked = pending.standing.get((required, request.get("filter_text")))
    paused = [pending.tasks.get(task_id) for task_id in list(pending.resting)[:MOST_LOOKED_AT]]
    paused = sum(1 for task in paused if task and takes(required, shape_of(task.args)) and (
        predicate is None or predicate(task)))
    if not asked:
        return paused + sum(number for shape, number in list(pending.counts.items()) if takes(required, shape))
    entries = list(asked.heap)
    known = sum(1 for entry in entries[:MOST_LOOKED_AT] if pending.alive(entry))
    return paused + known * max(len(entries), 1) // max(1, min(len(entries), MOST_LOOKED_AT))


def _run_heartbeat(store, caller, request, route):
    """Note that a run is alive, then look for time-outs. They are left for later if the store can't be written."""
    found = _run(store, caller, request, route)
    if not store.is_server:
        try:
            store.look_for_timeouts(caller)
        except StoreUnavailable:
            pass
    return found


def _run_report(store, caller, request, route):
    """Run a report, then keep the end of its run's output, where that came with it; nothing of that fails the report.

    It is kept too where the report is refused: a task that was cancelled takes none from the run that was under way."""
    try:
        found = _run(store, caller, request, route)
    finally:
        if request["log"] and request["run_id"]:
            _keep_tail(store, caller, request)
    return found


def _run_deletion(store, caller, request, route):
    """Run a deletion, of a task or of a queue, then remove the ends of outputs that were kept for the tasks."""
    gone = []

    def decide(store, queue, request, at):
        gone[:] = [queue.tasks.get(request["task_id"])] if "task_id" in request else queue.tasks.values()
        return route.operation(store, queue, request, at)
    found = store.begin(decide, caller, request, route.writes)
    for task in filter(None, gone):
        _drop_tails(store, task, task.attempts, is_gone=True)
    return found


def _run_worker(store, caller, request, route):
    """Return a worker with its id as `_id`, the name that a 1.0.1 server gives it in this one answer."""
    batch, worker = _run(store, caller, request, route)
    fields = in_json(worker, False)
    return batch, dict(fields, _id=fields.pop("worker_id"))


# The output of a run is logs/TASK/RUN/run.log in the folder of its loop's configuration. Where that is the store's, it
# is read there. Else its end comes with the report, packed, and is kept as tail.log at the same place beside the store.


def end_of_text(data, most):
    """Return the last `most` bytes of a text, from the first line that is whole in them, else the first character."""
    if len(data) <= most:
        return data
    data = data[-most - 1:]
    line = data.find(b"\n", 0, most // 4 + 1) + 1  # a line that is longer stays
    if line:
        return data[line:]
    return data[1:4].lstrip(bytes(range(0x80, 0xc0))) + data[4:]


def packed_log(data):
    """Return bytes as the text that travels in a report."""
    import base64
    return base64.b64encode(zlib.compress(data)).decode()


def _unpacked_log(text):
    """Return the bytes of a text that `packed_log` made, TAIL_BYTES at most; raises ValueError for another one."""
    import base64
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text.encode(), validate=True), 2 * TAIL_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    return end_of_text(data, TAIL_BYTES)


def _below(folder, names, is_made=False):
    """Return the descriptor of a folder below another; raises OSError where it is not there, or a name is a link: a
    worker's folder may be another user's to write to."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in names:
        try:
            if is_made:
                try:
                    os.mkdir(name, 0o700, dir_fd=fd)
                except FileExistsError:
                    pass
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def _run_folder(store, task_id, run_id, is_made=False):
    """Return the descriptor of a run's folder beside the store; raises OSError as `_below` does."""
    if not (NAME.match(task_id) and NAME.match(run_id or "")):
        raise FileNotFoundError(errno.ENOENT, "no folder has such a name")
    return _below(store.folder, ("logs", task_id, run_id), is_made)


def _keep_tail(store, caller, request):
    """Keep the end of a run's output that came with its report, once; the server's log says why it can't be kept."""
    try:
        task = store.transact(get_task_op, caller, request, False)
        if request["run_id"] not in [attempt.get("run_id") for attempt in task.attempts[-MOST_TAILS:]]:
            return
        data, folder = _unpacked_log(request["log"]), _run_folder(store, task.task_id, request["run_id"], True)
        try:
            if not {"run.log", "tail.log"}.intersection(os.listdir(folder)):
                _write_below(folder, "tail.log", data)
        finally:
            os.close(folder)
        _drop_tails(store, task, task.attempts[:-MOST_TAILS])
    except (LabtaskerError, OSError, ValueError) as error:
        store.warn("the output of a run of task %s is not kept: %s" % (request["task_id"], error))


def _write_below(folder, name, data):
    """Write a new file in the folder of a descriptor, all of it or none."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        Disk.write_all(fd, data)
    except OSError:
        os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(fd)


def _drop_tails(store, task, attempts, is_gone=False):
    """Remove what `_keep_tail` has kept of these attempts of a task, and the folders that are empty then."""
    if not attempts or not NAME.match(task.task_id):
        return
    try:
        logs = _below(store.folder, ("logs",))
    except OSError:
        return
    for run_id in (attempt.get("run_id") for attempt in attempts):
        try:
            folder = _run_folder(store, task.task_id, run_id)
            try:
                os.unlink("tail.log", dir_fd=folder)
            finally:
                os.close(folder)
            os.rmdir("%s/%s" % (task.task_id, run_id), dir_fd=logs)
        except OSError:  # there was none, or there is more
            pass
    try:
        if is_gone:
            os.rmdir(task.task_id, dir_fd=logs)
    except OSError:
        pass
    os.close(logs)


def _log_of_run(store, caller, request):
    """Return the end of what a run wrote: {run_id, text, size, host, path}; without text where none of it is here."""
    task = store.transact(get_task_op, caller, request, False)
    attempts = collections.OrderedDict((attempt.get("run_id"), attempt) for attempt in task.attempts)
    run_id = request["run_id"] or task.run_id or next(reversed(attempts), None)
    if run_id != task.run_id and run_id not in attempts:
        raise NotFound("task %s has no run %s" % (task.task_id, run_id))
    told = attempts.get(run_id, {})
    data, size = tail_of(store, task.task_id, run_id, told.get("log_bytes"))
    return {"run_id": run_id, "host": told.get("host"), "path": told.get("log"), "size": size,
            "text": None if data is None else data.decode("utf-8", "replace")}


def tail_of(store, task_id, run_id, whole_bytes=None, most=TAIL_BYTES):
    """Return (the end of a run's output, the size of all of it), (None, None) where none of it is a plain file here."""
    import stat
    try:
        folder = _run_folder(store, task_id, run_id)
    except OSError:
        return None, None
    try:
        for name in ("run.log", "tail.log"):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except OSError:
                continue
            try:
                found = os.fstat(fd)
                size = max(found.st_size, whole_bytes if name == "tail.log" and type(whole_bytes) is int else 0)
                if stat.S_ISREG(found.st_mode):
                    data = os.pread(fd, most + 1, max(0, found.st_size - most - 1))
                    return end_of_text(data, most), size
            except OSError:
                continue
            finally:
                os.close(fd)
    finally:
        os.close(folder)
    return None, None


Stream = row_type("Stream", "pieces")  # an answer without an end: server-sent events, as bytes


class Page(row_type("Page", "head body etag")):
    """An answer for a browser: header lines and a body. A browser whose copy has this ETag gets no body."""

    __slots__ = ()


def _no_page(store, caller, request):
    """Return the answer in place of the page until labtasker_cli.py enters its parts with `enter_page`."""
    return Page("Content-Type: text/plain\r\nCache-Control: no-store\r\n", b"The page of this Labtasker server needs "
                b"labtasker_cli.py of the same version beside labtasker.py. Copy it, then restart the server.\n", None)


def enter_page(route, operation):
    """Set the operation of a route of the page: `operation(store, caller, request)` returns its answer."""
    ROUTES[route] = ROUTES[route]._replace(operation=operation)


def _run_events(store, caller, request, route):
    """Return the Stream of a queue's events after the one whose id is given; without an id, of those from now on."""
    batch, _ = _run(store, caller, request, route)  # raises if the queue is gone; a LocalName's may be made later
    after = request["last_event_id"]
    last = last_event(store)
    after = tuple(map(int, after.split("."))) if after else last
    pause_s = min(PING_S, _WAIT_SLICE_S) if isinstance(caller, LocalName) else PING_S
    unknown = None if after <= last else "there is no event %d.%d: the id is from another store, or this store was " \
        "replaced; events follow from now on" % after
    after = min(after, last)
    return batch, Stream(_event_pieces(follow(store, caller, after, pause_s), after, unknown))


def _event_pieces(events, after, unknown=None):
    """Yield each Transition as the bytes of a server-sent event; `unknown` is an initial message about the id."""
    def piece(head, value):
        return ("%s\ndata: %s\n\n" % (head, json.dumps(value))).encode()
    hello = {"status": "connected", "client_id": new_id()}
    yield piece("retry: 3000\nevent: connection\nid: %d.%d" % after, hello)
    if unknown:
        yield piece("event: too_old", {"detail": unknown})
    count = 0
    for event in events:
        if event is None:
            yield piece("event: ping", {"timestamp": format_time(now())})
        elif event.queue_id is None:
            yield piece("event: too_old", {"detail": event.record})
        else:
            count, at, shown = count + 1, format_time(event.at), in_json(event.record, False)
            shown["_id"] = shown.pop(event.kind + "_id")
            step = {"type": "state_transition", "queue_id": event.queue_id, "timestamp": at, "metadata": {},
                    "entity_type": event.kind, "entity_id": shown["_id"], "old_state": event.old_state,
                    "new_state": event.record.status, "entity_data": shown}
            yield piece("id: %d.%d\nevent: event" % (event.n, event.k),
                        {"sequence": count, "timestamp": at, "event": step})


def _welcome(store, caller, request):
    return {"message": "This is a Labtasker server.", "versions": ["v1"], "version": __version__,
            "server": store.server_id}


def _connection_health(store, caller, request):
    return {"connection": "ok"}


def _store_health(store, caller, request):
    try:
        store.journal.file.exists()
        problem = store.file.problem() or store.journal.writer.broken or refusal(store.path)
    except StoreDamaged as error:  # it is no plain file
        problem = str(error)
    return {"status": "unhealthy" if problem else "healthy", "database": problem or "connected"}


def _polling(store, caller, request):
    since_s = min(monotonic() - store.looked_at, 1e9)
    return {"prev_polling": since_s, "next_eta": max(0.0, LOOK_INTERVAL_S - since_s),
            "polling_interval": LOOK_INTERVAL_S}


# What a request with `wait_s` waits for.
#   until  returns the key in Store.watched_keys whose change may bring another answer: (queue id, "pending", "change"
#          or a task's id); None if the answer is final
#   wish   returns what is asked for: if nothing is found for one request, nothing is found for others with the same
#   gives  the answer hands something out, so it must not be computed for a client that has left
Wait = row_type("Wait", "until wish gives")


def _until_found(store, caller, request, answer):
    return None if answer["found"] or _is_ended(store, caller, request) else (store.state.id_of(caller), "pending")


def _wish(store, caller, request):
    if _is_ended(store, caller, request):
        return None
    return str(request["required_fields"]), request.get("filter_text")


def _is_ended(store, caller, request):
    queue = store.state.queues.get(store.state.id_of(caller))
    return queue is not None and request.get("fetch_id") in queue.ended_fetches


def _until_changed(store, caller, request, answer):
    return (store.state.id_of(caller), "change") if answer["mark"] == request["seen"] else None


def _until_over(store, caller, request, answer):
    return (store.state.id_of(caller), request["task_id"]) if answer and answer["status"] == "running" else None


def _no_wish(store, caller, request):
    return None


_FOR_A_TASK = Wait(_until_found, _wish, True)
_FOR_A_CHANGE = Wait(_until_changed, _no_wish, False)
_FOR_THE_END = Wait(_until_over, _no_wish, False)


# Requests that are answered so quickly that a server needs no thread for them.


def _always(store, call):
    return True


def _unless_log(store, call):
    return not call.request["log"]  # else a file is written


def _unless_new_request(store, call):
    return store.is_quick(call.caller, call.request)


# How a request is answered. `fields` are the body's, `query` the URL's; `open`: without a password; `body` is "object",
# "list", or "either"; `waits` is a Wait or None; a request that is not quick gets a thread through `gate`, one of a
# server's GATES.
Route = row_type("Route", "operation meaning fields query status writes open body prepare run waits quick gate")


def _route(operation, meaning, fields=(), query=(), status=200, writes=True, open=False, body="object",
           prepare=None, run=_run, waits=None, quick=None, gate="work"):
    fields = fields if isinstance(fields, Fields) else Fields(dict(fields))
    return Route(operation, meaning, fields, Fields(dict(query)), status, writes, open, body, prepare,
                 run, waits, quick, gate)


_SUBMISSION = Fields({name: Arg(field.kind, field.default if isinstance(field.default, int) else None,
                                field.extension or field.submitted == "id") for name, field in SUBMITTED.items()},
                     fills=False)
_UPDATE = {name: Arg(field.kind, None, field.extension) for name, field in UPDATED.items()}
_PAGE = {"offset": Arg("whole", 0), "limit": Arg("whole", 100), "extra_filter": Arg("filter"), "sort": Arg("sort")}
QUEUE_PATH, TASKS_PATH, WORKERS_PATH = "/api/v1/queues/me", "/api/v1/queues/me/tasks", "/api/v1/queues/me/workers"

ROUTES = {
    "GET /": _route(_welcome, "a welcome; to a browser, /page", open=True, run=_run_outside, quick=_always),
    "GET /page": _route(_no_page, "the page for a browser", open=True, run=_run_outside, quick=_always),
    "GET /page.css": _route(_no_page, "the page's style sheet", open=True, run=_run_outside, quick=_always),
    "GET /page.js": _route(_no_page, "the page's script", open=True, run=_run_outside, quick=_always),
    "GET /health": _route(_connection_health, "whether the server answers", open=True, run=_run_outside, quick=_always),
    "GET /health/full": _route(_store_health, "whether the store can be written", open=True, run=_run_outside,
                               quick=_always),
    "GET /api/v1/polling": _route(_polling, "when the server last looked for time-outs, in seconds", open=True,
                                  run=_run_outside, quick=_always),
    "POST /api/v1/queues": _route(
        create_queue_op, "create a queue", status=201, open=True, prepare=_hash_new_password, gate="strangers",
        fields={"queue_name": Arg("name", REQUIRED), "password": Arg("password", REQUIRED),
                "metadata": Arg("dict")}),
    "GET " + QUEUE_PATH: _route(get_queue_op, "the queue", writes=False, quick=_always),
    "PUT " + QUEUE_PATH: _route(
        update_queue_op, "rename or pause a queue, change its password or metadata", prepare=_hash_new_password,
        fields={"new_queue_name": Arg("name"), "new_password": Arg("password"), "metadata_update": Arg("dict"),
                "paused": _ours("bool")}),
    "DELETE " + QUEUE_PATH: _route(
        delete_queue_op, "delete a queue, its tasks and workers", status=204, run=_run_deletion,
        query={"cascade_delete": Arg("bool", False)}),
    "POST " + TASKS_PATH: _route(
        submit_tasks_op, "submit a task, or a list of them in one transaction", status=201,
        fields=_SUBMISSION, body="either", prepare=_prepare_submission, quick=_always),
    "PUT " + TASKS_PATH: _route(
        update_tasks_op, "update tasks, all or none", body="list", prepare=_prepare_updates,
        query={"reset_pending": Arg("bool", True)},
        fields=dict(_UPDATE, task_id=Arg("id"), _id=Arg("id"), replace_fields=Arg("texts"))),
    "POST " + TASKS_PATH + "/search": _route(
        search_tasks_op, "the tasks that match", writes=False, prepare=_prepare_search(visible(TASK_FIELDS)),
        fields=dict(_PAGE, task_id=Arg("id"), task_name=Arg("text"), status=Arg("status"))),
    "POST " + TASKS_PATH + "/count": _route(
        count_tasks_op, "count the tasks that match, by a field; and how fast they end", writes=False,
        prepare=_prepare_count,
        fields={"task_id": Arg("id"), "task_name": Arg("text"), "status": Arg("status"),
                "extra_filter": Arg("filter"), "by": Arg("text", "status")}),
    "POST " + TASKS_PATH + "/table": _route(
        table_op, "a row for each group of the tasks that match: mean, spread and best of a value", writes=False,
        prepare=_prepare_table,
        fields={"by": Arg("texts", REQUIRED), "of": Arg("text", REQUIRED), "mode": Arg("text", "max"),
                "statuses": Arg("texts"), "task_id": Arg("id"), "task_name": Arg("text"), "status": Arg("status"),
                "extra_filter": Arg("filter"), "limit": Arg("whole")}),
    "POST " + TASKS_PATH + "/view": _route(
        _no_page, "chosen columns of the tasks that match, long values cut; and counts by status",
        prepare=_read_task_filter, run=_run_outside,
        fields=dict(_PAGE, status=Arg("status"), columns=Arg("texts"), spread=Arg("bool", False),
                    choose=Arg("bool", False))),
    "POST " + TASKS_PATH + "/curves": _route(
        _no_page, "the curve of one value for the tasks that match, thinned to some points",
        prepare=_read_task_filter, run=_run_outside,
        fields={"extra_filter": Arg("filter"), "status": Arg("status"), "columns": Arg("texts"),
                "value": Arg("text"), "best": Arg("extreme"), "limit": Arg("whole", 1000),
                "points": Arg("whole", 200000), "since": Arg("seconds")}),
    "POST " + TASKS_PATH + "/next": _route(
        fetch_task_op, "fetch the next task that matches, and run it", prepare=_prepare_fetch, run=_run_fetch,
        waits=_FOR_A_TASK, quick=_unless_new_request,
        fields={"worker_id": Arg("id"), "eta_max": Arg("duration"), "heartbeat_timeout": Arg("seconds"),
                "start_heartbeat": Arg("bool", True), "required_fields": Arg("texts"), "extra_filter": Arg("filter"),
                "cmd": Arg("cmd"), "fetch_id": _ours("id"), "wait_s": _ours("wait", 0.0),
                "attempt": _ours("attempt"), "heartbeat_default": _ours("bool", False), "left": _ours("bool", False)}),
    "DELETE " + TASKS_PATH + "/next": _route(
        end_fetch_op, "end a fetch that waits, or whose answer was lost; hand_back: return its task",
        status=204, quick=_always, query={"fetch_id": _ours("id", REQUIRED), "hand_back": _ours("bool", False)}),
    "GET " + TASKS_PATH + "/{task_id}": _route(get_task_op, "one task", writes=False, quick=_always),
    "DELETE " + TASKS_PATH + "/{task_id}": _route(
        delete_task_op, "delete a task", status=204, quick=_always, run=_run_deletion),
    "GET " + TASKS_PATH + "/{task_id}/log": _route(
        _log_of_run, "the end of a run's output, if its log is beside the store or its end came with the report",
        run=_run_outside, query={"run_id": Arg("id")}),
    "POST " + TASKS_PATH + "/{task_id}/status": _route(
        report_task_op, "report on a run, or on a task", quick=_unless_log, run=_run_report,
        fields={"status": Arg("status", REQUIRED), "worker_id": Arg("id"), "summary": Arg("dict"),
                "run_id": _ours("id"), "reason": _ours("text"), "attempt": _ours("attempt"), "log": _ours("log"),
                "delay_s": _ours("seconds"), "final": _ours("bool"), "took_s": _ours("seconds"),
                "step": _ours("step"), "point_id": _ours("id"), "failure": _ours("failure")}),
    "GET " + TASKS_PATH + "/{task_id}/history": _route(
        get_history_op, "the points that a task's runs have reported with a step", writes=False),
    "POST " + TASKS_PATH + "/{task_id}/heartbeat": _route(
        heartbeat_op, "say that a run is alive", status=204, writes=False, run=_run_heartbeat, waits=_FOR_THE_END,
        quick=_always,
        query={"worker_id": Arg("id"), "run_id": _ours("id"), "answer": _ours("answer"),
               "wait_s": _ours("wait", 0.0)}),
    "GET " + QUEUE_PATH + "/mark": _route(
        get_mark_op, "a mark, new after each change; with wait_s, wait until it differs from seen",
        writes=False, waits=_FOR_A_CHANGE, quick=_always, query={"seen": Arg("text"), "wait_s": Arg("wait", 0.0)}),
    "GET " + QUEUE_PATH + "/events": _route(
        get_queue_op, "a stream of server-sent events: one for each new state of a task or worker", writes=False,
        run=_run_events, gate="streams", query={"last_event_id": _ours("event_id")}),
    "POST " + WORKERS_PATH: _route(
        create_worker_op, "register a worker", status=201, quick=_always,
        fields={"worker_id": _ours("id"), "worker_name": Arg("name"), "metadata": Arg("dict"),
                "max_retries": Arg("count", 3)}),
    "POST " + WORKERS_PATH + "/search": _route(
        search_workers_op, "workers that match", writes=False, prepare=_prepare_search(visible(WORKER_FIELDS)),
        fields=dict(_PAGE, worker_id=Arg("id"), worker_name=Arg("text"), status=Arg("worker_status"))),
    "GET " + WORKERS_PATH + "/{worker_id}": _route(
        get_worker_op, "one worker, its id as _id", writes=False, run=_run_worker),
    "DELETE " + WORKERS_PATH + "/{worker_id}": _route(
        delete_worker_op, "delete a worker", status=204, query={"cascade_update": Arg("bool", True)}),
    "POST " + WORKERS_PATH + "/{worker_id}/status": _route(
        report_worker_op, "suspend a worker, or set it active again", quick=_always,
        fields={"status": Arg("worker_report", REQUIRED)}),
}


def path_readings(path):
    """Yield (path template, ids) for each reading of a path: as it is, and with a part of it as an id."""
    yield path, {}
    parts = path.split("/")
    if len(parts) > 6 and parts[6]:
        for name in ("task_id", "worker_id"):
            yield "/".join(parts[:6] + ["{%s}" % name] + parts[7:]), {name: parts[6]}


@functools.lru_cache(None)
def way_of(route):
    """Return (method, path, the fields in the path, those in the query, whether others are a body) of a route."""
    method, path = route.split(" ")
    return method, path, re.findall(r"{(\w+)}", path), tuple(ROUTES[route].query), bool(ROUTES[route].fields)


def find_route(method, path):
    """Return (route, {name: value} of the ids in the path), or raise NotFound or MethodNotAllowed."""
    for template, ids in path_readings(path):
        route = ROUTES.get(method + " " + template)
        if route:
            return route, ids
    templates = {template for template, _ in path_readings(path)}
    allowed = sorted(key.split(" ")[0] for key in ROUTES if key.split(" ")[1] in templates)
    if allowed:
        raise MethodNotAllowed("%.20s is not allowed on %.200s (allowed: %s)" % (method, path, ", ".join(allowed)))
    raise NotFound("there is nothing at %.200s; 'labtasker help api' lists the routes" % path)


# A request that was read and checked; `caller` is a queue's id, a LocalName, or None.
Call = row_type("Call", "route caller request")


def read_call(store, caller, route, ids, body, query):
    """Return the Call of a request whose route was found, with its decoded body and the URL's fields checked.

    Raises InvalidFields, TooLarge and what the route's `prepare` raises."""
    request = checked(route.query, query or {}, ["query"])
    if route.body == "object":
        request.update(checked(route.fields, {} if body is None else body, ["body"]))
    else:
        many = isinstance(body, list)
        if not many and route.body == "list":
            raise InvalidFields([(["body"], "should be a list")])
        items = body if many else [body]
        if len(items) > TRANSACTION_TASKS:
            raise TooLarge("%d tasks in one request: at most %d go in one transaction" % (
                len(items), TRANSACTION_TASKS))
        found = [checked(route.fields, item, ["body", at] if many else ["body"]) for at, item in enumerate(items)]
        request.update({"updates" if route.body == "list" else "tasks": found, "many": many})
    request.update(ids)
    if route.prepare:
        route.prepare(store, request)
    return Call(route, caller, request)


def run_call(store, call):
    """Return the operation's answer; a request that may wait is answered once there is something to answer."""
    give_up_at = monotonic() + wait_of(call)
    while True:
        seen = store.journal.file.n
        batch, answer, key = begin_call(store, call)
        answer = store.finish(batch, answer)
        left_s = give_up_at - monotonic()
        if key is None or left_s <= 0 or store.closing:
            return answer
        store.wait_for(lambda: store.journal.file.n != seen, left_s if store.is_server else min(left_s, _WAIT_SLICE_S))


def begin_call(store, call):
    """Return (batch, answer, key), each of which may be None.

    The answer may be sent once the batch is on disk. Another answer is possible once the key changes."""
    route, caller, request = call
    batch, answer = route.run(store, caller, request, route)
    return batch, answer, route.waits and route.waits.until(store, caller, request, answer)


def retry_call(store, call, key):
    """Return as `begin_call` does, for a request that waited for a key; raise Unauthorized if its queue is gone."""
    if key[0] and key[0] not in store.state.queues:  # `begin_call` would create the default queue again
        raise Unauthorized("the queue was deleted")
    return begin_call(store, call)


def wait_of(call):
    """Return how many seconds a request may wait for another answer."""
    return call.request["wait_s"] if call.route.waits else 0


def wish_of(store, call):
    """Return what a waiting request asks for; None if no other request can ask for the same."""
    return call.route.waits.wish(store, call.caller, call.request)


def is_quick(store, call):
    """Return whether a request is answered so quickly that it needs no thread."""
    return call.route.quick is not None and call.route.quick(store, call)


def make_quick(store, call):
    """Do the slow part of a request in advance, so that it becomes quick."""
    if call.route.quick is _unless_new_request:
        store.stand(call.caller, call.request)


def is_light(body):
    """Return whether a body is quickly read: it is short, or it is not too long and has no filter."""
    return len(body) <= _LIGHT_BODY_BYTES or len(body) <= QUICK_BYTES and b'"extra_filter"' not in body


def answer_call(store, login, method, path, body=None, query=None, extensions=True):
    """Return (HTTP status, answer in JSON types) of a request; a LabtaskerError becomes an answer too.

    `login()` returns the caller's queue; it is not called for an open route."""
    try:
        route, ids = find_route(method, path)
        call = read_call(store, None if route.open else login(), route, ids, body, query)
        return shown(call.route, run_call(store, call), extensions)
    except LabtaskerError as error:
        return shown_error(error)


def shown(route, answer, extensions):
    """Return (HTTP status, answer in JSON types) of an operation's answer."""
    if isinstance(answer, (Stream, Page)):
        return route.status, answer
    if answer is None:
        return route.status, None if route.status == 204 else {}
    return (200 if route.status == 204 else route.status), in_json(answer, extensions)


def shown_error(error):
    """Return (HTTP status, answer in JSON types) of a LabtaskerError."""
    return error.status, {"detail": getattr(error, "detail", str(error))}


def in_json(answer, extensions):
    """Return an operation's answer with its records as plain dicts."""
    if isinstance(answer, tuple):
        names, take, times = _SHOWN[type(answer), extensions]
        found = dict(zip(names, take(answer)))
        for name in times:
            if found[name] is not None:
                found[name] = format_time(found[name])
        return found
    if isinstance(answer, list):
        return [in_json(item, extensions) for item in answer]
    if isinstance(answer, ForExtended) and not extensions:
        return {}
    if isinstance(answer, dict) and ("content" in answer or "task" in answer):
        return {key: in_json(value, extensions) if isinstance(value, (tuple, list)) else value
                for key, value in answer.items() if extensions or key not in ("retry_in_s", "paused")}
    return answer


def _shown_fields(record, fields, extensions):
    """Return (the names of the fields that a client is shown, a function from a record to their values, the names of
    those that are times)."""
    names = [name for name, field in fields.items() if field.extension is False or (extensions and field.extension)]
    times = [name for name in names if fields[name].kind == "time"]
    return names, operator.itemgetter(*map(record._fields.index, names)), times


# (record type, with extensions): what a client is shown of it
_SHOWN = {
    (record, extensions): _shown_fields(record, fields, extensions)
    for record, fields in ((TaskRecord, TASK_FIELDS), (WorkerRecord, WORKER_FIELDS), (QueueRecord, QUEUE_FIELDS))
    for extensions in (False, True)
}


# 9. Server ###################################################################
#
# An event loop. It takes bind and accept from HTTPServer and threads from ThreadingMixIn. One thread for each
# connection would be slower, as the interpreter's lock would change hands several times a request, and each
# waiting worker would cost a thread. In one turn the loop accepts, reads, answers quick requests and writes all
# that they changed with one sync. A slow request (a listing, hashing a password, a stream of events) goes to a
# thread, with its connection. Server holds the parts: Connections, Parked, Threads with their Gates, Requests,
# Answers, Writer, Upkeep, Log. Knows nothing of the journal's format, and no field of a request. Uses 1 to 8.
# Tests: test_server.py, test_loop.py, test_hostile.py, test_security.py, test_fuzz.py.

DEFAULT_PORT = 9321
_MAX_HEAD_BYTES = 32768  # of a request line and headers together, which come from anybody
_MAX_HEADERS = 100  # http.client has the same limit
_ROOM_BYTES = _MAX_HEAD_BYTES + 3 * QUICK_BYTES  # of requests that a peer sends without waiting for answers
HELD_BYTES = 64 << 20  # of incomplete requests and unread answers; over it the slowest connections are dropped
_LARGE_BYTES = 48 << 20  # of bodies over QUICK_BYTES at the same time: three of the largest; over it 503
_HANDSHAKES = 16  # TLS handshakes in one turn of the loop, as each takes long
_GONE_S = 5.0  # a server whose journal is missing for longer ends
_QUIET_LOOK_S = OWNER_LAPSE_S / 3  # between chores of a server that has no runs
_IDLE_S = 3600.0  # after which a silent connection is closed; heartbeats come more often
_SLOW_SENDER_S = 30.0  # after which a connection is closed if a request's head is still incomplete
_SLOW_BODY_S = 300.0  # the same for a body: 16 MiB at 55 KB/s
_SLOW_LISTENER_S = 30.0  # after which a listener that reads nothing is cut off
LARGE_ANSWER_BYTES = 200000  # an answer over this holds up the loop: the next one to the same request is for a thread
_LINGER_BYTES = 16 << 20  # at most so much of a refused request is read and thrown away
_LINGER_S = 2.0  # for a peer to read why its request was refused while it still sends it
WRONG_PASSWORD_S = 1.0  # before a wrong password is answered
REST_S = 0.1  # after a wrong password was hashed, so that guessing keeps at most half a core busy
_SLOW_ANSWER_S = 1.0  # an answer that takes longer is logged
LOG_LINES_S = 50  # lines of log a second, not counting errors: refusals must not fill a disk
MAX_CONNECTIONS = 65536  # or what RLIMIT_NOFILE allows; over it the connections that are silent longest are closed
_SPARE_FILES = 64  # of RLIMIT_NOFILE: for the journal, compaction, modules to import
_RETRY_AFTER_S = 1  # in the header Retry-After of a 503
_SWEEP_S = 5.0  # between searches for connections that are silent or slow for too long
STOP_GRACE_S = 4.0  # for running requests when the server must stop
_SWITCH_S = 0.0005  # the interpreter's switch interval: threads that scan must let the loop run often
_EXTENSIONS_HEADER = "Labtasker-Extensions"
_SAFE_METHODS = ("GET", "HEAD")  # they change nothing
_CHALLENGE = 'WWW-Authenticate: Basic realm="labtasker", charset="UTF-8"'  # many clients send no login without a realm
_STREAM_HEADERS = (b"Content-Type: text/event-stream\r\nCache-Control: no-cache, no-store, no-transform\r\n"
                   b"X-Accel-Buffering: no\r\n\r\n")  # a proxy must neither delay events nor compress them
_WANTS_PAGE = Pattern(r"text/html(?!\s*;\s*q=0(\.0*)?\s*(,|\Z))", re.IGNORECASE)  # an Accept header

# What threads do: how many at a time, of these for one user, in line, of these for one user.
_GATES = {
    "passwords": (1, 1, 200, 20),  # hashing passwords, except those that are known to be right
    "strangers": (1, 1, 100, 20),  # the same for unknown and new queues, apart so that they delay nobody else
    "streams": (200, 50, 0, 0),  # listeners for events
    "work": (4, 2, 2000, 500),  # listings, large bodies and other slow requests; few, as they share one interpreter
    "answers": (1, 1, 4000, 1000),  # making the JSON of large answers
}


# A server and the clients that can read its server.json recognise each other by the key in it. The key is never sent:
# on each connection both prove that they have it. A proof covers a number that each side draws for this connection, so
# that an old proof is worthless, and the server's address, so that another program can't pass on the server's proof.

_INTRODUCTION = Pattern(r"/\?nonce=([0-9a-f]{32,128})\Z")  # the target of the request with which a client begins this


def new_nonce():
    """Return a new random number as text."""
    return os.urandom(16).hex()


def prove(key, side, nonces, address):
    """Return the proof, an HMAC with SHA-256, that one side, "server" or "client", has the key.

    `address` is that of the server's end of the connection, as this side sees it."""
    sha256 = _sha256()
    padded = key.encode().ljust(64, b"\0")
    text = "\n".join(("labtasker", side) + nonces + (_address_text(address),))
    inner = sha256(bytes(byte ^ 0x36 for byte in padded) + text.encode("utf-8", "surrogatepass")).digest()
    return sha256(bytes(byte ^ 0x5c for byte in padded) + inner).hexdigest()


def _sha256():
    """Return SHA-256, without hashlib if possible: loading its library takes longer than the rest of a command."""
    for name in ("_sha2", "_sha256", "hashlib"):  # the first is Python 3.12's
        try:
            return __import__(name).sha256
        except ImportError:
            pass


def _address_text(address):
    """Return an address as text that is the same at both ends of a connection. For a loopback address it includes the
    host, or container, within which the address is valid."""
    host = address[0].partition("%")[0]
    host = host[7:] if host.startswith("::ffff:") else host
    text = "%s %d" % (host, address[1])
    if host.startswith("127.") or host == "::1":
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                return "%s %s %s" % (text, file.read().strip(), os.readlink("/proc/self/ns/net"))
        except OSError:
            return "%s %s" % (text, os.uname().nodename if hasattr(os, "uname") else "")
    return text


class _BadHead(LabtaskerError):
    """A request that can't be read; the connection is closed after the answer."""

    status = 400


class _HeadTooLarge(_BadHead):
    status = 431


class Busy(LabtaskerError):
    """Too many requests of a kind at once; the client may try again later."""

    status = 503


class RequestHead(row_type("RequestHead", "fields length login extensions close keep_alive foreign")):
    """A request's headers: all `fields` by their lower-case names, and the values that the server uses.

    `login` is (name, password) or None. If a browser sent the request for another site's page, `foreign` says how that
    is known; else it is None."""

    __slots__ = ()


def read_head(block, own_names=()):
    """Return the RequestHead of a request's header lines, as bytes; raise _BadHead or TooLarge.

    It is strict. It does not use email.parser, which costs more than the rest of a request."""
    fields = {}
    lines = block.decode("latin-1").split("\r\n") if block else []
    if len(lines) > _MAX_HEADERS:
        raise _HeadTooLarge("more than %d headers" % _MAX_HEADERS)
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip() or "\n" in line or "\r" in line or "\0" in line:
            raise _BadHead("a malformed header")
        if name in fields and name in ("content-length", "host", "authorization"):
            raise _BadHead("two %s headers" % name)
        value = value.strip()
        fields[name] = fields[name] + "," + value if name == "connection" and name in fields else value
    if "transfer-encoding" in fields:
        raise _BadHead("Transfer-Encoding is not supported: send a Content-Length")
    length = fields.get("content-length", "0")
    if not re.match(r"[0-9]+\Z", length):
        raise _BadHead("the Content-Length is not a number")
    if len(length) > 18 or int(length) > MAX_BODY_BYTES:
        raise TooLarge("a body of over %d bytes" % MAX_BODY_BYTES)
    options = [option.strip() for option in fields.get("connection", "").lower().split(",")]
    return RequestHead(fields, int(length), _basic_login(fields.get("authorization", "")),
                       _EXTENSIONS_HEADER.lower() in fields, "close" in options, "keep-alive" in options,
                       _foreign(fields, own_names))


def _foreign(fields, own_names):
    """Return the reason if a browser has sent a request for a page of another site, else None.

    Only browsers send Origin, and they send it with every request that changes something. Without it any Host is
    accepted, so that aliases, tunnels and proxies need no settings. With it, the page must be this server's own, and
    Host must be an address or one of `own_names`: the owner of any other name can make it point here (DNS rebinding).
    If Host is not the page's but the browser says that both have one origin, a proxy has changed Host."""
    site = fields.get("sec-fetch-site", "")
    if site in ("cross-site", "same-site"):
        return "a page of another site"
    origin = fields.get("origin")
    if origin is None:
        return None
    host = fields.get("host", "").lower()
    if not host or origin.lower().partition("://")[2] != host and site != "same-origin":
        return "a page of another site (%.100s)" % ascii(origin)[1:-1]
    name = re.sub(r":\d*\Z", "", host)
    if re.match(r"[\d.]+\Z|\[[0-9a-f:.]+\]\Z", name) or name == "localhost" or name in own_names:
        return None
    return "a page under the name %.100s, which is not known here (serve --allow-host)" % ascii(name)[1:-1]


def _basic_login(header):
    """Return (name, password) of a Basic Authorization header, or None."""
    import base64
    scheme, _, packed = header.partition(" ")
    try:
        name, colon, password = base64.b64decode(packed.encode()).decode().partition(":")
    except ValueError:
        return None
    return (name, password) if colon and scheme.lower() == "basic" else None


class _HeaderCache:
    """A cache of RequestHeads by header block: a client sends the same block again and again."""

    def __init__(self, own_names=()):
        self.known = {}  # header block as bytes: RequestHead
        self.own_names = own_names

    def read(self, block):
        """Return the RequestHead of a block."""
        head = self.known.get(block)
        if head is None:
            head = read_head(block, self.own_names)
            if len(self.known) >= 1000:
                self.known.clear()
            if len(block) < 2000:
                self.known[block] = head
        return head


class HttpRequest(row_type("HttpRequest", "method target head keep body started is_old")):
    """A complete request. `keep`: whether its connection stays open after it; `is_old`: whether it is HTTP/1.0."""

    __slots__ = ()

    def path_and_query(self):
        """Return (path, {name: value of the query}); for / a browser gets the path of the page."""
        path, _, query = self.target.partition("?")
        if "://" in path and not path.startswith("/"):  # the absolute form, which clients send to proxies
            path = "/" + path.split("/", 3)[3] if path.count("/") > 2 else "/"
        fields, values = self.head.fields, {}
        if query or "%" in path:
            from urllib.parse import parse_qsl, unquote
            path, values = unquote(path), dict(parse_qsl(query))
        values.update((field, fields[header]) for header, field in HEADER_FIELDS.items() if header in fields)
        return "/page" if path == "/" and _WANTS_PAGE.search(fields.get("accept", "")) else path, values


# most_s: how long the state may last. since: the attribute that says since when. moves: {event: next state}.
ConnectionState = row_type("ConnectionState", "most_s since moves")

# An event without an entry is illegal. In every state "drop" leads to closed.
CONNECTION_STATES = {
    "handshake": ConnectionState(_SLOW_SENDER_S, "heard_at", {"secured": "idle"}),
    "idle": ConnectionState(_IDLE_S, "heard_at", {
        "bytes": "head", "head": "body", "request": "answering", "refuse": "refused"}),
    "head": ConnectionState(_SLOW_SENDER_S, "entered_at", {
        "head": "body", "request": "answering", "refuse": "refused"}),
    "body": ConnectionState(_SLOW_BODY_S, "entered_at", {
        "request": "answering", "hand over": "thread", "refuse": "refused"}),
    "answering": ConnectionState(_IDLE_S, "heard_at", {
        "wait": "waiting", "hand over": "thread", "want body": "body", "reply": "sending", "last reply": "closing"}),
    "waiting": ConnectionState(math.inf, "heard_at", {"wake": "answering"}),
    "thread": ConnectionState(math.inf, "heard_at", {"return": "answering"}),
    "sending": ConnectionState(_SLOW_LISTENER_S, "heard_at", {"sent": "idle"}),
    "refused": ConnectionState(_LINGER_S, "heard_at", {"last reply": "closing"}),
    "closing": ConnectionState(_SLOW_LISTENER_S, "heard_at", {"sent": "lingering"}),
    "lingering": ConnectionState(_LINGER_S, "heard_at", {}),
    "closed": ConnectionState(math.inf, "heard_at", {}),
}
for _state in CONNECTION_STATES.values():
    _state.moves["drop"] = "closed"
READING = ("idle", "head", "body")  # the states in which the next request is read
_ANSWERED_SOON = ("answering", "refused")


class Connection:
    """A connection: the bytes that were received and not used yet, those still to send, and its state.

    Its states are those of CONNECTION_STATES:

        handshake: secured -> idle
        idle: bytes -> head, head -> body, request -> answering, refuse -> refused
        head: head -> body, request -> answering, refuse -> refused
        body: request -> answering, hand over -> thread, refuse -> refused
        answering: wait -> waiting, hand over -> thread, want body -> body, reply -> sending, last reply -> closing
        waiting: wake -> answering
        thread: return -> answering
        sending: sent -> idle
        refused: last reply -> closing
        closing: sent -> lingering
    """

    __slots__ = ("sock", "peer", "inbox", "outbox", "line", "head", "state", "entered_at", "heard_at", "has_ended",
                 "waiting", "authenticated", "held_bytes", "reserved_bytes", "discard_bytes", "gate", "proof")

    def __init__(self, sock, peer, is_tls):
        self.sock, self.peer, self.inbox, self.outbox = sock, peer, bytearray(), b""
        self.line = self.head = None  # request line and RequestHead of a request with an incomplete body
        self.state = "handshake" if is_tls else "idle"
        self.entered_at = self.heard_at = monotonic()  # when it came into this state; when it last sent or took bytes
        self.has_ended = False  # whether the peer has closed its sending side
        self.waiting = None  # the Waiting of a parked request
        self.authenticated = False  # whether a request on it had a right password
        self.held_bytes = 0  # its part of Connections.held_bytes
        self.reserved_bytes = 0  # its large body's part of Connections.large_bytes
        self.discard_bytes = 0  # after a refusal: how many bytes of its request are still read and thrown away
        self.gate = None  # (gate, user) by which a thread has it
        self.proof = None  # the client's proof that it has the server's key: the password on this connection

    def move(self, event):
        """Go to the state that `event` leads to; raise RuntimeError if the table has no such move."""
        moves = CONNECTION_STATES[self.state].moves
        if event not in moves:
            raise RuntimeError("a connection in the state %r does not allow the event %r" % (self.state, event))
        self.state, self.entered_at = moves[event], monotonic()

    def next_request(self, heads):
        """Return the next HttpRequest, or None until it is complete; raise _BadHead or TooLarge."""
        if self.head is None:
            end = self.inbox.find(b"\r\n\r\n")
            if end > _MAX_HEAD_BYTES or end < 0 and len(self.inbox) > _MAX_HEAD_BYTES:
                raise _HeadTooLarge("a request line and headers of more than %d bytes" % _MAX_HEAD_BYTES)
            if end < 0:
                if self.inbox and self.state == "idle":
                    self.move("bytes")
                return None
            line, _, block = bytes(self.inbox[:end]).partition(b"\r\n")
            del self.inbox[:end + 4]
            self.line = line.decode("latin-1").split(" ")
            if len(self.line) != 3 or not self.line[2].startswith("HTTP/1.") or not self.line[1]:
                raise _BadHead("not an HTTP/1.1 request line")
            self.head = heads.read(block)
            if self.proof:
                self.head = self._without_proof(self.head)
        head = self.head
        if len(self.inbox) < head.length:
            if self.state != "body":
                self.move("head")
            return None
        body = bytes(self.inbox[:head.length])
        del self.inbox[:head.length]
        method, target, version = self.line
        self.line = self.head = None
        is_old = version == "HTTP/1.0"
        keep = not head.close and (head.keep_alive or not is_old)
        self.move("request")
        return HttpRequest(method, target, head, keep, body, monotonic(), is_old)

    def _without_proof(self, head):
        """Return a RequestHead. If its password is this connection's proof, the login becomes (LocalName, None)."""
        name, password = head.login or ("", "")
        return head._replace(login=(LocalName(name), None)) if name and same_secret(password, self.proof) else head

    def is_over(self, moment):
        """Return whether its state has lasted for too long."""
        state = CONNECTION_STATES[self.state]
        return moment - getattr(self, state.since) > state.most_s


def _json_in_pieces(answer):
    """Return the JSON of an answer. Items are converted one by one, so that the loop's thread can run in between."""
    if not isinstance(answer, dict) or not isinstance(answer.get("content"), list):
        return dump_json(answer)
    head = dump_json({key: value for key, value in answer.items() if key != "content"})[:-1]
    items = ",".join([dump_json(item) for item in answer["content"]])
    return '%s%s"content":[%s]}' % (head, "," if head != "{" else "", items)


def _http_answer(status, answer, request, keep):
    """Return the bytes of an answer, which is a Page or of JSON types. For a Stream return the head alone."""
    is_page = isinstance(answer, Page)
    if is_page and answer.etag and request.head.fields.get("if-none-match") == answer.etag:
        status = 304
    extensions = request is not None and request.head.extensions
    key = status, extensions, keep, request is not None and request.is_old
    start = _STARTS.get(key)
    if start is None:
        start = _STARTS[key] = _http_start(*key)
    if request is not None and request.target == "/":
        start += b"Vary: Accept\r\n"
    if isinstance(answer, Stream):
        return start + _STREAM_HEADERS
    start += answer.head.encode() if is_page else b"Content-Type: application/json\r\n" if status != 204 else b""
    if status in (204, 304):
        return start + b"\r\n"
    body = answer.body if is_page else b"" if answer is None else _json_in_pieces(answer).encode()
    start += b"Content-Length: %d\r\n\r\n" % len(body)
    return start if request is not None and request.method == "HEAD" else start + body


_STARTS = {}  # (status, extensions, keep, is_old): the first bytes of such an answer


def _http_start(status, extensions, keep, is_old):
    """Return the first lines of an answer. HTTP/1.0 closes the connection unless the answer says otherwise."""
    from http.client import responses
    headers = [(True, "HTTP/1.1 %d %s" % (status, responses.get(status, ""))),
               (status == 401, _CHALLENGE), (status == 503, "Retry-After: %d" % _RETRY_AFTER_S),
               (extensions, _EXTENSIONS_HEADER + ": 1"), (not keep, "Connection: close"),
               (keep and is_old, "Connection: keep-alive")]
    return "".join(line + "\r\n" for is_sent, line in headers if is_sent).encode()


def _write_now(text):
    """Write a text to stderr without waiting; return whether all of it was written; raise nothing."""
    import select
    try:
        fd = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # stderr is a notebook's, closed, or None
        return bool(sys.stderr and not sys.stderr.closed and sys.stderr.write(text))
    data = text.encode("utf-8", "backslashreplace")
    with _LOG_LOCK:  # if two threads saw room for one line, the second would have to wait
        try:
            while data:
                if hasattr(select, "poll"):
                    poll = select.poll()
                    poll.register(fd, select.POLLOUT)
                    if not poll.poll(0):
                        return False
                data = data[os.write(fd, data[:getattr(select, "PIPE_BUF", 512)]):]  # a writable pipe takes that much
            return True
        except OSError:  # a full disk, a pipe without a reader
            return False


_LOG_LOCK = threading.Lock()
_LOG_LEVELS = ("debug", "info", "warning", "error")


class Log:
    """A server's log: lines on stderr. The server goes on if they can't be written."""

    def __init__(self, level):
        self.level = level
        self.second = self.count = 0  # the second of the last lines, and how many there were in it
        self.unwritten = 0  # lines that could not be written since the last one that could

    def write(self, line):
        """Write a line to stderr. If that is a pipe without room it does not wait, but counts the line as lost."""
        lost = "labtasker: %d lines of this log could not be written\n" % self.unwritten if self.unwritten else ""
        self.unwritten = 0 if _write_now(lost + clean(without_login(line)) + "\n") else self.unwritten + 1

    def say(self, level, text):
        """Print a log line if its level is logged; at most LOG_LINES_S a second unless it is an error."""
        if _LOG_LEVELS.index(level) < _LOG_LEVELS.index(self.level):
            return
        stamp, second = time.strftime("%Y-%m-%d %H:%M:%S"), int(monotonic())
        if second != self.second:
            if self.count > LOG_LINES_S:
                self.write("%s warning %d more lines like these" % (stamp, self.count - LOG_LINES_S))
            self.second, self.count = second, 0
        self.count += level not in ("debug", "error")
        if self.count <= LOG_LINES_S or level in ("debug", "error"):
            self.write("%s %s %s" % (stamp, level, text))

    def note(self, conn, request, status):
        """Log a request: who sent it, what, and how long the answer took.

        At level debug all are logged, else those that failed, were refused or slow, or change a queue. Headers and
        bodies are never logged: they have passwords."""
        took_s, changes_queue, words = 0, False, "a request that was not read"
        if request is not None:
            took_s, path = monotonic() - request.started, request.target.partition("?")[0]
            changes_queue = request.method not in _SAFE_METHODS and path in ("/api/v1/queues", QUEUE_PATH)
        is_noted = status >= 500 or status in (401, 403) or took_s > _SLOW_ANSWER_S or changes_queue
        if not is_noted and self.level != "debug":
            return
        if request is not None:
            words = " ".join(ascii(word)[1:-1][:limit] for word, limit in (
                ((request.head.login or ("-",))[0], 100), (request.method, 20), (request.target, 200)))
        level = "error" if status == 500 else "warning" if status > 500 else "info" if is_noted else "debug"
        self.say(level, "%s %s -> %d in %.1f ms" % (conn.peer, words, status, took_s * 1000))

    def bug(self, error):
        """Log the traceback of an unexpected error; return the answer, which says that the mistake is not the
        client's."""
        import traceback
        self.say("error", "".join(traceback.format_exception(type(error), error, error.__traceback__)))
        return {"detail": "a bug in labtasker %s: %s" % (__version__, type(error).__name__)}


class _Waker:
    """Ends the wait of a loop in `select`; used from other threads and signal handlers."""

    def __init__(self):
        import socket
        self.sender, self.receiver = socket.socketpair()
        self.sender.setblocking(False)
        self.receiver.setblocking(False)

    def wake(self):
        """Make the loop take a turn."""
        try:
            self.sender.send(b"w")
        except OSError:  # it is full, so the loop will wake anyway, or it is closed
            pass

    def drain(self):
        """Read the bytes that woke the loop."""
        try:
            while self.receiver.recv(4096):
                pass
        except BlockingIOError:
            pass

    def close(self):
        """Close both ends."""
        self.sender.close()
        self.receiver.close()


# A request that waits until `give_up_at` for a change of `key`. Without a key its `row`, an Outgoing, is sent then.
Waiting = row_type("Waiting", "give_up_at key call request row")


class _Parked:
    """The connections whose requests wait, by the key that they wait for. Only the loop's thread uses it."""

    def __init__(self, watched_keys):
        self.watched_keys = watched_keys  # the store's: keys whose changes it notes
        self.by_key = {}  # key: {connection: None}, the oldest first
        self.give_up_at = math.inf  # when the first of them gives up

    def add(self, conn, waiting):
        """Park a connection until its key changes, or it gives up."""
        conn.move("wait")
        conn.waiting = waiting
        self.by_key.setdefault(waiting.key, collections.OrderedDict())[conn] = None
        self.watched_keys.add(waiting.key)
        self.give_up_at = min(self.give_up_at, waiting.give_up_at)

    def remove(self, conn):
        """Remove a connection; return its Waiting, or None if it was not parked."""
        waiting, conn.waiting = conn.waiting, None
        if waiting:
            conns = self.by_key[waiting.key]
            del conns[conn]
            if not conns:
                del self.by_key[waiting.key]
                self.watched_keys.discard(waiting.key)
        return waiting

    def due(self, at):
        """Return the connections that give up at `at` or earlier."""
        parked = [conn for conns in self.by_key.values() for conn in conns]
        self.give_up_at = min((conn.waiting.give_up_at for conn in parked if conn.waiting.give_up_at > at),
                              default=math.inf)
        return [conn for conn in parked if conn.waiting.give_up_at <= at]


def _listener(host, port):
    """Return an HTTPServer that listens, or raise a LabtaskerRuntimeError that says who uses the port.

    Its class is made here, so that only a server imports it. `process_request` runs a job in a thread."""
    import http.server
    import socket
    import socketserver

    class Listener(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads, block_on_close = True, False
        allow_reuse_address, request_queue_size = True, 1024
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def server_bind(self):
            """Bind without asking a name server for this host's name, as HTTPServer does."""
            socketserver.TCPServer.server_bind(self)

        def finish_request(self, job, peer):
            """Run a job in its thread."""
            job()

        def shutdown_request(self, job):
            """Leave the connection open: it goes back to the loop."""
    try:
        return Listener((host, port), None)
    except (OSError, OverflowError, ValueError, TypeError) as error:  # all but OSError: not a port or a host
        is_busy = getattr(error, "errno", None) == errno.EADDRINUSE
        raise LabtaskerRuntimeError("can't listen on %s port %s: %s%s" % (
            host, port, getattr(error, "strerror", None) or error,
            is_busy and _port_owner(port) + "; try --port 0" or ""))


class _Connections:
    """The connections that the loop listens to. Only the loop's thread uses it.

    Limits of bytes, connections and time protect the others from a peer that sends much, slowly or nothing."""

    def __init__(self, listener, tls, log, parked, most):
        import selectors
        self.listener, self.tls, self.log, self.parked, self.most = listener, tls, log, parked, most
        self.later = (BlockingIOError, InterruptedError)  # errors of a socket that has no data, or no room, just now
        if tls:
            import ssl
            self.later += (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        listener.socket.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener.socket, selectors.EVENT_READ, self.accept_all)
        self.all = set()  # all connections except those that a thread has or that wait for one
        self.away = 0  # how many connections a thread has, or wait for one
        self.held_bytes = self.large_bytes = 0  # of incomplete requests and unread answers; of large bodies
        self.handshakes = 0  # in this turn
        self.eager = []  # connections that have already sent their next request, which is for the next turn
        self.swept_at, self.due_at = monotonic(), math.inf  # the last sweep; the next one if it is earlier than usual
        self.is_stopping = False

    def close(self):
        """Close the listening socket and the selector."""
        self.listener.socket.close()
        self.selector.close()

    def accept_all(self):
        """Accept the connections that wait."""
        for _ in range(100):
            try:
                sock, address = self.listener.get_request()
            except OSError as error:  # no more, or the peer has gone, or no file descriptor is left
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.make_room()
                return
            if len(self.all) + self.away >= self.most:
                self.make_room()
            try:
                sock.setsockopt(6, 1, 1)  # TCP_NODELAY
                if self.tls:
                    sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                self.register(Connection(sock, address[0], bool(self.tls)))
            except OSError:
                sock.close()

    def register(self, conn):
        """Listen to a connection."""
        conn.sock.setblocking(False)
        self.selector.register(conn.sock, 1, conn)  # EVENT_READ
        self.all.add(conn)

    def unregister(self, conn):
        """Stop listening to a connection."""
        if conn in self.all:
            self.all.discard(conn)
            self.selector.unregister(conn.sock)

    def drop(self, conn):
        """Close a connection and forget it."""
        self.unregister(conn)
        self.parked.remove(conn)
        self.release(conn)
        self.held_bytes -= conn.held_bytes
        conn.held_bytes = 0
        conn.move("drop")
        try:
            conn.sock.close()
        except OSError:
            pass

    def release(self, conn):
        """Free the bytes that were reserved for a connection's large body."""
        self.large_bytes -= conn.reserved_bytes
        conn.reserved_bytes = 0

    def receive(self, conn):
        """Read from a connection; return whether its inbox has new bytes, or whether the peer has closed its sending
        side while its request is answered."""
        try:
            if conn.state == "handshake":
                self.handshakes += 1
                if self.handshakes > _HANDSHAKES:
                    return False
                conn.sock.do_handshake()
                conn.move("secured")
            data = conn.sock.recv(65536)
            while data and self.tls and conn.sock.pending():
                data += conn.sock.recv(65536)
        except self.later:
            return False
        except OSError:  # the peer has reset it, or TLS has failed
            self.drop(conn)
            return False
        if not data and conn.state in _ANSWERED_SOON:  # the peer may still read the answer
            conn.has_ended = True
            return True
        if not data or len(conn.inbox) > _ROOM_BYTES + conn.reserved_bytes:
            self.drop(conn)
        elif conn.discard_bytes:
            conn.discard_bytes = max(0, conn.discard_bytes - len(data))
            if not conn.discard_bytes or monotonic() - conn.heard_at > _LINGER_S:
                self.drop(conn)
        else:
            conn.inbox += data
            conn.heard_at = monotonic()
            return True
        return False

    def send(self, conn, data):
        """Send the bytes that wait in the outbox, or `data` if none do. What can't be sent now waits in the outbox."""
        data = conn.outbox or data
        try:
            sent = conn.sock.send(data)
        except self.later:
            sent = 0
        except OSError:
            return self.drop(conn)
        had, conn.outbox = conn.outbox, b"" if sent == len(data) else memoryview(data)[sent:]
        if conn in self.all and bool(had) != bool(conn.outbox):
            self.selector.modify(conn.sock, 2 if conn.outbox else 1, conn)
        if conn.outbox or conn.held_bytes:
            conn.heard_at = monotonic() if sent else conn.heard_at
            self.count(conn)
        if conn.outbox or conn.state == "closed":
            return
        if conn.state == "closing" and (not conn.discard_bytes or self.tls or self.is_stopping or conn not in self.all):
            return self.drop(conn)
        conn.move("sent")
        if conn.state == "lingering":
            self.linger(conn)
        elif conn.inbox:  # its next request is for the next turn, so that no connection keeps the others waiting
            self.eager.append(conn)

    def linger(self, conn):
        """Give a peer that is still sending time to read its last answer."""
        try:
            conn.sock.shutdown(1)
        except OSError:
            return self.drop(conn)
        conn.inbox.clear()
        conn.heard_at = monotonic()
        self.due_at = min(self.due_at, conn.heard_at + _LINGER_S)

    def count(self, conn):
        """Count the bytes that are held for a connection, and drop some connections if the sum is too large."""
        held = len(conn.inbox) + len(getattr(conn.outbox, "obj", conn.outbox))  # a memoryview keeps its whole object
        self.held_bytes += held - conn.held_bytes
        conn.held_bytes = held
        if self.held_bytes > HELD_BYTES:
            self.drop_slowest()

    def drop_slowest(self):
        """Drop connections with held bytes until a quarter of the limit is free: strangers first, then those that have
        been silent longest. The last one stays, however much it holds."""
        holding = sorted((conn for conn in self.all if conn.held_bytes), key=_keep_order)
        for conn in holding[:-1]:
            if self.held_bytes >= HELD_BYTES * 3 // 4:
                self.drop(conn)
        self.log.say("warning", "over %d MiB of unfinished requests and unread answers: the slowest connections were "
                                "closed" % (HELD_BYTES >> 20))

    def make_room(self):
        """Close a hundredth of the connections: strangers first, then those that have been silent longest."""
        for conn in heapq.nsmallest(1 + len(self.all) // 100, self.all, key=_keep_order):
            self.drop(conn)
        if not self.all:  # threads have all of them
            time.sleep(REST_S)
        self.log.say("warning", "the limit of %d connections is reached: the longest silent were closed" % self.most)

    def sweep(self):
        """Close the connections whose state has lasted for too long: they are silent or slow."""
        moment = self.swept_at = monotonic()
        self.due_at = math.inf
        for conn in [conn for conn in self.all if conn.is_over(moment)]:
            self.drop(conn)


def _keep_order(conn):
    """Return a sort key: the connection to close first has the smallest one."""
    return conn.authenticated, conn.heard_at


def _has_closed(sock):
    """Return whether the peer of a non-blocking socket has closed it."""
    import socket
    try:
        return not socket.socket.recv(sock, 1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


class Gate:
    """Limits how many requests run in threads: `most` at a time, `user_most` of them for one user. The others wait in
    line: at most `line`, `user_line` of them for one user.

    Users take turns, so that many requests of one user don't delay the others. Only the loop's thread uses it."""

    def __init__(self, most, user_most, line, user_line):
        self.most, self.user_most, self.line, self.user_line = most, user_most, line, user_line
        self.running = collections.Counter()  # user: how many run
        self.count = self.in_line = 0
        self.waiting = collections.OrderedDict()  # user: deque of items that wait

    def enter(self, user, item):
        """Put an item in line, or raise Busy."""
        own = self.waiting.get(user, ())
        is_free = self.count < self.most and self.running[user] < self.user_most and not own
        if not is_free and (self.in_line >= self.line or len(own) >= self.user_line):
            raise Busy("too many such requests at once: try again")
        self.waiting.setdefault(user, collections.deque()).append(item)
        self.in_line += 1

    def begin(self):
        """Return the items that may run now, and count them as running."""
        started = []
        for user in list(self.waiting) if self.count < self.most else ():
            own = self.waiting[user]
            while own and self.count < self.most and self.running[user] < self.user_most:
                started.append(own.popleft())
                self.count += 1
                self.running[user] += 1
            self.waiting.move_to_end(user)
            if not own:
                del self.waiting[user]
            if self.count >= self.most:
                break
        self.in_line -= len(started)
        return started

    def leave(self, user):
        """Note that an item of a user has ended."""
        self.count -= 1
        self.running[user] -= 1
        if not self.running[user]:
            del self.running[user]

    def empty(self):
        """Remove all items in line; return them."""
        items = [item for own in self.waiting.values() for item in own]
        self.waiting.clear()
        self.in_line = 0
        return items


def _start_thread(work, name):
    """Start a thread that does `work`; return False if this process may have no more threads."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
        return True
    except (RuntimeError, MemoryError):
        return False


class _Threads:
    """Gives slow requests to threads, with their connections, and takes the connections back.

    A thread's work is a function (connection, request, ...). It returns what the loop does next with the connection:
    (function, its arguments after the connection), or None to close it. If it raises, the loop calls `refuse`."""

    def __init__(self, listener, connections, wake, refuse):
        self.listener, self.connections, self.wake, self.refuse = listener, connections, wake, refuse
        self.gates = {name: Gate(*row) for name, row in _GATES.items()}
        self.returned = collections.deque()  # (connection, what to do next) from threads

    def hand_over(self, conn, kind, user, work, request, *more):
        """Have a thread do this work for a connection, or put it in line for one; raise Busy if the line is full."""
        gate = self.gates[kind]
        gate.enter(user, (conn, work, request) + more)
        conn.move("hand over")
        conn.gate = gate, user
        self.connections.unregister(conn)
        self.connections.away += 1
        self.start(gate)

    def start(self, gate):
        """Start a thread for each job whose turn it is, unless its peer has closed the connection."""
        for job in gate.begin():
            conn, _, request = job[:3]
            if _has_closed(conn.sock):
                self.give_back(conn, None)
                continue
            try:
                self.listener.process_request(functools.partial(self.run, job), conn.peer)  # ThreadingMixIn's
            except (RuntimeError, MemoryError) as error:  # no more threads can be started
                self.give_back(conn, (self.refuse, request, Busy(str(error))))

    def run(self, job):
        """Run a job in its thread."""
        conn, work, request, *more = job
        try:
            next_step = work(conn, request, *more)
        except Exception as error:
            next_step = (self.refuse, request, error)
        self.give_back(conn, next_step)

    def give_back(self, conn, next_step):
        """Give a connection back to the loop, with what to do next."""
        self.returned.append((conn, next_step))
        self.wake()

    def take_back(self):
        """Return the next (connection, what to do next) that a thread has given back, or None."""
        if not self.returned:
            return None
        conn, next_step = self.returned.popleft()
        (gate, user), conn.gate = conn.gate, None
        self.connections.away -= 1
        gate.leave(user)
        self.start(gate)
        return conn, next_step

    def is_working(self):
        """Return whether a thread has a connection."""
        return any(gate.count for gate in self.gates.values())

    def drop_waiting(self):
        """Close the connections that wait for a thread."""
        for gate in self.gates.values():
            for conn, *_ in gate.empty():
                self.connections.away -= 1
                self.connections.drop(conn)


class _Writer:
    """The thread that writes the journal while the loop receives more; if it could not be started, the loop writes."""

    def __init__(self, journal, wake):
        self.journal, self.wake = journal, wake
        self.is_there = self.is_writing = self.is_stopping = False
        self.wanted = threading.Semaphore(0)

    def start(self):
        """Start the thread, if possible."""
        self.is_there = _start_thread(self.run, "journal writer")

    def stop(self):
        """End the thread and write what is left."""
        self.is_stopping, self.is_writing = True, False
        self.wanted.release()
        self.journal.flush()

    def write(self, waiting, connected):
        """Have new lines written, for which so many of the connections wait.

        If that is half of them, this thread writes. Else the writer's thread does: what the loop receives meanwhile
        shares the next sync."""
        if waiting and not self.is_writing:
            if 2 * waiting >= connected or not self.is_there:
                self.journal.flush()
            else:
                self.is_writing = True
                self.wanted.release()

    def run(self):
        """Write whenever the loop wants it."""
        while True:
            self.wanted.acquire()
            if self.is_stopping:
                return
            try:
                self.journal.flush()
            finally:
                self.is_writing = False
                self.wake()


class _Logins:
    """Finds out who has sent a request, as far as that needs no hashing of a password."""

    def __init__(self, store, key):
        self.store, self.key = store, key

    def known_caller(self, login):
        """Return the caller's queue, or None if the password has to be hashed first; raise Unauthorized without a
        login."""
        if login is None:
            raise Unauthorized("Invalid credentials")
        name, password = login
        if password is None:  # the password was the connection's proof
            return name
        if len(password) == len(self.key) and same_secret(password, self.key):
            return LocalName(name)
        return self.store.known_login(name, password)

    def password_gate(self, login):
        """Return the gate for a login whose password has to be hashed."""
        name, state = (login or (None,))[0], self.store.state
        return "passwords" if name in state.names or name in state.queues else "strangers"

    def user_of(self, conn, kind, login):
        """Return the user for whom a request waits at a gate: the queue if the password is known to be right, else the
        peer's address with the name."""
        caller = self.known_caller(login) if kind in ("work", "answers") and login else None
        return self.store.state.id_of(caller) or (conn.peer, (login or (None,))[0])


Outgoing = row_type("Outgoing", "conn request keep batch status answer")


class _Answers:
    """The answers of a turn. They are sent once their changes are on disk, and logged."""

    def __init__(self, store, log, logins, connections, threads, writer):
        self.store, self.log, self.logins = store, log, logins
        self.connections, self.threads, self.writer = connections, threads, writer
        self.waiting = []  # of Outgoing; each is sent once its batch is on disk
        self.heavy = set()  # (login, target) of requests whose answers were large

    def add(self, conn, request, keep, batch, status, answer):
        """Send an answer at the end of this turn, or once its batch is on disk."""
        self.waiting.append(Outgoing(conn, request, keep, batch, status, answer))

    def refuse(self, conn, request, error):
        """Answer a request with an error at the end of this turn."""
        self.waiting.append(self.refusal(conn, request, error))

    def refusal(self, conn, request, error):
        """Return the Outgoing for an error: one of Labtasker's own, or a bug, which ends the connection."""
        if isinstance(error, LabtaskerError):
            return Outgoing(conn, request, request is not None and request.keep, None, *shown_error(error))
        return Outgoing(conn, request, False, None, 500, self.log.bug(error))

    def take_ready(self):
        """Return the answers that may be sent; the others wait for the writer."""
        if self.waiting:
            unwritten = sum(row.batch is not None and not row.batch.done for row in self.waiting)
            self.writer.write(unwritten, len(self.connections.all))
        ready = [row for row in self.waiting if row.batch is None or row.batch.done]
        if ready:
            self.waiting = [row for row in self.waiting if not (row.batch is None or row.batch.done)]
        return ready

    def deliver(self, conn, request, keep, batch, status, answer):
        """Send an answer, or the error if its batch could not be written."""
        if batch is not None and batch.error:
            status, answer = shown_error(batch.error)
        asked_for = request and (request.head.login, request.target)
        if asked_for in self.heavy and answer and conn.state == "answering":
            user = self.logins.user_of(conn, "answers", request.head.login)
            return self.threads.hand_over(conn, "answers", user, self.make, request, keep, status, answer)
        _, data, keep = self.make(conn, request, keep, status, answer)
        if len(data) > LARGE_ANSWER_BYTES and asked_for:
            if len(self.heavy) > 1000:
                self.heavy.clear()
            self.heavy.add(asked_for)
        self.reply(conn, data, keep)

    def make(self, conn, request, keep, status, answer):
        """Make and log the bytes of an answer; return (`reply`, the bytes, keep). A thread may call it."""
        keep = keep and not (self.store.closing or conn.has_ended)
        self.log.note(conn, request, status)
        return self.reply, _http_answer(status, answer, request, keep), keep

    def reply(self, conn, data, keep):
        """Send the bytes of an answer; after that the connection's next request is read."""
        if conn.state == "closed":
            return
        conn.move("reply" if keep else "last reply")
        self.connections.release(conn)
        self.connections.send(conn, data)


class _Requests:
    """What the loop does with requests: it answers quick ones, parks those that wait for a change, and gives slow ones
    to threads. An error on the way is sent as the answer."""

    def __init__(self, store, heads, logins, connections, parked, threads, answers):
        self.store, self.heads, self.logins, self.connections = store, heads, logins, connections
        self.parked, self.threads, self.answers = parked, threads, answers

    def read(self, conn):
        """Handle the next request of a connection, if it is complete."""
        try:
            request = conn.next_request(self.heads) if conn.state in READING else None
            if request is not None:
                self.attempt(conn, request, self.take)
            elif conn.state == "body" and not conn.reserved_bytes:
                self.admit_body(conn) if conn.head.length > QUICK_BYTES else self.send_100_continue(conn)
        except LabtaskerError as error:
            conn.discard_bytes = _LINGER_BYTES
            conn.move("refuse")
            self.answers.refuse(conn, None, error)
        if (conn.inbox or conn.held_bytes) and conn.state != "closed":
            self.connections.count(conn)

    def read_body(self, conn):
        """Read a large body, now that its sender's password is known to be right."""
        conn.move("want body")
        self.read(conn)

    def admit_body(self, conn):
        """Allow a large body if its sender's password is known to be right; else have the password checked first."""
        method, target, _ = conn.line
        request = HttpRequest(method, target, conn.head, False, b"", monotonic(), False)
        if self.find(request)[0].open:
            raise TooLarge("a body of over %d bytes" % QUICK_BYTES)
        if self.logins.known_caller(conn.head.login) is None:
            return self.hand_over(conn, self.logins.password_gate(conn.head.login), self.check_password, request)
        if self.connections.large_bytes + conn.head.length > _LARGE_BYTES:
            raise Busy("too many large requests at once: try again")
        conn.authenticated, conn.reserved_bytes = True, conn.head.length
        self.connections.large_bytes += conn.reserved_bytes
        self.send_100_continue(conn)

    @staticmethod
    def send_100_continue(conn):
        """Tell a peer that asks first to send its body."""
        if not conn.inbox and conn.head.fields.get("expect", "").lower() == "100-continue":
            try:
                conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError:  # the peer has gone, or will send the body after a pause
                pass

    def attempt(self, conn, request, action, *more):
        """Call `action`, which leads to an answer; an error that it raises is the answer."""
        try:
            action(conn, request, *more)
        except Exception as error:
            self.answers.refuse(conn, request, error)

    @staticmethod
    def has_left(conn):
        """Return whether the peer of a connection has closed it."""
        return _has_closed(conn.sock)

    def hand_over(self, conn, gate, work, request):
        """Have a thread do this work for a connection; raise Busy if too many wait for a thread."""
        self.threads.hand_over(conn, gate, self.logins.user_of(conn, gate, request.head.login), work, request)

    def take(self, conn, request):
        """Answer a request, park it, or give it to a thread."""
        head = request.head
        if head.foreign and request.method not in _SAFE_METHODS:
            raise Forbidden("refused, as it was sent by %s" % head.foreign)
        introduction = _INTRODUCTION.match(request.target)
        if introduction:
            return self.introduce(conn, request, introduction.group(1))
        call = self.quick_call(request)
        if call is not None and call.route.waits and call.route.waits.gives and self.has_left(conn):
            return self.connections.drop(conn)  # nobody would get the fetched task
        if call is not None:
            conn.authenticated = conn.authenticated or call.caller is not None
            return self.begin(conn, request, call, self.until(wait_of(call)))
        route, work = self.find(request)[0], self.answer_slowly
        gate = route.gate
        if not route.open and self.logins.known_caller(head.login) is None:
            gate, work = self.logins.password_gate(head.login), self.check_password
        self.hand_over(conn, gate, work, request)

    def introduce(self, conn, request, nonce):
        """Answer with a proof that this server has its key; from now on the client's proof is its password."""
        nonces, address = (nonce, new_nonce()), conn.sock.getsockname()
        conn.proof = prove(self.logins.key, "client", nonces, address)
        _, welcome, _ = begin_call(self.store, Call(find_route("GET", "/")[0], None, {}))
        answer = dict(welcome, nonce=nonces[1], proof=prove(self.logins.key, "server", nonces, address))
        self.answers.add(conn, request, request.keep, None, 200, answer)

    def quick_call(self, request):
        """Return the Call of a request that the loop can answer itself, or None; raise if the request is invalid."""
        if not is_light(request.body):
            return None
        route, ids, query = self.find(request)
        caller = None if route.open or not route.quick else self.logins.known_caller(request.head.login)
        if not route.quick or caller is None and not route.open:
            return None
        call = self.call(request, caller, route, ids, query)
        return call if is_quick(self.store, call) else None

    def begin(self, conn, request, call, give_up_at):
        """Run a call. Its answer is sent at the end of this turn, unless it waits for a change."""
        self.finish(conn, request, call, give_up_at, begin_call(self.store, call))

    def begin_again(self, conn, request, call, give_up_at, key):
        """Run a call again that waited for a change of this key."""
        self.finish(conn, request, call, give_up_at, retry_call(self.store, call, key))

    def finish(self, conn, request, call, give_up_at, begun):
        """Send the answer that `begin_call` returned, or park the request if it has to wait for another one."""
        batch, answer, key = begun
        if key and give_up_at > monotonic():
            return self.parked.add(conn, Waiting(give_up_at, key, call, request, None))
        status, answer = shown(call.route, answer, request.head.extensions)
        self.answers.add(conn, request, request.keep, batch, status, answer)

    def until(self, wait_s):
        """Return when a request that may wait for `wait_s` gives up.

        Long waits end at whole seconds, up to a second late, so that the server wakes once for many of them."""
        if not wait_s or self.store.closing:
            return -math.inf
        return monotonic() + wait_s if wait_s < 10 else math.ceil(monotonic() + wait_s)

    def retry(self, conn, is_last=False):
        """Run a parked request again; return whether it still waits."""
        give_up_at, key, call, request, row = self.parked.remove(conn)
        conn.move("wake")
        if row:
            self.answers.waiting.append(row)
        elif not (is_last or is_quick(self.store, call)):
            self.attempt(conn, request, self.retry_in_thread, call, give_up_at)
        else:
            request = request._replace(started=monotonic())
            self.attempt(conn, request, self.begin_again, call, -math.inf if is_last else give_up_at, key)
        return conn.waiting is not None

    def retry_in_thread(self, conn, request, call, give_up_at):
        """Have a thread scan the tasks that are new for a parked fetch, which is then run again."""
        def work(conn, request):
            make_quick(self.store, call)
            return self.attempt, request, self.begin, call, give_up_at
        self.hand_over(conn, "work", work, request)

    def delay(self, conn, request, error):
        """Answer a request with an error after WRONG_PASSWORD_S."""
        conn.discard_bytes = _LINGER_BYTES if conn.head is not None else 0
        row = self.answers.refusal(conn, request, error)
        self.parked.add(conn, Waiting(monotonic() + WRONG_PASSWORD_S, None, None, request, row))

    def give_up(self, at):
        """Answer the parked requests that give up at `at` or earlier."""
        for conn in self.parked.due(at):
            if conn.waiting:
                self.retry(conn, is_last=True)

    def retry_all(self, key):
        """Run the requests again that wait for this key, the oldest first. If one finds nothing, others with the same
        wish are not tried."""
        in_vain = set()
        for conn in list(self.parked.by_key.get(key, ())):
            wish = conn.waiting and wish_of(self.store, conn.waiting.call)
            if conn.waiting and (wish is None or wish not in in_vain) and self.retry(conn):
                in_vain.add(wish)

    @staticmethod
    def find(request):
        """Return (route, ids, query) of an HttpRequest's method and target."""
        path, query = request.path_and_query()
        return find_route("GET" if request.method == "HEAD" else request.method, path) + (query,)

    def call(self, request, caller, route, ids, query):
        """Return the Call of an HttpRequest whose route was found."""
        return read_call(self.store, caller, route, ids, parse_json(request.body) if request.body else None, query)

    def check_password(self, conn, request):
        """Check a password. If it is right, the request is handled or its body is read. Work for a thread."""
        try:
            self.store.login(*request.head.login)
        except Unauthorized as error:
            time.sleep(REST_S)
            return self.delay, request, error
        return (self.read_body,) if conn.head is not None else (self.attempt, request, self.take)

    def answer_slowly(self, conn, request):
        """Answer a slow request. Work for a thread."""
        route, ids, query = self.find(request)
        login = request.head.login
        caller = None if route.open else self.logins.known_caller(login) or self.store.login(*login)
        call = self.call(request, caller, route, ids, query)
        make_quick(self.store, call)
        if wait_of(call):  # back to the loop, as waiting here would keep the thread busy
            return self.attempt, request, self.begin, call, self.until(wait_of(call))
        status, answer = shown(route, run_call(self.store, call), request.head.extensions)
        if not isinstance(answer, Stream) or request.method == "HEAD":
            return self.answers.make(conn, request, request.keep, status, answer)
        conn.sock.settimeout(_SLOW_LISTENER_S)
        try:
            head = self.answers.make(conn, request, False, status, answer)[1]
            for piece in itertools.chain([head], answer.pieces):
                conn.sock.sendall(piece)
        except Exception as error:
            if not isinstance(error, OSError):  # too late for another answer
                self.answers.log.bug(error)


class _Upkeep:
    """The regular chores of a server for its store."""

    def __init__(self, store, log):
        self.store, self.log = store, log
        self.due_at = monotonic()  # when the chores are due next, apart from time-outs
        self.is_compacting = False
        self.problem_since = self.failure = None  # since when the store can't be written to; why the server ends

    def run(self):
        """Handle time-outs, show that the owner lives, and start a compaction if the journal is bloated."""
        store = self.store
        store.release_delayed()
        try:
            store.look_for_timeouts()
            store.owner.move()
            store.journal.settle()
        except (StoreUnavailable, OSError):  # a full disk: the next time it is tried again
            store.next_timeout_at = max(store.next_timeout_at, monotonic() + LOOK_INTERVAL_S)
        self.check_store()
        if not self.is_compacting and store.file.is_bloated():
            self.is_compacting = True
            if not _start_thread(self.compact, "compaction"):
                self.is_compacting, store.file.look_again_bytes = False, 0
                self.log.say("warning", "%s is not compacted now: no thread could be started for it" % store.path)
        is_busy = store.journal.fsync == "interval" or self.problem_since
        self.due_at = monotonic() + (LOOK_INTERVAL_S if is_busy else _QUIET_LOOK_S)

    def check_store(self):
        """Log once that the store can't be written to. If it stays so, or another owner has it, note a failure."""
        problem = self.store.file.problem()
        if problem and not self.problem_since:
            self.problem_since = monotonic()
            self.log.say("error", problem)
        elif not problem and self.problem_since:
            self.problem_since = None
            self.log.say("info", "%s is there again" % self.store.path)
        if self.store.journal.writer.fenced or problem and monotonic() - self.problem_since > _GONE_S:
            self.failure = self.failure or problem

    def compact(self):
        """Compact the store's journal and log the result."""
        before = self.store.journal.file.size
        try:
            self.store.file.compact()
            self.log.say("info", "compacted the journal from %d to %d bytes" % (before, self.store.journal.file.size))
        except LabtaskerError as error:
            self.log.say("warning", str(error))
        except Exception as error:
            self.log.bug(error)
        finally:
            self.is_compacting = False


class Server:
    """The event loop: one thread that serves all connections in turns.

    `allow_hosts`: names under which browsers may show its pages; `most`: how many connections may be open."""

    def __init__(self, host, port, store, tls, level, allow_hosts=(), most=MAX_CONNECTIONS):
        import selectors
        import socket
        own = socket.gethostname().lower()
        heads = _HeaderCache({own, own.partition(".")[0]} | {name.lower() for name in allow_hosts})
        self.store, self.log, self.stopping = store, Log(level), False
        store.warn = lambda text: self.log.say("warning", text)
        self.id = store.server_id = new_id()
        self.key = os.urandom(24).hex()  # written into server.json, for whoever may read that
        self.parked = _Parked(store.watched_keys)
        self.listener = _listener(host, port)
        self.connections = _Connections(self.listener, tls, self.log, self.parked,
                                       min(most, _raise_file_limit() - _SPARE_FILES))
        self.waker = _Waker()
        self.connections.selector.register(self.waker.receiver, selectors.EVENT_READ, self.take_back)
        self.wake = store.on_wake = self.waker.wake
        self.threads = _Threads(self.listener, self.connections, self.wake, lambda *args: self.answers.refuse(*args))
        self.writer = _Writer(store.journal, self.wake)
        logins = _Logins(store, self.key)
        self.answers = _Answers(store, self.log, logins, self.connections, self.threads, self.writer)
        self.requests = _Requests(store, heads, logins, self.connections, self.parked, self.threads, self.answers)
        self.upkeep = _Upkeep(store, self.log)

    def close(self):
        """Close the sockets and the selector."""
        self.connections.close()
        self.waker.close()

    def due_at(self):
        """Return when the next chore is due."""
        return min(self.upkeep.due_at, self.connections.due_at, self.store.due_at())

    def serve_forever(self):
        """Answer requests until `stopping` is set and running requests have ended, or STOP_GRACE_S is over."""
        sys.setswitchinterval(_SWITCH_S)
        self.writer.start()
        gc.disable()  # requests leave no cycles (a test counts them), and a collection takes long with many tasks
        while not self.stopping:
            self.turn(min(self.due_at(), self.parked.give_up_at) - monotonic())
            self.do_chores()
        self.connections.selector.unregister(self.listener.socket)
        with self.store.lock:  # this ends the streams
            self.store.closing = True
            self.store.changed.notify_all()
        self.connections.is_stopping = True
        self.requests.give_up(math.inf)
        self.threads.drop_waiting()
        give_up_at = monotonic() + STOP_GRACE_S
        self.writer.stop()
        self.turn(0)
        while monotonic() < give_up_at and (self.threads.is_working()
                                            or any(conn.outbox for conn in self.connections.all)):
            self.turn(0.05)

    def turn(self, timeout_s):
        """Take one turn: wait up to `timeout_s` for bytes, handle the requests, write changes, send answers."""
        connections = self.connections
        eager, connections.eager, connections.handshakes = connections.eager, [], 0
        timeout_s = 0 if eager else max(0, timeout_s)
        self.store.awake_until = monotonic() + timeout_s
        selected = connections.selector.select(timeout_s)
        self.store.notice_sleep()
        for key, events in selected:
            if isinstance(key.data, Connection):
                self.guard(key.data, self.attend, key.data, events)
            else:
                key.data()
        for conn in eager:
            self.guard(conn, self.requests.read, conn)
        self.settle()

    def attend(self, conn, events):
        """Receive what a connection has sent; send the rest of its answer."""
        if events & 2 and conn.outbox:  # EVENT_WRITE
            self.connections.send(conn, b"")
        if events & 1 and not conn.outbox and conn.state != "closed" and self.connections.receive(conn):
            if conn.has_ended:
                return self.store.journal.flush()
            self.requests.read(conn)

    def guard(self, conn, action, *args):
        """Call `action` for a connection; an error in it, even a bug, ends only this connection."""
        try:
            action(*args)
        except Exception as error:
            if not isinstance(error, Busy):
                self.log.bug(error)
            self.connections.drop(conn)

    def take_back(self):
        """Continue with the connections that threads have given back."""
        self.waker.drain()
        while self.threads.returned:
            conn, next_step = self.threads.take_back()
            if next_step is None:
                self.connections.drop(conn)
            else:
                self.guard(conn, self.resume, conn, *next_step)

    def resume(self, conn, action, *args):
        """Listen again to a connection that a thread had, and do the next step."""
        conn.move("return")
        self.connections.register(conn)
        conn.heard_at = monotonic()
        action(conn, *args)

    def settle(self):
        """Have the journal written and the answers sent; then run the parked requests whose keys have changed."""
        if self.parked.give_up_at <= monotonic():
            self.requests.give_up(monotonic())
        while self.answers.waiting or self.store.changed_keys:
            ready = self.answers.take_ready()
            if not ready and not self.store.changed_keys:
                return  # the writer wakes the loop
            for row in ready:
                self.guard(row.conn, self.answers.deliver, *row)
            with self.store.lock:
                changed, self.store.changed_keys = self.store.changed_keys, set()
            for key in changed:
                self.requests.retry_all(key)

    def do_chores(self):
        """Do the chores that are due."""
        if monotonic() < self.due_at():
            return
        self.upkeep.run()
        self.stopping = self.stopping or self.upkeep.failure is not None
        if monotonic() >= min(self.connections.due_at, self.connections.swept_at + _SWEEP_S):
            self.connections.sweep()
            self.store.forget_unused()


def _raise_file_limit():
    """Raise the limit of open files to what the hard limit allows; return it."""
    try:
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_CONNECTIONS + _SPARE_FILES
        wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    except (ImportError, ValueError, OSError):  # there is no such limit, or it can't be raised
        return 256


def _port_owner(port):
    """Return words that say which process listens on a port, or "" if /proc does not tell."""
    import glob
    inodes = set()
    for name in glob.glob("/proc/net/tcp*"):
        with open(name) as file:
            rows = [line.split() for line in file]
        inodes |= {"socket:[%s]" % row[9] for row in rows
                   if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}  # 0A: listening
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) in inodes:
                return "; process %s has it" % link.split("/")[2]
        except OSError:  # the process is another user's, or gone
            continue
    return "; a process of another user has it" if inodes else ""


def _addresses(server, scheme):
    """Return the URLs under which the server can be reached."""
    host, port = server.listener.socket.getsockname()[:2]
    hosts = _names_of_host() if host in ("0.0.0.0", "::") else [host]
    return ["%s://%s:%d" % (scheme, "[%s]" % name if ":" in name else name, port) for name in hosts]


def _names_of_host():
    """Return this host's name and addresses, those first that other hosts can use.

    On many systems the host's name leads to a loopback address; then it comes after the other addresses."""
    import socket
    name, resolved = socket.gethostname(), set()
    try:
        resolved = {row[4][0] for row in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:  # this host can't resolve its own name
        pass
    outer = {address for address in resolved if not address.startswith("127.")}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # this sends nothing: the system only chooses the address to send from
            outer.add(sock.getsockname()[0])
        except OSError:  # there is no network
            pass
    names = [name] + sorted(outer) if outer & resolved else sorted(outer) + [name]
    return names + ["127.0.0.1"]


def _tls(certfile, keyfile):
    if not certfile:
        return None
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1 | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    try:
        context.load_cert_chain(certfile, keyfile)
    except (OSError, ssl.SSLError) as error:
        raise LabtaskerRuntimeError("can't use the certificate %s: %s" % (certfile, error))
    return context


Option = row_type("Option", "spelling kind default help")  # kind: a key of _OPTION_KINDS, or the choices


class Options:
    """The parameters of a table {name: Option} as attributes, with the given value or the row's default.

    Raises LabtaskerTypeError for a name that the table does not have."""

    def __init__(self, table, given):
        for name in given:
            if name not in table:
                raise LabtaskerTypeError("there is no option %r%s" % (name, hint(name, table)))
        vars(self).update((name, row.default if given.get(name) is None else given[name])
                          for name, row in table.items())


SERVE_OPTIONS = {  # each is a parameter of serve() and an option of the command
    "host": Option("--host ADDRESS", "text", "127.0.0.1", "address to listen on (127.0.0.1)"),
    "port": Option("--port N", "port", DEFAULT_PORT, "%d; 0 picks one" % DEFAULT_PORT),
    "db_path": Option("--db-path FILE", "path", None, "the journal (.labtasker/journal.jsonl)"),
    "fsync": Option("--fsync WHEN", tuple(FSYNC_MODES), "always",
                    "; ".join("%s: %s" % mode for mode in FSYNC_MODES.items())),
    "certfile": Option("--certfile FILE", "path", None, "TLS certificate"),
    "keyfile": Option("--keyfile FILE", "path", None, "its key"),
    "allow_hosts": Option("--allow-host NAME", "list", (), "another name under which browsers may use it (repeatable)"),
    "max_connections": Option("--max-connections N", "count", MAX_CONNECTIONS, "limit of open connections (%d, or the "
                              "system's); beyond it, the longest idle are closed" % MAX_CONNECTIONS),
    "log_level": Option("--log-level LEVEL", ("debug", "info", "warning", "error"), "info",
                        "debug|info|warning|error"),
    "daemon": Option("--daemon", "flag", False, "go to the background once it listens"),
    "takeover": Option("--takeover", "flag", False, "take the store from another host's server that is gone for good"),
}


def serve(db_path, advise=None, **given):
    """Serve until SIGTERM or Ctrl-C and return the exit code; as a daemon, return once it listens.

    `advise(store, urls)` returns more lines to print at the start; `given`: other parameters of SERVE_OPTIONS. Raises
    what keeps the server from starting."""
    options = Options(SERVE_OPTIONS, given)
    import warnings
    warnings.simplefilter("ignore")  # such as those of re about patterns in a client's filter: not for the log
    announce = None
    if options.daemon:
        folder = os.path.dirname(os.path.abspath(db_path))
        os.makedirs(folder, 0o700, exist_ok=True)
        announce = _to_background(os.path.join(folder, "server.log"))
        if announce is None:
            return 0
    try:
        return _serve_store(db_path, options, advise, announce)
    except Exception as error:
        if announce and not announce.closed:
            parts = getattr(error, "filename", None), getattr(error, "strerror", None) or error
            _announce(announce, why=": ".join(str(part) for part in parts if part))
        raise


def _serve_store(db_path, options, advise, announce):
    """Run a server until it stops; return its exit code."""
    store = Store(db_path, is_server=True, fsync=options.fsync)
    tls = _tls(options.certfile, options.keyfile)
    store.file.open(options.takeover)
    try:
        server = Server(options.host, options.port, store, tls, options.log_level, options.allow_hosts,
                        options.max_connections)
        try:
            _run_server(server, options.certfile, announce, advise)
            return 1 if server.upkeep.failure else 0
        finally:
            store.closing = True
            server.close()
            if (read_server_file(store.folder) or {}).get("server") == server.id:
                os.unlink(os.path.join(store.folder, "server.json"))
    finally:
        store.file.close()


def _to_background(log):
    """Fork a process without a terminal. Return in it the file for `_announce`; return None here once it listens.

    If it does not, raise a LabtaskerRuntimeError that says why."""
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    read_fd, write_fd = os.pipe()
    if os.fork():
        os.close(write_fd)
        os.close(log_fd)
        with os.fdopen(read_fd) as file:
            announced = json.loads(file.read() or "{}")
        if "text" not in announced:
            raise LabtaskerRuntimeError("the server did not start: %s; its log is %s" % (
                announced.get("why", "its process ended without a message"), log))
        return tell(announced["text"])
    os.close(read_fd)
    os.setsid()
    for fd, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log_fd), (2, log_fd)):
        os.dup2(source, fd)
    return os.fdopen(write_fd, "w")


def _announce(file, **outcome):
    """Tell the process that started a daemon that it listens, or why it does not."""
    with file:
        json.dump(outcome, file)


def _run_server(server, certfile, announce, advise):
    """Serve until a signal comes. server.json tells clients that can read it the address, and which certificate to
    trust."""
    import signal

    def stop(number, frame):
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        server.stopping = True
        server.wake()
    store, urls = server.store, _addresses(server, "https" if certfile else "http")
    facts = {"server": server.id, "key": server.key, "pid": os.getpid(), "host": os.uname().nodename,
             "host_id": host_id(), "addresses": urls, "started_at": format_time(now()), "version": __version__,
             "ca_file": certfile and os.path.abspath(certfile)}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    Disk.create(os.path.join(store.folder, "server.json"), [json.dumps(facts, indent=1).encode() + b"\n"])
    for notice in store.journal.file.notices:
        server.log.say("warning", notice)
    text = "labtasker: listening on %s, store %s" % (" ".join(urls), store.path)
    text += "".join("\n" + line for line in (advise(store, urls) if advise else ()))
    for line in text.split("\n"):
        server.log.write(as_started(line))
    if announce:
        _announce(announce, text=text)
    server.serve_forever()
    server.log.say("error" if server.upkeep.failure else "info", "stopped%s" % (
        ": " + server.upkeep.failure if server.upkeep.failure else ""))


# What the store's folder says of its server, without asking the server. announced: the content of server.json. owner:
# the entry of the store's last owner. place: where the server's process is: "here", "elsewhere" (on another host that
# has not released the store), or None if there is none.
Serving = row_type("Serving", "announced owner place")


def serving(path):
    """Return the Serving of a journal; raises OSError if its folder can't be read."""
    if not os.path.isdir(os.path.dirname(path)):
        return Serving({}, {}, None)
    owner, announced = Owner(os.path.realpath(path), False), read_server_file(os.path.dirname(path)) or {}
    last = owner.epochs()[-1:]
    entry = owner.read(last[0]) if last else {}
    if not entry.get("server") or entry.get("released"):
        return Serving(announced, entry, None)
    if entry.get("host_id") != owner.host_id:
        return Serving(announced, entry, "elsewhere")
    return Serving(announced, entry, "here" if process_start(entry.get("pid", 0)) == entry.get("started") else None)


def shows_life(path):
    """Return whether the owner of a journal changes its counter. Watches it for as long as a takeover would."""
    before, give_up_at = serving(path).owner, monotonic() + OWNER_LAPSE_S
    while monotonic() < give_up_at:
        if serving(path).owner != before:
            return True
        time.sleep(OWNER_LAPSE_S / 50)
    return False


def stop_process(owner, timeout_s):
    """Send SIGTERM to the process of a Serving's owner; return whether it has ended within `timeout_s`."""
    import signal
    pid, give_up_at = owner["pid"], monotonic() + timeout_s
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return True
    while process_start(pid) == owner.get("started"):
        if monotonic() >= give_up_at:
            return False
        time.sleep(0.05)
    return True


# 10. Client ##################################################################
#
# Where the store is (configuration), and how to reach it (two transports): without a server a request
# takes the same way, within this process. Reads no configuration and opens nothing before the first
# call. Uses 1, 4, 5, 7 to 9. Tests: test_client.py, test_network.py.

_EXTENSIONS = "Labtasker-Extensions"
CONFIG_NAME, _OLD_CONFIG_NAME = "config.toml", "client.toml"  # the second is that of Labtasker 1.0.1
_REQUEST_TIMEOUT_S = 60.0  # after which a silent server counts as away; long polls add their own time
PLAIN_LIMIT = 1000  # tasks that a server without the extensions lists, or updates, at a time
_REPEAT_AFTER_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # pauses before repeating a request whose connection broke

# Requests that must not be carried out twice: (the field with the id by which a server with the extensions recognizes
# a repeat, or None; the message if the answer was lost and a repeat is not safe). All others may be repeated.
ONCE = {
    "POST /api/v1/queues": (None, "the queue may have been created"),
    "PUT " + QUEUE_PATH: (None, "the queue may have been changed"),
    "DELETE " + QUEUE_PATH: (None, "the queue may be gone"),
    "POST " + TASKS_PATH: ("task_id", "the task may have been submitted"),
    "PUT " + TASKS_PATH: (None, "the tasks may have been updated"),
    "POST " + TASKS_PATH + "/next": ("fetch_id", "a task may have been fetched, and will fail when it times out"),
    "POST " + TASKS_PATH + "/{task_id}/status": ("run_id", "the report may have been taken"),
    "POST " + WORKERS_PATH: ("worker_id", "a worker may have been registered"),
    "POST " + WORKERS_PATH + "/{worker_id}/status": (None, "the worker may have its new status"),
}

Config = row_type("Config", "root url queue_name password heartbeat_interval_s source ca_file metrics",
                  (None, DEFAULT_QUEUE, None, 10.0, None, None, None))

# key in the file: (attribute of Config, environment variable, kind, meaning)
SETTINGS = {
    "endpoint.api_base_url": ("url", "LABTASKER_URL", str,
                              "http(s):// URL of a server, or a folder or file: URL of a store without one"),
    "endpoint.ca_file": ("ca_file", "LABTASKER_CA_FILE", str,
                         "certificates (PEM) to trust beside the system's: of an https:// server that signs its own"),
    "queue.queue_name": ("queue_name", "LABTASKER_QUEUE", str, "the queue; without any configuration: default"),
    "queue.password": ("password", "LABTASKER_PASSWORD", str, "its password; a store without a server asks none"),
    "task.heartbeat_interval": ("heartbeat_interval_s", None, float, "seconds between heartbeats; 10 unless given"),
}
METRICS = "metrics"  # the file's table of what every loop here looks for in output: {name, or `step`: pattern}
VARIABLES = {  # environment variables that are no setting: their meaning
    "LABTASKER_ROOT": "the configuration folder, instead of the nearest .labtasker",
    "LABTASKER_TRUST": "folders of other users that may hold a configuration or a store, with %s between" % os.pathsep,
    "LABTASKER_DEBUG": "1: an error shows its traceback",
}
_CONFIG_TEXT = """\
[endpoint]
api_base_url = %s

[queue]
queue_name = %s
password = %s

[task]
heartbeat_interval = 10  # seconds
"""


def nearest_with(name, is_there):
    """Return the nearest folder, from the working folder upward, for whose entry `name` `is_there(path)`; or None."""
    folder, inner = os.getcwd(), None
    while folder != inner:
        if is_there(os.path.join(folder, name)):
            return folder
        folder, inner = os.path.dirname(folder), folder
    return None


def find_root():
    """Return the configuration folder: LABTASKER_ROOT, else the nearest .labtasker upward, else the one to make here.

    Raises LabtaskerValueError if the one that was found belongs to another user."""
    if os.environ.get("LABTASKER_ROOT"):
        return os.path.abspath(os.environ["LABTASKER_ROOT"])
    found = nearest_with(".labtasker", os.path.isdir)
    root = os.path.join(found or os.getcwd(), ".labtasker")
    if found:
        check_owner(root, root)
    return root


def check_owner(path, folder):
    """Raise LabtaskerValueError if a file or folder that says where tasks and passwords go belongs to another user.

    The owner may be this user, root or, for a file in `folder`, the folder's owner; LABTASKER_TRUST allows any."""
    if not hasattr(os, "geteuid"):
        return
    allowed = {os.geteuid(), 0}
    try:
        owners = {os.lstat(path).st_uid, os.stat(path).st_uid}
        if path != folder:
            allowed.add(os.stat(folder).st_uid)
    except OSError:  # it is gone or unreachable; reading it will raise why
        return
    if owners <= allowed or _is_trusted(folder):
        return
    raise LabtaskerValueError(
        "%s belongs to another user, %s: it is not used, since it would say where your tasks and passwords go. If you "
        "trust that user: export LABTASKER_TRUST=%s; or make a store of your own: labtasker init" % (
            path, _user_name(min(owners - allowed)), folder))


def _is_trusted(folder):
    """Return whether LABTASKER_TRUST names a folder or its parent."""
    trusted = [os.path.realpath(path) for path in os.environ.get("LABTASKER_TRUST", "").split(os.pathsep) if path]
    return not {os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))}.isdisjoint(trusted)


def _user_name(uid):
    """Return a user's name and number, or the number alone if the system knows no name."""
    try:
        import pwd
        return "%s (%d)" % (pwd.getpwuid(uid).pw_name, uid)
    except (ImportError, KeyError):
        return str(uid)


BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"),
                    (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def decoded(data, name, kind=LabtaskerValueError):
    """Return the text of a file's bytes, which are UTF-8 unless a byte order mark says otherwise.

    Raises an error of the class `kind` with the file's `name` and the line that can't be decoded."""
    mark, encoding = next((pair for pair in BYTE_ORDER_MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    if encoding == "utf-8" and b"\0" in data:
        raise kind("%s line %d has a null character: if the file is UTF-16, save it as UTF-8" % (
            name, data.count(b"\n", 0, data.index(b"\0")) + 1))
    try:
        return data[len(mark):].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[len(mark):][:error.start].decode(encoding, "ignore").count("\n") + 1
        raise kind("%s line %d is not %s text (byte 0x%02x): save the file as UTF-8" % (
            name, line, encoding.upper()[:6].rstrip("-"), data[len(mark):][error.start])) from None


class _TomlReader:
    """Reads TOML text into `found`, {dotted key: value}, alike on all Pythons (only 3.11 and newer have a reader).

    Values are texts, numbers and booleans. Lists, dates and inline tables are refused in our own tables and skipped in
    all others. A mistake raises LabtaskerValueError with its line."""

    GAP, BLANK = Pattern(r"[ \t]*(?:#[^\n]*)?"), Pattern(r"(?:[ \t\n]|#[^\n]*)*")
    KEY = Pattern(r"""(?x) [ \t]* (?: ([A-Za-z0-9_-]+) | "([^"\\\n]*)" | '([^'\n]*)' ) [ \t]*""")
    TEXT = Pattern(r"""(?xs) \"\"\" \n? (?P<basics> (?:[^"\\] | \\. | "{1,2}(?!"))* "{0,2} ) \"\"\"
        | \'\'\' \n? (?P<literals> (?:[^'] | '{1,2}(?!'))* '{0,2} ) \'\'\'
        | "(?!"") (?P<basic> (?:[^"\\\n] | \\[^\n])*) " | '(?!\'\') (?P<literal> [^'\n]*) '""")
    WORD = Pattern(r"[A-Za-z0-9_.:+-]+(?: [0-9]{2}:[0-9:.Z+-]+)?")
    WHOLE = Pattern(r"[+-]?(?:0|[1-9](?:_?[0-9]){0,400})\Z")
    BASED = Pattern(r"0(?:x[0-9a-fA-F](?:_?[0-9a-fA-F])*|o[0-7](?:_?[0-7])*|b[01](?:_?[01])*)\Z")
    REAL = Pattern(r"[+-]?(?:(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9](?:_?[0-9])*)?(?:[eE][+-]?[0-9](?:_?[0-9])*)?|inf|nan)\Z")
    DATE = Pattern(r"(?:[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[Tt ][0-9:.]+(?:[Zz]|[+-][0-9:]+)?)?|[0-9]{2}:[0-9]{2}:[0-9.]+)\Z")
    ESCAPE = Pattern(r"(?s)\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|u([0-9a-fA-F]{4})"
                     r"|U([0-9a-fA-F]{8})|([ \t]*\n[ \t\n]*)|(.))")
    LETTERS = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}
    OTHER = object()  # a list, a date or an inline table

    def __init__(self, text, path, tables=()):
        self.text, self.path, self.tables = text.replace("\r\n", "\n") + "\n", path, tables  # the tables that are ours
        self.found, self.kinds, self.lines, self.table, self.i = {}, {}, {}, (), 0  # lines: {dotted path: number}
        try:
            while self.skip(self.BLANK) < len(self.text):
                (self.header if self.text[self.i] == "[" else self.setting)()
                if self.text[self.skip(self.GAP)] != "\n":
                    self.fail()
        except RecursionError:
            self.fail()

    def fail(self, why="a line is [table], key = \"text\", key = 10, or a # comment", i=None):
        """Raise LabtaskerValueError for the line at offset `i`; without it, for the current line."""
        i = min(self.i if i is None else i, len(self.text) - 1)
        begin = self.text.rfind("\n", 0, i) + 1
        raise LabtaskerValueError("%s line %d can't be read: %r; %s" % (
            self.path, self.text.count("\n", 0, i) + 1, self.text[begin:self.text.index("\n", i)][:80], why))

    def skip(self, pattern):
        """Advance behind the match of a pattern here and return the offset."""
        self.i = pattern.match(self.text, self.i).end()
        return self.i

    def take(self, word):
        """Return whether the text has this word here; if so, advance behind it."""
        is_there = self.text.startswith(word, self.i)
        self.i += len(word) * is_there
        return is_there

    def key(self):
        """Return the parts of a dotted key."""
        parts = []
        while not parts or self.take("."):
            match = self.KEY.match(self.text, self.i) or self.fail()
            parts.append(next(part for part in match.groups() if part is not None))
            self.i = match.end()
        return tuple(parts)

    def header(self):
        begin, is_list = self.i, self.text.startswith("[[", self.i)
        self.i += 1 + is_list
        path = self.key()
        if not self.take("]]" if is_list else "]"):
            self.fail()
        kind = self.kinds.get(path)
        if kind not in (None, "above") and not (kind == "list" and is_list):
            self.fail("this table is there twice", begin)
        if is_list and path[0] in self.tables:
            self.fail("this table is one, not a list of them", begin)
        if is_list:
            self.kinds = {key: kind for key, kind in self.kinds.items() if key[:len(path)] != path}
        self.note(path, "list" if is_list else "table", begin)
        self.table = path

    def note(self, path, kind, begin):
        """Remember the kind of a path; fail if the path is there twice or lies below a value."""
        parents = [path[:size] for size in range(1, len(path))]
        if self.kinds.get(path) in ("value", kind) or kind == "value" and path in self.kinds or any(
                self.kinds.get(parent) == "value" for parent in parents):
            self.fail("%s is there twice" % ".".join(path), begin)
        for parent in parents:
            self.kinds.setdefault(parent, "above")
        self.kinds[path] = kind
        self.lines.setdefault(".".join(path), self.text.count("\n", 0, begin) + 1)

    def setting(self):
        begin, path = self.i, self.table + self.key()
        if not self.take("="):
            self.fail()
        self.skip(self.GAP)
        value = self.value()
        if value is self.OTHER and path[0] in self.tables:
            self.fail("%s is a text, a number, true or false here" % ".".join(path), begin)
        self.note(path, "value", begin)
        if value is not self.OTHER:
            self.found[".".join(path)] = value

    def value(self):
        char = self.text[self.i]
        if char in "\"'":
            return self.string()
        if self.take("["):
            return self.items("]", self.value)
        if self.take("{"):
            return self.items("}", self.pair)
        match = self.WORD.match(self.text, self.i) or self.fail()
        word, self.i = match.group(), match.end()
        if word in ("true", "false"):
            return word == "true"
        for pattern, read in ((self.WHOLE, int), (self.BASED, lambda text: int(text, 0)), (self.REAL, float)):
            if pattern.match(word):
                return read(word.replace("_", ""))
        if not self.DATE.match(word):
            self.fail("%s is no text, number, true or false" % word[:80], match.start())
        return self.OTHER

    def items(self, end, read):
        """Skip a list or an inline table and return OTHER."""
        while self.skip(self.BLANK) < len(self.text) and not self.take(end):
            read()
            self.skip(self.BLANK)
            if not self.take(",") and not self.text.startswith(end, self.i):
                self.fail()
        if self.i >= len(self.text):
            self.fail()
        return self.OTHER

    def pair(self):
        self.key()
        if not self.take("="):
            self.fail()
        self.skip(self.GAP)
        self.value()

    def string(self):
        match = self.TEXT.match(self.text, self.i) or self.fail("a text is not closed")
        plain = match.group(match.lastgroup)
        found = plain if match.lastgroup.startswith("literal") else self.ESCAPE.sub(self.character, plain)
        self.i = match.end()
        return found

    def character(self, match):
        """Return the character of an escape."""
        high, low, short, long, gap, letter = match.groups()
        if high:
            return json.loads('"\\u%s\\u%s"' % (high, low))
        if gap is not None:
            return ""
        number = int(short or long or "0", 16)
        if number > sys.maxunicode or 0xd800 <= number < 0xe000 or letter and letter not in self.LETTERS:
            self.fail("%s is no character" % match.group())
        return self.LETTERS[letter] if letter else chr(number)


def read_toml(text, path):
    """Return {dotted key: value} of a TOML text as _TomlReader reads it, or raise LabtaskerValueError with the line."""
    return _TomlReader(text, path, {key.split(".")[0] for key in SETTINGS}).found


def _toml_text(text):
    """Return a text as TOML writes it, in one line; raises LabtaskerValueError where it is not Unicode."""
    if re.search("[\ud800-\udfff]", text):
        raise LabtaskerValueError("%r can't be written into the configuration, as it is not UTF-8 text" % text)
    return '"%s"' % re.sub(r'["\\]|[^ -~]', lambda match: "\\" + match.group() if match.group() in '"\\' else
                           "\\U%08x" % ord(match.group()), text)


def _read_settings(path):
    """Return {key: value} of a configuration file, or raise LabtaskerValueError with the line and the mistake.

    Settings that we do not know are allowed in the file of Labtasker 1.0.1 only."""
    try:
        with open_plain(path) as file:
            reader = _TomlReader(decoded(file.read(), path), path, {key.split(".")[0] for key in SETTINGS} | {METRICS})
    except OSError as error:
        raise LabtaskerValueError("%s can't be read: %s" % (path, error.strerror)) from None
    for key, line in reader.lines.items():
        is_value = reader.kinds.get(tuple(key.split(".")), "value") == "value"
        if key.split(".")[0] == METRICS:
            if is_value and type(reader.found.get(key)) is not str:
                raise LabtaskerValueError("%s line %d: %s should be a pattern, as text" % (path, line, key))
        elif key in SETTINGS:
            kind, value = SETTINGS[key][2], reader.found.get(key)
            if not (type(value) is str if kind is str else type(value) in (int, float) and 0 < value < math.inf):
                raise LabtaskerValueError("%s line %d: %s should be %s, not %r" % (
                    path, line, key, {str: "text", float: "a number over 0"}[kind], value))
        elif os.path.basename(path) == CONFIG_NAME and (
                is_value or not any(known.startswith(key + ".") for known in SETTINGS)):
            raise LabtaskerValueError("%s line %d: there is no setting %s%s; there are: %s" % (
                path, line, key, hint(key, SETTINGS), ", ".join(SETTINGS)))
    return reader.found


def flatten(mapping, prefix=""):
    """Yield (dotted key, value) for each leaf of nested dicts."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, prefix + key + ".")
        else:
            yield prefix + key, value


def load_config():
    """Return the Config in force: that of a loop in this process, else environment over file over defaults."""
    return _PINNED[-1].config if _PINNED else _read_config()


def config_sources():
    """Return {setting: the variable or the file that its value comes from}, without those that have their default."""
    config = _read_config()
    found = dict.fromkeys(_read_settings(config.source) if config.source else (), config.source)
    found.update((key, row[1]) for key, row in SETTINGS.items() if row[1] and os.environ.get(row[1]))
    return found


_PINNED = []  # a PinnedConfig for each loop under way in this process


class PinnedConfig:
    """A context that keeps the configuration and environment of its beginning for a loop, whatever a function does to
    os.environ or the working folder.

    `environ` is for the loop's own processes and has all settings, as the configuration file may be away later.
    `for_jobs` has those that came from the environment."""

    def __enter__(self):
        config = _read_config()
        files = {name: value and os.path.abspath(value) for name, value in (
            ("root", config.root), ("ca_file", config.ca_file))}
        if config.url and store_folder(config):  # a folder that is given as a URL may be away for a while
            files["url"] = "file:" + from_system(store_folder(config))
        self.config = config._replace(**files)
        self.for_jobs = {variable: os.environ[variable] for _, variable, _, _ in SETTINGS.values()
                     if os.environ.get(variable or "")}
        if "LABTASKER_CA_FILE" in self.for_jobs:
            self.for_jobs["LABTASKER_CA_FILE"] = self.config.ca_file
        if "url" in files:
            self.for_jobs["LABTASKER_URL"] = for_system(files["url"])
        self.for_jobs["LABTASKER_ROOT"] = self.config.root
        given = {variable: getattr(self.config, attribute) for attribute, variable, _, _ in SETTINGS.values()}
        self.environ = dict(os.environ, **{name: value for name, value in given.items() if name and value})
        self.environ["LABTASKER_ROOT"] = self.config.root
        _PINNED.append(self)
        return self

    def __exit__(self, *_):
        _PINNED.remove(self)


# All text is UTF-8, so that it means the same on all hosts. Under an ASCII locale (C, before Python 3.7) the functions
# of `os` use surrogate escapes instead; the two below convert.


def from_system(text):
    """Return text from `os` (a variable, a path), with its bytes read as UTF-8."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def for_system(text):
    """Return text (a path that was typed or read) in the form by which `os` gets its UTF-8 bytes."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _read_config():
    root = find_root()
    paths = [os.path.join(root, name) for name in (CONFIG_NAME, _OLD_CONFIG_NAME)]
    path = next(filter(os.path.lexists, paths), None)
    if path:
        check_owner(path, root)
    settings, values = _read_settings(path) if path else {}, {}
    for key, (attribute, variable, kind, _) in SETTINGS.items():
        value = from_system(os.environ.get(variable or "") or "") or settings.get(key)
        if value is not None and value != "":
            values[attribute] = for_system(value) if attribute == "ca_file" else kind(value)
    if "url" in values:
        values["url"] = checked_url(values["url"], _source_of_url(path))
    given = {key[len(METRICS) + 1:]: text for key, text in settings.items() if key.startswith(METRICS + ".")}
    return Config(root=root, source=path, metrics=given, **values)


def _source_of_url(path):
    return "LABTASKER_URL" if os.environ.get("LABTASKER_URL") else "%s: endpoint.api_base_url" % path


_SERVER_URL = Pattern(r"""(https?)://
    ( \[ [0-9a-f:.]+ (?:%[\w.-]+)? \] | [^\s/?\#@:\[\]\\"'<>]+ )
    (?: : ([0-9]{1,5}) )? ( (?:/[^\s?\#]*)? ) \Z""", re.IGNORECASE | re.VERBOSE)
_FILE_URL = Pattern(r"file:(?://(?:localhost)?(?=/)|(?!//))(.+)\Z", re.IGNORECASE | re.DOTALL)
_LIKE_URL = Pattern(r"[\s\"'<]*[\w+.-]*(?::|@.*:)|.*://", re.DOTALL)
_OF_WINDOWS = Pattern(r"[A-Za-z]:[\\/]" if os.name == "nt" else r"(?!)")  # a path with its drive


def checked_url(url, where):
    """Return the URL of a server or folder, or the path of a folder, in the form in which it is used.

    Raises LabtaskerValueError for anything else; the message names `where` it comes from."""
    server, folder, wrong = _SERVER_URL.match(url), _FILE_URL.match(url), None
    if server and 0 < int(server.group(3) or 80) < 65536:
        return server.group(1).lower() + url[len(server.group(1)):]
    if folder:
        return "file:" + folder.group(1)
    if _OF_WINDOWS.match(url):
        return url
    if "@" in url and _LIKE_URL.match(url):
        wrong = "has a name or a password in it: set LABTASKER_QUEUE and LABTASKER_PASSWORD instead"
    elif re.match(r"(?i)https?:", url):
        wrong = "is no URL that can be used: one is http://HOST:PORT, or https://, with a port from 1 to 65535"
    elif _LIKE_URL.match(url) or not url.strip():
        wrong = _NO_URL
    if wrong:
        shown = without_login(url) if "://" in url else url.rpartition("@")[2]
        raise LabtaskerValueError("%s: %s %s" % (where, shown, wrong))
    return url


_NO_URL = "is neither a URL (http://HOST:PORT, https://, file:FOLDER) nor a folder that is there"


def write_config(root, url, queue_name, password):
    """Write the configuration file and return its path; only its owner can read a new one."""
    Disk.make_folder(root)
    path, values = os.path.join(root, CONFIG_NAME), (url, queue_name, password)
    text = (_CONFIG_TEXT % tuple(_toml_text(value or "") for value in values)).encode("utf-8")
    Disk.create(path, [text], keep=0o770)  # never readable for everybody: it has a password
    return path


# Transports. Each has `where`, `extensions`, call(method, path, query, body) -> (status, answer), and
# listen(after, timeout_s) -> (status, Lines of events, or the answer of a refusal).


class Lines:
    """The lines of a stream of events, made from pieces of bytes as they come; `close`, from any thread, ends them."""

    def __init__(self, pieces, close):
        self.pieces, self.close = pieces, close

    def __iter__(self):
        rest = b""
        for piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines


class StoreTransport:
    """The store in a folder, which this process opens for one operation at a time."""

    extensions = True
    is_beside = None  # what `is_beside_store` has found

    def __init__(self, folder, queue_name):
        self.store = Store(os.path.join(folder, "journal.jsonl"))
        self.where, self.queue_name = self.store.path, LocalName(queue_name)

    def call(self, method, path, query, body):
        """Return (status, answer) of a request, whose body is parsed from JSON as if it had come over HTTP."""
        body = None if body is None else parse_json(body)
        return answer_call(self.store, lambda: self.queue_name, method, path, body, query)

    def listen(self, after, timeout_s):
        """Return (status, Lines of the queue's events after the one with the id `after`).

        The lines end soon after a server takes the store, so that the listener connects to the server."""
        self.store.file.LOCK_TIMEOUT_S = 1.0
        status, answer = self.call("GET", QUEUE_PATH + "/events", {"last_event_id": after}, None)
        if isinstance(answer, Stream):
            answer = Lines(answer.pieces, lambda: setattr(self.store, "closing", True))
        return status, answer

    def is_intact(self):
        """Return whether the store's open descriptors still refer to its files."""
        for part in (self.store.file.file_lock, self.store.journal.file):
            try:
                if part.fd is not None and os.path.exists(part.path) and not os.path.samestat(
                        os.fstat(part.fd), os.stat(part.path)):  # a path that does not exist is away, not lost
                    return False
            except OSError:
                return False
        return True

    def close(self):
        """Close the store."""
        self.store.file.close()


class _Exchange:
    """One request to a server. `is_sent`: all of it was handed to the system, so the server may have acted.

    `sock`: the socket on which it was sent."""

    def __init__(self, method, target, body, timeout_s):
        self.method, self.target, self.timeout_s = method, target, timeout_s
        self.data, self.is_sent, self.sock = None if body is None else body.encode(), False, None


def _is_of_protocol(method, path, status, answer):
    """Return whether a Labtasker server can have sent this answer; a proxy may have sent it instead."""
    if status != 204:
        is_null = answer == "null" and method == "POST" and path.endswith("/status")  # as a 1.0.1 server answers it
        return 200 <= status < 300 and (isinstance(answer, dict) or is_null) and method != "DELETE"
    return find_route(method, path)[0].status == 204


def _basic(name, password):
    """Return the Authorization header's value for a name and a password."""
    from binascii import b2a_base64
    token = b2a_base64(("%s:%s" % (name, password)).encode("utf-8", "surrogatepass"), newline=False)
    return "Basic " + token.decode()


def _is_of_http(error):
    """Return whether an error is one of http.client's, without importing http.client."""
    return type(error).__module__ == "http.client"


def _is_of_connection(error):
    """Return whether an error comes from a connection."""
    return isinstance(error, (OSError, UnicodeError)) or _is_of_http(error)  # UnicodeError: an invalid host name


class _PlainConnection:
    """A connection for one request. It needs no import: importing http.client takes longer than a short command does
    otherwise. Speaks HTTP/1.0, so that the answer ends with the connection."""

    def __init__(self, url, ca_file, timeout_s):
        import socket
        host, port, self.prefix = _URL_OF_HTTP.match(url).groups("")
        self.url = url
        address = host.strip("[]").encode(), int(port or 80)  # a host given as str would import encodings.idna
        self.sock = socket.create_connection(address, timeout_s)

    def is_usable(self):
        """Return whether it is still open."""
        return not ready([self.sock], 0)

    def send(self, method, target, headers, data, timeout_s, is_last=True):
        """Send a request; raise OSError if the system did not take all of it."""
        lines = ["%s %s%s HTTP/1.%d" % (method, self.prefix, target, not is_last),
                 "Host: " + self.url[7:].partition("/")[0], "Content-Length: %d" % len(data or b"")]
        lines += ["%s: %s" % pair for pair in headers.items()]
        self.sock.settimeout(timeout_s)
        self.sock.sendall("\r\n".join(lines + ["", ""]).encode() + (data or b""))

    def answer(self, limit=None):
        """Return (status, the header of extensions, content), or raise ConnectionError if the answer is cut off.

        With a `limit` in bytes the time-out is for the whole answer; without, it is for each wait."""
        got, give_up_at = bytearray(), monotonic() + self.sock.gettimeout()
        while limit is None or len(got) < limit:
            if limit:
                self.sock.settimeout(max(0.001, give_up_at - monotonic()))
            piece = self.sock.recv(65536)
            got += piece
            found = self._whole(got, "" if piece and not limit else "0")
            if found:
                return found
            if not piece:
                raise ConnectionError("the answer was cut off" if got else "the connection was closed")
        raise NotOurServer("the answer of %s is not that of a Labtasker server" % self.url)

    def _whole(self, got, default_length):
        """Return the result of `answer` once `got` has all of it; None before."""
        end = got.find(b"\r\n\r\n")
        first, *lines = got[:max(0, end)].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = headers.get("content-length", default_length)
        if end < 0 or not re.match("[0-9]{1,18}\\Z", length) or len(got) - end - 4 < int(length):
            return None
        if not re.match(r"HTTP/1\.[01] [0-9]{3}\b", first):
            raise LabtaskerConnectError("%s does not speak HTTP: is it a Labtasker server?" % self.url)
        return int(first[9:12]), headers.get(_EXTENSIONS.lower()), bytes(got[end + 4:])

    def close(self):
        """Close it."""
        self.sock.close()


class _KeptConnection:
    """A connection over http.client, for one request after another, with the methods of _PlainConnection."""

    def __init__(self, url, ca_file, timeout_s):
        import http.client
        from urllib.parse import unquote
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        self.prefix, host = slash + path, unquote(host)
        if scheme == "http":
            self.http = http.client.HTTPConnection(host, timeout=timeout_s)
        else:
            self.http = http.client.HTTPSConnection(host, timeout=timeout_s, context=_tls_context(ca_file))
        self.http.auto_open = False  # a closed connection must not be opened again without a proof
        self.http.connect()

    @property
    def sock(self):
        """The socket, None once it is closed."""
        return self.http.sock

    def is_usable(self):
        return self.sock is not None and not ready([self.sock], 0)

    def send(self, method, target, headers, data, timeout_s, is_last=False):
        self.sock.settimeout(timeout_s)
        self.http.request(method, self.prefix + target, data, headers)

    def answer(self, limit=None):
        response = self.http.getresponse()
        is_whole = response.chunked or response.length is not None
        content = response.read(limit)
        if not (content or is_whole):  # the headers were cut off, which http.client does not notice
            raise ConnectionError("the answer was cut off")
        return response.status, response.headers.get(_EXTENSIONS), content

    def close(self):
        self.http.close()


def _tls_context(ca_file):
    """Return the context that checks a server's certificate; raise LabtaskerValueError if `ca_file` can't be used."""
    import ssl
    context = ssl.create_default_context()
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        raise LabtaskerValueError("can't use the certificates in %s (ca_file): %s" % (ca_file, error)) from None
    return context


class HttpTransport:
    """A server over HTTP. The first requests of a process to an http:// URL use a _PlainConnection each; later ones use
    a _KeptConnection, one for each thread."""

    SINGLE = 2  # requests before http.client is imported
    INTRODUCTION_S = 15.0  # in which a server must prove that it has the key
    MAX_WELCOME_BYTES = 65536  # read from a server that has not proved it
    is_beside = None  # the answer of `is_beside_store`, once known

    def __init__(self, url, queue_name, password, ca_file=None, key=None):
        self.url = self.where = url.rstrip("/")
        self.ca_file, self.queue_name, self.key = ca_file, queue_name, key
        self.headers = {"Content-Type": "application/json", _EXTENSIONS: "1"}
        if not key:  # with a key each connection gets its own login, after a proof
            self.headers["Authorization"] = _basic(queue_name, password)
        self.extensions = None  # unknown before the first answer
        self.plain = _URL_OF_HTTP.match(self.url)  # None: https, or a URL that only http.client can read
        self.asked, self.kept = 0, threading.local()
        self.reached = []  # plain connections that wait for their request
        self.under_way = {}  # thread: its Exchange

    def call(self, method, path, query, body):
        """Return (status, answer), or raise LabtaskerConnectError if the server can't be reached.

        A request whose connection broke is repeated. If it may have arrived, it is repeated only if ONCE allows it."""
        given, lost = {name: str(value).lower() if value is True or value is False else value
                       for name, value in (query or {}).items() if value is not None}, False
        target = path
        if given:
            from urllib.parse import urlencode
            target += "?" + urlencode(given)
        if not _TARGET.match(target):
            raise LabtaskerConnectError("can't ask %s for %s: a URL has no spaces, no control characters, and nothing "
                                        "but ASCII" % (self.url, ascii(target)))
        for pause_s in _REPEAT_AFTER_S + (None,):
            asked = _Exchange(method, target, body, _REQUEST_TIMEOUT_S + float(given.get("wait_s", 0)))
            self.under_way[threading.get_ident()] = asked
            try:
                status, answer = self._ask(asked)
            except Exception as error:
                if not _is_of_connection(error):
                    raise
                self.close()
                lost = lost or asked.is_sent
                try:
                    self._check_repeat(method, path, body, error, lost, pause_s)
                except LabtaskerConnectError as failure:
                    failure.is_sent = lost
                    raise
                time.sleep(pause_s)
            else:
                gone = lost and method == "DELETE" and status == 404  # deleted by the request whose answer was lost
                return (204, None) if gone else (status, answer)

    def _ask(self, asked):
        """Return (status, answer) of an Exchange, or raise the connection's error, also if the answer is cut off."""
        self.asked += 1
        is_plain = self.plain and self.asked <= self.SINGLE
        connection = self._plain_connection(asked.timeout_s) if is_plain else self._kept_connection(asked.timeout_s)
        try:
            connection.send(asked.method, asked.target, dict(self.headers, **connection.login), asked.data,
                            asked.timeout_s)
            asked.is_sent, asked.sock = True, connection.sock
            status, extensions, content = connection.answer()
        finally:
            if is_plain:
                connection.close()
        if extensions or (status != 204 and status < 500):  # the headers of an empty answer may be cut off
            self.extensions = extensions == "1"
        return status, self._checked(asked, status, content)

    def _checked(self, asked, status, content):
        """Return the answer in `content`; raise LabtaskerConnectError if no Labtasker server can have sent it."""
        try:
            answer = json.loads(content.decode()) if content else None
        except ValueError:
            answer = content
        given = "null" if content == b"null" else answer
        if status < 400 and not _is_of_protocol(asked.method, asked.target.partition("?")[0], status, given):
            raise LabtaskerConnectError("%s answered %s %s with %s and %s: is it a Labtasker server?" % (
                self.url, asked.method, asked.target.partition("?")[0], status,
                "what is no JSON object" if content else "nothing else"))
        if status >= 400 and answer is content:  # a proxy's page, or a bug of a 1.0.1 server
            return {"detail": content[:200].decode("utf-8", "replace")}
        return answer

    def _plain_connection(self, timeout_s):
        """Return a plain connection: one that is open and unused, or a new one."""
        while self.reached:
            connection = self.reached.pop()
            if connection.is_usable():
                return connection
            connection.close()
        return self._connect(_PlainConnection, timeout_s)

    def _kept_connection(self, timeout_s):
        """Return this thread's connection, which is a new one if the last was closed."""
        connection = getattr(self.kept, "connection", None)
        if connection is None or not connection.is_usable():
            if connection is not None:
                connection.close()
            connection = self.kept.connection = self._connect(_KeptConnection, timeout_s)
        return connection

    def _connect(self, kind, timeout_s):
        """Return a new connection, with the server's proof checked. `login` is its own Authorization header, or {}."""
        connection = kind(self.url, self.ca_file, self.INTRODUCTION_S if self.key else timeout_s)
        try:
            connection.login = {"Authorization": self._introduce(connection)} if self.key else {}
        except Exception:
            connection.close()
            raise
        return connection

    def _introduce(self, connection):
        """Return the Authorization for a connection, once the server has proved that it has the key.

        Else raise NotOurServer; by then only a random number was sent."""
        nonce, address = new_nonce(), connection.sock.getpeername()
        connection.send("GET", "/?nonce=" + nonce, self.headers, None, self.INTRODUCTION_S, is_last=False)
        _, extensions, content = connection.answer(self.MAX_WELCOME_BYTES)
        try:
            welcome = json.loads(content.decode())
        except (ValueError, RecursionError):
            welcome = None
        welcome = welcome if isinstance(welcome, dict) else {}
        nonces = nonce, str(welcome.get("nonce"))
        if welcome.get("proof") != prove(self.key, "server", nonces, address):  # new each time: timing reveals nothing
            raise NotOurServer("%s answers, but does not prove that it is the server of the store: it may have the "
                               "port of one that was killed, or the address leads elsewhere" % self.url)
        self.extensions = extensions == "1"
        return _basic(self.queue_name, prove(self.key, "client", nonces, address))

    def is_of_store(self):
        """Return whether a server answers; raise NotOurServer if it does not prove that it has the key.

        The connection is kept for the first request."""
        try:
            if self.plain:
                self.reached.append(self._connect(_PlainConnection, self.INTRODUCTION_S))
            else:
                self.kept.connection = self._connect(_KeptConnection, self.INTRODUCTION_S)
            return True
        except NotOurServer:
            raise
        except Exception as error:
            if not (_is_of_connection(error) or isinstance(error, LabtaskerConnectError)):
                raise
            return False

    def _check_repeat(self, method, path, body, error, lost, pause_s):
        """Raise LabtaskerConnectError if a request that failed with `error` must not be repeated."""
        risk = lost and self._risk(method, path, body)
        if risk:
            raise LabtaskerConnectError("the connection to %s broke before the answer came (%s): %s; check before you "
                                        "repeat it" % (self.url, str(error) or type(error).__name__, risk)) from None
        broken = isinstance(error, ConnectionError) or _is_of_http(error) or type(error).__name__ == "SSLEOFError"
        if pause_s is None or not broken or isinstance(error, ConnectionRefusedError):
            raise self.away(error) from None

    def _risk(self, method, path, body):
        """Return what the server may have done and must not do twice, as a message; or None."""
        field, words = next((ONCE[method + " " + template] for template, _ in path_readings(path)
                             if method + " " + template in ONCE), (None, None))
        if not field:
            return words
        if self.extensions is None:
            try:
                self.call("GET", "/health", None, None)
            except LabtaskerConnectError:
                return words
        given = json.loads(body)
        has_ids = all(item.get(field) for item in (given if isinstance(given, list) else [given]))
        return None if self.extensions and has_ids else words

    def away(self, error):
        """Return the LabtaskerConnectError for an error of a connection."""
        return LabtaskerConnectError(
            "no answer from %s (%s): is the server running? Start it with 'labtasker serve', or fix the URL with "
            "'labtasker init'" % (self.url, str(error) or type(error).__name__))

    def listen(self, after, timeout_s):
        """Return (status, _RemoteLines of the queue's events after the one with the id `after`).

        Raises LabtaskerConnectError if there is no answer within `timeout_s`."""
        headers = dict(self.headers, Accept="text/event-stream", **({"Last-Event-ID": after} if after else {}))
        connection, is_stream = None, False
        try:
            connection = self._connect(_KeptConnection, timeout_s)
            sock = connection.sock
            connection.send("GET", QUEUE_PATH + "/events", dict(headers, **connection.login), None, timeout_s)
            response = connection.http.getresponse()
            if response.status >= 400:
                return response.status, json.loads(response.read().decode())
            if response.status != 200 or "text/event-stream" not in response.getheader("Content-Type", ""):
                raise ValueError("it answered with %d and no events: is it a Labtasker server?" % response.status)
            sock.settimeout(_REQUEST_TIMEOUT_S)
            is_stream = True
        except Exception as error:
            if not (_is_of_connection(error) or isinstance(error, ValueError)):
                raise
            raise self.away(error) from None
        finally:
            if connection is not None and not is_stream:
                connection.close()
        self.extensions = response.getheader(_EXTENSIONS) == "1"
        return 200, _RemoteLines(sock, response)

    @staticmethod
    def is_intact():
        """Return True: its only descriptors are connections, which `client_held` checks."""
        return True

    def close(self):
        """Close this thread's connection."""
        while self.reached:
            self.reached.pop().close()
        connection = self.kept.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()


_URL_OF_HTTP = Pattern(r"http://([\w.-]+|\[[0-9a-fA-F:.]+\])(?::([0-9]{1,5}))?(/[\w./~-]*)?\Z", re.ASCII)
_TARGET = Pattern(r"[!-~]+\Z")  # no character that could end the request line


class _RemoteLines:
    """The lines of a server's stream of events; they end with the connection."""

    def __init__(self, sock, response):
        self.sock, self.response = sock, response

    def __iter__(self):
        from http.client import HTTPException
        try:
            for line in self.response:
                yield line
        except (OSError, HTTPException, ValueError):  # the server is gone, or was silent for too long
            pass
        finally:
            self.response.close()
            self.sock.close()

    def close(self):
        """End the lines; from any thread."""
        try:
            self.sock.shutdown(2)
        except OSError:  # it is closed already
            pass


def ready(files, timeout_s=None, is_output=False):
    """Return the files that can be read (or written), as soon as there is one, or [] after `timeout_s` (None: never).

    Unlike select(), which refuses descriptors over 1,023, it takes any descriptor."""
    import select
    if not hasattr(select, "poll"):  # Windows
        found = select.select([] if is_output else files, files if is_output else [], [], timeout_s)
        return found[0] + found[1]
    poll, numbers = select.poll(), {file if isinstance(file, int) else file.fileno(): file for file in files}
    for number in numbers:
        poll.register(number, select.POLLOUT if is_output else select.POLLIN)
    timeout_ms = None if timeout_s is None else math.ceil(max(0.0, min(timeout_s, 1e6)) * 1000)
    return [numbers[number] for number, _ in poll.poll(timeout_ms)]


def _as_json(value):
    """Return the JSON text of a request's body, or raise LabtaskerTypeError naming the value that can't be sent."""
    try:
        text = _to_json_text(value)
        if not _LONG_NUMBER.search(text):  # Plain finds the numbers that a store can't keep, and where they are
            return text
    except (TypeError, ValueError, RecursionError):
        pass
    return json.dumps(Plain(refuse_odd).value(value, []))


_LONG_NUMBER = Pattern(r"[0-9][0-9]{18}")  # its first digit apart: the search then skips what is none
_to_json_text = json_writer()


def plain_summary(summary):
    """Return a summary in JSON types with valid keys.

    It never raises, so that no finished run fails for its numbers: a value that can't be JSON becomes its repr, an
    invalid key is changed, and stderr says so."""
    if summary is None:
        return None
    warnings = []

    def odd(value, where, why):
        warnings.append("%s is kept as text, as %s" % (".".join(["summary"] + where), why))
        return repr_of(value)
    try:
        found = Plain(odd).value(summary, [])
        found = _fitting(found if isinstance(found, dict) else {"value": found}, warnings)
        try:
            found = unflatten(found, "summary")
        except InvalidFields:
            found = unflatten(_with_keys(found, warnings), "summary")
    except Exception as error:
        warnings.append("the summary is kept as text: %s: %s" % (type(error).__name__, error))
        found = {"value": repr_of(summary)}
    for text in warnings[:20]:
        tell("labtasker: " + text)
    return found


def _fitting(summary, warnings):
    """Return a summary that fits into a request; the largest values of a larger one become text."""
    texts = {key: json.dumps(value) for key, value in summary.items()}
    while sum(map(len, texts.values())) > MAX_BODY_BYTES // 2 or sum(
            text.count("[") + text.count("{") for text in texts.values()) > MAX_CONTAINERS // 2:
        largest = max(texts, key=lambda key: len(texts[key]))
        if len(texts[largest]) <= REPR_LIMIT:
            raise ValueError("it has too many keys")
        warnings.append("summary.%s is kept as text, as it is too large" % largest)
        summary[largest] = texts[largest][:REPR_LIMIT - 10]
        texts[largest] = json.dumps(summary[largest])
    return summary


def _with_keys(value, warnings):
    """Return a value of a summary with valid keys, each path set once."""
    if isinstance(value, list):
        return [_with_keys(item, warnings) for item in value]
    if not isinstance(value, dict):
        return value
    tree = {}
    for key, item in value.items():
        item = _with_keys(item, warnings)
        name = ".".join(part or "_" for part in _UNKEPT.sub("_", key).split("."))
        flat_name = name.replace(".", "_")
        names = itertools.chain([name, flat_name], (flat_name + "_%d" % number for number in itertools.count(2)))
        kept = next(each for each in names if _put(tree, each.split("."), item))
        if kept != key:
            warnings.append("the key %s of the summary is kept as %s" % (repr_of(key), kept))
    return tree


def _put(tree, path, item):
    """Put `item` at a path of nested dicts; return whether that was possible without overwriting anything."""
    if len(path) > MAX_DEPTH // 3:
        return False
    node, last = tree, path[-1]
    for part in path[:-1]:
        node = node.get(part, {})
        if not isinstance(node, dict):
            return False
    if last in node:
        pairs = list(item.items()) if isinstance(item, dict) and item and isinstance(node[last], dict) else []
        return bool(pairs) and not set(item) & set(node[last]) and not node[last].update(item)
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[last] = item
    return True


_UNKEPT = Pattern("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # characters that a key can't have


class Client:
    """A queue, reached through a transport."""

    def __init__(self, transport):
        self.transport, self.pid = transport, os.getpid()

    @property
    def where(self):
        """The server's URL or the journal's path, for messages."""
        return self.transport.where

    @property
    def extensions(self):
        """Whether the server has the extensions of the plain protocol."""
        if self.transport.extensions is None:
            self.call("GET", "/health")
        return self.transport.extensions

    def call(self, method, path, body=None, query=None):
        """Return the decoded answer (None if it is empty), or raise LabtaskerHTTPStatusError or LabtaskerConnectError.

        A server of the plain protocol is sent no extensions."""
        sent, query = self._plain(method, path, body, query)
        sent = None if sent is None else _as_json(sent)
        try:
            status, answer = self.transport.call(method, path, query, sent)
        except InvalidFields as error:
            status, answer = error.status, {"detail": error.detail}
        if status == 503 and isinstance(self.transport, StoreTransport) and self.go_to_server(
                os.path.dirname(self.where), self.transport.queue_name):
            return self.call(method, path, body, query)
        return self._checked(status, answer, path)

    def listen(self, after, timeout_s):
        """Return the Lines of the queue's events after the one with the id `after`; raise as `call` does."""
        return self._checked(*self.transport.listen(after, timeout_s), path=QUEUE_PATH + "/events")

    def _plain(self, method, path, body, query):
        """Return body and query, without the fields that are extensions if the server has none."""
        ours = () if self.transport.extensions else OUR_FIELDS.get((method, path.rsplit("/", 1)[-1]), ())
        if not any(name in (fields or ()) for name in ours for fields in (body, query)) or self.extensions:
            return body, query
        return [fields and {name: value for name, value in fields.items() if name not in ours}
                for fields in (body, query)]

    def _checked(self, status, answer, path):
        """Print the notifications of an answer and return it, or raise the error of a refusal."""
        fields = answer if isinstance(answer, dict) else {}
        if status < 400:
            for note in fields.get("notification") or ():
                tell("labtasker: %s: %s" % (note.get("type", "info"), note.get("details", "")))
            return answer
        detail = fields.get("detail", answer)
        if status == 403 and path.endswith("/tasks/next"):
            raise WorkerSuspended(detail_text(detail))
        raise LabtaskerHTTPStatusError(status, detail, getattr(self.transport, "url", None))

    def go_to_server(self, folder, queue_name):
        """Use the server that holds the store in `folder` from now on; return whether there is one."""
        found = living_server(folder, queue_name)
        if found:
            self.transport.close()
            self.transport = found
        return bool(found)


def _our_fields(route):
    return frozenset(name for fields in (route.fields, route.query) for name, arg in fields.items() if arg.is_ours)


# (method, last word of a route's path): the fields that are sent only to a server with the extensions
OUR_FIELDS = {(key.split(" ")[0], key.rsplit("/", 1)[-1]): _our_fields(route)
              for key, route in ROUTES.items() if _our_fields(route)}

_client = None


def client():
    """Return this process's Client. It is made from the configuration at the first use, and again after a fork."""
    global _client
    if _client is None or _client.pid != os.getpid():
        hold_standard_streams()
        _check_root()
        _client = Client(transport_for(load_config()))
        _rely_on_loops_store(_client.transport)
        if not _at_exit:
            import atexit
            _at_exit.append(atexit.register(_give_up_store))
    return _client


def hold_standard_streams():
    """Open those of stdin, stdout and stderr that are closed, so that no file of ours gets their number and output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, the lowest that is free


class Held:
    """Descriptors of ours, and what identifies their files: a job's function may close all descriptors, and other files
    then get their numbers."""

    LOST = []  # objects that lost their descriptors; never freed, as closing them would close another file

    def __init__(self, *numbers):
        self.places = {number: self._place(number) for number in numbers}

    @staticmethod
    def _place(number):
        try:
            found = os.fstat(number)
            return found.st_dev, found.st_ino, found.st_mode
        except (OSError, ValueError):
            return None

    def is_intact(self):
        """Return whether all are open and refer to the same files as before."""
        return all(place and place == self._place(number) for number, place in self.places.items())


def drop_lost_client(held):
    """Have this process make a new Client if others closed descriptors of the old one: its store's, or those in `held`
    (of `client_held`)."""
    global _client
    if _client and not (held.is_intact() and _client.transport.is_intact()):
        Held.LOST.append(_client)
        _client = None


def client_held():
    """Return the Held of the connections that the threads of this process use."""
    under_way = getattr(_client.transport, "under_way", {}) if _client else {}
    numbers = [asked.sock.fileno() for asked in list(under_way.values()) if asked.sock]
    return Held(*[number for number in numbers if number >= 0])


def _check_root():
    """Raise StoreUnavailable in a job whose configuration is gone; it was there when the loop began the job. An empty
    folder in its place, as where a file system is away, must not become a new store."""
    root, source = os.environ.get("LABTASKER_ROOT"), os.environ.get("LABTASKER_SOURCE")
    if root and os.environ.get("LABTASKER_RUN_ID"):
        if not os.path.isdir(root) or source and not os.path.exists(source):
            raise StoreUnavailable(AWAY % (source or root))


def _rely_on_loops_store(transport):
    """In a job, treat the loop's store (without a server) as away, not as new, if it is not there."""
    store_id, _, folder = os.environ.get("LABTASKER_STORE", "").partition(" ")
    if store_id and isinstance(transport, StoreTransport) and transport.store.folder == folder:
        transport.store.file.expected = store_id


_at_exit = []


def _give_up_store():
    """Allow other hosts to take the store that this process used without a server; this process may still use it."""
    transport = _client and _client.transport
    if isinstance(transport, StoreTransport):
        transport.store.file.release()


def use_client(other):
    """Have this process use another Client; with None, one made from the current configuration."""
    global _client
    _client = other


def store_folder(config):
    """Return the folder of the configured store, or None if a server's URL is configured."""
    if re.match(r"https?://", config.url or ""):
        return None
    folder = for_system(re.sub(r"^file:", "", config.url)) if config.url else config.root
    return os.path.normpath(os.path.join(os.path.dirname(config.root), folder))


def missing_store(config):
    """Return a message if the configuration names a store's folder that does not exist, else None.

    The default folder, .labtasker here, may be missing: the first submission makes it."""
    folder, source = store_folder(config), config.url and _source_of_url(config.source)
    if not folder or os.path.isdir(folder) or not (config.url or os.environ.get("LABTASKER_ROOT")):
        return None
    if config.url and not config.url.startswith("file:"):
        return "%s: %s %s" % (source, config.url, _NO_URL)
    return "%s: there is no folder %s; a task that is submitted makes it anew" % (source or "LABTASKER_ROOT", folder)


def transport_for(config):
    """Return the transport to the queue: to the configured URL, to the folder's running server, or to its file."""
    folder = store_folder(config)
    if folder:
        if config.url and not config.url.startswith("file:") and missing_store(config):
            raise LabtaskerValueError(missing_store(config))
        return living_server(folder, config.queue_name) or StoreTransport(folder, config.queue_name)
    if not config.password:
        raise LabtaskerValueError("no password for queue %r on %s: set LABTASKER_PASSWORD, or run 'labtasker init'"
                                  % (config.queue_name, config.url))
    return HttpTransport(config.url, config.queue_name, config.password, config.ca_file)


def living_server(folder, queue_name):
    """Return the HttpTransport of the server that holds the store in `folder`, or None.

    A killed server leaves its server.json, and another program may get its port, so whoever listens has to prove that
    it has the key. If none of the addresses does, one message says so."""
    check_owner(os.path.join(folder, "server.json"), folder)
    record, complaint = read_server_file(folder) or {}, None
    if not record.get("key"):
        return None
    for url in record.get("addresses", ()):
        transport = HttpTransport(url, queue_name, None, record.get("ca_file"), record["key"])
        try:
            if transport.is_of_store():
                return transport
        except NotOurServer as error:
            complaint = str(error)
    if complaint and complaint not in _SPOKEN_OF:
        _SPOKEN_OF.add(complaint)
        tell("labtasker: " + complaint)
    return None


_SPOKEN_OF = set()  # messages about such servers that this process has printed


def rediscover_server():
    """Have this process use the server that the configured folder names now, as the server may have moved.

    The store itself is never opened while its server is away: that would keep the server from returning elsewhere."""
    config = load_config()
    folder = store_folder(config)
    if folder:
        try:
            client().go_to_server(folder, config.queue_name)
        except StoreUnavailable:  # the configuration folder of a job's loop is away
            pass


# 11. Functions ###############################################################
#
# The public functions: what they take, the requests that they make, and what they return. One for each
# row of ROUTES that a user calls, and what is made of several. Uses 1 to 8, 10.
# Tests: test_client.py, test_skill.py, test_table.py, test_events.py.

_CHUNK_TASKS = 5000  # tasks that submit_tasks sends in one transaction

if TYPE_CHECKING:
    _Status = Literal["pending", "running", "success", "failed", "cancelled"]
    _Duration = Union[float, str]  # seconds, or text such as "1h30m"
    _Command = Union[str, "list[str]"]
    _Keys = Union["list[str]", "tuple[str, ...]", "set[str]"]
    _Filter = Union[str, "dict[str, Any]"]
    _Sort = Iterable["tuple[str, int] | list[Any]"]
    _TaskOrId = Union[str, "Task", "TaskSubmitResponse"]

    class _Further(TypedDict, total=False):  # fields of a submission that submit_task takes as `ours`
        retry_delay: "float | None"
        stop: "str | None"
        after: "_TaskOrId | Iterable[_TaskOrId] | None"
        after_any: "_TaskOrId | Iterable[_TaskOrId] | None"

    class _Submission(_Further, total=False):  # all fields of a submission
        task_name: "str | None"
        args: "dict[str, Any] | None"
        metadata: "dict[str, Any] | None"
        cmd: "_Command | None"
        heartbeat_timeout: "float | None"
        task_timeout: "float | None"
        max_retries: "int"
        priority: "int"

    class _Update(TypedDict, total=False):  # Any: the values of `TaskUpdateRequest(**{...})` share one type
        _id: "Any"
        task_id: "Any"
        status: "Any"
        task_name: "Any"
        args: "Any"
        metadata: "Any"
        summary: "Any"
        cmd: "Any"
        heartbeat_timeout: "Any"
        task_timeout: "Any"
        max_retries: "Any"
        retries: "Any"
        priority: "Any"
        retry_delay: "Any"
        stop: "Any"
        after: "Any"
        after_any: "Any"
        replace_fields: "Any"


class _Response:
    """An answer, with its values as attributes."""

    def __init__(self, **values: "Any") -> "None":
        vars(self).update(values)

    def to_dict(self) -> "dict[str, Any]":
        """Return the attributes in JSON types."""
        return {name: _to_json(value) for name, value in vars(self).items() if name[0] != "_"}

    def __repr__(self):
        return "%s(%s)" % (type(self).__name__, ", ".join(
            "%s=%r" % pair for pair in vars(self).items() if pair[0][0] != "_" and pair[1] not in (None, {})))


def _to_json(value):
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value.to_dict() if isinstance(value, _Response) else value


class _Answer(_Response):
    """A task, worker, queue or event, with its fields as attributes. `to_dict()` has them in JSON types."""

    FIELDS = {}

    def __init__(self, values: "dict[str, Any]") -> "None":
        found, (dicts, times) = vars(self), _dicts_and_times(type(self))
        found["_values"] = values
        found.update(zip(self.FIELDS, map(values.get, self.FIELDS)))
        found.update((name, {}) for name in dicts if found[name] is None)
        found.update((name, datetime_of(found[name])) for name in times if found[name] is not None)

    def to_dict(self) -> "dict[str, Any]":
        """Return the fields in JSON types, times as ISO 8601 text."""
        return dict(self._values)

    def __eq__(self, other):
        return type(self) is type(other) and self._values == other._values

    __hash__ = None


@functools.lru_cache(None)
def _dicts_and_times(kind):
    """Return the names of the fields of an _Answer's class that are dicts, and of those that are times."""
    return [[name for name, field in kind.FIELDS.items() if field.kind == wanted] for wanted in ("dict", "time")]


class Task(_Answer):
    """A task: task_id, task_name, status, args, metadata, summary (always dicts), priority, retries,
    max_retries, created_at, last_modified, start_time (aware datetimes or None), worker_id, ..."""

    FIELDS, PATH, ID = visible(TASK_FIELDS), TASKS_PATH, "task_id"
    SHOWN = "task_id", "status", "task_name", "args", "summary"
    if TYPE_CHECKING:  # None: it is not set, or the server does not know the field
        task_id: "str"
        queue_id: "str"
        status: "_Status"
        task_name: "str | None"
        created_at: "datetime.datetime"
        start_time: "datetime.datetime | None"
        last_heartbeat: "datetime.datetime | None"
        last_modified: "datetime.datetime"
        heartbeat_timeout: "float | None"
        task_timeout: "float | None"
        max_retries: "int"
        retries: "int"
        priority: "int"
        retry_delay: "float | None"
        stop: "str | None"
        after: "list[str] | None"
        after_any: "list[str] | None"
        metadata: "dict[str, Any]"
        args: "dict[str, Any]"
        cmd: "_Command | None"
        summary: "dict[str, Any]"
        worker_id: "str | None"
        run_id: "str | None"
        run_end: "str | None"
        interruptions: "int | None"
        reason: "str | None"
        failure: "str | None"
        not_before: "datetime.datetime | None"
        attempts: "list[dict[str, Any]] | None"
        git: "str | None"


class Worker(_Answer):
    """A worker: worker_id, worker_name, status, metadata, retries, max_retries, created_at, last_modified."""

    FIELDS, PATH, ID = visible(WORKER_FIELDS), WORKERS_PATH, "worker_id"
    SHOWN = "worker_id", "status", "worker_name", "metadata"
    if TYPE_CHECKING:
        worker_id: "str"
        queue_id: "str"
        status: "Literal['active', 'suspended', 'crashed']"
        worker_name: "str | None"
        metadata: "dict[str, Any]"
        retries: "int"
        max_retries: "int"
        created_at: "datetime.datetime"
        last_modified: "datetime.datetime"
        ended_at: "datetime.datetime | None"


class Queue(_Answer):
    """A queue: queue_id, queue_name, metadata, created_at, last_modified."""

    FIELDS = visible(QUEUE_FIELDS)
    if TYPE_CHECKING:
        queue_id: "str"
        queue_name: "str"
        created_at: "datetime.datetime"
        last_modified: "datetime.datetime"
        metadata: "dict[str, Any]"
        paused_at: "datetime.datetime | None"


class StateTransitionEvent(_Answer):
    """A change of state: entity_type ("task" or "worker"), entity_id, old_state, new_state, timestamp, entity_data (the
    task or worker after it, as a dict, with its id under "_id"), queue_id, type, metadata."""

    FIELDS = {name: Field(kind, None, False, "") for name, kind in (
        ("type", "text"), ("queue_id", "id"), ("timestamp", "time"), ("metadata", "dict"), ("entity_type", "text"),
        ("entity_id", "id"), ("old_state", "text"), ("new_state", "text"), ("entity_data", "dict"))}
    if TYPE_CHECKING:
        type: "str"
        queue_id: "str"
        timestamp: "datetime.datetime"
        metadata: "dict[str, Any]"
        entity_type: "Literal['task', 'worker']"
        entity_id: "str"
        old_state: "str"
        new_state: "str"
        entity_data: "dict[str, Any]"


class EventResponse(_Answer):
    """An event: `.event` (a StateTransitionEvent), `.timestamp`, `.sequence` (a count), and `.id`, with which
    `connect_events(after=...)` continues (None from a server without ids)."""

    FIELDS = {"sequence": Field("int", None, False, ""), "timestamp": Field("time", None, False, ""),
              "id": Field("text", None, True, "")}
    if TYPE_CHECKING:
        event: "StateTransitionEvent"
        sequence: "int"
        timestamp: "datetime.datetime"
        id: "str | None"

    def __init__(self, values: "dict[str, Any]") -> "None":
        super().__init__(values)
        self.event = StateTransitionEvent(values["event"])


class QueueCreateResponse(_Response):
    """`.queue_id`"""

    if TYPE_CHECKING:
        queue_id: "str"


class TaskSubmitResponse(_Response):
    """`.task_id`"""

    if TYPE_CHECKING:
        task_id: "str"


class TaskFetchResponse(_Response):
    """`.found`, `.task` (a Task or None), `.retry_in_s` (seconds until a task that waits may be fetched, or None),
    `.left` (how many more pending tasks fit, or None), `.paused` (True: the queue gives out nothing)"""

    if TYPE_CHECKING:
        found: "bool"
        task: "Task | None"
        retry_in_s: "float | None"
        left: "int | None"
        paused: "bool | None"


class HealthCheckResponse(_Response):
    """`.status` ("healthy" or "unhealthy"), `.database`"""

    if TYPE_CHECKING:
        status: "Literal['healthy', 'unhealthy']"
        database: "str"


class _Listing(_Response):
    """A sequence of Tasks or Workers: `len()`, `listing[0]`, `listing[-3:]` (a Listing again), `for task in listing`.

    Without a limit it continues after `.content` with all others that match; they are fetched once, when needed.
    A notebook shows the first ones as a table."""

    _rest = ()  # the items after `.content`, or the function that fetches them
    if TYPE_CHECKING:
        found: "bool"

    def _later(self):
        """Return the items after `.content`."""
        if callable(self._rest):
            self._rest = tuple(self._rest())
        return self._rest

    def __iter__(self):
        yield from self.content
        yield from self._later()

    def __bool__(self) -> "bool":
        return bool(self.content)

    def __len__(self) -> "int":
        return len(self.content) + len(self._later())

    def __getitem__(self, place):
        if isinstance(place, slice):
            content = list(self)[place]
            return type(self)(found=bool(content), content=content)
        is_there = 0 <= operator.index(place) < len(self.content)
        return self.content[place] if is_there else list(self)[place]

    def __eq__(self, other):
        return isinstance(other, (list, _Listing)) and list(self) == list(other)

    __hash__ = None

    def __repr__(self):
        counts = collections.Counter(item.status for item in self.content)
        return "<%s: %s%s>" % (type(self).__name__, ", ".join("%d %s" % (counts[status], status) for status in (
            TASK_STATES + WORKER_STATES) if counts[status]) or "nothing", " and more" if self._rest != () else "")

    def _repr_html_(self):
        """Return the first items of `.content` as an HTML table for a notebook, one row for each."""
        import html
        shown = self.content[:_SHOWN_ROWS]
        rows = [{name: value for name, value in flatten({top: getattr(item, top) for top in item.SHOWN})
                 if value != {} and name != "summary.labtasker_exception.traceback"} for item in shown]
        names = sorted({name: None for row in rows for name in row},
                       key=lambda name: shown[0].SHOWN.index(name.split(".")[0]))
        lines = [["<th>%s</th>" % html.escape(clean(name, "")) for name in names]]
        lines += [["<td>%s</td>" % html.escape(_cell(row.get(name))) for name in names] for row in rows]
        return "%s<table>%s</table>" % (html.escape(repr(self)), "".join("<tr>%s</tr>" % "".join(
            line) for line in lines))

    def to_records(self) -> "list[dict[str, Any]]":
        """Return all items as flat dicts with keys such as `args.lr` and `summary.acc`, for `pandas.DataFrame`."""
        return [{key: value for key, value in flatten({name: getattr(item, name) for name in item.FIELDS})
                 if value != {}}
                for item in self]


_SHOWN_ROWS, _SHOWN_CHARS = 100, 200  # of a listing in a notebook; of one of its cells


def _cell(value):
    """Return a value as the text of a cell in a notebook."""
    text = "%.6g" % value if isinstance(value, float) else "" if value is None else str(value)
    return clean(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


class TaskLsResponse(_Listing):
    """`.found`, `.content` (a list of Task)"""

    if TYPE_CHECKING:
        content: "list[Task]"

        def __iter__(self) -> "Iterator[Task]": ...
        @overload
        def __getitem__(self, place: "int") -> "Task": ...
        @overload
        def __getitem__(self, place: "slice") -> "TaskLsResponse": ...


class WorkerLsResponse(_Listing):
    """`.found`, `.content` (a list of Worker)"""

    if TYPE_CHECKING:
        content: "list[Worker]"

        def __iter__(self) -> "Iterator[Worker]": ...
        @overload
        def __getitem__(self, place: "int") -> "Worker": ...
        @overload
        def __getitem__(self, place: "slice") -> "WorkerLsResponse": ...


class TaskUpdateRequest(_Response):
    """New values for one task: `TaskUpdateRequest(**{"_id": task_id, "args": {"lr": 0.1}})`, or `task_id=...`.

    Only what is given is sent. `args`, `metadata` and `summary` are merged, unless `replace_fields` names them.
    An unknown field raises LabtaskerTypeError, a bad value LabtaskerValueError."""

    FIELDS = Fields({name: arg for name, arg in ROUTES["PUT " + TASKS_PATH].fields.items()
                     if name not in ("task_id", "_id")})
    if TYPE_CHECKING:
        task_id: "str"

    def __init__(self, **given: "Unpack[_Update]") -> "None":
        ids = given.pop("_id", None), given.pop("task_id", None)
        task_id = ids[0] or ids[1]
        if not task_id or not isinstance(task_id, str):
            raise LabtaskerTypeError("TaskUpdateRequest needs the task's id: TaskUpdateRequest(task_id=...) or "
                                     "TaskUpdateRequest(**{'_id': ...})")
        for name in given:
            if name not in self.FIELDS:
                raise LabtaskerTypeError("TaskUpdateRequest has no field %r; did you mean %s? It has %s" % (
                    name, _as_argument(name, given[name], nearest(name, self.FIELDS)), ", ".join(self.FIELDS)))
        for name in ("args", "metadata"):
            if given.get(name) is not None:
                given[name] = Plain(refuse_odd).value(given[name], [name])
        if given.get("summary") is not None:
            given["summary"] = plain_summary(given["summary"])
        checked(self.FIELDS, given, ["update"])
        if given.get("stop") is not None:
            parse_rule(given["stop"])
        super().__init__(task_id=task_id, _given=given, **dict(dict.fromkeys(self.FIELDS), **given))

    def to_dict(self) -> "dict[str, Any]":
        """Return the fields that are sent."""
        return dict(self._given, task_id=self.task_id)


# `from labtasker.api_models import TaskUpdateRequest` works although there is no such file.
api_models = sys.modules["labtasker.api_models"] = type(sys)("labtasker.api_models", "Classes of requests and answers")
vars(api_models).update((kind.__name__, kind) for kind in (
    Task, Worker, Queue, TaskUpdateRequest, TaskSubmitResponse, TaskFetchResponse, TaskLsResponse, WorkerLsResponse,
    HealthCheckResponse, QueueCreateResponse, EventResponse, StateTransitionEvent))

# Public functions. Each raises LabtaskerHTTPStatusError if it is refused, and LabtaskerConnectError if there is no
# answer, or if the answer was lost and repeating the request could do it twice (ONCE). Where one passes `**locals()`,
# its parameters are the fields of its route.


def without_none(**values):
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def ask_route(route, **fields):
    """Return the answer to a route of ROUTES. Its row says whether a field goes into the path, the URL's query or the
    body. None is not sent."""
    method, path, places, query_names, has_body = way_of(route)
    body = {}
    for name, value in fields.items():
        if isinstance(value, _Response) and name.endswith("_id"):
            raise LabtaskerTypeError("%s is the text of an id, not a %s; did you mean its .%s?" % (
                name, type(value).__name__, name))
        if value is not None:
            body[name] = value
    for name in places:
        path = path.replace("{%s}" % name, str(body.pop(name)))
    query = {name: body.pop(name) for name in query_names if name in body}
    return client().call(method, path, body if has_body else None, query)


_DOUBTED = set()  # what this process was told of filters


def tell_doubts(document, kind):
    """Write a note to stderr, once, for each comparison of a filter that can't be true."""
    states = TASK_STATES if kind is Task else WORKER_STATES
    for text in doubts(document, kind.FIELDS, states) if document else ():
        if text not in _DOUBTED:
            _DOUBTED.add(text)
            tell("labtasker: filter: " + text)


def query_of(extra_filter, kind=Task):
    """Return the query document of a filter, which is text, a document or None."""
    if isinstance(extra_filter, str):
        return parse_filter(extra_filter, kind.FIELDS, now())
    return extra_filter


def code_version():
    """Return the commit of the working folder's git repository, with "-dirty" if tracked files were changed; or None.

    Git is asked once for each process and folder."""
    try:
        here = os.getcwd()
        if here not in _VERSIONS:
            _VERSIONS[here] = _ask_git(here) if nearest_with(".git", os.path.exists) else None
    except OSError:  # the folder was removed
        return None
    return _VERSIONS[here]


def _ask_git(folder):
    import subprocess
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match=-"]  # no tag is called -
    try:
        output = subprocess.check_output(words, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       timeout=_GIT_TIMEOUT_S, env=dict(os.environ, GIT_OPTIONAL_LOCKS="0"))
        output = output.decode("ascii", "replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return output if re.match("[0-9a-f]{7,64}(-dirty)?\\Z", output) else None


_VERSIONS = {}  # folder: its code_version
_GIT_TIMEOUT_S = 5  # do not wait for a large repository on a slow disk


def health_check() -> "HealthCheckResponse":
    """Return `.status` ("healthy" or "unhealthy") and `.database` ("connected" or the problem)."""
    missing = missing_store(load_config())
    return HealthCheckResponse(**{"status": "unhealthy", "database": missing} if missing
                               else ask_route("GET /health/full"))


def create_queue(queue_name: "str", password: "str", metadata: "dict[str, Any] | None" = None) -> "QueueCreateResponse":
    """Return `.queue_id` of a new queue."""
    return QueueCreateResponse(queue_id=ask_route("POST /api/v1/queues", **locals())["queue_id"])


def get_queue() -> "Queue":
    """Return the configured Queue."""
    return Queue(ask_route("GET " + QUEUE_PATH))


def update_queue(new_queue_name: "str | None" = None, new_password: "str | None" = None,
                 metadata_update: "dict[str, Any] | None" = None) -> "Queue":
    """Change the queue's name, password or metadata (merged; {} clears) and return it. The configuration stays."""
    return Queue(ask_route("PUT " + QUEUE_PATH, **locals()))


def pause_queue(paused=True):
    """Pause the configured queue, or let it go on, and return it. Raises LabtaskerRuntimeError where the server knows
    no pauses."""
    if not client().extensions:
        raise LabtaskerRuntimeError("%s runs a server of Labtasker 1.0.1, which can't pause a queue" % client().where)
    return Queue(ask_route("PUT " + QUEUE_PATH, paused=bool(paused)))


def delete_queue(cascade_delete: "bool" = True) -> "None":
    """Delete the configured queue, with its tasks and workers."""
    ask_route("DELETE " + QUEUE_PATH, cascade_delete=bool(cascade_delete))


def submit_task(task_name: "str | None" = None, args: "dict[str, Any] | None" = None,
                metadata: "dict[str, Any] | None" = None, cmd: "_Command | None" = None,
                heartbeat_timeout: "float | None" = None, task_timeout: "float | None" = None, max_retries: "int" = 3,
                priority: "int" = 0, **ours: "Unpack[_Further]") -> "TaskSubmitResponse":
    """Submit a task and return its `.task_id`.

    The keys of `args` must be exactly those that the job requires. The timeouts are in seconds; a higher priority is
    fetched first. `ours` are further fields of a submission: `retry_delay`; `after`, a list of tasks that have to
    succeed first, and `after_any`, those that have to end (`labtasker help after`). An unknown one raises
    LabtaskerTypeError. The id is made here, so that the request can be repeated when its answer is lost."""
    fields = locals()
    fields.update(fields.pop("ours"))
    if isinstance(task_name, dict):
        raise LabtaskerTypeError("submit_task: task_name is text, not a dict; did you mean submit_task(args=%s)?"
                                 % cut(repr(task_name)))
    task = _submitted(fields)
    _check_can_wait([task], "submitted")
    return TaskSubmitResponse(task_id=ask_route("POST " + TASKS_PATH, **task)["task_id"])


def _as_argument(name, value, like=None):
    """Return how a value is given that was meant for a task's args, after a parameter that is spelled alike, if any."""
    meant = "args={%r: %s}" % (name, cut(repr(value)))
    return "%s=..., or %s" % (like, meant) if like else meant


def _submitted(task):
    """Return the fields of a submission to send, with its id; raise LabtaskerTypeError for an unknown one."""
    if not isinstance(task, dict):
        raise LabtaskerTypeError("submit_tasks takes a list of dicts such as {'args': {'lr': 0.1}}, not of %s"
                                 % cut(repr(task)))
    for name in task:
        if name not in SUBMITTED:
            raise LabtaskerTypeError("a submission has no field %r; did you mean %s? It has %s" % (
                name, _as_argument(name, task[name], nearest(name, SUBMITTED)),
                ", ".join(each for each, field in SUBMITTED.items() if field.flag)))
    if isinstance(task.get("stop"), str):
        parse_rule(task["stop"])
    named = {field: _ids_in(task[field]) for field in WAITS if task.get(field) is not None}
    return dict({"task_id": new_id(), "git": code_version()}, **dict(task, **named))


def _ids_in(value):
    """Return the ids that are given as a list, or as one, of texts, Tasks, or answers of submit_task."""
    is_one = isinstance(value, (str, _Answer, TaskSubmitResponse)) or not hasattr(value, "__iter__")
    return [getattr(item, "task_id", item) for item in ([value] if is_one else value)]


def _check_can_wait(tasks, done):
    """Raise LabtaskerRuntimeError where tasks are to wait for others and the server knows nothing of that."""
    field = next((field for field in WAITS if any(task.get(field) for task in tasks)), None)
    if field and not client().extensions:
        raise LabtaskerRuntimeError("%s runs a server of Labtasker 1.0.1, in which no task waits for another: it does "
                                    "not know %s; nothing was %s" % (client().where, field, done))


def _parts(items, size, doing):
    """Yield the items in parts of at most `size`; a message on stderr says so if there are several."""
    if len(items) > size:
        tell("labtasker: %s %d tasks, %d at a time" % (doing, len(items), size))
    return (items[at:at + size] for at in range(0, len(items), size))


def submit_tasks(tasks: "Iterable[Mapping[str, Any]]", unique: "bool" = False) -> "list[str]":
    """Submit tasks, given as dicts of submit_task's arguments, and return their ids.

    `unique`: a task with the name and args of an existing task is not submitted; its id is that of the existing task.
    Up to 5,000 tasks are one transaction. More are sent in parts, of which a failure may leave some submitted, and a
    message on stderr says so. A server without the extensions gets them one by one."""
    if unique:
        tasks = [dict(task, args=Plain(refuse_odd).value(task.get("args"), ["args"])) for task in tasks]
        new, ids, _ = unseen(tasks)
        return submit_tasks(new) and ids if new else ids
    tasks, ids = [without_none(**_submitted(task)) for task in tasks], []
    _check_can_wait(tasks, "submitted")
    if not client().extensions:
        plain = {name: field.default for name, field in SUBMITTED.items() if field.kind in ("count", "int")}
        return [ask_route("POST " + TASKS_PATH, **dict(plain, **task))["task_id"]
                for task, in _parts(tasks, 1, "submitting")]
    for part in _parts(tasks, _CHUNK_TASKS, "submitting"):
        ids += client().call("POST", TASKS_PATH, part)["task_ids"]
    return ids


def submit_grid(grid: "Mapping[str, Any]", unique: "bool" = False,
                **fields: "Unpack[_Submission]") -> "list[str]":
    """Submit a task for each combination, as in submit_grid({"lr": [0.1, 0.01], "seed": range(3)}), and return the ids.

    `fields` are submit_task's arguments; `args` among them are further args that all tasks have."""
    if not isinstance(grid, dict):
        raise LabtaskerTypeError("submit_grid takes a dict of lists, such as {'lr': [0.1, 0.01]}, not %s"
                                 % cut(repr(grid)))
    for key, values in grid.items():
        if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
            raise LabtaskerTypeError("submit_grid takes a list of values for each key, not %s=%s; did you mean [%s]?"
                                     % (key, cut(repr(values)), cut(repr(values))))
    fixed, rows = fields.pop("args", None) or {}, itertools.product(*grid.values())
    return submit_tasks([dict(fields, args=dict(fixed, **dict(zip(grid, row)))) for row in rows], unique)


def unseen(tasks):
    """Return (those of the submissions whose name and args no task has yet, each once; the id of the task for each
    submission; the ids of those that were there and have failed).

    Of tasks without args the command counts. The ids are made of what counts: two who submit the same at once submit
    it once."""
    import hashlib

    def identity(name, args, cmd):
        what = unflatten(args) if args else [cmd]
        return json.dumps([name, what] if name else what, sort_keys=True)
    found = ls_tasks(limit=10 ** 9).content
    there = {identity(task.task_name, task.args, task.cmd): task.task_id for task in found}
    failed = {task.task_id for task in found if task.status == "failed"}
    taken, new, ids = set(there.values()), [], []
    for task in tasks:
        key = identity(task.get("task_name"), task.get("args"), task.get("cmd"))
        if key not in there:
            made = as_uuid(hashlib.sha256(key.encode()).hexdigest())
            there[key] = new_id() if made in taken else made  # that task has other args since an update
            new.append(dict(task, task_id=there[key]))
        ids.append(there[key])
    return new, ids, [task_id for task_id in dict.fromkeys(ids) if task_id in failed]


def fetch_task(worker_id: "str | None" = None, eta_max: "_Duration | None" = None,
               heartbeat_timeout: "float | None" = None, start_heartbeat: "bool" = True,
               required_fields: "_Keys | None" = None, extra_filter: "_Filter | None" = None,
               cmd: "_Command | None" = None, fetch_id: "str | None" = None, wait_s: "float | None" = None,
               attempt: "dict[str, Any] | None" = None, heartbeat_default: "float | None" = None,
               left: "bool | None" = None) -> "TaskFetchResponse":
    """Fetch the next task that matches and return `.found` and `.task`, which is running from now on.

    `eta_max` is a duration ("1h30m"), `heartbeat_timeout` is in seconds. `required_fields`: the keys that the task's
    args must have, no more, no less; "*" allows others. `attempt` is a dict of texts and numbers that the task keeps
    about this run. `heartbeat_default`: a task's own heartbeat_timeout stays. `left`: also count the
    pending tasks that are left. Raises WorkerSuspended."""
    body = without_none(**dict(locals(), extra_filter=query_of(extra_filter), fetch_id=fetch_id or new_id()))
    # The transport waits so much longer.
    answer = client().call("POST", TASKS_PATH + "/next", body, without_none(wait_s=wait_s))
    return TaskFetchResponse(found=answer["found"], task=answer.get("task") and Task(answer["task"]),
                             retry_in_s=answer.get("retry_in_s"), left=answer.get("left"), paused=answer.get("paused"))


def end_fetch(fetch_id, hand_back=None):
    """End a fetch: it is answered now if it waits, and gets no task from now on.

    With `hand_back` the task that it got becomes pending again if it still runs, and no retry is charged. Does nothing
    without the extensions, with which alone a fetch waits and has an id."""
    if client().extensions:
        ask_route("DELETE " + TASKS_PATH + "/next", **locals())


def send_report(task_id, status, summary=None, worker_id=None, run_id=None, reason=None, attempt=None, delay_s=None,
                final=None, log=None, took_s=None, step=None, point_id=None, failure=None):
    """Report on a task as report_task_status does, for the given run and worker. The run took `took_s`.

    A task that is handed back is not fetched for `delay_s`; one that failed with `final` is not retried. `log` is the
    end of the run's output, as `packed_log` returns it. With `step` the summary is also a point of the history, once
    for each `point_id`. `failure` is one of FAILURES. Return {go, status, reason}, {} from a server without the
    extensions."""
    return ask_route("POST " + TASKS_PATH + "/{task_id}/status", **locals())


def send_heartbeat(task_id, worker_id=None, run_id=None, wait_s=None):
    """Send a heartbeat and return the task's status, or None from a server without the extensions.

    With `wait_s` the answer comes when the run is over, or after that time."""
    answer = ask_route("POST " + TASKS_PATH + "/{task_id}/heartbeat", answer="status", **locals())
    return answer and answer.get("status")


def get_log(task_id, run_id):
    """Return what `_log_of_run` does; {} from a server without the extensions."""
    return ask_route("GET " + TASKS_PATH + "/{task_id}/log", **locals()) if client().extensions else {}


def is_beside_store():
    """Return whether the configuration's folder is that of the store, so that who has the store finds runs' logs there.
    """
    transport = client().transport
    if transport.is_beside is None:
        transport.is_beside = _is_beside_store(load_config())
    return transport.is_beside


def _is_beside_store(config):
    folder = store_folder(config)
    if folder:
        return os.path.realpath(folder) == os.path.realpath(config.root)
    told = read_server_file(config.root) or {}
    if not told.get("key"):
        return False
    transport = HttpTransport(config.url, config.queue_name, None, config.ca_file, told["key"])
    try:
        return transport.is_of_store()
    except LabtaskerError:  # it has another store
        return False
    finally:
        transport.close()


def refresh_task_heartbeat(task_id: "str", worker_id: "str | None" = None) -> "None":
    """Send a heartbeat of a running task."""
    ask_route("POST " + TASKS_PATH + "/{task_id}/heartbeat", **locals())


def get_task(task_id: "str") -> "Task":
    """Return the Task with this id."""
    return Task(ask_route("GET " + TASKS_PATH + "/{task_id}", task_id=task_id))


_LIMIT = type("Limit", (int,), {})(100)  # the default limit, told from a given 100 by its identity


def _listing(answer, kind, fields):
    """Return the Listing of a search; if no limit was given, it continues to the last match."""
    body = without_none(**dict(fields, extra_filter=query_of(fields["extra_filter"], kind)))
    tell_doubts(body.get("extra_filter"), kind)
    if not (isinstance(body.get(kind.ID), _Answer) or NAME.match(str(body.get(kind.ID, "-")))):
        raise LabtaskerValueError("%s=%s is no id; did you mean extra_filter=%s?" % (
            kind.ID, cut(repr(body[kind.ID])), cut(repr(body[kind.ID]))))
    found = _found(kind, body)
    listing = answer(found=bool(found), content=[kind(item) for item in found])

    def rest():  # all at once and from the start: by offset, tasks that change meanwhile would be missed or come twice
        seen = {item[kind.ID] for item in found}
        return [kind(item) for item in _found(kind, dict(body, limit=10 ** 9)) if item[kind.ID] not in seen]
    if fields["limit"] is _LIMIT and len(found) == _LIMIT:
        listing._rest = rest
    return listing


def _found(kind, body):
    """Return the matches of a search as dicts."""
    document, limit = body.get("extra_filter"), body.get("limit")
    if isinstance(document, dict) and not {"status", "task_name", "worker_name", "_id"}.isdisjoint(document):
        body = dict(body, extra_filter={"$and": [document]})  # a 1.0.1 server lets other fields replace these
    if isinstance(limit, int) and limit > PLAIN_LIMIT and not client().extensions:
        return _found_by_pages(kind, body)
    return client().call("POST", kind.PATH + "/search", body)["content"]


def _found_by_pages(kind, body):
    """Return the matches of a search on a server that lists at most PLAIN_LIMIT, sorted here.

    The pages go by id: by offset, tasks that change meanwhile would be missed or come twice."""
    found, page, wished = [], None, [body["extra_filter"]] if body.get("extra_filter") else []
    while page is None or len(page) == PLAIN_LIMIT:
        parts = wished + ([{"_id": {"$gt": found[-1][kind.ID]}}] if found else [])
        page = client().call("POST", kind.PATH + "/search", dict(
            body, offset=0, limit=PLAIN_LIMIT, sort=[["_id", 1]], extra_filter={"$and": parts} if parts else None))
        page = page["content"]
        found += page
    sort = [[kind.ID if field == "_id" else field, way] for field, way in body.get("sort") or [["last_modified", 1]]]
    rows = sort_records([_Response(**row) for row in found], sort, lambda row: (row.created_at, getattr(row, kind.ID)))
    begin = body.get("offset") or 0
    return [vars(row) for row in rows[begin:begin + body["limit"]]]


def ls_tasks(task_id: "str | None" = None, task_name: "str | None" = None, status: "str | None" = None,
             extra_filter: "_Filter | None" = None, limit: "int | None" = _LIMIT, offset: "int" = 0,
             sort: "_Sort | None" = None) -> "TaskLsResponse":
    """Return a Listing of the Tasks that match all conditions, the least recently changed first.

    `extra_filter` is filter text ('args.lr > 0.01 and summary.acc > 0.9') or a query document; `sort` is a list of
    [field, 1 or -1]. `.content` has at most `limit` tasks. Without a limit, `for task in ls_tasks():` and
    `.to_records()`, which pandas.DataFrame takes, continue to all tasks."""
    return _listing(TaskLsResponse, Task, locals())


def table(by: "str | Iterable[str]", of: "str", mode: "str" = "max",
          status: "str | list[str] | None" = "success", extra_filter: "_Filter | None" = None,
          task_name: "str | None" = None) -> "list[dict[str, Any]]":
    """Return a list of dicts, one for each group of tasks with the same values of the fields `by`, the best mean first.

    `table(["args.lr"], "summary.acc")` → [{"args.lr": 0.1, "n": 3, "mean": 0.91, "std": 0.02, "min", "max", "best": a
    task's id, "failed", "missing", "nan"}, ...]. `mode`: "max" or "min" is best. `status`: one, a list, or None for
    all; `failed` counts the failed tasks of the group in any case, `missing` the others without a number, `nan` those
    that have NaN. `std` is that of a sample, None for one task."""
    by, statuses = [by] if isinstance(by, str) else list(by), [status] if isinstance(status, str) else status
    document = query_of(extra_filter)
    tell_doubts(document, Task)
    if client().extensions:
        return ask_route("POST " + TASKS_PATH + "/table", by=by, of=of, mode=mode, statuses=statuses,
                         extra_filter=document, task_name=task_name)["content"]
    return group_rows(ls_tasks(extra_filter=document, task_name=task_name), by, of, mode, statuses)


def update_tasks(task_updates: "Iterable[TaskUpdateRequest | dict[str, Any]]",
                 reset_pending: "bool" = False) -> "TaskLsResponse":
    """Carry out all of these TaskUpdateRequests, or none, and return a Listing of the Tasks after it.

    More than a server takes at once (10,000; a 1.0.1 server 1,000) are sent in parts, and a message on stderr says so;
    a 1.0.1 server may carry out some of a part. `reset_pending`: they become pending again with retries at 0."""
    if isinstance(task_updates, (TaskUpdateRequest, dict)):
        raise LabtaskerTypeError("update_tasks takes a list; did you mean update_tasks([%s])?"
                                 % cut(repr(task_updates)))
    bodies = []
    for update in task_updates:
        if not isinstance(update, (TaskUpdateRequest, dict)):
            raise LabtaskerTypeError("update_tasks takes TaskUpdateRequests, not %s; did you mean TaskUpdateRequest("
                                     "task_id=..., priority=1)?" % cut(repr(update)))
        bodies.append((TaskUpdateRequest(**update) if isinstance(update, dict) else update).to_dict())
    _check_can_wait(bodies, "updated")
    size, content = TRANSACTION_TASKS, []
    if not client().extensions:
        bodies, size = [_by_dotted_keys(body) for body in bodies], PLAIN_LIMIT
    for part in _parts(bodies, size, "updating"):
        content += client().call("PUT", TASKS_PATH, part, {"reset_pending": bool(reset_pending)})["content"]
    return TaskLsResponse(found=bool(content), content=[Task(task) for task in content])


def _by_dotted_keys(update):
    """Return an update with dotted keys for the dicts to merge: a 1.0.1 server does not merge nested dicts."""
    kept = update.get("replace_fields") or ()
    return {name: dict(flatten(value)) if isinstance(value, dict) and name not in kept else value
            for name, value in update.items()}


def delete_task(task_id: "str") -> "None":
    """Delete a task."""
    ask_route("DELETE " + TASKS_PATH + "/{task_id}", task_id=task_id)


def create_worker(worker_name: "str | None" = None, metadata: "dict[str, Any] | None" = None,
                  max_retries: "int" = 3) -> "str":
    """Register a worker and return its id. It gets no more tasks after `max_retries` failed runs."""
    return ask_route("POST " + WORKERS_PATH, worker_id=new_id(), **locals())["worker_id"]


def ls_workers(worker_id: "str | None" = None, worker_name: "str | None" = None, status: "str | None" = None,
               extra_filter: "_Filter | None" = None, limit: "int | None" = _LIMIT, offset: "int" = 0,
               sort: "_Sort | None" = None) -> "WorkerLsResponse":
    """Return a Listing of the Workers that match all conditions; see ls_tasks."""
    return _listing(WorkerLsResponse, Worker, locals())


def report_worker_status(worker_id: "str", status: "str") -> "None":
    """Set a worker active (which sets its retries to 0), suspended or crashed."""
    ask_route("POST " + WORKERS_PATH + "/{worker_id}/status", worker_id=worker_id, status=status)


def end_worker(worker_id):
    """Note that the loop which made a worker for itself has ended; a server without the extensions is not told."""
    if client().extensions:
        report_worker_status(worker_id, "ended")


def delete_worker(worker_id: "str", cascade_update: "bool" = True) -> "None":
    """Delete a worker; with `cascade_update` its tasks no longer name it."""
    ask_route("DELETE " + WORKERS_PATH + "/{worker_id}", worker_id=worker_id, cascade_update=bool(cascade_update))


# Events


def is_away(error):
    """Return whether an error means that the server, or the store's disk, may be back later.

    A 401 does too if the server was found through its folder: it has a new key after a restart."""
    status = getattr(error, "status", None)
    return isinstance(error, LabtaskerConnectError) or status in (502, 503, 504, 507) or (
        status == 401 and store_folder(load_config()) is not None)


def parse_events(lines):
    """Yield {"event", "data", "id", ...} for each server-sent event in lines of bytes, ignoring one that is cut off."""
    found = {}
    for line in lines:
        line = line.decode("utf-8", "replace").rstrip("\r\n")
        name, _, value = line.partition(":")
        if name:  # without one it is a comment or the end of an event
            value = value[1:] if value.startswith(" ") else value
            found[name] = found[name] + "\n" + value if name == "data" and name in found else value
        elif not line:
            if "data" in found:
                yield found
            found = {}


class EventListener:
    """Receives the state changes of the queue's tasks and workers from `start` on, in a thread that reconnects forever.

    If events have ids, none is lost between two connections; else a message on stderr says that some may be. `after`:
    begin after the event with this id ("0.0": with all that the store still has; `help events` says how many).
    `with EventListener() as listener:` starts it, and stops it at the end."""

    def __init__(self, after: "str | None" = None) -> "None":
        if after is not None and not (isinstance(after, str) and EVENT_ID.match(after)):
            raise LabtaskerValueError("after=%.100r is no event's id, which is two numbers such as \"17.0\" "
                                      "(event.id, or \"0.0\" for all that are kept)" % (after,))
        self.lock = threading.Condition()  # guards all attributes
        self.waiting, self.client, self.lines, self.error = collections.deque(), None, None, None
        self.client_id, self.last_id, self.stopped = None, after, False

    def __enter__(self) -> "EventListener":
        return self if self.client else self.start()

    def __exit__(self, *_: "object") -> "None":
        self.stop()

    def start(self, timeout: "float" = 10) -> "EventListener":
        """Return this listener once it is connected; raise as any call does if that takes over `timeout` seconds."""
        self.config, self.timeout_s = load_config(), timeout
        events = self._connect()
        threading.Thread(target=self._listen, args=(events,), name="labtasker events", daemon=True).start()
        return self

    def stop(self) -> "None":
        """Stop listening; a thread that waits for an event gets None."""
        with self.lock:
            self.stopped, self.client_id = True, None
            if self.lines:
                self.lines.close()
            self.lock.notify_all()

    def is_connected(self) -> "bool":
        """Return whether the listener is connected now."""
        return self.client_id is not None

    def get_client_id(self) -> "str | None":
        """Return the id that the server gave this listener, or None while it is not connected."""
        return self.client_id

    def get_event(self, timeout: "float | None" = None) -> "EventResponse | None":
        """Wait for the next EventResponse and return it; None after `timeout` seconds, or once the listener is stopped.

        Raises LabtaskerRuntimeError if it was not started, or the error because of which it can't continue."""
        with self.lock:
            if self.client is None:
                raise LabtaskerRuntimeError("this listener was not started: call its start(), or connect_events()")
            self.lock.wait_for(lambda: self.waiting or self.stopped, timeout)
            if self.waiting:
                self.lock.notify_all()
                data, event_id = self.waiting.popleft()
                return EventResponse(dict(json.loads(data), **without_none(id=event_id)))
            if self.error:
                raise self.error
            return None

    def iter_events(self) -> "Iterator[EventResponse]":
        """Yield the events as they come, until the listener is stopped."""
        return iter(self.get_event, None)

    def _connect(self):
        """Return the events of a new connection, after the first, which has our id."""
        client = Client(transport_for(self.config))
        lines = client.listen(self.last_id, self.timeout_s)
        events = parse_events(lines)
        hello = next(events, None)
        if hello is None:
            raise LabtaskerConnectError("%s ended the stream of events before it began" % client.where)
        if self.client is None and self.last_id and not hello.get("id"):
            lines.close()
            raise LabtaskerRuntimeError("%s gives events no ids, so those from before can't be had there: connect "
                                        "without after=" % client.where)
        with self.lock:
            self.client, self.lines, self.client_id = client, lines, json.loads(hello["data"]).get("client_id")
            self.last_id = hello.get("id", self.last_id)
            if self.stopped:
                lines.close()
        return events

    def _listen(self, events):
        """Take events, reconnecting when a connection ends, until the listener is stopped or refused."""
        delay_s = 0.1
        while events or not self.stopped:
            try:
                for event in events or self._connect():
                    self._take(event)
                    delay_s = 0.1
            except Exception as error:  # `get_event` raises it
                if not is_away(error):
                    self.error, self.stopped = error, True
            events = None
            self._pause(delay_s)
            delay_s = min(delay_s * 2, 3.0)

    def _pause(self, seconds):
        """Note that the connection has ended, and wait for `seconds`, or until the listener is stopped."""
        with self.lock:
            is_lossy = self.client_id and self.last_id is None and not self.stopped
            self.client_id = None
            self.client.transport.close()
            self.lock.notify_all()
            self.lock.wait_for(lambda: self.stopped, seconds)
        if is_lossy:
            tell("labtasker: the connection to %s was lost; that server can't say which events came meanwhile"
                 % self.client.where)

    def _take(self, event):
        """Keep an event for `get_event`. If too many are kept, the server has to wait."""
        if event.get("event") == "too_old":
            tell("labtasker: %s" % json.loads(event["data"]).get("detail"))
        if event.get("event") == "event":
            with self.lock:
                self.lock.wait_for(lambda: len(self.waiting) < MAX_EVENTS or self.stopped)
                self.waiting.append((event["data"], event.get("id")))
                self.last_id = event.get("id", self.last_id)
                self.lock.notify_all()


def connect_events(timeout: "float" = 10, after: "str | None" = None) -> "EventListener":
    """Return an EventListener, connected, of the queue's events from now on, or of those after the event id `after`.

    Raises if it can't connect within `timeout` seconds. `with connect_events() as listener:` stops it at the end."""
    return EventListener(after).start(timeout)


# 12. Jobs ####################################################################
#
# How a task's args reach a job: casts and Required (for a function), templates (for a command, quoted as
# its shell or Python reads them), and the process that is started. Knows nothing of stores and servers.
# Uses 1, 7 (how a program is started), 10. Tests: test_required.py, test_template.py, test_worker.py.


class UnfitArgs(LabtaskerTypeError):
    """A task's args are not what the function takes: no run of it can succeed."""


class _Refused(ValueError):
    """A value that can't be cast. Its text gives the reason where type and value don't show it."""


def cast(value, annotation, where):
    """Return `value`, which came from JSON, cast to `annotation`; an unknown annotation leaves it as it is.

    Raises LabtaskerTypeError, which names `where`, the type and the value."""
    caster, parts = _caster(annotation)
    try:
        return caster(value, annotation, parts, where)
    except LabtaskerTypeError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        why = ": %s" % error if isinstance(error, _Refused) and str(error) else ""
        raise UnfitArgs("%s: expected %s, got %s%s" % (
            where, _type_text(annotation), _brief(value), why)) from None


def _brief(value, size=200):
    text = repr(value)
    return "%s (%s)" % (text if len(text) <= size else text[:size] + "...", type(value).__name__)


def _type_text(annotation):
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    return str(annotation).replace("typing_extensions.", "").replace("typing.", "")


def _caster(annotation):
    """Return (function of CASTS, type arguments). The internals of typing changed in 3.7, 3.9 and 3.14."""
    if getattr(annotation, "__metadata__", None):
        return _caster(annotation.__args__[0])
    literals = getattr(annotation, "__values__", None)
    if literals:
        return _to_literal, literals
    return _known_caster(_plain_type(annotation)), getattr(annotation, "__args__", None) or ()


def _plain_type(annotation):
    """Return what stands before the brackets: the class `list` for List[int], typing.Union for Optional[int]."""
    if type(annotation).__name__ == "UnionType":
        return type(annotation)
    return getattr(annotation, "__extra__", None) or getattr(annotation, "__origin__", None) or annotation


def _known_caster(origin):
    if not isinstance(origin, type):
        return _CASTS.get(str(origin).replace("typing_extensions.", "typing."), _CASTS[None])
    if hasattr(origin, "__dataclass_fields__"):
        return _to_dataclass
    if issubclass(origin, tuple) and hasattr(origin, "_fields"):
        return _to_named_tuple
    keys = ["%s.%s" % (base.__module__.split(".")[0], base.__name__) for base in origin.__mro__]
    bases = [_CASTS_OF_BASES[key] for key in keys if key in _CASTS_OF_BASES]
    return bases[0] if bases else _CASTS.get(keys[0], _CASTS[None])


def _refuse(why=""):
    raise _Refused(why)


def _to_text(value):
    return str(value) if isinstance(value, (str, bool, int, float)) else _refuse()


def _to_int(value, annotation, parts, where):
    number = _number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or int(number) != number:
        _refuse()
    return int(number)


def _number(text):
    try:
        return int(text)
    except ValueError:
        return float(text)


def _to_list(value, annotation, parts, where):
    if not isinstance(value, (list, tuple, set, frozenset)):
        _refuse()
    part = parts[0] if parts else None
    return [cast(item, part, "%s, item %d" % (where, i)) if parts else item for i, item in enumerate(value)]


def _to_tuple(value, annotation, parts, where):
    if not parts or len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(_to_list(value, annotation, parts[:1], where))
    items = _to_list(value, annotation, (), where)
    if len(items) != len(parts):
        _refuse("%d items, not %d" % (len(items), len(parts)))
    return tuple(cast(item, part, "%s, item %d" % (where, i)) for i, (item, part) in enumerate(zip(items, parts)))


def _to_dict(value, annotation, parts, where):
    if not isinstance(value, dict):
        _refuse()
    if len(parts) != 2:
        return dict(value)
    return {cast(key, parts[0], "%s, a key" % where): cast(item, parts[1], "%s, key %r" % (where, key))
            for key, item in value.items()}


def _to_union(value, annotation, parts, where):
    """Return `value` cast to the first member that takes it; a member of exactly its type is tried first."""
    for part in sorted(parts, key=lambda part: type(value) is not _plain_type(part)):
        try:
            return cast(value, part, where)
        except LabtaskerTypeError:
            pass
    _refuse()


def _to_literal(value, annotation, parts, where):
    same = [part for part in parts if part == value and type(part) is type(value)]
    same += [part for part in parts if isinstance(value, str) and str(part) == value]
    same += [part for part in parts if isinstance(part, str) and part == str(value)]
    return same[0] if same else _not_among(parts)


def _to_enum(value, annotation, parts, where):
    """Return the member with this value, else with this name, else whose value has the same text."""
    members = list(annotation)
    same = [member for member in members if member is value or member.value == value]
    same += [member for member in members if member.name == value]
    same += [member for member in members if str(member.value) == str(value)]
    return same[0] if same else _not_among([member.value for member in members])


def _not_among(choices):
    _refuse("one of %s is needed" % ", ".join(map(repr, choices)))


def _to_path(value, annotation, parts, where):
    return value if isinstance(value, annotation) else annotation(_to_text(value))


def _to_dataclass(value, annotation, parts, where):
    cls = _plain_type(annotation)
    names = [field.name for field in cls.__dataclass_fields__.values() if getattr(field, "init", True)]
    return value if isinstance(value, cls) else _build(cls, value, names, where)


def _to_named_tuple(value, annotation, parts, where):
    if isinstance(value, (list, tuple)):
        value = dict(zip(annotation._fields, value)) if len(value) <= len(annotation._fields) else None
    return _build(annotation, value, annotation._fields, where)


def _build(cls, value, names, where):
    """Return an object of `cls` from a dict, its fields cast by their annotations."""
    if not isinstance(value, dict):
        _refuse()
    unknown = [key for key in value if key not in names]
    if unknown:
        _refuse("no field %r, there are %s" % (unknown[0], ", ".join(names)))
    hints = _type_hints(cls)
    given = {key: cast(item, hints[key], "%s, field %r" % (where, key)) if key in hints else item
             for key, item in value.items()}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise _Refused(str(error)) from None


def _type_hints(owner):
    """Return {name: annotation} of a function or class; each annotation that is text is resolved where possible."""
    if isinstance(owner, type):
        hints = {}
        for base in reversed(owner.__mro__):
            scope = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
            hints.update(_resolved(base.__dict__.get("__annotations__") or getattr(base, "__annotations__", {}), scope))
        return hints
    return _resolved(getattr(owner, "__annotations__", {}), getattr(owner, "__globals__", {}))


def _resolved(annotations, scope):
    import types
    import typing
    extras = {"include_extras": True} if sys.version_info >= (3, 9) else {}
    hints = {}
    for name, annotation in annotations.items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints[name] = typing.get_type_hints(holder, scope, **extras)[name]
        except Exception:  # a name that only a type checker imports: this annotation stays text
            hints[name] = annotation
    return hints


_BOOL_WORDS = {"true": True, "yes": True, "on": True, "1": True, "1.0": True,
               "false": False, "no": False, "off": False, "0": False, "0.0": False}
_CASTS_OF_BASES = {"enum.Enum": _to_enum, "pathlib.PurePath": _to_path}  # for their subclasses too
_CASTS = {  # (value, annotation, type arguments, where) -> value; None: any other annotation
    None: lambda value, *_: value,
    "builtins.int": _to_int,
    "builtins.float": lambda value, *_: _refuse() if isinstance(value, bool) else float(value),
    "builtins.str": lambda value, *_: _to_text(value),
    "builtins.bool": lambda value, *_: _BOOL_WORDS[str(value).strip().lower()],
    "builtins.list": _to_list, "collections.Sequence": _to_list, "collections.MutableSequence": _to_list,
    "collections.Iterable": _to_list, "collections.Collection": _to_list,
    "builtins.frozenset": lambda *given: frozenset(_to_list(*given)), "builtins.tuple": _to_tuple,
    "builtins.dict": _to_dict, "collections.Mapping": _to_dict, "collections.MutableMapping": _to_dict,
    "typing.Union": _to_union, "types.UnionType": _to_union, "typing.Literal": _to_literal,
}
_CASTS.update(dict.fromkeys(("builtins.NoneType", "None"), lambda value, *_: value if value is None else _refuse()))
_CASTS.update(dict.fromkeys(("builtins.set", "collections.Set", "collections.MutableSet"),
                            lambda *given: set(_to_list(*given))))


def Required(*, alias: "str | None" = None, resolver: "Callable[[Any], Any] | None" = None) -> "Any":
    """Return a mark for a parameter that a loop fills from the task's args: a default value, or inside `Annotated`.

    The key is the parameter's name or `alias` (dots nest). `resolver` gets the value as it was submitted and
    returns what the function gets; without it the value is cast to the parameter's annotation."""
    return _Required(alias, resolver)


class _Required:
    """What `Required()` returns."""

    def __init__(self, alias, resolver):
        if alias is not None:
            check_key(alias, ["Required(alias=...)"])
        if resolver is not None and not callable(resolver):
            raise LabtaskerTypeError("Required(resolver=%r): a function is needed" % (resolver,))
        self.alias, self.resolver = alias, resolver

    def __repr__(self):
        return "Required(alias=%r, resolver=%r)" % (self.alias, self.resolver)

    def value(self, args, name, annotation):
        """Return what the parameter `name` gets from `args`; raises LabtaskerTypeError where it can't be cast."""
        key = self.alias or name
        found = get_path(args, key.split("."), self)
        if found is self:
            raise UnfitArgs("parameter %r: the task's args have no %r" % (name, key))
        if self.resolver:
            return self.resolver(found)
        return found if annotation is None else cast(found, annotation, "parameter %r" % name)


class _Marked:
    """What `Annotated[T, mark, ...]` is where typing has none; its attributes are named as those of typing are."""

    def __init__(self, kind, marks):
        self.__origin__, self.__args__, self.__metadata__ = kind, (kind,), marks

    def __repr__(self):
        return "Annotated[%s]" % ", ".join([_type_text(self.__origin__)] + list(map(repr, self.__metadata__)))

    def __call__(self, *given, **named):  # typing takes only what can be called for a type
        return self.__origin__(*given, **named)


class _Brackets(type):
    def __getitem__(cls, parts):
        import typing
        if hasattr(typing, "Annotated"):
            return typing.Annotated[parts]
        if not isinstance(parts, tuple) or len(parts) < 2:
            raise LabtaskerTypeError("Annotated[...] takes a type and marks: Annotated[int, Required()]")
        return _Marked(parts[0], parts[1:])


if TYPE_CHECKING:
    from typing_extensions import Annotated as Annotated
else:
    class Annotated(metaclass=_Brackets):
        """`Annotated[T, Required()]`: that of typing, and before Python 3.9, where it has none, one for loops."""


class BoundFunction:
    """A function whose Required() parameters are filled from a task's args: `fields` are the keys that it needs,
    `call(args, given, named)` calls it. Raises LabtaskerTypeError for a Required() that can't work."""

    def __init__(self, function, required_fields=None, pass_args_dict=False):
        import inspect
        self.function, self.pass_args_dict = function, pass_args_dict
        self.name = getattr(function, "__name__", str(function))
        if not callable(function) or inspect.isclass(function):
            raise LabtaskerTypeError("loop() decorates plain functions, not %r" % (function,))
        self._check_runs(function)
        self.signature, self.hints = inspect.signature(function), _type_hints(function)
        self.required = {}
        for parameter in self.signature.parameters.values():
            self._note(parameter)
        free = [p for name, p in self.signature.parameters.items() if name not in self.required]
        self.free = self.signature.replace(parameters=free)
        self.fields = self._fields(required_fields)

    @staticmethod
    def _check_runs(function):
        """Raise LabtaskerTypeError where a call would not run the function's body."""
        import inspect
        while isinstance(function, functools.partial):
            function = function.func
        kinds = {inspect.isasyncgenfunction: "an async generator", inspect.iscoroutinefunction: "a coroutine",
                 inspect.isgeneratorfunction: "a generator"}
        functions = function, getattr(type(function), "__call__", None)  # noqa: B004
        for called, is_one in itertools.product(functions, kinds):
            if is_one(called):
                raise LabtaskerTypeError(
                    "loop() decorates plain functions, not %r: its call returns %s and runs nothing. Call it in a "
                    "plain function that runs it to its end" % (function, kinds[is_one]))

    def _note(self, parameter):
        """Add the parameter to `required` if it is marked with Required()."""
        hint = self.hints.get(parameter.name)
        marks = [parameter.default] + list(getattr(hint, "__metadata__", ()))
        if Required in marks:
            raise LabtaskerTypeError("parameter %r of %s(): write Required(), with parentheses"
                                     % (parameter.name, self.name))
        marks = [mark for mark in marks if isinstance(mark, _Required)]
        if len(marks) > 1 or marks and parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise LabtaskerTypeError("parameter %r of %s() can't be marked with Required() %s" % (
                parameter.name, self.name, "twice" if len(marks) > 1 else "as it takes any number of values"))
        if marks:
            self.required[parameter.name] = marks[0]

    def _fields(self, required_fields):
        """Return the fields asked for and those of Required(), each once; "*" allows further keys."""
        fields = _check_fields(required_fields or [])
        for name, mark in self.required.items():
            fields += [mark.alias or name] if (mark.alias or name) not in fields else []
        return fields + ["*"] if self.pass_args_dict and "*" not in fields else fields

    def why_not(self, keys):
        """Return why the function does not get these keys of a task's args, as the end of "they have lr, ..."."""
        named = [key for key in dict.fromkeys(key.split(".")[0] for key in keys) if key in self.signature.parameters]
        if not named:
            return "which %s() lacks" % self.name
        has_default = any(self.signature.parameters[name].default is not self.signature.empty for name in named)
        return "which %s() does not take from tasks: mark %s with Required()%s" % (
            self.name, " and ".join(named), " in place of its default" * has_default)

    def check_call(self, given, named):
        """Raise LabtaskerTypeError unless these arguments fill exactly the parameters that the task's args don't."""
        self._bind({}, given, named)

    def call(self, args, given, named):
        """Return what the function returns for a task's `args`; raises what it raises, or LabtaskerTypeError."""
        import inspect
        values = self._bind(args, given, named)
        for name, mark in self.required.items():
            values[name] = mark.value(args, name, self.hints.get(name))
        ordered = collections.OrderedDict((n, values[n]) for n in self.signature.parameters if n in values)
        bound = inspect.BoundArguments(self.signature, ordered)
        return self.function(*bound.args, **bound.kwargs)

    def _bind(self, args, given, named):
        filled = [name for name in named if name in self.required]
        if filled:
            raise LabtaskerTypeError("%s(%s=...): this comes from the task's args, as it is marked with Required()"
                                     % (self.name, filled[0]))
        try:
            bound = self.free.bind(*(((args,) if self.pass_args_dict else ()) + given), **named)
        except TypeError as error:
            raise LabtaskerTypeError("%s(): %s. Mark a parameter with Required() to have it filled from the task's "
                                     "args, or give it at the call" % (self.name, error)) from None
        bound.apply_defaults()
        return dict(bound.arguments)


def _check_fields(fields):
    """Return a new list of `fields`, each a key or "*"; raises LabtaskerTypeError if it is anything else."""
    if isinstance(fields, str) or not isinstance(fields, (list, tuple, set)):
        raise LabtaskerTypeError('required_fields: a list of keys is needed, like ["lr", "model"], not %r' % (fields,))
    for field in fields:
        if field != "*":
            check_key(field, ["required_fields"])
    return list(fields)


_MARK = "\x1a"  # stands for a placeholder in the text that a reader reads; `places` has the offsets of the real ones


BUILT_IN = collections.OrderedDict([  # placeholders that stand for facts of the run: their meaning
    ("@task", "the task's id"), ("@run", "the run's id"), ("@name", "the task's name, if it has one"),
    ("@slot", "the loop's slot, from 0 on"), ("@attempt", "1, 2, ...: which run of the task this is"),
    ("@dir", "the folder that all runs of the task share"),
])


FORMS = collections.OrderedDict([  # how a placeholder is written: what it becomes
    ("%(key)", "the value"),
    ("%(--key)", "--key=VALUE; --key for True, nothing for False and None"),
    ("%(--[no-]key)", "--key for True, --no-key for False, nothing for None; %(--[no]key): --nokey"),
    ("%(key...)", "a word for each item of a list, or for each word of a text"),
    ("%(--key...)", "--key=ITEM for each of the same"),
    ("%(--*)", "--key=VALUE for every argument that the template does not name; %(--*-): with dashes in the names"),
    ("%(*)", "key=VALUE for every such argument, as Hydra reads it"),
])


_NO_WORD = "%s becomes none, one or several words: it has to be a word of its own"


class Placeholder(row_type("Placeholder", "typed exact key name kind dashes")):
    """One `%(...)` of a template: `key` of the args, None for all; `name` of the option that it writes, "" for none.

    A dash in the key, as it stands in `exact`, is the underscore that a submission makes of it."""

    __slots__ = ()

    @property
    def is_words(self):
        """Return whether it becomes none, one or several words."""
        return self.kind != "value"

    def value(self, args):
        """Return the value of its key; LabtaskerValueError if there is none."""
        for key in (self.exact, self.key):
            value = get_path(args, key.split("."), args)
            if value is not args:
                return value
        raise LabtaskerValueError("the task's args have no %r for %s" % (self.key, self.typed))

    def words(self, args, named):
        """Return the words that it becomes; raise LabtaskerValueError for a value that can't. `named`: keys that a star
        leaves out."""
        if self.key is not None:
            return _WORDS_OF[self.kind](self, self.value(args))
        found = [(key, value) for key, value in flatten(args) if key not in BUILT_IN and not any(
            key == other or key.startswith(other + ".") for other in named)]
        if self.kind == "hydra":
            return ["%s=%s" % (_hydra_key(key), hydra_text(value)) for key, value in found]
        return [word for key, value in found for word in _option_words(
            self._replace(name="--" + (key.replace("_", "-") if self.dashes else key)), value)]


def _option_words(place, value):
    if value is None or value is False:
        return []
    return [place.name if value is True else "%s=%s" % (place.name, value_text(value))]


def _switch_words(place, value):
    if not (value is None or isinstance(value, bool)):
        raise LabtaskerValueError("%s takes True, False or None, as --%s=False submits them, not %.80r" % (
            place.typed, place.exact, value))
    return [] if value is None else [place.name if value else "--" + place.dashes + place.name[2:]]


def _item_words(place, value):
    if isinstance(value, dict):
        raise LabtaskerValueError("%s takes a list or a text, not the dict %.80r" % (place.typed, value))
    if isinstance(value, str):
        import shlex
        try:
            return shlex.split(value)
        except ValueError as error:
            raise LabtaskerValueError("%s: %.80r can't be split into words: %s" % (place.typed, value, error)) from None
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [value_text(item) for item in items]


_WORDS_OF = {
    "option": _option_words, "switch": _switch_words, "items": _item_words,
    "options": lambda place, value: ["%s=%s" % (place.name, word) for word in _item_words(place, value)],
}


def _hydra_key(key, is_inner=False):
    """Return a key that Hydra reads as itself; raises LabtaskerValueError for others. `is_inner`: of a list's dict."""
    if not _HYDRA_KEY.match(key) or is_inner and re.match(r"(?i)(true|false|null|nan|inf)\Z|.*\.|\d", key):
        raise LabtaskerValueError("%%(*): Hydra can't read the key %.80r%s" % (key, " within a list" * is_inner))
    return key


def hydra_text(value):
    """Return a value as the grammar of Hydra's overrides reads it: true, null, [1,2], {a:1}, a text quoted where it
    would be read as anything else. `${...}` stays an interpolation."""
    if isinstance(value, list):
        return "[%s]" % ",".join(map(hydra_text, value))
    if isinstance(value, dict):
        return "{%s}" % ",".join("%s:%s" % (_hydra_key(key, True), hydra_text(item)) for key, item in value.items())
    if not isinstance(value, str):
        return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    if re.match(r"(?!(?i:true|false|null|nan|inf)\Z)[A-Za-z_/][\w/.-]*\Z", value, re.ASCII):
        return value
    text, interpolations = _with_escapes(value)
    if re.match(r"\$\{[\w.:-]+\}\Z", text):
        return text
    mark = "\"" if "'" in interpolations else "'"  # no \' in those: Hydra reads them in the word as it was typed, too
    return mark + re.sub(r"(\\*)(%s|\Z)" % mark, lambda found: 2 * found.group(1) + (
        "\\" + mark if found.group(2) else ""), text) + mark


_INTERPOLATION = Pattern(r"""(?x) \$\{ [ ]* (?:
      \.* (?: [\w\x1a-]+ | \[[\w\x1a-]+\] ) (?: \. [\w\x1a-]+ | \[[\w\x1a-]+\] )*
    | [A-Za-z_][\w.]* : ARG (?: , ARG )* ) [ ]* \}""".replace("ARG", r"""(?:
      (?: [A-Za-z0-9_\x1a \t/.+%*@?|:-] | \\[\\()[\]{}:=,\ \t] )*
    | [ \t]* (?: '[^'\\{}$]*' | "[^"\\{}$]*" | \[[A-Za-z0-9_\x1a\ ,.]*\] ) [ \t]* )"""))
_HYDRA_KEY = Pattern(r"(?a)[A-Za-z_][\w-]*(?:\.(?:[A-Za-z_][\w-]*|0|[1-9]\d*))*\Z")


def _with_escapes(text):
    """Return (the text, each `${` that begins no interpolation escaped as OmegaConf reads it; its interpolations)."""
    masked, shorter = None, text
    while shorter != masked:  # the innermost first
        masked, shorter = shorter, _INTERPOLATION.sub(lambda found: "\x1a" * len(found.group()), shorter)
    parts, end = [], 0
    for found in re.finditer(r"(\\*)\$\{", masked):
        parts += [text[end:found.start()], 2 * found.group(1), "\\${"]
        end = found.end()
    inside = "".join(one for one, mask in zip(text, masked) if mask == "\x1a")
    return "".join(parts) + text[end:], inside


class Template:
    """A text with placeholders (FORMS), dots for nested keys. `keys` are its keys, once each, in order, with "*" at the
    end where it takes all others too; `named` those that a star leaves out. BUILT_IN's values come with the args.

    `%%(` stands for `%(` itself; any other `%` is left alone. Raises TemplateError with the column."""

    TOKEN = Pattern(r"""(?x) %%\( | %\([ \t]* (?:
          (?P<fact>@[a-z]+) | (?P<all>--\*-?|\*)
        | (?P<option>--(?:\[no-?\])?)? (?P<key>(?!-)[a-zA-Z0-9_-]+(?:\.[a-zA-Z0-9_-]+)*) (?P<items>\.\.\.)?
        ) [ \t]*\) | %\(""")

    def __init__(self, text):
        self.text, self.parts, self.keys, self.spans, self.places, end = text, [""], [], [], [], 0
        for match in self.TOKEN.finditer(text):  # parts: literal text, placeholder, literal text, placeholder ... text
            if match.group() == "%(":
                raise TemplateError(_template_mistake(text, match.end()), text, match.start())
            self.parts[-1] += text[end:match.start()]
            end = match.end()
            if match.group() == "%%(":
                self.parts[-1] += "%("
                continue
            self._note(match)
            self.parts += [self.places[-1].exact or "*", ""]
        self.parts[-1] += text[end:]
        self.keys += ["*"] * any(place.key is None for place in self.places)
        self.named = self.keys

    def _note(self, match):
        """Add a placeholder that was found."""
        place = self._placeholder(match)
        self.spans.append(match.span())
        self.places.append(place)
        if (place.key or "").startswith("@") and place.key not in BUILT_IN:
            self.refuse(-1, "%%(%s) is none of %s%s" % (place.key, ", ".join(
                "%%(%s)" % name for name in BUILT_IN), hint(place.key, BUILT_IN)))
        if place.kind == "switch" and match.group("items"):
            self.refuse(-1, "a switch has no items: write %(--[no-]key) or %(--key...)")
        if place.key and place.key not in self.keys and place.key not in BUILT_IN:
            self.keys.append(place.key)

    @staticmethod
    def _placeholder(match):
        typed, option, key = match.group(), match.group("option"), match.group("key")
        if match.group("fact"):
            return Placeholder(typed, match.group("fact"), match.group("fact"), "", "value", "")
        if match.group("all"):
            return Placeholder(typed, None, None, "", "hydra" if match.group("all") == "*" else "option",
                               match.group("all") == "--*-")
        if option:
            kind = "options" if match.group("items") and option == "--" else "option" if option == "--" else "switch"
            return Placeholder(typed, key, key.replace("-", "_"), "--" + key, kind, option[3:-1])
        return Placeholder(typed, key, key.replace("-", "_"), "", "items" if match.group("items") else "value", "")

    def words(self, args):
        """Return the words that one word of an argv list becomes, each value in it unquoted."""
        if len(self.places) == 1 and self.places[0].is_words:
            return self.places[0].words(args, self.named)
        return [self.plain(args)]

    def check_word(self):
        """Raise TemplateError where a placeholder that becomes any number of words is only a part of a word."""
        for number, place in enumerate(self.places):
            if place.is_words and (self.places[1:] or any(self.parts[::2])):
                self.refuse(number, _NO_WORD % place.typed)

    def plain(self, args):
        """Return the text with each value unquoted, for a word of an argv list."""
        return self.filled(args, [value_text] * len(self.spans))

    def shell(self, args):
        """Return the text with each value quoted for /bin/sh; raises TemplateError where none can be put safely."""
        return self.filled(args, shell_writers(self))

    def filled(self, args, writers):
        """Return the text with each value written by its writer; raises LabtaskerValueError if one is missing."""
        parts = list(self.parts)
        for number, (place, write) in enumerate(zip(self.places, writers)):
            parts[2 * number + 1] = write(place.words(args, self.named) if place.is_words else place.value(args))
        return "".join(parts)

    def marked(self):
        """Return (the text with MARK for each placeholder, their offsets in it)."""
        places, offset = [], -1
        for part in self.parts[:-1:2]:
            offset += len(part) + 1
            places.append(offset)
        return _MARK.join(self.parts[::2]), places

    def refuse(self, number, message):
        """Raise TemplateError that shows the placeholder of this number."""
        raise TemplateError(message, self.text, self.spans[number][0])


def _template_mistake(text, begin):
    end = text.find(")", begin)
    inside = text[begin:end].split("\n")[0] if end >= 0 else None
    if inside is None or "\n" in text[begin:end]:
        return "this %( is not closed: write %(key), or %%( for the characters themselves"
    if not inside.strip():
        return "there is no key: write %(key), or %%( for the characters themselves"
    return ("%r is no key: letters, digits, '_' and '-', with dots for nested keys. There are %s; "
            "write %%%%( for the characters %%( themselves" % (inside, ", ".join(FORMS)))


def value_text(value):
    """Return a value as text, dicts and lists as JSON that is YAML too: LightningCLI and others read it so."""
    if not isinstance(value, (dict, list)):
        return str(value)
    return _NOT_IN_YAML.sub(lambda found: "\\u%04x" % ord(found.group()), json.dumps(value, ensure_ascii=False))


_NOT_IN_YAML = Pattern("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


# How a value is quoted depends on where its placeholder stands: outside quotes, or inside single or double ones.
# _ShellReader finds that out. Where it can't tell how a shell reads the text, it refuses every later placeholder:
# a wrong guess would let a task's value run as code.

_WAY_OUT = "set a variable before it, in a line V=%%(%s), and write \"$V\" here"
_PARAMETER = Pattern(r"""(?x) \$ (?: \w+ | [@*\#?$!-]
    | \{ [\#!]? (?:\w+|[@*\#?$!-]) (?: \[[\w@*$+-]+\] )? (?: [-:+=?\#%/,^@] (?:
        [^'"\\`$(){}<>\n] | \$\w | \\[\w/.] | "[^'"\\`$(){}<>\n]*" | \$\{\w+(?::?[-+=?][^'"\\`$(){}<>\n]*)?\}
        | \$\((?!\s*case\b)[^'"\\`$(){}<>\n;&|\#]*\) )* )? \} )""")
_SHELL_SUM = Pattern(r"""\(\(((?:[^'"`\\\n(){}]|\([^'"`\\\n(){}]*\)|\$\{\w+\})*)\)\)""")
_OPERATOR_OF_NUMBERS = Pattern(r"\s-(?:eq|ne|lt|le|gt|ge|v|R)\s")
# Where a shell evaluates arithmetic outside $((...)), even in quotes: from the start of the command to the placeholder.
_CALCULATED = Pattern(r"""(?sx) \s* (?: (?:then|do|else|elif|if|while|until|!|\{|time|builtin|command) \s+ )* (?:
      (?: [\w.]+ = \S* \s+ )* (?: (?:let|integer|float) \s | \w+ \[ [^]]* \Z )
    | (?:declare|typeset|local|readonly|export) \s (?: .*\s )? (?: -\w*[iEF]\w* \s | ["']? \w+ \[ [^]]* \Z )
    | (?: .*\s )? \w+ \+?= \( (?: .*\s )? \[ [^]]* \Z )""")
_ONE_LINE, _JOINED_LINE = Pattern(r"[^\n]*\n?"), Pattern(r"(?:[^\n\\]|\\[^\n]|\\\n)*\\?\n?")
_HERE_WORD = Pattern(r"(?:'[^'\n\x1a]*'|\"[^\"\\$`\n\x1a]*\"|\\[^\n\x1a]|[^\s'\"\\$`;&|<>()\x1a])+")


class _AllRead(Exception):
    """No placeholder follows, so how a shell reads the rest does not matter."""


class _ShellReader:
    """Reads a template as a shell does; `ways` maps each placeholder's number to the key of its SHELL_WRITERS entry."""

    def __init__(self, template, is_zsh=False):
        self.template, self.is_zsh, self.ways = template, is_zsh, {}
        self.text, self.places = template.marked()
        self.numbers = {offset: number for number, offset in enumerate(self.places)}
        self.inside = self.started = None  # the construct around that allows no placeholder; where the command started
        self.numeric_until = 0
        try:
            if "\0" in self.text:
                self.give_up(0, "a character NUL")
            self.commands(0, is_inner=False)
        except _AllRead:
            pass

    def give_up(self, i, what):
        """Refuse the first placeholder at or after offset `i`, as how a shell reads it is unknown."""
        number = next((number for number, place in enumerate(self.places) if place >= i), None)
        if number is None:
            raise _AllRead
        key, line = self.template.parts[2 * number + 1], self.text.count("\n", 0, i) + 1
        self.template.refuse(number, "how a shell reads %%(%s) can't be told with certainty after %s in line %d: %s" % (
            key, what, line, _WAY_OUT % key))

    def refuse(self, i, what):
        """Refuse the placeholder at the offset `i`."""
        number, key = self.numbers[i], self.template.parts[2 * self.numbers[i] + 1]
        self.template.refuse(number, "%%(%s) stands %s, where no value can be put safely: %s" % (
            key, what, _WAY_OUT % key))

    def between(self, begin, end):
        """Return the offsets of the placeholders from one offset to before another."""
        return [i for i in self.places if begin <= i < end]

    def check_free(self, begin, end, what):
        """Refuse a placeholder between two offsets."""
        for i in self.between(begin, end):
            self.refuse(i, what)

    def note(self, i, way):
        """Record how the placeholder at offset `i` is read."""
        if self.inside:
            self.refuse(i, self.inside)
        begun = self.text[self.started:i]
        if i < self.numeric_until or _CALCULATED.match(begun) or self.is_zsh and re.search(r"\$\w+\[[^\]]*\Z", begun):
            way = "number"
            if re.search(r"\$\w*\Z", begun):
                self.refuse(i, "right behind a variable")
        self.ways[self.numbers[i]] = way

    def commands(self, i, is_inner):
        """Return the offset after commands: the end of the text, or after the `)` that closes inner ones."""
        text, is_fresh, depth, documents = self.text, True, 0, []  # is_fresh: a word would begin here
        self.started = i
        while i < len(text):
            char, begin = text[i], i
            if i in self.numbers:
                self.note(i, "bare")
                i += 1
            elif char == "\\":
                i = self.escaped(i)
                if text[i - 1] == "\n":
                    continue
            elif char in _QUOTING:
                i = _QUOTING[char](self, i, False)
                if documents and "\n" in text[begin:i]:
                    self.give_up(begin, "lines within quotes behind <<")
            elif char == "#" and is_fresh:
                i = self.comment(i, is_inner)
            elif char == "\n":
                i = _here_documents(self, i + 1, documents, is_inner)
                documents = []
            elif text.startswith("<<", i) and not text.startswith("<<<", i):
                i = _document_word(self, i + 2, documents)
            elif text.startswith("((", i):
                i = self.arithmetic(i)
            elif char in "()":
                depth += 1 if char == "(" else -1
                self.check_paren(i)
                i += 1
                if depth < 0 and is_inner:
                    if documents:
                        self.give_up(i, "a here document in $(...) that has not begun")
                    return i
            else:
                i = self.plain_word(i, is_fresh, is_inner)
            is_fresh = text[i - 1] in " \t\n;&|()" and (i == begin + 1 or char in "\n(")
            if is_fresh and char in ";&|\n()" and text[max(0, begin - 1):begin + 1] not in ("=(", ">&", "<&"):
                self.started = i
        return i

    def plain_word(self, i, is_fresh, is_inner):
        """Return the offset after one or more characters that don't matter for quoting."""
        text = self.text
        if text.startswith("<<<", i):
            return i + 3
        if text[i] in "<>" and text.startswith("#", i + 1):
            self.give_up(i, "%s#" % text[i])
        if is_fresh and is_inner and re.match(r"case\b", text[i:i + 5]):
            self.give_up(i, "case within $(...)")
        if is_fresh and re.match(r"\[\[\s", text[i:i + 3]):
            end = text.find("]]", i)
            if end >= 0 and _OPERATOR_OF_NUMBERS.search(text[i:end]):
                self.numeric_until = max(self.numeric_until, end)
            return i + 2
        return i + 1

    def check_paren(self, i):
        """Give up at a parenthesis that zsh reads in its own way."""
        before, after = self.text[i - 1:i], self.text[i + 1:i + 2]
        is_in_word = before and before not in " \t\n;&|(=<>$" and after != ")"
        if self.text[i] == "(" and self.is_zsh and (after == "#" or is_in_word):
            self.give_up(i, "a parenthesis within a word of zsh")

    def escaped(self, i):
        """Return the offset after a backslash and what it escapes."""
        if i + 1 in self.numbers:
            self.refuse(i + 1, "behind a backslash")
        return min(i + 2, len(self.text))

    def single(self, i, _):
        """Return the offset after 'text'."""
        end = (self.text + "'").find("'", i + 1)
        for place in self.between(i, end):
            self.note(place, "single")
        return min(end + 1, len(self.text))

    def double(self, i, _):
        """Return the offset after "text"."""
        i += 1
        while i < len(self.text) and self.text[i] != '"':
            if i in self.numbers:
                self.note(i, "double")
                i += 1
            elif self.text[i] == "\\":
                i = self.escaped(i)
            elif self.text[i] in "$`":
                i = _QUOTING[self.text[i]](self, i, True)
            else:
                i += 1
        return min(i + 1, len(self.text))

    def backticks(self, i, _):
        """Return the offset after `commands`."""
        match = re.compile(r"(?s)`((?:[^`\\]|\\.)*)`").match(self.text, i)
        if not match:
            self.give_up(i, "a ` that is not closed")
        self.check_free(i, match.end(), "within `...`")
        if match.group(1).count("'") % 2 or match.group(1).count('"') % 2 or "<<" in match.group(1):
            self.give_up(i, "`...` with an open quote or a here document")
        return match.end()

    def dollar(self, i, is_quoted):
        """Return the offset after a $ and what belongs to it."""
        text = self.text
        if text.startswith("$((", i):
            return self.arithmetic(i + 1)
        if text.startswith("$(", i):
            outer = self.inside, self.started
            self.inside = self.inside or "within $(...)"
            i = self.commands(i + 2, is_inner=True)
            self.inside, self.started = outer
            return i
        if i + 1 in self.numbers and not is_quoted:
            self.refuse(i + 1, "behind a $")
        if text.startswith("$'", i) and not is_quoted:
            end = text.find("'", i + 2)
            self.check_free(i, len(text) if end < 0 else end, "within $'...'")
            if end < 0 or (len(text[:end]) - len(text[:end].rstrip("\\"))) % 2:
                self.give_up(i, "a backslash in $'...'")
            return end + 1
        match = _PARAMETER.match(text, i)
        if text[i + 1:i + 2] in ("{", "["):
            if not match:
                self.check_free(i, text.find("}" if text[i + 1] == "{" else "]", i), "within $" + text[i + 1])
                self.give_up(i, "$%s with quotes or expansions in it" % text[i + 1])
            self.check_free(i, match.end(), "within ${...}")
        return match.end() if match else i + 1

    def arithmetic(self, i):
        """Return the offset after ((a + 1)). It allows numbers, as nothing in it can run a command."""
        match = _SHELL_SUM.match(self.text, i)
        if not match or re.search(r"\s#|\bcase\b", match.group(1)):
            self.give_up(i, "(( with quotes, expansions or comments in it")
        for place in self.between(i, match.end()):
            if self.inside:
                self.refuse(place, self.inside)
            self.ways[self.numbers[place]] = "term"
        return match.end()

    def comment(self, i, is_inner):
        """Return the offset of the end of a # comment; its placeholders are left as typed."""
        end = (self.text + "\n").find("\n", i)
        if is_inner and re.search("['\"`()\\\\]", self.text[i:end]):
            self.give_up(i, "a comment with quotes or parentheses in $(...)")
        for place in self.between(i, end):
            self.ways[self.numbers[place]] = "comment"
        return end


def _is_flat(body):
    """Return whether every expansion in a here document ends on its own line, so that none can hide its end."""
    return all(not re.search(r"`|\$[({]", line) or line.count("(") == line.count(")") and line.count("{") ==
               line.count("}") and not any(line.count(quote) % 2 for quote in "`'\"") for line in body.split("\n"))


def _document_word(reader, i, documents):
    """Return the offset after the word that will end a here document; adds the document to `documents`."""
    has_tabs = reader.text.startswith("-", i)
    begin = re.compile(r"-?[ \t]*").match(reader.text, i).end()
    match = _HERE_WORD.match(reader.text, begin)
    if begin in reader.numbers or match and match.end() in reader.numbers:
        reader.refuse(begin if begin in reader.numbers else match.end(), "in the word that ends a here document")
    if not match or reader.text[match.end():match.end() + 1] in ("'", '"', "$", "`", "\\"):
        reader.give_up(i, "<< without a plain word")
    quotes = set(re.findall(r"['\"\\]", match.group()))
    if len(quotes) > 1:
        reader.give_up(i, "<< with a word of two kinds of quotes")
    documents.append((re.sub(r"['\"\\]", "", match.group()), has_tabs, not quotes))
    return match.end()


def _here_documents(reader, i, documents, is_inner):
    """Return the offset after the here documents whose bodies start at offset `i`, the start of a line."""
    for word, has_tabs, is_expanded in documents:
        begin, end = i, None
        while i < len(reader.text) and end is None:
            match = (_JOINED_LINE if is_expanded else _ONE_LINE).match(reader.text, i)
            line = match.group().rstrip("\n")
            if (line.lstrip("\t") if has_tabs else line) == word:
                end = match.end()
            elif is_inner and line.lstrip("\t").startswith(word):
                reader.give_up(i, "a here document in $(...)")
            i = match.end()
        body_end = len(reader.text) if end is None else end
        reader.check_free(begin, body_end, "in a here document")
        body = reader.text[begin:body_end]
        if is_inner and re.search("['\"`()]", body) or is_expanded and not _is_flat(body):
            reader.give_up(begin, "a here document with commands or quotes in it")
        i = body_end
    return i


_QUOTING = {"'": _ShellReader.single, '"': _ShellReader.double, "`": _ShellReader.backticks, "$": _ShellReader.dollar}

# How values are written, by how their placeholders are read. A Spot is a placeholder: its key, the characters beside
# it, and its own text.
Spot = row_type("Spot", "key before after typed")
_BARE = Pattern(r"[\w%+:./@-]+\Z", re.ASCII)  # needs no quotes between BARE_BEFORE and BARE_AFTER
_BARE_BEFORE, _BARE_AFTER = Pattern(r"(?:\A|(?<!\$)[\s=/:.,;|&(@\x1a-])\Z"), Pattern(r"[\s/:.,;|&)}\x1a-]?\Z")
_SHELL_WORDS = frozenset("if then else elif fi do done case esac while until for in function select time coproc repeat "
                     "foreach end nocorrect noglob".split())


def quoted(text):
    """Return a text in single quotes, for a shell."""
    return "'%s'" % text.replace("'", "'\"'\"'")


def _text_of(value, spot):
    text = value_text(value)
    if "\0" in text:
        raise LabtaskerValueError("%%(%s) has a null character, which no command can get" % spot.key)
    return text


def _write_bare(value, spot):
    text = _text_of(value, spot)
    is_bare = _BARE.match(text) and text not in _SHELL_WORDS and _BARE_BEFORE.search(spot.before) and \
        _BARE_AFTER.match(spot.after)
    return text if is_bare else quoted(text)


def _write_number(value, spot):
    text = _text_of(value, spot)
    if not re.match(r"-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?\Z", text):
        raise LabtaskerValueError("%%(%s) stands in shell arithmetic, which takes a number, not %.80r" % (
            spot.key, text))
    return text


def _write_term(value, spot):
    text = _write_number(value, spot)
    return "(%s)" % text if text.startswith("-") else text


_SHELL_WRITERS = {
    "bare": _write_bare,
    "word": lambda value, spot: quoted(_text_of(value, spot)),
    "single": lambda value, spot: quoted(_text_of(value, spot))[1:-1],
    "double": lambda value, spot: '"%s"' % quoted(_text_of(value, spot)),
    "number": _write_number,
    "term": _write_term,
    "comment": lambda value, spot: spot.typed,
}


def shell_writers(template, is_zsh=False):
    """Return the writer of each placeholder in a shell text; raises TemplateError where no value can be put safely."""
    reader, writers = _ShellReader(template, is_zsh), []
    for number, (begin, end) in enumerate(template.spans):
        text, place, way = reader.text, reader.places[number], reader.ways[number]
        spot = Spot(template.places[number].key, text[max(0, place - 2):place], text[place + 1:place + 2],
                    template.text[begin:end])
        if template.places[number].is_words and way != "comment":
            is_alone = _ALONE_BEFORE.search(spot.before) and _ALONE_AFTER.match(spot.after)
            if way not in ("bare", "word") or not is_alone:
                template.refuse(number, _NO_WORD % spot.typed + ", outside of quotes")
            writers.append(functools.partial(_write_words, spot=spot))
            continue
        writers.append(functools.partial(_SHELL_WRITERS["word" if way == "bare" and is_zsh else way], spot=spot))
    return writers


_ALONE_BEFORE, _ALONE_AFTER = Pattern(r"(?:\A|[\s;&|(])\Z"), Pattern(r"[\s;&|)]|\Z")


def _write_words(words, spot):
    return " ".join(quoted(_text_of(word, spot)) for word in words)


# A script may be Python: there a value becomes a literal, or part of a string literal.

_PYTHON_TOKEN = Pattern(r"""(?sx) (?P<comment>\#[^\n]*) | (?P<prefix>[A-Za-z]*) (?:
      (?P<three>\'\'\'|\"\"\") (?:\\.|.)*? (?P=three)
    | (?P<one>['"]) (?!(?P=one){2}) (?:\\.|(?!(?P=one))[^\\\n])* (?P=one)
    | (?P<open>['"]) )""")
_OPEN_ESCAPE = Pattern(r"(?:\A|[^\\])(?:\\\\)*\\(?:[xuU][0-9a-fA-F]*|[0-7]{1,2}|N(?:\{[^}]*)?)?\Z")


def _python_literal(value):
    if isinstance(value, (dict, list)) or isinstance(value, float) and not math.isfinite(value):
        return "__import__('json').loads(%s)" % ascii(json.dumps(value))
    return "(%s)" % ascii(value)


def _python_part(value):
    return "".join(char if re.match(r"[A-Za-z ]", char) else "\\U%08x" % ord(char) for char in value_text(value))


def python_writers(template):
    """Return the writer of each placeholder in a Python text; raises TemplateError where no value can be put safely."""
    text, places = template.marked()
    for number, place in enumerate(template.places):
        if place.is_words:
            template.refuse(number, "%s becomes words, which Python text has none of: write %%(key)" % place.typed)
    writers = dict.fromkeys(places, _python_literal)
    for match in _PYTHON_TOKEN.finditer(text):
        comment, prefix = match.group("comment"), match.group("prefix") or ""
        inner = [place for place in places if match.start() < place < match.end()]
        bare = match.group().replace("{{", "").replace("}}", "")
        if match.group("open") or re.search("[ft]", prefix.lower()) and bare.count("{") != bare.count("}"):
            inner = [place for place in places if place > match.start()]  # Python versions read it differently
        for place in inner:
            number = places.index(place)
            if comment is not None:
                writers[place] = lambda value, typed=template.text.__getitem__(slice(*template.spans[number])): typed
            elif match.group("open") or prefix not in ("", "u", "U") or _OPEN_ESCAPE.search(text[match.start():place]):
                template.refuse(number, "no value can be put safely here in Python text: set a variable before it, "
                                        "V = %%(%s), and use V here" % template.places[number].key)
            else:
                writers[place] = _python_part
    for number, place in enumerate(places):
        beside = text[max(0, place - 1):place] + text[place + 1:place + 2]
        if writers[place] is _python_literal and re.search(r"\w", beside):
            template.refuse(number, "a value can't be part of a Python name")
    return [writers[place] for place in places]


def writers_for(program, template):
    """Return the writer of each placeholder in a text that a program, given as words, runs.

    Raises TemplateError where no value can be put safely, UsageError if the program's language is unknown."""
    if not template.spans:
        return []
    words = [os.path.basename(word) for word in program if not word.startswith("-") and "=" not in word]
    name = words[1] if words[:1] in (["env"], ["busybox"]) and words[1:] else words[0] if words else ""
    import shutil
    for known in (name, os.path.basename(os.path.realpath(shutil.which(program[0]) or program[0]))):
        if re.match(r"(?:r?ba|da|a|r?k|m?k|lk|r?z|ya)?sh[\d.-]*\Z", known):
            return shell_writers(template, is_zsh="zsh" in known)
        if re.match(r"(?:python|pypy)[\d.]*[a-z]?\Z", known):
            return python_writers(template)
    raise UsageError("values can be put into a text for sh, bash, dash, ksh, zsh and Python. How %s reads it is not "
                     "known: give it the values as words, as in loop -- %s FILE '%%(%s)'" % (
                         name, " ".join(program), template.places[0].key or "*"))


class JobCommand:
    """A command with placeholders: `argv`, a list of words; `shell`, a text for a shell; or a script for one.

    `keys` are the keys that it takes from a task's args, `cmd` is what the task keeps of it."""

    def __init__(self, argv=None, shell=None, script_path=None, executable=None, workdir=None):
        if sum(map(bool, (argv, shell, script_path))) != 1:
            raise UsageError("what to run? One of a command, a text for the shell, and a script is needed")
        if argv and executable:
            raise UsageError("an executable goes with a text for the shell or a script, not with a list of words")
        self.is_argv, self.is_script, self.executable = bool(argv), bool(script_path), executable
        self.text = _read_script(script_path) if script_path else shell
        self.templates = [Template(text) for text in (argv or [self.text])]
        self.writers = None if argv else writers_for(self.program(), self.templates[0])
        self.cmd = list(argv) if argv else shell or [executable or "/bin/sh", str(script_path)]
        self.workdir, self.origin = workdir and Template(workdir), os.getcwd()
        templates = self.templates + [self.workdir] * bool(workdir)
        for template in templates[:len(argv or ())] + templates[len(self.templates):]:
            template.check_word()
        self.keys = list(collections.OrderedDict.fromkeys(key for one in templates for key in one.keys))
        for template in templates:
            template.named = self.keys

    def words(self, args, folder):
        """Return (argv list, path of a script to be removed later or None); LabtaskerValueError if a key is missing."""
        if self.is_argv:
            words = [word for template in self.templates for word in template.words(args)]
            if not words:
                raise LabtaskerValueError("with this task's args the command has no words")
            is_relative = self.workdir and os.path.dirname(words[0])
            return [os.path.join(self.origin, words[0])] + words[1:] if is_relative else words, None
        text = self.templates[0].filled(args, self.writers)
        if not self.is_script:
            return self.program() + ["-c", text], None
        path = _write_script(text, folder)
        return self.program() + [os.fsencode(path) if os.name == "posix" else path], path

    def why_not(self, keys):
        """Return why the command does not get these keys of a task's args, as the end of "they have lr, ..."."""
        return "which the command lacks"

    def folder(self, args):
        """Return the folder that a job runs in, made where it is missing; None is the loop's own."""
        if not self.workdir:
            return None
        path = self.workdir.plain(args)
        if not path or "\0" in path:
            raise LabtaskerValueError("--workdir: %r is no folder" % path)
        try:
            path = os.path.join(self.origin, for_system(path))
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            if error.errno in _PASSING or not self.workdir.spans:
                raise
            raise LabtaskerValueError("--workdir: can't make %s: %s" % (from_system(path), error.strerror)) from None
        return path

    def program(self):
        """Return the words that run the text: the executable asked for, else the #! line of a script, else /bin/sh."""
        import shlex
        line = self.text.split("\n", 1)[0] if self.is_script else ""
        asked = [self.executable] if self.executable else shlex.split(line[2:]) if line.startswith("#!") else []
        return asked or ["/bin/sh"]

    def is_for_this_task(self, error):
        """Return whether the command can't be started with this task's args, but may be with others."""
        if not isinstance(error, OSError):
            return isinstance(error, (ValueError, RecursionError))
        own_program = self.is_argv and bool(self.templates[0].keys)
        return own_program and error.errno not in _PASSING or error.errno == errno.E2BIG


def outcome_not_started(command, error):
    """Return the Outcome of a run whose job could not be started."""
    name, why = getattr(error, "filename", None), str(error) or type(error).__name__
    if isinstance(name, bytes):
        why = why.replace(repr(name), repr(name.decode("utf-8", "surrogateescape")))
    why = "can't start the command: " + why
    if command.is_for_this_task(error):
        return Outcome("failed", {"labtasker_error": why}, is_final=not isinstance(error, OSError))
    is_passing = not isinstance(error, OSError) or error.errno in _PASSING
    return Outcome("pending", reason=why, fatal=None if is_passing else why)


def start_job(words, environment, ends, folder=None):
    """Return the Popen of a job. Its words are given as UTF-8, as they were submitted, whatever the locale."""
    if os.name == "posix":
        words = [word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word for word in words]
    environment = dict(environment, PWD=folder) if folder else environment
    return start_program(words, stdout=ends[0], stderr=ends[1], env=environment, cwd=folder)


# Errors of a machine that is short of something for a moment: neither the task nor its command is at fault.
_PASSING = frozenset(getattr(errno, name) for name in (
    "EAGAIN", "ENOMEM", "EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EIO", "ESTALE", "ETXTBSY", "ETIMEDOUT", "EINTR")
    if hasattr(errno, name))


def read_typed(path):
    """Return the bytes of a file or pipe that a person names; raises LabtaskerValueError for a device, such as
    /dev/zero, whose end may never come."""
    import stat
    with open(path, "rb") as file:
        there = os.fstat(file.fileno())
        if stat.S_ISCHR(there.st_mode) and not file.isatty() and there.st_rdev != os.stat(os.devnull).st_rdev:
            raise LabtaskerValueError("%s is a device, which may have no end" % path)
        return file.read()


def _read_script(path):
    """Return a script's text, also where it is not all UTF-8; LabtaskerValueError where it can't be read."""
    try:
        data = read_typed(for_system(str(path)))
    except OSError as error:
        raise LabtaskerValueError("can't read the script %s: %s" % (path, error.strerror)) from None
    is_marked = data.startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS))
    return (decoded(data, path) if is_marked else data.decode("utf-8", "surrogateescape")).replace("\r\n", "\n")


def _write_script(text, folder):
    """Return the path of a new file that only its owner can read and run: in `folder`, or where that can't take it
    among the temporary ones."""
    import tempfile
    try:
        number, path = tempfile.mkstemp(prefix="script-", dir=folder)
    except OSError:
        number, path = tempfile.mkstemp(prefix="labtasker-script-")
    with open(number, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.chmod(path, 0o700)
    return path


Outcome = row_type("Outcome", "status summary reason fatal facts delay_s is_final failure",
                   (None, None, None, None, 0, False, "exit"))
# status None: nothing to report; fatal: why the loop must end; facts: what the task's attempt keeps of the end;
# delay_s: the least pause of a task that its job handed back; is_final: another run would fail alike


# 13. Output ##################################################################
#
# What comes of a job: how it ended, its processes, its output as it is printed (progress bars, metrics,
# the log), the time that is left, and what a loop prints of it. Knows nothing of stores and servers.
# Uses 1 to 4, 7, 10, 12. Tests: test_worker.py, test_logs.py, test_metrics.py, test_loop.py.


def outcome_of_exit(code):
    """Return the Outcome of a job that ended by itself: 0 is success, 75 hands the task back, a signal is negative."""
    if code == 0:
        return Outcome("success")
    if code == _TEMPORARY_FAILURE:
        return Outcome("pending", reason="exit code 75 (try again)")
    error = "exit code %d" % code if code > 0 else "killed by signal %d (%s)" % (-code, signal_name(-code))
    return Outcome("failed", {"labtasker_error": error})


def exit_facts(code):
    """Return how a process ended, as its task's attempt keeps it."""
    return {"exit_code": code} if code >= 0 else {"signal": signal_name(-code)}


def exception_summary(error):
    """Return type, message and traceback of an exception, without the frames of this file before the user's.

    Never raises: an exception can have no text, a name that is none, or a traceback that can't be shown."""
    import traceback
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == exception_summary.__code__.co_filename:
        trace = trace.tb_next
    kind = _readable(lambda: type(error).__name__, "exception")
    message = _readable(lambda: str(error), "(its text can't be made)")
    short = "%s: %s\n" % (kind, message)
    text = _readable(lambda: "".join(traceback.format_exception(type(error), error, trace)), "") or _readable(
        lambda: "".join(traceback.format_tb(trace)) + short, short)
    return {"type": kind[:_TEXT_LIMIT], "message": message[:_TEXT_LIMIT], "traceback": text[-_TEXT_LIMIT:]}


def result_or(make, otherwise):
    """Return make(), which is a user's code, or `otherwise` where it raises anything."""
    try:
        return make()
    except BaseException:
        return otherwise


def _readable(make, otherwise):
    """Return the text that make() returns, without lone surrogates, or `otherwise` where it raises or is no text."""
    text = result_or(lambda: str.encode(make(), "utf-8", "backslashreplace").decode("utf-8"), None)
    return otherwise if text is None else text


def failure_text(summary):
    """Return why a run failed, in one line. Of an exception's message it is the first line, as hints may follow; the
    last one where the first only leads up to it with a colon."""
    raised = summary.get("labtasker_exception")
    if not isinstance(raised, dict):
        return str(summary.get("labtasker_error") or "").strip().split("\n")[-1].strip()
    message = [line.strip() for line in str(raised.get("message") or "").split("\n") if line.strip()]
    told = message[-1:] if message and message[0].endswith(":") else message[:1]
    return ": ".join([str(raised.get("type"))] + told)


def signal_name(signum):
    """Return "SIGTERM" for 15, "signal 99" for one without a name."""
    import signal
    try:
        return signal.Signals(signum).name
    except ValueError:
        return "signal %d" % signum


_TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h
_TEXT_LIMIT = 20000  # letters of a message or traceback that go into a summary


def start_thread(thread):
    """Start a thread, or raise LabtaskerRuntimeError where the system has none left."""
    try:
        thread.start()
    except RuntimeError as error:
        raise LabtaskerRuntimeError("no more threads can be had here (%s): raise `ulimit -u` or the pids.max of the "
                                    "cgroup" % error) from None


PROGRAM_TIMEOUT_S = 20  # squeue of a busy controller, nvidia-smi of a GPU that sleeps


def ask_program(words):
    """Return what a program prints; "" if it is not installed, fails, or hangs."""
    import signal
    import subprocess
    own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        process = start_program(words, stdout=PIPE, env=own)
        output = process.communicate(timeout=PROGRAM_TIMEOUT_S)[0]
    except OSError:
        return ""
    except subprocess.TimeoutExpired:
        signal_group(process.pid, signal.SIGKILL)
        process.stdout.close()
        return ""
    return output.decode("utf-8", "replace") if process.returncode == 0 else ""


def signal_group(group, signum):
    """Return whether the signal reached a process of the group; signal 0 only checks."""
    try:
        os.killpg(group, signum)
        return True
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so of zombies
        return signum != 0


def _is_group_alive(group):
    """Return whether a process of the group runs. Zombies don't count: in a container they may stay."""
    if not signal_group(group, 0):
        return False
    try:
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:  # not Linux
        return True
    return any(_state_in_group(pid, group) not in "ZX" for pid in pids)


def _state_in_group(pid, group):
    """Return the letter of a process' state, "X" (dead) if it is not in the group."""
    try:
        state, its_group, _ = process_stat(pid)
    except OSError:
        return "X"
    return state if its_group == group else "X"


def is_stopped(pid):
    """Return whether the process is stopped (Ctrl-Z, SIGSTOP); then its runs must not be kept alive."""
    try:
        return process_stat(pid)[0] in "Tt"
    except OSError:  # not Linux
        return False


def end_groups(groups, give_up_at, pause):
    """Send TERM to process groups, and KILL to what is left of them at `give_up_at`."""
    import signal
    for group in groups:
        signal_group(group, signal.SIGTERM)
    while any(map(_is_group_alive, groups)) and monotonic() < give_up_at:
        pause(0.02)
    for group in groups:
        signal_group(group, signal.SIGKILL)


class Progress:
    """Makes readable lines of a stream with carriage returns. Its time and memory do not depend on the content."""

    STEP_S = 1.0  # between two states of a line that are kept
    LONGEST_BYTES = 65536  # of a state that is held back: a longer one is no progress bar, and is kept as it comes
    RETURNS = Pattern(br"\r\r+")
    OVERWRITTEN = Pattern(br"\r[^\n]*\r")  # from the end of a line's first state to the beginning of its last

    def __init__(self):
        self.held, self.is_held, self.shown_at = bytearray(), False, -math.inf
        self.ends_in_return, self.is_line_empty = False, True

    def feed(self, data, at):
        """Return what of `data`, which came at the time `at`, goes to the file now."""
        data = b"\r" * self.ends_in_return + data
        self.ends_in_return = data.endswith(b"\r")  # the next byte decides whether it only ends a line
        if b"\r" not in data:
            return self._go_on(data)
        data = self.RETURNS.sub(b"\r", data.rstrip(b"\r") if self.ends_in_return else data).replace(b"\r\n", b"\n")
        data, is_over, states = data.partition(b"\r")
        found = [self._go_on(data)]
        if is_over:
            self.held, self.is_held = bytearray(), False
            if at - self.shown_at >= self.STEP_S:
                self.shown_at = at
                data, is_over, states = states.partition(b"\r")
                found += [b"" if self.is_line_empty else b"\n", data]
                self.is_line_empty = data.endswith(b"\n") or not data
        if is_over:
            found += self._overwritten(b"\r" + states)
        return b"".join(found)

    def _overwritten(self, states):
        """Yield what is kept of states that follow each other too quickly, each after a carriage return: the first and
        the last of each line. The last one of a line without an end is held back."""
        whole, end, begun = self.OVERWRITTEN.sub(b"\r", states).rpartition(b"\n")
        if end:
            yield whole.replace(b"\n\r", b"\n").replace(b"\r", b"\n")[self.is_line_empty:] + end
            self.is_line_empty = True
        first, self.is_held, last = begun.partition(b"\r")
        yield first
        self.is_line_empty = self.is_line_empty and not first
        yield self._go_on(last)

    def _go_on(self, data):
        """Return what of bytes without a carriage return is kept now."""
        if self.is_held:
            self.held += data
            return self.rest() if b"\n" in data or len(self.held) > self.LONGEST_BYTES else b""
        if data:
            self.is_line_empty = data.endswith(b"\n")
        return data

    def rest(self):
        """Return the state of the line that was held back."""
        found, self.held, self.is_held = bytes(self.held), bytearray(), False
        found = (b"" if self.is_line_empty or not found else b"\n") + found
        self.is_line_empty = found.endswith(b"\n") if found else self.is_line_empty
        return found


class Labelled:
    """Makes whole lines with a label before each of a stream's bytes, so that those of several jobs are told apart."""

    LONGEST_BYTES = 65536  # what has no end by then is shown as a line

    def __init__(self, label):
        self.label, self.progress, self.rest = label.encode(), Progress(), bytearray()

    def __call__(self, data):
        """Return what is to be shown of `data`; b"" ends the stream."""
        come = self.progress.feed(data, monotonic()) if data else self.progress.rest()
        self.rest += come
        is_whole = not data or len(self.rest) > self.LONGEST_BYTES
        if not is_whole and b"\n" not in come:
            return b""
        if is_whole and self.rest and not self.rest.endswith(b"\n"):
            self.rest += b"\n"
        lines, end, rest = bytes(self.rest).rpartition(b"\n")
        self.rest = bytearray(rest)
        return end and self.label + lines.replace(b"\n", b"\n" + self.label) + end


# ---- Metrics: values that are read from what a job prints

_LINE_BYTES = 65536  # of a line that is read; what is beyond has no values
_NUMBER_TEXT = Pattern(r"(?i)[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)\Z")


class Metric:
    """A pattern whose group 1 is a number in a line that a job prints. Raises UsageError for one that can't be used."""

    def __init__(self, pattern, option):
        try:
            self.pattern, self.longest = compile_search(pattern)
        except LabtaskerValueError as error:
            raise UsageError("%s: %s" % (option, error)) from None
        if not self.pattern.groups:
            raise UsageError("%s: the pattern %.100r has no group: put ( ) around the number in it" % (option, pattern))
        self.literal = self._literal(pattern)

    def _literal(self, pattern):
        """Return the longest text that a line must have, as bytes, to match; b"" if none is known."""
        longest = run = ""
        for kind, value in [] if self.pattern.flags & re.IGNORECASE else PARSER.parse(pattern):
            run = run + chr(value) if kind.name == "LITERAL" else ""
            longest = max(longest, run, key=len)
        return longest.encode("utf-8", "surrogatepass")

    def value(self, line):
        """Return the number that a line has, or None."""
        found = self.pattern.search(line[:self.longest])
        text = (found and found.group(1) or "").strip()
        if not _NUMBER_TEXT.match(text):
            return None
        return int(text) if re.match(r"[+-]?\d{1,15}\Z", text) else float(text)

    def last(self, lines):
        """Return the number in the last of some lines, as bytes, that has one; None without any."""
        end = len(lines)
        while end > 0:
            at = lines.rfind(self.literal, 0, end) if self.literal else end - 1
            begin = lines.rfind(b"\n", 0, max(0, at)) + 1
            found = None if at < 0 else self.value(
                lines[begin:lines.find(b"\n", at)][:_LINE_BYTES].decode("utf-8", "replace"))
            if at < 0 or found is not None:
                return found
            end = begin
        return None


def read_metrics(texts, step=None):
    """Return ({key of the summary: Metric}, the step's Metric or None) of `--metric NAME=REGEX` and `--step REGEX`, and
    of those in the configuration."""
    usual, metrics = dict(load_config().metrics or {}), collections.OrderedDict()
    step = step or usual.pop("step", None)
    for text in ["%s=%s" % pair for pair in usual.items()] + list(texts):
        name, is_told, pattern = text.partition("=")
        if not is_told:
            raise UsageError("--metric %s: write NAME=REGEX, like 'acc=accuracy: ([0-9.]+)'" % text)
        try:
            check_key(name, ["summary"])
        except LabtaskerError as error:
            raise UsageError("--metric %s: %s" % (text, error)) from None
        metrics[name] = Metric(pattern, "--metric " + name)
    return metrics, step and Metric(step, "--step")


class Printed:
    """The values that metrics find in the streams of one job: the latest of each in `values`. A carriage return ends a
    line as well. What comes is searched by `take`, at the end of a stream, or when there is much of it: a job may print
    its lines one at a time, and fast.

    With a metric for the step, `points` has (step, values) of each line that has values. What stands in lines that were
    overwritten, as by a progress bar, counts with the next whole line, or when the step changes."""

    MOST_POINTS = 100  # that wait to be taken; of more, every second is left out

    def __init__(self, metrics, step=None, on_output=lambda: None):
        self.metrics, self.step_metric, self.on_output = metrics, step, on_output
        self.lock = threading.Lock()  # guards what was found: there may be several streams
        self.values, self.step = {}, None
        self.points, self.point = [], {}  # `point`: the values of the step under way that are not in `points` yet
        self.waiting = threading.Lock()  # guards `unread`; whoever has the other lock may take it too
        self.unread, self.has_unread = [], False  # what each stream has brought since it was searched

    def channel(self):
        """Return a function that takes the bytes of one stream; None ends it."""
        unread = bytearray()
        self.unread.append(unread)

        def feed(data):
            with self.waiting:
                unread.extend(data or b"\n" * bool(unread))
                size, is_first, self.has_unread = len(unread), not self.has_unread, True
            if data is None:
                with self.lock:
                    self._search_all()
            elif size > _UNREAD_BYTES:
                with self.lock:
                    self._search(unread, _LINES_BYTES >> 2)
            if is_first:
                self.on_output()
        return feed

    def take(self, is_over=False):
        """Return the points that wait, with the one under way if the job `is_over`; they wait no longer."""
        with self.lock:
            self.has_unread = False
            self._search_all()
            if is_over:
                self._end_point()
            points, self.points = self.points, []
        return points

    def _search_all(self):
        for unread in self.unread:
            self._search(unread, _LINES_BYTES)

    def _search(self, unread, most):
        """Search the lines of a stream that have ended, the last `most` bytes line by line if there are steps; of the
        rest stays as much as is of use. Meanwhile the stream goes on."""
        with self.waiting:
            lines = bytes(unread).replace(b"\r\n", b"\n")
            cut = max(lines.rfind(b"\n"), lines.rfind(b"\r")) + 1
            unread[:] = lines[cut:cut + _LINE_BYTES]
        begin, early = cut, cut - most
        if self.step_metric:
            begin = max(lines.rfind(b"\n", 0, early), lines.rfind(b"\r", 0, early)) + 1 if early > 0 else 0
        if begin:
            self._skim(lines[:begin].replace(b"\r", b"\n"))
        if begin < cut:
            self._read_lines(lines[begin:cut])

    def _skim(self, lines):
        """Take the last step and the last value of each metric from many lines at once."""
        self._end_point()
        step = self.step_metric and self.step_metric.last(lines)
        self.step = self.step if step is None else step
        found = {name: metric.last(lines) for name, metric in self.metrics.items()}
        self.values.update({name: value for name, value in found.items() if value is not None})

    def _read_lines(self, lines):
        """Take the points of lines, each looked at for itself."""
        if not any(metric.literal in lines for metric in itertools.chain([self.step_metric], self.metrics.values())):
            lines = b"\n" if b"\n" in lines else b""
        for line in re.findall(b"[^\r\n]*[\r\n]", lines):
            line, is_whole = line[:-1] + b"\n", line.endswith(b"\n")
            step = self.step_metric.last(line)
            if step is not None and step != self.step:
                self._end_point()
                self.step = step
            found = {name: metric.last(line) for name, metric in self.metrics.items()}
            found = {name: value for name, value in found.items() if value is not None}
            self.values.update(found)
            self.point.update(found)
            if is_whole:
                self._end_point()

    def _end_point(self):
        """Have the values of the step under way wait as a point."""
        if self.point and self.step is not None:
            self.points.append((self.step, self.point))
            if len(self.points) > self.MOST_POINTS:
                del self.points[-2::-2]
        self.point = {}


_UNREAD_BYTES = 1 << 20  # of a stream, that wait to be searched
_LINES_BYTES = 1 << 16  # of these, in which each line is looked at for itself


class RunLog:
    """A run's file of output. It is written as it comes, with two exceptions: of a line that is overwritten (a progress
    bar) at most one state a second is kept, as a line of its own; and no line has parts of two streams."""

    def __init__(self, path):
        self.lock = threading.Lock()  # guards fd and unfinished
        self.unfinished = None  # the stream whose line has no end yet
        self.path, self.fd = path, None
        self._open()

    def _open(self):
        try:
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:  # Run.begin has printed why
            self.fd = None
        self.held = Held(*[] if self.fd is None else [self.fd])

    def channel(self):
        """Return a function that takes the bytes of one stream; None ends it."""
        line = Progress()
        return lambda data: self._write(line, line.feed(data, monotonic()) if data is not None else line.rest())

    def _write(self, line, data):
        with self.lock:
            if not data or self.fd is None:
                return
            if not self.held.is_intact():  # the function has closed it
                self._open()
                if self.fd is None:
                    return
            data = b"\n" * (self.unfinished not in (None, line)) + data
            self.unfinished = None if data.endswith(b"\n") else line
            try:
                os.write(self.fd, data)
            except OSError:  # the job goes on where the disk is full
                pass

    def close(self):
        """Close the file; what comes now goes nowhere."""
        with self.lock:
            number, self.fd = self.fd, None
            is_ours = number is not None and self.held.is_intact()
        try:
            if is_ours:
                os.close(number)
        except OSError:  # a network's file system may report a full disk only now
            pass


class Output:
    """Takes what a job writes to its log and, as it comes and unless `quiet`, to where this process's own output goes.

    `ends` are what the job gets as stdout and stderr: pseudo-terminals, so that it behaves as on a terminal, or pipes.
    If both go to the same place, they are one, which keeps the order. On Windows they always are: it can't wait for
    two."""

    DRAIN_S = 1  # how long the output of a process that outlives its job is waited for

    def __init__(self, log, use_pty, label="", printed=None, quiet=False):
        self.log, self.ends, self.printed, self.quiet = log, [], printed, quiet
        try:
            sys.stdout.flush()  # what was printed before stands before the job's output
        except (OSError, ValueError, AttributeError):
            pass
        self.sources = {}  # our end: (where it goes, what makes that, [what else takes the bytes])
        try:
            self._open(use_pty, label)
            start_thread(self.thread)
        except BaseException:  # no descriptor, or no thread, is left
            self.let_go()
            for ours in self.sources:
                os.close(ours)
            log.close()
            raise

    def _open(self, use_pty, label):
        opened = {}
        for number in (1, 2):
            place = _target_identity(number) if fcntl else 1
            if place not in opened:
                ours, opened[place] = use_pty and _open_pty() or os.pipe()
                takers = [self.log.channel()] + ([self.printed.channel()] if self.printed else [])
                self.sources[ours] = (number, Labelled(label) if label else lambda data: data, takers)
            self.ends.append(opened[place])
        self.thread = threading.Thread(target=self._copy, daemon=True)

    def let_go(self):
        """Close the job's ends in this process."""
        for end in set(self.ends):
            os.close(end)
        self.ends = []

    def _copy(self):
        while self.sources:
            for ours in ready(self.sources) if len(self.sources) > 1 else list(self.sources):
                target, shown, takers = self.sources[ours]
                try:
                    data = os.read(ours, 65536)
                except OSError:  # Linux: nobody holds the pseudo-terminal any more
                    data = b""
                if not self.quiet:
                    _write_out(target, shown(data))
                for take in takers:
                    take(data or None)
                if not data:
                    del self.sources[ours]
                    os.close(ours)
        self.log.close()

    def finish(self):
        """Return once all that the job wrote has been copied."""
        self.let_go()
        self.thread.join(self.DRAIN_S)


def _target_identity(number):
    """Return what identifies the file behind a descriptor; the number itself if it is closed."""
    try:
        found = os.fstat(number)
        return found.st_dev, found.st_ino
    except OSError:
        return number


def _open_pty():
    """Return (our end, the job's end) of a pseudo-terminal that changes nothing of what goes through it, or None."""
    try:
        import struct
        import termios
        ours, theirs = os.openpty()
    except (ImportError, AttributeError, OSError):  # there is none here, or none is left
        return None
    modes = termios.tcgetattr(theirs)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, modes)
    try:
        columns, lines = os.get_terminal_size(1)
    except OSError:
        columns, lines = 80, 24
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines or 24, columns or 80, 0, 0))
    return ours, theirs


def _write_out(number, data):
    """Write all of `data`, unless nobody is there to read it."""
    view = memoryview(data)
    with _WRITING:
        while view:
            try:
                view = view[os.write(number, view):]
            except BlockingIOError:  # a terminal that another program has set so
                ready([number], 1, is_output=True)
            except OSError:
                return


_WRITING = threading.Lock()  # held while output of a job is written


class _Tee:
    """A text stream that a run's log gets a copy of; for anything but writing it is the stream itself.

    A stream that takes nothing any more (a pipe that nobody reads, a full disk, none at all) is no error of the
    function: its output goes on into the log."""

    def __init__(self, stream, feed, quiet):
        self.stream, self.feed, self.quiet = stream, feed, quiet

    def write(self, text):
        """Write, unless `quiet` to the log alone, and return what the stream returns."""
        answer = len(text) if self.quiet else self._try(lambda: self.stream.write(text), len(text))
        self.feed(text.encode("utf-8", "replace"))
        return answer

    def flush(self):
        """Flush the stream."""
        self._try(lambda: self.stream.flush(), None)

    def _try(self, action, otherwise):
        try:
            return action()
        except UnicodeError:  # the function's own
            raise
        except OSError as error:
            _discard(self.stream, for_good=isinstance(error, BrokenPipeError))
        except ValueError:  # it is closed
            pass
        return otherwise

    def writelines(self, lines):
        """Write them one by one."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _discard(stream, for_good):
    """Empty the buffer of a stream that takes nothing now, so that neither the next line nor the interpreter's end
    fails for it. With `for_good` the stream takes everything from then on, and drops it."""
    try:
        number = stream.fileno()
        kept, null = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        stream.flush()
        if not for_good:
            os.dup2(kept, number)
        os.close(kept)
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


def listen_in(log, quiet):
    """Have what the function prints copied to its log, with `quiet` go there alone; return {name in sys: Tee}.

    What it writes past Python's own streams isn't seen: to take that too would lose the last words of a crash."""
    tees = {name: _Tee(getattr(sys, name) or open(os.devnull, "w"), log.channel(), quiet)  # noqa: SIM115
            for name in ("stdout", "stderr")}
    vars(sys).update(tees)
    return tees


def listen_no_more(tees):
    """Put the streams back that `listen_in` has replaced."""
    for name in tees:
        tees[name].flush()  # what stays in the buffer would fail at the interpreter's end, where nobody can mend it
        if getattr(sys, name) is tees[name]:  # else the function has put something else there
            setattr(sys, name, tees[name].stream)


# ---- When the time is up


def end_time_left_s():
    """Return the seconds until the end that the loop around this process has set, or None. On the loop's own host they
    are measured with the monotonic clock."""
    host, _, end_at = os.environ.get("LABTASKER_END_CLOCK", "").rpartition(" ")
    end_time = os.environ.get("LABTASKER_END_TIME", "")
    if host == host_id() and re.match(r"\d{1,12}(\.\d+)?\Z", end_at):
        return float(end_at) - monotonic()
    return float(end_time) - now() if re.match(r"\d{1,12}(\.\d+)?\Z", end_time) else None


def seconds_left(given_s=None):
    """Return the seconds that this process has: the least of `given_s` and what Slurm, PBS or a loop around it says."""
    ends = [(read(os.environ[name]), name) for name, read in _TIME_SOURCES.items() if os.environ.get(name)]
    ends = [pair for pair in ends + [(given_s, "--time-limit")] if pair[0] is not None]
    left_s, name = min(ends, default=(math.inf, None))
    if name:
        remark("the time is up in %s (%s)" % (in_words(left_s), name))
    return left_s


def in_words(seconds):
    """Return a length of time as text: "1 day, 2:03:04"."""
    return str(datetime.timedelta(seconds=min(max(0, round(seconds)), 86400 * 999999999)))


def _until(text):
    """Return the seconds until an instant; None if it is past (another job's) or not a number."""
    return _in_future(float(text) - now() if re.match(r"\d{1,12}(\.\d+)?\Z", text) else None)


def _in_future(left_s):
    return left_s if left_s is not None and left_s > 0 else None


def _left_in_slurm(job_id):
    """Return the seconds left by squeue; None if a variable of Slurm has the end, or the job has none."""
    names = "SLURM_JOB_END_TIME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"
    end, array, number = (os.environ.get(name) for name in names)
    if end:
        return None
    output = ask_program(["squeue", "-h", "-j", "%s_%s" % (array, number) if array and number else job_id, "-o", "%L"])
    match = re.match(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)\s*\Z", output)
    if match:
        days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if output.strip() != "UNLIMITED":
        remark("squeue does not say when job %s ends (%.40r): give --time-limit" % (job_id, output.strip()))
    return None


def _left_in_pbs(walltime_s):
    """Return the seconds left of a PBS job, which started when its node file was written."""
    if not walltime_s.isdigit():
        return None
    try:
        spent_s = now() - os.stat(os.environ.get("PBS_NODEFILE", "")).st_mtime
    except OSError:
        spent_s = 0.0
    return float(walltime_s) - (spent_s if 0 < spent_s < float(walltime_s) else 0.0)


# variable -> function that returns the seconds left, from its text
_TIME_SOURCES = {"SLURM_JOB_END_TIME": _until, "SLURM_JOB_ID": _left_in_slurm, "PBS_WALLTIME": _left_in_pbs,
                 "LABTASKER_END_TIME": lambda _: _in_future(end_time_left_s())}


# ---- What a loop says: of a task, and at its end


def remark(text, head="labtasker: "):
    """Write a line to stderr. The loop goes on if stderr is gone, or if a function has replaced it by something that
    takes no text."""
    try:
        tell("%s%s" % (head, text))
    except Exception:
        pass


def is_terminal(stream):
    """Return whether a person is at the other end of `stream`."""
    return stream is not None and stream.isatty()


def brief(value, digits=6):
    """Return a value as short text for a table: as one would type it after `--key=`, floats rounded."""
    if isinstance(value, float):
        return "%.*g" % (digits, value)
    if isinstance(value, str):
        return value if value and not re.search(r"\s", value) else json.dumps(value, ensure_ascii=False)
    return repr(value)


def pairs(mapping):
    """Return nested dicts as `a=1 b.c=2`; a traceback is left to `task get`."""
    return " ".join("%s=%s" % (key, brief(value)) for key, value in flatten(mapping)
                    if key != "labtasker_exception.traceback")


def screen_size(stream=None):
    """Return (columns, lines) of the terminal; COLUMNS wins, as everywhere. shutil is slow to import."""
    try:
        columns, lines = os.get_terminal_size((stream or sys.stdout).fileno())
    except (OSError, ValueError):
        columns = lines = 0
    wished = os.environ.get("COLUMNS", "")
    return wished.isdigit() and int(wished) or columns or 80, lines or 24


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


def _lasting(seconds):
    """Return how long something took: 0.31 s, 1.2 s, 12 s, 34 min, 5.2 h."""
    for below_s, size_s, form in ((1, 1, "%.2f s"), (9.95, 1, "%.1f s"), (120, 1, "%.0f s"), (7200, 60, "%.0f min")):
        if seconds < below_s:
            return form % (seconds / size_s)
    return "%.1f h" % (seconds / 3600)


def _squeezed(head, text, tail, width):
    """Return `head + text + tail` in at most `width` cells: the text is cut first, but for 24 cells of it."""
    text, tail = clean(text, ""), clean(tail, "")
    room = max(width - cells_wide(head + tail), 24)
    line = head + (fitted(text, room) if cells_wide(text) > room else text) + tail
    return fitted(line, width).rstrip() if cells_wide(line) > width else line


_OPEN = ("pending", "retry")  # what became of a task that is to be run again
_ENDS = {"pending": "requeued", "retry": "to be retried",  # how a loop calls what became of a task
         "taken": "taken over by another worker", "stopped": "stopped early"}
_ENDINGS = {"success": "success in %s", "failed": "failed in %s", "retry": "failed in %s",
            "pending": "requeued after %s, uncharged"}  # what the line of a run that took so long says


def ending(task, state, took_s, summary, why):
    """Return what a run's line says of its end: what became of the task, after how long, its results or the error."""
    words = _ENDINGS.get(state, _ENDS.get(state, state) + " after %s") % _lasting(took_s)
    if state in ("failed", "retry"):
        words += ", attempt %d of %d" % (task.retries + 1, max(task.max_retries, task.retries + 1))
        words += " and no more, as each would fail" * (state == "failed" and task.retries + 1 < task.max_retries)
    details = [pairs(summary)] * (state == "success") + [(why or "").strip().split("\n")[0]]
    detail = ", ".join(filter(None, details))
    return ": " + words + (", " if state == "success" else ": ") * bool(detail) + detail


class Account:
    """What a loop has run: the number of each task, what became of it, and what tells the tasks apart.

    The loop's lock guards it."""

    LATEST = 100000  # tasks that are told apart; of those before them only the counts are kept
    TOTAL_S = 1.0  # how often the server is asked how many tasks are left

    def __init__(self):
        self.runs = self.begun = 0  # runs that have ended; tasks that were begun
        self.total, self.asked_at = None, -math.inf  # tasks of this loop, begun or not; None: nobody has told
        self.tasks = collections.OrderedDict()  # {task id: (number, what became of it or None)}, the latest run last
        self.open, self.older = set(), collections.Counter()  # ids of tasks to be run again; what became of older ones
        self.first, self.differing = None, set()  # {key: text} of the first task; keys in which others differ from it

    def begin(self, task, left, at):
        """Note a task that is to be run, and how many more are `left`, if that was told."""
        self.begun += task.task_id not in self.tasks
        self.tasks[task.task_id] = self.tasks.pop(task.task_id, (self.begun,))[0], None
        self.open.discard(task.task_id)
        if left is not None:
            self.total, self.asked_at = self.begun + max(0, left - len(self.open)), at
        row = self._row(task)
        self.first = row if self.first is None else self.first
        if row != self.first and len(self.differing) < 1000:
            self.differing.update(key for key, _ in set(row.items()).symmetric_difference(self.first.items()))

    def end(self, task_id, state):
        """Note what became of a task."""
        self.runs += 1
        self.tasks[task_id] = self.tasks.get(task_id, (self.begun,))[0], state
        if state in _OPEN:
            self.open.add(task_id)
        if len(self.tasks) > self.LATEST:
            self.older[self.tasks.popitem(last=False)[1][1]] += 1

    def counts(self):
        """Return {what became of tasks: how many}."""
        found = self.older + collections.Counter(state for _, state in self.tasks.values())
        del found[None]
        return found

    def tally(self):
        """Return "8 tasks: 6 success, 2 failed (12 runs)", or nothing."""
        counts = self.counts()
        number = sum(counts.values())
        words = ", ".join("%d %s" % (counts[state], _ENDS.get(state, state)) for state in sorted(
            counts, key=lambda state: (state != "success", state != "failed", state)))
        return "%d task%s: %s%s" % (number, "s"[number == 1:], words, " (%d runs)" % self.runs * (self.runs > number)
                                    ) if number else ""

    @staticmethod
    def _row(task):
        row = collections.OrderedDict([("", task.task_name)] * bool(task.task_name))
        row.update((key, "%s=%s" % (key, brief(value)[:200])) for key, value in flatten(task.args))
        return row

    def line(self, task, tail="", label="", width=math.inf):
        """Return a line about a task, at most `width` cells. If it has to be cut, the arguments in which tasks differ
        come first; else all are in the task's own order, which does not change from line to line."""
        row = self._row(task)
        place = "" if self.total is None else "[%d/%d] " % (
            self.tasks.get(task.task_id, (self.begun,))[0], max(self.total, self.begun))
        head, keys = "%s%s%s " % (label, place, task.task_id[:8]), [key for key in row if key or "" in self.differing]
        if cells_wide(clean(" ".join([head] + [row[key] for key in keys]) + tail, "")) - 1 > width:
            keys.sort(key=lambda key: key not in self.differing)
        return _squeezed(head, " ".join(row[key] for key in keys) or brief(as_typed(task.cmd or "")), tail, width)


def as_typed(cmd):
    """Return a command as one types it."""
    import shlex
    return cmd if isinstance(cmd, str) else " ".join(map(shlex.quote, cmd or ()))


def _waiting_tasks(tasks):
    """Yield a line about those of the tasks that fit a loop, and wait for others."""
    found = [task for task in tasks if getattr(task, "run_id", None) is None and (
        getattr(task, "after", ()) or getattr(task, "after_any", ()))]
    if found:
        yield "%d pending task%s for others (task why %s)" % (
            len(found), " waits" if len(found) == 1 else "s wait", found[0].task_id[:8])


def left_tasks(required, pending, hidden, why_not, is_paused=False):
    """Yield why a loop leaves pending tasks that its filter lets through, and those that it does not, a line for each
    reason; `why_not(keys)` says why its job gets none of these. `is_paused`: the queue."""
    reasons = collections.OrderedDict()
    for task in pending:
        reasons.setdefault(misfits(required, paths_of(task.args)), []).append(task)
    fitting = reasons.pop(((), ()), ())
    if is_paused and fitting:
        yield "%d pending task%s not started: its queue is paused (labtasker queue resume)" % (
            len(fitting), " was" if len(fitting) == 1 else "s were")
    else:
        yield from _waiting_tasks(fitting)  # the others came or came back just now
    found = [(tasks, _misfit(len(tasks), missing, extra, why_not)) for (missing, extra), tasks in reasons.items()]
    for tasks, why in found + [(hidden, "the loop's name or filter leaves out all that are pending")] * bool(hidden):
        yield "%d pending task%s not taken: %s (task why %s)" % (
            len(tasks), " was" if len(tasks) == 1 else "s were", why, tasks[0].task_id[:8])


def _misfit(number, missing, extra, why_not):
    they, lack, have = ("it", "lacks", "has") if number == 1 else ("they", "lack", "have")
    meant = {key: nearest(key, extra) for key in missing}
    rest, guesses = [key for key in extra if key not in meant.values()], list(filter(None, meant.values()))
    parts = ["%s %s %s%s" % (they, lack, ", ".join(missing), " but %s %s: is one of these names misspelt?" % (
        have, ", ".join(guesses)) if guesses else "")] if missing else []
    parts += ["%s also %s %s, %s" % (they, have, ", ".join(rest), why_not(rest))] if rest else []
    return "; ".join(parts)


# 14. Runs ####################################################################
#
# A run of a task, as its loop and as its job see it: its reports, the outbox where they wait while the
# server is away, the functions that a job may call, the signals that a loop handles, and the process that
# sends heartbeats. Uses 1, 3, 4, 6 to 8, 10, 11, 13. Tests: test_worker.py, test_signals.py.


def retry_while_away(action, pause, limit_s):
    """Return action(), retried while the server is away, for up to `limit_s()` seconds; then raise its error.

    `limit_s` is called before each retry: the limit gets shorter once the loop must leave."""
    begin, delay_s = monotonic(), 1
    while True:
        try:
            answer = action()
        except LabtaskerError as error:
            if not is_away(error) or monotonic() - begin >= limit_s():
                raise
            if delay_s == 1:
                remark("%s\nlabtasker: waiting for it to come back" % error)
            rediscover_server()
        else:
            if delay_s > 1:
                remark("it is back")
            return answer
        pause(delay_s)
        delay_s = min(delay_s * 2, _LONGEST_PAUSE_S)


def deliver(task_id, status, summary=None, worker_id=None, run_id=None, reason=None, attempt=None, delay_s=None,
            final=None, log=False, took_s=None, step=None, point_id=None, failure=None):
    """Send a report of a run; return the answer, or None. With `log` it includes the end of the run's output.

    A server without the extensions gets a PUT of the task instead, for what the plain protocol can't report."""
    if status not in ("pending", "running") and not final or client().extensions:
        packed, size = end_of_log(task_id, run_id) if log and client().extensions else (None, None)
        attempt = dict(attempt or {}, log_bytes=size) if packed else attempt
        try:
            return send_report(task_id, status, summary, worker_id, run_id, reason, attempt, delay_s, final, packed,
                               took_s, step, point_id, failure)
        except LabtaskerHTTPStatusError as error:  # a 1.0.1 server refuses the status that the task already has
            if client().extensions or error.status_code not in (400, 500) or get_task(task_id).status != status:
                raise
        return summary and update_tasks([TaskUpdateRequest(task_id=task_id, summary=summary)]) and None
    task = get_task(task_id)
    if worker_id and (task.status, task.worker_id) != ("running", worker_id):
        raise LabtaskerHTTPStatusError(409, "task %s is not run by worker %s (it is %s)" % (
            task_id, worker_id, task.status), client().where)
    fields = {} if status == "running" else {"status": status}
    update_tasks([TaskUpdateRequest(task_id=task_id, **dict(fields, **({"summary": summary} if summary else {})))])


def end_of_log(task_id, run_id):
    """Return (the packed end of a run's output, the size of the whole output); (None, None) if it is not on this
    host."""
    if not (NAME.match(task_id) and NAME.match(run_id or "")):
        return None, None
    data, size = read_end(os.path.join(os.path.abspath(load_config().root), "logs", task_id, run_id, "run.log"))
    return (None, None) if data is None else (packed_log(data), size)


def read_end(path):
    """Return (the last TAIL_BYTES of a file, its size), (None, None) where it can't be read."""
    try:
        with open_plain(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES - 1))
            return end_of_text(file.read(TAIL_BYTES + 1), TAIL_BYTES), size
    except (OSError, OddFile):
        return None, None


# A report that can't be delivered because the server is away waits in the configuration's folder `outbox`. Each report
# is a file; their names sort in the order in which they were saved. Whatever uses the configuration next delivers them:
# this loop, another loop, or any command. Delivering a report twice does no harm, because it names its run.


def outbox():
    """Return the folder in which reports wait; only its owner can read it."""
    return os.path.join(os.path.abspath(load_config().root), "outbox")


def outbox_reports(run=None):
    """Return the paths of the waiting reports, oldest first: those of `run`, or all."""
    try:
        names = sorted(os.listdir(outbox()))
    except OSError:
        return []
    return [os.path.join(outbox(), name) for name in names
            if name.endswith(".json") and (run is None or run.key in name)]


_POINTS_A_FILE = 100  # of the outbox: a file is written anew for each of them


def keep_report(run, report):
    """Save a report of a run in the outbox. Reports of a run that goes on are kept in one file, in their order."""
    config, old = load_config(), run.saved
    if run.is_end_saved:
        return
    is_end, kept = report["status"] != "running", []
    old = old if old and not is_end and len(old[1]) < _POINTS_A_FILE and os.path.exists(old[0]) else None
    if not is_end:
        kept = _with_kept(old[1] if old else [], {name: report.get(name) for name in _POINT_FIELDS}, run)
        report = {name: value for name, value in report.items() if name not in _POINT_FIELDS}
        report.update({"points": kept} if "point_id" in kept[-1] or kept[1:] else kept[0])
    if not os.path.isdir(outbox()):
        os.mkdir(outbox(), 0o700)  # not makedirs: it must fail if the configuration's folder is missing
    path = os.path.join(outbox(), "%017.6f-%s-%d.json" % (_next_saved_at(), run.key, os.getpid()))
    content = dict(report, task_id=run.task_id, run_id=run.run_id, queue=config.queue_name, store=_store_name(config))
    if is_end:
        content.setdefault("took_s", run.spent_s() or None)
    Disk.create(path, [json.dumps(content).encode()])
    if old:
        _remove(old[0])
    run.is_end_saved, run.saved = is_end, None if is_end else (path, kept)


_POINT_FIELDS = {"summary": dict, "step": (int, float), "point_id": str, "took_s": float}  # field: its types


def _with_kept(kept, entry, run):
    """Return the reports that wait, with another one. One without a step is merged into the last if that has none."""
    entry = without_none(**entry)
    if "point_id" in entry:
        return kept + [dict(entry, **without_none(took_s=run.spent_s()))]
    summary = unflatten(entry.get("summary") or {}, "summary")
    if kept and "point_id" not in kept[-1]:
        return kept[:-1] + [{"summary": merge(kept[-1]["summary"], summary)}]
    return kept + [{"summary": summary}]


def _next_saved_at():
    """Return the time now, or a later one that sorts after every waiting report, in case the clock was set back."""
    names = [os.path.basename(path) for path in outbox_reports()]
    taken = [float(name[:17]) for name in names if re.match(r"[0-8][0-9]{9}\.[0-9]{6}-", name)]
    return max([float(now())] + [at + 1e-6 for at in taken])


def _store_name(config):
    return store_folder(config) or config.url


def _remove(path):
    """Remove a file; no error if it is already gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def deliver_kept(run=None):
    """Deliver the reports of the outbox, those of `run` or all; return how many; raise if the server is away.

    A report that is refused, for instance because another worker has taken the task, is printed and dropped: the run's
    log folder still has its result. A file that is not a report is set aside. If a report has to stay, later ones of
    its run stay too: the reports of a run must arrive in order, as the server refuses what follows the one that ends
    it."""
    config, count, staying = load_config(), 0, set()
    for path in outbox_reports(run):
        try:
            report = _read_saved_report(path)
            is_ours = report and report.pop("queue") == config.queue_name
            if not is_ours or report.get("run_id") in staying:
                continue
            if _deliver_one(report, report.pop("store", None) == _store_name(config), run):
                _remove(path)
                count += 1
            else:
                staying.add(report.get("run_id") or path)
        except OddFile as error:
            _set_aside(path, error)
    return count


_END_FILE = "ended-"  # begins the name of a file in the outbox: the worker that it names has ended with its loop


def keep_end(worker_id):
    """Save in the outbox that a loop's own worker has ended. If that fails, the loop ends all the same."""
    config = load_config()
    try:
        if not os.path.isdir(outbox()):
            os.mkdir(outbox(), 0o700)
        Disk.create(os.path.join(outbox(), _END_FILE + worker_id), [json.dumps(
            {"worker_id": worker_id, "queue": config.queue_name, "store": _store_name(config)}).encode()])
    except OSError:
        pass


def deliver_ends():
    """Note which loops' workers have ended, as the outbox has it, in this queue; raise if the server is away."""
    try:
        paths = [os.path.join(outbox(), name) for name in os.listdir(outbox()) if name.startswith(_END_FILE)]
    except OSError:
        return
    config = load_config() if paths else None
    for path in paths:
        told = read_json(path, {"worker_id": str, "queue": str, "store": str})
        if told and (told.get("queue"), told.get("store")) != (config.queue_name, _store_name(config)):
            continue
        try:
            if NAME.match(told.get("worker_id") or ""):
                end_worker(told["worker_id"])
        except LabtaskerHTTPStatusError as error:  # it was deleted, if the server is not away
            if is_away(error) or error.status_code == 401:
                raise
        _remove(path)


_REPORT_KINDS = {"task_id": str, "run_id": str, "worker_id": str, "status": str, "summary": dict, "reason": str,
              "attempt": dict, "delay_s": float, "final": bool, "took_s": float, "queue": str, "store": str,
              "log": bool, "points": [dict], "failure": str}


def _read_saved_report(path):
    """Return the report in a file of the outbox, or None if the file is gone; raise OddFile if it is no report."""
    try:
        report = load_json(path, _REPORT_KINDS, ("task_id", "status", "queue"))
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.ELOOP or os.path.islink(path):
            raise OddFile("%s can't be read: %s" % (path, error.strerror)) from None
        return None  # it is gone, or the disk has an error that may pass
    unknown = sorted(set(report) - set(_REPORT_KINDS))
    if unknown:
        raise OddFile("%s has a field %r, which this version does not know" % (path, unknown[0][:50]))
    if not NAME.match(report["task_id"]) or report["status"] not in REPORTS:
        raise OddFile("%s is about task %.50r and status %.50r" % (path, report["task_id"], report["status"]))
    for point in report.get("points") or ():
        if not all(isinstance(value, _POINT_FIELDS.get(name, ())) for name, value in point.items()):
            raise OddFile("%s has %.100r, which is no point" % (path, point))
    try:
        json.dumps(report)
    except RecursionError:
        raise OddFile("%s is nested too deep" % path) from None
    return report


def _set_aside(path, why):
    """Rename a file of the outbox so that nothing reads it again, and say so."""
    names = itertools.chain([path + ".aside"], ("%s.aside-%d" % (path, n) for n in itertools.count(2)))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        os.rename(path, aside)
    except FileNotFoundError:  # another process was faster
        return
    except OSError as error:
        return remark("%s; it can't be set aside: %s" % (why, error.strerror))
    remark("%s. It can't be delivered as a report and was renamed to %s. If another version of Labtasker wrote it, "
           "remove the ending again and run a command of that version here." % (why, os.path.basename(aside)))


def _deliver_one(report, is_its_store, run=None):
    """Return whether a report is done with: delivered or refused. A 404 counts only from the report's own store. The
    `run`, if any, hears the answers."""
    try:
        for point in report.pop("points", None) or [{}]:
            answer = deliver(**dict(report, **point))
            run.hear(answer) if run else None
    except LabtaskerHTTPStatusError as error:
        if is_away(error):
            raise
        if error.status_code == 401 or error.status_code >= 500 or error.status_code == 404 and not is_its_store:
            return False
        remark("task %s: its saved report %r was refused: %s" % (report["task_id"], report["status"], error))
    return True


def post(run, report, pause=time.sleep, limit_s=lambda: SERVER_LOST_S):
    """Return whether a report of a run was delivered. If the server is away, the report is saved in the outbox, after
    those of the run that already wait there. If the disk is full too, sending is retried as in `retry_while_away`."""
    timed = report if report["status"] == "running" else dict(report, took_s=run.spent_s() or None)
    report = timed if run.task else report  # a job knows its start only roughly: good enough for a late report alone
    if monotonic() >= run.away_until:
        try:
            deliver_kept(run)
            if not outbox_reports(run):  # otherwise this one has to wait for them
                if not run.is_end_saved:
                    run.hear(deliver(run.task_id, run_id=run.run_id, **report))
                return True
        except LabtaskerError as error:
            if not is_away(error):
                raise
            rediscover_server()
            run.away_until = monotonic() + _AWAY_S
    try:
        keep_report(run, timed)
        return False
    except OSError:  # the disk is full
        run.hear(retry_while_away(
            lambda: deliver(run.task_id, run_id=run.run_id, **timed), pause, limit_s))
        return True


def write_json(path, value):
    """Write a JSON value to a file that only its owner can read, replacing the file; print why it can't be written."""
    try:
        Disk.create(path, [json.dumps(value, indent=2).encode() + b"\n"], synced=False)
    except OSError as error:
        remark("can't write %s: %s" % (path, error.strerror))


# The events. ask: the function has called preempted(). stop: the loop must leave. insist: half of the grace is over.
# raise: KeyboardInterrupt is raised in the function.
RUN_MOVES = {
    "fetched": {"begin": "running", "decline": "declined", "end": "over"},
    "declined": {"end": "over"},
    "running": {"ask": "asking", "stop": "stopping", "end": "over"},
    "asking": {"ask": "asking", "stop": "notified", "end": "over"},
    "stopping": {"ask": "notified", "stop": "stopping", "raise": "raised", "end": "over"},
    "notified": {"ask": "notified", "stop": "notified", "insist": "insisting", "raise": "raised", "end": "over"},
    "insisting": {"ask": "insisting", "stop": "insisting", "raise": "raised", "end": "over"},
    "raised": {"ask": "raised", "stop": "raised", "insist": "raised", "raise": "raised", "end": "over"},
    "over": {"ask": "over"},
}


class Run:
    """A run of a task, as the loop and the job see it. Its folder holds task.json (the task as it was fetched), run.log
    (the job's output), summary.json (what the job reported) and, once the job or the loop has ended it, status.json.

    `ended` is the final status that the job or the loop has set; `lost` is the status that somebody else has set.
    The states of a loop's run (RUN_MOVES). A run that arrives while the loop is leaving is declined:
        fetched    begin -> running, decline -> declined, end -> over
        declined   end -> over
        running    ask -> asking, stop -> stopping, end -> over
        asking     ask -> asking, stop -> notified, end -> over
        stopping   ask -> notified, stop -> stopping, raise -> raised, end -> over
        notified   ask -> notified, stop -> notified, insist -> insisting, raise -> raised, end -> over
        insisting  ask -> insisting, stop -> insisting, raise -> raised, end -> over
        raised     ask -> raised, stop -> raised, insist -> raised, raise -> raised, end -> over
        over       ask -> over"""

    def __init__(self, task_id, run_id, worker_id, task=None, log_dir=None):
        self.task_id, self.run_id, self.worker_id, self.task = task_id, run_id, worker_id, task
        self.key = run_id or new_id()
        self.pid, self.ended, self.lost, self.limit = os.getpid(), None, None, None
        self.stopped = None  # why it was stopped early, once that was heard
        self.events = []  # those that have changed the state
        self.away_until = 0  # until then the server counts as away and is not asked
        self.saved = None  # (path, reports) of the file in the outbox that later reports of the run join
        self.is_end_saved = False  # whether the report that ends the run was ever saved in the outbox
        self.may_send_log = True  # False after a refusal: the report may have been too long with the log in it
        self.log_dir = log_dir or os.path.join(os.path.abspath(load_config().root), "logs", task_id, self.key)
        self.began, self.over_at = monotonic(), None  # set for a loop's run only
        self.store_id = None  # the id of the run's store if that has no server; see StoreFile.check_expected
        self.current_path = None  # for a function's run: the file that names what its loop runs now
        self.printed = None  # a Printed if values are read from what the job prints
        self.noted = {}  # what this process wrote into summary.json
        self.task_dir = os.path.join(os.path.dirname(self.log_dir), TASK_FOLDER)
        self.known_by = None  # the line by which one knows the failure of a job

    def attempt(self):
        """Return which run of its task this is, from 1 on."""
        return (self.task.retries or 0) + (getattr(self.task, "interruptions", 0) or 0) + 1

    def built_in(self, slot):
        """Return the values of BUILT_IN."""
        return {"@task": self.task_id, "@run": self.run_id or "", "@name": self.task.task_name or "", "@slot": slot,
                "@attempt": str(self.attempt()), "@dir": self.task_dir}

    def spent_s(self):
        """Return how long the run has taken so far, or took until its job ended; None in a job without its folder."""
        if self.task:
            return (self.over_at or monotonic()) - self.began
        try:
            return max(0.0, now() - os.stat(self.path("task.json")).st_mtime)
        except OSError:
            return None

    @property
    def state(self):
        """Return the state of RUN_MOVES that the events so far have led to."""
        return functools.reduce(lambda state, event: RUN_MOVES[state][event], list(self.events), "fetched")

    def move(self, event):
        """Go to the state that `event` leads to; raise InvalidStateTransition if the table has no such event.

        Events come from threads and from signal handlers, which can't wait for a lock. So events are appended to a
        list, which is atomic and loses none, and the state is computed from the list."""
        state = self.state
        if move(RUN_MOVES, state, event, "the run of task " + self.task_id) != state:
            self.events.append(event)

    def environment(self):
        """Return the environment variables that labtasker needs in a job's processes; None stands for unset."""
        return {"LABTASKER_TASK_ID": self.task_id, "LABTASKER_WORKER_ID": self.worker_id or "",
                "LABTASKER_RUN_ID": self.run_id or "", "LABTASKER_LOG_DIR": self.log_dir,
                "LABTASKER_TASK_DIR": self.task_dir, "LABTASKER_ATTEMPT": str(self.attempt()),
                "LABTASKER_PROCID": os.environ.get("SLURM_PROCID"), "PYTHONPATH": _python_path(),
                "LABTASKER_CURRENT": self.current_path,
                **(self.limit.environment() if self.limit else {}),
                "LABTASKER_ROOT": os.path.abspath(load_config().root),
                "LABTASKER_SOURCE": None if self.store_id else load_config().source,
                "LABTASKER_STORE": self.store_id and "%s %s" % (self.store_id, os.path.dirname(client().where))}

    def report(self, status, summary=None, worker_id=None, step=None):
        """Send a report that the job itself makes, or save it if the server is away; note whether it ends the run.

        With `step` it is a point of the history, too. Raises before anything is sent if the summary can't be sent."""
        summary = plain_summary(summary)
        point = {} if step is None else {"step": step, "point_id": new_id()}
        post(self, dict(point, status=status, summary=summary, worker_id=worker_id or self.worker_id))
        self.note_summary(summary)
        if status != "running" and not self.stopped:
            self.note_end(status)

    def hear(self, answer):
        """Note from the answer to a report whether the run was stopped."""
        if answer and answer.get("status") == "cancelled" and str(answer.get("reason")).startswith(STOPPED):
            self.stopped = answer["reason"]

    def results(self, summary):
        """Return the summary to report when the run is over: `summary`, the values that the job has printed, and those
        of a summary.json that the job has written itself."""
        try:
            written = load_json(self.path("summary.json"), {})
        except OSError:
            written = {}
        except OddFile as error:
            written = remark("%s: its values are not reported" % error) or {}
        values = merge({} if written == self.noted else written, dict(self.printed.values) if self.printed else {})
        return merge(plain_summary(values), summary or {}) if values else summary

    def path(self, name):
        """Return the path of a file in the run's folder."""
        return os.path.join(self.log_dir, name)

    def begin(self):
        """Note that the run begins and write task.json; print why it can't be written."""
        self.move("begin")
        if self.has_log_dir():
            write_json(self.path("task.json"), self.task.to_dict())

    def written_task(self):
        """Return the Task in task.json; None if there is none, or the file holds something else."""
        content = read_json(self.path("task.json"))
        try:
            is_ours = content.get("task_id") == self.task_id and isinstance(content.get("args"), dict)
            return Task(content) if is_ours else None
        except (LabtaskerError, TypeError, ValueError):
            return None

    def has_folder(self):
        """Return whether the run's folder exists or can be made; False if the configuration's folder is missing."""
        try:
            return os.path.isdir(load_config().root) and bool(self.make_log_dir())
        except OSError as error:
            return remark("can't write to %s: %s" % (self.log_dir, error.strerror))

    def has_log_elsewhere(self):
        """Return whether the run has output that does not lie beside the store, so that a report should carry it."""
        try:
            return bool(self.run_id) and self.may_send_log and os.path.getsize(self.path("run.log")) > 0 and (
                not is_beside_store())
        except (OSError, LabtaskerError):
            return False

    def note_summary(self, summary):
        """Merge `summary` into summary.json; print why it can't be written. No error: it is already reported."""
        if not (summary and self.has_folder()):
            return
        try:
            path = self.path("summary.json")
            self.noted = merge(read_json(path), unflatten(summary, "summary"))
            write_json(path, self.noted)
        except (OSError, LabtaskerError) as error:
            remark("can't write %s: %s" % (self.path("summary.json"), error))

    def note_end(self, status, **facts):
        """Note that the run ended and write status.json, by which the loop learns it from the job's processes."""
        self.ended = status
        if (os.path.isdir(self.log_dir) or self.task is None) and self.has_folder():
            write_json(self.path("status.json"), dict(facts, status=status))

    def note_begin(self):
        """Name the run in its thread's current.json. Processes that one run starts and a later run still uses (workers
        of a pool, a fork server) read it: their environment still names the run that started them."""
        if not os.path.isdir(self.log_dir):
            return
        path = _CURRENT_PATHS.setdefault((os.getpid(), threading.get_ident()), self.path("current.json"))
        if not os.path.isdir(os.path.dirname(path)):  # the folder of the thread's first run was removed
            _CURRENT_PATHS[os.getpid(), threading.get_ident()] = path = self.path("current.json")
        write_json(path, {"task_id": self.task_id, "run_id": self.run_id or "", "worker_id": self.worker_id or "",
                          "log_dir": self.log_dir})
        self.current_path = path if os.path.exists(path) else None

    def note_over(self):
        """Remove the file that `note_begin` has written."""
        try:
            if self.current_path:
                _remove(self.current_path)
        except OSError as error:
            remark("can't remove %s: %s" % (self.current_path, error.strerror))

    def note_stop(self, signum):
        """Note that the job must stop, and write a file that tells its processes so."""
        self.move("stop")
        if os.path.isdir(self.log_dir):
            write_json(self.path(_STOP_FILE), {"signal": signal_name(signum)})

    def ended_by_job(self):
        """Return the status that any process of the job has set, or None."""
        if self.ended is None:
            status = read_json(self.path("status.json"), {"status": str}).get("status")
            self.ended = status if status in _ENDS_OF_JOBS else None
        return self.ended

    def has_log_dir(self):
        """Return whether the run's folder exists, after trying to make it; print why it can't be made."""
        try:
            return bool(self.make_log_dir())
        except OSError as error:
            remark("can't write to %s: %s" % (self.log_dir, error.strerror))
            return False

    def make_log_dir(self):
        os.makedirs(self.log_dir, mode=0o700, exist_ok=True)
        return self.log_dir

    def make_task_dir(self):
        """Make the folder that all runs of the task share; print why it can't be made."""
        try:
            if os.path.isdir(self.log_dir):
                os.makedirs(self.task_dir, mode=0o700, exist_ok=True)
        except OSError as error:
            remark("can't make %s: %s" % (self.task_dir, error.strerror))

    def leave_task_dir(self):
        """Remove that folder if it is empty."""
        try:
            os.rmdir(self.task_dir)
        except OSError:  # it is in use, or was never made
            pass


def _python_path():
    """Return the PYTHONPATH of jobs, with which `import labtasker` works wherever their script lies."""
    given, folder = os.environ.get("PYTHONPATH"), os.path.dirname(THIS_FILE)
    if os.path.basename(folder) in ("site-packages", "dist-packages"):  # the job's Python may be another one
        return given
    return folder if not given else given if folder in given.split(os.pathsep) else given + os.pathsep + folder


# How a run failed, read from its exit code, its exception, or the end of its output.

_GPU_OOM = Pattern(  # as PyTorch, TensorFlow, JAX and CuPy have it, and the libraries below them
    r"\b(?:CUDA|HIP|XPU|MPS backend) out of memory|\b(?:CUDA|HIP) error: out of memory|"
    r"(?:CUDA|HIP)_ERROR_OUT_OF_MEMORY|"
    r"(?:cudaErrorMemoryAllocation|hipErrorOutOfMemory)\b|\bCU[A-Z]{3,6}_STATUS_ALLOC_FAILED|"
    r"RESOURCE_EXHAUSTED: .*(?:[Oo]ut of memory|[Aa]llocat|reserve)|\bResourceExhaustedError: .*(?:OOM|allocat)|"
    r"\bOOM when allocating tensor|\bOut of memory (?:while trying to allocate|allocating) [0-9]|"
    r"\b(?:torch|cupy)[\w.]*OutOfMemoryError\b")
_ERROR_LINE = Pattern(r"[A-Za-z_][\w.]*(?:\([\w.]+\))?(?::\s.*|:?)\Z")
_SURE_ERROR = Pattern(r"[A-Za-z_][\w.]*(?:Error|Exception)(?::\s|:?\Z)")
_WRAPPING = Pattern(r"[\w.]*\b(?:ChildFailedError|CalledProcessError|ProcessRaisedException|ProcessExitedException)\b")
_CHAINED = Pattern(r"Traceback \(most recent call last\):|During handling of the above exception|"
                   r"The above exception was the direct cause")
_RANK = Pattern(r"\[(?:rank|default)\d+\]: ?|\([^()]*\bpid=\d+[^()]*\) ?|\d+: ")  # before each line of one of several
_PAINT = Pattern("\x1b\\[[0-9;?]*[A-Za-z]")
_MOST_LINES, _MOST_HINTS = 100, 30  # lines of an output's end that are read; lines after an exception's
_MOST_BETWEEN = 3  # lines between a traceback and its exception's
_KILL_NUMBER, _CRASHES = 9, (4, 6, 7, 8, 9, 11)  # a shell's exit code 128 + one of these: what it ran died of it


def _names_error(lines, at):
    """Return whether a line is the one below a traceback that names the exception. Lines of stdout may have come
    between the two."""
    if not _ERROR_LINE.match(lines[at]) or _CHAINED.match(lines[at]):
        return False
    above, between = at - 1, _MOST_BETWEEN if _SURE_ERROR.match(lines[at]) else 0
    while above >= 0 and between and not lines[above][:1].isspace() and not _SURE_ERROR.match(lines[above]):
        above, between = above - 1, between - 1
    while above >= 0 and lines[above][:1].isspace() and not lines[above].lstrip().startswith("File "):
        above -= 1
    return above >= 0 and (lines[above].lstrip().startswith("File ") and lines[above][0].isspace()
                           or lines[above].startswith(("\u2570", "Traceback (most recent call last)")))


def failure_in(text):
    """Return (whether a GPU was out of memory, the line that says so or names the exception, the last line) as the end
    of a job's output has it; None for a line that is not there.

    Hints may follow the exception, and exceptions that only say that another process failed. It is out of memory where
    the exception says so, one that it is chained to, or a line after it; not where that was caught long before."""
    lines = [_RANK.sub("", _PAINT.sub("", line).rstrip(), 1) for line in text.splitlines()[-_MOST_LINES:]]
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    named = [at for at in range(len(lines)) if _names_error(lines, at)]
    named = [at for at in named if not _WRAPPING.match(lines[at])] or named
    at = named[-1] if named else None
    if at is None or len(lines) - at > _MOST_HINTS and not any(
            _WRAPPING.match(line) for line in lines[at:]):
        at, told = None, lines[-_MOST_HINTS:]
    else:
        told, begin = lines[at:], at
        while begin > 0 and (not lines[begin - 1] or lines[begin - 1][0].isspace() or begin - 1 in named
                             or _CHAINED.match(lines[begin - 1])):
            begin -= 1
            told += [lines[begin]] * (begin in named)
    oom = next((line for line in told if not line[:1].isspace() and _GPU_OOM.search(line)), None)
    return bool(oom), oom or (None if at is None else lines[at]), last


def failure_of_error(error):
    """Return "oom" for an exception that tells of a GPU out of memory, itself or one that it is chained to, else
    "exception"."""
    for _ in range(10):
        kind = type(error)
        words = result_or(lambda: "%s.%s: %s" % (kind.__module__, kind.__name__, error), "")
        if _GPU_OOM.search(str(words)[:_TEXT_LENGTH]):
            return "oom"
        error = result_or(lambda: error.__cause__ or error.__context__, None)
        if error is None:
            break
    return "exception"


def classed(outcome, code, text, is_out_of_memory):
    """Return (the Outcome of a job that ended with an exit code, with its failure and the reason; the line by which one
    knows it). `text` is the end of its output; `is_out_of_memory`: the kernel has killed something for that."""
    if outcome.status != "failed":
        return outcome, None
    number = -code if code < 0 else code - 128 if code - 128 in _CRASHES else 0
    is_oom, line, last = failure_in(text)
    words = failure_text(outcome.summary)
    if code > 128 and number:
        words += " (%s)" % signal_name(number)
    if is_oom:
        failure, words = "oom", line
    elif number == _KILL_NUMBER and is_out_of_memory:
        failure, words = "oom", "out of memory: the kernel has killed it (%s)" % words
    elif number:
        failure = "killed" if number == _KILL_NUMBER else "signal"
    elif code == 1 and line:
        failure, words = "exception", line
    else:
        failure = "exit"
    return outcome._replace(failure=failure, reason=clean(cut(words, _TEXT_LENGTH), "")), line or last or words


_TEXT_LENGTH = 300  # letters of a failure's reason


def oom_kills():
    """Return how many processes of this one's cgroup the kernel has killed as memory ran out, None where that can't be
    read."""
    for path in _oom_counters():
        try:
            with open(path) as file:
                return int(re.search(r"^oom_kill (\d+)", file.read(), re.M).group(1))
        except (OSError, ValueError, AttributeError):
            continue
    return None


@functools.lru_cache(None)
def _oom_counters():
    """Return the paths of the files that count the kills in this process's cgroup: version 2, then version 1. Within a
    container its path may be that of the host, and its files stand in the root."""
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    found = []
    for _, kinds, path in filter(lambda row: len(row) == 3, groups):
        folder, name = ("", "memory.events") if not kinds else ("memory/", "memory.oom_control")
        if not kinds or "memory" in kinds.split(","):
            found += ["/sys/fs/cgroup/%s%s%s/%s" % (folder, place.strip("/"), "", name) for place in (path, "")]
    return found


JOB_VARIABLES = collections.OrderedDict([  # variable: what `help loop` says of it
    ("LABTASKER_TASK_ID", "the task"), ("LABTASKER_RUN_ID", "this run of it"),
    ("LABTASKER_SLOT", "the loop's slot, from 0 on"), ("LABTASKER_ATTEMPT", "1, 2, ...: which run of the task this is"),
    ("LABTASKER_TASK_DIR", "a folder that all runs of the task share, for checkpoints"),
    ("LABTASKER_LOG_DIR", "the run's folder: a summary.json (a dict) written there becomes part of the summary"),
    ("LABTASKER_WORKER_ID", "the loop's worker"), ("LABTASKER_ROOT", "the configuration's folder"),
    ("LABTASKER_PROCID", "SLURM_PROCID of the loop; in a job's ranks but the first report() does nothing"),
    ("LABTASKER_END_TIME", "when the loop's time is up, in seconds since 1970; not set without a limit"),
    ("PYTHONPATH", "with the folder of labtasker.py at its end, so that `import labtasker` works"),
])
_STOP_FILE = "stop.json"
TASK_FOLDER = "files"  # beside the folders of a task's runs: the folder that all of them share
_ENDS_OF_JOBS = ("success", "failed", "cancelled", "pending")  # the statuses that a job may give to its own task
RUNS = {}  # thread ident -> its Run; in a job's process: (task id, run id) -> Run
_CURRENT_PATHS = {}  # (process, thread) that calls functions -> its current.json, in the folder of its first run
_CURRENT_KINDS = {"task_id": str, "run_id": str, "worker_id": str, "log_dir": str}
SERVER_LOST_S = 3600  # how long a server may be away
_AWAY_S = 10  # once a report could not be delivered: how long later ones are saved without trying to send them
LOST_GRACE_S = 1  # from TERM to KILL, for the job of a task that was cancelled or given to another worker
_LONGEST_PAUSE_S = 5  # between two attempts to reach a server that is away


def store_id():
    """Return the id of the store that this process has open without a server, or None."""
    transport = client().transport
    return transport.store.journal.file.header.get("store") if isinstance(transport, StoreTransport) else None


def rely_on(store_id):
    """Expect the store (without a server) to have this id: if it is missing, it is away, not new. None ends that."""
    transport = client().transport
    if isinstance(transport, StoreTransport):
        transport.store.file.expected = store_id


def _show_runs(run_ids):
    """Show other hosts that these runs go on and that this host uses the store; only if the store has no server."""
    try:
        transport = client().transport
    except LabtaskerError:  # the configuration's folder is missing
        return
    if isinstance(transport, StoreTransport):
        for run_id in filter(None, run_ids):
            transport.store.beats.runs.show(run_id)
        transport.store.owner.show()


def _find_run():
    """Return the Run of this thread, of this process, or of the job that this process belongs to; None if none."""
    running = [run for key, run in list(RUNS.items()) if isinstance(key, int)]
    run = RUNS.get(threading.get_ident()) or (running[0] if len(running) == 1 else None)
    if run and run.pid == os.getpid():
        return run
    path = run.current_path if run else os.environ.get("LABTASKER_CURRENT")
    if run is None and os.environ.get("LABTASKER_TASK_ID"):
        run = _job_run(*(os.environ.get("LABTASKER_" + name) for name in ("TASK_ID", "RUN_ID", "WORKER_ID", "LOG_DIR")))
    return _current_of(run, path) if run and path else run


def _current_of(run, path):
    """Return the Run that this process, which `run` has started, works for now; None if there is none.

    A worker of a pool works for one run after another. Any other program belongs to the run that has started it, and
    to none after that."""
    current = read_json(path, _CURRENT_KINDS)
    if (current.get("task_id"), current.get("run_id")) == (run.task_id, run.run_id or ""):
        return run
    process = sys.modules.get("multiprocessing.process")
    is_worker = run.task or process and process.current_process()._parent_pid is not None  # forked, or of a pool
    is_whole = set(current) == set(_CURRENT_KINDS)
    return _job_run(*(current[name] for name in _CURRENT_KINDS)) if is_worker and is_whole else None


def _job_run(task_id, run_id, worker_id, log_dir):
    """Return the Run with these ids in a job's process; the same object at every call."""
    key = task_id, run_id or None
    if key not in RUNS:
        RUNS[key] = Run(task_id, run_id or None, worker_id or None, log_dir=log_dir or None)
        RUNS[key].current_path = os.environ.get("LABTASKER_CURRENT")
    return RUNS[key]


def _current_run():
    """Return the current Run, or raise LabtaskerRuntimeError."""
    run = _find_run()
    if run is None:
        raise LabtaskerRuntimeError("no task is running here: this works inside a function that labtasker.loop() "
                                    "runs, or in a command that `labtasker loop` started")
    return run


def is_enabled() -> "bool":
    """Return whether this code runs as part of a task."""
    return _find_run() is not None


def current_task_id() -> "str":
    """Return the id of the task that runs here, or raise LabtaskerRuntimeError."""
    return _current_run().task_id


def current_worker_id() -> "str | None":
    """Return the id of the worker that runs here, or raise LabtaskerRuntimeError."""
    return _current_run().worker_id


def task_info() -> "Task":
    """Return the Task that runs here, as it was when its run started, or raise LabtaskerRuntimeError.

    It is read from the run's folder, so that a job can start while the server is away. Without it the server is
    asked."""
    run = _current_run()
    return run.task or run.written_task() or get_task(run.task_id)


def get_labtasker_log_dir() -> "pathlib.Path":
    """Return the folder of the current run as a Path, for files that the job wants to keep; made if it is missing."""
    import pathlib
    return pathlib.Path(_current_run().make_log_dir())


def report_task_status(task_id: "str", status: "str", summary: "dict[str, Any] | None" = None,
                       worker_id: "str | None" = None) -> "None":
    """Set a task's status to success, failed or cancelled and merge `summary` into its summary.

    The status "running" only merges. For the task that runs here the report also names the run, and the loop leaves
    a final status as it is."""
    run = _find_run()
    if run is None or run.task_id != task_id:
        deliver(task_id, status, plain_summary(summary), worker_id)
    else:
        run.report(status, summary, worker_id)


def report(step: "SupportsFloat | None" = None, **values: "Any") -> "bool":
    """Merge `values` into the summary of the task that runs here; return whether the job should go on.

    `step`: the number >= 0 (an epoch, an iteration) that the values belong to. While the server is away the values are
    saved; they are delivered in order later. Outside of a run, and in all ranks of a job but the first, this does
    nothing and returns True."""
    return report_values(values, step)


def report_values(values, step=None):
    """Do what `report` does."""
    run = _find_run()
    if run is None or not _is_first_rank(run):
        return True
    number = step_of(result_or(lambda: step.item() if hasattr(step, "item") else step, None))
    if step is not None and number is None:
        remark("report(step=%.100s): a step is a number >= 0; the values are merged, no point is made" % repr_of(step))
    try:
        if values or number is not None:
            run.report("running", values, step=number)
    except (LabtaskerError, OSError) as error:
        if getattr(error, "status_code", None) in (404, 409):  # it was cancelled, deleted or given to another worker
            return False
        remark("the values of report() can't be kept: %s" % error)
    return not (run.lost or run.stopped)


def should_stop() -> "bool":
    """Return whether the job should end: a report() was answered so. Nothing is asked; outside of a run it is False."""
    run = _find_run()
    return bool(run and (run.lost or run.stopped))


def get_history(task_id: "str") -> "list[dict[str, Any]]":
    """Return the points that a task has reported with a step, as dicts {step, at, **values}; `at` is a text."""
    return ask_route("GET " + TASKS_PATH + "/{task_id}/history", **locals())["content"] if client().extensions else []


def _is_first_rank(run):
    """Return whether this process is the rank of the job that reports. The loop's own rank does not count."""
    if run.task and run.pid == os.getpid():
        return True
    ranks = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK")]
    rank = os.environ.get("SLURM_PROCID")
    return not any(number not in (None, "", "0") for number in ranks) and (
        rank in (None, "", "0") or rank == os.environ.get("LABTASKER_PROCID"))


def task_dir() -> "pathlib.Path":
    """Return the folder that all runs of the task share as a Path; made if it is missing."""
    import pathlib
    run = _current_run()
    path = os.environ.get("LABTASKER_TASK_DIR") if run.task is None else run.task_dir
    os.makedirs(path or run.task_dir, mode=0o700, exist_ok=True)
    return pathlib.Path(path or run.task_dir)


def finish(status: "str", summary: "dict[str, Any] | None" = None, skip_if_no_labtasker: "bool" = True) -> "None":
    """End the current run as "success" or "failed"; a second call does nothing.

    Outside of any run this does nothing, or raises LabtaskerRuntimeError if `skip_if_no_labtasker` is False."""
    if status not in ("success", "failed"):
        raise LabtaskerValueError('finish(%r): the status is "success" or "failed"' % (status,))
    run = _find_run() if skip_if_no_labtasker else _current_run()
    if run is None or run.ended_by_job():
        return
    try:
        run.report(status, summary)
    except LabtaskerHTTPStatusError as error:
        if error.status_code != 409:
            raise
        remark("finish(%r) comes too late: %s" % (status, error))


def time_left() -> "float | None":
    """Return the seconds until the loop's time is up (its Slurm or PBS job's, or --time-limit); None if unlimited.

    A job that still runs is told to stop earlier: its grace and the seconds to hand its task back come before the
    end."""
    run = _find_run()
    left_s = run.limit.end_at - monotonic() if run and run.limit else end_time_left_s()
    return None if left_s is None or left_s == math.inf else max(0.0, float(left_s))


def preempted() -> "bool":
    """Return whether the job was told to stop. If so, it should save what it needs to continue later, and end.

    Call it early. After the first call, a stop signal other than Ctrl-C neither ends this process nor raises in the
    function until half of the grace is over."""
    run = _find_run()
    if run and run.task and run.pid == os.getpid():
        run.move("ask")
        return "stop" in run.events
    if threading.current_thread() is threading.main_thread():
        _note_stop_signals()
    return bool(_STOPS) or run is not None and bool(read_json(run.path(_STOP_FILE), {"signal": str}))


_STOPS = []  # stop signals that this process got since it first called preempted()


def _note_stop_signals():
    """Have signals noted that would end this process; handlers of its own stay."""
    import signal
    own_pid = os.getpid()

    def note_stop(signum, frame):
        if os.getpid() != own_pid:
            _die_of(signum)
        _STOPS.append(signum)
    for signum in loop_signals():
        if signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, note_stop)


def _die_of(signum):
    """Do what the signal would do without labtasker. For a process that a job forked, such as a data loader."""
    import signal
    if signum == signal.SIGINT:
        raise KeyboardInterrupt()
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


class Wake:
    """Wakes a loop at a signal, or when a slot needs it. It is a context manager; within it the signals are handled.

    The first signal asks the loop to leave, the second kills the job at once, the third ends the process without a
    report. If there is no run to report, the second does. Outside the main thread no signals are handled."""

    def __init__(self, signals):
        self.signals = signals
        self.stop = None  # the first signal, or the one that jobs get when the time is up
        self.times = 0  # the number of signals so far
        self.interrupt = None  # called with the signal while a function runs, to raise something in it
        self.runs = set()  # the current runs, whose end must be reported
        self.nudged = False  # the next SIGINT comes from `nudge`, not from a person

    def __enter__(self):
        self.pid, self.handlers, self.ignored = os.getpid(), {}, set()
        self.in_main = threading.current_thread() is threading.main_thread()
        self._open_pipe()
        if self.in_main:
            self.wakeup_fd = self._set_wakeup_fd()
            for signum in self.signals:
                if not self._is_taken(signum):
                    self._handle(signum)
            if not _WAKES and hasattr(os, "register_at_fork"):  # from 3.7 on; 3.6 has to do without
                os.register_at_fork(after_in_child=_leave_loops)
            _WAKES.append(self)
        return self

    def _open_pipe(self):
        self.read_end, self.write_end = os.pipe()
        self.held = Held(self.read_end, self.write_end)
        os.set_blocking(self.read_end, False)
        os.set_blocking(self.write_end, False)

    def mend(self):
        """Open another pipe if a function has closed this one."""
        if not self.held.is_intact():
            self._open_pipe()
            if self.in_main:
                self._set_wakeup_fd()

    def _handle(self, signum):
        import signal
        self.handlers[signum] = signal.getsignal(signum)
        if self.handlers[signum] == signal.SIG_IGN:  # nohup, or started in the background by a script
            self.ignored.add(signum)
        self._listen_to(signum)

    def retake_signals(self):
        """Install the loop's handlers again, in case a function has replaced them."""
        for signum in self.handlers:
            self._listen_to(signum)
        if self.in_main and self.handlers:
            self._set_wakeup_fd()

    def _set_wakeup_fd(self):
        """Have signals end `pause`; return the wakeup descriptor that was set before."""
        import signal
        quiet = {"warn_on_full_buffer": False} if sys.version_info >= (3, 7) else {}
        return signal.set_wakeup_fd(self.write_end, **quiet)

    def _listen_to(self, signum):
        import signal
        signal.signal(signum, self.on_child if signum == getattr(signal, "SIGCHLD", None) else self.on_signal)

    @staticmethod
    def _is_taken(signum):
        """Return whether the user's script has its own handler for a signal that is free for users."""
        import signal
        return signal_name(signum) in ("SIGUSR1", "SIGUSR2", "SIGXCPU") and callable(signal.getsignal(signum))

    def restore(self):
        """Restore the signal handlers from before."""
        import signal
        for signum, handler in self.handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        if self.in_main:
            try:
                signal.set_wakeup_fd(self.wakeup_fd)
            except (OSError, ValueError):  # that descriptor is closed
                signal.set_wakeup_fd(-1)
        self.handlers = {}

    def __exit__(self, *_):
        self.restore()
        if self.held.is_intact():
            os.close(self.read_end)
            os.close(self.write_end)
        self.write_end = -1  # a slot whose thread still runs can't write to what has this number next

    def on_child(self, signum, frame):
        """Do nothing: the byte that the interpreter writes to the pipe is enough."""

    def on_signal(self, signum, frame):
        """Handle a signal from a person, the system or `nudge`; may raise into the function that runs."""
        if os.getpid() != self.pid:
            return _die_of(signum)
        if self.nudged:
            self.nudged, signum = False, None
        elif signum in self.ignored:
            return
        else:
            self.times, self.stop = self.times + 1, self.stop or signum
            if self.times >= (3 if self.runs else 2):
                os._exit(128 + signum)
        self.ring()
        if self.interrupt:
            self.interrupt(signum)

    def nudge(self):
        """Wake the loop from another thread, out of `pause` or out of the running function."""
        import signal
        self.ring()
        if self.in_main and self.interrupt and signal.getsignal(signal.SIGINT) == self.on_signal:
            self.nudged = True
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def ring(self):
        """End `pause`, from any thread or a signal handler."""
        try:
            os.write(self.write_end, b"\0")
        except OSError:  # the pipe is full, so it wakes anyway
            pass

    def pause(self, seconds):
        """Sleep for that many seconds, or until something wakes the loop."""
        if ready([self.read_end], max(0, seconds)):
            os.read(self.read_end, 4096)


_WAKES = []  # every Wake that has handled signals in this process


def _leave_loops():
    """Restore the signals in a process that a function forked, such as a data loader."""
    for wake in reversed(_WAKES):
        wake.restore()


class HeartbeatProcess:
    """The process that sends the heartbeats of a loop's runs. It starts with the first run and again if it dies, and
    ends with `close`. A thread calls `on_lost(key, status)` when somebody else has ended a run."""

    def __init__(self, on_lost):
        self.on_lost, self.runs, self.process, self.reader = on_lost, {}, None, None
        self.environ = None  # the environment at the start of the loop
        self.guard = _Guard()
        self.lock = threading.Lock()  # guards runs, process and what is written to it

    def add(self, run, interval_s, group=None):
        """Send heartbeats for `run` from now on; `group`: the job's process group, which ends if the loop dies."""
        message = {"key": run.key, "task_id": run.task_id, "run_id": run.run_id, "worker_id": run.worker_id,
                   "store_id": run.store_id, "interval_s": interval_s, "group": group}
        with self.lock:
            self.guard.change(self.runs.get(run.key, {}).get("group"), group)
            self.runs[run.key] = message
            self._send(message)

    def drop(self, run):
        """Send no more heartbeats for `run`."""
        with self.lock:
            dropped = self.runs.pop(run.key, None)
            if dropped:
                self.guard.change(dropped["group"], None)
                self._send({"drop": run.key})

    def _send(self, message):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError, AttributeError):  # not started yet, or gone
            self._start()

    def _start(self):
        """Start the process and send it every run."""
        self._drop_broken()
        if self.process:
            self._end()
        self.process = start_program(in_python("heartbeat_main"), stdin=PIPE, stdout=PIPE, stderr=None,
                                     universal_newlines=True, env=self.environ)
        try:
            self.process.stdin.write("".join(json.dumps(message) + "\n" for message in self.runs.values()))
            self.process.stdin.flush()
        except OSError:  # it died at once: the reader sees that
            pass
        self.held = Held(self.process.stdin.fileno(), self.process.stdout.fileno())
        self.reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        start_thread(self.reader)

    def mend(self):
        """Start another process if a function has closed the pipes to this one, which ends it."""
        with self.lock:
            self._drop_broken()
            if self.runs and not self.process:
                self._start()

    def _drop_broken(self):
        """Forget a process whose pipes a function has closed."""
        if self.process and not self.held.is_intact():
            Held.LOST.append(self.process)
            self.process = None

    def _read(self, process):
        try:
            for line in process.stdout:
                message = json.loads(line)
                self.on_lost(message["key"], message["status"])
        except (OSError, ValueError):  # a function has closed it
            pass
        if self.runs:
            time.sleep(1)
        with self.lock:
            if self.process is process and self.runs:  # it died: start another
                self._start()

    def _end(self):
        process, self.process = self.process, None
        try:
            process.stdin.write('{"end": true}\n')  # closing is not enough: a process that the job forked has it open
            process.stdin.close()
        except OSError:
            pass
        try:
            process.wait(5)
        except Exception:  # subprocess.TimeoutExpired: the process was suspended
            process.kill()
            process.wait()
        return process

    def close(self):
        """End the process and the thread that reads from it."""
        with self.lock:
            self.runs.clear()
            self._drop_broken()
            self.guard.close()
            process = self.process and self._end()
        if process:
            if self.reader.ident is not None:  # None: the thread could not be started
                self.reader.join()
            process.stdout.close()


class _Guard:
    """A shell that ends the process groups of jobs once its stdin is closed, which happens however the loop dies.

    The heartbeat process does the same; the shell helps when loop and heartbeat process are killed at once. It is not
    a child of the loop. Without a POSIX shell, as on Windows, there is no guard. HeartbeatProcess.lock guards it."""

    PROGRAM = """trap '' INT TERM HUP
exec 3<&0
{ groups=
while read -r old new; do
    left=
    for group in $groups; do [ "$group" = "$old" ] || left="$left $group"; done
    [ "$new" = - ] && groups=$left || groups="$left $new"
done
for group in $groups; do kill -s TERM -- "-$group"; done
[ -z "$groups" ] || sleep 1
for group in $groups; do kill -s KILL -- "-$group"; done
} <&3 3<&- >/dev/null 2>&1 &"""

    def __init__(self):
        self.pipe, self.groups = None, set()

    def change(self, old, new):
        """Replace the group `old` by `new` in what the shell will end; either may be None."""
        self.groups.discard(old)
        self.groups |= {new} - {None}
        if old == new or self.pipe is None and not self.groups:
            return
        try:
            if self.pipe is None:
                raise BrokenPipeError
            self._send(old, new)
        except BrokenPipeError:  # not started yet, or killed
            self.close()
            self._start()
        except OSError:  # the shell was suspended, and its pipe is full
            pass

    def _send(self, old, new):
        os.write(self.pipe, ("%s %s\n" % (old or "-", new or "-")).encode())

    def _start(self):
        try:
            starter = start_program(["/bin/sh", "-c", self.PROGRAM], stdin=PIPE, cwd="/", env={"PATH": os.defpath})
            self.pipe = os.dup(starter.stdin.fileno())
            starter.stdin.close()
            starter.wait()
            os.set_blocking(self.pipe, False)
            for group in self.groups:
                self._send(None, group)
        except OSError:  # no shell, or it could not be started: the heartbeat process has to do
            self.close()

    def close(self):
        """Let the shell end."""
        pipe, self.pipe = self.pipe, None
        if pipe is not None:
            os.close(pipe)


class RunBeater:
    """Sends the heartbeats of one run, in a thread of the heartbeat process, until it is dropped or lost."""

    FIRST_S = 1  # before the first heartbeat: a shorter run needs none

    def __init__(self, message, parent):
        self.message, self.parent, self.dropped = message, parent, threading.Event()
        threading.Thread(target=self.live, daemon=True).start()

    def live(self):
        """Send heartbeats; write a line to stdout once somebody else has ended the run."""
        next_at, status = monotonic() + self.FIRST_S, "running"
        while status == "running" and not self.is_dropped(next_at):
            begin, self.is_plain = monotonic(), False
            status = "running" if is_stopped(self.parent) else self.beat()
            next_at = self.next_at(begin, monotonic())
        if not self.dropped.is_set():
            sys.stdout.write(json.dumps({"key": self.message["key"], "status": status}) + "\n")
            sys.stdout.flush()

    def is_dropped(self, until):
        """Return whether the run was dropped: as soon as it is, or at `until`.

        It sleeps in short steps because Event.wait() follows the wall clock in some Pythons: if that is set back, the
        wait would last too long."""
        while not self.dropped.is_set() and monotonic() < until:
            time.sleep(max(0.0, min(self.FIRST_S, until - monotonic())))
        return self.dropped.is_set()

    def next_at(self, begin, end):
        """Return when to send the next heartbeat. A server with the extensions itself waits before it answers."""
        if self.is_plain:
            return begin + self.message["interval_s"]
        return end if end - begin > 0.5 else end + self.FIRST_S

    def beat(self):
        """Send a heartbeat and return the run's status; "running" if the server is away: the next one may arrive."""
        message = self.message
        try:
            rely_on(message["store_id"])
            status = send_heartbeat(*(message[name] for name in ("task_id", "worker_id", "run_id", "interval_s")))
            self.is_plain = not client().extensions
            return status or "running"
        except LabtaskerHTTPStatusError as error:
            if error.status_code in (403, 404, 409):
                return self.status_after_refusal()
        except LabtaskerError:
            pass
        rediscover_server()
        return "running"

    def status_after_refusal(self):
        """Return what became of the task after a heartbeat was refused: its status, "taken" or "deleted"."""
        try:
            status = get_task(self.message["task_id"]).status
            return "taken" if status == "running" else status
        except LabtaskerHTTPStatusError as error:
            return "deleted" if error.status_code == 404 else "running"
        except LabtaskerError:
            return "running"


def heartbeat_main():
    """Send heartbeats for the runs that stdin names, a JSON line each, until told to end; if the loop dies, end its
    jobs.

    Writes a JSON line to stdout for a run that somebody else has ended. Ignores signals: the loop decides when this
    process ends."""
    import signal
    for signum in loop_signals():
        signal.signal(signum, signal.SIG_IGN)
    beaters, parent = {}, os.getppid()
    threading.Thread(target=_watch_parent, args=(parent, beaters), daemon=True).start()
    threading.Thread(target=_show_life, args=(parent, beaters), daemon=True).start()
    for line in iter(sys.stdin.readline, ""):
        message = json.loads(line)
        if "end" in message:
            return
        old = beaters.pop(message.get("drop") or message["key"], None)
        if old:
            old.dropped.set()
        if "key" in message:
            beaters[message["key"]] = RunBeater(message, parent)
    _end_orphans(beaters)


def _watch_parent(parent, beaters):
    """Exit when the loop has died, even if a process that its function forked still holds our stdin open."""
    while os.getppid() == parent:
        time.sleep(1)
    _end_orphans(beaters)
    os._exit(0)


def _show_life(parent, beaters):
    """Touch the beat files of the runs and the owner's counter every second, also while heartbeats are delayed."""
    while True:
        if beaters and not is_stopped(parent):
            _show_runs([beater.message["run_id"] for beater in list(beaters.values())])
        time.sleep(1)


def _end_orphans(beaters):
    """End the jobs of a loop that was killed: other workers will get its tasks."""
    groups = [beater.message["group"] for beater in list(beaters.values()) if beater.message["group"]]
    end_groups(groups, monotonic() + LOST_GRACE_S, time.sleep)


def loop_signals():
    """Return the signals that ask a loop to leave: from a person, a shell, or a scheduler before it kills."""
    import signal
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


# ---- Waiting for tasks to end
_ENDED = [state for state in TASK_STATES if state not in ("pending", "running")]
_END_WAIT_S = 50  # a wait for a change on the server's side
_PART_IDS = 50000  # that one request asks for
_PLAIN_PAUSE_S = 0.5  # between looks on a server that can't say that something has changed


def as_completed(tasks: "Iterable[_TaskOrId]", timeout: "_Duration | None" = None) -> "Iterator[Task]":
    """Return an iterator that yields each of the tasks as a Task once it has ended: success, failed or cancelled.

    `tasks` are ids, Tasks, or what submit_task returned; each comes once, one that is deleted meanwhile does not. After
    `timeout` seconds TimeoutError is raised where some have not ended. A server that goes away is waited for."""
    if isinstance(tasks, (str, Task, TaskSubmitResponse)) or not hasattr(tasks, "__iter__"):
        raise LabtaskerTypeError("as_completed takes a list of tasks; did you mean as_completed([%s])?"
                                 % cut(repr(tasks)))
    waiting = dict.fromkeys(map(_id_to_wait_for, tasks))
    limit_s = math.inf if timeout in (None, math.inf) else parse_duration(timeout)
    return _as_they_end(waiting, monotonic() + limit_s, len(waiting), limit_s)


def _id_to_wait_for(task):
    task_id = getattr(task, "task_id", task)
    if not (isinstance(task_id, str) and NAME.match(task_id)):
        raise LabtaskerTypeError("as_completed takes ids of tasks, Tasks and answers of submit_task, not %s"
                                 % cut(repr(task)))
    return task_id


def _as_they_end(waiting, until, total, limit_s):
    """Yield a Task for each id in the dict `waiting` that has ended; raise TimeoutError at `until`."""
    def pause(seconds):
        time.sleep(max(0, min(seconds, until - monotonic())))

    mark, ended, gone, pause_s = _look_for_ends(list(waiting))
    short = [task_id for task_id in gone if len(task_id) < 36]
    if short:
        raise NotFound("no task %s; as_completed takes whole ids" % ", ".join(short))
    while True:
        for task_id in gone:
            waiting.pop(task_id, None)
        for task in ended:
            waiting.pop(task.task_id, None)
            yield task
        if waiting and monotonic() < until:
            pause(pause_s)
            look, began = functools.partial(_look_after, mark, list(waiting), until), monotonic()
            try:
                mark, ended, gone, pause_s = retry_while_away(look, pause, lambda: min(SERVER_LOST_S, until - began))
                continue
            except LabtaskerError as error:
                if not is_away(error) or monotonic() < until:
                    raise
        if not waiting:
            return
        raise TimeoutError("%d of %d tasks have not ended within %g s" % (len(waiting), total, limit_s))


def _look_after(mark, ids, until):
    """Return what `_look_for_ends` does, once the mark is another one; nothing new where it still is at `until`."""
    wait_s = max(0, min(_END_WAIT_S, until - monotonic()))
    if mark and ask_route("GET " + QUEUE_PATH + "/mark", seen=mark, wait_s=wait_s)["mark"] == mark:
        return mark, [], [], 0
    return _look_for_ends(ids)


def _look_for_ends(ids):
    """Return (the mark of the state or None, the Tasks that have ended in the order of their ends, the ids of which no
    task is there, the seconds to pause after that: looking takes a tenth of the time at most)."""
    began, marks, ended, gone = monotonic(), [], [], []
    for at in range(0, len(ids), _PART_IDS):
        for found, item in zip((marks, ended, gone), _part_of_ends(ids[at:at + _PART_IDS])):
            found += item
    pause_s = min(30, max(0 if marks else _PLAIN_PAUSE_S, 10 * (monotonic() - began)))
    return next(iter(marks), None), sorted(ended, key=lambda task: task.last_modified), gone, pause_s


def _part_of_ends(ids):
    """Return ([the mark], [Tasks that have ended], [ids that are gone]) of some ids. Who has the extensions counts."""
    among = {"_id": {"$in": ids}}
    if not client().extensions:
        found = ls_tasks(limit=10 ** 9, extra_filter=among).content
        return [], [task for task in found if task.status in _ENDED], set(ids).difference(t.task_id for t in found)

    def count(field):
        return ask_route("POST " + TASKS_PATH + "/count", by=field, extra_filter=among)
    answer = count("status")
    numbers = dict(map(tuple, answer["counts"]))
    there = ids if sum(numbers.values()) == len(ids) else [task_id for task_id, _ in count("task_id")["counts"]]
    ended = [] if numbers.keys().isdisjoint(_ENDED) else ls_tasks(
        limit=10 ** 9, extra_filter={"$and": [among, {"status": {"$in": _ENDED}}]}).content
    return [answer["mark"]], ended, set(ids).difference(there)


# 15. Loops ###################################################################
#
# Takes tasks and has them run: the loop and its slots, its time limit, and the two ways to run a task:
# call a function, start a command. Knows nothing of argparse.
# Uses 1 to 6, 9 to 14. Tests: test_worker.py, test_loop.py, test_signals.py, test_slots.py.


# ---- Slots: how many jobs at once, and which GPUs each of them sees


SlotSpec = row_type("SlotSpec", "environment facts label", ({}, {}, ""))
# what differs between slots: {variable: value, None to unset it} for its jobs, the facts that its tasks' attempts
# keep, and the label before each line of output


# GPUs are named as in the variable that says which of them are seen: by their index on the machine, or by their UUID
# ("GPU-...", or "MIG-..." for a part of one). Where the variable is set, it lists all GPUs there are.

_MAX_JOBS = 256  # of a loop: each takes several file descriptors


def make_slots(jobs=None, gpus=None, per_gpu=None):
    """Return a SlotSpec for each slot: `jobs` slots, or `per_gpu` for each GPU of `gpus` ("all", or names joined by
    commas). With both, a job gets several GPUs or several jobs share one; each gets the same number."""
    if per_gpu is not None and (not gpus or jobs is not None):
        raise UsageError("--per-gpu K goes with --gpus, and without --jobs: each GPU has K slots")
    sets, variable = [[]], None
    if gpus:
        variable = _gpu_variable()
        chosen = _chosen_gpus(gpus, variable)
        jobs = len(chosen) * (1 if per_gpu is None else per_gpu) if jobs is None else jobs
        if jobs < 1 or jobs % len(chosen) and len(chosen) % jobs:
            raise UsageError("%d jobs can't share %d GPUs evenly: %s" % (jobs, len(chosen), ",".join(chosen)))
        gpus_per_job = max(1, len(chosen) // jobs)
        sets = [chosen[i:i + gpus_per_job] for i in range(0, len(chosen), gpus_per_job)]
    jobs = 1 if jobs is None else jobs
    if not 1 <= jobs <= _MAX_JOBS:
        raise UsageError("--jobs: 1 to %d at once, not %d" % (_MAX_JOBS, jobs))
    return [_slot_spec(number, jobs, variable, sets[number % len(sets)]) for number in range(jobs)]


def _slot_spec(number, jobs, variable, gpus):
    label, names = "[slot %d] " % number if jobs > 1 else "", ",".join(gpus)
    if not gpus:
        return SlotSpec({}, {"slot": number} if jobs > 1 else {}, label)
    unset = dict.fromkeys(GPU_VARIABLES[GPU_VARIABLES.index(variable) + 1:])
    return SlotSpec(dict(unset, **{variable: names}), {"slot": number, "gpus": names}, label)


# NVIDIA's driver reads only the last one. AMD's reads the last one if the second is not set, and counts its indices
# among the GPUs that the first one leaves. So one is set for a job, and those after it are unset.
GPU_VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def _gpu_variable():
    """Return the name of the variable that says which GPUs a job sees: the one that is set, else that of the
    machine's vendor."""
    given = [name for name in GPU_VARIABLES if name in os.environ]
    is_amd = os.path.exists("/dev/kfd") and not _gpu_files()
    if not is_amd and ("CUDA_VISIBLE_DEVICES" in given or not given):
        return "CUDA_VISIBLE_DEVICES"
    if not given or "HIP_VISIBLE_DEVICES" in given:
        return "HIP_VISIBLE_DEVICES"
    return given[0]


def _given_gpus(variable):
    """Return the names of the GPUs that this process was given by the variable, else by Slurm; None if it has all.

    Slurm's indices are those of the machine. If the system shows just as many GPUs as Slurm gave, they are
    named as the system does."""
    if variable in os.environ:
        return list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), (
            name.strip() for name in os.environ[variable].split(","))))
    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    if not re.match(r"\d+(,\d+)*\Z", given):
        return None
    given, shown = given.split(","), listed_gpus()
    return shown if len(shown) == len(given) else given


def listed_gpus():
    """Return the names of the GPUs that the system shows: indices, or the UUIDs of parts where there are such."""
    names = []
    for index, part in re.findall(r"^(?:GPU (\d+): | +MIG .*(MIG-[^)\s]+))", ask_program(["nvidia-smi", "-L"]), re.M):
        if part and names and names[-1].isdigit():
            names.pop()  # the GPU whose parts these are
        names.append(index or part)
    names = names or re.findall(r"^GPU\[(\d+)\]", ask_program(["rocm-smi", "--showid"]), re.M)
    return list(collections.OrderedDict.fromkeys(names)) or _gpu_files()


def _gpu_files():
    names = os.listdir("/dev") if os.path.isdir("/dev") else []
    return sorted((name[6:] for name in names if re.match(r"nvidia\d+\Z", name)), key=int)


def _chosen_gpus(text, variable):
    """Return the names of the GPUs that a text selects: "all", names of given ones, or their positions among these."""
    given, words = _given_gpus(variable), [word.strip() for word in text.split(",")]
    if words == ["all"]:
        found = listed_gpus() if given is None else given
        if not found:
            raise UsageError("--gpus all: neither %s nor nvidia-smi, rocm-smi or /dev/nvidia0 shows one here; name "
                             "them: --gpus 0,1" % variable)
        return found
    if len(set(words)) < len(words) or not all(re.match(r"[\w./:-]+\Z", word) for word in words):
        raise UsageError("--gpus %s: \"all\", or indices and UUIDs joined by commas, each once (--per-gpu has several "
                         "jobs on each)" % text)
    if given is None:
        return words
    by_name = [[name for name in given if name == word or len(word) > 4 and name.startswith(word)] for word in words]
    by_place = [given[int(word):][:1] if word.isdigit() else [] for word in words]
    found = [names for names in (by_name, by_place) if all(len(one) == 1 for one in names)]
    if not found:
        raise UsageError("--gpus %s: given here are %s: name some of them, or count them from 0" % (
            text, ",".join(given) or "none"))
    return [one for one, in found[0]]


# ---- Deadlines


class Limit:
    """A loop's deadlines: last start, stop signal, kill, hand back. All are on the clock of `monotonic`, but `end_time`
    is `end_at` on the wall clock."""

    def __init__(self, left_s, grace_s, drain_before_s, eta_max_s):
        self.end_at, self.end_time = monotonic() + left_s, now() + left_s
        self.kill_at = self.end_at - min(_HAND_BACK_S, left_s / 4)
        self.stop_at = max(self.kill_at - grace_s, self.end_at - left_s / 2)
        self.start_until = min(self.stop_at - eta_max_s, self.end_at - drain_before_s)

    def environment(self):
        """Return {variable: text, None to unset it} that tell a job when the time is up: on the wall clock and,
        for this host, on the monotonic clock."""
        is_known = self.end_at < math.inf
        return {"LABTASKER_END_TIME": "%.3f" % self.end_time if is_known else None,
                "LABTASKER_END_CLOCK": "%s %.3f" % (host_id(), self.end_at) if is_known else None}

    def longest_s(self, request, at):
        """Return the longest task_timeout of tasks to start, infinity for any. It is rounded down to coarse steps, so
        that the filter made from it seldom changes: a store prepares for each filter that it gets."""
        left_s = max(1, self.start_until - at)
        if request.get("eta_max") is not None or left_s == math.inf:
            return math.inf
        step_s = 2.0 ** (math.frexp(left_s)[1] - 4)
        return left_s // step_s * step_s

    def filtered(self, request, at):
        """Return the filter of a fetch that leaves out tasks whose task_timeout is longer than what is left."""
        given, longest_s = request.get("extra_filter"), self.longest_s(request, at)
        fits = {"$or": [{"task_timeout": None}, {"task_timeout": {"$lte": longest_s}}]}
        return given if longest_s == math.inf else {"$and": [given, fits]} if given else fits


LOOP_MOVES = {
    "starting": {"answered": "working", "failed": "failed", "time_up": "timed_out"},
    "working": {"answered": "working", "emptied": "done", "failed": "failed", "time_up": "timed_out"},
    "done": {"answered": "done", "emptied": "done", "failed": "failed", "time_up": "timed_out"},
    "failed": {"answered": "failed", "emptied": "failed", "failed": "failed", "time_up": "timed_out"},
    "timed_out": {"answered": "timed_out", "emptied": "timed_out", "failed": "timed_out", "time_up": "timed_out"},
}
SLOT_MOVES = {
    "idle": {"wait": "waiting", "answered": "idle", "begin": "running", "report": "reporting", "end": "idle",
             "leave": "left"},
    "waiting": {"wait": "waiting", "answered": "idle"},
    "running": {"report": "reporting", "end": "idle"},
    "reporting": {"report": "reporting", "end": "idle"},
    "left": {},
}


_GRACE_S = 10  # from the signal that stops the loop to KILL
_MOST_FAILURES = 10  # in a row
LOOP_OPTIONS = {  # each is a parameter of command_loop(), an option of the command, and an attribute of Loop.options
    "shell": Option("-c --cmd TEXT", "text", None, "a command line for the shell"),
    "script_path": Option("--script-path FILE", "text", None, "a script for a shell or Python"),
    "executable": Option("--executable FILE", "text", None, "the shell (/bin/sh)"),
    "task_name": Option("--name --task-name NAME", "text", None, "take only tasks with this name"),
    "extra_filter": Option("-f --extra-filter FILTER", "text", None, "filter text or document (labtasker help filter)"),
    "worker_id": Option("--worker-id ID", "text", None, "run as this worker (labtasker worker create)"),
    "worker_max_retries": Option("--worker-max-retries N", "count", None, "suspend this loop after N failed runs"),
    "metrics": Option("--metric NAME=REGEX", "list", (), "report what group 1 matches (repeatable)"),
    "step": Option("--step REGEX", "text", None, "like --metric: the step of those values"),
    "workdir": Option("--workdir TEMPLATE", "text", None, "run each job in this folder; made if missing"),
    "jobs": Option("-j --jobs N", "count", None, "run N at once, each in a slot (1)"),
    "gpus": Option("--gpus LIST", "text", None, "a slot for each of these: 0,1 or UUIDs, or all"),
    "per_gpu": Option("--per-gpu K", "count", None, "K slots for each of them (1)"),
    "eta_max": Option("--eta-max TIME", "duration", None, "give up a run that takes longer: 90, 10 min, 1h30m"),
    "heartbeat_timeout": Option("--heartbeat-timeout TIME", "seconds", None,
                                "give up a run without heartbeat for this long"),
    "time_limit_s": Option("--time-limit TIME", "seconds", None, "end by then (default: with the Slurm or PBS job)"),
    "drain_before_s": Option("--drain-before TIME", "seconds", 0, "start no job in the last TIME before the end"),
    "max_tasks": Option("--max-tasks N", "count", None, "end after N tasks"),
    "fail": Option("--fail", "flag", False, "exit with 4 if a task that it ran has failed"),
    "max_consecutive_failures": Option("--max-consecutive-failures N", "count", _MOST_FAILURES,
                                       "end with 4 after N quick failures in a row; 0: never (%d)" % _MOST_FAILURES),
    "idle_timeout_s": Option("--idle-timeout TIME", "seconds", None, "wait this long for new tasks, then end"),
    "grace_s": Option("--grace TIME", "seconds", _GRACE_S, "time between a job's stop signal and KILL (%d)" % _GRACE_S),
    "server_lost_s": Option("--server-lost TIME", "seconds", SERVER_LOST_S,
                            "wait this long for a server that is away (1h)"),
    "use_pty": Option("use-pty", "switch", True, "use a pseudo-terminal (the default), or pipes"),
    "quiet": Option("-q --quiet", "flag", False, "print a line a task, and no output of jobs"),
    "verbose": Option("-v --verbose", "flag", False, "print whole ids and all arguments"),
}


class Loop:
    """Has tasks run in its slots, for one worker; `execute(slot, run)` runs one and returns an Outcome.

    `request`: the arguments of `fetch_task`; `slots`: a SlotSpec for each slot; `why_not(keys)`: why a job does not get
    these of a task's args; `given`: parameters of LOOP_OPTIONS. `run` returns an exit code. The thread
    that calls it gets the signals, and does for the slots what only that thread can do.

    Its states (LOOP_MOVES); a signal that stops it is noted in `wake`, whatever the state:
        starting   answered -> working, failed -> failed, time_up -> timed_out
        working    answered -> working, emptied -> done, failed -> failed, time_up -> timed_out
        done       answered -> done, emptied -> done, failed -> failed, time_up -> timed_out
        failed     answered -> failed, emptied -> failed, failed -> failed, time_up -> timed_out
        timed_out  answered -> timed_out, emptied -> timed_out, failed -> timed_out, time_up -> timed_out"""

    def __init__(self, execute, request, worker=None, signals=(), slots=None, why_not=None, **given):
        self.execute, self.request, self.worker, self.limit = execute, request, worker, None
        self.why_not, self.account, self.own_worker = why_not, Account(), None
        self.options = Options(LOOP_OPTIONS, given)
        self.wake = Wake(loop_signals() + list(signals))
        self.beats = HeartbeatProcess(self.on_lost)
        self.turn = threading.Lock()  # who has it fetches, so that an idle loop is one connection; guards taken
        self.lock = threading.Lock()  # guards state, account, waiting and what slots are posting
        self.slots = [Slot(self, number, spec) for number, spec in enumerate(slots or [SlotSpec()])]
        self.main_thread_calls = collections.deque()
        self.state, self.taken = "starting", 0
        self.fatal, self.error = None, None  # why it failed: what is said, what is raised
        self.row, self.is_broken = _FailureRow(self.options.max_consecutive_failures), False
        self.is_unheard = False  # it leaves without the answer to a request
        self.waiting = {}  # {key of a run whose report waits in the outbox: Run}
        self.unanswered = set()  # ids of fetches that may have been given a task without anybody having heard of it
        self.idle_since, self.pinned = None, None
        self.waits_for_pauses = self.options.idle_timeout_s is None  # else no longer than that
        self.is_paused = False  # the queue, as the last fetch has told
        self.retry_at = -math.inf  # when a task that is there has had its pause, as the last fetch has told
        self.resting = {}  # {task id: (pause, its end)} of what jobs here handed back to a server that knows no pauses

    def run(self):
        """Return the exit code: 0 if no task or no time is left, 1 on a failure, 128 + its number on a signal."""
        with self.wake, PinnedConfig() as self.pinned:
            self.beats.environ = self.pinned.environ
            try:
                self._register()
                self._supervise()
            except LabtaskerError as error:
                self.fail(str(error))
            finally:
                self.leave()
        if self.error:
            raise self.error
        return self.tell_end()

    def move(self, event):
        """Go on to the state that `event` leads to; raises InvalidStateTransition where it has no row."""
        with self.lock:
            self.state = move(LOOP_MOVES, self.state, event, "the loop")

    def fail(self, text=None, error=None):
        """Have the loop end as soon as what runs is done; the first text and the first error count."""
        self.fatal, self.error = self.fatal or text, self.error or error
        self.move("failed")

    def tell_end(self):
        """Print why the loop ends; return the exit code."""
        if self.fatal:
            remark(self.fatal)
        if self.state == "done" and not self.wake.stop:
            _tell_left(self)
        remark(": ".join(filter(None, (self._why(), self.account.tally()))))
        if self.wake.stop and self.state != "timed_out":
            return 128 + self.wake.stop
        has_failed = self.options.fail and self.account.counts()["failed"]
        return TASKS_FAILED if self.is_broken or has_failed and self.state != "failed" else int(self.state == "failed")

    def leave(self):
        """Try to deliver what waits, as long as there is time; print where the rest is saved."""
        self.unanswered.update(fetch.id for fetch in [slot.fetch for slot in self.slots] if fetch)
        if self.is_unheard and self.unanswered:  # not for as long as a request that has no answer takes
            thread = threading.Thread(target=self.settle, args=(time.sleep,), daemon=True)
            thread.start()
            thread.join(LEAVING_S)
        elif not self.is_unheard and (self.waiting or self.unanswered):
            self.settle(self.wake.pause)
        if self.own_worker and (self.is_unheard or self.waiting or not self._end_worker()):
            keep_end(self.own_worker)
        if self.waiting:
            remark("%s is saved in %s; the next labtasker command here delivers it once the server is back" % (
                ", ".join("the report of task " + run.task_id for run in self.waiting.values()), outbox()))
        self.beats.close()

    def _end_worker(self):
        """Return whether the server has heard that the loop's own worker has ended; it is not waited for long."""
        answers = []

        def end():
            try:
                end_worker(self.own_worker)
                answers.append(True)
            except LabtaskerError as error:
                answers.append(not is_away(error))
        try:
            thread = threading.Thread(target=end, daemon=True)
            start_thread(thread)
            thread.join(_END_WORKER_S)
        except LabtaskerRuntimeError:  # no thread is left
            pass
        return answers == [True]

    def mend(self, held):
        """Reopen files of the loop that a function has closed, in the thread that runs the loop."""
        try:
            hold_standard_streams()
            self.wake.mend()
            self.beats.mend()
            drop_lost_client(held)
            self.expect_store()
        except (OSError, LabtaskerError) as error:
            remark("the function closed files of the loop, and they can't be opened again: %s" % error)

    def expect_store(self):
        """Have a missing store without a server count as away while it has runs of ours: that must not end them."""
        runs = list(self.wake.runs) + list(self.waiting.values())
        rely_on(runs[0].store_id if runs else None)

    def deliver_outbox(self):
        """Deliver what waits in the outbox, and stop the heartbeats of this loop's runs that are delivered."""
        if outbox_reports():
            deliver_kept()
        deliver_ends()
        with self.lock:
            for run in [run for run in self.waiting.values() if not outbox_reports(run)]:
                self.beats.drop(self.waiting.pop(run.key))

    def settle(self, pause):
        """Deliver what waits in the outbox, and hand back tasks of fetches whose answer was lost. Retries for some
        seconds if the loop was stopped, else tries once."""
        def action():
            self.deliver_outbox()
            for fetch_id in list(self.unanswered):
                end_fetch(fetch_id, hand_back=True)
                self.unanswered.discard(fetch_id)
        try:
            retry_while_away(action, pause, lambda: LEAVING_S if self.wake.stop else 0)
        except LabtaskerError as error:
            if not is_away(error):
                remark(error)

    def _why(self):
        left = in_words(self.limit.end_at - monotonic()) if self.limit and self.limit.end_at < math.inf else ""
        if self.wake.stop:
            return "the time is up in " + left if self.state == "timed_out" else (
                "stopped by " + signal_name(self.wake.stop))
        if self.state == "failed" or self.taken == self.options.max_tasks:
            return "stopped" if self.state == "failed" else "--max-tasks reached"
        if self.state != "done":
            return "no more tasks are started, as the time is up in " + left
        longer = _longer(self)
        but = ", but %d pending may take longer than the %s left" % (longer, left) if longer else ""
        return ("done" if self.account.runs else "no matching tasks") + but

    def _register(self):
        """Create a worker if none was named, and complete the request of every fetch."""
        interval_s = load_config().heartbeat_interval_s
        if self.request.get("heartbeat_timeout") is None:
            self.request.update(heartbeat_timeout=3 * interval_s, heartbeat_default=True)
        if not self.request.get("required_fields"):
            remark("no field of args is required: every task matches, whatever its args")
        if not self.request.get("worker_id"):
            self.own_worker = create_worker(**dict(_default_worker(), **(self.worker or {})))
            self.request["worker_id"] = self.own_worker
        self.request["attempt"] = _attempt_facts()
        self.limit = Limit(seconds_left(self.options.time_limit_s), self.options.grace_s, self.options.drain_before_s,
                           parse_duration(self.request.get("eta_max") or 0))
        self.idle_since = monotonic()

    def _supervise(self):
        """Return when every slot has left, or when those that remain wait in vain for a server's answer."""
        give_up_at = math.inf
        for slot in self.slots:
            self._start_slot(slot)
        while not all(slot.state == "left" for slot in self.slots) and not self.is_unheard:
            waits = any(slot.state == "waiting" for slot in self.slots) and self.is_in_vain()
            self.wake.pause(0.2 if waits or self.wake.stop else min(60, self.limit.stop_at - monotonic()))
            while self.main_thread_calls:
                self.main_thread_calls.popleft()()
            self._hurry()
            is_idle = self.wake.stop and not any(slot.state == "running" for slot in self.slots)
            patience_s = FETCH_CUT_S if not self.wake.runs and _file_stamp() is None else LEAVING_S
            give_up_at = min(give_up_at, monotonic() + patience_s) if is_idle else math.inf
            self.is_unheard = monotonic() > give_up_at

    def _start_slot(self, slot):
        """Start a slot's thread; if the system has none left, the loop goes on with the slots that it has."""
        try:
            start_thread(slot.thread)
        except LabtaskerRuntimeError as error:
            slot.move("leave")
            if slot is self.slots[0]:
                raise
            slot.remark(error)

    def _hurry(self):
        """Wake the slots, and end waits for the server that are in vain."""
        is_in_vain, is_remote = self.is_in_vain(), isinstance(client().transport, HttpTransport)
        for slot in self.slots:
            slot.bell.set()
            if is_remote and slot.state == "waiting" and is_in_vain:
                slot.end_waiting()
            if is_remote and self.wake.stop:
                slot.keep_report()

    def is_in_vain(self):
        """Return whether it is in vain to wait for a task."""
        return self.is_over() or self.idle_left_s() <= 0

    def is_over(self):
        """Return whether no more tasks are fetched; jobs are told to stop if the time is up."""
        self.check_time()
        return bool(self.wake.stop or self.state not in ("starting", "working") or self.taken == self.options.max_tasks
                    or monotonic() >= self.limit.start_until)

    def check_time(self):
        """Tell the jobs to stop, as by a signal, if the time is up."""
        import signal
        if not self.wake.stop and monotonic() >= self.limit.stop_at:
            self.move("time_up")
            self.wake.stop = signal.SIGTERM

    def idle_left_s(self):
        """Return how long to wait for tasks; infinity while tasks run, as they may be requeued or submit others."""
        if self.wake.runs or self.waits_for_pauses and (self.is_paused or self.retry_at > -math.inf):
            return math.inf
        return self.idle_since + (self.options.idle_timeout_s or 0) - monotonic()

    def pause_of(self, run, outcome):
        """Return the pause in seconds before a requeued task is fetched again; None if not its job but the loop, which
        is leaving, has handed it back."""
        if outcome.status != "pending" or self.wake.stop or self.state == "failed" or run.state == "declined":
            return None
        pause_s, until = self.resting.get(run.task_id, (0, 0))
        is_plain = client().transport.extensions is False
        if not is_plain or monotonic() > until + _LONGEST_HAND_BACK_S:
            pause_s = pause_before(run.task)
        pause_s = float(max(outcome.delay_s, min(2 * pause_s or FIRST_PAUSE_S, _LONGEST_HAND_BACK_S)))
        if is_plain:
            self.resting[run.task_id] = pause_s, monotonic() + pause_s
        return pause_s

    def without_resting(self, given):
        """Return a filter that leaves out the tasks whose pause this loop keeps."""
        ids = [task_id for task_id, (_, until) in self.resting.items() if monotonic() < until]
        others = {"_id": {"$nin": ids}}
        return given if not ids else {"$and": [given, others]} if given else others

    def note_pause(self, answer):
        """Note from a fetch's answer when a task that exists may be fetched."""
        ends = [until for _, until in self.resting.values() if monotonic() < until]
        if answer.retry_in_s is not None:
            ends.append(monotonic() + answer.retry_in_s)
        self.retry_at = min(ends, default=-math.inf) if not answer.found else -math.inf
        if bool(answer.paused) != self.is_paused:
            self.is_paused = bool(answer.paused)
            remark("the queue is paused: no task is started until labtasker queue resume" if self.is_paused else
                   "the queue goes on")

    def on_lost(self, key, status):
        """Note that someone else has ended a run, and wake the loop; the heartbeats' thread calls it."""
        for run in list(self.wake.runs):
            if run.key == key and status == "stopped":
                self._end_stopped(run)
            elif run.key == key and status != "success" and not run.ended_by_job():
                run.lost = status
                self.wake.nudge()

    def _end_stopped(self, run):
        """Have a run that was stopped early end: its job may leave by itself within the grace."""
        def lose():
            if run in self.wake.runs:
                run.lost = "cancelled"
                self.wake.nudge()
        run.stopped = run.stopped or STOPPED.rstrip(": ")
        timer = threading.Timer(self.options.grace_s, lose)
        timer.daemon = True
        start_thread(timer)

    def handed_back(self, facts=None):
        """Return the Outcome of a run that the loop has to hand back, as it is leaving."""
        why = "the loop was leaving" if not self.wake.stop else "the time of the loop was up" if (
            self.state == "timed_out") else (
            "the loop was stopped by %s" % signal_name(self.wake.stop))
        return Outcome("pending", reason=why, facts=facts)


def _tell_left(loop):
    """Print why a loop leaves pending tasks, of which it looks at MOST_LEFT; where it ran none, also what in its filter
    can't be true. Where the store can't be asked nothing is printed."""
    required, given = loop.request.get("required_fields") or (), loop.request.get("extra_filter")
    try:
        pending = ls_tasks(status="pending", extra_filter=given, limit=_MOST_LEFT).content if loop.why_not else []
        is_none = given and not (pending or loop.account.begun)
        hidden = ls_tasks(status="pending", limit=_MOST_LEFT).content if is_none else []
        doubtful = unmatched({"status": "pending", "extra_filter": given}) if not loop.account.runs else ()
        lines = list(left_tasks(required, pending, hidden, loop.why_not, loop.is_paused))
    except LabtaskerError:
        return
    for text in lines + ["filter: " + text for text in doubtful]:
        remark(text)


_SAMPLE = 1000  # tasks that are looked at to tell why a filter matches none


def unmatched(query):
    """Return why no task matches a query of ls_tasks, a sentence for each comparison of its filter with a key that no
    task has, or with a constant of another sort than the values there."""
    document = query_of(query.get("extra_filter"))
    compared = [each for each in itertools.islice(comparisons(document), MOST_COMPARED)
                if each[0].split(".")[0] in ("args", "metadata", "summary") and "." in each[0]]
    others = {name: value for name, value in query.items() if name != "extra_filter"}
    rows = [dict(flatten({top: getattr(task, top) for top in ("args", "metadata", "summary") if getattr(task, top)}))
            for task in (ls_tasks(limit=_SAMPLE, **others).content if compared else ())]
    return list(dict.fromkeys(filter(None, (_unmatched(rows, *each) for each in compared)))) if rows else []


def _unmatched(rows, field, sign, value):
    """Return why a comparison matches none of the rows, {dotted field: value}, or None where that is not plain."""
    held = [row[field] for row in rows if field in row]
    keys = dict.fromkeys(key for row in rows for key in row)
    if not held:
        is_within = any(key.startswith(field + ".") for key in keys) or re.search(r"\.\d+(\.|\Z)", field)
        like = nearest(field, keys) or next((key for key in keys if key.split(".")[-1] == field.split(".")[-1]), None)
        return None if is_within else "no task has %s%s" % (field, "; did you mean %s?" % like if like else "")
    sorts = {sort_of(item) for each in held for item in (each if isinstance(each, list) else [each])}
    given = "a text" if sign == "regex" else sort_of(value)
    if given and given not in sorts and len(sorts) == 1 and None not in sorts and "a dict" not in sorts:
        return never(field, sorts.pop(), sign, value, " in each task that has it")
    texts = {each.lower(): each for each in held if isinstance(each, str)}
    like = texts.get(nearest(value.lower(), texts)) if sign == "==" and given == "a text" else None
    return "no task has %s; did you mean %s?" % (
        as_compared(field, sign, value), json.dumps(like)) if like not in (None, value) else None


class _FailureRow:
    """The failures in a row of a loop: {task id: the line by which one knows it}. Each is of another task, and came
    within _QUICK_S. After `most` of them something is wrong with this machine; 0: never. The loop's lock guards it."""

    def __init__(self, most):
        self.most, self.tasks = most, collections.OrderedDict()

    def note(self, task_id, status, took_s, line):
        """Note how a run ended. What was handed back or cancelled says nothing about the machine."""
        if status == "failed" and took_s < _QUICK_S:
            self.tasks[task_id] = line
        elif status in ("failed", "success") and not self.is_full():
            self.tasks.clear()

    def is_full(self):
        """Return whether the loop has to stop."""
        return 0 < self.most <= len(self.tasks)

    def told(self):
        """Return why the loop stops: the host, and what the runs said."""
        lines = list(self.tasks.values())
        said = cut(clean(lines[-1] or "nothing", ""), _REASON_LIMIT)
        return "%d tasks in a row failed within %g s each on %s, %s: %s\nlabtasker: look what is wrong with this " \
            "machine; --max-consecutive-failures 0 goes on" % (
                len(lines), _QUICK_S, _host_name(), "all with" if len(set(lines)) == 1 else "the last with", said)


def _longer(loop):
    """Return how many pending tasks, up to 100, match but for a task_timeout longer than the time left."""
    given, longest_s = loop.request.get("extra_filter"), loop.limit.longest_s(loop.request, monotonic())
    longer = {"task_timeout": {"$gt": longest_s}}
    if longest_s == math.inf:
        return 0
    try:
        tasks = ls_tasks(status="pending", extra_filter={"$and": [given, longer]} if given else longer, limit=100)
    except LabtaskerError:  # how it ends is told all the same
        return 0
    return sum(covers(loop.request.get("required_fields") or (), paths_of(task.args)) for task in tasks.content)


def _after_row(loop, run, outcome):
    """Return the Outcome of a run; a quick failure after so many in a row that the loop was stopped is handed back
    instead. It is called before the report: of slots that fail at once none may report one too many."""
    with loop.lock:
        if loop.row.is_full() and outcome.status == "failed" and run.spent_s() < _QUICK_S:
            return Outcome("pending", reason="the loop was stopped by failures in a row")
        status = None if run.stopped else run.ended_by_job() or outcome.status
        loop.row.note(run.task_id, status, run.spent_s(), run.known_by or outcome.reason)
        is_news, loop.is_broken = loop.row.is_full() and not loop.is_broken, loop.row.is_full()
    if is_news:
        loop.fail(loop.row.told())
    return outcome


class _Fetch:
    """A request for a task that was sent and is not answered yet."""

    def __init__(self, fetch_id):
        self.id, self.began, self.is_ended, self.is_over = fetch_id, monotonic(), False, threading.Event()

    def end(self):
        """Tell the server that nobody waits for this, until the answer comes: a restarted server has forgotten it."""
        while not self.is_over.is_set():
            try:
                end_fetch(self.id)
            except LabtaskerError:  # it is away, or does not know how: the fetch itself is asked again
                pass
            self.is_over.wait(1)


class Slot:
    """One of the places in which a loop runs a task at a time: a thread that fetches, has it run, and reports.

    Its states (SLOT_MOVES); its own thread moves it, others only look:
        idle       wait -> waiting, answered -> idle, begin -> running, report -> reporting, end -> idle, leave -> left
        waiting    wait -> waiting, answered -> idle
        running    report -> reporting, end -> idle
        reporting  report -> reporting, end -> idle
        left"""

    def __init__(self, loop, number, spec):
        self.loop, self.wake, self.spec = loop, loop.wake, spec
        self.own = {"LABTASKER_SLOT": str(number), **spec.environment}
        self.bell = threading.Event()  # rung when there is something new: a signal, the end of a job
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.state = "idle"
        self.posting, self.errors = None, 0  # (Run, report) that is on its way; failed passes in a row
        self.fetch = None  # the Fetch that was sent and is not answered yet

    def pause(self, seconds):
        """Sleep for so long, or until there is something new."""
        self.bell.wait(max(0, seconds))
        self.bell.clear()

    def move(self, event):
        """Go on to the state that `event` leads to; raises InvalidStateTransition where it has no row."""
        self.state = move(SLOT_MOVES, self.state, event, "slot " + self.own["LABTASKER_SLOT"])

    def remark(self, text):
        """Write a line for the person who started the loop."""
        remark(self.spec.label + str(text))

    def tell(self, run, tail=""):
        """Print the line of a run that begins or, with `tail`, has ended."""
        loop, label, width = self.loop, self.spec.label, math.inf
        if loop.options.verbose:
            return self.remark("task %s" % (run.task_id + tail if tail else describe(run.task)))
        if result_or(lambda: is_terminal(sys.stderr), False):
            width = screen_size(sys.stderr)[0]
        if tail or not loop.options.quiet:
            with loop.lock:
                line = loop.account.line(run.task, tail, label, width)
            remark(line, "")

    def environment(self, run):
        """Return what the job of a run gets as its environment."""
        given = dict(os.environ, **self.loop.pinned.for_jobs)
        given.update(run.environment())
        given.update(self.own)
        return {name: value for name, value in given.items() if value is not None}

    def live(self):
        """Run one task after another until the loop is over. An error here ends it, once the other slots are done."""
        loop = self.loop
        try:
            while not loop.is_over():
                self._guarded_pass()
        except WorkerSuspended as error:
            loop.fatal = None  # whatever another slot met, this says what to do
            loop.fail("no more tasks are run on %s: %s" % (_host_name(), error))
        except (LabtaskerError, OSError, MemoryError) as error:
            loop.fail(str(error) or type(error).__name__)
        except BaseException as error:
            loop.fail(error=error)
        finally:
            self.move("leave")
            self.wake.ring()

    def _guarded_pass(self):
        """Do one_pass(); the user's handler, if set, gets its exceptions."""
        try:
            self.one_pass()
            self.errors = 0
        except Exception as error:
            handle, self.errors = LOOP_SETTINGS["on_internal_error"], self.errors + 1
            if handle is None or is_away(error):
                raise
            failure = error, self.errors
            self.run_in_main_thread(lambda: handle(*failure))
            self.pause(min(self.errors, 30))

    def run_in_main_thread(self, action, guard=lambda: True):
        """Return action(), called by the thread that runs the loop, or raise what it raises; None as soon as `guard()`
        is false."""
        results = []

        def call():
            try:
                results.append((action(), None))
            except BaseException as error:
                results.append((None, error))
        self.loop.main_thread_calls.append(call)
        self.wake.ring()
        while not results and guard():
            self.pause(0.5)
        answer, error = results[0] if results else (None, None)
        if error:
            raise error
        return answer

    def one_pass(self):
        """Run a task, where there is one."""
        loop = self.loop
        with loop.turn:
            run = None if loop.is_over() else self._fetch()
        if run is None:
            return
        try:
            if run.state == "declined":
                outcome = loop.handed_back()
            else:
                self.tell(run)
                run.begin()
                self.move("begin")
                outcome = self._execute(run)
            self.close(run, outcome)
        finally:
            self.move("end")
            run.move("end")
            self._end_beats(run)
            loop.idle_since = monotonic()
            self.wake.runs.discard(run)
            loop.expect_store()
            self.wake.ring()

    def _execute(self, run):
        """Return the Outcome of a run. If the loop itself fails, the task is handed back before that is raised."""
        try:
            return self.loop.execute(self, run)
        except Exception as error:
            why = "the loop could not run it: %s" % exception_summary(error)["message"]
            self.close(run, Outcome("pending", reason=why[:_REASON_LIMIT]))
            raise

    def _fetch(self):
        """Return the Run of the next task, or None, maybe after waiting. The slot holds `turn`."""
        loop, began = self.loop, monotonic()
        left_s, seen = loop.idle_left_s(), _file_stamp()
        wait_s = max(0, min(left_s, IDLE_WAIT_S, loop.limit.start_until - began))
        if loop.retry_at > -math.inf:
            wait_s = max(0, min(wait_s, loop.retry_at + _WATCH_S - began))
        task, left, is_ended = self._ask(None if seen else wait_s)
        if task:
            run = Run(task.task_id, task.run_id, loop.request["worker_id"], task)
            run.limit, run.store_id = loop.limit, store_id()
            if loop.is_over():
                run.move("decline")
            with loop.lock:
                loop.account.begin(task, left, began)
            loop.taken += 1
            self.wake.runs.add(run)
            loop.expect_store()
            return run
        if left_s <= 0 and loop.idle_left_s() <= 0:
            loop.move("emptied")
        until = min(began + min(wait_s, _IDLE_FETCH_S), loop.retry_at if loop.retry_at > -math.inf else math.inf)
        while seen and seen == _file_stamp() and monotonic() < until and not loop.is_in_vain():
            self.pause(min(_WATCH_S, wait_s))
        if not seen and monotonic() - began < 0.5 and not is_ended:  # the server did not wait
            self.pause(min(wait_s, 1))
        return None

    def _ask(self, wait_s):
        """Return (the next Task or None, how many more fit if that was asked and told, whether `end_waiting` has ended
        the fetch). Delivers the outbox first, and retries while the server is away, unless it has never answered.

        A fetch that was sent may have been given a task. So it is repeated with the same id until it is answered, and
        the id is kept in `unanswered` if it never is."""
        loop, fetch = self.loop, _Fetch(new_id())
        request = dict(loop.request, fetch_id=fetch.id, wait_s=wait_s or None, extra_filter=loop.without_resting(
            loop.limit.filtered(loop.request, monotonic())), attempt=dict(loop.request["attempt"], **self.spec.facts),
            left=monotonic() - loop.account.asked_at > Account.TOTAL_S or None)

        def ask():
            loop.deliver_outbox()
            if wait_s:
                self.move("wait")
            if loop.is_in_vain():  # since the others' end, while the server was away
                self.wake.ring()
            try:
                return fetch_task(**request)
            except LabtaskerError as error:
                if is_away(error) and getattr(error, "is_sent", True):
                    loop.unanswered.add(fetch.id)
                raise
        self.fetch = fetch
        try:
            answer = retry_while_away(ask, self.pause, lambda: (
                0 if self.wake.stop or loop.state != "working" else loop.options.server_lost_s))
            loop.unanswered.discard(fetch.id)
        except LabtaskerError as error:
            if not is_away(error):  # refused
                loop.unanswered.discard(fetch.id)
            raise
        finally:
            self.move("answered")
            self.fetch = None
            fetch.is_over.set()
        loop.move("answered")
        loop.note_pause(answer)
        return answer.task if answer.found else None, answer.left, fetch.is_ended

    def end_waiting(self):
        """Have the server answer the fetch under way; call it from any thread. A task that it has been given comes with
        the answer. A fetch that was just sent gets some time, unless the loop must leave."""
        fetch = self.fetch
        is_young = fetch and not self.loop.is_over() and monotonic() - fetch.began < _ANSWER_S
        if fetch and not fetch.is_ended and not is_young:
            fetch.is_ended = True
            threading.Thread(target=fetch.end, daemon=True).start()

    def start_beats(self, run, group=None):
        """Send heartbeats for `run` from now on."""
        interval_s = load_config().heartbeat_interval_s
        self.loop.beats.add(run, min(interval_s, (run.task.heartbeat_timeout or math.inf) / 3, 60), group)

    def _end_beats(self, run):
        """End the heartbeats of a run, unless its report waits in the outbox."""
        with self.loop.lock:
            if outbox_reports(run):
                self.loop.waiting[run.key] = run
                self.start_beats(run)  # without the job, whose number another process may have next
            else:
                self.loop.beats.drop(run)

    def close(self, run, outcome):
        """Report the outcome of the run, unless the job itself or someone else has ended it."""
        loop, status, run.over_at = self.loop, outcome.status, run.over_at or monotonic()
        self.move("report")
        if outcome.fatal:
            loop.fatal = None  # the latest is said
            loop.fail(outcome.fatal)
        facts = dict(outcome.facts or {})
        if status is not None:
            outcome = outcome._replace(summary=run.results(outcome.summary))
        if status == "failed" and not outcome.reason:
            outcome = outcome._replace(reason=failure_text(outcome.summary or {})[:_REASON_LIMIT])
        outcome = _after_row(loop, run, outcome)
        status = outcome.status
        if run.ended_by_job():
            status = run.ended
            results = {key: value for key, value in (outcome.summary or {}).items() if key not in ERRORS}
            if run.run_id and (facts or results or run.has_log_elsewhere()):
                _send_outcome(self, run, Outcome(status, results or None), facts)
        elif status is None and run.stopped:
            _send_outcome(self, run, Outcome("cancelled"), facts)
        elif status is None:
            send_log_of_lost(run) if run.has_log_elsewhere() and not self.wake.stop else None
        else:
            status = _send_outcome(self, run, outcome, facts)
            run.note_summary(outcome.summary)
        state = _state_after(run, status, outcome.is_final and not run.ended)
        why = outcome.reason
        if run.ended or status is None:
            why = "its job was stopped" if not run.ended else (
                "as reported by the job itself" if outcome.status != run.ended else "")
        if run.stopped:
            state, status, why = "stopped", "cancelled", run.stopped[len(STOPPED):]
        self.tell(run, ending(run.task, state, run.spent_s(), read_json(run.path("summary.json")), why))
        facts["reason"] = run.stopped or outcome.reason
        run.note_end(status or run.lost or "lost", **facts)
        with loop.lock:
            loop.account.end(run.task_id, state)

    def post(self, run, report):
        """Return whether a report was delivered; else it is saved."""
        self.posting = run, report
        if self.wake.stop:
            self.keep_report()
        try:
            lost_s = self.loop.options.server_lost_s
            return post(run, report, self.pause, lambda: LEAVING_S if self.wake.stop else lost_s)
        finally:
            with self.loop.lock:
                self.posting = None

    def keep_report(self):
        """Save the report that is on its way; call it from any thread. A hung server may answer too late."""
        with self.loop.lock:
            (run, report), self.posting = self.posting or (None, None), None
            try:
                if run:
                    keep_report(run, report)
                    self.loop.waiting[run.key] = run
            except OSError:  # no space there: it may still arrive
                pass


_UNTAKEN = (400, 413, 422)  # a server may refuse the summary: then the end is reported without it


def _state_after(run, status, is_final):
    """Return what became of a task whose run ended so: "retry" where it is to be run again; None: by someone else."""
    task, is_last = run.task, is_final or run.task.retries + 1 >= run.task.max_retries
    if status == "pending" and (task.interruptions or 0) + 1 >= MAX_INTERRUPTIONS:
        return "failed"
    return "retry" if status == "failed" and not is_last else status or run.lost or "lost"


def _send_outcome(slot, run, outcome, facts):
    """Return the status once it is delivered or saved; None if someone else has ended the run."""
    log = {"log": True} if run.has_log_elsewhere() else {}
    try:
        delivered = slot.post(run, dict({
            "status": outcome.status, "summary": outcome.summary, "worker_id": run.worker_id,
            "reason": outcome.reason, "attempt": facts or None, "delay_s": slot.loop.pause_of(run, outcome),
            "final": outcome.is_final or None,
            "failure": outcome.failure if outcome.status == "failed" else None}, **log))
    except LabtaskerHTTPStatusError as error:
        if error.status_code not in (404, 409) + _UNTAKEN:
            raise
        if not run.ended:
            slot.remark("task %s: the report of %r was refused: %s" % (run.task_id, outcome.status, error))
        if error.status_code not in _UNTAKEN or not (outcome.summary or facts or log):
            return None
        run.may_send_log = False
        failure = {"labtasker_error": "%s (its summary was refused: %s)" % (
            failure_text(outcome.summary or {})[:_REASON_LIMIT], error)} if outcome.status == "failed" else None
        return _send_outcome(slot, run, outcome._replace(summary=failure), None)
    if not delivered:
        slot.remark("task %s: the server is unreachable; the report is saved in %s until it is back" % (
            run.task_id, outbox()))
    return outcome.status


def send_log_of_lost(run):
    """Send the end of the output of a run that someone else has ended, with a report that can change nothing else: the
    run is over, and a failure that comes after that adds to what is known of it at the most."""
    try:
        deliver(run.task_id, "failed", worker_id=run.worker_id, run_id=run.run_id, log=True)
    except LabtaskerError:  # most are refused, and the output is kept all the same
        pass


def _file_stamp():
    """Return what changes when a store without a server does; None with a server."""
    transport = client().transport
    if not isinstance(transport, StoreTransport):
        return None
    try:
        found = os.stat(transport.where)
        return found.st_ino, found.st_size, found.st_mtime
    except OSError:
        return 0, 0, 0


IDLE_WAIT_S = 50  # a wait for tasks on the server's side
_IDLE_FETCH_S = OWNER_LAPSE_S / 3  # how often an idle loop without a server asks for tasks if the file did not change
_WATCH_S = 0.5  # how often it looks whether the file has changed
_ANSWER_S = 0.5  # how long the answer to a fetch is waited for before the server is told that nobody waits for it
_END_WORKER_S = 2  # how long a loop tries to tell that it has ended
FETCH_CUT_S = 2  # how long a loop that must leave waits for the answer to a fetch
_HAND_BACK_S = 5  # before the time is up: for handing back what was killed then
LEAVING_S = 10  # how long a loop that must leave tries to hand its task back
TASKS_FAILED = 4  # the exit code where tasks have failed for good, if that was asked
_MOST_LEFT = 1000  # pending tasks that a loop that ends looks at
_OWN_SIGNAL_S = 1  # after a job died of a signal: how long the loop waits for the same one
_REASON_LIMIT = 300  # letters of the reason that an attempt keeps
_QUICK_S = 30.0  # a failure that takes longer is the task's own
FIRST_PAUSE_S, _LONGEST_HAND_BACK_S = 1.0, 60.0  # of a task whose job can't work now; doubled each time
_WORKER_MAX_RETRIES = 1000000  # of a loop's own worker: its tasks fail for reasons of their own
LOOP_SETTINGS = {"on_internal_error": None, "prompt_on_failure": False}


def _host_name():
    """Return this machine's name."""
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "host")


def _attempt_facts():
    """Return what a task's attempt keeps of its loop: the host, the process, the code, and where the output is."""
    log = os.path.join(os.path.abspath(load_config().root), "logs", "{task_id}", "{run_id}", "run.log")
    return without_none(host=_host_name(), pid=os.getpid(), git=code_version(), log=from_system(log))


def _default_worker():
    """Return what a loop registers its worker with."""
    host = _host_name()
    return {"worker_name": "%s-%d" % (re.sub(r"[^a-zA-Z0-9_-]", "-", host)[:80], os.getpid()),
            "metadata": {"host": host, "pid": os.getpid()}, "max_retries": _WORKER_MAX_RETRIES}


def pause_before(task):
    """Return the last pause of a task whose latest jobs have handed it back, computed from its attempts; 0 without one.

    A run that took longer than the longest pause starts the count again."""
    count = 0
    for attempt in reversed((task.attempts or [])[:-1]):  # the last is the one that was just run
        times = [parse_time(attempt[name]) for name in ("start", "end") if attempt.get(name)]
        if attempt.get("status") != "pending" or len(times) < 2 or times[1] - times[0] > _LONGEST_HAND_BACK_S:
            break
        count += 1
    return 0 if count == 0 else min(FIRST_PAUSE_S * 2 ** (count - 1), _LONGEST_HAND_BACK_S)


def describe(task):
    """Return all that tells a task from others, in a line."""
    name = " (%s)" % task.task_name if task.task_name else ""
    return "%s%s: %s" % (task.task_id, name, json.dumps(task.args, ensure_ascii=False))


def set_loop_internal_error_handler(handler: "Callable[[Exception, int], object] | None") -> "None":
    """Call `handler(exception, count)` when a loop itself fails for the `count`-th time in a row; None: it ends then.

    A handler that returns lets the loop go on; what it raises ends the loop."""
    LOOP_SETTINGS["on_internal_error"] = handler


def set_prompt_on_task_failure(enabled: "bool") -> "None":
    """Have a decorated loop ask, after each failed task and only on a terminal, whether to go on."""
    LOOP_SETTINGS["prompt_on_failure"] = bool(enabled)


def ask_to_go_on():
    """Return whether to go on after a failure; no answer in ten seconds, or nobody to ask, means yes."""
    is_asked = LOOP_SETTINGS["prompt_on_failure"]
    if not (is_asked and result_or(lambda: sys.stdin.isatty() and sys.stderr.isatty(), False)):
        return True
    sys.stderr.write("labtasker: the task failed. Go on with the next one? [Y/n] (yes in 10 s) ")
    sys.stderr.flush()
    answered = ready([sys.stdin], 10)
    return not answered or not sys.stdin.readline().strip().lower().startswith("n")


def loop(required_fields: "_Keys | None" = None, extra_filter: "_Filter | None" = None,
         cmd: "_Command | None" = None, worker_id: "str | None" = None,
         create_worker_kwargs: "dict[str, Any] | None" = None, eta_max: "_Duration | None" = None,
         heartbeat_timeout: "float | None" = None, pass_args_dict: "bool" = False, grace: "_Duration | None" = None,
         time_limit: "_Duration | None" = None, drain_before: "_Duration | None" = None,
         task_name: "str | None" = None, fail: "bool" = False, quiet: "bool" = False, verbose: "bool" = False,
         max_consecutive_failures: "int" = _MOST_FAILURES) -> "Callable[[Callable[..., Any]], Callable[..., None]]":
    """Return a decorator: calling the function then runs it for one pending task after another until none is left.

    Parameters marked with Required() are filled from the task's args; others are given at the call. With
    `pass_args_dict` the first one gets the args as a dict. `required_fields`: keys that a task must have;
    `extra_filter`: filter text or query document; `eta_max`: how long a run may take ("1h30m"). `grace`: how long the
    function may clean up after a signal (10 s) before its task is handed back and the process is killed; `time_limit`:
    how long the loop may run, if Slurm or PBS gives it no less; `drain_before`: the time before its end in which it
    starts no task.
    `task_name`: take only tasks with this name. `fail`: exit with 4 if a task has failed for good. `quiet`: print one
    line a task, what the function prints goes to the run's log alone; `verbose`: print whole ids and all arguments.
    `max_consecutive_failures`: exit with 4 after so many quick failures in a row, of as many tasks; 0: never. The
    function may raise TransientError, TaskError and FatalWorkerError.

    As process 1 of a container it does not reap the orphans that a function leaves: they can't be told from processes
    that the function itself waits for. Give the container an init there: `docker run --init`."""
    if callable(required_fields):
        raise LabtaskerTypeError("write @labtasker.loop(), with parentheses")
    _check_worker_choice(worker_id, create_worker_kwargs)
    times = {name: value if value is None else parse_duration(value) for name, value in (
        ("grace_s", grace), ("time_limit_s", time_limit), ("drain_before_s", drain_before))}

    def decorate(function):
        import functools
        wanted = BoundFunction(function, required_fields, pass_args_dict)

        @functools.wraps(function)
        def run_loop(*given, **named):
            wanted.check_call(given, named)
            request = fetch_request(wanted.fields, extra_filter, cmd, worker_id, eta_max, heartbeat_timeout, task_name)
            code = Loop(lambda slot, run: _run_function(slot, run, lambda args: wanted.call(args, given, named)),
                        request, create_worker_kwargs, why_not=wanted.why_not, fail=fail, quiet=quiet, verbose=verbose,
                        max_consecutive_failures=max_consecutive_failures, **times).run()
            if code:
                sys.exit(code)
        return run_loop
    return decorate


def _check_worker_choice(worker_id, create_worker_kwargs):
    """Raise LabtaskerTypeError if a worker is both named and described, or described by fields that it lacks."""
    unknown = set(create_worker_kwargs or {}) - {"worker_name", "metadata", "max_retries"}
    if unknown:
        raise LabtaskerTypeError("create_worker_kwargs: %r is not one of worker_name, metadata, max_retries"
                                 % sorted(unknown)[0])
    if worker_id and create_worker_kwargs:
        raise LabtaskerTypeError("worker_id and create_worker_kwargs exclude each other")


def fetch_request(fields, extra_filter, cmd, worker_id, eta_max, heartbeat_timeout, task_name=None):
    """Return what a loop asks `fetch_task` for. A filter's dates are resolved here, once; a duration is checked."""
    if isinstance(extra_filter, str):
        extra_filter = parse_filter(extra_filter, visible(TASK_FIELDS), now())
    tell_doubts(extra_filter, Task)
    if task_name is not None:
        if not NAME.match(str(task_name)):
            raise UsageError("no task has the name %s: letters, digits, _ and -, at most 100" % brief(task_name))
        extra_filter = {"$and": [{"task_name": task_name}] + [extra_filter] * bool(extra_filter)}
    if eta_max is not None:
        parse_duration(eta_max)
    return {"required_fields": fields or None, "extra_filter": extra_filter, "cmd": cmd, "worker_id": worker_id,
            "eta_max": eta_max, "heartbeat_timeout": heartbeat_timeout}


def _run_function(slot, run, call):
    """Return the Outcome of call(args) in the thread that runs the loop; whatever it raises ends the task alone."""
    wake, limit, stop_noted_at = slot.wake, slot.loop.limit, None
    slot.start_beats(run)

    def guard():
        """Return whether the function may go on. One that calls preempted() is left alone for half of the grace."""
        nonlocal stop_noted_at
        slot.loop.check_time()
        if wake.stop and stop_noted_at is None:
            stop_noted_at = monotonic()
            run.note_stop(wake.stop)
            wake.nudge()
        if stop_noted_at is None or not wake.in_main:
            return True
        kill_at = min(stop_noted_at + slot.loop.options.grace_s, max(limit.kill_at, stop_noted_at))
        if run.state == "notified" and monotonic() > (stop_noted_at + kill_at) / 2:
            run.move("insist")
            wake.nudge()
        return monotonic() < kill_at
    outcome = slot.run_in_main_thread(lambda: _put_back(wake, lambda: _call_function(slot, run, call)), guard)
    if outcome is None:
        slot.close(run, slot.loop.handed_back())
        _end_process(slot)
    return outcome


def _put_back(wake, action):
    """Return action(), called by the thread that runs the loop; the loop's umask and signals are then restored."""
    if not wake.in_main:
        return action()
    import signal
    mask, is_posix = os.umask(0o077), hasattr(signal, "pthread_sigmask")
    os.umask(mask)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if is_posix else ()
    try:
        return action()
    finally:
        os.umask(mask)
        wake.retake_signals()
        if is_posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _end_process(slot):
    """End the process: its function did not stop when it was told to. The task was handed back."""
    slot.loop.leave()
    code = slot.loop.tell_end()
    try:
        for stream in (sys.stdout, sys.stderr):
            flush = threading.Thread(target=getattr(stream, "flush", None), daemon=True)
            flush.start()
            flush.join(1)
    finally:
        os._exit(code)


def _call_function(slot, run, call):
    thread, wake = threading.get_ident(), slot.wake
    run.note_begin()
    run.make_task_dir()
    names = {name: value for name, value in slot.environment(run).items() if os.environ.get(name) != value}
    names = names if wake.in_main else {}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    RUNS[thread] = run
    log = RunLog(run.path("run.log"))
    tees, held = listen_in(log, slot.loop.options.quiet) if wake.in_main else (), client_held()
    try:
        try:
            wake.interrupt = lambda signum: _interrupt(wake, run, signum)
            wake.interrupt(None)  # a signal that came before
            answer = call(run.task.args)
        finally:
            wake.interrupt = None
            if os.getpid() == run.pid:
                slot.loop.mend(held)
        if os.getpid() != run.pid:
            _end_child(None)
        has_heard = run.state in ("notified", "insisting", "raised")
        return slot.loop.handed_back() if has_heard else _outcome_of_answer(run, answer)
    except BaseException as error:
        wake.interrupt = None
        if os.getpid() != run.pid:
            _end_child(error)
        return _outcome_of_error(slot.loop, run, error)
    finally:
        listen_no_more(tees)
        log.close()
        RUNS.pop(thread, None)
        run.note_over()
        run.leave_task_dir()
        for name in names:
            os.environ.pop(name, None) if before[name] is None else os.environ.update({name: before[name]})


def _end_child(error):
    """End a process that the function forked and that returned from it; never returns. The loop is its parent's."""
    code = 0
    try:
        code = _code_of_exit(error) if error is not None else 0
        if code is None:
            code = 1
            tell(exception_summary(error)["traceback"].rstrip("\n"))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:  # nobody is left to tell
        pass
    finally:
        os._exit(code)


def _interrupt(wake, run, signum):
    """Raise an exception in the function that runs: TaskCancelled if its task was lost, KeyboardInterrupt if the loop
    must leave. That comes once, and again at each further signal; later to a function that calls preempted()."""
    if wake.stop:
        run.move("stop")
        if signum is not None and wake.times > 1 or run.state in ("stopping", "insisting"):
            run.move("raise")
            raise KeyboardInterrupt(signal_name(wake.stop))
    elif run.lost:
        raise TaskCancelled("task %s is %s: nobody waits for this run any more" % (
            run.task_id, run.stopped or run.lost))


def _outcome_of_answer(run, answer):
    """Return the Outcome of a function that came to its end; one whose body has not run at all has failed."""
    from collections import abc
    kind = next((kind for kind in (abc.Coroutine, abc.AsyncGenerator, abc.Generator, abc.Awaitable)
                 if issubclass(type(answer), kind)), None)
    if kind is None:
        return Outcome("success", plain_summary(answer) if issubclass(type(answer), dict) else None)
    try:
        answer.close()  # else Python complains later that it was never awaited
    except Exception:  # it has none
        pass
    word = {abc.Coroutine: "a coroutine", abc.AsyncGenerator: "an async generator", abc.Generator: "a generator"}
    error = "the function returned %s, which nobody runs: call it in a plain function, as asyncio.run(f(...)) or " \
            "for _ in f(...) does" % word.get(kind, "an awaitable")
    remark("task %s: %s" % (run.task_id, error))
    return Outcome("failed", {"labtasker_error": error}, failure="exception")


def _outcome_of_error(loop_, run, error):
    import signal
    if run.lost or run.stopped and not issubclass(type(error), KeyboardInterrupt):
        return Outcome(None)
    is_interrupt = issubclass(type(error), KeyboardInterrupt)
    if is_interrupt and run.state != "raised":  # raised by the function itself
        loop_.wake.stop = loop_.wake.stop or signal.SIGINT
    if is_interrupt or run.state == "raised":
        return loop_.handed_back()
    code = _code_of_exit(error)
    if code is not None:
        return outcome_of_exit(code)
    if issubclass(type(error), TransientError):
        return Outcome("pending", reason=_brief_error(error), delay_s=min(error.delay_s, MAX_DELAY_S))
    if issubclass(type(error), FatalWorkerError):
        why = _brief_error(error)
        return Outcome("pending", reason=why, fatal="no more tasks are run on %s: %s" % (_host_name(), why))
    summary = {"labtasker_exception": exception_summary(error)}
    is_final = issubclass(type(error), (UnfitArgs, TaskError))
    remark("task %s raised\n%s" % (run.task_id, summary["labtasker_exception"]["traceback"].rstrip()))
    fatal = None if ask_to_go_on() else "stopped after a failure, as you asked"
    return Outcome("failed", summary, fatal=fatal, is_final=is_final, failure=failure_of_error(error))


def _brief_error(error):
    """Return what an exception of a job says, in one line."""
    return cut(failure_text({"labtasker_exception": exception_summary(error)}), _REASON_LIMIT)


def _code_of_exit(error):
    """Return the exit code that a SystemExit stands for, None where it is another error or has a text."""
    if not issubclass(type(error), SystemExit):
        return None
    code = result_or(lambda: error.code, "?")
    if code is None or isinstance(code, int):
        return (code or 0) & 255 if -2 ** 31 <= (code or 0) < 2 ** 31 else 255
    return None


def command_loop(argv=None, **given):
    """Return the exit code after running the command for one pending task after another; `given`: LOOP_OPTIONS.

    0: no more tasks, or no more time; 1: it could not go on; 128 + the signal that stopped it. Raises TemplateError,
    FilterError and the like before any task is fetched."""
    import signal
    options = Options(LOOP_OPTIONS, given)
    command = JobCommand(argv, options.shell, options.script_path, options.executable, options.workdir)
    metrics = read_metrics(options.metrics, options.step)
    request = fetch_request(command.keys, options.extra_filter, command.cmd, options.worker_id, options.eta_max,
                            options.heartbeat_timeout, options.task_name)
    worker = {} if options.worker_max_retries is None else {"max_retries": options.worker_max_retries}
    if options.worker_id and worker:
        raise UsageError("--worker-max-retries is for the loop's own worker; worker %s has its own" % options.worker_id)
    return Loop(lambda slot, run: _run_job(slot, run, command, options.use_pty, *metrics), request, worker,
                signals=[signal.SIGCHLD], slots=make_slots(options.jobs, options.gpus, options.per_gpu),
                why_not=command.why_not, **vars(options)).run()


class _Reporter:
    """Reports what metrics find in a job's output while it runs; the last values come with its end."""

    PERIOD_S = 1  # between two reports at least

    def __init__(self, run, metrics, step=None):
        self.run, self.news, self.over = run, threading.Event(), threading.Event()
        self.printed, self.reported = Printed(metrics, step, self.news.set), {}
        run.printed = self.printed
        self.thread = threading.Thread(target=self._live, daemon=True)
        start_thread(self.thread)

    def _live(self):
        is_over = False
        while not is_over:
            self.news.wait()
            self.news.clear()
            is_over = self.over.is_set()
            try:
                points = self.printed.take(is_over)
                for step, values in points:
                    self._post(values, step)
                values = dict(self.printed.values)
                if not (points or is_over) and values != self.reported:
                    self._post(values)
                self.reported = values
            except (LabtaskerError, OSError):  # the run was lost; any other reason comes with the report of its end
                return
            self.over.wait(self.PERIOD_S)

    def _post(self, values, step=None):
        point = {} if step_of(step) is None else {"step": step, "point_id": new_id()}
        if not self.run.stopped:
            post(self.run, dict(point, status="running", summary=plain_summary(values), worker_id=self.run.worker_id))

    def end(self):
        """Return once no report is on its way."""
        self.over.set()
        self.news.set()
        self.thread.join(LEAVING_S)


def _run_job(slot, run, command, use_pty=True, metrics=None, step=None):
    """Return the Outcome of the command in a process group of its own.

    If it can't be started, the task fails where its args are the reason; else it is handed back."""
    output, script, kills = None, None, oom_kills()
    reporter = _Reporter(run, metrics, step) if metrics else None
    try:
        output = Output(RunLog(run.path("run.log")), use_pty, slot.spec.label, reporter and reporter.printed,
                        slot.loop.options.quiet)
        run.make_task_dir()
        args = dict(run.task.args, **run.built_in(slot.own["LABTASKER_SLOT"]))
        folder = command.folder(args)
        words, script = command.words(args, run.log_dir)
        process = start_job(words, slot.environment(run), output.ends, folder)
        output.let_go()
        is_own_end = _watched(slot, run, process)
    except _NotWatched as error:
        return Outcome("pending", reason=str(error))
    except LabtaskerRuntimeError:  # no thread is left: the loop, which needs some too, ends
        raise
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        return outcome_not_started(command, error)
    finally:
        if output:
            output.finish()
        if reporter:
            reporter.end()
        _remove_script(script)
        run.leave_task_dir()
    facts = dict(exit_facts(process.returncode), **({"workdir": folder} if folder else {}))
    if is_own_end and not _is_of_own_signal(slot, process.returncode):
        outcome = outcome_of_exit(process.returncode)._replace(facts=facts)
        data = read_end(run.path("run.log"))[0] if outcome.status == "failed" else None
        text, is_out_of_memory = (data or b"").decode("utf-8", "replace"), (oom_kills() or 0) > (kills or 0)
        outcome, run.known_by = classed(outcome, process.returncode, text, is_out_of_memory)
        return outcome
    return Outcome(None, facts=facts) if run.lost else slot.loop.handed_back(facts)


class _NotWatched(Exception):
    """The loop could not wait for a job that it had started, and has ended it."""


def _watched(slot, run, process):
    """Return what `watch` does; raises _NotWatched, the job ended, where that fails."""
    try:
        return watch(slot, run, process)
    except Exception as error:
        end_groups([process.pid], monotonic() + LOST_GRACE_S, slot.pause)
        process.wait()
        if isinstance(error, LabtaskerRuntimeError):
            raise
        raise _NotWatched("the loop could not watch the job: %s: %s" % (type(error).__name__, error)) from error


def _remove_script(path):
    """Remove the file that a job was started from; the job may have done that itself."""
    try:
        if path:
            os.unlink(path)
    except OSError:
        pass


def _is_of_own_signal(slot, code):
    """Return whether a job died of a signal that the loop got too: schedulers send it to every process at once."""
    number = -code if code < 0 else code - 128  # a shell's way to say that what it ran died of a signal
    give_up_at = monotonic() + _OWN_SIGNAL_S
    while number in loop_signals() and not slot.wake.stop and monotonic() < give_up_at:
        slot.pause(give_up_at - monotonic())
    return number in loop_signals() and bool(slot.wake.stop)


def watch(slot, run, process):
    """Return whether the job ended by itself; False where it was ended: the loop must leave or the run is lost."""
    import signal
    slot.start_beats(run, process.pid)
    wake, loop_, kill_at = slot.wake, slot.loop, None
    while process.poll() is None:
        if kill_at is None and (wake.stop or run.lost):
            kill_at = monotonic() + LOST_GRACE_S
            if wake.stop:
                run.note_stop(wake.stop)
                slot.remark("%s: stopping the job; %s again kills it" % (
                    signal_name(wake.stop), "Ctrl-C" if wake.stop == signal.SIGINT else "a signal"))
                kill_at = min(monotonic() + loop_.options.grace_s, max(loop_.limit.kill_at, monotonic()))
            signal_group(process.pid, wake.stop or signal.SIGTERM)
            signal_group(process.pid, signal.SIGCONT)  # a stopped job gets the signal once it continues
        if kill_at and (monotonic() >= kill_at or wake.times > 1):
            signal_group(process.pid, signal.SIGKILL)
        slot.pause(min(1 if wake.in_main else 0.05, max(0.02, (kill_at or math.inf) - monotonic())))
    if kill_at is None:
        return True
    end_groups([process.pid], min(kill_at, monotonic() + 1), slot.pause)
    return False


# 16. Text ####################################################################
#
# What a person reads and types: messages, tables, YAML and CSV; values, task arguments, files of tasks, answers;
# the references that help prints. Knows no command and asks no store. Results go to stdout, everything else to
# stderr. Uses 1 to 3, 5, 8 to 14. Tests: test_cli.py, test_values.py, test_terminal.py.


_COLOURED = Pattern("(\x1b\\[[0-9;]*m)")


def say(text):
    """Write a result to stdout. On a terminal all control sequences but colours are made harmless.

    A character that the encoding lacks is escaped on a terminal, and where PYTHONIOENCODING asks for that encoding.
    Otherwise the output is UTF-8, as Python 3.7 and later have it in the locale C."""
    if is_terminal(sys.stdout):
        text = "".join(piece if at % 2 else clean(piece) for at, piece in enumerate(_COLOURED.split(text)))
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:
        is_wanted = is_terminal(sys.stdout) or os.environ.get("PYTHONIOENCODING")
        encoding = (sys.stdout.encoding, "backslashreplace") if is_wanted else ("utf-8", "surrogateescape")
        sys.stdout.flush()
        sys.stdout.buffer.write((text + "\n").encode(*encoding))


def note(text):
    """Write a message that is not a result to stderr, after the results so far. A closed stderr is no error."""
    try:
        sys.stdout.flush()
    except OSError:  # stdout can't be written: that is reported once, elsewhere
        silence()
    tell(text)


def tasks_in_words(tasks):
    """Return "1 task", "3 tasks"."""
    return "%d task%s" % (len(tasks), "" if len(tasks) == 1 else "s")


def span(seconds):
    """Return a length of time in the largest unit of which it has at least two: 45s, 12m, 3h, 5d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return "%d%s" % (seconds // size, unit)
    return "%ds" % max(0, seconds)


def age(moment):
    """Return how long ago an aware datetime was, as `span` does."""
    return span(now() - moment.timestamp())


def _narrowed(widths, room):
    """Return the widths of columns. The widest ones are made narrower until all fit in `room`, or all are narrow."""
    widths = list(widths)
    while sum(widths) + 2 * len(widths) - 2 > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    return widths


def render_table(rows, room=10 ** 9, painted=None):
    """Return rows of texts, of which the first is the header, as aligned lines of at most `room` cells.

    Columns without any text are left out. `painted(cell, padded)` returns the padded cell with its colour."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    rows = [[clean(row[i], "") for i in kept] for row in rows]
    widths = _narrowed([min(room, max(map(cells_wide, column))) for column in zip(*rows)], room)
    return "\n".join(_table_line(row, widths, painted) for row in rows)


def _table_line(row, widths, painted):
    cells = [fitted(cell, width) for cell, width in zip(row, widths)]
    cells[-1] = cells[-1].rstrip()
    if painted:
        cells = list(map(painted, row, cells))
    return "  ".join(cells).rstrip()


# ---- Columns: the fields in which rows differ, on a terminal and on the page

# columns: the fields from left to right. telling: the same fields, the most informative first. same: {field: value} of
# the fields that have one value in all rows.
Chosen = row_type("Chosen", "columns telling same")

GROUPS = ("status", "task_name", "args", "cmd", "summary", "error", "retries", "duration", "worker_id", "created_at")
_BY_CHANCE = {"duration", "created_at"}  # equal values in these are a coincidence, so they stay columns
WIDEST, WIDEST_ERROR = 20, 36  # cells that a column may ask for while others still need a place
_CUT = 12  # cells that a longer text is cut to before its column is left out: no number is longer


def choose_columns(rows, kept=()):
    """Return the Chosen of rows, each a {field: value} with args and summary as dotted fields.

    `kept` are the fields by which the rows are sorted: they count as the most informative and stand first among the
    results. A field with the same value in all rows is no column, unless there is only one row."""
    value_counts, values = {}, {}  # field: {text of a value: how many rows have it}; field: one of its values
    for row in rows:
        for field, value in row.items():
            counts = value_counts.get(field)
            if counts is None:
                values[field], counts = value, value_counts.setdefault(field, {})
            text = "" if field in _BY_CHANCE else exact(value)
            counts[text] = counts.get(text, 0) + 1
    is_alike = {field: rows[1:] and max(counts.values()) == len(rows) and field not in _BY_CHANCE
                for field, counts in value_counts.items()}
    groups = {group: [] for group in GROUPS}
    for field in value_counts:
        if not is_alike[field]:
            groups.setdefault(field.split(".")[0], []).append(field)
    groups["summary"].sort(key=lambda field: (_index_or_end(field, kept), -sum(value_counts[field].values())))
    columns = list(dict.fromkeys(sum((groups[group] for group in groups), [])))
    return Chosen(columns, _most_telling(groups, columns, kept, value_counts, len(rows)),
                  {field: values[field] for field in value_counts if is_alike[field]})


def exact(value):
    """Return a value as text that differs from that of other values, also of 1 and 1.0. Text stands as it is."""
    return value if isinstance(value, str) else repr(value)


def _index_or_end(item, items):
    return items.index(item) if item in items else len(items)


def _most_telling(groups, columns, kept, value_counts, total):
    """Return the columns, the most informative first.

    An argument informs the more, the more rows differ from its most common value and the fewer cells it takes."""
    def information(field):
        counts = value_counts[field]
        width, count = max(len(field) - len("args."), *map(len, counts)), sum(counts.values())
        return total > 1 and (count - max(counts.values()) + count / total / 9) / max(4, min(WIDEST, width))
    args, results = sorted(groups["args"], key=information, reverse=True) + groups["cmd"], groups["summary"]
    errors, is_failed = groups["error"], 2 * sum(value_counts.get("error", {}).values()) > total
    order = [field for field in kept if field in columns] + groups["status"] + errors * is_failed
    order += args[:2] + results[:1] + args[2:4] + results[1:2] + errors + args[4:] + results[2:]
    return list(dict.fromkeys(order + [field for field in columns if field not in order]))


def fit_columns(telling, wants, room, kept=()):
    """Return {field: cells} of the columns that fit in `room` cells, the most informative first.

    The first column and those of `kept` are always there. `wants` has the (least, most) cells of each. A long text is
    cut before its column is left out. Cells that are left over go to the columns that want more."""
    cells, left = {}, room
    for field in telling:
        least = wants[field][0]
        if least + 2 > left and field not in kept:
            least = min(least, max(left - 2, _CUT))
        if least + 2 <= left or field in kept or not cells:
            cells[field], left = least, left - least - 2
    for field in cells:
        more = max(0, min(left, wants[field][1] - cells[field]))
        cells[field], left = cells[field] + more, left - more
    return dict(zip(cells, _narrowed(cells.values(), room))) if cells else cells


def shortened(names, pattern, taken):
    """Return {field: name} with each name shortened by what the pattern matches, unless the result is ambiguous."""
    short = {field: re.sub(pattern, "", name) or name for field, name in names.items()}
    uses = collections.Counter(short.values())
    uses.update(name for name in taken if name not in names.values())
    return {field: short[field] if uses[short[field]] == 1 else name for field, name in names.items()}


def texts_of(values, digits, must_differ):
    """Return values as texts for a column, floats with that many digits. With `must_differ` they get all digits where
    different values would look the same."""
    texts = [brief(value, digits) for value in values]
    if must_differ and len(set(texts)) < len(set(map(exact, values))):
        texts = [repr(value) if isinstance(value, float) else brief(value) for value in values]
    return texts


def cut_apart(texts, width):
    """Return texts cut to `width` cells: at their end, or at their start if that leaves more of them distinct."""
    heads = [fitted(text, width).rstrip() for text in texts]
    tails = [fitted(text[::-1], width).rstrip()[::-1] for text in texts]
    return tails if len(set(tails)) > len(set(heads)) else heads


def wrapped(words, room):
    """Return words in lines of at most `room` cells. A longer word is cut. All lines but the first are indented."""
    lines = [""]
    for word in words:
        word = fitted(word, min(cells_wide(word), max(1, room - 2)))
        if lines[-1].strip() and cells_wide(lines[-1]) + 1 + cells_wide(word) > room:
            lines.append(" ")
        lines[-1] += " " + word if lines[-1] else word
    return lines


def runs_s(task):
    """Return how many seconds the last runs of a Task, or of a task's record, took; [] for a task that waits.

    The list ends with the last run; before it are the runs that this one resumed: they were handed back or lost. A run
    that goes on counts until now, one that is over until its end or, if that is unknown, until the task last
    changed."""
    if task.start_time is None or task.status == "pending":
        return []
    attempts, run_id = getattr(task, "attempts", None) or [], getattr(task, "run_id", None)
    is_kept = bool(attempts) and run_id in (None, attempts[-1].get("run_id"))  # None: since a reset or an update
    ended = attempts[-1].get("end") if is_kept else None
    end = now() if task.status == "running" else ended or task.last_modified
    resumed = itertools.takewhile(lambda past: past.get("status") in ("pending", "timeout") and "start" in past,
                                  reversed(attempts[:len(attempts) - is_kept]))
    times = [(task.start_time, end)] + [(attempt["start"], attempt["end"]) for attempt in resumed]
    return [max(0.0, _in_seconds(end) - _in_seconds(start)) for start, end in reversed(times)]


def spent_s(task):
    """Return the sum of `runs_s` of a Task or a task's record; None if no run of it has begun."""
    return sum(runs_s(task)) if task.start_time is not None and task.status != "pending" else None


def folders_of(task):
    """Return {"workdir": the folder in which the last run ran, if `--workdir` gave it one, "task_dir": the one that all
    its runs share}, as the last run's host has them, of a Task or a task's record; None for what is not known."""
    last = task.attempts[-1] if task.attempts else {}
    log = last.get("log")
    shared = isinstance(log, str) and re.match(r"(?s)(.+[/\\])[^/\\]+[/\\]run\.log\Z", log)
    return {"workdir": last.get("workdir"), "task_dir": shared.group(1) + TASK_FOLDER if shared else None}


def spent(task, many="{0}, last {1}"):
    """Return how long a task took. If it was resumed: `many`, with the sum, the last run and the number of runs."""
    times_s = runs_s(task)
    form = many if times_s[1:] else "{0}"
    return form.format(span(sum(times_s)), span(times_s[-1]), len(times_s)) if times_s else ""


def _in_seconds(moment):
    """Return an ISO text, an aware datetime or an Instant as an Instant."""
    if isinstance(moment, str):
        return parse_time(moment)
    return moment.timestamp() if isinstance(moment, datetime.datetime) else moment


def _per_time(per_s):
    """Return a rate a second, minute or hour: the first of which is at least 1."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if per_s * size >= 1 or unit == "h":
            return "%.1f/%s" % (per_s * size, unit)


def progress(pace, width):
    """Return a Pace as a bar and words, at most `width` cells."""
    counts = pace.counts
    total = sum(counts.values())
    over = total - counts["pending"] - counts["running"]
    words = ["%d of %d done" % (over, total)] + [
        "%d %s" % (counts[state], state) for state in ("failed", "running") if counts[state]]
    if counts["pending"] and not counts["running"]:
        words.append("none running")
    if pace.per_s:
        words.append(_per_time(pace.per_s))
    if pace.eta_s is not None:
        words.append("ETA " + span(pace.eta_s))
    text = ", ".join(words)
    room = min(30, width - len(text) - 3)
    full = room * over // total if total else 0
    return "[%s%s] %s" % ("#" * full, "." * (room - full), text) if room >= 5 else text[:width]


def in_states(counts):
    """Return "3 pending, 1 running"."""
    return ", ".join("%d %s" % (counts[state], state) for state in TASK_STATES if counts[state])


_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"


def sparkline(values, width=24, stream=None):
    """Return numbers as a line of at most `width` signs, the last of them the last number; a blank is no finite number.

    Where the encoding of the stream (stdout) lacks blocks, the signs are ASCII."""
    signs = _BLOCKS
    try:
        signs.encode(getattr(stream or sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        signs = _PLAIN_BLOCKS
    wide = min(width, len(values))
    shown = [values[(place + 1) * len(values) // wide - 1] for place in range(wide)]
    shown = [value if type(value) in (int, float) and value - value == 0 else None for value in shown]
    finite = [value for value in shown if value is not None]
    low, high = (min(finite), max(finite)) if finite else (0, 0)
    size = high / 2 - low / 2  # by halves, which can't be too large for a float

    def place(value):
        return int((value / 2 - low / 2) / size * (len(signs) - 0.01)) if size else len(signs) // 2
    return "".join(" " if value is None else signs[place(value)] for value in shown)


def curve_lines(points):
    """Return a line for each number that points of a history have: its name, its curve, its last value and step."""
    curves = {}
    for point in points:
        for name, value in flatten({key: value for key, value in point.items() if key not in ("step", "at")}):
            if type(value) in (int, float):
                curves.setdefault(name, []).append((point["step"], value))
    width = max(map(len, curves), default=0)
    return ["%-*s  %s  %s at step %s" % (width, name, sparkline([value for _, value in curve]), brief(curve[-1][1]),
                                        brief(curve[-1][0])) for name, curve in curves.items()]


# ---- Formats: yaml, csv


def as_jsonl(rows):
    """Return dicts as JSON, one a line."""
    return "\n".join(map(json.dumps, rows))


_YAML_PLAIN = r"(?ai)(?!(?:true|false|yes|no|on|off|null|y|n)\Z)[a-z_/][\w./@+-]*(?: [\w./@+-]+)*\Z"


def _yaml_scalar(value, indent=""):
    """Return a JSON value other than a filled dict or list as text that YAML 1.1 and 1.2 read alike."""
    if isinstance(value, str) and re.match(_YAML_PLAIN, value):
        return value
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)
        return _yaml_block(value, indent) or CONTROL.sub(lambda m: "\\u%04x" % ord(m.group()), quoted)
    if isinstance(value, float):
        return re.sub("(nan|inf)", r".\1", re.sub(r"\A(-?\d+)e", r"\1.0e", repr(value)))
    return json.dumps(value)


def _yaml_block(text, indent):
    """Return text of several lines as a YAML block, or None if YAML would change the text."""
    if "\n" not in text[:-1] or text[0] in " \n\t" or text.endswith("\n\n") or CONTROL.search(text.replace("\n", "")):
        return None
    lines = text.rstrip("\n").split("\n")
    return "\n".join([("|" if text.endswith("\n") else "|-")] + [line and indent + "  " + line for line in lines])


def _yaml_lines(value, indent=""):
    """Yield a dict or a list as the lines of a YAML block; no line if it is empty."""
    is_dict = isinstance(value, dict)
    for key, item in value.items() if is_dict else enumerate(value):
        head = indent + (_yaml_scalar(key) + ":" if is_dict else "-")
        if not isinstance(item, (dict, list)) or not item:
            yield "%s %s" % (head, _yaml_scalar(item, indent))
            continue
        lines = _yaml_lines(item, indent + ("" if is_dict and isinstance(item, list) else "  "))
        yield head if is_dict else "%s %s" % (head, next(lines).lstrip(" "))
        yield from lines


def as_yaml(rows):
    """Return dicts as a YAML list."""
    return "\n".join(_yaml_lines(rows)) or "[]"


def _csv_cell(value):
    """Return a value as a cell of CSV, in quotes if the csv module of any Python needs them; None is an empty cell, a
    dict or a list is JSON."""
    text = "" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return '"%s"' % text.replace('"', '""') if re.search('[",\r\n]|\\A\\s|\\s\\Z', text) else text


def as_csv(rows, columns=()):
    """Return dicts as CSV with these columns, or with one for each field; a nested one is named like `args.lr`."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        rows = [{key: value for key, value in flatten(row) if value != {}} for row in rows]
        columns = sorted({key for row in rows for key in row}, key=lambda key: (fields.index(key.split(".")[0]), key))
    lines = [columns] + [[row.get(column) for column in columns] for row in rows]
    text = "\n".join(",".join(map(_csv_cell, line)) if line[1:] else _csv_cell(line[0]) or '""'
                     for line in lines if line)
    return clean(text) if is_terminal(sys.stdout) else text


WRITERS = {"json": lambda rows, columns: json.dumps(rows, indent=2), "jsonl": lambda rows, columns: as_jsonl(rows),
           "yaml": lambda rows, columns: as_yaml(rows), "csv": as_csv}
_RECORD_WRITERS = {"json": lambda row: json.dumps(row, indent=2), "jsonl": lambda row: as_jsonl([row]),
                   "yaml": lambda row: "\n".join(_yaml_lines(row)), "csv": lambda row: as_csv([row])}
FORMATS = ("json", "jsonl", "yaml", "csv")


def record_text(row, fmt="yaml"):
    """Return one dict as text in one of FORMATS."""
    return _RECORD_WRITERS[fmt](row)


# ---- Values that a person typed
WORD = Pattern(r"(?!(?:True|False|None)\Z)[A-Za-z_][A-Za-z0-9_./-]*\Z")  # text that can't be a literal
_SHORT_NUMBER = Pattern(r"-?(?:0|[1-9][0-9]{0,14})\Z|-?(?=[0-9.]{3,16}\Z)(?:0|[1-9][0-9]*)\.[0-9]+\Z")  # float is exact
_DECIMAL = Pattern(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z")
_NUMBERS_OF_LITERAL = Pattern(r"""(?s)('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
                              r"""|(?<![\w.)\]'"])[-+]?\.?[0-9](?:[eE][-+](?=[0-9])|[\w.])*""")


def _number_or_text(text, read=float):
    """Return the number that `text` is, or the text itself if a float or an int can't hold exactly that number."""
    if _SHORT_NUMBER.match(text):
        return json.loads(text)
    import decimal
    try:
        value = read(text)
        is_kept = -2 ** 63 <= value < 2 ** 64 if read is int else decimal.Decimal(repr(value)) == decimal.Decimal(text)
    except (ValueError, ArithmeticError):
        return text
    return value if is_kept else text


def _kept_numbers(text):
    """Return a Python literal in which each number that can't be held exactly is put in quotes."""
    def kept(match):
        word = match.group()
        if match.group(1) or word[-1] in "jJ":
            return word
        is_kept = _DECIMAL.match(word) and _number_or_text(word, int if word.strip("+-").isdigit() else float) != word
        return word if is_kept else json.dumps(word)
    return _NUMBERS_OF_LITERAL.sub(kept, text)


def literal(text):
    """Return the value of `text` as a Python literal that JSON can hold, or the text itself.

    A number in it that can't be held exactly (31e8473) or is written oddly (2024_01_15) stays text. Words and short
    numbers, which most values are, are seen by a pattern, as `ast` is slow to import."""
    if _SHORT_NUMBER.match(text):
        return json.loads(text)
    if WORD.match(text):
        return text
    import ast
    import warnings
    try:
        kept = _kept_numbers(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            document = json.dumps(ast.literal_eval(kept.lstrip(" \t")))
        value = json.loads(document, object_pairs_hook=no_duplicates)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return text if kept != text and isinstance(value, str) else value


def typed_value(text, what, strict=False):
    """Return the value of `text` as JSON, else as a Python literal, else the text itself.

    Raises UsageError for a key that is there twice, and with `strict` instead of returning the text itself. Numbers
    are treated as by `literal`."""
    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_float=_number_or_text,
                          parse_int=functools.partial(_number_or_text, read=int))
    except InvalidFields as error:
        raise UsageError("%s: %s" % (what, error)) from None
    except (ValueError, RecursionError) as error:
        value = literal(text)
        if strict and value == text:
            raise UsageError("%s takes JSON or a Python literal, such as '{\"key\": 1}': %s" % (what, error)) from None
        return value


def dict_of(text, what):
    """Return the dict that `text` holds as JSON or as a Python literal; raises a UsageError that names `what`."""
    value = typed_value(text, what, strict=True)
    if not isinstance(value, dict):
        raise UsageError("%s takes a dict, such as '{\"key\": 1}', not %s" % (what, brief(value)))
    return value


# ---- Files, stdin, answers
_SILENCE_S = 1.0  # without input on stdin for so long, a command says what it waits for
PATIENCE_S = 10.0  # and then for so long, it gives up, unless it was asked to read stdin


def read_text(path, what="what to do", patience_s=math.inf):
    """Return the text of a file, or of stdin for `-`, with its line ends unchanged; raises UsageError if it is no text.

    If nothing comes from stdin, a note says that it waits for `what`; after `patience_s` more UsageError is raised."""
    if path == "-":
        _wait_for_stdin(what, patience_s)
        return decoded(sys.stdin.buffer.read(), "stdin", UsageError) if sys.stdin else ""
    return decoded(read_typed(path), path, UsageError)


def _wait_for_stdin(what, patience_s):
    """Return when there is input on stdin, or its end. A note tells after _SILENCE_S without input what is read;
    UsageError is raised after `patience_s` more."""
    import select
    for wait_s, is_last in ((_SILENCE_S, False), (None if patience_s == math.inf else patience_s, True)):
        try:
            if not sys.stdin or select.select([sys.stdin], [], [], wait_s)[0]:
                return
        except (OSError, ValueError):  # it has no descriptor, or one that `select` does not take
            return
        if is_last:
            raise UsageError("nothing came from standard input within %d s (expected: %s); nothing was done"
                             % (patience_s, what))
        note("reading %s from standard input ..." % what)


def answer_to(question, default="", secret=False):
    """Return a person's answer."""
    if secret:
        import getpass
        try:
            return getpass.getpass(question + " ")
        except EOFError:  # Ctrl-D
            raise UsageError("%s no answer" % question) from None
    sys.stderr.write(clean(question) + " ")
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        sys.stderr.write("\n")
    return line.strip() or default


def ask(question, option, **how):
    """Return a person's answer; if stdin is no terminal, raises a UsageError that names the `option` to pass."""
    if not is_terminal(sys.stdin):
        raise UsageError("%s Not interactive: pass %s" % (question.split(" [")[0], option))
    return answer_to(question, **how)


def confirm(question, option, given):
    """Return if `given` is true or a person says yes, else end with exit code 1; raises UsageError as `ask` does."""
    if not given and ask(question + " [y/N]", option).lower() not in ("y", "yes"):
        note("Nothing was changed.")
        raise SystemExit(1)


# ---- Task arguments: `-- --lr=0.1 --model resnet`, --args, --grid, --sample, --from
_ARGUMENT = r"(?s)--?([^=\s-][^=]*)(?:=(.*))?\Z"
RANGE = r"(?i){0}:{0}:{0}\Z".format(r"(-?[\d.]+(?:e-?\d+)?)")
SUBMISSION_FIELDS = [name for name, field in SUBMITTED.items() if field.flag]


def typed_arguments(words):
    """Return {key: text, or True for a flag} of words like `--k=v`, `--k v`, `-k v`, `--flag`; raises UsageError."""
    arguments, words = {}, collections.deque(words)
    while words:
        word = words.popleft()
        match = re.match(_ARGUMENT, word)
        if not match:
            last = list(arguments)[-1:]
            raise UsageError("task arguments look like --name=value, not %r%s" % (word, last and (
                ". A list is written --%s='[1, 2]'; %%(%s...) makes words of it" % (last[0], last[0])) or ""))
        key, text = match.group(1).replace("-", "_"), match.group(2)
        if text is None:
            text = words.popleft() if words and not re.match(r"-[^\d.]", words[0]) else True
        if key in arguments:
            raise UsageError("the task argument --%s is given twice" % key)
        arguments[key] = text
    return arguments


def joined(first, second, where="args"):
    """Return two dicts of arguments as one, with dotted keys nested; raises UsageError for a bad or repeated key."""
    twice = sorted(set(first) & set(second))
    if twice:
        raise UsageError("the task argument %s is given twice" % ", ".join(twice))
    try:
        return unflatten(dict(first, **second), where)
    except InvalidFields as error:
        raise UsageError(error) from None


def grid_values(key, text):
    """Return the values in `0.1,0.2`, `1:5:1` (5 included) or a mixture; raises UsageError for an empty range."""
    if text is True:
        return [True]
    values = []
    for part in _split_commas(text):
        bounds = re.match(RANGE, part)
        values += _range_values(key, bounds) if bounds else [literal(part)]
    return values


def is_like_grid(text):
    """Return whether a value looks like one for --grid: 0.1,0.2 or 1:5:1."""
    parts = _split_commas(text) if isinstance(text, str) else ()
    return bool(parts[1:] and all(re.match(r"[\w.+/-]+\Z", part) for part in parts) or parts and re.match(RANGE, text))


def _range_values(key, match):
    """Return start, start + step ... up to and including stop; calculated in decimals, so that 0.1:0.3:0.1 has 0.3."""
    import decimal
    try:
        start, stop, step = map(decimal.Decimal, match.groups())
        steps = (stop - start) / step
        is_kept = all(math.isfinite(float(bound)) for bound in (start, stop, step))
    except (decimal.DecimalException, OverflowError):
        is_kept, steps = False, -1
    if not (is_kept and 0 <= steps < 1000000):
        raise UsageError("--%s=%s is no range: write start:stop:step, as in 1:5:1 or 0.1:0.5:0.1"
                         % (key, match.group()))
    number = float if re.search("[.e]", match.group(), re.I) else int
    return [number(start + i * step) for i in range(int(steps) + 1)]


def _split_commas(text):
    """Return the parts between the commas that stand outside brackets and quotes."""
    parts, depth = [""], 0
    for piece in re.findall(r"""(?s)'[^']*'|"[^"]*"|.""", text):
        depth += (piece in "([{") - (piece in ")]}")
        if piece == "," and not depth:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


_END = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"
_DRAWN = r"(?i)(log:)?%s:%s\Z" % (_END, _END)
_LIKE_END = r"[-+._\d]*(?:e[-+]?\d*)?|[-+]?nan|[-+]?inf(?:inity)?"
_LIKE_DRAWN = r"(?i)(log:.*|(?:%s)(?::(?:%s))+)\Z" % (_LIKE_END, _LIKE_END)  # somebody may have meant a range
_MOST_DRAWN = 1000000  # tasks of one sample
_DRAWN_DIGITS = 6  # of a number that is drawn: what `brief` and %g show of it, so that it reads back the same


def submit_sample(space: "Mapping[str, Any]", n: "int", seed: "int | None" = None, unique: "bool" = False,
                  **fields: "Unpack[_Submission]") -> "list[str]":
    """Submit n tasks with random args, as in submit_sample({"lr": "log:1e-4:1e-1", "seed": [1, 2]}, 20); return ids.

    A text is "LOW:HIGH" (uniform), "log:LOW:HIGH" (log-uniform), or values with commas between. A range has whole
    numbers, both ends included, where both ends are whole. A list is a choice among its values. The same `seed`, a
    whole number, draws the same on every Python, and a larger n begins so too. `fields` are as in submit_grid."""
    if not isinstance(space, dict):
        raise LabtaskerTypeError("submit_sample takes a dict of texts and lists, such as {'lr': 'log:1e-4:0.1'}, not %s"
                                 % cut(repr(space)))
    for key, given in space.items():
        if isinstance(given, (bytes, dict, set, frozenset)) or not hasattr(given, "__iter__"):
            raise LabtaskerTypeError("submit_sample takes a text such as 'log:1e-4:1e-1', or a list, for each key, not "
                                     "%s=%s; did you mean [%s]?" % (key, cut(repr(given)), cut(repr(given))))
    fixed, rows = fields.pop("args", None) or {}, drawn(space, n, new_seed() if seed is None else seed)
    return submit_tasks([dict(fields, args=dict(fixed, **row)) for row in rows], unique)


def new_seed():
    """Return a random number to draw from, short enough to be typed."""
    return int.from_bytes(os.urandom(4), "big")


def drawn(space, n, seed):
    """Return n dicts of args, drawn from {key: text as for --sample, True, or list}; raises UsageError.

    A value depends on the seed, its key and its task's number, through a hash: so it is the same on every Python, and
    neither further keys nor a larger n change it."""
    import hashlib
    for name, value in (("n", n), ("seed", seed)):
        if not hasattr(value, "__index__") or isinstance(value, bool):
            raise LabtaskerTypeError("%s is a whole number, not %s" % (name, cut(repr(value))))
    if not 1 <= n <= _MOST_DRAWN:
        raise UsageError("a sample has 1 to %d tasks, not %d" % (_MOST_DRAWN, n))
    if not space:
        raise UsageError("a sample needs something to draw: -- --lr=log:1e-4:1e-1 --layers=2:8 --model=a,b")
    draws = {key: _drawing(key, given) for key, given in space.items()}

    def chance(*what):
        digest = hashlib.sha256(" ".join(map(str, what)).encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big")
    seed = operator.index(seed)
    return [{key: draw(chance(seed, number, key)) for key, draw in draws.items()} for number in range(n)]


def _drawing(key, given):
    """Return the function that makes a value of 64 random bits, for what a key of a sample is given; UsageError."""
    if isinstance(given, str):
        parts = [re.sub(r"\s", "", part) for part in _split_commas(given)]
        found = re.match(_DRAWN, parts[0]) if len(parts) == 1 else None
        if found:
            return _range_drawing("%s=%s" % (key, given), *found.groups())
        wrong = [part for part in parts if re.match(_LIKE_DRAWN, part) and not re.match(RANGE, part)]
        if wrong or not given.strip():
            raise UsageError("%s=%s is nothing to draw from%s: write LOW:HIGH, log:LOW:HIGH, or values with commas "
                             "between; a text with a colon stands in quotes of its own, \"'16:9'\"" % (
                                 key, given, ", as a range stands alone" if parts[1:] else ""))
    values = grid_values(key, given) if isinstance(given, str) or given is True else list(given)
    if not values:
        raise UsageError("%s=[] is nothing to draw from: give it at least one value" % key)
    return lambda bits: values[bits * len(values) >> 64]


def _range_drawing(shown, log, *ends):
    """Return what `_drawing` does, for a range: of whole numbers where both ends are, else of floats."""
    is_whole = all(re.match(r"[-+]?\d+\Z", end) for end in ends)
    low, high = map(int if is_whole else float, ends)
    problem = ("its ends are too large" if not is_whole and math.inf in (abs(low), abs(high)) else
               "its ends are the wrong way round; to have the text itself, put it in quotes of its own, \"'16:9'\""
               if low > high else
               "a logarithm needs ends above 0" if log and low <= 0 else
               "its ends do not fit into 64 bits" if is_whole and not -2 ** 63 <= low <= high < 2 ** 63 else None)
    if problem:
        raise UsageError("%s can't be drawn from: %s" % (shown, problem))
    if is_whole and not log:
        return lambda bits: low + (bits * (high + 1 - low) >> 64)
    if log:
        begin, way = math.log(low), math.log(high + is_whole) - math.log(low)

    def draw(bits):
        share = (bits >> 11) / 2 ** 53
        value = math.exp(begin + share * way) if log else low * (1 - share) + high * share
        value = int(value) if is_whole else _rounded(value, value * way if log else high - low)
        return min(max(value, low), high)
    return draw


def _rounded(value, width):
    """Return a float with few digits; more of them where they are needed to tell values of a range so wide apart."""
    digits = _DRAWN_DIGITS
    if abs(value) > width > 0:
        digits += math.ceil(math.log10(min(abs(value) / width, 1e11)))
    return float("%.*g" % (digits, value))


def tasks_of_json(path, text):
    """Return the submissions in JSON lines; raises a UsageError that names the line.

    A line holds the arguments, or, if it has a dict `args`, a whole task as `task ls` and --dry-run print it."""
    lines = enumerate(re.split("\r\n?|\n", text), 1)
    return [_submission_in(dict_of(line, where), where) for where, line in (
        ("%s line %d" % (path, number), line) for number, line in lines) if line.strip()]


def tasks_of_list(path, text):
    """Return the submissions in a JSON list of such dicts; raises a UsageError that names the line or the item."""
    rows = typed_value(text, path, strict=True)
    if not isinstance(rows, list):
        raise UsageError("%s takes a list of dicts, or JSON lines, not %s" % (path, brief(rows)))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError("%s: item %d of the list is %s, not a dict" % (path, number, brief(row)))
    return [_submission_in(row, "%s: item %d" % (path, number)) for number, row in enumerate(rows, 1)]


def _submission_in(row, where):
    """Return the submission that a dict holds: the arguments, or a task with a dict `args`; raises a UsageError that
    names `where`."""
    if not isinstance(row.get("args"), dict):
        return {"args": row}
    for key in row:
        if key not in TASK_FIELDS:
            raise UsageError("%s: a task has no field %s%s" % (where, key, hint(key, SUBMISSION_FIELDS)))
    return {key: row[key] for key in SUBMISSION_FIELDS if key in row}


def _csv_rows(path, text):
    """Yield (number of its first line, cells) for each row of CSV; raises a UsageError that names the line."""
    import csv
    import io
    csv.field_size_limit(sys.maxsize)  # the store has its own limits
    rows, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    while True:
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError("%s line %d, in the row that begins in line %d: %s; a quote in a cell is written twice, "
                             "and one at its start needs one at its end" % (path, rows.line_num, line, error)) from None
        line = rows.line_num + 1


def tasks_of_csv(path, text):
    """Return the submissions in CSV; raises a UsageError that names the line.

    A column is an argument, or, in what `task ls --fmt csv` prints, a field. Empty cells are left out."""
    rows, submissions = _csv_rows(path, text), []
    header = next(rows, (1, []))[1]
    if len(set(header)) < len(header):
        raise UsageError("%s: the header has a name twice: %s" % (path, ", ".join(header)))
    is_listing = any(key.startswith("args.") for key in header) and all(
        key.split(".")[0] in TASK_FIELDS for key in header)
    for line, row in rows:
        if len(row) > len(header):
            raise UsageError("%s line %d has %d cells, the header %d" % (path, line, len(row), len(header)))
        cells = {key: cell for key, cell in zip(header, row) if cell}
        if cells:
            submissions.append(_listed_submission(cells) if is_listing else {
                "args": {key: literal(cell) for key, cell in cells.items()}})
    return submissions


def _listed_submission(cells):
    """Return the submission of a row of `task ls --fmt csv`."""
    task = {"args": {}}
    for key, cell in cells.items():
        top, _, rest = key.partition(".")
        kind = TASK_FIELDS[top].kind if top in SUBMISSION_FIELDS else None
        read = functools.partial(typed_value, what=key) if cell[0] in "[{" else literal
        if kind == "dict" and rest:
            task.setdefault(top, {})[rest] = read(cell)
        elif kind and not rest:
            task[top] = cell if kind == "name" else read(cell)
    return task


# ---- Errors: their kinds and exit codes

# What a command returns that ends with an error and has printed what a person needs: a key of ERROR_KINDS, and text and
# hint for the error in JSON.
Ended = row_type("Ended", "kind text hint", (None,))


def kind_of(error):
    """Return the kind, a key of ERROR_KINDS, of an error that ended a command."""
    status = getattr(error, "status_code", None) or getattr(error, "status", None)
    if isinstance(error, (UsageError, SyntaxMistake, UnicodeDecodeError)) or status == 422:
        return "usage"
    if isinstance(error, StoreDamaged) or re.search(_DAMAGED, str(error)):  # a server sends only the message
        return "damaged"
    if isinstance(error, LabtaskerConnectError) or status in (401, 502, 503, 504):
        return "unauthorized" if status == 401 else "unreachable"
    if status == 404 or isinstance(error, FileNotFoundError):
        return "not_found"
    return "refused" if isinstance(error, (LabtaskerError, OSError)) else "bug"


_DAMAGED = "is damaged, and was|is not the header of a Labtasker journal|this one, version .*, does not know"
ERROR_KINDS = {  # `kind` of an error as JSON: the exit code
    "refused": 1, "not_found": 1, "damaged": 1, "bug": 1, "usage": 2, "unreachable": 3, "unauthorized": 3,
    "tasks_failed": TASKS_FAILED, "timeout": 124,
}
EXIT_CODES = {
    0: "done",
    1: "refused, not found, damaged",
    2: "usage: the command line, a filter or a value is wrong",
    3: "the server or the store can't be reached, or the login is refused",
    TASKS_FAILED: "tasks failed: task wait, loop --fail; failures in a row stopped a loop",
    124: "the time of task wait --timeout is up",
    130: "Ctrl-C",
}


# ---- References, printed from the tables


def filter_reference():
    """Return the reference of the filter language, made from the tables of section 2, and of a task's fields."""
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
        "", "A query document does the same: -f '{\"args.lr\": {\"$gt\": 0.1}}'. Its operators:",
        " ".join(tuple(OPERATORS) + tuple(LOGIC) + ("$expr",)), "", render_table(fields)])


def settings_reference():
    """Return the reference of the settings: their names in config.toml, and the variables that override them."""
    rows = [[name, variable or "", meaning] for name, (_, variable, _, meaning) in SETTINGS.items()]
    rows += [[METRICS + ".NAME", "", "`--metric NAME=PATTERN` for every loop here; metrics.step: `--step`"]]
    rows += [["", variable, meaning] for variable, meaning in VARIABLES.items()]
    return "\n".join([
        "The configuration is %s in the nearest folder .labtasker, from here upward," % CONFIG_NAME,
        "or in the folder that LABTASKER_ROOT names. Variables override it.", "",
        render_table([["setting", "variable", "meaning"]] + rows)])


def job_reference():
    """Return the reference of the variables that a loop gives to its jobs, and of what it reads in their output."""
    return "A job has these variables (help template: the placeholders in its command):\n\n%s\n\n%s" % (render_table(
        [[name, meaning] for name, meaning in JOB_VARIABLES.items()]), """\
--metric and --step need not be typed again: each loop and `task harvest` here also look for what
the file config.toml in the folder .labtasker has in a table [%s]:

    [%s]
    acc = "accuracy: ([0-9.]+)"
    step = "epoch ([0-9]+)\"""" % (METRICS, METRICS))


def template_reference():
    """Return the reference of a command's placeholders and a job's variables."""
    rows = [[form, meaning] for form, meaning in FORMS.items()]
    facts = [["%%(%s)" % name, meaning] for name, meaning in BUILT_IN.items()]
    return "\n".join([
        "A command takes the tasks whose arguments are exactly its keys. With a star they may have more.", "",
        "In -- WORDS, in -c TEXT, in a script:", "", render_table(rows), "",
        "A dash in a key stands for an underscore, as in a submission. %%( stands for %( itself.",
        "All forms but the first must be whole words outside of quotes. They do not work in Python text.", "",
        "Facts of the run:", "", render_table(facts), "", job_reference()])


def after_reference():
    """Return what tasks that wait for others do."""
    return as_started("""\
A task may wait for others before its first run:

    teacher=$(labtasker task submit -q -- --model=teacher)
    labtasker task submit --after $teacher --grid -- --student=1:8:1
    labtasker task submit --after-any ID,ID -- --what=report

--after      It is given to no loop until all of these have succeeded.
--after-any  ... until all of these have ended, however.

In Python: submit_task(args, after=[...], after_any=[...]). A list of tasks in
one request may name earlier ones of the list by the task_id that it gives them.

A task of --after fails for good, is cancelled, or is deleted
    What waits for it is cancelled, and so is what waits for that, all in one
    transaction. The reason of each says which task it was.
It had failed or was cancelled before
    The new task is cancelled at once. One that is not there is refused.
It has succeeded and is deleted
    What waits for it does not name it any more.
A task of --after-any is deleted
    That is an end like any other.
A task is reset (task retry)
    What waits for it and was not begun waits again; what was begun goes on, and
    what is over stays so. A cancelled task that is reset waits, or is cancelled
    again where a task of --after has still failed. Only its first run waits: one
    that has begun before, and is pending again, waits for nothing.
`after` and `after_any` of a pending task are updated
    labtasker task update ID... -u after=ID,ID  (None: it waits for nothing.)
    What would wait for itself is refused, and so is an id that is not there.
A compaction keeps all of this. A repair that lost a task
    What waits for its success waits until `after` is changed, or it is
    cancelled; `task why` names the lost one. --after-any takes it for deleted.

labtasker task why ID says what a task waits for. A server of Labtasker 1.0.1
knows nothing of it: nothing is sent to it then.""")


def journal_reference():
    """Return the reference of the journal's format: its lines, and the changes on them."""
    rows = [["change", "followed by", "meaning"]] + [[name, row.fields, row.meaning] for name, row in RECORDS.items()]
    return "\n".join([
        "A journal is a file of JSON lines. The first names the format; every other line is a transaction:", "",
        '    {"n":18,"durable":17,"at":1763800000.1,"queue":"ID",'
        '"changes":[["task","ID",{"status":"running"},"pending"]],"crc":"89abcdef"}', "",
        "n        the line's number, without gaps",
        "durable  the last n that was known to be on disk when this line was written",
        "at       the time, in seconds since 1970, UTC",
        "crc      zlib.crc32 of the line's bytes before this key",
        "changes  new values, not commands; fields that are not named stay as they were:", "", render_table(rows), "",
        "Other keys of a line:", "",
        "lost: K     this line stands for K lines that a repair could not save",
        "epoch: E    the store has a new owner from here on",
        "end: true   the store was closed cleanly here",
        "version: V  a newer version, V, writes from here on",
        "needs: F    a reader whose format is older than F must refuse the journal", "",
        "After a compaction the first line has folded: N, tail: BYTE and folded_crc. The lines up to that byte are",
        "numbered by fold: K and hold the state that lines 1 to N had produced. folded_crc is the checksum of line N.",
        "Readers keep fields and keys that they do not know, and refuse changes that they do not know."])


def exit_reference():
    """Return the exit codes and what they mean."""
    return "Exit codes\n\n" + "\n".join("%5d  %s" % row for row in EXIT_CODES.items()) + as_started(
        "\n\nA loop that a signal stops ends with 128 and the signal's number: 143 for\nSIGTERM. In a script:\n\n"
        "    labtasker task wait --name grid\n    case $? in 0) echo all right;; 4) echo some failed;; esac\n\n"
        "With --json or --fmt jsonl an error is one line of JSON on stderr, also where\n"
        "there is a result on stdout:\n\n"
        '    {"error": TEXT, "kind": KIND, "exit": CODE, "hint": TEXT or null}\n\nThe kinds, with their exit codes:\n\n'
        ) + "\n".join("    %-12s  %d" % row for row in ERROR_KINDS.items())


def events_reference():
    """Return the reference of events: how the command line, Python and any HTTP client receive them."""
    return as_started("""\
Each new state of a task (created -> pending -> running -> success, ...) or of
a worker is an event. A changed summary alone is none.

Shell

    labtasker event listen --compact
    labtasker event listen --raw --after 17.0

Python

    import labtasker
    with labtasker.connect_events() as listener:
        for response in listener.iter_events():
            event = response.event
            print(response.id, event.entity_id, event.new_state)
            if event.new_state == "failed":
                print(event.entity_data["args"], event.entity_data["summary"])

    listener.get_event(timeout=5) returns the next event, or None after 5 s.
    A listener reconnects by itself and misses no event.

HTTP: a stream of server-sent events

    curl -N -u QUEUE:PASSWORD -H 'Last-Event-ID: 17.0' \\
        http://HOST:%d/api/v1/queues/me/events

    ?last_event_id=17.0 in the URL means the same as the header.

Past events

    Each event has an id: response.id in Python, "id" with --raw, the line "id:"
    over HTTP. It is LINE.STEP: a line of the journal, and a step on that line.
    connect_events(after="17.0"), --after 17.0 and Last-Event-ID begin after the
    event with that id; 0.0 begins with the oldest that the store still has. The
    store has the events since the last compaction of its journal. If some are
    gone, stderr says so (over HTTP the event "too_old"), and the others follow.
    This also works without a server. A server of Labtasker 1.0.1 has no ids and
    sends new events only.""" % DEFAULT_PORT)

# 17. Commands ################################################################
#
# What each command does. A command takes the parsed options and returns its exit code (None: 0). It calls the functions
# that scripts call too, and knows nothing of the journal or of HTTP. Commands that are a convenience are in
# labtasker_cli.py. Uses 1 to 16. Tests: test_cli.py, test_terminal.py.
EVERYDAY = ("task", "loop", "watch", "init", "serve")  # the list of commands shows every command of these
SELDOM = ("task count", "task harvest", "task history")  # except these, which share a line
EVERY = 10 ** 9  # the limit of a listing that leaves nothing out
EXTRA_COMMANDS = {  # the commands of labtasker_cli.py, and what they are for
    "watch": "Show counts, rate, running tasks and last failures, live. Keys open, cancel, retry.",
    "config": "Edit the configuration in $EDITOR; saved only if it is valid. Needs a terminal, but not with --show.",
    "sbatch": "Submit a Slurm job of loops, or an array of jobs; print its id. Options that neither this command "
              "nor labtasker loop has are passed to sbatch, such as -p, -t, -c, --mem, --gpus-per-task.",
    "server wait": "Wait until the configured store's server answers; print its URL. Exit 1 if none does.",
    "completion": "Print the script that completes commands, options, statuses, fields and ids in a shell. For bash, "
                  "put eval \"$(labtasker completion bash)\" into ~/.bashrc; for zsh the same into ~/.zshrc, after "
                  "compinit; for fish, write it to ~/.config/fish/completions/labtasker.fish.",
    "skill install": "Write the skill for coding agents into a folder of skills. Other texts there stay unless told.",
    "help skill": "Print the skill for coding agents, or a page that it refers to.",
    "help api": "Print the routes of the REST API.",
}


def extras():
    """Return the module labtasker_cli that lies beside this file, or None; loading it adds its rows to COMMANDS."""
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), "labtasker_cli.py")
    if "labtasker_cli" not in sys.modules and os.path.isfile(path):
        import importlib.util
        spec = importlib.util.spec_from_file_location("labtasker_cli", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:  # work goes on without it
            module = None
            tell("labtasker: %s is of another version than labtasker %s (%s): copy both files again" % (
                path, __version__, error))
        sys.modules["labtasker_cli"] = module  # only now that it is complete: other threads look here
    return sys.modules.get("labtasker_cli")


def extras_for(what):
    """Return labtasker_cli; if it is missing, raises a LabtaskerRuntimeError that says that `what` needs it."""
    if not extras():
        raise LabtaskerRuntimeError("%s needs labtasker_cli.py beside labtasker.py, in %s"
                                    % (what, os.path.dirname(os.path.realpath(__file__))))
    return extras()


def _explained(error):
    """Return the message of an error, and what to do about it, or None if the message itself says so."""
    if isinstance(error, LabtaskerHTTPStatusError) and error.status_code == 401:
        config = load_config()
        return str(error), "No queue named %s, or wrong password. Both come from %s or from LABTASKER_QUEUE and " \
                           "LABTASKER_PASSWORD. To create the queue: labtasker queue create-from-config" % (
                               config.queue_name, config.source or "no file")
    if isinstance(error, FilterError) and "in quotes" in error.message:
        return str(error), "In a shell the whole filter stands in single quotes: -f 'args.model == \"resnet\"'"
    if isinstance(error, LabtaskerError):
        return re.sub("(task [0-9a-f-]{36}: )?InvalidStateTransition: ", "", str(error)), None
    if isinstance(error, UnicodeDecodeError):
        return "what was typed is not UTF-8: %s" % error, None
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part), None
    where = "This is a bug in labtasker %s. LABTASKER_DEBUG=1 shows where it happened." % __version__
    return "%s: %s" % (type(error).__name__, error), where


_HINTS = Pattern(r"did you mean [^?\n]*\?|(?<=\()labtasker [^()]*(?=\))|is the server running\?.*|(?<=: )pass -.*")


def tell_error(error, is_json):
    """Write an error, or an Ended, to stderr; return the exit code. Only here errors become text or JSON."""
    if isinstance(error, Ended):
        kind, text, way_out = error
    else:
        kind, (text, way_out) = kind_of(error), _explained(error)
    if is_json:
        found = None if way_out else _HINTS.search(text)
        tell_json({"error": text, "kind": kind, "exit": ERROR_KINDS[kind],
                   "hint": way_out or (found.group() if found else None)})
    elif not isinstance(error, Ended):
        note("labtasker: error: " + "\n".join(filter(None, (text, way_out))))
    return ERROR_KINDS[kind]


def show_result(options, document, text=None):
    """Print the result of a command: a dict in the format that was asked for, or else a text, if there is one."""
    if options.fmt != "table":
        say(record_text(document, options.fmt))
    elif text:
        say(text)


# ---- Which tasks: ids, selectors, ids on stdin


def filter_of(options):
    """Return the filter that -f gives, as `typed_filter` does."""
    return typed_filter(options.extra_filter)


def typed_filter(text):
    """Return a filter that was typed: its text, the query document that it is as JSON or a Python literal, or None."""
    return dict_of(text, "--extra-filter") if text and text.lstrip().startswith("{") else text


def selectors(options):
    """Return the arguments of `ls_tasks` that --id, --name, --status and --extra-filter make: those that were given."""
    return _with_status(without_none(task_id=_full_id(options.task_id), task_name=options.task_name,
                              extra_filter=filter_of(options)), options.status)


def _with_status(query, text, kind=Task):
    """Return a query that also asks for one of the statuses in `text`, a list with commas."""
    words = text.split(",") if text else []
    if len(words) < 2:
        return dict(query, **without_none(status=text))
    return dict(query, extra_filter=both(query.get("extra_filter"), {"status": {"$in": words}}, kind))


def both(given, document, kind=Task):
    """Return the filter that matches what both a query document and a filter (None: any) match."""
    return {"$and": [query_of(given, kind), document]} if given else document


def ids_of(items):
    """Return the ids of tasks or workers."""
    return [getattr(item, item.ID) for item in items]


def _id_that_starts(word, find):
    """Return the one id of what `find` lists that starts with `word`; raises NotFound, or UsageError for several."""
    is_hex, what = re.match("[0-9a-f][0-9a-f-]*\\Z", word), "task" if find is ls_tasks else "worker"
    matching = find(extra_filter={"_id": {"$regex": "^" + word}}, limit=2).content if is_hex else []
    if len(matching) > 1:
        raise UsageError("more than one %s id starts with %s: type more of it" % (what, word))
    if not matching:
        raise NotFound("there is no %s %s (labtasker %s ls lists them)" % (what, brief(word), what))
    return ids_of(matching)[0]


def _full_id(word, find=ls_tasks):
    """Return the id that starts with `word`, of the tasks or of what `find` lists; raises as `_id_that_starts`."""
    return word if word is None or len(word) == 36 else _id_that_starts(word, find)


def _read_ids(patience_s=math.inf):
    """Return the ids on stdin; raises UsageError if stdin is a terminal, has something else than ids, or has nothing
    within `patience_s`."""
    if sys.stdin is None or is_terminal(sys.stdin):
        raise UsageError("which tasks? Give ids (also on stdin), or select them with --id, --name, -s or -f")
    words = list(dict.fromkeys(read_text("-", "task ids", patience_s).split()))
    if not words:
        note("No task ids came from standard input.")
    for word in words:
        if not re.match("[0-9a-f-]{1,36}\\Z", word):
            raise UsageError("stdin has %s, which is no task's id (task ls -q prints ids only)" % brief(word))
    return words


def _tasks_named(words):
    """Return the tasks with these ids in that order; raises a NotFound that names a missing one."""
    ids = [_full_id(word) for word in words]
    tasks = {t.task_id: t for t in ls_tasks(extra_filter={"_id": {"$in": ids}}, limit=EVERY).content} if ids else {}
    missing = [task_id for task_id in ids if task_id not in tasks]
    if missing:
        raise NotFound("there is no task %s%s; nothing was done (labtasker task ls lists them)" % (
            missing[0], " (and %d more are missing)" % (len(missing) - 1) if missing[1:] else ""))
    return [tasks[task_id] for task_id in dict.fromkeys(ids)]


def _nothing_matches(query, not_done=""):
    """Write a note that nothing matches, and why if that is known. `not_done`: what therefore was not done."""
    note("Nothing matches%s." % (not_done and ": " + not_done))
    for text in unmatched(query) if query.get("extra_filter") else ():
        note("Filter: " + text)
    name, names = query.get("task_name"), counted({}, "task_name").counts if query.get("task_name") else {}
    if name and name not in names:
        note("No task is named %s%s" % (brief(name), hint(name, names) or "."))


def _chosen_tasks(options, ids=(), limit=EVERY):
    """Return the tasks that ids, selectors or ids on stdin name. Stdin is read only if neither of the others is given,
    and no longer than PATIENCE_S without input, or for the id `-`, as long as it takes."""
    if options.task_id == "-":
        options.task_id, ids = None, list(ids) + ["-"]
    query = selectors(options)
    if ids and query:
        raise UsageError("give ids or selectors, not both")
    if query and set(query) != {"task_id"}:
        return ls_tasks(limit=limit, **query).content
    if list(ids) == ["-"]:
        return _tasks_named(_read_ids())
    return _tasks_named(list(query.values()) or ids or _read_ids(PATIENCE_S))


# ---- Listings: columns, formats, pages


def show(text, no_pager=False):
    """Write a result to stdout, on a terminal through the pager if there is one and the result is long."""
    pager = extras() if is_terminal(sys.stdout) and not no_pager else None
    if not pager or not pager.page(text):
        say(text)


def error_of(task):
    """Return what went wrong in the last run of a task, in one line, or nothing."""
    is_told = task.summary.get("labtasker_exception") or task.summary.get("labtasker_error")
    is_named = getattr(task, "failure", None) in NAMED_FAILURES and task.reason
    return is_told and (is_named or failure_text(task.summary)) or ""


def _told_error(task):
    """Return the error of a Task as `error_of` does; if it is only the exit code of a command that has failed, with the
    last line of its output, if that is on this host."""
    error = error_of(task)
    if not error.startswith("exit code") or getattr(task, "status", None) != "failed" or not extras():
        return error
    words = extras().last_words(task)
    return error if words in ("", error) else "%s: %s" % (error, words)


def outcome(task):
    """Return a task's summary as short text, with the error first."""
    rest = {key: value for key, value in task.summary.items() if key not in ERRORS}
    return " ".join(filter(None, (_told_error(task), pairs(rest))))


TASK_COLUMNS = {
    "status": lambda task: task.status,
    "name": lambda task: task.task_name or "",
    "age": lambda task: age(task.created_at),
    "duration": spent,
    "worker": lambda task: (task.worker_id or "")[:8],
    "retries": lambda task: "%d/%d" % (task.retries, task.max_retries) if task.retries else "",
    "args": lambda task: pairs(task.args) or brief(task.cmd or ""),
    "summary": lambda task: outcome(task),
}
_TASK_COLUMNS_MORE = {
    "priority": lambda task: str(task.priority),
    "worker": lambda task: task.worker_id or "",
    "metadata": lambda task: pairs(task.metadata),
}
_WORKER_COLUMNS = {
    "status": lambda worker: "ended" if vars(worker).get("ended_at") else worker.status,
    "name": lambda worker: worker.worker_name or "",
    "age": lambda worker: age(worker.created_at),
    "retries": lambda worker: "%d/%d" % (worker.retries, worker.max_retries),
    "metadata": lambda worker: pairs(worker.metadata),
}
SHORT = {"id": "task_id", "name": "task_name", "worker": "worker_id"}  # what a table calls these fields
_TITLES = {field: name for name, field in SHORT.items() if name != "id"}
_TITLES["created_at"] = "age"
_HEADS = {"id"}.union(_TITLES.values(), set(GROUPS) - set(_TITLES))  # heads that no argument's column may have
_CELLS = {  # field of a row: the function that returns its text; for other fields it is `brief`
    "status": str, "task_name": str, "error": str, "retries": str, "created_at": lambda value: age(value),
    "duration": spent, "worker_id": lambda value: value[:8]}


def _sorting(word):
    """Return [field, 1 or -1] of `FIELD:asc|desc`; raises UsageError for an unknown field."""
    field, _, direction = word.partition(":")
    _check_field(field, "--sort")
    if direction not in ("", "asc", "desc"):
        raise UsageError("--sort %s: a direction is asc or desc, not %r" % (word, direction))
    return [field, -1 if direction == "desc" else 1]


def _check_field(field, option, more=()):
    """Raise UsageError unless the first part of a dotted `field` is one that a task has, or one of `more`."""
    top, known = field.split(".")[0], list(visible(TASK_FIELDS)) + list(more)
    if top not in known:
        raise UsageError("%s: there is no field %s%s The fields are %s" % (
            option, brief(field), _meant_field(field, known) or ".", ", ".join(known)))


def _meant_field(name, known):
    """Return a hint as `field_hint` does; if a task has a key of this name, only the fields where tasks have it."""
    homes = [home + "." + name for home in ("args", "summary", "metadata") if FREE_KEY.match(name)]
    try:
        homes = [field for field in homes if ls_tasks(extra_filter={field: {"$exists": True}}, limit=1).content]
    except LabtaskerError:  # the mistake is reported without a hint from the tasks
        homes = []
    return "; did you mean %s?" % " or ".join(homes) if homes else field_hint(name, known)


def _column_names(options):
    """Return the names in --columns, or []; raises UsageError for one that is no field of a task."""
    words = [word.strip() for word in (options.columns or "").split(",") if word.strip()]
    for word in words:
        if word not in SHORT and word not in TASK_COLUMNS:
            _check_field(word, "--columns", list(SHORT) + list(_COMPUTED))
    return words


def _note_absent(fields):
    """Write a note for each dotted field that no task has, with the one that may have been meant."""
    for field in fields:
        if field.startswith(("args.", "summary.", "metadata.")) and not ls_tasks(
                extra_filter={field: {"$exists": True}}, limit=1).content:
            for text in unmatched({"extra_filter": {field: 0}}):
                note("Note: " + text)


def _chosen_columns(words):
    """Return {word: function of a task} of the columns that --columns names."""
    cells = {word: TASK_COLUMNS.get(word) or (lambda task, word=word: _brief_cell(_field_of(task, word)))
             for word in words if word != "id"}
    return {word: lambda task, cell=cell: cell(task) or "-" for word, cell in cells.items()}  # no column is left out


def _brief_cell(value):
    """Return a value as text for a table; None is a dash."""
    return "-" if value is None else pairs(value) if isinstance(value, dict) else brief(value)


_COMPUTED = {  # columns that are no fields of a task: the function that makes a JSON value of a Task
    "age": lambda task: round(now() - task.created_at.timestamp(), 3),
    "duration": spent_s,
    "workdir": lambda task: folders_of(task)["workdir"],
    "task_dir": lambda task: folders_of(task)["task_dir"],
}


def _field_of(task, word):
    """Return the JSON value of a task's field. The field may be dotted, or a name that the table has for it."""
    return _COMPUTED[word](task) if word in _COMPUTED else get_path(task.to_dict(), SHORT.get(word, word).split("."))


def _painter(options):
    """Return labtasker_cli's function that colours a cell; None without labtasker_cli or if no colour is wanted."""
    return extras().painted if extras() and extras().wants_colour(options) else None


def row_of(task, most=None):
    """Return {field: value} of a Task, or of a task's record, as `choose_columns` takes it; at most `most` arguments
    and results."""
    row = {"status": task.status, "created_at": task.created_at}
    more = (("task_name", task.task_name), ("worker_id", task.worker_id), ("cmd", None if task.args else task.cmd),
            ("retries", "%d/%d" % (task.retries, task.max_retries) if task.retries else None),
            ("duration", None if task.start_time is None or task.status == "pending" else task),  # _CELLS has its text
            ("error", task.summary and error_of(task) or None))
    row.update(item for item in more if item[1] is not None)
    row.update(("args." + key, value) for key, value in itertools.islice(flatten(task.args), most))
    row.update(("summary." + key, value) for key, value in itertools.islice(flatten(task.summary), most)
               if not key.startswith(ERRORS))
    return row


def _heads_of(chosen):
    """Return {field: the head of its column}. That of args.lr is lr, unless another field has that name."""
    names = {field: _TITLES.get(field, field) for field in chosen.columns + list(chosen.same)}
    return shortened(names, r"\A(args|summary)\.", _HEADS)


def lay_out(rows, chosen, room, kept=()):
    """Return {field: [head, cell, ...]} of the Chosen columns that fit in `room`, each cut to its width.

    Numbers get fewer digits before a column is left out; those of `kept` keep all digits."""
    heads, wants, columns = _heads_of(chosen), {}, {}
    tails = shortened(heads, r".*\.", _HEADS)
    for field in chosen.columns:
        least, most = columns[field] = [_column(rows, field, digits) for digits in (6 if field in kept else 4, 6)]
        wants[field] = [max(map(cells_wide, [tails[field]] + texts)) for texts in (least, most)]
        wants[field][0] = min(WIDEST_ERROR if field == "error" else WIDEST, wants[field][0])
    fits = fit_columns(chosen.telling, wants, room, kept)
    if sum(2 + max(fits[field], cells_wide(heads[field])) for field in fits) <= room + 2:
        tails = heads
    return {field: [fitted(tails[field], max(fits[field], cells_wide(heads[field]) * (tails is heads))).rstrip()]
            + cut_apart(most if fits[field] >= max(map(cells_wide, most)) else least, fits[field])
            for field, (least, most) in columns.items() if field in fits}


def _column(rows, field, digits):
    """Return the texts of a column; a row without a value has an empty one."""
    values = [row[field] for row in rows if field in row]
    texts = iter([_CELLS[field](value) for value in values] if field in _CELLS
                 else texts_of(values, digits, field.startswith("args.")))
    return [clean(next(texts), "") if field in row else "" for row in rows]


def alike_lines(chosen, shown, room):
    """Return lines that list the values that are the same in all rows, and the fields for which there is no room."""
    heads = _heads_of(chosen)
    words = [clean("%s=%s" % (heads[field], _CELLS.get(field, brief)(value)), "")
             for field, value in chosen.same.items()]
    lines = wrapped(["same in all:"] + words, room) if words else []
    missing = [heads[field] for field in chosen.telling
               if field not in shown and (field not in _CELLS or field == "task_name")]
    more = ["and %d more" % (len(missing) - 5)] if missing[6:] else missing[5:]
    return lines + (wrapped(["no room for:"] + missing[:5] + more + ["(--columns chooses)"], room) if missing else [])


def telling_table(tasks, ids, options, room):
    """Return Tasks as a table of the columns in which they differ, below the lines of `alike_lines`."""
    kept = [_sorting(word)[0] for word in getattr(options, "sort", None) or () if not word.startswith("task_id")]
    rows = [row_of(task) for task in tasks]
    for row, task in zip(rows, tasks):
        row.update({"error": _told_error(task)} if "error" in row else {})
    for field in kept:
        for row, task in zip(rows, tasks):
            value = _field_of(task, field)
            if value is not None and not isinstance(value, dict):
                row.setdefault(field, value)
    chosen = choose_columns(rows, kept)
    columns = lay_out(rows, chosen, room - cells_wide(ids[0]) - 2, kept)
    above, paint = alike_lines(chosen, columns, room), _painter(options)
    if paint and "status" in chosen.same:  # it is the first word
        status = chosen.same["status"]
        above[0] = above[0].replace("=" + status, "=" + paint(status, status), 1)
    return "\n".join(above + [render_table(list(zip(["id"] + ids, *columns.values())), room, paint)])


def _width(columns):
    """Return how many cells columns of texts take, each at most WIDEST; empty columns are left out."""
    return sum(2 + min(WIDEST, max(map(len, column))) for column in columns if any(column)) - 2


def _argument_layouts(tasks):
    """Return the TASK_COLUMNS in two variants: with a column for each argument in which tasks differ, or with one
    column for all of these, the shortest first.

    If tasks differ in no argument there is one variant: all arguments stand in one column."""
    rows = [{key: brief(value) for key, value in flatten(task.args)} for task in tasks]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row)
            if len({row.get(key) for row in rows}) > 1]
    if not keys or not all(rows):
        return [TASK_COLUMNS]
    wide, cells = {}, {id(task): row for task, row in zip(tasks, rows)}
    for name, cell in TASK_COLUMNS.items():
        wide.update({"args." + key: lambda task, key=key: cells[id(task)].get(key, "") for key in keys}
                    if name == "args" else {name: cell})
    short = sorted(keys, key=lambda key: max(len(row.get(key, "")) for row in rows))
    return [wide, dict(TASK_COLUMNS, args=lambda task: " ".join(
        "%s=%s" % (key, cells[id(task)][key]) for key in short if key in cells[id(task)]))]


def _item_table(items, options):
    """Return tasks or workers as a table that fits the terminal; --verbose cuts nothing."""
    is_task, size, ids = isinstance(items[0], Task), 36, ids_of(items)
    room = 10 ** 9 if options.verbose else screen_size()[0] if is_terminal(sys.stdout) else 1000
    columns = _WORKER_COLUMNS
    if is_task:
        size = 36 if options.verbose else 8
        columns = _chosen_columns(_column_names(options)) if options.columns else dict(
            TASK_COLUMNS, **_TASK_COLUMNS_MORE) if options.verbose else TASK_COLUMNS
    while len({text[:size] for text in ids}) < len(ids):
        size += 1
    heads = [text[:size] for text in ids]
    if columns is TASK_COLUMNS and is_terminal(sys.stdout):
        return telling_table(items, heads, options, room)
    if columns is TASK_COLUMNS:
        for columns in _argument_layouts(items):
            if _width([heads] + [list(map(cell, items)) for cell in columns.values()]) <= room:
                break
    rows = [["id"] + list(columns)]
    rows += [[head] + [cell(item) for cell in columns.values()] for head, item in zip(heads, items)]
    return render_table(rows, room, _painter(options))


def _listing_text(items, options):
    """Return tasks or workers as a table or in another format, with the columns that were chosen; raises UsageError
    if a column is no field."""
    columns = _column_names(options)
    if options.quiet and options.fmt in ("json", "jsonl"):
        return WRITERS[options.fmt]([{item.ID: getattr(item, item.ID)} for item in items], ())
    if options.quiet:
        return "\n".join(ids_of(items))
    if options.fmt == "table":
        return _item_table(items, options) if items else ""
    rows = [{word: _field_of(item, word) for word in columns} if columns else item.to_dict() for item in items]
    return WRITERS[options.fmt](rows, columns)


MOST_LISTED = 100  # tasks or workers that a listing shows without --limit


def _show_listing(items, options, note_none=lambda: note("Nothing matches.")):
    """Print the first --limit of tasks or workers; notes, also that of `note_none`, go to stderr."""
    text = _listing_text(items[:options.limit], options)
    if text:
        show(text, options.no_pager)
    elif not options.quiet:
        note_none()
    if len(items) > options.limit == MOST_LISTED:  # who gives a limit wants no more
        note("Only the first %d are shown; use --limit or --offset." % options.limit)


# ---- Submitting


def _metadata_of(options):
    """Return the dict that --metadata gives, or None."""
    return None if options.metadata is None else joined(dict_of(options.metadata, "--metadata"), {}, "metadata")


def _check_collisions(given):
    """Raise UsageError if one argument has a value and another is a key below it, as with --a and --a.b."""
    for key in given:
        below = [other for other in given if other.startswith(key + ".")]
        if below:
            words = " ".join("%s=%s" % (name, given[name]) for name in [key] + below)
            raise UsageError("--%s and --%s collide: a key can't have a value and keys below it. To hand both to a "
                             "program as words, as Hydra takes them, submit one text, --over=%s, and use %%(over...) "
                             "in the command" % (key, below[0], quoted(words)))


def _submissions(options):
    """Return the list of dicts that `task submit` has to submit; raises UsageError if it is empty."""
    given = typed_arguments(options.rest or [])
    fixed = {} if options.args is None else dict_of(options.args, "--args")
    _check_collisions(given)
    if options.grid:
        values = [grid_values(key, text) for key, text in given.items()]
        rows = [{"args": dict(zip(given, row))} for row in itertools.product(*values)]
    elif options.sample is not None:
        rows = [{"args": row} for row in drawn(given, options.sample, options.seed)]
    else:
        fixed = joined({key: text if text is True else literal(text) for key, text in given.items()}, fixed)
        rows = [{"args": {}}]
    if options.from_file:
        text = read_text(options.from_file, "tasks")
        read = {"{": tasks_of_json, "[": tasks_of_list}.get(text.lstrip()[:1], tasks_of_csv)
        rows = read("stdin" if options.from_file == "-" else options.from_file, text)
    fields = without_none(**{name: getattr(options, name) for name in SUBMISSION_FIELDS})
    fields.update(without_none(metadata=_metadata_of(options)))
    fields.update({field: _named_ids(fields[field]) for field in WAITS if field in fields})
    tasks = [dict(row, **dict(fields, args=joined(row["args"], fixed))) for row in rows]
    if not tasks:
        raise UsageError("%s contains no task" % options.from_file)
    if not all(task["args"] or task.get("cmd") for task in tasks):
        raise UsageError("a task needs arguments or a command: task submit -- --lr=0.1 --model=resnet")
    return tasks


def _notes_on_arguments(options):
    """Return notes on task arguments that may have been meant as something else.

    Raises UsageError for a switch of `task submit` after `--`: whoever types --dry-run there wants no task."""
    own, notes = options.own, []
    for word in options.rest or ():
        flag = word.split("=")[0]
        if word in own and "action" in own[word]:
            raise UsageError("%s after -- would be an argument of the task. As an option of labtasker it goes before: "
                             "task submit %s -- ...; as an argument write %s=True" % (word, word, word))
        if flag in own and flag != "--seed" and getattr(options, own[flag].get("dest", flag.strip("-")), None) is None:
            notes.append("Note: %s after -- is an argument of the task; labtasker's own %s goes before --." % (
                flag, flag))
    for key, text in () if options.grid or options.sample else typed_arguments(options.rest or []).items():
        if is_like_grid(text):
            notes.append("Note: --%s=%s is one value of one task. For one task per value: labtasker task submit --grid "
                         "-- --%s=%s" % (key, text, key, text))
        elif isinstance(text, str) and re.match(r"(?i)log:[\d.]", text):
            notes.append("Note: --%s=%s is a text. For tasks with random values: labtasker task submit --sample 20 -- "
                         "--%s=%s" % (key, text, key, text))
    return notes


def _check_ways(options):
    """Raise UsageError where tasks were asked for in two ways, or --seed without what draws."""
    ways = [flag for flag, given in (("--grid", options.grid or None), ("--sample", options.sample),
                                     ("--from", options.from_file)) if given is not None]
    if ways[1:]:
        raise UsageError("%s and %s exclude each other" % (ways[0], ways[1]))
    if options.seed is not None and options.sample is None:
        raise UsageError("--seed before -- belongs to --sample; an argument of the task goes after --: -- --seed=%d"
                         % options.seed)


def do_task_submit(options):
    _check_ways(options)
    is_new_seed = options.sample is not None and options.seed is None
    options.seed = new_seed() if is_new_seed else options.seed
    parse_rule(options.stop) if options.stop is not None else None
    notes = _notes_on_arguments(options)
    tasks = _submissions(options)
    for text in notes:
        note(text)
    new, ids, failed = unseen(tasks) if options.unique else (tasks, None, [])
    known = "; %d already there" % (len(tasks) - len(new)) if options.unique else ""
    if options.dry_run:
        shown = [{key: value for key, value in task.items() if key != "task_id"} for task in new]
        show_result(options, {"tasks": shown}, as_jsonl(shown))
        note("Would submit %s%s." % (tasks_in_words(new), known))
        _note_seed(is_new_seed, options)
        return _note_failed(failed)
    made = submit_tasks(new) if options.unique or new[1:] else [submit_task(**new[0]).task_id]
    done = "Submitted %s%s" % ("task " + made[0] if len(tasks) == len(made) == 1 else tasks_in_words(made), known)
    show_result(options, {"task_ids": made, "submitted": len(made), "already_there": len(tasks) - len(new)},
                "\n".join(ids or made) if options.quiet else done)
    if not options.quiet:
        _note_seed(is_new_seed, options)
        _note_failed(failed)


def _note_seed(is_new_seed, options):
    """Note which seed a sample was drawn with, where none was given."""
    if is_new_seed:
        note("Drawn with --seed %d, which draws the same values again." % options.seed)


def _note_failed(ids):
    """Note how many tasks of a submission were already there and have failed, and how to run them again."""
    if ids:
        note("%d of those already there %s failed; to run %s again: labtasker task retry%s" % (
            len(ids), *(("has", "it") if len(ids) == 1 else ("have", "them")),
            "".join(" " + task_id[:8] for task_id in ids) if len(ids) < 6 else " (all that have failed)"))


# ---- Listing, showing and counting tasks


def do_task_ls(options):
    query = selectors(options)
    if options.piped_in:
        query["extra_filter"] = both(query.get("extra_filter"), {"_id": {"$in": [_full_id(w) for w in _read_ids()]}})
    order = [_sorting(word) for word in options.sort] or None
    tasks = ls_tasks(limit=options.limit + 1, offset=options.offset, sort=order, **query).content
    _note_absent([field for field, _ in order or ()] + _column_names(options))
    is_selected = query or options.offset
    _show_listing(tasks, options, (lambda: _nothing_matches(query)) if is_selected else lambda: note(
        "No tasks yet: labtasker task submit -- --lr=0.1"))


def do_task_get(options):
    task, = _tasks_named([options.task_id])
    times_s = runs_s(task)
    shown = dict(task.to_dict(), **without_none(duration=round(sum(times_s), 3) if times_s else None,
                                                last_duration=round(times_s[-1], 3) if times_s[1:] else None,
                                                **folders_of(task)))
    text = record_text(shown, options.fmt)
    if options.fmt == "yaml" and task.start_time:  # comments, as a sparkline is no data
        text = "\n".join([text] + ["# " + line for line in curve_lines(get_history(task.task_id))])
    show(text, options.no_pager)


# How many tasks match. counts: {value of a field as text: number}. ended, took_s: the latest tasks to end, and the
# seconds from the first of these ends until the count. mark: names the state that was counted, or None. at: when it was
# counted, on the monotonic clock. values: [[value, number], ...].
Count = row_type("Count", "counts ended took_s mark at values")


def counted(query, field="status"):
    """Return the Count of the tasks that match. A server without the extensions can't count: all are fetched."""
    query, at = dict(query, extra_filter=query_of(query.get("extra_filter"))), monotonic()
    tell_doubts(query["extra_filter"], Task)
    if not client().extensions:
        tasks = ls_tasks(limit=EVERY, **query).content
        values = [get_path(task.to_dict(), field.split(".")) for task in tasks]
        found = {exact(value): value for value in values}
        pairs_of = [[found[key], number] for key, number in collections.Counter(map(exact, values)).items()]
        return Count(_by_text(pairs_of), 0, 0, None, at, pairs_of)
    answer = ask_route("POST " + TASKS_PATH + "/count", by=field, **query)
    return Count(_by_text(answer["counts"]), answer["ended"], answer["took_s"], answer["mark"], at, answer["counts"])


def _by_text(values):
    """Return {value as a text for a table: number} of [[value, number], ...]."""
    counts = collections.Counter()
    for value, number in values:
        counts[brief(value)] += number
    return counts


def _counted_in(query):
    """Return (the Count of the tasks that match, the seconds to pause after that)."""
    count = counted(query)
    return count, min(30, max(0.5, 10 * (monotonic() - count.at)))


def poll_counts(query, wait_s, until=math.inf):
    """Yield the Count of the tasks that match: now, whenever something has changed, and at the latest after `wait_s`, a
    number or a function. At `until` yield the last one.

    At most a tenth of the time is spent on counting. If the mark is the same, the last Count is yielded again. A server
    that goes away is waited for."""
    def next_count():
        longest_s = max(0, min(wait_s() if callable(wait_s) else wait_s, until - monotonic()))
        is_same = count.mark and count.mark == ask_route(
            "GET " + QUEUE_PATH + "/mark", seen=count.mark, wait_s=longest_s)["mark"]
        return (count, pause_s) if is_same else _counted_in(query)

    def pause(seconds):
        time.sleep(max(0, min(seconds, until - monotonic())))

    count, pause_s = _counted_in(query)
    while True:
        yield count
        pause(pause_s)
        if monotonic() >= until:
            return
        began = monotonic()
        try:
            count, pause_s = retry_while_away(next_count, pause, lambda: min(SERVER_LOST_S, until - began))
        except LabtaskerError as error:
            if is_away(error) and monotonic() >= until:
                return
            raise


def do_task_count(options):
    field = options.by or "status"
    _check_field(field, "--by")
    found = counted(selectors(options), field)
    missing = [] if options.by or options.status else [state for state in TASK_STATES if not found.counts[state]]
    values = sorted(found.values + [[state, 0] for state in missing], key=lambda row: TASK_STATES.index(row[0])
                    ) if field == "status" else found.values
    counts, total = _by_text(values), sum(found.counts.values())
    if not total:
        _nothing_matches(selectors(options)) if selectors(options) else None
    elif options.by:
        _note_absent([field])
    if options.fmt == "csv":
        return say(as_csv([{field: value, "tasks": number} for value, number in values], [field, "tasks"]))
    rows = [(field, "tasks")] + [(name, str(number)) for name, number in counts.items()] + [("total", str(total))]
    show_result(options, {"total": total, "by": field, "counts": values},
                str(total) if options.quiet else render_table(rows, painted=_painter(options)))


def do_task_table(options):
    options.by = [field.strip() for words in options.by for field in words.split(",")]
    for field in options.by:
        _check_field(field, "--by")
    _check_field(options.of, "--of")
    query = without_none(task_name=options.task_name, extra_filter=filter_of(options))
    statuses = options.status.split(",")
    rows = table(options.by, options.of, options.mode, statuses, **query)
    if options.fmt in WRITERS:
        return say(WRITERS[options.fmt](rows, options.by + list(TABLE_COLUMNS) if options.fmt == "csv" else ()))
    if not rows:
        return _nothing_matches(query)
    _note_absent([options.of] + options.by)
    if options.fmt == "md":
        return say(_markdown(_table_cells(rows, options.by, statuses)))
    say(render_table(_table_cells(rows, options.by, statuses), screen_size()[0] if is_terminal(sys.stdout) else 10 ** 9,
                     painted=_painter(options)))


def _table_cells(rows, by, statuses):
    """Return the rows of a table as rows of texts, below the names of its columns. Columns in which no task is counted
    are left out."""
    def failed_cell(row):
        total = row["n"] + row["missing"] + row["nan"] + ("failed" not in statuses and row["failed"])
        return "%d (%.0f%%)" % (row["failed"], 100 * row["failed"] / total) if row["failed"] else "0"

    columns = list(TABLE_COLUMNS[:-3]) + [name for name in TABLE_COLUMNS[-3:] if any(row[name] for row in rows)]
    heads = shortened({field: field for field in by}, r"^(args|summary|metadata)\.", TABLE_COLUMNS)
    cells = {"best": lambda row: (row["best"] or "-")[:8], "failed": failed_cell}
    lines = [[_brief_cell(row[field]) for field in by] + [
        cells[name](row) if name in cells else "-" if row[name] is None else brief(row[name], 3 if name == "std" else 5)
        for name in columns] for row in rows]
    return [[heads[field] for field in by] + columns] + lines


def _markdown(rows):
    """Return rows of texts, of which the first is the header, as a table in Markdown."""
    rows = [[clean(cell, "").replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(cells_wide, column)) for column in zip(*rows)]
    lines = ["| %s |" % " | ".join(map(fitted, row, widths)) for row in rows]
    return "\n".join(lines[:1] + ["|%s|" % "|".join("-" * (width + 2) for width in widths)] + lines[1:])


# ---- Changing tasks: update, delete, retry
UPDATABLE = [name for name in TaskUpdateRequest.FIELDS if name != "replace_fields"]


def updates_of(words):
    """Return {dotted field: value} of `field=value` words; raises a UsageError that lists the fields."""
    updates = {}
    for word in words:
        field, equals, text = word.partition("=")
        top = field.split(".")[0]
        if not equals or top not in UPDATABLE or ("." in field and TASK_FIELDS[top].kind != "dict"):
            raise UsageError(_not_updatable(field, text if equals else None))
        if field in updates:
            raise UsageError("the field %s is updated twice" % field)
        kind = TASK_FIELDS[top].kind if text not in ("null", "None") else None
        is_text = kind in ("name", "status")
        updates[field] = _named_ids([text]) if kind == "ids" else text if is_text else typed_value(text, field)
    joined(updates, {}, "updates")
    return updates


def _named_ids(texts):
    """Return the ids of tasks that are typed in texts, joined by commas or blanks; first letters are enough."""
    words = [word for text in texts for word in text.replace(",", " ").split()]
    return [_full_id(word) for word in dict.fromkeys(words)]


def _not_updatable(field, text):
    """Return what is wrong with a word of an update that is no `field=value`, and what may have been meant."""
    known = ", ".join(UPDATABLE)
    if field.startswith("-"):
        return "%s is an option: it goes before --, which field=value words follow" % brief(field)
    if text is None:
        return "can't update %s: write field=value, such as args.lr=0.1; the fields are %s" % (brief(field), known)
    top, dot, _ = field.partition(".")
    if top in TASK_FIELDS:
        why = "; it holds one value, with no keys in it" if top in UPDATABLE else "; labtasker alone sets it"
    else:
        why = _meant_field(field, UPDATABLE)
    return "can't update %s%s The fields are %s" % (brief(field), why if why.endswith("?") else why + ".", known)


def change_of(task, updates):
    """Return the TaskUpdateRequest that gives each typed field of `task` its new value and leaves all others.

    A server merges dicts. So a field is replaced as a whole if a dict was typed for it or for a key in it."""
    change = {"_id": task.task_id}
    for field, value in updates.items():
        top, *path = field.split(".")
        is_replaced = value is None and not path  # otherwise a server takes null as "not given"
        if any(isinstance(v, dict) for f, v in updates.items() if f.split(".")[0] == top):
            change.setdefault(top, json.loads(json.dumps(getattr(task, top))))
            is_replaced = True
        if is_replaced:
            change["replace_fields"] = sorted({top}.union(change.get("replace_fields", ())))
        _set_path(change, [top] + path, value)
    try:
        return TaskUpdateRequest(**change)
    except (LabtaskerError, ValueError, TypeError) as error:
        raise UsageError(error) from None


def _set_path(tree, path, value):
    """Set the value at `path` in nested dicts."""
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[path[-1]] = value


def do_task_update(options):
    updates = updates_of((options.update or []) + (options.rest or []))
    by_hand = options.editor or not updates and not options.reset_pending
    if by_hand and not (options.editor or is_terminal(sys.stdin)):
        raise UsageError("what to change? Give -u field=value or --reset-pending; --editor opens them in $EDITOR")
    if by_hand and (updates or options.dry_run):
        raise UsageError("--editor goes without -u, field=value and --dry-run")
    edit_tasks = by_hand and extras_for("--editor").edit_tasks
    tasks = _chosen_tasks(options, limit=options.limit)
    changes = [change_of(task, updates) for task in tasks]
    if options.dry_run:
        for task, change in zip(tasks, changes):
            if change.status not in (None, task.status) and not options.reset_pending:
                set_by_hand(task, change.status)
        return _show_dry_run(options, "update", tasks, tasks)
    if not tasks:
        return _show_change(options, "updated", tasks)
    if by_hand:
        return edit_tasks(tasks, options)
    by_id = options.task_id is not None or not selectors(options)
    is_asked = not (options.yes or options.quiet or by_id and not is_terminal(sys.stdin))
    confirm("Update %s?" % tasks_in_words(tasks), "-y (--yes)", not is_asked)
    update_tasks(changes, reset_pending=options.reset_pending)
    _show_change(options, "updated", tasks, tasks)


def _show_dry_run(options, verb, matching, tasks):
    """Show which of the tasks that match a command would have changed."""
    if options.fmt == "table":
        _show_listing(tasks, options)
        note("Would %s %s." % (verb, tasks_in_words(tasks)))
    else:
        show_result(options, {"matched": len(matching), "changed": 0, "task_ids": ids_of(tasks)})


def _show_change(options, done, matching, changed=(), text=None):
    """Show how many of the tasks that match a command has changed; where none matches, why, if that is plain.

    `done` is what became of them, "updated" or the like; `text` says it to a person."""
    if not matching:
        _nothing_matches(selectors(options), "nothing was " + done)
    text = matching and not options.quiet and (text or "%s %s" % (done.capitalize(), tasks_in_words(changed)))
    show_result(options, {"matched": len(matching), "changed": len(changed)}, text)


def do_task_delete(options):
    tasks, gone = _chosen_tasks(options, options.ids), []
    if options.dry_run:
        return _show_dry_run(options, "delete", tasks, tasks)
    if tasks:
        confirm("Delete %s for good?" % tasks_in_words(tasks), "-y (--yes)", options.yes)
    for task in tasks:
        try:
            delete_task(task.task_id)
        except LabtaskerHTTPStatusError as error:
            if error.status_code != 404:  # somebody else has deleted it: that is what was wanted
                raise
            gone.append(task)
    _show_change(options, "deleted", tasks, [task for task in tasks if task not in gone])


def do_task_retry(options):
    if not options.ids and options.task_id is None and options.status is None:
        options.status = "failed"
    tasks = _chosen_tasks(options, options.ids)
    if options.dry_run:
        return _show_dry_run(options, "retry", tasks, tasks)
    retried = update_tasks([TaskUpdateRequest(_id=task.task_id) for task in tasks], reset_pending=True).content if (
        tasks) else []
    in_vain = [task for task in retried if task.status == "cancelled"]
    _show_change(options, "retried", tasks, tasks, "%s pending again" % tasks_in_words(retried[len(in_vain):]))
    if in_vain:
        note("%s cancelled again: %s" % (tasks_in_words(in_vain), in_vain[0].reason))


def do_task_cancel(options):
    tasks = _chosen_tasks(options, options.ids)
    left = [task for task in tasks if task.status in ("pending", "running")]
    if options.dry_run:
        return _show_dry_run(options, "cancel", tasks, left)
    running = sum(task.status == "running" for task in left)
    if left:
        is_by_id = options.ids or options.task_id is not None or not selectors(options)
        of_them = ", %d of them running" % running if running else ""
        confirm("Cancel %s%s?" % (tasks_in_words(left), of_them), "-y (--yes)", options.yes or is_by_id)
        ids = {"_id": {"$in": ids_of(left)}, "status": {"$in": ["pending", "running"]}}
        left = ls_tasks(extra_filter=ids, limit=EVERY).content  # without those that ended before the answer was typed
        update_tasks([TaskUpdateRequest(_id=task.task_id, status="cancelled") for task in left])
    over = collections.Counter(task.status for task in tasks if task.status not in ("pending", "running"))
    rest = ", ".join("%d %s" % (number, status) for status, number in over.items())
    text = "Cancelled %s%s" % (tasks_in_words(left), rest and "; over already: " + rest)
    _show_change(options, "cancelled", tasks, left, text)


# ---- Waiting: counts, rate and time left
Pace = row_type("Pace", "counts per_s eta_s")
REFRESH_S, WHOLE_S = 2.0, 30.0  # between refreshes; between complete ones, without which deleted tasks would stay


class Sweep:
    """The tasks that a query matches. Most refreshes fetch only the tasks that have changed."""

    def __init__(self, query):
        self.query, self.tasks, self.whole_at = query, {}, None

    def refresh(self):
        """Fetch the tasks, or those that have changed; raises what `ls_tasks` does."""
        is_plain = set(self.query) <= {"task_name", "task_id"}  # with other selectors a task may cease to match
        if not is_plain or not self.tasks or monotonic() - self.whole_at > WHOLE_S:
            tasks = {}
            self.whole_at, query = monotonic(), self.query
        else:
            tasks = dict(self.tasks)
            latest = max(task.last_modified for task in tasks.values())
            query = dict(self.query, extra_filter={"last_modified": {"$gte": {"_dt": latest.isoformat()}}})
        tasks.update((task.task_id, task) for task in ls_tasks(limit=EVERY, **query).content)
        self.tasks = tasks


def pace(tasks, at):
    """Return the Pace of tasks at an instant."""
    changed = sorted(tasks, key=lambda task: task.last_modified)
    return pace_of(collections.Counter(task.status for task in changed),
                   *recent_ends(changed, at, lambda task: task.start_time.timestamp()))


def pace_of(counts, ended, took_s):
    """Return the Pace of `counts`, tasks by status, of which the last `ended` have ended within `took_s`."""
    left, per_s = counts["pending"] + counts["running"], ended / took_s if took_s > 0 else 0.0
    return Pace(counts, per_s, left / per_s if left and per_s and counts["running"] else None)


def _paces(query, until=math.inf):
    """Yield the Pace of the tasks that match, at least every REFRESH_S and a last time at `until`."""
    if client().extensions:
        for count in poll_counts(query, REFRESH_S, until):
            yield pace_of(count.counts, count.ended, count.took_s + monotonic() - count.at)
        return
    sweep = Sweep(query)
    while True:
        began = monotonic()
        sweep.refresh()
        yield pace(sweep.tasks.values(), now())
        if monotonic() >= until:
            return
        time.sleep(max(0, min(30, until - monotonic(), max(REFRESH_S, 10 * (monotonic() - began)))))


def do_task_wait(options):
    """Wait until nothing is pending or running, or until --timeout; return what `_waited` does."""
    is_json = options.fmt != "table"
    query, is_quiet = selectors(options), options.quiet or is_json
    has_bar, until = is_terminal(sys.stderr) and not is_quiet, math.inf
    if options.timeout is not None:
        until = monotonic() + options.timeout
    last, idle_at = collections.Counter(), math.inf
    is_noted = options.quiet or is_json and until < math.inf  # that no loop runs; the error in JSON tells it
    results = _paces(query, until) if has_bar else poll_counts(
        query, lambda: IDLE_WAIT_S if is_noted or last["running"] else _NO_LOOP_S, until)
    for result in results:  # a Pace or a Count
        counts = result.counts
        is_over, is_idle = not counts["pending"] + counts["running"], not counts["running"]
        if sum(counts.values()) < (options.expect or 0):
            raise LabtaskerRuntimeError("%d tasks match, and %d are expected" % (sum(counts.values()), options.expect))
        if has_bar and counts:
            bar = progress(result, screen_size(sys.stderr)[0] - 1)
            sys.stderr.write("\r\x1b[K" + bar + ("\n" if is_over else "\r"))
            sys.stderr.flush()
        elif (counts != last or not counts) and not is_quiet:
            note(in_states(counts)) if counts else _nothing_matches(query)
        if is_over:
            return _waited(options, counts)
        last, idle_at = counts, min(idle_at, monotonic()) if is_idle else math.inf
        if not is_noted and monotonic() - idle_at >= _NO_LOOP_S:
            is_noted = _note_no_loop(query, counts, "\r\x1b[K" * has_bar)
    if not is_quiet:
        note("\n" * has_bar + "The time is up: %s." % in_states(last))
        is_noted or last["running"] or _note_no_loop(query, last)
    return _waited(options, last, _no_loop(query, last) if is_json and not last["running"] else None)


def _waited(options, counts, way_out=None):
    """Print how many tasks are in which state after the wait; return None, or the Ended of one whose time is up or that
    tells of tasks that have failed."""
    is_late, total = bool(counts["pending"] + counts["running"]), sum(counts.values())
    if options.fmt != "table":
        show_result(options, dict([(state, counts[state]) for state in TASK_STATES], timed_out=is_late))
    if is_late:
        return Ended("timeout", "the time is up: %s" % in_states(counts), way_out)
    return Ended("tasks_failed", "%d of %d tasks failed" % (counts["failed"], total),
                 "labtasker task ls -s failed") if counts["failed"] else None


_NO_LOOP_S = 2.0  # with nothing running for so long there is no loop: less may be a loop between two tasks


def _note_no_loop(query, counts, head=""):
    """Note that no loop runs, unless one runs other tasks; return True."""
    text = _no_loop(query, counts)
    if text:
        sys.stderr.write(head)
        note(text)
    return True


def _no_loop(query, counts):
    """Return text that says that no loop runs and which command starts one; None if a task runs or nobody knows."""
    try:
        if not ls_tasks(status="running", limit=1).content:
            task, = ls_tasks(limit=1, **dict(query, status="pending")).content
            return _pause_of_queue() or "%d pending, no loop runs: start one, such as labtasker loop -- %s" % (
                counts["pending"], _example_command(task))
    except (LabtaskerError, ValueError):  # the server is away, or no task is pending any more
        pass
    return None


# ---- Why a task is not run


def do_task_why(options):
    task, = _tasks_named([options.task_id])
    lines = [_what_became(task)]
    if task.status == "pending":
        awaited = list(_awaited(task))
        lines = awaited + list(_obstacles(task, options))[bool(awaited):]  # it has no place in line
        lines = list(filter(None, [_pause_of_queue()])) + lines
    standing = ask_route("GET " + TASKS_PATH + "/{task_id}/history", task_id=task.task_id)["standing"] if vars(
        task).get("stop") else None
    reasons = [as_started(line) for line in itertools.chain(lines, [standing] * bool(standing))]
    show_result(options, {"task_id": task.task_id, "status": task.status, "reasons": reasons},
                "\n".join(map(clean, reasons)))


def _what_became(task):
    """Return a sentence on a task that is not pending: it runs, or how it ended."""
    if task.status == "running":
        return "It has been running for %s on worker %s%s." % (
            spent(task, "{1}, {0} in {2} runs,"), task.worker_id or "unknown",
            "; its last heartbeat was %s ago" % age(task.last_heartbeat) if task.last_heartbeat else "")
    again = "labtasker task retry %s makes it pending again." % task.task_id[:8]
    if task.status == "failed":
        return "It failed for good, after %d of %d runs%s. %s" % (
            task.retries, task.max_retries, _with_error(task), again)
    took = spent(task, "{0} in {2} runs, the last {1}")
    if vars(task).get("run_end") == "stopped":
        return "It was %s. %s" % (task.reason, again)
    why = ": " + task.reason if task.status == "cancelled" and vars(task).get("reason") else ""
    return "It is over: %s%s%s. %s" % (task.status, took and " after " + took, why, again)


def _awaited(task):
    """Yield what a pending task waits for, a line for each field of WAITS."""
    names = {field: vars(task).get(field) or [] for field in WAITS if vars(task).get("run_id") is None}
    ids = list(itertools.chain(*names.values()))
    found = ls_tasks(extra_filter={"_id": {"$in": ids}}, limit=EVERY).content if ids else ()
    there = {one.task_id: one for one in found}
    for field, others in names.items():
        to_come = ["%s (%s)" % (other_id[:8], there[other_id].status if other_id in there else "gone")
                   for other_id in others if not is_done_for(field, task, there.get(other_id))]
        if to_come:
            more = ", and %d more" % (len(to_come) - _MOST_NAMED) if len(to_come) > _MOST_NAMED else ""
            yield "It waits until %s %s: %s%s." % (
                "this task has" if len(to_come) == 1 else "each of these %d tasks has" % len(to_come),
                "succeeded" if field == "after" else "ended", ", ".join(to_come[:_MOST_NAMED]), more)


_MOST_NAMED = 10  # of the tasks that one waits for


def _with_error(task):
    """Return ": " and the error of a task that failed, or ""."""
    error = error_of(task)
    return ": " + error if error else ""


def _obstacles(task, options):
    """Yield what keeps a pending task from being run: its place in line, the loops that run now, the workers, and the
    loop that the command line describes."""
    queued = sorted(ls_tasks(status="pending", limit=EVERY).content,
                    key=lambda other: (-other.priority, other.last_modified, other.created_at))
    ahead = next((at for at, other in enumerate(queued) if other.task_id == task.task_id), 0)
    yield "Pending for %s, %s of %d in line (higher priority first, then the longest unchanged)." % (
        age(task.last_modified), ordinal(ahead + 1), len(queued))
    if task.retries:
        yield "It failed %d of %d times%s." % (task.retries, task.max_retries, _with_error(task))
    if vars(task).get("reason") and not vars(task).get("failure"):
        yield "Its last run was requeued: %s." % task.reason
    not_before = vars(task).get("not_before")
    if not_before and not_before.timestamp() > now():
        yield "It can start in %s: its job asked for a pause, or a run failed (retry_delay)." % span(
            not_before.timestamp() - now())
    running = ls_tasks(status="running", limit=EVERY).content
    if not running:
        yield "Nothing runs in this queue: start a loop, such as labtasker loop -- %s" % _example_command(task)
    shown = set()
    for other in running:
        text = as_typed(other.cmd)
        if text and text not in shown:
            shown.add(text)
            misfit = "; ".join(_mismatches(other.cmd, task))
            yield "A loop runs %s now: %s." % (text, misfit or "it would take the task")
    for worker in ls_workers(extra_filter=NOT_ENDED, limit=EVERY).content:
        if worker.status != "active":
            yield "Worker %s is %s, so it gets no tasks. To activate it: labtasker worker report %s active" % (
                worker.worker_name or worker.worker_id[:8], worker.status, worker.worker_id[:8])
    if options.rest or options.extra_filter:
        misfit = "; ".join(_mismatches(options.rest, task) + _unmet(task, filter_of(options)))
        yield "The loop that you describe: %s." % (misfit or "it would take the task")


def _example_command(task):
    """Return a command that takes exactly the task's arguments."""
    return "python train.py " + " ".join("--%s '%%(%s)'" % (key, key) for key, _ in flatten(task.args))


def _mismatches(cmd, task):
    """Return the reasons why a command with placeholders does not take the task; [] if it does."""
    try:
        keys = [key for text in ([cmd] if isinstance(cmd, str) else cmd or ()) for key in Template(text).keys]
    except LabtaskerError as error:
        return [str(error).split("\n")[0]]
    missing, extra = misfits(keys, paths_of(task.args))
    return ["the task lacks %s" % key for key in missing] + ["the command lacks %%(%s)" % path for path in extra]


def _unmet(task, query):
    """Return the parts of a filter, text or document, that the task does not match."""
    if not query:
        return []
    if isinstance(query, str):
        query = parse_filter(query, visible(TASK_FIELDS), now())
    parts = query["$and"] if list(query) == ["$and"] else [query]
    return ["the filter's %s does not match" % json.dumps(part) for part in parts
            if not ls_tasks(task_id=task.task_id, extra_filter=part).content]


# ---- Logs


def do_task_logs(options):
    task = get_task(_full_id(options.task_id))
    attempt = _chosen_attempt(task, options.attempt)
    path, run_id = log_path(task, attempt), attempt.get("run_id") or task.run_id
    goes_on = bool(attempt) and "end" not in attempt
    is_here = os.path.exists(path)
    log = {} if is_here else get_log(task.task_id, run_id)
    is_followed = is_here or options.follow and goes_on
    if log.get("text") is None and not is_followed:
        raise _no_output(path, attempt, goes_on)
    if attempt:
        note("task %s, attempt %d of %d on %s: %s" % (
            task.task_id, task.attempts.index(attempt) + 1, len(task.attempts), attempt.get("host"),
            attempt.get("status", "running")))
    if is_followed:
        _follow_log(path, lambda: options.follow and _is_running(task.task_id, run_id), options.tail)
    if is_followed and not os.path.exists(path):  # the run has ended on another host
        time.sleep(_ASK_S)  # the server stores its output only after its report
        log = get_log(task.task_id, run_id)
        if log.get("text") is None:
            raise _no_output(path, attempt, False)
    if log.get("text") is not None:
        _print_end_of_log(log, options.tail)


def _no_output(path, attempt, goes_on):
    """Return the error that says where a run's output is, if it is not on this host."""
    return LabtaskerRuntimeError("the output is not on this host: %s%s%s" % (
        path, "; the task ran on %s" % attempt["host"] if attempt.get("host") else "",
        "; the server gets the end of it when the run ends" if goes_on else ""))


def _print_end_of_log(log, tail=None):
    """Print the answer of `get_log`, or its last `tail` lines; if that is only a part, a note says where the whole
    output is."""
    import io
    data = log["text"].encode("utf-8", "replace")
    begin = 0 if tail is None else _begin_of_tail(io.BytesIO(data), tail)
    if log["size"] > TAIL_BYTES and not begin:
        note("only the end of %d bytes is shown; all of them are on %s: %s" % (log["size"], log["host"], log["path"]))
    _print_output(data[begin:])
    sys.stdout.flush()


def _begin_of_tail(file, lines):
    """Return the offset at which the last `lines` lines of a file begin; it is read from its end."""
    size = position = file.seek(0, os.SEEK_END)
    while lines and position:
        begin = max(0, position - TAIL_BYTES)
        file.seek(begin)
        data, at = file.read(position - begin), position - begin
        if position == size and data.endswith(b"\n"):
            at -= 1
        while at >= 0 and lines:
            at = data.rfind(b"\n", 0, at)
            lines -= at >= 0
        if not lines:
            return begin + at + 1
        position = begin
    return position


def _chosen_attempt(task, number):
    """Return a task's last attempt, or the `number`th that it keeps; {} if it keeps none; raises if it had no run."""
    if number is not None and not 1 <= number <= len(task.attempts):
        raise LabtaskerValueError("task %s has %d attempts, no attempt %d" % (
            task.task_id, len(task.attempts), number))
    if not task.attempts and not task.start_time:
        raise LabtaskerRuntimeError("task %s has not been run yet" % task.task_id)
    return task.attempts[(number or 0) - 1] if task.attempts else {}


def log_path(task, attempt):
    """Return the path of a run's output: the one that its worker has reported, or that in the configuration's folder
    here."""
    here = os.path.join(os.path.abspath(find_root()), "logs", task.task_id, attempt.get("run_id") or task.run_id or "",
                        "run.log")
    reported = attempt.get("log")
    is_path = isinstance(reported, str) and os.path.isabs(reported) and "\0" not in reported
    try:
        there = for_system(reported) if is_path else None
    except UnicodeEncodeError:  # this system can't have such a path
        there = None
    return there if there and (os.path.exists(there) or not os.path.exists(here)) else here


def _is_running(task_id, run_id):
    """Return whether the run goes on."""
    task = get_task(task_id)
    return task.status == "running" and task.run_id == run_id


_POLL_S, _ASK_S = 0.2, 1.0  # between two reads of a file that grows, and two requests for the task


def _follow_log(path, goes_on, tail=None):
    """Print a file, or its last `tail` lines, and what is added to it as long as `goes_on()` is true."""
    position, ask_at, is_going = 0, 0, True
    if tail is not None and os.path.exists(path):
        with open_plain(path) as file:
            position = _begin_of_tail(file, tail)
    while is_going:
        if time.monotonic() >= ask_at:  # before reading, so that the file is read once more after the run's end
            is_going, ask_at = goes_on(), time.monotonic() + _ASK_S
        position = _print_from(path, position)
        time.sleep(_POLL_S if is_going else 0)


def _print_from(path, position):
    """Print the file from a position on; return the new position."""
    try:
        with open_plain(path) as file:
            file.seek(position)
            for data in iter(lambda: file.read(1 << 20), b""):
                _print_output(data)
            position = file.tell()
    except FileNotFoundError:  # not yet
        pass
    sys.stdout.flush()
    return position


_COLOURS = Pattern("\x1b\\[[0-9;]*m")


def _print_output(data):
    """Write a job's bytes to stdout. On a terminal all control characters but colours are made harmless."""
    if is_terminal(sys.stdout):
        text = data.decode("utf-8", "replace")
        pieces = re.split("(%s)" % _COLOURS.text, text)
        sys.stdout.write("".join(piece if _COLOURS.match(piece) else clean(piece) for piece in pieces))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)


def do_task_history(options):
    task, = _tasks_named([options.task_id])
    points = get_history(task.task_id)
    text = _points_table(points) if options.fmt == "table" else WRITERS[options.fmt](points, ())
    if text:
        show(text, options.no_pager)
    if not points:
        note("Task %s has no history: no job of it has reported with a step, as report(step=3, loss=0.7) does." % (
            task.task_id[:8]))


def _points_table(points):
    """Return the points of a history as a table: the step, the values, when it came in UTC."""
    rows = [dict(flatten(point), at=point["at"][:19]) for point in points]
    names = list(dict.fromkeys([name for row in rows for name in row if name != "at"] + ["at"]))
    rows = [[brief(row[name]) if row.get(name) is not None else "" for name in names] for row in rows]
    return render_table([names] + rows) if rows else ""


def do_task_harvest(options):
    metrics, step = read_metrics(options.metrics or (), options.step)
    if not metrics:
        raise UsageError("which values? --metric 'acc=accuracy: ([0-9.]+)', repeatable")
    is_all = not (options.ids or selectors(options))
    tasks = ls_tasks(limit=EVERY) if is_all else _chosen_tasks(options, options.ids)
    tasks = [task for task in tasks if task.start_time]
    results = [(task,) + _printed_values(task, metrics, step) for task in tasks]
    changed = [TaskUpdateRequest(_id=task.task_id, summary=values) for task, values, _ in results
               if values and merge(task.summary or {}, values) != (task.summary or {})]
    if changed and not options.dry_run:
        update_tasks(changed)
    without, away, cut = ([task for task, values, kind in results if wanted(values, kind)] for wanted in (
        lambda values, kind: not values and kind, lambda values, kind: not kind, lambda values, kind: kind == "end"))
    words = "%s %s; %d had the values already; the output of %d has none%s" % (
        "Would change" if options.dry_run else "Changed", tasks_in_words(changed),
        len(tasks) - len(changed) - len(without) - len(away), len(without),
        " (task logs %s)" % without[0].task_id[:8] if without else "")
    note(words + ("; the output of %d is not here (task logs %s)" % (len(away), away[0].task_id[:8]) if away else ""))
    if cut:
        note("Of the output of %s only the last %d KiB are here. The host of the run has all (task logs %s)." % (
            tasks_in_words(cut), TAIL_BYTES >> 10, cut[0].task_id[:8]))


def _printed_values(task, metrics, step=None):
    """Return (what metrics find in the output of a task's last run, as a summary; how much of that output is here:
    "all", "end" or "")."""
    printed, attempt, kind = Printed(metrics, step), _chosen_attempt(task, None), "all"
    feed = printed.channel()
    try:
        with open_plain(log_path(task, attempt)) as file:
            for data in iter(lambda: file.read(1 << 20), b""):
                feed(data)
    except OSError:
        kept = get_log(task.task_id, attempt.get("run_id") or task.run_id)
        if kept.get("text") is None:
            return {}, ""
        feed(kept["text"].encode("utf-8", "replace"))
        kind = "end" if kept["size"] > TAIL_BYTES else "all"
    feed(None)
    return unflatten(printed.values, "summary"), kind


def do_report(options):
    values = {}
    for word in options.values:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError("%s: write NAME=VALUE, like acc=0.9" % word)
        check_key(name, ["summary"])
        values[name] = literal(text)
    if not is_enabled():
        return note("no task runs here: nothing is reported")
    if not report_values(values, options.step):
        raise LabtaskerRuntimeError("task %s is not run here any more: the job should end" % current_task_id())


# ---- Loops and servers


def do_loop(options):
    if sum(map(bool, (options.rest, options.shell, options.script_path))) > 1:
        raise UsageError("-- COMMAND, --cmd and --script-path exclude each other")
    if not (options.rest or options.shell or options.script_path):
        options.shell = "" if sys.stdin is None or is_terminal(sys.stdin) else read_text(
            "-", "a script", PATIENCE_S).replace("\r\n", "\n")
        if not options.shell.strip():
            raise UsageError("what to run? labtasker loop -- python train.py --lr '%(lr)' (or --cmd, --script-path, "
                             "or a script on stdin)")
    if options.rest and options.rest[0].startswith("-"):
        raise UsageError("%s is no program: options of labtasker go before --, as in: labtasker loop -j 2 -- python "
                         "train.py --lr '%%(lr)'" % options.rest[0])
    given = {name: getattr(options, name) for name in LOOP_OPTIONS}
    given.update(extra_filter=filter_of(options), worker_id=_full_id(options.worker_id, ls_workers))
    return command_loop(options.rest, **given)


def _journal_path(options):
    """Return the path of the journal: --db-path, or that of the configured store."""
    return options.db_path or os.path.join(store_folder(load_config()) or find_root(), "journal.jsonl")


def do_serve(options):
    extras()  # this adds the page's routes
    try:
        return serve(advise=_advice_lines, **dict({name: getattr(options, name) for name in SERVE_OPTIONS},
                                            db_path=_journal_path(options)))
    except StoreUnavailable as error:  # exit code 1: the server refuses to start, which is not "can't be reached"
        raise LabtaskerRuntimeError(str(error)) from None


def _advice_lines(store, urls):
    """Yield the lines that say how to use a server that has just started: on the page and from other hosts."""
    import shlex
    config, queues = load_config(), {queue.record.queue_name: queue.record for queue in store.state.queues.values()}
    known = [name for name in (config.queue_name, DEFAULT_QUEUE) if name in queues] + sorted(queues)
    name = (known + [DEFAULT_QUEUE])[0]
    folder, command = store_folder(config), "labtasker queue update --new-password"
    if name != config.queue_name:
        command = "LABTASKER_QUEUE=%s %s" % (name, command)
    if not folder or os.path.realpath(folder) != os.path.realpath(store.folder):
        command = "LABTASKER_URL=%s %s" % (shlex.quote(store.folder), command)
    others, page = sorted(set(queues) - {name}), urls[0] + "/page"
    yield "Queue %s%s has %s. To set %s:" % (
        name, " (others: %s)" % (", ".join(others[:5]) + ", ..." * (len(others) > 5)) if others else "",
        *(("a password", "another") if name in queues and queues[name].password
          else ("no password yet, which the page and other hosts need", "one")))
    yield "    " + command
    yield "Log in at %s with the queue's name and its password." % page
    is_local = re.match(r"https?://(127\.|localhost[:/]|\[::1\])", page)
    yield "Other hosts can't reach it: for them, start it with --host 0.0.0.0." if is_local else (
        "On other hosts: labtasker init --url %s --queue-name %s" % (urls[0], name))


def do_server_status(options):
    path, url = _journal_path(options), None if options.db_path else load_config().url
    server = serving(path)
    if not (server.announced or server.place) and re.match("https?:", url or ""):
        return do_health(options)
    peer = living_server(os.path.dirname(path), DEFAULT_QUEUE) if server.announced else None
    status, remark = ("running", None) if peer else _state_of_server(path, server)
    is_its = peer or server.place and server.announced.get("pid") == server.owner.get("pid")  # server.json is its own
    facts = server.announced if is_its else server.owner if server.place else {}
    shown = {"status": status, "url": "".join(facts.get("addresses", ())[:1]), "store": path, "pid": facts.get("pid"),
             "host": facts.get("host"), "version": facts.get("version"), "since": facts.get("started_at")}
    say(record_text({name: value for name, value in shown.items() if value}, options.fmt).rstrip("\n"))
    if remark and options.fmt not in ("json", "jsonl"):
        note(remark)
    return None if peer else Ended("unreachable", remark or "no server runs on " + path)


def _state_of_server(path, server):
    """Return (the state, a remark or None) of a journal's server that does not answer here."""
    announced, owner, place = server
    who = "process %s on host %s" % (owner.get("pid"), owner.get("host"))
    urls, is_up = " ".join(announced.get("addresses", ())), announced.get("pid") == owner.get("pid")
    if place == "here":
        return ("hung", who + " does not answer at " + urls) if is_up else ("starting", who + " does not listen yet")
    if place and shows_life(path):
        return "elsewhere", "%s serves it, but does not answer here%s: ask on that host, or have it listen for " \
                            "others (labtasker serve --host 0.0.0.0)" % (who, urls and " at " + urls)
    if place:
        return "lost", "%s served it and shows no sign of life: you can restart it here (labtasker serve)" % who
    return "not running", announced and (
        "server.json was left by a server that was killed, process %s on host %s; the next server replaces it"
        % (announced.get("pid"), announced.get("host"))) or None


def do_server_stop(options):
    path = _journal_path(options)
    announced, owner, place = server = serving(path)
    who = "process %s on host %s" % (owner.get("pid"), owner.get("host"))
    if place == "elsewhere":
        raise LabtaskerRuntimeError("%s is served by %s: stop it there (labtasker server stop)" % (path, who))
    if not place:
        url = None if options.db_path else load_config().url
        note("labtasker: no server runs on %s%s" % (path, "; stop the configured server, %s, on its own host" % url
                                                    if re.match("https?:", url or "") else
                                                    ": " + _state_of_server(path, server)[1] if announced else ""))
        return 1
    try:
        if not stop_process(owner, options.timeout):
            raise LabtaskerRuntimeError("%s was asked to stop and has not ended yet. kill -9 %s ends it; nothing that "
                                        "it has acknowledged is lost" % (who, owner["pid"]))
    except PermissionError:
        raise LabtaskerRuntimeError("%s is another user's: only that user can stop it" % who) from None
    say("Stopped the server of %s, %s" % (path, who))


def do_health(options):
    began, missing = monotonic(), missing_store(load_config())
    if missing:
        if options.fmt == "table":
            say(clean("unhealthy: " + missing))
        return Ended("unreachable", missing)
    answer = health_check()
    spent_ms = 1000 * (monotonic() - began)
    version = client().call("GET", "/").get("version") if client().extensions else "1.0"
    healthy = answer.status == "healthy"
    show_result(options, {"status": answer.status, "store": client().where, "version": version}, clean(
        "%s: %s, %s, %.1f ms%s" % (answer.status, client().where, "version " + version if client().extensions else (
            "Labtasker 1.0"), spent_ms, "" if healthy else ", " + answer.database)))
    return None if healthy else Ended("unreachable", "the store is not healthy: " + answer.database)


# ---- Queues


def _secret_of(options):
    """Return the password of --password or LABTASKER_PASSWORD, or one that a person types without seeing it."""
    return options.password or os.environ.get("LABTASKER_PASSWORD") or ask(
        "Password of the queue:", "--password", secret=True)


def do_queue_create(options):
    name = options.queue_name or ask("Queue name:", "--queue-name")
    if options.dry_run:
        _check_queue_name(name)
        return say("Would create queue " + name)
    answer = create_queue(name, _secret_of(options), _metadata_of(options))
    say(answer.queue_id if options.quiet else "Created queue %s (%s)" % (name, answer.queue_id))


def do_queue_create_from_config(options):
    config, metadata = load_config(), _metadata_of(options)
    say("Would create queue %s, if it does not exist" % config.queue_name if options.dry_run
        else _create_configured_queue(config, metadata))


def _create_configured_queue(config, metadata=None):
    """Create the configuration's queue, or check that its password opens it; return a sentence on what was done.

    A store without a server needs no password: it gets a random one, until `queue update` sets another."""
    try:
        answer = create_queue(config.queue_name, config.password or new_id(), metadata)
        return "Created queue %s (%s)" % (config.queue_name, answer.queue_id)
    except LabtaskerHTTPStatusError as error:
        if error.status_code != 409:
            raise
    try:
        queue = get_queue()
        return "Queue %s exists already, and this configuration opens it (%s)" % (queue.queue_name, queue.queue_id)
    except LabtaskerHTTPStatusError as error:
        raise error if error.status_code != 401 else LabtaskerRuntimeError(
            "the queue %s exists already, with another password: use that one, or another name. A queue that was used "
            "without a server has no password: labtasker queue update --new-password, in the server's folder, sets one"
            % config.queue_name)


def do_queue_get(options):
    queue = get_queue()
    if options.quiet and not queue.queue_id:
        raise LabtaskerRuntimeError("queue %s has no id yet: the first task creates it" % queue.queue_name)
    say(queue.queue_id if options.quiet and options.fmt == "yaml" else record_text(queue.to_dict(), options.fmt))


def do_queue_pause(options):
    queue = pause_queue()
    show_result(options, queue.to_dict(), "Paused queue %s: what runs goes on, and nothing more is started"
                % queue.queue_name)


def do_queue_resume(options):
    queue = pause_queue(False)
    show_result(options, queue.to_dict(), "Queue %s goes on" % queue.queue_name)


def _pause_of_queue():
    """Return a sentence on the pause of the queue, or nothing."""
    paused_at = vars(get_queue()).get("paused_at")
    return "The queue has been paused for %s and gives out nothing: labtasker queue resume ends that." % age(
        paused_at) if paused_at else ""


def do_queue_update(options):
    if options.new_queue_name is options.new_password is options.metadata is None:
        raise UsageError("what to change? Give --new-queue-name, --new-password or --metadata")
    password, made_up = options.new_password, None
    if options.dry_run:
        return say("Would update queue %s: %s" % (get_queue().queue_name, _changes_of_queue(options)))
    if password is True:
        password = is_terminal(sys.stdin) and answer_to("New password (empty: one is made up):", secret=True)
        made_up = None if password else os.urandom(8).hex()
    name = options.new_queue_name or made_up and get_queue().queue_name  # before the old password becomes wrong
    update_queue(options.new_queue_name, made_up or password, _metadata_of(options))
    if made_up:
        say("The password of queue %s is now: %s" % (name, made_up))
    elif not options.quiet:
        say("Updated the queue")
    if options.new_queue_name or (made_up or password) and not store_folder(load_config()):
        note("The configuration still has the old name or password. To change them: labtasker config")


def _changes_of_queue(options):
    """Return what `queue update` would change; raises UsageError as it would."""
    if options.new_queue_name is not None:
        _check_queue_name(options.new_queue_name)
    return ", ".join(filter(None, (
        options.new_queue_name and "name " + options.new_queue_name, options.new_password and "another password",
        _metadata_of(options) and "metadata " + pairs(_metadata_of(options)))))


def do_queue_delete(options):
    name = get_queue().queue_name
    what = ", its tasks and its workers" if options.cascade else ""
    if options.dry_run:
        return say("Would delete queue %s%s (%d tasks, %d workers)" % (
            name, what, sum(counted({}).counts.values()), len(ls_workers(limit=EVERY).content)))
    confirm("Delete the queue %s%s for good?" % (name, what), "-y (--yes)", options.yes)
    delete_queue(cascade_delete=options.cascade)
    say("Deleted queue %s" % name)


# ---- Workers


def do_worker_create(options):
    if options.dry_run:
        _metadata_of(options)
        return say("Would create a worker" + (" named " + options.worker_name if options.worker_name else ""))
    worker_id = create_worker(options.worker_name, _metadata_of(options), options.max_retries)
    say(worker_id if options.quiet else "Created worker %s" % worker_id)


NOT_ENDED = {"ended_at": None}  # the filter of workers whose loops may still run


def do_worker_ls(options):
    given = filter_of(options)
    shown = given if options.all or options.worker_id else both(given, NOT_ENDED, Worker)
    query = _with_status({"extra_filter": shown}, options.status, Worker)
    _show_listing(ls_workers(
        worker_id=_full_id(options.worker_id, ls_workers), worker_name=options.worker_name, limit=options.limit + 1,
        offset=options.offset, **query).content, options,
        lambda: note("Nothing matches%s." % ("" if shown is given else " (without loops that have ended: --all)")))


def _worker_named(worker_id):
    """Return the worker with this id; raises NotFound."""
    for worker in ls_workers(worker_id=worker_id).content:
        return worker
    raise NotFound("there is no worker %s (labtasker worker ls lists them)" % worker_id)


def do_worker_report(options):
    worker_id = _full_id(options.worker_id, ls_workers)
    if options.dry_run:
        return say("Would set worker %s %s; it is %s" % (worker_id, options.status, _worker_named(worker_id).status))
    report_worker_status(worker_id, options.status)
    say("Worker %s is %s" % (worker_id, options.status))


def do_worker_delete(options):
    worker_id = _full_id(options.worker_id, ls_workers)
    if options.dry_run:
        return say("Would delete worker " + _worker_named(worker_id).worker_id)
    confirm("Delete worker %s?" % worker_id, "-y (--yes)", options.yes)
    delete_worker(worker_id, cascade_update=options.cascade_update)
    say("Deleted worker %s" % worker_id)


# ---- Events


def do_event_listen(options):
    listener, seen, failed = connect_events(options.timeout, options.after), 0, 0
    note("Connected%s." % ("" if options.until_idle or options.most or options.timeout else "; Ctrl-C ends it"))
    for event in _heard(listener, options.until_idle) if options.most != 0 else ():
        text = json.dumps(event.to_dict())
        if options.exec:
            failed += not _run_for_event(options.exec, text, options.exec_timeout, event)
        else:
            say(text if options.raw else clean(_event_line(event) if options.compact else _event_text(event)))
        sys.stdout.flush()
        seen += 1
        if seen == options.most:
            break
    return Ended("refused", "the command failed for %d of %d events" % (failed, seen)) if failed else None


_QUIET_S = 1.0  # how long no event comes until it is looked whether anything is still to be done


def _heard(listener, until_idle):
    """Yield the events as they come; `until_idle`: until no task is pending or running, and no more events come."""
    quiet = 0  # looks in a row after which nothing was to be done
    while quiet < 2:
        event = listener.get_event(_QUIET_S if until_idle else None)
        if event is not None:
            quiet = 0
            yield event
        elif not until_idle:
            return
        else:
            quiet = quiet + 1 if listener.is_connected() and _is_idle() else 0


def _is_idle():
    """Return whether no task is pending or running; one can't say so of a server that is away."""
    try:
        counts = counted({}).counts
        return not counts["pending"] + counts["running"]
    except LabtaskerError as error:
        if is_away(error):
            return False
        raise


def _run_for_event(command, text, limit_s, response):
    """Return whether a command of the shell, which got an event's JSON on its stdin, ended well and in time; a note
    tells of one that did not. What it has started in its process group ends with the time, or with this process."""
    import signal
    import subprocess

    def leave(number, _):
        raise SystemExit(128 + number)
    before = signal.signal(signal.SIGTERM, leave)
    process = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, start_new_session=True)
    try:
        process.communicate(text.encode() + b"\n", timeout=limit_s)
        code = process.returncode
        why = code and ("exit code %d" % code if code > 0 else signal_name(-code))
    except subprocess.TimeoutExpired:
        why = "it took longer than %s (--exec-timeout)" % span(limit_s)
    finally:
        if process.poll() is None:
            end_groups([process.pid], monotonic() + LOST_GRACE_S, time.sleep)
            process.wait()
        result_or(process.stdin.close, None)  # it still holds what a command that took too long did not read
        signal.signal(signal.SIGTERM, before)
    if why:
        note("labtasker: the command failed, %s, for the event %s" % (why, _event_line(response)))
    return not why


def _event_line(response):
    """Return an event as one line: the time, task or worker, its id, the old and the new state."""
    event = response.event
    return "%s  %-6s  %s  %s -> %s" % (format_time(event.timestamp.timestamp())[:19].replace("T", " "),
                                       event.entity_type, event.entity_id, event.old_state, event.new_state)


def _event_text(response):
    """Return an event as two lines, with the name, arguments and summary of its task or worker."""
    data = response.event.entity_data
    known = [data.get("task_name") or data.get("worker_name"), pairs(data.get("args") or {}),
             pairs(data.get("summary") or {})]
    return _event_line(response) + "\n    " + "  ".join(text for text in known if text)


# ---- Journals


def do_journal_verify(options):
    survey = Survey(_journal_path(options))
    for piece in survey.bad:
        say("byte %d: %d bytes are %s" % (piece.offset, len(piece.data), piece.problem))
    for first, last in survey.lost:
        say("lines %d to %d are missing" % (first, last))
    if survey.rotten:
        say(clean(as_started("%s is damaged: 'labtasker journal repair' saves what can be saved" % survey.path)))
        return 1
    check_known(survey.path)
    if survey.bad or survey.lost:
        say("Those bytes were never acknowledged, or are just being written. They are set aside at the next opening.")
    say(clean("%s: fine, %d lines, %d bytes" % (survey.path, survey.lines, survey.size)))


def do_journal_repair(options):
    path = _journal_path(options)
    if not (Survey(path).bad or Survey(path).lost):
        return say(clean("%s: fine, nothing was changed" % path))
    if options.dry_run:
        return say(clean("%s: would be replaced by a file of its %d good lines; the damaged file would be kept" % (
            path, Survey(path).lines)))
    confirm("Replace %s by a file of its good lines? The damaged file is kept." % path, "-y (--yes)", options.yes)
    survey, damaged, aside, ids = repair_store(path)
    say(clean("%s: %d good lines are kept" % (path, survey.lines)))
    for first, last in survey.lost:
        say("lost: lines %d to %d" % (first, last))
    for found_id in ids:
        say("named in the bad bytes: " + found_id)
    say(clean("the damaged file: %s" % damaged))
    say(clean("the bad bytes: %s" % aside))


def do_journal_compact(options):
    path = _journal_path(options)
    say(clean("%s: %d bytes, now %d" % ((path,) + compact(path))))


def do_journal_stats(options):
    survey = Survey(_journal_path(options))
    rows = [["file", survey.path], ["bytes", survey.size], ["bytes of folded lines", survey.header.get("tail", 0)],
            ["lines since", survey.lines], ["last line", survey.n], ["known to be on disk", survey.durable],
            ["closed cleanly", "yes" if survey.ended else "no"], ["bad pieces", len(survey.bad)]]
    say(render_table([[str(cell) for cell in row] for row in rows]))


# ---- Setting up


def do_init(options):
    root = os.environ.get("LABTASKER_ROOT") or os.path.join(os.getcwd(), ".labtasker")
    if not os.environ.get("LABTASKER_ROOT"):
        check_owner(root, root)
    path, next_step = os.path.join(root, CONFIG_NAME), "labtasker task submit -- --lr=0.1"
    confirm("%s exists already. Overwrite it?" % path, "--yes", options.yes or not os.path.exists(path))
    is_asking = is_terminal(sys.stdin) and not options.yes
    config = Config(root, *(_asked_settings if is_asking else _given_settings)(options))
    try:
        config, what_was_done = (_asked_queue if is_asking else _opened_queue)(config, options)
        say(what_was_done)
    except LabtaskerConnectError as error:
        note(error)
        confirm("Keep this configuration anyway?", "--yes", options.yes)
        next_step = "start the server (labtasker serve), then: labtasker queue create-from-config"
    finally:
        use_client(None)
    say("Wrote %s" % write_config(root, config.url, config.queue_name, config.password))
    variables = [name for _, name, _, _ in SETTINGS.values() if name and os.environ.get(name)]
    if variables:
        note("In this shell %s overrides that file." % " and ".join(variables))
    say(as_started("Next: " + next_step))


def _asked_settings(options):
    """Return (url, queue name, password) from the options. What they lack a person is asked for, until it is valid."""
    while options.url is None:
        url = _base_url(ask("Server's URL, or nothing for a store in this folder [none]", "--url"))
        options.url = url if _is_reached(url) else None
    while options.queue_name is None:
        options.queue_name = ask("Queue name [%s]" % DEFAULT_QUEUE, "--queue-name", default=DEFAULT_QUEUE)
        try:
            _check_queue_name(options.queue_name)
        except UsageError as error:
            note(error)
            options.queue_name = None
    return _given_settings(options)


def _is_reached(url):
    """Return whether to use a URL that a person typed: a server answers there, or the person wants it anyway."""
    if not re.match("https?:", url):
        return True
    began = monotonic()
    try:
        HttpTransport(url, DEFAULT_QUEUE, "").call("GET", "/health", None, None)
        note("%s answers, in %.0f ms." % (url, 1000 * (monotonic() - began)))
        return True
    except LabtaskerConnectError as error:
        note(error)
        return ask("Use this URL anyway? [y/N]", "--yes").lower() in ("y", "yes")


def _asked_queue(config, options):
    """Return what `_opened_queue` does; if the queue has another password, a person is asked for it."""
    while True:
        try:
            return _opened_queue(config, options)
        except LabtaskerRuntimeError as error:  # the queue exists, with another password
            if options.password or os.environ.get("LABTASKER_PASSWORD"):
                raise
            note(error)
        config = config._replace(password=ask("Its own password:", "--password", secret=True))


def _given_settings(options):
    """Return (url, queue name, password) from the options; raises a UsageError that names what is missing or wrong."""
    for value, option in ((options.url, "--url"), (options.queue_name, "--queue-name")):
        if value is None and not options.yes:
            raise UsageError("not interactive: pass %s, or --yes for the defaults" % option)
    url, name = _base_url(options.url or ""), options.queue_name or DEFAULT_QUEUE
    _check_queue_name(name)
    return url, name, _secret_of(options) if re.match("https?:", url) else options.password


def _check_queue_name(name):
    """Raise UsageError unless a queue can have this name."""
    if not NAME.match(name):
        raise UsageError("a queue's name is 1 to 100 letters, digits, _ and -, not %s" % brief(name))


def _base_url(text):
    """Return a URL or folder that a person typed, with `http://` before a bare host:port; raises UsageError."""
    text = text.strip()
    if re.match(r"[\w.-]+:\d+\Z", text):
        text = "http://" + text
    try:
        text = text and checked_url(text, "--url")
    except LabtaskerValueError as error:
        raise UsageError(str(error)) from None
    return text.rstrip("/") if re.match("https?:", text) else text


def _opened_queue(config, options):
    """Create the configuration's queue, or check its password; return (config, a sentence on what was done)."""
    use_client(Client(transport_for(config)))
    return config, _create_configured_queue(config)


# ---- Demo
_DEMO_SCRIPT = '''\
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
labtasker.report(acc=round(acc, 3))
print("lr=%g steps=%d: accuracy %.3f" % (lr, steps, acc))
'''
_DEMO_STEPS = (
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
        shutil.copy(THIS_FILE, os.path.join(folder, "labtasker.py"))
        _run_demo(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_demo(folder):
    """Run a sweep in `folder`: two workers, one failure, one ranking; raises LabtaskerRuntimeError if it fails."""
    began = monotonic()
    with open(os.path.join(folder, "train.py"), "w") as file:
        file.write(_DEMO_SCRIPT)
    say("A sweep in %s, which is removed at the end. The script:\n\n%s" % (
        folder, re.sub("(?m)^", "    ", _DEMO_SCRIPT.rstrip())))
    codes = []
    for words in _DEMO_STEPS:
        codes += _demo_workers(folder, words) if words[0] == "loop" else [_demo_start(folder, words).wait()]
    store = StoreTransport(os.path.join(folder, ".labtasker"), DEFAULT_QUEUE)
    tasks = Client(store).call("POST", "/api/v1/queues/me/tasks/search", {})["content"]
    store.close()
    successes = sum(task["status"] == "success" for task in tasks)
    retried = sum(task["retries"] == 1 for task in tasks)
    say("\n%d of %d tasks done by two workers, %d after a retry, in %.1f s." % (
        successes, len(tasks), retried, monotonic() - began))
    if any(codes) or (successes, retried) != (8, 1):
        raise LabtaskerRuntimeError("the demo failed; exit codes: %s" % codes)


def _demo_start(folder, words, suffix="", **streams):
    """Print a command of this program as one would type it, and start it; return its process."""
    import shlex
    import subprocess
    words = ["python3", "-m", "labtasker"] + words
    say("\n$ " + " ".join(shlex.quote(word) for word in words) + suffix)
    sys.stdout.flush()
    env = {key: value for key, value in os.environ.items() if not key.startswith("LABTASKER_")}
    env.update(LABTASKER_ROOT=os.path.join(folder, ".labtasker"), PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable if word == "python3" else word for word in words], cwd=folder, env=env,
                            stdin=subprocess.DEVNULL, **streams)


def _demo_workers(folder, words):
    """Run two workers at once and print their lines as they come; return their exit codes."""
    import subprocess
    workers = []

    def echo(number, worker):
        try:
            for line in worker.stdout:
                say("[worker %d] %s" % (number, clean(line.rstrip("\n"))))
                sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed our stdout; the main thread handles that
            pass
    try:
        for _ in (1, 2):
            workers.append(_demo_start(folder, words, " &", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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


# 18. Command line ############################################################
#
# Commands as one table, from which parsers, help and dispatch are made; main(). labtasker_cli.py adds its commands to
# the table. Uses 1, 2, 13, 14, 16, 17. Tests: test_cli.py, test_terminal.py.

# ---- From words to options

# sort(words) returns (words to parse, {attribute: value to add})
Command = row_type("Command", "run help example options rest sort", ((), None, None))


def option(spelling, help, **settings):
    """Return a row of a command's options from a spelling such as `-f --flag` or `-n --number N`.

    The row is (flags, settings), as `add_argument` takes them. A spelling without a flag is a positional argument and
    needs a `dest`."""
    words = spelling.split()
    flags = [word for word in words if word.startswith("-")]
    if flags == words:
        settings = dict({"action": "store_true"}, **settings)
    else:
        settings["metavar"] = words[-1]
    return flags or [settings.pop("dest")], dict(settings, help=help)


def switch(name, help, default=None):
    """Return the row of an option with two flags, `--name` and `--no-name`."""
    return ["--" + name, "--no-" + name], {"action": "switch", "help": help, "default": default}


def typed(read):
    """Return an argparse type from a function that reads text; argparse adds the option's name to its errors."""
    def option_type(text):
        import argparse
        try:
            return read(text)
        except LabtaskerValueError as error:
            raise argparse.ArgumentTypeError(str(error))
    return option_type


def choice(spelling, choices, **settings):
    """Return an option that takes one of `choices`; its help lists them."""
    def read(text):
        if text not in choices:
            raise UsageError("%s is none of %s%s" % (brief(text), ", ".join(choices), hint(text, choices)))
        return text
    row = option(spelling, settings.pop("help", "|".join(choices)), type=typed(read), **settings)
    row[1]["type"].choices = tuple(choices)  # for completion in a shell
    return row


def choices(spelling, words, **settings):
    """Return an option that takes one or several of `words`, separated by commas."""
    def read(text):
        chosen = [word.strip() for word in text.split(",")]
        for word in chosen:
            if word not in words:
                raise UsageError("%s is none of %s%s" % (brief(word), ", ".join(words), hint(word, words)))
        return ",".join(dict.fromkeys(chosen))
    row = option(spelling, "|".join(words) + ", or several with commas", type=typed(read), **settings)
    row[1]["type"].choices = tuple(words)  # for completion in a shell
    return row


@typed
def count(text):
    """Return a whole number >= 0; the type of options that count."""
    if not re.match(r"[0-9]+\Z", text):
        raise UsageError("%s is not a whole number from 0 on" % brief(text))
    return int(text)


@typed
def port(text):
    """Return a port number."""
    if not re.match(r"[0-9]{1,5}\Z", text, re.ASCII) or int(text) > 65535:
        raise UsageError("%s is no port number: it must be from 0 to 65535" % brief(text))
    return int(text)


@typed
def duration(text):
    """Return a duration as it was typed, which is how requests have it; raises if it is none."""
    return parse_duration(text) and text


seconds = typed(parse_duration)
_OPTION_KINDS = {  # kind of a row of LOOP_OPTIONS or SERVE_OPTIONS: its settings for `add_argument`
    "text": {}, "path": {"type": for_system}, "int": {"type": int}, "count": {"type": count}, "port": {"type": port},
    "seconds": {"type": seconds}, "duration": {"type": duration}, "list": {"action": "append"},
    "flag": {"action": "store_true"}, "ids": {"action": "append"},
}


def _option_of(name, row):
    """Return the row of a command's option for a row of LOOP_OPTIONS or SERVE_OPTIONS."""
    if row.kind == "switch":
        return switch(row.spelling, row.help)
    if isinstance(row.kind, tuple):
        return choice(row.spelling, row.kind, help=row.help, dest=name)
    return option(row.spelling, row.help, dest=name, **_OPTION_KINDS[row.kind])


def _options_of(table):
    """Return the rows of a command's options for LOOP_OPTIONS or SERVE_OPTIONS."""
    return [_option_of(name, row) for name, row in table.items()]


def make_parser(path):
    """Return the parser of one command. Only that of the typed command is ever built."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError("%s: %s (labtasker %s --help)" % (path, message, path))

        def format_help(self):
            return _command_help(path) + "\n"

        def _get_values(self, action, words):  # argparse drops the value of --name=--, so refuse it
            if words == ["--"] and action.option_strings:
                self.error("argument %s: -- is no value" % "/".join(action.option_strings))
            return super()._get_values(action, words)

    class Switch(argparse.Action):
        def __init__(self, **settings):
            super().__init__(nargs=0, **settings)

        def __call__(self, parser, options, values, flag):
            setattr(options, self.dest, not flag.startswith("--no-"))

    parser = Parser(prog="labtasker " + path, add_help=False, allow_abbrev=False)
    parser.register("action", "switch", Switch)
    parser.set_defaults(fmt="table", limit=EVERY, verbose=False, ansi=None, no_pager=False, columns=None)  # listings
    parser.add_argument("-h", "--help", action="help")
    for flags, settings in COMMANDS[path].options:
        parser.add_argument(*flags, **settings)
    return parser


def spelled(flags, settings):
    """Return an option as help spells it: `-f, --extra-filter FILTER`, `--[no-]ansi`, `ID`."""
    if settings.get("action") == "switch":
        return "--[no-]" + flags[0][2:]
    names = [flag for flag in flags if flag.startswith("-")]
    return (", ".join(names) + " " + settings.get("metavar", "")).strip()


def _command_help(path):
    """Return the help of a command: usage, what it does, its options, an example.

    With the prompt after it, it must fit a screen of 24 lines."""
    import textwrap
    row = COMMANDS[path]
    width = os.environ.get("COLUMNS", "")
    width = min(100, int(width)) if width.isdigit() else 80  # asking the terminal would need a slow import
    rows = [(spelled(flags, settings), settings["help"]) for flags, settings in row.options if settings["help"]]
    places = [("[%s ...]" if "nargs" in settings else "%s") % settings["metavar"]
              for flags, settings in row.options if not flags[0].startswith("-")]
    places = ["[options]"] * (len(places) < len(rows)) + places + [row.rest or ""]
    lines = ["usage: " + " ".join([program(), path] + places).strip()]
    lines += textwrap.wrap(row.help, width) + [""] * bool(rows)
    wide = max([len(name) for name, _ in rows], default=0)
    for name, help in rows:
        lines += textwrap.wrap(help, width, initial_indent="  %-*s  " % (wide, name),
                               subsequent_indent=" " * (wide + 4), break_on_hyphens=False)
    return "\n".join(lines) + "\nexample: " + row.example.replace("\n", "\n         ")


def parse(path, words):
    """Return the options of a command; what follows `--` goes to `rest` if the command takes that."""
    row, parser, rest = COMMANDS[path], make_parser(path), None
    if row.rest and "--" in words:
        cut = words.index("--")
        words, rest = words[:cut], words[cut + 1:]
    words, others = row.sort(words) if row.sort else (words, {})
    options, extra = parser.parse_known_args(words)
    if extra and hasattr(options, "ids") and not any(word.startswith("-") for word in extra):
        options.ids, extra = options.ids + extra, []  # argparse does not take ids on both sides of an option
    if extra:
        parser.error(_unexpected(extra[0], path, options, rest))
    own = {flag: settings for flags, settings in row.options for flag in flags}
    vars(options).update(others, rest=rest, own=dict(own, **dict.fromkeys(("-h", "--help"), {"action": "help"})))
    return options


def _unexpected(word, path, options, rest):
    """Return what is wrong with a word that a command does not take, and what may have been meant."""
    row, flag = COMMANDS[path], word.split("=")[0]
    own = [name for flags, _ in row.options for name in flags if name.startswith("-")]
    others = [name for name, other in COMMANDS.items() for flags, _ in other.options if flag in flags]
    if getattr(options, "extra_filter", None) and (word in COMPARISONS or word in ("and", "or", "in", "=", "!=")):
        return "unexpected %s after -f %s: the filter has to be one word, in single quotes: -f 'args.lr == 0.1'" % (
            word, options.extra_filter)
    if "--id" in own and re.match(r"[0-9a-f-]{4,36}\Z", word):
        return "unexpected %s: a single task is chosen by --id %s" % (word, word)
    bare = {name.strip("-"): name for name in own}
    like = bare.get(nearest(flag.strip("-"), bare, 0.7))
    if flag.startswith("-") and (others or like or not row.rest or rest is not None):
        return "unknown option %s%s" % (flag, "; did you mean %s?" % like if like else others and (
            ", an option of %s" % ", ".join(others[:3])) or "")
    if row.rest and rest is None:
        return "unexpected %s: what is not for labtasker itself goes after --, as in: %s" % (
            flag, row.example.split("\n")[0])
    return "unexpected argument " + word


# ---- From a command line to a command


def group(word):
    """Return the commands that start with a word such as `task`; all for ""."""
    return [path for path in COMMANDS if COMMANDS[path].help and path.startswith(word and word + " ")]


_SYNONYMS = {name: word for word, others in (  # a word that people type: the word that it is here
    ("ls", "list show"), ("delete", "rm remove del"), ("cancel", "kill stop abort"), ("submit", "add create new push"),
    ("retry", "rerun restart requeue reset"), ("get", "info describe"), ("logs", "log output"), ("count", "stats"),
    ("loop", "run work worker start"), ("serve", "server"), ("update", "edit set")) for name in others.split()}


def find_command(words):
    """Return (path, the words after it); raises a UsageError that offers the nearest command."""
    for size in (2, 1):
        path = " ".join(words[:size])
        if path in EXTRA_COMMANDS:
            extras_for("labtasker " + path)
        if path in COMMANDS:
            return path, words[size:]
    extras()
    if words[0].startswith("-"):
        raise UsageError("options go after the command, as in: labtasker task ls %s" % words[0])
    inner = [path.split()[1] for path in group(words[0])]
    word = words[1] if inner and words[1:] else words[0]
    alike = [path for path in COMMANDS if path.split()[-1] == _SYNONYMS.get(word) and words[0] in path.split() + [word]]
    alike = alike or [path for path in COMMANDS if path.split()[-1] == word]
    best = "; did you mean %s?" % " or ".join(alike) if alike else hint(
        word, inner or {path.split()[0] for path in group("") + list(EXTRA_COMMANDS)})
    raise UsageError("there is no command %s%s (%s)" % (
        " ".join(words[:2]), best, "there are " + ", ".join(inner) if inner else "labtasker --help lists them"))


def _show_help(words):
    """Show the help of a command, or the list of commands that start with `words`; raises UsageError if there is
    none."""
    path = " ".join(words)
    extras()
    if path not in COMMANDS and not group(path):
        topics = sorted(name[5:] for name in set(COMMANDS).union(EXTRA_COMMANDS) if name.startswith("help "))
        raise UsageError("there is no help on %s%s (topics: %s, and every command)" % (
            brief(path), hint(path, topics + list(COMMANDS)), ", ".join(topics)))
    show("\n\n".join([help_of(path)] + ([job_reference()] if path == "loop" else [])))


def help_of(path):
    """Return the help of a command, or the list of the commands whose path starts with `path`."""
    if path in COMMANDS:
        return _command_help(path)
    listed = group(path) if path else [
        name for word in EVERYDAY for name in group("") if name.split()[0] == word and name not in SELDOM]
    wide = max(map(len, listed))
    lines = ["usage: %s %sCOMMAND ...; COMMAND --help explains it" % (program(), path and path + " ")]
    lines += [""] * bool(path)
    lines += ["  %-*s  %s" % (wide, name, COMMANDS[name].help.split(". ")[0].rstrip(".")) for name in listed]
    lines += ["  " + line for line in _other_commands()] if not path else []
    return "\n".join(lines + ["example: " + COMMANDS[listed[0]].example.split("\n")[0]])


def _other_commands():
    """Return the lines that list the commands other than EVERYDAY's, those with the same noun together."""
    nouns = {}
    for path in group(""):
        if path in SELDOM or path.split()[0] not in EVERYDAY:
            nouns.setdefault(path.split()[0], []).append(path.partition(" ")[2])
    rest = sorted(nouns, key=lambda noun: (noun == "help", list(nouns).index(noun)))
    single = [(noun + " " + nouns[noun][0]).strip() for noun in rest if not nouns[noun][1:]]
    lines = []
    for text in ("%s %s" % (noun, ", ".join(filter(None, nouns[noun]))) for noun in rest if nouns[noun][1:]):
        has_room = lines and len(lines[-1] + text) <= 74
        lines[-1:] = ["%s; %s" % (lines[-1], text)] if has_room else lines[-1:] + [text]
    missing = ", ".join(name for name in EXTRA_COMMANDS if name not in COMMANDS)
    return [", ".join(single)] + lines + (
        ["With labtasker_cli.py beside labtasker.py there are also: " + missing] if missing else [])


def _become_init():
    """Fork, for process 1 of a container, and return in the child. Process 1 itself only reaps ended processes.

    The child must not reap orphans itself: a wait for any child would take its own jobs too. Process 1 passes signals
    on, except those of a terminal, which the child gets itself, and ends with the child's exit code."""
    import signal
    every = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        received = signal.sigwaitinfo(every)
        if received.si_signo != signal.SIGCHLD and received.si_code <= 0:  # over 0: from the kernel, as at Ctrl-C
            os.kill(child, received.si_signo)
        for pid, status in iter(_reap, None):
            if pid == child:
                os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _reap():
    """Reap a child that has ended; return (pid, status), or None if there is none."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
        return (pid, status) if pid else None
    except ChildProcessError:
        return None


def _run_command(words):
    """Run a command line, which is UTF-8 whatever the locale is; return its exit code."""
    words = [os.fsencode(word).decode("utf-8") for word in words]
    if words[:1] in (["--version"], ["-V"]):
        return say("labtasker " + __version__)
    if not words:
        extras()
        return note(help_of("")) or 2
    asks = [word in ("-h", "--help") for word in words[:2]]
    if asks[0] or any(asks) and words[0] not in COMMANDS and words[0] not in EXTRA_COMMANDS:
        return _show_help(words[:asks.index(True)])
    path, words = find_command(words)
    options = parse(path, words)
    if os.getpid() == 1 and path in ("loop", "serve"):
        _become_init()
    if path.split()[0] in ("task", "worker", "health", "loop") and not getattr(options, "dry_run", False):
        deliver_outbox()
    return COMMANDS[path].run(options)


def deliver_outbox():
    """Deliver reports that loops here have saved. No error if the server is away: the command itself will report it."""
    try:
        if outbox_reports() and deliver_kept():
            note("Delivered results saved while the server was unreachable.")
        deliver_ends()
    except LabtaskerError:
        pass


def main(argv=None):
    """Run a command line; return its exit code, one of EXIT_CODES. The only place that prints errors."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when this process started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    words = sys.argv[1:] if argv is None else argv
    is_json = _wants_json(words)
    try:
        code = _run_command(words) or 0
        sys.stdout.flush()
        return tell_error(code, is_json) if isinstance(code, Ended) else code
    except SystemExit as error:  # argparse after --help, or `confirm` after a no
        return error.code or 0
    except KeyboardInterrupt:
        is_json or note("")
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        silence()
        return 0
    except Exception as error:
        if os.environ.get("LABTASKER_DEBUG"):
            raise
        return tell_error(error, is_json)


def _wants_json(words):
    """Return whether JSON is asked for, by words that may be wrong otherwise; what follows `--` is another's."""
    words = words[:words.index("--")] if "--" in words else words
    asked = [after for word, after in zip(words, words[1:] + [""]) if word == "--fmt"]
    asked += [word[6:] for word in words if word.startswith("--fmt=")] + ["json"] * ("--json" in words)
    return any(word in ("json", "jsonl") for word in asked)


# ---- The table
ID = option("ID", "the task's id, or its first letters", dest="task_id")
_ID_ARGUMENTS = option(
    "ID", "task ids; without ids and selectors, or for -, from stdin", dest="ids", nargs="*", default=[])
_WORKER = option("ID", "the worker's id, or its first letters", dest="worker_id")
_QUIET = option("-q --quiet", "print only ids")
_SILENT = option("-q --quiet", "print nothing")
_YES = option("-y --yes", "ask nothing")
_DRY_RUN = option("--dry-run", "only show which tasks match")
_IDLE = option("--dry-run", "check, and say what would be done; change nothing")


def formats(*first, **settings):
    """Return the rows of --fmt and of --json, which is short for --fmt json and has no line of its own in the help."""
    text = "|".join(first + FORMATS) + "; --json is --fmt json"
    return [choice("--fmt FORMAT", first + FORMATS, help=text, **settings),
            option("--json", None, dest="fmt", action="store_const", const="json")]


_AS_TABLE = formats("table")


_NO_PAGER = option("--no-pager", "do not use $PAGER")
_METADATA = option("--metadata DICT", "JSON or Python literal: '{\"tags\": [\"v1\"]}'")
_COLOUR = [switch("ansi", "always use colour, or never (default: on a terminal)")]
_FILTER = _option_of("extra_filter", LOOP_OPTIONS["extra_filter"])
SELECT = [option("--id --task-id ID", "the task with this id", dest="task_id"),
          option("--name --task-name NAME", "tasks with this name", dest="task_name"),
          choices("-s --status STATUS", TASK_STATES), _FILTER]
_LIST = [option("--limit N", "show at most N (100)", type=count, default=MOST_LISTED),
         option("--offset N", "skip the first N", type=count, default=0),
         *_AS_TABLE,
         option("-v --verbose", "more columns, no value cut"), _NO_PAGER] + _COLOUR
QUEUE = [option("--queue-name NAME", "letters, digits, _ and -"),
         option("--password PASSWORD", "default: LABTASKER_PASSWORD, else a prompt")]
_JOURNAL = option("--db-path FILE", "the journal (that of the configured store)", type=for_system)
_SILENCE = _option_of("heartbeat_timeout", LOOP_OPTIONS["heartbeat_timeout"])


def _field_option(name, field):
    """Return the option of `task submit` that sets a field of the task."""
    words = field.meaning.split(";")[0] + {"dict": ", as JSON or Python literal"}.get(field.kind, "")
    words += " (%d)" % field.default if field.kind in ("count", "int") else ""
    return option(field.flag, words, dest=name, **_OPTION_KINDS.get(field.kind, {}))


COMMANDS = {
    "task submit": Command(
        do_task_submit, "Queue tasks. Values are Python literals, else text; a dot makes a nested key.",
        "labtasker task submit --name grid -- --lr=0.001 --opt.momentum=0.9\n"
        "labtasker task submit --grid -- --lr=0.1,0.01 --seed=1:5:1", [
            *[_field_option(name, field) for name, field in SUBMITTED.items() if field.flag],
            option("--grid", "one task for each combination of comma-separated values and start:stop:step ranges, "
                   "stop included"),
            option("--sample N", "N tasks of random values: LOW:HIGH, log:LOW:HIGH, or a,b", type=count),
            option("--seed S", "the same number draws the same sample", type=count),
            option("--from FILE", "one task for each JSON line or CSV row; - is stdin", dest="from_file",
                   type=for_system),
            option("--unique", "skip tasks whose name and arguments already exist"),
            option("--dry-run", "print what would be submitted, as JSON lines"), _QUIET] + _AS_TABLE,
        "[-- --NAME=VALUE ...]"),
    "task ls": Command(
        do_task_ls, "List tasks, the least recently changed first.",
        "labtasker task ls -s success -f 'args.lr > 0.01' -S summary.acc:desc", SELECT + [
            option("-S --sort FIELD:asc|desc", "repeatable", action="append", default=[]),
            option("--columns FIELD,...", "show these columns: summary.acc,args.lr,name,duration"),
            option("--piped-in", "only tasks whose ids are on stdin"), _QUIET] + _LIST),
    "task get": Command(
        do_task_get, "Show one task with all its fields.", "labtasker task get 3f2a",
        [ID] + formats(default="yaml") + [_NO_PAGER]),
    "task count": Command(
        do_task_count, "Count tasks by status, or by another field.", "labtasker task count --by args.model",
        SELECT + [option("--by FIELD", "count by this field"), option("-q --quiet", "print only the total")] + _AS_TABLE
        + _COLOUR),
    "task table": Command(
        do_task_table, "Compare groups of tasks by the mean of a value.",
        "labtasker task table --by args.lr --of summary.acc", [
            option("--by FIELD", "group by this field, or by several joined by commas", action="append", required=True),
            option("--of FIELD", "the value that is compared, such as summary.acc", required=True),
            option("--max", "the largest mean is best (default)", dest="mode", action="store_const", const="max",
                   default="max"),
            option("--min", "the smallest mean is best", dest="mode", action="store_const", const="min"),
            option("--name --task-name NAME", "tasks with this name", dest="task_name"),
            choices("-s --status STATUS", TASK_STATES, default="success"), _FILTER,
            *formats("table", "md")] + _COLOUR),
    "task update": Command(
        do_task_update, "Change fields of tasks in one transaction. All other fields stay.",
        "labtasker task update -s failed -u args.lr=0.005 --reset-pending", SELECT + [
            option("-u --update FIELD=VALUE", "repeatable: args.lr=0.005, 'metadata.tags=[\"v2\"]', status=cancelled",
                   action="append"),
            option("--reset-pending", "make them pending again, with retries at 0"),
            option("--editor", "open them in $EDITOR (the default without updates)"),
            option("--limit N", "change at most N (all)", type=count), _DRY_RUN,
            _YES, option("-q --quiet", "ask nothing, print nothing")] + _AS_TABLE,
        "[-- FIELD=VALUE ...]"),
    "task delete": Command(
        do_task_delete, "Delete tasks. If one of the ids is unknown, none is deleted.",
        "labtasker task ls -s failed -q --limit 10000 | labtasker task delete -y",
        [_ID_ARGUMENTS] + SELECT + [_DRY_RUN, _YES, _SILENT] + _AS_TABLE),
    "task retry": Command(
        do_task_retry, "Make failed or selected tasks pending again. Resets their retries to 0.",
        "labtasker task retry -f 'args.model == \"vit\"' --dry-run",
        [option("ID", "task ids; without ids and selectors, all failed ones", dest="ids", nargs="*", default=[])]
        + SELECT + [_DRY_RUN, _YES, _QUIET] + _AS_TABLE),
    "task cancel": Command(
        do_task_cancel, "Cancel the selected tasks that are pending or running. Jobs end within seconds.",
        "labtasker task cancel --name grid -f 'args.lr > 0.5'", [_ID_ARGUMENTS] + SELECT + [_DRY_RUN, _YES, _SILENT]
        + _AS_TABLE),
    "task wait": Command(
        do_task_wait, "Wait until no selected task is pending or running. Exit 4 if any failed.",
        "labtasker task wait --name grid && echo done", SELECT + [
            option("--timeout TIME", "wait no longer; exit 124", type=seconds),
            option("--expect N", "exit 1 if fewer match", type=count), _SILENT] + _AS_TABLE),
    "task why": Command(
        do_task_why, "Say why a task is not running, and its place in line.",
        "labtasker task why 3f2a -- python train.py --lr '%(lr)'", [ID, _FILTER] + _AS_TABLE,
        "[-- COMMAND ...]"),
    "task logs": Command(
        do_task_logs, "Print the output of a task's last run, or of an earlier one.",
        "labtasker task logs 3f2a -f",
        [ID, option("-f --follow", "keep printing while it runs"),
         option("--tail N", "print the last N lines", type=count),
         option("--attempt N", "the Nth run that the task still has (the last)", type=count)]),
    "task history": Command(
        do_task_history, "Print the points that a task's runs have reported with a step.",
        "labtasker task history 3f2a --fmt csv", [ID] + formats("table", default="table") + [_NO_PAGER]),
    "task harvest": Command(
        do_task_harvest, "Read results from the output of tasks, as loop --metric does.",
        "labtasker task harvest --metric 'acc=accuracy: ([0-9.]+)' -s success",
        [option("ID", "task ids; without ids and selectors, all tasks", dest="ids", nargs="*", default=[]),
         _option_of("metrics", LOOP_OPTIONS["metrics"]), _option_of("step", LOOP_OPTIONS["step"])]
        + SELECT + [option("--dry-run", "change nothing")]),
    "report": Command(
        do_report, "In a job: merge values into the summary of its task. Exit 1 if the job should end.",
        "labtasker report acc=0.9 --step 3",
        [option("NAME=VALUE", "values are Python literals, else text; a dot makes a nested key", dest="values",
                nargs="+"),
         option("--step N", "the step that the values belong to", type=literal)]),
    "help template": Command(
        lambda options: show(template_reference()), "Print the placeholders of commands and the variables of a job.",
        "labtasker help template"),
    "loop": Command(
        do_loop, "Run a command for each pending task whose arguments it takes. Ends when none is left.",
        "labtasker loop -- python train.py --lr '%(lr)' --model '%(model)'",
        _options_of(LOOP_OPTIONS), "[-- COMMAND ...]"),
    "serve": Command(
        do_serve, "Run a server, so that several hosts share a store.", "labtasker serve --host 0.0.0.0 --port 9321",
        _options_of(SERVE_OPTIONS)),
    "health": Command(
        do_health, "Say whether the server or store answers; exit 3 if not.", "labtasker health", _AS_TABLE),
    "queue create": Command(do_queue_create, "Create a queue.",
                            "labtasker queue create --queue-name sweep --password secret",
                            QUEUE + [_METADATA, _QUIET, _IDLE]),
    "queue create-from-config": Command(
        do_queue_create_from_config, "Create the configured queue if it does not exist.",
        "labtasker queue create-from-config", [_METADATA, _IDLE]),
    "queue get": Command(
        do_queue_get, "Show the queue.",
        "labtasker queue get", [option("-q --quiet", "print only its id")] + formats(default="yaml")),
    "queue pause": Command(
        do_queue_pause, "Have the queue give out no task. What runs goes on; loops wait.", "labtasker queue pause",
        _AS_TABLE),
    "queue resume": Command(
        do_queue_resume, "Have a paused queue give out tasks again.", "labtasker queue resume", _AS_TABLE),
    "queue update": Command(
        do_queue_update, "Rename the queue, change its password or metadata.",
        "labtasker queue update --new-queue-name sweep2", [
            option("--new-queue-name NAME", "letters, digits, _ and -"),
            option("--new-password PASSWORD", "1 to 100 letters; without a value there is a prompt, or a random one is "
                   "printed", nargs="?", const=True), _METADATA, _SILENT, _IDLE]),
    "queue delete": Command(
        do_queue_delete, "Delete the queue.",
        "labtasker queue delete --cascade --yes",
        [option("--cascade", "also delete its tasks and workers"), _YES, _IDLE]),
    "worker create": Command(
        do_worker_create, "Register a worker and print its id.", "labtasker worker create --worker-name gpu0", [
            option("--worker-name --name NAME", "letters, digits, _ and -", dest="worker_name"), _METADATA,
            option("--max-retries N", "failed runs after which it gets no more tasks (3)", type=count, default=3),
            _QUIET, _IDLE]),
    "worker ls": Command(
        do_worker_ls, "List workers.", "labtasker worker ls -s crashed", [
            option("--id --worker-id ID", "the worker with this id", dest="worker_id"),
            option("--name --worker-name NAME", "workers with this name", dest="worker_name"),
            choices("-s --status STATUS", WORKER_STATES), _FILTER,
            option("--all", "also those whose loops have ended"), _QUIET] + _LIST),
    "worker report": Command(
        do_worker_report, "Set a worker active, suspended or crashed.", "labtasker worker report ID active",
        [_WORKER, choice("STATUS", WORKER_STATES, dest="status"), _IDLE]),
    "worker delete": Command(
        do_worker_delete, "Delete a worker.", "labtasker worker delete ID --yes", [
            _WORKER, switch("cascade-update", "clear its id in its tasks (the default), or not", default=True), _YES,
            _IDLE]),
    "event listen": Command(
        do_event_listen, "Print the state changes of tasks and workers until Ctrl-C. Reconnects.",
        "labtasker event listen --compact --until-idle", [
            option("-c --compact", "one line for each event"),
            option("--raw --json", "one line of JSON for each event", dest="raw"),
            option("--after ID", "begin after the event with this id; 0.0: with the oldest (help events)"),
            option("--max N", "end after N events", type=count, dest="most"),
            option("--until-idle", "end once no task is pending or running"),
            option("--exec CMD", "run CMD in a shell for each event, with its JSON on stdin, one at a time; print "
                   "nothing. Exit 1 if it failed for any"),
            option("--exec-timeout TIME", "end CMD after this time (1m); that is a failure", type=seconds, default=60),
            option("--timeout TIME", "give up connecting after this time (10)", type=seconds, default=10)]),
    "journal verify": Command(
        do_journal_verify, "Check a journal for damage, even one in use. Exit 1 if there is any.",
        "labtasker journal verify --db-path old/journal.jsonl", [_JOURNAL]),
    "journal repair": Command(
        do_journal_repair, "Replace a damaged journal by its good lines. The damaged file is kept.",
        "labtasker journal repair", [_JOURNAL, _YES, _IDLE]),
    "journal compact": Command(
        do_journal_compact, "Compact a journal to its live data. This also happens automatically.",
        "labtasker journal compact", [_JOURNAL]),
    "journal stats": Command(
        do_journal_stats, "Print the size of a journal and what it consists of.",
        "labtasker journal stats", [_JOURNAL]),
    "server status": Command(
        do_server_status, "Say whether the store's server runs, and where. Exit 3 if none answers.",
        "labtasker server status", [_JOURNAL] + formats(default="yaml")),
    "server stop": Command(
        do_server_stop, "Stop the store's server and wait until it has ended. Exit 1 if none runs on this host.",
        "labtasker server stop", [
            _JOURNAL, option("--timeout TIME", "wait no longer (1m)", type=seconds, default=60)]),
    "init": Command(
        do_init, "Write the configuration, test it, and create the queue.",
        "labtasker init --url http://head:9321 --queue-name sweep",
        [option("--url URL", "URL of a server, or a folder for a store without a server")] + QUEUE + [
            option("-y --yes", "ask nothing: overwrite, keep, use defaults")]),
    "demo": Command(
        do_demo, "Run a small sweep in a temporary folder, showing each command.",
        "labtasker demo"),
    "help filter": Command(
        lambda options: show(filter_reference()), "Print the filter language: operators, dates, a task's fields.",
        "labtasker help filter"),
    "help settings": Command(
        lambda options: show(settings_reference()),
        "Print the settings of config.toml, and the variables that override it.",
        "labtasker help settings"),
    "help events": Command(
        lambda options: show(events_reference()), "Print how to receive events, also past ones: shell, Python, HTTP.",
        "labtasker help events"),
    "help after": Command(
        lambda options: show(after_reference()), "Print what tasks that wait for others do.", "labtasker help after"),
    "help exit": Command(
        lambda options: show(exit_reference()), "Print the exit codes.", "labtasker help exit"),
    "help journal": Command(
        lambda options: show(journal_reference()), "Print the format of the journal.",
        "labtasker help journal"),
    "help": Command(lambda options: _show_help(options.topic), "List the commands, or print the help of one.",
                    "labtasker help task submit",
                    [option("COMMAND", "words of a command, or a topic", dest="topic", nargs="*")]),
}

# The public API. All other names without an underscore are for other sections and labtasker_cli.py.
__all__ = """
    loop Required Annotated finish task_info current_task_id current_worker_id is_enabled get_labtasker_log_dir
    time_left preempted set_prompt_on_task_failure set_loop_internal_error_handler health_check create_queue
    get_queue update_queue delete_queue submit_task submit_tasks submit_grid submit_sample as_completed fetch_task
    get_task get_history table report should_stop task_dir report_task_status refresh_task_heartbeat ls_tasks
    update_tasks delete_task create_worker ls_workers report_worker_status delete_worker connect_events EventListener
    Task Worker Queue TaskUpdateRequest LabtaskerError LabtaskerRuntimeError LabtaskerValueError LabtaskerTypeError
    LabtaskerNetworkError LabtaskerHTTPStatusError LabtaskerConnectError WorkerSuspended TaskCancelled TransientError
    TaskError FatalWorkerError api_models
""".split()


def __dir__():
    """Return what `labtasker.<Tab>` shows, from Python 3.7 on."""
    return __all__ + ["__version__", "__doc__", "__file__", "__name__", "__all__"]


if __name__ == "__main__":
    sys.exit(main())
