# SPDX-License-Identifier: Apache-2.0
"""Preparation of labelled scans for training: thinning, crops, augmentation, and the features of points.

The functions take arrays of NumPy or CuPy and return arrays of the same library. What is random is drawn from the
generator that the caller passes, so a seed decides it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d.flash3d.config import Config

AXES = ("x", "y", "z")
SCALES = 0.95, 1.05  # the smallest and the largest factor of `augment`
JITTER, MOST_JITTER = 0.01, 0.05  # standard deviation and bound of an offset, in the unit of the points
CELL_BITS = 21  # of a voxel's number along one axis; three fit an int64


@dataclass(frozen=True, kw_only=True)
class Task:
    """What weights were trained for: everything that a scan needs before and after the network.

    Attributes
    ----------
    features : tuple of str
        The name of each input channel: x, y, z, or an attribute of the points such as intensity.
    classes : tuple of str
        The name of each class.
    voxel : float
        Scans are thinned to one point per voxel of this side before the network sees them, in the unit of the points.
        0 leaves them as they are.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> task = flash3d.Task(features=("x", "y", "z", "intensity"), classes=("ground", "other"), voxel=0.2)
    >>> len(task.features)
    4
    """

    features: tuple[str, ...]
    classes: tuple[str, ...]
    voxel: float = 0.0

    def __post_init__(self) -> None:
        for name in ("features", "classes"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
                raise TypeError(f"{name} must be a tuple of names, got {_arrays.shown(value)}.")
            object.__setattr__(self, name, tuple(value))  # the dataclass is frozen
        object.__setattr__(self, "voxel", _arrays.check_number(self.voxel, "voxel"))
        if not 0 <= self.voxel < np.inf:
            raise ValueError(f"voxel must be 0 (no thinning) or positive and finite, got {self.voxel}.")

    def check(self, config: Config) -> None:
        """Raise a ValueError unless there is a name for each input channel and for each class of the config."""
        for name, field in (("features", "in_channels"), ("classes", "classes")):
            names, count = getattr(self, name), getattr(config, field)
            if len(names) != count:
                raise ValueError(
                    f"the task must have {count} {name}, as config.{field} says, got {len(names)}: "
                    f"{_arrays.shown(names)}."
                )


def default_task(config: Config) -> Task:
    """The task of weights that were saved without one."""
    names = {3: AXES, 4: (*AXES, "intensity")}.get(config.in_channels)
    if names is None:
        raise ValueError(
            f"the file does not say what its {config.in_channels} input features are: pass task= to flash3d.save."
        )
    return Task(features=names, classes=tuple(map(str, range(config.classes))))


def features(points: Any, attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The input features of points, by name.

    Parameters
    ----------
    points : array [N, 3]
        After augmentation, if there is any, so that the features x, y and z follow it.
    attributes : mapping of str to array [N]
        What the points have beside coordinates. Integers count from 0 to 1 of their dtype's range, so an 8-bit
        intensity of 255 becomes 1. Floats stay as they are.
    names : sequence of str
        x, y, z, or a key of `attributes`, one per channel.

    Returns
    -------
    array float32 [N, len(names)]

    Raises
    ------
    ValueError
        The points have no attribute of a name.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> points = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> flash3d.features(points, {"intensity": np.array([0, 51], np.uint8)}, ["z", "intensity"])
    array([[3. , 0. ],
           [6. , 0.2]], dtype=float32)
    """
    columns = _library(points).empty((len(points), len(names)), np.float32)
    for channel, name in enumerate(names):
        if name in AXES:
            columns[:, channel] = points[:, AXES.index(name)]
        elif name in attributes:
            values = attributes[name]
            whole = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
            columns[:, channel] = values.astype(np.float32) / np.float32(whole)
        else:
            raise ValueError(
                f"the feature {name!r} is needed ({', '.join(names)} in all), and the points have only "
                f"{', '.join((*AXES, *attributes))}: take points that have it, or a network without this feature."
            )
    return columns


def crop(points: Any, size: int, rng: np.random.Generator) -> Any:
    """The points nearest to a random one, seen from above.

    Parameters
    ----------
    points : array [N, 3]
        z is up. Finite.
    size : int
        How many points. A cloud with fewer is taken whole; no point is repeated.
    rng : numpy.random.Generator
        Draws the point in the middle.

    Returns
    -------
    array int64 [min(size, N)]
        Rows of `points`, in increasing order. Of points at the same distance, those with lower rows are taken first.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> points = np.random.default_rng(0).random((1000, 3))
    >>> rows = flash3d.crop(points, 100, np.random.default_rng(1))
    >>> points[rows].shape, bool(np.ptp(points[rows, 0]) < 0.5)
    ((100, 3), True)
    """
    size = _arrays.check_integer(size, "size")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    xp = _library(points)
    if len(points) <= size:
        return xp.arange(len(points))
    away = points[:, :2] - points[int(rng.integers(len(points))), :2]
    return xp.sort(xp.argsort((away * away).sum(axis=1), kind="stable")[:size])


def augment(points: Any, rng: np.random.Generator) -> Any:
    """Points turned about the z axis, mirrored, scaled and jittered at random.

    Any angle is equally likely. The cloud is mirrored or not with equal probability, which together with the turn
    covers mirrors in every direction. The scale is uniform from 0.95 to 1.05. The offset of a coordinate is normal with
    a standard deviation of 0.01, cut at 0.05: points in metres are assumed.

    Parameters
    ----------
    points : array float [N, 3]
        Relative to the axis about which to turn, for example the sensor.
    rng : numpy.random.Generator

    Returns
    -------
    array float32 [N, 3]
        NumPy and CuPy turn, mirror and scale alike. Their jitter differs.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> points = np.array([[3.0, 4.0, 1.0]])
    >>> moved = flash3d.augment(points, np.random.default_rng(0))
    >>> bool(4.6 < np.hypot(*moved[0, :2]) < 5.4), moved.dtype
    (True, dtype('float32'))
    """
    xp = _library(points)
    angle, mirror, scale = rng.uniform(0, 2 * np.pi), rng.choice((-1, 1)), rng.uniform(*SCALES)
    turn = scale * np.array(
        [[np.cos(angle), np.sin(angle), 0], [-mirror * np.sin(angle), mirror * np.cos(angle), 0], [0, 0, 1]]
    )
    jitter = JITTER * _normal(points.shape, rng, xp)
    moved = points.astype(np.float32) @ xp.asarray(turn.astype(np.float32))
    return moved + xp.clip(jitter, -MOST_JITTER, MOST_JITTER)


def voxel_subset(points: Any, size: float) -> tuple[Any, Any]:
    """The first point of every voxel, and the way back from these points to all.

    Parameters
    ----------
    points : array float [N, 3]
        Finite.
    size : float
        The side of a voxel. Voxels are counted from the smallest coordinates of the cloud.

    Returns
    -------
    rows : array int64 [M]
        Rows of `points`, in increasing order. On a GPU, M is read on the host (synchronizes).
    parents : array int64 [N]
        For each point, which of `rows` shares its voxel: what was computed for ``points[rows]`` is ``values[parents]``
        for all points.

    Raises
    ------
    ValueError
        The cloud is wider than 2097151 voxels, or not finite.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rows, parents = flash3d.voxel_subset(np.array([[0.0, 0, 0], [5, 0, 0], [0.5, 0, 0]]), 1.0)
    >>> rows, parents
    (array([0, 1]), array([0, 1, 0]))
    """
    size = _arrays.check_number(size, "size")
    if not 0 < size < np.inf:
        raise ValueError(f"size must be positive and finite, got {size}.")
    xp = _library(points)
    if not len(points):
        return xp.arange(0), xp.arange(0)
    cells = xp.floor((points.astype(np.float64) - points.min(axis=0)) / size)
    if not float(cells.max()) < 2**CELL_BITS - 1:  # NaN, too
        raise ValueError(
            f"the cloud must be finite and narrower than {2**CELL_BITS - 1} voxels of size {size}, got a width of "
            f"{float(cells.max()):.6g} voxels: raise size, or drop the points that are far away or not finite."
        )
    x, y, z = cells.astype(np.int64).T
    voxels = (x << 2 * CELL_BITS) | (y << CELL_BITS) | z
    order = xp.argsort(voxels, kind="stable")  # so the first point of a voxel comes first
    first = xp.concatenate([xp.ones(1, bool), voxels[order][1:] != voxels[order][:-1]])
    by_voxel = order[first]
    rows = xp.sort(by_voxel)
    parents = xp.empty(len(points), np.int64)
    parents[order] = xp.searchsorted(rows, by_voxel)[xp.cumsum(first) - 1]
    return rows, parents


def _library(x: Any) -> Any:
    """The module of an array, numpy or cupy."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def _normal(shape: tuple[int, ...], rng: np.random.Generator, xp: Any) -> Any:
    """Float32 normal numbers. Those of CuPy are drawn on the GPU, where NumPy's would take longer than the step."""
    if xp is np:
        return rng.standard_normal(shape, np.float32)
    seeded = xp.random.Generator(xp.random.Philox4x3210(int(rng.integers(2**63))))
    return seeded.standard_normal(shape, np.float32)
