# SPDX-License-Identifier: Apache-2.0
"""How other libraries hold a batch of clouds, and back: Pointcept, PyG, FlashAttention, PyTorch3D.

gpu3d packs the points of all clouds behind each other and keeps the lengths as host integers, so that every shape is
known without asking the GPU. Lengths that are read from a GPU array are read once, here: that synchronizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d.buckets import _download


def lengths_from_offset(offset: Any) -> tuple[int, ...]:
    """Lengths from Pointcept's `offset`: the running sum of the lengths, without a leading 0.

    Parameters
    ----------
    offset : array int [B] or sequence of int
        Where each cloud ends. Of any library; synchronizes on a GPU.

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> gpu3d.interop.lengths_from_offset(np.array([3, 3, 7]))
    (3, 0, 4)
    """
    return _differences(np.concatenate([[0], _integers(offset, "offset")]), "offset")


def offset_from_lengths(lengths: Sequence[int], like: Any = None) -> Any:
    """Pointcept's `offset` from lengths.

    Parameters
    ----------
    lengths : sequence of int
        Points of each cloud.
    like : array, optional
        The result is of its library and on its device. Default: NumPy.

    Returns
    -------
    array int64 [B]

    Examples
    --------
    >>> gpu3d.interop.offset_from_lengths([3, 0, 4])
    array([3, 3, 7])
    """
    return _as(np.cumsum(_lengths(lengths)), like)


def lengths_from_batch(batch: Any, clouds: int | None = None) -> tuple[int, ...]:
    """Lengths from PyG's `batch`: the number of the cloud of each point, in order.

    Parameters
    ----------
    batch : array int [N] or sequence of int
        Of any library; synchronizes on a GPU.
    clouds : int, optional
        How many clouds there are (PyG's batch_size). Default: one more than the last number, so no empty clouds behind.

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> gpu3d.interop.lengths_from_batch(np.array([0, 0, 0, 2, 2, 2, 2]))
    (3, 0, 4)
    """
    numbers = _integers(batch, "batch")
    drops = np.flatnonzero(np.diff(numbers) < 0)
    if len(drops):
        first = int(drops[0])
        raise ValueError(
            f"batch must be sorted, for the points of a cloud lie together, got {numbers[first]} before "
            f"{numbers[first + 1]} at index {first}. Sort points and batch by the order of batch."
        )
    least = int(numbers[-1]) + 1 if len(numbers) else 0
    if len(numbers) and numbers[0] < 0:
        raise ValueError(f"batch must not be negative, got {numbers[0]} at index 0.")
    clouds = least if clouds is None else _arrays.check_integer(clouds, "clouds")
    if clouds < least:
        raise ValueError(f"clouds must be more than the last number of batch, got {clouds} for {least - 1}.")
    return tuple(np.bincount(numbers, minlength=clouds).tolist())


def batch_from_lengths(lengths: Sequence[int], like: Any = None) -> Any:
    """PyG's `batch` from lengths.

    Parameters
    ----------
    lengths : sequence of int
        Points of each cloud.
    like : array, optional
        The result is of its library and on its device. Default: NumPy.

    Returns
    -------
    array int64 [N]

    Examples
    --------
    >>> gpu3d.interop.batch_from_lengths([3, 0, 4])
    array([0, 0, 0, 2, 2, 2, 2])
    """
    n = _lengths(lengths)
    return _as(np.repeat(np.arange(len(n)), n), like)


def lengths_from_cu_seqlens(cu_seqlens: Any) -> tuple[int, ...]:
    """Lengths from FlashAttention's `cu_seqlens`: the running sum of the lengths, from 0 on.

    Parameters
    ----------
    cu_seqlens : array int [B + 1] or sequence of int
        Where each cloud begins, and where the last ends. Of any library; synchronizes on a GPU.

    Returns
    -------
    tuple of int

    Examples
    --------
    >>> gpu3d.interop.lengths_from_cu_seqlens(np.array([0, 3, 3, 7], np.int32))
    (3, 0, 4)
    """
    ends = _integers(cu_seqlens, "cu_seqlens")
    if not len(ends) or ends[0] != 0:
        raise ValueError(
            f"cu_seqlens must begin with 0, got {ends[:1].tolist()}: without the 0 it is an offset, for "
            "lengths_from_offset."
        )
    return _differences(ends, "cu_seqlens")


def cu_seqlens_from_lengths(lengths: Sequence[int], like: Any = None) -> Any:
    """FlashAttention's `cu_seqlens` from lengths.

    Parameters
    ----------
    lengths : sequence of int
        Points of each cloud; fewer than 2**31 together.
    like : array, optional
        The result is of its library and on its device. Default: NumPy.

    Returns
    -------
    array int32 [B + 1]

    Examples
    --------
    >>> gpu3d.interop.cu_seqlens_from_lengths([3, 0, 4])
    array([0, 3, 3, 7], dtype=int32)
    """
    ends = np.concatenate([[0], np.cumsum(_lengths(lengths))])
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"cu_seqlens is int32: lengths must sum to less than 2**31, got {ends[-1]}.")
    return _as(ends.astype(np.int32), like)


def pack(padded: Any, lengths: Any) -> tuple[Any, tuple[int, ...]]:
    """Points packed behind each other, from PyTorch3D's padded points and lengths.

    Parameters
    ----------
    padded : array [B, n, ...]
        Of any library; with gradients in torch and JAX. Rows from each cloud's length on are left out.
    lengths : array int [B] or sequence of int
        Points of each cloud, at most n. Of any library; an array on a GPU synchronizes.

    Returns
    -------
    packed : array [N, ...]
        Of the kind of `padded`.
    lengths : tuple of int

    Examples
    --------
    >>> padded = np.arange(12).reshape(2, 3, 2)
    >>> packed, lengths = gpu3d.interop.pack(padded, [1, 2])
    >>> packed.tolist(), lengths
    ([[0, 1], [6, 7], [8, 9]], (1, 2))
    >>> gpu3d.interop.pad(packed, lengths, fill=-1).tolist()
    [[[0, 1], [-1, -1]], [[6, 7], [8, 9]]]
    """
    xp, padded = _library(padded, "padded")
    if padded.ndim < 2:
        raise ValueError(f"padded must have shape [B, n, ...], got {list(padded.shape)}.")
    counts = tuple(_lengths(lengths).tolist())
    clouds, room = padded.shape[:2]
    if len(counts) != clouds or max(counts, default=0) > room:
        raise ValueError(
            f"lengths must be one number up to {room} for each of the {clouds} clouds of padded, got "
            f"{len(counts)} numbers up to {max(counts, default=0)}."
        )
    if not counts:
        return padded.reshape((0, *padded.shape[2:])), counts
    return xp.concatenate([cloud[:n] for cloud, n in zip(padded, counts, strict=True)]), counts


def pad(packed: Any, lengths: Sequence[int], fill: float = 0) -> Any:
    """PyTorch3D's padded points from packed ones; the inverse of `pack`.

    Parameters
    ----------
    packed : array [N, ...]
        Of any library; with gradients in torch and JAX.
    lengths : sequence of int
        Points of each cloud.
    fill : scalar
        What rows from each cloud's length on hold.

    Returns
    -------
    array [B, n, ...]
        n is the largest length. Of the kind of `packed`.
    """
    xp, packed = _library(packed, "packed")
    if packed.ndim == 0:
        raise ValueError("packed must have shape [N, ...], got a scalar.")
    counts = _arrays.check_lengths(lengths, packed.shape[0], "packed points")
    if not counts:
        return packed.reshape((0, 0, *packed.shape[1:]))
    most, others = max(counts), packed.ndim - 1
    clouds, end = [], 0
    for n in counts:
        end += n
        cloud = packed[end - n : end]
        if xp.__name__ == "torch":  # whose pad takes the last dimension first
            clouds.append(xp.nn.functional.pad(cloud, (0, 0) * others + (0, most - n), value=fill))
        else:
            clouds.append(xp.pad(cloud, [(0, most - n)] + [(0, 0)] * others, constant_values=fill))
    return xp.stack(clouds)


# ---- shared --------------------------------------------------------------------------------------------------------


def _integers(x: Any, name: str) -> np.ndarray:
    """Host integers int64 [n] of a sequence or of any library's array."""
    native = np.array(x, None if len(x) else np.int64) if isinstance(x, (list, tuple)) else _download(x, name)
    if native.ndim != 1 or native.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of one dimension, got {native.dtype} {list(native.shape)}.")
    return native.astype(np.int64)


def _lengths(lengths: Any) -> np.ndarray:
    n = _integers(lengths, "lengths")
    if (n < 0).any():
        first = int((n < 0).argmax())
        raise ValueError(f"lengths must not be negative, got lengths[{first}] = {n[first]}.")
    return n


def _differences(ends: np.ndarray, name: str) -> tuple[int, ...]:
    lengths = np.diff(ends)
    if (lengths < 0).any():
        first = int((lengths < 0).argmax())
        raise ValueError(
            f"{name} must be a running sum, which does not decrease, got {ends[first]} before {ends[first + 1]}."
        )
    return tuple(lengths.tolist())


def _as(array: np.ndarray, like: Any) -> Any:
    """The host array as one of like's library on like's device."""
    if like is None:
        return array
    _, origin = _arrays.enter(like, "like")
    if origin.device is None:
        return _arrays.leave(array, origin)
    with _arrays.on(origin):
        return _arrays.leave(_arrays.require_cupy("like").asarray(array), origin)


def _library(x: Any, name: str) -> tuple[Any, Any]:
    """The module whose functions take x, and x: itself where it is an array of a library that has gradients."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch, x
    if jax is not None and isinstance(x, jax.Array):
        return jax.numpy, x
    native, origin = _arrays.enter(x, name)
    return (np if origin.device is None else sys.modules["cupy"]), native
