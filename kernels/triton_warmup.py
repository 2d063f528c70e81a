# SPDX-License-Identifier: Apache-2.0
"""A first kernel: the log-sum-exp of each row of s · V·Tᵀ, without the matrix.

It has the idea of triton_forward.py, and none of its masks, mining and tuning. A program takes ROWS
videos and walks over all texts, COLS at a time. The tile of logits lives in registers. What stays
of it is a maximum and a sum per row, which the next tile corrects (tiled.py has the equation).

Reading: `tl.arange` numbers the rows of a tile; [:, None] and [None, :] spread them over its two
axes; `tl.load` takes one address per number; `tl.dot` is the matrix unit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

ROWS, COLS, DEPTH = constexpr(64), constexpr(64), constexpr(32)  # of a tile


@triton.jit
def lse_kernel(video, text, out, scale, m, D):
    """out[i] = log Σ_j exp(scale · v_i·t_j) for ROWS rows of video [n, D]; text is [m, D]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    for first in range(0, m, COLS):
        cols = first + tl.arange(0, COLS)
        logits = tl.zeros([ROWS, COLS], tl.float32)
        for d0 in range(0, D, DEPTH):
            d = d0 + tl.arange(0, DEPTH)
            v = tl.load(video + rows[:, None] * D + d[None, :])
            t = tl.load(text + cols[:, None] * D + d[None, :])
            logits = tl.dot(v, t.T, logits, input_precision="ieee")
        logits *= scale

        # online log-sum-exp
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        total *= tl.exp(maximum - new_maximum)
        total += tl.sum(tl.exp(logits - new_maximum[:, None]), 1)
        maximum = new_maximum
    tl.store(out + rows, maximum + tl.log(total))


def row_lse(video: Tensor, text: Tensor, scale: float) -> Tensor:
    """[N] log-sum-exp of the rows of scale · video [N, D] @ text [M, D].T, in float32.

    Simplified: N and M are multiples of 64, D of 32.
    """
    (n, D), m = video.shape, len(text)
    assert n % 64 == m % 64 == D % 32 == 0, f"{n} x {m} x {D}: not whole tiles"
    out = torch.empty(n, device=video.device)
    lse_kernel[n // 64,](video.contiguous(), text.contiguous(), out, scale, m, D)
    return out
