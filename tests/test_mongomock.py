"""Query documents against mongomock, over generated documents and queries; DEVIATIONS are where MongoDB is other than it.

LT_TEST_QUERIES is how many queries a seed makes; each is asked of twenty documents of its own. A disagreement is told with
its seed, which then goes to KEPT."""
import collections
import random

import pytest

import faulty
import labtasker

pytest.importorskip("mongomock", reason="mongomock is installed by tox's environment `full`")
from mongomock import filtering

KEPT = (5, 6)  # found what stands past a scalar that an index picked
SEEDS = sorted(set(KEPT) | {faulty.setting("SEED") + n for n in range(8)})
FIELDS = ["task_id", "status", "task_name", "created_at", "start_time", "priority", "args", "metadata"]
Record = collections.namedtuple("Record", FIELDS)
TIMES = [labtasker.parse_time("2026-01-0%dT00:00:00Z" % day) for day in (1, 2, 3)]
NAN = float("nan")
SCALARS = [None, True, False, 0, 1, 2, -1, 0.5, 1.0, 2 ** 53 + 1, float("inf"), NAN, "", "a", "ab", "b", "1"]
PATHS = ["args.a", "args.b", "args.a.x", "args.a.y", "args.b.x", "args.a.x.y", "args.b.x.y", "args.a.0", "args.b.1",
         "args.a.1.x", "args.b.x.0", "args.a.0.x.y", "args.a.7", "metadata.tags", "metadata.k.x", "status", "task_name",
         "priority", "created_at", "start_time", "nosuch", "nosuch.x", "args", "status.x"]
PATTERNS = ["a", "^a", "b$", "^A", "a.b", "x", ""]


# Documents and queries


def a_value(dice, depth=2):
    """Return a value of any kind: what stands in args, and what it is compared with."""
    kind = dice.random()
    if not depth or kind < 0.6:
        return dice.choice(SCALARS)
    if kind < 0.8:
        return [a_value(dice, depth - 1) for _ in range(dice.randrange(4))]
    return {key: a_value(dice, depth - 1) for key in dice.sample(["x", "y", "0"], dice.randrange(3))}


def a_dict(dice, keys):
    return {key: a_value(dice) for key in keys if dice.random() < 0.75}


def a_record(dice):
    return Record(task_id="t%d" % dice.randrange(9), status=dice.choice(["pending", "failed"]), args=a_dict(dice, "ab"),
                  task_name=dice.choice([None, "a", "ab"]), created_at=dice.choice(TIMES),
                  start_time=dice.choice(TIMES + [None]), priority=dice.choice([-1, 0, 1, 2]),
                  metadata=a_dict(dice, ["tags", "k"]))


def a_constant(dice, path):
    if path.endswith("_at") or path.endswith("_time") or dice.random() < 0.03:
        return {"_dt": labtasker.format_time(dice.choice(TIMES))}
    return dice.choice(["pending", "a", "ab"]) if path == "status" else a_value(dice, dice.choice([0, 0, 0, 1, 2]))


def a_pattern(dice):
    options = dice.choice(["", "", "i", "im", "s"])
    return dict({"$regex": dice.choice(PATTERNS)}, **({"$options": options} if options else {}))


def an_operator(dice, path, depth):
    """Return a document of one operator, or of $regex with its $options."""
    name = dice.choice(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$all", "$exists", "$regex", "$not"])
    if name == "$regex":
        return a_pattern(dice)
    if name == "$not":
        return {"$not": an_operator(dice, path, depth - 1)} if depth else {"$ne": a_constant(dice, path)}
    if name == "$exists":
        return {name: dice.choice([True, False])}
    if name in ("$in", "$nin", "$all"):
        listed = [a_constant(dice, path) for _ in range(dice.randrange(4))]
        return {name: listed + ([a_pattern(dice)] if name != "$all" and dice.random() < 0.15 else [])}
    return {name: a_constant(dice, path)}


def a_test(dice):
    """Return a document about one field: a constant, or one or two operators."""
    path, kind = dice.choice(PATHS), dice.random()
    if kind < 0.3:
        return {path: a_constant(dice, path)}
    return {path: dict(an_operator(dice, path, 2), **(an_operator(dice, path, 1) if kind > 0.85 else {}))}


def a_query(dice, depth=2):
    if not depth or dice.random() < 0.5:
        return a_test(dice)
    if dice.random() < 0.2:
        return dict(a_test(dice), **a_test(dice))
    return {dice.choice(["$and", "$or", "$nor"]): [a_query(dice, depth - 1) for _ in range(dice.randrange(1, 4))]}


# The same for mongomock: times are datetimes, a pattern among constants is a compiled one


def for_peer(value):
    if isinstance(value, list):
        return [for_peer(each) for each in value]
    if type(value) is labtasker.Instant:
        return labtasker.to_datetime(value)
    if not isinstance(value, dict):
        return value
    if list(value) == ["_dt"]:
        return labtasker.to_datetime(labtasker.parse_time(value["_dt"]))
    return {key: [a_regex(each) for each in operand] if key in ("$in", "$nin") else for_peer(operand)
            for key, operand in value.items()}


def a_regex(each):
    if isinstance(each, dict) and "$regex" in each:
        return labtasker.compile_pattern(each["$regex"], each.get("$options", ""))[0]
    return for_peer(each)


def theirs(query, document):
    return bool(filtering.filter_applies(for_peer(query), document))


def ours(query, record):
    return labtasker.compile_query(query, FIELDS)(record)


def candidates(key, value, found=filtering.iter_key_candidates):
    """Return what mongomock finds at a path, mended: nothing was found, not even its absence, where the path goes through a
    scalar or null. MongoDB finds its absence there, but not past an array's index."""
    if key and not isinstance(value, (dict, list)):
        return [filtering.NOTHING]
    first, _, rest = key.partition(".")
    if isinstance(value, list) and first.isdigit() and rest and int(first) < len(value):
        return found(key, value) if isinstance(value[int(first)], (dict, list)) else []
    return found(key, value)


@pytest.fixture
def mended(monkeypatch):
    monkeypatch.setattr(filtering, "iter_key_candidates", candidates)


# What mongomock does otherwise. A Leaf is one operator of a query on one field of a document: `values` is what mongomock
# finds at the path, `whole` those and everything inside them, `operands` the constant and everything inside it; `beside`
# says that other operators stand in the same document.

ORDERINGS = ("$gt", "$gte", "$lt", "$lte")
Leaf = collections.namedtuple("Leaf", "path operator operand beside document values whole operands")


def inside(value):
    """Yield the value and everything in it."""
    yield value
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from inside(each)


def leaves(query, document):
    """Yield the Leafs of a query as mongomock has it."""
    for key, operand in query.items():
        if key in ("$and", "$or", "$nor"):
            for each in operand:
                yield from leaves(each, document)
        else:
            yield from leaves_of(key, operand, document)


def leaves_of(path, condition, document):
    by_operator = isinstance(condition, dict) and any(key.startswith("$") for key in condition)
    values = list(candidates(path, document))
    for name, operand in (condition if by_operator else {"": condition}).items():
        yield Leaf(path, name, operand, len(condition) - 1 if by_operator else 0, document, values,
                   [each for value in values for each in inside(value)], list(inside(operand)))
        if name == "$not":
            yield from leaves_of(path, operand, document)


def is_one_for_true(leaf):
    """Python's True == 1."""
    return any((type(one) is bool) != (type(other) is bool) and one == other
               for one in leaf.operands for other in leaf.whole if isinstance(one, (bool, int, float)))


def is_nan(leaf):
    return any(each != each for each in leaf.operands) and any(each != each for each in leaf.whole)


def is_nan_inside(leaf):
    """Ours: NaN sorts after all numbers, in MongoDB before them, in Python nowhere."""
    return leaf.operator in ORDERINGS and isinstance(leaf.operand, (dict, list)) and any(
        each != each for each in leaf.operands + leaf.whole)


def has_no_candidate(leaf):
    """Nothing at all where the path goes through an empty array, or past an array's end."""
    return not leaf.values and (leaf.beside or leaf.operator == "$not")


def is_index_among_dicts(leaf):
    """A digit in a path is an index of an array and also a key of the dicts in it."""
    value, keys = leaf.document, leaf.path.split(".")
    for key in keys:
        if isinstance(value, list):
            return key.isdigit() and any(isinstance(each, dict) for each in value)
        value = value.get(key) if isinstance(value, dict) else None
    return False


def is_array_among_members(leaf):
    return leaf.operator in ("$in", "$nin") and any(isinstance(each, list) for each in leaf.operand) and any(
        isinstance(each, list) for each in leaf.whole)


def is_array_within_array(leaf):
    compares = leaf.operator in ("$eq", "$ne") + ORDERINGS and isinstance(leaf.operand, list)
    return compares and any(isinstance(each, list) for value in leaf.values if isinstance(value, list) for each in value)


def is_all_of_more_than_plain(leaf):
    odd = [each for each in leaf.operand if each is None or isinstance(each, list)] if leaf.operator == "$all" else []
    return leaf.operator == "$all" and (odd or not leaf.operand or leaf.beside or len(leaf.values) != 1)


def is_absence_in_part(leaf):
    return leaf.operator == "$exists" and leaf.operand is False and len(leaf.values) > 1


def is_joint_over_many(leaf):
    return leaf.beside and len(leaf.values) != 1 and leaf.operator != "$options"


def is_empty_document(leaf):
    return leaf.operator == "" and leaf.operand == {} and all(each is filtering.NOTHING for each in leaf.values)


def is_options_in_not(leaf):
    return leaf.operator == "$not" and "$options" in str(leaf.operand)


Deviation = collections.namedtuple("Deviation", "applies query args right reason")
DEVIATIONS = [  # applies(leaf); a query and args that show it; the right answer, MongoDB's or the contract's; why it is other
    Deviation(is_one_for_true, {"args.a": True}, {"a": 1}, False, "BSON's booleans are no numbers"),
    Deviation(is_nan, {"args.a": NAN}, {"a": float("nan")}, True, "NaN equals NaN in MongoDB, not in Python"),
    Deviation(is_nan_inside, {"args.a": {"$gt": {"x": 1}}}, {"a": {"x": NAN}}, True, "where NaN sorts is the contract's own"),
    Deviation(has_no_candidate, {"args.a.x": {"$not": {"$gt": 1}}}, {"a": []}, True, "nothing is tested, not even by $not"),
    Deviation(is_index_among_dicts, {"args.a.0": 1}, {"a": [{"0": 1}]}, True, "only the index is tried"),
    Deviation(is_array_among_members, {"args.a": {"$in": [[1]]}}, {"a": [1]}, True, "only elements are looked for"),
    Deviation(is_array_within_array, {"args.a": {"$eq": [1]}}, {"a": [[1]]}, True, "only whole arrays are compared"),
    Deviation(is_all_of_more_than_plain, {"args.a": {"$all": []}}, {"a": 1}, False,
              "it is asked of the list of candidates, and in Python's way of `in`"),
    Deviation(is_absence_in_part, {"args.a.x": {"$exists": False}}, {"a": [{"x": 1}, {}]}, False,
              "one dict without the key is enough for it"),
    Deviation(is_joint_over_many, {"args.a.x": {"$gt": 1, "$lt": 1}}, {"a": [{"x": 0}, {"x": 2}]}, True,
              "one element has to pass all operators, where MongoDB asks for any element for each"),
    Deviation(is_empty_document, {"args.a": {}}, {}, False, "a document without operators counts as a negative test"),
    Deviation(is_options_in_not, {"args.a": {"$not": {"$regex": "A", "$options": "i"}}}, {"a": "b"}, True, "it is refused"),
]


def deviation(query, document):
    """Return the first Deviation that a pair touches, or None."""
    found = leaves(for_peer(query), document)
    return next((each for leaf in found for each in DEVIATIONS if each.applies(leaf)), None)


def record_of(args):
    return Record("t", "pending", None, TIMES[0], None, 0, args, {})


def document_of(record):
    return {name: for_peer(value) for name, value in record._asdict().items()}


@pytest.mark.parametrize("row", DEVIATIONS, ids=[row.applies.__name__ for row in DEVIATIONS])
def test_a_deviation_is_one_still_and_ours_is_the_right_answer(row, mended):
    record = record_of(row.args)
    assert ours(row.query, record) is row.right
    assert any(row.applies(leaf) for leaf in leaves(for_peer(row.query), document_of(record)))
    try:
        assert theirs(row.query, document_of(record)) is not row.right, "mongomock has mended this: the row can go"
    except Exception as refusal:
        assert type(refusal).__name__ == "OperationFailure"


@pytest.mark.parametrize("path, args, mongodb", [
    ("a.x", {"a": 4}, True), ("a.x", {"a": None}, True), ("a.x.y", {"a": [{"x": 4}]}, True), ("a.0.x", {"a": [4]}, False)])
def test_the_way_through_scalars_has_to_be_mended(path, args, mongodb, monkeypatch):
    record, query = record_of(args), {"args." + path: None}
    assert ours(query, record) is mongodb and theirs(query, document_of(record)) is False
    monkeypatch.setattr(filtering, "iter_key_candidates", candidates)
    assert theirs(query, document_of(record)) is mongodb


@pytest.mark.parametrize("seed", SEEDS)
def test_generated_queries_find_what_mongomock_finds(seed, mended):
    dice, counts = random.Random(seed), collections.Counter()
    for number in range(faulty.setting("QUERIES")):
        query = a_query(dice)
        for record in [a_record(dice) for _ in range(20)]:
            counts[compared(query, record, "seed %d, query %d" % (seed, number))] += 1
    print("seed %d: %s" % (seed, dict(counts)))
    both = counts[True] + counts[False]
    assert both > sum(counts.values()) * 0.75 and min(counts[True], counts[False]) > both / 10


def compared(query, record, where):
    """Return the answer that both give, or the name of the deviation that the pair touches."""
    other = deviation(query, document_of(record))
    if other:
        return other.applies.__name__
    answer, wanted = ours(query, record), theirs(query, document_of(record))
    assert answer is wanted, "%s: %r on %r: ours %s, mongomock's %s" % (where, query, record, answer, wanted)
    return answer


def a_sum(dice, depth=2):
    """Return the text of some arithmetic over the numbers in args."""
    if not depth or dice.random() < 0.4:
        return dice.choice(["args.a", "args.b", "args.c.x", "2", "0.5", "-3"])
    return "(%s %s %s)" % (a_sum(dice, depth - 1), dice.choice("+-*/%"), a_sum(dice, depth - 1))


def a_number(dice):
    return dice.choice([-2, -1, 0, 1, 2, 3, 7, 0.5, -1.5, 2.0])


def a_record_of_numbers(dice):
    args = {key: a_number(dice) for key in "ab" if dice.random() < 0.9}
    return record_of(dict(args, c={"x": a_number(dice)}) if dice.random() < 0.9 else args)


@pytest.mark.parametrize("seed", SEEDS)
def test_arithmetic_in_filter_text_gives_what_its_document_gives_mongomock(seed, mended):
    dice, counts = random.Random(seed), collections.Counter()
    for _ in range(faulty.setting("QUERIES")):
        text = "%s %s %s" % (dice.choice(["args.a", "args.b"]), dice.choice(["==", "<", "<=", ">", ">="]), a_sum(dice))
        try:
            query = labtasker.parse_filter(text, FIELDS, TIMES[0])
        except labtasker.FilterError as mistake:  # two constants, divided by 0
            assert "can't be calculated" in str(mistake), text
            continue
        for record in [a_record_of_numbers(dice) for _ in range(20)]:
            try:
                wanted = theirs(query, document_of(record))
            except (ZeroDivisionError, ValueError):  # divided by 0: an error in MongoDB, no match here
                wanted = False
            assert ours(query, record) is wanted, "seed %d: %r, %r on %r: mongomock's %s" % (seed, text, query, record, wanted)
            counts[wanted] += 1
    assert min(counts[True], counts[False]) > 100
