# SPDX-License-Identifier: Apache-2.0
"""Steps of the backbone that are neither products of matrices nor attention: kernels_cu/layers_*.cu.

A backbone is one plan over one workspace, so these functions add steps to it. Rows of activations are contiguous, in
float32, float16 or bfloat16, at addresses that are multiples of 16 and with 8 to 1536 columns, a multiple of 8.
Parameters and their gradients are float32.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT64, FLOATS
from gpu3d.cuda import clouds
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Kernel, Macros, Matrix, Number, Packed, Pointer, Steps
from gpu3d.reference.flash3d import half_turns

NORM_THREADS = 256
RESIDUAL_THREADS = 256
GELU_THREADS, GELU_ITEMS = 256, 4
ROTATE_THREADS, ROTATE_PAIRS, ROTATE_HEADS = 256, 64, 2  # the last: heads a thread, of q and of k
COLUMN_THREADS = 256
SUM_THREADS, MOST_VECTORS = 1024, 120
COMPOSE_THREADS = 256
RATIOS = (2, 4, 8)

MOST_COLUMNS = 1536  # so that norm_backward's sums fit the registers of a warp, and 48 KB of shared memory

_WORD = 16  # bytes
_LANES = (4, 8, 16, 32)  # threads of a row that share it in a norm
_WORDS = (1, 2, 3, 4, 6, 8, 12)  # words of a row that each of them has; more than one with 32 threads only
_PARTS = 528  # blocks that sum over rows: four for each multiprocessor of an H100 or H200

_VECTOR = "QQiiii"  # struct Vector of layers_sums.cu
_DROP = "IfIxxxxQQ"  # struct Drop of drop.cuh
_NO_DROP = bytes(struct.calcsize(_DROP))

# The parameters of each kernel as formats of the module struct; c stands for struct Clouds.
_SIGNATURES = {
    "norm_rows": f"QQQQiif{len(_NO_DROP)}sQQQ",
    "norm_backward": f"QQQQQQii{len(_NO_DROP)}sQQQ",
    "column_sums": "QiiiiiQ",
    "sum_partials": f"{MOST_VECTORS * struct.calcsize(_VECTOR)}si",
    "gelu_backward": "QQqQQ",
    "residual_rows": f"QQiii{len(_NO_DROP)}sQ",
    "rotate_rows": f"QQ{4 * ROTATE_PAIRS}siiiiifQ",
    "pack_positions": "QcQ",
    "compose_members": "QQQQccQ",
}
_EARLY = "norm_rows", "rotate_rows"  # kernels that start early


@functools.cache
def _kernel(source: str, function: str, macros: Macros = ()) -> Kernel:
    formats = _SIGNATURES[function].replace("c", clouds.FORMAT)
    return Kernel(source, function, formats, macros, early=function in _EARLY)


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    types = [dtype for dtype in FLOATS if dtype != FLOAT64]
    found = []
    for dtype in types:
        shapes = dict.fromkeys(_shape(dtype, columns) for columns in range(8, MOST_COLUMNS + 1, 8))
        found += [Configuration("layers_norm", _norm_macros(dtype, *s, gelu)) for gelu in (False, True) for s in shapes]
    for source in ("layers_residual", "layers_gelu", "layers_columns", "layers_rotate"):
        found += [Configuration(source, _element(dtype)) for dtype in types]
    found.append(Configuration("layers_sums", ()))
    return [*found, *(Configuration("layers_compose", (("RATIO", ratio),)) for ratio in RATIOS)]


def _element(dtype: np.dtype) -> Macros:
    return (("ELEMENT", FLOATS.index(dtype)),)


@functools.cache
def _norm_macros(dtype: np.dtype, lanes: int, words: int, gelu: bool) -> Macros:
    return *_element(dtype), ("ROW_THREADS", lanes), ("THREAD_WORDS", words), ("GELU", int(gelu))


def _row_words(dtype: np.dtype, columns: int) -> int:
    """Words of 16 bytes in a row."""
    if columns < 8 or columns % 8:
        raise ValueError(f"columns must be a multiple of 8, got {columns}.")
    return columns * dtype.itemsize // _WORD


@functools.cache
def _shape(dtype: np.dtype, columns: int) -> tuple[int, int]:
    """Threads that share a row of a norm, and words a thread."""
    words = _row_words(dtype, columns)
    if columns > MOST_COLUMNS:
        raise ValueError(f"a norm has at most {MOST_COLUMNS} columns, got {columns}.")
    lanes = next((n for n in _LANES if n >= words), _LANES[-1])
    return lanes, next(n for n in _WORDS if n * lanes >= words)


def _packed(drop: Drop | None) -> Packed | bytes:
    return _NO_DROP if drop is None else drop.packed


def _lane_bits(words: int, most: int) -> int:
    """The logarithm of the number of threads that share a row."""
    return min(most, (words - 1).bit_length())


class Drop(NamedTuple):
    """Drop path: keep(row) is 1 / (1 - rate), or 0 with probability `rate`.

    The random number of a row depends on the seed (64 bits), on the step (uint32 in device memory), on `layer` and on
    the row.
    """

    rate: float
    layer: int
    step: Pointer
    seed: int | Number

    @property
    def packed(self) -> Packed:
        """The struct Drop of drop.cuh."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be at least 0 and below 1, got {self.rate}.")
        fields = math.floor(self.rate * 2**32), 1 / (1 - self.rate), self.layer, self.seed, self.step
        return Packed(_DROP, fields)


# ---- norm ----------------------------------------------------------------------------------------------------------


def add_norm(
    steps: Steps,
    x: Pointer,
    weight: Pointer,
    bias: Pointer,
    out: Pointer,
    *,
    rows: int,
    columns: int,
    dtype: np.dtype,
    epsilon: float,
    gelu: bool = False,
    statistics: Pointer | None = None,
    y: Pointer | None = None,
    drop: Drop | None = None,
    total: Pointer | None = None,
) -> None:
    """Add LayerNorm of x, and GELU behind it. `statistics`: float32 [rows, 2] for the backward.

    With y, the norm is that of total = x + keep(row) y, which is written too, as `add_residual` does.
    """
    lanes, words = _shape(dtype, columns)
    args = x, y, weight, bias, rows, _row_words(dtype, columns), epsilon, _packed(drop), total, out, statistics
    kernel = _kernel("layers_norm", "norm_rows", _norm_macros(dtype, lanes, words, gelu))
    steps.launch(kernel, grid=-(-rows // (NORM_THREADS // lanes)), block=NORM_THREADS, args=args)


def add_norm_backward(
    steps: Steps,
    dout: Pointer,
    x: Pointer,
    statistics: Pointer,
    weight: Pointer,
    bias: Pointer,
    dx: Pointer,
    dweight: Pointer,
    dbias: Pointer,
    *,
    rows: int,
    columns: int,
    dtype: np.dtype,
    gelu: bool = False,
    dres: Pointer | None = None,
    dy: Pointer | None = None,
    drop: Drop | None = None,
) -> list[Partials]:
    """Add the backward of `add_norm`, dx = dres + the gradient of x. dx may be dres. With dy, also dy = keep(row) dx.

    The gradients of weight and bias are written by `add_sums`, which takes the result.
    """
    lanes, words = _shape(dtype, columns)
    width = words * _WORD // dtype.itemsize  # columns a thread: with more, fewer blocks fit on a multiprocessor
    most = _PARTS if width <= 8 else _PARTS // 2 if width <= 24 else _PARTS // 4
    blocks = min(most, -(-rows // (NORM_THREADS // lanes)))
    partials = steps.workspace("norm sums", 8 * max(1, blocks) * columns)
    args = dout, x, statistics, weight, bias, dres, rows, _row_words(dtype, columns)
    results = _packed(drop), dx, dy, partials
    kernel = _kernel("layers_norm", "norm_backward", _norm_macros(dtype, lanes, words, gelu))
    steps.launch(kernel, grid=blocks, block=NORM_THREADS, args=(*args, *results))
    parts = ((partials, dweight), (partials + 4 * columns, dbias))
    return [Partials(sums, out, blocks, columns, 2 * columns) for sums, out in parts]


# ---- sums over rows ------------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """The sums of a vector over the rows of each block. `add_sums` adds them up."""

    sums: Pointer  # float32 [blocks, columns], rows `pitch` elements apart
    out: Pointer  # float32 [columns]
    blocks: int
    columns: int
    pitch: int


def add_column_sums(steps: Steps, x: Matrix, out: Pointer) -> Partials:
    """Add the sums of x's columns over the rows of each block. `out` is where `add_sums` writes those over all rows.

    The stride of x is a multiple of 16 bytes. What lies between the rows is read, but belongs to no sum.
    """
    per = _WORD // x.dtype.itemsize
    words = -(-x.columns // per)
    lane_bits = _lane_bits(words, 5)
    tiles = -(-words >> lane_bits)
    parts = min(-(-_PARTS // 2 // tiles), -(-x.rows // (COLUMN_THREADS >> lane_bits)))
    sums = steps.workspace("column sums", 4 * parts * words * per)
    args = x.pointer, x.rows, words, x.stride // per, lane_bits, tiles, sums
    kernel = _kernel("layers_columns", "column_sums", _element(x.dtype))
    steps.launch(kernel, grid=tiles * parts, block=COLUMN_THREADS, args=args)
    return Partials(sums, out, parts, x.columns, words * per)


def add_sums(steps: Steps, vectors: list[Partials]) -> None:
    """Add the sums of all vectors over their blocks, with one launch for MOST_VECTORS of them."""
    for start in range(0, len(vectors), MOST_VECTORS):
        fields: list[Any] = []
        grid = 0
        part = vectors[start : start + MOST_VECTORS]
        for vector in part:
            fields += [vector.sums, vector.out, vector.blocks, vector.columns, vector.pitch, grid]
            grid += -(-vector.columns // 32)
        unused = struct.calcsize(_VECTOR) * (MOST_VECTORS - len(part))
        packed = Packed(_VECTOR * len(part) + f"{unused}x", tuple(fields))
        steps.launch(_kernel("layers_sums", "sum_partials"), grid=grid, block=SUM_THREADS, args=(packed, len(part)))


# ---- GELU ----------------------------------------------------------------------------------------------------------


def add_gelu_backward(
    steps: Steps, dy: Pointer, x: Pointer, dx: Pointer, active: Pointer, *, rows: int, columns: int, dtype: np.dtype
) -> None:
    """Add dx = dy gelu'(x) and active = gelu(x), where gelu is the tanh form. dx may be dy."""
    words = rows * _row_words(dtype, columns)
    kernel = _kernel("layers_gelu", "gelu_backward", _element(dtype))
    grid = -(-words // (GELU_THREADS * GELU_ITEMS))
    steps.launch(kernel, grid=grid, block=GELU_THREADS, args=(dy, x, words, dx, active))


# ---- residual ------------------------------------------------------------------------------------------------------


def add_residual(
    steps: Steps,
    x: Pointer | None,
    y: Pointer,
    out: Pointer,
    *,
    rows: int,
    columns: int,
    dtype: np.dtype,
    drop: Drop,
) -> None:
    """Add out = x + keep(row) y; without x, the backward dy = keep(row) dout. out may be x or y."""
    words = _row_words(dtype, columns)
    lane_bits = _lane_bits(words, 8)
    args = x, y, rows, words, lane_bits, drop.packed, out
    kernel = _kernel("layers_residual", "residual_rows", _element(dtype))
    steps.launch(kernel, grid=-(-rows // (RESIDUAL_THREADS >> lane_bits)), block=RESIDUAL_THREADS, args=args)


# ---- rotary position codes -----------------------------------------------------------------------------------------


@functools.cache
def _turns(dim: int, wavelengths: tuple[float, float]) -> tuple[bytes, int]:
    """The struct Turns of layers_rotate.cu, and how many pairs an axis has."""
    turns = half_turns(dim, wavelengths)
    padded = np.zeros(ROTATE_PAIRS, "<f4")
    padded[: turns.size] = turns.reshape(-1)
    return padded.tobytes(), turns.shape[1]


def add_rotate(
    steps: Steps,
    qkv: Pointer,
    points: Pointer,
    index: Pointer,
    *,
    rows: int,
    heads: int,
    dim: int,
    dtype: np.dtype,
    wavelengths: tuple[float, float],
    back: bool = False,
) -> None:
    """Add the rotation of q and k in qkv [rows, 3, heads, dim], in place, or that of their gradients back.

    Row i turns by the coordinates of point index[i] of points float32 [N, 3]; with index -1 it stays.
    """
    words, groups = _row_words(dtype, dim), -(-heads // ROTATE_HEADS)
    direction = -1.0 if back else 1.0
    args = points, index, *_turns(dim, wavelengths), rows, heads, words, groups, direction, qkv
    kernel = _kernel("layers_rotate", "rotate_rows", _element(dtype))
    steps.launch(kernel, grid=-(-rows // (ROTATE_THREADS // (words * groups))), block=ROTATE_THREADS, args=args)


# ---- geometry ------------------------------------------------------------------------------------------------------


def add_pack(steps: Steps, positions: Pointer, batch: Any, out: Pointer, *, slots: int) -> None:
    """Add the copy of positions float32 [slots, 3] without the padding. `batch` is the struct Clouds of the slots."""
    kernel = _kernel("layers_compose", "pack_positions", (("RATIO", RATIOS[0]),))
    steps.launch(kernel, grid=-(-slots // COMPOSE_THREADS), block=COMPOSE_THREADS, args=(positions, batch, out))


def add_compose(
    steps: Steps,
    members: Pointer,
    slot_to_point: Pointer,
    point_to_slot: Pointer,
    parents: Any,
    children: Any,
    composed: Pointer,
    *,
    slots: int,
    ratio: int,
    local_points: Pointer | None = None,
) -> None:
    """Add the members of pooling between stage layouts, int32 [slots, ratio].

    `members` are those between local layouts. `slot_to_point` is that of the children's stage layout, `point_to_slot`
    that of the parents'; both are results of bucketize on the packed points of the local layouts. But if the parents
    are the caller's points, `local_points` is slot_to_point of their local layout. `parents` and `children` are the
    structs Clouds, and `slots` counts those of the children.
    """
    kernel = _kernel("layers_compose", "compose_members", (("RATIO", ratio),))
    args = members, slot_to_point, point_to_slot, local_points, parents, children, composed
    steps.launch(kernel, grid=-(-slots // COMPOSE_THREADS), block=COMPOSE_THREADS, args=args)
