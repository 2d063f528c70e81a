"""bench/latent.py: what is measured in the joint space, and the pictures of it."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import start

from bench import latent
from bench.ablation import variant_fields
from losses import info_nce
from train import TrainConfig, train


def test_alignment_and_uniformity_of_known_points():
    cross = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert latent.alignment(cross, cross) == 0 and latent.alignment(cross, -cross) == 4
    assert latent.alignment(cross, np.roll(cross, 1, axis=0)) == pytest.approx(2)
    # of each point's three others two are at squared distance 2 and one at 4
    mean = (2 * math.exp(-4) + math.exp(-8)) / 3
    assert latent.uniformity(cross) == pytest.approx(math.log(mean))
    assert latent.uniformity(np.ones((5, 1))) == 0


def test_hard_negatives_are_negatives_that_share_knowledge():
    kappa = np.array([[1, 0.9, 0.9, 0.1], [0.9, 1, 0.5, 0], [0.9, 0.5, 1, 0.3], [0.1, 0, 0.3, 1]])
    video, meaning = np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7])
    negative, hard = latent.negative_masks(kappa, video, meaning)
    # 0 and 1 are one video, 1 and 2 one meaning
    expected = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0]], bool)
    assert (negative == expected).all()
    assert np.argwhere(hard).tolist() == [[0, 2], [2, 0], [2, 3], [3, 2]]


def test_gradient_share_is_the_gradient_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    text, video = F.normalize(emb, dim=2)
    logits = (3.0 * text @ video.T).requires_grad_()
    target = torch.arange(6)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    scale = torch.tensor(3.0).log().double()
    assert loss.item() == pytest.approx(info_nce(video, text, scale).item())
    loss.backward()

    hard = np.zeros((6, 6), bool)
    hard[[0, 2, 5], [1, 4, 0]] = True
    negative = ~np.eye(6, dtype=bool)
    gradient = logits.grad.numpy()
    wanted = gradient[hard].sum() / gradient[negative].sum()
    found = latent.gradient_share(logits.detach().numpy(), negative, hard)
    assert found == pytest.approx(wanted)
    assert latent.gradient_share(logits.detach().numpy(), negative, hard & False) == 0


def test_violations_by_hand():
    sim = np.array([[0.5, 0.6, 0.4], [0.1, 0.2, 0.3], [0.0, 0.0, 0.9]])
    hard = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 0]], bool)
    assert latent.violations(sim, hard) == 0.5  # (0, 1) and (1, 2) of four
    assert latent.violations(sim, np.zeros((3, 3), bool)) == 0


def test_the_plane_keeps_the_largest_variance():
    emb = np.random.default_rng(0).normal(size=(200, 5)) * [0.1, 5, 0.2, 2, 0.1] + 7
    plane = latent.principal_plane(emb)
    assert plane.shape == (200, 2)
    for column, axis in ((0, 1), (1, 3)):
        assert abs(np.corrcoef(plane[:, column], emb[:, axis])[0, 1]) > 0.99
    assert np.allclose(plane, latent.principal_plane(emb[::-1])[::-1])


def test_pictures_come_from_checkpoints(tiny_world, tmp_path):
    cache, runs = tmp_path / "cache", []
    paths = dict(dataset="csv", data=str(tiny_world / "train.csv"), cache=str(cache))
    for name in ("base", "all"):
        out = tmp_path / name
        options = paths | dict(out=str(out), steps=2, batch_size=16, workers=1)
        train(TrainConfig(**asdict(TrainConfig()) | variant_fields(name) | options))
        runs.append(f"{name}={out}")

    flags = ["--data", tiny_world, "--out", tmp_path, "--cache", cache, "--batch-size", 16]
    done = start("-m", "bench.latent", *runs, *flags)
    assert done.returncode == 0, done.stderr
    for name in ("similarity", "geometry", "map", "batches"):
        assert 5000 < (tmp_path / f"latent-{name}.png").stat().st_size < 300_000


def test_a_checkpoint_without_a_name_is_one_line():
    done = start("-m", "bench.latent", "runs/a")
    assert done.returncode == 2 and "expected NAME=CHECKPOINT" in done.stderr
