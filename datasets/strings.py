"""Millions of strings in two arrays, in a file that all processes share.

A Python string is an object: "a dog chases a cat" is 18 bytes of text in 72 bytes of memory, with a pointer to it and
a reference count inside. 2.5 million captions and as many video paths are 600 MB as lists, and every process that
trains or decodes needs them. A forked process does share its parent's pages at first, but reading a string changes
its reference count, and a page that changes is copied. So here is one blob of UTF-8 and where each string ends,

    blob     uint8 [bytes]      a dog chases a cattwo red balls bounce…
    offsets  int64 [N + 1]      0                 18                  39 …

and nothing in it is ever written again. `stored` puts both into one file, offsets first, and maps that into memory:
the kernel loads a page when somebody reads it, once for all processes, and may drop it again when memory is short. The
file is named by the hash of what it holds: nothing in it can be out of date, two runs that write it at once write
the same, and it is whole or not there, because it is renamed into place. A reader has just made the strings from their
source (that is how it knows the name), so it compares instead of trusting: a damaged file is written again.

A small data set goes the same way. The alternative, Arrow or SQLite, does much more and is another dependency;
`multiprocessing.shared_memory` dies with its maker and must be cleaned up after a kill.

    python strings.py       what a million captions cost, as a list and as Strings
"""

import array
import hashlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cli import UserError, run


class Strings(Sequence):
    """A sequence of N strings that cannot be changed. Equal to any other sequence of the same strings.

    Raises IndexError as a list does. Half surrogates, which file names and JSON may hold, survive.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        assert blob.dtype == np.uint8 and offsets.dtype == np.int64, f"{blob.dtype} and {offsets.dtype}"
        assert len(offsets) and offsets[-1] == len(blob), f"{len(blob)} bytes, the last string ends at {offsets[-1:]}"
        self.blob, self.offsets = blob, offsets

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "Strings":
        """From any iterable of strings; Strings are returned as they are."""
        return strings if isinstance(strings, cls) else cls.columns(((string,) for string in strings), 1)[0]

    @classmethod
    def columns(cls, rows: Iterable[Sequence[str]], width: int) -> list["Strings"]:
        """The `width` columns of rows of strings, each as Strings; the rows are read once, and none is kept."""
        blobs, ends = [bytearray() for _ in range(width)], [array.array("q", [0]) for _ in range(width)]
        for row in rows:
            for blob, end, string in zip(blobs, ends, row, strict=True):
                blob += string.encode("utf-8", "surrogatepass")
                end.append(len(blob))
        return [cls(np.frombuffer(blob, np.uint8), np.frombuffer(end, np.int64)) for blob, end in zip(blobs, ends)]

    @classmethod
    def concatenate(cls, parts: Sequence["Strings"]) -> "Strings":
        """The strings of all parts, one part after the other."""
        starts = np.cumsum([0, *(len(part.blob) for part in parts)])
        return cls(np.concatenate([np.zeros(0, np.uint8), *(part.blob for part in parts)]),
                   np.concatenate([np.zeros(1, np.int64), *(part.offsets[1:] + n for part, n in zip(parts, starts))]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        if not -len(self) <= i < len(self):
            raise IndexError(f"string {i} of {len(self)}")
        i %= len(self)
        return self.blob[self.offsets[i]:self.offsets[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for content in self._contents():
            yield content.decode("utf-8", "surrogatepass")

    def __eq__(self, other) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Strings({list(self[:3])}{'…' if len(self) > 3 else ''}, {len(self)} of them)"

    def _contents(self) -> Iterator[bytes]:
        """Each string's bytes, in order, a few thousand offsets at a time as Python numbers."""
        for first in range(0, len(self), 4096):
            ends = self.offsets[first:first + 4097].tolist()
            piece = self.blob[ends[0]:ends[-1]].tobytes()
            for start, end in zip(ends, ends[1:]):
                yield piece[start - ends[0]:end - ends[0]]

    def take(self, rows: np.ndarray) -> "Strings":
        """The strings of these rows (int64, or a bool for each string), in this order."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, np.int64)
        lengths = np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        blob = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(rows), 65536):  # in pieces: an index for each byte takes eight times its room
            part = slice(first, first + 65536)
            start, end = offsets[first], offsets[min(first + 65536, len(rows))]
            skip = np.repeat(self.offsets[:-1][rows[part]] - offsets[:-1][part], lengths[part])
            blob[start:end] = self.blob[skip + np.arange(start, end)]
        return Strings(blob, offsets)

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """(first int64 [D], index int64 [N]): the first row of each distinct string, ascending, and which of these
        each row equals: `self[i] == self[first[index[i]]]`.

        Compares 128-bit hashes (blake2b): a collision among 2.5 million strings has probability 1e-26.
        """
        digests = bytearray()
        for content in self._contents():
            digests += hashlib.blake2b(content, digest_size=16).digest()
        words = np.frombuffer(digests, np.uint64).reshape(-1, 2)                     # [N, 2]
        order = np.lexsort((words[:, 1], words[:, 0]))                               # equal ones together, stable
        new = np.ones(len(order), bool)
        new[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
        first = order[new]                                                           # in the order of their hashes
        place = np.empty(len(first), np.int64)
        place[np.argsort(first)] = np.arange(len(first))
        index = np.empty(len(self), np.int64)
        index[order] = place[np.cumsum(new) - 1]
        return np.sort(first), index

    def stored(self, folder: str | Path) -> "Strings":
        """The same strings, mapped from a file of `folder` that is written unless it is there and whole.

        Raises UserError where the folder cannot be written.
        """
        digest = hashlib.sha256(self.offsets.data)
        digest.update(self.blob.data)
        path = Path(folder) / f"{digest.hexdigest()[:40]}.strings"
        try:
            if path.exists():
                with open(path, "rb") as file:
                    whole = hashlib.file_digest(file, "sha256").digest() == digest.digest()
                if not whole:
                    print(f"{path}: damaged, so it is written again", file=sys.stderr)
                    path.unlink(missing_ok=True)
            if not path.exists():
                self._write(path)
            mapped = np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain array: slices of a memmap are slow
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); make room or choose another "
                            "--cache") from error
        return Strings(mapped[8 * len(self.offsets):], mapped[:8 * len(self.offsets)].view(np.int64))

    def _write(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{secrets.token_hex(8)}.tmp")  # another name for each writer
        try:
            with open(unfinished, "wb") as file:
                file.write(self.offsets.data)
                file.write(self.blob.data)
            if not path.exists():  # else another process was faster: map its file, or both would cost memory
                os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def main():
    captions = [f"the {color} ball {i} bounces" for i in range(500_000) for color in ("red", "blue")]
    packed = Strings.pack(captions)
    as_list = sum(map(sys.getsizeof, captions)) + sys.getsizeof(captions)
    with tempfile.TemporaryDirectory() as folder:
        mapped = packed.stored(folder)
        print(f"{len(captions):,} captions: {as_list / 1e6:.0f} MB as a list of objects in each process,",
              f"{(mapped.blob.nbytes + mapped.offsets.nbytes) / 1e6:.0f} MB in one file for all")
        print(mapped[:2], "…", mapped[-1], mapped == captions)


if __name__ == "__main__":
    run(main)
