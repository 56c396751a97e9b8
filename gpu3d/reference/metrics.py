# SPDX-License-Identifier: Apache-2.0
"""Metrics of pairs of clouds in NumPy, from exact nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu3d.reference.chamfer import ordered_sum, spans

MAX_THRESHOLDS = 64
STEEPNESS = 1000.0  # alpha of the density-aware distance, for shapes of unit size


def rounded(thresholds: Sequence[float], dtype: np.dtype) -> np.ndarray:
    """The thresholds [T] in the dtype of the distances."""
    with np.errstate(over="ignore", under="ignore"):
        return np.array(thresholds, np.float64).astype(dtype)


def compare_clouds(
    x: tuple[np.ndarray, np.ndarray],
    x_lengths: Sequence[int],
    y: tuple[np.ndarray, np.ndarray],
    y_lengths: Sequence[int],
    thresholds: Sequence[float],
) -> list[np.ndarray]:
    """The metrics of `compare_clouds` in its order, from d2 and indices int32 of the nearest, for x and y.

    They are computed in float64 and rounded to the dtype of d2: chamfer, chamfer_squared, hausdorff and hausdorff_95
    [B], precision, recall and fscore [B, T], density_aware_chamfer [B].
    """
    clouds, dtype = len(x_lengths), x[0].dtype
    limits = rounded(thresholds, dtype)
    single, shares = np.zeros((5, clouds)), np.zeros((3, clouds, len(limits)))
    for b, sides in enumerate(zip(spans(x_lengths), spans(y_lengths), strict=True)):
        for (d2, nearest), rows, others, within in zip((x, y), sides, sides[::-1], shares, strict=False):
            square, d = d2[rows], np.sqrt(d2[rows])
            n, m = rows.stop - rows.start, others.stop - others.start
            single[0, b] += ordered_sum(d) / n
            single[1, b] += ordered_sum(square) / n
            single[2, b] = np.maximum(single[2, b], d.max())  # NaN if one is
            single[3, b] = np.maximum(single[3, b], percentile_95(d))
            single[4, b] += ordered_sum(_density_terms(square, nearest[rows] - others.start, m)) / n
            within[b] = (d[:, None] <= limits).sum(axis=0) / n
    precision, recall, fscore = shares
    both = precision + recall
    fscore[:] = np.where(both > 0, 2 * precision * recall / np.where(both > 0, both, 1), 0)
    with np.errstate(over="ignore"):
        single[4] /= 2
        *distances, density = single.astype(dtype)
        return [*distances, *shares.astype(dtype), density]


def percentile_95(d: np.ndarray) -> np.float64:
    """The 95th percentile of distances [n], between the two nearest ranks; NaN if a distance is NaN."""
    if np.isnan(d).any():
        return np.float64(np.nan)
    rank, hundredths = divmod(95 * (len(d) - 1), 100)
    ranks = [rank, min(rank + 1, len(d) - 1)]
    low, high = np.partition(d, ranks)[ranks].astype(np.float64)
    return low if low == high or not hundredths else low + (high - low) * (hundredths / 100)


def _density_terms(d2: np.ndarray, nearest: np.ndarray, m: int) -> np.ndarray:
    """1 - exp(-1000 d2) (n / m) / c in float64, where c points of these n share the nearest, one of m points."""
    found = nearest >= 0
    counts = np.bincount(nearest[found], minlength=m)
    shares = np.ones(len(d2))
    shares[found] = counts[nearest[found]]
    with np.errstate(over="ignore", under="ignore"):
        return 1 - np.exp(-STEEPNESS * d2.astype(np.float64)) * (len(d2) / m) / shares
