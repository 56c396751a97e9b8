# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.jax on the CPU: checks of every op in programs, XLA's interface, and errors."""

from __future__ import annotations

import contextlib
import ctypes
import doctest
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import clouds
import ml_dtypes
import numpy as np
import pytest
import test_docs

import gpu3d
from gpu3d import _arrays, neighbors
from gpu3d.chamfer import points_arrays, points_backward_arrays
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import DEVICES

jax = pytest.importorskip("jax")
from jax import export  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from gpu3d.interop import jax as g  # noqa: E402
from gpu3d.interop.jax import handler, program, xla_ffi  # noqa: E402
from gpu3d.interop.jax.calls import CALLS  # noqa: E402

LENGTHS = (150, 0, 33, 1)
POINTS = sum(LENGTHS)
DTYPES = ["float16", "bfloat16", "float32", "float64"]
ERRORS = getattr(jax.errors, "JaxRuntimeError", RuntimeError)
OUR_CALLS = [export.DisabledSafetyCheck.custom_call(program.TARGET)]


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Run these tests on the CPU even if there is a GPU; test_interop_jax_gpu.py has the tests for it."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@contextlib.contextmanager
def wide(on=True):
    """Enable float64, which JAX has only on request."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64():
    with wide():
        yield


def numbers(*shape, dtype="float32", seed=0):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.random.default_rng(seed).standard_normal(shape).astype(kind)


def points(n=POINTS, dtype="float32", seed=0):
    return clouds.uniform(n, seed=seed).astype(numbers(0, dtype=dtype).dtype)


def layout(bucket_size=16, lengths=LENGTHS, asarray=np.asarray):
    buckets = gpu3d.bucketize(asarray(points(sum(lengths))), bucket_size, lengths=lengths)
    return buckets, gpu3d.scopes(buckets, 2, shift=1)


def on_host(x):
    return x.get() if hasattr(x, "get") else np.asarray(x)


def assert_same(got, expected):
    """Assert that all arrays have the same bits."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    wrong = {}
    for i, (a, b) in enumerate(zip(map(on_host, got), map(on_host, expected), strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.size < 2 or (a != 0).any()
        at = np.flatnonzero(a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8))
        if len(at):
            wrong[i] = f"{len(at)} of {a.nbytes} bytes, the first at {at[0]}"
    assert not wrong


# ---- every op ------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """A plain call, which inside a program is that of gpu3d.interop.jax, and its gradient."""

    run: Callable[..., Any]  # inputs -> a tree of arrays, the differentiable one first
    inputs: tuple[Any, ...]
    backward: Callable[..., Any] | None = None  # gradient of the result -> those of the inputs; None: zeros
    second: bool = False  # it has second derivatives


def op_bucketize(dtype, asarray, **options):
    run = functools.partial(gpu3d.bucketize, bucket_size=16, lengths=LENGTHS, **options)
    return Op(run, (asarray(points(dtype=dtype)),))


def op_farthest(dtype, asarray):
    run = functools.partial(gpu3d.farthest_points, k=9, lengths=LENGTHS)
    return Op(run, (asarray(points(dtype=dtype)),))


def op_scatter(dtype, asarray):
    buckets, _ = layout(asarray=asarray)
    run, back = functools.partial(buckets.scatter, fill=7.5), buckets.gather
    return Op(run, (asarray(numbers(POINTS, 2, 3, dtype=dtype)),), lambda dy: [back(dy)], second=True)


def op_gather(dtype, asarray):
    buckets, _ = layout(asarray=asarray)
    inputs = (asarray(numbers(buckets.num_slots, dtype=dtype)),)
    return Op(buckets.gather, inputs, lambda dx: [buckets.scatter(dx)], second=True)


def op_attention(dtype, asarray, scale=None):
    buckets, scopes = layout(asarray=asarray)
    q, k, v = map(asarray, numbers(3, buckets.num_slots, 2, 8, dtype=dtype))
    run = functools.partial(gpu3d.bucket_attention, buckets=buckets, scopes=scopes, scale=scale, return_lse=True)

    def backward(dout):
        return gpu3d.bucket_attention_backward(dout, q, k, v, *run(q, k, v), buckets, scopes, scale=scale)

    return Op(run, (q, k, v), backward)


def op_pool(dtype, asarray, ratio=4, reduce="mean"):
    buckets, _ = layout(asarray=asarray)
    features, at = asarray(numbers(buckets.num_slots, 5, dtype=dtype)), buckets.scatter(asarray(points()))
    pool = functools.partial(gpu3d.bucket_pool, buckets=buckets, ratio=ratio, reduce=reduce)

    def run(features, at):
        pooled = pool(features, at)
        return pooled.features, pooled.points, pooled.buckets, pooled.members, pooled.argmember

    return Op(run, (features, at), lambda dchild: (gpu3d.bucket_pool_backward(dchild, pool(features, at)), None))


def op_unpool(dtype, asarray, skip=True):
    buckets, _ = layout(asarray=asarray)
    at = buckets.scatter(asarray(points()))
    pooled = gpu3d.bucket_pool(at, at, buckets, ratio=2)
    rows = numbers(len(pooled.features), 5, dtype=dtype), numbers(buckets.num_slots, 5, dtype=dtype, seed=1)

    def run(child, *skip):
        return gpu3d.bucket_unpool(child, pooled, *skip)

    inputs = tuple(map(asarray, rows[: 1 + skip]))
    return Op(run, inputs, lambda dout: gpu3d.bucket_unpool_backward(dout, pooled)[: 1 + skip])


def op_normals(dtype, asarray, **options):
    run = functools.partial(gpu3d.normals, k=5, lengths=LENGTHS, **options)
    return Op(run, (asarray(points(dtype=dtype)),))


SIDES = (20, 40), (45, 5)


def two_sides(dtype, asarray, d=3):
    return asarray(numbers(60, d, dtype=dtype)), asarray(numbers(50, d, dtype=dtype, seed=1))


def op_knn(dtype, asarray, d=3):
    run = functools.partial(gpu3d.knn, k=5, query_lengths=SIDES[0], lengths=SIDES[1])
    x, y = two_sides(dtype, asarray, d)

    def backward(ddistances):
        return neighbors.knn_backward_arrays(*read(ddistances, x, y, *run(x, y)))

    return Op(run, (x, y), backward)


def op_nearest(dtype, asarray):
    options = {"query_lengths": SIDES[0], "lengths": SIDES[1], "max_neighbors": 6}
    run = functools.partial(gpu3d.radius_search, radius=1.0, **options)
    x, y = two_sides(dtype, asarray)

    def backward(ddistances):
        return neighbors.knn_backward_arrays(*read(ddistances, x, y, *run(x, y)))

    return Op(run, (x, y), backward)


def op_radius(dtype, asarray, max_entries=1000):
    options = {"query_lengths": SIDES[0], "lengths": SIDES[1], "max_entries": max_entries}
    search = functools.partial(gpu3d.radius_search, radius=1.0, **options)
    x, y = two_sides(dtype, asarray)

    def run(query, points):
        found = search(query, points)
        return found.distances, found

    def backward(ddistances):
        return neighbors.radius_backward_arrays(*read(ddistances, x, y, *search(x, y)))

    return Op(run, (x, y), backward)


def read(*arrays):
    return [_arrays.read(x, "an array") for x in arrays]


def op_points(dtype, asarray, **options):
    x, y = two_sides(dtype, asarray)
    lengths = dict(zip(("x_lengths", "y_lengths"), SIDES, strict=True))
    checked = *SIDES, options.get("squared", False), options["direction"]

    def run(x, y):
        found = gpu3d.chamfer(x, y, reduction="points", **lengths, **options)
        return found.x if found.y is None else found.y

    def backward(ddistances):
        saved = points_arrays(*read(x, y), *checked)
        return points_backward_arrays(*read(ddistances, x, y, *saved), *checked)

    return Op(run, (x, y), backward)


def op_loss(name, dtype, asarray, d=3, **options):
    x, y = two_sides(dtype, asarray, d)
    names = ("x_lengths", "y_lengths") if name == "chamfer" else ("pred_lengths", "target_lengths")
    options = {**dict(zip(names, SIDES, strict=True)), "reduction": "mean", **options}

    def backward(dloss):
        _, gradients = getattr(gpu3d, name + "_value_and_grad")(x, y, **options)
        each = [dloss[b] if dloss.ndim else dloss for b in range(2)]
        cut = [(z[: n[0]], z[n[0] :]) for z, n in zip(gradients, SIDES, strict=True)]
        return [[(part * f).astype(part.dtype) for part, f in zip(parts, each, strict=True)] for parts in cut]

    return Op(functools.partial(getattr(gpu3d, name), **options), (x, y), backward)


OPS: dict[str, Callable[..., Op]] = {
    "bucketize": op_bucketize,
    "bucketize probe": functools.partial(op_bucketize, hash="xor_mod", balance="probe", seed=3),
    "bucketize cell": functools.partial(op_bucketize, voxel_size=0.01),
    "bucketize per axis": functools.partial(op_bucketize, voxel_size="per_axis"),
    "bucketize robust": functools.partial(op_bucketize, bounds="robust"),
    "bucketize bounds": functools.partial(op_bucketize, bounds=(-1, (1, 2, 3))),
    "farthest": op_farthest,
    "scatter": op_scatter,
    "gather": op_gather,
    "attention": op_attention,
    "attention scaled": functools.partial(op_attention, scale=0.3),
    "pool": op_pool,
    "pool sum": functools.partial(op_pool, ratio=8, reduce="sum"),
    "pool max": functools.partial(op_pool, ratio=2, reduce="max"),
    "pool min": functools.partial(op_pool, reduce="min"),
    "unpool": op_unpool,
    "unpool alone": functools.partial(op_unpool, skip=False),
    "knn": op_knn,
    "knn 2-D": functools.partial(op_knn, d=2),
    "nearest": op_nearest,
    "normals": op_normals,
    "normals seen": functools.partial(op_normals, viewpoint=(0, 1.5, -3)),
    "radius": op_radius,
    "radius too many": functools.partial(op_radius, max_entries=10),
    "chamfer": functools.partial(op_loss, "chamfer"),
    "chamfer each": functools.partial(op_loss, "chamfer", squared=True, reduction="none"),
    "chamfer 2-D": functools.partial(op_loss, "chamfer", d=2, reduction="sum"),
    "chamfer one": functools.partial(op_loss, "chamfer", direction="x_to_y", reduction="sum"),
    "chamfer points": functools.partial(op_points, direction="x_to_y"),
    "chamfer points squared": functools.partial(op_points, direction="y_to_x", squared=True),
    "apml": functools.partial(op_loss, "apml"),
    "apml each": functools.partial(op_loss, "apml", symmetrize="min", reduction="none", iterations=3),
    "apml 2-D": functools.partial(op_loss, "apml", d=2, reduction="sum", max_entries=700),
}
every_op = pytest.mark.parametrize("name", OPS)
one_of_each = pytest.mark.parametrize("name", [name for name in OPS if " " not in name])
DIFFERENTIABLE = [name for name in OPS if not name.startswith(("bucketize", "farthest", "normals"))]


def first(result):
    return jax.tree.leaves(result)[0]


def cotangent(result, dtype):
    """A random gradient; powers of two for losses, or 1 where float16 would round small gradients twice."""
    if result.size > 2:
        return numbers(*result.shape, dtype=str(result.dtype), seed=9)
    values = np.array([1.0, -1.0] if dtype == "float16" else [2.0, -0.5], result.dtype)
    return values[: result.size].reshape(result.shape)


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_calls_bits(name, dtype):
    """Plain calls in a program are those of gpu3d.interop.jax and give the same bits."""
    with wide():
        op = OPS[name](dtype, np.asarray)
        expected = op.run(*op.inputs)
        got = jax.jit(op.run)(*map(jnp.asarray, op.inputs))
        assert isinstance(got, jax.Array) or type(got) is type(expected)
        assert_same(got, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(name, dtype):
    with wide():
        op = OPS[name](dtype, np.asarray)
        result, gradients = pulled(op, dtype)
        expected = op.backward(cotangent(result, dtype))
        assert_same(result, first(op.run(*op.inputs)))
        check_gradients(gradients, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_save_nothing_empty(name):
    """shard_map shards what a gradient saves, so that each array must have rows."""
    op = OPS[name]("float32", np.asarray)
    for function in (op.run, jax.jit(op.run)):
        _, back = jax.vjp(lambda *x, function=function: first(function(*x)), *map(jnp.asarray, op.inputs))
        assert all(x.size for x in jax.tree.leaves(back))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "min"])
def test_what_a_gradient_of_pool_saves(reduce):
    """It saves the members and, for min and max, which of them it is. It keeps neither features nor points alive."""
    buckets, _ = layout(asarray=jnp.asarray)
    rows = buckets.scatter(jnp.asarray(points()))
    pooled, back = jax.vjp(lambda x: g.bucket_pool(x, rows, buckets, reduce=reduce), rows)
    assert_same(jax.tree.leaves(back), [x for x in (pooled.members, pooled.argmember) if x is not None])


def pulled(op, dtype):
    """The first result, and the gradients of the inputs for its cotangent."""
    result, back = jax.vjp(lambda *x: first(op.run(*x)), *map(jnp.asarray, op.inputs))
    return result, back(jnp.asarray(cotangent(result, dtype)))


def check_gradients(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert not bool(a.any())
        else:
            assert_same(a, np.concatenate([on_host(x) for x in b]) if isinstance(b, list) else b)


@one_of_each
def test_vmap(name, x64):
    op = OPS[name]("float32", np.asarray)
    stacked = [jnp.stack([x, x[::-1]]) for x in map(jnp.asarray, op.inputs)]
    each = [op.run(*[np.asarray(x[i]) for x in stacked]) for i in range(2)]
    got = jax.jit(jax.vmap(op.run))(*stacked)
    for i in range(2):
        assert_same([x[i] for x in jax.tree.leaves(got)], each[i])
    if op.backward:
        gradient = jax.grad(lambda *x: first(op.run(*x)).sum())
        got = jax.jit(jax.vmap(gradient))(*stacked)
        assert_same(got[0], gradient(*[x[0] for x in stacked]))


@one_of_each
def test_export(name, x64):
    """An exported program carries all static options, and the same program runs on GPUs."""
    op = OPS[name]("float32", np.asarray)
    exported = export.export(jax.jit(op.run), platforms=["cpu", "cuda"], disabled_checks=OUR_CALLS)(*op.inputs)
    assert_same(exported.call(*op.inputs), op.run(*op.inputs))
    if not op.second:  # these ops are JAX's own
        text = exported.mlir_module().replace("\n", "")
        assert re.search(r"custom_call @gpu3d.*(150|60|20).*tensor<\d+xui8>", text)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name):
    op = OPS[name]("float32", np.asarray)
    x, *rest = map(jnp.asarray, op.inputs)

    def loss(x):
        return jnp.square(first(op.run(x, *rest))).sum()

    inner = jax.grad(lambda z: (z * jax.grad(loss)(jax.lax.stop_gradient(z))).sum())
    np.testing.assert_allclose(inner(x), jax.grad(loss)(x), rtol=1e-6)
    twice = jax.jit(jax.grad(lambda z: jnp.square(jax.grad(loss)(z)).sum()))
    if op.second:
        assert bool((twice(x) != 0).any())
        return
    match = r"gpu3d has no second derivatives: jax asked for the derivative of \w+ inside of a gradient\. Apply jax"
    for derivative in (jax.hessian(loss), twice):
        with pytest.raises(RuntimeError, match=match):
            derivative(x)


def test_functions_of_the_interop():
    """Each function also takes concrete arrays and gives the results of the plain call."""
    buckets, scopes = layout()
    there = jax.device_put(buckets)
    x, q = numbers(POINTS, 3), numbers(buckets.num_slots, 2, 8)
    assert_same(g.bucketize(jnp.asarray(points()), 16, lengths=LENGTHS), buckets)
    assert_same(g.scopes(there, 2, shift=1), scopes)
    assert_same(g.scatter(jnp.asarray(x), there, 3), buckets.scatter(x, 3))
    assert_same(g.gather(jnp.asarray(q), there), buckets.gather(q))
    with pytest.raises(TypeError, match="x must be a JAX array, got ndarray"):
        g.scatter(x, there)
    out = g.bucket_attention(*(jnp.asarray(q),) * 3, there, scopes)
    assert_same(out, gpu3d.bucket_attention(q, q, q, buckets, scopes))
    assert set(g.__all__) == {
        *(name for name in CALLS if "backward" not in name and name != "chamfer_points"),  # a reduction of chamfer
        "flash3d",
        "gather",
        "scatter",
        "scopes",
    }


def test_lse_takes_no_gradient():
    op = op_attention("float32", np.asarray)
    q, k, v = map(jnp.asarray, op.inputs)
    assert not bool(jax.grad(lambda q: op.run(q, k, v)[1].sum())(q).any())


def test_coordinates_take_no_gradient():
    features, at = jnp.asarray(numbers(POINTS, 3)), jnp.asarray(points())

    def loss(at):
        buckets = gpu3d.bucketize(at, 16, lengths=LENGTHS)
        pooled = gpu3d.bucket_pool(buckets.scatter(features), buckets.scatter(at), buckets)
        return pooled.features.sum() + pooled.points.sum()

    assert not bool(jax.jit(jax.grad(loss))(at).any())


@pytest.mark.parametrize("options", [{"max_neighbors": 6}, {"max_neighbors": 40}, {"max_entries": 900}], ids=str)
def test_radii(options):
    x, y = two_sides("float32", np.asarray)
    radii = np.linspace(0, 1.5, 60, dtype=np.float32)
    run = functools.partial(gpu3d.radius_search, query_lengths=SIDES[0], lengths=SIDES[1], **options)
    arrays = [jnp.asarray(z) for z in (x, y, radii)]
    for search in (run, jax.jit(run)):
        got, expected = search(*arrays), run(x, y, radii)
        assert_same(got.indices, expected.indices)
        assert_same(got.distances, expected.distances)

    def total(*arrays):
        found = run(*arrays)
        return jnp.where(found.indices < 0, 0, found.distances).sum()

    dx, dy, dradii = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
    assert bool(dx.any()) and bool(dy.any()) and not bool(dradii.any())  # the gradient stops at the radii
    with pytest.raises(Exception, match=r"radius must not be negative or NaN, got radius\[0\] = -1.0"):
        jax.block_until_ready(jax.jit(run)(*arrays[:2], arrays[2] - 1))
    with pytest.raises(ValueError, match=r"one for each query, \[60\], got an array of shape \[59\]"):
        jax.jit(run)(*arrays[:2], arrays[2][1:])


def test_without_oneself():
    x, _ = two_sides("float32", np.asarray)
    options = {"query_lengths": SIDES[0], "lengths": SIDES[0], "exclude_self": True}
    for search in (lambda z: gpu3d.knn(z, z, 30, **options), lambda z: gpu3d.radius_search(z, z, 1.0, **options)):
        got, expected = jax.jit(search)(jnp.asarray(x)), search(x)
        count = len(expected.indices)
        assert_same(got.indices[:count], expected.indices)
        assert_same(got.distances[:count], expected.distances)


@pytest.mark.parametrize("on", [False, True])
def test_offsets_of_radius_search(on):
    """Offsets are int64 if JAX has it, and negative if max_entries is too small."""
    x = numbers(60, 3)
    for room in (3600, 5):
        expected = gpu3d.radius_search(x, x, 1.0, max_entries=room)
        with wide(on):
            got = jax.jit(functools.partial(gpu3d.radius_search, radius=1.0, max_entries=room))(x, x)
            assert got.offsets.dtype == (np.int64 if on else np.int32)
            np.testing.assert_array_equal(got.offsets, expected.offsets)


def test_room_by_default():
    """The default of max_entries is all pairs, if they are few."""
    x = numbers(4, 30, 3)
    got = jax.jit(functools.partial(gpu3d.radius_search, radius=np.inf))(x, x[:, :20])
    assert got.indices.shape == (4 * 30 * 20,) and bool((got.indices >= 0).all())
    run = functools.partial(gpu3d.radius_search, radius=0.0)
    assert jax.eval_shape(run, *(jnp.zeros((2000, 3)),) * 2).indices.shape == (2**18,)
    assert jax.eval_shape(run, *(jnp.zeros((20_000, 3)),) * 2).indices.shape == (16 * 40_000,)
    loss, gradients = jax.value_and_grad(functools.partial(gpu3d.apml, max_entries=10), (0, 1))(x[0], x[1] + 0.1)
    assert all(bool(jnp.isnan(z).all()) for z in (loss, *gradients))


def test_batches_and_nothing():
    x = jnp.asarray(points(120)).reshape(4, 30, 3)
    assert_same(jax.jit(lambda x: gpu3d.bucketize(x, 16))(x), gpu3d.bucketize(np.asarray(x), 16))
    empty = g.bucketize(x[0, :0], 16)
    assert empty.slot_to_point.shape == (0,) and int(empty.moved) == 0
    assert g.scatter(x[0, :0], empty).shape == (0, 3) and g.scopes(empty).table.shape == (0, 8)
    for name in ("chamfer", "apml"):
        expected, (dx, _) = getattr(gpu3d, name + "_value_and_grad")(np.asarray(x), np.asarray(x[::-1, :20]))
        assert_same(jax.jit(jax.value_and_grad(getattr(gpu3d, name)))(x, x[::-1, :20]), [expected, dx])


def test_finite_differences():
    with wide():
        buckets, scopes = layout(16, (20, 5))
        made = functools.partial(numbers, dtype="float64")
        q, k, v = made(3, buckets.num_slots, 1, 8)

        def check(function, inputs, order=1):
            """Call check_grads; JAX computes its steps in NumPy."""
            run = functools.partial(jax.tree.map, jnp.asarray)
            check_grads(lambda *x: function(*run(x)), inputs, order, modes=["rev"], rtol=1e-6, atol=1e-6, eps=1e-6)

        check(lambda q, k, v: g.bucket_attention(q, k, v, buckets, scopes), (q, k, v))
        features, at = made(buckets.num_slots, 2), jnp.asarray(buckets.scatter(points(25, "float64")))
        for reduce in ("sum", "mean", "min", "max"):
            pool = functools.partial(g.bucket_pool, points=at, buckets=buckets, ratio=4, reduce=reduce)
            check(lambda x, pool=pool: pool(x).features, (features,))
        pooled = g.bucket_pool(jnp.asarray(features), at, buckets, ratio=4)
        check(lambda c, s: g.bucket_unpool(c, pooled, s), (made(*pooled.features.shape, seed=5), features))
        check(lambda x: buckets.gather(buckets.scatter(x) ** 2), (made(25, 2),), order=2)


@pytest.mark.parametrize("name", ["chamfer", "apml"])
def test_losses_against_differences(name):
    """Losses are float32: one direction, a long step, separate clouds. APML's plan changes too, within a tolerance."""
    options, room = ({"squared": True}, 0.02) if name == "chamfer" else ({}, 0.2)
    loss = functools.partial(getattr(g, name), **options)
    x, y = jnp.asarray(numbers(30, 3)), jnp.asarray(numbers(40, 3, seed=1))
    step = 1e-3 * numbers(30, 3, seed=2)
    slope = float((jax.grad(loss)(x, y) * step).sum())
    difference = float(loss(x + step, y) - loss(x - step, y)) / 2
    assert abs(slope - difference) < room * abs(difference)


# ---- programs ------------------------------------------------------------------------------------------------------


def stage(x, at, lengths):
    """A stage of a backbone: it calls every function, and makes, uses and returns the layouts."""
    buckets = gpu3d.bucketize(at, 16, lengths=lengths)
    rows = buckets.scatter(x)
    q, k, v = jnp.moveaxis(rows.reshape(-1, 3, 2, 8), 1, 0)
    attended = gpu3d.bucket_attention(q, k, v, buckets, gpu3d.scopes(buckets, 2, shift=1)).reshape(-1, 16)
    pooled = gpu3d.bucket_pool(attended, buckets.scatter(at), buckets, reduce="max")
    again = gpu3d.bucket_attention(
        *(pooled.features.reshape(-1, 2, 8),) * 3, pooled.buckets, gpu3d.scopes(pooled.buckets, 2, stride=2)
    )
    out = buckets.gather(gpu3d.bucket_unpool(again.reshape(-1, 16), pooled, attended))
    return out, gpu3d.chamfer(out[:, :3], at, x_lengths=lengths, y_lengths=lengths), pooled


def stage_loss(x, at, lengths):
    out, near, _ = stage(x, at, lengths)
    loss = jnp.square(out).sum() + near
    return loss + gpu3d.apml(out[:, :3], at, pred_lengths=lengths, target_lengths=lengths)


def stage_of(lengths):
    n = sum(lengths)
    return jnp.asarray(numbers(n, 48)), jnp.asarray(points(n)), lengths


def test_a_stage_under_jit():
    traced = []

    @functools.partial(jax.jit, static_argnames="lengths")
    def step(x, at, lengths):
        traced.append(lengths)
        return jax.value_and_grad(stage_loss)(x, at, lengths)

    for lengths in ((150, 3, 33, 1), (150, 3, 33, 1), (17, 18, 19, 100)):
        got, expected = step(*stage_of(lengths)), jax.value_and_grad(stage_loss)(*stage_of(lengths))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert len(traced) == 2  # other lengths need another program
    remat = jax.jit(jax.value_and_grad(jax.checkpoint(stage_loss, static_argnums=2)), static_argnums=2)
    np.testing.assert_allclose(remat(*stage_of(lengths))[1], got[1], rtol=1e-5, atol=1e-6)


def test_structure_is_a_pytree():
    x = jnp.asarray(points())
    buckets = gpu3d.bucketize(x, 16, lengths=LENGTHS)  # registers the pytrees
    scopes = gpu3d.scopes(buckets, 2)
    traced = []

    @jax.jit
    def attend(q, buckets, scopes):
        traced.append(buckets.lengths)
        return gpu3d.bucket_attention(q, q, q, buckets, scopes), scopes

    q = jnp.asarray(numbers(buckets.num_slots, 2, 8))
    for again in (buckets, gpu3d.bucketize(x * 2, 16, lengths=LENGTHS)):
        out, same = attend(q, again, scopes)
        assert_same(out, gpu3d.bucket_attention(*(np.asarray(q),) * 3, *jax.tree.map(np.asarray, (buckets, scopes))))
        assert jax.tree.structure(same) == jax.tree.structure(scopes)
    assert traced == [LENGTHS]
    pooled = g.bucket_pool(q.reshape(-1, 16), g.scatter(x, buckets), buckets)
    assert pooled.argmember is None and len(jax.tree.leaves(pooled)) == 3 + 2 * 3
    moved = jax.tree.map(lambda x: x + 1, pooled)
    assert moved.buckets.lengths == pooled.buckets.lengths and bool((moved.members == pooled.members + 1).all())


def test_scan():
    """Layers as a scan: the layout is in the carry, and each layer has its own scopes, which are scanned over."""
    buckets = jax.device_put(layout()[0])
    windows = [g.scopes(buckets, 4, shift=shift) for shift in range(3)]
    tables = jnp.stack([window.table for window in windows])
    x = jnp.asarray(numbers(buckets.num_slots, 2, 8))

    def layer(carry, table):
        x, buckets = carry
        window = gpu3d.Scopes(table, 4, 0, 1, buckets.bucket_size, buckets.bucket_offsets)
        return (x + gpu3d.bucket_attention(x, x, x, buckets, window), buckets), None

    def unrolled(x):
        for window in windows:
            x = x + gpu3d.bucket_attention(x, x, x, buckets, window)
        return x

    for function in (lambda f: f, lambda f: jax.grad(lambda x: (f(x) ** 2).sum())):
        scanned = function(lambda x: jax.lax.scan(layer, (x, buckets), tables)[0][0])
        np.testing.assert_allclose(jax.jit(scanned)(x), function(unrolled)(x), rtol=1e-5, atol=1e-6)


def test_threads():
    """XLA calls the handler from the caller's threads and from its own."""
    x = [jnp.asarray(points(400, seed=seed)) for seed in range(6)]
    run = jax.jit(lambda x: gpu3d.bucketize(x, 16).slot_to_point)
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


def run_here(script, *arguments, **environment):
    here = Path(__file__).resolve().parent
    defaults = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "JAX_PLATFORMS": "cpu"}
    env = {**os.environ, **defaults, **environment}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("line", ["held = step(x, at)", "step(x, at); step(x + 1, at)"])
def test_the_interpreter_ends_while_programs_run(line):
    """The interpreter ends cleanly, whether somebody holds the results or not."""
    done = run_here(
        "import jax, test_interop_jax as t\n"
        "x, at, lengths = t.stage_of((6000,))\n"
        "step = jax.jit(jax.grad(lambda x, at: t.stage_loss(x, at, lengths)))\n"
        f"{line}\nprint('the end')\n"
    )
    assert done.returncode == 0 and done.stdout == "the end\n", done.stderr


def local_loss(x, weight, y):
    """The loss of the clouds of one device. x is split over devices; weight and y are not."""
    buckets = gpu3d.bucketize(x, 16)
    rows = buckets.scatter(x.reshape(-1, 3) @ weight)
    q, k, v = jnp.moveaxis(rows.reshape(-1, 3, 2, 8), 1, 0)
    out = gpu3d.bucket_attention(q, k, v, buckets, gpu3d.scopes(buckets, 2, shift=1)).reshape(-1, 16)
    for reduce in ("max", "mean"):
        pooled = gpu3d.bucket_pool(out, buckets.scatter(x.reshape(-1, 3)), buckets, reduce=reduce)
        out = gpu3d.bucket_unpool(pooled.features, pooled, out)
    back = buckets.gather(out)[:, :3].reshape(x.shape)
    many = jnp.concatenate([y] * x.shape[0])
    return gpu3d.chamfer(back, many, reduction="none").sum() + gpu3d.apml(back, many, reduction="none").sum()


def check_sharded(count):
    """Compare the loss and all gradients, of split and of shared arrays, with one device on the joined batch."""
    devices = jax.devices()[:count]
    assert len(devices) == count
    mesh = Mesh(np.array(devices), ("clouds",))
    x, weight, y = map(jnp.asarray, (numbers(4, 50, 3), numbers(3, 48, seed=1), numbers(1, 50, 3, seed=2)))
    over = functools.partial(jax.shard_map, mesh=mesh, out_specs=P())
    total = over(lambda *given: jax.lax.psum(local_loss(*given), "clouds"), in_specs=(P("clouds"), P(), P()))
    got = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, weight, y)
    expected = jax.jit(jax.value_and_grad(local_loss, (0, 1, 2)))(x, weight, y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert bool((b != 0).any())
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(abs(b).max()))
    only_y = over(  # one call with an array that varies over devices and one that does not
        lambda x, y: jax.lax.psum(gpu3d.chamfer(x[0], y, reduction="sum"), "clouds"), in_specs=(P("clouds"), P())
    )
    whole = sum(jax.grad(g.chamfer, 1)(z, y[0]) for z in x[:count])
    np.testing.assert_allclose(jax.jit(jax.grad(only_y, 1))(x[:count], y[0]), whole, rtol=1e-5, atol=1e-6)


needs_shard_map = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")


@needs_shard_map
def test_shard_map_over_four_devices():
    """shard_map over four devices works, and plain calls stay on the device of their arguments."""
    done = run_here(
        "import jax, gpu3d, test_interop_jax as t\n"
        "t.check_sharded(4)\n"
        "x = jax.device_put(t.points(), jax.devices()[2])\n"
        "buckets = gpu3d.bucketize(x, 16)\n"
        "assert x[buckets.slot_to_point].devices() == buckets.scatter(x).devices() == {jax.devices()[2]}\n",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert done.returncode == 0, done.stderr


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input():
    buckets, scopes = (jax.device_put(x) for x in layout())
    q, x = jnp.asarray(numbers(buckets.num_slots, 2, 8)), jnp.asarray(numbers(20, 3))
    flat, half = q.reshape(-1, 16), q.astype(np.float16)
    pooled = g.bucket_pool(flat, g.scatter(jnp.asarray(points()), buckets), buckets)
    host = np.asarray(x)

    def attend(q, k, v, b=buckets, s=scopes, **options):
        return g.bucket_attention(q, k, v, b, s, **options)

    def unpool(skip):
        return g.bucket_unpool(pooled.features, pooled, skip)

    def pool(**options):
        return g.bucket_pool(flat, flat[:, :3], buckets, **options)

    for error, match, call in (
        (TypeError, r"q must be a JAX array, got ndarray: convert it", lambda: attend(np.asarray(q), q, q)),
        (TypeError, "buckets must be a JAX array, got list", lambda: g.gather(q, replace(buckets, point_to_slot=[]))),
        (TypeError, "x must be a JAX array, got NeighborIndex", lambda: g.chamfer(gpu3d.neighbor_index(host), x)),
        (TypeError, "points must be a JAX array, got NeighborIndex", lambda: g.knn(x, gpu3d.neighbor_index(host), 1)),
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
        (TypeError, "check_finite must be True or False", lambda: g.bucketize(x, check_finite=3)),
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
        (ValueError, "max_entries must not be negative", lambda: g.radius_search(x, x, 1.0, max_entries=-1)),
        (ValueError, "radius must not be negative", lambda: g.radius_search(x, x, -1.0)),
        (ValueError, "k must be from 1 to", lambda: g.knn(x, x, 0)),
        (ValueError, "size must be at least 1", lambda: g.scopes(buckets, 0)),
        (TypeError, "y_lengths must be host integers", lambda: g.chamfer(x, x, y_lengths=jnp.array([20]))),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(TypeError, match=r"lengths must be host integers, got a JAX array: .* static_argnames"):
        jax.jit(lambda x, n: gpu3d.bucketize(x, 16, lengths=n))(x, jnp.array([20]))
    with pytest.raises(ValueError, match=r"check_finite=True looks at values, .* while it is traced"):
        jax.jit(functools.partial(gpu3d.bucketize, check_finite=True))(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: gpu3d.neighbor_index(x),
        lambda x: gpu3d.apml_plan(x, x),
        lambda x: gpu3d.voxel_downsample(x, 0.1),
        lambda x: gpu3d.apml_value_and_grad(x, x),
        lambda x: gpu3d.chamfer_value_and_grad(x, x),
    ],
)
def test_functions_that_are_not_in_programs(call):
    with pytest.raises(TypeError, match=r"is a JAX tracer, .*jax\.lax\.stop_gradient"):
        jax.jit(call)(numbers(20, 3))


def test_normals_have_no_gradient():
    """A derivative is an error, and its cure works."""
    x = jnp.asarray(points(40))

    def upwards(x, stop):
        return (x * gpu3d.normals(stop(x), 6).normals).sum()

    for way in (jax.grad, jax.jacfwd):
        with pytest.raises(TypeError, match=r"normals has no gradient: pass jax\.lax\.stop_gradient\(points\)"):
            way(lambda x: upwards(x, lambda x: x))(x)
    stopped = jax.jit(jax.grad(lambda x: upwards(x, jax.lax.stop_gradient)))(x)
    assert_same(stopped, gpu3d.normals(points(40), 6).normals)


def test_emd_is_not_in_programs():
    x = jnp.asarray(numbers(20, 3))
    for call in (jax.jit(lambda x: gpu3d.emd(x, x)), jax.grad(lambda x: gpu3d.emd(x, x + 1))):
        with pytest.raises(RuntimeError, match=r"x is a JAX tracer, .* Gradients come from gpu3d.emd_value_and_grad"):
            call(x)
    loss, (dx, _) = gpu3d.emd_value_and_grad(x, x + 1)
    assert isinstance(dx, jax.Array) and loss > 1


def test_points_that_are_not_finite():
    """An error at run time is raised by JAX with the words of the plain call."""
    x = jnp.asarray(points(20))
    bad = x.at[2, 1].set(jnp.nan)
    run = jax.jit(functools.partial(gpu3d.bucketize, bucket_size=16))
    for call in (lambda: g.bucketize(bad, 16), lambda: run(bad)):
        with pytest.raises(ERRORS, match=r"INVALID_ARGUMENT: points must be finite, got 1 of 20"):
            jax.block_until_ready(call())
    with pytest.raises(ValueError, match="points must be finite, got 1 of 20"):
        g.bucketize(bad, 16, check_finite=True)
    run(x)  # later calls work
    unchecked = jax.jit(functools.partial(gpu3d.bucketize, bucket_size=16, check_finite=False))(bad)
    assert int((unchecked.slot_to_point >= 0).sum()) == 20


def test_docstrings():
    names = {name: getattr(g, name) for name in g.__all__}
    tests = [test for test in doctest.DocTestFinder().find(g, globs={"jax": jax, **names}) if test.examples]
    found = [test for f in names.values() for test in doctest.DocTestFinder().find(f, globs={"jax": jax, **names})]
    tests += [test for test in found if test.examples]
    assert len(tests) > 5
    for test in tests:
        test_docs.run(test)
    assert all(x.__doc__.strip() for x in names.values())


def test_import_errors(tmp_path):
    """Without jax, and with an old jax, the error names the extra. gpu3d alone imports no framework."""
    for text, match in (
        ("raise ImportError", "needs jax: pip install"),
        ("__version__ = '0.5.3'\n__version_info__ = (0, 5, 3)\nnumpy = None", "needs jax >= 0.6, got 0.5.3"),
    ):
        (tmp_path / "jax.py").write_text(text)
        path = os.pathsep.join([str(tmp_path), str(Path(gpu3d.__file__).parent.parent)])
        done = run_here("import gpu3d.interop\nimport gpu3d.interop.jax", PYTHONPATH=path)
        assert done.returncode == 1 and match in done.stderr and "gpu3d[jax]" in done.stderr
        assert "import gpu3d.interop\n" not in done.stderr


# ---- programs from elsewhere ---------------------------------------------------------------------------------------


def foreign(name, options, results, *arrays):
    """A program whose attribute need not fit its buffers."""
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    run = jax.ffi.ffi_call(program.TARGET, structs)
    return jax.block_until_ready(jax.jit(lambda *x: run(*x, call=handler.attribute(name, options)))(*arrays))


def test_attributes_that_do_not_fit_the_buffers():
    """They raise an error instead of reading or writing out of bounds."""
    ones, members, none = np.ones((16, 4), "f4"), np.zeros((16, 2), "i4"), np.ones((0, 4), "u1")
    fitting = {"bucket_size": 16, "lengths": [16], "ratio": 2}
    back = functools.partial(foreign, "bucket_unpool_backward")

    def of(lengths):
        return fitting | {"lengths": lengths}

    both = [((16, 4), "f4")] * 2
    assert back(fitting, both, ones, members)[0].shape == (16, 4)
    assert back(fitting, [*both, ((100,), "u1")], ones, members)[0].shape == (16, 4)  # has a workspace
    for match, call in (
        ("dout must have one row for each of the 32 slots", lambda: back(of([20]), both, ones, members)),
        ("dout must have one row for each of the 0 slots", lambda: back(of([]), both, ones, members)),
        ("lengths must not be negative", lambda: back(of([-16, 32]), both, ones, members)),
        (r"members must be int32 \[16, 2\], got int32 \[8, 2\]", lambda: back(fitting, both, ones, members[:8])),
        (r"members must be int32 \[16, 2\], got float32", lambda: back(fitting, both, ones, ones[:, :2])),
        ("the program has room for", lambda: back(fitting, [((8, 4), "f4"), ((16, 4), "f4")], ones, members)),
        ("the program has room for", lambda: back(fitting, [((16, 4), "f2")] * 2, ones, members)),
        ("the program has room for", lambda: back(fitting, both[:1], ones, members)),
        ("the program has room for", lambda: back(fitting, [*both, *both], ones, members)),
        ("XLA_FFI_DataType 2", lambda: back(fitting, both, ones.astype("i1"), members)),
        ("unexpected keyword argument", lambda: back(fitting | {"scale": 2}, both, ones, members)),
        ("positional argument", lambda: back(fitting, both, ones)),
        ("no foreign call 'no_such'", lambda: foreign("no_such", fitting, both, ones, members)),
        (
            r"argmember must be uint8 \[16, 4\], got uint8 \[0, 4\]",
            lambda: foreign("bucket_pool_backward", fitting | {"reduce": "max"}, both[:1], ones, members, none),
        ),
    ):
        with pytest.raises(ERRORS, match="INVALID_ARGUMENT: .*" + match):
            call()


def test_errors_that_nobody_expects(monkeypatch):
    def wrong(points, **options):
        return CALLS["bucketize"](points, **options)._replace(on_cpu=lambda points: [np.zeros(3, np.int32)] * 3)

    def broken(*args, **options):
        raise KeyError("a line of Python")

    def full(*args, **options):
        raise MemoryError

    run = jax.jit(lambda x: gpu3d.bucketize(x, 16).slot_to_point)
    for call, match in (
        (wrong, r"INTERNAL: .*RuntimeError: a result is int32 \[3\] where int32 \[32\] was announced"),
        (broken, r"INTERNAL: Traceback .*KeyError: 'a line of Python'"),
        (full, "RESOURCE_EXHAUSTED: out of memory"),
    ):
        compiled = run.lower(points(20)).compile()
        monkeypatch.setattr(handler, "CALLS", {"bucketize": call})
        forget(monkeypatch)
        with pytest.raises(ERRORS, match="(?s)" + match):
            jax.block_until_ready(compiled(points(20)))
        monkeypatch.undo()


def forget(monkeypatch):
    for name in ("_frames", "_prepared"):
        monkeypatch.setattr(handler, name, handler._Cache())


# ---- XLA's interface -----------------------------------------------------------------------------------------------


def structures():
    return {name: x for name, x in vars(xla_ffi).items() if isinstance(x, type) and issubclass(x, ctypes.Structure)}


def test_the_header():
    """Structures, sizes and constants agree with the header in this jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    for old, new in (
        ("Extension_Base", "InternalExtension"),
        ("Extension_Type", "InternalExtension_Type"),
        ("ExecutionContext", "InvokeContext"),
        ("Error_GetMessage", "Error_GetDetails"),
    ):
        if f"XLA_FFI_{new}" not in header:
            header = header.replace(f"XLA_FFI_{old}", f"XLA_FFI_{new}")
    plain = re.sub(r"//[^\n]*", "", header)
    for name, structure in structures().items():
        if name == "XLA_FFI_Api":
            continue
        (body,) = re.findall(rf"struct {name} {{(.*?)\n}}", plain, re.DOTALL)
        declared = re.findall(r"([\w ]+\**) *\b(\w+);", body)
        found = [(field, ctypes.sizeof(kind)) for field, kind in structure._fields_]
        sizes = {"size_t": 8, "int64_t": 8, "int32_t": 4, "int": 4, "XLA_FFI_Handler_Traits": 4}
        for (kind, field), (ours, size) in zip(declared, found, strict=False):
            assert field == ours, name
            kind, pointer = kind.strip(), "*" in kind
            if kind in structures():
                assert pointer or size == ctypes.sizeof(structures()[kind])
            else:
                enum = re.search(rf"typedef enum {{[^}}]*}} {kind.replace('const ', '').rstrip('*')};", plain)
                assert size == (8 if pointer else 4 if enum else sizes[kind]), (name, field)
        assert len(declared) >= len(found) - (name == "XLA_FFI_Error_GetDetails_Args") > 0  # errc is newer
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\((XLA_FFI_\w+)\);", header)
    used = [name.removesuffix("_Args") for name in structures() if name.endswith("_Args") and name != "XLA_FFI_Args"]
    ours = [name for name, _ in xla_ffi.XLA_FFI_Api._fields_[4:]]
    assert len(used) == 7 and all(functions.index(name) == ours.index(name) for name in used)
    for name in vars(xla_ffi):
        value = getattr(xla_ffi, name)
        if name.startswith("XLA_FFI_E") and isinstance(value, int):
            assert re.search(rf"\b{name} = {value},", header), name
    types = {"uint8": "U8", "int32": "S32", "int64": "S64", "float16": "F16", "float32": "F32", "float64": "F64"}
    for dtype, number in xla_ffi.XLA_FFI_DataType.items():
        assert f"XLA_FFI_DataType_{types.get(dtype, 'BF16')} = {number}," in header
    assert f"#define XLA_FFI_API_MAJOR {xla_ffi.XLA_FFI_API_MAJOR}" in header
    assert "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE = 1u << 0" in header
    assert xla_ffi.struct_size(xla_ffi.XLA_FFI_Error_Create_Args) == 28


def test_other_stages_and_the_metadata():
    metadata, extension = xla_ffi.XLA_FFI_Metadata(traits=9), xla_ffi.XLA_FFI_Metadata_Extension()
    extension.extension_base.type = xla_ffi.XLA_FFI_Extension_Metadata
    extension.metadata = ctypes.pointer(metadata)
    frame = xla_ffi.XLA_FFI_CallFrame(extension_start=ctypes.addressof(extension))
    for platform in ("cpu", "CUDA"):
        metadata.traits = 9
        assert handler.handler(platform)(ctypes.addressof(frame)) is None
        said = metadata.api_version.major_version, metadata.api_version.minor_version, metadata.traits
        assert said == (0, 1, xla_ffi.XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE)
        other = xla_ffi.XLA_FFI_CallFrame(stage=xla_ffi.XLA_FFI_ExecutionStage_EXECUTE - 1)
        assert handler.handler(platform)(ctypes.addressof(other)) is None


def test_what_is_kept_is_bounded():
    cache = handler._Cache()
    for i in range(3000):
        cache.keep(i, SimpleNamespace(size=100))
    assert len(cache) == handler.MAX_KEPT and min(cache) == 3000 - handler.MAX_KEPT
    for i in range(50):
        cache.keep(i, SimpleNamespace(size=1 << 20))
    assert sum(x.size for x in cache.values()) == cache.held <= handler.MAX_BYTES
    cache.keep("large", SimpleNamespace(size=1 << 30))
    assert list(cache) == ["large"]
    for n in range(1, 40):  # after programs are deleted only bounded caches stay
        jax.block_until_ready(jax.jit(lambda x: gpu3d.bucketize(x, 16).moved)(points(n)))
    assert handler._prepared.held == sum(x.size for x in handler._prepared.values()) <= handler.MAX_BYTES
    many = (1,) * 20_000
    jax.block_until_ready(jax.jit(lambda x: gpu3d.bucketize(x, 16, lengths=many).moved)(points(20_000)))
    assert program._results.cache_info().maxsize <= 1024
    text = handler.attribute("bucketize", {"lengths": many})
    assert len(text) > program.MAX_TEXT  # too long to be cached


class Gpu:
    """A fake XLA with a GPU: frames, XLA's functions and CuPy's runtime. It records what the handler launches."""

    def __init__(self, monkeypatch):
        self.launched, self.copied, self.borrowed, self.error = [], [], {}, None
        self.capturing, self.room, self.kept = False, 1 << 30, []
        self.api = xla_ffi.XLA_FFI_Api()
        for name in [name for name in structures() if name.endswith("_Args") and name != "XLA_FFI_Args"]:
            function = xla_ffi.XLA_FFI_Handler(functools.partial(self.answer, name))
            self.kept.append(function)
            setattr(self.api, name.removesuffix("_Args"), ctypes.cast(function, ctypes.c_void_p).value)
        runtime = SimpleNamespace(
            getDevice=lambda: 3,
            streamIsCapturing=lambda stream: self.capturing,
            memcpyDeviceToDevice=3,
            memcpyAsync=lambda *copy: self.copied.append(copy),
        )
        monkeypatch.setattr(handler, "_runtime", lambda: runtime)
        monkeypatch.setattr(launcher, "device", lambda ordinal: DEVICES["sm_90a"])
        monkeypatch.setattr(launcher, "run", lambda *launch: self.launched.append(launch))

    def answer(self, name, address):
        args = structures()[name].from_address(address)
        assert args.struct_size == xla_ffi.struct_size(type(args))
        if name == "XLA_FFI_DeviceOrdinal_Get_Args":
            args.device_ordinal = 3
        elif name == "XLA_FFI_Stream_Get_Args":
            args.stream = 77
        elif name == "XLA_FFI_DeviceMemory_Allocate_Args":
            if args.size > self.room:
                self.error = b"the device is full"
                return 5
            args.data = (1 << 32) + 4096 * len(self.kept)
            self.kept.append(None)
            self.borrowed[args.data] = args.size
        elif name == "XLA_FFI_DeviceMemory_Free_Args":
            assert self.borrowed.pop(args.data) == args.size
        elif name == "XLA_FFI_Error_Create_Args":
            self.error = args.message, args.errc
            return 6
        elif name == "XLA_FFI_Error_GetDetails_Args":
            args.message = self.error
        return None

    def frame(self, name, options, arrays, results):
        """A call frame; each buffer is (address, shape, dtype)."""
        keep, frame = [], xla_ffi.XLA_FFI_CallFrame(api=ctypes.addressof(self.api), ctx=99)
        frame.stage = xla_ffi.XLA_FFI_ExecutionStage_EXECUTE
        for side, field, name_of_items in ((arrays, frame.args, "args"), (results, frame.rets, "rets")):
            buffers = (xla_ffi.XLA_FFI_Buffer * max(1, len(side)))()
            for buffer, (address, shape, dtype) in zip(buffers, side, strict=False):
                dims = (ctypes.c_int64 * max(1, len(shape)))(*shape)
                keep.append(dims)
                buffer.dtype, buffer.data = xla_ffi.XLA_FFI_DataType[dtype], address
                buffer.rank, buffer.dims = len(shape), ctypes.addressof(dims)
            step = ctypes.sizeof(xla_ffi.XLA_FFI_Buffer)
            items = (ctypes.c_void_p * max(1, len(side)))(
                *[ctypes.addressof(buffers) + i * step for i in range(len(side))]
            )
            field.size = len(side)
            setattr(field, name_of_items, ctypes.addressof(items))
            keep += [buffers, items]
        text = handler.attribute(name, options).encode()
        held = ctypes.create_string_buffer(text, len(text))
        span = xla_ffi.XLA_FFI_ByteSpan(ctypes.addressof(held), len(text))
        attrs = (ctypes.c_void_p * 1)(ctypes.addressof(span))
        frame.attrs.size, frame.attrs.attrs = 1, ctypes.addressof(attrs)
        self.kept += [keep, held, span, attrs]
        return frame

    def call(self, frame):
        return handler.handler("CUDA")(ctypes.addressof(frame))


@pytest.fixture
def gpu(monkeypatch):
    forget(monkeypatch)
    handler._function.cache_clear()  # it knows them by an address, and a new API may lie at an old one
    return Gpu(monkeypatch)


OPTIONS = {"lengths": [9000], "bucket_size": 16, "hash": "zorder_div", "balance": "spill"}
OPTIONS |= {"voxel_size": None, "seed": 0, "bounds": None, "check_finite": None}


def bucketize_frame(gpu, addresses=(16, 1024, 2048, 4096, 8192), n=9000, room=1 << 20):
    at, slots, back, moved, workspace = addresses
    results = [(slots, (9008,), "int32"), (back, (9000,), "int32"), (moved, (), "int32"), (workspace, (room,), "uint8")]
    return gpu.frame("bucketize", OPTIONS, [(at, (n, 3), "float32")], results)


def test_launches_on_xlas_buffers(gpu):
    """Launches get inputs, results and workspace on XLA's device and stream. Equal frames are prepared once."""
    frame = bucketize_frame(gpu)
    for k in range(3):
        assert gpu.call(frame) is None
        ((call, addresses, ordinal, stream),) = gpu.launched
        assert addresses == (16, 1024, 2048, 4096, 8192) and (ordinal, stream) == (3, 77)
        assert call.plan.inputs == 1 and call.plan.results == 3 and call.numbers["clouds"].inlined
        gpu.launched.clear()
        assert len(handler._frames) == len(handler._prepared) == 1, k
    gpu.call(bucketize_frame(gpu, (32, 1024, 2048, 4096, 8192)))  # another frame of the same program
    assert gpu.launched[0][0] is call and len(handler._frames) == 2 and len(handler._prepared) == 1


def test_a_frame_that_changed(gpu):
    """XLA may place the frame of another program at the address of an old one."""
    frame = bucketize_frame(gpu)
    assert gpu.call(frame) is None
    items = (ctypes.c_void_p * 1).from_address(frame.args.args)
    buffer = xla_ffi.XLA_FFI_Buffer.from_address(items[0])
    buffer.data = 160
    assert gpu.call(frame) is None and gpu.launched[-1][1][0] == 160
    (ctypes.c_int64 * 2).from_address(buffer.dims)[0] = 5
    assert gpu.call(frame) == 6 and b"sum to the number of points" in gpu.error[0]
    (ctypes.c_int64 * 2).from_address(buffer.dims)[0] = 9000
    buffer.dtype = xla_ffi.XLA_FFI_DataType["int32"]
    assert gpu.call(frame) == 6 and gpu.error[1] == xla_ffi.XLA_FFI_Error_Code_INVALID_ARGUMENT
    buffer.dtype = xla_ffi.XLA_FFI_DataType["float64"]
    assert gpu.call(frame) is None and gpu.launched[-1][0] is not gpu.launched[0][0]


def test_arrays_at_odd_addresses(gpu):
    """Misaligned inputs are read in place or copied; results are copied from memory of XLA that is freed afterwards."""
    assert gpu.call(bucketize_frame(gpu, (20, 1024, 2048, 4096, 8192))) is None
    (_, addresses, *_) = gpu.launched.pop()
    assert addresses[0] == 20 and not gpu.borrowed
    gpu.capturing = True
    assert gpu.call(bucketize_frame(gpu, (20, 1024, 2048, 4096, 8192))) is None
    for changed in ({"addresses": (16, 1028, 2048, 4096, 8192)}, {"room": 16}):
        gpu.launched.clear()
        gpu.capturing = True
        frame = bucketize_frame(gpu, **changed)
        assert gpu.call(frame) == 6 and b"cannot be recorded" in gpu.error[0] and not gpu.launched
        gpu.capturing = False
        assert gpu.call(frame) is None and not gpu.borrowed
        ((_, addresses, _, _),) = gpu.launched
        assert addresses[0] == 16 and all(a % 16 == 0 for a in addresses)
        assert addresses[1 if "addresses" in changed else 4] >> 32
        if "addresses" in changed:
            assert gpu.copied.pop() == (1028, addresses[1], 4 * 9008, 3, 77) and addresses[4] == 8192
        assert not gpu.copied


def test_errors_on_a_gpu(gpu):
    """Borrowed memory is freed after an error too."""
    gpu.room = 1 << 10
    assert gpu.call(bucketize_frame(gpu, (16, 1028, 2048, 4096, 8192), room=0)) == 6
    message, code = gpu.error
    assert code == xla_ffi.XLA_FFI_Error_Code_RESOURCE_EXHAUSTED and b"the device is full" in message
    assert not gpu.borrowed and not gpu.launched
    wide = [(16 * i, (16, 2, 8), "float64") for i in range(1, 4)]
    results = [(512, (16, 2, 8), "float64"), (1024, (16, 2), "float64"), (2048, (0,), "uint8")]
    options = {"lengths": [16], "bucket_size": 16, "scale": 1.0}
    assert gpu.call(gpu.frame("bucket_attention", options, [*wide, (256, (1, 1), "int32")], results)) == 6
    assert b"on a GPU, got float64" in gpu.error[0]


@one_of_each
def test_workspaces(gpu, name):
    """The workspace of a program that was traced without a GPU is large enough for each architecture."""
    op = OPS[name]("float32", np.asarray)
    if op.second:
        return
    made = jax.make_jaxpr(lambda *x: jax.tree.leaves(op.run(*x)))(*map(jnp.asarray, op.inputs))
    equations = [e for e in all_equations(made.jaxpr) if e.primitive.name == "ffi_call"]
    assert equations
    for equation in equations:
        text = dict(equation.params["attributes"])["call"]
        name, options = handler.json.loads(text)
        specs = [program.spec(x.aval) for x in equation.invars]
        static = {key: tuple(x) if isinstance(x, list) else x for key, x in options.items()}
        work = CALLS[name](*specs, **static)
        needed = [work.on_gpu(*specs, device).plan.workspace for device in DEVICES.values()]
        assert equation.outvars[-1].aval.shape == (max(needed),)


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from all_equations(value.jaxpr)
