# SPDX-License-Identifier: Apache-2.0
"""Convert a batch of clouds from and to the formats of Pointcept, PyG, FlashAttention and PyTorch3D.

gpu3d packs the points of all clouds one behind the other and keeps the lengths as host integers. So every shape is
known without asking the GPU. If another library has the lengths on a GPU, these functions copy them to the host once,
which synchronizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu3d import _arrays


def lengths_from_offset(offset: Any) -> tuple[int, ...]:
    """Lengths from Pointcept's `offset`: the running sum of the lengths, without a leading 0.

    Parameters
    ----------
    offset : array int [B] or sequence of int
        Where each cloud ends. An array of any library; one on a GPU synchronizes.

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
        The result is an array of the same library, on the same device. Default: a NumPy array.

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
    """Lengths from PyG's `batch`: for each point the number of its cloud, sorted.

    Parameters
    ----------
    batch : array int [N] or sequence of int
        An array of any library; one on a GPU synchronizes.
    clouds : int, optional
        The number of clouds (PyG's batch_size). Default: the last number plus one, so the last cloud is not empty.

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
            f"batch must be sorted, because the points of a cloud lie together, got {numbers[first]} before "
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
        The result is an array of the same library, on the same device. Default: a NumPy array.

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
    """Lengths from FlashAttention's `cu_seqlens`: the running sum of the lengths, with a leading 0.

    Parameters
    ----------
    cu_seqlens : array int [B + 1] or sequence of int
        Where each cloud begins, and where the last one ends. An array of any library; one on a GPU synchronizes.

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
        Points of each cloud. Their sum must be below 2**31.
    like : array, optional
        The result is an array of the same library, on the same device. Default: a NumPy array.

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
    """Pack PyTorch3D's padded points: the clouds one behind the other, without padding.

    Parameters
    ----------
    padded : array [B, n, ...]
        An array of any library; in torch and JAX it is differentiable. Of each cloud only the first rows are kept, as
        many as its length says.
    lengths : array int [B] or sequence of int
        Points of each cloud, at most n. An array of any library; one on a GPU synchronizes.

    Returns
    -------
    packed : array [N, ...]
        The same kind of array as `padded`.
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
    """Pad packed points as PyTorch3D does; the inverse of `pack`.

    Parameters
    ----------
    packed : array [N, ...]
        An array of any library; in torch and JAX it is differentiable.
    lengths : sequence of int
        Points of each cloud.
    fill : scalar
        The value of padding rows.

    Returns
    -------
    array [B, n, ...]
        The same kind of array as `packed`. n is the largest length.
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
        if xp.__name__ == "torch":  # torch's pad takes the last dimension first
            clouds.append(xp.nn.functional.pad(cloud, (0, 0) * others + (0, most - n), value=fill))
        else:
            clouds.append(xp.pad(cloud, [(0, most - n)] + [(0, 0)] * others, constant_values=fill))
    return xp.stack(clouds)


def collate(samples: Sequence[Any]) -> Any:
    """Pack clouds of different sizes into one batch of tensors and their lengths; a DataLoader's ``collate_fn``.

    Parameters
    ----------
    samples : sequence
        One sample for each cloud, all of one kind: an array [n, ...]; a tuple of arrays (points and attributes) with
        one row for each of the n points; or a dict of such arrays. Arrays are torch tensors or NumPy arrays. Tuples and
        dicts may also hold other values, such as a file's name. These come back as a list with one entry per cloud.

    Returns
    -------
    tuple or dict
        ``(packed, lengths)`` for arrays, ``(*packed, lengths)`` for tuples, and for dicts a dict with the same keys and
        ``lengths``. Packed arrays are tensors [N, ...]; lengths are a tuple of int.

    Raises
    ------
    TypeError, ValueError
        The samples differ in kind or keys, or an array does not have one row for each point.

    Notes
    -----
    With ``pin_memory=True`` torch copies the tensors into page-locked memory and turns the tuple of lengths into a
    list. gpu3d accepts both.

    Examples
    --------
    >>> import torch
    >>> clouds = [(torch.rand(n, 3), torch.arange(n)) for n in (5, 3)]
    >>> loader = torch.utils.data.DataLoader(clouds, batch_size=2, collate_fn=gpu3d.interop.collate)
    >>> points, labels, lengths = next(iter(loader))
    >>> points.shape, labels.tolist(), lengths
    (torch.Size([8, 3]), [0, 1, 2, 3, 4, 0, 1, 2], (5, 3))
    """
    if not samples:
        raise ValueError("samples must hold at least one cloud, got none.")
    kinds = {dict if isinstance(x, dict) else tuple if isinstance(x, (tuple, list)) else object for x in samples}
    if len(kinds) > 1:
        names = " and ".join(sorted({type(x).__name__ for x in samples}))
        raise TypeError(f"samples must all be arrays, all tuples or all dicts, got {names}.")
    if kinds == {dict}:
        keys = list(samples[0])
        if "lengths" in keys or any(set(sample) != set(keys) for sample in samples):
            raise ValueError(f"samples must have the same keys, and none named 'lengths', got {keys} in the first.")
        columns = {key: [sample[key] for sample in samples] for key in keys}
    elif kinds == {tuple}:
        if len({len(sample) for sample in samples}) > 1:
            raise ValueError(f"samples must be tuples of one size, got {sorted({len(sample) for sample in samples})}.")
        columns = {f"part {i}": list(parts) for i, parts in enumerate(zip(*samples, strict=True))}
    else:
        columns = {"cloud": list(samples)}
    packed, lengths = _packed(columns)
    if kinds == {dict}:
        return {**packed, "lengths": lengths}
    return *packed.values(), lengths


def _packed(columns: dict[str, list[Any]]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Each column of arrays as one tensor, and the lengths: all columns must have the same number of rows per cloud."""
    import torch

    lengths: tuple[int, ...] | None = None
    first, packed = "", dict[str, Any]()
    for name, values in columns.items():
        if not all(isinstance(x, (torch.Tensor, np.ndarray)) and x.ndim for x in values):
            packed[name] = values
            continue
        rows = tuple([len(x) for x in values])
        if lengths is None:
            first, lengths = name, rows
        elif rows != lengths:
            b = next(b for b, (n, m) in enumerate(zip(rows, lengths, strict=True)) if n != m)
            raise ValueError(
                f"every array of a sample must have a row for each point, got {rows[b]} rows in {name!r} of sample "
                f"{b} and {lengths[b]} in {first!r}. What belongs to the cloud as a whole may be a number or a list."
            )
        packed[name] = torch.cat([torch.as_tensor(x) for x in values])
    if lengths is None:
        kinds = ", ".join(f"{name!r}: {type(values[0]).__name__}" for name, values in columns.items())
        raise TypeError(f"samples must hold tensors or NumPy arrays [n, ...], got {kinds}.")
    return packed, lengths


# ---- shared --------------------------------------------------------------------------------------------------------


def _integers(x: Any, name: str) -> np.ndarray:
    """A sequence, or an array of any library, as host integers int64 [n]."""
    if isinstance(x, (list, tuple)):
        native = np.array(x, None if len(x) else np.int64)
    else:
        native = _arrays.download(_arrays.read(x, name))
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
    """The host array as an array of the library and on the device of `like`."""
    if like is None:
        return array
    return _arrays.upload(array, _arrays.read(like, "like").origin)


def _library(x: Any, name: str) -> tuple[Any, Any]:
    """The array module for x, and x: unchanged if it is a tensor or a JAX array, so that gradients pass."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch, x
    if jax is not None and isinstance(x, jax.Array):
        return jax.numpy, x
    given = _arrays.read(x, name)
    return (np if given.device is None else sys.modules["cupy"]), given.array
