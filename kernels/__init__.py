"""One op: contrastive loss with knowledge in its logits, and its hardest negatives, without the
similarity matrix.

    from kernels import knowledge_nce loss, mined = knowledge_nce(video_emb, text_emb, logit_scale,
    concepts=c, beta=b, signature=ids, k=16)

CLOP's contrastive step compares every video of a batch with every text: B pairs, B² logits

    a_ij = s · v_i·t_j + β · κ_ij  (j ≠ i)        a_ii = s · v_i·t_i        s = exp(logit_scale), at most 100

where κ, the overlap of two captions' concepts, pushes harder on those that know nearly the same,
and where pairs that share a signature id (same video, same knowledge) are no negatives at all.
Three things are wanted of the matrix a: the mass of the negatives in each row and each column (a
log-sum-exp each), the positives, and the k hardest negatives of each row and column. The loss is
InfoNCE in both directions,

    loss = ½ mean_i softplus(row_negatives_i − a_ii) + ½ mean_j softplus(col_negatives_j − a_jj)

Why not just write the matrix? At B = 65,536 and E = 512 its logits take 2·B²·E = 4.4 TFLOP, 6 ms of
an H100's matrix unit; but B² floats are 16 GiB, and eager PyTorch moves about 16 such matrices
through memory in a step: over 90 ms of traffic, and more memory than the card has. All that must be
*kept* is 2·B·(1 + 2k) numbers. So the matrix is made tile by tile in fast memory, reduced on the
spot, thrown away, and made once more in the backward.

Read in this order; each file is one idea (docs/kernel.md has the picture, the bytes and the
numbers):

    reference.py        the definition: the whole matrix in plain PyTorch
    tiled.py            CPU: row tiles with recompute in plain PyTorch; online log-sum-exp
    autograd.py         the operator around the tiled and the Triton version: autograd,
                        torch.compile
    triton_layout.py    GPU: how the problem lies in memory, so that inner loops have no special
                        case
    triton_forward.py   GPU: both log-sum-exps with a fixed shift; running top-k by lanes
    triton_mining.py    GPU: from lanes to the exact top-k: certificate and repair
    triton_backward.py  GPU: a slab of dA, then two matrix products
    aot.py              what the compiler makes of each, checked without a GPU

`impl` picks the version: "auto" is triton on CUDA and tiled on a CPU; the choice is printed once.
All agree on inputs, outputs, masks and the order of ties.
"""

import importlib.util
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import nce_stats
from kernels.reference import (
    Mined,
    Stats,
    accumulate_dtype,
    assert_finite,
    exact_topk,
    reference_stats,
)

__all__ = ["Mined", "Stats", "knowledge_nce", "knowledge_nce_stats", "merge_hardest"]

Impl = Literal["auto", "reference", "tiled", "triton"]
MAX_SCALE = 100.0  # CLIP's own clamp of exp(logit_scale)
_announced = set()


# torch.compile: decided, and printed, when the graph is made
@torch.compiler.assume_constant_result
def choose_impl(impl: Impl, device_type: str) -> str:
    """ "auto" becomes triton on CUDA where it is installed, tiled on a CPU, reference elsewhere;
    printed once each.
    """
    assert impl in ("auto", "reference", "tiled", "triton"), (
        f"impl = {impl!r}: auto, reference, tiled or triton"
    )
    if impl == "auto":
        has_triton = device_type == "cuda" and importlib.util.find_spec("triton") is not None
        impl = "triton" if has_triton else "tiled" if device_type == "cpu" else "reference"
    if (impl, device_type) not in _announced:
        _announced.add((impl, device_type))
        print(f"contrastive op: {impl} on {device_type}", flush=True)
    return impl


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
    impl: Impl = "auto",
    check: bool | None = None,
) -> Stats:
    """`Stats` of N local video rows against M global text columns: what several GPUs need of the
    op.

    video_rows [N, E], text_cols [M, E]: unit rows, fp32, fp16 or bf16 (fp64: reference and tiled
    only); sums are fp32
        (fp64). Under autocast they are cast as for a matmul.
    logit_scale: the learned log, a 0-dim tensor or a float. beta: likewise, the weight of κ. Both
    may ask for a gradient. concepts: ([N, K], [M, K]) knowledge vectors, κ = their dot products;
    data without gradient. None: κ =
    0. signature: ([N] or [N, S], [M] or [M, S]) integer ids; a pair that is equal in *any* of the S
    ids is no negative.
        Several ids say what one cannot: "same video or same knowledge" is not transitive.
    offset: row i's positive is column offset + i. k: how many hard negatives of each row and of
    each column. check: raise FloatingPointError on NaN or inf in the inputs. None: on CPUs only,
    since on a GPU the look costs a
        wait; what is not looked at reaches the loss as NaN.

    Returns Stats(row_negatives [N], col_negatives [M], positive [N], mined), the first three
    differentiable. With one slice of the videos per rank, rows are complete; the ranks' column sums
    meet as `torch.logsumexp(torch.stack(col_negatives of all ranks), 0)`, the columns' hard
    negatives in `merge_hardest`. The log-sum-exp over all, the positive included, is
    `torch.logaddexp(negatives, positive)`.
    """
    n, m, device = len(video_rows), len(text_cols), video_rows.device
    assert video_rows.ndim == text_cols.ndim == 2 and video_rows.shape[1] == text_cols.shape[1], (
        f"embeddings [N, E] and [M, E], not {tuple(video_rows.shape)} and {tuple(text_cols.shape)}"
    )
    assert 0 <= offset and offset + n <= m, (
        f"row i's positive is column {offset} + i: {n} rows do not fit into {m}"
    )
    assert n > 0 and k >= 0, f"n = {n}, k = {k}"
    assert concepts is not None or isinstance(beta, Tensor) or beta == 0, (
        f"beta = {beta} without concepts"
    )
    for name, pair in (("concepts", concepts), ("signature", signature)):
        assert pair is None or (len(pair[0]), len(pair[1])) == (n, m), (
            f"{name}: ([N = {n}, ...], [M = {m}, ...])"
        )
    assert concepts is None or not any(c.requires_grad for c in concepts), (
        "concepts are data: no gradient"
    )
    impl = choose_impl(impl, device.type)
    check = device.type == "cpu" if check is None else check
    if torch.is_autocast_enabled(device.type):
        video_rows, text_cols = (
            x.to(torch.get_autocast_dtype(device.type)) for x in (video_rows, text_cols)
        )
    dtype = accumulate_dtype(video_rows.dtype)
    scale = torch.as_tensor(logit_scale, dtype=dtype, device=device).exp().clamp(max=MAX_SCALE)
    beta = torch.as_tensor(beta, dtype=dtype, device=device)
    if signature is not None:
        signature = tuple(ids[:, None] if ids.ndim == 1 else ids for ids in signature)
    if impl == "reference":
        if (
            check and not torch.compiler.is_compiling()
        ):  # a compiler sees this version's operations, not its numbers
            assert_finite(video_rows, text_cols, scale, beta, concepts)
        with torch.autocast(device.type, enabled=False):
            return reference_stats(
                video_rows, text_cols, scale, beta, concepts, signature, offset, k
            )
    out = nce_stats(
        video_rows.contiguous(),
        text_cols.contiguous(),
        scale,
        beta,
        *(concepts or (None, None)),
        *(signature or (None, None)),
        offset,
        k,
        impl,
        check,
    )
    return Stats(*out[:3], Mined(*out[3:]))


def knowledge_nce(
    video_emb: Tensor,
    text_emb: Tensor,
    logit_scale: Tensor | float,
    *,
    concepts: Tensor | None = None,
    beta: Tensor | float = 0.0,
    signature: Tensor | None = None,
    k: int = 0,
    impl: Impl = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Mined]:
    """(loss, mined) of a square batch, where video i belongs to text i; options as in
    `knowledge_nce_stats`.

    video_emb, text_emb [B, E]; concepts [B, K] or None; signature [B] or [B, S] or None. loss:
    0-dim fp32 (fp64), symmetric InfoNCE of a, 0 where there are no negatives; it has gradients for
    both embeddings,
        logit_scale and beta.
    mined: v2t_index, t2v_index [B, k] int64 and v2t_score, t2v_score [B, k] fp32 (logits a_ij,
    without gradient), hardest
        first, equal scores by lowest index; index −1 and score −inf where a row has fewer than k
        negatives.
    """
    pairs = [None if x is None else (x, x) for x in (concepts, signature)]
    stats = knowledge_nce_stats(
        video_emb,
        text_emb,
        logit_scale,
        concepts=pairs[0],
        signature=pairs[1],
        beta=beta,
        k=k,
        impl=impl,
        check=check,
    )
    rows, cols = (
        F.softplus(negatives - stats.positive)
        for negatives in (stats.row_negatives, stats.col_negatives)
    )
    return (rows.mean() + cols.mean()) / 2, stats.mined


def merge_hardest(index: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(index, score) [N, k]: the k hardest of candidates [N, C] that several ranks mined, equal
    scores by lowest index.

    `index` must already count in global rows (a rank adds its offset to what is not −1).
    """
    index, by_index = index.sort(dim=1)
    place, score = exact_topk(score.gather(1, by_index), k)
    return index.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1), score
