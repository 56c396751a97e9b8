# SPDX-License-Identifier: Apache-2.0
"""Fewer points of a cloud: farthest point sampling, and the mean of each voxel.

Both are exact: the same indices, and the same sums in the same order, on CPU and GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu3d import _arrays
from gpu3d._arrays import INT32, INT64, Given, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda import sampling as cuda
from gpu3d.neighbors import check_clouds, packed, working_origin
from gpu3d.reference import sampling as reference

MAX_INDICES = 2**31 - 1  # indices are int32


class VoxelPoints(NamedTuple):
    """The voxels of a batch of clouds, in the order of their first points; the result of `voxel_downsample`."""

    points: Any  # [V, 3], in the dtype of the points
    features: Any  # [V, ...], in the dtype of the features; None without features
    counts: Any  # int32 [V], points of each voxel
    point_to_voxel: Any  # int32 [N], the voxel of each point; -1 for a point with NaN or inf
    lengths: tuple[int, ...]  # voxels of each cloud, which sum to V


def farthest_points(points: Any, k: int, *, lengths: Sequence[int] | None = None, start: int = 0) -> Any:
    """Take k points of each cloud that are far from each other: farthest point sampling.

    Parameters
    ----------
    points : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
    k : int
        Points to take of each cloud, at least 1.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud.
    start : int
        The first point that is taken, counted in each cloud.

    Returns
    -------
    array int32 [B * k]
        Indices into the packed points, k for each cloud in the order in which they are taken. A cloud that has fewer
        finite points fills up with -1. They are an array of the library of `points`. The same call gives the same
        indices on CPU and GPU.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure. So is a `start`
        behind the last point of a cloud; an empty cloud has no start, and gives -1.

    Notes
    -----
    Each next point is the one whose smallest d2 to the points taken so far is largest, ties to the lowest index, among
    finite points that are not yet taken. d2 = (dx*dx + dy*dy) + dz*dz, each operation rounded once: in float64 for
    float64 points, otherwise in float32. These are exactly the points of the loop over all distances.

    A point with NaN or inf is never taken. If the start is one, all indices of its cloud are -1.

    Indices have no gradient: pass points that require grad as ``points.detach()``. Gather the points by the indices
    for a gradient. A call never waits for the GPU. After a first call it can be captured in a CUDA graph. On a GPU a
    cloud is the work of one multiprocessor, so many clouds take as long as the largest of them.

    References
    ----------
    Eldar, Lindenbaum, Porat and Zeevi, The farthest point strategy for progressive image sampling, IEEE Transactions
    on Image Processing, 1997. Han et al., QuickFPS, IEEE TCAD, 2023, for the pruning by buckets.

    Examples
    --------
    >>> points = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0], [2, 0, 0]], np.float32)
    >>> gpu3d.farthest_points(points, 3)
    array([0, 2, 3], dtype=int32)
    >>> gpu3d.farthest_points(points, 3, lengths=[2, 2])
    array([ 0,  1, -1,  2,  3, -1], dtype=int32)
    """
    if (interop := _arrays.interop_of(points)) is not None:
        return interop.farthest_points(points, k, lengths=lengths, start=start)
    given = _arrays.read(points, "points")
    return farthest_arrays(given, *check_farthest(given, k, lengths, start))[0]


def voxel_downsample(
    points: Any,
    size: float,
    features: Any = None,
    *,
    lengths: Sequence[int] | None = None,
    reduce: str = "mean",
) -> VoxelPoints:
    """Replace the points in each voxel of a grid by their mean, and reduce their features.

    Parameters
    ----------
    points : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
    size : float
        The side of a voxel, in the unit of the points.
    features : array [N, ...], optional
        One row for each point, of any trailing shape: float32, float64, float16 or bfloat16, on the points' device. For
        points [B, n, 3] they are [B, n, ...].
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud.
    reduce : {"mean", "sum", "min", "max"}
        How the features of the points in a voxel become the feature of the voxel.

    Returns
    -------
    VoxelPoints
        ``points`` [V, 3], ``features`` [V, ...] or None, ``counts`` int32 [V], ``point_to_voxel`` int32 [N], and
        ``lengths``, how many of the V voxels each cloud has. Voxels are in the order of their first points. The arrays
        are of the library of `points`. The same call gives the same bits on CPU and GPU.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        An argument is not what is listed above, a cloud's grid has more than 2**63 voxels, or the call is inside of
        a program or a CUDA graph that is being recorded; the message says what was received and the cure.

    Notes
    -----
    On each axis a point is in voxel floor((x - min) / size) of its cloud's grid, which begins at the minimum of the
    cloud's finite coordinates. These are the voxels of `bucketize` with ``voxel_size=size``, without its limit of
    65536: each operation is rounded once in float32. For float64 points the minimum is subtracted in float64 before.

    A voxel's point is its first point plus the mean of the differences from it, so that coordinates far from 0 keep
    their precision. Sums are in the order of the points, in float64 for float64 and otherwise in float32. "min" and
    "max" propagate NaN. A point with NaN or inf is in no voxel, and its features are not read.

    The call synchronizes, because the host reads the number of voxels. So it cannot be captured in a CUDA graph, and
    runs outside of jax.jit and torch.compile. It has no gradients. `point_to_voxel` gives the same means with
    gradients: add the rows up by it with the functions of your framework, and divide by the counts.

    Examples
    --------
    >>> points = np.array([[0, 0, 0], [1, 1, 1], [0.5, 0, 0]], np.float32)
    >>> voxels = gpu3d.voxel_downsample(points, 0.75, np.array([1, 2, 5], np.float32))
    >>> voxels.points
    array([[0.25, 0.  , 0.  ],
           [1.  , 1.  , 1.  ]], dtype=float32)
    >>> voxels.features, voxels.counts, voxels.point_to_voxel, voxels.lengths
    (array([3., 2.], dtype=float32), array([2, 1], dtype=int32), array([0, 1, 0], dtype=int32), (2,))
    """
    _arrays.refuse_programs("voxel_downsample")
    _arrays.refuse_gradients("voxel_downsample", points=points, features=features)
    given = _arrays.read(points, "points")
    rows = None if features is None else _arrays.read(features, "features")
    return voxel_arrays(given, rows, *check_voxels(given, size, rows, lengths, reduce))


# ---- checks --------------------------------------------------------------------------------------------------------


class Farthest(NamedTuple):
    """The checked options of `farthest_points`."""

    lengths: tuple[int, ...]
    k: int
    start: int


def check_farthest(points: Given | Spec, k: Any, lengths: Any, start: Any) -> Farthest:
    """The options of `farthest_points`, checked against the shape and dtype of the points."""
    lengths = check_clouds(points, lengths, "points", "lengths")
    k, start = _arrays.check_integer(k, "k"), _arrays.check_integer(start, "start")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {_arrays.shown(k)}.")
    if k * len(lengths) > MAX_INDICES or k > MAX_INDICES:
        raise ValueError(
            f"k must be at most 2**31 - 1 points of all clouds together, got k = {_arrays.shown(k)} for "
            f"{len(lengths)} clouds: take fewer."
        )
    if not 0 <= start <= MAX_INDICES:
        raise ValueError(f"start must be a point of each cloud, from 0 on, got {_arrays.shown(start)}.")
    if start:
        for b, n in enumerate(lengths):
            if 0 < n <= start:
                raise ValueError(
                    f"start must be a point of each cloud, got {start} for the {n} points of cloud {b}: it is counted "
                    f"in each cloud, so take at most {n - 1}."
                )
    return Farthest(lengths, k, start)


class Voxels(NamedTuple):
    """The checked options of `voxel_downsample`."""

    lengths: tuple[int, ...]
    size: float
    reduce: str


def check_voxels(points: Given | Spec, size: Any, features: Given | Spec | None, lengths: Any, reduce: Any) -> Voxels:
    """The options of `voxel_downsample`, checked against the shapes and dtypes of the arrays."""
    lengths = check_clouds(points, lengths, "points", "lengths")
    size = _arrays.check_number(size, "size")
    if not 2.0**-126 <= size < 2.0**127:
        raise ValueError(f"size must be a positive float32 number, got {size}.")
    _arrays.check_choice(reduce, reference.REDUCTIONS, "reduce")
    if features is not None:
        if isinstance(points, Given) and isinstance(features, Given):
            _arrays.check_same_device(points=points.origin, features=features.origin)
        _arrays.check_floats(features, "features")
        if features.shape[: points.ndim - 1] != points.shape[:-1]:
            raise ValueError(
                f"features must have a row for each point, {[*points.shape[:-1], '...']}, got shape "
                f"{list(features.shape)}."
            )
    return Voxels(lengths, size, reduce)


# ---- arrays --------------------------------------------------------------------------------------------------------


def farthest_results(clouds: Any, k: Any) -> tuple[Spec]:
    """The spec of the indices; the numbers may be symbols."""
    return (Spec((clouds * k,), INT32),)


_kept_results = functools.lru_cache(maxsize=256)(farthest_results)  # for numbers that are ints


def farthest_arrays(points: Given, lengths: tuple[int, ...], k: int, start: int) -> list[Any]:
    """The indices, as an array of the points' library."""
    origin = points.origin
    if origin.device is None:
        return [_arrays.leave(reference.farthest_points(packed(points), lengths, k, start), origin)]
    call = cuda.farthest_points(points.spec, lengths, k, start, launcher.device(origin.device))
    return launcher.launch(call, (points,), _kept_results(len(lengths), k), origin)


def voxel_arrays(
    points: Given, features: Given | None, lengths: tuple[int, ...], size: float, reduce: str
) -> VoxelPoints:
    """The voxels, as arrays of the points' library."""
    origin, n = points.origin, sum(lengths)
    trailing = () if features is None else features.shape[points.ndim - 1 :]
    if origin.device is None:
        rows = None if features is None else features.array.reshape(n, *trailing)
        found = reference.voxel_downsample(packed(points), size, rows, lengths, reduce)
        centres, reduced, sizes, voxel = (None if x is None else _arrays.leave(x, origin) for x in found[:4])
        return VoxelPoints(centres, reduced, sizes, voxel, found.lengths)
    launcher.refuse_capture("voxel_downsample", origin)
    # A first call finds the voxels, the host reads their number, and a second call writes their points and features.
    here = working_origin(origin)
    specs = Spec((n,), INT32), Spec((n,), INT32), Spec((n + 1,), INT32), Spec((len(lengths),), INT64)
    results = launcher.launch(cuda.voxels(points.spec, lengths, size), (points,), specs, here)
    point_to_voxel, members, starts, before = [_arrays.read(x, "a result") for x in results]
    ends = _arrays.download(before).tolist()  # synchronizes
    if -1 in ends:
        raise reference.too_many_voxels(size, ends.index(-1))
    counts = tuple([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
    call = cuda.voxel_rows(points.spec, None if features is None else features.spec, sum(counts), reduce)
    inputs, made = [points, members, starts], list(voxel_results(points, sum(counts)))
    if features is not None:
        inputs.append(features)
        made.append(Spec((sum(counts), *trailing), features.dtype))
    found_points, found_counts, *found_features = launcher.launch(call, inputs, made, origin)
    kept = point_to_voxel.array if here is origin else _arrays.leave(point_to_voxel.array, origin)
    return VoxelPoints(found_points, found_features[0] if found_features else None, found_counts, kept, counts)


def voxel_results(points: Given | Spec, voxels: int) -> tuple[Spec, Spec]:
    """The specs of the points and counts of the voxels."""
    return Spec((voxels, points.shape[-1]), points.dtype), Spec((voxels,), INT32)
