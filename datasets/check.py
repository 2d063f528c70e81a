"""Is a data set whole? What should be there, what is, what is missing, what does not decode.

Half of the published numbers that cannot be repeated were made on what was left of a data set.
Videos vanish from the web, downloads break off, archives unpack into the wrong folder. So before a
week of training comes

    python -m datasets.check msrvtt --root FOLDER --out problems.csv

     split  expected    listed  captions     found   missing    broken   decoded
     train      9000      9000    180000      8990        10         0        50
      test      1000      1000      1000       999         1         1        49

expected: what the protocol has; listed: what the annotation files name; missing: listed, but not on
disk; broken: empty, or one of a random sample that does not decode. (All are decoded when the frame
cache is filled; this takes seconds.) The exit status is 0 if the data set is whole, else 1.
"""

import csv
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from cli import UserError, parse_config, run, write_whole
from datasets.published import DATASETS, load_split
from datasets.split import Split
from videos.decode import VideoError, read_frames
from videos.workers import run_guarded

COLUMNS = ("split", "expected", "listed", "captions", "found", "missing", "broken", "decoded")


def check_dataset(
    dataset: str, root: str | Path, *, sample: int = 50, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """(a row of COLUMNS for each split, {split, status, video, reason} for each problem).

    Of those found, all empty files and those of a random `sample` that do not decode are broken.
    The status of a problem is "missing", "broken", "count" (the files list more or less than the
    protocol has) or "no split" (they cannot be read).
    """
    if dataset not in DATASETS:
        raise UserError(f"{dataset}: no such data set; one of {', '.join(DATASETS)}")
    counts, problems = [], []
    for role, expected in DATASETS[dataset].videos.items():
        row = dict.fromkeys(COLUMNS, 0) | dict(split=role, expected=expected)
        counts.append(row)
        try:
            split = load_split(dataset, root, role)
        except UserError as error:
            problems.append(dict(split=role, status="no split", video="", reason=str(error)))
            continue

        missing = [path for path in split.video_paths if not os.path.isfile(path)]
        broken = find_broken(split, sample, seed)
        row["listed"] = len(split.video_paths)
        row["captions"] = len(split.captions)
        row["missing"] = len(missing)
        row["found"] = row["listed"] - row["missing"]
        row["broken"] = sum(reason is not None for reason in broken.values())
        row["decoded"] = len(broken) - row["broken"]

        fixed = dict(videos=expected, captions=DATASETS[dataset].captions.get(role))
        listed = dict(videos=row["listed"], captions=row["captions"])
        for what, count in fixed.items():
            if count not in (None, listed[what]):
                reason = f"its files list {listed[what]:,} {what}, the protocol has {count:,}"
                problems.append(dict(split=role, status="count", video="", reason=reason))
        reasons = broken | {path: f"{path}: no such video file" for path in missing}
        for path in split.video_paths:
            if reasons.get(path):
                status = "missing" if reasons[path].endswith("no such video file") else "broken"
                problems.append(dict(split=role, status=status, video=path, reason=reasons[path]))
    return counts, problems


def find_broken(split: Split, sample: int, seed: int) -> dict[str, str | None]:
    """{path: why it does not decode, or None} of all empty files and of a random sample."""
    found = [path for path in split.video_paths if os.path.isfile(path)]
    drawn = set(np.random.default_rng(seed).permutation(len(found))[:sample].tolist())
    tried = [path for i, path in enumerate(found) if i in drawn or not os.path.getsize(path)]
    start, end = split.window
    decoded = run_guarded(
        partial(try_to_decode, start=start, end=end), tried, workers=min(os.cpu_count(), len(tried))
    )
    bar = tqdm(decoded, "decode", len(tried), unit="video", leave=False, disable=None)
    return {tried[n]: why or None for n, why in bar}


def try_to_decode(path: str, start: float, end: float | None) -> str:
    """In a worker: why not, or ""."""
    try:
        read_frames(path, 4, size=32, start=start, end=end)
    except VideoError as error:
        return str(error)
    return ""


@dataclass
class CheckConfig:
    """Count what a data set should hold, what is there, what is missing, what does not decode."""

    dataset: Positional[str]  # msrvtt, msvd, …: see datasets/published.py
    root: str  # folder with its annotation files and videos
    out: str | None = None  # csv file for all problems
    sample: int = 50  # videos per split that are decoded


def main() -> None:
    config = parse_config(CheckConfig)
    counts, problems = check_dataset(config.dataset, config.root, sample=config.sample)
    print("".join(f"{column:>10s}" for column in COLUMNS))
    for row in counts:
        print("".join(f"{'-' if row[c] is None else row[c]:>10}" for c in COLUMNS))
    print(f"decoded: of a random sample of {config.sample} videos a split (seed 0)")

    for problem in problems[:20]:
        print(f"    {problem['split']}: {problem['reason']}")
    if len(problems) > 20:
        print(f"    … and {len(problems) - 20} more; --out FILE lists them all")
    if config.out:
        with write_whole(config.out) as unfinished, open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, ["split", "status", "video", "reason"])
            writer.writeheader()
            writer.writerows(problems)
        print(f"{config.out}: {len(problems)} problems")
    whole = "not whole; results on it are not comparable" if problems else "whole"
    print(f"{config.dataset}: {whole}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
