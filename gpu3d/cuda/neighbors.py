# SPDX-License-Identifier: Apache-2.0
"""The plans of knn, radius_search, their gradients and neighbor_index: kernels_cu/neighbors_*.cu.

`layout` cuts a batch of clouds into tiles, nodes and the levels above. A plan depends on lengths only through it.
`add_index` and `add_pair` add the steps that prepare clouds for searches; Chamfer and APML use them too.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOAT64, FLOATS, UINT8, Spec
from gpu3d.cuda import arrays, buckets, clouds
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Input, Kernel, Macros, Number, Packed, Plan, Pointer, Result, Steps
from gpu3d.reference.buckets import HASHES
from gpu3d.reference.chamfer import SUM_TILE
from gpu3d.reference.neighbors import squared_radius

TILE = 32  # points in a tile, tiles in a node, nodes in a branch, and boxes in a box of each level above
LEVELS = 3  # of boxes above the nodes, the lowest of branches
NODE = SUM_TILE  # points in a node, for which an index keeps a box and a Chamfer distance a sum
INDEX_THREADS = NODE // 4
LEVEL_THREADS = KNN_THREADS = RADIUS_THREADS = 128
QUERIES, QUERIES_OF_FEW = 8, 2  # queries of a warp; fewer if k <= 2, because the search ends with its slowest warp
FEWEST_WARPS = 8192  # a warp takes several queries only if there is work for this many warps
BACKWARD_THREADS = 256
RADIUS_LANES = 8  # lanes that share a query in the gradient of radius_search
MAX_POINTS = 2**31 - 1  # points of two batches that are prepared together

INDEX_FORMAT = "56s"  # struct Index of neighbors.cuh
ROW_BYTES, BOX_BYTES = 16, 48  # of floats; twice as many of doubles
_REAL = ("REAL", 1)  # the macro of kernels that search in float64
_ENTRIES = "<QQQQqii"  # struct Entries of neighbors_backward.cu
_RADIUS_WARPS = RADIUS_THREADS // 32
_ZORDER_DIV = ("KEY", HASHES.index("zorder_div"))

# The parameters of each kernel as formats of the module struct; c, x and e stand for struct Clouds, Index and
# Entries.
_SIGNATURES = {
    "index_nodes": "QQQciQQQ",
    "index_level": "QciiQ",
    "index_join": "QqQqQ",
    "knn": "QciixciiifQQQ",
    "knn_both": "QciixQQQciixQQQ",
    "many_neighbors": "QciixciifQQQ",
    "radius_count": "QcixcifQQ",
    "radius_fill": "QcixcifQQiqQ",
    "radius_sort": "QiqQQQQ",
    "backward_largest": "eQ",
    "backward_queries": "eQQiQQQ",
    "backward_points": "eiQQQ",
}
_SIGNATURES_OF_REAL = {"radius_fill": "QcixcifQQiqQQ", "radius_sort": "QiqQQQQQ"}  # these take squares too


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    found = [Configuration("neighbors_index", _of_points(dtype)) for dtype in FLOATS]
    for wide in (False, True):
        found += [Configuration("neighbors_knn", of_real(wide, ("LISTS", lists))) for lists in range(2)]
        found += [Configuration("neighbors_many", of_real(wide, ("LISTS", 1 << power))) for power in range(1, 6)]
        found.append(Configuration("neighbors_radius", of_real(wide)))
    return [*found, *(Configuration("neighbors_backward", (_of(dtype),)) for dtype in (FLOAT32, FLOAT64))]


@functools.cache
def _kernel(function: str, macros: Macros = (), shared_mem: int = 0) -> Kernel:
    """A kernel of neighbors_<prefix of its name>.cu."""
    formats = _SIGNATURES[function]
    if _REAL in macros:
        formats = _SIGNATURES_OF_REAL.get(function, formats).replace("f", "d")
    formats = formats.replace("c", clouds.FORMAT).replace("x", INDEX_FORMAT)
    formats = formats.replace("e", f"{struct.calcsize(_ENTRIES)}s")
    return Kernel("neighbors_" + function.split("_")[0], function, formats, macros, shared_mem)


def _of(dtype: np.dtype) -> tuple[str, int]:
    return "POINT", FLOATS.index(dtype)


def of_real(wide: bool, *macros: tuple[str, int]) -> Macros:
    """The macros of a kernel that computes in float32, or in float64 if `wide`."""
    return (*macros, _REAL) if wide else macros


def _of_points(dtype: np.dtype) -> Macros:
    """The macros of kernels that make indices of points of this dtype: those of float64 points are of doubles."""
    return of_real(dtype == FLOAT64, _of(dtype))


def is_wide(*arrays: Spec) -> bool:
    """Whether a search among these arrays computes in float64: if one of them is that."""
    return any([array.dtype == FLOAT64 for array in arrays])


# ---- layouts -------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a batch of clouds is cut into tiles, nodes and levels. A plan depends on lengths only through this.

    Numbers are rounded up, so that there are few different ones and a plan serves many lengths. Kernels read the exact
    numbers in the table of clouds. Blocks beyond them return, and memory beyond them stays unused.
    """

    clouds: int
    points: int
    slots: int  # TILE for each tile
    nodes: int
    levels: tuple[int, ...]  # boxes of each level above the nodes, up to one of at most 32 boxes a cloud
    single: bool  # whether every cloud is a single node
    sort: buckets.Sort | None  # how points are put in bucket order; None if they are not


def _rounded(n: int) -> int:
    """Round up to three significant binary digits, so by at most a quarter. Large numbers stay as they are."""
    if n > 1 << 29:  # because indices have 31 bits
        return n
    zeros = max(0, (n - 1).bit_length() - 3)
    return -(-n >> zeros) << zeros


class Tables(NamedTuple):
    """The numbers of a call that describe a batch of clouds."""

    clouds: clouds.Table  # its tiles are nodes, and its groups are branches: boxes of the lowest level
    sort: clouds.Table | None
    points: int
    slots: int

    def numbers(self, name: str, wide: bool = False) -> dict[str, Any]:
        """The numbers that steps for the batch `name` refer to. `wide`: its index is of doubles."""
        row, box = ROW_BYTES << wide, BOX_BYTES << wide
        nodes, branches = self.clouds.tiles, self.clouds.groups
        found = {
            name: self.clouds,
            f"{name} points": self.points,
            f"{name} coordinates": 3 * self.points,
            f"{name} slots": self.slots,
            f"{name} branches": branches,
            # The bytes of this batch's part of an index.
            f"{name} rows": row * self.slots,
            f"{name} boxes of tiles": box * (self.slots // TILE),
            f"{name} boxes of nodes": box * nodes,
        }
        if self.sort is not None:
            found[f"{name} sort"] = self.sort
        return found


@clouds.remembered
def layout(lengths: tuple[int, ...], device: Device | None) -> tuple[Layout, Tables]:
    """The layout of clouds of these lengths, and their tables. Without a device it does not say how to sort them."""
    n: Any = clouds.array(lengths) if len(lengths) > clouds.INLINE_CLOUDS else lengths
    tiles, nodes, branches = _pieces(n, TILE), _pieces(n, TILE**2), _pieces(n, TILE**3)
    largest = max(lengths, default=0)
    table = clouds.table(n, TILE, nodes, branches)
    points, slots = sum(lengths), buckets.total(tiles) * TILE
    most = _rounded(slots)
    sort, sort_table = None, None
    if device and largest > NODE:
        sort, sort_table = buckets.sorting(n, TILE, device)
        sort = sort._replace(slots=most, tiles=_rounded(sort.tiles), groups=_rounded(sort.groups))
    levels: list[int] = []
    while largest > TILE ** (len(levels) + 3):
        # The next level of a cloud begins at first // 32 + its number: see first_of_level in neighbors.cuh.
        levels.append(levels[-1] // TILE + len(lengths) if levels else _rounded(table.groups))
    size = len(lengths), most, most, _rounded(table.tiles), tuple(levels)
    return Layout(*size, largest <= NODE, sort), Tables(table, sort_table, points, slots)


def pair_layout(x_lengths: tuple[int, ...], y_lengths: tuple[int, ...], device: Device) -> tuple[Layout, Tables]:
    """The layout of two batches that are prepared together: the clouds of the one, and then those of the other."""
    n, m = sum(x_lengths), sum(y_lengths)
    if n + m > MAX_POINTS:
        raise ValueError(
            f"two batches on a GPU must be at most 2**31 - 1 points together, got {n} and {m}: pass fewer clouds at a "
            "time."
        )
    return layout(x_lengths + y_lengths, device)


def _pieces(lengths: Sequence[int] | np.ndarray, size: int) -> Any:
    """How many pieces of `size` points each cloud has."""
    return -(-lengths // size) if isinstance(lengths, np.ndarray) else [-(-n // size) for n in lengths]


# ---- the index -----------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """An index as kernels read it: clouds that can be searched, and whose points can search others."""

    rows: Any  # a Pointer to struct Row [slots]; None, as all but the clouds, if nothing searches these clouds
    tiles: Any  # a Pointer to struct Box; the next two are the same
    nodes: Any
    levels: tuple[Pointer, ...]
    clouds: Number | Packed  # struct Clouds
    branches_before: Number | int = 0  # of other clouds, in `levels`
    clouds_before: int = 0

    @property
    def packed(self) -> Packed:
        """The struct Index as a kernel's argument."""
        levels = *self.levels, *[None] * (LEVELS - len(self.levels))
        return Packed("<QQQQQQii", (*self[:3], *levels, self.branches_before, self.clouds_before))


def index_bytes(layout: Layout, wide: bool) -> int:
    """The bytes of an index. It is `wide`, of doubles, if its points are float64."""
    return _offsets(layout, wide)[-1]


def index_at(memory: Pointer, layout: Layout, wide: bool, batch: Number | Packed) -> Index:
    """The index in this memory: rows, then boxes. `batch` is from `argument`."""
    rows, tiles, nodes, *levels, _ = (memory + offset for offset in _offsets(layout, wide))
    return Index(rows, tiles, nodes, tuple(levels), batch)


def _offsets(layout: Layout, wide: bool) -> tuple[int, ...]:
    """Where the rows and the boxes of tiles, nodes and each level of an index begin, and where it ends."""
    row, box = (size << wide for size in (ROW_BYTES, BOX_BYTES))
    boxes = [box * count for count in (layout.slots // TILE, layout.nodes, *layout.levels)]
    return 0, *itertools.accumulate(boxes, initial=row * layout.slots)


def argument(steps: Steps, name: str, layout: Layout) -> Number | Packed:
    """The struct Clouds of the batch `name`. Call it once per plan."""
    return clouds.argument(steps, name, layout.clouds, TILE)


def add_order(steps: Steps, points: Pointer, dtype: np.dtype, name: str, layout: Layout) -> Pointer | None:
    """Add the sort of contiguous points [N, 3] into bucket order, int32 [slots]; None if every cloud is one node."""
    if layout.sort is None:
        return None
    order, inverse = steps.workspace("order", 4 * layout.slots), steps.workspace("inverse", 4 * layout.points)
    batch = clouds.argument(steps, f"{name} sort", layout.sort.clouds, layout.sort.bucket_size)
    # With other bounds, one far point would put all the others into one voxel. In a cloud of a few nodes that costs
    # less than robust bounds, which one block would find before it sorts.
    macros = _of(dtype), _ZORDER_DIV
    grid = buckets.WHOLE_CLOUD if layout.sort.method == "cloud" else buckets.MOST_OF_CLOUD
    buckets.add_sort(steps, layout.sort, points, macros, grid, order, inverse, None, batch)
    return order


def add_queries(
    steps: Steps,
    points: Pointer,
    dtype: np.dtype,
    order: Pointer | None,
    layout: Layout,
    batch: Number | Packed,
    rows: Pointer | None = None,
) -> Pointer:
    """Add the rows of contiguous points [N, 3] in this order that search other clouds, to `rows` or to workspace."""
    if rows is None:
        rows = steps.workspace("queries", (ROW_BYTES << (dtype == FLOAT64)) * layout.slots)
    args = points, points, order, batch, layout.clouds, rows, None, None
    steps.launch(_kernel("index_nodes", _of_points(dtype)), grid=layout.nodes, block=INDEX_THREADS, args=args)
    return rows


def add_index(
    steps: Steps,
    points: Pointer,
    dtype: np.dtype,
    order: Pointer | None,
    name: str,
    layout: Layout,
    batch: Number | Packed,
    memory: Pointer | None = None,
) -> Index:
    """Add the index of contiguous points [N, 3] in this order, to `memory` of `index_bytes` or to workspace."""
    wide = dtype == FLOAT64
    if memory is None:
        memory = steps.workspace("index", index_bytes(layout, wide))
    index = index_at(memory, layout, wide, batch)
    _add_boxes(steps, (points, points), layout.clouds, dtype, order, layout, index)
    return index


def add_pair(
    steps: Steps,
    points: tuple[Pointer, Pointer],
    dtype: np.dtype,
    layouts: tuple[Layout, Layout],
    both: Layout,
    names: tuple[str, str, str],
    memory: Pointer | None = None,
) -> tuple[Index, Index]:
    """Add the indices of two batches with equally many clouds, together in half the launches.

    The points are contiguous [N, 3] and [M, 3] of one dtype. `both` is the layout from `pair_layout`. `names` are the
    names of the two batches and of both together. The indices are written to `memory`, of `index_bytes` of both, or to
    workspace: the rows of the first, then those of the second, then boxes.
    """
    first, second = layouts
    wide = dtype == FLOAT64
    joined = points[0]
    if both.sort is not None:
        most = 3 * both.points
        joined = steps.workspace("joined", most * dtype.itemsize)
        ends = Number(f"{names[0]} coordinates"), Number(f"{names[2]} coordinates")
        args = points[0], ends[0], points[1], ends[1], joined
        kernel = _kernel("index_join", _of_points(dtype))
        steps.launch(kernel, grid=-(-most // INDEX_THREADS), block=INDEX_THREADS, args=args)
    order = add_order(steps, joined, dtype, names[2], both)
    batch = argument(steps, names[2], both)
    if memory is None:
        memory = steps.workspace("index", index_bytes(both, wide))
    index = index_at(memory, both, wide, batch)
    _add_boxes(steps, points, first.clouds, dtype, order, both, index)
    x = index._replace(clouds=argument(steps, names[0], first))
    parts = [Number(f"{names[0]} {part}") for part in ("rows", "boxes of tiles", "boxes of nodes")]
    rows, tiles, nodes = (start + part for start, part in zip(index[:3], parts, strict=True))
    before = Number(f"{names[0]} branches"), first.clouds
    return x, Index(rows, tiles, nodes, index.levels, argument(steps, names[1], second), *before)


def _add_boxes(
    steps: Steps,
    points: tuple[Pointer, Pointer],
    second: int,
    dtype: np.dtype,
    order: Pointer | None,
    layout: Layout,
    index: Index,
) -> None:
    """Add rows and boxes of an index. `second` is the first cloud of the second batch of points."""
    macros = _of_points(dtype)
    args: tuple[Any, ...] = *points, order, index.clouds, second, index.rows, index.tiles, index.nodes
    steps.launch(_kernel("index_nodes", macros), grid=layout.nodes, block=INDEX_THREADS, args=args)
    for level, boxes in enumerate(index.levels):
        room, below = layout.levels[level], index.levels[level - 1] if level else index.nodes
        grid, kernel = -(-room // (LEVEL_THREADS // 32)), _kernel("index_level", macros)
        steps.launch(kernel, grid=grid, block=LEVEL_THREADS, args=(below, index.clouds, level, room, boxes))


# ---- searches ------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """A batch of clouds of a call, as far as a plan depends on it."""

    spec: Spec  # from `arrays.canonical`
    layout: Layout
    indexed: bool  # whether it is an index, whose memory is an input


def side(spec: Spec, lengths: tuple[int, ...], index: bool, device: Device | None) -> tuple[Side, Tables]:
    """The side of a call for these points, or for an index of them. They are sorted if there is a device."""
    found, tables = layout(lengths, device)
    return Side(arrays.canonical(spec, found.points), found, index), tables


def index_memory(points: Spec, lengths: tuple[int, ...]) -> Spec:
    """The spec of the memory of an index of these points, for searches in their dtype."""
    return Spec((index_bytes(layout(lengths, None)[0], is_wide(points)),), UINT8)


def neighbor_index(points: Spec, lengths: tuple[int, ...], device: Device) -> Call:
    """Input: points. Result: `index_memory`."""
    of_points, tables = side(points, lengths, False, device)
    return Call(_index_plan(of_points), tables.numbers("points"))


@functools.lru_cache(maxsize=256)
def _index_plan(points: Side) -> Plan:
    steps = Steps(inputs=1, results=1)
    _add_points(steps, Input(0), points, is_wide(points.spec), Result(0))
    return steps.plan()


def _add_points(steps: Steps, source: Pointer, points: Side, wide: bool, memory: Pointer | None = None) -> Index:
    """The index at `source`, or the steps that make the index of the points there."""
    dtype, batch = FLOAT64 if wide else points.spec.dtype, argument(steps, "points", points.layout)
    if points.indexed:
        return index_at(source, points.layout, wide, batch)
    contiguous = arrays.add_rows(steps, source, arrays.rows(points.spec, dtype, 3), None, Number("points points"))
    order = add_order(steps, contiguous, dtype, "points", points.layout)
    return add_index(steps, contiguous, dtype, order, "points", points.layout, batch, memory)


class Queries(NamedTuple):
    """Queries that are ready for a search."""

    rows: Pointer  # struct Row [slots]
    clouds: Number | Packed
    slots: Number


def _add_search(
    steps: Steps, query: Side | None, points: Side, rows: Pointer | None = None, memory: Pointer | None = None
) -> tuple[Queries, Index]:
    """Add the steps that prepare the first input to search the second. `query` is None if they are the same points.

    The results are written to `rows` and `memory`, or to workspace.
    """
    wide = _is_wide(query, points)
    index = _add_points(steps, Input(1), points, wide, memory)
    if query is None:
        return Queries(index.rows, index.clouds, Number("points slots")), index
    dtype = FLOAT64 if wide else query.spec.dtype
    contiguous = arrays.add_rows(steps, Input(0), arrays.rows(query.spec, dtype, 3), None, Number("query points"))
    order, batch = add_order(steps, contiguous, dtype, "query", query.layout), argument(steps, "query", query.layout)
    rows = add_queries(steps, contiguous, dtype, order, query.layout, batch, rows)
    return Queries(rows, batch, Number("query slots")), index


def _is_wide(query: Side | None, points: Side) -> bool:
    """Whether the search computes in float64. Then an index that is given is one of float64 points."""
    return is_wide(points.spec) or (query is not None and is_wide(query.spec))


def _sides(
    query: Spec,
    query_lengths: tuple[int, ...],
    points: Spec,
    lengths: tuple[int, ...],
    index: bool,
    same: bool,
    device: Device,
) -> tuple[Side | None, Side, dict[str, Any]]:
    """Both sides of a search, and the numbers of their tables."""
    of_points, tables = side(points, lengths, index, None if index else device)
    if same:
        return None, of_points, tables.numbers("points")
    of_query, query_tables = side(query, query_lengths, False, device)
    return of_query, of_points, {**query_tables.numbers("query"), **tables.numbers("points")}


def _grouped(slots: int, few: bool) -> tuple[int, int]:
    """The number of queries that a warp takes one after another, and the number of blocks."""
    most = QUERIES_OF_FEW if few else QUERIES
    group = min(most, 1 << max(0, (slots // FEWEST_WARPS).bit_length() - 1))
    return group, -(-slots // (KNN_THREADS // 32 * group))


class Limits(NamedTuple):
    """What a search finds of the points of a cloud.

    Attributes
    ----------
    radius : float
        The radius of every query, if they have none of their own.
    radii : Spec or None
        The spec of the radii [N] of the queries, if each has its own.
    exclude_self : bool
        Whether point i is no neighbour of query i.
    """

    radius: float = math.inf
    radii: Spec | None = None
    exclude_self: bool = False

    def numbers(self, wide: bool) -> dict[str, Any]:
        """The numbers that steps of the search refer to."""
        dtype = FLOAT64 if wide else FLOAT32
        radius2 = math.inf if self.radius == math.inf else float(squared_radius(self.radius, dtype))
        return {"radius2": radius2, "exclude": int(self.exclude_self)}

    def column(self, queries: int) -> Spec | None:
        """The spec of the radii as a cache key, for up to so many queries."""
        return None if self.radii is None else arrays.canonical(_column(self.radii), queries)


EVERYTHING = Limits()  # the whole cloud


def _column(spec: Spec) -> Spec:
    """An array [n] as [n, 1]."""
    shape, dtype, strides, misalignment = spec
    return Spec((*shape, 1), dtype, None if strides is None else (*strides, dtype.itemsize), misalignment)


def _add_limits(
    steps: Steps, source: Pointer, radii: Spec | None, number: Number, wide: bool
) -> tuple[Number, Number, Pointer | None]:
    """The arguments exclude, radius2 and radii of a search's kernel; converts the radii [number] at `source`."""
    dtype = FLOAT64 if wide else FLOAT32
    at = None if radii is None else arrays.add_rows(steps, source, arrays.rows(radii, dtype, 1), None, number)
    return Number("exclude"), Number("radius2"), at


def knn(
    query: Spec,
    query_lengths: tuple[int, ...],
    points: Spec,
    lengths: tuple[int, ...],
    k: int,
    device: Device,
    *,
    limits: Limits = EVERYTHING,
    index: bool = False,
    same: bool = False,
) -> Call:
    """Inputs: query, points, and radii if the limits have any. Results: distances, indices.

    With `index` the second input is the memory of an index of such points. `same` means that the queries are the
    points, with the same memory, shape and lengths.
    """
    return _knn(lengths, query_lengths, query, points, k, limits, index, same, device)


@clouds.remembered
def _knn(
    lengths: tuple[int, ...],
    query_lengths: tuple[int, ...],
    query: Spec,
    points: Spec,
    k: int,
    limits: Limits,
    index: bool,
    same: bool,
    device: Device,
) -> Call:
    of_query, of_points, numbers = _sides(query, query_lengths, points, lengths, index, same, device)
    radii = limits.column(_of_queries(of_query, of_points).points)
    numbers |= {**limits.numbers(_is_wide(of_query, of_points)), "k": k}
    return Call(_knn_plan(of_query, of_points, radii, lists_of(k), k <= 2), numbers)


@functools.lru_cache(maxsize=256)
def _knn_plan(query: Side | None, points: Side, radii: Spec | None, lists: int, few: bool) -> Plan:
    steps = Steps(inputs=2 if radii is None else 3, results=2)
    queries, index = _add_search(steps, query, points)
    wide = _is_wide(query, points)
    limits = _add_limits(steps, Input(2), radii, _number_of_queries(query), wide)
    add_knn(steps, queries, _of_queries(query, points), index, lists, few, limits, (Result(0), Result(1)), wide)
    return steps.plan()


def lists_of(k: int) -> int:
    """The number of lists in which a warp keeps k neighbours; 0 if k is 1."""
    return 0 if k == 1 else 1 << (-(-k // 32) - 1).bit_length()


NO_LIMITS = (0, math.inf, None)  # what `add_knn` takes for the whole cloud


def add_knn(
    steps: Steps,
    queries: Queries,
    layout: Layout,
    index: Index,
    lists: int,
    few: bool,
    limits: tuple[Any, Any, Pointer | None],
    results: tuple[Pointer, Pointer],
    wide: bool = False,
) -> None:
    """Add the search for the `Number("k")` nearest of each query: distances and indices. `layout` is of the queries.

    `lists` is from `lists_of`, and `few` says that k <= 2. `limits` are the kernel's arguments exclude, radius2 and
    radii. `wide`: the rows and the distances are float64.
    """
    group, blocks = _grouped(layout.slots, few)
    walk = *queries, group, index.packed, index.clouds, Number("k")
    macros = of_real(wide, ("LISTS", lists))
    if lists > 1:
        halves = 2 if wide and lists == 32 else 1  # blocks of half the size, whose shared memory every GPU has
        shared = KNN_THREADS // halves // 32 * (8 << wide) * 2 * (32 * lists + 32)
        kernel, threads = _kernel("many_neighbors", macros, shared), KNN_THREADS // halves
        steps.launch(kernel, grid=blocks * halves, block=threads, args=(*walk, *limits, *results))
    else:
        steps.launch(_kernel("knn", macros), grid=blocks, block=KNN_THREADS, args=(*walk, 0, *limits, *results))


def add_knn_both(
    steps: Steps,
    names: tuple[str, str],
    queries: tuple[Pointer | None, Pointer | None],
    layouts: tuple[Layout, Layout],
    indices: tuple[Index, Index],
    d2: tuple[Pointer | None, Pointer | None],
    nearest: tuple[Pointer | None, Pointer | None],
    known: Pointer,
    wide: bool,
) -> None:
    """Add the search for each point's nearest in the other batch: squared distances and indices.

    `queries` are the rows of each batch that search the other's index. A batch without them does not search. The word
    at `known` is set to 0. `wide`: rows and squared distances are float64.
    """
    args: list[Any] = []
    blocks = 0
    for i in range(2):
        if queries[i] is None:
            args += [None, indices[i].clouds, 0, 1, indices[i].packed, None, None]
            continue
        group, of_side = _grouped(layouts[i].slots, few=True)
        slots = Number(f"{names[i]} slots")
        args += [queries[i], indices[i].clouds, slots, group, indices[i].packed, d2[i], nearest[i]]
        blocks += of_side
    kernel = _kernel("knn_both", of_real(wide, ("LISTS", 0)))
    steps.launch(kernel, grid=max(1, blocks), block=KNN_THREADS, args=(*args, known))


# ---- radius_search -------------------------------------------------------------------------------------------------


def radius(
    query: Spec,
    query_lengths: tuple[int, ...],
    points: Spec,
    lengths: tuple[int, ...],
    limits: Limits,
    max_entries: int,
    device: Device,
    *,
    index: bool = False,
    same: bool = False,
) -> Call:
    """Inputs as in `knn`. Results: offsets, and `max_entries` indices and distances."""
    of_query, of_points, numbers = _sides(query, query_lengths, points, lengths, index, same, device)
    radii = limits.column(_of_queries(of_query, of_points).points)
    numbers |= {**limits.numbers(_is_wide(of_query, of_points)), "room": max_entries}
    return Call(_radius_plan(of_query, of_points, radii, _capacity(max_entries)), numbers)


def radius_count(
    query: Spec,
    query_lengths: tuple[int, ...],
    points: Spec,
    lengths: tuple[int, ...],
    limits: Limits,
    device: Device,
    *,
    index: bool = False,
    same: bool = False,
) -> tuple[Call, list[Spec]]:
    """The first of two calls. Inputs as in `knn`. Results: offsets, the last offset, further inputs of `radius_fill`.

    Those are the rows of the queries, unless they are the `same` points, and the memory of the index, unless it is an
    input. Their specs are returned too.
    """
    of_query, of_points, numbers = _sides(query, query_lengths, points, lengths, index, same, device)
    radii = limits.column(_of_queries(of_query, of_points).points)
    wide = _is_wide(of_query, of_points)
    kept = [] if of_query is None else [Spec(((ROW_BYTES << wide) * of_query.layout.slots,), UINT8)]
    if not index:
        kept.append(Spec((index_bytes(of_points.layout, wide),), UINT8))
    return Call(_radius_count_plan(of_query, of_points, radii), {**numbers, **limits.numbers(wide)}), kept


def radius_fill(
    query_lengths: tuple[int, ...], wide: bool, lengths: tuple[int, ...], limits: Limits, entries: int
) -> Call:
    """The second of two calls. Results: indices, distances [entries]. `wide`: the search is in float64.

    Inputs: offsets, the queries' rows, the index, and radii if the limits have any. If the queries are the points of
    the index, their rows are at the beginning of the index.
    """
    (queries, query_tables), (searched, tables) = layout(query_lengths, None), layout(lengths, None)
    numbers = {**query_tables.numbers("query"), **tables.numbers("points"), **limits.numbers(wide), "room": entries}
    radii = limits.column(queries.points)
    return Call(_radius_fill_plan(queries, searched, wide, radii, _capacity(entries)), numbers)


def _capacity(entries: int) -> int:
    """The next power of two, so that there are few plans. The exact number is a number of the call."""
    return 1 << (entries - 1).bit_length() if entries else 0


@functools.lru_cache(maxsize=256)
def _radius_plan(query: Side | None, points: Side, radii: Spec | None, capacity: int) -> Plan:
    steps = Steps(inputs=2 if radii is None else 3, results=3)
    queries, index = _add_search(steps, query, points)
    layout, n, total = _of_queries(query, points), _number_of_queries(query), steps.workspace("total", 8)
    wide = _is_wide(query, points)
    walk = *queries, index.packed, index.clouds, *_add_limits(steps, Input(2), radii, n, wide)
    _add_count(steps, walk, n, layout, wide, Result(0), total)
    _add_fill(steps, walk, n, layout, wide, capacity, Result(0), (Result(1), Result(2)))
    arrays.add_overflow(steps, total, Number("room"), n, layout.points, Result(0))
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _radius_count_plan(query: Side | None, points: Side, radii: Spec | None) -> Plan:
    steps = Steps(inputs=2 if radii is None else 3, results=2 + (query is not None) + (not points.indexed))
    rows = None if query is None else Result(2)
    memory = None if points.indexed else Result(3 if query else 2)
    queries, index = _add_search(steps, query, points, rows, memory)
    n = _number_of_queries(query)
    wide = _is_wide(query, points)
    walk = *queries, index.packed, index.clouds, *_add_limits(steps, Input(2), radii, n, wide)
    _add_count(steps, walk, n, _of_queries(query, points), wide, Result(0), Result(1))
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _radius_fill_plan(query: Layout, points: Layout, wide: bool, radii: Spec | None, capacity: int) -> Plan:
    steps = Steps(inputs=3 if radii is None else 4, results=2)
    queries = Queries(Input(1), argument(steps, "query", query), Number("query slots"))
    index = index_at(Input(2), points, wide, argument(steps, "points", points))
    n = Number("query points")
    walk = *queries, index.packed, index.clouds, *_add_limits(steps, Input(3), radii, n, wide)
    _add_fill(steps, walk, n, query, wide, capacity, Input(0), (Result(0), Result(1)))
    return steps.plan()


def _of_queries(query: Side | None, points: Side) -> Layout:
    """The layout of the queries, which are the points if there is no `query`."""
    return (query or points).layout


def _number_of_queries(query: Side | None) -> Number:
    return Number("points points" if query is None else "query points")


def _add_count(
    steps: Steps, walk: tuple[Any, ...], n: Number, layout: Layout, wide: bool, offsets: Pointer, total: Pointer
) -> None:
    """Add the count: where the neighbours of each of n queries begin, and their total.

    `walk` are the arguments of both kernels that say what is searched, and `layout` is of the queries.
    """
    counts = steps.workspace("counts", 8 * layout.points)
    args, kernel = (*walk, counts), _kernel("radius_count", of_real(wide))
    steps.launch(kernel, grid=-(-layout.slots // _RADIUS_WARPS), block=RADIUS_THREADS, args=args)
    arrays.add_offsets(steps, counts, n, layout.points, offsets, total)


def _add_fill(
    steps: Steps,
    walk: tuple[Any, ...],
    n: Number,
    layout: Layout,
    wide: bool,
    capacity: int,
    offsets: Pointer,
    results: tuple[Pointer, Pointer],
) -> None:
    """Add the step that writes indices and distances in order, or only -1 and NaN if they exceed the capacity."""
    if not capacity:
        return
    room, launch = Number("room"), functools.partial(steps.launch, block=RADIUS_THREADS)
    entries, spare = steps.workspace("entries", 8 * capacity), steps.workspace("spare entries", 8 * capacity)
    squares = [steps.workspace("squares", 8 * capacity)] if wide else []
    args = *walk, offsets, n, room, *squares, entries
    launch(_kernel("radius_fill", of_real(wide)), grid=-(-layout.slots // _RADIUS_WARPS), args=args)
    sort = offsets, n, room, *squares, entries, spare, *results
    launch(_kernel("radius_sort", of_real(wide)), grid=max(1, -(-layout.points // _RADIUS_WARPS)), args=sort)


# ---- gradients -----------------------------------------------------------------------------------------------------


def knn_backward(
    ddistances: Spec,
    query: Spec,
    points: Spec,
    distances: Spec,
    indices: Spec,
) -> Call:
    """Inputs: ddistances, query, points, distances, indices. Results: the gradients of query and points."""
    n, k = distances.shape
    given = arrays.canonical(ddistances, _rounded(n))
    copies = arrays.copied(distances, distances.dtype.itemsize), arrays.copied(indices, 4)
    sides, numbers = _sides_of_gradient(query, points)
    numbers |= {"rows": n, "entries": n * k, "k": k}
    return Call(_knn_backward_plan(given, _rounded(n), k, copies, *sides), numbers)


def radius_backward(
    ddistances: Spec,
    query: Spec,
    points: Spec,
    offsets: Spec,
    indices: Spec,
    distances: Spec,
) -> Call:
    """Inputs: ddistances, query, points, offsets, indices, distances. Results: the gradients of query and points."""
    room = math.prod(distances.shape)
    given = arrays.canonical(_column(ddistances), _rounded(room))
    copies = arrays.copied(offsets, 8), arrays.copied(indices, 4), arrays.copied(distances, distances.dtype.itemsize)
    sides, numbers = _sides_of_gradient(query, points)
    numbers |= {"rows": room, "entries": room}
    return Call(_radius_backward_plan(given, _rounded(room), copies, *sides), numbers)


def _sides_of_gradient(query: Spec, points: Spec) -> tuple[tuple[Spec, int, Spec, int], dict[str, Any]]:
    """Both arrays with their capacity in rows, and the numbers."""
    n, m = math.prod(query.shape[:-1]), math.prod(points.shape[:-1])
    rooms = _rounded(n), _rounded(m)
    sides = arrays.canonical(query, rooms[0]), rooms[0], arrays.canonical(points, rooms[1]), rooms[1]
    return sides, {"query points": n, "points points": m}


@functools.lru_cache(maxsize=256)
def _knn_backward_plan(
    ddistances: Spec, rows: int, k: int, copies: tuple[arrays.Strided | None, ...], *rest: Any
) -> Plan:
    steps = Steps(inputs=5, results=2)
    dtype = _dtype_of_gradient(rest[0], rest[2])
    given = arrays.add_rows(steps, Input(0), arrays.rows(ddistances, dtype, k), None, Number("rows"))
    distances, indices = (arrays.add_copy(steps, Input(3 + i), copied) for i, copied in enumerate(copies))
    entries = given, distances, indices, None, Number("entries"), Number("query points"), Number("k")
    lanes = min(32, 1 << (k - 1).bit_length()) if k else 1
    _add_gradients(steps, Packed(_ENTRIES, entries), rows * k, lanes, *rest)
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _radius_backward_plan(ddistances: Spec, room: int, copies: tuple[arrays.Strided | None, ...], *rest: Any) -> Plan:
    steps = Steps(inputs=6, results=2)
    dtype = _dtype_of_gradient(rest[0], rest[2])
    given = arrays.add_rows(steps, Input(0), arrays.rows(ddistances, dtype, 1), None, Number("rows"))
    offsets, indices, distances = (arrays.add_copy(steps, Input(3 + i), copied) for i, copied in enumerate(copies))
    entries = given, distances, indices, offsets, Number("entries"), Number("query points"), 0
    _add_gradients(steps, Packed(_ENTRIES, entries), room, RADIUS_LANES, *rest)
    return steps.plan()


def _dtype_of_gradient(query: Spec, points: Spec) -> np.dtype:
    """What distances and their gradients are in."""
    return FLOAT64 if is_wide(query, points) else FLOAT32


def _add_gradients(
    steps: Steps, entries: Packed, most: int, lanes: int, query: Spec, queries: int, points: Spec, count: int
) -> None:
    """Add the gradients of inputs 1 and 2, with up to `queries` and `count` rows, from up to `most` entries."""
    dtype = _dtype_of_gradient(query, points)
    numbers = Number("query points"), Number("points points")
    contiguous = [
        arrays.add_rows(steps, Input(1 + i), arrays.rows(spec, dtype, 3), None, numbers[i])
        for i, spec in enumerate((query, points))
    ]
    size = dtype.itemsize
    largest, sums = steps.workspace("largest", size * count), steps.workspace("sums", 24 * count)
    steps.clear(largest, size * count)
    steps.clear(sums, 24 * count)
    sides = []
    for i, (spec, room) in enumerate(((query, queries), (points, count))):
        made = Spec((room, 3), dtype)
        rows = arrays.rows(made, spec.dtype, spec.shape[-1])
        sides.append((Result(i) if rows is None else steps.workspace("gradient", made.nbytes), rows))
    launch, macros = functools.partial(steps.launch, block=BACKWARD_THREADS), (_of(dtype),)
    launch(_kernel("backward_largest", macros), grid=-(-most // BACKWARD_THREADS), args=(entries, largest))
    args = entries, *contiguous, lanes, largest, sums, sides[0][0]
    launch(_kernel("backward_queries", macros), grid=-(-queries * lanes // BACKWARD_THREADS), args=args)
    of_points = entries, numbers[1], largest, sums, sides[1][0]
    launch(_kernel("backward_points", macros), grid=-(-count // BACKWARD_THREADS), args=of_points)
    for i, (out, rows) in enumerate(sides):
        arrays.add_rows(steps, out, rows, Result(i), numbers[i])
