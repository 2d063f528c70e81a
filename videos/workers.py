"""Work on files that may hang or kill the process that reads them.

A damaged or hostile file can do worse than fail: it can hang the decoder for ever, or crash the
process that it runs in. So files are read in processes that can be spared. A file may take
`PATIENCE` seconds, and one more for each megabyte. When they are over, its process is killed and
the file is given up, with that reason. Another process goes on with the next.

A process may also die by no fault of its file, say where memory runs out. So the file is tried once
more. If its process dies again, it was the file.

A job is the path of a file, or has a `path`. A worker may hold a few jobs, so that it need not wait
for the next; it works on the first of them.

`concurrent.futures` waits for ever for a worker that hangs. `pebble` kills it, as this file does,
but hands out small jobs six times slower (docs/LOG.md).
"""

import contextlib
import itertools
import math
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from cli import UserError
from videos.decode import VideoError, locate

# seconds that a video may take to decode, and one more for each megabyte (10 to 100 are usual)
PATIENCE = 60.0


@dataclass
class Worker:
    """A process, and its jobs (n, job): it works on the first."""

    process: multiprocessing.Process
    jobs: deque = field(default_factory=deque)
    is_over: float = 0.0  # when the time for the first job is, on the monotonic clock

    @property
    def path(self) -> str:
        job = self.jobs[0][1]
        return getattr(job, "path", job)

    def start_clock(self) -> None:
        if self.jobs:
            self.is_over = time.monotonic() + seconds_allowed(self.path)

    def was_too_slow(self) -> str:
        seconds = f"{seconds_allowed(self.path):.0f} s"
        return (
            f"{self.path}: the decoder gave no frames within {seconds} and was stopped; encode the "
            "file again or remove it"
        )

    def died_twice(self) -> str:
        return (
            f"{self.path}: the decoder died twice (exit code {self.process.exitcode}; -9: killed, "
            "perhaps out of memory); encode the file again or remove it"
        )


def run_guarded(
    work: Callable,
    jobs: Iterable,
    *,
    workers: int,
    queue: int = 1,
    tick: float | None = None,
) -> Iterator[tuple]:
    """(n, work(n-th job)) as they are done, by `workers` processes that hold `queue` jobs each.

    For a job that hangs or kills them, the second is why (str). `jobs` is read one at a time. With
    a `tick` (seconds) it may yield None: no job yet. Then (None, None) comes back after each tick
    without a result. A UserError in a worker is raised here. Ctrl-C ends the workers too.
    """
    # fork starts in milliseconds; elsewhere it is unsafe (macOS) or missing (Windows)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs, numbers, end = iter(jobs), itertools.count(), (None, None)
    again, tried_twice = [], set()
    pool: dict[Connection, Worker] = {}  # by our end of the worker's pipe

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(work, theirs, [ours, *pool]), daemon=True)
        process.start()
        theirs.close()
        pool[ours] = Worker(process)

    def next_job() -> tuple | None:
        """(n, job); None if there is none yet, `end` if there will be none."""
        if again:
            return again.pop()
        job = next(jobs, end)
        return job if job is None or job is end else (next(numbers), job)

    def give(pipe: Connection) -> None:
        """The next job to this worker; one who has none left, and gets none, is dismissed."""
        worker, job = pool[pipe], next_job()
        if job is None or (job is end and worker.jobs):
            return
        with contextlib.suppress(BrokenPipeError):  # it has just died: the next look shows it
            pipe.send(job[1])
        if job is end:
            del pool[pipe]
            pipe.close()
            worker.process.join()
            return
        worker.jobs.append(job)
        if len(worker.jobs) == 1:
            worker.start_clock()

    try:
        for _ in range(workers):
            start()
        while pool:
            for length in range(1, queue + 1):  # nobody gets a second job before all have a first
                for pipe in [pipe for pipe, worker in pool.items() if len(worker.jobs) < length]:
                    give(pipe)
            if not pool:
                break

            ends = [worker.is_over for worker in pool.values() if worker.jobs]
            patience = max(0, min(ends, default=math.inf) - time.monotonic())
            done = wait(pool, min(patience, tick or math.inf))
            now = time.monotonic()
            late = [p for p, w in pool.items() if w.jobs and w.is_over <= now and p not in done]

            for pipe in [*done, *late]:
                worker = pool[pipe]
                result = None if pipe in late else receive(pipe)
                if isinstance(result, UserError):
                    del pool[pipe]
                    pipe.close()
                    raise result
                if result is not None:
                    n, _ = worker.jobs.popleft()
                    worker.start_clock()
                    yield n, result
                    continue

                # it hangs or has died: another one takes its place
                del pool[pipe]
                worker.process.kill()
                worker.process.join()
                pipe.close()
                start()
                again.extend(list(worker.jobs)[:0:-1])
                if not worker.jobs:
                    continue
                n, job = worker.jobs[0]
                if pipe in late:
                    yield n, worker.was_too_slow()
                elif n in tried_twice:
                    yield n, worker.died_twice()
                else:
                    tried_twice.add(n)
                    again.append((n, job))
            if tick and not done:
                yield None, None
    finally:
        # busy only where something was raised: what is almost done may still be stored
        grace = time.monotonic() + 2
        for pipe, worker in pool.items():
            if worker.jobs:
                wait([pipe], max(0, grace - time.monotonic()))
            pipe.close()
            worker.process.kill()
            worker.process.join()


def receive(pipe: Connection):
    """The worker's result, None where it has died."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def serve(work: Callable, pipe: Connection, others: list[Connection]) -> None:
    """A worker: do each path that comes through the pipe, until None does, or the parent dies."""
    for inherited in others:  # kept open here, no pipe would end with the parent
        inherited.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too: the parent decides

    with contextlib.suppress(EOFError, BrokenPipeError):
        while (path := pipe.recv()) is not None:
            try:
                result = work(path)
            except UserError as error:
                result = error
            pipe.send(result)


def seconds_allowed(path: str) -> float:
    try:
        return PATIENCE + locate(path).size / 1e6
    except VideoError:  # missing files fail fast
        return PATIENCE
