# SPDX-License-Identifier: Apache-2.0
"""The tiled and Triton versions as one differentiable PyTorch operator, opaque to torch.compile.

`torch.library.custom_op` gives a function a name that a compiler can put into its graph without
looking inside: the rest of a step compiles with `fullgraph=True`. The rule for shapes
(`register_fake`) is all that the compiler needs to know. The backward is registered like that of
any operator. Autocast is switched off inside: the caller decided on the dtype of the products.

Forward saves its inputs and the two log-sum-exps, O((N + M)·E). Backward computes the logits again,
tile by tile.
"""

import torch
from torch import Tensor

from .reference import accumulate_dtype, assert_finite
from .tiled import tiled_backward, tiled_forward


def pair(rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if rows is None else (rows, cols)


@torch.library.custom_op("clop::nce_stats", mutates_args=())
def nce_stats(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    beta: Tensor,
    row_concepts: Tensor | None,
    col_concepts: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    offset: int,
    k: int,
    dtype: torch.dtype,
    impl: str,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_negatives [N], col_negatives [M], positive [N], and what was mined: v2t_index, v2t_score
    [N, k], t2v_index, t2v_score [M, k])
    """
    concepts, ids = pair(row_concepts, col_concepts), pair(row_ids, col_ids)
    if check:
        assert_finite(video, text, scale, beta, concepts)

    forward = tiled_forward
    if impl == "triton":
        from .triton_forward import triton_forward as forward  # only where a GPU asks for it
    with torch.autocast(video.device.type, enabled=False):
        return forward(video, text, scale, beta, concepts, ids, offset, k, dtype)


@nce_stats.register_fake
def _(video, text, scale, beta, c1, c2, i1, i2, offset, k, dtype, impl, check):
    n, m, sums = video.shape[0], text.shape[0], accumulate_dtype(video.dtype)
    mined = []
    for count in (n, m):
        mined += [video.new_empty(count, k, dtype=kind) for kind in (torch.int64, torch.float32)]
    return *(video.new_empty(size, dtype=sums) for size in (n, m, n)), *mined


@torch.library.custom_op("clop::nce_stats_backward", mutates_args=())
def nce_stats_backward(
    g_row: Tensor,
    g_col: Tensor,
    g_pos: Tensor,
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    beta: Tensor,
    row_concepts: Tensor | None,
    col_concepts: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_negatives: Tensor,
    col_negatives: Tensor,
    offset: int,
    dtype: torch.dtype,
    impl: str,
    wants_beta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_video [N, E], d_text [M, E], d_scale, d_beta)."""
    concepts, ids = pair(row_concepts, col_concepts), pair(row_ids, col_ids)

    backward = tiled_backward
    if impl == "triton":
        from .triton_backward import triton_backward as backward
    problem = (video, text, scale, beta, concepts, ids, offset, dtype)
    with torch.autocast(video.device.type, enabled=False):
        return backward(g_row, g_col, g_pos, *problem, row_negatives, col_negatives, wants_beta)


@nce_stats_backward.register_fake
def _(g_row, g_col, g_pos, video, text, scale, beta, *others):
    return torch.empty_like(video), torch.empty_like(text), scale.new_empty(()), beta.new_empty(())


def save(ctx, inputs, output):
    *tensors, ctx.offset, _, ctx.dtype, ctx.impl, _ = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(*output[3:])


def backward(ctx, g_row, g_col, g_pos, *mined):
    row_negatives, col_negatives = ctx.saved_tensors[-2:]
    upstream = []
    for g, like in zip((g_row, g_col, g_pos), (row_negatives, col_negatives, row_negatives)):
        upstream.append(torch.zeros_like(like) if g is None else g.contiguous())
    wants_beta = ctx.needs_input_grad[3]  # a constant does not pay for its gradient
    how = (ctx.offset, ctx.dtype, ctx.impl, wants_beta)
    grads = nce_stats_backward(*upstream, *ctx.saved_tensors, *how)
    return *grads, *[None] * 9


nce_stats.register_autograd(backward, setup_context=save)
