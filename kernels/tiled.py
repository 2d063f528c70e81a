# SPDX-License-Identifier: Apache-2.0
"""The same statistics without the matrix, in plain PyTorch: the CPU's version.

The rows are cut into tiles of about 4 million logits (16 MiB). Nothing of size N × M is ever made,
neither forward nor backward. Two products make a tile: of the embeddings, and of the concepts. A
caption holds about ten of up to 4,096 concepts, so the rows of the second are sparse:

    a = (s·v)·tᵀ + (β·c_v)·c_tᵀ        v [N, E]   t [M, E]   c_v [N, K]   c_t [M, K]

A row meets all its columns inside one tile, so its log-sum-exp and its k hardest are done there. A
column is met once per tile. It keeps its k hardest so far, and an online log-sum-exp: a maximum,
and a sum relative to it:

    new_max = max(old_max, max of tile)
    sum     = sum · exp(old_max − new_max) + Σ exp(a − new_max)

Backward: g are the gradients that arrive at the outputs. A tile of logits is computed again, which
costs a product more but no memory, and gives the gradient of the logits. For the negatives:

    dA_ij = g_row_i · exp(a_ij − row_negatives_i) + g_col_j · exp(a_ij − col_negatives_j)

Then dV = s · (dA·T + g_pos ⊙ t), dT = dAᵀ·(s·V) + s · g_pos ⊙ v, ds = Σ_i v_i·dV_i / s and
dβ = Σ_ij dA_ij·κ_ij.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import Mined, Problem, Stats, accumulate_dtype, exact_topk, number_ids

TILE = 1 << 22  # logits in a tile
ROW_GROUP = 32  # neighbours in a row whose maximum mining looks at first


def factors(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """s·v [N, E], t [M, E] and c_tᵀ [K, M], in the dtype of the sums."""
    dtype = accumulate_dtype(p.video.dtype)
    video, text = p.video.to(p.dtype).to(dtype), p.text.to(p.dtype).to(dtype)
    return video * p.scale, text, p.col_concepts.to(dtype).T.contiguous()


def sparse_concepts(p: Problem, rows: slice) -> Tensor:
    """c_v of these rows, sparse [rows, K], in the dtype of the sums."""
    return p.row_concepts[rows].to(accumulate_dtype(p.video.dtype)).to_sparse()


def tiles(
    left: Tensor, right: Tensor, concepts: Tensor, p: Problem
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their logits with −inf at what is no negative, scratch of the same shape), tile by
    tile.

    Both buffers are made once. Fresh memory would cost more than the arithmetic on it: the
    operating system clears it, page by page.
    """
    n, m = len(left), len(right)
    size = max(1, min(n, TILE // m))
    buffer, scratch = left.new_empty(size, m), left.new_empty(size, m)
    ids = list(number_ids(p))

    for first in range(0, n, size):
        rows = slice(first, min(first + size, n))
        count = rows.stop - first
        logits = torch.mm(left[rows], right.T, out=buffer[:count])
        if len(concepts):
            logits.addmm_(sparse_concepts(p, rows) * p.beta, concepts)
        logits.diagonal(first + p.offset).fill_(-torch.inf)

        # False negatives are few: only columns whose id some row of the tile has are compared.
        for row_id, col_id in ids:
            is_here = torch.zeros(n + m, dtype=torch.bool, device=left.device)
            is_here[row_id[rows]] = True
            cols = is_here[col_id].nonzero()[:, 0]
            same = row_id[rows, None] == col_id[cols]
            logits[:, cols] = logits[:, cols].masked_fill(same, -torch.inf)
        yield rows, logits, scratch[:count]


def finite(maximum: Tensor) -> Tensor:
    """0 where the maximum is −inf: any reference will do for a sum of nothing."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def sum_exp(logits: Tensor, maximum: Tensor, dim: int, scratch: Tensor) -> Tensor:
    """Σ exp(logits − maximum) over `dim`."""
    return torch.sub(logits, maximum.unsqueeze(dim), out=scratch).exp_().sum(dim)


def tiled_forward(p: Problem) -> Stats:
    """`Stats`, by row tiles."""
    left, right, concepts = factors(p)
    n, m = len(left), len(right)

    positive = (left * right[p.offset : p.offset + n]).sum(1)  # needs no tile

    row_negatives = left.new_empty(n)
    v2t_index = torch.empty(n, p.k, dtype=torch.int64, device=left.device)
    v2t_score = left.new_empty(n, p.k)

    col_max, col_sum = left.new_full((m,), -torch.inf), left.new_zeros(m)
    t2v_index = torch.full((m, p.k), -1, device=left.device)
    t2v_score = left.new_full((m, p.k), -torch.inf)

    for rows, logits, scratch in tiles(left, right, concepts, p):
        if p.k:
            v2t_index[rows], v2t_score[rows] = hardest_of_rows(logits, p.k)
            row_max = finite(v2t_score[rows, 0])
            update_columns(t2v_index, t2v_score, logits, rows.start)
        else:
            row_max = finite(logits.amax(1))

        row_negatives[rows] = sum_exp(logits, row_max, 1, scratch).log_() + row_max

        new_max = torch.maximum(col_max, logits.amax(0))
        new = sum_exp(logits, finite(new_max), 0, scratch)
        col_sum = col_sum * (col_max - finite(new_max)).exp() + new
        col_max = new_max

    col_negatives = col_sum.log() + finite(col_max)
    mined = Mined(v2t_index, v2t_score.float(), t2v_index, t2v_score.float())
    return Stats(row_negatives, col_negatives, positive, mined)


def hardest_of_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`exact_topk` of a tile [rows, M], where only 32·k of the M columns are sorted.

    The k hardest lie in the k groups with the highest maxima: each group that goes before theirs
    holds one that does. So it is exact.
    """
    rows, m = logits.shape
    if m < 2 * k * ROW_GROUP:
        return exact_topk(logits, k)

    head = m - m % ROW_GROUP  # the few behind it always compete
    group_max = logits[:, :head].unflatten(1, (-1, ROW_GROUP)).amax(2)  # [rows, M / ROW_GROUP]
    best = exact_topk(group_max, k)[0].sort(1).values  # in the order of columns, as ties want it
    member = torch.arange(ROW_GROUP, device=best.device)
    columns = (best[:, :, None] * ROW_GROUP + member).flatten(1)
    rest = torch.arange(head, m, device=best.device).expand(rows, -1)
    columns = torch.cat([columns, rest], 1)

    scores = logits.gather(1, columns.clamp(min=0))
    scores.masked_fill_(columns < 0, -torch.inf)  # of group −1: there is none
    return best_of(columns, scores, k)


def update_columns(index: Tensor, score: Tensor, logits: Tensor, first_row: int) -> None:
    """Merge a tile [rows, M] into the k hardest of each column, `index`, `score` [M, k], in place.

    What enters must beat the column's k-th place. Of the n-th tile's rows only about k/n do, if
    the batch is in no order: in all k·ln N a column. Where it is sorted, the work is more, but no
    less exact.
    """
    k, done = score.shape[1], 0
    while done < len(logits):
        # as many rows as were seen before: about k·M of them enter
        part = logits[done : done + max(k, first_row + done)]
        # what only equals the k-th comes too late: its index is higher
        row, column = (part > score[:, -1]).nonzero().unbind(1)
        column, order = column.sort(stable=True)  # then by row
        if len(column):
            row = row[order]
            merge_new(index, score, column, row + first_row + done, part[row, column])
        done += len(part)


def best_of(index: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`exact_topk` of candidates `score` [N, C] that have an `index` [N, C] each."""
    place, score = exact_topk(score, k)
    return index.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1), score


def merge_new(index: Tensor, score: Tensor, column: Tensor, row: Tensor, value: Tensor) -> None:
    """New (column, row, value), sorted by column, then row, enter `index` and `score` [M, k]."""
    k = score.shape[1]
    hit, line, count = column.unique_consecutive(return_inverse=True, return_counts=True)

    # a line for each column that changes: the k kept, then the new, in the order of rows
    first_of_line = count.cumsum(0) - count
    place = k + torch.arange(len(line), device=line.device) - first_of_line[line]
    size = len(hit), k + int(count.max())
    scores, rows = score.new_full(size, -torch.inf), index.new_full(size, -1)
    scores[:, :k], rows[:, :k] = score[hit], index[hit]
    scores[line, place], rows[line, place] = value, row

    index[hit], score[hit] = best_of(rows, scores, k)


def tiled_backward(p: Problem, saved: tuple, upstream: tuple, wants_beta: bool) -> tuple:
    """(d_video [N, E], d_text [M, E], d_scale, d_beta).

    saved: row_negatives and col_negatives of `tiled_forward`; upstream: the gradients of its first
    three outputs. Without wants_beta, d_beta is 0 and costs nothing.
    """
    left, right, concepts = factors(p)
    n = len(left)
    g_row, g_col, g_positive = upstream
    # no negatives: exp(−inf − ∞) = 0, where −inf − (−inf) would be NaN
    row_lse, col_lse = (lse.masked_fill(lse == -torch.inf, torch.inf) for lse in saved)

    d_video, d_text = torch.empty_like(left), torch.zeros_like(right)
    d_beta = torch.zeros_like(p.beta)
    for rows, logits, scratch in tiles(left, right, concepts, p):
        d_logits = torch.sub(logits, row_lse[rows, None], out=scratch).exp_()
        d_logits.mul_(g_row[rows, None]).addcmul_(logits.sub_(col_lse).exp_(), g_col)
        torch.mm(d_logits, right, out=d_video[rows])
        d_text.addmm_(d_logits.T, left[rows])
        if wants_beta:
            d_beta += (torch.mm(sparse_concepts(p, rows), concepts) * d_logits).sum()

    positives = slice(p.offset, p.offset + n)
    d_video.addcmul_(g_positive[:, None], right[positives])
    d_text[positives].addcmul_(g_positive[:, None], left)

    d_scale = (p.video.to(p.dtype) * d_video).sum()  # v·dV
    return d_video * p.scale, d_text, d_scale, d_beta
