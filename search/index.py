"""What was embedded of a folder's videos, kept in one SQLite file.

A row is a video: its path, time and size, and the embeddings of its windows. The next search embeds
only what is new.

- Each video is one transaction. Whatever kills the process costs the video that was half done.
- A file is known by path, time and size. If one of them differs, it is another video.
- A row whose file is gone is left out of the answers. It stays, should its disk come back.
- A file that cannot be read has no row. The next search tries it again.
- A checksum finds bits that a disk lost: such a video is embedded again.
- Vectors of another checkpoint, or of windows of another length, have rows of their own.
"""

import contextlib
import os
import sqlite3
import stat
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from report.page import printable
from videos.decode import VIDEO_SUFFIXES

# .ts is a video to a data set, and a program to most folders
SEARCHED = set(VIDEO_SUFFIXES) - {".ts"}

# ---- the folder ----------------------------------------------------------------------------------


class File(NamedTuple):
    """A video as it was when it was looked at."""

    path: str  # below the folder, with "/" between its parts
    mtime_ns: int
    size: int


def find_videos(folder: Path) -> tuple[list[File], list[str]]:
    """(the video files below the folder, sorted by path; lines that say what cannot be read).

    Names that begin with a dot are left out. Links are followed, but no folder comes twice, so
    no loop is endless.
    """
    files, troubles, seen = [], [], set()

    def note(error: OSError) -> None:
        place = os.path.relpath(error.filename, folder)
        troubles.append(f"{place}: cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=note):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))

        for name in names:
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SEARCHED:
                continue
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except OSError as error:
                note(error)
                continue
            if stat.S_ISREG(status.st_mode):
                place = Path(path).relative_to(folder).as_posix()
                files.append(File(place, status.st_mtime_ns, status.st_size))
    return sorted(files), troubles


# ---- the index -----------------------------------------------------------------------------------


class Record(NamedTuple):
    """The W windows of a video."""

    spans: np.ndarray  # [W, 2] float32: seconds from, to
    emb: np.ndarray  # [W, E] float32, unit norm


class Index:
    """The embeddings by one checkpoint, of windows of one length. Raises nothing but UserError."""

    TABLE = """
        CREATE TABLE IF NOT EXISTS windows (
            checkpoint TEXT, window REAL, path BLOB, mtime_ns INTEGER, size INTEGER,
            spans BLOB, emb BLOB, checksum INTEGER,
            PRIMARY KEY (checkpoint, window, path))
    """

    def __init__(self, path: Path, *, checkpoint: str, window: float):
        """checkpoint: its hash. window: seconds."""
        self.path, self.recipe = path, (checkpoint, window)
        with self.explain():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path, timeout=60)  # seconds, if another run writes
            self.database.execute(self.TABLE)

    @contextlib.contextmanager
    def explain(self):
        try:
            yield
        except (OSError, sqlite3.Error, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.path}: cannot hold the index ({reason}); make room, delete the file if it "
                "is damaged, or choose --index"
            ) from error

    def add(self, file: File, record: Record) -> None:
        """Put this video on disk, for good."""
        path, *version = file
        spans, emb = record.spans.tobytes(), record.emb.tobytes()
        row = (*self.recipe, os.fsencode(path), *version, spans, emb, zlib.crc32(spans + emb))
        with self.explain(), self.database:
            self.database.execute("REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def known(self, files: list[File]) -> dict[File, Record]:
        """The windows of these files, in their order."""
        found = {}
        columns = "path, mtime_ns, size, spans, emb, checksum"
        query = f"SELECT {columns} FROM windows WHERE checkpoint = ? AND window = ?"
        with self.explain():
            for path, *version, spans, emb, checksum in self.database.execute(query, self.recipe):
                file = File(os.fsdecode(path), *version)
                if zlib.crc32(spans + emb) != checksum:
                    print(f"{printable(file.path)}: its row is damaged; it is embedded again")
                    continue
                spans = np.frombuffer(spans, np.float32).reshape(-1, 2)
                emb = np.frombuffer(emb, np.float32).reshape(len(spans), -1)
                found[file] = Record(spans, emb)
        return {file: found[file] for file in files if file in found}
