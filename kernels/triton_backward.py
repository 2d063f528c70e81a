# SPDX-License-Identifier: Apache-2.0
"""GPU backward: the gradient of the logits, a slab of rows at a time, then two matrix products.

    dA_ij = g_row_i · exp(a_ij − row_negatives_i) + g_col_j · exp(a_ij − col_negatives_j)
          = e_ij · (g_row_i / rowsum_i + g_col_j / colsum_j)    e_ij = exp(a_ij − shift)
    dV = s · (dA·T + g_pos ⊙ t)
    dT = s · (dAᵀ·V + g_pos ⊙ v)        the positives are not in dA: no cancellation

One kernel recomputes e and writes dA for ~4,096 rows at a time in half precision; cuBLAS does the
two products with float32 results. That is 6·B²·D FLOP and 3 passes over 2·B² bytes; a backward in
the shape of flash attention, one kernel per side that never writes dA, recomputes e twice (8·B²·D)
and has to keep [128, D] float32 accumulators in registers, which fit up to D = 256 only. No
atomics: the same bits every time.

The packed texts carry the concepts as extra columns (triton_layout.py), so dA·[T | C] also gives dβ
= Σ_ij dA_ij κ_ij = Σ_i c_i·(dA·C)_i, and ds = Σ_ij dA_ij v_i·t_j = Σ_i v_i·dV_i / s costs no pass
over the matrix.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_layout import (
    CELL,
    LOG2E,
    ROW_MULTIPLE,
    Side,
    as_argument,
    is_marked,
    load_tile,
    mask_pairs,
    on_device,
    pack,
    store_tile,
    tile_for,
)

SLAB = 1 << 28  # numbers in a slab: 512 MiB in half precision
GROUP = 8  # programs walk down 8 tiles before they step to the right: their operands meet in L2


@triton.jit
def slab_kernel(
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    marks,
    mark_stride_x,
    scalars,
    x_weight,
    y_weight,
    slab,
    x_first,
    x_count,
    n_x,
    n_y,
    D: tl.constexpr,
    IDS: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BD: tl.constexpr,
    CELL: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TMA: tl.constexpr,
):
    """slab[x − x_first, y] = dA_xy, one tile a program. x_rows, y_rows, slab: descriptors."""
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

    scale2, shift = tl.load(scalars), tl.load(scalars + 1)
    exponent = tl.fma(acc, scale2, -shift)
    rows, cols = x0 + tl.arange(0, BX), y0 + tl.arange(0, BY)
    if is_marked(marks, mark_stride_x, 1, x0, y0, BX, BY, CELL):
        exponent = mask_pairs(exponent, x_ids, y_ids, n_x, n_y, rows, cols, IDS)
    weight = tl.load(x_weight + rows)[:, None] + tl.load(y_weight + cols)[None, :]
    d_logits = tl.math.exp2(exponent) * weight
    store_tile(slab, x_slab, y0, n_y, d_logits.to(HALF), BX, BY, TMA)


def weights_of(g: Tensor, log_sum: Tensor, side: Side, shift: Tensor) -> Tensor:
    """g / sum of e in packed order [P]; 0 where there is no negative and at the padding."""
    inverse = torch.exp2(shift - log_sum.double() * LOG2E).float()
    weight = g * inverse.masked_fill(log_sum == -torch.inf, 0)
    packed = weight.new_zeros(len(side.order))
    packed[side.place.long()] = weight
    return packed


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, whatever the (equal) dtypes of a and b."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


@on_device
def triton_backward(
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
    """(d_video [N, E], d_text [M, E], d_scale, d_beta) from the gradients of `triton_forward`'s
    first three outputs.
    """
    layout = pack(video, text, scale, beta, concepts, signature, offset, dtype)
    x, y = layout.video, layout.text
    n, width = video.shape
    wants_beta = wants_beta and concepts is not None
    used = width + concepts[1].shape[1] if wants_beta else width  # no dβ, no dA·C

    # dA as stored is at most 2 · gain whatever the upstream gradient: float16 would lose g = 1 / 2B
    largest = torch.maximum(g_row.abs().amax(), g_col.abs().amax())
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    gain = 1024.0 if x.rows.dtype == torch.float16 else 1.0
    x_weight = weights_of(g_row / largest, row_negatives, x, layout.scalars[1])
    y_weight = weights_of(g_col / largest, col_negatives, y, layout.scalars[1])
    scalars = layout.scalars.clone()
    scalars[1] -= math.log2(gain)

    # a slab of dA after the other
    tile = tile_for("slab", x.rows)
    rows = max(ROW_MULTIPLE, min(SLAB // len(y.rows) // ROW_MULTIPLE * ROW_MULTIPLE, len(x.rows)))
    slab = torch.empty(rows, len(y.rows), dtype=x.rows.dtype, device=video.device)
    d_video = torch.empty(n, used, device=video.device)
    d_text = torch.zeros(len(y.rows), width, device=video.device)
    order = x.order.long()

    for first in range(0, n, rows):
        count = min(rows, len(x.rows) - first)
        real = min(rows, n - first)
        slab_kernel[triton.cdiv(count, tile.owned) * triton.cdiv(len(y.rows), tile.streamed),](
            as_argument(x.rows, tile.owned, tile.depth, tile.tma),
            as_argument(y.rows, tile.streamed, tile.depth, tile.tma),
            x.ids,
            y.ids,
            layout.marks,
            layout.marks.stride(0),
            scalars,
            x_weight,
            y_weight,
            as_argument(slab, tile.owned, tile.streamed, tile.tma),
            first,
            count,
            len(x.rows),
            len(y.rows),
            D=x.rows.shape[1],
            IDS=len(x.ids),
            BX=tile.owned,
            BY=tile.streamed,
            BD=tile.depth,
            CELL=CELL,
            GROUP=GROUP,
            HALF=getattr(tl, str(slab.dtype).removeprefix("torch.")),
            TMA=tile.tma,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        d_video[order[first : first + real]] = product(slab[:real], y.rows[:, :used])
        d_text += product(slab[:count].T, x.rows[first : first + count, :width])

    unit = largest / gain
    d_beta = torch.zeros_like(beta)
    if wants_beta:
        d_beta = (d_video[:, width:] * concepts[0]).sum() * unit
    d_video = d_video[:, :width] * unit + g_pos[:, None] * text[offset : offset + n]
    d_text = d_text[y.place.long()] * unit
    d_text[offset : offset + n] += g_pos[:, None] * video
    d_scale = (d_video * video).sum()
    return (d_video * scale).to(video.dtype), (d_text * scale).to(text.dtype), d_scale, d_beta
