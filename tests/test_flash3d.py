# SPDX-License-Identifier: Apache-2.0
"""gpu3d.flash3d on the CPU: sizes, geometry, every layer and the whole network, losses, optimizer, checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import clouds
import ml_dtypes
import numpy as np
import pytest

import gpu3d
from gpu3d import flash3d
from gpu3d.flash3d import checkpoint, optim
from gpu3d.flash3d.geometry import geometry
from gpu3d.flash3d.params import ALIGNMENT, arena_size, decayed_size, flat, layout, pack, views
from gpu3d.reference import flash3d as reference

CONFIG = flash3d.Config(
    channels=(8, 16, 16),
    depths=(2, 2, 1),
    decoder_channels=(16, 24),
    decoder_depths=(1, 2),
    heads=(1, 2, 1),
    decoder_heads=(2, 1),
    hashes=("zorder_div", "xor_div", "xor_mod"),
    strides=(2, 1, 1),
    in_channels=3,
    classes=5,
    bucket_size=16,
    scope=2,
    mlp=2,
    drop_path=0.5,
)
LENGTHS = (70, 0, 1, 33, 16)
TRAINING = reference.Training(seed=2**40 + 7, step=3)


def scene(lengths=LENGTHS, seed=0):
    """Points float32 [N, 3] and features float32 [N, 3]."""
    rng = np.random.default_rng(seed)
    return clouds.uniform(sum(lengths), seed), rng.standard_normal((sum(lengths), 3), dtype=np.float32)


def random_params(config=CONFIG, seed=0):
    """Float64 parameters at random. Weights keep the size of their input, so that every gradient counts."""
    rng, arrays = np.random.default_rng(seed), {}
    for path, array in flat(flash3d.init(config)).items():
        noise = rng.standard_normal(array.shape)
        arrays[path] = noise / np.sqrt(array.shape[1]) if array.ndim == 2 else array + 0.2 * noise
    return pack(arrays, config, np.float64)


def labels_of(points, seed=0, classes=CONFIG.classes):
    labels = np.random.default_rng(seed).integers(0, classes, len(points))
    labels[::7] = 255
    return labels


def assert_gradients(f, arrays, gradients, step=1e-5):
    """Compare gradients of the number f() with central differences.

    Each array is moved along its gradient, which shows a wrong size, plus a random direction, which shows a wrong
    direction.
    """
    assert arrays.keys() == gradients.keys()
    rng = np.random.default_rng(1)
    for name, array in arrays.items():
        gradient, kept = gradients[name], array.copy()
        assert array.dtype == np.float64 and gradient.shape == array.shape, name
        size, noise = np.linalg.norm(gradient), rng.standard_normal(array.shape)
        assert size > 1e-4, f"{name}: no gradient to compare"
        direction = gradient / size + noise / np.linalg.norm(noise)
        array[...] = kept + step * direction
        above = f()
        array[...] = kept - step * direction
        below = f()
        array[...] = kept
        error = abs((above - below) / (2 * step) - (gradient * direction).sum())
        assert error <= 1e-6 * size, f"{name}: error {error:.3g} of {size:.3g}"


# ---- sizes and parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "published"),
    [("flash3d_46m", 46_275_891, 46.2e6), ("flash3d_129m", 128_993_107, 129.4e6), ("tiny", 2_870_003, None)],
)
def test_presets_have_the_published_sizes(name, parameters, published):
    assert flash3d.count(flash3d.presets[name]) == parameters == pytest.approx(published or parameters, rel=0.01)


def test_arena():
    parameters = layout(CONFIG)
    assert parameters[0].path == "stem.weight" and parameters[0].shape == (8, 3)
    end = 0
    for parameter in parameters:
        assert parameter.offset == -(-end // ALIGNMENT) * ALIGNMENT
        assert parameter.decay == (len(parameter.shape) == 2) == (parameter.offset < decayed_size(CONFIG))
        end = parameter.offset + parameter.size
    assert arena_size(CONFIG) % ALIGNMENT == 0 and 0 <= arena_size(CONFIG) - end < ALIGNMENT
    assert len({parameter.path for parameter in parameters}) == len(parameters)
    assert flash3d.count(CONFIG) == sum(array.size for array in flat(flash3d.init(CONFIG)).values())


def test_params_are_views_into_one_arena():
    arena = np.zeros(arena_size(CONFIG), np.float32)
    params = views(arena, CONFIG)
    for array in flat(params).values():
        array[...] = 1
    assert arena.sum() == flash3d.count(CONFIG)
    weight = params["encoder"]["1"]["blocks"]["1"]["qkv"]["weight"]
    assert weight.shape == (48, 16) and params["encoder"]["1"]["down"]["norm"]["bias"].shape == (16,)
    weight[3, 5] = 7
    offset = next(p.offset for p in layout(CONFIG) if p.path == "encoder.1.blocks.1.qkv.weight")
    assert arena[offset + 3 * 16 + 5] == 7
    with pytest.raises(ValueError, match=rf"has shape \[{len(arena)}\], got \[{len(arena) - 1}\]"):
        views(arena[1:], CONFIG)


def test_init():
    config = flash3d.presets["tiny"]
    params = flat(flash3d.init(config, seed=3))
    weight = params["encoder.3.blocks.0.fc1.weight"]
    assert weight.dtype == np.float32 and 1.99 < np.abs(weight).max() * 16 <= 2  # of 256 inputs
    assert weight.std() == pytest.approx(0.8796 / 16, rel=0.01)  # of a normal cut at two standard deviations
    assert params["stem.weight"].std() == pytest.approx(0.8796 / 4**0.5, rel=0.1)
    for path, array in params.items():
        if array.ndim == 1:
            assert (array == (path.endswith("weight"))).all(), path
    again, other = flat(flash3d.init(config, seed=3)), flat(flash3d.init(config, seed=4))
    assert all((again[path] == params[path]).all() for path in params)
    assert (other["stem.weight"] != params["stem.weight"]).mean() > 0.99
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        flash3d.init(config, seed=-1)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1.5"):
        flash3d.init(config, seed=1.5)


BAD_CONFIGS = [
    ({"channels": 8}, TypeError, "channels must be a tuple, one per level, got 8 of type int"),
    ({"channels": ()}, ValueError, "channels must have at least one entry"),
    ({"channels": (8, 16, 0)}, ValueError, r"channels\[2\] must be at least 1, got 0"),
    ({"channels": (8, 16.0, 16)}, TypeError, r"channels\[1\] must be an integer, got 16.0"),
    ({"depths": (2, 2)}, ValueError, "depths must have 3 entries, one per level, got 2"),
    ({"decoder_depths": (1, 1, 1)}, ValueError, "decoder_depths must have 2 entries"),
    ({"heads": (1, 3, 1)}, ValueError, r"channels\[1\] / heads\[1\] must be a multiple of 8 .* got 16 / 3"),
    ({"decoder_heads": (4, 1)}, ValueError, r"decoder_channels\[0\] / decoder_heads\[0\] .* got 16 / 4"),
    ({"channels": (8, 16, 136)}, ValueError, "at most 128, got 136 / 1"),
    ({"hashes": ("zorder_div", "morton", "xor_mod")}, ValueError, r"hashes\[1\] must be one of .*, got 'morton'"),
    ({"strides": (2, 0, 1)}, ValueError, r"strides\[1\] must be at least 1, got 0"),
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
    ({"classes": True}, TypeError, "classes must be an integer, got True"),
    ({"bucket_size": 24}, ValueError, "bucket_size must be a multiple of 16 from 16 to 16384, got 24"),
    ({"scope": 0}, ValueError, "scope must be at least 1, got 0"),
    ({"ratio": 3}, ValueError, "ratio must be 2, 4 or 8, got 3"),
    ({"mlp": -1}, ValueError, "mlp must be at least 1, got -1"),
    ({"drop_path": 1.0}, ValueError, "drop_path must be at least 0 and below 1, got 1.0"),
    ({"drop_path": float("nan")}, ValueError, "drop_path must be at least 0 and below 1, got nan"),
    ({"wavelengths": (1.0,)}, ValueError, "wavelengths must have 2 entries, the shortest and the longest, got 1"),
    ({"wavelengths": (200, 0.2)}, ValueError, "wavelengths must be .*: exchange the two"),
    ({"wavelengths": (0, 1)}, ValueError, r"wavelengths\[0\] must be positive and finite, got 0"),
    ({"epsilon": float("inf")}, ValueError, "epsilon must be positive and finite, got inf"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CONFIGS)
def test_bad_config(changes, error, message):
    with pytest.raises(error, match=message):
        CONFIG.replace(**changes)


def test_config_is_a_value():
    as_lists = flash3d.Config(**json.loads(json.dumps(dataclasses.asdict(CONFIG))))
    assert as_lists == CONFIG and hash(as_lists) == hash(CONFIG)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.classes = 3


# ---- geometry ------------------------------------------------------------------------------------------------------


def local_chain(points, config, lengths):
    """The local layouts of all levels, the points of each, packed, and the poolings between them."""
    layouts, packed, poolings = [gpu3d.bucketize(points, config.bucket_size, lengths=lengths)], [points], []
    for _ in range(config.levels - 1):
        in_slots = layouts[-1].scatter(packed[-1])
        poolings.append(gpu3d.bucket_pool(in_slots, in_slots, layouts[-1], ratio=config.ratio))
        layouts.append(poolings[-1].buckets)
        packed.append(layouts[-1].gather(poolings[-1].points))
    return layouts, packed, poolings


@pytest.mark.parametrize(
    ("ratio", "hashes"), [(2, CONFIG.hashes), (4, ("xor_mod", "zorder_mod", "zorder_div")), (8, CONFIG.hashes)]
)
def test_composed_members_are_pooling_in_local_order(ratio, hashes):
    config, lengths = CONFIG.replace(ratio=ratio, hashes=hashes), (1500, 0, 1, 700)  # more than a pooling tile
    (points, _), rng = scene(lengths), np.random.default_rng(0)
    levels = geometry(points, config, lengths)
    layouts, packed, poolings = local_chain(points, config, lengths)
    for level, local, positions, hash in zip(levels, layouts, packed, hashes, strict=True):
        assert level.buckets.lengths == local.lengths and level.buckets.num_slots == local.num_slots
        stage = gpu3d.bucketize(positions, 16, lengths=local.lengths, hash=hash)
        assert (level.buckets.slot_to_point == stage.slot_to_point).all()
        assert (level.positions == stage.scatter(positions)).all() and level.positions.dtype == np.float32
    moved = 0
    for l, pooled in enumerate(poolings):
        stage, child_stage, members = levels[l].buckets, levels[l + 1].buckets, levels[l].members
        local, child = layouts[l], layouts[l + 1]
        x, y = (of.scatter(rng.standard_normal((sum(of.lengths), 4))) for of in (stage, child_stage))
        in_local = local.scatter(stage.gather(x))
        moved += (in_local != x).any(axis=1).sum()
        by_definition = gpu3d.bucket_pool(in_local, local.scatter(packed[l]), local, ratio=ratio)
        expected = child_stage.scatter(child.gather(by_definition.features))
        assert reference.pool(x, members).tobytes() == expected.tobytes()
        unpooled = gpu3d.bucket_unpool(child.scatter(child_stage.gather(y)), pooled)
        assert reference.unpool(y, members, len(x)).tobytes() == stage.scatter(local.gather(unpooled)).tobytes()
    assert moved > 250  # the stage layouts differ from the local ones
    assert levels[-1].members is None


def test_scopes_of_blocks():
    points, _ = scene()
    levels = geometry(points, CONFIG.replace(scope=4), LENGTHS)
    for level, stride in zip(levels, CONFIG.strides, strict=True):
        even, odd = level.scopes
        assert (even.size, even.shift, even.stride) == (4, 0, 1)
        assert (odd.size, odd.shift, odd.stride) == (4, 2, stride)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (1, 1, 1), (15, 16, 17), (2, 0, 3)])
def test_small_clouds(lengths):
    points, features = scene(lengths)
    levels = geometry(points, CONFIG.replace(ratio=8), lengths)
    assert levels[-1].buckets.lengths == tuple(-(-n // 64) for n in lengths)
    for level in levels[:-1]:
        parents = level.members[level.members >= 0]
        assert (np.sort(parents) == np.flatnonzero(level.buckets.slot_to_point >= 0)).all()
    batch = flash3d.Batch(points, features, lengths)
    logits = flash3d.forward(flash3d.init(CONFIG), batch, CONFIG)
    assert logits.shape == (sum(lengths), 5) and np.isfinite(logits).all()
    loss, grads = flash3d.loss_and_grad(flash3d.init(CONFIG), batch, labels_of(points), CONFIG)
    assert np.isfinite(loss) and all(np.isfinite(gradient).all() for gradient in flat(grads).values())


# ---- layers --------------------------------------------------------------------------------------------------------


def rows(n=20, channels=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, channels))


def layer_params(outputs, inputs, seed=2):
    rng = np.random.default_rng(seed)
    return {"weight": rng.standard_normal((outputs, inputs)), "bias": rng.standard_normal(outputs)}


def norm_params(channels, seed=3):
    return {name: row for name, row in zip(("weight", "bias"), rows(2, channels, seed), strict=True)}


def test_linear_backward():
    x, params, dy = rows(), layer_params(4, 6), rows(channels=4, seed=1)
    dx, grads = reference.linear_backward(dy, x, params)
    assert_gradients(lambda: (reference.linear(x, params) * dy).sum(), {"x": x} | params, {"x": dx} | grads)


def test_gelu_backward():
    x, dy = 3 * rows(), rows(seed=1)
    dx = reference.gelu_backward(dy, x)
    assert_gradients(lambda: (reference.gelu(x) * dy).sum(), {"x": x}, {"x": dx})


def test_layer_norm_backward():
    x, params, dy = rows(), norm_params(6), rows(seed=1)
    x[3] *= 1e-3  # where epsilon counts
    dx, grads = reference.layer_norm_backward(dy, x, params, 1e-5)
    f = lambda: (reference.layer_norm(x, params, 1e-5) * dy).sum()  # noqa: E731
    assert_gradients(f, {"x": x} | params, {"x": dx} | grads)


def test_layers_are_those_of_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, linear, norm = rows(), layer_params(4, 6), norm_params(6)
    t = torch.from_numpy
    for ours, theirs in (
        (reference.linear(x, linear), functional.linear(t(x), t(linear["weight"]), t(linear["bias"]))),
        (reference.gelu(x), functional.gelu(t(x), approximate="tanh")),
        (
            reference.layer_norm(x, norm, 0.1),
            functional.layer_norm(t(x), (6,), t(norm["weight"]), t(norm["bias"]), 0.1),
        ),
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (3, 16), (2, 32)])
def test_rotate_by_definition(heads, dim):
    positions, qkv, waves = clouds.uniform(10), rows(10, 3 * heads * dim), dim // 6
    got = reference.rotate(qkv, positions, heads, (0.5, 100.0)).reshape(10, 3, heads, dim)
    given = qkv.reshape(got.shape)
    assert (got[:, 2] == given[:, 2]).all() and (got[:, :, :, 6 * waves :] == given[:, :, :, 6 * waves :]).all()
    for axis, i in itertools.product(range(3), range(waves)):
        wavelength = 0.5 * 200.0 ** (i / max(1, waves - 1))
        turn = np.exp(2j * np.pi * positions[:, axis].astype(float) / wavelength)[:, None, None]
        even, odd = (2 * (axis * waves + i) + j for j in (0, 1))
        expected = (given[:, :2, :, even] + 1j * given[:, :2, :, odd]) * turn
        np.testing.assert_allclose(got[:, :2, :, even], expected.real, atol=1e-4)  # float32 arguments of some hundreds
        np.testing.assert_allclose(got[:, :2, :, odd], expected.imag, atol=1e-4)
    back = reference.rotate(got.reshape(qkv.shape), -positions, heads, (0.5, 100.0))
    np.testing.assert_allclose(back, qkv, rtol=1e-12, atol=1e-12)


def test_products_depend_on_differences_of_positions():
    """Powers of two and small integers, so that all arguments are exact."""
    positions = np.random.default_rng(0).integers(0, 64, (12, 3)).astype(np.float32)
    qkv = rows(12, 3 * 16)

    def products(positions):
        q, k, _ = reference.rotate(qkv, positions, 1, (2.0, 8.0)).reshape(12, 3, 16).swapaxes(0, 1)
        return q @ k.T

    moved = products(positions + np.float32([1024, -512, 64]))
    np.testing.assert_allclose(moved, products(positions), rtol=1e-12, atol=1e-12)
    assert np.abs(products(positions * 2) - products(positions)).max() > 0.1


def place(lengths=LENGTHS, heads=2, keep=(1.0, 1.0)):
    level = geometry(scene(lengths)[0], CONFIG, lengths)[0]
    return reference.Place(level, level.scopes[1], heads, CONFIG, keep)


def zero_padding(x, buckets):
    x[buckets.slot_to_point < 0] = 0
    return x


def test_attention_backward():
    at = place()
    where = at.level.buckets, at.scopes, at.heads
    qkv = rows(at.level.buckets.num_slots, 48)
    dout = zero_padding(rows(len(qkv), 16, seed=1), at.level.buckets)
    out, lse = reference.attention(qkv, *where)
    dqkv = reference.attention_backward(dout, qkv, out, lse, *where)
    assert_gradients(lambda: (reference.attention(qkv, *where)[0] * dout).sum(), {"qkv": qkv}, {"qkv": dqkv})


@pytest.mark.parametrize("ratio", [2, 4])
def test_pool_and_unpool_backward(ratio):
    level = geometry(scene()[0], CONFIG.replace(ratio=ratio), LENGTHS)[0]
    members, slots = level.members, level.buckets.num_slots
    x, child = rows(slots), rows(len(members), seed=1)
    dchild, dout = rows(len(members), seed=2), rows(slots, seed=3)
    dx, dgathered = reference.pool_backward(dchild, members, slots), reference.unpool_backward(dout, members)
    assert_gradients(lambda: (reference.pool(x, members) * dchild).sum(), {"x": x}, {"x": dx})
    f = lambda: (reference.unpool(child, members, slots) * dout).sum()  # noqa: E731
    assert_gradients(f, {"child": child}, {"child": dgathered})


def part(path):
    """The parameters at a path of the network's."""
    params = random_params()
    for key in path.split("."):
        params = params[key]
    return params


def test_project_backward():
    params, x = part("encoder.1.down"), rows(12, 8)
    y, tape = reference.project(x, params, 1e-5)
    dy = rows(*y.shape, seed=1)
    dx, grads = reference.project_backward(dy, tape, params, 1e-5)
    f = lambda: (reference.project(x, params, 1e-5)[0] * dy).sum()  # noqa: E731
    assert_gradients(f, {"x": x} | flat(params), {"x": dx} | flat(grads))


@pytest.mark.parametrize("training", [None, TRAINING])
def test_block_backward(training):
    params, slots = part("encoder.1.blocks.0"), place().level.buckets.num_slots
    at = place(keep=tuple(reference.drop_path(slots, branch, 0.4, training) for branch in (0, 1)))
    x = rows(slots, 16)
    dy = zero_padding(rows(slots, 16, seed=2), at.level.buckets)
    _, tape = reference.block(x, params, at)
    dx, grads = reference.block_backward(dy, tape, params)
    f = lambda: (reference.block(x, params, at)[0] * dy).sum()  # noqa: E731
    assert_gradients(f, {"x": x} | flat(params), {"x": dx} | flat(grads))
    assert (dx[at.level.buckets.slot_to_point < 0] == 0).all()


# ---- drop path -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),  # of Random123, the authors' own library
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter, key, words):
    assert tuple(int(word) for word in reference.philox(counter, key)) == words


def test_drop_path():
    factors = reference.drop_path(20_000, 5, 0.3, TRAINING)
    assert factors.shape == (20_000, 1) and set(np.unique(factors)) == {0, 1 / 0.7}
    assert (factors == 0).mean() == pytest.approx(0.3, abs=0.015)
    word = reference.philox((17, 5, TRAINING.step, 0), (TRAINING.seed & 0xFFFFFFFF, TRAINING.seed >> 32))[0]
    assert (factors[17, 0] == 0) == (word < int(0.3 * 2**32))
    assert (reference.drop_path(50, 5, 0.3, TRAINING) == factors[:50]).all()  # a row's number is its own
    for other in (
        reference.drop_path(20_000, 4, 0.3, TRAINING),
        reference.drop_path(20_000, 5, 0.3, TRAINING._replace(step=4)),
        reference.drop_path(20_000, 5, 0.3, TRAINING._replace(seed=7)),  # the same low word
    ):
        assert (other != factors).mean() > 0.3
    assert (reference.drop_path(100, 5, 0.0, TRAINING) == 1).all()
    assert reference.drop_path(100, 5, 0.3, None) == 1


def test_drop_rates_grow_over_all_blocks():
    blocks = 2 + 2 + 1 + 2 + 1
    assert [reference.drop_rate(k, CONFIG) for k in range(blocks)] == [0.5 * k / 7 for k in range(blocks)]
    points, features = scene()
    levels = geometry(points, CONFIG, LENGTHS)
    _, tape = reference.forward(random_params(), levels, features, CONFIG, TRAINING)
    order = [*(b for level in tape.encoder for b in level.blocks), *(b for level in tape.decoder for b in level.blocks)]
    for k, saved in enumerate(order):
        for branch in (0, 1):
            expected = reference.drop_path(len(saved.qkv), 2 * k + branch, 0.5 * k / 7, TRAINING)
            assert (saved.place.keep[branch] == expected).all()


# ---- the whole network ---------------------------------------------------------------------------------------------


def test_gradients_of_the_network():
    (points, features), params = scene(), random_params()
    levels, features = geometry(points, CONFIG, LENGTHS), features.astype(np.float64)
    dlogits = rows(len(points), CONFIG.classes)
    _, tape = reference.forward(params, levels, features, CONFIG, TRAINING)
    dfeatures, grads = reference.backward(dlogits, tape, params, levels, CONFIG)
    f = lambda: (reference.forward(params, levels, features, CONFIG, TRAINING)[0] * dlogits).sum()  # noqa: E731
    arrays = flat(params)
    assert_gradients(f, arrays | {"features": features}, flat(grads) | {"features": dfeatures})


def logits_by_torch(params, points, features, lengths, config):
    """The logits of the definition: torch's layers, and features that pooling brings into local order and back."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    layouts, packed, poolings = local_chain(torch.from_numpy(points), config, lengths)
    stages = [
        gpu3d.bucketize(x, config.bucket_size, lengths=of.lengths, hash=hash)
        for x, of, hash in zip(packed, layouts, config.hashes, strict=True)
    ]

    def linear(x, path):
        return functional.linear(x, params[f"{path}.weight"], params[f"{path}.bias"])

    def norm(x, path):
        return functional.layer_norm(x, x.shape[1:], params[f"{path}.weight"], params[f"{path}.bias"], config.epsilon)

    def gelu(x):
        return functional.gelu(x, approximate="tanh")

    def project(x, path):
        return gelu(norm(linear(x, path), f"{path}.norm"))

    def turn(qkv, l):
        """By complex numbers: a pair of elements is one."""
        pairs = torch.view_as_complex(qkv.unflatten(3, (-1, 2)).contiguous())
        turns = reference.half_turns(qkv.shape[3], config.wavelengths)
        half = (stages[l].scatter(packed[l])[:, :, None] * torch.from_numpy(turns)).double().flatten(1)
        half = functional.pad(half, (0, pairs.shape[3] - half.shape[1]))[:, None, None]
        turned = pairs[:, :2] * torch.polar(torch.ones_like(half), torch.pi * half)
        return torch.view_as_real(torch.cat([turned, pairs[:, 2:]], dim=1)).flatten(3)

    def blocks(x, l, path, depth, heads):
        for i in range(depth):
            block = f"{path}.blocks.{i}"
            stride, shift = (config.strides[l], config.scope // 2) if i % 2 else (1, 0)
            scopes = gpu3d.scopes(stages[l], config.scope, shift=shift, stride=stride)
            qkv = linear(norm(x, f"{block}.norm1"), f"{block}.qkv").reshape(len(x), 3, heads, -1)
            attended = gpu3d.bucket_attention(*turn(qkv, l).unbind(1), stages[l], scopes)
            x = x + linear(attended.reshape(len(x), -1), f"{block}.proj")
            x = x + linear(gelu(linear(norm(x, f"{block}.norm2"), f"{block}.fc1")), f"{block}.fc2")
        return x

    x, skips = linear(stages[0].scatter(features), "stem"), []
    for l, heads in enumerate(config.heads):
        if l:
            above = layouts[l - 1]
            in_local = above.scatter(stages[l - 1].gather(x))
            pooled = gpu3d.bucket_pool(in_local, above.scatter(packed[l - 1]), above, ratio=config.ratio)
            x = project(stages[l].scatter(layouts[l].gather(pooled.features)), f"encoder.{l}.down")
        x = blocks(x, l, f"encoder.{l}", config.depths[l], heads)
        skips.append(x)
    for l in reversed(range(config.levels - 1)):
        child = layouts[l + 1].scatter(stages[l + 1].gather(project(x, f"decoder.{l}.up")))
        unpooled = layouts[l].gather(gpu3d.bucket_unpool(child, poolings[l]))
        x = stages[l].scatter(unpooled) + project(skips[l], f"decoder.{l}.skip")
        x = blocks(x, l, f"decoder.{l}", config.decoder_depths[l], config.decoder_heads[l])
    return stages[0].gather(linear(norm(x, "head.norm"), "head"))


def test_the_network_is_its_definition_in_torch():
    torch = pytest.importorskip("torch")
    (points, features), params = scene(), random_params()
    levels, dlogits = geometry(points, CONFIG, LENGTHS), rows(len(points), CONFIG.classes)
    logits, tape = reference.forward(params, levels, features, CONFIG)
    dfeatures, grads = reference.backward(dlogits, tape, params, levels, CONFIG)

    tensors = {path: torch.tensor(array, requires_grad=True) for path, array in flat(params).items()}
    input = torch.tensor(features, dtype=torch.float64, requires_grad=True)
    expected = logits_by_torch(tensors, points, input, LENGTHS, CONFIG)
    expected.backward(torch.from_numpy(dlogits))
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-10, atol=1e-10)
    for path, gradient in (flat(grads) | {"features": dfeatures}).items():
        theirs = tensors.get(path, input).grad.numpy()
        assert np.linalg.norm(gradient - theirs) <= 1e-10 * np.linalg.norm(theirs), path


def test_padding_changes_nothing():
    (points, features), params = scene(), random_params()
    levels = geometry(points, CONFIG, LENGTHS)
    dlogits = rows(len(points), CONFIG.classes)

    def run(levels):
        logits, tape = reference.forward(params, levels, features, CONFIG)
        return {"logits": logits} | flat(reference.backward(dlogits, tape, params, levels, CONFIG)[1])

    spoiled = []
    for level in levels:
        positions = level.positions.copy()
        padding = level.buckets.slot_to_point < 0
        assert padding.any()
        positions[padding] = 37.5
        spoiled.append(level._replace(positions=positions))
    for (name, a), b in zip(run(levels).items(), run(spoiled).values(), strict=True):
        assert a.tobytes() == b.tobytes(), name


def test_a_cloud_alone_and_in_a_batch():
    (points, features), params = scene(), random_params()
    together, _ = reference.forward(params, geometry(points, CONFIG, LENGTHS), features, CONFIG)
    first = 0
    for n in LENGTHS:
        own = slice(first, first + n)
        alone, _ = reference.forward(params, geometry(points[own], CONFIG), features[own], CONFIG)
        np.testing.assert_allclose(alone, together[own], rtol=1e-12, atol=1e-12)
        first += n


def test_the_order_of_points_follows():
    """Points and features in another order give the same logits in that order, so features stay with their points."""
    points, features = scene((100,))
    order, params = np.random.default_rng(0).permutation(100), random_params()
    logits, permuted = (
        reference.forward(params, geometry(points[i], CONFIG), features[i], CONFIG)[0] for i in (np.arange(100), order)
    )
    np.testing.assert_allclose(permuted, logits[order], rtol=1e-12, atol=1e-12)
    assert np.ptp(logits, axis=0).min() > 0.1


def test_public_calls_are_the_reference_rounded():
    points, features = scene()
    params, labels = flash3d.init(CONFIG, seed=5), labels_of(points)
    batch, levels = flash3d.Batch(points, features, list(LENGTHS)), geometry(points, CONFIG, LENGTHS)
    exact = pack(flat(params), CONFIG, np.float64)
    expected, tape = reference.forward(exact, levels, features, CONFIG)
    logits = flash3d.forward(params, batch, CONFIG)
    assert logits.dtype == np.float32 and (logits == expected.astype(np.float32)).all()
    loss, grads = flash3d.loss_and_grad(params, batch, labels, CONFIG)
    expected_loss, dlogits = reference.segmentation_loss(expected, labels, 255)
    assert loss == np.float32(expected_loss) and loss.dtype == np.float32 and loss.shape == ()
    _, expected_grads = reference.backward(dlogits, tape, exact, levels, CONFIG)
    arrays = flat(grads)
    assert arrays.keys() == flat(params).keys()
    for path, gradient in flat(expected_grads).items():
        assert arrays[path].dtype == np.float32 and (arrays[path] == gradient.astype(np.float32)).all(), path
    base = arrays["stem.weight"].base
    assert base.shape == (arena_size(CONFIG),) and all(array.base is base for array in arrays.values())


def test_batches_of_equal_clouds():
    points, features = scene((20, 20))
    packed = flash3d.Batch(points, features, [20, 20])
    shaped = flash3d.Batch(points.reshape(2, 20, 3), features.reshape(2, 20, 3))
    params = flash3d.init(CONFIG)
    assert shaped.lengths == packed.lengths == (20, 20)
    assert (flash3d.forward(params, shaped, CONFIG) == flash3d.forward(params, packed, CONFIG)).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_features_of_any_float_dtype(dtype):
    points, features = scene()
    params, given = flash3d.init(CONFIG), features.astype(dtype)
    logits = flash3d.forward(params, flash3d.Batch(points.astype(np.float64), given, LENGTHS), CONFIG)
    same = flash3d.forward(params, flash3d.Batch(points, given.astype(np.float32), LENGTHS), CONFIG)
    assert logits.dtype == np.float32 and (logits == same).all()


@pytest.mark.parametrize("spoiled", ["features", "points"])
def test_nan_gives_a_nan_loss(spoiled):
    arrays = dict(zip(("points", "features"), scene(), strict=True))
    arrays[spoiled][3, 1] = np.nan
    batch = flash3d.Batch(**arrays, lengths=LENGTHS)
    loss, _ = flash3d.loss_and_grad(flash3d.init(CONFIG), batch, labels_of(batch.points), CONFIG)
    assert np.isnan(loss)
    logits = flash3d.forward(flash3d.init(CONFIG), batch, CONFIG)
    assert np.isnan(logits[3]).all() and np.isfinite(logits[LENGTHS[0] :]).all()  # other clouds are not affected


def test_a_decoder_is_not_needed():
    config = CONFIG.replace(
        channels=(8,),
        depths=(1,),
        heads=(1,),
        hashes=("xor_mod",),
        strides=(1,),
        decoder_channels=(),
        decoder_depths=(),
        decoder_heads=(),
    )
    (points, features), params = scene(), random_params(config)
    levels, labels, features = geometry(points, config, LENGTHS), labels_of(points), features.astype(np.float64)
    assert reference.drop_rate(0, config) == 0
    logits, tape = reference.forward(params, levels, features, config)
    _, dlogits = reference.segmentation_loss(logits, labels, 255)
    dfeatures, _ = reference.backward(dlogits, tape, params, levels, config)
    f = lambda: reference.segmentation_loss(  # noqa: E731
        reference.forward(params, levels, features, config)[0], labels, 255
    )[0]
    assert_gradients(f, {"features": features}, {"features": dfeatures})


# ---- losses --------------------------------------------------------------------------------------------------------


def test_cross_entropy_is_that_of_torch():
    torch = pytest.importorskip("torch")
    logits, labels = 5 * rows(40, 5), labels_of(np.zeros(40))
    valid = labels != 255
    loss, dlogits = reference.cross_entropy(logits[valid], labels[valid])
    tensor = torch.from_numpy(logits).requires_grad_()
    expected = torch.nn.functional.cross_entropy(tensor, torch.from_numpy(labels), ignore_index=255)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(dlogits, tensor.grad.numpy()[valid], rtol=1e-10, atol=1e-15)


def lovasz_by_definition(probabilities, labels):
    """Lovasz's extension of the Jaccard loss of a set of errors, over sets of rows."""
    losses = []
    for c in sorted(set(labels.tolist())):
        foreground = {i for i, label in enumerate(labels) if label == c}
        errors = [abs((i in foreground) - p) for i, p in enumerate(probabilities[:, c])]
        loss, wrong, before = 0.0, set(), 0.0
        for i in sorted(range(len(errors)), key=lambda i: (-errors[i], i)):
            wrong.add(i)
            after = 1 - len(foreground - wrong) / len(foreground | wrong)
            loss += errors[i] * (after - before)
            before = after
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("present", [(0, 1, 2, 3, 4), (1, 4), (2,)])
def test_lovasz_by_definition(present):
    logits = 2 * rows(30, 5)
    labels = np.random.default_rng(0).choice(present, 30)
    loss, dlogits = reference.lovasz_softmax(logits, labels)
    assert loss == pytest.approx(lovasz_by_definition(reference.softmax(logits), labels), rel=1e-12)
    f = lambda: reference.lovasz_softmax(logits, labels)[0]  # noqa: E731
    assert_gradients(f, {"logits": logits}, {"logits": dlogits})


def test_lovasz_of_ties():
    logits, labels = np.zeros((6, 3)), np.array([0, 1, 0, 1, 1, 0])
    loss, dlogits = reference.lovasz_softmax(logits, labels)
    assert loss == pytest.approx(lovasz_by_definition(np.full((6, 3), 1 / 3), labels), rel=1e-12)
    assert np.isfinite(dlogits).all() and dlogits.any()


def test_extreme_logits_have_a_finite_loss():
    logits, labels = np.array([[1e4, 0, -1e4], [0, 1e4, 0]]), np.array([2, 1])
    loss, dlogits = reference.segmentation_loss(logits, labels, 255)
    assert loss == pytest.approx(2e4 / 2 + 0.5) and np.isfinite(dlogits).all()


def test_ignored_points_do_not_count():
    logits, labels = rows(40, 5), labels_of(np.zeros(40))
    valid = labels != 255
    loss, dlogits = reference.segmentation_loss(logits, labels, 255)
    alone, dalone = reference.segmentation_loss(logits[valid], labels[valid], 255)
    assert loss == alone and (dlogits[valid] == dalone).all() and (dlogits[~valid] == 0).all()
    others, _ = reference.segmentation_loss(logits, np.where(valid, labels, -3), 255)  # as on a device
    assert others == loss
    without_class_0, dlogits = reference.segmentation_loss(logits, labels, 0)
    assert without_class_0 != loss and (dlogits[labels == 0] == 0).all()


@pytest.mark.parametrize("ignore", [255, -1, 2])
def test_all_ignored(ignore):
    points, features = scene()
    batch = flash3d.Batch(points, features, LENGTHS)
    loss, grads = flash3d.loss_and_grad(
        flash3d.init(CONFIG), batch, np.full(len(points), ignore), CONFIG, ignore=ignore
    )
    assert loss == 0 and all((gradient == 0).all() for gradient in flat(grads).values())


# ---- bad input -----------------------------------------------------------------------------------------------------

POINTS, FEATURES = scene()
BAD_BATCHES = [
    ((POINTS.tolist(), FEATURES), TypeError, "points must be an array"),
    ((POINTS[:, :2], FEATURES), ValueError, r"points must have 3 coordinates .* got shape \[120, 2\]"),
    ((POINTS.astype(int), FEATURES), TypeError, "points must be float32, .* got int64: convert"),
    (
        (POINTS, FEATURES[:-1]),
        ValueError,
        r"features must have a row .* got shape \[119, 3\] for points of .*\[120, 3\]",
    ),
    ((POINTS, FEATURES[:, 0]), ValueError, r"features must have a row of channels .* got shape \[120\]"),
    ((POINTS, FEATURES > 0), TypeError, "features must be float32, .* got bool"),
    ((POINTS, FEATURES, [100]), ValueError, "lengths must sum to the number of points, got a sum of 100 for 120"),
    ((POINTS[None], FEATURES[None], [120]), ValueError, "already says its lengths"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_BATCHES)
def test_bad_batch(arguments, error, message):
    with pytest.raises(error, match=message):
        flash3d.Batch(*arguments)


def test_batch_refuses_tensors():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match=r"features must be a NumPy or CuPy array, got torch .* numpy.asarray\(features\)"
    ):
        flash3d.Batch(POINTS, torch.from_numpy(FEATURES))


LABELS = labels_of(POINTS)
BAD_LABELS = [
    (LABELS.tolist(), TypeError, "labels must be an array"),
    (LABELS.astype(float), TypeError, r"labels must be integers, got float64: convert by labels.astype"),
    (LABELS[1:], ValueError, r"labels must have shape \[120\], one for each point, got \[119\]"),
    (LABELS[:, None], ValueError, r"got \[120, 1\]"),
    (
        np.where(np.arange(120) % 100 == 9, 5, LABELS),
        ValueError,
        r"0..4 or ignore=255, got 2 others, the first 5 at index 9",
    ),
    (np.where(np.arange(120) == 9, -1, LABELS), ValueError, "got 1 others, the first -1 at index 9"),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS)
def test_bad_labels(labels, error, message):
    batch = flash3d.Batch(POINTS, FEATURES, LENGTHS)
    with pytest.raises(error, match=message):
        flash3d.loss_and_grad(flash3d.init(CONFIG), batch, labels, CONFIG)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_dtype(dtype):
    batch, params = flash3d.Batch(POINTS, FEATURES, LENGTHS), flash3d.init(CONFIG)
    loss, _ = flash3d.loss_and_grad(params, batch, LABELS, CONFIG)
    assert flash3d.loss_and_grad(params, batch, LABELS.astype(dtype), CONFIG)[0] == loss


def test_bad_calls():
    batch, params = flash3d.Batch(POINTS, FEATURES, LENGTHS), flash3d.init(CONFIG)
    for call in (flash3d.init, flash3d.count, lambda config: flash3d.forward(params, batch, config)):
        for config in ("tiny", {"classes": 5}):
            with pytest.raises(
                TypeError, match=r"config must be a flash3d.Config, got .*: take one of flash3d.presets"
            ):
                call(config)
    with pytest.raises(TypeError, match=r"batch must be a flash3d.Batch, got ndarray: make it by"):
        flash3d.forward(params, POINTS, CONFIG)
    with pytest.raises(TypeError, match=r"params must be the nested dict that flash3d.init returns, got list"):
        flash3d.forward([], batch, CONFIG)
    with pytest.raises(ValueError, match=r"has encoder.0.blocks.0.qkv.weight of shape \[24, 8\], .* have \[24, 7\]"):
        qkv = params["encoder"]["0"]["blocks"]["0"]["qkv"]
        weight, qkv["weight"] = qkv["weight"], qkv["weight"][:, 1:]
        flash3d.forward(params, batch, CONFIG)
    qkv["weight"] = weight
    with pytest.raises(ValueError, match=r"has head.weight of shape \[6, 16\], but the params have \[5, 16\]"):
        flash3d.forward(params, batch, CONFIG.replace(classes=6))
    with pytest.raises(ValueError, match=r"the config has no extra.weight, but the params do"):
        flash3d.forward(params | {"extra": {"weight": weight}}, batch, CONFIG)
    with pytest.raises(ValueError, match=r"the config has stem.weight .* but the params have none"):
        flash3d.forward({}, batch, CONFIG)
    with pytest.raises(ValueError, match=r"features must have the 3 channels of config.in_channels, got 2"):
        flash3d.forward(params, flash3d.Batch(POINTS, FEATURES[:, :2], LENGTHS), CONFIG)
    with pytest.raises(TypeError, match="ignore must be an integer, got None"):
        flash3d.loss_and_grad(params, batch, LABELS, CONFIG, ignore=None)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def new_state(arena):
    return optim.State(np.zeros_like(arena), np.zeros_like(arena))


@pytest.mark.parametrize("steps", [1, 2, 25, 26, 100, 2500])
def test_one_cycle_is_that_of_torch(steps):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    options = {"pct_start": 0.04, "div_factor": 10, "final_div_factor": 100, "cycle_momentum": False}
    if steps == 25:  # torch divides by zero where the peak is at step 0
        assert optim.one_cycle(0, steps, 2e-3) == 2e-3
        return
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, **options)
    for step in range(steps):
        assert optim.one_cycle(step, steps, 2e-3) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    with pytest.raises(ValueError, match=f"step must be from 0 to {steps - 1}.* got {steps}"):
        optim.one_cycle(steps, steps, 2e-3)


def test_adamw_is_that_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arena, decayed = rng.standard_normal(300).astype(np.float32), 200
    parameters = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in np.split(arena, [decayed])]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, (0.1, 0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    state, clipped = new_state(arena), set()
    for step in range(20):
        gradient = (rng.standard_normal(300) * (3, 1e-5, 1e-6)[step % 3]).astype(np.float32)
        for parameter, own in zip(parameters, np.split(gradient, [decayed]), strict=True):
            parameter.grad = torch.tensor(own, dtype=torch.float64)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e-4)
        clipped.add(norm.item() > 1e-4)
        assert optim.global_norm(gradient) == pytest.approx(norm.item(), rel=1e-12)
        optimizer.step()
        assert optim.update(arena, gradient, 0.5, state, lr=1e-2, weight_decay=0.1, decayed=decayed, clip=1e-4)
    assert clipped == {True, False} and state.steps == 20 and state.skipped == 0
    expected = torch.cat(parameters).detach().numpy()
    np.testing.assert_allclose(arena, expected, rtol=20 * 2.0**-24, atol=20 * 2.0**-24)


@pytest.mark.parametrize(("loss", "bad"), [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_is_skipped(loss, bad):
    arena, gradient = np.ones(10, np.float32), np.ones(10, np.float32)
    state, options = new_state(arena), {"lr": 0.1, "weight_decay": 0.1, "decayed": 5, "clip": 1.0}
    assert optim.update(arena, gradient, 1.0, state, **options)
    kept = arena.copy(), state.first.copy(), state.second.copy()
    gradient[7] = bad
    assert not optim.update(arena, gradient, loss, state, **options)
    assert all((a == b).all() for a, b in zip(kept, (arena, state.first, state.second), strict=True))
    assert (state.steps, state.skipped) == (1, 1)


def test_the_gaps_of_an_arena_stay_zero():
    arena = flash3d.init(CONFIG)["stem"]["weight"].base
    points, features = scene()
    _, grads = flash3d.loss_and_grad(views(arena, CONFIG), flash3d.Batch(points, features), LABELS, CONFIG)
    before = arena.copy()
    optim.update(
        arena,
        grads["stem"]["weight"].base,
        1.0,
        new_state(arena),
        lr=0.1,
        weight_decay=0.1,
        decayed=500,
        clip=1.0,
    )
    gaps = np.ones(len(arena), bool)
    for array in flat(views(gaps, CONFIG)).values():
        array[...] = False
    assert gaps.any() and (arena[gaps] == 0).all() and (arena != before).mean() > 0.5


def test_training_lowers_the_loss():
    points, features = scene()
    labels = (points[:, 0] > 0).astype(int)
    params, batch = flash3d.init(CONFIG), flash3d.Batch(points, features, LENGTHS)
    arena = params["stem"]["weight"].base
    state, losses = new_state(arena), []
    for step in range(25):
        loss, grads = flash3d.loss_and_grad(params, batch, labels, CONFIG)
        losses.append(loss)
        lr, options = optim.one_cycle(step, 25, 1e-2), {"weight_decay": 5e-3, "clip": 1.0}
        gradient = grads["stem"]["weight"].base
        optim.update(arena, gradient, loss, state, lr=lr, decayed=decayed_size(CONFIG), **options)
    assert losses[0] > 1.9 and losses[-1] < 0.5 * losses[0]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    params = pack(flat(random_params()), CONFIG, np.float32)
    flash3d.save(path, params, CONFIG)
    return path, params


def rewrite(path, change):
    """Change the header of a file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def test_checkpoint_comes_back(saved):
    path, params = saved
    loaded, config = flash3d.load(str(path))
    assert config == CONFIG and list(path.parent.iterdir()) == [path]
    for name, array in flat(params).items():
        assert flat(loaded)[name].dtype == np.float32 and (flat(loaded)[name] == array).all()
    assert flat(loaded)["head.weight"].base.shape == (arena_size(CONFIG),)
    loaded["head"]["weight"][0, 0] = 1  # it can be trained on


def test_checkpoint_is_the_safetensors_format(saved, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path, params = saved
    arrays = safetensors.load_file(path)
    assert arrays.keys() == flat(params).keys()
    assert all((arrays[name] == array).all() for name, array in flat(params).items())
    theirs = tmp_path / "theirs.safetensors"
    metadata = {"gpu3d.flash3d": json.dumps(dataclasses.asdict(CONFIG)), "format": "np"}
    safetensors.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, theirs, metadata)
    loaded, config = flash3d.load(theirs)
    assert config == CONFIG and all((flat(loaded)[name] == array).all() for name, array in arrays.items())


def test_truncated_checkpoints(saved):
    path, _ = saved
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 5, 8, 9, begin - 1, begin, begin + 100, len(content) - 1):
        path.write_bytes(content[:size])
        kind = "it is truncated: its (header|tensors) end" if size > 8 else "it is no safetensors file"
        with pytest.raises(ValueError, match=f"cannot load .*model.safetensors: {kind}"):
            flash3d.load(path)
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match="it holds 4 bytes behind its last tensor"):
        flash3d.load(path)


BAD_HEADERS = [
    (lambda h: h.pop("__metadata__"), "flash3d.save did not write it, because its metadata has no 'gpu3d.flash3d'"),
    (lambda h: h["__metadata__"].pop("gpu3d.flash3d"), "its metadata has no 'gpu3d.flash3d'"),
    (lambda h: h.pop("stem.bias"), r"the config has stem.bias of shape \[8\], but the params have none"),
    (lambda h: h.update(other=h["head.bias"]), "the config has no other, but the params do"),
    (
        lambda h: h["head.bias"].update(dtype="F16"),
        "head.bias of shape .* must be F32 in 20 bytes, got F16 in 20 bytes",
    ),
    (lambda h: h["head.bias"].update(shape=[4]), "head.bias of shape .* must be F32 in 16 bytes, got F32 in 20 bytes"),
    (lambda h: h["head.bias"].pop("data_offsets"), "a tensor of its header has no data_offsets"),
]


@pytest.mark.parametrize(("change", "message"), BAD_HEADERS)
def test_foreign_checkpoints(saved, change, message):
    path, _ = saved
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"cannot load .*model.safetensors: .*{message}"):
        flash3d.load(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("classes", 7, r"the config has head.weight of shape \[7, 16\], but the params have \[5, 16\]"),
        ("in_channels", 4, r"the config has stem.weight of shape \[8, 4\], but the params have \[8, 3\]"),
        ("depths", [2, 2, 2], r"the config has encoder.2.blocks.1.qkv.weight .* but the params have none"),
        ("classes", "many", "classes must be an integer, got 'many'"),
        ("rotary", True, "its config has a field 'rotary', which this release of gpu3d does not know: update gpu3d"),
    ],
)
def test_checkpoints_whose_config_does_not_fit(saved, field, value, message):
    path, _ = saved

    def change(header):
        config = json.loads(header["__metadata__"]["gpu3d.flash3d"]) | {field: value}
        header["__metadata__"]["gpu3d.flash3d"] = json.dumps(config)

    rewrite(path, change)
    with pytest.raises(ValueError, match=f"cannot load .*: {message}"):
        flash3d.load(path)


def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "cloud.npy"
    np.save(path, POINTS)
    with pytest.raises(ValueError, match=r"cannot load .*cloud.npy: it is no safetensors file"):
        flash3d.load(path)
    with pytest.raises(FileNotFoundError):
        flash3d.load(tmp_path / "absent.safetensors")


def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch):
    path, _ = saved
    content = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        flash3d.save(path, flash3d.init(CONFIG), CONFIG)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_checkpoint(saved, monkeypatch):
    path, _ = saved
    content = path.read_bytes()

    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint._arrays, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flash3d.save(path, flash3d.init(CONFIG), CONFIG)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_saving_params_that_do_not_fit(tmp_path):
    with pytest.raises(
        ValueError, match=r"the config has head.weight of shape \[6, 16\], but the params have \[5, 16\]"
    ):
        flash3d.save(tmp_path / "model.safetensors", flash3d.init(CONFIG), CONFIG.replace(classes=6))
    assert not list(tmp_path.iterdir())


# ---- the package ---------------------------------------------------------------------------------------------------


def test_gpu3d_does_not_import_flash3d():
    code = "import sys, gpu3d; assert not any('flash3d' in name for name in sys.modules); from gpu3d import flash3d"
    root = str(Path(gpu3d.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root})


@pytest.mark.parametrize("name", flash3d.__all__)
def test_public_names_are_explained(name):
    if name != "presets":
        assert getattr(flash3d, name).__doc__.strip()
