# SPDX-License-Identifier: Apache-2.0
"""The plans of apml, apml_plan and APML's backward: kernels_cu/transport_*.cu, after the index of both clouds.

With max_entries, one plan does everything (`apml`). Without it, a call is two plans. `search` finds the entries that
the points keep of each other, and the host reads their number. Then `transport` computes losses and gradients from the
memory that `search` has written, or `entries` the entries of the transport plan.
"""

from __future__ import annotations

import functools
import math
import struct
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOAT64, FLOATS, INT32, INT64, Spec
from gpu3d.cuda import arrays, clouds, neighbors
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.neighbors import Layout, Side
from gpu3d.cuda.plan import (
    GAP,
    PIECE,
    Call,
    Device,
    Input,
    Kernel,
    Macros,
    Number,
    Packed,
    Plan,
    Pointer,
    Result,
    Steps,
)
from gpu3d.reference import transport as reference
from gpu3d.reference.transport import Options

SEARCH_THREADS = 128
PLAN_THREADS = 512  # the same constant as in transport_plan.cu; the next one too
PLAN_BLOCKS = 2  # blocks on a multiprocessor
PLAN_SLOTS = 128  # the least slots of a block, so that small clouds wait for few blocks
BACKWARD_THREADS = 256
MOST_ENTRIES = 2**32 - 1

_NAMES = "pred", "target", "both"  # the names of the batches in the numbers of a call
_MASSES = struct.Struct(f"<Q{clouds.INLINE_CLOUDS}d")  # struct Masses of transport_search.cu

# The parameters of each kernel as formats of the module struct; c, x, m, k, s and p stand for struct Clouds, Index,
# Masses, Kept, Side and Plan.
_SIGNATURES = {
    "transport_search": "Qcixcmk",
    "transport_plan": "ssccpQQQiQQQQQd",
    "transport_backward": "QQqQQqcciQiqi",
}
_FORMATS = {
    "c": clouds.FORMAT,
    "x": neighbors.INDEX_FORMAT,
    "m": f"{_MASSES.size}s",
    "k": "56s",
    "s": "80s",
    "p": "40s",
}


@functools.cache
def _kernel(function: str, macros: Macros = (), **options: Any) -> Kernel:
    """The kernel of this name, from the file of this name."""
    signature = "".join(_FORMATS.get(kind, kind) for kind in _SIGNATURES[function])
    return Kernel(function, function, signature, macros, **options)


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    reals = [neighbors.of_real(wide) for wide in (False, True)]
    plans = [Configuration("transport_plan", (("MINIMUM", minimum), *real)) for real in reals for minimum in range(2)]
    backwards = [Configuration("transport_backward", (("GRADIENT", g),)) for g in range(len(FLOATS))]
    return [*(Configuration("transport_search", real) for real in reals), *plans, *backwards]


# ---- what plans and calls depend on --------------------------------------------------------------------------------


class Batches(NamedTuple):
    """Two batches of clouds, as far as a plan depends on them. Batches of about the same size are equal."""

    sides: tuple[Side, Side]  # pred and target
    both: Layout  # the clouds of pred and then those of target

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """The layouts of pred and of target."""
        return self.sides[0].layout, self.sides[1].layout

    @property
    def wide(self) -> bool:
        """Whether coordinates, losses and gradients are float64."""
        return neighbors.is_wide(self.sides[0].spec, self.sides[1].spec)


class Pair(NamedTuple):
    """pred and target of a call, made by `pair`."""

    pred: Spec
    target: Spec
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    batches: Batches
    tables: dict[str, Any]  # the numbers that describe their clouds
    slots: tuple[int, int]
    device: Device


class _Outcome(NamedTuple):
    """What the kernel that makes the plan writes, and in how many blocks."""

    minimum: bool  # whether symmetrize is "min"
    each: bool  # whether it writes a loss for each cloud, or one for all
    gradients: tuple[tuple[np.dtype, int], ...]  # dtype and columns of both gradients, or empty
    blocks: int
    wide: bool  # whether it computes and writes float64


def pair(
    pred: Spec, pred_lengths: tuple[int, ...], target: Spec, target_lengths: tuple[int, ...], device: Device
) -> Pair:
    """The batches of a call, checked and laid out for its plans."""
    x, x_tables = neighbors.side(pred, pred_lengths, False, None)
    y, y_tables = neighbors.side(target, target_lengths, False, None)
    both, tables = neighbors.pair_layout(pred_lengths, target_lengths, device)
    wide = neighbors.is_wide(pred, target)
    numbers = {**x_tables.numbers("pred", wide), **y_tables.numbers("target", wide), **tables.numbers("both", wide)}
    batches, slots = Batches((x, y), both), (x_tables.slots, y_tables.slots)
    return Pair(pred, target, (pred_lengths, target_lengths), batches, numbers, slots, device)


def _outcome(pair: Pair, options: Options, reduction: str, with_grad: bool) -> _Outcome:
    most = max(layout.slots for layout in pair.batches.layouts)
    blocks = max(1, min(PLAN_BLOCKS * pair.device.multiprocessors, -(-most // PLAN_SLOTS)))
    gradients = tuple((side.dtype, side.shape[-1]) for side in (pair.pred, pair.target) if with_grad)
    return _Outcome(options.symmetrize == "min", reduction == "none", gradients, blocks, pair.batches.wide)


def _search_numbers(pair: Pair, options: Options, room: int) -> dict[str, Any]:
    of_pred, of_target = (_masses(counts, options.p_min) for counts in reversed(pair.lengths))
    limit = reference.log_threshold(options.threshold)
    return {**pair.tables, "pred masses": of_pred, "target masses": of_target, "limit": limit, "room": room}


def _outcome_numbers(pair: Pair, options: Options, reduction: str, room: int) -> dict[str, Any]:
    parts = float(len(pair.lengths[0])) if reduction == "mean" else 1.0
    return {**pair.tables, "iterations": options.iterations, "parts": parts, "room": room}


def _masses(counts: tuple[int, ...], p_min: float) -> Any:
    """The number for struct Masses, for clouds whose points choose among `counts` points."""
    return (_small_masses if len(counts) <= clouds.INLINE_CLOUDS else _large_masses)(counts, p_min)


@functools.lru_cache(maxsize=512)
def _small_masses(counts: tuple[int, ...], p_min: float) -> bytes:
    masses = [reference.log_mass(count, p_min) for count in counts]
    return _MASSES.pack(0, *masses, *[0.0] * (clouds.INLINE_CLOUDS - len(masses)))


def _large_masses(counts: tuple[int, ...], p_min: float) -> clouds.Table:
    different, which = np.unique(counts, return_inverse=True)
    rows = -(-len(counts) // 2)  # two masses in a row
    masses = np.zeros(2 * rows)
    masses[: len(counts)] = np.array([reference.log_mass(count, p_min) for count in different.tolist()])[which]
    return clouds.Table(b"", masses.tobytes(), 0, 0)


def check_room(entries: int) -> None:
    """Raise a ValueError for more entries than 32-bit numbers can count."""
    if entries > MOST_ENTRIES:
        raise ValueError(
            f"a plan has at most 2**32 - 1 entries, got max_entries = {entries}: pass fewer clouds at a time."
        )


def capacity(entries: int) -> int:
    """The number of entries, rounded up, so that one plan serves many calls."""
    check_room(entries)
    return min(1 << (entries - 1).bit_length(), MOST_ENTRIES) if entries else 0


# ---- losses and gradients, with room for a given number of entries -------------------------------------------------


def apml(
    pred: Spec,
    pred_lengths: tuple[int, ...],
    target: Spec,
    target_lengths: tuple[int, ...],
    options: Options,
    reduction: str,
    max_entries: int,
    with_grad: bool,
    device: Device,
) -> Call:
    """Inputs: pred and target. Results: the loss, and both gradients, which are empty unless asked for."""
    return _apml(pred_lengths, target_lengths, pred, target, options, reduction, max_entries, with_grad, device)


@clouds.remembered
def _apml(
    pred_lengths: tuple[int, ...],
    target_lengths: tuple[int, ...],
    pred: Spec,
    target: Spec,
    options: Options,
    reduction: str,
    max_entries: int,
    with_grad: bool,
    device: Device,
) -> Call:
    check_room(max_entries)
    both = pair(pred, pred_lengths, target, target_lengths, device)
    numbers = _search_numbers(both, options, max_entries) | _outcome_numbers(both, options, reduction, max_entries)
    return Call(_apml_plan(both.batches, _outcome(both, options, reduction, with_grad), max_entries), numbers)


@functools.lru_cache(maxsize=256)
def _apml_plan(batches: Batches, outcome: _Outcome, room: int) -> Plan:
    steps = Steps(inputs=2, results=3)
    kept = _kept_at(steps.workspace("kept", kept_bytes(batches.layouts)), batches.layouts)
    entries = steps.workspace("entries", 8 * room)
    sides = _add_search(steps, batches, kept, entries, None)
    _add_outcome(steps, batches.layouts, sides, kept, entries, outcome, room, None)
    return steps.plan()


# ---- the same in two plans, where entries are counted first --------------------------------------------------------


def search(pair: Pair, options: Options, room: int) -> Call:
    """Find the entries that both sides keep. If there are more than `room`, they are still counted.

    Inputs: pred and target. Results: as in `search_results`. `room` is from `capacity`.
    """
    return Call(_search_plan(pair.batches), _search_numbers(pair, options, room))


def search_results(pair: Pair, room: int) -> tuple[Spec, Spec, Spec]:
    """The specs of three results: the index of both sides; what `kept_offsets` describes; and the entries.

    They are memory for the second plan of the call, which also writes to them. `points_of_slots` are in the index.
    """
    batches = pair.batches
    sizes = neighbors.index_bytes(batches.both, batches.wide), kept_bytes(batches.layouts), 8 * room
    index, kept, entries = (Spec((size // 8,), INT64) for size in sizes)
    return index, kept, entries


def points_of_slots(pair: Pair) -> tuple[slice, slice]:
    """Where an index as int32 holds the point of each slot, or -1: of pred and of target. They end its rows."""
    row = 8 if pair.batches.wide else 4  # struct Row in int32: three coordinates, the point, and padding to 16 bytes
    (x, y), at = pair.slots, 6 if pair.batches.wide else 3
    return slice(at, row * x, row), slice(row * x + at, row * (x + y), row)


@functools.lru_cache(maxsize=256)
def _search_plan(batches: Batches) -> Plan:
    steps = Steps(inputs=2, results=3)
    _add_search(steps, batches, _kept_at(Result(1), batches.layouts), Result(2), Result(0))
    return steps.plan()


def transport(pair: Pair, options: Options, reduction: str, with_grad: bool, total: int) -> Call:
    """Losses and gradients from a search that has found `total` entries.

    Inputs: the results of `search`. Results: as in `apml`.
    """
    outcome, numbers = _outcome(pair, options, reduction, with_grad), _outcome_numbers(pair, options, reduction, total)
    return Call(_second_plan(pair.batches.layouts, outcome, capacity(total), False), numbers)


def entries(pair: Pair, options: Options, total: int) -> Call:
    """The transport plan from a search that has found `total` entries; between the rows of its slots are gaps.

    Inputs: the results of `search`. Results: as in `entries_results`.
    """
    outcome, numbers = _outcome(pair, options, "none", False), _outcome_numbers(pair, options, "none", total)
    return Call(_second_plan(pair.batches.layouts, outcome, capacity(total), True), numbers)


def entries_results(total: int) -> tuple[Spec, Spec]:
    """The specs of two results: column (a slot of target) and value (its bits) of each entry; and its row.

    The row is a slot of pred, or -1 in gaps.
    """
    room = capacity(total)
    return Spec((room, 2), INT32), Spec((room,), INT32)


@functools.lru_cache(maxsize=256)
def _second_plan(layouts: tuple[Layout, Layout], outcome: _Outcome, room: int, of_entries: bool) -> Plan:
    steps = Steps(inputs=3, results=2 if of_entries else 3)
    rows = Input(0), Input(0) + Number("pred rows")
    tables = [neighbors.argument(steps, name, of) for name, of in zip(_NAMES[:2], layouts, strict=True)]
    sides = _Sides(rows, (tables[0], tables[1]))
    to = (Result(0), Result(1)) if of_entries else None
    _add_outcome(steps, layouts, sides, _kept_at(Input(1), layouts), Input(2), outcome, room, to)
    return steps.plan()


# ---- what both sides keep ------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """Where the kept entries of both sides are, before they become a plan: pointers, or offsets in bytes."""

    total: Any  # u64, the number of entries
    arrived: Any  # u32 [2], 0 at first
    longs: tuple[Any, Any]  # u32 [2] for pred and for target, 0 at first
    cursors: Any  # u32 [slots of pred], how many entries of target refer to each
    starts: tuple[Any, Any]  # u32 [slots] for pred and for target, where the entries of each begin
    counts: tuple[Any, Any]  # u32 [slots] for pred and for target, the number of entries of each


def kept_offsets(layouts: tuple[Layout, Layout]) -> Kept:
    """The offset of each part in the memory of `kept_bytes`."""
    total, arrived, x_longs, y_longs, cursors, x_starts, y_starts, x_counts, y_counts, _ = _offsets(layouts)
    return Kept(total, arrived, (x_longs, y_longs), cursors, (x_starts, y_starts), (x_counts, y_counts))


def kept_bytes(layouts: tuple[Layout, Layout]) -> int:
    """The bytes of everything in `Kept`, which does not include the entries."""
    return _offsets(layouts)[-1]


@functools.lru_cache(maxsize=256)
def _offsets(layouts: tuple[Layout, Layout]) -> tuple[int, ...]:
    x, y = (4 * layout.slots for layout in layouts)
    # Apart from each other like pieces of a workspace: blocks that wait at `arrived` slow down accesses near it.
    return tuple(accumulate((-(-n // PIECE) * PIECE + GAP for n in (8, 8, 8, 8, x, x, y, x, y)), initial=0))


def _kept_at(memory: Pointer, layouts: tuple[Layout, Layout]) -> Kept:
    total, arrived, longs, cursors, starts, counts = kept_offsets(layouts)
    pairs = [(memory + one, memory + other) for one, other in (longs, starts, counts)]
    return Kept(memory + total, memory + arrived, pairs[0], memory + cursors, pairs[1], pairs[2])


class _Sides(NamedTuple):
    """pred and target, ready for searches."""

    rows: tuple[Pointer, Pointer]  # struct Row [slots]
    tables: tuple[Any, Any]  # struct Clouds


def _add_search(steps: Steps, batches: Batches, kept: Kept, entries: Pointer, index: Pointer | None) -> _Sides:
    """Add the index of both sides, in `index` or in workspace, and the search for what each keeps of the other."""
    layouts = batches.layouts
    given, wanted = (side.spec.dtype for side in batches.sides)
    dtype = given if given == wanted else FLOAT64 if batches.wide else FLOAT32
    x, y = (
        arrays.add_rows(steps, Input(i), arrays.rows(side.spec, dtype, 3), None, Number(f"{_NAMES[i]} points"))
        for i, side in enumerate(batches.sides)
    )
    pred, target = neighbors.add_pair(steps, (x, y), dtype, layouts, batches.both, _NAMES, index)
    steps.clear(kept.total, kept.starts[0].offset - kept.total.offset)  # everything that is 0 at first
    for side, own, other, named in ((0, pred, target, None), (1, target, pred, kept.cursors)):
        places = kept.total, kept.starts[side], kept.counts[side], named, entries
        found = Packed("<dQQQQQQ", (Number("limit"), Number("room"), *places))
        layout = layouts[side]
        masses = _masses_argument(steps, f"{_NAMES[side]} masses", layout.clouds)
        args = own.rows, own.clouds, Number(f"{_NAMES[side]} slots"), other.packed, other.clouds, masses, found
        grid = -(-layout.slots // (SEARCH_THREADS // 32))
        kernel = _kernel("transport_search", neighbors.of_real(batches.wide))
        steps.launch(kernel, grid=grid, block=SEARCH_THREADS, args=args)
    return _Sides((pred.rows, target.rows), (pred.clouds, target.clouds))


def _masses_argument(steps: Steps, name: str, count: int) -> Number | Packed:
    """The struct Masses as a kernel's argument."""
    if count <= clouds.INLINE_CLOUDS:
        return Number(name)
    return Packed(f"<Q{_MASSES.size - 8}x", (steps.table(name, -(-count // 2), 16),))


# ---- the plan, its losses and gradients ----------------------------------------------------------------------------


def _add_outcome(
    steps: Steps,
    layouts: tuple[Layout, Layout],
    sides: _Sides,
    kept: Kept,
    entries: Pointer,
    outcome: _Outcome,
    room: int,
    to: tuple[Pointer, Pointer] | None,
) -> None:
    """Add the transport plan from what is kept: its entries and rows at `to`, or loss and gradients as results."""
    x, y = layouts
    cursors = kept.cursors, steps.workspace("cursors", 4 * (y.slots + 1))
    row_lengths = steps.workspace("lengths of rows", 4 * (x.slots + 1))
    losses = steps.workspace("losses", 8 * (x.slots + 1))
    of_blocks = steps.workspace("sums of blocks", 4 * outcome.blocks)
    keys = steps.workspace("keys", 8 * room)
    # When the kept entries have become keys, their memory is free: it takes the places of columns' entries, and rows.
    by_row, row = to or (steps.workspace("entries of rows", 8 * room), entries + 4 * room)
    gradients: list[Pointer | None] = [None, None]
    dtype = FLOAT64 if outcome.wide else FLOAT32
    made = [Spec((layout.points, 3), dtype) for layout in layouts]
    for side, wanted in enumerate(outcome.gradients):
        as_is = wanted == (dtype, 3)
        gradients[side] = Result(1 + side) if as_is else steps.workspace("gradient", made[side].nbytes)
    packed = []
    for side, layout in enumerate(layouts):
        first, longs = (steps.workspace(name, 4 * (layout.slots + 1)) for name in ("first", "long lines"))
        scale = steps.workspace("scales", 8 * (layout.slots + 1))
        sums = steps.workspace("sums of losses", 8 * layout.nodes)
        given = sides.rows[side], kept.starts[side], kept.counts[side], cursors[side]
        fields = *given, first, longs, kept.longs[side], scale, gradients[side], sums
        packed.append(Packed("<" + "Q" * len(fields), fields))
    plan = Packed("<QQQQQ", (keys, by_row, row_lengths, entries, row))
    each, of_all = (Result(0), None) if outcome.each else (None, Result(0))
    if to:
        each = None
    counts = entries, kept.total, Number("room"), Number("iterations")
    args = *packed, *sides.tables, plan, *counts, losses, of_blocks, kept.arrived, each, of_all, Number("parts")
    macros = neighbors.of_real(outcome.wide, ("MINIMUM", int(outcome.minimum)))
    kernel = _kernel("transport_plan", macros, cooperative=True)
    steps.launch(kernel, grid=outcome.blocks, block=PLAN_THREADS, args=args)
    for side, wanted in enumerate(outcome.gradients):
        gradient = gradients[side]
        if gradient is not None and gradient.memory == "workspace":
            rows = arrays.rows(made[side], *wanted)
            arrays.add_rows(steps, gradient, rows, Result(1 + side), Number(f"{_NAMES[side]} points"))


# ---- the way back --------------------------------------------------------------------------------------------------


class _Scaled(NamedTuple):
    """A gradient to multiply, as far as a plan depends on it."""

    dtype: np.dtype
    rows: arrays.Rows | None  # how it becomes contiguous


def apml_backward(
    dloss: Spec,
    dpred: Spec,
    dtarget: Spec,
    pred_lengths: tuple[int, ...],
    target_lengths: tuple[int, ...],
    rounded: bool = False,
) -> Call:
    """Multiply the gradient of each cloud by the gradient of its loss.

    Inputs: dloss [] or [B], and the gradients from `apml`. Results: dpred and dtarget. With `rounded`, dloss is rounded
    to the dtype of a gradient before the multiplication.
    """
    size = dloss.dtype.itemsize
    copied, stride = None, 0
    if dloss.ndim:
        strides = dloss.strides or (size,)
        stride = strides[0] // size
        if (strides[0] | dloss.misalignment) % size:
            copied, stride = arrays.strided_layout(dloss.shape, strides, size, dloss.misalignment), 1
    numbers: dict[str, Any] = {"stride": stride, "rounded": rounded}
    count = len(pred_lengths) if dloss.ndim else 0
    scaled, elements = [], 0
    for name, side, lengths in ((_NAMES[0], dpred, pred_lengths), (_NAMES[1], dtarget, target_lengths)):
        numbers[f"{name} elements"] = math.prod(side.shape)
        elements += numbers[f"{name} elements"]
        scaled.append(_Scaled(side.dtype, arrays.rows(side, side.dtype, side.shape[-1])))
        if count:
            numbers[name] = _table(lengths)
    # Blocks beyond the last element return, so one plan serves many sizes.
    blocks = -(-elements // BACKWARD_THREADS)
    grid = 1 << (blocks - 1).bit_length() if blocks else 0
    return Call(_backward_plan((scaled[0], scaled[1]), dpred.shape[-1], dloss.dtype, copied, count, grid), numbers)


@clouds.remembered
def _table(lengths: tuple[int, ...]) -> clouds.Table:
    """The table of where each cloud's points begin."""
    return clouds.table(lengths, 1, None, None)


@functools.lru_cache(maxsize=256)
def _backward_plan(
    sides: tuple[_Scaled, _Scaled],
    columns: int,
    dtype: np.dtype,
    copied: arrays.Strided | None,
    count: int,
    grid: int,
) -> Plan:
    steps = Steps(inputs=3, results=2)
    dloss = arrays.add_copy(steps, Input(0), copied)
    tables = [clouds.argument(steps, name, count, 1) if count else clouds.NONE for name in _NAMES[:2]]
    contiguous = [arrays.add_rows(steps, Input(1 + i), side.rows) for i, side in enumerate(sides)]
    for of_gradient in dict.fromkeys(side.dtype for side in sides):  # one launch for each different dtype
        args: list[Any] = []
        for i, side in enumerate(sides):
            given = contiguous[i], Result(i), Number(f"{_NAMES[i]} elements")
            args += given if side.dtype == of_gradient else (None, None, 0)
        args += [*tables, columns, dloss, FLOATS.index(dtype), Number("stride"), Number("rounded")]
        kernel = _kernel("transport_backward", (("GRADIENT", FLOATS.index(of_gradient)),))
        steps.launch(kernel, grid=grid, block=BACKWARD_THREADS, args=tuple(args))
    return steps.plan()
