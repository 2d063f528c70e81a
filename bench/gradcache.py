"""Peak memory and time of one training step: the whole batch at once against chunks with the same
negatives (--chunk).

Each row is a process of its own, because a peak is one number a process. Memory: what the process
(on a GPU: the allocator) held at most, beyond what it held before the step. The gradient of each
row is compared with the first's.

    python -m bench.gradcache                                    # a CPU, toy preset, 1,024 pairs
    python -m bench.gradcache --preset base --batch 512          # on a GPU
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch

from cli import parse_config, run
from eval import machine_facts
from knowledge import concept_vectors
from model import CLOP, build_config
from train import TrainConfig, backward

CONCEPTS = 512


@dataclass
class BenchConfig:
    """Memory and time of --chunk."""

    preset: str = "toy"  # of model.py
    batch: int = 1024  # pairs
    frames: int = 8  # of a video
    chunks: str = "0,256,64,16"  # pairs encoded at a time, a row each; 0 = all at once
    rounds: int = 3  # steps timed after one that is not; the fastest counts
    checkpointing: bool = False  # recompute activations, in every row
    only: int = -1  # (internal) run this chunk in this process and print JSON


def measure(config: BenchConfig) -> dict:
    """One row, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes, B = (
        build_config(config.preset, num_frames=config.frames, num_concepts=CONCEPTS),
        config.batch,
    )
    model = CLOP(sizes).to(device)
    model.use_checkpointing(config.checkpointing)
    captions = 2 * B  # each video's, and as many alone
    lengths = torch.randint(4, sizes.text_length + 1, (captions,))
    batch = dict(
        video=torch.randint(
            256, (B, config.frames, sizes.image_size, sizes.image_size, 3), dtype=torch.uint8
        ),
        tokens=torch.randint(sizes.vocab_size, (captions, sizes.text_length)),
        text_mask=torch.arange(sizes.text_length) < lengths[:, None],
        concepts=(torch.rand(captions, CONCEPTS) < 0.01).float(),
        video_concepts=torch.rand(B, CONCEPTS) * 0.02,
        signature=torch.arange(captions)[:, None].repeat(1, 2),
    )
    batch = {name: x.to(device) for name, x in batch.items()}
    batch["knowledge"] = concept_vectors(batch["concepts"], torch.ones(CONCEPTS, device=device))
    settings = TrainConfig(batch_size=B, chunk=config.only, hard_k=8, hard_weight=0.5)

    def held() -> int:
        return (
            torch.cuda.max_memory_allocated()
            if device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )

    before, seconds = held(), []
    for _ in range(config.rounds + 1):
        model.zero_grad(set_to_none=True)
        wall, cpu = time.perf_counter(), time.process_time()
        backward(model, model.logit_scale, batch, settings)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = min(seconds[1:])
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])
    torch.save(gradient, os.environ["GRADIENT_FILE"])
    return dict(mib=(held() - before) / 2**20, wall=wall, cpu=cpu)


def main():
    config = parse_config(BenchConfig)
    if config.only >= 0:
        print(json.dumps(measure(config)))
        return
    facts = machine_facts("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{facts['hardware']}, torch {facts['versions']['torch']}, load {os.getloadavg()[0]:.1f}; "
        f"preset {config.preset}, {config.batch} pairs of {config.frames} frames, all losses on"
    )
    print(
        "| chunk | peak beyond start, MiB | of all at once | s | CPU s | of all at once | gradient "
        "differs by |"
    )
    print("|---|---|---|---|---|---|---|")
    first = whole = None
    for chunk in map(int, config.chunks.split(",")):
        file = f"{os.environ.get('TMPDIR', '/tmp')}/gradient-{os.getpid()}.pt"
        flags = [
            f"--{name}={value}"
            for name, value in (asdict(config) | dict(only=chunk)).items()
            if not isinstance(value, bool)
        ] + ["--checkpointing"] * config.checkpointing
        done = subprocess.run(
            [sys.executable, "-m", "bench.gradcache", *flags],
            env=dict(os.environ, GRADIENT_FILE=file),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        row, gradient = (
            json.loads(done.stdout.splitlines()[-1]),
            torch.load(file, weights_only=True),
        )
        os.unlink(file)
        first, whole = (row, gradient) if first is None else (first, whole)
        error = ((gradient - whole).norm() / whole.norm()).item()
        print(
            f"| {chunk or 'all'} | {row['mib']:.0f} | {row['mib'] / first['mib']:.2f} | "
            f"{row['wall']:.2f} | "
            f"{row['cpu']:.2f} | {row['cpu'] / first['cpu']:.2f} | {error:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
