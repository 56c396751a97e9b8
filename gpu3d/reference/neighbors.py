# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours in NumPy and SciPy: the definition by brute force, and a k-d tree that gives the same bits.

d2 = (dx*dx + dy*dy) + dz*dz of float32 differences, each operation rounded once; order by (d2, index). The tree works
in float64, so its order of near ties may be another: it proposes candidates, with a few to spare, and the float32
formula decides.

A point with a coordinate that is not finite is nobody's neighbour and has none. Where there is no neighbour the index
is -1 and the distance NaN.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

MAX_K = 64
ENTRIES_A_POINT = 64  # radius_search finds more than this many for each point of query and cloud: an error
REDUCTIONS = ("mean", "sum", "none")
SUM_TILE = 1024

MISSING = np.uint64(2**64 - 1)  # behind every key
PAIRS = 1 << 22  # that are worked on at a time: memory stays bounded
ROWS = 2048  # of queries, likewise
SCAN_FROM = 1024  # candidates a row: from here on a scan of all points is as fast as the tree

# Five roundings and, where a square is too small to be normal, three halves of the smallest number are between d2 and
# its true value: with these margins, room to spare, one decides about the other.
RELATIVE, ABSOLUTE = 2.0**-21, 2.0**-147


# ---- the definition ------------------------------------------------------------------------------------------------


def origin(points: np.ndarray) -> np.ndarray | None:
    """What is subtracted from the coordinates of a search in this cloud: of float64 the minimum of each axis.

    Over its finite values; 0 where there are none. None: nothing is subtracted.
    """
    if points.dtype != np.float64:
        return None
    low = points.min(axis=0, initial=np.inf, where=np.isfinite(points))
    return np.where(low < np.inf, low, 0)


def local(points: np.ndarray, origin: np.ndarray | None) -> np.ndarray:
    """Coordinates float32 [n, 3] from the origin of the target cloud; z = 0 where points are 2-D."""
    coordinates = np.zeros((len(points), 3), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = points if origin is None else points.astype(np.float64) - origin
        coordinates[:, : points.shape[1]] = moved
    return coordinates


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """d2 float32 [...] between rows of float32 [..., 3]."""
    with np.errstate(all="ignore"):
        dx, dy, dz = (a[..., d] - b[..., d] for d in range(3))
        return (dx * dx + dy * dy) + dz * dz


def keys(d2: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Numbers uint64 whose order is that of (d2, index): d2 is not negative, so its bits are in its order."""
    return d2.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint64)


def unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 and indices int32 of keys; NaN and -1 where one is MISSING."""
    d2 = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    indices = keys.astype(np.uint32).view(np.int32)
    return np.where(keys == MISSING, np.float32(np.nan), d2), indices  # the low half of MISSING is -1


def scan(query: np.ndarray, points: np.ndarray, indices: np.ndarray, k: int) -> np.ndarray:
    """The k smallest keys uint64 [n, k] of each query, by brute force: float32 [n, 3] against all float32 [m, 3]."""
    nearest = np.full((len(query), k), MISSING)
    usable = np.isfinite(points).all(axis=1)
    points, indices = points[usable], indices[usable]
    kept, rows = min(k, len(points)), np.flatnonzero(np.isfinite(query).all(axis=1))
    for part in np.array_split(rows, -(-len(rows) * len(points) // PAIRS) or 1):
        all_keys = keys(squared_distances(query[part, None], points), indices)
        if kept < len(points):
            all_keys.partition(kept - 1, axis=1)
        nearest[part, :kept] = np.sort(all_keys[:, :kept], axis=1)
    return nearest


def brute_force_knn(
    query: np.ndarray, query_lengths: Sequence[int], points: np.ndarray, lengths: Sequence[int], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `knn` must return: distances float32 [N, k] and indices int32 [N, k], from all pairs."""
    found, row, first = [np.empty((0, k), np.uint64)], 0, 0
    for rows, n in zip(query_lengths, lengths, strict=True):
        cloud = points[first : first + n]
        here = origin(cloud)
        indices = np.arange(first, first + n)
        found.append(scan(local(query[row : row + rows], here), local(cloud, here), indices, k))
        row, first = row + rows, first + n
    d2, indices = unpacked(np.concatenate(found))
    return np.sqrt(d2), indices


def squared_radius(radius: float) -> np.float32:
    """The radius rounded to float32, and its square rounded to float32."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(radius) * np.float32(radius)


def brute_force_radius(
    query: np.ndarray, query_lengths: Sequence[int], points: np.ndarray, lengths: Sequence[int], radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `radius_search` must return: offsets, indices and distances, a query at a time."""
    counts, found, row, first = [0], [np.empty(0, np.uint64)], 0, 0
    for rows, n in zip(query_lengths, lengths, strict=True):
        cloud = points[first : first + n]
        here = origin(cloud)
        targets, usable = local(cloud, here), np.isfinite(local(cloud, here)).all(axis=1)
        for one in local(query[row : row + rows], here):
            d2 = squared_distances(one, targets)
            near = np.flatnonzero((d2 <= squared_radius(radius)) & usable & np.isfinite(one).all())
            counts.append(len(near))
            found.append(keys(d2[near], near + first))
        row, first = row + rows, first + n
    d2, indices = unpacked(np.concatenate(found))
    return np.cumsum(counts, dtype=np.int64), indices, np.sqrt(d2)


# ---- the tree ------------------------------------------------------------------------------------------------------


class Cloud:
    """One cloud to be searched: its finite points from its origin, in trees."""

    def __init__(self, points: np.ndarray, first: int) -> None:
        """Of `points` [n, 2 or 3], which stand from row `first` on in the packed array."""
        self.first, self.length = first, len(points)
        self.origin = origin(points)
        coordinates = local(points, self.origin)
        self.rows, self.points = np.arange(len(points)), coordinates  # int64 [m], in the cloud, and float32 [m, 3]
        finite = np.isfinite(coordinates)
        if not finite.all():
            self.rows = np.flatnonzero(finite.all(axis=1))
            self.points = coordinates[self.rows]
        self.thin_rows, self.thin_points = self.rows, self.points
        kept = _first_of_a_place(self.points)
        if not kept.all():
            self.thin_rows, self.thin_points = self.rows[kept], self.points[kept]
        self.thin_tree = _tree(self.thin_points)
        self.packed_rows = (self.thin_rows + first).astype(np.int32)  # of thin_points
        self.thin_axes = np.ascontiguousarray(self.thin_points.T)

    @functools.cached_property
    def tree(self) -> Any:
        """Of all finite points."""
        return self.thin_tree if len(self.thin_points) == len(self.points) else _tree(self.points)


def _tree(points: np.ndarray, tight: bool = False) -> Any:
    """Built on one core, so fast to build: not balanced, and boxes are tight only where two trees search each other."""
    from scipy.spatial import cKDTree  # here, so that gpu3d imports fast

    return cKDTree(points, leafsize=16 if tight else 32, compact_nodes=tight, balanced_tree=False)


def _first_of_a_place(points: np.ndarray) -> np.ndarray:
    """Which points bool [m] to keep so that no place has more than MAX_K: those of the lowest indices.

    No search for k <= MAX_K can find the others, and a place of thousands (the origin, in many scans) would cost a tree
    all of them at every visit.
    """
    kept = np.ones(len(points), bool)
    bits = points.view(np.uint32).astype(np.uint64)
    mixed = np.sort(bits @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64))
    if (mixed[MAX_K:] == mixed[:-MAX_K]).any():  # else no place has so many: the usual case, seen at little cost
        order = np.lexsort(points.T)
        new = np.append(True, (points[order[1:]] != points[order[:-1]]).any(axis=1))
        start = np.flatnonzero(new)[np.cumsum(new) - 1]
        kept[order] = np.arange(len(points)) - start < MAX_K
    return kept


def _gathered(axes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Points [..., 3] of axes [3, m]: an axis at a time is several times as fast as three numbers at a time."""
    return np.moveaxis(axes.take(rows, axis=1), 0, -1)


def index(points: np.ndarray, lengths: Sequence[int]) -> tuple[Cloud, ...]:
    """Every cloud of a packed array [N, 2 or 3], to be searched any number of times."""
    starts = np.cumsum([0, *lengths]).tolist()
    return tuple(Cloud(points[first : first + n], first) for first, n in zip(starts, lengths, strict=False))


def _parallel(work: Callable[..., None], jobs: Sequence[tuple]) -> None:
    """Each job's work, on all cores: NumPy and the tree let go of the interpreter."""
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers <= 1:
        for job in jobs:
            work(*job)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, *zip(*jobs, strict=True)):
            pass


# ---- knn -----------------------------------------------------------------------------------------------------------


def knn(
    query: np.ndarray, query_lengths: Sequence[int], clouds: Sequence[Cloud], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances float32 [N, k] and indices int32 [N, k] into the packed points."""
    d2, indices = nearest(query, query_lengths, clouds, k)
    return np.sqrt(d2, out=d2), indices


def nearest(
    query: np.ndarray, query_lengths: Sequence[int], clouds: Sequence[Cloud], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 [N, k] and indices int32 [N, k] into the packed points."""
    d2, indices = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int32)

    def search(cloud: Cloud, rows: slice) -> None:
        _nearest(cloud, local(query[rows], cloud.origin), d2[rows], indices[rows])

    jobs, end = [], 0
    for cloud, n in zip(clouds, query_lengths, strict=True):
        first, end = end, end + n
        jobs += [(cloud, slice(row, min(row + ROWS, end))) for row in range(first, end, ROWS)]
    _parallel(search, jobs)
    return d2, indices


def _nearest(cloud: Cloud, query: np.ndarray, d2: np.ndarray, indices: np.ndarray) -> None:
    """Writes d2 float32 [n, k] and indices int32 [n, k] of one cloud's queries float32 [n, 3]."""
    usable = np.isfinite(query).all(axis=1)
    d2[~usable], indices[~usable] = np.nan, -1
    k = d2.shape[1]
    rows, wanted = np.flatnonzero(usable), k + 1
    while len(rows):
        if wanted > min(len(cloud.thin_points) // 8, SCAN_FROM):
            d2[rows], indices[rows] = unpacked(scan(query[rows], cloud.thin_points, cloud.packed_rows, k))
            break
        far, candidates = cloud.thin_tree.query(query[rows], wanted)
        ranked = _ranked(cloud, query[rows], candidates)
        d2[rows], indices[rows] = (of[:, :k] for of in ranked)
        kth = d2[rows, -1].astype(np.float64)
        sure = kth < far[:, -1] ** 2 * (1 - RELATIVE) - ABSOLUTE  # no point beyond the candidates comes as near
        rows, wanted = rows[~sure], 4 * wanted + MAX_K


def _ranked(cloud: Cloud, query: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 [n, c] and packed indices int32 [n, c] of the candidates int64 [n, c], in order.

    They come in the order of the tree, so only the few rows where d2 does not rise throughout are sorted.
    """
    d2 = squared_distances(query[:, None], _gathered(cloud.thin_axes, candidates))
    indices = cloud.packed_rows.take(candidates)
    mixed = np.flatnonzero((d2[:, 1:] <= d2[:, :-1]).any(axis=1))
    d2[mixed], indices[mixed] = unpacked(np.sort(keys(d2[mixed], indices[mixed]), axis=1))
    return d2, indices


# ---- radius_search -------------------------------------------------------------------------------------------------


def radius_search(
    query: np.ndarray, query_lengths: Sequence[int], clouds: Sequence[Cloud], radius: float, max_entries: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets int64 [N + 1], indices int32 and distances float32, sorted by (query, index)."""
    limit = max_entries
    if limit is None:
        limit = ENTRIES_A_POINT * (len(query) + sum(cloud.length for cloud in clouds))
    ends = np.cumsum(query_lengths, dtype=np.int64)
    parts = [
        (cloud, local(query[end - n : end], cloud.origin), int(end - n))
        for cloud, n, end in zip(clouds, query_lengths, ends, strict=True)
    ]
    r2 = squared_radius(radius)
    candidates = [_within(cloud, coordinates, _outer_radius(r2)) for cloud, coordinates, _ in parts]
    if sum(int(upper.sum()) for upper in candidates) > limit:  # then count before any are written down
        counts = np.zeros(len(query), np.int64)
        for (cloud, coordinates, row), upper in zip(parts, candidates, strict=True):
            counts[row : row + len(upper)] = _exact_counts(cloud, coordinates, r2, upper)
        total = int(counts.sum())
        if total > limit:
            if max_entries is None:
                row = int(counts.argmax())
                raise too_many_entries(radius, total, limit, row, int(counts[row]))
            return (
                np.full(len(query) + 1, -total, np.int64),
                np.full(max_entries, -1, np.int32),
                np.full(max_entries, np.nan, np.float32),
            )
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for (cloud, coordinates, first), upper in zip(parts, candidates, strict=True):
        found += [(row + first, column, d2) for row, column, d2 in _pairs(cloud, coordinates, r2, upper)]
    rows, indices, d2 = (np.concatenate(column) for column in zip(*found, strict=True))
    offsets = np.zeros(len(query) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(query)), out=offsets[1:])
    room = 0 if max_entries is None else max_entries - len(rows)
    return (
        offsets,
        np.pad(indices.astype(np.int32), (0, room), constant_values=-1),
        np.pad(np.sqrt(d2), (0, room), constant_values=np.nan),
    )


def too_many_entries(radius: float, total: int, limit: int, row: int, count: int) -> ValueError:
    """The error of a search without max_entries; `row` is that of the query with most neighbours, `count` of them."""
    return ValueError(
        f"radius = {radius} finds {total} neighbours, more than {ENTRIES_A_POINT} * (N + M) = {limit}; query row {row} "
        f"alone has {count}. Take a smaller radius, or pass max_entries={total} if there is memory for them."
    )


def _outer_radius(r2: np.float32) -> float:
    """No point truly farther than this has a d2 <= r2."""
    return float(np.sqrt((float(r2) + ABSOLUTE) * (1 + RELATIVE)))


def _inner_radius(r2: np.float32) -> float:
    """Every point truly this near has a d2 <= r2: at least the points of the query's own place."""
    return float(np.sqrt(max(float(r2) - ABSOLUTE, 0.0) * (1 - RELATIVE)))


def _within(cloud: Cloud, query: np.ndarray, radius: float) -> np.ndarray:
    """How many points int64 [n] of the cloud the tree finds within the radius."""
    counts = np.zeros(len(query), np.int64)
    usable = np.isfinite(query).all(axis=1)
    if usable.any():
        counts[usable] = cloud.tree.query_ball_point(query[usable], radius, return_length=True, workers=-1)
    return counts


def _exact_counts(cloud: Cloud, query: np.ndarray, r2: np.float32, upper: np.ndarray) -> np.ndarray:
    """How many points int64 [n] have d2 <= r2; pairs are listed only of queries with a point close to the radius."""
    counts = _within(cloud, query, _inner_radius(r2))
    unsure = np.flatnonzero(counts != upper)
    counts[unsure] = 0
    for rows, _, _ in _pairs(cloud, query[unsure], r2, upper[unsure]):
        counts[unsure] += np.bincount(rows, minlength=len(unsure))
    return counts


def _pairs(
    cloud: Cloud, query: np.ndarray, r2: np.float32, upper: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of the query, rows of the packed points and d2 of the pairs with d2 <= r2, in order, some queries at a time.

    `upper` is how many points the tree finds for each query.
    """
    radius = _outer_radius(r2)
    query_axes, axes = np.ascontiguousarray(query.T), np.ascontiguousarray(cloud.points.T)
    before = np.cumsum(upper)
    for rows in np.split(np.arange(len(query)), np.flatnonzero(np.diff(before // PAIRS)) + 1):
        rows = rows[upper[rows] > 0]
        if len(rows) == 0:
            continue
        near = _tree(query[rows], tight=True).sparse_distance_matrix(cloud.tree, radius, output_type="ndarray")
        pairs = np.sort(near["i"].astype(np.uint64) << np.uint64(32) | near["j"].astype(np.uint64))
        i, j = rows[(pairs >> np.uint64(32)).astype(np.int64)], pairs.astype(np.uint32).astype(np.int64)
        d2 = squared_distances(_gathered(query_axes, i), _gathered(axes, j))
        kept = d2 <= r2
        yield i[kept], cloud.rows[j[kept]] + cloud.first, d2[kept]


# ---- chamfer -------------------------------------------------------------------------------------------------------


def ordered_sum(values: Iterable[float]) -> np.float64:
    """The float64 sum in an order that suits a GPU.

    Of each SUM_TILE consecutive values (zeros behind the last) the second half is added to the first until one is
    left; then the same with these sums, until one is left.
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
    """The loss float32 [] or [B], and what was found on the way to it, which is all that the gradient takes.

    A cloud's loss is ordered_sum(d of x) / n + ordered_sum(d of y) / m in float64. "sum" is the ordered_sum over the
    clouds, "mean" that divided by their number; rounded to float32 at the end.

    What was found is int32 [2 * (N + M + B)], see `found_parts`.
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
            losses = losses / np.float64(len(x_clouds))  # of no clouds: NaN
        return np.asarray(losses, np.float32), np.concatenate(parts)


def found_parts(x_lengths: Sequence[int], y_lengths: Sequence[int]) -> list[int]:
    """Where the parts of what a Chamfer distance found begin, and where the last ends, in words.

    Of each side, x and then y: for each point the index of its nearest in the other, int32, or -1; their d2, float32;
    and for each cloud the largest finite distance, float32.
    """
    n, m, clouds = sum(x_lengths), sum(y_lengths), len(x_lengths)
    return list(itertools.accumulate((n, n, clouds, m, m, clouds), initial=0))


def chamfer_backward(
    dloss: np.ndarray | None,
    x: np.ndarray,
    y: np.ndarray,
    found: np.ndarray,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of x and y in their dtypes; dloss float32 [] or [B] is that of the loss, None: 1.

    The term of point i with its nearest j at d > 0 is v / d, or 2 * v if squared, in float32, where v = x_i - y_j is
    the float32 difference that d is of. At d = 0 the term is 0; where d is not finite it is NaN. The gradient of x_i is
    its own term / n plus (minus the terms of all y that have x_i as nearest) / m, in float64; with "mean" divided by
    the number of clouds; rounded to float32; times dloss, in float32; and rounded to x's dtype. Terms are added as
    integers, so in any order: each times 2**shift, rounded to nearest even, where shift = 62 - bit_length(number of
    points that the terms are of) - e, all terms being below 2**e: e = 1, or if squared e = 2 + E where the largest
    finite d of the cloud's direction is f * 2**E, 1/2 <= f < 1 (no d above 0: all terms are 0). NaN terms are not
    added.
    """
    parts = np.split(found, found_parts(x_lengths, y_lengths)[1:-1])
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
    """The sources' own terms float64 [n, 3], and what they give to the targets float64 [m, 3]."""
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
