# SPDX-License-Identifier: Apache-2.0
"""The Flash3D backbone on a GPU against its float64 reference."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from gpu3d import flash3d
from gpu3d.flash3d import params as arenas
from gpu3d.flash3d.graphs import Graphs

pytestmark = pytest.mark.gpu

SMALL = flash3d.Config(
    channels=(32, 64, 96),
    depths=(2, 1, 2),
    decoder_channels=(48, 64),
    decoder_depths=(2, 1),
    heads=(1, 2, 3),
    decoder_heads=(2, 2),
    hashes=("zorder_div", "xor_div", "zorder_mod"),
    strides=(2, 2, 1),
    in_channels=3,
    classes=7,
    bucket_size=32,
    scope=4,
    drop_path=0.0,
)
LENGTHS = [(1500,), (300, 0, 1, 77, 640), (5,) * 70, (1030, 420)]  # the last has a bucket that rounding adds


def scene(lengths, seed=0):
    """Points on a rough ground and walls, features, labels with ignored ones."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    points = rng.uniform((-20, -20, 0), (20, 20, 3), (n, 3)).astype(np.float32)
    points[::2, 2] = 0.1 * np.sin(points[::2, 0])
    features = rng.standard_normal((n, SMALL.in_channels)).astype(np.float32)
    labels = rng.integers(0, SMALL.classes, n).astype(np.uint8)
    labels[::11] = 255
    return points, features, labels


def given(cp, config, lengths, seed=0, device=True):
    """Parameters with no zeros among them, batch and labels, on the GPU or on the host."""
    params = flash3d.init(config, seed)
    rng = np.random.default_rng(seed + 1)
    for view in arenas.flat(params).values():
        view += rng.standard_normal(view.shape).astype(np.float32) * np.float32(0.05)
    points, features, labels = scene(lengths, seed)
    if device:
        arena = cp.asarray(next(iter(arenas.flat(params).values())).base)
        params = arenas.views(arena, config)
        points, features, labels = cp.asarray(points), cp.asarray(features), cp.asarray(labels)
    return params, flash3d.Batch(points, features, lengths), labels


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@functools.cache
def expected_logits(lengths):
    return flash3d.forward(*given(None, SMALL, lengths, device=False)[:2], SMALL)


@functools.cache
def expected_gradients(lengths):
    """The loss, and the gradients by path."""
    loss, grads = flash3d.loss_and_grad(*given(None, SMALL, lengths, device=False), SMALL)
    return float(loss), arenas.flat(grads)


TOLERANCE = {"float32": 2e-5, "float16": 6e-3, "bfloat16": 5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_forward(cp, lengths, dtype):
    config = SMALL.replace(dtype=dtype)
    expected = expected_logits(lengths)
    params, batch, _ = given(cp, config, lengths)
    logits = flash3d.forward(params, batch, config)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert relative(logits.get(), expected) < TOLERANCE[dtype]
    assert (logits.get() == flash3d.forward(params, batch, config).get()).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_gradients(cp, lengths, dtype):
    config = SMALL.replace(dtype=dtype)
    expected_loss, expected = expected_gradients(lengths)
    params, batch, labels = given(cp, config, lengths)
    loss, grads = flash3d.loss_and_grad(params, batch, labels, config)
    assert abs(float(loss) - expected_loss) < TOLERANCE[dtype] * expected_loss
    wrong = {}
    for path, got in arenas.flat(grads).items():
        got, want = got.get(), expected[path]
        assert np.abs(want).max() > 0, path
        error = relative(got, want)
        if not error < 20 * TOLERANCE[dtype]:
            wrong[path] = error
    assert not wrong
    again = flash3d.loss_and_grad(params, batch, labels, config)[1]
    for path, view in arenas.flat(again).items():
        assert (view.get() == arenas.flat(grads)[path].get()).all(), path


def test_a_cloud_alone_and_in_a_batch(cp):
    """The same bits, in each dtype that is for speed."""
    lengths = LENGTHS[1]
    for dtype in ("bfloat16", "float16"):
        config = SMALL.replace(dtype=dtype)
        params, batch, _ = given(cp, config, lengths)
        logits = flash3d.forward(params, batch, config).get()
        start = 0
        for n in lengths:
            alone = flash3d.Batch(batch.points[start : start + n], batch.features[start : start + n])
            got = flash3d.forward(params, alone, config).get()
            assert (got == logits[start : start + n]).all()
            start += n


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_compiled(cp, lengths):
    """Launched, captured and replayed: the same classes as those of the largest logits."""
    params, batch, _ = given(cp, SMALL, lengths)
    expected = flash3d.forward(params, batch, SMALL).argmax(axis=1).get()
    predict = flash3d.compile(params, SMALL, max_points=100)
    for _ in range(4):
        classes = predict(batch.points, batch.features, batch.lengths)
        assert classes.dtype == np.int32 and (classes.get() == expected).all()
        other = predict(batch.points[:90], batch.features[:90])
        assert (
            other.get()
            == flash3d.forward(params, flash3d.Batch(batch.points[:90], batch.features[:90]), SMALL)
            .argmax(axis=1)
            .get()
        ).all()
    for view in arenas.flat(params).values():
        view[...] = 0  # a copy is used
    assert (predict(batch.points, batch.features, batch.lengths).get() == expected).all()


def test_one_graph_serves_batches_of_nearly_the_same_size(cp, monkeypatch):
    """It gives the bits of a batch that is launched, whatever was in its memory before."""
    params, batch, _ = given(cp, SMALL, (5000,))
    predict, captured, capture = flash3d.compile(params, SMALL, max_points=100), [], Graphs._capture
    monkeypatch.setattr(Graphs, "_capture", lambda self, key, *rest: captured.append(key) or capture(self, key, *rest))
    replayed, replay = [], Graphs._replay
    monkeypatch.setattr(Graphs, "_replay", lambda self, *args: replayed.append(1) or replay(self, *args))
    for n in (4992, 4870, 4992, 4990, 4865, 4900, 4992):  # 153 to 156 buckets, rounded up to 156
        points, features = batch.points[:n], batch.features[:n]
        expected = flash3d.forward(params, flash3d.Batch(points, features), SMALL).argmax(axis=1)
        assert (predict(points, features) == expected).all()
    assert len(captured) == 1 and len(replayed) == 6
    half = batch.features[:4900].astype(np.float16)
    expected = flash3d.forward(params, flash3d.Batch(batch.points[:4900], half), SMALL).argmax(axis=1)
    for _ in range(3):
        assert (predict(batch.points[:4900], half) == expected).all()


def test_out_of_memory(cp, monkeypatch):
    """The error says how much is needed; a smaller batch runs afterwards."""
    params, batch, _ = given(cp, SMALL, LENGTHS[0])
    predict = flash3d.compile(params, SMALL, max_points=100)
    expected = predict(batch.points[:50], batch.features[:50]).get()
    empty = cp.empty

    def fails(shape, *args, **kwargs):
        if isinstance(shape, int) and shape > 1 << 20:
            raise MemoryError
        return empty(shape, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cp, "empty", fails)
        with pytest.raises(MemoryError, match=r"needs \d+\.\d\d GB of workspace, which cuda:0 does not have"):
            predict(batch.points, batch.features)
    assert (predict(batch.points[:50], batch.features[:50]).get() == expected).all()


def test_no_points(cp):
    params, batch, labels = given(cp, SMALL, (0, 0))
    assert flash3d.forward(params, batch, SMALL).shape == (0, SMALL.classes)
    loss, grads = flash3d.loss_and_grad(params, batch, labels, SMALL)
    assert float(loss) == 0 and not any(view.any() for view in arenas.flat(grads).values())
