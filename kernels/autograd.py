"""The tiled and Triton versions as one differentiable PyTorch operator, opaque to torch.compile.

`torch.library.custom_op` gives the pair of functions a name that a compiler can put into its graph
without looking inside: the rest of a step compiles with `fullgraph=True`. The rule for shapes
(`register_fake`) is all that the compiler needs to know, the backward is registered like that of
any operator. Autocast is switched off inside: the dtype of the products was decided by the caller.

Forward saves its inputs and the two log-sum-exps, O((N + M)·E); backward computes the logits again,
tile by tile.
"""

import torch
from torch import Tensor

from kernels.reference import accumulate_dtype, assert_finite
from kernels.tiled import tiled_backward, tiled_forward


def _pair(rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor] | None:
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
    impl: str,
    check: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_negatives [N], col_negatives [M], positive [N], v2t_index, v2t_score [N, k], t2v_index,
    t2v_score [M, k])
    """
    if check:
        assert_finite(video, text, scale, beta, _pair(row_concepts, col_concepts))
    forward = tiled_forward
    if impl == "triton":
        from kernels.triton_forward import triton_forward as forward  # only where a GPU asks for it
    with torch.autocast(video.device.type, enabled=False):
        return forward(
            video,
            text,
            scale,
            beta,
            _pair(row_concepts, col_concepts),
            _pair(row_ids, col_ids),
            offset,
            k,
        )


@nce_stats.register_fake
def _(
    video, text, scale, beta, row_concepts, col_concepts, row_ids, col_ids, offset, k, impl, check
):
    n, m, dtype = video.shape[0], text.shape[0], accumulate_dtype(video.dtype)
    mined = [
        video.new_empty(count, k, dtype=kind)
        for count in (n, m)
        for kind in (torch.int64, torch.float32)
    ]
    return (
        video.new_empty(n, dtype=dtype),
        video.new_empty(m, dtype=dtype),
        video.new_empty(n, dtype=dtype),
        *mined,
    )


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
    offset: int,
    impl: str,
    row_negatives: Tensor,
    col_negatives: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_video [N, E], d_text [M, E], d_scale, d_beta)."""
    backward = tiled_backward
    if impl == "triton":
        from kernels.triton_backward import triton_backward as backward
    with torch.autocast(video.device.type, enabled=False):
        return backward(
            g_row,
            g_col,
            g_pos,
            video,
            text,
            scale,
            beta,
            _pair(row_concepts, col_concepts),
            _pair(row_ids, col_ids),
            offset,
            row_negatives,
            col_negatives,
        )


@nce_stats_backward.register_fake
def _(
    g_row,
    g_col,
    g_pos,
    video,
    text,
    scale,
    beta,
    row_concepts,
    col_concepts,
    row_ids,
    col_ids,
    offset,
    impl,
    row_negatives,
    col_negatives,
):
    return torch.empty_like(video), torch.empty_like(text), scale.new_empty(()), beta.new_empty(())


def _save(ctx, inputs, output):
    *tensors, ctx.offset, _, ctx.impl, _ = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, g_row, g_col, g_pos, *mined):
    *inputs, row_negatives, col_negatives = ctx.saved_tensors
    upstream = [
        torch.zeros_like(like) if g is None else g.contiguous()
        for g, like in zip((g_row, g_col, g_pos), (row_negatives, col_negatives, row_negatives))
    ]
    grads = nce_stats_backward(
        *upstream, *inputs, ctx.offset, ctx.impl, row_negatives, col_negatives
    )
    return *grads, None, None, None, None, None, None, None, None


nce_stats.register_autograd(_backward, setup_context=_save)
