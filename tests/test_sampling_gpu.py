# SPDX-License-Identifier: Apache-2.0
"""farthest_points and voxel_downsample on the GPU give the same bits as the reference."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from conftest import poison
from test_sampling import DTYPES, REDUCTIONS, cloud

import gpu3d

pytestmark = pytest.mark.gpu

EDGES = (1, 2, 31, 32, 33, 1023, 1024, 1025, 2048, 2049, 4096, 4097, 8191, 8192, 8193, 16_384)


def same_bits(got, expected, note=""):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), note
    if expected.dtype.kind in "iu":
        assert (got == expected).all(), f"{note}: {(got != expected).sum()} of {expected.size} differ"
    else:
        a, b = (x.astype(np.float64) for x in (got, expected))
        assert np.array_equal(a, b, equal_nan=True), f"{note}: {(a != b).sum()} of {expected.size} differ"


def check_farthest(cp, points, k, note="", **options):
    poison(cp, 1 << 24)
    with np.errstate(over="ignore"):
        expected = gpu3d.farthest_points(points, k, **options)
    same_bits(gpu3d.farthest_points(cp.asarray(points), k, **options).get(), expected, (len(points), k, note))
    return expected


def check_voxels(cp, points, size, features=None, note="", **options):
    poison(cp, max(1 << 26, 200 * points.nbytes))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = gpu3d.voxel_downsample(points, size, features, **options)
    of_features = None if features is None else cp.asarray(features)
    got = gpu3d.voxel_downsample(cp.asarray(points), size, of_features, **options)
    assert got.lengths == expected.lengths, note
    for name in ("point_to_voxel", "counts", "points", "features"):
        if getattr(expected, name) is not None:
            same_bits(getattr(got, name).get(), getattr(expected, name), (name, note))
    return expected


def test_small_sampling(cp):
    """For compute-sanitizer: both kernels of farthest_points, and voxels with few and many points."""
    for n, dtype in ((300, "float32"), (5000, "float64"), (9000, "float32")):
        check_farthest(cp, cloud(n, dtype), 40)
    check_farthest(cp, cloud(9300), 20, lengths=(9000, 0, 1, 299))
    points = cloud(3000)
    for size in (1e-3, 2.0, 30.0, 1e3):
        check_voxels(cp, points, size, points, lengths=(2500, 0, 500))


# ---- farthest_points -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", EDGES)
def test_farthest_points_across_the_edges_of_kernels(cp, n):
    for dtype in ("float32", "float64"):
        check_farthest(cp, cloud(n, dtype, n), min(n, 50), dtype, start=n // 3)
    if n <= 33:
        check_farthest(cp, cloud(n), n + 5, "more than there are")


@pytest.mark.parametrize("n", [2000, 10_000])
def test_farthest_points_of_degenerate_clouds(cp, n):
    for name, points in clouds.degenerate(n).items():
        for dtype in ("float32", "float64"):
            check_farthest(cp, points.astype(dtype), 150, name, start=n - 1)
    points, finite = clouds.spoiled(n)
    check_farthest(cp, points, 100, "spoiled", start=int(finite.argmax()))
    assert (check_farthest(cp, points, 10, "spoiled", start=int(finite.argmin())) == -1).all()
    points[::2] = np.nan
    points[10:] = np.nan  # so that fewer than ten are left
    points[1] = 0
    check_farthest(cp, points, 20, "nearly all NaN", start=1)


def test_all_points_of_a_cloud_are_taken(cp):
    for n in (700, 8300):
        points = cloud(n) if n < 8192 else np.repeat(cloud(83), 100, axis=0)
        got = check_farthest(cp, points, n + 3, "all") if n < 8192 else check_farthest(cp, points, 300, "copies")
        assert len(set(got[got >= 0].tolist())) == min(n, 300 if n > 8192 else n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_farthest_points(cp, dtype):
    for lengths in ((500, 0, 1, 2000), (0, 30, 9000, 12_000, 0), tuple(range(100)), (*range(70), 8500)):
        points = cloud(sum(lengths), dtype)
        check_farthest(cp, points, 33, lengths, lengths=lengths)
        check_farthest(cp, points[:, :2], 10, lengths, lengths=lengths)


@pytest.mark.parametrize("n", [33_000, 120_000])
def test_large_clouds(cp, n):
    for dtype in ("float32", "float64"):
        check_farthest(cp, clouds.lidar_like(n).astype(dtype), 300, dtype)


def test_every_run_is_alike(cp):
    points = cp.asarray(clouds.lidar_like(20_000))
    first = gpu3d.farthest_points(points, 500)
    voxels = gpu3d.voxel_downsample(points, 0.5, points)
    for _ in range(20):
        assert (gpu3d.farthest_points(points, 500) == first).all()
        again = gpu3d.voxel_downsample(points, 0.5, points)
        assert all((a == b).all() for a, b in zip(again[:4], voxels[:4], strict=True))


# ---- voxel_downsample ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 2047, 2049, 4095, 4096, 4097, 30_000])
def test_voxels_across_the_edges_of_blocks(cp, n):
    for dtype in ("float32", "float64"):
        points = cloud(n, dtype, n)
        for size in (1e-3, 0.7, 5.0):
            check_voxels(cp, points, size, points[:, 0], (n, dtype, size))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_of_voxels(cp, dtype, reduce):
    rng = np.random.default_rng(2)
    points = cloud(1500, dtype)
    for shape in ((), (1,), (31,), (3, 11), (64,), (129,), (300,), (0,)):
        features = rng.standard_normal((1500, *shape)).astype(dtype)
        check_voxels(cp, points, 9.0, features, (dtype, reduce, shape), reduce=reduce)
    features = rng.standard_normal((1500, 5)).astype(dtype)
    features[::100] = np.nan
    check_voxels(cp, points, 9.0, features, "NaN", reduce=reduce, lengths=(700, 0, 800))


@pytest.mark.parametrize("many", [31, 32, 33, 64, 511, 512, 513, 1088, 1089, 5000])
def test_voxels_of_many_points(cp, many):
    """Lists that a warp holds, that a warp sorts, and that a block sorts."""
    rng = np.random.default_rng(many)
    points = np.concatenate([rng.random((many, 3)) * 0.9 + x for x in (0, 1.05, 5, 9)] + [rng.random((50, 3)) * 50])
    points = rng.permutation(points).astype(np.float32)
    points[0] = 0
    found = check_voxels(cp, points, 1.0, rng.standard_normal((len(points), 40)).astype(np.float32), many)
    assert found.counts.max() >= many // 8


def test_voxels_of_degenerate_clouds(cp):
    for name, points in clouds.degenerate(3000).items():
        size = {"tiny": 2e-38, "huge": 3e37}.get(name, 0.5)
        check_voxels(cp, points / 4 if name == "huge" else points, size, points[:, :2], name, reduce="max")
    points, _ = clouds.spoiled(3000)
    check_voxels(cp, points, 0.5, points, "spoiled")
    points[:] = np.nan
    check_voxels(cp, points, 0.5, points, "NaN")
    far = cloud(3000, np.float64) + [5e6, -3e6, 2e3]
    check_voxels(cp, far, 3.0, far, "far")


def test_batches_of_voxels(cp):
    for lengths in ((0,), (), (500, 0, 1, 2000), (0, 30, 9000), tuple(range(100))):
        points = cloud(sum(lengths))
        check_voxels(cp, points, 5.0, points, lengths, lengths=lengths)
        check_voxels(cp, points[:, :2], 5.0, None, lengths, lengths=lengths)
    points = cloud(4000).reshape(4, 1000, 3)
    check_voxels(cp, points, 5.0, points, "[B, n, 3]")


def test_too_many_voxels(cp):
    points = np.concatenate([cloud(10), cloud(30)])
    for size in (1e-6, 1e-30):
        with pytest.raises(ValueError, match=r"with 1e-.* the grid of cloud 0 has more than 2\*\*63 voxels"):
            gpu3d.voxel_downsample(cp.asarray(points), size, lengths=(10, 30))
    points[:10] = points[0]
    with pytest.raises(ValueError, match="the grid of cloud 1 has more"):
        gpu3d.voxel_downsample(cp.asarray(points), 1e-6, lengths=(10, 30))
    corner = np.array([[0, 0, 0], [2**21 - 1] * 3, [1, 0, 0]], np.float32)
    assert check_voxels(cp, corner, 1.0).lengths == (3,)


def test_a_capture_is_refused(cp):
    """voxel_downsample reads the number of voxels, which a CUDA graph cannot. The capture stays intact."""
    points = cp.asarray(cloud(100))
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        expected = gpu3d.farthest_points(points, 5).get()  # the stream's memory is there before the capture
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: call it before the capture"):
                gpu3d.voxel_downsample(points, 5.0)
            indices = gpu3d.farthest_points(points, 5)
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
        assert (indices.get() == expected).all()
