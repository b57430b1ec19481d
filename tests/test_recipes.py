"""docs/recipes.rst: each recipe's commands are run, with the real packages where they are installed (`tox -e parsers`), and by
default with programs that write down what they were started with."""
import importlib
import json
import os
import re
import shlex
import sys

import pytest

import labtasker
from harness import ROOT

PAGE = (ROOT / "docs" / "recipes.rst").read_text(encoding="utf-8")
STAND_IN = r'''#!%s -S
import json, os, sys
if sys.argv[1:2] == ["hard.py"]:
    os.execv(sys.executable, sys.argv)
print("step 5: train loss 1.5, val loss 1.25")
with open(os.path.join(os.environ["LABTASKER_LOG_DIR"], "summary.json"), "w") as file:
    json.dump({"words": [os.path.basename(sys.argv[0])] + sys.argv[1:], "folder": os.getcwd()}, file)
files = os.environ["LABTASKER_TASK_DIR"]
if any(word.startswith("--init_from") for word in sys.argv) and os.environ["LABTASKER_ATTEMPT"] == "1":
    open(os.path.join(files, "ckpt.pt"), "w").close()
    sys.exit(1)
''' % sys.executable


def recipes():
    """Return [(title, [[words of a command after labtasker], ...] of each sh block)], a row a block."""
    found = []
    for part in re.split(r"\n(?=[^\n]+\n-{3,}\n)", PAGE)[1:]:
        for block in re.findall(r"code-block:: sh\n\n((?:    .*\n|\n)+)", part):
            words = shlex.split(re.sub(r"\n(?=    python3)", "\n ; ", block.replace("\\\n        ", "")))
            commands = [[]]
            for word in words:
                commands += [[]] if word == ";" else []
                commands[-1] += [word] if word != ";" else []
            assert all(command[:3] == ["python3", "-m", "labtasker"] for command in commands), block
            found.append((part.split("\n")[0], [command[3:] for command in commands]))
    return found


def blocks_of_python():
    return re.findall(r"code-block:: python\n    :name: (\S+)\n\n((?:    .*\n|\n)+)", PAGE)


WORDS = {  # title: the words that each task's last job was started with
    "argparse": ["python3 train.py --lr=0.1 --amp --no-aug --layers 64 32"],
    "click": ["python3 train.py --lr=0.1 --no-aug --tag=a '--tag=b c' -- -x.csv"],
    "typer": ["python3 train.py --learning-rate=0.1 --batch-size=32 --no-use-amp"],
    "tyro": ["python3 train.py --opt.lr=0.1 --opt.weight-decay=0.01 --no-use-amp --layers 64 32"],
    "absl": ["python3 train.py --learning_rate=0.1 --noshuffle"],
    "Hydra": ["python3 app.py opt.lr=%s opt.name=%s hydra.run.dir=DIR" % (lr, name) for lr in ("0.1", "0.01") for name in ("adam", "sgd")] + [
        "python3 app.py %s opt.lr=0.1 hydra.run.dir=DIR" % over for over in ("db=mysql db.port=80", "db=sqlite +opt.fast=true")],
    "LightningCLI": ["python3 main.py fit --model.lr=0.1 '--model.layers=[64, 32]' --model.use_bn=True --trainer.default_root_dir=DIR"],
    "accelerate": ["accelerate launch --main_process_port 29500 train.py --lr=0.1"],
    "torchrun": ["torchrun --nproc-per-node 1 --master-port 29500 train.py --lr=0.1"],
    "papermill": ["papermill train.ipynb DIR/out.ipynb -p lr 0.1 -p model vit"],
    "A script without arguments": [None],
    "nanoGPT": ["python3 train.py config/train_shakespeare_char.py --learning_rate=0.001 --dataset=shakespeare_char --compile=False --out_dir=DIR"],
    "Resume from a checkpoint": ["python3 train.py --lr=0.1 --init_from=resume --out_dir=DIR", "python3 train.py --lr=0.1"],
}


def run_recipes(home, titles, prepare=lambda title: None):
    """Return {title: its tasks as they have ended}; the commands are run in this process, their jobs in their own."""
    ended = {}
    for title, commands in recipes():
        if title in titles:
            prepare(title)
            before = {task.task_id for task in labtasker.ls_tasks(limit=1000)}
            for command in commands:
                assert labtasker.main(command) == 0, command
            new = [task for task in labtasker.ls_tasks(limit=1000, sort=[("created_at", 1)]) if task.task_id not in before]
            assert new and all(task.status == "success" for task in new), (title, new)
            ended.setdefault(title, []).extend(new)
    return ended


@pytest.mark.slow
def test_each_recipe_starts_the_command_that_it_describes(home, monkeypatch):
    assert list(WORDS) == list(dict.fromkeys(title for title, _ in recipes()))
    for name in ("python3", "accelerate", "torchrun", "papermill"):
        home.write("bin/" + name, STAND_IN).chmod(0o755)
    for name, text in blocks_of_python():
        home.write(name, re.sub("^    ", "", text, flags=re.M))
    monkeypatch.setenv("PATH", "%s%s%s" % (home.cwd / "bin", os.pathsep, os.environ["PATH"]))
    tasks = run_recipes(home, WORDS)
    for title, wanted in WORDS.items():
        files = [os.path.join(str(home.folder), "logs", task.task_id, "files") for task in tasks[title]]
        assert [task.summary.get("words") for task in tasks[title]] == [
            line and shlex.split(line.replace("DIR", folder)) for line, folder in zip(wanted, files)], title
    assert tasks["A script without arguments"][0].summary == {"acc": 0.8}
    assert tasks["nanoGPT"][0].summary["loss"] == 1.25
    resumed, placed = tasks["Resume from a checkpoint"]
    assert len(resumed.attempts) == 2 and placed.summary["folder"] == str(home.cwd / "runs" / "0.1")


# The same with the real packages


REPORT = "\nimport labtasker\nlabtasker.report(**{key: list(value) if isinstance(value, tuple) else value for key, value in found.items()})\n"
SCRIPTS = {  # title: (the package, {file: text}, what the parser made of each task's arguments)
    "argparse": ("argparse", {"train.py": """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--aug", action=argparse.BooleanOptionalAction)
parser.add_argument("--layers", type=int, nargs="+")
found = vars(parser.parse_args())""" + REPORT}, [{"lr": 0.1, "amp": True, "aug": False, "layers": [64, 32]}]),
    "click": ("click", {"train.py": """
import click
@click.command()
@click.option("--lr", type=float)
@click.option("--aug/--no-aug")
@click.option("--tag", multiple=True)
@click.argument("files", nargs=-1)
def main(**found): return found
found = main(standalone_mode=False)""" + REPORT}, [{"lr": 0.1, "aug": False, "tag": ["a", "b c"], "files": ["-x.csv"]}]),
    "typer": ("typer", {"train.py": """
import typer
app = typer.Typer()
@app.command()
def main(learning_rate: float, batch_size: int = 1, use_amp: bool = True): return locals()
@app.command()
def options(learning_rate: float = 0, batch_size: int = 1, use_amp: bool = True): return locals()
app.registered_commands.pop(0)
found = app(standalone_mode=False)""" + REPORT}, [{"learning_rate": 0.1, "batch_size": 32, "use_amp": False}]),
    "tyro": ("tyro", {"train.py": """
import dataclasses, typing, tyro
@dataclasses.dataclass
class Opt:
    lr: float
    weight_decay: float = 0
@dataclasses.dataclass
class Config:
    opt: Opt
    use_amp: bool = True
    layers: typing.Tuple[int, ...] = ()
found = dataclasses.asdict(tyro.cli(Config))""" + REPORT}, [{"opt": {"lr": 0.1, "weight_decay": 0.01}, "use_amp": False, "layers": [64, 32]}]),
    "absl": ("absl.flags", {"train.py": """
from absl import app, flags
flags.DEFINE_float("learning_rate", 1, "")
flags.DEFINE_boolean("shuffle", True, "")
def main(argv):
    found = {"learning_rate": flags.FLAGS.learning_rate, "shuffle": flags.FLAGS.shuffle}""" + REPORT.replace("\n", "\n    ") + """
app.run(main)
"""}, [{"learning_rate": 0.1, "shuffle": False}]),
    "Hydra": ("hydra", {"conf/config.yaml": "defaults: [{db: sqlite}]\nopt: {lr: 1, name: none}\n", "conf/db/mysql.yaml": "name: mysql\nport: 1\n",
                        "conf/db/sqlite.yaml": "name: sqlite\n", "app.py": """
import hydra, labtasker, os
from omegaconf import OmegaConf
@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    assert os.path.exists(str(labtasker.task_dir() / ".hydra" / "config.yaml"))
    labtasker.report(**OmegaConf.to_container(config))
main()
"""}, [{"db": {"name": "sqlite"}, "opt": {"lr": lr, "name": name}} for lr in (0.1, 0.01) for name in ("adam", "sgd")] + [
        {"db": {"name": "mysql", "port": 80}, "opt": {"lr": 0.1, "name": "none"}}, {"db": {"name": "sqlite"}, "opt": {"lr": 0.1, "name": "none", "fast": True}}]),
    "LightningCLI": ("jsonargparse", {"main.py": """
import jsonargparse, typing
class Net:
    def __init__(self, lr: float, layers: typing.List[int], use_bn: bool = False): pass
parser, fit = jsonargparse.ArgumentParser(), jsonargparse.ArgumentParser()
fit.add_class_arguments(Net, "model")
fit.add_argument("--trainer.default_root_dir")
parser.add_subcommands().add_subcommand("fit", fit)
found = {"model": vars(parser.parse_args().fit.model)}""" + REPORT}, [{"model": {"lr": 0.1, "layers": [64, 32], "use_bn": True}}]),
    "papermill": ("papermill", {"train.ipynb": json.dumps({
        "cells": [{"cell_type": "code", "execution_count": None, "metadata": {"tags": tags}, "outputs": [], "source": source, "id": "c%d" % len(source)}
                  for tags, source in ((["parameters"], "lr, model = 1, ''"), ([], "import labtasker\nlabtasker.report(lr=lr, model=model)"))],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5})},
        [{"lr": 0.1, "model": "vit"}]),
}


@pytest.mark.slow
@pytest.mark.parametrize("title", SCRIPTS)
def test_a_recipe_works_with_the_real_package(home, monkeypatch, title):
    package, files, wanted = SCRIPTS[title]
    try:
        importlib.import_module(package)
        importlib.import_module("ipykernel" if package == "papermill" else "argparse")
    except ImportError:
        pytest.skip("%s is not installed here; tox -e parsers has it" % package.partition(".")[0])
    if title == "argparse" and sys.version_info < (3, 9):
        pytest.skip("this Python's argparse has no BooleanOptionalAction")
    home.write("bin/python3", "#!/bin/sh\nexec %s \"$@\"\n" % shlex.quote(sys.executable)).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(home.cwd / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]]))
    for name, text in files.items():
        home.write(name, text)
    assert [task.summary for task in run_recipes(home, [title])[title]] == wanted
