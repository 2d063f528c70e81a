"""The contrastive op against its definition in float64, and against loops that share no code with
it.

The same tests run twice: here on `reference` and `tiled` (and `triton` where there is a GPU), and,
through `test_in_the_interpreter`, in a process of their own with TRITON_INTERPRET=1, which must be
set before triton is imported, on `triton`.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import knowledge_nce, knowledge_nce_stats, merge_hardest, tiled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
IMPLS = ["triton"] if INTERPRETED else ["reference", "tiled"] + ["triton"] * CUDA
impls = pytest.mark.parametrize("impl", IMPLS)
torch.set_num_threads(1)  # several test processes share few cores


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """torch.empty gives NaN or the largest integer, so nothing unwritten passes; small problems get
    several tiles.
    """
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(tiled, "TILE", 1000)
    yield
    torch.use_deterministic_algorithms(False)


def problem(n, dim=24, dtype=torch.float32, seed=0, m=None, noise=0.5, concepts=12):
    """Unit embeddings [n, dim], [m, dim] with some signal, concept vectors [m, K], ids [m, 2] with
    false negatives.
    """
    g = torch.Generator().manual_seed(seed)
    m = m or n
    text = F.normalize(torch.randn(m, dim, generator=g), dim=1)
    video = F.normalize(torch.randn(n, dim, generator=g) * noise + text[:n] * dim**0.5 * 0.5, dim=1)
    known = (torch.rand(m, concepts, generator=g) < 0.3).float()
    ids = torch.stack(
        [torch.randint(0, 2 * m, (m,), generator=g), torch.randint(0, 3 * m, (m,), generator=g)], 1
    )
    return (
        video.to(DEVICE, dtype),
        text.to(DEVICE, dtype),
        F.normalize(known, dim=1).to(DEVICE),
        ids.to(DEVICE),
    )


def run(impl, video, text, concepts=None, ids=None, scale=20.0, beta=0.0, k=4, dtype=torch.float32):
    """(loss, mined, [d_video, d_text, d_logit_scale, d_beta]) as float64 on the CPU."""
    leaves = [video.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves += [
        torch.tensor(x, dtype=dtype, device=DEVICE, requires_grad=True)
        for x in (math.log(scale), beta)
    ]
    loss, mined = knowledge_nce(
        *leaves[:3], concepts=concepts, beta=leaves[3], signature=ids, k=k, impl=impl
    )
    loss.backward()
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
    return loss.detach().double().cpu(), mined, [g.double().cpu() for g in grads]


def truth(video, text, concepts=None, ids=None, **options):
    """The definition in float64."""
    concepts = None if concepts is None else concepts.double()
    return run(
        "reference", video.double(), text.double(), concepts, ids, dtype=torch.float64, **options
    )


def plain_pytorch(video, text, concepts, ids, scale, beta):
    """(loss, grads) as anybody would write it, in the dtype of the embeddings: the yardstick of
    rounding errors.
    """
    dtype = video.dtype
    leaves = [video.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves += [torch.tensor(x, device=DEVICE, requires_grad=True) for x in (math.log(scale), beta)]
    logits = leaves[2].exp().to(dtype) * (leaves[0] @ leaves[1].T)
    eye = torch.eye(len(video), dtype=torch.bool, device=DEVICE)
    logits = logits + leaves[3].to(dtype) * (concepts.to(dtype) @ concepts.to(dtype).T).masked_fill(
        eye, 0
    )
    same = (ids[:, None] == ids[None, :]).any(2) & ~eye
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(video), device=DEVICE)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return loss.detach().double().cpu(), [x.grad.double().cpu() for x in leaves]


@impls
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16] + [torch.float16] * (not INTERPRETED)
)
@pytest.mark.parametrize("n, scale", [(1, 20.0), (2, 99.9), (17, 3.0), (64, 99.9), (129, 14.3)])
def test_error_at_most_twice_plain_pytorchs(impl, dtype, n, scale):
    video, text, concepts, ids = problem(n, dtype=dtype, seed=n)
    loss, _, grads = run(impl, video, text, concepts, ids, scale=scale, beta=1.5)
    true_loss, _, true_grads = truth(video, text, concepts, ids, scale=scale, beta=1.5)
    plain_loss, plain_grads = plain_pytorch(video, text, concepts, ids, scale, 1.5)
    # plain PyTorch may be exact by luck: allow what the float32 rounding of one logit of size
    # `scale` does to its exponential
    ulp = torch.finfo(torch.float32).eps * max(4, scale / 2)
    assert abs(loss - true_loss) <= 2 * abs(plain_loss - true_loss) + ulp * (1 + abs(true_loss))
    for name, grad, true, plain in zip(
        ("video", "text", "logit_scale", "beta"), grads, true_grads, plain_grads
    ):
        assert torch.isfinite(grad).all(), name
        if grad.ndim:  # the result itself is rounded to the dtype of the embeddings
            slack = max(ulp, torch.finfo(dtype).eps) * true.norm()
        else:  # a scalar's gradient is a sum over the batch that cancels: Σ v·dV
            slack = ulp * (true.norm() + true_grads[0].norm() * n**0.5)
        assert (grad - true).norm() <= 2 * (plain - true).norm() + slack, name


@impls
def test_against_loops(impl):
    """A rectangle with an offset, every number by Python loops over the definition."""
    n, m, offset, k, s, b = 5, 11, 3, 4, 12.0, 2.0
    video, text, concepts, ids = problem(n, m=m, seed=3)
    video = video.roll(1, 0)
    ids[offset + 1, 0] = ids[7, 0]  # at least these share an id: row 1 and column 7
    kappa = (concepts[offset : offset + n] @ concepts.T).tolist()
    stats = knowledge_nce_stats(
        video,
        text,
        math.log(s),
        concepts=(concepts[offset : offset + n], concepts),
        beta=b,
        offset=offset,
        signature=(ids[offset : offset + n], ids),
        k=k,
        impl=impl,
    )
    sim, ids = (video @ text.T).tolist(), ids.tolist()
    a = {}
    for i in range(n):
        for j in range(m):
            if j != offset + i and not any(x == y for x, y in zip(ids[offset + i], ids[j])):
                a[i, j] = s * sim[i][j] + b * kappa[i][j]
    assert (1, 7) not in a
    for rows, lse, index, score in (
        (True, stats.row_negatives, stats.mined.v2t_index, stats.mined.v2t_score),
        (False, stats.col_negatives, stats.mined.t2v_index, stats.mined.t2v_score),
    ):
        for x in range(n if rows else m):
            line = [
                (-z, (j if rows else i), z) for (i, j), z in a.items() if (i if rows else j) == x
            ]
            hardest = sorted(line)[:k]
            assert lse[x].item() == pytest.approx(
                math.log(sum(math.exp(z) for *_, z in line)), abs=1e-5
            )
            assert index[x].tolist() == [y for _, y, _ in hardest] + [-1] * (k - len(hardest))
            scores = [z for *_, z in hardest] + [-math.inf] * (k - len(hardest))
            assert score[x].tolist() == pytest.approx(scores, abs=1e-5)
    assert stats.positive.tolist() == pytest.approx(
        [s * sim[i][offset + i] for i in range(n)], abs=1e-5
    )


@impls
def test_plain_infonce_without_knowledge(impl):
    video, text, *_ = problem(33)
    logits = 20 * video @ text.T
    target = torch.arange(33, device=DEVICE)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss, mined = knowledge_nce(video, text, math.log(20.0), impl=impl)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mined.v2t_index.shape == mined.t2v_score.shape == (33, 0)


@impls
def test_each_output_has_its_own_gradient(impl):
    """A rectangle with random gradients arriving at all three outputs: what several GPUs need."""
    video, text, concepts, ids = problem(20, m=50, seed=5)
    g = torch.Generator().manual_seed(0)
    upstream = [torch.randn(size, generator=g).to(DEVICE) for size in (20, 50, 20)]
    grads = {}
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        leaves = [
            x.to(DEVICE, dtype).requires_grad_()
            for x in (video, text, torch.tensor(2.5), torch.tensor(1.5))
        ]
        stats = knowledge_nce_stats(
            *leaves[:3],
            concepts=(concepts[30:], concepts),
            beta=leaves[3],
            offset=30,
            signature=(ids[30:], ids),
            impl=name,
        )
        total = sum((x.masked_fill(x == -torch.inf, 0) * u).sum() for x, u in zip(stats, upstream))
        grads[name, dtype] = torch.autograd.grad(total, leaves)
    for fast, true in zip(grads[impl, torch.float32], grads["reference", torch.float64]):
        assert (fast - true).norm() <= 2e-6 * true.norm() + 1e-6


@pytest.mark.skipif(INTERPRETED, reason="float64 is for reference and tiled")
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_gradcheck(impl, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 20)
    video, text, concepts, ids = problem(9, dim=5, dtype=torch.float64)

    def outputs(v, t, s, b):
        stats = knowledge_nce_stats(
            v,
            t,
            s,
            concepts=(concepts[:6].double(), concepts.double()),
            beta=b,
            impl=impl,
            signature=(ids[:6], ids),
        )
        return stats[:3]

    scalars = [
        torch.tensor(x, dtype=torch.float64, device=DEVICE, requires_grad=True) for x in (1.5, 0.7)
    ]
    assert torch.autograd.gradcheck(
        outputs, (video[:6].clone().requires_grad_(), text.requires_grad_(), *scalars)
    )


@impls
def test_scale_is_clamped_with_its_gradient(impl):
    video, text, *_ = problem(16, noise=2.0)
    for log_scale, moves in ((math.log(99.0), True), (math.log(100.0), True), (5.3, False)):
        leaf = torch.tensor(log_scale, device=DEVICE, requires_grad=True)
        loss, _ = knowledge_nce(video, text, leaf, impl=impl)
        loss.backward()
        assert (leaf.grad != 0).item() == moves, log_scale
        if moves:  # at the clamp, too, where CLIP's weights start: the gradient of the definition
            true = truth(video, text, scale=math.exp(log_scale), k=0)[2][2]
            assert leaf.grad.item() == pytest.approx(true.item(), rel=1e-4)
    assert loss.item() == pytest.approx(
        knowledge_nce(video, text, math.log(100.0), impl=impl)[0].item(), rel=1e-6
    )


@impls
def test_constant_similarity_takes_the_lowest_indices(impl):
    n, k = 40, 5
    one = torch.zeros(n, 8, device=DEVICE)
    one[:, 0] = 1
    loss, mined, grads = run(impl, one, one, k=k, scale=8.0)
    assert loss.item() == pytest.approx(math.log(n), rel=1e-6)
    expected = [[j for j in range(n) if j != i][:k] for i in range(n)]
    assert mined.v2t_index.tolist() == expected and mined.t2v_index.tolist() == expected
    assert (mined.v2t_score == 8).all()


@impls
def test_duplicates_tie_by_lowest_index(impl):
    """Entries are small integers over a power of two: every sum is exact, and equal rows are equal
    to the last bit.
    """
    g = torch.Generator().manual_seed(1)
    base = torch.randint(-1, 2, (12, 16), generator=g).float() / 4  # |row| ≤ 1
    video, text = (base[torch.randint(0, 12, (70,), generator=g)].to(DEVICE) for _ in range(2))
    _, mined = knowledge_nce(video, text, math.log(16.0), k=20, impl=impl)
    eye = torch.eye(70, dtype=torch.bool, device=DEVICE)
    sim = (video @ text.T).masked_fill(eye, -torch.inf)
    for index, matrix in ((mined.v2t_index, sim), (mined.t2v_index, sim.T)):
        assert torch.equal(index, matrix.sort(dim=1, descending=True, stable=True)[1][:, :20])


@impls
def test_all_false_negatives_and_none(impl):
    video, text, concepts, ids = problem(19)
    loss, mined, grads = run(
        impl, video, text, concepts, torch.full((19,), 7, device=DEVICE), beta=1.0
    )
    assert loss == 0 and all((g == 0).all() for g in grads)
    assert (mined.v2t_index == -1).all() and (mined.t2v_score == -torch.inf).all()
    masked, free = (
        run(impl, video, text, ids=torch.arange(19, device=DEVICE)),
        run(impl, video, text),
    )
    assert masked[0] == free[0] and torch.equal(masked[1].v2t_index, free[1].v2t_index)


@impls
def test_more_places_than_negatives(impl):
    video, text, *_ = problem(5)
    ids = torch.tensor([1, 1, 1, 2, 3], device=DEVICE)
    _, mined = knowledge_nce(video, text, math.log(20.0), signature=ids, k=7, impl=impl)
    assert [(row >= 0).sum().item() for row in mined.v2t_index] == [2, 2, 2, 4, 4]
    assert (torch.isinf(mined.v2t_score) == (mined.v2t_index < 0)).all()
    loss, mined, grads = run(impl, video[:1], text[:1], k=3)
    assert (
        loss == 0
        and mined.t2v_index.tolist() == [[-1, -1, -1]]
        and all((g == 0).all() for g in grads)
    )


@impls
def test_ids_are_compared_in_all_64_bits(impl):
    video, text, *_ = problem(4)
    ids = torch.tensor([5, 5 + (1 << 32), 5 - (1 << 40), -(1 << 63)], device=DEVICE)
    _, mined = knowledge_nce(video, text, math.log(20.0), signature=ids, k=3, impl=impl)
    assert (mined.v2t_index >= 0).all()


@impls
def test_solved_batch_keeps_its_digits(impl):
    """v = t at scale 100: the loss is tiny, and lse − positive would be all rounding."""
    text = problem(48, dim=16)[1]
    loss, _, grads = run(impl, text, text, scale=60.0)
    true_loss, _, true_grads = truth(text, text, scale=60.0)
    assert loss.item() == pytest.approx(true_loss.item(), rel=2e-5)
    for grad, true in zip(grads, true_grads):
        assert (grad - true).norm() <= 2e-5 * true.norm()


@impls
def test_order_of_the_batch_does_not_matter(impl):
    video, text, concepts, ids = problem(45)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loss, mined, grads = run(impl, video, text, concepts, ids, beta=1.0)
    loss2, mined2, grads2 = run(
        impl, video[order], text[order], concepts[order], ids[order], beta=1.0
    )
    assert loss2.item() == pytest.approx(loss.item(), rel=1e-6)
    back = torch.where(mined2.v2t_index < 0, -1, order[mined2.v2t_index])
    assert torch.equal(back, mined.v2t_index[order])
    assert (grads2[0] - grads[0][order.cpu()]).norm() <= 1e-6


@impls
def test_the_same_bits_every_time(impl):
    inputs = problem(45)
    first, second = (run(impl, *inputs, beta=1.0) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip((*first[1], *first[2]), (*second[1], *second[2])))


@impls
def test_ranks_add_up_to_the_whole(impl):
    """Two ranks with half of the videos each and all texts give the statistics and the mining of
    one.
    """
    video, text, concepts, ids = problem(37)
    options = dict(beta=1.0, k=6, impl=impl)
    whole = knowledge_nce_stats(
        video, text, 3.0, concepts=(concepts, concepts), signature=(ids, ids), **options
    )
    parts = [
        knowledge_nce_stats(
            video[a:b],
            text,
            3.0,
            concepts=(concepts[a:b], concepts),
            signature=(ids[a:b], ids),
            offset=a,
            **options,
        )
        for a, b in ((0, 20), (20, 37))
    ]
    torch.testing.assert_close(torch.cat([p.row_negatives for p in parts]), whole.row_negatives)
    torch.testing.assert_close(
        torch.logsumexp(torch.stack([p.col_negatives for p in parts]), 0), whole.col_negatives
    )
    index = [
        torch.where(p.mined.t2v_index < 0, -1, p.mined.t2v_index + first)
        for p, first in zip(parts, (0, 20))
    ]
    index, _ = merge_hardest(
        torch.cat(index, 1), torch.cat([p.mined.t2v_score for p in parts], 1), 6
    )
    assert torch.equal(index, whole.mined.t2v_index)
    assert torch.equal(torch.cat([p.mined.v2t_index for p in parts]), whole.mined.v2t_index)


@impls
@pytest.mark.parametrize("broken", ["video", "text", "concepts", "scale", "beta"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_an_error_with_a_name(impl, broken, value):
    video, text, concepts, _ = problem(8)
    scale, beta = torch.tensor(2.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    dict(video=video, text=text, concepts=concepts, scale=scale, beta=beta)[broken].view(-1)[-1] = (
        value
    )
    if broken == "scale" and value == math.inf:
        return  # clamped to 100: a value like any other
    with pytest.raises(FloatingPointError, match=broken):
        knowledge_nce(video, text, scale, concepts=concepts, beta=beta, impl=impl, check=True)
    loss, mined = knowledge_nce(
        video, text, scale, concepts=concepts, beta=beta, impl=impl, check=False, k=3
    )
    assert not torch.isfinite(loss)
    assert (mined.v2t_index < 8).all()


@impls
def test_programmers_mistakes_are_assertions(impl):
    video, text, concepts, ids = problem(6)
    with pytest.raises(AssertionError, match="beta"):
        knowledge_nce(video, text, 1.0, beta=1.0, impl=impl)
    with pytest.raises(AssertionError, match="do not fit"):
        knowledge_nce_stats(video, text[:4], 1.0, impl=impl)
    with pytest.raises(AssertionError, match="impl"):
        knowledge_nce(video, text, 1.0, impl="fast")
    with pytest.raises(AssertionError, match="signature"):
        knowledge_nce(video, text, 1.0, signature=ids[:3], impl=impl)


def test_the_choice_is_printed_once(capsys):
    kernels.announced.clear()
    video, text, *_ = problem(4)
    for _ in range(2):
        knowledge_nce(video, text, 1.0)
    assert (
        capsys.readouterr().out
        == f"contrastive op: {'triton on cuda' if CUDA else 'tiled on cpu'}\n"
    )


@impls
def test_autocast_decides_the_dtype_of_the_products_only(impl):
    video, text, *_ = problem(30)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, _ = knowledge_nce(video, text, 3.0, impl=impl)
    assert loss.dtype == torch.float32
    expected, _ = knowledge_nce(video.bfloat16(), text.bfloat16(), 3.0, impl=impl)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the compiler sees the same opaque operator as with tiled")
@impls
def test_under_torch_compile(impl):
    """One graph without a break around the op, forward and backward (the reference breaks it: its
    ties are data).
    """
    video, text, concepts, ids = problem(21)

    def step(v, t, s, b):
        v = F.normalize(v, dim=1)
        loss, mined = knowledge_nce(
            v, t, s, concepts=concepts, beta=b, signature=ids, k=3, impl=impl
        )
        return loss * 2 + mined.v2t_score.sum() * 0

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=impl != "reference")):
        leaves = [video.clone().requires_grad_(), text.clone().requires_grad_()]
        leaves += [torch.tensor(x, device=DEVICE, requires_grad=True) for x in (3.0, 1.0)]
        results.append((function(*leaves), *torch.autograd.grad(function(*leaves), leaves)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@pytest.mark.skipif(INTERPRETED, reason="about the tiled version")
def test_tiled_never_makes_the_matrix():
    video, text, concepts, ids = problem(300, dim=8)
    pair = dict(concepts=(concepts[:, :3], concepts[:, :3]), signature=(ids, ids))
    with _Largest() as mode:
        inputs = video, text, torch.tensor(20.0), torch.tensor(1.0)
        pair |= dict(offset=0, dtype=torch.float32)
        row_negatives, col_negatives, g, *_ = tiled.tiled_forward(*inputs, **pair, k=4)
        saved = dict(row_negatives=row_negatives, col_negatives=col_negatives)
        tiled.tiled_backward(g, g, g, *inputs, **pair, **saved, wants_beta=True)
    assert 900 <= mode.numel <= 300 * (8 + 3), (
        "tiles of 1000 elements, embeddings with concepts, but no 300 x 300"
    )


@pytest.mark.skipif(INTERPRETED, reason="about the tiled version")
@pytest.mark.parametrize("order", ["random", "harder and harder", "ties", "hardly a negative"])
def test_tiled_mining_by_groups_is_exact(order, monkeypatch):
    """So many columns and rows that groups decide, with a rest that fills none."""
    monkeypatch.setattr(tiled, "TILE", 19 * 413)
    video, text, _, ids = problem(133, m=413, dim=8)
    if order == "harder and harder":  # every row beats all before it, in every column
        video, text = (
            video * torch.arange(1, 134, device=DEVICE)[:, None],
            text.abs() * video.sign().sum(0).sign(),
        )
    elif order == "ties":
        video, text = video.sign(), text.sign()
    elif order == "hardly a negative":
        ids = torch.where(
            torch.arange(413, device=DEVICE)[:, None] % 149 == 3, ids, torch.zeros_like(ids)
        )
    pairs = dict(signature=(ids[70:203], ids), offset=70, k=5)
    mined, expected = (
        knowledge_nce_stats(video, text, 0.0, impl=impl, **pairs).mined
        for impl in ("tiled", "reference")
    )
    for name, value, right in zip(mined._fields, mined, expected):
        if name.endswith("index"):
            assert value.equal(right), name
        else:
            torch.testing.assert_close(value, right)


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's tiles")
@pytest.mark.parametrize("family", ["hopper", "blackwell", "ampere"])
@pytest.mark.parametrize("k", [0, 5])
def test_shipped_tiles(family, k, monkeypatch):
    """Tile shapes, tensor descriptors, splits and slabs, of which small problems reach the smallest
    and fewest.
    """
    from kernels import triton_backward, triton_layout

    monkeypatch.setitem(triton_layout.TILES, "fp32", triton_layout.TILES[family])
    monkeypatch.setattr(triton_backward, "SLAB", 512 * 256)  # two slabs
    video, text, concepts, ids = problem(300, m=515, dim=70)
    upstream = [torch.linspace(-1, 1, size) for size in (300, 515, 300)]
    results = []
    for impl in ("triton", "reference"):
        leaves = [
            x.clone().requires_grad_() for x in (video, text, torch.tensor(3.5), torch.tensor(1.5))
        ]
        stats = knowledge_nce_stats(
            *leaves[:3],
            concepts=(concepts[200:500], concepts),
            beta=leaves[3],
            offset=200,
            signature=(ids[200:500], ids),
            k=k,
            impl=impl,
        )
        total = sum((x * u).sum() for x, u in zip(stats, upstream))
        results.append((stats, torch.autograd.grad(total, leaves)))
    (fast, fast_grads), (true, true_grads) = results
    for a, b in zip((*fast[:3], *fast_grads), (*true[:3], *true_grads)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(fast.mined.v2t_index, true.mined.v2t_index)
    assert torch.equal(fast.mined.t2v_index, true.mined.t2v_index)


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's fixed shift")
def test_out_of_range_is_nan_not_wrong():
    video, text, concepts, _ = problem(8)
    loss, _ = knowledge_nce(
        video, text, math.log(100.0), concepts=concepts, beta=100.0, impl="triton"
    )
    assert loss.isnan()
    loss, _ = knowledge_nce(
        video, text, math.log(100.0), concepts=concepts, beta=50.0, impl="triton"
    )
    expected, _ = knowledge_nce(
        video, text, math.log(100.0), concepts=concepts, beta=50.0, impl="reference"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@impls
@pytest.mark.parametrize("low, high", [(-1.0, -1.0), (-0.92, -0.64)])
def test_rows_far_below_the_bound(impl, low, high):
    """At scale 100 with cosines near −1 float32 cannot hold exp of any negative over one shift.

    The definition is right there; a fixed shift must say NaN, in the loss and in the gradient.
    """
    cosine = torch.linspace(low, high, 256, device=DEVICE)
    text = torch.stack([cosine, (1 - cosine**2).sqrt()], 1)
    video = torch.tensor([[1.0, 0.0]], device=DEVICE).expand(256, 2)
    loss, _, grads = run(impl, video, text, scale=100.0, k=0)
    if impl == "triton":
        assert loss.isnan() and all(g.isnan().any() for g in grads[:3])
        return
    true_loss, _, true_grads = truth(video, text, scale=100.0, k=0)
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5)
    for grad, true in zip(grads[:3], true_grads):
        assert (grad - true).norm() <= 1e-5 * (true.norm() + 100)  # logits of size 100 are rounded


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's layout")
def test_rows_without_negatives_are_counted_exactly():
    from kernels.triton_layout import have_negatives

    g = torch.Generator().manual_seed(0)
    for n, m, lines, kinds in ((5, 7, 1, 1), (6, 6, 2, 2), (9, 4, 3, 2), (8, 8, 3, 9)):
        ids = torch.randint(0, kinds, (lines, n + m), generator=g)
        rows, cols = ids[:, :n], ids[:, n:]
        is_negative = (rows[:, :, None] != cols[:, None, :]).all(0)
        found = have_negatives(rows, cols)
        assert torch.equal(found[0], is_negative.any(1)), (n, m, lines)
        assert torch.equal(found[1], is_negative.any(0)), (n, m, lines)


@impls
def test_extra_texts_are_negatives_of_all_videos(impl):
    """Against the definition with these texts as further columns, whose own rows ask nothing."""
    video, text, concepts, ids = problem(14, m=20, seed=4)
    leaves = [x.clone().requires_grad_() for x in (video, text[:14], text[14:])]
    loss, mined = knowledge_nce(
        *leaves[:2],
        3.0,
        concepts=concepts[:14],
        signature=ids[:14],
        extra_text_emb=leaves[2],
        extra_concepts=concepts[14:],
        extra_signature=ids[14:],
        beta=1.0,
        k=3,
        impl=impl,
    )
    grads = torch.autograd.grad(loss, leaves)

    whole = [x.double().requires_grad_() for x in (video, text)]
    a = math.exp(3.0) * whole[0] @ whole[1].T
    a = a + (concepts[:14] @ concepts.T).double() * ~torch.eye(14, 20, dtype=bool, device=DEVICE)
    same = (ids[:14, None] == ids[None]).any(2) & ~torch.eye(14, 20, dtype=bool, device=DEVICE)
    a = a.masked_fill(same, -torch.inf)
    target = torch.arange(14, device=DEVICE)
    true = (F.cross_entropy(a, target) + F.cross_entropy(a[:, :14].T, target)) / 2
    d_video, d_text = torch.autograd.grad(true, whole)
    assert loss.item() == pytest.approx(true.item(), rel=1e-5)
    for grad, wanted in zip(grads, (d_video, d_text[:14], d_text[14:])):
        assert (grad - wanted).norm() <= 1e-5 * wanted.norm()
    assert mined.t2v_index.shape == (14, 3) and (mined.v2t_index >= 14).any()


@pytest.mark.parametrize(
    "device, capability, hip, dtype, chosen",
    [
        ("cuda", (9, 0), None, torch.float32, "triton"),
        ("cuda", (8, 6), None, torch.bfloat16, "triton"),
        ("cuda", (7, 5), None, torch.float16, "reference"),
        ("cuda", (9, 4), "6.2", torch.float16, "reference"),  # ROCm
        ("cuda", (9, 0), None, torch.float64, "reference"),
        ("cpu", None, None, torch.float64, "tiled"),
    ],
)
def test_auto_takes_what_runs(device, capability, hip, dtype, chosen, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.choose_impl("auto", torch.device(device), dtype) == chosen


def test_the_matrix_unit_is_reached(monkeypatch):
    """float32 embeddings with half-precision products take the tiles of the matrix unit."""
    layout = pytest.importorskip("kernels.triton_layout", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    emb, ids = torch.randn(8, 16), torch.arange(8)[None]
    for dtype, family in ((torch.float16, "hopper"), (torch.float32, "fp32")):
        side = layout.pack_side(emb, None, ids, ids[0], ids[0] > 0, 64, dtype)
        assert layout.tile_for("mine", side.rows) == layout.TILES[family]["mine"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert layout.tile_for("sums", side.rows.half()) == layout.TILES["blackwell"]["sums"]


def test_a_constant_beta_pays_for_no_gradient(monkeypatch):
    wants = []
    real = tiled.tiled_backward
    monkeypatch.setattr(
        "kernels.autograd.tiled_backward", lambda *args: wants.append(args[-1]) or real(*args)
    )
    video, text, concepts, _ = problem(9)
    leaf = video.cpu().requires_grad_()
    for beta in (1.0, torch.tensor(1.0, requires_grad=True)):
        loss, _ = knowledge_nce(
            leaf, text.cpu(), 1.0, concepts=concepts.cpu(), beta=beta, impl="tiled"
        )
        loss.backward()
    assert wants == [False, True]


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's lanes")
def test_lanes_are_repaired():
    """Every row's hardest negatives in one lane, which keeps two: text 0 of each tile of 64, in the
    order given.
    """
    from kernels import triton_layout

    n, k = 512, 6
    order = torch.arange(n)
    first = torch.where(order % 64 == 0, 0.75, 0.25) - order / 4096
    text = torch.stack([first, (1 - first**2).sqrt()] + [torch.zeros(n)] * 6, 1)
    video = torch.zeros(n, 8)
    video[:, 0] = 1 - order / 1024  # no ties in the other direction
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_layout, "sort_key", lambda ids: ids[0])
        patch.setattr("kernels.triton_forward.LANES_WANTED", 32)
        _, mined = knowledge_nce(video, text, math.log(10.0), k=k, impl="triton")
    expected = [[j for j in range(0, n, 64) if j != i][:k] for i in range(n)]
    assert mined.v2t_index.tolist() == expected


@pytest.mark.skipif(INTERPRETED, reason="about the CPU's versions")
def test_demo():
    done = subprocess.run(
        [sys.executable, "-m", "kernels"], capture_output=True, text=True, check=True
    )
    hardest = [line.split(": ")[-1] for line in done.stdout.splitlines() if "loss" in line]
    assert len(hardest) == 2 and hardest[0] == hardest[1], done.stdout


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
