# SPDX-License-Identifier: Apache-2.0
"""The geometry of the backbone on a GPU, as steps of a plan: what `gpu3d.flash3d.geometry` computes from arrays."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

from gpu3d._arrays import FLOAT32, FLOATS
from gpu3d.cuda import attention, buckets, clouds, layers, pooling
from gpu3d.cuda.plan import Device, Pointer, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import LOCAL_HASH


class Level(NamedTuple):
    """Where a level's arrays lie, and what its launches depend on. Its layout is that of its stage."""

    lengths: tuple[int, ...]
    slots: int
    points: Pointer  # float32 [N, 3], which slot_to_point numbers
    slot_to_point: Pointer  # int32 [slots]
    point_to_slot: Pointer  # int32 [N]
    batch: Any  # the struct Clouds, with buckets as tiles
    tables: tuple[Pointer, Pointer]  # scopes of even and of odd blocks
    scopes: tuple[int, int]  # how many each table has
    # Of pooling to the next level; None in the deepest.
    shape: Any = None  # pooling.Shape
    parents: Any = None  # the struct Clouds
    members: Any = None  # Pointer to int32 [slots of the next level, ratio], slots of this one


class _Local(NamedTuple):
    """A level's local layout."""

    positions: Pointer  # float32 [slots, 3]
    members: Any  # Pointer to those of the level above, by local slots of both; None in level 0


def add_geometry(
    steps: Steps, config: Config, lengths: tuple[int, ...], points: Pointer, device: Device
) -> tuple[list[Level], dict[str, Any]]:
    """Add everything that depends on the points alone; returns the levels, and the numbers of the steps.

    What level 0 does not need is added `beside`: join before the steps of level 1.
    """
    numbers: dict[str, Any] = {}
    levels: list[Level] = []
    local: Any = None
    size, n = config.bucket_size, lengths

    def batch_of(table: clouds.Table, name: str) -> Any:
        numbers[name] = table
        return clouds.argument(steps, name, len(n), size)

    with contextlib.ExitStack() as beside:
        for depth, hash in enumerate(config.hashes):
            name = f"level {depth}"
            if depth == 1:
                beside.enter_context(steps.beside())
            if depth:
                pooled = pooling.layout_of(n, size, config.ratio)
                parents, children = (
                    batch_of(table, f"{name} {which}")
                    for table, which in ((pooled.parents, "parents"), (pooled.children, "children"))
                )
                numbers[f"{name} padding"] = pooled.parents.groups
                local, points = _add_pooling(steps, pooled.shape, name, local, parents, children)
                n = tuple([-(-x // config.ratio) for x in n])
            sort, numbers[f"{name} sort"] = buckets.sorting(n, size, device)
            layout = functools.partial(_add_layout, steps, sort, name, points)
            if not depth:
                stage = first = layout(LOCAL_HASH)
                local = _Local(_add_positions(steps, points, first[0], sort.slots), None)
            if depth or hash != LOCAL_HASH:
                stage = layout(hash)
            batch = batch_of(attention.layout_of(n, size)[0], f"{name} buckets")
            tables, scopes = zip(*_add_scopes(steps, config, depth, n, batch_of), strict=True)
            if depth:
                members = steps.workspace(f"{name} members", 4 * config.ratio * sort.slots)
                layers.add_compose(
                    steps,
                    local.members,
                    stage[0],
                    levels[-1].point_to_slot,
                    parents,
                    batch,
                    members,
                    slots=sort.slots,
                    ratio=config.ratio,
                    local_points=first[0] if depth == 1 else None,
                )
                levels[-1] = levels[-1]._replace(shape=pooled.shape, parents=parents, members=members)
            levels.append(Level(n, sort.slots, points, *stage, batch, tables, scopes))
    return levels, numbers


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


def _add_scopes(steps: Steps, config: Config, depth: int, lengths: tuple[int, ...], batch_of: Any) -> Any:
    """Add the scopes of even and of odd blocks; returns the table and the number of scopes of each."""
    counts = [-(-n // config.bucket_size) for n in lengths]
    for shift, stride, which in ((0, 1, "even"), (config.scope // 2, config.strides[depth], "odd")):
        found = buckets.scopes_of(counts, config.bucket_size, config.scope, stride)
        table = steps.workspace(f"level {depth} {which} scopes", 4 * found.groups * config.scope)
        batch = batch_of(found, f"level {depth} {which} scopes")
        buckets.add_scopes(steps, batch, found.groups, config.scope, shift, stride, table)
        yield table, found.groups


def _add_pooling(
    steps: Steps, shape: pooling.Shape, name: str, local: _Local, parents: Any, children: Any
) -> tuple[_Local, Pointer]:
    """Add the pooling of a level's positions; returns the next level's local layout and its packed points."""
    sizes = {"members": 4 * shape.ratio, "child positions": 12, "child slots": 4, "child points": 4, "child moved": 4}
    made = tuple([steps.workspace(f"{name} {which}", size * shape.slots) for which, size in sizes.items()])
    pooling.add_groups(steps, shape, local.positions, FLOAT32, parents, children, made)
    members, positions = made[:2]
    packed = steps.workspace(f"{name} packed", 12 * shape.slots)
    layers.add_pack(steps, positions, children, packed, slots=shape.slots)
    return _Local(positions, members), packed
