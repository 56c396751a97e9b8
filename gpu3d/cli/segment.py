# SPDX-License-Identifier: Apache-2.0
"""Label the points of clouds by trained weights."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpu3d import flash3d
from gpu3d.cli import devices, files, tables
from gpu3d.io import Cloud, write_cloud
from gpu3d.io.files import replaced

EXAMPLE = "gpu3d segment sweep.bin --weights weights.safetensors -o labels.npy"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser)
    parser.add_argument("--weights", metavar="FILE", type=Path, required=True, help="what flash3d.save wrote")
    output = "the labels: .npy, or a cloud with an attribute label (default: ./gpu3d-segment-INPUT.npy)"
    files.add_outputs(parser, output, ".npy")
    devices.add_device(parser)


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    weights = arguments.weights
    if arguments.output is not None and files.is_same_file(arguments.output, weights):
        stop(f"-o is {weights} itself, and an input is never overwritten")

    _network.cache_clear()  # the file may have changed since an earlier run of this process

    def ready() -> bool:
        try:
            flash3d.load(weights)
            flash3d.load_task(weights)
        except tables.FAILURES as error:
            tables.print_line(weights, tables.text_of(error, weights))
            return False
        return True

    work = functools.partial(segment, weights=weights, columns=arguments.columns)
    return files.over_files(
        arguments, stop, work, show=_rows, to=".npy", default="gpu3d-segment-{stem}.npy", ready=ready
    )


def segment(path: Path, target: Path, *, weights: Path, columns: int | None, gpu: int | None) -> dict[str, Any]:
    """Label a file and write the labels."""
    network, task, classes = _network(weights, gpu)
    cloud = files.read(path, columns)
    attributes = {}
    if any(name.startswith("intensity") for name in task.features) and "intensity" in cloud.attributes:
        attributes["intensity"] = cloud.attributes["intensity"]
    begin = time.perf_counter()
    labels = _predict(cloud.points, attributes, network, task, gpu)
    seconds = time.perf_counter() - begin
    if target.name.lower().endswith(".npy"):
        with replaced(target) as stream:
            np.save(stream, labels)
    else:
        write_cloud(target, Cloud(cloud.points, {**cloud.attributes, "label": labels}, cloud.meta))
    counts = np.bincount(labels[labels >= 0], minlength=classes).tolist()
    return {
        "points": len(cloud),
        "not_finite": int((labels < 0).sum()),
        "seconds": seconds,
        "classes": dict(zip(task.classes, counts, strict=True)),
        "device": devices.name_of(gpu),
    }


def _rows(result: dict[str, Any]) -> tables.Rows:
    """Only classes that occur are shown."""
    rows = [("scan", result["file"]), ("points", f"{result['points']:,}"), ("time", f"{result['seconds']:.3f} s")]
    rows += [(name, f"{count:,}") for name, count in result["classes"].items() if count]
    if result["not_finite"]:
        rows.append(("not finite", f"{result['not_finite']:,} (label -1)"))
    return [*rows, ("device", result["device"]), ("labels", result["written"])]


@functools.cache  # once a worker
def _network(weights: Path, gpu: int | None) -> tuple[Callable[..., Any], flash3d.Task, int]:
    params, config = flash3d.load(weights)
    with devices.on(gpu) as place:
        return flash3d.compile(_placed(params, place), config), flash3d.load_task(weights), config.classes


def _placed(params: dict[str, Any], place: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {key: _placed(x, place) if isinstance(x, dict) else place(x) for key, x in params.items()}


def _predict(
    points: np.ndarray,
    attributes: dict[str, np.ndarray],
    network: Callable[..., Any],
    task: flash3d.Task,
    gpu: int | None,
) -> np.ndarray:
    """The class of every point, int32; -1 where a coordinate or a feature is not finite."""
    labels = np.full(len(points), -1, np.int32)
    finite = np.isfinite(points).all(axis=1)
    for values in attributes.values():
        finite &= np.isfinite(values)
    kept = np.flatnonzero(finite)
    rows, parents = np.arange(len(kept)), np.arange(len(kept))
    if task.voxel:
        rows, parents = flash3d.voxel_subset(points[kept], task.voxel)
    rows = kept[rows]
    with devices.on(gpu) as place:
        thinned, known = place(points[rows]), {name: place(values[rows]) for name, values in attributes.items()}
        features = flash3d.features(thinned, known, task.features)
        if len(kept):
            labels[kept] = devices.fetch(network(thinned, features))[parents]
    return labels
