# SPDX-License-Identifier: Apache-2.0
"""Bucket a scan, print time and bucket radius, and draw it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import bucket, devices, files, tables
from gpu3d.io import read_points
from gpu3d.plot import plot_buckets
from gpu3d.reference.buckets import bucket_radii

EXAMPLE = "gpu3d demo scan.bin --bucket-size 256"

SCAN = "pandaset_002_00.npz"
_SCAN_TITLE = "PandaSet 002/00 (Hesai and Scale AI, CC BY 4.0)"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    default = "default: a LiDAR scan that comes with the package"
    parser.add_argument("files", nargs="*", metavar="FILE", type=Path, help=f"{files.FILES} ({default})")
    bucket.add_layout(parser)
    parser.add_argument("-o", "--output", metavar="PNG", type=Path, help="the picture (default: ./gpu3d-demo*.png)")
    devices.add_device(parser)


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    if arguments.output and len(arguments.files) > 1:
        stop("-o names one picture, so it takes one FILE")
    if arguments.output and any(files.is_same_file(arguments.output, path) for path in arguments.files):
        stop(f"-o is {arguments.output} itself, and an input is never overwritten")
    gpu = next(iter(devices.gpus(arguments.device, stop)), None)
    if gpu is None and arguments.device is None:
        print("no GPU: running on NumPy (`gpu3d info` prints what is missing)")
    exit_code = 0
    for path, title, picture in _scans(arguments.files):
        try:
            rows = _demo(path, title, arguments.output or picture, bucket.layout(arguments), gpu)
        except BrokenPipeError:
            raise
        except tables.FAILURES as error:
            tables.print_line(path, tables.text_of(error, path))
            exit_code = 1
        else:
            print()
            tables.print_rows(rows)
    return exit_code


def _scans(paths: list[Path]) -> Iterator[tuple[Path, str, Path]]:
    """Yield (file, title, default picture) for each scan; pictures of equal file names are numbered."""
    if not paths:
        with resources.as_file(resources.files(gpu3d) / "data" / SCAN) as path:
            yield path, _SCAN_TITLE, Path("gpu3d-demo.png")
    taken: dict[str, int] = {}
    for path in paths:
        taken[path.stem] = taken.get(path.stem, 0) + 1
        number = f"-{taken[path.stem]}" if taken[path.stem] > 1 else ""
        yield path, files.label_of(path), Path(f"gpu3d-demo-{path.stem}{number}.png")


def _demo(path: Path, title: str, picture: Path, options: dict[str, Any], gpu: int | None) -> tables.Rows:
    """Put one scan into buckets, draw it, and return the rows of its table."""
    points = read_points(path)
    finite = np.isfinite(points).all(axis=1)
    dropped = len(points) - int(np.count_nonzero(finite))
    if dropped:
        points = points[finite]
    if not len(points):
        raise ValueError(f"the scan has no finite points (dropped {dropped:,})")

    calls = 5 if gpu is None else 30
    with devices.on(gpu) as place:
        on_device = place(points)

        def bucketize() -> gpu3d.Buckets:
            return gpu3d.bucketize(on_device, check_finite=False, **options)

        buckets = bucketize()  # compiles the kernels, so the timed calls do not
        milliseconds = devices.milliseconds(bucketize, gpu, calls)
        radius = gpu3d.bucket_quality(on_device, buckets).mean_radius
        full = len(points) // buckets.bucket_size
        plot_buckets(on_device, buckets, picture, title=title)

    rows = [
        ("scan", title),
        ("points", f"{len(points):,}" + (f" ({dropped:,} non-finite dropped)" if dropped else "")),
        ("buckets", f"{buckets.num_buckets:,} of {buckets.bucket_size:,} slots, {full:,} of them full"),
        ("time", f"{milliseconds:.3f} ms a call (median of {calls})"),
    ]
    if full:
        shuffled = _random_order_radius(points, buckets.bucket_size)
        rows.append(("mean radius", f"{radius:.3f}; of random buckets {shuffled:.3f} (in the scan's unit)"))
    return [*rows, ("device", devices.name_of(gpu)), ("picture", str(picture))]


def _random_order_radius(points: np.ndarray, bucket_size: int) -> float:
    """The mean radius of full buckets when the points are shuffled."""
    order = np.random.default_rng(0).permutation(len(points))[: len(points) // bucket_size * bucket_size]
    return float(bucket_radii(points, order, bucket_size).mean())
