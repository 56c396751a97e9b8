# SPDX-License-Identifier: Apache-2.0
"""Two LiDAR sweeps compared: their Chamfer distance both ways, and a picture of what moved between them.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy; it uses no deep-learning framework. For every point of one
scan it searches the exact nearest point in the other, and colours it by that distance. Walls that both scans saw stay
dark; a car that drove off glows. Both scans must be in the same coordinate frame. Two scans of a moving sensor must be
aligned by its poses first.

Without a second scan, the first is compared with a copy of itself that has half the points and is turned by half a
degree about the middle, like an error of the pose. Distances then grow with the distance from the middle.

    python examples/compare_scans.py                         # the scan that comes with the package
    python examples/compare_scans.py before.pcd after.pcd --out changes.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bucket_attention import (
    BACKGROUND,
    BRIGHT,
    FAINT,
    array_library,
    device_name,
    load,
    scan_parser,
    spread,
    timed,
    to_host,
)
from pooling_levels import GRID, project
from scipy.spatial import KDTree

import gpu3d

TURN = np.radians(0.5)  # how far the copy is turned
PERCENTILES = 50, 90, 99, 100


def main(argv: list[str] | None = None) -> int:
    """Compare the scans, print the table and draw the picture; return the exit code."""
    parser = scan_parser(__doc__, "gpu3d-demo-compare.png")
    parser.add_argument(
        "other", nargs="?", metavar="OTHER", type=Path, help="a scan of the same place (default: a turned copy)"
    )
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        points, title, unit = load(arguments.file)
        if arguments.other is None:
            other, title = turned_copy(points), f"{title} and a turned copy"
        else:
            other, other_title, _ = load(arguments.other)
            title = f"{title} and {other_title}"
        comparison = compare(points, other, xp)
        print(f"{title}, on {device_name(xp)}")
        print_table(comparison, unit)
        draw(comparison, title, unit, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


def turned_copy(points: np.ndarray) -> np.ndarray:
    """Every second point, turned about the vertical axis through the middle."""
    middle, _ = spread(points)
    x, y, z = (points[::2].astype(np.float64) - middle).T
    turned = np.cos(TURN) * x - np.sin(TURN) * y, np.sin(TURN) * x + np.cos(TURN) * y, z
    return np.stack(turned, axis=1) + middle


class Side(NamedTuple):
    """One scan, and the distance of each of its points to the other scan."""

    points: np.ndarray  # float32 [n, 3], relative to the middle of the first scan
    distances: np.ndarray  # float32 [n]
    milliseconds: float  # time of the search


class Comparison(NamedTuple):
    """Both scans, and their Chamfer distance: the sum of the mean distances of both sides."""

    sides: tuple[Side, Side]
    chamfer: float
    milliseconds: float  # time of `chamfer` alone, which does its own search


def compare(points: np.ndarray, other: np.ndarray, xp: Any) -> Comparison:
    """Search the nearest neighbours both ways, and compute the Chamfer distance."""
    middle, _ = spread(points)  # subtracted from both scans, so that float32 is enough for map coordinates
    scans = [xp.asarray((scan - middle).astype(np.float32)) for scan in (points, other)]
    sides = []
    for query, target in (scans, scans[::-1]):
        (distances, _), milliseconds = timed(partial(gpu3d.knn, query, target, 1), once=xp is np)
        sides.append(Side(to_host(query), to_host(distances)[:, 0], milliseconds))
    chamfer, milliseconds = timed(partial(gpu3d.chamfer, *scans), once=xp is np)
    return Comparison((sides[0], sides[1]), float(chamfer), milliseconds)


# ---- what is shown -------------------------------------------------------------------------------------------------


def print_table(comparison: Comparison, unit: str) -> None:
    """Print one row per direction, and the Chamfer distance."""
    heads = "".join(f"{'farthest' if percent == 100 else f'{percent} %':>10}" for percent in PERCENTILES)
    print(f"{'distances':<15}{'points':>10}{'mean':>10}{heads}{'found in':>14}")
    for name, side in zip(("first to second", "second to first"), comparison.sides, strict=True):
        values = side.distances.mean(dtype=np.float64), *np.percentile(side.distances, PERCENTILES)
        cells = "".join(f"{f'{value:.3f}{unit}':>10}" for value in values)
        print(f"{name:<15}{len(side.points):>10,}{cells}{f'{side.milliseconds:.3f} ms':>14}")
    print(f"\nChamfer distance, the sum of both means: {comparison.chamfer:.4f}{unit}, ", end="")
    print(f"by itself in {comparison.milliseconds:.3f} ms")


# ---- the picture ---------------------------------------------------------------------------------------------------

SIZE = 18.0, 11.1  # inches
OTHER = "#525e72"
STOPS = "#27466a", "#2b7fa8", "#3fc9b0", "#f2dc5d", "#ff8a1f", "#ff3b4e"  # colours from near to far
BOX = {"facecolor": BACKGROUND, "edgecolor": "none", "alpha": 0.8, "pad": 3}  # behind text, to keep it legible
WIDER, CLOSER = 1.5, 6.0  # the view in units of `spread`, and the magnification of the close-ups


def draw(comparison: Comparison, title: str, unit: str, path: Path) -> None:
    """Draw the first scan coloured by distance to the second, and close-ups of what only one scan has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    first, second = comparison.sides
    half = WIDER * spread(first.points)[1]
    near = half / CLOSER
    paint = ScalarMappable(
        LogNorm(*limits(comparison), clip=True), LinearSegmentedColormap.from_list("distance", STOPS)
    )

    figure = Figure(figsize=SIZE, dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    view = panel(figure, (0.008, 0.075, 0.655, 0.845), np.zeros(2), half, GRID)
    draw_side(view, first, paint, 1.8)
    for number, side, other, caption in (
        (1, first, second, "The first scan in colour, the second in grey"),
        (2, second, first, "The second scan in colour, the first in grey"),
    ):
        place = project(choose_place(side, near))
        closer = panel(figure, (0.671, 0.93 - 0.4275 * number, 0.321, 0.4175), place, near, BRIGHT)
        closer.scatter(*project(other.points).T, s=5, c=OTHER, linewidths=0)
        draw_side(closer, side, paint, 8)
        write(closer, 0.022, 0.955, f"{number}  {caption}", va="top")
        (left, right), (bottom, top) = closer.get_xlim(), closer.get_ylim()
        view.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, color=BRIGHT, lw=1.3))
        view.annotate(f"{number}", (left, top), (1, 9), textcoords="offset points", color=BRIGHT, size=13, bbox=BOX)
    draw_histogram(figure, first, second, paint, unit)
    there, back = (f"{side.distances.mean(dtype=np.float64):.4f}{unit}" for side in comparison.sides)
    write(view, 0.012, 0.018, f"Chamfer distance {comparison.chamfer:.4f}{unit} = {there} there + {back} back")

    figure.text(0.008, 0.957, "How far apart two scans are", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.957, title, color=FAINT, size=13, va="center", ha="right")
    legend = (
        "Colour: distance to the nearest point of the other scan; the white line counts those of the second scan.\n"
        f"Frames 1 and 2: {2 * near:.1f}{unit} wide. Seen from the south, 40\N{DEGREE SIGN} above the ground."
    )
    figure.text(0.008, 0.036, legend, color=FAINT, size=12.5, va="center", linespacing=1.5)
    figure.savefig(path, format="png")


def limits(comparison: Comparison) -> tuple[float, float]:
    """The distances at which the colours begin and end: percentiles of those that are not 0."""
    distances = np.concatenate([side.distances for side in comparison.sides])
    distances = distances[distances > 0]
    if not len(distances):
        return 0.1, 1.0
    low, high = np.percentile(distances, [1, 99.7])
    return float(low), max(float(high), 1.1 * float(low))


def panel(figure: Any, place: tuple[float, ...], middle: np.ndarray, half: float, color: str) -> Any:
    """Axes centred at `middle` in the plane of the picture, `half` wide to each side."""
    axes = figure.add_axes(place)
    reach = half * np.array([1, place[3] * SIZE[1] / (place[2] * SIZE[0])])
    (left, bottom), (right, top) = middle - reach, middle + reach
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], facecolor=BACKGROUND)
    axes.spines[:].set_color(color)
    return axes


def draw_side(axes: Any, side: Side, paint: Any, size: float) -> None:
    """Draw the points of a scan in order of distance, the farthest last."""
    order = np.argsort(side.distances)
    axes.scatter(*project(side.points[order]).T, s=size, c=paint.to_rgba(side.distances[order]), linewidths=0)


def write(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write text in a panel, legible over points."""
    axes.text(x, y, text, transform=axes.transAxes, color=BRIGHT, size=12, bbox=BOX, **options)


def draw_histogram(figure: Any, first: Side, second: Side, paint: Any, unit: str) -> None:
    """Draw a histogram of the distances in the colours of the picture, which is its legend too."""
    back = figure.add_axes((0.0085, 0.7295, 0.206, 0.19), facecolor=BACKGROUND, xticks=[], yticks=[])
    back.spines[:].set_color(GRID)
    axes = back.inset_axes((0.07, 0.27, 0.86, 0.67), facecolor=BACKGROUND)
    edges = np.geomspace(paint.norm.vmin, paint.norm.vmax, 61)
    colors = paint.to_rgba(np.sqrt(edges[1:] * edges[:-1]))
    shares = [np.histogram(side.distances, edges)[0] / len(side.points) for side in (first, second)]
    axes.bar(edges[:-1], shares[0], np.diff(edges), align="edge", color=colors)
    axes.stairs(shares[1], edges, color=BRIGHT, lw=1)
    axes.set(xscale="log", xlim=(edges[0], edges[-1]), yticks=[])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.tick_params(which="both", colors=BRIGHT, labelsize=11)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"distance,{unit}" if unit else "distance", color=FAINT, size=12, labelpad=1)


def choose_place(side: Side, near: float) -> np.ndarray:
    """The place in view where a scan has the most points that the other scan lacks."""
    inside = np.abs(project(side.points)).max(axis=1) < 0.6 * CLOSER * near
    distances = np.where(inside, side.distances, 0)
    far = side.points[distances >= np.percentile(distances, 95)]
    candidates = np.random.default_rng(0).permutation(far)[:1000]
    return candidates[np.argmax(KDTree(far).query_ball_point(candidates, near / 3, return_length=True))]


if __name__ == "__main__":
    raise SystemExit(main())
