"""The whole GPU session in one command: is the op right there, how fast, and what would be faster?

    python -m bench.gpu                           # everything that is not there yet: 25 minutes
    python -m bench.gpu --only check,benchmark    # some parts
    python -m bench.gpu --device cpu --small      # what a CPU can do: Triton's interpreter
    python -m bench.gpu --page                    # only build the page again

Each part is a process with a time limit, and leaves one JSON file: what was run, where, on which
commit, and what it said. A part that is there already, well and of this commit, is not run again. A
part that fails or lacks a package says so, and the session goes on. page.md is made from the files.

    check       every output and gradient against float64, at real sizes
    tests       tests/test_kernels.py and tests/test_kernels_aot.py
    profile     where a step spends its time
    benchmark   bench/contrastive.py: against eager, compiled, chunked PyTorch and the peers
    variants    other tiles than the shipped ones
    step        a training step of the base preset, bench/gradcache.py
    train       200 steps of train.py

It needs torch, triton and numpy; the last two parts need what train.py needs.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.contrastive import MODES, make_inputs, median_ms, ours, rows_cpu, rows_gpu, show
from kernels import knowledge_nce_stats

ROOT = Path(__file__).parent.parent
LIMITS = {  # seconds for each part
    "check": 240,
    "tests": 300,
    "profile": 90,
    "benchmark": 600,
    "variants": 300,
    "step": 120,
    "train": 180,
}
NEEDS_GPU = ("profile", "variants", "step", "train")
SCALE = 64.0  # a power of two: then κ is rounded alike in the op and in the truth
CASES = {  # N, M, offset, E, concepts, ids, dtype, k
    "square": (4096, 4096, 0, 512, 64, 2, "float16", 16),
    "bfloat16": (4096, 4096, 0, 512, 64, 2, "bfloat16", 16),
    "nothing mined": (4096, 4096, 0, 512, 64, 2, "float16", 0),
    "ragged, empty splits": (1030, 1100, 70, 256, 0, 1, "float16", 5),
    "a rank's share": (512, 20_000, 7000, 512, 61, 2, "float16", 16),
    "several slabs": (20_000, 20_000, 0, 768, 0, 0, "float16", 16),
    "float32": (3000, 3500, 123, 96, 37, 2, "float32", 64),
    "large": (131_072, 131_072, 0, 512, 64, 2, "float16", 16),
}
SMALL_CASES = ("ragged, empty splits", "a rank's share", "float32")
VARIANTS = {  # kernel, its tile
    "sums, 3 stages": ("sums", (256, 128, 64, 8, 3, True)),
    "mine, twice a multiprocessor": ("mine", (128, 64, 64, 4, 4, True)),
    "mine, 5 stages": ("mine", (128, 128, 64, 8, 5, True)),
    "slab, 4 stages": ("slab", (256, 128, 64, 8, 4, True)),
    "slab, twice a multiprocessor": ("slab", (128, 128, 64, 4, 3, True)),
}


# ---- the parts that are measured here: each yields records ---------------------------------------


def check(device: str, small: bool) -> Iterator[dict]:
    """The Triton version against `tiled` in float64, on the rows as they are rounded."""
    for name in SMALL_CASES if small else CASES:
        n, m, offset, dim, concepts, ids, dtype, k = CASES[name]
        if small:
            n, m, offset = n // 64 + 2, m // 64 + 2, offset // 64
            n, m, dim, k = min(n, 200), min(m, 400), min(dim, 40), min(k, 5)
        errors = compare(n, m, min(offset, m - n), dim, concepts, ids, dtype, k, device)
        good = errors.pop("same bits") and all(error < 1 for error in errors.values())
        yield dict(case=name, N=n, M=m, dtype=dtype, k=k, right=good, **errors)


def compare(n, m, offset, dim, concepts, ids, dtype, k, device) -> dict:
    """Errors as shares of what is allowed, right below 1; and whether two runs have equal bits."""
    dtype = getattr(torch, dtype)
    x = make_inputs(m, dim, max(1, concepts), device, dtype)
    x["concepts"] = x["concepts"].to(dtype).float()[:, :concepts]
    rows = slice(offset, offset + n)
    g = torch.Generator(device).manual_seed(1)
    signature = torch.randint(m, (m, ids), generator=g, device=device)
    upstream = [torch.randn(size, generator=g, device=device) / size for size in (n, m, n)]

    def run_with(impl, kind):
        leaves = [x["video"][rows].detach().to(kind), x["text"].detach().to(kind)]
        leaves.append(torch.tensor(math.log(SCALE), device=device, dtype=torch.float64))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        stats = knowledge_nce_stats(
            *leaves,
            concepts=(x["concepts"][rows], x["concepts"]),
            beta=1.0,
            signature=(signature[rows], signature),
            offset=offset,
            k=k,
            impl=impl,
        )
        pairs = zip(stats, upstream)
        total = sum((value.nan_to_num(neginf=0.0) * u).sum() for value, u in pairs)
        return stats, torch.autograd.grad(total, leaves)

    fast, grads = run_with("triton", dtype)
    again, grads_again = run_with("triton", dtype)
    true, true_grads = run_with("tiled", torch.float64)
    runs = (*fast[:3], *fast.mined, *grads), (*again[:3], *again.mined, *grads_again)
    same = [torch.equal(a, b) for a, b in zip(*runs)]

    errors = {"same bits": all(same)}
    names = ("rows", "columns", "positives")
    mined = zip(("row top", "column top"), fast.mined[1::2], true.mined[1::2])
    for name, a, b in (*zip(names, fast, true), *mined):
        both_empty = (a == -torch.inf) & (b == -torch.inf)
        error = (a.double() - b).abs().masked_fill(both_empty, 0)
        errors[name] = error.nan_to_num(math.inf).max().item() / 3e-4 if a.numel() else 0.0

    # gradients go through a slab in `dtype`
    allowed = 4 * torch.finfo(dtype).eps + 1e-5
    for name, a, b in zip(("d_video", "d_text"), grads, true_grads):
        errors[name] = ((a.double() - b).norm() / b.norm()).item() / allowed
    return errors


def profile(device: str, small: bool) -> Iterator[dict]:
    """The GPU's kernels by time, without mining and with."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    batch = 4096 if small else 65_536
    for mode in ("+ knowledge", "+ top-16"):
        options = MODES[mode]
        x = make_inputs(batch, 512, options["concepts"], device, torch.float16)
        step = ours("triton", options["k"])
        step(x).backward()  # compiled
        torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CUDA]) as profiler:
            step(x).backward()
            torch.cuda.synchronize()
        events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
        events.sort(key=lambda e: -e.self_device_time_total)
        for e in events[:12]:
            milliseconds = e.self_device_time_total / 1e3
            yield dict(mode=mode, kernel=e.key[:60], calls=e.count, ms=milliseconds)


def variants(device: str, small: bool) -> Iterator[dict]:
    """Time of a step with other tiles than the shipped ones."""
    from triton.errors import TritonError

    from kernels import triton_layout

    batch = 4096 if small else 65_536
    x = make_inputs(batch, 512, 64, device, torch.float16)
    major, _ = torch.cuda.get_device_capability()
    tiles = triton_layout.TILES["hopper" if major == 9 else "small"]
    shipped = dict(tiles)
    for name, (mode, tile) in {"shipped": (None, None), **VARIANTS}.items():
        tiles.update(shipped)
        if mode:
            tiles[mode] = triton_layout.Tile(*tile)
        for label, k in (("loss", 0), ("top-16", 16)):
            row = dict(variant=name, mode=label)
            try:
                step = ours("triton", k)
                yield row | dict(ms=median_ms(lambda x, step=step: step(x).backward(), [x]))
            except (RuntimeError, TritonError) as error:  # a tile that does not fit
                yield row | dict(failed=str(error).splitlines()[0][:100])


def benchmark(device: str, small: bool) -> Iterator[dict]:
    """The rows of bench.contrastive."""
    if device == "cpu":
        return rows_cpu([256] if small else [8192, 16_384], 32 if small else 256)
    return rows_gpu([4096] if small else [16_384, 32_768, 49_152, 65_536, 131_072], 512)


MEASURED = dict(check=check, profile=profile, variants=variants, benchmark=benchmark)


# ---- the session ---------------------------------------------------------------------------------


def command_of(part: str, device: str, small: bool, out: Path) -> list[str]:
    """What runs a part."""
    python = [sys.executable, "-u"]
    if part in MEASURED:
        flags = ["--measure", part, "--device", device] + ["--small"] * small
        return [*python, "-m", "bench.gpu", *flags]
    if part == "tests":
        files = ["tests/test_kernels.py"] + ["tests/test_kernels_aot.py"] * (not small)
        few = ["-k", "against_loops"] if small else []
        return [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *few]
    if part == "step":
        return [*python, *"-m bench.gradcache --preset base --batch 512 --chunks 0,64".split()]
    flags = f"train.py --steps 200 --eval-every 200 --no-test --workers 12 --out {out / 'run'}"
    return [*python, *flags.split()]


def facts(device: str) -> dict:
    """Where, when and with what."""
    versions = {}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.check_output(git, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return dict(device=name, versions=versions, commit=commit.strip(), date=date)


def run_part(part: str, device: str, small: bool, out: Path) -> dict:
    """Run one part to its end or its limit. Its record, written to OUT/part.json."""
    environment = dict(os.environ)
    if device == "cpu" and part in ("check", "tests"):
        environment["TRITON_INTERPRET"] = "1"  # must be set before triton is imported
    command = command_of(part, device, small, out)
    start = time.perf_counter()
    where = dict(cwd=ROOT, env=environment, start_new_session=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    with subprocess.Popen(command, **where, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=LIMITS[part])
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            output, errors = process.communicate()
            status = f"stopped after {LIMITS[part]} s"

    lines = output.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    said = [] if rows else lines[-20:]
    if status:
        said += errors.splitlines()[-3:]
    seconds = round(time.perf_counter() - start, 1)
    record = dict(part=part, status=status, seconds=seconds, small=small, **facts(device))
    record |= dict(command=command[1:], rows=rows, said=said)
    write(out / f"{part}.json", json.dumps(record, indent=1) + "\n")
    return record


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def build_page(out: Path) -> str:
    """page.md from the records that are there."""
    text = [
        "# The op on this machine\n",
        "Made by `python -m bench.gpu` from the files beside it.\n",
    ]
    for part in LIMITS:
        text.append(f"## {part}\n")
        record = read(out / f"{part}.json")
        if record is None:
            text.append("Not run.\n")
            continue
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        state = "well" if record["status"] == 0 else f"**failed** ({record['status']})"
        where = f"{record['device']}; {versions}; commit {record['commit']}; {record['date']}"
        text.append(f"{state}, {record['seconds']} s; {where}\n")
        text += table(record["rows"])
        if record["said"]:
            text += ["```", *record["said"], "```\n"]
    return "\n".join(text)


def table(rows: list[dict]) -> list[str]:
    """Markdown lines; a column for each name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return []
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(show(row.get(name, "")) for name in names) + " |")
    return [*lines, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, by commas")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of records")
    parser.add_argument("--page", action="store_true", help="only build the page")
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, small, out = options.device, options.small, options.out
    if options.measure:
        wrong = False
        for row in MEASURED[options.measure](device, small):
            print(json.dumps(row), flush=True)
            wrong |= not row.get("right", True)
        sys.exit(wrong)

    unknown = set(options.only.split(",")) - set(LIMITS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(LIMITS)}")
    if device == "cuda" and not torch.cuda.is_available() and not options.page:
        parser.error("--device cuda: this machine has none; use --device cpu --small")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    for part in [] if options.page else options.only.split(","):
        before = read(out / f"{part}.json")
        same = dict(commit=facts(device)["commit"], small=small, status=0)
        if before and all(before[name] == value for name, value in same.items()):
            print(f"{part}: is there")
        elif device == "cpu" and part in NEEDS_GPU:
            print(f"{part}: needs a GPU")
        else:
            record = run_part(part, device, small, out)
            print(f"{part}: status {record['status']}, {record['seconds']} s", flush=True)
            for line in record["said"][-3:]:
                print(f"    {line}")
    write(out / "page.md", build_page(out))
    print(out / "page.md")


if __name__ == "__main__":
    main()
