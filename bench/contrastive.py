"""Time and memory of the contrastive op against what else there is, side by side in one run.

    python bench/contrastive.py                                  # this machine: its GPU, else its
                                                                 CPU
    python bench/contrastive.py --device cpu --sizes 8192        # 20 seconds

On a CPU: `tiled` against `reference`, each row in a process of its own, so that the operating
system knows its peak memory. On a GPU: `triton` against eager and compiled PyTorch, and against
memeff, inf-cl and open_clip where they are installed (`pip install memeff inf-cl open_clip_torch`;
none of their code is here). CUDA events, medians, inputs rotated, random unit rows.

Each mode has its own row, so that the price of knowledge and of mining shows. "products" counts
matrix products of 2·B²·E FLOP that a row does, forward + backward: TFLOP/s is over these, and 100 %
is one such product by cuBLAS in bf16, in the same run. Extra memory is the peak beyond inputs and
gradients. The error is that of the loss against float64.
"""

import dataclasses
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import UserError, parse_config, run  # noqa: E402
from kernels import knowledge_nce  # noqa: E402

MODES = {
    "loss": dict(),
    "+ knowledge": dict(knowledge=True),
    "+ top-16": dict(knowledge=True, k=16),
}
CONCEPTS, SCALE, BETA = 64, 50.0, 1.0


@dataclasses.dataclass
class BenchConfig:
    device: str = ""  # cpu or cuda; empty: cuda where there is one
    sizes: str = (
        ""  # batch sizes, by commas; empty: 8192,16384 on a CPU, 32768,65536,131072 on a GPU
    )
    dim: int = 0  # embedding width E; 0: 256 on a CPU, 512 on a GPU
    row: str = ""  # internal: measure this one row of the CPU table and print it as JSON


def make_inputs(batch: int, dim: int, device: str, dtype: torch.dtype, seed: int) -> dict:
    """Random unit rows with some signal; 64 concept vectors; one pair in ten shares its knowledge
    with another.
    """
    g = torch.Generator(device).manual_seed(seed)
    text = F.normalize(torch.randn(batch, dim, generator=g, device=device), dim=1)
    video = F.normalize(
        torch.randn(batch, dim, generator=g, device=device) + text * dim**0.5 / 2, dim=1
    )
    concepts = F.normalize(
        (torch.rand(batch, CONCEPTS, generator=g, device=device) < 0.1).float(), dim=1
    )
    ids = torch.arange(batch, device=device)
    ids[: batch // 10] = ids[batch // 10 : 2 * (batch // 10)]
    leaves = [text.to(dtype).requires_grad_(), video.to(dtype).requires_grad_()]
    scalars = [torch.tensor(x, device=device, requires_grad=True) for x in (math.log(SCALE), BETA)]
    return dict(
        video=leaves[1],
        text=leaves[0],
        scale=scalars[0],
        beta=scalars[1],
        concepts=concepts,
        ids=ids,
    )


def ours(impl: str, knowledge: bool = False, k: int = 0):
    """The op as a function of `make_inputs` -> loss."""

    def loss(x):
        know = dict(concepts=x["concepts"], beta=x["beta"], signature=x["ids"]) if knowledge else {}
        return knowledge_nce(
            x["video"], x["text"], x["scale"], k=k, impl=impl, check=False, **know
        )[0]

    return loss


# ---------------------------------------------------------------- CPU


def peak_mib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == "darwin" else 1 << 10
    )


def cpu_row(impl: str, mode: str, batch: int, dim: int) -> dict:
    """Seconds of the faster of two steps, its processor seconds, and extra MiB, measured in this
    process.
    """
    x = make_inputs(batch, dim, "cpu", torch.float32, 0)
    leaves = [x["video"], x["text"], x["scale"], x["beta"]]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    small = make_inputs(256, dim, "cpu", torch.float32, 1)
    step = ours(impl, **MODES[mode])
    step(small).backward()  # threads and libraries are loaded
    before, times = peak_mib(), []
    for _ in range(2):
        start, busy = time.perf_counter(), time.process_time()
        loss = step(x)
        middle = time.perf_counter()
        loss.backward()
        times.append((time.perf_counter() - start, middle - start, time.process_time() - busy))
    both, forward, cpu = min(times)
    return dict(
        forward=forward, backward=both - forward, cpu=cpu, mib=peak_mib() - before, loss=loss.item()
    )


def bench_cpu(sizes: list[int], dim: int) -> None:
    print(
        f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, E = {dim}, s "
        f"= {SCALE:g}\n"
    )
    print(
        "| B | mode | version | forward s | backward s | time | CPU s | extra MiB | memory | loss |"
    )
    print("|---" * 10 + "|")
    for batch in sizes:
        for mode in MODES:
            rows = {}
            for impl in ("reference", "tiled"):
                flags = [
                    "--row",
                    f"{impl},{mode}",
                    "--sizes",
                    str(batch),
                    "--dim",
                    str(dim),
                    "--device",
                    "cpu",
                ]
                done = subprocess.run(
                    [sys.executable, __file__, *flags],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                rows[impl] = r = json.loads(done.stdout.splitlines()[-1])
                first = rows["reference"]
                speed = (r["forward"] + r["backward"]) / (first["forward"] + first["backward"])
                saved = first["mib"] / max(1, r["mib"])  # less than a MiB is not measured
                print(
                    f"| {batch} | {mode} | {impl} | {r['forward']:.2f} | {r['backward']:.2f} | "
                    f"{speed:.2f} x "
                    f"| {r['cpu']:.2f} | {r['mib']:.0f} | 1/{saved:.0f} | {r['loss']:.5f} |",
                    flush=True,
                )


# ---------------------------------------------------------------- GPU


def eager(x):
    """InfoNCE as everybody writes it."""
    logits = x["scale"].exp() * (x["video"] @ x["text"].T).float()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager_knowledge(x):
    """With κ and masks, still without mining."""
    logits = x["scale"].exp() * (x["video"] @ x["text"].T).float()
    eye = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits + x["beta"] * (x["concepts"] @ x["concepts"].T).masked_fill(eye, 0)
    logits = logits.masked_fill((x["ids"][:, None] == x["ids"]) & ~eye, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gpu_rows() -> list[tuple]:
    """(name, mode, loss function or None: not installed, products forward, products in all)."""

    def peer(package, build):
        return build() if importlib.util.find_spec(package) else None

    def memeff():
        from memeff import MemoryEfficientCLIPLoss

        op = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
        return lambda x: op(x["video"], x["text"])

    def inf_cl():
        from inf_cl import cal_flash_loss

        scale = torch.tensor(SCALE, device="cuda")  # its learnable scale fails on one process

        def both(x):
            pairs = (x["video"], x["text"]), (x["text"], x["video"])
            return sum(cal_flash_loss(*pair, scale=scale) for pair in pairs) / 2

        return both

    def open_clip():
        from open_clip.loss import ClipLoss

        op = ClipLoss()
        return lambda x: op(x["video"], x["text"], x["scale"].exp())

    return [
        ("eager", "loss", eager, 1, 3),
        ("eager", "+ knowledge", eager_knowledge, 1, 3),
        ("torch.compile", "loss", torch.compile(eager), 1, 3),
        ("torch.compile", "+ knowledge", torch.compile(eager_knowledge), 1, 3),
        ("open_clip", "loss", peer("open_clip", open_clip), 2, 6),
        ("memeff", "loss", peer("memeff", memeff), 1, 5),
        ("inf-cl", "loss", peer("inf_cl", inf_cl), 2, 10),
        *[
            (
                "triton",
                mode,
                ours("triton", **options),
                1 + (options.get("k", 0) > 0),
                4 + (options.get("k", 0) > 0),
            )
            for mode, options in MODES.items()
        ],
    ]


def median_ms(function, inputs: list[dict], seconds: float = 2.0) -> float:
    """Median CUDA-event time over about `seconds`, at least 5 and at most 50 calls, inputs rotated,
    after a warm-up.
    """
    for x in inputs[:2]:
        function(x)
    torch.cuda.synchronize()
    times, start = [], time.perf_counter()
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - start < seconds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function(inputs[len(times) % len(inputs)])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def gpu_row(function, inputs: list[dict]) -> tuple[float, float, float, float]:
    """(ms forward, ms forward + backward, peak MiB beyond inputs and gradients, loss of the first
    input).
    """

    def step(x):
        leaves = [v for v in x.values() if v.requires_grad]
        return torch.autograd.grad(function(x), leaves, allow_unused=True)

    forward = median_ms(function, inputs)
    both = median_ms(step, inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step(inputs[0])
    gradients = sum(g.numel() * g.element_size() for g in grads if g is not None)
    return (
        forward,
        both,
        (torch.cuda.max_memory_allocated() - before - gradients) / 2**20,
        function(inputs[0]).item(),
    )


def bench_gpu(sizes: list[int], dim: int) -> None:
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, bfloat16, E = {dim}, s = {SCALE:g}\n")
    print(
        "| B | version | mode | forward ms | fwd + bwd ms | forward TFLOP/s | fwd + bwd TFLOP/s "
        "| forward % of cuBLAS | fwd + bwd % | extra MiB | loss error |\n" + "|---" * 11 + "|"
    )
    for batch in sizes:
        inputs = [make_inputs(batch, dim, "cuda", torch.bfloat16, seed) for seed in range(3)]
        slab = 4096  # rows, so that the product's result always fits
        product = (
            batch / slab * median_ms(lambda x: x["video"][:slab] @ x["text"].T, inputs, seconds=1.0)
        )
        flop = 2 * batch**2 * dim
        print(
            f"| {batch} | cuBLAS | one product | {product:.2f} | | {flop / product / 1e9:.0f} | | "
            "100 | | | |"
        )
        truth = {}
        for mode, options in MODES.items():
            x = {
                k: v.detach().double() if v.is_floating_point() else v for k, v in inputs[0].items()
            }
            with torch.no_grad():
                truth[mode] = ours("tiled", knowledge=options.get("knowledge", False))(x).item()
        for name, mode, function, forward_products, products in gpu_rows():
            if function is None:
                print(f"| {batch} | {name} | {mode} | not installed |" + " |" * 7)
                continue
            try:
                forward, both, mib, loss = gpu_row(function, inputs)
            except torch.OutOfMemoryError:
                print(f"| {batch} | {name} | {mode} | out of memory |" + " |" * 7, flush=True)
                continue
            finally:
                torch.cuda.empty_cache()
            fwd_rate, rate = forward_products * flop / forward / 1e9, products * flop / both / 1e9
            share = product * forward_products / forward, product * products / both
            print(
                f"| {batch} | {name} | {mode} | {forward:.2f} | {both:.2f} | {fwd_rate:.0f} | "
                f"{rate:.0f} "
                f"| {share[0]:.0%} | {share[1]:.0%} | {mib:.0f} | {abs(loss - truth[mode]):.1e} |",
                flush=True,
            )


def main() -> None:
    config = parse_config(BenchConfig)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: this machine has no such device; use cpu")
    default = "8192,16384" if device == "cpu" else "32768,65536,131072"
    sizes = [int(size) for size in (config.sizes or default).split(",")]
    dim = config.dim or (256 if device == "cpu" else 512)
    if config.row:
        impl, mode = config.row.split(",")
        print(json.dumps(cpu_row(impl, mode, sizes[0], dim)))
    elif device == "cpu":
        bench_cpu(sizes, dim)
    else:
        bench_gpu(sizes, dim)


if __name__ == "__main__":
    run(main)
