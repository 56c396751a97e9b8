# SPDX-License-Identifier: Apache-2.0
"""The Chamfer distance and its gradient in NumPy, from exact nearest neighbours.

Sums are taken in an order that a GPU can also follow, and gradient contributions are added as integers. So CPU and GPU
give the same bits. "The dtype" is that of d2: float64 if x or y is float64, and float32 otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gpu3d.reference.neighbors import dtype_of, widened

REDUCTIONS = ("mean", "sum", "none")
POINTS = "points"  # the reduction that keeps the distance of each point
DIRECTIONS = {
    "both": (True, True),
    "x_to_y": (True, False),
    "y_to_x": (False, True),
}  # whether x's and y's points search
SUM_TILE = 1024

# The nearest points of a side: d2 [N] and indices int32 [N] into the other side. None: it did not search.
Found = tuple[np.ndarray, np.ndarray] | None
Side = tuple[
    np.ndarray, Sequence[int], np.ndarray
]  # points, the lengths of their clouds, and their gradient in float64


def ordered_sum(values: Iterable[float]) -> np.float64:
    """The float64 sum in an order that suits a GPU.

    The values are cut into tiles of SUM_TILE, the last tile filled up with zeros. In each tile the second half is added
    to the first until one sum is left. The sums of the tiles are added in the same way, until one is left.
    """
    sums = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        while len(sums) != 1:
            tiles = np.zeros((max(-(-len(sums) // SUM_TILE), 1), SUM_TILE))
            tiles.reshape(-1)[: len(sums)] = sums
            while tiles.shape[1] > 1:
                half = tiles.shape[1] // 2
                tiles = tiles[:, :half] + tiles[:, half:]
            sums = tiles[:, 0]
    return sums[0]


def spans(lengths: Sequence[int]) -> list[slice]:
    """The rows of each cloud."""
    ends = list(itertools.accumulate(lengths, initial=0))
    return [slice(first, end) for first, end in itertools.pairwise(ends)]


def chamfer(
    x: Found, x_lengths: Sequence[int], y: Found, y_lengths: Sequence[int], squared: bool, reduction: str
) -> tuple[np.ndarray, np.ndarray]:
    """The loss [] or [B], and the residuals that `chamfer_backward` needs besides the points.

    A cloud's loss is ordered_sum(d of x) / n + ordered_sum(d of y) / m in float64, without the side that did not
    search, and 0 if the cloud is empty on either side. Reduction "sum" takes the ordered_sum over the clouds, and
    "mean" divides it by the number of clouds. The result is rounded to the dtype.

    The residuals are int32, see `residual_parts`.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    losses = np.zeros(len(x_lengths))
    for found, lengths, other_lengths in ((x, x_lengths, y_lengths), (y, y_lengths, x_lengths)):
        if found is None:
            continue
        d2, indices = found
        d = np.sqrt(d2)
        largest = np.zeros(len(lengths), d.dtype)
        for b, rows in enumerate(spans(lengths)):
            if lengths[b] and other_lengths[b]:
                largest[b] = d[rows].max(initial=0, where=np.isfinite(d[rows]))
                losses[b] += ordered_sum(d2[rows] if squared else d[rows]) / lengths[b]
        parts.append((d2, largest, indices))
    with np.errstate(over="ignore", invalid="ignore"):
        if reduction != "none":
            losses = np.array(ordered_sum(losses))
        if reduction == "mean":
            losses = losses / np.float64(len(x_lengths))  # NaN if there are no clouds
        loss = np.asarray(losses, parts[0][0].dtype)
    return loss, np.concatenate([part.view(np.int32) for column in zip(*parts, strict=True) for part in column])


def residual_parts(x_lengths: Sequence[int], y_lengths: Sequence[int], direction: str, dtype: np.dtype) -> list[int]:
    """The first word of each part of the residuals, and the number of words.

    There are three kinds of parts: the squared distance of each point to its nearest neighbour in the other batch, in
    the dtype; the largest finite distance of each cloud, in the dtype; and the index of each point's nearest neighbour
    or -1, int32. Of each kind there is a part for x and then one for y, or only that of the side that searches. So
    numbers of 8 bytes lie at multiples of 8.
    """
    points = list(itertools.compress((sum(x_lengths), sum(y_lengths)), DIRECTIONS[direction]))
    of_number = dtype.itemsize // 4
    words = [of_number * n for n in (*points, *[len(x_lengths)] * len(points))] + points
    return list(itertools.accumulate(words, initial=0))


def chamfer_backward(
    dloss: np.ndarray | None,
    x: np.ndarray,
    y: np.ndarray,
    residuals: np.ndarray,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
    direction: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x and y in their dtypes; dloss [] or [B] is the gradient of the loss, None means 1.

    Each point i that searches contributes a term. Let j be its nearest neighbour, v = x_i - y_j in the dtype, and d the
    length of v. The term is v / d, or 2 * v if squared, in the dtype. It is 0 if d = 0 or if the other cloud is empty,
    and otherwise NaN if d is not finite.

    The gradient of x_i is own / n - given / m in float64: `own` is its own term, and `given` the sum of the terms of
    all points of y whose nearest neighbour is x_i. Reduction "mean" divides by the number of clouds. The result is
    rounded to the dtype, multiplied by dloss in the dtype, and rounded to x's own.

    Terms are added as integers, so their order does not matter. Each is multiplied by 2**shift and rounded to nearest
    even; NaN terms are left out. shift = 62 - bit_length(number of points of the terms' cloud) - e, where 2**e is above
    every term: e = 1, or if squared e = 2 + E. E is the binary exponent of the largest finite d from that cloud to the
    other (frexp: d = f * 2**E with 1/2 <= f < 1). If no d is above 0, all terms are 0.
    """
    dtype = dtype_of(x, y)
    parts = np.split(np.ascontiguousarray(residuals), residual_parts(x_lengths, y_lengths, direction, dtype)[1:-1])
    sides = (x, x_lengths, np.zeros((len(x), 3))), (y, y_lengths, np.zeros((len(y), 3)))
    searching = list(_searching(sides, direction))
    for i, ((a, a_lengths, da), (b, b_lengths, db), _) in enumerate(searching):
        d2, largest, indices = parts[i :: len(searching)]
        d2, largest = d2.view(dtype), largest.view(dtype)
        for rows, others, most in zip(spans(a_lengths), spans(b_lengths), largest, strict=True):
            n = rows.stop - rows.start
            if n and others.stop > others.start:
                own, given = _terms(a[rows], b[others], indices[rows] - others.start, d2[rows], most, squared)
                da[rows] += own / n
                db[others] += given / n
    made = []
    with np.errstate(over="ignore", invalid="ignore"):
        for points, lengths, gradient in sides:
            if reduction == "mean":
                gradient /= np.float64(len(lengths))
            gradient = gradient[:, : points.shape[1]].astype(dtype)
            if dloss is not None:
                gradient *= (np.repeat(dloss, lengths) if dloss.ndim else dloss.reshape(1))[:, None]
            made.append(gradient.astype(points.dtype, copy=False))
    return made[0], made[1]


def _terms(
    sources: np.ndarray,
    targets: np.ndarray,
    nearest: np.ndarray,
    d2: np.ndarray,
    largest: np.floating,
    squared: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The sources' own terms float64 [n, 3], and their contributions to the targets float64 [m, 3]."""
    finite = np.isfinite(d2)
    d = np.sqrt(d2[finite])
    chosen = nearest[finite]
    v = widened(sources[finite], d.dtype) - widened(targets[chosen], d.dtype)
    with np.errstate(under="ignore"):
        term = 2 * v if squared else v / np.where(d > 0, d, d.dtype.type(1))[:, None]
    term[d == 0] = 0
    own = np.full((len(sources), 3), np.nan)
    own[finite] = term
    bound = 2 + int(np.frexp(largest)[1]) if squared else 1
    shift = 62 - len(sources).bit_length() - bound
    given = np.zeros((len(targets), 3), np.int64)
    np.add.at(given, chosen, -np.rint(np.ldexp(own[finite], shift)).astype(np.int64))
    return own, np.ldexp(given.astype(np.float64), -shift)


# ---- the distance of each point ------------------------------------------------------------------------------------


def points(
    x: Found, x_lengths: Sequence[int], y: Found, y_lengths: Sequence[int], squared: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices int32 of the nearest points: those of x and then those of y, as far as they search.

    The distance to an empty cloud is 0.
    """
    distances, nearest = [], []
    for found, lengths, other_lengths in ((x, x_lengths, y_lengths), (y, y_lengths, x_lengths)):
        if found is not None:
            d2, indices = found
            filled = np.repeat(np.array(other_lengths, np.int64) > 0, lengths)
            distances.append(np.where(filled, d2 if squared else np.sqrt(d2), d2.dtype.type(0)))
            nearest.append(indices)
    return np.concatenate(distances), np.concatenate(nearest)


def points_backward(
    ddistances: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    distances: np.ndarray,
    nearest: np.ndarray,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    direction: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x and y in their dtypes; ddistances is the gradient of each distance of `points`, in the dtype.

    Point i with nearest neighbour j has a factor: its ddistance g, or (2 * g) * d in the dtype if squared. Its term is
    factor * (v / d) in float64: v = x_i - y_j and v / d in the dtype, and d is the distance, or its root if squared.
    There is no term where the distance is 0 or not finite, whatever g is there.

    The gradient of x_i is own - given in float64, rounded to the dtype and then to x's own: `own` is its own term, and
    `given` the sum of the terms of all points of y whose nearest neighbour is x_i. Terms are added as integers: each
    times 2**shift, rounded to nearest even, where shift = 61 - bit_length(number of points of the terms' cloud) - E,
    and the largest |factor| of that sum is f * 2**E, 1/2 <= f < 1. A factor that is not finite makes the gradients of
    both of its points NaN.
    """
    sides = (x, x_lengths, np.zeros((len(x), 3))), (y, y_lengths, np.zeros((len(y), 3)))
    for (a, a_lengths, da), (b, b_lengths, db), place in _searching(sides, direction):
        g, d, indices = ddistances[place], distances[place], nearest[place]
        for rows, others in zip(spans(a_lengths), spans(b_lengths), strict=True):
            i = rows.start + np.flatnonzero((indices[rows] >= 0) & (d[rows] > 0) & np.isfinite(d[rows]))
            j, length = indices[i], np.sqrt(d[i]) if squared else d[i]
            v = widened(a[i], d.dtype) - widened(b[j], d.dtype)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                factors = 2 * g[i] * length if squared else g[i]
                terms = factors[:, None].astype(np.float64) * (v / length[:, None])
            terms[~np.isfinite(factors)] = np.nan
            da[i] += terms
            db[others] += _given(terms, factors, j - others.start, rows.stop - rows.start, others.stop - others.start)
    with np.errstate(over="ignore"):
        dx, dy = (of[:, : z.shape[1]].astype(distances.dtype).astype(z.dtype, copy=False) for z, _, of in sides)
    return dx, dy


def _given(terms: np.ndarray, factors: np.ndarray, targets: np.ndarray, count: int, n: int) -> np.ndarray:
    """Minus the sums of the terms by target, float64 [n, 3]. `count` is the number of points that have terms."""
    largest = np.zeros(n, factors.dtype)
    with np.errstate(invalid="ignore"):
        np.maximum.at(largest, targets, np.abs(factors))
    finite = np.isfinite(largest)
    shifts = 61 - count.bit_length() - np.frexp(np.where(finite, largest, 0))[1][:, None]
    kept = finite[targets]
    terms, targets = terms[kept], targets[kept]
    sums = np.zeros((n, 3), np.int64)
    np.add.at(sums, targets, -np.rint(np.ldexp(terms, shifts[targets])).astype(np.int64))
    return np.where(finite[:, None], np.ldexp(sums.astype(np.float64), -shifts), np.nan)


def _searching(sides: tuple[Side, Side], direction: str) -> Iterator[tuple[Side, Side, slice]]:
    """Each side that searches, the other one, and where its points lie among those of the sides that search."""
    end = 0
    for searches, side, other in zip(DIRECTIONS[direction], sides, sides[::-1], strict=True):
        if searches:
            first, end = end, end + len(side[0])
            yield side, other, slice(first, end)
