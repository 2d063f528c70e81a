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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def settings(world, out, cache, **other):
    """A run of seconds on the tiny world."""
    files = dict(dataset="csv", data=str(world / "train.csv"), val_data=str(world / "val.csv"))
    files |= dict(out=str(out), cache=cache, workers=1)
    run = dict(steps=6, batch_size=16, num_frames="2", warmup=2, log_every=1, eval_every=3)
    losses = dict(guided_from=0.0, hard_k=2, hard_weight=0.5)
    return TrainConfig(**(files | run | losses | other))


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in open(Path(out) / "log.jsonl", encoding="utf-8")]


def losses_of(out) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(out) if "loss" in line}


def test_a_run_learns_and_writes_what_it_promises(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=30, eval_every=15))
    lines = log_of(tmp_path)
    nce = {
        line["step"]: line["nce"] for line in lines if "nce" in line
    }  # SKP starts from the log-odds, far down
    assert np.mean([nce[s] for s in (28, 29, 30)]) < 0.9 * np.mean([nce[s] for s in (1, 2, 3)])
    assert {"config", "commit", "versions", "hardware", "parameters"} <= set(lines[0])
    wanted = "loss nce hard skp logit_scale grad_norm lr pairs_per_s step_s data_s"
    assert set(wanted.split()) <= set(lines[1])
    assert [line["step"] for line in lines if "validation" in line] == [15, 30]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-000015.safetensors",
        "step-000030.safetensors",
    ]


def test_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(tiny_world, tmp_path, cache):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.train(settings(tiny_world, whole, cache))
    halves.mkdir()
    shutil.copy(whole / "step-000003.safetensors", halves)  # as if killed in step 4
    train.train(settings(tiny_world, halves, cache))
    assert losses_of(halves) == {step: loss for step, loss in losses_of(whole).items() if step > 3}
    a, b = (load_checkpoint(out, training=True) for out in (whole, halves))
    assert (
        a.sha256 == b.sha256
        and a.training["exp_avg.logit_scale"] == b.training["exp_avg.logit_scale"]
    )


def test_frames_curriculum_is_a_function_of_the_step(tiny_world, tmp_path, cache):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train.train(settings(tiny_world, whole, cache, num_frames="1,2,4"))
    rest.mkdir()
    shutil.copy(whole / "step-000003.safetensors", rest)
    train.train(settings(tiny_world, rest, cache, num_frames="1,2,4"))
    assert losses_of(rest) == {step: loss for step, loss in losses_of(whole).items() if step > 3}


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
    config = TrainConfig(num_frames="1, 4,8", steps=10, batch_size=2)
    epoch = train.epoch_of(2, config, num_batches=10)
    jobs = train.plan_batches(config, Ranks(0, 1, "cpu"), np.arange(20), epoch, 2)
    assert [job.num_frames for job in jobs] == [1] * 2 + [4] * 2  # then guided batches begin
    epoch = train.epoch_of(6, config, num_batches=10)
    assert epoch == (1, 6, 10, True)
    jobs = train.plan_batches(config, Ranks(0, 1, "cpu"), np.arange(8), epoch, 7)
    assert [(job.first, job.num_frames) for job in jobs] == [(2, 8), (4, 8), (6, 8)]
    for wrong in ("", "8,4", "0,8", "-1,8", "one,8", "1,,8", "1;8", "8," * 2000 + "8"):
        with pytest.raises(UserError, match="--num-frames .*expected a number"):
            train.num_frames(TrainConfig(num_frames=wrong))


def test_torchrun_starts_it_unchanged(tiny_world, tmp_path, cache):
    """(That ranks train as one process does, whatever their number: tests/test_distributed.py.)"""
    config = settings(tiny_world, tmp_path / "one", cache, val_data=None, steps=3)
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(config).items()
        if value != getattr(TrainConfig, name) and name != "out"
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "train.py",
        *flags,
    ]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'two'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    assert done.returncode == 0, done.stderr
    train.train(config)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_the_log_is_cut_back_where_it_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        dict(config={}, resumed_at=0),
        dict(step=1, loss=2.0),
        dict(step=2, loss=1.5),
        dict(step=2, validation={}),
        dict(step=3, loss=1.0),
    ]
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    )  # killed in this line
    log = Log(path, 2)
    log.write(dict(config={}, resumed_at=2, grad_norm=math.nan))
    assert log_of(tmp_path) == [*lines[:4], dict(config={}, resumed_at=2, grad_norm=None)]
    Log(path, 0)
    assert [line.get("resumed_at") for line in log_of(tmp_path)] == [0, 2]


def test_validation_that_is_not_comparable_says_so(tiny_world, tmp_path, cache, capsys):
    """In its line, in the log and on the plot."""
    rows = (tiny_world / "val.csv").read_text().replace("videos/", f"{tiny_world}/videos/")
    trained = (
        (tiny_world / "train.csv")
        .read_text()
        .splitlines()[1]
        .replace("videos/", f"{tiny_world}/videos/")
    )
    (tmp_path / "val.csv").write_text(f"{rows}gone.mp4,a dog\n{trained}\n")
    config = dict(val_data=str(tmp_path / "val.csv"), steps=1, max_broken=0.5)
    train.train(settings(tiny_world, tmp_path / "run", cache, **config))
    note = (
        "13 of 14 videos: not comparable (1 missing); "
        "1 of these 13 videos bear names that it was trained on: not comparable"
    )
    assert log_of(tmp_path / "run")[-1]["note"] == note
    assert f"({note})" in capsys.readouterr().out

    plain = tmp_path / "plain.jsonl"
    plain.write_text((tmp_path / "run" / "log.jsonl").read_text().replace(note, ""))
    plot_curves(plain, tmp_path / "plain.png")
    curves = (tmp_path / "run" / "curves.png").read_bytes()
    assert curves != (tmp_path / "plain.png").read_bytes()
    plot_curves(tmp_path / "run" / "log.jsonl", tmp_path / "again.png")
    assert curves == (tmp_path / "again.png").read_bytes()


def test_curves_of_a_log_can_be_drawn_again(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "step_s": 0.1}\n{"step": 2, "loss": null}\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "training.log", tmp_path / "log.jsonl", tmp_path / "x.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG"), (
        done.stderr
    )


def test_a_folder_with_another_run_is_refused(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=1))
    with pytest.raises(UserError, match=r"other settings \(--lr 0.003 → 0.5\)"):
        train.train(settings(tiny_world, tmp_path, cache, steps=1, lr=0.5))
    assert log_of(tmp_path)[-1]["step"] == 1  # nothing was lost


def test_base_run_without_knowledge_trains(tiny_world, tmp_path, cache):
    train.train(
        settings(
            tiny_world,
            tmp_path,
            cache,
            steps=2,
            skp_weight=0.0,
            beta=0.0,
            hard_k=0,
            hard_weight=0.0,
            guided_share=0.0,
            mask_false_negatives=False,
            checkpointing=True,
            precision="bf16",
        )
    )
    assert "skp" not in log_of(tmp_path)[1] and load_checkpoint(tmp_path).model.concept_head is None


def test_concept_head_starts_from_the_log_odds(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=1, lr=1e-7))
    saved = load_checkpoint(tmp_path)
    torch.testing.assert_close(
        saved.model.concept_head.bias,
        torch.from_numpy(saved.concept_vocab.log_odds),
        rtol=0,
        atol=1e-5,
    )


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [train.learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert rates[100] == pytest.approx(0) and rates[55] == pytest.approx(0.5)


def test_real_videos_train_resume_and_evaluate(tmp_path, cache):
    shared = ROOT.parent / "shared" / "msrvtt_mini"
    if not shared.is_dir():
        pytest.skip("the MSR-VTT clips in ../shared are not on this machine")
    pairs = (row.split(",", 1) for row in (shared / "train.csv").read_text().splitlines()[1:])
    rows = [f"{shared / path},{caption}" for path, caption in pairs]
    config = settings(
        tmp_path,
        tmp_path / "out",
        cache,
        data=str(csv_with(tmp_path, rows[:640])),
        val_data=None,
        steps=4,
        eval_every=2,
    )
    train.train(config)
    (tmp_path / "out" / "step-000004.safetensors").unlink()  # as if killed before the end
    train.train(config)
    assert log_of(tmp_path / "out")[-1]["step"] == 4
    assert [x["resumed_at"] for x in log_of(tmp_path / "out") if "config" in x] == [0, 2]
    record = evaluate(
        EvalConfig(
            checkpoint=str(tmp_path / "out"),
            task="csv",
            data=config.data,
            out=str(tmp_path / "eval"),
            cache=cache,
        )
    )
    assert (
        record["videos"] == 32
        and record["captions"] == 640
        and record["missing"] == 0
        and record["t2v_R@10"] > 0
    )


# ---- bad input ----


def csv_with(folder, rows, header="video,caption"):
    path = folder / "mine.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def good_rows(tiny_world):
    return [
        f"{tiny_world / 'videos' / f'train_{i:05d}.mp4'},a red thing number {i}" for i in range(20)
    ]


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
    path = make(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        train.train(
            TrainConfig(
                dataset="csv", data=path and str(path), out=str(tmp_path / "out"), cache=cache
            )
        )
    assert "\n" not in str(error.value) and not any((tmp_path / "out").iterdir())


def test_broken_videos_are_skipped_and_listed(tmp_path, cache, good_rows, capsys):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    good = Path(good_rows[0].split(",")[0]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) // 3])
    rows = good_rows + [
        f"{name},a broken one" for name in ("empty.mp4", "text.mp4", "cut.mp4", "gone.mp4")
    ]
    config = settings(
        tmp_path,
        tmp_path / "out",
        cache,
        data=str(csv_with(tmp_path, rows)),
        val_data=None,
        batch_size=8,
        steps=2,
    )
    with pytest.raises(
        UserError, match="cannot be used .1 missing, 3 broken., more than the 5% of --max-broken"
    ):
        train.train(config)
    config.max_broken = 0.2
    train.train(config)
    said = capsys.readouterr().out
    assert (
        said.rstrip().count("4 videos cannot be used") == 2
    )  # where it happens, and again at the end
    assert all(name in said for name in ("empty.mp4", "text.mp4", "cut.mp4", "gone.mp4"))


def test_odd_videos_and_captions_train(tmp_path, cache, good_rows):
    noise = np.random.default_rng(0).integers(0, 255, (40, 37, 53, 3), np.uint8)
    write_video(tmp_path / "one.mp4", noise[:1])  # a single frame
    write_video(tmp_path / "odd.mp4", noise)  # odd width and height
    rows = good_rows[:4] + [
        "one.mp4,",
        "odd.mp4,ein Mädchen läuft über die Straße 走る",
        f"odd.mp4,{'word ' * 10_000}",
        "one.mp4,\x07 \x1b[31m",
    ]
    train.train(
        settings(
            tmp_path,
            tmp_path / "out",
            cache,
            data=str(csv_with(tmp_path, rows)),
            val_data=None,
            batch_size=8,
            steps=2,
        )
    )
    assert all(np.isfinite(loss) for loss in losses_of(tmp_path / "out").values())


def test_checkpoint_of_another_preset_is_refused(tiny_world, tmp_path, cache):
    train.train(settings(tiny_world, tmp_path, cache, steps=1))
    with pytest.raises(UserError, match="--preset toy → small"):
        train.train(settings(tiny_world, tmp_path, cache, steps=1, preset="small"))


def test_command_line_mistakes(tmp_path, tiny_world):
    def start(*flags):
        return subprocess.run(
            [sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True
        )

    typo = start("--learning-rate", "1")
    assert (
        typo.returncode == 2 and "--learning-rate" in typo.stderr and "Traceback" not in typo.stderr
    )
    (tmp_path / "file").touch()
    unwritable = start(
        "--dataset",
        "csv",
        "--data",
        str(tiny_world / "train.csv"),
        "--cache",
        str(tmp_path / "c"),
        "--batch-size",
        "16",
        "--out",
        str(tmp_path / "file" / "out"),
    )
    assert (
        unwritable.returncode == 2 and "choose another --out" in unwritable.stderr.splitlines()[-1]
    )
    assert "Traceback" not in unwritable.stderr
    if not torch.cuda.is_available():
        no_gpu = start("--gpus", "2")
        assert no_gpu.returncode == 2 and "this machine has 0 GPU(s)" in no_gpu.stderr


@pytest.mark.parametrize(
    "flags",
    [
        dict(eval_every=0),
        dict(log_every=0),
        dict(steps=0),
        dict(batch_size=1),
        dict(guided_share=2.0),
        dict(group_size=1),
        dict(chunk=-1),
        dict(seed=-1),
        dict(procs=-2),
        dict(max_broken=-1.0),
        dict(lr=-1.0),
        dict(lr=math.nan),
        dict(beta=math.nan),
        dict(skp_weight=-1.0),
        dict(keep=-1),
        dict(workers=0),
        dict(guided_from=1.5),
    ],
)
def test_a_value_out_of_range_is_refused_before_any_work(flags):
    name = next(iter(flags)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name} ") as error:
        train.check_config(TrainConfig(**flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.float16), ("fp32", None)])
def test_half_precision_reaches_the_op(tiny_world, tmp_path, monkeypatch, precision, dtype):
    """The embeddings are float32: without a word the op would leave the matrix unit."""
    real, asked = train.clop_loss, []

    def note(*args, **kwargs):
        asked.append(kwargs["dtype"])
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "clop_loss", note)
    config = dict(dataset="csv", data=str(tiny_world / "train.csv"), out=str(tmp_path / "run"))
    config |= dict(cache=str(tmp_path / "cache"), steps=1, batch_size=8, num_frames="2", workers=1)
    train.train(train.TrainConfig(**config, precision=precision))
    assert asked == [dtype]


def test_compiled_while_the_number_of_frames_changes(tiny_world, tmp_path, monkeypatch):
    """Dynamo traces the towers anew for 4 frames; what it hands to the compiler runs as it is."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    config = dict(dataset="csv", data=str(tiny_world / "train.csv"), cache=str(tmp_path / "cache"))
    config |= dict(steps=2, batch_size=8, num_frames="2,4", workers=1, log_every=1, warmup=1)
    losses = []
    for name, is_compiled in (("eager", False), ("compiled", True)):
        out = tmp_path / name
        train.train(train.TrainConfig(**config, out=str(out), compile=is_compiled))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2


def test_captions_that_say_nothing_known(tiny_world, tmp_path, capsys):
    """Said before anything is decoded; without knowledge they train."""
    video = tiny_world / "videos" / "train_0000{}.mp4"
    rows = [str(video).format(i) + f",{text}" for i, text in enumerate(["猫在跑", "🐈", "", ""])]
    rows.append(rows[1])
    (tmp_path / "zh.csv").write_text("video,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    config = dict(dataset="csv", data=str(tmp_path / "zh.csv"), cache=str(tmp_path / "cache"))
    config |= dict(steps=1, batch_size=2, num_frames="2", workers=1, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="share a noun or verb; .*--beta 0"):
        train.train(train.TrainConfig(**config))
    assert not list((tmp_path / "cache").glob("frames/*"))
    said = capsys.readouterr().out
    odd = "2 empty, 3 without a Latin letter, 1 repeated for the same video"
    assert f"5 captions: {odd}; 4 without a noun or verb" in said
    train.train(train.TrainConfig(**config, skp_weight=0.0, beta=0.0))
    assert load_checkpoint(tmp_path / "run").step == 1
