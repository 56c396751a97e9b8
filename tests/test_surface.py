# SPDX-License-Identifier: Apache-2.0
"""normals on the CPU: the definition one point at a time, surfaces whose normals are known, bad clouds, errors."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from test_neighbors import DTYPES, special

import gpu3d
from gpu3d import _arrays
from gpu3d.reference import neighbors

# ---- inputs, and what the results must be (test_surface_gpu.py uses them too) ---------------------------------------

LENGTHS = [200, 0, 1, 2, 3, 65, 17]


def near(points, lengths, k):
    """The nearest points of each, from all pairs: int32 [N, k], -1 where there is none."""
    return neighbors.brute_force_knn(points, lengths, points, lengths, k)[1]


def by_definition(points, indices):
    """Eigenvalues [N, 3] and eigenvectors [N, 3, 3] of each point's covariance in float64; NaN for less than three."""
    wide = points.astype(np.float64)
    values, vectors = np.full((len(points), 3), np.nan), np.full((len(points), 3, 3), np.nan)
    for i, row in enumerate(indices):
        found = row[row >= 0]
        if len(found) >= 3:
            with np.errstate(all="ignore"):
                covariance = np.cov((wide[found] - wide[i]).T, bias=True)
            values[i], vectors[i] = np.linalg.eigh(covariance)
    return values, vectors


def check(points, got, indices, viewpoint=None, note=""):
    """Check normals and curvature by the definition. Returns at how many points the normal is defined well."""
    normals, curvature = (np.asarray(x) for x in got)
    dtype = np.float64 if points.dtype == np.float64 else np.float32
    assert normals.dtype == curvature.dtype == dtype, note
    assert normals.shape == points.shape and curvature.shape == points.shape[:1], note
    values, vectors = by_definition(points, indices)
    missing = np.isnan(values[:, 0])
    for x in (normals, curvature[:, None]):
        assert (np.isnan(x) == missing[:, None]).all(), note
    normals, curvature, values, vectors = (x[~missing] for x in (normals, curvature, values, vectors))
    wide = normals.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(wide, axis=1), 1, atol=1e-6, err_msg=note)
    total = values.sum(axis=1)
    share = np.divide(np.maximum(values[:, 0], 0), total, out=np.zeros_like(total), where=total > 0)
    np.testing.assert_allclose(curvature, share, rtol=1e-5, atol=1e-7, err_msg=note)
    apart = values[:, 1] >= 4 * np.maximum(values[:, 0], 1e-9 * values[:, 2])
    apart &= values[:, 1] > 0
    exact = vectors[:, :, 0]
    sign = np.sign((wide * exact).sum(axis=1))[:, None]
    assert (np.abs(wide - sign * exact)[apart] <= 1e-5).all(), (note, np.abs(wide - sign * exact)[apart].max())
    if viewpoint is None:
        x, y, z = normals.T
        assert ((z > 0) | (z == 0) & ((y > 0) | (y == 0) & (x > 0))).all(), note
    else:
        towards = np.asarray(viewpoint) - points[~missing].astype(np.float64)
        assert ((towards * wide).sum(axis=1) >= -1e-6 * np.linalg.norm(towards, axis=1)).all(), note
    return int(apart.sum())


def surfaces(n=3000, seed=0, dtype="float32"):
    """Named clouds on known surfaces: points [n, 3] and normals [n, 3]."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(n, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    across = np.array([0.36, -0.48, 0.8])
    basis = np.linalg.svd(across[None])[2][1:]
    flat = rng.random((n, 2)) @ basis * 10
    wall = rng.random((n, 3)) * [8, 0, 3] + [0, 5, 0]
    found = {
        "sphere": (normal * 5, normal),
        "plane": (flat, np.broadcast_to(across, (n, 3))),
        "wall": (wall, np.broadcast_to([0.0, 1, 0], (n, 3))),
        "plane on a map": (flat + [4096, -8192, 512], np.broadcast_to(across, (n, 3))),
    }
    return {name: (points.astype(DTYPES[dtype]), normals) for name, (points, normals) in found.items()}


def ragged(dtype="float32", seed=0):
    """A batch of LENGTHS with NaN and copies in it."""
    points = clouds.lidar_like(sum(LENGTHS), seed)
    points[5], points[40:60], points[150, 1], points[151, 0] = points[6], points[7], np.nan, np.inf
    return points.astype(DTYPES[dtype])


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_definition(dtype):
    points = ragged(dtype)
    for k in (3, 4, 16, 64):
        for viewpoint in (None, (1.0, -2, 30), np.array([0, 0, -5])):
            got = gpu3d.normals(points, k, lengths=LENGTHS, viewpoint=viewpoint)
            assert check(points, got, near(points, LENGTHS, k), viewpoint, f"{k}") > 80
    assert np.isnan(got.normals[200:203]).all() and not np.isnan(got.normals[203:]).any()


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(name):
    points = special(400)[name]
    for k in (3, 16):
        check(points, gpu3d.normals(points, k), near(points, [400], k), note=name)


@pytest.mark.parametrize("name", surfaces(10))
def test_surfaces(name):
    """The normals of a surface, from its points alone; seen from its middle, those of a sphere point inwards."""
    for dtype in ("float32", "float64"):
        points, exact = surfaces(dtype=dtype)[name]
        normals, curvature = gpu3d.normals(points, 12)
        cosine = np.abs((normals * exact).sum(axis=1))
        assert np.quantile(cosine, 0.01) > (0.97 if name == "sphere" else 1 - 1e-6), name
        assert curvature.max() < 0.1 and (np.quantile(curvature, 0.9) < 1e-6 or name == "sphere")
        middle = points.astype(np.float64).mean(axis=0)
        inwards = gpu3d.normals(points, 12, viewpoint=middle).normals
        if name == "sphere":
            assert ((inwards * points).sum(axis=1) < 0).all()
    assert (gpu3d.normals(points[:, :], 12).normals[:, 2] >= 0).all()


def test_map_coordinates():
    """float64 coordinates near 5e6 m have the normals that they have near 0."""
    grid = np.random.default_rng(0).integers(0, 2**14, (600, 3)) / 1024.0 * [1, 1, 0.125]
    here, there = gpu3d.normals(grid), gpu3d.normals(grid + [5e6, 4.5e6, 300])
    np.testing.assert_array_equal(here.normals, there.normals)
    np.testing.assert_array_equal(here.curvature, there.curvature)
    assert here.normals.dtype == np.float64


def test_no_plane():
    """Fewer than three points, one place, and a line, as the documentation says."""
    for n in (0, 1, 2):
        normals, curvature = gpu3d.normals(np.ones((n, 3), np.float32))
        assert normals.shape == (n, 3) and np.isnan(normals).all() and np.isnan(curvature).all()
    nan = gpu3d.normals(np.array([[0, 0, 0], [1, 0, 0], [0, np.nan, 0], [0, 0, np.inf]], np.float32))
    assert np.isnan(nan.normals).all() and np.isnan(nan.curvature).all()
    for viewpoint, z in ((None, 1), ((0, 0, -9), -1), ((0, 0, 9), 1)):
        normals, curvature = gpu3d.normals(np.full((9, 3), 3.5, np.float32), viewpoint=viewpoint)
        assert (normals == [0, 0, z]).all() and (curvature == 0).all()
    for direction in ([1, 0, 0], [0, 0, 1], [1, 2, -3]):
        line = np.arange(20.0)[:, None] * direction
        normals, curvature = gpu3d.normals(line, 5)
        assert (np.abs(normals @ direction) < 1e-9).all() and (curvature < 1e-15).all()
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)


def test_three_points():
    """The normal of three points is that of their triangle, however long and thin."""
    for width in (1.0, 1e-2, 1e-4):
        triangle = np.array([[0, 0, 0], [1, 0, 1], [0.5, width, 0.5]])
        normals, curvature = gpu3d.normals(triangle, 3)
        exact = np.tile([-(0.5**0.5), 0, 0.5**0.5], (3, 1))
        np.testing.assert_allclose(normals, exact, atol=1e-15 / width**2)
        assert (curvature < 1e-15).all()


def test_a_batch():
    """[B, n, 3] is a batch of B clouds, and a cloud has the same bits in any batch."""
    points = clouds.uniform(240)
    alone = [gpu3d.normals(points[i : i + 60], 7) for i in range(0, 240, 60)]
    for got in (gpu3d.normals(points.reshape(4, 60, 3), 7), gpu3d.normals(points, 7, lengths=np.array([60] * 4))):
        for i in range(2):
            np.testing.assert_array_equal(got[i], np.concatenate([part[i] for part in alone]))


# ---- errors --------------------------------------------------------------------------------------------------------

POINTS = np.zeros((10, 3), np.float32)
REFUSED = {
    "k too small": ({"k": 2}, ValueError, r"k must be from 3 to 1024, got 2\."),
    "k too large": ({"k": 1025}, ValueError, r"k must be from 3 to 1024, got 1025\."),
    "k no integer": ({"k": 8.0}, TypeError, r"k must be an integer, got 8\.0"),
    "k a bool": ({"k": True}, TypeError, "k must be an integer, got True"),
    "2-D": ({"points": POINTS[:, :2]}, ValueError, r"must have 3 coordinates"),
    "integers": ({"points": POINTS.astype(int)}, TypeError, "int64"),
    "lengths": ({"lengths": [3, 4]}, ValueError, "lengths"),
    "two numbers": ({"viewpoint": (0, 0)}, ValueError, "viewpoint must be three numbers, got"),
    "a number": ({"viewpoint": 3.0}, TypeError, r"viewpoint must be three host numbers, .* got float"),
    "text": ({"viewpoint": "xyz"}, TypeError, "viewpoint must be three host numbers, .* got str"),
    "texts": ({"viewpoint": ["x", "y", "z"]}, TypeError, r"viewpoint\[0\] must be a number, got 'x'"),
    "NaN": ({"viewpoint": (0, 0, np.nan)}, ValueError, "viewpoint must be finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors(name):
    given, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        gpu3d.normals(**{"points": POINTS, **given})


def test_a_tensor_that_requires_grad_is_refused():
    torch = pytest.importorskip("torch")
    points = torch.rand(30, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"points requires grad, and normals has no gradient.*points\.detach\(\)"):
        gpu3d.normals(points)
    with torch.no_grad():
        assert not gpu3d.normals(points).normals.requires_grad
    kept = gpu3d.normals(points.detach(), lengths=torch.tensor([10, 20]))
    assert isinstance(kept.curvature, torch.Tensor)


def test_results_are_of_the_arrays_library():
    found = gpu3d.normals(POINTS.astype(_arrays.BFLOAT16))
    assert type(found) is gpu3d.Normals and found.normals.dtype == np.float32
