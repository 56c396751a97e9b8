# SPDX-License-Identifier: Apache-2.0
"""Buckets in NumPy, one cloud at a time: the code follows the definitions word for word.

Flash3D, section 4.1 (Perfect Spatial Hashing). Every floating-point operation is rounded once, to float32 or
float64, so that the CUDA kernels can give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from gpu3d._arrays import BFLOAT16

HASHES = ("xor_mod", "xor_div", "zorder_mod", "zorder_div")
BALANCES = ("spill", "probe")


# What voxels span: None for the whole cloud, "robust", or the lower and the upper bound of each axis.
Bounds = str | tuple[tuple[float, ...], tuple[float, ...]] | None


def voxelize(
    points: np.ndarray, voxel_size: float | str | None = None, count: int = 65536, bounds: Bounds = None
) -> np.ndarray:
    """Voxels int64 [n, 3] of one cloud, each in 0..count - 1. A non-finite coordinate gets the last voxel."""
    if points.dtype in (np.float16, BFLOAT16):
        points = points.astype(np.float32)
    points = np.ascontiguousarray(points.T)  # one row per axis: NumPy is fastest along rows
    finite = np.isfinite(points)
    bounded = True if finite.all() else finite
    low = points.min(axis=1, initial=np.inf, where=bounded)
    high = points.max(axis=1, initial=-np.inf, where=bounded)
    low, high = np.where(low <= high, (low, high), 0).astype(points.dtype)  # 0 for an axis without a finite coordinate
    if bounds is not None:
        given = robust_bounds(points) if isinstance(bounds, str) else np.array(bounds, points.dtype)
        low, high = np.clip(given, low, high) if isinstance(bounds, str) else given
        points = np.where(finite, np.clip(points, low[:, None], high[:, None]), points)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        extent = (high - low).astype(np.float32)
        if voxel_size is None:
            cell = np.repeat(extent.max() / np.float32(count), 3)
        elif voxel_size == "per_axis":
            cell = extent / np.float32(count)
        else:
            cell = np.repeat(np.float32(voxel_size), 3)
        cell = np.where(cell < np.float32(2.0**-126), np.float32(0), cell)
        steps = np.floor((points - low[:, None]).astype(np.float32, copy=False) / cell[:, None])
        voxels = np.where(steps < count - 1, steps, count - 1)  # NaN, from inf / inf, too
    voxels[cell == 0] = 0
    voxels[~finite] = count - 1
    return voxels.astype(np.int64).T


def robust_bounds(points: np.ndarray) -> np.ndarray:
    """Bounds [2, 3] around most of a cloud's points [3, n], before they are cut to the extremes."""
    n = points.shape[1]
    m = min(n, 1024)
    sample = points[:, np.arange(m) * n // max(1, m)]
    bounds = np.zeros((2, 3), points.dtype)
    for d, x in enumerate(sample):
        s = np.sort(x[np.isfinite(x)])
        if len(s):
            low, high = s[len(s) // 100], s[-1 - len(s) // 100]
            with np.errstate(over="ignore"):
                margin = points.dtype.type(4) * (high - low)
                bounds[:, d] = low - margin, high + margin
    return bounds


def morton(voxels: np.ndarray) -> np.ndarray:
    """Morton codes uint64 of 48 bits: bit 3b + d is bit b of axis d."""
    spread = np.ascontiguousarray(voxels.T).view(np.uint64)
    for shift, mask in (
        (32, 0xFFFF00000000FFFF),
        (16, 0x00FF0000FF0000FF),
        (8, 0xF00F00F00F00F00F),
        (4, 0x30C30C30C30C30C3),
        (2, 0x9249249249249249),
    ):
        spread = (spread | spread << np.uint64(shift)) & np.uint64(mask)
    return spread[0] | spread[1] << np.uint64(1) | spread[2] << np.uint64(2)


def hash_bucket(voxels: np.ndarray, hash: str, num_buckets: int) -> np.ndarray:
    """The bucket int64 [n] that the hash function gives each voxel, in 0..num_buckets - 1."""
    if hash.startswith("xor"):
        h = voxels[:, 0] ^ voxels[:, 1] ^ voxels[:, 2]
    else:
        h = (morton(voxels) >> np.uint64(32)).astype(np.int64)
    return h % num_buckets if hash.endswith("mod") else h // -(-65536 // num_buckets)


def order(
    points: np.ndarray, num_buckets: int, hash: str, voxel_size: float | str | None, bounds: Bounds = None
) -> np.ndarray:
    """The order of the points for balance="spill": by (hash bucket, full-resolution code, index)."""
    voxels = voxelize(points, voxel_size, bounds=bounds)
    codes = [morton(voxels)]
    if hash.startswith("xor"):
        codes.append((voxels[:, 0] ^ voxels[:, 1] ^ voxels[:, 2]).astype(np.uint64))
    if hash != "zorder_div":  # for zorder_div the bucket is the top of the code itself
        codes.append(hash_bucket(voxels, hash, num_buckets).astype(np.uint64))
    # Sort by sixteen bits at a time, least significant first: NumPy sorts uint16 by radix, which is stable and makes
    # this five times as fast as sorting the codes.
    digits = [
        (code >> np.uint64(16 * k)).astype(np.uint16)
        for code in codes
        for k in range(4)
        if (code >> np.uint64(16 * k)).any()
    ]
    permutation = np.arange(len(points))
    for digit in digits:
        permutation = permutation[np.argsort(digit[permutation], kind="stable")]
    return permutation


def candidates(seed: int) -> np.ndarray:
    """The 128 offsets int64 [128, 3] that balance="probe" tries, in the order that `seed` gives."""
    near = [(x, y, z) for x in range(-2, 3) for y in range(-2, 3) for z in range(-2, 3) if (x, y, z) != (0, 0, 0)]
    far = [(3, 3, 3), (3, -3, 3), (-3, 3, -3), (-3, -3, -3)]
    return np.array(near + far)[np.random.Generator(np.random.PCG64(seed)).permutation(128)]


def probe(
    points: np.ndarray,
    num_buckets: int,
    bucket_size: int,
    hash: str,
    voxel_size: float | str | None,
    seed: int,
    bounds: Bounds = None,
) -> tuple[np.ndarray, int]:
    """For balance="probe": the bucket int64 [n] of each point, and how many points are not in their hash bucket."""
    voxels = voxelize(points, voxel_size, bounds=bounds)
    named = hash_bucket(voxels, hash, num_buckets)
    room = np.full(num_buckets, bucket_size)
    room[-1] = len(points) - (num_buckets - 1) * bucket_size
    home = np.full(len(points), -1)
    homeless = np.arange(len(points))  # always ascending, because a bucket accepts the lowest point indices
    for offset in [np.zeros(3, np.int64), *candidates(seed)]:
        moved = np.clip(voxels[homeless] + 4 * num_buckets * offset, 0, 65535)
        proposal = hash_bucket(moved, hash, num_buckets)
        by_bucket = np.argsort(proposal, kind="stable")
        first = np.searchsorted(proposal[by_bucket], np.arange(num_buckets))
        rank = np.empty_like(homeless)
        rank[by_bucket] = np.arange(len(homeless)) - first[proposal[by_bucket]]
        accepted = rank < room[proposal]
        home[homeless[accepted]] = proposal[accepted]
        room -= np.bincount(proposal[accepted], minlength=num_buckets)
        homeless = homeless[~accepted]
        if not len(homeless):
            break
    home[homeless] = np.repeat(np.arange(num_buckets), room)
    return home, int((home != named).sum())


def bucketize(
    points: np.ndarray,
    bucket_size: int,
    lengths: Sequence[int],
    hash: str,
    balance: str,
    voxel_size: float | str | None,
    seed: int,
    bounds: Bounds = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """slot_to_point int32 [slots], point_to_slot int32 [N], and int32 [] the points that "probe" moved elsewhere."""
    counts = [-(-n // bucket_size) for n in lengths]
    slot_to_point = np.full(sum(counts) * bucket_size, -1, np.int32)
    point_to_slot = np.empty(len(points), np.int32)
    point = slot = moved = 0
    for n, num_buckets in zip(lengths, counts, strict=True):
        if n:
            cloud = points[point : point + n]
            if balance == "spill":
                permutation = order(cloud, num_buckets, hash, voxel_size, bounds)
            else:
                home, away = probe(cloud, num_buckets, bucket_size, hash, voxel_size, seed, bounds)
                permutation = np.argsort(home, kind="stable")
                moved += away
            slot_to_point[slot : slot + n] = point + permutation
            point_to_slot[point + permutation] = np.arange(slot, slot + n, dtype=np.int32)
        point, slot = point + n, slot + num_buckets * bucket_size
    return slot_to_point, point_to_slot, np.array(moved, np.int32)


def take_rows(rows: np.ndarray, index: np.ndarray, fill: object) -> np.ndarray:
    """rows[index], with `fill` where the index is -1."""
    out = np.full((len(index), *rows.shape[1:]), fill, rows.dtype)
    valid = index >= 0
    out[valid] = rows[index[valid]]
    return out


def scope_table(bucket_offsets: Sequence[int], size: int, shift: int, stride: int) -> np.ndarray:
    """The buckets of each attention scope, int32 [num_scopes, size]; a shorter scope is filled up with -1."""
    table = []
    for begin, end in itertools.pairwise(bucket_offsets):
        count = end - begin
        for chunk in range(0, count, size * stride):
            positions = np.arange(chunk, min(chunk + size * stride, count))
            for j in range(min(stride, len(positions))):
                members = begin + (positions[j::stride] + shift) % count
                table.append(np.pad(members, (0, size - len(members)), constant_values=-1))
    return np.array(table, np.int32).reshape(-1, size)


def bucket_radii(points: np.ndarray, slot_to_point: np.ndarray, bucket_size: int) -> np.ndarray:
    """For each bucket without padding the largest distance from its mean, float64 [full buckets]."""
    buckets = slot_to_point.reshape(-1, bucket_size)
    members = points[buckets[(buckets >= 0).all(axis=1)]].astype(np.float64)
    return np.linalg.norm(members - members.mean(axis=1, keepdims=True), axis=2).max(axis=1, initial=0)
