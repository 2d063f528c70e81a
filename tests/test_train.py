"""train.py: learns, resumes exactly, and answers each kind of bad input with one line."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from cli import UserError
from eval import EvalConfig, evaluate
from train import TrainConfig
from training.checkpoint import load_checkpoint
from training.log import Log, plot_curves
from training.muon import Muon
from training.processes import Ranks
from videos.decode import write_video

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def settings(data, out, cache, **other):
    """A run of seconds, on a file of data or on the tiny world."""
    files = dict(dataset="csv", data=str(data), out=str(out), cache=str(cache), workers=1)
    if Path(data).is_dir():
        files |= dict(data=str(data / "train.csv"), val_data=str(data / "val.csv"))
    run = dict(steps=6, batch_size=16, num_frames="2", warmup=2, log_every=1, eval_every=3)
    losses = dict(guided_from=0.0, hard_k=2, hard_weight=0.5)
    return TrainConfig(**(files | run | losses | other))


def start(*command, **other):
    """The end of a python command, with its output."""
    pipes = dict(cwd=ROOT, capture_output=True, text=True)
    return subprocess.run([sys.executable, *map(str, command)], **pipes, **other)


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in open(Path(out) / "log.jsonl", encoding="utf-8")]


def losses_of(out) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(out) if "loss" in line}


def csv_with(folder, rows, header="video,caption"):
    path = folder / "mine.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def good_rows(tiny_world):
    video = str(tiny_world / "videos" / "train_{:05d}.mp4")
    return [f"{video.format(i)},a red thing number {i}" for i in range(20)]


# ---- runs ----


def test_a_run_learns_and_writes_what_it_promises(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=30, eval_every=15))
    lines = log_of(tmp_path)
    # (the loss itself falls anyway: SKP starts from the log-odds, far down)
    nce = [line["nce"] for line in lines if "nce" in line]
    assert np.mean(nce[-3:]) < 0.9 * np.mean(nce[:3])
    assert {"config", "commit", "versions", "hardware", "parameters"} <= set(lines[0])
    wanted = "loss nce hard skp logit_scale grad_norm lr pairs_per_s step_s data_s"
    assert set(wanted.split()) <= set(lines[1])
    assert [line["step"] for line in lines if "validation" in line] == [15, 30]
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert [path.stem for path in sorted(tmp_path.glob("step-*"))] == ["step-000015", "step-000030"]


@pytest.mark.parametrize("num_frames", ["2", "1,2,4"])
def test_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    num_frames, tiny_world, tmp_path, cache
):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.train(settings(tiny_world, whole, cache, num_frames=num_frames))
    halves.mkdir()
    shutil.copy(whole / "step-000003.safetensors", halves)  # as if killed in step 4
    train.train(settings(tiny_world, halves, cache, num_frames=num_frames))
    assert losses_of(halves) == {step: loss for step, loss in losses_of(whole).items() if step > 3}
    a, b = (load_checkpoint(out, training=True) for out in (whole, halves))
    moments = [x.training["exp_avg.logit_scale"] for x in (a, b)]
    assert a.sha256 == b.sha256 and moments[0] == moments[1]


def test_base_run_without_knowledge_trains(tiny_world, tmp_path, cache):
    off = dict(skp_weight=0.0, beta=0.0, hard_k=0, hard_weight=0.0, guided_share=0.0)
    off |= dict(mask_false_negatives=False, checkpointing=True, precision="bf16")
    train.train(settings(tiny_world, tmp_path, cache, steps=2, **off))
    assert "skp" not in log_of(tmp_path)[1]
    assert load_checkpoint(tmp_path).model.video_concept_head is None


def test_concept_heads_start_from_the_log_odds(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=1, lr=1e-7))
    saved = load_checkpoint(tmp_path)
    for head in (saved.model.video_concept_head, saved.model.text_concept_head):
        bias = head.bias.detach().numpy()
        np.testing.assert_allclose(bias, saved.concept_vocab.log_odds, atol=1e-5)


def test_torchrun_starts_it_unchanged(tiny_world, tmp_path, cache):
    """(That ranks train as one process does, whatever their number: tests/test_distributed.py.)"""
    config = settings(tiny_world, tmp_path / "one", cache, val_data=None, steps=3)
    changed = [name for name in vars(config) if vars(config)[name] != getattr(TrainConfig, name)]
    flags = [f"--{name.replace('_', '-')}={vars(config)[name]}" for name in changed]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = start(*torchrun, *flags, f"--out={tmp_path / 'two'}", env=env)
    assert done.returncode == 0, done.stderr
    train.train(config)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_real_videos_train_resume_and_evaluate(tmp_path, cache):
    shared = ROOT.parent / "shared" / "msrvtt_mini"
    if not shared.is_dir():
        pytest.skip("the MSR-VTT clips in ../shared are not on this machine")
    rows = (shared / "train.csv").read_text().splitlines()[1:641]
    data = csv_with(tmp_path, [f"{shared}/{row}" for row in rows])
    out = tmp_path / "out"
    config = settings(data, out, cache, steps=4, eval_every=2)
    train.train(config)
    (out / "step-000004.safetensors").unlink()  # as if killed before the end
    train.train(config)
    assert log_of(out)[-1]["step"] == 4
    assert [x["resumed_at"] for x in log_of(out) if "config" in x] == [0, 2]
    files = dict(checkpoint=str(out), data=config.data, out=str(tmp_path / "eval"), cache=cache)
    record = evaluate(EvalConfig(task="csv", **files))
    assert [record[x] for x in ("videos", "captions", "missing")] == [32, 640, 0]
    assert record["t2v_R@10"] > 0


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.float16), ("fp32", None)])
def test_half_precision_reaches_the_op(tiny_world, tmp_path, cache, monkeypatch, precision, dtype):
    """The embeddings are float32: without a word the op would leave the matrix unit."""
    real, asked = train.clop_loss, []

    def note(*args, **kwargs):
        asked.append(kwargs["dtype"])
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "clop_loss", note)
    train.train(settings(tiny_world, tmp_path, cache, steps=1, precision=precision))
    assert asked == [dtype]


def test_compiled_while_the_number_of_frames_changes(tiny_world, tmp_path, cache, monkeypatch):
    """Dynamo traces the towers anew for 4 frames; what it hands to the compiler runs as it is."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    steps = dict(steps=2, num_frames="2,4", batch_size=8)
    for name, is_compiled in (("eager", False), ("compiled", True)):
        train.train(settings(tiny_world, tmp_path / name, cache, **steps, compile=is_compiled))
    eager = losses_of(tmp_path / "eager")
    assert losses_of(tmp_path / "compiled") == pytest.approx(eager, rel=1e-4) and len(eager) == 2


# ---- parts ----


@pytest.mark.parametrize("shape", [(96, 32), (32, 96)])
def test_muon_is_that_of_torch_in_float32(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    how = dict(lr=0.02, weight_decay=0.1)
    optimizers = Muon([ours], **how), torch.optim.Muon([theirs], **how)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs multiplies in bfloat16: 3 digits


def test_frames_of_each_step():
    config = TrainConfig(num_frames="1, 4,8", steps=10, batch_size=2, guided_from=0.6)
    epoch = train.epoch_of(2, config, num_batches=10)
    batches = np.arange(40).reshape(10, 4)  # two samples, two captions alone
    jobs = train.plan_batches(config, Ranks(0, 1, "cpu"), batches, epoch, 2)
    assert [job.num_frames for job in jobs] == [1] * 2 + [4] * 2  # then guided batches begin
    epoch = train.epoch_of(6, config, num_batches=10)
    assert epoch == (1, 6, 10, True)
    jobs = list(train.plan_batches(config, Ranks(0, 1, "cpu"), batches, epoch, 7))
    assert [(job.first, job.num_frames) for job in jobs] == [(2, 8), (4, 8), (6, 8)]
    assert [[*job.samples, *job.captions] for job in jobs] == batches[1:4].tolist()
    for wrong in ("", "8,4", "0,8", "-1,8", "one,8", "1,,8", "1;8"):
        with pytest.raises(UserError, match="--num-frames .*expected a number"):
            train.num_frames(TrainConfig(num_frames=wrong))


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [train.learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert rates[100] == pytest.approx(0) and rates[55] == pytest.approx(0.5)


def test_the_log_is_cut_back_where_it_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [dict(config={}, resumed_at=0), dict(step=1, loss=2.0), dict(step=2, loss=1.5)]
    lines += [dict(step=2, validation={}), dict(step=3, loss=1.0)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"step": 4, "lo')  # killed in this line
    log = Log(path, 2)
    log.write(dict(config={}, resumed_at=2, grad_norm=math.nan))
    assert log_of(tmp_path) == [*lines[:4], dict(config={}, resumed_at=2, grad_norm=None)]
    Log(path, 0)
    assert [line.get("resumed_at") for line in log_of(tmp_path)] == [0, 2]


def test_curves_of_a_log_can_be_drawn_again(tmp_path):
    log, plot = tmp_path / "log.jsonl", tmp_path / "x.png"
    log.write_text('{"step": 1, "loss": 2.0, "step_s": 0.1}\n{"step": 2, "loss": null}\n')
    done = start("-m", "training.log", log, plot)
    assert done.returncode == 0 and plot.read_bytes().startswith(PNG), done.stderr


def test_validation_that_is_not_comparable_says_so(tiny_world, tmp_path, cache, capsys):
    """In its line, in the log and on the plot."""
    trained = (tiny_world / "train.csv").read_text().splitlines()[1]
    rows = (tiny_world / "val.csv").read_text().splitlines()[1:] + [trained]
    rows = [row.replace("videos/", f"{tiny_world}/videos/") for row in rows]
    data = csv_with(tmp_path, [*rows, "gone.mp4,a dog"])
    out = tmp_path / "run"
    config = dict(val_data=str(data), steps=1, max_broken=0.5)
    train.train(settings(tiny_world, out, cache, **config))
    note = (
        "13 of 14 videos: not comparable (1 missing); "
        "1 of these 13 videos bear names that it was trained on: not comparable"
    )
    assert log_of(out)[-1]["note"] == note
    assert f"({note})" in capsys.readouterr().out

    text = (out / "log.jsonl").read_text()
    plots = []
    for name, shown in (("same", text), ("plain", text.replace(note, ""))):
        (tmp_path / name).write_text(shown)
        plot_curves(tmp_path / name, tmp_path / f"{name}.png")
        plots.append((tmp_path / f"{name}.png").read_bytes())
    assert plots[0] == (out / "curves.png").read_bytes() != plots[1]


# ---- bad input ----


def test_a_folder_with_another_run_is_refused(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=1))
    for other, said in ((dict(lr=0.5), "lr 0.003 → 0.5"), (dict(preset="small"), "preset toy → ")):
        with pytest.raises(UserError, match=rf"other settings \(--{said}"):
            train.train(settings(tiny_world, tmp_path, cache, steps=1, **other))
    assert log_of(tmp_path)[-1]["step"] == 1  # nothing was lost


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda f: None, "needs --data FILE"),
        (lambda f: f / "nowhere.csv", "cannot be read"),
        (lambda f: csv_with(f, []), "no samples"),
        (lambda f: csv_with(f, ["x.mp4,hello"], header="film,text"), "line 1.*has no video"),
        (
            lambda f: csv_with(f, ["x.mp4,a dog", "x.mp4,the dog"]),
            "1 of 1 videos cannot be used .1 missing, 0 broken.*datasets.check.*no such video file",
        ),
    ],
)
def test_unusable_data_is_one_line(make, said, tmp_path, cache):
    path, out = make(tmp_path), tmp_path / "out"
    config = TrainConfig(dataset="csv", data=path and str(path), out=str(out), cache=cache)
    with pytest.raises(UserError, match=said) as error:
        train.train(config)
    assert "\n" not in str(error.value) and not any(out.iterdir())


def test_broken_videos_are_skipped_and_listed(tmp_path, cache, good_rows, capsys):
    good = Path(good_rows[0].split(",")[0]).read_bytes()
    broken = {"empty.mp4": b"", "text.mp4": b"this is no video\n" * 100}
    broken["cut.mp4"] = good[: len(good) // 3]
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    names = [*broken, "gone.mp4"]
    data = csv_with(tmp_path, good_rows + [f"{name},a broken one" for name in names])
    config = settings(data, tmp_path / "out", cache, batch_size=8, steps=2)
    said = "cannot be used .1 missing, 3 broken., more than the 5% of --max-broken"
    with pytest.raises(UserError, match=said):
        train.train(config)
    config.max_broken = 0.2
    train.train(config)
    said = capsys.readouterr().out
    assert said.count("4 videos cannot be used") == 2  # where it happens, and again at the end
    assert all(name in said for name in names)


def test_odd_videos_and_captions_train(tmp_path, cache, good_rows):
    noise = np.random.default_rng(0).integers(0, 255, (40, 37, 53, 3), np.uint8)
    write_video(tmp_path / "one.mp4", noise[:1])  # a single frame
    write_video(tmp_path / "odd.mp4", noise)  # odd width and height
    odd = ["one.mp4,", "odd.mp4,ein Mädchen läuft über die Straße 走る"]
    odd += [f"odd.mp4,{'word ' * 10_000}", "one.mp4,\x07 \x1b[31m"]
    data = csv_with(tmp_path, good_rows[:4] + odd)
    train.train(settings(data, tmp_path / "out", cache, batch_size=8, steps=2))
    assert all(np.isfinite(loss) for loss in losses_of(tmp_path / "out").values())


def test_captions_that_say_nothing_known(tmp_path, good_rows, capsys):
    """Said before anything is decoded; without knowledge they train."""
    videos = [row.split(",")[0] for row in good_rows]
    rows = [f"{video},{text}" for video, text in zip(videos, ["猫在跑", "🐈", "", ""])]
    data, cache = csv_with(tmp_path, [*rows, rows[1]]), tmp_path / "cache"
    with pytest.raises(UserError, match="share a noun or verb; .*--beta 0"):
        train.train(settings(data, tmp_path / "run", cache, batch_size=2))
    assert not list(cache.glob("frames/*"))
    said = capsys.readouterr().out
    odd = "2 empty, 3 without a Latin letter, 1 repeated for the same video"
    assert f"5 captions: {odd}; 4 without a noun or verb" in said
    off = dict(skp_weight=0.0, beta=0.0, steps=1, batch_size=2)
    train.train(settings(data, tmp_path / "run", cache, **off))
    assert load_checkpoint(tmp_path / "run").step == 1


def test_command_line_mistakes(tmp_path, tiny_world):
    (tmp_path / "file").touch()
    data = ["--dataset=csv", f"--data={tiny_world / 'train.csv'}", "--batch-size=16"]
    mistakes = {
        "--learning-rate": ["--learning-rate", "1"],
        "choose another --out": [*data, f"--cache={tmp_path}/c", f"--out={tmp_path}/file/out"],
    }
    if not torch.cuda.is_available():
        mistakes["this machine has 0 GPU(s)"] = ["--gpus", "2"]
    for said, flags in mistakes.items():
        done = start("train.py", *flags)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags",
    "eval_every=0 log_every=0 steps=0 batch_size=1 guided_share=2.0 group_size=1 chunk=-1 seed=-1 "
    "procs=-2 max_broken=-1.0 lr=-1.0 lr=nan beta=nan skp_weight=-1.0 keep=-1 workers=0 "
    "guided_from=1.5".split(),
)
def test_a_value_out_of_range_is_refused_before_any_work(flags):
    name, _, value = flags.partition("=")
    kind = type(getattr(TrainConfig, name))
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} ") as error:
        train.check_config(TrainConfig(**{name: kind(value)}))
    assert "\n" not in str(error.value)
