# SPDX-License-Identifier: Apache-2.0
"""The plans of chamfer and its gradient: kernels_cu/chamfer.cu, after the search of kernels_cu/neighbors_*.cu.

The forward call writes residuals, which gpu3d.reference.chamfer describes. They and the points are all that the
backward call needs. `chamfer_value_and_grad` does both in one plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOAT64, FLOATS, Spec
from gpu3d.cuda import arrays, clouds, neighbors
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.neighbors import Index, Layout, Side, Tables
from gpu3d.cuda.plan import Call, Device, Input, Kernel, Number, Packed, Plan, Pointer, Result, Steps
from gpu3d.reference.chamfer import SUM_TILE

THREADS = 256  # the same constant as in chamfer.cu

# The parameters of each kernel as formats of the module struct. c stands for struct Clouds; l, s and u for the structs
# Losses, Side and Upstream of chamfer.cu.
_SIGNATURES = {
    "chamfer_tiles": "llcci",
    "chamfer_losses": "llccQQQQiii",
    "chamfer_give": "sscci",
    "chamfer_gradient": "sscciu",
}
_LOSSES, _SIDE, _UPSTREAM = "<QQQQ", "<QQQQQQQ", "<Qqi4x"
_FORMATS = {"c": clouds.FORMAT, "l": "32s", "s": "56s", "u": "24s"}

Contiguous = Callable[[int, np.dtype], Pointer]  # (i, dtype) -> the contiguous rows [N, 3] of side i in that dtype


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("chamfer", (("POINT", p),)) for p in range(len(FLOATS))]


@functools.cache
def _kernel(function: str, dtype: np.dtype) -> Kernel:
    """A kernel of chamfer.cu for points of this dtype."""
    formats = "".join(_FORMATS.get(kind, kind) for kind in _SIGNATURES[function])
    return Kernel("chamfer", function, formats, (("POINT", FLOATS.index(dtype)),))


def _common(x: np.dtype, y: np.dtype) -> np.dtype:
    """The dtype to which both batches are widened."""
    if x == y:
        return x
    return FLOAT64 if FLOAT64 in (x, y) else FLOAT32


# ---- calls ---------------------------------------------------------------------------------------------------------


def chamfer(
    x: Spec,
    x_lengths: tuple[int, ...],
    y: Spec,
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    device: Device,
    *,
    x_index: bool = False,
    y_index: bool = False,
    gradients: bool = False,
) -> Call:
    """Inputs: x, y, and the memory of each index that is given. Results: loss, residuals.

    With `gradients`, the results are the loss and the gradients of x and y.
    """
    return _chamfer(x_lengths, y_lengths, x, y, squared, reduction, device, x_index, y_index, gradients)


@clouds.remembered
def _chamfer(
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    x: Spec,
    y: Spec,
    squared: bool,
    reduction: str,
    device: Device,
    x_index: bool,
    y_index: bool,
    gradients: bool,
) -> Call:
    wide = FLOAT64 in (x.dtype, y.dtype)
    together = not (x_index or y_index or wide)
    sorts = [not together and (wide or not index) for index in (x_index, y_index)]
    of_x, x_tables = neighbors.side(x, x_lengths, x_index, device if sorts[0] else None)
    of_y, y_tables = neighbors.side(y, y_lengths, y_index, device if sorts[1] else None)
    numbers = {**x_tables.numbers("x"), **y_tables.numbers("y"), **_numbers(x_tables, y_tables, reduction, x_lengths)}
    both = None
    if together:
        both, tables = neighbors.pair_layout(x_lengths, y_lengths, device)
        numbers |= tables.numbers("both")
    return Call(_chamfer_plan(of_x, of_y, both, squared, reduction == "none", gradients), numbers)


def chamfer_backward(
    dloss: Spec | None,
    x: Spec,
    y: Spec,
    residuals: Spec,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
) -> Call:
    """Inputs: dloss, x, y, residuals. Results: the gradients of x and y. No dloss means 1."""
    of_x, x_tables = neighbors.side(x, x_lengths, False, None)
    of_y, y_tables = neighbors.side(y, y_lengths, False, None)
    numbers = {**x_tables.numbers("x"), **y_tables.numbers("y"), **_numbers(x_tables, y_tables, reduction, x_lengths)}
    rows = dloss and _as_rows(dloss)
    rows = rows and arrays.canonical(rows, rows.shape[0])
    return Call(_backward_plan(rows, of_x, of_y, arrays.copied(residuals, 4), squared, reduction == "none"), numbers)


def _numbers(x: Tables, y: Tables, reduction: str, lengths: tuple[int, ...]) -> dict[str, int]:
    """The number of losses to average, and where the parts of the residuals begin, except for the parts per cloud."""
    n, m = x.points, y.points
    return {
        "parts": len(lengths) if reduction == "mean" else 1,
        "d2 of x": 4 * n,
        "behind x": 8 * n,
        "d2 of y": 8 * n + 4 * m,
        "behind y": 8 * n + 8 * m,
    }


def _as_rows(dloss: Spec) -> Spec:
    """A loss [] or [B] as rows [B, 1]."""
    shape, dtype, strides, misalignment = dloss
    strides = None if strides is None else (*(strides or (dtype.itemsize,)), dtype.itemsize)
    return Spec((*(shape or (1,)), 1), dtype, strides, misalignment)


# ---- plans ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _chamfer_plan(x: Side, y: Side, both: Layout | None, squared: bool, each: bool, gradients: bool) -> Plan:
    steps = Steps(inputs=2 + x.indexed + y.indexed, results=3 if gradients else 2)
    contiguous = _contiguous(steps, (x, y), 0)
    layouts = x.layout, y.layout
    residuals = _residuals_in_workspace(steps, *layouts) if gradients else _residuals_at(Result(1), x.layout.clouds)
    add = _add_separately if both is None else functools.partial(_add_together, both)
    indices, queries = add(steps, (x, y), contiguous)
    _add_loss(steps, (x, y), indices, queries, residuals, squared, each)
    if gradients:
        upstream = Packed(_UPSTREAM, (None, 0, Number("parts")))
        _add_gradients(steps, (x, y), contiguous, indices, residuals, squared, upstream, (Result(1), Result(2)))
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _backward_plan(
    dloss: Spec | None, x: Side, y: Side, copied: arrays.Strided | None, squared: bool, each: bool
) -> Plan:
    steps = Steps(inputs=4, results=2)
    contiguous = _contiguous(steps, (x, y), 1)
    upstream: tuple[Any, ...] = None, 0
    if dloss is not None:
        upstream = arrays.add_rows(steps, Input(0), arrays.rows(dloss, FLOAT32, 1)), int(each)
    residuals = _residuals_at(arrays.add_copy(steps, Input(3), copied), x.layout.clouds)
    indices = []
    for i, (name, of_side) in enumerate((("x", x), ("y", y))):
        batch, origins = neighbors.argument(steps, name, of_side.layout), None
        if of_side.spec.dtype == FLOAT64:
            origins = steps.workspace("origins", 24 * of_side.layout.clouds)
            nodes = of_side.layout.clouds, of_side.layout.nodes
            arrays.add_origins(steps, contiguous(i, FLOAT64), batch, *nodes, origins)
        indices.append(_Searched(batch, origins))
    packed = Packed(_UPSTREAM, (*upstream, Number("parts")))
    _add_gradients(steps, (x, y), contiguous, indices, residuals, squared, packed, (Result(0), Result(1)))
    return steps.plan()


class _Searched(NamedTuple):
    """The parts of an index that the gradient needs."""

    clouds: Number | Packed
    origins: Pointer | None


def _contiguous(steps: Steps, sides: tuple[Side, Side], first: int) -> Contiguous:
    """The points of both sides as contiguous rows. Side i is input `first` + i, converted once for each dtype."""

    @functools.cache
    def contiguous(i: int, dtype: np.dtype) -> Pointer:
        rows = arrays.rows(sides[i].spec, dtype, 3)
        return arrays.add_rows(steps, Input(first + i), rows, None, Number(f"{'xy'[i]} points"))

    return contiguous


def _add_together(
    both: Layout, steps: Steps, sides: tuple[Side, Side], contiguous: Contiguous
) -> tuple[tuple[Index, Index], tuple[Pointer, Pointer]]:
    """Add both indices, and the rows that search the other one, in common launches: there are no origins."""
    x, y = sides
    dtype = _common(x.spec.dtype, y.spec.dtype)
    points = contiguous(0, dtype), contiguous(1, dtype)
    indices = neighbors.add_pair(steps, points, dtype, (x.layout, y.layout), both, ("x", "y", "both"))
    return indices, (indices[0].rows, indices[1].rows)


def _add_separately(
    steps: Steps, sides: tuple[Side, Side], contiguous: Contiguous
) -> tuple[tuple[Index, Index], tuple[Pointer, Pointer]]:
    """Add both indices, and the rows that search the other one, if an index is given or coordinates have origins."""
    indices: list[Index] = []
    orders: list[Any] = []
    memories = iter((Input(2), Input(3)))
    for i, (name, (spec, layout, index)) in enumerate(zip(("x", "y"), sides, strict=True)):
        batch, order = neighbors.argument(steps, name, layout), None
        if index:
            indices.append(neighbors.index_at(next(memories), layout, spec.dtype, batch))
        else:
            points = contiguous(i, spec.dtype)
            order = neighbors.add_order(steps, points, spec.dtype, name, layout)
            indices.append(neighbors.add_index(steps, points, spec.dtype, order, name, layout, batch))
        orders.append(order)
    x, y = indices
    queries = [x.rows, y.rows]
    if x.origins is not None or y.origins is not None:
        for i, (own, other) in enumerate(((x, y), (y, x))):
            dtype = sides[i].spec.dtype if other.origins is None else FLOAT64
            if sides[i].indexed:  # its rows are sorted, but its points are not
                spec, layout, _ = sides[i]
                orders[i] = neighbors.add_order(steps, contiguous(i, spec.dtype), spec.dtype, "xy"[i], layout)
            rows = contiguous(i, dtype), dtype, orders[i], sides[i].layout, own.clouds, other.origins
            queries[i] = neighbors.add_queries(steps, *rows)
    return (x, y), (queries[0], queries[1])


class _Residuals(NamedTuple):
    """Where the parts of the residuals begin, for x and y."""

    nearest: tuple[Pointer, Pointer]
    d2: tuple[Pointer, Pointer]
    largest: tuple[Pointer, Pointer]


def _residuals_at(memory: Pointer, clouds: int) -> _Residuals:
    """The parts in the order of gpu3d.reference.chamfer.residual_parts."""
    behind_x = memory + Number("behind x")
    return _Residuals(
        nearest=(memory, behind_x + 4 * clouds),
        d2=(memory + Number("d2 of x"), memory + 4 * clouds + Number("d2 of y")),
        largest=(behind_x, memory + 4 * clouds + Number("behind y")),
    )


def _residuals_in_workspace(steps: Steps, x: Layout, y: Layout) -> _Residuals:
    parts = [
        (
            steps.workspace("nearest", 4 * of.points),
            steps.workspace("d2", 4 * of.points),
            steps.workspace("largest", 4 * of.clouds),
        )
        for of in (x, y)
    ]
    return _Residuals(*zip(*parts, strict=True))


def _add_loss(
    steps: Steps,
    sides: tuple[Side, Side],
    indices: tuple[Index, Index],
    queries: tuple[Pointer, Pointer],
    residuals: _Residuals,
    squared: bool,
    each: bool,
) -> None:
    """Add the steps that write the residuals, and the loss of `each` cloud or of all to the first result."""
    layouts = sides[0].layout, sides[1].layout
    count, dtype = layouts[0].clouds, _common(sides[0].spec.dtype, sides[1].spec.dtype)
    losses, known = steps.workspace("losses", 8 * count), steps.workspace("known", 4)
    found = residuals.d2, residuals.nearest, known
    neighbors.add_knn_both(steps, ("x", "y"), queries, layouts, indices, *found)
    summed = [
        Packed(_LOSSES, (d2, steps.workspace("sums", 8 * of.nodes), steps.workspace("most", 4 * of.nodes), largest))
        for of, d2, largest in zip(layouts, residuals.d2, residuals.largest, strict=True)
    ]
    batches, tiled = (indices[0].clouds, indices[1].clouds), not (layouts[0].single and layouts[1].single)
    if tiled:  # otherwise chamfer_losses does it
        nodes, kernel = layouts[0].nodes + layouts[1].nodes, _kernel("chamfer_tiles", dtype)
        steps.launch(kernel, grid=nodes, block=SUM_TILE, args=(*summed, *batches, int(squared)))
    to = (Result(0), None) if each else (None, Result(0))
    args = *summed, *batches, losses, known, *to, Number("parts"), int(tiled), int(squared)
    steps.launch(_kernel("chamfer_losses", dtype), grid=max(1, count), block=SUM_TILE, args=args)


def _add_gradients(
    steps: Steps,
    sides: tuple[Side, Side],
    contiguous: Contiguous,
    searched: Any,
    residuals: _Residuals,
    squared: bool,
    upstream: Packed,
    results: tuple[Pointer, Pointer],
) -> None:
    """Add the gradients of both sides in their dtypes. `searched` has the clouds and origins of each."""
    common, most = _common(sides[0].spec.dtype, sides[1].spec.dtype), [side.layout.points for side in sides]
    given = steps.workspace("contributions", 24 * sum(most))
    steps.clear(given, 24 * sum(most))
    pulled, narrowed = [], []
    for i, (spec, _, _) in enumerate(sides):
        made = Spec((most[i], 3), common)
        rows = arrays.rows(made, spec.dtype, spec.shape[-1])
        out = results[i] if rows is None else steps.workspace("gradient", made.nbytes)
        narrowed.append((out, rows, results[i]))
        of_search = residuals.nearest[i], residuals.d2[i], residuals.largest[i]
        to = given + 24 * i * most[0], out
        pulled.append(Packed(_SIDE, (contiguous(i, common), searched[i].origins, *of_search, *to)))
    grid, batches = -(-sum(most) // THREADS), (searched[0].clouds, searched[1].clouds)
    for function, more in (("chamfer_give", ()), ("chamfer_gradient", (upstream,))):
        args = *pulled, *batches, int(squared), *more
        steps.launch(_kernel(function, common), grid=grid, block=THREADS, args=args)
    for i, (out, rows, result) in enumerate(narrowed):
        arrays.add_rows(steps, out, rows, result, Number(f"{'xy'[i]} points"))
