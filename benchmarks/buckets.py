# SPDX-License-Identifier: Apache-2.0
"""bucketize, scatter and gather: time compared with peers and floors, and checks of the layouts.

Floors are computed from the copy bandwidth measured in the same run:
- bucketize moves 32 bytes per point. It reads the points twice (24 bytes), because their bounds must be known before
  the first voxel, and writes two int32 permutations (8 bytes). The sort in between comes on top.
- scatter and gather read and write each row once. The index, 4 bytes per row, is not counted. Their floor is a rate,
  that of a copy in device memory. A call whose result stays in L2 may be faster.

If a target is a multiple of another time, that time was measured just before, for the same number of points.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import gpu3d
from benchmarks import data, timing
from benchmarks.table import Peer, Row, Setting, absent_peer, measured_peer
from gpu3d.reference.buckets import HASHES

SIZE = 122_880  # "120k": 240 buckets of 512
MILLION = 1_000_000
MUST_AND_AIM = {SIZE: (0.040, 0.020), MILLION: (0.12, 0.08), 4_000_000: (0.40, 0.27), 16_000_000: (1.6, 0.9)}  # ms
HASH_MUST = 1.4  # times zorder_div at equal N, for the other hashes and for ragged batches
DEGENERATE_MUST = 1.5
OTHER_HASHES = [hash for hash in HASHES if hash != "zorder_div"]
BATCH = 4
RUNS = 100
L2_BYTES = 50e6
BYTES_A_POINT = 32  # see the floors above
CHANNELS = 64

# Peers that no package registry has cannot run here. Their times in ms are from an earlier run on an H100 80GB (driver
# 580, CUDA 13.0, torch 2.11, 2026-11-22; a repeated nuScenes sweep). Tables mark them as earlier.
FLASH3D_EARLIER = {
    ("zorder_div", SIZE): 0.382,
    ("xor_div", SIZE): 0.204,
    ("zorder_mod", SIZE): 0.120,
    ("xor_mod", SIZE): 0.046,
    ("zorder_div", MILLION): 1.92,
    ("xor_div", MILLION): 0.87,
    ("zorder_mod", MILLION): 0.59,
    ("xor_mod", MILLION): 0.31,
    ("zorder_div", 4_000_000): 7.49,
}
FLASH3D_NOTES = {MILLION: "(buckets of 2048)", 4_000_000: "(buckets of 7936)"}
FLASH3D_HOST_EARLIER = 900.0  # us
PTV3_EARLIER = {SIZE: 0.647, MILLION: 0.995, 4_000_000: 1.50}
TORCH_SORT_EARLIER = {SIZE: 0.085, MILLION: 0.171, 4_000_000: 0.544}

# The names of the checks.
FULL = "every bucket full"  # except the last one of each cloud; and the layout is a bijection
REFERENCE = "= CPU reference"  # bit by bit
SORT = "= stable sort of the 48-bit codes"


def run(setting: Setting) -> Iterator[Row]:
    rows = []
    for part in (_sizes, _other_hashes, _ragged, _probe, _degenerate, _moves, _host, _sweeps, _determinism):
        for row in part(setting):
            rows.append(row)
            yield row
    yield from _summary(rows)


# ---- time ----------------------------------------------------------------------------------------------------------


def _sizes(setting: Setting) -> Iterator[Row]:
    for n, (must, aim) in MUST_AND_AIM.items():
        if setting.quick and n > MILLION:
            yield Row(f"zorder_div + spill, {n:,} points", "graph", "ms", None, must, aim, note="skipped: --quick")
            continue
        host = data.sweep_cloud(n, setting.folder)
        points, codes = _upload(host), data.codes(host)
        yield Row(
            f"zorder_div + spill, {n:,} points",
            _graph(host),
            "ms",
            timing.graph_time(lambda points=points: gpu3d.bucketize(points)),
            must,
            aim,
            floor=_floor(n, setting),
            peers=_sort_peers(codes, n),
            checks=_check(host, gpu3d.bucketize(points), codes=codes, reference=n < 16_000_000),
        )


def _sort_peers(codes: np.ndarray, n: int) -> tuple[Peer, ...]:
    """Peers of zorder_div + spill. They sort ready-made codes; only our time includes computing the codes."""
    codes = codes.astype(np.int64)
    ready = _upload(codes)
    return (
        measured_peer(
            "torch.sort of the int64 codes alone", _graph(codes), _torch_sort(codes), TORCH_SORT_EARLIER.get(n)
        ),
        measured_peer(
            "cupy.argsort of the int64 codes alone", "eager", lambda: timing.eager_time(_cupy_argsort(ready))
        ),
        _flash3d("zorder_div", n),
        absent_peer("PTv3 serialization, one z order", "graph", PTV3_EARLIER.get(n)),
    )


def _torch_sort(codes: np.ndarray) -> Callable[[], float]:
    def measure() -> float:
        ready = _torch_upload(codes)
        import torch

        return timing.torch_graph_time(lambda: torch.sort(ready))

    return measure


def _cupy_argsort(codes: Any) -> Callable[[], Any]:
    import cupy

    return lambda: cupy.argsort(codes)


def _other_hashes(setting: Setting) -> Iterator[Row]:
    for n in (SIZE, MILLION):
        host = data.sweep_cloud(n, setting.folder)
        points = _upload(host)
        plain = timing.graph_time(lambda points=points: gpu3d.bucketize(points))
        for hash in OTHER_HASHES:
            yield Row(
                f"{hash} + spill, {n:,} points",
                _graph(host),
                "ms",
                timing.graph_time(lambda points=points, hash=hash: gpu3d.bucketize(points, hash=hash)),
                HASH_MUST * plain,
                floor=_floor(n, setting),
                peers=(_flash3d(hash, n),),
                checks=_check(host, gpu3d.bucketize(points, hash=hash), hash=hash),
                note=f"target: {HASH_MUST} x zorder_div ({plain:.4f} ms)",
            )


def _ragged(setting: Setting) -> Iterator[Row]:
    host = data.sweep_cloud(BATCH * SIZE, setting.folder)
    points, lengths = _upload(host), [SIZE] * BATCH
    one = timing.graph_time(lambda: gpu3d.bucketize(points))
    yield Row(
        f"zorder_div + spill, one cloud of {BATCH * SIZE:,} points",
        _graph(host),
        "ms",
        one,
        floor=_floor(BATCH * SIZE, setting),
        checks=_check(host, gpu3d.bucketize(points), codes=data.codes(host)),
    )
    yield Row(
        f"... {BATCH} clouds of {SIZE:,}",
        _graph(host),
        "ms",
        timing.graph_time(lambda: gpu3d.bucketize(points, lengths=lengths)),
        HASH_MUST * one,
        floor=_floor(BATCH * SIZE, setting),
        checks=_check(host, gpu3d.bucketize(points, lengths=lengths), lengths=lengths),
        note=f"target: {HASH_MUST} x one cloud",
    )


def _probe(setting: Setting) -> Iterator[Row]:
    host = data.sweep_cloud(SIZE, setting.folder)
    points = _upload(host)
    buckets = gpu3d.bucketize(points, balance="probe")
    yield Row(
        f'zorder_div + "probe", {SIZE:,} points',
        _graph(host),
        "ms",
        timing.graph_time(lambda: gpu3d.bucketize(points, balance="probe")),
        0.6,
        floor=_floor(SIZE, setting),
        peers=(_flash3d("zorder_div", SIZE),),
        checks=_check(host, buckets, balance="probe"),
        note=f"{int(buckets.moved):,} points are not in the bucket of their hash",
    )


def _degenerate(setting: Setting) -> Iterator[Row]:
    points = _upload(data.sweep_cloud(SIZE, setting.folder))
    plain = timing.graph_time(lambda: gpu3d.bucketize(points))
    for name, host in data.degenerate(SIZE, "40 % at the origin", "coincident"):
        cloud = _upload(host)
        ours = timing.graph_time(lambda cloud=cloud: gpu3d.bucketize(cloud))
        yield Row(
            f'"{name}", {SIZE:,} points',
            _graph(host),
            "ms",
            ours,
            DEGENERATE_MUST * plain,
            floor=_floor(SIZE, setting),
            checks=_check(host, gpu3d.bucketize(cloud), codes=data.codes(host)),
            note=f"{ours / plain:.2f} x a plain sweep ({plain:.4f} ms); target: {DEGENERATE_MUST} x",
        )


def _moves(setting: Setting) -> Iterator[Row]:
    """scatter and gather of [SIZE, CHANNELS] bfloat16, in bytes read and written per second."""
    host = data.sweep_cloud(SIZE, setting.folder)
    on_host, buckets = gpu3d.bucketize(host), gpu3d.bucketize(_upload(host))
    rows = np.random.default_rng(0).standard_normal((SIZE, CHANNELS), np.float32).astype(bfloat16)
    x = _upload(rows)
    slots = buckets.scatter(x)
    for name, call, index, expected in (
        ("scatter", lambda: buckets.scatter(x), on_host.slot_to_point, on_host.scatter(rows)),
        ("gather", lambda: buckets.gather(slots), on_host.point_to_slot, rows),
    ):
        rate = _rate(rows.nbytes)
        source = rows if name == "scatter" else on_host.scatter(rows)
        yield Row(
            f"{name} of [{SIZE:,}, {CHANNELS}] bfloat16",
            _graph(rows),
            "TB/s",
            rate(timing.graph_time(call)),
            2.0,
            at_least=True,
            floor=setting.ceilings.copy_tb_s,
            peers=(
                Peer("ours, one output for all calls", "graph, L2-warm", rate(timing.graph_time(call, keep=False))),
                measured_peer("torch.index_select", _graph(rows), _torch_select(source, index, rate, keep=True)),
                measured_peer(
                    "... one output for all calls", "graph, L2-warm", _torch_select(source, index, rate, keep=False)
                ),
            ),
            checks={"= CPU result": _same_bits(call(), expected)},
        )


def _rate(nbytes: int) -> Callable[[float], float]:
    """A function from milliseconds to TB/s."""
    return lambda milliseconds: 2 * nbytes / milliseconds / 1e9


def _torch_select(
    rows: np.ndarray, index: np.ndarray, rate: Callable[[float], float], *, keep: bool
) -> Callable[[], float]:
    def measure() -> float:
        x, ready = _torch_upload(rows.view(np.int16)), _torch_upload(index)
        import torch

        x = x.view(torch.bfloat16)
        return rate(timing.torch_graph_time(lambda: x.index_select(0, ready), keep=keep))

    return measure


def _host(setting: Setting) -> Iterator[Row]:
    host = data.sweep_cloud(SIZE, setting.folder)
    points, codes = _upload(host), data.codes(host).astype(np.int64)
    yield Row(
        f"the Python call, {SIZE:,} points",
        "host",
        "us",
        1e3 * timing.host_time(lambda: gpu3d.bucketize(points)),
        60,
        40,
        peers=(absent_peer("public Flash3D kernels", "host", FLASH3D_HOST_EARLIER),),
    )
    yield Row(
        f"NumPy arrays, {SIZE:,} points",
        "CPU",
        "ms",
        timing.cpu_time(lambda: gpu3d.bucketize(host)),
        25,
        peers=(
            measured_peer(
                "numpy.argsort of the int64 codes alone",
                "CPU",
                lambda: timing.cpu_time(lambda: np.argsort(codes, kind="stable")),
            ),
        ),
        checks={FULL: _full(gpu3d.bucketize(host))},
    )


# ---- quality and determinism ---------------------------------------------------------------------------------------


def _sweeps(setting: Setting) -> Iterator[Row]:
    """How tight the buckets are: the largest distance from the mean of a bucket, averaged over full buckets."""
    cloud = data.sweep_cloud(SIZE, setting.folder)
    yield _radius(f"radius, {SIZE:,} points of the timed cloud", cloud)
    yield Row(
        "... mean distance to the bucket's mean",
        "check",
        "m",
        _mean_distance(cloud, gpu3d.bucketize(_upload(cloud))),
        peers=(
            absent_peer("public Flash3D kernels, zorder_div", "check", 6.86),
            absent_peer("a full z-order sort", "check", 2.61),
        ),
        note="Earlier figures: a repeated nuScenes sweep. The 2.61 was called mean radius, and is this mean distance.",
    )
    group, found = [], False
    for name, points in data.real_sweeps(setting.folder) if setting.folder else ():
        found = True
        if setting.quick and name.startswith("semantickitti/"):
            continue
        row = _radius(f"radius, {name.removeprefix('lidar_raw/')}"[:48], points)
        if not name.startswith("semantickitti/"):
            yield row
        else:
            group.append(row)
    if not found:
        yield Row("radius, real sweeps", "check", "m", None, note="skipped: no real scans (--data names their folder)")
    if group:
        yield _together(f"radius, {len(group)} SemanticKITTI sweeps, mean", group)


def _radius(what: str, host: np.ndarray) -> Row:
    buckets = gpu3d.bucketize(_upload(host))
    quality = gpu3d.bucket_quality(host, buckets)
    return Row(
        what,
        "check",
        "m",
        quality.mean_radius,
        checks=_check(host, buckets, codes=data.codes(host)),
        note=f"{len(host):,} points, {host.dtype}; largest radius {quality.max_radius:.2f} m",
    )


def _mean_distance(host: np.ndarray, buckets: gpu3d.Buckets) -> float:
    """The mean distance of the points of full buckets from the mean of their bucket."""
    slots = _download(buckets.slot_to_point).reshape(-1, buckets.bucket_size)
    members = host[slots[(slots >= 0).all(axis=1)]].astype(np.float64)
    return float(np.linalg.norm(members - members.mean(axis=1, keepdims=True), axis=2).mean())


def _together(what: str, rows: Sequence[Row]) -> Row:
    """The mean of several rows. A check holds if it holds in every row."""
    checks = {name: all(row.checks[name] for row in rows) for name in rows[0].checks}
    failing = [row.what for row in rows if not all(row.checks.values())]
    note = f"failing: {', '.join(failing)}" if failing else ""
    return Row(what, "check", "m", float(np.mean([row.ours for row in rows])), checks=checks, note=note)


def _determinism(setting: Setting) -> Iterator[Row]:
    for n, balance in ((SIZE, "spill"), (MILLION, "spill"), (SIZE, "probe")):
        points = _upload(data.sweep_cloud(n, setting.folder))
        first = gpu3d.bucketize(points, balance=balance)
        differing = sum(not _same_layout(first, gpu3d.bucketize(points, balance=balance)) for _ in range(RUNS))
        yield Row(f"runs of {RUNS} that differ: {balance}, {n:,} points", "check", "runs", differing, 0)


def _same_layout(a: gpu3d.Buckets, b: gpu3d.Buckets) -> bool:
    """Whether two layouts are equal, compared on their device."""
    pairs = ((getattr(a, name), getattr(b, name)) for name in ("slot_to_point", "point_to_slot", "moved"))
    return all(bool((x == y).all()) for x, y in pairs)


def _summary(rows: Sequence[Row]) -> Iterator[Row]:
    """One row per check: how many of the rows above fail it."""
    results = defaultdict(list)
    for row in rows:
        for name, good in row.checks.items():
            results[name].append(good)
    for name, good in results.items():
        peers = (absent_peer("public Flash3D kernels, buckets over capacity", "check", 28, "of 256, at 120k"),)
        yield Row(
            f"failing of {len(good)}: {name}",
            "check",
            "rows",
            good.count(False),
            0,
            peers=peers if name == FULL else (),
        )


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(
    host: np.ndarray, buckets: gpu3d.Buckets, *, codes: np.ndarray | None = None, reference: bool = True, **options: Any
) -> dict[str, bool]:
    """Check the layout, that it equals the CPU's, and, if codes of a zorder_div cloud are given, their stable sort."""
    checks = {FULL: _full(buckets)}
    if reference:
        expected = gpu3d.bucketize(host, check_finite=False, **options)
        checks[REFERENCE] = all(
            np.array_equal(_download(getattr(buckets, name)), getattr(expected, name))
            for name in ("slot_to_point", "point_to_slot", "moved")
        )
    if codes is not None:
        order = _download(buckets.slot_to_point)[: len(host)]
        checks[SORT] = np.array_equal(order, np.argsort(codes, kind="stable"))
    return checks


def _full(buckets: gpu3d.Buckets) -> bool:
    """Whether each cloud fills its slots with its own points, each once, padding last, and both arrays are inverse."""
    slot_to_point, point_to_slot = _download(buckets.slot_to_point), _download(buckets.point_to_slot)
    point = 0
    good = len(slot_to_point) == buckets.num_slots and len(point_to_slot) == sum(buckets.lengths)
    for n, first, end in zip(buckets.lengths, buckets.bucket_offsets[:-1], buckets.bucket_offsets[1:], strict=True):
        good &= end - first == -(-n // buckets.bucket_size)
        slots = slot_to_point[first * buckets.bucket_size : end * buckets.bucket_size]
        good &= bool((slots[n:] == -1).all())
        good &= np.array_equal(np.sort(slots[:n]), np.arange(point, point + n))
        point += n
    points = np.flatnonzero(slot_to_point >= 0)
    return bool(good) and np.array_equal(point_to_slot[slot_to_point[points]], points)


def _same_bits(a: Any, expected: np.ndarray) -> bool:
    return np.array_equal(_download(a).view(np.uint16), expected.view(np.uint16))


# ---- helpers -------------------------------------------------------------------------------------------------------


def _upload(x: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(x)


def _download(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()


def _torch_upload(x: np.ndarray) -> Any:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("this torch has no CUDA device")
    return torch.from_numpy(x).cuda()


def _graph(source: np.ndarray) -> str:
    return "graph, L2-warm" if source.nbytes < L2_BYTES else "graph"


def _floor(n: int, setting: Setting) -> float:
    """The floor in milliseconds."""
    return BYTES_A_POINT * n / setting.ceilings.copy_tb_s / 1e9


def _flash3d(hash: str, n: int) -> Peer:
    return absent_peer(
        f"public Flash3D kernels, {hash}", "graph", FLASH3D_EARLIER.get((hash, n)), FLASH3D_NOTES.get(n, "")
    )
