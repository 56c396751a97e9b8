# SPDX-License-Identifier: Apache-2.0
"""The plans of chamfer and its gradient: kernels_cu/chamfer.cu, after the search of kernels_cu/neighbors_*.cu.

The forward call writes residuals, which gpu3d.reference.chamfer describes. They and the points are all that the
backward call needs. `chamfer_value_and_grad` does both in one plan. `search` and `add_search` prepare two batches and
search each in the other; gpu3d.cuda.metrics uses them too.
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
from gpu3d.reference.chamfer import DIRECTIONS, SUM_TILE

THREADS = 256  # the same constant as in chamfer.cu

# The parameters of each kernel as formats of the module struct. c stands for struct Clouds; l, s, u, o and w for the
# structs Losses, Side, Upstream, Distances and Weighted of chamfer.cu.
_SIGNATURES = {
    "chamfer_tiles": "llcci",
    "chamfer_losses": "llccQQQQiii",
    "chamfer_give": "sscci",
    "chamfer_gradient": "sscciu",
    "chamfer_distances": "oocci",
    "chamfer_weighted_largest": "wwcci",
    "chamfer_weighted_give": "wwcci",
    "chamfer_weighted_gradient": "wwcci",
}
_LOSSES, _SIDE, _UPSTREAM, _DISTANCES, _WEIGHTED = "<QQQQ", "<QQQQQQ", "<Qqi4x", "<QQ", "<QQQQQQQ"
_FORMATS = {"c": clouds.FORMAT, "l": "32s", "s": "48s", "u": "24s", "o": "16s", "w": "56s"}

Contiguous = Callable[[int, np.dtype], Pointer]  # (i, dtype) -> the contiguous rows [N, 3] of side i in that dtype


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("chamfer", (("POINT", p),)) for p in range(len(FLOATS))]


@functools.cache
def _kernel(function: str, dtype: np.dtype) -> Kernel:
    """A kernel of chamfer.cu for points of this dtype."""
    formats = "".join(_FORMATS.get(kind, kind) for kind in _SIGNATURES[function])
    return Kernel("chamfer", function, formats, (("POINT", FLOATS.index(dtype)),))


# ---- calls ---------------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """Two batches that search each other, as far as a plan depends on them."""

    x: Side
    y: Side
    both: Layout | None  # if both are prepared together
    directions: tuple[bool, bool]  # whether x's points search y, and y's points x

    @property
    def wide(self) -> bool:
        """Whether distances, losses and the search are in float64."""
        return neighbors.is_wide(self.x.spec, self.y.spec)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of distances and losses."""
        return FLOAT64 if self.wide else FLOAT32

    @property
    def common(self) -> np.dtype:
        """The dtype of coordinates, to which both batches are widened."""
        return self.x.spec.dtype if self.x.spec.dtype == self.y.spec.dtype else self.dtype

    @property
    def sides(self) -> tuple[Side, Side]:
        """The two batches."""
        return self.x, self.y

    @property
    def points(self) -> int:
        """The most points that search."""
        return sum([side.layout.points for side in self.sides_that_search])

    @property
    def sides_that_search(self) -> list[Side]:
        """The batches whose points search."""
        return [side for side, searches in zip(self.sides, self.directions, strict=True) if searches]


@clouds.remembered
def search(
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    x: Spec,
    y: Spec,
    direction: str,
    device: Device | None,
    x_index: bool,
    y_index: bool,
) -> tuple[Search, dict[str, Any]]:
    """Two batches that search each other, and the numbers of the call. Without a device nothing is sorted."""
    wide = neighbors.is_wide(x, y)
    together = device is not None and not (x_index or y_index)
    sorts = [not (together or index) for index in (x_index, y_index)]
    of_x, x_tables = neighbors.side(x, x_lengths, x_index, device if sorts[0] else None)
    of_y, y_tables = neighbors.side(y, y_lengths, y_index, device if sorts[1] else None)
    numbers = {**x_tables.numbers("x", wide), **y_tables.numbers("y", wide)}
    numbers |= _numbers(x_tables, y_tables, direction, 8 if wide else 4)
    both = None
    if device is not None and together:
        both, tables = neighbors.pair_layout(x_lengths, y_lengths, device)
        numbers |= tables.numbers("both")
    return Search(of_x, of_y, both, DIRECTIONS[direction]), numbers


def _numbers(x: Tables, y: Tables, direction: str, size: int) -> dict[str, int]:
    """The bytes of the points' distances, of `size` bytes each, and of their indices.

    "first" is the batch that searches, or x if both do, and then the other batch is y.
    """
    n, *others = [tables.points for tables, searches in zip((x, y), DIRECTIONS[direction], strict=True) if searches]
    distances = size * (n + sum(others))
    return {
        "distances of first": size * n,
        "nearest of first": 4 * n,
        "distances": distances,
        "distances and nearest of first": distances + 4 * n,
    }


def chamfer(
    x: Spec,
    x_lengths: tuple[int, ...],
    y: Spec,
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
    device: Device,
    *,
    x_index: bool = False,
    y_index: bool = False,
    gradients: bool = False,
) -> Call:
    """Inputs: x, y, and the memory of each index that is given. Results: loss, residuals.

    With `gradients`, the results are the loss and the gradients of x and y.
    """
    return _chamfer(x_lengths, y_lengths, x, y, squared, reduction, direction, device, x_index, y_index, gradients)


@clouds.remembered
def _chamfer(
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    x: Spec,
    y: Spec,
    squared: bool,
    reduction: str,
    direction: str,
    device: Device,
    x_index: bool,
    y_index: bool,
    gradients: bool,
) -> Call:
    found, numbers = search(x_lengths, y_lengths, x, y, direction, device, x_index, y_index)
    plan = _chamfer_plan(found, squared, reduction == "none", gradients)
    return Call(plan, {**numbers, "parts": len(x_lengths) if reduction == "mean" else 1})


def chamfer_backward(
    dloss: Spec | None,
    x: Spec,
    y: Spec,
    residuals: Spec,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
) -> Call:
    """Inputs: dloss, x, y, residuals. Results: the gradients of x and y. No dloss means 1."""
    found, numbers = search(x_lengths, y_lengths, x, y, direction, None, False, False)
    rows = dloss and _as_rows(dloss)
    rows = rows and arrays.canonical(rows, rows.shape[0])
    copied = arrays.copied(residuals, found.dtype.itemsize)
    plan = _backward_plan(rows, found, copied, squared, reduction == "none")
    return Call(plan, {**numbers, "parts": len(x_lengths) if reduction == "mean" else 1})


def points(
    x: Spec,
    x_lengths: tuple[int, ...],
    y: Spec,
    y_lengths: tuple[int, ...],
    squared: bool,
    direction: str,
    device: Device,
    *,
    x_index: bool = False,
    y_index: bool = False,
) -> Call:
    """Inputs as in `chamfer`. Results: the distance of each point, and the index of its nearest neighbour.

    Both are of the points of x and then of y, as far as they search.
    """
    found, numbers = search(x_lengths, y_lengths, x, y, direction, device, x_index, y_index)
    return Call(_points_plan(found, squared), numbers)


def points_backward(
    ddistances: Spec,
    x: Spec,
    y: Spec,
    distances: Spec,
    nearest: Spec,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    direction: str,
) -> Call:
    """Inputs: ddistances, x, y, distances, nearest. Results: the gradients of x and y."""
    found, numbers = search(x_lengths, y_lengths, x, y, direction, None, False, False)
    (n,), dtype, strides, misalignment = ddistances
    column = Spec((n, 1), dtype, None if strides is None else (*strides, dtype.itemsize), misalignment)
    copies = arrays.copied(distances, found.dtype.itemsize), arrays.copied(nearest, 4)
    plan = _points_backward_plan(arrays.canonical(column, found.points), copies, found, squared)
    return Call(plan, {**numbers, "searched": n})


def _as_rows(dloss: Spec) -> Spec:
    """A loss [] or [B] as rows [B, 1]."""
    shape, dtype, strides, misalignment = dloss
    strides = None if strides is None else (*(strides or (dtype.itemsize,)), dtype.itemsize)
    return Spec((*(shape or (1,)), 1), dtype, strides, misalignment)


# ---- plans ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _chamfer_plan(search: Search, squared: bool, each: bool, gradients: bool) -> Plan:
    steps = Steps(inputs=2 + search.x.indexed + search.y.indexed, results=3 if gradients else 2)
    contiguous = _contiguous(steps, search.sides, 0)
    residuals = _residuals_in_workspace(steps, search) if gradients else _residuals_at(Result(1), search)
    indices, queries = add_search(steps, search, contiguous)
    _add_loss(steps, search, indices, queries, residuals, squared, each)
    if gradients:
        upstream, batches = Packed(_UPSTREAM, (None, 0, Number("parts"))), (indices[0].clouds, indices[1].clouds)
        _add_gradients(steps, search, contiguous, batches, residuals, squared, upstream, (Result(1), Result(2)))
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _backward_plan(
    dloss: Spec | None, search: Search, copied: arrays.Strided | None, squared: bool, each: bool
) -> Plan:
    steps = Steps(inputs=4, results=2)
    contiguous = _contiguous(steps, search.sides, 1)
    upstream: tuple[Any, ...] = None, 0
    if dloss is not None:
        upstream = arrays.add_rows(steps, Input(0), arrays.rows(dloss, search.dtype, 1)), int(each)
    residuals = _residuals_at(arrays.add_copy(steps, Input(3), copied), search)
    batches = _add_clouds(steps, search)
    packed = Packed(_UPSTREAM, (*upstream, Number("parts")))
    _add_gradients(steps, search, contiguous, batches, residuals, squared, packed, (Result(0), Result(1)))
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _points_plan(search: Search, squared: bool) -> Plan:
    steps = Steps(inputs=2 + search.x.indexed + search.y.indexed, results=2)
    indices, queries = add_search(steps, search, _contiguous(steps, search.sides, 0))
    parts = _parts_of_points(search, (Result(0),), Result(1))
    d2, nearest = zip(*parts, strict=True)
    add_nearest(steps, search, indices, queries, d2, nearest, steps.workspace("known", 4))
    sides = [Packed(_DISTANCES, part) for part in parts]
    kernel = _kernel("chamfer_distances", search.dtype)
    args = *sides, indices[0].clouds, indices[1].clouds, int(squared)
    steps.launch(kernel, grid=-(-search.points // THREADS), block=THREADS, args=args)
    return steps.plan()


def _parts_of_points(search: Search, distances: tuple[Pointer, ...], nearest: Pointer) -> list[tuple[Any, ...]]:
    """For x and y where their parts begin, in arrays of distances and in those of their nearest."""
    columns = [(start, start + Number("distances of first")) for start in distances]
    return _each_that_searches(search, [*columns, (nearest, nearest + Number("nearest of first"))])


def _each_that_searches(search: Search, columns: Any) -> list[tuple[Any, ...]]:
    """For x and y a value of each column: its first goes to the first side that searches. The others have None."""
    rows = iter(zip(*columns, strict=True))
    return [next(rows) if searches else (None,) * len(columns) for searches in search.directions]


@functools.lru_cache(maxsize=256)
def _points_backward_plan(
    ddistances: Spec, copies: tuple[arrays.Strided | None, ...], search: Search, squared: bool
) -> Plan:
    steps = Steps(inputs=5, results=2)
    contiguous = _contiguous(steps, search.sides, 1)
    dtype, common = search.dtype, search.common
    given = arrays.add_rows(steps, Input(0), arrays.rows(ddistances, dtype, 1), None, Number("searched"))
    distances, nearest = (arrays.add_copy(steps, Input(3 + i), copied) for i, copied in enumerate(copies))
    parts = _parts_of_points(search, (given, distances), nearest)
    most = [side.layout.points if search.directions[1 - i] else 0 for i, side in enumerate(search.sides)]
    each = 24 + dtype.itemsize  # three sums, and behind all of them the largest factor of each point
    sums = steps.workspace("contributions", each * sum(most))
    steps.clear(sums, each * sum(most))
    places = [
        (sums + 24 * sum(most) + dtype.itemsize * i * most[0], sums + 24 * i * most[0]) if most[i] else (None, None)
        for i in range(2)
    ]
    results = Result(0), Result(1)
    outs = _gradients_of(steps, search, results)
    sides = [Packed(_WEIGHTED, (contiguous(i, common), *parts[i], *places[i], outs[i])) for i in range(2)]
    grid = -(-sum([side.layout.points for side in search.sides]) // THREADS)
    args = *sides, *_add_clouds(steps, search), int(squared)
    for function in ("largest", "give", "gradient"):
        steps.launch(_kernel(f"chamfer_weighted_{function}", common), grid=grid, block=THREADS, args=args)
    _add_narrowed(steps, search, outs, results)
    return steps.plan()


Batches = tuple[Number | Packed, Number | Packed]


def _add_clouds(steps: Steps, search: Search) -> Batches:
    """The struct Clouds of x and of y, for a backward call."""
    return neighbors.argument(steps, "x", search.x.layout), neighbors.argument(steps, "y", search.y.layout)


def _contiguous(steps: Steps, sides: tuple[Side, Side], first: int) -> Contiguous:
    """The points of both sides as contiguous rows. Side i is input `first` + i, converted once for each dtype."""

    @functools.cache
    def contiguous(i: int, dtype: np.dtype) -> Pointer:
        rows = arrays.rows(sides[i].spec, dtype, 3)
        return arrays.add_rows(steps, Input(first + i), rows, None, Number(f"{'xy'[i]} points"))

    return contiguous


Queries = tuple[Pointer | None, Pointer | None]


def add_search(
    steps: Steps, search: Search, contiguous: Contiguous | None = None
) -> tuple[tuple[Index, Index], Queries]:
    """Add the indices that are searched, and the rows of each side that search the other's index."""
    if contiguous is None:
        contiguous = _contiguous(steps, search.sides, 0)
    if search.both is None:
        return _add_separately(steps, search, contiguous)
    points, layouts = (contiguous(0, search.common), contiguous(1, search.common)), (search.x.layout, search.y.layout)
    names = "x", "y", "both"
    indices = neighbors.add_pair(steps, points, search.common, layouts, search.both, names)
    queries = [index.rows if searches else None for index, searches in zip(indices, search.directions, strict=True)]
    return indices, (queries[0], queries[1])


def _add_separately(steps: Steps, search: Search, contiguous: Contiguous) -> tuple[tuple[Index, Index], Queries]:
    """Add what searches, side by side, if an index is given."""
    indices: list[Index] = []
    queries: list[Pointer | None] = []
    memories = iter((Input(2), Input(3)))
    for i, (name, (spec, layout, given)) in enumerate(zip(("x", "y"), search.sides, strict=True)):
        batch, dtype = neighbors.argument(steps, name, layout), FLOAT64 if search.wide else spec.dtype
        index = Index(None, None, None, (), batch)
        if given:
            index = neighbors.index_at(next(memories), layout, search.wide, batch)
        else:
            points = contiguous(i, dtype)
            order = neighbors.add_order(steps, points, dtype, name, layout)
            if search.directions[1 - i]:
                index = neighbors.add_index(steps, points, dtype, order, name, layout, batch)
        rows = index.rows
        if search.directions[i] and rows is None:
            rows = neighbors.add_queries(steps, points, dtype, order, layout, batch)
        indices.append(index)
        queries.append(rows if search.directions[i] else None)
    return (indices[0], indices[1]), (queries[0], queries[1])


def add_nearest(
    steps: Steps,
    search: Search,
    indices: tuple[Index, Index],
    queries: Queries,
    d2: tuple[Pointer | None, Pointer | None],
    nearest: tuple[Pointer | None, Pointer | None],
    known: Pointer,
) -> None:
    """Add the search for each point's nearest: squared distances and indices. The word at `known` is set to 0."""
    layouts = search.x.layout, search.y.layout
    neighbors.add_knn_both(steps, ("x", "y"), queries, layouts, indices, d2, nearest, known, search.wide)


class _Residuals(NamedTuple):
    """Where the parts of the residuals of a side begin; None where it does not search."""

    d2: Pointer | None
    largest: Pointer | None
    nearest: Pointer | None


def _residuals_at(memory: Pointer, search: Search) -> list[_Residuals]:
    """The parts in the order of gpu3d.reference.chamfer.residual_parts."""
    of_clouds = search.dtype.itemsize * search.x.layout.clouds
    d2 = memory, memory + Number("distances of first")
    largest = [memory + of_clouds * i + Number("distances") for i in range(2)]
    behind = memory + of_clouds * sum(search.directions)
    nearest = behind + Number("distances"), behind + Number("distances and nearest of first")
    return [_Residuals(*parts) for parts in _each_that_searches(search, (d2, largest, nearest))]


def _residuals_in_workspace(steps: Steps, search: Search) -> list[_Residuals]:
    made, size = [], search.dtype.itemsize
    for (_, layout, _), searches in zip(search.sides, search.directions, strict=True):
        sizes = ("d2", size * layout.points), ("largest", size * layout.clouds), ("nearest", 4 * layout.points)
        made.append(_Residuals(*[steps.workspace(name, n) if searches else None for name, n in sizes]))
    return made


def _add_loss(
    steps: Steps,
    search: Search,
    indices: tuple[Index, Index],
    queries: Queries,
    residuals: list[_Residuals],
    squared: bool,
    each: bool,
) -> None:
    """Add the steps that write the residuals, and the loss of `each` cloud or of all to the first result."""
    count, common = search.x.layout.clouds, search.common
    losses, known = steps.workspace("losses", 8 * count), steps.workspace("known", 4)
    d2, largest, nearest = zip(*residuals, strict=True)
    add_nearest(steps, search, indices, queries, d2, nearest, known)
    summed = [Packed(_LOSSES, (None,) * 4)] * 2
    for i, (_, layout, _) in enumerate(search.sides):
        if search.directions[i]:
            sums = steps.workspace("sums", 8 * layout.nodes)
            most = steps.workspace("most", search.dtype.itemsize * layout.nodes)
            summed[i] = Packed(_LOSSES, (d2[i], sums, most, largest[i]))
    searching = [side.layout for side in search.sides_that_search]
    batches, tiled = (indices[0].clouds, indices[1].clouds), not all([layout.single for layout in searching])
    if tiled:  # otherwise chamfer_losses does it
        nodes, kernel = sum([layout.nodes for layout in searching]), _kernel("chamfer_tiles", common)
        steps.launch(kernel, grid=nodes, block=SUM_TILE, args=(*summed, *batches, int(squared)))
    to = (Result(0), None) if each else (None, Result(0))
    args = *summed, *batches, losses, known, *to, Number("parts"), int(tiled), int(squared)
    steps.launch(_kernel("chamfer_losses", common), grid=max(1, count), block=SUM_TILE, args=args)


def _add_gradients(
    steps: Steps,
    search: Search,
    contiguous: Contiguous,
    batches: Batches,
    residuals: list[_Residuals],
    squared: bool,
    upstream: Packed,
    results: tuple[Pointer, Pointer],
) -> None:
    """Add the gradients of both sides in their dtypes."""
    common = search.common
    most = [side.layout.points if search.directions[1 - i] else 0 for i, side in enumerate(search.sides)]
    given = steps.workspace("contributions", 24 * sum(most))
    steps.clear(given, 24 * sum(most))
    outs = _gradients_of(steps, search, results)
    sides = []
    for i, of in enumerate(residuals):
        to = given + 24 * i * most[0] if most[i] else None
        sides.append(Packed(_SIDE, (contiguous(i, common), of.nearest, of.d2, of.largest, to, outs[i])))
    grid = -(-sum([side.layout.points for side in search.sides]) // THREADS)
    for function, more in (("chamfer_give", ()), ("chamfer_gradient", (upstream,))):
        args = *sides, *batches, int(squared), *more
        steps.launch(_kernel(function, common), grid=grid, block=THREADS, args=args)
    _add_narrowed(steps, search, outs, results)


def _gradients_of(steps: Steps, search: Search, results: tuple[Pointer, Pointer]) -> list[Pointer]:
    """Where kernels write the gradients, [N, 3] of the common dtype: to the results if they are like that."""
    outs = []
    for side, result in zip(search.sides, results, strict=True):
        made = Spec((side.layout.points, 3), search.common)
        plain = arrays.rows(made, side.spec.dtype, side.spec.shape[-1]) is None
        outs.append(result if plain else steps.workspace("gradient", made.nbytes))
    return outs


def _add_narrowed(steps: Steps, search: Search, outs: list[Pointer], results: tuple[Pointer, Pointer]) -> None:
    """Add the conversion of gradients that are not written to the results."""
    for name, side, out, result in zip("xy", search.sides, outs, results, strict=True):
        rows = arrays.rows(Spec((side.layout.points, 3), search.common), side.spec.dtype, side.spec.shape[-1])
        arrays.add_rows(steps, out, rows, result, Number(f"{name} points"))
