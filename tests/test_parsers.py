"""What a task has in its arguments comes out of the parsers that experiments use as it went in. `tox -e parsers` has them."""
import argparse
import enum
import os
import random
import re
import subprocess
import typing

import pytest

import labtasker

pytestmark = pytest.mark.slow
SETTINGS = int(os.environ.get("LT_TEST_SETTINGS", 200))
PIECES = ["a", "Z", "_", "1", ".", "/", "-", "--", "+", "~", " ", "  ", "\t", "\n", "\r", "'", '"', "\\", "\\\\", "$", "${", "}", "{", "[", "]", "(", ")", ",",
          ":", "=", "@", "#", "%", "%(a)", "%%(", "&", "|", "*", "?", "!", "<", ">", "^", ";", "`", "é", "\u2028", "日", "\U0001f600", "true", "null", "inf", "1e5",
          "0x1", "None", "--text", "-x", "--no-switch", "$(touch ran)", "`touch ran`", "EOF\n"]
NUMBERS = [0, -1, 10 ** 20, 0.1, -0.0, 1e16, 1e-7, 5e-324, 1.7976931348623157e308, 123456789.125]


def parser_package(name):
    return pytest.importorskip(name, reason="%s is not installed here; tox -e parsers has it" % name.partition(".")[0])


def odd_text(dice):
    return "".join(dice.choice(PIECES) for _ in range(dice.randrange(6)))


def odd_list(dice, begin=""):
    return [begin + odd_text(dice) for _ in range(dice.randrange(4))]


def each_setting(template, setting, folder, count=SETTINGS):
    """Yield (args, the words that a command's job gets) of random settings; by an argv list, by -c and by a script the same."""
    dice, made = random.Random(" ".join(template)), []
    in_list = labtasker.JobCommand(["run"] + template)
    text = "show " + " ".join(template) + "\n"
    (folder / "script").write_text(text)
    in_text, script = labtasker.JobCommand(shell=text), labtasker.JobCommand(script_path=folder / "script")
    for _ in range(count):
        args = setting(dice)
        made.append((args, in_list.words(args, None)[0][1:], in_text.words(args, None)[0][-1]))
        if len(made) % 100 == 1:
            path = script.words(args, str(folder))[1]
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
                assert file.read() == made[-1][2]
    (folder / "all").write_text("show() { printf '%s\\0' \"$@\" END; }\n" + "".join(text for _, _, text in made), encoding="utf-8", newline="")
    shown = iter(subprocess.run(["sh", str(folder / "all")], stdout=subprocess.PIPE, cwd=str(folder), check=True).stdout.decode().split("\0"))
    for args, words, text in made:
        assert [next(shown) for _ in words] == words and next(shown) == "END", text
        yield args, words
    assert next(shown) == "" and not (folder / "ran").exists()


def common(dice):
    return {"text": odd_text(dice), "number": dice.choice(NUMBERS), "switch": dice.random() < 0.5, "each": odd_list(dice),
            "maybe": dice.choice([None, odd_text(dice)])}


def for_argparse(value):
    """Return a value without "--" in its texts, which argparse itself loses: `--text=--` is an empty list to it."""
    if isinstance(value, dict):
        return {key: for_argparse(item) for key, item in value.items()}
    return list(map(for_argparse, value)) if isinstance(value, list) else re.sub("-+", "-", value) if isinstance(value, str) else value


def test_argparse(tmp_path):
    def setting(dice):
        return for_argparse(dict(common(dice), many=odd_list(dice, "x"), plain=dice.random() < 0.5))
    parser = argparse.ArgumentParser()
    for name, how in (("text", {}), ("number", {"type": float}), ("each", {"action": "append", "default": []}), ("maybe", {}),
                      ("many", {"nargs": "*"}), ("plain", {"action": "store_true"})):
        parser.add_argument("--" + name, **how)
    if not hasattr(argparse, "BooleanOptionalAction"):
        pytest.skip("this Python's argparse has no BooleanOptionalAction")
    parser.add_argument("--switch", action=argparse.BooleanOptionalAction)
    template = "%(--text) %(--number) %(--[no-]switch) %(--each...) %(--maybe) %(--plain) --many %(many...)".split()
    for args, words in each_setting(template, setting, tmp_path):
        assert vars(parser.parse_args(words)) == args


def test_click(tmp_path):
    click = parser_package("click")

    @click.command()
    @click.option("--text")
    @click.option("--number", type=float)
    @click.option("--switch/--no-switch", default=None)
    @click.option("--each", multiple=True)
    @click.option("--maybe")
    @click.option("--pair", nargs=2)
    @click.option("--flag", is_flag=True)
    @click.argument("files", nargs=-1)
    def main(**values):
        return values
    template = "%(--text) %(--number) %(--[no-]switch) %(--each...) %(--maybe) --pair %(pair...) %(--flag) -- %(files...)".split()
    for args, words in each_setting(template, lambda dice: dict(
            common(dice), files=odd_list(dice), pair=[odd_text(dice), odd_text(dice)], flag=dice.random() < 0.5), tmp_path):
        found = main.main(words, standalone_mode=False)
        assert {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()} == args


def test_typer(tmp_path):
    typer = parser_package("typer")
    app = typer.Typer()

    @app.command()
    def main(files: typing.List[str] = typer.Argument(None), text: str = "-", number: float = 9, switch: typing.Optional[bool] = None,
             each: typing.List[str] = typer.Option([]), maybe: typing.Optional[str] = None, some_pair: typing.Tuple[str, int] = ("", 0)):
        return dict(text=text, number=number, switch=switch, each=list(each), maybe=maybe, files=list(files or []), some_pair=list(some_pair))
    command = typer.main.get_command(app)
    template = "%(--text) %(--number) %(--[no-]switch) %(--each...) %(--maybe) --some-pair %(some-pair...) -- %(files...)".split()
    for args, words in each_setting(template, lambda dice: dict(
            common(dice), files=odd_list(dice), some_pair=[odd_text(dice), dice.randrange(-9, 9)]), tmp_path):
        assert command.main(words, standalone_mode=False) == args


def test_tyro(tmp_path):
    tyro = parser_package("tyro")
    dataclasses = pytest.importorskip("dataclasses")
    Kind = enum.Enum("Kind", "ADAM SGD")
    opt = dataclasses.make_dataclass("Opt", [("lr", float), ("kind", Kind, Kind.ADAM), ("weight_decay", float, 0.0)])
    config = dataclasses.make_dataclass("Config", [
        ("text", str), ("number", float), ("opt", opt), ("switch", bool, False), ("many", typing.Tuple[str, ...], ()), ("use_cuda", bool, True)])

    def setting(dice):
        return {"text": odd_text(dice), "number": dice.choice(NUMBERS), "switch": dice.random() < 0.5, "many": odd_list(dice, "x"),
                "use_cuda": dice.random() < 0.5, "opt": {"lr": dice.choice(NUMBERS), "kind": dice.choice(["ADAM", "SGD"]), "weight_decay": dice.choice(NUMBERS)}}
    template = "%(--*-) %(--[no-]switch) %(--[no-]use-cuda) --many %(many...)".split()
    for args, words in each_setting(template, setting, tmp_path):
        found = dataclasses.asdict(tyro.cli(config, args=words))
        found["opt"]["kind"] = found["opt"]["kind"].name
        assert dict(found, many=list(found["many"])) == args


def test_absl(tmp_path):
    flags = parser_package("absl.flags")
    for args, words in each_setting("%(--text) %(--number) %(--[no]switch) %(--each...) %(--maybe)".split(), common, tmp_path):
        values = flags.FlagValues()
        for define, name, default in ((flags.DEFINE_string, "text", ""), (flags.DEFINE_float, "number", 9), (flags.DEFINE_boolean, "switch", None),
                                      (flags.DEFINE_multi_string, "each", []), (flags.DEFINE_string, "maybe", None)):
            define(name, default, "", flag_values=values)
        assert values(["run"] + words) == ["run"]
        assert {name: values[name].value for name in values} == args


def test_jsonargparse_as_in_lightningcli(tmp_path):
    jsonargparse = parser_package("jsonargparse")

    def fit(text: str, number: float, use_bn: bool, layers: typing.List[int], names: typing.List[str]):
        return locals()
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(fit, "model")

    def setting(dice):
        return for_argparse({"model": {
            "text": odd_text(dice), "number": dice.choice(NUMBERS), "use_bn": dice.random() < 0.5,
            "layers": [dice.randrange(-9, 9) for _ in range(dice.randrange(4))], "names": odd_list(dice)}})
    for args, words in each_setting(["%(--*)", "--model.use_bn=%(model.use_bn)"], setting, tmp_path):
        assert parser.parse_args(words).as_dict() == args


# Hydra


KEYS = ["a", "b", "c-d", "e_1", "_", "A", "true", "null", "on", "7", "3x", "1e5", "é"]
INTERPOLATIONS = ["${s.a}", "${oc.env:HOME}", "${oc.env:NONE,'a, b'}", "${.a}", "${..b.c[0]}", "${s.${s.a}}", "${ s.a }", "${oc.env:NONE,${s.a}}"]


def hydra_value(dice, depth=3):
    kind = dice.randrange(7 if depth else 5)
    if kind < 3:
        return odd_text(dice)
    if kind == 3:
        return dice.choice(NUMBERS + [float("inf"), True, False, None])
    if kind == 4:
        return dice.choice(INTERPOLATIONS)
    if kind == 5:
        return [hydra_value(dice, depth - 1) for _ in range(dice.randrange(4))]
    return {dice.choice(KEYS): hydra_value(dice, depth - 1) for _ in range(dice.randrange(3))}


def texts_in(value):
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def is_written_for_hydra(args):
    """Return whether Hydra's grammar has a way to write the keys; the text that OmegaConf takes for a missing value is left out."""
    try:
        labtasker.JobCommand(["run", "%(*)"]).words(args, None)
    except labtasker.LabtaskerValueError as error:
        assert "Hydra can't read the key" in str(error)
        return False
    return "???" not in texts_in(args)


def hydra_setting(dice):
    while True:
        args = {dice.choice(KEYS): hydra_value(dice) for _ in range(3)}
        if is_written_for_hydra(args):
            return args


def differences(node, args, place=""):
    """Yield where what Hydra made differs: an interpolation as it is written, all else as it is resolved."""
    for key, wanted in args.items() if isinstance(args, dict) else enumerate(args):
        if isinstance(wanted, (dict, list)):
            if len(node[key]) != len(wanted):
                yield "%s.%s" % (place, key), wanted, node[key]
            yield from differences(node[key], wanted, "%s.%s" % (place, key))
            continue
        is_kept = isinstance(wanted, str) and any(one in wanted for one in INTERPOLATIONS)
        found = node._get_node(key)._value() if is_kept else node[key]
        if repr(found) != repr(wanted):
            yield "%s.%s" % (place, key), wanted, found


def test_hydra(tmp_path):
    hydra = parser_package("hydra")
    made = list(each_setting(["%(*)"], hydra_setting, tmp_path))
    with hydra.initialize(version_base=None, config_path=None):
        for begin in range(0, len(made), 50):
            part = made[begin:begin + 50]
            found = hydra.compose(overrides=["+s%d.%s" % (number, word) for number, (_, words) in enumerate(part) for word in words])
            for number, (args, words) in enumerate(part):
                assert not list(differences(found["s%d" % number], args)), words
