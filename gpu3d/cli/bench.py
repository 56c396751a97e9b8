# SPDX-License-Identifier: Apache-2.0
"""Time bucketize, knn, chamfer and attention on this machine, on the scan that comes with the package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import demo, devices, files, tables
from gpu3d.io import read_points

EXAMPLE = "gpu3d bench --device cuda:1 --json"
NOTES = (
    "knn finds 16 neighbours of each point; chamfer compares the scan with itself, moved by 2 cm; attention is that of "
    "4 heads of 16 channels in scopes of 8 buckets of 512 points. docs/performance.md has "
    "the times of several GPUs, and the command that measures everything."
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    devices.add_device(parser)


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    gpu = next(iter(devices.gpus(arguments.device, stop)), None)
    with resources.as_file(resources.files(gpu3d) / "data" / demo.SCAN) as path:
        points = read_points(path)
    times = {}
    with devices.on(gpu) as place:
        for name, call in _cases(points, place).items():
            times[name] = _median(call, gpu)
    if arguments.json:
        unit = {name: {"milliseconds": median, "calls": calls} for name, (median, calls) in times.items()}
        tables.print_json({"points": len(points), "device": devices.name_of(gpu), **unit})
        return 0
    rows = [("points", f"{len(points):,}")]
    rows += [(name, f"{median:10.3f} ms (median of {calls})") for name, (median, calls) in times.items()]
    tables.print_rows([*rows, ("device", devices.name_of(gpu))])
    return 0


def _cases(points: np.ndarray, place: Callable[[np.ndarray], Any]) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    moved = points + rng.normal(scale=0.02, size=points.shape).astype(np.float32)
    x, y = place(points), place(moved)
    buckets = gpu3d.bucketize(x)
    scopes = gpu3d.scopes(buckets, 8)
    q, k, v = (place(rng.standard_normal((buckets.num_slots, 4, 16), np.float32)) for _ in range(3))
    return {
        "bucketize": lambda: gpu3d.bucketize(x, check_finite=False),
        "knn": lambda: gpu3d.knn(x, x, 16),
        "chamfer": lambda: gpu3d.chamfer(x, y),
        "attention": lambda: gpu3d.bucket_attention(q, k, v, buckets, scopes),
    }


def _median(call: Callable[[], object], gpu: int | None) -> tuple[float, int]:
    """The median time of a call in milliseconds, and the number of calls: some two seconds of them on a CPU."""
    begin = time.perf_counter()
    call()  # compiles the kernels, on a GPU
    seconds = time.perf_counter() - begin
    if gpu is None and seconds > 1:
        return 1000 * seconds, 1
    calls = 30 if gpu is not None else min(30, int(2 / seconds))
    return devices.milliseconds(call, gpu, calls), calls
