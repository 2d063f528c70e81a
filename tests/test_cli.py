"""cli.py: flags from a dataclass, mistakes in one line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cli import UserError, parse_config, run


@dataclass
class Config:
    """An example."""

    steps: int = 600                 # optimizer steps, 100 % of them
    out: str = "runs"                # folder
    data: str | None = None          # file
    compile: bool = False            # compile it
    task: Literal["a", "b"] = "a"    # which
    words: str = ""                  # free text


def test_defaults_and_flags():
    assert parse_config(Config, []) == Config()
    given = parse_config(Config, "--steps 3 --data x.csv --compile --task b".split())
    assert given == Config(steps=3, data="x.csv", compile=True, task="b")
    assert parse_config(Config, ["--no-compile"]).compile is False


def test_positional_words_are_joined():
    given = parse_config(Config, ["two", "dogs", "--steps", "1"], positional="words")
    assert given == Config(steps=1, words="two dogs")
    assert parse_config(Config, [], positional="words").words == ""


def test_comments_are_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--help"])
    assert stop.value.code == 0 and "optimizer steps, 100 % of them" in capsys.readouterr().out


@pytest.mark.parametrize("argv, said", [
    (["--stepz", "3"], "--stepz: no such flag; did you mean --steps?"), (["--task", "c"], "invalid choice: 'c'"),
    (["--steps", "many"], "invalid int value: 'many'"), (["--step", "3"], "--step: no such flag")])
def test_a_mistake_is_one_line_and_status_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_user_errors_end_with_their_line(capsys):
    def main():
        raise UserError("film.mp4: empty file; fetch it again")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: film.mp4: empty file; fetch it again\n"


def test_a_poor_terminal_gets_codes():
    code = "import cli; cli.run(lambda: print('β → 走'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
                          capture_output=True, text=True,
                          env=dict(os.environ, PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and done.stdout == r"\u03b2 \u2192 \u8d70" + "\n", done.stderr


def test_demo_runs():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "cli.py", "--steps", "3"], cwd=root, capture_output=True, text=True)
    assert done.stdout == "_Example(steps=3, compile=False)\n"
