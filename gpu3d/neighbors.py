# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours: the k nearest points, and all points within a radius.

Nothing is approximated: distances and indices have the bits of brute force, on CPU and GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, FLOAT64, INT32, INT64, Given, Origin, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda import neighbors as cuda
from gpu3d.reference import neighbors as reference

MAX_POINTS = 2**31 - 1  # indices are int32
MAX_ENTRIES = 2**40  # the largest max_entries; no machine has memory for more

# ---- results -------------------------------------------------------------------------------------------------------


class Neighbors(NamedTuple):
    """The nearest points of each query, in order of (distance, index).

    This is the result of `knn`, and of `radius_search` with max_neighbors.
    """

    distances: Any  # float32 or float64 [N, k]; inf for a missing neighbour, NaN if the query is not finite
    indices: Any  # int32 [N, k], into the packed points; -1 for a missing neighbour


class RadiusNeighbors(NamedTuple):
    """The points within a radius, in order of (query, index); the result of `radius_search`.

    The neighbours of query i are entries ``offsets[i]`` to ``offsets[i + 1]``. If a search finds more than max_entries,
    the result is flagged and never cut: every offset is minus the number found, every index -1 and every distance NaN.
    """

    offsets: Any  # int64 [N + 1]; JAX makes them int32 unless jax_enable_x64 is set
    indices: Any  # int32 [entries], into the packed points
    distances: Any  # float32 or float64 [entries]


@dataclass(frozen=True, eq=False)
class NeighborIndex:
    """Clouds that are ready for many searches, made by `neighbor_index`. It can take the place of `points`, x or y.

    Attributes
    ----------
    given : Given
        The array of points. Its memory is not copied, so it must not change while the index is in use.
    lengths : tuple of int
        Points of each cloud.
    search : object
        The data that a search reads: trees on the CPU, memory with buckets and boxes on a GPU.
    """

    given: Given
    lengths: tuple[int, ...]
    search: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array of points."""
        return self.given.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array of points."""
        return self.given.dtype

    @property
    def origin(self) -> Origin:
        """The library and the device of the array of points."""
        return self.given.origin

    @property
    def device(self) -> int | None:
        """The CUDA device, or None for the host."""
        return self.given.device

    @property
    def spec(self) -> Spec:
        """The array of points without its memory."""
        return self.given.spec


def neighbor_index(points: Any, *, lengths: Sequence[int] | None = None) -> NeighborIndex:
    """Prepare clouds once for any number of searches.

    Parameters
    ----------
    points : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
        They are not copied, so they must not change while the index is in use. They are not differentiated.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud.

    Returns
    -------
    NeighborIndex
        Pass it to `knn`, `radius_search`, `chamfer` and `compare_clouds` in place of the points and their lengths. A
        search in float64, because the other array is that, makes an index of its own if this one is of other points.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    A call never waits for the GPU. After a first call it can be captured in a CUDA graph.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
    >>> index = gpu3d.neighbor_index(points)
    >>> for radius in (0.1, 0.2):
    ...     print(len(gpu3d.radius_search(points[:10], index, radius).indices))
    42
    217
    """
    _arrays.refuse_gradients("neighbor_index", points=points)
    given = read_points(points, "points")
    lengths = check_clouds(given, lengths, "points", "lengths")
    assert isinstance(given, Given)  # check_clouds refuses an index beside lengths, and one alone is returned
    return NeighborIndex(given, lengths, _search_of(given, lengths))


def knn(
    query: Any,
    points: Any,
    k: int,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    exclude_self: bool = False,
) -> Neighbors:
    """The k nearest points of each query, in its own cloud.

    Parameters
    ----------
    query : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
        Queries of cloud b search cloud b of `points`.
    points : array [M, 3], [M, 2], [B, m, 3], [B, m, 2] or NeighborIndex
        The points to search, with the same number of coordinates, on the same device. The dtypes may differ.
    k : int
        Number of neighbours, 1 to 1024. A query that has fewer gets index -1 and distance inf for the missing ones.
    query_lengths, lengths : sequence of int, optional
        Queries and points of each cloud, host integers. Default: one cloud. With a NeighborIndex, `lengths` is left
        out.
    exclude_self : bool
        With True, point i is no neighbour of query i. The lengths of both must be the same. Coordinates are not
        compared: another point at the same place is a neighbour.

    Returns
    -------
    Neighbors
        ``distances`` [N, k] and ``indices`` int32 [N, k] into the packed points: ``points[indices[i, j]]`` is
        the j-th nearest of ``query[i]``. They are arrays of the library of `query`. The same call gives the same bits
        on CPU and GPU.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    A distance is the square root of d2 = (dx*dx + dy*dy) + dz*dz of differences, each operation rounded once.
    Neighbours are ordered by (d2, index). A query that is one of the points finds itself, unless exclude_self is True.
    If query or points are float64, both are converted to float64, float64 arithmetic decides, and the distances are
    float64: whatever the extent of a cloud is, and wherever a stray point lies. Else all of it is float32.

    A point with NaN or inf is not found by any query. A query with NaN or inf has no neighbours: its indices are -1 and
    its distances NaN.

    Distances of tensors and of JAX arrays have gradients with respect to query and points. The gradient of a distance
    of 0, and of a missing neighbour, is 0. Gradients are deterministic, as in `chamfer_value_and_grad`.

    A call never waits for the GPU. After a first call it can be captured in a CUDA graph.

    Examples
    --------
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32)
    >>> distances, indices = gpu3d.knn(np.array([[2, 0, 0]], np.float32), points, k=2)
    >>> distances, indices
    (array([[1., 2.]], dtype=float32), array([[1, 0]], dtype=int32))
    >>> gpu3d.knn(points, points, k=3, exclude_self=True).indices
    array([[ 1,  2, -1],
           [ 0,  2, -1],
           [ 1,  0, -1]], dtype=int32)
    """
    if (interop := _arrays.interop_of(query, points)) is not None:
        options: dict[str, Any] = {"query_lengths": query_lengths, "lengths": lengths, "exclude_self": exclude_self}
        return interop.knn(query, points, k, **options)
    given, searched = read_query(query), read_points(points, "points")
    checked = check_knn(given, searched, k, query_lengths, lengths, exclude_self)
    return Neighbors(*knn_arrays(given, searched, None, checked))


def radius_search(
    query: Any,
    points: Any,
    radius: Any,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    max_entries: int | None = None,
    max_neighbors: int | None = None,
    exclude_self: bool = False,
) -> RadiusNeighbors | Neighbors:
    """All points within a radius of each query, in its own cloud, or the nearest of them.

    Parameters
    ----------
    query : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `knn`.
    points : array [M, 3], [M, 2], [B, m, 3], [B, m, 2] or NeighborIndex
        As in `knn`.
    radius : float, or array [N]
        The radius of every query, or one for each: floats on the device of the queries. It must not be negative or NaN;
        an array on a GPU is not checked, and there such a radius finds nothing. inf finds all finite points.
    query_lengths, lengths : sequence of int, optional
        As in `knn`.
    max_entries : int, optional
        Capacity for the neighbours of all queries together. Default: the exact number, which is counted first.
    max_neighbors : int, optional
        Return the nearest neighbours of each query, up to this number, which is 1 to 1024. max_entries is left out.
    exclude_self : bool
        As in `knn`.

    Returns
    -------
    RadiusNeighbors
        Without max_neighbors: ``offsets`` int64 [N + 1], ``indices`` int32 and ``distances`` [entries], in
        order of (query, index): the neighbours of ``query[i]`` are ``indices[offsets[i]:offsets[i + 1]]``. They are
        arrays of the library of `query`. With max_entries, ``indices`` and ``distances`` have that length, filled up
        with -1 and NaN. If there are more neighbours, every index is -1, every distance NaN, and every offset minus the
        number of neighbours.
    Neighbors
        With max_neighbors: ``distances`` and ``indices`` [N, max_neighbors] of the nearest points within the radius, in
        order of (distance, index), as in `knn`. Missing neighbours have index -1 and distance inf.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure. Without max_entries
        and max_neighbors, also if there are more than 2**31 - 1 neighbours: the message names the query that has most.
    MemoryError, or what the library of `query` raises
        There is no memory for all neighbours. The message has the size that was asked for.

    Notes
    -----
    A point is found if d2 <= r*r, with d2 as in `knn`. r is the radius rounded to the dtype of the distances, and r*r
    is rounded to it too (to inf, if it is too large). The notes of `knn` on float64, NaN and gradients hold here too.
    Radii have no gradient. If max_entries is too small, the gradients are NaN.

    With neither max_entries nor max_neighbors the call synchronizes, because the host reads the number of neighbours.
    Otherwise it never waits for the GPU, and after a first call it can be captured in a CUDA graph.

    Examples
    --------
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32)
    >>> offsets, indices, distances = gpu3d.radius_search(points, points, 1.0)
    >>> offsets, indices
    (array([0, 2, 4, 5]), array([0, 1, 0, 1, 2], dtype=int32))
    >>> gpu3d.radius_search(points, points, 1.0, max_entries=4).offsets
    array([-5, -5, -5, -5])
    >>> radii = np.array([1, 5, 0], np.float32)
    >>> gpu3d.radius_search(points, points, radii, max_neighbors=2, exclude_self=True).indices
    array([[ 1, -1],
           [ 0,  2],
           [-1, -1]], dtype=int32)
    """
    if (interop := _arrays.interop_of(query, points, radius)) is not None:
        lengths_of = {"query_lengths": query_lengths, "lengths": lengths}
        options = {"max_entries": max_entries, "max_neighbors": max_neighbors, "exclude_self": exclude_self}
        return interop.radius_search(query, points, radius, **lengths_of, **options)
    given, searched = read_query(query), read_points(points, "points")
    return within(given, searched, radius, query_lengths, lengths, max_entries, max_neighbors, exclude_self)


def within(
    query: Given,
    points: Given | NeighborIndex,
    radius: Any,
    query_lengths: Any,
    lengths: Any,
    max_entries: Any,
    max_neighbors: Any,
    exclude_self: Any,
) -> RadiusNeighbors | Neighbors:
    """`radius_search` of arrays that have been read."""
    radii = _arrays.read(radius, "radius") if is_array(radius) else None
    reach = radius if radii is None else radii
    if check_max_neighbors(max_neighbors, max_entries):
        search = query, points, max_neighbors, query_lengths, lengths
        nearest = check_knn(*search, exclude_self, reach, "max_neighbors")
        return Neighbors(*knn_arrays(query, points, radii, nearest))
    checked = check_radius(query, points, reach, query_lengths, lengths, max_entries, exclude_self)
    return RadiusNeighbors(*radius_arrays(query, points, radii, checked))


# ---- checks --------------------------------------------------------------------------------------------------------

Clouds = Given | Spec | NeighborIndex  # what checks accept


def read_points(points: Any, name: str) -> Given | NeighborIndex:
    """Read an array; a NeighborIndex is returned as it is."""
    return points if isinstance(points, NeighborIndex) else _arrays.read(points, name)


def read_query(query: Any) -> Given:
    """Read an array; a NeighborIndex is an error."""
    if isinstance(query, NeighborIndex):
        raise TypeError("query must be an array, got NeighborIndex: an index stands in for points only.")
    return _arrays.read(query, "query")


def is_array(radius: Any) -> bool:
    """Whether a radius is an array of radii, and no number."""
    return hasattr(radius, "__dlpack__") and not isinstance(radius, np.generic)


def check_clouds(points: Clouds, lengths: Any, name: str, lengths_name: str) -> tuple[int, ...]:
    """The lengths of the clouds in points [N, d] or [B, n, d], d = 2 or 3, or of an index."""
    if isinstance(points, NeighborIndex):
        if lengths is not None:
            raise ValueError(f"{name} is a NeighborIndex, which knows its lengths: leave {lengths_name} out.")
        return points.lengths
    found = _arrays.check_points(points, lengths, name, lengths_name, dimensions=(2, 3))
    shape = points.shape
    if (rows := shape[0] if len(shape) == 2 else shape[0] * shape[1]) > MAX_POINTS:
        raise ValueError(f"{name} must be at most 2**31 - 1, because indices are int32, got {rows}: cut them up.")
    return found


def check_pair(
    a: Clouds, a_name: str, a_lengths: Sequence[int], b: Clouds, b_name: str, b_lengths: Sequence[int]
) -> None:
    """Raise an error unless both have the same device, number of coordinates and number of clouds."""
    if not isinstance(a, Spec) and not isinstance(b, Spec) and a.origin.device != b.origin.device:
        _arrays.check_same_device(**{a_name: a.origin, b_name: b.origin})
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{a_name} and {b_name} must have as many coordinates, got {a.shape[-1]} and {b.shape[-1]}.")
    if len(a_lengths) != len(b_lengths):
        raise ValueError(
            f"{a_name} and {b_name} must have as many clouds, got {len(a_lengths)} and {len(b_lengths)}: "
            "cloud b of one belongs to cloud b of the other."
        )


def check_no_empty_cloud(lengths: Sequence[int], name: str, cure: str = "") -> None:
    """Raise a ValueError that names the first empty cloud, if there is one. `cure` is what else helps."""
    if 0 in lengths:
        raise ValueError(
            f"clouds must not be empty, because then there is no nearest point: got cloud {lengths.index(0)} "
            f"of {name} with no point. Leave it out{cure}."
        )


def check_max_entries(max_entries: Any) -> int | None:
    """max_entries as an int, or None."""
    if max_entries is None:
        return None
    checked = _arrays.check_integer(max_entries, "max_entries")
    if checked < 0:
        raise ValueError(f"max_entries must not be negative, got {checked}.")
    if checked > MAX_ENTRIES:
        raise ValueError(f"max_entries must be at most 2**40, got {_arrays.shown(checked)}: take a smaller radius.")
    return checked


def _check_search(
    query: Given | Spec, points: Clouds, query_lengths: Any, lengths: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lengths of queries and points."""
    lengths = check_clouds(points, lengths, "points", "lengths")
    query_lengths = check_clouds(query, query_lengths, "query", "query_lengths")
    check_pair(query, "query", query_lengths, points, "points", lengths)
    return query_lengths, lengths


def _check_exclude_self(exclude_self: Any, query_lengths: tuple[int, ...], lengths: tuple[int, ...]) -> bool:
    """exclude_self as a bool; then the lengths must be the same."""
    if _arrays.check_flag(exclude_self, "exclude_self") and query_lengths != lengths:
        for b, (n, m) in enumerate(zip(query_lengths, lengths, strict=True)):
            if n != m:
                raise ValueError(
                    f"exclude_self needs as many queries as points, because it leaves point i out for query i: got {n} "
                    f"and {m} of cloud {b}."
                )
    return bool(exclude_self)


def _check_radius(radius: Any, query: Given | Spec, query_lengths: Sequence[int]) -> float:
    """A radius as a float. Radii are checked, as far as their values are known, and stand for inf."""
    if isinstance(radius, (Given, Spec)):
        if isinstance(radius, Given) and isinstance(query, Given):
            _arrays.check_same_device(query=query.origin, radius=radius.origin)
        if radius.shape != (n := sum(query_lengths),):
            raise ValueError(
                f"radius must be a number or have one for each query, [{n}], got an array of shape "
                f"{list(radius.shape)}."
            )
        _arrays.check_floats(radius, "radius")
        if isinstance(radius, Given) and radius.device is None and not (good := radius.array >= 0).all():
            row = int(good.argmin())
            raise ValueError(f"radius must not be negative or NaN, got radius[{row}] = {float(radius.array[row])}.")
        return math.inf
    checked = _arrays.check_number(radius, "radius", " or an array with one for each query")
    if not checked >= 0:
        raise ValueError(f"radius must not be negative or NaN, got {_arrays.shown(radius)}.")
    return checked


class Nearest(NamedTuple):
    """The checked options of a search for the nearest neighbours, within a radius that is infinite for `knn`."""

    query_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    k: int
    radius: float  # inf if each query has its own
    exclude_self: bool


def check_knn(
    query: Given | Spec,
    points: Clouds,
    k: Any,
    query_lengths: Any,
    lengths: Any,
    exclude_self: Any,
    radius: Any = math.inf,
    name: str = "k",
) -> Nearest:
    """The options of a search for the nearest neighbours, checked against the shapes and dtypes of the arrays.

    For `radius_search`, `radius` is its number or the array of radii, and k its max_neighbors, which is the `name` of k
    in errors.
    """
    query_lengths, lengths = _check_search(query, points, query_lengths, lengths)
    k = _arrays.check_integer(k, name)
    if not 1 <= k <= reference.MAX_K:
        raise ValueError(f"{name} must be from 1 to {reference.MAX_K}, got {_arrays.shown(k)}.")
    checked = _check_radius(radius, query, query_lengths)
    return Nearest(query_lengths, lengths, k, checked, _check_exclude_self(exclude_self, query_lengths, lengths))


def check_max_neighbors(max_neighbors: Any, max_entries: Any) -> bool:
    """Whether a `radius_search` has max_neighbors; then max_entries is an error."""
    if max_neighbors is not None and max_entries is not None:
        raise ValueError(
            f"max_entries and max_neighbors exclude each other, got {_arrays.shown(max_entries)} and "
            f"{_arrays.shown(max_neighbors)}: leave max_entries out; with max_neighbors the size is fixed."
        )
    return max_neighbors is not None


class Radius(NamedTuple):
    """The checked options of `radius_search` without max_neighbors."""

    query_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    radius: float  # inf if each query has its own
    max_entries: int | None
    exclude_self: bool


def check_radius(
    query: Given | Spec,
    points: Clouds,
    radius: Any,
    query_lengths: Any,
    lengths: Any,
    max_entries: Any,
    exclude_self: Any,
) -> Radius:
    """The options of `radius_search`. `radius` is a number, or the array of radii."""
    query_lengths, lengths = _check_search(query, points, query_lengths, lengths)
    checked, room = _check_radius(radius, query, query_lengths), check_max_entries(max_entries)
    return Radius(query_lengths, lengths, checked, room, _check_exclude_self(exclude_self, query_lengths, lengths))


def check_knn_backward(
    ddistances: Given | Spec,
    query: Given | Spec,
    points: Given | Spec,
    distances: Given | Spec,
    indices: Given | Spec,
    query_lengths: Any,
    lengths: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the arrays of a search by `knn` and the gradient of its distances; return the lengths."""
    checked = _check_search(query, points, query_lengths, lengths)
    if distances.ndim != 2:
        raise ValueError(f"distances must be those of knn, [N, k], got {list(distances.shape)}.")
    made = knn_results(sum(checked[0]), distances.shape[1], distance_dtype(query, points))
    _check_found(made, {"distances": distances, "indices": indices})
    _check_gradient(ddistances, distances)
    arrays = {"query": query, "points": points, "ddistances": ddistances, "distances": distances, "indices": indices}
    _arrays.check_same_device(**{name: x.origin for name, x in arrays.items() if isinstance(x, Given)})
    return checked


def check_radius_backward(
    ddistances: Given | Spec,
    query: Given | Spec,
    points: Given | Spec,
    offsets: Given | Spec,
    indices: Given | Spec,
    distances: Given | Spec,
    query_lengths: Any,
    lengths: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the arrays of a `radius_search` and the gradient of its distances; return the lengths."""
    checked = _check_search(query, points, query_lengths, lengths)
    made = radius_results(sum(checked[0]), math.prod(distances.shape), distance_dtype(query, points))
    found = {"offsets": offsets, "indices": indices, "distances": distances}
    _check_found(made, found)
    _check_gradient(ddistances, distances)
    arrays = {"query": query, "points": points, "ddistances": ddistances, **found}
    _arrays.check_same_device(**{name: x.origin for name, x in arrays.items() if isinstance(x, Given)})
    return checked


def _check_found(made: Sequence[Spec], arrays: dict[str, Given | Spec]) -> None:
    """Check that arrays can be results of a search."""
    for wanted, (name, x) in zip(made, arrays.items(), strict=True):
        if (x.shape, x.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"{name} must be those of the search, {wanted.dtype} {list(wanted.shape)}, got {x.dtype} "
                f"{list(x.shape)}."
            )


def _check_gradient(ddistances: Given | Spec, distances: Given | Spec) -> None:
    if ddistances.shape != distances.shape:
        raise ValueError(
            f"ddistances must have the shape of distances, {list(distances.shape)}, got {list(ddistances.shape)}."
        )
    _arrays.check_floats(ddistances, "ddistances")


# ---- arrays --------------------------------------------------------------------------------------------------------


def distance_dtype(query: Clouds, points: Clouds) -> np.dtype:
    """What a search computes in, and what its distances and losses are: float64 if one of the arrays is that."""
    return FLOAT64 if FLOAT64 in (query.dtype, points.dtype) else FLOAT32


def knn_results(queries: Any, k: int, dtype: np.dtype = FLOAT32) -> tuple[Spec, Spec]:
    """The specs of distances and indices; the number of queries may be a symbol."""
    return Spec((queries, k), dtype), Spec((queries, k), INT32)


_kept_results = functools.lru_cache(maxsize=256)(knn_results)  # for numbers of queries that are ints


def _limits(radii: Given | None, checked: Nearest | Radius) -> cuda.Limits:
    """What a search finds, for its plan."""
    return cuda.Limits(checked.radius, None if radii is None else radii.spec, checked.exclude_self)


def _reach(radii: Given | None, checked: Nearest | Radius) -> Any:
    """The radius on the host, or the radii."""
    return checked.radius if radii is None else radii.array


def knn_arrays(query: Given, points: Given | NeighborIndex, radii: Given | None, checked: Nearest) -> list[Any]:
    """The arrays distances and indices, of the query's library."""
    origin, (query_lengths, lengths, k, _, exclude_self) = query.origin, checked
    if origin.device is None:
        reach, wide = _reach(radii, checked), distance_dtype(query, points) == FLOAT64
        clouds = trees(points, lengths, wide)
        found = reference.knn(packed(query, wide), query_lengths, clouds, k, reach, exclude_self)
        return [_arrays.leave(x, origin) for x in found]
    inputs, index, same = _inputs(query, query_lengths, points, lengths, radii)
    device, limits = launcher.device(origin.device), _limits(radii, checked)
    of_query = query.spec
    of_points = of_query if same else points.spec
    call = cuda.knn(of_query, query_lengths, of_points, lengths, k, device, limits=limits, index=index, same=same)
    return launcher.launch(call, inputs, _kept_results(sum(query_lengths), k, distance_dtype(query, points)), origin)


def radius_results(queries: Any, entries: Any, dtype: np.dtype = FLOAT32) -> tuple[Spec, Spec, Spec]:
    """The specs of offsets, indices and distances; the numbers of queries and entries may be symbols."""
    return Spec((queries + 1,), INT64), Spec((entries,), INT32), Spec((entries,), dtype)


def radius_arrays(query: Given, points: Given | NeighborIndex, radii: Given | None, checked: Radius) -> list[Any]:
    """The arrays offsets, indices and distances, of the query's library."""
    origin, (query_lengths, lengths, radius, max_entries, exclude_self) = query.origin, checked
    if origin.device is None:
        reach, wide = _reach(radii, checked), distance_dtype(query, points) == FLOAT64
        clouds = trees(points, lengths, wide)
        arrays = reference.radius_search(packed(query, wide), query_lengths, clouds, reach, max_entries, exclude_self)
        return [_arrays.leave(x, origin) for x in arrays]
    inputs, index, same = _inputs(query, query_lengths, points, lengths, radii)
    device, n, limits = launcher.device(origin.device), sum(query_lengths), _limits(radii, checked)
    dtype = distance_dtype(query, points)
    arguments = query.spec, query_lengths, points.spec, lengths, limits
    if max_entries is not None:
        call = cuda.radius(*arguments, max_entries, device, index=index, same=same)
        return launcher.launch(call, inputs, radius_results(n, max_entries, dtype))
    # A first call counts the neighbours, the host reads their number, and a second call writes them.
    here = working_origin(origin)
    call, kept = cuda.radius_count(*arguments, device, index=index, same=same)
    specs = Spec((n + 1,), INT64), Spec((1,), INT64), *kept
    offsets, total, *ready = [_arrays.read(array, "a result") for array in launcher.launch(call, inputs, specs, here)]
    entries = int(_arrays.download(total)[0])  # synchronizes
    if entries > reference.MAX_PAIRS:
        counts = np.diff(_arrays.download(offsets))
        row = int(counts.argmax())
        given = radius if radii is None else _arrays.download(radii)
        raise reference.too_many_entries(given, entries, row, int(counts[row]))
    memory = inputs[1] if index else ready[-1]
    call = cuda.radius_fill(query_lengths, dtype == FLOAT64, lengths, limits, entries)
    inputs = offsets, memory if same else ready[0], memory, *inputs[2:]
    found = launcher.launch(call, inputs, radius_results(n, entries, dtype)[1:], origin)
    return [offsets.array if here is origin else _arrays.leave(offsets.array, origin), *found]


def backward_results(query: Given | Spec, points: Given | Spec) -> tuple[Spec, Spec]:
    """The specs of the gradients of query and points, for both kinds of search."""
    return Spec(query.shape, query.dtype), Spec(points.shape, points.dtype)


def knn_backward_arrays(
    ddistances: Given,
    query: Given,
    points: Given,
    distances: Given,
    indices: Given,
) -> list[Any]:
    """The gradients of query and points, of the query's library. ddistances is the gradient of the distances."""
    inputs = ddistances, query, points, distances, indices
    if query.origin.device is None:
        return _backward_on_the_host(reference.knn_backward, inputs)
    specs = ddistances.spec, query.spec, points.spec, distances.spec, indices.spec
    call = cuda.knn_backward(*specs)
    return launcher.launch(call, inputs, backward_results(query, points), query.origin)


def radius_backward_arrays(
    ddistances: Given,
    query: Given,
    points: Given,
    offsets: Given,
    indices: Given,
    distances: Given,
) -> list[Any]:
    """The same for `radius_search`. If max_entries was too small, both gradients are NaN."""
    inputs = ddistances, query, points, offsets, indices, distances
    if query.origin.device is None:
        return _backward_on_the_host(reference.radius_backward, inputs)
    specs = ddistances.spec, query.spec, points.spec, offsets.spec, indices.spec, distances.spec
    call = cuda.radius_backward(*specs)
    return launcher.launch(call, inputs, backward_results(query, points), query.origin)


def _backward_on_the_host(backward: Any, inputs: tuple[Given, ...]) -> list[Any]:
    ddistances, query, points, *found = inputs
    given = ddistances.array.astype(distance_dtype(query, points), copy=False)
    arrays = backward(given, packed(query), packed(points), *[x.array for x in found])
    return [_arrays.leave(x.reshape(of.shape), query.origin) for x, of in zip(arrays, (query, points), strict=True)]


def packed(points: Given, wide: bool = False) -> np.ndarray:
    """The points [N, d] on the host, in float64 if `wide`."""
    rows = points.array.reshape(-1, points.shape[-1])
    return rows.astype(FLOAT64, copy=False) if wide else rows


def trees(points: Given | NeighborIndex, lengths: tuple[int, ...], wide: bool = False) -> tuple[reference.Cloud, ...]:
    """Clouds on the host, ready to be searched in float64 if `wide`, else in float32."""
    if isinstance(points, NeighborIndex):
        if wide == (points.dtype == FLOAT64):
            return points.search
        points = points.given
    return reference.index(packed(points), lengths, wide)


def _search_of(points: Given, lengths: tuple[int, ...]) -> Any:
    """The `search` of a NeighborIndex."""
    origin = points.origin
    if origin.device is None:
        return reference.index(packed(points), lengths, points.dtype == FLOAT64)
    call = cuda.neighbor_index(points.spec, lengths, launcher.device(origin.device))
    specs = (cuda.index_memory(points.spec, lengths),)
    (memory,) = launcher.launch(call, (points,), specs, working_origin(origin))
    return _arrays.read(memory, "the index")


def working_origin(origin: Origin) -> Origin:
    """The library whose memory holds data for a later call. Not JAX: its arrays would be copied, and have no int64."""
    return Origin("cupy", origin.device) if origin.library == "jax" else origin


def _inputs(
    query: Given,
    query_lengths: tuple[int, ...],
    points: Given | NeighborIndex,
    lengths: tuple[int, ...],
    radii: Given | None,
) -> tuple[tuple[Given, ...], bool, bool]:
    """The inputs of a search on a GPU, whether the points are an index, and whether the queries are the points."""
    searched = memory = points.given if isinstance(points, NeighborIndex) else points
    # An index of float32 points is of no use for a search in float64.
    if index := isinstance(points, NeighborIndex) and distance_dtype(query, points) in (FLOAT32, points.dtype):
        memory = points.search
    same = query[:4] == searched[:4] and query_lengths == lengths  # shape, dtype, strides and address
    return (query, memory) if radii is None else (query, memory, radii), index, same
