# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host: the time from a Python call until it returns, and the memory that caches keep.

- Times are medians of single calls. The inputs are small, so that the GPU is faster than the host. The host waits for
  the GPU before every 20th call, while the clock is stopped, so the queue of launches never fills. A result is dropped
  after the clock has stopped.
- "again" repeats the same call. "new lengths" is a call with lengths that this process has never seen, although its
  kernels are compiled. It has two clouds of 1025 to 2048 points, or of 513 to 1024 in each batch of a Chamfer distance.
- Memory is the growth of the resident memory of a new process. Results are dropped at once, so only caches stay.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import gpu3d
from benchmarks import data, timing
from benchmarks.table import Row, Setting

ROOT = Path(__file__).resolve().parent.parent

SIZE, BUCKET_SIZE, SCOPE = 4096, 512, 2
HEADS, DIM, CHANNELS = 4, 16, 64
LOSS_SIZE = 1024
MAX_ENTRIES = 16 * 2 * LOSS_SIZE
CLOUDS, SMALL_BUCKET = 20_000, 16  # a batch of many clouds of 1 to 20 points

WARM, CALLS = 60, 1000
FEW_CALLS = 60  # for calls that take about a millisecond
MANY_LENGTHS, MANY_BATCHES = 10_000, 1_100
SECONDS = 25  # no further call is made after this time

# Targets and stretch targets, microseconds.
AGAIN = {
    "bucketize, 4096 points": (16, 12),
    "bucket_attention, no lse, 4096 points": (18, 12),
    "bucket_pool, C = 64, 4096 points": (26, 18),
    "knn, k = 8, 4096 points in themselves": (30, 20),
    "chamfer 1 x 1024": (35, 25),
    "chamfer_value_and_grad 1 x 1024": (55, 40),
    "apml_value_and_grad 1 x 1024, max_entries": (60, 45),
}
NEW = {
    "bucketize": (45, 35),
    "chamfer": (110, 80),
    "bucketize, scopes, attention, pool": (200, 150),
}
TORCH = (200, 150)
BATCH_MUST = 1  # ms
MEMORY_MUST = {"lengths": 32, "batches": 128}  # MB


def run(setting: Setting) -> Iterator[Row]:
    inputs = _inputs(setting.folder)
    pairs = _never_seen(1025, 2048)
    for name, call in _again(inputs).items():
        yield Row(f"again: {name}", "host", "us", _median(itertools.repeat(call, WARM + CALLS)), *AGAIN[name])
    for_losses = _never_seen(513, LOSS_SIZE)
    new = _bucketizes(inputs, pairs), _chamfers(inputs, for_losses), _bucketizes_to_pools(inputs, pairs)
    for name, calls in zip(NEW, new, strict=True):
        yield Row(f"new lengths: {name}", "host", "us", _median(itertools.islice(calls, WARM + CALLS)), *NEW[name])
    yield from _torch_new_lengths(inputs, pairs)
    yield from _batches_of_many_clouds()
    timing.free()
    if not setting.quick:
        yield from _memory()


def _median(calls: Iterable[timing.Call], warm: int = WARM) -> float:
    """Median time of a call in microseconds, without the first `warm` calls."""
    return 1e3 * statistics.median(timing.host_times(calls)[warm:])


# ---- the calls -----------------------------------------------------------------------------------------------------


@functools.cache
def _inputs(folder: Path | None) -> dict[str, Any]:
    """CuPy arrays. Calls use their first rows."""
    import cupy

    rng = np.random.default_rng(0)

    def rows(*shape: int) -> Any:
        return cupy.asarray(rng.standard_normal((2 * SIZE, *shape), np.float32).astype(bfloat16))

    x, y = data.pair("shell", LOSS_SIZE, copies=2)
    return {
        "points": cupy.asarray(data.sweep_cloud(2 * SIZE, folder)),
        **{name: rows(HEADS, DIM) for name in ("q", "k", "v")},
        "features": rows(CHANNELS),
        "x": cupy.asarray(x),
        "y": cupy.asarray(y),
    }


def _again(inputs: dict[str, Any]) -> dict[str, timing.Call]:
    points, features = inputs["points"][:SIZE], inputs["features"][:SIZE]
    q, k, v = (inputs[name][:SIZE] for name in ("q", "k", "v"))
    x, y = (inputs[name][:LOSS_SIZE] for name in ("x", "y"))
    buckets = gpu3d.bucketize(points, BUCKET_SIZE)
    scopes, slots = gpu3d.scopes(buckets, SCOPE), buckets.scatter(points)
    calls = (
        lambda: gpu3d.bucketize(points, BUCKET_SIZE),
        lambda: gpu3d.bucket_attention(q, k, v, buckets, scopes),
        lambda: gpu3d.bucket_pool(features, slots, buckets),
        lambda: gpu3d.knn(points, points, 8),
        lambda: gpu3d.chamfer(x, y),
        lambda: gpu3d.chamfer_value_and_grad(x, y),
        lambda: gpu3d.apml_value_and_grad(x, y, max_entries=MAX_ENTRIES),
    )
    return dict(zip(AGAIN, calls, strict=True))


# ---- calls with new lengths: arrays are sliced before the clock starts ---------------------------------------------


def _never_seen(least: int, most: int) -> Iterator[list[int]]:
    """Yield lengths of two clouds. No pair comes twice."""
    span = most - least + 1
    for i in range(span * span):
        yield [least + i % span, least + (7 * i + i // span) % span]


def _bucketizes(inputs: dict[str, Any], pairs: Iterator[list[int]]) -> Iterator[timing.Call]:
    for lengths in pairs:
        yield functools.partial(gpu3d.bucketize, inputs["points"][: sum(lengths)], BUCKET_SIZE, lengths=lengths)


def _chamfers(inputs: dict[str, Any], pairs: Iterator[list[int]]) -> Iterator[timing.Call]:
    for lengths in pairs:
        x, y = (inputs[name][: sum(lengths)] for name in ("x", "y"))
        yield functools.partial(gpu3d.chamfer, x, y, x_lengths=lengths, y_lengths=lengths[::-1])


def _bucketizes_to_pools(inputs: dict[str, Any], pairs: Iterator[list[int]]) -> Iterator[timing.Call]:
    for lengths in pairs:
        slots = sum(-(-n // BUCKET_SIZE) * BUCKET_SIZE for n in lengths)
        rows = [inputs[name][:slots] for name in ("q", "k", "v", "features", "points")]
        yield functools.partial(_bucketize_to_pool, inputs["points"][: sum(lengths)], lengths, *rows)


def _bucketize_to_pool(points: Any, lengths: list[int], q: Any, k: Any, v: Any, features: Any, in_slots: Any) -> Any:
    buckets = gpu3d.bucketize(points, BUCKET_SIZE, lengths=lengths)
    out = gpu3d.bucket_attention(q, k, v, buckets, gpu3d.scopes(buckets, SCOPE))
    return out, gpu3d.bucket_pool(features, in_slots, buckets)


def _torch_new_lengths(inputs: dict[str, Any], pairs: Iterator[list[int]]) -> Iterator[Row]:
    names = (
        "torch, new lengths: bucketize + scatter + gather",
        f"torch, the same after {MANY_LENGTHS:,} different lengths",
    )
    try:
        import torch

        why_not = "" if torch.cuda.is_available() else "this torch has no CUDA device"
    except ImportError as error:
        why_not = str(error)
    if why_not:
        for name in names:
            yield Row(name, "host", "us", None, *TORCH, note=f"skipped: {why_not}")
        return
    from gpu3d.interop import torch as g

    points, features = data.to_torch(inputs["points"]), data.to_torch(inputs["features"])

    def call(points: Any, features: Any, lengths: list[int]) -> Any:
        buckets = g.bucketize(points, BUCKET_SIZE, lengths=lengths)
        return g.gather(g.scatter(features, buckets), buckets)

    calls = (functools.partial(call, points[: sum(lengths)], features[: sum(lengths)], lengths) for lengths in pairs)
    yield Row(names[0], "host", "us", _median(itertools.islice(calls, WARM + CALLS)), *TORCH)
    _median(itertools.islice(calls, MANY_LENGTHS))
    yield Row(names[1], "host", "us", _median(itertools.islice(calls, WARM + CALLS)), *TORCH)


def _batches(count: int) -> Iterator[list[int]]:
    """Yield lengths of CLOUDS clouds. No batch comes twice, and all have the same number of points."""
    lengths = np.random.default_rng(0).integers(1, 20, CLOUDS)
    lengths[0] = 20  # no other cloud has 20, so every rotation of the lengths is different
    for start in range(count):
        yield np.roll(lengths, start).tolist()


def _batch_points() -> Any:
    import cupy

    return cupy.asarray(np.random.default_rng(0).random((sum(next(_batches(1))), 3), np.float32))


def _batches_of_many_clouds() -> Iterator[Row]:
    points = _batch_points()
    call = functools.partial(gpu3d.bucketize, points, SMALL_BUCKET)
    *others, again = (functools.partial(call, lengths=lengths) for lengths in _batches(FEW_CALLS + 1))
    for which, calls in (("again", itertools.repeat(again, FEW_CALLS)), ("new lengths", others)):
        yield Row(f"{which}: bucketize, {CLOUDS:,} clouds", "host", "ms", _median(calls, warm=5) / 1e3, BATCH_MUST)


# ---- memory --------------------------------------------------------------------------------------------------------


def _memory() -> Iterator[Row]:
    """Each row runs in a process of its own, because the caches of this process are full already."""
    lengths = f"memory after {MANY_LENGTHS:,} lengths"
    batches = f"memory after {MANY_BATCHES:,} batches of {CLOUDS:,} clouds"
    for what, name, planned, ops in (
        ("lengths", lengths, MANY_LENGTHS, "bucketize, scopes, bucket_pool and chamfer"),
        ("batches", batches, MANY_BATCHES, "bucketize"),
    ):
        command = [sys.executable, "-m", "benchmarks.host", what]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            yield Row(name, "host", "MB", None, MEMORY_MUST[what], note=f"skipped: {why}"[:200])
            continue
        measured = json.loads(done.stdout.splitlines()[-1])
        note = f"calls of {ops}; arrays that stay on the GPU: {measured['device']:.1f} MB"
        if measured["calls"] < planned:
            note += f"; ONLY {measured['calls']:,} were made in {SECONDS} s, and the figure is not scaled up"
        yield Row(name, "host", "MB", measured["host"], MEMORY_MUST[what], note=note)


def _growth(calls: Iterator[Callable[[], Any]], warm: int) -> dict[str, float]:
    """Megabytes of host and GPU memory that the calls leave behind, without the first `warm` calls."""
    import cupy

    def settled() -> tuple[int, int]:
        cupy.cuda.Device().synchronize()
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, cupy.get_default_memory_pool().used_bytes()

    for call in itertools.islice(calls, warm):
        call()
    before, count, end = settled(), 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end and (call := next(calls, None)) is not None:
        call()
        count += 1
        if count % timing.BETWEEN_WAITS == 0:
            cupy.cuda.Device().synchronize()
    host, device = (1e-6 * (after - then) for after, then in zip(settled(), before, strict=True))
    return {"calls": count + warm, "host": host, "device": device}


def _of_lengths() -> dict[str, float]:
    inputs = _inputs(data.find_folder(None))
    points, features = inputs["points"], inputs["features"]

    def call(lengths: list[int]) -> None:
        x, y = points[: sum(lengths)], points[SIZE : SIZE + sum(lengths)]
        buckets = gpu3d.bucketize(x, BUCKET_SIZE, lengths=lengths)
        gpu3d.scopes(buckets, SCOPE)
        gpu3d.bucket_pool(features[: buckets.num_slots], points[: buckets.num_slots], buckets)
        gpu3d.chamfer(x, y, x_lengths=lengths, y_lengths=lengths[::-1])

    pairs = itertools.islice(_never_seen(1025, 2048), MANY_LENGTHS)
    return _growth((functools.partial(call, lengths) for lengths in pairs), warm=20)


def _of_batches() -> dict[str, float]:
    points = _batch_points()
    batches = _batches(MANY_BATCHES)
    calls = (functools.partial(gpu3d.bucketize, points, SMALL_BUCKET, lengths=lengths) for lengths in batches)
    return _growth(calls, warm=3)


if __name__ == "__main__":
    print(json.dumps({"lengths": _of_lengths, "batches": _of_batches}[sys.argv[1]]()))
