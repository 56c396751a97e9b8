# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.jax on the CPU: the plain calls' bits under jit, grad, vmap, scan and shard_map; errors; XLA's ABI."""

from __future__ import annotations

import contextlib
import ctypes
import doctest
import functools
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import clouds
import numpy as np
import pytest
import test_docs
from test_native import stand_in
from test_replay import _kernel, _taken

import gpu3d
from gpu3d.interop import _native, _replay, _xla

jax = pytest.importorskip("jax")
from jax import numpy as jnp  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from gpu3d.interop import jax as g  # noqa: E402

LENGTHS = (150, 0, 33, 1)
POINTS = sum(LENGTHS)
ERRORS = getattr(jax.errors, "JaxRuntimeError", RuntimeError)
shard_map = getattr(jax, "shard_map", None)
OUR_CALLS = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("gpu3d", "gpu3d_recordable")]


@pytest.fixture(autouse=True)
def on_the_cpu():
    """A machine with a GPU runs these tests on its CPU too; test_interop_jax_gpu.py runs what it needs on the GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@contextlib.contextmanager
def wide():
    """float64, which JAX has on request only."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def normal(*shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def points(n=POINTS, dtype=np.float32, seed=0):
    return jnp.asarray(clouds.uniform(n, seed=seed), dtype)


def layout(bucket_size=16, lengths=LENGTHS):
    buckets = g.bucketize(points(sum(lengths)), bucket_size, lengths=lengths)
    return buckets, g.scopes(buckets, 2, shift=1)


def plain(tree):
    """The same with NumPy arrays, for plain calls."""
    return jax.tree.map(np.asarray, tree)


def in_slots(buckets, *shape, **options):
    """Numbers in slot order, NaN in padding."""
    x = normal(buckets.num_slots, *shape, **options)
    return jnp.where((buckets.slot_to_point < 0).reshape(-1, *(1,) * len(shape)), jnp.nan, x).astype(x.dtype)


def pull(function, *inputs, seed=9):
    """The results, a random gradient of the first, and what it gives of the inputs."""
    result, back = jax.vjp(function, *inputs)
    dout = normal(*result.shape, dtype=result.dtype, seed=seed)
    return result, dout, back(dout)


def assert_same(got, expected, bits=True):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.size < 2 or (a != 0).any()
        if bits:
            np.testing.assert_array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- the plain calls' bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"hash": "xor_mod", "balance": "probe", "seed": 3}, {"voxel_size": 0.01}, {"voxel_size": "per_axis"}],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_bucketize_and_scopes(dtype, options):
    with wide():
        x = points(dtype=dtype)
        expected = gpu3d.bucketize(np.asarray(x), 16, lengths=LENGTHS, **options)
        run = functools.partial(g.bucketize, bucket_size=16, lengths=LENGTHS, **options)
        for got in (run(x), jax.jit(run)(x)):
            for name in ("slot_to_point", "point_to_slot", "moved"):
                np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), strict=True)
            assert (got.lengths, got.bucket_offsets, got.bucket_size) == (LENGTHS, expected.bucket_offsets, 16)
    for size, shift, stride in ((1, 0, 1), (2, 1, 2), (3, -2, 7), (50, 1, 1)):
        table = gpu3d.scopes(expected, size, shift=shift, stride=stride).table
        made = jax.jit(functools.partial(g.scopes, size=size, shift=shift, stride=stride))(got)
        np.testing.assert_array_equal(made.table, table, strict=True)
        assert (made.size, made.shift, made.stride, made.bucket_offsets) == (size, shift, stride, got.bucket_offsets)


def test_bucketize_of_a_batch_and_of_nothing():
    x = points(120).reshape(4, 30, 3)
    got, expected = g.bucketize(x, 16), gpu3d.bucketize(np.asarray(x), 16)
    assert got.lengths == (30,) * 4
    np.testing.assert_array_equal(got.slot_to_point, expected.slot_to_point)
    empty = g.bucketize(x[0, :0], 16)
    assert empty.slot_to_point.shape == (0,) and int(empty.moved) == 0
    assert g.scatter(x[0, :0], empty).shape == (0, 3) and g.scopes(empty).table.shape == (0, 8)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_scatter_and_gather(shape):
    buckets, _ = layout()
    host = plain(buckets)
    x = normal(POINTS, *shape)
    y, dy, (dx,) = pull(lambda x: g.scatter(x, buckets, fill=7.5), x)
    assert_same([y, dx], [host.scatter(np.asarray(x), 7.5), host.gather(np.asarray(dy))])
    y = in_slots(buckets, *shape)
    x, dx, (dy,) = pull(lambda y: g.gather(y, buckets), y)
    assert_same([x, dy], [host.gather(np.asarray(y)), host.scatter(np.asarray(dx))])
    for dtype in (np.int32, np.bool_, np.complex64, jnp.bfloat16):
        values = jnp.arange(POINTS).astype(dtype)
        assert bool((g.gather(g.scatter(values, buckets, fill=1), buckets) == values).all())
        assert bool((g.scatter(values, buckets, fill=1)[buckets.slot_to_point < 0] == 1).all())
    curvature = jax.jit(jax.grad(lambda x: jax.grad(lambda x: (g.scatter(x, buckets) ** 3).sum())(x).sum()))
    np.testing.assert_allclose(curvature(x), 6 * x, rtol=1e-6)  # these two have second derivatives


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_bucket_attention(dtype, scale):
    with wide():
        buckets, scopes = layout()
        window = plain(buckets), plain(scopes)
        q, k, v = jnp.moveaxis(in_slots(buckets, 3, 2, 8, dtype=dtype), 1, 0)
        host = [np.asarray(x) for x in (q, k, v)]
        expected = gpu3d.bucket_attention(*host, *window, scale=scale, return_lse=True)
        run = functools.partial(g.bucket_attention, buckets=buckets, scopes=scopes, scale=scale)
        assert_same(run(q, k, v, return_lse=True), expected)
        for function in (run, jax.jit(run)):
            out, dout, got = pull(function, q, k, v)
            exact = gpu3d.bucket_attention_backward(np.asarray(dout), *host, *expected, *window, scale=scale)
            assert_same([out, *got], [expected[0], *exact])
        lse = jax.grad(lambda q: run(q, k, v, return_lse=True)[1].sum().astype(q.dtype))(q)
        assert not bool((lse != 0).any())  # not differentiated


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bucket_pool_and_unpool(dtype, ratio, reduce):
    buckets, _ = layout()
    features, at = in_slots(buckets, 5, dtype=dtype), g.scatter(points(), buckets)
    run = jax.jit(functools.partial(g.bucket_pool, ratio=ratio, reduce=reduce))
    pooled = run(features, at, buckets)
    host = np.asarray(features), np.asarray(at), plain(buckets)
    expected = gpu3d.bucket_pool(*host, ratio=ratio, reduce=reduce)
    assert jax.tree.structure(plain(pooled)) == jax.tree.structure(expected)  # lengths too
    for a, b in zip(jax.tree.leaves(pooled), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    _, dpooled, got = pull(lambda x: run(x, at, buckets).features, features)
    assert_same(got, [gpu3d.bucket_pool_backward(np.asarray(dpooled), expected)])

    child = normal(*pooled.features.shape, dtype=dtype, seed=3)
    for inputs in ([child], [child, in_slots(buckets, 5, dtype=dtype, seed=4)]):
        (first, *skip), rest = inputs, [np.asarray(x) for x in inputs[1:]]
        out, dout, got = pull(jax.jit(lambda x, *skip: g.bucket_unpool(x, pooled, *skip)), first, *skip)
        gradients = gpu3d.bucket_unpool_backward(np.asarray(dout), expected)[: len(inputs)]
        assert_same([out, *got], [gpu3d.bucket_unpool(np.asarray(first), expected, *rest), *gradients])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["chamfer", "apml"])
def test_losses(name, dtype, reduction):
    sides = ("x", "y") if name == "chamfer" else ("pred", "target")
    lengths = dict(zip([f"{side}_lengths" for side in sides], ((20, 40), (45, 5)), strict=True))
    function, exact = getattr(g, name), getattr(gpu3d, name + "_value_and_grad")
    variants = ({"squared": True}, {}) if name == "chamfer" else ({"iterations": 3, "symmetrize": "min"}, {})
    with wide():
        x, y = normal(60, 3, dtype=dtype), normal(50, 3, dtype=dtype, seed=1)
        for options in variants:
            options = {**lengths, "reduction": reduction, **options}
            loss, plain = exact(np.asarray(x), np.asarray(y), **options)
            assert_same([function(x, y, **options)], [loss])
            run = jax.jit(functools.partial(function, **options))
            got, back = jax.vjp(run, x, y)
            assert_same([got, *back(jnp.ones_like(got))], [loss, *plain])
            if reduction == "none":
                factors = jnp.array([2.0, -0.5], np.float32)  # exact
                scaled = [np.concatenate([z[:n] * 2, z[n:] * -0.5]) for z, n in zip(plain, (20, 45), strict=True)]
                assert_same(back(factors), [z.astype(dtype) for z in scaled])


@pytest.mark.parametrize("name", ["chamfer", "apml"])
@pytest.mark.parametrize("d", [2, 3])
def test_losses_of_a_batch_and_of_one_side(name, d):
    x, y = normal(4, 20, d), normal(4, 30, d, seed=1)
    expected, (dx, _) = getattr(gpu3d, name + "_value_and_grad")(np.asarray(x), np.asarray(y))
    loss, got = jax.jit(jax.value_and_grad(getattr(g, name)))(x, y)
    assert_same([loss, got], [expected, dx])
    each = jax.grad(lambda x: (getattr(g, name)(x, y, reduction="none") * 0.25).sum())(x)
    np.testing.assert_allclose(each, dx, rtol=1e-5, atol=1e-7)


def test_apml_with_too_little_room_is_nan():
    x, y = normal(60, 3), normal(50, 3, seed=1)
    loss, gradients = jax.value_and_grad(functools.partial(g.apml, max_entries=10), (0, 1))(x, y)
    assert all(bool(jnp.isnan(z).all()) for z in (loss, *gradients))


# ---- differences ---------------------------------------------------------------------------------------------------


def test_finite_differences():
    with wide():
        buckets, scopes = layout(16, (20, 5))
        made = functools.partial(normal, dtype=np.float64)
        q, k, v = (made(buckets.num_slots, 1, 8, seed=seed) for seed in range(3))

        def check(function, inputs, order=1):
            """JAX's check takes steps in NumPy."""
            run = functools.partial(jax.tree.map, jnp.asarray)
            check_grads(lambda *x: function(*run(x)), inputs, order, modes=["rev"], rtol=1e-6, atol=1e-6, eps=1e-6)

        check(lambda q, k, v: g.bucket_attention(q, k, v, buckets, scopes), (q, k, v))
        features, at = made(buckets.num_slots, 2), g.scatter(points(25, np.float64), buckets)
        for reduce in ("sum", "mean", "min", "max"):
            pool = functools.partial(g.bucket_pool, points=at, buckets=buckets, ratio=4, reduce=reduce)
            check(lambda x, pool=pool: pool(x).features, (features,))
        pooled = g.bucket_pool(features, at, buckets, ratio=4)
        check(lambda c, s: g.bucket_unpool(c, pooled, s), (made(*pooled.features.shape, seed=5), features))
        check(lambda x: g.gather(g.scatter(x, buckets) ** 2, buckets), (made(25, 2),), order=2)


@pytest.mark.parametrize("name", ["chamfer", "apml"])
def test_losses_against_differences(name):
    """The losses are float32: one direction, a long step, on separate clouds. APML's plan moves: it has more room."""
    options, room = ({"squared": True}, 0.02) if name == "chamfer" else ({}, 0.2)
    loss = functools.partial(getattr(g, name), **options)
    x, y = normal(30, 3), normal(40, 3, seed=1)
    step = 1e-3 * normal(30, 3, seed=2)
    slope = float((jax.grad(loss)(x, y) * step).sum())
    difference = float(loss(x + step, y) - loss(x - step, y)) / 2
    assert abs(slope - difference) < room * abs(difference)


# ---- jit, pytrees, scan, vmap --------------------------------------------------------------------------------------


def stage(x, at, lengths):
    """What a stage of a backbone does: every function, with the structure made, used and returned."""
    buckets = g.bucketize(at, 16, lengths=lengths)
    rows = g.scatter(x, buckets)
    q, k, v = jnp.moveaxis(rows.reshape(-1, 3, 2, 8), 1, 0)
    attended = g.bucket_attention(q, k, v, buckets, g.scopes(buckets, 2, shift=1)).reshape(-1, 16)
    pooled = g.bucket_pool(attended, g.scatter(at, buckets), buckets, reduce="max")
    again = g.bucket_attention(
        *(pooled.features.reshape(-1, 2, 8),) * 3, pooled.buckets, g.scopes(pooled.buckets, 2, stride=2)
    )
    out = g.gather(g.bucket_unpool(again.reshape(-1, 16), pooled, attended), buckets)
    return out, g.chamfer(out[:, :3], at, x_lengths=lengths, y_lengths=lengths), pooled


def stage_loss(x, at, lengths):
    out, near, _ = stage(x, at, lengths)
    loss = jnp.square(out).sum() + near
    return loss + g.apml(out[:, :3], at, pred_lengths=lengths, target_lengths=lengths)


def test_a_stage_under_jit():
    traced = []

    @functools.partial(jax.jit, static_argnames="lengths")
    def step(x, at, lengths):
        traced.append(lengths)
        return jax.value_and_grad(stage_loss)(x, at, lengths)

    for lengths in ((150, 3, 33, 1), (150, 3, 33, 1), (17, 18, 19, 100)):
        x, at = normal(sum(lengths), 48), points(sum(lengths))
        assert_same(step(x, at, lengths), jax.value_and_grad(stage_loss)(x, at, lengths), bits=False)
    assert len(traced) == 2  # other lengths, another program
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(stage_loss, static_argnums=2)), static_argnums=2)
    assert_same(remat(x, at, lengths), step(x, at, lengths), bits=False)


def test_structure_is_a_pytree():
    buckets, scopes = layout()
    traced = []

    @jax.jit
    def attend(q, buckets, scopes):
        traced.append(buckets.lengths)
        assert isinstance(buckets, gpu3d.Buckets) and isinstance(scopes, gpu3d.Scopes)
        return g.bucket_attention(q, q, q, buckets, scopes), scopes

    q = normal(buckets.num_slots, 2, 8)
    expected = gpu3d.bucket_attention(*(np.asarray(q),) * 3, plain(buckets), plain(scopes))
    for again in (buckets, g.bucketize(points() * 2, 16, lengths=LENGTHS)):
        out, same = attend(q, again, scopes)
        assert_same([out], [expected])
        assert jax.tree.structure(same) == jax.tree.structure(scopes)
    assert traced == [LENGTHS]
    attend(normal(layout(32)[0].num_slots, 2, 8), *layout(32))
    assert len(traced) == 2
    there = jax.device_put(gpu3d.bucketize(clouds.uniform(POINTS), 16, lengths=LENGTHS))  # a plain one's arrays
    np.testing.assert_array_equal(there.slot_to_point, buckets.slot_to_point)
    assert g.scatter(points(), there).shape == (buckets.num_slots, 3)
    pooled = g.bucket_pool(q.reshape(-1, 16), normal(buckets.num_slots, 3), buckets)
    assert pooled.argmember is None and len(jax.tree.leaves(pooled)) == 3 + 2 * 3
    moved = jax.tree.map(lambda x: x + 1, pooled)
    assert moved.buckets.lengths == pooled.buckets.lengths and bool((moved.members == pooled.members + 1).all())


def test_scan():
    """Layers as a scan, with the structure in its carry and one scope for each layer in what is scanned over."""
    buckets, _ = layout()
    windows = [g.scopes(buckets, 4, shift=shift) for shift in range(3)]
    tables = jax.tree.map(lambda *tables: jnp.stack(tables), *[w.table for w in windows])
    x = in_slots(buckets, 2, 8) * 0 + normal(buckets.num_slots, 2, 8)
    x = jnp.where((buckets.slot_to_point < 0)[:, None, None], 0, x)

    def layer(carry, table):
        x, buckets = carry
        window = gpu3d.Scopes(table, 4, 0, 1, buckets.bucket_size, buckets.bucket_offsets)
        return (x + g.bucket_attention(x, x, x, buckets, window), buckets), None

    def scanned(x):
        return jax.lax.scan(layer, (x, buckets), tables)[0][0]

    def unrolled(x):
        for window in windows:
            x = x + g.bucket_attention(x, x, x, buckets, window)
        return x

    (a, _, da), (b, _, db) = pull(jax.jit(scanned), x), pull(unrolled, x)
    assert_same([a, *da], [b, *db])


def test_vmap():
    at = jnp.stack([points(60, seed=seed) for seed in range(3)])
    rows = normal(3, 64, 3, 2, 8)

    def run(at, rows):
        buckets = g.bucketize(at, 16)
        q, k, v = jnp.moveaxis(rows, 1, 0)
        out = g.bucket_attention(q, k, v, buckets, g.scopes(buckets, 2))
        pooled = g.bucket_pool(out.reshape(-1, 16), g.scatter(at, buckets), buckets, reduce="max")
        back = g.gather(g.bucket_unpool(pooled.features, pooled), buckets)
        return buckets, back, g.chamfer(back[:, :3], at) + g.apml(back[:, :3], at)

    def loss(at, rows):
        _, back, near = run(at, rows)
        return jnp.square(back).sum() + near

    buckets, *results = jax.jit(jax.vmap(run))(at, rows)
    once, one_gradient = jax.jit(run), jax.jit(jax.grad(loss, 1))
    each = [once(a, r) for a, r in zip(at, rows, strict=True)]
    assert buckets.lengths == (60,)
    np.testing.assert_array_equal(buckets.slot_to_point, jnp.stack([one[0].slot_to_point for one in each]))
    assert_same(results, [jnp.stack([one[i] for one in each]) for i in (1, 2)])
    one_by_one = jnp.stack([one_gradient(a, r) for a, r in zip(at, rows, strict=True)])
    assert_same([jax.jit(jax.vmap(jax.grad(loss, 1)))(at, rows)], [one_by_one], bits=False)
    assert_same([jax.jit(jax.grad(lambda rows: jax.vmap(loss)(at, rows).sum()))(rows)], [one_by_one], bits=False)
    shared = jax.jit(jax.vmap(lambda r: run(at[0], r)[1]))(rows)  # one layout for all
    assert_same([shared[0]], [each[0][1]])


def test_export():
    """All that is static travels in the program: another process needs only this module."""
    buckets, scopes = layout()
    q = normal(buckets.num_slots, 2, 8)
    run = jax.jit(lambda q: g.bucket_attention(q, q, q, buckets, scopes))
    exported = jax.export.export(run, platforms=["cpu", "cuda"], disabled_checks=OUR_CALLS)(q)
    assert_same([exported.call(q)], [run(q)])
    assert re.search(r"custom_call @gpu3d.*bucket_attention.*150", exported.mlir_module().replace("\n", ""))


def test_threads():
    """XLA calls from the threads that call it, and from its own."""
    x = [points(400, seed=seed) for seed in range(6)]
    run = jax.jit(lambda x: g.bucketize(x, 16).slot_to_point)
    expected, got = [np.asarray(run(z)) for z in x], {}

    def work(i):
        with jax.default_device(jax.devices("cpu")[0]):
            got[i] = [np.asarray(run(x[(i + k) % 6])) for k in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        for k in range(30):
            np.testing.assert_array_equal(got[i][k], expected[(i + k) % 6])


@pytest.mark.parametrize("line", ["held = step(x, at)", "step(x, at)", "step(x, at); step(x + 1, at)"])
def test_the_interpreter_ends_while_programs_run(line):
    """Whether somebody holds their results or not."""
    done = run_here(
        "import jax, test_interop_jax as t\n"
        "x, at = t.normal(6000, 48), t.points(6000)\n"
        "step = jax.jit(jax.grad(lambda x, at: t.stage_loss(x, at, (6000,))))\n"
        f"{line}\nprint('the end')\n"
    )
    assert done.returncode == 0 and done.stdout == "the end\n", done.stderr


# ---- shard_map -----------------------------------------------------------------------------------------------------


def local_loss(x, weight, y):
    """Of the clouds of one device: x is split over devices, weight and y are not."""
    clouds_here = x.shape[0]
    buckets = g.bucketize(x, 16)
    rows = g.scatter(x.reshape(-1, 3) @ weight, buckets)
    q, k, v = jnp.moveaxis(rows.reshape(-1, 3, 2, 8), 1, 0)
    out = g.bucket_attention(q, k, v, buckets, g.scopes(buckets, 2, shift=1)).reshape(-1, 16)
    pooled = g.bucket_pool(out, g.scatter(x.reshape(-1, 3), buckets), buckets, reduce="max")
    back = g.gather(g.bucket_unpool(pooled.features, pooled, out), buckets)[:, :3].reshape(x.shape)
    many = jnp.concatenate([y] * clouds_here)
    return g.chamfer(back, many, reduction="none").sum() + g.apml(back, many, reduction="none").sum()


def check_sharded(count):
    """The loss and the gradients of what is split and of what is not, against one device on the joined batch."""
    devices = jax.devices()[:count]
    assert len(devices) == count
    mesh = Mesh(np.array(devices), ("clouds",))
    x, weight, y = normal(4, 50, 3), normal(3, 48, seed=1), normal(1, 50, 3, seed=2)

    def total(x, weight, y):
        return jax.lax.psum(local_loss(x, weight, y), "clouds")

    sharded = shard_map(total, mesh=mesh, in_specs=(P("clouds"), P(), P()), out_specs=P())
    got = jax.jit(jax.value_and_grad(sharded, (0, 1, 2)))(x, weight, y)
    expected = jax.jit(jax.value_and_grad(local_loss, (0, 1, 2)))(x, weight, y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert bool((b != 0).any())
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(abs(b).max()))
    only_y = shard_map(  # what varies meets what does not in one call
        lambda x, y: jax.lax.psum(g.chamfer(x[0], y, reduction="sum"), "clouds"),
        mesh=mesh,
        in_specs=(P("clouds"), P()),
        out_specs=P(),
    )
    some = x[:count]
    whole = sum(jax.grad(g.chamfer, 1)(z, y[0]) for z in some)
    np.testing.assert_allclose(jax.jit(jax.grad(only_y, 1))(some, y[0]), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shard_map is None, reason="this JAX has no jax.shard_map")
def test_shard_map_over_one_device():
    check_sharded(1)


def run_here(script, *arguments, **environment):
    here = Path(__file__).resolve().parent
    defaults = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "JAX_PLATFORMS": "cpu"}
    env = {**os.environ, **defaults, **environment}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(shard_map is None, reason="this JAX has no jax.shard_map")
def test_shard_map_over_two_devices():
    done = run_here(
        "import test_interop_jax as t; t.check_sharded(2)", XLA_FLAGS="--xla_force_host_platform_device_count=2"
    )
    assert done.returncode == 0, done.stderr


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused():
    buckets, scopes = layout()
    q, x = normal(buckets.num_slots, 2, 8), normal(40, 3)
    features = normal(buckets.num_slots, 3)
    pooled = g.bucket_pool(features, features, buckets)
    cases = (
        (q, lambda q: g.bucket_attention(q, q, q, buckets, scopes)),
        (features, lambda f: g.bucket_pool(f, features, buckets).features),
        (pooled.features, lambda f: g.bucket_unpool(f, pooled)),
        (x, lambda x: g.chamfer(x, x + 1)),
        (x, lambda x: g.apml(x, x + 1)),
    )
    match = r"gpu3d has no second derivatives: jax asked for the derivative of \w+ inside of a gradient\. Apply jax"
    for z, function in cases:

        def loss(z, function=function):
            return jnp.square(function(z)).sum()

        for derivative in (jax.hessian(loss), jax.jit(jax.grad(lambda z: jnp.square(jax.grad(loss)(z)).sum()))):
            with pytest.raises(RuntimeError, match=match):
                derivative(z)
        inner = jax.grad(lambda z: (z * jax.grad(loss)(jax.lax.stop_gradient(z))).sum())
        assert_same([inner(z)], [jax.grad(loss)(z)])


def test_bad_input():
    buckets, scopes = layout()
    q, x = normal(buckets.num_slots, 2, 8), normal(20, 3)
    host = gpu3d.bucketize(clouds.uniform(POINTS), 16, lengths=LENGTHS)
    flat = q.reshape(-1, 16)
    pooled = g.bucket_pool(flat, g.scatter(points(), buckets), buckets)
    half = q.astype(np.float16)
    for error, match, call in (
        (TypeError, r"q must be a JAX array, got ndarray: convert it", lambda: attend(np.asarray(q), q, q)),
        (TypeError, "scopes must be a JAX array, got ndarray", lambda: attend(q, q, q, host, gpu3d.scopes(host))),
        (TypeError, r"buckets must be a JAX array, got ndarray: .*jax\.device_put", lambda: g.scatter(points(), host)),
        (
            TypeError,
            "x must be a JAX array, got NeighborIndex",
            lambda: g.chamfer(gpu3d.neighbor_index(np.asarray(x)), x),
        ),
        (TypeError, "pred must be a JAX array, got list", lambda: g.apml([[0.0, 0.0, 0.0]], x)),
        (TypeError, r"buckets must be the Buckets that gpu3d\.bucketize returns, got int", lambda: g.gather(x, 3)),
        (TypeError, "pooled must be the Pooling", lambda: g.bucket_unpool(x, buckets)),
        (ValueError, "scopes were made for another layout", lambda: attend(q, q, q, buckets, layout(32)[1])),
        (ValueError, "q must have one row for each of the", lambda: attend(q[1:], q[1:], q[1:])),
        (ValueError, "head dimension D must be at most 128", lambda: attend(*(q[..., :4],) * 3)),
        (TypeError, "k must have the dtype of q, got float16 for float32", lambda: attend(q, half, q)),
        (TypeError, "scale must be a finite number", lambda: attend(q, q, q, scale="x")),
        (TypeError, "skip must have the dtype of child_f", lambda: unpool(skip=flat.astype(np.float16))),
        (ValueError, "skip must have the 16 columns", lambda: unpool(skip=flat[:, 1:])),
        (ValueError, "y must have one row for each of the", lambda: g.gather(x, buckets)),
        (ValueError, "x must have one row for each of the", lambda: g.scatter(x, buckets)),
        (ValueError, "got a sum of 19 for 20", lambda: g.bucketize(x, 16, lengths=[19])),
        (TypeError, "points must be float32, float64, float16", lambda: g.bucketize(x.astype(int), 16)),
        (ValueError, "must have shape", lambda: g.bucketize(x[0], 16)),
        (ValueError, "multiple of 16", lambda: g.bucketize(x, 17)),
        (ValueError, "hash must be one of", lambda: g.bucketize(x, hash="h")),
        (TypeError, "voxel_size must be a number", lambda: g.bucketize(x, voxel_size="x")),
        (ValueError, "ratio must be 2, 4 or 8, got 0", lambda: pool(ratio=0)),
        (ValueError, "reduce must be one of", lambda: pool(reduce="median")),
        (ValueError, "features must have shape", lambda: g.bucket_pool(q, q, buckets)),
        (ValueError, r"points must have shape \[num_slots, 3\]", lambda: g.bucket_pool(flat, flat, buckets)),
        (ValueError, r"x of shape .* already says its", lambda: g.chamfer(x[None], x[None], x_lengths=[20])),
        (ValueError, "clouds must not be empty", lambda: g.chamfer(x[:0], x)),
        (TypeError, "squared must be True or False", lambda: g.chamfer(x, x, squared=2)),
        (ValueError, "reduction must be one of", lambda: g.chamfer(x, x, reduction="max")),
        (ValueError, "as many coordinates", lambda: g.apml(x, x[:, :2])),
        (ValueError, "p_min must", lambda: g.apml(x, x, p_min=1.5)),
        (ValueError, "max_entries must not be negative", lambda: g.apml(x, x, max_entries=-1)),
        (ValueError, "size must be at least 1", lambda: g.scopes(buckets, 0)),
    ):

        def attend(q, k, v, b=buckets, s=scopes, **options):
            return g.bucket_attention(q, k, v, b, s, **options)

        def unpool(skip):
            return g.bucket_unpool(pooled.features, pooled, skip)

        def pool(**options):
            return g.bucket_pool(flat, flat[:, :3], buckets, **options)

        with pytest.raises(error, match=match):
            call()
    with pytest.raises(TypeError, match=r"lengths must be host integers, got a JAX array: .* static_argnames"):
        jax.jit(lambda x, n: g.bucketize(x, 16, lengths=n))(x, jnp.array([20]))
    with pytest.raises(TypeError, match="y_lengths must be host integers"):
        g.chamfer(x, x, y_lengths=jnp.array([20]))


def test_errors_of_the_program():
    """What shows only when it runs: an error of JAX with the plain call's words."""
    x = points(20)
    bad = jnp.where(jnp.arange(60).reshape(20, 3) == 7, jnp.nan, x)
    run = jax.jit(functools.partial(g.bucketize, bucket_size=16))
    for call in (lambda: g.bucketize(bad, 16), lambda: run(bad)):
        with pytest.raises(ERRORS, match=r"INVALID_ARGUMENT: points must be finite, got 1 of 20"):
            jax.block_until_ready(call())
    run(x)  # and go on
    unchecked = jax.jit(functools.partial(g.bucketize, bucket_size=16, check_finite=False))(bad)
    assert int((unchecked.slot_to_point >= 0).sum()) == 20


def test_errors_that_nobody_expects(monkeypatch):
    x = points(20)

    def wrong(*args, **options):
        return [np.zeros(3, np.int32)] * 3

    def broken(*args, **options):
        raise KeyError("a line of Python")

    def full(*args, **options):
        raise MemoryError

    for call, match in (
        (wrong, r"INTERNAL: .*RuntimeError: a result is int32 \[3\] where int32 \[32\] was announced"),
        (broken, r"(?s)INTERNAL: Traceback .*KeyError: 'a line of Python'"),
        (full, "RESOURCE_EXHAUSTED: out of memory"),
    ):
        monkeypatch.setitem(_xla.CALLS, "bucketize", call)
        _xla._parsed.cache_clear()
        with pytest.raises(ERRORS, match="(?s)" + match.removeprefix("(?s)")):
            jax.block_until_ready(g.bucketize(x, 16).slot_to_point)
    monkeypatch.undo()
    _xla._parsed.cache_clear()


def test_coordinates_take_no_gradient():
    features, at = normal(192, 3), points()

    def loss(at):
        buckets = g.bucketize(at, 16, lengths=LENGTHS)
        pooled = g.bucket_pool(g.scatter(features[:POINTS], buckets), g.scatter(at, buckets), buckets)
        return pooled.features.sum() + pooled.points.sum()

    assert not bool(jax.jit(jax.grad(loss))(at).any())


def test_docstrings():
    names = {name: getattr(g, name) for name in g.__all__}
    tests = [test for test in doctest.DocTestFinder().find(g, globs={"jax": jax, **names}) if test.examples]
    assert tests
    for test in tests:
        test_docs.run(test)
    assert all(x.__doc__.strip() for x in names.values())


def test_import_errors(tmp_path):
    """Without jax, and with an old one, the error names the extra; gpu3d alone imports neither."""
    for text, match in (
        ("raise ImportError", "needs jax: pip install"),
        ("__version__ = '0.5.3'\n__version_info__ = (0, 5, 3)\nnumpy = None", "needs jax >= 0.6, got 0.5.3"),
    ):
        (tmp_path / "jax.py").write_text(text)
        path = os.pathsep.join([str(tmp_path), str(Path(gpu3d.__file__).parent.parent)])
        done = run_here("import gpu3d.interop\nimport gpu3d.interop.jax", PYTHONPATH=path)
        assert done.returncode == 1 and match in done.stderr and "gpu3d[jax]" in done.stderr
        assert "import gpu3d.interop\n" not in done.stderr


# ---- XLA's ABI -----------------------------------------------------------------------------------------------------


def test_the_header():
    """The structures and numbers of _xla.py are those of the header that this jaxlib carries."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);", header)
    ours = [name for name, _ in _xla.Api._fields_[4:]]
    used = set(_xla.ARGUMENTS)
    assert len(functions) >= len(ours) and used < set(ours)
    assert all(theirs == name for theirs, name in zip(functions, ours, strict=False) if name in used)
    for name, value in (
        ("XLA_FFI_Extension_Metadata", _xla.METADATA),
        ("XLA_FFI_ExecutionStage_EXECUTE", _xla.EXECUTE),
        ("XLA_FFI_Error_Code_INVALID_ARGUMENT", _xla.INVALID_ARGUMENT),
        ("XLA_FFI_Error_Code_RESOURCE_EXHAUSTED", _xla.RESOURCE_EXHAUSTED),
        ("XLA_FFI_Error_Code_INTERNAL", _xla.INTERNAL),
        ("XLA_FFI_API_MAJOR", _xla.API_VERSION[0]),
        ("XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE", "1u << 0"),
    ):
        assert re.search(rf"\b{name}(?: =)? {value}\b", header), name
    assert _xla.RECORDABLE == 1 << 0
    (buffer,) = re.findall(r"struct XLA_FFI_Buffer {(.*?)\n};", header, re.DOTALL)
    assert re.findall(r"(\w+);", re.sub(r"//.*", "", buffer))[:4] == ["struct_size", "extension_start", "dtype", "data"]
    for structure, name in ((_xla.CallFrame, "CallFrame"), (_xla.Buffers, "Args"), (_xla.Attributes, "Attrs")):
        (body,) = re.findall(rf"struct XLA_FFI_{name} {{(.*?)\n}};", header, re.DOTALL)
        fields = re.findall(r"(\w+);", re.sub(r"//.*", "", body))
        renamed = {"extension_start": "extension", "ctx": "context", "args": "items", "attrs": "items"}
        if name == "CallFrame":
            renamed = {"extension_start": "extension", "ctx": "context"}
        expected = [renamed.get(field, field) for field in fields]
        assert [field for field, _ in structure._fields_] == expected[: len(structure._fields_)], name
    assert _xla.size_of(_xla.ARGUMENTS["Error_Create"]) == 28


class DeviceArray(np.ndarray):
    """Stands for a CuPy array: its memory has an address, and its own allocator."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])

    def copy(self):
        out = new_array(self.shape, self.dtype)
        out[...] = self
        return out


class Device:
    """XLA with a GPU, played by host memory: its functions, its frames, and as much of CuPy as _xla.py uses."""

    def __init__(self, room=1 << 20):
        self.room, self.blocks, self.calls, self.error = room, {}, [], None
        self.capturing, self.program, self.rehearsed, self.played = False, None, [], []
        self.functions = []
        self.api = _xla.Api()
        for name, structure in _xla.ARGUMENTS.items():
            function = _xla.FUNCTION(functools.partial(self.answer, name, structure))
            self.functions.append(function)
            setattr(self.api, name, ctypes.cast(function, ctypes.c_void_p).value)
        self.allocator = None
        cuda = SimpleNamespace(
            Device=lambda ordinal: self.entered("device", ordinal),
            Stream=SimpleNamespace(from_external=lambda s: self.entered("stream", s.__cuda_stream__()[1])),
            UnownedMemory=lambda ptr, size, owner, device: SimpleNamespace(ptr=ptr, size=size, device=device),
            MemoryPointer=lambda memory, offset: SimpleNamespace(ptr=memory.ptr + offset, size=memory.size),
            using_allocator=self.using,
            alloc=lambda size: self.allocator(size),
            runtime=SimpleNamespace(getDevice=lambda: 0, streamIsCapturing=lambda stream: self.capturing),
        )
        self.cupy = SimpleNamespace(cuda=cuda, ndarray=self.ndarray)

    def answer(self, name, structure, address):
        args = structure.from_address(address)
        assert args.struct_size == _xla.size_of(structure)
        self.calls.append(name)
        if name == "DeviceOrdinal_Get":
            args.ordinal = 3
        elif name == "Stream_Get":
            args.stream = 77
        elif name == "DeviceMemory_Allocate":
            if args.size > self.room:
                self.error = b"the device is full"
                return 5
            assert args.alignment == 16
            block = ctypes.create_string_buffer(b"\xcd" * args.size, args.size)
            args.data = ctypes.addressof(block)
            self.blocks[args.data] = block
        elif name == "DeviceMemory_Free":
            assert len(self.blocks.pop(args.data)) == args.size
        elif name == "Error_Create":
            self.error = args.message, args.code
            return 6
        elif name == "Error_GetMessage":
            args.message = self.error
        return None

    def entered(self, *what):
        """A context that may be entered again, as CuPy's streams may."""
        context = contextlib.ExitStack()
        self.calls.append(what)
        return context

    @contextlib.contextmanager
    def using(self, allocator):
        self.allocator = allocator
        yield
        self.allocator = None

    def ndarray(self, shape, dtype, memory=None):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = (memory or self.allocator(size)).ptr
        if not size:
            return np.empty(shape, dtype).view(DeviceArray)
        return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(address)).view(DeviceArray)

    def rehearse(self, call, arrays, device):
        self.rehearsed.append((arrays, device))
        return self.program

    def play(self, program, addresses, stream):
        assert program is self.program
        self.played.append((list(addresses), stream))

    def call(self, name, options, arrays, results, workspace=None, odd=0, handler=None, **fields):
        """Runs the CUDA handler, or another one: the buffers it wrote, and what it returned.

        `results` are shapes and dtypes; `fields` are other ones of the frame.
        """
        buffers = [at_address(np.full(shape, 205, dtype), odd) for shape, dtype in results]
        call = _xla.attribute(name, options, arrays, buffers, workspace)
        if workspace:
            buffers.append(at_address(np.full(workspace, 205, np.uint8)))
        keep, frame = [], _xla.CallFrame()
        for side, list_of in ((arrays, frame.args), (buffers, frame.rets)):
            addresses = (ctypes.c_void_p * len(side))()
            for i, x in enumerate(side):
                packed = ctypes.create_string_buffer(struct.pack("<QQi4xQqQ", 48, 0, 0, x.ctypes.data, 0, 0))
                addresses[i] = ctypes.addressof(packed)
                keep.append(packed)
            list_of.size, list_of.items = len(side), ctypes.cast(addresses, ctypes.POINTER(_xla.WORDS))
            keep.append(addresses)
        text = ctypes.create_string_buffer(call.encode())
        span = (ctypes.c_uint64 * 2)(ctypes.addressof(text), len(call))  # PTR, LEN
        spans = (ctypes.c_void_p * 1)(ctypes.addressof(span))
        frame.attrs.size, frame.attrs.items = 1, ctypes.cast(spans, ctypes.POINTER(_xla.WORDS))
        frame.api, frame.stage = ctypes.addressof(self.api), _xla.EXECUTE
        for field, value in fields.items():
            setattr(frame, field, value)
        returned = (handler or _xla.handler("CUDA"))(ctypes.addressof(frame))
        return buffers, returned


def at_address(x, odd=0):
    """The same array where 16 divides its address with this remainder."""
    memory = np.empty(x.nbytes + 32, np.uint8)
    begin = (odd - memory.ctypes.data) % 16
    out = memory[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def new_array(shape, dtype=np.float32):
    return sys.modules["cupy"].ndarray(shape, np.dtype(dtype))


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setitem(sys.modules, "cupy", device.cupy)
    monkeypatch.setattr(_replay, "rehearse", device.rehearse)
    monkeypatch.setattr(_replay, "play", device.play)
    caches = _xla._stream, _xla._function, _xla._parsed, _xla._rehearsed, _xla._played
    for cache in caches:
        cache.cache_clear()
    yield device
    for cache in caches:
        cache.cache_clear()


def run_on(device, monkeypatch, function, results, *arrays, **options):
    monkeypatch.setitem(_xla.CALLS, "test", function)
    return device.call("test", {"factor": 2.0}, list(arrays), results, **options)


def test_results_are_born_in_xlas_buffers(device, monkeypatch):
    """In the order they are allocated; on XLA's device and stream; workspaces go back."""

    def call(x, factor):
        a, b, c = new_array((4,)), new_array((4,)), new_array((2, 3))
        work = new_array((100,))
        assert (np.asarray(work).view(np.uint8) == 0xCD).all() and work.data.ptr in device.blocks
        a[...], b[...], c[...] = x * factor, x + 1, 7
        assert len(device.blocks) == 1
        return a, b, c

    x = np.arange(4, dtype=np.float32)
    shapes = [((4,), np.float32), ((4,), np.float32), ((2, 3), np.float32)]
    (a, b, c), returned = run_on(device, monkeypatch, call, shapes, x)
    assert returned is None and not device.blocks
    np.testing.assert_array_equal(a, x * 2)
    np.testing.assert_array_equal(b, x + 1)
    assert (c == 7).all()
    assert ("device", 3) in device.calls and ("stream", 77) in device.calls
    assert device.calls.count("DeviceMemory_Allocate") == 1


def test_results_that_were_born_elsewhere(device, monkeypatch):
    """Exchanged, a view of a wider one, one of its workspace, one that is an argument, an empty one."""

    def call(x, factor):
        b, a = new_array((4,)), new_array((4,))
        a[...], b[...] = x * factor, x + 1
        wide = new_array((2, 3))
        wide[...] = np.arange(6).reshape(2, 3)
        return a, b, wide[:, :2], x, new_array((0, 3))

    x = np.arange(4, dtype=np.float32)
    shapes = [(shape, np.float32) for shape in ((4,), (4,), (2, 2), (4,), (0, 3))]
    (a, b, c, same, empty), returned = run_on(device, monkeypatch, call, shapes, x)
    assert returned is None and not device.blocks and empty.shape == (0, 3)
    np.testing.assert_array_equal(a, x * 2)
    np.testing.assert_array_equal(b, x + 1)
    np.testing.assert_array_equal(c, [[0, 1], [3, 4]])
    np.testing.assert_array_equal(same, x)


def test_a_view_in_anothers_buffer(device, monkeypatch):
    """dx of 2-D points is a part of a 3-D one, which may have the size of dy."""

    def call(x, factor):
        dx, dy = new_array((6, 3)), new_array((9, 3))
        dx[...], dy[...] = np.arange(18).reshape(6, 3), -np.arange(27).reshape(9, 3)
        return dx[:, 1:], dy[:, :2]

    (dx, dy), returned = run_on(
        device, monkeypatch, call, [((6, 2), np.float32), ((9, 2), np.float32)], np.zeros(1, np.float32)
    )
    assert returned is None
    np.testing.assert_array_equal(dx, np.arange(18).reshape(6, 3)[:, 1:])
    np.testing.assert_array_equal(dy, -np.arange(27).reshape(9, 3)[:, :2])


def test_errors_on_a_device(device, monkeypatch):
    """Workspaces go back all the same."""

    def bad(x, factor):
        new_array((50,))
        raise ValueError("x must be something else.")

    def big(x, factor):
        return [new_array((1 << 20,))]

    x, results = np.zeros(4, np.float32), [((4,), np.float32)]
    _, returned = run_on(device, monkeypatch, bad, results, x)
    assert returned == 6 and device.error == (b"x must be something else.", _xla.INVALID_ARGUMENT)
    assert not device.blocks
    _, returned = run_on(device, monkeypatch, big, results, x)
    message, code = device.error
    assert returned == 6 and code == _xla.RESOURCE_EXHAUSTED and b"the device is full" in message
    assert "Error_Destroy" in device.calls


@pytest.mark.parametrize("workspace", [None, 64, 72])
def test_calls_are_played_in_xlas_memory(device, monkeypatch, workspace):
    """Not the plain call: arguments, results, and the workspace that the frame brings, or that XLA is asked for."""
    device.program = _replay.Program((), 64)
    x = at_address(np.ones(4, np.float32), 4)
    for _ in range(3):
        buffers, returned = run_on(device, monkeypatch, pytest.fail, [((4,), np.float32)], x, workspace=workspace)
        (*addresses, work), stream = device.played.pop()
        assert returned is None and stream == 77 and not device.blocks
        assert addresses == [x.ctypes.data, buffers[0].ctypes.data]
        assert workspace is None or work == buffers[1].ctypes.data
    assert device.calls.count("DeviceMemory_Allocate") == (3 if workspace is None else 0)
    assert device.rehearsed == [([_replay.Array((4,), np.dtype(np.float32), 4)], 3)]  # once, of such an address


def test_what_is_known_is_played_without_python(device, monkeypatch):
    """By play.c, where all is as it was when Python played it; else Python does what there is to do."""
    driver = stand_in(monkeypatch)
    device.cupy.cuda.runtime.memsetAsync = None
    monkeypatch.setitem(sys.modules, "cupy.cuda", device.cupy.cuda)
    monkeypatch.setitem(_xla.CALLS, "test", lambda *x, factor: [new_array((4,))])
    kernel = _kernel([])
    taken = [_taken(kernel, base)._replace(given=2) for base in (10**12, 10**13)]
    device.program = _replay.program_of(*taken)
    driver.device, x = 3, at_address(np.ones(4, np.float32))
    call = functools.partial(
        device.call, "test", {"factor": 2.0}, results=[((4,), np.float32)], workspace=device.program.workspace
    )
    native = functools.partial(call, handler=_native.handler(_xla.handler("CUDA", True)))
    assert native([x])[1] is None and len(device.played) == 1 and not driver.steps
    for _ in range(2):
        (out, work), returned = native([x])
        cleared, (_, _, stream, arguments, _) = driver.steps
        assert returned is None and stream == 77 and cleared[0] == out.ctypes.data + 32
        assert struct.unpack("<QQQQiQ", arguments)[:2] == (x.ctypes.data + 8, out.ctypes.data + 16)
        assert struct.unpack("<QQQQiQ", arguments)[3] == work.ctypes.data
        driver.steps.clear()
    assert len(device.played) == 1
    other = at_address(np.ones(4, np.float32), 4)
    for arrays, options in (
        ([other], {}),
        ([x, x], {}),
        ([x], {"odd": 8}),
        ([x], {"stage": _xla.EXECUTE - 1}),
        ([x], {"extension": ctypes.addressof(_xla.Extension(type=99))}),
    ):
        device.played.clear()
        native(arrays, **options)
        assert not driver.steps and bool(device.played) == ("stage" not in options and "odd" not in options)
    driver.device = 2  # the current one; XLA's is 3
    native([x])
    assert not driver.steps
    driver.device, driver.status = 3, 700
    device.played.clear()
    assert native([x])[1] is None and len(driver.steps) == 1 and device.played  # which would raise the error


def test_calls_that_cannot_be_played(device, monkeypatch):
    """Results at an odd address, or too little workspace: the plain call; and an error where XLA records."""

    def call(x, factor):
        out = new_array((4,))
        out[...] = factor * x
        return [out]

    device.program = _replay.Program((), 64)
    x, results = at_address(np.ones(4, np.float32)), [((4,), np.float32)]
    for options in ({"workspace": 56}, {"workspace": 64, "odd": 4}, {"odd": 4}):
        device.capturing = False
        (out, *_), returned = run_on(device, monkeypatch, call, results, x, **options)
        assert returned is None and (out == 2).all() and not device.played and not device.blocks
        device.capturing = "workspace" in options
        _, returned = run_on(device, monkeypatch, call, results, x, **options)
        assert returned == (6 if device.capturing else None)
        assert returned is None or b"test cannot be recorded" in device.error[0]


def test_a_call_whose_values_are_looked_at_is_not_played(device, monkeypatch):
    def call(x, check_finite):
        out = new_array((4,))
        out[...] = x
        return [out]

    device.program = _replay.Program((), 0)
    monkeypatch.setitem(_xla.CALLS, "test", call)
    x = at_address(np.ones(4, np.float32))
    (out,), returned = device.call("test", {"check_finite": True}, [x], [((4,), np.float32)])
    assert returned is None and (out == 1).all() and not device.rehearsed and not device.played


def test_a_workspace_among_the_results(monkeypatch):
    """As where there is a GPU: gradients, vmap, shards and the CPU take no notice of it."""
    asked = []

    def workspace(name, options, args, rets):
        asked.append(name)
        return 100 if len(asked) % 3 else 0

    def run():
        x, y, lengths = normal(60, 3), normal(50, 3, seed=1), (150, 3, 33, 1)
        stage = jax.jit(jax.value_and_grad(stage_loss), static_argnums=2)(normal(187, 48), points(187), lengths)
        each = jax.vmap(jax.grad(g.chamfer), (0, None))(jnp.stack([x, x + 1]), y)
        return [*stage, each, *jax.grad(g.apml, (0, 1))(x, y)]

    expected = run()
    monkeypatch.setattr(_xla, "workspace", workspace)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    assert_same(run(), expected)
    assert set(asked) > {"bucketize", "bucket_attention_backward", "bucket_pool_backward", "apml_value_and_grad"}
    if shard_map is not None:
        check_sharded(1)
    jax.clear_caches()


def test_other_stages_and_the_metadata():
    metadata, extension = _xla.Metadata(traits=9), _xla.MetadataExtension()
    extension.base.type, extension.metadata = _xla.METADATA, ctypes.pointer(metadata)
    frame = _xla.CallFrame()
    frame.extension = ctypes.addressof(extension)
    for platform in ("cpu", "CUDA"):
        for recordable in (False, True):
            metadata.traits = 9
            assert _xla.handler(platform, recordable)(ctypes.addressof(frame)) is None
            said = metadata.api_version.major, metadata.api_version.minor, metadata.traits
            assert said == (*_xla.API_VERSION, int(recordable))
        other = _xla.CallFrame(stage=_xla.EXECUTE - 1)
        assert _xla.handler(platform)(ctypes.addressof(other)) is None
