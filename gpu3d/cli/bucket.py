# SPDX-License-Identifier: Apache-2.0
"""Put clouds into buckets; print how compact these are, and write the bucket of every point."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import devices, files
from gpu3d.io import Cloud, write_cloud

EXAMPLE = "gpu3d bucket scan.bin --bucket-size 256 -o scan.ply"
NOTES = (
    "The file written is the input with an attribute bucket: the number of each point's bucket, -1 where a coordinate "
    "is not finite. `gpu3d view FILE --color bucket` draws it. Radii are in the unit of the scan."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser)
    add_layout(parser)
    files.add_outputs(parser, "the file to write, for one input (default: none)", ".ply")
    devices.add_device(parser)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gpu3d.bucketize`."""
    parser.add_argument(
        "--bucket-size", metavar="N", type=files.bucket_size, default=512, help="slots per bucket (default: 512)"
    )
    parser.add_argument(
        "--hash",
        choices=("xor_mod", "xor_div", "zorder_mod", "zorder_div"),
        default="zorder_div",
        help="how voxels become buckets, as --hash xor_mod (default: zorder_div, the most compact)",
    )
    parser.add_argument(
        "--balance",
        choices=("spill", "probe"),
        default="spill",
        help="where a full bucket's points go, as --balance probe: into the next, or into near ones (default: spill)",
    )


def layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_layout`, for `gpu3d.bucketize`."""
    return {name: getattr(arguments, name) for name in ("bucket_size", "hash", "balance")}


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    work = functools.partial(bucket, options=layout(arguments), columns=arguments.columns)
    return files.over_files(arguments, stop, work, to=".ply")


def bucket(
    path: Path, target: Path | None, *, options: dict[str, Any], columns: int | None, gpu: int | None
) -> dict[str, Any]:
    """Put a file into buckets; writes it with the bucket of every point."""
    cloud = files.read(path, columns)
    rows = files.finite_rows(cloud)
    with devices.on(gpu) as place:
        points = place(cloud.points[rows])
        buckets = gpu3d.bucketize(points, check_finite=False, **options)
        slots = devices.fetch(buckets.point_to_slot)
        quality = gpu3d.bucket_quality(points, buckets)
    if target is not None:
        numbers = np.full(len(cloud), -1, np.int32)
        numbers[rows] = slots // buckets.bucket_size
        write_cloud(target, Cloud(cloud.points, {**cloud.attributes, "bucket": numbers}, cloud.meta))
    return {
        "points": len(cloud),
        "dropped": len(cloud) - len(rows),
        "buckets": buckets.num_buckets,
        "bucket_size": buckets.bucket_size,
        "full": len(rows) // buckets.bucket_size,  # only the last bucket has padding
        **quality._asdict(),
    }
