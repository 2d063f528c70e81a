"""What the op is part of: texts without a video on many ranks, and the loss module."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench import open_clip
from kernels import knowledge_nce
from kernels.distributed import KnowledgeLoss
from losses import LossConfig, clop_loss

B, X, RANKS = 12, 6, 2  # pairs and extra texts of all ranks
CONFIG = LossConfig(beta=2.0, hard_k=3, hard_weight=0.7, mask_false_negatives=True)
EMBEDDINGS = ("video_emb", "text_emb", "extra_text_emb")


def make_batch():
    """Rows of the whole batch, in float64."""
    g = torch.Generator().manual_seed(0)

    def unit(rows, width):
        return F.normalize(torch.randn(rows, width, generator=g, dtype=torch.float64), dim=1)

    known = unit(B + X, 9).abs()
    ids = torch.arange(B + X)[:, None]
    ids[B + 1] = ids[4]  # a false negative among the extra texts, on another rank's side
    return dict(
        video_emb=unit(B, 6),
        text_emb=unit(B, 6),
        extra_text_emb=unit(X, 6),
        knowledge=known[:B],
        extra_knowledge=known[B:],
        signature=ids[:B],
        extra_signature=ids[B:],
    )


def clop_gradients(rank=0, parts=1):
    """(loss, gradients of this rank's rows)."""
    rows = {name: x.chunk(parts)[rank].clone() for name, x in make_batch().items()}
    leaves = [rows[name].requires_grad_() for name in EMBEDDINGS]
    loss, _ = clop_loss(logit_scale=torch.tensor(2.3).double(), config=CONFIG, **rows)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def module_gradients(rank=0, parts=1):
    """The same of the loss module."""
    rows = {name: x.chunk(parts)[rank].clone() for name, x in make_batch().items()}
    leaves = [rows[name].requires_grad_() for name in EMBEDDINGS[:2]]
    known = dict(concepts=rows["knowledge"], signature=rows["signature"])
    scale = torch.tensor(10.0).double()
    loss = KnowledgeLoss(beta=2.0)(*leaves, scale, output_dict=True, **known)["contrastive_loss"]
    return loss.detach(), torch.autograd.grad(loss, leaves)


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    results = [f(rank, RANKS) for f in (clop_gradients, module_gradients)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """For each loss: (loss, gradients) of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return list(zip(*(torch.load(folder / f"{rank}.pt") for rank in range(RANKS))))


@pytest.mark.parametrize("which, alone", [(0, clop_gradients), (1, module_gradients)])
def test_two_ranks_are_one_process(which, alone, by_ranks):
    """The mean over the ranks has the loss and the gradients of one process."""
    loss, grads = alone()
    losses, rank_grads = zip(*by_ranks[which])
    torch.testing.assert_close(sum(losses) / RANKS, loss)
    for grad, parts in zip(grads, zip(*rank_grads)):
        assert grad.norm() > 0
        torch.testing.assert_close(torch.cat(parts) / RANKS, grad)


def test_the_module_is_the_op():
    batch = make_batch()
    loss, _ = knowledge_nce(
        batch["video_emb"],
        batch["text_emb"],
        math.log(10.0),
        concepts=batch["knowledge"],
        beta=2.0,
        signature=batch["signature"],
    )
    torch.testing.assert_close(module_gradients()[0], loss)


def test_extra_texts_may_be_the_hardest():
    """A copy of a caption with another meaning: the second InfoNCE sees it too."""
    batch = make_batch()
    copies = dict(
        extra_text_emb=batch["text_emb"][:X], extra_signature=torch.arange(X)[:, None] + 99
    )
    config = LossConfig(hard_k=1, hard_weight=1.0, mask_false_negatives=True)
    pairs = dict(logit_scale=torch.tensor(2.3).double(), config=config)
    for name in ("video_emb", "text_emb", "signature"):
        pairs[name] = batch[name]
    _, without = clop_loss(**pairs)
    _, parts = clop_loss(**pairs, **copies)
    assert parts["hard"] > without["hard"] and parts["nce"] > without["nce"]


def test_open_clips_loss_trains_alike():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch")
    losses = open_clip.compare(open_clip.BenchConfig(steps=10))
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]


def test_the_gpu_session_runs_what_a_cpu_can(tmp_path):
    """Records and a page; what is there is not run again; what needs a GPU says so."""
    pytest.importorskip("triton", reason="triton is not installed")
    flags = ["--device", "cpu", "--small", "--only", "check,profile", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "bench.gpu", *flags]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert "check: status 0" in first.stdout and "profile: needs a GPU" in first.stdout
    assert "check: is there" in second.stdout

    record = json.loads((tmp_path / "check.json").read_text())
    assert len(record["rows"]) == 3 and all(row["right"] for row in record["rows"])
    assert {"device", "versions", "commit", "date", "command"} <= set(record)
    page = (tmp_path / "page.md").read_text()
    assert "| a rank's share |" in page and "## profile\n\nNot run." in page
