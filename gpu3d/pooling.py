# SPDX-License-Identifier: Apache-2.0
"""In-bucket pooling: 2, 4 or 8 neighbours of a tile become one point, and the result is a bucket layout again.

There is no global sort and no neighbour search, because buckets hold neighbours already. Unpooling takes the rows of
the children back to their members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT64, FLOAT_DTYPES, INT32, UINT8, Given, Spec
from gpu3d.buckets import Buckets, bucket_offsets, buckets_of, check_buckets, counts_of, num_slots
from gpu3d.cuda import clouds, launcher
from gpu3d.cuda import pooling as cuda
from gpu3d.cuda.buckets import total
from gpu3d.cuda.plan import Call
from gpu3d.reference import pooling as reference

# ---- the result ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pooling:
    """A pooled batch of clouds, and what unpooling and the gradients need. `bucket_pool` makes it.

    The arrays are in slot order.

    Attributes
    ----------
    features : array [child slots, C]
        The features of the children, in the dtype of the parents' features. Padding slots hold 0.
    points : array [child slots, 3]
        The mean of the members' points, in their dtype and unit. Padding slots hold 0.
    buckets : Buckets
        The layout of the children. A cloud of n points has ceil(n / ratio) children, in buckets of the parent's size.
        `slot_to_point` numbers the children in slot order.
    members : array int32 [child slots, ratio]
        The parent slots that became each child. A short group, which only the last of a cloud can be, ends with -1.
        Padding slots hold -1.
    ratio : int
        As given to `bucket_pool`.
    reduce : str
        As given to `bucket_pool`.
    argmember : array uint8 [child slots, C] or None
        For min and max, the member that a child's feature comes from: ``members[child, argmember[child, c]]``, the
        first one that attains the minimum or maximum. Padding slots hold 0. None for sum and mean.
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

    def to(self, device: Any) -> Pooling:
        """The same pooling on another device.

        Parameters
        ----------
        device : object
            As in `Buckets.to`: "cuda:1" for torch, a jax.Device, a number for CuPy, "cpu" for NumPy.

        Returns
        -------
        Pooling
        """
        arrays = [_arrays.to_device(x, device) for x in self._arrays]
        return self._of(arrays, self.buckets.to(device), self.parent.to(device))

    def pin_memory(self) -> Pooling:
        """The same pooling in page-locked host memory (torch only)."""
        arrays = [None if x is None else x.pin_memory() for x in self._arrays]
        return self._of(arrays, self.buckets.pin_memory(), self.parent.pin_memory())

    @property
    def _arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.features, self.points, self.members, self.argmember

    def _of(self, arrays: Sequence[Any], buckets: Buckets, parent: Buckets) -> Pooling:
        features, points, members, argmember = arrays
        changed = {"features": features, "points": points, "members": members, "argmember": argmember}
        return replace(self, **changed, buckets=buckets, parent=parent)


# ---- pool ----------------------------------------------------------------------------------------------------------


def bucket_pool(features: Any, points: Any, buckets: Buckets, *, ratio: int = 2, reduce: str = "mean") -> Pooling:
    """Pool each `ratio` neighbours of a tile into one child. The children are again a bucket layout.

    A tile is 1024 consecutive slots, counted from the first slot of a cloud; the bucket size plays no part. The points
    of a tile are sorted by the Morton code of cubic voxels, 1024 along the tile's largest extent, and then by slot.
    This order is cut into groups of `ratio` points, and each group becomes a child. Only the last group of a cloud can
    be short. Children are stored in the same order.

    Parameters
    ----------
    features : array [num_slots, C]
        Rows in slot order (`Buckets.scatter`): float16, bfloat16 or float32; on the CPU also float64. Any strides. C
        may be 0. Rows of padding slots may hold anything, even NaN.
    points : array [num_slots, 3]
        Coordinates in slot order, on the features' device: float32, float64, float16 or bfloat16. They are not
        differentiated. Rows of padding slots may hold anything.
    buckets : Buckets
        The layout of the slots.
    ratio : {2, 4, 8}
        Points of a group.
    reduce : {"mean", "sum", "min", "max"}
        How the features of the members are reduced to the child's feature. min and max propagate NaN.

    Returns
    -------
    Pooling
        Its arrays are of the library of `features`. The same call gives the same bits, on CPU and GPU alike.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Voxels are rounded as in `bucketize`: in float32, each operation once. float64 coordinates are first taken relative
    to the tile's minimum. A non-finite coordinate counts as the last voxel of its axis, and the mean of its group's
    points is then not finite. Sums start with the first member and are accumulated in float32 (float64 for float64);
    the result is divided once and rounded once. A call never waits for the GPU. After a first call it can be captured
    in a CUDA graph.

    Flash3D hashes the points of a tile into sub-buckets and moves the overflow between them. Here the points are sorted
    by Morton code and cut instead: every group is full except the last of a cloud, and every run gives the same groups.

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
    if (interop := _arrays.interop_of(features, points)) is not None:
        return interop.bucket_pool(features, points, buckets, ratio=ratio, reduce=reduce)
    check_buckets(buckets)
    features, points = _arrays.read(features, "features"), _arrays.read(points, "points")
    lengths = buckets.lengths if features.origin.device is None else counts_of(buckets)
    bucket_size, kept = buckets.bucket_size, None
    if len(lengths) <= clouds.INLINE_CLOUDS and _arrays.on_gpu(features):
        origins = features.origin, points.origin
        kept = _kept_call(features.spec, points.spec, origins, lengths, bucket_size, ratio, reduce)
    if kept is None:
        ratio = check_pool(features, points, lengths, bucket_size, ratio, reduce)
        arrays = pool_arrays(features, points, lengths, bucket_size, ratio, reduce)
        children = children_of(lengths, bucket_size, ratio)
    else:
        ratio, call, results, children = kept
        arrays = launcher.launch(call, (features, points), results, features.origin)
    return pooling_of(arrays, buckets, ratio, reduce, children)


def check_pool(
    features: Given | Spec, points: Given | Spec, lengths: Sequence[Any], bucket_size: int, ratio: Any, reduce: Any
) -> int:
    """The ratio of `bucket_pool`, whose arrays and options are checked."""
    slots = num_slots(lengths, bucket_size)
    _check_rows(features, "features", slots, "buckets")
    if len(points.shape) != 2 or points.shape[1] != 3:
        raise ValueError(f"points must have shape [num_slots, 3], got {list(points.shape)}.")
    _arrays.check_floats(points, "points")
    _check_slots(points, "points", slots, "buckets")
    ratio = _arrays.check_integer(ratio, "ratio")
    if ratio not in reference.RATIOS:
        raise ValueError(f"ratio must be 2, 4 or 8, got {_arrays.shown(ratio)}: pool several times for a larger one.")
    _arrays.check_choice(reduce, reference.REDUCTIONS, "reduce")
    return ratio


def child_lengths(lengths: Any, ratio: int) -> Any:
    """Children of each cloud, as a tuple; lengths may be symbols. An array gives an array."""
    if isinstance(lengths, np.ndarray):
        return (lengths + (ratio - 1)) // ratio
    return tuple([(n + ratio - 1) // ratio for n in lengths])


def pool_results(
    features: Given | Spec, points: Given | Spec, lengths: Sequence[Any], bucket_size: int, ratio: int, reduce: str
) -> tuple[Spec, ...]:
    """The specs of what `bucket_pool` computes; sizes may be symbols.

    They are features, points, members, argmember (without rows, except for min and max), slot_to_point, point_to_slot
    and moved.
    """
    children, columns = child_lengths(lengths, ratio), features.shape[1]
    slots = num_slots(children, bucket_size)
    return (
        Spec((slots, columns), features.dtype),
        Spec((slots, 3), points.dtype),
        Spec((slots, ratio), INT32),
        Spec((slots if reduce in reference.EXTREMES else 0, columns), UINT8),
        Spec((slots,), INT32),
        Spec((total(children),), INT32),
        Spec((), INT32),
    )


def pool_arrays(
    features: Given, points: Given, lengths: tuple[int, ...], bucket_size: int, ratio: int, reduce: str
) -> list[Any]:
    """What `pool_results` lists, as arrays of the features' library."""
    origin = features.origin
    if origin.device is None:
        _arrays.check_same_device(features=origin, points=points.origin)
        arrays = list(reference.bucket_pool(features.array, points.array, bucket_size, lengths, ratio, reduce))
        if arrays[3] is None:
            arrays[3] = np.empty((0, features.shape[1]), np.uint8)
        return [_arrays.leave(x, origin) for x in arrays]
    call, results = pool_call(features, points, lengths, bucket_size, ratio, reduce)
    return launcher.launch(call, (features, points), results, origin)


def pool_call(
    features: Given, points: Given, lengths: tuple[int, ...], bucket_size: int, ratio: int, reduce: str
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `pool_arrays`, and the specs of its results."""
    if points.origin.device != features.origin.device:
        _arrays.check_same_device(features=features.origin, points=points.origin)
    return _on_gpu(lengths, features.spec, points.spec, bucket_size, ratio, reduce)


@clouds.kept_as_passed
def _kept_call(
    features: Spec,
    points: Spec,
    origins: tuple[_arrays.Origin, _arrays.Origin],
    lengths: tuple[int, ...],
    bucket_size: int,
    ratio: Any,
    reduce: Any,
) -> tuple[int, Call, tuple[Spec | None, ...], tuple[Any, Any]]:
    """The checked ratio, what a GPU runs for `bucket_pool`, the specs of its results, and the children's layout."""
    alike = Given(*features, origins[0], None), Given(*points, origins[1], None)
    ratio = check_pool(*alike, lengths, bucket_size, ratio, reduce)
    call, specs = pool_call(*alike, lengths, bucket_size, ratio, reduce)
    # Only the operators of torch and JAX return an argmember without rows.
    results = *specs[:3], specs[3] if reduce in reference.EXTREMES else None, *specs[4:]
    return ratio, call, results, children_of(lengths, bucket_size, ratio)


@clouds.remembered
def _on_gpu(
    lengths: tuple[int, ...], features: Spec, points: Spec, bucket_size: int, ratio: int, reduce: str
) -> tuple[Call, tuple[Spec, ...]]:
    """What `bucket_pool` launches, and the specs of its results."""
    options = lengths, bucket_size, ratio, reduce
    return cuda.pool(features, points, *options), pool_results(features, points, *options)


def _layout_of_children(lengths: Any, bucket_size: int, ratio: int) -> tuple[Any, tuple[Any, ...] | None]:
    """The lengths of the children's clouds, and their first buckets; None if the lengths are an array."""
    children = child_lengths(lengths, ratio)
    return children, None if isinstance(children, np.ndarray) else bucket_offsets(children, bucket_size)


children_of = clouds.remembered(_layout_of_children)  # for lengths that are ints


def pooling_of(
    arrays: Sequence[Any], parent: Buckets, ratio: int, reduce: str, children: tuple[Any, Any] | None = None
) -> Pooling:
    """The result of `bucket_pool` from the arrays of `pool_arrays`; sizes may be symbols.

    `children` are the lengths and the first buckets of the children's clouds, if the caller knows them.
    """
    features, points, members, argmember, slot_to_point, point_to_slot, moved = arrays
    bucket_size = parent.bucket_size
    lengths, offsets = children or _layout_of_children(parent.lengths, bucket_size, ratio)
    child = buckets_of((slot_to_point, point_to_slot, moved), lengths, bucket_size, offsets)
    kept = argmember if reduce in reference.EXTREMES else None
    return Pooling(features, points, child, members, ratio, reduce, kept, parent)


def bucket_pool_backward(dchild_features: Any, pooled: Pooling) -> Any:
    """The gradient of `bucket_pool` with respect to its features.

    Parameters
    ----------
    dchild_features : array [child slots, C]
        The gradient of a loss with respect to ``pooled.features``, in their dtype. Rows of padding slots may hold
        anything.
    pooled : Pooling
        What the forward returned.

    Returns
    -------
    array [num_slots, C]
        An array of dchild_features' library and dtype. Padding slots hold 0. Each member gets the gradient of its child
        (sum), or that divided by the number of members (mean). For min and max the first member that attains the
        minimum or maximum gets all of it.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    The same call gives the same bits, because each row is written once. A call never waits for the GPU, and can be
    captured in a CUDA graph after a first call. The gradient itself has no gradient: a tensor that requires grad, and a
    JAX tracer, is a TypeError here. `gpu3d.interop` differentiates the forward.

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
    _arrays.refuse_gradients("bucket_pool_backward", dchild_features=dchild_features)
    check_pooling(pooled)
    dchild, members = _arrays.read(dchild_features, "dchild_features"), _arrays.read(pooled.members, "pooled")
    argmember = None if pooled.argmember is None else _arrays.read(pooled.argmember, "pooled")
    parent, ratio = pooled.parent, pooled.ratio
    layout = parent.lengths, parent.bucket_size, ratio
    check_pool_backward(dchild, _arrays.read(pooled.features, "pooled"), *layout)
    (dfeatures,) = pool_backward_arrays(dchild, members, argmember, *layout, pooled.reduce)
    return dfeatures


def check_pool_backward(
    dchild: Given | Spec, features: Given | Spec, lengths: Sequence[Any], bucket_size: int, ratio: int
) -> None:
    """The gradient of `bucket_pool`'s features is like them."""
    _check_rows(dchild, "dchild_features", num_slots(child_lengths(lengths, ratio), bucket_size), "pooled.buckets")
    if dchild.shape != features.shape:
        raise ValueError(
            f"dchild_features must have the shape of pooled.features, got {list(dchild.shape)} for "
            f"{list(features.shape)}."
        )
    _check_dtype(dchild, "dchild_features", features, "pooled.features")


def pool_backward_results(dchild: Given | Spec, lengths: Sequence[Any], bucket_size: int) -> tuple[Spec]:
    """The spec of dfeatures; sizes may be symbols."""
    return (Spec((num_slots(lengths, bucket_size), dchild.shape[1]), dchild.dtype),)


def pool_backward_arrays(
    dchild: Given,
    members: Given,
    argmember: Given | None,
    lengths: tuple[int, ...],
    bucket_size: int,
    ratio: int,
    reduce: str,
) -> list[Any]:
    """The array dfeatures, of dchild's library. argmember is read for min and max only."""
    if dchild.device is None:
        if reduce not in reference.EXTREMES:
            argmember = None
        _check_devices("dchild_features", dchild, members, argmember)
        first = None if argmember is None else argmember.array
        slots = num_slots(lengths, bucket_size)
        dfeatures = reference.bucket_pool_backward(dchild.array, members.array, first, slots, reduce)
        return [_arrays.leave(dfeatures, dchild.origin)]
    call, results = pool_backward_call(dchild, members, argmember, lengths, bucket_size, ratio, reduce)
    return launcher.launch(call, (dchild, members, argmember), results)


def pool_backward_call(
    dchild: Given,
    members: Given,
    argmember: Given | None,
    lengths: tuple[int, ...],
    bucket_size: int,
    ratio: int,
    reduce: str,
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `pool_backward_arrays`, and the specs of its results."""
    if reduce not in reference.EXTREMES:
        argmember = None
    _check_devices("dchild_features", dchild, members, argmember)
    of_argmember = None if argmember is None else argmember.spec
    call = cuda.pool_backward(dchild.spec, members.spec, of_argmember, lengths, bucket_size, ratio, reduce)
    return call, pool_backward_results(dchild, lengths, bucket_size)


# ---- unpool --------------------------------------------------------------------------------------------------------


def bucket_unpool(child_features: Any, pooled: Pooling, skip: Any = None) -> Any:
    """Rows of children back to the slots of their members: ``out[m] = child_features[parent of m] + skip[m]``.

    Parameters
    ----------
    child_features : array [child slots, C]
        Rows in the slots of ``pooled.buckets``: float16, bfloat16 or float32; on the CPU also float64. C need not be
        that of ``pooled.features``. Rows of padding slots may hold anything.
    pooled : Pooling
        Says which slots became which child.
    skip : array [num_slots, C], optional
        Rows in the slots of ``pooled.parent``, in the dtype of child_features. They are added to the result.

    Returns
    -------
    array [num_slots, C]
        An array of child_features' library and dtype. Padding slots hold 0. The sum is computed in float32 (float64 for
        float64) and rounded once.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    A call never waits for the GPU. After a first call it can be captured in a CUDA graph.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((100, 3), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 64)
    >>> in_slots = buckets.scatter(points)
    >>> pooled = gpu3d.bucket_pool(in_slots, in_slots, buckets)
    >>> gpu3d.bucket_unpool(pooled.features, pooled, skip=-in_slots).shape  # from each point to its pair's mean
    (128, 3)
    """
    check_pooling(pooled)
    if (interop := _arrays.interop_of(child_features, skip, layout=pooled.members)) is not None:
        return interop.bucket_unpool(child_features, pooled, skip)
    child, members = _arrays.read(child_features, "child_features"), _arrays.read(pooled.members, "pooled")
    added = None if skip is None else _arrays.read(skip, "skip")
    parent = pooled.parent
    layout = parent.lengths, parent.bucket_size, pooled.ratio
    check_unpool(child, added, *layout)
    (out,) = unpool_arrays(child, members, added, *layout)
    return out


def check_unpool(
    child: Given | Spec, skip: Given | Spec | None, lengths: Sequence[Any], bucket_size: int, ratio: int
) -> None:
    """The rows of `bucket_unpool`."""
    children = num_slots(child_lengths(lengths, ratio), bucket_size)
    _check_rows(child, "child_features", children, "pooled.buckets")
    if skip is not None:
        _check_rows(skip, "skip", num_slots(lengths, bucket_size), "pooled.parent")
        if skip.shape[1] != child.shape[1]:
            raise ValueError(
                f"skip must have the {child.shape[1]} columns of child_features, got shape {list(skip.shape)}."
            )
        _check_dtype(skip, "skip", child, "child_features")


def unpool_results(child: Given | Spec, lengths: Sequence[Any], bucket_size: int) -> tuple[Spec]:
    """The spec of the unpooled rows; sizes may be symbols."""
    return (Spec((num_slots(lengths, bucket_size), child.shape[1]), child.dtype),)


def unpool_arrays(
    child: Given, members: Given, skip: Given | None, lengths: tuple[int, ...], bucket_size: int, ratio: int
) -> list[Any]:
    """The unpooled rows, as an array of child's library."""
    _check_devices("child_features", child, members)
    if skip is not None and skip.device != child.device:
        _arrays.check_same_device(child_features=child.origin, skip=skip.origin)
    if child.device is None:
        added = None if skip is None else skip.array
        out = reference.bucket_unpool(child.array, members.array, added, num_slots(lengths, bucket_size))
        return [_arrays.leave(out, child.origin)]
    of_skip = None if skip is None else skip.spec
    call = cuda.unpool(child.spec, members.spec, of_skip, lengths, bucket_size, ratio)
    return launcher.launch(call, (child, members, skip), unpool_results(child, lengths, bucket_size))


def bucket_unpool_backward(dout: Any, pooled: Pooling) -> tuple[Any, Any]:
    """The gradients of `bucket_unpool` with respect to child_features and skip.

    Parameters
    ----------
    dout : array [num_slots, C]
        The gradient of a loss with respect to the result of `bucket_unpool`: float16, bfloat16 or float32; on the CPU
        also float64. Rows of padding slots may hold anything.
    pooled : Pooling
        As given to the forward.

    Returns
    -------
    dchild : array [child slots, C]
        The sum over the members of each child, in their order, accumulated in float32 (float64 for float64) and rounded
        once. Padding slots hold 0. An array of dout's library and dtype.
    dskip : array [num_slots, C]
        A copy of dout whose padding slots hold 0.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    The same call gives the same bits, because each row is summed in a fixed order. A call never waits for the GPU, and
    can be captured in a CUDA graph after a first call. The gradients themselves have no gradient: a tensor that
    requires grad, and a JAX tracer, is a TypeError here. `gpu3d.interop` differentiates the forward.

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
    _arrays.refuse_gradients("bucket_unpool_backward", dout=dout)
    check_pooling(pooled)
    given = _arrays.read(dout, "dout"), _arrays.read(pooled.members, "pooled")
    parent = pooled.parent
    check_unpool_backward(given[0], parent.lengths, parent.bucket_size)
    dchild, dskip = unpool_backward_arrays(*given, parent.lengths, parent.bucket_size, pooled.ratio)
    return dchild, dskip


def check_unpool_backward(dout: Given | Spec, lengths: Sequence[Any], bucket_size: int) -> None:
    """The gradient of `bucket_unpool`'s result."""
    _check_rows(dout, "dout", num_slots(lengths, bucket_size), "pooled.parent")


def unpool_backward_results(
    dout: Given | Spec, lengths: Sequence[Any], bucket_size: int, ratio: int
) -> tuple[Spec, Spec]:
    """The specs of dchild and dskip; sizes may be symbols."""
    parents, children = (num_slots(n, bucket_size) for n in (lengths, child_lengths(lengths, ratio)))
    return Spec((children, dout.shape[1]), dout.dtype), Spec((parents, dout.shape[1]), dout.dtype)


def unpool_backward_arrays(
    dout: Given, members: Given, lengths: tuple[int, ...], bucket_size: int, ratio: int
) -> list[Any]:
    """The arrays dchild and dskip, of dout's library."""
    _check_devices("dout", dout, members)
    if dout.device is None:
        gradients = reference.bucket_unpool_backward(dout.array, members.array)
        return [_arrays.leave(gradient, dout.origin) for gradient in gradients]
    call = cuda.unpool_backward(dout.spec, members.spec, lengths, bucket_size, ratio)
    return launcher.launch(call, (dout, members), unpool_backward_results(dout, lengths, bucket_size, ratio))


# ---- checks --------------------------------------------------------------------------------------------------------


def check_pooling(pooled: Any) -> None:
    """What `bucket_pool` returned."""
    if not isinstance(pooled, Pooling):
        raise TypeError(f"pooled must be the Pooling that gpu3d.bucket_pool returns, got {type(pooled).__name__}.")


def _check_rows(x: Given | Spec, name: str, slots: Any, where: str) -> None:
    """Features [num_slots, C] in the slots of a layout, which the caller knows as `where`."""
    if len(x.shape) != 2:
        raise ValueError(
            f"{name} must have shape [num_slots, C], got {list(x.shape)}: reshape by {name}.reshape(len({name}), -1)."
        )
    if x.dtype not in FLOAT_DTYPES or (x.dtype == FLOAT64 and _arrays.on_gpu(x)):
        accepted = (
            "float16, bfloat16 or float32 on a GPU" if _arrays.on_gpu(x) else "float16, bfloat16, float32 or float64"
        )
        raise TypeError(f"{name} must be {accepted}, got {x.dtype}: convert by {name}.astype('float32').")
    _check_slots(x, name, slots, where)


def _check_slots(x: Given | Spec, name: str, slots: Any, where: str) -> None:
    if x.shape[0] != slots:
        raise ValueError(
            f"{name} must have one row for each of the {slots} slots of {where}, got shape {list(x.shape)}: bring "
            f"points into slots by {where}.scatter({name})."
        )


def _check_dtype(x: Given | Spec, name: str, like: Given | Spec, other: str) -> None:
    if x.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other}, got {x.dtype} for {like.dtype}: "
            f"convert by {name}.astype('{like.dtype}')."
        )


def _check_devices(name: str, x: Given, *pooled: Given | None) -> None:
    """Arrays of `pooled` beside the argument `name`."""
    for other in pooled:
        if other is not None and other.device != x.device:
            _arrays.check_same_device(**{name: x.origin, "pooled": other.origin})
