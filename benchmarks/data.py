# SPDX-License-Identifier: Apache-2.0
"""The clouds of the suites: real scans, repeated to any size, and the degenerate clouds of tests/clouds.py.

Licences keep most real scans out of the repository. Without the folder of scans, the one that comes with the package is
repeated instead. The results name the scan.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import gpu3d
from gpu3d.reference import buckets as reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # the only place where benchmarks import from tests/
import clouds  # noqa: E402

PACKAGED = "pandaset_002_00.npz"
PAIRS = ("near", "shell", "independent", "collapsed", "far")  # how the two clouds of a pair are related
METRES_A_COPY = 1.3  # a car at 26 m/s that takes a sweep every 0.05 s (nuScenes)
JITTER = 0.01


def find_folder(option: Path | None) -> Path | None:
    """The folder of real scans: the option, else $GPU3D_DATA, else ../shared/data; None where it is absent."""
    folder = option or Path(os.environ.get("GPU3D_DATA") or ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def _base(folder: Path | None) -> tuple[np.ndarray, str]:
    """One real sweep float32 [n, 3], and its name."""
    for path in sorted(folder.glob("lidar_raw/nuscenes*.pcd.bin")) if folder else ():
        return np.fromfile(path, "<f4").reshape(-1, 5)[:, :3], f"nuScenes sweep {path.name}"
    with np.load(Path(gpu3d.__file__).parent / "data" / PACKAGED, allow_pickle=False) as scan:
        return (scan["xyz_mm"].T / 1000).astype(np.float32), f"packaged PandaSet scan {PACKAGED} (no nuScenes sweep)"


def describe(folder: Path | None) -> str:
    """The description of `sweep_cloud` in the results."""
    return f"{_base(folder)[1]}, repeated with {METRES_A_COPY} m of ego motion and {JITTER} m of jitter a copy"


def sweep_cloud(n: int, folder: Path | None) -> np.ndarray:
    """A real sweep repeated to n points, float32 [n, 3]. Each copy is one step further along x, with its own noise."""
    base, _ = _base(folder)
    rng = np.random.default_rng(0)
    copies = [
        (base + [METRES_A_COPY * i, 0, 0] + rng.normal(0, JITTER, base.shape)).astype(np.float32)
        for i in range(-(-n // len(base)))
    ]
    return np.ascontiguousarray(np.concatenate(copies)[:n])


def pair(kind: str, n: int, copies: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """x and y float32 [copies * n, 3], `copies` clouds of n points. y is uniform on the unit sphere, and x is

    - near: y with noise of 0.25 times the mean distance from a point of y to its nearest neighbour
    - shell: y with noise of 0.02
    - independent: another sample of the sphere
    - collapsed: a ball of radius 0.05 at the centre of the sphere, so all points of y are about equally far
    - far: near, shifted by 5 along an axis
    """
    rng = np.random.default_rng(0)
    y, x = (_unit(rng.standard_normal((copies * n, 3))) for _ in range(2))
    noise = rng.standard_normal((copies * n, 3))
    near = y + 0.25 * math.sqrt(math.pi / n) * noise  # the mean distance to the nearest is 0.5 / sqrt(density)
    x = {
        "near": near,
        "shell": y + 0.02 * noise,
        "independent": x,
        "collapsed": 0.05 * np.cbrt(rng.random((copies * n, 1))) * x,
        "far": near + [5, 0, 0],
    }[kind]
    return x.astype(np.float32), y.astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def degenerate(n: int, *names: str) -> Iterator[tuple[str, np.ndarray]]:
    """The clouds of tests/clouds.py with these names."""
    every = clouds.degenerate(n)
    for name in names:
        yield name, every[name]


def real_sweeps(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every LiDAR sweep of the folder, as ("dataset/file", points)."""
    for name, points in clouds.real(folder):
        if name.startswith(("lidar_", "semantickitti/")):
            yield name, points


def scenes(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The largest scan of every data set, without points that are not finite. Map coordinates are float64."""
    largest: dict[str, tuple[str, np.ndarray]] = {}
    for name, points in clouds.real(folder):
        dataset = name.split("/")[0]
        if dataset not in largest or len(points) > len(largest[dataset][1]):
            largest[dataset] = name, points
    for name, points in largest.values():
        yield name, points[np.isfinite(points).all(axis=1)]


def two_frames(folder: Path) -> tuple[str, list[np.ndarray]] | None:
    """Two sweeps of one scene, 4 s apart, in the same coordinate frame. None if the folder lacks them."""
    frames = [points for name, points in clouds.real(folder) if name.startswith("lidar_pandaset/002_")]
    return ("lidar_pandaset/002_00 to 002_40", frames) if len(frames) == 2 else None


def four_sweeps(folder: Path | None) -> dict[str, np.ndarray]:
    """The first sweep of each of four sensors, by data set. Empty without the folder."""
    sweeps: dict[str, np.ndarray] = {}
    for name, points in real_sweeps(folder) if folder else ():
        sweeps.setdefault(name.split("/")[0].removeprefix("lidar_"), points)
        if len(sweeps) == 4:
            break
    return sweeps


def codes(points: np.ndarray) -> np.ndarray:
    """Morton codes uint64 [n] of 48 bits, from the CPU reference."""
    return reference.morton(reference.voxelize(points))


def to_torch(x: Any) -> Any:
    """A torch tensor that shares the memory of a CuPy array."""
    import torch

    return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16) if x.dtype == bfloat16 else torch.from_dlpack(x)
