# SPDX-License-Identifier: Apache-2.0
"""Exact neighbours: the k nearest points, all within a radius, and the Chamfer distance with its gradients.

Nothing is approximated: distances and indices are those of brute force, to the bit, and the same on CPU and GPU.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays, _clouds, _cuda
from gpu3d.buckets import sort_cuda
from gpu3d.reference import neighbors as reference
from gpu3d.reference.buckets import HASHES

MAX_POINTS = 2**31 - 1  # indices are int32


class Neighbors(NamedTuple):
    """The nearest points of each query, in order of (distance, index); the result of `knn`."""

    distances: Any  # float32 [N, k]; NaN where there is no neighbour
    indices: Any  # int32 [N, k], into the packed points; -1 where there is no neighbour


class RadiusNeighbors(NamedTuple):
    """The points within a radius, in order of (query, index); the result of `radius_search`.

    Those of query i are entries ``offsets[i]`` to ``offsets[i + 1]``. A search with max_entries that finds more is
    flagged, never cut: every offset is minus the number found, every index -1 and every distance NaN.
    """

    offsets: Any  # int64 [N + 1]; JAX makes them int32 unless jax_enable_x64 is set
    indices: Any  # int32 [entries], into the packed points
    distances: Any  # float32 [entries]


class ChamferGradients(NamedTuple):
    """The result of `chamfer_value_and_grad`."""

    loss: Any  # float32 [] or [B]
    gradients: tuple[Any, Any]  # of x and of y, in their shapes and dtypes


@dataclass(frozen=True, eq=False)
class NeighborIndex:
    """Clouds made ready to be searched many times, by `neighbor_index`. Stands in for `points`, and for x and y.

    Attributes
    ----------
    points : array [N, 2 or 3]
        The points, packed, as NumPy or CuPy array. A view of what was given, where that is possible: while the index is
        in use they must not change.
    lengths : tuple of int
        Points of each cloud.
    shape : tuple of int
        Of the array that was given.
    origin : Origin
        The library and device of that array.
    search : object
        What the search keeps: trees on the CPU, buckets and boxes on a GPU.
    """

    points: Any
    lengths: tuple[int, ...]
    shape: tuple[int, ...]
    origin: _arrays.Origin
    search: Any


def neighbor_index(points: Any, *, lengths: Sequence[int] | None = None) -> NeighborIndex:
    """Make clouds ready to be searched, once for any number of searches.

    Parameters
    ----------
    points : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud.

    Returns
    -------
    NeighborIndex
        To be given to `knn`, `radius_search` and `chamfer` in place of the points and their lengths.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
    >>> index = gpu3d.neighbor_index(points)
    >>> for radius in (0.1, 0.2):
    ...     print(len(gpu3d.radius_search(points[:10], index, radius).indices))
    42
    217
    """
    return _index(points, _entered(points, lengths, "points", "lengths"))


def knn(
    query: Any,
    points: Any,
    k: int,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> Neighbors:
    """The k nearest points of each query, in its own cloud.

    Parameters
    ----------
    query : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
        Not differentiated. Queries of cloud b search cloud b of `points`.
    points : array [M, 3], [M, 2], [B, m, 3], [B, m, 2] or NeighborIndex
        Where to search: as many coordinates, on the same device. The dtypes may differ.
    k : int
        1 to 64, and no larger than a cloud that is searched.
    query_lengths, lengths : sequence of int, optional
        Queries and points of each cloud, host integers. Default: one cloud. With a NeighborIndex, `lengths` is left
        out.

    Returns
    -------
    Neighbors
        ``distances`` float32 [N, k] and ``indices`` int32 [N, k] into the packed points: ``points[indices[i, j]]`` is
        the j-th nearest of ``query[i]``. Of the kind of `query`. The same call gives the same bits, on CPU and GPU.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Distances are the square root of d2 = (dx*dx + dy*dy) + dz*dz of float32 differences, each operation rounded once;
    the order is that of (d2, index). A query that is one of the points finds it. Coordinates enter as float32; where
    `points` are float64, the minimum of the query's cloud there is subtracted from both in float64 first, so that map
    coordinates keep their millimetres.

    A point with NaN or inf (in float32) is nobody's neighbour. A query with NaN or inf, and one whose cloud has fewer
    than k finite points, gets index -1 and distance NaN where there is no neighbour.

    No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32)
    >>> distances, indices = gpu3d.knn(np.array([[2, 0, 0]], np.float32), points, k=2)
    >>> distances, indices
    (array([[1., 2.]], dtype=float32), array([[1, 0]], dtype=int32))
    """
    searched = _entered(points, lengths, "points", "lengths")
    query, query_lengths, origin = _entered_query(query, query_lengths, searched)
    k = _arrays.check_integer(k, "k")
    if not 1 <= k <= reference.MAX_K:
        raise ValueError(f"k must be from 1 to {reference.MAX_K}, got {k}.")
    for b, (queries, n) in enumerate(zip(query_lengths, searched.lengths, strict=True)):
        if k > n and queries:
            raise ValueError(f"k must be no larger than a cloud, got k = {k} for the {n} points of cloud {b}.")
    with _arrays.on(origin):
        index = _index(points, searched)
        if origin.device is None:
            distances, indices = reference.knn(query, query_lengths, index.search, k)
        else:
            distances, indices = _knn_cuda(query, query_lengths, index, k)
        return Neighbors(_arrays.leave(distances, origin), _arrays.leave(indices, origin))


def radius_search(
    query: Any,
    points: Any,
    radius: float,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    max_entries: int | None = None,
) -> RadiusNeighbors:
    """All points within a radius of each query, in its own cloud.

    Parameters
    ----------
    query : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `knn`.
    points : array [M, 3], [M, 2], [B, m, 3], [B, m, 2] or NeighborIndex
        As in `knn`.
    radius : float
        Not negative; inf finds all finite points.
    query_lengths, lengths : sequence of int, optional
        As in `knn`.
    max_entries : int, optional
        Room for the neighbours of all queries together. Default: exactly as many as there are.

    Returns
    -------
    RadiusNeighbors
        ``offsets`` int64 [N + 1], ``indices`` int32 and ``distances`` float32 [entries], in order of (query, index):
        the neighbours of ``query[i]`` are ``indices[offsets[i]:offsets[i + 1]]``. Of the kind of `query`. With
        max_entries, ``indices`` and ``distances`` have that length and end in -1 and NaN; if there is not room for all,
        every index is -1, every distance NaN, and every offset minus the number of neighbours.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure. Without max_entries,
        also more than 64 * (N + M) neighbours: the message names the query that has most.

    Notes
    -----
    A point is kept if d2 <= r*r, where d2 is that of `knn`, r is the radius rounded to float32, and r*r rounds to
    float32 once more (inf, if it is too large for float32). What is said there of float64 and of NaN holds here too.

    Without max_entries the number of neighbours is read by the host: it synchronizes. With max_entries it does not, and
    can be captured in a CUDA graph after a first call.

    Examples
    --------
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32)
    >>> offsets, indices, distances = gpu3d.radius_search(points, points, 1.0)
    >>> offsets, indices
    (array([0, 2, 4, 5]), array([0, 1, 0, 1, 2], dtype=int32))
    >>> gpu3d.radius_search(points, points, 1.0, max_entries=4).offsets
    array([-5, -5, -5, -5])
    """
    searched = _entered(points, lengths, "points", "lengths")
    query, query_lengths, origin = _entered_query(query, query_lengths, searched)
    radius = _checked_radius(radius)
    max_entries = _checked_max_entries(max_entries)
    with _arrays.on(origin):
        index = _index(points, searched)
        if origin.device is None:
            arrays = reference.radius_search(query, query_lengths, index.search, radius, max_entries)
        else:
            arrays = _radius_search_cuda(query, query_lengths, index, radius, max_entries)
        return RadiusNeighbors(*(_arrays.leave(array, origin) for array in arrays))


def chamfer(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
) -> Any:
    """The Chamfer distance: mean distance from x to its nearest in y, plus mean distance from y to its nearest in x.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        Coordinates: float32, float64, float16 or bfloat16, on one device. As many clouds in both, none of them empty.
    x_lengths, y_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud. Left out with a NeighborIndex.
    squared : bool
        Squared distances instead of distances.
    reduction : {"mean", "sum", "none"}
        Over the clouds.

    Returns
    -------
    array float32 [], or [B] for reduction "none"
        Of the kind of x. The same call gives the same bits, on CPU and GPU alike.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Distances are those of `knn`, summed in float64 in a fixed order. A point with NaN or inf makes the loss NaN. The
    mean over no clouds is NaN. No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[0, 0, 2]], np.float32)
    >>> gpu3d.chamfer(x, y, squared=True)
    array(8.5, dtype=float32)
    """
    (loss,) = _chamfer(x, y, x_lengths, y_lengths, squared, reduction, "loss")
    return loss


def chamfer_value_and_grad(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
) -> ChamferGradients:
    """The Chamfer distance, and its gradients with respect to x and y.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        As in `chamfer`.
    x_lengths, y_lengths : sequence of int, optional
        As in `chamfer`.
    squared : bool
        As in `chamfer`.
    reduction : {"mean", "sum", "none"}
        Over the clouds. With "none" each cloud's gradient is that of its own loss.

    Returns
    -------
    ChamferGradients
        ``loss`` as of `chamfer`, and ``gradients``: that of x and that of y, each in the shape, dtype and kind of its
        array.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Of several nearest points, the one of the lowest index takes the gradient; at distance 0 it is 0. A point with NaN
    or inf has gradient NaN and changes nobody else's. Deterministic: the pulls on a point are added as integers of 2
    raised to a fixed power, which gives one result in any order. No host sync; capturable in a CUDA graph after a first
    call.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[0, 0, 2]], np.float32)
    >>> loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, squared=True)
    >>> dx
    array([[ 0.,  0., -6.],
           [ 1.,  0., -2.]], dtype=float32)
    >>> dy
    array([[-1.,  0.,  8.]], dtype=float32)
    """
    loss, dx, dy = _chamfer(x, y, x_lengths, y_lengths, squared, reduction, "gradients")
    return ChamferGradients(loss, (dx, dy))


def chamfer_found(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None,
    y_lengths: Sequence[int] | None,
    squared: bool,
    reduction: str,
) -> tuple[Any, Any]:
    """`chamfer`, and what was found on the way, int32 [2 * (N + M + B)], which is for `chamfer_backward`."""
    loss, found = _chamfer(x, y, x_lengths, y_lengths, squared, reduction, "found")
    return loss, found


def chamfer_backward(
    dloss: Any,
    x: Any,
    y: Any,
    found: Any,
    *,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
) -> tuple[Any, Any]:
    """The gradients of x [N, d] and y [M, d], of which `chamfer_found` says what it found; `dloss` is of its loss."""
    entered_x, entered_y = _entered(x, x_lengths, "x", "x_lengths"), _entered(y, y_lengths, "y", "y_lengths")
    (dloss, of_dloss), (found, of_found) = _arrays.enter(dloss, "dloss"), _arrays.enter(found, "found")
    origin = entered_x.origin
    _check_pair(entered_x, "x", entered_y, "y")
    _arrays.check_same_device(x=origin, dloss=of_dloss, found=of_found)
    words = reference.found_parts(entered_x.lengths, entered_y.lengths)[-1]
    if found.shape != (words,) or found.dtype != np.int32:
        raise ValueError(f"found must be int32 [{words}], of the same clouds, got {found.dtype} {list(found.shape)}.")
    if dloss.shape != ((len(x_lengths),) if reduction == "none" else ()):
        raise ValueError(f"dloss must have the loss's shape, got {list(dloss.shape)} for reduction {reduction!r}.")
    with _arrays.on(origin):
        sides = _side_of(entered_x), _side_of(entered_y)
        dx, dy = _gradients(dloss.astype(np.float32, copy=False), *sides, found, squared, reduction)
        return _arrays.leave(dx, origin), _arrays.leave(dy, origin)


def _chamfer(
    x: Any, y: Any, x_lengths: Any, y_lengths: Any, squared: Any, reduction: Any, what: str
) -> tuple[Any, ...]:
    """The loss, and behind it what `what` says: nothing for "loss", what was "found", or both "gradients"."""
    entered_x, entered_y = _entered(x, x_lengths, "x", "x_lengths"), _entered(y, y_lengths, "y", "y_lengths")
    _check_pair(entered_x, "x", entered_y, "y")
    if not isinstance(squared, (bool, np.bool_)):
        raise TypeError(f"squared must be True or False, got {squared!r}.")
    _arrays.check_choice(reduction, reference.REDUCTIONS, "reduction")
    _check_no_empty_cloud(entered_x, "x")
    _check_no_empty_cloud(entered_y, "y")
    origin = entered_x.origin
    with _arrays.on(origin):
        x_index, y_index = _pair(x, entered_x, y, entered_y)
        options = bool(squared), reduction
        if origin.device is None:
            loss, found = reference.chamfer(x_index.points, x_index.search, y_index.points, y_index.search, *options)
        else:
            loss, found = _chamfer_cuda(x_index, y_index, *options)
        left = [_arrays.leave(loss, origin)]
        if what == "found":
            left.append(_arrays.leave(found, origin))
        if what == "gradients":
            gradients = _gradients(None, _side_of(x_index), _side_of(y_index), found, *options)
            for gradient, entered in zip(gradients, (entered_x, entered_y), strict=True):
                left.append(_arrays.leave(gradient.reshape(entered.shape), entered.origin))
        return tuple(left)


class _Side(NamedTuple):
    """One of the two batches of clouds of a Chamfer distance, on the way back."""

    points: Any  # [N, 2 or 3]
    lengths: tuple[int, ...]
    origins: Any = None  # of the search in these points, on a GPU
    clouds: bytes = b""  # struct Clouds, likewise
    held: Any = None  # the memory that is named there


def _side_of(clouds: NeighborIndex | _Entered) -> _Side:
    points, lengths = clouds.points, clouds.lengths
    if clouds.origin.device is None:
        return _Side(points, lengths)
    if isinstance(clouds, NeighborIndex):
        search = clouds.search
        return _Side(points, lengths, search.origins, search.own.clouds, search.own.held)
    return _Side(points, lengths, origins_cuda(points, lengths), *_clouds.pack(_layout(lengths).batch, TILE))


def _gradients(dloss: Any, x: _Side, y: _Side, found: Any, squared: bool, reduction: str) -> tuple[Any, Any]:
    """Those of x and y as packed, in their dtypes; `dloss` is None for 1."""
    if isinstance(found, np.ndarray):
        return reference.chamfer_backward(dloss, x.points, y.points, found, x.lengths, y.lengths, squared, reduction)
    return _chamfer_backward_cuda(dloss, x, y, found, squared, reduction)


# ---- checks --------------------------------------------------------------------------------------------------------


class _Entered(NamedTuple):
    """Checked clouds, not yet made ready to be searched."""

    points: Any
    lengths: tuple[int, ...]
    shape: tuple[int, ...]
    origin: _arrays.Origin


def _entered(points: Any, lengths: Any, name: str, lengths_name: str) -> _Entered:
    if isinstance(points, NeighborIndex):
        if lengths is not None:
            raise ValueError(f"{name} is a NeighborIndex, which knows its lengths: leave {lengths_name} out.")
        return _Entered(points.points, points.lengths, points.shape, points.origin)
    native, origin = _arrays.enter(points, name)
    shape = tuple(native.shape)
    native, lengths = _arrays.check_points(native, lengths, name, lengths_name, dimensions=(2, 3))
    if native.shape[0] > MAX_POINTS:
        raise ValueError(
            f"{name} must be at most 2**31 - 1, for indices are int32, got {native.shape[0]}: cut them up."
        )
    return _Entered(native, lengths, shape, origin)


def _entered_query(query: Any, lengths: Any, searched: _Entered) -> tuple[Any, tuple[int, ...], _arrays.Origin]:
    if isinstance(query, NeighborIndex):
        raise TypeError("query must be an array, got NeighborIndex: an index stands in for points only.")
    entered = _entered(query, lengths, "query", "query_lengths")
    _check_pair(entered, "query", searched, "points")
    return entered.points, entered.lengths, entered.origin


def _check_pair(a: _Entered, a_name: str, b: _Entered, b_name: str) -> None:
    """The same device, number of coordinates and number of clouds."""
    if a.origin.device != b.origin.device:
        _arrays.check_same_device(**{a_name: a.origin, b_name: b.origin})
    if a.points.shape[1] != b.points.shape[1]:
        raise ValueError(
            f"{a_name} and {b_name} must have as many coordinates, got {a.points.shape[1]} and {b.points.shape[1]}."
        )
    if len(a.lengths) != len(b.lengths):
        raise ValueError(
            f"{a_name} and {b_name} must have as many clouds, got {len(a.lengths)} and {len(b.lengths)}: "
            "cloud b of one belongs to cloud b of the other."
        )


def _check_no_empty_cloud(entered: _Entered, name: str) -> None:
    if 0 in entered.lengths:
        raise ValueError(
            f"clouds must not be empty, for then there is no nearest point: got cloud {entered.lengths.index(0)} "
            f"of {name} with no point. Leave it out."
        )


def _checked_max_entries(max_entries: Any) -> int | None:
    if max_entries is not None and (max_entries := _arrays.check_integer(max_entries, "max_entries")) < 0:
        raise ValueError(f"max_entries must not be negative, got {max_entries}.")
    return max_entries


def _checked_radius(radius: Any) -> float:
    if isinstance(radius, (bool, np.bool_)) or not isinstance(radius, (int, float, np.integer, np.floating)):
        raise TypeError(f"radius must be a number, got {radius!r} of type {type(radius).__name__}.")
    if math.isnan(radius) or radius < 0:
        raise ValueError(f"radius must not be negative or NaN, got {radius}.")
    return float(radius)


def _index(points: Any, entered: _Entered) -> NeighborIndex:
    """The index that `points` is, or that of what was entered."""
    if isinstance(points, NeighborIndex):
        return points
    with _arrays.on(entered.origin):
        build = _index_cuda if entered.origin.device is not None else reference.index
        return NeighborIndex(*entered, build(entered.points, entered.lengths))


def _pair(x: Any, entered_x: _Entered, y: Any, entered_y: _Entered) -> tuple[NeighborIndex, NeighborIndex]:
    """Both indices; on a GPU made together, unless one is given or they have origins of their own."""
    together = not any(
        isinstance(points, NeighborIndex) or entered.origin.device is None or entered.points.dtype == np.float64
        for points, entered in ((x, entered_x), (y, entered_y))
    )
    if not together:
        return _index(x, entered_x), _index(y, entered_y)
    searches = pair_cuda(entered_x.points, entered_x.lengths, entered_y.points, entered_y.lengths, None)
    return NeighborIndex(*entered_x, searches[0]), NeighborIndex(*entered_y, searches[1])


# ---- CUDA ----------------------------------------------------------------------------------------------------------

TILE = 32  # points; and tiles of a node, nodes of a branch
NODE = reference.SUM_TILE  # points, of which an index keeps a box and a Chamfer distance a sum
INDEX_THREADS = NODE // 4
BRANCH_THREADS = KNN_THREADS = RADIUS_THREADS = 128
CHAMFER_THREADS = 256
QUERIES, QUERIES_OF_FEW = 8, 2  # that a warp takes; fewer where k <= 2, for all wait in the end for the slowest warp
FEWEST_WARPS = 8192  # for which there is work, before a warp takes more

_FLOAT, _INT32, _INT64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
_INDEX = struct.Struct("<QQQQ")  # struct Index of neighbors.cuh
INDEX_FORMAT = f"{_INDEX.size}s"
_SUMMED = struct.Struct("<4Q")  # struct Summed of neighbors_chamfer.cu, and so the next two
_PULLED = struct.Struct("<7Q")
_ASKED = struct.Struct("<Qqi4x")
_ROW_BYTES, _BOX_BYTES = 16, 48
_ZORDER_DIV = ("KEY", HASHES.index("zorder_div"))

# The parameters of each kernel: formats of the module struct; c, x, s, p and a are structs, see _FORMATS.
_SIGNATURES = {
    "index_nodes": "QQQciQQQQ",
    "index_branches": "QciQ",
    "index_join": "QqQqQ",
    "knn": "QciixciiQQ",
    "knn_both": "QciixQQQciixQQQ",
    "radius_count": "QcixcfQ",
    "radius_fill": "QcixcfQiqQ",
    "radius_sort": "QiqQQQQ",
    "chamfer_tiles": "sscci",
    "chamfer_losses": "ssccQQQQiii",
    "chamfer_give": "ppcci",
    "chamfer_gradient": "ppccia",
}
_FORMATS = {
    "c": _clouds.FORMAT,
    "x": INDEX_FORMAT,
    "s": f"{_SUMMED.size}s",
    "p": f"{_PULLED.size}s",
    "a": f"{_ASKED.size}s",
}


def configurations() -> list[_cuda.Configuration]:
    """Every module this file can ask for."""
    points = [(("POINT", p),) for p in range(len(_arrays.FLOATS))]
    found = [
        _cuda.Configuration(file, macros) for file in ("neighbors_index", "neighbors_chamfer") for macros in points
    ]
    found += [_cuda.Configuration("neighbors_knn", (("LISTS", lists),)) for lists in range(3)]
    return [*found, _cuda.Configuration("neighbors_radius")]


@functools.lru_cache(maxsize=256)
def _kernel(device: int, function: str, macros: _cuda.Macros) -> _cuda.Kernel:
    """A kernel of neighbors_<prefix of its name>.cu, for the current device, which is `device`."""
    signature = "".join(_FORMATS.get(kind, kind) for kind in _SIGNATURES[function])
    return _cuda.kernel("neighbors_" + function.split("_")[0], function, signature, macros)


def _launch(
    function: str,
    device: int,
    grid: int,
    *args: int | float | bytes,
    block: int,
    macros: _cuda.Macros = (),
) -> None:
    _cuda.launch(_kernel(device, function, macros), grid=grid, block=block, args=args)


class _Layout(NamedTuple):
    """Where clouds lie in tiles, nodes and branches, and what is kept of them in one allocation."""

    batch: _clouds.Batch
    slots: int
    nodes: int
    branches: int  # 0 where no cloud has more than one
    ends: tuple[int, ...]  # of rows and, of an index, boxes of tiles, nodes and branches


@functools.lru_cache(maxsize=256)
def _layout(lengths: tuple[int, ...]) -> _Layout:
    tiles = -(-np.array(lengths, np.int64) // TILE)
    nodes = -(-tiles // TILE)
    branches = -(-nodes // TILE)
    batch = _clouds.batch(lengths, TILE, nodes, branches)
    slots, kept = int(tiles.sum()) * TILE, batch.groups if branches.max(initial=0) > 1 else 0
    boxes = (_BOX_BYTES * count for count in (slots // TILE, batch.tiles, kept))
    return _Layout(batch, slots, batch.tiles, kept, _cuda.ends(_ROW_BYTES * slots, *boxes))


class Queries(NamedTuple):
    """Points on a GPU, in an order in which neighbours stand side by side, ready to search an index."""

    rows: int  # address of struct Row [slots], relative to the origins of the clouds that they search
    layout: _Layout
    clouds: bytes  # struct Clouds of the layout
    held: tuple[Any, ...]  # the memory that is named here


class Search(NamedTuple):
    """What a NeighborIndex keeps on a GPU."""

    own: Queries  # its points, relative to `origins`
    packed: bytes  # struct Index
    origins: Any  # float64 [clouds, 3], else None


def _point_macro(points: Any) -> tuple[str, int]:
    return "POINT", _arrays.FLOATS.index(points.dtype)


def _xyz(points: Any) -> Any:
    """Contiguous coordinates [N, 3]; z = 0 where points are 2-D."""
    import cupy

    if points.shape[1] == 3:
        return cupy.ascontiguousarray(points)
    padded = cupy.zeros((points.shape[0], 3), points.dtype)
    padded[:, :2] = points
    return padded


def origins_cuda(points: Any, lengths: tuple[int, ...]) -> Any:
    """The minimum of each cloud's finite coordinates, which float64 coordinates are taken relative to; else None."""
    if points.dtype != np.float64:
        return None
    import cupy

    finite = cupy.where(cupy.isfinite(points), points, np.inf)
    origins, end = cupy.zeros((len(lengths), 3), np.float64), 0
    for b, n in enumerate(lengths):
        end += n
        if n:
            low = finite[end - n : end].min(axis=0)
            origins[b, : points.shape[1]] = cupy.where(cupy.isfinite(low), low, 0)
    return origins


def _rows(
    batches: Sequence[tuple[Any, tuple[int, ...]]], origins: Any, boxes: bool = False
) -> tuple[Queries, tuple[int, ...]]:
    """Points [N, 2 or 3] of any strides and float dtype; and the boxes of their tiles, nodes and branches, if asked.

    They are of one batch, or of two of one dtype and as many clouds, whose indices count from 0 each.
    """
    lengths = tuple(n for _, of_batch in batches for n in of_batch)
    layout = _layout(lengths)
    memory, (rows, *of_boxes) = _cuda.allocate(layout.ends if boxes else layout.ends[:2])
    clouds, table = _clouds.pack(layout.batch, TILE)
    queries = Queries(rows, layout, clouds, (memory, table))
    if layout.slots == 0:
        return queries, tuple(of_boxes)
    arrays, order, address = [_xyz(points) for points, _ in batches], 0, 0
    if max(lengths) > NODE:  # else index_nodes, which puts the points of a node into order, does it all
        points = _joined(*arrays) if len(arrays) > 1 else arrays[0]
        _held, (order, inverse) = _cuda.workspace(4 * layout.slots, 4 * sum(lengths))
        sort_cuda(points, (_point_macro(points), _ZORDER_DIV), 0.0, TILE, lengths, order, inverse, 0)
    if origins is not None:
        arrays, address = [x.astype(np.float64, copy=False) for x in arrays], origins.data.ptr
    device, macros = arrays[0].data.device_id, (_point_macro(arrays[0]),)
    of_points = arrays[0].data.ptr, arrays[-1].data.ptr, order
    args = *of_points, clouds, len(batches[0][1]), address, rows, *(of_boxes[:2] or (0, 0))
    _launch("index_nodes", device, layout.nodes, *args, block=INDEX_THREADS, macros=macros)
    if boxes and layout.branches:
        grid = -(-layout.branches // (BRANCH_THREADS // 32))
        args = of_boxes[1], clouds, layout.branches, of_boxes[2]
        _launch("index_branches", device, grid, *args, block=BRANCH_THREADS, macros=macros)
    return queries, tuple(of_boxes)


def _joined(first: Any, second: Any) -> Any:
    """Two contiguous float arrays [n, 3], one behind the other, in one launch."""
    import cupy

    joined = cupy.ndarray((first.shape[0] + second.shape[0], 3), first.dtype)
    args = first.data.ptr, first.size, second.data.ptr, joined.size, joined.data.ptr
    grid, macros = -(-joined.size // INDEX_THREADS), (_point_macro(joined),)
    _launch("index_join", joined.data.device_id, grid, *args, block=INDEX_THREADS, macros=macros)
    return joined


def pair_cuda(
    x: Any, x_lengths: tuple[int, ...], y: Any, y_lengths: tuple[int, ...], origins: Any
) -> tuple[Search, Search]:
    """Two batches of as many clouds, relative to the same origins: made ready together, in half the launches."""
    if x.shape[0] + y.shape[0] > MAX_POINTS:
        raise ValueError(
            f"two batches on a GPU must be at most 2**31 - 1 points together, got {x.shape[0]} and {y.shape[0]}: pass "
            "fewer clouds at a time."
        )
    if x.dtype != y.dtype or x.dtype == np.float64:
        dtype = np.float32 if origins is None else np.float64
        x, y = x.astype(dtype, copy=False), y.astype(dtype, copy=False)
    both, boxes = _rows([(x, x_lengths), (y, y_lengths)], origins, boxes=True)
    searches, before = [], (0, 0, 0)  # slots, nodes and branches
    for lengths in (x_lengths, y_lengths):
        layout = _layout(lengths)
        clouds, table = _clouds.pack(layout.batch, TILE)
        slots, nodes, branches = before
        rows = both.rows + _ROW_BYTES * slots
        tiles, of_nodes, of_branches = (
            address + _BOX_BYTES * count for address, count in zip(boxes, (slots // TILE, nodes, branches), strict=True)
        )
        packed = _INDEX.pack(rows, tiles, of_nodes, of_branches if both.layout.branches else 0)
        own = Queries(rows, layout, clouds, (*both.held, table))
        searches.append(Search(own, packed, origins))
        before = layout.slots, layout.nodes, layout.batch.groups
    return searches[0], searches[1]


def _index_cuda(points: Any, lengths: tuple[int, ...]) -> Search:
    """What NeighborIndex.search holds of points [N, 2 or 3], of any strides and float dtype."""
    origins = origins_cuda(points, lengths)
    own, (tiles, nodes, branches) = _rows([(points, lengths)], origins, boxes=True)
    return Search(own, _INDEX.pack(own.rows, tiles, nodes, branches if own.layout.branches else 0), origins)


def _queries(query: Any, lengths: tuple[int, ...], index: NeighborIndex) -> Queries:
    """What searches the index; its own rows where the queries are its points."""
    if query is index.points and lengths == index.lengths:
        return index.search.own
    return _rows([(query, lengths)], index.search.origins)[0]


def _grouped(queries: Queries, k: int) -> tuple[tuple[Any, ...], int]:
    """What a search takes of its queries, and in how many blocks."""
    slots, most = queries.layout.slots, QUERIES if k > 2 else QUERIES_OF_FEW
    group = min(most, 1 << max(0, (slots // FEWEST_WARPS).bit_length() - 1))
    return (queries.rows, queries.clouds, slots, group), -(-slots // (KNN_THREADS // 32 * group))


def _nearest(
    device: int, queries: Queries, search: Search, k: int, squared: bool, distances: int, indices: int
) -> None:
    """Writes distances, or their squares, and indices [queries, k] to these addresses."""
    macros = (("LISTS", 0 if k == 1 else -(-k // 32)),)
    of_queries, blocks = _grouped(queries, k)
    args = *of_queries, search.packed, search.own.clouds, k, squared, distances, indices
    _launch("knn", device, blocks, *args, block=KNN_THREADS, macros=macros)


def _knn_cuda(query: Any, query_lengths: tuple[int, ...], index: NeighborIndex, k: int) -> tuple[Any, Any]:
    """Distances float32 [N, k] and indices int32 [N, k]."""
    import cupy

    queries = _queries(query, query_lengths, index)
    shape = query.shape[0], k
    distances, indices = cupy.ndarray(shape, _FLOAT), cupy.ndarray(shape, _INT32)
    device = distances.data.device_id
    _nearest(device, queries, index.search, k, False, distances.data.ptr, indices.data.ptr)
    return distances, indices


def _radius_search_cuda(
    query: Any, query_lengths: tuple[int, ...], index: NeighborIndex, radius: float, max_entries: int | None
) -> tuple[Any, Any, Any]:
    """Offsets int64 [N + 1], indices int32 and distances float32 [entries]."""
    import cupy

    queries, search = _queries(query, query_lengths, index), index.search
    n, slots, warps = query.shape[0], queries.layout.slots, RADIUS_THREADS // 32
    radius2 = float(reference.squared_radius(radius))
    walk = queries.rows, queries.clouds, slots, search.packed, search.own.clouds, radius2
    run = functools.partial(_launch, block=RADIUS_THREADS)
    offsets = cupy.zeros(n + 1, _INT64)
    counts = cupy.ndarray((n,), _INT64)
    device = counts.data.device_id
    run("radius_count", device, -(-slots // warps), *walk, counts.data.ptr)
    cupy.cumsum(counts, out=offsets[1:])
    room = max_entries
    if room is None:
        room = int(offsets[-1])  # synchronizes
        limit = reference.ENTRIES_A_POINT * (n + index.points.shape[0])
        if room > limit:
            row = int(counts.argmax())
            raise reference.too_many_entries(radius, room, limit, row, int(counts[row]))
    indices, distances = cupy.ndarray((room,), _INT32), cupy.ndarray((room,), _FLOAT)
    entries, spare = cupy.ndarray((room,), _INT64), cupy.ndarray((room,), _INT64)
    run("radius_fill", device, -(-slots // warps), *walk, offsets.data.ptr, n, room, entries.data.ptr)
    sort = offsets.data.ptr, n, room, entries.data.ptr, spare.data.ptr, indices.data.ptr, distances.data.ptr
    run("radius_sort", device, max(1, -(-n // warps)) if room else 0, *sort)
    if max_entries is not None:
        offsets = cupy.where(offsets[-1] > room, -offsets[-1], offsets)
    return offsets, indices, distances


def _chamfer_cuda(x_index: NeighborIndex, y_index: NeighborIndex, squared: bool, reduction: str) -> tuple[Any, Any]:
    """The loss float32 [] or [B], and what was found."""
    import cupy

    clouds, indices, searches = len(x_index.lengths), (x_index, y_index), (x_index.search, y_index.search)
    parts = reference.found_parts(x_index.lengths, y_index.lengths)
    loss = cupy.ndarray((clouds,) if reduction == "none" else (), _FLOAT)
    found = cupy.ndarray((parts[-1],), _INT32)
    device, sides, searched, blocks, nodes = loss.data.device_id, [], [], 0, 0
    # Of each side the tiles' sums, and the largest of their distances; then the losses of all clouds, and how many of
    # them are known.
    sizes = [size for search in searches for size in (8 * search.own.layout.nodes, 4 * search.own.layout.nodes)]
    memory, places = _cuda.workspace(*sizes, 8 * clouds, 4)
    losses, known = places[4:]
    held = []
    for i, (index, other) in enumerate((indices, indices[::-1])):
        queries = index.search.own
        if index.search.origins is not None or other.search.origins is not None:
            queries = _queries(index.points, index.lengths, other)
        nearest, d2, largest = (found.data.ptr + 4 * part for part in parts[3 * i : 3 * i + 3])
        of_queries, of_side = _grouped(queries, 1)
        searched += [*of_queries, index.search.packed, d2, nearest]
        sides.append(_SUMMED.pack(d2, *places[2 * i : 2 * i + 2], largest))
        held.append(queries)
        blocks, nodes = blocks + of_side, nodes + index.search.own.layout.nodes
    _launch("knn_both", device, max(1, blocks), *searched, known, block=KNN_THREADS, macros=(("LISTS", 0),))
    both, macros = (*sides, *(search.own.clouds for search in searches)), (_point_macro(x_index.points),)
    tiled = nodes > 2 * clouds
    if tiled:  # else chamfer_losses does it
        _launch("chamfer_tiles", device, nodes, *both, squared, block=NODE, macros=macros)
    of_clouds = (loss.data.ptr, 0) if reduction == "none" else (0, loss.data.ptr)
    args = losses, known, *of_clouds, clouds if reduction == "mean" else 1, tiled, squared
    _launch("chamfer_losses", device, max(1, clouds), *both, *args, block=NODE, macros=macros)
    del memory, held  # held until here
    return loss, found


def _chamfer_backward_cuda(
    dloss: Any, x: _Side, y: _Side, found: Any, squared: bool, reduction: str
) -> tuple[Any, Any]:
    import cupy

    common = x.points.dtype
    if y.points.dtype != common:
        common = np.dtype(np.float64 if np.float64 in (common, y.points.dtype) else np.float32)
    arrays = [_xyz(side.points.astype(common, copy=False)) for side in (x, y)]
    counts, parts = [array.shape[0] for array in arrays], reference.found_parts(x.lengths, y.lengths)
    given = cupy.ndarray((3 * sum(counts),), _INT64)
    _cuda.clear(given.data, given.nbytes)
    gradients, sides = [cupy.ndarray(array.shape, common) for array in arrays], []
    for i, side in enumerate((x, y)):
        origins = 0 if side.origins is None else side.origins.data.ptr
        of_search = (found.data.ptr + 4 * part for part in parts[3 * i : 3 * i + 3])
        to = given.data.ptr + 24 * i * counts[0], gradients[i].data.ptr
        sides.append(_PULLED.pack(arrays[i].data.ptr, origins, *of_search, *to))
    device, grid, macros = found.data.device_id, -(-sum(counts) // CHAMFER_THREADS), (_point_macro(arrays[0]),)
    both = sides[0], sides[1], x.clouds, y.clouds, squared
    _launch("chamfer_give", device, grid, *both, block=CHAMFER_THREADS, macros=macros)
    asked = (0, 0) if dloss is None else (dloss.data.ptr, dloss.strides[0] // 4 if dloss.ndim else 0)
    args = *both, _ASKED.pack(*asked, len(x.lengths) if reduction == "mean" else 1)
    _launch("chamfer_gradient", device, grid, *args, block=CHAMFER_THREADS, macros=macros)
    dx, dy = (
        gradient[:, : side.points.shape[1]].astype(side.points.dtype, copy=False)
        for gradient, side in zip(gradients, (x, y), strict=True)
    )
    return dx, dy
