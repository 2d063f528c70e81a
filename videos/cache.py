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

Raw pixels cost 3 kB a frame at 32 px and 150 kB at 224 px. A set of 10,000 videos of 24 frames at
224 px takes 36 GB, and is read without any decoder.
"""

import hashlib
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError, write_whole
from videos.decode import VIDEO_SUFFIXES, VideoError, read_frames
from videos.workers import run_guarded


class FrameCache:
    """`num_frames` uniform frames of size × size pixels of each video, on disk.

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
        present = (self.entry_size(path, start, end) for path in paths)
        sizes = np.fromiter(present, np.int64, len(paths))
        todo = np.flatnonzero(sizes == 0)  # numbers, not paths: there may be millions
        self.check_room([paths[i] for i in todo], progress)

        workers = min(workers or os.cpu_count(), len(todo))
        work = partial(self.try_store, start=start, end=end)
        stored = run_guarded(work, (paths[i] for i in todo), workers=workers)
        is_silent = not progress or not len(todo)
        reasons = {}

        for n, result in tqdm(stored, "decode videos", len(todo), unit="video", disable=is_silent):
            if isinstance(result, str):
                reasons[todo[n]] = result
            else:
                sizes[todo[n]] = result

        if progress:
            what = f"{len(paths) - len(reasons)} videos × {self.num_frames} frames"
            counts = f"{len(todo) - len(reasons)} new"
            broken = f", {len(reasons)} broken" if reasons else ""
            print(
                f"frame cache {self.folder}: {what} of {self.size} px, "
                f"{sizes.sum() / 1e6:.1f} MB ({counts}){broken}"
            )
        return {paths[i]: reasons[i] for i in sorted(reasons)}

    def check_room(self, todo: list[str], progress: bool) -> None:
        """Say what these videos will take. Raise UserError where the disk has less."""
        is_video = [path.lower().endswith(VIDEO_SUFFIXES) for path in todo if os.path.exists(path)]
        needed = sum(self.size_of(self.num_frames if video else 1) for video in is_video) / 1e6
        free = shutil.disk_usage(self.folder).free / 1e6
        line = (
            f"frame cache {self.folder}: {len(is_video)} new videos × {self.num_frames} frames of "
            f"{self.size} px take about {needed:,.0f} MB, and {free:,.0f} MB are free"
        )
        if needed > free:
            raise UserError(f"{line}; take a larger disk (--cache), fewer frames or smaller ones")
        if progress and is_video:
            print(line, flush=True)

    def get(self, path: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """The video's frames, uint8 [N, H, W, 3], RGB, not writable. Raises VideoError.

        An entry that is missing or damaged is made here, in this process: `fill` first, which is
        safe from files that hang.
        """
        entry = self.entry(path, start, end)
        if entry.exists():
            frames = self.load(entry)
            if frames is not None:
                return frames
            self.report_damage(entry, path)
        self.store(path, entry, start, end)
        frames = self.load(entry)
        assert frames is not None, f"{entry}: was written, and is damaged"
        return frames

    def report_damage(self, entry: Path, path: str | Path) -> None:
        if not self.damaged:
            what = f"{entry}: damaged, so {path} is decoded again (further ones: only counted)"
            print(what, file=sys.stderr)
        self.damaged += 1

    def entry(self, path: str | Path, start: float, end: float | None) -> Path:
        """Where this video's frames lie. Raises VideoError if the video is missing."""
        try:
            resolved = os.path.realpath(path)
            status = os.stat(resolved)
        except (OSError, ValueError) as error:  # ValueError: no disk can hold such a name
            raise VideoError(f"{str(path)[:200]!r}: no such video file") from error
        source = (resolved, status.st_mtime_ns, status.st_size)
        window = (float(start), end if end is None else float(end))
        recipe = (*source, *window, self.size, self.num_frames, self.MAGIC)
        name = hashlib.sha256(repr(recipe).encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.frames"

    def entry_size(self, path: str, start: float, end: float | None) -> int:
        """Bytes of this video's entry; 0 if there is none. Checksums are looked at when read."""
        try:
            size = os.stat(self.entry(path, start, end)).st_size
        except (OSError, VideoError):
            return 0
        return size if size in (self.size_of(1), self.size_of(self.num_frames)) else 0

    def size_of(self, num_frames: int) -> int:
        return self.HEADER.size + num_frames * self.size**2 * 3

    def load(self, entry: Path) -> np.ndarray | None:
        """The pixels of an entry, None if it is damaged."""
        data = entry.read_bytes()
        kept = 1 if len(data) == self.size_of(1) else self.num_frames
        if len(data) != self.size_of(kept):
            return None
        checksum = zlib.crc32(memoryview(data)[self.HEADER.size :])
        header = (self.MAGIC, kept, self.size, self.size, checksum)
        if self.HEADER.unpack_from(data) != header:
            return None

        shape = (kept, self.size, self.size, 3)
        frames = np.frombuffer(data, np.uint8, offset=self.HEADER.size).reshape(shape)
        return np.broadcast_to(frames, (self.num_frames, *shape[1:]))  # [N, H, W, 3]

    def store(self, path, entry: Path, start: float, end: float | None) -> int:
        """Decode a video and write its entry; the entry's size in bytes."""
        frames = read_frames(path, self.num_frames, size=self.size, start=start, end=end)
        if (frames == frames[0]).all():
            frames = frames[:1]
        header = self.HEADER.pack(self.MAGIC, *frames.shape[:3], zlib.crc32(frames.data))
        with write_whole(entry) as unfinished:
            unfinished.write_bytes(header + frames.data)
        return len(header) + frames.nbytes

    def try_store(self, path: str, start: float, end: float | None) -> int | str:
        """In a worker: the size of the video's new entry, or the reason if it is broken."""
        try:
            return self.store(path, self.entry(path, start, end), start, end)
        except VideoError as error:
            return str(error)
