# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours in NumPy and SciPy: the definition by brute force, and a k-d tree that gives the same bits.

The squared distance is d2 = (dx*dx + dy*dy) + dz*dz of differences, each operation rounded once: in float64 if query or
points are float64, and else in float32. Neighbours are ordered by (d2, index). The tree computes in float64 and in
another order, so it may order near ties differently. Therefore it only proposes candidates, a few more than needed, and
the formula decides.

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
# subnormal. Both are generous. If two values differ by more than this, the formula and the tree order them alike. In
# float64 the roundings of the tree count too, of which there are three at each of its levels.
SLACK = {np.dtype(np.float32): (2.0**-21, 2.0**-147), np.dtype(np.float64): (2.0**-43, 2.0**-1070)}

# The tree clips float64 coordinates here, so that its squares do not overflow. Clipped points are no farther apart than
# those they stand for, so the tree's distances remain lower bounds.
FARTHEST = 2.0**500


# ---- the definition ------------------------------------------------------------------------------------------------


def widened(points: np.ndarray, dtype: Any) -> np.ndarray:
    """Coordinates [n, 3] of this dtype; z = 0 for 2-D points."""
    coordinates = np.zeros((len(points), 3), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        coordinates[:, : points.shape[1]] = points
    return coordinates


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """d2 [...] between rows of a and b [..., 3], in their dtype."""
    with np.errstate(all="ignore"):
        dx, dy, dz = (a[..., d] - b[..., d] for d in range(3))
        return (dx * dx + dy * dy) + dz * dz


def dtype_of(*arrays: Any) -> np.dtype:
    """What a search among these arrays computes in: float64 if one of them is that."""
    return np.dtype(np.float64 if any(x.dtype == np.float64 for x in arrays) else np.float32)


def keys(d2: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Numbers uint64 that sort like (d2, index), index -1 last: floats that are not negative sort like their bits."""
    return d2.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint32).astype(np.uint64)


def unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 float32 and indices int32 of `keys`; inf and -1 where a key is MISSING."""
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32), keys.astype(np.uint32).view(np.int32)


def in_order(d2: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 [n, c] and indices int32 [n, c], each row sorted by (d2, index), index -1 last."""
    if d2.dtype == np.float32:
        return unpacked(np.sort(keys(d2, indices), axis=1))
    order = np.lexsort((indices.view(np.uint32), d2), axis=1)
    return np.take_along_axis(d2, order, axis=1), np.take_along_axis(indices, order, axis=1)


def smallest(d2: np.ndarray, indices: np.ndarray, allowed: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest of each row of d2 [n, m] by (d2, index), and their indices int32 [n, k], where they are allowed.

    `indices` [m] ascend. Where there are fewer, d2 is inf and the index -1.
    """
    n, m = d2.shape
    kept = min(k, m)
    nearest, found = np.full((n, k), np.inf, d2.dtype), np.full((n, k), -1, np.int32)
    if d2.dtype == np.float64:
        order = np.argsort(np.where(allowed, d2, np.nan), axis=1, kind="stable")[:, :kept]  # NaN comes last
        there = np.take_along_axis(np.broadcast_to(allowed, d2.shape), order, axis=1)
        nearest[:, :kept] = np.where(there, np.take_along_axis(d2, order, axis=1), np.inf)
        found[:, :kept] = np.where(there, indices[order], -1)
    else:
        all_keys = np.where(allowed, keys(d2, indices), MISSING)
        if kept < m:
            all_keys.partition(kept - 1, axis=1)
        nearest[:, :kept], found[:, :kept] = unpacked(np.sort(all_keys[:, :kept], axis=1))
    return nearest, found


def scan(query: np.ndarray, points: np.ndarray, indices: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """d2 and indices int32 [n, k] of the k nearest of each query [n, 3] by brute force; all is finite."""
    nearest, found = np.empty((len(query), k), query.dtype), np.empty((len(query), k), np.int32)
    for part in np.array_split(np.arange(len(query)), -(-len(query) * len(points) // PAIRS) or 1):
        nearest[part], found[part] = smallest(squared_distances(query[part, None], points), indices, True, k)
    return nearest, found


def squared_radius(radius: Any, dtype: Any = np.float32) -> Any:
    """The radius rounded to the dtype, and its square rounded to it. It is negative for a negative or NaN radius."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = np.asarray(radius).astype(dtype)
        return np.where(rounded >= 0, rounded * rounded, np.full((), -1, dtype))[()]


def _reach2(radius: Any, queries: int, dtype: np.dtype) -> np.ndarray:
    """The squared radius of each query [queries]."""
    return np.broadcast_to(squared_radius(radius, dtype), (queries,))


def brute_force_knn(
    query: np.ndarray,
    query_lengths: Sequence[int],
    points: np.ndarray,
    lengths: Sequence[int],
    k: int,
    radius: Any = np.inf,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What `knn` must return: distances [N, k] and indices int32 [N, k], from all pairs."""
    dtype, row, first = dtype_of(query, points), 0, 0
    distances, found = np.full((len(query), k), np.inf, dtype), np.full((len(query), k), -1, np.int32)
    reach2 = _reach2(radius, len(query), dtype)
    for rows, n in zip(query_lengths, lengths, strict=True):
        own, targets = (widened(x, dtype) for x in (query[row : row + rows], points[first : first + n]))
        usable = np.isfinite(own).all(axis=1)
        for part in np.array_split(np.arange(rows), -(-rows * n // PAIRS) or 1):
            d2 = squared_distances(own[part, None], targets)
            allowed = (d2 <= reach2[row + part, None]) & np.isfinite(targets).all(axis=1) & usable[part, None]
            if exclude_self:
                allowed[np.arange(len(part)), part] = False
            d2, found[row + part] = smallest(d2, np.arange(first, first + n), allowed, k)
            distances[row + part] = np.sqrt(d2)
        distances[row : row + rows][~usable] = np.nan
        row, first = row + rows, first + n
    return distances, found


def brute_force_radius(
    query: np.ndarray,
    query_lengths: Sequence[int],
    points: np.ndarray,
    lengths: Sequence[int],
    radius: Any,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `radius_search` must return: offsets, indices and distances, computed one query at a time."""
    dtype = dtype_of(query, points)
    counts, found, squares, row, first = [0], [np.empty(0, np.int32)], [np.empty(0, dtype)], 0, 0
    reach2 = _reach2(radius, len(query), dtype)
    for rows, n in zip(query_lengths, lengths, strict=True):
        targets = widened(points[first : first + n], dtype)
        usable = np.isfinite(targets).all(axis=1)
        for i, one in enumerate(widened(query[row : row + rows], dtype)):
            d2 = squared_distances(one, targets)
            inside = (d2 <= reach2[row + i]) & usable & np.isfinite(one).all()
            if exclude_self:
                inside[i] = False
            near = np.flatnonzero(inside)
            counts.append(len(near))
            found.append((near + first).astype(np.int32))
            squares.append(d2[near])
        row, first = row + rows, first + n
    return np.cumsum(counts, dtype=np.int64), np.concatenate(found), np.sqrt(np.concatenate(squares))


# ---- the tree ------------------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """Points of a cloud that a search for neighbours can return, and the k-d tree over them."""

    points: np.ndarray  # float32 or float64 [m, 3]
    axes: np.ndarray  # [3, m], the same
    packed_rows: np.ndarray  # int32 [m], their rows in the packed array
    tree: Any


class Cloud:
    """One cloud, ready to be searched: its finite points, and k-d trees over them.

    Coordinates are float64 if the cloud is `wide`, and else float32.
    """

    def __init__(self, points: np.ndarray, first: int, wide: bool = False) -> None:
        """Prepare `points` [n, 2 or 3], which begin at row `first` of the packed array."""
        self.first, self.length = first, len(points)
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        coordinates = self.widened(points)
        self.rows, self.points = np.arange(len(points)), coordinates  # int64 [m] in the cloud; [m, 3]
        finite = np.isfinite(coordinates)
        if not finite.all():
            self.rows = np.flatnonzero(finite.all(axis=1))
            self.points = coordinates[self.rows]
        self._few = self._thinned(FEW + 1)

    def widened(self, points: np.ndarray) -> np.ndarray:
        """Coordinates [n, 3] of points or queries [n, 2 or 3], as searches in this cloud compute with them."""
        return widened(points, self.dtype)

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

    return cKDTree(clipped(points), leafsize=24, compact_nodes=True, balanced_tree=False)


def clipped(points: np.ndarray) -> np.ndarray:
    """Coordinates as the tree gets them."""
    return points if points.dtype == np.float32 else points.clip(-FARTHEST, FARTHEST)


def _first_of_a_place(points: np.ndarray, copies: int) -> np.ndarray:
    """Which points to keep, bool [m], so that at most `copies` points are equal: those with the lowest indices.

    No search for so many neighbours can return the others. Many scans have thousands of points at the origin, and each
    query near it would visit all of them.
    """
    kept = np.ones(len(points), bool)
    bits = points.view(f"u{points.itemsize}").astype(np.uint64)
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


def index(points: np.ndarray, lengths: Sequence[int], wide: bool = False) -> tuple[Cloud, ...]:
    """The clouds of a packed array [N, 2 or 3]; each can be searched any number of times."""
    starts = np.cumsum([0, *lengths]).tolist()
    return tuple(Cloud(points[first : first + n], first, wide) for first, n in zip(starts, lengths, strict=False))


def in_parallel(work: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
    """The results of `work` for each job, from threads on all cores: NumPy and the tree release the GIL."""
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers <= 1:
        return [work(*job) for job in jobs]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, *zip(*jobs, strict=True)))


# ---- knn -----------------------------------------------------------------------------------------------------------


def knn(
    query: np.ndarray,
    query_lengths: Sequence[int],
    clouds: Sequence[Cloud],
    k: int,
    radius: Any = np.inf,
    exclude_self: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances [N, k] and indices int32 [N, k] into the packed points, of those within the radius.

    `radius` is a number, or an array [N] with one for each query.
    """
    d2, indices = _search(query, query_lengths, clouds, k, radius, exclude_self)
    return np.sqrt(d2, out=d2), indices


def nearest(
    query: np.ndarray, query_lengths: Sequence[int], clouds: Sequence[Cloud], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """d2 [N, k] and indices int32 [N, k] into the packed points; d2 of every missing neighbour is NaN."""
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
    """d2 [N, k] and indices int32 [N, k]."""
    dtype = _dtype_of_clouds(clouds, query)
    d2, indices = np.empty((len(query), k), dtype), np.empty((len(query), k), np.int32)
    reach2 = _reach2(radius, len(query), dtype)

    def search(cloud: Cloud, tree: Tree, rows: slice) -> None:
        own = np.arange(rows.start, rows.stop) if exclude_self else None
        _nearest(tree, cloud.widened(query[rows]), reach2[rows], own, d2[rows], indices[rows])

    jobs, end = [], 0
    step = min(ROWS, CANDIDATES // k)
    for cloud, n in zip(clouds, query_lengths, strict=True):
        first, end = end, end + n
        tree = cloud.nearest(k + exclude_self)
        jobs += [(cloud, tree, slice(row, min(row + step, end))) for row in range(first, end, step)]
    in_parallel(search, jobs)
    return d2, indices


def _dtype_of_clouds(clouds: Sequence[Cloud], query: np.ndarray) -> np.dtype:
    """What a search in these clouds computes in."""
    return clouds[0].dtype if clouds else dtype_of(query)


def _nearest(
    tree: Tree, query: np.ndarray, reach2: np.ndarray, own: np.ndarray | None, d2: np.ndarray, indices: np.ndarray
) -> None:
    """Writes d2 [n, k] and indices int32 [n, k] of queries [n, 3] of one cloud.

    `own` are the points that are no neighbours of their queries, int64 [n].
    """
    k, dtype = d2.shape[1], query.dtype
    relative, absolute = SLACK[dtype]
    kept = k if own is None else k + 1
    usable = np.isfinite(query).all(axis=1)
    rows, wanted = np.flatnonzero(usable & (reach2 >= 0)), kept + 1
    if len(rows) < len(query):
        d2[...], indices[...] = np.where(usable, np.inf, np.nan).astype(dtype)[:, None], -1
    while len(rows):
        every = wanted > len(tree.points) // 8  # the tree is no faster than to look at all points
        if every:
            found = scan(query[rows], tree.points, tree.packed_rows, kept)
        else:
            bound = np.nextafter(_outer_radius(reach2[rows].max()), np.inf)
            far, candidates = tree.tree.query(clipped(query[rows]), wanted, distance_upper_bound=bound)
            found = _ranked(tree, query[rows], candidates, far)
        kth, (near, chosen) = found[0][:, kept - 1], (of[:, :kept] for of in found)
        if own is not None:
            near, chosen = _without(own[rows], near, chosen)
        if (beyond := near > reach2[rows, None]).any():
            near, chosen = np.where(beyond, np.full((), np.inf, dtype), near), np.where(beyond, -1, chosen)
        if len(rows) == len(query):
            d2[...], indices[...] = near, chosen
        else:
            d2[rows], indices[rows] = near, chosen
        if every:
            break
        # No point beyond the candidates is as near, or there is none.
        sure = (kth < far[:, -1] ** 2 * (1 - relative) - absolute) | (far[:, -1] == np.inf)
        rows, wanted = rows[~sure], 4 * wanted + FEW


def _ranked(tree: Tree, query: np.ndarray, candidates: np.ndarray, far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d2 [n, c] and packed indices int32 [n, c] of the candidates int64 [n, c], sorted by (d2, index).

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
    d2[mixed], indices[mixed] = in_order(d2[mixed], indices[mixed])
    return d2, indices


def _without(own: np.ndarray, d2: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first k of k + 1 neighbours [n, k + 1] that are not the query's own point."""
    behind = np.logical_or.accumulate(indices == own[:, None], axis=1)[:, :-1]
    return np.where(behind, d2[:, 1:], d2[:, :-1]), np.where(behind, indices[:, 1:], indices[:, :-1])


# ---- radius_search -------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The queries of one cloud."""

    cloud: Cloud
    query: np.ndarray  # [n, 3], from `Cloud.widened`
    reach2: np.ndarray  # [n], the squared radii
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
    """Offsets int64 [N + 1], indices int32 and distances, sorted by (query, index).

    `radius` is a number, or an array [N] with one for each query.
    """
    limit, dtype = MAX_PAIRS if max_entries is None else max_entries, _dtype_of_clouds(clouds, query)
    reach2, parts, end = _reach2(radius, len(query), dtype), [], 0
    for cloud, n in zip(clouds, query_lengths, strict=True):
        rows, end = slice(end, end + n), end + n
        parts.append(_Part(cloud, cloud.widened(query[rows]), reach2[rows], exclude_self))
    found = None if sum(map(_estimate, parts)) > limit else _all_listed(parts, limit, dtype)
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
                np.full(max_entries, np.nan, dtype),
            )
        found = _all_listed(parts, limit, dtype)
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
    """Every point with d2 <= r2 by the formula lies within this radius in the tree."""
    relative, absolute = SLACK[np.dtype(r2.dtype)]
    with np.errstate(over="ignore"):
        return np.sqrt((np.float64(r2) + absolute) * (1 + relative))


def _inner_radius(r2: Any) -> Any:
    """Every point within this radius in the tree has d2 <= r2 by the formula, at least those equal to the query."""
    relative, absolute = SLACK[np.dtype(r2.dtype)]
    return np.sqrt(np.maximum(np.float64(r2) - absolute, 0.0) * (1 - relative))


def _usable(part: _Part) -> np.ndarray:
    """The rows of the queries that may find anything."""
    return np.flatnonzero(np.isfinite(part.query).all(axis=1) & (part.reach2 >= 0))


def _within(part: _Part, radius: Callable[[Any], Any]) -> np.ndarray:
    """How many points of the cloud the tree finds within radius(reach2) of each query, int64 [n]."""
    counts, rows = np.zeros(len(part.query), np.int64), _usable(part)
    if len(rows):
        radii = radius(part.reach2[rows])
        query = clipped(part.query[rows])
        counts[rows] = part.cloud.tree.query_ball_point(query, radii, return_length=True, workers=-1)
    return counts


def _estimate(part: _Part) -> int:
    """About how many pairs there are, from a sample of the queries."""
    n = len(part.query)
    sample = np.arange(min(n, SAMPLE)) * n // max(min(n, SAMPLE), 1)
    return int(_within(part.some(sample), _inner_radius).sum()) * n // max(len(sample), 1)


def _counts(part: _Part) -> np.ndarray:
    """How many neighbours each query has, int64 [n]. Lists pairs only for queries with a point close to the radius."""
    counts, upper = _within(part, _inner_radius), _within(part, _outer_radius)
    near_edge = counts != upper
    if part.cloud.dtype == np.float64:  # clipped points may be farther away than the tree finds
        near_edge |= (np.abs(part.query) > FARTHEST / 2).any(axis=1) | (part.reach2 > FARTHEST)
    unsure = np.flatnonzero(near_edge)
    counts[unsure] = np.concatenate([np.empty(0, np.int64), *(of[0] for of in _listed(part.some(unsure)))])
    if part.exclude_self:
        coordinates = np.full((part.cloud.length, 3), np.nan, part.cloud.dtype)
        coordinates[part.cloud.rows] = part.cloud.points
        inside = squared_distances(part.query, coordinates) <= part.reach2
        counts -= inside & np.isfinite(part.query).all(axis=1)
    return counts


def _all_listed(
    parts: Sequence[_Part], limit: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Counts int64 [N], indices int32 and d2 of all pairs, or None if there are more than the limit."""
    found, total = [(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, dtype))], 0
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

    Yields the number of neighbours of each query, int64; their rows in the packed points, int32; and d2.
    """
    cloud, axes = part.cloud, np.ascontiguousarray(part.cloud.points.T)
    packed_rows = (cloud.rows + cloud.first).astype(np.int32)
    step = max(1, LISTED // max(len(cloud.points), 1))
    for first in range(0, len(part.query), step):
        some = part.some(slice(first, first + step))
        counts, usable = np.zeros(len(some.query), np.int64), _usable(some)
        lists = cloud.tree.query_ball_point(
            clipped(some.query[usable]), _outer_radius(some.reach2[usable]), return_sorted=True, workers=-1
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
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of query and points in their dtypes; ddistances [N, k] is the gradient of the distances.

    All is in the dtype of the distances, float32 or float64. The gradient of a distance d > 0 with respect to its query
    is v / d, where v is the difference query - point that d is of; with respect to its point it is minus that. It is 0
    where d is 0 or not finite, and where there is no neighbour, whatever ddistances hold there. Elsewhere a ddistance
    that is not finite makes the gradients of its query and its point NaN.

    The gradient of a row is the sum of its terms, ddistance * (v / d) or minus that, rounded to float64. Terms are
    added as integers, so in any order: each times 2**shift, rounded to nearest even, where shift = 61 -
    bit_length(count) - E, the row's largest |ddistance| is f * 2**E, 1/2 <= f < 1, and count is the entries of a query,
    or for a point the number of queries. The sum is rounded to the dtype of the distances, and then to the array's.
    """
    n, k = distances.shape
    entries = [x.reshape(-1) for x in (ddistances, distances, indices)]
    rows, counts = np.repeat(np.arange(n), k), np.full(n, k, np.int64)
    return _gradients(entries, rows, counts, query, points)


def radius_backward(
    ddistances: np.ndarray,
    query: np.ndarray,
    points: np.ndarray,
    offsets: np.ndarray,
    indices: np.ndarray,
    distances: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The same of `radius_search`: ddistances are [entries]. All is NaN where there was too little room."""
    if offsets[0] < 0:
        return np.full_like(query, np.nan), np.full_like(points, np.nan)
    counts, total = np.diff(offsets), int(offsets[-1])
    entries = [x[:total] for x in (ddistances, distances, indices)]
    rows = np.repeat(np.arange(len(query)), counts)
    return _gradients(entries, rows, counts, query, points)


def _gradients(
    entries: Sequence[np.ndarray],
    rows: np.ndarray,
    counts: np.ndarray,
    query: np.ndarray,
    points: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Of entries [e], which are ddistances, distances and indices. `rows` are their queries, of `counts` entries."""
    ddistances, distances, indices = entries
    found = np.flatnonzero((indices >= 0) & (distances > 0) & np.isfinite(distances))
    i, j, d, g = rows[found], indices[found], distances[found], ddistances[found]
    a, b = (widened(x, distances.dtype) for x in (query, points))
    n, m = len(query), len(points)
    sums = _Sums(g, i, counts), _Sums(g, j, np.full(m, n, np.int64))
    for first in range(0, len(found), PAIRS):
        part = slice(first, first + PAIRS)
        with np.errstate(invalid="ignore"):
            terms = g[part, None].astype(np.float64) * ((a[i[part]] - b[j[part]]) / d[part, None])
        sums[0].add(terms, i[part])
        sums[1].add(-terms, j[part])
    with np.errstate(over="ignore"):
        totals = [of.total(distances.dtype) for of in sums]
        dquery, dpoints = (
            total[:, : x.shape[1]].astype(x.dtype) for total, x in zip(totals, (query, points), strict=True)
        )
    return dquery, dpoints


class _Sums:
    """Sums of terms by row, in integers."""

    def __init__(self, factors: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> None:
        """The largest of a row's |factors| and the number of its terms say how small its integers' unit is."""
        largest = np.zeros(len(counts), factors.dtype)
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

    def total(self, dtype: np.dtype) -> np.ndarray:
        """The sums [rows, 3]; NaN where a factor is not finite."""
        with np.errstate(over="ignore"):
            sums = np.ldexp(self.sums.astype(np.float64), -self.shifts[:, None]).astype(dtype)
        sums[~self.finite] = np.nan
        return sums
