# SPDX-License-Identifier: Apache-2.0
"""Preparation of labelled scans for training: thinning, crops, augmentation, and the features of points.

The functions take arrays of NumPy or CuPy and return arrays of the same library. What is random is drawn from the
generator that the caller passes, so a seed decides it.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d.flash3d.config import Config
from gpu3d.neighbors import knn

AXES = ("x", "y", "z")
SHAPE = "linearity", "planarity", "verticality", "size", "extent", "rise"
# The names of features that are computed from the nearest points, with their number at the end.
LOCAL = re.compile(rf"(?:(?P<shape>{'|'.join(SHAPE)})|(?P<attribute>.+)_(?P<statistic>mean|std))_(?P<count>[1-9]\d?)")
SCALES = 0.95, 1.05  # the smallest and the largest factor of `augment`
SECTOR = np.pi / 4, np.pi  # the smallest and the largest angle of `mix`
JITTER, MOST_JITTER = 0.01, 0.05  # standard deviation and bound of an offset, in the unit of the points
CELL_BITS = 21  # of a voxel's number along one axis; three fit an int64


@dataclass(frozen=True, kw_only=True)
class Task:
    """What weights were trained for: everything that a scan needs before and after the network.

    Attributes
    ----------
    features : tuple of str
        The name of each input channel: a coordinate, what `features` computes from the neighbours of a point, or an
        attribute of the points such as intensity.
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
        One cloud; z is up. Finite.
    attributes : mapping of str to array [N]
        What the points have beside coordinates. Integers count from 0 to 1 of their dtype's range, so an 8-bit
        intensity of 255 becomes 1. Floats stay as they are.
    names : sequence of str
        One per channel: x, y, z, a key of `attributes`, or a name of the table below with a number of points, such as
        linearity_32 or intensity_mean_32.

    Returns
    -------
    array float32 [N, len(names)]

    Raises
    ------
    ValueError
        The points have no attribute of a name.

    Notes
    -----
    A name with a number k describes the k points nearest to a point, itself among them (all points of a smaller cloud).
    Their standard deviations along their principal axes are s1 >= s2 >= s3. k is at most 99.

    ===============  ===================================================================
    linearity_k      (s1 - s2) / s1: 1 along a pole or a wire
    planarity_k      (s2 - s3) / s1: 1 on a wall or on the ground
    verticality_k    1 - |z| of the unit normal, which is the third axis: 1 on a wall
    size_k           s1, in the unit of the points
    extent_k         the largest z minus the smallest
    rise_k           z of the point minus the mean z
    ATTRIBUTE_mean_k the mean of an attribute
    ATTRIBUTE_std_k  its standard deviation
    ===============  ===================================================================

    Turns about the z axis and mirrors do not change them. So for training, compute them once for a whole scan, and let
    crops take their rows. They depend on the density: thin a scan before, as `Task.voxel` says.

    References
    ----------
    Dimensionality based scale selection in 3D lidar point clouds, Demantke et al., 2011.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> points = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> flash3d.features(points, {"intensity": np.array([0, 51], np.uint8)}, ["z", "intensity"])
    array([[3. , 0. ],
           [6. , 0.2]], dtype=float32)
    >>> wall = np.random.default_rng(0).random((500, 3)) * [4, 0, 3]
    >>> planarity, verticality = flash3d.features(wall, {}, ["planarity_16", "verticality_16"]).T
    >>> bool(planarity.mean() > 0.6), bool((verticality > 0.99).all())
    (True, True)
    """
    xp = _library(points)
    columns = xp.empty((len(points), len(names)), np.float32)
    counts = [int(local["count"]) for local in map(LOCAL.fullmatch, names) if local]
    nearest = xp.empty((0, 1), np.int32)
    if counts and len(points):
        nearest = knn(points, points, min(max(counts), len(points))).indices
    shape_of = functools.cache(lambda count: _shape(points, nearest[:, :count]))
    for channel, name in enumerate(names):
        local = LOCAL.fullmatch(name)
        if name in AXES:
            columns[:, channel] = points[:, AXES.index(name)]
        elif name in attributes:
            columns[:, channel] = _as_float(attributes[name])
        elif local and local["shape"]:
            columns[:, channel] = shape_of(int(local["count"]))[local["shape"]]
        elif local and local["attribute"] in attributes:
            values = _as_float(attributes[local["attribute"]])[nearest[:, : int(local["count"])]]
            columns[:, channel] = getattr(values, local["statistic"])(axis=1)
        else:
            raise ValueError(
                f"the feature {name!r} is needed ({', '.join(names)} in all), and the points have only "
                f"{', '.join((*AXES, *attributes))}: take points that have it, or a network without this feature."
            )
    return columns


def _as_float(values: Any) -> Any:
    """An attribute as float32. Integers become shares of their dtype's range."""
    whole = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    return values.astype(np.float32) / np.float32(whole)


def _shape(points: Any, near: Any) -> dict[str, Any]:
    """The features SHAPE of every point. `near`: the rows of its nearest points, itself first."""
    xp = _library(points)
    offsets = points[near].astype(np.float64) - points[:, None]
    mean = offsets.mean(axis=1)
    centred = offsets - mean[:, None]
    variances, normal_z = _principal(centred.transpose(0, 2, 1) @ centred / near.shape[1])
    first, second, third = xp.sqrt(xp.maximum(variances, 0))
    whole = xp.maximum(first, np.finfo(np.float32).tiny)  # equal points have no size
    height = offsets[:, :, 2]
    return {
        "linearity": (first - second) / whole,
        "planarity": (second - third) / whole,
        "verticality": 1 - normal_z,
        "size": first,
        "extent": height.max(axis=1) - height.min(axis=1),
        "rise": -mean[:, 2],
    }


def _principal(covariance: Any) -> tuple[Any, Any]:
    """The eigenvalues [3, n] of symmetric matrices [n, 3, 3], the largest first, and |z| of the last unit eigenvector.

    In closed form (Smith, 1961), which is exact enough in float64, and the same on CPU and GPU but for rounding.
    """
    xp = _library(covariance)
    x, y, z = (covariance[:, i, i] for i in range(3))
    xy, xz, yz = covariance[:, 0, 1], covariance[:, 0, 2], covariance[:, 1, 2]
    mean = (x + y + z) / 3
    a, b, c = x - mean, y - mean, z - mean
    scale = xp.sqrt((a * a + b * b + c * c + 2 * (xy * xy + xz * xz + yz * yz)) / 6)
    determinant = a * (b * c - yz * yz) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz)
    tiny = np.finfo(np.float64).tiny
    angle = xp.arccos(xp.clip(determinant / xp.maximum(2 * scale**3, tiny), -1, 1)) / 3
    first, last = mean + 2 * scale * xp.cos(angle), mean + 2 * scale * xp.cos(angle + 2 * np.pi / 3)
    middle = 3 * mean - first - last
    # The square of an eigenvector's z follows from the eigenvalues and those of the matrix without row and column z.
    minor = (x - last) * (y - last) - xy * xy
    normal_z = xp.sqrt(xp.clip(minor / xp.maximum((first - last) * (middle - last), tiny), 0, 1))
    return xp.stack([first, middle, last]), normal_z


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
    angle, mirror, scale = rng.uniform(0, 2 * math.pi), float(rng.choice((-1, 1))), rng.uniform(*SCALES)
    jitter = xp.clip(JITTER * _normal(points.shape, rng, xp), -MOST_JITTER, MOST_JITTER)
    # Numbers go to a kernel with its launch. A matrix would have to be copied to the GPU first.
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    x, y, z = points.astype(np.float32, copy=False).T
    y = mirror * y
    return xp.stack([cosine * x - sine * y, sine * x + cosine * y, scale * z], axis=1) + jitter


def mix(points: Any, other: Any, rng: np.random.Generator) -> Any:
    """Rows of two clouds that make one: a sector of the other cloud takes the place of that of the first.

    The sector is about the z axis. Its direction is random, and its angle is uniform from 45 to 180 degrees.

    Parameters
    ----------
    points : array [N, 3]
        Relative to the sensor. Finite.
    other : array [M, 3]
        A cloud of the same sensor, from another place.
    rng : numpy.random.Generator

    Returns
    -------
    array int64 [K]
        Rows of the two clouds one after the other, in increasing order: N + i is row i of `other`. On a GPU, K is read
        on the host (synchronizes).

    References
    ----------
    PolarMix: a general data augmentation technique for LiDAR point clouds, Xiao et al., 2022.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rng = np.random.default_rng(0)
    >>> points, other = rng.normal(size=(2, 1000, 3))
    >>> rows = flash3d.mix(points, other, rng)
    >>> np.concatenate([points, other])[rows].shape
    (956, 3)
    """
    xp = _library(points)
    first, angle = rng.uniform(0, 2 * np.pi), rng.uniform(*SECTOR)

    def inside(cloud: Any) -> Any:
        return (xp.arctan2(cloud[:, 1], cloud[:, 0]) - first) % (2 * np.pi) < angle

    return xp.flatnonzero(xp.concatenate([~inside(points), inside(other)]))


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
