# SPDX-License-Identifier: Apache-2.0
"""Bucket attention in NumPy: one scope at a time, all its heads at once, a block of query rows at a time.

Flash3D, section 4.2 (Bucket-and-Swin attention). The functions compute in float64 if q is float64, and in float32
otherwise; with float64 arrays they are the oracle of the tests. They read only slots that hold a point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

SCORES = 2**24  # scores in memory at once; a scope may be a whole cloud


def filled_slots(bucket_size: int, bucket_offsets: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """Number of slots of each bucket that hold a point, int64 [num_buckets]; only a cloud's last bucket has padding."""
    filled = np.full(bucket_offsets[-1], bucket_size, np.int64)
    for n, begin, end in zip(lengths, bucket_offsets[:-1], bucket_offsets[1:], strict=True):
        if n:
            filled[end - 1] = n - (end - begin - 1) * bucket_size
    return filled


def scope_slots(
    table: np.ndarray, bucket_size: int, bucket_offsets: Sequence[int], lengths: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yield, for each scope, the slots int64 [n] that hold a point, in the order of the scope's buckets."""
    filled = filled_slots(bucket_size, bucket_offsets, lengths)
    slot = np.arange(bucket_size)
    for row in table:
        members = row[row >= 0].astype(np.int64)
        yield (members[:, None] * bucket_size + slot)[slot < filled[members, None]]


def _blocks(heads: int, n: int) -> Iterator[slice]:
    """Split the query rows of a scope of n points into slices of at most SCORES scores each."""
    step = max(1, SCORES // max(1, heads * n))
    return (slice(row, row + step) for row in range(0, n, step))


def _by_head(x: np.ndarray, slots: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The rows of a scope as [H, n, ...], in `dtype`."""
    return x[slots].astype(dtype, order="C").swapaxes(0, 1)


def _computing_dtype(q: np.ndarray) -> np.dtype:
    return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)


def bucket_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    table: np.ndarray,
    bucket_size: int,
    bucket_offsets: Sequence[int],
    lengths: Sequence[int],
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention inside each scope: `out` [num_slots, H, D] in q's dtype, and `lse` [num_slots, H]."""
    dtype = _computing_dtype(q)
    out = np.zeros(q.shape, q.dtype)
    lse = np.full(q.shape[:2], -np.inf, dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller's rows may hold NaN and inf
        for slots in scope_slots(table, bucket_size, bucket_offsets, lengths):
            queries, keys, values = (_by_head(x, slots, dtype) for x in (q, k, v))
            for rows in _blocks(q.shape[1], len(slots)):
                scores = queries[:, rows] @ keys.swapaxes(1, 2)
                scores *= scale
                largest = scores.max(axis=2, keepdims=True)
                weights = np.exp(scores - largest)
                total = weights.sum(axis=2, keepdims=True)
                out[slots[rows]] = (weights @ values / total).swapaxes(0, 1)
                lse[slots[rows]] = (largest + np.log(total))[:, :, 0].T
    return out, lse


def bucket_attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    table: np.ndarray,
    bucket_size: int,
    bucket_offsets: Sequence[int],
    lengths: Sequence[int],
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients `dq`, `dk`, `dv` [num_slots, H, D] in q's dtype. `out` and `lse` come from the forward pass."""
    dtype = _computing_dtype(q)
    dq, dk, dv = (np.zeros(q.shape, q.dtype) for _ in range(3))
    with np.errstate(over="ignore", invalid="ignore"):
        for slots in scope_slots(table, bucket_size, bucket_offsets, lengths):
            queries, keys, values, douts, outs = (_by_head(x, slots, dtype) for x in (q, k, v, dout, out))
            delta = (douts * outs).sum(axis=2, keepdims=True)  # the sum over keys of weight * dweight
            log_total = _by_head(lse, slots, dtype)[:, :, None]
            dkeys, dvalues = np.zeros_like(keys), np.zeros_like(values)
            for rows in _blocks(q.shape[1], len(slots)):
                scores = queries[:, rows] @ keys.swapaxes(1, 2)
                scores *= scale
                weights = np.exp(scores - log_total[:, rows])
                dvalues += weights.swapaxes(1, 2) @ douts[:, rows]
                dscores = weights * (douts[:, rows] @ values.swapaxes(1, 2) - delta[:, rows])
                dscores *= scale  # now the gradient of the products q k, before `scale`
                dkeys += dscores.swapaxes(1, 2) @ queries[:, rows]
                dq[slots[rows]] = (dscores @ keys).swapaxes(0, 1)
            dk[slots], dv[slots] = dkeys.swapaxes(0, 1), dvalues.swapaxes(0, 1)
    return dq, dk, dv
