# SPDX-License-Identifier: Apache-2.0
"""The batch's table of clouds, as kernels read it: where each cloud's points, tiles, groups and slots begin.

A small batch travels inside the kernels' arguments, a large one in device memory (kernels_cu/clouds.cuh).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _cuda

INLINE_CLOUDS = 64  # mirrored by clouds.cuh
CLOUDS_A_LAUNCH = 240  # mirrored by clouds.cu, as is the next
CLOUDS_THREADS = 256

# struct Cloud, struct Clouds and struct CloudRows of the kernels.
_CLOUD = np.dtype([("point", np.int32), ("tile", np.int32), ("group", np.int32), ("slot", np.int32)])
_CLOUDS = np.dtype(
    [("table", np.uint64), ("count", np.int32), ("bucket_size", np.int32), ("inlined", _CLOUD, INLINE_CLOUDS + 1)]
)
_HEADER = struct.Struct("<Qii")  # of struct Clouds
_ROWS = np.dtype([("rows", _CLOUD, CLOUDS_A_LAUNCH)])

FORMAT = f"{_CLOUDS.itemsize}s"  # of struct Clouds in a kernel's signature


def configurations() -> list[_cuda.Configuration]:
    """Every module this file can ask for."""
    return [_cuda.Configuration("clouds")]


Part = tuple[bytes, int, int]  # of a table: struct CloudRows, its first row and how many there are


class Batch(NamedTuple):
    """Where each cloud's points, tiles, groups and slots begin."""

    rows: np.ndarray  # _CLOUD [B + 1]
    inlined: bytes | None  # struct Clouds where the batch is small enough to travel in a kernel's arguments
    parts: tuple[Part, ...]  # else what is written into device memory

    @property
    def tiles(self) -> int:
        return int(self.rows[-1]["tile"])

    @property
    def groups(self) -> int:
        return int(self.rows[-1]["group"])


def batch(lengths: Sequence[int], bucket_size: int, tiles: np.ndarray, groups: np.ndarray) -> Batch:
    """A batch whose clouds have these numbers of tiles and groups."""
    n = np.array(lengths, np.int64)
    rows = np.zeros(len(n) + 1, _CLOUD)
    for column, counts in (
        ("point", n),
        ("tile", tiles),
        ("group", groups),
        ("slot", -(-n // bucket_size) * bucket_size),
    ):
        rows[column][1:] = np.cumsum(counts)
    if len(n) > INLINE_CLOUDS:
        return Batch(rows, None, parts_of(rows.tobytes()))
    clouds = np.zeros((), _CLOUDS)
    clouds["count"], clouds["bucket_size"] = len(n), bucket_size
    clouds["inlined"][: len(rows)] = rows
    return Batch(rows, clouds.tobytes(), ())


def parts_of(data: bytes) -> tuple[Part, ...]:
    """A table of whole rows, or of anything else that is filled up to them, in parts that `store` puts together."""
    size = _CLOUD.itemsize
    data = data.ljust(-(-len(data) // size) * size, b"\0")
    rows = len(data) // size
    return tuple(
        (
            data[first * size : (first + CLOUDS_A_LAUNCH) * size].ljust(_ROWS.itemsize, b"\0"),
            first,
            min(rows - first, CLOUDS_A_LAUNCH),
        )
        for first in range(0, rows, CLOUDS_A_LAUNCH)
    )


def store(parts: Sequence[Part]) -> Any:
    """Device memory that holds a table, to be held until the launches that read it are enqueued.

    The table travels inside the arguments of a kernel that stores it: no copy from host memory, so nothing on the host
    has to stay alive and a CUDA graph can hold it.
    """
    import cupy

    _, first, rows = parts[-1]
    table = cupy.cuda.alloc((first + rows) * _CLOUD.itemsize)
    write = _cuda.kernel("clouds", "write_clouds", f"{_ROWS.itemsize}siiQ")
    for part in parts:
        _cuda.launch(write, grid=1, block=CLOUDS_THREADS, args=(*part, table.ptr))
    return table


@functools.lru_cache(maxsize=256)
def tiled(lengths: tuple[int, ...], bucket_size: int, tile: int, group: int) -> Batch:
    """A batch in tiles of `tile` points and groups of `group` points, neither across clouds."""
    n = np.array(lengths, np.int64)
    return batch(lengths, bucket_size, -(-n // tile), -(-n // group))


def pack(batch: Batch, bucket_size: int) -> tuple[bytes, Any]:
    """The struct Clouds, and the device memory that must be held until the launches that read it are enqueued."""
    if batch.inlined is not None:
        return batch.inlined, None
    table = store(batch.parts)
    header = _HEADER.pack(table.ptr, len(batch.rows) - 1, bucket_size)
    return header.ljust(_CLOUDS.itemsize, b"\0"), table
