# SPDX-License-Identifier: Apache-2.0
"""Farthest point sampling and voxel downsampling in NumPy, one cloud at a time.

Every floating-point operation is rounded once, in float64 for float64 and otherwise in float32, so that the CUDA
kernels can give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT64

REDUCTIONS = ("sum", "mean", "min", "max")
MOST_VOXELS = 2**63  # of a cloud: their numbers fit 63 bits


def farthest_points(points: np.ndarray, lengths: Sequence[int], k: int, start: int) -> np.ndarray:
    """Indices int32 [clouds * k] into the packed points; -1 where a cloud has no more points to take."""
    points = _widened(points)
    out = np.full((len(lengths), k), -1, np.int32)
    first = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for row, n in zip(out, lengths, strict=True):
            _take_farthest(points[first : first + n], start, first, row)
            first += n
    return out.reshape(-1)


def _take_farthest(points: np.ndarray, start: int, first: int, out: np.ndarray) -> None:
    """Fill `out` with points of a cloud, whose indices begin at `first`."""
    columns = np.ascontiguousarray(points.T)  # NumPy is fastest along rows
    finite = np.isfinite(columns).all(axis=0)
    if start >= len(points) or not finite[start]:
        return
    nearest = np.where(finite, points.dtype.type(np.inf), points.dtype.type(-1))  # -1: cannot be taken
    sample = start
    for i in range(len(out)):
        out[i] = first + sample
        nearest[sample] = -1
        d2 = np.zeros_like(nearest)
        for x in columns:  # x, y and z: a sum from the left
            d = x - x[sample]
            d2 += d * d
        np.minimum(nearest, d2, out=nearest, where=finite)
        sample = int(nearest.argmax())  # the first of equal ones
        if nearest[sample] < 0:
            return


class Voxels(NamedTuple):
    """The voxels of a batch, in the order of their first points."""

    points: np.ndarray  # [V, d]
    features: np.ndarray | None  # [V, ...]
    counts: np.ndarray  # int32 [V]
    point_to_voxel: np.ndarray  # int32 [N]; -1 for a point that is not finite
    lengths: tuple[int, ...]  # voxels of each cloud


def voxel_downsample(
    points: np.ndarray, size: float, features: np.ndarray | None, lengths: Sequence[int], reduce: str
) -> Voxels:
    """Average the points of each voxel, and reduce their features."""
    point_to_voxel = np.full(len(points), -1, np.int32)
    found = []
    first = before = 0
    for b, n in enumerate(lengths):
        voxel, count = _voxels_of_cloud(_widened(points[first : first + n]), size, b)
        point_to_voxel[first : first + n] = np.where(voxel < 0, -1, voxel + before)
        found.append(count)
        first, before = first + n, before + count
    inside = np.flatnonzero(point_to_voxel >= 0)  # ascending, so that sums are in the order of the points
    voxel = point_to_voxel[inside]
    counts = np.bincount(voxel, minlength=before).astype(np.int32)
    firsts = np.full(before, len(points))
    np.minimum.at(firsts, voxel, inside)
    wide = _widened(points)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.zeros((before, points.shape[1]), wide.dtype)
        np.add.at(sums, voxel, wide[inside] - wide[firsts[voxel]])
        means = wide[firsts] + sums / counts[:, None].astype(wide.dtype)
        reduced = None if features is None else _reduced(features, inside, voxel, firsts, counts, reduce)
        return Voxels(means.astype(points.dtype), reduced, counts, point_to_voxel, tuple(found))


def _voxels_of_cloud(points: np.ndarray, size: float, b: int) -> tuple[np.ndarray, int]:
    """The voxel of each point of cloud b, in the order of first points and -1 where it is not finite; how many."""
    columns = np.ascontiguousarray(points.T)
    finite = np.isfinite(columns)
    low = columns.min(axis=1, initial=np.inf, where=finite)
    high = columns.max(axis=1, initial=-np.inf, where=finite)
    low, high = np.where(low <= high, (low, high), 0).astype(points.dtype)  # 0 for an axis without a finite coordinate
    cell = np.float32(size)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.floor((columns - low[:, None]).astype(np.float32, copy=False) / cell)
        last = np.floor((high - low).astype(np.float32) / cell)
    cells = [int(x) + 1 if x < MOST_VOXELS else MOST_VOXELS + 1 for x in last]
    if math.prod(cells) > MOST_VOXELS:
        raise too_many_voxels(size, b)
    inside = finite.all(axis=0)
    x, y, z = [*steps[:, inside].astype(np.uint64), np.uint64(0)][:3]
    code = x + np.uint64(cells[0]) * (y + np.uint64(cells[1]) * z)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    voxel = np.full(len(points), -1, np.int64)
    voxel[inside] = rank[inverse.reshape(-1)]
    return voxel, len(first)


def too_many_voxels(size: float, b: int) -> ValueError:
    """The error of a cloud whose voxels have no numbers."""
    return ValueError(
        f"size must be larger: with {size} the grid of cloud {b} has more than 2**63 voxels. Take a larger size, or "
        "drop points that lie far from the others."
    )


def _reduced(
    features: np.ndarray, inside: np.ndarray, voxel: np.ndarray, firsts: np.ndarray, counts: np.ndarray, reduce: str
) -> np.ndarray:
    """The features [V, ...] of the voxels, in the features' dtype. A reduction begins at the first point."""
    wide = _widened(features)
    out = wide[firsts]
    others = inside != firsts[voxel]
    if out.size:
        function = {"min": np.minimum, "max": np.maximum}.get(reduce, np.add)
        function.at(out, voxel[others], wide[inside[others]])
    if reduce == "mean":
        out /= counts.reshape(-1, *[1] * (features.ndim - 1)).astype(out.dtype)
    return out.astype(features.dtype)


def _widened(x: np.ndarray) -> np.ndarray:
    """The array in the dtype that it is computed in."""
    return x if x.dtype == FLOAT64 else x.astype(np.float32, copy=False)
