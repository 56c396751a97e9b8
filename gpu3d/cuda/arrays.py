# SPDX-License-Identifier: Apache-2.0
"""Steps on whole arrays that several ops use: copies, conversions, prefix sums.

The kernels are in kernels_cu/arrays_*.cu. Nothing here needs a GPU.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOATS, Given, Spec
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Kernel, Number, Pointer, Steps

COPY_THREADS, COPY_ITEMS, COPY_DIMENSIONS = 256, 4, 8
CONVERT_THREADS, CONVERT_ROWS = 256, 512
SCAN_THREADS, SCAN_ITEMS, SCAN_TILE = 256, 8, 2048

_WORDS = (1, 2, 4, 8, 16)  # bytes
_STRIDED = struct.Struct(f"<Q{COPY_DIMENSIONS}Q{COPY_DIMENSIONS}q{COPY_DIMENSIONS}I{COPY_DIMENSIONS}II4x")
STRIDED_FORMAT = f"{_STRIDED.size}s"  # struct Strided in a kernel's signature
_SECTOR = 32  # bytes that the device reads from memory at once
_FEWEST = 8  # words that a dimension must have for copy_transposed to pay off


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    types = range(len(_arrays.FLOATS))
    wide = [k for k in types if _arrays.FLOATS[k].itemsize >= 4]  # each conversion is from or to float32 or float64
    pairs = [(a, b) for a in types for b in types if a == b or a in wide or b in wide]
    return [
        *(Configuration("arrays_copy", (("WORD", word),)) for word in _WORDS),
        *(Configuration("arrays_convert", (("FROM", a), ("TO", b))) for a, b in pairs),
        Configuration("arrays_scan"),
    ]


class Strided(NamedTuple):
    """How an array of any strides is copied to a contiguous array."""

    word: int  # bytes copied at once, the macro WORD
    size: int  # bytes of all elements
    packed: bytes  # the bytes of struct Strided
    fast: int | None  # the dimension along which copy_transposed reads; None for copy_strided
    grid: int  # blocks; 0 if the array has no elements


def strided_layout(shape: Sequence[int], strides: Sequence[int], itemsize: int, misalignment: int = 0) -> Strided:
    """The copy of an array with these strides (in bytes, of any sign) by arrays_copy.cu.

    `misalignment` combines the low four bits of both addresses: `(source | out) % 16`. The address of the source is
    that of the element whose indices are all 0. The copy moves bytes, so the itemsize need not be a power of two.
    """
    if itemsize == 0 or 0 in shape:
        return Strided(1, 0, bytes(_STRIDED.size), None, 0)
    *merged, (run, _) = _merged(shape, strides, itemsize)
    word = math.gcd(16, run, misalignment, *(stride for _, stride in merged))
    if run > word or not merged:
        merged.append((run // word, word))
    if len(merged) > COPY_DIMENSIONS:
        raise ValueError(
            f"an array on a GPU can have at most {COPY_DIMENSIONS} dimensions that do not lie one behind another, got "
            f"{len(merged)} in shape {list(shape)} with strides {list(strides)}: make it contiguous first."
        )
    sizes, steps = zip(*merged, strict=True)
    fast = _fast_dimension(sizes, steps)
    if fast is None:
        grid = -(-math.prod(sizes) // (COPY_THREADS * COPY_ITEMS))
    else:
        tile = copy_tile(word)
        grid = math.prod(-(-n // tile) if d in (fast, len(sizes) - 1) else n for d, n in enumerate(sizes))
    return Strided(word, word * math.prod(sizes), _packed(sizes, steps), fast, grid)


def copy_tile(word: int) -> int:
    """The side of a tile of copy_transposed, TILE in arrays_copy.cu."""
    return 64 if word <= 2 else 32


def _merged(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that visit the same bytes in the same order. The last has stride 1."""
    merged = [(itemsize, 1)]  # innermost first
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        inner_size, inner_stride = merged[-1]
        if size == 1:
            continue
        if stride == inner_size * inner_stride:
            merged[-1] = size * inner_size, inner_stride
        else:
            merged.append((size, stride))
    return merged[::-1]


def _fast_dimension(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The dimension along which copy_transposed should read, or None if copy_strided is as fast."""
    near = [(abs(strides[d]), d) for d in range(len(sizes) - 1) if strides[d] and sizes[d] >= _FEWEST]
    if not near or sizes[-1] < _FEWEST:
        return None
    stride, fast = min(near)
    return fast if stride < min(abs(strides[-1]), _SECTOR) else None


def _packed(sizes: Sequence[int], strides: Sequence[int]) -> bytes:
    """The bytes of struct Strided, which arrays_copy.cu reads."""
    magics, shifts = zip(*(_magic(n) for n in sizes), strict=True)
    unused = (0,) * (COPY_DIMENSIONS - len(sizes))
    return _STRIDED.pack(
        math.prod(sizes),
        *(*sizes, *unused),
        *(*strides, *unused),
        *(*magics, *unused),
        *(*shifts, *unused),
        len(sizes),
    )


def _magic(n: int) -> tuple[int, int]:
    """(magic, shift) with x // n == x * magic >> (32 + shift) for 0 <= x < 2**31 (Granlund and Montgomery 1994).

    n is neither 1 nor 2**31 or more, for which magic would need 64 bits.
    """
    if not 1 < n < 1 << 31:
        return 0, 0
    shift = (n - 1).bit_length() - 1
    return -(-(1 << (32 + shift)) // n), shift


# ---- steps ---------------------------------------------------------------------------------------------------------


def copied(spec: Given | Spec, alignment: int = 1) -> Strided | None:
    """The copy of an input that is not contiguous or whose address is not a multiple of `alignment`; otherwise None."""
    if spec.strides is None and (alignment == 1 or spec.misalignment % alignment == 0):
        return None
    size, strides = spec.dtype.itemsize, spec.strides
    if strides is None:
        strides = tuple([size * math.prod(spec.shape[d + 1 :]) for d in range(spec.ndim)])
    return strided_layout(spec.shape, strides, size, spec.misalignment)


def add_copy(steps: Steps, source: Pointer, layout: Strided | None) -> Pointer:
    """Add the copy, if there is one; returns where the elements are contiguous: at `source` or in the copy."""
    if layout is None:
        return source
    macros = (("WORD", layout.word),)
    out = steps.workspace("copy", layout.size)
    launch = functools.partial(steps.launch, grid=layout.grid, block=COPY_THREADS)
    if layout.fast is None:
        kernel = Kernel("arrays_copy", "copy_strided", f"Q{STRIDED_FORMAT}Q", macros)
        launch(kernel, args=(source, layout.packed, out))
    else:
        kernel = Kernel("arrays_copy", "copy_transposed", f"Q{STRIDED_FORMAT}iQ", macros)
        launch(kernel, args=(source, layout.packed, layout.fast, out))
    return out


class Rows(NamedTuple):
    """How rows of floats of any strides become contiguous rows of another dtype or number of columns."""

    number: int  # how many rows
    copied: Strided | None  # a first copy, if strides are not multiples of the itemsize
    converted: bool  # False if the copy is all that is needed
    row: int  # elements from one row to the next, after the copy
    column: int  # elements from one column to the next
    columns: int
    dtype: np.dtype
    to_columns: int  # columns that the input lacks become 0
    to_dtype: np.dtype


def canonical(spec: Spec, capacity: int) -> Spec:
    """The spec of points as a cache key: contiguous points of any number up to the capacity have the same."""
    if spec.strides is None and not spec.misalignment % spec.dtype.itemsize:
        return Spec((capacity, spec.shape[-1]), spec.dtype)
    return spec


def rows(spec: Spec, dtype: np.dtype, columns: int) -> Rows | None:
    """How an array [N, d] or [B, n, d] becomes contiguous [N, columns] of a dtype. None if it is already."""
    shape, given, strides, misalignment = spec
    size, width = given.itemsize, shape[-1]
    same = given == dtype and width == columns
    if strides is None and same and misalignment % size == 0:
        return None
    count = math.prod(shape[:-1])
    if not count:
        return None
    contiguous = tuple([math.prod(shape[d + 1 :]) * size for d in range(len(shape))])
    outer = [(n, stride) for n, stride in zip(shape[:-1], (strides or contiguous)[:-1], strict=True) if n > 1]
    row, column = outer[-1][1] if outer else 0, (strides or contiguous)[-1]
    even = len(outer) < 2 or outer[0][1] == outer[1][0] * row
    copied = None
    if not even or (row | column | misalignment) % size:
        copied = strided_layout(shape, strides or contiguous, size, misalignment)
        row, column = width * size, size
    converted = copied is None or not same
    return Rows(count, copied, converted, row // size, column // size, width, given, columns, dtype)


def add_rows(
    steps: Steps, source: Pointer, rows: Rows | None, out: Pointer | None = None, number: Number | None = None
) -> Pointer:
    """Add the steps of `rows`; returns where the result is: at `source`, at `out` or in workspace.

    `number` is the number of rows of a call, if `rows` has only an upper bound.
    """
    if rows is None:
        return source
    source = add_copy(steps, source, rows.copied)
    if not rows.converted:
        return source
    if out is None:
        out = steps.workspace("rows", rows.number * rows.to_columns * rows.to_dtype.itemsize)
    macros = ("FROM", FLOATS.index(rows.dtype)), ("TO", FLOATS.index(rows.to_dtype))
    args = source, rows.row, rows.column, number or rows.number, rows.columns, rows.to_columns, out
    kernel = Kernel("arrays_convert", "convert_rows", "QqqqiiQ", macros)
    steps.launch(kernel, grid=-(-rows.number // CONVERT_ROWS), block=CONVERT_THREADS, args=args)
    return out


def add_offsets(steps: Steps, counts: Pointer, n: Number | int, most: int, offsets: Pointer, total: Pointer) -> None:
    """Add the step that writes the prefix sums [n + 1] of n int64 counts, and their total; n is at most `most`."""
    tiles = max(1, -(-most // SCAN_TILE))
    state = steps.workspace("scan", 8 * (1 + tiles))
    steps.clear(state, 8 * (1 + tiles))
    kernel = Kernel("arrays_scan", "scan_offsets", "QqQQQ")
    steps.launch(kernel, grid=tiles, block=SCAN_THREADS, args=(counts, n, state, offsets, total))


def add_overflow(
    steps: Steps, total: Pointer, capacity: Number | int, n: Number | int, most: int, offsets: Pointer
) -> None:
    """Add the step that sets all n + 1 offsets to minus the total if it exceeds the capacity; n is at most `most`."""
    kernel = Kernel("arrays_scan", "scan_flag", "QqqQ")
    grid = -(-(most + 1) // SCAN_TILE)
    steps.launch(kernel, grid=grid, block=SCAN_THREADS, args=(total, capacity, n, offsets))
