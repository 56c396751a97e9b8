# SPDX-License-Identifier: Apache-2.0
"""Perfect spatial hashing: one permutation that puts the points of a cloud into equal buckets of space neighbours.

Everything else in gpu3d runs over this layout. `bucketize` computes it, `Buckets` moves arrays in and out of it,
`scopes` lists which buckets attend to each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays, _clouds, _cuda
from gpu3d.reference import buckets as reference

# ---- the layout ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Buckets:
    """The bucket layout of a batch of clouds, made by `bucketize`.

    Cloud b of n_b points has ceil(n_b / bucket_size) buckets. Its points fill its slots from the first without a gap:
    every bucket is exactly full but the cloud's last, which has its padding at the end. Buckets never mix clouds.

    Attributes
    ----------
    slot_to_point : array int32 [num_slots]
        Index of the point in each slot; -1 in padding.
    point_to_slot : array int32 [N]
        The slot of each point; the inverse of `slot_to_point`.
    moved : array int32 []
        How many points balance="probe" moved out of the bucket that their hash names; 0 with "spill". On the device.
    bucket_size : int
        Slots a bucket.
    lengths : tuple of int
        Points of each cloud.
    bucket_offsets : tuple of int
        First bucket of each cloud, then the number of buckets: length B + 1.
    """

    slot_to_point: Any
    point_to_slot: Any
    moved: Any
    bucket_size: int
    lengths: tuple[int, ...]
    bucket_offsets: tuple[int, ...]

    @property
    def num_buckets(self) -> int:
        """Buckets of the batch."""
        return self.bucket_offsets[-1]

    @property
    def num_slots(self) -> int:
        """Slots of the batch: num_buckets * bucket_size."""
        return self.bucket_offsets[-1] * self.bucket_size

    def scatter(self, x: Any, fill: float = 0) -> Any:
        """Rows of points into slots: `out[slot] = x[slot_to_point[slot]]`, and `fill` in padding.

        Parameters
        ----------
        x : array [N, ...]
            One row a point, any dtype and trailing shape, of any library, on the buckets' device.
        fill : scalar
            What padding holds.

        Returns
        -------
        array [num_slots, ...]
            Of x's library and dtype.

        Examples
        --------
        >>> points = np.random.default_rng(0).random((100, 3), dtype=np.float32)
        >>> buckets = gpu3d.bucketize(points, 64)
        >>> in_slots = buckets.scatter(points)
        >>> in_slots.shape
        (128, 3)
        >>> bool((buckets.gather(in_slots) == points).all())
        True
        """
        return _move(x, len(self.point_to_slot), "x", self.slot_to_point, fill)

    def gather(self, y: Any) -> Any:
        """Rows of slots back to points: `out[point] = y[point_to_slot[point]]`, the inverse of `scatter`.

        Parameters
        ----------
        y : array [num_slots, ...]
            One row a slot, any dtype and trailing shape, of any library, on the buckets' device.

        Returns
        -------
        array [N, ...]
            Of y's library and dtype.
        """
        return _move(y, self.num_slots, "y", self.point_to_slot, 0)


def bucketize(
    points: Any,
    bucket_size: int = 512,
    *,
    lengths: Sequence[int] | None = None,
    hash: str = "zorder_div",
    balance: str = "spill",
    voxel_size: float | str | None = None,
    seed: int = 0,
    check_finite: bool | None = None,
) -> Buckets:
    """Put the points of each cloud into buckets of exactly `bucket_size` space neighbours.

    Parameters
    ----------
    points : array [N, 3] or [B, n, 3]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
        Not differentiated.
    bucket_size : int
        Slots a bucket: a multiple of 16 from 16 to 16384.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud.
    hash : {"zorder_div", "zorder_mod", "xor_div", "xor_mod"}
        Flash3D's four hash functions over the cloud's voxels. "zorder_div" gives the tightest buckets.
    balance : {"spill", "probe"}
        "spill" orders the points by hash bucket, inside it by full-resolution code, then by index, and cuts every
        `bucket_size` points. "probe" is the published rebalancing made deterministic: a point that finds its bucket
        full tries 128 neighbouring voxels, then takes what is left.
    voxel_size : float or "per_axis", optional
        Edge of a voxel in the unit of the points. Default: the largest extent / 65536; "per_axis": each extent / 65536.
    seed : int
        Orders the candidates of "probe".
    check_finite : bool, optional
        Look for NaN and inf: None checks host arrays only, True always (synchronizes on a GPU), False never.
        Unchecked, a non-finite coordinate counts as voxel 65535 and changes nothing for other points.

    Returns
    -------
    Buckets
        With arrays of the kind of `points`, on their device. The same call gives the same bits, on CPU and GPU alike.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    No host sync (but for check_finite=True); capturable in a CUDA graph after a first call. On a GPU a cloud has
    at most 2**30 - 1 points.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024, section 4.1.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 256)
    >>> buckets.num_buckets, buckets.slot_to_point.shape
    (4, (1024,))
    >>> int((buckets.slot_to_point >= 0).sum())
    1000
    """
    native, origin = _arrays.enter(points, "points")
    native, lengths = _arrays.check_points(native, lengths)
    bucket_size = _checked_bucket_size(bucket_size)
    _arrays.check_choice(hash, reference.HASHES, "hash")
    _arrays.check_choice(balance, reference.BALANCES, "balance")
    _check_voxel_size(voxel_size)
    if _arrays.check_integer(seed, "seed") < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    bucket_offsets = _bucket_offsets(lengths, bucket_size)
    if bucket_offsets[-1] * bucket_size > MAX_SLOTS:
        raise ValueError(
            f"a layout has at most 2**31 - 1 slots, for slots are int32; {native.shape[0]} points need "
            f"{bucket_offsets[-1] * bucket_size}. Bucketize parts of the batch."
        )
    with _arrays.on(origin):
        if check_finite or (check_finite is None and origin.device is None):
            _arrays.check_finite(native)
        if origin.device is None:
            arrays = reference.bucketize(native, bucket_size, lengths, hash, balance, voxel_size, seed)
        else:
            arrays = _bucketize_cuda(native, bucket_size, lengths, bucket_offsets, hash, balance, voxel_size, seed)
        if origin.library not in ("numpy", "cupy"):
            arrays = tuple(_arrays.leave(a, origin) for a in arrays)
    slot_to_point, point_to_slot, moved = arrays
    return Buckets(slot_to_point, point_to_slot, moved, bucket_size, lengths, bucket_offsets)


def _checked_bucket_size(bucket_size: Any) -> int:
    size = _arrays.check_integer(bucket_size, "bucket_size")
    if not 16 <= size <= 16384 or size % 16:
        raise ValueError(f"bucket_size must be a multiple of 16 from 16 to 16384, got {size}.")
    return size


def _check_voxel_size(voxel_size: Any) -> None:
    if voxel_size is None or (isinstance(voxel_size, str) and voxel_size == "per_axis"):
        return
    if isinstance(voxel_size, (bool, str)) or not isinstance(voxel_size, (int, float, np.integer, np.floating)):
        raise TypeError(f'voxel_size must be a number, None or "per_axis", got {voxel_size!r}.')
    if not 2.0**-126 <= voxel_size < 2.0**127:
        raise ValueError(f"voxel_size must be a positive float32 number, got {voxel_size}.")


@functools.lru_cache(maxsize=1024)
def _bucket_offsets(lengths: tuple[int, ...], bucket_size: int) -> tuple[int, ...]:
    offsets = [0]
    for n in lengths:
        offsets.append(offsets[-1] - (-n // bucket_size))
    return tuple(offsets)


# ---- CUDA: constants that the kernels share ------------------------------------------------------------------------

MAX_SLOTS = 2**31 - 1
MERGE_TILES = (1024, 2048, 4096)  # buckets_merge.cu: TILE; the smallest whose 128 tiles hold the largest cloud is used
MERGE_MAX_TILES = 128
MERGE_RANK_THREADS = 1024
RADIX_TILES = (8192, 10240)  # buckets_radix.cu: TILE; the one whose waves of blocks pass the batch sooner is used
RADIX_THREADS = 1024
RADIX_FRAME_THREADS = 512
RADIX_DIGITS = 256
RADIX_PASSES = 6
RADIX_GROUPS = 264  # blocks of a sum over the batch: two for each multiprocessor of an H100
RADIX_MAX = 2**30 - 1  # counts of a cloud have 30 bits
RADIX_NARROW = 2**24  # points of a cloud whose index fits the 24 bits of a narrow record
PROBE_THREADS = 1024
MOVE_THREADS = 256
MOVE_ROWS_A_THREAD = 4

KEY_GIVEN = 4
FRAME_BYTES = {4: 36, 8: 48}  # struct Frame: three origins, then three cells and their inverses in float32

_INT32 = np.dtype(np.int32)

# struct Candidates of buckets_probe.cu, and struct Pattern of buckets_move.cu.
_CANDIDATES = np.dtype([("packed", np.uint16, 128)])
_PATTERN = np.dtype([("bytes", np.uint8, 16)])

# The parameters of each kernel: formats of the module struct, and c for struct Clouds.
_SIGNATURES = {
    "merge_bounds": "QcQ",
    "merge_tiles": "QQfcQQ",
    "merge_splitters": "QcQQQ",
    "merge_partitions": "QQQQcQQQ",
    "merge_clouds": "QfcQQQ",
    "radix_frames": "QcifQQQ",
    "radix_keys": "QQciQQ",
    "radix_first": "QQciQQQ",
    "radix_pass": "QQQciiQQQ",
    "radix_last": "QQciQQQQQ",
    "probe_buckets": f"QQc{_CANDIDATES.itemsize}sQQQQQQQQQQ",
    "move_rows": f"QQqqi{_PATTERN.itemsize}sQ",
    "move_scopes": "cqiqqQ",
}


def _kernel(function: str, macros: _cuda.Macros, signature: str | None = None, **options: Any) -> _cuda.Kernel:
    """A kernel of buckets_<prefix of its name>.cu."""
    formats = (signature or _SIGNATURES[function]).replace("c", _clouds.FORMAT)
    return _cuda.kernel("buckets_" + function.split("_")[0], function, formats, macros, **options)


def configurations() -> list[_cuda.Configuration]:
    """Every module this file can ask for."""
    coordinates = [("POINT", p) for p in range(len(_arrays.FLOATS))]
    keys = [("KEY", k) for k in range(len(reference.HASHES))]
    given = [("POINT", 0), ("KEY", KEY_GIVEN)]
    modules = []
    for macros in [*((p, k) for p in coordinates for k in keys), tuple(given)]:
        modules += [_cuda.Configuration("buckets_merge", (*macros, ("TILE", tile))) for tile in MERGE_TILES]
        modules += [_cuda.Configuration("buckets_radix", (*macros, ("TILE", tile))) for tile in RADIX_TILES]
        if macros[1][1] != KEY_GIVEN:
            modules += [_cuda.Configuration("buckets_probe", macros)]
    return [*modules, *(_cuda.Configuration("buckets_move", (("WORD", word),)) for word in (1, 2, 4, 8, 16))]


# ---- CUDA: bucketize -----------------------------------------------------------------------------------------------


def _bucketize_cuda(
    points: Any,
    bucket_size: int,
    lengths: tuple[int, ...],
    bucket_offsets: tuple[int, ...],
    hash: str,
    balance: str,
    voxel_size: float | str | None,
    seed: int,
) -> tuple[Any, Any, Any]:
    import cupy

    if not points.flags.c_contiguous:
        points = cupy.ascontiguousarray(points)
    n, slots = points.shape[0], bucket_offsets[-1] * bucket_size
    memory = _cuda.results((0, 4 * slots, 4 * (slots + n), 4 * (slots + n + 1)))
    slot_to_point = cupy.ndarray((slots,), _INT32, memory[0])
    point_to_slot = cupy.ndarray((n,), _INT32, memory[1])
    moved = cupy.ndarray((), _INT32, memory[2])
    if n == 0:
        moved.fill(0)
        return slot_to_point, point_to_slot, moved
    results = tuple(part.ptr for part in memory)
    macros = (("POINT", _arrays.FLOATS.index(points.dtype)), ("KEY", reference.HASHES.index(hash)))
    cell = -1.0 if voxel_size == "per_axis" else float(voxel_size or 0.0)
    if balance == "probe":
        home = _probe(points, macros, cell, bucket_size, lengths, bucket_offsets[-1], seed, moved)
        points, macros = home, (("POINT", 0), ("KEY", KEY_GIVEN))
        results = *results[:2], 0  # `moved` is written
    sort_cuda(points, macros, cell, bucket_size, lengths, *results)
    return slot_to_point, point_to_slot, moved


def sort_cuda(
    keys: Any, macros: _cuda.Macros, cell: float, bucket_size: int, lengths: tuple[int, ...], *results: int
) -> None:
    """The permutations of contiguous keys, at least one: points, or buckets where `macros` say KEY_GIVEN.

    `results` are the addresses of slot_to_point, of point_to_slot, and of `moved` or 0.
    """
    largest = max(lengths)
    if largest > RADIX_MAX:
        raise ValueError(f"a cloud on a GPU has at most 2**30 - 1 points, got {largest}. Cut it into several clouds.")
    if largest <= MERGE_TILES[-1]:
        sort = _cloud_sort
    else:
        sort = _merge_sort if largest <= MERGE_MAX_TILES * MERGE_TILES[-1] else _radix_sort
    sort(keys, macros, cell, bucket_size, lengths, *results)


class _MergePlan(NamedTuple):
    """What buckets_merge.cu needs for a batch, worked out once: Python takes as long over a call as the launches."""

    batch: _clouds.Batch
    tiles: int
    partitions: int
    threads: int
    shared_mem: int
    ends: tuple[int, ...]  # where the arrays of the workspace begin, and where the last ends
    bound: _cuda.Kernel | None  # None where the keys are given
    kernels: tuple[_cuda.Kernel, ...]  # tiles, splitters, partitions


@functools.lru_cache(maxsize=256)
def _merge_plan(device: int, lengths: tuple[int, ...], bucket_size: int, macros: _cuda.Macros) -> _MergePlan:
    """For the current device, which is `device`."""
    largest = max(lengths)
    tile = next(t for t in MERGE_TILES if MERGE_MAX_TILES * t >= largest)
    span = tile // 64
    capacity = 32 * (span + MERGE_MAX_TILES)
    n = np.array(lengths, np.int64)
    full = -(-n // tile) - 1  # tiles before a cloud's last
    phase = full * 13 + 16 & 31  # which of every 32 keys is a sample, in the last tile
    samples = full * (tile // 32) + (n - full * tile + 31 - phase) // 32
    batch = _clouds.batch(lengths, bucket_size, full + 1, np.maximum(-(-samples // span), 1) * (n > 0))
    tiles, partitions = batch.tiles, batch.groups

    (_, point), (_, key) = macros
    bound_bytes = 8 if _arrays.FLOATS[point] == np.float64 else 4
    ranks = (8 * partitions, 4 * partitions, MERGE_MAX_TILES * partitions)
    ends = _cuda.ends(6 * bound_bytes * tiles, 8 * tile * tiles, tile // 4 * tiles, *ranks)
    macros, shared_mem, given = (*macros, ("TILE", tile)), 12 * capacity, key == KEY_GIVEN
    bound = None if given else _kernel("merge_bounds", macros)
    kernels = (
        _kernel("merge_tiles", macros, "QcQQ" if given else None),
        _kernel("merge_splitters", macros),
        _kernel("merge_partitions", macros, shared_mem=shared_mem),
    )
    return _MergePlan(batch, tiles, partitions, tile // 4, shared_mem, ends, bound, kernels)


@functools.lru_cache(maxsize=256)
def _cloud_plan(
    device: int, lengths: tuple[int, ...], bucket_size: int, macros: _cuda.Macros
) -> tuple[_clouds.Batch, int, _cuda.Kernel]:
    """Batch, threads of a block and kernel of `_cloud_sort`, for the current device, which is `device`."""
    tile = next(t for t in MERGE_TILES if t >= max(lengths))
    signature = "QcQQQ" if macros[1][1] == KEY_GIVEN else None
    batch = _clouds.tiled(lengths, bucket_size, tile, tile)
    return batch, tile // 4, _kernel("merge_clouds", (*macros, ("TILE", tile)), signature)


def _cloud_sort(
    keys: Any, macros: _cuda.Macros, cell: float, bucket_size: int, lengths: tuple[int, ...], *results: int
) -> None:
    """One launch of buckets_merge.cu, for clouds of at most a tile; `keys` as in `_merge_sort`."""
    batch, threads, kernel = _cloud_plan(keys.device.id, lengths, bucket_size, macros)
    clouds, table = _clouds.pack(batch, bucket_size)
    source = (keys.data.ptr,) if macros[1][1] == KEY_GIVEN else (keys.data.ptr, cell)
    _cuda.launch(kernel, grid=len(lengths), block=threads, args=(*source, clouds, *results))
    del table  # held until here


def _merge_sort(
    keys: Any, macros: _cuda.Macros, cell: float, bucket_size: int, lengths: tuple[int, ...], *results: int
) -> None:
    """Four launches of buckets_merge.cu; three where macros say KEY_GIVEN: `keys` are buckets then, else points."""
    plan = _merge_plan(keys.device.id, lengths, bucket_size, macros)
    batch, tiles, partitions, threads, shared_mem, ends, bound, (sort, rank, join) = plan
    clouds, table = _clouds.pack(batch, bucket_size)
    memory, (bounds, ordered, sampled, splitter, splitter_tile, below) = _cuda.allocate(ends)
    source = keys.data.ptr
    if bound is None:
        _cuda.launch(sort, grid=tiles, block=threads, args=(source, clouds, ordered, sampled))
    else:
        _cuda.launch(bound, grid=tiles, block=threads, args=(source, clouds, bounds))
        _cuda.launch(sort, grid=tiles, block=threads, args=(source, bounds, cell, clouds, ordered, sampled))
    args: tuple[Any, ...] = (sampled, clouds, splitter, splitter_tile, below)
    _cuda.launch(rank, grid=tiles, block=MERGE_RANK_THREADS, args=args)
    args = (ordered, splitter, splitter_tile, below, clouds, *results)
    _cuda.launch(join, grid=partitions, block=threads, shared_mem=shared_mem, args=args)
    del memory, table  # held until here; the pool hands them on in stream order


def _bound_bytes(points: Any) -> int:
    return 8 if points.dtype.itemsize == 8 else 4


def _frames(
    points: Any,
    macros: _cuda.Macros,
    cell: float,
    group: int,
    batch: _clouds.Batch,
    clouds: bytes,
    arrived: int,
    frames: int,
) -> None:
    """The voxel frame of every cloud, in one launch of buckets_radix.cu; `arrived` is zero, a word a cloud."""
    memory, (bounds,) = _cuda.workspace(6 * _bound_bytes(points) * batch.groups)
    args = (points.data.ptr, clouds, group, cell, arrived, bounds, frames)
    kernel = _kernel("radix_frames", (*macros, ("TILE", RADIX_TILES[0])))  # TILE plays no part in it
    _cuda.launch(kernel, grid=batch.groups, block=RADIX_FRAME_THREADS, args=args)
    del memory


def _radix_group(total: int) -> int:
    """Points a block takes where a kernel sums over the whole batch."""
    return max(4096, -(-total // (32 * RADIX_GROUPS)) * 32)


@functools.lru_cache(maxsize=256)
def _radix_tile(device: int, lengths: tuple[int, ...]) -> tuple[int, int]:
    """Points a tile of radix_pass, and the shared memory that it takes: records and their digits, starts of digits."""
    multiprocessors, most_shared = _cuda.device_limits(device)
    starts = 2 * RADIX_THREADS // 32 * RADIX_DIGITS

    def points_a_multiprocessor(tile: int) -> tuple[int, int]:
        tiles = sum(-(-n // tile) for n in lengths)
        return -(-tiles // multiprocessors) * tile, -tile

    fitting = [tile for tile in RADIX_TILES if 9 * tile + starts <= most_shared]
    tile = min(fitting, key=points_a_multiprocessor)
    return tile, 9 * tile + starts


def _radix_sort(
    keys: Any, macros: _cuda.Macros, cell: float, bucket_size: int, lengths: tuple[int, ...], *results: int
) -> None:
    """Eight launches of buckets_radix.cu; seven where macros say KEY_GIVEN: `keys` are buckets then, else points."""
    n, group = len(keys), _radix_group(len(keys))
    tile, shared_mem = _radix_tile(keys.device.id, lengths)
    tiled = *macros, ("TILE", tile)
    batch = _clouds.tiled(lengths, bucket_size, tile, group)
    clouds, table = _clouds.pack(batch, bucket_size)
    count_bytes = 4 * RADIX_PASSES * RADIX_DIGITS
    frame_bytes = FRAME_BYTES[_bound_bytes(keys)]
    wide = max(lengths) > RADIX_NARROW  # then pass 1 reads the keys once more, and cannot write over them
    memory, (ticket, arrived, histogram, published, end, frames, *records) = _cuda.workspace(
        4 * RADIX_PASSES,
        4 * len(lengths),
        count_bytes * len(lengths),
        count_bytes * batch.tiles,
        0,
        frame_bytes * len(lengths),
        *(8 * n for _ in range(2 + wide)),
    )
    _cuda.clear(memory, end - memory.ptr)
    if macros[1][1] == KEY_GIVEN:
        key = _kernel("radix_keys", tiled, "QciQQ")
        args: tuple[Any, ...] = (keys.data.ptr, clouds, group, records[0], histogram)
    else:
        _frames(keys, macros, cell, group, batch, clouds, arrived, frames)
        key = _kernel("radix_keys", tiled)
        args = (keys.data.ptr, frames, clouds, group, records[0], histogram)
    _cuda.launch(key, grid=batch.groups, block=RADIX_THREADS, args=args)
    first, move, last = (_kernel("radix_" + name, tiled, shared_mem=shared_mem) for name in ("first", "pass", "last"))
    run = functools.partial(_cuda.launch, grid=batch.tiles, block=RADIX_THREADS, shared_mem=shared_mem)
    rest = int(wide), ticket, published
    # Records go from one array to the other; where wide, the first holds the keys until pass 1 has read them.
    one, other = records[-1], records[-2]
    run(first, args=(records[0], histogram, clouds, *rest, one))
    for number in range(1, RADIX_PASSES - 1):
        run(move, args=(records[0], one, histogram, clouds, number, *rest, other))
        one, other = other, one
    run(last, args=(one, histogram, clouds, *rest, *results))
    del memory, table


def _probe(
    points: Any,
    macros: _cuda.Macros,
    cell: float,
    bucket_size: int,
    lengths: tuple[int, ...],
    num_buckets: int,
    seed: int,
    moved: Any,
) -> Any:
    """The bucket int32 [N] of each point under balance="probe", counted over the batch; writes `moved`."""
    import cupy

    n, group = len(points), _radix_group(len(points))
    batch = _clouds.tiled(lengths, bucket_size, bucket_size, group)
    clouds, table = _clouds.pack(batch, bucket_size)
    blocks = min(_cuda.device_limits(points.device.id)[0], -(-n // PROBE_THREADS))
    home = cupy.empty(n, np.int32)
    frame_bytes = FRAME_BYTES[_bound_bytes(points)] * len(lengths)
    each = 4 * num_buckets * blocks
    memory, (arrived, framed, totals, counts, end, rooms, cursors, left, voxels, proposal, frames) = _cuda.workspace(
        4, 4 * len(lengths), 12 * num_buckets, 3 * each, 0, each, each, 4 * blocks, 8 * n, 4 * n, frame_bytes
    )
    _cuda.clear(memory, end - memory.ptr)
    _cuda.clear(moved.data, 4)
    _frames(points, macros, cell, group, batch, clouds, framed, frames)
    packed = np.zeros((), _CANDIDATES)
    packed["packed"] = (reference.candidates(seed) + 4) @ (1, 16, 256)
    scratch = arrived, totals, counts, rooms, cursors, left, voxels, proposal
    args = (points.data.ptr, frames, clouds, packed.tobytes(), *scratch, home.data.ptr, moved.data.ptr)
    probe = _kernel("probe_buckets", macros, cooperative=True)
    _cuda.launch(probe, grid=blocks, block=PROBE_THREADS, args=args)
    del memory, table
    return home


# ---- scatter and gather --------------------------------------------------------------------------------------------


def _move(x: Any, rows: int, name: str, index: Any, fill: Any) -> Any:
    native, origin = _arrays.enter(x, name)
    native_index, index_origin = _arrays.enter(index, "buckets")
    if origin.device != index_origin.device:
        _arrays.check_same_device(**{name: origin, "buckets": index_origin})
    if native.ndim == 0 or native.shape[0] != rows:
        what = "slots" if name == "y" else "points"
        raise ValueError(f"{name} must have one row for each of the {rows} {what}, got shape {list(native.shape)}.")
    if origin.device is None:
        return _arrays.leave(reference.take_rows(native, native_index, fill), origin)
    with _arrays.on(origin):
        return _arrays.leave(_take_rows_cuda(native, native_index, fill), origin)


def _take_rows_cuda(rows: Any, index: Any, fill: Any) -> Any:
    import cupy

    if not rows.flags.c_contiguous:
        rows = cupy.ascontiguousarray(rows)
    out = cupy.empty((len(index), *rows.shape[1:]), rows.dtype)
    row_bytes = rows.nbytes // len(rows) if len(rows) else 0
    if out.nbytes == 0:
        return out
    word = math.gcd(16, row_bytes, rows.data.ptr)
    words = row_bytes // word
    lane_bits = min(8, (words - 1).bit_length())
    rows_a_block = (MOVE_THREADS >> lane_bits) * MOVE_ROWS_A_THREAD
    pattern = np.zeros((), _PATTERN)
    value = np.array(fill).astype(rows.dtype)
    pattern["bytes"] = np.resize(np.frombuffer(value.tobytes(), np.uint8), 16)
    args = (rows.data.ptr, index.data.ptr, len(index), words, lane_bits, pattern.tobytes(), out.data.ptr)
    kernel = _kernel("move_rows", (("WORD", word),))
    _cuda.launch(kernel, grid=-(-len(index) // rows_a_block), block=MOVE_THREADS, args=args)
    return out


# ---- scopes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scopes:
    """Which buckets attend to each other, made by `scopes`.

    Attributes
    ----------
    table : array int32 [num_scopes, size]
        The buckets of each scope; -1 at the end of a short row. On the buckets' device.
    size, shift, stride : int
        As given to `scopes`.
    bucket_size, bucket_offsets : int, tuple of int
        The layout that the table was made for.
    """

    table: Any
    size: int
    shift: int
    stride: int
    bucket_size: int
    bucket_offsets: tuple[int, ...]


def scopes(buckets: Buckets, size: int = 8, *, shift: int = 0, stride: int = 1, table: Any = None) -> Scopes:
    """Attention scopes over a bucket layout: windows of `size` buckets, shifted or strided. Nothing moves in memory.

    In a cloud of nb buckets, positions p = 0..nb-1 stand for bucket (p + shift) mod nb. They are cut into chunks of
    size * stride; scope j of a chunk takes its positions j, j + stride, j + 2 * stride, ... The last chunk
    may be short, and then its scopes are. A scope never crosses clouds, and every bucket stands in exactly one.

    Parameters
    ----------
    buckets : Buckets
    size : int
        Buckets a scope, at least 1.
    shift : int
        Rotates the buckets of each cloud, by any number (Swin's shifted window).
    stride : int
        Distance of the buckets of one scope, at least 1: a larger reach at equal cost.
    table : array int [num_scopes, size], optional
        A hand-made table instead, of any library on any device: every bucket exactly once, -1 only at the end of a row,
        no scope across clouds. Checked on the host (synchronizes). Size, shift and stride must be left out.

    Returns
    -------
    Scopes

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above.

    References
    ----------
    Flash3D, section 4.2, "Zero-Overhead Bucket-Swin Attention".

    Examples
    --------
    >>> buckets = gpu3d.bucketize(np.random.default_rng(0).random((80, 3), dtype=np.float32), 16)
    >>> gpu3d.scopes(buckets, 2).table
    array([[ 0,  1],
           [ 2,  3],
           [ 4, -1]], dtype=int32)
    >>> gpu3d.scopes(buckets, 2, shift=1).table
    array([[ 1,  2],
           [ 3,  4],
           [ 0, -1]], dtype=int32)
    >>> gpu3d.scopes(buckets, 2, stride=2).table
    array([[ 0,  2],
           [ 1,  3],
           [ 4, -1]], dtype=int32)
    """
    if not isinstance(buckets, Buckets):
        raise TypeError(f"buckets must be the Buckets that gpu3d.bucketize returns, got {type(buckets).__name__}.")
    size, shift, stride = (
        _arrays.check_integer(v, name) for v, name in ((size, "size"), (shift, "shift"), (stride, "stride"))
    )
    if abs(shift) > MAX_SLOTS:
        raise ValueError(f"shift must be between -2**31 and 2**31, got {shift}.")
    for value, name in ((size, "size"), (stride, "stride")):
        if not 1 <= value <= MAX_SLOTS:
            raise ValueError(f"{name} must be at least 1 and below 2**31, got {value}.")
    _, origin = _arrays.enter(buckets.slot_to_point, "buckets")
    layout = buckets.bucket_size, buckets.bucket_offsets
    if table is not None:
        if (size, shift, stride) != (8, 0, 1):
            raise ValueError("a hand-made table already says its scopes: leave size, shift and stride out.")
        checked = _checked_table(table, buckets)
        if origin.device is None:
            return Scopes(_arrays.leave(checked, origin), checked.shape[1], 0, 1, *layout)
        import cupy

        with _arrays.on(origin):
            on_device = _arrays.leave(cupy.asarray(checked), origin)
        return Scopes(on_device, checked.shape[1], 0, 1, *layout)
    if origin.device is None:
        native = reference.scope_table(buckets.bucket_offsets, size, shift, stride)
        return Scopes(_arrays.leave(native, origin), size, shift, stride, *layout)
    with _arrays.on(origin):
        native = _scope_table_cuda(buckets, size, shift, stride)
        return Scopes(_arrays.leave(native, origin), size, shift, stride, *layout)


def _scope_table_cuda(buckets: Buckets, size: int, shift: int, stride: int) -> Any:
    import cupy

    count = np.diff(buckets.bucket_offsets)
    stride = min(stride, max(1, int(count.max(initial=0))))  # a longer stride gives the same scopes
    whole, rest = np.divmod(count, size * stride)
    batch = _clouds.batch(buckets.lengths, buckets.bucket_size, 0 * count, whole * stride + np.minimum(rest, stride))
    clouds, memory = _clouds.pack(batch, buckets.bucket_size)
    table = cupy.empty((batch.groups, size), np.int32)
    args = (clouds, table.size, size, shift, stride, table.data.ptr)
    kernel = _kernel("move_scopes", (("WORD", 16),))
    _cuda.launch(kernel, grid=-(-table.size // MOVE_THREADS), block=MOVE_THREADS, args=args)
    del memory
    return table


def _download(x: Any, name: str) -> np.ndarray:
    """A NumPy array; from a GPU on the stream that its library uses, so after the work that writes it."""
    native, origin = _arrays.enter(x, name)
    if origin.device is None:
        return native
    with _arrays.on(origin):
        return native.get()  # synchronizes


def _checked_table(table: Any, buckets: Buckets) -> np.ndarray:
    native = _download(table, "table")
    if native.ndim != 2 or native.dtype.kind not in "iu":
        raise ValueError(
            f"table must hold integers of shape [num_scopes, size], got {native.dtype} {list(native.shape)}."
        )
    valid = native >= 0
    if (valid[:, 1:] & ~valid[:, :-1]).any() or (len(native) and not valid[:, :1].all()):
        raise ValueError("table must hold -1 only at the end of a row, and no empty row.")
    listed = native[valid]
    if not np.array_equal(np.sort(listed), np.arange(buckets.num_buckets)):
        raise ValueError(
            f"table must list each of the {buckets.num_buckets} buckets exactly once, got {listed.size} entries of "
            f"which {np.unique(listed[listed < buckets.num_buckets]).size} are different buckets."
        )
    cloud = np.searchsorted(buckets.bucket_offsets, native, side="right")
    crossing = ((cloud != cloud[:, :1]) & valid).any(axis=1)
    if crossing.any():
        raise ValueError(
            f"a scope must not cross clouds: row {int(crossing.argmax())} of table lists buckets of two clouds."
        )
    return np.ascontiguousarray(native, np.int32)


# ---- quality -------------------------------------------------------------------------------------------------------


class BucketQuality(NamedTuple):
    """How tight the buckets are, in the unit of the points. Only full buckets count; NaN where there is none.

    Attributes
    ----------
    mean_radius, max_radius : float
        Mean and largest radius; a bucket's radius is the largest distance of its points from their mean.
    moved_share : float
        The share of the points that balance="probe" moved out of the bucket that their hash names.
    """

    mean_radius: float
    max_radius: float
    moved_share: float


def bucket_quality(points: Any, buckets: Buckets) -> BucketQuality:
    """Measure a bucket layout: the radii of its full buckets, and how many points were moved.

    A diagnostic: it is computed on the host in float64, and synchronizes.

    Parameters
    ----------
    points : array [N, 3] or [B, n, 3]
        The points that were bucketized.
    buckets : Buckets
        Their layout.

    Returns
    -------
    BucketQuality

    Raises
    ------
    TypeError, ValueError
        The points are not those of the layout, or no points.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((4096, 3), dtype=np.float32)
    >>> quality = gpu3d.bucket_quality(points, gpu3d.bucketize(points, 512))
    >>> 0.4 < quality.mean_radius < quality.max_radius
    True
    """
    native, _ = _arrays.enter(points, "points")
    native, lengths = _arrays.check_points(native, buckets.lengths if native.ndim == 2 else None)
    if lengths != buckets.lengths:
        raise ValueError(
            f"points must be those of the layout, got lengths {list(lengths)} for {list(buckets.lengths)}."
        )
    host_points = _download(points, "points").reshape(-1, 3)
    slot_to_point, moved = (_download(x, "buckets") for x in (buckets.slot_to_point, buckets.moved))
    radii = reference.bucket_radii(host_points, slot_to_point, buckets.bucket_size)
    if not len(radii):
        return BucketQuality(math.nan, math.nan, int(moved) / max(1, len(host_points)))
    return BucketQuality(float(radii.mean()), float(radii.max()), int(moved) / len(host_points))
