# SPDX-License-Identifier: Apache-2.0
"""A transformer block over the buckets of a LiDAR sweep, and a picture of where one point looks.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy; it uses no deep-learning framework. The block attends three
times: in plain scopes of consecutive buckets, in shifted scopes and in strided scopes. From one attention to the next
only a small table of bucket numbers changes. No point moves in memory.

Nothing is trained: the weights are random, from a fixed seed. But queries and keys share the same weights, and their
inputs are waves over the coordinates. So points attend to near points.

    python examples/bucket_attention.py                         # the scan that comes with the package
    python examples/bucket_attention.py scan.pcd --out scan.png
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import KDTree

import gpu3d
from gpu3d.io import read_points

SCAN = "pandaset_002_00.npz"
SCAN_TITLE = "PandaSet 002/00 (Hesai and Scale AI, CC BY 4.0)"

BUCKET_SIZE = 512
SCOPE = 8  # buckets
SHIFT = SCOPE // 2
STRIDE = 4
HEADS, HEAD_DIM = 2, 32
CHANNELS = HEADS * HEAD_DIM
WAVELENGTHS = 1, 20  # shortest and longest, in units of the cloud's `spread`
SHARPNESS = 2.0  # scales queries and keys; if it is larger, a query attends to fewer points
SAMPLES = 256  # points over which the table averages


def main(argv: list[str] | None = None) -> int:
    """Run the block, print the table and draw the picture; return the exit code."""
    parser = scan_parser(__doc__, "gpu3d-demo-attention.png")
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        points, title, unit = load(arguments.file)
        buckets, attentions = run_block(points, xp)
        print(f"{title}, on {device_name(xp)}")
        print_table(points, buckets, attentions, unit)
        draw(points, buckets, attentions, title, unit, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


def scan_parser(description: str, out: str) -> argparse.ArgumentParser:
    """The arguments of an example: a scan, the file of the picture, and a device."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "file", nargs="?", metavar="FILE", type=Path, help="a scan (default: a LiDAR scan that comes with gpu3d)"
    )
    parser.add_argument(
        "-o", "--out", metavar="PNG", type=Path, default=Path(out), help="the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the GPU if there is one"
    )
    return parser


def array_library(device: str) -> Any:
    """CuPy for the GPU, NumPy for the CPU. The code below is the same for both."""
    if device != "cpu":
        try:
            import cupy

            cupy.zeros(1)
            return cupy
        except Exception as error:  # without CuPy, a driver or a GPU, errors of many kinds
            if device == "gpu":
                raise ImportError(f"no GPU that CuPy can use ({error}); `gpu3d info` prints what is missing") from error
    return np


def device_name(xp: Any) -> str:
    """The name of the device that the block runs on."""
    if xp is np:
        return f"the CPU, NumPy {np.__version__}"
    return xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()


def load(file: Path | None) -> tuple[np.ndarray, str, str]:
    """The finite points [N, 3] of a scan, its title, and its unit if that is known."""
    if file is None:
        with resources.as_file(resources.files(gpu3d) / "data" / SCAN) as path:
            return read_points(path), SCAN_TITLE, " m"
    points = read_points(file)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        raise ValueError(f"{file} holds no finite points")
    return points, file.name, ""


# ---- the block -----------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """One attention of the block: its scopes, its time, and the arrays from which its weights can be computed."""

    name: str
    scopes: gpu3d.Scopes
    milliseconds: float
    q: np.ndarray  # [num_slots, H, D]
    k: np.ndarray  # [num_slots, H, D]
    lse: np.ndarray  # [num_slots, H]


def run_block(points: np.ndarray, xp: Any) -> tuple[gpu3d.Buckets, list[Attention]]:
    """Bucket the points once, attend three times, and end with an MLP."""
    rng = np.random.default_rng(0)
    buckets = gpu3d.bucketize(xp.asarray(points), BUCKET_SIZE)
    features = waves(points, rng)
    x = buckets.scatter(xp.asarray(features))  # [num_slots, C]: points that are close in space are close in memory
    attentions = []
    for name, scopes in (
        ("plain", gpu3d.scopes(buckets, SCOPE)),
        (f"shift {SHIFT}", gpu3d.scopes(buckets, SCOPE, shift=SHIFT)),
        (f"stride {STRIDE}", gpu3d.scopes(buckets, SCOPE, stride=STRIDE)),
    ):
        change, attention = attend(layer_norm(x, xp), name, buckets, scopes, rng, xp)
        x = x + change
        attentions.append(attention)
    x = x + mlp(layer_norm(x, xp), rng, xp)
    result = buckets.gather(x)  # [N, C]: one row per point, in the order of the points
    if result.shape != features.shape or not bool(xp.isfinite(result).all()):
        raise ValueError("the block gave no finite result")
    return buckets, attentions


def waves(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random Fourier features float32 [N, C]: near points have rows with a large inner product."""
    middle, unit = spread(points)
    direction = rng.standard_normal((3, CHANNELS // 2))
    direction /= np.linalg.norm(direction, axis=0)
    shortest, longest = np.log(WAVELENGTHS)
    length = unit * np.exp(rng.uniform(shortest, longest, CHANNELS // 2))
    phase = ((points - middle) @ (2 * np.pi * direction / length)).astype(np.float32)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1)


def spread(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The middle of a cloud, and the median distance from it, which serves as the unit of length here."""
    middle = np.median(points, axis=0)
    return middle, float(np.median(np.linalg.norm(points - middle, axis=1))) or 1.0


def attend(
    x: Any, name: str, buckets: gpu3d.Buckets, scopes: gpu3d.Scopes, rng: np.random.Generator, xp: Any
) -> tuple[Any, Attention]:
    """Multi-head attention over x [num_slots, C]. One projection makes q, k and v."""
    looks, values, back = (weights(rng, CHANNELS, CHANNELS, xp) for _ in range(3))
    packed = xp.concatenate([SHARPNESS * looks, SHARPNESS * looks, values], axis=1)
    qkv = (x @ packed).reshape(-1, 3, HEADS, HEAD_DIM)
    if xp is not np:
        qkv = qkv.astype(np.float16)  # for the tensor cores; float32 works too
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]  # views, no copies
    (out, lse), milliseconds = timed(
        lambda: gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True), once=xp is np
    )
    change = out.reshape(x.shape).astype(x.dtype) @ back
    saved = (to_host(rows).astype(np.float32) for rows in (q, k, lse))
    return change, Attention(name, scopes, milliseconds, *saved)


def mlp(x: Any, rng: np.random.Generator, xp: Any) -> Any:
    """Two layers with a ReLU between them."""
    hidden = xp.maximum(x @ weights(rng, CHANNELS, 4 * CHANNELS, xp), 0)
    return hidden @ weights(rng, 4 * CHANNELS, CHANNELS, xp)


def layer_norm(x: Any, xp: Any) -> Any:
    """Rows of mean 0 and variance 1."""
    x = x - x.mean(axis=1, keepdims=True)
    return x / xp.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6)


def weights(rng: np.random.Generator, rows: int, columns: int, xp: Any) -> Any:
    """A random matrix that keeps the variance of its input."""
    return xp.asarray(rng.standard_normal((rows, columns), np.float32) / np.float32(math.sqrt(rows)))


def timed(call: Callable[[], Any], *, once: bool) -> tuple[Any, float]:
    """The result of a call and its time in ms: of one call, or the median of 20 between two device events."""
    begin = time.perf_counter()
    result = call()  # on a GPU this compiles the kernel
    if once:
        return result, 1e3 * (time.perf_counter() - begin)
    from cupy.cuda import Event, get_elapsed_time

    times = []
    for _ in range(20):
        start, end = Event(), Event()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        times.append(get_elapsed_time(start, end))
    return result, statistics.median(times)


# ---- where a point looks -------------------------------------------------------------------------------------------


def attention_weights(buckets: gpu3d.Buckets, attention: Attention, point: int) -> tuple[np.ndarray, np.ndarray]:
    """The points in the scope of `point`, and the weight that it gives to each: the mean over heads, with a sum of 1.

    A weight is exp(scale * q.k - lse). So the lse that the forward returns is all that is needed of the softmax.
    """
    query = int(buckets.point_to_slot[point])
    table = to_host(attention.scopes.table)
    scope = table[(table == query // buckets.bucket_size).any(axis=1)][0]
    slots = (scope[scope >= 0, None] * buckets.bucket_size + np.arange(buckets.bucket_size)).ravel()
    points = to_host(buckets.slot_to_point)[slots]
    slots, points = slots[points >= 0], points[points >= 0]  # without padding
    scores = np.einsum("hd,nhd->nh", attention.q[query], attention.k[slots]) / math.sqrt(HEAD_DIM)
    return points, np.exp(scores - attention.lse[query]).mean(axis=1)


def choose_query(points: np.ndarray, buckets: gpu3d.Buckets, attentions: list[Attention]) -> int:
    """A point at the border of its plain scope, where the shifted scope goes on.

    Many places, seen from above, are tried. At the chosen one the shifted scope has more of the points nearby than the
    plain scope, by the largest number.
    """
    _, unit = spread(points)
    cells = np.floor((points[:, :2] - points[:, :2].min(axis=0)) / (unit / 50))
    _, places = np.unique(cells, axis=0, return_index=True)  # one per cell: dense objects count like ground
    bucket = to_host(buckets.point_to_slot)[places] // buckets.bucket_size
    plain, shifted = (scope_of_bucket(buckets, attention)[bucket] for attention in attentions[:2])
    tree = KDTree(points[places, :2])
    candidates = np.random.default_rng(0).permutation(len(places))[:2000]
    around = tree.query_ball_point(points[places[candidates], :2], unit / 4)
    gain = [
        np.count_nonzero(shifted[near] == shifted[place]) - np.count_nonzero(plain[near] == plain[place])
        for place, near in zip(candidates, around, strict=True)
    ]
    return int(places[candidates[np.argmax(gain)]])


def scope_of_bucket(buckets: gpu3d.Buckets, attention: Attention) -> np.ndarray:
    """For each bucket, the row of the table that has it."""
    table = to_host(attention.scopes.table)
    scope = np.empty(buckets.num_buckets, np.int64)
    row, column = np.nonzero(table >= 0)
    scope[table[row, column]] = row
    return scope


def to_host(x: Any) -> np.ndarray:
    """The array as a NumPy array."""
    return x if isinstance(x, np.ndarray) else x.get()


# ---- what is shown -------------------------------------------------------------------------------------------------


def print_table(points: np.ndarray, buckets: gpu3d.Buckets, attentions: list[Attention], unit: str) -> None:
    """Print one row per attention, with means over a sample of queries."""
    sample = np.random.default_rng(0).permutation(len(points))[:SAMPLES]
    print(f"{len(points):,} points in {buckets.num_buckets:,} buckets of {BUCKET_SIZE}; {HEADS} heads of {HEAD_DIM}")
    print(f"\n{'attention':<10}  {'scopes':<14}  {'time':>10}  {'sum':>9}  {'reach':>8}  {'points':>7}")
    for attention in attentions:
        looks = np.array([summary(points, buckets, attention, query) for query in sample])
        total, reach, count = looks.mean(axis=0)
        scopes = f"{len(attention.scopes.table)} of {SCOPE} buckets"
        took = f"{attention.milliseconds:.{3 if attention.milliseconds < 10 else 0}f} ms"
        print(f"{attention.name:<10}  {scopes:<14}  {took:>10}  {total:>9.6f}  {reach:>6.2f}{unit:<2}  {count:>7,.0f}")
    print("\nsum: of the weights of a point; reach: mean distance, by weight; points: the number of points with equal")
    print("weights that has the same entropy")


def summary(points: np.ndarray, buckets: gpu3d.Buckets, attention: Attention, query: int) -> tuple[float, float, float]:
    """The sum of a query's weights, their mean distance, and the exponential of their entropy."""
    members, weight = attention_weights(buckets, attention, query)
    distance = np.linalg.norm(points[members] - points[query], axis=1)
    entropy = -(weight * np.log(np.maximum(weight, 1e-30))).sum()
    return float(weight.sum()), float(weight @ distance), math.exp(entropy)


BACKGROUND, BRIGHT, FAINT, OUTSIDE, QUERY = "#0a0c11", "#e8ecf2", "#8b95a5", "#4a5363", "#4dfff3"
DECADES = 3  # that the colours cover


def draw(
    points: np.ndarray, buckets: gpu3d.Buckets, attentions: list[Attention], title: str, unit: str, path: Path
) -> None:
    """Draw the scan from above around one query, once per attention, its scope coloured by weight and the rest grey."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure

    query = choose_query(points, buckets, attentions)
    found = [attention_weights(buckets, attention, query) for attention in attentions]
    largest = max(weight.max() for _, weight in found)
    norm = LogNorm(largest / 10**DECADES, largest, clip=True)
    colors = LinearSegmentedColormap.from_list("weight", matplotlib.colormaps["plasma"](np.linspace(0.12, 1, 256)))
    captions = (
        f"Plain scope: {SCOPE} consecutive buckets",
        f"Shifted by {SHIFT} buckets: its border lies elsewhere",
        f"Stride {STRIDE}: every {STRIDE}th of {SCOPE * STRIDE} buckets, farther at equal cost",
    )
    _, half = spread(points)
    xy = points[:, :2].astype(np.float64) - points[query, :2]
    in_view = (np.abs(xy) <= half).all(axis=1)

    figure = Figure(figsize=(18, 7.4), dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    for number, (attention, caption, (members, weight)) in enumerate(zip(attentions, captions, found, strict=True)):
        axes = figure.add_axes((0.008 + 0.3302 * number, 0.098, 0.3236, 0.7871))
        grey = in_view.copy()
        grey[members] = False
        order = np.argsort(weight)  # the largest is drawn last
        axes.scatter(*xy[grey].T, s=1.6, c=OUTSIDE, linewidths=0)
        axes.scatter(*xy[members[order]].T, s=7, c=weight[order], norm=norm, cmap=colors, linewidths=0)
        axes.scatter(0, 0, s=260, facecolors="none", edgecolors=BACKGROUND, linewidths=5)
        axes.scatter(0, 0, s=260, facecolors="none", edgecolors=QUERY, linewidths=2.2)
        axes.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], facecolor=BACKGROUND)
        axes.spines[:].set_color("#252b36")
        axes.set_title(caption, color=BRIGHT, size=14, loc="left", pad=7)
        _, reach, count = summary(points, buckets, attention, query)
        note = f"looks {reach:.1f}{unit} far on average, at about {count:,.0f} points"
        box = {"facecolor": BACKGROUND, "edgecolor": "none", "alpha": 0.8, "pad": 3}
        axes.text(0.02, 0.022, note, transform=axes.transAxes, color=BRIGHT, size=12, bbox=box)
        if number == 0:
            draw_scale(axes, half, unit)

    figure.text(0.008, 0.957, "Where one point looks", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.957, title, color=FAINT, size=13, va="center", ha="right")
    legend = (
        f"Circle: the point that looks. Colour: the weight that it gives. Grey: not in its scope of {SCOPE} buckets.\n"
        "The scopes differ by a table of bucket numbers; no point moves in memory."
    )
    figure.text(0.008, 0.047, legend, color=FAINT, size=12.5, va="center", linespacing=1.5)
    figure.text(0.735, 0.062, "attention weight", color=FAINT, size=12.5, va="center", ha="right")
    bar_axes = figure.add_axes((0.742, 0.054, 0.25, 0.018))
    bar = figure.colorbar(ScalarMappable(norm, colors), bar_axes, orientation="horizontal")
    bar.ax.tick_params(colors=BRIGHT, labelsize=11)
    bar.outline.set_visible(False)
    figure.savefig(path, format="png")


def draw_scale(axes: Any, half: float, unit: str) -> None:
    """Draw a scale bar of a round length at the upper left."""
    power = 10.0 ** math.floor(math.log10(half / 2))
    length = power * max(factor for factor in (1, 2, 5) if factor * power <= half / 2)
    left, top = -0.94 * half, 0.93 * half
    axes.plot([left, left + length], [top, top], color=BRIGHT, lw=2.5, solid_capstyle="butt")
    axes.text(left + length / 2, top - 0.02 * half, f"{length:g}{unit}", color=BRIGHT, size=12, ha="center", va="top")


if __name__ == "__main__":
    raise SystemExit(main())
