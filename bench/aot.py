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


class Report(NamedTuple):
    """One compiled kernel."""

    name: str
    arch: int
    registers: int  # a thread
    spills: int  # load and store instructions of spilled registers
    shared: int  # bytes a block
    tensor_cores: int  # instructions of the matrix unit
    waits: int  # of these, how many wait for their result (Hopper)


def compile_kernel(name: str, kernel, types: dict, constants: dict, arch: int, **options) -> Report:
    """`types` of the runtime arguments, in Triton's notation; pointers are aligned, as in use."""
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = [n for n, kind in types.items() if kind.startswith("*") or n in SIZES]
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
    types = {"marks": "*i8"} | dict.fromkeys(
        ("row_ids", "col_ids", "row_masked", "col_masked"), "*i32"
    )
    types |= dict.fromkeys(("n_rows", "n_cols"), "i32")
    yield compile_kernel("mark cells", mark_cells, types, dict(IDS=IDS), arch, num_warps=8)

    types = dict.fromkeys(("video", "text", "out"), "*fp32") | dict.fromkeys(("m", "D"), "i32")
    types |= {"scale": "fp32"}
    yield compile_kernel("warm-up", lse_kernel, types, {}, arch)

    for family in FAMILIES[arch]:
        dtype = "fp32" if family == "fp32" else "fp16"
        tiles = TILES[family]
        yield compile_forward(f"forward {family} sums", tiles["sums"], False, dtype, arch)
        yield compile_forward(f"forward {family} mine", tiles["mine"], True, dtype, arch)
        yield compile_mining(f"mining {family} k = 16", tiles["mine"], dtype, arch)
        yield compile_slab(f"backward {family} slab", tiles["slab"], dtype, arch)


def matrix(dtype: str, rows: int, cols: int, tma: bool) -> str:
    """The type of what triton_layout.as_argument returns."""
    return f"tensordesc<{dtype}[{rows}, {cols}]>" if tma else f"*{dtype}"


def describe_tile(tile: Tile, dtype: str) -> tuple[dict, dict]:
    """(types, constants) that the kernels over tiles share."""
    types = {
        "x_rows": matrix(dtype, tile.owned, tile.depth, tile.tma),
        "y_rows": matrix(dtype, tile.streamed, tile.depth, tile.tma),
        "marks": "*i8",
        "scalars": "*fp32",
    }
    types |= dict.fromkeys(("x_ids", "y_ids"), "*i32")
    types |= dict.fromkeys(("n_x", "n_y"), "i32")
    sizes = dict(BX=tile.owned, BY=tile.streamed, BD=tile.depth)
    return types, dict(D=DIM, IDS=IDS, **sizes)


def compile_forward(name: str, tile: Tile, mine: bool, dtype: str, arch: int) -> Report:
    types, constants = describe_tile(tile, dtype)
    types |= dict.fromkeys(("x_sums", "y_sums"), "*fp32") | {"best": "*i32"}
    types |= {"split_size": "i32"}
    constants |= dict(CODE_BITS=code_bits(tile), MINE=mine)
    launch = dict(num_warps=tile.warps, num_stages=tile.stages)
    return compile_kernel(name, forward_kernel, types, constants, arch, **launch)


def code_bits(tile: Tile) -> int:
    return (SPLIT // tile.streamed * 2 - 1).bit_length()


def compile_mining(name: str, tile: Tile, dtype: str, arch: int) -> Report:
    types = dict.fromkeys(("x_rows", "y_rows"), f"*{dtype}")
    types |= dict.fromkeys(("scalars", "score"), "*fp32") | {"index": "*i64"}
    types |= dict.fromkeys(("x_ids", "y_ids", "best"), "*i32")
    types |= dict.fromkeys(("n_x", "n_y", "split_size"), "i32")
    constants = dict(D=DIM, IDS=IDS, BY=tile.streamed, BD=tile.depth, LANES=LANES, K=16, KC=32)
    constants |= dict(R=1, CODE_BITS=code_bits(tile))
    return compile_kernel(name, mining_kernel, types, constants, arch, **LAUNCH)


def compile_slab(name: str, tile: Tile, dtype: str, arch: int) -> Report:
    types, constants = describe_tile(tile, dtype)
    types |= dict.fromkeys(("x_weight", "y_weight"), "*fp32")
    types |= {"y_first": "i32"}
    types |= {"slab": matrix(dtype, tile.streamed, tile.owned, tile.tma)}
    launch = dict(num_warps=tile.warps, num_stages=tile.stages, maxnreg=255)
    return compile_kernel(name, slab_kernel, types, constants, arch, **launch)


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
