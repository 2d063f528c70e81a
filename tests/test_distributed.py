"""distributed.py and train.py on 2 and 4 processes (gloo): the gradients and losses of one process.

The ranks of a world size are forked from a server that has PyTorch loaded, form one group, and run
all checks in it.
"""

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from cli import UserError
from kernels.distributed import exchange, gather, share_sizes, world_size
from knowledge import concept_vectors
from losses import LossConfig, clop_loss
from model import CLOP, build_config
from train import TrainConfig, backward
from training.checkpoint import load_checkpoint
from training.processes import Ranks

ROOT = Path(__file__).parent.parent
ALL_ON = LossConfig(skp_weight=0.5, beta=2.0, hard_k=3, hard_weight=0.7, mask_false_negatives=True)
TINY = dict(image_size=16, num_frames=2, video_width=32, video_layers=1, video_heads=2)
TINY |= dict(text_width=32, text_layers=1, text_heads=2, text_length=8, vocab_size=64)
TINY |= dict(embed_dim=16, num_concepts=9)
CASES = {  # pairs in the batch, pairs encoded at a time, activations recomputed
    "equal shares": (16, 0, False),
    "unequal shares": (13, 0, False),
    "chunks": (13, 1, False),
    "everything": (13, 3, True),
}


# ---- what ranks compute --------------------------------------------------------------------------


def embeddings(B):
    """Inputs of the loss in float64, the same in every process: ([B, …] tensors, logit_scale)."""
    g = torch.Generator().manual_seed(B)
    concepts = (torch.rand(B, 9, generator=g) < 0.3).double()
    concepts[2] = 0
    rows = dict(
        video_emb=F.normalize(torch.randn(B, 6, generator=g, dtype=torch.float64), dim=1),
        text_emb=F.normalize(torch.randn(B, 6, generator=g, dtype=torch.float64), dim=1),
        concepts=concepts,
        knowledge=F.normalize(concepts, dim=1),
        concept_logits=torch.randn(B, 9, generator=g, dtype=torch.float64),
        signature=torch.tensor([[i if i != 5 else 4, i if i != 9 else 8] for i in range(B)]),
    )
    return rows, torch.tensor(math.log(10.0), dtype=torch.float64)


def loss_gradients(B, rank=0, parts=1):
    """(loss, gradients of this rank's rows and of the scale)."""
    rows, scale = embeddings(B)
    sizes = share_sizes(B, parts)
    mine = {name: x.split(sizes)[rank].clone() for name, x in rows.items()}
    wanted = [mine[name].requires_grad_() for name in ("video_emb", "text_emb", "concept_logits")]
    wanted.append(scale.requires_grad_())
    loss, _ = clop_loss(
        mine.pop("video_emb"), mine.pop("text_emb"), scale, ALL_ON, batch_size=B, **mine
    )
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
    lengths = torch.randint(2, 9, (B,), generator=g)
    batch = dict(
        video=torch.randint(256, (B, 2, 16, 16, 3), generator=g).byte(),
        tokens=torch.randint(64, (B, 8), generator=g),
        text_mask=torch.arange(8) < lengths[:, None],
        concepts=(torch.rand(B, 9, generator=g) < 0.3).float(),
        signature=torch.randint(9, (B, 2), generator=g),
    )
    batch["knowledge"] = concept_vectors(batch["concepts"], torch.ones(9))
    batch = {
        name: x.split(share_sizes(B, ranks.world_size))[ranks.rank] for name, x in batch.items()
    }
    backward(
        towers, model.logit_scale, batch, TrainConfig(**vars(ALL_ON), batch_size=B, chunk=chunk)
    )
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def settings(world, folder, name, **other):
    """A short run with all losses on, unequal shares, chunks, checkpointing."""
    files = dict(dataset="csv", data=str(world / "train.csv"), workers=1)
    files |= dict(out=str(folder / name), cache=str(folder / "cache"))
    steps = dict(steps=4, batch_size=83, num_frames="2", warmup=2, log_every=1, eval_every=3)
    losses = dict(guided_from=0.0, hard_k=2, hard_weight=0.5)
    memory = dict(chunk=24, checkpointing=True)
    return TrainConfig(**(files | steps | losses | memory | other))


def poison(rank, at_calls):
    """Make train.py's loss NaN at these of its calls on rank 1; the function to restore."""
    real, calls = train.clop_loss, []

    def clop_loss_or_nan(*args, **kwargs):
        calls.append(1)
        loss, parts = real(*args, **kwargs)
        return loss * (math.nan if rank == 1 and len(calls) in at_calls else 1), parts

    train.clop_loss = clop_loss_or_nan
    return real


def rank_main(rank, count, port, folder, world, answers):
    """All that one rank does; answers.put((rank, {name: result}))."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    ranks, found = Ranks.join(cpu=True), {}
    assert (ranks.rank, ranks.world_size, world_size()) == (rank, count, count)
    sizes = share_sizes(count + 1, count)
    found["gather"] = gather(torch.full((sizes[rank], 2), rank), sizes).tolist()
    found["exchange"] = exchange(100 * rank + torch.arange(count + 1), sizes).tolist()
    parts = dict(a=torch.tensor(float(rank)), b=torch.tensor(math.nan if rank == 1 else 0.0))
    found["mean"] = list(ranks.mean_of(parts).values())
    found |= {f"loss of {B}": loss_gradients(B, rank, count) for B in (16, 13)}
    found |= {case: step_gradients(case, ranks) for case in CASES}
    train.train(settings(world, folder, f"of-{count}"), ranks)
    restore = poison(rank, at_calls=(2, 4))
    train.train(settings(world, folder, f"skipped-{count}"), ranks)
    train.clop_loss = restore
    restore = poison(rank, at_calls=(3, 4, 5, 6))
    try:
        train.train(settings(world, folder, f"ended-{count}", steps=8, eval_every=2), ranks)
    except (UserError, SystemExit) as error:
        found["ended"] = str(error)
    train.clop_loss = restore
    if rank == 1:
        train.StopSignals = lambda ranks: StopAfter(step=2)
    found["stopped"] = train.train(settings(world, folder, f"stopped-{count}"), ranks)
    answers.put((rank, found))
    ranks.wait()
    ranks.leave()


class StopAfter:
    """Stands for StopSignals: SIGINT arrives at this rank alone, during the step of this number."""

    def __init__(self, step):
        self.reads, self.step = 0, step

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    @property
    def received(self):
        self.reads += 1  # one a step
        return signal.SIGINT if self.reads >= self.step else 0


# ---- groups of ranks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(tiny_world, folder):
    """The same by one process."""
    train.train(settings(tiny_world, folder, "of-1"))
    return {f"loss of {B}": loss_gradients(B) for B in (16, 13)} | {
        case: step_gradients(case) for case in CASES
    }


@pytest.fixture(scope="module", params=[2, 4])
def group(request, alone, tiny_world, folder):
    """[what each rank found]."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    answers = context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    count, ranks = request.param, []
    for rank in range(count):
        job = (rank, count, port, folder, tiny_world, answers)
        ranks.append(context.Process(target=rank_main, args=job))
    for process in ranks:
        process.start()
    found = []
    while len(found) < len(ranks):
        has_failed = any(process.exitcode for process in ranks)
        assert not has_failed, "a rank failed, see its traceback"
        if answers.empty():
            time.sleep(0.02)
        else:
            found.append(answers.get())
    for process in ranks:
        process.join()
    return [results for _, results in sorted(found, key=lambda pair: pair[0])]


def test_rows_reach_who_needs_them(group):
    count = len(group)
    rows = [
        [rank] * 2 for rank, size in enumerate(share_sizes(count + 1, count)) for _ in range(size)
    ]
    assert all(found["gather"] == rows for found in group)
    starts = np.cumsum([0, *share_sizes(count + 1, count)])
    for rank, found in enumerate(group):
        columns = range(starts[rank], starts[rank + 1])
        assert found["exchange"] == [
            [100 * other + column for column in columns] for other in range(count)
        ]
        assert found["mean"][0] == (count - 1) / 2 and math.isnan(found["mean"][1])


@pytest.mark.parametrize("B", [16, 13])
def test_loss_and_its_gradient_are_those_of_the_whole_batch(group, alone, B):
    loss, gradients = alone[f"loss of {B}"]
    losses, parts = zip(*(found[f"loss of {B}"] for found in group))
    assert np.mean(losses) == pytest.approx(loss, rel=1e-12)
    for i, expected in enumerate(gradients):  # DDP averages: rows scatter, the scale is shared
        merged = (
            np.mean([p[i] for p in parts], axis=0)
            if expected.ndim == 0
            else np.concatenate([p[i] for p in parts]) / len(group)
        )
        np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-12)


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


def log_of(folder, name) -> list[dict]:
    return [json.loads(line) for line in open(folder / name / "log.jsonl", encoding="utf-8")]


def losses_of(folder, name) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in log_of(folder, name) if "loss" in line}


def test_a_run_is_the_run_of_one_process(group, folder):
    one, many = (losses_of(folder, f"of-{count}") for count in (1, len(group)))
    assert len(one) == 4 and log_of(folder, f"of-{len(group)}")[0]["world_size"] == len(group)
    assert many == pytest.approx(one, rel=2e-5)
    a, b = (load_checkpoint(folder / f"of-{count}").model.state_dict() for count in (1, len(group)))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


def test_a_run_goes_on_with_another_number_of_processes(group, tiny_world, folder):
    out = folder / f"was-{len(group)}"
    out.mkdir()
    (out / "step-000003.safetensors").write_bytes(
        (folder / f"of-{len(group)}" / "step-000003.safetensors").read_bytes()
    )
    train.train(settings(tiny_world, folder, out.name))
    assert losses_of(folder, out.name) == pytest.approx(
        {step: loss for step, loss in losses_of(folder, "of-1").items() if step > 3}, rel=2e-5
    )


def test_a_gradient_of_nan_on_one_rank_is_skipped_by_all(group, folder):
    lines = [line for line in log_of(folder, f"skipped-{len(group)}") if "grad_norm" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True]
    said = group[0]["ended"]
    assert "step 6: loss nan" in said and "step-000004.safetensors" in said
    # the others end too, and leave the words to the first
    assert {found["ended"] for found in group[1:]} == {"2"}


def test_a_signal_to_one_rank_stops_all_at_the_same_step(group, folder):
    assert [found["stopped"] for found in group] == [signal.SIGINT] * len(group)
    steps = [line["step"] for line in log_of(folder, f"stopped-{len(group)}") if "step" in line]
    assert steps[-1] == 2 == load_checkpoint(folder / f"stopped-{len(group)}").step


# ---- alone ---------------------------------------------------------------------------------------


def test_chunks_give_the_gradient_of_the_whole(alone):
    for name, expected in alone["unequal shares"].items():  # 13 chunks of one pair
        assert_close(alone["chunks"][name], expected, name)


# ---- docs/scaling.md -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaling():
    from bench import scaling

    return scaling


def test_the_page_holds_what_the_script_prints(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"<!-- python -m bench.scaling -->\n{scaling.tables()}\n<!-- end -->" in page


def test_counted_flops_are_those_that_pytorch_counts(scaling):
    sizes = build_config("toy", image_size=64)
    model, L = CLOP(sizes), sizes.text_length
    counted = []
    for call in (
        lambda: model.encode_video(torch.randn(1, 8, 3, 64, 64)),
        lambda: model.encode_text(
            torch.zeros(1, L, dtype=torch.long), torch.ones(1, L, dtype=torch.bool)
        ),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
    for ours, theirs in zip(
        scaling.encoder_flops(sizes), counted
    ):  # theirs leaves attention's products out
        assert 1 <= ours / theirs < 1.1
