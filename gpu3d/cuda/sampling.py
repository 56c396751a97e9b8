# SPDX-License-Identifier: Apache-2.0
"""The plans of farthest_points and voxel_downsample: kernels_cu/sampling_*.cu."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOAT64, FLOATS, Spec
from gpu3d.cuda import arrays, clouds, neighbors
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Input, Kernel, Number, Plan, Result, Steps
from gpu3d.reference.sampling import REDUCTIONS

FARTHEST_THREADS = (128, 256, 512, 1024)  # THREADS of sampling_farthest.cu: the fewest that hold the largest cloud
FARTHEST_ITEMS: dict[np.dtype, int] = {FLOAT32: 8, FLOAT64: 4}  # points that a thread of sampling_farthest.cu holds
PRUNED_THREADS = PRUNED_BUCKETS = 1024
VOXELS_THREADS, VOXELS_GRID_THREADS = 256, 512
VOXELS_GROUP = 4096  # points whose bounds a block of voxels_grids finds
REDUCE_THREADS = 128
REDUCE_SUM, REDUCE_MEAN, REDUCE_MIN, REDUCE_MAX = range(len(REDUCTIONS))

GRID_BYTES = {4: 40, 8: 48}  # struct Grid of sampling_voxels.cu, by the bytes of a coordinate
ENTRIES = 2  # entries of the table of voxels for a point
ENTRY_BYTES = 16  # a voxel, its first point, and the number of its points


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    wide = [_of(dtype) for dtype in FARTHEST_ITEMS]
    found = [Configuration("sampling_farthest", (p, ("THREADS", t))) for p in wide for t in FARTHEST_THREADS]
    found += [Configuration("sampling_pruned", (p,)) for p in wide]
    found += [Configuration("sampling_voxels", (_of(dtype),)) for dtype in FLOATS]
    return found + [Configuration("sampling_reduce", (("ELEMENT", e),)) for e in range(len(FLOATS))]


def _of(dtype: np.dtype) -> tuple[str, int]:
    return "POINT", FLOATS.index(dtype)


# ---- farthest_points -----------------------------------------------------------------------------------------------


def farthest_points(points: Spec, lengths: tuple[int, ...], k: int, start: int, device: Device) -> Call:
    """Input: points. Result: indices int32 [clouds * k]."""
    return _farthest_points(lengths, points, k, start, device)


@clouds.remembered
def _farthest_points(lengths: tuple[int, ...], points: Spec, k: int, start: int, device: Device) -> Call:
    dtype = FLOAT64 if points.dtype == FLOAT64 else FLOAT32
    largest = max(lengths, default=0)
    threads = next((t for t in FARTHEST_THREADS if t * FARTHEST_ITEMS[dtype] >= largest), None)
    layout, tables = neighbors.layout(lengths, device if threads is None else None)
    points = arrays.canonical(points, layout.points)
    numbers = {**tables.numbers("points"), "k": k, "start": start}
    if threads is None:
        return Call(_pruned_plan(points, dtype, layout), numbers)
    return Call(_farthest_plan(points, dtype, layout, threads), numbers)


@functools.lru_cache(maxsize=256)
def _farthest_plan(points: Spec, dtype: np.dtype, layout: neighbors.Layout, threads: int) -> Plan:
    """A block for each cloud, whose threads hold its points."""
    steps = Steps(inputs=1, results=1)
    rows = arrays.add_rows(steps, Input(0), arrays.rows(points, dtype, 3), None, Number("points points"))
    batch = neighbors.argument(steps, "points", layout)
    macros = _of(dtype), ("THREADS", threads)
    kernel = Kernel("sampling_farthest", "farthest_points", f"Q{clouds.FORMAT}iiQ", macros)
    args = rows, batch, Number("k"), Number("start"), Result(0)
    steps.launch(kernel, grid=layout.clouds, block=threads, args=args)
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _pruned_plan(points: Spec, dtype: np.dtype, layout: neighbors.Layout) -> Plan:
    """A sort into bucket order, and then a block for each cloud."""
    steps = Steps(inputs=1, results=1)
    given = arrays.add_rows(steps, Input(0), arrays.rows(points, dtype, 3), None, Number("points points"))
    order = neighbors.add_order(steps, given, dtype, "points", layout)
    batch = neighbors.argument(steps, "points", layout)
    rows = steps.workspace("rows in bucket order", 4 * dtype.itemsize * layout.points)
    nearest = steps.workspace("nearest", dtype.itemsize * layout.points)
    boxes = steps.workspace("boxes", 6 * dtype.itemsize * PRUNED_BUCKETS * layout.clouds)
    kernel = Kernel("sampling_pruned", "pruned_points", f"QQ{clouds.FORMAT}iiQQQQ", (_of(dtype),))
    args = given, order, batch, Number("k"), Number("start"), rows, nearest, boxes, Result(0)
    steps.launch(kernel, grid=layout.clouds, block=PRUNED_THREADS, args=args)
    return steps.plan()


# ---- voxel_downsample ----------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """A batch of clouds, as far as the plan of `voxels` depends on it."""

    clouds: int
    points: int  # an upper bound, as the next
    groups: int


def voxels(points: Spec, lengths: tuple[int, ...], size: float) -> Call:
    """The first of two calls. Input: points. Results: what sampling_voxels.cu says of voxels_lists.

    These are point_to_voxel int32 [N], members int32 [N], starts int32 [N + 1] and voxels_before int64 [clouds].
    """
    layout, table = _layout(lengths)
    numbers = {"clouds": table, "points": sum(lengths), "size": size}
    return Call(_voxels_plan(arrays.canonical(points, layout.points), layout), numbers)


@clouds.remembered
def _layout(lengths: tuple[int, ...]) -> tuple[_Layout, clouds.Table]:
    n: Any = clouds.array(lengths) if len(lengths) > clouds.INLINE_CLOUDS else lengths
    groups: Any = -(-n // VOXELS_GROUP) if isinstance(n, np.ndarray) else [-(-m // VOXELS_GROUP) for m in n]
    most = neighbors.layout(lengths, None)[0].points
    layout = _Layout(len(lengths), most, most // VOXELS_GROUP + len(lengths))
    return layout, clouds.table(n, neighbors.TILE, None, groups)


@functools.lru_cache(maxsize=256)
def _voxels_plan(points: Spec, layout: _Layout) -> Plan:
    steps = Steps(inputs=1, results=4)
    n, size, most = Number("points"), Number("size"), layout.points
    rows = arrays.add_rows(steps, Input(0), arrays.rows(points, points.dtype, 3), None, n)
    batch = clouds.argument(steps, "clouds", layout.clouds, neighbors.TILE)
    macros = (_of(points.dtype),)
    coordinate = 8 if points.dtype == FLOAT64 else 4
    arrived = steps.workspace("arrived", 4 * layout.clouds)
    steps.clear(arrived, 4 * layout.clouds)
    bounds = steps.workspace("bounds", 6 * coordinate * layout.groups)
    grids = steps.workspace("grids", GRID_BYTES[coordinate] * layout.clouds)
    kernel = Kernel("sampling_voxels", "voxels_grids", f"Q{clouds.FORMAT}fQQQ", macros)
    args: tuple[Any, ...] = rows, batch, size, arrived, bounds, grids
    steps.launch(kernel, grid=layout.groups, block=VOXELS_GRID_THREADS, args=args)

    table = steps.workspace("table", ENTRY_BYTES * ENTRIES * most)
    steps.clear(table, ENTRY_BYTES * ENTRIES * most, 255)
    first, number = table + 8 * ENTRIES * most, table + 12 * ENTRIES * most
    entry, arrival = steps.workspace("entries", 4 * most), steps.workspace("arrivals", 4 * most)
    launch, blocks = functools.partial(steps.launch, block=VOXELS_THREADS), -(-most // VOXELS_THREADS)
    kernel = Kernel("sampling_voxels", "voxels_insert", f"Q{clouds.FORMAT}fQQQQQQ", macros)
    launch(kernel, grid=blocks, args=(rows, batch, size, grids, table, first, number, entry, arrival))
    flags, sums = steps.workspace("flags", 8 * most), steps.workspace("sums", 8 * (most + 1))
    kernel = Kernel("sampling_voxels", "voxels_flags", "qQQQQ", macros)
    launch(kernel, grid=blocks, args=(n, entry, first, number, flags))
    arrays.add_offsets(steps, flags, n, most, sums, steps.workspace("total", 8))
    kernel = Kernel("sampling_voxels", "voxels_lists", f"{clouds.FORMAT}QQQQQQQQQ", macros)
    args = batch, grids, entry, first, arrival, sums, *map(Result, range(4))
    launch(kernel, grid=max(1, blocks, -(-layout.clouds // VOXELS_THREADS)), args=args)
    return steps.plan()


def voxel_rows(points: Spec, features: Spec | None, voxels: int, reduce: str) -> Call:
    """The second of two calls. Inputs: points, members, starts, features if there are any.

    Results: points and counts of the voxels, and their features. Long lists of members are sorted in place.
    """
    n = math.prod(points.shape[:-1])
    columns, copied, dtype = 0, None, None
    if features is not None:
        columns, dtype = math.prod(features.shape) // max(n, 1), features.dtype
        copied = arrays.copied(features, dtype.itemsize)
    numbers = {"points": n, "voxels": voxels, "columns": columns, "reduction": REDUCTIONS.index(reduce)}
    room = _capacity(n)
    plan = _rows_plan(arrays.canonical(points, room), room, _capacity(voxels), dtype, columns > 0, copied)
    return Call(plan, numbers)


def _capacity(rows: int) -> int:
    """The next power of two, so that there are few plans. The exact number is a number of the call."""
    return 1 << (rows - 1).bit_length() if rows else 0


@functools.lru_cache(maxsize=256)
def _rows_plan(
    points: Spec, room: int, most: int, dtype: np.dtype | None, columns: bool, copied: arrays.Strided | None
) -> Plan:
    """Up to `room` points and `most` voxels; `dtype` is that of the features, if there are any."""
    steps = Steps(inputs=3 + (dtype is not None), results=2 + (dtype is not None))
    rows = arrays.add_rows(steps, Input(0), arrays.rows(points, points.dtype, 3), None, Number("points"))
    members, starts, voxels = Input(1), Input(2), Number("voxels")
    launch = functools.partial(steps.launch, grid=-(-most // (REDUCE_THREADS // 32)), block=REDUCE_THREADS)
    spare = steps.workspace("spare", 4 * room)
    kernel = Kernel("sampling_reduce", "reduce_points", "QiQiQQQQ", (("ELEMENT", FLOATS.index(points.dtype)),))
    launch(kernel, args=(rows, points.shape[-1], starts, voxels, members, spare, Result(0), Result(1)))
    if dtype is not None and columns:
        features = arrays.add_copy(steps, Input(3), copied)
        kernel = Kernel("sampling_reduce", "reduce_features", "QqiQiQQ", (("ELEMENT", FLOATS.index(dtype)),))
        args = features, Number("columns"), Number("reduction"), starts, voxels, members, Result(2)
        launch(kernel, args=args)
    return steps.plan()
