# SPDX-License-Identifier: Apache-2.0
"""gpu3d for JAX: the same calls under jax.jit, jax.grad, jax.vmap and jax.shard_map.

Each op is a plain call of gpu3d, the same kernels and the same bits, that XLA runs as a foreign function (`jax.ffi`).
The function is Python's own, handed to XLA by ctypes (interop/_xla.py), on the CPU as on CUDA. jax-tvm-ffi would do the
same through a compiled shim: it hands over DLPack tensors, which cost CuPy 62 us an array where a pointer costs 2, and
it would add two packages that are not built for every platform. On CUDA nothing is copied to the host and nothing waits
for the GPU; a call runs on XLA's stream, and its results and workspaces are XLA's memory.

Where there is a GPU when a program is traced, a dry run of each call tells what it launches and how much workspace it
needs. The workspace is one more result of the foreign function then. From its second run on XLA calls play.c, which
launches the same again without Python, if the machine has a C compiler; and XLA may record the op in a command buffer
(a CUDA graph), and ask nobody. By default it does so where five or more of a program's operations can be recorded;
jax.jit(..., compiler_options={"xla_gpu_graph_min_graph_size": 1}) has it record fewer. Ops that are not recorded, as
those of 2-D and of float64 clouds, whose calls have CuPy's own kernels in them, and bucketize with check_finite=True,
give their workspace back when the call has been enqueued.

`Buckets`, `Scopes` and `Pooling` are pytrees: arrays are leaves, lengths and sizes are static. jit compiles a function
anew for other lengths. scatter, gather and scopes are JAX's own gathers and constants, which XLA fuses with what
surrounds them.

vmap runs the other ops once for each element, in a loop on the device; many clouds are faster as one batch, by
`lengths` or as [B, n, 3]. In a program over several devices wrap them in shard_map, as any foreign function: each
device then has its own clouds, and all of them the same lengths.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

try:
    import jax
except ImportError as error:
    raise ImportError('gpu3d.interop.jax needs jax: pip install "gpu3d[jax]".') from error

import numpy as np
from jax import numpy as jnp

import gpu3d
from gpu3d import _arrays, attention, neighbors, pooling
from gpu3d import buckets as layouts
from gpu3d.apml import _entered_array
from gpu3d.buckets import Buckets, Scopes
from gpu3d.interop import _layouts, _xla
from gpu3d.pooling import Pooling

__all__ = [
    "apml",
    "bucket_attention",
    "bucket_pool",
    "bucket_unpool",
    "bucketize",
    "chamfer",
    "gather",
    "scatter",
    "scopes",
]

if jax.__version_info__ < (0, 6):
    raise ImportError(f'gpu3d.interop.jax needs jax >= 0.6, got {jax.__version__}: pip install --upgrade "gpu3d[jax]".')

# ---- pytrees -------------------------------------------------------------------------------------------------------

for _class, _arrays_of, _static in (
    (Buckets, ("slot_to_point", "point_to_slot", "moved"), ("bucket_size", "lengths", "bucket_offsets")),
    (Scopes, ("table",), ("size", "shift", "stride", "bucket_size", "bucket_offsets")),
    (Pooling, ("features", "points", "buckets", "members", "argmember", "parent"), ("ratio", "reduce")),
):
    jax.tree_util.register_dataclass(_class, data_fields=_arrays_of, meta_fields=_static)


# ---- foreign calls -------------------------------------------------------------------------------------------------

_TARGET, _RECORDABLE = "gpu3d", "gpu3d_recordable"
for _platform in ("cpu", "CUDA"):
    for _target in (_TARGET, _RECORDABLE):
        _handler = _xla.handler(_platform, _target == _RECORDABLE)
        jax.ffi.register_ffi_target(_target, jax.ffi.pycapsule(_handler), platform=_platform)


def _finish() -> None:
    """Waits for programs that are still running: the interpreter lets no thread call it once it has begun to end.

    JAX would wait for such a call for ever. Arrays that somebody holds say when they are ready. A program whose results
    nobody holds ends before a later one of its thread.
    """
    with contextlib.suppress(Exception):  # what a program failed with is told to whoever reads its results
        bucketize(jnp.zeros((0, 3))).moved.block_until_ready()
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):
            array.block_until_ready()


@functools.cache
def _finish_at_exit() -> None:
    """From the first call on: a program without one is not held up."""
    atexit.register(_finish)


_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_Options = tuple[tuple[str, Any], ...]  # static arguments, which JAX hashes


def _options(**options: Any) -> _Options:
    return tuple(sorted(options.items()))


def _like(x: Any, shape: Sequence[int] | None = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """A result of x's shape and dtype, but where others are given."""
    return jax.ShapeDtypeStruct(x.shape if shape is None else tuple(shape), x.dtype if dtype is None else dtype)


def _call(name: str, options: _Options, results: Sequence[jax.ShapeDtypeStruct], *arrays: jax.Array) -> tuple[Any, ...]:
    """The results of a call of _xla.CALLS."""
    static = dict(options)
    workspace = _xla.workspace(name, static, arrays, results) if jax.default_backend() == "gpu" else None
    call = _xla.attribute(name, static, arrays, results, workspace)
    count = len(results)
    if workspace:
        results = [*results, _like(arrays[0], (workspace,), np.dtype(np.uint8))]
    if _varying(arrays[0]):  # and so do all: see _alike
        of = jax.typeof(arrays[0])
        sharding = jax.sharding.NamedSharding(of.sharding.mesh, jax.sharding.PartitionSpec())
        manual = {"sharding": sharding, _MANUAL: getattr(of, _MANUAL)}
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype, **manual) for x in results]
    _finish_at_exit()
    target = _TARGET if workspace is None else _RECORDABLE
    run = jax.ffi.ffi_call(target, list(results), vmap_method="sequential")
    return tuple(run(*arrays, call=call)[:count])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _last_call(name: str, options: _Options, results: tuple[jax.ShapeDtypeStruct, ...], *arrays: jax.Array) -> Any:
    """The same inside of a gradient, where a derivative is an error."""
    return _call(name, options, results, *arrays)


@_last_call.defjvp
def _no_second_derivative(name: str, options: _Options, results: Any, primals: Any, tangents: Any) -> Any:
    raise RuntimeError(
        f"gpu3d has no second derivatives: jax asked for the derivative of {name} inside of a gradient. Apply "
        "jax.lax.stop_gradient to what the inner gradient is taken at, or do without the outer one."
    )


# What JAX releases call it that an array differs along axes of a mesh, in its type and as a cast.
_MANUAL = "manual_axis_type" if hasattr(jax.typeof(0), "manual_axis_type") else "vma"  # from 0.10 on
_vary: Any = (
    functools.partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else getattr(jax.lax, "pvary", None)
)


def _varying(x: Any) -> frozenset[Any]:
    manual = getattr(jax.typeof(x), _MANUAL)
    return getattr(manual, "varying", manual)


def _alike(*arrays: Any) -> list[Any]:
    """Arrays for one call: inside of shard_map all vary along the same axes; the gradient of one that did not is a sum.

    JAX does this by itself for its own operations.
    """
    every: frozenset[Any] = frozenset().union(*map(_varying, arrays))
    cast = [(x, tuple(every - _varying(x))) for x in arrays]
    return [_vary(x, missing) if missing else x for x, missing in cast]


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_arrays(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, jax.Array):
            raise TypeError(
                f"{name} must be a JAX array, got {type(x).__name__}: convert it (jax.device_put takes Buckets, Scopes "
                "and Pooling too), or call the gpu3d function of the same name, which takes arrays of any library."
            )


def _check_lengths(**named: Any) -> None:
    for name, lengths in named.items():
        if isinstance(lengths, jax.Array):
            raise TypeError(
                f"{name} must be host integers, got a JAX array: shapes follow from them. Under jax.jit pass a tuple, "
                "named in static_argnames."
            )


def _shadow(x: Any) -> np.ndarray:
    """An array of x's shape and dtype with no memory, for the checks of the plain calls: x may be a tracer."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


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
    check_finite: bool | None = None,
) -> Buckets:
    """`gpu3d.bucketize` under jax.jit too. Not differentiable: no gradient flows to `points`.

    Parameters
    ----------
    points : Array [N, 3] or [B, n, 3]
        As in `gpu3d.bucketize`, and so are the options.
    bucket_size, lengths, hash, balance, voxel_size, seed, check_finite
        As in `gpu3d.bucketize`; static under jax.jit. What check_finite finds is an error of the compiled program.

    Returns
    -------
    Buckets
        Its arrays are JAX's. Its methods scatter and gather are the plain ones: use `scatter` and `gather` of this
        module.

    Examples
    --------
    >>> points = jax.random.uniform(jax.random.key(0), (1000, 3))
    >>> buckets = jax.jit(lambda points: bucketize(points, 256))(points)
    >>> buckets.slot_to_point.shape, buckets.lengths
    ((1024,), (1000,))
    """
    _check_arrays(points=points)
    _check_lengths(lengths=lengths)
    _, lengths = _arrays.check_points(_shadow(points), lengths)
    options: dict[str, Any] = {"hash": hash, "balance": balance, "voxel_size": voxel_size, "seed": seed}
    gpu3d.bucketize(np.empty((0, 3), np.float32), bucket_size, **options)  # which checks them
    bucket_size, options["seed"] = int(bucket_size), int(seed)
    if voxel_size is not None and voxel_size != "per_axis":
        options["voxel_size"] = float(voxel_size)
    if check_finite is not None:
        options["check_finite"] = bool(check_finite)
    packed = jax.lax.stop_gradient(points.reshape(-1, 3))
    shapes = (_layouts.num_slots(lengths, bucket_size),), (packed.shape[0],), ()
    results = [_like(packed, shape, _INT32) for shape in shapes]
    structure = _call("bucketize", _options(bucket_size=bucket_size, lengths=lengths, **options), results, packed)
    return _buckets(structure, bucket_size, lengths)


def _buckets(structure: Sequence[jax.Array], bucket_size: int, lengths: tuple[int, ...]) -> Buckets:
    slot_to_point, point_to_slot, moved = structure
    offsets = layouts._bucket_offsets(lengths, bucket_size)
    return Buckets(slot_to_point, point_to_slot, moved, bucket_size, lengths, offsets)


def scopes(buckets: Buckets, size: int = 8, *, shift: int = 0, stride: int = 1) -> Scopes:
    """`gpu3d.scopes` under jax.jit too, where the table is a constant. A hand-made table goes to `gpu3d.scopes`.

    Parameters
    ----------
    buckets : Buckets
        Its lengths alone matter.
    size, shift, stride : int
        As in `gpu3d.scopes`.

    Returns
    -------
    Scopes
        Its table is a JAX array.
    """
    pooling._check_buckets(buckets)
    host = replace(buckets, slot_to_point=np.empty(0, _INT32), point_to_slot=None, moved=None)
    made = gpu3d.scopes(host, size, shift=shift, stride=stride)
    return replace(made, table=jnp.asarray(made.table))


def scatter(x: jax.Array, buckets: Buckets, fill: float = 0) -> jax.Array:
    """Rows of points into slots, as `Buckets.scatter`, with a gradient: `gather` of the result's.

    Parameters
    ----------
    x : Array [N, ...]
        One row a point.
    buckets : Buckets
        With JAX arrays.
    fill : scalar
        What padding holds.

    Returns
    -------
    Array [num_slots, ...]
    """
    pooling._check_buckets(buckets)
    _check_arrays(x=x, buckets=buckets.slot_to_point)
    _check_rows(x, len(buckets.point_to_slot), "x", "points")
    x, index, inverse = _alike(x, buckets.slot_to_point, buckets.point_to_slot)
    return _move(x, index, inverse, fill)


def gather(y: jax.Array, buckets: Buckets) -> jax.Array:
    """Rows of slots back to points, as `Buckets.gather`, with a gradient: `scatter` of the result's, 0 in padding.

    Parameters
    ----------
    y : Array [num_slots, ...]
        One row a slot.
    buckets : Buckets
        With JAX arrays.

    Returns
    -------
    Array [N, ...]
    """
    pooling._check_buckets(buckets)
    _check_arrays(y=y, buckets=buckets.slot_to_point)
    _check_rows(y, buckets.num_slots, "y", "slots")
    y, index, inverse = _alike(y, buckets.point_to_slot, buckets.slot_to_point)
    return _move(y, index, inverse, 0)


def _check_rows(x: Any, rows: int, name: str, what: str) -> None:
    if x.ndim == 0 or x.shape[0] != rows:
        raise ValueError(f"{name} must have one row for each of the {rows} {what}, got shape {list(x.shape)}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _move(x: jax.Array, index: jax.Array, inverse: jax.Array, fill: Any) -> jax.Array:
    """Rows x[index], `fill` where the index is -1; `inverse` is where each row of x goes, or -1."""
    beyond = jnp.where(index < 0, x.shape[0], index)  # JAX counts -1 from the end
    return jnp.take(x, beyond, axis=0, mode="fill", fill_value=fill)


def _move_forward(x: jax.Array, index: jax.Array, inverse: jax.Array, fill: Any) -> Any:
    return _move(x, index, inverse, fill), (index, inverse)


def _move_backward(fill: Any, saved: Any, dout: jax.Array) -> Any:
    index, inverse = saved  # every row goes to one place, so the way back is a move too
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
        Which buckets attend to each other, with a JAX array as table.
    scale, return_lse
        As in `gpu3d.bucket_attention`; static under jax.jit.

    Returns
    -------
    out : Array [num_slots, H, D]
    lse : Array float32 [num_slots, H]
        Only with return_lse. Not differentiated.

    Examples
    --------
    >>> buckets = bucketize(jax.random.uniform(jax.random.key(0), (1000, 3)), 64)
    >>> window = scopes(buckets, 4, shift=2)
    >>> loss = lambda q: bucket_attention(q, q, q, buckets, window).sum()
    >>> jax.jit(jax.grad(loss))(jax.random.normal(jax.random.key(1), (1024, 4, 16))).shape
    (1024, 4, 16)
    """
    _check_arrays(q=q, k=k, v=v)
    attention._check_layout(buckets, scopes)
    _check_arrays(scopes=scopes.table)
    shadows = {"q": _shadow(q), "k": _shadow(k), "v": _shadow(v)}
    attention._checked_inputs(shadows, buckets, replace(scopes, table=_shadow(scopes.table)))
    scale = attention._checked_scale(scale, q.shape[-1])
    options = _options(bucket_size=buckets.bucket_size, lengths=buckets.lengths, scale=scale)
    out, lse = _attention(options, *_alike(q, k, v, scopes.table))
    return (out, jax.lax.stop_gradient(lse)) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> Any:
    return _call("bucket_attention", options, _attended(q), q, k, v, table)


def _attended(q: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return _like(q), _like(q, q.shape[:2], np.float64 if q.dtype == np.float64 else np.float32)


def _attention_forward(options: _Options, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> Any:
    out, lse = _last_call("bucket_attention", options, _attended(q), q, k, v, table)
    return (out, lse), (q, k, v, out, lse, table)


def _attention_backward(options: _Options, saved: Any, cotangents: Any) -> Any:
    dout, _ = cotangents
    results = (_like(dout),) * 3
    return *_last_call("bucket_attention_backward", options, results, dout, *saved), None


_attention.defvjp(_attention_forward, _attention_backward)


# ---- pooling -------------------------------------------------------------------------------------------------------


def bucket_pool(
    features: jax.Array, points: jax.Array, buckets: Buckets, *, ratio: int = 2, reduce: str = "mean"
) -> Pooling:
    """`gpu3d.bucket_pool` with the gradient of `features`; points are not differentiated.

    Parameters
    ----------
    features : Array [num_slots, C]
        As in `gpu3d.bucket_pool`.
    points : Array [num_slots, 3]
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
    pooling._check_buckets(buckets)
    _, origin = pooling._entered_rows(_shadow(features), "features", buckets, "buckets")
    pooling._checked_points(_shadow(points), buckets, origin)
    ratio = pooling._checked_ratio(ratio)
    _arrays.check_choice(reduce, pooling.reference.REDUCTIONS, "reduce")
    options = _options(bucket_size=buckets.bucket_size, lengths=buckets.lengths, ratio=ratio, reduce=reduce)
    pooled, *others = _pool(options, *_alike(features, jax.lax.stop_gradient(points)))
    pooled_points, members, slot_to_point, point_to_slot, moved, *extremes = map(jax.lax.stop_gradient, others)
    structure = slot_to_point, point_to_slot, moved
    child = _buckets(structure, buckets.bucket_size, _layouts.children(buckets.lengths, ratio))
    return Pooling(pooled, pooled_points, child, members, ratio, reduce, extremes[0] if extremes else None, buckets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(options: _Options, features: jax.Array, points: jax.Array) -> Any:
    return _call("bucket_pool", options, _children(options, features, points), features, points)


def _children(options: _Options, features: jax.Array, points: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    static = dict(options)
    children = _layouts.children(static["lengths"], static["ratio"])
    slots, columns = _layouts.num_slots(children, static["bucket_size"]), features.shape[1]
    results = [_like(features, (slots, columns)), _like(points, (slots, 3))]
    results += [_like(features, shape, _INT32) for shape in ((slots, static["ratio"]), (slots,), (sum(children),), ())]
    if static["reduce"] in ("min", "max"):
        results.append(_like(features, (slots, columns), np.uint8))
    return tuple(results)


def _pool_forward(options: _Options, features: jax.Array, points: jax.Array) -> Any:
    made = _last_call("bucket_pool", options, _children(options, features, points), features, points)
    _, _, members, _, _, _, *extremes = made
    return made, (members, *extremes, points)


def _pool_backward(options: _Options, saved: Any, cotangents: Any) -> Any:
    dchild, *_ = cotangents
    *of_children, points = saved
    results = (_like(dchild, (points.shape[0], dchild.shape[1])),)
    (dfeatures,) = _last_call("bucket_pool_backward", options, results, dchild, *of_children)
    return dfeatures, jnp.zeros_like(points)


_pool.defvjp(_pool_forward, _pool_backward)


def bucket_unpool(child_features: jax.Array, pooled: Pooling, skip: jax.Array | None = None) -> jax.Array:
    """`gpu3d.bucket_unpool` with the gradients of child_features and skip.

    Parameters
    ----------
    child_features : Array [child slots, C]
        As in `gpu3d.bucket_unpool`.
    pooled : Pooling
        Which slots became which child.
    skip : Array [num_slots, C], optional
        Rows of the parent's slots, of child_features' dtype, that are added.

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
    pooling._check_pooling(pooled)
    _check_arrays(pooled=pooled.members)
    native, _ = pooling._entered_rows(_shadow(child_features), "child_features", pooled.buckets, "pooled.buckets")
    arrays = [child_features, pooled.members]
    if skip is not None:
        _check_arrays(skip=skip)
        native_skip, _ = pooling._entered_rows(_shadow(skip), "skip", pooled.parent, "pooled.parent")
        if skip.shape[1] != native.shape[1]:
            raise ValueError(
                f"skip must have the {native.shape[1]} columns of child_features, got shape {list(skip.shape)}."
            )
        pooling._check_dtype(native_skip, "skip", native, "child_features")
        arrays.append(skip)
    parent = pooled.parent
    options = _options(bucket_size=parent.bucket_size, lengths=parent.lengths, ratio=pooled.ratio)
    return _unpool(options, *_alike(*arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpool(options: _Options, child: jax.Array, members: jax.Array, *skip: jax.Array) -> jax.Array:
    (out,) = _call("bucket_unpool", options, _parents(options, child), child, members, *skip)
    return out


def _parents(options: _Options, child: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    static = dict(options)
    return (_like(child, (_layouts.num_slots(static["lengths"], static["bucket_size"]), child.shape[1])),)


def _unpool_forward(options: _Options, child: jax.Array, members: jax.Array, *skip: jax.Array) -> Any:
    (out,) = _last_call("bucket_unpool", options, _parents(options, child), child, members, *skip)
    return out, (members, len(skip))


def _unpool_backward(options: _Options, saved: Any, dout: jax.Array) -> Any:
    members, skips = saved
    results = _like(dout, (members.shape[0], dout.shape[1])), _like(dout)
    dchild, dskip = _last_call("bucket_unpool_backward", options, results, dout, members)
    return dchild, None, *(dskip,) * skips


_unpool.defvjp(_unpool_forward, _unpool_backward)


# ---- losses --------------------------------------------------------------------------------------------------------


def chamfer(
    x: jax.Array,
    y: jax.Array,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
) -> jax.Array:
    """`gpu3d.chamfer` with the gradients of x and y.

    Parameters
    ----------
    x, y : Array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.chamfer`; arrays, not a NeighborIndex.
    x_lengths, y_lengths, squared, reduction
        As in `gpu3d.chamfer`; static under jax.jit.

    Returns
    -------
    Array float32 [], or [B] for reduction "none"

    Examples
    --------
    >>> x = jax.random.uniform(jax.random.key(0), (2, 100, 3))
    >>> jax.jit(jax.grad(chamfer))(x, x[:, :80]).shape
    (2, 100, 3)
    """
    _check_arrays(x=x, y=y)
    _check_lengths(x_lengths=x_lengths, y_lengths=y_lengths)
    entered = [
        neighbors._entered(_shadow(x), x_lengths, "x", "x_lengths"),
        neighbors._entered(_shadow(y), y_lengths, "y", "y_lengths"),
    ]
    neighbors._check_pair(entered[0], "x", entered[1], "y")
    for side, name in zip(entered, ("x", "y"), strict=True):
        neighbors._check_no_empty_cloud(side, name)
    one = np.zeros((1, 3), np.float32)
    gpu3d.chamfer(one, one, squared=squared, reduction=reduction)  # which checks both
    lengths = [side.lengths for side in entered]
    options = _options(x_lengths=lengths[0], y_lengths=lengths[1], squared=bool(squared), reduction=reduction)
    return _loss("chamfer", options, ("x_lengths", "y_lengths"), *_alike(_packed(x), _packed(y)))


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
        As in `gpu3d.apml`, but the default is 16 * (N + M): entries are not counted on the host here. Where there are
        more, the loss and its gradients are NaN.

    Returns
    -------
    Array float32 [], or [B] for reduction "none"

    Examples
    --------
    >>> x = jax.random.uniform(jax.random.key(0), (2, 100, 3))
    >>> loss, gradient = jax.jit(jax.value_and_grad(apml))(x, x[:, ::-1] + 0.1)
    >>> loss.shape, gradient.shape
    ((), (2, 100, 3))
    """
    _check_arrays(pred=pred, target=target)
    _check_lengths(pred_lengths=pred_lengths, target_lengths=target_lengths)
    entered = [
        _entered_array(_shadow(pred), pred_lengths, "pred", "pred_lengths"),
        _entered_array(_shadow(target), target_lengths, "target", "target_lengths"),
    ]
    neighbors._check_pair(entered[0], "pred", entered[1], "target")
    one = np.zeros((1, 3), np.float32)
    if max_entries is None:
        max_entries = 16 * sum(sum(side.lengths) for side in entered)
    static: dict[str, Any] = {"iterations": iterations, "symmetrize": symmetrize, "reduction": reduction}
    static |= {"p_min": p_min, "threshold": threshold, "max_entries": max_entries}
    gpu3d.apml(one, one, **static)  # which checks them
    static |= {"p_min": float(p_min), "threshold": float(threshold)}
    static |= {"iterations": int(iterations), "max_entries": int(max_entries)}
    options = _options(pred_lengths=entered[0].lengths, target_lengths=entered[1].lengths, **static)
    return _loss("apml", options, ("pred_lengths", "target_lengths"), *_alike(_packed(pred), _packed(target)))


def _packed(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(name: str, options: _Options, lengths: tuple[str, str], x: jax.Array, y: jax.Array) -> jax.Array:
    (loss,) = _call(name, options, [_like_loss(options, lengths, x)], x, y)
    return loss


def _like_loss(options: _Options, lengths: tuple[str, str], x: jax.Array) -> jax.ShapeDtypeStruct:
    static = dict(options)
    return _like(x, (len(static[lengths[0]]),) if static["reduction"] == "none" else (), _FLOAT32)


def _loss_forward(name: str, options: _Options, lengths: tuple[str, str], x: jax.Array, y: jax.Array) -> Any:
    """The search or plan that gives the loss has found what pulls x and y."""
    results = _like_loss(options, lengths, x), _like(x), _like(y)
    loss, *gradients = _last_call(f"{name}_value_and_grad", options, results, x, y)
    return loss, gradients


def _loss_backward(
    name: str, options: _Options, lengths: tuple[str, str], gradients: Sequence[jax.Array], dloss: jax.Array
) -> Any:
    static = dict(options)
    return tuple([_pulled(gradient, dloss, static[side]) for gradient, side in zip(gradients, lengths, strict=True)])


def _pulled(gradient: jax.Array, dloss: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
    """The gradient of each cloud times that of its loss."""
    if dloss.ndim and lengths:
        # No jnp.repeat of the lengths: it would look for the cloud of each point on the device.
        if len(set(lengths)) == 1:
            dloss = jnp.broadcast_to(dloss[:, None], (len(lengths), lengths[0])).reshape(-1, 1)
        else:
            dloss = jnp.concatenate([jnp.broadcast_to(dloss[b], (n, 1)) for b, n in enumerate(lengths)])
    return (gradient * dloss).astype(gradient.dtype)


_loss.defvjp(_loss_forward, _loss_backward)
