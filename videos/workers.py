"""Work on files that may hang or kill the process that reads them.

A damaged or hostile file can do worse than fail: it can hang the decoder for ever, or crash the
process that it runs in. So files are read in processes that can be spared. A thread waits for each:

    thread  ── jobs ──>  process: work(job) for each of a few
            <── results, or the end of the pipe, or nothing in time

A file may take `PATIENCE` seconds, and one more for each megabyte. When they are over, its process
is killed and the file is given up. Another process goes on with the next.

A process may also die by no fault of its file, say where memory runs out. So the file is tried once
more. If its process dies again, it was the file.

A job is the path of a file, or has a `path`. Small jobs travel together: to wake a process and this
one costs half as much as to decode a clip of a few kilobytes (docs/scaling.md). Where one of
several hangs or kills the process, each is tried alone. Arrays come back through memory that thread
and process share: for frames of 224 pixels, half of the time of a pipe.

`concurrent.futures` waits for ever for a process that hangs. `pebble` kills it, as this file does,
but is six times slower on small jobs (docs/LOG.md).
"""

import collections
import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection

from cli import UserError
from videos.decode import VideoError, locate

# seconds that a video may take to decode, and one more for each megabyte (10 to 100 are usual)
PATIENCE = 60.0

# fork starts in milliseconds; elsewhere it is unsafe (macOS) or missing (Windows)
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
TOGETHER = 8  # small jobs
# bytes of the memory that a thread and its process share; what does not fit takes the pipe
ROOM = 2**24  # 8 × 13 frames of 224 pixels

# held while a process starts or ends: Python loses the exit code where two threads wait for it
CHANGING = threading.Lock()
OUR_ENDS = weakref.WeakSet()  # of the pipes to all processes


class Worker:
    """A process that works for one thread at a time, and is replaced where it hangs or dies."""

    def __init__(self, work: Callable):
        self.work, self.is_closed = work, False
        # only a fork inherits memory without a name
        can_share = CONTEXT.get_start_method() == "fork"
        self.room = mmap.mmap(-1, ROOM) if can_share else bytearray()
        self.start()

    def start(self) -> None:
        # one at a time: no process may inherit the other end of a pipe, or its death would not show
        with CHANGING:
            if self.is_closed:
                raise CancelledError
            self.pipe, theirs = CONTEXT.Pipe()
            OUR_ENDS.add(self.pipe)
            args = (self.work, theirs, self.room, list(OUR_ENDS))
            self.process = CONTEXT.Process(target=serve, args=args, daemon=True)
            self.process.start()
            theirs.close()

    def call(self, jobs: Sequence) -> list:
        """For each job work(job), or the VideoError that it raises, or that says how its file hangs
        or kills the process. Any other UserError is raised.
        """
        seconds = PATIENCE + sum(map(megabytes, jobs))
        for _ in range(2):
            answer, is_late = self.ask(jobs, seconds)
            if answer:
                results, error = answer
                if error:
                    raise error
                return results

            self.stop()
            exit_code = self.process.exitcode
            self.start()
            if len(jobs) > 1:  # which of them was it?
                return [self.call([job])[0] for job in jobs]
            if is_late:
                break

        why = f"died twice (exit code {exit_code}; -9: killed, perhaps out of memory)"
        if is_late:
            why = f"gave no frames within {seconds:.0f} s and was stopped"
        path = path_of(jobs[0])
        return [VideoError(f"{path}: the decoder {why}; encode the file again or remove it")]

    def ask(self, jobs: Sequence, seconds: float) -> tuple[tuple | None, bool]:
        """(what comes back, is it late); None: nothing."""
        try:
            self.pipe.send(jobs)
            if not self.pipe.poll(seconds):
                return None, True
            return unpack(*self.pipe.recv(), self.room), False
        except (EOFError, OSError):  # it has died, perhaps while it sent
            return None, False

    def close(self) -> None:
        """End the process, and the call that a thread may be waiting for."""
        self.is_closed = True
        self.stop()

    def stop(self) -> None:
        with CHANGING:
            self.process.kill()
            self.process.join()


def serve(work: Callable, pipe: Connection, room, inherited: list[Connection]) -> None:
    """In the process: do the jobs that come through the pipe, until the parent is gone."""
    for end in inherited:  # kept open here, no pipe would end with the parent
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's request to stop is not for it

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            jobs = pipe.recv()
            try:
                answer = try_all(work, jobs), None
            except UserError as error:
                answer = None, error
            pipe.send(pack(answer, room))


def try_all(work: Callable, jobs: Iterable) -> list:
    """For each job work(job), or the VideoError that it raises."""
    results = []
    for job in jobs:
        try:
            results.append(work(job))
        except VideoError as error:
            results.append(error)
    return results


def pack(answer, room: mmap.mmap | bytearray) -> tuple[bytes, list[int]]:
    """(pickle of the answer, where each array ends in `room`): those that fit are put there."""
    ends = [0]

    def takes_the_pipe(array: pickle.PickleBuffer) -> bool:
        end = ends[-1] + array.raw().nbytes
        if end > len(room):
            return True
        room[ends[-1] : end] = array.raw()
        ends.append(end)
        return False

    return pickle.dumps(answer, protocol=5, buffer_callback=takes_the_pipe), ends


def unpack(pickled: bytes, ends: list[int], room: mmap.mmap | bytearray):
    """The answer, with copies of its arrays: the next one needs the room."""
    shared = memoryview(room)
    arrays = [bytearray(shared[start:end]) for start, end in itertools.pairwise(ends)]
    return pickle.loads(pickled, buffers=arrays)


def path_of(job) -> str:
    return getattr(job, "path", job)


def megabytes(job) -> float:
    with contextlib.suppress(VideoError):  # missing files fail fast
        return locate(path_of(job)).size / 1e6
    return 0.0


# ---- many at a time ------------------------------------------------------------------------------


@contextlib.contextmanager
def guard(work: Callable, workers: int) -> Iterator[Callable]:
    """A function of jobs that `workers` threads may call at once, each with a process of its own.

    It returns for each job work(job), or the VideoError that it raises, or that says how its file
    hangs or kills the process. Any other UserError is raised. At the end all processes are ended,
    and calls that are not over raise an error.
    """
    pool = [Worker(work) for _ in range(workers)]
    idle = queue.SimpleQueue()
    for worker in pool:
        idle.put(worker)

    def call(jobs: Sequence) -> list:
        worker, results = idle.get(), []
        try:
            for i in range(0, len(jobs), TOGETHER):
                results += worker.call(jobs[i : i + TOGETHER])
            return results
        finally:
            idle.put(worker)

    try:
        yield call
    finally:
        for worker in pool:
            worker.close()


def run_guarded(
    work: Callable, jobs: Iterable, *, workers: int | None, together: int = 1
) -> Iterator[tuple]:
    """(n, work(n-th job)) as they are done, by up to `workers` processes (None: one a core).

    For a job whose file is broken, hangs or kills them, the second is why (str). Any other
    UserError is raised. Ctrl-C ends the processes too. together: jobs that a thread takes at once.
    """
    jobs = list(jobs)
    workers = min(workers or os.cpu_count(), len(jobs))
    if not jobs:
        return

    todo, running = iter(range(0, len(jobs), together)), {}
    with ThreadPoolExecutor(workers) as threads, guard(work, workers) as guarded:
        while True:
            # two calls a thread, so that none waits for the consumer
            for first in itertools.islice(todo, 2 * workers - len(running)):
                running[threads.submit(guarded, jobs[first : first + together])] = first
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                for n, result in enumerate(future.result(), running.pop(future)):
                    yield n, str(result) if isinstance(result, VideoError) else result


def prefetch(load: Callable, jobs: Iterable, workers: int = 2) -> Iterator:
    """load(job) for each job, in order, read ahead by `workers` threads.

    Threads are enough: reading, checksums and copies release Python's lock. An error is raised
    where its result is awaited.
    """
    ahead = collections.deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            ahead.append(threads.submit(load, job))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:  # the consumer stopped early: what has not begun need not
        threads.shutdown(wait=False, cancel_futures=True)
