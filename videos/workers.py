"""Work on files that may hang or kill the process that reads them.

A damaged or hostile file can do worse than fail: it can hang the decoder for ever, or crash the
process that it runs in. So files are read in processes that can be spared. A file may take
`PATIENCE` seconds, and one more for each megabyte. When they are over, its process is killed and
the file is given up, with that reason. Another process goes on with the next.

A process may also die by no fault of its file, say where memory runs out. So the file is tried once
more. If its process dies again, it was the file.

A job is the path of a file, or has a `path`. Small jobs may be handed out in chunks, since a
message costs a tenth of a small video. Of a process that was lost, each is tried again alone.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from cli import UserError
from videos.decode import VideoError, locate

# seconds that a video may take to decode, and one more for each megabyte (10 to 100 are usual)
PATIENCE = 60.0


@dataclass
class Worker:
    """A process and its jobs, (n, job)."""

    process: multiprocessing.Process
    jobs: list[tuple] = field(default_factory=list)
    is_over: float = math.inf  # when their time is, on the monotonic clock

    def paths(self) -> list[str]:
        return [getattr(job, "path", job) for _, job in self.jobs]

    def was_too_slow(self) -> str:
        (path,) = self.paths()
        return (
            f"{path}: the decoder gave no frames within {seconds_allowed(path):.0f} s and was "
            "stopped; encode the file again or remove it"
        )

    def died_twice(self) -> str:
        (path,) = self.paths()
        return (
            f"{path}: the decoder died twice (exit code {self.process.exitcode}; -9: killed, "
            "perhaps out of memory); encode the file again or remove it"
        )


def run_guarded(
    work: Callable, jobs: Iterable, *, workers: int, chunk: int = 1, tick: float = math.inf
) -> Iterator[tuple]:
    """(n, work(n-th job)) as they are done, by `workers` processes, up to `chunk` a message.

    For a job that hangs or kills them, the second is why (str). `jobs` is read one at a time. With
    a `tick` (seconds) it may yield None: no job yet. Then (None, None) comes back after each tick
    without a result. A UserError in a worker is raised here. Ctrl-C ends the workers too.
    """
    # fork starts in milliseconds; elsewhere it is unsafe (macOS) or missing (Windows)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs, numbers, end = iter(jobs), itertools.count(), object()
    again, died = [], set()
    pool: dict[Connection, Worker] = {}  # by our end of the worker's pipe

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(work, theirs, [ours, *pool]), daemon=True)
        process.start()
        theirs.close()
        pool[ours] = Worker(process)

    def take() -> list[tuple] | None:
        """Some (n, job); [] if there is none yet, None if there will be none."""
        if again:
            return [again.pop()]
        taken = []
        while len(taken) < chunk:
            job = next(jobs, end)
            if job is end:
                return taken or None
            if job is None:
                return taken
            taken.append((next(numbers), job))
        return taken

    def give(pipe: Connection) -> None:
        """The next jobs to this worker; where there will be none, it is dismissed."""
        worker, taken = pool[pipe], take()
        if taken:
            worker.jobs = taken
            worker.is_over = time.monotonic() + seconds_allowed(*worker.paths())
        if taken != []:
            with contextlib.suppress(BrokenPipeError):  # it has just died: the next look shows it
                pipe.send(taken and [job for _, job in taken])
        if taken is None:
            del pool[pipe]
            pipe.close()
            worker.process.join()

    try:
        for _ in range(workers):
            start()
        while pool:
            for pipe in [pipe for pipe, worker in pool.items() if not worker.jobs]:
                give(pipe)
            soonest = min((worker.is_over for worker in pool.values()), default=0)
            patience = min(tick, max(0, soonest - time.monotonic()))
            done = wait(pool, None if patience == math.inf else patience)
            now = time.monotonic()
            late = [p for p, worker in pool.items() if worker.is_over <= now and p not in done]

            for pipe in [*done, *late]:
                worker = pool[pipe]
                results = None if pipe in late else receive(pipe)
                if isinstance(results, UserError):
                    del pool[pipe]
                    pipe.close()
                    raise results
                if results is not None:
                    finished = [n for n, _ in worker.jobs]
                    worker.jobs, worker.is_over = [], math.inf
                    yield from zip(finished, results)
                    continue

                # it hangs or has died: another one takes its place
                del pool[pipe]
                worker.process.kill()
                worker.process.join()
                pipe.close()
                start()
                is_alone = len(worker.jobs) == 1
                if is_alone and pipe in late:
                    yield worker.jobs[0][0], worker.was_too_slow()
                elif is_alone and worker.jobs[0][0] in died:
                    yield worker.jobs[0][0], worker.died_twice()
                else:
                    again.extend(worker.jobs)
                    died.update(n for n, _ in worker.jobs if pipe in done)
            if not done and tick < math.inf:
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


def receive(pipe: Connection) -> list | UserError | None:
    """The worker's results, None where it has died."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def serve(work: Callable, pipe: Connection, others: list[Connection]) -> None:
    """A worker: do the jobs that come through the pipe, until None does, or the parent dies."""
    for inherited in others:  # kept open here, no pipe would end with the parent
        inherited.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's request to stop is not for them

    with contextlib.suppress(EOFError, ConnectionError):
        while (jobs := pipe.recv()) is not None:
            try:
                results = [work(job) for job in jobs]
            except UserError as error:
                results = error
            pipe.send(results)


def seconds_allowed(*paths: str) -> float:
    """For these files, one after the other."""
    seconds = PATIENCE
    for path in paths:
        with contextlib.suppress(VideoError):  # missing files fail fast
            seconds += locate(path).size / 1e6
    return seconds
