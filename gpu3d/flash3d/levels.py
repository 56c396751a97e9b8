# SPDX-License-Identifier: Apache-2.0
"""The geometry of the backbone on a GPU, as steps of a plan: what `gpu3d.flash3d.geometry` computes from arrays."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu3d._arrays import FLOAT32, FLOATS
from gpu3d.cuda import attention, buckets, clouds, layers, pooling
from gpu3d.cuda.plan import Device, Pointer, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import LOCAL_HASH

# ---- sizes ---------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the launches of a level depend on: how many buckets the clouds have, and not how many points."""

    clouds: int
    sort: buckets.Sort
    largest: int  # buckets of the largest cloud
    scopes: tuple[int, int]  # how many even and odd blocks have
    pooled: pooling.Shape | None  # of the level above and this one; None in level 0


def sizes_of(config: Config, lengths: tuple[int, ...], device: Device) -> tuple[tuple[Sizes, ...], dict[str, Any]]:
    """The sizes of the levels, and the numbers of the steps of `add_geometry`. Not all clouds are empty."""
    size, n = config.bucket_size, lengths
    found: list[Sizes] = []
    numbers: dict[str, Any] = {}
    for depth, stride in enumerate(config.strides):
        name, shape = f"level {depth}", None
        if depth:
            pooled = pooling.layout_of(n, size, config.ratio)
            numbers |= {f"{name} parents": pooled.parents, f"{name} children": pooled.children}
            numbers[f"{name} padding"] = pooled.parents.groups
            n, shape = tuple([-(-x // config.ratio) for x in n]), pooled.shape
        sort, numbers[f"{name} sort"] = buckets.sorting(n, size, device)
        numbers[f"{name} buckets"], largest = attention.layout_of(n, size)
        counts = [-(-x // size) for x in n]
        even, odd = (buckets.scopes_of(counts, size, config.scope, step) for step in (1, stride))
        numbers |= {f"{name} even scopes": even, f"{name} odd scopes": odd}
        found.append(Sizes(len(n), sort, largest, (even.groups, odd.groups), shape))
    return tuple(found), numbers


# ---- steps ---------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """Where a level's arrays lie, and its sizes. Its layout is that of its stage."""

    sizes: Sizes
    points: Pointer  # float32 [N, 3], which slot_to_point numbers
    slot_to_point: Pointer  # int32 [slots]
    point_to_slot: Pointer  # int32 [N]
    batch: Any  # the struct Clouds, with buckets as tiles
    tables: tuple[Pointer, Pointer]  # scopes of even and of odd blocks
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


def add_geometry(steps: Steps, config: Config, sizes: tuple[Sizes, ...], points: Pointer) -> list[Level]:
    """Add everything that depends on the points alone; returns the levels.

    What level 0 does not need is added `beside`: join before the steps of level 1.
    """
    levels: list[Level] = []
    local: Any = None

    def batch_of(name: str) -> Any:
        return clouds.argument(steps, name, sizes[0].clouds, config.bucket_size)

    with contextlib.ExitStack() as beside:
        for depth, (hash, own) in enumerate(zip(config.hashes, sizes, strict=True)):
            name = f"level {depth}"
            if depth == 1:
                beside.enter_context(steps.beside())
            if depth:
                parents, children = (batch_of(f"{name} {which}") for which in ("parents", "children"))
                local, points = _add_pooling(steps, own.pooled, name, local, parents, children)
            layout = functools.partial(_add_layout, steps, own.sort, name, points)
            if not depth:
                stage = first = layout(LOCAL_HASH)
                local = _Local(_add_positions(steps, points, first[0], own.sort.slots), None)
            if depth or hash != LOCAL_HASH:
                stage = layout(hash)
            batch = batch_of(f"{name} buckets")
            tables = _add_scopes(steps, config, depth, own, batch_of)
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
            levels.append(Level(own, points, *stage, batch, tables))
    return levels


def _add_positions(steps: Steps, points: Pointer, slot_to_point: Pointer, slots: int) -> Pointer:
    """Add the scatter of points to slots, 0 in padding."""
    out = steps.workspace("positions", 12 * slots)
    fill = bytes(buckets.PATTERN_BYTES)
    buckets.add_move(steps, points, slot_to_point, out, rows=slots, most=slots, row_bytes=12, word=4, fill=fill)
    return out


def _add_layout(steps: Steps, sort: buckets.Sort, name: str, points: Pointer, hash: str) -> tuple[Pointer, Pointer]:
    """Add a bucket layout: slot_to_point and point_to_slot."""
    slots, back, moved = (steps.workspace(f"{name} {which}", 4 * sort.slots) for which in ("slots", "points", "moved"))
    macros = ("POINT", FLOATS.index(FLOAT32)), ("KEY", buckets.HASHES.index(hash))
    buckets.add_sort(steps, sort, points, macros, 0.0, slots, back, moved, table=f"{name} sort")
    return slots, back


def _add_scopes(
    steps: Steps, config: Config, depth: int, sizes: Sizes, batch_of: Callable[[str], Any]
) -> tuple[Pointer, Pointer]:
    """Add the tables of the scopes of even and of odd blocks."""

    def add(which: str, count: int, shift: int, stride: int) -> Pointer:
        name = f"level {depth} {which} scopes"
        table = steps.workspace(name, 4 * count * config.scope)
        buckets.add_scopes(steps, batch_of(name), count, config.scope, shift, stride, table)
        return table

    even, odd = sizes.scopes
    return add("even", even, 0, 1), add("odd", odd, config.scope // 2, config.strides[depth])


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
