"""What CLOP minimises: InfoNCE with knowledge in it (KCL) plus the prediction of structural knowledge (SKP).

B pairs (video i, caption i); v_i and t_j unit vectors; s = exp(logit_scale) ≤ 100; C_i the concepts of caption i.

InfoNCE     a_ij = s·v_i·t_j; each video must find its caption among B, each caption its video:
                L = ½ mean_i [logsumexp_j a_ij − a_ii] + ½ mean_j [logsumexp_i a_ij − a_jj]
            (ln B for a model that knows nothing)

KCL pushes  a_ij = s·v_i·t_j + β·κ_ij for j ≠ i, where κ_ij in [0, 1] is the overlap of C_i and C_j: a caption that
            shares knowledge with the video weighs e^(βκ) times more among the negatives. Pairs that are no negatives at
            all (same video, same knowledge, same text) leave both sums. A second InfoNCE of the positive against only
            its k hardest negatives may be added.
            (The third part of KCL, which captions meet in a batch at all, is data.KnowledgeBatchSampler.)

SKP pulls   the video embedding predicts the concepts of its caption.
            Videos that share concepts share targets, hence directions:
                L_SKP = mean_i −Σ_c y_ic log softmax(z_i)_c,    y_i = multi-hot of C_i / |C_i|, 0 without concepts

With β = 0, k = 0, no signature and no SKP the result is plain InfoNCE, exactly.

Several processes: every rank keeps its own videos (rows) and meets the captions of all (columns). What is gathered
keeps its gradient: without it each encoder would get 1/world_size of the contrastive gradient, and SKP would weigh
world_size times too much.

    python losses.py         # ln B at random; how β moves the push; what SKP pulls
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

from cli import run
from kernels import knowledge_nce_stats, merge_hardest
from model import MAX_LOGIT_SCALE

NO_NEGATIVES = -1e30  # log-sum-exp of no negatives at all: −inf in effect, but with a gradient (zero) instead of NaN


@dataclass
class LossConfig:
    """Weights of the parts. All zero = plain InfoNCE."""

    skp_weight: float = 0.0             # weight of SKP
    beta: float = 0.0                   # β: how much shared knowledge raises a negative's logit
    hard_k: int = 0                     # k: hardest negatives of each row and column in the second InfoNCE
    hard_weight: float = 0.0            # weight of that second InfoNCE
    mask_false_negatives: bool = False  # leave pairs of the same video, knowledge or text out of the negatives


def info_nce(video_emb, text_emb, logit_scale):
    """Plain symmetric InfoNCE (CLIP) of unit vectors [B, E], [B, E] and the learned log scale; the yardstick below."""
    sim = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * text_emb @ video_emb.T  # [n_text, n_video]
    target = torch.arange(len(sim), device=sim.device)
    return (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)) / 2


def skp_loss(concept_logits, concepts):
    """Structural Knowledge Prediction, mean over the batch.

    concept_logits [B, K] from the video embedding, concepts [B, K] multi-hot of its caption.
    Paper: SKP is "a simple task". Multi-label targets over a long-tailed vocabulary: a softmax shared by the |C| labels
    needs no prior per concept and was measured against binary cross-entropy (LOG.md).
    """
    target = concepts / concepts.sum(dim=1, keepdim=True).clamp(min=1)        # a caption without concepts: all zero
    return -(target * F.log_softmax(concept_logits.float(), dim=1)).sum(dim=1).mean()


class _GatherWithGrad(torch.autograd.Function):
    """Rows of all ranks, in rank order; backward returns to each rank the sum of what all ranks want of its rows."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """[n, …] on each rank -> [world_size · n, …] on all, with gradient. The identity in a single process."""
    return _GatherWithGrad.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def clop_loss(video_emb, text_emb, logit_scale, config: LossConfig, *, knowledge=None, signature=None,
              concept_logits=None, concepts=None, impl="auto"):
    """The whole objective of one batch -> (loss, {name: detached part}).

    video_emb, text_emb [n, E] unit norm: this rank's n pairs; every other rank must call with as many.
    knowledge [n, M]: unit rows whose dot product is κ (knowledge.concept_vectors), for β > 0.
    signature [n, S] int64: two captions with an equal entry in any column are false negatives (video id, meaning id).
    concept_logits, concepts [n, K]: SKP's prediction and target, for skp_weight > 0.
    The mean of the losses over ranks is the global batch's loss, so that averaged gradients (DDP) are its gradient.
    """
    n, rank = len(video_emb), dist.get_rank() if dist.is_initialized() else 0
    mine = slice(rank * n, (rank + 1) * n)                                    # this rank's columns
    stats = knowledge_nce_stats(
        video_emb, gather(text_emb), logit_scale, offset=rank * n, beta=config.beta, k=config.hard_k, impl=impl,
        concepts=(knowledge, gather(knowledge)) if config.beta else None,
        signature=(signature, gather(signature)) if config.mask_false_negatives else None)
    video_to_text = F.softplus(stats.row_negatives - stats.positive)          # logsumexp − positive, exact if saturated
    by_rank = gather(stats.col_negatives).view(-1, len(stats.col_negatives))  # [world_size, B], each from its rows only
    text_to_video = F.softplus(by_rank.clamp(min=NO_NEGATIVES).logsumexp(dim=0)[mine] - stats.positive)
    nce = (video_to_text.mean() + text_to_video.mean()) / 2
    parts = {"nce": nce}
    loss = nce
    if config.hard_k and config.hard_weight:
        parts["hard"] = hard_negative_loss(video_emb, text_emb, logit_scale, stats, rank)
        loss = loss + config.hard_weight * parts["hard"]
    if config.skp_weight:
        parts["skp"] = skp_loss(concept_logits, concepts)
        loss = loss + config.skp_weight * parts["skp"]
    return loss, {name: part.detach() for name, part in parts.items()}


def hard_negative_loss(video_emb, text_emb, logit_scale, stats, rank=0):
    """KCL's second InfoNCE: the positive against the k hardest negatives of its row and of its column.

    The op mines without gradient; the few logits that it names are computed again here with one. What the mined score
    holds beyond s·v·t is β·κ, a constant.
    """
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    videos, texts = gather(video_emb), gather(text_emb)

    def against_hardest(anchor, others, index, score):              # [n, E], [B, E], [n, k], [n, k] -> [n]
        logits = scale * torch.einsum("ne,nke->nk", anchor, others[index.clamp(min=0)])
        logits = logits + (score - logits).detach()                 # the mined value, with the gradient of s·v·t
        return F.softplus(logits.masked_fill(index < 0, NO_NEGATIVES).logsumexp(dim=1) - stats.positive)

    mined = stats.mined
    t2v_index, t2v_score = merge_columns(mined.t2v_index, mined.t2v_score, rows=len(video_emb), rank=rank)
    v2t = against_hardest(video_emb, texts, mined.v2t_index, mined.v2t_score)
    t2v = against_hardest(text_emb, videos, t2v_index, t2v_score)
    return (v2t.mean() + t2v.mean()) / 2


def merge_columns(index, score, *, rows: int, rank: int):
    """The k hardest videos of this rank's captions, out of what each rank found among its own `rows` videos.

    index, score [B, k], index local to the rank -> [rows, k], index global; ties keep the lowest index.
    """
    k, mine = index.shape[1], slice(rank * rows, (rank + 1) * rows)
    index = torch.where(index < 0, index, index + rank * rows)
    index, score = (rearrange(gather(x), "(ranks b) k -> b (ranks k)", b=len(x))[mine] for x in (index, score))
    return merge_hardest(index, score, k)


def main():
    torch.manual_seed(0)
    B, E, K = 64, 128, 20
    video_emb, text_emb = (F.normalize(torch.randn(B, E), dim=1) for _ in range(2))
    logit_scale = torch.tensor(0.0)
    print(f"InfoNCE at random and scale 1: {info_nce(video_emb, text_emb, logit_scale):.4f}; ln B = {math.log(B):.4f}")
    concepts = (torch.rand(B, K) < 0.1).float()
    knowledge = F.normalize(concepts, dim=1)
    for beta in (0.0, 1.0, 3.0):
        loss, _ = clop_loss(video_emb, text_emb, logit_scale, LossConfig(beta=beta), knowledge=knowledge)
        print(f"β = {beta:.0f}: {loss:.4f}, the more so the more knowledge the negatives share")
    print(f"SKP that knows nothing: {skp_loss(torch.zeros(B, K), concepts):.4f}; "
          f"ln K = {math.log(K):.4f} times the share that has concepts")


if __name__ == "__main__":
    run(main)
