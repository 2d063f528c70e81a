"""Time and memory of the contrastive op against what else there is, side by side in one run.

    python -m bench.contrastive                                  # this machine: its GPU, or its CPU
    python -m bench.contrastive --device cpu --sizes 8192        # 40 seconds

On a CPU: `tiled` against `reference`, each row in a process of its own, so that the operating
system knows its peak memory. On a GPU: `triton` against eager and compiled PyTorch, a loop over row
chunks with cuBLAS, and memeff and inf-cl where they are installed (`pip install memeff inf-cl`; no
code of theirs is here). CUDA events, medians, inputs rotated, random unit rows. β is a constant, as
in training.

Each mode has its own row, so that the price of knowledge and of mining shows. TFLOP/s is over the
products of 2·B²·(E + K) FLOP that a version does. 100 % is one such product by cuBLAS in the same
run. Extra memory is the peak beyond inputs and gradients. The error is that of the loss against
float64. Needs torch only (triton on a GPU).
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels import knowledge_nce

MODES = {  # columns of the concepts, hard negatives of each row and column
    "loss": dict(concepts=0, k=0),
    "+ knowledge": dict(concepts=64, k=0),
    "+ top-16": dict(concepts=64, k=16),
    "+ top-16, 4,096 concepts": dict(concepts=4096, k=16),
}
SCALE, BETA = 50.0, 1.0
CPU_SIZES, GPU_SIZES = "8192,16384", "16384,32768,49152,65536,131072"


def make_inputs(batch: int, dim: int, concepts: int, device: str, dtype, seed: int = 0) -> dict:
    """Random unit rows with some signal; one pair in ten shares its knowledge with another."""
    g = torch.Generator(device).manual_seed(seed)
    text = F.normalize(torch.randn(batch, dim, generator=g, device=device), dim=1)
    noise = torch.randn(batch, dim, generator=g, device=device)
    video = F.normalize(noise + text * dim**0.5 / 2, dim=1)
    inputs = dict(
        video=video.to(dtype).requires_grad_(),
        text=text.to(dtype).requires_grad_(),
        scale=torch.tensor(math.log(SCALE), device=device, requires_grad=True),
    )
    if concepts:
        known = torch.rand(batch, concepts, generator=g, device=device) < 6 / concepts
        ids = torch.arange(batch, device=device)
        tenth = batch // 10
        ids[:tenth] = ids[tenth : 2 * tenth]
        inputs |= dict(concepts=F.normalize(known.float(), dim=1), ids=ids)
    return inputs


def ours(impl: str, k: int) -> Callable[[dict], torch.Tensor]:
    """The op as a function of `make_inputs` -> loss."""

    def loss(x):
        known = {}
        if "concepts" in x:
            known = dict(concepts=x["concepts"], beta=BETA, signature=x["ids"])
        options = dict(k=k, impl=impl)
        return knowledge_nce(x["video"], x["text"], x["scale"], **known, **options)[0]

    return loss


# ---- what else there is --------------------------------------------------------------------------


def eager(x, k: int = 0):
    """InfoNCE as everybody writes it, with κ and masks where there is knowledge."""
    logits = x["scale"].exp() * (x["video"] @ x["text"].T).float()
    if "concepts" in x:
        eye = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits + BETA * (x["concepts"] @ x["concepts"].T).masked_fill(eye, 0)
        logits = logits.masked_fill((x["ids"][:, None] == x["ids"]) & ~eye, -torch.inf)
    if k:  # the hardest of both directions, for nobody
        logits.detach().topk(k + 1, dim=1), logits.detach().topk(k + 1, dim=0)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Chunked(torch.autograd.Function):
    """InfoNCE by row chunks: cuBLAS and elementwise PyTorch. The honest rival: 25 lines."""

    ROWS = 2048

    @staticmethod
    def forward(ctx, video, text, scale):
        row_lse, col_lse = [], torch.full_like(text[:, 0], -torch.inf, dtype=torch.float32)
        for v in video.split(Chunked.ROWS):
            logits = scale * (v @ text.T).float()
            row_lse.append(logits.logsumexp(1))
            col_lse = torch.logaddexp(col_lse, logits.logsumexp(0))
        row_lse = torch.cat(row_lse)
        ctx.save_for_backward(video, text, scale, row_lse, col_lse)
        positive = scale * (video.float() * text.float()).sum(1)
        return ((row_lse + col_lse) / 2 - positive).mean()

    @staticmethod
    def backward(ctx, grad):
        video, text, scale, row_lse, col_lse = ctx.saved_tensors
        d_video, d_text = [], torch.zeros_like(text, dtype=torch.float32)
        for v, lse in zip(video.split(Chunked.ROWS), row_lse.split(Chunked.ROWS)):
            logits = scale * (v @ text.T).float()
            d = ((logits - lse[:, None]).exp() + (logits - col_lse).exp()).to(v.dtype)
            d_video.append(d @ text)
            d_text += d.T @ v
        unit = grad * scale / 2 / len(video)
        d_video = torch.cat(d_video).float() - 2 * text.float()
        d_text = d_text - 2 * video.float()
        d_scale = (d_video * video).sum() * unit / scale
        return (d_video * unit).to(video.dtype), (d_text * unit).to(text.dtype), d_scale


def chunked(x):
    return Chunked.apply(x["video"], x["text"], x["scale"].exp())


def memeff():
    from memeff import MemoryEfficientCLIPLoss

    op = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda x: op(x["video"], x["text"])


def inf_cl():
    from inf_cl import cal_flash_loss

    scale = torch.tensor(SCALE, device="cuda")  # its learnable scale fails on one process

    def both(x):
        to_text = cal_flash_loss(x["video"], x["text"], scale=scale)
        return (to_text + cal_flash_loss(x["text"], x["video"], scale=scale)) / 2

    return both


def gpu_version(name: str, k: int) -> tuple[Callable, int, int]:
    """(x -> loss, products forward, products in all). Raises ImportError where not installed."""
    if name == "eager":
        return lambda x: eager(x, k), 1, 3
    if name == "torch.compile":
        return torch.compile(lambda x: eager(x, k)), 1, 3
    if name == "chunked cuBLAS":
        return chunked, 1, 4
    if name == "memeff":
        return memeff(), 1, 5
    if name == "inf-cl":
        return inf_cl(), 2, 10
    return ours("triton", k), 1 + (k > 0), 4 + (k > 0)


PLAIN = ("chunked cuBLAS", "memeff", "inf-cl")  # know nothing of knowledge


# ---- measuring -----------------------------------------------------------------------------------


def peak_mib() -> float:
    """The most memory that this process ever held."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_cpu(impl: str, mode: str, batch: int, dim: int) -> dict:
    """The faster of two steps, and the memory beyond inputs and gradients, in this process."""
    options = MODES[mode]
    x = make_inputs(batch, dim, options["concepts"], "cpu", torch.float32)
    for leaf in (x["video"], x["text"], x["scale"]):
        leaf.grad = torch.zeros_like(leaf)
    step = ours(impl, options["k"])
    small = make_inputs(256, dim, options["concepts"], "cpu", torch.float32, seed=1)
    step(small).backward()  # threads and libraries are loaded

    before, times = peak_mib(), []
    for _ in range(2):
        start, busy = time.perf_counter(), time.process_time()
        loss = step(x)
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        times.append((end - start, middle - start, end - middle, time.process_time() - busy))

    _, forward, backward, cpu = min(times)
    mib = peak_mib() - before
    return dict(forward_s=forward, backward_s=backward, cpu_s=cpu, extra_mib=mib, loss=loss.item())


def median_ms(function, inputs: list[dict], seconds: float = 2.0) -> float:
    """Median time by CUDA events over about `seconds`: 5 to 50 calls after a warm-up."""
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


def measure_gpu(name: str, mode: str, batch: int, dim: int) -> dict:
    """Medians, rates, and the memory beyond inputs and gradients."""
    options = MODES[mode]
    concepts, k = options["concepts"], options["k"]
    function, forward_products, products = gpu_version(name, k)
    inputs = [make_inputs(batch, dim, concepts, "cuda", torch.float16, seed=n) for n in range(3)]

    def step(x):
        leaves = [v for v in x.values() if v.requires_grad]
        return torch.autograd.grad(function(x), leaves, allow_unused=True)

    forward, both = median_ms(function, inputs), median_ms(step, inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = [g for g in step(inputs[0]) if g is not None]
    kept = sum(g.numel() * g.element_size() for g in grads)
    extra = torch.cuda.max_memory_allocated() - before - kept

    # one product by cuBLAS, in slabs that always fit; the truth in float64
    slab = 4096
    product = median_ms(lambda x: x["video"][:slab] @ x["text"].T, inputs, seconds=1.0)
    product *= batch / slab * (dim + concepts) / dim
    wide = {n: v.detach() for n, v in inputs[0].items()}
    wide |= dict(video=wide["video"].double(), text=wide["text"].double())
    error = abs(function(inputs[0]).item() - ours("tiled", 0)(wide).item())
    tflop = 2 * batch**2 * (dim + concepts) / 1e12
    return dict(
        forward_ms=forward,
        step_ms=both,
        forward_tflops=forward_products * tflop / forward * 1e3,
        step_tflops=products * tflop / both * 1e3,
        forward_of_cublas=forward_products * product / forward,
        step_of_cublas=products * product / both,
        extra_mib=extra / 2**20,
        loss_error=error,
    )


def rows_cpu(sizes: list[int], dim: int) -> Iterator[dict]:
    """A record for each size, mode and version, measured in a process of its own."""
    for batch in sizes:
        for mode in MODES:
            for version in ("reference", "tiled"):
                row = dict(batch=batch, mode=mode, version=version)
                flags = ["--row", json.dumps(row), "--dim", str(dim), "--device", "cpu"]
                command = [sys.executable, "-m", "bench.contrastive", *flags]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    yield row | dict(failed=f"status {done.returncode}")
                    continue
                yield row | json.loads(done.stdout.splitlines()[-1])


def rows_gpu(sizes: list[int], dim: int) -> Iterator[dict]:
    """A record for each size, mode and version; `failed` says why there is no number."""
    versions = ("eager", "torch.compile", *PLAIN, "triton")
    for batch in sizes:
        for mode in MODES:
            for version in versions:
                if mode != "loss" and version in PLAIN:
                    continue
                row = dict(batch=batch, mode=mode, version=version)
                try:
                    yield row | measure_gpu(version, mode, batch, dim)
                except ImportError:
                    yield row | dict(failed="not installed")
                except torch.OutOfMemoryError:
                    yield row | dict(failed="out of memory")
                torch.cuda.empty_cache()


def add_ratios(rows: Iterator[dict]) -> Iterator[dict]:
    """Each CPU row with its time and memory as shares of the reference's, which goes before it."""
    for row in rows:
        if row["version"] == "reference":
            first = row
        if "failed" not in row and "failed" not in first:
            seconds, all_seconds = (r["forward_s"] + r["backward_s"] for r in (row, first))
            row["time"] = seconds / all_seconds
            row["memory"] = max(1, row["extra_mib"]) / max(1, first["extra_mib"])  # 1 MiB is noise
        yield row


def print_table(rows: Iterator[dict]) -> None:
    """Markdown, row by row; the first row with numbers names the columns."""
    names = None
    for row in rows:
        if names is None and "failed" not in row:
            names = list(row)
            print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
        cells = [row.get(name, "") for name in names or row]
        if "failed" in row:
            cells.append(row["failed"])
        print("| " + " | ".join(show(cell) for cell in cells) + " |", flush=True)


def show(cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument(
        "--sizes", help=f"batches, by commas; a CPU: {CPU_SIZES}, a GPU: {GPU_SIZES}"
    )
    parser.add_argument("--dim", type=int, help="embedding width E; a CPU: 256, a GPU: 512")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # a row of the CPU's table, as JSON
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has none; use cpu")
    dim = options.dim or (256 if device == "cpu" else 512)
    if options.row:
        row = json.loads(options.row)
        print(json.dumps(measure_cpu(row["version"], row["mode"], row["batch"], dim)))
        return

    default = CPU_SIZES if device == "cpu" else GPU_SIZES
    sizes = [int(size) for size in (options.sizes or default).split(",")]
    what = f"torch {torch.__version__}, E = {dim}, s = {SCALE:g}"
    if device == "cpu":
        print(f"CPU, {torch.get_num_threads()} threads, {what}, float32\n")
        print_table(add_ratios(rows_cpu(sizes, dim)))
    else:
        print(f"{torch.cuda.get_device_name()}, {what}, float16\n")
        print_table(rows_gpu(sizes, dim))


if __name__ == "__main__":
    main()
