# SPDX-License-Identifier: Apache-2.0
"""Three ways to fewer points: at random, one per voxel, and farthest points; what each keeps of a scan, and a picture.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy; it uses no deep-learning framework. All three keep as many
points as the scan has voxels. `compare_clouds` measures what is lost: how far points of the scan are from the nearest
point that was kept.

    python examples/fewer_points.py                          # the scan that comes with the package
    python examples/fewer_points.py scan.pcd --voxel 0.5 --out scan.png
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
from compare_scans import BOX, panel
from pooling_levels import GRID, project

import gpu3d

VOXELS = 12  # default edge of a voxel: the `spread` of the scan over this


def main(argv: list[str] | None = None) -> int:
    """Reduce the scan three times, print the table and draw the picture; return the exit code."""
    parser = scan_parser(__doc__, "gpu3d-demo-fewer.png")
    parser.add_argument("--voxel", type=float, help=f"edge of a voxel (default: a {VOXELS}th of the scan's spread)")
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        points, title, unit = load(arguments.file)
        middle, size = spread(points)
        voxel = size / VOXELS if arguments.voxel is None else arguments.voxel
        near = (points - middle).astype(np.float32)
        found = reduce(xp.asarray(near), voxel, xp)
        print(f"{title}, {len(near):,} points, voxels of {voxel:.2f}{unit}, on {device_name(xp)}")
        print_table(found, voxel, unit)
        draw(near, found, voxel, title, unit, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


class Reduced(NamedTuple):
    """The points that one way keeps, and how well they stand for the scan."""

    name: str
    points: np.ndarray  # float32 [kept, 3]
    mean: float  # distance from a point of the scan to the nearest that was kept
    largest: float
    near: float  # share of the scan within half a voxel of a point that was kept
    milliseconds: float


def reduce(points: Any, voxel: float, xp: Any) -> list[Reduced]:
    """The scan reduced in each way to the same number of points."""
    voxels, of_voxels = timed(partial(gpu3d.voxel_downsample, points, voxel), once=xp is np)
    count = len(voxels.points)

    def drawn() -> Any:
        return points[xp.asarray(np.random.default_rng(0).permutation(len(points))[:count])]

    def farthest() -> Any:
        return points[gpu3d.farthest_points(points, count)]

    kept = [("at random", *timed(drawn, once=True)), ("one per voxel", voxels.points, of_voxels)]
    kept.append(("farthest points", *timed(farthest, once=True)))
    return [measured(points, name, chosen, voxel, took) for name, chosen, took in kept]


def measured(points: Any, name: str, chosen: Any, voxel: float, milliseconds: float) -> Reduced:
    """How far the scan is from the points that were kept."""
    found = gpu3d.compare_clouds(points, chosen, thresholds=(voxel / 2,))
    distances = to_host(gpu3d.chamfer(points, chosen, reduction="points", direction="x_to_y").x)
    share = float(to_host(found.precision)[0, 0])
    return Reduced(name, to_host(chosen), float(distances.mean()), float(distances.max()), share, milliseconds)


def print_table(found: list[Reduced], voxel: float, unit: str) -> None:
    """Print what each way keeps, and how long it took."""
    print(f"{'':<17}{'points':>8}{'mean gap':>11}{'largest':>10}{f'within {voxel / 2:.2f}{unit}':>17}{'time':>12}")
    for way in found:
        gaps = f"{way.mean:>10.3f}{unit}{way.largest:>9.2f}{unit}"
        print(f"{way.name:<17}{len(way.points):>8,}{gaps}{way.near:>16.1%}{way.milliseconds:>10.2f} ms")


# ---- the picture ---------------------------------------------------------------------------------------------------

SIZE = 18.0, 11.1  # inches, as in compare_scans.panel
WIDER = 1.4  # the view in units of `spread`
KEPT = "#ffd166"


def draw(points: np.ndarray, found: list[Reduced], voxel: float, title: str, unit: str, path: Path) -> None:
    """Draw the scan, and beside it what each way keeps of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    half = WIDER * spread(points)[1]
    shown = [(f"the scan: {len(points):,} points", points, 0.6)]
    for way in found:
        near = f"{way.near:.0%} of the scan within {voxel / 2:.2f}{unit} of one"
        shown.append((f"{way.name}: {len(way.points):,} points, {near}", way.points, 5))
    for place, (label, kept, size) in enumerate(shown):
        left, bottom = 0.008 + 0.495 * (place % 2), 0.47 - 0.46 * (place // 2)
        view = panel(figure, (left, bottom, 0.489, 0.45), np.zeros(2), half, GRID)
        view.scatter(*project(kept).T, s=size, c=FAINT if place == 0 else KEPT, linewidths=0)
        view.text(0.015, 0.955, label, transform=view.transAxes, color=BRIGHT, size=13, va="center", bbox=BOX)
    figure.text(0.008, 0.957, "Three ways to fewer points", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.957, title, color=FAINT, size=13, va="center", ha="right")
    figure.savefig(path, format="png")


if __name__ == "__main__":
    sys.exit(main())
