"""Is a data set whole? What should be there, what is, what is missing, what does not decode.

Half of the published numbers that cannot be repeated were made on what was left of a data set:
videos vanish from the web, downloads break off, archives unpack into the wrong folder. So before a
week of training comes

    python -m datasets.check msrvtt --root FOLDER --out problems.csv

     split  expected    listed  captions     found   missing    broken   decoded
     train      9000      9000    180000      8990        10         0        50
      test      1000      1000      1000       999         1         1        49

expected: what the protocol has (datasets.py); listed: what the annotation files name; missing:
listed, but not on disk; broken: empty, or one of a random sample that does not decode. (All are
decoded when the frame cache is filled; this takes seconds.) The exit status is 0 if the data set is
whole, else 1. A result on an incomplete one says so by itself.

"""

import csv
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from cli import UserError, parse_config, run
from datasets.published import DATASETS, load_split
from videos.decode import VideoError, read_frames


def check_dataset(
    dataset: str, root: str | Path, *, sample: int = 50, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """(a row {split, expected, listed, captions, found, missing, broken, decoded} for each split,
    and for each problem {split, status, video, reason}).

    expected: how many videos the protocol has; listed: how many the files name. Of those found, all
    empty files and those of a random `sample` that do not decode are broken; decoded: how many of
    the sample do. The status of a problem is "missing", "broken", "count" (the files list more or
    less than the protocol has) or "no split" (they cannot be read).
    """
    if dataset not in DATASETS:
        raise UserError(f"{dataset}: no such data set; one of {', '.join(DATASETS)}")
    counts, problems = [], []
    for role, expected in DATASETS[dataset].videos.items():
        row = dict(
            split=role,
            expected=expected,
            listed=0,
            captions=0,
            found=0,
            missing=0,
            broken=0,
            decoded=0,
        )
        counts.append(row)
        try:
            split = load_split(dataset, root, role)
        except UserError as error:
            problems.append(dict(split=role, status="no split", video="", reason=str(error)))
            continue
        found = [path for path in split.video_paths if os.path.isfile(path)]
        drawn = set(np.random.default_rng(seed).permutation(len(found))[:sample].tolist())
        reasons = {path: f"{path}: no such video file" for path in {*split.video_paths} - {*found}}
        row |= dict(
            listed=len(split.video_paths),
            captions=len(split.captions),
            found=len(found),
            missing=len(reasons),
        )
        for what, listed, fixed in (
            ("videos", row["listed"], expected),
            ("captions", row["captions"], DATASETS[dataset].captions.get(role)),
        ):
            if fixed not in (None, listed):
                reason = f"its files list {listed:,} {what}, the protocol has {fixed:,}"
                problems.append(dict(split=role, status="count", video="", reason=reason))
        for i, path in enumerate(
            tqdm(found, desc=f"check {role}", unit="video", leave=False, disable=None)
        ):
            try:
                if os.path.getsize(path) == 0 or i in drawn:
                    read_frames(path, 4, size=32, start=split.window[0], end=split.window[1])
                    row["decoded"] += 1
            except VideoError as error:
                row["broken"] += 1
                reasons[path] = str(error)
        problems += [
            dict(
                split=role,
                status="broken" if os.path.isfile(path) else "missing",
                video=path,
                reason=reasons[path],
            )
            for path in split.video_paths
            if path in reasons
        ]
    return counts, problems


def print_check(
    dataset: str, root: str | Path, *, sample: int = 50, seed: int = 0, out: str | None = None
) -> bool:
    """Print the counts and the problems, write them as csv to `out`; is the data set whole? Raises
    UserError.
    """
    counts, problems = check_dataset(dataset, root, sample=sample, seed=seed)
    print("".join(f"{column:>10s}" for column in counts[0]))
    for row in counts:
        print("".join(f"{'-' if value is None else value:>10}" for value in row.values()))
    print(
        f"decoded: of a random sample of {sample} videos a split (seed {seed}); - = no fixed number"
    )
    for problem in problems[:20]:
        print(f"    {problem['split']}: {problem['reason']}")
    if len(problems) > 20:
        print(
            f"    … and {len(problems) - 20} more" + ("" if out else "; --out FILE lists them all")
        )
    if out:
        try:
            with open(out, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["split", "status", "video", "reason"])
                writer.writeheader()
                writer.writerows(problems)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be written ({error.strerror}); choose another --out"
            ) from error
        print(f"{out}: {len(problems)} problems")
    print(f"{dataset}: " + ("not whole; results on it are not comparable" if problems else "whole"))
    return not problems


@dataclass
class CheckConfig:
    """Count what a data set should hold, what is there, what is missing, what does not decode."""

    dataset: Positional[str]  # msrvtt, msvd, …: see datasets/published.py
    root: str  # folder with its annotation files and videos
    out: str | None = None  # csv file for all problems
    sample: int = 50  # videos per split that are decoded


def main() -> None:
    config = parse_config(CheckConfig)
    is_whole = print_check(config.dataset, config.root, sample=config.sample, out=config.out)
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    run(main)
