# SPDX-License-Identifier: Apache-2.0
"""Bucket attention: each point attends to the points of its scope, a list of buckets that may lie anywhere in memory.

Forward and backward run on tensor cores. A shifted or strided window is only another list of bucket numbers: no row
moves.
"""

from __future__ import annotations

import math
from typing import Any

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, FLOAT64, FLOAT_DTYPES, INT32, Given, Spec
from gpu3d.buckets import Buckets, Scopes, bucket_offsets, check_buckets, counts_of
from gpu3d.cuda import attention as cuda
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call
from gpu3d.reference import attention as reference


def bucket_attention(
    q: Any, k: Any, v: Any, buckets: Buckets, scopes: Scopes, *, scale: float | None = None, return_lse: bool = False
) -> Any:
    """Softmax attention within scopes: ``softmax(scale * q k^T) v`` over the points of a scope's buckets, per head.

    Parameters
    ----------
    q, k, v : array [num_slots, H, D]
        Queries, keys and values in slot order (`Buckets.scatter`): float16, bfloat16 or float32; on the CPU also
        float64. D is a multiple of 8, at most 128. Any strides: the three parts of a packed projection
        [num_slots, 3, H, D] are read in place. Rows of padding slots may hold anything, even NaN.
    buckets : Buckets
        The layout of the slots.
    scopes : Scopes
        Which buckets attend to each other. Made by `scopes` for this layout.
    scale : float, optional
        The factor of the scores. Default: 1 / sqrt(D).
    return_lse : bool
        Also return lse, which the backward needs.

    Returns
    -------
    out : array [num_slots, H, D]
        An array of q's library and dtype. Padding slots hold 0. Sums are accumulated in float32 (float64 for float64).
    lse : array float32 [num_slots, H]
        Only with return_lse. The natural logarithm of each row's sum of exponentials, -inf in padding slots. It is
        float64 for float64.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    A call never waits for the GPU. After a first call it can be captured in a CUDA graph. The same call gives the same
    bits. Only the results are allocated, and copies of q, k and v where their rows do not begin at multiples of 16
    bytes. A NaN in q makes that point's row NaN; a NaN in k or v makes every row of its scope NaN.

    On a GPU, each float32 operand is split into three bfloat16 planes. Their products lose less than 2**-23 of |q| |k|,
    which is float32 accuracy, and take six times the products of bfloat16. With D over 64 this needs up to 159 KB of
    shared memory a block. sm_80, sm_90 and sm_100 have that; sm_86, sm_89 and sm_120 do not, and raise an error.

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
    check_layout(buckets, scopes)
    if (interop := _arrays.interop_of(q, k, v, layout=scopes.table)) is not None:
        return interop.bucket_attention(q, k, v, buckets, scopes, scale=scale, return_lse=return_lse)
    q, k, v = _arrays.read(q, "q"), _arrays.read(k, "k"), _arrays.read(v, "v")
    table = _arrays.read(scopes.table, "scopes")
    scale = check_attention(q, k, v, table, buckets.num_slots, scopes.size, scale)
    lengths = buckets.lengths if q.origin.device is None else counts_of(buckets)
    arrays = attention_arrays(q, k, v, table, lengths, buckets.bucket_size, scale, return_lse)
    return tuple(arrays) if return_lse else arrays[0]


def check_attention(
    q: Given | Spec, k: Given | Spec, v: Given | Spec, table: Given | Spec, slots: int, size: int | None, scale: Any
) -> float:
    """Check the arrays of `bucket_attention` and return its scale. `check_layout` checks buckets and scopes.

    `slots` are those of the layout. `size` is that of the scopes; None if only their table is known.
    """
    _check_rows(slots, q, k, v)
    _check_table(table, size)
    return check_scale(scale, q.shape[2])


def attention_results(q: Given | Spec) -> tuple[Spec, Spec]:
    """The specs of out and lse; sizes may be symbols."""
    return Spec(q.shape, q.dtype), Spec(q.shape[:2], _lse_dtype(q))


def attention_arrays(
    q: Given,
    k: Given,
    v: Given,
    table: Given,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
    return_lse: bool,
) -> list[Any]:
    """The arrays out, and lse if it is asked for, of q's library."""
    origin = q.origin
    if origin.device is None:
        _check_devices(table, q=q, k=k, v=v)
        layout = bucket_size, bucket_offsets(lengths, bucket_size), lengths
        both = reference.bucket_attention(q.array, k.array, v.array, table.array, *layout, scale)
        return [_arrays.leave(x, origin) for x in both[: 1 + return_lse]]
    call, results = attention_call(q, k, v, table, lengths, bucket_size, scale, return_lse)
    return launcher.launch(call, (q, k, v, table), results, origin)


def attention_call(
    q: Given,
    k: Given,
    v: Given,
    table: Given,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
    return_lse: bool,
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `attention_arrays`, and the specs of its results."""
    if not q.origin is k.origin is v.origin is table.origin:
        _check_devices(table, q=q, k=k, v=v)
    device = launcher.device(q.origin.device)
    call = cuda.attention(q, k, v, table, lengths, bucket_size, scale, return_lse, device)
    return call, attention_results(q) if return_lse else (_arrays.kept_spec(q.shape, q.dtype),)


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
        The gradient of a loss with respect to out, of q's dtype. Rows of padding slots may hold anything.
    q, k, v : array [num_slots, H, D]
        As given to the forward.
    out, lse : array [num_slots, H, D], array float32 [num_slots, H]
        What the forward returned.
    buckets, scopes, scale
        As given to the forward.

    Returns
    -------
    dq, dk, dv : array [num_slots, H, D]
        Arrays of q's library and dtype. Padding slots hold 0.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    The same call gives the same bits: one warp sums each row of the three gradients, in a fixed order and without
    atomics. A call never waits for the GPU, and can be captured in a CUDA graph after a first call. Besides the results
    it allocates num_slots * H floats. The gradients themselves have no gradient: a tensor that requires grad, and a JAX
    tracer, is a TypeError here. `gpu3d.interop` differentiates the forward.

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
    _arrays.refuse_gradients("bucket_attention_backward", dout=dout, q=q, k=k, v=v, out=out, lse=lse)
    check_layout(buckets, scopes)
    given = (
        _arrays.read(dout, "dout"),
        _arrays.read(q, "q"),
        _arrays.read(k, "k"),
        _arrays.read(v, "v"),
        _arrays.read(out, "out"),
        _arrays.read(lse, "lse"),
        _arrays.read(scopes.table, "scopes"),
    )
    scale = check_attention_backward(*given, buckets.num_slots, scopes.size, scale)
    lengths = buckets.lengths if given[0].device is None else counts_of(buckets)
    dq, dk, dv = attention_backward_arrays(*given, lengths, buckets.bucket_size, scale)
    return dq, dk, dv


def check_attention_backward(
    dout: Given | Spec,
    q: Given | Spec,
    k: Given | Spec,
    v: Given | Spec,
    out: Given | Spec,
    lse: Given | Spec,
    table: Given | Spec,
    slots: int,
    size: int | None,
    scale: Any,
) -> float:
    """Check the arrays of `bucket_attention_backward` as `check_attention` does, and return its scale."""
    _check_rows(slots, q, k, v, dout, out)
    if lse.shape != q.shape[:2] or lse.dtype != _lse_dtype(q):
        raise ValueError(
            f"lse must be {_lse_dtype(q)} of shape {list(q.shape[:2])}, as bucket_attention(..., return_lse=True) "
            f"returns it, got {lse.dtype} {list(lse.shape)}."
        )
    _check_table(table, size)
    return check_scale(scale, q.shape[2])


def attention_backward_results(q: Given | Spec) -> tuple[Spec, Spec, Spec]:
    """The specs of dq, dk and dv; sizes may be symbols."""
    gradient = Spec(q.shape, q.dtype)
    return gradient, gradient, gradient


def attention_backward_arrays(
    dout: Given,
    q: Given,
    k: Given,
    v: Given,
    out: Given,
    lse: Given,
    table: Given,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
) -> list[Any]:
    """The arrays dq, dk and dv, of q's library."""
    if q.device is None:
        _check_devices(table, q=q, k=k, v=v, dout=dout, out=out, lse=lse)
        saved = dout.array, q.array, k.array, v.array, out.array, lse.array, table.array
        layout = bucket_size, bucket_offsets(lengths, bucket_size), lengths
        gradients = reference.bucket_attention_backward(*saved, *layout, scale)
        return [_arrays.leave(x, q.origin) for x in gradients]
    given = dout, q, k, v, out, lse, table
    call, results = attention_backward_call(*given, lengths, bucket_size, scale)
    return launcher.launch(call, given, results, q.origin)


def attention_backward_call(
    dout: Given,
    q: Given,
    k: Given,
    v: Given,
    out: Given,
    lse: Given,
    table: Given,
    lengths: tuple[int, ...],
    bucket_size: int,
    scale: float,
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `attention_backward_arrays`, and the specs of its results."""
    _check_devices(table, q=q, k=k, v=v, dout=dout, out=out, lse=lse)
    given = dout, q, k, v, out, lse, table
    device = launcher.device(q.origin.device)
    return cuda.attention_backward(*given, lengths, bucket_size, scale, device), attention_backward_results(q)


# ---- checks --------------------------------------------------------------------------------------------------------


def check_layout(buckets: Any, scopes: Any) -> None:
    """Raise an error unless the arguments are Buckets, and Scopes made for them."""
    check_buckets(buckets)
    if not isinstance(scopes, Scopes):
        raise TypeError(f"scopes must be the Scopes that gpu3d.scopes returns, got {type(scopes).__name__}.")
    if (scopes.bucket_size, scopes.bucket_offsets) != (buckets.bucket_size, buckets.bucket_offsets):
        raise ValueError(
            f"scopes were made for another layout: {scopes.bucket_offsets[-1]} buckets of {scopes.bucket_size} slots, "
            f"offsets {_brief(scopes.bucket_offsets)}; buckets has {buckets.num_buckets} of {buckets.bucket_size}, "
            f"offsets {_brief(buckets.bucket_offsets)}. Make them by gpu3d.scopes(buckets)."
        )


def _brief(offsets: tuple[int, ...]) -> str:
    return str(list(offsets)) if len(offsets) <= 6 else f"[{', '.join(map(str, offsets[:5]))}, ...]"


def check_scale(scale: Any, dim: int) -> float:
    """The scale as a finite float; None means 1 / sqrt(dim)."""
    if scale is None:
        return dim**-0.5
    try:
        number = _arrays.check_number(scale, "scale")
    except TypeError:
        raise TypeError(f"scale must be a finite number or None, got {_arrays.shown(scale)}.") from None
    if not math.isfinite(number):
        raise ValueError(f"scale must be a finite number or None, got {number}.")
    return number


def _check_rows(slots: int, q: Given | Spec, *others: Given | Spec) -> None:
    """Check q, and that the others, which are k, v and possibly dout and out, have its shape and dtype."""
    shape, dtype = q.shape, q.dtype
    if len(shape) != 3:
        raise ValueError(f"q must have shape [num_slots, H, D], got {list(shape)}.")
    if dtype not in FLOAT_DTYPES or (dtype == FLOAT64 and _arrays.on_gpu(q)):
        on_gpu = _arrays.on_gpu(q)
        where = " on a GPU" if on_gpu else ""
        also = " or float32" if on_gpu else ", float32 or float64"
        raise TypeError(
            f"q must be float16, bfloat16{also}{where}, got {dtype}: convert q, k and v by .astype('float32')."
        )
    rows, heads, dim = shape
    if rows != slots:
        raise ValueError(
            f"q must have one row for each of the {slots} slots, got shape {list(shape)}: "
            "bring points into slots by buckets.scatter(q)."
        )
    if dim > cuda.HEAD_DIMS[-1] or dim % 8 or dim == 0:
        raise ValueError(
            f"head dimension D must be at most {cuda.HEAD_DIMS[-1]} and divisible by 8, got {dim}: pad with zeros "
            "and give scale, or use more heads."
        )
    if heads == 0:
        raise ValueError(f"q must have at least one head, got shape {list(shape)}.")
    for x in others:
        if x.shape != shape or x.dtype != dtype:
            _refuse(dict(zip(("k", "v", "dout", "out"), others, strict=False)), shape, dtype)


def _refuse(others: dict[str, Given | Spec], shape: tuple[int, ...], dtype: Any) -> None:
    """Raise an error for the first array that has not the shape or the dtype of q."""
    for name, x in others.items():
        if x.shape != shape:
            raise ValueError(f"{name} must have the shape of q, got {list(x.shape)} for {list(shape)}.")
        if x.dtype != dtype:
            raise TypeError(
                f"{name} must have the dtype of q, got {x.dtype} for {dtype}: convert by {name}.astype('{dtype}')."
            )


def _check_table(table: Given | Spec, size: int | None) -> None:
    """Check the table, because a Scopes that was put together by hand may hold anything."""
    if table.dtype != INT32 or len(table.shape) != 2 or table.shape[1] != (table.shape[1] if size is None else size):
        raise ValueError(
            f"scopes.table must be int32 of shape [num_scopes, {'size' if size is None else size}], got {table.dtype} "
            f"{list(table.shape)}: make it by gpu3d.scopes(buckets, table=...)."
        )


def _lse_dtype(q: Given | Spec) -> Any:
    return FLOAT64 if q.dtype == FLOAT64 else FLOAT32


def _check_devices(table: Given, **named: Given) -> None:
    device = table.origin.device
    for x in named.values():
        if x.origin.device != device:
            _arrays.check_same_device(**{name: x.origin for name, x in named.items()}, scopes=table.origin)
