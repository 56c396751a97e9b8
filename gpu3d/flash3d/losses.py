# SPDX-License-Identifier: Apache-2.0
"""The labels of a segmentation loss. The loss itself is `gpu3d.reference.flash3d.segmentation_loss`."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import Given


def check_device_labels(labels: Any, count: int) -> Given:
    """The labels of points on a GPU, uint8 or int32. Their values are not read: what is no class does not count."""
    given = _arrays.read(labels, "labels")
    if given.dtype not in (_arrays.UINT8, _arrays.INT32):
        raise TypeError(f"labels on a GPU must be uint8 or int32, got {given.dtype}: convert by .astype('int32').")
    if given.shape != (count,) or given.strides is not None:
        raise ValueError(
            f"labels must be contiguous, one for each of the {count} points, got shape {list(given.shape)}."
        )
    return given


def check_labels(labels: Any, points: int, classes: int, ignore: Any) -> np.ndarray:
    """Host labels as int64 [N]. Each must be a class or the integer `ignore`."""
    ignore = _arrays.check_integer(ignore, "ignore")
    given = _arrays.read(labels, "labels")
    if given.device is not None:
        raise TypeError(f"labels must be in host memory, like points and features, got {given.origin}.")
    if given.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {given.dtype}: convert by labels.astype('int64').")
    if given.shape != (points,):
        raise ValueError(
            f"labels must have shape [{points}], one for each point, got {list(given.shape)}: labels.reshape(-1) packs "
            "those of clouds of equal length."
        )
    checked = given.array.astype(np.int64)
    bad = (checked != ignore) & ((checked < 0) | (checked >= classes))
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"labels must be 0..{classes - 1} or ignore={ignore}, got {int(bad.sum())} others, the first "
            f"{given.array[first]} at index {first}: map them to {ignore}, or raise config.classes."
        )
    return checked
