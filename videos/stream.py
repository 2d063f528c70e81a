"""Batches of frames, decoded while training: the first one costs a batch, not a pass over the set.

Worker processes read videos (from the cache where they are in it) some batches ahead of the loop.
They write frames into memory that all processes share, and the loop reads them there:

    wanted frames ── run_guarded ──> workers ──> slot 0 … 3 ──> the loop, in order

A slot is free again when the loop asks for the next batch. So memory is that of four batches,
whatever the size of the set.

**Broken videos.** Where one cannot be read, hangs or kills its worker, another takes its place.
Which one is the caller's to say, by the place and the number of the attempt alone. So a run that is
resumed, or runs on another number of processes, sees the same batches.
"""

import itertools
import mmap
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from cli import UserError
from videos.cache import FrameCache
from videos.decode import VideoError
from videos.workers import run_guarded

SLOTS = 4  # batches in memory: one in use, the others ahead of it
CHUNK = 8  # videos that a worker gets at a time
TICK = 0.02  # seconds
AT_LEAST = 100  # videos of which --max-broken is a share, so that the first one stops no run
ATTEMPTS = 100  # videos for one place in a batch


class Want(NamedTuple):
    """Some frames of a video; `sample` is the caller's name for them."""

    sample: int
    path: str
    window: tuple[float, float | None]  # the seconds of the video that count
    only: list[int]  # T of the frames that the cache keeps, by number


class Batch(NamedTuple):
    """What to read, and replace(row, attempt): what else, where all earlier attempts failed."""

    wants: list[Want]
    replace: Callable[[int, int], Want]


class Job(NamedTuple):
    """For a worker: what to read, and where its frames go."""

    want: Want
    slot: int
    row: int

    @property
    def path(self) -> str:
        return self.want.path


class Stream:
    """Iterates over (samples [B], frames uint8 [B, T, H, W, 3]) of the batches, in their order.

    The frames are valid until the next batch is asked for. `broken`: {path: reason}, so far.
    """

    def __init__(
        self,
        cache: FrameCache,
        batches: Iterable[Batch],
        *,
        workers: int,
        max_broken: float,
        frames_at_most: int,
    ):
        """frames_at_most: B · T of the largest batch. max_broken: a share.

        Raises UserError, while iterating, where more videos than that are broken.
        """
        if sys.platform != "linux":  # workers that are not forked share no such memory
            raise UserError(
                f"--cache-gb {cache.capacity / 1e9:g}: too small for all frames, and they are "
                "decoded while training on Linux only; raise it"
            )
        self.cache, self.batches = cache, iter(batches)
        self.workers, self.max_broken = workers, max_broken
        # without a name, since /dev/shm is small in containers
        memory = mmap.mmap(-1, SLOTS * frames_at_most * cache.size**2 * 3)
        self.slots = np.frombuffer(memory, np.uint8).reshape(SLOTS, -1)

        self.open: dict[int, Batch] = {}  # by number
        self.missing: dict[int, int] = {}  # videos of each open batch
        self.todo: deque[tuple] = deque()  # (number of the batch, row, attempt)
        self.running: dict[int, tuple] = {}  # the same, by the number of the job
        self.numbers = itertools.count()
        self.broken: dict[str, str] = {}
        self.decoded, self.taken, self.is_closed = 0, 0, False

    def __iter__(self) -> Iterator[tuple[list[int], np.ndarray]]:
        ready = queue.SimpleQueue()
        thread = threading.Thread(target=self.drive, args=(ready,), daemon=True)
        thread.start()
        try:
            while (found := ready.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
                self.taken += 1
        finally:
            self.is_closed = True
            thread.join()

    def drive(self, ready: queue.SimpleQueue) -> None:
        """In a thread: put each batch there when it is whole, at last None or the error."""
        try:
            for batch in self.whole_batches():
                ready.put(batch)
            ready.put(None)
        except Exception as error:
            ready.put(error)

    def whole_batches(self) -> Iterator[tuple[list[int], np.ndarray]]:
        read = partial(read_into, self.cache, self.slots)
        guards = dict(workers=self.workers, chunk=CHUNK, tick=TICK)
        handed_out = 0

        for n, result in run_guarded(read, self.jobs(), **guards):
            if self.is_closed:
                return
            if n is None:
                continue
            number, row, attempt = self.running.pop(n)
            if result:
                self.note_broken(self.open[number].wants[row].path, result)
                self.todo.appendleft((number, row, attempt + 1))
            else:
                self.decoded += 1
                self.missing[number] -= 1

            while self.missing.get(handed_out) == 0:
                del self.missing[handed_out]
                wants = self.open.pop(handed_out).wants
                shape = (len(wants), len(wants[0].only), self.cache.size, self.cache.size, 3)
                frames = self.slots[handed_out % SLOTS][: np.prod(shape)].reshape(shape)
                yield [want.sample for want in wants], frames
                handed_out += 1

    def jobs(self) -> Iterator[Job | None]:
        """The jobs of all batches for which there are slots; None while there is none."""
        for number, batch in enumerate(self.batches):
            while self.todo or number >= self.taken + SLOTS:
                yield self.next_job()
            self.open[number] = batch
            self.missing[number] = len(batch.wants)
            self.todo.extend((number, row, 0) for row in range(len(batch.wants)))
        while self.open:
            yield self.next_job()

    def next_job(self) -> Job | None:
        if not self.todo:
            return None
        number, row, attempt = self.todo.popleft()
        batch = self.open[number]
        want = batch.replace(row, attempt) if attempt else batch.wants[row]
        while want.path in self.broken:
            attempt += 1
            if attempt > ATTEMPTS:
                self.give_up()
            want = batch.replace(row, attempt)

        batch.wants[row] = want
        self.running[next(self.numbers)] = (number, row, attempt)
        return Job(want, number % SLOTS, row)

    def note_broken(self, path: str, reason: str) -> None:
        if path in self.broken:  # another place had asked for it before this was known
            return
        self.broken[path] = reason
        if len(self.broken) <= 20:
            print(f"another video takes the place of {reason}", file=sys.stderr, flush=True)
        tried = self.decoded + len(self.broken)
        if len(self.broken) > self.max_broken * max(tried, AT_LEAST):
            self.give_up()

    def give_up(self) -> None:
        raise UserError(
            f"{len(self.broken)} of {self.decoded + len(self.broken)} videos read so far cannot be "
            f"used, more than the {self.max_broken:.0%} of --max-broken; the first: "
            f"{next(iter(self.broken.values()))}"
        )


def read_into(cache: FrameCache, slots: np.ndarray, job: Job) -> str:
    """In a worker: put the frames into their slot. Returns "", or the reason if it is broken."""
    _, path, window, only = job.want
    try:
        frames = cache.get(path, *window, only=only)  # [T, H, W, 3]
    except VideoError as error:
        return str(error)
    slots[job.slot, job.row * frames.size : (job.row + 1) * frames.size] = frames.ravel()
    return ""
