"""The contrastive op against its definition in float64, and against loops that share no code with
it.

The same tests run twice: here on `reference` and `tiled` (and `triton` where there is a GPU), and,
through `test_in_the_interpreter`, in processes of their own with TRITON_INTERPRET=1, which must be
set before triton is imported, on `triton`. There every problem is padded to 256 x 256 at least, and
takes about a second: so no test has more cases than it needs.
"""

import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import choose_impl, knowledge_nce, knowledge_nce_stats, tiled

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


def problem(n, dim=24, dtype=torch.float32, seed=0, m=None, concepts=12):
    """Unit embeddings [n, dim], [m, dim] with some signal, concept vectors [m, K], ids [m, 2] with
    false negatives, which differ in their upper bits only.
    """
    g = torch.Generator().manual_seed(seed)
    m = m or n
    text = F.normalize(torch.randn(m, dim, generator=g), dim=1)
    video = torch.randn(n, dim, generator=g) / 2 + text[:n] * dim**0.5 / 2
    known = F.normalize((torch.rand(m, concepts, generator=g) < 0.3).float(), dim=1)
    ids = [torch.randint(0, size * m, (m,), generator=g) << 40 for size in (2, 3)]
    video = F.normalize(video, dim=1).to(DEVICE, dtype)
    return video, text.to(DEVICE, dtype), known.to(DEVICE), torch.stack(ids, 1).to(DEVICE)


def make_leaves(video, text, scale, beta, dtype=torch.float32):
    """[video, text, logit_scale, beta], which ask for their gradients."""
    scalars = [torch.tensor(x, dtype=dtype, device=DEVICE) for x in (math.log(scale), beta)]
    return [x.detach().clone().requires_grad_() for x in (video, text, *scalars)]


def forward_and_backward(impl, leaves, concepts=None, ids=None, k=4):
    """(loss, mined) of `make_leaves`, which then have their gradients."""
    known = dict(concepts=concepts, beta=leaves[3], signature=ids)
    loss, mined = knowledge_nce(*leaves[:3], k=k, impl=impl, **known)
    loss.backward()
    return loss, mined


def run(impl, video, text, concepts=None, ids=None, scale=20.0, beta=0.0, k=4, dtype=torch.float32):
    """(loss, mined, [d_video, d_text, d_logit_scale, d_beta]) as float64 on the CPU."""
    leaves = make_leaves(video, text, scale, beta, dtype)
    loss, mined = forward_and_backward(impl, leaves, concepts, ids, k)
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return loss.detach().double().cpu(), mined, [g.double().cpu() for g in grads]


def truth(video, text, concepts=None, ids=None, **options):
    """The definition in float64."""
    concepts = None if concepts is None else concepts.double()
    options["dtype"] = torch.float64
    return run("reference", video.double(), text.double(), concepts, ids, **options)


def plain_logits(video, text, concepts, ids, log_scale, beta):
    """Logits [B, M ≥ B] as anybody would write them, in the dtype of the embeddings."""
    B, dtype = len(video), video.dtype
    positive = torch.eye(B, len(text), dtype=torch.bool, device=DEVICE)
    kappa = (concepts[:B].to(dtype) @ concepts.to(dtype).T).masked_fill(positive, 0)
    logits = log_scale.exp().to(dtype) * (video @ text.T) + beta.to(dtype) * kappa
    same = (ids[:B, None] == ids).any(2) & ~positive
    return logits.masked_fill(same, -torch.inf)


def plain_loss(logits):
    """InfoNCE of [B, M ≥ B], by texts and by videos."""
    B = len(logits)
    target = torch.arange(B, device=DEVICE)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :B].T, target)) / 2


def plain_pytorch(video, text, concepts, ids, scale, beta):
    """(loss, grads) of these: the yardstick of rounding errors."""
    leaves = make_leaves(video, text, scale, beta)
    loss = plain_loss(plain_logits(*leaves[:2], concepts, ids, *leaves[2:]))
    loss.backward()
    return loss.detach().double().cpu(), [x.grad.double().cpu() for x in leaves]


@impls
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16] + [torch.float16] * (not INTERPRETED)
)
@pytest.mark.parametrize("n, scale", [(1, 20.0), (64, 99.9), (129, 14.3)])
def test_error_at_most_twice_plain_pytorchs(impl, dtype, n, scale):
    video, text, concepts, ids = problem(n, dtype=dtype, seed=n)
    known = (video, text, concepts, ids)
    loss, _, grads = run(impl, *known, scale=scale, beta=1.5)
    true_loss, _, true_grads = truth(*known, scale=scale, beta=1.5)
    plain_loss, plain_grads = plain_pytorch(*known, scale, 1.5)

    # plain PyTorch may be exact by luck: allow what the float32 rounding of one logit of size
    # `scale` does to its exponential
    ulp = torch.finfo(torch.float32).eps * max(4, scale / 2)
    assert abs(loss - true_loss) <= 2 * abs(plain_loss - true_loss) + ulp * (1 + abs(true_loss))
    for grad, true, plain in zip(grads, true_grads, plain_grads):
        assert torch.isfinite(grad).all()
        if grad.ndim:  # the result itself is rounded to the dtype of the embeddings
            slack = max(ulp, torch.finfo(dtype).eps) * true.norm()
        else:  # a scalar's gradient is a sum over the batch that cancels: Σ v·dV
            slack = ulp * (true.norm() + true_grads[0].norm() * n**0.5)
        assert (grad - true).norm() <= 2 * (plain - true).norm() + slack


@impls
def test_against_loops(impl):
    """A rectangle with an offset, every number by Python loops over the definition."""
    n, m, offset, k, s, b = 5, 11, 3, 4, 12.0, 2.0
    video, text, concepts, ids = problem(n, m=m, seed=3)
    video = video.roll(1, 0)
    ids[offset + 1, 0] = ids[7, 0]  # at least these share an id: row 1 and column 7
    own = slice(offset, offset + n)
    known = dict(concepts=(concepts[own], concepts), beta=b, signature=(ids[own], ids))
    stats = knowledge_nce_stats(video, text, math.log(s), **known, offset=offset, k=k, impl=impl)

    sim, kappa = (video @ text.T).tolist(), (concepts[own] @ concepts.T).tolist()
    rows, columns = [[] for _ in range(n)], [[] for _ in range(m)]  # of (−logit, index)
    for i in range(n):
        for j in range(m):
            if j != offset + i and not (ids[offset + i] == ids[j]).any():
                logit = s * sim[i][j] + b * kappa[i][j]
                rows[i].append((-logit, j))
                columns[j].append((-logit, i))
    assert 7 not in [j for _, j in rows[1]]

    mined = stats.mined
    for lines, sums, index, score in (
        (rows, stats.row_negatives, mined.v2t_index, mined.v2t_score),
        (columns, stats.col_negatives, mined.t2v_index, mined.t2v_score),
    ):
        for x, line in enumerate(lines):
            total = math.log(sum(math.exp(-z) for z, _ in line))
            assert sums[x].item() == pytest.approx(total, abs=1e-5)
            places = sorted(line)[:k] + [(math.inf, -1)] * (k - len(line))
            assert index[x].tolist() == [y for _, y in places]
            assert score[x].tolist() == pytest.approx([-z for z, _ in places], abs=1e-5)
    positive = [s * sim[i][offset + i] for i in range(n)]
    assert stats.positive.tolist() == pytest.approx(positive, abs=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="float64 is for reference and tiled")
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_gradcheck(impl, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 20)
    video, text, concepts, ids = problem(9, dim=5, dtype=torch.float64)
    known = dict(concepts=(concepts[:6].double(), concepts.double()), signature=(ids[:6], ids))

    def outputs(v, t, s, b):
        return knowledge_nce_stats(v, t, s, beta=b, impl=impl, **known)[:3]

    leaves = make_leaves(video[:6], text, 4.5, 0.7, torch.float64)
    assert torch.autograd.gradcheck(outputs, leaves)


@impls
def test_scale_is_clamped_with_its_gradient(impl):
    video, text, *_ = problem(16)
    losses = []
    # at float32's ln 100, where OpenAI's weights start and train.py clamps to, it still moves
    for log_scale, moves in ((math.log(100.0), True), (math.log(200.0), False)):
        leaf = torch.tensor(log_scale, device=DEVICE, requires_grad=True)
        loss, _ = knowledge_nce(video, text.flip(0), leaf, impl=impl)
        loss.backward()
        assert (leaf.grad != 0).item() == moves
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@impls
@pytest.mark.parametrize("distinct", [1, 12])
def test_duplicates_tie_by_lowest_index(impl, distinct):
    """Entries are small integers over a power of two: every sum is exact, and equal rows are equal
    to the last bit.
    """
    g = torch.Generator().manual_seed(1)
    base = torch.randint(-1, 2, (12, 16), generator=g).float() / 4  # |row| ≤ 1
    which = torch.randint(0, distinct, (2, 48), generator=g)
    video, text = base[which].to(DEVICE)
    _, mined = knowledge_nce(video, text, math.log(16.0), k=12, impl=impl)
    sim = (video @ text.T).fill_diagonal_(-torch.inf)
    for index, matrix in ((mined.v2t_index, sim), (mined.t2v_index, sim.T)):
        assert torch.equal(index, matrix.sort(dim=1, descending=True, stable=True)[1][:, :12])


@impls
def test_fewer_negatives_than_places(impl):
    video, text, concepts, ids = problem(5)
    ids = torch.tensor([1, 1, 1, 2, 3], device=DEVICE)
    _, mined, _ = run(impl, video, text, ids=ids, k=7)
    assert [(row >= 0).sum().item() for row in mined.v2t_index] == [2, 2, 2, 4, 4]
    assert (torch.isinf(mined.v2t_score) == (mined.v2t_index < 0)).all()

    loss, mined, grads = run(impl, video, text, concepts, ids * 0, beta=1.0)
    assert loss == 0 and all((g == 0).all() for g in grads)
    assert (mined.v2t_index == -1).all() and (mined.t2v_score == -torch.inf).all()
    loss, mined, grads = run(impl, video[:1], text[:1], k=3)
    assert loss == 0 and all((g == 0).all() for g in grads)
    assert mined.t2v_index.tolist() == [[-1, -1, -1]]


@impls
def test_solved_batch_keeps_its_digits(impl):
    """v = t at scale 60: the loss is tiny, and lse − positive would be all rounding."""
    text = problem(48, dim=16)[1]
    loss, _, grads = run(impl, text, text, scale=60.0)
    true_loss, _, true_grads = truth(text, text, scale=60.0)
    assert loss.item() == pytest.approx(true_loss.item(), rel=2e-5)
    for grad, true in zip(grads, true_grads):
        assert (grad - true).norm() <= 2e-5 * true.norm()


@impls
@pytest.mark.parametrize("broken", ["text", "concepts"])
def test_nan_reaches_the_loss(impl, broken):
    video, text, concepts, _ = problem(8)
    named = dict(text=text, concepts=concepts)
    named[broken][-1, -1] = math.nan
    loss, mined = knowledge_nce(video, text, 2.0, k=3, concepts=concepts, beta=1.0, impl=impl)
    assert not torch.isfinite(loss)
    assert (mined.v2t_index < 8).all()


@pytest.mark.skipif(INTERPRETED, reason="the same for all versions")
def test_programmers_mistakes_are_assertions():
    video, text, concepts, ids = problem(6)
    wrong = {
        "beta": dict(beta=1.0),
        "impl": dict(impl="fast"),
        "signature": dict(signature=ids[:3]),
    }
    for said, option in wrong.items():
        with pytest.raises(AssertionError, match=said):
            knowledge_nce(video, text, 1.0, **option)
    with pytest.raises(AssertionError, match="do not fit"):
        knowledge_nce_stats(video, text[:4], 1.0)


@pytest.mark.skipif(INTERPRETED, reason="the compiler does not look at the op")
@impls
def test_in_a_compiled_step(impl):
    """The compiler leaves the op alone, and takes what stands around it."""
    video, text, concepts, ids = problem(21)
    options = dict(concepts=concepts, signature=ids, k=3, impl=impl)

    def step(v, t, s):
        loss, mined = knowledge_nce(F.normalize(v, dim=1), t, s, beta=1.0, **options)
        return loss * 2 + mined.v2t_score.sum() * 0

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        leaves = make_leaves(video, text, 20.0, 1.0)[:3]
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


@impls
def test_products_in_half_precision_gradients_in_full(impl):
    """dtype= rounds the embeddings for the products only: a gradient of 1 / 2B stays what it is."""
    (video, text, concepts, ids), dtype = problem(40), torch.float16
    options = dict(concepts=concepts, beta=1.0, signature=ids, k=3, impl=impl)
    leaves = [x.clone().requires_grad_() for x in (video, text)]
    loss, mined = knowledge_nce(*leaves, 3.0, dtype=dtype, **options)
    loss.backward()

    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # without a word, that of autocast
        by_autocast, _ = knowledge_nce(video, text, 3.0, **options)
    named, _ = knowledge_nce(video, text, 3.0, dtype=torch.bfloat16, **options)
    assert by_autocast.dtype == torch.float32 and by_autocast == named

    rounded = [x.to(dtype).float().requires_grad_() for x in (video, text)]
    expected, expected_mined = knowledge_nce(*rounded, 3.0, **options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3 if impl == "triton" else 1e-6)
    assert torch.equal(mined.v2t_index, expected_mined.v2t_index)
    for leaf, right in zip(leaves, rounded):
        assert leaf.grad.dtype == torch.float32
        error = 4 * torch.finfo(dtype).eps if impl == "triton" else 1e-6
        assert (leaf.grad - right.grad).norm() <= error * right.grad.norm()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps its rows in float32")
@pytest.mark.parametrize("major, family", [(8, "small"), (9, "hopper"), (10, "blackwell")])
def test_float32_embeddings_reach_the_matrix_unit(major, family, monkeypatch):
    """Training hands the op float32; with dtype=float16 it gets the tiles of half precision."""
    layout = pytest.importorskip("kernels.triton_layout")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    video, _, concepts, ids = problem(30)
    for dtype, expected in ((torch.float16, family), (torch.float32, "fp32")):
        rows, _ = layout.pack_rows(video, concepts, list(ids.T), dtype)
        assert layout.tile_for("mine", rows) == layout.TILES[expected]["mine"]


def test_auto_is_triton_only_where_it_runs(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    cuda, capability = torch.device("cuda"), [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_impl("auto", cuda, torch.float16) == "triton"
    assert choose_impl("auto", cuda, torch.float64) == "tiled"
    assert choose_impl("auto", torch.device("cpu"), torch.float32) == "tiled"
    capability[:] = 7, 5  # Turing
    assert choose_impl("auto", cuda, torch.float16) == "tiled"
    capability[:] = 9, 4  # what an MI300 says
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert choose_impl("auto", cuda, torch.float16) == "tiled"


@pytest.mark.skipif(INTERPRETED, reason="about the tiled version")
def test_a_constant_beta_does_not_pay_for_a_gradient():
    video, text, concepts, _ = problem(30)
    video.requires_grad_()
    flop = []
    for beta in (1.0, torch.tensor(1.0, requires_grad=True)):
        loss, _ = knowledge_nce(video, text, 3.0, concepts=concepts, beta=beta, impl="tiled")
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flop.append(counter.get_total_flops())
    assert 0 < flop[0] < flop[1]


class Operations(TorchDispatchMode):
    """Remembers which operations ran, and the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        out = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's host code")
def test_nothing_waits_for_the_gpu(monkeypatch):
    """No number is copied from the host or read back: both would wait, and forbid CUDA graphs."""
    from kernels import triton_backward, triton_forward  # noqa: F401

    # the interpreter's own launches do copy: only the code around them counts
    kernels = ("triton_forward.forward_kernel", "triton_backward.slab_kernel")
    for kernel in (*kernels, "triton_layout.mark_cells", "triton_mining.mining_kernel"):
        monkeypatch.setattr(f"kernels.{kernel}", mock.MagicMock())
    video, text, *known = problem(40)
    leaves = make_leaves(video, text, 20.0, 1.0)
    with Operations() as mode:
        forward_and_backward("triton", leaves, *known)
        knowledge_nce(video, text, 3.0, impl="triton")
    assert not mode.names & {"lift_fresh", "_local_scalar_dense", "nonzero"}


@pytest.mark.skipif(INTERPRETED is CUDA, reason="needs a GPU or the interpreter")
def test_warm_up_kernel():
    from kernels.triton_warmup import row_lse

    video, text, *_ = problem(64, m=192, dim=64)
    expected = (20.0 * video.double() @ text.double().T).logsumexp(1)
    assert (row_lse(video, text, 20.0) - expected).abs().max() <= 1e-5


@impls
def test_extra_texts_are_negatives_of_every_video(impl):
    """Texts without a video: they add columns to the rows' sums, and lose nothing themselves."""
    B, k = 30, 4
    video, text, concepts, ids = problem(B, m=B + 11)
    ids[B + 2] = ids[5]  # a false negative among the extra texts
    leaves = [x.clone().requires_grad_() for x in (video, text[:B], text[B:])]
    extra = dict(extra_text_emb=leaves[2], extra_concepts=concepts[B:], extra_signature=ids[B:])
    known = dict(concepts=concepts[:B], beta=1.5, signature=ids[:B])
    loss, mined = knowledge_nce(*leaves[:2], math.log(20.0), **known, **extra, k=k, impl=impl)
    grads = torch.autograd.grad(loss, leaves)

    plain = [x.detach().double().requires_grad_() for x in leaves]
    scalars = [torch.tensor(x, device=DEVICE) for x in (math.log(20.0), 1.5)]
    logits = plain_logits(plain[0], torch.cat(plain[1:]), concepts, ids, *scalars)
    expected = plain_loss(logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, true in zip(grads, torch.autograd.grad(expected, plain)):
        assert grad.norm() > 0 and (grad - true).norm() <= 1e-5 * true.norm()

    negatives = logits.detach().fill_diagonal_(-torch.inf)
    assert torch.equal(mined.v2t_index, negatives.topk(k, 1).indices)
    assert (mined.v2t_index >= B).any()
    assert torch.equal(mined.t2v_index, negatives[:, :B].T.topk(k, 1).indices)


@pytest.mark.skipif(INTERPRETED, reason="about the tiled version")
def test_tiled_never_makes_the_matrix():
    video, text, *known = problem(300, dim=8, concepts=3)
    leaves = make_leaves(video, text, 20.0, 1.0)
    with Operations() as mode:
        forward_and_backward("tiled", leaves, *known)
    assert 900 <= mode.largest <= 300 * (8 + 3), (
        "tiles of 1000 elements, embeddings with concepts, but no 300 x 300"
    )


@pytest.mark.skipif(INTERPRETED, reason="about the tiled version")
@pytest.mark.parametrize("order", ["random", "harder and harder", "ties"])
def test_columns_are_mined_over_many_tiles(order, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 19 * 213)
    video, text, _, ids = problem(133, m=213, dim=8)
    if order == "harder and harder":  # every row beats all before it, in every column
        video = video * torch.arange(1, 134, device=DEVICE)[:, None]
        text = text.abs() * video.sign().sum(0).sign()
    elif order == "ties":
        video, text = video.sign(), text.sign()
        ids[::2] = 0  # columns that meet many tiles without a negative
    pairs = dict(signature=(ids[70:203], ids), offset=70, k=3)  # 213 > 2 · 3 groups of columns
    impls = ("tiled", "reference")
    results = [knowledge_nce_stats(video, text, 0.0, impl=impl, **pairs) for impl in impls]
    mined, expected = (stats.mined for stats in results)
    assert mined.v2t_index.equal(expected.v2t_index) and mined.t2v_index.equal(expected.t2v_index)
    torch.testing.assert_close(mined.t2v_score, expected.t2v_score)


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's tiles")
@pytest.mark.parametrize("family, k", [("hopper", 0), ("hopper", 5), ("small", 5)])
def test_shipped_tiles(family, k, monkeypatch):
    """Tile shapes, splits of two tiles, two slabs: small problems reach none of them.

    Errors against float64 are at most twice those of the reference in float32.
    """
    from kernels import triton_backward, triton_forward, triton_layout

    monkeypatch.setitem(triton_layout.TILES, "fp32", triton_layout.TILES[family])
    monkeypatch.setattr(triton_backward, "SLAB", 512 * 256)
    monkeypatch.setattr(triton_forward, "LANES", 128)
    n, m, offset = 260, 300, 30
    video, text, concepts, ids = problem(n, m=m, dim=70)
    own = slice(offset, offset + n)
    upstream = [torch.linspace(-1, 1, size) for size in (n, m, n)]

    def run_with(impl, dtype):
        leaves = make_leaves(video.to(dtype), text.to(dtype), 33.0, 1.5, dtype)
        known = dict(concepts=(concepts[own].to(dtype), concepts.to(dtype)), beta=leaves[3])
        known |= dict(signature=(ids[own], ids), offset=offset)
        stats = knowledge_nce_stats(*leaves[:3], **known, k=k, impl=impl)
        total = sum((x * u).sum() for x, u in zip(stats, upstream))
        return (*stats[:3], *torch.autograd.grad(total, leaves)), stats.mined

    fast, mined = run_with("triton", torch.float32)
    plain, _ = run_with("reference", torch.float32)
    true, expected = run_with("reference", torch.float64)
    for a, b, right in zip(fast, plain, true):
        # and what the rounding of a logit of size s does to its exponential
        rounding = torch.finfo(torch.float32).eps * 33 / 2 * right.norm()
        assert (a - right).norm() <= 2 * (b - right).norm() + rounding
    assert torch.equal(mined.v2t_index, expected.v2t_index)
    assert torch.equal(mined.t2v_index, expected.t2v_index)


def opposite(low, high, n=256):
    """Videos and texts [n, 2] with all cosines between low and high."""
    angle = torch.linspace(0, 1, n, device=DEVICE) * (math.acos(low) - math.acos(high)) / 2
    video = torch.stack([angle.cos(), angle.sin()], 1)
    angle = math.acos(high) + (math.acos(low) - math.acos(high)) / 2 + angle
    return video, torch.stack([angle.cos(), angle.sin()], 1)


@impls
@pytest.mark.parametrize("low, high", [(-0.92, -0.64), (-0.5, 0.1)])
def test_far_below_the_bound_it_is_right_or_nan(impl, low, high):
    """All logits at scale 100 far below the bound of 100: a fixed shift loses them in float32."""
    video, text = opposite(low, high)
    loss, _, grads = run(impl, video, text, scale=100.0)
    if impl == "triton" and high < -0.5:
        assert loss.isnan() and grads[0].isnan().all() and grads[1].isnan().all()
        return
    true_loss, _, true_grads = truth(video, text, scale=100.0)
    alone = torch.arange(256, device=DEVICE)[:, None]
    _, plain_grads = plain_pytorch(video, text, video[:, :0], alone, 100.0, 0.0)
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-5)
    # a row's gradient is a sum of about equal unit vectors that cancels; so is its rounding
    rounding = torch.finfo(torch.float32).eps * 50 * 100 / 256**0.5
    for grad, true, plain in zip(grads[:3], true_grads, plain_grads):
        assert (grad - true).norm() <= 2 * (plain - true).norm() + rounding


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton version's lanes")
def test_lanes_are_repaired(monkeypatch):
    """Every row's hardest negatives in one lane, which keeps two: text 0 of each tile of 64."""
    n, k = 512, 6
    order = torch.arange(n)
    first = torch.where(order % 64 == 0, 0.75, 0.25) - order / 4096
    text = torch.stack([first, (1 - first**2).sqrt()] + [torch.zeros(n)] * 6, 1)
    video = torch.zeros(n, 8)
    video[:, 0] = 1 - order / 1024  # no ties in the other direction
    monkeypatch.setattr("kernels.triton_forward.LANES", 32)
    _, mined = knowledge_nce(video, text, math.log(10.0), k=k, impl="triton")
    expected = [[j for j in range(0, n, 64) if j != i][:k] for i in range(n)]
    assert mined.v2t_index.tolist() == expected


@pytest.mark.skipif(INTERPRETED, reason="about the CPU's versions")
def test_demo():
    """The versions agree, and each says once that it was chosen."""
    command = [sys.executable, "-m", "kernels"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    hardest = [line.split(": ")[-1] for line in said.splitlines() if "loss" in line]
    assert len(hardest) == 2 and hardest[0] == hardest[1], said
    assert said.count("contrastive op: tiled on cpu") == 1, said


HALF = "error_at_most or duplicates or shipped_tiles"


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.parametrize("chosen", [HALF, f"not ({HALF})"])
def test_in_the_interpreter(chosen):
    """In two halves, so that no test takes a minute."""
    pytest.importorskip("triton", reason="triton is not installed")
    flags = ["-x", "-p", "no:cacheprovider", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *flags, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
