"""What millions of captions cost each process: a list of Python strings against the mapped file of strings.py.

    python -m bench.memory                          # 2.5 million rows, 4 workers, about two minutes on two cores
    python -m bench.memory --millions 0.1           # smaller

A csv file of WebVid's kind (a path and a caption of ten words a row) is read by each of the workers, as each rank of
a training run does (`separate`), or by a parent that then forks them, as it does for decoding (`forked`). Then each
looks at every row once and at random ones, and while all are still there each reads its own /proc/self/smaps_rollup:

    RSS      pages that are in memory and that it sees     Private    of them, those that no other process sees (USS)
    PSS      the same, a page that n see counted as 1/n    peak       the highest RSS that it ever had, while reading

PSS summed over the processes is what the machine really gives. `nothing` is a process that only imports.
"""

import csv
import multiprocessing
import os
import platform
import random
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

from cli import give_back_memory, parse_config, run  # noqa: E402
from datasets.published import load_split  # noqa: E402


@dataclass
class BenchConfig:
    """Memory of captions and paths, by process."""
    millions: float = 2.5  # rows
    workers: int = 4       # processes that hold them


def write_rows(path: Path, count: int):
    words = "a man woman dog red small rides throws near the old house river plays with ball two children".split()
    draw = random.Random(0).choice
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "caption"])
        for i in range(count):
            writer.writerow([f"videos/{i // 500:06d}_{i // 500 + 49:06d}/{31_000_000 + i}.mp4",
                             f"{' '.join(draw(words) for _ in range(9))} {i}"])


def load_nothing(path: Path):
    return [], [], np.zeros(0, np.int64)


def load_lists(path: Path):
    """As this repository did: lists of str, and a dict while reading."""
    number, captions, video_of_caption = {}, [], []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions.append(row["caption"])
            video_of_caption.append(number.setdefault(str(path.parent / row["video"]), len(number)))
    return list(number), captions, np.array(video_of_caption, np.int64)


def load_strings(path: Path):
    split = load_split("csv", path).stored(path.parent)
    return split.video_paths, split.captions, split.video_of_caption


def look(paths, captions, video_of_caption) -> int:
    """Every row once, then 20,000 at random, as batches do."""
    total = sum(map(len, captions)) + sum(map(len, paths))
    for i in np.random.default_rng(os.getpid()).integers(0, max(1, len(captions)), 20_000 if len(captions) else 0):
        total += len(captions[i]) + len(paths[video_of_caption[i]])
    return total


def memory() -> dict[str, int]:
    """{"Rss", "Pss", "Private", "peak"} of this process, bytes."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    kib = {name: int(size) for name, size in re.findall(r"(\w+): +(\d+) kB", rollup)}
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return dict(Rss=1024 * kib["Rss"], Pss=1024 * kib["Pss"],
                Private=1024 * (kib["Private_Clean"] + kib["Private_Dirty"]), peak=1024 * peak)


def work(load, path: Path, all_there, results):
    """In a worker, with the settings of malloc that every script of this repository has (cli.run)."""
    def main():
        data = load(path) if path else load  # forked workers get the data itself
        give_back_memory()
        look(*data)
        all_there.wait()
        results.put(memory())
        all_there.wait()
    run(main)


def measure(method: str, load, path: Path | None, workers: int) -> list[dict]:
    context = multiprocessing.get_context(method)
    all_there, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=work, args=(load, path, all_there, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def fork_workers(load, path: Path, workers: int, results):
    """In a parent of its own: what an earlier one had freed would still be its memory."""
    def main():
        data = load(path)
        give_back_memory()
        results.put(measure("fork", data, None, workers))
    run(main)


def main():
    config = parse_config(BenchConfig)
    print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, numpy {np.__version__}; "
          f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        write_rows(path, int(config.millions * 1e6))
        print(f"{config.millions * 1e6:,.0f} rows, {path.stat().st_size / 1e6:.0f} MB of csv, {config.workers} workers"
              "\nMB a worker (mean)                RSS      PSS  Private     peak    all workers (sum of PSS)")

        def show(name, found):
            mean = {key: sum(one[key] for one in found) / len(found) / 1e6 for key in found[0]}
            print(f"    {name:25s}" + "".join(f"{mean[key]:9.0f}" for key in ("Rss", "Pss", "Private", "peak"))
                  + f"{mean['Pss'] * len(found):12.0f}", flush=True)

        loads = {"nothing": load_nothing, "list of str": load_lists, "Strings (ours)": load_strings}
        for name, load in loads.items():
            show(f"separate, {name}", measure("spawn", load, path, config.workers))
        for name, load in loads.items():
            results = multiprocessing.get_context("spawn").SimpleQueue()
            parent = multiprocessing.get_context("spawn").Process(
                target=fork_workers, args=(load, path, config.workers, results))
            parent.start()
            show(f"forked, {name}", results.get())
            parent.join()


if __name__ == "__main__":
    run(main)
