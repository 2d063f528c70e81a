"""losses.py: plain InfoNCE is the exact special case; SKP, β and mining follow their equations."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from losses import LossConfig, clop_loss, info_nce

ROOT = Path(__file__).parent.parent
ALL_ON = LossConfig(skp_weight=0.5, beta=2.0, hard_k=3, hard_weight=0.7, mask_false_negatives=True)


def problem(dtype=torch.float64, scale=10.0, alone=0):
    """12 pairs with 9 concepts, and captions alone."""
    torch.manual_seed(0)
    captions = 12 + alone
    concepts = (torch.rand(captions, 9) < 0.3).to(dtype)
    concepts[2] = 0  # a caption without concepts
    signature = torch.arange(captions).repeat(2, 1).T.contiguous()
    signature[5, 0] = 4  # the video of pair 4
    signature[9, 1] = 8  # the meaning of pair 8
    return dict(
        video_emb=F.normalize(torch.randn(12, 16, dtype=dtype), dim=1).requires_grad_(),
        text_emb=F.normalize(torch.randn(captions, 16, dtype=dtype), dim=1).requires_grad_(),
        logit_scale=torch.tensor(math.log(scale), dtype=dtype, requires_grad=True),
        knowledge=F.normalize(concepts, dim=1),
        concepts=concepts,
        video_concepts=concepts[:12] * torch.rand(12, 1, dtype=dtype),
        concept_logits=(
            torch.randn(12, 9, dtype=dtype, requires_grad=True),
            torch.randn(captions, 9, dtype=dtype, requires_grad=True),
        ),
        signature=signature,
    )


def by_hand(p, config: LossConfig):
    """The objective, written out pair by pair."""
    s = p["logit_scale"].exp().clamp(max=100)
    a = s * p["video_emb"] @ p["text_emb"].T  # row = video here, as in the equations of losses.py
    kappa = p["knowledge"] @ p["knowledge"].T
    B = len(a)
    total = hard = skp = 0
    for matrix in (a, a.T[:B]):
        for i in range(B):
            negatives = []
            for j in range(matrix.shape[1]):
                same = (p["signature"][i] == p["signature"][j]).any()
                if j != i and not (config.mask_false_negatives and same):
                    negatives.append(matrix[i, j] + config.beta * kappa[i, j])
            negatives = torch.stack(negatives)
            positive = matrix[i, i]
            total = total + torch.cat([positive[None], negatives]).logsumexp(0) - positive
            if config.hard_k:
                hardest = negatives.topk(config.hard_k).values
                hard = hard + torch.cat([positive[None], hardest]).logsumexp(0) - positive

    for targets, logits in zip((p["video_concepts"], p["concepts"]), p["concept_logits"]):
        for y, z in zip(targets, logits):
            if config.skp_weight and y.sum():
                skp = skp - (y * z.sigmoid().log() + (1 - y) * (-z).sigmoid().log()).sum() / B
    return total / (2 * B) + config.hard_weight * hard / (2 * B) + config.skp_weight * skp


def gradients(loss, p):
    wanted = [p[name] for name in ("video_emb", "text_emb", "logit_scale")]
    wanted += p["concept_logits"]
    return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)


def run_clop(p, config, **other):
    return clop_loss(**p, config=config, **other)


@pytest.mark.parametrize(("impl", "alone"), [("reference", 5), ("tiled", 5), ("tiled", 0)])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(beta=2.0),
        LossConfig(mask_false_negatives=True),
        LossConfig(hard_k=3, hard_weight=0.7),
        LossConfig(skp_weight=0.5),
        ALL_ON,
    ],
    ids=str,
)
def test_equals_the_equations_written_out(config, impl, alone):
    p = problem(alone=alone)
    loss, _ = run_clop(p, config, impl=impl)
    expected = by_hand(p, config)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, p), gradients(expected, p)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_all_off_is_plain_info_nce():
    p = problem(dtype=torch.float32)
    loss, parts = run_clop(p, LossConfig())
    plain = info_nce(p["video_emb"], p["text_emb"], p["logit_scale"])
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-7)
    assert set(parts) == {"nce"}
    for ours, theirs in zip(gradients(loss, p)[:3], gradients(plain, p)[:3]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_batch_without_any_negative_costs_nothing():
    p = problem()
    p["signature"] = torch.zeros(12, 1, dtype=torch.int64)
    loss, _ = run_clop(p, LossConfig(hard_k=3, hard_weight=1.0, mask_false_negatives=True))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, p)[:3])


def test_fewer_negatives_than_k():
    p = problem()
    pairs = (p["video_emb"][:2], p["text_emb"][:2], p["logit_scale"])
    loss, parts = clop_loss(*pairs, LossConfig(hard_k=5, hard_weight=1.0))
    assert parts["hard"].item() == pytest.approx(parts["nce"].item())
    assert all(gradient.isfinite().all() for gradient in gradients(loss, p)[:3])


def test_demo_runs():
    done = subprocess.run([sys.executable, "losses.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "ln B = 4.1589" in done.stdout, done.stderr
