# SPDX-License-Identifier: Apache-2.0
"""The tiled and the Triton version as one differentiable PyTorch operator.

`torch.library.custom_op` gives the pair of functions a name. A compiler puts that name into its
graph without a look inside, so the rest of a step compiles with `fullgraph=True`. `register_fake`
tells it the shapes, and the backward is registered like that of any operator.

Forward saves its inputs and the two log-sum-exps: O((N + M)·E). Backward computes the logits again,
tile by tile.
"""

import torch

from .reference import Mined, Problem, Stats, accumulate_dtype
from .tiled import tiled_backward, tiled_forward

# the fields of Problem
PROBLEM = (
    "Tensor video, Tensor text, Tensor scale, Tensor beta, Tensor row_concepts, "
    "Tensor col_concepts, Tensor row_ids, Tensor col_ids, int offset, int k, ScalarType dtype"
)
SAVED = "Tensor row_negatives, Tensor col_negatives"
UPSTREAM = "Tensor g_row, Tensor g_col, Tensor g_positive"


def nce_stats(problem: Problem, impl: str) -> Stats:
    """`Stats` by impl "tiled" or "triton", differentiable."""
    out = forward_op(*problem, impl)
    return Stats(*out[:3], Mined(*out[3:]))


@torch.library.custom_op(
    "clop::nce_stats",
    mutates_args=(),
    schema=f"({PROBLEM}, str impl) -> ({', '.join(['Tensor'] * 7)})",
)
def forward_op(*inputs):
    *fields, impl = inputs
    problem = Problem(*fields)
    forward = tiled_forward
    if impl == "triton":
        from .triton_forward import triton_forward as forward  # only where triton is wanted

    # the caller decided about dtypes; Triton launches on the current GPU
    device = problem.video.device.type
    with torch.autocast(device, enabled=False), torch.cuda.device_of(problem.video):
        stats = forward(problem)
    return *stats[:3], *stats.mined


@forward_op.register_fake
def _(*inputs):
    p = Problem(*inputs[:-1])
    n, m = len(p.video), len(p.text)
    dtype = accumulate_dtype(p.video.dtype)
    sums = [p.video.new_empty(count, dtype=dtype) for count in (n, m, n)]

    mined = []
    for count in (n, m):
        mined.append(p.video.new_empty(count, p.k, dtype=torch.int64))
        mined.append(p.video.new_empty(count, p.k, dtype=torch.float32))
    return *sums, *mined


@torch.library.custom_op(
    "clop::nce_stats_backward",
    mutates_args=(),
    schema=f"({PROBLEM}, str impl, {SAVED}, {UPSTREAM}, bool wants_beta)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(*inputs):
    *fields, impl, row_negatives, col_negatives, g_row, g_col, g_positive, wants_beta = inputs
    p = Problem(*fields)
    backward = tiled_backward
    if impl == "triton":
        from .triton_backward import triton_backward as backward

    saved, upstream = (row_negatives, col_negatives), (g_row, g_col, g_positive)
    with torch.autocast(p.video.device.type, enabled=False), torch.cuda.device_of(p.video):
        grads = backward(p, saved, upstream, wants_beta)
    return tuple(grad.to(like.dtype) for grad, like in zip(grads, p))


@backward_op.register_fake
def _(*inputs):
    return tuple(like.new_empty(like.shape) for like in inputs[:4])


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.offset, ctx.k, ctx.dtype, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(*output[3:])


def differentiate(ctx, g_row, g_col, g_positive, *mined):
    *tensors, row_negatives, col_negatives = ctx.saved_tensors
    inputs = (*tensors, ctx.offset, ctx.k, ctx.dtype, ctx.impl)
    saved = row_negatives, col_negatives

    # an output that nobody used has no gradient
    upstream = []
    for g, like in zip((g_row, g_col, g_positive), (row_negatives, col_negatives, row_negatives)):
        upstream.append(torch.zeros_like(like) if g is None else g)

    # a constant β does not pay for its gradient
    wants_beta = ctx.needs_input_grad[3]
    grads = backward_op(*inputs, *saved, *upstream, wants_beta)
    return *grads, *[None] * (len(inputs) - len(grads))


forward_op.register_autograd(differentiate, setup_context=save_for_backward)
