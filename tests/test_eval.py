"""Whole evaluations of tiny videos; the numbers themselves are tests/test_metrics.py's."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metrics import KEYS as ONE_CAPTION
from test_metrics import brute_force_metrics

from captions.tokenizer import Tokenizer
from cli import UserError
from data import load_videos, prepare_video
from datasets import toyworld
from datasets.split import Split
from eval import (
    SHIPPED,
    EvalConfig,
    embed_split,
    embed_texts,
    evaluate,
    evaluate_retrieval,
    retrieval_metrics,
    similarity,
)
from knowledge import ConceptVocab, extract_many
from model import CLOP, build_config
from training.checkpoint import load_checkpoint, save_checkpoint
from videos.cache import FrameCache
from videos.decode import write_video

# video 0 has two captions
KEYS = ONE_CAPTION | {key.replace("v2t", "v2t_grouped") for key in ONE_CAPTION}

# ---- whole evaluations: five tiny videos, an untrained model -------------------------------------

CAPTIONS = [
    (0, "a red ball falls"),
    (0, "the ball drops down"),
    (1, "two dogs run"),
    (2, "a red ball falls"),
    (3, "Ünïcode 猫 🐈"),
    (4, ""),
]


def tiny_model(folder):
    """A checkpoint file of a model of one layer, which has learned nothing."""
    tokenizer = Tokenizer.train([caption for _, caption in CAPTIONS], 300)
    vocab = ConceptVocab.build(
        extract_many([caption for _, caption in CAPTIONS], progress=False), min_count=1
    )
    torch.manual_seed(0)
    model = CLOP(
        build_config(
            "toy", video_layers=1, text_layers=1, num_frames=4, vocab_size=tokenizer.vocab_size
        )
    )
    save_checkpoint(
        folder / "step-000007.safetensors", model, tokenizer, vocab, config={"seed": 3}, step=7
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with five videos, data.csv, a checkpoint and a frame cache."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(5):
        write_video(folder / f"{i}.mp4", rng.integers(0, 256, (6, 40, 48, 3), np.uint8))
    write_csv(folder / "data.csv", [(f"{i}.mp4", caption) for i, caption in CAPTIONS])
    tiny_model(folder)
    return folder


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "caption"), *rows])


def config(world, out, **changes):
    paths = dict(
        checkpoint=world / "step-000007.safetensors",
        data=world / "data.csv",
        out=out,
        cache=world / "cache",
    )
    return EvalConfig(
        **{name: str(path) for name, path in paths.items()}
        | dict(task="csv", device="cpu")
        | changes
    )


def test_csv_writes_all_that_one_needs_to_compare(world, tmp_path, capsys):
    record = evaluate(config(world, tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert written == record and KEYS <= set(written)
    checkpoint = load_checkpoint(world)
    facts = dict(videos=5, captions=6, missing=0, broken=0, step=7, training_seed=3, note="")
    facts |= dict(frames=4, image_size=32, checkpoint_sha256=checkpoint.sha256)
    assert facts.items() <= written.items() and "mc_accuracy" not in written
    assert "v2t_grouped compares with CLIP4Clip" in written["protocol"]
    assert {"versions", "commit", "hardware", "date", "protocol", "split", "seed"} <= set(written)
    assert "<!DOCTYPE html>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "text to video" in said and "6 captions: 1 empty" in said

    # the same number, by hand: every frame and caption through the model, ranks by the definition
    model, video_of_text = checkpoint.model, [i for i, _ in CAPTIONS]
    cache = FrameCache(tmp_path / "frames", size=32, num_frames=8)
    with torch.inference_mode():
        frames = load_videos(cache, [str(world / f"{i}.mp4") for i in range(5)], 4)
        video_emb = model.encode_video(prepare_video(frames))
        text_emb = model.encode_text(
            *checkpoint.tokenizer.encode_batch([caption for _, caption in CAPTIONS], 32)
        )
    expected = brute_force_metrics(
        (text_emb @ video_emb.T).double().numpy().round(6).tolist(), video_of_text
    )
    assert {key: written[key] for key in KEYS} == pytest.approx(expected)


def test_embeddings_keep_their_order_and_equal_captions_are_equal(world):
    checkpoint = load_checkpoint(world)
    captions = ["two dogs run", "a", "a red ball falls down and down", "two dogs run", ""] * 60
    text_emb = embed_texts(checkpoint.model, checkpoint.tokenizer, captions)
    with torch.inference_mode():
        alone = [
            checkpoint.model.encode_text(*checkpoint.tokenizer.encode_batch([c], 32))[0]
            for c in captions[:5]
        ]
    assert text_emb.dtype == torch.float32 and torch.allclose(
        text_emb[:5], torch.stack(alone), atol=1e-5
    )
    assert torch.equal(text_emb[0], text_emb[3]) and torch.equal(text_emb[:5], text_emb[-5:])


def test_evaluate_retrieval_is_what_the_embeddings_give(world):
    checkpoint, cache = load_checkpoint(world), FrameCache(world / "cache2", size=32, num_frames=8)
    split = Split.from_pairs((str(world / f"{i}.mp4"), caption) for i, caption in CAPTIONS)
    text_emb, video_emb = embed_split(checkpoint.model, checkpoint.tokenizer, split, cache)
    assert text_emb.shape == (6, 128) and video_emb.shape == (5, 128)
    metrics = evaluate_retrieval(checkpoint.model, checkpoint.tokenizer, split, cache)
    assert metrics == retrieval_metrics(similarity(text_emb, video_emb), split.video_of_caption)


def test_an_incomplete_set_says_so(world, tmp_path, capsys):
    (world / "text.mp4").write_text("this is no video")
    pairs = [(f"{i}.mp4", caption) for i, caption in CAPTIONS]
    write_csv(world / "holes.csv", [*pairs, ("gone.mp4", "b"), ("text.mp4", "c")])
    record = evaluate(config(world, tmp_path, data=str(world / "holes.csv"), max_broken=0.5))
    assert dict(videos=5, captions=6, missing=1, broken=1).items() <= record.items()
    assert record["note"] == "5 of 7 videos: not comparable (1 missing, 1 broken)"
    assert set(record["unusable"]) == {str(world / "gone.mp4"), str(world / "text.mp4")}
    assert "5 of 7 videos: not comparable" in capsys.readouterr().out
    assert "5 of 7 videos: not comparable" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="2 of 7 videos cannot be used .1 missing, 1 broken"):
        evaluate(config(world, tmp_path, data=str(world / "holes.csv")))


def test_dual_softmax_only_under_its_own_name(world, tmp_path, capsys):
    plain, both = evaluate(config(world, tmp_path)), evaluate(config(world, tmp_path, dsl=True))
    assert not any("dsl" in name for name in plain) and "dual softmax" not in plain["protocol"]
    assert {name for name in both if name.startswith("dsl_")} == {f"dsl_{key}" for key in KEYS}
    assert all(both[key] == plain[key] for key in KEYS) and "whole query set" in both["protocol"]
    assert "text to video, DSL" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "text to video, DSL" in page and "whole query set" in page


def test_two_results_side_by_side(world, tmp_path, capsys):
    """By hand: B finds one caption of six more, and another one that A finds it misses."""
    folders = [str(tmp_path / name) for name in "ab"]
    record = evaluate(config(world, folders[0]))
    ranks = dict(a="1 2 1 1 3 1.5", b="1 1 1 2 1 1.5")
    for folder, text in zip(folders, ranks.values()):
        write = record | dict(outcomes=dict(t2v=text))
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "metrics.json").write_text(json.dumps(write), encoding="utf-8")
    out = str(tmp_path / "both")
    compared = evaluate(EvalConfig(compare=tuple(folders), out=out))
    ours, theirs, gain, low, high, alone, other_alone = compared["t2v_R@1"]
    assert (ours, theirs, alone, other_alone) == (50, pytest.approx(400 / 6), 1, 2)
    assert gain == pytest.approx(100 / 6) and low < 0 < gain < high
    assert compared["t2v_R@5"] == [100, 100, 0, 0, 0, 0, 0]
    shown, page = capsys.readouterr().out, Path(out, "report.html").read_text(encoding="utf-8")
    for words in ("t2v_R@1", "50.0", "66.7", "16.7"):
        assert words in shown and words in page
    # the same run with itself, and its own intervals
    one = evaluate(EvalConfig(compare=(folders[0], folders[0] + "/metrics.json"), out=out))
    assert one["t2v_R@1"][2:] == [0, 0, 0, 0, 0]
    low, high = record["intervals"]["t2v_R@1"]
    assert low <= record["t2v_R@1"] <= high and {"v2t_R@1", "v2t_grouped_R@1"} < set(
        record["intervals"]
    )

    for name, text, message in (
        ("c", json.dumps(record | dict(queries_sha256="other")), "did not answer the same queries"),
        ("d", "{}", "d: holds no metrics.json with the outcome of each query .KeyError"),
        ("e", "no JSON", "e: holds no metrics.json .*JSONDecodeError"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate(EvalConfig(compare=(folders[0], str(tmp_path / name)), out=out))
    with pytest.raises(UserError, match="nowhere: holds no metrics.json .*FileNotFoundError"):
        evaluate(EvalConfig(compare=(folders[0], "nowhere"), out=out))


def test_saved_similarities_give_the_reported_numbers(world, tmp_path, monkeypatch, capsys):
    record = evaluate(config(world, tmp_path, sim_out=str(tmp_path / "saved")))
    saved = np.load(tmp_path / "saved", allow_pickle=False)
    assert (
        saved["sim"].shape == (6, 5)
        and saved["text_emb"].shape == (6, 128)
        and saved["video_emb"].shape == (5, 128)
    )
    metrics = retrieval_metrics(saved["sim"], saved["video_of_text"])
    assert metrics == {key: record[key] for key in KEYS}
    assert json.loads(str(saved["captions"])) == [caption for _, caption in CAPTIONS]
    assert json.loads(str(saved["videos"])) == [str(world / f"{i}.mp4") for i in range(5)]
    i, j = 2, 3  # row = caption, column = video
    assert saved["sim"][i, j] == pytest.approx(
        float(saved["text_emb"][i] @ saved["video_emb"][j]), abs=1e-6
    )

    monkeypatch.setattr("eval.MATRIX_LIMIT", 29)
    evaluate(config(world, tmp_path, sim_out=str(tmp_path / "large")))
    assert (
        "sim" not in np.load(tmp_path / "large")
        and "without sim, whose 30 entries" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="--dsl: 6 captions × 5 videos"):
        evaluate(config(world, tmp_path, dsl=True))
    with pytest.raises(UserError, match="saved/x.npz: cannot be written"):
        evaluate(config(world, tmp_path, sim_out=str(tmp_path / "saved" / "x.npz")))


def test_csv_within_a_data_root(world, tmp_path):
    (tmp_path / "own.csv").write_bytes(
        (world / "data.csv").read_bytes()
    )  # elsewhere than the videos
    assert (
        evaluate(config(world, tmp_path, data=str(tmp_path / "own.csv"), data_root=str(world)))[
            "videos"
        ]
        == 5
    )
    write_csv(tmp_path / "own.csv", [("../world/0.mp4", "a")])
    with pytest.raises(UserError, match="own.csv, line 2: the video .* outside of the data root"):
        evaluate(config(world, tmp_path, data=str(tmp_path / "own.csv"), data_root=str(world)))


def test_toy_gallery_and_questions(world, tmp_path):
    folder = toyworld.generate(tmp_path / "toy", train=0, val=8, test=0, workers=1, progress=False)
    record = evaluate(config(world, tmp_path / "out", task="toy", data=str(folder), split="val"))
    assert (record["videos"], record["captions"], record["questions"]) == (8, 8, 8) and record[
        "split"
    ] == "val"
    kinds = {name for name in record if name.startswith("mc_accuracy_")}
    assert kinds <= {"mc_accuracy_noun", "mc_accuracy_verb", "mc_accuracy_direction"} and kinds
    assert 0 <= record["mc_accuracy"] <= 100
    (folder / "videos").rename(
        folder / "elsewhere"
    )  # cached frames do not hide that the videos are gone
    with pytest.raises(UserError, match="8 of 8 videos"):
        evaluate(config(world, tmp_path / "out", task="toy", data=str(folder), split="val"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(checkpoint="nowhere.safetensors"), "nowhere.safetensors: no such checkpoint"),
        (dict(data=None), "--task csv: needs --data"),
        (dict(data="absent.csv"), "absent.csv"),
        (dict(query="a dog"), "--query a dog: is for --task search"),
        (dict(data_root=".", task="toy", data=None), "--data-root .: is for --task csv or msrvtt"),
        (dict(task="toy", data=__file__), "a file is for --task csv"),
        (dict(device="cuda"), "--device cuda"),
        (dict(max_broken=1.5), "--max-broken 1.5: must be at least 0 and at most 1"),
        (dict(seed=-1), "--seed -1: must be at least 0"),
        (dict(task="msvd"), "--data .*data.csv: is for --task csv or toy or msrvtt-mc"),
        (dict(task="msvd", data=None), "--task msvd: needs --data-root"),
        (dict(task="msrvtt", split="val", data=None, data_root="."), "msrvtt: has no val split"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so that --device cuda is no mistake")
    with pytest.raises(UserError, match=message) as error:
        evaluate(config(world, tmp_path / "out", **changes))
    assert "\n" not in str(error.value)


def test_results_that_cannot_be_written(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        evaluate(config(world, tmp_path / "file"))


def test_a_model_that_diverged_is_no_result(world, tmp_path):
    checkpoint = load_checkpoint(world)
    checkpoint.model.video.project.weight.data.fill_(torch.nan)
    save_checkpoint(
        tmp_path / "bad.safetensors",
        checkpoint.model,
        checkpoint.tokenizer,
        checkpoint.concept_vocab,
        config={},
        step=1,
    )
    with pytest.raises(UserError, match="video embeddings: NaN"):
        evaluate(config(world, tmp_path, checkpoint=str(tmp_path / "bad.safetensors")))


def test_no_checkpoint_no_result(tmp_path):
    """Never random weights: without its checkpoint the command ends with one line that says what to
    do.
    """
    command = [sys.executable, Path(__file__).parent.parent / "eval.py", "--checkpoint", "missing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "python train.py" in done.stderr and done.stderr.count("\n") == 1
    )


def test_without_a_checkpoint_the_shipped_one_answers(world, tmp_path, capsys):
    record = evaluate(config(world, tmp_path, checkpoint=None))
    assert (
        f"no --checkpoint: the toy model that comes with this repository, {SHIPPED}"
        in capsys.readouterr().out
    )
    assert (
        record["checkpoint_sha256"] == load_checkpoint(SHIPPED).sha256
        and record["trained_on"] == "toy"
    )
    assert SHIPPED.stat().st_size <= 8e6
