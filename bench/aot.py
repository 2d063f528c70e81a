"""What the compiler makes of every shipped kernel, on a machine without a GPU.

    python -m bench.aot            # the table in docs/kernel.md

Triton compiles for a GPU that is not there, and its wheel carries NVIDIA's assembler and
disassembler. So the things that silently make a kernel slow can be *tested* anywhere: registers
spilled to memory (LDL/STL instructions), products that miss the matrix unit (HGMMA on Hopper, HMMA
before), and shared memory beyond what a block may have, which the compiler does not check. Whether
the kernel is fast, only a GPU can say: bench/contrastive.py.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton_backward import GROUP, slab_kernel
from kernels.triton_forward import LANES_WANTED, forward_kernel
from kernels.triton_layout import CELL, TILES, mark_tiles
from kernels.triton_mining import LAUNCH, mining_kernel

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
TILES_OF = {80: ("ampere", "fp32"), 90: ("hopper", "fp32"), 100: ("blackwell", "fp32")}
DIM, IDS, SPLIT = (
    576,
    3,
    8192,
)  # E = 512 and 64 concepts; pair, video and meaning ids; B = 65,536 in 8 splits


class Report(NamedTuple):
    """One compiled kernel."""

    name: str
    arch: int
    registers: int  # a thread
    spills: int  # load and store instructions of spilled registers
    shared: int  # bytes a block
    tensor_cores: int  # instructions of the matrix unit: HGMMA on Hopper, HMMA before


def _compile(name: str, kernel, types: dict, constants: dict, arch: int, **options) -> Report:
    """`types`: of the runtime arguments, in Triton's notation; pointers and sizes are multiples of
    16, as in use.
    """
    sizes = ("n_x", "n_y", "split_size", "x_first", "x_count", "video_rows", "text_rows")
    aligned = [n for n, kind in types.items() if kind.startswith("*") or n in sizes]
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", arch, 32),
        options=dict(options, enable_fp_fusion=True),
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        commands = ([tools / "nvdisasm", "-c"], [tools / "cuobjdump", "--dump-resource-usage"])
        code, usage = (
            subprocess.check_output([*command, file.name], text=True) for command in commands
        )
    return Report(
        name,
        arch,
        int(re.search(r"REG:(\d+)", usage)[1]),
        len(re.findall(r"\s(?:LDL|STL)\b", code)),
        compiled.metadata.shared,
        len(re.findall({80: r"\sHMMA\b", 90: r"\sHGMMA\b", 100: r"\s(?:UTC)?HMMA\b"}[arch], code)),
    )


def _matrix(dtype: str, rows: int, cols: int, tma: bool) -> str:
    """The type of what triton_layout.as_argument returns."""
    return f"tensordesc<{dtype}[{rows}, {cols}]>" if tma else f"*{dtype}"


def compile_all(arch: int) -> Iterator[Report]:
    """Every kernel in every tile that a GPU of compute capability `arch` / 10 is given."""
    for family in TILES_OF[arch]:
        dtype = "fp32" if family == "fp32" else "bf16"
        for mode, tile in TILES[family].items():
            launch = dict(num_warps=tile.warps, num_stages=tile.stages)
            types = dict(
                x_rows=_matrix(dtype, tile.owned, tile.depth, tile.tma),
                y_rows=_matrix(dtype, tile.streamed, tile.depth, tile.tma),
                x_ids="*i32",
                y_ids="*i32",
                marks="*i8",
                mark_stride_x="i32",
                scalars="*fp32",
                n_x="i32",
                n_y="i32",
            )
            constants = dict(
                D=DIM,
                IDS=IDS,
                BX=tile.owned,
                BY=tile.streamed,
                BD=tile.depth,
                CELL=CELL,
                TMA=tile.tma,
            )
            code_bits = (SPLIT // tile.streamed * 2 - 1).bit_length()
            if mode != "slab":
                types |= dict(
                    mark_stride_y="i32",
                    x_sums="*fp32",
                    y_sums="*fp32",
                    best="*i32",
                    split_size="i32",
                )
                constants |= dict(CODE_BITS=code_bits, BOTH=mode == "sums", MINE=mode == "mine")
                yield _compile(
                    f"forward {family} {mode}", forward_kernel, types, constants, arch, **launch
                )
            else:
                types |= dict(
                    x_weight="*fp32",
                    y_weight="*fp32",
                    x_first="i32",
                    x_count="i32",
                    slab=_matrix(dtype, tile.owned, tile.streamed, tile.tma),
                )
                constants |= dict(GROUP=GROUP, HALF=tl.float32 if dtype == "fp32" else tl.bfloat16)
                yield _compile(
                    f"backward {family} {mode}", slab_kernel, types, constants, arch, **launch
                )
            if mode == "mine":
                names = ("best", "x_ids", "y_ids", "x_order", "y_order", "y_place")
                types = dict(
                    {name: "*i32" for name in names},
                    x_rows=f"*{dtype}",
                    y_rows=f"*{dtype}",
                    scalars="*fp32",
                    index="*i64",
                    score="*fp32",
                    n_x="i32",
                    n_y="i32",
                    split_size="i32",
                )
                constants = dict(
                    D=DIM,
                    IDS=IDS,
                    BY=tile.streamed,
                    LANES=LANES_WANTED,
                    CODES=SPLIT // tile.streamed * 2,
                    CODE_BITS=code_bits,
                    K=16,
                    KC=32,
                    R=1,
                    BD=tile.depth,
                )
                yield _compile(
                    f"mining {family} k = 16", mining_kernel, types, constants, arch, **LAUNCH
                )
    types = dict(video_ids="*i32", text_ids="*i32", marks="*i8", video_rows="i32", text_rows="i32")
    yield _compile("mark tiles", mark_tiles, types, dict(IDS=IDS, CELL=CELL), arch, num_warps=4)


if __name__ == "__main__":
    print(f"triton {triton.__version__}\n")
    print("| kernel | arch | registers | spills | shared KiB | HGMMA/HMMA |\n" + "|---" * 6 + "|")
    for arch in TILES_OF:
        for r in compile_all(arch):
            cells = (r.name, f"sm_{arch}", r.registers, r.spills, f"{r.shared / 1024:.0f}")
            print("|", *(f"{cell} |" for cell in (*cells, r.tensor_cores)))
