"""cli.py: flags from a dataclass, mistakes in one line, files that are whole or not there."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from cli import UserError, parse_config, run, write_whole

ROOT = Path(__file__).parent.parent
NARROW = dict(os.environ, COLUMNS="80")


@dataclass
class Config:
    """An example."""

    words: Positional[tuple[str, ...]] = ()  # free text
    steps: int = 600  # optimizer steps, 100 % of them
    data: str | None = None  # file
    compile: bool = False  # compile it
    task: Literal["a", "b"] = "a"  # which


def test_flags_fill_the_dataclass():
    assert parse_config(Config, []) == Config()
    words = "two dogs --steps 3 --data x.csv --compile --task b".split()
    expected = Config(("two", "dogs"), steps=3, data="x.csv", compile=True, task="b")
    assert parse_config(Config, words) == expected


HELP = {"train.py": "data options|optimizer options|output options|optimizer steps (default"}
HELP["eval.py"] = "eval options|search options"


@pytest.mark.parametrize("script", HELP)
def test_help_is_grouped_and_fits_three_screens(script):
    """The comment behind a field is its help."""
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=NARROW)
    assert done.returncode == 0 and 20 < done.stdout.count("\n") <= 120
    assert all(text in done.stdout for text in HELP[script].split("|"))


BAD_FLAGS = [("--stepz 3", "--steps"), ("--task c", "invalid choice 'c'")]
BAD_FLAGS.append(("--steps many", "'many'"))


@pytest.mark.parametrize("words, said", BAD_FLAGS)
def test_a_bad_flag_is_named_with_status_2(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, words.split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "mistake, status, said",
    [
        (UserError("film.mp4: empty file; fetch it again"), 2, "error: film.mp4: empty file"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_mistake_is_one_line_with_its_status(mistake, status, said, capsys):
    def main():
        raise mistake

    with pytest.raises(SystemExit) as stop:
        run(main)
    error = capsys.readouterr().err
    assert stop.value.code == status
    assert error.startswith(said) and error.count("\n") == 1


def test_a_terminal_without_unicode_and_a_closed_pipe_end_nothing():
    code = "from cli import run; run(lambda: print('β = 1\\n' * 100_000))"
    command = [sys.executable, "-c", code]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout.readline() == b"\\u03b2 = 1\n"
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b""


def test_a_closed_pipe_after_the_last_line_ends_without_a_word():
    """`--help | true`: what is still held back finds no reader."""
    code = "import sys; from cli import run; run(lambda: (print('help'), sys.exit(0)))"
    reads, writes = os.pipe()
    os.close(reads)
    streams = dict(stdout=writes, stderr=subprocess.PIPE)
    environment = dict(os.environ, PYTHONUNBUFFERED="")  # empty: output is held back
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, **streams)
    os.close(writes)
    assert done.stderr == b"" and done.returncode == 1


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_while_importing_is_no_traceback(script, tmp_path):
    """The first import from outside waits, as a slow disk does."""
    (tmp_path / "numpy.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    command = [sys.executable, script]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == -signal.SIGINT and process.stderr.read() == b""


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with write_whole(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists() and unfinished.suffix == ".txt"
    with pytest.raises(ZeroDivisionError), write_whole(path) as unfinished:
        unfinished.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "first"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]

    with pytest.raises(UserError, match="cannot be written"), write_whole(path / "below"):
        pass
