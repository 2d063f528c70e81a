"""Processes that a hostile file may hang or kill.

**Files from strangers.** A damaged or hostile file can do worse than fail: it can hang the decoder
for ever, or crash the process that it runs in. So the cache decodes in processes that can be
spared, and a video may take `PATIENCE` seconds and one more for each megabyte of the file. When
they are over, its process is killed, the video is listed as broken with that reason, and another
process goes on with the next. One that dies is replaced too and its video tried once more, for the
death may not have been the video's fault; if it happens again, it was.
"""

import collections.abc
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time

from cli import UserError

# seconds that a video may take to decode, and one more for each megabyte (10 to 100 are usual)
PATIENCE = 60.0


def run_guarded(
    work: collections.abc.Callable, paths: collections.abc.Iterable[str], *, workers: int
) -> collections.abc.Iterator[tuple[int, object]]:
    """(n, work(n-th path)) as they are done, by `workers` processes; for a path that hangs or kills
    them, why (str).

    `paths` is read one at a time. A UserError in a worker is raised here. Ctrl-C ends the workers
    too.
    """
    # fork starts in milliseconds; elsewhere it is unsafe (macOS) or missing (Windows)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs, again, tried_twice = enumerate(paths), [], set()
    busy = {}  # {our end of its pipe: (process, n, path, when its time is over)}

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, theirs, [ours, *busy]), daemon=True)
        process.start()
        theirs.close()
        give(ours, process)

    def give(pipe, process):
        """The next path to this worker; without one it is dismissed."""
        n, path = again.pop() if again else next(jobs, (None, None))
        with contextlib.suppress(
            BrokenPipeError
        ):  # it has just died, as the next look at its pipe will show
            pipe.send(path)
        if path is None:
            pipe.close()
            process.join()
        else:
            busy[pipe] = process, n, path, time.monotonic() + _seconds_allowed(path)

    try:
        for _ in range(workers):
            start()
        while busy:
            soonest = min(over for *_, over in busy.values())
            done = multiprocessing.connection.wait(busy, max(0, soonest - time.monotonic()))
            late = [
                pipe
                for pipe, (*_, over) in busy.items()
                if over <= time.monotonic() and pipe not in done
            ]
            for pipe in [*done, *late]:
                process, n, path, _ = busy.pop(pipe)
                try:
                    result = pipe.recv() if pipe in done else None
                except (EOFError, ConnectionResetError):
                    result = None
                if isinstance(result, UserError):
                    pipe.close()
                    raise result
                if result is not None:
                    yield n, result
                    give(pipe, process)
                    continue
                process.kill()
                process.join()
                pipe.close()
                if pipe in late:
                    yield (
                        n,
                        (
                            f"{path}: the decoder gave no frames within {_seconds_allowed(path):.0f} s and was "
                            "stopped; encode the file again or remove it"
                        ),
                    )
                elif n in tried_twice:
                    yield (
                        n,
                        (
                            f"{path}: the decoder died twice (exit code {process.exitcode}; -9: killed, perhaps out "
                            "of memory); encode the file again or remove it"
                        ),
                    )
                else:
                    tried_twice.add(n)
                    again.append((n, path))
                start()
    # nobody is busy, unless something was raised: then a video that is almost done may be stored
    finally:
        grace = time.monotonic() + 2
        for pipe, (process, *_) in busy.items():
            multiprocessing.connection.wait([pipe], max(0, grace - time.monotonic()))
            pipe.close()
            process.kill()
            process.join()


def _serve(work, pipe, parents_ends):
    """A worker: the result of `work` for each path that comes through the pipe, until None does, or
    the parent dies.
    """
    for inherited in parents_ends:  # kept open here, no pipe would end with the parent
        inherited.close()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches workers too: leave it to the parent
    try:
        while (path := pipe.recv()) is not None:
            try:
                result = work(path)
            except UserError as error:
                result = error
            pipe.send(result)
    except (EOFError, BrokenPipeError):
        pass


def _seconds_allowed(path: str) -> float:
    try:
        return PATIENCE + os.path.getsize(path) / 1e6
    except (OSError, ValueError):  # missing files fail fast
        return PATIENCE
