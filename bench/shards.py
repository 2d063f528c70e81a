"""Input at pre-training size: shards, their index, and frames decoded while training.

    python -m bench.shards              # 100,000 samples, 2.5 million rows: some ten minutes
    python -m bench.shards --samples 2000 --shards 4 --links 2 --steps 20 --run-steps 8
    python -m bench.shards --videos DIR --size 224 --samples 120 --shards 2     # real clips: rates

Clips of the toy world are packed into shards, each many times, with other captions. Then:

    index     seconds and bytes of the index
    rate      clips per second: as training reads them ("stream"), of the same decoding by as many
              processes that do nothing else ("bare"), and of PyAV and torchcodec in a DataLoader,
              where they are installed; beside it their processor time per clip. They take turns.
              Where other work is on the machine, only the second is comparable.
    memory    of each process while --steps batches are read
    run       train.py on all shards under --links names each (hard links, with the same index: 2.5
              million samples in no more space): seconds to the first step, memory, share of
              waiting; killed with -9, and started again
    mining    the same with batches of --mine-batch, guided from the first step: seconds to plan
              100 steps, of which the model mines; memory

A line of results is added to bench/results/shards.jsonl.
"""

import csv
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

try:  # pip install av
    import av
except ImportError:
    av = None
try:  # apt install ffmpeg; pip install --no-deps torchcodec==0.12.0 (later ones want CUDA)
    from torchcodec.decoders import VideoDecoder
except ImportError:
    VideoDecoder = None

from cli import give_back_memory, keep_freed_memory, parse_config, run
from datasets import toyworld
from datasets.shards import index_file, load_shards
from eval import machine_facts
from videos.cache import FrameCache, Want
from videos.decode import PART, frame_indices, read_frames, square
from videos.workers import guard, prefetch

ROOT = Path(__file__).resolve().parent.parent
FRAMES = 8  # of the toy preset


@dataclass
class BenchConfig:
    """Shards, their index, and frames decoded while training."""

    samples: int = 100_000  # in all shards
    shards: int = 100
    clips: int = 300  # different ones
    videos: str | None = None  # folder of clips to pack; None: of the toy world
    size: int = 32  # H = W of a frame as it is read, pixels
    links: int = 25  # names of each shard in the run: samples × links rows of the index
    workers: int = 2  # processes
    batch: int = 64
    steps: int = 1000  # batches over which memory is watched
    run_steps: int = 40  # of train.py
    mine_batch: int = 1024  # pairs of a batch where it mines
    rounds: int = 3  # of the rates; the median counts
    folder: str | None = None  # for the shards; None: one that is deleted at the end
    out: str = str(ROOT / "bench" / "results" / "shards.jsonl")


def make_shards(folder: Path, config: BenchConfig) -> str:
    """Write the shards, unless they are there. Returns their pattern."""
    pattern = f"{folder}/{{00000..{config.shards - 1:05d}}}.tar"
    if (folder / f"{config.shards - 1:05d}.tar").exists():
        return pattern
    if config.videos:
        world, names = Path(config.videos), sorted(os.listdir(config.videos))[: config.clips]
        rows = [dict(video=name, caption=f"a video, {name}") for name in names]
    else:
        world = toyworld.generate(folder / "toy", splits=["train"], train=config.clips)
        with open(world / "train.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    clips = {row["video"]: (world / row["video"]).read_bytes() for row in rows}

    for shard, numbers in enumerate(np.array_split(np.arange(config.samples), config.shards)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers.tolist():
                row = rows[number % len(rows)]
                caption = f"{row['caption']}, take {number // len(rows)}"
                facts = json.dumps(dict(caption=caption, key=f"{number:09d}", status="success"))
                files = dict(mp4=clips[row["video"]], txt=caption.encode(), json=facts.encode())
                for kind, data in files.items():
                    member = tarfile.TarInfo(f"{number:09d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return pattern


def rss(pid: int) -> int:
    """Resident megabytes of a process; what it shares with others counts in each."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 10**6


def peak_rss(pid: int) -> int:
    """The most resident megabytes that a process had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1000


# ---- rates ---------------------------------------------------------------------------------------


def wanted(path: str, number: int) -> Want:
    """T of the 2T frames, drawn as in training."""
    only = frame_indices(2 * FRAMES, FRAMES, "segment", np.random.default_rng(number))
    return Want(path, only=only.tolist())


def stream(paths: list[str], config: BenchConfig) -> Iterator[np.ndarray]:
    """The frames of each batch, as data.read_batches reads them where the cache is too small."""
    wants = [wanted(path, number) for number, path in enumerate(paths)]
    batches = [wants[i : i + config.batch] for i in range(0, len(wants), config.batch)]
    cache = FrameCache(tempfile.gettempdir(), size=config.size, num_frames=2 * FRAMES, gigabytes=0)
    with guard(cache.read, config.workers) as read_all:
        yield from prefetch(lambda batch: np.stack(read_all(batch)), batches, config.workers)


def decode(want: Want, size: int) -> np.ndarray:
    return read_frames(want.path, 2 * FRAMES, size=size, only=want.only)


def decode_all(wants: list[Want], size: int) -> None:
    for want in wants:
        decode(want, size)


def by_pyav(data: bytes, only: list[int]) -> list[np.ndarray]:
    """The wanted frames, BGR: one pass, and only they are converted."""
    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        indices = frame_indices(video.frames, 2 * FRAMES)[only].tolist()
        frames = {}
        for n, frame in enumerate(container.decode(video)):
            if n in indices:
                frames[n] = frame.to_ndarray(format="bgr24")
            if n == indices[-1]:
                break
    return [frames[index] for index in indices]


def by_torchcodec(data: bytes, only: list[int]) -> np.ndarray:
    """The same, [T, H, W, 3]."""
    decoder = VideoDecoder(
        data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate"
    )
    indices = frame_indices(decoder.metadata.num_frames, 2 * FRAMES)[only].tolist()
    return decoder.get_frames_at(indices).data.numpy()[..., ::-1]


class Clips(torch.utils.data.Dataset):
    """The same frames of the same bytes, by another library."""

    def __init__(self, wants: list[Want], read: Callable, size: int):
        self.wants, self.read, self.size = wants, read, size

    def __len__(self) -> int:
        return len(self.wants)

    def __getitem__(self, number: int) -> torch.Tensor:
        want = self.wants[number]
        file, first, size = PART.fullmatch(want.path).groups()
        data = np.fromfile(file, np.uint8, int(size), offset=int(first)).tobytes()
        frames = [square(frame, self.size) for frame in self.read(data, want.only)]
        return torch.from_numpy(np.stack(frames))


def cpu_seconds() -> float:
    """Of this process and of all children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_rates(paths: list[str], config: BenchConfig) -> dict[str, tuple[float, float]]:
    """{way: (clips per second, milliseconds of processor time a clip)}, medians."""
    wants = [wanted(path, number) for number, path in enumerate(paths)]
    parts = [wants[i :: config.workers] for i in range(config.workers)]
    rivals = {"PyAV": Clips(wants, by_pyav, config.size)} if av else {}
    if VideoDecoder:
        rivals["torchcodec"] = Clips(wants, by_torchcodec, config.size)

    def bare() -> None:
        with ProcessPoolExecutor(config.workers) as pool:
            list(pool.map(partial(decode_all, size=config.size), parts))

    ways = dict(bare=bare, stream=lambda: list(stream(paths, config)))
    for name, clips in rivals.items():
        loader = torch.utils.data.DataLoader(clips, config.batch, num_workers=config.workers)
        ways[f"{name} in a DataLoader"] = partial(list, loader)
    rates = {name: [] for name in ways}
    for _ in range(config.rounds):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), cpu_seconds()
            way()
            cpu_ms = 1000 * (cpu_seconds() - cpu) / len(paths)
            rates[name].append((len(paths) / (time.perf_counter() - start), cpu_ms))
    for clips in rivals.values():
        for n in range(0, len(wants), max(1, len(wants) // 100)):
            np.testing.assert_array_equal(clips[n].numpy(), decode(wants[n], config.size))
    medians = {name: map(statistics.median, zip(*values)) for name, values in rates.items()}
    return {name: tuple(round(value, 2) for value in values) for name, values in medians.items()}


def measure_memory(paths: list[str], config: BenchConfig) -> dict[str, list[int]]:
    """{process: MB at a tenth, at half and at the end of the steps}."""
    count = config.steps * config.batch
    many = [paths[i % len(paths)] for i in range(count)]
    found = {}
    for step, _ in enumerate(stream(many, config), 1):
        if step in (config.steps // 10, config.steps // 2, config.steps):
            pids = [os.getpid(), *sorted(p.pid for p in multiprocessing.active_children())]
            for i, pid in enumerate(pids):
                found.setdefault(f"worker {i}" if i else "loop", []).append(rss(pid))
    return found


# ---- a run ---------------------------------------------------------------------------------------


def lines_of(out: Path) -> list[dict]:
    try:
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]
    except (OSError, ValueError):
        return []


def start_run(pattern: str, out: Path, config: BenchConfig, flags: str) -> subprocess.Popen:
    flags += f""" --dataset shards --data {pattern} --cache {out.parent}/cache --out {out}
        --cache-gb 0 --workers {config.workers} --num-frames {FRAMES} --log-every 1"""
    command = [sys.executable, str(ROOT / "train.py"), *flags.split()]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    with open(out.with_suffix(".txt"), "w", encoding="utf-8") as printed:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=printed)


def wait_for(step: int, process: subprocess.Popen, out: Path) -> float:
    """Seconds until the log has this step."""
    start = time.perf_counter()
    while not any(line["step"] >= step for line in lines_of(out)):
        assert process.poll() is None, f"train.py ended with {process.returncode}"
        time.sleep(0.2)
    return round(time.perf_counter() - start, 1)


def measure_run(pattern: str, folder: Path, config: BenchConfig) -> dict:
    out, steps = folder / "run", config.run_steps
    flags = f"--batch-size {config.batch} --steps {steps} --eval-every {max(1, steps // 4)}"
    process = start_run(pattern, out, config, flags)
    found = dict(first_step_s=wait_for(1, process, out))
    wait_for(steps // 4 + 1, process, out)
    children = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        children += path.read_text().split()
    found["rank_mb"], found["workers_mb"] = rss(process.pid), [rss(int(pid)) for pid in children]
    found["rank_peak_mb"] = peak_rss(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()

    killed_after = lines_of(out)[-1]["step"]
    process = start_run(pattern, out, config, flags)
    found["resumed_s"] = wait_for(killed_after + 1, process, out)
    assert process.wait() == 0
    lines = lines_of(out)[steps // 2 :]
    found["share_of_waiting"] = sum(x["data_s"] for x in lines) / sum(x["step_s"] for x in lines)
    return found


def measure_mining(pattern: str, folder: Path, config: BenchConfig) -> dict:
    out = folder / "mining"
    flags = f"--batch-size {config.mine_batch} --steps 100 --guided-from 0"
    process = start_run(pattern, out, config, flags)
    found = dict(first_step_s=wait_for(1, process, out), rank_peak_mb=peak_rss(process.pid))
    process.kill()
    process.wait()
    (line,) = re.findall("mined .*", out.with_suffix(".txt").read_text(encoding="utf-8"))
    return found | dict(said=line, step_s=lines_of(out)[0]["step_s"])


def link_shards(folder: Path, config: BenchConfig) -> str:
    """Each shard and its index under `links` names; returns the pattern of all."""
    (folder / "links").mkdir(exist_ok=True)
    index = folder / "cache" / "shards"
    for number in range(config.shards * config.links):
        shard = folder / f"{number % config.shards:05d}.tar"
        link = folder / "links" / f"{number:05d}.tar"
        if not link.exists():
            os.link(shard, link)
            shutil.copy(index_file(str(shard), index), index_file(str(link), index))
    return f"{folder}/links/{{00000..{config.shards * config.links - 1:05d}}}.tar"


def measure_index(pattern: str, index: Path, workers: int) -> dict:
    """Seconds and megabytes of the index, made and read, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        made_s, *_ = fresh.submit(load_index, pattern, index, workers).result()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        read_s, memory, peak, rows = fresh.submit(load_index, pattern, index, workers).result()
    disk = sum(path.stat().st_size for path in index.iterdir()) / 1e6
    return dict(
        rows=rows, made_s=made_s, read_s=read_s, disk_mb=disk, memory_mb=memory, peak_mb=peak
    )


def load_index(pattern: str, index: Path, workers: int) -> tuple:
    """(seconds, megabytes that it takes, megabytes at the peak, rows)."""
    before, start = rss(os.getpid()), time.perf_counter()
    split = load_shards(pattern, index=index, workers=workers)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000 - before
    give_back_memory()
    return round(seconds, 1), rss(os.getpid()) - before, peak, len(split.captions)


def main():
    config = parse_config(BenchConfig)
    torch.set_num_threads(1)
    keep_freed_memory()  # as train.py does
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.folder or temporary).resolve()
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        pattern = make_shards(folder, config)
        record = dict(config=asdict(config), **machine_facts("cpu"), load=os.getloadavg()[0])
        del record["config"]["folder"], record["config"]["out"]
        record["written_s"] = round(time.perf_counter() - start, 1)

        index = folder / "cache" / "shards"
        record["index"] = measure_index(pattern, index, config.workers)
        split = load_shards(pattern, index=index, workers=1, progress=False)
        paths = list(split.video_paths[: min(2000, config.samples)])
        record["clips per second"] = measure_rates(paths, config)
        print(record, flush=True)

        if not config.videos:  # their captions say nothing
            links = link_shards(folder, config)
            record["index of links"] = measure_index(links, index, config.workers)
            record["memory, MB"] = measure_memory(paths, config)
            record["run"] = measure_run(links, folder, config)
            record["mining"] = measure_mining(links, folder, config)
            print(record, flush=True)

    with open(config.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    run(main)
