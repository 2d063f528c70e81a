# SPDX-License-Identifier: Apache-2.0
"""The tiled and the Triton version as one differentiable function.

Forward saves its inputs and the two log-sum-exps: O((N + M)·E). Backward computes the logits again,
tile by tile.
"""

import torch
from torch.autograd.function import once_differentiable

from .reference import Mined, Problem, Stats
from .tiled import tiled_backward, tiled_forward

TENSORS = 8  # the first fields of Problem; the others are numbers


def nce_stats(problem: Problem, impl: str) -> Stats:
    """`Stats` by impl "tiled" or "triton", differentiable."""
    out = NceStats.apply(impl, *problem)
    return Stats(*out[:3], Mined(*out[3:]))


class NceStats(torch.autograd.Function):
    """(impl, *Problem) -> the fields of Stats, then those of Mined."""

    @staticmethod
    def forward(ctx, impl, *fields):
        p = Problem(*fields)
        forward = tiled_forward
        if impl == "triton":
            from .triton_forward import triton_forward as forward  # only where triton is wanted

        with torch.cuda.device_of(p.video):  # Triton launches on the current GPU
            stats = forward(p)
        ctx.impl, ctx.numbers = impl, fields[TENSORS:]
        ctx.save_for_backward(*fields[:TENSORS], *stats[:2])
        ctx.mark_non_differentiable(*stats.mined)
        return *stats[:3], *stats.mined

    @staticmethod
    @once_differentiable
    def backward(ctx, g_row, g_col, g_positive, *mined):
        tensors, saved = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
        p = Problem(*tensors, *ctx.numbers)
        backward = tiled_backward
        if ctx.impl == "triton":
            from .triton_backward import triton_backward as backward

        # a constant β does not pay for its gradient
        wants_beta = ctx.needs_input_grad[1 + p._fields.index("beta")]
        upstream = g_row, g_col, g_positive
        with torch.autocast(p.video.device.type, enabled=False), torch.cuda.device_of(p.video):
            grads = backward(p, saved, upstream, wants_beta)

        grads = [grad.to(like.dtype) for grad, like in zip(grads, p)]
        return None, *grads, *[None] * (len(p) - len(grads))
