# SPDX-License-Identifier: Apache-2.0
"""The definition: log-sum-exps and hard negatives of a similarity matrix that is really there.

The other files make the matrix in tiles. Here it is one tensor of plain PyTorch, and autograd
differentiates it. Read this first. The tests hold the fast versions against it.

For N videos (rows) and M texts (columns), where column offset + i is the positive of row i:

    a_ij       = s · v_i·t_j + β · κ_ij      κ_ij = c_i·c_j, the overlap of the concepts (data)
    positive_i = s · v_i·t_(offset+i)        without β: sharing its own knowledge proves nothing
    negatives    all pairs but the positives and the false negatives, which share a signature id
    row_negatives_i = log Σ_j exp a_ij       over the negatives of row i; −inf where it has none
    col_negatives_j = log Σ_i exp a_ij       over the negatives of column j

The positive stays *out* of the sums. InfoNCE's −log softmax is softplus(row_negatives − positive),
which keeps its digits when the batch is solved. At a loss of 1e-9, logsumexp − positive would be
the difference of two equal numbers.

It costs about 7 matrices of N·M floats in a training step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Problem(NamedTuple):
    """What every version is given: N videos against M texts.

    No concepts are K = 0 columns of them, no signature is S = 0 ids.
    """

    video: Tensor  # [N, E]
    text: Tensor  # [M, E]
    scale: Tensor  # 0-dim: s
    beta: Tensor  # 0-dim: β
    row_concepts: Tensor  # [N, K]
    col_concepts: Tensor  # [M, K]
    row_ids: Tensor  # [N, S] integers
    col_ids: Tensor  # [M, S]
    offset: int  # column of row 0's positive
    k: int  # hard negatives of each row and of each column
    dtype: torch.dtype  # the embeddings are rounded to it


class Mined(NamedTuple):
    """The k hardest negatives of every row and column, hardest first.

    Equal scores come by lowest index. Index −1 and score −inf where there are fewer than k.
    """

    v2t_index: Tensor  # [N, k] int64: columns (texts) for each row (video)
    v2t_score: Tensor  # [N, k] float32: their logits a_ij, without gradient
    t2v_index: Tensor  # [M, k] int64: rows (videos) for each column (text)
    t2v_score: Tensor  # [M, k] float32


class Stats(NamedTuple):
    """What InfoNCE needs of the matrix. The first three are differentiable."""

    row_negatives: Tensor  # [N] log-sum-exp over each row's negatives; float32, or float64
    col_negatives: Tensor  # [M] the same for each column
    positive: Tensor  # [N] the logits of the positives
    mined: Mined


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and logits are float32, or float64 where the embeddings are."""
    return torch.promote_types(dtype, torch.float32)


def number_ids(p: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """(row_id [N], col_id [M]) of each signature id: numbers below N + M, equal where the ids are.

    `torch.unique` would wait for a GPU.
    """
    for ids in torch.cat([p.row_ids, p.col_ids]).T.contiguous():
        number = torch.searchsorted(ids.sort().values, ids)
        yield number.split([len(p.video), len(p.text)])


def exact_topk(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `score` [N, M], equal scores by lowest index.

    Returns (index [N, k] int64, score [N, k]); index −1 where the score is −inf.
    """
    value, index = score.topk(min(k + 1, score.shape[1]), dim=1)

    # torch.topk leaves open which of equal scores it takes. One place more than asked for shows the
    # rows where that matters. They are few, and sorted as a whole.
    equals_next = (value[:, 1:] == value[:, :-1]) & (value[:, 1:] > -torch.inf)
    tied = equals_next.any(1).nonzero()[:, 0]
    if len(tied):
        ordered, order = score[tied].sort(dim=1, descending=True, stable=True)
        value[tied] = ordered[:, : value.shape[1]]
        index[tied] = order[:, : value.shape[1]]

    missing = max(0, k - score.shape[1])  # fewer columns than places
    value = F.pad(value[:, :k], (0, missing), value=-torch.inf)
    index = F.pad(index[:, :k], (0, missing))
    return index.masked_fill(value == -torch.inf, -1), value


def merge_hardest(index: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k hardest of C ≥ k candidates (index, score) [N, C], equal scores by lowest index.

    Several ranks or tiles mined them. `index` counts in the rows of all: each adds its offset where
    it is not −1.
    """
    index, by_index = index.sort(dim=1)
    score, by_score = score.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return index.gather(1, by_score)[:, :k], score[:, :k]


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`, but kept in the dtype of the sums; the gradient passes unrounded."""
    x = x.to(accumulate_dtype(x.dtype))
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def reference_stats(p: Problem) -> Stats:
    """`Stats` by way of the whole matrix."""
    video, text = round_to(p.video, p.dtype), round_to(p.text, p.dtype)
    rows = torch.arange(len(video), device=video.device)
    columns = rows + p.offset  # of the positives

    logits = p.scale * (video @ text.T)  # [N, M]

    kappa = p.row_concepts.to(video.dtype) @ p.col_concepts.to(video.dtype).T
    logits = logits + p.beta * kappa
    positive = p.scale * (video * text[columns]).sum(1)

    # pairs that are no negatives: the positives, and those that share any signature id
    masked = torch.zeros_like(logits, dtype=torch.bool)
    masked[rows, columns] = True
    for row_id, col_id in zip(p.row_ids.T, p.col_ids.T):
        masked |= row_id[:, None] == col_id

    # a masked pair gets no gradient, not even in a line where nothing is left: −inf
    negatives = logits.masked_fill(masked, -torch.inf)
    v2t_index, v2t_score = exact_topk(negatives.detach(), p.k)
    t2v_index, t2v_score = exact_topk(negatives.detach().T.contiguous(), p.k)
    mined = Mined(v2t_index, v2t_score.float(), t2v_index, t2v_score.float())
    return Stats(negatives.logsumexp(1), negatives.logsumexp(0), positive, mined)
