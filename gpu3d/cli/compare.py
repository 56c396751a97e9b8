# SPDX-License-Identifier: Apache-2.0
"""Measure how far two clouds lie apart: Chamfer, Hausdorff, F-score, APML, EMD."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import devices, files
from gpu3d.io.files import SCANS

EXAMPLE = "gpu3d compare prediction.ply target.ply --thresholds 0.01 0.02 --json"
NOTES = (
    "Of two folders, files of the same path below them are compared, whatever their endings. Distances are in the unit "
    "of the files. apml is a sum over the points of B. emd is for clouds of the same number of points, at most 8192."
)
_MOST_EMD = 8192


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("a", metavar="A", type=Path, help=f"{files.FILES}; or a folder of them")
    parser.add_argument("b", metavar="B", type=Path, help="the same, to compare with")
    parser.add_argument(
        "--thresholds",
        metavar="T",
        type=files.positive,
        nargs="+",
        default=[],
        help="distances for precision, recall and F-score, as --thresholds 0.01 0.02",
    )
    files.add_reading(parser)
    devices.add_device(parser)


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    a, b = arguments.a, arguments.b
    if a.is_dir() != b.is_dir():
        stop("give two files, or two folders")
    arguments.inputs = [a]
    root = a if a.is_dir() else None
    work = functools.partial(compare, root=root, b=b, thresholds=arguments.thresholds, columns=arguments.columns)
    return files.over_files(arguments, stop, work)


def compare(
    path: Path,
    target: None,
    *,
    root: Path | None,
    b: Path,
    thresholds: list[float],
    columns: int | None,
    gpu: int | None,
) -> dict[str, Any]:
    """Compare a file with `b`, or with its partner in the folder `b`."""
    other = b if root is None else _partner(path, root, b)
    clouds = [files.read(file, columns).points for file in (path, other)]
    finite = [points[np.isfinite(points).all(axis=1)] for points in clouds]
    for file, points in zip((path, other), finite, strict=True):
        if not len(points):
            raise ValueError(f"{file} has no finite points")
    with devices.on(gpu) as place:
        x, y = map(place, finite)
        found = gpu3d.compare_clouds(x, y, thresholds=tuple(thresholds))._asdict()
        distances = {name: devices.fetch(value)[0].tolist() for name, value in found.items()}
        apml, emd, warnings = None, None, []
        try:
            apml = float(devices.fetch(gpu3d.apml(x, y)))
        except ValueError as error:
            warnings.append(f"no apml: {error}")
        if len(x) == len(y) <= _MOST_EMD:
            emd = float(devices.fetch(gpu3d.emd(*finite)))
    if not _overlap(*finite):
        warnings.append(f"its box does not overlap that of {other}: are both in one frame and unit?")
    return {
        "other": str(other),
        "points": len(finite[0]),
        "other_points": len(finite[1]),
        "dropped": len(clouds[0]) - len(finite[0]),
        "other_dropped": len(clouds[1]) - len(finite[1]),
        "thresholds": thresholds,
        **distances,
        "apml": apml,
        "emd": emd,
        "warnings": warnings,
    }


def _partner(path: Path, root: Path, b: Path) -> Path:
    """The file of `b` with the same path below it, or else the only one with another ending."""
    place = b / path.relative_to(root)
    if place.exists():
        return place
    own = next(ending for ending in SCANS if path.name.lower().endswith(ending))  # as all that a folder stands for
    stem = path.name[: len(path.name) - len(own)]
    found = [file for file in (place.with_name(stem + ending) for ending in SCANS) if file.exists()]
    if len(found) != 1:
        many = f"are {len(found)} files" if found else "is no file"
        raise ValueError(f"there {many} {stem} to compare with in {place.parent}")
    return found[0]


def _overlap(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the boxes of two clouds meet."""
    return bool(((x.min(axis=0) <= y.max(axis=0)) & (y.min(axis=0) <= x.max(axis=0))).all())
