# SPDX-License-Identifier: Apache-2.0
"""The foreign calls: their checks, their results, what a GPU launches, and what the CPU computes.

A function of `CALLS` takes the specs of a call's arrays and its options, and checks them. It runs when a program is
traced. It runs again when a compiled program first runs, because the program may come from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays, attention, metrics, neighbors, pooling, sampling, surface, transport
from gpu3d import buckets as layouts
from gpu3d._arrays import INT32, INT64, UINT8, Given, Spec
from gpu3d.chamfer import (  # a from-import, because gpu3d.chamfer is the function
    chamfer_arrays,
    chamfer_backward_arrays,
    chamfer_backward_results,
    chamfer_results,
    check_chamfer,
    check_chamfer_backward,
    check_points,
    check_points_backward,
    points_arrays,
    points_backward_arrays,
    points_results,
)
from gpu3d.cuda import attention as cuda_attention
from gpu3d.cuda import buckets as cuda_buckets
from gpu3d.cuda import chamfer as cuda_chamfer
from gpu3d.cuda import metrics as cuda_metrics
from gpu3d.cuda import neighbors as cuda_neighbors
from gpu3d.cuda import pooling as cuda_pooling
from gpu3d.cuda import sampling as cuda_sampling
from gpu3d.cuda import surface as cuda_surface
from gpu3d.cuda import transport as cuda_transport
from gpu3d.cuda.plan import Call, Device
from gpu3d.reference.pooling import EXTREMES


class Work(NamedTuple):
    """A call whose arrays and options have been checked.

    Attributes
    ----------
    results : sequence of Spec
        The specs of the results.
    on_gpu : function
        From the specs of the arrays and the device to what a GPU launches. These specs may be misaligned.
    on_cpu : function
        From the arrays to the results on the CPU.
    """

    results: Sequence[Spec]
    on_gpu: Callable[..., Call]
    on_cpu: Callable[..., list[Any]]


Known = Given | Spec


def _check(name: str, x: Known, shape: tuple[int, ...], dtype: Any) -> None:
    """Check an array that comes from another call of the program."""
    if (x.shape, x.dtype) != (shape, dtype):
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}.")


# ---- buckets -------------------------------------------------------------------------------------------------------


def bucketize(points: Known, *, check_finite: bool | None, **options: Any) -> Work:
    """`gpu3d.bucketize` of packed points. Only the CPU checks that they are finite."""
    checked = layouts.check_bucketize(points, **options)
    return Work(
        layouts.results_of(checked.slots, points.shape[0]),
        lambda points, device: cuda_buckets.bucketize(points, *checked[:-2], device),
        lambda points: layouts.bucketize_arrays(points, checked, check_finite),
    )


# ---- attention -----------------------------------------------------------------------------------------------------


def bucket_attention(
    q: Known, k: Known, v: Known, table: Known, *, lengths: tuple[int, ...], bucket_size: int, scale: float
) -> Work:
    """`gpu3d.bucket_attention`: out and lse."""
    slots = layouts.checked_layout(lengths, bucket_size).num_slots
    scale = attention.check_attention(q, k, v, table, slots, None, scale)
    options = lengths, bucket_size, scale
    return Work(
        attention.attention_results(q),
        lambda q, k, v, table, device: cuda_attention.attention(q, k, v, table, *options, True, device),
        lambda q, k, v, table: attention.attention_arrays(q, k, v, table, *options, True),
    )


def bucket_attention_backward(
    dout: Known,
    q: Known,
    k: Known,
    v: Known,
    out: Known,
    lse: Known,
    table: Known,
    *,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
) -> Work:
    """`gpu3d.bucket_attention_backward`."""
    slots = layouts.checked_layout(lengths, bucket_size).num_slots
    scale = attention.check_attention_backward(dout, q, k, v, out, lse, table, slots, None, scale)

    def on_gpu(dout: Spec, q: Spec, k: Spec, v: Spec, out: Spec, lse: Spec, table: Spec, device: Device) -> Call:
        options = lengths, bucket_size, scale
        return cuda_attention.attention_backward(dout, q, k, v, out, lse, table, *options, device)

    def on_cpu(dout: Given, q: Given, k: Given, v: Given, out: Given, lse: Given, table: Given) -> list[Any]:
        options = lengths, bucket_size, scale
        return attention.attention_backward_arrays(dout, q, k, v, out, lse, table, *options)

    return Work(attention.attention_backward_results(q), on_gpu, on_cpu)


# ---- pooling -------------------------------------------------------------------------------------------------------


def bucket_pool(
    features: Known, points: Known, *, lengths: tuple[int, ...], bucket_size: int, ratio: int, reduce: str
) -> Work:
    """`gpu3d.bucket_pool`."""
    layouts.checked_layout(lengths, bucket_size)
    options = lengths, bucket_size, pooling.check_pool(features, points, lengths, bucket_size, ratio, reduce), reduce
    return Work(
        pooling.pool_results(features, points, *options),
        lambda features, points, device: cuda_pooling.pool(features, points, *options),
        lambda features, points: pooling.pool_arrays(features, points, *options),
    )


def bucket_pool_backward(
    dchild: Known,
    members: Known,
    argmember: Known,
    *,
    lengths: tuple[int, ...],
    bucket_size: int,
    ratio: int,
    reduce: str,
) -> Work:
    """`gpu3d.bucket_pool_backward`; argmember has no rows except for min and max."""
    layouts.checked_layout(lengths, bucket_size)
    pooling.check_pool_backward(dchild, dchild, lengths, bucket_size, ratio)
    slots, columns = dchild.shape
    _check("members", members, (slots, ratio), INT32)
    _check("argmember", argmember, (slots if reduce in EXTREMES else 0, columns), UINT8)

    def on_gpu(dchild: Spec, members: Spec, argmember: Spec, device: Device) -> Call:
        return cuda_pooling.pool_backward(dchild, members, argmember, lengths, bucket_size, ratio, reduce)

    def on_cpu(dchild: Given, members: Given, argmember: Given) -> list[Any]:
        return pooling.pool_backward_arrays(dchild, members, argmember, lengths, bucket_size, ratio, reduce)

    return Work(pooling.pool_backward_results(dchild, lengths, bucket_size), on_gpu, on_cpu)


def bucket_unpool(
    child: Known, members: Known, skip: Known, *, lengths: tuple[int, ...], bucket_size: int, ratio: int
) -> Work:
    """`gpu3d.bucket_unpool`; a skip without rows means no skip."""
    layouts.checked_layout(lengths, bucket_size)
    added = skip if skip.shape[0] else None
    pooling.check_unpool(child, added, lengths, bucket_size, ratio)
    _check("members", members, (child.shape[0], ratio), INT32)

    def on_gpu(child: Spec, members: Spec, skip: Spec, device: Device) -> Call:
        return cuda_pooling.unpool(child, members, None if added is None else skip, lengths, bucket_size, ratio)

    def on_cpu(child: Given, members: Given, skip: Given) -> list[Any]:
        return pooling.unpool_arrays(child, members, None if added is None else skip, lengths, bucket_size, ratio)

    return Work(pooling.unpool_results(child, lengths, bucket_size), on_gpu, on_cpu)


def bucket_unpool_backward(
    dout: Known, members: Known, *, lengths: tuple[int, ...], bucket_size: int, ratio: int
) -> Work:
    """`gpu3d.bucket_unpool_backward`: dchild and dskip."""
    layouts.checked_layout(lengths, bucket_size)
    pooling.check_unpool_backward(dout, lengths, bucket_size)
    options = lengths, bucket_size, ratio
    results = pooling.unpool_backward_results(dout, *options)
    _check("members", members, (results[0].shape[0], ratio), INT32)
    return Work(
        results,
        lambda dout, members, device: cuda_pooling.unpool_backward(dout, members, *options),
        lambda dout, members: pooling.unpool_backward_arrays(dout, members, *options),
    )


# ---- neighbours ----------------------------------------------------------------------------------------------------


def knn(
    query: Known,
    points: Known,
    *radii: Known,
    query_lengths: tuple[int, ...],
    lengths: tuple[int, ...],
    k: int,
    radius: float,
    exclude_self: bool,
) -> Work:
    """`gpu3d.knn` of packed points, whose radius is inf, and `gpu3d.radius_search` with max_neighbors."""

    def checked(query: Known, points: Known, *radii: Known) -> neighbors.Nearest:
        reach = radii[0] if radii else radius
        return neighbors.check_knn(query, points, k, query_lengths, lengths, exclude_self, reach)

    def on_gpu(query: Spec, points: Spec, *rest: Any) -> Call:
        *radii, device = rest
        limits = cuda_neighbors.Limits(radius, radii[0] if radii else None, exclude_self)
        return cuda_neighbors.knn(query, query_lengths, points, lengths, k, device, limits=limits)

    def on_cpu(query: Given, points: Given, *radii: Given) -> list[Any]:
        options = checked(query, points, *radii)  # the values of radii too
        return neighbors.knn_arrays(query, points, radii[0] if radii else None, options)

    checked(query, points, *[Spec(x.shape, x.dtype) for x in radii])
    return Work(neighbors.knn_results(query.shape[0], k, neighbors.distance_dtype(query, points)), on_gpu, on_cpu)


def knn_backward(
    ddistances: Known, query: Known, points: Known, distances: Known, indices: Known, **lengths: Any
) -> Work:
    """The gradients of query and points, from that of the distances of `gpu3d.knn`."""
    neighbors.check_knn_backward(ddistances, query, points, distances, indices, **lengths)

    def on_gpu(ddistances: Spec, query: Spec, points: Spec, distances: Spec, indices: Spec, device: Device) -> Call:
        return cuda_neighbors.knn_backward(ddistances, query, points, distances, indices)

    def on_cpu(ddistances: Given, query: Given, points: Given, distances: Given, indices: Given) -> list[Any]:
        return neighbors.knn_backward_arrays(ddistances, query, points, distances, indices)

    return Work(neighbors.backward_results(query, points), on_gpu, on_cpu)


def radius_search(
    query: Known,
    points: Known,
    *radii: Known,
    query_lengths: tuple[int, ...],
    lengths: tuple[int, ...],
    radius: float,
    max_entries: int,
    exclude_self: bool,
) -> Work:
    """`gpu3d.radius_search` of packed points. Each offset is two int32, because JAX has int64 only on request."""

    def checked(query: Known, points: Known, *radii: Known) -> neighbors.Radius:
        reach = radii[0] if radii else radius
        return neighbors.check_radius(query, points, reach, query_lengths, lengths, max_entries, exclude_self)

    def on_gpu(query: Spec, points: Spec, *rest: Any) -> Call:
        *radii, device = rest
        limits = cuda_neighbors.Limits(radius, radii[0] if radii else None, exclude_self)
        return cuda_neighbors.radius(query, query_lengths, points, lengths, limits, max_entries, device)

    def on_cpu(query: Given, points: Given, *radii: Given) -> list[Any]:
        options = checked(query, points, *radii)  # the values of radii too
        offsets, indices, distances = neighbors.radius_arrays(query, points, radii[0] if radii else None, options)
        return [offsets.view(np.int32).reshape(-1, 2), indices, distances]

    checked(query, points, *[Spec(x.shape, x.dtype) for x in radii])
    dtype = neighbors.distance_dtype(query, points)
    offsets, *found = neighbors.radius_results(query.shape[0], max_entries, dtype)
    return Work([Spec((*offsets.shape, 2), INT32), *found], on_gpu, on_cpu)


def radius_search_backward(
    ddistances: Known, query: Known, points: Known, offsets: Known, indices: Known, distances: Known, **lengths: Any
) -> Work:
    """The gradients of query and points, from that of the distances of `radius_search`, whose offsets are halves."""
    _check("offsets", offsets, (query.shape[0] + 1, 2), INT32)
    whole = Spec((query.shape[0] + 1,), INT64)
    neighbors.check_radius_backward(ddistances, query, points, whole, indices, distances, **lengths)

    def on_gpu(
        ddistances: Spec, query: Spec, points: Spec, offsets: Spec, indices: Spec, distances: Spec, device: Device
    ) -> Call:
        return cuda_neighbors.radius_backward(ddistances, query, points, offsets, indices, distances)

    def on_cpu(
        ddistances: Given, query: Given, points: Given, offsets: Given, indices: Given, distances: Given
    ) -> list[Any]:
        joined = _arrays.read(np.ascontiguousarray(offsets.array).view(np.int64)[:, 0], "offsets")
        return neighbors.radius_backward_arrays(ddistances, query, points, joined, indices, distances)

    return Work(neighbors.backward_results(query, points), on_gpu, on_cpu)


# ---- sampling ------------------------------------------------------------------------------------------------------


def farthest_points(points: Known, **options: Any) -> Work:
    """`gpu3d.farthest_points` of packed points."""
    checked = sampling.check_farthest(points, **options)
    return Work(
        sampling.farthest_results(len(checked.lengths), checked.k),
        lambda points, device: cuda_sampling.farthest_points(points, *checked, device),
        lambda points: sampling.farthest_arrays(points, *checked),
    )


# ---- surfaces ------------------------------------------------------------------------------------------------------


def normals(points: Known, *, lengths: tuple[int, ...], k: int, viewpoint: Sequence[float] | None) -> Work:
    """`gpu3d.normals` of packed points."""
    k, lengths, seen_from = surface.check_normals(points, k, lengths, viewpoint)
    return Work(
        surface.normals_results(points, points.shape[0]),
        lambda points, device: cuda_surface.normals(points, lengths, k, seen_from, device),
        lambda points: surface.normals_arrays(points, k, lengths, seen_from),
    )


# ---- losses --------------------------------------------------------------------------------------------------------


def chamfer(x: Known, y: Known, **options: Any) -> Work:
    """`gpu3d.chamfer` of packed points: the loss, and the residuals for its gradient."""
    checked = check_chamfer(x, y, **options)
    x_lengths, y_lengths, squared, reduction, direction = checked

    def on_gpu(x: Spec, y: Spec, device: Device) -> Call:
        return cuda_chamfer.chamfer(x, x_lengths, y, y_lengths, squared, reduction, direction, device)

    sizes = x.shape[0], y.shape[0], len(x_lengths)
    results = chamfer_results(*sizes, reduction, direction, neighbors.distance_dtype(x, y))
    return Work(results, on_gpu, lambda x, y: chamfer_arrays(x, y, *checked))


def chamfer_backward(dloss: Known, x: Known, y: Known, residuals: Known, **options: Any) -> Work:
    """The gradients of x and y."""
    checked = check_chamfer_backward(dloss, x, y, residuals, **options)

    def on_gpu(dloss: Spec, x: Spec, y: Spec, residuals: Spec, device: Device) -> Call:
        return cuda_chamfer.chamfer_backward(dloss, x, y, residuals, *checked)

    def on_cpu(dloss: Given, x: Given, y: Given, residuals: Given) -> list[Any]:
        return chamfer_backward_arrays(dloss, x, y, residuals, *checked)

    return Work(chamfer_backward_results(x, y), on_gpu, on_cpu)


def chamfer_points(x: Known, y: Known, **options: Any) -> Work:
    """`gpu3d.chamfer` with reduction "points": the distances of all points that search, and their nearest."""
    checked = check_points(x, y, **options)
    x_lengths, y_lengths, squared, direction = checked

    def on_gpu(x: Spec, y: Spec, device: Device) -> Call:
        return cuda_chamfer.points(x, x_lengths, y, y_lengths, squared, direction, device)

    results = points_results(x.shape[0], y.shape[0], direction, neighbors.distance_dtype(x, y))
    return Work(results, on_gpu, lambda x, y: points_arrays(x, y, *checked))


def chamfer_points_backward(
    ddistances: Known, x: Known, y: Known, distances: Known, nearest: Known, **options: Any
) -> Work:
    """The gradients of x and y, from that of the distances of their points."""
    checked = check_points_backward(ddistances, x, y, distances, nearest, **options)

    def on_gpu(ddistances: Spec, x: Spec, y: Spec, distances: Spec, nearest: Spec, device: Device) -> Call:
        return cuda_chamfer.points_backward(ddistances, x, y, distances, nearest, *checked)

    def on_cpu(ddistances: Given, x: Given, y: Given, distances: Given, nearest: Given) -> list[Any]:
        return points_backward_arrays(ddistances, x, y, distances, nearest, *checked)

    return Work(chamfer_backward_results(x, y), on_gpu, on_cpu)


def compare_clouds(x: Known, y: Known, **options: Any) -> Work:
    """`gpu3d.compare_clouds` of packed points."""
    checked = metrics.check_compare_clouds(x, y, **options)
    x_lengths, y_lengths, thresholds = checked

    def on_gpu(x: Spec, y: Spec, device: Device) -> Call:
        return cuda_metrics.compare_clouds(x, x_lengths, y, y_lengths, thresholds, device)

    results = metrics.compare_clouds_results(len(x_lengths), len(thresholds), neighbors.distance_dtype(x, y))
    return Work(results, on_gpu, lambda x, y: metrics.compare_clouds_arrays(x, y, *checked))


def apml(pred: Known, target: Known, *, with_grad: bool, **options: Any) -> Work:
    """`gpu3d.apml` of packed points, and its gradients if `with_grad`."""
    checked = transport.check_apml(pred, target, **options)
    pred_lengths, target_lengths, of_plan, reduction, max_entries = checked
    if max_entries is None:
        raise TypeError("max_entries must be an int in a program: entries are not counted on the host.")
    rest = target_lengths, of_plan, reduction, max_entries, with_grad
    return Work(
        transport.apml_results(pred, target, len(pred_lengths), reduction, with_grad),
        lambda pred, target, device: cuda_transport.apml(pred, pred_lengths, target, *rest, device),
        lambda pred, target: transport.apml_arrays(pred, pred_lengths, target, *rest),
    )


def apml_backward(
    dloss: Known, dpred: Known, dtarget: Known, *, pred_lengths: tuple[int, ...], target_lengths: tuple[int, ...]
) -> Work:
    """The gradient of each cloud times the gradient of its loss."""
    of_loss = neighbors.distance_dtype(dpred, dtarget)
    _check("dloss", dloss, (len(pred_lengths),) if dloss.ndim else (), of_loss)
    for name, x, n in (("dpred", dpred, sum(pred_lengths)), ("dtarget", dtarget, sum(target_lengths))):
        _check(name, x, (n, 2 if x.shape[-1:] == (2,) else 3), x.dtype)

    def on_gpu(dloss: Spec, dpred: Spec, dtarget: Spec, device: Device) -> Call:
        return cuda_transport.apml_backward(dloss, dpred, dtarget, pred_lengths, target_lengths)

    def on_cpu(dloss: Given, dpred: Given, dtarget: Given) -> list[Any]:
        return transport.apml_backward_arrays(dloss, dpred, dtarget, pred_lengths, target_lengths)

    return Work(transport.apml_backward_results(dpred, dtarget), on_gpu, on_cpu)


CALLS: dict[str, Callable[..., Work]] = {
    function.__name__: function
    for function in (
        bucketize,
        bucket_attention,
        bucket_attention_backward,
        bucket_pool,
        bucket_pool_backward,
        bucket_unpool,
        bucket_unpool_backward,
        knn,
        knn_backward,
        radius_search,
        radius_search_backward,
        farthest_points,
        normals,
        chamfer,
        chamfer_backward,
        chamfer_points,
        chamfer_points_backward,
        compare_clouds,
        apml,
        apml_backward,
    )
}
