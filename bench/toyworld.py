"""How long the toy world takes to write, to find again and to read; and a picture of it.

    python -m bench.toyworld
    python -m bench.toyworld --sheet docs/toyworld.png     # eight frames of some test videos

One run, side by side: the default world (10,000 + 500 + 1,000 videos) on all cores against a ninth
of it on one, then a second call on the finished world, then every frame of the test videos decoded
by OpenCV on one core.
"""

import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

import cli
from datasets import toyworld
from datasets.toyrender import FRAMES
from videos.decode import read_frames


@dataclass
class BenchConfig:
    """Time the generation of the toy world."""

    train: int = 10_000  # training videos; val has a twentieth of that, test a tenth
    sheet: str | None = None  # instead: write a picture of the first test videos


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def draw_sheet(path: str, videos: int = 5) -> None:
    """A row a video: its caption above eight frames, as training sees them, enlarged threefold."""
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        world = toyworld.generate(temp, test=videos, splits=["test"], progress=False)
        for line in (world / "test.csv").read_text().splitlines()[1:]:
            video, caption = line.split(",")
            frames = read_frames(world / video, 8, size=32)
            strip = [f.repeat(3, axis=0).repeat(3, axis=1) for f in frames]
            strip = np.hstack([np.pad(f, ((1, 1), (1, 1), (0, 0))) for f in strip])
            header = np.full((18, strip.shape[1], 3), 255, np.uint8)
            font = cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(header, caption, (4, 13), font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
            rows += [header, strip]
    cv2.imwrite(path, cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    print(f"wrote {path}")


def main() -> None:
    config = cli.parse_config(BenchConfig)
    if config.sheet:
        return draw_sheet(config.sheet)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # other jobs on the machine spoil the comparison: shown, so that the reader can tell
    machine = f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine} before the start; OpenCV {cv2.__version__}")
    with tempfile.TemporaryDirectory() as temp:

        def world(train: int, workers: int) -> Path:
            return toyworld.generate(
                Path(temp) / str(workers),
                train=train,
                val=train // 20,
                test=train // 10,
                workers=workers,
                progress=False,
            )

        few, many = config.train // 9, config.train
        count = {train: train + train // 20 + train // 10 for train in (few, many)}
        one, all_cores = _timed(lambda: world(few, 1)), _timed(lambda: world(many, cores))
        again = _timed(lambda: world(many, cores))
        folder = world(many, cores)
        videos = sorted((folder / "videos").glob("test_*.mp4"))
        cv2.setNumThreads(1)
        decode = _timed(lambda: [read_frames(path, FRAMES, size=64) for path in videos])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rows = [
        ("write, 1 process", count[few], one),
        (f"write, {cores} processes", count[many], all_cores),
        ("find it finished", count[many], again),
        ("decode, 1 core", len(videos), decode),
    ]
    for name, number, seconds in rows:
        print(
            f"{name:20}{number:6,} videos in {seconds:6.2f} s = {number / seconds:9,.0f} videos/s"
        )
    speedup = count[many] / all_cores / (count[few] / one)
    print(
        f"{cores} processes write {speedup:.2f} times as fast as one; {size / 2**20:.0f} MiB; "
        "16 frames of 64×64 a video"
    )


if __name__ == "__main__":
    cli.run(main)
