# SPDX-License-Identifier: Apache-2.0
"""Labelled LiDAR sweeps for the examples that train: those of SemanticKITTI, and made-up streets.

The sweeps of SemanticKITTI are files semantickitti/SS_FFFFFF.npz, of sequence SS, with xyz int16 [N, 3] in units of
5 mm, remission uint8, and label uint8, one of the 19 training classes or 255 for none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu3d.flash3d import voxel_subset

CLASSES = [
    "car",
    "bicycle",
    "motorcycle",
    "truck",
    "other-vehicle",
    "person",
    "bicyclist",
    "motorcyclist",
    "road",
    "parking",
    "sidewalk",
    "other-ground",
    "building",
    "fence",
    "vegetation",
    "trunk",
    "terrain",
    "pole",
    "traffic-sign",
]
IGNORED = 255


class Sweep(NamedTuple):
    """Labelled points, relative to the sensor."""

    points: np.ndarray  # float32 [n, 3], metres
    remission: np.ndarray  # float32 [n], 0 to 1
    labels: np.ndarray  # uint8 [n]


def read_sweeps(folder: Path) -> dict[str, list[Sweep]]:
    """The sweeps of each sequence. Without any file there is none."""
    sequences: dict[str, list[Sweep]] = {}
    for file in sorted((folder / "semantickitti").glob("[0-9][0-9]_*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            points = arrays["xyz"] * np.float32(0.005)
            sweep = Sweep(points, arrays["remission"] / np.float32(255), arrays["label"])
        sequences.setdefault(file.name[:2], []).append(sweep)
    return sequences


def thin(sweep: Sweep, voxel: float) -> Sweep:
    """The first point of every voxel."""
    rows, _ = voxel_subset(sweep.points, voxel)
    return Sweep(*(values[rows] for values in sweep))


def made_up_street(seed: int) -> Sweep:
    """A road with pavements, houses, cars, trees and poles around a sensor; its density falls with the distance."""
    rng = np.random.default_rng(seed)
    parts: list[tuple[np.ndarray, str]] = []

    def add(name: str, low: Any, high: Any, count: int) -> None:
        low, high = np.minimum(low, high), np.maximum(low, high)
        parts.append((rng.uniform(low, high, (count, 3)), name))

    ground = -1.73  # relative to the sensor
    road, pavement = rng.uniform(3, 6), rng.uniform(2, 4)
    add("road", (-50, -road, ground), (50, road, ground), 12_000)
    for side in (-1, 1):
        kerb, wall = side * road, side * (road + pavement)
        add("sidewalk", (-50, kerb, ground + 0.12), (50, wall, ground + 0.12), 4_000)
        for x in np.arange(-50, 50, 12):
            if rng.random() < 0.6:
                add("building", (x, wall, ground), (x + 10, wall + 0.1, ground + rng.uniform(4, 9)), 1_500)
            else:
                add("terrain", (x, wall, ground), (x + 12, wall + side * 8, ground + 0.2), 700)
                tree = np.array([x + 6, wall + side * rng.uniform(1, 4), 0])
                add("trunk", tree + (-0.2, -0.2, ground), tree + (0.2, 0.2, 1), 120)
                parts.append((tree + (0, 0, 2.5) + rng.standard_normal((900, 3)), "vegetation"))
            if rng.random() < 0.5:
                at = np.array([x + 3, kerb - side * 1.2, ground])
                add("car", at + (-2.1, -0.9, 0.3), at + (2.1, 0.9, 0.9), 500)
                add("car", at + (-1.2, -0.8, 0.9), at + (1.0, 0.8, 1.5), 250)
            if rng.random() < 0.4:
                at = np.array([x, kerb + side * 0.4, ground])
                add("pole", at + (-0.08, -0.08, 0.1), at + (0.08, 0.08, 5), 120)
    points = np.concatenate([part for part, _ in parts])
    labels = np.concatenate([np.full(len(part), CLASSES.index(name), np.uint8) for part, name in parts])
    seen = rng.random(len(points)) < np.minimum(1, 12 / np.linalg.norm(points, axis=1))
    points = points[seen] + rng.normal(0, 0.02, (np.count_nonzero(seen), 3))
    remission = rng.random(len(CLASSES))[labels[seen]] * rng.random(len(points))
    return Sweep(points.astype(np.float32), remission.astype(np.float32), labels[seen])
