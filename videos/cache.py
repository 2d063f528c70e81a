"""A cache of frames, so that every video is decoded once.

Decoding is dear, and training would repeat it every epoch. `FrameCache` keeps `num_frames` uniform
frames of each video, in one small file a video:

    folder/3f/3f09…e1.frames = magic, N, H, W, crc32 (20 bytes) + N·H·W·3 bytes of pixels

An image is a video of one frame. Where all frames are the same one, one is kept: N = 1.

The name is a hash of all that the pixels depend on: path, time and size of the source file, the
window in seconds, and the cache's own settings. So an edited video gets a new entry, and nothing is
ever invalidated. A file is whole or not there, and a checksum finds bits that the disk lost: such
an entry is decoded again. One large archive reads a little faster from spinning disks, but needs
locks and repair.

**Size.** Raw pixels cost 3 kB a frame at 32 px and 150 kB at 224 px. A set of 10,000 videos of 24
frames at 224 px takes 36 GB, and is read without any decoder. Of a set that does not fit into
`gigabytes`, a fixed share is kept, the videos whose hash is small: an epoch reads each video once,
so a cache of the latest ones would lose each just before it is needed. Where other sets are in the
folder too, the entries that were written first go first.

JPEG would keep eight times as many, but is not the same pixels: a batch would then depend on what
happens to be in the cache (bench/data.py has its size and time).
"""

import contextlib
import hashlib
import os
import random
import shutil
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cli import UserError, write_whole
from videos.decode import VIDEO_SUFFIXES, VideoError, is_there, locate, read_frames
from videos.workers import TOGETHER, run_guarded

EVICT_EVERY = 1000  # new entries, on average


class Want(NamedTuple):
    """Some frames of a video."""

    path: str
    start: float = 0.0  # the seconds of the video that count
    end: float | None = None
    only: list[int] | slice = slice(None)  # of the frames that the cache keeps, by number


class FrameCache:
    """`num_frames` uniform frames of size × size pixels of each video, on disk.

    Safe for threads and processes. `share`: of the videos that are kept. `damaged` counts entries
    that had to be decoded again.
    """

    HEADER = struct.Struct("<4s4I")  # magic, N, H, W, crc32 of the pixels
    MAGIC = b"FRM1"

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int,
        num_frames: int,
        gigabytes: float = float("inf"),
        num_videos: int = 0,
    ):
        """gigabytes: what all entries in the folder may take. num_videos: that will be read."""
        self.folder, self.size, self.num_frames = Path(folder), size, num_frames
        self.damaged = 0

        # how many of the videos fit; without their number: all, but none into nothing
        self.capacity = gigabytes * 1e9
        needed = num_videos * self.size_of(num_frames)
        self.share = min(1.0, self.capacity / needed) if needed else float(gigabytes > 0)

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot hold the frame cache ({error.strerror}); choose another"
            ) from error

    def fill(
        self,
        paths: Sequence[str],
        *,
        start: float = 0.0,
        end: float | None = None,
        workers: int | None = None,
        progress: bool = True,
    ) -> dict[str, str]:
        """Decode what is not there yet, by `workers` processes (None: one a core).

        Returns {path: reason} of the videos that cannot be decoded. Files that hang or crash the
        decoder are among them. Interrupted, it goes on from there the next time.
        """
        todo = [path for path in paths if not self.has(path, start, end)]
        self.check_room(todo, progress)

        # one frame of each comes back, and nobody looks at it
        wants = [Want(path, start, end, [0]) for path in todo]
        stored = run_guarded(self.read, wants, workers=workers, together=TOGETHER)
        is_silent = not progress or not todo
        bar = tqdm(stored, "decode videos", len(todo), unit="video", disable=is_silent)
        reasons = sorted((n, found) for n, found in bar if isinstance(found, str))
        self.evict()

        broken = {todo[n]: reason for n, reason in reasons}
        if progress:
            what = f"{len(paths) - len(broken)} videos × {self.num_frames} frames"
            counts = f"{len(todo) - len(broken)} new, {len(broken)} broken"
            print(f"frame cache {self.folder}: {what} of {self.size} px ({counts})")
        return broken

    def check_room(self, todo: list[str], progress: bool) -> None:
        """Say what these videos will take. Raise UserError where the disk has less."""
        is_video = [path.lower().endswith(VIDEO_SUFFIXES) for path in todo if is_there(path)]
        needed = sum(self.size_of(self.num_frames if video else 1) for video in is_video)
        needed = min(needed, self.capacity) / 1e6
        free = shutil.disk_usage(self.folder).free / 1e6
        line = (
            f"frame cache {self.folder}: {len(is_video)} new videos × {self.num_frames} frames of "
            f"{self.size} px take about {needed:,.0f} MB, and {free:,.0f} MB are free"
        )
        if needed > free:
            raise UserError(f"{line}; take a larger disk (--cache), or keep fewer (--cache-gb)")
        if progress and is_video:
            print(line, flush=True)

    def read(self, want: Want) -> np.ndarray:
        return self.get(*want)

    def get(
        self,
        path: str | Path,
        start: float = 0.0,
        end: float | None = None,
        only: list[int] | slice = slice(None),
    ) -> np.ndarray:
        """The video's frames, uint8 [N, H, W, 3], RGB. Raises VideoError. `only`: some of them.

        An entry that is missing or damaged is made here, in this process: `fill` first, which is
        safe from files that hang.
        """
        how = dict(size=self.size, start=start, end=end)
        if not self.keeps(path):
            return read_frames(path, self.num_frames, **how, only=only)
        entry = self.entry(path, start, end)
        frames = self.load(entry, path)
        if frames is None:
            frames = self.store(entry, read_frames(path, self.num_frames, **how))
        return np.broadcast_to(frames, (self.num_frames, *frames.shape[1:]))[only]

    def evict(self) -> None:
        """Where the folder holds more than it may, delete the entries that were written first."""
        if self.capacity == float("inf"):
            return
        entries = []
        for path in self.folder.glob("*/*.frames"):
            with contextlib.suppress(OSError):  # another process was faster
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))

        excess = sum(size for _, size, _ in entries) - self.capacity
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def entry(self, path: str | Path, start: float, end: float | None) -> Path:
        """Where this video's frames lie. Raises VideoError if the video is missing."""
        file, *source = locate(path)
        window = (float(start), end if end is None else float(end))
        recipe = (os.path.realpath(file), *source, *window, self.size, self.num_frames, self.MAGIC)
        name = hashlib.sha256(repr(recipe).encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.frames"

    def keeps(self, path: str | Path) -> bool:
        """Is this one of the videos that fit?"""
        return zlib.crc32(str(path).encode("utf-8", "surrogatepass")) < self.share * 2**32

    def has(self, path: str, start: float, end: float | None) -> bool:
        """Is there an entry of this video? Whether it is whole is seen when it is read."""
        try:
            return self.entry(path, start, end).exists()
        except VideoError:
            return False

    def size_of(self, num_frames: int) -> int:
        return self.HEADER.size + num_frames * self.size**2 * 3

    def load(self, entry: Path, path: str | Path) -> np.ndarray | None:
        """The pixels of an entry, [N or 1, H, W, 3]; None if it is damaged or not there."""
        try:
            data = entry.read_bytes()
        except FileNotFoundError:
            return None
        kept = 1 if len(data) == self.size_of(1) else self.num_frames
        checksum = zlib.crc32(memoryview(data)[self.HEADER.size :])
        header = self.HEADER.pack(self.MAGIC, kept, self.size, self.size, checksum)
        if len(data) == self.size_of(kept) and data.startswith(header):
            frames = np.frombuffer(data, np.uint8, offset=self.HEADER.size)
            return frames.reshape(kept, self.size, self.size, 3)

        if not self.damaged:
            what = f"{entry}: damaged, so {path} is decoded again (further ones: only counted)"
            print(what, file=sys.stderr)
        self.damaged += 1
        return None

    def store(self, entry: Path, frames: np.ndarray) -> np.ndarray:
        """Write an entry. Returns what was written, [N or 1, H, W, 3]."""
        if (frames == frames[0]).all():
            frames = frames[:1]
        header = self.HEADER.pack(self.MAGIC, *frames.shape[:3], zlib.crc32(frames.data))
        with write_whole(entry) as unfinished:
            unfinished.write_bytes(header + frames.data)
        if random.random() < 1 / EVICT_EVERY:
            self.evict()
        return frames
