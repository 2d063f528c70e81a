"""checkpoint.py: what is read is what was written; nothing damaged or foreign is ever taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from captions.tokenizer import Tokenizer
from cli import UserError
from knowledge import ConceptVocab, extract_many
from model import CLOP, build_config
from training.checkpoint import (
    DamagedCheckpoint,
    export_checkpoint,
    list_checkpoints,
    load_checkpoint,
    resume_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a dog chases a cat", "two red balls bounce", "a red ball falls", "two dogs run"]


def make_parts(seed: int = 0) -> tuple:
    """A model of one layer, which has learned nothing; its tokenizer and vocabulary."""
    tokenizer = Tokenizer.train(CAPTIONS * 2, 400)
    vocab = ConceptVocab.build(extract_many(CAPTIONS * 2, progress=False))
    sizes = dict(vocab_size=tokenizer.vocab_size, num_concepts=len(vocab), num_frames=4)
    torch.manual_seed(seed)
    return CLOP(build_config("toy", video_layers=1, text_layers=1, **sizes)), tokenizer, vocab


def save(path, parts, **other):
    return save_checkpoint(path, *parts, config=dict(seed=3), step=7, **other)


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def test_round_trip(path, parts):
    model, tokenizer, vocab = parts
    moment = torch.arange(3.0)
    sha256 = save(path, parts, progress=dict(best=1.5), training=dict(moment=moment))
    back = load_checkpoint(path, training=True)
    assert (back.step, back.config, back.sha256) == (7, dict(seed=3), sha256)
    assert back.progress == dict(best=1.5) and back.training["moment"].equal(moment)
    assert back.tokenizer.tokens == tokenizer.tokens and back.concept_vocab.names == vocab.names
    for name, value in model.state_dict().items():
        assert back.model.state_dict()[name].equal(value), name
    assert not back.model.training and load_checkpoint(path).training == {}


def test_a_folder_means_its_newest(tmp_path, parts):
    for step in (20, 1_000_000, 999_999):
        save(tmp_path / f"step-{step:06d}.safetensors", parts)
    others = ("best.safetensors", "step-best.safetensors", "step-2000000.damaged")
    for name in (*others, ".0a1b.unfinished.safetensors"):
        (tmp_path / name).write_bytes(b"none of a run's steps")
    assert load_checkpoint(tmp_path).path.name == "step-1000000.safetensors"
    assert [int(p.stem[5:]) for p in list_checkpoints(tmp_path)] == [20, 999_999, 1_000_000]


def test_resuming_goes_back_to_the_newest_whole_one(tmp_path, parts, capsys):
    assert resume_checkpoint(tmp_path) is None
    paths = [tmp_path / f"step-00000{step}.safetensors" for step in (1, 2, 3)]
    for path in paths:
        save(path, parts, training=dict(moment=torch.ones(2)))
    leftover = tmp_path / ".0a1b.unfinished.safetensors"
    leftover.touch()
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])

    # the other ranks look, and the first one repairs and says so, once
    assert resume_checkpoint(tmp_path, repair=False).path == paths[0]
    assert paths[2].exists() and leftover.exists() and not capsys.readouterr().err
    found = resume_checkpoint(tmp_path)
    assert found.path == paths[0] and found.training["moment"].equal(torch.ones(2))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == [str(paths[2]), str(paths[1])]
    assert all("damaged" in line and "going back to the one before it" in line for line in said)
    aside = ["step-000002.damaged", "step-000003.damaged"]
    assert sorted(os.listdir(tmp_path)) == [paths[0].name, *aside]
    assert resume_checkpoint(tmp_path).path == paths[0]

    paths[0].write_bytes(b"")
    for _ in range(2):  # the second start must not begin anew, either
        with pytest.raises(UserError, match="no checkpoint here is whole"):
            resume_checkpoint(tmp_path)


def test_resuming_refuses_what_is_whole_but_foreign(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "step-000001.safetensors")
    with pytest.raises(UserError, match="not a CLOP checkpoint"):
        resume_checkpoint(tmp_path)


def test_damaged_and_missing_files(path, parts):
    save(path, parts)
    whole, unreadable = path.read_bytes(), "damaged or not a safetensors file"
    for content, said in (
        (whole[:-100], unreadable),
        (b"hello", unreadable),
        (whole[:-1] + b"?", "damaged, does not match its checksum"),
    ):
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=said):
            load_checkpoint(path)
    path.unlink()
    for missing, said in ((path, "no such checkpoint"), (path.parent, "no step-")):
        with pytest.raises(UserError, match=said):
            load_checkpoint(missing)


def test_a_checkpoint_of_another_version(path, parts):
    class OlderVocab(ConceptVocab):
        def to_dict(self):
            return {"old": "layout"}

    vocab = parts[2]
    save(path, (*parts[:2], OlderVocab(vocab.names, vocab.counts, vocab.num_captions)))
    with pytest.raises(UserError, match="another version of this code .KeyError: 'names'."):
        load_checkpoint(path)


def test_export_keeps_what_evaluation_needs(path, parts):
    save(path, parts, training=dict(moment=torch.zeros(10_000_000)))
    out = path.parent / "weights" / "toy.safetensors"
    command = [sys.executable, "-m", "training.checkpoint", path, out]
    done = subprocess.run(command, text=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and f"{out}: step 7" in done.stdout, done.stderr
    assert "'video_width': 128" in done.stdout and "concepts: noun:" in done.stdout

    before, after = load_checkpoint(path), load_checkpoint(out, training=True)
    assert (after.step, after.config, after.training) == (7, before.config, {})
    assert after.tokenizer.tokens == before.tokenizer.tokens
    assert after.concept_vocab.names == before.concept_vocab.names
    weights = after.model.state_dict()
    for name, a in before.model.state_dict().items():
        assert weights[name].dtype == torch.float32 and weights[name].equal(a.half().float()), name
    # 2 bytes each, and the header; nothing lies beside it
    assert out.stat().st_size < 3 * sum(t.numel() for t in weights.values())
    assert os.listdir(out.parent) == [out.name]


def test_what_fp16_cannot_hold_is_not_exported(path, parts):
    save(path, parts)
    model = load_checkpoint(path).model
    with torch.no_grad():
        model.text.project.weight[0, 0] = 1e5
    save(path, (model, *parts[1:]))
    with pytest.raises(UserError, match="fp16 cannot hold"):
        export_checkpoint(path, path.with_name("y.safetensors"))
    assert os.listdir(path.parent) == [path.name]
