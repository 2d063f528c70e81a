"""Several processes that train as one.

`train.py --gpus 8` starts eight copies of the script. Each copy is a *rank*: it has its own GPU, a
whole model, and its share of every batch. Two things must meet, or eight ranks are not one trainer
with a batch eight times as large.

**Gradients.** DistributedDataParallel (DDP) averages them over the N ranks, while the backward pass
still runs. So each rank weighs its n of the B pairs by N / B, not by 1 / n. Both are the same where
B = N·n; the first is right also where it is not. So any batch size on any number of ranks gives the
gradient of one process, in the last batch of an epoch, too (tests/test_distributed.py). The model
has neither dropout nor batch norm, which would see only a share.

**The negatives.** A rank compares its n videos with the captions of *all* ranks: its rows of the
B × B similarity. kernels/distributed.py gathers them, with gradient.

**Faults.** No rank can go on alone, so a rank that dies takes the others along. On CPUs (gloo) they
see the closed connection at once. A rank that hangs in a GPU collective is ended by its launcher
30 s later; one on another machine by NCCL's timeout, 10 minutes. The rank that failed speaks first,
the others say one line, the launcher's last line names it. SIGTERM or SIGINT to any of them is a
request (`StopSignals`), on which the ranks agree at the next step.
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
LOST_CONNECTION = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe|NCCL[^\n]{,100}")


class LostRank(UserError):
    """Another rank ended in the middle of a collective."""

    status = LOST_RANK


# ---- processes -----------------------------------------------------------------------------------


def launch(processes: int) -> int:
    """Run `processes` copies of this command to their end; the exit status for this process.

    This is `torchrun --standalone --nproc-per-node=… train.py …` in this very process, without its
    screenful of words where a rank fails. One line says which one, after that rank's own.
    """
    from torch.distributed import run as torchrun  # here: only a launcher needs it
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # s, to save a checkpoint
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    words = ["--standalone", f"--nproc-per-node={processes}", *sys.argv]

    try:
        torchrun.run(torchrun.parse_args(words))
    except SignalException as stop:
        return 130 if stop.sigval == signal.SIGINT else 0
    except ChildFailedError as error:
        return explain_failure(error.failures)
    return 0


def explain_failure(failures: dict) -> int:
    """Print which rank failed first, and how; the exit status for the launcher."""

    def order(found):
        # the first in time was often only taken along: one with a reason of its own goes before
        was_taken_along = found[1].exitcode in (LOST_RANK, -signal.SIGTERM)
        return was_taken_along, found[1].timestamp

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode in (UserError.status, 130):  # its one line is on the screen
        return failure.exitcode
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        how = f"was ended by {name} (out of memory, or from outside)"
    else:
        how = f"failed with status {failure.exitcode}, its message is above"

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
    patient: dist.ProcessGroup | None = None  # for waits of hours, while the first works alone

    @classmethod
    def join(cls, *, cpu: bool = False) -> "Ranks":
        """Join the group that torchrun (or `launch`) announced in the environment.

        Without one: a run of this process alone. One GPU a rank with NCCL; gloo on CPUs, or if
        `cpu`. Raises UserError where there are fewer GPUs than ranks.
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
        """The first rank runs the body, then the first of each other machine, then all the others.

        So they find its files and caches, on a shared disk or on disks of their own.
        """
        is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        turn = 0 if self.is_first else 1 if is_first_here else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()

    def wait(self) -> None:
        """Until all ranks are here, however long (a day at most)."""
        if self.patient:
            dist.barrier(self.patient)

    def mean_of(self, parts: dict[str, torch.Tensor]) -> dict[str, float]:
        """The mean of each part over the ranks, the same bits on all; NaN where any has one."""
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
        """A collective that fails because another rank went away ends in one line: LostRank."""
        try:
            yield
        except RuntimeError as error:  # of NCCL, a subclass; gloo has no class of its own
            lost = LOST_CONNECTION.search(str(error))
            if self.world_size == 1 or not lost:
                raise
            raise LostRank(
                f"rank {self.rank}: another rank went away, so this one ends too ({lost[0]})"
            ) from error

    def fail(self, message: str) -> None:
        """End all ranks for a reason that they agree on: the first one says it."""
        raise UserError(message) if self.is_first else SystemExit(UserError.status)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class StopSignals:
    """SIGTERM and SIGINT as a request: the loop reads `received`, the signal's number or 0.

    In a single process a second signal acts as if none of this were here. (Among ranks, Ctrl-C
    reaches each of them twice: from the terminal and from the launcher.)
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.received, self.handlers = ranks, 0, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame) -> None:
        if not self.received and self.ranks.is_first:
            line = f"{signal.Signals(number).name}: stops after this step\n"
            os.write(2, line.encode())  # print may be what the signal interrupted
        self.received = number
        if self.ranks.world_size == 1:
            self.__exit__()
