# SPDX-License-Identifier: Apache-2.0
"""One op: contrastive loss with knowledge in its logits, and its hardest negatives, without the
similarity matrix.

    from kernels import knowledge_nce
    loss, mined = knowledge_nce(
        video_emb, text_emb, logit_scale, concepts=c, beta=b, signature=ids, k=16
    )

CLOP's contrastive step compares every video of a batch with every text: B pairs, B² logits

    a_ij = s · v_i·t_j + β · κ_ij  (j ≠ i)      a_ii = s · v_i·t_i      s = exp(logit_scale) ≤ 100

κ is the overlap of two captions' concepts. It pushes harder on those that know nearly the same.
Pairs that share a signature id (same video, same knowledge) are no negatives at all. Three things
are wanted of the matrix a: a log-sum-exp over the negatives of each row and of each column, the
positives, and the k hardest negatives of each row and column. The loss is InfoNCE in both
directions,

    loss = ½ mean_i softplus(row_negatives_i − a_ii) + ½ mean_j softplus(col_negatives_j − a_jj)

Why not write the matrix? At B = 65,536 it has 16 GiB in float32, and eager PyTorch moves about 16
such matrices through memory in a step, more than a card holds. All that must be *kept* is
2·B·(1 + 2k) numbers. So the matrix is made tile by tile in fast memory, reduced on the spot, thrown
away, and made once more in the backward.

Read in this order; each file is one idea (docs/kernel.md has the picture, the bytes, the numbers):

    reference.py        the definition: the whole matrix in plain PyTorch
    tiled.py            CPU: row tiles, recomputed in the backward; online log-sum-exp
    autograd.py         the operator around the tiled and the Triton version
    triton_layout.py    GPU: the problem in memory, so that inner loops have no special case
    triton_forward.py   GPU: both log-sum-exps with a fixed shift; a running top-k by lanes
    triton_mining.py    GPU: from lanes to the exact top-k: certificate and repair
    triton_backward.py  GPU: a slab of dA, then two matrix products
    distributed.py      a loss module that gathers over the GPUs, in the place of open_clip's

`impl` picks the version: "auto" is triton on an NVIDIA GPU of the last years, else tiled. The
choice is printed once. All versions agree on inputs, outputs, masks and the order of ties. The
folder needs torch and triton, and nothing from outside: copy it.
"""

import functools
import importlib.util
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import nce_stats
from .reference import (
    Mined,
    Problem,
    Stats,
    accumulate_dtype,
    merge_hardest,
    reference_stats,
)

__version__ = "0.1.0"
__all__ = ["Mined", "Stats", "choose_impl", "knowledge_nce", "knowledge_nce_stats", "merge_hardest"]

Impl = Literal["auto", "reference", "tiled", "triton"]
# CLIP's own clamp, of the log: exp(float32(ln 100)) lies above 100, and would lose its gradient
MAX_LOG_SCALE = math.log(100)


def choose_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> str:
    """The version that `impl` names; "auto": triton where it runs, else tiled. Printed once."""
    assert impl in get_args(Impl), f"impl = {impl!r}: auto, reference, tiled or triton"
    if impl == "auto":
        impl = "triton" if dtype != torch.float64 and runs_triton(device) else "tiled"
    announce(impl, device.type)
    return impl


def runs_triton(device: torch.device) -> bool:
    """NVIDIA from Ampere on, with triton installed."""
    if device.type != "cuda" or torch.version.hip or not importlib.util.find_spec("triton"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def announce(impl: str, device_type: str) -> None:
    print(f"contrastive op: {impl} on {device_type}", flush=True)


@torch.compiler.disable  # a compiler leaves the op alone
def knowledge_nce_stats(
    video_rows: Tensor,
    text_cols: Tensor,
    logit_scale: Tensor | float,
    *,
    concepts: tuple[Tensor, Tensor] | None = None,
    beta: Tensor | float = 0.0,
    signature: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    k: int = 0,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Stats:
    """`Stats` of N local videos against M global texts: what several GPUs need of the op.

    video_rows [N, E], text_cols [M, E]: unit rows in float32, float16 or bfloat16 (float64 not with
    triton). Sums are float32 (float64).
    logit_scale: the learned log, 0-dim tensor or float. beta: the weight of κ, likewise. Both may
    ask for a gradient.
    concepts: ([N, K], [M, K]) knowledge vectors; κ = their dot products. Data without gradient.
    None: κ = 0.
    signature: ([N] or [N, S], [M] or [M, S]) integer ids. A pair that is equal in *any* of the S
    ids is no negative. ("Same video or same knowledge" is not transitive: one id cannot say it.)
    offset: the positive of row i is column offset + i.
    k: how many hard negatives of each row and of each column.
    dtype: the embeddings are rounded to it for the products. Gradients keep the dtype of the
    embeddings. None: that of autocast, else none is rounded. A GPU multiplies float16 many times
    faster than float32; for unit rows float16 keeps 3 more bits than bfloat16.

    NaN or inf in the inputs reach the loss as NaN: the caller looks.

    Returns Stats(row_negatives [N], col_negatives [M], positive [N], mined). With one slice of the
    videos per rank, rows are complete. The ranks' columns meet as
    `torch.logsumexp(torch.stack(col_negatives of all ranks), 0)`, and their hard negatives in
    `merge_hardest`.
    """
    n, m, device = len(video_rows), len(text_cols), video_rows.device
    assert video_rows.ndim == text_cols.ndim == 2 and video_rows.shape[1] == text_cols.shape[1], (
        f"embeddings [N, E] and [M, E], not {tuple(video_rows.shape)} and {tuple(text_cols.shape)}"
    )
    assert 0 <= offset <= m - n, (
        f"row i's positive is column {offset} + i: {n} rows do not fit into {m}"
    )
    assert concepts or isinstance(beta, Tensor) or beta == 0, f"beta = {beta} without concepts"

    # without knowledge: no columns of concepts, no ids
    concepts = concepts or (video_rows.new_empty(n, 0), text_cols.new_empty(m, 0))
    signature = signature or [torch.empty(x, 0, dtype=int, device=device) for x in (n, m)]
    for name, pair in (("concepts", concepts), ("signature", signature)):
        assert (len(pair[0]), len(pair[1])) == (n, m), f"{name}: ([N = {n}, ...], [M = {m}, ...])"
    ids = [x.reshape(len(x), -1) for x in signature]

    if dtype is None and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    dtype = dtype or torch.promote_types(video_rows.dtype, text_cols.dtype)
    log_scale, beta = (to_scalar(x, video_rows) for x in (logit_scale, beta))
    scale = log_scale.clamp(max=MAX_LOG_SCALE).exp()
    problem = Problem(video_rows, text_cols, scale, beta, *concepts, *ids, offset, k, dtype)

    impl = choose_impl(impl, device, dtype)
    with torch.autocast(device.type, enabled=False):
        return reference_stats(problem) if impl == "reference" else nce_stats(problem, impl)


def to_scalar(x: Tensor | float, like: Tensor) -> Tensor:
    """x as a 0-dim tensor in the dtype of the sums; a float is written on the device, not copied
    to it: a copy would wait for the GPU.
    """
    dtype = accumulate_dtype(like.dtype)
    if isinstance(x, Tensor):
        return x.to(like.device, dtype)
    return torch.full((), x, dtype=dtype, device=like.device)


def knowledge_nce(
    video_emb: Tensor,
    text_emb: Tensor,
    logit_scale: Tensor | float,
    *,
    concepts: Tensor | None = None,
    signature: Tensor | None = None,
    extra_text_emb: Tensor | None = None,
    extra_concepts: Tensor | None = None,
    extra_signature: Tensor | None = None,
    k: int = 0,
    **options,
) -> tuple[Tensor, Mined]:
    """(loss, mined) of a square batch, where video i belongs to text i.

    video_emb, text_emb [B, E]; concepts [B, K] or None; signature [B] or [B, S] or None.
    extra_text_emb [X, E], with extra_concepts [X, K] and extra_signature [X, …] where the batch has
    such: texts without a video, negatives of every video. They are mined as index B + x.
    options: beta, dtype, impl, as in `knowledge_nce_stats`.

    loss: 0-dim float32 (float64), symmetric InfoNCE of a; 0 where there are no negatives. It has
    gradients for all embeddings, logit_scale and beta. mined: `Mined`, with N = M = B.
    """
    B = len(video_emb)
    texts = join(text_emb, extra_text_emb)
    stats = knowledge_nce_stats(
        video_emb,
        texts,
        logit_scale,
        concepts=None if concepts is None else (concepts, join(concepts, extra_concepts)),
        signature=None if signature is None else (signature, join(signature, extra_signature)),
        k=k,
        **options,
    )

    # extra texts have no video to be found: their columns lose nothing
    v2t = F.softplus(stats.row_negatives - stats.positive)
    t2v = F.softplus(stats.col_negatives[:B] - stats.positive)
    return (v2t.mean() + t2v.mean()) / 2, Mined(*(x[:B] for x in stats.mined))


def join(rows: Tensor, extra: Tensor | None) -> Tensor:
    return rows if extra is None else torch.cat([rows, extra])
