# SPDX-License-Identifier: Apache-2.0
"""bucket_attention and its backward: time compared with every torch SDPA backend, memory, error and determinism.

Inputs are bfloat16 (float32 where a row says so), normal random numbers, over the buckets of a real sweep: L = 122,880
points in buckets of 512. The peers attend inside ready-made contiguous windows [L / scope, H, scope, D] that hold the
same rows. forward+backward is one call of each; for the peers it is one autograd forward and backward. A time is the
median of 10 measurements of 4 calls in a row, or of one call if it takes more than 30 ms.

TFLOP/s count 4 * L * scope * C in the forward, which has two matrix products, and 3.5 times that for both, because the
backward has five more. The target of a row is the time of its fastest peer in this run, divided by how many times as
fast gpu3d should be. For this comparison both are timed once more: they take turns on a GPU that has been busy for a
second, and the least of several rounds counts. Shifted and strided scopes are compared with plain ones in the same way,
and the ragged batch with the dense one. The rows of many lengths have the worst time a pair of query and key over the
best.

The floor of the forward or of the backward is the largest of these times; the floor of both is their sum:
- FLOPs (two products, or five) at the rate of cuBLAS on 8192^3, measured in the same run;
- exponentials (one per score in each direction) at the rate of ex2.approx.ftz.f32, a constant of the H100;
- bytes (each input read once, each output written once) at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

import gpu3d
from benchmarks import data, timing
from benchmarks.table import Peer, Row, Setting, absent_peer, measured_peer, number

SIZE = 122_880  # 240 full buckets
BUCKET_SIZE = 512
SCOPES = (1024, 4096, 8192)
DIRECTIONS = ("forward", "forward+backward")  # indexed by `both`
REPEATS, CALLS, SLOW_MS = 10, 4, 30.0  # several calls in a row, so that the device does not wait for the host
ROUNDS, SECONDS, REPEATS_IN_TURN = 8, 1.0, 3  # calls that take turns: the least rounds and seconds, and repeats a turn
WARM_SECONDS = 1.0  # before them: a GPU that was idle first runs faster than its power limit allows later
RUNS = 30
COUNTERS = 1 << 16  # bytes that counters, and gaps between pieces of a workspace, may take


class Shape(NamedTuple):
    """Channels, heads and head dimension."""

    c: int
    h: int
    d: int

    def __str__(self) -> str:
        return f"C {self.c}, H {self.h}, D {self.d}"


SHAPES = (
    Shape(64, 4, 16),
    Shape(256, 16, 16),
    Shape(512, 32, 16),
    Shape(256, 8, 32),
    Shape(512, 8, 64),
    Shape(512, 4, 128),
)
SMALL, WIDE = SHAPES[0], SHAPES[4]

# How many times as fast as the fastest peer we should be, by (D, scope): (target, stretch target) of the forward, then
# of forward+backward.
MUST_AND_AIM = {
    (16, 4096): ((1.6, 2.0), (1.8, 2.1)),
    (16, 1024): ((1.6, 2.0), (1.8, 2.1)),
    (32, 4096): ((1.4, 1.5), (1.45, 1.6)),
    (64, 4096): ((1.05, 1.15), (1.0, 1.1)),
    (64, 1024): ((1.0, 1.15), (0.95, 1.1)),
    (128, 4096): ((0.95, 1.0), (0.9, 1.0)),
    (128, 1024): ((0.85, 1.0), (0.8, 1.0)),
}
BACKWARD_MUST = 465  # TFLOP/s of five products, D = 128, scopes of 4096
LENGTHS = tuple(int(n) for n in np.linspace(16_384, 200_000, 20))
LENGTHS_MUST = 1.2, 1.15  # times the best length's time a pair of query and key: forward, backward
TABLE_MUST = 1.02  # times the plain scope, for a shifted or strided scope
RAGGED_MUST = 1.10  # times the dense batch, per token, for a ragged batch
FORWARD_HOST_MUST, BACKWARD_HOST_MUST = 40, 60  # us
ERROR_MUST = 2.0  # times the error of naive attention in bfloat16

# ex2.approx.ftz.f32 on an H100, measured: 16 per clock and multiprocessor. The packed 16-bit forms are not faster per
# exponential.
EXPS_A_SECOND = 4.14e12

# Determinism: torch documents that the backwards of FLASH and EFFICIENT add in no fixed order (with atomics) unless
# torch.use_deterministic_algorithms is on, and that cuDNN may choose such an algorithm. The last rows of the suite
# count the runs that differ.
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
MATH_BYTES = 4e9  # of float32 scores; MATH keeps several such matrices, so larger cases are left out

# Times in ms (forward, forward+backward) by (C, D, scope), from an earlier run on an H100 80GB (driver 580, CUDA 13.0,
# torch 2.11, 2026-11-22). Tables mark them as earlier. The first are Flash3D's public kernels, which no registry has;
# then the first three backends. Flash3D's backward gave wrong gradients (dq and dk wrong by a factor of 5), so it has
# no time.
EARLIER = {
    (64, 16, 4096): ((2.79,), (1.35, 4.91), (1.05, 3.77), (3.53, 13.9)),
    (256, 16, 1024): ((2.63,), (1.50, 5.48), (1.10, 4.14), (3.56, 13.9)),
    (512, 16, 4096): ((22.9,), (10.4, 37.9), (8.11, 29.2), (27.6, 109)),
    (256, 32, 4096): ((9.13,), (2.34, 8.33), (2.07, 7.57), (6.98, 27.7)),
    (512, 64, 4096): ((14.2,), (3.33, 13.4), (2.08, 8.39), (7.52, 30.5)),
    (512, 128, 4096): ((19.3,), (3.07, 11.5), (1.54, 6.96), (5.74, 24.5)),
    (512, 64, 1024): ((3.65,), (0.86, 3.60), (0.56, 2.47), (2.15, 7.84)),
    (512, 128, 1024): ((4.66,), (0.75, 3.37), (0.42, 2.02), (1.78, 6.45)),
}


def run(setting: Setting) -> Iterator[Row]:
    for part in (_dense, _backward, _single, _tables, _ragged, _lengths, _host, _memory, _errors, _determinism):
        for row in part(setting):
            yield row
            timing.free()
    _base_rows.cache_clear()
    _layout.cache_clear()


# ---- what is attended ----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A layout, its scopes, and CuPy arrays q, k, v and dout [num_slots, H, D] in bfloat16."""

    shape: Shape
    buckets: gpu3d.Buckets
    scopes: gpu3d.Scopes
    q: Any
    k: Any
    v: Any
    dout: Any
    scale: float | None = None

    def forward(self, return_lse: bool = False) -> Any:
        return gpu3d.bucket_attention(
            self.q, self.k, self.v, self.buckets, self.scopes, scale=self.scale, return_lse=return_lse
        )

    def backward(self, out: Any, lse: Any) -> Any:
        return gpu3d.bucket_attention_backward(
            self.dout, self.q, self.k, self.v, out, lse, self.buckets, self.scopes, scale=self.scale
        )

    def both(self) -> Any:
        return self.backward(*self.forward(return_lse=True))


def _case(setting: Setting, shape: Shape, scope: int) -> Case:
    """A case over the timed sweep."""
    return _case_of(_layout(setting.folder), shape, scope)


def _case_of(buckets: gpu3d.Buckets, shape: Shape, scope: int) -> Case:
    scopes = gpu3d.scopes(buckets, scope // BUCKET_SIZE)
    return Case(shape, buckets, scopes, *(_rows(which, buckets.num_slots, shape) for which in range(4)))


@functools.cache
def _layout(folder: Path | None) -> gpu3d.Buckets:
    import cupy

    return gpu3d.bucketize(cupy.asarray(data.sweep_cloud(SIZE, folder)), BUCKET_SIZE)


def _rows(which: int, slots: int, shape: Shape) -> Any:
    """q, k, v or dout: normal random numbers, repeated after the first 2**24."""
    import cupy

    base = _base_rows()[which]
    count = slots * shape.c
    return cupy.tile(base, -(-count // base.size))[:count].view(bfloat16).reshape(slots, shape.h, shape.d)


@functools.cache
def _base_rows() -> Any:
    """The bits of 2**24 numbers for each of q, k, v and dout."""
    import cupy

    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(2**24, np.float32) for _ in range(4))
    return [cupy.asarray(x.astype(bfloat16).view(np.int16)) for x in numbers]


# ---- time beside the peers -----------------------------------------------------------------------------------------


def _dense(setting: Setting) -> Iterator[Row]:
    rates = Rates(_tensor_rate(), EXPS_A_SECOND, setting.ceilings.copy_tb_s * 1e12)
    for scope in SCOPES:
        for shape in SHAPES:
            for both in (False, True):
                if setting.quick and scope > 4096:
                    yield Row(_name(shape, scope, both), "eager", "ms", None, note="skipped: --quick")
                else:
                    yield _dense_row(_case(setting, shape, scope), scope, both, rates)


def _dense_row(case: Case, scope: int, both: bool, rates: Rates) -> Row:
    call = case.both if both else case.forward
    ours, peers = _time(call), _torch_peers(case, scope, both)
    ran = {backend: peer.value for backend, peer in zip(BACKENDS, peers, strict=True) if peer.value is not None}
    must_ratio, aim_ratio = MUST_AND_AIM.get((case.shape.d, scope), ((0, 0), (0, 0)))[both]
    must = aim = fastest = None
    if ran:
        fastest = min(ran, key=lambda backend: ran[backend])
    if fastest and must_ratio:
        ours, ran[fastest] = _in_turns([call, _torch_call_of(case, scope, both, fastest)])
        peers = tuple(peer._replace(value=ran.get(backend)) for backend, peer in zip(BACKENDS, peers, strict=True))
        must, aim = ran[fastest] / must_ratio, ran[fastest] / aim_ratio
    teraflops = (3.5 if both else 1) * 4e-9 * SIZE * scope * case.shape.c / ours
    remarks = [f"{teraflops:.0f} TFLOP/s"]
    if fastest:
        remarks.append(f"{ran[fastest] / ours:.2f} x as fast as the fastest peer ({_peer_name(fastest)})")
    if must:
        remarks.append(f"target: {must_ratio} x, stretch target: {aim_ratio} x")
    floor, binding = _floor(case.shape, scope, both, rates)
    remarks.append(f"floor: {binding}")
    if not both:
        flash3d = EARLIER.get((case.shape.c, case.shape.d, scope), ((None,),))[0][0]
        peers = (*peers, absent_peer("public Flash3D kernels", "eager", flash3d))
    return Row(
        _name(case.shape, scope, both),
        "eager",
        "ms",
        ours,
        must,
        aim,
        floor=floor,
        peers=peers,
        note="; ".join(remarks),
    )


def _name(shape: Shape, scope: int, both: bool) -> str:
    return f"{shape}, scope {scope}: {DIRECTIONS[both]}"


def _time(call: timing.Call, repeats: int = REPEATS) -> float:
    """Eager time. Events of CuPy's current stream time torch too, because both run on the default stream."""
    return timing.eager_time(call, repeats, CALLS if timing.eager_time(call, 1) < SLOW_MS else 1)


def _in_turns(calls: Sequence[timing.Call]) -> list[float]:
    """The least time of each call. They take turns on a busy GPU, because clocks drift by more than 1 % a second."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_SECONDS:
        for call in calls:
            _time(call, 1)
    times, turn, begin = [np.inf] * len(calls), 0, time.perf_counter()
    while turn < ROUNDS or time.perf_counter() - begin < SECONDS:
        for i in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            times[i] = min(times[i], _time(calls[i], REPEATS_IN_TURN))
        turn += 1
    return times


class Rates(NamedTuple):
    """What the device can do per second."""

    flops: float
    exps: float
    bytes: float


def _tensor_rate() -> float:
    """FLOP/s of cuBLAS in bfloat16."""
    import cupy

    n = 8192
    a, b = (cupy.tile(bits, n * n // bits.size).view(bfloat16).reshape(n, n) for bits in _base_rows()[:2])
    return 2 * n**3 / (1e-3 * timing.eager_time(lambda: cupy.matmul(a, b)))


def _floor(shape: Shape, scope: int, both: bool, rates: Rates) -> tuple[float, str]:
    """The floor in milliseconds, and which of the three bounds it is."""
    scores, row_bytes, lse_bytes = SIZE * scope * shape.h, 2 * SIZE * shape.c, 4 * SIZE * shape.h
    passes = [{"FLOPs": 4 * scores * shape.d, "exps": scores, "bytes": 4 * row_bytes + both * lse_bytes}]
    if both:
        passes.append({"FLOPs": 10 * scores * shape.d, "exps": scores, "bytes": 8 * row_bytes + lse_bytes})
    floor, binding = 0.0, []
    for work in passes:
        times = {name: 1e3 * work[name] / rate for name, rate in zip(work, rates, strict=True)}
        binding.append(max(times, key=lambda name: times[name]))
        floor += times[binding[-1]]
    return floor, ", then ".join(dict.fromkeys(binding))


def _backward(setting: Setting) -> Iterator[Row]:
    """The backward alone, in a busy second like the rows with targets."""
    for shape in (WIDE, SHAPES[5]):
        case = _case(setting, shape, 4096)
        out, lse = case.forward(return_lse=True)
        (ours,) = _in_turns([lambda case=case, out=out, lse=lse: case.backward(out, lse)])
        flops = 10e-9 * SIZE * 4096 * shape.c
        must = flops / BACKWARD_MUST if shape.d == 128 else None
        name = f"{shape}, scope 4096: backward alone"
        yield Row(name, "eager", "ms", ours, must, note=f"{flops / ours:.0f} TFLOP/s of five products")


# ---- torch ---------------------------------------------------------------------------------------------------------


def _torch_peers(case: Case, scope: int, both: bool) -> tuple[Peer, ...]:
    earlier = EARLIER.get((case.shape.c, case.shape.d, scope))
    peers = []
    for place, backend in enumerate(BACKENDS, 1):
        name = _peer_name(backend)
        scores = 4 * SIZE * scope * case.shape.h
        if backend == "MATH" and scores > MATH_BYTES:
            peers.append(Peer(name, "eager", None, f"its scores alone need {scores / 1e9:.0f} GB"))
            continue
        figure = earlier[place][both] if earlier and place < len(earlier) else None
        peers.append(measured_peer(name, "eager", _torch_measure(case, scope, both, backend), figure))
        timing.free()
    return tuple(peers)


def _peer_name(backend: str) -> str:
    return f"torch SDPA {backend.removesuffix('_ATTENTION')}"


def _torch_measure(case: Case, scope: int, both: bool, backend: str) -> Callable[[], float]:
    return lambda: _time(_torch_call_of(case, scope, both, backend))


def _torch_call_of(case: Case, scope: int, both: bool, backend: str) -> timing.Call:
    """A call of a torch backend, on ready-made windows."""
    call = _torch_call([_windows(x, scope) for x in (case.q, case.k, case.v, case.dout)], both)

    def alone() -> Any:
        with _only(backend):
            return call()

    return alone


def _only(backend: str) -> Any:
    """A context in which torch uses this backend or raises."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))


def _torch_call(windows: Sequence[Any], both: bool, scale: float | None = None) -> timing.Call:
    """A call of torch's attention that returns out, or the gradients of q, k and v."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v, dout = windows
    if not both:
        return lambda: attend(q, k, v, scale=scale)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*inputs, scale=scale), inputs, dout)


def _windows(x: Any, scope: int, chosen: Sequence[int] | None = None) -> Any:
    """Rows [num_slots, H, ...] as a contiguous torch tensor [windows, H, scope, ...], of the chosen windows."""
    rows = data.to_torch(x)
    rows = rows.view(-1, scope, *rows.shape[1:])
    return (rows if chosen is None else rows[list(chosen)]).transpose(1, 2).contiguous()


# ---- float32 -------------------------------------------------------------------------------------------------------


def _single(setting: Setting) -> Iterator[Row]:
    """The same numbers in float32, compared with the only fused backend of torch that takes float32."""
    for shape in (SMALL, *SHAPES[3:]):
        case = _case(setting, shape, 4096)
        case = case._replace(q=_as_float(case.q), k=_as_float(case.k), v=_as_float(case.v), dout=_as_float(case.dout))
        for both in (False, True):
            measure = _torch_measure(case, 4096, both, "EFFICIENT_ATTENTION")
            ours = _time(case.both if both else case.forward)
            peer = measured_peer(_peer_name("EFFICIENT_ATTENTION"), "eager", measure)
            note = f"{peer.value / ours:.2f} x as fast as the peer" if peer.value else ""
            yield Row(f"float32, {_name(shape, 4096, both)}", "eager", "ms", ours, peers=(peer,), note=note)


def _as_float(x: Any) -> Any:
    """bfloat16 as float32: the upper 16 bits are the same, the lower ones 0."""
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# ---- other scopes, ragged batches ----------------------------------------------------------------------------------


def _tables(setting: Setting) -> Iterator[Row]:
    """Shifted and strided scopes compared with plain ones, on the same arrays, in turns."""
    options: dict[str, dict[str, int]] = {"plain": {}, "shift=3": {"shift": 3}, "stride=2": {"stride": 2}}
    for shape in (SMALL, WIDE):
        case = _case(setting, shape, 4096)
        cases = {
            name: case._replace(scopes=gpu3d.scopes(case.buckets, 4096 // BUCKET_SIZE, **given))
            for name, given in options.items()
        }
        for both in (False, True):
            calls = {name: case.both if both else case.forward for name, case in cases.items()}
            times = dict(zip(calls, _in_turns(list(calls.values())), strict=True))
            plain = times.pop("plain")
            for name, ours in times.items():
                yield Row(
                    f"{name}, D {shape.d}, scope 4096: {DIRECTIONS[both]}",
                    "eager",
                    "ms",
                    ours,
                    TABLE_MUST * plain,
                    plain,
                    note=f"{ours / plain:.3f} x the plain scope ({number(plain)} ms); target: {TABLE_MUST} x",
                )


def _ragged(setting: Setting) -> Iterator[Row]:
    """Time per token of four real sweeps, compared with the timed sweep, whose scopes are all full."""
    import cupy

    sweeps = data.four_sweeps(setting.folder)
    if not sweeps:
        yield Row("ragged batch", "eager", "ns", None, note="skipped: no real scans (--data names their folder)")
        return
    lengths = [len(points) for points in sweeps.values()]
    points = cupy.asarray(np.concatenate([points.astype(np.float32) for points in sweeps.values()]))
    buckets = gpu3d.bucketize(points, BUCKET_SIZE, lengths=lengths)
    scope, tokens = 4096, sum(lengths)
    pairs = sum(n // scope * scope**2 + (n % scope) ** 2 for n in lengths)
    for shape in (SMALL, WIDE):
        ragged, dense = _case_of(buckets, shape, scope), _case(setting, shape, scope)
        for both in (False, True):
            ours, full = _in_turns([case.both if both else case.forward for case in (ragged, dense)])
            pair = 1e9 * ours / (pairs * shape.h), 1e9 * full / (SIZE * scope * shape.h)
            yield Row(
                f"ragged, D {shape.d}, scope {scope}: {DIRECTIONS[both]}",
                "eager",
                "ns",
                1e6 * ours / tokens,
                RAGGED_MUST * 1e6 * full / SIZE,
                note=f"per token; {tokens:,} tokens in {len(lengths)} clouds ({', '.join(f'{n:,}' for n in lengths)}: "
                f"{', '.join(sweeps)}); dense: {number(1e6 * full / SIZE)} ns, target: {RAGGED_MUST} x; "
                f"per score {pair[0]:.4f} ps, dense {pair[1]:.4f} ps: {pair[0] / pair[1]:.3f} x",
            )


def _lengths(setting: Setting) -> Iterator[Row]:
    """Time a pair of query and key in clouds of many lengths, compared with the best of them."""
    import cupy

    shape, times = SHAPES[3], []
    for n in LENGTHS:
        buckets = gpu3d.bucketize(cupy.asarray(data.sweep_cloud(n, setting.folder)), BUCKET_SIZE)
        case = _case_of(buckets, shape, 4096)
        out, lse = case.forward(return_lse=True)
        counts = (case.scopes.table.get() >= 0).sum(1) * BUCKET_SIZE
        calls = [case.forward, lambda case=case, out=out, lse=lse: case.backward(out, lse)]
        pairs = (counts.astype(float) ** 2).sum()
        times.append([1e9 * timing.graph_time(call, calls=3, repeats=5) / pairs for call in calls])
    for both, direction in enumerate(("forward", "backward")):
        found = [time[both] for time in times]
        worst, best = max(found), min(found)
        name = f"time a pair, D {shape.d}, {len(LENGTHS)} lengths from {LENGTHS[0]:,} to {LENGTHS[-1]:,}: {direction}"
        slow = LENGTHS[found.index(worst)]
        note = f"the worst ({slow:,} points) over the best; median {np.median(found) / best:.2f}"
        yield Row(name, "graph", "x", worst / best, LENGTHS_MUST[both], 1.1, note=note)


# ---- host time and memory ------------------------------------------------------------------------------------------


def _host(setting: Setting) -> Iterator[Row]:
    case = _case(setting, SMALL, 1024)
    out, lse = case.forward(return_lse=True)
    for what, call, must in (
        ("forward", case.forward, FORWARD_HOST_MUST),
        ("backward", lambda: case.backward(out, lse), BACKWARD_HOST_MUST),
    ):
        yield Row(f"the Python call, {what}", "host", "us", 1e3 * timing.host_time(call), must)


def _memory(setting: Setting) -> Iterator[Row]:
    """Memory besides inputs and results: the backward's delta, float32 [num_slots, H], and counters.

    From D = 64 on also a float32 dq. COUNTERS are allowed for counters and gaps.
    """
    for shape in (SMALL, WIDE, SHAPES[5]):
        case = _case(setting, shape, 4096)
        out, lse = case.forward(return_lse=True)
        large = shape.d >= 64
        allowed = 4 * case.buckets.num_slots * shape.h + large * 4 * case.q.size + COUNTERS
        for what, call, must in (
            ("forward", case.forward, large * COUNTERS),
            ("forward with lse", lambda case=case: case.forward(return_lse=True), large * COUNTERS),
            ("backward", lambda case=case, out=out, lse=lse: case.backward(out, lse), allowed),
        ):
            yield Row(
                f"extra memory, D {shape.d}, scope 4096: {what}", "check", "MB", _extra_bytes(call) / 1e6, must / 1e6
            )


def _extra_bytes(call: timing.Call) -> int:
    """Peak bytes of CuPy's pool during a call, without its results."""
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    return timing.peak_bytes(call) - sum(-(-x.nbytes // 512) * 512 for x in results)  # the pool's granularity


# ---- error and determinism -----------------------------------------------------------------------------------------

RESULTS = ("out", "lse", "dq", "dk", "dv")


def _errors(setting: Setting) -> Iterator[Row]:
    """Errors of the first and the last window against float64; target: ERROR_MUST times that of naive attention."""
    cases = [(shape, 1) for shape in (SMALL, SHAPES[3], WIDE, SHAPES[5])] + [(SMALL, 8), (WIDE, 8)]
    why_not = _why_no_torch()
    if why_not:
        yield Row("error of out, lse, dq, dk and dv", "check", "1e-3", None, note=f"skipped: {why_not}")
        return
    for shape, std in cases:
        what = f"error of {{}}, D {shape.d}" + (f", logits of std {std}" if std > 1 else "")
        yield from _errors_of(_case(setting, shape, 4096), std, what)


def _why_no_torch() -> str:
    try:
        import torch
    except ImportError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "this torch has no CUDA device"


def _errors_of(case: Case, std: int, what: str) -> Iterator[Row]:
    scale = std * case.shape.d**-0.5
    case = case._replace(scale=scale)
    out, lse = case.forward(return_lse=True)
    ours = dict(zip(RESULTS, (out, lse, *case.backward(out, lse)), strict=True))
    chosen = 0, SIZE // 4096 - 1
    windows = [_windows(x, 4096, chosen) for x in (case.q, case.k, case.v, case.dout)]
    exact = _attention(*(x.double() for x in windows), scale)
    naive = _attention(*windows, scale)
    cudnn, why_not = _cudnn_results(windows, scale)
    for name in RESULTS:
        unit, factor = ("1e-6", 1e6) if name == "lse" else ("1e-3", 1e3)  # lse is float32, the others bfloat16
        naive_error = factor * _error(naive[name], exact[name])
        theirs = factor * _error(cudnn[name], exact[name]) if name in cudnn else None
        yield Row(
            what.format(name),
            "check",
            unit,
            factor * _error(_windows(ours[name], 4096, chosen), exact[name]),
            ERROR_MUST * naive_error,
            peers=(
                Peer("naive attention in bfloat16", "check", naive_error),
                Peer("torch SDPA CUDNN", "check", theirs, why_not),
            ),
        )


def _cudnn_results(windows: Sequence[Any], scale: float) -> tuple[dict[str, Any], str]:
    """The results of cuDNN without lse, and the reason if one is missing."""
    try:
        with _only("CUDNN_ATTENTION"):
            results = _torch_call(windows, False, scale)(), *_torch_call(windows, True, scale)()
    except Exception as error:  # no error of a peer may end the run
        return {}, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return dict(zip(("out", "dq", "dk", "dv"), results, strict=True)), "gives no lse"


def _error(values: Any, exact: Any) -> float:
    """Root mean square of the error, divided by the root mean square of the exact values."""
    return float((values.double() - exact).norm() / exact.norm())


def _attention(q: Any, k: Any, v: Any, dout: Any, scale: float) -> dict[str, Any]:
    """Attention by its definition, in the dtype of the arguments [windows, H, scope, D]."""
    scores = scale * (q @ k.mT)
    weights = scores.softmax(-1)
    lse = scores.logsumexp(-1)
    del scores
    dweights = dout @ v.mT
    dscores = scale * weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    return {"out": weights @ v, "lse": lse, "dq": dscores @ k, "dk": dscores.mT @ q, "dv": weights.mT @ dout}


def _determinism(setting: Setting) -> Iterator[Row]:
    for shape in (SMALL, WIDE):
        case = _case(setting, shape, 4096)

        def ours(case: Case = case) -> list[Any]:
            out, lse = case.forward(return_lse=True)
            bits = [x.view(np.int16) for x in (out, *case.backward(out, lse))]
            return [*bits, lse.view(np.int32)]

        def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
            return all(bool((x == y).all()) for x, y in zip(a, b, strict=True))

        peers = []
        for backend in BACKENDS[:3]:

            def measure(case: Case = case, backend: str = backend) -> float:
                with _only(backend):
                    windows = [_windows(x, 4096) for x in (case.q, case.k, case.v, case.dout)]
                    return _differing(_torch_call(windows, True), same)

            peers.append(measured_peer(f"torch SDPA {backend.removesuffix('_ATTENTION')}", "check", measure))
        yield Row(
            f"runs of {RUNS} that differ: {shape}",
            "check",
            "runs",
            _differing(ours, same),
            0,
            peers=tuple(peers),
            note="ours: out, lse, dq, dk and dv; peers: dq, dk and dv",
        )


def _differing(call: timing.Call, same: Callable[[Any, Any], bool]) -> int:
    first = call()
    return sum(not same(first, call()) for _ in range(RUNS))
