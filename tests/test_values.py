"""Errors, ids, names, dotted keys, times."""
import array
import collections
import copy
import datetime
import decimal
import enum
import json
import math
import multiprocessing
import pathlib
import pickle
import unittest.mock
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labtasker
import labtasker_cli

KEYS = st.text("abcXYZ019_-", min_size=1, max_size=4)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=12)
TREES = st.dictionaries(KEYS, JSON, max_size=4)
INSTANTS = st.integers(-2 * 10 ** 15, 10 ** 17).map(lambda micros: labtasker.Instant(micros / 10 ** 6))


def flat(tree, prefix=""):
    """Return the tree with one dotted key a leaf."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, prefix + key + "."))
        else:
            found[prefix + key] = value
    return found


@pytest.mark.parametrize("given_, nested", [
    ({}, {}),
    ({"a": 1}, {"a": 1}),
    ({"foo.bar": 1}, {"foo": {"bar": 1}}),
    ({"a.b": 1, "a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
    ({"a": {"c": 2}, "a.b": 1}, {"a": {"b": 1, "c": 2}}),
    ({"a": {"b.c": 1}}, {"a": {"b": {"c": 1}}}),
    ({"a": {}}, {"a": {}}),
    ({"a": [{"b.c": 1}]}, {"a": [{"b": {"c": 1}}]}),
    ({"a-b_C.0": None}, {"a-b_C": {"0": None}}),
])
def test_dotted_keys_are_paths_at_every_level(given_, nested):
    assert labtasker.unflatten(given_) == nested


@pytest.mark.parametrize("given_, named", [
    ({"a": 1, "a.b": 2}, ["'a'", "'a.b'"]),
    ({"a.b": 2, "a": 1}, ["'a'", "'a.b'"]),
    ({"a.b": 1, "a": {"b": 2}}, ["'a.b'"]),
    ({"a.b.c": 1, "a": {"b": 2}}, ["'a.b.c'", "'a.b'"]),
])
def test_a_path_set_twice_is_refused_and_both_are_named(given_, named):
    with pytest.raises(labtasker.InvalidFields) as caught:
        labtasker.unflatten(given_)
    assert caught.value.status == 422
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b", "$a", "a b", "a\n", "é", "a/b", 1, None, ("a",)])
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"x": d}, lambda d: {"x": [d]}])
def test_an_odd_key_is_refused_wherever_it_stands(key, wrap):
    with pytest.raises(labtasker.InvalidFields) as caught:
        labtasker.unflatten(wrap({key: 1}))
    assert repr(key) in str(caught.value)
    assert caught.value.detail[0]["loc"][:2] == ["body", "args"]


def test_too_many_keys_or_levels_are_refused_at_the_field_that_has_them(monkeypatch):
    monkeypatch.setattr(labtasker, "_MAX_KEYS", 3)
    wide, deep = {"a": 1, "b.c": 2, "d": 3}, ".".join("x" * (labtasker.MAX_DEPTH + 1))
    assert labtasker.unflatten(wide) == {"a": 1, "b": {"c": 2}, "d": 3}
    for given_ in (dict(wide, e=4), {deep: 1}):
        for tree in (given_, {"k": [given_]}):
            with pytest.raises(labtasker.InvalidFields, match="more than 100 levels or 3 keys") as caught:
                labtasker.unflatten(tree, "summary")
            assert caught.value.detail[0]["loc"] == ["body", "summary"]


@given(TREES)
def test_nesting_undoes_flattening_and_changes_no_tree_without_dots(tree):
    assert labtasker.unflatten(flat(tree)) == tree == labtasker.unflatten(tree)


@given(TREES, TREES)
def test_merging_keeps_what_is_old_and_sets_what_is_new(old, new):
    before = repr((old, new))
    merged = labtasker.merge(old, new)
    assert repr((old, new)) == before
    assert labtasker.merge(merged, new) == merged
    assert set(merged) == set(old) | set(new)
    for key, value in flat(new).items():
        assert labtasker.get_path(merged, key.split("."), "gone") == value or value == {}


def test_dig_gives_what_stands_at_a_path_or_the_default():
    assert labtasker.get_path({"a": {"b": 1}}, ["a", "b"]) == 1
    assert labtasker.get_path({"a": {"b": 1}}, ["a", "b", "c"], 7) == 7
    assert labtasker.get_path({"a": None}, ["a"], 7) is None
    assert labtasker.get_path(5, []) == 5


def test_ids_are_random_uuid4_text():
    ids = [labtasker.new_id() for _ in range(200)]
    assert len(set(ids)) == 200
    assert all(uuid.UUID(i).version == 4 and str(uuid.UUID(i)) == i for i in ids)


def test_nearest_is_the_one_most_alike_or_none():
    assert labtasker.nearest("statos", ["status", "args"]) == "status"
    assert labtasker.nearest("zzz", ["status", "args"]) is None


@given(INSTANTS)
def test_a_time_survives_being_written_and_read(instant):
    text = labtasker.format_time(instant)
    again = labtasker.parse_time(text)
    assert again == instant and type(again) is labtasker.Instant
    assert labtasker.format_time(again) == text
    assert labtasker.to_datetime(instant).isoformat(timespec="microseconds") == text
    assert labtasker.to_datetime(instant).utcoffset() == datetime.timedelta(0)


@pytest.mark.parametrize("text, utc", [
    ("2026-11-22T06:00:00.123456+00:00", "2026-11-22T06:00:00.123456+00:00"),
    ("2026-11-22T06:00:00", "2026-11-22T06:00:00.000000+00:00"),
    ("2026-11-22T06:00:00Z", "2026-11-22T06:00:00.000000+00:00"),
    ("2026-11-22 06:00", "2026-11-22T06:00:00.000000+00:00"),
    ("2026-11-22", "2026-11-22T00:00:00.000000+00:00"),
    ("2026-11-22T06:00:00.5+05:30", "2026-11-22T00:30:00.500000+00:00"),
    ("2026-11-22T06:00:00.1234569-0100", "2026-11-22T07:00:00.123456+00:00"),
    ("2026-11-22T06:00:00-01", "2026-11-22T07:00:00.000000+00:00"),
    ("1969-12-31T23:59:59.999999Z", "1969-12-31T23:59:59.999999+00:00"),
])
def test_iso_times_are_read_and_without_a_zone_they_are_utc(text, utc):
    assert labtasker.format_time(labtasker.parse_time(text)) == utc


@pytest.mark.parametrize("text", [
    "", "now", "2026-11-22T", "2026-02-30", "2026-11-22T25:00:00", "2026-11-22T06:00:00+99:00",
    "2026-11-22T06:00:00Zz", "2026-11-22T06:00:00\n", "26-11-22", "٢٠٢٦-11-22"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError):
        labtasker.parse_time(text)


def test_a_syntax_mistake_shows_the_line_and_a_caret_under_the_column():
    mistake = labtasker.FilterError("odd", "first\n  second line", 10)
    assert str(mistake).splitlines() == ["odd", "    second line", "    " + "  ^"]
    assert (mistake.message, mistake.column, mistake.status) == ("odd", 10, 400)


def test_a_syntax_mistake_far_to_the_right_is_still_in_view_and_control_characters_are_not():
    shown, caret = str(labtasker.FilterError("odd", "x\x1b" * 500 + "!" + "y" * 500, 1000)).splitlines()[1:]
    assert shown[caret.index("^")] == "!" and len(shown) <= 120 and "\x1b" not in shown


MADE_WITH = {  # what the errors that take arguments of their own are made with
    "LabtaskerHTTPStatusError": (409, [{"loc": ["body", "args"], "msg": "no"}], "http://h"), "SyntaxMistake": ("no", "a b\nc", 4),
    "FilterError": ("no", "a b", 2), "RuleError": ("no", "asha", 2), "TemplateError": ("no", "%(", 0), "InvalidFields": ([(["body"], "no")],)}
ERRORS = sorted({kind for module in (labtasker, labtasker_cli) for kind in vars(module).values()
                 if isinstance(kind, type) and issubclass(kind, labtasker.LabtaskerError)}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickle_and_copy_with_all_that_it_says(kind):
    try:
        error = kind(*MADE_WITH.get(kind.__name__, ("what went wrong",)))
    except TypeError:
        pytest.fail("%s takes arguments of its own: add them to MADE_WITH" % kind.__name__)
    error.extra = "by hand"
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies + [copy.copy(error), copy.deepcopy(error)]:
        assert (type(other), str(other), other.args, vars(other), other.status) == (
            kind, str(error), error.args, vars(error), error.status)


class OfAUser(labtasker.LabtaskerHTTPStatusError):
    def __init__(self):
        super().__init__(404, "gone")


def test_an_error_that_a_user_made_of_ours_survives_pickle():
    assert str(pickle.loads(pickle.dumps(OfAUser()))) == "gone"


@pytest.mark.slow
def test_the_answer_of_a_pool_whose_call_raised_an_error_of_ours_is_that_error():
    with multiprocessing.Pool(1) as pool:
        with pytest.raises(labtasker.FilterError) as found:
            pool.apply_async(labtasker.parse_filter, ("nosuch == 1", ["args"], 0)).get(60)
    assert found.value.column == 0 and found.value.text == "nosuch == 1"


# What scripts hold, as JSON


class Scalar:
    """As numpy.float32 and a tensor without dimensions behave."""

    def __init__(self, value):
        self.content = value

    def item(self):
        return self.content

    tolist = item


class Many:
    """As an array behaves."""

    def __init__(self, *values):
        self.values = values

    def item(self):
        raise ValueError("can only convert an array of size 1")

    def tolist(self):
        return list(self.values)


class Endless:
    def __getattr__(self, name):
        return self

    def __call__(self):
        return self

    def __repr__(self):
        return "endless"


class NoRepr:
    def item(self):
        raise KeyError

    def __repr__(self):
        raise KeyError


class Whole(int):
    def __int__(self):
        raise ValueError


class Words(dict):
    def items(self):
        raise ValueError("no items")


class Level(enum.IntEnum):
    HIGH = 2


Point = collections.namedtuple("Point", "x y")
HOLDS_ITSELF, DEEP = {}, {}
HOLDS_ITSELF["self"] = HOLDS_ITSELF
for _ in range(300):
    DEEP = {"k": DEEP}

KEPT_IN_JSON = [
    (Scalar(0.5), 0.5), (Scalar(7), 7), (Scalar(True), True), (Many(1, 2.5), [1, 2.5]), (Many(), []), (Many(Scalar(1), [Scalar(2)]), [1, [2]]),
    (pathlib.Path("/data/x"), "/data/x"), ({3, 1, 2}, [1, 2, 3]), (frozenset([1, "a"]), ["a", 1]), ((1, (2,)), [1, [2]]), (Point(1, Scalar(2)), [1, 2]),
    ({1: "a", 2.5: {None: "b", True: "c"}}, {"1": "a", "2.5": {"null": "b", "true": "c"}}), ({Scalar(1): 2}, {"1": 2}), (Level.HIGH, 2),
    (2 ** 64 - 1, 2 ** 64 - 1), (-2 ** 63, -2 ** 63), (math.inf, math.inf), (collections.OrderedDict(a=Scalar(1)), {"a": 1}), (Whole(3), 3),
    (array.array("d", [0.5]), [0.5])]
NOT_JSON = [b"x", 1j, object, datetime.datetime(2026, 1, 1), decimal.Decimal("0.1"), enum.Enum("Colour", "RED").RED, 2 ** 64, Endless(),
            NoRepr(), Words(a=1), HOLDS_ITSELF, DEEP, {(1, 2): 3}, {1: 2, "1": 3}, Many(b"x"), len, iter([1])]


def refused(value):
    return labtasker.Plain(labtasker.refuse_odd).value({"model": value}, ["args"])["model"]


@pytest.mark.parametrize("value, plain", KEPT_IN_JSON, ids=[str(number) for number in range(len(KEPT_IN_JSON))])
def test_numbers_dataclasses_paths_sets_and_tuples_are_taken_everywhere(value, plain):
    assert (refused(value), type(refused(value))) == (plain, type(plain))
    assert labtasker.plain_summary({"x": value})["x"] == labtasker.unflatten({"x": plain}, "summary")["x"]


def test_numbers_of_numpy_are_taken():
    numpy = pytest.importorskip("numpy")
    values = [numpy.float32(0.5), numpy.float64(0.5), numpy.float16(0.5), numpy.longdouble(0.5), numpy.array(0.5), numpy.array([0.5]),
              numpy.array([[0.5]])]
    assert [refused(value) for value in values] == [0.5] * len(values) and {type(refused(value)) for value in values} == {float}
    assert refused({numpy.int64(3): numpy.bool_(True), "a": numpy.arange(3), numpy.str_("s"): numpy.str_("t")}) == {"3": True, "a": [0, 1, 2], "s": "t"}
    assert refused(numpy.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]] and refused(numpy.zeros((0, 2))) == []
    told = labtasker.plain_summary({"c": numpy.complex64(1), "d": numpy.datetime64("2026-01-01"), "acc": numpy.float32(0.25)})
    assert told["acc"] == 0.25 and isinstance(told["c"], str) and "2026-01-01" in told["d"]


@pytest.mark.parametrize("name", ["torch", "jax.numpy"])
def test_numbers_of_torch_and_jax_are_taken(name):
    made = pytest.importorskip(name)
    array = getattr(made, "tensor", None) or made.array
    assert [refused(array(value)) for value in (0.5, [0.5], 3, True)] == [0.5, 0.5, 3, True]
    assert refused({"a": array([1, 2]), "b": made.zeros((2, 2)), "c": array(0.25, dtype=made.bfloat16)}) == {"a": [1, 2], "b": [[0, 0]] * 2, "c": 0.25}


def test_dataclasses_are_taken():
    dataclasses = pytest.importorskip("dataclasses")
    made = dataclasses.make_dataclass("Made", ["lr", ("opt", object, None)])
    assert refused(made(Scalar(0.5), made(pathlib.Path("x")))) == {"lr": 0.5, "opt": {"lr": "x", "opt": None}}
    assert labtasker.plain_summary(made(1)) == {"lr": 1, "opt": None}
    with pytest.raises(labtasker.LabtaskerTypeError):
        refused(made)


@pytest.mark.parametrize("value", NOT_JSON, ids=[str(number) for number in range(len(NOT_JSON))])
def test_what_can_not_be_json_is_refused_by_name_and_is_text_in_a_summary(value, capsys):
    with pytest.raises(labtasker.LabtaskerTypeError, match="^args\\.model"):
        refused(value)
    found = labtasker.plain_summary({"x": value, "acc": 0.5})
    assert found["acc"] == 0.5 and found["x"] is not None
    assert capsys.readouterr().err.startswith("labtasker: summary")
    labtasker.parse_json(json.dumps({"updates": [{"summary": found}]}))
    assert labtasker.unflatten(found, "summary") == found


@pytest.mark.parametrize("given_, kept", [
    ({"val/acc": 1, "mrr@10": 2, "val acc": 3, "$x": 4}, {"val/acc": 1, "mrr@10": 2, "val acc": 3, "$x": 4}),
    ({"val.acc": 1, "val": {"loss": 2}}, {"val": {"acc": 1, "loss": 2}}),
    ({"loss": 1, "loss.val": 2}, {"loss": 1, "loss_val": 2}),
    ({"loss.val": 1, "loss": 2}, {"loss": {"val": 1}, "loss_2": 2}),
    ({"loss": 1, "loss.val": 2, "loss_val": 3}, {"loss": 1, "loss_val": 2, "loss_val_2": 3}),
    ({1: 1, "1": 2}, {"1": 1, "1_2": 2}), ({"": 1, "a.": 2, "b\n": 3, "\ud800": 4}, {"_": 1, "a": {"_": 2}, "b_": 3, "__2": 4}),
    ([1, 2], {"value": [1, 2]}), (0.5, {"value": 0.5}), ({}, {}), (None, None), ({"a": [{"x.y": 1, "x": 2}]}, {"a": [{"x": {"y": 1}, "x_2": 2}]}),
])
def test_whatever_the_keys_of_a_summary_none_of_its_values_is_lost(given_, kept):
    assert labtasker.plain_summary(given_) == kept
    assert kept is None or labtasker.unflatten(kept, "summary") == kept


ODD_KEYS = st.text("a.b_\n", max_size=4) | st.integers(0, 2)


@given(st.dictionaries(ODD_KEYS, st.recursive(st.integers(0, 9), lambda inner: st.dictionaries(ODD_KEYS, inner, max_size=3), max_leaves=6), max_size=5))
def test_a_summary_of_any_keys_is_kept_whole(summary):
    with unittest.mock.patch.object(labtasker, "tell"):
        found = labtasker.plain_summary(summary)
    assert labtasker.unflatten(found, "summary") == found
    assert sorted(map(str, numbers_in(found))) == sorted(map(str, numbers_in(summary)))


def numbers_in(tree):
    return [number for value in tree.values() for number in (numbers_in(value) if isinstance(value, dict) else [value])]


def test_a_summary_that_no_request_can_hold_loses_its_largest_values_alone(monkeypatch):
    monkeypatch.setattr(labtasker, "MAX_BODY_BYTES", 2 ** 20)
    found = labtasker.plain_summary({"acc": 0.5, "all": list(range(10 ** 5)), "boxes": [[]] * 300000})
    assert found["acc"] == 0.5 and len(json.dumps(found)) < 5000
    assert found["all"].startswith("[0, 1, 2")
    assert "value" in labtasker.plain_summary({str(number): "x" * 20 for number in range(40000)})


@pytest.mark.parametrize("where", ["summary", "metadata", "metadata_update"])
def test_keys_of_a_summary_and_of_metadata_are_any_text_without_control_characters(where):
    assert labtasker.unflatten({"val/acc": 1, "x y.z@10": {"p/q": 2}}, where) == {"val/acc": 1, "x y": {"z@10": {"p/q": 2}}}
    for key in ("", ".", "a.", ".a", "a..b", "a\n", "\x00", "\x7f", "\x9f", "\ud800", 1):
        with pytest.raises(labtasker.InvalidFields):
            labtasker.unflatten({key: 1}, where)
    with pytest.raises(labtasker.InvalidFields):
        labtasker.unflatten({"val/acc": 1}, "args")


@pytest.mark.parametrize("values, named", [
    ((1,), {}), ((1, 2), {}), ((1, 2, 3), {}), ((), {"a": 1}), ((1,), {"c": 3}), ((), {"c": 3, "a": 1, "b": 2}),
    ((), {}), ((1, 2, 3, 4), {}), ((1,), {"a": 1}), ((1,), {"d": 4}), ((1, 2), {"b": 2}), ((), {"b": 2})])
def test_a_row_type_makes_what_namedtuple_would(values, named):
    ours, theirs = labtasker.row_type("Row", "a b c", (8, 9)), collections.namedtuple("Row", "a b c")
    theirs.__new__.__defaults__ = 8, 9
    try:
        wanted = theirs(*values, **named)
    except TypeError:
        with pytest.raises(TypeError, match="a, b, c"):
            ours(*values, **named)
        return
    row = ours(*values, **named)
    assert (row, row.a, row.b, row.c, repr(row), hash(row)) == (wanted, wanted.a, wanted.b, wanted.c, repr(wanted), hash(wanted))
    assert row._replace(b=7) == wanted._replace(b=7) and row._asdict() == wanted._asdict() and ours._make("xyz").c == "z"
    with pytest.raises(AttributeError):
        row.a = 1


def test_a_row_survives_pickle_and_copy():
    arg = labtasker.Arg("text", None, True)
    for other in (pickle.loads(pickle.dumps(arg)), copy.copy(arg), copy.deepcopy(arg)):
        assert type(other) is labtasker.Arg and other == arg


def test_a_text_is_cut_only_where_it_is_longer_than_allowed():
    assert labtasker.cut("x" * 60) == "x" * 60 and labtasker.cut("x" * 61) == "x" * 57 + "..." and labtasker.cut("abcdef", 5) == "ab..."


@pytest.mark.parametrize("column", [0, 5, 59, 60, 61, 70, 150, 199])
def test_the_caret_stands_under_the_character_that_is_wrong_in_long_texts_and_later_lines_too(column):
    text = "".join(chr(0x4e00 + i) for i in range(200))
    for before in ("", "first line " * 20 + "\n"):
        _, shown, caret = str(labtasker.FilterError("wrong", before + text, len(before) + column)).split("\n")
        assert shown[caret.index("^")] == text[column] and len(shown) <= 102


def test_a_field_that_may_be_a_key_of_several_is_answered_with_all_of_them():
    fields = ("args", "summary", "metadata", "task_name")
    assert labtasker.field_hint("lr", fields) == "; did you mean args.lr, summary.lr or metadata.lr?"
    assert labtasker.field_hint("lr", ("metadata",)) == "; did you mean metadata.lr?" and labtasker.field_hint("lr", ()) == ""
    assert labtasker.field_hint("name", ("task_name",)) == "; did you mean task_name?"


@pytest.mark.parametrize("started, os_name, shown", [
    ("/usr/bin/labtasker", "posix", "labtasker"), ("lt", "posix", "lt"), ("labtasker-server", "posix", "labtasker"),
    ("train.py", "posix", "python3 -m labtasker"), ("train.py", "nt", "python -m labtasker"), ("", "posix", "python3 -m labtasker")])
def test_the_program_is_named_as_a_user_types_it_on_this_system(monkeypatch, started, os_name, shown):
    monkeypatch.setattr(labtasker.sys, "argv", [started])
    monkeypatch.setattr(labtasker.os, "name", os_name)
    try:
        assert labtasker.program() == shown
    finally:
        monkeypatch.undo()


def test_a_fraction_that_rounds_up_is_the_next_second():
    assert labtasker.format_time(0.9999999) == "1970-01-01T00:00:01.000000+00:00"
    assert labtasker.format_time(0.999999) == "1970-01-01T00:00:00.999999+00:00"
