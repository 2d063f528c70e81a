"""What the compiler makes of every shipped kernel, on a machine without a GPU.

    python -m bench.aot            # the table in docs/kernel.md

Triton compiles for a GPU that is not there, and its wheel carries NVIDIA's assembler and
disassembler. So what silently makes a kernel slow can be *tested* anywhere: registers spilled to
memory, products that miss the matrix unit or wait for each other, and shared memory beyond what a
block may have, which the compiler does not check. Whether the kernel is fast, only a GPU can say:
bench/contrastive.py.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton_backward import slab_kernel
from kernels.triton_forward import LANES, forward_kernel
from kernels.triton_layout import TILES, Tile, mark_cells
from kernels.triton_mining import LAUNCH, mining_kernel
from kernels.triton_warmup import lse_kernel

# compute capability x 10: Ampere, Hopper, data-centre Blackwell
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
FAMILIES = {80: ("small", "fp32"), 90: ("hopper", "fp32"), 100: ("blackwell", "fp32")}
MATRIX_UNIT = {80: r"\sHMMA\b.*", 90: r"\sHGMMA\b.*", 100: r"\s(?:UTC)?HMMA\b.*"}  # instructions
DIM = 576  # E = 512 and 64 concepts
IDS = 3  # pair, video and meaning
SPLIT = 8192  # rows of a split: B = 65,536 in 8 of them
SIZES = ("n_x", "n_y", "split_size", "y_first", "n_rows", "n_cols")  # multiples of 16
# of the runtime arguments, in Triton's notation; all others are constants
TYPES = {"marks": "*i8", "index": "*i64"} | dict.fromkeys(SIZES, "i32")
TYPES |= dict.fromkeys("x_ids y_ids row_ids col_ids row_masked col_masked best".split(), "*i32")
TYPES |= dict.fromkeys("x_sums y_sums x_weight y_weight scalars score".split(), "*fp32")


class Report(NamedTuple):
    """One compiled kernel."""

    name: str
    arch: int
    registers: int  # a thread
    spills: int  # load and store instructions of spilled registers
    shared: int  # bytes a block
    tensor_cores: int  # instructions of the matrix unit
    waits: int  # of these, how many wait for their result (Hopper)


def compile_kernel(name: str, kernel, constants: dict, arch: int, types=None, **options) -> Report:
    """`types`: those that are not in TYPES. Pointers are aligned, as in use."""
    types = TYPES | (types or {})
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in SIZES]
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", arch, 32),
        options=dict(options, enable_fp_fusion=True),
    )

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = call_tool("nvdisasm", "-c", file.name)
        usage = call_tool("cuobjdump", "--dump-resource-usage", file.name)
    products = re.findall(MATRIX_UNIT[arch], code)
    return Report(
        name,
        arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\s(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        tensor_cores=len(products),
        waits=sum("gsb0" in product for product in products),
    )


def call_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.check_output([tool, *arguments], text=True, stderr=subprocess.PIPE)


def compile_all(arch: int) -> Iterator[Report]:
    """Every kernel in every tile that a GPU of compute capability `arch` / 10 is given."""
    yield compile_kernel("mark cells", mark_cells, dict(IDS=IDS), arch, num_warps=8)

    types = dict(video="*fp32", text="*fp32", out="*fp32", scale="fp32", m="i32", D="i32")
    yield compile_kernel("warm-up", lse_kernel, {}, arch, types)

    for family in FAMILIES[arch]:
        dtype = "fp32" if family == "fp32" else "fp16"
        sums, mine, slab = (TILES[family][mode] for mode in ("sums", "mine", "slab"))
        yield compile_tile(f"forward {family} sums", forward_kernel, sums, dtype, arch, MINE=False)
        yield compile_tile(f"forward {family} mine", forward_kernel, mine, dtype, arch, MINE=True)

        name, rows = f"mining {family} k = 16", dict.fromkeys(("x_rows", "y_rows"), f"*{dtype}")
        sizes = dict(BY=mine.streamed, BD=mine.depth, CODE_BITS=code_bits(mine))
        constants = dict(D=DIM, IDS=IDS, LANES=LANES, K=16, KC=32, R=1) | sizes
        yield compile_kernel(name, mining_kernel, constants, arch, rows, **LAUNCH)

        options = dict(maxnreg=255)
        yield compile_tile(f"backward {family} slab", slab_kernel, slab, dtype, arch, options)


def compile_tile(name, kernel, tile: Tile, dtype: str, arch: int, options=None, **constants):
    """A kernel that walks over tiles."""

    def matrix(rows: int, cols: int) -> str:  # the type of what triton_layout.as_argument returns
        return f"tensordesc<{dtype}[{rows}, {cols}]>" if tile.tma else f"*{dtype}"

    types = dict(
        x_rows=matrix(tile.owned, tile.depth),
        y_rows=matrix(tile.streamed, tile.depth),
        slab=matrix(tile.streamed, tile.owned),
    )
    constants |= dict(D=DIM, IDS=IDS, BX=tile.owned, BY=tile.streamed, BD=tile.depth)
    if kernel is forward_kernel:
        constants["CODE_BITS"] = code_bits(tile)
    launch = dict(num_warps=tile.warps, num_stages=tile.stages) | (options or {})
    return compile_kernel(name, kernel, constants, arch, types, **launch)


def code_bits(tile: Tile) -> int:
    return (SPLIT // tile.streamed * 2 - 1).bit_length()


def main():
    print(f"triton {triton.__version__}\n")
    print("| kernel | arch | registers | spills | shared KiB | matrix unit | waits |")
    print("|---" * 7 + "|")
    for arch in FAMILIES:
        for r in compile_all(arch):
            numbers = f"{r.registers} | {r.spills} | {r.shared / 1024:.0f}"
            print(f"| {r.name} | sm_{arch} | {numbers} | {r.tensor_cores} | {r.waits} |")


if __name__ == "__main__":
    main()
