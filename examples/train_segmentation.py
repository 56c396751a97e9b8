# SPDX-License-Identifier: Apache-2.0
"""A Flash3D backbone trained to label LiDAR points, and how well it labels sequences that it has not seen.

With --data the points are sweeps of SemanticKITTI (sweeps.py describes the files). The nine sequences are in three
folds. Training leaves the sequences of one fold out, and the scores are of those: sweeps of one sequence show nearly
the same place, so a score on other sweeps of a training sequence would say little. Without --data every sequence is one
made-up street, which teaches nothing about real ones.

A sweep is thinned to one point per voxel of 0.2 m, and every score counts these points. The network sees the height and
the intensity of a point, and how its nearest 8 and 32 points lie. A step takes crops of at most --points points from
above. The sweeps are turned, mirrored, scaled and jittered, and every second crop is of a mixture of two sweeps. The
curve of the mean IoU during training is of one crop per unseen sweep. Nothing is chosen by it: the weights are those
after the last step.

Runs on CuPy if there is an NVIDIA GPU, otherwise on NumPy with a smaller network and fewer points. After an interrupt
(Ctrl-C) the same command continues. A folder receives weights.safetensors, for `gpu3d segment`, and picture.png.

    python examples/train_segmentation.py
    python examples/train_segmentation.py --data ../shared/data --fold 1 --out fold1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bucket_attention import BACKGROUND, BRIGHT, FAINT, array_library, device_name, spread, to_host
from pooling_levels import GRID
from sweeps import CLASSES, IGNORED, Sweep, made_up_street, read_sweeps, thin
from tqdm import tqdm

from gpu3d import flash3d

FOLDS = ("00", "04", "07"), ("01", "05", "10"), ("02", "03", "09")
VOXEL = 0.2  # metres
MIXED = 0.5  # the share of crops that are cut from a mixture of two sweeps
SHAPE = "linearity", "planarity", "verticality", "size", "extent", "rise"
LOCAL = [f"{name}_{count}" for count in (8, 32) for name in SHAPE]
FEATURES = "z", "intensity", *LOCAL, "intensity_mean_32", "intensity_std_32"
TASK = flash3d.Task(features=FEATURES, classes=tuple(CLASSES), voxel=VOXEL)
# Classes that are in at least five of the nine sequences. Their mean IoU varies less between folds than that of all.
RARE = "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist", "motorcyclist", "other-ground"
COMMON = tuple(name for name in CLASSES if name not in RARE)
SMALL = flash3d.Config(
    channels=(16, 32),
    depths=(1, 1),
    decoder_channels=(16,),
    decoder_depths=(1,),
    heads=(1, 2),
    decoder_heads=(1,),
    hashes=("zorder_div", "xor_div"),
    strides=(1, 1),
    bucket_size=64,
    scope=2,
    mlp=2,
    drop_path=0.1,
)
# In windows of 128 points, few sweeps teach more than in the preset's 4096.
TINY = flash3d.presets["tiny"].replace(bucket_size=32, scope=4, drop_path=0.3)
CONFIGS = {"small": SMALL, **flash3d.presets, "tiny": TINY}
DEFAULTS = {
    "cpu": {"config": "small", "steps": 200, "points": 1024, "crops": 1},
    "gpu": {"config": "tiny", "steps": 4000, "points": 16_384, "crops": 4},
}
RATE, WEIGHT_DECAY = 4e-3, 0.05
REPORTS = 25  # during a training


def main(argv: list[str] | None = None) -> int:
    """Train, print the scores, and write weights and picture; return the exit code."""
    arguments = parse(argv)
    try:
        return run(arguments, library(arguments))
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"{Path(__file__).name}: {error or type(error).__name__}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line. Those that depend on the device are None until `library` sets them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="real sweeps (default: made-up streets)")
    parser.add_argument("--fold", type=int, choices=range(len(FOLDS)), default=0, help="(default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, help=either("steps"))
    parser.add_argument(
        "--config", metavar="NAME", help=f"{', '.join(CONFIGS)}, or a JSON file with its fields {either('config')}"
    )
    parser.add_argument("--points", metavar="N", type=int, help=f"points per crop {either('points')}")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", type=Path, default=Path("gpu3d-segmentation"), help="(default: %(default)s)"
    )
    return parser.parse_args(argv)


def library(arguments: argparse.Namespace) -> Any:
    """The array library of the device. Options that are None get the default of this device."""
    xp = array_library(arguments.device)
    for name, value in DEFAULTS["cpu" if xp is np else "gpu"].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return xp


def either(name: str) -> str:
    """The help text for a default that depends on the device."""
    return f"(default: {DEFAULTS['cpu'][name]}, on a GPU {DEFAULTS['gpu'][name]})"


def run(arguments: argparse.Namespace, xp: Any) -> int:
    """Train on all sequences but those of the fold, and score those."""
    sequences, title = load(arguments.data, xp)
    training, unseen = split(sequences, arguments.fold)
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = "made-up" if arguments.data is None else "semantickitti"
    unfinished = arguments.out / f"unfinished-{source}-fold{arguments.fold}-{arguments.points}.safetensors"
    trainer = start(unfinished, arguments, xp)
    print(f"{title}, on {device_name(xp)}")
    seen = [name for name in sequences if name not in unseen]
    print(f"training: {len(training)} sweeps of sequences {' '.join(seen)}; unseen: {' '.join(unseen)}")
    count = flash3d.count(trainer.config)
    print(f"{count:,} parameters; {arguments.steps} steps of {arguments.crops} x {arguments.points:,} points\n")
    try:
        curves = train(trainer, training, unseen, arguments)
    except KeyboardInterrupt:
        trainer.save(unfinished)
        print(f"\ninterrupted after {trainer.done_steps} steps; the same command continues", file=sys.stderr)
        return 130
    flash3d.save(arguments.out / "weights.safetensors", trainer.params, trainer.config, task=TASK)
    unfinished.unlink(missing_ok=True)
    tables = {name: score(trainer, scans) for name, scans in unseen.items()}
    if trainer.skipped:
        print(f"{trainer.skipped} steps were skipped, because their loss or gradient was not finite")
    print_scores(tables)
    example = next(iter(unseen.values()))[0]
    draw(example, predict(trainer, example), curves, title, arguments.out / "picture.png")
    print(f"\nweights and picture: {arguments.out}")
    return 0


def start(unfinished: Path, arguments: argparse.Namespace, xp: Any) -> flash3d.Trainer:
    """A new trainer, or that of a training which was interrupted."""
    device = None if xp is np else xp.cuda.Device().id
    config = read_config(arguments.config)
    if unfinished.exists():
        trainer = flash3d.Trainer.resume(unfinished, device)
        asked = config, arguments.steps, arguments.seed
        if (trainer.config, trainer.options.steps, trainer.options.seed) != asked:
            raise ValueError(
                f"{unfinished} is of a training with another --config, --steps or --seed: repeat its options to "
                "continue, or delete it to start anew."
            )
        print(f"continues after {trainer.done_steps} steps")
        return trainer
    return new_trainer(config, arguments, device)


def new_trainer(config: flash3d.Config, arguments: argparse.Namespace, device: int | None) -> flash3d.Trainer:
    """A trainer before its first step."""
    params = flash3d.init(config, arguments.seed, device)
    options = {"lr": RATE, "weight_decay": WEIGHT_DECAY, "seed": arguments.seed, "ignore": IGNORED}
    return flash3d.Trainer(config, params, steps=arguments.steps, **options)


def read_config(name: str) -> flash3d.Config:
    """A config by name, or from a file, for the features and classes of the sweeps."""
    config = CONFIGS[name] if name in CONFIGS else flash3d.Config(**json.loads(Path(name).read_text("utf-8")))
    return config.replace(in_channels=len(TASK.features), classes=len(CLASSES))


class Scan(NamedTuple):
    """What the network sees of a sweep, and its labels. The arrays are on the device."""

    points: Any  # float32 [n, 3]
    features: Any  # float32 [n, len(TASK.features)]
    labels: Any  # uint8 [n]


def load(folder: Path | None, xp: Any) -> tuple[dict[str, list[Scan]], str]:
    """The scans of each sequence, and a title."""
    names = sorted(name for fold in FOLDS for name in fold)
    if folder is None:
        sequences = {name: [made_up_street(seed)] for seed, name in enumerate(names)}
        title = "made-up streets, because there is no --data"
    else:
        sequences, title = read_sweeps(folder), "SemanticKITTI"
        if missing := [name for name in names if name not in sequences]:
            raise ValueError(
                f"{folder / 'semantickitti'} must hold sweeps SS_FFFFFF.npz of the sequences {' '.join(names)}, got "
                f"none of {' '.join(missing)}."
            )
    # In the order of the names, so that a seed decides the batches.
    return {name: [prepare(sweep, xp) for sweep in sequences[name]] for name in names}, title


def prepare(sweep: Sweep, xp: Any) -> Scan:
    """A thinned sweep with its features. They are computed once, before the points are moved at random."""
    points, remission, labels = map(xp.asarray, thin(sweep, VOXEL))
    return Scan(points, flash3d.features(points, {"intensity": remission}, TASK.features), labels)


def split(sequences: dict[str, list[Scan]], fold: int) -> tuple[list[Scan], dict[str, list[Scan]]]:
    """The scans to train on, and the sequences that are left out."""
    unseen = {name: sequences[name] for name in FOLDS[fold]}
    return [scan for name, scans in sequences.items() if name not in unseen for scan in scans], unseen


# ---- training ------------------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """What was seen during a training."""

    steps: list[int]
    losses: list[float]  # the mean since the entry before
    scores: list[float]  # the mean IoU of crops of unseen sweeps


def train(
    trainer: flash3d.Trainer, scans: list[Scan], unseen: dict[str, list[Scan]], arguments: argparse.Namespace
) -> Curves:
    """Do the steps that remain, under a progress bar."""
    xp, rng = array_module(scans[0].points), np.random.default_rng(arguments.seed)
    crops = [cut(scan, flash3d.crop(scan.points, arguments.points, rng)) for part in unseen.values() for scan in part]
    curves = Curves([], [], [])
    first, every = trainer.done_steps, max(1, arguments.steps // REPORTS)
    losses: list[Any] = []
    points, begin = 0, time.perf_counter()
    with tqdm(total=arguments.steps, initial=first, unit="step", disable=None) as bar:
        batches = ahead(lambda step: batch_of(scans, step, arguments), range(first, arguments.steps), xp)
        for step, batch in enumerate(batches, first):
            losses.append(trainer.step(*batch))
            points += len(batch[0])
            if (step + 1) % every == 0 or step + 1 == arguments.steps:
                loss = float(np.mean([float(loss) for loss in losses]))  # waits for the GPU, therefore not in each step
                rate = points / (time.perf_counter() - begin)
                share = mean(iou(score(trainer, crops)))
                for curve, value in zip(curves, (step + 1, loss, share), strict=True):
                    curve.append(value)
                bar.set_postfix_str(f"loss {loss:.3f}, mIoU {share:.3f}, {rate:,.0f} points/s", refresh=False)
                losses.clear()
                points, begin = 0, time.perf_counter()
            bar.update()
    return curves


def batch_of(scans: list[Scan], step: int, arguments: argparse.Namespace) -> tuple[Any, Any, Any, list[int]]:
    """Points, features, labels and lengths of one step. They depend on the seed and the step only."""
    rng = np.random.default_rng([arguments.seed, step])
    crops = []
    for _ in range(arguments.crops):
        scan = moved(scans, rng)
        if rng.random() < MIXED:
            other = moved(scans, rng)
            scan = cut(joined([scan, other]), flash3d.mix(scan.points, other.points, rng))
        crops.append(cut(scan, flash3d.crop(scan.points, arguments.points, rng)))
    return *joined(crops), [len(crop.points) for crop in crops]


def moved(scans: list[Scan], rng: np.random.Generator) -> Scan:
    """A random one of the scans, turned, mirrored, scaled and jittered."""
    scan = scans[rng.integers(len(scans))]
    return scan._replace(points=flash3d.augment(scan.points, rng))


def joined(scans: list[Scan]) -> Scan:
    """The points of all scans in one."""
    return Scan(*map(array_module(scans[0].points).concatenate, zip(*scans, strict=True)))


def ahead(make: Callable[[int], Any], steps: range, xp: Any) -> Iterator[Any]:
    """Make the batch of each step. On a GPU this takes place on a second stream, beside the step before.

    A sort in CuPy waits for its stream, so on the stream of the steps the host would wait for the step before.
    """
    if xp is np:
        yield from map(make, steps)
        return
    of_steps, own = xp.cuda.get_current_stream(), xp.cuda.Stream(non_blocking=True)
    own.wait_event(of_steps.record())
    kept: list[Any] = []  # the last two batches, with an event behind each step
    for step in steps:
        with own:
            batch = make(step)
        of_steps.wait_event(own.record())
        yield batch
        kept.append((batch, of_steps.record()))
        if len(kept) == 2:
            own.wait_event(kept[0][1])  # what this stream makes next may lie where that batch lay
            del kept[0]


def cut(scan: Scan, rows: Any) -> Scan:
    """Some points of a scan."""
    return Scan(*(values[rows] for values in scan))


def array_module(x: Any) -> Any:
    """The module of an array, numpy or cupy."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


# ---- scores --------------------------------------------------------------------------------------------------------


def predict(trainer: flash3d.Trainer, scan: Scan) -> Any:
    """The class of every point."""
    batch = flash3d.Batch(scan.points, scan.features)
    return flash3d.forward(trainer.params, batch, trainer.config).argmax(axis=1)


def score(trainer: flash3d.Trainer, scans: list[Scan]) -> np.ndarray:
    """The confusion of all scans together."""
    return sum(confusion(scan, predict(trainer, scan)) for scan in scans)


def confusion(scan: Scan, predicted: Any) -> np.ndarray:
    """How many points of each class [true] were given each class [predicted]."""
    known = scan.labels != IGNORED
    pairs = scan.labels[known].astype(np.int64) * len(CLASSES) + predicted[known]
    counts = array_module(pairs).bincount(pairs, minlength=len(CLASSES) ** 2)
    return to_host(counts).reshape(len(CLASSES), len(CLASSES))


def iou(table: np.ndarray) -> np.ndarray:
    """The IoU of every class; NaN for a class without a point."""
    true, said, right = table.sum(axis=1), table.sum(axis=0), table.diagonal()
    return np.where(true > 0, right / np.maximum(true + said - right, 1), np.nan)


def mean(shares: np.ndarray, names: Sequence[str] = CLASSES) -> float:
    """The mean over those of the named classes that have points; NaN if none has."""
    chosen = shares[[CLASSES.index(name) for name in names]]
    return float(np.nanmean(chosen)) if not np.isnan(chosen).all() else np.nan


def print_scores(tables: dict[str, np.ndarray]) -> None:
    """Print the IoU in percent of each class, over all unseen sweeps and in each sequence, and means."""
    columns = {"all": iou(sum(tables.values()))} | {name: iou(table) for name, table in tables.items()}
    print(f"IoU in %{'':<10}" + "".join(f"{name:>8}" for name in columns))
    for row, name in enumerate(CLASSES):
        if not np.isnan(columns["all"][row]):
            print_row(name, [shares[row] for shares in columns.values()])
    print_row("mean", [mean(shares) for shares in columns.values()])
    print_row("mean of common", [mean(shares, COMMON) for shares in columns.values()])


def print_row(name: str, shares: list[float]) -> None:
    """Print shares in percent, and a dash where a class does not occur."""
    print(f"{name:<18}" + "".join("       -" if np.isnan(share) else f"{100 * share:>8.1f}" for share in shares))


# ---- the picture ---------------------------------------------------------------------------------------------------


def draw(scan: Scan, predicted: Any, curves: Curves, title: str, path: Path) -> None:
    """Draw an unseen sweep from above, its labels beside those predicted, and the curves of the training."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points, labels = to_host(scan.points), to_host(scan.labels)
    paint = np.array(matplotlib.colormaps["tab20"].colors)
    middle, half = spread(points)
    xy = points[:, :2] - middle[:2]
    order = np.flatnonzero((np.abs(xy) <= half).all(axis=1) & (labels != IGNORED))
    order = order[np.argsort(points[order, 2], kind="stable")]  # high points are drawn last

    figure = Figure(figsize=(16, 13.4), dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    for left, caption, shown in ((0.005, "Truth", labels), (0.5025, "Prediction", to_host(predicted))):
        axes = figure.add_axes((left, 0.335, 0.4925, 0.588))
        axes.scatter(*xy[order].T, s=2.5, c=paint[shown[order]], linewidths=0)
        axes.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], facecolor=BACKGROUND)
        axes.set_title(caption, color=BRIGHT, size=14, loc="left", pad=7)
        axes.spines[:].set_color(GRID)
    there = np.unique(labels[order])
    dots = [Line2D([], [], ls="", marker="o", color=paint[c], label=CLASSES[c]) for c in there]
    legend = figure.legend(
        handles=dots, loc="upper center", bbox_to_anchor=(0.5, 0.332), ncols=10, frameon=False, labelcolor=BRIGHT
    )
    legend.set_in_layout(False)
    for left, caption, values in (
        (0.045, "Loss of the training batches", curves.losses),
        (0.5425, "Mean IoU of crops of unseen sweeps", curves.scores),
    ):
        axes = figure.add_axes((left, 0.045, 0.4475, 0.2))
        axes.plot(curves.steps, values, color=BRIGHT, lw=1.6, marker="o", markersize=3)
        axes.set(facecolor=BACKGROUND, ylim=(0, None))
        axes.set_title(caption, color=BRIGHT, size=13, loc="left", pad=7)
        axes.set_xlabel("step", color=FAINT)
        axes.tick_params(colors=FAINT)
        axes.spines[:].set_color(GRID)
    figure.text(0.008, 0.97, "Labels of a sweep that was not trained on", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.97, title, color=FAINT, size=13, va="center", ha="right")
    figure.savefig(path, format="png")


if __name__ == "__main__":
    raise SystemExit(main())
