# SPDX-License-Identifier: Apache-2.0
"""Bucket attention: each point attends to the points of its scope, a list of buckets that may lie anywhere in memory.

Forward and backward on tensor cores. Shifting or striding the scopes costs another table of bucket numbers: no row
moves.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays, _clouds, _cuda
from gpu3d.buckets import Buckets, Scopes
from gpu3d.reference import attention as reference

HEAD_DIMS = (16, 32, 64, 128)  # that kernels are compiled for; others are padded on load


def bucket_attention(
    q: Any, k: Any, v: Any, buckets: Buckets, scopes: Scopes, *, scale: float | None = None, return_lse: bool = False
) -> Any:
    """Softmax attention within scopes: ``softmax(scale * q k^T) v`` over the points of a scope's buckets, per head.

    Parameters
    ----------
    q, k, v : array [num_slots, H, D]
        Queries, keys and values in slot order (`Buckets.scatter`): float16, bfloat16 or float32, on the CPU float64
        too. D is at most 128 and divisible by 8. Any strides: the three parts of a packed projection
        [num_slots, 3, H, D] are read where they lie. Rows of padding slots may hold anything, NaN too.
    buckets : Buckets
        The layout of the slots.
    scopes : Scopes
        Which buckets attend to each other, made by `scopes` for this layout.
    scale : float, optional
        Factor of the scores. Default: 1 / sqrt(D).
    return_lse : bool
        Return ``(out, lse)``. The backward needs lse.

    Returns
    -------
    out : array [num_slots, H, D]
        Of q's library and dtype; 0 in padding slots. Sums are float32 (float64 for float64).
    lse : array float32 [num_slots, H]
        The natural logarithm of each row's sum of exponentials; -inf in padding slots. Only with return_lse; float64
        for float64.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Nothing is allocated but the results. No host sync; capturable in a CUDA graph after a first call; the same call
    gives the same bits. A NaN in a point's q makes its own row NaN, one in k or v all rows of its scope.
    On a GPU float32 operands are split into three bfloat16 planes each, whose products lose less than 2**-23 of
    |q| |k|: float32 accuracy for six times the products of bfloat16. With D over 64 that takes 159 KB of shared memory
    a block, which sm_80, sm_90 and sm_100 have and sm_86, sm_89 and sm_120 do not: an error there.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024, section 4.2.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> buckets = gpu3d.bucketize(rng.random((200, 3), dtype=np.float32), 64)
    >>> scopes = gpu3d.scopes(buckets, 2)
    >>> q, k, v = rng.standard_normal((3, buckets.num_slots, 4, 16), dtype=np.float32)
    >>> gpu3d.bucket_attention(q, k, v, buckets, scopes).shape
    (256, 4, 16)
    """
    arrays, origin, table = _checked_inputs({"q": q, "k": k, "v": v}, buckets, scopes)
    scale = _checked_scale(scale, arrays[0].shape[2])
    native_q, native_k, native_v = arrays
    with _arrays.on(origin):
        if origin.device is None:
            layout = buckets.bucket_size, buckets.bucket_offsets, buckets.lengths
            out, lse = reference.bucket_attention(native_q, native_k, native_v, table, *layout, scale)
        else:
            out, lse = _forward_cuda(native_q, native_k, native_v, table, buckets, scale, return_lse)
        out = _arrays.leave(out, origin)
        return (out, _arrays.leave(lse, origin)) if return_lse else out


def bucket_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    buckets: Buckets,
    scopes: Scopes,
    *,
    scale: float | None = None,
) -> tuple[Any, Any, Any]:
    """The gradients of `bucket_attention`, from the gradient of its result and what the forward saved.

    Parameters
    ----------
    dout : array [num_slots, H, D]
        Gradient of a loss with respect to out, of q's dtype. Rows of padding slots may hold anything.
    q, k, v : array [num_slots, H, D]
        As given to the forward.
    out, lse : array [num_slots, H, D], array float32 [num_slots, H]
        What the forward returned.
    buckets, scopes, scale
        As given to the forward.

    Returns
    -------
    dq, dk, dv : array [num_slots, H, D]
        Of q's library and dtype; 0 in padding slots.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Deterministic: each row of the three gradients is summed by one warp in a fixed order, with no atomics. Beyond the
    results it allocates num_slots * H floats. No host sync; capturable in a CUDA graph after a first call.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> buckets = gpu3d.bucketize(rng.random((200, 3), dtype=np.float32), 64)
    >>> scopes = gpu3d.scopes(buckets, 2, shift=1)
    >>> dout, q, k, v = rng.standard_normal((4, buckets.num_slots, 4, 16), dtype=np.float32)
    >>> out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    >>> dq, dk, dv = gpu3d.bucket_attention_backward(dout, q, k, v, out, lse, buckets, scopes)
    >>> dq.shape, dk.shape, dv.shape
    ((256, 4, 16), (256, 4, 16), (256, 4, 16))
    """
    named = {"q": q, "k": k, "v": v, "dout": dout, "out": out}
    arrays, origin, table = _checked_inputs(named, buckets, scopes)
    scale = _checked_scale(scale, arrays[0].shape[2])
    native_lse, lse_origin = _arrays.enter(lse, "lse")
    if lse_origin.device != origin.device:
        _arrays.check_same_device(q=origin, lse=lse_origin)
    wide = np.dtype(np.float64) if arrays[0].dtype == np.float64 else _LSE
    if native_lse.shape != arrays[0].shape[:2] or native_lse.dtype != wide:
        raise ValueError(
            f"lse must be {wide} of shape {list(arrays[0].shape[:2])}, as bucket_attention(..., return_lse=True) "
            f"returns it, got {native_lse.dtype} {list(native_lse.shape)}."
        )
    native_q, native_k, native_v, native_dout, native_out = arrays
    saved = native_dout, native_q, native_k, native_v, native_out, native_lse
    with _arrays.on(origin):
        if origin.device is None:
            layout = buckets.bucket_size, buckets.bucket_offsets, buckets.lengths
            gradients = list(reference.bucket_attention_backward(*saved, table, *layout, scale))
        else:
            gradients = _backward_cuda(*saved, table, buckets, scale)
        dq, dk, dv = [_arrays.leave(gradient, origin) for gradient in gradients]
    return dq, dk, dv


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_layout(buckets: Any, scopes: Any) -> None:
    """Buckets, and Scopes made for them; interop.torch asks this where torch.compile looks on."""
    if not isinstance(buckets, Buckets):
        raise TypeError(f"buckets must be the Buckets that gpu3d.bucketize returns, got {type(buckets).__name__}.")
    if not isinstance(scopes, Scopes):
        raise TypeError(f"scopes must be the Scopes that gpu3d.scopes returns, got {type(scopes).__name__}.")
    if (scopes.bucket_size, scopes.bucket_offsets) != (buckets.bucket_size, buckets.bucket_offsets):
        raise ValueError(
            f"scopes were made for another layout: {scopes.bucket_offsets[-1]} buckets of {scopes.bucket_size} slots, "
            f"offsets {_brief(scopes.bucket_offsets)}; buckets has {buckets.num_buckets} of {buckets.bucket_size}, "
            f"offsets {_brief(buckets.bucket_offsets)}. Make them by gpu3d.scopes(buckets)."
        )


def _checked_inputs(named: dict[str, Any], buckets: Buckets, scopes: Scopes) -> tuple[list[Any], _arrays.Origin, Any]:
    """The arrays as NumPy or CuPy, q's origin, and the scopes' table."""
    _check_layout(buckets, scopes)
    entered = [_arrays.enter(x, name) for name, x in named.items()]
    table, table_origin = _arrays.enter(scopes.table, "scopes")
    (first, origin), device = entered[0], table_origin.device
    shape, dtype, alike = first.shape, first.dtype, True
    arrays = []
    for array, other in entered:
        arrays.append(array)
        alike = alike and other.device == device and array.shape == shape and array.dtype == dtype
    if not alike:
        origins = dict(zip(named, (other for _, other in entered), strict=True))
        _arrays.check_same_device(**origins, scopes=table_origin)
    if len(shape) != 3:
        raise ValueError(f"q must have shape [num_slots, H, D], got {list(shape)}.")
    if dtype not in _arrays.FLOATS or (device is not None and dtype == np.float64):
        where = "" if device is None else " on a GPU"
        also = ", float32 or float64" if device is None else " or float32"
        raise TypeError(
            f"q must be float16, bfloat16{also}{where}, got {dtype}: convert q, k and v by .astype('float32')."
        )
    slots, heads, dim = shape
    if slots != buckets.num_slots:
        raise ValueError(
            f"q must have one row for each of the {buckets.num_slots} slots, got shape {list(shape)}: "
            "bring points into slots by buckets.scatter(q)."
        )
    if dim > HEAD_DIMS[-1] or dim % 8 or dim == 0:
        raise ValueError(
            f"head dimension D must be at most {HEAD_DIMS[-1]} and divisible by 8, got {dim}: pad with zeros "
            "and give scale, or use more heads."
        )
    if heads == 0:
        raise ValueError(f"q must have at least one head, got shape {list(shape)}.")
    if not alike:
        for name, array in zip(named, arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} must have the shape of q, got {list(array.shape)} for {list(shape)}.")
            if array.dtype != dtype:
                raise TypeError(
                    f"{name} must have the dtype of q, got {array.dtype} for {dtype}: "
                    f"convert by {name}.astype('{dtype}')."
                )
    return arrays, origin, table


def _brief(offsets: tuple[int, ...]) -> str:
    return str(list(offsets)) if len(offsets) <= 6 else f"[{', '.join(map(str, offsets[:5]))}, ...]"


def _checked_scale(scale: Any, dim: int) -> float:
    if scale is None:
        return dim**-0.5
    number = isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale):
        raise (ValueError if number else TypeError)(f"scale must be a finite number or None, got {scale!r}.")
    return float(scale)


# ---- CUDA ----------------------------------------------------------------------------------------------------------

STAGES = 3  # of visiting rows in shared memory; float32 has one


class _Tiling(NamedTuple):
    """How a kernel cuts its work, for head dimensions up to `dim`: the macros of attention.cuh."""

    dim: int
    wgmma: int  # 1: Hopper's warpgroup products, 0: mma.sync
    warps: int  # of a block
    own_tiles: int  # tiles of 16 rows that a warp owns
    visit: int  # rows a stage
    chunk: int  # rows at a time
    blocks: int  # blocks a multiprocessor that registers are kept free for
    own_shared: int = 0  # 1: owned rows lie in shared memory, not in registers
    lazy: int = 0  # 1: a chunk's sums are still under way while the next one's weights are worked out
    paired: int = 0  # of dkdv: 1: two warps own the same rows, one makes dv and the other dk


# Which kernel takes which cut on Hopper, with the time it took on an H100 and that of others: bfloat16, 122,880 slots
# in scopes of 4096, 16, 8, 8, 4 heads of D = 16, 32, 64, 128, in ms; blocks begin faster since, so that all take 3 to
# 14 % less now (forward 2.57, 1.58, 2.10, 1.80). Registers decide: a chunk's scores, the owned operands and the sums
# must fit, and the more warps fit beside each other, the better their products and exponentials overlap. At D = 16 a
# product is too small for warpgroups. Run the GPU suite after any change: for dq of D = 64 in chunks of 64 rows ptxas
# 13.0 let go of an owned operand's registers while the loop needed them, and said nothing.
HOPPER = {
    "forward": (
        _Tiling(16, 0, 8, 2, 256, 32, 2),  # 2.65; tiles of 128 2.71, four blocks of 4 warps 2.79, wgmma 3.0
        _Tiling(32, 1, 16, 1, 256, 64, 1, lazy=1),  # 1.65; not lazy 1.69, tiles of 128 1.74, mma.sync 1.82
        _Tiling(64, 1, 16, 1, 128, 64, 1),  # 2.15; lazy 2.39, tiles of 256 2.25, chunks of 32 2.32
        _Tiling(128, 1, 12, 1, 96, 48, 1, own_shared=1, lazy=1),  # 1.85; not lazy 2.04, chunks of 32 1.95, 8 warps 2.6
    ),
    "dq": (
        _Tiling(16, 0, 8, 2, 128, 16, 2),  # 3.10; tiles of 256 3.14, four blocks of 4 warps 3.18
        _Tiling(32, 1, 16, 1, 256, 32, 1, lazy=1),  # 2.09; not lazy 2.13, tiles of 128 2.15
        _Tiling(64, 1, 16, 1, 128, 32, 1, own_shared=1),  # 3.29; lazy 3.40, 12 warps 3.5
        _Tiling(128, 1, 8, 1, 64, 32, 1, lazy=1),  # 3.3; not lazy 3.45, 12 warps 3.5
    ),
    "dkdv": (
        _Tiling(16, 0, 8, 2, 256, 16, 2),  # 3.62; tiles of 128 3.70, chunks of 32 3.9
        _Tiling(32, 1, 16, 1, 256, 32, 1),  # 2.45; two blocks of 8 warps 2.55
        _Tiling(64, 1, 8, 1, 128, 64, 1, lazy=1),  # 4.56; not lazy 4.75, 12 warps 4.7
        _Tiling(128, 1, 8, 1, 64, 32, 1, own_shared=1),  # 4.22; lazy 4.36, owned rows in registers 4.6
    ),
}
# From sm_80 on, in the 99 KB of shared memory that the smallest of them offer a block.
MMA = {
    "forward": (
        _Tiling(16, 0, 4, 2, 128, 32, 4),
        _Tiling(32, 0, 8, 2, 128, 16, 2),
        _Tiling(64, 0, 8, 2, 64, 32, 1),
        _Tiling(128, 0, 8, 1, 32, 16, 1),
    ),
    "dq": (
        _Tiling(16, 0, 4, 2, 128, 16, 4),
        _Tiling(32, 0, 4, 2, 64, 16, 2),
        _Tiling(64, 0, 4, 2, 64, 16, 2),
        _Tiling(128, 0, 4, 1, 32, 16, 1),
    ),
    "dkdv": (
        _Tiling(16, 0, 8, 2, 256, 16, 2),
        _Tiling(32, 0, 4, 2, 64, 16, 2),
        _Tiling(64, 0, 4, 1, 64, 16, 2),
        _Tiling(128, 0, 8, 1, 32, 16, 1),
    ),
}
# float32 is three planes of bfloat16: three times the operands. On an H100, with 61,440 slots in scopes of 4096 and 8,
# 8, 4 heads of D = 32, 64, 128, forward and backward take 5.1 and 17, 10.9 and 37, 11.8 and 41 ms. D = 128 takes up to
# 159 KB of shared memory; Hopper has room for 216 KB: twice as many warps in dq. That backward took 38 ms with dk and
# dv by the same warp, but then kept some of what it needs in local memory; 47 ms by a launch for each.
SINGLE = {
    "forward": (
        _Tiling(16, 0, 8, 1, 128, 16, 2),
        _Tiling(32, 0, 8, 1, 64, 16, 2),
        _Tiling(64, 0, 8, 1, 32, 16, 1),
        _Tiling(128, 0, 8, 1, 16, 16, 1, own_shared=1),
    ),
    "dq": (
        _Tiling(16, 0, 8, 1, 128, 16, 1),
        _Tiling(32, 0, 8, 1, 64, 16, 1),
        _Tiling(64, 0, 4, 1, 32, 16, 2, own_shared=1),
        _Tiling(128, 0, 4, 1, 32, 16, 1, own_shared=1),
    ),
}
SINGLE["dkdv"] = (*SINGLE["dq"][:3], _Tiling(128, 0, 8, 1, 32, 16, 1, own_shared=1, paired=1))
HOPPER_SINGLE = {
    "forward": SINGLE["forward"],
    "dq": (
        *SINGLE["dq"][:2],
        _Tiling(64, 0, 8, 2, 32, 16, 1, own_shared=1),
        _Tiling(128, 0, 8, 1, 32, 16, 1, own_shared=1),
    ),
    "dkdv": SINGLE["dkdv"],
}

_VIEW = struct.Struct("<Qqii")
_DIVISORS = struct.Struct("<" + 3 * "iIi")
# v, c, d: struct View, Clouds, Divisors
_SIGNATURES = {"forward": "vvvcQidfQQ", "dq": "vvvvvQcQidffQQ", "dkdv": "vvvvQQcQidffQQ"}
LOG2E = math.log2(math.e)
_LSE = np.dtype(np.float32)


def _tiling(arch: str, which: str, dtype: np.dtype, dim: int) -> _Tiling:
    hopper, single = (HOPPER, HOPPER_SINGLE) if arch == "sm_90a" else (MMA, SINGLE)
    return next(tiling for tiling in (single if dtype == np.float32 else hopper)[which] if tiling.dim >= dim)


def _macros(tiling: _Tiling, dtype: np.dtype, dim: int) -> _cuda.Macros:
    return (
        ("D", next(d for d in HEAD_DIMS if d >= dim)),
        ("ELEMENT", _arrays.FLOATS.index(dtype)),
        *((name.upper(), value) for name, value in zip(tiling._fields[1:], tiling[1:], strict=True)),
    )


def configurations() -> list[_cuda.Configuration]:
    """Every module this file can ask for."""
    found: dict[_cuda.Configuration, None] = {}
    for arch in ("sm_80", "sm_90a"):
        for which in MMA:
            for dtype in (dtype for dtype in _arrays.FLOATS if dtype != np.float64):
                for dim in HEAD_DIMS:
                    tiling = _tiling(arch, which, dtype, dim)
                    only = "sm_90a" if tiling.wgmma else None
                    found[_cuda.Configuration(f"attention_{which}", _macros(tiling, dtype, dim), only)] = None
    return list(found)


class _Plan(NamedTuple):
    """What a kernel needs for a layout, worked out once: Python takes as long over a call as the launches."""

    kernel: _cuda.Kernel
    divisors: bytes  # struct Divisors
    grid: int
    block: int
    shared_mem: int


@functools.lru_cache(maxsize=256)
def _plans(
    device: int,
    kernels: tuple[str, ...],
    dtype: np.dtype,
    heads: int,
    dim: int,
    bucket_size: int,
    lengths: tuple[int, ...],
    table_shape: tuple[int, int],
) -> tuple[_clouds.Batch, list[_Plan]]:
    """The clouds, and a plan for each of `kernels`, for the current device, which is `device`."""
    buckets = -(-np.array(lengths, np.int64) // bucket_size)
    longest = min(table_shape[1], int(buckets.max(initial=0)))  # buckets of a scope
    plans = []
    for which in kernels:
        tiling = _tiling(_cuda.device_arch(device), which, dtype, dim)
        macros = _macros(tiling, dtype, dim)
        own = _own(tiling)
        shared_mem = _shared_mem(which, tiling, dtype, dict(macros)["D"])
        sizes = {"v": f"{_VIEW.size}s", "c": _clouds.FORMAT, "d": f"{_DIVISORS.size}s"}
        formats = "".join(sizes.get(letter, letter) for letter in _SIGNATURES[which])
        kernel = _cuda.kernel(f"attention_{which}", f"attention_{which}", formats, macros, shared_mem=shared_mem)
        tiles = -(-longest * bucket_size // own)  # blocks a scope and head
        divisors = _DIVISORS.pack(*[x for by in (bucket_size, heads, tiles) for x in _divisor(by)])
        plans.append(_Plan(kernel, divisors, table_shape[0] * heads * tiles, 32 * tiling.warps, shared_mem))
    return _clouds.batch(lengths, bucket_size, buckets, 0 * buckets), plans


def _own(tiling: _Tiling) -> int:
    """Rows that a block owns."""
    return 16 * tiling.warps * tiling.own_tiles // (1 + tiling.paired)


def _shared_mem(which: str, tiling: _Tiling, dtype: np.dtype, dim: int) -> int:
    """Bytes a block: the visitors' stages and the owned rows that lie there."""
    visit, own = 2 * tiling.visit, _own(tiling) * (1 if which == "forward" else 2)  # rows
    if dtype == np.float32:  # one stage of three planes, the floats of the next
        return visit * (3 * 2 * (dim + 8) + 4 * dim) + own * tiling.own_shared * 4 * dim
    return (STAGES * visit + own * tiling.own_shared) * 2 * (dim if tiling.wgmma else dim + 8)


def _divisor(by: int) -> tuple[int, int, int]:
    """A struct Divisor: x // by is x * factor >> shift, for 0 <= x < 2**31."""
    shift = 31 + (by - 1).bit_length()
    return by, -(-(1 << shift) // by), shift


def _aligned(x: Any) -> tuple[Any, bytes]:
    """Rows that can be loaded 16 bytes at a time: x, or a copy where its layout does not allow that; and their View."""
    (rows, heads, last), address, size = x.strides, x.data.ptr, x.itemsize
    if last != size or (rows | heads | address) % 16 or abs(rows // size) >= 2**31:
        import cupy

        x = cupy.array(x, order="C")
        (rows, heads, last), address = x.strides, x.data.ptr
    return x, _VIEW.pack(address, heads // size, rows // size, x.shape[2])


def _slope(scale: float, dtype: np.dtype) -> float:
    """The scale as the kernels take it; never 0, which would make 0 * -inf of a masked key."""
    unit = 1.0 if dtype == np.float32 else LOG2E  # as attention.cuh has it
    return math.copysign(max(abs(scale) * unit, 1e-30), scale)


def _launch(plan: _Plan, *args: int | float | bytes) -> None:
    _cuda.launch(plan.kernel, grid=plan.grid, block=plan.block, shared_mem=plan.shared_mem, args=args)


def _forward_cuda(
    q: Any, k: Any, v: Any, table: Any, buckets: Buckets, scale: float, return_lse: bool
) -> tuple[Any, Any]:
    import cupy

    shape, dtype = q.shape, q.dtype
    out = cupy.ndarray(shape, dtype)
    lse, lse_address = None, 0
    if return_lse:
        lse = cupy.ndarray(shape[:2], _LSE)
        lse_address = lse.data.ptr
    if q.size:
        key = dtype, shape[1], shape[2], buckets.bucket_size, buckets.lengths, table.shape
        batch, (forward,) = _plans(q.data.device_id, ("forward",), *key)
        clouds, memory = _clouds.pack(batch, buckets.bucket_size)
        aligned = [_aligned(x) for x in (q, k, v)]
        scope = clouds, table.data.ptr, table.shape[1], forward.divisors, _slope(scale, dtype)
        _launch(forward, *[view for _, view in aligned], *scope, out.data.ptr, lse_address)
        del aligned, memory  # held until here: the pool hands them on in stream order
    return out, lse


def _backward_cuda(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, table: Any, buckets: Buckets, scale: float
) -> list[Any]:
    import cupy

    shape, dtype, size = q.shape, q.dtype, q.nbytes
    memory = _cuda.results((0, size, 2 * size, 3 * size))
    gradients = [cupy.ndarray(shape, dtype, part) for part in memory]
    if size:
        key = dtype, shape[1], shape[2], buckets.bucket_size, buckets.lengths, table.shape
        batch, (dq, dkdv) = _plans(q.data.device_id, ("dq", "dkdv"), *key)
        clouds, held = _clouds.pack(batch, buckets.bucket_size)
        if not lse.flags.c_contiguous:
            lse = cupy.ascontiguousarray(lse)
        aligned = [_aligned(x) for x in (dout, q, k, v, out)]
        *views, of_out = [view for _, view in aligned]
        delta = cupy.cuda.alloc(lse.nbytes)
        scope = clouds, table.data.ptr, table.shape[1]
        numbers = _slope(scale, dtype), scale
        saved, (of_q, of_k, of_v) = lse.data.ptr, [part.ptr for part in memory]
        _launch(dq, *views, of_out, saved, *scope, dq.divisors, *numbers, of_q, delta.ptr)
        _launch(dkdv, *views, saved, delta.ptr, *scope, dkdv.divisors, *numbers, of_k, of_v)
        del aligned, held, delta  # held until here: the pool hands them on in stream order
    return gradients
