# SPDX-License-Identifier: Apache-2.0
"""How well sweeps of unseen places are labelled: the protocol of docs/flash3d.md, for three sides.

    python -m benchmarks.segmentation floor ../shared/data > floor.jsonl
    python -m benchmarks.segmentation flash3d ../shared/data > flash3d.jsonl
    python -m benchmarks.segmentation twin ../shared/data > twin.jsonl
    python -m benchmarks.segmentation compare flash3d.jsonl floor.jsonl

- floor: extremely randomized trees on hand-made features of each point. It needs scikit-learn, and runs on the CPU.
- flash3d: the training of examples/train_segmentation.py.
- twin: `torch_twin.SerializedTwin`, the peer like Point Transformer V3, with float32 parameters under autocast. It has
  the batches, the number of steps, the learning rates and the clipping of the training above, and its patches have as
  many points as the scopes there.

A side trains once per fold and seed, and prints one JSON line after each training. compare prints the scores of one or
more files, and the exact sign-flip test between the first file and each other one: the p-value is the share of the
2**9 ways to flip the signs of the differences, one per sequence, whose sum is at least as far from 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import train_segmentation as example
from sweeps import IGNORED, Sweep, read_sweeps, thin

Tables = dict[str, np.ndarray]  # the confusion of each sequence

TREES, LEAF, MOST_POINTS = 100, 3, 400_000  # of the floor: trees, points in a leaf, points to train on


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, side in SIDES.items():
        command = commands.add_parser(name)
        command.set_defaults(side=side)
        command.add_argument("data", metavar="FOLDER", type=Path)
        command.add_argument("--folds", metavar="N", type=int, nargs="+", default=range(len(example.FOLDS)))
        command.add_argument("--seeds", metavar="N", type=int, nargs="+", default=range(3))
        command.add_argument("--steps", metavar="N", type=int, help="(default: that of the example)")
        command.add_argument("--config", metavar="NAME", help="a preset, or a JSON file (default: that of the example)")
    commands.add_parser("compare").add_argument("files", metavar="FILE", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    if arguments.command == "compare":
        compare([_read(file) for file in arguments.files])
        return
    train = arguments.side(arguments.data)
    for seed, fold in itertools.product(arguments.seeds, arguments.folds):
        options = ["--fold", str(fold), "--seed", str(seed)]
        for name in ("steps", "config"):
            value = getattr(arguments, name)
            options += [] if value is None else [f"--{name}", str(value)]
        begin = time.perf_counter()
        tables = train(example.parse(options))
        print(json.dumps(_line(arguments.command, fold, seed, tables, time.perf_counter() - begin)), flush=True)


# ---- flash3d -------------------------------------------------------------------------------------------------------


def flash3d(folder: Path) -> Callable[[argparse.Namespace], Tables]:
    """A function that trains the network of the example and returns the tables of the unseen sequences."""
    xp = example.library(example.parse([]))
    sequences, _ = example.load(folder, xp)

    def train(arguments: argparse.Namespace) -> Tables:
        example.library(arguments)  # sets the options that depend on the device
        training, unseen = example.split(sequences, arguments.fold)
        config = example.read_config(arguments.config)
        trainer = example.new_trainer(config, arguments, None if xp is np else xp.cuda.Device().id)
        for batch in example.ahead(
            lambda step: example.batch_of(training, step, arguments), range(arguments.steps), xp
        ):
            trainer.step(*batch)
        return {name: example.score(trainer, scans) for name, scans in unseen.items()}

    return train


# ---- the twin ------------------------------------------------------------------------------------------------------


def twin(folder: Path) -> Callable[[argparse.Namespace], Tables]:
    """The same with the peer. On a GPU, torch works on the memory of CuPy's arrays."""
    import torch
    from torch.nn.attention import sdpa_kernel

    from benchmarks import torch_twin

    xp = example.library(example.parse([]))
    sequences, _ = example.load(folder, xp)

    def train(arguments: argparse.Namespace) -> Tables:
        example.library(arguments)
        training, unseen = example.split(sequences, arguments.fold)
        torch.manual_seed(arguments.seed)
        config = example.read_config(arguments.config)
        patch = config.bucket_size * config.scope
        model = torch_twin.SerializedTwin(config, torch.float32, example.VOXEL, patch)
        model.to(_tensor(training[0].points).device).train()
        optimizer, schedule = _adamw(model, arguments.steps)
        for step in range(arguments.steps):
            points, features, labels, lengths = example.batch_of(training, step, arguments)
            logits = autocast(model, _tensor(points), _tensor(features), lengths)
            loss = torch_twin.segmentation_loss(logits, _tensor(labels).long())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        return {name: sum(example.confusion(scan, predict(model, scan)) for scan in unseen[name]) for name in unseen}

    def predict(model: Any, scan: example.Scan) -> Any:
        with torch.no_grad():
            return xp.asarray(autocast(model, _tensor(scan.points), _tensor(scan.features)).argmax(1))

    def autocast(model: Any, points: Any, *inputs: Any) -> Any:
        # Not cuDNN's attention: it prepares itself for each new number of patches, which takes longer than a step.
        backends = sdpa_kernel(torch_twin.BACKENDS[1:], set_priority=True)
        with backends, torch.autocast(points.device.type, torch.bfloat16):
            return model(points, *inputs)

    return train


def _tensor(x: Any) -> Any:
    """A torch tensor that shares the memory of an array of NumPy or CuPy."""
    import torch

    return torch.as_tensor(x)


def _adamw(model: Any, steps: int) -> tuple[Any, Any]:
    """The optimizer and the learning rates of `gpu3d.flash3d.Trainer`, by torch."""
    import torch

    from gpu3d.flash3d import optim
    from gpu3d.flash3d.params import layout

    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [parameters[place.path] for place in layout(model.config) if place.decay == decay],
            "weight_decay": decay * example.WEIGHT_DECAY,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, example.RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        example.RATE,
        total_steps=steps,
        pct_start=optim.WARMUP,
        div_factor=optim.DIVISOR,
        final_div_factor=optim.FINAL_DIVISOR,
        cycle_momentum=False,
    )
    return optimizer, schedule


# ---- the floor -----------------------------------------------------------------------------------------------------


def floor(folder: Path) -> Callable[[argparse.Namespace], Tables]:
    """The same with trees. A seed decides which points they see, and how they split."""
    from sklearn.ensemble import ExtraTreesClassifier

    sweeps = {name: [thin(sweep, example.VOXEL) for sweep in part] for name, part in read_sweeps(folder).items()}
    known = {name: [_known(sweep) for sweep in part] for name, part in sweeps.items()}

    def train(arguments: argparse.Namespace) -> Tables:
        training, unseen = example.split(known, arguments.fold)
        features, labels = (np.concatenate(parts) for parts in zip(*training, strict=True))
        rows = np.random.default_rng(arguments.seed).permutation(len(labels))[:MOST_POINTS]
        trees = ExtraTreesClassifier(TREES, min_samples_leaf=LEAF, n_jobs=-1, random_state=arguments.seed)
        trees.fit(features[rows], labels[rows])
        return {
            name: sum(example.confusion(example.Scan(None, x, y), trees.predict(x)) for x, y in part)
            for name, part in unseen.items()
        }

    return train


def _known(sweep: Sweep) -> tuple[np.ndarray, np.ndarray]:
    """The features and the labels of the points that have a class."""
    known = sweep.labels != IGNORED
    return hand_features(sweep)[known], sweep.labels[known]


def hand_features(sweep: Sweep) -> np.ndarray:
    """30 features of each point: of its neighbours, and of the column of points above and below it."""
    from scipy.spatial import KDTree

    points, remission = sweep.points.astype(np.float64), sweep.remission
    z, tree = points[:, 2], KDTree(points)
    columns = [z, np.hypot(*points[:, :2].T), remission]
    for k in (8, 32):
        distances, near = tree.query(points, k)
        offsets = points[near] - points[near].mean(axis=1, keepdims=True)
        variances, axes = np.linalg.eigh(offsets.transpose(0, 2, 1) @ offsets / k)
        third, second, first = np.sqrt(np.maximum(variances, 0)).T
        first = first + 1e-6
        columns += [(first - second) / first, (second - third) / first, third / first]
        columns += [abs(axes[:, 2, 0]), abs(axes[:, 2, 2]), first, distances[:, -1]]
        columns += [np.ptp(z[near], axis=1), z - z[near].mean(axis=1)]
        columns += [remission[near].mean(axis=1), remission[near].std(axis=1)]
    for side in (1.0, 5.0):
        cells, parent, counts = np.unique(
            np.floor(points[:, :2] / side), axis=0, return_inverse=True, return_counts=True
        )
        low, high = np.full(len(cells), np.inf), np.full(len(cells), -np.inf)
        np.minimum.at(low, parent, z)
        np.maximum.at(high, parent, z)
        columns += [z - low[parent]]
        if side == 1:
            columns += [high[parent] - z, (high - low)[parent], counts[parent]]
    return np.stack(columns, axis=1).astype(np.float32)


# ---- scores --------------------------------------------------------------------------------------------------------


def _line(side: str, fold: int, seed: int, tables: Tables, seconds: float) -> dict[str, Any]:
    """What is printed after a training: mean IoU in percent, over the classes present and over the common ones."""
    every = {"fold": sum(tables.values()), **tables}
    return {
        "side": side,
        "fold": fold,
        "seed": seed,
        "seconds": round(seconds, 1),
        "present": {name: round(_percent(table), 2) for name, table in every.items()},
        "common": {name: round(_percent(table, example.COMMON), 2) for name, table in every.items()},
        "tables": {name: table.tolist() for name, table in tables.items()},
    }


def _percent(table: np.ndarray, classes: Sequence[str] = example.CLASSES) -> float:
    return 100 * example.mean(example.iou(table), classes)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.startswith("{")]


def compare(sides: list[list[dict[str, Any]]]) -> None:
    """Print the scores of each side, and the test between the first side and each other one."""
    for lines in sides:
        print(f"\n{lines[0]['side']}: {len(lines)} trainings, mean (least to most of the seeds)")
        for classes in ("present", "common"):
            folds = sorted({line["fold"] for line in lines})
            for fold in folds:
                _print(f"fold {fold}, {classes}", [line[classes]["fold"] for line in lines if line["fold"] == fold])
            if len(folds) == len(example.FOLDS):
                values = pooled(lines, example.COMMON if classes == "common" else example.CLASSES)
                _print(f"pooled, {classes}", values)
    for lines in sides[1:]:
        for classes in ("present", "common"):
            ours, theirs = by_sequence(sides[0], classes), by_sequence(lines, classes)
            differences = [ours[name] - theirs[name] for name in sorted(ours.keys() & theirs.keys())]
            print(
                f"\n{sides[0][0]['side']} minus {lines[0]['side']}, {classes}, by sequence: "
                f"{' '.join(f'{x:+.1f}' for x in differences)}; mean {np.mean(differences):+.1f}, "
                f"p = {sign_flip(differences):.3f}"
            )


def _print(name: str, values: list[float]) -> None:
    print(f"{name:<18}{np.mean(values):6.1f}  ({min(values):.1f} to {max(values):.1f})")


def pooled(lines: list[dict[str, Any]], classes: Sequence[str]) -> list[float]:
    """The mean IoU of all folds together, from the sum of their tables, for each seed that has all folds."""
    seeds = {seed: [line for line in lines if line["seed"] == seed] for seed in {line["seed"] for line in lines}}
    tables = [
        sum(np.array(table) for line in part for table in line["tables"].values())
        for part in seeds.values()
        if len(part) == len(example.FOLDS)
    ]
    return [_percent(table, classes) for table in tables]


def by_sequence(lines: list[dict[str, Any]], classes: str) -> dict[str, float]:
    """The mean over the seeds for each sequence."""
    names = {name for line in lines for name in line["tables"]}
    return {name: float(np.mean([line[classes][name] for line in lines if name in line["tables"]])) for name in names}


def sign_flip(differences: Sequence[float]) -> float:
    """The p-value of the exact two-sided sign-flip test that the mean difference is 0."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = abs(signs @ np.array(differences))
    return float((sums >= abs(sum(differences)) - 1e-9).mean())


SIDES = {"floor": floor, "flash3d": flash3d, "twin": twin}

if __name__ == "__main__":
    main()
