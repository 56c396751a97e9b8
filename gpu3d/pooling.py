# SPDX-License-Identifier: Apache-2.0
"""In-bucket pooling: 2, 4 or 8 neighbours of a tile become one point, and the result is a bucket layout again.

No global sort and no neighbour search: the buckets have made neighbours of the points of a tile already. Unpooling
takes the rows of the children back to their members.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays, _clouds, _cuda
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
        pooled, pooled_points, members, argmember, slot_to_point, point_to_slot, moved = [
            None if array is None else _arrays.leave(array, origin) for array in arrays
        ]
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
            dfeatures = _pool_backward_cuda(native, members, argmember, pooled.parent, pooled.ratio, pooled.reduce)
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
            out = _unpool_cuda(native, members, native_skip, pooled.parent, pooled.ratio)
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
            gradients = _unpool_backward_cuda(native, members, pooled.parent, pooled.ratio)
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

GROUP_TILE, GROUP_VOXELS = reference.TILE, reference.VOXELS
ROWS_THREADS = 256
ROWS_LOADS = 8  # words that a thread has in flight: children a thread times the ratio

_INT32, _UINT8 = np.dtype(np.int32), np.dtype(np.uint8)

# The parameters of each kernel: formats of the module struct, and c for struct Clouds.
_SIGNATURES = {
    "pool_groups": "QcciQQQQQ",
    "pool_sums": "QqQqqiiQ",
    "pool_extremes": "QqQqqiiQQ",
    "spread_sums": "QqQqqcqiiQ",
    "spread_extremes": "QqQQqqcqiQ",
    "unpool_rows": "QqQqQqqcqiQ",
    "unpool_sums": "QqQqqcqiQQ",
}


def configurations() -> list[_cuda.Configuration]:
    """Every module this file can ask for."""
    groups = [_cuda.Configuration("pooling_group", (("POINT", p),)) for p in range(len(_arrays.FLOATS))]
    rows = []
    for element, dtype in enumerate(_arrays.FLOATS):
        if dtype != np.float64:
            for word in (16, 8, 4, 2):
                if word >= dtype.itemsize:
                    rows += [_cuda.Configuration("pooling_rows", _macros(element, word, r)) for r in reference.RATIOS]
    return groups + rows


def _macros(element: int, word: int, ratio: int) -> _cuda.Macros:
    return ("ELEMENT", element), ("WORD", word), ("RATIO", ratio)


class _Layout(NamedTuple):
    """What the kernels need to know of a parent and its children, worked out once."""

    parents: _clouds.Batch  # in tiles; a group is a row of padding
    children: _clouds.Batch
    padding: int  # slots of the parent that hold no point
    slots: int  # of the children
    points: int  # children


@functools.lru_cache(maxsize=256)
def _layout(lengths: tuple[int, ...], bucket_size: int, ratio: int) -> _Layout:
    n = np.array(lengths, np.int64)
    padding = -n % bucket_size
    children, offsets = _child_layout(lengths, bucket_size, ratio)
    parents = _clouds.batch(lengths, bucket_size, -(-n // GROUP_TILE), padding)
    batch = _clouds.batch(children, bucket_size, 0 * n, 0 * n)
    return _Layout(parents, batch, int(padding.sum()), offsets[-1] * bucket_size, sum(children))


@functools.lru_cache(maxsize=256)
def _results(
    slots: int, points: int, columns: int, dtype: np.dtype, point_dtype: np.dtype, ratio: int, extremes: bool
) -> tuple[int, ...]:
    """Where results end in memory, which Pooling holds together: features, argmember, then what pool_groups writes."""
    of_groups = slots * ratio * 4, slots * 3 * point_dtype.itemsize, slots * 4, points * 4, 4
    return _cuda.ends(slots * columns * dtype.itemsize, slots * columns * extremes, *of_groups)


@functools.lru_cache(maxsize=256)
def _kernel(device: int, module: str, function: str, macros: _cuda.Macros) -> _cuda.Kernel:
    """For the current device, which is `device`."""
    return _cuda.kernel(module, function, _SIGNATURES[function].replace("c", _clouds.FORMAT), macros)


class _Walk(NamedTuple):
    """How a kernel of pooling_rows.cu goes through rows, `words` words each: 1 << lane_bits threads share one."""

    kernel: _cuda.Kernel
    word: int  # bytes
    words: int
    lane_bits: int
    grid: int


@functools.lru_cache(maxsize=256)
def _walk(device: int, function: str, dtype: np.dtype, columns: int, ratio: int, rows: int, word: int) -> _Walk:
    """For the current device, which is `device`."""
    kernel = _kernel(device, "pooling_rows", function, _macros(_arrays.FLOATS.index(dtype), word, ratio))
    words = columns * dtype.itemsize // word
    lane_bits = min(8, (words - 1).bit_length())
    return _Walk(kernel, word, words, lane_bits, -(-rows // ((ROWS_THREADS >> lane_bits) * (ROWS_LOADS // ratio))))


def _rows(function: str, arrays: tuple[Any, ...], ratio: int, rows: int) -> tuple[_Walk, list[int]]:
    """The walk along `rows` children and rows of padding, and for each of `arrays` its address and stride in words."""
    first = arrays[0]
    dtype, columns = first.dtype, first.shape[1]
    common = columns * dtype.itemsize | 16
    places = []
    for array in arrays:
        places += [array.data.ptr, array.strides[0]]
        common |= places[-2] | places[-1]
    walk = _walk(first.data.device_id, function, dtype, columns, ratio, rows, common & -common)
    places[1::2] = [stride // walk.word for stride in places[1::2]]
    return walk, places


def _launch(walk: _Walk, *args: int | float | bytes) -> None:
    _cuda.launch(walk.kernel, grid=walk.grid, block=ROWS_THREADS, args=args)


def _columns(x: Any) -> Any:
    """The rows x, or a copy where a row is not contiguous."""
    import cupy

    return x if x.strides[1] == x.itemsize else cupy.array(x, order="C")


def _packed(x: Any) -> Any:
    """x, or a copy where it is not contiguous from an address on that any load can take."""
    import cupy

    return x if x.flags.c_contiguous and x.data.ptr % 16 == 0 else cupy.array(x, order="C")


def _pool_cuda(
    features: Any, points: Any, buckets: Buckets, ratio: int, reduce: str
) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """Child features and points, members, argmember or None, slot_to_point, point_to_slot, moved."""
    import cupy

    layout = _layout(buckets.lengths, buckets.bucket_size, ratio)
    slots, columns = layout.slots, features.shape[1]
    extremes = reduce in ("min", "max")
    dtype, point_dtype = features.dtype, points.dtype
    memory = _cuda.results(_results(slots, layout.points, columns, dtype, point_dtype, ratio, extremes))
    pooled = cupy.ndarray((slots, columns), dtype, memory[0])
    argmember = cupy.ndarray((slots, columns), _UINT8, memory[1]) if extremes else None
    members = cupy.ndarray((slots, ratio), _INT32, memory[2])
    pooled_points = cupy.ndarray((slots, 3), point_dtype, memory[3])
    slot_to_point = cupy.ndarray((slots,), _INT32, memory[4])
    point_to_slot = cupy.ndarray((layout.points,), _INT32, memory[5])
    moved = cupy.ndarray((), _INT32, memory[6])
    results = pooled, pooled_points, members, argmember, slot_to_point, point_to_slot, moved
    if not slots:
        moved.fill(0)
        return results
    points = _packed(points)
    parents, held = _clouds.pack(layout.parents, buckets.bucket_size)
    children, held_too = _clouds.pack(layout.children, buckets.bucket_size)
    macros = (("POINT", _arrays.FLOATS.index(point_dtype)),)
    kernel = _kernel(points.data.device_id, "pooling_group", "pool_groups", macros)
    addresses = [part.ptr for part in memory]
    args = points.data.ptr, parents, children, ratio, *addresses[2:]
    _cuda.launch(kernel, grid=layout.parents.tiles, block=GROUP_TILE, args=args)
    if columns:
        features = _columns(features)
        function, flag = ("pool_extremes", reduce == "max") if extremes else ("pool_sums", reduce == "mean")
        walk, places = _rows(function, (features,), ratio, slots)
        out = addresses[: 1 + extremes]
        _launch(walk, *places, addresses[2], slots, walk.words, walk.lane_bits, flag, *out)
    del held, held_too  # held until here, as are copies: the pool hands them on in stream order
    return results


def _pool_backward_cuda(dchild: Any, members: Any, argmember: Any, parent: Buckets, ratio: int, reduce: str) -> Any:
    """The gradient of the parent's features."""
    import cupy

    dfeatures = cupy.ndarray((parent.num_slots, dchild.shape[1]), dchild.dtype)
    if dfeatures.size:
        layout = _layout(parent.lengths, parent.bucket_size, ratio)
        parents, held = _clouds.pack(layout.parents, parent.bucket_size)
        dchild, members = _columns(dchild), _packed(members)
        extremes = argmember is not None
        function = "spread_extremes" if extremes else "spread_sums"
        walk, places = _rows(function, (dchild,), ratio, layout.slots + layout.padding)
        sizes = layout.slots, layout.padding, parents, walk.words, walk.lane_bits
        if extremes:
            argmember = _packed(argmember)
            _launch(walk, *places, argmember.data.ptr, members.data.ptr, *sizes, dfeatures.data.ptr)
        else:
            _launch(walk, *places, members.data.ptr, *sizes, reduce == "mean", dfeatures.data.ptr)
        del held
    return dfeatures


def _unpool_cuda(child: Any, members: Any, skip: Any, parent: Buckets, ratio: int) -> Any:
    """The rows of the children in the slots of their members, and skip added unless it is None."""
    import cupy

    out = cupy.ndarray((parent.num_slots, child.shape[1]), child.dtype)
    if out.size:
        layout = _layout(parent.lengths, parent.bucket_size, ratio)
        parents, held = _clouds.pack(layout.parents, parent.bucket_size)
        child, members = _columns(child), _packed(members)
        arrays = (child,) if skip is None else (child, _columns(skip))
        walk, places = _rows("unpool_rows", arrays, ratio, layout.slots + layout.padding)
        if skip is None:
            places += [0, 0]
        sizes = layout.slots, layout.padding, parents, walk.words, walk.lane_bits
        _launch(walk, *places, members.data.ptr, *sizes, out.data.ptr)
        del held
    return out


def _unpool_backward_cuda(dout: Any, members: Any, parent: Buckets, ratio: int) -> tuple[Any, Any]:
    """The gradients of the child's rows and of skip."""
    import cupy

    columns, dtype = dout.shape[1], dout.dtype
    layout = _layout(parent.lengths, parent.bucket_size, ratio)
    dchild = cupy.ndarray((layout.slots, columns), dtype)
    dskip = cupy.ndarray((parent.num_slots, columns), dtype)
    if dskip.size:
        parents, held = _clouds.pack(layout.parents, parent.bucket_size)
        dout, members = _columns(dout), _packed(members)
        walk, places = _rows("unpool_sums", (dout,), ratio, layout.slots + layout.padding)
        sizes = layout.slots, layout.padding, parents, walk.words, walk.lane_bits
        _launch(walk, *places, members.data.ptr, *sizes, dchild.data.ptr, dskip.data.ptr)
        del held
    return dchild, dskip
