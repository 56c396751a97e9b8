# SPDX-License-Identifier: Apache-2.0
"""The geometry of the backbone on a GPU, as steps of a plan: what `gpu3d.flash3d.geometry` computes from arrays.

What a plan depends on is rounded up, and the lengths of the clouds reach the kernels in tables in device memory. So one
plan, and one CUDA graph of it, serves all batches of nearly the same size. Behind the clouds of a batch lies one that
has no point, but the buckets that rounding has added: they are padding, and blocks of padding alone return early.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOATS
from gpu3d.cuda import buckets, clouds, launcher, layers, pooling
from gpu3d.cuda.plan import Device, Pointer, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import LOCAL_HASH

# ---- sizes ---------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the launches of a level depend on. All counts are upper bounds, see `rounded_up`."""

    clouds: int  # the one without points included
    sort: buckets.Sort
    largest: int  # buckets that a scope can have
    scopes: tuple[int, int]  # how many even and odd blocks have
    pooled: pooling.Shape | None  # of the level above and this one; None in level 0


class Layout(NamedTuple):
    """The layout of a batch.

    Attributes
    ----------
    sizes : tuple of Sizes
        Of each level. Without any point there is none.
    tables : bytes
        The rows of tables of clouds: those of KINDS for each level in turn.
    """

    sizes: tuple[Sizes, ...]
    tables: bytes

    @property
    def rows(self) -> int:
        """How many rows the tables have together."""
        return len(self.tables) // clouds.ROW_BYTES

    @property
    def slots(self) -> int:
        """How many slots level 0 has."""
        return self.sizes[0].sort.slots if self.sizes else 0


SORT, POOL, EVEN, ODD = KINDS = range(4)
# What tiles and groups are in the tables of a level:
#   SORT   those of the sort
#   POOL   tiles of pooling to the next level, and rows of padding
#   EVEN   buckets, and scopes of even blocks
#   ODD    scopes of odd blocks are the groups


def _step(count: int) -> int:
    return 1 << max(count.bit_length() - 5, 0)


def rounded_up(count: int) -> int:
    """The smallest number that is not smaller and has at most five significant bits: up to 1/16 larger."""
    return -(-count // _step(count)) * _step(count)


@clouds.remembered
def layout_of(lengths: tuple[int, ...], config: Config, device: Device) -> Layout:
    """The layout of clouds of these lengths."""
    if not any(lengths):
        return Layout((), b"")
    points = np.zeros((config.levels, rounded_up(len(lengths)) + 1), np.int64)
    points[0, : len(lengths)] = lengths
    for above, below in itertools.pairwise(points):
        below[:] = -(-above // config.ratio)
    held = -(-points // config.bucket_size)  # buckets
    added = [rounded_up(total) - total for total in held.sum(axis=1).tolist()]
    most = held.copy()
    most[range(config.levels), held.argmax(axis=1)] += added
    held[:, -1] = added  # of the cloud without points
    sizes = _sizes(most, config, device)
    return Layout(sizes, _tables(points, held, sizes, config).tobytes())


def _sizes(most: np.ndarray, config: Config, device: Device) -> tuple[Sizes, ...]:
    """What the launches of each level depend on, if the clouds have `most` buckets [levels, clouds].

    Their largest cloud has the buckets that rounding adds. Every slot counts as a point. So the method of a sort, and
    its tile, are the same for all lengths that are rounded up to the same number of buckets.
    """
    size, found = config.bucket_size, []
    for depth, (held, stride) in enumerate(zip(most, config.strides, strict=True)):
        sort = buckets.sort_of(held * size, held * size, size, device)
        if sort.method != "cloud":  # the cloud without points has one of each
            sort = sort._replace(tiles=rounded_up(sort.tiles + 1), groups=rounded_up(sort.groups + 1))
        scopes = _most_scopes(held, config.scope, (1, stride))
        shape = None
        if depth:
            above = most[depth - 1]
            tiles = int((-(-above * size // pooling.GROUP_TILE)).sum()) + 1
            padding = (len(held) - 1) * (size - 1) + (_step(int(above.sum())) - 1) * size
            shape = pooling.Shape(len(held), size, config.ratio, sort.slots, rounded_up(tiles), padding)
        found.append(Sizes(len(held), sort, min(config.scope, int(held.max())), scopes, shape))
    return tuple(found)


def _tables(points: np.ndarray, held: np.ndarray, sizes: tuple[Sizes, ...], config: Config) -> np.ndarray:
    """The tables int32 [levels, kinds, clouds + 1, 4] of clouds of `points` in `held` buckets [levels, clouds]."""
    levels, count = points.shape
    tables = np.zeros((levels, len(KINDS), count + 1, 4), np.int32)
    point, tile, group, slot = (tables[:, :, 1:, column] for column in range(4))
    slots = held * config.bucket_size
    point[:] = points.cumsum(axis=1)[:, None]
    slot[:] = slots.cumsum(axis=1)[:, None]
    tile[:, EVEN] = held.cumsum(axis=1)
    group[:, POOL] = (slots - points).cumsum(axis=1)
    pooled = -(-points // pooling.GROUP_TILE)
    pooled[:, -1] = 1  # who writes the padding of the children
    tile[:, POOL] = pooled.cumsum(axis=1)
    for which, strides in ((EVEN, 1), (ODD, np.array(config.strides)[:, None])):
        group[:, which] = buckets.scopes_in(held, config.scope, strides).cumsum(axis=1)
    for depth, own in enumerate(sizes):
        if own.sort.method != "cloud":
            tiles, groups = buckets.parts(own.sort, points[depth])
            tiles[-1] = groups[-1] = 1  # who writes the padding
            tile[depth, SORT], group[depth, SORT] = tiles.cumsum(), groups.cumsum()
    return tables


def _most_scopes(most: np.ndarray, size: int, strides: tuple[int, int]) -> tuple[int, int]:
    """How many scopes there are at most with each stride.

    Any number of buckets that rounding can add may be in a cloud of its own.
    """
    largest, total, by_row = int(most.max()), int(most.sum()), np.array(strides)[:, None]
    moved = np.arange(min(_step(total), largest + 1))
    both = buckets.scopes_in(largest - moved, size, by_row) + buckets.scopes_in(moved, size, by_row)
    found = buckets.scopes_in(most, size, by_row).sum(axis=1) - both[:, 0] + both.max(axis=1)
    even, odd = map(rounded_up, found.tolist())
    return even, odd


def write_tables(layout: Layout, tables: Any = None) -> Any:
    """Write the tables of a layout to the current device, into a new CuPy array or into `tables`; returns the array."""
    import cupy

    if tables is None:
        tables = cupy.empty((layout.rows, clouds.ROW_BYTES), "u1")
    address, ordinal = tables.data.ptr, tables.data.device_id
    launcher.write_table(layout.tables, address, ordinal, cupy.cuda.get_current_stream().ptr)
    return tables


# ---- steps ---------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """Where a level's arrays lie, and its sizes. Its layout is that of its stage."""

    sizes: Sizes
    points: Pointer  # float32 [N, 3], which slot_to_point numbers
    slot_to_point: Pointer  # int32 [slots]
    point_to_slot: Pointer  # int32 [N]
    batch: Any  # the struct Clouds, with buckets as tiles
    tables: tuple[Pointer, Pointer]  # of scopes, of even and of odd blocks
    # Of pooling to the next level; None in the deepest.
    shape: Any = None  # pooling.Shape
    parents: Any = None  # the struct Clouds
    members: Any = None  # Pointer to int32 [slots of the next level, ratio], slots of this one

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.sizes.sort.slots


class _Local(NamedTuple):
    """A level's local layout."""

    positions: Pointer  # float32 [slots, 3]
    members: Any  # Pointer to those of the level above, by local slots of both; None in level 0


def add_geometry(
    steps: Steps, config: Config, sizes: tuple[Sizes, ...], points: Pointer, tables: Pointer
) -> list[Level]:
    """Add everything that depends on the points alone; returns the levels. `tables` are those of the batch's Layout.

    What level 0 does not need is added `beside`: join before the steps of level 1.
    """
    levels: list[Level] = []
    first: Any = None  # the local layout of level 0
    local: Any = None  # that of the level above
    count = sizes[0].clouds

    def batch_of(depth: int, kind: int) -> Any:
        row = (depth * len(KINDS) + kind) * (count + 1)
        return clouds.at(tables + clouds.ROW_BYTES * row, count, config.bucket_size)

    with contextlib.ExitStack() as beside:
        for depth, (hash, own) in enumerate(zip(config.hashes, sizes, strict=True)):
            name = f"level {depth}"
            if depth == 1:
                beside.enter_context(steps.beside())
                local = _Local(_add_positions(steps, points, first[0], sizes[0].sort.slots), None)
            batch = batch_of(depth, EVEN)
            if depth:
                parents = batch_of(depth - 1, POOL)
                local, points = _add_pooling(steps, own.pooled, name, local, parents, batch)
            layout = functools.partial(_add_layout, steps, own.sort, depth, points, batch_of(depth, SORT))
            if not depth:
                stage = first = layout(LOCAL_HASH)
            if depth or hash != LOCAL_HASH:
                stage = layout(hash)
            scopes = _add_scopes(steps, config, depth, own, batch, batch_of(depth, ODD))
            if depth:
                members = steps.workspace(f"{name} members", 4 * config.ratio * own.sort.slots)
                layers.add_compose(
                    steps,
                    local.members,
                    stage[0],
                    levels[-1].point_to_slot,
                    parents,
                    batch,
                    members,
                    slots=own.sort.slots,
                    ratio=config.ratio,
                    local_points=first[0] if depth == 1 else None,
                )
                levels[-1] = levels[-1]._replace(shape=own.pooled, parents=parents, members=members)
            levels.append(Level(own, points, *stage, batch, scopes))
    return levels


def _add_positions(steps: Steps, points: Pointer, slot_to_point: Pointer, slots: int) -> Pointer:
    """Add the scatter of points to slots, 0 in padding."""
    out = steps.workspace("positions", 12 * slots)
    fill = bytes(buckets.PATTERN_BYTES)
    buckets.add_move(steps, points, slot_to_point, out, rows=slots, most=slots, row_bytes=12, word=4, fill=fill)
    return out


def _add_layout(
    steps: Steps, sort: buckets.Sort, depth: int, points: Pointer, batch: Any, hash: str
) -> tuple[Pointer, Pointer]:
    """Add a bucket layout: slot_to_point and point_to_slot. In level 0 the latter is -1 behind the points."""
    names = (f"level {depth} {which}" for which in ("slots", "points", "moved"))
    slots, back, moved = (steps.workspace(name, 4 * sort.slots) for name in names)
    macros = ("POINT", FLOATS.index(FLOAT32)), ("KEY", buckets.HASHES.index(hash))
    if not depth:
        steps.clear(back, 4 * sort.slots, 0xFF)
    buckets.add_sort(steps, sort, points, macros, buckets.WHOLE_CLOUD, slots, back, moved, batch)
    return slots, back


def _add_scopes(steps: Steps, config: Config, depth: int, sizes: Sizes, even: Any, odd: Any) -> tuple[Pointer, Pointer]:
    """Add the tables of the scopes of even and of odd blocks."""

    def add(which: str, batch: Any, count: int, shift: int, stride: int) -> Pointer:
        table = steps.workspace(f"level {depth} {which} scopes", 4 * count * config.scope)
        buckets.add_scopes(steps, batch, count, config.scope, shift, stride, table)
        return table

    first, second = sizes.scopes
    shifted = config.scope // 2, config.strides[depth]
    return add("even", even, first, 0, 1), add("odd", odd, second, *shifted)


def _add_pooling(
    steps: Steps, shape: Any, name: str, local: _Local, parents: Any, children: Any
) -> tuple[_Local, Pointer]:
    """Add the pooling of a level's positions; returns the next level's local layout and its packed points."""
    sizes = {"members": 4 * shape.ratio, "child positions": 12, "child slots": 4, "child points": 4, "child moved": 4}
    made = tuple([steps.workspace(f"{name} {which}", size * shape.slots) for which, size in sizes.items()])
    pooling.add_groups(steps, shape, local.positions, FLOAT32, parents, children, made)
    members, positions = made[:2]
    packed = steps.workspace(f"{name} packed", 12 * shape.slots)
    layers.add_pack(steps, positions, children, packed, slots=shape.slots)
    return _Local(positions, members), packed
