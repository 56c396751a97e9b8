# SPDX-License-Identifier: Apache-2.0
"""In-bucket pooling in NumPy. Groups are made one tile at a time; reductions add one member to all groups at a time.

Flash3D, sections 4.2 and 9.4 (In-bucket Pooling). Sums are taken in the order of the members, in float64 if the array
is float64 and in float32 otherwise. Every operation is rounded once. Padding slots are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu3d.reference.buckets import morton, voxelize

TILE = 1024  # slots; tiles are counted from a cloud's first slot, and no group crosses from one to the next
VOXELS = 1024  # along each axis of a tile
RATIOS = (2, 4, 8)  # each divides TILE, so only a cloud's last group may be short
REDUCTIONS = ("sum", "mean", "min", "max")
EXTREMES = ("min", "max")


def group(points: np.ndarray, bucket_size: int, lengths: Sequence[int], ratio: int) -> np.ndarray:
    """The members of each child, int32 [child slots, ratio]: slots of the parent, -1 where there is none."""

    def slots(n: int) -> int:
        return -(-n // bucket_size) * bucket_size

    children = sum(slots(-(-n // ratio)) for n in lengths)
    members = np.full(children * ratio, -1, np.int32)
    slot = child = 0
    for n in lengths:
        for tile in range(0, n, TILE):
            first, end = slot + tile, slot + min(tile + TILE, n)
            order = np.argsort(morton(voxelize(points[first:end], count=VOXELS)), kind="stable")
            members[child * ratio + tile :][: end - first] = first + order
        slot, child = slot + slots(n), child + slots(-(-n // ratio))
    return members.reshape(children, ratio)


def bucket_pool(
    features: np.ndarray, points: np.ndarray, bucket_size: int, lengths: Sequence[int], ratio: int, reduce: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]:
    """The children: features, points, members, argmember (min and max), slot_to_point, point_to_slot, moved."""
    members = group(points, bucket_size, lengths, ratio)
    filled = members[:, 0] >= 0
    groups = members[filled]
    child_features, child_points = (np.zeros((len(members), x.shape[1]), x.dtype) for x in (features, points))
    argmember = None
    with np.errstate(over="ignore", invalid="ignore"):  # the caller's rows may hold NaN and inf
        child_points[filled] = _sums(points, groups) / _counts(groups, points.dtype)
        if reduce in EXTREMES:
            argmember = np.zeros(child_features.shape, np.uint8)
            child_features[filled], argmember[filled] = _extremes(features, groups, reduce)
        elif reduce == "mean":
            child_features[filled] = _sums(features, groups) / _counts(groups, features.dtype)
        else:
            child_features[filled] = _sums(features, groups)
    point_to_slot = np.flatnonzero(filled).astype(np.int32)
    slot_to_point = np.full(len(members), -1, np.int32)
    slot_to_point[point_to_slot] = np.arange(len(point_to_slot), dtype=np.int32)
    return child_features, child_points, members, argmember, slot_to_point, point_to_slot, np.zeros((), np.int32)


def bucket_pool_backward(
    dchild: np.ndarray, members: np.ndarray, argmember: np.ndarray | None, num_slots: int, reduce: str
) -> np.ndarray:
    """The gradient [num_slots, C] of the parent's features."""
    dfeatures = np.zeros((num_slots, dchild.shape[1]), dchild.dtype)
    child, member = np.nonzero(members >= 0)
    rows = dchild[child]
    with np.errstate(over="ignore", invalid="ignore"):
        if argmember is not None:
            rows[argmember[child] != member[:, None]] = 0
        elif reduce == "mean":
            rows = rows.astype(_computing_dtype(rows.dtype)) / _counts(members, rows.dtype)[child]
        dfeatures[members[child, member]] = rows
    return dfeatures


def bucket_unpool(child: np.ndarray, members: np.ndarray, skip: np.ndarray | None, num_slots: int) -> np.ndarray:
    """Copy each child's row to the slots of its members, [num_slots, C], and add `skip`."""
    out = np.zeros((num_slots, child.shape[1]), child.dtype)
    valid = members >= 0
    slots, rows = members[valid], child[np.nonzero(valid)[0]]
    with np.errstate(over="ignore", invalid="ignore"):
        if skip is not None:
            dtype = _computing_dtype(child.dtype)
            rows = rows.astype(dtype) + skip[slots].astype(dtype)
        out[slots] = rows
    return out


def bucket_unpool_backward(dout: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of the child's rows and of `skip`."""
    dchild = np.zeros((len(members), dout.shape[1]), dout.dtype)
    filled = members[:, 0] >= 0
    with np.errstate(over="ignore", invalid="ignore"):
        dchild[filled] = _sums(dout, members[filled])
    dskip = np.zeros(dout.shape, dout.dtype)
    slots = members[members >= 0]
    dskip[slots] = dout[slots]
    return dchild, dskip


# ---- reductions ----------------------------------------------------------------------------------------------------


def _computing_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _counts(groups: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Number of members of each group [n, 1], in the dtype in which means are computed."""
    return (groups >= 0).sum(axis=1, keepdims=True).astype(_computing_dtype(dtype))


def _sums(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sums [n, C] of the members' rows, added from the first member to the last."""
    dtype = _computing_dtype(x.dtype)
    total = x[groups[:, 0]].astype(dtype)
    for slots in groups.T[1:]:
        np.add(total, x[slots].astype(dtype), out=total, where=(slots >= 0)[:, None])
    return total


def _extremes(x: np.ndarray, groups: np.ndarray, reduce: str) -> tuple[np.ndarray, np.ndarray]:
    """Minimum or maximum [n, C], and uint8 [n, C] the first member that has it. A NaN wins over every number."""
    dtype = _computing_dtype(x.dtype)
    holds = np.less_equal if reduce == "min" else np.greater_equal
    best = x[groups[:, 0]].astype(dtype)
    first = np.zeros(best.shape, np.uint8)
    for member, slots in enumerate(groups.T[1:], start=1):
        rows = x[slots].astype(dtype)
        beaten = ~(holds(best, rows) | np.isnan(best)) & (slots >= 0)[:, None]
        best[beaten], first[beaten] = rows[beaten], member
    return best, first
