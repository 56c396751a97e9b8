# SPDX-License-Identifier: Apache-2.0
"""The APML transport loss in NumPy and SciPy: the dense definition, and a sparse plan from two exact searches.

The cost is C_ij = sqrt((dx*dx + dy*dy) + dz*dz) in float64, each operation rounded once. Coordinates are float64 if one
of the clouds is that, and else float32; losses and gradients are rounded to the same dtype, "the dtype" below. Let
d1 <= d2 be the two smallest costs of row i, and T_i = ln((M - 1) / (1 - p_min)) / max(d2 - d1, GAP). The row keeps
entry j if exp(-(C_ij - d1) * T_i) > threshold. Libraries round the exponential differently, so the test is
(C_ij - d1) * T_i < -ln(threshold) in float64: then every device keeps the same entries. Columns keep entries by the
same rule.

The entries that a row keeps are the points in a ball. A k-d tree finds the two nearest points and then the points of
the ball with a little slack, and the test above decides. So nothing is approximated, and memory is proportional to the
number of entries.

A point with a coordinate that is not finite has no entries. Its gradient and the loss of its cloud are NaN. N and M
count it like any other point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d.reference.chamfer import ordered_sum, spans
from gpu3d.reference.neighbors import PAIRS, Cloud, clipped, dtype_of, index, squared_distances, widened

SYMMETRIZATIONS = ("mean", "min")
GAP = 1e-8  # the least d2 - d1 that T_i divides by
EPSILON = 1e-8  # added to each sum that Sinkhorn divides by

NEAR = 8  # nearest points that are searched for first; most balls hold fewer

# How much a radius is widened, relative to the distances and the gap in it: about a thousand rounding errors.
SLACK = 2.0**-40


class Options(NamedTuple):
    """The options of a plan."""

    p_min: float
    threshold: float
    iterations: int
    symmetrize: str


def log_mass(targets: int, p_min: float) -> float:
    """ln((M - 1) / (1 - p_min)). For M = 1 as for 2: the weight of a single target is 1 whatever T is."""
    return math.log(max(targets - 1, 1)) - math.log1p(-p_min)


def log_threshold(threshold: float) -> float:
    """-ln(threshold): an entry is kept if its exponent is less. inf, for threshold 0, keeps all."""
    return -math.log(threshold) if threshold else math.inf


# ---- the definition ------------------------------------------------------------------------------------------------


class Dense(NamedTuple):
    """The result of `dense`, for one pair of clouds."""

    support: np.ndarray  # bool [N, M], the entries that the plan has
    plan: np.ndarray  # float64 [N, M]
    loss: np.ndarray  # float64 []
    dpred: np.ndarray  # float64 [N, 3]
    dtarget: np.ndarray  # float64 [M, 3]


def dense(pred: np.ndarray, target: np.ndarray, options: Options) -> Dense:
    """Support, plan, loss and gradients by the definition: over all pairs of two finite clouds [N or M, 2 or 3].

    The oracle of the sparse functions. Only here may the threshold be 0, which keeps every pair.
    """
    x, y = (widened(points, dtype_of(pred, target)).astype(np.float64) for points in (pred, target))
    c = np.sqrt(squared_distances(x[:, None], y))
    of_rows, p1 = _dense_side(c, options)
    of_columns, p2 = (side.T for side in _dense_side(c.T, options))
    support, plan = of_rows | of_columns, (p1 + p2) / 2
    if options.symmetrize == "min":
        both = of_rows & of_columns
        of_rows = of_rows & ~both.any(axis=1, keepdims=True)
        of_columns = of_columns & ~both.any(axis=0)
        support = both | of_rows | of_columns
        plan = np.where(both, np.minimum(p1, p2), np.where(of_rows, p1, np.where(of_columns, p2, 0)))
    for _ in range(options.iterations):
        plan = plan / (plan.sum(axis=1, keepdims=True) + EPSILON)
        plan = plan / (plan.sum(axis=0) + EPSILON)
    pulls = (plan / np.where(c > 0, c, np.inf))[..., None] * (x[:, None] - y)
    return Dense(support, plan, (plan * c).sum(), pulls.sum(axis=1), -pulls.sum(axis=0))


def _dense_side(c: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The entries that the rows keep, bool [N, M], and their weights, float64 [N, M]; each row sums to 1."""
    nearest = np.sort(c, axis=1)[:, :2]
    gap = np.maximum(nearest[:, -1:] - nearest[:, :1], GAP)
    exponent = (c - nearest[:, :1]) * (log_mass(c.shape[1], options.p_min) / gap)
    kept = exponent < log_threshold(options.threshold)
    k = np.where(kept, np.exp(-exponent), 0)
    return kept, k / k.sum(axis=1, keepdims=True)


# ---- what each side keeps ------------------------------------------------------------------------------------------


class TooManyEntries(ValueError):
    """The plan keeps more entries than the limit allows."""


class Side(NamedTuple):
    """The rows or the columns of a plan: the points of the cloud `own` keep points of the cloud `other`."""

    name: str
    own: Cloud
    other: Cloud
    log_mass: float
    log_threshold: float


class Entries(NamedTuple):
    """The pairs that a side keeps."""

    own: np.ndarray  # int64 [entries], rows of the packed points of side.own
    other: np.ndarray  # int64 [entries], rows of the packed points of side.other
    distances: np.ndarray  # float64 [entries]
    weights: np.ndarray  # float32 [entries], not yet divided by their sum


class _Near(NamedTuple):
    """What the NEAR nearest neighbours of each point tell about a side.

    For most points they are all the points of the ball. The others are "open".
    """

    entries: Entries  # of the points that are not open
    rows: np.ndarray  # int64 [open], the open points: rows of side.own.points
    inner: np.ndarray  # float64 [open], the radius within which all is kept
    outer: np.ndarray  # float64 [open], the radius beyond which nothing is kept


def default_limit(points: int) -> int:
    """How many entries a plan for so many points of both clouds may have without max_entries."""
    return max(64 * points, 2**24)


def supports(sides: Sequence[Side], max_entries: int | None) -> list[Entries]:
    """The entries of each side, in any order. Above the limit it raises TooManyEntries, before listing them."""
    near = [_near(side) for side in sides]
    upper = [_within(side, rows, outer) for side, (_, rows, _, outer) in zip(sides, near, strict=True)]
    limit = max_entries
    if limit is None:
        limit = default_limit(sum(side.own.length for side in sides))
    known = sum(len(of_side.entries.own) for of_side in near)
    if known + sum(int(counts.sum()) for counts in upper) > limit:
        counts = [_counts(*of_side) for of_side in zip(sides, near, upper, strict=True)]
        total = sum(int(of_side.sum()) for of_side in counts)
        if total > limit:
            side, of_side = max(zip(sides, counts, strict=True), key=lambda pair: pair[1].max(initial=0))
            row = int(of_side.argmax())
            raise too_many_entries(total, limit, max_entries, side.name, side.own.first + row, int(of_side[row]))
    return [
        _joined([of_side.entries, *_listed(side, of_side.rows, of_side.outer, counts)])
        for side, of_side, counts in zip(sides, near, upper, strict=True)
    ]


def too_many_entries(
    total: int, limit: int, max_entries: int | None, name: str, row: int, count: int
) -> TooManyEntries:
    """The error of a plan that is too large; row `row` of the argument `name` keeps most entries, `count`."""
    allowed = f"max(64 * (N + M), 2**24) = {limit}" if max_entries is None else f"max_entries = {limit}"
    return TooManyEntries(
        f"pred and target keep {total} entries, more than {allowed}; row {row} of {name} alone keeps {count}. It is "
        "far from the other cloud, or many points there are equal: drop such points, take a larger threshold, or pass "
        f"max_entries={total} if there is memory for them."
    )


_NONE = Entries(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float64, np.float32)))


def _joined(parts: Sequence[Entries]) -> Entries:
    return Entries(*(np.concatenate(column) for column in zip(_NONE, *parts, strict=True)))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cost C float64 [...] between rows [..., 3]."""
    return np.sqrt(squared_distances(a.astype(np.float64), b.astype(np.float64)))


def _kept(side: Side, own: np.ndarray, other: np.ndarray, c: np.ndarray, d1: np.ndarray, d2: np.ndarray) -> Entries:
    """The candidates that are kept. `own` are rows of side.own.points, `other` rows of the packed points."""
    with np.errstate(invalid="ignore"):  # a candidate at inf means that there are fewer than NEAR points
        exponent = (c - d1) * (side.log_mass / np.maximum(d2 - d1, GAP))
        kept = exponent < side.log_threshold
    weights = np.exp(-exponent[kept]).astype(np.float32)
    return Entries(side.own.rows[own[kept]] + side.own.first, other[kept], c[kept], weights)


def _workers(queries: int) -> int:
    """Threads of a tree search, -1 for all cores; in a small search threads cost more than they save."""
    return -1 if queries > 2048 else 1


def _near(side: Side) -> _Near:
    """Search for the NEAR nearest of each point; list the entries of the points whose whole ball that covers."""
    cloud, near = side.other, side.other.nearest(NEAR)
    # The tree gives a missing neighbour the index one past its points: there stands a point at inf.
    points = np.append(near.points, np.full((1, 3), np.inf, near.points.dtype), axis=0)
    packed = np.append(near.packed_rows.astype(np.int64), -1)
    rows = np.arange(len(side.own.points) if len(cloud.points) else 0)
    found = []
    for part in np.array_split(rows, -(-len(rows) * NEAR // PAIRS) or 1):
        far, candidates = near.tree.query(clipped(side.own.points[part]), NEAR, workers=_workers(len(part)))
        c = _distances(side.own.points[part, None], points[candidates])
        d1, d2 = np.partition(c, 1, axis=1)[:, :2].T
        inner, outer = _radii(side, d1, d2)
        sure = far[:, -1] >= outer
        listed = part[sure], packed[candidates[sure]], c[sure], d1[sure], d2[sure]
        entries = _kept(side, *(np.repeat(z, NEAR) if z.ndim == 1 else z.reshape(-1) for z in listed))
        found.append((entries, part[~sure], inner[~sure], outer[~sure]))
    of_parts, *rest = zip(*found, strict=True)
    return _Near(_joined(of_parts), *map(np.concatenate, rest))


def _radii(side: Side, d1: np.ndarray, d2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two radii float64 [n]: all points within the first are kept; the second holds all kept and the two nearest."""
    with np.errstate(over="ignore", invalid="ignore"):  # inf where there are fewer than 2 points or p_min is close to 0
        gap = np.fmax(d2 - d1, GAP)  # GAP where both distances overflow: then nothing is kept, whatever the radii are
        ratio = np.divide(side.log_threshold, side.log_mass)
        reach, slack = d1 + ratio * gap, SLACK * (1 + ratio) * (d2 + gap)
        return np.fmax(reach - slack, 0), np.fmax(reach, d2) + slack


def _within(side: Side, rows: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How many points of the other cloud the tree finds within each radius, int64 [n]."""
    if len(rows) == 0:
        return np.zeros(0, np.int64)
    points, first, back = np.unique(side.own.points[rows], axis=0, return_index=True, return_inverse=True)
    workers = _workers(len(points))
    counts = side.other.tree.query_ball_point(clipped(points), radii[first], return_length=True, workers=workers)
    return counts[back]  # equal points have equal radii, so thousands of copies of a point are counted once


def _counts(side: Side, near: _Near, upper: np.ndarray) -> np.ndarray:
    """How many entries each point of side.own keeps, int64 [n]. Lists only balls with a point close to a radius."""
    inner = _within(side, near.rows, near.inner)
    sure = inner == upper
    counts = np.zeros(side.own.length, np.int64)
    counts[side.own.rows[near.rows[sure]]] = inner[sure]
    for entries in (near.entries, *_listed(side, near.rows[~sure], near.outer[~sure], upper[~sure])):
        counts += np.bincount(entries.own - side.own.first, minlength=side.own.length)
    return counts


def _listed(side: Side, rows: np.ndarray, outer: np.ndarray, upper: np.ndarray) -> Iterator[Entries]:
    """The entries of these rows of side.own.points, some rows at a time.

    `upper` is the number of points within `outer`, at least 2.
    """
    cloud, before = side.other, np.cumsum(upper)
    for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(before // PAIRS)) + 1):
        if len(part) == 0:
            continue
        query = side.own.points[rows[part]]
        balls = cloud.tree.query_ball_point(clipped(query), outer[part], workers=_workers(len(query)))
        found = np.fromiter(itertools.chain.from_iterable(balls), np.int64)
        ball, start = np.repeat(np.arange(len(part)), upper[part]), np.cumsum(upper[part]) - upper[part]
        own = rows[part][ball]
        c = _distances(side.own.points[own], cloud.points[found])
        ranked = c[np.lexsort((c, ball))]
        yield _kept(side, own, cloud.rows[found] + cloud.first, c, ranked[start][ball], ranked[start + 1][ball])


# ---- the plan ------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The entries of all clouds, in order of (row, column)."""

    rows: np.ndarray  # int64 [nnz], of the packed pred
    columns: np.ndarray  # int64 [nnz], of the packed target
    values: np.ndarray  # float64 [nnz]
    distances: np.ndarray  # float64 [nnz]


def located(
    pred: np.ndarray, pred_lengths: Sequence[int], target: np.ndarray, target_lengths: Sequence[int]
) -> tuple[list[Cloud], list[Cloud]]:
    """The clouds of packed arrays [N or M, 2 or 3]."""
    wide = dtype_of(pred, target) == np.float64
    return list(index(pred, pred_lengths, wide)), list(index(target, target_lengths, wide))


def plan(x: Sequence[Cloud], y: Sequence[Cloud], options: Options, max_entries: int | None) -> Plan:
    """The plan of clouds from `located`. Raises TooManyEntries above the limit."""
    limit = log_threshold(options.threshold)
    pairs = list(zip(x, y, strict=True))
    sides = [Side("pred", a, b, log_mass(b.length, options.p_min), limit) for a, b in pairs]
    sides += [Side("target", b, a, log_mass(a.length, options.p_min), limit) for a, b in pairs]
    kept = supports(sides, max_entries)
    of_rows, of_columns = _joined(kept[: len(pairs)]), _joined(kept[len(pairs) :])
    rows, columns, values, distances = _merged(of_rows, of_columns, options.symmetrize)
    for _ in range(options.iterations):
        values = values / (_sums(rows, values) + EPSILON)
        values = values / (_sums(columns, values) + EPSILON)
    return Plan(rows, columns, values, distances)


def apml_plan(
    pred: np.ndarray,
    pred_lengths: Sequence[int],
    target: np.ndarray,
    target_lengths: Sequence[int],
    options: Options,
    max_entries: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns int32 [nnz] of the packed arrays, values float32 [nnz] and indptr int64 [N + 1]."""
    found = plan(*located(pred, pred_lengths, target, target_lengths), options, max_entries)
    indptr = np.zeros(len(pred) + 1, np.int64)
    np.cumsum(np.bincount(found.rows, minlength=len(pred)), out=indptr[1:])
    rows, columns = found.rows.astype(np.int32), found.columns.astype(np.int32)
    return rows, columns, found.values.astype(np.float32), indptr


def _sums(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value, the sum of the values of its group, float64 [n]; they are added in their order."""
    return np.bincount(groups, values)[groups]


def _merged(of_rows: Entries, of_columns: Entries, symmetrize: str) -> Plan:
    """The entries of both sides as one plan, not yet balanced."""
    p1, p2 = (side.weights / _sums(side.own, side.weights) for side in (of_rows, of_columns))
    rows, columns = (
        np.concatenate(ends) for ends in ((of_rows.own, of_columns.other), (of_rows.other, of_columns.own))
    )
    keys, place = np.unique(rows << 32 | columns, return_inverse=True)
    from_rows, from_columns = np.split(place, [len(p1)])
    values, distances = np.zeros((2, len(keys))), np.empty(len(keys))
    values[0, from_rows], values[1, from_columns] = p1, p2
    distances[from_rows], distances[from_columns] = of_rows.distances, of_columns.distances
    rows, columns = keys >> 32, keys & 0xFFFFFFFF
    if symmetrize == "mean":
        return Plan(rows, columns, (values[0] + values[1]) / 2, distances)
    has = np.zeros((2, len(keys)), bool)
    has[0, from_rows] = has[1, from_columns] = True
    both = has[0] & has[1]
    kept = both | has[0] & (_sums(rows, both) == 0) | has[1] & (_sums(columns, both) == 0)
    values = np.where(both, values.min(axis=0), values.max(axis=0))  # where one side keeps it, the other value is 0
    return Plan(rows[kept], columns[kept], values[kept], distances[kept])


# ---- the loss ------------------------------------------------------------------------------------------------------


def apml(
    pred: np.ndarray,
    pred_lengths: Sequence[int],
    target: np.ndarray,
    target_lengths: Sequence[int],
    options: Options,
    reduction: str,
    max_entries: int | None,
    with_grad: bool,
) -> tuple[np.ndarray, ...]:
    """The loss [] or [B] in the dtype; then, if with_grad, the gradients of pred and target in their own dtypes.

    All are NaN if the plan has more than max_entries.
    """
    dtype = dtype_of(pred, target)
    x, y = located(pred, pred_lengths, target, target_lengths)
    losses, dx, dy = (np.full(shape, np.nan) for shape in (len(x), (len(pred), 3), (len(target), 3)))
    try:
        found = plan(x, y, options, max_entries)
    except TooManyEntries:
        if max_entries is None:
            raise
    else:
        cloud = np.repeat(np.arange(len(x)), pred_lengths)[found.rows]
        losses[:] = np.bincount(cloud, found.values * found.distances, len(x))  # integers if there are no entries
        losses[[b for b, pair in enumerate(zip(x, y, strict=True)) if not all(map(_finite, pair))]] = np.nan
        if with_grad:
            dx, dy = _gradients(found, _packed(x), _packed(y))
    with np.errstate(over="ignore", invalid="ignore"):
        if reduction != "none":
            losses = np.array(ordered_sum(losses))
        if reduction == "mean":
            losses, dx, dy = (z / np.float64(len(x)) for z in (losses, dx, dy))  # NaN if there are no clouds
        loss = np.asarray(losses, dtype)
        if not with_grad:
            return (loss,)
        dx, dy = (g[:, : of.shape[1]].astype(dtype).astype(of.dtype) for g, of in ((dx, pred), (dy, target)))
    return loss, dx, dy


def _finite(cloud: Cloud) -> bool:
    return len(cloud.points) == cloud.length


def _packed(clouds: Sequence[Cloud]) -> np.ndarray:
    """The points float64 [N, 3] of all clouds; NaN for a point that is not finite."""
    points = np.full((sum(cloud.length for cloud in clouds), 3), np.nan)
    for cloud in clouds:
        points[cloud.first + cloud.rows] = cloud.points
    return points


def _gradients(plan: Plan, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients float64 [N, 3] and [M, 3] of the summed losses, with the plan held constant."""
    share = plan.values / np.where(plan.distances > 0, plan.distances, np.inf)
    pulls = (x[plan.rows] - y[plan.columns]) * share[:, None]
    dx, dy = (
        np.stack([np.bincount(ends, pull, len(points)) for pull in pulls.T], axis=1)
        for ends, points in ((plan.rows, x), (plan.columns, y))
    )
    return np.where(np.isnan(x), np.nan, dx), np.where(np.isnan(y), np.nan, -dy)


def apml_backward(dloss: np.ndarray, gradient: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The gradient [N, 2 or 3] or [B, n, 2 or 3], times the gradient of each cloud's loss, in the gradient's dtype."""
    wide: Any = np.float64 if np.float64 in (dloss.dtype, gradient.dtype) else np.float32
    of_loss: Any = dloss.astype(wide)
    if dloss.ndim:
        of_loss = np.repeat(of_loss, lengths).reshape(*gradient.shape[:-1], 1)
    with np.errstate(over="ignore", invalid="ignore"):
        product = gradient.astype(wide) * of_loss
        # 16-bit numbers are rounded from float32, as on a GPU.
        return (product.astype(np.float32) if gradient.itemsize == 2 else product).astype(gradient.dtype)


def emd(
    x: np.ndarray, x_lengths: Sequence[int], y: np.ndarray, y_lengths: Sequence[int], reduction: str, with_grad: bool
) -> tuple[np.ndarray, ...]:
    """The loss [] or [B] in the dtype, and if with_grad the gradients of x and y [N, 2 or 3], in their own dtypes.

    A cloud's loss is the mean distance of the cheapest assignment of x to y. The assignment is held constant: with
    v = x_i - y_j and d = |v| of an assigned pair, the gradient of x_i is v / d / n, and 0 if d = 0. Loss and gradients
    of a pair of clouds are NaN if a point is not finite.
    """
    from scipy.optimize import linear_sum_assignment  # here, so that gpu3d imports fast
    from scipy.spatial.distance import cdist

    dtype = dtype_of(x, y)
    losses, dx, dy = np.full(len(x_lengths), np.nan), np.full(x.shape, np.nan), np.full(y.shape, np.nan)
    for b, (rows, columns) in enumerate(zip(spans(x_lengths), spans(y_lengths), strict=True)):
        sources, targets = widened(x[rows], dtype), widened(y[columns], dtype)
        c = cdist(sources, targets)  # float64
        if np.isfinite(c).all():
            i, j = linear_sum_assignment(c)
            losses[b] = c[i, j].mean()
            v = (sources[i].astype(np.float64) - targets[j])[:, : x.shape[1]]
            terms = v / np.where(c[i, j] > 0, c[i, j], 1)[:, None] / len(i)
            dx[rows][i], dy[columns][j] = terms, -terms
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses, dx, dy = (z / np.float64(len(x_lengths)) for z in (losses, dx, dy))  # NaN if there are no clouds
    loss = np.asarray(losses, dtype)
    return (loss, dx.astype(x.dtype), dy.astype(y.dtype)) if with_grad else (loss,)
