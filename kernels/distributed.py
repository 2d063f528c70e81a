# SPDX-License-Identifier: Apache-2.0
"""The op over many GPUs: rows that reach all ranks, and a loss module for open_clip.

A rank compares its n videos with the captions of *all* ranks: its rows of the B × B similarity. So
captions are gathered, and the gather has a gradient. My caption is a negative in the rows of every
other rank, and what these rows want of it must come home. For N ranks with the loss L = Σ_r L_r:

    forward     all_gather        everybody gets the rows of all
    backward    reduce_scatter    everybody gets Σ_r ∂L_r / ∂(its own rows)

The all_gather of plain PyTorch has no gradient. With it, each rank would only see how its own rows
push: its encoders would get 1/N of the contrastive gradient, while terms without a gather (SKP)
would keep theirs. No error, no warning, worse numbers. Column sums go the other way: every rank has
a number for everybody's captions, and sends each to its owner (`exchange`, an all_to_all).

`KnowledgeLoss` does this in the place of open_clip's ClipLoss:

    loss = KnowledgeLoss()                # was: ClipLoss(local_loss=True, gather_with_grad=True, …)
    loss(image_features, text_features, logit_scale.exp())

The loss of a rank is the mean over its own pairs. DistributedDataParallel averages the gradients,
which makes that the loss of the whole batch. Simplified: all ranks have as many pairs. (CLOP's own
losses.py has unequal shares, and mining.)
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import knowledge_nce_stats

NO_NEGATIVES = -1e30  # −inf in effect, with a gradient of zero instead of NaN


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share_sizes(total: int, parts: int) -> list[int]:
    """`total` rows in `parts` shares, as np.array_split: nearly equal, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def gather(x: Tensor, sizes: list[int]) -> Tensor:
    """[n, …] on each rank, n = sizes[rank] -> [sum(sizes), …] on all, in rank order.

    The gradient goes back to the rank whose row it is. Shorter shares travel with rows of zeros.
    """
    if world_size() == 1:
        return x
    zeros = x.new_zeros(max(sizes) - len(x), *x.shape[1:])
    shares = Gather.apply(torch.cat([x, zeros])).chunk(world_size())
    return torch.cat([share[:size] for share, size in zip(shares, sizes)])


def exchange(x: Tensor, sizes: list[int]) -> Tensor:
    """[B, …] on each rank, what it has to say of everybody's rows -> [world_size, n, …]: what all
    say of mine. With gradient.
    """
    if world_size() == 1:
        return x[None]
    shares = pad_sequence(x.split(sizes), batch_first=True)  # [world_size, max n, …]
    return Exchange.apply(shares)[:, : sizes[dist.get_rank()]]


class Gather(torch.autograd.Function):
    """all_gather of shares of one size; backward reduce_scatter.

    (An all_reduce of the whole gradient, of which each rank keeps its share, would send twice the
    bytes.)
    """

    @staticmethod
    def forward(ctx, x):
        shares = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(shares, x)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, grad):
        shares = list(grad.contiguous().chunk(world_size()))
        mine = torch.empty_like(shares[0])
        dist.reduce_scatter(mine, shares)
        return mine


class Exchange(torch.autograd.Function):
    """all_to_all of shares of one size; backward the same way back."""

    @staticmethod
    def forward(ctx, x):
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        return received

    @staticmethod
    def backward(ctx, grad):
        return Exchange.forward(ctx, grad.contiguous())


class KnowledgeLoss(nn.Module):
    """InfoNCE with knowledge over the pairs of all ranks.

    beta, dtype, impl: see `knowledge_nce_stats`.
    """

    def __init__(self, beta: float = 0.0, dtype: torch.dtype | None = None, impl: str = "auto"):
        super().__init__()
        self.options = dict(beta=beta, dtype=dtype, impl=impl)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        concepts: Tensor | None = None,
        signature: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this rank's pairs, 0-dim; {"contrastive_loss": it} if output_dict.

        image_features, text_features [n, E]: unit rows. logit_scale: exp of the learned log, as
        open_clip passes it. logit_bias: of no effect on a softmax. concepts [n, K], signature [n]
        or [n, S]: see `knowledge_nce`.
        """
        n, rank = len(image_features), dist.get_rank() if dist.is_initialized() else 0
        sizes = [n] * world_size()
        known = [None if x is None else (x, gather(x, sizes)) for x in (concepts, signature)]
        stats = knowledge_nce_stats(
            image_features,
            gather(text_features, sizes),
            logit_scale.log(),
            offset=rank * n,
            concepts=known[0],
            signature=known[1],
            **self.options,
        )

        # every rank has a part of every column; I take the columns of my texts
        columns = exchange(stats.col_negatives, sizes)  # [ranks, n]
        col_negatives = columns.clamp(min=NO_NEGATIVES).logsumexp(0)
        to_text = F.softplus(stats.row_negatives - stats.positive)
        to_image = F.softplus(col_negatives - stats.positive)

        loss = (to_text.mean() + to_image.mean()) / 2
        return {"contrastive_loss": loss} if output_dict else loss
