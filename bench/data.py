"""Speed of everything between the files and the model: decoding, frame cache, tokenizer, planning
of batches.

    python -m bench.data                        # all, about two minutes on one core
    python -m bench.data --captions 0.1         # a smaller set to plan batches for, in millions

Decoding is timed on the full-length clips of ../shared where they lie, else on clips written here.
PyAV is timed beside it where it can be imported (`pip install av`; nothing else here needs it): the
same frames, decoded in order, cut and resized by the same code. Each alternative is timed in the
same run, alternating with ours, so that other work on the machine disturbs both; trust the ratios
more than the times, and those of processor time (CPU) most.
"""

import os
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.sparse import csr_array

try:
    import av
except ImportError:
    av = None

from bench.scaling import cost, limits
from captions.tokenizer import Tokenizer
from cli import parse_config, run
from data import KnowledgeBatchSampler, load_videos
from videos.cache import FrameCache
from videos.decode import frame_indices, read_frames, write_video
from videos.decode import square as cut_square

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class BenchConfig:
    """Benchmark of video.py, framecache.py, tokenizer.py and data.py."""

    captions: float = 2.5  # size in millions of the set whose batches are planned
    repeats: int = 5  # timings of which the median counts
    clips: int = 1000  # real clips at most


def median_seconds(functions: dict, repeats: int) -> dict:
    """{name: median seconds}; the functions take turns."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def median_cpu_seconds(functions: dict, repeats: int) -> dict:
    """{name: (median seconds, median processor seconds)}; the functions take turns."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: tuple(map(statistics.median, zip(*values))) for name, values in times.items()}


# ---- decoding and cache --------------------------------------------------------------------------


def seek_frames(path: str, num_frames: int, size: int) -> np.ndarray:
    """What many loaders do: one seek for each frame."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    frames = []
    for index in frame_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), num_frames):
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        frames.append(cut_square(capture.read()[1], size))
    return np.stack(frames)


def pyav_frames(path: str, num_frames: int, size: int, threads: str) -> np.ndarray:
    """PyAV as a sensible user has it: one pass, only the wanted frames converted.

    threads: "1" or "AUTO".
    """
    with av.open(path) as container:
        stream = container.streams.video[0]
        if threads == "1":
            stream.codec_context.thread_count = 1
        else:
            stream.thread_type = threads
        wanted, frames = frame_indices(stream.frames, num_frames), {}
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames[number] = cut_square(frame.to_ndarray(format="bgr24"), size)
            if number == wanted[-1]:
                break
    return np.stack([frames[number] for number in wanted])


def real_clips(folder: Path) -> list[str]:
    """Clips of ../shared; where there are none, some are written here."""
    paths = sorted(map(str, (ROOT.parent / "shared" / "msrvtt_full" / "videos").glob("*.mp4")))
    if not paths:
        rng = np.random.default_rng(0)
        for i in range(4):
            paths.append(str(folder / f"{i}.mp4"))
            scene = rng.integers(0, 256, (24, 400, 3), dtype=np.uint8)
            scene = cv2.resize(
                scene, (4000, 240), interpolation=cv2.INTER_CUBIC
            )  # the camera pans over it
            write_video(paths[-1], np.stack([scene[:, 8 * t : 8 * t + 320] for t in range(400)]))
    return paths


def bench_decoding(paths: list[str], repeats: int):
    where = f"clips of {Path(paths[0]).parent.parent.name}"
    if av is None:
        print(
            "\nPyAV is not installed, so it is not timed; `pip install av` into an environment of "
            "your own"
        )
    print(
        f"\ndecoding: {len(paths)} {where}, 224 px            clips/s    ratio     clips/CPU s    "
        "ratio"
    )
    for num_frames in (4, 8, 12, 16, 24):  # the frame cache decodes twice the T of the model
        readers = {
            "one seek a frame": seek_frames,
            "in order (ours)": lambda path, num_frames, size: read_frames(
                path, num_frames, size=size
            ),
        }
        if av is not None:
            readers |= {
                f"PyAV {av.__version__}, threads {n}": partial(pyav_frames, threads=n)
                for n in ("1", "AUTO")
            }
        seconds = median_cpu_seconds(
            {
                name: lambda read=read: [read(path, num_frames, 224) for path in paths]
                for name, read in readers.items()
            },
            repeats,
        )
        for name, (wall, cpu) in seconds.items():
            of_wall, of_cpu = (
                ours / other for ours, other in zip(seconds["one seek a frame"], (wall, cpu))
            )
            print(
                f"    T = {num_frames:2d}, {name:24s} {len(paths) / wall:14.1f} {of_wall:8.2f} "
                f"{len(paths) / cpu:15.1f} {of_cpu:8.2f}"
            )
    for name, read in readers.items():
        differ = [
            (read(path, 12, 64) != read_frames(path, 12, size=64)).any(axis=(1, 2, 3))
            for path in paths
        ]
        print(f"    frames that differ from ours: {name:24s} {np.mean(differ):.1%}")


def bench_cache(folder: Path, repeats: int):
    paths = [str(folder / f"small-{i}.mp4") for i in range(128)]
    for path in paths:  # of the toy world's kind
        write_video(
            path, np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
        )
    print("\nframe cache: batches of 128 videos of 16 frames of 64 px, one thread     ms     ratio")
    for size, num_frames in ((32, 8), (32, 16), (224, 12)):
        cache = FrameCache(folder / f"cache-{size}-{num_frames}", size=size, num_frames=num_frames)
        cache.fill(paths, workers=1, progress=False)
        seconds = median_seconds(
            {
                "decoded": lambda: [read_frames(path, num_frames, size=size) for path in paths],
                "from the cache": lambda: load_videos(cache, paths, num_frames),
            },
            repeats,
        )
        for name, value in seconds.items():
            ratio = seconds["decoded"] / value
            print(
                f"    {num_frames:2d} frames of {size:3d} px, {name:24s} {1e3 * value:24.1f} "
                f"{ratio:9.1f}"
            )


# ---- what a GPU needs ----------------------------------------------------------------------------


def shrink(path: str, folder: Path) -> str:
    """The clip again, with a short side of 256 pixels and every fifth frame; the path of it."""
    capture, frames = cv2.VideoCapture(path, cv2.CAP_FFMPEG, []), []
    rate, number = capture.get(cv2.CAP_PROP_FPS), 0
    while capture.grab():
        if number % 5 == 0:
            image = capture.retrieve()[1]
            scale = 256 / min(image.shape[:2])
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        number += 1
    small = str(folder / f"shrunk-{Path(path).name}")
    write_video(small, np.stack(frames), rate / 5)
    return small


def bench_input(paths: list[str], folder: Path, repeats: int) -> None:
    """Ways to keep a clip: bytes, processor time, and what a GPU of eight eats of them."""
    seconds = sum(limits(cost("base", 1024, 8), 8).values())
    clips_per_s = 128 / seconds
    num_frames, size = 16, 224
    only = np.arange(0, 16, 2).tolist()
    shrunk = [shrink(path, folder) for path in paths]
    cache = FrameCache(folder / "input", size=size, num_frames=num_frames)
    cache.fill(paths, workers=1, progress=False)
    pixels = [cache.get(path) for path in paths]
    quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
    pictures = [[cv2.imencode(".jpg", frame, quality)[1] for frame in video] for video in pixels]

    def decode(paths: list[str]) -> None:
        for path in paths:
            read_frames(path, num_frames, size=size, only=only)

    ways = {
        "as published": lambda: decode(paths),
        "256 px, every 5th frame": lambda: decode(shrunk),
        "cache, raw pixels": lambda: [cache.get(path, only=only) for path in paths],
        "cache, were it JPEG 90": lambda: [
            cv2.imdecode(video[n], cv2.IMREAD_COLOR) for video in pictures for n in only
        ],
    }
    size_of = [
        sum(os.path.getsize(path) for path in paths),
        sum(os.path.getsize(path) for path in shrunk),
        sum(video.nbytes for video in pixels),
        sum(picture.nbytes for video in pictures for picture in video),
    ]
    times = median_cpu_seconds(ways, repeats)
    print(
        f"\ninput of a GPU of eight: preset base, B = 1,024, 8 of 16 frames of 224 px, "
        f"{clips_per_s:.0f} clips/s (bench/scaling.py)\n"
        "                               MB a clip    ms CPU a clip    cores a GPU    MB/s a GPU"
    )
    for (name, (_, cpu)), total in zip(times.items(), size_of):
        megabytes, per_clip = total / len(paths) / 1e6, cpu / len(paths)
        print(
            f"    {name:24s} {megabytes:11.2f} {1e3 * per_clip:16.1f} "
            f"{per_clip * clips_per_s:14.1f} {megabytes * clips_per_s:13.0f}"
        )


# ---- tokenizer -----------------------------------------------------------------------------------


def bench_tokenizer(count: int, repeats: int):
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "ing", "er", "ou")]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(30_000)])
    chosen = np.minimum(rng.zipf(1.3, (count, 10)), len(words)) - 1
    captions = [" ".join(row) for row in words[chosen]]
    print(f"\ntokenizer: {count:,} made-up captions of 10 words")
    for vocab_size in (4096, 8192):
        start = time.perf_counter()
        tokenizer = Tokenizer.train(captions, vocab_size)
        print(f"    learn {tokenizer.vocab_size} ids {time.perf_counter() - start:12.1f} s")
    seconds = median_seconds(
        {"encode": lambda: tokenizer.encode_batch(captions[:1280], 32)}, repeats
    )["encode"]
    print(f"    encode_batch {1280 / seconds:16,.0f} captions/s")


# ---- planning of batches -------------------------------------------------------------------------


def zipf_captions(size: int, num_concepts: int = 4096) -> tuple:
    """(held, video_id): 0 to 10 Zipf concepts a caption, one caption a video."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, num_concepts + 1)
    ladder = np.cumsum(popularity / popularity.sum())
    counts, parts = [], []
    for start in range(
        0, size, 100_000
    ):  # in pieces, so that making the data is not what the peak of memory shows
        rows = min(100_000, size - start)
        drawn = rng.integers(0, 11, rows)
        concept = np.searchsorted(ladder[:-1], rng.random(drawn.sum()))
        key = np.unique(np.repeat(np.arange(rows), drawn) * num_concepts + concept)
        counts.append(np.bincount(key // num_concepts, minlength=rows))
        parts.append((key % num_concepts).astype(np.int32))
    ids = np.concatenate(parts)
    ends = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    held = csr_array((np.ones(len(ids), np.float32), ids, ends), shape=(size, num_concepts))
    return held, np.arange(size)


def bench_planning(millions: float):
    """All of a guided plan but the model: its candidates are drawn at random here."""
    size = int(millions * 1e6)
    held, video = zipf_captions(size)
    rng = np.random.default_rng(1)

    def find_hardest(anchors, pool):
        return pool[rng.integers(0, len(pool), (len(anchors), 64))]

    how = dict(batch_size=1024, guided_share=1.0, group_size=8)
    sampler = KnowledgeBatchSampler(held, video, **how)
    start = time.perf_counter()
    sampler.plan(0, min(100, len(sampler)), find_hardest)  # as far ahead as train.py plans
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    print(
        f"\nplanning 100 batches of 1,024 in groups of 8, of {size:,} captions, Zipf concepts: "
        f"{seconds:.1f} s, peak memory {peak:.2f} GiB"
    )


def main():
    config = parse_config(BenchConfig)
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one used, no GPU; Python "
        f"{platform.python_version()}, numpy "
        f"{np.__version__}, OpenCV {cv2.__version__}; load {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = real_clips(Path(folder))[: config.clips]
        bench_decoding(paths, config.repeats)
        bench_cache(Path(folder), config.repeats)
        bench_input(paths, Path(folder), config.repeats)
    bench_planning(config.captions)
    bench_tokenizer(min(180_000, int(config.captions * 1e6)), config.repeats)


if __name__ == "__main__":
    run(main)
