# SPDX-License-Identifier: Apache-2.0
"""The plan of normals: a search by kernels_cu/neighbors_*.cu, and kernels_cu/surface_normals.cu over its indices."""

from __future__ import annotations

import functools
import struct

import numpy as np

from gpu3d._arrays import FLOAT64, FLOATS, Spec
from gpu3d.cuda import arrays, clouds, neighbors
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Input, Kernel, Macros, Number, Plan, Result, Steps

THREADS = 128  # the same constant as in surface_normals.cu

_VIEWPOINT = struct.Struct("<3di4x")  # struct Viewpoint


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("surface_normals", _macros(dtype)) for dtype in FLOATS]


def _macros(dtype: np.dtype) -> Macros:
    return neighbors.of_real(dtype == FLOAT64, ("POINT", FLOATS.index(dtype)))


def normals(
    points: Spec, lengths: tuple[int, ...], k: int, viewpoint: tuple[float, ...] | None, device: Device
) -> Call:
    """Input: points. Results: normals [N, 3] and curvature [N], float32 or for float64 points float64."""
    return _normals(lengths, points, k, viewpoint, device)


@clouds.remembered
def _normals(
    lengths: tuple[int, ...], points: Spec, k: int, viewpoint: tuple[float, ...] | None, device: Device
) -> Call:
    of_points, tables = neighbors.side(points, lengths, False, device)
    given = (0.0, 0.0, 0.0) if viewpoint is None else viewpoint
    seen_from = _VIEWPOINT.pack(*given, viewpoint is not None)
    return Call(_plan(of_points, k), {**tables.numbers("points"), "k": k, "viewpoint": seen_from})


@functools.lru_cache(maxsize=256)
def _plan(points: neighbors.Side, k: int) -> Plan:
    steps = Steps(inputs=1, results=2)
    dtype, layout = points.spec.dtype, points.layout
    contiguous = arrays.add_rows(steps, Input(0), arrays.rows(points.spec, dtype, 3), None, Number("points points"))
    order = neighbors.add_order(steps, contiguous, dtype, "points", layout)
    batch = neighbors.argument(steps, "points", layout)
    wide = dtype == FLOAT64
    index = neighbors.add_index(steps, contiguous, dtype, order, "points", layout, batch)
    pairs = layout.points * k
    found = steps.workspace("distances", (8 if wide else 4) * pairs), steps.workspace("indices", 4 * pairs)
    queries = neighbors.Queries(index.rows, batch, Number("points slots"))
    lists = neighbors.lists_of(k)
    neighbors.add_knn(steps, queries, layout, index, lists, False, neighbors.NO_LIMITS, found, wide)
    signature = f"QiQQi{_VIEWPOINT.size}sQQ"
    kernel = Kernel("surface_normals", "normals_and_curvature", signature, _macros(dtype))
    args = index.rows, queries.slots, contiguous, found[1], Number("k"), Number("viewpoint"), Result(0), Result(1)
    steps.launch(kernel, grid=-(-layout.slots // THREADS), block=THREADS, args=args)
    return steps.plan()
