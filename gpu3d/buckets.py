# SPDX-License-Identifier: Apache-2.0
"""Perfect spatial hashing: one permutation that puts the points of a cloud into equal buckets of space neighbours.

Everything else in gpu3d runs over this layout. `bucketize` computes it, `Buckets` moves arrays in and out of it, and
`scopes` lists which buckets attend to each other.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import INT32, Given, Spec
from gpu3d.cuda import buckets as cuda
from gpu3d.cuda import clouds, launcher
from gpu3d.cuda.plan import Call
from gpu3d.reference import buckets as reference

MAX_SLOTS = 2**31 - 1  # slots are int32

_new = tuple.__new__

# ---- the layout ----------------------------------------------------------------------------------------------------


class _Listed:
    """A field of Buckets that is a tuple of ints. Of many clouds it is made when it is first read.

    A tuple of 20,000 ints takes up to 0.25 ms. Python calls `__get__` only while the instance has no attribute of this
    name. `array` makes the ints from the lengths and the bucket size.
    """

    def __init__(self, array: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self.array = array

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, buckets: Buckets | None, owner: type | None = None) -> tuple[int, ...]:
        if buckets is None or buckets._many is None:
            raise AttributeError(self.name)  # which tells `dataclass` that the field has no default
        made = vars(buckets)[self.name] = _arrays.int_tuple(self.array(buckets._many, buckets.bucket_size))
        return made


@dataclass(frozen=True, eq=False)
class Buckets:
    """The bucket layout of a batch of clouds, made by `bucketize`.

    Cloud b of n_b points has ceil(n_b / bucket_size) buckets. Its points fill its slots without a gap, from the first
    slot on. So every bucket is exactly full, except the last one of a cloud, which may have padding at its end. A
    bucket never mixes clouds.

    Attributes
    ----------
    slot_to_point : array int32 [num_slots]
        The index of the point in each slot; -1 in padding.
    point_to_slot : array int32 [N]
        The slot of each point; the inverse of `slot_to_point`.
    moved : array int32 []
        How many points balance="probe" put into another bucket than that of their hash; 0 with "spill". On the device.
    bucket_size : int
        Slots in a bucket.
    lengths : tuple of int
        Points of each cloud.
    bucket_offsets : tuple of int
        The first bucket of each cloud, and at the end the number of buckets; its length is B + 1.
    """

    slot_to_point: Any
    point_to_slot: Any
    moved: Any
    bucket_size: int
    lengths: tuple[int, ...] = _Listed(lambda lengths, _: lengths)  # type: ignore[assignment]
    bucket_offsets: tuple[int, ...] = _Listed(lambda *layout: _many_offsets(*layout))  # type: ignore[assignment]

    _many = None  # the lengths of many clouds as an array, from which the tuples are made

    @property
    def num_buckets(self) -> int:
        """Number of buckets of the batch."""
        return self.bucket_offsets[-1] if self._many is None else self.num_slots // self.bucket_size

    @property
    def num_slots(self) -> int:
        """Number of slots of the batch: num_buckets * bucket_size."""
        return self.bucket_offsets[-1] * self.bucket_size if self._many is None else self.slot_to_point.shape[0]

    def scatter(self, x: Any, fill: float = 0) -> Any:
        """Move rows of points into slots: `out[slot] = x[slot_to_point[slot]]`, and `fill` in padding.

        Parameters
        ----------
        x : array [N, ...]
            One row per point, of any dtype and trailing shape. An array of any library, on the buckets' device.
        fill : scalar
            The value of padding slots.

        Returns
        -------
        array [num_slots, ...]
            An array of x's library and dtype.

        Examples
        --------
        >>> points = np.random.default_rng(0).random((100, 3), dtype=np.float32)
        >>> buckets = gpu3d.bucketize(points, 64)
        >>> in_slots = buckets.scatter(points)
        >>> in_slots.shape
        (128, 3)
        >>> bool((buckets.gather(in_slots) == points).all())
        True
        """
        if (interop := _arrays.interop_of(x, layout=self.slot_to_point)) is not None:
            return interop.scatter(x, self, fill)
        rows = sum(self.lengths) if self._many is None else self.point_to_slot.shape[0]
        return move(_arrays.read(x, "x"), "x", _arrays.read(self.slot_to_point, "buckets"), rows, fill)

    def gather(self, y: Any) -> Any:
        """Move rows of slots back to points: `out[point] = y[point_to_slot[point]]`, the inverse of `scatter`.

        Parameters
        ----------
        y : array [num_slots, ...]
            One row per slot, of any dtype and trailing shape. An array of any library, on the buckets' device.

        Returns
        -------
        array [N, ...]
            An array of y's library and dtype.
        """
        if (interop := _arrays.interop_of(y, layout=self.point_to_slot)) is not None:
            return interop.gather(y, self)
        return move(_arrays.read(y, "y"), "y", _arrays.read(self.point_to_slot, "buckets"), self.num_slots, 0)

    def to(self, device: Any) -> Buckets:
        """The same layout on another device.

        Parameters
        ----------
        device : object
            A device of the arrays' library: for example "cuda:1" for torch, a jax.Device, a number for CuPy, or "cpu"
            for NumPy.

        Returns
        -------
        Buckets
        """
        return self._of([_arrays.to_device(x, device) for x in self._arrays])

    def pin_memory(self) -> Buckets:
        """The same layout in page-locked host memory, for a DataLoader with ``pin_memory=True`` (torch only)."""
        return self._of([x.pin_memory() for x in self._arrays])

    @property
    def _arrays(self) -> tuple[Any, Any, Any]:
        return self.slot_to_point, self.point_to_slot, self.moved

    def _of(self, arrays: Sequence[Any]) -> Buckets:
        slot_to_point, point_to_slot, moved = arrays
        return replace(self, slot_to_point=slot_to_point, point_to_slot=point_to_slot, moved=moved)


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
    """Put the points of each cloud into buckets of exactly `bucket_size` space neighbours.

    Parameters
    ----------
    points : array [N, 3] or [B, n, 3]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
        Not differentiated.
    bucket_size : int
        Slots in a bucket: a multiple of 16 from 16 to 16384.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud.
    hash : {"zorder_div", "zorder_mod", "xor_div", "xor_mod"}
        Flash3D's four hash functions over the cloud's voxels. "zorder_div" gives the tightest buckets.
    balance : {"spill", "probe"}
        "spill" sorts the points by hash bucket, then by full-resolution code, then by index, and cuts this order every
        `bucket_size` points. "probe" is the published rebalancing, made deterministic: a point whose bucket is full
        tries the buckets of 128 neighbouring voxels, and then takes any free slot.
    voxel_size : float or "per_axis", optional
        Edge of a voxel in the unit of the points. Default: the largest extent / 65536. "per_axis": the extent of each
        axis / 65536.
    seed : int
        The seed for the order of the neighbouring voxels that "probe" tries.
    bounds : "robust" or (low, high), optional
        What the voxels of each cloud span. Default: its minimum to its maximum. (low, high): these bounds for all
        clouds, each a number or one number an axis, on the host. "robust": bounds around most of the points. Of
        min(n, 1024) points, evenly spread over the cloud, the 1 % and the 99 % quantile of each axis are moved apart by
        four times their distance and cut to the minimum and maximum. Points beyond the bounds get the voxel of the
        bound. Use it for clouds with stray points, such as returns at (0, 0, 0) or heights of -99999, of which one
        would put all the other points into one voxel.
    check_finite : bool, optional
        Whether NaN and inf raise an error. None checks host arrays only; True always checks, and synchronizes on a GPU;
        False never checks. Without the check, a non-finite coordinate counts as voxel 65535 and does not affect other
        points.

    Returns
    -------
    Buckets
        Its arrays are of the library of `points`, on their device. The same call gives the same bits on CPU and GPU.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    A call never waits for the GPU, except with check_finite=True. After a first call it can be captured in a CUDA
    graph. On a GPU a cloud has at most 2**30 - 1 points.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024, section 4.1.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
    >>> buckets = gpu3d.bucketize(points, 256)
    >>> buckets.num_buckets, buckets.slot_to_point.shape
    (4, (1024,))
    >>> int((buckets.slot_to_point >= 0).sum())
    1000
    """
    if (interop := _arrays.interop_of(points)) is not None:
        options: dict[str, Any] = {"hash": hash, "balance": balance, "voxel_size": voxel_size, "seed": seed}
        options["bounds"] = bounds
        return interop.bucketize(points, bucket_size, lengths=lengths, check_finite=check_finite, **options)
    given = _arrays.read(points, "points")
    if given.origin.library == "jax":
        importlib.import_module("gpu3d.interop.jax")  # registers Buckets as a pytree
    kept = None
    if lengths is None and bounds is None and not check_finite and len(given.shape) == 2 and _arrays.on_gpu(given):
        kept = _kept_call(given.spec, given.origin, bucket_size, hash, balance, voxel_size, seed)
    if kept is None:
        checked = check_bucketize(given, bucket_size, lengths, hash, balance, voxel_size, seed, bounds)
        arrays = bucketize_arrays(given, checked, check_finite)
    else:
        checked, call, results = kept
        arrays = launcher.launch(call, (given,), results, given.origin)
    return buckets_of(arrays, checked.lengths, checked.bucket_size, checked.bucket_offsets)


class Bucketing(NamedTuple):
    """The checked options of `bucketize`."""

    lengths: Any  # a tuple of ints; of many clouds an int64 array
    bucket_size: int
    hash: str
    balance: str
    voxel_size: float | str | None
    seed: int
    bounds: reference.Bounds
    slots: int  # of the layout
    bucket_offsets: tuple[int, ...] | None  # None of many clouds


def check_bucketize(
    points: Given | Spec,
    bucket_size: Any,
    lengths: Any,
    hash: Any,
    balance: Any,
    voxel_size: Any,
    seed: Any,
    bounds: Any,
) -> Bucketing:
    """The options of `bucketize`, checked against the shape and dtype of the points."""
    lengths = _checked_lengths(points, lengths)
    bucket_size = check_bucket_size(bucket_size)
    _arrays.check_choice(hash, reference.HASHES, "hash")
    _arrays.check_choice(balance, reference.BALANCES, "balance")
    voxel_size = check_voxel_size(voxel_size)
    seed = _arrays.check_integer(seed, "seed")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    bounds = check_bounds(bounds, points.dtype)
    if isinstance(lengths, np.ndarray):
        offsets, slots = None, num_slots(lengths, bucket_size)
    else:
        offsets = _kept_offsets(lengths, bucket_size)
        slots = offsets[-1] * bucket_size
    if slots > MAX_SLOTS:
        raise ValueError(
            f"a layout has at most 2**31 - 1 slots, because slots are int32; {sum(lengths)} points need {slots}. "
            "Bucketize parts of the batch."
        )
    # Every call makes one, and the constructor of a NamedTuple takes twice as long.
    return _new(Bucketing, (lengths, bucket_size, hash, balance, voxel_size, seed, bounds, slots, offsets))


def _checked_lengths(points: Given | Spec, lengths: Any) -> Any:
    """The lengths of the clouds, a tuple of ints; those of many clouds are an int64 array. Also checks the points."""
    array = None if lengths is None else _arrays.many_lengths(lengths)
    if array is not None and points.ndim == 2 and _arrays.sums_to(array, points.shape[0]):
        _arrays.check_points(points, None)
        return np.array(array) if array is lengths else array  # the caller may change its own
    found = _arrays.check_points(points, lengths)
    return found if len(found) <= clouds.INLINE_CLOUDS else _arrays.int64_array(found)


def check_bucket_size(bucket_size: Any) -> int:
    """The bucket size, if it is a multiple of 16 from 16 to 16384."""
    size = _arrays.check_integer(bucket_size, "bucket_size")
    if not 16 <= size <= 16384 or size % 16:
        raise ValueError(f"bucket_size must be a multiple of 16 from 16 to 16384, got {size}.")
    return size


def check_voxel_size(voxel_size: Any) -> float | str | None:
    """The voxel size, if it is a positive float32 number, None or "per_axis"."""
    if voxel_size is None or (isinstance(voxel_size, str) and voxel_size == "per_axis"):
        return voxel_size
    size = _arrays.check_number(voxel_size, "voxel_size", also=', None or "per_axis"')
    if not 2.0**-126 <= size < 2.0**127:
        raise ValueError(f"voxel_size must be a positive float32 number, got {size}.")
    return size


def check_bounds(bounds: Any, dtype: np.dtype) -> reference.Bounds:
    """None, "robust", or the two bounds of each axis, rounded to what the voxels of such points are computed in."""
    if bounds is None or (isinstance(bounds, str) and bounds == "robust"):
        return bounds
    wrong = 'bounds must be None, "robust" or (low, high), each a number or one number an axis, in host memory'
    if isinstance(bounds, str) or not hasattr(bounds, "__len__"):
        error = ValueError if isinstance(bounds, str) else TypeError
        raise error(f"{wrong}, got {_arrays.shown(bounds)}.")
    try:
        low, high = (
            np.broadcast_to(np.asarray(bound, np.float64), 3).astype(dtype if dtype.itemsize == 8 else np.float32)
            for bound in bounds
        )
    except (TypeError, ValueError):
        raise ValueError(f"{wrong}, got {_arrays.shown(bounds)}.") from None
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise ValueError(f"bounds must be finite, and none above the other, got {low.tolist()} and {high.tolist()}.")
    return tuple(low.tolist()), tuple(high.tolist())


def num_slots(lengths: Any, bucket_size: int) -> Any:
    """Number of slots of a layout; lengths may be symbols, or an array."""
    if isinstance(lengths, np.ndarray):
        return int(clouds.slots_of(lengths, bucket_size).sum())
    buckets = 0
    for n in lengths:
        buckets += (n + bucket_size - 1) // bucket_size
    return buckets * bucket_size


def bucketize_results(lengths: Sequence[Any], bucket_size: int, points: Any) -> tuple[Spec, Spec, Spec]:
    """The specs of slot_to_point, point_to_slot and moved; sizes may be symbols."""
    return results_of(num_slots(lengths, bucket_size), points)


def results_of(slots: Any, points: Any) -> tuple[Spec, Spec, Spec]:
    """The same of a layout with this many slots."""
    return Spec((slots,), INT32), Spec((points,), INT32), Spec((), INT32)


_kept_results = functools.lru_cache(maxsize=256)(results_of)  # for sizes that are ints


def bucketize_arrays(points: Given, checked: Bucketing, check_finite: bool | None) -> list[Any]:
    """The arrays slot_to_point, point_to_slot and moved, of the points' library."""
    origin = points.origin
    if check_finite or (check_finite is None and origin.device is None):
        with _arrays.on(origin):
            _arrays.check_finite(points)
    if origin.device is None:
        lengths, bucket_size, hash, balance, voxel_size, seed, bounds, _, offsets = checked
        host, options = points.array.reshape(-1, 3), (hash, balance, voxel_size, seed, bounds)
        lengths = _arrays.int_tuple(lengths) if offsets is None else lengths
        return [_arrays.leave(x, origin) for x in reference.bucketize(host, bucket_size, lengths, *options)]
    call, results = _call(points, checked)
    return launcher.launch(call, (points,), results, origin)


def _call(points: Given, checked: Bucketing) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `bucketize_arrays`, and the specs of its results."""
    call = cuda.bucketize(points, *checked[:-2], launcher.device(points.origin.device))
    return call, _kept_results(checked.slots, points.size // 3)


@clouds.kept_as_passed
def _kept_call(
    points: Spec, origin: _arrays.Origin, bucket_size: Any, hash: Any, balance: Any, voxel_size: Any, seed: Any
) -> tuple[Bucketing, Call, tuple[Spec, ...]]:
    """The checked options of a call for one cloud without bounds, what a GPU runs for it, and the specs of results."""
    alike = Given(*points, origin, None)
    checked = check_bucketize(alike, bucket_size, None, hash, balance, voxel_size, seed, None)
    return checked, *_call(alike, checked)


def counts_of(layout: Buckets) -> Any:
    """The lengths of a layout's clouds: as an array if it has one, so that no tuple is made."""
    return layout.lengths if layout._many is None else layout._many


def buckets_of(
    arrays: Sequence[Any], lengths: Any, bucket_size: int, offsets: tuple[int, ...] | None = None
) -> Buckets:
    """The layout with these arrays. `offsets` are the first buckets of the clouds, if the caller knows them.

    The lengths of many clouds may be an int64 array. The tuples of the layout are then made when they are read.
    """
    slot_to_point, point_to_slot, moved = arrays
    if offsets is None:
        if isinstance(lengths, np.ndarray):
            made = object.__new__(Buckets)
            own = {"slot_to_point": slot_to_point, "point_to_slot": point_to_slot, "moved": moved}
            vars(made).update(own, bucket_size=bucket_size, _many=lengths)
            return made
        offsets = bucket_offsets(lengths, bucket_size)
    return Buckets(slot_to_point, point_to_slot, moved, bucket_size, lengths, offsets)


@clouds.remembered
def checked_layout(lengths: tuple[int, ...], bucket_size: int) -> Buckets:
    """A layout without its arrays. It is checked, because an operator or a program may be called with any numbers."""
    lengths = _arrays.check_lengths(lengths, sum(lengths), "points")
    return buckets_of((None, None, None), lengths, check_bucket_size(bucket_size))


def bucket_offsets(lengths: Sequence[int], bucket_size: int) -> tuple[int, ...]:
    """The first bucket of each cloud, and at the end the number of buckets."""
    return tuple(accumulate([(n + bucket_size - 1) // bucket_size for n in lengths], initial=0))


_kept_offsets = functools.lru_cache(maxsize=256)(bucket_offsets)  # for few lengths that are ints


def _many_offsets(lengths: np.ndarray, bucket_size: int) -> np.ndarray:
    """The same of many clouds."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(clouds.slots_of(lengths, bucket_size) // bucket_size, out=offsets[1:])
    return offsets


# ---- scatter and gather --------------------------------------------------------------------------------------------


def move(x: Given, name: str, index: Given, rows: int, fill: Any) -> Any:
    """x[index], with `fill` where the index is -1. x must have `rows` rows; errors call it `name`."""
    if x.device != index.device:
        _arrays.check_same_device(**{name: x.origin, "buckets": index.origin})
    check_rows(x, name, rows)
    value = checked_fill(fill, x.dtype)
    if x.device is None:
        return _arrays.leave(reference.take_rows(x.array, index.array, value), x.origin)
    call = cuda.move_rows(x, index, cuda.fill_pattern(value))
    (out,) = launcher.launch(call, (x, index), (Spec((index.shape[0], *x.shape[1:]), x.dtype),))
    return out


def check_rows(x: Given | Spec, name: str, rows: Any) -> None:
    """Check that x has `rows` rows. `name` is "x" for `scatter` and "y" for `gather`."""
    if x.ndim == 0 or x.shape[0] != rows:
        what = "slots" if name == "y" else "points"
        raise ValueError(f"{name} must have one row for each of the {rows} {what}, got shape {list(x.shape)}.")


@functools.cache
def _zero(dtype: np.dtype) -> np.ndarray:
    return np.zeros((), dtype)


def checked_fill(fill: Any, dtype: np.dtype) -> np.ndarray:
    """The fill value as a scalar of the rows' dtype."""
    if type(fill) is int and fill == 0:
        return _zero(dtype)
    value = np.asarray(fill)
    if value.ndim or value.dtype.kind not in "biufcV":
        raise TypeError(f"fill must be a number, got {_arrays.shown(fill)} of type {type(fill).__name__}.")
    if dtype.kind in "iu" and not (np.isfinite(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max):
        raise ValueError(f"fill must fit {dtype}, got {_arrays.shown(fill)}.")
    return value.astype(dtype)


# ---- scopes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scopes:
    """Which buckets attend to each other, made by `scopes`.

    Attributes
    ----------
    table : array int32 [num_scopes, size]
        The buckets of each scope, on the buckets' device. A shorter scope ends with -1.
    size, shift, stride : int
        As given to `scopes`.
    bucket_size, bucket_offsets : int, tuple of int
        The layout that the table was made for.
    """

    table: Any
    size: int
    shift: int
    stride: int
    bucket_size: int
    bucket_offsets: tuple[int, ...]

    def to(self, device: Any) -> Scopes:
        """The same scopes on another device, as in `Buckets.to`."""
        return replace(self, table=_arrays.to_device(self.table, device))

    def pin_memory(self) -> Scopes:
        """The same scopes in page-locked host memory (torch only)."""
        return replace(self, table=self.table.pin_memory())


def scopes(buckets: Buckets, size: int = 8, *, shift: int = 0, stride: int = 1, table: Any = None) -> Scopes:
    """Attention scopes over a bucket layout: windows of `size` buckets, shifted or strided. Nothing moves in memory.

    In a cloud of nb buckets, position p = 0..nb-1 stands for bucket (p + shift) mod nb. The positions are cut into
    chunks of size * stride. Scope j of a chunk takes its positions j, j + stride, j + 2 * stride, ... The last chunk
    may be shorter, and then its scopes are shorter too. A scope never crosses clouds, and every bucket is in exactly
    one.

    Parameters
    ----------
    buckets : Buckets
    size : int
        Buckets in a scope, at least 1.
    shift : int
        Rotates the buckets of each cloud, by any number (Swin's shifted window).
    stride : int
        Distance between the buckets of one scope, at least 1. A larger stride reaches farther at the same cost.
    table : array int [num_scopes, size], optional
        A hand-made table, of any library and on any device. It must list every bucket exactly once, with -1 only at the
        end of a row, and no scope may cross clouds. It is checked on the host, which synchronizes. size, shift and
        stride must be left out.

    Returns
    -------
    Scopes

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above.

    References
    ----------
    Flash3D, section 4.2, "Zero-Overhead Bucket-Swin Attention".

    Examples
    --------
    >>> buckets = gpu3d.bucketize(np.random.default_rng(0).random((80, 3), dtype=np.float32), 16)
    >>> gpu3d.scopes(buckets, 2).table
    array([[ 0,  1],
           [ 2,  3],
           [ 4, -1]], dtype=int32)
    >>> gpu3d.scopes(buckets, 2, shift=1).table
    array([[ 1,  2],
           [ 3,  4],
           [ 0, -1]], dtype=int32)
    >>> gpu3d.scopes(buckets, 2, stride=2).table
    array([[ 0,  2],
           [ 1,  3],
           [ 4, -1]], dtype=int32)
    """
    check_buckets(buckets)
    size, shift, stride = check_scopes(size, shift, stride)
    if table is None:
        if (interop := _arrays.interop_of(buckets.slot_to_point)) is not None:
            return interop.scopes(buckets, size, shift=shift, stride=stride)
        made = scope_table(_arrays.read(buckets.slot_to_point, "buckets").origin, buckets, size, shift, stride)
        return Scopes(made, size, shift, stride, buckets.bucket_size, buckets.bucket_offsets)
    if (size, shift, stride) != (8, 0, 1):
        raise ValueError("a hand-made table already says its scopes: leave size, shift and stride out.")
    checked = _checked_table(table, buckets)
    on_device = _arrays.upload(checked, _arrays.read(buckets.slot_to_point, "buckets").origin)
    return Scopes(on_device, checked.shape[1], 0, 1, buckets.bucket_size, buckets.bucket_offsets)


def check_buckets(buckets: Any) -> None:
    """Raise an error if `buckets` is not a Buckets."""
    if not isinstance(buckets, Buckets):
        raise TypeError(f"buckets must be the Buckets that gpu3d.bucketize returns, got {type(buckets).__name__}.")


def check_scopes(size: Any, shift: Any, stride: Any) -> tuple[int, int, int]:
    """The options of `scopes`, checked to fit the kernel's integers."""
    size, shift, stride = (
        _arrays.check_integer(v, name) for v, name in ((size, "size"), (shift, "shift"), (stride, "stride"))
    )
    if abs(shift) > MAX_SLOTS:
        raise ValueError(f"shift must be between -2**31 and 2**31, got {_arrays.shown(shift)}.")
    for value, name in ((size, "size"), (stride, "stride")):
        if not 1 <= value <= MAX_SLOTS:
            raise ValueError(f"{name} must be at least 1 and below 2**31, got {_arrays.shown(value)}.")
    return size, shift, stride


def num_scopes(counts: Sequence[Any], size: int, stride: int) -> Any:
    """Number of scopes of clouds with these numbers of buckets, which may be symbols."""
    chunk = size * stride
    longest = max(counts, default=0) if all(type(count) is int for count in counts) else stride
    # For each j, the chunks that have a scope j. With min(), torch.compile would compile again for each outcome.
    return sum([(count + chunk - 1 - j) // chunk for count in counts for j in range(min(stride, longest))])


def scope_table(origin: _arrays.Origin, layout: Buckets, size: int, shift: int, stride: int) -> Any:
    """The table of `scopes` as an array of the origin's library."""
    if origin.device is None:
        return _arrays.leave(reference.scope_table(layout.bucket_offsets, size, shift, stride), origin)
    many, bucket_size = layout._many, layout.bucket_size
    offsets = layout.bucket_offsets if many is None else _many_offsets(many, bucket_size)
    call = cuda.scopes(offsets, bucket_size, size, shift, stride)
    (table,) = launcher.launch(call, (), (Spec((call.numbers["clouds"].groups, size), INT32),), origin)
    return table


def _checked_table(table: Any, buckets: Buckets) -> np.ndarray:
    native = _arrays.download(_arrays.read(table, "table"))
    if native.ndim != 2 or native.dtype.kind not in "iu":
        raise ValueError(
            f"table must hold integers of shape [num_scopes, size], got {native.dtype} {list(native.shape)}."
        )
    valid = native >= 0
    if (valid[:, 1:] & ~valid[:, :-1]).any() or (len(native) and not valid[:, :1].all()):
        raise ValueError("table must hold -1 only at the end of a row, and no empty row.")
    listed = native[valid]
    if not np.array_equal(np.sort(listed), np.arange(buckets.num_buckets)):
        raise ValueError(
            f"table must list each of the {buckets.num_buckets} buckets exactly once, got {listed.size} entries of "
            f"which {np.unique(listed[listed < buckets.num_buckets]).size} are different buckets."
        )
    cloud = np.searchsorted(buckets.bucket_offsets, native, side="right")
    crossing = ((cloud != cloud[:, :1]) & valid).any(axis=1)
    if crossing.any():
        raise ValueError(
            f"a scope must not cross clouds: row {int(crossing.argmax())} of table lists buckets of two clouds."
        )
    return np.array(native, np.int32, order="C")  # a copy, because the caller may change its table


# ---- quality -------------------------------------------------------------------------------------------------------


class BucketQuality(NamedTuple):
    """How tight the buckets are, in the unit of the points. Only full buckets count; NaN if there are none.

    Attributes
    ----------
    mean_radius, max_radius : float
        Mean and largest radius. The radius of a bucket is the largest distance of its points from their mean.
    moved_share : float
        The share of points that balance="probe" put into another bucket than that of their hash.
    """

    mean_radius: float
    max_radius: float
    moved_share: float


def bucket_quality(points: Any, buckets: Buckets) -> BucketQuality:
    """Measure a bucket layout: the radii of its full buckets, and the share of moved points.

    It is a diagnostic. It computes on the host in float64, and synchronizes.

    Parameters
    ----------
    points : array [N, 3] or [B, n, 3]
        The points that were bucketized.
    buckets : Buckets
        Their layout.

    Returns
    -------
    BucketQuality

    Raises
    ------
    TypeError, ValueError
        `points` are not the points of the layout, or not points at all.

    Examples
    --------
    >>> points = np.random.default_rng(0).random((4096, 3), dtype=np.float32)
    >>> quality = gpu3d.bucket_quality(points, gpu3d.bucketize(points, 512))
    >>> 0.4 < quality.mean_radius < quality.max_radius
    True
    """
    check_buckets(buckets)
    given = _arrays.read(points, "points")
    lengths = _arrays.check_points(given, buckets.lengths if given.ndim == 2 else None)
    if lengths != buckets.lengths:
        raise ValueError(
            f"points must be those of the layout, got lengths {_arrays.shown(lengths)} for "
            f"{_arrays.shown(buckets.lengths)}."
        )
    host_points = _arrays.download(given).reshape(-1, 3)
    slot_to_point, moved = (
        _arrays.download(_arrays.read(x, "buckets")) for x in (buckets.slot_to_point, buckets.moved)
    )
    radii = reference.bucket_radii(host_points, slot_to_point, buckets.bucket_size)
    if not len(radii):
        return BucketQuality(math.nan, math.nan, int(moved) / max(1, len(host_points)))
    return BucketQuality(float(radii.mean()), float(radii.max()), int(moved) / len(host_points))
