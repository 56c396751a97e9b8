# SPDX-License-Identifier: Apache-2.0
"""Metrics of pairs of clouds, from one search for the nearest points."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import Given, Spec
from gpu3d.chamfer import inputs_of, nearest_on_the_host
from gpu3d.cuda import launcher
from gpu3d.cuda import metrics as cuda
from gpu3d.neighbors import (
    Clouds,
    NeighborIndex,
    check_clouds,
    check_no_empty_cloud,
    check_pair,
    distance_dtype,
    read_points,
)
from gpu3d.reference import metrics as reference


class CloudComparison(NamedTuple):
    """The metrics of B pairs of clouds at T thresholds; the result of `compare_clouds`.

    All are float64 if x or y is float64, and float32 otherwise.
    """

    chamfer: Any  # [B]
    chamfer_squared: Any  # [B]
    hausdorff: Any  # [B]
    hausdorff_95: Any  # [B]
    precision: Any  # [B, T]
    recall: Any  # [B, T]
    fscore: Any  # [B, T]
    density_aware_chamfer: Any  # [B]


def compare_clouds(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    thresholds: Sequence[float] = (),
) -> CloudComparison:
    """The usual metrics of clouds x, for example predictions, against clouds y, all from one search.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        Coordinates: float32, float64, float16 or bfloat16, on one device. Both have the same number of clouds, and no
        cloud is empty.
    x_lengths, y_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud. With a NeighborIndex they are left out.
    thresholds : sequence of float
        Distances for precision, recall and F-score, in the unit of the points: up to 64 host numbers, not negative.

    Returns
    -------
    CloudComparison
        Arrays of the library of x: [B], and [B, T] for precision, recall and fscore. They are float64 if x or y is
        float64, and float32 otherwise.

        - ``chamfer`` and ``chamfer_squared``: what `chamfer` gives with reduction "none".
        - ``hausdorff``: the largest distance from a point of either cloud to the nearest of the other.
        - ``hausdorff_95``: the larger of the 95th percentiles of both directions, linear between two ranks.
        - ``precision``: the share of x's points within the threshold of a point of y.
        - ``recall``: the share of y's points within the threshold of a point of x.
        - ``fscore``: 2 * precision * recall / (precision + recall), and 0 if both are 0.
        - ``density_aware_chamfer``: see the notes. From 0 for equal clouds to 1 for distant ones.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above, or a tensor requires grad; the message says what was received and the
        cure.

    Notes
    -----
    Distances are those of `chamfer`, and a threshold is rounded to their dtype. Every metric but the density-aware one
    has the same bits on CPU and GPU; that one differs by less than 1e-6, because exp is rounded differently. The same
    call gives the same bits. A point with NaN or inf is within no threshold, and makes the other metrics of its pair
    NaN.

    For x with n and y with m points, the density-aware distance is the mean of two directions. That from x is the mean
    over its points i of 1 - exp(-1000 d_i^2) (n / m) / c_i. d_i is the distance to the nearest point of y, and c_i the
    number of points of x with this nearest point. The factor 1000 is meant for shapes of about unit size. As the
    official code, without the 1e-6 that it adds to c_i.

    The metrics have no gradients. A call never waits for the GPU. After a first call it can be captured in a CUDA
    graph.

    References
    ----------
    Density-aware Chamfer Distance as a Comprehensive Metric for Point Cloud Completion, arXiv:2111.12702.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[0, 0, 0], [1, 0, 3], [1, 0, 0]], np.float32)
    >>> found = gpu3d.compare_clouds(x, y, thresholds=(0.5, 4))
    >>> found.chamfer, found.hausdorff
    (array([1.], dtype=float32), array([3.], dtype=float32))
    >>> found.recall
    array([[0.6666667, 1.       ]], dtype=float32)
    """
    if (interop := _arrays.interop_of(x, y)) is not None:
        lengths: dict[str, Any] = {"x_lengths": x_lengths, "y_lengths": y_lengths}
        return interop.compare_clouds(x, y, thresholds=thresholds, **lengths)
    return plain_compare_clouds(x, y, x_lengths, y_lengths, thresholds)


def plain_compare_clouds(x: Any, y: Any, x_lengths: Any, y_lengths: Any, thresholds: Any) -> CloudComparison:
    """`compare_clouds` of arrays and indices of any library, outside of programs."""
    given_x, given_y = read_points(x, "x"), read_points(y, "y")
    checked = check_compare_clouds(given_x, given_y, x_lengths, y_lengths, thresholds)
    return CloudComparison(*compare_clouds_arrays(given_x, given_y, *checked))


class Compare(NamedTuple):
    """The checked options of `compare_clouds`."""

    x_lengths: tuple[int, ...]
    y_lengths: tuple[int, ...]
    thresholds: tuple[float, ...]


def check_compare_clouds(x: Clouds, y: Clouds, x_lengths: Any, y_lengths: Any, thresholds: Any) -> Compare:
    """The options of `compare_clouds`, checked against the shapes and dtypes of the arrays."""
    x_lengths = check_clouds(x, x_lengths, "x", "x_lengths")
    y_lengths = check_clouds(y, y_lengths, "y", "y_lengths")
    check_pair(x, "x", x_lengths, y, "y", y_lengths)
    check_no_empty_cloud(x_lengths, "x")
    check_no_empty_cloud(y_lengths, "y")
    return Compare(x_lengths, y_lengths, check_thresholds(thresholds))


def check_thresholds(thresholds: Any) -> tuple[float, ...]:
    """The thresholds as floats."""
    if isinstance(thresholds, np.ndarray) and thresholds.ndim == 1:
        thresholds = thresholds.tolist()
    if not isinstance(thresholds, (list, tuple)):
        raise TypeError(f"thresholds must be a sequence of numbers, e.g. (0.01,), got {_arrays.shown(thresholds)}.")
    if len(thresholds) > reference.MAX_THRESHOLDS:
        raise ValueError(
            f"thresholds must be at most {reference.MAX_THRESHOLDS}, got {len(thresholds)}: compare in several calls."
        )
    values = tuple([_arrays.check_number(t, f"thresholds[{i}]") for i, t in enumerate(thresholds)])
    for i, value in enumerate(values):
        if not value >= 0:
            raise ValueError(f"thresholds must not be negative or NaN, got thresholds[{i}] = {value}.")
    return values


def compare_clouds_results(clouds: Any, thresholds: int, dtype: np.dtype) -> tuple[Spec, ...]:
    """The specs of the fields of CloudComparison in this dtype; the number of clouds may be a symbol."""
    each, shares = Spec((clouds,), dtype), Spec((clouds, thresholds), dtype)
    return each, each, each, each, shares, shares, shares, each


_kept_results = functools.lru_cache(maxsize=256)(compare_clouds_results)  # for numbers of clouds that are ints


def compare_clouds_arrays(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    thresholds: tuple[float, ...],
) -> list[Any]:
    """The fields of CloudComparison, of x's library."""
    origin = x.origin
    if origin.device is None:
        of_x, of_y = nearest_on_the_host(x, y, x_lengths, y_lengths, "both")
        assert of_x is not None and of_y is not None
        made = reference.compare_clouds(of_x, x_lengths, of_y, y_lengths, thresholds)
        return [_arrays.leave(z, origin) for z in made]
    points, inputs, indexed = inputs_of(x, y)
    device = launcher.device(origin.device)
    call = cuda.compare_clouds(points[0].spec, x_lengths, points[1].spec, y_lengths, thresholds, device, **indexed)
    return launcher.launch(call, inputs, _kept_results(len(x_lengths), len(thresholds), distance_dtype(x, y)))
