"""distributed.py and train.py on three processes (gloo): the gradients and losses of one process.

The ranks are forked from a server that has PyTorch loaded, form one group, and run all checks in
it.
"""

import contextlib
import importlib.util
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import log_of, losses_of
from test_train import settings as short_run
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import open_clip, scaling
from cli import UserError
from kernels import knowledge_nce
from kernels.distributed import KnowledgeLoss, exchange, gather, share_sizes, world_size
from knowledge import concept_vectors
from losses import LossConfig, clop_loss
from model import CLOP, build_config
from train import TrainConfig, backward
from training.checkpoint import load_checkpoint, resume_checkpoint
from training.processes import Ranks

ROOT = Path(__file__).parent.parent
ALL_ON = LossConfig(skp_weight=0.5, beta=2.0, hard_k=3, hard_weight=0.7, mask_false_negatives=True)
TINY = dict(image_size=16, num_frames=2, video_width=32, video_layers=1, video_heads=2)
TINY |= dict(text_width=32, text_layers=1, text_heads=2, text_length=8, vocab_size=64)
TINY |= dict(embed_dim=16, num_concepts=9)
COUNT = 3  # ranks
ALONE_CAPTIONS = 7  # without a video; unequal shares
CASES = {  # pairs in the batch, pairs encoded at a time, activations recomputed
    "equal shares": (15, 0, False),
    "unequal shares": (13, 0, False),
    "chunks": (13, 1, False),
    "everything": (13, 3, True),
}


# ---- what ranks compute --------------------------------------------------------------------------


def embeddings(B, rank, parts):
    """This rank's rows of the loss's inputs in float64, the same batch for any number of parts."""
    g = torch.Generator().manual_seed(B)

    def unit(rows):
        return F.normalize(torch.randn(rows, 6, generator=g, dtype=torch.float64), dim=1)

    captions = B + ALONE_CAPTIONS
    concepts = (torch.rand(captions, 9, generator=g) < 0.3).double()
    concepts[2] = 0
    signature = torch.arange(captions)[:, None].repeat(1, 2)
    signature[5, 1], signature[9, 1], signature[B + 1, 1] = 4, 8, 4  # false negatives
    rows = dict(
        video_emb=unit(B),
        text_emb=unit(captions),
        concepts=concepts,
        video_concepts=torch.rand(B, 9, generator=g, dtype=torch.float64),
        knowledge=F.normalize(concepts, dim=1),
        video_logits=torch.randn(B, 9, generator=g, dtype=torch.float64),
        text_logits=torch.randn(captions, 9, generator=g, dtype=torch.float64),
        signature=signature,
    )
    return {name: share_of(x, B, rank, parts) for name, x in rows.items()}


def share_of(x, B, rank, parts):
    """A rank's rows of the B pairs, and of the captions behind them."""
    shares = [part.tensor_split(parts)[rank] for part in (x[:B], x[B:])]
    return torch.cat(shares)


def loss_gradients(B, rank=0, parts=1):
    """(loss, gradients of this rank's rows and of the scale)."""
    rows = embeddings(B, rank, parts)
    scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    names = ("video_emb", "text_emb", "video_logits", "text_logits")
    wanted = [rows[name].requires_grad_() for name in names] + [scale]
    rows["concept_logits"] = rows.pop("video_logits"), rows.pop("text_logits")
    sizes = dict(batch_size=B, num_captions=B + ALONE_CAPTIONS)
    loss, _ = clop_loss(logit_scale=scale, config=ALL_ON, **sizes, **rows)
    return loss.item(), [g.numpy() for g in torch.autograd.grad(loss, wanted)]


def module_gradients(rank=0, parts=1):
    """The same of the loss module for open_clip; of the op, where there is one process."""
    rows = embeddings(15, rank, parts)
    rows = {name: x[: len(rows["video_emb"])] for name, x in rows.items()}
    wanted = [rows[name].requires_grad_() for name in ("video_emb", "text_emb")]
    wanted.append(torch.tensor(10.0, dtype=torch.float64, requires_grad=True))
    known = dict(concepts=rows["knowledge"], signature=rows["signature"])
    if parts == 1:  # the op itself
        loss, _ = knowledge_nce(*wanted[:2], wanted[2].log(), beta=2.0, **known)
    else:
        loss = KnowledgeLoss(beta=2.0)(*wanted, output_dict=True, **known)["contrastive_loss"]
    return loss.item(), [g.numpy() for g in torch.autograd.grad(loss, wanted)]


ALONE = Ranks(0, 1, torch.device("cpu"))


def step_gradients(case, ranks=ALONE):
    """{parameter: gradient} of a step of the tiny model on this rank's share of the batch."""
    B, chunk, checkpointing = CASES[case]
    torch.manual_seed(0)
    model = CLOP(build_config("toy", **TINY))
    torch.nn.init.normal_(model.video.blocks[0].time_attn.out.weight, std=0.1)  # it starts at zero
    model.use_checkpointing(checkpointing)
    towers = torch.nn.parallel.DistributedDataParallel(model) if ranks.world_size > 1 else model

    g = torch.Generator().manual_seed(0)
    captions = 2 * B
    lengths = torch.randint(2, 9, (captions,), generator=g)
    batch = dict(
        video=torch.randint(256, (B, 2, 16, 16, 3), generator=g).byte(),
        tokens=torch.randint(64, (captions, 8), generator=g),
        text_mask=torch.arange(8) < lengths[:, None],
        concepts=(torch.rand(captions, 9, generator=g) < 0.3).float(),
        video_concepts=torch.rand(B, 9, generator=g),
        signature=torch.randint(9, (captions, 2), generator=g),
    )
    batch["knowledge"] = concept_vectors(batch["concepts"], torch.ones(9))
    batch = {name: share_of(x, B, ranks.rank, ranks.world_size) for name, x in batch.items()}
    config = TrainConfig(**vars(ALL_ON), batch_size=B, chunk=chunk, text_negatives=1.0)
    backward(towers, model.logit_scale, batch, config)
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def settings(world, folder, name, **other):
    """A short run with all losses on, unequal shares, chunks, checkpointing.

    No groups: which of two like captions is harder, the last bit of a share's embeddings decides.
    """
    shares = dict(val_data=None, steps=4, batch_size=83, chunk=24, checkpointing=True)
    changed = dict(guided_share=0.0) | shares | other
    return short_run(world, folder / name, folder / "cache", **changed)


def poison(rank, at_calls):
    """train.py's loss is NaN at these of its calls on rank 1."""
    real, calls = train.clop_loss, []

    def clop_loss_or_nan(*args, **kwargs):
        calls.append(1)
        loss, parts = real(*args, **kwargs)
        return loss * (math.nan if rank == 1 and len(calls) in at_calls else 1), parts

    return mock.patch.object(train, "clop_loss", clop_loss_or_nan)


def rank_main(rank, port, folder, world, answers):
    """All that one rank does; answers.put((rank, {name: result}))."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(COUNT))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    ranks, found = Ranks.join(cpu=True), {}
    assert (ranks.rank, ranks.world_size, world_size()) == (rank, COUNT, COUNT)
    sizes = share_sizes(COUNT + 1, COUNT)
    found["gather"] = gather(torch.full((sizes[rank], 2), rank), sizes).tolist()
    found["exchange"] = exchange(100 * rank + torch.arange(COUNT + 1), sizes).tolist()
    parts = dict(a=torch.tensor(float(rank)), b=torch.tensor(math.nan if rank == 1 else 0.0))
    found["mean"] = list(ranks.mean_of(parts).values())
    found |= {f"loss of {B}": loss_gradients(B, rank, COUNT) for B in (15, 13)}
    found["module"] = module_gradients(rank, COUNT)
    found |= {case: step_gradients(case, ranks) for case in CASES}
    train.train(settings(world, folder, "of-many"), ranks)
    train.train(settings(world, folder, "guided", guided_share=1.0), ranks)
    with poison(rank, at_calls=(2, 4)):
        train.train(settings(world, folder, "skipped"), ranks)
    with poison(rank, at_calls=(3, 4, 5, 6)):
        try:
            train.train(settings(world, folder, "ended", steps=8, eval_every=2), ranks)
        except (UserError, SystemExit) as error:
            found["ended"] = str(error)
    if rank == 1:
        train.StopSignals = StopAfter
    found["stopped"] = train.train(settings(world, folder, "stopped"), ranks)
    answers.put((rank, found))
    ranks.wait()
    ranks.leave()


class StopAfter(contextlib.nullcontext):
    """Stands for StopSignals: SIGINT arrives at this rank alone, during step 2."""

    reads = 0

    def __enter__(self):
        return self

    @property
    def received(self):
        self.reads += 1  # one a step
        return signal.SIGINT if self.reads >= 2 else 0


# ---- groups of ranks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(tiny_world, folder):
    """The same by one process."""
    train.train(settings(tiny_world, folder, "of-one"))
    found = {case: step_gradients(case) for case in CASES}
    found |= {f"loss of {B}": loss_gradients(B) for B in (15, 13)}
    return found | {"module": module_gradients()}


@pytest.fixture(scope="module")
def group(alone, tiny_world, folder):
    """[what each rank found]."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    answers = context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    jobs = [(rank, port, folder, tiny_world, answers) for rank in range(COUNT)]
    ranks = [context.Process(target=rank_main, args=job) for job in jobs]
    for process in ranks:
        process.start()
    found = []
    while len(found) < COUNT:
        assert not any(process.exitcode for process in ranks), "a rank failed, see its traceback"
        if answers.empty():
            time.sleep(0.02)
        else:
            found.append(answers.get())
    for process in ranks:
        process.join()
    return [results for _, results in sorted(found, key=lambda answer: answer[0])]


def test_rows_reach_who_needs_them(group):
    """Four rows: the first rank has two."""
    for rank, (found, columns) in enumerate(zip(group, ([0, 1], [2], [3]))):
        assert found["gather"] == [[0, 0], [0, 0], [1, 1], [2, 2]]
        assert found["exchange"] == [[100 * r + c for c in columns] for r in range(COUNT)], rank
        assert found["mean"][0] == 1 and math.isnan(found["mean"][1])


def test_ranks_find_groups_together(group, folder):
    """Each mines for its own share; the plan of the epoch is one, and is in the checkpoint."""
    order = resume_checkpoint(folder / "guided").training["order"]
    samples = order[:, :83].ravel().tolist()
    assert order.shape[1] == 2 * 83 and len(samples) == len(set(samples))
    losses = losses_of(folder / "guided")
    assert len(losses) == 4 and "nan" not in str(losses)


@pytest.mark.parametrize("which", ["loss of 15", "loss of 13", "module"])
def test_loss_and_its_gradient_are_those_of_the_whole_batch(group, alone, which):
    loss, gradients = alone[which]
    losses, parts = zip(*(found[which] for found in group))
    assert np.mean(losses) == pytest.approx(loss, rel=1e-12)
    B = 13 if which == "loss of 13" else 15
    for whole, shares in zip(gradients, zip(*parts)):
        if whole.ndim:  # DDP averages: rows scatter
            for rank, share in enumerate(shares):
                expected = share_of(torch.from_numpy(whole), B, rank, COUNT)
                np.testing.assert_allclose(share / COUNT, expected, rtol=1e-9, atol=1e-12)
        else:  # the scale is shared
            np.testing.assert_allclose(np.mean(shares), whole, rtol=1e-9, atol=1e-12)


def assert_close(found, expected, name):
    error = np.linalg.norm(found - expected)
    assert error <= 3e-6 * np.linalg.norm(expected) + 1e-9, name


@pytest.mark.parametrize("case", CASES)
def test_parameters_get_the_gradient_of_one_process(group, alone, case):
    for found in group:
        assert found[case].keys() == alone[case].keys()
        for name, expected in alone[case].items():
            assert_close(found[case][name], expected, name)
            assert np.array_equal(found[case][name], group[0][case][name]), f"{name}: ranks differ"


def test_a_run_is_the_run_of_one_process(group, folder):
    one, many = losses_of(folder / "of-one"), losses_of(folder / "of-many")
    assert len(one) == 4 and log_of(folder / "of-many")[0]["world_size"] == COUNT
    assert many == pytest.approx(one, rel=2e-5)
    a, b = (load_checkpoint(folder / name).model.state_dict() for name in ("of-one", "of-many"))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


def test_a_run_goes_on_with_another_number_of_processes(group, tiny_world, folder):
    (folder / "was-many").mkdir()
    shutil.copy(folder / "of-many" / "step-000003.safetensors", folder / "was-many")
    train.train(settings(tiny_world, folder, "was-many"))
    last = losses_of(folder / "of-one")[4]
    assert losses_of(folder / "was-many") == {4: pytest.approx(last, rel=2e-5)}


def test_a_gradient_of_nan_on_one_rank_is_skipped_by_all(group, folder):
    lines = [line for line in log_of(folder / "skipped") if "grad_norm" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True]
    said = group[0]["ended"]
    assert "step 6: loss nan" in said and "step-000004.safetensors" in said
    # the others end too, and leave the words to the first
    assert {found["ended"] for found in group[1:]} == {"2"}


def test_a_signal_to_one_rank_stops_all_at_the_same_step(group, folder):
    assert [found["stopped"] for found in group] == [signal.SIGINT] * COUNT
    steps = [line["step"] for line in log_of(folder / "stopped") if "step" in line]
    assert steps[-1] == 2 == load_checkpoint(folder / "stopped").step


# ---- alone ---------------------------------------------------------------------------------------


def test_captions_alone_may_be_the_hardest():
    """A copy of a caption with another meaning: the second InfoNCE sees it too."""
    rows = embeddings(15, 0, 1)
    text_emb, ids = rows["text_emb"][:15], rows["signature"][:15]
    options = dict(video_emb=text_emb, logit_scale=torch.tensor(2.3, dtype=torch.float64))  # solved
    options["config"] = LossConfig(hard_k=1, hard_weight=1.0, mask_false_negatives=True)
    _, without = clop_loss(text_emb=text_emb, signature=ids, **options)
    copies = dict(text_emb=torch.cat([text_emb, text_emb[:6]]))
    copies["signature"] = torch.cat([ids, ids[:6] + 99])
    _, parts = clop_loss(**copies, **options)
    assert parts["hard"] > without["hard"] and parts["nce"] > without["nce"]


def test_open_clips_loss_trains_alike():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch")
    losses = open_clip.compare(open_clip.BenchConfig(steps=10))
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]


def test_chunks_give_the_gradient_of_the_whole(alone):
    for name, expected in alone["unequal shares"].items():  # 13 chunks of one pair
        assert_close(alone["chunks"][name], expected, name)


# ---- docs/scaling.md -----------------------------------------------------------------------------


def test_the_page_holds_what_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"<!-- python -m bench.scaling -->\n{scaling.tables()}\n<!-- end -->" in page


def test_counted_flops_are_those_that_pytorch_counts():
    sizes = build_config("toy", image_size=64)
    model, length = CLOP(sizes), sizes.text_length
    video = torch.randn(1, 8, 3, 64, 64)
    text = torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool)
    calls = (model.encode_video, [video]), (model.encode_text, text)
    for (encode, inputs), ours in zip(calls, scaling.encoder_flops(sizes)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encode(*inputs)
        # theirs leaves attention's products out
        assert 1 <= ours / counter.get_total_flops() < 1.1
