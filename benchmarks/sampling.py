# SPDX-License-Identifier: Apache-2.0
"""farthest_points and voxel_downsample: time compared with peers and floors, and equality with the CPU.

Clouds: the real sweep that all suites repeat to any size, and cuts of it. Features are 64 random columns in bfloat16.

voxel_downsample reads the number of voxels on the host, so a CUDA graph cannot capture it. "graph" is the time of its
two plans, without the copy of the number between them; "eager" is the whole call. Peers: `torch.unique` of voxels with
`index_add_`, and the naive loop of farthest point sampling in torch and in Warp (warp_farthest.py), which looks at
every point in every round.

Floors: the bytes that a call must move (inputs read once, results written once) at the copy bandwidth, and one
near-empty kernel in a graph, both measured in the same run. For farthest_points the rounds follow one another, so the
floor is far below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import gpu3d
from benchmarks import data, timing
from benchmarks.table import Peer, Row, Setting, measured_peer
from gpu3d import _arrays
from gpu3d._arrays import INT32, INT64, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda import sampling as cuda
from gpu3d.sampling import voxel_results

SWEEP, VOXEL, COLUMNS = 122_880, 0.1, 64

# By (clouds, points of a cloud, points to take): target and stretch target in ms.
FARTHEST = {
    (1, 16_384, 1024): (1.5, 0.8),
    (32, 2048, 512): (0.4, 0.2),
    (1, SWEEP, 4096): (8.0, 4.0),
}
VOXELS_MUST, VOXELS_AIM = 0.12, 0.06  # ms
BITS = "every bit = CPU"


def run(setting: Setting) -> Iterator[Row]:
    for (clouds, n, k), (must, aim) in FARTHEST.items():
        yield _farthest(setting, clouds, n, k, must, aim)
        timing.free()
    yield from _voxels(setting)
    timing.free()


def _floor(nbytes: int, setting: Setting) -> float:
    """The floor in milliseconds."""
    return nbytes / setting.ceilings.copy_tb_s / 1e9 + setting.ceilings.graph_node_us / 1e3


# ---- farthest_points -----------------------------------------------------------------------------------------------


def _farthest(setting: Setting, clouds: int, n: int, k: int, must: float, aim: float) -> Row:
    import cupy

    host = data.sweep_cloud(clouds * n, setting.folder).reshape(clouds, n, 3)
    points = cupy.asarray(host)
    got = gpu3d.farthest_points(points, k).get()
    checks = {BITS: bool((got == gpu3d.farthest_points(host, k)).all())}
    return Row(
        f"farthest_points, {clouds} x {n:,} -> {k:,}",
        "graph, L2-warm",
        "ms",
        timing.graph_time(lambda: gpu3d.farthest_points(points, k), calls=5),
        must,
        aim,
        floor=_floor(host.nbytes + got.nbytes, setting),
        peers=(
            Peer("ours", "eager", timing.call_time(lambda: gpu3d.farthest_points(points, k))),
            measured_peer("torch, naive loop", "eager", lambda: timing.call_time(_torch_loop(points, k))),
            measured_peer("Warp, two kernels a round", "graph", lambda: _warp_time(host, k)),
        ),
        checks=checks,
    )


def _torch_loop(points: Any, k: int) -> timing.Call:
    """All clouds [B, n, 3] in step, as PyTorch3D's naive version does."""
    import torch

    x = data.to_torch(points)
    batch = torch.arange(len(x), device=x.device)

    def call() -> Any:
        nearest = torch.full(x.shape[:2], torch.inf, device=x.device)
        taken = torch.zeros((len(x), k), dtype=torch.int64, device=x.device)
        for i in range(1, k):
            nearest = torch.minimum(nearest, ((x - x[batch, taken[:, i - 1]][:, None]) ** 2).sum(2))
            taken[:, i] = nearest.argmax(1)
        return taken

    return call


def _warp_time(host: np.ndarray, k: int) -> float:
    """In milliseconds."""
    import warp

    from benchmarks.warp_farthest import farthest_points

    call = farthest_points(host.reshape(-1, 3), len(host), k)
    call()
    times = []
    for _ in range(10):
        with warp.ScopedTimer("farthest_points", print=False, synchronize=True) as timer:
            call()
        times.append(timer.elapsed)
    return float(np.median(times))


# ---- voxel_downsample ----------------------------------------------------------------------------------------------


def _voxels(setting: Setting) -> Iterator[Row]:
    import cupy

    host = data.sweep_cloud(SWEEP, setting.folder)
    rows = np.random.default_rng(0).standard_normal((SWEEP, COLUMNS), np.float32).astype(bfloat16)
    points, features = cupy.asarray(host), cupy.asarray(rows)
    found, expected = (gpu3d.voxel_downsample(*given) for given in ((points, VOXEL, features), (host, VOXEL, rows)))
    same = [x.get().tobytes() == y.tobytes() for x, y in zip(found[:4], expected[:4], strict=True)]
    moved = host.nbytes + rows.nbytes + sum(x.nbytes for x in expected[:4])
    for timed, ours, must, aim in (
        ("graph, L2-warm", timing.graph_time(_two_plans(points, features, len(found.points))), VOXELS_MUST, VOXELS_AIM),
        ("eager", timing.call_time(lambda: gpu3d.voxel_downsample(points, VOXEL, features)), None, None),
    ):
        yield Row(
            f"voxel_downsample, {SWEEP:,} -> {len(expected.points):,}, {COLUMNS} bf16",
            timed,
            "ms",
            ours,
            must,
            aim,
            floor=_floor(moved, setting),
            peers=(measured_peer("torch unique + index_add", "eager", lambda: _torch_voxels_time(points, features)),),
            checks={BITS: all(same)},
        )


def _two_plans(points: Any, features: Any, voxels: int) -> timing.Call:
    """The launches of voxel_downsample, for a number of voxels that is known."""
    given, rows = _arrays.read(points, "points"), _arrays.read(features, "features")
    n = len(points)
    specs = Spec((n,), INT32), Spec((n,), INT32), Spec((n + 1,), INT32), Spec((1,), INT64)
    made = *voxel_results(given, voxels), Spec((voxels, COLUMNS), rows.dtype)

    def call() -> Any:
        first = launcher.launch(cuda.voxels(given.spec, (n,), VOXEL), (given,), specs)
        members, starts = (_arrays.read(x, "a result") for x in first[1:3])
        reduce = cuda.voxel_rows(given.spec, rows.spec, voxels, "mean")
        return first, launcher.launch(reduce, (given, members, starts, rows), made)

    return call


def _torch_voxels_time(points: Any, features: Any) -> float:
    import torch

    x, rows = data.to_torch(points), data.to_torch(features)

    def call() -> Any:
        voxel = torch.floor((x - x.amin(0)) / VOXEL).long()
        size = voxel.amax(0) + 1
        code = voxel[:, 0] + size[0] * (voxel[:, 1] + size[1] * voxel[:, 2])
        _, inverse, counts = torch.unique(code, return_inverse=True, return_counts=True)
        means = torch.zeros((len(counts), 3), device=x.device).index_add_(0, inverse, x)
        sums = torch.zeros((len(counts), rows.shape[1]), device=x.device).index_add_(0, inverse, rows.float())
        return means / counts[:, None], (sums / counts[:, None]).to(rows.dtype)

    return timing.call_time(call)
