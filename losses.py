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
                L_SKP = mean_i −Σ_c [y_ic log σ(z_ic) + (1 − y_ic) log(1 − σ(z_ic))],    y_i = multi-hot of C_i,
            where a caption without any concept counts as zero.

With β = 0, k = 0, no signature and no SKP the result is plain InfoNCE, exactly.

Several processes: every rank keeps its own videos (rows) and meets the captions of all (columns), gathered with
gradient; each weighs its pairs by world_size / B, so that the mean over ranks is the loss of the global batch
(distributed.py).

    python losses.py         # ln B at random; how β moves the push; what SKP pulls
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

from cli import run
from training.processes import exchange, gather, share_sizes, world_size
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
    Paper: SKP is "a simple task". We take a binary cross-entropy a concept, summed: each is a question of its own,
    which the others' logits don't enter. It was measured against one softmax shared by a caption's concepts (LOG.md).
    Nearly all labels are 0; lest the first steps go into learning just that, the head starts from the log-odds of each
    concept (model.CLOP.init_concept_bias, as in https://arxiv.org/abs/1708.02002).
    """
    logits = concept_logits.to(torch.promote_types(concept_logits.dtype, torch.float32))
    loss = F.binary_cross_entropy_with_logits(logits, concepts.to(logits.dtype), reduction="none").sum(dim=1)
    return (loss * concepts.any(dim=1)).mean()                                # what no concept is known of says nothing


def clop_loss(video_emb, text_emb, logit_scale, config: LossConfig, *, knowledge=None, signature=None,
              concept_logits=None, concepts=None, batch_size: int | None = None, impl="auto"):
    """The whole objective of one batch -> (loss, {name: detached part}).

    video_emb, text_emb [n, E] unit norm: this rank's n of the batch_size pairs of all ranks (None: as many on each).
    knowledge [n, M]: unit rows whose dot product is κ (concepts.concept_vectors), for β > 0.
    signature [n, S] int64: two captions with an equal entry in any column are false negatives (video id, meaning id).
    concept_logits, concepts [n, K]: SKP's prediction and target, for skp_weight > 0.
    The mean of the losses over ranks is the global batch's loss, so that averaged gradients (DDP) are its gradient.
    A loss that is not finite is returned, not raised: the caller looks.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    n, B = len(video_emb), batch_size or len(video_emb) * world_size()
    sizes = share_sizes(B, world_size())
    assert n == sizes[rank], f"rank {rank} has {n} of {B} pairs, its share is {sizes[rank]}"
    texts = gather(text_emb, sizes)                                           # [B, E]
    stats = knowledge_nce_stats(
        video_emb, texts, logit_scale, offset=sum(sizes[:rank]), beta=config.beta, k=config.hard_k,
        concepts=(knowledge, gather(knowledge, sizes)) if config.beta else None,
        signature=(signature, gather(signature, sizes)) if config.mask_false_negatives else None,
        impl=impl, check=False)
    video_to_text = F.softplus(stats.row_negatives - stats.positive)          # logsumexp − positive, exact if saturated
    by_rank = exchange(stats.col_negatives, sizes)                            # [world_size, n], each from its rows only
    text_to_video = F.softplus(by_rank.clamp(min=NO_NEGATIVES).logsumexp(dim=0) - stats.positive)
    weight = world_size() / B
    nce = weight * (video_to_text + text_to_video).sum() / 2
    parts = {"nce": nce}
    loss = nce
    if config.hard_k and config.hard_weight:
        parts["hard"] = weight * hard_negative_loss(video_emb, text_emb, texts, logit_scale, stats, sizes).sum()
        loss = loss + config.hard_weight * parts["hard"]
    if config.skp_weight:
        parts["skp"] = weight * n * skp_loss(concept_logits, concepts)
        loss = loss + config.skp_weight * parts["skp"]
    return loss, {name: part.detach() for name, part in parts.items()}


def hard_negative_loss(video_emb, text_emb, texts, logit_scale, stats, sizes):
    """KCL's second InfoNCE: the positive against the k hardest negatives of its row and of its column -> [n].

    texts [B, E]: those of all ranks; sizes: how many each has. The op mines without gradient; the few logits that it
    names are computed again here with one. What the mined score holds beyond s·v·t is β·κ, a constant.
    """
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def against_hardest(anchor, others, index, score):              # [n, E], [B, E], [n, k], [n, k] -> [n]
        logits = scale * torch.einsum("ne,nke->nk", anchor, others[index.clamp(min=0)])
        logits = logits + (score - logits).detach()                 # the mined value, with the gradient of s·v·t
        return F.softplus(logits.masked_fill(index < 0, NO_NEGATIVES).logsumexp(dim=1) - stats.positive)

    mined = stats.mined
    v2t = against_hardest(video_emb, texts, mined.v2t_index, mined.v2t_score)
    t2v = against_hardest(text_emb, gather(video_emb, sizes), *merge_columns(mined.t2v_index, mined.t2v_score, sizes))
    return (v2t + t2v) / 2


def merge_columns(index, score, sizes):
    """The k hardest videos of this rank's captions, out of what each rank found among its own videos.

    index, score [B, k], index local to the rank -> [n, k], index global; ties keep the lowest index.
    """
    start = sum(sizes[:dist.get_rank()]) if len(sizes) > 1 else 0
    index = torch.where(index < 0, index, index + start)
    return merge_hardest(*(rearrange(exchange(x, sizes), "ranks n k -> n (ranks k)") for x in (index, score)),
                         k=index.shape[1])


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
    print(f"SKP that knows nothing: {skp_loss(torch.zeros(B, K), concepts):.4f}; K ln 2 = {K * math.log(2):.4f} times "
          f"the share that has concepts; that knows how frequent concepts are: "
          f"{skp_loss(torch.full((B, K), math.log(0.1 / 0.9)), concepts):.4f}")


if __name__ == "__main__":
    run(main)
