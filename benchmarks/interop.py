# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop: what torch and JAX take beyond the plain call, in host time, device time, memory and at import.

Inputs are small, so that the host binds: 4096 points of a real sweep in buckets of 512, scopes of 1024, 4 heads of
D = 16 and 64 channels, bfloat16; the losses of two clouds of 1024 points, APML with room for its entries, so that
nothing waits for the GPU. forward+backward is torch.autograd.grad of a forward, and of the plain calls the forward and
its backward, or the loss with its gradients.

- torch: the host time of the operator less that of the plain call with CuPy arrays, both taken in turns. Autograd takes
  its share whatever the operator does, some of it for handing a backward pass to its thread and back: peers show what
  it takes of a torch.autograd.Function that does nothing, of an operator of torch's own, and of a Function that knows
  our launches and looks at nothing, which is the least that ours could take. A network has many calls in one pass, so
  there are rows of 8 calls and one pass through all of them, divided by 8; and there are rows of a pass that stays on
  the calling thread, by torch.autograd.set_multithreading_enabled(False).
- JAX: XLA may run our handler in a thread of its own, behind the call that returns at once. So it is many calls in a
  row and the wait for the last one, divided; and so are the plain call beside it, and a jitted function of the same
  arrays that doubles one of them. Where the GPU takes longer it binds, so the losses are of 16 points and APML of one
  iteration, for which the host does the same; the GPU's time is that of the plain call in a stream, or in a graph.
  "launched" is when the last call returned, which is the host's share where XLA runs our handler on the calling thread,
  as jaxlib 0.11 does. "recorded" is the same function with the compiler's option that has XLA put programs of one
  operation into command buffers, too.
- graph: the operator captured by torch.cuda.graph, beside the plain call captured likewise, in torch's memory; in
  turns, and the least of both. Where its workspace lies changes APML by up to 5 % (H200). Autograd multiplies APML's
  gradients by that of the loss, in 1.7 us, which the plain call does not; that one is there before, as what comes from
  other operators is, for torch fills a tensor with it otherwise.
- import: gpu3d.interop.torch where torch is imported already, in new processes.
- memory: what torch's allocator and CuPy's pool hold after 1,000 steps of training, and after 10.
- two GPUs: see `parallel`. Each has a batch of the size that one GPU has alone.
"""

from __future__ import annotations

import functools
import json
import os
import signal
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

SIZE, BUCKET_SIZE, SCOPE = 4096, 512, 2
HEADS, DIM, CHANNELS = 4, 16, 64
LOSS_SIZE = 1024
LOSS_ROOM = 16 * 2 * LOSS_SIZE  # entries, for max_entries
LOSS_SIZE_JAX, ITERATIONS_JAX = 16, 1
DIRECTIONS = ("forward", "forward+backward")  # by `both`
IN_A_PASS = 8  # calls
RECORDED = {"xla_gpu_graph_min_graph_size": 1}  # options of XLA's compiler
ROUNDS = 8  # of what is taken in turns: on a host that others use, too
IN_A_ROW = 50
GRAPHS = 3  # of a call, likewise
STEPS = 10, 1000

TORCH_MUST = (15, 40)  # us over the plain call, by `both`
JAX_MUST = 40  # us a call
GRAPH_MUST = 1.03  # times the plain call: none, to what two runs of one graph differ by
IMPORT_MUST = 50  # ms
IMPORTS = 3
SPEEDUP_MUST = 1.8  # of two GPUs
GRADIENT_MUST = 1e-4  # relative: float32 sums in another order
SECONDS = 100  # that a run of `parallel` may take; some 20 where its kernels are compiled already

ROOT = Path(__file__).resolve().parent.parent


def run(setting: Setting) -> Iterator[Row]:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else JAX takes three quarters of the GPU's memory
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
    """Arrays of one library."""

    points: Any  # [n, 3]
    slots: Any  # the same in slot order, [num_slots, 3]
    q: Any  # [num_slots, H, D], as k, v and dout
    k: Any
    v: Any
    dout: Any
    features: Any  # [num_slots, C]
    dchild: Any  # [child slots, C]
    x: Any  # clouds of the losses
    y: Any


@functools.cache
def _inputs(folder: Path | None) -> Inputs:
    """In CuPy."""
    import cupy

    cloud = data.sweep_cloud(SIZE, folder)
    slots = gpu3d.bucketize(cloud, BUCKET_SIZE).scatter(cloud)
    rng = np.random.default_rng(0)
    shapes = *[(len(slots), HEADS, DIM)] * 4, (len(slots), CHANNELS), (len(slots) // 2, CHANNELS)
    rows = [rng.standard_normal(shape, np.float32).astype(bfloat16) for shape in shapes]
    return Inputs(*map(cupy.asarray, (cloud, slots, *rows, *data.pair("shell", LOSS_SIZE))))


class Function(NamedTuple):
    """What is differentiated, where, and the gradient of its result; None: 1, of a loss."""

    call: Callable[..., Any]
    at: tuple[Any, ...]
    gradient: Any


def _functions(library: Any, inputs: Inputs, **options: Any) -> dict[str, Function]:
    """Of gpu3d, gpu3d.interop.torch or gpu3d.interop.jax; the options are APML's."""
    buckets = library.bucketize(inputs.points, BUCKET_SIZE)
    scopes = library.scopes(buckets, SCOPE)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return library.bucket_attention(q, k, v, buckets, scopes)

    def pool(features: Any) -> Any:
        return library.bucket_pool(features, inputs.slots, buckets).features

    apml = functools.partial(library.apml, max_entries=LOSS_ROOM, **options)
    return {
        "attention": Function(attention, inputs[2:5], inputs.dout),
        "pool": Function(pool, (inputs.features,), inputs.dchild),
        "chamfer": Function(library.chamfer, inputs[-2:], None),
        "apml": Function(apml, inputs[-2:], None),
    }


def _plain_calls(inputs: Inputs, **options: Any) -> dict[tuple[str, bool], timing.Call]:
    """By name and `both`; the options are APML's."""
    buckets = gpu3d.bucketize(inputs.points, BUCKET_SIZE)
    scopes = gpu3d.scopes(buckets, SCOPE)
    q, k, v = inputs[2:5]

    def attention() -> Any:
        out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
        return out, gpu3d.bucket_attention_backward(inputs.dout, q, k, v, out, lse, buckets, scopes)

    def pool() -> Any:
        pooled = gpu3d.bucket_pool(inputs.features, inputs.slots, buckets)
        return pooled, gpu3d.bucket_pool_backward(inputs.dchild, pooled)

    functions = _functions(gpu3d, inputs, **options)
    calls = {(name, False): functools.partial(call, *at) for name, (call, at, _) in functions.items()}
    return calls | {
        ("attention", True): attention,
        ("pool", True): pool,
        ("chamfer", True): lambda: gpu3d.chamfer_value_and_grad(*inputs[-2:]),
        ("apml", True): lambda: gpu3d.apml_value_and_grad(*inputs[-2:], max_entries=LOSS_ROOM, **options),
    }


def _torch_functions(inputs: Inputs) -> dict[str, Function]:
    from gpu3d.interop import torch as library

    return _functions(library, Inputs(*map(data.to_torch, inputs)))


def _torch_calls(inputs: Inputs) -> dict[tuple[str, bool], timing.Call]:
    return {
        (name, both): _torch_both(function) if both else functools.partial(function.call, *function.at)
        for name, function in _torch_functions(inputs).items()
        for both in (False, True)
    }


def _torch_gradient(function: Function) -> Any:
    import torch

    return torch.ones((), device=function.at[0].device) if function.gradient is None else function.gradient


def _torch_both(function: Function) -> timing.Call:
    """Leaves are made in the call: a graph that is captured must have none of another stream."""
    import torch

    gradient = _torch_gradient(function)

    def both() -> Any:
        leaves = [x.detach().requires_grad_() for x in function.at]
        return torch.autograd.grad(function.call(*leaves), leaves, gradient)

    return both


def _torch_pass(function: Function, calls: int) -> timing.Call:
    """So many calls, of leaves of their own that are there before, and one backward pass through all of them."""
    import torch

    leaves = [[x.detach().requires_grad_() for x in function.at] for _ in range(calls)]
    inputs, gradients = [x for at in leaves for x in at], [_torch_gradient(function)] * calls
    return lambda: torch.autograd.grad([function.call(*at) for at in leaves], inputs, gradients)


def _jax_calls(inputs: Inputs, compiler: dict[str, Any], **options: Any) -> dict[tuple[str, bool], Any]:
    """Partials of jitted functions; the options are APML's."""
    import jax

    from gpu3d.interop import jax as library

    functions = _functions(library, Inputs(*(jax.device_put(x.get()) for x in inputs)), **options)
    return {
        (name, both): functools.partial(
            jax.jit(_jax_both(function) if both else function.call, compiler_options=compiler), *function.at
        )
        for name, function in functions.items()
        for both in (False, True)
    }


def _jax_both(function: Function) -> Callable[..., Any]:
    import jax

    def both(*at: Any) -> Any:
        result, pull = jax.vjp(function.call, *at)
        return result, pull(jax.numpy.ones_like(result) if function.gradient is None else function.gradient)

    return both


# ---- host time -----------------------------------------------------------------------------------------------------


def _torch_host(setting: Setting) -> Iterator[Row]:
    why_not = _why_no_torch()
    if why_not:
        yield Row("torch over plain", "host", "us", None, TORCH_MUST[0], note=f"skipped: {why_not}")
        return
    import torch

    inputs = _inputs(setting.folder)
    plain, functions, others = _plain_calls(inputs), _torch_functions(inputs), _others(inputs)
    for name, function in functions.items():
        peers = {**others, LEAST: _least(name, function, inputs)} if name in LAUNCHES else others
        for both, calls, threads in ((False, 1, True), (True, 1, True), (True, 1, False), (True, IN_A_PASS, True)):
            taken = {"plain": plain[name, both]}
            for who, what in {"ours": function, **peers}.items():
                taken[who] = _torch_pass(what, calls) if both else functools.partial(what.call, *what.at)
            with torch.autograd.set_multithreading_enabled(threads):
                times = _in_turns(taken)
            for who in ("ours", *peers):
                times[who] /= calls
            how = f", {calls} a pass" if calls > 1 else "" if threads else ", on the calling thread"
            yield Row(
                f"torch over plain, {name}: {DIRECTIONS[both]}{how}",
                "host",
                "us",
                times["ours"] - times["plain"],
                TORCH_MUST[both],
                peers=tuple([Peer(peer, "host", times[peer]) for peer in peers]),
                note=f"{number(times['ours'])} us, the plain call {number(times['plain'])} us",
            )


def _in_turns(calls: dict[str, timing.Call]) -> dict[str, float]:
    """Microseconds of the host's."""
    times = dict.fromkeys(calls, np.inf)
    for turn in range(ROUNDS):
        for which in sorted(calls, reverse=turn % 2 == 1):
            times[which] = min(times[which], 1e3 * timing.host_time(calls[which], seconds=0))
    return times


def _others(inputs: Inputs) -> dict[str, Function]:
    """What autograd takes of others, of three tensors, as attention."""
    import torch

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            return q.new_empty(q.shape)

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return dout, dout, dout

    at, gradient = tuple(map(data.to_torch, inputs[2:5])), data.to_torch(inputs.dout)
    return {
        "an autograd.Function that does nothing": Function(Nothing.apply, at, gradient),
        "torch.addcmul": Function(torch.addcmul, at, gradient),
    }


LEAST = "the same launches by a Function that looks at nothing"
LAUNCHES = {  # of each: its operators, and what is saved of tensors, which the layout's is the last of, and results
    "attention": ("bucket_attention", "bucket_attention_backward", lambda q, k, v, t, *made: (q, k, v, *made, t)),
    "pool": ("bucket_pool", "bucket_pool_backward", lambda features, slots, *made: made[2:4]),
}


def _least(name: str, function: Function, inputs: Inputs) -> Function:
    """It saves, allocates and launches what ours does, by the programs that ours has written down by then."""
    import torch

    from gpu3d.interop import torch as library

    both = _torch_pass(function, 1)
    for _ in range(3):  # from then on it is played
        both()
    *names, saved = LAUNCHES[name]
    played = {key[0]: kind.played for key, kinds in library._kinds.items() for kind in kinds}
    there, back = (played[name] for name in names)
    table = library.scopes(library.bucketize(data.to_torch(inputs.points), BUCKET_SIZE), SCOPE).table
    last = {"attention": table, "pool": data.to_torch(inputs.slots)}[name]
    device = last.get_device()

    class Least(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *at: Any) -> Any:
            made = there([x.data_ptr() for x in (*at, last)], device)
            ctx.save_for_backward(*saved(*at, last, *made))
            return made[0]

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return tuple(back([x.data_ptr() for x in (gradient, *ctx.saved_tensors)], device))

    return function._replace(call=super(torch.autograd.Function, Least).apply)


def _jax_host(setting: Setting) -> Iterator[Row]:
    why_not = _why_no_jax()
    if why_not:
        yield Row("JAX under jit", "host", "us", None, JAX_MUST, note=f"skipped: {why_not}")
        return
    import cupy
    import jax

    inputs, options = _inputs(setting.folder), {"iterations": ITERATIONS_JAX}
    inputs = inputs._replace(x=inputs.x[:LOSS_SIZE_JAX], y=inputs.y[:LOSS_SIZE_JAX])
    plain, nothing = _plain_calls(inputs, **options), jax.jit(lambda x, *others: 2 * x)
    ours, recorded = (_jax_calls(inputs, compiler, **options) for compiler in ({}, RECORDED))
    for name, both in plain:
        arrays = ours[name, both].args
        calls = {
            "plain": (plain[name, both], lambda _: cupy.cuda.Device().synchronize()),
            "nothing": (functools.partial(nothing, *arrays), jax.block_until_ready),
            "": (ours[name, both], jax.block_until_ready),
            ", recorded": (recorded[name, both], jax.block_until_ready),
        }
        times = dict.fromkeys(calls, np.full(2, np.inf))
        for turn in range(ROUNDS):
            for which in sorted(calls, reverse=turn % 2 == 1):
                times[which] = np.minimum(times[which], _in_a_row(*calls[which]))
        for how, clock, device_time in (("", "stream", timing.stream_time), (", recorded", "graph", timing.graph_time)):
            device_us = 1e3 * device_time(plain[name, both])
            binds = device_us > JAX_MUST
            launched, done = times[how]
            yield Row(
                f"JAX under jit{how}, {name}: {DIRECTIONS[both]}",
                "host",
                "us",
                done,
                None if both or binds else JAX_MUST,
                peers=(
                    Peer("a jitted function that doubles an array", "host", times["nothing"][1]),
                    Peer("the plain call", "host", times["plain"][1]),
                    Peer("the plain call", clock, device_us),
                ),
                note=f"launched in {number(launched)} us" + "; the GPU binds" * binds,
            )


def _in_a_row(call: timing.Call, wait: Callable[[Any], Any], rounds: int = 15) -> Any:
    """Microseconds a call until all had returned, and until all were done: the least of the rounds."""
    wait(call())
    least = np.full(2, np.inf)
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            result = call()
        launched = time.perf_counter()
        wait(result)
        least = np.minimum(least, (launched - begin, time.perf_counter() - begin))
        del result
    return 1e6 * least / IN_A_ROW


# ---- device time ---------------------------------------------------------------------------------------------------


def _graphs(setting: Setting) -> Iterator[Row]:
    if _why_no_torch():
        return
    inputs = _inputs(setting.folder)
    plain, ours = _plain_calls(Inputs(*map(data.to_torch, inputs))), _torch_calls(inputs)
    for name, both in plain:
        yield _graph_row(f"torch in a graph, {name}: {DIRECTIONS[both]}", ours[name, both], plain[name, both])


def _graph_row(what: str, ours: timing.Call, plain: timing.Call) -> Row:
    """`plain` is of torch tensors."""
    import cupy

    from gpu3d.interop import torch as library

    ours_us = plain_us = np.inf
    for _ in range(GRAPHS):
        ours_us = min(ours_us, 1e3 * timing.torch_graph_time(ours))
        with cupy.cuda.using_allocator(library._allocator):
            plain_us = min(plain_us, 1e3 * timing.torch_graph_time(plain))
    note = f"{ours_us / plain_us:.3f} x the plain call ({number(plain_us)} us); must: {GRAPH_MUST} x"
    return Row(what, "graph, L2-warm", "us", ours_us, GRAPH_MUST * plain_us, note=note)


def _compiled(setting: Setting) -> Iterator[Row]:
    """Attention by torch.compile. A captured graph holds what the compiled function launches."""
    if _why_no_torch():
        return
    import torch

    inputs = _inputs(setting.folder)
    plain = _plain_calls(Inputs(*map(data.to_torch, inputs)))
    function = _torch_functions(inputs)["attention"]
    function = function._replace(call=torch.compile(function.call, fullgraph=True))
    calls = functools.partial(function.call, *function.at), _torch_both(function)
    for both in (False, True):
        what = f"torch.compile, attention: {DIRECTIONS[both]}"
        try:
            yield _graph_row(what, calls[both], plain["attention", both])
        except Exception as error:  # of a compiler that this machine lacks, for one
            yield _failed(Row(what, "graph, L2-warm", "us", None), error)


def _failed(row: Row, error: Exception) -> Row:
    """The row, and of what was raised the first line that names an error: a process that failed prints many."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    why = next((line for line in lines if "Error: " in line), lines[0])
    return row._replace(checks={"it ran": False}, note=why.strip()[:200])


# ---- import and memory ---------------------------------------------------------------------------------------------


def _import(setting: Setting) -> Iterator[Row]:
    if _why_no_torch():
        return
    script = "import time, torch; t = time.perf_counter(); import gpu3d.interop.torch; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", script]
    # Modules that are compiled, as pip leaves what it installs.
    times = [float(_output(command, PYTHONDONTWRITEBYTECODE="")) for _ in range(IMPORTS)]
    yield Row(
        "import gpu3d.interop.torch, after torch",
        "CPU",
        "ms",
        1e3 * min(times),
        IMPORT_MUST,
        note=f"the least of {IMPORTS} processes",
    )


def _memory(setting: Setting) -> Iterator[Row]:
    """A step: everything, from points to a step of the optimizer."""
    if _why_no_torch():
        return
    import cupy
    import torch

    from gpu3d.interop import torch as g

    inputs = Inputs(*map(data.to_torch, _inputs(setting.folder)))
    features = torch.randn(SIZE, CHANNELS, device="cuda")
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
    try:
        found = _result([sys.executable, "-m", "benchmarks.parallel", "shards"])
    except RuntimeError as error:
        yield _failed(Row(names[0], "eager", "x", None), error)
        return
    yield _speedup(names[0], found["one"], found["two"], SPEEDUP_MUST)
    yield _gradients(names[1], found["error"])


def _why_not_two() -> str:
    import cupy

    return "" if cupy.cuda.runtime.getDeviceCount() > 1 else "one GPU is visible, and this takes two"


def _not_run(names: Sequence[str], why_not: str) -> Iterator[Row]:
    for what in names:
        yield Row(what, "eager", "x", None, note=f"skipped: {why_not}")


def _speedup(what: str, one: float, two: float, must: float | None) -> Row:
    note = f"{two:,.0f} points a second, one GPU {one:,.0f}; a batch of the same size a GPU"
    return Row(what, "eager", "x", two / one, must, at_least=True, note=note)


def _gradients(what: str, error: float) -> Row:
    return Row(what, "check", "1e-6", 1e6 * error, 1e6 * GRADIENT_MUST, note="relative, of the worst parameter")


def _result(command: Sequence[str]) -> dict[str, Any]:
    """The line that `parallel` prints."""
    return json.loads(next(line for line in _output(command).splitlines() if line.startswith("{")))


def _output(command: Sequence[str], **environment: str) -> str:
    """What a process of ours prints. One that hangs is ended with all that it started; torchrun's need that."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, **pipes)
    try:
        out, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        raise RuntimeError(f"{' '.join(command[1:])} took over {SECONDS} s") from None
    if process.returncode:
        raise RuntimeError(errors)
    return out
