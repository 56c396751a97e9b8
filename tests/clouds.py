# SPDX-License-Identifier: Apache-2.0
"""The clouds that tests and benchmarks share: degenerate clouds as they occur in practice, and real scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def uniform(n, seed=0, dtype=np.float32):
    """A slab, so that the axes differ."""
    return (np.random.default_rng(seed).random((n, 3)) * [80, 60, 4] - [40, 30, 1]).astype(dtype)


def lidar_like(n, seed=0):
    """Rings around a sensor: density falls with the square of the distance, as in a sweep."""
    rng = np.random.default_rng(seed)
    distance, angle = rng.exponential(12, n) + 2, rng.random(n) * 2 * np.pi
    height = rng.normal(0, 0.02, n) * distance - 1.7
    return np.stack([distance * np.cos(angle), distance * np.sin(angle), height], 1).astype(np.float32)


def degenerate(n=5000, seed=0):
    """Named clouds of n points that break a careless implementation. All occur in real data."""
    rng = np.random.default_rng(seed)
    cloud = lidar_like(n, seed)
    origin, coincident, line, flat = cloud.copy(), cloud.copy(), np.zeros_like(cloud), cloud.copy()
    origin[rng.permutation(n)[: n * 2 // 5]] = 0
    coincident[rng.permutation(n)[: n * 7 // 10]] = cloud[7]
    line[:, 1] = rng.random(n)
    flat[:, 2] = 3
    return {
        "all equal": np.full((n, 3), 1.5, np.float32),
        "40 % at the origin": origin,
        "coincident": coincident,
        "collinear": line,
        "one axis flat": flat,
        "lattice": (rng.integers(0, 7, (n, 3)) / np.float32(8)).astype(np.float32),
        "sorted": cloud[np.lexsort(cloud.T)],
        "tiny": (rng.random((n, 3)) * 1e-38).astype(np.float32),
        "huge": ((rng.random((n, 3)) - 0.5) * 6e38).astype(np.float32),
        "copies of 100 points": np.tile(cloud[:100], (n // 100 + 1, 1))[:n],
    }


TRANSPORTS = ("near", "shell", "independent", "collapsed", "far")


def transport(kind, n, m, seed=0):
    """A prediction of n and a target of m points. The target is on a surface; `kind` says where the prediction is."""
    rng = np.random.default_rng(seed)

    def surface(count):
        direction = rng.normal(size=(count, 3))
        return direction / np.linalg.norm(direction, axis=1, keepdims=True) * [1, 0.8, 0.6]

    target = surface(m)
    if kind in ("near", "shell"):
        noise = 0.25 * np.sqrt(8 / m) if kind == "near" else 0.02  # the area is 8: a quarter of the mean spacing
        pred = target[rng.permutation(max(n, m))[:n] % m] + rng.normal(0, noise, (n, 3))
    else:
        pred = surface(n)
        if kind == "collapsed":  # like the output of an untrained network
            pred = pred * rng.random((n, 1)) * 0.05 + [0.3, -0.2, 0.1]
        elif kind == "far":
            pred += 5
    return pred.astype(np.float32), target.astype(np.float32)


def spoiled(n=3000, seed=0):
    """A cloud with NaN and inf among its points, and the mask of its finite points."""
    rng = np.random.default_rng(seed)
    points = lidar_like(n, seed)
    points[rng.integers(0, n, n // 10), rng.integers(0, 3, n // 10)] = rng.choice([np.nan, np.inf, -np.inf], n // 10)
    return points, np.isfinite(points).all(1)


def real(folder: Path):
    """Every real scan of the data folder, as (name, float points in metres or in the unit of the file)."""
    for path in sorted(folder.glob("*/*.npz")):
        if not path.parent.name.startswith(("lidar", "aerial", "indoor", "semantickitti")):
            continue
        with np.load(path, allow_pickle=False) as z:
            if path.parent.name == "semantickitti":
                points = z["xyz"].astype(np.float32) * np.float32(0.005)
            elif "xyz_mm" in z:
                points = (z["xyz_mm"].T / 1000).astype(np.float32)
            elif "xyz_int" in z:
                points = z["xyz_int"].T * z["scale"] + z["offset"]
            else:
                points = (z["xyz"] if "xyz" in z else z["xyz_f16"]).T
        yield f"{path.parent.name}/{path.stem}", np.ascontiguousarray(points)
    for path in sorted(folder.glob("lidar_raw/*.pcd.bin")):
        yield f"lidar_raw/{path.name}", np.fromfile(path, "<f4").reshape(-1, 5)[:, :3].copy()
