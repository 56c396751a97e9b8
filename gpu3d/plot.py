# SPDX-License-Identifier: Apache-2.0
"""Pictures of point clouds as PNG files, drawn without a display."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gpu3d import _arrays
from gpu3d.io.files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gpu3d.buckets import Buckets

__all__ = ["plot_buckets", "plot_points"]

_BACKGROUND = "#0a0c11"
_BRIGHT = "#e8ecf2"
_FAINT = "#8b95a5"
_MOST_DRAWN = 1_000_000  # points in one panel; more would hide each other and take minutes


def plot_buckets(points: Any, buckets: Buckets, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Draw a cloud from above, coloured by bucket, and write it as a PNG.

    The left panel shows the cloud without its farthest outliers. The right panel shows the middle of the cloud, which
    in a LiDAR sweep is around the sensor. Each bucket has one hue, and the next bucket a very different one. Higher
    points are brighter. No display is needed, and matplotlib's global state is not changed.

    Parameters
    ----------
    points : array [N, 3]
        Finite coordinates, z upwards.
    buckets : Buckets
        The result of ``bucketize`` for these points.
    path : str or path-like
        The PNG file to write. An existing file is replaced, but not before the picture is whole.
    title : str, optional
        Written above the picture, left of the numbers of points and buckets.
    """
    points = _to_numpy(points, "points")
    bucket_of_point = _to_numpy(buckets.point_to_slot, "buckets.point_to_slot") // buckets.bucket_size
    rank = np.empty(len(points))
    rank[_by_height(points)] = np.linspace(0, 1, len(points))
    numbers = f"{len(points):,} points in {buckets.num_buckets:,} buckets of {buckets.bucket_size:,}"
    _write(path, points, _bucket_colors(bucket_of_point, rank), numbers, title)


def plot_points(points: Any, path: str | os.PathLike[str], *, color: Any = None, title: str | None = None) -> None:
    """Draw a cloud from above, coloured by height or by an attribute, and write it as a PNG.

    The panels are those of `plot_buckets`.

    Parameters
    ----------
    points : array [N, 3]
        Finite coordinates, z upwards.
    path : str or path-like
        The PNG file to write. An existing file is replaced, but not before the picture is whole.
    color : array [N] or [N, 3], optional
        Whole numbers of one or two bytes and few values, as labels or rings, get a hue each. Other numbers [N] go from
        blue (the 1st percentile) to yellow (the 99th), and those that are not finite are grey. [N, 3] is red, green and
        blue: floating-point from 0 to 1, or integers up to 255 or, if one is larger, 65535. Default: the height.
    title : str, optional
        Written above the picture, left of the number of points.

    Raises
    ------
    ValueError
        `color` has not one row a point.

    Examples
    --------
    >>> import tempfile
    >>> from gpu3d.plot import plot_points
    >>> points = np.random.default_rng(0).normal(size=(1000, 3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_points(points, f"{folder}/cloud.png", color=points[:, 0], title="by x")
    """
    points = _to_numpy(points, "points")
    values = points[:, 2] if color is None else _to_numpy(color, "color")
    if values.shape not in ((len(points),), (len(points), 1), (len(points), 3)):
        raise ValueError(f"color must have shape [N] or [N, 3] for {len(points)} points, got {list(values.shape)}.")
    _write(path, points, _value_colors(values), f"{len(points):,} points", title)


def _write(
    path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray, numbers: str, title: str | None
) -> None:
    from matplotlib import style

    with style.context("default"), replaced(Path(path)) as stream:  # a matplotlibrc of the user could ask for LaTeX
        _draw_panels(points, colors, numbers, stream, title)


def _by_height(points: np.ndarray) -> np.ndarray:
    return np.argsort(points[:, 2], kind="stable")


def _draw_panels(points: np.ndarray, colors: np.ndarray, numbers: str, stream: BinaryIO, title: str | None) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    order = _by_height(points)  # high points are drawn last
    xy, colors = points[order, :2].astype(np.float64), colors[order]

    center, half = _view(xy)
    middle = np.median(xy, axis=0) if len(xy) else center

    figure = Figure(figsize=(16, 8.6), dpi=100, facecolor=_BACKGROUND)
    FigureCanvasAgg(figure)
    whole = figure.add_axes((0.005, 0.01, 0.4925, 0.916))
    zoomed = figure.add_axes((0.5025, 0.01, 0.4925, 0.916))
    near = half / 3
    _draw(whole, xy, colors, center, half)
    _draw(zoomed, xy, colors, middle, near)
    corner = middle - center - near
    whole.add_patch(Rectangle(tuple(corner), 2 * near, 2 * near, fill=False, color=_BRIGHT, lw=0.9))
    plain: dict[str, Any] = {"va": "center", "parse_math": False}  # a $ in a file's name is a $
    figure.text(0.012, 0.962, numbers if title is None else title, color=_BRIGHT, size=19, **plain)
    if title is not None:
        figure.text(0.988, 0.962, numbers, color=_FAINT, size=15, ha="right", **plain)
    figure.savefig(stream, format="png")


def _bucket_colors(bucket_of_point: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """Colour points: the hue from the bucket, the lightness from ``brightness`` in [0, 1]; RGB [N, 3].

    From bucket to bucket the hue advances by the golden section of the circle, so successive buckets have very
    different hues.
    """
    return _oklch(2 * np.pi * ((bucket_of_point * 0.6180339887498949) % 1), 0.56 + 0.34 * brightness)


_MOST_HUES = 64  # different whole numbers that still are names of things and no measurements


def _value_colors(values: np.ndarray) -> np.ndarray:
    """Colour points by a value or by red, green and blue; RGB [N, 3]."""
    if values.ndim == 2 and values.shape[1] == 3:
        if values.dtype.kind == "f":
            return np.nan_to_num(values.astype(np.float64)).clip(0, 1)
        return values / (65535 if values.size and values.max() > 255 else 255)
    values = values.reshape(-1)
    if values.dtype.kind in "iub" and values.dtype.itemsize <= 2 and len(np.unique(values)) <= _MOST_HUES:
        return _bucket_colors(values.astype(np.int64), np.full(len(values), 0.6))
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = np.percentile(values[finite], [1, 99]) if finite.any() else (0, 1)
    share = ((np.where(finite, values, low) - low) / (high - low if high > low else 1)).clip(0, 1)
    colors = _oklch(4.6 - 2.8 * share, 0.58 + 0.32 * share)
    colors[~finite] = 0.4
    return colors


def _oklch(hue: np.ndarray, lightness: np.ndarray) -> np.ndarray:
    """RGB [N, 3] of a hue in radians and a lightness in [0, 1].

    In OKLCH equal lightness looks equally bright: https://bottosson.github.io/posts/oklab/
    """
    chroma = 0.145
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cone = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=-1,
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cone**3 @ to_rgb.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _view(xy: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and half side of the square that holds the cloud without its farthest outliers."""
    if not len(xy):
        return np.zeros(2), 1.0
    low, high = np.percentile(xy, [2, 98], axis=0)
    half = 0.52 * float(np.max(high - low))
    return (low + high) / 2, half if half > 0 else 1.0


def _draw(axes: Axes, xy: np.ndarray, colors: np.ndarray, center: np.ndarray, half: float) -> None:
    """Draw the points inside a square, in the order given, and a scale bar."""
    inside = np.flatnonzero((np.abs(xy - center) <= half).all(axis=1))
    inside = inside[:: len(inside) // _MOST_DRAWN + 1]
    size = np.clip(1.6 * (100_000 / max(len(inside), 1)) ** 0.8, 0.8, 12)  # fewer points are drawn larger
    axes.set_facecolor(_BACKGROUND)
    # Relative to the centre, because matplotlib's transforms would round large map coordinates.
    x, y = (xy[inside] - center).T
    axes.scatter(x, y, s=size, c=colors[inside], marker="o", linewidths=0)
    axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_color("#252b36")

    power = 10 ** np.floor(np.log10(half / 2))
    bar = power * max(factor for factor in (1, 2, 5) if factor * power <= half / 2)
    left, bottom = -0.93 * half, -0.93 * half
    for color, width in ((_BACKGROUND, 8), (_BRIGHT, 2.5)):
        axes.plot([left, left + bar], [bottom, bottom], color=color, lw=width, solid_capstyle="butt")
    axes.annotate(
        f"{bar:g}",
        (left + bar / 2, bottom),
        xytext=(0, 7),
        textcoords="offset points",
        color=_BRIGHT,
        size=12,
        ha="center",
        bbox={"facecolor": _BACKGROUND, "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )


def _to_numpy(x: Any, name: str) -> np.ndarray:
    return _arrays.download(_arrays.read(x, name))
