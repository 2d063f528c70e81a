"""Muon, the optimizer of the blocks' matrices (https://kellerjordan.github.io/posts/muon/).

The gradient of a matrix has a few large singular values and many small ones: what is common in the
data, and what is rare. Muon makes all of them about 1 before it steps, so that the rare is learned,
too. It is torch.optim.Muon but for the precision: that one multiplies in bfloat16, which takes half
of a step's time on a processor without such instructions (docs/LOG.md).
"""

import torch


class Muon(torch.optim.Optimizer):
    """For matrices only: momentum (Nesterov), then the nearest orthogonal matrix."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(mean, momentum))
                # a tall matrix has longer columns
                update *= max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U Vᵀ of the matrix's singular value decomposition U S Vᵀ, by matrix products alone.

    Each step is an odd polynomial of the matrix, so it acts on the singular values: it drives all
    in (0, 1] into 0.7 … 1.2. The coefficients are those of the post above.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x  # the products below are then smaller
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)  # 3.4445 x − 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x
    return (x.T if is_tall else x).to(matrix.dtype)
