"""Ranks by hand, ties, several captions, tiles; and whole evaluations of tiny videos."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toyworld
from checkpoint import load_checkpoint, save_checkpoint
from cli import UserError
from data import load_videos, prepare_video
from eval import (EvalConfig, dual_softmax_metrics, embed_split, embed_texts, evaluate, evaluate_retrieval,
                  multiple_choice_accuracy, retrieval_metrics, retrieval_metrics_from_embeddings, retrieval_ranks,
                  similarity)
from knowledge import ConceptVocab, extract_many
from model import CLOP, build_config
from splits import Split
from tokenizer import Tokenizer
from video import FrameCache, write_video

KEYS = {f"{d}_{m}" for d in ("t2v", "v2t") for m in ("R@1", "R@5", "R@10", "MdR", "MnR")}


def brute_force_ranks(sim, video_of_text):
    """The definition, one comparison at a time: no tiles, no sign, no vectors."""
    n_text, n_video = len(sim), len(sim[0])

    def rank(right, wrong):
        return 1 + sum(1.0 if s > right else 0.5 if s == right else 0.0 for s in wrong)

    t2v = [rank(sim[i][video_of_text[i]], [sim[i][j] for j in range(n_video) if j != video_of_text[i]])
           for i in range(n_text)]
    v2t = []
    for j in range(n_video):
        mine = [i for i in range(n_text) if video_of_text[i] == j]
        wrong = [sim[i][j] for i in range(n_text) if video_of_text[i] != j]
        if mine:
            v2t.append(min(rank(sim[i][j], wrong) for i in mine))
    return t2v, v2t


def brute_force_metrics(sim, video_of_text):
    metrics = {}
    for name, ranks in zip(("t2v", "v2t"), brute_force_ranks(sim, video_of_text)):
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = 100 * sum(r <= k for r in ranks) / len(ranks)
        ordered = sorted(ranks)
        metrics[f"{name}_MdR"] = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
        metrics[f"{name}_MnR"] = sum(ranks) / len(ranks)
    return metrics


def unit_rows(n, width, seed):
    return torch.nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_one_caption_a_video_by_hand():
    sim = np.array([[.9, .1, .2],     # right video first:            rank 1
                    [.8, .3, .3],     # one better, one tie:          rank 2.5
                    [.4, .5, .6]])    # first:                        rank 1
    metrics = retrieval_metrics(sim, [0, 1, 2])
    assert set(metrics) == KEYS and all(type(value) is float for value in metrics.values())
    assert metrics["t2v_R@1"] == pytest.approx(200 / 3)
    assert metrics["t2v_R@5"] == 100 and metrics["t2v_MdR"] == 1 and metrics["t2v_MnR"] == pytest.approx(1.5)
    # columns: .9 leads; .3 loses to .5; .6 leads
    assert metrics["v2t_R@1"] == pytest.approx(200 / 3) and metrics["v2t_MnR"] == pytest.approx(4 / 3)


def test_several_captions_by_hand():
    """Video 0 has captions 0, 1, 2; video 1 has caption 3; video 2 has none."""
    sim = np.array([[.2, .9, .1],     # video 0 loses to video 1:         2
                    [.7, .1, .8],     # video 0 loses to video 2:         2
                    [.7, .0, .0],     # first:                            1
                    [.5, .4, .4]])    # one better, one tie:              2.5
    metrics = retrieval_metrics(sim, [0, 0, 0, 1])
    assert metrics["t2v_MnR"] == pytest.approx(7.5 / 4) and metrics["t2v_MdR"] == 2 and metrics["t2v_R@1"] == 25
    # video 0: its best caption (.7, twice: they do not compete) against .5 -> 1
    # video 1: .4 against .9 -> 2;  video 2 asks nothing
    assert metrics["v2t_R@1"] == 50 and metrics["v2t_MnR"] == 1.5


def test_perfect_scores_top_everything():
    metrics = retrieval_metrics(np.eye(30), np.arange(30))
    assert all(metrics[key] == (100 if "R@" in key else 1) for key in KEYS)


def test_constant_scores_as_chance():
    metrics = retrieval_metrics(np.full((1000, 1000), 0.3, dtype=np.float32), np.arange(1000))
    for way in ("t2v", "v2t"):
        assert metrics[f"{way}_R@10"] == 0 and metrics[f"{way}_MdR"] == metrics[f"{way}_MnR"] == 500.5
    embedded = retrieval_metrics_from_embeddings(np.ones((50, 7)) / 3, np.ones((50, 7)) / 3, np.arange(50), chunk=16)
    assert embedded == retrieval_metrics(np.zeros((50, 50)), np.arange(50))


def test_random_scores_as_chance():
    n = 1500
    metrics = retrieval_metrics(np.random.default_rng(0).standard_normal((n, n)), np.arange(n))
    for way in ("t2v", "v2t"):
        # mean of n uniform ranks: standard error n / √(12 n) = 11; hits within 10: Poisson of mean 10
        assert abs(metrics[f"{way}_MnR"] - (n + 1) / 2) < 4 * np.sqrt(n / 12)
        assert 0 <= metrics[f"{way}_R@10"] * n / 100 <= 10 + 4 * np.sqrt(10)


def test_v2t_is_t2v_of_the_transpose():
    n = 40
    sim = np.random.default_rng(1).integers(0, 12, (n, n))
    video_of_text = np.random.default_rng(2).permutation(n)
    forward = retrieval_metrics(sim, video_of_text)
    backward = retrieval_metrics(sim.T, np.argsort(video_of_text))
    for key in KEYS:
        other = ("v2t" if key[:3] == "t2v" else "t2v") + key[3:]
        assert forward[key] == pytest.approx(backward[other])


# ---- against the definition ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_agrees_with_brute_force(data):
    n_text, n_video = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 9))
    levels = data.draw(st.sampled_from([1, 2, 4, 1000]))  # few levels = many ties
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sim = rng.integers(0, levels, (n_text, n_video)) / levels
    video_of_text = rng.integers(0, n_video, n_text)
    expected = brute_force_metrics(sim.tolist(), video_of_text.tolist())
    assert retrieval_metrics(sim, video_of_text) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [3, 64, 1000])
def test_tiles_do_not_change_a_single_rank(chunk):
    """Duplicated captions and videos, several captions a video, silent videos: equal to the matrix, bit for bit."""
    rng = np.random.default_rng(0)
    video = unit_rows(61, 33, 0)[torch.from_numpy(rng.integers(0, 61, 83))]
    video_of_text = rng.integers(0, 70, 211)  # videos 70..82 have no caption
    text = torch.nn.functional.normalize(video[video_of_text] + 0.4 * unit_rows(211, 33, 1), dim=1)
    text[5], text[200] = text[6], text[6]
    sim = similarity(text, video)
    t2v, v2t = retrieval_ranks(text, video, video_of_text, chunk=chunk)
    expected_t2v, expected_v2t = brute_force_ranks(sim.tolist(), video_of_text.tolist())
    assert t2v.tolist() == expected_t2v and v2t.tolist() == expected_v2t
    assert any(rank % 1 for rank in expected_t2v), "no tie: the test lost its point"
    metrics = retrieval_metrics_from_embeddings(text, video, video_of_text, chunk=chunk)
    assert metrics == retrieval_metrics(sim, video_of_text)


def test_scores_are_exact_whatever_the_order():
    text, video = 3 * unit_rows(64, 768, 0), unit_rows(64, 768, 1) / 5
    sim, order = similarity(text, video), torch.randperm(768, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sim, similarity(text[:, order], video[:, order]))
    assert torch.equal(sim[3:4, 7:8], similarity(text, video[:8])[3:4, 7:8])
    exact = text.double() @ video.double().T
    assert (sim - exact).abs().max() < (text @ video.T - exact).abs().max()  # nearer than fp32


def test_scale_of_embeddings_does_not_matter():
    text, video = unit_rows(50, 16, 0), unit_rows(50, 16, 1)
    expected = retrieval_metrics_from_embeddings(text, video, range(50))
    assert retrieval_metrics_from_embeddings(1024 * text, video / 4096, range(50)) == expected


def test_arrays_tensors_lists_and_types_agree():
    sim = np.random.default_rng(0).integers(-8, 8, (12, 5)).astype(np.float32) / 8
    video_of_text = np.arange(12) % 5
    expected = retrieval_metrics(sim, video_of_text)
    locked = np.asfortranarray(sim)
    locked.flags.writeable = False
    tensors = torch.tensor(sim, requires_grad=True), torch.tensor(sim).bfloat16()
    for other in (sim.tolist(), locked, sim.astype(np.float16), *tensors):
        assert retrieval_metrics(other, torch.from_numpy(video_of_text)) == expected


# ---- the dual softmax ------------------------------------------------------------------------------------------------


def test_dual_softmax_by_hand():
    """Video 0 pleases both captions; that caption 0 wants it more leaves video 1 to caption 1."""
    sim = torch.tensor([[0.9, 0.2], [0.7, 0.6]], dtype=torch.float64)
    assert retrieval_metrics(sim, [0, 1])["t2v_R@1"] == 50
    share = lambda a, b: np.exp(10 * a) / (np.exp(10 * a) + np.exp(10 * b))  # noqa: E731
    assert 0.7 * share(0.7, 0.9) < 0.6 * share(0.6, 0.2)   # 0.08 < 0.59: row 1 turns around
    metrics = dual_softmax_metrics(sim, [0, 1], scale=10.0)
    assert set(metrics) == {f"dsl_{key}" for key in KEYS} and metrics["dsl_t2v_R@1"] == metrics["dsl_v2t_R@1"] == 100


@pytest.mark.parametrize("scale", [0.0, 5.0, 100.0])
def test_dual_softmax_agrees_with_its_definition(scale):
    rng = np.random.default_rng(0)
    text, video = unit_rows(23, 8, 0), unit_rows(9, 8, 1)
    video_of_text = rng.integers(0, 9, 23)
    text[3] = text[4]  # equal captions tie before and after
    video_of_text[3] = video_of_text[4]
    sim = similarity(text, video).numpy()
    weights = np.exp(scale * sim)
    expected = {}
    for way, axis in (("t2v", 0), ("v2t", 1)):
        scores = sim * weights / weights.sum(axis=axis, keepdims=True)
        # to 12 digits: two ways to compute exp may differ in the last
        rounded = [[float(f"{score:.11e}") for score in row] for row in scores.tolist()]
        found = brute_force_metrics(rounded, video_of_text.tolist())
        expected |= {f"dsl_{key}": value for key, value in found.items() if key.startswith(way)}
    assert dual_softmax_metrics(torch.from_numpy(sim), video_of_text, scale) == pytest.approx(expected)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_scores_are_refused(bad):
    sim = np.eye(4)
    sim[2, 1] = bad
    with pytest.raises(UserError, match="sim: NaN or infinity"):
        retrieval_metrics(sim, range(4))
    with pytest.raises(UserError, match="video embeddings: NaN or infinity"):
        retrieval_metrics_from_embeddings(np.eye(4), sim, range(4))


@pytest.mark.parametrize("video_of_text", [[0, 1], [0, 1, 5], [0, -1, 2], []])
def test_impossible_pairs_are_refused(video_of_text):
    with pytest.raises(AssertionError):
        retrieval_metrics(np.eye(3), video_of_text)


# ---- multiple choice ------------------------------------------------------------------------------------------------


def test_multiple_choice_by_hand():
    scores = np.array([[.9, .1, .2], [.5, .6, .4], [.3, .3, .1], [.1, .2, .3]])
    metrics = multiple_choice_accuracy(scores, [0, 0, 1, 2], ["noun", "verb", "verb", "noun"])
    assert metrics == {"mc_accuracy": 62.5, "mc_accuracy_noun": 100, "mc_accuracy_verb": 25}  # a tie of two: half


def test_multiple_choice_of_a_constant_model_is_chance():
    assert multiple_choice_accuracy(torch.ones(40, 5), np.arange(40) % 5) == {"mc_accuracy": 20}
    with pytest.raises(UserError, match="multiple choice: NaN"):
        multiple_choice_accuracy([[0, np.nan]], [0])


# ---- whole evaluations: five tiny videos, an untrained model --------------------------------------------------------

CAPTIONS = [(0, "a red ball falls"), (0, "the ball drops down"), (1, "two dogs run"), (2, "a red ball falls"),
            (3, "Ünïcode 猫 🐈"), (4, "")]


def tiny_model(folder):
    """A checkpoint file of a model of one layer, which has learned nothing."""
    tokenizer = Tokenizer.train([caption for _, caption in CAPTIONS], 300)
    vocab = ConceptVocab.build(extract_many([caption for _, caption in CAPTIONS], progress=False), min_count=1)
    torch.manual_seed(0)
    model = CLOP(build_config("toy", video_layers=1, text_layers=1, num_frames=4, vocab_size=tokenizer.vocab_size))
    save_checkpoint(folder / "step-000007.safetensors", model, tokenizer, vocab, config={"seed": 3}, step=7)


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
    paths = dict(checkpoint=world / "step-000007.safetensors", data=world / "data.csv", out=out, cache=world / "cache")
    return EvalConfig(**{name: str(path) for name, path in paths.items()} | dict(task="csv", device="cpu") | changes)


def test_csv_writes_all_that_one_needs_to_compare(world, tmp_path, capsys):
    record = evaluate(config(world, tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert written == record and KEYS <= set(written)
    assert (written["videos"], written["captions"], written["missing"], written["broken"]) == (5, 6, 0, 0)
    checkpoint = load_checkpoint(world)
    assert written["checkpoint_sha256"] == checkpoint.sha256 and written["step"] == 7 and written["training_seed"] == 3
    assert (written["frames"], written["image_size"], written["note"]) == (4, 32, "") and "mc_accuracy" not in written
    assert {"versions", "commit", "hardware", "date", "protocol", "split", "seed"} <= set(written)
    assert "<!DOCTYPE html>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "text to video" in capsys.readouterr().out

    # the same number, by hand: every frame and caption through the model, ranks by the definition
    model, video_of_text = checkpoint.model, [i for i, _ in CAPTIONS]
    cache = FrameCache(tmp_path / "frames", size=32, num_frames=4)
    with torch.inference_mode():
        frames = load_videos(cache, [str(world / f"{i}.mp4") for i in range(5)], 4)
        video_emb = model.encode_video(prepare_video(frames))
        text_emb = model.encode_text(*checkpoint.tokenizer.encode_batch([caption for _, caption in CAPTIONS], 32))
    expected = brute_force_metrics((text_emb @ video_emb.T).double().numpy().round(6).tolist(), video_of_text)
    assert {key: written[key] for key in KEYS} == pytest.approx(expected)


def test_embeddings_keep_their_order_and_equal_captions_are_equal(world):
    checkpoint = load_checkpoint(world)
    captions = ["two dogs run", "a", "a red ball falls down and down", "two dogs run", ""] * 60
    text_emb = embed_texts(checkpoint.model, checkpoint.tokenizer, captions)
    with torch.inference_mode():
        alone = [checkpoint.model.encode_text(*checkpoint.tokenizer.encode_batch([c], 32))[0] for c in captions[:5]]
    assert text_emb.dtype == torch.float32 and torch.allclose(text_emb[:5], torch.stack(alone), atol=1e-5)
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
    assert (record["videos"], record["captions"], record["missing"], record["broken"]) == (5, 6, 1, 1)
    assert record["note"] == "5 of 7 videos: not comparable (1 missing, 1 broken)" and set(record["unusable"]) == {
        str(world / "gone.mp4"), str(world / "text.mp4")}
    assert "5 of 7 videos: not comparable" in capsys.readouterr().out
    assert "5 of 7 videos: not comparable" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="2 of 7 videos"):
        evaluate(config(world, tmp_path, data=str(world / "holes.csv")))


def test_dual_softmax_only_under_its_own_name(world, tmp_path, capsys):
    plain, both = evaluate(config(world, tmp_path)), evaluate(config(world, tmp_path, dsl=True))
    assert not any("dsl" in name for name in plain) and "dual softmax" not in plain["protocol"]
    assert {name for name in both if name.startswith("dsl_")} == {f"dsl_{key}" for key in KEYS}
    assert all(both[key] == plain[key] for key in KEYS) and "whole query set" in both["protocol"]
    assert "text to video, DSL" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "text to video, DSL" in page and "whole query set" in page


def test_saved_similarities_give_the_reported_numbers(world, tmp_path, monkeypatch, capsys):
    record = evaluate(config(world, tmp_path, sim_out=str(tmp_path / "saved")))
    saved = np.load(tmp_path / "saved", allow_pickle=False)
    assert saved["sim"].shape == (6, 5) and saved["text_emb"].shape == (6, 128) and saved["video_emb"].shape == (5, 128)
    metrics = retrieval_metrics(saved["sim"], saved["video_of_text"])
    assert metrics == {key: record[key] for key in KEYS}
    assert json.loads(str(saved["captions"])) == [caption for _, caption in CAPTIONS]
    assert json.loads(str(saved["videos"])) == [str(world / f"{i}.mp4") for i in range(5)]
    i, j = 2, 3  # row = caption, column = video
    assert saved["sim"][i, j] == pytest.approx(float(saved["text_emb"][i] @ saved["video_emb"][j]), abs=1e-6)

    monkeypatch.setattr("eval.MATRIX_LIMIT", 29)
    evaluate(config(world, tmp_path, sim_out=str(tmp_path / "large")))
    assert "sim" not in np.load(tmp_path / "large") and "without sim, whose 30 entries" in capsys.readouterr().out
    with pytest.raises(UserError, match="--dsl: 6 captions × 5 videos"):
        evaluate(config(world, tmp_path, dsl=True))
    with pytest.raises(UserError, match="nowhere.*cannot be written.*--sim-out"):
        evaluate(config(world, tmp_path, sim_out=str(tmp_path / "nowhere" / "x.npz")))


def test_csv_within_a_data_root(world, tmp_path):
    (tmp_path / "own.csv").write_bytes((world / "data.csv").read_bytes())  # elsewhere than the videos
    assert evaluate(config(world, tmp_path, data=str(tmp_path / "own.csv"), data_root=str(world)))["videos"] == 5
    write_csv(tmp_path / "own.csv", [("../world/0.mp4", "a")])
    with pytest.raises(UserError, match="own.csv, line 2: the video .* outside of the data root"):
        evaluate(config(world, tmp_path, data=str(tmp_path / "own.csv"), data_root=str(world)))


def test_toy_gallery_and_questions(world, tmp_path):
    folder = toyworld.generate(tmp_path / "toy", train=0, val=8, test=0, workers=1, progress=False)
    record = evaluate(config(world, tmp_path / "out", task="toy", data=str(folder), split="val"))
    assert (record["videos"], record["captions"], record["questions"]) == (8, 8, 8) and record["split"] == "val"
    kinds = {name for name in record if name.startswith("mc_accuracy_")}
    assert kinds <= {"mc_accuracy_noun", "mc_accuracy_verb", "mc_accuracy_direction"} and kinds
    assert 0 <= record["mc_accuracy"] <= 100
    (folder / "videos").rename(folder / "elsewhere")  # cached frames do not hide that the videos are gone
    with pytest.raises(UserError, match="8 of 8 videos"):
        evaluate(config(world, tmp_path / "out", task="toy", data=str(folder), split="val"))


@pytest.mark.parametrize("changes, message", [
    (dict(checkpoint="nowhere.safetensors"), "nowhere.safetensors: no such checkpoint"),
    (dict(data=None), "--task csv: needs --data"),
    (dict(data="absent.csv"), "absent.csv"),
    (dict(device="cuda"), "--device cuda"),
    (dict(task="msvd"), "--task msvd: needs --data-root"),
    (dict(task="msrvtt", split="val", data_root="."), "msrvtt: has no val split"),
])
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
    save_checkpoint(tmp_path / "bad.safetensors", checkpoint.model, checkpoint.tokenizer, checkpoint.concept_vocab,
                    config={}, step=1)
    with pytest.raises(UserError, match="video embeddings: NaN"):
        evaluate(config(world, tmp_path, checkpoint=str(tmp_path / "bad.safetensors")))


def test_command_line(world, tmp_path):
    command = [sys.executable, "eval.py", "--checkpoint", str(world), "--task", "csv",
               "--data", str(world / "data.csv"), "--out", str(tmp_path), "--cache", str(world / "cache")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 videos" in done.stdout and (tmp_path / "metrics.json").exists()


def test_no_checkpoint_no_result(tmp_path):
    """Never random weights: without the default checkpoint the command ends with one line that says what to do."""
    script = Path(__file__).parent.parent / "eval.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "python train.py" in done.stderr and done.stderr.count("\n") == 1
