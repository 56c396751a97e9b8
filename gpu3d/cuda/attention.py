# SPDX-License-Identifier: Apache-2.0
"""The plans of bucket attention and its backward: kernels_cu/attention_*.cu.

A plan depends on the shapes of q and of the scopes' table, on the bucket size, on the longest cloud in buckets, and on
the device. The lengths reach the kernels in the table of clouds, and the scale is a number.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOAT64, FLOATS, Given, Spec
from gpu3d.cuda import arrays, clouds
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Input, Kernel, Macros, Number, Packed, Plan, Pointer, Result, Steps, TensorMap

HEAD_DIMS = (16, 32, 64, 128)  # the head dimensions that kernels are compiled for; others are padded on load
STAGES = 3  # stages of streamed rows in shared memory; float32 has one

# ---- tilings -------------------------------------------------------------------------------------------------------


class _Tiling(NamedTuple):
    """How a kernel cuts its work, for head dimensions up to `dim`: the macros of attention.cuh."""

    dim: int
    wgmma: int  # 1: Hopper's warpgroup products, 0: mma.sync
    warps: int  # warps in a block
    own_tiles: int  # tiles of 16 stationary rows in a warp
    visit: int  # streamed rows in a stage
    chunk: int  # streamed rows that are processed at a time
    blocks: int  # blocks on a multiprocessor that the compiler leaves registers for
    own_shared: int = 0  # 1: stationary rows are in shared memory, 0: in registers
    lazy: int = 0  # 1: products with the P of one chunk overlap with computing the P of the next
    paired: int = 0  # dkdv, 1: two warps share stationary rows; one computes dv and the other dk


# The tilings for Hopper. Each line has its own time and the times of other tilings, in ms on an H100: bfloat16, 122,880
# slots in scopes of 4096, with 16 and 8 heads of D = 16 and 32. (Blocks start faster since then: all take 3 % less now,
# and the forward 2.57 and 1.58 ms.) Registers decide. The scores of a chunk, the stationary operands and the sums must
# fit. The more warps fit at the same time, the better products and exponentials overlap. At D = 16 a product is too
# small for warpgroups. Run the GPU suite after any change: for dq of D = 64 in chunks of 64 rows, ptxas 13.0 silently
# reused the registers of a stationary operand that the loop still needed.
HOPPER = {
    "forward": (
        _Tiling(16, 0, 8, 2, 256, 32, 2),  # 2.65; tiles of 128 2.71, four blocks of 4 warps 2.79, wgmma 3.0
        _Tiling(32, 1, 16, 1, 256, 64, 1, lazy=1),  # 1.65; not lazy 1.69, tiles of 128 1.74, mma.sync 1.82
    ),
    "dq": (
        _Tiling(16, 0, 8, 2, 128, 16, 2),  # 3.10; tiles of 256 3.14, four blocks of 4 warps 3.18
        _Tiling(32, 1, 16, 1, 256, 32, 1, lazy=1),  # 2.09; not lazy 2.13, tiles of 128 2.15
    ),
    "dkdv": (
        _Tiling(16, 0, 8, 2, 256, 16, 2),  # 3.62; tiles of 128 3.70, chunks of 32 3.9
        _Tiling(32, 1, 16, 1, 256, 32, 1),  # 2.45; two blocks of 8 warps 2.55
    ),
}
# The tilings for all other GPUs from sm_80 on. They fit the 99 KB of shared memory per block of the smallest GPUs.
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
# The tilings for float32, which is split into three planes of bfloat16, so there are three times as many operands. On
# an H100, forward and backward of 61,440 slots in scopes of 4096 take 5.1 and 17, 10.9 and 37, 11.8 and 41 ms, with 8,
# 8 and 4 heads of D = 32, 64 and 128. D = 128 takes up to 159 KB of shared memory; on Hopper 216 KB, for twice as many
# warps in dq. With one warp for both dk and dv of D = 128, the backward took 38 ms, but kept operands in local memory.
# With one launch for each of them it took 47 ms.
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


class _Roles(NamedTuple):
    """How attention_forward_roles.cu cuts its work: its macros."""

    visit: int
    workers: int
    stages: int


# Larger heads in 16-bit dtypes on Hopper have kernels of their own, which have their times. By head dimension: the
# macros of attention_forward_roles.cu, and VISIT of attention_backward.cu.
ROLES = {64: _Roles(128, 12, 3), 128: _Roles(128, 8, 2)}
ONE_PASS = {64: 128, 128: 64}
BACKWARD_KEYS, GROUP, BACKWARD_THREADS = 128, 16, 384
BACKWARD_DELTA_THREADS, BACKWARD_DELTA_ROWS = 256, 4
MAX_ITEMS = 2**31 - 2**20  # so that tickets, some of which are past the last item, stay below 2**31


def _tiling(hopper: bool, which: str, dtype: np.dtype, dim: int) -> _Tiling:
    half, single = (HOPPER, HOPPER_SINGLE) if hopper else (MMA, SINGLE)
    return next(tiling for tiling in (single if dtype == FLOAT32 else half)[which] if tiling.dim >= dim)


def _padded(dim: int) -> int:
    """The head dimension of the kernel that is used for `dim`."""
    return next(d for d in HEAD_DIMS if d >= dim)


def _macros(tiling: _Tiling, dtype: np.dtype, dim: int) -> Macros:
    return (
        ("D", _padded(dim)),
        ("ELEMENT", FLOATS.index(dtype)),
        *((name.upper(), value) for name, value in zip(tiling._fields[1:], tiling[1:], strict=True)),
    )


def _roles(hopper: bool, dtype: np.dtype, dim: int) -> _Roles | None:
    """How the forward cuts its work if its warps have roles."""
    return ROLES.get(_padded(dim)) if hopper and dtype != FLOAT32 else None


def _one_pass(hopper: bool, dtype: np.dtype, dim: int) -> bool:
    """Whether the backward takes one pass over the scores."""
    return hopper and dtype != FLOAT32 and _padded(dim) in ONE_PASS


def _roles_macros(roles: _Roles, dtype: np.dtype, dim: int) -> Macros:
    names = (name.upper() for name in roles._fields)
    return (("D", _padded(dim)), ("ELEMENT", FLOATS.index(dtype)), ("WGMMA", 1), *zip(names, roles, strict=True))


def _one_pass_macros(dtype: np.dtype, dim: int) -> Macros:
    macros = {"D": _padded(dim), "ELEMENT": FLOATS.index(dtype), "WGMMA": 1, "VISIT": ONE_PASS[_padded(dim)]}
    return tuple(macros.items())


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    found: dict[Configuration, None] = {}
    for hopper in (False, True):
        for which in MMA:
            for dtype in (dtype for dtype in FLOATS if dtype != FLOAT64):
                for dim in HEAD_DIMS:
                    if which == "forward" and (roles := _roles(hopper, dtype, dim)):
                        macros = _roles_macros(roles, dtype, dim)
                        found[Configuration("attention_forward_roles", macros, "sm_90a")] = None
                        continue
                    if which != "forward" and _one_pass(hopper, dtype, dim):
                        continue
                    tiling = _tiling(hopper, which, dtype, dim)
                    only = "sm_90a" if tiling.wgmma else None
                    found[Configuration(f"attention_{which}", _macros(tiling, dtype, dim), only)] = None
    for dtype in (dtype for dtype in FLOATS if dtype.itemsize == 2):
        for dim in ONE_PASS:
            found[Configuration("attention_backward", _one_pass_macros(dtype, dim), "sm_90a")] = None
    return list(found)


def _own(tiling: _Tiling) -> int:
    """Stationary rows in a block."""
    return 16 * tiling.warps * tiling.own_tiles // (1 + tiling.paired)


def _shared_mem(which: str, tiling: _Tiling, dtype: np.dtype, dim: int) -> int:
    """Bytes of shared memory per block: the stages of streamed rows, and the stationary rows kept there."""
    visit, own = 2 * tiling.visit, _own(tiling) * (1 if which == "forward" else 2)  # rows
    if dtype == FLOAT32:  # one stage of three planes, and the float32 rows of the next
        return visit * (3 * 2 * (dim + 8) + 4 * dim) + own * tiling.own_shared * 4 * dim
    return STAGES * visit * 2 * (dim if tiling.wgmma else dim + 8)


# ---- arguments -----------------------------------------------------------------------------------------------------

VIEW_FORMAT = "<Qqii"  # struct View: address, elements from one head to the next and from one row to the next, D
_SOURCE_FORMAT = "<128sQqiii36x"  # struct Source: a CUtensorMap, a struct View, and rows of a box
_DIVISORS = struct.Struct("<" + 3 * "iIi")
_SCHEDULE = struct.Struct("<i" + 2 * "iIi")
# The parameters of each kernel as formats of the module struct; v, r, c, d and s stand for struct View, Source, Clouds,
# Divisors and Schedule.
_SIGNATURES = {"forward": "vvvcQidfQQ", "dq": "vvvvvQcQidffvQ", "dkdv": "vvvvQQcQidffvQ"}
_STRUCTS = {
    "v": f"{struct.calcsize(VIEW_FORMAT)}s",
    "r": f"{struct.calcsize(_SOURCE_FORMAT)}s",
    "c": clouds.FORMAT,
    "d": f"{_DIVISORS.size}s",
    "s": f"{_SCHEDULE.size}s",
}
LOG2E = math.log2(math.e)


def _divisor(by: int) -> tuple[int, int, int]:
    """The fields of a struct Divisor: x // by is x * factor >> shift, for 0 <= x < 2**31."""
    shift = 31 + (by - 1).bit_length()
    return by, -(-(1 << shift) // by), shift


def _scale_log2(scale: float, dtype: np.dtype) -> float:
    """The scale as the kernels take it. It is never 0, because a masked key would give 0 * -inf."""
    unit = 1.0 if dtype == FLOAT32 else LOG2E  # as in attention.cuh
    return math.copysign(max(abs(scale) * unit, 1e-30), scale)


def _reading(x: Given | Spec, device: Device) -> tuple[int, int] | arrays.Strided | None:
    """How the kernels read q, k, v, ..., 16 bytes at a time.

    None: x is contiguous. Two numbers: the strides of heads and of rows, in elements. Strided: from a copy.
    """
    if x.strides is None:
        return arrays.copied(x, 16) if x.misalignment else None
    (row, head, last), size = x.strides, x.dtype.itemsize
    boxes = device.arch == "sm_90a" and size == 2  # whose strides are positive
    if (
        last != size
        or (row | head | x.misalignment) % 16
        or abs(row // size) >= 2**31
        or (boxes and min(row, head) <= 0)
    ):
        return arrays.copied(x)
    return head // size, row // size


class Shape(NamedTuple):
    """The properties of q, scopes, layout and device that a plan depends on."""

    dtype: np.dtype
    heads: int
    dim: int
    bucket_size: int
    scopes: int
    width: int  # columns of the scopes' table
    longest: int  # an upper bound on the buckets of a scope
    clouds: int  # clouds, if their table is in device memory; otherwise 0
    hopper: bool
    multiprocessors: int


def shape_of(
    count: int,
    largest: int,
    bucket_size: int,
    q: tuple[int, ...],
    dtype: np.dtype,
    table: tuple[int, ...],
    device: Device,
) -> Shape:
    """The Shape for q and the scopes' table of these shapes, and `count` clouds of at most `largest` buckets."""
    if dtype == FLOAT64:
        raise TypeError("attention on a GPU takes float16, bfloat16 and float32, got float64.")
    _, heads, dim = q
    scopes, width = table
    many = count if count > clouds.INLINE_CLOUDS else 0
    longest, hopper = min(width, largest), device.arch == "sm_90a"
    return Shape(dtype, heads, dim, bucket_size, scopes, width, longest, many, hopper, device.multiprocessors)


@clouds.remembered
def layout_of(lengths: tuple[int, ...], bucket_size: int) -> tuple[clouds.Table, int]:
    """The table of the clouds, whose tiles are buckets, and the number of buckets of the largest cloud."""
    if len(lengths) <= clouds.INLINE_CLOUDS:
        buckets: Sequence[int] = [-(-n // bucket_size) for n in lengths]
        return clouds.table(lengths, bucket_size, buckets, None), max(buckets, default=0)
    n = clouds.array(lengths)
    counts: Any = -(-n // bucket_size)
    return clouds.table(n, bucket_size, counts, None), int(counts.max())  # type: ignore[arg-type]


def _view(steps: Steps, source: Pointer, reading: Any, shape: Shape) -> Packed:
    """The struct View of an array [slots, H, D], or of its copy."""
    if isinstance(reading, arrays.Strided):
        source, reading = arrays.add_copy(steps, source, reading), None
    head, row = reading or (shape.dim, shape.heads * shape.dim)
    return Packed(VIEW_FORMAT, (source, head, row, shape.dim))


def _packed_views(shape: Shape, pointer: Pointer) -> list[Packed]:
    """The views of three arrays side by side, [slots, 3, H, D]."""
    part = shape.heads * shape.dim
    size = shape.dtype.itemsize
    return [Packed(VIEW_FORMAT, (pointer + i * part * size, shape.dim, 3 * part, shape.dim)) for i in range(3)]


@functools.cache
def _kernel(which: str, dtype: np.dtype, dim: int, hopper: bool) -> tuple[Kernel, _Tiling]:
    """The kernel for these options, and its tiling."""
    tiling = _tiling(hopper, which, dtype, dim)
    formats = "".join(_STRUCTS.get(letter, letter) for letter in _SIGNATURES[which])
    shared_mem = _shared_mem(which, tiling, dtype, _padded(dim))
    name = f"attention_{which}"
    return Kernel(name, name, formats, _macros(tiling, dtype, dim), shared_mem, early=which == "forward"), tiling


@functools.cache
def _roles_kernel(roles: _Roles, dtype: np.dtype, dim: int) -> Kernel:
    rows = 2 * roles.stages * roles.visit + 2 * 16 * roles.workers  # keys and values, and queries of two items
    formats = "".join(_STRUCTS.get(letter, letter) for letter in "rrrcQidiQfQQ")
    name, shared_mem = "attention_forward_roles", 2 * _padded(dim) * rows
    return Kernel(name, name, formats, _roles_macros(roles, dtype, dim), shared_mem, early=True)


@functools.cache
def _one_pass_kernels(dtype: np.dtype, dim: int) -> tuple[Kernel, Kernel, Kernel]:
    """attention_delta, attention_backward and attention_round."""
    macros, padded = _one_pass_macros(dtype, dim), _padded(dim)
    visit = ONE_PASS[padded]
    rows = 3 * BACKWARD_KEYS + 2 * 2 * visit  # keys of two items, values, and two stages of queries and dO
    shared_mem = 2 * (rows * padded + 2 * visit * BACKWARD_KEYS) + 4 * visit * padded  # and twice dS, and a tile of dQ

    def kernel(function: str, signature: str, shared_mem: int = 0) -> Kernel:
        formats = "".join(_STRUCTS.get(letter, letter) for letter in signature)
        return Kernel("attention_backward", function, formats, macros, shared_mem)

    return (
        kernel("attention_delta", "vvcdiQQ"),
        kernel("attention_backward", "rrrrQQcQidsffQQvQ", shared_mem),
        kernel("attention_round", "Qcdfv"),
    )


def _divisors(shape: Shape, tiles: int) -> bytes:
    """The struct Divisors."""
    return _DIVISORS.pack(*[x for by in (shape.bucket_size, shape.heads, tiles) for x in _divisor(by)])


def _launch(
    steps: Steps,
    which: str,
    shape: Shape,
    before: tuple[Any, ...],
    table: Pointer,
    batch: Any,
    after: tuple[Any, ...],
) -> None:
    """Add a launch with a block for each scope, head and tile of stationary rows. Blocks beyond a scope return."""
    kernel, tiling = _kernel(which, shape.dtype, shape.dim, shape.hopper)
    tiles = -(-shape.longest * shape.bucket_size // _own(tiling))
    divisors = _divisors(shape, tiles)
    args = *before, batch, table, shape.width, divisors, *after
    steps.launch(kernel, grid=shape.scopes * shape.heads * tiles, block=32 * tiling.warps, args=args)


def _add_forward(
    steps: Steps,
    shape: Shape,
    views: Sequence[Packed],
    table: Pointer,
    batch: Any,
    scale_log2: Number | float,
    out: Pointer,
    lse: Pointer | None,
) -> None:
    """Add attention. `views` are those of q, k and v."""
    roles = _roles(shape.hopper, shape.dtype, shape.dim)
    if not roles:
        _launch(steps, "forward", shape, tuple(views), table, batch, (scale_log2, out, lse))
        return
    tiles = -(-shape.longest * shape.bucket_size // 64)  # of a warpgroup
    tiles = -(-tiles // (roles.workers // 4))
    items = shape.scopes * shape.heads * tiles
    _check_items(items, shape)
    blocks, counter = min(items, shape.multiprocessors), None
    if items > blocks:
        counter = steps.workspace("counter", 4)
        steps.clear(counter, 4)
    kernel = _roles_kernel(roles, shape.dtype, shape.dim)
    read = [_source(view, shape, rows) for view, rows in zip(views, (64, roles.visit, roles.visit), strict=True)]
    args = *read, batch, table, shape.width, _divisors(shape, tiles), items, counter, scale_log2, out, lse
    steps.launch(kernel, grid=blocks, block=128 + 32 * roles.workers, args=args)


def _source(view: Packed, shape: Shape, rows: int) -> Packed:
    """The struct Source, for tiles of a multiple of `rows` rows."""
    pointer, head, row, dim = view.fields
    box = math.gcd(shape.bucket_size, rows)
    boxes = TensorMap(pointer, shape.heads, dim, 2 * row, 2 * head, min(_padded(dim), 64), box)
    return Packed(_SOURCE_FORMAT, (boxes, *view.fields, box))


def _check_items(items: int, shape: Shape) -> None:
    if items > MAX_ITEMS:
        raise ValueError(
            f"attention has at most {MAX_ITEMS} parts of work, got {items} for {shape.scopes} scopes of up to "
            f"{shape.longest} buckets and {shape.heads} heads: pass fewer clouds at a time."
        )


def _add_backward(
    steps: Steps,
    shape: Shape,
    views: Sequence[Packed],
    lse: Pointer,
    table: Pointer,
    batch: Any,
    scale_log2: Number | float,
    scale: Number | float,
    gradients: Sequence[Packed],
    slots: int,
) -> None:
    """Add the gradients of q, k and v of all rows, in one pass over the scores or in two.

    `views` are those of dout, q, k, v and out, and `gradients` those of dq, dk and dv. dk and dv have equal strides.
    """
    delta = steps.workspace("delta", 4 * slots * shape.heads)  # sum(dout * out) of each row
    scales, (dq, dk, dv) = (scale_log2, scale), gradients
    if not _one_pass(shape.hopper, shape.dtype, shape.dim):
        _launch(steps, "dq", shape, (*views, lse), table, batch, (*scales, dq, delta))
        _launch(steps, "dkdv", shape, (*views[:4], lse, delta), table, batch, (*scales, dk, dv.fields[0]))
        return
    before, products, after = _one_pass_kernels(shape.dtype, shape.dim)
    *read, out = views
    pairs, padded = shape.scopes * shape.heads, _padded(shape.dim)
    tiles = -(-shape.longest * shape.bucket_size // BACKWARD_KEYS)
    counts, divisors = 1 + pairs * tiles, _divisors(shape, tiles)
    _check_items(counts, shape)
    counters = steps.workspace("counters", 4 * counts)
    dq_sums = steps.workspace("dq sums", 4 * slots * shape.heads * padded)
    rows = BACKWARD_DELTA_THREADS // (padded // 8) * BACKWARD_DELTA_ROWS  # of a block
    args: tuple[Any, ...] = read[0], out, batch, divisors, counts, counters, delta
    steps.launch(before, grid=-(-slots * shape.heads // rows), block=BACKWARD_DELTA_THREADS, args=args)
    side = min(pairs, -(-shape.multiprocessors // tiles))
    schedule = _SCHEDULE.pack(pairs, *_divisor(side), *_divisor(side * tiles))
    tile = ONE_PASS[padded]
    read = [_source(view, shape, rows) for view, rows in zip(read, (tile, tile, *[BACKWARD_KEYS] * 2), strict=True)]
    args = (
        *read,
        lse,
        delta,
        batch,
        table,
        shape.width,
        divisors,
        schedule,
        *scales,
        counters,
        dq_sums,
        dk,
        dv.fields[0],
    )
    blocks = min(pairs * tiles, shape.multiprocessors)
    steps.launch(products, grid=blocks, block=BACKWARD_THREADS, args=args)
    warps = slots // GROUP * shape.heads * (2 if padded == 128 else 1)
    args = dq_sums, batch, divisors, scale, dq
    steps.launch(after, grid=-(-warps // 4), block=128, args=args)


def add_packed(
    steps: Steps,
    shape: Shape,
    qkv: Pointer,
    table: Pointer,
    batch: Any,
    scale: float,
    out: Pointer,
    lse: Pointer | None,
) -> None:
    """Add attention of q, k and v side by side, [slots, 3, H, D], at an address that is a multiple of 16.

    `batch` is the struct Clouds of the slots, with buckets as tiles. `out` is [slots, H, D], `lse` float32 [slots, H].
    """
    if shape.scopes:
        _add_forward(steps, shape, _packed_views(shape, qkv), table, batch, _scale_log2(scale, shape.dtype), out, lse)


def add_packed_backward(
    steps: Steps,
    shape: Shape,
    dout: Pointer,
    qkv: Pointer,
    out: Pointer,
    lse: Pointer,
    table: Pointer,
    batch: Any,
    slots: int,
    scale: float,
    dqkv: Pointer,
) -> None:
    """Add the backward of `add_packed`: the gradients of q, k and v side by side, [slots, 3, H, D], 0 in padding.

    `dout` and `out` are [slots, H, D]. All addresses are multiples of 16, and every bucket is in one scope of `table`.
    """
    if shape.scopes:
        of_dout, of_out = (_view(steps, pointer, None, shape) for pointer in (dout, out))
        views = of_dout, *_packed_views(shape, qkv), of_out
        gradients = _packed_views(shape, dqkv)
        scale_log2 = _scale_log2(scale, shape.dtype)
        _add_backward(steps, shape, views, lse, table, batch, scale_log2, scale, gradients, slots)


# ---- plans ---------------------------------------------------------------------------------------------------------


def attention(
    q: Given | Spec,
    k: Given | Spec,
    v: Given | Spec,
    table: Given | Spec,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
    return_lse: bool,
    device: Device,
) -> Call:
    """Inputs: q, k, v, the scopes' table. Results: out, and lse if `return_lse`."""
    readings, copied = tuple([_reading(x, device) for x in (q, k, v)]), arrays.copied(table)
    # As keys of a cache 0.0 and -0.0 were the same, but the kernels take another number for each.
    scale = scale or math.copysign(5e-324, scale)
    return _attention(lengths, bucket_size, scale, q.shape, q.dtype, table.shape, device, readings, copied, return_lse)


@clouds.remembered
def _attention(
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,  # never 0, so equal scales have equal bits
    q: tuple[int, ...],
    dtype: np.dtype,
    table: tuple[int, ...],
    device: Device,
    readings: tuple[Any, ...],
    copied: arrays.Strided | None,
    return_lse: bool,
) -> Call:
    batch, largest = layout_of(lengths, bucket_size)
    shape = shape_of(len(lengths), largest, bucket_size, q, dtype, table, device)
    numbers = {"clouds": batch, "scale_log2": _scale_log2(scale, dtype)}
    return Call(_forward_plan(shape, readings, copied, return_lse), numbers)


@functools.lru_cache(maxsize=512)
def _forward_plan(shape: Shape, readings: tuple[Any, ...], table: arrays.Strided | None, return_lse: bool) -> Plan:
    steps = Steps(inputs=4, results=1 + return_lse)
    if shape.scopes:
        views = [_view(steps, Input(i), reading, shape) for i, reading in enumerate(readings)]
        scopes = arrays.add_copy(steps, Input(3), table)
        batch = clouds.argument(steps, "clouds", shape.clouds, shape.bucket_size)
        results = Result(0), Result(1) if return_lse else None
        _add_forward(steps, shape, views, scopes, batch, Number("scale_log2"), *results)
    return steps.plan()


def attention_backward(
    dout: Given | Spec,
    q: Given | Spec,
    k: Given | Spec,
    v: Given | Spec,
    out: Given | Spec,
    lse: Given | Spec,
    table: Given | Spec,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
    device: Device,
) -> Call:
    """Inputs: dout, q, k, v, out, lse, the scopes' table. Results: dq, dk, dv."""
    batch, largest = layout_of(lengths, bucket_size)
    shape = shape_of(len(lengths), largest, bucket_size, q.shape, q.dtype, table.shape, device)
    readings = tuple([_reading(x, device) for x in (dout, q, k, v, out)])
    plan = _backward_plan(shape, readings, q.shape[0], arrays.copied(lse), arrays.copied(table))
    return Call(plan, {"clouds": batch, "scale_log2": _scale_log2(scale, q.dtype), "scale": scale})


@functools.lru_cache(maxsize=512)
def _backward_plan(
    shape: Shape, readings: tuple[Any, ...], slots: int, lse: arrays.Strided | None, table: arrays.Strided | None
) -> Plan:
    steps = Steps(inputs=7, results=3)
    if shape.scopes:
        views = [_view(steps, Input(i), reading, shape) for i, reading in enumerate(readings)]
        saved, scopes = arrays.add_copy(steps, Input(5), lse), arrays.add_copy(steps, Input(6), table)
        batch = clouds.argument(steps, "clouds", shape.clouds, shape.bucket_size)
        gradients = [_view(steps, Result(i), None, shape) for i in range(3)]
        scales = Number("scale_log2"), Number("scale")
        _add_backward(steps, shape, views, saved, scopes, batch, *scales, gradients, slots)
    return steps.plan()
