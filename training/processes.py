"""Several processes that train as one.

`train.py --gpus 8` starts eight copies of the script. Each copy is a *rank*: it has its own GPU, a
whole model, and its share of every batch. Two things must meet, or eight ranks are not one trainer
with a batch eight times as large.

**Gradients.** DistributedDataParallel (DDP) averages them over the ranks, while the backward pass
still runs.

**Negatives.** A rank compares its n videos with the captions of *all* ranks: its rows of the B × B
similarity. So captions are gathered, and the gather has a gradient: my caption is a negative in
every other rank's rows, and what these rows want of it must come home. For N ranks with the loss
L = Σ_r L_r,

    forward     all_gather        everybody gets the rows of all
    backward    reduce_scatter    everybody gets Σ_r ∂L_r / ∂(its own rows)

Detached (as all_gather of plain PyTorch is), each rank would only see how its own rows push: its
encoders get 1/N of the contrastive gradient. No error, no warning, worse numbers. The column sums
go the other way: every rank has a number for everybody's captions, and sends each to its owner
(`exchange`, an all_to_all: B numbers a rank; gathering all would be N·B).

**The mean.** DDP averages over ranks, so each rank must weigh its pairs by N / B, not by 1 / n.
Batches are cut by `share_sizes`, as equal as can be: any batch size on any number of ranks gives
the gradient of one process (tests/test_distributed.py).

**Faults.** No rank can go on alone. A rank that dies takes the others along. On CPUs (gloo) they
see the closed connection at once. One that hangs in a GPU collective is ended by its launcher, 30 s
after that found the dead one; on another machine by NCCL's timeout, 10 minutes. The rank that
failed speaks first, the others say one line, the launcher's last line names it. SIGTERM or SIGINT
to any of them is a request (`StopSignals`), which the ranks agree on at the next step.
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
LOST_CONNECTION = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|NCCL[^\n]{,100}"
)  # as gloo and NCCL say it


class LostRank(UserError):
    """Another rank ended in the middle of a collective."""

    status = LOST_RANK


# ---- processes -----------------------------------------------------------------------------------


def launch(processes: int) -> int:
    """Run `processes` copies of this command to their end; the exit status for this process.

    This is `torchrun --standalone --nproc-per-node=… train.py …`, minus its screenful of words when
    a rank fails: one line says which, after that rank's own. Before SIGKILL ranks get 5 minutes to
    save their checkpoint.
    """
    from torch.distributed import run as torchrun  # here: only a launcher needs it
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    words = ["--standalone", f"--nproc-per-node={processes}", *sys.argv]

    try:
        torchrun.run(torchrun.parse_args(words))
    except SignalException as stop:
        return 130 if stop.sigval == signal.SIGINT else 0
    except ChildFailedError as error:
        return blame(error.failures)

    return 0


def blame(failures: dict) -> int:
    """Name the rank that failed; the exit status. failures: {rank: torchrun's ProcessFailure}."""

    def is_guilty_first(item: tuple) -> tuple:
        # the first by time is often a rank that was only taken along
        was_taken_along = item[1].exitcode in (LOST_RANK, -signal.SIGTERM)
        return was_taken_along, item[1].timestamp

    rank, failure = min(failures.items(), key=is_guilty_first)
    status = failure.exitcode
    if status in (UserError.status, 130):  # its one line is on the screen
        return status
    how = f"failed with status {status}, its message is above"
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name} (out of memory, or from outside)"
    print(
        f"error: rank {rank} (process {failure.pid}) {how}; the same command goes on from the "
        "newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    return 1


@dataclass
class Ranks:
    """Who this process is among the processes of the run. A run of one process has rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    # for waits that may last hours: what the first rank does alone
    patient: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, *, cpu: bool = False) -> "Ranks":
        """Join the group that torchrun (or `launch`) announced in the environment, if there is one.

        One GPU a rank with NCCL; gloo on CPUs, or if `cpu`. Raises UserError if there are fewer
        GPUs than ranks.
        """
        gpus = 0 if cpu else torch.cuda.device_count()
        if "LOCAL_RANK" not in os.environ:
            return cls(0, 1, torch.device("cuda" if gpus else "cpu"))

        local_rank = int(os.environ["LOCAL_RANK"])
        if 0 < gpus <= local_rank:
            raise UserError(
                f"rank {os.environ['RANK']}: this machine has {gpus} GPU(s), one for each process; "
                "start fewer, or use --procs for processes on its CPU"
            )
        device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpus else "gloo")
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
        return cls(dist.get_rank(), dist.get_world_size(), device, patient)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def first_goes_first(self):
        """The body runs on the first rank, then on the others, which find what it made."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Until all ranks are here, however long (a day at most)."""
        if self.patient:
            dist.barrier(self.patient)

    def mean_of(self, parts: dict[str, torch.Tensor]) -> dict[str, float]:
        """The mean of each part over the ranks, the same bits on all; NaN if any has one."""
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
        """A collective whose other end went away ends in one line: the fault is not this rank's."""
        try:
            yield
        except RuntimeError as error:  # NCCL's is one; gloo has no class of its own
            lost = LOST_CONNECTION.search(str(error))
            if self.world_size == 1 or not lost:
                raise
            what = f"another rank went away, so this one ends too ({lost[0]})"
            raise LostRank(f"rank {self.rank}: {what}") from error

    def fail(self, message: str) -> None:
        """End all ranks for a reason that they agree on: the first one says it."""
        raise UserError(message) if self.is_first else SystemExit(UserError.status)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class StopSignals:
    """SIGTERM and SIGINT as a request: `received` is the signal's number, or 0.

    The loop reads it after each step. In a single process a second signal acts as if none of this
    were here. (Among ranks, Ctrl-C reaches each of them twice: from the terminal and from the
    launcher.)
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.received, self.before = ranks, 0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if not self.received and self.ranks.is_first:
            # os.write: a print may be what the signal interrupted
            os.write(2, f"{signal.Signals(number).name}: stops after this step\n".encode())
        self.received = number
        if self.ranks.world_size == 1:
            self.__exit__()


# ---- rows of all ranks ---------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share_sizes(total: int, parts: int) -> list[int]:
    """`total` rows in `parts` shares, as equal as can be, the larger first (np.array_split)."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def gather(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """[n, …] on each rank, n = sizes[rank] -> [sum(sizes), …] on all, by rank, with gradient."""
    assert len(sizes) == world_size(), f"{len(sizes)} shares, {world_size()} ranks"
    return Gather.apply(x, sizes) if len(sizes) > 1 else x


def exchange(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """[B, …] on each rank, what it says of everybody's rows -> [world_size, n, …], of mine."""
    assert len(sizes) == world_size(), f"{len(sizes)} shares, {world_size()} ranks"
    return Exchange.apply(x, sizes) if len(sizes) > 1 else x[None]


class Gather(torch.autograd.Function):
    """all_gather; backward reduce_scatter.

    Shares differ by one row at most: shorter ones travel with a row of zeros. An all_reduce of the
    whole gradient, of which each rank then keeps its share, would send twice the bytes.
    """

    @staticmethod
    def forward(ctx, x, sizes):
        ctx.sizes = sizes
        everyone = [x.new_empty(max(sizes), *x.shape[1:]) for _ in sizes]
        dist.all_gather(everyone, pad(x, max(sizes)))
        return torch.cat([rows[:size] for rows, size in zip(everyone, sizes)])

    @staticmethod
    def backward(ctx, grad):
        wanted = [pad(rows, max(ctx.sizes)) for rows in grad.split(ctx.sizes)]
        mine = torch.empty_like(wanted[0])
        dist.reduce_scatter(mine, wanted)
        return mine[: ctx.sizes[dist.get_rank()]], None


def pad(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x with zeros below, `rows` in all; contiguous."""
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


class Exchange(torch.autograd.Function):
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
        mine = [grad.shape[1]] * len(ctx.sizes)
        out = grad.new_empty(sum(ctx.sizes), *grad.shape[2:])
        dist.all_to_all_single(out, grad.flatten(0, 1).contiguous(), ctx.sizes, mine)
        return out, None
