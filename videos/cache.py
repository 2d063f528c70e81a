"""A cache of frames, so that every video is decoded once, and processes that a hostile file may
hang or kill.

**The cache.** Decoding (video.py) is dear and repeats every epoch; `FrameCache` keeps `num_frames`
uniform frames of each video (at least the T of the model, which are then drawn from them by the
same rule) in one small file a video:

    folder/3f/3f09…e1.frames = magic, N, H, W, crc32 (20 bytes) + N·H·W·3 bytes of pixels

An image is a video of one frame, and where all frames are the same one, one is kept: N = 1.

The name is a hash of all that the pixels depend on: the path, time and size of the source file, the
window in seconds, and the cache's own settings; so an edited video gets a new entry, and nothing is
ever invalidated. An entry is written to a temporary name and moved into place in one step: an
interrupted fill or two runs at once leave whole entries only. The checksum finds bits that the disk
lost; such an entry is decoded again. The alternative, one large archive, reads a little faster from
spinning disks, but needs locks and repair. Raw pixels cost 3 kB a frame at 32 px and 150 kB at 224
px: a 10,000-video set of 12 frames at 224 px takes 18 GB, and reads without any decoder.

**Files from strangers.** A damaged or hostile file can do worse than fail: it can hang the decoder
for ever, or crash the process that it runs in. So the cache decodes in processes that can be
spared, and a video may take `PATIENCE` seconds and one more for each megabyte of the file. When
they are over, its process is killed, the video is listed as broken with that reason, and another
process goes on with the next. One that dies is replaced too and its video tried once more, for the
death may not have been the video's fault; if it happens again, it was.

    python framecache.py        fills a cache with three files, of which one is no video
"""

import collections.abc
import hashlib
import os
import secrets
import struct
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError
from videos.decode import VideoError, read_frames
from videos.workers import run_guarded


class FrameCache:
    """Frames of videos on disk: `num_frames` uniform frames of size × size pixels each, decoded
    when first asked for.

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

    def get(self, path: str | Path, start: float = 0.0, end: float | None = None) -> np.ndarray:
        """The video's frames, uint8 [N, H, W, 3], RGB, not writable; decoded and stored if they are
        not there.

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
                    print(
                        f"{entry}: damaged, so {path} is decoded again (further ones: only counted)",
                        file=sys.stderr,
                    )
                self.damaged += 1
        if frames is None:
            for _, result in run_guarded(
                partial(self._try_store, start=start, end=end), [str(path)], workers=1
            ):
                if isinstance(result, str):
                    raise VideoError(result)
            frames = self._load(entry)
            assert frames is not None, f"{entry}: was written, and is damaged or of another video"
        return frames

    def fill(
        self,
        paths: collections.abc.Sequence[str],
        *,
        start: float = 0.0,
        end: float | None = None,
        workers: int | None = None,
        progress: bool = True,
    ) -> dict[str, str]:
        """Decode what is not there yet, on `workers` processes (None: one a core), and print the
        size of the whole.

        Returns {path: reason} of the videos that cannot be decoded. Interrupted, it goes on from
        there the next time.
        """
        sizes = np.fromiter(
            (self._entry_size(path, start, end) for path in paths), np.int64, len(paths)
        )
        todo, reasons = np.flatnonzero(sizes == 0), {}  # numbers, not paths: there may be millions
        stored = run_guarded(
            partial(self._try_store, start=start, end=end),
            (paths[i] for i in todo),
            workers=min(workers or os.cpu_count(), len(todo)),
        )
        for n, result in tqdm(
            stored,
            total=len(todo),
            desc="decode videos",
            unit="video",
            disable=not progress or not len(todo),
        ):
            if isinstance(result, str):
                reasons[todo[n]] = result
            else:
                sizes[todo[n]] = result
        if progress:
            print(
                f"frame cache {self.folder}: {len(paths) - len(reasons)} videos × {self.num_frames} frames of "
                f"{self.size} px, {sizes.sum() / 1e6:.1f} MB ({len(todo) - len(reasons)} new)"
                + (f", {len(reasons)} broken" if reasons else "")
            )
        return {paths[i]: reasons[i] for i in sorted(reasons)}

    def _entry(self, path, start, end) -> Path:
        """Where this video's frames lie. Raises VideoError if the video is missing."""
        try:
            resolved = os.path.realpath(path)
            stat = os.stat(resolved)
        except (OSError, ValueError) as error:  # ValueError: no disk can hold such a name
            raise VideoError(f"{str(path)[:200]!r}: no such video file") from error
        recipe = (
            resolved,
            stat.st_mtime_ns,
            stat.st_size,
            float(start),
            end if end is None else float(end),
            self.size,
            self.num_frames,
            self.MAGIC,
        )
        name = hashlib.sha256(repr(recipe).encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.frames"

    def _entry_size(self, path, start, end) -> int:
        """Bytes of this video's entry; 0 if there is none of a right size.

        (Checksums are looked at when read.)
        """
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
            self.MAGIC,
            kept,
            self.size,
            self.size,
            zlib.crc32(memoryview(data)[self.HEADER.size :]),
        ):
            return None
        frames = np.frombuffer(data, np.uint8, offset=self.HEADER.size).reshape(
            kept, self.size, self.size, 3
        )
        return np.broadcast_to(frames, (self.num_frames, *frames.shape[1:]))  # [N, H, W, 3]

    def _store(self, path, entry: Path, start, end) -> int:
        """Decode a video and write its entry; the entry's size in bytes."""
        frames = read_frames(path, self.num_frames, size=self.size, start=start, end=end)
        if (frames == frames[0]).all():
            frames = frames[:1]
        header = self.HEADER.pack(self.MAGIC, *frames.shape[:3], zlib.crc32(frames.data))
        try:
            entry.parent.mkdir(exist_ok=True)
            unfinished = entry.with_suffix(
                f".{secrets.token_hex(8)}.tmp"
            )  # another name for each writer
            try:
                unfinished.write_bytes(header + frames.data)
                os.replace(unfinished, entry)
            finally:  # also after Ctrl-C or on a full disk: leave nothing half written
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot write the frame cache ({error.strerror}); make room or choose "
                "another folder"
            ) from error
        return len(header) + frames.nbytes

    def _try_store(self, path, start, end) -> int | str:
        """Store one video (in a worker process): the size of its entry, or the reason if it is
        broken.
        """
        try:
            return self._store(path, self._entry(path, start, end), start, end)
        except VideoError as error:
            return str(error)
