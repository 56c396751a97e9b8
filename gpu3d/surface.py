# SPDX-License-Identifier: Apache-2.0
"""The surface that points lie on: their normals and how much it bends, from the nearest points of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, FLOAT64, Given, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda import surface as cuda
from gpu3d.neighbors import check_clouds, packed
from gpu3d.reference import surface as reference


class Normals(NamedTuple):
    """The surface at each point; the result of `normals`."""

    normals: Any  # float32 [N, 3] (float64 for float64 points), of length 1; NaN where there is none
    curvature: Any  # float32 [N] (float64 for float64 points), from 0 (flat) to 1/3; NaN where there is none


def normals(
    points: Any,
    k: int = 16,
    *,
    lengths: Sequence[int] | None = None,
    viewpoint: Sequence[float] | None = None,
) -> Normals:
    """The normal of the surface at each point, from its k nearest points.

    Parameters
    ----------
    points : array [N, 3] or [B, n, 3]
        Coordinates: float32, float64, float16 or bfloat16; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.
        They are not differentiated.
    k : int
        How many of the nearest points count, 3 to 1024, the point itself among them. A cloud with fewer points uses
        those that it has.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud. Points are neighbours only of points of
        their own cloud.
    viewpoint : sequence of three float, optional
        Where the sensor was, in the coordinates of the points, the same for all clouds. Normals point towards it.
        Default: they point up, to +z; a horizontal one to +y; and one along x to +x.

    Returns
    -------
    Normals
        ``normals`` [N, 3] of length 1 and ``curvature`` [N], float32, for float64 points float64. They are arrays of
        the library of `points`.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure. A tensor that requires
        grad is one of these cases: normals have no gradient.

    Notes
    -----
    The normal is the eigenvector of the smallest eigenvalue of the covariance matrix of the nearest points, which
    `knn` finds. The curvature is this eigenvalue divided by the sum of all three: 0 on a plane, and 1/3 where points
    scatter alike in all directions. All is computed in float64. A normal is within 1e-5 of the exact one where the
    second eigenvalue is at least four times the smallest. The same call gives the same bits on every run, and a cloud
    has the same in a batch as alone. CPU and GPU may differ in the last bits.

    - Fewer than three finite points in a cloud: normal and curvature are NaN. So are those of a point with NaN or inf,
      which is not a neighbour of others.
    - All nearest points at one place: the normal lies along z, and the curvature is 0.
    - All on a line: the normal is one of the many directions across it, and the curvature is 0 up to rounding.
    - If the normal is at right angles to the direction of the viewpoint, the default decides.
    - Points of which only noise decides whether a normal leans up or down, like those of a wall, may have normals on
      either side of it. A `viewpoint` avoids this.

    A call never waits for the GPU. After a first call it can be captured in a CUDA graph. The GPU needs 8 k bytes of
    workspace for each point.

    References
    ----------
    H. Hoppe et al., Surface reconstruction from unorganized points, SIGGRAPH 1992, section 3.1. M. Pauly et al.,
    Efficient simplification of point-sampled surfaces, IEEE Visualization 2002, has the curvature, there "surface
    variation".

    Examples
    --------
    >>> x, y = np.meshgrid(np.arange(10.0), np.arange(10.0))
    >>> slope = np.stack([x, y, x], axis=-1).reshape(-1, 3)                   # it rises with x
    >>> normals, curvature = gpu3d.normals(slope)
    >>> normals[0, [0, 2]].round(3), bool((curvature < 1e-12).all())
    (array([-0.707,  0.707]), True)
    >>> gpu3d.normals(slope, viewpoint=(0, 0, -100)).normals[0, [0, 2]].round(3)     # seen from below
    array([ 0.707, -0.707])
    """
    if (interop := _arrays.interop_of(points)) is not None:
        return interop.normals(points, k, lengths=lengths, viewpoint=viewpoint)
    given = _arrays.read(points, "points")
    return Normals(*normals_arrays(given, *check_normals(given, k, lengths, viewpoint)))


# ---- checks --------------------------------------------------------------------------------------------------------


class Checked(NamedTuple):
    """The checked options of `normals`."""

    k: int
    lengths: tuple[int, ...]
    viewpoint: tuple[float, float, float] | None


def check_normals(points: Given | Spec, k: Any, lengths: Any, viewpoint: Any) -> Checked:
    """The options of `normals`, checked against the shape and the dtype of the points."""
    _arrays.check_points(points, lengths)  # 2-D points have no normals
    lengths = check_clouds(points, lengths, "points", "lengths")
    k = _arrays.check_integer(k, "k")
    if not reference.MIN_K <= k <= reference.MAX_K:
        raise ValueError(f"k must be from {reference.MIN_K} to {reference.MAX_K}, got {_arrays.shown(k)}.")
    return Checked(k, lengths, check_viewpoint(viewpoint))


def check_viewpoint(viewpoint: Any) -> tuple[float, float, float] | None:
    """Three finite host numbers, or None."""
    if viewpoint is None:
        return None
    numbers = viewpoint.tolist() if isinstance(viewpoint, np.ndarray) else viewpoint
    if not isinstance(numbers, (list, tuple)):
        cure = " Convert by viewpoint.tolist()." if hasattr(viewpoint, "__dlpack__") else ""
        raise TypeError(
            f"viewpoint must be three host numbers, e.g. viewpoint=(0, 0, 0), got {type(viewpoint).__name__}.{cure}"
        )
    if len(numbers) != 3:
        raise ValueError(f"viewpoint must be three numbers, got {_arrays.shown(viewpoint)}.")
    x, y, z = [_arrays.check_number(number, f"viewpoint[{axis}]") for axis, number in enumerate(numbers)]
    if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(z)):
        raise ValueError(f"viewpoint must be finite, got {_arrays.shown(viewpoint)}.")
    return x, y, z


# ---- arrays --------------------------------------------------------------------------------------------------------


def normals_results(points: Given | Spec, count: Any) -> tuple[Spec, Spec]:
    """The specs of normals and curvature of `count` points, which may be a symbol."""
    dtype = FLOAT64 if points.dtype == FLOAT64 else FLOAT32
    return Spec((count, 3), dtype), Spec((count,), dtype)


def normals_arrays(
    points: Given, k: int, lengths: tuple[int, ...], viewpoint: tuple[float, float, float] | None
) -> list[Any]:
    """The arrays normals and curvature, of the points' library."""
    origin = points.origin
    if origin.device is None:
        arrays = reference.normals(packed(points), lengths, k, viewpoint)
        return [_arrays.leave(x, origin) for x in arrays]
    call = cuda.normals(points.spec, lengths, k, viewpoint, launcher.device(origin.device))
    return launcher.launch(call, (points,), normals_results(points, sum(lengths)), origin)
