# SPDX-License-Identifier: Apache-2.0
"""From lanes to the exact top-k: select, certify, repair, score again.

triton_forward.py leaves the two largest e = exp2(a · log2 e − shift) of each lane, for each column
x and each of its about 512 lanes. They are cut to 23 − CODE_BITS bits, and say where they come
from. Programs of this kernel own a few x each:

1. Select. k times: take the largest key of all lanes, and strike it. Keys are (cut e, lowest index
   first) in 64 bits. This step alone is a good approximate miner.
2. Certify. What a lane lost is no larger than the second that it kept. So a lane whose second lies
   below the k-th selected value is *certainly* complete. At k = 16 a random batch has 0.2 others a
   row.
3. Repair. These lanes, about B/512 pairs each, are computed again, one by one, and merged.
4. Score. What was selected, k and at least 8 more, is scored once more as float32 logits. PyTorch
   sorts them by (score, index), and k remain.

The result is exact: every lane is complete or was searched completely. Two limits. Where more than
KC − k ≥ 8 logits around place k differ by less than the cut (2^-15 at most), their order is by
index. And a logit below float32's range (triton_layout.log_of_sums) is not mined: index −1. A batch
of equal embeddings repairs every lane, which computes the matrix without the matrix unit: slow, and
still right.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .reference import merge_hardest
from .triton_layout import INTERPRETED, Side, Tile

# unless told, ptxas spills some registers to fit one more block into a multiprocessor
LAUNCH = dict(num_warps=4, maxnreg=255)


@triton.jit
def make_key(value, index):
    """(int32 value, lowest index first) in 64 bits; −1 where the value is 0.

    2^31 − 1 − index: of equal values the lowest index has the largest key.
    """
    return tl.where(value > 0, (value.to(tl.int64) << 32) | (0x7FFFFFFF - index), -1)


@triton.jit
def take_largest(a, b, COUNT: constexpr):
    """The COUNT largest keys of [R, A] and [R, B] together, in order; −1 = nothing."""
    place = tl.arange(0, COUNT)[None, :]
    taken = tl.full([a.shape[0], COUNT], -1, tl.int64)
    for i in range(COUNT):
        top = tl.maximum(tl.max(a, 1), tl.max(b, 1))[:, None]
        taken = tl.where(place == i, top, taken)
        a = tl.where(a == top, -1, a)
        b = tl.where(b == top, -1, b)
    return taken


@triton.jit
def dot_rows(x_rows, y_rows, x, y, D: constexpr, BD: constexpr):
    """X[x] · Y[y] as float32 [R, C], for rows x [R] and y [R, C]."""
    acc = tl.zeros([y.shape[0], y.shape[1]], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x_part = tl.load(x_rows + x.to(tl.int64)[:, None] * D + d[None, :]).to(tl.float32)
        y_part = tl.load(y_rows + y.to(tl.int64)[:, :, None] * D + d[None, None, :]).to(tl.float32)
        acc += tl.sum(y_part * x_part[:, None, :], 2)
    return acc


@triton.jit
def locate(split, lane, code, split_size, BY: constexpr):
    """The row that lane `lane` (of BY / 2) of `split` met as number `code`: fold, backwards."""
    return split * split_size + code // 2 * BY + lane // 8 * 16 + code % 2 * 8 + lane % 8


@triton.jit
def mining_kernel(
    best,
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    scalars,
    index,
    score,
    n_x,
    n_y,
    split_size,
    D: constexpr,
    IDS: constexpr,
    BY: constexpr,
    LANES: constexpr,
    CODE_BITS: constexpr,
    K: constexpr,
    KC: constexpr,
    R: constexpr,
    BD: constexpr,
):
    """Rows R·program … of `index`, `score` [n_x, KC]: candidates, among them the K hardest.

    LANES: of all splits.
    """
    half: constexpr = BY // 2
    code_mask: constexpr = (1 << CODE_BITS) - 1
    x = tl.program_id(0) * R + tl.arange(0, R)
    scale2, shift, scale = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)

    # 1. select
    lane = tl.arange(0, LANES)[None, :]
    split, within = lane // half, lane % half
    at = best + (split * BY + within).to(tl.int64) * n_x + x[:, None]
    first, second = tl.load(at), tl.load(at + half * n_x.to(tl.int64))

    # their values without the code, and their rows of y
    first_cut, second_cut = first >> CODE_BITS, second >> CODE_BITS
    first_y = locate(split, within, first & code_mask, split_size, BY)
    second_y = locate(split, within, second & code_mask, split_size, BY)

    taken = take_largest(make_key(first_cut, first_y), make_key(second_cut, second_y), KC)

    # 2. certify: against the cut value at place K, −1 where there are fewer than K
    place = tl.arange(0, KC)[None, :]
    least = tl.max(tl.where(place == K - 1, taken, -1), 1)[:, None] >> 32
    is_real = (tl.load(x_ids + x) >= 0)[:, None]  # no padding
    open_lanes = (second_cut > 0) & (second_cut.to(tl.int64) >= least) & is_real

    # 3. repair, a lane of each row at a time
    for _ in range(tl.max(tl.sum(open_lanes.to(tl.int32), 1), 0)):
        chosen = tl.min(tl.where(open_lanes, lane, LANES), 1)[:, None]  # LANES: none left
        open_lanes = open_lanes & (lane != chosen)

        # its rows of y, but for the two that it kept, and for what is no negative
        code = tl.arange(0, 1 << CODE_BITS)[None, :]
        y = locate(chosen // half, chosen % half, code, split_size, BY)
        new = (chosen < LANES) & (code // 2 * BY < split_size) & (y < n_y)
        new &= y != tl.max(tl.where(lane == chosen, first_y, -1), 1)[:, None]
        new &= y != tl.max(tl.where(lane == chosen, second_y, -1), 1)[:, None]

        y = tl.where(new, y, 0)
        new &= tl.load(y_ids + y) >= 0
        for s in tl.static_range(IDS):
            new &= tl.load(x_ids + s * n_x + x)[:, None] != tl.load(y_ids + s * n_y + y)

        e = tl.math.exp2(tl.fma(dot_rows(x_rows, y_rows, x, y, D, BD), scale2, -shift))
        cut = tl.where(new, e.to(tl.int32, bitcast=True) >> CODE_BITS, 0)
        taken = take_largest(taken, make_key(cut, y), KC)

    # 4. score
    found = taken >= 0
    y = tl.where(found, (0x7FFFFFFF - (taken & 0x7FFFFFFF)).to(tl.int32), 0)
    logits = dot_rows(x_rows, y_rows, x, y, D, BD) * scale
    out = x.to(tl.int64)[:, None] * KC + place
    tl.store(index + out, tl.where(found, y, -1))
    tl.store(score + out, tl.where(found, logits, float("-inf")))


def hardest(
    best: Tensor, x: Side, y: Side, scalars: Tensor, tile: Tile, split_size: int, bits: int, k: int
) -> tuple[Tensor, Tensor]:
    """(index [P, k] int64, score [P, k] float32) of every packed x.

    best [splits, 2, lanes, P]: what `forward_kernel` left, with codes of so many `bits`.
    """
    n_x = len(x.rows)
    candidates = triton.next_power_of_2(k + 8)

    index = torch.empty(n_x, candidates, dtype=torch.int64, device=x.rows.device)
    score = torch.empty(n_x, candidates, device=x.rows.device)
    rows = 128 if INTERPRETED else 1  # the interpreter likes few programs

    mining_kernel[n_x // rows,](
        best,
        x.rows,
        y.rows,
        x.ids,
        y.ids,
        scalars,
        index,
        score,
        n_x,
        len(y.rows),
        split_size,
        D=x.rows.shape[1],
        IDS=len(x.ids),
        BY=tile.streamed,
        LANES=len(best) * tile.streamed // 2,
        CODE_BITS=bits,
        K=k,
        KC=candidates,
        R=rows,
        BD=tile.depth,
        **LAUNCH,
    )
    return merge_hardest(index, score, k)
