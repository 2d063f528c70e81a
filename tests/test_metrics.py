"""Ranks by hand, ties, several captions, tiles, dual softmax, multiple choice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from eval import (
    bootstrap,
    dual_softmax_ranks,
    multiple_choice_points,
    retrieval_metrics,
    retrieval_ranks,
    similarity,
    summarize,
)

KEYS = {f"{d}_{m}" for d in ("t2v", "v2t") for m in ("R@1", "R@5", "R@10", "MdR", "MnR")}


def brute_force_ranks(sim, video_of_text):
    """The definition, one comparison at a time: no tiles, no sign, no vectors."""
    n_text, n_video = len(sim), len(sim[0])

    def rank(right, wrong):
        return 1 + sum(1.0 if s > right else 0.5 if s == right else 0.0 for s in wrong)

    t2v, v2t, grouped = [], [], []
    for row, right in zip(sim, video_of_text):
        t2v.append(rank(row[right], [s for j, s in enumerate(row) if j != right]))
    for j in range(n_video):
        column = [row[j] for row in sim]
        mine = [s for s, video in zip(column, video_of_text) if video == j]
        wrong = [s for s, video in zip(column, video_of_text) if video != j]
        if mine:
            v2t.append(min(rank(s, wrong) for s in mine))
            best = {}  # of each video
            for s, video in zip(column, video_of_text):
                best[video] = max(best.get(video, s), s)
            grouped.append(rank(best.pop(j), best.values()))
    several = dict(v2t_grouped=grouped) if len(v2t) < n_text else {}
    return dict(t2v=t2v, v2t=v2t) | several


def brute_force_metrics(sim, video_of_text):
    metrics = {}
    for name, ranks in brute_force_ranks(sim, video_of_text).items():
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = 100 * sum(r <= k for r in ranks) / len(ranks)
        ordered = sorted(ranks)
        metrics[f"{name}_MdR"] = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
        metrics[f"{name}_MnR"] = sum(ranks) / len(ranks)
    return metrics


def unit_rows(n, width, seed):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---- by hand -------------------------------------------------------------------------------------


def test_one_caption_a_video_by_hand():
    sim = [
        [0.9, 0.1, 0.2],  # right video first: rank 1
        [0.8, 0.3, 0.3],  # one better, one tie: rank 2.5
        [0.4, 0.5, 0.6],  # first: rank 1
    ]
    t2v = {"t2v_R@1": 200 / 3, "t2v_R@5": 100, "t2v_R@10": 100, "t2v_MdR": 1, "t2v_MnR": 1.5}
    # columns: .9 leads; .3 loses to .5; .6 leads
    v2t = {"v2t_R@1": 200 / 3, "v2t_R@5": 100, "v2t_R@10": 100, "v2t_MdR": 1, "v2t_MnR": 4 / 3}
    for same in (sim, np.array(sim), torch.tensor(sim, requires_grad=True)):
        assert retrieval_metrics(same, [0, 1, 2]) == pytest.approx(t2v | v2t)


def test_several_captions_by_hand():
    """Video 0 has captions 0, 1, 2; video 1 has caption 3; video 2 has none."""
    sim = [
        [0.2, 0.9, 0.1],  # video 0 loses to video 1: 2
        [0.7, 0.1, 0.8],  # video 0 loses to video 2: 2
        [0.7, 0.0, 0.0],  # first: 1
        [0.5, 0.4, 0.4],  # one better, one tie: 2.5
    ]
    metrics = retrieval_metrics(sim, [0, 0, 0, 1])
    assert (metrics["t2v_MnR"], metrics["t2v_MdR"], metrics["t2v_R@1"]) == (7.5 / 4, 2, 25)
    # video 0: its best caption (.7, twice: they do not compete) against .5 -> 1
    # video 1: .4 against .9 -> 2;  video 2 asks nothing
    assert (metrics["v2t_MnR"], metrics["v2t_R@1"]) == (1.5, 50)


def test_constant_scores_as_chance():
    metrics = summarize(retrieval_ranks(np.ones((1000, 7)), np.ones((1000, 7)), np.arange(1000)))
    for way in ("t2v", "v2t"):
        assert metrics[f"{way}_R@10"] == 0
        assert metrics[f"{way}_MdR"] == metrics[f"{way}_MnR"] == 500.5


# ---- against the definition ----------------------------------------------------------------------


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


@pytest.mark.parametrize("tile", [3, 1000])
def test_tiles_do_not_change_a_single_rank(tile, monkeypatch):
    """Duplicated captions and videos, several captions a video, silent videos: bit for bit."""
    monkeypatch.setattr("eval.TILE", tile)
    rng = np.random.default_rng(0)
    video = unit_rows(61, 33, 0)[torch.from_numpy(rng.integers(0, 61, 83))]
    video_of_text = rng.integers(0, 70, 211)  # videos 70..82 have no caption
    text = F.normalize(video[video_of_text] + 0.4 * unit_rows(211, 33, 1), dim=1)
    text[5], text[200] = text[6], text[6]
    found = retrieval_ranks(text, video, video_of_text)
    expected = brute_force_ranks(similarity(text, video).tolist(), video_of_text.tolist())
    assert {way: ranks.tolist() for way, ranks in found.items()} == expected
    assert any(rank % 1 for rank in expected["t2v"]), "no tie: the test lost its point"


def test_scores_are_exact_whatever_the_order_and_scale():
    text, video = 3 * unit_rows(64, 768, 0), unit_rows(64, 768, 1) / 5
    sim = similarity(text, video)
    order = torch.randperm(768, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sim, similarity(text[:, order], video[:, order]))
    assert torch.equal(sim[3:4, 7:8], similarity(text, video[:8])[3:4, 7:8])
    assert torch.equal(sim, similarity(1024 * text, video / 1024))
    exact = text.double() @ video.double().T
    assert (sim - exact).abs().max() < (text @ video.T - exact).abs().max()  # nearer than fp32


@pytest.mark.parametrize("scale", [0.0, 100.0])
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
        rounded = np.vectorize(lambda score: float(f"{score:.11e}"))(scores)
        found = brute_force_metrics(rounded.tolist(), video_of_text.tolist())
        expected |= {f"dsl_{key}": value for key, value in found.items() if key.startswith(way)}
    ranks = dual_softmax_ranks(torch.from_numpy(sim), video_of_text, scale)
    assert summarize(ranks) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_scores_are_refused(bad):
    sim = np.eye(4)
    sim[2, 1] = bad
    for said, measure in (
        ("sim: NaN or infinity", lambda: retrieval_metrics(sim, range(4))),
        ("video embeddings: NaN", lambda: retrieval_ranks(np.eye(4), sim, range(4))),
        ("multiple choice: NaN", lambda: multiple_choice_points(sim, [0] * 4)),
    ):
        with pytest.raises(UserError, match=said):
            measure()


@pytest.mark.parametrize("video_of_text", [[0, 1], [0, 1, 5], [0, -1, 2], []])
def test_impossible_pairs_are_refused(video_of_text):
    with pytest.raises(AssertionError):
        retrieval_metrics(np.eye(3), video_of_text)


# ---- multiple choice, and how sure a number is ---------------------------------------------------


def test_multiple_choice_by_hand():
    scores = [[0.9, 0.1, 0.2], [0.5, 0.6, 0.4], [0.3, 0.3, 0.1], [0.1, 0.2, 0.3]]
    points = multiple_choice_points(scores, [0, 0, 1, 2], ["noun", "verb", "verb", "noun"])
    # a tie of two: half
    expected = {"mc_accuracy": 62.5, "mc_accuracy_noun": 100, "mc_accuracy_verb": 25}
    assert summarize(points) == expected
    constant = multiple_choice_points(torch.ones(40, 5), np.arange(40) % 5)
    assert summarize(constant) == {"mc_accuracy": 20}


def test_bootstrap_agrees_with_its_definition():
    """Draw queries with replacement, average, again and again; where do 95 % of the means lie?"""
    rng = np.random.default_rng(1)
    values = rng.choice([0.0, 50.0, 100.0], 300, p=[0.2, 0.1, 0.7])
    means = [values[rng.integers(0, 300, 300)].mean() for _ in range(4000)]
    assert bootstrap(values) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.5)
    assert bootstrap(np.full(9, 100.0)) == [100, 100]
