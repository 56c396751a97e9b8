# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.jax.flash3d on the CPU: the backbone of gpu3d.flash3d, and its gradients by JAX."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from test_flash3d import CONFIG, LENGTHS, local_chain, random_params, rows, scene

jax = pytest.importorskip("jax")
from jax import numpy as jnp  # noqa: E402
from test_interop_jax import wide  # noqa: E402

import gpu3d  # noqa: E402
from gpu3d import flash3d as plain  # noqa: E402
from gpu3d.flash3d.geometry import geometry  # noqa: E402
from gpu3d.flash3d.params import flat, pack  # noqa: E402
from gpu3d.interop.jax import flash3d  # noqa: E402
from gpu3d.interop.jax.backbone import pool, unpool  # noqa: E402
from gpu3d.reference import flash3d as reference  # noqa: E402


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@functools.partial(jax.jit, static_argnames=("config", "lengths"))
def logits_and_grads(params, points, features, dlogits, config, lengths):
    logits, backward = jax.vjp(lambda *of: flash3d(of[0], points, of[1], config, lengths=lengths), params, features)
    return logits, *backward(dlogits)


@pytest.mark.parametrize(
    ("config", "lengths", "dtype", "tolerance"),
    [
        (CONFIG, LENGTHS, np.float64, 1e-10),
        (CONFIG, LENGTHS, np.float32, 1e-4),
        (CONFIG.replace(ratio=4), (1, 0, 50), np.float64, 1e-10),
    ],
    ids=["float64", "float32", "ratio 4"],
)
def test_gradients_are_the_reference(config, lengths, dtype, tolerance):
    (points, features), params = scene(lengths), random_params(config)
    levels, dlogits = geometry(points, config, lengths), rows(len(points), config.classes)
    logits, tape = reference.forward(params, levels, features, config)
    dfeatures, grads = reference.backward(dlogits, tape, params, levels, config)
    with wide(dtype == np.float64):
        given = pack(flat(params), config, dtype), points, features.astype(dtype), dlogits.astype(dtype)
        got, dparams, dinput = logits_and_grads(*given, config=config, lengths=lengths)
        assert got.dtype == dtype
        found = {"features": np.asarray(dinput)} | {path: np.asarray(x) for path, x in flat(dparams).items()}
    np.testing.assert_allclose(np.asarray(got), logits, rtol=tolerance, atol=tolerance)
    expected = {"features": dfeatures} | flat(grads)
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        assert np.linalg.norm(found[path] - gradient) <= tolerance * np.linalg.norm(gradient), path


def test_bfloat16():
    """A norm is rounded once, so the error is that of a few roundings of 2^-9."""
    points, features = scene(seed=3)
    params = random_params(seed=3)
    exact, _ = reference.forward(params, geometry(points, CONFIG, LENGTHS), features, CONFIG)
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), pack(flat(params), CONFIG, np.float32))
    logits = flash3d(narrow, jnp.asarray(points), jnp.asarray(features, jnp.bfloat16), CONFIG, lengths=LENGTHS)
    assert logits.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(logits, np.float64) - exact) / np.linalg.norm(exact)
    assert error < 0.01  # 0.012 if each step of a norm is rounded


def test_a_file_outside_of_jit(tmp_path):
    params = pack(flat(random_params()), CONFIG, np.float32)
    plain.save(tmp_path / "model.safetensors", params, CONFIG)
    loaded, config = plain.load(tmp_path / "model.safetensors")
    points, features = scene((20, 20))
    logits = flash3d(loaded, jnp.asarray(points).reshape(2, 20, 3), jnp.asarray(features).reshape(2, 20, 3), config)
    expected = plain.forward(params, plain.Batch(points, features, (20, 20)), config)
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-4, atol=1e-4)


def test_points_have_no_gradient():
    points, features = map(jnp.asarray, scene((20,)))
    params = plain.init(CONFIG)
    dpoints = jax.jit(jax.grad(lambda points: flash3d(params, points, features, CONFIG).sum()))(points)
    assert dpoints.shape == points.shape and not dpoints.any()


@pytest.mark.parametrize("ratio", [2, 8])
def test_pooling_is_that_of_local_order(ratio):
    """The values of the reference are compared with the public functions in test_flash3d.py."""
    config = CONFIG.replace(ratio=ratio)
    points, _ = scene()
    layouts, _, poolings = local_chain(points, config, LENGTHS)
    above, below = geometry(jnp.asarray(points), config, LENGTHS)[:2]
    x = rows(above.buckets.num_slots, 6).astype(np.float32)
    pooled, backward = jax.vjp(lambda x: pool(x, above.members), jnp.asarray(x))
    members = np.asarray(above.members)
    dout = rows(len(pooled), 6, seed=1).astype(np.float32)
    np.testing.assert_allclose(np.asarray(pooled), reference.pool(x, members), rtol=1e-6, atol=1e-6)
    expected = reference.pool_backward(dout, members, len(x))
    np.testing.assert_allclose(np.asarray(backward(jnp.asarray(dout))[0]), expected, rtol=1e-6, atol=1e-6)
    stage = [plain_stage(level.buckets) for level in (above, below)]
    child = layouts[1].scatter(stage[1].gather(dout))
    unpooled = stage[0].scatter(layouts[0].gather(gpu3d.bucket_unpool(child, poolings[0])))
    got = unpool(jnp.asarray(dout), above, below, jnp.zeros((len(x), 6), jnp.float32))
    assert (np.asarray(got) == unpooled).all()


def plain_stage(buckets):
    return gpu3d.Buckets(
        *map(np.asarray, (buckets.slot_to_point, buckets.point_to_slot, buckets.moved)),
        buckets.bucket_size,
        buckets.lengths,
        buckets.bucket_offsets,
    )


POINTS = jnp.zeros((20, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((20, 3)), POINTS), TypeError, r"points must be a JAX array, got ndarray: .* jax.numpy.asarray"),
        ((POINTS, POINTS.astype(int)), TypeError, r"features must have a float dtype, got int32: .*'float32'"),
        ((POINTS, POINTS[:, :2]), ValueError, r"a row of 3 channels .* got shape \[20, 2\] for points of .*\[20, 3\]"),
        ((POINTS, POINTS[:19]), ValueError, r"for each point, got shape \[19, 3\]"),
    ],
)
def test_bad_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        flash3d(plain.init(CONFIG), *arguments, CONFIG)


def test_bad_params():
    other = CONFIG.replace(classes=4)
    with pytest.raises(ValueError, match=r"head.weight of shape \[4, 16\], but the params have \[5, 16\]"):
        flash3d(plain.init(CONFIG), POINTS, POINTS, other)
    with pytest.raises(TypeError, match=r"config must be a flash3d.Config, got 'tiny'"):
        flash3d(plain.init(CONFIG), POINTS, POINTS, "tiny")
