"""What a training step costs each rank: FLOPs, bytes through the network, and which of them takes
longest.

Counts follow from the sizes in model.py and from what losses.py and distributed.py send; the rates
below are assumptions, so the last columns are estimates. docs/scaling.md explains the formulas and
holds this script's output (a test compares).

    python -m bench.scaling                 # the tables
    python -m bench.scaling --measure       # pairs per second of one process and of two on this
                                            machine
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cli import run
from datasets import toyworld
from model import CLOP, PRESETS, ModelConfig, build_config

ROOT = Path(__file__).parent.parent

FRAMES = 8  # T
CONCEPTS = 4096  # K, ConceptVocab.build's largest
IDS = 2  # signature: video, meaning
CAPTIONS = 2  # for each video of a batch: its own, and one without a video
H100 = (
    400e12  # FLOP/s that bf16 encoders and the op may reach on an H100 (assumed: 40 % of the peak)
)
INSIDE, OUTSIDE = (
    300e9,
    40e9,
)  # bytes/s a GPU receives, inside a machine of 8 and between machines (assumed)
GPUS = (8, 64, 256, 1024)
BATCHES = (1024, 4096, 16384, 65536, 131072)


def encoder_flops(sizes: ModelConfig, frames: int = FRAMES) -> tuple[float, float]:
    """FLOPs of one forward pass of (one video, one caption): 2 a weight and token, 4 a pair of
    tokens and width.

    The last block's MLP, 8·width² weights, runs on what is read only: a class token a step, the end
    of the text.
    """
    places, steps = (
        (sizes.image_size // sizes.patch_size) ** 2,
        math.ceil(frames / sizes.frames_per_patch),
    )
    D, S = sizes.video_width, places + 1  # S tokens a frame, the class token one
    block = 2 * 16 * D**2 + 4 * D * (S + steps)  # a token: both attentions, and the MLP
    if sizes.conv_stem:
        stages = int(math.log2(sizes.patch_size))
        widths = [3, *(D >> (stages - 1 - i) for i in range(stages))]
        sides = [sizes.image_size >> (i + 1) for i in range(stages)]
        each = sum(2 * 9 * a * b * side**2 for a, b, side in zip(widths, widths[1:-1], sides))
        stem = steps * sizes.frames_per_patch * (each + 2 * 9 * widths[-2] * D * sides[-1] ** 2)
    else:
        stem = steps * places * 2 * D * 3 * sizes.frames_per_patch * sizes.patch_size**2
    video = (
        stem
        + steps * (S * sizes.video_layers * block - places * 2 * 8 * D**2)
        + 2 * D * sizes.embed_dim
    )
    W, L = sizes.text_width, sizes.text_length
    text = (
        L * sizes.text_layers * (2 * 12 * W**2 + 4 * W * L)
        - (L - 1) * 2 * 8 * W**2
        + 2 * W * sizes.embed_dim
    )
    return video, text


def count_parameters(preset: str) -> int:
    with torch.device("meta"):
        return sum(
            p.numel() for p in CLOP(build_config(preset, num_concepts=CONCEPTS)).parameters()
        )


def cost(preset: str, B: int, N: int, concepts: int = CONCEPTS) -> dict[str, float]:
    """FLOPs and received bytes of a rank in one step: N ranks, B videos in all, fp32 sent."""
    sizes = build_config(preset)
    E, others, C = sizes.embed_dim, (N - 1) / N, CAPTIONS * B
    video, text = encoder_flops(sizes)
    return dict(
        encoders=3 * (B * video + C * text) / N,  # backward: twice the forward
        op=4 * 2 * (B / N) * C * (E + concepts),  # 1 product forward, 3 backward
        text=2 * others * 4 * C * E,  # all_gather, reduce_scatter
        knowledge=others * 4 * C * concepts,  # all_gather: data, no gradient
        ids=others * 8 * C * IDS,
        columns=2 * others * 4 * B,  # all_to_all and back
        gradients=2 * others * 4 * count_parameters(preset),
    )  # all_reduce


def limits(c: dict[str, float], N: int) -> dict[str, float]:
    """Seconds of each part at the assumed rates.

    DDP's all-reduce runs behind the backward, the rest does not.
    """
    rate = INSIDE if N <= 8 else OUTSIDE
    gathered = c["text"] + c["knowledge"] + c["ids"] + c["columns"]
    hidden = max(0.0, c["gradients"] / rate - 2 / 3 * c["encoders"] / H100)
    return {
        "encoders": c["encoders"] / H100,
        "op": c["op"] / H100,
        "gathers": gathered / rate,
        "gradients": hidden,
    }


def tables() -> str:
    """Markdown."""
    lines = ["| preset | parameters | video, forward | caption, forward |", "|---|---|---|---|"]
    for preset in PRESETS:
        video, text = encoder_flops(build_config(preset))
        lines.append(
            f"| {preset} | {count_parameters(preset) / 1e6:.1f} M | {video / 1e9:.3g} GFLOP | "
            f"{text / 1e9:.3g} GFLOP |"
        )
    for concepts, batches in ((CONCEPTS, BATCHES), (0, BATCHES[-1:])):
        lines += [
            "",
            f"Preset base, {FRAMES} frames, K = {concepts:,}"
            + ("" if concepts else " (β = 0)")
            + ":",
            "",
            "| B | GPUs | pairs a rank | encoders, TFLOP | op, TFLOP | texts, MB | concepts, MB | "
            "ids + columns, "
            "MB | gradients, MB | ms: encoders + op + gathers + gradients left over | share of the "
            "encoders |",
            "|" + "---|" * 11,
        ]
        for B in batches:
            for N in GPUS:
                c = cost("base", B, N, concepts)
                seconds = limits(c, N)
                total = sum(seconds.values())
                lines.append(
                    f"| {B:,} | {N:,} | {B // N:,} | {c['encoders'] / 1e12:,.1f} | "
                    f"{c['op'] / 1e12:.4f} | "
                    f"{c['text'] / 1e6:.1f} | {c['knowledge'] / 1e6:,.0f} | "
                    f"{(c['ids'] + c['columns']) / 1e6:.2f} | "
                    f"{c['gradients'] / 1e6:,.0f} | "
                    + " + ".join(f"{1000 * s:.1f}" for s in seconds.values())
                    + f" | {seconds['encoders'] / total:.0%} |"
                )
    return "\n".join(lines)


def measure(steps: int = 24) -> None:
    """Pairs per second at the same global batch, a thread a process: 1 process against 2 on this
    machine's cores.
    """
    with tempfile.TemporaryDirectory() as folder:
        world, speed = (
            toyworld.generate(f"{folder}/world", train=400, val=8, test=8, progress=False),
            {},
        )
        for processes in (1, 2):
            command = [
                sys.executable,
                "train.py",
                f"--procs={processes}",
                "--dataset=csv",
                f"--data={world}/train.csv",
                f"--out={folder}/{processes}",
                f"--cache={folder}/cache",
                f"--steps={steps}",
                "--log-every=4",
                "--eval-every=1000",
            ]
            subprocess.run(
                command,
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
                env=dict(os.environ, OMP_NUM_THREADS="1"),
            )
            lines = [
                json.loads(line)
                for line in open(f"{folder}/{processes}/log.jsonl", encoding="utf-8")
            ]
            times = sorted(
                line["step_s"] for line in lines if line.get("step", 0) > 4 and "step_s" in line
            )
            speed[processes] = 128 / times[len(times) // 2]
            print(
                f"{processes} process(es), 1 thread each: {speed[processes]:.0f} pairs/s (median)"
            )
    print(
        f"efficiency of 2: {speed[2] / speed[1] / 2:.0%}; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def main():
    measure() if "--measure" in sys.argv else print(tables())


if __name__ == "__main__":
    run(main)
