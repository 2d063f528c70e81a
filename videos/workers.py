"""Work on files that may hang or kill the process that reads them.

A damaged or hostile file can do worse than fail: it can hang the decoder for ever, or crash the
process that it runs in. So files are read in processes that can be spared. A file may take
`PATIENCE` seconds, and one more for each megabyte. When they are over, its process is killed and
the file is given up, with that reason. Another process goes on with the next.

A process may also die by no fault of its file, say where memory runs out. So the file is tried once
more. If its process dies again, it was the file.

`concurrent.futures` waits for ever for a worker that hangs. `pebble` kills it, as this file does,
but hands out small jobs six times slower (docs/LOG.md).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from cli import UserError

# seconds that a video may take to decode, and one more for each megabyte (10 to 100 are usual)
PATIENCE = 60.0


class Job(NamedTuple):
    """What a worker is busy with."""

    process: multiprocessing.Process
    n: int
    path: str
    is_over: float  # when its time is, on the monotonic clock

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


def run_guarded(work: Callable, paths: Iterable[str], *, workers: int) -> Iterator[tuple]:
    """(n, work(n-th path)) as they are done, by `workers` processes.

    For a path that hangs or kills them, the second is why (str). `paths` is read one at a time. A
    UserError in a worker is raised here. Ctrl-C ends the workers too.
    """
    # fork starts in milliseconds; elsewhere it is unsafe (macOS) or missing (Windows)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs = enumerate(paths)
    again, tried_twice = [], set()
    busy: dict[Connection, Job] = {}  # by our end of the worker's pipe

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(work, theirs, [ours, *busy]), daemon=True)
        process.start()
        theirs.close()
        give(ours, process)

    def give(pipe: Connection, process) -> None:
        """The next path to this worker; without one it is dismissed."""
        n, path = again.pop() if again else next(jobs, (None, None))
        with contextlib.suppress(BrokenPipeError):  # it has just died: the next look shows it
            pipe.send(path)
        if path is None:
            pipe.close()
            process.join()
        else:
            busy[pipe] = Job(process, n, path, time.monotonic() + seconds_allowed(path))

    try:
        for _ in range(workers):
            start()
        while busy:
            soonest = min(job.is_over for job in busy.values())
            done = wait(busy, max(0, soonest - time.monotonic()))
            now = time.monotonic()
            late = [p for p, job in busy.items() if job.is_over <= now and p not in done]

            for pipe in [*done, *late]:
                job = busy.pop(pipe)
                result = None if pipe in late else receive(pipe)
                if isinstance(result, UserError):
                    pipe.close()
                    raise result
                if result is not None:
                    yield job.n, result
                    give(pipe, job.process)
                    continue

                # it hangs or has died: another one takes its place
                job.process.kill()
                job.process.join()
                pipe.close()
                if pipe in late:
                    yield job.n, job.was_too_slow()
                elif job.n in tried_twice:
                    yield job.n, job.died_twice()
                else:
                    tried_twice.add(job.n)
                    again.append((job.n, job.path))
                start()
    finally:
        # busy only where something was raised: what is almost done may still be stored
        grace = time.monotonic() + 2
        for pipe, job in busy.items():
            wait([pipe], max(0, grace - time.monotonic()))
            pipe.close()
            job.process.kill()
            job.process.join()


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
        return PATIENCE + os.path.getsize(path) / 1e6
    except (OSError, ValueError):  # missing files fail fast
        return PATIENCE
