# SPDX-License-Identifier: Apache-2.0
"""GPU backward: the gradient of the logits, a slab of rows at a time, then two matrix products.

    e_ij  = exp(a_ij − shift), as in the forward
    dA_ij = g_row_i · exp(a_ij − row_negatives_i) + g_col_j · exp(a_ij − col_negatives_j)
          = e_ij · (g_row_i / rowsum_i + g_col_j / colsum_j)
    dV    = s · (dA·T + g_pos ⊙ t)        dT = s · (dAᵀ·V + g_pos ⊙ v)

The positives are not in dA, so nothing cancels. One kernel recomputes e and writes dA for a slab of
rows in half precision. cuBLAS does the two products, with float32 results. That is 6·B²·D FLOP and
3 passes over 2·B² bytes. A backward in the shape of flash attention never writes dA, but computes e
twice (8·B²·D), and must keep [128, D] float32 accumulators in registers: they fit up to D = 256. No
atomics: the same bits every time.

The packed texts carry the concepts as further columns (triton_layout.py). So dA·[T | C] also gives
dβ = Σ_i c_i·(dA·C)_i, and ds = Σ_i v_i·dV_i / s costs no pass over the matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .reference import Problem
from .triton_layout import (
    LOG2E,
    ROW_MULTIPLE,
    Side,
    as_argument,
    is_marked,
    load_tile,
    mask_tile,
    pack,
    shared_arguments,
    store_tile,
    tile_for,
)

SLAB = 1 << 28  # numbers in a slab: 512 MiB in half precision
GROUP = constexpr(
    8
)  # programs walk down 8 tiles before they step to the right: their rows meet in L2
GAIN = 1024.0  # of dA: float16 would lose a gradient of 1 / 2B


@triton.jit
def slab_kernel(
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    marks,
    scalars,
    x_weight,
    y_weight,
    slab,
    x_first,
    x_count,
    n_x,
    n_y,
    D: constexpr,
    IDS: constexpr,
    BX: constexpr,
    BY: constexpr,
    BD: constexpr,
    HALF: constexpr,
    TMA: constexpr,
):
    """slab[x − x_first, y] = dA_xy, one tile a program."""
    # which tile: down a group of them, then one to the right
    program = tl.program_id(0)
    x_tiles, y_tiles = tl.cdiv(x_count, BX), tl.cdiv(n_y, BY)
    group = program // (GROUP * y_tiles)
    height = tl.minimum(x_tiles - group * GROUP, GROUP)
    within = program % (GROUP * y_tiles)
    x_slab = (group * GROUP + within % height) * BX
    x0, y0 = x_first + x_slab, within // height * BY

    acc = tl.zeros([BX, BY], tl.float32)
    for d in tl.range(0, D, BD):
        x = load_tile(x_rows, x0, d, D, BX, BD, TMA)
        y = load_tile(y_rows, y0, d, D, BY, BD, TMA)
        acc = tl.dot(x, y.T, acc, input_precision="ieee")

    rows, cols = x0 + tl.arange(0, BX), y0 + tl.arange(0, BY)
    z = tl.fma(acc, tl.load(scalars), -tl.load(scalars + 1))
    if is_marked(marks, n_x, y0, x0, BY, BX):
        z = mask_tile(z, x_ids, y_ids, n_x, n_y, rows, cols, IDS)

    weight = tl.load(x_weight + rows)[:, None] + tl.load(y_weight + cols)[None, :]
    d_logits = tl.math.exp2(z) * weight
    store_tile(slab, x_slab, y0, n_y, d_logits.to(HALF), BX, BY, TMA)


def make_weights(g: Tensor, log_sum: Tensor, side: Side, shift: Tensor) -> Tensor:
    """g / sum of e [P]; 0 where there is no negative, and at the padding."""
    one_over_sum = torch.exp2(shift - log_sum.double() * LOG2E).float()
    weights = g.new_zeros(len(side.rows))
    weights[: len(g)] = g * one_over_sum.masked_fill(log_sum == -torch.inf, 0)
    return weights


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, whatever the (equal) dtypes of a and b."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def triton_backward(p: Problem, saved: tuple, upstream: tuple, wants_beta: bool) -> tuple:
    """(d_video [N, E], d_text [M, E], d_scale, d_beta).

    saved: row_negatives and col_negatives of `triton_forward`; upstream: the gradients of its first
    three outputs. Without wants_beta, d_beta is 0 and costs nothing.
    """
    (n, width), m = p.video.shape, len(p.text)
    g_row, g_col, g_positive = upstream
    video, text, scalars = pack(p)
    n_x, n_y, device = len(video.rows), len(text.rows), p.video.device

    # dA as stored is at most 2 · GAIN, however small the upstream gradient
    tiny = torch.finfo(torch.float32).tiny
    largest = torch.maximum(g_row.abs().amax(), g_col.abs().amax()).clamp(min=tiny)
    unit = largest / GAIN
    x_weight = make_weights(g_row / unit, saved[0], video, scalars[1])
    y_weight = make_weights(g_col / unit, saved[1], text, scalars[1])

    tile = tile_for("slab", video.rows)
    arguments = shared_arguments(video, text, scalars, tile)
    height = max(ROW_MULTIPLE, min(SLAB // n_y // ROW_MULTIPLE * ROW_MULTIPLE, n_x))
    slab = torch.empty(height, n_y, dtype=video.rows.dtype, device=device)

    columns = width + p.row_concepts.shape[1] if wants_beta else width
    d_video = torch.empty(n_x, columns, device=device)  # dA·[T | C]
    d_text = torch.zeros(n_y, width, device=device)

    for first in range(0, n_x, height):
        count = min(height, n_x - first)
        rows = slice(first, first + count)
        slab_kernel[triton.cdiv(count, tile.owned) * triton.cdiv(n_y, tile.streamed),](
            **arguments,
            x_weight=x_weight,
            y_weight=y_weight,
            slab=as_argument(slab, tile.owned, tile.streamed, tile.tma),
            x_first=first,
            x_count=count,
            HALF=getattr(tl, str(slab.dtype).removeprefix("torch.")),
        )

        d_video[rows] = multiply(slab[:count], text.rows[:, :columns])
        d_text += multiply(slab[:count].T, video.rows[rows, :width])

    d_beta = torch.zeros_like(p.beta)
    if wants_beta:
        d_beta = (d_video[:n, width:] * p.row_concepts).sum() * unit

    # the positives, and the scale
    kept_video, kept_text = video.rows[:n, :width], text.rows[p.offset : p.offset + n, :width]
    d_video = d_video[:n, :width] * unit + g_positive[:, None] * kept_text
    d_text = d_text[:m] * unit
    d_text[p.offset : p.offset + n] += g_positive[:, None] * kept_video
    d_scale = (d_video * kept_video).sum()
    return d_video * p.scale, d_text * p.scale, d_scale, d_beta
