"""checkpoint.py: what is read is what was written, and nothing damaged, foreign or half-written is
ever taken.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import eval
import train
from captions.tokenizer import Tokenizer
from cli import UserError
from knowledge import ConceptVocab, extract_many
from model import CLOP, build_config
from training import checkpoint
from training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    resume_checkpoint,
    save_checkpoint,
)

CAPTIONS = ["a dog chases a cat", "two red balls bounce", "a dog chases a ball"]


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    vocab = ConceptVocab.build(extract_many(CAPTIONS), min_count=1)
    torch.manual_seed(0)
    model = CLOP(
        build_config(
            "toy",
            video_layers=1,
            text_layers=1,
            vocab_size=tokenizer.vocab_size,
            num_concepts=len(vocab),
        )
    )
    return model, tokenizer, vocab


def save(path, parts, **other):
    return save_checkpoint(path, *parts, config=dict(lr=0.1), step=7, **other)


def test_round_trip(tmp_path, parts):
    model, tokenizer, vocab = parts
    sha256 = save(
        tmp_path / "x.safetensors",
        parts,
        progress=dict(best=1.5),
        training=dict(moment=torch.arange(3.0)),
    )
    back = load_checkpoint(tmp_path / "x.safetensors", training=True)
    assert (back.step, back.config, back.progress, back.sha256) == (
        7,
        dict(lr=0.1),
        dict(best=1.5),
        sha256,
    )
    assert back.tokenizer.encode_batch(CAPTIONS, 20)[0].equal(
        tokenizer.encode_batch(CAPTIONS, 20)[0]
    )
    assert back.concept_vocab.names == vocab.names
    for name, value in model.state_dict().items():
        assert back.model.state_dict()[name].equal(value), name
    assert back.training["moment"].equal(torch.arange(3.0)) and not back.model.training
    assert load_checkpoint(tmp_path / "x.safetensors").training == {}


def test_a_folder_means_its_newest(tmp_path, parts):
    for step in (20, 1_000_000, 999_999):
        save(tmp_path / f"step-{step:06d}.safetensors", parts)
    for name in (
        "best.safetensors",
        "step-best.safetensors",
        "step-2000000.damaged",
        ".0123.unfinished.safetensors",
    ):
        (tmp_path / name).write_bytes(b"none of a run's steps")
    assert load_checkpoint(tmp_path).path.name == "step-1000000.safetensors"
    assert [int(p.stem[5:]) for p in list_checkpoints(tmp_path)] == [20, 999_999, 1_000_000]


def test_resuming_goes_back_to_the_newest_whole_one(tmp_path, parts, capsys):
    assert resume_checkpoint(tmp_path) is None
    paths = [tmp_path / f"step-00000{step}.safetensors" for step in (1, 2, 3)]
    for path in paths:
        save(path, parts, training=dict(moment=torch.ones(2)))
    (leftover := tmp_path / ".4567.unfinished.safetensors").touch()
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    assert (
        resume_checkpoint(tmp_path, repair=False).path == paths[0]
        and paths[2].exists()
        and leftover.exists()
    )
    assert not capsys.readouterr().err  # the first rank says it, once
    found = resume_checkpoint(tmp_path)
    assert found.path == paths[0] and found.training["moment"].equal(torch.ones(2))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == [str(paths[2]), str(paths[1])]
    assert all("damaged" in line and "going back to the one before it" in line for line in said)
    assert sorted(os.listdir(tmp_path)) == [
        "step-000001.safetensors",
        "step-000002.damaged",
        "step-000003.damaged",
    ]
    assert resume_checkpoint(tmp_path).path == paths[0]
    paths[0].write_bytes(b"")
    for _ in range(2):  # the second start must not begin anew, either
        with pytest.raises(UserError, match="no checkpoint here is whole"):
            resume_checkpoint(tmp_path)


def test_resuming_refuses_what_is_whole_but_foreign(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "step-000001.safetensors")
    with pytest.raises(UserError, match="not a CLOP checkpoint"):
        resume_checkpoint(tmp_path)


@pytest.mark.parametrize("position", ["last", "step", "vocabulary"])
def test_a_flipped_bit_is_found(tmp_path, parts, position):
    path = tmp_path / "x.safetensors"
    save(path, parts)
    data = bytearray(path.read_bytes())
    place = {
        "last": len(data) - 5,
        "step": data.index(b'step\\": 7') + 8,
        "vocabulary": data.index(b"noun:dog") + 5,
    }
    data[place[position]] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_truncated_foreign_and_missing_files(tmp_path, parts):
    path = tmp_path / "x.safetensors"
    save(path, parts)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a CLOP checkpoint"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="no step-"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_version(tmp_path, parts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ConceptVocab, "to_dict", lambda self: {"old": "layout"})
        save(tmp_path / "x.safetensors", parts)
    with pytest.raises(UserError, match="another version"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_export_keeps_what_evaluation_needs(tmp_path, parts):
    save(tmp_path / "x.safetensors", parts, training=dict(moment=torch.zeros(10_000_000)))
    out = tmp_path / "weights" / "toy.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "training.checkpoint", tmp_path / "x.safetensors", out],
        text=True,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
    )
    assert done.returncode == 0 and "step 7" in done.stdout, done.stderr
    before, after = load_checkpoint(tmp_path / "x.safetensors"), load_checkpoint(out, training=True)
    assert (after.step, after.config, after.training) == (7, before.config, {})
    assert (
        after.tokenizer.tokens == before.tokenizer.tokens
        and after.concept_vocab.names == before.concept_vocab.names
    )
    for (name, a), b in zip(before.model.state_dict().items(), after.model.state_dict().values()):
        assert b.dtype == torch.float32 and b.equal(a.half().float()), name
    video = torch.randn(4, 8, 3, 32, 32)
    assert (
        F.cosine_similarity(before.model.encode_video(video), after.model.encode_video(video)).min()
        > 1 - 1e-5
    )
    assert out.stat().st_size < 3 * sum(
        p.numel() for p in after.model.parameters()
    )  # 2 bytes each, and the header


def test_eval_takes_the_shipped_file_and_says_so(tiny_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = dict(
        dataset="csv",
        data=str(tiny_world / "train.csv"),
        out="run",
        cache="cache",
        steps=12,
        batch_size=16,
        num_frames="4",
        warmup=2,
        workers=1,
    )
    train.train(train.TrainConfig(**flags))
    wanted = dict(task="csv", data=str(tiny_world / "test.csv"), cache="cache", device="cpu")
    monkeypatch.setattr(eval, "SHIPPED", tmp_path / "weights" / "toy.safetensors")
    with pytest.raises(UserError, match="toy.safetensors: no such checkpoint"):
        eval.evaluate(eval.EvalConfig(**wanted))
    checkpoint.export_checkpoint("run", eval.SHIPPED)
    shipped = eval.evaluate(eval.EvalConfig(**wanted))
    assert (
        "no --checkpoint: the toy model that comes with this repository" in capsys.readouterr().out
    )
    named = eval.evaluate(eval.EvalConfig(checkpoint=str(eval.SHIPPED), out="named", **wanted))
    metrics = [name for name in named if name.startswith(("t2v_", "v2t_"))]
    assert len(metrics) == 10 and all(shipped[name] == named[name] for name in metrics)
    assert shipped["checkpoint_sha256"] == named["checkpoint_sha256"]
    assert (tmp_path / "runs" / "eval-csv-test" / "metrics.json").is_file()
    assert os.listdir("weights") == ["toy.safetensors"]  # nothing lies beside it


def test_the_toy_preset_fits_in_8_mb(tmp_path):
    tokens = Tokenizer.train([], 258).tokens + [
        f"learned {i} ".encode() for i in range(766)
    ]  # a full vocabulary …
    captions = [
        f"a {'abcdefghijklmnopqrstuvwxyz'[i % 26]}{i}x chases a dog" for i in range(400)
    ]  # … and concepts
    vocab = ConceptVocab.build(extract_many(captions), min_count=1)
    model = CLOP(build_config("toy", vocab_size=1024, num_concepts=len(vocab)))
    save_checkpoint(tmp_path / "x.safetensors", model, Tokenizer(tokens), vocab, config={}, step=1)
    checkpoint.export_checkpoint(tmp_path / "x.safetensors", tmp_path / "small.safetensors")
    assert len(vocab) >= 400 and (tmp_path / "small.safetensors").stat().st_size <= 8_000_000


def test_what_fp16_cannot_hold_is_not_exported(tmp_path, parts):
    save(tmp_path / "x.safetensors", parts)
    model = load_checkpoint(tmp_path / "x.safetensors").model
    with torch.no_grad():
        model.text.project.weight[0, 0] = 1e5
    save(tmp_path / "x.safetensors", (model, *parts[1:]))
    with pytest.raises(UserError, match="fp16 cannot hold"):
        checkpoint.export_checkpoint(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, parts, monkeypatch):
    path = tmp_path / "x.safetensors"
    before = save(path, parts)

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save(path, parts, training=dict(other=torch.ones(1)))
    assert load_checkpoint(path).sha256 == before and os.listdir(tmp_path) == ["x.safetensors"]
