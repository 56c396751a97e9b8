# SPDX-License-Identifier: Apache-2.0
"""Draw clouds from above, as PNG files."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import gpu3d
from gpu3d.cli import files
from gpu3d.plot import plot_buckets, plot_points

EXAMPLE = "gpu3d view scan.laz --color intensity -o scan.png"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser)
    parser.add_argument(
        "--color",
        metavar="WHAT",
        default="height",
        help="height, bucket, or an attribute of the file, as --color label (default: height)",
    )
    files.add_outputs(parser, "the picture, for one input (default: ./gpu3d-view-INPUT.png)", ".png")


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    work = functools.partial(view, color=arguments.color, columns=arguments.columns)
    return files.over_files(arguments, stop, work, writes=(".png",), to=".png", default="gpu3d-view-{stem}.png")


def view(path: Path, target: Path, *, color: str, columns: int | None) -> dict[str, Any]:
    """Draw a file."""
    cloud = files.read(path, columns)
    rows = files.finite_rows(cloud)
    points, title = cloud.points[rows], files.label_of(path)
    if color in cloud.attributes:
        plot_points(points, target, color=cloud.attributes[color][rows], title=title)
    elif color == "height":
        plot_points(points, target, title=title)
    elif color == "bucket":
        plot_buckets(points, gpu3d.bucketize(points, check_finite=False), target, title=title)
    else:
        raise ValueError(f"it has no attribute {color}: it has {', '.join(cloud.attributes) or 'none'}")
    return {"points": len(cloud), "dropped": len(cloud) - len(rows)}
