# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.jax on a GPU: the bits of plain calls, XLA's memory, command buffers, streams, devices, errors."""

from __future__ import annotations

import functools
import gc
import threading
import time

import numpy as np
import pytest

import gpu3d
from gpu3d.cuda import launcher

pytestmark = pytest.mark.gpu
jax = pytest.importorskip("jax")
GPUS = [device for device in jax.devices() if device.platform != "cpu"]
if not GPUS:
    pytest.skip("this jax has no CUDA plugin, or finds no GPU", allow_module_level=True)

from jax import export  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from test_interop_jax import (  # noqa: E402
    DIFFERENTIABLE,
    ERRORS,
    OPS,
    OUR_CALLS,
    assert_same,
    check_gradients,
    check_sharded,
    cotangent,
    layout,
    needs_shard_map,
    numbers,
    on_host,
    points,
    pulled,
    run_here,
    stage_loss,
    stage_of,
    wide,
)

from gpu3d.interop import jax as g  # noqa: E402
from gpu3d.interop.jax import handler  # noqa: E402

DTYPES = ["float16", "bfloat16", "float32"]
FOREIGN = [name for name in OPS if name not in ("scatter", "gather")]


@pytest.fixture(autouse=True)
def on_the_gpu():
    with jax.default_device(GPUS[0]), wide():
        yield


@pytest.fixture
def launched(monkeypatch):
    """The calls that the handler launched."""
    calls, run = [], launcher.run

    def counted(call, *args):
        calls.append(call)
        run(call, *args)

    monkeypatch.setattr(launcher, "run", counted)
    return calls


def record(function):
    """Compile a function so that XLA records even a single call in a command buffer."""
    return jax.jit(function, compiler_options={"xla_gpu_graph_min_graph_size": 1})


# ---- the plain calls' bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_calls_bits(cp, name, dtype):
    """Results have the bits of plain calls, in XLA's buffers and workspace, which are large enough."""
    ours, plain = OPS[name](dtype, jnp.asarray), OPS[name](dtype, cp.asarray)
    got = jax.jit(ours.run)(*ours.inputs)
    assert all(x.devices() == {GPUS[0]} for x in jax.tree.leaves(got))
    assert_same(got, jax.tree.map(lambda x: x.get(), plain.run(*plain.inputs)))
    assert not any(prepared.apart for prepared in handler._prepared.values())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(cp, name, dtype):
    ours, plain = OPS[name](dtype, jnp.asarray), OPS[name](dtype, cp.asarray)
    result, gradients = pulled(ours, dtype)
    check_gradients(gradients, plain.backward(cp.asarray(cotangent(result, dtype))))


@pytest.mark.parametrize("balance", ["spill", "probe"])
@pytest.mark.parametrize("n", [5000, 700_000])
def test_large_clouds(cp, balance, n):
    x = points(n)
    got = jax.jit(functools.partial(gpu3d.bucketize, balance=balance))(x)
    assert_same(got, jax.tree.map(lambda x: x.get(), gpu3d.bucketize(cp.asarray(x), balance=balance)))


def test_many_clouds(cp):
    """The table of many clouds is written to the workspace."""
    x, lengths = points(100 * 70), tuple(range(20, 120))[:70]
    x = x[: sum(lengths)]
    run = record(functools.partial(gpu3d.bucketize, bucket_size=16, lengths=lengths))
    expected = jax.tree.map(lambda x: x.get(), gpu3d.bucketize(cp.asarray(x), 16, lengths=lengths))
    for _ in range(4):
        assert_same(run(x), expected)


# ---- memory that JAX lends -----------------------------------------------------------------------------------------


class Foreign:
    """An array of a library that gpu3d does not know."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


SPIN = 'extern "C" __global__ void spin(long long n) { long long start = clock64(); while (clock64() - start < n); }'


@pytest.mark.parametrize("lent", [lambda x: x, Foreign], ids=["jax", "foreign"])
def test_inputs_that_are_dropped_after_a_call(cp, lent):
    """JAX must not reuse their memory before the GPU has read it, and gets it back afterwards."""
    x = points(5000)
    expected = gpu3d.bucketize(x, 16).slot_to_point
    gpu3d.bucketize(lent(jnp.asarray(x)), 16)  # compiles
    cp.cuda.get_current_stream().synchronize()
    before = GPUS[0].memory_stats()["bytes_in_use"]
    for _ in range(3):
        cp.RawKernel(SPIN, "spin")((1,), (1,), (60_000_000,))  # some 30 ms, so that the call is still queued
        got = gpu3d.bucketize(lent(jnp.asarray(x)), 16).slot_to_point
        others = jax.block_until_ready([jnp.full(x.shape, 7.0 + i) for i in range(8)])
        np.testing.assert_array_equal(on_host(got), expected)
        del got, others
    for _ in range(100):
        if GPUS[0].memory_stats()["bytes_in_use"] <= before:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("inputs are still alive after the calls that read them")


# ---- command buffers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOREIGN)
def test_calls_that_are_recorded(cp, launched, name):
    """Recorded calls run again without the handler, also with arrays at new addresses."""
    ours, plain = OPS[name]("float32", jnp.asarray), OPS[name]("float32", cp.asarray)
    run, halves = record(ours.run), [1.0, 0.5, 0.25, 0.125]
    expected = [jax.tree.map(lambda x: x.get(), plain.run(*[x * f for x in plain.inputs])) for f in halves]
    inputs = [[jax.block_until_ready(x * f) for x in ours.inputs] for f in halves]
    launched.clear()
    for k in range(96):
        python = len(launched)
        got = run(*inputs[k % 4])
        try:
            assert_same(got, expected[k % 4])
        except AssertionError as error:
            raise AssertionError(f"run {k}, {len(launched) - python} of {len(launched)} launched by Python") from error
    assert 0 < len(launched) < 48  # once for each set of addresses that XLA's allocator hands out


def test_a_step_that_is_recorded(launched):
    """A step with buckets, attention, pooling, losses and gradients is long enough for XLA to record it by default."""
    step = jax.jit(jax.value_and_grad(stage_loss), static_argnums=2)
    x, at, lengths = stage_of((3000, 5, 700))
    expected = jax.value_and_grad(stage_loss)(x, at, lengths)
    launched.clear()
    for _ in range(20):
        for a, b in zip(step(x, at, lengths), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert 0 < len(launched) < 20 * 10 / 2


def test_slices_of_arrays(cp):
    """XLA may pass a part of an array as input or result, at an address of any alignment."""
    x, rows = jnp.asarray(points(2001)), jnp.asarray(numbers(5, 2001, 3))
    expected = gpu3d.bucketize(cp.asarray(points(2001)[1:]), 16).slot_to_point.get()
    run = record(lambda x: gpu3d.bucketize(x[1:], 16).slot_to_point)
    for _ in range(3):
        np.testing.assert_array_equal(run(x), expected)
    scanned = jax.jit(lambda rows: jax.lax.scan(lambda c, x: (c, gpu3d.knn(x, x, 2)), 0, rows)[1])(rows)
    for i in range(5):
        one = cp.asarray(numbers(5, 2001, 3)[i])
        assert_same([z[i] for z in scanned], [z.get() for z in gpu3d.knn(one, one, 2)])


def test_a_program_of_another_process(tmp_path):
    """It carries the size of its workspace. Its plan is built where it runs, also while XLA records."""
    pytest.importorskip("flatbuffers")  # JAX needs it to serialize
    x, at, lengths = stage_of((3000, 5, 700))
    run = jax.jit(lambda x, at: jax.value_and_grad(stage_loss)(x, at, lengths))
    exported = export.export(run, disabled_checks=OUR_CALLS)(x, at)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "given.npz", x, at)
    script = (
        "import sys, numpy as np, jax\n"
        "from pathlib import Path\n"
        "from jax import export\n"
        "import gpu3d.interop.jax\n"
        "folder = Path(sys.argv[1])\n"
        "program = export.deserialize(bytearray((folder / 'program').read_bytes()))\n"
        "run = jax.jit(program.call, compiler_options={'xla_gpu_graph_min_graph_size': 1})\n"
        "given = [jax.device_put(x) for x in np.load(folder / 'given.npz').values()]\n"
        "for _ in range(4): got = run(*given)\n"
        "np.savez(folder / 'got.npz', *got)\n"
    )
    done = run_here(script, tmp_path, JAX_PLATFORMS="cuda")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "got.npz") as got:
        for a, b in zip(got.values(), run(x, at), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ---- stream, transformations, devices --------------------------------------------------------------------------------


def test_xlas_stream(cp):
    """XLA still computes the inputs and goes on with the results. Both are right only in the order of its stream."""

    @jax.jit
    def run(slow, x):
        for _ in range(20):
            slow = jnp.tanh(slow @ slow)
        late = x + 0 * slow[0, 0]
        buckets = gpu3d.bucketize(late, 64)
        return (buckets.scatter(late) * 2).sum(), buckets.slot_to_point

    x = points(5000)
    expected = gpu3d.bucketize(cp.asarray(x), 64).slot_to_point.get()
    slow = jnp.asarray(numbers(4096, 4096))
    for _ in range(3):
        total, slots = run(slow, x)
        np.testing.assert_array_equal(slots, expected)
        np.testing.assert_allclose(float(total), 2 * float(x.astype(np.float64).sum()), rtol=1e-4)


def test_nothing_goes_through_the_host():
    x, at, lengths = stage_of((150, 3, 33, 1))
    step = jax.jit(jax.value_and_grad(stage_loss), static_argnums=2)
    jax.block_until_ready(step(x, at, lengths))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(x, at, lengths))


@pytest.mark.parametrize("name", ["bucketize", "attention", "chamfer", "apml"])
def test_vmap(name):
    op = OPS[name]("float32", jnp.asarray)
    stacked = [jnp.stack([x, x[::-1]]) for x in op.inputs]
    got = jax.jit(jax.vmap(op.run))(*stacked)
    for i in range(2):
        assert_same([x[i] for x in jax.tree.leaves(got)], jax.jit(op.run)(*[x[i] for x in stacked]))


def test_threads():
    x = [jnp.asarray(points(4000, seed=seed)) for seed in range(4)]
    run = jax.jit(lambda x: gpu3d.bucketize(x, 64).slot_to_point)
    expected, got = [np.asarray(run(z)) for z in x], {}

    def work(i):
        got[i] = [np.asarray(run(jax.device_put(x[(i + k) % 4], GPUS[0]))) for k in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for k in range(30):
            np.testing.assert_array_equal(got[i][k], expected[(i + k) % 4])


@needs_shard_map
def test_shard_map():
    check_sharded(len(GPUS[:2]))


@pytest.mark.skipif(len(GPUS) < 2, reason="needs two GPUs")
def test_another_gpu():
    x = jax.device_put(points(5000), GPUS[1])
    for run in (jax.jit(functools.partial(gpu3d.bucketize, bucket_size=64)), lambda x: gpu3d.bucketize(x, 64)):
        got = run(x)
        assert got.slot_to_point.devices() == {GPUS[1]}
        np.testing.assert_array_equal(got.slot_to_point, gpu3d.bucketize(points(5000), 64).slot_to_point)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_thousand_steps(cp):
    at, x = jnp.asarray(points(1000)), jnp.asarray(numbers(1000, 32))

    @jax.jit
    def step(weight):
        def loss(weight):
            buckets = gpu3d.bucketize(at, 64)
            q = (buckets.scatter(x) @ weight).reshape(-1, 2, 16)
            out = gpu3d.bucket_attention(q, q, q, buckets, gpu3d.scopes(buckets, 2)).reshape(-1, 32)
            pooled = gpu3d.bucket_pool(out, buckets.scatter(at), buckets)
            near = buckets.gather(out)[:, :3]
            return jnp.square(pooled.features).mean() + gpu3d.chamfer(near, at) + gpu3d.apml(near, at)

        return weight - 1e-3 * jax.grad(loss)(weight)

    def held():
        gc.collect()
        return GPUS[0].memory_stats()["bytes_in_use"], cp.get_default_memory_pool().total_bytes()

    weight = jnp.asarray(numbers(32, 32))
    for _ in range(10):
        weight = step(weight)
    jax.block_until_ready(weight)
    before = held()
    for _ in range(990):
        weight = step(weight)
    jax.block_until_ready(weight)
    assert all(after <= was for after, was in zip(held(), before, strict=True))
    assert bool(jnp.isfinite(weight).all())


def test_with_jax_holding_nearly_all_memory(cp):
    """With preallocation, workspaces come from the memory that JAX holds."""
    script = (
        "import numpy as np, jax\n"
        "from gpu3d.interop import jax as g\n"
        "x = jax.device_put(np.random.default_rng(0).random((1_000_000, 3), np.float32))\n"
        "print(float(jax.jit(g.apml)(x, x[::-1] + 1e-3)))\n"
    )
    free = cp.cuda.Device().mem_info[0] / cp.cuda.Device().mem_info[1]
    done = run_here(
        script,
        JAX_PLATFORMS="cuda",
        XLA_PYTHON_CLIENT_PREALLOCATE="true",
        XLA_PYTHON_CLIENT_MEM_FRACTION=f"{0.8 * free:.2f}",
    )
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_errors_of_the_program():
    """Arguments that a GPU does not support raise an error when the program runs there."""
    buckets, scopes = layout(asarray=jnp.asarray)
    q = jnp.asarray(numbers(buckets.num_slots, 2, 16, dtype="float64"))
    with pytest.raises(ERRORS, match="q must be float16, bfloat16 or float32 on a GPU, got float64"):
        jax.block_until_ready(g.bucket_attention(q, q, q, buckets, scopes))


def test_points_that_are_not_finite():
    bad = jnp.asarray(points(20)).at[3, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="points must be finite, got 1 of 20"):
        g.bucketize(bad, 16, check_finite=True)
    assert int((g.bucketize(bad, 16).slot_to_point >= 0).sum()) == 20
