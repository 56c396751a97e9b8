# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop: what torch and JAX cost beyond the plain call, in host time, device time, memory and import time.

Inputs are small, so that the GPU is faster than the host: 4096 points of a real sweep in buckets of 512, scopes of 2
buckets, 4 heads of D = 16 and 64 channels, bfloat16; Chamfer and APML with 1024 points in each cloud, APML with
max_entries, so that it does not wait for the GPU. "forward+backward" is torch.autograd.grad of a forward. The plain
call to compare with is the forward followed by the backward, or the loss together with its gradients.

- torch over plain: the median host time of the torch function minus that of the plain call with CuPy arrays. The calls
  take turns, 20 at a time, and the host waits for the GPU in between. A row that names no number of clouds has one. The
  peers show what torch itself costs: an autograd.Function that does nothing, and torch.addcmul, both with three tensors
  like attention. Their figures are times of whole calls.
- JAX under jit: XLA may run a call in a thread of its own. So 50 calls in a row and the wait for the last one are
  timed, and the time is divided by 50. The figure is the median of many such rounds, minus that of a jitted function
  that doubles one of the same arrays. "recorded" is the same function, compiled with the option that puts even a single
  call into a command buffer. The Chamfer distance has 16 points here: with more, the GPU takes longer than the host.
- torch in a graph: the torch function captured in a CUDA graph, compared with the plain call in a CUDA graph. Both
  allocate from torch, because the address of APML's workspace changes its time by up to 5 % (H200, 2026-11). They take
  turns, and the least time of each counts. The backward of APML multiplies its gradients by the gradient of the loss,
  which the plain call does not do. So its target allows for one more near-empty kernel.
- torch.compile: attention inside torch.compile, captured and compared in the same way.
- import: the median of several new processes. Python's garbage collector runs before the clock starts. `import torch`
  leaves a collection due that takes longer than our import, and would otherwise run during it.
- memory: what torch's allocator and CuPy's pool hold after 1,000 training steps, compared with after 10 steps.
- two GPUs: see `parallel`. Each of the two has a batch as large as that of the single GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

import gpu3d
from benchmarks import data, timing
from benchmarks.table import Peer, Row, Setting, number

BUCKET_SIZE, SCOPE = 512, 2
HEADS, DIM, CHANNELS = 4, 16, 64
ENTRIES_A_POINT = 16  # for APML's max_entries
DIRECTIONS = ("forward", "forward+backward")  # indexed by `both`


class Size(NamedTuple):
    """Points in each cloud."""

    points: int  # for bucketize and the ops over buckets
    loss: int  # for Chamfer and APML


SIZES = {1: Size(4096, 1024), 2: Size(2048, 1024), 64: Size(512, 64)}  # by the number of clouds
JAX_LOSS_SIZE = 16
JAX_OPS = ("attention", "pool", "chamfer")

IN_TURN, TURNS, WARM_TURNS = 20, 50, 3  # torch over plain: calls in a turn, and turns
IN_A_ROW, ROUNDS = 50, 100  # JAX
RECORDED = {"xla_gpu_graph_min_graph_size": 1}  # an option of XLA's compiler
GRAPHS = 3  # graphs of each call
IMPORTS = 5
STEPS = 10, 1000

# Targets and stretch targets.
TORCH = {False: (25, 15), True: (120, 90)}  # us over the plain call, by `both`; up to two clouds
TORCH_MANY = {False: (60, None), True: (160, None)}  # 64 clouds
JAX = {"attention": (20, 18), "pool": (22, 20), "chamfer": (30, 27)}  # us over a jitted doubling
JAX_RECORDED = (8, 4)
GRAPH = (1.02, 1.01)  # times the plain call
IMPORT_GPU3D, IMPORT_TORCH = 250, 50  # ms
SPEEDUP_MUST = 1.9  # of two GPUs
GRADIENT_MUST = 1e-4  # relative: float32 sums in another order
SECONDS = 100  # time limit of a run of `parallel`, which takes about 20 if its kernels are compiled

ROOT = Path(__file__).resolve().parent.parent


def run(setting: Setting) -> Iterator[Row]:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # otherwise JAX takes three quarters of the GPU's memory
    for part in (_torch_host, _graphs, _compiled, _import, _memory, _jax_host, _ddp, _shards):
        yield from part(setting)
        timing.free()
    _inputs.cache_clear()


def _why_no_torch() -> str:
    try:
        import torch
    except ImportError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "this torch has no CUDA device"


def _why_no_jax() -> str:
    try:
        import jax
    except ImportError as error:
        return str(error)
    return "" if jax.default_backend() == "gpu" else "this JAX has no CUDA device"


# ---- the calls -----------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The arrays that the calls take, of one library."""

    points: Any  # [N, 3]
    slots: Any  # the points in slot order, [num_slots, 3]
    q: Any  # [num_slots, H, D]; k, v and dout have the same shape
    k: Any
    v: Any
    dout: Any
    features: Any  # [num_slots, C]
    dchild: Any  # [child slots, C]
    x: Any  # x and y are the clouds of the losses
    y: Any


@functools.cache
def _inputs(folder: Path | None, clouds: int = 1) -> Inputs:
    """The inputs as CuPy arrays."""
    import cupy

    size = SIZES[clouds]
    points = data.sweep_cloud(clouds * size.points, folder)
    slots = gpu3d.bucketize(points, BUCKET_SIZE, lengths=_lengths(clouds, size.points)).scatter(points)
    children = clouds * -(-size.points // 2 // BUCKET_SIZE) * BUCKET_SIZE  # with the default ratio, 2
    rng = np.random.default_rng(0)
    shapes = *[(len(slots), HEADS, DIM)] * 4, (len(slots), CHANNELS), (children, CHANNELS)
    rows = [rng.standard_normal(shape, np.float32).astype(bfloat16) for shape in shapes]
    return Inputs(*map(cupy.asarray, (points, slots, *rows, *data.pair("shell", size.loss, clouds))))


def _lengths(clouds: int, points: int) -> list[int] | None:
    return None if clouds == 1 else [points] * clouds


class Function(NamedTuple):
    """A function, its arguments, and the gradient of its result (None for a loss, whose gradient is 1)."""

    call: Callable[..., Any]
    at: tuple[Any, ...]
    gradient: Any


def _functions(library: Any, inputs: Inputs, clouds: int = 1) -> dict[str, Function]:
    """The four ops that are timed, from gpu3d, gpu3d.interop.torch or gpu3d.interop.jax."""
    buckets = library.bucketize(inputs.points, BUCKET_SIZE, lengths=_lengths(clouds, len(inputs.points) // clouds))
    scopes = library.scopes(buckets, SCOPE)
    lengths = _lengths(clouds, len(inputs.x) // clouds)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return library.bucket_attention(q, k, v, buckets, scopes)

    def pool(features: Any) -> Any:
        return library.bucket_pool(features, inputs.slots, buckets).features

    def chamfer(x: Any, y: Any) -> Any:
        return library.chamfer(x, y, x_lengths=lengths, y_lengths=lengths)

    def apml(x: Any, y: Any) -> Any:
        return library.apml(x, y, pred_lengths=lengths, target_lengths=lengths, max_entries=_max_entries(inputs))

    losses = inputs.x, inputs.y
    return {
        "attention": Function(attention, (inputs.q, inputs.k, inputs.v), inputs.dout),
        "pool": Function(pool, (inputs.features,), inputs.dchild),
        "chamfer": Function(chamfer, losses, None),
        "apml": Function(apml, losses, None),
    }


def _max_entries(inputs: Inputs) -> int:
    return ENTRIES_A_POINT * (len(inputs.x) + len(inputs.y))


def _plain_calls(inputs: Inputs, clouds: int = 1) -> dict[tuple[str, bool], timing.Call]:
    """Calls without a framework, indexed by name and `both`."""
    buckets = gpu3d.bucketize(inputs.points, BUCKET_SIZE, lengths=_lengths(clouds, len(inputs.points) // clouds))
    scopes = gpu3d.scopes(buckets, SCOPE)
    q, k, v = inputs.q, inputs.k, inputs.v
    losses, lengths = (inputs.x, inputs.y), _lengths(clouds, len(inputs.x) // clouds)

    def attention() -> Any:
        out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
        return out, gpu3d.bucket_attention_backward(inputs.dout, q, k, v, out, lse, buckets, scopes)

    def pool() -> Any:
        pooled = gpu3d.bucket_pool(inputs.features, inputs.slots, buckets)
        return pooled, gpu3d.bucket_pool_backward(inputs.dchild, pooled)

    def chamfer() -> Any:
        return gpu3d.chamfer_value_and_grad(*losses, x_lengths=lengths, y_lengths=lengths)

    def apml() -> Any:
        options = {"pred_lengths": lengths, "target_lengths": lengths, "max_entries": _max_entries(inputs)}
        return gpu3d.apml_value_and_grad(*losses, **options)

    functions = _functions(gpu3d, inputs, clouds)
    calls = {(name, False): functools.partial(function.call, *function.at) for name, function in functions.items()}
    both = {"attention": attention, "pool": pool, "chamfer": chamfer, "apml": apml}
    return calls | {(name, True): call for name, call in both.items()}


def _torch_functions(inputs: Inputs, clouds: int = 1) -> dict[str, Function]:
    from gpu3d.interop import torch as library

    return _functions(library, Inputs(*map(data.to_torch, inputs)), clouds)


def _torch_call(function: Function, both: bool, *, leaves_inside: bool = False) -> timing.Call:
    """A call of the forward without gradients, or of forward and backward.

    With `leaves_inside` the tensors that require grad are made inside the call. A CUDA graph needs that, because
    autograd would wait for the stream on which tensors from outside were made.
    """
    import torch

    if not both:
        return functools.partial(function.call, *function.at)
    gradient = function.gradient
    if gradient is None:  # made here, because torch would fill a tensor with ones in every call
        gradient = torch.ones((), device=function.at[0].device)

    def leaves() -> list[Any]:
        return [x.detach().requires_grad_() for x in function.at]

    outside = leaves()

    def forward_and_backward() -> Any:
        at = leaves() if leaves_inside else outside
        return torch.autograd.grad(function.call(*at), at, gradient)

    return forward_and_backward


# ---- host time -----------------------------------------------------------------------------------------------------


def _torch_host(setting: Setting) -> Iterator[Row]:
    why_not = _why_no_torch()
    if why_not:
        yield Row("torch over plain", "host", "us", None, *TORCH[False], note=f"skipped: {why_not}")
        return
    for clouds in SIZES:
        inputs = _inputs(setting.folder, clouds)
        plain = _plain_calls(inputs, clouds)
        for name, function in _torch_functions(inputs, clouds).items():
            peers = _peers_of_attention(inputs) if (name, clouds) == ("attention", 1) else {}
            for both in (False, True):
                ours = _torch_call(function, both)
                calls = {"plain": plain[name, both], "torch": ours}
                if both:
                    calls["calling thread"] = functools.partial(_on_the_calling_thread, ours)
                times = _in_turns({**calls, **{peer: _torch_call(what, both) for peer, what in peers.items()}})
                note = f"{number(times['torch'])} us, the plain call {number(times['plain'])} us"
                if both:
                    note += f", with the backward on the calling thread {number(times['calling thread'])} us"
                yield Row(
                    f"torch over plain, {name}: {DIRECTIONS[both]}" + (f", {clouds} clouds" if clouds > 1 else ""),
                    "host",
                    "us",
                    times["torch"] - times["plain"],
                    *(TORCH if clouds <= 2 else TORCH_MANY)[both],
                    peers=tuple([Peer(peer, "host", times[peer]) for peer in peers]),
                    note=note,
                )


def _on_the_calling_thread(call: timing.Call) -> None:
    """torch runs a backward on a thread of the GPU's own, unless it is told not to."""
    import torch

    with torch.autograd.set_multithreading_enabled(False):
        call()


def _in_turns(calls: dict[str, timing.Call]) -> dict[str, float]:
    """The median time of each call in microseconds."""
    times: dict[str, list[float]] = {which: [] for which in calls}
    for turn in range(WARM_TURNS + TURNS):
        for which, call in calls.items():
            taken = timing.host_times(itertools.repeat(call, IN_TURN))
            if turn >= WARM_TURNS:
                times[which] += taken
    return {which: 1e3 * statistics.median(taken) for which, taken in times.items()}


def _peers_of_attention(inputs: Inputs) -> dict[str, Function]:
    import torch

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            return q.new_empty(q.shape)

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return dout, dout, dout

    at, gradient = tuple(map(data.to_torch, (inputs.q, inputs.k, inputs.v))), data.to_torch(inputs.dout)
    return {
        "an autograd.Function that does nothing": Function(Nothing.apply, at, gradient),
        "torch.addcmul": Function(torch.addcmul, at, gradient),
    }


def _jax_host(setting: Setting) -> Iterator[Row]:
    why_not = _why_no_jax()
    if why_not:
        yield Row("JAX under jit", "host", "us", None, note=f"skipped: {why_not}")
        return
    import cupy
    import jax

    from gpu3d.interop import jax as library

    inputs = _inputs(setting.folder)
    inputs = inputs._replace(x=inputs.x[:JAX_LOSS_SIZE], y=inputs.y[:JAX_LOSS_SIZE])
    plain = _plain_calls(inputs)
    functions = _functions(library, Inputs(*(jax.device_put(x.get()) for x in inputs)))
    double = jax.jit(lambda x, *others: 2 * x)
    for name in JAX_OPS:
        function, plain_call = functions[name], plain[name, False]
        calls = {
            "plain": (plain_call, lambda _: cupy.cuda.Device().synchronize()),
            "double": (functools.partial(double, *function.at), jax.block_until_ready),
            **{
                how: (
                    functools.partial(jax.jit(function.call, compiler_options=compiler), *function.at),
                    jax.block_until_ready,
                )
                for how, compiler in (("", {}), (", recorded", RECORDED))
            },
        }
        times: dict[str, list[float]] = {which: [] for which in calls}
        for turn in range(ROUNDS):
            for which in sorted(calls, reverse=turn % 2 == 1):
                times[which].append(_in_a_row(*calls[which]))
        medians = {which: statistics.median(taken) for which, taken in times.items()}
        on_gpu = 1e3 * timing.graph_time(plain_call)
        for how, targets in (("", JAX[name]), (", recorded", JAX_RECORDED)):
            yield Row(
                f"JAX under jit{how}, {name}: forward",
                "host",
                "us",
                medians[how] - medians["double"],
                *targets,
                peers=(
                    Peer("a jitted function that doubles an array", "host", medians["double"]),
                    Peer("the plain call", "host", medians["plain"]),
                    Peer("the plain call", "graph", on_gpu),
                ),
                note=f"{number(medians[how])} us a call" + "; the GPU is the bound" * (on_gpu > 0.9 * medians[how]),
            )


def _in_a_row(call: timing.Call, wait: Callable[[Any], Any]) -> float:
    """Microseconds per call, for several calls in a row and the wait for the last one."""
    wait(call())
    begin = time.perf_counter()
    for _ in range(IN_A_ROW):
        result = call()
    wait(result)
    return 1e6 * (time.perf_counter() - begin) / IN_A_ROW


# ---- device time ---------------------------------------------------------------------------------------------------


def _graphs(setting: Setting) -> Iterator[Row]:
    if _why_no_torch():
        return
    inputs = _inputs(setting.folder)
    plain, functions = _plain_calls(inputs), _torch_functions(inputs)
    for (name, both), plain_call in plain.items():
        call = _torch_call(functions[name], both, leaves_inside=True)
        extra = setting.ceilings.graph_node_us if (name, both) == ("apml", True) else 0.0
        yield _graph_row(f"torch in a graph, {name}: {DIRECTIONS[both]}", call, plain_call, extra)


def _graph_row(what: str, ours: timing.Call, plain: timing.Call, extra: float = 0.0) -> Row:
    """Compare two calls in graphs. `extra` microseconds are allowed for work that the plain call does not do."""
    ours_us = plain_us = np.inf
    for _ in range(GRAPHS):
        ours_us = min(ours_us, 1e3 * timing.torch_graph_time(ours))
        with _torch_memory():
            plain_us = min(plain_us, 1e3 * timing.torch_graph_time(functools.partial(_on_torch_stream, plain)))
    must, aim = (times * plain_us + extra for times in GRAPH)
    note = f"{ours_us / plain_us:.3f} x the plain call ({number(plain_us)} us); target: {GRAPH[0]} x"
    note += f" and {number(extra)} us" if extra else ""
    return Row(what, "graph, L2-warm", "us", ours_us, must, aim, note=note)


@contextlib.contextmanager
def _torch_memory() -> Iterator[None]:
    """A context in which CuPy allocates from torch."""
    import cupy

    from gpu3d.interop import torch as library

    library.use_torch_allocator()
    try:
        yield
    finally:
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


def _on_torch_stream(call: timing.Call) -> Any:
    import cupy
    import torch

    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        return call()


def _compiled(setting: Setting) -> Iterator[Row]:
    """Attention inside torch.compile. The graph captures the kernels that the compiled function launches."""
    if _why_no_torch():
        return
    import torch

    inputs = _inputs(setting.folder)
    plain, function = _plain_calls(inputs), _torch_functions(inputs)["attention"]
    function = function._replace(call=torch.compile(function.call, fullgraph=True))
    for both in (False, True):
        what = f"torch.compile, attention: {DIRECTIONS[both]}"
        try:
            yield _graph_row(what, _torch_call(function, both, leaves_inside=True), plain["attention", both])
        except Exception as error:  # torch.compile may lack what it needs, for example a compiler
            yield _failed(Row(what, "graph, L2-warm", "us", None), error)


def _failed(row: Row, error: Exception) -> Row:
    """The row as failed. Its note is the line of the message that names the error; a process prints many others."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    why = next((line for line in lines if "Error: " in line), lines[0])
    return row._replace(checks={"it ran": False}, note=why.strip()[:200])


# ---- import and memory ---------------------------------------------------------------------------------------------


def _import(setting: Setting) -> Iterator[Row]:
    yield _import_row("import gpu3d", "import gc, time", "gpu3d", IMPORT_GPU3D)
    if not _why_no_torch():
        before = "import gc, time, torch"
        yield _import_row("import gpu3d.interop.torch, after torch", before, "gpu3d.interop.torch", IMPORT_TORCH)


def _import_row(what: str, before: str, module: str, must: float) -> Row:
    clocked = f"begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
    script = f"{before}; gc.collect(); {clocked}"
    command = [sys.executable, "-c", script]
    # Python may write compiled modules here, as pip does at installation.
    times = [float(_output(command, PYTHONDONTWRITEBYTECODE="")) for _ in range(IMPORTS)]
    note = f"the median of {IMPORTS} processes; the least {number(1e3 * min(times))} ms"
    return Row(what, "CPU", "ms", 1e3 * statistics.median(times), must, note=note)


def _memory(setting: Setting) -> Iterator[Row]:
    """A training step begins with points and ends with the optimizer's step."""
    if _why_no_torch():
        return
    import cupy
    import torch

    from gpu3d.interop import torch as g

    inputs = Inputs(*map(data.to_torch, _inputs(setting.folder)))
    features = torch.randn(len(inputs.points), CHANNELS, device="cuda")
    block = g.BucketAttention(CHANNELS, HEADS).cuda()
    optimizer = torch.optim.AdamW(block.parameters(), 1e-3)

    def step() -> None:
        buckets = g.bucketize(inputs.points, BUCKET_SIZE)
        rows = block(g.scatter(features, buckets), buckets, g.scopes(buckets, SCOPE, shift=1))
        pooled = g.bucket_pool(rows, g.scatter(inputs.points, buckets), buckets)
        near = g.gather(g.bucket_unpool(pooled.features, pooled, rows), buckets)[:, :3]
        loss = pooled.features.square().mean() + g.chamfer(near, inputs.points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    timing.free()
    held = []
    for steps in (STEPS[0], STEPS[1] - STEPS[0]):
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_reserved(), cupy.get_default_memory_pool().total_bytes()))
    for what, few, many in zip(("torch's", "CuPy's"), *held, strict=True):
        yield Row(f"{what} memory after {STEPS[1]:,} steps", "check", "MB", many / 1e6, few / 1e6)


# ---- two GPUs ------------------------------------------------------------------------------------------------------


def _ddp(setting: Setting) -> Iterator[Row]:
    from benchmarks.parallel import BATCHES

    names = [f"two GPUs, DDP, the example: {name}" for name in BATCHES]
    why_not = _why_no_torch() or _why_not_two()
    if why_not:
        yield from _not_run([*names, "two GPUs, DDP: gradients beside one's"], why_not)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    try:
        one, two = (_result([*command, str(n), "-m", "benchmarks.parallel", "ddp"]) for n in (1, 2))
    except RuntimeError as error:
        yield _failed(Row(names[0], "eager", "x", None), error)
        return
    rates, musts = [found["rates"].values() for found in (one, two)], (SPEEDUP_MUST, None)
    for what, alone, both, must in zip(names, *rates, musts, strict=True):
        yield _speedup(what, alone, both, must)
    yield _gradients("two GPUs, DDP: gradients beside one's", two["error"])


def _shards(setting: Setting) -> Iterator[Row]:
    names = "two GPUs, shard_map over clouds: a step", "two GPUs, shard_map: gradients beside one's"
    why_not = _why_no_jax() or _why_not_two()
    if why_not:
        yield from _not_run(names, why_not)
        return
    command = [sys.executable, "-m", "benchmarks.parallel"]
    try:
        found = _result([*command, "shards"])
        yield _speedup(names[0], found["one"], found["two"], SPEEDUP_MUST)
    except RuntimeError as error:
        yield _failed(Row(names[0], "eager", "x", None), error)
    try:
        yield _gradients(names[1], _result([*command, "shards-gradients"])["error"])
    except RuntimeError as error:
        yield _failed(Row(names[1], "check", "1e-6", None), error)


def _why_not_two() -> str:
    import cupy

    return "" if cupy.cuda.runtime.getDeviceCount() > 1 else "one GPU is visible, and this takes two"


def _not_run(names: Sequence[str], why_not: str) -> Iterator[Row]:
    for what in names:
        yield Row(what, "eager", "x", None, note=f"skipped: {why_not}")


def _speedup(what: str, one: float, two: float, must: float | None) -> Row:
    note = f"{two:,.0f} points a second, one GPU {one:,.0f}; batches have the same size per GPU"
    return Row(what, "eager", "x", two / one, must, at_least=True, note=note)


def _gradients(what: str, error: float) -> Row:
    return Row(what, "check", "1e-6", 1e6 * error, 1e6 * GRADIENT_MUST, note="relative error of the worst parameter")


def _result(command: Sequence[str]) -> dict[str, Any]:
    """The result that `parallel` prints as one line of JSON."""
    return json.loads(next(line for line in _output(command).splitlines() if line.startswith("{")))


def _output(command: Sequence[str], **environment: str) -> str:
    """The output of a process of ours. If it hangs, it is killed with its children; those of torchrun would stay."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, **pipes)
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise RuntimeError(f"{' '.join(command[1:])} took over {SECONDS} s") from None
    if process.returncode:
        raise RuntimeError(f"{errors}\nError: {' '.join(command[1:])} ended with exit code {process.returncode}")
    return out
