# SPDX-License-Identifier: Apache-2.0
"""The table of a batch of clouds, as kernels read it: where each cloud's points, tiles, groups and slots begin.

The table of a small batch is passed in the kernels' arguments, and that of a large batch is in device memory
(kernels_cu/clouds.cuh). In a plan the table is a number: plans depend on how many clouds there are, not on lengths.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gpu3d import _arrays
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Kernel, Number, Packed, Pointer, Steps

INLINE_CLOUDS = 64  # the same constant as in clouds.cuh
CLOUDS_A_LAUNCH = 240  # the same constants as in clouds.cu
CLOUDS_THREADS = 256
WRITES = 64  # launches of the plan that writes a table

ROW_BYTES = 16  # struct Cloud: int point, tile, group, slot
_HEADER = struct.Struct("<Qii")  # struct Clouds: table, count, bucket_size; then INLINE_CLOUDS + 1 rows
_BYTES = _HEADER.size + (INLINE_CLOUDS + 1) * ROW_BYTES
PART_BYTES = CLOUDS_A_LAUNCH * ROW_BYTES

FORMAT = f"{_BYTES}s"  # struct Clouds in a kernel's signature
STRUCT = "<" + FORMAT

Function = TypeVar("Function", bound=Callable[..., Any])


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("clouds")]


def remembered(function: Function) -> Function:
    """Cache the results of a function whose first argument is the lengths of the clouds.

    Results for more than INLINE_CLOUDS clouds are not cached: they would take megabytes each.
    """
    kept = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return (kept if len(args[0]) <= INLINE_CLOUDS else function)(*args)

    call.kept = kept  # type: ignore[attr-defined]  # for tests
    return call  # type: ignore[return-value]


def kept_as_passed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache the results of a function of options as the caller passed them, checked or not.

    True and 1 are different keys. The result is None if an option cannot be a key or raises a TypeError, so that the
    caller's own checks have to name it. Lengths of more than INLINE_CLOUDS clouds must not be among the arguments.
    """
    kept = functools.lru_cache(maxsize=256, typed=True)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return kept(*args)
        except TypeError:
            return None

    call.kept = kept  # type: ignore[attr-defined]  # for tests
    return call


def array(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """The lengths of many clouds as an int64 array."""
    return lengths if isinstance(lengths, np.ndarray) else _arrays.int64_array(lengths)


def slots_of(lengths: Any, bucket_size: int) -> Any:
    """How many slots each cloud has; an array gives an array."""
    if not isinstance(lengths, np.ndarray):
        return [-(-n // bucket_size) * bucket_size for n in lengths]
    slots = lengths + (bucket_size - 1)
    if bucket_size & (bucket_size - 1):
        slots //= bucket_size
        slots *= bucket_size
    else:
        slots &= -bucket_size  # a power of two, for which this takes a third of the time
    return slots


class Table(NamedTuple):
    """Where each cloud begins: what `Number(name)` of a plan stands for.

    Attributes
    ----------
    inlined : bytes
        The struct Clouds, if the batch is small enough for a kernel's arguments.
    rows : bytes
        Otherwise the rows of the table, of ROW_BYTES each.
    tiles, groups : int
        Their totals over all clouds.
    """

    inlined: bytes
    rows: bytes
    tiles: int
    groups: int


def table(
    lengths: Sequence[int],
    bucket_size: int,
    tiles: Sequence[int] | None,
    groups: Sequence[int] | None,
    slots: Sequence[int] | None = None,
) -> Table:
    """The table of clouds with these numbers of tiles and groups; None means that no cloud has any.

    `slots` are those of each cloud, if the caller knows them.
    """
    count = len(lengths)
    n: Any = array(lengths) if count > INLINE_CLOUDS else lengths
    if slots is None:
        slots = slots_of(n, bucket_size)
    if count > INLINE_CLOUDS:
        return _large_table(n, tiles, groups, slots)
    columns = (
        accumulate(lengths, initial=0),
        repeat(0, count + 1) if tiles is None else accumulate(tiles, initial=0),
        repeat(0, count + 1) if groups is None else accumulate(groups, initial=0),
        accumulate(slots, initial=0),
    )
    numbers = list(chain.from_iterable(zip(*columns, strict=True)))
    inlined = struct.pack(f"<Qii{len(numbers)}i", 0, count, bucket_size, *numbers)
    return Table(inlined, b"", numbers[-3], numbers[-2])


def _large_table(*columns: Any) -> Table:
    table = np.zeros((len(columns[0]) + 1, 4), np.int32)
    for column, counts in enumerate(columns):
        if counts is not None:
            table[1:, column] = np.cumsum(counts)
    _, tiles, groups, _ = table[-1].tolist()
    return Table(b"", table.tobytes(), tiles, groups)


def argument(steps: Steps, name: str, count: int, bucket_size: int) -> Number | Packed:
    """The struct Clouds of `count` clouds as a kernel's argument. Their table is the number `name` of the call."""
    return Number(name) if count <= INLINE_CLOUDS else at(steps.table(name, count + 1, ROW_BYTES), count, bucket_size)


def at(table: Pointer, count: int, bucket_size: int) -> Packed:
    """The struct Clouds of `count` clouds, whose table is in device memory."""
    return Packed(f"<Qii{_BYTES - _HEADER.size}x", (table, count, bucket_size))


# The struct Clouds for kernels that do not read it.
NONE = Packed(f"<Qii{_BYTES - _HEADER.size}x", (None, 0, 0))


def _write() -> Any:
    """The plan that writes a table, of which `launcher.write_table` runs as many launches as there are parts.

    The rows are passed in the arguments of a kernel that stores them. So no memory of the host must stay alive, as for
    a copy, and a CUDA graph can capture it.
    """
    steps = Steps(inputs=0, results=0)
    kernel = Kernel("clouds", "write_clouds", f"{PART_BYTES}siiQ")
    args = Number("part"), Number("first"), Number("rows"), Number("table")
    for _ in range(WRITES):
        steps.launch(kernel, grid=1, block=CLOUDS_THREADS, args=args)
    return steps.plan()


write = _write()
