# SPDX-License-Identifier: Apache-2.0
"""knn and radius_search on the CPU: definition, brute force bit by bit, SciPy, laws, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import clouds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

import gpu3d
from gpu3d import _arrays
from gpu3d import neighbors as op
from gpu3d.reference import neighbors as reference

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": _arrays.BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
KS = (1, 2, 3, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 512, 513, 1000, 1024)
KINDS = ("near", "independent", "collapsed", "far")
RAGGED = (([0, 700, 65, 100, 0], [0, 900, 70, 64, 3]), ([30] * 20, [64 + i for i in range(20)]), ([5, 5], [2000, 64]))


# ---- inputs, and what the results must be (other test files use them too) ------------------------------------------


def pair(kind, n, m, seed=0, dtype="float32"):
    """A query of n points and a cloud of m points, related as `kind` says."""
    rng = np.random.default_rng(seed)
    points = clouds.lidar_like(m, seed)
    if kind == "near":
        query = points[rng.integers(0, m, n)] + rng.normal(0, 0.01, (n, 3))
    elif kind == "independent":
        query = clouds.uniform(n, seed + 1)
    else:  # like the output of an untrained network for a unit cloud
        points = rng.random((m, 3))
        query = 0.05 * rng.random((n, 3)) + 0.5 if kind == "collapsed" else rng.random((n, 3)) + 5
    return query.astype(DTYPES[dtype]), points.astype(DTYPES[dtype])


def special(n=5000, seed=0):
    """Named clouds of n points that break a careless search. All occur in real data."""
    coincident = clouds.lidar_like(n, seed)
    coincident[np.random.default_rng(seed).permutation(n)[:3469]] = 0  # as many as one nuScenes sweep has
    far = clouds.uniform(n, seed)
    signed = coincident.copy()
    signed[:3469] *= -1  # zeros of both signs are the same point
    with np.errstate(over="ignore"):
        return {
            **clouds.degenerate(n, seed),
            "3,469 coincident": coincident,
            "zeros of both signs": signed,
            "far from the origin": far + np.float32(2**20),
            "spoiled": clouds.spoiled(n, seed)[0],
            "nothing finite": np.full((n, 3), np.nan, np.float32),
        }


def ragged(query_lengths, lengths, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    query, points = (rng.normal(0, 3, (sum(n), 3)) for n in (query_lengths, lengths))
    return query.astype(DTYPES[dtype]), points.astype(DTYPES[dtype])


def assert_same_bits(got, expected, note=""):
    """Assert the same dtypes, shapes and bits; all NaN count as equal."""
    assert len(got) == len(expected)
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape, f"{number} {note}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        nan = np.isnan(b)
        np.testing.assert_array_equal(np.isnan(a), nan, err_msg=f"NaN of result {number} {note}")
        a, b = np.where(nan, b.dtype.type(0), a), np.where(nan, b.dtype.type(0), b)
        assert a.tobytes() == b.tobytes(), f"result {number} {note}: {(a != b).sum()} of {a.size} differ"


def lengths_of(query, points, query_lengths=None, lengths=None):
    return query_lengths or [len(query)], lengths or [len(points)]


def check_knn(query, points, k, query_lengths=None, lengths=None, note="", exclude_self=False):
    sides = lengths_of(query, points, query_lengths, lengths)
    got = gpu3d.knn(query, points, k, query_lengths=sides[0], lengths=sides[1], exclude_self=exclude_self)
    expected = reference.brute_force_knn(query, sides[0], points, sides[1], k, exclude_self=exclude_self)
    assert_same_bits(got, expected, f"{note} k = {k}")
    return got


def check_nearest(query, points, radius, k, query_lengths=None, lengths=None, note="", exclude_self=False):
    """Check radius_search with max_neighbors."""
    sides = lengths_of(query, points, query_lengths, lengths)
    options = {"query_lengths": sides[0], "lengths": sides[1], "exclude_self": exclude_self}
    got = gpu3d.radius_search(query, points, radius, max_neighbors=k, **options)
    assert isinstance(got, gpu3d.Neighbors)
    expected = reference.brute_force_knn(query, sides[0], points, sides[1], k, radius, exclude_self)
    assert_same_bits(got, expected, f"{note} at most {k}")
    return got


def check_radius(query, points, radius, query_lengths=None, lengths=None, note="", exclude_self=False):
    """Check without max_entries, with the exact number, with more, and with one too few, which is flagged."""
    sides = lengths_of(query, points, query_lengths, lengths)
    options = {"query_lengths": sides[0], "lengths": sides[1], "exclude_self": exclude_self}
    expected = reference.brute_force_radius(query, sides[0], points, sides[1], radius, exclude_self)
    found = len(expected[1])
    note = f"{note} radius = {radius}: {found}"
    assert_same_bits(gpu3d.radius_search(query, points, radius, **options), expected, note)
    for spare in (0, 5):
        got = gpu3d.radius_search(query, points, radius, max_entries=found + spare, **options)
        padded = np.pad(expected[1], (0, spare), constant_values=-1)
        far = np.pad(expected[2], (0, spare), constant_values=np.nan)
        assert_same_bits(got, (expected[0], padded, far), note)
    if found:
        got = gpu3d.radius_search(query, points, radius, max_entries=found - 1, **options)
        flagged = np.full(len(query) + 1, -found), np.full(found - 1, -1, np.int32)
        assert_same_bits(got, (*flagged, np.full(found - 1, np.nan, expected[2].dtype)), note)
    return expected


# ---- oracles: one pair of points at a time -------------------------------------------------------------------------


def d2_by_definition(a, b):
    with np.errstate(all="ignore"):
        x, y, z = (p - q for p, q in zip(a, b, strict=True))
        return (x * x + y * y) + z * z


def located_by_definition(query, points):
    """Both arrays as rows of three np.float64 if one of them is that, else of three np.float32."""
    real = np.float64 if np.float64 in (query.dtype, points.dtype) else np.float32

    def located(cloud):
        with np.errstate(over="ignore", invalid="ignore"):
            rows = [[real(float(x)) for x in row] for row in cloud]
        return [row + [real(0)] * (3 - len(row)) for row in rows]

    return located(query), located(points)


def neighbors_by_definition(query, points):
    """For each query, (d2, index) of all points, sorted."""
    here, there = located_by_definition(query, points)
    usable = [j for j, p in enumerate(there) if all(map(math.isfinite, p))]
    return [sorted((d2_by_definition(q, there[j]), j) for j in usable) if np.isfinite(q).all() else [] for q in here]


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_definition(dtype, dimensions):
    query, points = pair("near", 40, 70, dtype=dtype)
    points[5], points[9], points[11] = points[3], points[3], query[0]
    points[20, 1], points[21, 0], query[7, 0], query[8, 1] = np.nan, np.inf, np.nan, -np.inf
    query, points = query[:, :dimensions], points[:, :dimensions]
    expected = neighbors_by_definition(query, points)
    assert len(expected[0]) == 68 and expected[7] == expected[8] == []
    distances, indices = gpu3d.knn(query, points, 70)
    real = distances.dtype.type
    assert real == (np.float64 if dtype == "float64" else np.float32)
    near = [[*row, (real(np.inf), -1), (real(np.inf), -1)] for row in expected]
    near[7] = near[8] = [(real(np.nan), -1)] * 70
    assert indices.tolist() == [[j for _, j in row] for row in near]
    assert_same_bits([distances], [np.sqrt(np.array([[d2 for d2, _ in row] for row in near], real))])
    radius = float(distances[2, 20])
    offsets, indices, distances = gpu3d.radius_search(query, points, radius)
    kept = [sorted((j, d2) for d2, j in row if d2 <= real(radius) * real(radius)) for row in expected]
    assert np.diff(offsets).tolist() == [len(row) for row in kept] and 20 <= len(kept[2]) < 68
    found = sorted((q, j) for q, row in enumerate(kept) for j, _ in row)
    assert sorted(zip(np.repeat(np.arange(40), np.diff(offsets)).tolist(), indices.tolist(), strict=True)) == found
    assert indices.tolist() == [j for row in kept for j, _ in row]
    assert_same_bits([distances], [np.sqrt(np.array([d2 for row in kept for _, d2 in row], real))])


# ---- brute force, to the bit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_k(kind):
    query, points = pair(kind, 150, 9000)
    for k in KS:
        check_knn(query, points[: 900 if k % 2 else 9000], k, note=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind):
    for m in (1, 2, 3, 15, 16, 17, 64, 100, 129, 513, 1025, 5000):
        for n in (1, 7, 2049):
            query, points = pair(kind, n, m, seed=m)
            for k in {1, min(16, m), min(64, m)}:
                check_knn(query, points, k, note=f"{kind} {n} {m}")


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(name):
    points = special(4000)[name]
    query = np.concatenate([points[:1500], clouds.uniform(100)])
    for k in (1, 16, 64):
        check_knn(query[::2], points, k, note=name)
    finite = points[np.isfinite(points).all(axis=1)].astype(float)
    extent = float(np.ptp(finite)) if len(finite) else 1.0
    for radius in (0.0, extent / 500, extent / 20, 0.125):  # 0.125 is the step of the lattice
        check_radius(query[::20], points, radius, note=name)
    check_radius(query[:20], points, math.inf, note=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_lengths", "lengths"), RAGGED)
def test_ragged_batches(query_lengths, lengths, dtype):
    query, points = ragged(query_lengths, lengths, dtype=dtype)
    for k in (1, 3, 64):
        check_knn(query, points, k, query_lengths, lengths)
    for radius in (0.0, 0.5, 2.0):
        check_radius(query, points, radius, query_lengths, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_dtypes_and_dimensions(dimensions, dtype):
    query, points = (p[:, :dimensions] for p in pair("near", 600, 3000, dtype=dtype))
    for k in (1, 16):
        check_knn(query, points, k)
    check_radius(query, points, 1.5)
    for other in DTYPES.values():  # the dtype of the cloud decides what is subtracted
        check_knn(query.astype(other), points, 3)
    flat = np.concatenate([query, np.zeros((600, 1), query.dtype)], 1), np.concatenate([points, points[:, :1] * 0], 1)
    if dimensions == 2:
        assert_same_bits(gpu3d.knn(query, points, 5), gpu3d.knn(*flat, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_radius(kind):
    query, points = pair(kind, 200, 3000)
    some = gpu3d.knn(query, points, 8).distances
    for radius in (0, *np.quantile(some, [0.01, 0.5, 0.99]).tolist(), float(some[3, 7]), 1e9, np.float32(1), 10**30):
        expected = check_radius(query, points, radius, note=kind)
    assert len(expected[1]) == 200 * 3000


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_within_a_radius(kind):
    query, points = pair(kind, 300, 4000)
    some = gpu3d.knn(query, points, 8).distances
    radii = np.random.default_rng(1).choice([*np.quantile(some, [0.01, 0.5, 0.99]), 0, 6e4, np.inf], 300)
    for radius in (0, float(some[3, 7]), math.inf, radii, radii.astype(np.float16)):
        for k in (1, 20, 200):
            check_nearest(query, points, radius, k, note=kind)
    check_radius(query, points, np.minimum(radii, 5), note=kind)
    found = check_nearest(query, points, float(np.median(some)), 32)
    missing = found.indices < 0
    assert 0 < missing.sum() < missing.size and np.isinf(found.distances[missing]).all()


@pytest.mark.parametrize("name", special(10))
def test_without_oneself(name):
    """A point is left out by its number: copies of it, also those in lower rows, are neighbours."""
    points = special(2000)[name]
    for k in (1, 40, 200):
        check_knn(points[:600], points[:600], k, exclude_self=True, note=name)
    indices = gpu3d.knn(points, points, 3, exclude_self=True).indices
    assert not (indices == np.arange(2000)[:, None]).any()
    finite = points[np.isfinite(points).all(axis=1)].astype(float)
    radius = float(np.ptp(finite)) / 50 if len(finite) else 1.0
    radii = np.full(600, radius)
    radii[::3] = 0
    check_radius(points[:600], points[:600], radii, exclude_self=True, note=name)
    check_nearest(points[:600], points[:600], radii, 16, exclude_self=True, note=name)


def test_short_clouds_are_filled_up():
    lengths = {"query_lengths": [3, 2, 0, 4, 5], "lengths": [0, 1, 0, 70, 2000]}
    query, points = ragged(*lengths.values())
    for k in (1, 5, 33, 64, 71, 1024):
        distances, indices = check_knn(query, points, k, **lengths)
        assert ((indices >= 0).sum(axis=1) == np.minimum(k, np.repeat(lengths["lengths"], [3, 2, 0, 4, 5]))).all()
        assert np.isinf(distances[indices < 0]).all() and np.isfinite(distances[indices >= 0]).all()
        check_nearest(query, points, 1.0, k, **lengths)
    own = {"query_lengths": [1, 0, 40], "lengths": [1, 0, 40]}
    _, points = ragged(*own.values())
    for k in (1, 39, 40, 500):
        distances, indices = check_knn(points, points, k, **own, exclude_self=True)
        assert indices[0, 0] == -1 and ((indices[1:] >= 0).sum(axis=1) == min(k, 39)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_lengths", "lengths"), RAGGED)
def test_radii_of_ragged_batches(query_lengths, lengths, dtype):
    query, points = ragged(query_lengths, lengths, dtype=dtype)
    radii = np.random.default_rng(0).choice([0, 0.3, 1, 2.5], len(query)).astype(DTYPES[dtype])
    check_radius(query, points, radii, query_lengths, lengths)
    check_nearest(query, points, radii[::-1], 20, query_lengths, lengths)
    own = {"query_lengths": lengths, "lengths": lengths, "exclude_self": True}
    check_radius(points, points, 1.0, **own)
    check_nearest(points, points, 1.0, 70, **own)


def test_radii_are_rounded_and_checked():
    points = np.array([[0, 0, 0], [5, 0, 0]], np.float32)
    radii = np.array([5 * (1 - 2.0**-26), 5 * (1 - 2.0**-20)])
    assert gpu3d.radius_search(points, points, radii).offsets.tolist() == [0, 2, 3]
    for bad in (-1.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match=rf"radius must not be negative or NaN, got radius\[1\] = {bad}"):
            gpu3d.radius_search(points, points, np.array([1, bad]))
        found = reference.knn(points, [2], reference.index(points, [2]), 1, np.array([bad, 1]))  # as on a GPU
        assert_same_bits(found, ([[np.float32(np.inf)], [np.float32(0)]], np.array([[-1], [1]], np.int32)))
    index = gpu3d.neighbor_index(points)
    assert_same_bits(gpu3d.radius_search(points, index, radii), gpu3d.radius_search(points, points, radii))
    one, two = (gpu3d.radius_search(points, of, radii, max_neighbors=2) for of in (points, index))
    assert_same_bits(one, two)


def test_a_point_at_the_radius_is_kept():
    """d2 and r*r round alike, so a search with a neighbour's distance finds it if the square undoes the square root."""
    points = np.array([[3, 4, 0], [3, 4, 2**-22], [0, 0, 0]], np.float32)
    assert gpu3d.radius_search(points[2:], points, 5.0).indices.tolist() == [0, 1, 2]
    assert gpu3d.radius_search(points[2:], points, np.nextafter(np.float32(5), np.float32(0))).indices.tolist() == [2]
    assert gpu3d.radius_search(points[2:], points, 5 * (1 + 2.0**-26)).indices.tolist() == [0, 1, 2]  # rounds to 5
    assert gpu3d.radius_search(points[2:], points, 5 * (1 - 2.0**-26)).indices.tolist() == [0, 1, 2]
    third = np.float32(1) / np.float32(3)  # r*r rounds to float32, up or down
    line = np.array([[third, 0, 0], [np.nextafter(third, np.float32(1)), 0, 0]], np.float32)
    assert gpu3d.radius_search(np.zeros((1, 3), np.float32), line, 1 / 3).indices.tolist() == [0]


def test_rounding_decides_at_the_radius():
    """Points that are within the radius, but not by the float32 formula, are neither listed nor counted."""
    points = clouds.uniform(20_000)
    d2 = reference.squared_distances(points, np.zeros(3, np.float32))
    radii = np.sqrt(np.nextafter(d2, np.float32(0)))
    true = (points.astype(np.float64) ** 2).sum(axis=1)
    outside = (radii * radii < d2) & (true <= radii * radii)
    assert outside.sum() >= 20
    for point, radius in zip(points[outside][:20], radii[outside], strict=False):
        assert len(check_radius(np.zeros((1, 3), np.float32), point[None], float(radius))[1]) == 0


def test_real_sweeps(data_dir):
    """Every tenth point of each scan searched in the whole scan, against SciPy, and some against brute force."""
    seen, rng = 0, np.random.default_rng(0)
    for name, points in clouds.real(data_dir):
        if seen >= 12:
            break
        query = points[rng.permutation(len(points))[:3000]]
        distances, _ = gpu3d.knn(query, points, 16)
        check_knn(query[:30], points, 16, note=name)
        assert_within_two_ulp(distances, query, points)
        seen += 1
    assert seen > 10


# ---- SciPy ---------------------------------------------------------------------------------------------------------


def assert_within_two_ulp(distances, query, points):
    expected, _ = cKDTree(points.astype(np.float64)).query(query.astype(np.float64), distances.shape[1])
    error = np.abs(distances - expected.reshape(distances.shape))
    # Both round in float64: SciPy's error counts too.
    assert (error <= (4 if distances.dtype == np.float64 else 2) * np.spacing(distances)).all(), error.max()


@pytest.mark.parametrize("kind", KINDS)
def test_scipy_agrees(kind):
    query, points = pair(kind, 20_000, 30_000)
    distances, indices = gpu3d.knn(query, points, 16)
    assert_within_two_ulp(distances, query, points)
    _, theirs = cKDTree(points).query(query, 16)
    assert (indices == theirs).mean() > 0.99  # except for ties
    assert (np.diff(distances, axis=1) >= 0).all() and distances.max() > 0


STRAYS = {
    "none": [],
    "origin": [[0, 0, 0]],
    "no data": [[5e5, 4.2e6, -99999]],
    "huge": [[5e5, 4.2e6, 1e30], [-1e30, 0, 0]],
    "overflows": [[1e200, 4.2e6, 0], [5e5, -1e308, 0], [1.7e308, 1.7e308, -1.7e308]],
    "not finite": [[np.nan, 0, 0], [np.inf, 4.2e6, 0]],
}


def surveyed(n, seed=0):
    """A road in UTM coordinates, in float64: points 5 cm apart, whose digits do not fit float32."""
    points = np.random.default_rng(seed).normal(0, (30, 30, 0.02), (n, 3)).cumsum(axis=0) / 300
    return points + [500_000.0, 4.2e6, 100.0]


@pytest.mark.parametrize("stray", STRAYS)
def test_float64_decides_wherever_a_stray_point_lies(stray):
    cloud, extra = surveyed(900), np.array(STRAYS[stray]).reshape(-1, 3)
    points = np.concatenate([cloud[:500], extra, cloud[500:]])
    old = np.delete(np.arange(len(points)), np.arange(500, 500 + len(extra)))  # where the cloud's points are now
    query = np.concatenate([points, cloud[::7] + 0.01])
    check_knn(query, points, 5, note=stray)
    check_knn(points, points, 3, note=stray, exclude_self=True)
    check_knn(query[:50], points, len(points), note=stray)
    for radius in (0.1, 1e29, 1e155, 1e300, math.inf):
        check_radius(query[:300:7] if radius > 1 else query, points, radius, note=stray)
    alone, found = gpu3d.knn(cloud, cloud, 4), gpu3d.knn(cloud, points, 4)
    np.testing.assert_array_equal(found.distances, alone.distances)
    np.testing.assert_array_equal(found.indices, old[alone.indices])
    expected, theirs = cKDTree(cloud).query(cloud, 4)
    np.testing.assert_allclose(alone.distances, expected, rtol=1e-15)
    assert (alone.indices == theirs).mean() > 0.999


def test_both_are_widened_if_one_is_float64():
    """An index of float32 points is of no use then, but stands in for its points."""
    query, points = pair("near", 300, 700)
    for dtypes in (("float64", "float32"), ("float32", "float64"), ("bfloat16", "float64")):
        a, b = query.astype(DTYPES[dtypes[0]]), points.astype(DTYPES[dtypes[1]])
        wide = gpu3d.knn(a.astype(np.float64), b.astype(np.float64), 6)
        assert_same_bits(gpu3d.knn(a, b, 6), wide)
        assert_same_bits(gpu3d.knn(a, gpu3d.neighbor_index(b), 6), wide)
        assert_same_bits(gpu3d.radius_search(a, gpu3d.neighbor_index(b), 0.3), gpu3d.radius_search(a, b, 0.3))
        assert wide.distances.dtype == np.float64
    index = gpu3d.neighbor_index(points.astype(np.float64))
    assert_same_bits([gpu3d.chamfer(query, index)], [gpu3d.chamfer(query, points.astype(np.float64))])


def test_map_coordinates_keep_their_millimetres():
    """float64 coordinates near 5e6 m, where float32 has steps of half a metre."""
    rng = np.random.default_rng(0)
    near = rng.integers(0, 2**16, (3000, 3)) / 1024.0  # exact, also after the shift
    shift = [5e6, 4.5e6, 300]
    query, points = near[:900], near[500:]
    moved = gpu3d.knn(query + shift, points + shift, 8)
    here = gpu3d.knn(query, points, 8)
    assert_same_bits(moved, here)
    assert_same_bits(gpu3d.radius_search(query + shift, points + shift, 3.0), gpu3d.radius_search(query, points, 3.0))
    check_knn(query + shift, points + shift, 8)
    single = gpu3d.knn((query + shift).astype(np.float32), (points + shift).astype(np.float32), 8)
    assert (single.indices != here.indices).any()  # float32 loses them


# ---- laws ----------------------------------------------------------------------------------------------------------

coarse = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=30, deadline=None)
@given(coarse, st.integers(1, 600), st.integers(1, 64), st.sampled_from([2, 8, 1024]))
def test_permuting_the_points_permutes_the_indices(rng, m, k, grid):
    query, points = (rng.integers(0, grid, (n, 3)).astype(np.float32) for n in (50, m))
    order = rng.permutation(m)
    one, two = gpu3d.knn(query, points, k), gpu3d.knn(query, points[order], k)
    assert_same_bits([two.distances], [one.distances])
    there = points[order][two.indices]
    exact = np.sqrt(reference.squared_distances(query[:, None], there))
    assert_same_bits([np.where(two.indices < 0, np.float32(np.inf), exact)], [one.distances])
    assert ((two.indices >= 0).sum(axis=1) == min(k, m)).all()
    two = type(two)(*(x[:, :m] for x in two))
    assert (np.diff(np.sort(two.indices, axis=1), axis=1) > 0).all()  # each point once
    tied = np.diff(two.distances, axis=1) == 0
    assert (np.diff(two.indices, axis=1)[tied] > 0).all()  # and ties by index


@settings(max_examples=30, deadline=None)
@given(coarse, st.integers(-30, 30), st.integers(-8, 12), st.integers(1, 20))
def test_scaling_and_moving_by_powers_of_two(rng, scale, move, k):
    query, points = (rng.integers(0, 1024, (n, 3)).astype(np.float32) for n in (60, 400))
    shift = np.float32(2.0**move if move >= 0 else 0)
    factor = np.float32(2.0**scale)
    one, two = gpu3d.knn(query, points, k), gpu3d.knn((query + shift) * factor, (points + shift) * factor, k)
    assert_same_bits(two, (one.distances * factor, one.indices))
    near = gpu3d.radius_search(query, points, 50)
    far = gpu3d.radius_search((query + shift) * factor, (points + shift) * factor, 50 * factor)
    assert_same_bits(far, (near.offsets, near.indices, near.distances * factor))
    assert 0 < len(near.indices) < 60 * 400


@settings(max_examples=30, deadline=None)
@given(coarse, st.integers(1, 300), st.integers(1, 16), st.integers(2, 4))
def test_copies_of_the_points_come_in_turn(rng, m, k, copies):
    k = min(k, m)
    query, points = (rng.random((n, 3), dtype=np.float32) for n in (40, m))
    one, all_of = gpu3d.knn(query, points, k), gpu3d.knn(query, np.tile(points, (copies, 1)), copies * k)
    assert_same_bits([all_of.distances], [np.repeat(one.distances, copies, axis=1)])
    np.testing.assert_array_equal(all_of.indices.reshape(40, k, copies), one.indices[..., None] + m * np.arange(copies))


@settings(max_examples=30, deadline=None)
@given(coarse, st.integers(1, 300), st.sampled_from([2, 5, 1024]), st.floats(0, 600))
def test_a_radius_is_symmetric(rng, m, grid, radius):
    points = rng.integers(0, grid, (m, 3)).astype(np.float32)
    offsets, indices, distances = gpu3d.radius_search(points, points, radius, max_entries=m * m)
    rows = np.repeat(np.arange(m), np.diff(offsets))
    found = set(zip(rows.tolist(), indices[: offsets[-1]].tolist(), strict=True))
    assert found == {(j, i) for i, j in found} >= {(i, i) for i in range(m)}
    assert (distances[: offsets[-1]] <= np.float32(radius) * np.float32(1 + 2**-22)).all()
    nearest = gpu3d.knn(points, points, min(64, m))
    inside = nearest.distances < radius * (1 - 1e-6)
    pairs = zip(np.nonzero(inside)[0].tolist(), nearest.indices[inside].tolist(), strict=True)
    assert set(pairs) <= found


@settings(max_examples=30, deadline=None)
@given(coarse, st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), max_size=5), st.integers(1, 8))
def test_any_batch_is_its_clouds_one_by_one(rng, sizes, k):
    query_lengths, lengths = [n for n, _ in sizes], [m for _, m in sizes]
    query, points = (rng.normal(size=(sum(n), 3)).astype(np.float32) for n in (query_lengths, lengths))
    distances, indices = gpu3d.knn(query, points, k, query_lengths=query_lengths, lengths=lengths)
    row = first = 0
    for n, m in zip(query_lengths, lengths, strict=True):
        alone = gpu3d.knn(query[row : row + n], points[first : first + m], k)
        part = slice(row, row + n)
        of_batch = np.where(alone.indices < 0, -1, alone.indices + np.int32(first))
        assert_same_bits((distances[part], indices[part]), (alone.distances, of_batch))
        row, first = row + n, first + m
    assert len(distances) == row


# ---- NaN, inf, and numbers at the ends -----------------------------------------------------------------------------


def test_no_neighbour_is_minus_one_and_inf():
    points = np.array([[0, 0, 0], [np.nan, 0, 0], [2, 0, 0], [0, np.inf, 0]], np.float32)
    distances, indices = gpu3d.knn(np.array([[1.5, 0, 0], [0, np.nan, 0], [-np.inf, 0, 0]], np.float32), points, 3)
    assert indices.tolist() == [[2, 0, -1], [-1, -1, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(distances, [[0.5, 1.5, np.inf], [np.nan] * 3, [np.nan] * 3])
    offsets, indices, _ = gpu3d.radius_search(points, points, math.inf)
    assert offsets.tolist() == [0, 2, 2, 4, 4] and indices.tolist() == [0, 2, 0, 2]


def test_distances_too_large_for_float32():
    """Distances are inf, and neighbours in order of index."""
    points = np.array([[3e38, 0, 0], [1e30, 0, 0], [0, 0, 0], [1e18, 0, 0]], np.float32)
    distances, indices = gpu3d.knn(points[2:3], points, 4)
    assert indices.tolist() == [[2, 3, 0, 1]] and distances[0, 2:].tolist() == [math.inf] * 2
    assert gpu3d.radius_search(points[2:3], points, 1e18).indices.tolist() == [2, 3]
    assert gpu3d.radius_search(points[2:3], points, 1e25).indices.tolist() == [0, 1, 2, 3]  # r*r is inf


# ---- the index, views, libraries -----------------------------------------------------------------------------------


def test_an_index_stands_in_for_points():
    query_lengths, lengths = [300, 40], [500, 70]
    query, points = ragged(query_lengths, lengths)
    options = {"query_lengths": query_lengths}
    index = gpu3d.neighbor_index(points, lengths=lengths)
    for k in (1, 16):
        assert_same_bits(gpu3d.knn(query, index, k, **options), gpu3d.knn(query, points, k, lengths=lengths, **options))
    expected = gpu3d.radius_search(query, points, 1.0, lengths=lengths, **options)
    assert_same_bits(gpu3d.radius_search(query, index, 1.0, **options), expected)
    assert len(expected.indices) > 340
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.lengths = ()


def test_an_index_is_built_once():
    points = clouds.lidar_like(200_000)
    index = gpu3d.neighbor_index(points)

    def fastest(target):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            gpu3d.knn(points[:10], target, 1)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(index) < fastest(points) / 4


def test_batched_arrays():
    x, y = (np.random.default_rng(n).random((4, n, 3), dtype=np.float32) for n in (50, 70))
    flat = {"query_lengths": [50] * 4, "lengths": [70] * 4}
    packed = x.reshape(-1, 3), y.reshape(-1, 3)
    assert_same_bits(gpu3d.knn(x, y, 5), gpu3d.knn(*packed, 5, **flat))
    assert_same_bits(gpu3d.knn(x, packed[1], 5, lengths=[70] * 4), gpu3d.knn(*packed, 5, **flat))


def test_libraries_may_differ_on_the_cpu():
    """Results are arrays of the first argument's library."""
    torch = pytest.importorskip("torch")
    query, points = pair("near", 60, 90)
    assert isinstance(gpu3d.knn(query, torch.from_numpy(points), 4).indices, np.ndarray)
    index = gpu3d.neighbor_index(points)
    assert isinstance(gpu3d.knn(torch.from_numpy(query), index, 4).indices, torch.Tensor)


# ---- gradients -----------------------------------------------------------------------------------------------------


def read(*arrays):
    return [_arrays.read(x, "an array") for x in arrays]


def gradients(ddistances, query, points, found, query_lengths=None, lengths=None):
    """The gradients of query and points from the results of a search, on arrays of any library."""
    sides = [tuple(n or [len(x)]) for n, x in zip((query_lengths, lengths), (query, points), strict=True)]
    radius = isinstance(found, gpu3d.RadiusNeighbors)
    check, pull = (
        (op.check_radius_backward, op.radius_backward_arrays)
        if radius
        else (op.check_knn_backward, op.knn_backward_arrays)
    )
    given = read(ddistances, query, points, *found)
    check(*given, *sides)
    return pull(*given)


def upstream(found, seed=0):
    """A gradient of the distances of a search."""
    return np.random.default_rng(seed).normal(size=found.distances.shape).astype(found.distances.dtype)


def pairs_of(found, n):
    """For all entries with a gradient: rows of the queries, rows of the points, and positions among the entries."""
    if isinstance(found, gpu3d.RadiusNeighbors):
        rows = np.repeat(np.arange(n), np.diff(found.offsets))
        rows = np.pad(rows, (0, len(found.indices) - len(rows)))
    else:
        rows = np.repeat(np.arange(n), found.indices.shape[1])
    distances, indices = found.distances.reshape(-1), found.indices.reshape(-1)
    at = np.flatnonzero((indices >= 0) & (distances > 0) & np.isfinite(distances))
    return rows[at], indices[at], at


def explicit(ddistances, query, points, found):
    """The gradients in float64 from differences of coordinates, and the sums of the absolute terms."""
    i, j, at = pairs_of(found, len(query))
    a, b = (x.astype(np.float64) for x in (query, points))
    v = a[i] - b[j]
    terms = ddistances.reshape(-1)[at, None].astype(np.float64) * v / np.linalg.norm(v, axis=1)[:, None]
    made = []
    for sign, rows, of in ((1, i, a), (-1, j, b)):
        total, size = np.zeros(of.shape), np.zeros((len(of), 1))
        np.add.at(total, rows, sign * terms)
        np.add.at(size, rows, abs(ddistances.reshape(-1)[at, None].astype(np.float64)))
        made.append((total, size))
    return made


def searches(query, points, **lengths):
    """Searches by number, by radius, and by radius with a larger max_entries."""
    yield gpu3d.knn(query, points, 8, **lengths)
    pairs = len(query) * len(points)
    yield gpu3d.radius_search(query, points, 2.0, **lengths)
    yield gpu3d.radius_search(query, points, 2.0, max_entries=pairs + 7, **lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_are_those_of_the_differences(dimensions, dtype):
    """Within the rounding of coordinates and of the results' dtype. The two dtypes may differ."""
    lengths = {"query_lengths": [0, 70, 30], "lengths": [5, 64, 31]}
    for other in DTYPES:
        query, _ = ragged(*lengths.values(), dtype=dtype)
        _, points = ragged(*lengths.values(), dtype=other)
        query, points = query[:, :dimensions], points[:, :dimensions]
        for found in searches(query, points, **lengths):
            ddistances = upstream(found)
            got = gradients(ddistances, query, points, found, **lengths)
            near = float(np.nanmin(np.where(found.distances > 0, found.distances, np.nan)))
            rounded = 16 * float(np.finfo(found.distances.dtype).eps) / near
            expected = explicit(ddistances, query, points, found)
            for x, of, (total, size) in zip(got, (query, points), expected, strict=True):
                assert x.dtype == of.dtype and x.shape == of.shape
                halves = 2.0**-8 if of.dtype == _arrays.BFLOAT16 else 2.0**-11
                eps = {2: halves, 4: 2.0**-23, 8: 2.0**-50}[of.dtype.itemsize]
                least = 1e-7 if of.dtype.itemsize == 2 else 0
                assert (abs(x.astype(np.float64) - total) <= (rounded + eps) * size + least).all()
                assert (x != 0).mean() > 0.5


def test_gradients_against_finite_differences():
    """The gradient of a smooth function of the distances to all points, in float64."""
    rng = np.random.default_rng(0)
    x, y, *directions = rng.normal(size=(4, 12, 3))
    y[:, 0] += 4  # no distance is near 0

    def energy(t):
        found = gpu3d.radius_search(x + t * directions[0], y + t * directions[1], math.inf)
        return np.square(found.distances.astype(np.float64)).sum(), found

    _, found = energy(0)
    got = gradients(2 * found.distances, x, y, found)
    slope = sum((z * d).sum() for z, d in zip(got, directions, strict=True))
    difference = (energy(0.01)[0] - energy(-0.01)[0]) / 0.02  # exact for a square, except for rounding
    np.testing.assert_allclose(slope, difference, rtol=1e-10)


def test_gradients_far_from_the_origin():
    """For float64 map coordinates they equal the gradients of the same clouds at the origin."""
    x, y = (np.round(z.astype(np.float64) * 1024) / 1024 for z in pair("near", 300, 500))
    far = np.array([500_000.0, 5_000_000.0, 64.0])
    for here, there in zip(searches(x, y), searches(x + far, y + far), strict=True):
        assert_same_bits(there, here)
        ddistances = upstream(here)
        assert_same_bits(gradients(ddistances, x + far, y + far, there), gradients(ddistances, x, y, here))


def test_gradients_in_any_order():
    """The order of the queries, in which terms of points are added, changes no bit."""
    x, y = pair("near", 2000, 50)
    order = np.random.default_rng(1).permutation(len(x))
    for found, mixed in zip(searches(x, y), searches(x[order], y), strict=True):
        if isinstance(found, gpu3d.Neighbors):
            ddistances = upstream(found)
            dx, dy = gradients(ddistances, x, y, found)
            assert_same_bits(gradients(ddistances[order], x[order], y, mixed), (dx[order], dy))


def test_a_point_of_many_queries():
    """The gradient is the exact sum, rounded once, for terms and other gradients of any size."""
    x = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    y = np.array([[0.1, 0.2, 0.3], [1e6, 0, 0]], np.float32)
    found = gpu3d.knn(x, y, 2)
    for small, large in ((1.0, 1.0), (1e-30, 1.0), (1e-38, 1e30), (1e30, 1e-38)):
        ddistances = upstream(found) * np.array([small, large], np.float32)
        dx, dy = gradients(ddistances, x, y, found)
        d = found.distances[:, :1]
        terms = ddistances[:, :1].astype(np.float64) * ((x - y[0]) / d)
        exact = [-math.fsum(terms[:, e]) for e in range(3)]
        np.testing.assert_allclose(dy[0], exact, rtol=2**-22, atol=0)
        far = ddistances[:, 1:].astype(np.float64) * ((x - y[1]) / found.distances[:, 1:])
        np.testing.assert_allclose(dx, terms + far, rtol=2**-22, atol=max(small, large) * 2.0**-50)


def test_gradients_of_the_nearest_within_a_radius():
    """Missing neighbours add nothing; a point is no neighbour of itself."""
    x, _ = pair("near", 200, 300)
    radii = np.linspace(0, 2, 200)
    found = gpu3d.radius_search(x, x, radii, max_neighbors=40, exclude_self=True)
    assert 0 < (found.indices < 0).mean() < 1
    ddistances = upstream(found)
    got = gradients(ddistances, x, x, found)
    for z, (total, size) in zip(got, explicit(ddistances, x, x, found), strict=True):
        assert (abs(z - total) <= 1e-3 * size).all() and (z != 0).mean() > 0.3
    ddistances[found.indices < 0] = np.nan
    assert_same_bits(gradients(ddistances, x, x, found), got)


def test_what_has_no_gradient():
    """Distances of 0 and inf and missing neighbours add nothing, whatever their gradient is. Others may be NaN."""
    points = np.array([[0, 0, 0], [np.nan, 0, 0], [3, 4, 0], [3e38, 0, 0]], np.float32)
    query = np.array([[0, 0, 0], [3, 0, 0], [np.nan, 0, 0]], np.float32)
    found = gpu3d.knn(query, points, 4)
    assert found.indices.tolist() == [[0, 2, 3, -1], [0, 2, 3, -1], [-1] * 4]
    ddistances = np.array([[np.nan, 2, np.inf, np.nan], [1, 8, np.nan, 5], [1, np.nan, np.inf, -1]], np.float32)
    dx, dy = gradients(ddistances, query, points, found)
    ratio = np.float32(2) * np.array([0.6, 0.8, 0], np.float32)
    np.testing.assert_array_equal(dx, [-ratio, [1, -8, 0], [0, 0, 0]])
    np.testing.assert_array_equal(dy, [[-1, 0, 0], [0, 0, 0], ratio + np.float32([0, 8, 0]), [0, 0, 0]])
    for bad in (np.nan, np.inf, -np.inf):
        ddistances[1, 1] = bad
        dx, dy = gradients(ddistances, query, points, found)
        np.testing.assert_array_equal(dx, [-ratio, [np.nan] * 3, [0, 0, 0]])
        np.testing.assert_array_equal(dy, [[-1, 0, 0], [0, 0, 0], [np.nan] * 3, [0, 0, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_search_with_too_little_room(dtype):
    x, y = pair("near", 30, 40, dtype=dtype)
    found = gpu3d.radius_search(x, y, 2.0, max_entries=3)
    assert found.offsets[0] < 0
    got = gradients(np.ones(3, np.float32), x, y, found)
    assert_same_bits(got, (np.full_like(x, np.nan), np.full_like(y, np.nan)))


def test_no_clouds_have_the_dtype_of_both():
    for query, points in itertools.product((np.float32, np.float64), repeat=2):
        clouds = {"query_lengths": [], "lengths": []}
        found = gpu3d.knn(np.empty((0, 3), query), np.empty((0, 3), points), 2, **clouds)
        assert found.distances.dtype == np.result_type(query, points) and found.distances.shape == (0, 2)
        found = gpu3d.radius_search(np.empty((0, 3), query), np.empty((0, 3), points), 1.0, **clouds)
        assert found.distances.dtype == np.result_type(query, points) and len(found.offsets) == 1


def check_empty_gradients(asarray, back):
    none, points = asarray(of(0, 3)), asarray(clouds.uniform(20))
    for query, at in ((none, points), (points, none)):
        found = [gpu3d.radius_search(query, at, 1.0), gpu3d.radius_search(query, at, 1.0, max_entries=4)]
        if query is none:
            found.append(gpu3d.knn(query, at, 3))
        for one in found:
            got = gradients(one.distances, query, at, one)
            assert_same_bits(map_all(back, got), [np.zeros(x.shape, np.float32) for x in (query, at)])


def test_empty_gradients():
    check_empty_gradients(np.asarray, np.asarray)


def test_bad_input_of_gradients():
    query, points = clouds.uniform(40), clouds.uniform(30, seed=1)
    lengths = {"query_lengths": [30, 10], "lengths": [10, 20]}
    by_number = gpu3d.knn(query, points, 3, **lengths)
    by_radius = gpu3d.radius_search(query, points, 30.0, **lengths)
    for found in (by_number, by_radius):
        d, i = found.distances, found.indices
        for bad, error, message in (
            ({"ddistances": d[1:]}, ValueError, "ddistances must have the shape of distances"),
            ({"ddistances": d.astype(np.int32)}, TypeError, "ddistances must be float32, .* got int32"),
            ({"found": found._replace(indices=i.astype(np.int64))}, ValueError, "indices must be those of the search"),
            ({"found": found._replace(distances=d.astype(np.float64))}, ValueError, "distances must be those of the"),
            ({"found": found._replace(indices=i[1:])}, ValueError, "indices must be those of the search, int32"),
            ({"query": query[:, :2]}, ValueError, "query and points must have as many coordinates"),
            ({"query_lengths": [30, 9]}, ValueError, "query_lengths must sum to the number of query"),
        ):
            good = {"ddistances": d, "query": query, "points": points, "found": found, **lengths}
            with pytest.raises(error, match=message):
                gradients(**{**good, **bad})
    with pytest.raises(ValueError, match=r"distances must be those of knn, \[N, k\], got \[120\]"):
        gradients(by_number.distances, query, points, by_number._replace(distances=np.zeros(120, np.float32)))
    cut = by_radius._replace(offsets=by_radius.offsets[1:])
    with pytest.raises(ValueError, match=r"offsets must be those of the search, int64 \[41\], got int64 \[40\]"):
        gradients(by_radius.distances, query, points, cut, **lengths)


# ---- bad input -----------------------------------------------------------------------------------------------------


def of(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


INDEX = object()  # replaced by an index of the good points

# Each row: the call, the changes to a good call, and the error.
BAD = [
    ("knn", {"k": 0}, ValueError, "k must be from 1 to 1024, got 0"),
    ("knn", {"k": 1025}, ValueError, "k must be from 1 to 1024, got 1025"),
    ("knn", {"k": -1}, ValueError, "k must be from 1 to 1024, got -1"),
    ("knn", {"exclude_self": 1}, TypeError, "exclude_self must be True or False, got 1"),
    ("knn", {"exclude_self": True}, ValueError, "exclude_self needs as many queries .* got 30 and 100 of cloud 0"),
    ("knn", {"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
    ("knn", {"k": True}, TypeError, "k must be an integer, got True"),
    ("knn", {"k": None}, TypeError, "k must be an integer, got None"),
    ("knn", {"query": of(40, 2)}, ValueError, "query and points must have as many coordinates, got 2 and 3"),
    ("knn", {"query": of(40, 4)}, ValueError, r"query must have 2 or 3 coordinates .*\[40, 4\]: take query\[..., :3\]"),
    ("knn", {"query": of(40, 1)}, ValueError, "query must have 2 or 3 coordinates .*: pad the missing ones with zeros"),
    ("knn", {"k": [3] * 1000}, TypeError, "k must be an integer, got list of length 1000 of type list"),
    ("knn", {"k": 10**40}, ValueError, "k must be from 1 to 1024, got an int of many digits"),
    ("knn", {"query": of(40)}, ValueError, r"query must have shape \[N, 3\] \(or \[B, n, 3\]\), got \[40\]"),
    ("knn", {"query": of(1, 2, 20, 3)}, ValueError, "query must have shape"),
    ("knn", {"query": of(40, 3, dtype=np.int32)}, TypeError, "query must be float32, .* got int32: .*query.astype"),
    ("knn", {"query": INDEX}, TypeError, "query must be an array, got NeighborIndex: an index stands in for points"),
    ("knn", {"points": of(128, 5)}, ValueError, "points must have 2 or 3 coordinates"),
    ("knn", {"points": of(128, 3, dtype=np.int64)}, TypeError, "points must be float32, .* got int64"),
    ("knn", {"points": INDEX}, ValueError, "points is a NeighborIndex, which knows its lengths: leave lengths out"),
    ("knn", {"query_lengths": [40]}, ValueError, "query and points must have as many clouds, got 1 and 2"),
    ("knn", {"query_lengths": None}, ValueError, "query and points must have as many clouds, got 1 and 2"),
    ("knn", {"query_lengths": [30, 9]}, ValueError, "query_lengths must sum to the number of query, got a sum of 39"),
    ("knn", {"query_lengths": [41, -1]}, ValueError, r"must not be negative, got query_lengths\[1\] = -1"),
    ("knn", {"query_lengths": [30, 10.0]}, TypeError, r"query_lengths must be integers, got query_lengths\[1\] = 10.0"),
    ("knn", {"query_lengths": 40}, TypeError, r"query_lengths must be host .* query_lengths=\[40\], got int"),
    ("knn", {"query": of(2, 20, 3)}, ValueError, "query of shape .* says its lengths .*leave query_lengths out"),
    ("knn", {"lengths": [100, 27]}, ValueError, "lengths must sum to the number of points, got a sum of 127 for 128"),
    ("radius", {"radius": -0.5}, ValueError, "radius must not be negative or NaN, got -0.5"),
    ("radius", {"radius": math.nan}, ValueError, "radius must not be negative or NaN, got nan"),
    ("radius", {"radius": -math.inf}, ValueError, "radius must not be negative or NaN, got -inf"),
    ("radius", {"radius": "1"}, TypeError, "radius must be a number or an array with .*, got '1' of type str"),
    ("radius", {"radius": True}, TypeError, "radius must be a number or an array with .*, got True"),
    ("radius", {"radius": None}, TypeError, "radius must be a number or an array with .*, got None"),
    ("radius", {"radius": 10**400}, ValueError, "radius must fit a float, got an int of many digits"),
    ("radius", {"radius": [0.1] * 40}, TypeError, "radius must be a number or an array .*, got list of length 40 of"),
    ("radius", {"radius": of(41)}, ValueError, r"a number or have one for each query, \[40\], .* \[41\]"),
    ("radius", {"radius": of()}, ValueError, r"one for each query, \[40\], got an array of shape \[\]"),
    ("radius", {"radius": of(40, dtype=np.int32)}, TypeError, "radius must be float32, .* got int32"),
    ("radius", {"max_neighbors": 0}, ValueError, "max_neighbors must be from 1 to 1024, got 0"),
    ("radius", {"max_neighbors": 1025}, ValueError, "max_neighbors must be from 1 to 1024, got 1025"),
    ("radius", {"max_neighbors": 2.0}, TypeError, "max_neighbors must be an integer, got 2.0"),
    ("radius", {"max_neighbors": 5, "max_entries": 7}, ValueError, "max_entries and max_neighbors exclude .* 7 and 5"),
    ("radius", {"max_neighbors": 5, "radius": -1.0}, ValueError, "radius must not be negative or NaN, got -1.0"),
    ("radius", {"exclude_self": None}, TypeError, "exclude_self must be True or False, got None"),
    ("radius", {"exclude_self": True}, ValueError, "exclude_self needs as many queries as points"),
    ("radius", {"max_entries": [3] * 1000}, TypeError, "max_entries must be an integer, got list of length 1000"),
    ("radius", {"max_entries": 2**63}, ValueError, r"max_entries must be at most 2\*\*40, got 9223372036854775808"),
    ("radius", {"max_entries": -1}, ValueError, "max_entries must not be negative, got -1"),
    ("radius", {"max_entries": 1e6}, TypeError, "max_entries must be an integer, got 1000000.0"),
    ("radius", {"max_entries": True}, TypeError, "max_entries must be an integer, got True"),
    ("radius", {"query": of(40, 2)}, ValueError, "query and points must have as many coordinates, got 2 and 3"),
    ("radius", {"query_lengths": [40]}, ValueError, "query and points must have as many clouds, got 1 and 2"),
    ("radius", {"points": INDEX}, ValueError, "leave lengths out"),
    ("index", {"points": of(128, 4)}, ValueError, "points must have 2 or 3 coordinates"),
    ("index", {"points": of(128, 3, dtype=np.uint8)}, TypeError, "points must be float32, .* got uint8"),
    ("index", {"lengths": [128, 1]}, ValueError, "lengths must sum to the number of points"),
    ("index", {"points": INDEX}, ValueError, "points is a NeighborIndex"),
]  # fmt: skip


def assert_refused(call, arguments, error, message, asarray):
    query, points = asarray(clouds.uniform(40)), asarray(clouds.uniform(128))
    search = {"query": query, "points": points, "query_lengths": [30, 10], "lengths": [100, 28]}
    sides = {"x": query, "y": points, "x_lengths": [30, 10], "y_lengths": [100, 28]}
    functions, good = {
        "knn": ((gpu3d.knn,), {**search, "k": 3}),
        "radius": ((gpu3d.radius_search,), {**search, "radius": 1.0}),
        "index": ((gpu3d.neighbor_index,), {"points": points, "lengths": [100, 28]}),
        "chamfer": ((gpu3d.chamfer, gpu3d.chamfer_value_and_grad), sides),
    }[call]
    index = gpu3d.neighbor_index(points, lengths=[100, 28])
    bad = {name: asarray(y) if isinstance(y, np.ndarray) else y for name, y in arguments.items()}
    bad = {name: index if y is INDEX else y for name, y in bad.items()}
    for function in functions:
        function(**good)
        with pytest.raises(error, match=message):
            function(**{**good, **bad})


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(call, arguments, error, message):
    assert_refused(call, arguments, error, message, np.asarray)


def test_too_many_points():
    many = np.broadcast_to(np.zeros((1, 3), np.float32), (2**31, 3))  # all rows share one row of memory
    with pytest.raises(ValueError, match=r"points must be at most 2\*\*31 - 1, because indices are int32, got 21474"):
        gpu3d.neighbor_index(many)


def test_a_matrix_is_an_array():
    points = clouds.uniform(20).astype(np.float64)
    assert_same_bits(gpu3d.knn(points.view(np.matrix), points.view(np.matrix), 2), gpu3d.knn(points, points, 2))


def test_a_tensor_that_requires_grad_is_refused_by_the_index():
    torch = pytest.importorskip("torch")
    points = torch.from_numpy(clouds.uniform(20)).requires_grad_()
    with pytest.raises(TypeError, match=r"points requires grad, and neighbor_index has no .*points\.detach\(\)"):
        gpu3d.neighbor_index(points)
    assert gpu3d.neighbor_index(points.detach()).lengths == (20,)


def test_options_are_keywords():
    points = clouds.uniform(20)
    for function, arguments in (
        (gpu3d.knn, (3, [20])),
        (gpu3d.radius_search, (1.0, [20])),
    ):
        with pytest.raises(TypeError, match="positional"):
            function(points, points, *arguments)


def check_empty(asarray, back):
    none, points = asarray(of(0, 3)), asarray(clouds.uniform(20))
    for query_lengths, lengths in ((None, None), ([0, 0], [20, 0])):
        options = {"query_lengths": query_lengths, "lengths": lengths}
        got = gpu3d.knn(none, points, 3, **options)  # a cloud that no query searches may be empty
        assert_same_bits(map_all(back, got), (np.empty((0, 3), np.float32), np.empty((0, 3), np.int32)))
        for max_entries in (None, 0, 4):
            got = gpu3d.radius_search(none, points, 1.0, max_entries=max_entries, **options)
            room = max_entries or 0
            rest = np.full(room, -1, np.int32), np.full(room, np.nan, np.float32)
            assert_same_bits(map_all(back, got), (np.zeros(1, np.int64), *rest))
    got = gpu3d.radius_search(points, none, 1.0)
    assert_same_bits(map_all(back, got), (np.zeros(21, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)))


def map_all(back, results):
    return [back(y) for y in results]


def test_empty():
    check_empty(np.asarray, np.asarray)


def test_one_point():
    point = np.array([[1, 2, 3]], np.float32)
    assert_same_bits(gpu3d.knn(point, point, 1), (np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32)))
    assert gpu3d.radius_search(point, point, 0).offsets.tolist() == [0, 1]


def test_a_huge_radius_is_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr(reference, "MAX_PAIRS", 10**8)  # instead of 2**31 - 1, for a smaller cloud
    points = clouds.lidar_like(20_000)
    points[:15_000] = 0
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"radius = inf finds 400000000 neighbours, more than 2\*\*31 - 1.*max_neighb"):
        gpu3d.radius_search(points, points, math.inf)
    with pytest.raises(ValueError, match=r"finds 225\d* neighbours.*query row 0 alone has 15000"):
        gpu3d.radius_search(points, points, 0.0)
    offsets, indices, distances = gpu3d.radius_search(points, points, 1e30, max_entries=7)
    assert (offsets == -400000000).all() and (indices == -1).all() and np.isnan(distances).all()
    assert len(indices) == len(distances) == 7
    assert time.perf_counter() - start < 30  # listing the pairs would take minutes and 30 GB


def test_crowded_places_take_no_longer():
    """40 % of the points are at the origin. A tree that kept all of them would visit each one for each query there."""
    points = clouds.degenerate(60_000)["40 % at the origin"]
    start = time.perf_counter()
    distances, indices = gpu3d.knn(points, points, 16)
    took = time.perf_counter() - start
    start = time.perf_counter()
    gpu3d.knn(clouds.lidar_like(60_000), clouds.lidar_like(60_000), 16)
    assert took < 20 * (time.perf_counter() - start)
    origin = np.flatnonzero(~points.any(axis=1))
    np.testing.assert_array_equal(indices[origin], np.broadcast_to(origin[:16], (len(origin), 16)))
    assert not distances[origin].any()
