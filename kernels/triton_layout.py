# SPDX-License-Identifier: Apache-2.0
"""How both sides of the problem lie in GPU memory, so that inner loops have no special case.

The caller's rows are copied once into a packed form. A copy of B·E numbers costs thousandths of the
B²·E products.

columns   [v | β/s · c_v] and [t | c_t]: the concepts are further columns. So one dot product, on
          the matrix unit, is v·t + β/s · κ = a / s, and the kernels know nothing of knowledge. K
          concepts make a product (E + K) / E as dear. Zeros fill up the last step of the product.
rows      zeros fill up the last tile.
ids       [1 + S, rows] int32: the pair's number (−1: padding), then the signature ids, numbered
          anew. No hash collides, and int32 takes half of the registers. (As [rows, 1 + S] they
          would spill some.)
marks     which cells of the matrix hold a masked pair or padding. Only there does a kernel compare
          ids. A batch of different videos has such cells near the diagonal only.

`make_tile` computes a tile of the matrix from them, for the forward and for the backward.

Nothing here waits for the GPU. One thing differs in Triton's interpreter: its bfloat16 arithmetic
is silently wrong, so there the packed rows are float32.
"""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

from .reference import Problem, number_ids

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = 1.4426950408889634  # exp(a) = exp2(a · log2 e), and exp2 is what the hardware has
ROW_MULTIPLE = 256  # of packed rows
DEPTH_MULTIPLE = 64  # of packed columns
CELL = constexpr(128)  # rows and columns of a marked cell


class Tile(NamedTuple):
    """A tile of the matrix, one step of its product, and what the compiler may spend on it."""

    owned: int  # columns that stay with a program
    streamed: int  # rows that pass by
    depth: int
    warps: int
    stages: int
    tma: bool  # rows arrive by tensor descriptors (Hopper's copy engine), else by pointers


# Each line is compiled and inspected by tests/test_kernels_aot.py.
MODES = "sums", "mine", "slab"
TILES = {
    # 227 KiB of shared memory for a block, and a copy engine
    "hopper": {
        "sums": Tile(256, 128, 64, 8, 4, True),
        "mine": Tile(128, 128, 64, 8, 4, True),
        "slab": Tile(256, 128, 64, 8, 3, True),
    },
    # all others from Ampere on
    "small": dict.fromkeys(MODES, Tile(128, 128, 32, 8, 4, False)),
    # exact float32 products, without the matrix unit: for checking, not for speed
    "fp32": dict.fromkeys(MODES, Tile(64, 64, 32, 8, 3, False)),
}
# larger tiles spill registers there
TILES["blackwell"] = TILES["small"] | {"mine": Tile(64, 128, 64, 8, 3, False)}


def tile_for(mode: str, packed: Tensor) -> Tile:
    """The tile of kernel `mode` for packed rows of this dtype, on this device."""
    if packed.dtype == torch.float32:
        return TILES["fp32"][mode]
    major, _ = torch.cuda.get_device_capability(packed.device)
    return TILES[{9: "hopper", 10: "blackwell"}.get(major, "small")][mode]


def as_argument(matrix: Tensor, rows: int, cols: int, tma: bool) -> Tensor | TensorDescriptor:
    """What `load_tile` takes: the matrix, or a descriptor of tiles of rows x cols."""
    return TensorDescriptor.from_tensor(matrix, [rows, cols]) if tma else matrix


@triton.jit
def load_tile(matrix, row, col, stride, ROWS: constexpr, COLS: constexpr):
    """matrix[row : row + ROWS, col : col + COLS]; no bounds, since everything is padded."""
    if isinstance(matrix, tl.tensor_descriptor):
        return matrix.load([row, col])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        return tl.load(matrix + rows * stride + col + tl.arange(0, COLS)[None, :])


class Side(NamedTuple):
    """One side of the problem, packed."""

    rows: Tensor  # [P, D] embeddings and concepts
    ids: Tensor  # [1 + S, P] int32
    masked: Tensor  # [P] int32: how many packed rows of the other side are no negatives of this one
    marks: Tensor  # [cells of the other side, of this one] int8: does a cell hold a masked pair?


def shared_arguments(x: Side, y: Side, scalars: Tensor, tile: Tile) -> dict:
    """What every kernel over tiles is given; its owned side is x."""
    return dict(
        # data
        x_rows=as_argument(x.rows, tile.owned, tile.depth, tile.tma),
        y_rows=as_argument(y.rows, tile.streamed, tile.depth, tile.tma),
        x_ids=x.ids,
        y_ids=y.ids,
        marks=x.marks,
        scalars=scalars,
        # sizes
        n_x=len(x.rows),
        n_y=len(y.rows),
        D=x.rows.shape[1],
        IDS=len(x.ids),
        BX=tile.owned,
        BY=tile.streamed,
        BD=tile.depth,
        # what the compiler may spend
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def pack(p: Problem) -> tuple[Side, Side, Tensor]:
    """The problem in the form of the kernels: (video, text, `make_scalars`)."""
    assert p.video.is_cuda or INTERPRETED, (
        "impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment"
    )
    assert p.dtype in (torch.float32, torch.float16, torch.bfloat16), (
        f"impl='triton' takes float32, float16 or bfloat16, not {p.dtype}"
    )
    n, m = len(p.video), len(p.text)

    # ids of a pair are equal exactly where it is no negative
    pair = torch.arange(m, device=p.video.device)
    row_ids, col_ids = zip((pair[p.offset : p.offset + n], pair), *number_ids(p))

    # β/s on one side: s times the product has β times κ
    row_concepts = p.row_concepts * (p.beta / p.scale)
    video_rows, video_ids = pack_rows(p.video, row_concepts, row_ids, p.dtype)
    text_rows, text_ids = pack_rows(p.text, p.col_concepts, col_ids, p.dtype)

    cells = len(video_rows) // CELL.value, len(text_rows) // CELL.value
    marks = torch.empty(cells, dtype=torch.int8, device=p.video.device)
    masked = torch.zeros_like(video_ids[0]), torch.zeros_like(text_ids[0])
    sizes = dict(n_rows=len(video_rows), n_cols=len(text_rows), IDS=len(video_ids))
    mark_cells[cells](video_ids, text_ids, marks, *masked, **sizes, num_warps=8)

    video = Side(video_rows, video_ids, masked[0], marks.T.contiguous())
    return video, Side(text_rows, text_ids, masked[1], marks), make_scalars(p)


def pack_rows(embeddings: Tensor, concepts: Tensor, ids: tuple[Tensor], dtype: torch.dtype):
    """(rows in `dtype`, ids) of a `Side`."""
    rows = torch.cat([embeddings.to(dtype), concepts.to(dtype)], 1)
    if INTERPRETED:
        rows = rows.float()
    below, right = -len(rows) % ROW_MULTIPLE, -rows.shape[1] % DEPTH_MULTIPLE
    return F.pad(rows, (0, right, 0, below)), F.pad(torch.stack(ids).int(), (0, below), value=-1)


@triton.jit
def mask_tile(tile, row_ids, col_ids, n_rows, n_cols, rows, cols, IDS: constexpr):
    """The tile [rows, cols] with −inf where a pair is no negative: where one is padding, or they
    are equal in any id.

    One id after the other: a mask for all would spill registers.
    """
    padding = (tl.load(row_ids + rows) < 0)[:, None] | (tl.load(col_ids + cols) < 0)[None, :]
    tile = tl.where(padding, float("-inf"), tile)
    for s in tl.static_range(IDS):
        row_id, col_id = tl.load(row_ids + s * n_rows + rows), tl.load(col_ids + s * n_cols + cols)
        tile = tl.where(row_id[:, None] == col_id[None, :], float("-inf"), tile)
    return tile


@triton.jit
def mark_cells(row_ids, col_ids, marks, row_masked, col_masked, n_rows, n_cols, IDS: constexpr):
    """marks[i, j] = does cell (i, j) hold a masked pair? And count those of each row and column."""
    i, j = tl.program_id(0), tl.program_id(1)
    rows, cols = i * CELL + tl.arange(0, CELL), j * CELL + tl.arange(0, CELL)

    zeros = tl.zeros([CELL, CELL], tl.float32)
    masked = mask_tile(zeros, row_ids, col_ids, n_rows, n_cols, rows, cols, IDS) < 0
    in_row, in_col = tl.sum(masked.to(tl.int32), 1), tl.sum(masked.to(tl.int32), 0)
    mark = tl.max(in_row, 0) > 0

    tl.store(marks + i * tl.num_programs(1) + j, mark.to(tl.int8))
    if mark:
        tl.atomic_add(row_masked + rows, in_row)
        tl.atomic_add(col_masked + cols, in_col)


@triton.jit
def make_tile(
    x_rows,
    y_rows,
    x_ids,
    y_ids,
    marks,
    scalars,
    x0,
    y0,
    n_x,
    n_y,
    D: constexpr,
    IDS: constexpr,
    BX: constexpr,
    BY: constexpr,
    BD: constexpr,
):
    """z [BY, BX] = a · log2 e − shift, of the pairs of Y[y0 : y0 + BY] and X[x0 : x0 + BX]; −inf
    where a pair is no negative.
    """
    acc = tl.zeros([BY, BX], tl.float32)
    for d in tl.range(0, D, BD):
        y = load_tile(y_rows, y0, d, D, BY, BD)
        x = load_tile(x_rows, x0, d, D, BX, BD)
        acc = tl.dot(y, x.T, acc, input_precision="ieee")
    # the scalars are loaded here: before the product, they would spill registers
    z = tl.fma(acc, tl.load(scalars), -tl.load(scalars + 1))

    # ids are compared only where the tile touches a marked cell
    is_marked = 0
    for row in tl.static_range(0, BY, CELL):
        for col in tl.static_range(0, BX, CELL):
            cell = (y0 + row) // CELL * (n_x // CELL) + (x0 + col) // CELL
            is_marked |= tl.load(marks + cell)
    if is_marked != 0:
        rows, cols = y0 + tl.arange(0, BY), x0 + tl.arange(0, BX)
        z = mask_tile(z, y_ids, x_ids, n_y, n_x, rows, cols, IDS)
    return z


def make_scalars(p: Problem) -> Tensor:
    """float32 [3] on the device: s · log2 e, shift, s.

    exp2(a · log2 e − shift) needs no running maximum, since |a| has a bound:

        |a| ≤ s · max‖v‖ · max‖t‖ + |β| · max‖c_v‖ · max‖c_t‖

    The shift puts exp(bound) at 2^head at most, so high that a sum over all columns just fits into
    float32 (2^127). It is no higher than it must be: small arguments of exp2 have more digits.
    """

    def longest(x):
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()

    kappa = longest(p.row_concepts) * longest(p.col_concepts)
    bound = p.scale * longest(p.video) * longest(p.text) + p.beta.abs() * kappa
    head = 126 - max(len(p.video), len(p.text), 2).bit_length()
    shift = (bound * LOG2E - head).clamp(min=0)
    return torch.stack([p.scale * LOG2E, shift, p.scale]).float()


def log_of_sums(sums: Tensor, side: Side, other: Side, scalars: Tensor) -> Tensor:
    """Partial sums [parts, P] of exp2(a · log2 e − shift) -> log-sum-exp [P].

    −inf where a row has no negative. NaN where it has some, but lost them below float32's range:
    what is lost of a term is at most 2^-126, so a sum must be 2^20 times as large as all that its
    terms could lose. That is about 135 nats below the bound at B = 131,072, and a cosine of −0.35
    at the clamp s = 100, which no row of a model that learns has as its *hardest*.
    """
    total = sums.sum(0).double()
    has_negatives = side.masked < len(other.rows)
    lost = has_negatives & (total < len(other.rows) * 2.0**-106)
    return ((total.log2() + scalars[1]) / LOG2E).masked_fill(lost, torch.nan).float()
