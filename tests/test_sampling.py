# SPDX-License-Identifier: Apache-2.0
"""farthest_points and voxel_downsample on the CPU equal their definitions, written down naively."""

from __future__ import annotations

import clouds
import ml_dtypes
import numpy as np
import pytest

import gpu3d

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
RAGGED = (60, 0, 1, 33, 7)
REDUCTIONS = ("mean", "sum", "min", "max")


def wide(x):
    return x if x.dtype == np.float64 else x.astype(np.float32)


def cloud(n, dtype=np.float32, seed=0, columns=3):
    return clouds.uniform(n, seed)[:, :columns].astype(dtype)


# ---- farthest_points -----------------------------------------------------------------------------------------------


def naive_farthest(points, k, start=0):
    """The definition for one cloud: all distances to the points taken, and the first of the farthest."""
    points, taken = wide(points), []
    if len(points) == 0 or not np.isfinite(points[start]).all():
        return [-1] * k
    free = [i for i in range(len(points)) if np.isfinite(points[i]).all()]
    sample = start
    while len(taken) < k:
        taken.append(sample)
        free.remove(sample)
        if not free:
            break
        d = points[free][:, None] - points[taken]
        d2 = d[..., 0] * d[..., 0] + d[..., 1] * d[..., 1]
        if points.shape[1] == 3:
            d2 = d2 + d[..., 2] * d[..., 2]
        sample = free[int(d2.min(axis=1).argmax())]  # the first of equal ones
    return taken + [-1] * (k - len(taken))


def check_farthest(points, k, lengths=None, start=0):
    got = gpu3d.farthest_points(points, k, lengths=lengths, start=start)
    lengths = (len(points),) if lengths is None else lengths
    expected, first = [], 0
    for n in lengths:
        own = naive_farthest(points[first : first + n], k, start)
        expected += [i + first if i >= 0 else -1 for i in own]
        first += n
    assert got.dtype == np.int32 and got.tolist() == expected
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 2])
def test_farthest_points_are_those_of_the_naive_loop(dtype, columns):
    for n in (1, 2, 5, 100):
        check_farthest(cloud(n, dtype, n, columns), min(n, 30), start=n // 2)
    check_farthest(cloud(sum(RAGGED), dtype, 3, columns), 20, RAGGED)  # more than some clouds have


@pytest.mark.parametrize("name", clouds.degenerate(200))
def test_farthest_points_of_degenerate_clouds(name):
    """Among them clouds with ties, and one whose squared distances are infinite."""
    with np.errstate(over="ignore"):
        got = check_farthest(clouds.degenerate(200)[name], 60, start=3)
    assert len(set(got.tolist())) == 60


def test_farthest_points_that_are_not_finite():
    points, finite = clouds.spoiled(300)
    start = int(finite.argmax())
    got = check_farthest(points, 300, start=start)
    assert (got >= 0).sum() == finite.sum() and finite[got[got >= 0]].all()
    check_farthest(points, 5, start=int(finite.argmin()))
    assert (gpu3d.farthest_points(points, 5, start=int(finite.argmin())) == -1).all()


def test_fewer_farthest_points_are_the_first_of_more():
    points = clouds.lidar_like(3000)
    many = gpu3d.farthest_points(points, 300, start=17)
    assert (gpu3d.farthest_points(points, 100, start=17) == many[:100]).all()
    distance = np.linalg.norm(points[many[:, None]] - points[many], axis=2)
    nearest = [distance[i, :i].min() for i in range(1, 300)]
    assert np.all(np.diff(nearest) <= 1e-6)
    batch = gpu3d.farthest_points(points.reshape(3, 1000, 3), 40)
    assert (batch == gpu3d.farthest_points(points, 40, lengths=(1000,) * 3)).all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2**31}, ValueError, r"k must be at most 2\*\*31 - 1 points of all clouds together"),
        ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
        ({"start": -1}, ValueError, "start must be a point of each cloud, from 0 on, got -1"),
        ({"start": 7}, ValueError, r"got 7 for the 7 points of cloud 4: .* at most 6"),
        ({"start": True}, TypeError, "start must be an integer, got True"),
        ({"lengths": [3, 4]}, ValueError, "lengths must sum"),
    ],
)
def test_what_farthest_points_refuses(options, error, match):
    lengths = {"lengths": (60, 0, 20, 14, 7)}
    with pytest.raises(error, match=match):
        gpu3d.farthest_points(cloud(101), **{"k": 5, **lengths, **options})


def test_farthest_points_of_empty_clouds():
    assert gpu3d.farthest_points(cloud(0), 3, start=5).tolist() == [-1] * 3
    assert gpu3d.farthest_points(cloud(0), 3, lengths=()).shape == (0,)


# ---- voxel_downsample ----------------------------------------------------------------------------------------------


def naive_voxels(points, size, features, reduce):
    """The definition for one cloud, point by point."""
    x, rows = wide(points), None if features is None else wide(features)
    finite = np.isfinite(x)
    low = [column[mask].min() if mask.any() else 0 for column, mask in zip(x.T, finite.T, strict=True)]
    members, voxel_of = {}, []
    for i, point in enumerate(x):
        if not finite[i].all():
            voxel_of.append(-1)
            continue
        t = [np.float32(a - b) for a, b in zip(point, low, strict=True)]
        key = tuple(int(np.floor(a / np.float32(size))) for a in t)
        voxel_of.append(list(members).index(key) if key in members else len(members))
        members.setdefault(key, []).append(i)
    centres, reduced = [], []
    for its in members.values():
        total = np.zeros_like(x[0])
        for i in its:
            total = total + (x[i] - x[its[0]])
        centres.append(x[its[0]] + total / x.dtype.type(len(its)))
        if rows is not None:
            out = rows[its[0]]
            for i in its[1:]:
                out = {"min": np.minimum, "max": np.maximum}.get(reduce, np.add)(out, rows[i])
            reduced.append(out / rows.dtype.type(len(its)) if reduce == "mean" else out)
    return centres, reduced, [len(its) for its in members.values()], voxel_of


def check_voxels(points, size, features=None, lengths=None, reduce="mean"):
    got = gpu3d.voxel_downsample(points, size, features, lengths=lengths, reduce=reduce)
    lengths = (len(points),) if lengths is None else lengths
    centres, reduced, counts, voxel_of, found, first = [], [], [], [], [], 0
    for n in lengths:
        own = slice(first, first + n)
        parts = naive_voxels(points[own], size, None if features is None else features[own], reduce)
        voxel_of += [v if v < 0 else v + len(counts) for v in parts[3]]
        centres, reduced, counts = centres + parts[0], reduced + parts[1], counts + parts[2]
        found.append(len(parts[2]))
        first += n
    assert got.lengths == tuple(found)
    assert got.counts.dtype == got.point_to_voxel.dtype == np.int32
    assert got.counts.tolist() == counts and got.point_to_voxel.tolist() == voxel_of
    expected = np.array(centres, wide(points).dtype).reshape(-1, points.shape[1]).astype(points.dtype)
    assert got.points.dtype == points.dtype and got.points.tobytes() == expected.tobytes()
    if features is None:
        assert got.features is None
    else:
        expected = (
            np.array(reduced, wide(features).dtype).reshape(len(counts), *features.shape[1:]).astype(features.dtype)
        )
        assert got.features.dtype == features.dtype and got.features.shape == expected.shape
        np.testing.assert_array_equal(wide(got.features), wide(expected))
    return got


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_voxels_are_those_of_the_definition(dtype, reduce):
    rng = np.random.default_rng(1)
    for shape, of_features in (((4,), dtype), ((), np.float32), ((2, 3), ml_dtypes.bfloat16), ((0,), np.float64)):
        points, features = cloud(150, dtype, 2), rng.standard_normal((150, *shape)).astype(of_features)
        got = check_voxels(points, 20.0, features, reduce=reduce)
        assert 1 < len(got.counts) < 150
    points = cloud(sum(RAGGED), dtype, 5)
    check_voxels(points, 15, rng.standard_normal((len(points), 2)).astype(dtype), RAGGED, reduce)
    check_voxels(points[:, :2], 15, None, RAGGED)


@pytest.mark.parametrize("name", clouds.degenerate(200))
def test_voxels_of_degenerate_clouds(name):
    points = clouds.degenerate(200)[name]
    if name == "huge":  # its extents are infinite in float32
        with pytest.raises(ValueError, match="the grid of cloud 0 has more than"):
            gpu3d.voxel_downsample(points, 1e38)
        points = points / 4
    sizes = {"tiny": (2e-38,), "huge": (1e37,)}.get(name, (0.05, 0.3, 1000))
    with np.errstate(over="ignore"):
        for size in sizes:
            check_voxels(points, size, points[:, 0], reduce="max")


def test_voxels_far_from_the_origin_and_with_nan():
    points, finite = clouds.spoiled(400)
    features = np.where(finite, 1, np.nan).astype(np.float32)
    got = check_voxels(points, 2.0, features)
    assert np.isfinite(got.features).all() and (got.point_to_voxel[~finite] == -1).all()
    far = cloud(300, np.float64) + [5e6, -3e6, 2e3]
    got = check_voxels(far, 10.0)
    assert np.abs(got.points - far[np.unique(got.point_to_voxel, return_index=True)[1]]).max() < 10
    features[np.flatnonzero(finite)[5]] = np.nan
    for reduce in ("min", "max", "sum"):
        assert np.isnan(gpu3d.voxel_downsample(points, 2.0, features, reduce=reduce).features).sum() == 1


def test_voxels_of_bucketize():
    """A point is in the voxel that bucketize with the same size puts it into."""
    from gpu3d.reference.buckets import voxelize

    for dtype in DTYPES:
        points = cloud(2000, dtype)
        _, inverse = np.unique(voxelize(points, 1.7), axis=0, return_inverse=True)
        got = gpu3d.voxel_downsample(points, 1.7).point_to_voxel
        assert len(set(zip(got.tolist(), inverse.reshape(-1).tolist(), strict=True))) == got.max() + 1


def test_batches_and_views_of_voxels():
    points, features = cloud(90).reshape(3, 30, 3), np.arange(180, dtype=np.float32).reshape(3, 30, 2)
    batch = gpu3d.voxel_downsample(points, 20.0, features)
    packed = gpu3d.voxel_downsample(points.reshape(-1, 3), 20.0, features.reshape(-1, 2), lengths=(30,) * 3)
    for a, b in zip(batch, packed, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sum(batch.lengths) == len(batch.points) == len(batch.counts) and batch.counts.sum() == 90
    empty = gpu3d.voxel_downsample(cloud(0), 1.0, cloud(0))
    assert empty.points.shape == empty.features.shape == (0, 3) and empty.lengths == (0,)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 0}, ValueError, "size must be a positive float32 number, got 0"),
        ({"size": -1.0}, ValueError, "size must be a positive float32 number, got -1.0"),
        ({"size": float("nan")}, ValueError, "size must be a positive float32 number, got nan"),
        ({"size": 1e-40}, ValueError, "size must be a positive float32 number, got 1e-40"),
        ({"size": "1"}, TypeError, "size must be a number"),
        ({"size": 1e-6}, ValueError, r"size must be larger: with 1e-06 the grid of cloud 1 has more than 2\*\*63"),
        ({"size": 1e-30}, ValueError, r"with 1e-30 the grid of cloud 1 has more than 2\*\*63 voxels"),
        ({"features": cloud(59)}, ValueError, r"features must have a row for each point, \[60, '...'\], got shape"),
        ({"features": np.arange(60)}, TypeError, "features must be float32, float64, float16 or bfloat16, got int64"),
        ({"reduce": "median"}, ValueError, "reduce must be one of 'sum', 'mean', 'min', 'max', got 'median'"),
    ],
)
def test_what_voxel_downsample_refuses(options, error, match):
    with pytest.raises(error, match=match):
        gpu3d.voxel_downsample(cloud(60), **{"size": 1.0, "lengths": [1, 59], **options})


def test_the_finest_grid():
    """2**63 voxels are enough; twice as many are not."""
    points = np.array([[0, 0, 0], [2**21 - 1, 2**21 - 1, 2**21 - 1], [1, 0, 0]], np.float32)
    assert gpu3d.voxel_downsample(points, 1.0).point_to_voxel.tolist() == [0, 1, 2]
    points[1, 2] = 2**21
    with pytest.raises(ValueError, match="size must be larger"):
        gpu3d.voxel_downsample(points, 1.0)
