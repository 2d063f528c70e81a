"""Video file → frames, and a cache so that every video is decoded once.

A model takes T frames of a video, whatever its length: the clip is cut into T equal segments, and each gives one frame,

    frame of segment i = floor((i + u_i) · count / T)      u_i = ½: its centre ("uniform", for evaluation)
                                                           u_i ~ U[0, 1): a random one ("segment", for training)

so all of the clip is covered, training sees other frames in each epoch, and a clip shorter than T (an image has one
frame) repeats frames. Frames leave as uint8 [T, H, W, 3], RGB, H = W = size: the central square, resized. That is
"resize the short side, then crop", without ever resizing the part that is thrown away.

**Decoding.** A compressed frame is a difference to its neighbours, so a seek means: jump to the key frame before it
and decode from there. One seek a frame decodes the same stretch again and again, and is right only where the file's
index is. We open the file once, `grab()` every frame in order (decoding without colour conversion) and `retrieve()`
only the wanted ones: the n-th grabbed frame is frame n by construction. The header's frame count is a claim, not a
fact: where the frames end early, the segments are cut again for what is really there, or, below half of the claim,
the file is called truncated. Seconds become frames by the average rate, which is approximate on videos of variable
rate.

**The cache.** Decoding is dear and repeats every epoch; `FrameCache` keeps `num_frames` uniform frames of each video
(at least the T of the model, which are then drawn from them by the same rule) in one small file a video:

    folder/3f/3f09…e1.frames = magic, N, H, W, crc32 (20 bytes) + N·H·W·3 bytes of pixels

An image is a video of one frame, and where all frames are the same one, one is kept: N = 1.

The name is a hash of all that the pixels depend on: the path, time and size of the source file, the window in
seconds, and the cache's own settings; so an edited video gets a new entry, and nothing is ever invalidated. An entry
is written to a temporary name and moved into place in one step: an interrupted fill or two runs at once leave whole
entries only. The checksum finds bits that the disk lost; such an entry is decoded again. The alternative, one large
archive, reads a little faster from spinning disks, but needs locks and repair. Raw pixels cost 3 kB a frame at 32 px
and 150 kB at 224 px: a 10,000-video set of 12 frames at 224 px takes 18 GB, and reads without any decoder.

**Files from strangers.** A damaged or hostile file can do worse than fail: it can hang the decoder for ever, or crash
the process that it runs in. So the cache decodes in processes that can be spared, and a video may take `PATIENCE`
seconds and one more for each megabyte of the file. When they are over, its process is killed, the video is listed as
broken with that reason, and another process goes on with the next. One that dies is replaced too and its video tried
once more, for the death may not have been the video's fault; if it happens again, it was.

    python video.py FILE        frames of FILE; without FILE, of a small video of its own
"""

import collections.abc
import contextlib
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import struct
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read by OpenCV: our one line a broken file, not FFmpeg's ten
import cv2
import numpy as np
from tqdm import tqdm

from cli import UserError, run

cv2.setNumThreads(1)  # frames are small: processes decode in parallel, and a thread pool would not survive their fork
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TRUNCATED_BELOW = 0.5  # of the frames that the header claims
PATIENCE = 60.0        # seconds that a video may take to decode, and one more for each megabyte (10 to 100 are usual)


class VideoError(UserError):
    """A video that gives no frames: the path and why, in one line."""


# ---- decoding --------------------------------------------------------------------------------------------------------


def frame_indices(count: int, num_frames: int, sampling: str = "uniform", rng=None) -> np.ndarray:
    """Which of `count` frames to take: int64 [T], not decreasing, one from each of T equal segments.

    `sampling` "uniform" takes the centre of each segment, "segment" a random frame of each, drawn from the
    `np.random.Generator` `rng`. (Segment sampling: Temporal Segment Networks, https://arxiv.org/abs/1608.00859.)
    """
    assert count > 0 and num_frames > 0, f"{count=}, {num_frames=}: both must be positive"
    assert sampling in ("uniform", "segment"), f"{sampling=}: uniform or segment"
    assert sampling == "uniform" or rng is not None, "segment sampling draws from a np.random.Generator: give rng"
    within = 0.5 if sampling == "uniform" else rng.random(num_frames)
    return ((np.arange(num_frames) + within) * count / num_frames).astype(np.int64)  # [T]


def read_frames(path: str | Path, num_frames: int, *, size: int, sampling: str = "uniform", rng=None,
                start: float = 0.0, end: float | None = None) -> np.ndarray:
    """T frames of a video or image file: uint8 [T, H, W, 3], RGB, H = W = `size`, in the order of time.

    Only the seconds `start` … `end` (None: to the end) are sampled; `sampling` and `rng` as in `frame_indices`.
    Raises VideoError (one line) where the file is missing, empty, truncated, not a video, or ends before `start`.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise VideoError(f"{path}: " + ("not a file" if os.path.exists(path) else "no such video file"))
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); fetch it again")
    seed = rng.integers(2**63) if sampling == "segment" else None  # once: where the header lies, pick is called twice

    def pick(count):
        return frame_indices(count, num_frames, sampling, np.random.default_rng(seed))

    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            image = cv2.imread(path, cv2.IMREAD_COLOR)
            if image is None:
                raise VideoError(f"{path}: not an image that OpenCV can decode; fetch it again or remove it")
            frames, wanted = {0: _square(image, size)}, pick(1)
        else:
            frames, wanted = _decode(path, pick, size, start, end)
    except cv2.error as error:
        raise VideoError(f"{path}: OpenCV cannot decode it ({error.err}); fetch it again or remove it") from error
    return np.stack([frames[index] for index in wanted])  # [T, H, W, 3]


def _decode(path: str, pick, size: int, start: float, end: float | None) -> tuple[dict, np.ndarray]:
    """({frame number: pixels}, the T wanted frame numbers) of a video file; pick(count) chooses T of count frames."""
    capture = _open(path)
    claimed, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    if not rate > 0:
        if start > 0 or end is not None:
            raise VideoError(f"{path}: its header has no frame rate, so seconds {start} to {end} cannot be found")
        rate = 1.0
    wanted = _window(path, claimed, rate, start, end, pick) if claimed > 0 else None
    frames, seen = _grab(capture, wanted, size)
    if wanted is None or seen <= wanted[-1]:  # no claim, or a false one: `seen` is the true count
        if seen < max(1, TRUNCATED_BELOW * claimed):
            raise VideoError(f"{path}: truncated or damaged: {seen} of {max(1, claimed)} frames decode; fetch it "
                             "again or remove it")
        wanted = _window(path, seen, rate, start, end, pick)
        frames, _ = _grab(_open(path), wanted, size)
    return frames, wanted


def _open(path: str) -> cv2.VideoCapture:
    _check_name(path)
    # FFmpeg by name: other back ends read "video7010.mp4" as a pattern of numbered pictures. One thread: see the top.
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise VideoError(f"{path}: not a video that OpenCV can open (truncated, or no video at all); fetch it again")
    return capture


def _window(path: str, count: int, rate: float, start: float, end: float | None, pick) -> np.ndarray:
    """The T wanted frame numbers among those of seconds start … end."""
    first = int(start * rate)
    last = count if end is None else min(count, max(first + 1, round(end * rate)))
    if first >= last:
        raise VideoError(f"{path}: lasts {count / rate:.1f} s, so nothing is left from second {start} on")
    return first + pick(last - first)


def _grab(capture: cv2.VideoCapture, wanted: np.ndarray | None, size: int) -> tuple[dict, int]:
    """({n: frame n [H, W, 3]} for n wanted, frames seen), up to the last wanted one; wanted None counts them all."""
    frames, keep, seen = {}, set() if wanted is None else set(wanted.tolist()), 0
    while (wanted is None or len(frames) < len(keep)) and capture.grab():
        if seen in keep:
            decoded, image = capture.retrieve()
            if not decoded:
                break
            frames[seen] = _square(image, size)
        seen += 1
    return frames, seen


def _square(image: np.ndarray, size: int) -> np.ndarray:
    """[h, w, 3] BGR of any size → its central square as [size, size, 3] RGB."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top:top + side, left:left + side]
    # INTER_AREA averages all the pixels that shrink into one: no aliasing, so no flicker from frame to frame
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


# ---- the cache -------------------------------------------------------------------------------------------------------


class FrameCache:
    """Frames of videos on disk: `num_frames` uniform frames of size × size pixels each, decoded when first asked for.

    Safe for threads and processes. `damaged` counts entries that had to be decoded again.
    """

    HEADER = struct.Struct("<4s4I")  # magic, N, H, W, crc32 of the pixels
    MAGIC = b"FRM1"

    def __init__(self, folder: str | Path, *, size: int, num_frames: int):
        self.folder, self.size, self.num_frames = Path(folder), size, num_frames
        self.damaged = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot hold the frame cache ({error.strerror}); choose another") from error

    def get(self, path: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """The video's frames, uint8 [N, H, W, 3], RGB, not writable; decoded and stored if they are not there.

        Raises VideoError.
        """
        entry = self._entry(path, start, end)
        try:
            frames = self._load(entry)
        except FileNotFoundError:
            frames = None
        else:
            if frames is None:
                if not self.damaged:
                    print(f"{entry}: damaged, so {path} is decoded again (further ones: only counted)", file=sys.stderr)
                self.damaged += 1
        if frames is None:
            for _, result in run_apart(partial(self._try_store, start=start, end=end), [str(path)], workers=1):
                if isinstance(result, str):
                    raise VideoError(result)
            frames = self._load(entry)
            assert frames is not None, f"{entry}: was written, and is damaged or of another video"
        return frames

    def fill(self, paths: collections.abc.Sequence[str], *, start: float = 0.0, end: float | None = None,
             workers: int | None = None, progress: bool = True) -> dict[str, str]:
        """Decode what is not there yet, on `workers` processes (None: one a core), and print the size of the whole.

        Returns {path: reason} of the videos that cannot be decoded. Interrupted, it goes on from there the next time.
        """
        sizes = np.fromiter((self._entry_size(path, start, end) for path in paths), np.int64, len(paths))
        todo, reasons = np.flatnonzero(sizes == 0), {}  # numbers, not paths: there may be millions
        stored = run_apart(partial(self._try_store, start=start, end=end), (paths[i] for i in todo),
                           workers=min(workers or os.cpu_count(), len(todo)))
        for n, result in tqdm(stored, total=len(todo), desc="decode videos", unit="video",
                              disable=not progress or not len(todo)):
            if isinstance(result, str):
                reasons[todo[n]] = result
            else:
                sizes[todo[n]] = result
        if progress:
            print(f"frame cache {self.folder}: {len(paths) - len(reasons)} videos × {self.num_frames} frames of "
                  f"{self.size} px, {sizes.sum() / 1e6:.1f} MB ({len(todo) - len(reasons)} new)"
                  + (f", {len(reasons)} broken" if reasons else ""))
        return {paths[i]: reasons[i] for i in sorted(reasons)}

    def _entry(self, path, start, end) -> Path:
        """Where this video's frames lie. Raises VideoError if the video is missing."""
        try:
            resolved = os.path.realpath(path)
            stat = os.stat(resolved)
        except (OSError, ValueError) as error:  # ValueError: no disk can hold such a name
            raise VideoError(f"{str(path)[:200]!r}: no such video file") from error
        recipe = (resolved, stat.st_mtime_ns, stat.st_size, float(start), end if end is None else float(end), self.size,
                  self.num_frames, self.MAGIC)
        name = hashlib.sha256(repr(recipe).encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.frames"

    def _entry_size(self, path, start, end) -> int:
        """Bytes of this video's entry; 0 if there is none of a right size. (Checksums are looked at when read.)"""
        try:
            size = os.stat(self._entry(path, start, end)).st_size
        except (OSError, VideoError):
            return 0
        return size if size in (self._size_of(1), self._size_of(self.num_frames)) else 0

    def _size_of(self, num_frames: int) -> int:
        return self.HEADER.size + num_frames * self.size**2 * 3

    def _load(self, entry: Path) -> np.ndarray | None:
        """The pixels of an entry, None if it is damaged."""
        data = entry.read_bytes()
        kept = 1 if len(data) == self._size_of(1) else self.num_frames
        if len(data) != self._size_of(kept) or self.HEADER.unpack_from(data) != (
                self.MAGIC, kept, self.size, self.size, zlib.crc32(memoryview(data)[self.HEADER.size:])):
            return None
        frames = np.frombuffer(data, np.uint8, offset=self.HEADER.size).reshape(kept, self.size, self.size, 3)
        return np.broadcast_to(frames, (self.num_frames, *frames.shape[1:]))  # [N, H, W, 3]

    def _store(self, path, entry: Path, start, end) -> int:
        """Decode a video and write its entry; the entry's size in bytes."""
        frames = read_frames(path, self.num_frames, size=self.size, start=start, end=end)
        if (frames == frames[0]).all():
            frames = frames[:1]
        header = self.HEADER.pack(self.MAGIC, *frames.shape[:3], zlib.crc32(frames.data))
        try:
            entry.parent.mkdir(exist_ok=True)
            unfinished = entry.with_suffix(f".{secrets.token_hex(8)}.tmp")  # another name for each writer
            try:
                unfinished.write_bytes(header + frames.data)
                os.replace(unfinished, entry)
            finally:  # also after Ctrl-C or on a full disk: leave nothing half written
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the frame cache ({error.strerror}); make room or choose "
                            "another folder") from error
        return len(header) + frames.nbytes

    def _try_store(self, path, start, end) -> int | str:
        """Store one video (in a worker process): the size of its entry, or the reason if it is broken."""
        try:
            return self._store(path, self._entry(path, start, end), start, end)
        except VideoError as error:
            return str(error)


# ---- processes that may hang or die ----------------------------------------------------------------------------------


def run_apart(work: collections.abc.Callable, paths: collections.abc.Iterable[str], *,
              workers: int) -> collections.abc.Iterator[tuple[int, object]]:
    """(n, work(n-th path)) as they are done, by `workers` processes; for a path that hangs or kills them, why (str).

    `paths` is read one at a time. A UserError in a worker is raised here. Ctrl-C ends the workers too.
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
        with contextlib.suppress(BrokenPipeError):  # it has just died, as the next look at its pipe will show
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
            late = [pipe for pipe, (*_, over) in busy.items() if over <= time.monotonic() and pipe not in done]
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
                    yield n, (f"{path}: the decoder gave no frames within {_seconds_allowed(path):.0f} s and was "
                              "stopped; encode the file again or remove it")
                elif n in tried_twice:
                    yield n, (f"{path}: the decoder died twice (exit code {process.exitcode}; -9: killed, perhaps out "
                              "of memory); encode the file again or remove it")
                else:
                    tried_twice.add(n)
                    again.append((n, path))
                start()
    finally:  # nobody is busy, unless something was raised: then a video that is almost done may be stored
        grace = time.monotonic() + 2
        for pipe, (process, *_) in busy.items():
            multiprocessing.connection.wait([pipe], max(0, grace - time.monotonic()))
            pipe.close()
            process.kill()
            process.join()


def _serve(work, pipe, parents_ends):
    """A worker: the result of `work` for each path that comes through the pipe, until None does, or the parent dies."""
    for inherited in parents_ends:                 # kept open here, no pipe would end with the parent
        inherited.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C reaches workers too: leave it to the parent
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
    except (OSError, ValueError):                  # missing files fail fast
        return PATIENCE


# ---- parts of long videos --------------------------------------------------------------------------------------------


def read_windows(path: str | Path, num_frames: int, *, size: int,
                 window: float) -> collections.abc.Iterator[tuple[float, float, np.ndarray]]:
    """(start, end, frames) of each window of a video, in the order of time: the file is decoded once for all of them.

    The video is cut into stretches of equally many frames that last about `window` seconds (¾ to 1½ times that; a
    shorter video is one window). start, end: seconds by the frames' own time stamps, so they hold at a variable rate
    too. frames: uint8 [T, H, W, 3], uniform, as of `read_frames`. One window is in memory at a time. Raises VideoError,
    for a truncated file only where its frames end: what was yielded before is then not worth keeping.
    """
    assert window > 0, f"{window=}: must be positive"
    path, position = str(path), 0
    _check_name(path)
    try:
        capture = _open(path)
        count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        if not rate > 0:
            raise VideoError(f"{path}: its header has no frame rate, so no second of it can be found")
        if count <= 0:  # no claim: count first
            count, capture = max(1, _grab(capture, None, size)[1]), _open(path)
        edges = np.linspace(0, count, min(count, max(1, round(count / rate / window))) + 1).astype(np.int64)
        for first, last in zip(edges.tolist(), edges[1:].tolist()):
            wanted, frames, start, end = (first + frame_indices(last - first, num_frames)).tolist(), {}, 0.0, 0.0
            while position < last and capture.grab():
                end = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if position == first:
                    start = end
                if position in wanted:
                    decoded, image = capture.retrieve()
                    if not decoded:
                        break
                    frames[position] = _square(image, size)
                position += 1
            if position < last and position < max(1, TRUNCATED_BELOW * count):
                raise VideoError(f"{path}: truncated or damaged: {position} of {count} frames decode; fetch it again "
                                 "or remove it")
            if frames:
                there = [frames[index] for index in wanted if index in frames]  # not all T where the frames end early
                yield start, end + 1 / rate, np.stack([there[i] for i in frame_indices(len(there), num_frames)])
            if position < last:
                return
    except cv2.error as error:
        raise VideoError(f"{path}: OpenCV cannot decode it ({error.err}); fetch it again or remove it") from error


def glimpse(path: str | Path, num_frames: int, *, size: int, start: float, end: float) -> np.ndarray:
    """About the frames of seconds start … end, uint8 [T, H, W, 3], RGB, for a person to look at.

    Seeks once, so that the end of a long film costs no more than its beginning; where the file's index is wrong, the
    frames may be late: never for a model. Raises VideoError.
    """
    path, frames, shown = str(path), [], -1.0
    capture = _open(path)
    capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * max(0, start - 1))  # a second early: at a variable rate it lands late
    half = 0.5 / max(capture.get(cv2.CAP_PROP_FPS), 1.0)  # of a frame: time stamps are rounded
    for moment in start + (np.arange(num_frames) + 0.5) / num_frames * (end - start):
        while shown < moment - half and capture.grab():
            shown = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        decoded, image = capture.retrieve()
        if decoded:
            frames.append(_square(image, size))
    if not frames:
        raise VideoError(f"{path}: no frame of seconds {start:.1f} to {end:.1f} decodes")
    return np.stack([frames[i] for i in frame_indices(len(frames), num_frames)])  # [T, H, W, 3]


def _check_name(path: str) -> None:
    """OpenCV crashes (segmentation fault) on a name that is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise VideoError(f"{path}: OpenCV takes only names in UTF-8; rename the file") from error


def write_video(path: str | Path, frames: np.ndarray, rate: float = 25.0) -> None:
    """Write uint8 [T, H, W, 3] RGB frames as an mp4 file (codec mp4v, lossy), by OpenCV."""
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    assert writer.isOpened(), f"{path}: OpenCV cannot write mp4 here"
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/grey.mp4"
        if len(sys.argv) == 1:  # 100 frames that grow brighter: its mean tells a frame's number, roughly
            write_video(path, np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None, None], (100, 64, 96, 3)))
        cache = FrameCache(f"{folder}/cache", size=32, num_frames=8)
        cache.fill([path], workers=1)
        print("uniform  ", frame_indices(100, 8), "of 100 frames")
        print("segment  ", frame_indices(100, 8, "segment", np.random.default_rng(0)))
        frames = cache.get(path)
        print("frames   ", frames.shape, frames.dtype, "mean brightness", frames.mean(axis=(1, 2, 3)).astype(int))


if __name__ == "__main__":
    run(main)
