"""Whole evaluations of tiny videos; the numbers themselves are tests/test_metrics.py's."""

import csv
import json

import numpy as np
import pytest
import torch
from test_checkpoint import make_parts, save
from test_metrics import KEYS as ONE_CAPTION
from test_metrics import brute_force_metrics

from cli import UserError
from data import load_videos, prepare_video
from datasets import toyworld
from datasets.split import Split
from eval import SHIPPED, EvalConfig, embed_texts, evaluate, evaluate_retrieval
from training.checkpoint import load_checkpoint
from videos.cache import FrameCache
from videos.decode import write_video

# video 0 has two captions
KEYS = ONE_CAPTION | {key.replace("v2t", "v2t_grouped") for key in ONE_CAPTION}
CAPTIONS = [
    (0, "a red ball falls"),
    (0, "the ball drops down"),
    (1, "two dogs run"),
    (2, "a red ball falls"),
    (3, "Ünïcode 猫 🐈"),
    (4, ""),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with five videos, data.csv, a checkpoint and a frame cache."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(5):
        write_video(folder / f"{i}.mp4", rng.integers(0, 256, (6, 40, 48, 3), np.uint8))
    write_csv(folder / "data.csv", [(f"{i}.mp4", caption) for i, caption in CAPTIONS])
    save(folder / "step-000007.safetensors", make_parts())
    return folder


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "caption"), *rows])


def config(world, out, **changes):
    paths = dict(checkpoint=world, data=world / "data.csv", out=out, cache=world / "cache")
    options = {name: str(path) for name, path in paths.items()}
    return EvalConfig(**options | dict(task="csv", device="cpu") | changes)


def test_csv_writes_all_that_one_needs_to_compare(world, tmp_path, capsys):
    record = evaluate(config(world, tmp_path))
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert written == record and KEYS <= set(written)
    checkpoint = load_checkpoint(world)
    facts = dict(videos=5, captions=6, missing=0, broken=0, step=7, training_seed=3, note="")
    facts |= dict(frames=4, image_size=32, checkpoint_sha256=checkpoint.sha256)
    assert facts.items() <= written.items() and "mc_accuracy" not in written
    assert "v2t_grouped compares with CLIP4Clip" in written["protocol"]
    assert {"versions", "commit", "hardware", "date", "split", "seed"} <= set(written)
    low, high = written["intervals"]["t2v_R@1"]
    assert low <= written["t2v_R@1"] <= high
    assert "<!DOCTYPE html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "text to video" in said and "6 captions: 1 empty" in said

    # the same number, by hand: every frame and caption through the model, ranks by the definition
    model, video_of_text = checkpoint.model, [i for i, _ in CAPTIONS]
    cache = FrameCache(tmp_path / "frames", size=32, num_frames=8)
    paths, captions = [str(world / f"{i}.mp4") for i in range(5)], [text for _, text in CAPTIONS]
    with torch.inference_mode():
        video_emb = model.encode_video(prepare_video(load_videos(cache, paths, 4)))
        text_emb = model.encode_text(*checkpoint.tokenizer.encode_batch(captions, 32))
    sim = (text_emb @ video_emb.T).double().numpy().round(6).tolist()
    expected = brute_force_metrics(sim, video_of_text)
    assert {key: written[key] for key in KEYS} == pytest.approx(expected)

    # a training run measures the same
    split = Split.from_pairs((paths[i], caption) for i, caption in CAPTIONS)
    assert evaluate_retrieval(model, checkpoint.tokenizer, split, cache) == pytest.approx(expected)


def test_embeddings_keep_their_order_and_equal_captions_are_equal(world):
    checkpoint = load_checkpoint(world)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    captions = ["two dogs run", "a", "a red ball falls down and down", "two dogs run", ""] * 60
    text_emb = embed_texts(model, tokenizer, captions)
    with torch.inference_mode():
        alone = [model.encode_text(*tokenizer.encode_batch([c], 32))[0] for c in captions[:5]]
    torch.testing.assert_close(text_emb[:5], torch.stack(alone), atol=1e-5, rtol=0)
    assert torch.equal(text_emb[0], text_emb[3]) and torch.equal(text_emb[:5], text_emb[-5:])


def test_an_incomplete_set_says_so(world, tmp_path, capsys):
    (world / "text.mp4").write_text("this is no video")
    pairs = [(f"{i}.mp4", caption) for i, caption in CAPTIONS]
    write_csv(world / "holes.csv", [*pairs, ("gone.mp4", "b"), ("text.mp4", "c")])
    record = evaluate(config(world, tmp_path, data=str(world / "holes.csv"), max_broken=0.5))
    assert dict(videos=5, captions=6, missing=1, broken=1).items() <= record.items()
    assert record["note"] == "5 of 7 videos: not comparable (1 missing, 1 broken)"
    assert set(record["unusable"]) == {str(world / "gone.mp4"), str(world / "text.mp4")}
    assert record["note"] in capsys.readouterr().out
    assert record["note"] in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="2 of 7 videos cannot be used .1 missing, 1 broken"):
        evaluate(config(world, tmp_path, data=str(world / "holes.csv")))


def test_dual_softmax_only_under_its_own_name(world, tmp_path, capsys, monkeypatch):
    plain, both = evaluate(config(world, tmp_path)), evaluate(config(world, tmp_path, dsl=True))
    assert not any("dsl" in name for name in plain) and "dual softmax" not in plain["protocol"]
    assert {name for name in both if name.startswith("dsl_")} == {f"dsl_{key}" for key in KEYS}
    assert all(both[key] == plain[key] for key in KEYS) and "whole query set" in both["protocol"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "text to video, DSL" in page and "text to video, DSL" in capsys.readouterr().out
    monkeypatch.setattr("eval.MATRIX_LIMIT", 29)
    with pytest.raises(UserError, match="--dsl: 6 captions × 5 videos"):
        evaluate(config(world, tmp_path, dsl=True))


def test_two_results_side_by_side(world, tmp_path, capsys):
    """By hand: B finds one caption of six more, and another one that A finds it misses."""
    record = evaluate(config(world, tmp_path))
    texts = {"c": json.dumps(record | dict(queries_sha256="other")), "d": "{}", "e": "no JSON"}
    for name, ranks in (("a", "1 2 1 1 3 1.5"), ("b", "1 1 1 2 1 1.5")):
        texts[name] = json.dumps(record | dict(outcomes=dict(t2v=ranks)))
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text, encoding="utf-8")

    def compare(one, two):
        pair = (str(tmp_path / one), str(tmp_path / two))
        return evaluate(EvalConfig(compare=pair, out=str(tmp_path / "both")))

    compared = compare("a", "b")
    ours, theirs, gain, low, high, alone, other_alone = compared["t2v_R@1"]
    assert (ours, theirs, alone, other_alone) == (50, pytest.approx(400 / 6), 1, 2)
    assert gain == pytest.approx(100 / 6) and low < 0 < gain < high
    assert compared["t2v_R@5"] == [100, 100, 0, 0, 0, 0, 0]
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    for words in ("t2v_R@1", "50.0", "66.7", "16.7"):
        assert words in shown and words in page
    assert compare("a", "a/metrics.json")["t2v_R@1"][2:] == [0, 0, 0, 0, 0]

    for name, message in (
        ("c", "did not answer the same queries"),
        ("d", "d: holds no metrics.json with the outcome of each query .KeyError"),
        ("e", "e: holds no metrics.json .*JSONDecodeError"),
        ("nowhere", "nowhere: holds no metrics.json .*FileNotFoundError"),
    ):
        with pytest.raises(UserError, match=message):
            compare("a", name)


def test_csv_within_a_data_root(world, tmp_path):
    own = tmp_path / "own.csv"  # elsewhere than the videos
    rooted = config(world, tmp_path, data=str(own), data_root=str(world))
    own.write_bytes((world / "data.csv").read_bytes())
    assert evaluate(rooted)["videos"] == 5
    write_csv(own, [("../world/0.mp4", "a")])
    with pytest.raises(UserError, match="own.csv, line 2: the video .* outside of the data root"):
        evaluate(rooted)


def test_toy_gallery_and_questions(world, tmp_path):
    folder = toyworld.generate(tmp_path / "toy", train=0, val=8, test=0, workers=1, progress=False)
    toy = config(world, tmp_path / "out", task="toy", data=str(folder), split="val")
    record = evaluate(toy)
    assert dict(videos=8, captions=8, questions=44, split="val").items() <= record.items()
    kinds = {name for name in record if name.startswith("mc_accuracy_")}
    sorts = "noun verb direction binding count".split()
    assert kinds == {f"mc_accuracy_{sort}" for sort in sorts}
    assert 0 <= record["mc_accuracy"] <= 100
    # cached frames do not hide that the videos are gone
    (folder / "videos").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="8 of 8 videos"):
        evaluate(toy)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(checkpoint="nowhere"), "nowhere: no such checkpoint.*python train.py"),
        (dict(data=None), "--task csv: needs --data"),
        (dict(data="absent.csv"), "absent.csv"),
        (dict(query="a dog"), "--query a dog: is for --task search"),
        (dict(data_root=".", task="toy", data=None), "--data-root .: is for --task csv or msrvtt"),
        (dict(task="toy", data=__file__), "a file is for --task csv"),
        (dict(device="cuda"), "--device cuda"),
        (dict(max_broken=1.5), "--max-broken 1.5: must be at least 0 and at most 1"),
        (dict(task="msvd"), "--data .*data.csv: is for --task csv or toy"),
        (dict(task="msvd", data=None), "--task msvd: needs --data-root"),
        (dict(task="msrvtt", split="val", data=None, data_root="."), "msrvtt: has no val split"),
        (dict(out=__file__), "choose another --out"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so that --device cuda is no mistake")
    with pytest.raises(UserError, match=message) as error:
        evaluate(config(world, **dict(out=tmp_path) | changes))
    assert "\n" not in str(error.value)


def test_a_model_that_diverged_is_no_result(world, tmp_path):
    parts, path = make_parts(), tmp_path / "bad.safetensors"
    parts[0].video.project.weight.data.fill_(torch.nan)
    save(path, parts)
    with pytest.raises(UserError, match="video embeddings: NaN"):
        evaluate(config(world, tmp_path, checkpoint=str(path)))


def test_without_a_checkpoint_the_shipped_one_answers(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = config(world, tmp_path, checkpoint=None)
    wanted.out = None
    record = evaluate(wanted)
    says = f"no --checkpoint: the toy model that comes with this repository, {SHIPPED}"
    assert says in capsys.readouterr().out
    assert record["checkpoint_sha256"] == load_checkpoint(SHIPPED).sha256
    assert record["trained_on"] == "toy" and SHIPPED.stat().st_size <= 8e6
    assert (tmp_path / "runs" / "eval-csv-test" / "metrics.json").is_file()
