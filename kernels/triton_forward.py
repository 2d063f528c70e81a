# SPDX-License-Identifier: Apache-2.0
"""GPU forward: log-sum-exps and a running top-k in one pass over the tiles.

The unit of work is a program that *owns* 128 columns (say videos; 256 without mining), stays with
them and streams over the other side (texts), 128 rows at a time (docs/tile_walk.svg). For each
tile:

    acc[y, x] = Y[y] · X[x]                              matrix unit, accumulators in registers
    e = exp2(acc · s·log2e − shift)                      one fma, one exp2; why a fixed shift does:
                                                         triton_layout.py
    exponent = −inf at masked pairs                      only in marked tiles: those near the
                                                         diagonal
    x_sums[x] += Σ_y e                                   the owned side: an accumulator in registers
    y_sums[program, y] = Σ_x e                           the streamed side, if nothing is mined: one
                                                         pass serves both
    best two of each lane                                the owned side, if mined: then each side
                                                         takes its own pass

The owned axis is the N side of the tile because of how an accumulator lies in registers: a thread
holds, in two rows 8 apart, every fourth pair of columns. Sums over x are then additions inside a
thread and two shuffles; and what belongs to a column x can stay in the thread from tile to tile, if
it keeps one result *per row position* (64 "lanes": rows y and y + 8 share one) instead of one per
column. Lanes are added up once, at the very end, not per tile.

The running top-k uses the same lanes. Each lane of each column keeps its best two values of e, as
one integer each: the bits of a positive float order like an integer, so the lowest bits are
overwritten by which tile (and which of the two rows) it came from. That is three min/max
instructions per logit, no branch, no data movement; a sorted list of k would triple the loop's
time. With S splits of the streamed side there are 64·S lanes, and the k hardest hardly ever have
three of their number in one lane. Which lanes may hide something is known exactly, and repaired:
triton_mining.py.

Splits make enough programs to fill the GPU, and lanes enough to be complete. `flatten` fuses the
loops over tiles and over depth, so that the next tile's operands are on their way while this tile's
exponentials are computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import no_negatives
from .triton_layout import (
    CELL,
    LOG2E,
    Side,
    as_argument,
    is_marked,
    load_tile,
    mask_pairs,
    on_device,
    pack,
    tile_for,
)
from .triton_mining import hardest

# per column: then 20 % of the columns have a lane to repair at k = 16 (birthday problem)
LANES_WANTED = 512
SMALLEST_SUM = 2.0**-100  # its inverse, a weight of the backward, still fits into float32


@triton.jit
def fold(tile, BY: tl.constexpr, BX: tl.constexpr):
    """[BY, BX] -> two [BY // 16, 8, BX]: y and y + 8 lie in the same thread, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, [BY // 16, 2, 8, BX]), (0, 2, 3, 1)))


@triton.jit
def keep_two(first, second, new):
    """Insert `new` into the sorted pair of each lane."""
    return tl.maximum(first, new), tl.maximum(second, tl.minimum(first, new))


@triton.jit
def forward_kernel(
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    marks,
    mark_stride_x,
    mark_stride_y,
    scalars,
    x_sums,
    y_sums,
    best,
    n_x,
    n_y,
    split_size,
    D: tl.constexpr,
    IDS: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BD: tl.constexpr,
    CELL: tl.constexpr,
    CODE_BITS: tl.constexpr,
    BOTH: tl.constexpr,
    MINE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program (i, split) owns columns i·BX … and streams rows split·split_size … of y.

    x_rows, y_rows: descriptors of [n_x, D], [n_y, D]; x_sums [splits, n_x], y_sums [n_x / BX, n_y];
    best [splits, 2, BY // 2, n_x] int32.
    """
    i, split = tl.program_id(0), tl.program_id(1)
    x0 = i * BX
    start = split * split_size
    scale2, shift = tl.load(scalars), tl.load(scalars + 1)
    sums = tl.zeros([BY // 16, 8, BX], tl.float32)
    first = tl.zeros([BY // 16, 8, BX], tl.int32)
    second = tl.zeros([BY // 16, 8, BX], tl.int32)

    for y0 in tl.range(start, tl.minimum(start + split_size, n_y), BY, flatten=True):
        # the product
        acc = tl.zeros([BY, BX], tl.float32)
        for d in tl.range(0, D, BD):
            y = load_tile(y_rows, y0, d, D, BY, BD, TMA)
            x = load_tile(x_rows, x0, d, D, BX, BD, TMA)
            acc = tl.dot(y, x.T, acc, input_precision="ieee")

        # the exponential, 0 where a pair is no negative
        exponent = tl.fma(acc, scale2, -shift)
        if is_marked(marks, mark_stride_y, mark_stride_x, y0, x0, BY, BX, CELL):
            rows, cols = y0 + tl.arange(0, BY), x0 + tl.arange(0, BX)
            exponent = mask_pairs(exponent, y_ids, x_ids, n_y, n_x, rows, cols, IDS)
        e = tl.math.exp2(exponent)

        # what is kept of the tile
        upper, lower = fold(e, BY, BX)
        sums += upper + lower
        if BOTH:
            tl.store(y_sums + i.to(tl.int64) * n_y + y0 + tl.arange(0, BY), tl.sum(e, 1))
        if MINE:
            code = (y0 - start) // BY * 2
            keep: tl.constexpr = -(1 << CODE_BITS)
            upper = (upper.to(tl.int32, bitcast=True) & keep) | code
            lower = (lower.to(tl.int32, bitcast=True) & keep) | (code + 1)
            first, second = keep_two(first, second, upper)
            first, second = keep_two(first, second, lower)

    # lanes are added up once, here
    total = tl.sum(tl.reshape(sums, [BY // 2, BX]), 0)
    tl.store(x_sums + split * n_x + x0 + tl.arange(0, BX), total)
    if MINE:
        lane = tl.reshape(tl.arange(0, BY // 2), [BY // 16, 8, 1])
        col = tl.reshape(x0 + tl.arange(0, BX), [1, 1, BX])
        at = best + (split * BY + lane).to(tl.int64) * n_x + col
        tl.store(at, first)
        tl.store(at + (BY // 2) * n_x.to(tl.int64), second)


class Pass:
    """One pass over the matrix with side `x` as owner: its shape, its workspaces, its launch."""

    def __init__(self, x: Side, y: Side, marks: Tensor, scalars: Tensor, mine: bool):
        self.x, self.y, self.scalars = x, y, scalars
        self.tile = tile = tile_for("mine" if mine else "sums", x.rows)
        n_x, n_y, device = len(x.rows), len(y.rows), x.rows.device

        # splits of the streamed side: programs enough to fill the GPU, lanes enough to be complete
        tiles = n_y // tile.streamed
        splits = min(LANES_WANTED // (tile.streamed // 2), triton.next_power_of_2(tiles))
        self.split_size = triton.cdiv(tiles, splits) * tile.streamed
        self.code_bits = max(1, (self.split_size // tile.streamed * 2 - 1).bit_length())

        owners = n_x // tile.owned
        self.x_sums = torch.empty(splits, n_x, device=device)
        self.y_sums = self.best = self.x_sums  # not written where not asked for
        if mine:
            shape = (splits, 2, tile.streamed // 2, n_x)
            self.best = torch.empty(shape, dtype=torch.int32, device=device)
        else:
            self.y_sums = torch.empty(owners, n_y, device=device)

        forward_kernel[owners, splits](
            as_argument(x.rows, tile.owned, tile.depth, tile.tma),
            as_argument(y.rows, tile.streamed, tile.depth, tile.tma),
            x.ids,
            y.ids,
            marks,
            marks.stride(0),
            marks.stride(1),
            scalars,
            self.x_sums,
            self.y_sums,
            self.best,
            n_x,
            n_y,
            self.split_size,
            D=x.rows.shape[1],
            IDS=len(x.ids),
            BX=tile.owned,
            BY=tile.streamed,
            BD=tile.depth,
            CELL=CELL,
            CODE_BITS=self.code_bits,
            BOTH=not mine,
            MINE=mine,
            TMA=tile.tma,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def log_of_sums(sums: Tensor, side: Side, scalars: Tensor) -> Tensor:
    """Partial sums [parts, P] in packed order -> natural log-sum-exp [n] in the caller's.

    −inf where there is no negative. NaN where all of them lie so far under the bound that the shift
    presses them below what float32 can hold: wrong numbers would be silent.
    """
    total = sums.sum(0)[side.place.long()]
    log_sum = ((total.double().log2() + scalars[1]) / LOG2E).float()
    return torch.where(side.has_negatives & (total < SMALLEST_SUM), torch.nan, log_sum)


@on_device
def triton_forward(
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
    n, m = len(video), len(text)
    layout = pack(video, text, scale, beta, concepts, signature, offset, dtype)
    positive = scale * (video.float() * text[offset : offset + n].float()).sum(1)

    videos_own = Pass(layout.video, layout.text, layout.marks, layout.scalars, mine=k > 0)
    row_negatives = log_of_sums(videos_own.x_sums, layout.video, layout.scalars)
    if k == 0:
        col_negatives = log_of_sums(videos_own.y_sums, layout.text, layout.scalars)
        nothing = (*no_negatives(n, k, video), *no_negatives(m, k, video))
        return row_negatives, col_negatives, positive, *nothing

    v2t = hardest(videos_own, k, n)
    del videos_own  # its workspace is as large as the next one's
    texts_own = Pass(layout.text, layout.video, layout.marks.T, layout.scalars, mine=True)
    col_negatives = log_of_sums(texts_own.x_sums, layout.text, layout.scalars)
    return row_negatives, col_negatives, positive, *v2t, *hardest(texts_own, k, m)
