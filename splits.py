"""What the files of a data set say: videos, captions, and which caption is of which video; read with suspicion.

A data set on disk is a text file that strangers wrote. This file reads it row by row and believes nothing: a column
that is missing, a number where a text should be, a broken quote, a byte that is no UTF-8 ends in one line that names
the file, the line and the columns that were expected. Nothing is skipped and nothing is guessed, because a caption
that silently vanished changes every number that is measured afterwards.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cli import UserError
from strings import Strings


@dataclass
class Split:
    """Videos, captions, and which video each caption is of."""

    video_paths: Strings          # any sequence of str is packed: millions of them must not be Python objects
    captions: Strings
    video_of_caption: np.ndarray  # int64 [number of captions], index into video_paths
    broken: dict[str, str] = field(default_factory=dict)  # {path: why} of videos that belong here but cannot be used

    def __post_init__(self):
        self.video_paths, self.captions = Strings.pack(self.video_paths), Strings.pack(self.captions)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]]) -> "Split":
        """From (video path, caption) pairs; the same path is the same video."""
        paths, captions = Strings.columns(pairs, 2)
        first, video_of_caption = paths.distinct()
        return cls(paths.take(first), captions, video_of_caption)

    @classmethod
    def join(cls, splits: Sequence["Split"]) -> "Split":
        """Several data sets as one, in their order; a video that is in two of them is one video."""
        paths = Strings.concatenate([split.video_paths for split in splits])
        first, index = paths.distinct()
        shift = np.cumsum([0, *(len(split.video_paths) for split in splits)])
        return cls(paths.take(first), Strings.concatenate([split.captions for split in splits]),
                   index[np.concatenate([split.video_of_caption + n for split, n in zip(splits, shift)])],
                   {path: reason for split in splits for path, reason in split.broken.items()})

    def without(self, broken: dict[str, str]) -> "Split":
        """This split without some videos ({path: why}) and their captions."""
        kept = np.fromiter((path not in broken for path in self.video_paths), bool, len(self.video_paths))
        keep_caption = kept[self.video_of_caption]
        return Split(self.video_paths.take(kept), self.captions.take(keep_caption),
                     (np.cumsum(kept) - 1)[self.video_of_caption[keep_caption]], self.broken | broken)

    def stored(self, folder: str | Path) -> "Split":
        """This split with its strings mapped from files in `folder`, which all processes share (see strings.py)."""
        return replace(self, video_paths=self.video_paths.stored(folder), captions=self.captions.stored(folder))

    def describe_broken(self, at_most: int = 20) -> str:
        """Lines for the user: which videos are not used, and why; "" if there are none."""
        total = len(self.video_paths) + len(self.broken)
        lines = [f"{len(self.broken)} of {total} videos cannot be used:"] + list(self.broken.values())[:at_most]
        if len(self.broken) > at_most:
            lines.append(f"… and {len(self.broken) - at_most} more")
        return "\n    ".join(lines) if self.broken else ""


@dataclass
class Question:
    """Which of these captions is the video's?"""

    video: str
    options: list[str]
    answer: int   # index of the right option
    kind: str     # what the wrong ones differ in


# ---- reading, row by row ----------------------------------------------------------------------------------------------


def read_rows(path: Path, texts: tuple[str, ...], others: tuple[str, ...] = ()) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a csv file with header or a jsonl file, which has `texts` (strings) and `others`."""
    expected = f"expected {', '.join(texts + others)}"
    rows = _jsonl_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    for line, row in rows(path, _read_text(path), texts + others, expected):
        for name in texts:
            if not isinstance(row[name], str):
                raise UserError(f"{path}, line {line}: {name} is {str(row[name])[:40]}, not a text; {expected}")
        if not row["video"].strip():
            raise UserError(f"{path}, line {line}: video is empty; expected a path relative to the folder of this file")
        yield line, row


def _csv_rows(path, text, names, expected):
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if missing := [name for name in names if name not in header]:
            raise UserError(f"{path}, line 1: the header {','.join(header)[:80]!r} has no {' or '.join(missing)}; "
                            f"{expected}")
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: {len(row)} columns, the header has {len(header)}; "
                                f"{expected} (a caption with a comma stands in double quotes)")
            if row:
                yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid csv ({error}); {expected}") from error


def _jsonl_rows(path, text, names, expected):
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {line}: not valid JSON; {expected} in an object on each line") from error
            if not isinstance(row, dict) or (missing := [name for name in names if name not in row]):
                what = f"has no {' or '.join(missing)}" if isinstance(row, dict) else "is not an object"
                raise UserError(f"{path}, line {line}: the row {what}; {expected} in an object on each line")
            yield line, row


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a csv or jsonl file") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected a csv or jsonl file with video and caption")
    return text
