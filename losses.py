"""What CLOP minimises: InfoNCE with knowledge in it (KCL), and the prediction of concepts (SKP).

B pairs (video i, caption i); v_i and t_j are unit vectors; s = exp(logit_scale) ≤ 100; C_i are the
concepts of caption i.

InfoNCE     a_ij = s·v_i·t_j. Each video must find its caption among B, each caption its video:
                L = ½ mean_i [logsumexp_j a_ij − a_ii] + ½ mean_j [logsumexp_i a_ij − a_jj]
            (ln B for a model that knows nothing)

KCL pushes  a_ij = s·v_i·t_j + β·κ_ij for j ≠ i, where κ_ij in [0, 1] is the overlap of C_i and C_j.
            A caption that shares knowledge with the video weighs e^(βκ) times more among the
            negatives. Pairs of the same video, knowledge or text are no negatives: they leave both
            sums. Captions may come without a video: negatives of every video, j > B.
            A second InfoNCE, of the positive against its k hardest negatives, may be added.
            (Which captions meet in a batch at all is decided by data.KnowledgeBatchSampler.)

SKP pulls   the features of a caption predict its concepts, those of a video what its captions hold.
            What shares concepts shares targets, hence directions. With K logits z of a caption or
            a video and its targets y (y_c = 1 if the caption holds concept c, else 0; for a video
            the share of its captions that hold c):
                L_SKP = 1/B Σ −Σ_c [y_c log σ(z_c) + (1 − y_c) log(1 − σ(z_c))]
            summed over videos and captions; one without any concept counts as zero.

With β = 0, k = 0, no signature and no SKP the result is plain InfoNCE, exactly.

Several processes: every rank keeps its own videos (rows) and meets the captions of all (columns),
gathered with gradient (kernels/distributed.py). Each rank weighs its pairs by world_size / B, so
that the mean over ranks is the loss of the global batch.

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
from kernels.distributed import exchange, gather, share_sizes, world_size
from model import MAX_LOGIT_SCALE

# log-sum-exp of no negatives at all: −inf in effect, but its gradient is zero instead of NaN
NO_NEGATIVES = -1e30


@dataclass
class LossConfig:
    """Weights of the parts. All zero = plain InfoNCE."""

    skp_weight: float = 0.0  # SKP: weight of the prediction of concepts
    beta: float = 0.0  # KCL, β: how much shared knowledge raises a negative's logit
    hard_k: int = 0  # KCL, k: hardest negatives of each row and column in the second InfoNCE
    hard_weight: float = 0.0  # KCL: weight of that second InfoNCE
    mask_false_negatives: bool = False  # KCL: same video, knowledge or text is never a negative


def info_nce(video_emb, text_emb, logit_scale):
    """Plain symmetric InfoNCE (CLIP) of unit vectors [B, E], [B, E]: the yardstick."""
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    sim = scale * text_emb @ video_emb.T  # [n_text, n_video]
    target = torch.arange(len(sim), device=sim.device)
    return (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)) / 2


def skp_loss(concept_logits, concepts):
    """Structural Knowledge Prediction: logits [n, K] of videos or captions, concepts [n, K] -> [n].

    concepts: 1 for what a caption holds; for a video the share of its captions that hold it.

    Paper: SKP is "a simple task". We take a binary cross-entropy per concept, summed: each concept
    is a question of its own. One softmax shared by a caption's concepts was worse (docs/LOG.md).
    Nearly all labels are 0. The head starts from the log-odds of each concept
    (model.init_concept_bias), so that the first steps do not go into learning just that
    (https://arxiv.org/abs/1708.02002).
    """
    logits = concept_logits.to(torch.promote_types(concept_logits.dtype, torch.float32))
    target = concepts.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)

    # a caption without concepts says nothing about what the video shows
    return loss * concepts.any(dim=1)


def clop_loss(
    video_emb,
    text_emb,
    logit_scale,
    config: LossConfig,
    *,
    knowledge=None,
    signature=None,
    concept_logits=None,
    concepts=None,
    video_concepts=None,
    batch_size: int | None = None,
    num_captions: int | None = None,
    dtype: torch.dtype | None = None,
    impl="auto",
):
    """The whole objective of one batch -> (loss, {name: detached part}).

    video_emb [n, E], unit norm: this rank's n videos. text_emb [n + x, E]: their captions, then x
    captions without a video, negatives of every video. knowledge [n + x, M], for β > 0: unit rows
    whose dot product is κ (knowledge.concept_vectors). signature [n + x, S] int64: captions with an
    equal entry in any column are false negatives (video id, meaning id). concept_logits: of videos
    and captions, [n, K] and [n + x, K]; video_concepts [n, K], concepts [n + x, K]: SKP's
    predictions and their targets.
    batch_size, num_captions: videos and captions of all ranks (None: as many on each). dtype, impl:
    see kernels. A loss that is not finite is returned, not raised: the caller looks.
    """
    n, ranks = len(video_emb), world_size()
    B, num_captions = batch_size or n * ranks, num_captions or len(text_emb) * ranks
    sizes, alone_sizes = share_sizes(B, ranks), share_sizes(num_captions - B, ranks)
    rank = dist.get_rank() if dist.is_initialized() else 0
    given, share = (n, len(text_emb) - n), (sizes[rank], alone_sizes[rank])
    assert given == share, f"rank {rank} has {given} pairs and captions alone, its share is {share}"

    # this rank's videos meet the captions of all ranks, then those without a video
    def all_texts(mine):  # [n + x, …] -> [num_captions, …]
        paired = gather(mine[:n], sizes)
        return torch.cat([paired, gather(mine[n:], alone_sizes)]) if num_captions > B else paired

    concepts_of, ids = None, None
    if config.beta:
        concepts_of = knowledge[:n], all_texts(knowledge)
    if config.mask_false_negatives:
        ids = signature[:n], all_texts(signature)
    all_text_emb = all_texts(text_emb)
    stats = knowledge_nce_stats(
        video_emb,
        all_text_emb,
        logit_scale,
        offset=sum(sizes[:rank]),
        beta=config.beta,
        k=config.hard_k,
        concepts=concepts_of,
        signature=ids,
        dtype=dtype,
        impl=impl,
    )

    # logsumexp(positive, negatives) − positive = softplus(negatives − positive), exact if saturated
    video_to_text = F.softplus(stats.row_negatives - stats.positive)  # [n]
    by_rank = exchange(stats.col_negatives[:B], sizes)  # [world_size, n], each from its rows only
    col_negatives = by_rank.clamp(min=NO_NEGATIVES).logsumexp(dim=0)  # [n]
    text_to_video = F.softplus(col_negatives - stats.positive)  # [n]

    weight = ranks / B
    parts = {"nce": weight * (video_to_text + text_to_video).sum() / 2}
    loss = parts["nce"]
    if config.hard_k and config.hard_weight:
        paired = video_emb, text_emb[:n], all_text_emb
        hard = hard_negative_loss(*paired, logit_scale, stats, sizes)
        parts["hard"] = weight * hard.sum()
        loss = loss + config.hard_weight * parts["hard"]
    if config.skp_weight:
        of_videos, of_captions = concept_logits
        skp = skp_loss(of_videos, video_concepts).sum() + skp_loss(of_captions, concepts).sum()
        parts["skp"] = weight * skp
        loss = loss + config.skp_weight * parts["skp"]
    return loss, {name: part.detach() for name, part in parts.items()}


def hard_negative_loss(video_emb, text_emb, all_text_emb, logit_scale, stats, sizes):
    """KCL's second InfoNCE: the positive against the k hardest of its row and its column -> [n].

    text_emb [n, E]: of the videos; all_text_emb [num_captions, E]: of all ranks, those without a
    video last; sizes: how many videos each rank has. The op mines without gradient, so the few
    logits that it names are made again, with one.
    """
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def against_hardest(anchor, others, index, score):  # [n, E], [B, E], [n, k], [n, k] -> [n]
        hardest = others[index.clamp(min=0)]  # [n, k, E]
        logits = scale * torch.einsum("ne,nke->nk", anchor, hardest)
        # the mined value, which holds the constant β·κ too, with the gradient of s·v·t
        logits = logits + (score - logits).detach()
        negatives = logits.masked_fill(index < 0, NO_NEGATIVES).logsumexp(dim=1)
        return F.softplus(negatives - stats.positive)

    mined = stats.mined
    B = sum(sizes)
    t2v_index, t2v_score = merge_columns(mined.t2v_index[:B], mined.t2v_score[:B], sizes)
    v2t = against_hardest(video_emb, all_text_emb, mined.v2t_index, mined.v2t_score)
    t2v = against_hardest(text_emb, gather(video_emb, sizes), t2v_index, t2v_score)
    return (v2t + t2v) / 2


def merge_columns(index, score, sizes):
    """The k hardest videos of this rank's captions, out of what each rank found in its own videos.

    index, score [B, k], index local to the rank -> [n, k], index global; ties keep the lowest.
    """
    start = sum(sizes[: dist.get_rank()]) if len(sizes) > 1 else 0
    index = torch.where(index < 0, index, index + start)
    all_index = rearrange(exchange(index, sizes), "ranks n k -> n (ranks k)")
    all_score = rearrange(exchange(score, sizes), "ranks n k -> n (ranks k)")
    return merge_hardest(all_index, all_score, k=index.shape[1])


def main():
    torch.manual_seed(0)
    B, E, K = 64, 128, 20
    video_emb = F.normalize(torch.randn(B, E), dim=1)
    text_emb = F.normalize(torch.randn(B, E), dim=1)
    pairs = (video_emb, text_emb, torch.tensor(0.0))
    print(f"InfoNCE at random, scale 1: {info_nce(*pairs):.4f}; ln B = {math.log(B):.4f}")

    concepts = (torch.rand(B, K) < 0.1).float()
    knowledge = F.normalize(concepts, dim=1)
    for beta in (0.0, 1.0, 3.0):
        loss, _ = clop_loss(*pairs, LossConfig(beta=beta), knowledge=knowledge)
        print(f"β = {beta:.0f}: {loss:.4f}, higher where negatives share knowledge")
    for what, logit in (("nothing", 0.0), ("how frequent concepts are", math.log(0.1 / 0.9))):
        skp = skp_loss(torch.full((B, K), logit), concepts).mean()
        print(f"SKP that knows {what}: {skp:.4f}")


if __name__ == "__main__":
    run(main)
