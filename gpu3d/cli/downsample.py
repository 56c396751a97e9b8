# SPDX-License-Identifier: Apache-2.0
"""Write clouds with fewer points: a point for each voxel, for each few neighbours, or the farthest ones."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import devices, files
from gpu3d.io import Cloud, write_cloud

EXAMPLE = "gpu3d downsample scans --voxel 0.1 --out thin --jobs 8 --resume thin.jsonl"
NOTES = (
    "Of the points that become one, floating-point attributes, intensity and colors are averaged; "
    "other attributes, as label and ring, are those of the first. Points that are not finite are dropped."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--voxel", metavar="SIZE", type=files.positive, help="the mean of each cube of this size, as --voxel 0.1"
    )
    how.add_argument("--ratio", type=int, choices=(2, 4, 8), help="the mean of each 2, 4 or 8 neighbours, as --ratio 4")
    how.add_argument(
        "--farthest", metavar="K", type=files.whole(1), help="K points far from each other, as --farthest 4096"
    )
    files.add_outputs(parser, "the file to write, for one input")
    devices.add_device(parser)


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    options = {name: getattr(arguments, name) for name in ("voxel", "ratio", "farthest", "columns")}
    return files.over_files(arguments, stop, functools.partial(downsample, **options), must_write=True)


def downsample(
    path: Path,
    target: Path,
    *,
    voxel: float | None,
    ratio: int | None,
    farthest: int | None,
    columns: int | None,
    gpu: int | None,
) -> dict[str, Any]:
    """Write a file with fewer points; one of `voxel`, `ratio` and `farthest` says which."""
    cloud = files.read(path, columns)
    rows = files.finite_rows(cloud)
    dropped = len(cloud) - len(rows)
    if dropped:
        cloud = _taken(cloud, rows)
    with devices.on(gpu) as place:
        points = place(cloud.points)
        if farthest is not None:
            found = devices.fetch(gpu3d.farthest_points(points, farthest))
            thin = _taken(cloud, found[found >= 0])
        elif voxel is not None:
            thin = _merged(cloud, *_voxels(points, voxel))
        elif ratio is not None:
            thin = _merged(cloud, *_neighbors(points, ratio, place))
    write_cloud(target, thin)
    return {"points": len(cloud) + dropped, "dropped": dropped, "kept": len(thin)}


def _taken(cloud: Cloud, rows: np.ndarray) -> Cloud:
    return Cloud(cloud.points[rows], {name: values[rows] for name, values in cloud.attributes.items()}, cloud.meta)


def _voxels(points: Any, size: float) -> tuple[np.ndarray, np.ndarray]:
    """The new points, and for each old one the new one that it went into."""
    found = gpu3d.voxel_downsample(points, size)
    return devices.fetch(found.points), devices.fetch(found.point_to_voxel)


def _neighbors(points: Any, ratio: int, place: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same for `ratio` neighbours of a bucket."""
    buckets = gpu3d.bucketize(points, check_finite=False)
    nothing = place(np.empty((buckets.num_slots, 0), np.float32))
    pooled = gpu3d.bucket_pool(nothing, buckets.scatter(points), buckets, ratio=ratio)
    members = devices.fetch(pooled.members)
    filled = members[:, 0] >= 0
    members = members[filled]
    groups = np.empty(len(points), np.int64)
    groups[devices.fetch(buckets.slot_to_point)[members[members >= 0]]] = np.nonzero(members >= 0)[0]
    return devices.fetch(pooled.points)[filled], groups


def _merged(cloud: Cloud, points: np.ndarray, groups: np.ndarray) -> Cloud:
    """The new points with attributes: the mean of a group, or that of its point with the lowest index."""
    count = len(points)
    first = np.empty(count, np.int64)
    first[groups[::-1]] = np.arange(len(groups))[::-1]  # the last that is written is the lowest
    sizes = np.bincount(groups, minlength=count)
    merged: dict[str, np.ndarray] = {}
    for name, values in cloud.attributes.items():
        if values.dtype.kind != "f" and name not in ("intensity", "colors"):
            merged[name] = values[first]
            continue
        columns = values.reshape(len(groups), -1).T
        means = np.stack([np.bincount(groups, column, count) / sizes for column in columns], axis=1)
        if name == "normals":
            lengths = np.linalg.norm(means, axis=1, keepdims=True)
            means = np.divide(means, lengths, out=means, where=lengths > 0)
        if values.dtype.kind != "f":
            means = np.rint(means)
        merged[name] = means.reshape(count, *values.shape[1:]).astype(values.dtype)
    return Cloud(points, merged, cloud.meta)
