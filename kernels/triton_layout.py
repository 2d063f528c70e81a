# SPDX-License-Identifier: Apache-2.0
"""How both sides of the problem lie in GPU memory, so that the kernels' inner loops need no special
case.

The caller's rows are copied once into a packed form (a copy of B·E numbers costs thousandths of the
B²·E products):

columns   [v | β/s · c_v] and [t | c_t]: the concept vectors are further columns, so that one dot
          product, on the matrix
          unit, is v·t + β/s · κ = a / s, and the kernels know nothing of knowledge. Padded with
          zeros to a multiple of the tile's depth. Any number of concepts works; K of them make a
          product (E + K) / E as dear. In half precision they are rounded like the embeddings.
rows      padded to a multiple of 256, and reordered: pairs that share an id (a video, some
          knowledge, or being each
          other's positive) come to lie near the diagonal, anything else at random. The first makes
          masks rare: `mark_tiles` notes which tiles hold a masked or padded pair, and only there
          does a kernel compare ids. The second spreads a batch that was *sampled* in groups of hard
          negatives over the lanes of the running top-k.
ids       [C, rows] int32: the pair number (−1: padding), then the signature ids, renumbered
          densely: no hash collides.

Nothing here waits for the GPU. One thing differs in Triton's interpreter: its bfloat16 arithmetic
is silently wrong, so there the packed copies are float32.
"""

import functools
import itertools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = 1.4426950408889634  # exp(a) = exp2(a · log2 e), and exp2 is what the hardware has
ROW_MULTIPLE = 256
CELL = 128  # rows and columns of a marked cell


class Tile(NamedTuple):
    """A tile of the matrix, the depth of one step of its product, and what the compiler may spend
    on it.
    """

    owned: int
    streamed: int
    depth: int
    warps: int
    stages: int
    # rows arrive by tensor descriptors (Hopper's copy engine: no address registers) or by pointers
    tma: bool


# What each kernel runs with; each line is compiled and inspected by tests/test_kernels_aot.py.
# "hopper" has 227 KiB of shared memory a block; "blackwell" too, but no registers for these tiles;
# "ampere": all others from Ampere on; "fp32": exact float32 products, without the matrix unit: for
# checking, not for speed.
TILES = {
    "hopper": {
        "sums": Tile(256, 128, 64, 8, 4, True),
        "mine": Tile(128, 128, 64, 8, 4, True),
        "slab": Tile(128, 256, 64, 8, 3, True),
    },
    "blackwell": {
        "sums": Tile(128, 128, 32, 8, 4, False),
        "mine": Tile(64, 128, 32, 8, 4, False),
        "slab": Tile(128, 128, 32, 8, 4, False),
    },
    "ampere": {mode: Tile(128, 128, 32, 8, 4, False) for mode in ("sums", "mine", "slab")},
    "fp32": {mode: Tile(64, 64, 32, 8, 2, False) for mode in ("sums", "mine", "slab")},
}


def tile_for(mode: str, packed: Tensor) -> Tile:
    """The shipped tile of kernel `mode` for the packed dtype and the device."""
    if packed.dtype == torch.float32:
        return TILES["fp32"][mode]
    major, _ = torch.cuda.get_device_capability(packed.device)
    return TILES[{9: "hopper", 10: "blackwell"}.get(major, "ampere")][mode]


def on_device(function):
    """`function` with the GPU of its first tensor as the current one, where Triton launches."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *others):
        with torch.cuda.device_of(first):
            return function(first, *others)

    return wrapped


def as_argument(matrix: Tensor, rows: int, cols: int, tma: bool) -> Tensor | TensorDescriptor:
    """What `load_tile` and `store_tile` take: the matrix, or a descriptor of its tiles of rows x
    cols.
    """
    return TensorDescriptor.from_tensor(matrix, [rows, cols]) if tma else matrix


@triton.jit
def load_tile(matrix, row, col, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """matrix[row : row + ROWS, col : col + COLS]; no mask, since everything is padded."""
    if TMA:
        return matrix.load([row, col])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        return tl.load(matrix + rows * stride + col + tl.arange(0, COLS)[None, :])


@triton.jit
def store_tile(
    matrix, row, col, stride, value, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):
    """matrix[row : row + ROWS, col : col + COLS] = value"""
    if TMA:
        matrix.store([row, col], value)
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        tl.store(matrix + rows * stride + col + tl.arange(0, COLS)[None, :], value)


class Side(NamedTuple):
    """One side of the problem, packed."""

    rows: Tensor  # [P, D] embeddings and concepts
    ids: Tensor  # [C, P] int32
    order: Tensor  # [P] int32: packed row p is the caller's row order[p] (0 for padding)
    place: Tensor  # [n] int32: the caller's row i is packed row place[i]
    has_negatives: Tensor  # [n] bool, in the caller's order


class Layout(NamedTuple):
    """The packed problem: video rows, text columns, and the numbers that every kernel needs."""

    video: Side
    text: Side
    marks: Tensor  # [P_video / CELL, P_text / CELL] int8: does a cell hold a masked pair?
    scalars: Tensor  # float32 [3]: s · log2 e, shift, s


def dense(ids: Tensor) -> Tensor:
    """Any integers [L] -> 0, 1, 2, … in the order of their values, equal where they were equal;
    without a wait.
    """
    value, order = ids.sort()
    rank = torch.cat([value.new_zeros(1), (value[1:] != value[:-1]).cumsum(0)])
    return torch.empty_like(rank).scatter_(0, order, rank)


def sort_key(ids: Tensor) -> Tensor:
    """Dense ids [C, L] -> a key [L], (nearly always) equal for rows connected by equal ids, and
    random otherwise.

    Connected components by two rounds of "take the smallest label among those who share an id".
    Components that need more are only slower: `mark_tiles` looks at every pair.
    """
    label = ids[0]
    for _ in range(2):
        for line in [*ids[1:], ids[0]]:
            smallest = torch.full_like(label, len(label)).scatter_reduce_(0, line, label, "amin")
            label = smallest[line]
    key = (
        label * 2654435761 % (1 << 32)
    )  # Knuth's multiplicative hash, and one more round for the low bits
    return (key ^ (key >> 16)) * 0x45D9F3B % (1 << 32)


def have_negatives(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(bool [N], bool [M]): does a row [C, N], a column [C, M] of dense ids have any negative?

    A pair is none if it is equal in id 1 *or* id 2 …: how many a row has not is counted by
    inclusion and exclusion, without looking at pairs.
    """
    ids = torch.cat([row_ids, col_ids], 1)
    n, length = row_ids.shape[1], ids.shape[1]
    row_masked, col_masked = 0, 0
    for size in range(1, len(ids) + 1):
        for chosen in itertools.combinations(ids, size):
            key = chosen[0]
            for line in chosen[1:]:
                key = dense(key * length + line)
            sign = 1 if size % 2 else -1
            ones = torch.ones_like(key)
            in_rows = torch.zeros_like(key).scatter_add_(0, key[:n], ones[:n])
            in_cols = torch.zeros_like(key).scatter_add_(0, key[n:], ones[n:])
            row_masked = row_masked + sign * in_cols[key[:n]]
            col_masked = col_masked + sign * in_rows[key[n:]]
    return row_masked < length - n, col_masked < n


def pack_side(
    embeddings: Tensor,
    concepts: Tensor | None,
    ids: Tensor,
    key: Tensor,
    has_negatives: Tensor,
    depth: int,
    dtype: torch.dtype,
) -> Side:
    """One side: rows [n, E] in the order of `key`, padded, with their concepts behind them."""
    n, width = embeddings.shape
    order = key.argsort(stable=True)
    packed = triton.cdiv(n, ROW_MULTIPLE) * ROW_MULTIPLE
    total = width + (concepts.shape[1] if concepts is not None else 0)
    rows = embeddings.new_zeros(packed, triton.cdiv(total, depth) * depth, dtype=dtype)
    rows[:n, :width] = embeddings[order]
    if concepts is not None:
        rows[:n, width:total] = concepts[order]

    packed_ids = ids.new_full((len(ids), packed), -1, dtype=torch.int32)
    packed_ids[:, :n] = ids[:, order]
    padded_order = order.new_zeros(packed, dtype=torch.int32)
    padded_order[:n] = order
    place = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=order.device))
    return Side(rows, packed_ids, padded_order, place.int(), has_negatives)


@triton.jit
def mark_tiles(
    video_ids, text_ids, marks, video_rows, text_rows, IDS: tl.constexpr, CELL: tl.constexpr
):
    """marks[i, j] = does any pair of cell (i, j) share an id, or is it padding?"""
    i, j = tl.program_id(0), tl.program_id(1)
    rows = i * CELL + tl.arange(0, CELL)
    cols = j * CELL + tl.arange(0, CELL)
    row_id, col_id = tl.load(video_ids + rows), tl.load(text_ids + cols)
    found = (row_id < 0)[:, None] | (col_id < 0)[None, :] | (row_id[:, None] == col_id[None, :])
    for c in tl.static_range(1, IDS):
        row_id, col_id = (
            tl.load(video_ids + c * video_rows + rows),
            tl.load(text_ids + c * text_rows + cols),
        )
        found |= row_id[:, None] == col_id[None, :]
    tl.store(
        marks + i * tl.num_programs(1) + j, tl.max(tl.max(found.to(tl.int32), 1), 0).to(tl.int8)
    )


@triton.jit
def mask_pairs(tile, row_ids, col_ids, n_rows, n_cols, rows, cols, IDS: tl.constexpr):
    """The tile [rows, cols] of exponents, with −inf where a pair is no negative.

    Before exp2, not after: one block of code, which the compiler can overlap, and fewer registers.
    One id after the other: fewer registers, too.
    """
    nothing = float("-inf")
    is_padding = (tl.load(row_ids + rows) < 0)[:, None] | (tl.load(col_ids + cols) < 0)[None, :]
    tile = tl.where(is_padding, nothing, tile)
    for c in tl.static_range(IDS):
        row_id, col_id = tl.load(row_ids + c * n_rows + rows), tl.load(col_ids + c * n_cols + cols)
        tile = tl.where(row_id[:, None] == col_id[None, :], nothing, tile)
    return tile


@triton.jit
def is_marked(
    marks,
    stride_row,
    stride_col,
    row,
    col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CELL: tl.constexpr,
):
    """Does the tile of ROWS x COLS at (row, col) touch a marked cell?"""
    found = 0
    for r in tl.static_range(0, ROWS, CELL):
        for c in tl.static_range(0, COLS, CELL):
            found |= tl.load(
                marks + (row + r) // CELL * stride_row + (col + c) // CELL * stride_col
            )
    return found != 0


def exponent_range(video: Tensor, text: Tensor, scale: Tensor, beta: Tensor, concepts) -> Tensor:
    """float32 [3] on the device: s · log2 e, shift, s, where exp2(a · log2 e − shift) needs no
    running maximum.

    |a| ≤ bound = s · max‖v‖ · max‖t‖ + |β| · max‖c_v‖ · max‖c_t‖. The shift puts exp(bound) at most
    at 2^head, so high that a sum of all columns just fits into float32 (2^127), and no higher than
    it is (small arguments of exp2 have more digits). What is 2^(head + 126) times smaller, 163 nats
    at B = 131,072, is lost. At the clamp s = 100 that is a cosine of −0.6. A row that has nothing
    above it becomes NaN (`triton_forward.log_of_sums`). Where not even a logit of 0 would survive
    (s = 100 and β > 58) or anything is not finite, everything becomes NaN.
    """

    def longest(x):
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()

    bound = scale * longest(video) * longest(text)
    if concepts is not None:
        bound = bound + beta.abs() * longest(concepts[0]) * longest(concepts[1])
    head = 126 - max(len(video), len(text), 2).bit_length()
    shift = (bound * LOG2E - head).clamp(min=0)
    shift = torch.where((shift < 120) & shift.isfinite(), shift, torch.nan)
    return torch.stack([scale * LOG2E, shift, scale]).float()


def pack(
    video: Tensor,
    text: Tensor,
    scale: Tensor,
    beta: Tensor,
    concepts,
    signature,
    offset: int,
    dtype: torch.dtype,
) -> Layout:
    """Bring the problem of `knowledge_nce_stats` into the form of the kernels."""
    assert video.is_cuda or INTERPRETED, (
        "impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment"
    )
    is_known = video.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert is_known and video.dtype == text.dtype, (
        f"impl='triton' takes float32, float16 or bfloat16, not {video.dtype} and {text.dtype}"
    )

    # ids [C, N + M]: the pair, then the signature's, dense
    n, m, device = len(video), len(text), video.device
    ids = [torch.cat([torch.arange(n, device=device) + offset, torch.arange(m, device=device)])]
    if signature is not None:
        row_ids, col_ids = (side.long().T for side in signature)
        ids += [dense(torch.cat(both)) for both in zip(row_ids, col_ids)]
    ids = torch.stack(ids)
    key = sort_key(ids)

    # both sides in the form of the kernels
    dtype = torch.float32 if INTERPRETED else dtype
    depth = TILES["fp32" if dtype == torch.float32 else "hopper"]["mine"].depth
    row_concepts, col_concepts = concepts or (None, None)
    if concepts is not None:
        row_concepts = row_concepts * (beta / scale)
    row_has, col_has = have_negatives(ids[:, :n], ids[:, n:])
    video_side = pack_side(video, row_concepts, ids[:, :n], key[:n], row_has, depth, dtype)
    text_side = pack_side(text, col_concepts, ids[:, n:], key[n:], col_has, depth, dtype)

    # where the masked pairs are
    cells = len(video_side.rows) // CELL, len(text_side.rows) // CELL
    marks = torch.empty(cells, dtype=torch.int8, device=device)
    mark_tiles[cells](
        video_side.ids,
        text_side.ids,
        marks,
        len(video_side.rows),
        len(text_side.rows),
        IDS=len(ids),
        CELL=CELL,
    )
    return Layout(video_side, text_side, marks, exponent_range(video, text, scale, beta, concepts))
