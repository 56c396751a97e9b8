# SPDX-License-Identifier: Apache-2.0
"""The plans of pooling, unpooling and their backwards: kernels_cu/pooling_*.cu.

Plans depend on how many buckets the clouds have, not on their lengths. The children of a cloud with b buckets have
ceil(b / ratio) buckets. Grids are upper bounds: a cloud has at most as many tiles as its slots can fill, and at most
bucket_size - 1 rows of padding. Blocks without work return. The cloud without points that the backbone puts behind a
batch is all padding: `gpu3d.flash3d.levels` makes its tables, and counts it in the bounds.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT64, FLOATS, Given, Spec
from gpu3d.cuda import arrays, clouds
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Input, Kernel, Macros, Plan, Pointer, Result, Steps
from gpu3d.reference import pooling as reference

GROUP_TILE, GROUP_VOXELS = reference.TILE, reference.VOXELS
ROWS_THREADS = 256
ROWS_LOADS = 8  # words that a thread loads at once: children of a thread times ratio

# The parameters of each kernel as formats of the module struct; c stands for struct Clouds.
_SIGNATURES = {
    "pool_groups": "QcciQQQQQ",
    "pool_sums": "QqQqqiiQ",
    "pool_extremes": "QqQqqiiQQ",
    "spread_sums": "QqQqcqiiQ",
    "spread_extremes": "QqQQqcqiQ",
    "unpool_rows": "QqQqQqcqiQ",
    "unpool_sums": "QqQqcqiQQ",
}
_EARLY = "pool_sums", "pool_extremes", "unpool_rows"  # kernels that start early


@functools.cache
def _kernel(source: str, function: str, macros: Macros) -> Kernel:
    formats = _SIGNATURES[function].replace("c", clouds.FORMAT)
    return Kernel(source, function, formats, macros, early=function in _EARLY)


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    groups = [Configuration("pooling_group", (("POINT", p),)) for p in range(len(FLOATS))]
    rows = []
    for dtype in FLOATS:
        if dtype != FLOAT64:
            for word in (16, 8, 4, 2):
                if word >= dtype.itemsize:
                    rows += [Configuration("pooling_rows", _macros(dtype, word, ratio)) for ratio in reference.RATIOS]
    return groups + rows


def _macros(dtype: np.dtype, word: int, ratio: int) -> Macros:
    return ("ELEMENT", FLOATS.index(dtype)), ("WORD", word), ("RATIO", ratio)


# ---- what plans depend on ------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The properties of a layout and the ratio that plans depend on: numbers of buckets, and bounds from them."""

    clouds: int  # clouds, if their tables are in device memory; otherwise 0
    bucket_size: int
    ratio: int
    slots: int  # slots of the children
    tiles: int  # an upper bound on the tiles of the parents
    padding: int  # an upper bound on the padding slots of the parents


class Layout(NamedTuple):
    """The tables of a layout and of its children."""

    shape: Shape
    parents: clouds.Table  # its tiles are tiles of pooling, and its groups are rows of padding
    children: clouds.Table


@clouds.remembered
def layout_of(lengths: tuple[int, ...], bucket_size: int, ratio: int) -> Layout:
    """The tables of clouds of these lengths and of their children, and what plans depend on."""
    if len(lengths) <= clouds.INLINE_CLOUDS:
        return _small_layout(lengths, bucket_size, ratio)
    n = clouds.array(lengths)
    buckets = -(-n // bucket_size)
    children = -(-n // ratio)
    parents: Any = clouds.table(n, bucket_size, -(-n // GROUP_TILE), -n % bucket_size)  # type: ignore[arg-type]
    batch: Any = clouds.table(children, bucket_size, None, None)  # type: ignore[arg-type]
    slots = int((-(-buckets // ratio)).sum()) * bucket_size
    tiles = int((-(-buckets * bucket_size // GROUP_TILE)).sum())
    padding = int((buckets > 0).sum()) * (bucket_size - 1)
    return Layout(Shape(len(n), bucket_size, ratio, slots, tiles, padding), parents, batch)


def _small_layout(lengths: tuple[int, ...], bucket_size: int, ratio: int) -> Layout:
    buckets = [-(-n // bucket_size) for n in lengths]
    tiles = [-(-n // GROUP_TILE) for n in lengths]
    parents = clouds.table(lengths, bucket_size, tiles, [-n % bucket_size for n in lengths])
    children = clouds.table([-(-n // ratio) for n in lengths], bucket_size, None, None)
    shape = Shape(
        0,
        bucket_size,
        ratio,
        sum([-(-count // ratio) for count in buckets]) * bucket_size,
        sum([-(-count * bucket_size // GROUP_TILE) for count in buckets]),
        sum([count > 0 for count in buckets]) * (bucket_size - 1),
    )
    return Layout(shape, parents, children)


class _Rows(NamedTuple):
    """How kernels read rows: `stride` bytes apart, in place or in a copy, with contiguous elements."""

    stride: int
    word: int  # bytes of a load: the largest power of two up to 16 that divides rows, stride and address
    copied: arrays.Strided | None


def _rows(x: Given | Spec) -> _Rows:
    if x.dtype == FLOAT64:
        raise TypeError("pooling on a GPU takes features of float16, bfloat16 and float32, got float64.")
    size = x.dtype.itemsize
    row = x.shape[1] * size
    stride, step = x.strides or (row, size)
    word = math.gcd(16, row, stride, x.misalignment)
    if step == size and word >= size:
        return _Rows(stride, word, None)
    return _Rows(row, math.gcd(16, row), arrays.copied(x, size))


def _members(members: Spec, ratio: int) -> arrays.Strided | None:
    """The copy of the members that aligns those of a child for one load, if it is needed."""
    return arrays.copied(members, min(16, 4 * ratio))


class _Walk(NamedTuple):
    """How a kernel of pooling_rows.cu goes through rows of `words` words. 1 << lane_bits threads share a row."""

    dtype: np.dtype
    word: int  # bytes in a word
    words: int
    lane_bits: int
    ratio: int

    def launch(self, steps: Steps, function: str, rows: int, args: tuple[Any, ...]) -> None:
        """Add a launch over `rows` children and rows of padding."""
        kernel = _kernel("pooling_rows", function, _macros(self.dtype, self.word, self.ratio))
        rows_a_block = (ROWS_THREADS >> self.lane_bits) * (ROWS_LOADS // self.ratio)
        steps.launch(kernel, grid=-(-rows // rows_a_block), block=ROWS_THREADS, args=args)


def _walk(dtype: np.dtype, columns: int, ratio: int, *rows: _Rows) -> _Walk:
    """The walk along contiguous rows at multiples of 16 bytes, or along `rows`: with the largest word that fits."""
    word = min([math.gcd(16, columns * dtype.itemsize), *[x.word for x in rows]])
    words = columns * dtype.itemsize // word
    return _Walk(dtype, word, words, min(8, (words - 1).bit_length()), ratio)


def _source(steps: Steps, source: Pointer, rows: _Rows, walk: _Walk) -> tuple[Pointer, int]:
    """Where the rows are, and their stride in words."""
    return arrays.add_copy(steps, source, rows.copied), rows.stride // walk.word


# ---- launches ------------------------------------------------------------------------------------------------------

_Source = tuple[Pointer, int]  # where rows are, and their stride in words


def _parents(steps: Steps, shape: Shape) -> Any:
    """The struct Clouds of the parents, whose table is the number "parents"."""
    return clouds.argument(steps, "parents", shape.clouds, shape.bucket_size)


def _sizes(shape: Shape, walk: _Walk, parents: Any) -> tuple[Any, ...]:
    """The arguments of kernels that write to the parents' slots: children, parents, words, lane_bits."""
    return shape.slots, parents, walk.words, walk.lane_bits


def _add_sums(
    steps: Steps, shape: Shape, walk: _Walk, rows: _Source, members: Pointer, out: Pointer, mean: bool
) -> None:
    """Add the sums or means of the members' rows."""
    args = *rows, members, shape.slots, walk.words, walk.lane_bits, int(mean), out
    walk.launch(steps, "pool_sums", shape.slots, args)


def _add_spread(
    steps: Steps,
    shape: Shape,
    walk: _Walk,
    dchild: _Source,
    members: Pointer,
    parents: Any,
    out: Pointer,
    mean: bool,
) -> None:
    """Add the backward of `_add_sums`."""
    args = *dchild, members, *_sizes(shape, walk, parents), int(mean), out
    walk.launch(steps, "spread_sums", shape.slots + shape.padding, args)


def _add_rows(
    steps: Steps,
    shape: Shape,
    walk: _Walk,
    child: _Source,
    members: Pointer,
    skip: _Source | None,
    parents: Any,
    out: Pointer,
) -> None:
    """Add the rows of the children at their members, plus skip."""
    args = *child, *(skip or (None, 0)), members, *_sizes(shape, walk, parents), out
    walk.launch(steps, "unpool_rows", shape.slots + shape.padding, args)


# ---- steps of longer plans -----------------------------------------------------------------------------------------
#
# Rows are contiguous and begin at multiples of 16 bytes. Each slot of the parents that holds a point is in `members`,
# int32 [children, ratio], once. These may be of the layouts of `add_groups`, or of others with the same lengths.
# `parents` is the struct Clouds of a `Layout`.


def add_groups(
    steps: Steps,
    shape: Shape,
    points: Pointer,
    dtype: np.dtype,
    parents: Any,
    children: Any,
    results: tuple[Pointer, ...],
) -> None:
    """Add the grouping of points [slots, 3]. Results: members, child points, slot_to_point, point_to_slot, moved."""
    members, child_points, *layout = results
    args = points, parents, children, shape.ratio, members, child_points, *layout
    kernel = _kernel("pooling_group", "pool_groups", (("POINT", FLOATS.index(dtype)),))
    steps.launch(kernel, grid=shape.tiles, block=GROUP_TILE, args=args)


def add_pool(
    steps: Steps,
    shape: Shape,
    rows: Pointer,
    members: Pointer,
    out: Pointer,
    *,
    columns: int,
    dtype: np.dtype,
    mean: bool = True,
) -> None:
    """Add the means or sums [children, columns] of rows [parents, columns], 0 in padding."""
    walk = _walk(dtype, columns, shape.ratio)
    _add_sums(steps, shape, walk, (rows, walk.words), members, out, mean)


def add_pool_backward(
    steps: Steps,
    shape: Shape,
    dchild: Pointer,
    members: Pointer,
    parents: Any,
    out: Pointer,
    *,
    columns: int,
    dtype: np.dtype,
    mean: bool = True,
) -> None:
    """Add the gradient of `add_pool`, [parents, columns], 0 in padding."""
    walk = _walk(dtype, columns, shape.ratio)
    _add_spread(steps, shape, walk, (dchild, walk.words), members, parents, out, mean)


def add_unpool(
    steps: Steps,
    shape: Shape,
    child: Pointer,
    members: Pointer,
    skip: Pointer | None,
    parents: Any,
    out: Pointer,
    *,
    columns: int,
    dtype: np.dtype,
) -> None:
    """Add the rows of the children at their members, plus skip [parents, columns] if there is one; 0 in padding."""
    walk = _walk(dtype, columns, shape.ratio)
    added = None if skip is None else (skip, walk.words)
    _add_rows(steps, shape, walk, (child, walk.words), members, added, parents, out)


def add_unpool_backward(
    steps: Steps, shape: Shape, dout: Pointer, members: Pointer, out: Pointer, *, columns: int, dtype: np.dtype
) -> None:
    """Add the gradient of the children in `add_unpool`: sums over members. That of skip is dout, if 0 in padding."""
    add_pool(steps, shape, dout, members, out, columns=columns, dtype=dtype, mean=False)


# ---- pool ----------------------------------------------------------------------------------------------------------


def pool(
    features: Given | Spec,
    points: Given | Spec,
    lengths: tuple[int, ...],
    bucket_size: int,
    ratio: int,
    reduce: str,
) -> Call:
    """Inputs: features, points. Results: as in `gpu3d.pooling.pool_results`."""
    layout, copied = layout_of(lengths, bucket_size, ratio), arrays.copied(points, points.dtype.itemsize)
    look = features.dtype, features.shape[1], _rows(features), points.dtype, copied, reduce
    return Call(_pool_plan(layout.shape, *look), {"parents": layout.parents, "children": layout.children})


@functools.lru_cache(maxsize=512)
def _pool_plan(
    shape: Shape,
    dtype: np.dtype,
    columns: int,
    rows: _Rows,
    point_dtype: np.dtype,
    copied: arrays.Strided | None,
    reduce: str,
) -> Plan:
    steps = Steps(inputs=2, results=7)
    child_features, child_points, members, argmember, slot_to_point, point_to_slot, moved = map(Result, range(7))
    if not shape.slots:
        steps.clear(moved, 4)
        return steps.plan()
    points = arrays.add_copy(steps, Input(1), copied)
    parents, children = (
        clouds.argument(steps, name, shape.clouds, shape.bucket_size) for name in ("parents", "children")
    )
    made = members, child_points, slot_to_point, point_to_slot, moved
    add_groups(steps, shape, points, point_dtype, parents, children, made)
    if columns:
        walk = _walk(dtype, columns, shape.ratio, rows)
        source = _source(steps, Input(0), rows, walk)
        if reduce in reference.EXTREMES:
            args = *source, members, shape.slots, walk.words, walk.lane_bits, int(reduce == "max")
            walk.launch(steps, "pool_extremes", shape.slots, (*args, child_features, argmember))
        else:
            _add_sums(steps, shape, walk, source, members, child_features, reduce == "mean")
    return steps.plan()


def pool_backward(
    dchild: Spec,
    members: Spec,
    argmember: Spec | None,
    lengths: tuple[int, ...],
    bucket_size: int,
    ratio: int,
    reduce: str,
) -> Call:
    """Inputs: dchild, members, argmember. Result: dfeatures."""
    layout = layout_of(lengths, bucket_size, ratio)
    columns, rows = dchild.shape[1], _rows(dchild)
    copied = [_members(members, ratio), None]
    if reduce in reference.EXTREMES:
        assert argmember is not None
        copied[1] = arrays.copied(argmember, 8)  # struct Places has up to 8 bytes
    plan = _pool_backward_plan(layout.shape, dchild.dtype, columns, rows, *copied, reduce)
    return Call(plan, {"parents": layout.parents})


@functools.lru_cache(maxsize=512)
def _pool_backward_plan(
    shape: Shape,
    dtype: np.dtype,
    columns: int,
    rows: _Rows,
    copied_members: arrays.Strided | None,
    copied_argmember: arrays.Strided | None,
    reduce: str,
) -> Plan:
    steps = Steps(inputs=3, results=1)
    if shape.slots and columns:
        walk = _walk(dtype, columns, shape.ratio, rows)
        source = _source(steps, Input(0), rows, walk)
        members = arrays.add_copy(steps, Input(1), copied_members)
        parents = _parents(steps, shape)
        if reduce in reference.EXTREMES:
            argmember = arrays.add_copy(steps, Input(2), copied_argmember)
            args = *source, argmember, members, *_sizes(shape, walk, parents), Result(0)
            walk.launch(steps, "spread_extremes", shape.slots + shape.padding, args)
        else:
            _add_spread(steps, shape, walk, source, members, parents, Result(0), reduce == "mean")
    return steps.plan()


# ---- unpool --------------------------------------------------------------------------------------------------------


def unpool(
    child: Spec, members: Spec, skip: Spec | None, lengths: tuple[int, ...], bucket_size: int, ratio: int
) -> Call:
    """Inputs: child, members, skip. Result: out."""
    layout = layout_of(lengths, bucket_size, ratio)
    added = None if skip is None else _rows(skip)
    copied = _members(members, ratio)
    plan = _unpool_plan(layout.shape, child.dtype, child.shape[1], _rows(child), copied, added)
    return Call(plan, {"parents": layout.parents})


@functools.lru_cache(maxsize=512)
def _unpool_plan(
    shape: Shape, dtype: np.dtype, columns: int, rows: _Rows, copied: arrays.Strided | None, added: _Rows | None
) -> Plan:
    steps = Steps(inputs=3, results=1)
    if shape.slots and columns:
        walk = _walk(dtype, columns, shape.ratio, *([rows] if added is None else [rows, added]))
        child = _source(steps, Input(0), rows, walk)
        skip = None if added is None else _source(steps, Input(2), added, walk)
        members = arrays.add_copy(steps, Input(1), copied)
        _add_rows(steps, shape, walk, child, members, skip, _parents(steps, shape), Result(0))
    return steps.plan()


def unpool_backward(dout: Spec, members: Spec, lengths: tuple[int, ...], bucket_size: int, ratio: int) -> Call:
    """Inputs: dout, members. Results: dchild, dskip."""
    layout = layout_of(lengths, bucket_size, ratio)
    copied = _members(members, ratio)
    plan = _unpool_backward_plan(layout.shape, dout.dtype, dout.shape[1], _rows(dout), copied)
    return Call(plan, {"parents": layout.parents})


@functools.lru_cache(maxsize=512)
def _unpool_backward_plan(
    shape: Shape, dtype: np.dtype, columns: int, rows: _Rows, copied: arrays.Strided | None
) -> Plan:
    steps = Steps(inputs=2, results=2)
    if shape.slots and columns:
        walk = _walk(dtype, columns, shape.ratio, rows)
        source = _source(steps, Input(0), rows, walk)
        members = arrays.add_copy(steps, Input(1), copied)
        args = *source, members, *_sizes(shape, walk, _parents(steps, shape)), Result(0), Result(1)
        walk.launch(steps, "unpool_sums", shape.slots + shape.padding, args)
    return steps.plan()
