# SPDX-License-Identifier: Apache-2.0
"""Normals and curvature in NumPy: the eigenvectors of the covariance of each point's nearest points, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu3d.reference import neighbors

MIN_K, MAX_K = 3, 1024


def normals(
    points: np.ndarray, lengths: Sequence[int], k: int, viewpoint: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Normals [N, 3] and curvature [N], float32 or for float64 points float64.

    Fewer than 3 neighbours: NaN. No extent: the normal lies along z, and the curvature is 0.
    """
    _, indices = neighbors.knn(points, lengths, neighbors.index(points, lengths, points.dtype == np.float64), k)
    covariance, count = covariances(points, indices)
    with np.errstate(over="ignore"):
        trace = covariance.trace(axis1=1, axis2=2)
    known = (count >= MIN_K) & np.isfinite(trace)
    vectors, curvature = np.full((len(points), 3), np.nan), np.full(len(points), np.nan)
    vectors[known], curvature[known] = [0, 0, 1], 0
    wide = np.flatnonzero(known & (trace > 0))
    # Divided by the trace, eigenvalues sum to 1, and nothing can overflow or underflow.
    values, basis = np.linalg.eigh(covariance[wide] / trace[wide, None, None])
    vectors[wide], curvature[wide] = basis[:, :, 0], np.maximum(values[:, 0], 0)
    dtype = np.float64 if points.dtype == np.float64 else np.float32
    return oriented(vectors, points, viewpoint, dtype), curvature.astype(dtype)


def covariances(points: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scatter matrices float64 [N, 3, 3] of each point's neighbours about their mean, and their numbers [N].

    `indices` [N, k] are rows of `points`, -1 where there is none. Sums are taken neighbour by neighbour, so the bits of
    a point do not depend on other points. Differences are from the point itself: far from the origin nothing cancels.
    """
    axes = np.ascontiguousarray(points.T, np.float64)
    sums, products = np.zeros((3, len(points))), np.zeros((3, 3, len(points)))
    with np.errstate(over="ignore", invalid="ignore"):
        for near in np.ascontiguousarray(indices.T):
            difference = np.where(near >= 0, axes.take(near, axis=1) - axes, 0)
            sums += difference
            products += difference[:, None] * difference
        count = (indices >= 0).sum(axis=1)
        products -= sums[:, None] * (sums / np.maximum(count, 1))
    return np.moveaxis(products, -1, 0), count


def oriented(
    vectors: np.ndarray, points: np.ndarray, viewpoint: Sequence[float] | None, dtype: type[np.floating]
) -> np.ndarray:
    """The vectors float64 [N, 3] in this dtype, towards the viewpoint, otherwise with z, y or x positive."""
    rounded = vectors.astype(dtype)
    x, y, z = rounded.T
    turned = (z < 0) | (z == 0) & ((y < 0) | (y == 0) & (x < 0))
    if viewpoint is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            away = (np.asarray(viewpoint) - points.astype(np.float64)) * vectors
            facing = (away[:, 0] + away[:, 1]) + away[:, 2]
        turned = (facing < 0) | (facing == 0) & turned
    return np.where(turned[:, None], 0 - rounded, rounded)
