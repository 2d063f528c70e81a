"""How long the toy world takes to write, to find again and to read: python -m bench.toyworld

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

import cli
from datasets import toyworld


@dataclass
class BenchConfig:
    """Time the generation of the toy world."""

    train: int = 10_000  # training videos; val has a twentieth of that, test a tenth


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    config = cli.parse_config(BenchConfig)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[
        0
    ]  # other jobs on the machine spoil the comparison: shown, so that the reader can tell
    print(
        f"{platform.machine()}, {cores} cores, load {load:.1f} before the start; OpenCV {cv2.__version__}"
    )
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
        decode = _timed(lambda: [toyworld._read_video(path) for path in videos])
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
    print(
        f"{cores} processes write {count[many] / all_cores / (count[few] / one):.2f} times as fast as one; "
        f"{size / 2**20:.0f} MiB; 16 frames of 64×64 a video"
    )


if __name__ == "__main__":
    cli.run(main)
