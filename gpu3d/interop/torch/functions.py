# SPDX-License-Identifier: Apache-2.0
"""The functions of gpu3d for tensors: signatures and results of the plain calls, with gradients.

Each function takes Buckets, Scopes and Pooling apart into tensors and lengths, calls an operator, and puts the results
together again. torch.compile traces through this. The operator checks the arguments. Only options of another type than
the operator's are checked here, because torch would convert them, or refuse them in its own words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from gpu3d import _arrays, attention, metrics, neighbors, pooling, sampling, surface, transport
from gpu3d import buckets as layouts
from gpu3d._arrays import Spec
from gpu3d.buckets import Buckets, Scopes
from gpu3d.chamfer import ChamferDistances, check_chamfer, check_points, distances_of, is_points, plain_chamfer
from gpu3d.interop.torch import operators
from gpu3d.interop.torch.operators import run
from gpu3d.metrics import CloudComparison
from gpu3d.neighbors import NeighborIndex, Neighbors, RadiusNeighbors
from gpu3d.pooling import Pooling
from gpu3d.surface import Normals

# ---- arguments -----------------------------------------------------------------------------------------------------


def _spec(x: torch.Tensor) -> Spec:
    """The spec of a tensor, for checks."""
    return Spec(tuple(x.shape), _arrays.numpy_dtype(x.dtype))


def _check_kind(x: torch.Tensor, name: str) -> None:
    """Raise a TypeError for tensors without an operator of gpu3d: sparse, quantized, or on other devices."""
    if x.layout is not torch.strided or x.is_quantized or not (x.is_cuda or x.is_cpu):
        _arrays.read(x, name)  # raises


def _tensor(x: Any, name: str) -> torch.Tensor:
    """The array, of any library, as a tensor of the same memory."""
    if isinstance(x, torch.Tensor):
        return x
    given = _arrays.read(x, name)
    if given.device is None and not given.array.flags.writeable:  # torch would warn about read-only memory
        return _arrays.leave(given.array.copy(), _arrays.Origin("torch", None))
    return _arrays.leave(given.array, _arrays.Origin("torch", given.device))


def _tensors(**named: Any) -> tuple[Any, ...]:
    """All arguments as tensors. An array of another library next to a tensor that requires grad is an error."""
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            _check_kind(x, name)
        elif x is not None:
            break
    else:
        return tuple(named.values())
    differentiated = [name for name, x in named.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    for name, x in named.items():
        if x is not None and not isinstance(x, torch.Tensor) and differentiated and torch.is_grad_enabled():
            first = differentiated[0]
            raise TypeError(
                f"{name} is of type {type(x).__name__} beside {first}, a tensor that requires grad: pass {name} as a "
                f"tensor too (torch.as_tensor), or {first}.detach()."
            )
    return _tensors(**{name: None if x is None else _tensor(x, name) for name, x in named.items()})


def _refuse_gradients(function: str, **named: Any) -> None:
    """Raise a TypeError for tensors that need a gradient, because `function` has none."""
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            _arrays.refuse_torch_gradient(function, name, x)


def _as(like: Any, x: torch.Tensor) -> Any:
    """The result in the library of the first argument, which is another one than torch if arrays were mixed."""
    if isinstance(like, torch.Tensor):
        return x
    return _arrays.passed_on(x, "torch", _arrays.read(like, "the argument").origin)


def _packed(
    x: torch.Tensor, lengths: Any, name: str, lengths_name: str, dimensions: Any = (2, 3)
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Points [N, d] or [B, n, d] as [N, d], and the lengths of their clouds."""
    lengths = _arrays.cloud_lengths(tuple(x.shape), lengths, name, lengths_name, dimensions)
    return (x.flatten(0, 1) if x.ndim == 3 else x), lengths


def _exact(*options: tuple[Any, ...]) -> bool:
    """Whether each option has one of the types that follow it. Under torch.compile the operator checks at run time."""
    return torch.compiler.is_compiling() or all([type(value) in types for value, *types in options])


# ---- buckets -------------------------------------------------------------------------------------------------------


def bucketize(
    points: Any,
    bucket_size: int = 512,
    *,
    lengths: Sequence[int] | None = None,
    hash: str = "zorder_div",
    balance: str = "spill",
    voxel_size: float | str | None = None,
    seed: int = 0,
    bounds: Any = None,
    check_finite: bool | None = None,
) -> Buckets:
    """`gpu3d.bucketize` of a tensor, under torch.compile too. Points that require grad are an error.

    Parameters
    ----------
    points : Tensor [N, 3] or [B, n, 3]
        As in `gpu3d.bucketize`. If they require grad, pass ``points.detach()``.
    bucket_size, lengths, hash, balance, voxel_size, seed, bounds, check_finite
        As in `gpu3d.bucketize`.

    Returns
    -------
    Buckets
        Its arrays are tensors.
    """
    _refuse_gradients("bucketize", points=points)
    _check_kind(points, "points")
    per_axis = isinstance(voxel_size, str) and voxel_size == "per_axis"
    cell = None if per_axis else voxel_size
    if not _exact((bucket_size, int), (hash, str), (balance, str), (cell, float, type(None)), (seed, int)):
        checked = layouts.check_bucketize(_spec(points), bucket_size, lengths, hash, balance, voxel_size, seed, None)
        _, bucket_size, hash, balance, voxel_size, seed, *_ = checked
        cell = None if per_axis else voxel_size
    packed, lengths = _packed(points, lengths, "points", "lengths", (3,))
    if check_finite is not None:
        check_finite = bool(check_finite)
    if not torch.compiler.is_compiling():  # under it the operator checks at run time
        bounds = layouts.check_bounds(bounds, _spec(points).dtype)
    robust, ends = isinstance(bounds, str) and bounds == "robust", None
    if bounds is not None and not robust:
        ends = tuple([float(x) for end in bounds for x in (end if isinstance(end, (tuple, list)) else (end,) * 3)])
    numbers = bucket_size, lengths, hash, balance, cell, per_axis, seed, robust, ends, check_finite
    return layouts.buckets_of(run(operators.BUCKETIZE, (packed,), numbers), lengths, bucket_size)


def scopes(buckets: Buckets, size: int = 8, *, shift: int = 0, stride: int = 1) -> Scopes:
    """`gpu3d.scopes` of a layout of tensors, under torch.compile too.

    A hand-made table is checked on the host: pass it to `gpu3d.scopes`.

    Parameters
    ----------
    buckets : Buckets
        With tensors.
    size, shift, stride : int
        As in `gpu3d.scopes`.

    Returns
    -------
    Scopes
        Its table is a tensor.
    """
    layouts.check_buckets(buckets)
    size, shift, stride = layouts.check_scopes(size, shift, stride)
    slot_to_point = _tensor(buckets.slot_to_point, "buckets")
    numbers = buckets.bucket_size, buckets.lengths, size, shift, stride
    table = run(operators.SCOPES, (slot_to_point,), numbers)
    return Scopes(table, size, shift, stride, buckets.bucket_size, buckets.bucket_offsets)


def scatter(x: Any, buckets: Buckets, fill: float = 0) -> torch.Tensor:
    """`Buckets.scatter` of a tensor: rows of points to slots. Its gradient is `gather` of the result's gradient.

    Parameters
    ----------
    x : Tensor [N, ...]
        One row per point, of any dtype and trailing shape.
    buckets : Buckets
        On x's device. Its arrays may be of another library.
    fill : scalar
        The value of padding slots.

    Returns
    -------
    Tensor [num_slots, ...]
    """
    layouts.check_buckets(buckets)
    return _move(x, "x", buckets.slot_to_point, buckets.point_to_slot, fill)


def gather(y: Any, buckets: Buckets) -> torch.Tensor:
    """`Buckets.gather` of a tensor: rows of slots to points. Its gradient is `scatter` of the result's gradient.

    Parameters
    ----------
    y : Tensor [num_slots, ...]
        One row per slot, of any dtype and trailing shape.
    buckets : Buckets
        On y's device. Its arrays may be of another library.

    Returns
    -------
    Tensor [N, ...]
    """
    layouts.check_buckets(buckets)
    return _move(y, "y", buckets.point_to_slot, buckets.slot_to_point, 0)


def _move(x: Any, name: str, index: Any, inverse: Any, fill: Any) -> torch.Tensor:
    x, index, inverse = _tensor(x, name), _tensor(index, "buckets"), _tensor(inverse, "buckets")
    _check_kind(x, name)
    if not _exact((fill, int, float)):
        fill = layouts.checked_fill(fill, _arrays.numpy_dtype(x.dtype)).item()
    return run(operators.MOVE_ROWS, (x, index, inverse), (fill, name))


# ---- attention -----------------------------------------------------------------------------------------------------


def bucket_attention(
    q: Any,
    k: Any,
    v: Any,
    buckets: Buckets,
    scopes: Scopes,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`gpu3d.bucket_attention` with gradients. Under autocast q, k and v are cast to its dtype.

    Parameters
    ----------
    q, k, v : Tensor [num_slots, H, D]
        As in `gpu3d.bucket_attention`. The parts of a packed projection are not copied.
    buckets : Buckets
        The layout of the slots.
    scopes : Scopes
        Which buckets attend to each other.
    scale, return_lse
        As in `gpu3d.bucket_attention`.

    Returns
    -------
    out : Tensor [num_slots, H, D]
    lse : Tensor float32 [num_slots, H]
        Only with return_lse. It has no gradient.
    """
    attention.check_layout(buckets, scopes)
    tensors = *_tensors(q=q, k=k, v=v), _tensor(scopes.table, "scopes")
    if not _exact((scale, float, type(None))):
        scale = attention.check_scale(scale, 1)
    numbers = buckets.bucket_size, buckets.lengths, scale
    out, lse = run(operators.ATTENTION, tensors, numbers)
    return (_as(q, out), _as(q, lse)) if return_lse else _as(q, out)


# ---- pooling -------------------------------------------------------------------------------------------------------


def bucket_pool(features: Any, points: Any, buckets: Buckets, *, ratio: int = 2, reduce: str = "mean") -> Pooling:
    """`gpu3d.bucket_pool` with the gradient of `features`. Points that require grad are an error.

    Parameters
    ----------
    features : Tensor [num_slots, C]
        As in `gpu3d.bucket_pool`. Autocast does not change their dtype.
    points : Tensor [num_slots, 3]
        As in `gpu3d.bucket_pool`. If they require grad, pass ``points.detach()``.
    buckets : Buckets
        The layout of the slots.
    ratio, reduce
        As in `gpu3d.bucket_pool`.

    Returns
    -------
    Pooling
        Its arrays are tensors.
    """
    layouts.check_buckets(buckets)
    _refuse_gradients("bucket_pool", points=points)
    features, points = _tensors(features=features, points=points)
    bucket_size, lengths = buckets.bucket_size, buckets.lengths
    if not _exact((ratio, int), (reduce, str)):
        ratio = pooling.check_pool(_spec(features), _spec(points), lengths, bucket_size, ratio, reduce)
    arrays = run(operators.POOL, (features, points), (bucket_size, lengths, ratio, reduce))
    # Under torch.compile lengths may be symbols.
    children = None if torch.compiler.is_compiling() else pooling.children_of(lengths, bucket_size, ratio)
    return pooling.pooling_of(arrays, buckets, ratio, reduce, children)


def bucket_unpool(child_features: Any, pooled: Pooling, skip: Any = None) -> Any:
    """`gpu3d.bucket_unpool` with the gradients of child_features and skip. Autocast does not change their dtype.

    Parameters
    ----------
    child_features : Tensor [child slots, C]
        As in `gpu3d.bucket_unpool`.
    pooled : Pooling
        The pooling to invert.
    skip : Tensor [num_slots, C], optional
        Rows in the parent's slots, in child_features' dtype. They are added to the result.

    Returns
    -------
    Tensor [num_slots, C]
    """
    pooling.check_pooling(pooled)
    child, added = _tensors(child_features=child_features, skip=skip)
    layout = pooled.parent
    numbers = layout.bucket_size, layout.lengths, pooled.ratio
    return _as(child_features, run(operators.UNPOOL, (child, _tensor(pooled.members, "pooled"), added), numbers))


# ---- neighbours ----------------------------------------------------------------------------------------------------


def knn(
    query: Any,
    points: Any,
    k: int,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    exclude_self: bool = False,
) -> Neighbors:
    """`gpu3d.knn` with the gradients of the distances. Under autocast query and points are cast to float32.

    Parameters
    ----------
    query, points : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.knn`. points may be a NeighborIndex, if query does not require grad.
    k, query_lengths, lengths, exclude_self
        As in `gpu3d.knn`.

    Returns
    -------
    Neighbors
        Tensors ``distances`` and ``indices``. Distances have gradients with respect to query and points. A distance of
        0 and a missing neighbour add nothing to them.
    """
    if isinstance(points, NeighborIndex):
        _refuse_gradients("knn with a NeighborIndex", query=query)
        given = neighbors.read_query(query)
        checked = neighbors.check_knn(given, points, k, query_lengths, lengths, exclude_self)
        return Neighbors(*neighbors.knn_arrays(given, points, None, checked))
    of_query, of_points = _tensors(query=query, points=points)
    if not _exact((k, int), (exclude_self, bool)):
        options = k, query_lengths, lengths, exclude_self
        checked = neighbors.check_knn(_spec(of_query), _spec(of_points), *options)
        k, exclude_self = checked.k, checked.exclude_self
    of_query, query_lengths = _packed(of_query, query_lengths, "query", "query_lengths")
    of_points, lengths = _packed(of_points, lengths, "points", "lengths")
    numbers = query_lengths, lengths, k, math.inf, exclude_self
    return Neighbors(*[_as(query, x) for x in run(operators.KNN, (of_query, of_points, None), numbers)])


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
    """`gpu3d.radius_search` with the gradients of the distances. Autocast casts query and points to float32.

    Parameters
    ----------
    query, points : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.radius_search`. points may be a NeighborIndex, if query does not require grad.
    radius : float, or Tensor [N]
        As in `gpu3d.radius_search`. Radii have no gradient: if they require grad, pass ``radius.detach()``.
    query_lengths, lengths, max_neighbors, exclude_self
        As in `gpu3d.radius_search`.
    max_entries : int, optional
        As in `gpu3d.radius_search`. Under torch.compile, and while a CUDA graph is captured, the host cannot read the
        number of neighbours. The default is then the number of all pairs or max(16 * (N + M), 2**18), whichever is
        smaller.

    Returns
    -------
    RadiusNeighbors
        Tensors ``offsets``, ``indices`` and ``distances``. Distances have gradients with respect to query and points. A
        distance of 0 adds nothing to them. If there are more neighbours than max_entries, both gradients are NaN.
    Neighbors
        With max_neighbors: tensors as those of `knn`.
    """
    _refuse_gradients("radius_search", radius=radius)
    if isinstance(points, NeighborIndex):
        _refuse_gradients("radius_search with a NeighborIndex", query=query)
        given = neighbors.read_query(query)
        options = query_lengths, lengths, max_entries, max_neighbors, exclude_self
        return neighbors.within(given, points, radius, *options)
    nearest, each = neighbors.check_max_neighbors(max_neighbors, max_entries), neighbors.is_array(radius)
    of_query, of_points, radii = _tensors(query=query, points=points, radius=radius if each else None)
    radius = math.inf if each else radius
    if not _exact(
        (radius, float), (max_entries, int, type(None)), (max_neighbors, int, type(None)), (exclude_self, bool)
    ):
        specs, sizes = (_spec(of_query), _spec(of_points)), (query_lengths, lengths)
        if nearest:
            max_neighbors = neighbors.check_knn(*specs, max_neighbors, *sizes, exclude_self, radius, "max_neighbors").k
        else:
            max_entries = neighbors.check_radius(*specs, radius, *sizes, max_entries, exclude_self).max_entries
        radius, exclude_self = float(radius), bool(exclude_self)
    of_query, query_lengths = _packed(of_query, query_lengths, "query", "query_lengths")
    of_points, lengths = _packed(of_points, lengths, "points", "lengths")
    tensors = of_query, of_points, radii
    if nearest:
        numbers = query_lengths, lengths, max_neighbors, radius, exclude_self
        return Neighbors(*[_as(query, x) for x in run(operators.KNN, tensors, numbers)])
    max_entries = _capacity(max_entries, of_query, query_lengths, lengths)
    numbers = query_lengths, lengths, radius, max_entries, exclude_self
    return RadiusNeighbors(*[_as(query, x) for x in run(operators.RADIUS_SEARCH, tensors, numbers)])


def _capacity(max_entries: int | None, x: torch.Tensor, x_lengths: Any, y_lengths: Any) -> int | None:
    """max_entries, or its default if the host cannot read the number of entries."""
    if max_entries is not None or not (torch.compiler.is_compiling() or _capturing(x)):
        return max_entries
    pairs = sum([n * m for n, m in zip(x_lengths, y_lengths, strict=True)])
    return min(pairs, max(16 * (sum(x_lengths) + sum(y_lengths)), 2**18))


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- sampling ------------------------------------------------------------------------------------------------------


def farthest_points(points: Any, k: int, *, lengths: Sequence[int] | None = None, start: int = 0) -> torch.Tensor:
    """`gpu3d.farthest_points` of a tensor, under torch.compile too. Points that require grad are an error.

    Parameters
    ----------
    points : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.farthest_points`. If they require grad, pass ``points.detach()``.
    k, lengths, start
        As in `gpu3d.farthest_points`.

    Returns
    -------
    Tensor int32 [B * k]
    """
    _refuse_gradients("farthest_points", points=points)
    _check_kind(points, "points")
    if not _exact((k, int), (start, int)):
        _, k, start = sampling.check_farthest(_spec(points), k, lengths, start)
    points, lengths = _packed(points, lengths, "points", "lengths")
    return run(operators.FARTHEST_POINTS, (points,), (lengths, k, start))


# ---- surfaces ------------------------------------------------------------------------------------------------------


def normals(
    points: Any,
    k: int = 16,
    *,
    lengths: Sequence[int] | None = None,
    viewpoint: Sequence[float] | None = None,
) -> Normals:
    """`gpu3d.normals` of a tensor, under torch.compile too. Points that require grad are an error.

    Parameters
    ----------
    points : Tensor [N, 3] or [B, n, 3]
        As in `gpu3d.normals`. If they require grad, pass ``points.detach()``. Autocast does not change their dtype.
    k, lengths, viewpoint
        As in `gpu3d.normals`.

    Returns
    -------
    Normals
        Tensors ``normals`` and ``curvature``.
    """
    _refuse_gradients("normals", points=points)
    _check_kind(points, "points")
    if not _exact((k, int)):
        k = surface.check_normals(_spec(points), k, lengths, viewpoint).k
    packed, lengths = _packed(points, lengths, "points", "lengths", (3,))
    seen_from = surface.check_viewpoint(viewpoint)
    numbers = lengths, k, None if seen_from is None else list(seen_from)  # torch takes tuples for lengths
    return Normals(*run(operators.NORMALS, (packed,), numbers))


# ---- losses --------------------------------------------------------------------------------------------------------


def chamfer(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
    direction: str = "both",
    empty: str = "error",
) -> Any:
    """`gpu3d.chamfer` with the gradients of x and y. Under autocast both are cast to float32.

    Parameters
    ----------
    x, y : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.chamfer`. One of them may be a NeighborIndex, if the other does not require grad.
    x_lengths, y_lengths, squared, reduction, direction, empty
        As in `gpu3d.chamfer`.

    Returns
    -------
    Tensor [], or [B] for reduction "none"
    ChamferDistances
        For reduction "points": tensors ``x`` and ``y``, whose gradients go to both clouds. A distance of 0 and one that
        is not finite add nothing to them.
    """
    if isinstance(x, NeighborIndex) or isinstance(y, NeighborIndex):
        _refuse_gradients("chamfer with a NeighborIndex", x=x, y=y)
        return plain_chamfer(x, y, x_lengths, y_lengths, squared, reduction, direction, empty)
    of_x, of_y = _tensors(x=x, y=y)
    points = is_points(reduction)
    if not _exact((squared, bool), (reduction, str), (direction, str), (empty, str)):
        given = _spec(of_x), _spec(of_y), x_lengths, y_lengths
        if points:
            squared = check_points(*given, squared, direction, empty).squared
        else:
            squared = check_chamfer(*given, squared, reduction, direction, empty).squared
    of_x, x_lengths = _packed(of_x, x_lengths, "x", "x_lengths")
    of_y, y_lengths = _packed(of_y, y_lengths, "y", "y_lengths")
    if points:
        numbers = x_lengths, y_lengths, squared, direction, empty
        distances, _ = run(operators.CHAMFER_POINTS, (of_x, of_y), numbers)
        return ChamferDistances(
            *[None if z is None else _as(x, z) for z in distances_of(distances, of_x.shape[0], direction)]
        )
    loss, _ = run(operators.CHAMFER, (of_x, of_y), (x_lengths, y_lengths, squared, reduction, direction, empty))
    return _as(x, loss)


def compare_clouds(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    thresholds: Sequence[float] = (),
) -> CloudComparison:
    """`gpu3d.compare_clouds` of tensors, under torch.compile too. Tensors that require grad are an error.

    Parameters
    ----------
    x, y : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        As in `gpu3d.compare_clouds`. If they require grad, pass ``x.detach()``.
    x_lengths, y_lengths, thresholds
        As in `gpu3d.compare_clouds`.

    Returns
    -------
    CloudComparison
        Of tensors.
    """
    _refuse_gradients("compare_clouds", x=x, y=y)
    if isinstance(x, NeighborIndex) or isinstance(y, NeighborIndex):
        return metrics.plain_compare_clouds(x, y, x_lengths, y_lengths, thresholds)
    of_x, of_y = _tensors(x=x, y=y)
    limits = list(metrics.check_thresholds(thresholds))
    of_x, x_lengths = _packed(of_x, x_lengths, "x", "x_lengths")
    of_y, y_lengths = _packed(of_y, y_lengths, "y", "y_lengths")
    found = run(operators.COMPARE_CLOUDS, (of_x, of_y), (x_lengths, y_lengths, limits))
    return CloudComparison(*[_as(x, z) for z in found])


def apml(
    pred: Any,
    target: Any,
    *,
    pred_lengths: Sequence[int] | None = None,
    target_lengths: Sequence[int] | None = None,
    p_min: float = 0.8,
    threshold: float = 1e-8,
    iterations: int = 20,
    symmetrize: str = "mean",
    reduction: str = "mean",
    max_entries: int | None = None,
) -> Any:
    """`gpu3d.apml` with the gradients of pred and target, the plan held constant. Under autocast both are float32.

    Parameters
    ----------
    pred, target : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.apml`.
    pred_lengths, target_lengths, p_min, threshold, iterations, symmetrize, reduction
        As in `gpu3d.apml`.
    max_entries : int, optional
        As in `gpu3d.apml`. Under torch.compile, and while a CUDA graph is captured, the host cannot read the number of
        entries. The default is then the number of all pairs or max(16 * (N + M), 2**18), whichever is smaller.

    Returns
    -------
    Tensor [], or [B] for reduction "none"
    """
    of_pred, of_target = _tensors(pred=pred, target=target)
    shares, names = ((p_min, float), (threshold, float)), ((symmetrize, str), (reduction, str))
    if not _exact(*shares, *names, (iterations, int), (max_entries, int, type(None))):
        options = p_min, threshold, iterations, symmetrize, reduction, max_entries
        checked = transport.check_apml(_spec(of_pred), _spec(of_target), pred_lengths, target_lengths, *options)
        p_min, threshold, iterations, symmetrize = checked.options
        max_entries = checked.max_entries
    of_pred, pred_lengths = _packed(of_pred, pred_lengths, "pred", "pred_lengths")
    of_target, target_lengths = _packed(of_target, target_lengths, "target", "target_lengths")
    max_entries = _capacity(max_entries, of_pred, pred_lengths, target_lengths)
    asked = torch.jit.is_tracing() or any([operators.may_need_gradient(x) for x in (of_pred, of_target)])
    with_grad = asked and torch.is_grad_enabled()
    options = p_min, threshold, iterations, symmetrize, reduction, max_entries
    numbers = pred_lengths, target_lengths, *options, with_grad
    return _as(pred, run(operators.APML, (of_pred, of_target), numbers)[0])


def emd(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    reduction: str = "mean",
) -> Any:
    """`gpu3d.emd` with the gradients of x and y, the assignment held constant. Under autocast both are float32.

    Parameters
    ----------
    x, y : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.emd`.
    x_lengths, y_lengths, reduction
        As in `gpu3d.emd`.

    Returns
    -------
    Tensor [], or [B] for reduction "none"

    Raises
    ------
    RuntimeError
        Under torch.compile(fullgraph=True), torch.jit.trace, and while a CUDA graph is captured. Without fullgraph
        torch.compile leaves the call out of its graph.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise RuntimeError(
            "emd assigns points on the host, which a compiled graph cannot do: call it outside of the compiled "
            "function, or compile without fullgraph=True. apml and chamfer can be compiled."
        )
    of_x, of_y = _tensors(x=x, y=y)
    if not _exact((reduction, str)):
        transport.check_emd(_spec(of_x), _spec(of_y), x_lengths, y_lengths, reduction)
    of_x, x_lengths = _packed(of_x, x_lengths, "x", "x_lengths")
    of_y, y_lengths = _packed(of_y, y_lengths, "y", "y_lengths")
    return _as(x, run(operators.EMD, (of_x, of_y), (x_lengths, y_lengths, reduction))[0])
