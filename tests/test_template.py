"""Templates: `%(key)` in commands. The cases are in cases/templates.txt."""
import json
import random
import re
import shlex
import shutil
import subprocess
import sys

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


ODD_VALUES = ["", "a b", "it's", '"', "$HOME", "`touch ran`", "$(touch ran)", "\\", "a\\", "\n", "x\n\n", "-n", "!", "\u2028", "*", "~", "#x", "a=b",
              "if", "{a,b}", "a,b", "2", "-1", "0.5", "';touch ran;'", '";touch ran;"', "\\'; touch ran #", "E\ntouch ran\n", "x[$(touch ran)]",
              "\n touch ran\n", "\r", "%(v)", "'\"'\"';touch ran;'", "\\\"$(touch ran)\\\"", "]]; touch ran;[[", "}", "done"]
SHELLS = [words for words in (["sh"], ["bash"], ["bash", "--posix"], ["zsh", "-f"], ["mksh"], ["busybox", "ash"]) if shutil.which(words[0])]
OUTSIDE = {"%(v)": "V", "%(w)": "W", "a": "a", "/": "/", "=": "=", "\\'": "'", '\\"': '"', "\\\\": "\\", "\\$": "$", "\\#": "#", "''": "", '""': "",
           "$(printf %s \"it's\")": "it's", '"$(printf %s "$(echo "x  y")")"': "x  y", "`echo b`": "b", "${NONE:-d}": "d", "$((1+2))": "3",
           '"${H#he}"': "llo"}
WITHIN_DOUBLE = {"%(v)": "V", "%(w)": "W", "a": "a", "'": "'", "#": "#", " ": " ", "\n": "\n", "(": "(", "<<E": "<<E", '\\"': '"', "\\$": "$", "\\\\": "\\",
                 "${H}": "hello", "$%(v)": "$V", "`echo '('`": "(", "$(echo ')')": ")"}
WITHIN_SINGLE = {"%(v)": "V", "%(w)": "W", "a": "a", '"': '"', "\\": "\\", "$(": "$(", "`": "`", "#": "#", "\n": "\n", "<<E": "<<E"}
AROUND = ["show %s\n", "# it's \"\nshow %s\n", "show %s # don't %%(v)\n", "if :; then show %s; fi\n", "case x in a) ;; *) show %s;; esac\n",
          "( show %s )\n", "f() { show %s; }; f\n", ": <<E\nit's \" ( $H\nE\nshow %s\n", ": <<'E'\nit's \" $( `\nE\nshow %s\n",
          "X=$(echo it) && show %s\n", ": &&\\\nshow %s\n", "V=%s; show \"$V\"\n", "echo $(echo \"it's\" \"(\") >&2; show %s\n", ": <<-E\n\tx\n\tE\nshow %s\n"]


def random_word(pick):
    """Return a word of a shell with placeholders, and what it stands for, with V and W for the values."""
    text, means = [], []
    for _ in range(pick.randint(1, 5)):
        quote, pieces = pick.choice([("", OUTSIDE), ('"', WITHIN_DOUBLE), ("'", WITHIN_SINGLE)])
        chosen = [pick.choice(list(pieces)) for _ in range(pick.randint(1, 3))]
        text += [quote] + chosen + [quote]
        means += [pieces[piece] for piece in chosen]
    return "".join(text), [meaning for meaning in means if meaning]


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: "-".join(words))
def test_a_shell_gets_each_value_as_it_is_wherever_its_placeholder_stands(shell, tmp_path):
    pick, shown = random.Random(" ".join(shell)), 0
    for _ in range(60):
        values = {"v": pick.choice(ODD_VALUES), "w": pick.choice(ODD_VALUES)}
        body, wanted = "", ""
        for _ in range(8):
            word, means = random_word(pick)
            if word.startswith("=") and shell[0] == "zsh":
                continue  # to zsh that is the path of a command
            body += pick.choice(AROUND) % word
            wanted += "<%s>[1]" % "".join({"V": values["v"], "W": values["w"], "$V": "$" + values["v"]}.get(one, one) for one in means)
            shown += 1
        template = Template(body)
        text = template.filled(values, labtasker.shell_writers(template, is_zsh=shell[0] == "zsh"))
        begin = "H=hello; unset NONE; set -f; show() { printf '<%s>' \"$@\"; printf '[%s]' $#; }\n"
        done = subprocess.run(shell + ["-c", begin + text], cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.stdout.decode("utf-8") == wanted, (body, values, done.stderr)
        assert not list(tmp_path.iterdir()), (body, values)
    assert shown > 300


PIECES = ["'", '"', "`", "$(", ")", "(", "$((", "))", "((", "${", "}", "\\", "\n", "#", " #", " ", "x", "echo ", "$x", "$", "$'", "<<E", "<<-E\n", "<<'E'\n",
          "\nE\n", "E", "<<<", "<", ">", ";", "|", "&&", "[[ ", " ]]", " -eq ", "case x in a) ", "esac", "%(v)", "%(v)", "%(v)", '"%(v)"', "'%(v)'", "=",
          "a=", "a[", "]", "let ", "!", "~", "*", "%%(", "$$", "{", "if ", "then ", "fi", "declare -i x=", "${x:-", "${x#", "$[", "\\\n"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: "-".join(words))
def test_no_value_is_run_by_the_shell_whatever_the_text_around_it(shell, tmp_path):
    """Most of these texts are refused or no commands at all; what matters is that none runs what a value brings."""
    pick, ran, refused = random.Random("|".join(shell)), 0, 0
    evil = [value for value in ODD_VALUES if "touch" in value]
    while ran < 150:
        try:
            template = Template("".join(pick.choice(PIECES) for _ in range(pick.randint(2, 12))))
            text = template.filled({"v": pick.choice(evil)}, labtasker.shell_writers(template, is_zsh=shell[0] == "zsh"))
        except labtasker.LabtaskerValueError:
            refused += 1
            continue
        if template.spans:
            ran += 1
            subprocess.run(shell + ["-c", text], cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            assert not (tmp_path / "ran").exists(), (template.text, text)
    assert refused > 20


@pytest.mark.parametrize("text, place, words", [
    ("cat <<EOF\nlr=%(v)\nEOF", 13, "in a here document"), ("cat <<'EOF'\n%(v)\nEOF", 12, "in a here document"), ("cat <<%(v)\nx", 6, "here document"),
    ("echo $(f %(v))", 9, "within $(...)"), ('echo "$(f "%(v)")"', 11, "within $(...)"), ("echo $(cat <<E\n%(v)\nE\n)", 15, "here document"),
    ("echo `f %(v)`", 8, "within `...`"), ('echo "`f %(v)`"', 9, "within `...`"), ("echo ${x:-%(v)}", 10, "within ${"), ('"${x:-"%(v)"}"', 7, "within ${"),
    ("echo $'%(v)'", 7, "within $'...'"), ("echo \\%(v)", 6, "behind a backslash"), ('echo "\\%(v)"', 7, "behind a backslash"), ("echo $%(v)", 6, "behind a $"),
    ("echo $[%(v)]", 7, "within $["), ("x=$(case x in a) echo;; esac) y %(v)", 32, "case within $(...) in line 1"),
    ("echo ${x:-'}'}\necho %(v)", 20, "in line 1"), ("echo $'a\\'b' %(v)", 13, "a backslash in $'...'"),
    ("echo \0 %(v)", 7, "a character NUL in line 1"), ("cat <<E 'a\nb'\nE\necho %(v)", 21, "lines within quotes behind <<"),
    ("x=$(cat <<E) y %(v)", 15, "a here document in $(...) that has not begun"), ("x=$(cat <<E\nE)\nE\n) %(v)", 19, "a here document in $(...)"),
    ("cat <<E'a'\\b\nE\necho %(v)", 20, "<< with a word of two kinds of quotes"),
])
def test_a_place_where_a_value_can_not_be_put_is_shown(text, place, words):
    with pytest.raises(TemplateError, match=re.escape(words)) as caught:
        Template(text).shell({"v": 1})
    assert caught.value.column == place and "V=%(v)" in str(caught.value)


def test_a_text_without_a_placeholder_behind_what_can_not_be_read_is_taken():
    assert Template("%(v) $'a\\'b'").shell({"v": 1}) == "1 $'a\\'b'"


@pytest.mark.parametrize("text", ["echo a(b) %(v)", "echo (#q) %(v)"])
def test_a_parenthesis_within_a_word_is_read_by_zsh_in_its_own_way(text):
    for is_zsh in (True, False):
        template = Template(text)
        if is_zsh:
            with pytest.raises(TemplateError, match="a parenthesis within a word of zsh"):
                labtasker.shell_writers(template, is_zsh)
        else:
            assert labtasker.shell_writers(template, is_zsh)


def test_words_have_no_place_in_python_text():
    with pytest.raises(TemplateError, match="becomes words, which Python text has none of"):
        labtasker.python_writers(Template("print(%(v...))"))


@pytest.mark.parametrize("text", ["echo $((%(v) + 1))", "((%(v) > 2))", "for ((i=0;i<%(v);i++)); do :; done", "[[ %(v) -gt 2 ]]", '[[ "%(v)" -gt 2 && a ]]',
                                  "let x=%(v)", "declare -i x='%(v)'", "a[%(v)]=1", "a=([%(v)]=1)", "if [[ x && '%(v)' -eq 3 ]]; then :; fi"])
def test_where_a_shell_calculates_a_value_is_a_number(text):
    assert Template(text).shell({"v": 3}) == text.replace("%(v)", "3")
    assert Template(text).shell({"v": "2"}) == text.replace("%(v)", "2")
    for value in ("a[$(touch ran)]", "x", "", "1;2", "1 + 1", None, True, "3\n"):
        with pytest.raises(labtasker.LabtaskerValueError, match="shell arithmetic, which takes a number"):
            Template(text).shell({"v": value})


def test_digits_and_words_of_the_shell_do_not_join_what_stands_beside_them():
    assert Template("echo %(v)>out").shell({"v": 2}) == "echo '2'>out"
    assert Template("echo $x%(v) \"$x%(v)\"").shell({"v": "y"}) == "echo $x'y' \"$x\"'y'\"\""
    assert Template("%(v) x").shell({"v": "if"}) == "'if' x"
    assert Template("%(v) x").shell({"v": "A=b"}) == "'A=b' x"


def run_python(text, args):
    """Return what a script of Python prints as JSON."""
    template = Template(text)
    filled = template.filled(args, labtasker.python_writers(template))
    return json.loads(subprocess.check_output([sys.executable, "-c", "import json\n" + filled]).decode("utf-8"))


@pytest.mark.slow
def test_python_gets_values_as_its_own_literals_and_within_its_texts():
    values = [1, -0.5, True, None, {"a": [1, "it's", float("inf")]}, "'" * 3 + '"' * 3 + "\\", *ODD_VALUES]
    args = {"k%d" % i: value for i, value in enumerate(values)}
    bare = "print(json.dumps([%s]))" % ", ".join("%%(%s)" % key for key in args)
    assert run_python(bare, args) == values
    for quote in ("'", '"', "'" * 3, '"' * 3):
        text = "print(json.dumps([%s]))  # don't %%(k0)" % ", ".join("%s<%%(%s)>%s" % (quote, key, quote) for key in args)
        assert run_python(text, args) == ["<%s>" % labtasker.value_text(value) for value in values]


@pytest.mark.parametrize("text", ["f'{x} %(v)'", "r'%(v)'", "b'%(v)'", "f%(v)", "%(v)x", "'\\%(v)'", "'\\x4%(v)'", "'\\1%(v)'", "f'{d['a']}' + '%(v)'", "'open\n%(v)"])
def test_a_place_in_a_text_of_python_that_takes_no_value_is_shown(text):
    with pytest.raises(TemplateError):
        labtasker.python_writers(Template(text))


@pytest.mark.parametrize("program, is_known", [
    (["/bin/sh"], True), (["/usr/bin/env", "bash"], True), (["/usr/bin/env", "-S", "bash", "-e"], True), (["/opt/bash-5.2"], True), (["/bin/zsh"], True),
    (["python3.11", "-u"], True), (["/usr/bin/env", "perl"], False), (["node"], False), (["fish"], False), (["/bin/csh"], False), (["/x/tcsh"], False),
])
def test_a_program_whose_quoting_is_not_known_gets_no_values_in_its_text(program, is_known):
    assert labtasker.writers_for(program, Template("no value")) == []
    if is_known:
        assert len(labtasker.writers_for(program, Template("x %(v) y"))) == 1
    else:
        with pytest.raises(labtasker.UsageError, match="give it the values as words"):
            labtasker.writers_for(program, Template("x %(v) y"))


@given(st.text(max_size=60))
def test_any_text_is_taken_or_refused_with_a_column(text):
    try:
        template = Template(text)
    except TemplateError as error:
        assert text[error.column:error.column + 2] == "%("
    else:
        assert set("".join(template.parts[::2])) <= set(text)


# Placeholders that become words


def words_of(args, *argv, shell=None):
    command = labtasker.JobCommand(list(argv) or None, shell)
    return command.words(args, None)[0]


@pytest.mark.parametrize("placeholder, value, words", [
    ("%(--k)", 0.5, ["--k=0.5"]), ("%(--k)", True, ["--k"]), ("%(--k)", False, []), ("%(--k)", None, []), ("%(--k)", 0, ["--k=0"]),
    ("%(--k)", "", ["--k="]), ("%(--k)", "a b'$(x)\n", ["--k=a b'$(x)\n"]), ("%(--k)", [1, "a"], ['--k=[1, "a"]']), ("%( --k )", 1, ["--k=1"]),
    ("%(--[no-]k)", True, ["--k"]), ("%(--[no-]k)", False, ["--no-k"]), ("%(--[no-]k)", None, []), ("%(--[no]k)", False, ["--nok"]),
    ("%(k...)", [1, "a b", None], ["1", "a b", "None"]), ("%(k...)", [], []), ("%(k...)", "a 'b c' d=${x}", ["a", "b c", "d=${x}"]),
    ("%(k...)", 3, ["3"]), ("%(k...)", None, []), ("%(k...)", "", []), ("%(k...)", False, ["False"]),
    ("%(--k...)", [1, "x y"], ["--k=1", "--k=x y"]), ("%(--k...)", "a b", ["--k=a", "--k=b"]), ("%(--k...)", None, [])])
def test_a_placeholder_becomes_no_word_one_or_several(placeholder, value, words):
    assert words_of({"k": value}, "run", placeholder, "end") == ["run"] + words + ["end"]
    found = subprocess.run(words_of({"k": value}, shell="printf '%s\\0' " + placeholder + " end"), stdout=subprocess.PIPE).stdout
    assert found.decode().split("\0")[:-1] == words + ["end"]


ARGS = {"lr": 0.1, "opt": {"name": "a dam", "betas": [0.9, 0.99]}, "flag": True, "off": False, "none": None, "n_layers": 3, "empty": {}}


@pytest.mark.parametrize("placeholder, words", [
    ("%(--*)", ["--lr=0.1", "--opt.name=a dam", "--opt.betas=[0.9, 0.99]", "--flag", "--n_layers=3", "--empty={}"]),
    ("%(--*-)", ["--lr=0.1", "--opt.name=a dam", "--opt.betas=[0.9, 0.99]", "--flag", "--n-layers=3", "--empty={}"]),
    ("%(*)", ["lr=0.1", "opt.name='a dam'", "opt.betas=[0.9,0.99]", "flag=true", "off=false", "none=null", "n_layers=3", "empty={}"])])
def test_a_star_stands_for_all_arguments_but_those_that_the_template_names(placeholder, words):
    assert words_of(ARGS, "run", placeholder) == ["run"] + words
    named = [word for word in words if not re.match("(--)?(lr|opt.name)=", word)]
    assert words_of(ARGS, "run", "%(lr)", placeholder, "%(--opt.name)") == ["run", "0.1"] + named + ["--opt.name=a dam"]
    below = [word for word in words if not re.match("(--)?opt", word)]
    assert words_of(ARGS, "run", "%(opt)", placeholder)[2:] == below, "what stands below a key that is named is named too"
    assert labtasker.JobCommand(["run", placeholder]).keys == ["*"]
    assert labtasker.JobCommand(["run", "%(lr)", placeholder]).keys == ["lr", "*"]
    assert words_of(dict(ARGS, **{"@task": "id"}), "run", placeholder, "%(@task)") == ["run"] + words + ["id"]


@pytest.mark.parametrize("value, text", [
    ("adam", "adam"), ("a/b.c", "a/b.c"), ("1", "'1'"), ("true", "'true'"), ("Null", "'Null'"), ("", "''"), ("it's", "'it\\'s'"), ("a,b", "'a,b'"),
    ("x\\", "'x\\\\'"), ("\\'", "'\\\\\\''"), ("a\\b", "'a\\b'"), ("${opt.lr}", "${opt.lr}"), ("a ${b}", "'a ${b}'"), ([1, "b c", None], "[1,'b c',null]"),
    ({"a": {"b": True}}, "{a:{b:true}}"), ("${", "'\\${'"), ("\\${ ${a}", "'\\\\\\${ ${a}'"), ("${f:'x'} \"", "\"${f:'x'} \\\"\""), (float("inf"), "inf"), (1e-5, "1e-05"), ("nan", "'nan'"), (".5", "'.5'")])
def test_a_value_for_hydra_is_quoted_where_it_would_be_read_as_something_else(value, text):
    assert labtasker.hydra_text(value) == text


@pytest.mark.parametrize("argv, says", [
    (["run", "--lr=%(--lr)"], "word of its own"), (["run", "x%(k...)"], "word of its own"), (["run", "%(--a)%(--b)"], "word of its own"),
    (["run", "%(*) "], "word of its own"), (["run", "%(--[no-]k...)"], "a switch has no items"), (["run", "%(--)"], "is no key"),
    (["run", "%(**)"], "is no key"), (["run", "%(k..)"], "is no key"), (["run", "%(--[yes]k)"], "is no key"), (["run", "%(@slots)"], "did you mean @slot")])
def test_a_placeholder_that_can_not_be_read_there_is_shown_before_anything_is_fetched(argv, says):
    with pytest.raises(TemplateError, match=re.escape(says)) as caught:
        labtasker.JobCommand(argv)
    assert str(caught.value).endswith("^")


@pytest.mark.parametrize("text", ["echo '%(k...)'", 'echo "%(--k)"', "echo x%(--k)", "echo %(--*)x", "echo $((%(k...)))", "x=%(--k)", "cat <<E\n%(--k)\nE"])
def test_words_are_refused_within_quotes_and_within_a_word(text):
    with pytest.raises(TemplateError):
        labtasker.JobCommand(shell=text)


@pytest.mark.parametrize("argv, args, says", [
    (["run", "%(*)"], {"k": [{"1": 1}]}, "Hydra can't read the key '1' within a list"), (["run", "%(*)"], {"3x": 1}, "Hydra can't read the key '3x'"),
    (["run", "%(k...)"], {"k": {"a": 1}}, "takes a list or a text"), (["run", "%(k...)"], {"k": "it's"}, "can't be split"),
    (["run", "%(--[no-]k)"], {"k": "false"}, "takes True, False or None, as --k=False submits them, not 'false'"), (["%(k...)"], {"k": []}, "no words"), (["run", "%(--a.b)"], {"a": 1}, "have no 'a.b'")])
def test_a_value_that_can_not_become_words_fails_its_run_with_a_word(argv, args, says):
    with pytest.raises(labtasker.LabtaskerValueError, match=says):
        words_of(args, *argv)


def test_a_dash_in_a_placeholder_stands_for_the_underscore_of_the_submission():
    assert labtasker.JobCommand(["run", "%(learning-rate)", "%(--weight-decay)"]).keys == ["learning_rate", "weight_decay"]
    assert words_of({"learning_rate": 1, "weight_decay": 2}, "run", "%(learning-rate)", "%(--weight-decay)") == ["run", "1", "--weight-decay=2"]


def test_a_star_takes_tasks_with_any_further_keys(home):
    ids = [labtasker.submit_task(args=args).task_id for args in ({"lr": 1}, {"lr": 1, "more": True}, {"more": 2})]
    run = home.cli("loop", "--", "echo", "%(--lr)", "%(--*-)")
    assert [labtasker.get_task(one).status for one in ids] == ["success", "success", "pending"]
    assert "--lr=1\n" in run.stdout and "--lr=1 --more\n" in run.stdout
    home.cli("loop", "-c", "echo %(*)")
    assert labtasker.get_task(ids[2]).status == "success"
