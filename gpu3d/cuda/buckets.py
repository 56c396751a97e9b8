# SPDX-License-Identifier: Apache-2.0
"""The plans of bucketize, Buckets.scatter and gather, and scopes: kernels_cu/buckets_*.cu.

Plans depend on how many buckets the clouds have, not on their lengths: grids are upper bounds, and blocks without work
return. The lengths reach the kernels in the table of clouds.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOATS, Given, Spec
from gpu3d.cuda import arrays, clouds
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Input, Kernel, Macros, Number, Plan, Pointer, Result, Steps
from gpu3d.reference.buckets import HASHES, candidates

MERGE_TILES = (1024, 2048, 4096)  # TILE of buckets_merge.cu: the smallest with which 128 tiles hold the largest cloud
MERGE_MAX_TILES = 128
MERGE_RANK_THREADS = 1024
RADIX_TILES = (8192, 10240)  # TILE of buckets_radix.cu: the one that needs less time for its waves of blocks
RADIX_THREADS = 1024
RADIX_FRAME_THREADS = 512
RADIX_DIGITS = 256
RADIX_PASSES = 6
RADIX_GROUPS = 264  # blocks that sum over the batch: two for each multiprocessor of an H100
RADIX_MAX = 2**30 - 1  # points of a cloud, whose counts have 30 bits
RADIX_NARROW = 2**24  # points of a cloud whose indices fit the 24 bits of a narrow record
PROBE_THREADS = 1024
MOVE_THREADS = 256
MOVE_ROWS_A_THREAD = 4

KEY_GIVEN = 4
FRAME_BYTES = {4: 48, 8: 64}  # struct Frame: three origins, then three extents, cells and their inverses in float32
CANDIDATES_BYTES = 256  # struct Candidates of buckets_probe.cu
PATTERN_BYTES = 16  # struct Pattern of buckets_move.cu

_SPAN = struct.Struct("<6di4x")  # struct Span of buckets.cuh: low, high, kind
_SPANS = None, "robust"  # by their kinds; bounds that are given have the next

# The parameters of each kernel as formats of the module struct; c and v stand for struct Clouds and Span.
_SIGNATURES = {
    "merge_bounds": "QcvQQ",
    "merge_tiles": "QQQfvcQQ",
    "merge_splitters": "QcQQQ",
    "merge_partitions": "QQQQcQQQ",
    "merge_clouds": "QfvcQQQ",
    "radix_frames": "QcifvQQQQ",
    "radix_keys": "QQciQQ",
    "radix_first": "QQciQQQ",
    "radix_pass": "QQQciiQQQ",
    "radix_last": "QQciQQQQQ",
    "probe_buckets": f"QQc{CANDIDATES_BYTES}sQQQQQQQQQQ",
    "move_rows": f"QQqqqi{PATTERN_BYTES}sQ",
    "move_scopes": "cqiqqQ",
}
_EARLY = "merge_tiles", "merge_splitters", "merge_partitions", "merge_clouds", "move_rows", "move_scopes"


@functools.cache
def _kernel(function: str, macros: Macros, signature: str | None = None, **options: Any) -> Kernel:
    """A kernel of buckets_<prefix of its name>.cu."""
    formats, prefix = signature or _SIGNATURES[function], function.split("_")[0]
    formats = formats.replace("c", clouds.FORMAT).replace("v", f"{_SPAN.size}s")
    return Kernel("buckets_" + prefix, function, formats, macros, early=function in _EARLY, **options)


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    coordinates = [("POINT", p) for p in range(len(FLOATS))]
    keys = [("KEY", k) for k in range(len(HASHES))]
    given = [("POINT", 0), ("KEY", KEY_GIVEN)]
    modules = []
    for macros in [*((p, k) for p in coordinates for k in keys), tuple(given)]:
        modules += [Configuration("buckets_merge", (*macros, ("TILE", tile))) for tile in MERGE_TILES]
        modules += [Configuration("buckets_radix", (*macros, ("TILE", tile))) for tile in RADIX_TILES]
        if macros[1][1] != KEY_GIVEN:
            modules += [Configuration("buckets_probe", macros)]
    return [*modules, *(Configuration("buckets_move", (("WORD", word),)) for word in (1, 2, 4, 8, 16))]


# ---- the sort that makes a layout ----------------------------------------------------------------------------------


class Sort(NamedTuple):
    """How a batch of clouds is sorted by key. A plan depends on lengths only through this."""

    method: str  # "cloud": one block per cloud; "merge": clouds of up to 128 tiles; "radix": others
    clouds: int
    bucket_size: int
    slots: int
    tile: int  # points in a tile
    tiles: int  # an upper bound on the tiles of the batch
    groups: int  # an upper bound on the partitions of "merge", or on the groups of points of "radix"
    group: int = 0  # points in a group of "radix"
    wide: bool = False  # "radix": indices have 32 bits


def sorting(lengths: Sequence[int] | np.ndarray, bucket_size: int, device: Device) -> tuple[Sort, clouds.Table]:
    """How clouds, not all of them empty, are sorted into buckets; and the table of the clouds."""
    n: Any = clouds.array(lengths) if len(lengths) > clouds.INLINE_CLOUDS else lengths
    slots = clouds.slots_of(n, bucket_size)
    sort = sort_of(n, slots, bucket_size, device)
    return sort, clouds.table(n, bucket_size, *parts(sort, n), slots)


def sort_of(n: Any, most: Any, bucket_size: int, device: Device) -> Sort:
    """How clouds of n points, whose buckets can hold `most`, are sorted. Both are lists or arrays."""
    largest, slots = _largest(n), total(most)
    if largest > RADIX_MAX:
        raise ValueError(f"a cloud on a GPU has at most 2**30 - 1 points, got {largest}. Cut it into several clouds.")
    if largest <= MERGE_TILES[-1]:
        tile = next(t for t in MERGE_TILES if t >= largest)
        return Sort("cloud", len(n), bucket_size, slots, tile, 0, 0)
    if largest <= MERGE_MAX_TILES * MERGE_TILES[-1]:
        tile = next(t for t in MERGE_TILES if MERGE_MAX_TILES * t >= largest)
        sort = Sort("merge", len(n), bucket_size, slots, tile, 0, 0)
    else:
        tile, group = _radix_tile(device, most), _radix_group(slots)
        sort = Sort("radix", len(n), bucket_size, slots, tile, 0, 0, group, largest > RADIX_NARROW)
    tiles, groups = map(total, parts(sort, most))
    return sort._replace(tiles=tiles, groups=groups)


def parts(sort: Sort, n: Any) -> tuple[Any, Any]:
    """How many tiles and groups each cloud of n points has; None where the sort has none."""
    if sort.method == "cloud":
        return None, None
    if sort.method == "merge":
        return _each(lambda n: -(-n // sort.tile), n), _each(functools.partial(_partitions, tile=sort.tile), n)
    return _each(lambda n: -(-n // sort.tile), n), _each(lambda n: -(-n // sort.group), n)


def _each(function: Any, n: Any) -> Any:
    """The function of every length; an array is passed as a whole."""
    return function(n) if isinstance(n, np.ndarray) else [function(x) for x in n]


def total(n: Any) -> int:
    """The sum of lengths, which may be an array."""
    return int(n.sum()) if isinstance(n, np.ndarray) else sum(n)


def _largest(n: Any) -> int:
    """The largest of lengths, which may be an array."""
    return int(n.max()) if isinstance(n, np.ndarray) else max(n)


def _partitions(n: Any, tile: int) -> Any:
    """Partitions of a cloud of n points in buckets_merge.cu: one for every SPAN samples, and at least one."""
    full = -(-n // tile) - 1  # tiles before the last one
    phase = full * 13 + 16 & 31  # in the last tile, which of every 32 keys is a sample
    samples = full * (tile // 32) + (n - full * tile + 31 - phase) // 32
    partitions = -(-samples // (tile // 64))
    return np.maximum(partitions, 1) * (n > 0) if isinstance(n, np.ndarray) else max(partitions, 1) if n else 0


def _radix_group(points: int) -> int:
    """Points of a block in kernels that sum over the whole batch."""
    return max(4096, -(-points // (32 * RADIX_GROUPS)) * 32)


def _radix_shared(tile: int) -> int:
    """Shared memory of a block of radix_pass: records, their digits, and where digits start."""
    return 9 * tile + 2 * RADIX_THREADS // 32 * RADIX_DIGITS


def _radix_tile(device: Device, lengths: Any) -> int:
    """Points in a tile of radix_pass."""

    def points_a_multiprocessor(tile: int) -> tuple[int, int]:
        tiles = total(_each(lambda n: -(-n // tile), lengths))
        return -(-tiles // device.multiprocessors) * tile, -tile

    fitting = [tile for tile in RADIX_TILES if _radix_shared(tile) <= device.shared_mem]
    return min(fitting, key=points_a_multiprocessor)


class Grid(NamedTuple):
    """The voxels of points, as far as a plan depends on them, and what their kernels get."""

    cell: Number | float  # 0: an isotropic cell; -1: a cell for each axis
    span: Number | bytes  # struct Span
    robust: bool  # whether the bounds are robust ones


def packed_span(bounds: Any) -> bytes:
    """The struct Span of checked bounds."""
    if isinstance(bounds, tuple):
        return _SPAN.pack(*bounds[0], *bounds[1], len(_SPANS))
    return _SPAN.pack(*[0.0] * 6, _SPANS.index(bounds))


WHOLE_CLOUD = Grid(0.0, packed_span(None), robust=False)
MOST_OF_CLOUD = Grid(0.0, packed_span("robust"), robust=True)


def add_sort(
    steps: Steps,
    sort: Sort,
    keys: Pointer,
    macros: Macros,
    grid: Grid,
    slot_to_point: Pointer,
    point_to_slot: Pointer,
    moved: Pointer | None,
    batch: Any,
) -> None:
    """Add the launches that sort contiguous keys: points in a grid, or with KEY_GIVEN in `macros` bucket numbers.

    `batch` is the struct Clouds of `sorting`. The word at `moved` is set to 0.
    """
    given = macros[1][1] == KEY_GIVEN
    results = slot_to_point, point_to_slot, moved
    if sort.method == "cloud":
        kernel = _kernel("merge_clouds", (*macros, ("TILE", sort.tile)), "QcQQQ" if given else None)
        source = (keys,) if given else (keys, grid.cell, grid.span)
        steps.launch(kernel, grid=sort.clouds, block=sort.tile // 4, args=(*source, batch, *results))
    elif sort.method == "merge":
        _add_merge(steps, sort, keys, macros, grid, batch, results)
    else:
        _add_radix(steps, sort, keys, macros, grid, batch, results)


def _add_merge(
    steps: Steps, sort: Sort, keys: Pointer, macros: Macros, grid: Grid, batch: Any, results: tuple[Any, ...]
) -> None:
    """Add four launches of buckets_merge.cu, or three if the keys are given."""
    (_, point), (_, key) = macros
    tile, tiles, partitions = sort.tile, sort.tiles, sort.groups
    threads, tiled = tile // 4, (*macros, ("TILE", tile))
    ordered = steps.workspace("sorted", 8 * tile * tiles)
    sampled = steps.workspace("samples", tile // 4 * tiles)
    splitter = steps.workspace("splitters", 8 * partitions)
    splitter_tile = steps.workspace("splitters' tiles", 4 * partitions)
    below = steps.workspace("samples below", MERGE_MAX_TILES * partitions)
    if key == KEY_GIVEN:
        sort_tiles, source = _kernel("merge_tiles", tiled, "QcQQ"), (keys,)
    else:
        size = 6 * _bound_bytes(FLOATS[point])
        bounds, robust = steps.workspace("bounds", size * tiles), _add_robust(steps, size, sort, grid)
        args: tuple[Any, ...] = keys, batch, grid.span, bounds, robust
        blocks = tiles + sort.clouds * grid.robust
        steps.launch(_kernel("merge_bounds", tiled), grid=blocks, block=threads, args=args)
        sort_tiles = _kernel("merge_tiles", tiled)
        source = (keys, bounds, robust, grid.cell, grid.span)  # type: ignore[assignment]
    steps.launch(sort_tiles, grid=tiles, block=threads, args=(*source, batch, ordered, sampled))
    args = sampled, batch, splitter, splitter_tile, below
    steps.launch(_kernel("merge_splitters", tiled), grid=tiles, block=MERGE_RANK_THREADS, args=args)
    join = _kernel("merge_partitions", tiled, shared_mem=12 * 32 * (tile // 64 + MERGE_MAX_TILES))
    args = ordered, splitter, splitter_tile, below, batch, *results
    steps.launch(join, grid=partitions, block=threads, args=args)


def _add_radix(
    steps: Steps, sort: Sort, keys: Pointer, macros: Macros, grid: Grid, batch: Any, results: tuple[Any, ...]
) -> None:
    """Add eight launches of buckets_radix.cu, or seven if the keys are given."""
    tiled, count_bytes = (*macros, ("TILE", sort.tile)), 4 * RADIX_PASSES * RADIX_DIGITS
    # What begins at zero lies in one piece: one clear costs a graph one node, of about 2 us.
    sizes = 4 * RADIX_PASSES, count_bytes * sort.clouds, count_bytes * sort.tiles, 4 * sort.clouds
    ticket = steps.workspace("tickets, histogram, published, arrived", sum(sizes))
    histogram = ticket + sizes[0]
    published = histogram + sizes[1]
    arrived = published + sizes[2]
    steps.clear(ticket, sum(sizes))
    records = [steps.workspace("records", 8 * sort.slots) for _ in range(2 + sort.wide)]
    if macros[1][1] == KEY_GIVEN:
        key, source = _kernel("radix_keys", tiled, "QciQQ"), (keys,)
    else:
        frames = _add_frames(steps, sort, keys, macros, grid, batch, arrived)
        key, source = _kernel("radix_keys", tiled), (keys, frames)  # type: ignore[assignment]
    args: tuple[Any, ...] = *source, batch, sort.group, records[0], histogram
    steps.launch(key, grid=sort.groups, block=RADIX_THREADS, args=args)
    first, move, last = (
        _kernel("radix_" + name, tiled, shared_mem=_radix_shared(sort.tile)) for name in ("first", "pass", "last")
    )
    run = functools.partial(steps.launch, grid=sort.tiles, block=RADIX_THREADS)
    rest = int(sort.wide), ticket, published
    # Each pass moves records from one array to the other. If wide, the first holds the keys until pass 1 has read them.
    one, other = records[-1], records[-2]
    run(first, args=(records[0], histogram, batch, *rest, one))
    for number in range(1, RADIX_PASSES - 1):
        run(move, args=(records[0], one, histogram, batch, number, *rest, other))
        one, other = other, one
    run(last, args=(one, histogram, batch, *rest, *results))


def _bound_bytes(dtype: np.dtype) -> int:
    return 8 if dtype.itemsize == 8 else 4


def _add_robust(steps: Steps, size: int, sort: Sort, grid: Grid) -> Pointer | None:
    """The memory of the robust bounds of every cloud, of `size` bytes each."""
    return steps.workspace("robust bounds", size * sort.clouds) if grid.robust else None


def _add_frames(
    steps: Steps, sort: Sort, points: Pointer, macros: Macros, grid: Grid, batch: Any, arrived: Pointer
) -> Pointer:
    """Add the launch of buckets_radix.cu that computes the voxel frame of every cloud.

    `arrived` points to a word for each cloud, all of them zero.
    """
    size = _bound_bytes(FLOATS[macros[0][1]])
    bounds, robust = steps.workspace("bounds", 6 * size * sort.groups), _add_robust(steps, 6 * size, sort, grid)
    frames = steps.workspace("frames", FRAME_BYTES[size] * sort.clouds)
    kernel = _kernel("radix_frames", (*macros, ("TILE", RADIX_TILES[0])))  # this kernel does not use TILE
    args = points, batch, sort.group, grid.cell, grid.span, arrived, bounds, robust, frames
    blocks = sort.groups + sort.clouds * grid.robust
    steps.launch(kernel, grid=blocks, block=RADIX_FRAME_THREADS, args=args)
    return frames


# ---- bucketize -----------------------------------------------------------------------------------------------------


def bucketize(
    points: Given | Spec,
    lengths: Sequence[int] | np.ndarray,
    bucket_size: int,
    hash: str,
    balance: str,
    voxel_size: float | str | None,
    seed: int,
    bounds: Any,
    device: Device,
) -> Call:
    """Input: points [N, 3]. Results: slot_to_point, point_to_slot, moved."""
    copied = arrays.copied(points)
    return _bucketize(lengths, points.dtype, copied, bucket_size, hash, balance, voxel_size, seed, bounds, device)


@clouds.remembered
def _bucketize(
    lengths: Sequence[int] | np.ndarray,
    dtype: np.dtype,
    copied: arrays.Strided | None,
    bucket_size: int,
    hash: str,
    balance: str,
    voxel_size: float | str | None,
    seed: int,
    bounds: Any,
    device: Device,
) -> Call:
    numbers: dict[str, Any] = {"cell": -1.0 if voxel_size == "per_axis" else float(voxel_size or 0.0)}
    numbers["span"], robust = packed_span(bounds), bounds == "robust"
    if not any(lengths):
        return Call(_empty_plan(), numbers)
    sort, numbers["clouds"] = sorting(lengths, bucket_size, device)
    key = HASHES.index(hash)
    if balance == "spill":
        return Call(_spill_plan(sort, dtype, copied, key, robust), numbers)
    group = _radix_group(sort.slots)
    n: Any = clouds.array(lengths) if len(lengths) > clouds.INLINE_CLOUDS else lengths
    slots = clouds.slots_of(n, bucket_size)
    tiles, groups = (_each(lambda n, by=by: -(-n // by), n) for by in (bucket_size, group))
    numbers["probed"] = clouds.table(n, bucket_size, tiles, groups, slots)
    numbers["candidates"] = _packed_candidates(seed)
    most = total(_each(lambda n: -(-n // group), slots))
    probed = Sort("probe", sort.clouds, bucket_size, sort.slots, bucket_size, numbers["probed"].tiles, most, group)
    return Call(_probe_plan(sort, probed, dtype, copied, key, robust, device.multiprocessors), numbers)


@functools.cache
def _empty_plan() -> Plan:
    steps = Steps(inputs=1, results=3)
    steps.clear(Result(2), 4)
    return steps.plan()


@functools.lru_cache(maxsize=512)
def _spill_plan(sort: Sort, dtype: np.dtype, copied: arrays.Strided | None, key: int, robust: bool) -> Plan:
    steps = Steps(inputs=1, results=3)
    points = arrays.add_copy(steps, Input(0), copied)
    macros = ("POINT", FLOATS.index(dtype)), ("KEY", key)
    batch = clouds.argument(steps, "clouds", sort.clouds, sort.bucket_size)
    grid = Grid(Number("cell"), Number("span"), robust)
    add_sort(steps, sort, points, macros, grid, Result(0), Result(1), Result(2), batch)
    return steps.plan()


@functools.lru_cache(maxsize=256)
def _probe_plan(
    sort: Sort,
    probed: Sort,
    dtype: np.dtype,
    copied: arrays.Strided | None,
    key: int,
    robust: bool,
    multiprocessors: int,
) -> Plan:
    """The plan for balance="probe": find the bucket of each point, numbered over the batch, and sort by it."""
    steps = Steps(inputs=1, results=3)
    points = arrays.add_copy(steps, Input(0), copied)
    macros = ("POINT", FLOATS.index(dtype)), ("KEY", key)
    moved = Result(2)
    batch = clouds.argument(steps, "probed", probed.clouds, probed.bucket_size)
    buckets, blocks = probed.tiles, min(multiprocessors, -(-probed.slots // PROBE_THREADS))
    # Proposals in all and of each block, then the words that count the arrivals of blocks and of groups.
    proposals = 12 * buckets, 12 * buckets * blocks
    size = sum(proposals) + 4 + 4 * probed.clouds
    totals = steps.workspace("proposals, arrived", size)
    counts, arrived = totals + proposals[0], totals + sum(proposals)
    steps.clear(totals, size)
    steps.clear(moved, 4)
    rooms, cursors = (steps.workspace(name, 4 * buckets * blocks) for name in ("rooms", "cursors"))
    left = steps.workspace("left", 4 * blocks)
    voxels = steps.workspace("voxels", 8 * probed.slots)
    proposal, home = (steps.workspace(name, 4 * probed.slots) for name in ("proposal", "home"))
    grid = Grid(Number("cell"), Number("span"), robust)
    frames = _add_frames(steps, probed, points, macros, grid, batch, arrived + 4)
    scratch = arrived, totals, counts, rooms, cursors, left, voxels, proposal
    args = points, frames, batch, Number("candidates"), *scratch, home, moved
    steps.launch(_kernel("probe_buckets", macros, cooperative=True), grid=blocks, block=PROBE_THREADS, args=args)
    batch = clouds.argument(steps, "clouds", sort.clouds, sort.bucket_size)
    add_sort(steps, sort, home, (("POINT", 0), ("KEY", KEY_GIVEN)), WHOLE_CLOUD, Result(0), Result(1), None, batch)
    return steps.plan()


@functools.lru_cache(maxsize=64)
def _packed_candidates(seed: int) -> bytes:
    """The bytes of struct Candidates."""
    return ((candidates(seed) + 4) @ (1, 16, 256)).astype("<u2").tobytes()


# ---- scatter and gather --------------------------------------------------------------------------------------------


def move_rows(rows: Given | Spec, index: Given | Spec, pattern: bytes) -> Call:
    """Inputs: rows [R, ...], index int32 [n]. Result: rows[index], with the fill pattern where the index is -1."""
    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    numbers = {"rows": index.shape[0], "fill": pattern}
    # scatter reads points by an index over slots, and gather the reverse. The number of slots bounds both.
    most = max(rows.shape[0], index.shape[0])
    copied = arrays.copied(rows)
    word = math.gcd(16, row_bytes, 0 if copied else rows.misalignment)
    return Call(_move_plan(most, row_bytes, word, copied, index.misalignment), numbers)


@functools.lru_cache(maxsize=512)
def _move_plan(most: int, row_bytes: int, word: int, copied: arrays.Strided | None, misalignment: int) -> Plan:
    steps = Steps(inputs=2, results=1)
    if row_bytes:
        rows = arrays.add_copy(steps, Input(0), copied)
        fill = Number("fill")
        add_move(
            steps, rows, Input(1), Result(0), rows=Number("rows"), most=most, row_bytes=row_bytes, word=word, fill=fill
        )
    return steps.plan()


def add_move(
    steps: Steps,
    source: Pointer,
    index: Pointer,
    out: Pointer,
    *,
    rows: Number | int,
    most: int,
    row_bytes: int,
    word: int,
    fill: Number | bytes,
    pitch: int | None = None,
) -> None:
    """Add out[i] = source[index[i]] for `rows` rows, at most `most`, with the fill pattern where the index is -1.

    Rows of the source are `pitch` bytes apart (default: row_bytes). Addresses, rows and pitch are multiples of `word`
    bytes: a power of two up to 16.
    """
    words = row_bytes // word
    lane_bits = min(8, (words - 1).bit_length())
    rows_a_block = (MOVE_THREADS >> lane_bits) * MOVE_ROWS_A_THREAD
    args = source, index, rows, words, (pitch or row_bytes) // word, lane_bits, fill, out
    steps.launch(_kernel("move_rows", (("WORD", word),)), grid=-(-most // rows_a_block), block=MOVE_THREADS, args=args)


@functools.lru_cache(maxsize=256)
def _fill_pattern(value: bytes) -> bytes:
    return (value * PATTERN_BYTES)[:PATTERN_BYTES]


def fill_pattern(value: np.ndarray) -> bytes:
    """The bytes of struct Pattern for a scalar of the rows' dtype."""
    return _fill_pattern(value.tobytes())


# ---- scopes --------------------------------------------------------------------------------------------------------


@clouds.remembered
def scopes(bucket_offsets: Sequence[int] | np.ndarray, bucket_size: int, size: int, shift: int, stride: int) -> Call:
    """No input. Result: the table int32 [scopes, size]."""
    if len(bucket_offsets) - 1 > clouds.INLINE_CLOUDS:
        counts: Any = np.diff(clouds.array(bucket_offsets))
    else:
        counts = [end - begin for begin, end in itertools.pairwise(bucket_offsets)]
    stride = min(stride, max(1, _largest(counts) if len(counts) else 0))  # a larger stride gives the same scopes
    table = scopes_of(counts, bucket_size, size, stride)
    plan = _scopes_plan(len(counts), bucket_size, table.groups, size)
    return Call(plan, {"clouds": table, "shift": shift, "stride": stride})


def scopes_of(counts: Any, bucket_size: int, size: int, stride: int) -> clouds.Table:
    """The table of clouds with these numbers of buckets, a list or an array, whose groups are their scopes."""
    groups = _each(lambda count: scopes_in(count, size, stride), counts)
    slots = _each(lambda count: count * bucket_size, counts)
    return clouds.table(slots, bucket_size, None, groups, slots)


def scopes_in(count: Any, size: int, stride: Any) -> Any:
    """How many scopes a cloud of `count` buckets has; arrays give an array."""
    chunks, rest = divmod(count, size * stride)
    return chunks * stride + (np.minimum(rest, stride) if isinstance(count, np.ndarray) else min(rest, stride))


@functools.lru_cache(maxsize=256)
def _scopes_plan(count: int, bucket_size: int, rows: int, size: int) -> Plan:
    steps = Steps(inputs=0, results=1)
    if rows:
        batch = clouds.argument(steps, "clouds", count, bucket_size)
        add_scopes(steps, batch, rows, size, Number("shift"), Number("stride"), Result(0))
    return steps.plan()


def add_scopes(
    steps: Steps, batch: Any, rows: int, size: int, shift: Number | int, stride: Number | int, out: Pointer
) -> None:
    """Add the table of scopes int32 [rows, size]. `batch` is the struct Clouds of `scopes_of`."""
    args = batch, rows * size, size, shift, stride, out
    kernel = _kernel("move_scopes", (("WORD", 16),))
    steps.launch(kernel, grid=-(-rows * size // MOVE_THREADS), block=MOVE_THREADS, args=args)
