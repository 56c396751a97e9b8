# SPDX-License-Identifier: Apache-2.0
"""A small network that completes shapes with one half missing, trained with APML and with the Chamfer distance.

Both trainings start from the same weights and take the same batches and steps. Their predictions for unseen shapes are
compared by two distances, over several seeds: the earth mover's distance of an exact assignment, and Chamfer.

With --data the shapes come from ModelNet10: a file shapes/modelnet10_vox32_train.npz with `packed` uint8
[shapes, 4096], solids of 32^3 bits. A surface point is placed at random in its voxel. Without --data the shapes are
made-up boxes and rings. Every eighth shape is kept for validation.

    python examples/completion.py                            # made-up shapes
    python examples/completion.py --data ../shared/data --compile
    python examples/completion.py --library jax
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bucket_attention import BACKGROUND, BRIGHT, FAINT
from pooling_levels import GRID, project
from scipy.ndimage import binary_erosion

import gpu3d

LOSSES = "APML", "Chamfer"
SHAPES = 1024
ROOM = 64  # max_entries per point, for a compiled step, which cannot count the entries


def main(argv: list[str] | None = None) -> int:
    """Train with both losses, print the table and draw the picture; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="real shapes (default: made-up shapes)")
    parser.add_argument("--library", choices=LIBRARIES, default="torch", help="(default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--batch", metavar="N", type=int, default=16, help="shapes per step (default: %(default)s)")
    parser.add_argument("--points", metavar="N", type=int, default=256, help="points per shape (default: %(default)s)")
    parser.add_argument("--rate", metavar="X", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile; JAX always compiles")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("-o", "--out", metavar="PNG", type=Path, default=Path("gpu3d-demo-completion.png"))
    arguments = parser.parse_args(argv)
    try:
        training, validation, title = load(arguments.data, arguments.points)
        print(f"{title}: {len(training)} shapes for training, {len(validation)} for validation")
        print(
            f"{arguments.library}: {arguments.steps} steps of {arguments.batch} shapes of {arguments.points} points\n"
        )
        results = {name: [] for name in LOSSES}
        print(f"{'seed':<8}{'loss':<10}{'EMD':>10}{'Chamfer':>10}{'a step':>13}")
        for seed in range(arguments.seeds):
            for name in LOSSES:
                result = train(name, training, validation, seed, arguments)
                results[name].append(result)
                row = f"{seed:<8}{name:<10}{result.emd.mean():>10.4f}{result.chamfer.mean():>10.4f}"
                print(f"{row}{result.milliseconds:>10.2f} ms", flush=True)
        print_summary(results)
        draw(validation, results, title, arguments.out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"picture: {arguments.out}")
    return 0


# ---- shapes --------------------------------------------------------------------------------------------------------


class Shapes(NamedTuple):
    """Whole shapes in a cube of side 2, and the half of each that the network sees."""

    whole: np.ndarray  # float32 [shapes, n, 3]
    seen: np.ndarray  # float32 [shapes, n / 2, 3]: the half that is farthest along a random direction

    def __len__(self) -> int:
        return len(self.whole)


def load(folder: Path | None, count: int) -> tuple[Shapes, Shapes, str]:
    """Shapes for training, shapes for validation, and a title."""
    rng = np.random.default_rng(0)
    if folder is None:
        whole = np.stack([made_up(count, rng) for _ in range(SHAPES)])
        title = "made-up boxes and rings, because there is no --data"
    else:
        with np.load(folder / "shapes" / "modelnet10_vox32_train.npz", allow_pickle=False) as arrays:
            packed = np.unique(arrays["packed"], axis=0)  # without duplicates, which could be in both parts
        packed = packed[packed.any(axis=1)]
        packed = packed[rng.permutation(len(packed))[:SHAPES]]
        solids = np.unpackbits(packed, axis=1).reshape(-1, 32, 32, 32)
        whole, title = np.stack([surface(solid, count, rng) for solid in solids]), "ModelNet10"
    directions = rng.standard_normal((len(whole), 3, 1))
    order = np.argsort(-(whole @ directions)[..., 0], axis=1, kind="stable")[:, : count // 2]
    shapes = Shapes(whole.astype(np.float32), np.take_along_axis(whole, order[..., None], axis=1).astype(np.float32))
    kept = np.arange(len(whole)) % 8 == 0
    return Shapes(*(x[~kept] for x in shapes)), Shapes(*(x[kept] for x in shapes)), title


def surface(solid: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points [count, 3] in the voxels at the surface of a solid. No voxel repeats before all have been used."""
    voxels = np.argwhere(solid & ~binary_erosion(solid))
    rows = np.concatenate([rng.permutation(len(voxels)) for _ in range(-(-count // len(voxels)))])[:count]
    return (voxels[rows] + rng.random((count, 3))) / 16 - 1


def made_up(count: int, rng: np.random.Generator) -> np.ndarray:
    """Points [count, 3] on the surface of a box or a ring, turned about the vertical axis."""
    if rng.random() < 0.5:
        sides = rng.uniform(0.25, 0.65, 3)
        points = rng.uniform(-1, 1, (count, 3))
        areas = np.prod(sides) / sides
        axis = rng.choice(3, count, p=areas / areas.sum())
        points[np.arange(count), axis] = rng.choice([-1, 1], count)
        points *= sides
    else:
        around, tube = rng.uniform(0, 2 * np.pi, (2, count))
        radius, thick = rng.uniform(0.45, 0.65), rng.uniform(0.1, 0.25)
        ring = radius + thick * np.cos(tube)
        points = np.stack([ring * np.cos(around), ring * np.sin(around), thick * np.sin(tube)], axis=1)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return points @ turn


# ---- training ------------------------------------------------------------------------------------------------------


Weights = list[list[tuple[np.ndarray, np.ndarray]]]  # the layers of the encoder and of the decoder, each (weight, bias)


def initial(points: int, seed: int) -> Weights:
    """The initial weights, the same in every library: [out, in] and [out], as in torch.nn.Linear.

    The encoder computes features of each seen point and takes their maximum over the points. From it the decoder
    computes the points of the whole shape.
    """
    rng = np.random.default_rng(seed)

    def layer(inside: int, outside: int) -> tuple[np.ndarray, np.ndarray]:
        limit = inside**-0.5
        return tuple(rng.uniform(-limit, limit, shape).astype(np.float32) for shape in ((outside, inside), outside))

    widths = (3, 64, 128, 256), (256, 256, 512, 3 * points)
    return [[layer(*pair) for pair in itertools.pairwise(part)] for part in widths]


Step = Callable[[np.ndarray, float], Any]  # of shape numbers and a learning rate; returns the loss
Say = Callable[[np.ndarray], Any]  # from seen points [B, m, 3] to whole shapes [B, n, 3]


def in_torch(name: str, shapes: Shapes, weights: Weights, arguments: argparse.Namespace) -> tuple[Step, Say]:
    """Training in torch."""
    import torch
    from torch import nn

    from gpu3d.interop import torch as interop

    device = torch.device("cpu" if on_cpu(arguments.device, torch.cuda.is_available()) else "cuda")
    parts = []
    for part in weights:
        layers = []
        for w, b in part:
            layers += [nn.Linear(*w.shape[::-1]), nn.ReLU()]
            layers[-2].load_state_dict({"weight": torch.from_numpy(w), "bias": torch.from_numpy(b)})
        parts.append(nn.Sequential(*layers[:-1]).to(device))
    encoder, decoder = parts
    whole, seen = (torch.from_numpy(x).to(device) for x in shapes)
    count = whole.shape[1]
    room = ROOM * 2 * arguments.batch * count if arguments.compile else None

    def say(seen: torch.Tensor) -> torch.Tensor:
        return decoder(encoder(seen).amax(dim=1)).unflatten(1, (count, 3))

    def loss_of(seen: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        said = say(seen)
        if name == "APML":
            return interop.apml(said, whole, max_entries=room) / count
        return interop.chamfer(said, whole)

    call: Any = torch.compile(loss_of, fullgraph=True) if arguments.compile else loss_of
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])

    def step(rows: np.ndarray, rate: float) -> float:
        chosen = torch.from_numpy(rows).to(device)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = call(seen[chosen], whole[chosen])
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def answer(seen: np.ndarray) -> np.ndarray:
        return say(torch.from_numpy(seen).to(device)).cpu().numpy()

    return step, answer


def in_jax(name: str, shapes: Shapes, weights: Weights, arguments: argparse.Namespace) -> tuple[Step, Say]:
    """Training in JAX: one jitted step, with Adam as in torch."""
    import jax
    import jax.numpy as jnp

    from gpu3d.interop import jax as interop

    device = jax.devices("cpu")[0]
    if not on_cpu(arguments.device, jax.default_backend() == "gpu"):
        device = jax.devices("gpu")[0]
    whole, seen, parameters = jax.device_put((*shapes, weights), device)
    count = whole.shape[1]
    room = ROOM * 2 * arguments.batch * count

    def say(parameters: Any, seen: Any) -> Any:
        encoder, decoder = parameters
        return through(decoder, through(encoder, seen).max(axis=1)).reshape(-1, count, 3)

    def through(layers: Any, x: Any) -> Any:
        for w, b in layers[:-1]:
            x = jax.nn.relu(x @ w.T + b)
        w, b = layers[-1]
        return x @ w.T + b

    def loss_of(parameters: Any, seen: Any, whole: Any) -> Any:
        said = say(parameters, seen)
        if name == "APML":
            return interop.apml(said, whole, max_entries=room) / count
        return interop.chamfer(said, whole)

    @jax.jit
    def adam(state: Any, seen: Any, whole: Any, rate: float) -> Any:
        parameters, first, second, number = state
        loss, gradients = jax.value_and_grad(loss_of)(parameters, seen, whole)
        number = number + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)

        def moved(p: Any, m: Any, v: Any) -> Any:
            return p - rate * (m / (1 - 0.9**number)) / (jnp.sqrt(v / (1 - 0.999**number)) + 1e-8)

        return loss, (jax.tree.map(moved, parameters, first, second), first, second, number)

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    state = parameters, zeros, zeros, jnp.zeros((), jnp.float32)

    def step(rows: np.ndarray, rate: float) -> float:
        nonlocal state
        loss, state = adam(state, seen[rows], whole[rows], rate)
        return float(loss)

    return step, lambda seen: np.asarray(jax.jit(say)(state[0], jax.device_put(seen, device)))


LIBRARIES = {"torch": in_torch, "jax": in_jax}


def on_cpu(device: str, has_gpu: bool) -> bool:
    """Whether to train on the CPU."""
    if device == "gpu" and not has_gpu:
        raise ImportError("the library finds no GPU")
    return device == "cpu" or not has_gpu


class Result(NamedTuple):
    """The predictions of a network for the validation shapes, and their distances."""

    said: np.ndarray  # float32 [shapes, n, 3]
    emd: np.ndarray  # [shapes]
    chamfer: np.ndarray  # [shapes]
    milliseconds: float  # median time of a training step


def train(name: str, training: Shapes, validation: Shapes, seed: int, arguments: argparse.Namespace) -> Result:
    """Train one network with one loss, and measure its predictions."""
    rng = np.random.default_rng(seed)
    weights = initial(training.whole.shape[1], seed)
    step, say = LIBRARIES[arguments.library](name, training, weights, arguments)
    times = []
    for number in range(arguments.steps):
        rows = rng.choice(len(training), arguments.batch)
        rate = arguments.rate * (1 + np.cos(np.pi * number / arguments.steps)) / 2
        begin = time.perf_counter()
        loss = step(rows, rate)
        times.append(1e3 * (time.perf_counter() - begin))
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss} in step {number} of {name}, seed {seed}")
    said = say(validation.seen)
    pairs = list(zip(said, validation.whole, strict=True))
    emd, chamfer = (np.array([float(of(*pair)) for pair in pairs]) for of in (gpu3d.emd, gpu3d.chamfer))
    return Result(said, emd, chamfer, float(np.median(times)))


# ---- what is shown -------------------------------------------------------------------------------------------------


def print_summary(results: dict[str, list[Result]]) -> None:
    """Print mean and standard deviation over the seeds, and how often APML gives the lower distance."""
    print(f"\n{'over the seeds':<18}{'EMD':>18}{'Chamfer':>18}")
    for name, of_seeds in results.items():
        cells = ""
        for measure in ("emd", "chamfer"):
            means = np.array([getattr(result, measure).mean() for result in of_seeds])
            cells += f"{f'{means.mean():.4f} +- {means.std():.4f}':>18}"
        print(f"{name:<18}{cells}")
    for measure, title in (("emd", "EMD"), ("chamfer", "Chamfer")):
        one, other = (np.concatenate([getattr(result, measure) for result in results[name]]) for name in LOSSES)
        change = 100 * (one.mean() / other.mean() - 1)
        print(f"{title} with APML: {change:+.1f} %, lower for {100 * (one < other).mean():.0f} % of the shapes")


SIZE = 14.0, 12.6  # inches
COLUMNS = ("seen", "#8b95a5"), ("APML", "#4dd2ff"), ("Chamfer", "#ff9f45"), ("the whole shape", "#7ee081")
ROWS = 4


def draw(validation: Shapes, results: dict[str, list[Result]], title: str, path: Path) -> None:
    """Draw the first validation shapes, with the predictions of the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    half = 1.1 * np.abs(project(validation.whole[:ROWS])).max()
    for row in range(min(ROWS, len(validation))):
        clouds = validation.seen[row], *(results[name][0].said[row] for name in LOSSES), validation.whole[row]
        _, *middle, _ = COLUMNS
        notes = ["", *(f"EMD {results[name][0].emd[row]:.3f}" for name, _ in middle), ""]
        for column, (points, (name, color), note) in enumerate(zip(clouds, COLUMNS, notes, strict=True)):
            place = (0.008 + 0.2475 * column, 0.706 - 0.2195 * row, 0.2415, 0.2125)
            axes = figure.add_axes(place, facecolor=BACKGROUND)
            axes.spines[:].set_color(GRID)
            axes.scatter(*project(points[np.argsort(-points[:, 1])]).T, s=13, c=color, linewidths=0)
            axes.set(xlim=(-1.26 * half, 1.26 * half), ylim=(-half, half), xticks=[], yticks=[])
            axes.text(0.03, 0.05, note, transform=axes.transAxes, color=BRIGHT, size=12)
            if row == 0:
                axes.set_title(name, color=BRIGHT, size=14, loc="left", pad=7)
    figure.text(0.008, 0.971, "What is missing, completed", color=BRIGHT, size=19, va="center")
    figure.text(0.992, 0.971, title.partition(",")[0], color=FAINT, size=13, va="center", ha="right")
    means = ", ".join(f"{np.mean([result.emd.mean() for result in results[name]]):.4f} with {name}" for name in LOSSES)
    legend = f"Shapes that no network has seen. EMD of {len(validation)} such shapes, over the seeds: {means}."
    figure.text(0.008, 0.024, legend, color=FAINT, size=12.5, va="center")
    figure.savefig(path, format="png")


if __name__ == "__main__":
    raise SystemExit(main())
