# SPDX-License-Identifier: Apache-2.0
"""GPU forward: log-sum-exps and a running top-k in one pass over the tiles.

A program *owns* 128 columns (say videos; 256 without mining). It stays with them and streams over
the other side (texts), 128 rows at a time (docs/tile_walk.svg). For each tile:

    acc[y, x] = Y[y] · X[x]             matrix unit, accumulators in registers
    z = acc · s·log2e − shift           one fma; why a fixed shift does: triton_layout.py
    z = −inf at masked pairs            only in marked tiles
    e = exp2(z)
    x_sums[x] += Σ_y e                  the owned side: an accumulator in registers
    y_sums[program, y] = Σ_x e          the streamed side, if nothing is mined: one pass does both
    best two of each lane               the owned side, if mined: each side takes its own pass

The owned axis is the N side of the tile, because of how an accumulator lies in registers. A thread
holds, in two rows 8 apart, every fourth pair of columns. So what belongs to a column x can stay in
the thread from tile to tile, if it keeps one result *per row position* instead of one per column.
These are the "lanes": 64 of them, since rows y and y + 8 share one. Lanes are added up once, at the
very end.

The running top-k uses the same lanes. Each lane of each column keeps its best two values of e, as
one integer each. The bits of a positive float order like an integer, so the lowest bits can be
overwritten by where the value came from: which tile, and which of the two rows. That is three
min/max instructions per logit, no branch, no data movement. With S splits of the streamed side
there are 64·S lanes, and the k hardest hardly ever have three of their number in one lane. Which
lanes may hide something is known exactly, and repaired: triton_mining.py.

Splits make enough programs to fill the GPU, and enough lanes. `flatten` fuses the loops over tiles
and over depth, so that the next tile's rows are on their way while this tile's exponentials are
computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .reference import Mined, Problem, Stats
from .triton_layout import (
    Side,
    log_of_sums,
    make_tile,
    pack,
    shared_arguments,
    tile_for,
)
from .triton_mining import hardest

LANES = 512  # of a column: at k = 16, 20 % of columns have a lane to repair (birthday problem)


@triton.jit
def fold(tile, BY: constexpr, BX: constexpr):
    """[BY, BX] -> two [BY // 16, 8, BX]: rows y and y + 8 lie in one thread, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, [BY // 16, 2, 8, BX]), (0, 2, 3, 1)))


@triton.jit
def keep_two(first, second, e, code, CODE_BITS: constexpr):
    """Insert e, with `code` in its lowest bits, into the sorted pair of each lane."""
    new = (e.to(tl.int32, bitcast=True) & -(1 << CODE_BITS)) | code
    return tl.maximum(first, new), tl.maximum(second, tl.minimum(first, new))


@triton.jit
def forward_kernel(
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    marks,
    scalars,
    x_sums,
    y_sums,
    best,
    n_x,
    n_y,
    split_size,
    D: constexpr,
    IDS: constexpr,
    BX: constexpr,
    BY: constexpr,
    BD: constexpr,
    CODE_BITS: constexpr,
    MINE: constexpr,
):
    """Program (i, split) owns columns i·BX … and streams rows split·split_size … of y.

    x_rows [n_x, D], y_rows [n_y, D]; x_sums [splits, n_x]; y_sums [n_x / BX, n_y] unless MINE; best
    [splits, 2, BY // 2, n_x] int32 if MINE.
    """
    i, split = tl.program_id(0), tl.program_id(1)
    x0, start = i * BX, split * split_size
    cols = x0 + tl.arange(0, BX)

    # what stays in registers from tile to tile
    sums = tl.zeros([BY // 16, 8, BX], tl.float32)
    first = tl.zeros([BY // 16, 8, BX], tl.int32)
    second = tl.zeros([BY // 16, 8, BX], tl.int32)

    for y0 in tl.range(start, tl.minimum(start + split_size, n_y), BY, flatten=True):
        # masked before exp2: then fma, exp2 and what follows are one block to the compiler
        z = make_tile(
            x_rows, y_rows, x_ids, y_ids, marks, scalars, x0, y0, n_x, n_y,
            D, IDS, BX, BY, BD,
        )  # fmt: skip
        e = tl.math.exp2(z)

        upper, lower = fold(e, BY, BX)
        sums += upper + lower
        if MINE:
            code = (y0 - start) // BY * 2
            first, second = keep_two(first, second, upper, code, CODE_BITS)
            first, second = keep_two(first, second, lower, code + 1, CODE_BITS)
        else:
            rows = y0 + tl.arange(0, BY)
            tl.store(y_sums + i.to(tl.int64) * n_y + rows, tl.sum(e, 1))

    # the ends of the lanes
    tl.store(x_sums + split * n_x + cols, tl.sum(tl.reshape(sums, [BY // 2, BX]), 0))
    if MINE:
        lane = tl.reshape(tl.arange(0, BY // 2), [BY // 16, 8, 1])
        at = best + (split * BY + lane).to(tl.int64) * n_x + tl.reshape(cols, [1, 1, BX])
        tl.store(at, first)
        tl.store(at + (BY // 2) * n_x.to(tl.int64), second)


def run_pass(x: Side, y: Side, scalars: Tensor, k: int) -> tuple:
    """One pass over the matrix, with side `x` as owner.

    Returns (x_sums [splits, P_x], y_sums [P_x / BX, P_y], (index, score) [P_x, k]). With k = 0
    nothing is mined: None. Else there are no y_sums.
    """
    mine = k > 0
    tile = tile_for("mine" if mine else "sums", x.rows)
    n_x, n_y, device = len(x.rows), len(y.rows), x.rows.device
    owners, tiles, lanes = n_x // tile.owned, n_y // tile.streamed, tile.streamed // 2
    splits = min(LANES // lanes, triton.next_power_of_2(tiles))
    tiles_of_split = triton.cdiv(tiles, splits)
    split_size = tiles_of_split * tile.streamed  # rows of y
    bits = (tiles_of_split * 2 - 1).bit_length()  # that tell a lane's rows apart

    # what the pass writes
    x_sums = torch.empty(splits, n_x, device=device)
    y_sums = torch.empty(0 if mine else owners, n_y, device=device)
    shape = (splits if mine else 0, 2, lanes, n_x)
    best = torch.empty(shape, dtype=torch.int32, device=device)

    forward_kernel[owners, splits](
        **shared_arguments(x, y, scalars, tile),
        x_sums=x_sums,
        y_sums=y_sums,
        best=best,
        split_size=split_size,
        CODE_BITS=bits,
        MINE=mine,
    )
    mined = hardest(best, x, y, scalars, tile, split_size, bits, k) if mine else None
    return x_sums, y_sums, mined


def triton_forward(p: Problem) -> Stats:
    """`Stats`, by one pass over the matrix, or one for each side if there is something to mine."""
    n, m = len(p.video), len(p.text)
    video, text, scalars = pack(p)

    # the positives are few
    positive_text = p.text[p.offset : p.offset + n].to(p.dtype).float()
    positive = p.scale * (p.video.to(p.dtype).float() * positive_text).sum(1)

    if p.k:
        row_sums, _, v2t = run_pass(video, text, scalars, p.k)
        col_sums, _, t2v = run_pass(text, video, scalars, p.k)
    else:
        row_sums, col_sums, _ = run_pass(video, text, scalars, 0)
        nothing = [x.rows[:, :0] for x in (video, text)]  # [P, 0]
        v2t, t2v = ((x.long(), x.float()) for x in nothing)

    # without the padding
    row_negatives = log_of_sums(row_sums, video, text, scalars)[:n]
    col_negatives = log_of_sums(col_sums, text, video, scalars)[:m]
    mined = Mined(*(x[:n] for x in v2t), *(x[:m] for x in t2v))
    return Stats(row_negatives, col_negatives, positive, mined)
