# SPDX-License-Identifier: Apache-2.0
"""The normals of a LiDAR sweep: what is ground, what is a wall and what is neither, and a picture of the surfaces.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy; it uses no deep-learning framework. The normal and the
curvature of a point come from its 16 nearest points, which are searched exactly. Normals point towards a place above
the sensor, so both sides of a street differ. Pale is what faces up, and grey is what has no surface: leaves, fences,
wires. Otherwise the colour is the direction that a surface faces, seen from above.

    python examples/surface_normals.py                         # the scan that comes with the package
    python examples/surface_normals.py scan.pcd --k 32 --out scan.png
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
from compare_scans import panel
from pooling_levels import GRID, project

import gpu3d

UPRIGHT = 0.9  # of a normal's z: the ground and roofs; walls have less than FLAT
FLAT = 0.3
# A place above the sensor. Not the sensor: the nearest points of a point are often all of one ring, and so in the cone
# of one beam, which goes through the sensor. Then the sensor is on neither side of their surface.
VIEWPOINT = [0.0, 0.0, 5.0]
ROUGH = 0.06  # the curvature from which there is no surface


def main(argv: list[str] | None = None) -> int:
    """Compute the normals, print the table and draw the picture; return the exit code."""
    parser = scan_parser(__doc__, "gpu3d-demo-normals.png")
    parser.add_argument("--k", type=int, default=16, help="points of a surface, 3 to 1024 (default: %(default)s)")
    parser.add_argument(
        "--viewpoint",
        type=float,
        nargs=3,
        default=VIEWPOINT,
        metavar="M",
        help="where normals point (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        points, title, unit = load(arguments.file)
        surface = find(points, arguments.k, arguments.viewpoint, xp)
        print(f"{title}, on {device_name(xp)}")
        print_table(surface, arguments.k)
        draw(surface, arguments.k, title, unit, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


class Surface(NamedTuple):
    """The points of a scan and the surface at each."""

    points: np.ndarray  # float32 [n, 3], relative to the middle of the scan
    normals: np.ndarray  # float32 [n, 3]
    curvature: np.ndarray  # float32 [n]
    milliseconds: float  # time of `normals`


def find(points: np.ndarray, k: int, viewpoint: list[float], xp: Any) -> Surface:
    """The normals, which point towards the viewpoint."""
    middle, _ = spread(points)
    near = xp.asarray((points - middle).astype(np.float32))
    call = partial(gpu3d.normals, near, k, viewpoint=viewpoint - middle)
    (normals, curvature), milliseconds = timed(call, once=xp is np)
    return Surface(to_host(near), to_host(normals), to_host(curvature), milliseconds)


# ---- what is shown -------------------------------------------------------------------------------------------------


def kinds(surface: Surface) -> dict[str, np.ndarray]:
    """Which points are of which kind, bool [n]; every point is of one."""
    rough = ~(surface.curvature < ROUGH)  # NaN too
    z = np.abs(surface.normals[:, 2])
    level, steep = ~rough & (z >= UPRIGHT), ~rough & (z < FLAT)
    return {"level": level, "slanted": ~rough & ~level & ~steep, "upright": steep, "no surface": rough}


def print_table(surface: Surface, k: int) -> None:
    """Print how many points are of each kind, and how long it took."""
    for name, which in kinds(surface).items():
        print(f"{name:<12}{int(which.sum()):>10,}{which.mean():>8.1%}")
    print(f"\n{len(surface.points):,} normals from {k} points each in {surface.milliseconds:.3f} ms")


# ---- the picture ---------------------------------------------------------------------------------------------------

SIZE = 18.0, 11.1  # inches
WIDER = 1.5  # the view in units of `spread`


def colors(surface: Surface) -> np.ndarray:
    """A colour a point, float [n, 3]: hue by the horizontal direction, pale where it faces up, grey if it is rough."""
    from matplotlib.colors import hsv_to_rgb

    x, y, z = np.nan_to_num(surface.normals.T, nan=0)
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    made = hsv_to_rgb(np.stack([hue, np.sqrt(1 - np.clip(z, 0, 1) ** 2), 0.6 + 0.4 * np.abs(z)], axis=-1))
    made[kinds(surface)["no surface"]] = 0.3
    return made


def draw(surface: Surface, k: int, title: str, unit: str, path: Path) -> None:
    """Draw the scan in the colours of its surfaces."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    half = WIDER * spread(surface.points)[1]
    view = panel(figure, (0.008, 0.075, 0.984, 0.845), np.zeros(2), half, GRID)
    order = np.argsort(-surface.points[:, 1])  # what is nearer to the viewer last
    view.scatter(*project(surface.points[order]).T, s=2.2, c=colors(surface)[order], linewidths=0)
    figure.text(0.008, 0.957, "Which way the surfaces of a scan face", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.957, title, color=FAINT, size=13, va="center", ha="right")
    legend = (
        f"Normals from {k} points each. Pale: faces up. Colour: the direction that it faces, seen from above. "
        "Grey: no surface.\n"
        f"The view is {2 * half:.1f}{unit} wide. Seen from the south, 40\N{DEGREE SIGN} above the ground."
    )
    figure.text(0.008, 0.036, legend, color=FAINT, size=12.5, va="center", linespacing=1.5)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    sys.exit(main())
