"""Time and memory of retrieval metrics from embeddings, by size.

    python -m bench.eval                                # n captions × n videos for several n, both
                                                        ways
    python -m bench.eval --sizes 100000 --matrix-up-to 0   # the real thing: about 95 CPU seconds
    python -m bench.eval --toy cache/toy                # a whole evaluation beside its embedding

Tiles: `retrieval_ranks` (exact, bounded memory). Matrix: sim in fp32 by one product, then
`retrieval_metrics`, which is what one writes first. Every measurement has a process of its own, so
that peak memory is its own; time excludes the start. From 10,000 on, the time for 100,000 is
extrapolated by n²: the work is n²·E, nothing else grows faster.
"""

import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import parse_config, run
from data import open_cache
from datasets.tasks import TASKS
from eval import (
    SHIPPED,
    EvalConfig,
    embed_texts,
    embed_videos,
    evaluate,
    retrieval_metrics,
    retrieval_ranks,
    summarize,
)
from training.checkpoint import load_checkpoint


@dataclass
class BenchConfig:
    """Benchmark of the retrieval metrics."""

    sizes: str = "3000,10000,30000"  # n captions and n videos
    width: int = 256  # E
    matrix_up_to: int = 10000  # largest n at which the whole matrix is tried
    rounds: int = 3  # per size; the fastest counts
    toy: str | None = None  # a toy world: what its evaluation costs beside embedding, all cached


def peak_mib() -> float:
    """Peak resident memory of this process, MiB (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 1024**2
    )


def measure(how: str, n: int, width: int, rounds: int) -> tuple[float, float, float, dict]:
    """(seconds, CPU seconds, MiB beyond the embeddings, metrics) of the fastest round."""
    generator = torch.Generator().manual_seed(0)
    video = torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
    text = torch.nn.functional.normalize(
        video + 0.2 * torch.randn(n, width, generator=generator), dim=1
    )
    before, best = peak_mib(), None
    for _ in range(rounds):
        started, cpu = time.perf_counter(), time.process_time()
        if how == "tiles":
            metrics = summarize(retrieval_ranks(text, video, torch.arange(n)))
        else:
            metrics = retrieval_metrics(text @ video.T, torch.arange(n))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        best = min(best or (seconds, cpu), (seconds, cpu))
    return *best, peak_mib() - before, metrics


def measure_toy(data: str) -> None:
    """Print CPU seconds of `eval.py --task toy`, and of nothing but its embeddings."""
    with tempfile.TemporaryDirectory() as out:
        config = EvalConfig(data=data, out=out)
        evaluate(config)  # fills the caches
        started = time.process_time()
        evaluate(config)
        whole = time.process_time() - started

    checkpoint, task = load_checkpoint(SHIPPED), TASKS["toy"](config)
    cache = open_cache(Path(config.cache) / "frames", checkpoint.model.config)
    options = sum((question.options for question in task.questions), [])
    started = time.process_time()
    embed_videos(checkpoint.model, cache, task.split.video_paths)
    embed_texts(checkpoint.model, checkpoint.tokenizer, task.split.captions)
    embed_texts(checkpoint.model, checkpoint.tokenizer, options)
    embedding = time.process_time() - started
    print(
        f"{whole:.1f} CPU s, of which embedding {embedding:.1f} and all else "
        f"{whole - embedding:.1f} ({whole / embedding - 1:.0%} of embedding)"
    )


def main():
    config = parse_config(BenchConfig)
    if config.toy:
        return measure_toy(config.toy)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, E = {config.width}, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'n':>8s} {'':7s} {'seconds':>8s} {'CPU s':>8s} {'ns/pair':>8s} {'MiB':>8s}  t2v R@1")
    for n in map(int, config.sizes.split(",")):
        for how in ("matrix", "tiles") if n <= config.matrix_up_to else ("tiles",):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, cpu, mib, metrics = pool.apply(
                    measure, (how, n, config.width, config.rounds)
                )
            print(
                f"{n:8d} {how:7s} {seconds:8.2f} {cpu:8.2f} {1e9 * seconds / n**2:8.2f} {mib:8.0f} "
                " "
                f"{metrics['t2v_R@1']:.2f}",
                flush=True,
            )
    if 10_000 <= n < 100_000:
        mib = 4 * 100_000 * config.width * 8 / 2**20  # two fp64 copies of each side while rounding
        print(
            f"100,000 × 100,000: about {seconds * (100_000 / n) ** 2:.0f} s, extrapolated from {n} "
            "by n²; memory grows "
            f"by n, to about {mib:.0f} MiB, where sim in fp64 would be 74 GiB"
        )


if __name__ == "__main__":
    run(main)
