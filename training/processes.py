"""Several processes that train as one.

`train.py --gpus 8` starts eight copies of the script. Each copy is a *rank*: it has its own GPU, a
whole model, and its share of every batch. Two things must meet, or eight ranks are not one trainer
with a batch eight times as large.

**Gradients.** DistributedDataParallel (DDP) averages them over the ranks, while the backward pass
still runs.

**The negatives.** A rank compares its n videos with the captions of *all* ranks: its rows of the B
× B similarity. So captions are gathered, and the gather has a gradient: my caption is a negative in
every other rank's rows, and what these rows want of it must come home. Written out for N ranks with
the loss L = Σ_r L_r,

    forward     all_gather        everybody gets the rows of all
    backward    reduce_scatter    everybody gets Σ_r ∂L_r / ∂(its own rows)

Detached (as all_gather of plain PyTorch is) each rank would only see how its own rows push: its
encoders get 1/N of the contrastive gradient, while terms without a gather (SKP) keep theirs. No
error, no warning, worse numbers. The column sums go the other way: every rank has a number for
everybody's captions, and sends each to its owner (`exchange`, an all_to_all: B numbers a rank;
gathering all would be N·B).

**The mean.** DDP averages over ranks, so each rank must weigh its pairs by N / B, not by 1 / n: the
same where B = N·n, and right also where it is not. Batches are cut by `share_sizes`, as equal as
can be: any batch size on any number of ranks, the last batch of an epoch included, gives the
gradient of one process (tests/test_distributed.py). The model has neither dropout nor batch norm,
which would see their share only.

**Faults.** No rank can go on alone. A rank that dies takes the others along: on CPUs (gloo) they
see the closed connection at once; a rank that hangs in a GPU collective is ended by its launcher,
30 s after that found the dead one; one on another machine by NCCL's timeout, 10 minutes. The rank
that failed speaks first, the others say one line, the launcher's last line names it. SIGTERM or
SIGINT to any of them is a request (`StopSignals`), which the ranks agree on at the next step.

    python distributed.py    # two processes on this machine: a gradient gathered right and wrong
"""

import logging
import os
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from cli import UserError

LOST_RANK = 3  # exit status of a rank whose only fault is that another one went away


class LostRank(UserError):
    """Another rank ended in the middle of a collective."""

    status = LOST_RANK


# ---- processes -----------------------------------------------------------------------------------


def launch(processes: int) -> int:
    """Run `processes` copies of this command to their end; the exit status for this process.

    `torchrun --standalone --nproc-per-node=… train.py …` in this very process, minus its screenful
    of words when a rank fails: one line says which, after that rank's own. Before SIGKILL ranks get
    5 minutes to save their checkpoint.
    """
    from torch.distributed import run as torchrun  # here: only a launcher needs it
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    try:
        torchrun.run(
            torchrun.parse_args(["--standalone", f"--nproc-per-node={processes}", *sys.argv])
        )
    except SignalException as stop:
        return 130 if stop.sigval == signal.SIGINT else 0
    except ChildFailedError as error:
        # the first by time is often a rank that was only taken along: look for one with a reason of
        # its own
        rank, failure = min(
            error.failures.items(),
            key=lambda f: (f[1].exitcode in (LOST_RANK, -15), f[1].timestamp),
        )
        if failure.exitcode in (2, 130):  # its one line is on the screen
            return failure.exitcode
        how = (
            f"was ended by {signal.Signals(-failure.exitcode).name} (out of memory, or from outside)"
            if failure.exitcode < 0
            else f"failed with status {failure.exitcode}, its message is above"
        )
        print(
            f"error: rank {rank} (process {failure.pid}) {how}; the same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


@dataclass
class Ranks:
    """Who this process is among the processes of the run. A run of one process has rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = (
        None  # for waits that may last hours: what the first rank does alone
    )

    @classmethod
    def join(cls, *, cpu: bool = False) -> "Ranks":
        """Join the group that torchrun (or `launch`) announced in the environment; without one, a
        run of this process.

        One GPU a rank with NCCL; gloo on CPUs, or if `cpu`. Raises UserError if there are fewer
        GPUs than ranks.
        """
        gpus = 0 if cpu else torch.cuda.device_count()
        if "LOCAL_RANK" not in os.environ:
            return cls(0, 1, torch.device("cuda" if gpus else "cpu"))
        local_rank = int(os.environ["LOCAL_RANK"])
        if 0 < gpus <= local_rank:
            raise UserError(
                f"rank {os.environ['RANK']}: this machine has {gpus} GPU(s), one for each process; start "
                "fewer, or use --procs for processes on its CPU"
            )
        device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpus else "gloo")
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            device,
            dist.new_group(backend="gloo", timeout=timedelta(hours=24)),
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def first_goes_first(self):
        """The body runs on the first rank, then on the others, which find what it made (caches,
        files).
        """
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self):
        """Until all ranks are here, however long (a day at most)."""
        if self.patient:
            dist.barrier(self.patient)

    def mean_of(self, parts: dict[str, torch.Tensor]) -> dict[str, float]:
        """The mean of each part over the ranks, the same bits on all of them; NaN if any has one."""
        values = torch.stack([part.detach().float() for part in parts.values()])
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return dict(zip(parts, values.tolist()))

    def agree(self, number: int) -> int:
        """The largest of the ranks' numbers: a signal that one of them got is news to all."""
        if self.world_size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    @contextmanager
    def explain_lost_rank(self):
        """The error of a collective whose other end went away becomes one line (LostRank): it is
        not this rank's.
        """
        try:
            yield
        except (
            RuntimeError
        ) as error:  # DistBackendError (NCCL) is one; gloo has no class of its own
            lost = re.search(
                r"Connection (?:closed|reset) by peer|Broken pipe|NCCL[^\n]{,100}", str(error)
            )
            if self.world_size == 1 or not lost:
                raise
            raise LostRank(
                f"rank {self.rank}: another rank went away, so this one ends too ({lost[0]})"
            ) from error

    def fail(self, message: str):
        """End all ranks for a reason that they agree on: the first one says it."""
        raise UserError(message) if self.is_first else SystemExit(UserError.status)

    def leave(self):
        if dist.is_initialized():
            dist.destroy_process_group()


class StopSignals:
    """SIGTERM and SIGINT as a request: `received` is the signal's number, or 0, and the loop reads
    it after each step.

    In a single process a second signal acts as if none of this were here. (Among ranks, Ctrl-C
    reaches each of them twice: from the terminal and from the launcher.)
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.received, self.before = ranks, 0, {}

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if (
            not self.received and self.ranks.is_first
        ):  # os.write: a print may be what the signal interrupted
            os.write(2, f"{signal.Signals(number).name}: stops after this step\n".encode())
        self.received = number
        if self.ranks.world_size == 1:
            self.__exit__()


# ---- rows of all ranks ---------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share_sizes(total: int, parts: int) -> list[int]:
    """`total` rows in `parts` shares, as equal as can be, the larger ones first (np.array_split's
    rule).
    """
    return [total // parts + (part < total % parts) for part in range(parts)]


class _Gather(torch.autograd.Function):
    """all_gather; backward reduce_scatter. Shares differ by one row at most: shorter ones travel
    with a row of zeros.

    An all_reduce of the whole gradient, of which each rank then keeps its share, would send twice
    the bytes.
    """

    @staticmethod
    def forward(ctx, x, sizes):
        ctx.sizes = sizes
        everyone = [x.new_empty(max(sizes), *x.shape[1:]) for _ in sizes]
        dist.all_gather(everyone, _pad(x, max(sizes)))
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes)])

    @staticmethod
    def backward(ctx, grad):
        wanted = [_pad(rows, max(ctx.sizes)) for rows in grad.split(ctx.sizes)]
        mine = torch.empty_like(wanted[0])
        dist.reduce_scatter(mine, wanted)
        return mine[: ctx.sizes[dist.get_rank()]], None


def _pad(x, rows: int):
    return (
        x.contiguous()
        if len(x) == rows
        else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
    )


class _Exchange(torch.autograd.Function):
    """all_to_all; backward the same way back."""

    @staticmethod
    def forward(ctx, x, sizes):
        ctx.sizes = sizes
        mine = [sizes[dist.get_rank()]] * len(sizes)
        out = x.new_empty(sum(mine), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), mine, sizes)
        return out.unflatten(0, (len(sizes), -1))

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(sum(ctx.sizes), *grad.shape[2:])
        dist.all_to_all_single(
            out, grad.flatten(0, 1).contiguous(), ctx.sizes, [grad.shape[1]] * len(ctx.sizes)
        )
        return out, None


def gather(x, sizes: list[int]):
    """[n, …] on each rank, n = sizes[rank], -> [sum(sizes), …] on all, in rank order, with
    gradient.
    """
    assert len(sizes) == world_size(), f"{len(sizes)} shares, {world_size()} ranks"
    return _Gather.apply(x, sizes) if len(sizes) > 1 else x


def exchange(x, sizes: list[int]):
    """[B, …] on each rank, what it has to say of everybody's rows, -> [world_size, n, …]: what all
    say of mine.
    """
    assert len(sizes) == world_size(), f"{len(sizes)} shares, {world_size()} ranks"
    return _Exchange.apply(x, sizes) if len(sizes) > 1 else x[None]
