# SPDX-License-Identifier: Apache-2.0
"""compare_clouds on the CPU: every metric by its definition, laws, NaN, libraries, bad input."""

from __future__ import annotations

import math

import clouds
import numpy as np
import pytest
from test_neighbors import INDEX, assert_same_bits, of, pair, ragged

import gpu3d
from gpu3d.reference.metrics import percentile_95

THRESHOLDS = (0.0, 0.05, 0.2, 1e300)


def by_definition(x, y, thresholds, dtype=np.float32):
    """The metrics of one pair, in float64 but for the distances."""
    d = np.sqrt(((x[:, None].astype(float) - y.astype(float)) ** 2).sum(-1))
    sides = [(side.min(1).astype(dtype).astype(float), side.argmin(1)) for side in (d, d.T)]
    mean = [(near.mean(), (near**2).mean()) for near, _ in sides]
    shares = [[(near <= dtype(min(t, 3e38))).mean() for t in thresholds] for near, _ in sides]
    density = []
    for near, nearest in sides:
        own, other = len(near), len(x) + len(y) - len(near)
        terms = [
            1 - math.exp(-1000 * r * r) * (own / other) / sum(nearest == j) for r, j in zip(near, nearest, strict=True)
        ]
        density.append(sum(terms) / own)
    return {
        "chamfer": mean[0][0] + mean[1][0],
        "chamfer_squared": mean[0][1] + mean[1][1],
        "hausdorff": max(near.max() for near, _ in sides),
        "hausdorff_95": max(np.percentile(near, 95) for near, _ in sides),
        "precision": shares[0],
        "recall": shares[1],
        "fscore": [2 * p * r / (p + r) if p + r else 0 for p, r in zip(*shares, strict=True)],
        "density_aware_chamfer": sum(density) / 2,
    }


@pytest.mark.parametrize("dimensions", [2, 3])
def test_metrics_are_their_definitions(dimensions):
    for n, m, seed in ((1, 1, 0), (1, 30, 1), (2, 1, 2), (300, 170, 3), (21, 101, 4)):
        rng = np.random.default_rng(seed)
        x, y = (rng.random((size, dimensions)).astype(np.float32) * np.float32(0.3) for size in (n, m))
        x[0] = y[0]
        found = gpu3d.compare_clouds(x, y, thresholds=THRESHOLDS)
        expected = by_definition(x, y, THRESHOLDS)
        assert isinstance(found, gpu3d.CloudComparison) and set(expected) == set(found._fields)
        for name, wanted in expected.items():
            got = getattr(found, name)
            assert got.dtype == np.float32 and got.shape == ((1, 4) if np.ndim(wanted) else (1,))
            np.testing.assert_allclose(
                got[0], wanted, rtol=2e-6, atol=1e-6 if "density" in name else 1e-7, err_msg=name
            )
        assert n < 3 or all(np.all(z[..., -2] > 0) for z in found[4:7])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_chamfer_has_the_bits_of_chamfer(dtype):
    lengths = {"x_lengths": (50, 1500, 30), "y_lengths": (20, 64, 1100)}
    x, y = ragged(*lengths.values(), dtype=dtype)
    found = gpu3d.compare_clouds(x, y, **lengths)
    for squared, got in ((False, found.chamfer), (True, found.chamfer_squared)):
        assert_same_bits([got], [gpu3d.chamfer(x, y, **lengths, reduction="none", squared=squared)])
    far = gpu3d.chamfer(x, y, **lengths, reduction="points")
    assert found.hausdorff.max() == max(far.x.max(), far.y.max())
    assert found.precision.shape == (3, 0)
    x_index = gpu3d.neighbor_index(x, lengths=lengths["x_lengths"])
    index = gpu3d.neighbor_index(y, lengths=lengths["y_lengths"])
    assert_same_bits(gpu3d.compare_clouds(x_index, index), found)
    assert_same_bits(gpu3d.compare_clouds(x, index, x_lengths=lengths["x_lengths"]), found)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 21, 22, 1001, 2000])
def test_percentile(n):
    d = np.random.default_rng(n).random(n).astype(np.float32)
    np.testing.assert_allclose(percentile_95(d), np.percentile(d.astype(float), 95), rtol=1e-14)
    assert percentile_95(np.full(n, np.inf, np.float32)) == math.inf
    assert math.isnan(percentile_95(np.append(d, np.float32(np.nan))))


def test_laws():
    x, y = (z[:700] * np.float32(0.1) for z in pair("near", 700, 700))
    found, back = gpu3d.compare_clouds(x, y, thresholds=(0.01,)), gpu3d.compare_clouds(y, x, thresholds=(0.01,))
    swapped = back._replace(precision=back.recall, recall=back.precision)
    assert_same_bits(found, swapped)
    same = gpu3d.compare_clouds(x, x[::-1], thresholds=(0,))
    assert same.chamfer == same.hausdorff == same.hausdorff_95 == same.density_aware_chamfer == 0
    assert same.precision == same.recall == same.fscore == 1
    apart = gpu3d.compare_clouds(x, y + 100, thresholds=(1,))
    assert apart.density_aware_chamfer == 1 and apart.fscore == 0
    # Two points share each nearest, which the ratio of sizes makes up for. Of the way back, each point has half.
    assert gpu3d.compare_clouds(np.concatenate([x, x]), x).density_aware_chamfer == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("stray", [0.0, -99999.0, 1e30])
def test_metrics_of_float64(stray):
    """Map coordinates keep their digits, and a stray point in x changes only what it is part of."""
    rng = np.random.default_rng(0)
    x, y = (rng.random((n, 3)) * [0.3, 0.3, 0.1] for n in (300, 170))
    shift = np.array([5e5, 4.2e6, 100])
    found = gpu3d.compare_clouds(x + shift, y + shift, thresholds=THRESHOLDS)
    for name, wanted in by_definition(x + shift, y + shift, THRESHOLDS, np.float64).items():
        got = getattr(found, name)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got[0], wanted, rtol=1e-9, atol=1e-12, err_msg=name)
    again = gpu3d.compare_clouds(np.append(x + shift, [[stray] * 3], 0), y + shift, thresholds=THRESHOLDS)
    assert_same_bits([again.recall], [found.recall])
    # Of the 301 points, the stray one is within no threshold but the largest.
    np.testing.assert_allclose(again.precision[0, :3], found.precision[0, :3] * 300 / 301, rtol=1e-12)
    assert again.hausdorff == np.linalg.norm(y + shift - stray, axis=1).min()


def test_nan_stays_in_its_pair():
    lengths = {"x_lengths": (100, 200), "y_lengths": (150, 50)}
    x, y = ragged(*lengths.values())
    x[7, 1] = np.nan
    found = gpu3d.compare_clouds(x, y, **lengths, thresholds=(0.1, math.inf))
    for name, values in found._asdict().items():
        if values.ndim == 1:
            assert np.isnan(values).tolist() == [True, False], name
    assert found.precision[:, 1].tolist() == [np.float32(0.99), 1] and found.recall[:, 1].tolist() == [1, 1]


def test_tensors():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(z) for z in pair("near", 60, 90))
    with pytest.raises(TypeError, match=r"y requires grad, and compare_clouds has no gradient .*y\.detach\(\)"):
        gpu3d.compare_clouds(x, y.requires_grad_())
    y = y.detach()
    expected = gpu3d.compare_clouds(x.numpy(), y.numpy(), thresholds=(0.1,))
    found = gpu3d.compare_clouds(x, y, thresholds=np.array([0.1]))
    assert all(isinstance(z, torch.Tensor) for z in found)
    assert_same_bits([z.numpy() for z in found], expected)
    compiled = torch.compile(
        lambda x, y: gpu3d.compare_clouds(x, y, thresholds=(0.1,)), fullgraph=True, backend="eager"
    )
    assert_same_bits([z.numpy() for z in compiled(x, y)], expected)


def test_jax():
    jax = pytest.importorskip("jax")
    x, y = (jax.numpy.asarray(z) for z in pair("near", 60, 90))
    expected = gpu3d.compare_clouds(np.asarray(x), np.asarray(y), thresholds=(0.1,))
    found = jax.jit(lambda x, y: gpu3d.compare_clouds(x, y, thresholds=(0.1,)))(x, y)
    assert_same_bits(found, expected)
    with pytest.raises(TypeError, match=r"compare_clouds has no derivative, .* jax.lax.stop_gradient of both"):
        jax.grad(lambda x: gpu3d.compare_clouds(x, y).chamfer.sum())(x)
    stopped = jax.grad(lambda x: x.sum() + gpu3d.compare_clouds(jax.lax.stop_gradient(x), y).chamfer.sum())(x)
    assert (stopped == 1).all()


BAD = [
    ({"x": of(40, 2)}, ValueError, "x and y must have as many coordinates, got 2 and 3"),
    ({"x": of(40, 6)}, ValueError, r"x must have 2 or 3 .*\[40, 6\]: .* torch.cdist or scipy.spatial.cKDTree"),
    ({"x_lengths": [40]}, ValueError, "x and y must have as many clouds, got 1 and 2"),
    ({"x_lengths": [40, 0]}, ValueError, "must not be empty, .* got cloud 1 of x with no point"),
    ({"x": INDEX}, ValueError, "x is a NeighborIndex, which knows its lengths: leave x_lengths out"),
    ({"thresholds": 0.1}, TypeError, r"thresholds must be a sequence of numbers, e.g. \(0.01,\), got 0.1"),
    ({"thresholds": (0.1, -1)}, ValueError, r"thresholds must not be negative or NaN, got thresholds\[1\] = -1"),
    ({"thresholds": [math.nan]}, ValueError, r"thresholds must not be negative or NaN, got thresholds\[0\] = nan"),
    ({"thresholds": ("a",)}, TypeError, r"thresholds\[0\] must be a number, got 'a'"),
    ({"thresholds": (0.1,) * 65}, ValueError, "thresholds must be at most 64, got 65: compare in several calls"),
]


def check_bad_input(arguments, error, message, asarray):
    x, y = asarray(clouds.uniform(40)), asarray(clouds.uniform(128))
    good = {"x": x, "y": y, "x_lengths": [30, 10], "y_lengths": [100, 28], "thresholds": (0.1,)}
    index = gpu3d.neighbor_index(y, lengths=[100, 28])
    bad = {
        name: asarray(z) if isinstance(z, np.ndarray) else index if z is INDEX else z for name, z in arguments.items()
    }
    gpu3d.compare_clouds(**good)
    with pytest.raises(error, match=message):
        gpu3d.compare_clouds(**{**good, **bad})


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    check_bad_input(arguments, error, message, np.asarray)
