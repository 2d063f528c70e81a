# SPDX-License-Identifier: Apache-2.0
"""The op as a loss module for one or many GPUs, in the place of open_clip's ClipLoss.

    loss = KnowledgeLoss()                # was: ClipLoss(local_loss=True, gather_with_grad=True, …)
    loss(image_features, text_features, logit_scale.exp())

Every rank keeps its own videos (rows) and meets the texts of all ranks (columns). So rows are
complete, and the ranks' parts of a column meet in a log-sum-exp. What is gathered keeps its
gradient: a text is a negative in the rows of all ranks, and what these want of it must come home.
The loss of a rank is the mean over its own pairs. DistributedDataParallel averages the gradients,
which makes that the loss of the whole batch.

Simplified: all ranks have as many pairs. (CLOP's own losses.py has unequal shares, and mining.)
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import knowledge_nce_stats

NO_NEGATIVES = -1e30  # −inf in effect, with a gradient of zero instead of NaN


class Gather(torch.autograd.Function):
    """all_gather; backward reduce_scatter, the sum of what all ranks want of my rows."""

    @staticmethod
    def forward(ctx, x):
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x)
        return torch.stack(everyone)

    @staticmethod
    def backward(ctx, grad):
        mine = torch.empty_like(grad[0])
        dist.reduce_scatter(mine, list(grad.contiguous().unbind(0)))
        return mine


def gather(x: Tensor) -> Tensor:
    """[n, …] on each rank -> [ranks, n, …] on all, with gradient."""
    return Gather.apply(x.contiguous()) if dist.is_initialized() else x[None]


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
        known = [None if x is None else (x, gather(x).flatten(0, 1)) for x in (concepts, signature)]
        stats = knowledge_nce_stats(
            image_features,
            gather(text_features).flatten(0, 1),
            logit_scale.log(),
            offset=rank * n,
            concepts=known[0],
            signature=known[1],
            **self.options,
        )

        # every rank has a part of every column; I take the columns of my texts
        columns = gather(stats.col_negatives)[:, rank * n : (rank + 1) * n]  # [ranks, n]
        col_negatives = columns.clamp(min=NO_NEGATIVES).logsumexp(0)
        to_text = F.softplus(stats.row_negatives - stats.positive)
        to_image = F.softplus(col_negatives - stats.positive)

        loss = (to_text.mean() + to_image.mean()) / 2
        return {"contrastive_loss": loss} if output_dict else loss
