# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours in NumPy and SciPy: the definition by brute force, and a k-d tree that gives the same bits.

The squared distance is d2 = (dx*dx + dy*dy) + dz*dz of float32 differences, each operation rounded once. Neighbours are
ordered by (d2, index). The tree computes in float64, so it may order near ties differently. Therefore it only proposes
candidates, a few more than needed, and the float32 formula decides.

A point with a coordinate that is not finite has no neighbours and is no other point's neighbour. A missing neighbour
has index -1 and distance NaN.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

MAX_K = 64
# radius_search without max_entries raises an error above this many neighbours per point of query and cloud together.
ENTRIES_A_POINT = 64

MISSING = np.uint64(2**64 - 1)  # no neighbour; larger than every key
PAIRS = 1 << 22  # pairs in memory at a time
ROWS = 2048  # queries of one job of a thread
SCAN_FROM = 1024  # candidates per query above which all points are scanned: the tree is no faster there

# Bounds on the error of d2: five roundings, and three halves of the smallest subnormal number where a square is
# subnormal. Both are generous. If two values differ by more than this, float32 and float64 order them alike.
RELATIVE, ABSOLUTE = 2.0**-21, 2.0**-147


# ---- the definition ------------------------------------------------------------------------------------------------


def origin(points: np.ndarray) -> np.ndarray | None:
    """The point that a search in this cloud subtracts from all coordinates; None if it subtracts nothing.

    For float64 points it is the minimum of the finite values of each axis, or 0 where no value is finite. Other dtypes
    need none.
    """
    if points.dtype != np.float64:
        return None
    low = points.min(axis=0, initial=np.inf, where=np.isfinite(points))
    return np.where(low < np.inf, low, 0)


def local(points: np.ndarray, origin: np.ndarray | None) -> np.ndarray:
    """Coordinates float32 [n, 3] relative to the origin of the target cloud; z = 0 for 2-D points."""
    coordinates = np.zeros((len(points), 3), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = points if origin is None else points.astype(np.float64) - origin
        coordinates[:, : points.shape[1]] = moved
    return coordinates


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """d2 [...] between rows of a and b [..., 3], in their dtype."""
    with np.errstate(all="ignore"):
        dx, dy, dz = (a[..., d] - b[..., d] for d in range(3))
        return (dx * dx + dy * dy) + dz * dz


def keys(d2: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Numbers uint64 that sort like (d2, index): floats that are not negative sort like their bits."""
    return d2.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint64)


def unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 and indices int32 of `keys`; NaN and -1 where a key is MISSING."""
    d2 = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    indices = keys.astype(np.uint32).view(np.int32)
    return np.where(keys == MISSING, np.float32(np.nan), d2), indices  # the low half of MISSING is -1


def scan(query: np.ndarray, points: np.ndarray, indices: np.ndarray, k: int) -> np.ndarray:
    """The k smallest keys of each query, uint64 [n, k], by brute force: query float32 [n, 3], points float32 [m, 3]."""
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
    """What `radius_search` must return: offsets, indices and distances, computed one query at a time."""
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
    """One cloud, ready to be searched: its finite points relative to its origin, and k-d trees over them."""

    def __init__(self, points: np.ndarray, first: int) -> None:
        """Prepare `points` [n, 2 or 3], which begin at row `first` of the packed array."""
        self.first, self.length = first, len(points)
        self.origin = origin(points)
        coordinates = local(points, self.origin)
        self.rows, self.points = np.arange(len(points)), coordinates  # int64 [m] in the cloud; float32 [m, 3]
        finite = np.isfinite(coordinates)
        if not finite.all():
            self.rows = np.flatnonzero(finite.all(axis=1))
            self.points = coordinates[self.rows]
        self.thin_rows, self.thin_points = self.rows, self.points
        kept = _first_of_a_place(self.points)
        if not kept.all():
            self.thin_rows, self.thin_points = self.rows[kept], self.points[kept]
        self.thin_tree = _tree(self.thin_points)
        self.packed_rows = (self.thin_rows + first).astype(np.int32)  # the rows of thin_points
        self.thin_axes = np.ascontiguousarray(self.thin_points.T)

    @functools.cached_property
    def tree(self) -> Any:
        """The tree of all finite points; `thin_tree` leaves out copies of a point beyond the first MAX_K."""
        return self.thin_tree if len(self.thin_points) == len(self.points) else _tree(self.points)


def _tree(points: np.ndarray, tight: bool = False) -> Any:
    """A k-d tree that is fast to build: not balanced, and with tight boxes only for a search of one tree in another."""
    from scipy.spatial import cKDTree  # imported here, so that `import gpu3d` is fast

    return cKDTree(points, leafsize=16 if tight else 32, compact_nodes=tight, balanced_tree=False)


def _first_of_a_place(points: np.ndarray) -> np.ndarray:
    """Which points to keep, bool [m], so that at most MAX_K points are equal: those with the lowest indices.

    No search with k <= MAX_K can return the others. Many scans have thousands of points at the origin, and each query
    near it would visit all of them.
    """
    kept = np.ones(len(points), bool)
    bits = points.view(np.uint32).astype(np.uint64)
    mixed = np.sort(bits @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64))
    if (mixed[MAX_K:] == mixed[:-MAX_K]).any():  # equal points have equal hashes; usually no hash is so frequent
        order = np.lexsort(points.T)
        new = np.append(True, (points[order[1:]] != points[order[:-1]]).any(axis=1))
        start = np.flatnonzero(new)[np.cumsum(new) - 1]
        kept[order] = np.arange(len(points)) - start < MAX_K
    return kept


def _gathered(axes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The points [..., 3] at `rows` of `axes` [3, m]; taking one axis at a time is several times as fast as rows."""
    return np.moveaxis(axes.take(rows, axis=1), 0, -1)


def index(points: np.ndarray, lengths: Sequence[int]) -> tuple[Cloud, ...]:
    """The clouds of a packed array [N, 2 or 3]; each can be searched any number of times."""
    starts = np.cumsum([0, *lengths]).tolist()
    return tuple(Cloud(points[first : first + n], first) for first, n in zip(starts, lengths, strict=False))


def _parallel(work: Callable[..., None], jobs: Sequence[tuple]) -> None:
    """Do `work` for each job, in threads on all cores: NumPy and the tree release the GIL."""
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
        sure = kth < far[:, -1] ** 2 * (1 - RELATIVE) - ABSOLUTE  # no point beyond the candidates is as near
        rows, wanted = rows[~sure], 4 * wanted + MAX_K


def _ranked(cloud: Cloud, query: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 [n, c] and packed indices int32 [n, c] of the candidates int64 [n, c], sorted by (d2, index).

    The tree returns them almost sorted. So only the few rows in which d2 does not strictly increase are sorted again.
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
    if sum(int(upper.sum()) for upper in candidates) > limit:  # then count exactly, before any pair is stored
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
    """The error of a search without max_entries; query `row` has the most neighbours, `count` of them."""
    return ValueError(
        f"radius = {radius} finds {total} neighbours, more than {ENTRIES_A_POINT} * (N + M) = {limit}; query row {row} "
        f"alone has {count}. Take a smaller radius, or pass max_entries={total} if there is memory for them."
    )


def _outer_radius(r2: np.float32) -> float:
    """Every point with d2 <= r2 in float32 lies within this radius in exact arithmetic."""
    return float(np.sqrt((float(r2) + ABSOLUTE) * (1 + RELATIVE)))


def _inner_radius(r2: np.float32) -> float:
    """Every point within this radius in exact arithmetic has d2 <= r2 in float32, at least those equal to the query."""
    return float(np.sqrt(max(float(r2) - ABSOLUTE, 0.0) * (1 - RELATIVE)))


def _within(cloud: Cloud, query: np.ndarray, radius: float) -> np.ndarray:
    """How many points of the cloud the tree finds within the radius of each query, int64 [n]."""
    counts = np.zeros(len(query), np.int64)
    usable = np.isfinite(query).all(axis=1)
    if usable.any():
        counts[usable] = cloud.tree.query_ball_point(query[usable], radius, return_length=True, workers=-1)
    return counts


def _exact_counts(cloud: Cloud, query: np.ndarray, r2: np.float32, upper: np.ndarray) -> np.ndarray:
    """How many points have d2 <= r2, int64 [n]. Pairs are listed only for queries with a point close to the radius."""
    counts = _within(cloud, query, _inner_radius(r2))
    unsure = np.flatnonzero(counts != upper)
    counts[unsure] = 0
    for rows, _, _ in _pairs(cloud, query[unsure], r2, upper[unsure]):
        counts[unsure] += np.bincount(rows, minlength=len(unsure))
    return counts


def _pairs(
    cloud: Cloud, query: np.ndarray, r2: np.float32, upper: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs with d2 <= r2, in order: rows of the query, rows of the packed points, and d2.

    Works on some queries at a time. `upper` is the number of points that the tree finds for each query.
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


# ---- gradients -----------------------------------------------------------------------------------------------------


def knn_backward(
    ddistances: np.ndarray,
    query: np.ndarray,
    points: np.ndarray,
    distances: np.ndarray,
    indices: np.ndarray,
    query_lengths: Sequence[int],
    lengths: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of query and points in their dtypes; ddistances float32 [N, k] is the gradient of the distances.

    The gradient of a distance d > 0 with respect to its query is v / d in float32, where v is the float32 difference
    query - point that d is of; with respect to its point it is minus that. It is 0 where d is 0 or not finite, and
    where there is no neighbour, whatever ddistances hold there. Elsewhere a ddistance that is not finite makes the
    gradients of its query and its point NaN.

    The gradient of a row is the sum of its terms, ddistance * (v / d) or minus that, which are exact in float64. Terms
    are added as integers, so in any order: each times 2**shift, rounded to nearest even, where shift = 61 -
    bit_length(count) - E, the row's largest |ddistance| is f * 2**E, 1/2 <= f < 1, and count is the entries of a query,
    or for a point the number of queries. The sum is rounded to float32, and then to the dtype.
    """
    n, k = distances.shape
    entries = [x.reshape(-1) for x in (ddistances, distances, indices)]
    rows, counts = np.repeat(np.arange(n), k), np.full(n, k, np.int64)
    return _gradients(entries, rows, counts, query, points, query_lengths, lengths)


def radius_backward(
    ddistances: np.ndarray,
    query: np.ndarray,
    points: np.ndarray,
    offsets: np.ndarray,
    indices: np.ndarray,
    distances: np.ndarray,
    query_lengths: Sequence[int],
    lengths: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """The same of `radius_search`: ddistances are float32 [entries]. All is NaN where there was too little room."""
    if offsets[0] < 0:
        return np.full_like(query, np.nan), np.full_like(points, np.nan)
    counts, total = np.diff(offsets), int(offsets[-1])
    entries = [x[:total] for x in (ddistances, distances, indices)]
    rows = np.repeat(np.arange(len(query)), counts)
    return _gradients(entries, rows, counts, query, points, query_lengths, lengths)


def _gradients(
    entries: Sequence[np.ndarray],
    rows: np.ndarray,
    counts: np.ndarray,
    query: np.ndarray,
    points: np.ndarray,
    query_lengths: Sequence[int],
    lengths: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Of entries [e], which are ddistances, distances and indices. `rows` are their queries, of `counts` entries."""
    ddistances, distances, indices = entries
    found = np.flatnonzero((indices >= 0) & (distances > 0) & np.isfinite(distances))
    i, j, d, g = rows[found], indices[found], distances[found], ddistances[found]
    (a, b), n, m = _local_of_both(query, query_lengths, points, lengths), len(query), len(points)
    sums = _Sums(g, i, counts), _Sums(g, j, np.full(m, n, np.int64))
    for first in range(0, len(found), PAIRS):
        part = slice(first, first + PAIRS)
        with np.errstate(invalid="ignore"):
            terms = g[part, None].astype(np.float64) * ((a[i[part]] - b[j[part]]) / d[part, None])
        sums[0].add(terms, i[part])
        sums[1].add(-terms, j[part])
    with np.errstate(over="ignore"):
        dquery, dpoints = (
            of.total()[:, : x.shape[1]].astype(x.dtype) for of, x in zip(sums, (query, points), strict=True)
        )
    return dquery, dpoints


def _local_of_both(
    query: np.ndarray, query_lengths: Sequence[int], points: np.ndarray, lengths: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float32 of all queries and points, from the origins of the clouds of points."""
    if points.dtype != np.float64:
        return local(query, None), local(points, None)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([np.empty((0, 3), np.float32)], [np.empty((0, 3), np.float32)])
    row = first = 0
    for rows, n in zip(query_lengths, lengths, strict=True):
        here = origin(points[first : first + n])
        sides[0].append(local(query[row : row + rows], here))
        sides[1].append(local(points[first : first + n], here))
        row, first = row + rows, first + n
    return np.concatenate(sides[0]), np.concatenate(sides[1])


class _Sums:
    """Sums of terms by row, in integers."""

    def __init__(self, factors: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> None:
        """The largest of a row's |factors| and the number of its terms say how small its integers' unit is."""
        largest = np.zeros(len(counts), np.float32)
        with np.errstate(invalid="ignore"):
            np.maximum.at(largest, rows, np.abs(factors))
        self.finite = np.isfinite(largest)
        exponents = np.frexp(np.where(self.finite, largest, 0))[1]
        self.shifts = 61 - np.frexp(counts.astype(np.float64))[1] - exponents  # frexp's exponent is the bit length
        self.sums = np.zeros((len(counts), 3), np.int64)

    def add(self, terms: np.ndarray, rows: np.ndarray) -> None:
        """Adds terms float64 [t, 3]; those of rows with a factor that is not finite are left out."""
        kept = self.finite[rows]
        terms, rows = terms[kept], rows[kept]
        np.add.at(self.sums, rows, np.rint(np.ldexp(terms, self.shifts[rows, None])).astype(np.int64))

    def total(self) -> np.ndarray:
        """float32 [rows, 3]; NaN where a factor is not finite."""
        with np.errstate(over="ignore"):
            sums = np.ldexp(self.sums.astype(np.float64), -self.shifts[:, None]).astype(np.float32)
        sums[~self.finite] = np.nan
        return sums
