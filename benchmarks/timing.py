# SPDX-License-Identifier: Apache-2.0
"""How times are measured. Every function returns milliseconds, the median of its repeats unless it says otherwise.

- graph: device time. `calls` calls are captured in one CUDA graph, and the time of a replay between two device events
  is divided by `calls`. There are no gaps between launches. The calls read the same inputs, so inputs under 50 MB stay
  in the L2 cache of an H100.
- eager: one call between two device events, with the gaps between launches.
- host: the Python call alone, on an idle device, without waiting for the result.
- CPU: a call that runs on the host.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Call = Callable[[], Any]

CALLS, SLOW_MS, ONCE_MS = 10, 10.0, 100.0  # for `call_time`
BETWEEN_WAITS = 20  # `host_times` waits for the GPU after this many calls
WARM_SECONDS = 0.02  # replays before the first that counts, to raise the clocks and warm the caches


def why_no_gpu() -> str | None:
    """None if CuPy can use a GPU, otherwise what is missing."""
    try:
        import cupy
    except ImportError as error:
        return f'CuPy cannot be imported ({error}); pip install "gpu3d[cuda13]" (or "gpu3d[cuda12]")'
    try:
        cupy.zeros(1)
    except Exception as error:  # errors of many kinds mean the same here
        return f"CuPy {cupy.__version__} finds no GPU that it can use ({error})"
    return None


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


@functools.cache
def _stream() -> Any:
    """One stream for all measurements, because CuPy's pool keeps free memory per stream."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def graph_time(call: Call, calls: int = 20, repeats: int = 30, *, keep: bool = True) -> float:
    """Time of one CuPy `call` in a graph of `calls` calls.

    The results of all calls stay alive, so each call writes to memory of its own. With keep=False each result is
    dropped at once. Then all calls write to the same memory, and small outputs stay in L2 too.
    """
    import cupy

    times = _graph_times(call, calls, repeats, keep)
    cupy.get_default_memory_pool().free_all_blocks()
    return statistics.median(times) / calls


def _graph_times(call: Call, calls: int, repeats: int, keep: bool) -> list[float]:
    import cupy

    stream = _stream()
    cupy.cuda.Device().synchronize()  # inputs may come from another stream
    with stream:
        for _ in range(2):
            call()
        stream.synchronize()
        results = []
        stream.begin_capture()
        for _ in range(calls):
            result = call()
            if keep:
                results.append(result)
            del result
        graph = stream.end_capture()
        _warm(graph.launch, stream.synchronize)
        return [_between_events(graph.launch) for _ in range(repeats)]


def torch_graph_time(call: Call, calls: int = 20, repeats: int = 30, *, keep: bool = True) -> float:
    """The same for a torch `call`."""
    import torch

    times = _torch_graph_times(call, calls, repeats, keep)
    torch.cuda.empty_cache()
    return statistics.median(times) / calls


def _torch_graph_times(call: Call, calls: int, repeats: int, keep: bool) -> list[float]:
    import torch

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    results, times = [], []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            result = call()
            if keep:
                results.append(result)
            del result
    with torch.cuda.stream(stream):
        _warm(graph.replay, stream.synchronize)
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
    return times


def _warm(replay: Call, synchronize: Call) -> None:
    begin = time.perf_counter()
    for _ in range(3):
        replay()
        synchronize()
    while time.perf_counter() - begin < WARM_SECONDS:
        replay()
        synchronize()


# ---- the other clocks ----------------------------------------------------------------------------------------------


def eager_time(call: Call, repeats: int = 30, calls: int = 1) -> float:
    """Time of one CuPy `call` between two device events on the current stream.

    With calls=1 the host's time until the launch is part of it. With several calls in a row it is not, as long as the
    device is busy with the call before.
    """
    import cupy

    for _ in range(2):
        call()
    cupy.cuda.Device().synchronize()
    return statistics.median(_between_events(call, calls) for _ in range(repeats)) / calls


def call_time(call: Call) -> float:
    """Eager time of 10 calls in a row, so that the device does not wait for the host.

    A call of more than 10 ms is timed by itself, and a call of more than 100 ms only once. Events of CuPy's current
    stream time torch too, because both run on the default stream.
    """
    once = eager_time(call, 1)
    if once > ONCE_MS:
        return once
    return eager_time(call, calls=CALLS if once < SLOW_MS else 1)


def _between_events(call: Call, calls: int = 1) -> float:
    """Device time between events around `calls` calls on the current stream."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    if calls > 1:
        call()  # keeps the device busy until the first timed call is launched
    start.record()
    for _ in range(calls):
        result = call()
        del result
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end)


def host_time(call: Call, calls: int = 300, seconds: float = 4) -> float:
    """Host time of the Python call alone, on an idle device: the least of `calls` calls, and of `seconds` of calls.

    Other work on the host only makes a call slower, and may do so for seconds. The least of 300 calls alone varied from
    47 to 91 us for one and the same call.
    """
    import cupy

    device, times, end = cupy.cuda.Device(), [], time.perf_counter() + seconds
    while len(times) < 20 + calls or time.perf_counter() < end:
        device.synchronize()
        begin = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begin)
        del result
    return 1e3 * min(times[20:])


def host_times(calls: Iterable[Call]) -> list[float]:
    """Host time of each Python call alone. Its result is dropped after the clock has stopped.

    The host waits for the GPU before every 20th call, so the queue of launches never fills.
    """
    import cupy

    device, times = cupy.cuda.Device(), []
    for i, call in enumerate(calls):
        if i % BETWEEN_WAITS == 0:
            device.synchronize()
        begin = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - begin))
        del result
    device.synchronize()
    return times


def cpu_time(call: Call, repeats: int = 20) -> float:
    """Time of one call that runs on the host."""
    times = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[2:])


# ---- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(call: Call) -> int:
    """Peak bytes of CuPy's pool during a call, results included."""
    import cupy

    class Used(cupy.cuda.MemoryHook):
        name = "used bytes"

        def __init__(self) -> None:
            self.now = self.peak = 0

        def malloc_postprocess(self, **event: int) -> None:
            self.now += event["mem_size"]
            self.peak = max(self.peak, self.now)

        def free_postprocess(self, **event: int) -> None:
            self.now -= event["mem_size"]

    call()  # loads kernels and uploads constants
    used = Used()
    with used:
        call()
    return used.peak


def free() -> None:
    """Return the free memory of CuPy's pool and of torch to the device, because they do not share it."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# ---- what the device can do ----------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What this device can do, measured. The floors of a table are computed from it."""

    copy_tb_s: float  # bytes read plus bytes written
    graph_node_us: float  # a kernel of one thread as a node of a graph


def ceilings() -> Ceilings:
    """Copy bandwidth over 512 MB, more than any L2 cache, and the time of a near-empty kernel in a graph."""
    import cupy

    size = 512_000_000
    source, target = cupy.zeros(size, cupy.uint8), cupy.zeros(size, cupy.uint8)
    copy = graph_time(lambda: target.data.copy_from_device_async(source.data, size), calls=5)
    near_empty = cupy.RawKernel('extern "C" __global__ void near_empty(int* out) { *out = 1; }', "near_empty")
    out = cupy.zeros(1, cupy.int32)
    node = graph_time(lambda: near_empty((1,), (1,), (out,)), calls=200)
    return Ceilings(2 * size / copy / 1e9, 1e3 * node)
