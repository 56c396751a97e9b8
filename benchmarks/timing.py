# SPDX-License-Identifier: Apache-2.0
"""How time is taken. Every function returns milliseconds, the median of its repeats.

- graph: `calls` calls captured in one CUDA graph, replayed between two device events, divided by `calls`. No launch
  gaps: what the device needs. The calls read the same inputs, so inputs under 50 MB stay in an H100's L2.
- eager: one call between two device events, launch gaps included.
- stream: one of many calls that were launched before the device came to them: launch gaps, and no waiting for the host.
- host: the Python call alone, on an idle device and without waiting for it.
- CPU: the whole call on the host.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Call = Callable[[], Any]

CALLS, SLOW_MS, ONCE_MS = 10, 10.0, 100.0  # of `call_time`
SPIN_HZ = 2e9  # of `stream_time`: about a GPU's clock
WARM_SECONDS = 0.02  # of replays before the first that counts: clocks are up, caches are warm


def why_no_gpu() -> str | None:
    """None where CuPy can use a GPU, else what is missing."""
    try:
        import cupy
    except ImportError as error:
        return f'CuPy cannot be imported ({error}); pip install "gpu3d[cuda13]" (or "gpu3d[cuda12]")'
    try:
        cupy.zeros(1)
    except Exception as error:  # of many kinds, and each means the same here
        return f"CuPy {cupy.__version__} finds no GPU that it can use ({error})"
    return None


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


@functools.cache
def _stream() -> Any:
    """One stream for all: CuPy's pool keeps free memory for each stream apart."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


def graph_time(call: Call, calls: int = 20, repeats: int = 30, *, keep: bool = True) -> float:
    """Time of one CuPy `call` in a graph of `calls`.

    The results of all calls stay alive, so each writes to memory of its own. keep=False drops each result at once: then
    the calls share one output, which CuPy's pool hands on, and small outputs stay in L2 too.
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
    """The same of a torch `call`."""
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

    Of one call, the host's time until its launch counts; of several in a row, the device is busy meanwhile.
    """
    import cupy

    for _ in range(2):
        call()
    cupy.cuda.Device().synchronize()
    return statistics.median(_between_events(call, calls) for _ in range(repeats)) / calls


def call_time(call: Call) -> float:
    """Eager, of 10 calls in a row: the device need not wait for the host. A call of over 10 ms by itself, of 100 once.

    Events of CuPy's current stream time torch too: both run on the default stream.
    """
    once = eager_time(call, 1)
    if once > ONCE_MS:
        return once
    return eager_time(call, calls=CALLS if once < SLOW_MS else 1)


def _between_events(call: Call, calls: int = 1) -> float:
    """Device time of what `calls` calls enqueue on the current stream."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    if calls > 1:
        call()  # keeps the device busy until the first that counts is there
    start.record()
    for _ in range(calls):
        result = call()
        del result
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end)


def stream_time(call: Call, calls: int = 50, repeats: int = 10) -> float:
    """Time of one CuPy `call` of many on the current stream, which waits behind a kernel until all are launched."""
    import cupy

    code = 'extern "C" __global__ void spin(long long n) { for (long long t = clock64(); clock64() - t < n;) {} }'
    spin, start, end = cupy.RawKernel(code, "spin"), cupy.cuda.Event(), cupy.cuda.Event()
    cycles = int(SPIN_HZ * 2 * calls * host_time(call, seconds=0) / 1e3)
    times = []
    for _ in range(repeats):
        cupy.cuda.Device().synchronize()
        spin((1,), (1,), (cycles,))
        start.record()
        for _ in range(calls):
            result = call()
            del result
        assert not start.done, "the device came to the calls before they were launched"
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times) / calls


def host_time(call: Call, calls: int = 300, seconds: float = 4) -> float:
    """Host time of the Python call alone, the device idle: the least of so many, and of all in so many seconds.

    What else the host does, for others, only ever adds, and for seconds: the least of 300 was 47 to 91 us of one call.
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
    """The most bytes of CuPy's pool that a call holds at a time, its results among them."""
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

    call()  # kernels are loaded, constants uploaded
    used = Used()
    with used:
        call()
    return used.peak


def free() -> None:
    """Gives the memory of CuPy's pool and torch's back: they do not share it."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


# ---- what the device can do ----------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """Measured on the device at hand: the floors of a table are computed from them."""

    copy_tb_s: float  # bytes read plus bytes written
    graph_node_us: float  # a kernel of one thread, as one node of a graph


def ceilings() -> Ceilings:
    """Copy bandwidth over 512 MB, which no L2 holds, and the time of a near-empty kernel in a graph."""
    import cupy

    size = 512_000_000
    source, target = cupy.zeros(size, cupy.uint8), cupy.zeros(size, cupy.uint8)
    copy = graph_time(lambda: target.data.copy_from_device_async(source.data, size), calls=5)
    near_empty = cupy.RawKernel('extern "C" __global__ void near_empty(int* out) { *out = 1; }', "near_empty")
    out = cupy.zeros(1, cupy.int32)
    node = graph_time(lambda: near_empty((1,), (1,), (out,)), calls=200)
    return Ceilings(2 * size / copy / 1e9, 1e3 * node)
