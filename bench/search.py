"""How long does a query take in a large library? From its text to printed ranks, in two parts.

    python -m bench.search                                # 100,000 videos of 1 window each
    python -m bench.search --videos 100000 --windows 10   # 1,000,000 windows

The library is an index of random unit vectors, read as `eval.py --task search` reads it (the cold
start: read and check every row, then gather all windows in memory). The model is untrained: preset
"toy" for E = 128, "small" for 256, "base" for 512, whose text towers those widths belong to. A
query is 8 words. Median and worst of `--queries` different ones, printed to a string as the task
prints them.
"""

import contextlib
import io
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from captions.tokenizer import Tokenizer
from cli import parse_config, run
from model import CLOP, build_config
from search.index import File, Index, Record
from search.query import Library, answer, embed_query, find_floor, print_answer
from training.checkpoint import Checkpoint

WORDS = """a the dog cat man woman child runs rides eats throws red blue ball horse bike beach
street kitchen""".split()


@dataclass
class BenchConfig:
    """Benchmark of the search."""

    videos: int = 100000  # in the library
    windows: int = 1  # of each
    presets: str = "toy,small,base"  # E = 128, 256, 512
    queries: int = 50  # after 3 that do not count
    top: int = 10  # matches


def fill(path: Path, config: BenchConfig, embed_dim: int) -> tuple[list[File], dict]:
    """Write the index; (its files, what opens it)."""
    recipe = dict(checkpoint="random", window=8.0)
    files = [
        File(f"holidays/{i // 1000:03d}/clip {i:06d}.mp4", i, 10**6) for i in range(config.videos)
    ]
    index, rng = Index(path, **recipe), np.random.default_rng(0)
    starts = np.arange(config.windows, dtype=np.float32)[:, None] * 8
    spans = starts + np.float32([0, 8])  # [windows, 2]

    index.database.execute("PRAGMA synchronous = OFF")  # only here: it is thrown away
    for file in files:
        emb = rng.standard_normal((config.windows, embed_dim), np.float32)
        emb /= np.linalg.norm(emb, axis=1, keepdims=True)
        index.add(file, Record("", spans, emb))
    return files, recipe


def measure(preset: str, config: BenchConfig, tokenizer: Tokenizer) -> None:
    """Print a line of the table."""
    sizes = build_config(preset, vocab_size=tokenizer.vocab_size)
    checkpoint = Checkpoint(
        CLOP(sizes).eval(), tokenizer, None, {}, 0, {}, "random", Path("random"), {}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite"
        files, recipe = fill(path, config, sizes.embed_dim)
        megabytes = path.stat().st_size / 1e6
        started = time.perf_counter()
        library = Library(Index(path, **recipe).known(files))
        cold = time.perf_counter() - started
    floor = find_floor(checkpoint, library)
    rng, rows = np.random.default_rng(1), []
    for _ in range(3 + config.queries):
        query = " ".join(rng.choice(WORDS, 8))
        started, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            print_answer(answer(checkpoint, library, query, config.top, floor))
        whole, cpu = time.perf_counter() - started, time.process_time() - cpu

        started = time.perf_counter()
        text_emb = embed_query(checkpoint, query)
        text = time.perf_counter() - started
        library.search(text_emb, config.top)
        rows.append((whole, text, time.perf_counter() - started - text, cpu))
    whole, text, search, cpu = 1000 * np.array(rows[3:]).T
    print(
        f"{sizes.embed_dim:5d} {len(library.paths):9,d} {len(library.emb):10,d} {megabytes:8.0f} "
        f"{cold:8.2f} "
        f"{np.median(text):8.1f} {np.median(search):8.1f} {np.median(whole):8.1f} "
        f"{whole.max():8.1f} "
        f"{np.median(cpu):8.1f}",
        flush=True,
    )


def main():
    config = parse_config(BenchConfig)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, numpy {np.__version__}, load {os.getloadavg()[0]:.1f}\n"
        f"medians of {config.queries} queries, milliseconds"
    )
    print(
        f"{'E':>5s} {'videos':>9s} {'windows':>10s} {'MB':>8s} {'cold, s':>8s} {'text':>8s} "
        f"{'search':>8s} "
        f"{'whole':>8s} {'worst':>8s} {'CPU':>8s}"
    )
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 2, 400)
    for preset in config.presets.split(","):
        measure(preset, config, tokenizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform != "darwin" else 2**30
    )
    print(f"peak memory {peak:.1f} GiB, three copies of the vectors while they are made and read")


if __name__ == "__main__":
    run(main)
