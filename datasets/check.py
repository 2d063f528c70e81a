"""Is a data set whole? What should be there, what is there, what is missing or does not decode.

Half of the published numbers that nobody can repeat were made on what was left of a data set:
videos vanish from the web, downloads break off, archives unpack into the wrong folder. So before a
week of training comes

    python -m datasets.check msrvtt --root FOLDER --out problems.csv

     split  expected    listed  captions     found   missing    broken   decoded
     train      9000      9000    180000      8990        10         0        50
      test      1000      1000      1000       999         1         1        49

    expected    videos that the protocol has (published.py)
    listed      videos that the annotation files name, and their captions
    missing     listed, but not on disk
    broken      empty, or one of a random sample that does not decode
    decoded     how many of the sample do

It takes seconds; all videos are decoded when the frame cache is filled. The exit status is 0 where
the data set is whole, else 1.
"""

import csv
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from cli import UserError, parse_config, run, write_whole
from datasets.published import find_dataset, load_split
from datasets.split import Split
from videos.decode import VideoError, read_frames

COLUMNS = "split expected listed captions found missing broken decoded".split()
PROBLEM_COLUMNS = ("split", "status", "video", "reason")


def check_dataset(
    dataset: str, root: str | Path, *, videos_root: str | Path | None = None, sample: int = 50
) -> tuple[list[dict], list[tuple[str, str, str, str]]]:
    """(a row {COLUMNS: …} per split, PROBLEM_COLUMNS per problem).

    The status of a problem is "missing", "broken", "count" (the files list more or less than the
    protocol has) or "no split" (they cannot be read). Raises UserError for an unknown data set.
    """
    rows, problems = [], []
    for role, expected in find_dataset(dataset).videos.items():
        row = dict.fromkeys(COLUMNS, 0) | dict(split=role, expected=expected)
        rows.append(row)
        try:
            split = load_split(dataset, root, role, videos_root=videos_root)
        except UserError as error:
            problems.append((role, "no split", "", str(error)))
            continue

        listed = split.count()
        for what, official in split.official.items():
            if listed[what] != official:
                reason = f"its files list {listed[what]:,} {what}, the protocol has {official:,}"
                problems.append((role, "count", "", reason))

        row |= dict(listed=listed["videos"], captions=listed["captions"])
        for path, status, reason in check_videos(split, role, sample):
            row[status] += 1
            if reason:
                problems.append((role, status, path, reason))
        row["found"] = row["listed"] - row["missing"]
    return rows, problems


def check_videos(split: Split, role: str, sample: int) -> Iterator[tuple[str, str, str]]:
    """(path, status, what is wrong with it) of each video.

    The status is "missing", "broken", "decoded", or "found" where nobody looked inside.
    """
    found = [path for path in split.video_paths if os.path.isfile(path)]
    drawn = set(random.Random(0).sample(found, min(sample, len(found))))
    start, end = split.window

    for path in tqdm(split.video_paths, f"check {role}", unit="video", leave=False, disable=None):
        if not os.path.isfile(path):
            yield path, "missing", f"{path}: no such video file"
        elif path in drawn or os.path.getsize(path) == 0:
            try:
                read_frames(path, 4, size=32, start=start, end=end)
                yield path, "decoded", ""
            except VideoError as error:
                yield path, "broken", str(error)
        else:
            yield path, "found", ""


# ---- command -------------------------------------------------------------------------------------


@dataclass
class CheckConfig:
    """Count what a data set should hold, what is there, what is missing, what does not decode."""

    dataset: Positional[str]  # msrvtt, msvd, …: see datasets/published.py
    root: str  # folder with its annotation files and videos
    videos_root: str | None = None  # another folder with videos
    out: str | None = None  # csv file for all problems
    sample: int = 50  # videos per split that are decoded


def main() -> None:
    config = parse_config(CheckConfig)
    rows, problems = check_dataset(
        config.dataset, config.root, videos_root=config.videos_root, sample=config.sample
    )

    print("".join(f"{column:>10}" for column in COLUMNS))
    for row in rows:
        values = ["-" if value is None else value for value in row.values()]
        print("".join(f"{value:>10}" for value in values))
    print(f"decoded: of a random sample of {config.sample} videos per split; - = no fixed number")

    for role, _, _, reason in problems[:20]:
        print(f"    {role}: {reason}")
    if len(problems) > 20:
        print(f"    … and {len(problems) - 20} more; --out FILE lists them all")
    if config.out:
        with write_whole(config.out) as unfinished:
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([PROBLEM_COLUMNS, *problems])
        print(f"{config.out}: {len(problems)} problems")

    verdict = "not whole; results on it are not comparable" if problems else "whole"
    print(f"{config.dataset}: {verdict}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
