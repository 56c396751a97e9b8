# SPDX-License-Identifier: Apache-2.0
"""The public functions of gpu3d.interop.jax, and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from gpu3d import _arrays, attention, metrics, neighbors, pooling, sampling, surface, transport
from gpu3d import buckets as layouts
from gpu3d.buckets import Buckets, Scopes
from gpu3d.chamfer import check_chamfer, check_points, distances_of, is_points
from gpu3d.interop.jax.program import Options, alike, call, last_call, options, spec
from gpu3d.metrics import CloudComparison
from gpu3d.neighbors import NeighborIndex, Neighbors, RadiusNeighbors
from gpu3d.pooling import Pooling
from gpu3d.surface import Normals

# ---- checks --------------------------------------------------------------------------------------------------------


def _check_arrays(**named: Any) -> None:
    for name, x in named.items():
        if isinstance(x, NeighborIndex):
            raise TypeError(
                f"{name} must be a JAX array, got NeighborIndex, which has no gradient and no place in a program: pass "
                "the points that it was made of."
            )
        if not isinstance(x, jax.Array):
            raise TypeError(
                f"{name} must be a JAX array, got {type(x).__name__}: convert it by jax.numpy.asarray. "
                "jax.device_put takes Buckets, Scopes and Pooling too."
            )


def _check_lengths(**named: Any) -> None:
    for name, lengths in named.items():
        if isinstance(lengths, jax.Array):
            raise TypeError(
                f"{name} must be host integers, got a JAX array: shapes follow from them. Under jax.jit pass a tuple, "
                "named in static_argnames."
            )


def _constant(x: Any, name: str) -> jax.Array:
    """An array of a layout, which may be a NumPy array."""
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    _check_arrays(**{name: x})
    return x


def _packed(x: jax.Array) -> jax.Array:
    """[B, n, d] as [B * n, d]."""
    return x.reshape(-1, x.shape[-1])


# ---- buckets -------------------------------------------------------------------------------------------------------


def bucketize(
    points: jax.Array,
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
    """`gpu3d.bucketize` under jax.jit too.

    Parameters
    ----------
    points : Array [N, 3] or [B, n, 3]
        As in `gpu3d.bucketize`. Not differentiated: the gradient stops here.
    bucket_size, lengths, hash, balance, voxel_size, seed, bounds
        As in `gpu3d.bucketize`; static under jax.jit.
    check_finite : bool, optional
        As in `gpu3d.bucketize`. Under jax.jit, True is an error, because values are not known while a program is
        traced. With None a compiled program checks them on the CPU, and raises an error at run time.

    Returns
    -------
    Buckets
        Its arrays are JAX arrays.

    Examples
    --------
    >>> points = jax.random.uniform(jax.random.key(0), (1000, 3))
    >>> buckets = jax.jit(lambda points: bucketize(points, 256))(points)
    >>> buckets.slot_to_point.shape, buckets.lengths
    ((1024,), (1000,))
    """
    _check_arrays(points=points)
    _check_lengths(lengths=lengths)
    checked = layouts.check_bucketize(spec(points), bucket_size, lengths, hash, balance, voxel_size, seed, bounds)
    if check_finite is not None and _arrays.check_flag(check_finite, "check_finite"):
        if isinstance(points, jax.core.Tracer):
            raise ValueError(
                "check_finite=True looks at values, which a JAX program does not have while it is traced: call "
                "gpu3d.bucketize outside of jax.jit, or leave check_finite out."
            )
        _arrays.check_finite(_arrays.read(points, "points"))
        check_finite = False
    chosen = checked._asdict()
    del chosen["slots"], chosen["bucket_offsets"]  # they follow from the lengths
    if checked.bucket_offsets is None:
        chosen["lengths"] = _arrays.int_tuple(checked.lengths)
    static = options(**chosen, check_finite=None if check_finite is None else False)
    slot_to_point, point_to_slot, moved = call("bucketize", static, _packed(jax.lax.stop_gradient(points)))
    return layouts.buckets_of((slot_to_point, point_to_slot, moved), chosen["lengths"], checked.bucket_size)


def scopes(buckets: Buckets, size: int = 8, *, shift: int = 0, stride: int = 1) -> Scopes:
    """`gpu3d.scopes` under jax.jit too, where the table is a constant.

    Parameters
    ----------
    buckets : Buckets
        Only its lengths matter.
    size, shift, stride : int
        As in `gpu3d.scopes`. For a hand-made table call `gpu3d.scopes`.

    Returns
    -------
    Scopes
        Its table is a JAX array.
    """
    layouts.check_buckets(buckets)
    size, shift, stride = layouts.check_scopes(size, shift, stride)
    table = layouts.scope_table(_arrays.Origin("numpy", None), buckets, size, shift, stride)
    return Scopes(jnp.asarray(table), size, shift, stride, buckets.bucket_size, buckets.bucket_offsets)


def scatter(x: jax.Array, buckets: Buckets, fill: float = 0) -> jax.Array:
    """Move rows of points to slots, like `Buckets.scatter`. Its gradient is `gather` of the result's gradient.

    Parameters
    ----------
    x : Array [N, ...]
        One row per point.
    buckets : Buckets
        With arrays of JAX or NumPy.
    fill : scalar
        The value of padding slots.

    Returns
    -------
    Array [num_slots, ...]
    """
    layouts.check_buckets(buckets)
    _check_arrays(x=x)
    layouts.check_rows(spec(x), "x", sum(buckets.lengths))
    return _move(*_moving(x, buckets.slot_to_point, buckets.point_to_slot), fill)


def gather(y: jax.Array, buckets: Buckets) -> jax.Array:
    """Move rows of slots to points, like `Buckets.gather`. Its gradient is `scatter` of the result's, 0 in padding.

    Parameters
    ----------
    y : Array [num_slots, ...]
        One row per slot.
    buckets : Buckets
        With arrays of JAX or NumPy.

    Returns
    -------
    Array [N, ...]
    """
    layouts.check_buckets(buckets)
    _check_arrays(y=y)
    layouts.check_rows(spec(y), "y", buckets.num_slots)
    return _move(*_moving(y, buckets.point_to_slot, buckets.slot_to_point), 0)


def _moving(x: jax.Array, index: Any, inverse: Any) -> list[jax.Array]:
    return alike(x, _constant(index, "buckets"), _constant(inverse, "buckets"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _move(x: jax.Array, index: jax.Array, inverse: jax.Array, fill: Any) -> jax.Array:
    """Rows x[index], with `fill` where the index is -1. `inverse` is the place that each row of x moves to, or -1."""
    beyond = jnp.where(index < 0, x.shape[0], index)  # in JAX -1 is the last row
    return jnp.take(x, beyond, axis=0, mode="fill", fill_value=fill)


def _move_forward(x: jax.Array, index: jax.Array, inverse: jax.Array, fill: Any) -> Any:
    return _move(x, index, inverse, fill), (index, inverse)


def _move_backward(fill: Any, saved: Any, dout: jax.Array) -> Any:
    index, inverse = saved  # every row moves to one place, so the gradient is a move too
    return _move(dout, inverse, index, 0), None, None


_move.defvjp(_move_forward, _move_backward)


# ---- attention -----------------------------------------------------------------------------------------------------


def bucket_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    buckets: Buckets,
    scopes: Scopes,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`gpu3d.bucket_attention` with gradients.

    Parameters
    ----------
    q, k, v : Array [num_slots, H, D]
        As in `gpu3d.bucket_attention`.
    buckets : Buckets
        The layout of the slots.
    scopes : Scopes
        Which buckets attend to each other. Its table is an array of JAX or NumPy.
    scale, return_lse
        As in `gpu3d.bucket_attention`; static under jax.jit.

    Returns
    -------
    out : Array [num_slots, H, D]
    lse : Array float32 [num_slots, H]
        Only with return_lse. Not differentiated: the gradient stops here.

    Examples
    --------
    >>> buckets = bucketize(jax.random.uniform(jax.random.key(0), (1000, 3)), 64)
    >>> window = scopes(buckets, 4, shift=2)
    >>> loss = lambda q: bucket_attention(q, q, q, buckets, window).sum()
    >>> jax.jit(jax.grad(loss))(jax.random.normal(jax.random.key(1), (1024, 4, 16))).shape
    (1024, 4, 16)
    """
    _check_arrays(q=q, k=k, v=v)
    attention.check_layout(buckets, scopes)
    table = _constant(scopes.table, "scopes")
    scale = attention.check_attention(spec(q), spec(k), spec(v), spec(table), buckets.num_slots, scopes.size, scale)
    static = options(bucket_size=buckets.bucket_size, lengths=buckets.lengths, scale=scale)
    out, lse = _attention(static, *alike(q, k, v, table))
    return (out, jax.lax.stop_gradient(lse)) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Options, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> Any:
    return call("bucket_attention", static, q, k, v, table)


def _attention_forward(static: Options, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> Any:
    out, lse = last_call("bucket_attention", static, q, k, v, table)
    return (out, lse), (q, k, v, out, lse, table)


def _attention_backward(static: Options, saved: Any, cotangents: Any) -> Any:
    dout, _ = cotangents
    return *last_call("bucket_attention_backward", static, dout, *saved), None


_attention.defvjp(_attention_forward, _attention_backward)


# ---- pooling -------------------------------------------------------------------------------------------------------


def bucket_pool(
    features: jax.Array, points: jax.Array, buckets: Buckets, *, ratio: int = 2, reduce: str = "mean"
) -> Pooling:
    """`gpu3d.bucket_pool` with the gradient of `features`.

    Parameters
    ----------
    features : Array [num_slots, C]
        As in `gpu3d.bucket_pool`.
    points : Array [num_slots, 3]
        Not differentiated: the gradient stops here.
    buckets : Buckets
        The layout of the slots.
    ratio, reduce
        As in `gpu3d.bucket_pool`; static under jax.jit.

    Returns
    -------
    Pooling
        Its arrays are JAX's.
    """
    _check_arrays(features=features, points=points)
    layouts.check_buckets(buckets)
    layout = buckets.lengths, buckets.bucket_size
    ratio = pooling.check_pool(spec(features), spec(points), *layout, ratio, reduce)
    static = options(bucket_size=buckets.bucket_size, lengths=buckets.lengths, ratio=ratio, reduce=reduce)
    pooled, *others = _pool(static, *alike(features, jax.lax.stop_gradient(points)))
    return pooling.pooling_of([pooled, *map(jax.lax.stop_gradient, others)], buckets, ratio, reduce)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(static: Options, features: jax.Array, points: jax.Array) -> Any:
    return call("bucket_pool", static, features, points)


def _pool_forward(static: Options, features: jax.Array, points: jax.Array) -> Any:
    made = last_call("bucket_pool", static, features, points)
    _, _, members, argmember, *_ = made
    # An argmember without rows is not saved: shard_map would make an output of it and shard it along those rows.
    return made, (members, argmember if argmember.shape[0] else None)


def _pool_backward(static: Options, saved: Any, cotangents: Any) -> Any:
    dchild, *_ = cotangents
    members, argmember = saved
    if argmember is None:
        argmember = jnp.zeros((0, dchild.shape[1]), jnp.uint8)
    (dfeatures,) = last_call("bucket_pool_backward", static, *alike(dchild, members, argmember))
    return dfeatures, None


_pool.defvjp(_pool_forward, _pool_backward)


def bucket_unpool(child_features: jax.Array, pooled: Pooling, skip: jax.Array | None = None) -> jax.Array:
    """`gpu3d.bucket_unpool` with the gradients of child_features and skip.

    Parameters
    ----------
    child_features : Array [child slots, C]
        As in `gpu3d.bucket_unpool`.
    pooled : Pooling
        The pooling to invert. Its arrays are of JAX or NumPy.
    skip : Array [num_slots, C], optional
        Rows in the parent's slots, in child_features' dtype. They are added to the result.

    Returns
    -------
    Array [num_slots, C]

    Examples
    --------
    >>> points = jax.random.uniform(jax.random.key(0), (1000, 3))
    >>> buckets = bucketize(points, 64)
    >>> rows = scatter(points, buckets)
    >>> pooled = bucket_pool(rows, rows, buckets, ratio=4)
    >>> bucket_unpool(pooled.features, pooled, skip=-rows).shape
    (1024, 3)
    """
    _check_arrays(child_features=child_features)
    pooling.check_pooling(pooled)
    members = _constant(pooled.members, "pooled")
    if skip is not None:
        _check_arrays(skip=skip)
    parent = pooled.parent
    layout = parent.lengths, parent.bucket_size, pooled.ratio
    pooling.check_unpool(spec(child_features), None if skip is None else spec(skip), *layout)
    static = options(bucket_size=parent.bucket_size, lengths=parent.lengths, ratio=pooled.ratio)
    if skip is None:
        skip = jnp.zeros((0, child_features.shape[1]), child_features.dtype)
    return _unpool(static, *alike(child_features, members, skip))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpool(static: Options, child: jax.Array, members: jax.Array, skip: jax.Array) -> jax.Array:
    (out,) = call("bucket_unpool", static, child, members, skip)
    return out


def _unpool_forward(static: Options, child: jax.Array, members: jax.Array, skip: jax.Array) -> Any:
    (out,) = last_call("bucket_unpool", static, child, members, skip)
    return out, (members, skip.shape[0])


def _unpool_backward(static: Options, saved: Any, dout: jax.Array) -> Any:
    members, skipped = saved
    dchild, dskip = last_call("bucket_unpool_backward", static, dout, members)
    return dchild, None, dskip if skipped else None


_unpool.defvjp(_unpool_forward, _unpool_backward)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def knn(
    query: jax.Array,
    points: jax.Array,
    k: int,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    exclude_self: bool = False,
) -> Neighbors:
    """`gpu3d.knn` with the gradients of the distances.

    Parameters
    ----------
    query, points : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.knn`; arrays, not a NeighborIndex.
    k, query_lengths, lengths, exclude_self
        As in `gpu3d.knn`; static under jax.jit.

    Returns
    -------
    Neighbors
        ``distances`` have gradients with respect to query and points. A distance of 0 and a missing neighbour add
        nothing to them.

    Examples
    --------
    >>> points = jax.random.uniform(jax.random.key(0), (100, 3))
    >>> jax.jit(lambda points: knn(points, points, 4))(points).indices.shape
    (100, 4)
    >>> jax.grad(lambda points: knn(points, points, 4).distances.sum())(points).shape
    (100, 3)
    """
    _check_arrays(query=query, points=points)
    _check_lengths(query_lengths=query_lengths, lengths=lengths)
    checked = neighbors.check_knn(spec(query), spec(points), k, query_lengths, lengths, exclude_self)
    arrays = alike(_packed(query), _packed(points))
    return Neighbors(*_knn(options(**checked._asdict()), *arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _knn(static: Options, query: jax.Array, points: jax.Array, *radii: jax.Array) -> Any:
    return call("knn", static, query, points, *radii)


def _knn_forward(static: Options, query: jax.Array, points: jax.Array, *radii: jax.Array) -> Any:
    found = last_call("knn", static, query, points, *radii)
    return found, ((query, points, *found), (None,) * len(radii))


def _knn_backward(static: Options, saved: Any, cotangents: Any) -> Any:
    ddistances, _ = cotangents
    arrays, of_radii = saved
    return *last_call("knn_backward", _only_lengths(static), ddistances, *arrays), *of_radii


def _only_lengths(static: Options) -> Options:
    """The options of a search that its gradient needs."""
    return tuple((name, value) for name, value in static if name in ("query_lengths", "lengths"))


_knn.defvjp(_knn_forward, _knn_backward)


def radius_search(
    query: jax.Array,
    points: jax.Array,
    radius: Any,
    *,
    query_lengths: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    max_entries: int | None = None,
    max_neighbors: int | None = None,
    exclude_self: bool = False,
) -> RadiusNeighbors | Neighbors:
    """`gpu3d.radius_search` with the gradients of the distances.

    Parameters
    ----------
    query, points : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.radius_search`; arrays, not a NeighborIndex.
    radius : float, or Array [N]
        As in `gpu3d.radius_search`; a number is static under jax.jit. Radii are not differentiated: the gradient stops
        there. Their values are checked on the CPU when a program runs.
    query_lengths, lengths, max_neighbors, exclude_self
        As in `gpu3d.radius_search`; static under jax.jit.
    max_entries : int, optional
        As in `gpu3d.radius_search`, but neighbours are not counted on the host here. The default is
        min(sum of n_b * m_b over the clouds, max(16 * (N + M), 2**18)).

    Returns
    -------
    RadiusNeighbors
        ``indices`` and ``distances`` have max_entries elements. ``offsets`` are int64 with jax_enable_x64, else int32.
        Distances have gradients with respect to query and points. A distance of 0 adds nothing to them. If there are
        more neighbours than max_entries, both gradients are NaN.
    Neighbors
        With max_neighbors: arrays as those of `knn`.
    """
    _check_arrays(query=query, points=points)
    _check_lengths(query_lengths=query_lengths, lengths=lengths)
    radii = []
    if isinstance(radius, jax.Array) or neighbors.is_array(radius):
        _check_arrays(radius=radius)
        radii.append(jax.lax.stop_gradient(radius))
    arrays = alike(_packed(query), _packed(points), *radii)
    specs, reach = (spec(query), spec(points)), spec(radius) if radii else radius
    if neighbors.check_max_neighbors(max_neighbors, max_entries):
        sizes = query_lengths, lengths
        nearest = neighbors.check_knn(*specs, max_neighbors, *sizes, exclude_self, reach, "max_neighbors")
        return Neighbors(*_knn(options(**nearest._asdict()), *arrays))
    checked = neighbors.check_radius(*specs, reach, query_lengths, lengths, max_entries, exclude_self)
    if max_entries is None:
        checked = checked._replace(max_entries=_max_entries(checked.query_lengths, checked.lengths))
    halves, indices, found = _radius_search(options(**checked._asdict()), *arrays)
    config: Any = jax.config  # whose flags type checkers do not see
    offsets = jax.lax.bitcast_convert_type(halves, np.int64) if config.jax_enable_x64 else halves[:, 0]
    return RadiusNeighbors(offsets, indices, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _radius_search(static: Options, query: jax.Array, points: jax.Array, *radii: jax.Array) -> Any:
    return call("radius_search", static, query, points, *radii)


def _radius_forward(static: Options, query: jax.Array, points: jax.Array, *radii: jax.Array) -> Any:
    found = last_call("radius_search", static, query, points, *radii)
    return found, ((query, points, *found), (None,) * len(radii))


def _radius_backward(static: Options, saved: Any, cotangents: Any) -> Any:
    *_, ddistances = cotangents
    arrays, of_radii = saved
    return *last_call("radius_search_backward", _only_lengths(static), ddistances, *arrays), *of_radii


_radius_search.defvjp(_radius_forward, _radius_backward)


def _max_entries(lengths: Sequence[int], others: Sequence[int]) -> int:
    """The default of max_entries: all pairs, if they are not too many."""
    pairs = sum([n * m for n, m in zip(lengths, others, strict=True)])
    return min(pairs, max(16 * (sum(lengths) + sum(others)), 2**18))


# ---- sampling ------------------------------------------------------------------------------------------------------


def farthest_points(points: jax.Array, k: int, *, lengths: Sequence[int] | None = None, start: int = 0) -> jax.Array:
    """`gpu3d.farthest_points` under jax.jit too.

    Parameters
    ----------
    points : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.farthest_points`. Not differentiated: the gradient stops here.
    k, lengths, start
        As in `gpu3d.farthest_points`; static under jax.jit.

    Returns
    -------
    Array int32 [B * k]

    Examples
    --------
    >>> points = jax.random.uniform(jax.random.key(0), (2, 100, 3))
    >>> jax.jit(lambda points: farthest_points(points, 10))(points).shape
    (20,)
    """
    _check_arrays(points=points)
    _check_lengths(lengths=lengths)
    checked = sampling.check_farthest(spec(points), k, lengths, start)
    return call("farthest_points", options(**checked._asdict()), _packed(jax.lax.stop_gradient(points)))[0]


# ---- surfaces ------------------------------------------------------------------------------------------------------


def normals(
    points: jax.Array,
    k: int = 16,
    *,
    lengths: Sequence[int] | None = None,
    viewpoint: Sequence[float] | None = None,
) -> Normals:
    """`gpu3d.normals` under jax.jit too. It has no gradient: a derivative is an error.

    Parameters
    ----------
    points : Array [N, 3] or [B, n, 3]
        As in `gpu3d.normals`. Inside of jax.grad, pass ``jax.lax.stop_gradient(points)``.
    k, lengths, viewpoint
        As in `gpu3d.normals`; static under jax.jit.

    Returns
    -------
    Normals
        Arrays ``normals`` and ``curvature``.

    Examples
    --------
    >>> points = jax.random.uniform(jax.random.key(0), (100, 3))
    >>> jax.jit(lambda points: normals(points, 8))(points).normals.shape
    (100, 3)
    """
    _check_arrays(points=points)
    _check_lengths(lengths=lengths)
    checked = surface.check_normals(spec(points), k, lengths, viewpoint)
    return Normals(*_normals(options(**checked._asdict()), _packed(points)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normals(static: Options, points: jax.Array) -> Any:
    return call("normals", static, points)


@_normals.defjvp
def _no_gradient_of_normals(static: Options, primals: Any, tangents: Any) -> Any:
    raise TypeError("points is differentiated, and normals has no gradient: pass jax.lax.stop_gradient(points).")


# ---- losses --------------------------------------------------------------------------------------------------------


def chamfer(
    x: jax.Array,
    y: jax.Array,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
    direction: str = "both",
    empty: str = "error",
) -> Any:
    """`gpu3d.chamfer` with the gradients of x and y.

    Parameters
    ----------
    x, y : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.chamfer`; arrays, not a NeighborIndex.
    x_lengths, y_lengths, squared, reduction, direction, empty
        As in `gpu3d.chamfer`; static under jax.jit.

    Returns
    -------
    Array [], or [B] for reduction "none"
    ChamferDistances
        For reduction "points": arrays ``x`` and ``y``, whose gradients go to both clouds. A distance of 0 and one that
        is not finite add nothing to them.

    Examples
    --------
    >>> x = jax.random.uniform(jax.random.key(0), (2, 100, 3))
    >>> jax.jit(jax.grad(chamfer))(x, x[:, :80]).shape
    (2, 100, 3)
    >>> chamfer(x, x[:, :80], reduction="points").y.shape
    (160,)
    """
    _check_arrays(x=x, y=y)
    _check_lengths(x_lengths=x_lengths, y_lengths=y_lengths)
    given = spec(x), spec(y), x_lengths, y_lengths
    arrays = alike(_packed(x), _packed(y))
    if is_points(reduction):
        of_points = check_points(*given, squared, direction, empty)
        distances, _ = _chamfer_points(options(**of_points._asdict(), empty=empty), *arrays)
        return distances_of(distances, arrays[0].shape[0], direction)
    checked = check_chamfer(*given, squared, reduction, direction, empty)
    return _chamfer(options(**checked._asdict(), empty=empty), *arrays)


def _without_empty(static: Options) -> Options:
    """The options that the gradient takes: what may be empty was checked before."""
    return tuple((name, value) for name, value in static if name != "empty")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chamfer(static: Options, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, _ = call("chamfer", static, x, y)
    return loss


def _chamfer_forward(static: Options, x: jax.Array, y: jax.Array) -> Any:
    loss, residuals = last_call("chamfer", static, x, y)
    return loss, (x, y, residuals)


def _chamfer_backward(static: Options, saved: Any, dloss: jax.Array) -> Any:
    return tuple(last_call("chamfer_backward", _without_empty(static), dloss, *saved))


_chamfer.defvjp(_chamfer_forward, _chamfer_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chamfer_points(static: Options, x: jax.Array, y: jax.Array) -> Any:
    return call("chamfer_points", static, x, y)


def _points_forward(static: Options, x: jax.Array, y: jax.Array) -> Any:
    found = last_call("chamfer_points", static, x, y)
    return found, (x, y, *found)


def _points_backward(static: Options, saved: Any, cotangents: Any) -> Any:
    ddistances, _ = cotangents
    return tuple(last_call("chamfer_points_backward", _without_empty(static), ddistances, *saved))


_chamfer_points.defvjp(_points_forward, _points_backward)


def compare_clouds(
    x: jax.Array,
    y: jax.Array,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    thresholds: Sequence[float] = (),
) -> CloudComparison:
    """`gpu3d.compare_clouds` under jax.jit too. It has no gradient.

    Parameters
    ----------
    x, y : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.compare_clouds`; arrays, not a NeighborIndex. In a gradient pass ``jax.lax.stop_gradient(x)``.
    x_lengths, y_lengths, thresholds
        As in `gpu3d.compare_clouds`; static under jax.jit.

    Returns
    -------
    CloudComparison
        Its arrays are JAX's.

    Examples
    --------
    >>> x = jax.random.uniform(jax.random.key(0), (2, 100, 3))
    >>> jax.jit(lambda x: compare_clouds(x, x[:, :80], thresholds=(0.1, 0.2)))(x).fscore.shape
    (2, 2)
    """
    _check_arrays(x=x, y=y)
    _check_lengths(x_lengths=x_lengths, y_lengths=y_lengths)
    checked = metrics.check_compare_clouds(spec(x), spec(y), x_lengths, y_lengths, thresholds)
    return CloudComparison(*_compare_clouds(options(**checked._asdict()), *alike(_packed(x), _packed(y))))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _compare_clouds(static: Options, x: jax.Array, y: jax.Array) -> Any:
    return call("compare_clouds", static, x, y)


@_compare_clouds.defjvp
def _no_derivative(static: Options, primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "compare_clouds has no derivative, and jax asked for one with respect to x or y: pass jax.lax.stop_gradient of "
        "both."
    )


def apml(
    pred: jax.Array,
    target: jax.Array,
    *,
    pred_lengths: Sequence[int] | None = None,
    target_lengths: Sequence[int] | None = None,
    p_min: float = 0.8,
    threshold: float = 1e-8,
    iterations: int = 20,
    symmetrize: str = "mean",
    reduction: str = "mean",
    max_entries: int | None = None,
) -> jax.Array:
    """`gpu3d.apml` with the gradients of pred and target, the plan held constant.

    Parameters
    ----------
    pred, target : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.apml`.
    pred_lengths, target_lengths, p_min, threshold, iterations, symmetrize, reduction
        As in `gpu3d.apml`; static under jax.jit.
    max_entries : int, optional
        As in `gpu3d.apml`, but entries are not counted on the host here. The default is
        min(sum of n_b * m_b over the clouds, max(16 * (N + M), 2**18)). If there are more, the loss and its gradients
        are NaN.

    Returns
    -------
    Array [], or [B] for reduction "none"

    Examples
    --------
    >>> x = jax.random.uniform(jax.random.key(0), (2, 100, 3))
    >>> loss, gradient = jax.jit(jax.value_and_grad(apml))(x, x[:, ::-1] + 0.1)
    >>> loss.shape, gradient.shape
    ((), (2, 100, 3))
    """
    _check_arrays(pred=pred, target=target)
    _check_lengths(pred_lengths=pred_lengths, target_lengths=target_lengths)
    lengths = pred_lengths, target_lengths
    given = p_min, threshold, iterations, symmetrize
    checked = transport.check_apml(spec(pred), spec(target), *lengths, *given, reduction, max_entries)
    lengths = checked.pred_lengths, checked.target_lengths
    static = options(
        **checked.options._asdict(),
        pred_lengths=checked.pred_lengths,
        target_lengths=checked.target_lengths,
        reduction=reduction,
        max_entries=_max_entries(*lengths) if max_entries is None else checked.max_entries,
    )
    return _apml(static, lengths, *alike(_packed(pred), _packed(target)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apml(static: Options, lengths: tuple[tuple[int, ...], ...], pred: jax.Array, target: jax.Array) -> jax.Array:
    loss, _, _ = call("apml", options(**dict(static), with_grad=False), pred, target)
    return loss


def _apml_forward(
    static: Options, lengths: tuple[tuple[int, ...], ...], pred: jax.Array, target: jax.Array
) -> tuple[jax.Array, Any]:
    """Compute the loss and both gradients, because one plan gives both."""
    loss, *gradients = last_call("apml", options(**dict(static), with_grad=True), pred, target)
    return loss, gradients


def _apml_backward(static: Options, lengths: tuple[tuple[int, ...], ...], gradients: Any, dloss: jax.Array) -> Any:
    pred_lengths, target_lengths = lengths
    static = options(pred_lengths=pred_lengths, target_lengths=target_lengths)
    return tuple(last_call("apml_backward", static, dloss, *gradients))


_apml.defvjp(_apml_forward, _apml_backward)
