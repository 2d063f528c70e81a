"""How long does a query take in a large library? From its text to printed ranks, in two parts.

    python -m bench.search                                # 100,000 videos of 1 window each
    python -m bench.search --videos 100000 --windows 10   # 1,000,000 windows
    python -m bench.search --toy cache/toy                # how many queries claim a match

The library is an index of random unit vectors, read as `eval.py --task search` reads it (the cold
start: read and check every row, then gather all windows in memory). The model is untrained: preset
"toy" for E = 256, "base" for 512, whose text towers those widths belong to. A query is 8 words.
Median and worst of `--queries` different ones, printed to a string as the task prints them.
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
from data import keep_decodable, open_cache
from datasets.tasks import TASKS
from eval import SHIPPED, EvalConfig, embed_texts, embed_videos
from model import CLOP, build_config
from search.index import File, Index, Record
from search.query import Library, answer, embed_query, find_floor, print_answer
from training.checkpoint import Checkpoint, load_checkpoint

WORDS = """a the dog cat man woman child runs rides eats throws red blue ball horse bike beach
street kitchen""".split()


# what the toy world does not show
OTHER_SCENES = """
    a woman plays the guitar on stage
    a man is cooking pasta in a kitchen
    people are swimming in the ocean
    cars drive on the highway at night
    a baby sleeps in a crib
    two teams play football in a stadium
    a doctor examines a patient
    the train leaves at noon
    an opera singer performs in vienna
    a dog catches a frisbee in the park
    a chef cuts onions
    kids build a snowman
    a man repairs a bicycle
    the bride throws her bouquet
    a cat sleeps on a sofa
    a girl rides a pony
    someone paints a fence
    an old man feeds pigeons
    a horse jumps over a fence
    a boy eats an ice cream
"""


@dataclass
class BenchConfig:
    """Benchmark of the search."""

    videos: int = 100000  # in the library
    windows: int = 1  # of each
    presets: str = "toy,base"  # E = 256, 512
    queries: int = 50  # after 3 that do not count
    top: int = 10  # matches
    toy: str | None = None  # instead: a toy world, among whose videos queries claim a match or not


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
        index.add(file, Record(spans, emb))
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


def measure_claims(data: str) -> None:
    """Print how many captions of a toy world's videos, and how many other scenes, claim a match."""
    checkpoint = load_checkpoint(SHIPPED)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    task = TASKS["toy"](EvalConfig(data=data))
    cache = open_cache(Path("cache/frames"), model.config)
    split = keep_decodable(task.split, cache)

    records = {}
    for path, emb in zip(split.video_paths, embed_videos(model, cache, split.video_paths).numpy()):
        records[File(path, 0, 0)] = Record(np.zeros((1, 2), np.float32), emb[None])
    library = Library(records)
    floor = find_floor(checkpoint, library)

    others = OTHER_SCENES.strip().splitlines()
    for name, texts in (("captions of its videos", split.captions), ("other scenes", others)):
        text_emb = embed_texts(model, tokenizer, texts).numpy()
        claims = (library.emb @ text_emb.T).max(axis=0) > floor
        print(f"{claims.mean():.1%} of {len(texts)} {name} claim a match (above {floor:.3f})")


def main():
    config = parse_config(BenchConfig)
    if config.toy:
        return measure_claims(config.toy)
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
