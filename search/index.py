"""An index on disk that follows a folder of videos, and survives what happens to it.

**The index** is a folder of *shards*, each written once and never changed:

    <checkpoint>-<window>/<random>.shard = magic, crc32, length (16 bytes) | JSON: files | spans [W,
    2] | emb [W, E]

- There is no list of shards that could disagree with them: what their checksums vouch for is the
index.
- A shard is written to a temporary name, flushed to disk and renamed, every few seconds. Whatever
kills the process
  costs those seconds and the videos that were half done; the next call goes on from there.
- Shards have random names, so two runs at once cannot harm each other. (A lock would also keep them
from doing the same
  work twice, but a lock can outlive its owner on a network disk.) When there are many, small ones
  are joined: the joined one is on disk before the others are removed, and a video that is then in
  two of them counts once.
- A file is known by its path below the folder, its time and its size. Any other triple is a new
video; a triple whose
  file is gone is left out of the answers, and found again should its disk come back: nothing is
  thrown away, at 4·E bytes a window. Broken files have an entry too, without windows: they are
  tried again when they change. Bits that a disk lost fail the checksum: the videos of that shard
  are embedded again.
- Another checkpoint, or another window, is another index: vectors of two models have nothing to say
to each other.

    python videoindex.py        # a folder in which a video appears, changes and is gone
"""

import contextlib
import json
import os
import secrets
import stat
import struct
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from report.page import printable

VIDEO_SUFFIXES = {
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".3gp",
    ".ogv",
    ".mts",
    ".m2ts",
}  # not .ts: rarely a video
MOST_SHARDS = 64  # more are joined


# ---- the folder ----------------------------------------------------------------------------------


class File(NamedTuple):
    """A video as it was when it was looked at.

    `path` is relative to the folder, with "/" between its parts.
    """

    path: str
    mtime_ns: int
    size: int


def find_videos(folder: Path) -> tuple[list[File], list[str]]:
    """(the video files below the folder, sorted by path; lines that say what was left out).

    Names that begin with a dot are left out. Links are followed after all else, and only to what
    was not seen yet: no file comes twice, no loop is endless. Raises UserError where the folder
    itself cannot be read.
    """
    files, others, hidden, repeated, troubles = [], Counter(), 0, 0, []
    seen, folders, links = set(), [""], []  # real paths; paths below the folder

    def add(place):
        suffix = os.path.splitext(place)[1].lower()
        try:
            status = os.stat(folder / place)
        except OSError as error:
            troubles.append(f"{place}: cannot be read ({error.strerror})")
            return
        if suffix in VIDEO_SUFFIXES and stat.S_ISREG(status.st_mode):
            files.append(File(place, status.st_mtime_ns, status.st_size))
        else:
            others[suffix or "without suffix"] += 1

    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder / place)
        if real in seen:
            repeated += 1
            continue
        seen.add(real)
        if place and not os.path.isdir(real):
            add(place)
            continue
        try:
            with os.scandir(real) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not place:
                raise UserError(f"--videos {folder}: cannot be read ({error.strerror})") from error
            troubles.append(f"{place}: cannot be read ({error.strerror})")
            continue
        for entry in entries:
            below = f"{place}/{entry.name}" if place else entry.name
            if entry.name.startswith("."):
                hidden += 1
            elif entry.is_symlink():
                links.append(below)
            elif entry.is_dir():
                folders.append(below)
            elif f"{real}/{entry.name}" in seen:
                repeated += 1
            else:
                seen.add(f"{real}/{entry.name}")
                add(below)
    kinds = sorted((-n, kind) for kind, n in others.items())[:5]
    skipped = [
        (others.total(), f"other files ({', '.join(f'{-n:,} {kind}' for n, kind in kinds)})"),
        (hidden, "hidden names"),
        (repeated, "links to what is there already"),
    ]
    skipped = ", ".join(f"{n:,} {what}" for n, what in skipped if n)
    return sorted(files), [f"skipped {skipped}"] * bool(skipped) + troubles


# ---- the index -----------------------------------------------------------------------------------


class Record(NamedTuple):
    """What is known of a video: its W windows, or the reason why there is none."""

    reason: str
    spans: np.ndarray  # [W, 2] float32: seconds from, to
    emb: np.ndarray  # [W, E] float32, unit norm


class Index:
    """The shards in a folder, as far as they concern `files`; see the top of this file.

    No errors but UserError.
    """

    HEADER = struct.Struct("<4sIQ")  # magic, crc32 of all that follows, bytes of JSON
    MAGIC = b"IDX1"

    def __init__(self, folder: Path, recipe: dict, files: list[File], embed_dim: int):
        """`recipe`: what the vectors depend on besides the files; shards of another are not looked
        at.
        """
        self.folder, self.recipe, self.embed_dim = folder, recipe, embed_dim
        self.files = {file.path: file for file in files}
        with self._one_line():
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob("*.tmp"):
                with contextlib.suppress(FileNotFoundError):  # another run has just finished it
                    if time.time() - unfinished.stat().st_mtime > 3600:  # a killed run left it
                        unfinished.unlink()
            self.shards: dict[Path, dict[File, Record]] = self._read_all()

    @contextlib.contextmanager
    def _one_line(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot hold the index ({error.strerror}); make room or choose another "
                "--index"
            ) from error

    def _read_all(self) -> dict[Path, dict[File, Record]]:
        while True:
            try:
                shards = {path: self._read(path) for path in sorted(self.folder.glob("*.shard"))}
                return {path: shard for path, shard in shards.items() if shard is not None}
            except FileNotFoundError:  # another run has joined it with others: read the joined one
                continue

    def _read(self, path: Path) -> dict[File, Record] | None:
        data = path.read_bytes()
        if len(data) < self.HEADER.size or self.HEADER.unpack_from(data)[:2] != (
            self.MAGIC,
            zlib.crc32(memoryview(data)[8:]),
        ):
            print(f"{printable(str(path))}: damaged; its videos are embedded again")
            path.unlink(missing_ok=True)
            return None
        start = self.HEADER.size + self.HEADER.unpack_from(data)[2]
        about = json.loads(data[self.HEADER.size : start])
        if about["recipe"] != self.recipe:
            print(f"{printable(str(path))}: of another checkpoint or window; not used")
            return None
        ends = np.cumsum([windows for *_, windows, _ in about["videos"]]).tolist()
        total = ends[-1]
        spans = np.frombuffer(data, np.float32, 2 * total, start).reshape(total, 2)
        emb = np.frombuffer(data, np.float32, offset=start + spans.nbytes).reshape(
            total, self.embed_dim
        )
        return {
            File(name, mtime_ns, size): Record(
                reason, spans[end - windows : end], emb[end - windows : end]
            )
            for (name, mtime_ns, size, windows, reason), end in zip(about["videos"], ends)
        }

    def add(self, records: dict[File, Record]) -> None:
        """Put these on disk, for good."""
        if not records:
            return
        with self._one_line():
            self._write(records)
            if len(self.shards) > MOST_SHARDS:
                self._join()

    def _write(self, records: dict[File, Record]) -> None:
        videos = [(*file, len(record.emb), record.reason) for file, record in records.items()]
        about = json.dumps(dict(recipe=self.recipe, videos=videos)).encode()
        about += b" " * (-len(about) % 8)  # the numbers behind it stand at multiples of 8 bytes
        body = b"".join(
            [
                len(about).to_bytes(8, "little"),
                about,
                *(record.spans for record in records.values()),
                *(record.emb for record in records.values()),
            ]
        )
        path = self.folder / f"{secrets.token_hex(8)}.shard"
        unfinished = path.with_suffix(".tmp")
        try:
            with open(unfinished, "wb") as file:
                file.write(self.MAGIC + zlib.crc32(body).to_bytes(4, "little"))
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:  # also on a full disk
            unfinished.unlink(missing_ok=True)
        self.shards[path] = records

    def _join(self) -> None:
        """Make one shard of the small ones: of half of all, and further ones that are no larger
        than those together.
        """
        group, joined = [], {}
        for path in sorted(self.shards, key=lambda path: len(self.shards[path])):
            if len(group) > MOST_SHARDS // 2 and len(self.shards[path]) > len(joined):
                break
            group.append(path)
            joined |= self.shards[path]
        self._write(joined)
        for path in group:  # the new one is on disk
            del self.shards[path]
            path.unlink(missing_ok=True)

    def known(self) -> dict[File, Record]:
        """What is known of those files that are there now, in the order of their paths."""
        known = {file: record for shard in self.shards.values() for file, record in shard.items()}
        return {file: known[file] for file in self.files.values() if file in known}
