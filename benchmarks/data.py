# SPDX-License-Identifier: Apache-2.0
"""The clouds that the suites time: real scans, repeated to any size, and the degenerate ones of tests/clouds.py.

Licences keep most real scans out of the repository. Without their folder the scan that the package carries is
repeated instead, and the results say which one it was.
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
sys.path.append(str(ROOT / "tests"))  # the only place where benchmarks reach for the tests' clouds
import clouds  # noqa: E402

PACKAGED = "pandaset_002_00.npz"
PAIRS = ("near", "shell", "independent", "collapsed", "far")  # how two clouds lie to each other
METRES_A_COPY = 1.3  # a car at 26 m/s, a sweep every 0.05 s (nuScenes)
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
    """What `sweep_cloud` is made of."""
    return f"{_base(folder)[1]}, repeated with {METRES_A_COPY} m of ego motion and {JITTER} m of jitter a copy"


def sweep_cloud(n: int, folder: Path | None) -> np.ndarray:
    """A real sweep repeated to n points, float32 [n, 3]: each copy one step further along x, with its own noise."""
    base, _ = _base(folder)
    rng = np.random.default_rng(0)
    copies = [
        (base + [METRES_A_COPY * i, 0, 0] + rng.normal(0, JITTER, base.shape)).astype(np.float32)
        for i in range(-(-n // len(base)))
    ]
    return np.ascontiguousarray(np.concatenate(copies)[:n])


def pair(kind: str, n: int, copies: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """x and y float32 [copies * n, 3]: y is uniform on the unit sphere, n points of it a cloud, and x is

    - near: y and noise of 0.25 times the mean distance from a point of y to its nearest
    - shell: y and noise of 0.02
    - independent: another sample of the sphere
    - collapsed: a ball of radius 0.05 in the middle, from which all of y is about as far
    - far: near, shifted by 5 along an axis
    """
    rng = np.random.default_rng(0)
    y, x = (_unit(rng.standard_normal((copies * n, 3))) for _ in range(2))
    noise = rng.standard_normal((copies * n, 3))
    near = y + 0.25 * math.sqrt(math.pi / n) * noise  # the mean distance to the nearest is half of 1 / sqrt(density)
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
    """The named ones of tests/clouds.py."""
    every = clouds.degenerate(n)
    for name in names:
        yield name, every[name]


def real_sweeps(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every LiDAR sweep of the data folder as ("dataset/file", points)."""
    for name, points in clouds.real(folder):
        if name.startswith(("lidar_", "semantickitti/")):
            yield name, points


def scenes(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The largest scan of every data set, without what is not finite; coordinates of maps are float64."""
    largest: dict[str, tuple[str, np.ndarray]] = {}
    for name, points in clouds.real(folder):
        dataset = name.split("/")[0]
        if dataset not in largest or len(points) > len(largest[dataset][1]):
            largest[dataset] = name, points
    for name, points in largest.values():
        yield name, points[np.isfinite(points).all(axis=1)]


def two_frames(folder: Path) -> tuple[str, list[np.ndarray]] | None:
    """Two sweeps of one scene, 4 s apart and in one frame; None where they are absent."""
    frames = [points for name, points in clouds.real(folder) if name.startswith("lidar_pandaset/002_")]
    return ("lidar_pandaset/002_00 to 002_40", frames) if len(frames) == 2 else None


def four_sweeps(folder: Path | None) -> dict[str, np.ndarray]:
    """The first sweep of each of four sensors, by dataset; none without the folder."""
    sweeps: dict[str, np.ndarray] = {}
    for name, points in real_sweeps(folder) if folder else ():
        sweeps.setdefault(name.split("/")[0].removeprefix("lidar_"), points)
        if len(sweeps) == 4:
            break
    return sweeps


def codes(points: np.ndarray) -> np.ndarray:
    """Morton codes uint64 [n] of 48 bits, by the reference."""
    return reference.morton(reference.voxelize(points))


def to_torch(x: Any) -> Any:
    """A CuPy array as a tensor over the same memory."""
    import torch

    return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16) if x.dtype == bfloat16 else torch.from_dlpack(x)
