# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.jax on a GPU: the plain calls' bits in XLA's buffers, its memory and stream, vmap, shards, errors."""

from __future__ import annotations

import functools
import gc
import json
import threading
from types import SimpleNamespace

import clouds
import numpy as np
import pytest

import gpu3d
from gpu3d.interop import _native, _replay, _xla

pytestmark = pytest.mark.gpu
jax = pytest.importorskip("jax")
GPUS = [device for device in jax.devices() if device.platform != "cpu"]
if not GPUS:
    pytest.skip("this jax has no CUDA plugin, or finds no GPU", allow_module_level=True)

from jax import numpy as jnp  # noqa: E402
from test_interop_jax import (  # noqa: E402
    ERRORS,
    LENGTHS,
    OUR_CALLS,
    POINTS,
    check_sharded,
    normal,
    points,
    run_here,
    shard_map,
    stage_loss,
)

from gpu3d.interop import jax as g  # noqa: E402

DTYPES = ["float16", "bfloat16", "float32"]


@pytest.fixture(autouse=True)
def on_the_gpu():
    with jax.default_device(GPUS[0]):
        yield


def layout(bucket_size=16, lengths=LENGTHS):
    buckets = g.bucketize(points(sum(lengths)), bucket_size, lengths=lengths)
    return buckets, g.scopes(buckets, 2, shift=1)


def plain(cp, tree):
    """The same with CuPy arrays, copied through the host, for plain calls."""
    return jax.tree.map(lambda x: cp.asarray(np.asarray(x)), tree)


def assert_same(got, expected):
    """JAX arrays on a GPU, bit for bit CuPy's."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert {device.platform for device in a.devices()} == {GPUS[0].platform}
        a, b = np.asarray(a), b.get()
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.size < 2 or (a != 0).any()
        np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def every_gradient(cp, dtype, lengths, bucket_size, ratio=2, reduce="max", width=32):
    """The results of all functions and their gradients, under jit; and the same from plain calls."""
    at, rows = points(sum(lengths)), normal(sum(lengths), 5, dtype=dtype)

    @jax.jit
    def run(at, rows, packed, douts):
        buckets = g.bucketize(at, bucket_size, lengths=lengths)
        scopes = g.scopes(buckets, 2, shift=1)
        q, k, v = jnp.moveaxis(packed, 1, 0)
        attend = functools.partial(g.bucket_attention, buckets=buckets, scopes=scopes)
        out, lse = attend(q, k, v, return_lse=True)
        features = out.reshape(len(out), -1)
        at_slots = g.scatter(at, buckets)
        pool = functools.partial(g.bucket_pool, points=at_slots, buckets=buckets, ratio=ratio, reduce=reduce)
        pooled = pool(features)
        back, of_back = jax.vjp(lambda c, s: g.bucket_unpool(c, pooled, s), pooled.features, features)
        moved, of_moved = jax.vjp(lambda x: g.scatter(x, buckets), rows)
        gradients = jax.vjp(attend, q, k, v)[1](douts[0])
        gradients += jax.vjp(lambda f: pool(f).features, features)[1](douts[1])
        gradients += of_back(douts[2]) + of_moved(douts[3])
        structure = buckets.slot_to_point, buckets.point_to_slot, buckets.moved, scopes.table
        child = pooled.points, pooled.members, pooled.buckets.slot_to_point, pooled.buckets.point_to_slot
        return [out, lse, pooled.features, back, moved, *structure, *child, *gradients]

    made = gpu3d.bucketize(plain(cp, at), bucket_size, lengths=lengths)
    window = made, gpu3d.scopes(made, 2, shift=1)
    packed = normal(made.num_slots, 3, 2, width, dtype=dtype)
    q, k, v = (cp.ascontiguousarray(plain(cp, packed)[:, i]) for i in range(3))
    saved = gpu3d.bucket_attention(q, k, v, *window, return_lse=True)
    features = saved[0].reshape(len(q), -1)
    children = gpu3d.bucket_pool(features, made.scatter(plain(cp, at)), made, ratio=ratio, reduce=reduce)
    back, moved = gpu3d.bucket_unpool(children.features, children, features), made.scatter(plain(cp, rows))
    shapes = saved[0].shape, children.features.shape, back.shape, moved.shape
    douts = [normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    host = [plain(cp, dout) for dout in douts]
    child = children.buckets
    expected = [*saved, children.features, back, moved, made.slot_to_point, made.point_to_slot, made.moved]
    expected += [window[1].table, children.points, children.members, child.slot_to_point, child.point_to_slot]
    expected += gpu3d.bucket_attention_backward(host[0], q, k, v, *saved, *window)
    expected += [gpu3d.bucket_pool_backward(host[1], children)]
    expected += gpu3d.bucket_unpool_backward(host[2], children)
    expected += [made.gather(host[3])]
    return functools.partial(run, at, rows, packed, douts), expected


# ---- the plain calls' bits, in XLA's buffers -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients(cp, dtype):
    for lengths, bucket_size in ((LENGTHS, 16), ((3000, 1, 700), 512), ((40,) * 100, 48)):
        for ratio, reduce in ((2, "max"), (4, "mean")):
            run, expected = every_gradient(cp, dtype, lengths, bucket_size, ratio, reduce)
            assert_same(run(), expected)


@pytest.fixture(params=["play.c", "Python"])
def handled(monkeypatch, request):
    """What Python's handler did: which calls came to it, how many it played, and which ones it ran as plain calls.

    play.c has forgotten what it knew; or it is told of none.
    """
    done = SimpleNamespace(names=set(), texts=set(), played=0, plain=[], native=request.param == "play.c")
    played, play, run = _xla._played, _replay.play, _xla._run_plain
    library = _native.library()
    if library is not None:
        library.forget()
        played.cache_clear()
    elif done.native:
        pytest.skip("there is no C compiler")
    if not done.native:
        monkeypatch.setattr(_native, "know", lambda *call: None)

    def came(text, *args):
        done.names.add(json.loads(text)[0])
        done.texts.add(text)
        return played(text, *args)

    def count(*args):
        done.played += 1
        play(*args)

    def name(call, *args):
        done.plain.append(call.name)
        run(call, *args)

    monkeypatch.setattr(_xla, "_played", came)
    monkeypatch.setattr(_replay, "play", count)
    monkeypatch.setattr(_xla, "_run_plain", name)
    return done


def every_loss(x, y):
    """Value, and value and gradients, of both."""
    return [(f(x, y), *jax.value_and_grad(f, (0, 1))(x, y)) for f in (g.chamfer, g.apml)]


def check_losses(cp, got, x, y):
    for name, (loss, again, gradients) in zip(("chamfer", "apml"), got, strict=True):
        want, of = getattr(gpu3d, name + "_value_and_grad")(plain(cp, x), plain(cp, y))
        assert_same([loss, again, *gradients], [want, want, *of])


def test_calls_that_are_played(cp, handled):
    """All of them, with other values each time."""
    losses = jax.jit(every_loss)
    bucketize = jax.jit(functools.partial(g.bucketize, bucket_size=16, lengths=LENGTHS))
    run, expected = every_gradient(cp, "float16", LENGTHS, 16)
    for seed in range(3):
        at = points(POINTS, seed=seed)
        made = gpu3d.bucketize(plain(cp, at), 16, lengths=LENGTHS)
        assert_same(jax.tree.leaves(bucketize(at)), [made.slot_to_point, made.point_to_slot, made.moved])
        assert_same(run(), expected)
        x, y = (normal(n, 3, seed=n + seed) for n in (600, 500))
        check_losses(cp, losses(x, y), x, y)
    assert handled.names == set(_xla.CALLS) and not handled.plain
    assert handled.played == len(handled.texts) if handled.native else handled.played > len(handled.texts)
    jax.block_until_ready(jax.jit(g.chamfer)(x[:, :2], y[:, :2]))  # with kernels of CuPy's own
    assert handled.plain == ["chamfer"]


def test_calls_that_are_recorded(cp, handled):
    """In XLA's command buffers, which are launched again without the handler, but for arrays at new addresses."""
    losses = jax.jit(every_loss, compiler_options={"xla_gpu_graph_min_graph_size": 1})
    at = [[normal(n, 3, seed=n + seed) for n in (600, 500)] for seed in range(4)]
    for k in range(40):
        check_losses(cp, losses(*at[k % 4]), *at[k % 4])
    assert 0 < handled.played < 40 * 4 / 2 and not handled.plain  # play.c has the others, where it knows them


def test_a_step_that_is_recorded(cp, handled):
    """Buckets, attention, pooling and their gradients, which are enough for XLA to record them by itself."""
    run, expected = every_gradient(cp, "bfloat16", (3000, 1, 700), 512)
    for _ in range(30):
        assert_same(run(), expected)
    assert 0 < handled.played < 30 * 8 / 2 and not handled.plain


def test_a_program_of_another_process(cp, tmp_path):
    """It brings its workspace. What plays it is found out where it runs, be it while XLA records."""
    pytest.importorskip("flatbuffers")  # what JAX serializes by
    at = [normal(n, 3, seed=n) for n in (600, 500)]
    run = jax.jit(lambda x, y: jax.tree.leaves(every_loss(x, y)))
    exported = jax.export.export(run, disabled_checks=OUR_CALLS)(*at)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "given.npz", *at)
    script = (
        "import sys, numpy as np, jax\n"
        "from pathlib import Path\n"
        "import gpu3d.interop.jax\n"
        "folder = Path(sys.argv[1])\n"
        "program = jax.export.deserialize(bytearray((folder / 'program').read_bytes()))\n"
        "run = jax.jit(program.call, compiler_options={'xla_gpu_graph_min_graph_size': 1})\n"
        "at = [jax.device_put(x) for x in np.load(folder / 'given.npz').values()]\n"
        "for _ in range(4): got = run(*at)\n"
        "np.savez(folder / 'got.npz', *got)\n"
    )
    done = run_here(script, tmp_path, JAX_PLATFORMS="cuda")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "got.npz") as got:
        for a, b in zip(got.values(), run(*at), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("balance", ["spill", "probe"])
@pytest.mark.parametrize("n", [1, 5000, 700_000])
def test_bucketize(cp, balance, n):
    x = points(n)
    got = g.bucketize(x, 512, balance=balance)
    expected = gpu3d.bucketize(plain(cp, x), 512, balance=balance)
    for name in ("slot_to_point", "point_to_slot", "moved"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name).get())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("name", ["chamfer", "apml"])
def test_losses(cp, name, d, reduction):
    x, y = (normal(n, d, seed=n) for n in (600, 500))
    sides = ("x", "y") if name == "chamfer" else ("pred", "target")
    lengths = dict(zip([f"{side}_lengths" for side in sides], ((200, 400), (450, 50)), strict=True))
    options = {**lengths, "reduction": reduction}
    room = {} if name == "chamfer" else {"max_entries": 16 * 1100}
    value_and_grad = getattr(gpu3d, name + "_value_and_grad")
    loss, gradients = value_and_grad(plain(cp, x), plain(cp, y), **options, **room)
    got, back = jax.vjp(jax.jit(functools.partial(getattr(g, name), **options)), x, y)
    assert_same([got, *back(jnp.ones_like(got))], [loss, *gradients])
    assert_same([getattr(g, name)(x, y, **options)], [loss])


def test_nothing_is_copied_and_nothing_of_cupys_pool(cp, monkeypatch):
    """Of plain calls: results are born in XLA's buffers, and workspaces are XLA's too."""
    monkeypatch.setattr(_xla, "workspace", lambda *args: None)
    monkeypatch.setattr(_xla, "_played", lambda *args: (None, 0))
    run, _ = every_gradient(cp, "float16", (3000, 1, 700), 512)
    x, y = normal(600, 3), normal(500, 3, seed=1)
    losses = jax.jit(lambda x, y: [jax.value_and_grad(f, (0, 1))(x, y) for f in (g.chamfer, g.apml)])
    jax.block_until_ready((run(), losses(x, y)))  # compiles
    strays = []
    land = _xla._land

    def watched(results, places, array_at):
        strays.extend(
            (result.shape, str(result.dtype))
            for result, place in zip(results, places, strict=True)
            if place.size and result.data.ptr != place.address
        )
        return land(results, places, array_at)

    monkeypatch.setattr(_xla, "_land", watched)
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    held = pool.total_bytes()
    jax.block_until_ready((run(), losses(x, y)))
    assert not strays and pool.total_bytes() == held


# ---- stream, transformations, devices --------------------------------------------------------------------------------


def test_xlas_stream(cp):
    """Inputs that XLA is still computing, and results that it goes on with: right only in the order of its stream."""

    @jax.jit
    def run(slow, x):
        for _ in range(20):
            slow = jnp.tanh(slow @ slow)
        late = x + 0 * slow[0, 0]
        buckets = g.bucketize(late, 64)
        return (g.scatter(late, buckets) * 2).sum(), buckets.slot_to_point

    x = points(5000)
    expected = gpu3d.bucketize(plain(cp, x), 64).slot_to_point.get()
    slow = normal(4096, 4096)
    for _ in range(3):
        total, slots = run(slow, x)
        np.testing.assert_array_equal(slots, expected)
        np.testing.assert_allclose(float(total), 2 * float(np.asarray(x, np.float64).sum()), rtol=1e-4)


def test_a_stage_under_jit(cp):
    lengths = (150, 3, 33, 1)
    x, at = normal(POINTS + 3, 48), points(POINTS + 3)
    got = jax.jit(jax.value_and_grad(stage_loss), static_argnums=2)(x, at, lengths)
    expected = jax.value_and_grad(stage_loss)(x, at, lengths)
    for a, b in zip(got, expected, strict=True):
        assert bool((b != 0).any())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    with jax.transfer_guard("disallow"):  # nothing goes through the host
        jax.block_until_ready(jax.jit(jax.value_and_grad(stage_loss), static_argnums=2)(x, at, lengths))


def test_vmap(cp):
    at = jnp.stack([points(600, seed=seed) for seed in range(3)])
    got = jax.jit(jax.vmap(lambda x: g.bucketize(x, 64)))(at)
    expected = [gpu3d.bucketize(plain(cp, x), 64).slot_to_point.get() for x in at]
    np.testing.assert_array_equal(got.slot_to_point, np.stack(expected))
    y = normal(500, 3)
    gradients = jax.jit(jax.vmap(jax.grad(g.chamfer), (0, None)))(at, y)
    each = [gpu3d.chamfer_value_and_grad(plain(cp, x), plain(cp, y))[1][0].get() for x in at]
    np.testing.assert_array_equal(gradients, np.stack(each))


def test_threads(cp):
    x = [points(4000, seed=seed) for seed in range(4)]
    run = jax.jit(lambda x: g.bucketize(x, 64).slot_to_point)
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


@pytest.mark.skipif(shard_map is None, reason="this JAX has no jax.shard_map")
def test_shard_map(cp):
    check_sharded(1)
    if len(GPUS) > 1:
        check_sharded(2)


def test_another_gpu(cp):
    if len(GPUS) < 2:
        pytest.skip("needs two GPUs")
    x = jax.device_put(np.asarray(points(5000)), GPUS[1])
    got = g.bucketize(x, 64)
    assert got.slot_to_point.devices() == {GPUS[1]}
    np.testing.assert_array_equal(got.slot_to_point, gpu3d.bucketize(clouds.uniform(5000), 64).slot_to_point)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_thousand_steps(cp):
    at, x = points(1000), normal(1000, 32)

    @jax.jit
    def step(weight):
        def loss(weight):
            buckets = g.bucketize(at, 64)
            q = (g.scatter(x, buckets) @ weight).reshape(-1, 2, 16)
            out = g.bucket_attention(q, q, q, buckets, g.scopes(buckets, 2)).reshape(-1, 32)
            pooled = g.bucket_pool(out, g.scatter(at, buckets), buckets)
            near = g.gather(out, buckets)[:, :3]
            return jnp.square(pooled.features).mean() + g.chamfer(near, at) + g.apml(near, at)

        return weight - 1e-3 * jax.grad(loss)(weight)

    def held():
        gc.collect()
        return GPUS[0].memory_stats()["bytes_in_use"], cp.get_default_memory_pool().total_bytes()

    weight = normal(32, 32)
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
    """Preallocation on: workspaces come out of what JAX holds."""
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


def test_errors_of_the_program(cp):
    buckets, scopes = layout()
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        q = normal(buckets.num_slots, 2, 16, dtype=np.float64)
        with pytest.raises(ERRORS, match="q must be float16, bfloat16 or float32 on a GPU, got float64"):
            jax.block_until_ready(g.bucket_attention(q, q, q, buckets, scopes))
    finally:
        jax.config.update("jax_enable_x64", before)
    bad = points(20).at[3, 1].set(jnp.nan)
    with pytest.raises(ERRORS, match="points must be finite, got 1 of 20"):
        jax.block_until_ready(g.bucketize(bad, 16, check_finite=True).slot_to_point)
    assert int((g.bucketize(bad, 16).slot_to_point >= 0).sum()) == 20
