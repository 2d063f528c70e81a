"""The same statistics without the matrix, in plain PyTorch: the CPU's version.

The rows are cut into tiles of about 4 million logits (16 MiB: they stay in the last-level cache), and nothing larger is ever
made, forward or backward. A row sees all its columns inside one tile, so its log-sum-exp and its k hardest are finished there.
A column is met once per tile and keeps running results: a maximum and a sum relative to it (online log-sum-exp)

    new_max = max(old_max, max of tile)        sum = sum · exp(old_max − new_max) + Σ exp(a − new_max)

and its k hardest so far. A column is only looked at again where the tile's maximum beats its k-th place: that is
certain for the first tile and happens in k of n rows by the n-th, so most of the columns of most tiles are skipped.

Backward: with g the gradients that arrive at the outputs, and the saved log-sum-exps,

    dL/da_ij = g_row_i · exp(a_ij − row_negatives_i) + g_col_j · exp(a_ij − col_negatives_j)    for negatives
    dL/da_ij = g_pos_i                                                                          for positives

so a tile of logits is computed a second time (one product more) instead of being remembered, and then
dV = s · dA·T, dT = s · dAᵀ·V, ds = Σ_ij dA_ij v_i·t_j = Σ_i v_i·(dA·T)_i (no pass of its own), dβ = Σ dA_ij κ_ij.
"""

import torch
from torch import Tensor

from kernels.reference import accumulate_dtype, exact_topk, masked_pairs, no_negatives

TILE = 1 << 22  # logits in a tile


def _row_tiles(n: int, m: int):
    rows = max(1, min(n, TILE // m))
    return ((first, min(first + rows, n)) for first in range(0, n, rows))


def _cast(video, text, concepts, scale, beta):
    """Everything in the dtype of the sums; the two scalars as Python numbers (CPU tensors: nothing waits)."""
    dtype = accumulate_dtype(video.dtype)
    return (video.to(dtype), text.to(dtype), tuple(c.to(dtype) for c in concepts) if concepts is not None else None,
            float(scale), float(beta))


def _logits(video, text, scale, beta, concepts, signature, offset, first, last) -> tuple[Tensor, Tensor | None]:
    """Rows first..last: (logits [rows, M], −inf where no negative; their κ [rows, M] or None)."""
    logits = (video[first:last] @ text.T).mul_(scale)
    overlap = None
    if concepts is not None:
        overlap = concepts[0][first:last] @ concepts[1].T
        logits.add_(overlap, alpha=beta)
    row_ids, col_ids = signature or (None, None)
    masked = masked_pairs(row_ids, col_ids, first, last - first, len(text), offset, text.device)
    return logits.masked_fill_(masked, -torch.inf), overlap


def tiled_forward(video: Tensor, text: Tensor, scale: Tensor, beta: Tensor, concepts, signature, offset: int, k: int
                  ) -> tuple[Tensor, ...]:
    """(row_negatives [N], col_negatives [M], positive [N], v2t_index, v2t_score [N, k], t2v_index, t2v_score [M, k])."""
    video, text, concepts, s, b = _cast(video, text, concepts, scale, beta)
    n, m = len(video), len(text)
    positive = s * (video * text[offset:offset + n]).sum(1)
    row_negatives = video.new_empty(n)
    col_max, col_sum = video.new_full((m,), -torch.inf), video.new_zeros(m)
    v2t = [], []
    t2v = torch.full((m, k), -1, device=video.device), video.new_full((m, k), -torch.inf)
    for first, last in _row_tiles(n, m):
        logits, _ = _logits(video, text, s, b, concepts, signature, offset, first, last)
        tile_max = logits.amax(0)
        if k:
            for found, part in zip(v2t, exact_topk(logits, k)):
                found.append(part)
            _update_columns(*t2v, logits, tile_max, first)
        new_max = torch.maximum(col_max, tile_max)
        zero = new_max.masked_fill(new_max == -torch.inf, 0)  # no negative yet: any finite reference does
        col_sum = col_sum * (col_max - zero).exp() + (logits - zero).exp_().sum(0)
        col_max = new_max
        row_negatives[first:last] = logits.logsumexp(1)
    col_negatives = col_sum.log() + col_max.masked_fill(col_max == -torch.inf, 0)
    v2t = tuple(torch.cat(part) for part in v2t) if k else no_negatives(n, video.device)
    return row_negatives, col_negatives, positive, v2t[0], v2t[1].float(), t2v[0], t2v[1].float()


def _update_columns(index: Tensor, score: Tensor, logits: Tensor, tile_max: Tensor, first_row: int) -> None:
    """Merge a tile [rows, M] into the k hardest of each column, `index` and `score` [M, k], in place."""
    k = index.shape[1]
    better = (tile_max > score[:, -1]).nonzero()[:, 0]  # an equal score comes too late: its index is higher
    if len(better):
        # the k kept before the new: the order of the places is the order of the indices, wherever scores are equal
        place, score[better] = exact_topk(torch.cat([score[better], logits.index_select(1, better).T], 1), k)
        kept = index[better].gather(1, place.clamp(0, k - 1))
        index[better] = torch.where(place < k, torch.where(place < 0, -1, kept), place - k + first_row)


def tiled_backward(g_row: Tensor, g_col: Tensor, g_pos: Tensor, video: Tensor, text: Tensor, scale: Tensor, beta: Tensor,
                   concepts, signature, offset: int, row_negatives: Tensor, col_negatives: Tensor
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_video [N, E], d_text [M, E], d_scale, d_beta) from the gradients of the first three outputs of `tiled_forward`."""
    dtypes = video.dtype, text.dtype
    video, text, concepts, s, b = _cast(video, text, concepts, scale, beta)
    n, m = len(video), len(text)
    # no negatives: exp(−inf − ∞) = 0, where −inf − (−inf) would be NaN
    row_lse = row_negatives.masked_fill(row_negatives == -torch.inf, torch.inf)
    col_lse = col_negatives.masked_fill(col_negatives == -torch.inf, torch.inf)
    d_video, d_text = torch.empty_like(video), torch.zeros_like(text)
    d_beta = video.new_zeros(())
    for first, last in _row_tiles(n, m):
        rows = slice(first, last)
        logits, overlap = _logits(video, text, s, b, concepts, signature, offset, first, last)
        d_logits = (logits - row_lse[rows, None]).exp_().mul_(g_row[rows, None])
        d_logits.addcmul_(logits.sub_(col_lse).exp_(), g_col)
        torch.mm(d_logits, text, out=d_video[rows])
        d_text.addmm_(d_logits.T, video[rows])
        if overlap is not None:
            d_beta += torch.dot(d_logits.view(-1), overlap.view(-1))
    positives = slice(offset, offset + n)
    d_video.addcmul_(g_pos[:, None], text[positives])
    d_text[positives].addcmul_(g_pos[:, None], video)
    d_scale = torch.dot(video.view(-1), d_video.view(-1))
    return d_video.mul_(s).to(dtypes[0]), d_text.mul_(s).to(dtypes[1]), d_scale, d_beta
