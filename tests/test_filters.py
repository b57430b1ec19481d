"""Filter text, query documents, what they match, and sorting. Cases: cases/filters.txt and filter_errors.txt."""
import collections
import json
import math
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import labtasker

CASES = pathlib.Path(__file__).with_name("cases")
FIELDS = ["task_id", "status", "task_name", "created_at", "priority", "args", "metadata", "worker_id"]
Record = collections.namedtuple("Record", FIELDS)
Record.__new__.__defaults__ = (None,) * len(FIELDS)
NOW = labtasker.parse_time("2026-11-22T09:00:00Z")
NAN = float("nan")


def blocks(name):
    """Return the blocks of lines of a file of cases, without its comments."""
    lines = (CASES / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [block.split("\n") for block in text.split("\n\n") if block.strip("\n")
            for block in [block.strip("\n")]]


TEXTS = [(text, json.loads(document)) for text, document in blocks("filters.txt")]
ERRORS = blocks("filter_errors.txt")


def written(text):
    return labtasker.parse_filter(text, FIELDS, NOW)


def read(document):
    return labtasker.compile_query(document, FIELDS)


def matches(query, record):
    """Return whether a filter, text or document, matches; a dict stands for a record with these args."""
    record = Record(args=record) if isinstance(record, dict) else record
    document = written(query) if isinstance(query, str) else query
    return read(json.loads(json.dumps(document)))(record)


@pytest.fixture(autouse=True)
def in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC0")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_there_are_cases():
    assert len(TEXTS) > 50 and len(ERRORS) > 70


@pytest.mark.parametrize("text, document", TEXTS)
def test_text_gives_this_document(text, document):
    assert json.dumps(written(text)) == json.dumps(document)
    assert read(document)(Record(args={}, metadata={})) in (True, False)


@pytest.mark.parametrize("text, caret, message", ERRORS)
def test_mistake_in_text_is_told_with_its_column(text, caret, message):
    with pytest.raises(labtasker.FilterError) as caught:
        written(text)
    assert caught.value.message.startswith(message)
    assert caught.value.column == caret.index("^")
    assert str(caught.value).splitlines()[1:] == ["  " + text, "  " + caret.rstrip()]


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_filter_is_a_mistake(text):
    with pytest.raises(labtasker.FilterError, match="the filter is empty"):
        written(text)


@pytest.mark.parametrize("text", [
    "(" * 10000 + "args.a == 1" + ")" * 10000, "-" * 10000 + "1 == args.a", "[" * 10000, "args.a == " + "[" * 10000,
    "args.a == 1" + " + args.b" * 10000, "(" * 10000, "args.a in " + "[" * 10000, "not " * 10000, "exists(" * 10000])
def test_filters_that_nest_without_end_are_mistakes_and_not_crashes(text):
    with pytest.raises(labtasker.FilterError):
        written(text)


@pytest.mark.slow
def test_filters_may_be_long_and_nest_as_people_nest():
    words = " or ".join("args.a == %d" % i for i in range(5000))
    assert matches(words, {"a": 4999}) and not matches(words, {"a": 5000})
    assert matches("(" * 40 + "args.a == 1" + ")" * 40, {"a": 1})
    assert matches("args.a[0]" + "[0]" * 500 + " == None", {"a": 1})
    flat = " or ".join("(-args.b + -2 * 3 > 1) or args.b in [%d]" % i for i in range(100))
    assert matches(flat, {"b": 99}) and not matches(flat, {"b": 100})


@pytest.mark.parametrize("shape", ["and", "not", "list", "dict", "add"])
def test_documents_that_nest_without_end_are_refused(shape):
    document = {"args.a": 1} if shape == "and" else {"$gt": 1} if shape == "not" else 1
    for _ in range(300):
        document = {"and": {"$and": [document]}, "not": {"$not": document}, "list": [document], "dict": {"a": document},
                    "add": {"$add": [document]}}[shape]
    document = {"args.a": document} if shape in ("not", "list", "dict") else document
    with pytest.raises(labtasker.LabtaskerValueError, match="nested more than"):
        read({"$expr": document} if shape == "add" else document)


@pytest.mark.parametrize("before", ["", "args.a + 1 > 0 and "])
def test_a_filters_text_nests_so_deep_and_no_deeper_behind_whatever_there_is_before(before):
    deepest = "(" * labtasker._MAX_NESTING + "args.a == 1" + ")" * labtasker._MAX_NESTING
    assert matches(before + deepest, {"a": 1})
    with pytest.raises(labtasker.FilterError, match="nested more than"):
        written(before + "(%s)" % deepest)


MANY = {  # n parts of one kind
    "or": lambda n: {"$or": [{"args.a": {"$gt": i}} for i in range(n)]}, "and": lambda n: {"$and": [{"args.a": i} for i in range(n)]},
    "nor": lambda n: {"$nor": [{"args.a": {"$lt": i}} for i in range(n)]}, "empty": lambda n: {"$and": [{}] * n},
    "fields": lambda n: {"args.a%d" % i: 1 for i in range(n)},
    "fields of alternatives": lambda n: {"$or": [{"args.a%d" % i: 1 for i in range(n // 2)}] * 2},
    "all": lambda n: {"args.a": {"$all": list(range(n))}}, "patterns": lambda n: {"args.a": {"$in": [{"$regex": "x"}] * n}},
    "dicts": lambda n: {"args.a": {"$nin": [{"x": i} for i in range(n)]}}, "lists": lambda n: {"args.a": {"$in": [[i] for i in range(n)]}},
    "not": lambda n: {"$and": [{"args.a": {"$not": {"$gt": i}}} for i in range(n)]},
    "several of a field": lambda n: {"$and": [{"args.a": {"$gte": i, "$lt": i + 9, "$ne": i + 1}} for i in range(n // 3)]},
    "multiply": lambda n: {"$expr": {"$eq": [{"$multiply": ["$args.a"] * (n - 3)}, 1]}},
    "add": lambda n: {"$expr": {"$eq": [{"$add": [1] * (n - 3)}, 1]}},
    "or of values": lambda n: {"$expr": {"$or": ["$args.a"] * (n - 2)}},
}


@pytest.mark.parametrize("kind", MANY)
def test_a_query_makes_a_bounded_number_of_comparisons(kind):
    read(MANY[kind](900))
    with pytest.raises(labtasker.LabtaskerValueError, match="over 2000 comparisons"):
        read(MANY[kind](4010))
    exactly = labtasker._Query(Record._fields, "task_id")
    exactly.count(2000)
    with pytest.raises(labtasker.LabtaskerValueError, match="over 2000 comparisons"):
        exactly.count()


@pytest.mark.parametrize("count", [3, 5000])
def test_alternatives_of_one_field_are_a_set_of_any_size(count):
    numbers = read({"$or": [{"args.a": i} if i % 2 else {"args.a": {"$eq": i}} for i in range(count)] + [{"args.a": {"$in": ["x", True]}}]})
    for value, is_there in ((0, True), (count - 1, True), (count, False), ("x", True), (True, True), (False, False), (1.0, True),
                            (None, False), ([count, 2], True), (float("nan"), False)):
        assert numbers(Record(args={"a": value})) is is_there, value
    mixed = read({"$nor": [{"args.a": 1}, {"args.a": None}, {"args.a": [2]}, {"args.b": 1}, {"args.a": {"$in": []}}]})
    assert [mixed(Record(args=args)) for args in ({"a": 1}, {}, {"a": [2]}, {"a": 3, "b": 1}, {"a": 3})] == [False] * 4 + [True]


def test_arrays_within_arrays_are_gone_through_once():
    """With an index in the path there are two ways on at each of them."""
    value = 1
    for _ in range(45):
        value = [{"0": value}]
    matches_there = read({"args.a" + ".0" * 70: 7})
    assert not matches_there(Record(args={"a": value}))
    assert read({"args.a" + ".0" * 70: 1})(Record(args={"a": value}))


@pytest.mark.parametrize("name, start", [("$multiply", 2), ("$add", 2 ** 62)])
def test_whole_numbers_beyond_64_bits_are_floats(name, start):
    bare = read({"$expr": {"$gt": [{name: ["$args.a"] * 400}, 0]}})
    assert bare(Record(args={"a": start}))
    assert not read({"$expr": {"$eq": [{name: ["$args.a"] * 400 + [1]}, start ** 400 + 1]}})(Record(args={"a": start}))


@pytest.mark.parametrize("document, message", [
    ([], "a query has to be a document"),
    ({"$and": {}}, r"\$and has to be a list"),
    ({"$or": []}, r"\$or has to be a list that is not empty"),
    ({"$and": [1]}, "a query has to be a document"),
    ({"$where": "1"},
     r"the operator \$where is not supported in a query; supported here are \$and, \$or, \$nor, \$expr"),
    ({"$not": {}}, r"the operator \$not is not supported"),
    ({"args.a": {"$size": 1}}, r"the operator \$size is not supported in a query; supported here are \$eq, \$ne, "),
    ({"args.a": {"$gt": 1, "b": 2}}, "the operator b is not supported"),
    ({"args.a": {"$not": 1}}, r"\$not takes operators"),
    ({"args.a": {"$not": {}}}, r"\$not takes operators"),
    ({"args.a": {"$not": {"$foo": 1}}}, r"the operator \$foo is not supported"),
    ({"args.a": {"$in": 1}}, r"\$in has to be a list"),
    ({"args.a": {"$nin": "ab"}}, r"\$nin has to be a list"),
    ({"args.a": {"$all": {}}}, r"\$all has to be a list"),
    ({"args.a": {"$exists": "yes"}}, r"\$exists has to be true or false"),
    ({"args.a": {"$regex": "("}}, r"the pattern '\(' can't be used: missing \)"),
    ({"args.a": {"$regex": 5}}, "have to be text"),
    ({"args.a": {"$regex": "a", "$options": "g"}}, r"the option 'g' of \$options is not one of i, m, s, x"),
    ({"args.a": {"$options": "i"}}, r"\$options has to stand beside \$regex"),
    ({"args.a": {"$options": "i", "$gt": 1}}, r"\$options has to stand beside \$regex"),
    ({"args.a": {"$in": [{"$regex": "("}]}}, "can't be used"),
    ({"args.a": {"$in": [{"$gt": 1}]}}, r"the key '\$gt' can't stand in a constant"),
    ({"args.a": {"_dt": "yesterday"}}, "'yesterday'} is not a time"),
    ({"args.a": {"_dt": 5}}, "5} is not a time"),
    ({"args.a": (1, 2)}, "can't stand in a query"),
    ({"$expr": {"$foo": [1, 2]}}, r"the operator \$foo is not supported .* \$add"),
    ({"$expr": {"$gt": [1]}}, r"\$gt takes two values, not 1"),
    ({"$expr": {"$gt": 1}}, r"\$gt has to be a list"),
    ({"$expr": {"$add": []}}, r"\$add has to be a list that is not empty"),
    ({"$expr": {"$gt": [1, 2], "$lt": [1, 2]}}, r"the operator \$gt, \$lt is not supported"),
    ({"$expr": {}}, "the operator  is not supported"),
    ({"$expr": {"$eq": ["$args.a", ["$args.b"]]}}, "a list in .expr holds plain constants"),
])
def test_a_document_that_can_not_be_used_is_refused(document, message):
    with pytest.raises(labtasker.LabtaskerValueError, match=message) as caught:
        read(document)
    assert caught.value.status == 400


T1, T2 = labtasker.parse_time("2026-01-01T00:00:00Z"), labtasker.parse_time("2026-01-02T00:00:00Z")
MATCHING = [  # (condition on args.a, [values of a that match], [that don't]); ... is a record without a
    (1, [1, 1.0, [1], [2, 1]], [True, "1", 2, None, ..., [[1]], {"a": 1}, NAN, [True]]),
    (True, [True, [True]], [1, 1.0, "True", None, ..., [1]]),
    (False, [False], [0, None, ..., "", []]),
    (0, [0, 0.0, -0.0], [False, None, ..., "", []]),
    ("a", ["a", ["a", "b"]], ["A", None, ..., ["ab"], [["a"]]]),
    (None, [None, ..., [None], [1, None]], [0, "", False, [], {}, NAN]),
    (NAN, [NAN, [NAN]], [1, None, ..., "nan"]),
    ([1, 2], [[1, 2], [1.0, 2.0], [[1, 2]], [0, [1, 2]]], [[2, 1], [1], [1, 2, 3], [True, 2], 1, ...]),
    ([], [[], [[]]], [[1], None, ..., {}, ""]),
    ({"x": 1, "y": [2]}, [{"x": 1, "y": [2]}, {"y": [2], "x": 1.0}, [{"x": 1, "y": [2]}]],
     [{"x": 1}, {"x": True, "y": [2]}, {"x": 1, "y": [2], "z": 3}, ...]),
    ({}, [{}, [{}]], [{"x": 1}, None, ..., []]),
    ({"$eq": 1}, [1, [1]], [2, True, ...]),
    ({"$ne": 1}, [2, True, "1", None, ..., [], [2]], [1, 1.0, [1], [2, 1]]),
    ({"$ne": None}, [1, [], ""], [None, ..., [None]]),
    ({"$gt": 1}, [2, 1.5, [0, 2], math.inf], [1, 0, "2", True, None, ..., [], [0], NAN, {"x": 2}, [[2]]]),
    ({"$gte": 1}, [1, 1.0, [1]], [0, True, "1", None, ..., NAN]),
    ({"$lt": 1}, [0, 0.5, -math.inf], [1, False, "0", None, ..., NAN]),
    ({"$lte": 1}, [1, 0], [2, False, "1", None, ..., NAN]),
    ({"$lt": NAN}, [], [1, NAN, None, ...]),
    ({"$gte": NAN}, [], [1, NAN, None, ...]),
    ({"$gt": "b"}, ["c", "ba", ["c"]], ["b", "a", "B", 3, None, ...]),
    ({"$gte": False}, [False, True], [0, 1, None, ...]),
    ({"$gt": False}, [True, [True]], [False, 1, None, ...]),
    ({"$gte": None}, [None], [..., 0, False]),
    ({"$lt": None}, [], [None, ..., 0]),
    ({"$gt": [1, 2]}, [[1, 3], [2], [1, 2, 0], ["a"]], [[1, 2], [1], [], 5, "a", {"x": 1}, ...]),
    ({"$lt": {"x": 2}}, [{"x": 1}, {}], [{"x": 2}, {"x": "a"}, {"y": 1}, 1, ...]),
    ({"$gt": 1, "$lt": 3}, [2, [0, 5], [2]], [1, 3, 0, [0, 1], ...]),
    ({"$in": [1, "a", None]}, [1, 1.0, "a", None, ..., ["a"], [3, 1]], [True, "b", 2, [], [[1]]]),
    ({"$in": [1, True]}, [1, True], [0, False, "1", None, ...]),
    ({"$in": [True]}, [True], [1, 1.0]),
    ({"$in": []}, [], [1, None, ..., []]),
    ({"$in": [NAN]}, [NAN], [1, ...]),
    ({"$in": [[1], {"x": 1}]}, [[1], [[1]], {"x": 1}, [{"x": 1}]], [1, {"x": 2}, ...]),
    ({"$in": [{"$regex": "^A", "$options": "i"}, 3]}, ["ab", "Ab", 3, ["x", "a"]], ["ba", 4, None, ...]),
    ({"$nin": [1, None]}, [2, "1", [], [2], True], [1, None, ..., [1], [2, None]]),
    ({"$nin": []}, [1, None, ..., []], []),
    ({"$all": [1, 2]}, [[1, 2], [2, 3, 1]], [1, [1], [], None, ...]),
    ({"$all": [1]}, [1, [1], [1, 2]], [2, [2], ...]),
    ({"$all": [[1, 2]]}, [[1, 2], [[1, 2]]], [[2, 1], [1], ...]),
    ({"$all": [None]}, [None, ..., [None]], [1, []]),
    ({"$all": [{"$regex": "a"}, {"$regex": "b"}]}, ["ab", ["a", "b"]], ["a", ["a"], ...]),
    ({"$all": []}, [], [1, [], None, ...]),
    ({"$exists": True}, [1, None, [], {}, NAN], [...]),
    ({"$exists": 1}, [1, None], [...]),
    ({"$exists": False}, [...], [1, None, []]),
    ({"$regex": "b.$"}, ["abc", ["x", "bc"]], ["abcd", 5, None, ..., "B."]),
    ({"$regex": "^B", "$options": "im"}, ["x\nb", "b"], ["ab", ...]),
    ({"$regex": "a.b", "$options": "s"}, ["a\nb"], ["ab"]),
    ({"$regex": "a b # c", "$options": "x"}, ["ab"], ["a b"]),
    ({"$not": {"$gt": 1}}, [1, "a", None, ..., NAN, [], [0]], [2, [0, 2]]),
    ({"$not": {"$gt": 1, "$lt": 3}}, [1, 3, ...], [2, [0, 5]]),
    ({"$not": {"$regex": "a"}}, ["b", 5, None, ...], ["a", ["b", "a"]]),
    ({"$not": {"$not": {"$gt": 1}}}, [2], [1, ...]),
    ({"$ne": 1, "$exists": True}, [2, None], [1, ...]),
]


@pytest.mark.parametrize("condition, those, others", MATCHING, ids=[str(row[0]) for row in MATCHING])
def test_a_condition_matches_these_values_and_not_others(condition, those, others):
    assert those or others
    for value in those + others:
        args = {} if value is ... else {"a": value}
        wanted = any(value is each for each in those)
        assert matches({"args.a": condition}, args) is wanted, value
        deep = {} if value is ... else {"x": {"a": value}}
        assert matches({"args.x.a": condition}, deep) is wanted, value
        assert matches({"$nor": [{"args.a": condition}]}, args) is not wanted, value


def test_every_operator_has_a_row_in_the_table_above():
    used = {key for row in MATCHING if isinstance(row[0], dict) for key in row[0]}
    assert set(labtasker.OPERATORS) - used == set()


PATHS = [  # (path, condition, args, matches)
    ("a.b", 1, {"a": {"b": 1}}, True),
    ("a.b", 1, {"a": [{"b": 1}, {"b": 2}]}, True),
    ("a.b", {"$gt": 1}, {"a": [{"b": 1}, {"b": [0, 2]}]}, True),
    ("a.b", 1, {"a": [[{"b": 1}]]}, False),
    ("a.0", 1, {"a": [1, 2]}, True),
    ("a.1", 1, {"a": [1, 2]}, False),
    ("a.0", 1, {"a": {"0": 1}}, True),
    ("a.0", 1, {"a": [{"0": 1}]}, True),
    ("a.0.b", 1, {"a": [{"b": 1}]}, True),
    ("a.0.b", 1, {"a": [[{"b": 1}]]}, True),
    ("a.1.b", 1, {"a": [{"b": 1}]}, False),
    ("a.0.b", None, {"a": [5]}, False),
    ("a.0.b", {"$exists": False}, {"a": [5]}, True),
    ("a.0.b", None, {"a": [{"b": 5}]}, True),
    ("a.0.b.c", None, {"a": [{"b": 5}]}, True),
    ("a.99999999999999999999", {"$exists": True}, {"a": [1]}, False),
    ("a.-1", {"$exists": True}, {"a": [1]}, False),
    ("a.b", None, {}, True),
    ("a.b", None, {"a": None}, True),
    ("a.b", None, {"a": 4}, True),
    ("a.b", None, {"a": {}}, True),
    ("a.b", None, {"a": {"b": 2}}, False),
    ("a.b", None, {"a": []}, False),
    ("a.b", None, {"a": [1, 2]}, False),
    ("a.b", None, {"a": [{"b": 1}, {}]}, True),
    ("a.b", None, {"a": [{"b": 1}]}, False),
    ("a.b", {"$exists": False}, {"a": []}, True),
    ("a.b", {"$exists": False}, {"a": 4}, True),
    ("a.b", {"$exists": False}, {"a": [{"b": 1}, {}]}, False),
    ("a.b", {"$exists": True}, {"a": [{}, {"b": None}]}, True),
    ("a.b", {"$ne": 1}, {"a": [{"b": 1}, {"b": 2}]}, False),
    ("a.b", {"$nin": [1]}, {"a": 4}, True),
    ("a.b", {"$not": {"$gte": 3}}, {"a": "x"}, True),
    ("a.b.c", 1, {"a": [{"b": [{"c": 1}]}]}, True),
    ("a.b", [1], {"a": [{"b": [1]}]}, True),
    ("a", {"b": 1}, {"a": [{"b": 1}]}, True),
]


@pytest.mark.parametrize("path, condition, args, wanted", PATHS)
def test_a_dotted_path_goes_through_dicts_and_arrays(path, condition, args, wanted):
    assert matches({"args." + path: condition}, args) is wanted


TIMES = [({"$gt": {"_dt": "2026-01-01T00:00:00+00:00"}}, [T2], [T1, None]),
         ({"$lte": {"_dt": "2026-01-01T01:00:00+01:00"}}, [T1], [T2, None]),
         ({"_dt": "2026-01-01T00:00:00"}, [T1], [T2, None]),
         ({"$in": [{"_dt": "2026-01-01T00:00:00Z"}, None]}, [T1, None], [T2]),
         ({"$gt": 0}, [], [T1, None]),
         ({"$lt": "2027"}, [], [T1, None]),
         (float(T1), [], [T1]),
         ({"$in": [float(T1)]}, [], [T1]),
         (None, [None], [T1])]


@pytest.mark.parametrize("condition, those, others", TIMES)
def test_times_are_a_kind_of_their_own(condition, those, others):
    for value in those + others:
        assert matches({"created_at": condition}, Record(created_at=value)) is (value in those)


def test_a_time_in_args_is_a_number_and_not_a_time():
    assert not matches({"args.a": {"_dt": "2026-01-01T00:00:00Z"}}, {"a": float(T1)})
    assert not matches({"args.a": {"$gt": {"_dt": "1980-01-01T00:00:00Z"}}}, {"a": float(T1)})


EXPRESSIONS = [  # (filter, [args that match], [that don't])
    ("args.a > args.b", [{"a": 2, "b": 1}, {"a": "b", "b": "a"}],
     [{"a": 1, "b": 1}, {"a": 2}, {"b": 1}, {"a": "2", "b": 1}, {"a": True, "b": False - 1}, {"a": NAN, "b": 1},
      {"a": [2], "b": 1}, {"a": None, "b": 0}]),
    ("args.a == args.b", [{"a": 1, "b": 1.0}, {"a": None, "b": None}, {"a": [1], "b": [1]}],
     [{}, {"a": 1, "b": True}, {"a": None}, {"a": [True], "b": [1]}]),
    ("args.a == args.b + 1", [{"a": 2, "b": 1}], [{"a": 2, "b": "1"}, {"a": 2, "b": None}, {"a": 1, "b": False}]),
    ("args.a / args.b > 0", [{"a": 1, "b": 2}], [{"a": 1, "b": 0}, {"a": 1, "b": 0.0}, {"a": 1, "b": "x"}]),
    ("args.a / 2 == 1.5", [{"a": 3}], [{"a": 2}, {"a": 10 ** 400}]),
    ("args.a % 3 == -1", [{"a": -4}, {"a": -4.0}], [{"a": 2}, {"a": math.inf}]),
    ("args.a % 2 == 0.5", [{"a": 0.5}, {"a": 2.5}], [{"a": -0.5}]),
    ("args.a * args.b - 1 == %d" % (2 ** 64 - 1), [], [{"a": 2 ** 32, "b": 2 ** 32}]),  # a product from 2 ** 64 on is a float
    ("args.a * args.b - 1 == %d" % (2 ** 64 - 3), [{"a": 2, "b": 2 ** 63 - 1}], []),
    ("args.a % args.b == 1", [{"a": 7, "b": -3}], [{"a": 7, "b": 0}, {"a": 7.0, "b": 0.0}]),
    ("args.a * 1.5 > 0", [{"a": 1}], [{"a": 10 ** 400}, {"a": "x"}, {"a": [1]}]),
    ("-args.a == 1", [{"a": -1}], [{"a": 1}, {"a": True}]),
    ("args.x[1] - 1 == 4", [{"x": [0, 5]}], [{"x": [5]}, {"x": 5}]),
    ({"$expr": {"$ne": ["$args.a", 1]}}, [{"a": 2}, {"a": "1"}, {"a": True}], [{"a": 1}, {"a": 1.0}, {}]),
    ({"$expr": {"$gte": ["$args.a", None]}}, [{"a": None}], [{"a": 1}, {}]),
    ({"$expr": {"$eq": ["$args.a", ["x"]]}}, [{"a": ["x"]}], [{"a": "x"}]),
    ({"$expr": {"$eq": ["$args.a.b", {"$literal": [1, 2]}]}}, [{"a": [{"b": 1}, 5, {}, {"b": 2}]}], [{"a": {"b": 1}}]),
    ({"$expr": {"$eq": ["$args.a", {"$literal": "$args.b"}]}}, [{"a": "$args.b"}], [{"a": 1, "b": 1}]),
    ({"$expr": {"$gt": [{"$add": ["$args.a", 1, 1]}, 3]}}, [{"a": 2}], [{"a": 1}, {"a": "x"}]),
    ({"$expr": {"$lt": [{"$multiply": ["$args.a"]}, 0]}}, [{"a": -1}], [{"a": 1}, {"a": "x"}]),
    ({"$expr": {"$add": ["$args.a"]}}, [{"a": 1}], [{"a": 0}, {"a": "x"}, {"a": [1]}, {}]),
    ({"$expr": {"$and": [{"$gt": ["$args.a", 1]}, {"$lt": ["$args.a", 3]}]}}, [{"a": 2}], [{"a": 1}, {"a": 3}, {}]),
    ({"$expr": {"$or": [{"$gt": ["$args.a", 1]}, "$args.b"]}}, [{"a": 2}, {"b": 1}, {"b": ""}, {"b": []}],
     [{"a": 1}, {"b": 0}, {"b": False}, {"b": None}, {}]),
    ({"$expr": "$args.a"}, [{"a": 1}, {"a": "x"}], [{"a": 0}, {"a": 0.0}, {"a": False}, {"a": None}, {}]),
    ({"$expr": {"$lte": ["$args.nosuch", "$nosuch"]}}, [], [{}, {"nosuch": 1}]),
    ("True", [{}], []),
    ("False", [], [{}]),
]


@pytest.mark.parametrize("query, those, others", EXPRESSIONS, ids=[str(row[0]) for row in EXPRESSIONS])
def test_an_expression_matches_these_args_and_never_raises(query, those, others):
    for args in those:
        assert matches(query, args), args
    for args in others:
        assert not matches(query, args), args


def test_every_operator_of_expressions_is_tried_above():
    used = json.dumps([written(q) if isinstance(q, str) else q for q, _, _ in EXPRESSIONS])
    assert [name for name in labtasker.EXPRESSIONS if '"%s"' % name not in used] == []


def test_every_operator_of_text_is_tried_in_the_cases():
    texts = "\n".join(text for text, _ in TEXTS)
    assert [sign for sign in list(labtasker.COMPARISONS) + list(labtasker.ARITHMETIC) if sign not in texts] == []
    assert [name for name in labtasker.CALLS if name + "(" not in texts] == []


def test_logic_of_documents():
    assert matches({}, {"a": 1})
    assert matches({"args.a": 1, "args.b": 2}, {"a": 1, "b": 2})
    assert not matches({"args.a": 1, "args.b": 2}, {"a": 1, "b": 3})
    assert matches({"$or": [{"args.a": 2}, {"args.b": 3}]}, {"a": 1, "b": 3})
    assert not matches({"$nor": [{"args.a": 2}, {"args.b": 3}]}, {"a": 1, "b": 3})
    assert matches({"$nor": [{"args.a": 2}, {"args.b": 2}]}, {"a": 1, "b": 3})
    assert matches({"$and": [{"args.a": 1}, {}], "args.b": 3}, {"a": 1, "b": 3})


def test_id_is_the_field_that_is_said_and_unknown_fields_are_missing():
    record = Record(task_id="x")
    assert matches({"_id": "x"}, record) and not matches({"_id": "y"}, record)
    assert labtasker.compile_query({"_id": "w"}, FIELDS, id_field="worker_id")(Record(worker_id="w"))
    for name in ("nosuch", "count", "_fields", "__class__", "index.a"):
        assert matches({name: None}, record)
        assert not matches({name: {"$exists": True}}, record)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, -1.0, math.inf, NAN, "", "a", "ab", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y", "0"]), inner, max_size=2),
    max_leaves=6)
RECORDS = st.builds(Record, args=st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES, max_size=3),
                    metadata=st.dictionaries(st.sampled_from(["a"]), VALUES), status=st.sampled_from(["a", "ab", None]),
                    priority=st.integers(-3, 3), created_at=st.sampled_from([T1, T2, None]))
NAMES = st.sampled_from(["args.a", "args.b", "args.c.x", "args.a[0]", 'args["b"]', "metadata.a", "status", "priority",
                         "created_at"])
CONSTANTS = st.sampled_from(["1", "-2", "0.5", '"a"', "'ab'", "True", "False", "None", "[1, 'a']", "[]",
                             'date("2026-01-01")', "2 * 3 - 5"])
SIGNS = st.sampled_from(["==", "<", "<=", ">", ">="])
SUMS = st.recursive(NAMES | st.sampled_from(["1", "-2", "0.5"]), lambda inner: st.builds(
    "({} {} {})".format, NAMES, st.sampled_from("+-*/%"), inner), max_leaves=3)
TESTS = (st.builds("{} {} {}".format, NAMES, SIGNS, CONSTANTS) | st.builds("{} {} {}".format, CONSTANTS, SIGNS, NAMES)
         | st.builds("{} {} {}".format, NAMES, SIGNS, SUMS) | st.builds("exists({}, {})".format, NAMES, st.booleans())
         | st.builds("{} in [{}, {}]".format, NAMES, CONSTANTS, CONSTANTS) | st.builds("regex({}, '^a')".format, NAMES)
         | st.builds("{} in list({})".format, CONSTANTS, NAMES) | st.builds("'x' in dict({})".format, NAMES))
FILTERS = st.recursive(TESTS, lambda inner: st.builds(
    "({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner), max_leaves=4)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(FILTERS, st.lists(RECORDS, min_size=1, max_size=5))
def test_any_filter_has_an_answer_on_every_record_by_its_document_as_json_too(text, records):
    for record in records:
        assert matches(text, record) in (True, False)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.text('()[]"\'<>=!&|+-*/%., \\\n01e' + "abdnorti#é", max_size=30)
       | st.builds("{}{}".format, FILTERS, st.text(max_size=3)))
def test_any_text_gives_a_document_or_a_filter_error_inside_the_text(text):
    try:
        read(written(text))(Record(args={}))
    except labtasker.FilterError as mistake:
        assert 0 <= mistake.column <= len(text) and mistake.message


DOCUMENTS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(
    sorted(labtasker.OPERATORS) + sorted(labtasker.EXPRESSIONS) + sorted(labtasker.LOGIC)
    + ["$expr", "$literal", "args.a", "_dt", "_id", "$where"]), inner, max_size=2), max_leaves=8)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, RECORDS)
def test_any_document_gives_a_predicate_or_a_clear_refusal(document, record):
    try:
        found = read(document)
    except labtasker.LabtaskerValueError as mistake:
        assert str(mistake)
    else:
        assert found(record) in (True, False)


ORDERED = [None, -math.inf, -1, 0, 0.5, 1, 10 ** 30, math.inf, NAN, "", "A", "a", "aa", "b", {}, {"x": 1}, {"x": 2},
           {"x": "a"}, [], [1], [1, 1], [2], ["a"], False, True]


def values_sorted(values, direction):
    records = [Record(args={"v": {"w": value}}) for value in values]
    found = labtasker.sort_records(records, [["args.v.w", direction]], ties=lambda record: 0)
    return [record.args["v"]["w"] for record in found]


@given(st.permutations(ORDERED))
def test_values_of_all_kinds_have_one_order_and_descending_is_its_reverse_but_that_nan_follows_the_numbers(values):
    at, backwards = ORDERED.index(NAN), ORDERED[::-1]
    backwards.remove(NAN)
    backwards.insert(len(backwards) - 1, NAN)
    assert str(values_sorted(values, 1)) == str(ORDERED)
    assert str(values_sorted(values, -1)) == str(backwards) and ORDERED[at - 1] == math.inf


def test_missing_sorts_as_null_and_times_come_last():
    records = [Record("t2", created_at=T2), Record("t1", created_at=T1), Record("none")]
    assert names(records, [["created_at", 1]]) == ["none", "t1", "t2"]
    assert names(records, [["created_at", -1]]) == ["t2", "t1", "none"]
    records = [Record("one", args={"a": 1}), Record("null", args={"a": None}), Record("away", args={}),
               Record("flat", args={"a": -1}), Record("bare", args=None)]
    assert names(records, [["args.a", 1]]) == ["away", "bare", "null", "flat", "one"]
    assert names(records, [["args.a.b", 1]]) == ["away", "bare", "flat", "null", "one"]


def names(records, sort):
    return [record.task_id for record in labtasker.sort_records(records, sort, ties=lambda record: record.task_id)]


def test_long_lists_are_sorted_as_short_ones_are(monkeypatch):
    records = [Record("%03d" % i, priority=i * 7 % 5, status="ab"[i % 2]) for i in range(100)]
    for sort in ([], [["priority", -1]], [["priority", 1], ["status", -1]], [["status", 1], ["status", -1], ["priority", 1]]):
        wanted = names(records, sort)
        for size in (1, 3, 99, 100):
            monkeypatch.setattr(labtasker, "SORTED_AT_ONCE", size)
            assert names(records, sort) == wanted
        monkeypatch.undo()
    assert labtasker.in_order([], key=str) == []


def test_several_fields_and_ties():
    records = [Record("d", priority=1, status="a"), Record("c", priority=2, status="a"),
               Record("b", priority=1, status="b"), Record("a", priority=1, status="a")]
    assert names(records, []) == ["a", "b", "c", "d"]
    assert names(records, [["priority", -1]]) == ["c", "a", "b", "d"]
    assert names(records, [["status", -1], ["priority", 1]]) == ["b", "a", "d", "c"]
    assert names(records, [["priority", 1], ["status", -1]]) == ["b", "a", "d", "c"]
    assert records[0].task_id == "d", "the list that was given is left as it was"


@pytest.mark.parametrize("key", ["val/acc", "mrr@10", "val acc", "$x", "0x", "日本", "it's", 'a"b', "a\\b", "a.b/c", "[0]", "%s"])
def test_any_key_can_be_written_in_brackets(key):
    tree = labtasker.unflatten({key: 0.5}, "metadata")
    record, path = Record(metadata=tree, args={"k": 0.25}), "metadata[%s]" % json.dumps(key, ensure_ascii=False)
    for text in ("%s == 0.5", "%s > args.k", "%s * 2 == 1", "exists(%s)", "%s in [0.5]"):
        assert finds(text % path, record), text
        assert not finds(text % path, Record(metadata={}, args={"k": 0.25})), text
    assert finds("%s in dict(metadata)" % json.dumps(key, ensure_ascii=False), record)


def finds(text, record):
    document = labtasker.parse_filter(text, Record._fields, 0)
    return labtasker.compile_query(json.loads(json.dumps(document)), Record._fields)(record)


ODD = [None, 1, "x", [], {}, object(), {1: 2}, {"$eq": object()}, [object()], {(1, 2): 3}, float("nan"), b"x", {"_dt": object()}, {"_dt": 5}]


@pytest.mark.parametrize("key", ["status", "created_at", "priority", "args.x", "args", "_id", "$and", "$or", "$expr", "$nor", 5, None])
def test_doubts_about_a_query_never_raise_whatever_it_is(key):
    """What is wrong with the query itself is told by who reads it."""
    fields = labtasker.visible(labtasker.TASK_FIELDS)
    for odd in ODD:
        for operand in [odd, [odd]] + [{name: each} for name in ("$gt", "$in", "$regex", "$not", "$add", "$x", 3) for each in (odd, [odd])]:
            for text in labtasker.doubts({key: operand}, fields, labtasker.TASK_STATES):
                assert isinstance(text, str)
    deep = {"$and": []}
    for _ in range(5000):
        deep = {"$and": [deep], "$expr": {"$add": [deep]}} if _ < 3 else {"$and": [deep]}
    assert labtasker.doubts(deep, fields, labtasker.TASK_STATES) == []
    assert labtasker.doubts({"status": {"$regex": "("}}, fields, labtasker.TASK_STATES) == []


def test_a_pattern_has_a_length_and_a_range_without_case_a_width_up_to_which_it_is_taken():
    longest, widest = "x" * labtasker._PATTERN_CHARS, "[\u4e00-%s]" % chr(0x4e00 + labtasker._FOLDED_RANGE)
    for pattern, more in ((longest, longest + "x"), (widest, "[\u4e00-%s]" % chr(0x4e01 + labtasker._FOLDED_RANGE))):
        labtasker._bounded(pattern, "i")
        with pytest.raises(ValueError, match="over"):
            labtasker._bounded(more, "i")


@pytest.mark.parametrize("pattern", ["[[a]b", "[a&&b]", "[a||b]", "[a~~b]"])
def test_what_python_may_read_otherwise_one_day_is_no_error_where_warnings_are(pattern):
    labtasker.compile_pattern.cache_clear()
    assert labtasker.compile_pattern(pattern) and labtasker.compile_search(pattern)


def test_a_word_without_quotes_is_taken_for_an_argument_only_where_there_are_arguments():
    for fields, is_meant in ((["worker_name", "metadata"], False), (["task_name", "args"], True)):
        with pytest.raises(labtasker.FilterError) as error:
            labtasker.parse_filter(fields[0] + " == gpu1", fields, 0)
        assert ("an argument args.gpu1" in str(error.value)) == is_meant, error.value


def test_a_word_in_a_list_is_taken_for_a_text_and_one_behind_it_for_a_field():
    for text, is_text in (('task_name in ["a", b]', True), ('task_name in ["a"] and lr > 1', False), ('task_name in [[1], b]', True)):
        with pytest.raises(labtasker.FilterError) as error:
            labtasker.parse_filter(text, ["task_name", "args"], 0)
        assert ("is written in quotes" in str(error.value)) == is_text, error.value
