# SPDX-License-Identifier: Apache-2.0
"""What APML's threshold saves and what it costs: pairs, memory and error against the dense plan, with a picture.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy; it uses no deep-learning framework. Each cloud is matched in
two ways: two samples of it that share no point, and one sample with a copy of itself that has noise of a quarter of its
spacing. docs/apml.md calls these "independent" and "matched", and derives the bounds. Thresholds go from 1e-2 to 1e-14.
The dense plan keeps every pair. It comes from the NumPy reference with threshold 0, in float64, so samples are small.

The clouds are a sphere, a torus, a made-up terrain with houses and trees, and the sweep that comes with gpu3d or a scan
of yours. --data adds real shapes, sweeps and airborne scans.

    python examples/threshold_study.py                         # the scan that comes with the package
    python examples/threshold_study.py scan.pcd --out study.png
    python examples/threshold_study.py --data ../shared/data
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bucket_attention import BACKGROUND, BRIGHT, FAINT, array_library, device_name, load, scan_parser, spread, to_host
from compare_scans import BOX
from pooling_levels import GRID, project, spacing

import gpu3d
from gpu3d.reference import transport as reference

THRESHOLDS = tuple(10.0**-power for power in range(2, 15))
USUAL = 1e-8  # the threshold at which iterations and densities are compared
P_MIN, ITERATIONS = 0.8, 20
STEPS = (1, 2, 3, 5, 10, 20, 40)  # iterations of Sinkhorn
PARTS = (8, 4, 2, 1)  # sparser samples have this fraction of the points: an eighth, a quarter, ...
NOISE = 0.25  # in units of the spacing
MATCHINGS = ("two samples", "itself and noise")


def main(argv: list[str] | None = None) -> int:
    """Study every cloud, print the tables and draw the picture; return the exit code."""
    parser = scan_parser(__doc__, "gpu3d-demo-threshold.png")
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="adds real shapes, sweeps and airborne scans")
    parser.add_argument("--points", metavar="N", type=int, default=1000, help="points a sample (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        clouds = [*made_up(), sweep(arguments.file), *(real(arguments.data) if arguments.data else ())]
        print(f"p_min {P_MIN}, {ITERATIONS} iterations, on {device_name(xp)}")
        studies = []
        for name, points in clouds:
            studies.append(study(name, points, arguments.points, xp))
            print_study(studies[-1])
        print(NOTES)
        draw(studies, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


# ---- clouds --------------------------------------------------------------------------------------------------------


def made_up() -> Iterator[tuple[str, np.ndarray]]:
    """Made-up clouds: two shapes, and a terrain as a laser scanner in an aircraft sees it."""
    rng = np.random.default_rng(0)
    sphere = rng.standard_normal((20_000, 3))
    yield "sphere", sphere / np.linalg.norm(sphere, axis=1, keepdims=True)
    around, tube = 2 * np.pi * rng.random((2, 20_000))
    ring = 1 + 0.4 * np.cos(tube)
    torus = np.stack([ring * np.cos(around), ring * np.sin(around), 0.4 * np.sin(tube)], axis=1)
    yield "torus", torus[rng.random(20_000) < ring / 1.4]  # the same density inside and outside
    yield "terrain", terrain(rng)


def terrain(rng: np.random.Generator) -> np.ndarray:
    """200 m of hills with houses and trees: a point every 0.7 m along tracks that are 1.2 m apart."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, 200, 0.7), np.arange(0, 200, 1.2)))
    x, y = (axis + rng.normal(0, 0.15, x.shape) for axis in (x, y))
    z = 6 * np.sin(x / 37) * np.cos(y / 51) + 2 * np.sin((x + y) / 17)
    for east, north, height in zip(*rng.random((2, 25)) * 180, rng.random(25) * 5 + 4, strict=True):
        roof = (np.abs(x - east) < 6) & (np.abs(y - north) < 9)
        z[roof] = z[roof].mean() + height - 0.3 * np.abs(x[roof] - east) if roof.any() else 0
    for east, north, size in zip(*rng.random((2, 150)) * 200, rng.random(150) * 3 + 2, strict=True):
        crown = np.hypot(x - east, y - north) < size
        z[crown] += rng.random(np.count_nonzero(crown)) * 3 * size
    return np.stack([x, y, z + rng.normal(0, 0.03, z.shape)], axis=1)


def sweep(file: Path | None) -> tuple[str, np.ndarray]:
    """A scan, or the one that comes with the package."""
    points, title, _ = load(file)
    return ("PandaSet sweep" if file is None else title), points


def real(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Two shapes, two sweeps and the airborne scans in whole units, as far as the folder has them."""
    for path in sorted(folder.glob("shapes/punet*.npz")):
        with np.load(path, allow_pickle=False) as shapes:
            for name in ("elephant", "chair"):
                yield name, shapes["points"][list(shapes["names"]).index(name)]
    for path in sorted(folder.glob("lidar_raw/kitti_object*.npz"))[:1]:
        with np.load(path, allow_pickle=False) as scan:
            yield "KITTI sweep", scan["xyz_mm"].T / 1000
    for path in sorted(folder.glob("lidar_rellis3d/*.npz"))[:1]:
        with np.load(path, allow_pickle=False) as scan:
            yield "RELLIS sweep", scan["xyz"].T
    for path in sorted(folder.glob("aerial/*.npz")):
        with np.load(path, allow_pickle=False) as scan:
            if "xyz_int" in scan:
                yield path.stem, scan["xyz_int"].T * scan["scale"] + scan["offset"]


def samples(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Two samples float32 [count, 3] without a common point, relative to one origin."""
    points = np.unique(points, axis=0)
    count = min(count, len(points) // 2)
    if count < 8:
        raise ValueError(f"two samples need at least 16 different points, got {len(points)}")
    chosen = points[np.random.default_rng(0).permutation(len(points))[: 2 * count]].astype(np.float64)
    chosen = (chosen - chosen.min(axis=0)).astype(np.float32)
    return chosen[:count], chosen[count:]


# ---- what a threshold does -----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What was measured for one threshold."""

    threshold: float
    pairs: float  # kept pairs per row
    memory: float  # peak bytes of a call, per point of both clouds
    dropped: float  # the largest share of a row or a column that is dropped, before Sinkhorn
    dropped_bound: float
    plan: float  # L1 distance to the dense plan, divided by its mass
    plan_bound: float
    loss: float  # relative error
    gradient: float  # relative error of the gradient of pred, in the 2-norm


class Matching(NamedTuple):
    """A cloud matched in one of two ways."""

    found: list[Found]  # by threshold
    by_steps: list[float]  # gradient error at the usual threshold
    by_spacing: list[float]  # the same for sparser samples


class Study(NamedTuple):
    """The results for one cloud."""

    name: str
    target: np.ndarray  # float32 [n, 3]
    spacings: list[float]  # of the samples, from sparse to dense
    matchings: list[Matching]  # in the order of MATCHINGS


def study(name: str, points: np.ndarray, count: int, xp: Any) -> Study:
    """Measure every threshold, number of iterations and density, matched in both ways."""
    pairs = [pair_up(*samples(points, count // part)) for part in PARTS]  # [density][matching]
    usual = partial(compare, xp=xp, thresholds=(USUAL,))
    matchings = []
    for number, pair in enumerate(pairs[-1]):
        matchings.append(
            Matching(
                list(compare(*pair, xp=xp, thresholds=THRESHOLDS)),
                [found.gradient for steps in STEPS for found in usual(*pair, iterations=steps)],
                [found.gradient for of_density in pairs for found in usual(*of_density[number])],
            )
        )
    spacings = [spacing(of_density[0][1]) for of_density in pairs]
    return Study(name, pairs[-1][0][1], spacings, matchings)


def pair_up(one: np.ndarray, other: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """A prediction and a target for each of MATCHINGS."""
    noise = np.random.default_rng(0).normal(0, NOISE * spacing(other), other.shape)
    return [(one, other), (other + noise.astype(np.float32), other)]


def compare(
    pred: np.ndarray, target: np.ndarray, xp: Any, thresholds: Sequence[float], iterations: int = ITERATIONS
) -> Iterator[Found]:
    """Compare the sparse plan, loss and gradient with the dense ones."""
    exact = reference.dense(pred, target, reference.Options(P_MIN, 0, iterations, "mean"))
    arrays = xp.asarray(pred), xp.asarray(target)
    for threshold, bounded in zip(thresholds, bounds(pred, target, thresholds, iterations), strict=True):
        options = {"p_min": P_MIN, "threshold": threshold, "iterations": iterations}
        plan = gpu3d.apml_plan(*arrays, **options, max_entries=2 * exact.plan.size)
        rows, cols, values = (to_host(part) for part in plan[:3])
        room = 2 * len(rows)  # a pair has at most two entries
        call = partial(gpu3d.apml_value_and_grad, *arrays, **options, max_entries=room)
        loss, (dpred, _) = call()
        off = exact.plan.copy()
        off[rows, cols] -= values
        yield Found(
            threshold,
            len(rows) / len(pred),
            peak_bytes(call, xp) / (len(pred) + len(target)),
            *bounded[:2],
            float(np.abs(off).sum() / exact.plan.sum()),
            bounded[2],
            abs(float(loss) / float(exact.loss) - 1),
            float(np.linalg.norm(to_host(dpred) - exact.dpred) / np.linalg.norm(exact.dpred)),
        )


def bounds(
    pred: np.ndarray, target: np.ndarray, thresholds: Sequence[float], iterations: int
) -> Iterator[tuple[float, float, float]]:
    """The share dropped before Sinkhorn, its bound, and the bound on the distance of the plans; see docs/apml.md."""
    x, y = pred.astype(np.float64), target.astype(np.float64)
    c = np.sqrt(reference.squared_distances(x[:, None], y))
    of_rows, of_columns = choices(c), choices(c.T).T
    dense = (of_rows + of_columns) / 2
    for threshold in thresholds:
        from_rows, from_columns = (
            np.where(side > threshold * side.max(axis=axis, keepdims=True), 0, side)
            for side, axis in ((of_rows, 1), (of_columns, 0))
        )
        share = float(max(from_rows.sum(axis=1).max(), from_columns.sum(axis=0).max()))
        most = max(np.count_nonzero(from_rows, axis=1).max(), np.count_nonzero(from_columns, axis=0).max())
        dropped = (from_rows + from_columns) / 2
        u, v, grown = np.ones(len(x)), np.ones(len(y)), 0.0
        for _ in range(iterations):
            sums = dense @ v
            grown -= 2 * log_rest(max(share, (dropped @ v / sums).max()))
            u /= u * sums + reference.EPSILON
            sums = u @ dense
            grown -= 2 * log_rest(max(share, (u @ dropped / sums).max()))
            v /= v * sums + reference.EPSILON
        apart = np.expm1(min(grown, 9.0)) + u @ dropped @ v / (u @ dense @ v)
        yield share, float(most * threshold), min(float(apart), 2.0)  # no two plans are farther apart than 2


def choices(c: np.ndarray) -> np.ndarray:
    """The weights of each row without a threshold, float64: P1 of `gpu3d.apml`."""
    d1, d2 = np.partition(c, 1, axis=1)[:, :2].T[..., None]
    k = np.exp((d1 - c) * (reference.log_mass(c.shape[1], P_MIN) / np.maximum(d2 - d1, reference.GAP)))
    return k / k.sum(axis=1, keepdims=True)


def log_rest(share: float) -> float:
    """The logarithm of 1 - share, kept finite."""
    return float(np.log1p(-min(share, 1 - 1e-9)))


def peak_bytes(call: Callable[[], Any], xp: Any) -> int:
    """Peak bytes of a call, of NumPy's arrays or of CuPy's pool."""
    if xp is np:
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    call()
    return pool.total_bytes() - before


# ---- what is shown -------------------------------------------------------------------------------------------------

NOTES = """
pairs: kept per row; bytes: peak of a call, per point of both clouds; dropped: the largest share of a row or column that
is dropped before Sinkhorn; plan: L1 distance to the dense plan, divided by its mass (at most 2); loss, gradient:
relative errors"""


def print_study(study: Study) -> None:
    """Print one row for every second threshold, for both matchings."""
    n = len(study.target)
    print(f"\n{study.name}: samples of {n:,} points, {study.spacings[-1]:.3g} apart")
    columns = ("threshold", "pairs", "bytes", "dropped", "at most", "plan", "at most", "loss", "gradient")
    for name, matching in zip(MATCHINGS, study.matchings, strict=True):
        print(f"{name:<16}" + "".join(f"{column:>10}" for column in columns))
        for found in matching.found[::2]:
            threshold, pairs, memory, *rest = found
            cells = f"{threshold:.0e}", f"{pairs:.2f}", f"{memory:,.0f}", *(f"{value:.1e}" for value in rest)
            print(" " * 16 + "".join(f"{cell:>10}" for cell in cells))
        for what, values, errors in (
            ("iterations", STEPS, matching.by_steps),
            ("spacing", study.spacings, matching.by_spacing),
        ):
            cells = ", ".join(f"{value:.3g}: {error:.1e}" for value, error in zip(values, errors, strict=True))
            print(f"{'':<18}gradient at {USUAL:.0e} by {what}: {cells}")


# ---- the picture ---------------------------------------------------------------------------------------------------

SIZE = 18.0, 13.6  # inches
COLORS = "#4dd2ff", "#ff9f45", "#7ee081", "#ff6b8b", "#c8a2ff", "#ffe066", "#5fe0c5", "#ff8ad8", "#9fb4ff", "#d0d5dd"
DASHED = (0, (4, 1.6))


def draw(studies: list[Study], path: Path) -> None:
    """Draw the clouds, and below them what a threshold saves and costs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    draw_clouds(figure, studies)
    n = len(studies[0].target)
    plots = [plot(figure, place) for place in range(8)]
    for number, study in enumerate(studies):
        for matching, line in zip(study.matchings, ("-", DASHED), strict=True):
            style = {"color": COLORS[number % len(COLORS)], "ls": line, "lw": 1.8}
            columns = Found(*np.array(matching.found).T)
            for axes, values in zip(
                plots,
                (columns.pairs, columns.memory, columns.dropped, columns.plan, columns.loss, columns.gradient),
                strict=False,
            ):
                axes.plot(columns.threshold, values if axes is plots[2] else np.maximum(values, FLOOR), **style)
            thin = {**style, "lw": 0.9, "ls": ":"}
            plots[2].plot(columns.threshold, columns.dropped_bound, **thin)
            plots[3].plot(columns.threshold, columns.plan_bound, **thin)
            plots[6].plot(STEPS, np.maximum(matching.by_steps, FLOOR), marker="o", ms=4, **style)
            plots[7].plot(n // np.array(PARTS), np.maximum(matching.by_spacing, FLOOR), marker="o", ms=4, **style)
    finish(plots, n)

    figure.text(0.008, 0.962, "What a threshold saves, and what it costs", color=BRIGHT, size=19, va="center")
    title = f"APML of {n:,} points to {n:,}, p_min {P_MIN}, {ITERATIONS} iterations"
    figure.text(0.992, 0.962, title, color=FAINT, size=13, va="center", ha="right")
    legend = (
        f"Whole lines: two samples of a cloud. Dashed: a sample to itself and noise of {NOISE} of its spacing. Dotted: "
        "bounds.\nErrors are those against the dense plan, threshold 0, in float64; losses and gradients are "
        "float32, so theirs end near 1e-7. The upright line: the usual threshold, 1e-8."
    )
    figure.text(0.008, 0.03, legend, color=FAINT, size=12.5, va="center", linespacing=1.5)
    figure.savefig(path, format="png")


def draw_clouds(figure: Any, studies: list[Study]) -> None:
    """Draw the targets, each in the colour of its lines."""
    width = (0.984 + 0.006) / len(studies)
    for number, study in enumerate(studies):
        axes = figure.add_axes((0.008 + width * number, 0.712, width - 0.006, 0.215), facecolor=BACKGROUND)
        axes.spines[:].set_color(GRID)
        middle, unit = spread(study.target)
        points = project((study.target - middle) / unit)
        reach = 1.4 * np.array([1, 0.215 * SIZE[1] / ((width - 0.006) * SIZE[0])])
        reach *= 1.4 / min(1.4, float(reach[1]))  # makes room for round clouds
        axes.scatter(*points.T, s=6, c=COLORS[number % len(COLORS)], linewidths=0)
        axes.set(xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]), xticks=[], yticks=[])
        axes.text(0.03, 0.96, study.name, transform=axes.transAxes, color=BRIGHT, size=12.5, va="top", bbox=BOX)


def plot(figure: Any, place: int) -> Any:
    """Axes for a plot: the first four in the upper row, the others in the lower."""
    row, column = divmod(place, 4)
    axes = figure.add_axes((0.042 + 0.2435 * column, 0.428 - 0.313 * row, 0.208, 0.232), facecolor=BACKGROUND)
    axes.set(xscale="log", yscale="log")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=FAINT, labelsize=11)
    axes.minorticks_off()
    axes.spines[:].set_color(GRID)
    return axes


FLOOR = 1e-10  # errors of 0 are drawn here


def finish(plots: list[Any], n: int) -> None:
    """Set titles, scales and labels."""
    titles = (
        "Pairs a row",
        "Memory, bytes a point of both clouds",
        "Dropped of a choice, before Sinkhorn",
        "Plan: L1 distance, in parts of its mass",
        "Loss: relative error",
        "Gradient: relative error",
        "Gradient by iterations, threshold 1e-8",
        "Gradient by density, threshold 1e-8",
    )
    for number, (axes, title) in enumerate(zip(plots, titles, strict=True)):
        axes.set_title(title, color=BRIGHT, size=13.5, loc="left", pad=7)
        if number < 6:
            axes.set(xlim=(1.5e-2, 0.6e-14), xticks=THRESHOLDS[::3])
            axes.axvline(USUAL, color=FAINT, lw=1)
            label = "threshold"
        else:
            ticks = STEPS if number == 6 else n // np.array(PARTS)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            label = "iterations of Sinkhorn" if number == 6 else "points of a sample"
        axes.set_xlabel(label, color=FAINT, size=12, labelpad=3)
        if number > 2:
            axes.set_ylim(top=4)
    for axes, ticks in (
        (plots[0], (1, 2, 5, 10, 20, 50)),
        (plots[1], (100, 200, 500, 700, 1000, 1500, 2000, 3000, 5000)),
    ):
        low, high = axes.get_ylim()
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_ylim(low, high)
    for axes, words in (
        (plots[0], f"dense: {n:,}"),
        (plots[1], f"dense: {2 * n:,} for one float32 matrix"),
        (plots[2], "dotted: (M \N{MINUS SIGN} kept) \N{MULTIPLICATION SIGN} threshold"),
        (plots[3], "dotted: the bound"),
    ):
        left = axes in plots[:2]
        place = (0.04, 0.95) if left else (0.04, 0.05)
        axes.text(*place, words, transform=axes.transAxes, color=FAINT, size=12, va="top" if left else "bottom")


if __name__ == "__main__":
    raise SystemExit(main())
