# SPDX-License-Identifier: Apache-2.0
"""The same statistics without the matrix, in plain PyTorch: the CPU's version.

The rows are cut into tiles of about 4 million logits (16 MiB), and nothing larger is ever made,
forward or backward. A row sees all its columns inside one tile, so its log-sum-exp and its k
hardest are finished there. A column is met once per tile and keeps running results: a maximum and a
sum relative to it (online log-sum-exp)

    new_max = max(old_max, max of tile)        sum = sum · exp(old_max − new_max) + Σ exp(a −
                                               new_max)

and its k hardest so far. Mining sorts only what can win; both ways are exact:

- Row: its k hardest lie in the k groups of 32 with the highest maxima, since each group that goes
before theirs holds
  one that does. So 32·k candidates of M are left.
- Column: what enters must beat the column's k-th place. Of the n-th tile's rows only about k/n do,
if the batch is in
  no order: the work of all tiles is k·ln N a column (and where it is sorted by hardness more, but
  no less exact).

One product makes a tile of logits, knowledge included, because the concepts are further columns of
the embeddings:

    a = L·Rᵀ        L = [s·v | β·c_v]  [N, E + K]        R = [t | c_t]  [M, E + K]

Backward: with g the gradients that arrive at the outputs, and the saved log-sum-exps,

    dA_ij = g_row_i · exp(a_ij − row_negatives_i) + g_col_j · exp(a_ij − col_negatives_j)

at the negatives. So a tile of logits is computed a second time (one product more) instead of being
remembered. Then dA·R = [dA·T | dA·C] holds dV = s · (dA·T + g_pos ⊙ t), ds = Σ_i v_i·dV_i / s and
dβ = Σ_i c_i·(dA·C)_i, and dT = dAᵀ·(s·V) + s · g_pos ⊙ v.
"""

import torch
from torch import Tensor

from .reference import accumulate_dtype, exact_topk, no_negatives

TILE = 1 << 22  # logits in a tile
ROW_GROUP = 32  # neighbours in a row: mining looks at their maximum first
COLUMN_GROUP = 8  # the same in a column, where a closer look costs more: they lie apart in memory


def factors(video, text, scale, beta, concepts) -> tuple[Tensor, Tensor]:
    """L [N, E + K] and R [M, E + K], whose product is the logits, in the dtype of the sums."""
    dtype = accumulate_dtype(video.dtype)
    left, right = video.to(dtype) * scale, text.to(dtype)
    if concepts is None:
        return left, right
    return torch.cat([left, concepts[0].to(dtype) * beta], 1), torch.cat(
        [right, concepts[1].to(dtype)], 1
    )


class Tiles:
    """Iterates over (rows, logits of these rows, scratch of the same shape), in two buffers that
    are allocated once.

    Fresh memory costs more than the arithmetic on it: the operating system clears it, page by page.
    Pairs that are no negatives are few and found by joining the sorted ids, where comparing all ids
    would cost half of a log-sum-exp.
    """

    def __init__(self, left: Tensor, right: Tensor, signature, offset: int):
        self.left, self.right, self.offset = left, right, offset
        row_ids, col_ids = (ids.T.contiguous() for ids in signature) if signature else ((), ())
        self.joins = [(rows, *cols.sort()) for rows, cols in zip(row_ids, col_ids)]

    def __iter__(self):
        n, m = len(self.left), len(self.right)
        size = max(1, min(n, TILE // m))
        buffer, scratch = self.left.new_empty(size, m), self.left.new_empty(size, m)
        for first in range(0, n, size):
            rows = slice(first, min(first + size, n))
            count = rows.stop - first
            logits = torch.mm(self.left[rows], self.right.T, out=buffer[:count])
            logits.diagonal(first + self.offset).fill_(-torch.inf)

            # each row's equals lie at start … stop of the sorted ids
            for row_ids, sorted_ids, order in self.joins:
                start = torch.searchsorted(sorted_ids, row_ids[rows])
                stop = torch.searchsorted(sorted_ids, row_ids[rows], right=True)
                found = stop - start
                row = torch.arange(count, device=logits.device).repeat_interleave(found)
                number = torch.arange(len(row), device=logits.device)
                place = number - found.cumsum(0)[row] + stop[row]
                logits[row, order[place]] = -torch.inf
            yield rows, logits, scratch[:count]


def tiled_forward(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    beta: Tensor,
    concepts,
    signature,
    offset: int,
    k: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """(row_negatives [N], col_negatives [M], positive [N], v2t_index, v2t_score [N, k], t2v_index,
    t2v_score [M, k])
    """
    left, right = factors(video, text, scale, beta, concepts)
    n, m, width = len(video), len(text), video.shape[1]
    positive = (left[:, :width] * right[offset : offset + n, :width]).sum(1)
    row_negatives = left.new_empty(n)
    col_max, col_sum = left.new_full((m,), -torch.inf), left.new_zeros(m)  # running
    v2t = [no_negatives(0, k, left)]
    t2v = torch.full((m, k), -1, device=video.device), left.new_full((m, k), -torch.inf)

    for rows, logits, scratch in Tiles(left, right, signature, offset):
        if k:
            v2t.append(hardest_of_rows(logits, k))
            tile_max = update_columns(*t2v, logits, rows.start)
        else:
            tile_max = logits.amax(0)

        # rows are complete
        row_max = finite_or_zero(v2t[-1][1][:, 0] if k else logits.amax(1))
        e = torch.sub(logits, row_max[:, None], out=scratch).exp_()
        row_negatives[rows] = e.sum(1).log_() + row_max

        # columns go on
        new_max = torch.maximum(col_max, tile_max)
        zero = finite_or_zero(new_max)
        e = torch.sub(logits, zero, out=scratch).exp_()
        col_sum = col_sum * (col_max - zero).exp() + e.sum(0)
        col_max = new_max

    col_negatives = col_sum.log() + finite_or_zero(col_max)
    v2t = [torch.cat(part) for part in zip(*v2t)] if k else no_negatives(n, k, left)
    return row_negatives, col_negatives, positive, v2t[0], v2t[1].float(), t2v[0], t2v[1].float()


def finite_or_zero(maximum: Tensor) -> Tensor:
    """Where there is no negative yet, the maximum is −inf; any finite reference does for a sum of
    nothing.
    """
    return maximum.masked_fill(maximum == -torch.inf, 0)


def hardest_of_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`exact_topk` of a tile [rows, M], by way of the k best groups of each row."""
    rows, m = logits.shape
    if m < 2 * k * ROW_GROUP:
        return exact_topk(logits, k)
    head = m - m % ROW_GROUP  # the few behind it always compete
    groups = logits[:, :head].unflatten(1, (-1, ROW_GROUP))  # [rows, M / ROW_GROUP, ROW_GROUP]
    # in the order of columns, as ties want it
    best = exact_topk(groups.amax(2), k)[0].sort(1).values
    member = torch.arange(ROW_GROUP, device=best.device)
    columns = (best[:, :, None] * ROW_GROUP + member).flatten(1)
    tail = torch.arange(head, m, device=best.device).expand(rows, -1)
    columns = torch.cat([columns, tail], 1)
    # group −1: nothing in it
    scores = logits.gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, -torch.inf)
    place, score = exact_topk(scores, k)
    return columns.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1), score


def update_columns(index: Tensor, score: Tensor, logits: Tensor, first_row: int) -> Tensor:
    """Merge a tile [rows, M] into the k hardest of each column, `index` and `score` [M, k], in
    place.

    Returns the columns' maxima [M].
    """
    (m, k), done, maxima = score.shape, 0, []
    member = torch.arange(COLUMN_GROUP, device=logits.device)
    while done < len(logits):
        # as many rows as were seen before: about k·M of them enter
        part = logits[done : done + max(k, first_row + done)]
        kth = score[:, -1].contiguous()  # what equals it comes too late: its index is higher
        # [groups of rows, M]
        group_max = torch.stack([group.amax(0) for group in part.split(COLUMN_GROUP)])
        group, column = (group_max > kth).nonzero().unbind(1)
        row = group[:, None] * COLUMN_GROUP + member  # [groups, COLUMN_GROUP]
        value = part.view(-1)[row.clamp(max=len(part) - 1) * m + column[:, None]]
        enters = (value > kth[column, None]) & (row < len(part))
        # by column, then by row
        column, order = column[:, None].expand_as(row)[enters].sort(stable=True)
        if len(column):
            hit, line, count = column.unique_consecutive(return_inverse=True, return_counts=True)
            # a line for each column that changes: the k kept, then the new, so that places stand in
            # the order of rows
            number = torch.arange(len(line), device=line.device)
            place = k + number - (count.cumsum(0) - count)[line]
            lines = len(hit), k + int(count.max())
            scores, rows = score.new_full(lines, -torch.inf), index.new_full(lines, -1)
            scores[:, :k], rows[:, :k] = score[hit], index[hit]
            scores[line, place] = value[enters][order]
            rows[line, place] = row[enters][order] + first_row + done
            best, score[hit] = exact_topk(scores, k)
            index[hit] = rows.gather(1, best.clamp(min=0)).masked_fill(best < 0, -1)
        maxima.append(group_max.amax(0))
        done += len(part)

    return torch.stack(maxima).amax(0)


def tiled_backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    beta: Tensor,
    concepts,
    signature,
    offset: int,
    dtype: torch.dtype,
    row_negatives: Tensor,
    col_negatives: Tensor,
    wants_beta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_video [N, E], d_text [M, E], d_scale, d_beta) from the gradients of `tiled_forward`'s
    first three outputs.
    """
    left, right = factors(video, text, scale, beta, concepts)
    n, width = video.shape
    # no negatives: exp(−inf − ∞) = 0, where −inf − (−inf) would be NaN
    row_lse = row_negatives.masked_fill(row_negatives == -torch.inf, torch.inf)
    col_lse = col_negatives.masked_fill(col_negatives == -torch.inf, torch.inf)
    used = right if wants_beta else right[:, :width]  # no dβ, no dA·C
    d_left = left.new_empty(n, used.shape[1])  # dA·R, [N, E + K]
    d_text = right.new_zeros(len(text), width)

    for rows, logits, scratch in Tiles(left, right, signature, offset):
        d_logits = torch.sub(logits, row_lse[rows, None], out=scratch).exp_()
        d_logits.mul_(g_row[rows, None])
        d_logits.addcmul_(logits.sub_(col_lse).exp_(), g_col)
        torch.mm(d_logits, used, out=d_left[rows])
        d_text.addmm_(d_logits.T, left[rows, :width])

    positives = slice(offset, offset + n)
    d_video = d_left[:, :width].addcmul_(g_pos[:, None], right[positives, :width])
    d_text[positives].addcmul_(g_pos[:, None], left[:, :width])
    d_scale = (video * d_video).sum()
    d_beta = torch.zeros_like(beta)
    if wants_beta and concepts is not None:
        d_beta = (concepts[0] * d_left[:, width:]).sum().to(beta.dtype)
    return (d_video * scale).to(video.dtype), d_text.to(text.dtype), d_scale, d_beta
