# SPDX-License-Identifier: Apache-2.0
"""gpu3d.flash3d: inference and training steps of the backbone, in one CUDA graph each, beside two torch models.

Points are a real sweep, repeated where a row has more points; features and labels are random numbers, and parameters
are those of `init`. A row counts everything from points and features on: bucketize of all levels, the network, and in a
training step also drop path, the loss, the backward, clipping and AdamW. Activations are bfloat16.

- The fair twin is `torch_twin.Twin`: the same network on gpu3d's layouts, which are computed before the clock starts,
  with torch's attention, compiled except for the loss, in a CUDA graph. So it has no geometry to do.
- The PTv3-like twin is `torch_twin.SerializedTwin`, compiled and timed eagerly, since torch.unique cannot be captured.
- "a batch larger than every one before", or "with new lengths", is the time from the call to its classes, host and
  device together. The first needs a new plan, and is launched without a graph; the second is served by a graph.
- Memory is the workspace of the plan, and for a training step also parameters, moments, gradients and the copy of the
  parameters in bfloat16.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks import data, timing
from benchmarks.table import Peer, Row, Setting, measured_peer
from gpu3d import flash3d
from gpu3d._arrays import FLOAT32, UINT8
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Branch, Call, Input, Launch, Plan, Steps
from gpu3d.flash3d import network
from gpu3d.flash3d.levels import add_geometry, layout_of, write_tables
from gpu3d.flash3d.params import arena_size, flat

SWEEP, KITTI, MILLION = 34_688, 124_668, 1_000_000
IGNORE = 255


class Target(NamedTuple):
    """Target and stretch target of inference and of a training step, ms."""

    inference: tuple[float, float]
    step: tuple[float, float]


TARGETS = {
    ("flash3d_46m", 1, SWEEP): Target((4.3, 3.1), (15, 11.5)),
    ("flash3d_129m", 1, SWEEP): Target((6.3, 4.8), (24, 19)),
    ("flash3d_46m", 8, SWEEP): Target((30, 23), (108, 86)),
    ("flash3d_46m", 1, KITTI): Target((14.5, 11), (53, 42)),
    ("flash3d_46m", 1, MILLION): Target((110, 85), (400, 320)),
}
GROWTH = (100_000, 600_000), (6.2, 6.0)
UNSEEN = (12, 6)  # ms
BUCKETS = (60, 62, 64, 68, 72, 76)  # of batches that need a plan each
MEMORY = {("inference", 1): 0.15, ("training", 1): 2.8, ("training", 8): 14}  # GB
RECOMPUTE = 4  # GB, of a training step of 8 sweeps
BUCKETIZE = {"all levels": 0.10, "level 0": 0.03}  # ms; the first blocks wait for level 0 only


def run(setting: Setting) -> Iterator[Row]:
    found = {}
    for (preset, clouds, points), target in TARGETS.items():
        inputs = _inputs(setting, preset, clouds, points)
        what = f"{preset}, {clouds} x {points:,}"
        for name, call, targets in (
            ("inference", _forward(inputs), target.inference),
            ("training step", _step(inputs), target.step),
        ):
            ours = timing.graph_time(call.run, calls=1, keep=False)
            yield Row(f"{what}: {name}", "graph", "ms", ours, *targets)
            kind = name.split()[0]
            if preset == "flash3d_46m" and (kind, clouds) in MEMORY and points == SWEEP:
                yield Row(f"{what}: {name}, memory", "check", "GB", call.bytes / 1e9, MEMORY[kind, clouds])
            found[preset, clouds, points, name] = ours
            timing.free()
    again = _step(_inputs(setting, "flash3d_46m", 8, SWEEP), recompute=True)
    ours = timing.graph_time(again.run, calls=1, keep=False)
    yield Row("flash3d_46m, 8 x 34,688: training step, recompute", "graph", "ms", ours)
    yield Row("flash3d_46m, 8 x 34,688: the same, memory", "check", "GB", again.bytes / 1e9, RECOMPUTE)
    del again
    timing.free()
    sizes, targets = GROWTH
    times = [timing.graph_time(_forward(_inputs(setting, "flash3d_46m", 1, n)).run, calls=1, keep=False) for n in sizes]
    note = f"{times[0]:.2f} and {times[1]:.2f} ms"
    yield Row("flash3d_46m, inference, 600,000 over 100,000", "graph", "x", times[1] / times[0], *targets, note=note)
    yield from _bucketize(_inputs(setting, "flash3d_46m", 1, SWEEP))
    for what, time_of_call in zip(("larger than every one before", "with new lengths"), _unseen(setting), strict=True):
        yield Row(f"flash3d_46m, a batch {what}: inference", "host", "ms", time_of_call, *UNSEEN)
    timing.free()
    inputs = _inputs(setting, "flash3d_46m", 1, SWEEP)
    for twin, name in itertools.product(TWINS, ("inference", "training step")):  # torch compiles them for minutes
        yield _beside(setting, inputs, twin, name, found["flash3d_46m", 1, SWEEP, name])
        timing.free()


# ---- the calls -----------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Arrays on the GPU."""

    config: flash3d.Config
    lengths: tuple[int, ...]
    points: Any
    features: Any
    labels: Any


def _inputs(setting: Setting, preset: str, clouds: int, points: int) -> Inputs:
    import cupy

    config, rng = flash3d.presets[preset], np.random.default_rng(0)
    cloud = data.sweep_cloud(points, setting.folder)
    n = clouds * points
    features = rng.standard_normal((n, config.in_channels), np.float32)
    labels = rng.integers(0, config.classes, n).astype(np.uint8)
    return Inputs(config, (points,) * clouds, *map(cupy.asarray, (np.tile(cloud, (clouds, 1)), features, labels)))


class Prepared(NamedTuple):
    """A call that is ready to run on the current stream, and the bytes that it holds beside its inputs."""

    run: timing.Call
    bytes: int


def _arenas(config: flash3d.Config) -> tuple[Any, Any]:
    """The parameters, and their copy in bfloat16."""
    import cupy

    masters = next(iter(flat(flash3d.init(config, device=0)).values())).base
    weights = cupy.empty(arena_size(config), np.uint16)
    _prepared(network.cast_call(config), [masters, weights]).run()
    return masters, weights


def _prepared(call: Call, arrays: list[Any], held: int = 0) -> Prepared:
    import cupy

    kept = [*arrays, cupy.empty(call.plan.workspace, np.uint8)]

    def run() -> None:
        memories = [array.data.ptr for array in kept]
        launcher.run(call, memories, kept[0].data.device_id, cupy.cuda.get_current_stream().ptr)

    return Prepared(run, call.plan.workspace + held)


def _forward(inputs: Inputs) -> Prepared:
    import cupy

    config, device = inputs.config, launcher.device(0)
    layout = layout_of(inputs.lengths, config, device)
    plan = network.forward_plan(config, layout.sizes, FLOAT32, device)
    logits = cupy.empty((layout.slots, config.classes), np.float32)
    arrays = [inputs.points, inputs.features, write_tables(layout), *_arenas(config), logits]
    return _prepared(Call(plan, {"points": len(inputs.points)}), arrays)


def _step(inputs: Inputs, recompute: bool = False) -> Prepared:
    import cupy

    config, size, device = inputs.config, arena_size(inputs.config), launcher.device(0)
    layout = layout_of(inputs.lengths, config, device)
    plan = network.step_plan(config, layout.sizes, FLOAT32, UINT8, IGNORE, device, recompute)
    options = {"points": len(inputs.points), "seed": 0, "rate": 2e-3, "steps": 100_000, "decay": 5e-3, "clip": 1.0}
    moments = [cupy.zeros(size, np.float32) for _ in range(3)]
    state = cupy.zeros(2, np.uint32), *(cupy.empty((), np.float32) for _ in range(2))
    arrays = [inputs.points, inputs.features, inputs.labels, write_tables(layout), *_arenas(config), *moments, *state]
    return _prepared(Call(plan, options), arrays, held=(4 * 4 + 2) * size)


def _bucketize(inputs: Inputs) -> Iterator[Row]:
    """The sorts of the geometry, one after another, for all levels and for level 0, which the first blocks wait for."""
    import cupy

    config, device = inputs.config, launcher.device(0)
    layout = layout_of(inputs.lengths, config, device)
    steps = Steps(inputs=2, results=0)
    add_geometry(steps, config, layout.sizes, Input(0), Input(1))
    steps.join()
    plan = steps.plan()
    memory = [inputs.points, write_tables(layout), cupy.empty(plan.workspace, np.uint8)]

    def calling(some: Iterable[Any]) -> timing.Call:
        call = Call(Plan(tuple(some), plan.inputs, plan.results, plan.pieces, plan.workspace), {})
        addresses = [array.data.ptr for array in memory]
        return lambda: launcher.run(call, addresses, 0, cupy.cuda.get_current_stream().ptr)

    calling(plan.steps)()  # writes what the sorts read
    first = itertools.takewhile(lambda step: not isinstance(step, Branch), plan.steps)
    for what, some in (("all levels", plan.steps), ("level 0", first)):
        sorts = [step for step in some if isinstance(step, Launch) and step.kernel.source == "buckets_merge"]
        ours = timing.graph_time(calling(sorts))
        yield Row(f"flash3d_46m, 34,688 points: bucketize, {what}", "graph", "ms", ours, BUCKETIZE[what])


def _unseen(setting: Setting) -> tuple[float, float]:
    """Milliseconds of a batch larger than every one before, and of one with new lengths, once kernels are loaded."""
    import cupy

    config = flash3d.presets["flash3d_46m"]
    most = BUCKETS[-1] * config.bucket_size
    inputs = _inputs(setting, "flash3d_46m", 1, most)
    predict = flash3d.compile(flash3d.init(config, device=0), config, max_points=2 * most)

    def time_of(points: int) -> float:
        cupy.cuda.Device().synchronize()
        begin = time.perf_counter()
        predict(inputs.points[:points], inputs.features[:points])
        cupy.cuda.Device().synchronize()
        return 1e3 * (time.perf_counter() - begin)

    larger = [time_of(count * config.bucket_size) for count in BUCKETS]
    shorter = [time_of(most - i) for i in range(20)]
    return statistics.median(larger[1:]), statistics.median(shorter[2:])


# ---- twins ---------------------------------------------------------------------------------------------------------


def _beside(setting: Setting, inputs: Inputs, twin: str, name: str, ours: float) -> Row:
    """How many times as fast the call is as that of a twin."""
    measure, timed, targets = TWINS[twin]
    if setting.quick:
        peer = Peer(twin, timed, None, "left out by --quick")
    else:
        peer = measured_peer(twin, timed, functools.partial(measure, inputs, name == "training step"))
    times = None if peer.value is None else peer.value / ours
    note = f"{ours:.2f} ms" if times else f"skipped: {peer.why_skipped}"
    what = f"flash3d_46m, {name}, beside {twin}"
    return Row(what, timed, "x", times, *targets, at_least=True, peers=(peer,), note=note)


def _fair(inputs: Inputs, training: bool) -> float:
    from benchmarks import torch_twin

    model = torch_twin.Twin(inputs.config).cuda()
    points, features, labels = map(data.to_torch, (inputs.points, inputs.features, inputs.labels))
    scene = torch_twin.scene(points, inputs.config, inputs.lengths)
    if training:
        return timing.torch_graph_time(torch_twin.training_step(model, labels.long(), scene, features), 1, keep=False)
    return timing.torch_graph_time(torch_twin.inference(model, scene, features), 1, keep=False)


def _serialized(inputs: Inputs, training: bool) -> float:
    from benchmarks import torch_twin

    model = torch_twin.SerializedTwin(inputs.config).cuda()
    points, features, labels = map(data.to_torch, (inputs.points, inputs.features, inputs.labels))
    if training:
        return timing.call_time(torch_twin.training_step(model, labels.long(), points, features, inputs.lengths))
    return timing.call_time(torch_twin.inference(model, points, features, inputs.lengths))


# The functions that measure, how, and the targets: times as fast.
TWINS: dict[str, tuple[Callable[[Inputs, bool], float], Any, tuple[float, float]]] = {
    "the fair twin": (_fair, "graph", (1.3, 1.8)),
    "the PTv3-like twin": (_serialized, "eager", (2, 4)),
}
