# SPDX-License-Identifier: Apache-2.0
"""From lanes to the exact top-k: select, certify, repair, score again.

triton_forward.py leaves, for each column x and each of its ~512 lanes, the two largest e = exp(a −
shift) among the ~B/512 rows that share the lane, cut to 23 − CODE_BITS bits, with the place they
came from. Programs of this kernel own a few x each:

1. Select. k times: take the largest key of all lanes, and strike it. Keys are (cut e, lowest index
first) in 64 bits.
2. Certify. What a lane lost is no larger than the second that it kept. So a lane whose second lies
below the k-th
   selected value is *certainly* complete. At k = 16 a random batch has 0.2 other lanes a row.
3. Repair. Those lanes, ~B/512 pairs each, are computed again, one by one, and merged: a 500th of
the row's work.
4. Score. The selected, and what ties with the k-th in the cut bits, are scored once more as float32
logits, and
   sorted by (score, index).

The result is exact: every lane is complete or was searched completely. One limit: where more than
KC − k ≥ 8 logits around place k differ by less than the cut (2^-15 at most), their order is by
index. A batch of equal embeddings repairs every lane, that is, computes the matrix without the
matrix unit: slow, and still right.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_layout import INTERPRETED

# unless told, ptxas spills some registers to fit one more block into a multiprocessor
LAUNCH = dict(num_warps=4, maxnreg=255)


@triton.jit
def flip(index):
    """int32 index <-> 2^31 − 1 − index, so that of equal values the lowest index makes the largest
    key.
    """
    return index ^ 0x7FFFFFFF


@triton.jit
def take_largest(a, b, COUNT: tl.constexpr):
    """The COUNT largest keys of [R, A] and [R, B] together, in order; keys are distinct but for −1
    = nothing.
    """
    place = tl.arange(0, COUNT)[None, :]
    taken = tl.full([a.shape[0], COUNT], -1, tl.int64)
    for i in range(COUNT):
        top = tl.maximum(tl.max(a, 1), tl.max(b, 1))[:, None]
        taken = tl.where(place == i, top, taken)
        a = tl.where(a == top, -1, a)
        b = tl.where(b == top, -1, b)
    return taken


@triton.jit
def dot_rows(x_rows, y_rows, x, y, D: tl.constexpr, BD: tl.constexpr):
    """X[x] · Y[y] as float32 [R, C], for positions x [R] and y [R, C]."""
    acc = tl.zeros([y.shape[0], y.shape[1]], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x_part = tl.load(x_rows + x.to(tl.int64)[:, None] * D + d[None, :]).to(tl.float32)
        y_part = tl.load(y_rows + y.to(tl.int64)[:, :, None] * D + d[None, None, :]).to(tl.float32)
        acc += tl.sum(y_part * x_part[:, None, :], 2)
    return acc


@triton.jit
def locate(split, lane, code, split_size, BY: tl.constexpr):
    """The packed row that lane `lane` (of BY / 2) of `split` met as number `code`:
    triton_forward.fold, backwards.
    """
    return split * split_size + code // 2 * BY + lane // 8 * 16 + code % 2 * 8 + lane % 8


@triton.jit
def mining_kernel(
    best,
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    x_order,
    y_order,
    y_place,
    scalars,
    index,
    score,
    n_x,
    n_y,
    split_size,
    D: tl.constexpr,
    IDS: tl.constexpr,
    BY: tl.constexpr,
    LANES: tl.constexpr,
    CODES: tl.constexpr,
    CODE_BITS: tl.constexpr,
    K: tl.constexpr,
    KC: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Rows R·program … of `index`, `score` [n, K].

    LANES: of all splits; CODES ≥ rows of a lane; KC > K candidates.
    """
    half: tl.constexpr = BY // 2
    x = tl.program_id(0) * R + tl.arange(0, R)
    real = tl.load(x_ids + x) >= 0
    scale2, shift, scale = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)

    # 1. select
    lane = tl.arange(0, LANES)[None, :]
    at = best + (lane // half * BY + lane % half).to(tl.int64) * n_x + x[:, None]
    first = tl.load(at)
    second = tl.load(at + half * n_x.to(tl.int64))
    code_mask: tl.constexpr = (1 << CODE_BITS) - 1
    first_y = locate(lane // half, lane % half, first & code_mask, split_size, BY)
    second_y = locate(lane // half, lane % half, second & code_mask, split_size, BY)
    first_key = ((first >> CODE_BITS).to(tl.int64) << 32) | flip(tl.load(y_order + first_y)).to(
        tl.int64
    )
    second_key = ((second >> CODE_BITS).to(tl.int64) << 32) | flip(tl.load(y_order + second_y)).to(
        tl.int64
    )
    first_key = tl.where(first >> CODE_BITS > 0, first_key, -1)
    second_key = tl.where(second >> CODE_BITS > 0, second_key, -1)
    taken = take_largest(first_key, second_key, KC)

    # 2. certify
    candidate = tl.arange(0, KC)[None, :]
    # the cut value at place K; −1: fewer than K
    threshold = tl.max(tl.where(candidate == K - 1, taken, -1), 1) >> 32
    is_above = (second >> CODE_BITS).to(tl.int64) >= threshold[:, None]
    open_lanes = (second >> CODE_BITS > 0) & is_above & real[:, None]

    # 3. repair
    for _ in range(tl.max(tl.sum(open_lanes.to(tl.int32), 1), 0)):
        chosen = tl.min(tl.where(open_lanes, lane, LANES), 1)[:, None]
        kept_first = tl.max(tl.where(lane == chosen, first & code_mask, -1), 1)[:, None]
        kept_second = tl.max(tl.where(lane == chosen, second & code_mask, -1), 1)[:, None]
        open_lanes = open_lanes & (lane != chosen)
        code = tl.arange(0, CODES)[None, :]
        y = locate(chosen // half, chosen % half, code, split_size, BY)
        new = (chosen < LANES) & (code // 2 * BY < split_size) & (y < n_y)
        new = new & (code != kept_first) & (code != kept_second)
        y = tl.where(new, y, 0)
        e = tl.math.exp2(tl.fma(dot_rows(x_rows, y_rows, x, y, D, BD), scale2, -shift))
        new = new & (tl.load(y_ids + y) >= 0)
        for c in tl.static_range(IDS):
            new = new & (tl.load(y_ids + c * n_y + y) != tl.load(x_ids + c * n_x + x)[:, None])
        cut = e.to(tl.int32, bitcast=True) >> CODE_BITS
        key = (cut.to(tl.int64) << 32) | flip(tl.load(y_order + y)).to(tl.int64)
        taken = take_largest(taken, tl.where(new & (cut > 0), key, -1), KC)

    # 4. score
    threshold = tl.max(tl.where(candidate == K - 1, taken, -1), 1) >> 32
    found = (taken >= 0) & (taken >> 32 >= threshold[:, None])
    original = flip(tl.where(found, taken & 0x7FFFFFFF, 0x7FFFFFFF).to(tl.int32))
    y = tl.load(y_place + original)
    bits = (dot_rows(x_rows, y_rows, x, y, D, BD) * scale).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats of either sign in the order of integers
    nothing: tl.constexpr = -(1 << 63)
    key = tl.where(found, (ordered.to(tl.int64) << 32) | flip(original).to(tl.int64), nothing)
    out = tl.load(x_order + x).to(tl.int64) * K

    for i in range(K):
        top = tl.max(key, 1)
        key = tl.where(key == top[:, None], nothing, key)
        high = (top >> 32).to(tl.int32)
        value = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(
            index + out + i,
            tl.where(top == nothing, -1, flip((top & 0x7FFFFFFF).to(tl.int32))),
            mask=real,
        )
        tl.store(score + out + i, tl.where(top == nothing, float("-inf"), value), mask=real)


def hardest(matrix_pass, k: int, n: int) -> tuple[Tensor, Tensor]:
    """(index [n, k] int64, score [n, k] float32) of the n owned rows of a mining `Pass`, in the
    caller's order.
    """
    x, y, tile, best = matrix_pass.x, matrix_pass.y, matrix_pass.tile, matrix_pass.best
    device = best.device

    index = torch.empty(n, k, dtype=torch.int64, device=device)
    score = torch.empty(n, k, device=device)

    rows = 128 if INTERPRETED else 1  # the interpreter likes few programs
    mining_kernel[len(x.rows) // rows,](
        best,
        x.rows,
        y.rows,
        x.ids,
        y.ids,
        x.order,
        y.order,
        y.place,
        matrix_pass.scalars,
        index,
        score,
        len(x.rows),
        len(y.rows),
        matrix_pass.split_size,
        D=x.rows.shape[1],
        IDS=len(x.ids),
        BY=tile.streamed,
        LANES=len(best) * tile.streamed // 2,
        CODES=triton.next_power_of_2(matrix_pass.split_size // tile.streamed * 2),
        CODE_BITS=matrix_pass.code_bits,
        K=k,
        KC=triton.next_power_of_2(k + 8),
        R=rows,
        BD=tile.depth,
        **LAUNCH,
    )
    return index, score
