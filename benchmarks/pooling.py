# SPDX-License-Identifier: Apache-2.0
"""bucket_pool, bucket_unpool and their backwards: time compared with peers and floors, checks, and size of the groups.

Features are normal random numbers in bfloat16 and points are float32, over the buckets of a real sweep: 122,880 points,
240 full buckets. The bytes of a call, for n points, m = n / ratio children and C features:
- pool reads features and points, 2 C n + 12 n, and writes child features, child points and members, 2 C m + 12 m + 4 n;
  for max also argmember, C m. The child's permutations, 8 m, are not counted.
- pool backward reads the child's gradient and members, 2 C m + 4 n (and argmember, C m), and writes 2 C n.
- unpool with skip reads child features, members and skip, 2 C m + 4 n + 2 C n, and writes 2 C n.
- unpool backward reads gradient and members, 2 C n + 4 n, and writes the gradients of child and skip, 2 C m + 2 C n.

Floors: these bytes at the copy bandwidth, and one near-empty kernel in a graph, both measured in the same run. A call
whose result stays in L2 may be faster.

The peers in torch do the same work with its ops. Grid pooling uses the voxel size that keeps as many points as
bucket_pool. A CUDA graph cannot capture torch.unique, which reads a size on the host. So it is timed eagerly, and
compared with our eager call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16, finfo
from scipy.spatial import KDTree

import gpu3d
from benchmarks import data, timing
from benchmarks.table import Peer, Row, Setting, absent_peer, measured_peer, number

SIZE = 122_880
CHANNELS = (64, 256)
L2_BYTES = 50e6
RUNS = 100

# By (call, channels): target and stretch target in ms, for the mean with ratio 2.
MUST_AND_AIM = {
    ("pool", 64): (0.030, 0.020),
    ("pool", 256): (0.050, 0.040),
    ("pool backward", 64): (0.015, None),
    ("pool backward", 256): (0.040, None),
}
OTHERS = (("max", 2), ("mean", 4), ("max", 4), ("mean", 8), ("max", 8))
OTHERS_MUST = 1.3  # times the mean with ratio 2, per byte
UNPOOL_MUST = 2.0  # TB/s
HOST_MUST = 50  # us

# Peers that no package registry has cannot run here. Their times in ms are from an earlier run on an H100 80GB (driver
# 580, CUDA 13.0, torch 2.11, 2026-11-22; a repeated nuScenes sweep). Tables mark them as earlier.
FLASH3D_EARLIER = {
    ("pool", 64): 0.047,
    ("pool", 256): 0.121,
    ("pool backward", 64): 0.019,
    ("pool backward", 256): 0.077,
}
GRID_EARLIER = {64: 0.321, 256: 0.499}

# The names of the checks.
GROUPS = "every point in exactly one group"  # and every child has a member
MEMBERS = "members = CPU reference"  # bit by bit
BITS = "every bit = CPU reference"  # in all results
ROUNDING = "= float64 reference to rounding"


def run(setting: Setting) -> Iterator[Row]:
    for part in (_plain, _others, _unpool, _ragged, _host, _tightness, _determinism):
        yield from part(setting)
    _sweep.cache_clear()


# ---- what is pooled ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A cloud in slot order, on the GPU or on the host."""

    features: Any  # [num_slots, C]
    others: Any  # [num_slots, C]; serves as skip and as every gradient
    points: Any  # [num_slots, 3]
    buckets: gpu3d.Buckets

    def pool(self, reduce: str = "mean", ratio: int = 2) -> gpu3d.Pooling:
        return gpu3d.bucket_pool(self.features, self.points, self.buckets, ratio=ratio, reduce=reduce)

    def calls(self, pooled: gpu3d.Pooling) -> dict[str, timing.Call]:
        children = pooled.buckets.num_slots
        return {
            "pool": lambda: self.pool(pooled.reduce, pooled.ratio),
            "pool backward": lambda: gpu3d.bucket_pool_backward(self.others[:children], pooled),
            "unpool": lambda: gpu3d.bucket_unpool(self.features[:children], pooled, skip=self.others),
            "unpool backward": lambda: gpu3d.bucket_unpool_backward(self.others, pooled),
        }


class Cases(NamedTuple):
    """The same cloud on the GPU, on the CPU, and on the CPU in float64."""

    gpu: Case
    cpu: Case
    wide: Case  # on the CPU, in float64


@functools.cache
def _sweep(folder: Path | None, channels: int) -> Cases:
    return _cases([data.sweep_cloud(SIZE, folder)], channels)


def _cases(clouds: Sequence[np.ndarray], channels: int) -> Cases:
    import cupy

    points, lengths = np.concatenate(clouds), [len(cloud) for cloud in clouds]
    buckets = gpu3d.bucketize(points, lengths=lengths)
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((buckets.num_slots, channels), np.float32).astype(bfloat16) for _ in range(2)]
    cpu = Case(*rows, buckets.scatter(points), buckets)
    arrays = [cupy.asarray(x) for x in cpu[:3]]
    gpu = Case(*arrays, gpu3d.bucketize(cupy.asarray(points), lengths=lengths))
    return Cases(gpu, cpu, Case(*(x.astype(np.float64) for x in cpu[:3]), buckets))


def _bytes(case: Case, pooled: gpu3d.Pooling) -> dict[str, int]:
    """The bytes that each call must move, as at the top of this file."""
    n, m, channels = sum(pooled.parent.lengths), sum(pooled.buckets.lengths), case.features.shape[1]
    rows, child_rows, members = 2 * channels * n, 2 * channels * m, 4 * n
    argmember = 0 if pooled.argmember is None else channels * m
    return {
        "pool": rows + 12 * n + child_rows + 12 * m + members + argmember,
        "pool backward": child_rows + members + argmember + rows,
        "unpool": child_rows + members + 2 * rows,
        "unpool backward": 2 * rows + members + child_rows,
    }


def _graph(case: Case) -> str:
    return "graph, L2-warm" if case.features.nbytes + case.points.nbytes < L2_BYTES else "graph"


def _floor(nbytes: int, setting: Setting) -> float:
    """The floor in milliseconds."""
    return nbytes / setting.ceilings.copy_tb_s / 1e9 + setting.ceilings.graph_node_us / 1e3


def _rate(nbytes: int, milliseconds: float) -> float:
    """TB/s."""
    return nbytes / milliseconds / 1e9


# ---- pooling and its backward --------------------------------------------------------------------------------------


def _plain(setting: Setting) -> Iterator[Row]:
    for channels in CHANNELS:
        cases = _sweep(setting.folder, channels)
        pooled = cases.gpu.pool()
        cell = _cell(cases.cpu.points)
        for name, peers in (("pool", _grid_peers), ("pool backward", _backward_peers)):
            call, nbytes = cases.gpu.calls(pooled)[name], _bytes(cases.gpu, pooled)[name]
            ours = timing.graph_time(call)
            yield Row(
                f"mean of 2, C {channels}: {name}",
                _graph(cases.gpu),
                "ms",
                ours,
                *MUST_AND_AIM[name, channels],
                floor=_floor(nbytes, setting),
                peers=(
                    Peer("ours, one call", "eager", timing.eager_time(call)),
                    *peers(cases.gpu, pooled, cell),
                    absent_peer("public Flash3D kernels", "graph", FLASH3D_EARLIER[name, channels]),
                ),
                checks=_check(cases, name),
                note=f"{nbytes / 1e6:.1f} MB: {_rate(nbytes, ours):.2f} TB/s; torch's voxels: {number(cell)} m",
            )


def _others(setting: Setting) -> Iterator[Row]:
    """Other reductions and ratios. Their target follows from the bytes that they move."""
    for channels in CHANNELS:
        cases = _sweep(setting.folder, channels)
        plain = cases.gpu.pool()
        for name in ("pool", "pool backward"):
            plain_bytes = _bytes(cases.gpu, plain)[name]
            plain_time = timing.graph_time(cases.gpu.calls(plain)[name])
            for reduce, ratio in OTHERS:
                what = f"{reduce} of {ratio}, C {channels}: {name}"
                if setting.quick and channels != CHANNELS[0]:
                    yield Row(what, _graph(cases.gpu), "ms", None, note="skipped: --quick")
                    continue
                pooled = cases.gpu.pool(reduce, ratio)
                nbytes = _bytes(cases.gpu, pooled)[name]
                share = nbytes / plain_bytes
                ours = timing.graph_time(cases.gpu.calls(pooled)[name])
                yield Row(
                    what,
                    _graph(cases.gpu),
                    "ms",
                    ours,
                    OTHERS_MUST * share * plain_time,
                    floor=_floor(nbytes, setting),
                    checks=_check(cases, name, reduce, ratio),
                    note=f"{nbytes / 1e6:.1f} MB: per byte {ours / share / plain_time:.2f} x mean of 2 "
                    f"({number(plain_time)} ms); target: {OTHERS_MUST} x",
                )


# ---- torch ---------------------------------------------------------------------------------------------------------


def _cell(points: np.ndarray) -> float:
    """The voxel size with which a grid keeps half of the points, by bisection."""
    offsets = points - points.min(axis=0)
    low, high = 0.0, float(offsets.max())
    for _ in range(20):
        cell = (low + high) / 2
        x, y, z = (offsets / cell).astype(np.int64).T
        kept = len(np.unique(x << 42 | y << 21 | z))
        low, high = (cell, high) if kept > len(points) / 2 else (low, cell)
    return (low + high) / 2


def _grid_peers(case: Case, pooled: gpu3d.Pooling, cell: float) -> Iterator[Peer]:
    earlier = GRID_EARLIER[case.features.shape[1]]
    for way, reduce_rows in ROWS_IN_TORCH.items():

        def measure(reduce_rows: Callable[..., Any] = reduce_rows) -> float:
            features, points = data.to_torch(case.features), data.to_torch(case.points)
            return timing.eager_time(lambda: _grid_pool(features, points, cell, reduce_rows))

        yield measured_peer(f"torch grid pooling: unique, {way}", "eager", measure, earlier)


def _grid_pool(features: Any, points: Any, cell: float, reduce_rows: Callable[..., Any]) -> tuple[Any, Any]:
    group, counts = _grid(points, cell)
    return reduce_rows(features, group, counts), reduce_rows(points, group, counts)


def _grid(points: Any, cell: float) -> tuple[Any, Any]:
    """The group of each point, and the number of points of each group."""
    import torch

    x, y, z = ((points - points.amin(0)) / cell).long().T
    _, group, counts = torch.unique(x << 42 | y << 21 | z, return_inverse=True, return_counts=True)
    return group, counts


def _index_reduce(rows: Any, group: Any, counts: Any) -> Any:
    means = rows.new_zeros(len(counts), rows.shape[1])
    return means.index_reduce_(0, group, rows, "mean", include_self=False)


def _scatter_reduce(rows: Any, group: Any, counts: Any) -> Any:
    means = rows.new_zeros(len(counts), rows.shape[1])
    return means.scatter_reduce_(0, group[:, None].expand_as(rows), rows, "mean", include_self=False)


def _index_add(rows: Any, group: Any, counts: Any) -> Any:
    return rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, group, rows) / counts[:, None]


ROWS_IN_TORCH = {"index_reduce": _index_reduce, "scatter_reduce": _scatter_reduce, "index_add": _index_add}


def _backward_peers(case: Case, pooled: gpu3d.Pooling, cell: float) -> Iterator[Peer]:
    def autograd() -> float:
        import torch

        features = data.to_torch(case.features).requires_grad_()
        out = _scatter_reduce(features, *_grid(data.to_torch(case.points), cell))
        dout = data.to_torch(case.others)[: len(out)]
        return timing.eager_time(lambda: torch.autograd.grad(out, features, dout, retain_graph=True))

    def gather() -> float:
        dchild, parents = data.to_torch(case.others)[: pooled.buckets.num_slots], _parents(pooled)
        return timing.torch_graph_time(lambda: (dchild / pooled.ratio).index_select(0, parents))

    yield measured_peer("torch autograd of the grid's scatter_reduce", "eager", autograd)
    yield measured_peer("torch index_select, divided, our groups", _graph(case), gather)


def _parents(pooled: gpu3d.Pooling) -> Any:
    """The child of each slot, a torch tensor int32 [num_slots]. The timed sweep has no empty slots."""
    import cupy

    parents = cupy.empty(pooled.parent.num_slots, np.int32)
    parents[pooled.members.ravel()] = cupy.arange(pooled.members.size, dtype=np.int32) // pooled.ratio
    return data.to_torch(parents)


def _unpool_peer(case: Case, pooled: gpu3d.Pooling, name: str, nbytes: int) -> Peer:
    def measure() -> float:
        features, others, parents = data.to_torch(case.features), data.to_torch(case.others), _parents(pooled)
        children = pooled.buckets.num_slots

        def forward() -> Any:
            return features[:children].index_select(0, parents) + others

        def backward() -> Any:
            return others.new_zeros(children, others.shape[1]).index_add_(0, parents, others), others.clone()

        return _rate(nbytes, timing.torch_graph_time(forward if name == "unpool" else backward))

    what = "index_select, added" if name == "unpool" else "index_add and clone"
    return measured_peer(f"torch {what}, our groups", _graph(case), measure)


# ---- unpooling -----------------------------------------------------------------------------------------------------


def _unpool(setting: Setting) -> Iterator[Row]:
    for channels in CHANNELS:
        cases = _sweep(setting.folder, channels)
        pooled = cases.gpu.pool()
        for name in ("unpool", "unpool backward"):
            call, nbytes = cases.gpu.calls(pooled)[name], _bytes(cases.gpu, pooled)[name]
            ours, again = timing.graph_time(call), timing.graph_time(call, keep=False)
            yield Row(
                f"ratio 2, C {channels}: {name} with skip",
                _graph(cases.gpu),
                "TB/s",
                _rate(nbytes, ours),
                UNPOOL_MUST,
                at_least=True,
                floor=_rate(nbytes, _floor(nbytes, setting)),
                peers=(
                    Peer("ours, one output for all calls", _graph(cases.gpu), _rate(nbytes, again)),
                    _unpool_peer(cases.gpu, pooled, name, nbytes),
                ),
                checks=_check(cases, name),
                note=f"{nbytes / 1e6:.1f} MB in {number(ours)} ms; rates of the peers count the same bytes",
            )


# ---- a ragged batch, host time -------------------------------------------------------------------------------------


def _ragged(setting: Setting) -> Iterator[Row]:
    """Time per point of four real sweeps, compared with the timed sweep, which has no padding."""
    sweeps = data.four_sweeps(setting.folder)
    if not sweeps:
        yield Row("ragged batch", "graph", "ps", None, note="skipped: no real scans (--data names their folder)")
        return
    lengths = ", ".join(f"{len(points):,}" for points in sweeps.values())
    for channels in CHANNELS:
        ragged = _cases([points.astype(np.float32) for points in sweeps.values()], channels)
        dense = _sweep(setting.folder, channels).gpu
        n = sum(ragged.cpu.buckets.lengths)
        calls, dense_calls = (case.calls(case.pool()) for case in (ragged.gpu, dense))
        for name, call in calls.items():
            full = 1e9 * timing.graph_time(dense_calls[name]) / SIZE
            yield Row(
                f"ragged, mean of 2, C {channels}: {name}",
                _graph(ragged.gpu),
                "ps",
                1e9 * timing.graph_time(call) / n,
                checks=_check(ragged, name),
                note=f"per point; {n:,} points in {len(sweeps)} clouds ({lengths}: {', '.join(sweeps)}); "
                f"timed sweep, {_graph(dense)}: {number(full)} ps",
            )


def _host(setting: Setting) -> Iterator[Row]:
    case = _sweep(setting.folder, CHANNELS[0]).gpu
    for name, call in case.calls(case.pool()).items():
        yield Row(f"the Python call, {name}", "host", "us", 1e3 * timing.host_time(call), HOST_MUST)


# ---- how tight the groups are --------------------------------------------------------------------------------------


def _tightness(setting: Setting) -> Iterator[Row]:
    """The mean distance between the two members of a pair. There is no target."""
    yield _tightness_row("the timed cloud", [data.sweep_cloud(SIZE, setting.folder)])
    sweeps = list(data.real_sweeps(setting.folder)) if setting.folder else []
    if not sweeps:
        yield Row("pairs of real sweeps", "check", "m", None, note="skipped: no real scans (--data names their folder)")
    for name, points in sweeps:
        if not name.startswith("semantickitti/"):
            yield _tightness_row(name.removeprefix("lidar_"), [points])
    group = [points for name, points in sweeps if name.startswith("semantickitti/")]
    if group and not setting.quick:
        yield _tightness_row(f"{len(group)} SemanticKITTI sweeps", group)


def _tightness_row(what: str, clouds: Sequence[np.ndarray]) -> Row:
    """Means and medians of each cloud, averaged over the clouds. A check holds if it holds for every cloud."""
    found, checks = [], {GROUPS: True, MEMBERS: True}
    for cloud in clouds:
        cases = _cases([cloud], 1)
        pooled, expected = cases.gpu.pool(), cases.cpu.pool()
        checks[GROUPS] &= _each_once(pooled)
        checks[MEMBERS] &= np.array_equal(pooled.members.get(), expected.members)
        points, full = cases.wide.points, (expected.members >= 0).all(axis=1)
        in_order = points[: len(cloud) // 2 * 2].reshape(-1, 2, 3)
        nearest = KDTree(points[: len(cloud)]).query(points[: len(cloud)], k=2, workers=-1)[0][:, 1]
        columns = _distances(points[expected.members[full]]), nearest, _distances(in_order)
        found.append([(column.mean(), np.median(column)) for column in columns])
    (pairs, pair_median), (nearest, nearest_median), (in_order, _) = np.mean(found, axis=0)
    return Row(
        f"distance in a pair: {what}"[:48],
        "check",
        "m",
        pairs,
        peers=(
            Peer("from each point to its nearest neighbour", "check", nearest),
            Peer("in a pair of consecutive slots", "check", in_order),
        ),
        checks=checks,
        note=f"{pairs / nearest:.2f} x the nearest neighbour; medians {number(pair_median)} and "
        f"{number(nearest_median)} m: {pair_median / nearest_median:.2f} x",
    )


def _distances(pairs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1)


# ---- checks and determinism ----------------------------------------------------------------------------------------


def _check(cases: Cases, name: str, reduce: str = "mean", ratio: int = 2) -> dict[str, bool]:
    """Compare the results of a call with the CPU's and with float64."""
    pooled = [case.pool(reduce, ratio) for case in cases]
    results = [_arrays(case.calls(made)[name]()) for case, made in zip(cases, pooled, strict=True)]
    ours, expected, exact = [x.get() for x in results[0]], results[1], results[2]
    checks = {}
    if name == "pool":
        checks[GROUPS] = _each_once(pooled[0])
        checks[MEMBERS] = np.array_equal(pooled[0].members.get(), pooled[1].members)
    return checks | {
        BITS: all(x.tobytes() == y.tobytes() for x, y in zip(ours, expected, strict=True)),
        ROUNDING: all(_rounded(x, y, cases.wide, ratio) for x, y in zip(ours, exact, strict=True)),
    }


def _arrays(result: Any) -> tuple[Any, ...]:
    """The result of a call as a tuple of arrays."""
    if not isinstance(result, gpu3d.Pooling):
        return result if isinstance(result, tuple) else (result,)
    child = result.buckets
    arrays = result.features, result.points, result.members, result.argmember, child.slot_to_point, child.point_to_slot
    return tuple(x for x in arrays if x is not None)


def _rounded(x: np.ndarray, exact: np.ndarray, wide: Case, ratio: int) -> bool:
    """Whether x is within the rounding of ratio - 1 float32 additions, a division, and a conversion to its dtype."""
    if x.dtype.kind in "iu":
        return np.array_equal(x, exact)
    inputs = (wide.points,) if x.dtype == np.float32 else (wide.features, wide.others)
    largest = max(np.abs(values).max() for values in inputs)
    slack = ratio**2 * 2.0**-24 * largest
    return bool((np.abs(x - exact) <= float(finfo(x.dtype).eps) / 2 * np.abs(exact) + slack).all())


def _each_once(pooled: gpu3d.Pooling) -> bool:
    """Whether every slot that holds a point is a member once, and every child has a first member."""
    members, slot_to_point = pooled.members.get(), pooled.parent.slot_to_point.get()
    children = pooled.buckets.slot_to_point.get() >= 0
    return np.array_equal(np.sort(members[members >= 0]), np.flatnonzero(slot_to_point >= 0)) and np.array_equal(
        members[:, 0] >= 0, children
    )


def _determinism(setting: Setting) -> Iterator[Row]:
    for channels, reduce, ratio in ((64, "mean", 2), (256, "max", 8)):
        cases = _sweep(setting.folder, channels)
        case, cell = cases.gpu, _cell(cases.cpu.points)

        def ours(case: Case = case, reduce: str = reduce, ratio: int = ratio) -> list[Any]:
            calls = case.calls(case.pool(reduce, ratio)).values()
            return [x.view(np.uint8) for call in calls for x in _arrays(call())]

        def theirs(case: Case = case, cell: float = cell) -> float:
            features, points = data.to_torch(case.features), data.to_torch(case.points)
            return _differing(lambda: _grid_pool(features, points, cell, _index_add))

        yield Row(
            f"runs of {RUNS} that differ: {reduce} of {ratio}, C {channels}",
            "check",
            "runs",
            _differing(ours),
            0,
            peers=(measured_peer("torch grid pooling: unique, index_add", "check", theirs),),
            note="ours: all results of the four calls; peer: the means of features and points",
        )


def _differing(call: Callable[[], Sequence[Any]]) -> int:
    first = call()
    return sum(not all(bool((x == y).all()) for x, y in zip(first, call(), strict=True)) for _ in range(RUNS))
