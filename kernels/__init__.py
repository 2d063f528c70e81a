# SPDX-License-Identifier: Apache-2.0
"""One op: contrastive loss with knowledge in its logits, and its hardest negatives, without the
similarity matrix.

    from kernels import knowledge_nce
    loss, mined = knowledge_nce(video_emb, text_emb, logit_scale, concepts=c, beta=b, k=16)

CLOP's contrastive step compares every video of a batch with every text: B pairs, B² logits

    a_ij = s · v_i·t_j + β · κ_ij  (j ≠ i)      a_ii = s · v_i·t_i      s = exp(logit_scale) ≤ 100

κ, the overlap of two captions' concepts, pushes harder on those that know nearly the same. Pairs
that share a signature id (same video, same knowledge) are no negatives at all. Three things are
wanted of the matrix a: the mass of the negatives in each row and each column (a log-sum-exp each),
the positives, and the k hardest negatives of each row and column. The loss is InfoNCE both ways:

    ½ mean_i softplus(row_negatives_i − a_ii) + ½ mean_j softplus(col_negatives_j − a_jj)

Why not just write the matrix? At B = 65,536 its floats take 16 GiB, and eager PyTorch moves about
16 such matrices through memory in a step. All that must be *kept* is 2·B·(1 + 2k) numbers. So the
matrix is made tile by tile in fast memory, reduced on the spot, thrown away, and made once more in
the backward.

Read in this order; each file is one idea (docs/kernel.md has the picture, the bytes, the numbers):

    reference.py        the definition: the whole matrix in plain PyTorch
    tiled.py            CPU: row tiles with recompute in plain PyTorch; online log-sum-exp
    autograd.py         the operator around the tiled and the Triton version
    triton_layout.py    GPU: how the problem lies in memory: inner loops have no special case
    triton_forward.py   GPU: both log-sum-exps with a fixed shift; running top-k by lanes
    triton_mining.py    GPU: from lanes to the exact top-k: certificate and repair
    triton_backward.py  GPU: a slab of dA, then two matrix products

`impl` picks the version. "auto" is triton on CUDA and tiled on a CPU; the choice is printed once.
All agree on inputs, outputs, masks and the order of ties. The folder imports nothing but torch and
triton: it can be copied into another project as it is.
"""

import importlib.util
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import nce_stats
from .reference import (
    Mined,
    Stats,
    accumulate_dtype,
    assert_finite,
    exact_topk,
    reference_stats,
)

__all__ = ["Mined", "Stats", "knowledge_nce", "knowledge_nce_stats", "merge_hardest"]
__version__ = "1.0"

Impl = Literal["auto", "reference", "tiled", "triton"]
MAX_LOGIT_SCALE = math.log(100)  # CLIP's own clamp
announced = set()


# torch.compile: decided, and printed, when the graph is made
@torch.compiler.assume_constant_result
def choose_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> str:
    """ "auto" becomes triton where it runs, tiled on a CPU, reference elsewhere; printed once."""
    assert impl in ("auto", "reference", "tiled", "triton"), f"{impl=}"
    if impl == "auto":
        impl = "tiled" if device.type == "cpu" else "reference"
        if has_triton(device) and dtype != torch.float64:
            impl = "triton"
    if (impl, device.type) not in announced:
        announced.add((impl, device.type))
        print(f"contrastive op: {impl} on {device.type}", flush=True)
    return impl


def has_triton(device: torch.device) -> bool:
    """NVIDIA's, from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    is_installed = importlib.util.find_spec("triton") is not None
    return is_installed and torch.cuda.get_device_capability(device) >= (8, 0)


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
    check: bool | None = None,
) -> Stats:
    """`Stats` of N video rows against M text columns: what several GPUs need of the op.

    video_rows [N, E], text_cols [M, E]   unit rows, fp32, fp16 or bf16 (fp64: not triton). Sums
                  are fp32 (fp64). Under autocast they are cast as for a matmul.
    logit_scale   the learned log, a 0-dim tensor or a float. beta: likewise, the weight of κ. Both
                  may ask for a gradient.
    concepts      ([N, K], [M, K]) knowledge vectors, κ = their dot products; data without gradient.
                  None: κ = 0.
    signature     ([N] or [N, S], [M] or [M, S]) integer ids. A pair that is equal in *any* of the S
                  ids is no negative. Several ids say what one cannot: "same video or same
                  knowledge" is not transitive.
    offset        row i's positive is column offset + i
    k             how many hard negatives of each row and of each column
    dtype         of the products of the Triton version; None: the embeddings' own. float16 is the
                  one for unit rows of float32: gradients are float32 again. (tiled: always sums')
    check         raise FloatingPointError on NaN or inf in the inputs. None: on CPUs only, since on
                  a GPU the look costs a wait; what is not looked at reaches the loss as NaN.

    Returns Stats(row_negatives [N], col_negatives [M], positive [N], mined), the first three
    differentiable. With one slice of the videos per rank, rows are complete. The ranks' column sums
    meet as `torch.logsumexp(torch.stack(col_negatives of all ranks), 0)`, the columns' hard
    negatives in `merge_hardest`. The log-sum-exp over all, the positive included, is
    `torch.logaddexp(negatives, positive)`.
    """
    check_shapes(video_rows, text_cols, concepts, beta, signature, offset, k)
    device = video_rows.device
    impl = choose_impl(impl, device, video_rows.dtype)
    check = device.type == "cpu" if check is None else check
    if torch.is_autocast_enabled(device.type):
        half = torch.get_autocast_dtype(device.type)
        video_rows, text_cols = video_rows.to(half), text_cols.to(half)

    sums = accumulate_dtype(video_rows.dtype)
    # the log is clamped, not its exponential: exp(float32(ln 100)) lies above 100, and a clamp that
    # bites has no gradient
    scale = as_scalar(logit_scale, sums, device).clamp(max=MAX_LOGIT_SCALE).exp()
    beta = as_scalar(beta, sums, device)
    if signature is not None:
        signature = tuple(ids[:, None] if ids.ndim == 1 else ids for ids in signature)

    if impl == "reference":
        # a compiler sees this version's operations, not its numbers
        if check and not torch.compiler.is_compiling():
            assert_finite(video_rows, text_cols, scale, beta, concepts)
        problem = (video_rows, text_cols, scale, beta, concepts, signature, offset, k)
        with torch.autocast(device.type, enabled=False):
            return reference_stats(*problem)
    rows = (video_rows.contiguous(), text_cols.contiguous())
    known = concepts or (None, None)
    ids = signature or (None, None)
    how = (dtype or video_rows.dtype, impl, check)
    out = nce_stats(*rows, scale, beta, *known, *ids, offset, k, *how)
    return Stats(*out[:3], Mined(*out[3:]))


def check_shapes(video_rows, text_cols, concepts, beta, signature, offset: int, k: int) -> None:
    n, m = len(video_rows), len(text_cols)
    assert video_rows.ndim == text_cols.ndim == 2 and video_rows.shape[1] == text_cols.shape[1], (
        f"embeddings [N, E] and [M, E], not {tuple(video_rows.shape)} and {tuple(text_cols.shape)}"
    )
    assert n > 0 and k >= 0, f"{n=}, {k=}"
    assert 0 <= offset and offset + n <= m, (
        f"row i's positive is column {offset} + i: {n} rows do not fit into {m}"
    )
    is_used = not isinstance(beta, Tensor) and beta != 0
    assert concepts is not None or not is_used, f"{beta=} without concepts"
    for name, pair in (("concepts", concepts), ("signature", signature)):
        if pair is not None:
            assert (len(pair[0]), len(pair[1])) == (n, m), f"{name}: ([N = {n}, …], [M = {m}, …])"
    if concepts is not None:
        assert not any(c.requires_grad for c in concepts), "concepts are data: no gradient"


def as_scalar(x: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-dim. Filled on the device: a copy from the host would wait for it."""
    if isinstance(x, Tensor):
        return x.to(device, dtype)
    return torch.full((), x, dtype=dtype, device=device)


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
    **options,
) -> tuple[Tensor, Mined]:
    """(loss, mined) of a square batch, where video i belongs to text i.

    video_emb, text_emb [B, E]; concepts [B, K] or None; signature [B] or [B, S] or None; options
    (beta, k, dtype, impl, check) as in `knowledge_nce_stats`. extra_…: X more texts, negatives of
    all videos, with the concepts and ids that they have if the others have them.

    loss: 0-dim fp32 (fp64), 0 where there are no negatives, with gradients for the embeddings,
    logit_scale and beta. mined: v2t_index, t2v_index [B, k] int64 and v2t_score, t2v_score [B, k]
    fp32 (logits a_ij, without gradient), hardest first, equal scores by lowest index; index −1 and
    score −inf where a row has fewer than k negatives. v2t_index ≥ B is extra text v2t_index − B.
    """
    B = len(video_emb)

    def with_extra(x: Tensor | None, extra: Tensor | None) -> Tensor | None:
        return x if extra_text_emb is None or x is None else torch.cat([x, extra])

    stats = knowledge_nce_stats(
        video_emb,
        with_extra(text_emb, extra_text_emb),
        logit_scale,
        concepts=None if concepts is None else (concepts, with_extra(concepts, extra_concepts)),
        signature=None
        if signature is None
        else (signature, with_extra(signature, extra_signature)),
        **options,
    )
    mined = stats.mined
    mined = mined._replace(t2v_index=mined.t2v_index[:B], t2v_score=mined.t2v_score[:B])
    rows = F.softplus(stats.row_negatives - stats.positive)
    cols = F.softplus(stats.col_negatives[:B] - stats.positive)
    return (rows.mean() + cols.mean()) / 2, mined


def merge_hardest(index: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(index, score) [N, k]: the k hardest of candidates [N, C] that several ranks mined.

    Equal scores by lowest index. `index` must already count in global rows (a rank adds its offset
    to what is not −1).
    """
    index, by_index = index.sort(dim=1)
    place, score = exact_topk(score.gather(1, by_index), k)
    return index.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1), score
