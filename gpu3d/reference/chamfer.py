# SPDX-License-Identifier: Apache-2.0
"""The Chamfer distance and its gradient in NumPy, from exact nearest neighbours.

Sums are taken in an order that a GPU can also follow, and gradient contributions are added as integers. So CPU and GPU
give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from gpu3d.reference.neighbors import Cloud, local, nearest, origin

REDUCTIONS = ("mean", "sum", "none")
SUM_TILE = 1024


def ordered_sum(values: Iterable[float]) -> np.float64:
    """The float64 sum in an order that suits a GPU.

    The values are cut into tiles of SUM_TILE, the last tile filled up with zeros. In each tile the second half is added
    to the first until one sum is left. The sums of the tiles are added in the same way, until one is left.
    """
    sums = np.asarray(values, np.float64)
    while len(sums) != 1:
        tiles = np.zeros((max(-(-len(sums) // SUM_TILE), 1), SUM_TILE))
        tiles.reshape(-1)[: len(sums)] = sums
        while tiles.shape[1] > 1:
            half = tiles.shape[1] // 2
            tiles = tiles[:, :half] + tiles[:, half:]
        sums = tiles[:, 0]
    return sums[0]


def chamfer(
    x: np.ndarray,
    x_clouds: Sequence[Cloud],
    y: np.ndarray,
    y_clouds: Sequence[Cloud],
    squared: bool,
    reduction: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The loss float32 [] or [B], and the residuals that `chamfer_backward` needs besides the points.

    A cloud's loss is ordered_sum(d of x) / n + ordered_sum(d of y) / m in float64. Reduction "sum" takes the
    ordered_sum over the clouds, and "mean" divides it by the number of clouds. The result is rounded to float32.

    The residuals are int32 [2 * (N + M + B)], see `residual_parts`.
    """
    parts: list[np.ndarray] = []
    losses = np.zeros(len(x_clouds))
    for points, clouds, others in ((x, x_clouds, y_clouds), (y, y_clouds, x_clouds)):
        d2, indices = nearest(points, [cloud.length for cloud in clouds], others, 1)
        d = np.sqrt(d2[:, 0])
        largest = np.zeros(len(clouds), np.float32)
        for b, cloud in enumerate(clouds):
            of_cloud = d[cloud.first : cloud.first + cloud.length]
            largest[b] = of_cloud.max(initial=0, where=np.isfinite(of_cloud))
            of_cloud = d2[cloud.first : cloud.first + cloud.length, 0] if squared else of_cloud
            losses[b] += ordered_sum(of_cloud) / cloud.length
        parts += [indices[:, 0], d2[:, 0].view(np.int32), largest.view(np.int32)]
    with np.errstate(over="ignore", invalid="ignore"):
        if reduction != "none":
            losses = np.array(ordered_sum(losses))
        if reduction == "mean":
            losses = losses / np.float64(len(x_clouds))  # NaN if there are no clouds
        return np.asarray(losses, np.float32), np.concatenate(parts)


def residual_parts(x_lengths: Sequence[int], y_lengths: Sequence[int]) -> list[int]:
    """The first word of each part of the residuals, and the number of words.

    There are three parts for x and then three for y: the index of each point's nearest neighbour in the other batch or
    -1, int32; the squared distance to it, float32; and the largest finite distance of each cloud, float32.
    """
    n, m, clouds = sum(x_lengths), sum(y_lengths), len(x_lengths)
    return list(itertools.accumulate((n, n, clouds, m, m, clouds), initial=0))


def chamfer_backward(
    dloss: np.ndarray | None,
    x: np.ndarray,
    y: np.ndarray,
    residuals: np.ndarray,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x and y in their dtypes; dloss float32 [] or [B] is the gradient of the loss, None means 1.

    Each point i contributes a term. Let j be its nearest neighbour, v = x_i - y_j in float32, and d the length of v.
    The term is v / d, or 2 * v if squared, in float32. It is 0 if d = 0, and NaN if d is not finite.

    The gradient of x_i is own / n - given / m in float64: `own` is its own term, and `given` the sum of the terms of
    all points of y whose nearest neighbour is x_i. Reduction "mean" divides by the number of clouds. The result is
    rounded to float32, multiplied by dloss in float32, and rounded to x's dtype.

    Terms are added as integers, so their order does not matter. Each is multiplied by 2**shift and rounded to nearest
    even; NaN terms are left out. shift = 62 - bit_length(number of points of the terms' cloud) - e, where 2**e is above
    every term: e = 1, or if squared e = 2 + E. E is the binary exponent of the largest finite d from that cloud to the
    other (frexp: d = f * 2**E with 1/2 <= f < 1). If no d is above 0, all terms are 0.
    """
    parts = np.split(residuals, residual_parts(x_lengths, y_lengths)[1:-1])
    of_x, of_y = (
        (indices, d2.view(np.float32), largest.view(np.float32)) for indices, d2, largest in (parts[:3], parts[3:])
    )
    dx, dy, row, column = np.zeros((len(x), 3)), np.zeros((len(y), 3)), 0, 0
    for b, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        rows, columns = slice(row, row + n), slice(column, column + m)
        own_x, given_y = _terms(x[rows], y[columns], of_x[0][rows] - column, of_x[1][rows], of_x[2][b], squared)
        own_y, given_x = _terms(y[columns], x[rows], of_y[0][columns] - row, of_y[1][columns], of_y[2][b], squared)
        dx[rows] = own_x / n + given_x / m
        dy[columns] = own_y / m + given_y / n
        row, column = row + n, column + m
    made = []
    with np.errstate(over="ignore", invalid="ignore"):
        for gradient, points, lengths in ((dx, x, x_lengths), (dy, y, y_lengths)):
            if reduction == "mean":
                gradient /= np.float64(len(lengths))
            gradient = gradient[:, : points.shape[1]].astype(np.float32)
            if dloss is not None:
                gradient *= (np.repeat(dloss, lengths) if dloss.ndim else dloss.reshape(1))[:, None]
            made.append(gradient.astype(points.dtype, copy=False))
    return made[0], made[1]


def _terms(
    sources: np.ndarray,
    targets: np.ndarray,
    nearest: np.ndarray,
    d2: np.ndarray,
    largest: np.float32,
    squared: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The sources' own terms float64 [n, 3], and their contributions to the targets float64 [m, 3]."""
    here = origin(targets)
    finite = np.isfinite(d2)
    d = np.sqrt(d2[finite])
    chosen = nearest[finite]
    v = local(sources[finite], here) - local(targets[chosen], here)
    with np.errstate(under="ignore"):
        term = 2 * v if squared else v / np.where(d > 0, d, np.float32(1))[:, None]
    term[d == 0] = 0
    own = np.full((len(sources), 3), np.nan)
    own[finite] = term
    bound = 2 + int(np.frexp(largest)[1]) if squared else 1
    shift = 62 - len(sources).bit_length() - bound
    given = np.zeros((len(targets), 3), np.int64)
    np.add.at(given, chosen, -np.rint(np.ldexp(own[finite], shift)).astype(np.int64))
    return own, np.ldexp(given.astype(np.float64), -shift)
