# SPDX-License-Identifier: Apache-2.0
"""knn, radius_search and chamfer: time compared with peers and floors, growth with size, and equality with brute force.

Times are eager: 10 calls in a row between two device events, or one call if it takes more than 10 ms. They include
everything: each call puts its points into buckets again, unless a row says that an index is reused. The targets of
chamfer are for device time, which only a graph shows for such short calls. The eager time stands below it; there the
host may take longer.

Clouds: a real sweep as it is (KITTI, or the packaged scan without the data folder), the sweep that all suites repeat to
any size, and the pairs x and y of `data.pair`.

Results are checked against a search of all pairs with the same float32 formula on the GPU (brute_force.cu). It checks
every query, or every s-th query if there are more than 2**40 pairs. The same kernel is timed as a peer.

Floors: the bytes that a call must move (coordinates read once, results written once) at the copy bandwidth, and one
near-empty kernel in a graph, both measured in the same run. How many pairs a search must look at depends on the cloud,
so the floor includes neither arithmetic nor a sort, and only trivial searches come near it. The brute force bounds the
time from above.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import KDTree, cKDTree

import gpu3d
from benchmarks import data, losses, timing
from benchmarks.table import Peer, Row, Setting, graph_peer, measured_peer, number

SWEEP, MILLION, HARD = 122_880, 2**20, 2**17
SIZES = (2**11, 2**13, 2**15, 2**17, 2**19, 2**20, 2**21, 2**22)
QUICK_SIZE = 2**17  # the largest size with --quick
RADIUS = 0.5  # m
RUNS = 100

# Targets and stretch targets in ms.
SWEEP_MUST, SWEEP_AIM = 1.2, 0.7  # k = 16, a real sweep searched in itself
MANY = {64: (1.2, 0.8), 256: (5.0, 3.0), 1024: (25.0, 12.0)}  # by k; the same sweep
NEAREST, NEAREST_MUST, NEAREST_AIM = 32, 0.8, 0.4  # max_neighbors of a search within RADIUS
MILLION_MUST = 6.0  # k = 1
LARGE = {(1, 10**7): (16, 10), (1, 10**8): (200, 120), (16, 10**7): (22, 15)}  # by (k, points)
WIDE_MUST, WIDE_AIM = 2.0, 1.5  # times the time in float32
STRAY_MUST = 1.05  # times the time without stray points
UTM = 500_000.0, 4_200_000.0, 100.0  # m
CHAMFER_MUST = {(1, 65_536): 0.5, (32, 2048): 0.15, (8, 8192): 0.25}  # by (clouds, points per cloud)
GRADIENT_MUST = 1.5  # times the forward
ONE_SIDED_MUST, POINTS_MUST, COMPARE_MUST = 0.5, 1.0, 1.2  # times the forward of both directions
THRESHOLDS = (0.01, 0.02, 0.05)
GROWTH_MUST = 1.2  # the exponent of N
HARD_MUST = 5.0  # k = 2, for far and collapsed
RADIUS_MUST = 1.5
NORMALS_MUST, NORMALS_AIM = 0.7, 0.5  # k = 16, a real sweep
CPU_MUST = 1.15  # times SciPy with all cores
CPU_RADIUS_MUST = 0.5  # times SciPy's sparse_distance_matrix
CHECKED_STEP = 61  # every so many queries are searched on the CPU too, where brute force would take minutes
ULPS = 2  # between our distances and SciPy's

# Limits for peers that look at all pairs.
CHECKED_PAIRS = 2**40  # also for our brute force as a peer
PEER_PAIRS = 2**35
CDIST_BYTES = 4e9  # bytes of distances in memory at a time, in knn
TREE_POINTS = 2**20  # for SciPy's tree, which takes seconds for more
TREE_ONCE_MS = 500.0
TREE_COLLAPSED_MS = 37_919.0  # k = 2 of 131,072, 16 cores beside an H100, 2026-11-22

LANE_OPS_A_SECOND = 2.96e13  # float32 operations of an H100, measured; a pair takes eight

# The names of the checks.
CPU_BITS = "every bit = CPU"
EXACT_MEAN = "= float64 from brute-force neighbours"  # to 1e-6
ROWS = "rows sorted by index, d2 <= r * r, as many as by brute force"


def run(setting: Setting) -> Iterator[Row]:
    for part in (
        _sweeps,
        _float64,
        _many,
        _million,
        _large,
        _chamfer,
        _variants,
        _growth,
        _hard,
        _radius,
        _reused,
        _normals,
        _cpu,
        _sizes,
        _degenerate,
        _ragged,
        _host,
        _determinism,
    ):
        for row in part(setting):
            yield row
            timing.free()


# ---- what is searched ----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Queries and points on the GPU; cloud b has equally many of both."""

    query: Any  # float32 [N, 3]
    points: Any  # float32 [N, 3]
    lengths: tuple[int, ...]

    @property
    def pairs(self) -> int:
        return sum(n * n for n in self.lengths)

    def knn(self, k: int) -> Any:
        return gpu3d.knn(self.query, self.points, k, query_lengths=self.lengths, lengths=self.lengths)

    def chamfer(self) -> Any:
        return gpu3d.chamfer(self.query, self.points, x_lengths=self.lengths, y_lengths=self.lengths)

    def chamfer_value_and_grad(self) -> Any:
        return gpu3d.chamfer_value_and_grad(self.query, self.points, x_lengths=self.lengths, y_lengths=self.lengths)

    def swapped(self) -> Case:
        return Case(self.points, self.query, self.lengths)

    def on_host(self) -> Case:
        return Case(self.query.get(), self.points.get(), self.lengths)


def _self_case(*clouds: np.ndarray) -> Case:
    """Clouds whose points are the queries and the points."""
    import cupy

    points = cupy.asarray(np.concatenate(clouds), np.float32, order="C")  # brute_force.cu reads rows
    return Case(points, points, tuple(len(cloud) for cloud in clouds))


def _pair(kind: str, n: int, clouds: int = 1) -> Case:
    """The clouds x and y of `data.pair`."""
    import cupy

    return Case(*(cupy.asarray(cloud) for cloud in data.pair(kind, n, clouds)), clouds * (n,))


def _real_sweep(folder: Path | None) -> tuple[str, np.ndarray]:
    """One sweep as the sensor recorded it; about 120,000 points if the data folder is there."""
    for path in sorted(folder.glob("lidar_raw/kitti_object_*.npz")) if folder else ():
        with np.load(path, allow_pickle=False) as scan:
            return f"KITTI {path.stem}", (scan["xyz_mm"].T / 1000).astype(np.float32)
    with np.load(Path(gpu3d.__file__).parent / "data" / data.PACKAGED, allow_pickle=False) as scan:
        return data.PACKAGED, (scan["xyz_mm"].T / 1000).astype(np.float32)


# ---- time and floors -----------------------------------------------------------------------------------------------


def _floor(setting: Setting, case: Case, result_bytes: int) -> float:
    """The floor in milliseconds."""
    nbytes = case.query.nbytes + (0 if case.points is case.query else case.points.nbytes) + result_bytes
    return nbytes / setting.ceilings.copy_tb_s / 1e9 + setting.ceilings.graph_node_us / 1e3


def _knn_floor(setting: Setting, case: Case, k: int) -> float:
    return _floor(setting, case, 8 * k * len(case.query))


# ---- brute force, and what is checked against it -------------------------------------------------------------------

SOURCE = Path(__file__).resolve().parent / "brute_force.cu"
THREADS = 256  # the same constant as in brute_force.cu


@cache
def _kernel(name: str, k: int = 1) -> Any:
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=(f"-DK={k}",)).get_function(name)


def brute_force(case: Case, k: int, step: int = 1) -> tuple[Any, Any]:
    """Distances and indices [queries, k] from all pairs. For a single cloud `step` selects every step-th query."""
    import cupy

    query = cupy.ascontiguousarray(case.query[::step])
    distances, indices = cupy.empty((len(query), k), np.float32), cupy.empty((len(query), k), np.int32)
    first = 0
    for n in case.lengths:
        rows, columns = slice(first, first + -(-n // step)), slice(first, first + n)
        arguments = query[rows], case.points[columns], np.int32(-(-n // step)), np.int32(n), np.int32(first)
        grid = (-(-n // step // THREADS),)
        _kernel("nearest", k)(grid, (THREADS,), (*arguments, distances[rows], indices[rows]))
        first += n
    return distances, indices


def _exact(case: Case, k: int, found: Sequence[Any]) -> dict[str, bool]:
    """Compare every bit with brute force: all queries, or every s-th if there are too many pairs."""
    step = -(-case.pairs // CHECKED_PAIRS)
    expected = brute_force(case, k, step)
    name = "every bit = brute force on the GPU" + (f", every {step}th query" if step > 1 else "")
    return {name: all(_same(x[::step], y) for x, y in zip(found, expected, strict=True))}


def _same(x: Any, y: Any) -> bool:
    """Whether two arrays have the same bits."""
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def _near_scipy(case: Case, k: int, distances: Any) -> dict[str, bool]:
    """Compare our distances with SciPy's, which are float64."""
    host = case.on_host()
    expected = KDTree(host.points).query(host.query, [*range(1, k + 1)], workers=-1)[0]
    apart = np.abs(distances.get() - expected) / np.spacing(expected.astype(np.float32))
    return {f"= SciPy within {ULPS} ulp": bool((apart <= ULPS).all())}


# ---- knn beside its peers ------------------------------------------------------------------------------------------


def _knn_row(
    setting: Setting,
    what: str,
    case: Case,
    k: int,
    must: float | None = None,
    aim: float | None = None,
    note: str = "",
    tree_ms: float | None = None,
) -> Row:
    """A row, with all peers if it has a target. If `tree_ms` is given, it stands for SciPy's tree, which is not run."""
    return Row(
        what,
        "eager",
        "ms",
        timing.call_time(partial(case.knn, k)),
        must,
        aim,
        floor=_knn_floor(setting, case, k),
        peers=tuple(_knn_peers(case, k, must is not None, tree_ms)),
        checks=_exact(case, k, case.knn(k)),
        note=note,
    )


def _knn_peers(case: Case, k: int, every: bool, tree_ms: float | None) -> Iterator[Peer]:
    if every:
        yield graph_peer(partial(case.knn, k))
    if case.pairs <= CHECKED_PAIRS:
        yield measured_peer(
            "brute force (brute_force.cu)", "eager", lambda: timing.call_time(partial(brute_force, case, k))
        )
    for name, prepare in (ALL_PAIRS if every else ALL_PAIRS[:1]) if len(case.lengths) == 1 else ():
        if case.pairs > PEER_PAIRS:
            yield Peer(name, "eager", None, f"looks at all {case.pairs:.1e} pairs")
        else:
            yield measured_peer(name, "eager", lambda prepare=prepare: timing.call_time(prepare(case, k)))
    if tree_ms is not None:
        yield Peer("scipy KDTree, all cores", "CPU", None, "takes half a minute", tree_ms)
    elif len(case.lengths) == 1 and len(case.points) <= TREE_POINTS:
        yield measured_peer("scipy KDTree, all cores", "CPU", lambda: _tree_time(case.on_host(), k))


def _tree_time(case: Case, k: int) -> float:
    """Time of SciPy, with building the tree. A slow call is timed once."""

    def call() -> Any:
        return KDTree(case.points).query(case.query, k, workers=-1)

    begin = time.perf_counter()
    call()
    once = 1e3 * (time.perf_counter() - begin)
    return once if once > TREE_ONCE_MS else timing.cpu_time(call, 10)


def _torch_cdist(case: Case, k: int) -> timing.Call:
    """torch.cdist and topk, in parts that fit. It expands a^2 + b^2 - 2ab, so some neighbours differ."""
    import torch

    query, points = data.to_torch(case.query), data.to_torch(case.points)
    parts = query.split(int(CDIST_BYTES / 4 / len(points)))

    def call() -> list[Any]:
        distances = (torch.cdist(part, points) for part in parts)
        return [part.min(1) if k == 1 else part.topk(k, largest=False) for part in distances]

    return call


def _cuvs(case: Case, k: int) -> timing.Call:
    from cuvs.neighbors import brute_force

    return lambda: brute_force.search(brute_force.build(case.points, metric="sqeuclidean"), case.query, k)


def _faiss(case: Case, k: int) -> timing.Call:
    import faiss
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()
    query, points = data.to_torch(case.query), data.to_torch(case.points)
    return lambda: faiss.knn_gpu(resources, query, points, k)


def _pytorch3d(case: Case, k: int) -> timing.Call:
    from pytorch3d.ops import knn_points

    query, points = data.to_torch(case.query)[None], data.to_torch(case.points)[None]
    return lambda: knn_points(query, points, K=k)


def _torch_cluster(case: Case, k: int) -> timing.Call:
    from torch_cluster import knn

    query, points = data.to_torch(case.query), data.to_torch(case.points)
    return lambda: knn(points, query, k)


def _pykeops(case: Case, k: int) -> timing.Call:
    from pykeops.torch import LazyTensor

    query, points = LazyTensor(data.to_torch(case.query)[:, None]), LazyTensor(data.to_torch(case.points)[None])
    return lambda: ((query - points) ** 2).sum(-1).Kmin_argKmin(k, dim=1)


def _cupy_knn(case: Case, k: int) -> timing.Call:
    """A tree that is built anew in each call, as our index is."""
    from cupy_knn import LBVHIndex

    index = LBVHIndex(leaf_size=32, compact=True, shrink_to_fit=True, sort_queries=True)

    def call() -> Any:
        index.build(case.points)
        index.prepare_knn_default(k)
        return index.query_knn(case.query)

    return call


ALL_PAIRS: tuple[tuple[str, Callable[[Case, int], timing.Call]], ...] = (
    ("torch.cdist + topk", _torch_cdist),
    ("cuVS brute_force", _cuvs),
    ("faiss knn_gpu", _faiss),
    ("pytorch3d knn_points", _pytorch3d),
    ("torch_cluster knn", _torch_cluster),
    ("pykeops Kmin_argKmin", _pykeops),
)


def _sweeps(setting: Setting) -> Iterator[Row]:
    name, real = _real_sweep(setting.folder)
    for what, points in (("real", real), ("repeated", data.sweep_cloud(SWEEP, setting.folder))):
        case = _self_case(points)
        row = _knn_row(
            setting,
            f"knn, k 16: {what} sweep of {len(points):,}, on itself",
            case,
            16,
            SWEEP_MUST,
            SWEEP_AIM,
            note=f"{name if what == 'real' else data.describe(setting.folder)}",
        )
        yield row._replace(checks=row.checks | _near_scipy(case, 16, case.knn(16)[0]))


def _float64(setting: Setting) -> Iterator[Row]:
    """A real sweep in map coordinates, alone and with points far away. SciPy searches in float64 too."""
    import cupy

    name, real = _real_sweep(setting.folder)
    cloud = real.astype(np.float64) + UTM
    strays = np.array([[0, 0, 0], [*UTM[:2], -99_999], [*UTM[:2], 1e30]])
    single = timing.call_time(partial(_self_case(real).knn, 16))
    clean = None
    for what, points in (("alone", cloud), ("and three stray points", np.concatenate([cloud, strays]))):
        x = cupy.asarray(points)
        ours = timing.call_time(lambda x=x: gpu3d.knn(x, x, 16))
        distances, _ = (z.get() for z in gpu3d.knn(x, x, 16))
        theirs, _ = KDTree(points).query(points, 16, workers=-1)
        checks = {"SciPy's distances, to 4 ulp": bool((abs(distances - theirs) <= 4 * np.spacing(theirs)).all())}
        must, aim = (WIDE_MUST * single, WIDE_AIM * single) if clean is None else (STRAY_MUST * clean, None)
        clean = ours
        note = f"{name}; float32: {number(single)} ms"
        yield Row(f"knn, k 16: sweep in float64, {what}", "eager", "ms", ours, must, aim, checks=checks, note=note)


def _large(setting: Setting) -> Iterator[Row]:
    for (k, n), (must, aim) in LARGE.items():
        what = f"knn, k {k}: near, {n:,}" + (", on itself" if k > 1 else "")
        if setting.quick:
            yield Row(what, "eager", "ms", None, note="skipped: --quick")
            continue
        case = _pair("near", n)
        if k > 1:
            case = case._replace(query=case.points)
        yield _knn_row(setting, what, case, k, must, aim)
        del case
        timing.free()


def _many(setting: Setting) -> Iterator[Row]:
    """Many neighbours, and the nearest within a radius."""
    name, points = _real_sweep(setting.folder)
    case = _self_case(points)

    def nearest(query: Any, points: Any) -> Any:
        return gpu3d.radius_search(query, points, RADIUS, max_neighbors=NEAREST)

    for what, k, (must, aim), search in (
        *((f"knn, k {k}", k, targets, partial(gpu3d.knn, k=k)) for k, targets in MANY.items()),
        (f"radius_search, {RADIUS} m, at most {NEAREST}", NEAREST, (NEAREST_MUST, NEAREST_AIM), nearest),
    ):
        call = partial(search, case.query, case.points)
        peers = [measured_peer("the same call, eager", "eager", partial(timing.call_time, call))]
        for peer, prepare in (("cupy-knn", _cupy_knn), ("torch.cdist + topk", _torch_cdist)) if k in MANY else ():
            peers.append(measured_peer(peer, "eager", lambda prepare=prepare, k=k: timing.call_time(prepare(case, k))))
        expected = search(points[::CHECKED_STEP], points)
        found = [x[::CHECKED_STEP].get() for x in call()]
        yield Row(
            f"{what}: real sweep of {len(points):,}, on itself",
            "graph",
            "ms",
            timing.graph_time(call, calls=5, keep=False),
            must,
            aim,
            floor=_knn_floor(setting, case, k),
            peers=tuple(peers),
            checks={f"every bit = CPU, every {CHECKED_STEP}th query": all(map(_same, found, expected))},
            note=name,
        )


def _million(setting: Setting) -> Iterator[Row]:
    if setting.quick:
        yield Row(f"knn, k 1: near, {MILLION:,}", "eager", "ms", None, note="skipped: --quick")
    else:
        yield _knn_row(setting, f"knn, k 1: near, {MILLION:,}", _pair("near", MILLION), 1, MILLION_MUST)


def _growth(setting: Setting) -> Iterator[Row]:
    for k in (1, 16):
        what = f"knn, k {k}: near, growth from {HARD:,} on"
        if setting.quick:
            yield Row(what, "eager", "exp", None, note="skipped: --quick")
            continue
        small, large = (timing.call_time(partial(_pair("near", n).knn, k)) for n in (HARD, MILLION))
        exponent = math.log(large / small) / math.log(MILLION / HARD)
        note = f"exponent of N: {number(small)} ms, and {number(large)} ms at {MILLION:,}"
        yield Row(what, "eager", "exp", exponent, GROWTH_MUST, note=note)


def _hard(setting: Setting) -> Iterator[Row]:
    """Clouds for which boxes prune little. The worst case is all pairs at the full arithmetic rate."""
    scan = 8 * HARD**2 / LANE_OPS_A_SECOND * 1e3
    for kind in ("near", "shell", "independent", "far", "collapsed"):
        case = _pair(kind, HARD)
        for what, one_way in ((f"{kind}, x in y", case), (f"{kind}, y in x", case.swapped())):
            must = HARD_MUST if kind in ("far", "collapsed") else None
            note = f"all pairs at the full rate of the float32 units: {number(scan)} ms"
            tree_ms = TREE_COLLAPSED_MS if what == "collapsed, x in y" else None
            yield _knn_row(setting, f"knn, k 2: {what}, {HARD:,}", one_way, 2, must, note=note, tree_ms=tree_ms)


def _sizes(setting: Setting) -> Iterator[Row]:
    for n in SIZES:
        for what, k in (("near", 1), ("sweep on itself", 16)):
            name = f"knn, k {k}: {what}, {n:,}"
            if setting.quick and n > QUICK_SIZE:
                yield Row(name, "eager", "ms", None, note="skipped: --quick")
                continue
            case = _pair("near", n) if what == "near" else _self_case(data.sweep_cloud(n, setting.folder))
            yield _knn_row(setting, name, case, k)


def _degenerate(setting: Setting) -> Iterator[Row]:
    """Clouds that break a careless search. They have no target, only checks."""
    names = "all equal", "40 % at the origin", "coincident", "collinear", "one axis flat", "lattice"
    for name, points in data.degenerate(2**15, *names):
        yield _knn_row(setting, f"knn, k 16: {name}, {len(points):,}", _self_case(points), 16)


def _ragged(setting: Setting) -> Iterator[Row]:
    sweeps = data.four_sweeps(setting.folder)
    if not sweeps:
        yield Row(
            "knn of a ragged batch", "eager", "ms", None, note="skipped: no real scans (--data names their folder)"
        )
        return
    case = _self_case(*sweeps.values())
    apart = [timing.call_time(partial(_self_case(sweep).knn, 16)) for sweep in sweeps.values()]
    note = f"{', '.join(sweeps)}; a call for each: {' + '.join(map(number, apart))} = {number(sum(apart))} ms"
    yield _knn_row(setting, f"knn, k 16: {len(sweeps)} sweeps on themselves", case, 16, note=note)


# ---- chamfer -------------------------------------------------------------------------------------------------------


def _chamfer(setting: Setting) -> Iterator[Row]:
    for (clouds, n), must in CHAMFER_MUST.items():
        case = _pair("near", n, clouds)
        checks = _check_chamfer(case)
        forward = timing.graph_time(case.chamfer)
        for both, call in ((False, case.chamfer), (True, case.chamfer_value_and_grad)):
            eager = measured_peer("the same call, eager", "eager", partial(timing.call_time, call))
            yield Row(
                f"chamfer, near, {clouds} x {n:,}: {'value and gradients' if both else 'value'}",
                "graph",
                "ms",
                timing.graph_time(call) if both else forward,
                GRADIENT_MUST * forward if both else must,
                floor=_floor(setting, case, both * (case.query.nbytes + case.points.nbytes)),
                peers=(eager, *_chamfer_peers(case, both)),
                checks=checks,
                note=f"target: {GRADIENT_MUST} x the value ({number(forward)} ms)" if both else "",
            )


def _variants(setting: Setting) -> Iterator[Row]:
    """What else one search gives: one direction, the distance of each point, all metrics. Beside chamfer of both."""
    case = _pair("near", SWEEP)
    lengths: dict[str, Any] = {"x_lengths": case.lengths, "y_lengths": case.lengths}
    sides = case.query, case.points
    whole = timing.graph_time(case.chamfer)
    for name, share, call in (
        ("chamfer, one direction", ONE_SIDED_MUST, partial(gpu3d.chamfer, *sides, **lengths, direction="x_to_y")),
        (
            "chamfer, the distance of each point",
            POINTS_MUST,
            partial(gpu3d.chamfer, *sides, **lengths, reduction="points"),
        ),
        ("compare_clouds", COMPARE_MUST, partial(gpu3d.compare_clouds, *sides, **lengths, thresholds=THRESHOLDS)),
    ):
        yield Row(
            f"{name}: near, 1 x {SWEEP:,}",
            "graph",
            "ms",
            timing.graph_time(call),
            share * whole,
            peers=(measured_peer("the same call, eager", "eager", partial(timing.call_time, call)),),
            note=f"target: {share} x chamfer ({number(whole)} ms)",
        )


def _check_chamfer(case: Case) -> dict[str, bool]:
    loss, (dx, dy) = case.chamfer_value_and_grad()
    on_cpu, gradients = case.on_host().chamfer_value_and_grad()
    exact = _exact_chamfer(case)
    return {
        "the same value without gradients": _same(loss, case.chamfer()),
        CPU_BITS: all(_same(x.get(), y) for x, y in zip((loss, dx, dy), (on_cpu, *gradients), strict=True)),
        EXACT_MEAN: all(_close(x, y) for x, y in zip((loss, dx, dy), exact, strict=True)),
    }


def _exact_chamfer(case: Case) -> tuple[Any, Any, Any]:
    """Value and gradients in float64, from the neighbours of the brute force, for clouds of equal lengths."""
    import cupy

    x, y = case.query.astype(np.float64), case.points.astype(np.float64)
    loss, gradients = 0, (cupy.zeros_like(x), cupy.zeros_like(y))
    for one_way, sources, targets, to_sources, to_targets in (
        (case, x, y, *gradients),
        (case.swapped(), y, x, *gradients[::-1]),
    ):
        nearest = brute_force(one_way, 1)[1][:, 0]
        offsets = sources - targets[nearest]
        distances = cupy.linalg.norm(offsets, axis=1)
        terms = offsets / cupy.where(distances > 0, distances, 1)[:, None] / len(sources)
        loss = loss + distances.mean()
        to_sources += terms
        cupy.add.at(to_targets, nearest, -terms)
    return loss, *gradients


def _close(x: Any, exact: Any) -> bool:
    return bool(((x - exact) ** 2).sum() <= 1e-12 * (exact**2).sum())


def _chamfer_peers(case: Case, both: bool) -> Iterator[Peer]:
    earlier = losses.CDIST_EARLIER[len(case.lengths), case.lengths[0]][both]
    for name, prepare, figure in (
        ("torch.cdist chamfer", losses.cdist_chamfer, earlier),
        ("pytorch3d chamfer_distance, squared", losses.pytorch3d_chamfer, None),
    ):

        def measure(prepare: losses.Prepare = prepare) -> float:
            return timing.call_time(losses.call(prepare(), case.query, case.points, len(case.lengths), both))

        yield measured_peer(name, "eager", measure, figure)


# ---- radius_search, a reused index, the CPU ------------------------------------------------------------------------


def _radius(setting: Setting) -> Iterator[Row]:
    """radius_search with an exact max_entries, which needs no count on the host."""
    name, points = _real_sweep(setting.folder)
    case = _self_case(points)
    counts = _ball_counts(case)
    entries = int(counts.sum())

    def call(max_entries: int | None = entries) -> Any:
        return gpu3d.radius_search(case.query, case.points, RADIUS, max_entries=max_entries)

    yield Row(
        f"radius_search, {RADIUS} m: real sweep of {len(points):,}",
        "eager",
        "ms",
        timing.call_time(call),
        RADIUS_MUST,
        floor=_floor(setting, case, 8 * entries + 8 * len(points)),
        peers=(
            graph_peer(call),
            measured_peer("ours, without max_entries", "eager", lambda: timing.call_time(lambda: call(None))),
            measured_peer(
                "brute force (brute_force.cu), counts alone",
                "eager",
                lambda: timing.call_time(partial(_ball_counts, case)),
            ),
            measured_peer("torch.cdist <= r, nonzero", "eager", lambda: timing.call_time(_torch_ball(case))),
            measured_peer(
                "torch_cluster radius", "eager", lambda: timing.call_time(_torch_cluster_ball(case, int(counts.max())))
            ),
            measured_peer("scipy KDTree, all cores, counts alone", "CPU", lambda: _tree_ball_time(case.on_host())),
        ),
        checks=_check_balls(case, call(), counts),
        note=f"{name}; {entries:,} entries, {entries / len(points):.0f} per point, at most {int(counts.max()):,}",
    )


def _ball_counts(case: Case) -> Any:
    """How many points are within the radius of each query, int64 [n], for a single cloud."""
    import cupy

    n = len(case.query)
    counts = cupy.empty(n, np.int64)
    arguments = case.query, case.points, np.int32(n), np.int32(n), np.float32(RADIUS)
    _kernel("ball_counts")((-(-n // THREADS),), (THREADS,), (*arguments, counts))
    return counts


def _check_balls(case: Case, found: Any, counts: Any) -> dict[str, bool]:
    """Check that every entry is right, that none comes twice, and that the number is right, so none is missing."""
    import cupy

    offsets, indices, distances = found
    if not _same(offsets[1:], cupy.cumsum(counts)):
        return {ROWS: False}
    rows = cupy.searchsorted(offsets[1:], cupy.arange(len(indices)), side="right")
    dx, dy, dz = (case.query[rows] - case.points[indices]).T
    d2 = (dx * dx + dy * dy) + dz * dz  # one operation per kernel, so no fused multiply-add
    rising = (cupy.diff(rows) > 0) | (cupy.diff(indices) > 0)
    return {
        ROWS: bool(rising.all() & (d2 <= np.float32(RADIUS) ** 2).all()),
        "every bit of the distances by the formula": _same(distances, cupy.sqrt(d2)),
    }


def _torch_ball(case: Case) -> timing.Call:
    import torch

    query, points = data.to_torch(case.query), data.to_torch(case.points)
    parts = query.split(int(CDIST_BYTES / 4 / len(points)))

    def call() -> list[Any]:
        found = []
        for part in parts:
            distances = torch.cdist(part, points)
            near = (distances <= RADIUS).nonzero()
            found.append((near, distances[near[:, 0], near[:, 1]]))
        return found

    return call


def _torch_cluster_ball(case: Case, most: int) -> timing.Call:
    from torch_cluster import radius

    query, points = data.to_torch(case.query), data.to_torch(case.points)
    return lambda: radius(points, query, RADIUS, max_num_neighbors=most)


def _tree_ball_time(case: Case) -> float:
    return timing.cpu_time(
        lambda: KDTree(case.points).query_ball_point(case.query, RADIUS, workers=-1, return_length=True), 3
    )


def _reused(setting: Setting) -> Iterator[Row]:
    """An index searched for other points, as if they were the next sweep."""
    import cupy

    _, sweep = _real_sweep(setting.folder)
    case = _self_case(sweep)
    moved = case.points + cupy.asarray(np.random.default_rng(0).normal(0, data.JITTER, sweep.shape), np.float32)
    index = gpu3d.neighbor_index(case.points)
    for k in (1, 16):
        anew, again = partial(gpu3d.knn, moved, case.points, k), partial(gpu3d.knn, moved, index, k)
        without = timing.call_time(anew)
        yield Row(
            f"knn, k {k}: real sweep, index reused",
            "eager",
            "ms",
            timing.call_time(again),
            without,
            floor=_knn_floor(setting, case._replace(query=moved), k),
            peers=(
                Peer("ours, points given", "eager", without),
                Peer(
                    "ours, neighbor_index alone", "eager", timing.call_time(partial(gpu3d.neighbor_index, case.points))
                ),
            ),
            checks={"the same bits with and without": all(map(_same, again(), anew()))},
            note=f"target: no more than with points; queries: the sweep with {data.JITTER} m of jitter",
        )


def _normals(setting: Setting) -> Iterator[Row]:
    name, points = _real_sweep(setting.folder)
    case = _self_case(points)
    call = partial(gpu3d.normals, case.points, 16)
    yield Row(
        f"normals, k 16: real sweep of {len(points):,}",
        "graph",
        "ms",
        timing.graph_time(call, calls=5),
        NORMALS_MUST,
        NORMALS_AIM,
        floor=_floor(setting, case, 16 * len(points)),
        peers=(
            measured_peer("the same call, eager", "eager", partial(timing.call_time, call)),
            Peer("our knn alone", "graph", timing.graph_time(partial(case.knn, 16), calls=5)),
            measured_peer("torch.linalg.eigh of our neighbours", "eager", lambda: timing.call_time(_torch_eigh(case))),
        ),
        checks=_check_normals(case, call()),
        note=name,
    )


def _torch_eigh(case: Case) -> timing.Call:
    """Covariances and eigenvectors by torch in float64, from neighbours that are found before."""
    import torch

    near = data.to_torch(case.points).double()[data.to_torch(case.knn(16).indices).long()]

    def call() -> Any:
        offsets = near - near.mean(1, keepdim=True)
        return torch.linalg.eigh(offsets.transpose(1, 2) @ offsets)

    return call


def _check_normals(case: Case, found: Any) -> dict[str, bool]:
    """Compare with float64 eigenvectors of NumPy, where the two smallest eigenvalues differ by a factor of 4."""
    points = case.points.get().astype(np.float64)
    near = points[case.knn(16).indices.get()] - points[:, None]
    offsets = near - near.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(offsets.transpose(0, 2, 1) @ offsets)
    normals, exact = found.normals.get().astype(np.float64), vectors[:, :, 0]
    exact *= np.sign((normals * exact).sum(axis=1, keepdims=True))
    apart = values[:, 1] > 4 * np.maximum(values[:, 0], 1e-12 * values[:, 2])
    error = np.abs(normals - exact)[apart].max()
    return {f"= float64 eigenvectors within 1e-5, at {apart.mean():.0%} of the points": bool(error <= 1e-5)}


def _cpu(setting: Setting) -> Iterator[Row]:
    _, points = _real_sweep(setting.folder)
    case = _self_case(points)
    host = case.on_host()
    theirs = _tree_time(host, 16)
    on_cpu, on_gpu = host.knn(16), [x.get() for x in case.knn(16)]
    yield Row(
        f"knn, k 16: real sweep of {len(points):,}, NumPy",
        "CPU",
        "ms",
        timing.cpu_time(partial(host.knn, 16), 10),
        CPU_MUST * theirs,
        peers=(Peer("scipy KDTree, all cores", "CPU", theirs),),
        checks={"every bit = GPU": all(map(_same, on_cpu, on_gpu))},
        note=f"must: {CPU_MUST} x SciPy",
    )
    theirs = timing.cpu_time(partial(_scipy_pairs, host), 1)
    yield Row(
        f"radius_search, {RADIUS} m: real sweep of {len(points):,}, NumPy",
        "CPU",
        "ms",
        timing.cpu_time(partial(gpu3d.radius_search, host.query, host.points, RADIUS), 3),
        CPU_RADIUS_MUST * theirs,
        peers=(Peer("scipy cKDTree.sparse_distance_matrix", "CPU", theirs),),
        note=f"must: {CPU_RADIUS_MUST} x SciPy",
    )


def _scipy_pairs(case: Case) -> Any:
    query, points = (cKDTree(x.astype(np.float64)) for x in (case.query, case.points))
    return query.sparse_distance_matrix(points, RADIUS)


# ---- host time and determinism -------------------------------------------------------------------------------------


def _host(setting: Setting) -> Iterator[Row]:
    """Host time for 8,192 points, and for chamfer of 32 clouds of 2,048 points. There is no target."""
    case, batch = _self_case(data.sweep_cloud(2**13, setting.folder)), _pair("near", 2048, 32)
    index = gpu3d.neighbor_index(case.points)
    for what, call in {
        "knn": lambda: case.knn(16),
        "knn, index reused": lambda: gpu3d.knn(case.query, index, 16),
        "neighbor_index": lambda: gpu3d.neighbor_index(case.points),
        "radius_search, max_entries": lambda: gpu3d.radius_search(case.query, case.points, 0.05, max_entries=2**20),
        "chamfer": batch.chamfer,
        "chamfer_value_and_grad": batch.chamfer_value_and_grad,
    }.items():
        yield Row(f"the Python call, {what}", "host", "us", 1e3 * timing.host_time(call))


def _determinism(setting: Setting) -> Iterator[Row]:
    real, repeated = _self_case(_real_sweep(setting.folder)[1]), _self_case(data.sweep_cloud(SWEEP, setting.folder))
    collapsed, batch = _pair("collapsed", 2**15), _pair("near", 8192, 8)

    def gradients() -> list[Any]:
        loss, both = batch.chamfer_value_and_grad()
        return [loss, *both]

    for what, call in {
        "knn, k 16, sweep": partial(repeated.knn, 16),
        "knn, k 2, collapsed": partial(collapsed.knn, 2),
        "radius_search": partial(gpu3d.radius_search, real.query, real.points, RADIUS / 5),
        "chamfer, gradients": gradients,
    }.items():
        first = call()
        differing = sum(not all(map(_same, first, call())) for _ in range(RUNS))
        yield Row(f"runs of {RUNS} that differ: {what}", "check", "runs", differing, 0)
