# SPDX-License-Identifier: Apache-2.0
"""apml and its gradients: time compared with peers and floors, growth, memory, and equality with the dense definition.

Options are p_min 0.8, threshold 1e-8, 20 iterations, "mean". Times are eager: 10 calls in a row between two device
events; a call of more than 10 ms by itself, one of more than 100 ms only once. They include everything: both searches,
the plan, the loss and, where a row says so, the gradients. Without max_entries a call waits for the device to count
entries. With it, here 16 entries per point of both clouds, it does not wait.

Clouds: the pairs of `data.pair`, with equally many points in both; two real sweeps of one scene, 4 s apart; and single
scans cut in two, every second point in one cloud and the rest in the other, without duplicate points.

Results are checked against all pairs (`_exact`): distances, kept entries, weights, Sinkhorn, loss and gradients in
float64 with CuPy, in parts that fit. An entry that is not kept is 0 in the dense plan and stays 0. The kept pairs must
be exactly the same. This is done for 32 x 2048 and 8 x 8192 with all kinds of clouds, and for 1 x 131,072 with near and
far (not with --quick). A million points are too many: there near is compared with the CPU, which also computes in
float64, but finds the pairs with k-d trees.

Memory: peak bytes of CuPy's pool during a call, with its results and without its inputs. A hook on the pool adds what
is allocated and subtracts what is freed. The note has what the pool took from the device for the call (its total_bytes
after free_all_blocks and one call). Both figures are per point of both clouds.

Floors: the bytes that a call must move (coordinates read once, gradients written once) at the copy bandwidth, and one
near-empty kernel in a graph, both measured in the same run. They include neither search nor Sinkhorn. Two peers bound
the time from above: the two nearest neighbours of every point by brute force (brute_force.cu), which is less than half
of the work of any APML without pruning; and dense APML in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import gpu3d
from benchmarks import data, losses, neighbors, timing
from benchmarks.table import Peer, Row, Setting, absent_peer, graph_peer, measured_peer, number

P_MIN, THRESHOLD, ITERATIONS = 0.8, 1e-8, 20
ENTRIES_A_POINT = 16  # for max_entries
QUICK_SIZE = 2**17  # the largest cloud with --quick
SIZES = tuple((1, 2**power) for power in range(11, 21)) + tuple((2**power, 2048) for power in range(1, 8))
LARGEST = 2**20
RUNS = 100

# Forward and backward of near and shell, by (clouds, points per cloud): target and stretch target in ms.
MUST_AND_AIM = {(32, 2048): (0.7, None), (8, 8192): (1.0, None), (1, 2**17): (3.5, 1.5), (1, LARGEST): (30.0, 12.0)}
HARD_MUST = {(32, 2048): 1.5, (8, 8192): 2.0, (1, 2**17): 4.0}  # times near, for independent, collapsed and far
ROOM_MUST = 1.02  # with max_entries, times the call without; medians of 30 vary by 2 %
GROWTH_MUST = 1.2  # the exponent of N
MEMORY_MUST = 200  # bytes per point of both clouds
HOST_MUST = 500  # us
CPU_POINTS, CPU_MUST = 8192, 150  # ms
PLAN_ERROR, LOSS_ERROR, GRADIENT_ERROR = 1e-5, 1e-5, 1e-4  # absolute, relative, relative in the 2-norm

# From the earlier run that benchmarks/losses.py names: the public CUDA extension of CUDA-APML, compiled with -O3, in ms
# (forward, forward+backward) and MiB, and the memory of dense APML in torch in MiB. The extension's gradients are 2 to
# 12 % off.
CUDA_APML_EARLIER = {
    (8, 2048): (6.65, 8.09),
    (32, 2048): (12.6, 14.6),
    (8, 8192): (19.4, 21.8),
    (1, 2**14): (32.4, 34.4),
    (1, 2**16): (139.0, 135.0),
    (1, 2**17): (350.0, 343.0),
}
CUDA_APML_MIB_EARLIER = {(32, 2048): 61, (8, 8192): 48, (1, 2**17): 44}
DENSE_MIB_EARLIER = {(32, 2048): 3174, (8, 8192): 12_595}
EARLIER_NOTE = "(noise 0.02)"

# Limits for the peers, most of which look at all pairs, and for the check, which also does.
NO_ROOM, TOO_SLOW = "does not fit:", "looks at all"
DENSE_PAIRS = 2**30  # dense APML keeps six matrices of this size
CDIST_PAIRS = 2**32
SINKHORN_PAIRS = 2**34
BRUTE_FORCE_PAIRS = 2**36
GRAPH_POINTS = 2**19  # of both clouds; for more, only near is timed in a graph
EXACT_PAIRS = 2**30
LARGE_EXACT = ("near", "far"), 2**34  # these kinds are checked up to this many pairs
PART_PAIRS = 2**27  # pairs in memory at a time, in the check


def run(setting: Setting) -> Iterator[Row]:
    for part in (_kinds, _sizes, _scans, _memory, _host, _cpu, _accuracy, _determinism):
        for row in part(setting):
            yield row
            timing.free()


# ---- what is matched -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Clouds on the GPU. target_lengths is given only if the lengths of pred and target differ."""

    pred: Any  # [N, 3]
    target: Any  # [M, 3]
    lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]

    @property
    def points(self) -> int:
        """The points of both clouds together."""
        return len(self.pred) + len(self.target)

    @property
    def pairs(self) -> int:
        return sum(n * m for n, m in zip(self.lengths, self.target_lengths, strict=True))

    @property
    def room(self) -> int:
        """The value for max_entries."""
        return ENTRIES_A_POINT * self.points

    def value(self, max_entries: int | None = None) -> Any:
        return gpu3d.apml(self.pred, self.target, max_entries=max_entries, **self._options())

    def value_and_grad(self, max_entries: int | None = None) -> list[Any]:
        """The loss and the gradients of pred and target."""
        loss, gradients = gpu3d.apml_value_and_grad(self.pred, self.target, max_entries=max_entries, **self._options())
        return [loss, *gradients]

    def plan(self) -> gpu3d.ApmlPlan:
        return gpu3d.apml_plan(self.pred, self.target, **self._options())

    def chamfer_value_and_grad(self) -> Any:
        lengths = {"x_lengths": self.lengths, "y_lengths": self.target_lengths}
        return gpu3d.chamfer_value_and_grad(self.pred, self.target, **lengths)

    def on_host(self) -> Case:
        return self._replace(pred=self.pred.get(), target=self.target.get())

    def _options(self) -> dict[str, Any]:
        return {
            "pred_lengths": self.lengths,
            "target_lengths": self.target_lengths,
            "p_min": P_MIN,
            "threshold": THRESHOLD,
            "iterations": ITERATIONS,
        }


def _case(kind: str, n: int, clouds: int = 1) -> Case:
    """The clouds of `data.pair`."""
    import cupy

    return Case(*map(cupy.asarray, data.pair(kind, n, clouds)), *2 * (clouds * (n,),))


def _shape(clouds: int, n: int) -> str:
    return f"{clouds} x {n:,}"


# ---- the definition, from all pairs --------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Plan, loss (mean over clouds) and gradients, in float64 on the GPU."""

    rows: Any  # int64 [nnz]
    columns: Any  # int64 [nnz]
    values: Any  # [nnz]
    loss: Any  # []
    dpred: Any  # [N, 3]
    dtarget: Any  # [M, 3]


def _exact(case: Case) -> Exact:
    import cupy

    x, y = case.pred.astype(np.float64), case.target.astype(np.float64)
    keys, weights, row, column = [], [], 0, 0
    for n, m in zip(case.lengths, case.target_lengths, strict=True):
        a, b = x[row : row + n], y[column : column + m]
        for i, j, weight in _choices(a, b):
            keys.append((i + row) << 32 | (j + column))
            weights.append(weight)
        for j, i, weight in _choices(b, a):
            keys.append((i + row) << 32 | (j + column))
            weights.append(weight)
        row, column = row + n, column + m
    pairs, place = cupy.unique(cupy.concatenate(keys), return_inverse=True)
    values = cupy.bincount(place, cupy.concatenate(weights)) / 2  # mean of both sides; a missing entry counts as 0
    rows, columns = pairs >> 32, pairs & 0xFFFFFFFF
    for _ in range(ITERATIONS):
        values = values / (cupy.bincount(rows, values)[rows] + 1e-8)
        values = values / (cupy.bincount(columns, values)[columns] + 1e-8)
    offsets = x[rows] - y[columns]
    distances = cupy.sqrt((offsets * offsets).sum(axis=1))
    share = values / cupy.where(distances > 0, distances, np.inf) / len(case.lengths)
    dpred, dtarget = (
        cupy.stack([cupy.bincount(ends, share * offset, minlength=len(points)) for offset in offsets.T], axis=1)
        for ends, points in ((rows, x), (columns, y))
    )
    return Exact(rows, columns, values, (values * distances).sum() / len(case.lengths), dpred, -dtarget)


def _choices(own: Any, other: Any) -> Iterator[tuple[Any, Any, Any]]:
    """What each point keeps of the other cloud: its row, the other's row and the weight, some points at a time.

    Each operation is a kernel of its own, so there is no fused multiply-add and the bits equal NumPy's.
    """
    import cupy

    log_mass = math.log(len(other) - 1) - math.log1p(-P_MIN)
    step = max(PART_PAIRS // len(other), 1)
    for first in range(0, len(own), step):
        part = own[first : first + step]
        dx, dy, dz = (part[:, axis, None] - other[:, axis] for axis in range(3))
        c = cupy.sqrt((dx * dx + dy * dy) + dz * dz)
        del dx, dy, dz
        every, nearest = cupy.arange(len(part)), c.argmin(axis=1)
        d1 = c[every, nearest]
        c[every, nearest] = np.inf
        d2 = c.min(axis=1)
        c[every, nearest] = d1
        exponent = (c - d1[:, None]) * (log_mass / cupy.maximum(d2 - d1, 1e-8))[:, None]
        del c
        i, j = cupy.nonzero(exponent < -math.log(THRESHOLD))
        k = cupy.exp(-exponent[i, j])
        yield i + first, j, k / cupy.bincount(i, k)[i]


def _errors(case: Case, exact: Exact) -> tuple[bool, float, float, float]:
    """Whether the pairs equal those of the definition, and the errors of plan values, loss and gradients."""
    import cupy

    rows, cols, values, _ = case.plan()
    same = len(rows) == len(exact.rows) and bool(((rows == exact.rows) & (cols == exact.columns)).all())
    of_plan = float(cupy.abs(values - exact.values).max()) if same else math.inf
    loss, *gradients = case.value_and_grad()
    of_gradients = [_relative(*pair) for pair in zip(gradients, exact[4:], strict=True)]
    return same, of_plan, _relative(loss, exact.loss), max(of_gradients)


def _relative(x: Any, exact: Any) -> float:
    return float(((x - exact) ** 2).sum() / (exact**2).sum()) ** 0.5


SAME_PAIRS = "the pairs of the definition"


def _accuracy(setting: Setting) -> Iterator[Row]:
    """The accuracy of the cases that are timed."""
    for clouds, n in MUST_AND_AIM:
        for kind in data.PAIRS:
            kinds, most = LARGE_EXACT
            case = _case(kind, n, clouds)
            if case.pairs > (most if kind in kinds and not setting.quick else EXACT_PAIRS):
                continue
            yield from _accuracy_rows(f"{kind}, {_shape(clouds, n)}", case, _exact(case))
    yield _against_cpu(setting)


def _accuracy_rows(what: str, case: Case, exact: Exact) -> Iterator[Row]:
    same, *errors = _errors(case, exact)
    note = f"{len(exact.rows):,} pairs, {len(exact.rows) / len(case.pred):.2f} a row; loss {number(float(exact.loss))}"
    for name, error, must in zip(
        ("plan values", "loss", "gradients"), errors, (PLAN_ERROR, LOSS_ERROR, GRADIENT_ERROR), strict=True
    ):
        checks = {SAME_PAIRS: same} if name == "plan values" else {}
        yield Row(
            f"error of {name}: {what}",
            "check",
            "1e-6",
            1e6 * error,
            1e6 * must,
            checks=checks,
            note=note if checks else "",
        )


def _against_cpu(setting: Setting) -> Row:
    n = LARGEST
    what = f"error beside the CPU: near, {_shape(1, n)}"
    if setting.quick:
        return Row(what, "check", "1e-6", None, note="skipped: --quick")
    case = _case("near", n)
    host = case.on_host()
    (rows, cols, *_), (cpu_rows, cpu_cols, *_) = case.plan(), host.plan()
    loss, *gradients = (z.get() for z in case.value_and_grad())
    cpu_loss, *cpu_gradients = (np.float64(z) for z in host.value_and_grad())
    off = [_relative(*pair) for pair in zip(gradients, cpu_gradients, strict=True)]
    same = np.array_equal(rows.get(), cpu_rows) and np.array_equal(cols.get(), cpu_cols)
    return Row(
        what,
        "check",
        "1e-6",
        1e6 * max(off),
        1e6 * GRADIENT_ERROR,
        checks={
            "the pairs of the CPU": same,
            f"loss within {LOSS_ERROR}": _relative(loss, cpu_loss) <= LOSS_ERROR,
        },
        note="gradients",
    )


# ---- time beside the peers -----------------------------------------------------------------------------------------


def _floor(setting: Setting, case: Case, both: bool) -> float:
    """The floor in milliseconds."""
    nbytes = (1 + both) * (case.pred.nbytes + case.target.nbytes)
    return nbytes / setting.ceilings.copy_tb_s / 1e9 + setting.ceilings.graph_node_us / 1e3


def _kinds(setting: Setting) -> Iterator[Row]:
    """The rows that have a target for time, and then the growth that follows from them."""
    times: dict[tuple[str, int], float] = {}
    for (clouds, n), bounds in MUST_AND_AIM.items():
        for kind in data.PAIRS:
            what = f"{kind}, {_shape(clouds, n)}"
            if setting.quick and clouds * n > QUICK_SIZE:
                yield Row(what, "eager", "ms", None, note="skipped: --quick")
                continue
            must, aim, note = *bounds, ""
            if kind not in ("near", "shell"):
                factor = HARD_MUST.get((clouds, n))
                must, aim = factor and factor * times["near", n], None
                note = f"must: {factor} x near" if factor else ""
            rows = list(_kind_rows(setting, what, _case(kind, n, clouds), must, aim, note, every=kind == "near"))
            times[kind, n] = rows[0].ours or math.inf
            yield from rows
    small, large = (n for clouds, n in MUST_AND_AIM if clouds == 1)
    for kind in data.PAIRS:
        what = f"{kind}, growth from {small:,} on"
        if (kind, large) not in times:
            yield Row(what, "eager", "exp", None, note="skipped: --quick")
            continue
        exponent = math.log(times[kind, large] / times[kind, small]) / math.log(large / small)
        note = f"exponent of N: {number(times[kind, small])} ms, and {number(times[kind, large])} ms at {large:,}"
        yield Row(what, "eager", "exp", exponent, GROWTH_MUST if kind == "near" else None, note=note)


def _kind_rows(
    setting: Setting, what: str, case: Case, must: float | None, aim: float | None, note: str, every: bool
) -> Iterator[Row]:
    """Value and gradients without max_entries and with it, and the value alone. `every` adds all peers."""
    first, room = case.value_and_grad(), case.room
    ours = timing.call_time(case.value_and_grad)
    floor = _floor(setting, case, both=True)
    yield Row(
        f"{what}: value and gradients",
        "eager",
        "ms",
        ours,
        must,
        aim,
        floor=floor,
        peers=tuple(_peers(setting, case, both=True)) if every else (),
        checks={"finite": bool(np.isfinite(float(first[0]))), "each gradient moves": _moves(first[1:])},
        note=note,
    )
    yield Row(
        f"{what}: with max_entries",
        "eager",
        "ms",
        timing.call_time(partial(case.value_and_grad, room)),
        ROOM_MUST * ours,
        floor=floor,
        peers=(graph_peer(partial(case.value_and_grad, room)),) if every or case.points <= GRAPH_POINTS else (),
        checks={"the same bits as without": all(map(_same, first, case.value_and_grad(room)))},
        note=f"target: {ROOM_MUST} x without ({number(ours)} ms); {room:,} entries",
    )
    yield Row(
        f"{what}: value",
        "eager",
        "ms",
        timing.call_time(case.value),
        floor=_floor(setting, case, both=False),
        peers=tuple(_peers(setting, case, both=False)) if every else (),
        checks={"the same bits as with gradients": _same(first[0], case.value())},
    )


def _moves(gradients: list[Any]) -> bool:
    """Whether every gradient is finite and somewhere not 0."""
    return all(0 < float((gradient**2).sum()) < math.inf for gradient in gradients)


def _same(x: Any, y: Any) -> bool:
    """Whether two arrays have the same bits."""
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def _peers(setting: Setting, case: Case, both: bool) -> Iterator[Peer]:
    """The peers, for clouds of equal lengths."""
    clouds, n = len(case.lengths), case.lengths[0]
    if both:
        yield measured_peer("ours, chamfer", "eager", lambda: timing.call_time(case.chamfer_value_and_grad))
    yield _brute_force(case)
    dense = losses.dense_apml(P_MIN, THRESHOLD, ITERATIONS)
    for name, prepare, most, otherwise, earlier in (
        ("dense APML, torch", dense, DENSE_PAIRS, NO_ROOM, losses.DENSE_EARLIER),
        ("torch.cdist chamfer", losses.cdist_chamfer, CDIST_PAIRS, NO_ROOM, losses.CDIST_EARLIER),
        ("flash-sinkhorn", losses.flash_sinkhorn, SINKHORN_PAIRS, TOO_SLOW, losses.FLASH_SINKHORN_EARLIER),
        ("GeomLoss, KeOps", losses.geomloss_keops, SINKHORN_PAIRS, TOO_SLOW, {}),
    ):
        figure = earlier[clouds, n][both] if (clouds, n) in earlier else None
        if case.pairs > most:
            peer = Peer(name, "eager", None, f"{otherwise} {case.pairs:.1e} pairs", figure)
        elif setting.quick and otherwise == TOO_SLOW:
            peer = Peer(name, "eager", None, "--quick", figure)
        else:

            def measure(prepare: losses.Prepare = prepare) -> float:
                return timing.call_time(losses.call(prepare(), case.pred, case.target, clouds, both))

            peer = measured_peer(name, "eager", measure, figure)
        yield peer._replace(earlier_note=EARLIER_NOTE)
        timing.free()
    if (clouds, n) in CUDA_APML_EARLIER:
        yield absent_peer("CUDA-APML, public", "eager", CUDA_APML_EARLIER[clouds, n][both], EARLIER_NOTE)


def _brute_force(case: Case) -> Peer:
    name = "two nearest by all pairs, both ways"
    if case.pairs > BRUTE_FORCE_PAIRS:
        return Peer(name, "eager", None, f"{TOO_SLOW} {case.pairs:.1e} pairs")
    ways = [neighbors.Case(*pair, case.lengths) for pair in ((case.pred, case.target), (case.target, case.pred))]
    return measured_peer(
        name, "eager", lambda: timing.call_time(lambda: [neighbors.brute_force(way, 2) for way in ways])
    )


# ---- sizes, batches, real scans ------------------------------------------------------------------------------------


def _sizes(setting: Setting) -> Iterator[Row]:
    """More sizes, without a target, and the earlier figures of peers that no row above shows."""
    for clouds, n in SIZES:
        what = f"{_shape(clouds, n)}, near: value and gradients"
        if setting.quick and clouds * n > QUICK_SIZE:
            yield Row(what, "eager", "ms", None, note="skipped: --quick")
            continue
        case = _case("near", n, clouds)
        earlier = (clouds, n) not in MUST_AND_AIM and (clouds, n) in CUDA_APML_EARLIER
        ours = timing.call_time(case.value_and_grad)
        yield Row(
            what,
            "eager",
            "ms",
            ours,
            floor=_floor(setting, case, both=True),
            peers=tuple(_peers(setting, case, both=True)) if earlier else (),
            note=f"{1e6 * ours / case.points:.1f} ns per point of both clouds",
        )


def _scans(setting: Setting) -> Iterator[Row]:
    """Sparsity and time of the plan of whole scenes: two sweeps of one scene, and the two halves of single scans."""
    if setting.folder is None:
        yield Row("real scans", "eager", "ms", None, note="skipped: no real scans (--data names their folder)")
        return
    frames = data.two_frames(setting.folder)
    if frames:
        yield _scan_row(setting, frames[0], *frames[1])
    for name, points in () if setting.quick else data.scenes(setting.folder):
        points = points[np.sort(np.unique(points, axis=0, return_index=True)[1])]
        yield _scan_row(setting, f"{name}, every second point to the others", points[::2], points[1::2])


def _scan_row(setting: Setting, name: str, *points: np.ndarray) -> Row:
    import cupy

    pred, target = (cupy.asarray(np.ascontiguousarray(cloud)) for cloud in points)
    case = Case(pred, target, (len(pred),), (len(target),))
    plan = case.plan()
    return Row(
        f"scans, {len(pred):,} to {len(target):,}: value and gradients",
        "eager",
        "ms",
        timing.call_time(case.value_and_grad),
        floor=_floor(setting, case, both=True),
        peers=(graph_peer(partial(case.value_and_grad, case.room)), _brute_force_apart(case)),
        note=f"{name}; {len(plan.rows) / len(pred):.2f} pairs a row, at most {_longest(plan):,}; "
        f"{_bytes_a_point(case.value_and_grad, case):.0f} bytes per point",
    )


def _longest(plan: gpu3d.ApmlPlan) -> int:
    """The largest number of pairs in a row."""
    return int((plan.indptr[1:] - plan.indptr[:-1]).max())


def _brute_force_apart(case: Case) -> Peer:
    """Brute force on a cut copy of the case, because brute_force.cu needs float32 coordinates and equal lengths."""
    n = min(len(case.pred), len(case.target))
    pred, target = ((cloud[:n] - case.target[:1]).astype(np.float32) for cloud in (case.pred, case.target))
    return _brute_force(Case(pred, target, (n,), (n,)))


# ---- memory, host time, the CPU ------------------------------------------------------------------------------------


def _memory(setting: Setting) -> Iterator[Row]:
    for clouds, n in MUST_AND_AIM:
        for kind in data.PAIRS:
            what = f"memory: {kind}, {_shape(clouds, n)}"
            if setting.quick and clouds * n > QUICK_SIZE:
                yield Row(what, "check", "B", None, note="skipped: --quick")
                continue
            case = _case(kind, n, clouds)
            room = partial(case.value_and_grad, case.room)
            yield Row(
                what,
                "check",
                "B",
                _bytes_a_point(case.value_and_grad, case),
                MEMORY_MUST,
                peers=(
                    Peer("ours, with max_entries", "check", _bytes_a_point(room, case)),
                    *(_memory_peers(case) if kind == "near" else ()),
                ),
                note=f"per point of both clouds; the pool took {_taken_a_point(case.value_and_grad, case):.0f} B",
            )


def _bytes_a_point(call: timing.Call, case: Case) -> float:
    return timing.peak_bytes(call) / case.points


def _taken_a_point(call: timing.Call, case: Case) -> float:
    """Bytes per point that an empty pool takes from the device for one call."""
    import cupy

    pool = cupy.get_default_memory_pool()
    cupy.cuda.Device().synchronize()
    pool.free_all_blocks()
    before = pool.total_bytes()
    call()
    return (pool.total_bytes() - before) / case.points


def _memory_peers(case: Case) -> Iterator[Peer]:
    clouds, n = len(case.lengths), case.lengths[0]
    mib = 2**20 / case.points
    earlier = DENSE_MIB_EARLIER.get((clouds, n))
    figure = None if earlier is None else earlier * mib
    if case.pairs > DENSE_PAIRS:
        yield Peer("dense APML, torch", "check", None, f"{NO_ROOM} {case.pairs:.1e} pairs", figure)
    else:
        yield measured_peer("dense APML, torch", "check", lambda: _dense_bytes(case) / case.points, figure)
    if (clouds, n) in CUDA_APML_MIB_EARLIER:
        yield absent_peer("CUDA-APML, public", "check", CUDA_APML_MIB_EARLIER[clouds, n] * mib, EARLIER_NOTE)


def _dense_bytes(case: Case) -> int:
    import torch

    loss = losses.dense_apml(P_MIN, THRESHOLD, ITERATIONS)()
    call = losses.call(loss, case.pred, case.target, len(case.lengths), True)
    call()
    timing.free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _host(setting: Setting) -> Iterator[Row]:
    """Host time. Without max_entries it includes the wait for the device; with it, it is the Python call alone."""
    clouds, n = 32, 2048
    case = _case("near", n, clouds)
    for what, call, must in (
        ("value and gradients", case.value_and_grad, HOST_MUST),
        ("with max_entries", partial(case.value_and_grad, case.room), HOST_MUST),
        ("value", case.value, None),
        ("value, with max_entries", partial(case.value, case.room), None),
    ):
        yield Row(f"Python call, {_shape(clouds, n)}: {what}", "host", "us", 1e3 * timing.host_time(call), must)


def _cpu(setting: Setting) -> Iterator[Row]:
    for kind in data.PAIRS:
        case = Case(*data.pair(kind, CPU_POINTS), *2 * ((CPU_POINTS,),))
        must = CPU_MUST if kind in ("near", "shell") else None
        yield Row(
            f"NumPy, {kind}, {CPU_POINTS:,}: value and gradients",
            "CPU",
            "ms",
            timing.cpu_time(case.value_and_grad, 10 if must else 2),
            must,
        )


# ---- determinism ---------------------------------------------------------------------------------------------------


def _determinism(setting: Setting) -> Iterator[Row]:
    for kind, clouds, n in (
        ("near", 32, 2048),
        ("collapsed", 8, 8192),
        ("far", 1, 2**17),
        ("independent", 1, 2**17),
    ):
        case = _case(kind, n, clouds)

        def call(case: Case = case) -> list[Any]:
            return [*case.value_and_grad(), *case.plan(), *case.value_and_grad(case.room)]

        first = call()
        differing = sum(not all(map(_same, first, call())) for _ in range(RUNS))
        yield Row(
            f"runs of {RUNS} that differ: {kind}, {_shape(clouds, n)}",
            "check",
            "runs",
            differing,
            0,
            note="loss, gradients and plan; and loss and gradients with max_entries",
        )
