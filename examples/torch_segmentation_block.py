# SPDX-License-Identifier: Apache-2.0
"""One stage of a Flash3D transformer as a torch module, trained to label LiDAR points, next to one without attention.

The stage puts the points into buckets once. Two blocks attend in scopes of buckets, the second one in shifted scopes.
Pooling makes one point of four, and the output of a layer on the pooled points is copied back to the four. The baseline
replaces each attention by a layer on single points with the same number of weights. So the difference between the two
shows what the stage learns from neighbours.

With --data the points are sweeps of SemanticKITTI (sweeps.py describes the files). Sequences 04 and 10 are for
validation. Without --data all sweeps are made-up streets, which teach nothing about real ones.

If torch has a GPU, training runs on it with larger crops and batches; with those for a CPU, the GPU would wait for its
host. torchrun starts training on several GPUs. Each process takes its part of every batch, and the gradients equal
those of one process with the joined batch.

    python examples/torch_segmentation_block.py --data ../shared/data
    torchrun --nproc-per-node 2 examples/torch_segmentation_block.py --data ../shared/data --batch 32
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sweeps import CLASSES, IGNORED, Sweep, made_up_street, read_sweeps, thin
from torch import nn
from torch.nn.functional import cross_entropy

import gpu3d
from gpu3d.interop.torch import BucketAttention, bucket_pool, bucket_unpool, bucketize, gather, scatter, scopes

VALIDATION = "04", "10"  # sequences
BUCKET_SIZE, SCOPE, RATIO = 32, 4, 4
DEFAULTS = {"cpu": {"epochs": 5, "batch": 8, "points": 512}, "cuda": {"epochs": 20, "batch": 64, "points": 8192}}
WAVES = 16
WAVELENGTHS = 1, 20  # metres, shortest and longest


def main(argv: list[str] | None = None) -> int:
    """Train both stages and print their scores after each epoch; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="real sweeps (default: made-up streets)")
    parser.add_argument("--epochs", metavar="N", type=int, help=either("epochs"))
    parser.add_argument(
        "--crops", metavar="N", type=int, default=24, help="crops per sweep and epoch (default: %(default)s)"
    )
    parser.add_argument("--batch", metavar="N", type=int, help=f"crops per process {either('batch')}")
    parser.add_argument("--points", metavar="N", type=int, help=f"points per crop {either('points')}")
    parser.add_argument("--voxel", metavar="M", type=float, default=0.3, help="one point each (default: %(default)s m)")
    parser.add_argument("--channels", metavar="N", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rate", metavar="X", type=float, default=1e-2, help="learning rate (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="autocast: matrix products and attention in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the GPU if there is one"
    )
    arguments = parser.parse_args(argv)
    try:
        with joined(arguments.device) as group:
            for name, value in DEFAULTS[group.device.type].items():
                if getattr(arguments, name) is None:
                    setattr(arguments, name, value)
            run(arguments, group)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def either(name: str) -> str:
    """The help text for a default that depends on the device."""
    return f"(default: {DEFAULTS['cpu'][name]}, on a GPU {DEFAULTS['cuda'][name]})"


# ---- the stage -----------------------------------------------------------------------------------------------------


class Pointwise(nn.Sequential):
    """What the baseline has in place of attention: as many weights, and no neighbours."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: torch.Tensor, buckets: Any, scopes: Any) -> torch.Tensor:
        """Map rows [num_slots, C] to rows of the same shape."""
        return super().forward(x)


class Block(nn.Module):
    """Attention in scopes of buckets, then layers on single points, both with a residual connection.

    Attention also gets waves over the coordinates, which are similar for near points.
    """

    def __init__(self, channels: int, heads: int, shift: int, attention: bool) -> None:
        super().__init__()
        self.shift = shift
        self.before = nn.LayerNorm(channels)
        self.places = nn.Linear(2 * WAVES, channels)
        self.attention = (BucketAttention if attention else Pointwise)(channels, heads)
        self.layers = nn.Sequential(nn.LayerNorm(channels), *perceptron(channels, 2 * channels, channels))

    def forward(self, x: torch.Tensor, waves: torch.Tensor, buckets: gpu3d.Buckets) -> torch.Tensor:
        """Map rows [num_slots, C] to rows of the same shape."""
        at = self.before(x) + self.places(waves)
        x = x + self.attention(at, buckets, scopes(buckets, SCOPE, shift=self.shift))
        return x + self.layers(x)


class Stage(nn.Module):
    """Two blocks, the second in shifted scopes, and pooling. A next stage could take its outputs."""

    def __init__(self, channels: int, heads: int, attention: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, heads, shift, attention) for shift in (0, SCOPE // 2))
        directions = nn.functional.normalize(torch.randn(3, WAVES), dim=0)
        shortest, longest = np.log(WAVELENGTHS)
        self.register_buffer(
            "wavevectors", 2 * np.pi * directions / torch.empty(WAVES).uniform_(shortest, longest).exp()
        )

    def forward(
        self, x: torch.Tensor, points: torch.Tensor, buckets: gpu3d.Buckets
    ) -> tuple[torch.Tensor, gpu3d.Pooling]:
        """Return rows [num_slots, C], and the pooled rows, a quarter as many, with their points and layout."""
        phases = points @ self.wavevectors
        waves = torch.cat([phases.sin(), phases.cos()], dim=1)
        for block in self.blocks:
            x = block(x, waves, buckets)
        return x, bucket_pool(x, points, buckets, ratio=RATIO, reduce="max")


class Segmentation(nn.Module):
    """A network from points [N, 3] and features [N, F] of packed clouds to logits [N, classes]."""

    def __init__(self, features: int, channels: int, classes: int, attention: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Sequential(*perceptron(features, 2 * channels, channels))
        self.stage = Stage(channels, channels // 16, attention)
        self.coarse = nn.Sequential(nn.LayerNorm(channels), *perceptron(channels, 2 * channels, channels))
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, classes))

    def forward(self, points: torch.Tensor, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return logits in the order of the points."""
        buckets = bucketize(points, BUCKET_SIZE, lengths=lengths)  # once; everything below is in slot order
        x, pooled = self.stage(scatter(self.embedding(features), buckets), scatter(points, buckets), buckets)
        coarse = pooled.features + self.coarse(pooled.features)
        return self.head(gather(bucket_unpool(coarse.to(x.dtype), pooled, skip=x), buckets))


def perceptron(inside: int, hidden: int, outside: int) -> tuple[nn.Module, ...]:
    """Two layers with a GELU between them."""
    return nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, outside)


# ---- batches -------------------------------------------------------------------------------------------------------


def load(folder: Path | None, voxel: float) -> tuple[list[Sweep], list[Sweep], str]:
    """Sweeps for training and for validation, thinned to one point per voxel, and a title."""
    if folder is None:
        streets = [thin(made_up_street(seed), voxel) for seed in range(24)]
        return streets[:18], streets[18:], "made-up streets, because there is no --data"
    parts: list[list[Sweep]] = [[], []]
    for sequence, sweeps in read_sweeps(folder).items():
        parts[sequence in VALIDATION] += [thin(sweep, voxel) for sweep in sweeps]
    if not all(parts):
        raise ValueError(
            f"{folder / 'semantickitti'} must hold sweeps SS_FFFFFF.npz of sequences {' and '.join(VALIDATION)} and of "
            f"other sequences, got {len(parts[0])} and {len(parts[1])} sweeps."
        )
    return parts[0], parts[1], "SemanticKITTI"


def crop(sweep: Sweep, count: int, rng: np.random.Generator) -> Sweep:
    """The `count` points nearest to a random one, seen from above, turned about the sensor."""
    away = sweep.points[:, :2] - sweep.points[rng.integers(len(sweep.points)), :2]
    rows = np.argsort((away * away).sum(axis=1), kind="stable")[:count]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]], np.float32)
    return Sweep(sweep.points[rows] @ turn, sweep.remission[rows], sweep.labels[rows])


class Batch(NamedTuple):
    """Packed clouds, one behind the other."""

    points: torch.Tensor  # [N, 3]
    features: torch.Tensor  # [N, 3]: height, distance, remission
    lengths: tuple[int, ...]
    labels: torch.Tensor  # int64 [N]


def collate(sweeps: list[Sweep], device: torch.device) -> Batch:
    """The sweeps as one batch."""
    points = np.concatenate([sweep.points for sweep in sweeps])
    distance = np.linalg.norm(points[:, :2], axis=1)
    remission = np.concatenate([sweep.remission for sweep in sweeps])
    features = np.stack([points[:, 2] / 2, distance / 20, 4 * remission], axis=1)
    labels = np.concatenate([sweep.labels for sweep in sweeps]).astype(np.int64)
    points, features, labels = (torch.from_numpy(x).to(device) for x in (points, features, labels))
    return Batch(points, features, tuple(len(sweep.points) for sweep in sweeps), labels)


# ---- training ------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """The processes that torchrun started, or this process alone."""

    device: torch.device
    rank: int = 0
    count: int = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def print(self, text: str) -> None:
        """Print from one process only."""
        if self.rank == 0:
            print(text, flush=True)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of processes. Each has a GPU of its own, or all share the CPU."""
    gpu = torch.cuda.is_available() if device == "auto" else device == "gpu"
    if gpu and not torch.cuda.is_available():
        raise ImportError(f"torch {torch.__version__} finds no GPU")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ:
        yield Group(place)
        return
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Group(place, dist.get_rank(), dist.get_world_size())
        dist.barrier()  # the first process to end would close the store that the others still use
    finally:
        dist.destroy_process_group()


class Trained(NamedTuple):
    """A network in training."""

    network: Any  # wrapped in DDP if there are several processes
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def run(arguments: argparse.Namespace, group: Group) -> None:
    """Train with and without attention on the same batches."""
    training, validation, title = load(arguments.data, arguments.voxel)
    steps = max(1, len(training) * arguments.crops // (arguments.batch * group.count))
    both = [start(arguments, group, attention, arguments.epochs * steps) for attention in (True, False)]
    weights = class_weights(training).to(group.device)
    group.print(f"{title}: {len(training)} sweeps for training, {len(validation)} to validate, on {device_name(group)}")
    sizes = " and ".join(f"{sum(p.numel() for p in of.network.parameters()):,}" for of in both)
    crops = arguments.batch * group.count
    group.print(f"{sizes} weights; {steps} steps an epoch, of {crops} crops of at most {arguments.points:,} points\n")
    group.print(f"{'':<7}{'with attention':>32}{'without attention':>36}")
    group.print(f"{'epoch':<7}" + "    ".join([f"{'loss':>8}{'mean IoU':>11}{'points/s':>13}"] * 2))
    for epoch in range(arguments.epochs):
        batches = list(epoch_of(training, epoch, steps, arguments, group))
        cells, ious = [], []
        for of in both:
            loss, rate = train(of, batches, weights, arguments, group)
            shares = validate(of, validation, arguments, group)
            cells.append(f"{loss:>8.4f}{np.nanmean(shares):>11.4f}{rate:>13,.0f}")
            ious.append(shares)
        group.print(f"{epoch + 1:<7}" + "    ".join(cells))
    group.print(f"\nIoU of the classes that the validation sweeps have{'':>9}with{'without':>12}")
    for name, shares in zip(CLASSES, np.transpose(ious), strict=True):
        if not np.isnan(shares[0]):
            group.print(f"{name:<16}{shares[0]:>46.4f}{shares[1]:>12.4f}")


def start(arguments: argparse.Namespace, group: Group, attention: bool, steps: int) -> Trained:
    """A new network with its optimizer."""
    torch.manual_seed(arguments.seed)
    network: Any = Segmentation(3, arguments.channels, len(CLASSES), attention).to(group.device)
    if arguments.compile:
        network = torch.compile(network, fullgraph=True)
    if group.count > 1:
        network = nn.parallel.DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(network.parameters(), arguments.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.rate, total_steps=steps, pct_start=0.15)
    return Trained(network, optimizer, schedule)


def class_weights(sweeps: list[Sweep]) -> torch.Tensor:
    """1 / sqrt(share) of each class; 0 for classes that do not occur and for ignored points."""
    counts = np.bincount(np.concatenate([sweep.labels for sweep in sweeps]), minlength=256)[: len(CLASSES)]
    weights = np.sqrt(counts.sum() / np.maximum(counts, 1)) * (counts > 0)
    return torch.tensor(weights, dtype=torch.float32)


def epoch_of(
    sweeps: list[Sweep], epoch: int, steps: int, arguments: argparse.Namespace, group: Group
) -> Iterator[Batch]:
    """Yield this process's part of every batch. The crops do not depend on the number of processes."""
    order = np.random.default_rng([arguments.seed, epoch]).permutation(len(sweeps) * arguments.crops)
    for step in range(steps):
        first = (step * group.count + group.rank) * arguments.batch
        chosen = [order[number % len(order)] for number in range(first, first + arguments.batch)]
        rngs = [np.random.default_rng([arguments.seed, epoch, number]) for number in chosen]
        crops = [crop(sweeps[i % len(sweeps)], arguments.points, rng) for i, rng in zip(chosen, rngs, strict=True)]
        yield collate(crops, group.device)


def train(
    of: Trained, batches: list[Batch], weights: torch.Tensor, arguments: argparse.Namespace, group: Group
) -> tuple[float, float]:
    """Train for an epoch; return its mean loss and the points per second of all processes."""
    of.network.train()
    losses, known = [], torch.cat([weights, weights.new_zeros(256 - len(weights))])
    synchronize(group)
    begin = time.perf_counter()
    # DDP averages gradients over processes, whose labels have different total weights. Dividing by the total over all
    # processes, as below, gives the gradient of the mean over all points.
    masses = group.sum(torch.stack([known[batch.labels].sum() for batch in batches]))
    for (points, features, lengths, labels), mass in zip(batches, masses, strict=True):
        with torch.autocast(group.device.type, torch.bfloat16, enabled=arguments.bfloat16):
            logits = of.network(points, features, lengths)
        loss = cross_entropy(logits.float(), labels, weights, ignore_index=IGNORED, reduction="sum")
        of.optimizer.zero_grad()
        (loss * group.count / mass).backward()
        of.optimizer.step()
        of.schedule.step()
        losses.append(loss.detach() / mass)
    synchronize(group)
    rate = sum(len(batch.points) for batch in batches) / (time.perf_counter() - begin)
    return float(group.sum(torch.stack(losses).mean())), rate * group.count


@torch.no_grad()
def validate(of: Trained, sweeps: list[Sweep], arguments: argparse.Namespace, group: Group) -> np.ndarray:
    """The IoU of every class over whole sweeps; NaN for a class that does not occur."""
    of.network.eval()
    network = of.network.module if group.count > 1 else of.network  # each process has other sweeps, so not through DDP
    classes = len(CLASSES)
    table = torch.zeros(classes, classes, dtype=torch.int64, device=group.device)  # [true, predicted]
    for sweep in sweeps[group.rank :: group.count]:
        points, features, lengths, labels = collate([sweep], group.device)
        with torch.autocast(group.device.type, torch.bfloat16, enabled=arguments.bfloat16):
            said = network(points, features, lengths).argmax(dim=1)
        known = labels != IGNORED
        pairs = labels[known] * classes + said[known]
        table += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    counts = group.sum(table).cpu().numpy().astype(np.float64)
    true, said, right = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
    return np.where(true > 0, right / np.maximum(true + said - right, 1), np.nan)


def synchronize(group: Group) -> None:
    """Wait for the GPU."""
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)


def device_name(group: Group) -> str:
    """The name of the device that the networks run on."""
    gpu = group.device.type == "cuda"
    name = torch.cuda.get_device_name(group.device) if gpu else f"the CPU, torch {torch.__version__}"
    return name if group.count == 1 else f"{name}, {group.count} processes"


if __name__ == "__main__":
    raise SystemExit(main())
