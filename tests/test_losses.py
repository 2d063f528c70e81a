"""losses.py: plain InfoNCE is the exact special case; SKP, β and mining follow their equations."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from knowledge import ConceptVocab
from losses import LossConfig, clop_loss, info_nce, skp_loss

ROOT = Path(__file__).parent.parent
ALL_ON = LossConfig(skp_weight=0.5, beta=2.0, hard_k=3, hard_weight=0.7, mask_false_negatives=True)


def problem(dtype=torch.float64, scale=10.0):
    """12 pairs with 9 concepts."""
    torch.manual_seed(0)
    concepts = (torch.rand(12, 9) < 0.3).to(dtype)
    concepts[2] = 0  # a caption without concepts
    signature = torch.arange(12).repeat(2, 1).T.contiguous()
    signature[5, 0] = 4  # the video of pair 4
    signature[9, 1] = 8  # the meaning of pair 8
    return dict(
        video_emb=F.normalize(torch.randn(12, 16, dtype=dtype), dim=1).requires_grad_(),
        text_emb=F.normalize(torch.randn(12, 16, dtype=dtype), dim=1).requires_grad_(),
        logit_scale=torch.tensor(math.log(scale), dtype=dtype, requires_grad=True),
        knowledge=F.normalize(concepts, dim=1),
        concepts=concepts,
        concept_logits=torch.randn(12, 9, dtype=dtype, requires_grad=True),
        signature=signature,
    )


def by_hand(p, config: LossConfig):
    """The objective, written out pair by pair."""
    s = p["logit_scale"].exp().clamp(max=100)
    a = s * p["video_emb"] @ p["text_emb"].T  # row = video here, as in the equations of losses.py
    kappa = p["knowledge"] @ p["knowledge"].T
    B = len(a)
    total = hard = skp = 0
    for matrix in (a, a.T):
        for i in range(B):
            negatives = []
            for j in range(B):
                same = (p["signature"][i] == p["signature"][j]).any()
                if j != i and not (config.mask_false_negatives and same):
                    negatives.append(matrix[i, j] + config.beta * kappa[i, j])
            negatives = torch.stack(negatives)
            positive = matrix[i, i]
            total = total + torch.cat([positive[None], negatives]).logsumexp(0) - positive
            if config.hard_k:
                hardest = negatives.topk(config.hard_k).values
                hard = hard + torch.cat([positive[None], hardest]).logsumexp(0) - positive

    for y, z in zip(p["concepts"], p["concept_logits"]):
        if config.skp_weight and y.sum():
            skp = skp - (y * z.sigmoid().log() + (1 - y) * (-z).sigmoid().log()).sum() / B
    return total / (2 * B) + config.hard_weight * hard / (2 * B) + config.skp_weight * skp


def gradients(loss, p):
    wanted = [p[name] for name in ("video_emb", "text_emb", "logit_scale", "concept_logits")]
    return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)


def run_clop(p, config, **other):
    return clop_loss(**p, config=config, **other)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
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
def test_equals_the_equations_written_out(config, impl):
    p = problem()
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


def test_info_nce_is_ln_b_without_knowledge():
    emb = F.normalize(torch.ones(32, 8), dim=1)
    assert info_nce(emb, emb, torch.tensor(2.0)).item() == pytest.approx(math.log(32), rel=1e-6)


def test_beta_pushes_hardest_where_knowledge_is_shared():
    p = problem()
    p["knowledge"] = torch.zeros(12, 2, dtype=torch.float64)
    p["knowledge"][:2, 0] = 1  # only pairs 0 and 1 share knowledge
    pushes = []
    for beta in (0.0, 3.0):
        loss, _ = run_clop(p, LossConfig(beta=beta))
        text_gradient = gradients(loss, p)[1]
        pushes.append(text_gradient[1] @ p["video_emb"].detach()[0])  # of text 1 along video 0
    assert pushes[1] > 2 * pushes[0] > 0


def test_skp_of_a_caption_without_concepts_is_exactly_zero():
    logits = torch.randn(2, 5, requires_grad=True)
    concepts = torch.tensor([[0.0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])
    skp_loss(logits, concepts).backward()
    assert logits.grad[0].abs().max() == 0 and logits.grad[1].abs().max() > 0
    assert skp_loss(logits[:1], concepts[:1]).item() == 0


def test_skp_that_knows_only_frequencies_costs_their_entropy():
    frequency = torch.tensor([0.9, 0.1, 0.01])
    concepts = (torch.rand(4000, 3, generator=torch.manual_seed(0)) < frequency).float()
    concepts[:, 0] = 1  # no caption is without concepts
    names = ["noun:a", "noun:b", "verb:c"]
    vocab = ConceptVocab(names, concepts.sum(dim=0).numpy(), len(concepts))
    share = concepts[:, 1:].mean(dim=0)
    entropy = -(share * share.log() + (1 - share) * (1 - share).log()).sum().item()

    logits = torch.from_numpy(vocab.log_odds).repeat(len(concepts), 1)
    assert skp_loss(logits, concepts).item() == pytest.approx(entropy, rel=0.01)
    know_nothing = skp_loss(torch.zeros_like(logits), concepts)
    assert know_nothing.item() == pytest.approx(3 * math.log(2), rel=1e-6)


def test_skp_pulls_videos_of_the_same_concepts_together():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 2)
    head.bias.data.zero_()  # the log-odds of what half of the captions hold
    emb = torch.randn(4, 8, requires_grad=True)
    concepts = torch.eye(2)[[0, 0, 1, 1]]
    before = F.cosine_similarity(emb[[0, 2]], emb[[1, 3]])
    optimizer = torch.optim.SGD([emb], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        skp_loss(head(F.normalize(emb, dim=1) * 8**0.5), concepts).backward()
        optimizer.step()

    together = F.cosine_similarity(emb[[0, 2]], emb[[1, 3]])
    apart = F.cosine_similarity(emb[[0, 1]], emb[[2, 3]])
    assert (together > before + 0.3).all() and (together > 0.8).all()
    assert (apart < 0.3).all()


def test_a_saturated_scale_stays_finite():
    p = problem(dtype=torch.float32, scale=1000.0)  # clamped to 100
    p["text_emb"] = p["video_emb"].detach().clone().requires_grad_()
    loss, _ = run_clop(p, ALL_ON)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, p))


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


def test_fifty_steps_with_the_tiled_op_equal_fifty_with_the_reference():
    def train(impl):
        torch.manual_seed(0)
        towers = torch.nn.ModuleList([torch.nn.Linear(20, 16), torch.nn.Linear(20, 16)])
        head, logit_scale = torch.nn.Linear(16, 9), torch.nn.Parameter(torch.tensor(2.6))
        parameters = [*towers.parameters(), *head.parameters(), logit_scale]
        optimizer, world = torch.optim.SGD(parameters, lr=0.1), torch.randn(50, 64, 20)
        history = []
        for x in world:
            video_emb = F.normalize(towers[0](x), dim=1)
            text_emb = F.normalize(towers[1](x + 0.3 * x.roll(1, 1)), dim=1)
            concepts = (x[:, :9] > 0.8).float()
            loss, _ = clop_loss(
                video_emb,
                text_emb,
                logit_scale,
                ALL_ON,
                knowledge=F.normalize(concepts, dim=1),
                signature=torch.randint(0, 40, (64, 2)),
                concept_logits=head(video_emb),
                concepts=concepts,
                impl=impl,
            )
            optimizer.zero_grad()
            loss.backward()
            history.append([loss.item(), *(p.grad.double().norm().item() for p in parameters)])
            optimizer.step()
        return torch.tensor(history, dtype=torch.float64)  # [50, 1 + parameters]

    tiled, reference = train("tiled"), train("reference")
    assert reference[-1, 0] < reference[0, 0]  # it learns at all
    torch.testing.assert_close(tiled, reference, rtol=1e-5, atol=1e-7)


def test_demo_runs():
    done = subprocess.run([sys.executable, "losses.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "ln B = 4.1589" in done.stdout, done.stderr
