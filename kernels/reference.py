# SPDX-License-Identifier: Apache-2.0
"""The definition: contrastive statistics and hard negatives over a similarity matrix that is really
there.

Everything that the other files do with tiles is defined here with plain PyTorch on the whole [N, M]
matrix, in the order in which METHOD.md tells it, and differentiated by autograd. It stays for ever:
the tests hold the fast versions against it, and it is what a reader should understand first. It
costs about 7 matrices of N·M floats in a training step.

For N video rows and M text columns, where row i's positive is column offset + i:

    a_ij       = s · v_i·t_j + β · κ_ij          κ_ij = c_i·c_j, the overlap of the concepts (data:
                                                 no gradient)
    positive_i = s · v_i·t_(offset+i)            no β: a positive is no harder for sharing its own
                                                 knowledge
    negatives  = all pairs but positives and false negatives (pairs that share any signature id)
    row_negatives_i = log Σ_j exp a_ij           over the negatives of row i; −inf where there are
                                                 none
    col_negatives_j = log Σ_i exp a_ij           over the negatives of column j

The positive is kept *out* of the sums. InfoNCE's −log softmax is then softplus(row_negatives −
positive), which keeps its digits when the batch is solved: at a loss of 1e-9, lse − positive would
be the difference of two equal numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Mined(NamedTuple):
    """The k hardest negatives of every row and column, hardest first; index −1 and score −inf where
    there are fewer.
    """

    v2t_index: Tensor  # [N, k] int64, columns (texts) for each row (video)
    v2t_score: Tensor  # [N, k] float32, their logits a_ij, without gradient
    t2v_index: Tensor  # [M, k] int64, rows (videos) for each column (text)
    t2v_score: Tensor  # [M, k] float32


class Stats(NamedTuple):
    """What InfoNCE needs of the matrix; the first three are differentiable, float32 (float64 if the
    embeddings are).
    """

    # [N] log-sum-exp of the logits over the negatives of each row; −inf where there are none
    row_negatives: Tensor
    col_negatives: Tensor  # [M] the same for each column
    positive: Tensor  # [N] the logits of the positives
    mined: Mined


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and logits are float32, or float64 where the embeddings are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_finite(
    video: Tensor, text: Tensor, scale: Tensor, beta: Tensor, concepts: tuple[Tensor, Tensor] | None
) -> None:
    """Raise FloatingPointError with the name and row of the first NaN or inf.

    Waits for the device.
    """
    row_concepts, col_concepts = concepts or (None, None)
    named = {
        "video embeddings": video,
        "text embeddings": text,
        "exp(logit_scale)": scale,
        "beta": beta,
        "concepts of the videos": row_concepts,
        "concepts of the texts": col_concepts,
    }

    for name, value in named.items():
        # one pass, no matrix of flags
        if value is not None and not value.sum(dtype=torch.float64).isfinite():
            at = (~value.isfinite()).nonzero()[:1].tolist()
            where = f" (first at {at[0]})" if at and at[0] else ""
            raise FloatingPointError(
                f"NaN or inf in the {name}{where}: the model has diverged, or its input was bad"
            )


def masked_pairs(
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    first_row: int,
    rows: int,
    cols: int,
    offset: int,
    device: torch.device,
) -> Tensor:
    """bool [rows, cols]: True where a pair is no negative, because it is the positive or shares a
    signature id.
    """
    masked = torch.zeros(rows, cols, dtype=torch.bool, device=device)
    if row_ids is not None:
        for r, c in zip(row_ids[first_row : first_row + rows].unbind(1), col_ids.unbind(1)):
            masked |= r[:, None] == c
    row = torch.arange(rows, device=device)
    masked[row, row + first_row + offset] = True
    return masked


def exact_topk(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(index [N, k] int64, score [N, k]) of the k largest of each row of `score` [N, M], equal
    scores by lowest index.

    Index −1 where the score is −inf. torch.topk leaves open which of equal scores it takes, and in
    what order; one place more than asked for shows the rows where that matters, and these are
    sorted as a whole. They are few, but for degenerate embeddings.
    """
    value, index = score.topk(min(k + 1, score.shape[1]), dim=1)
    tied = ((value[:, 1:] == value[:, :-1]) & (value[:, 1:] > -torch.inf)).any(1).nonzero()[:, 0]
    if len(tied):
        ordered, order = score[tied].sort(dim=1, descending=True, stable=True)
        value[tied], index[tied] = ordered[:, : value.shape[1]], order[:, : value.shape[1]]
    missing = max(0, k - score.shape[1])  # fewer columns than places
    value = torch.nn.functional.pad(value[:, :k], (0, missing), value=-torch.inf)
    index = torch.nn.functional.pad(index[:, :k], (0, missing), value=-1)
    return index.masked_fill(value == -torch.inf, -1), value


def no_negatives(n: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(index [n, k], score [n, k]) without content: of a mining that was not asked for, or of no
    rows.
    """
    return like.new_empty(n, k, dtype=torch.int64), like.new_empty(
        n, k, dtype=accumulate_dtype(like.dtype)
    )


def log_sum_exp(logits: Tensor, masked: Tensor, dim: int) -> Tensor:
    """Log-sum-exp of what is not masked: −inf, with a gradient of zero instead of NaN, where
    nothing is left.
    """
    empty = masked.all(dim, keepdim=True)
    log_sum = logits.masked_fill(masked & ~empty, -torch.inf).logsumexp(dim)
    return log_sum.masked_fill(empty.squeeze(dim), -torch.inf)


def reference_stats(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    beta: Tensor,
    concepts: tuple[Tensor, Tensor] | None,
    signature: tuple[Tensor, Tensor] | None,
    offset: int,
    k: int,
) -> Stats:
    """`Stats` of the whole matrix: video [N, E], text [M, E]; concepts ([N, K], [M, K]); signature
    ([N, S], [M, S]).
    """
    n, m, dtype = len(video), len(text), accumulate_dtype(video.dtype)
    video, text = video.to(dtype), text.to(dtype)

    logits = scale * (video @ text.T)  # [N, M]
    if concepts is not None:
        logits = logits + beta * (concepts[0].to(dtype) @ concepts[1].to(dtype).T)
    positive = scale * (video * text[offset : offset + n]).sum(1)

    row_ids, col_ids = signature or (None, None)
    masked = masked_pairs(row_ids, col_ids, 0, n, m, offset, video.device)
    if k:
        negatives = logits.detach().masked_fill(masked, -torch.inf)
        v2t, t2v = exact_topk(negatives, k), exact_topk(negatives.T.contiguous(), k)
    else:
        v2t, t2v = no_negatives(n, k, video), no_negatives(m, k, video)
    mined = Mined(v2t[0], v2t[1].float(), t2v[0], t2v[1].float())
    return Stats(log_sum_exp(logits, masked, 1), log_sum_exp(logits, masked, 0), positive, mined)
