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
    make_tile,
    pack,
    shared_arguments,
    tile_for,
)

SLAB = 1 << 28  # numbers in a slab: 512 MiB in half precision
# programs walk down 8 tiles before they step to the right: their rows meet in L2
GROUP = constexpr(8)
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
    y_first,
    n_x,
    n_y,
    D: constexpr,
    IDS: constexpr,
    BX: constexpr,
    BY: constexpr,
    BD: constexpr,
):
    """slab[y − y_first, x] = dA_yx, one tile a program; X are the texts, Y the videos."""
    # the axis of programs that runs fastest is 0
    i, j = tl.program_id(1), tl.program_id(0)
    i, j = tl.swizzle2d(i, j, tl.num_programs(1), tl.num_programs(0), GROUP)
    x0, y0 = j * BX, y_first + i * BY

    z = make_tile(
        x_rows, y_rows, x_ids, y_ids, marks, scalars, x0, y0, n_x, n_y,
        D, IDS, BX, BY, BD,
    )  # fmt: skip

    rows, cols = y0 + tl.arange(0, BY), x0 + tl.arange(0, BX)
    weight = tl.load(y_weight + rows)[:, None] + tl.load(x_weight + cols)[None, :]
    d_logits = tl.math.exp2(z) * weight

    if isinstance(slab, tl.tensor_descriptor):
        slab.store([i * BY, x0], d_logits)
    else:
        rows = (i * BY + tl.arange(0, BY)).to(tl.int64)[:, None]
        tl.store(slab + rows * n_x + cols[None, :], d_logits)


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
    n_packed, m_packed, device = len(video.rows), len(text.rows), p.video.device

    # dA as stored is at most 2 · GAIN, however small the upstream gradient
    tiny = torch.finfo(torch.float32).tiny
    largest = torch.maximum(g_row.abs().amax(), g_col.abs().amax()).clamp(min=tiny)
    unit = largest / GAIN
    row_weight = make_weights(g_row / unit, saved[0], video, scalars[1])
    col_weight = make_weights(g_col / unit, saved[1], text, scalars[1])

    tile = tile_for("slab", video.rows)
    arguments = shared_arguments(text, video, scalars, tile)
    height = max(ROW_MULTIPLE, min(SLAB // m_packed // ROW_MULTIPLE * ROW_MULTIPLE, n_packed))
    slab = torch.empty(height, m_packed, dtype=video.rows.dtype, device=device)

    row_concepts = p.row_concepts if wants_beta else p.row_concepts[:, :0]
    columns = width + row_concepts.shape[1]
    d_video = torch.empty(n_packed, columns, device=device)  # dA·[T | C]
    d_text = torch.zeros(m_packed, width, device=device)

    for first in range(0, n_packed, height):
        count = min(height, n_packed - first)
        rows = slice(first, first + count)
        slab_kernel[m_packed // tile.owned, count // tile.streamed](
            **arguments,
            x_weight=col_weight,
            y_weight=row_weight,
            slab=as_argument(slab, tile.streamed, tile.owned, tile.tma),
            y_first=first,
            maxnreg=255,  # else ptxas spills some to fit one more block into a multiprocessor
        )

        d_video[rows] = multiply(slab[:count], text.rows[:, :columns])
        d_text += multiply(slab[:count].T, video.rows[rows, :width])

    d_beta = (d_video[:n, width:] * row_concepts).sum() * unit

    # the positives, and the scale
    kept_video, kept_text = video.rows[:n, :width], text.rows[p.offset : p.offset + n, :width]
    d_video = d_video[:n, :width] * unit + g_positive[:, None] * kept_text
    d_text = d_text[:m] * unit
    d_text[p.offset : p.offset + n] += g_positive[:, None] * kept_video
    d_scale = (d_video * kept_video).sum()
    return d_video * p.scale, d_text * p.scale, d_scale, d_beta
