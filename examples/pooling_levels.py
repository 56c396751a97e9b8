# SPDX-License-Identifier: Apache-2.0
"""A LiDAR sweep pooled three times, and a picture of its levels: which points are merged, and what remains.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy; it uses no deep-learning framework. The points are put into
buckets once. Each pooling returns a cloud that is in buckets already, so the next one neither sorts nor searches again.
The only feature of a point is its height. Pooling takes the mean, and the picture is coloured by it.

    python examples/pooling_levels.py                         # the scan that comes with the package
    python examples/pooling_levels.py scan.pcd --ratio 8 --out scan.png
"""

from __future__ import annotations

import math
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
from scipy.spatial import KDTree

import gpu3d

BUCKET_SIZE = 512
LEVELS = 3
ELEVATION = np.radians(40)  # of the viewpoint


def main(argv: list[str] | None = None) -> int:
    """Pool the scan, print the table and draw the picture; return the exit code."""
    parser = scan_parser(__doc__, "gpu3d-demo-pooling.png")
    parser.add_argument(
        "--ratio", type=int, choices=(2, 4, 8), default=4, help="points that become one point (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        points, title, unit = load(arguments.file)
        levels = pool(points, arguments.ratio, xp)
        print(f"{title}, on {device_name(xp)}")
        print_table(levels, arguments.ratio, unit)
        draw(levels, arguments.ratio, title, unit, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


class Level(NamedTuple):
    """The points of one level without padding, and the groups that become one point of the next level."""

    points: np.ndarray  # [n, 3], relative to the middle of the scan
    heights: np.ndarray  # [n], the pooled feature
    members: np.ndarray  # [points of the next level, ratio], rows of this level; -1 where a group is short
    milliseconds: float  # time of the pooling


def pool(points: np.ndarray, ratio: int, xp: Any) -> list[Level]:
    """The scan and its pooled levels. The last level has no groups."""
    middle, _ = spread(points)
    points = (points - middle).astype(np.float32)
    buckets = gpu3d.bucketize(xp.asarray(points), BUCKET_SIZE)
    in_slots = buckets.scatter(xp.asarray(points))  # here as at every level, near points are near in memory
    features = in_slots[:, 2:]
    levels = []
    for _ in range(LEVELS):
        call = partial(gpu3d.bucket_pool, features, in_slots, buckets, ratio=ratio)
        pooled, milliseconds = timed(call, once=xp is np)
        (n,), (children,) = buckets.lengths, pooled.buckets.lengths
        members = to_host(pooled.members)[:children]
        levels.append(Level(to_host(in_slots)[:n], to_host(features)[:n, 0], members, milliseconds))
        features, in_slots, buckets = pooled.features, pooled.points, pooled.buckets
    (n,) = buckets.lengths
    return [*levels, Level(to_host(in_slots)[:n], to_host(features)[:n, 0], members[:0], 0.0)]


# ---- what is shown -------------------------------------------------------------------------------------------------


def print_table(levels: list[Level], ratio: int, unit: str) -> None:
    """Print one row per level."""
    print(f"{'level':<8}{'points':>10}{'spacing':>11}{'apart':>11}{'times':>9}{'pooled in':>12}")
    for number, level in enumerate(levels):
        near, far = spacing(level.points), apart(level)
        row = f"{number or 'scan':<8}{len(level.points):>10,}{length(near, unit):>11}"
        if len(level.members):
            times = f"{far / near:.1f} x" if near > 0 else "-"
            row += f"{length(far, unit):>11}{times:>9}{f'{level.milliseconds:.3f} ms':>12}"
        print(row)
    print(f"\nspacing: mean distance to the nearest neighbour; apart: between two of {ratio} points that become one")


def length(value: float, unit: str) -> str:
    """A length as text, or a dash if there is none."""
    return "-" if math.isnan(value) else f"{value:.3f}{unit}"


def spacing(points: np.ndarray) -> float:
    """Mean distance to the nearest neighbour; NaN for a single point."""
    return float(KDTree(points).query(points, k=2)[0][:, 1].mean()) if len(points) > 1 else math.nan


def apart(level: Level) -> float:
    """Mean distance between two members of a full group; NaN if there is no full group."""
    groups = level.points[level.members[(level.members >= 0).all(axis=1)]]
    if not len(groups):
        return math.nan
    one, other = np.triu_indices(groups.shape[1], 1)
    return float(np.linalg.norm(groups[:, one] - groups[:, other], axis=2).mean())


# ---- the picture ---------------------------------------------------------------------------------------------------

SIZE = 18.0, 12.4  # inches
WIDTH, HEIGHT = 0.3236, 0.412  # of a panel, as fractions of the figure
PANEL = np.array([1, HEIGHT * SIZE[1] / (WIDTH * SIZE[0])])  # its width and height, in units of its width
GRID, OTHERS = "#252b36", "#3b4453"


def draw(levels: list[Level], ratio: int, title: str, unit: str, path: Path) -> None:
    """Draw each level except the last, and below it a close-up of its groups."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    _, half = spread(levels[0].points)
    place, near = choose_place(levels[0].points), half / 6.5
    corner = project(place) - near * PANEL
    heights = Normalize(*np.percentile(levels[0].heights, [1, 97]), clip=True)
    colors = LinearSegmentedColormap.from_list("height", matplotlib.colormaps["turbo"](np.linspace(0.1, 0.95, 256)))
    paint = ScalarMappable(heights, colors)
    captions = "The scan", f"Pooled once: {ratio} points in one", f"Pooled twice: {ratio**2} points in one"

    figure = Figure(figsize=SIZE, dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    for number, (level, pooled, caption) in enumerate(zip(levels, levels[1:], captions, strict=False)):
        grown = ratio ** (0.8 * number)
        axes = panel(figure, number, 0.502, np.zeros(2), half, GRID)
        order = np.argsort(-level.points[:, 1])  # the nearest is drawn last
        axes.scatter(
            *project(level.points[order]).T, s=1.3 * grown, c=paint.to_rgba(level.heights[order]), linewidths=0
        )
        axes.add_patch(Rectangle(tuple(corner), *2 * near * PANEL, fill=False, color=BRIGHT, lw=1.1))
        axes.set_title(caption, color=BRIGHT, size=14, loc="left", pad=7)
        axes.set_title(f"{len(level.points):,} points", color=FAINT, size=13, loc="right", pad=7)
        axes = panel(figure, number, 0.077, project(place), near, BRIGHT)
        shown = np.linalg.norm(pooled.points - place, axis=1) < 1.2 * near
        draw_groups(axes, level, pooled, shown, paint, grown)

    figure.text(0.008, 0.968, "Pooled inside its buckets", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.968, title, color=FAINT, size=13, va="center", ha="right")
    legend = (
        f"Below: the framed place, {2 * near:.1f}{unit} wide. Lines lead from {ratio} points to the one they become.\n"
        "Colour: height, the feature that is pooled. Seen from the south, 40\N{DEGREE SIGN} above the ground."
    )
    figure.text(0.008, 0.036, legend, color=FAINT, size=12.5, va="center", linespacing=1.5)
    figure.text(0.735, 0.046, f"height,{unit}" if unit else "height", color=FAINT, size=12.5, va="center", ha="right")
    bar = figure.colorbar(paint, figure.add_axes((0.742, 0.041, 0.25, 0.011)), orientation="horizontal")
    bar.ax.tick_params(colors=BRIGHT, labelsize=11)
    bar.outline.set_visible(False)
    figure.savefig(path, format="png")


def panel(figure: Any, column: int, bottom: float, middle: np.ndarray, half: float, color: str) -> Any:
    """Axes centred at `middle` in the plane of the picture, `half` wide to each side."""
    axes = figure.add_axes((0.008 + 0.3302 * column, bottom, WIDTH, HEIGHT))
    low, high = middle - half * PANEL, middle + half * PANEL
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], facecolor=BACKGROUND)
    axes.spines[:].set_color(color)
    return axes


def draw_groups(axes: Any, level: Level, pooled: Level, shown: np.ndarray, paint: Any, grown: float) -> None:
    """Draw the groups whose children are `shown` as stars, and the other points of the level in grey."""
    from matplotlib.collections import LineCollection

    points, children = project(level.points), project(pooled.points)
    filled = (level.members >= 0) & shown[:, None]
    child, member = np.nonzero(filled)[0], level.members[filled]
    axes.scatter(*points.T, s=4 * grown, c=OTHERS, linewidths=0)
    lines = np.stack([points[member], children[child]], axis=1)
    axes.add_collection(LineCollection(lines, colors=paint.to_rgba(pooled.heights[child]), lw=0.8 * grown**0.35))
    axes.scatter(*points[member].T, s=5 * grown**0.7, c=paint.to_rgba(level.heights[member]), lw=0, zorder=3)
    axes.scatter(
        *children[shown].T,
        s=14 * grown**0.75,
        c=paint.to_rgba(pooled.heights[shown]),
        edgecolors=BRIGHT,
        linewidths=0.5 * grown**0.3,
        zorder=4,
    )
    note = f"{len(member):,} points become {np.count_nonzero(shown):,}"
    box = {"facecolor": BACKGROUND, "edgecolor": "none", "alpha": 0.8, "pad": 3}
    axes.text(0.02, 0.025, note, transform=axes.transAxes, color=BRIGHT, size=12, bbox=box)


def project(points: np.ndarray) -> np.ndarray:
    """Project points [..., 3] to the plane of the picture [..., 2]: right is east, and up is north and up."""
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack([x, np.sin(ELEVATION) * y + np.cos(ELEVATION) * z], axis=-1)


def choose_place(points: np.ndarray) -> np.ndarray:
    """The middle of a round object that stands alone in the picture, for example a car."""
    _, unit = spread(points)
    cloud, picture = KDTree(points), KDTree(project(points))
    in_view = np.flatnonzero(np.linalg.norm(project(points), axis=1) <= 0.8 * unit)
    best, place = -1.0, points[0]
    for row in np.random.default_rng(0).permutation(in_view)[:500]:
        middle = points[cloud.query_ball_point(points[row], unit / 8)].mean(axis=0)
        around = points[cloud.query_ball_point(middle, unit / 8)]
        if not len(around):
            continue
        widths = np.linalg.svd(around - around.mean(axis=0), compute_uv=False)
        alone = len(around) / picture.query_ball_point(project(middle), unit / 4, return_length=True)
        score = min(len(around), 300) * alone * widths[-1] / (widths[0] or 1)
        if score > best:
            best, place = score, middle
    return place


if __name__ == "__main__":
    raise SystemExit(main())
