# SPDX-License-Identifier: Apache-2.0
"""In-bucket pooling: 2, 4 or 8 neighbours of a tile become one point, and the result is a bucket layout again.

No global sort and no neighbour search: the buckets have made neighbours of the points of a tile already. Unpooling
takes the rows of the children back to their members.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d.buckets import Buckets, _bucket_offsets
from gpu3d.reference import pooling as reference


@dataclass(frozen=True, eq=False)
class Pooling:
    """A pooled cloud, made by `bucket_pool`, and what unpooling and the gradients need. Arrays are in slot order.

    Attributes
    ----------
    features : array [child slots, C]
        The features of the children, of the dtype they came in; 0 in padding.
    points : array [child slots, 3]
        The means of the members' points, of the points' dtype and unit; 0 in padding.
    buckets : Buckets
        The layout of the children: ceil(n / ratio) a cloud, in buckets of the parent's size. `slot_to_point` numbers
        the children in slot order.
    members : array int32 [child slots, ratio]
        The parent slots that became each child; -1 where there is none: in the last group of a cloud, and in padding.
    ratio : int
    reduce : str
        As given to `bucket_pool`.
    argmember : array uint8 [child slots, C] or None
        Which of its members a child's feature is from: member ``members[child, argmember[child, c]]``, the first that
        attains it. 0 in padding. None for sum and mean.
    parent : Buckets
        The layout that was pooled.
    """

    features: Any
    points: Any
    buckets: Buckets
    members: Any
    ratio: int
    reduce: str
    argmember: Any
    parent: Buckets


def bucket_pool(features: Any, points: Any, buckets: Buckets, *, ratio: int = 2, reduce: str = "mean") -> Pooling:
    """Pool each `ratio` neighbours of a tile into one child, and hand on a smaller cloud in the same kind of layout.

    A tile is 1024 consecutive slots counted from a cloud's first slot, whatever the bucket size. Its points are ordered
    by their Morton code in a grid of 1024 cubic voxels along the tile's largest extent, ties by slot, and cut into
    groups of `ratio`. Each group is a child; only a cloud's last may be short. Children keep that order.

    Parameters
    ----------
    features : array [num_slots, C]
        Rows in slot order (`Buckets.scatter`): float16, bfloat16 or float32, on the CPU float64 too. Any strides; C
        may be 0. Rows of padding slots may hold anything, NaN too.
    points : array [num_slots, 3]
        Coordinates in slot order: float32, float64, float16 or bfloat16, on the features' device. Not differentiated.
        Rows of padding slots may hold anything.
    buckets : Buckets
        The layout of the slots.
    ratio : {2, 4, 8}
        Points a child.
    reduce : {"mean", "sum", "min", "max"}
        What a child's feature is of its members'. min and max propagate NaN.

    Returns
    -------
    Pooling
        With arrays of the kind of `features`. The same call gives the same bits, on CPU and GPU alike.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Voxels are rounded as those of `bucketize`: float32, each operation once, float64 coordinates relative to the tile's
    minimum. A non-finite coordinate counts as the last voxel of its axis, and makes the mean of its group's points
    non-finite. Sums are float32 (float64 for float64), from the first member on, then divided once and rounded once.
    No host sync; capturable in a CUDA graph after a first call.

    Flash3D hashes the points of a tile into sub-buckets and moves the overflow between them. Ordering them by Morton
    code and cutting is the same step with no choice left open: every group but a cloud's last is full, and every run
    gives the same ones.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024, sections 4.2 and 9.4,
    "In-bucket Pooling".

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> points = rng.random((1000, 3), dtype=np.float32)
    >>> features = rng.standard_normal((1000, 8), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 256)
    >>> pooled = gpu3d.bucket_pool(buckets.scatter(features), buckets.scatter(points), buckets, ratio=4)
    >>> pooled.features.shape, pooled.buckets.lengths, pooled.members.shape
    ((256, 8), (250,), (256, 4))
    >>> again = gpu3d.bucket_pool(pooled.features, pooled.points, pooled.buckets, ratio=2, reduce="max")
    >>> again.buckets.lengths
    (125,)
    """
    _check_buckets(buckets)
    native, origin = _entered_rows(features, "features", buckets, "buckets")
    native_points = _checked_points(points, buckets, origin)
    ratio = _checked_ratio(ratio)
    _arrays.check_choice(reduce, reference.REDUCTIONS, "reduce")
    with _arrays.on(origin):
        if origin.device is None:
            layout = buckets.bucket_size, buckets.lengths
            arrays = reference.bucket_pool(native, native_points, *layout, ratio, reduce)
        else:
            arrays = _pool_cuda(native, native_points, buckets, ratio, reduce)
        pooled, pooled_points, members, argmember, slot_to_point, point_to_slot, moved = (
            None if array is None else _arrays.leave(array, origin) for array in arrays
        )
    lengths, bucket_offsets = _child_layout(buckets.lengths, buckets.bucket_size, ratio)
    child = Buckets(slot_to_point, point_to_slot, moved, buckets.bucket_size, lengths, bucket_offsets)
    return Pooling(pooled, pooled_points, child, members, ratio, reduce, argmember, buckets)


def bucket_pool_backward(dchild_features: Any, pooled: Pooling) -> Any:
    """The gradient of `bucket_pool` with respect to its features.

    Parameters
    ----------
    dchild_features : array [child slots, C]
        Gradient of a loss with respect to ``pooled.features``, of their dtype. Rows of padding slots may hold anything.
    pooled : Pooling
        What the forward returned.

    Returns
    -------
    array [num_slots, C]
        Of dchild_features' library and dtype; 0 in padding slots. A child's gradient goes to each of its members
        (sum), divided by how many they are (mean), or whole to the first that attains the minimum or maximum.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Deterministic: each row is written once. No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> points = rng.random((100, 3), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 64)
    >>> features = buckets.scatter(rng.standard_normal((100, 8), dtype=np.float32))
    >>> pooled = gpu3d.bucket_pool(features, buckets.scatter(points), buckets, reduce="max")
    >>> dfeatures = gpu3d.bucket_pool_backward(np.ones_like(pooled.features), pooled)
    >>> dfeatures.shape, float(dfeatures.sum())
    ((128, 8), 400.0)
    """
    _check_pooling(pooled)
    native, origin = _entered_rows(dchild_features, "dchild_features", pooled.buckets, "pooled.buckets")
    saved = pooled.features, pooled.members, pooled.argmember
    like, members, argmember = _entered_beside(origin, "dchild_features", *saved)
    if native.shape != like.shape:
        raise ValueError(
            f"dchild_features must have the shape of pooled.features, got {list(native.shape)} for {list(like.shape)}."
        )
    _check_dtype(native, "dchild_features", like, "pooled.features")
    with _arrays.on(origin):
        if origin.device is None:
            dfeatures = reference.bucket_pool_backward(
                native, members, argmember, pooled.parent.num_slots, pooled.reduce
            )
        else:
            layouts = pooled.parent, pooled.buckets
            dfeatures = _pool_backward_cuda(native, members, argmember, *layouts, pooled.ratio, pooled.reduce)
        return _arrays.leave(dfeatures, origin)


def bucket_unpool(child_features: Any, pooled: Pooling, skip: Any = None) -> Any:
    """Rows of children back to the slots of their members: ``out[m] = child_features[parent of m] + skip[m]``.

    Parameters
    ----------
    child_features : array [child slots, C]
        Rows in the order of ``pooled.buckets``: float16, bfloat16 or float32, on the CPU float64 too. Any width. Rows
        of padding slots may hold anything.
    pooled : Pooling
        Which slots became which child.
    skip : array [num_slots, C], optional
        Rows of the parent's slots, of child_features' dtype, that are added.

    Returns
    -------
    array [num_slots, C]
        Of child_features' library and dtype; 0 in padding slots. The sum is float32 (float64 for float64), rounded
        once.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((100, 3), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 64)
    >>> in_slots = buckets.scatter(points)
    >>> pooled = gpu3d.bucket_pool(in_slots, in_slots, buckets)
    >>> gpu3d.bucket_unpool(pooled.features, pooled, skip=-in_slots).shape  # from each point to its pair's mean
    (128, 3)
    """
    _check_pooling(pooled)
    native, origin = _entered_rows(child_features, "child_features", pooled.buckets, "pooled.buckets")
    (members,) = _entered_beside(origin, "child_features", pooled.members)
    native_skip = None
    if skip is not None:
        native_skip, skip_origin = _entered_rows(skip, "skip", pooled.parent, "pooled.parent")
        if skip_origin.device != origin.device:
            _arrays.check_same_device(child_features=origin, skip=skip_origin)
        if native_skip.shape[1] != native.shape[1]:
            raise ValueError(
                f"skip must have the {native.shape[1]} columns of child_features, got shape {list(native_skip.shape)}."
            )
        _check_dtype(native_skip, "skip", native, "child_features")
    with _arrays.on(origin):
        if origin.device is None:
            out = reference.bucket_unpool(native, members, native_skip, pooled.parent.num_slots)
        else:
            out = _unpool_cuda(native, members, native_skip, pooled.parent, pooled.buckets, pooled.ratio)
        return _arrays.leave(out, origin)


def bucket_unpool_backward(dout: Any, pooled: Pooling) -> tuple[Any, Any]:
    """The gradients of `bucket_unpool` with respect to child_features and skip.

    Parameters
    ----------
    dout : array [num_slots, C]
        Gradient of a loss with respect to the result of `bucket_unpool`: float16, bfloat16 or float32, on the CPU
        float64 too. Rows of padding slots may hold anything.
    pooled : Pooling
        As given to the forward.

    Returns
    -------
    dchild : array [child slots, C]
        The sum over a child's members, in their order, in float32 (float64 for float64), rounded once; 0 in padding
        slots.
    dskip : array [num_slots, C]
        dout, and 0 in padding slots. Both of dout's library and dtype.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Deterministic: each row is summed in a fixed order. No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((101, 3), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 64)
    >>> in_slots = buckets.scatter(points)
    >>> pooled = gpu3d.bucket_pool(in_slots, in_slots, buckets)
    >>> dchild, dskip = gpu3d.bucket_unpool_backward(np.ones_like(in_slots), pooled)
    >>> dchild[49:52, 0]  # a pair, the last point alone, padding
    array([2., 1., 0.], dtype=float32)
    """
    _check_pooling(pooled)
    native, origin = _entered_rows(dout, "dout", pooled.parent, "pooled.parent")
    (members,) = _entered_beside(origin, "dout", pooled.members)
    with _arrays.on(origin):
        if origin.device is None:
            gradients = reference.bucket_unpool_backward(native, members)
        else:
            gradients = _unpool_backward_cuda(native, members, pooled.parent, pooled.buckets, pooled.ratio)
        dchild, dskip = (_arrays.leave(gradient, origin) for gradient in gradients)
    return dchild, dskip


@functools.lru_cache(maxsize=1024)
def _child_layout(lengths: tuple[int, ...], bucket_size: int, ratio: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The children's lengths and bucket_offsets."""
    children = tuple(-(-n // ratio) for n in lengths)
    return children, _bucket_offsets(children, bucket_size)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_buckets(buckets: Any) -> None:
    if not isinstance(buckets, Buckets):
        raise TypeError(f"buckets must be the Buckets that gpu3d.bucketize returns, got {type(buckets).__name__}.")


def _check_pooling(pooled: Any) -> None:
    if not isinstance(pooled, Pooling):
        raise TypeError(f"pooled must be the Pooling that gpu3d.bucket_pool returns, got {type(pooled).__name__}.")


def _checked_ratio(ratio: Any) -> int:
    ratio = _arrays.check_integer(ratio, "ratio")
    if ratio not in reference.RATIOS:
        raise ValueError(f"ratio must be 2, 4 or 8, got {ratio}: pool several times for a larger one.")
    return ratio


def _entered_rows(x: Any, name: str, buckets: Buckets, where: str) -> tuple[Any, _arrays.Origin]:
    """Features [num_slots, C] in the slots of `buckets`, which the caller knows as `where`; and their origin."""
    native, origin = _arrays.enter(x, name)
    if native.ndim != 2:
        raise ValueError(
            f"{name} must have shape [num_slots, C], got {list(native.shape)}: "
            f"reshape by {name}.reshape(len({name}), -1)."
        )
    if native.dtype not in _arrays.FLOATS or (origin.device is not None and native.dtype == np.float64):
        accepted = "float16, bfloat16, float32 or float64"
        if origin.device is not None:
            accepted = "float16, bfloat16 or float32 on a GPU"
        raise TypeError(f"{name} must be {accepted}, got {native.dtype}: convert by {name}.astype('float32').")
    _check_slots(native, name, buckets, where)
    return native, origin


def _checked_points(points: Any, buckets: Buckets, features_origin: _arrays.Origin) -> Any:
    native, origin = _arrays.enter(points, "points")
    if origin.device != features_origin.device:
        _arrays.check_same_device(features=features_origin, points=origin)
    if native.ndim != 2 or native.shape[1] != 3:
        raise ValueError(f"points must have shape [num_slots, 3], got {list(native.shape)}.")
    if native.dtype not in _arrays.FLOATS:
        raise TypeError(
            f"points must be float32, float64, float16 or bfloat16, got {native.dtype}: "
            "convert by points.astype('float32')."
        )
    _check_slots(native, "points", buckets, "buckets")
    return native


def _check_slots(native: Any, name: str, buckets: Buckets, where: str) -> None:
    if native.shape[0] != buckets.num_slots:
        raise ValueError(
            f"{name} must have one row for each of the {buckets.num_slots} slots of {where}, got shape "
            f"{list(native.shape)}: bring points into slots by {where}.scatter({name})."
        )


def _entered_beside(origin: _arrays.Origin, name: str, *arrays: Any) -> list[Any]:
    """Arrays of `pooled`, which must be on the device of the argument `name`; None stays None."""
    entered = [(None, origin) if array is None else _arrays.enter(array, "pooled") for array in arrays]
    for _, other in entered:
        if other.device != origin.device:
            _arrays.check_same_device(**{name: origin, "pooled": other})
    return [native for native, _ in entered]


def _check_dtype(native: Any, name: str, like: Any, other: str) -> None:
    if native.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other}, got {native.dtype} for {like.dtype}: "
            f"convert by {name}.astype('{like.dtype}')."
        )


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def _pool_cuda(
    features: Any, points: Any, buckets: Buckets, ratio: int, reduce: str
) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """Child features and points, members, argmember or None, slot_to_point, point_to_slot, moved."""
    raise NotImplementedError


def _pool_backward_cuda(
    dchild: Any,
    members: Any,
    argmember: Any,
    parent_buckets: Buckets,
    child_buckets: Buckets,
    ratio: int,
    reduce: str,
) -> Any:
    """The gradient of the parent's features."""
    raise NotImplementedError


def _unpool_cuda(
    child: Any, members: Any, skip: Any, parent_buckets: Buckets, child_buckets: Buckets, ratio: int
) -> Any:
    """The rows of the children in the slots of their members, and skip added unless it is None."""
    raise NotImplementedError


def _unpool_backward_cuda(
    dout: Any, members: Any, parent_buckets: Buckets, child_buckets: Buckets, ratio: int
) -> tuple[Any, Any]:
    """The gradients of the child's rows and of skip."""
    raise NotImplementedError
