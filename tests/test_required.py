"""Required and casts: what a decorated function gets of a task's args."""
import enum
import functools
import pathlib
import sys
import types
import typing
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import pytest

import labtasker
from labtasker import LabtaskerTypeError, Required, BoundFunction, cast

dataclasses = pytest.importorskip("dataclasses")
extensions = pytest.importorskip("typing_extensions")
Annotated, Literal = extensions.Annotated, extensions.Literal


class Colour(enum.Enum):
    RED = "r"
    TWO = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: float
    name: str = "origin"


@dataclasses.dataclass
class Optimizer:
    lr: float
    name: str = "sgd"


@dataclasses.dataclass
class Setup:
    optimizer: Optimizer
    sizes: List[int] = dataclasses.field(default_factory=list)
    later: "Optional[Optimizer]" = None


@dataclasses.dataclass
class Checked:
    n: int

    def __post_init__(self):
        if self.n < 0:
            raise ValueError("n must not be negative")


class Unknown:
    pass


TAKEN = [
    (int, 3, 3), (int, "3", 3), (int, " 3 ", 3), (int, 3.0, 3), (int, "3.0", 3), (int, "1e3", 1000), (int, -2, -2),
    (float, 1, 1.0), (float, "1e-3", 0.001), (float, "inf", float("inf")), (float, 0.1, 0.1),
    (str, "a", "a"), (str, 3, "3"), (str, 0.001, "0.001"), (str, True, "True"), (str, "", ""),
    (bool, True, True), (bool, "false", False), (bool, "True", True), (bool, "no", False), (bool, 0, False),
    (bool, 1, True), (bool, "on", True),
    (Optional[int], None, None), (Optional[int], "3", 3), (Optional[str], None, None),
    (Union[int, str], "3", "3"), (Union[str, int], 3, 3), (Union[int, float], 0.5, 0.5), (Union[int, float], "7", 7),
    (Union[List[int], Dict[str, int]], {"a": "1"}, {"a": 1}), (Union[Dict[str, int], List[int]], ["1"], [1]),
    (List[int], ["1", 2.0], [1, 2]), (list, ["1"], ["1"]), (List, [1, "a"], [1, "a"]), (Sequence[float], [1], [1.0]),
    (Iterable[str], [1], ["1"]), (Set[int], ["1", 1], {1}), (FrozenSet[str], [1], frozenset("1")),
    (Tuple[int, str], ["1", 2], (1, "2")), (Tuple[float, ...], [1, 2, 3], (1.0, 2.0, 3.0)), (tuple, [1], (1,)),
    (Dict[str, float], {"a": "1"}, {"a": 1.0}), (Dict[int, str], {"1": 2}, {1: "2"}), (dict, {"a": 1}, {"a": 1}),
    (Mapping[str, List[int]], {"a": ["1"]}, {"a": [1]}), (Dict[str, Any], {"a": "1"}, {"a": "1"}),
    (Colour, "r", Colour.RED), (Colour, "RED", Colour.RED), (Colour, 2, Colour.TWO), (Colour, "2", Colour.TWO),
    (Level, 2, Level.HIGH), (Level, "HIGH", Level.HIGH), (List[Level], [1, 2], [Level.LOW, Level.HIGH]),
    (Literal["adam", "sgd"], "sgd", "sgd"), (Literal[1, 2], "2", 2), (Literal[1, "x"], "x", "x"),
    (pathlib.Path, "a/b", pathlib.Path("a/b")), (pathlib.PurePosixPath, "a", pathlib.PurePosixPath("a")),
    (pathlib.Path, 3, pathlib.Path("3")), (Optional[pathlib.Path], "a", pathlib.Path("a")),
    (Point, {"x": "1"}, Point(1.0)), (Point, [2, 3], Point(2.0, "3")),
    (Optimizer, {"lr": "0.1"}, Optimizer(0.1)), (Optional[Optimizer], {"lr": 1, "name": 2}, Optimizer(1.0, "2")),
    (Setup, {"optimizer": {"lr": 1}, "sizes": ["1"], "later": {"lr": "2"}}, Setup(Optimizer(1.0), [1], Optimizer(2.0))),
    (Annotated[int, "seconds"], "3", 3), (Any, "3", "3"), (object, 3, 3), (Unknown, {"a": 1}, {"a": 1}),
    ("NotResolved", "3", "3"), (None, None, None), (typing.TypeVar("T"), 3, 3),
]
if sys.version_info >= (3, 10):
    TAKEN += [(int | None, "3", 3), (list[int], ["3"], [3]), (dict[str, int | str], {"a": 1}, {"a": 1})]

REFUSED = [
    (int, 0.5), (int, "0.5"), (int, "x"), (int, ""), (int, None), (int, True), (int, []), (int, "inf"), (int, float("nan")),
    (float, "x"), (float, None), (float, True), (float, []), (float, 10 ** 400),
    (str, None), (str, []), (str, {}), (bool, "maybe"), (bool, 2), (bool, None), (bool, []),
    (Optional[int], "x"), (Union[int, float], "x"), (List[int], "12"), (List[int], {"a": 1}), (List[int], [1, "x"]),
    (Tuple[int, int], [1]), (Tuple[int, int], [1, 2, 3]), (Dict[str, int], [1]), (Dict[int, int], {"a": 1}),
    (Set[int], [[]]), (Colour, "green"), (Colour, None), (Literal[1, "x"], "y"), (Literal[1], True),
    (pathlib.Path, None), (pathlib.Path, ["a"]), (Point, {"y": 1}), (Point, {}), (Point, [1, "a", 2]), (Point, 3),
    (Optimizer, {"lr": 1, "momentum": 2}), (Optimizer, {}), (Optimizer, 0.1), (Setup, {"optimizer": {"lr": "x"}}),
    (Checked, {"n": -1}), (None, 3),
]


def same(one, other):
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("annotation, value, expected", TAKEN, ids=lambda x: repr(x)[:40])
def test_a_value_is_cast_by_meaning(annotation, value, expected):
    assert same(cast(value, annotation, "parameter 'p'"), expected)


@pytest.mark.parametrize("annotation, value", REFUSED, ids=lambda x: repr(x)[:40])
def test_what_does_not_fit_is_refused_with_parameter_type_and_value(annotation, value):
    with pytest.raises(LabtaskerTypeError) as caught:
        cast(value, annotation, "parameter 'p'")
    assert str(caught.value).startswith("parameter 'p'")
    assert "expected " in str(caught.value) and "got " in str(caught.value)


@pytest.mark.parametrize("annotation, value, message", [
    (int, 0.5, "parameter 'p': expected int, got 0.5 (float)"),
    (List[int], [1, "x"], "parameter 'p', item 1: expected int, got 'x' (str)"),
    (Dict[str, int], {"a": None}, "parameter 'p', key 'a': expected int, got None (NoneType)"),
    (Setup, {"optimizer": {"lr": "x"}}, "parameter 'p', field 'optimizer', field 'lr': expected float, got 'x' (str)"),
    (Optimizer, {"lr": 1, "mom": 2}, "expected Optimizer, got {'lr': 1, 'mom': 2} (dict): no field 'mom', there are lr, name"),
    (Checked, {"n": -1}, "expected Checked, got {'n': -1} (dict): n must not be negative"),
    (Tuple[int, int], [1], "expected Tuple[int, int], got [1] (list): 1 items, not 2"),
    (Colour, "green", "expected Colour, got 'green' (str): one of 'r', 2 is needed"),
])
def test_the_message_names_the_very_place(annotation, value, message):
    with pytest.raises(LabtaskerTypeError) as caught:
        cast(value, annotation, "parameter 'p'")
    assert message in str(caught.value)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(LabtaskerTypeError) as caught:
        cast("x" * 100000, int, "parameter 'p'")
    assert len(str(caught.value)) < 500


def got(function, args, *given, required_fields=None, pass_args_dict=False, **named):
    """Return what the function returns for a task's args."""
    return BoundFunction(function, required_fields, pass_args_dict).call(args, given, named)


def fields(function, **options):
    return BoundFunction(function, **options).fields


def test_required_as_a_default_value():
    def main(lr: float = Required(), model=Required()):
        return lr, model
    assert fields(main) == ["lr", "model"]
    assert got(main, {"lr": "0.1", "model": {"a": 1}}) == (0.1, {"a": 1})


def test_required_inside_annotated():
    def main(lr: Annotated[float, Required()], n: Annotated[Optional[int], "note", Required()], rest=Required()):
        return lr, n, rest
    assert fields(main) == ["lr", "n", "rest"]
    assert got(main, {"lr": 1, "n": None, "rest": 2}) == (1.0, None, 2)


@pytest.mark.skipif(sys.version_info < (3, 9), reason="typing.Annotated is there from 3.9")
def test_required_inside_the_annotated_of_typing():
    def main(lr: typing.Annotated[float, Required()] = ...):
        return lr
    assert got(main, {"lr": 1}) == 1.0


@pytest.mark.parametrize("has_none", [False, True])
def test_required_inside_our_annotated(has_none, monkeypatch):
    """It is typing's where typing has one; the other works as well, as text and within other types too."""
    own = getattr(typing, "Annotated", None)
    if has_none:
        monkeypatch.delattr(typing, "Annotated", raising=False)
    ours = labtasker.Annotated[int, Required()]
    assert has_none or not own or type(ours) is type(own[int, Required()])

    def main(lr: labtasker.Annotated[float, "note", Required(alias="a.lr")], n: "labtasker.Annotated[int, Required()]" = None,
             many: labtasker.Annotated[List[labtasker.Annotated[int, "seeds"]], Required()] = ...,
             raw: labtasker.Annotated[Any, Required(resolver=str)] = ...):
        return lr, n, many, raw
    assert fields(main) == ["a.lr", "n", "many", "raw"]
    assert got(main, {"a": {"lr": "1"}, "n": "2", "many": ["3"], "raw": 4}) == (1.0, 2, [3], "4")
    with pytest.raises(LabtaskerTypeError, match="parameter 'n': expected "):
        got(main, {"a": {"lr": 1}, "n": "x", "many": [], "raw": 4})
    with pytest.raises(TypeError, match="Annotated"):
        labtasker.Annotated[int]


def test_a_resolver_gets_the_value_as_submitted_and_its_answer_is_not_cast():
    def main(a: Annotated[Dict[str, Any], Required(resolver=lambda a: Optimizer(**a))],
             b=Required(resolver=lambda b: sorted(b)), c: int = Required(resolver=str)):
        return a, b, c
    assert got(main, {"a": {"lr": 1}, "b": [2, 1], "c": 3}) == (Optimizer(1), [1, 2], "3")


def test_an_alias_is_another_key_and_its_dots_nest():
    def main(rate: float = Required(alias="optimizer.lr"), m=Required(alias="model-name")):
        return rate, m
    assert fields(main) == ["optimizer.lr", "model-name"]
    assert got(main, {"optimizer": {"lr": "1"}, "model-name": "vit"}) == (1.0, "vit")


def test_other_arguments_are_given_at_the_call():
    def main(before, lr: float = Required(), *rest, seed=0, model=Required(), **more):
        return before, lr, rest, seed, model, more
    args = {"lr": 1, "model": "m"}
    assert got(main, args, "b") == ("b", 1.0, (), 0, "m", {})
    assert got(main, args, "b", "c", seed=2, x=3) == ("b", 1.0, ("c",), 2, "m", {"x": 3})


def test_annotated_parameters_may_stand_before_given_ones():
    def main(lr: Annotated[float, Required()], folder, verbose=False):
        return lr, folder, verbose
    assert got(main, {"lr": 1}, "here") == (1.0, "here", False)
    assert got(main, {"lr": 1}, verbose=True, folder="there") == (1.0, "there", True)


def test_args_as_a_dict():
    def main(args, *given, lr=Required()):
        return args, given, lr
    args = {"lr": 1, "model": {"a": 2}}
    assert got(main, args, pass_args_dict=True) == (args, (), 1)
    assert got(main, args, 5, pass_args_dict=True) == (args, (5,), 1)


def test_fields_of_both_kinds_are_united():
    def main(lr=Required(), model=Required()):
        pass
    assert fields(main, required_fields=["seed", "lr"]) == ["seed", "lr", "model"]
    assert fields(main, required_fields=("seed",), pass_args_dict=True) == ["seed", "lr", "model", "*"]
    assert fields(lambda args: None, pass_args_dict=True) == ["*"]
    assert fields(lambda: None) == []


def test_annotations_as_text_are_resolved():
    namespace = {"labtasker": labtasker, "__name__": "of_a_user"}
    exec(compile("from __future__ import annotations\n"
                 "from typing import List\nfrom typing_extensions import Annotated\nfrom labtasker import Required\n"
                 "def main(lr: float = Required(), n: Annotated[List[int], Required()] = ..., x: OnlyForACheck = Required()):\n"
                 "    return lr, n, x\n", "user.py", "exec"), namespace)
    assert fields(namespace["main"]) == ["lr", "n", "x"]
    assert got(namespace["main"], {"lr": "1", "n": ["2"], "x": "3"}) == (1.0, [2], "3")


def test_a_task_without_the_key_is_named():
    def main(lr=Required(alias="a.lr")):
        pass
    with pytest.raises(LabtaskerTypeError, match="parameter 'lr': the task's args have no 'a.lr'"):
        got(main, {"a": {}})


async def a_coroutine():
    pass


async def an_async_generator():
    yield 1


def a_generator():
    yield 1


class CalledAsGenerator:
    def __call__(self):
        yield 1


@pytest.mark.parametrize("decorate, message", [
    (lambda: labtasker.loop(lambda: None), "write @labtasker.loop\\(\\), with parentheses"),
    (lambda: BoundFunction(lambda lr=Required: None), "write Required\\(\\), with parentheses"),
    (lambda: BoundFunction(a_coroutine), "plain functions, not .*: its call returns a coroutine and runs nothing"),
    (lambda: BoundFunction(a_generator), "its call returns a generator"),
    (lambda: BoundFunction(an_async_generator), "its call returns an async generator"),
    (lambda: BoundFunction(functools.partial(functools.partial(a_generator))), "its call returns a generator"),
    (lambda: BoundFunction(CalledAsGenerator()), "its call returns a generator"),
    (lambda: BoundFunction(Unknown), "plain functions"),
    (lambda: BoundFunction(3), "plain functions"),
    (lambda: labtasker.loop(required_fields="lr")(lambda: None), "a list of keys is needed"),
    (lambda: Required(resolver="x"), "a function is needed"),
    (lambda: Required(resolve=len), "resolve"),
    (lambda: Required("lr"), "positional"),
    (lambda: labtasker.loop(worker_id="w", create_worker_kwargs={"max_retries": 1}), "exclude each other"),
    (lambda: labtasker.loop(create_worker_kwargs={"retries": 1}), "'retries' is not one of"),
])
def test_a_wrong_use_is_an_error_at_decoration(decorate, message):
    with pytest.raises(TypeError, match=message):
        decorate()


@pytest.mark.parametrize("key", ["a b", "", "$x", ".a", "a.", 3])
def test_a_key_that_no_task_can_have_is_an_error_at_decoration(key):
    with pytest.raises(labtasker.LabtaskerError, match="key"):
        Required(alias=key)
    with pytest.raises(labtasker.LabtaskerError, match="key"):
        labtasker.loop(required_fields=[key])(lambda: None)


def test_required_twice_or_on_many_values_is_an_error():
    def twice(lr: Annotated[float, Required()] = Required()):
        pass

    def many(*lr: Annotated[float, Required()]):
        pass
    for function in (twice, many):
        with pytest.raises(LabtaskerTypeError, match="can't be marked with Required"):
            BoundFunction(function)


@pytest.mark.parametrize("given, named, message", [
    ((), {}, "missing a required argument: 'folder'.*Mark a parameter with Required"),
    ((1, 2), {}, "too many positional arguments"),
    ((1,), {"sede": 3}, "unexpected keyword argument 'sede'"),
    ((1,), {"lr": 3}, "main\\(lr=...\\): this comes from the task's args"),
])
def test_a_wrong_call_is_an_error_before_any_task_is_fetched(home, given, named, message):
    @labtasker.loop()
    def main(folder, lr=Required(), *, seed=0):
        raise AssertionError("not to be run")
    with pytest.raises(LabtaskerTypeError, match=message):
        main(*given, **named)
    assert not (home.cwd / ".labtasker").exists()


def test_annotations_that_can_not_be_evaluated_do_not_matter(monkeypatch):
    """From Python 3.14 on it is looking at them that raises NameError; this is such a function's stand-in."""
    class Lazy:
        __globals__ = {}

        @property
        def __annotations__(self):
            raise NameError("Tensor")
    library = types.SimpleNamespace(Format=types.SimpleNamespace(FORWARDREF=3), get_annotations=lambda owner, format: {"x": int, "y": "Tensor"})
    monkeypatch.setitem(sys.modules, "annotationlib", library)
    assert labtasker._type_hints(Lazy()) == {"x": int, "y": "Tensor"}
