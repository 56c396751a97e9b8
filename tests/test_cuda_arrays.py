# SPDX-License-Identifier: Apache-2.0
"""gpu3d.cuda.arrays without a GPU: descriptions of strided arrays, checked by a NumPy version of the kernels."""

from __future__ import annotations

import ctypes
import itertools
import sys

import numpy as np
import pytest

from gpu3d import _arrays
from gpu3d.cuda import arrays

EDGES = (7, 8, 9, 31, 32, 33, 63, 64, 65, 129)  # around the least dimension for a tile, and around tiles


def base(shape, dtype):
    """An array in which every byte of an element differs from its neighbours."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).view(dtype).reshape(shape)


def broadcast(x, shape):
    """numpy.broadcast_to, or cupy.broadcast_to of CuPy's arrays."""
    return (np if isinstance(x, np.ndarray) else sys.modules["cupy"]).broadcast_to(x, shape)


# Name, shape and dtype of an array, and the view of it that is copied. For NumPy and CuPy arrays.
VIEWS = {
    "contiguous": ((5, 7), "f4", lambda x: x),
    "one number": ((1,), "f8", lambda x: x[0, ...]),
    "one of many": ((5, 7), "i2", lambda x: x[3:4, 2:3]),
    "empty": ((4, 3), "f4", lambda x: x[:0]),
    "a column": ((1000, 8), "f4", lambda x: x[:, 3]),
    "columns": ((1000, 8), "f8", lambda x: x[:, 2:5]),
    "columns of bytes": ((300, 8), "u1", lambda x: x[:, 2:5]),
    "q of qkv": ((70, 3, 4, 16), "f2", lambda x: x[:, 1]),
    "points by coordinate": ((3, 1025), "f4", lambda x: x.T),
    "points by coordinate, float64": ((2, 1025), "f8", lambda x: x.T),
    "reversed": ((600,), "f4", lambda x: x[::-1]),
    "steps of both signs": ((33, 65), "i8", lambda x: x[::2, ::-3]),
    "broadcast": ((7, 1, 3), "f4", lambda x: broadcast(x, (7, 40, 3))),
    "broadcast in the last dimension": ((40, 1), "f4", lambda x: broadcast(x, (9, 40, 33))),
    "axes moved": ((9, 10, 11, 12), "f4", lambda x: x.transpose(3, 1, 0, 2)),
    "last axis first": ((40, 9, 33), "f2", lambda x: x.transpose(2, 0, 1)),
    "transposed in a batch": ((3, 65, 34), "c16", lambda x: x.transpose(0, 2, 1)),
    "eight dimensions": ((4,) * 8, "u1", lambda x: x[(slice(None, None, 2),) * 8]),
    **{
        f"transposed {a} x {b} of {dtype}": ((a, b), dtype, lambda x: x.T)
        for (a, b), dtype in zip(
            itertools.product(EDGES, EDGES), itertools.cycle(("u1", "f2", "f4", "f8", "c16")), strict=False
        )
    },
}


def fields(packed):
    """The fields of struct Strided: the count; then sizes, strides, magic numbers and shifts of the dimensions."""
    count, *rest, dimensions = arrays._STRIDED.unpack(packed)
    columns = [rest[k * arrays.COPY_DIMENSIONS :][:dimensions] for k in range(4)]
    return count, [np.array(column, dtype) for column, dtype in zip(columns, ("u8", "i8", "u8", "u8"), strict=True)]


def gathered(layout):
    """The byte offsets of the words that copy_strided reads, in order."""
    count, (sizes, strides, magics, shifts) = fields(layout.packed)
    assert layout.grid == -(-count // (arrays.COPY_THREADS * arrays.COPY_ITEMS))
    index, offset = np.arange(count, dtype=np.uint64), np.zeros(count, np.int64)
    for d in range(len(sizes) - 1, 0, -1):
        outer = index * magics[d] >> (np.uint64(32) + shifts[d])
        offset += (index - outer * sizes[d]).astype(np.int64) * strides[d]
        index = outer
    return offset + index.astype(np.int64) * strides[0]


def transposed(layout):
    """The same for copy_transposed, which must write every word once."""
    count, (sizes, strides, _, _) = fields(layout.packed)
    sizes, tile, last = sizes.astype(np.int64), arrays.copy_tile(layout.word), len(sizes) - 1
    offsets, writes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for block in range(layout.grid):
        first, rest, at, place, step = {}, block, 0, 0, 1
        for d in (last, layout.fast):
            tiles = -(-sizes[d] // tile)
            first[d], rest = rest % tiles * tile, rest // tiles
        rows = {d: np.arange(first[d], min(first[d] + tile, sizes[d])) for d in first}
        for d in range(last, -1, -1):
            if d == layout.fast:
                fast_step = step
            elif d != last:
                at, place, rest = at + rest % sizes[d] * strides[d], place + rest % sizes[d] * step, rest // sizes[d]
            step *= sizes[d]
        assert rest == 0
        out = place + rows[layout.fast][:, None] * fast_step + rows[last]
        offsets[out] = at + rows[layout.fast][:, None] * strides[layout.fast] + rows[last] * strides[last]
        writes[out] += 1
    assert (writes == 1).all()
    return offsets


def copied(view, layout):
    """The bytes that the kernel writes."""
    start = view.__array_interface__["data"][0]
    low, high = np.lib.array_utils.byte_bounds(view)
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
    offsets = gathered(layout) if layout.fast is None else transposed(layout)
    assert (offsets % layout.word == 0).all()
    return memory[(start - low + offsets)[:, None] + np.arange(layout.word)].tobytes()


@pytest.mark.parametrize("name", VIEWS)
def test_a_copy_reads_every_element_in_order(name):
    shape, dtype, view_of = VIEWS[name]
    x = base(shape, dtype)
    view = view_of(x)
    for misalignment in (0, 8, 4, 2, 1):
        layout = arrays.strided_layout(view.shape, view.strides, view.itemsize, misalignment)
        if not view.size:
            assert layout.grid == 0
            continue
        assert layout.word in (1, 2, 4, 8, 16) and misalignment % layout.word == 0
        assert copied(view, layout) == view.tobytes()


def test_views_of_many_kinds():
    """Random permutations, steps and dtypes, including an itemsize of 12."""
    rng = np.random.default_rng(0)
    kernels = set()
    for _ in range(300):
        shape = tuple(rng.choice((1, 2, 3, 8, 17), rng.integers(1, 5)))
        x = base(shape, rng.choice(("u1", "f2", "f4", "V12", "c16")))
        steps = tuple(slice(None, None, int(rng.choice((1, 1, 1, 2, -1)))) for _ in shape)
        view = x[steps].transpose(rng.permutation(len(shape)))
        layout = arrays.strided_layout(view.shape, view.strides, view.itemsize)
        assert copied(view, layout) == view.tobytes(), (shape, x.dtype, view.shape, view.strides)
        kernels.add(layout.fast is None)
    assert kernels == {True, False}


@pytest.mark.parametrize(
    ("shape", "strides", "itemsize", "misalignment", "word", "sizes", "fast"),
    [
        ((100, 64), (256, 4), 4, 0, 16, [1600], None),  # contiguous
        ((100, 64), (256, 4), 4, 8, 8, [3200], None),
        ((100, 64), (256, 4), 4, 3, 1, [25600], None),
        ((100, 3, 8), (144, 48, 2), 2, 0, 16, [300], None),
        ((100, 2, 8), (96, 16, 2), 2, 0, 16, [100, 2], None),  # q of qkv: rows of 32 bytes
        ((100, 3), (4, 400), 4, 0, 4, [100, 3], None),  # too short for a tile
        ((100, 64), (4, 400), 4, 0, 4, [100, 64], 0),
        ((5, 100, 64), (25600, 4, 400), 4, 0, 4, [5, 100, 64], 1),
        ((100, 64), (0, 0), 4, 0, 4, [6400], None),  # one number
        ((5, 1, 3), (96, 7, 32), 4, 0, 4, [15], None),  # a dimension of size 1 has any stride
        ((5,), (-4,), 4, 0, 4, [5], None),
        ((4, 6), (1, 1), 1, 0, 1, [4, 6], None),  # windows that overlap
        ((), (), 8, 0, 8, [1], None),
    ],
)
def test_what_is_merged_and_which_kernel_copies(shape, strides, itemsize, misalignment, word, sizes, fast):
    layout = arrays.strided_layout(shape, strides, itemsize, misalignment)
    count, (found, *_) = fields(layout.packed)
    assert (layout.word, list(found), layout.fast) == (word, sizes, fast)
    assert count == np.prod(sizes)


def test_more_dimensions_than_a_kernel_takes():
    with pytest.raises(ValueError, match=r"at most 8 dimensions .* got 9 in shape \[2, 2.* make it contiguous first"):
        arrays.strided_layout((2,) * 9, tuple(3**k for k in range(1, 10)), 1)


def test_division_by_multiplication():
    """The result is exact for all numbers below 2**31; tried around multiples of the divisor and at the ends."""
    rng = np.random.default_rng(1)
    divisors = {*range(2, 200), *(1 << k for k in range(1, 31)), *((1 << k) + e for k in range(2, 31) for e in (-1, 1))}
    for n in {*divisors, (1 << 31) - 1, *rng.integers(2, 1 << 31, 500).tolist()}:
        magic, shift = arrays._magic(n)
        assert 0 < magic < 1 << 32 and 0 <= shift < 32
        quotients = [0, 1, ((1 << 31) - 1) // n, *rng.integers(0, ((1 << 31) - 1) // n + 1, 20).tolist()]
        for x in {q * n + e for q in quotients for e in (-1, 0, 1, n - 1)} | {(1 << 31) - 1}:
            if 0 <= x < 1 << 31:
                assert x * magic >> 32 + shift == x // n, (x, n)


def test_more_than_2_to_the_31_words():
    layout = arrays.strided_layout((2, 3 << 31), (1, 2), 1)
    count, (sizes, _, magics, shifts) = fields(layout.packed)
    assert count == 6 << 31 and list(sizes) == [2, 3 << 31] and not magics[1] and not shifts[1]
    assert layout.grid == -(-count // 1024)


def test_conversions_have_float32_or_float64_on_one_side_or_are_none():
    macros = [dict(c.macros) for c in arrays.configurations() if c.source == "arrays_convert"]
    pairs = {(_arrays.FLOATS[m["FROM"]].name, _arrays.FLOATS[m["TO"]].name) for m in macros}
    names = [dtype.name for dtype in _arrays.FLOATS]
    assert {*itertools.product(names, names)} - pairs == {("float16", "bfloat16"), ("bfloat16", "float16")}
    assert names[:2] == ["float32", "float64"]  # the numbering of FROM and TO
