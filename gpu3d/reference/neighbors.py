# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours in NumPy and SciPy: the definition by brute force, and a k-d tree that gives the same bits.

The squared distance is d2 = (dx*dx + dy*dy) + dz*dz of float32 differences, each operation rounded once. Neighbours are
ordered by (d2, index). The tree computes in float64, so it may order near ties differently. Therefore it only proposes
candidates, a few more than needed, and the float32 formula decides.

A point with a coordinate that is not finite has no neighbours and is no other point's neighbour. A missing neighbour
has index -1 and distance inf, or NaN if the query is not finite.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

MAX_K = 1024
MAX_PAIRS = 2**31 - 1  # what radius_search finds at most without max_entries

MISSING = np.uint64(0x7F800000FFFFFFFF)  # no neighbour: distance inf and index -1; larger than every key
PAIRS = 1 << 22  # pairs in memory at a time
LISTED = 1 << 24  # pairs that the tree lists at a time, if all points are within the radius
SAMPLE = 64  # queries of a cloud from which the number of all pairs is estimated
ROWS, CANDIDATES = 8192, 1 << 18  # queries of one job of a thread, and their candidates
FEW = 64  # copies of a point in the tree of searches for few neighbours

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
    """Numbers uint64 that sort like (d2, index), index -1 last: floats that are not negative sort like their bits."""
    return d2.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint32).astype(np.uint64)


def unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 and indices int32 of `keys`; inf and -1 where a key is MISSING."""
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32), keys.astype(np.uint32).view(np.int32)


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


def squared_radius(radius: Any) -> Any:
    """The radius rounded to float32, and its square rounded to float32. It is negative for a negative or NaN radius."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = np.asarray(radius).astype(np.float32)
        return np.where(rounded >= 0, rounded * rounded, np.float32(-1))[()]


def _reach2(radius: Any, queries: int) -> np.ndarray:
    """The squared radius of each query, float32 [queries]."""
    return np.broadcast_to(squared_radius(radius), (queries,))


def brute_force_knn(
    query: np.ndarray,
    query_lengths: Sequence[int],
    points: np.ndarray,
    lengths: Sequence[int],
    k: int,
    radius: Any = np.inf,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What `knn` must return: distances float32 [N, k] and indices int32 [N, k], from all pairs."""
    found, row, first = np.full((len(query), k), MISSING), 0, 0
    reach2, usable = _reach2(radius, len(query)), np.zeros(len(query), bool)
    for rows, n in zip(query_lengths, lengths, strict=True):
        cloud, own = points[first : first + n], query[row : row + rows]
        here, kept = origin(cloud), min(k, n)
        own, targets = local(own, here), local(cloud, here)
        usable[row : row + rows] = np.isfinite(own).all(axis=1)
        for part in np.array_split(np.arange(rows), -(-rows * n // PAIRS) or 1):
            d2 = squared_distances(own[part, None], targets)
            allowed = (d2 <= reach2[row + part, None]) & np.isfinite(targets).all(axis=1) & usable[row + part, None]
            if exclude_self:
                allowed[np.arange(len(part)), part] = False
            of_part = np.where(allowed, keys(d2, np.arange(first, first + n)), MISSING)
            if kept < n:
                of_part.partition(kept - 1, axis=1)
            found[row + part, :kept] = np.sort(of_part[:, :kept], axis=1)
        row, first = row + rows, first + n
    d2, indices = unpacked(found)
    distances = np.sqrt(d2)
    distances[~usable] = np.nan
    return distances, indices


def brute_force_radius(
    query: np.ndarray,
    query_lengths: Sequence[int],
    points: np.ndarray,
    lengths: Sequence[int],
    radius: Any,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `radius_search` must return: offsets, indices and distances, computed one query at a time."""
    counts, found, row, first = [0], [np.empty(0, np.uint64)], 0, 0
    reach2 = _reach2(radius, len(query))
    for rows, n in zip(query_lengths, lengths, strict=True):
        cloud = points[first : first + n]
        here = origin(cloud)
        targets, usable = local(cloud, here), np.isfinite(local(cloud, here)).all(axis=1)
        for i, one in enumerate(local(query[row : row + rows], here)):
            d2 = squared_distances(one, targets)
            inside = (d2 <= reach2[row + i]) & usable & np.isfinite(one).all()
            if exclude_self:
                inside[i] = False
            near = np.flatnonzero(inside)
            counts.append(len(near))
            found.append(keys(d2[near], near + first))
        row, first = row + rows, first + n
    d2, indices = unpacked(np.concatenate(found))
    return np.cumsum(counts, dtype=np.int64), indices, np.sqrt(d2)


# ---- the tree ------------------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """Points of a cloud that a search for neighbours can return, and the k-d tree over them."""

    points: np.ndarray  # float32 [m, 3]
    axes: np.ndarray  # float32 [3, m], the same
    packed_rows: np.ndarray  # int32 [m], their rows in the packed array
    tree: Any


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
        self._few = self._thinned(FEW + 1)

    def nearest(self, count: int) -> Tree:
        """The points among which are the `count` nearest of every query."""
        return self._few if count <= FEW + 1 else self._many

    @functools.cached_property
    def _many(self) -> Tree:
        return self._few if len(self._few.points) == len(self.points) else self._thinned(MAX_K + 1)

    @functools.cached_property
    def tree(self) -> Any:
        """The tree of all finite points."""
        return self._few.tree if len(self._few.points) == len(self.points) else _tree(self.points)

    def _thinned(self, copies: int) -> Tree:
        kept = _first_of_a_place(self.points, copies)
        rows, points = (self.rows, self.points) if kept.all() else (self.rows[kept], self.points[kept])
        return Tree(points, np.ascontiguousarray(points.T), (rows + self.first).astype(np.int32), _tree(points))


def _tree(points: np.ndarray) -> Any:
    """A k-d tree whose building and queries together take least time for a scan: tight boxes, but not balanced."""
    from scipy.spatial import cKDTree  # imported here, so that `import gpu3d` is fast

    return cKDTree(points, leafsize=24, compact_nodes=True, balanced_tree=False)


def _first_of_a_place(points: np.ndarray, copies: int) -> np.ndarray:
    """Which points to keep, bool [m], so that at most `copies` points are equal: those with the lowest indices.

    No search for so many neighbours can return the others. Many scans have thousands of points at the origin, and each
    query near it would visit all of them.
    """
    kept = np.ones(len(points), bool)
    bits = points.view(np.uint32).astype(np.uint64)
    mixed = np.sort(bits @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64))
    if (mixed[copies:] == mixed[:-copies]).any():  # equal points have equal hashes; usually no hash is so frequent
        order = np.lexsort(points.T)
        new = np.append(True, (points[order[1:]] != points[order[:-1]]).any(axis=1))
        start = np.flatnonzero(new)[np.cumsum(new) - 1]
        kept[order] = np.arange(len(points)) - start < copies
    return kept


def _distances2(axes: np.ndarray, rows: np.ndarray, query: Sequence[np.ndarray]) -> np.ndarray:
    """d2 [...] of the points `rows` [...] of `axes` [3, m] to the axes of a query: in place, an axis at a time."""
    with np.errstate(all="ignore"):
        d2 = axes[0].take(rows)
        np.subtract(query[0], d2, out=d2)
        d2 *= d2
        for d in (1, 2):
            term = axes[d].take(rows)
            np.subtract(query[d], term, out=term)
            term *= term
            d2 += term
    return d2


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
    query: np.ndarray,
    query_lengths: Sequence[int],
    clouds: Sequence[Cloud],
    k: int,
    radius: Any = np.inf,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances float32 [N, k] and indices int32 [N, k] into the packed points, of those within the radius.

    `radius` is a number, or an array [N] with one for each query.
    """
    d2, indices = _search(query, query_lengths, clouds, k, radius, exclude_self)
    return np.sqrt(d2, out=d2), indices


def nearest(
    query: np.ndarray, query_lengths: Sequence[int], clouds: Sequence[Cloud], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 [N, k] and indices int32 [N, k] into the packed points; d2 of every missing neighbour is NaN."""
    d2, indices = _search(query, query_lengths, clouds, k, np.inf, False)
    d2[indices < 0] = np.nan
    return d2, indices


def _search(
    query: np.ndarray,
    query_lengths: Sequence[int],
    clouds: Sequence[Cloud],
    k: int,
    radius: Any,
    exclude_self: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 [N, k] and indices int32 [N, k]."""
    d2, indices = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int32)
    reach2 = _reach2(radius, len(query))

    def search(cloud: Cloud, tree: Tree, rows: slice) -> None:
        own = np.arange(rows.start, rows.stop) if exclude_self else None
        _nearest(tree, local(query[rows], cloud.origin), reach2[rows], own, d2[rows], indices[rows])

    jobs, end = [], 0
    step = min(ROWS, CANDIDATES // k)
    for cloud, n in zip(clouds, query_lengths, strict=True):
        first, end = end, end + n
        tree = cloud.nearest(k + exclude_self)
        jobs += [(cloud, tree, slice(row, min(row + step, end))) for row in range(first, end, step)]
    _parallel(search, jobs)
    return d2, indices


def _nearest(
    tree: Tree, query: np.ndarray, reach2: np.ndarray, own: np.ndarray | None, d2: np.ndarray, indices: np.ndarray
) -> None:
    """Writes d2 float32 [n, k] and indices int32 [n, k] of queries float32 [n, 3] of one cloud.

    `own` are the points that are no neighbours of their queries, int64 [n].
    """
    k = d2.shape[1]
    kept = k if own is None else k + 1
    usable = np.isfinite(query).all(axis=1)
    rows, wanted = np.flatnonzero(usable & (reach2 >= 0)), kept + 1
    if len(rows) < len(query):
        d2[...], indices[...] = np.where(usable, np.float32(np.inf), np.float32(np.nan))[:, None], -1
    while len(rows):
        every = wanted > len(tree.points) // 8  # the tree is no faster than to look at all points
        if every:
            found = unpacked(scan(query[rows], tree.points, tree.packed_rows, kept))
        else:
            bound = np.nextafter(_outer_radius(reach2[rows].max()), np.inf)
            far, candidates = tree.tree.query(query[rows], wanted, distance_upper_bound=bound)
            found = _ranked(tree, query[rows], candidates, far)
        kth, (near, chosen) = found[0][:, kept - 1], (of[:, :kept] for of in found)
        if own is not None:
            near, chosen = _without(own[rows], near, chosen)
        if (beyond := near > reach2[rows, None]).any():
            near, chosen = np.where(beyond, np.float32(np.inf), near), np.where(beyond, -1, chosen)
        if len(rows) == len(query):
            d2[...], indices[...] = near, chosen
        else:
            d2[rows], indices[rows] = near, chosen
        if every:
            break
        # No point beyond the candidates is as near, or there is none.
        sure = (kth < far[:, -1] ** 2 * (1 - RELATIVE) - ABSOLUTE) | (far[:, -1] == np.inf)
        rows, wanted = rows[~sure], 4 * wanted + FEW


def _ranked(tree: Tree, query: np.ndarray, candidates: np.ndarray, far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 [n, c] and packed indices int32 [n, c] of the candidates int64 [n, c], sorted by (d2, index).

    The tree returns them almost sorted, with their distances `far`, which are inf for missing ones. So only the few
    rows in which d2 does not strictly increase are sorted again.
    """
    missing = far == np.inf if (far[:, -1] == np.inf).any() else None
    if missing is not None:
        candidates = np.where(missing, 0, candidates)
    d2 = _distances2(tree.axes, candidates, [query[:, d, None] for d in range(3)])
    indices = tree.packed_rows.take(candidates)
    if missing is not None:
        d2[missing], indices[missing] = np.inf, -1
    mixed = np.flatnonzero((d2[:, 1:] <= d2[:, :-1]).any(axis=1))
    d2[mixed], indices[mixed] = unpacked(np.sort(keys(d2[mixed], indices[mixed]), axis=1))
    return d2, indices


def _without(own: np.ndarray, d2: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first k of k + 1 neighbours [n, k + 1] that are not the query's own point."""
    behind = np.logical_or.accumulate(indices == own[:, None], axis=1)[:, :-1]
    return np.where(behind, d2[:, 1:], d2[:, :-1]), np.where(behind, indices[:, 1:], indices[:, :-1])


# ---- radius_search -------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The queries of one cloud."""

    cloud: Cloud
    query: np.ndarray  # float32 [n, 3], relative to the cloud's origin
    reach2: np.ndarray  # float32 [n], the squared radii
    exclude_self: bool

    def some(self, rows: Any) -> _Part:
        """Some of the queries, of which none is excluded."""
        return _Part(self.cloud, self.query[rows], self.reach2[rows], False)


def radius_search(
    query: np.ndarray,
    query_lengths: Sequence[int],
    clouds: Sequence[Cloud],
    radius: Any,
    max_entries: int | None,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets int64 [N + 1], indices int32 and distances float32, sorted by (query, index).

    `radius` is a number, or an array [N] with one for each query.
    """
    limit = MAX_PAIRS if max_entries is None else max_entries
    reach2, parts, end = _reach2(radius, len(query)), [], 0
    for cloud, n in zip(clouds, query_lengths, strict=True):
        rows, end = slice(end, end + n), end + n
        parts.append(_Part(cloud, local(query[rows], cloud.origin), reach2[rows], exclude_self))
    found = None if sum(map(_estimate, parts)) > limit else _all_listed(parts, limit)
    if found is None:
        counts = np.concatenate([np.empty(0, np.int64), *map(_counts, parts)])
        total = int(counts.sum())
        if total > limit:
            if max_entries is None:
                row = int(counts.argmax())
                raise too_many_entries(radius, total, row, int(counts[row]))
            return (
                np.full(len(query) + 1, -total, np.int64),
                np.full(max_entries, -1, np.int32),
                np.full(max_entries, np.nan, np.float32),
            )
        found = _all_listed(parts, limit)
        assert found is not None
    counts, indices, d2 = found
    offsets = np.zeros(len(query) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    distances = np.sqrt(d2, out=d2)
    if max_entries is not None:
        spare = max_entries - len(indices)
        indices = np.pad(indices, (0, spare), constant_values=-1)
        distances = np.pad(distances, (0, spare), constant_values=np.nan)
    return offsets, indices, distances


def too_many_entries(radius: Any, total: int, row: int, count: int) -> ValueError:
    """The error of a search without max_entries; query `row` has the most neighbours, `count` of them."""
    given = f"radius = {radius}" if np.ndim(radius) == 0 else "radius"
    return ValueError(
        f"{given} finds {total} neighbours, more than 2**31 - 1; query row {row} alone has {count}. Take a smaller "
        "radius, search fewer queries at a time, or cap the neighbours of each query by max_neighbors."
    )


def _outer_radius(r2: Any) -> Any:
    """Every point with d2 <= r2 in float32 lies within this radius in exact arithmetic."""
    return np.sqrt((np.float64(r2) + ABSOLUTE) * (1 + RELATIVE))


def _inner_radius(r2: Any) -> Any:
    """Every point within this radius in exact arithmetic has d2 <= r2 in float32, at least those equal to the query."""
    return np.sqrt(np.maximum(np.float64(r2) - ABSOLUTE, 0.0) * (1 - RELATIVE))


def _usable(part: _Part) -> np.ndarray:
    """The rows of the queries that may find anything."""
    return np.flatnonzero(np.isfinite(part.query).all(axis=1) & (part.reach2 >= 0))


def _within(part: _Part, radius: Callable[[Any], Any]) -> np.ndarray:
    """How many points of the cloud the tree finds within radius(reach2) of each query, int64 [n]."""
    counts, rows = np.zeros(len(part.query), np.int64), _usable(part)
    if len(rows):
        radii = radius(part.reach2[rows])
        counts[rows] = part.cloud.tree.query_ball_point(part.query[rows], radii, return_length=True, workers=-1)
    return counts


def _estimate(part: _Part) -> int:
    """About how many pairs there are, from a sample of the queries."""
    n = len(part.query)
    sample = np.arange(min(n, SAMPLE)) * n // max(min(n, SAMPLE), 1)
    return int(_within(part.some(sample), _inner_radius).sum()) * n // max(len(sample), 1)


def _counts(part: _Part) -> np.ndarray:
    """How many neighbours each query has, int64 [n]. Lists pairs only for queries with a point close to the radius."""
    counts, upper = _within(part, _inner_radius), _within(part, _outer_radius)
    unsure = np.flatnonzero(counts != upper)
    counts[unsure] = np.concatenate([np.empty(0, np.int64), *(of[0] for of in _listed(part.some(unsure)))])
    if part.exclude_self:
        coordinates = np.full((part.cloud.length, 3), np.float32(np.nan))
        coordinates[part.cloud.rows] = part.cloud.points
        inside = squared_distances(part.query, coordinates) <= part.reach2
        counts -= inside & np.isfinite(part.query).all(axis=1)
    return counts


def _all_listed(parts: Sequence[_Part], limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Counts int64 [N], indices int32 and d2 float32 of all pairs, or None if there are more than the limit."""
    found, total = [(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))], 0
    for part in parts:
        for pairs in _listed(part):
            total += len(pairs[1])
            if total > limit:
                return None
            found.append(pairs)
    counts, indices, d2 = (np.concatenate(column) for column in zip(*found, strict=True))
    return counts, indices, d2


def _listed(part: _Part) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs with d2 <= reach2, in order, of some queries at a time.

    Yields the number of neighbours of each query, int64; their rows in the packed points, int32; and d2, float32.
    """
    cloud, axes = part.cloud, np.ascontiguousarray(part.cloud.points.T)
    packed_rows = (cloud.rows + cloud.first).astype(np.int32)
    step = max(1, LISTED // max(len(cloud.points), 1))
    for first in range(0, len(part.query), step):
        some = part.some(slice(first, first + step))
        counts, usable = np.zeros(len(some.query), np.int64), _usable(some)
        lists = cloud.tree.query_ball_point(
            some.query[usable], _outer_radius(some.reach2[usable]), return_sorted=True, workers=-1
        )
        counts[usable] = np.fromiter(map(len, lists), np.int64, len(lists))
        total = int(counts.sum())
        near = np.fromiter(itertools.chain.from_iterable(lists), np.int64, total)
        d2 = _distances2(axes, near, [np.repeat(some.query[:, d], counts) for d in range(3)])
        indices, rows = packed_rows.take(near), np.repeat(np.arange(len(counts)), counts)
        kept = d2 <= some.reach2[rows]
        if part.exclude_self:
            kept &= indices != rows + (cloud.first + first)
        if not kept.all():
            counts, indices, d2 = np.bincount(rows[kept], minlength=len(counts)), indices[kept], d2[kept]
        yield counts, indices, d2


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
