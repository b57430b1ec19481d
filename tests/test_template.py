"""Templates: `%(key)` in commands. The cases are in cases/templates.txt."""
import json
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harness
import labtasker
from labtasker import Template, TemplateError


def read_cases():
    """Return the blocks of the file as dicts."""
    blocks = (harness.TESTS / "cases" / "templates.txt").read_text(encoding="utf-8").split("\n\n")
    cases = []
    for block in blocks:
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            pairs = [line.partition(":") for line in lines]
            cases.append({name.strip(): text[1:] for name, _, text in pairs})
    return cases


CASES = read_cases()
GOOD = [case for case in CASES if "error" not in case]
BAD_SYNTAX = [case for case in CASES if "error" in case and "args" not in case]
BAD_ARGS = [case for case in CASES if "error" in case and "args" in case]


def test_there_are_cases_of_each_kind():
    assert len(GOOD) >= 10 and len(BAD_SYNTAX) >= 8 and len(BAD_ARGS) >= 2
    assert len(GOOD) + len(BAD_SYNTAX) + len(BAD_ARGS) == len(CASES)


def ids(case):
    return case["template"]


@pytest.mark.parametrize("case", GOOD, ids=ids)
def test_values_take_the_place_of_keys(case):
    template, args = Template(case["template"]), json.loads(case["args"])
    assert template.plain(args) == case["plain"]
    assert template.shell(args) == case["shell"]
    assert template.keys == case["keys"].split()


@pytest.mark.parametrize("case", BAD_SYNTAX, ids=ids)
def test_a_mistake_is_shown_with_its_place(case):
    with pytest.raises(TemplateError) as caught:
        Template(case["template"])
    message, shown, caret = str(caught.value).split("\n")
    assert case["error"] in message
    assert shown == "  " + case["template"]
    assert caret == "  " + case["place"].rstrip()
    assert caught.value.column == case["place"].index("^")


@pytest.mark.parametrize("case", BAD_ARGS, ids=ids)
def test_a_key_that_args_lack_is_named(case):
    with pytest.raises(labtasker.LabtaskerValueError, match=case["error"]):
        Template(case["template"]).plain(json.loads(case["args"]))


def test_a_mistake_in_a_later_line_shows_that_line():
    with pytest.raises(TemplateError) as caught:
        Template("LOG=%(log)\ntrain %(lr\nmore )")
    assert str(caught.value).endswith("\n  train %(lr\n        ^")


def test_a_script_keeps_its_lines():
    template = Template("LOG=/logs/%(dataset)/%(model)\ntrain --model %(model)\n")
    assert template.shell({"dataset": "a b", "model": "m"}) == "LOG=/logs/'a b'/m\ntrain --model m\n"
    assert template.keys == ["dataset", "model"]


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40))
def test_whatever_the_value_a_shell_sees_one_word(value):
    words = shlex.split(Template("x %(v) y").shell({"v": value}))
    assert words == ["x", value, "y"]


def test_a_real_shell_agrees():
    nasty = "a'b\"c$HOME`id`\\ \n;|&<>*?[]{}()!#~é"
    command = Template("printf %s %(v)").shell({"v": nasty})
    assert subprocess.check_output(["/bin/sh", "-c", command]).decode("utf-8") == nasty


@given(st.text(max_size=60))
def test_any_text_is_taken_or_refused_with_a_column(text):
    try:
        template = Template(text)
    except TemplateError as error:
        assert text[error.column:error.column + 2] == "%("
    else:
        literal = "".join(part or "%(" if i % 2 else part for i, part in enumerate(template.parts) if not i % 2 or not part)
        assert set(literal) <= set(text)
