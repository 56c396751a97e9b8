# SPDX-License-Identifier: Apache-2.0
"""Measure how densely the points of clouds lie, by exact neighbours, and write it for every point."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import devices, files
from gpu3d.io import Cloud, write_cloud
from gpu3d.reference.neighbors import MAX_K

EXAMPLE = "gpu3d neighbors scan.laz --radius 0.5 -o density.ply"
NOTES = (
    "The file written is the input with an attribute neighbor_distance, the distance to the K-th other point (NaN "
    "where a coordinate is not finite), or neighbor_count, the number of other points within the radius (-1 there)."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "-k",
        metavar="K",
        type=files.whole(1, MAX_K - 1),
        default=8,
        help="the distance to the K-th other point (default: 8)",
    )
    how.add_argument("--radius", metavar="R", type=files.positive, help="the number of other points within R")
    files.add_outputs(parser, "the file to write, for one input (default: none)", ".ply")
    devices.add_device(parser)


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    work = functools.partial(neighbors, k=arguments.k, radius=arguments.radius, columns=arguments.columns)
    return files.over_files(arguments, stop, work, to=".ply")


def neighbors(
    path: Path, target: Path | None, *, k: int, radius: float | None, columns: int | None, gpu: int | None
) -> dict[str, Any]:
    """Search the neighbours of each point of a file; writes it with what was found."""
    cloud = files.read(path, columns)
    rows = files.finite_rows(cloud)
    with devices.on(gpu) as place:
        points = place(cloud.points[rows])
        if radius is not None:
            found = _counts(points, radius)
        elif len(rows) > k:
            found = devices.fetch(gpu3d.knn(points, points, k + 1).distances[:, k])  # the first is the point itself
        else:
            found = np.full(len(rows), np.inf, cloud.points.dtype)
    name = "neighbor_distance" if radius is None else "neighbor_count"
    if target is not None:
        values = np.full(len(cloud), np.nan if radius is None else -1, found.dtype)
        values[rows] = found
        write_cloud(target, Cloud(cloud.points, {**cloud.attributes, name: values}, cloud.meta))
    return {
        "points": len(cloud),
        "dropped": len(cloud) - len(rows),
        **({"k": k} if radius is None else {"radius": radius}),
        **{name: float(value) for name, value in zip(_FIELDS, _summary(found), strict=True)},
    }


def _counts(points: Any, radius: float) -> np.ndarray:
    """How many other points lie within the radius of each point."""
    index, counts = gpu3d.neighbor_index(points), []
    for begin in range(0, len(points), _QUERIES):
        found = gpu3d.radius_search(points[begin : begin + _QUERIES], index, radius)
        assert isinstance(found, gpu3d.RadiusNeighbors)  # Neighbors come with max_neighbors
        counts.append(np.diff(devices.fetch(found.offsets)) - 1)  # a point finds itself
    return np.concatenate(counts).astype(np.int32)


_QUERIES = 1024  # at once, so that the pairs of a large radius fit into memory
_FIELDS = "mean", "min", "median", "percentile_95", "max"


def _summary(values: np.ndarray) -> list[float]:
    """The values of _FIELDS; NaN where no point has as many others as were asked for."""
    finite = values[np.isfinite(values)]
    return [finite.mean(), *np.percentile(finite, (0, 50, 95, 100))] if len(finite) else [np.nan] * len(_FIELDS)
