# SPDX-License-Identifier: Apache-2.0
"""normals on the GPU: the definition in float64, for every size, dtype and cloud, and the same bits on every run."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from conftest import poison
from test_neighbors import DTYPES, special
from test_surface import LENGTHS, check, near, ragged, surfaces

import gpu3d

pytestmark = pytest.mark.gpu


def on_host(found):
    return [x.get() for x in found]


def check_on_gpu(cp, points, k, lengths=None, viewpoint=None, note=""):
    """Check against the definition, with the neighbours that the reference finds, in poisoned memory."""
    device = cp.asarray(points)
    poison(cp, max(1 << 24, 400 * points.nbytes))
    got = on_host(gpu3d.normals(device, k, lengths=lengths, viewpoint=viewpoint))
    count = check(points, got, near(points, lengths or [len(points)], k), viewpoint, f"{note} {k} {points.shape}")
    again = on_host(gpu3d.normals(device, k, lengths=lengths, viewpoint=viewpoint))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, again, strict=True))
    return count


def test_small_surface(cp):
    """For compute-sanitizer: short and missing clouds, NaN, copies, small and large k, both result types."""
    for dtype in ("float32", "float64"):
        points = ragged(dtype)
        for k in (3, 16, 33):
            assert check_on_gpu(cp, points, k, LENGTHS) > 80
        check_on_gpu(cp, points, 5, LENGTHS, (1.0, -2, 30))
    points = clouds.lidar_like(70 * 7)
    check_on_gpu(cp, points, 8, [7] * 70)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(cp, dtype):
    for n in (0, 1, 2, 3, 31, 32, 33, 127, 128, 129):
        points = clouds.lidar_like(n).astype(DTYPES[dtype])
        for k in (3, 16, 64):
            check_on_gpu(cp, points, k)


def test_large_k(cp):
    """Across the edge of a node, and neighbours that are missing."""
    for n, k in ((1023, 16), (1025, 16), (700, 65), (700, 1024)):
        check_on_gpu(cp, clouds.lidar_like(n), k)


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(cp, name):
    points = special(400)[name]
    for k in (3, 16):
        check_on_gpu(cp, points, k, note=name)


@pytest.mark.parametrize("name", surfaces(10))
def test_surfaces(cp, name):
    for dtype in ("float32", "float64"):
        points, exact = surfaces(dtype=dtype)[name]
        normals, curvature = on_host(gpu3d.normals(cp.asarray(points), 12))
        cosine = np.abs((normals * exact).sum(axis=1))
        assert np.quantile(cosine, 0.01) > (0.97 if name == "sphere" else 1 - 1e-6), name
        of_reference = gpu3d.normals(points, 12)
        np.testing.assert_allclose(curvature, of_reference.curvature, rtol=1e-5, atol=1e-7)
        turned = np.abs((normals * of_reference.normals).sum(axis=1))
        assert (turned > 1 - 1e-6).all()


def test_no_plane(cp):
    """One place and a line, as the documentation says."""
    for viewpoint, z in ((None, 1), ((0, 0, -9), -1), ((0, 0, 9), 1)):
        normals, curvature = on_host(gpu3d.normals(cp.full((9, 3), 3.5, np.float32), viewpoint=viewpoint))
        assert (normals == [0, 0, z]).all() and (curvature == 0).all()
    for direction in ([1, 0, 0], [0, 0, 1], [1, 2, -3]):
        line = np.arange(20.0)[:, None] * direction
        normals, curvature = on_host(gpu3d.normals(cp.asarray(line), 5))
        assert (np.abs(normals @ direction) < 1e-9).all() and (curvature < 1e-15).all()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)


def test_many_points(cp):
    """A sweep of 120,000: the reference's normals, wherever these are defined well, and the same bits on 20 runs."""
    points = clouds.lidar_like(120_000)
    device = cp.asarray(points)
    got = on_host(gpu3d.normals(device, 16, viewpoint=(0, 0, 0)))
    some = np.random.default_rng(0).permutation(len(points))[:3000]
    indices = gpu3d.knn(device, device, 16).indices.get()[some]
    wide = points.astype(np.float64)
    offsets = wide[indices] - wide[some, None]
    offsets -= offsets.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(offsets.transpose(0, 2, 1) @ offsets)
    exact = vectors[:, :, 0]
    exact *= np.sign(-(exact * wide[some]).sum(axis=1, keepdims=True))
    apart = values[:, 1] > 4 * values[:, 0]
    assert apart.sum() > 100
    assert (np.abs(got[0][some] - exact)[apart] <= 1e-5).all()
    np.testing.assert_allclose(got[1][some], values[:, 0] / values.sum(axis=1), rtol=1e-4, atol=1e-7)
    for _ in range(20):
        again = on_host(gpu3d.normals(device, 16, viewpoint=(0, 0, 0)))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, again, strict=True))
