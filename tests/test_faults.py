"""What goes wrong on real machines, injected: each fault ends in one clear line, or in none, and
loses nothing.
"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import knowledge
import train
from cli import UserError
from datasets import toyworld
from train import TrainConfig
from training.checkpoint import load_checkpoint, save_checkpoint
from training.log import Log

torch.set_num_threads(1)  # as in the processes that the tests start: the same sums, to the last bit

ROOT = Path(__file__).parent.parent
# seconds after which no rank is left when one has died: hangs fail, a loaded machine does not
ENDS_WITHIN = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory, cache):
    """The losses of an uninterrupted run, {step: repr}."""
    out = tmp_path_factory.mktemp("whole")
    train.train(settings(tiny_world, out, cache))
    return losses_of(out)


def settings(world, out, cache, **other):
    """A run of seconds on the tiny world."""
    files = dict(dataset="csv", data=str(world / "train.csv"), val_data=str(world / "val.csv"))
    files |= dict(out=str(out), cache=cache, workers=1)
    run = dict(steps=12, batch_size=16, num_frames="2", warmup=2, log_every=1, eval_every=4)
    losses = dict(guided_from=0.0, hard_k=2, hard_weight=0.5)
    return TrainConfig(**(files | run | losses | other))


def flags(config: TrainConfig) -> list[str]:
    changed = {name: x for name, x in vars(config).items() if x != getattr(TrainConfig, name)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]


def start(config, *more, script="train.py", env=()) -> subprocess.Popen:
    """The command line as a process, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, script, *flags(config), *more],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **dict(env)),
    )


def log_of(out) -> list[dict]:
    """The lines; the last one may be half written."""
    path = Path(out) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses_of(out) -> dict[int, str]:
    """{step: repr}; no step may be there twice."""
    steps = [(line["step"], repr(line["loss"])) for line in log_of(out) if "loss" in line]
    assert len(dict(steps)) == len(steps), steps
    return dict(steps)


def wait_for_step(process, out, step, seconds=300):
    deadline = time.monotonic() + seconds
    while not any(line.get("step", 0) >= step for line in log_of(out)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} after {seconds} s"
        time.sleep(0.005)


def at_each_loss(monkeypatch, act):
    """Call act(n) before the n-th loss of a run."""
    real, calls = train.clop_loss, itertools.count(1)

    def clop_loss(*args, **kwargs):
        act(next(calls))
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "clop_loss", clop_loss)


DIES_WRITING = """
import json, os, signal
import cli, train
from training import checkpoint
real = checkpoint.save_file
def half_a_file(tensors, path, metadata):
    real(tensors, path, metadata)
    if json.loads(metadata["clop"])["step"] == 8:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = half_a_file
cli.run(train.main)
"""


def test_killed_at_any_moment_it_goes_on_bit_by_bit(tiny_world, tmp_path, cache, whole):
    config = settings(tiny_world, tmp_path / "out", cache)
    script = tmp_path / "dies_writing.py"
    script.write_text(DIES_WRITING)
    killed = start(config, script=str(script))  # 1. in the middle of a checkpoint
    assert killed.wait(600) == -signal.SIGKILL, killed.communicate()[1]
    assert load_checkpoint(config.out).step == 4
    assert list(Path(config.out).glob(".*.unfinished.safetensors"))

    process = start(config)  # 2. at any moment
    wait_for_step(process, config.out, random.randint(5, 10))
    time.sleep(random.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()

    train.train(config)
    assert losses_of(config.out) == whole  # every step once, to the last bit
    assert not list(Path(config.out).glob(".*"))


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_means_checkpoint_then_end(tiny_world, tmp_path, cache, whole, monkeypatch, capfd):
    config, before = settings(tiny_world, tmp_path, cache), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(config)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_each_loss(patch, lambda n: os.kill(os.getpid(), signal.SIGINT) if n == 3 else None)
        train.main()
    assert stop.value.code == 130
    assert load_checkpoint(tmp_path).step == 3 and list(losses_of(tmp_path)) == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is before
    said = capfd.readouterr()
    assert said.err.count("stops after this step\n") == 1
    assert "the same command goes on from" in said.out
    train.train(config)
    assert losses_of(tmp_path) == whole


def ranks_of(process) -> list[int]:
    """Process ids of the ranks of a launcher, by rank."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    by_rank = {}
    for pid in map(int, pids):
        for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            if entry.startswith("RANK="):
                by_rank[int(entry[5:])] = pid
    return [by_rank[rank] for rank in sorted(by_rank)]


def test_ranks_stop_together_and_one_that_dies_ends_all(tiny_world, tmp_path, cache):
    config = settings(tiny_world, tmp_path, cache, steps=100_000, eval_every=50_000, val_data=None)
    process = start(config, "--procs=2")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)  # to the launcher, as a scheduler does
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in error, error
    assert error.splitlines().count("SIGTERM: stops after this step") == 1
    step = load_checkpoint(tmp_path).step
    assert step == log_of(tmp_path)[-1]["step"] and f"step-{step:06d}.safetensors" in said

    process = start(config, "--procs=2")
    wait_for_step(process, tmp_path, step + 2)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=ENDS_WITHIN)
    # the launcher may reach rank 0 with SIGTERM before the closed connection does
    lines = [line for line in error.strip().splitlines() if not line.startswith("SIGTERM: ")]
    assert process.returncode == 1 and "Traceback" not in error and len(lines) == 2, error
    assert lines[0].startswith("error: rank 0: another rank went away")
    assert lines[1].startswith("error: rank 1 (process ") and "SIGKILL" in lines[1]
    assert "the same command goes on" in lines[1]
    assert load_checkpoint(tmp_path).step == step


FAILS_ON_ONE_RANK = """
import itertools, os
import cli, train
real, calls = train.clop_loss, itertools.count(1)
def fail(*args, **kwargs):
    if next(calls) == 3 and os.environ["RANK"] == "1":
        raise ValueError("a bug")
    return real(*args, **kwargs)
train.clop_loss = fail
cli.run(train.main)
"""


def test_the_rank_that_failed_speaks_first(tiny_world, tmp_path, cache, whole):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ON_ONE_RANK)
    process = start(settings(tiny_world, tmp_path / "out", cache), "--procs=2", script=str(script))
    _, said = process.communicate(timeout=600)
    lines = said.strip().splitlines()
    assert process.returncode == 1 and said.count("Traceback") == 1, said
    assert lines[0].endswith("Traceback (most recent call last):")
    assert said.index("ValueError: a bug") < said.index("rank 0: another rank went away")
    assert lines[-1].startswith("error: rank 1 ")
    assert "failed with status 1, its message is above" in lines[-1]


@pytest.mark.parametrize(
    "what, said", [(["--gpus=99"], "this machine has"), (["--gpus=1", "--procs=1"], "not both")]
)
def test_processes_that_cannot_be_started_are_one_line(what, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *what, f"--out={tmp_path}"])
    with pytest.raises(UserError, match=said):
        train.main()


# ---- workers -------------------------------------------------------------------------------------


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_tagging_worker_is_one_line(monkeypatch):
    captions = [f"a dog chases cat {i}" for i in range(4500)]
    monkeypatch.setattr(knowledge, "concept_names", die)
    with pytest.raises(UserError, match="a tagging process died"):
        knowledge.extract_many(captions, workers=2, progress=False)


# ---- disks ---------------------------------------------------------------------------------------


def on_a_full_disk(function, *args, room=10_000, **kwargs):
    """function(…) while no file of this process may grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        return function(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before(tiny_world, tmp_path, cache, whole, monkeypatch):
    config = settings(tiny_world, tmp_path, cache, val_data=None)

    def save(*parts, **contents):
        if contents["step"] == 8:
            return on_a_full_disk(save_checkpoint, *parts, **contents)
        return save_checkpoint(*parts, **contents)

    wanted = r"step-000008.safetensors: cannot be written.*make room"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=wanted) as error:
        patch.setattr("training.run.save_checkpoint", save)
        train.train(config)
    assert "\n" not in str(error.value)
    files = [path.name for path in tmp_path.iterdir() if "safetensors" in path.name]
    assert files == ["step-000004.safetensors"]
    train.train(config)
    assert losses_of(tmp_path) == whole


def test_a_full_disk_while_logging_is_one_line(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    with pytest.raises(UserError, match="log.jsonl: cannot be written.*free the disk"):
        on_a_full_disk(log.write, dict(text="x" * 100), room=10)


def test_a_folder_that_vanishes_ends_the_run_in_one_line(
    tiny_world, tmp_path, cache, whole, monkeypatch
):
    """In step 6: the next checkpoint is saved there all the same."""
    out = tmp_path / "out"
    config = settings(tiny_world, out, cache)
    said = "was deleted or moved while.*its newest state is .*step-000008.safetensors"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said) as error:
        at_each_loss(patch, lambda n: shutil.rmtree(out) if n == 6 else None)
        train.train(config)
    assert "\n" not in str(error.value)
    train.train(config)
    assert losses_of(out) == {step: loss for step, loss in whole.items() if step > 8}
    assert (out / "best.safetensors").exists() and (out / "curves.png").exists()


def test_a_checkpoint_for_other_data_is_refused(tiny_world, tmp_path, cache):
    data = tmp_path / "train.csv"
    lines = (tiny_world / "train.csv").read_text().replace("videos/", f"{tiny_world}/videos/")
    data.write_text(lines)
    config = settings(tiny_world, tmp_path / "out", cache, data=str(data), steps=1, val_data=None)
    train.train(config)
    data.write_text(lines.replace(" a ", " one "))
    with pytest.raises(UserError, match="on other captions or videos"):
        train.train(config)


def test_best_and_last_checkpoints_are_kept(tiny_world, tmp_path, cache, monkeypatch):
    scores, real = iter([10.0, 30.0, 30.0]), Log.validation
    monkeypatch.setattr(Log, "validation", lambda *args: (real(*args), next(scores))[1])
    train.train(settings(tiny_world, tmp_path, cache, keep=1))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["best.safetensors", "step-000012.safetensors"]
    best = load_checkpoint(tmp_path / "best.safetensors", training=True)
    assert (best.step, best.progress["best"], best.training) == (8, 30.0, {})  # the first of equals
    assert load_checkpoint(tmp_path).step == 12


# ---- locale --------------------------------------------------------------------------------------


def test_an_odd_locale_changes_nothing(tiny_world, tmp_path, cache, whole):
    odd = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TZ="Antarctica/Troll")
    process = start(settings(tiny_world, tmp_path, cache), env=odd)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in error, error
    assert losses_of(tmp_path) == whole

    # the message of the refusal has an arrow
    refused = start(settings(tiny_world, tmp_path, cache, lr=0.5), env=odd)
    _, error = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "--lr 0.003" in error, error
    assert "Traceback" not in error, error


def test_killed_rendering_workers_are_replaced(tmp_path):
    """Three workers are killed while they render; the world is whole all the same."""

    def kill_three():
        for _ in range(3):
            while not (workers := set(children.read_text().split()) - before):
                if done.wait(0.01):
                    return
            os.kill(int(min(workers)), signal.SIGKILL)
            # twice at the same video would be the video's fault: wait until its second try is over
            enough = len(list(videos.glob("*"))) + 16
            while len(list(videos.glob("*"))) < enough:
                if done.wait(0.01):
                    return

    videos = tmp_path / "world" / "videos"
    done, main = threading.Event(), threading.get_native_id()
    children = Path(f"/proc/{os.getpid()}/task/{main}/children")
    before = set(children.read_text().split())
    killer = threading.Thread(target=kill_three)
    killer.start()
    try:
        world = toyworld.generate(
            tmp_path / "world", train=200, val=8, test=8, workers=2, progress=False
        )
    finally:
        done.set()
        killer.join()
    assert len(list((world / "videos").glob("*.mp4"))) == 216 and (world / "world.json").exists()
