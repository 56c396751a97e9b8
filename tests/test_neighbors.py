# SPDX-License-Identifier: Apache-2.0
"""knn, radius_search and chamfer on the CPU: the definition, brute force to the bit, SciPy, laws, bad input."""

from __future__ import annotations

import dataclasses
import math
import time

import clouds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

import gpu3d
from gpu3d import _arrays, neighbors
from gpu3d.reference import neighbors as reference

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": _arrays.BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
KS = (1, 2, 3, 8, 16, 17, 31, 32, 33, 63, 64)
KINDS = ("near", "independent", "collapsed", "far")
REDUCTIONS = ("mean", "sum", "none")
RAGGED = (([0, 700, 65, 100, 0], [0, 900, 70, 64, 3]), ([30] * 20, [64 + i for i in range(20)]), ([5, 5], [2000, 64]))


# ---- inputs, and what the results must be (test_neighbors_gpu.py too) ----------------------------------------------


def pair(kind, n, m, seed=0, dtype="float32"):
    """A query of n and a cloud of m points that lie to each other as `kind` says."""
    rng = np.random.default_rng(seed)
    points = clouds.lidar_like(m, seed)
    if kind == "near":
        query = points[rng.integers(0, m, n)] + rng.normal(0, 0.01, (n, 3))
    elif kind == "independent":
        query = clouds.uniform(n, seed + 1)
    else:  # what an untrained network makes of a unit cloud
        points = rng.random((m, 3))
        query = 0.05 * rng.random((n, 3)) + 0.5 if kind == "collapsed" else rng.random((n, 3)) + 5
    return query.astype(DTYPES[dtype]), points.astype(DTYPES[dtype])


def special(n=5000, seed=0):
    """Named clouds of n points that break a careless search; all occur in real data."""
    coincident = clouds.lidar_like(n, seed)
    coincident[np.random.default_rng(seed).permutation(n)[:3469]] = 0  # as many as one nuScenes sweep has
    far = clouds.uniform(n, seed)
    signed = coincident.copy()
    signed[:3469] *= -1  # zeros of both signs are one place
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
    """The same dtypes, shapes and bits, but for which NaN a NaN is."""
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


def check_knn(query, points, k, query_lengths=None, lengths=None, note=""):
    sides = lengths_of(query, points, query_lengths, lengths)
    got = gpu3d.knn(query, points, k, query_lengths=sides[0], lengths=sides[1])
    expected = reference.brute_force_knn(query, sides[0], points, sides[1], k)
    assert_same_bits(got, expected, f"{note} k = {k}")
    return got


def check_radius(query, points, radius, query_lengths=None, lengths=None, note=""):
    """Exact, with room for as many as there are, with some to spare, and flagged with one too few."""
    sides = lengths_of(query, points, query_lengths, lengths)
    options = {"query_lengths": sides[0], "lengths": sides[1]}
    expected = reference.brute_force_radius(query, sides[0], points, sides[1], radius)
    found, limit = len(expected[1]), 64 * (len(query) + len(points))
    note = f"{note} radius = {radius}: {found}"
    if found <= limit:
        assert_same_bits(gpu3d.radius_search(query, points, radius, **options), expected, note)
    else:
        row = int(np.diff(expected[0]).argmax())
        message = rf"finds {found} neighbours.* = {limit}; query row {row} alone has .*max_entries={found}"
        with pytest.raises(ValueError, match=message):
            gpu3d.radius_search(query, points, radius, **options)
    for spare in (0, 5):
        got = gpu3d.radius_search(query, points, radius, max_entries=found + spare, **options)
        padded = np.pad(expected[1], (0, spare), constant_values=-1)
        far = np.pad(expected[2], (0, spare), constant_values=np.nan)
        assert_same_bits(got, (expected[0], padded, far), note)
    if found:
        got = gpu3d.radius_search(query, points, radius, max_entries=found - 1, **options)
        flagged = np.full(len(query) + 1, -found), np.full(found - 1, -1, np.int32)
        assert_same_bits(got, (*flagged, np.full(found - 1, np.nan, np.float32)), note)
    return expected


# ---- oracles: one pair of points at a time -------------------------------------------------------------------------


def d2_by_definition(a, b):
    with np.errstate(all="ignore"):
        x, y, z = (np.float32(p) - np.float32(q) for p, q in zip(a, b, strict=True))
        return (x * x + y * y) + z * z


def located_by_definition(query, points):
    """Both as rows of three np.float32, from the minimum of the finite coordinates of a float64 cloud."""
    low = [0.0] * points.shape[1]
    if points.dtype == np.float64:
        low = [min((float(x) for x in axis if math.isfinite(x)), default=0.0) for axis in points.T]

    def located(cloud):
        with np.errstate(over="ignore", invalid="ignore"):
            rows = [[np.float32(float(x) - o) for x, o in zip(row, low, strict=True)] for row in cloud]
        return [row + [np.float32(0)] * (3 - len(row)) for row in rows]

    return located(query), located(points)


def neighbors_by_definition(query, points):
    """For each query (d2, index) of all points in order."""
    here, there = located_by_definition(query, points)
    usable = [j for j, p in enumerate(there) if all(map(math.isfinite, p))]
    return [sorted((d2_by_definition(q, there[j]), j) for j in usable) if np.isfinite(q).all() else [] for q in here]


def sum_by_definition(values):
    """float64, of each 1024 the upper half onto the lower."""
    values = [float(v) for v in values]
    while len(values) != 1:
        sums = []
        for first in range(0, max(len(values), 1), 1024):
            tile = values[first : first + 1024]
            tile += [0.0] * (1024 - len(tile))
            while len(tile) > 1:
                half = len(tile) // 2
                tile = [a + b for a, b in zip(tile[:half], tile[half:], strict=True)]
            sums += tile
        values = sums
    return values[0]


def chamfer_by_definition(x, y, squared):
    """float64 loss of one pair of finite clouds, and the gradients before they are rounded to float32."""
    loss, own, given = 0.0, [], []
    for sources, targets in ((x, y), (y, x)):
        here, there = located_by_definition(sources, targets)
        nearest = [near[0] for near in neighbors_by_definition(sources, targets)]
        d = [np.sqrt(d2) for d2, _ in nearest]
        loss += sum_by_definition([d2 for d2, _ in nearest] if squared else d) / len(sources)
        bound = 1
        if squared:
            bound = 2 + math.frexp(max(map(float, d)))[1]
        shift = 62 - len(sources).bit_length() - bound
        terms, pulls = [], [[0, 0, 0] for _ in targets]
        for i, (_, j) in enumerate(nearest):
            v = [a - b for a, b in zip(here[i], there[j], strict=True)]
            scaled = [np.float32(2) * c if squared else c / d[i] for c in v] if d[i] > 0 else [np.float32(0)] * 3
            terms.append([float(c) for c in scaled])
            for axis in range(3):
                pulls[j][axis] -= round(math.ldexp(terms[-1][axis], shift))  # Python's integers: no order, no overflow
        own.append(np.array(terms) / len(sources))
        given.append(np.array([[math.ldexp(float(p), -shift) for p in row] for row in pulls]) / len(sources))
    return loss, (own[0] + given[1], own[1] + given[0])


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
    distances, indices = gpu3d.knn(query, points, 64)
    near = [row[:64] or [(np.float32(np.nan), -1)] * 64 for row in expected]
    assert indices.tolist() == [[j for _, j in row] for row in near]
    assert_same_bits([distances], [np.sqrt(np.array([[d2 for d2, _ in row] for row in near], np.float32))])
    radius = float(distances[2, 20])
    offsets, indices, distances = gpu3d.radius_search(query, points, radius)
    kept = [sorted((j, d2) for d2, j in row if d2 <= np.float32(radius) * np.float32(radius)) for row in expected]
    assert np.diff(offsets).tolist() == [len(row) for row in kept] and 20 <= len(kept[2]) < 68
    found = sorted((q, j) for q, row in enumerate(kept) for j, _ in row)
    assert sorted(zip(np.repeat(np.arange(40), np.diff(offsets)).tolist(), indices.tolist(), strict=True)) == found
    assert indices.tolist() == [j for row in kept for j, _ in row]
    assert_same_bits([distances], [np.sqrt(np.array([d2 for row in kept for _, d2 in row], np.float32))])


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chamfer_is_the_definition(dtype, dimensions, squared):
    x, y = (p[:, :dimensions] for p in pair("near", 90, 130, dtype=dtype))
    x[4], x[5] = y[4], y[4]  # distance 0
    expected, gradients = chamfer_by_definition(x, y, squared)
    loss, got = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
    assert loss.shape == () and loss.dtype == np.float32 and loss == np.float32(expected) > 0
    assert_same_bits([gpu3d.chamfer(x, y, squared=squared)], [loss])
    for gradient, exact, of in zip(got, gradients, (x, y), strict=True):
        rounded = exact[:, :dimensions].astype(np.float32).astype(of.dtype)
        assert_same_bits([gradient], [rounded])
        assert (gradient.astype(float) != 0).any(axis=1).mean() > 0.5


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chamfer_backward(dtype, reduction):
    """The gradients times what is asked of the loss: in float32, and then rounded."""
    lengths = {"x_lengths": (50, 1, 30), "y_lengths": (20, 64, 1)}
    x, y = ragged(*lengths.values(), dtype=dtype)
    options = {**lengths, "squared": True, "reduction": reduction}
    loss, found = neighbors.chamfer_found(x, y, **options)
    assert_same_bits([loss], [gpu3d.chamfer(x, y, **options)])
    dloss = np.random.default_rng(0).standard_normal(loss.shape).astype(np.float32)
    got = neighbors.chamfer_backward(dloss, x, y, found, **options)
    wide = (z if dtype == "float64" else z.astype(np.float32) for z in (x, y))  # whose gradients are float32
    plain, expected = gpu3d.chamfer_value_and_grad(*wide, **options).gradients, []
    for gradient, of_clouds in zip(plain, lengths.values(), strict=True):
        factors = np.repeat(dloss, of_clouds) if reduction == "none" else np.full(sum(of_clouds), dloss)
        expected.append((gradient.astype(np.float32) * factors[:, None]).astype(x.dtype))
    assert_same_bits(got, expected)


def test_bad_input_of_chamfer_backward():
    """Memory is read by what was found, so that must fit."""
    (x, y), lengths = pair("near", 40, 50), {"x_lengths": (30, 10), "y_lengths": (20, 30)}
    options = {**lengths, "squared": False, "reduction": "none"}
    loss, found = neighbors.chamfer_found(x, y, **options)
    for changes, message in (
        ({"found": found[:-1]}, r"found must be int32 \[184\], of the same clouds, got int32 \[183\]"),
        ({"found": found.view(np.float32)}, r"found must be int32 \[184\], .* got float32 \[184\]"),
        ({"x": x[1:]}, "x_lengths must sum to the number of x"),
        ({"dloss": loss[:1]}, r"dloss must have the loss's shape, got \[1\] for reduction 'none'"),
        ({"reduction": "sum"}, r"dloss must have the loss's shape, got \[2\] for reduction 'sum'"),
    ):
        good = {"dloss": loss, "x": x, "y": y, "found": found, **options}
        neighbors.chamfer_backward(**good)
        with pytest.raises(ValueError, match=message):
            neighbors.chamfer_backward(**{**good, **changes})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("squared", [False, True])
def test_chamfer_of_a_batch_is_the_definition(squared, reduction):
    x_lengths, y_lengths = [50, 1, 30], [20, 64, 1]
    x, y = ragged(x_lengths, y_lengths)
    options = {"x_lengths": x_lengths, "y_lengths": y_lengths, "squared": squared, "reduction": reduction}
    loss, got = gpu3d.chamfer_value_and_grad(x, y, **options)
    assert_same_bits([gpu3d.chamfer(x, y, **options)], [loss])
    x_parts, y_parts = (np.split(p, np.cumsum(n)[:-1]) for p, n in ((x, x_lengths), (y, y_lengths)))
    losses, gradients = zip(
        *(chamfer_by_definition(a, b, squared) for a, b in zip(x_parts, y_parts, strict=True)), strict=True
    )
    total = {"mean": sum_by_definition(losses) / 3, "sum": sum_by_definition(losses), "none": losses}[reduction]
    assert_same_bits([loss], [np.array(total, np.float32)])
    for side in (0, 1):
        exact = np.concatenate([g[side] for g in gradients]) / (3 if reduction == "mean" else 1)
        assert_same_bits([got[side]], [exact.astype(np.float32)])
        assert exact.any(axis=1).all()


@pytest.mark.parametrize("n", [0, 1, 2, 1023, 1024, 1025, 5000, 1024 * 1024 + 1])
def test_ordered_sum(n):
    values = np.random.default_rng(n).standard_normal(n) * 2.0 ** np.random.default_rng(n).integers(-30, 30, n)
    assert reference.ordered_sum(values) == sum_by_definition(values)
    assert math.isclose(reference.ordered_sum(values), math.fsum(values), rel_tol=1e-9)


# ---- brute force, to the bit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_k(kind):
    query, points = pair(kind, 1500, 2500)
    for k in KS:
        check_knn(query, points, k, note=kind)


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
        check_knn(query, points, k, note=name)
    finite = points[np.isfinite(points).all(axis=1)].astype(float)
    extent = float(np.ptp(finite)) if len(finite) else 1.0
    for radius in (0.0, extent / 500, extent / 20, 0.125):  # the last: the lattice's step
        check_radius(query[::4], points, radius, note=name)
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
    for other in DTYPES.values():  # the cloud's dtype says where coordinates count from
        check_knn(query.astype(other), points, 3)
    flat = np.concatenate([query, np.zeros((600, 1), query.dtype)], 1), np.concatenate([points, points[:, :1] * 0], 1)
    if dimensions == 2:
        assert_same_bits(gpu3d.knn(query, points, 5), gpu3d.knn(*flat, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_radius(kind):
    query, points = pair(kind, 700, 3000)
    some = gpu3d.knn(query, points, 8).distances
    for radius in (0, *np.quantile(some, [0.01, 0.5, 0.99]).tolist(), float(some[3, 7]), 1e9, np.float32(1), 10**30):
        expected = check_radius(query, points, radius, note=kind)
    assert len(expected[1]) == 700 * 3000


def test_a_point_at_the_radius_is_kept():
    """d2 and r*r round alike: a neighbour's own distance finds it wherever sqrt and square undo each other."""
    points = np.array([[3, 4, 0], [3, 4, 2**-22], [0, 0, 0]], np.float32)
    assert gpu3d.radius_search(points[2:], points, 5.0).indices.tolist() == [0, 1, 2]
    assert gpu3d.radius_search(points[2:], points, np.nextafter(np.float32(5), np.float32(0))).indices.tolist() == [2]
    assert gpu3d.radius_search(points[2:], points, 5 * (1 + 2.0**-26)).indices.tolist() == [0, 1, 2]  # rounds to 5
    assert gpu3d.radius_search(points[2:], points, 5 * (1 - 2.0**-26)).indices.tolist() == [0, 1, 2]
    third = np.float32(1) / np.float32(3)  # r*r is rounded to float32, up from its true value or down
    line = np.array([[third, 0, 0], [np.nextafter(third, np.float32(1)), 0, 0]], np.float32)
    assert gpu3d.radius_search(np.zeros((1, 3), np.float32), line, 1 / 3).indices.tolist() == [0]


def test_rounding_decides_at_the_radius():
    """Points truly within the radius, but not by the float32 formula: neither listed nor counted."""
    points = clouds.uniform(20_000)
    d2 = reference.squared_distances(points, np.zeros(3, np.float32))
    radii = np.sqrt(np.nextafter(d2, np.float32(0)))
    true = (points.astype(np.float64) ** 2).sum(axis=1)
    outside = (radii * radii < d2) & (true <= radii * radii)
    assert outside.sum() >= 20
    for point, radius in zip(points[outside][:20], radii[outside], strict=False):
        assert len(check_radius(np.zeros((1, 3), np.float32), point[None], float(radius))[1]) == 0


def test_real_sweeps(data_dir):
    """Every tenth point of each scan in the whole of it: SciPy's distances, and brute force for some."""
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
    allowed = 2 * np.spacing(distances)
    if points.dtype == np.float64:  # and both coordinates were rounded to float32 from the cloud's minimum
        allowed = allowed + 4 * np.spacing(np.float32(np.ptp(points, axis=0).max()))
    assert (error <= allowed).all(), error.max()


@pytest.mark.parametrize("kind", KINDS)
def test_scipy_agrees(kind):
    query, points = pair(kind, 20_000, 30_000)
    distances, indices = gpu3d.knn(query, points, 16)
    assert_within_two_ulp(distances, query, points)
    _, theirs = cKDTree(points).query(query, 16)
    assert (indices == theirs).mean() > 0.99  # ties apart
    assert (np.diff(distances, axis=1) >= 0).all() and distances.max() > 0


def test_map_coordinates_keep_their_millimetres():
    """Float64 of 5e6 m: float32 would know half metres."""
    rng = np.random.default_rng(0)
    near = rng.integers(0, 2**16, (3000, 3)) / 1024.0  # exact, and exact when moved
    shift = [5e6, 4.5e6, 300]
    query, points = near[:900], near[500:]
    moved = gpu3d.knn(query + shift, points + shift, 8)
    here = gpu3d.knn(query.astype(np.float32), points.astype(np.float32), 8)
    assert_same_bits(moved, here)
    assert_same_bits(gpu3d.radius_search(query + shift, points + shift, 3.0), gpu3d.radius_search(query, points, 3.0))
    assert_same_bits([gpu3d.chamfer(query + shift, points + shift)], [gpu3d.chamfer(query, points)])
    check_knn(query + shift, points + shift, 8)
    single = gpu3d.knn((query + shift).astype(np.float32), (points + shift).astype(np.float32), 8)
    assert (single.indices != here.indices).any()  # float32 would lose them


# ---- laws ----------------------------------------------------------------------------------------------------------

coarse = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=30, deadline=None)
@given(coarse, st.integers(1, 600), st.integers(1, 64), st.sampled_from([2, 8, 1024]))
def test_permuting_the_points_permutes_the_indices(rng, m, k, grid):
    k = min(k, m)
    query, points = (rng.integers(0, grid, (n, 3)).astype(np.float32) for n in (50, m))
    order = rng.permutation(m)
    one, two = gpu3d.knn(query, points, k), gpu3d.knn(query, points[order], k)
    assert_same_bits([two.distances], [one.distances])
    there = points[order][two.indices]
    assert_same_bits([np.sqrt(reference.squared_distances(query[:, None], there))], [one.distances])
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
    query_lengths, lengths = [n for n, _ in sizes], [max(m, k) for _, m in sizes]
    query, points = (rng.normal(size=(sum(n), 3)).astype(np.float32) for n in (query_lengths, lengths))
    distances, indices = gpu3d.knn(query, points, k, query_lengths=query_lengths, lengths=lengths)
    row = first = 0
    for n, m in zip(query_lengths, lengths, strict=True):
        alone = gpu3d.knn(query[row : row + n], points[first : first + m], k)
        part = slice(row, row + n)
        assert_same_bits((distances[part], indices[part]), (alone.distances, alone.indices + np.int32(first)))
        row, first = row + n, first + m
    assert len(distances) == row


@pytest.mark.parametrize("squared", [False, True])
def test_chamfer_laws(squared):
    x, y = pair("near", 3000, 4000)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
    back, (ey, ex) = gpu3d.chamfer_value_and_grad(y, x, squared=squared)
    assert_same_bits((loss, dx, dy), (back, ex, ey))
    total = np.abs(dx).sum()
    assert np.abs(dx.astype(float).sum(0) + dy.astype(float).sum(0)).max() < 1e-5 * total  # both moved: nothing changes
    same, gradients = gpu3d.chamfer_value_and_grad(x, x.copy(), squared=squared)
    assert same == 0 and not any(g.any() for g in gradients)
    expected = [cKDTree(b).query(a.astype(float))[0] ** (2 if squared else 1) for a, b in ((x, y), (y, x))]
    assert math.isclose(loss, expected[0].mean() + expected[1].mean(), rel_tol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_chamfer_gradients_are_finite_differences(squared):
    """Of SciPy's loss in float64, along directions that change nobody's nearest."""
    x, y = (p.astype(np.float64) for p in pair("independent", 300, 400))
    x, y = x[:300] * 0.1, y * 0.1
    _, gradients = gpu3d.chamfer_value_and_grad(x, y, squared=squared)

    def loss(a, b):
        one, two = cKDTree(b).query(a), cKDTree(a).query(b)
        power = 2 if squared else 1
        return (one[0] ** power).mean() + (two[0] ** power).mean(), np.concatenate([one[1], two[1]])

    h = 1e-6
    for side in (0, 1):
        for seed in range(3):
            direction = np.random.default_rng(seed).standard_normal((x, y)[side].shape)
            moved = [[x, y], [x, y]]
            moved[0][side], moved[1][side] = (x, y)[side] + h * direction, (x, y)[side] - h * direction
            (up, near), (down, nearest) = (loss(*sides) for sides in moved)
            np.testing.assert_array_equal(near, nearest)
            slope, norm = (gradients[side] * direction).sum(), np.linalg.norm(gradients[side])
            assert abs((up - down) / (2 * h) - slope) < 1e-5 * norm and norm > 1e-3


def test_the_nearest_of_lowest_index_takes_the_gradient():
    x, y = np.zeros((1, 3), np.float32), np.array([[0, 9, 0], [2, 0, 0], [-2, 0, 0], [2, 0, 0]], np.float32)
    _, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y)
    np.testing.assert_array_equal(dx, np.array([[-1 - 0.25, -0.25, 0]], np.float32))
    np.testing.assert_array_equal(dy, np.array([[0, 1, 0], [5, 0, 0], [-1, 0, 0], [1, 0, 0]], np.float32) / 4)


def test_no_gradient_where_the_distance_rounds_to_0():
    x, y = np.full((1, 3), 1e-30, np.float32), np.zeros((1, 3), np.float32)
    for squared in (False, True):
        loss, gradients = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
        assert loss == 0 and not any(g.any() for g in gradients)


def test_many_pulls_on_one_point():
    """All of y has the same nearest: the sum is rounded once, as if taken exactly."""
    rng = np.random.default_rng(0)
    x, y = np.zeros((1, 3), np.float32), (rng.random((50_000, 3)) + 1).astype(np.float32)
    for squared in (False, True):
        _, (dx, _) = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
        v = -y.astype(np.float64)
        terms = 2 * v if squared else v / np.linalg.norm(v, axis=1, keepdims=True)
        own = terms[np.linalg.norm(v, axis=1).argmin()]
        np.testing.assert_allclose(dx[0], own + terms.mean(axis=0), rtol=3e-7)


# ---- NaN, inf, and numbers at the ends -----------------------------------------------------------------------------


def test_no_neighbour_is_minus_one_and_nan():
    points = np.array([[0, 0, 0], [np.nan, 0, 0], [2, 0, 0], [0, np.inf, 0]], np.float32)
    distances, indices = gpu3d.knn(np.array([[1.5, 0, 0], [0, np.nan, 0], [-np.inf, 0, 0]], np.float32), points, 3)
    assert indices.tolist() == [[2, 0, -1], [-1, -1, -1], [-1, -1, -1]]
    np.testing.assert_array_equal(distances, [[0.5, 1.5, np.nan], [np.nan] * 3, [np.nan] * 3])
    offsets, indices, _ = gpu3d.radius_search(points, points, math.inf)
    assert offsets.tolist() == [0, 2, 2, 4, 4] and indices.tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize("squared", [False, True])
def test_nan_stays_with_its_point(squared):
    x, y = pair("near", 300, 200)
    x_lengths, y_lengths = [100, 200], [150, 50]
    options = {"x_lengths": x_lengths, "y_lengths": y_lengths, "squared": squared, "reduction": "none"}
    x[7, 1], y[3, 2] = np.nan, np.inf
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, **options)
    assert np.isnan(loss).tolist() == [True, False]
    assert np.flatnonzero(np.isnan(dx).any(1)).tolist() == [7] and np.isnan(dx[7]).all()
    assert np.flatnonzero(np.isnan(dy).any(1)).tolist() == [3] and np.isnan(dy[3]).all()
    others = np.delete(x, 7, axis=0), np.delete(y, 3, axis=0)
    fewer = {**options, "x_lengths": [99, 200], "y_lengths": [149, 50]}
    _, (ex, _) = gpu3d.chamfer_value_and_grad(*others, **fewer)
    np.testing.assert_allclose(np.delete(dx, 7, axis=0), ex, rtol=0.1, atol=0.01)  # means over one point fewer
    assert np.isnan(gpu3d.chamfer(x, y, x_lengths=x_lengths, y_lengths=y_lengths))


def test_distances_too_large_for_float32():
    """They are inf, and in order of the index."""
    points = np.array([[3e38, 0, 0], [1e30, 0, 0], [0, 0, 0], [1e18, 0, 0]], np.float32)
    distances, indices = gpu3d.knn(points[2:3], points, 4)
    assert indices.tolist() == [[2, 3, 0, 1]] and distances[0, 2:].tolist() == [math.inf] * 2
    assert gpu3d.radius_search(points[2:3], points, 1e18).indices.tolist() == [2, 3]
    assert gpu3d.radius_search(points[2:3], points, 1e25).indices.tolist() == [0, 1, 2, 3]  # r*r is inf too
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(points[:1], points[2:3])
    assert loss == math.inf and np.isnan(dx).all() and np.isnan(dy).all()


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
    loss, gradients = gpu3d.chamfer_value_and_grad(query, points, x_lengths=query_lengths, y_lengths=lengths)
    query_index = gpu3d.neighbor_index(query, lengths=query_lengths)
    for x, y, more in ((query, index, {"x_lengths": query_lengths}), (query_index, index, {})):
        got = gpu3d.chamfer_value_and_grad(x, y, **more)
        assert_same_bits((got.loss, *got.gradients), (loss, *gradients))
        assert_same_bits([gpu3d.chamfer(x, y, **more)], [loss])
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
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, gpu3d.neighbor_index(y), reduction="none")
    expected, gradients = gpu3d.chamfer_value_and_grad(
        *packed, x_lengths=[50] * 4, y_lengths=[70] * 4, reduction="none"
    )
    assert dx.shape == x.shape and dy.shape == y.shape and loss.shape == (4,)
    assert_same_bits((loss, dx.reshape(-1, 3), dy.reshape(-1, 3)), (expected, *gradients))


def test_views_and_read_only_arrays():
    query, points = pair("near", 300, 500)
    expected = gpu3d.knn(query, points, 5), gpu3d.radius_search(query, points, 1.0)
    loss, gradients = gpu3d.chamfer_value_and_grad(query, points)
    before = query.tobytes(), points.tobytes()

    def frozen(y):
        y = y.view()
        y.flags.writeable = False
        return y

    for view in (
        frozen,
        np.asfortranarray,
        lambda y: np.repeat(y, 2, axis=1)[:, ::2],
        lambda y: y[::-1].copy()[::-1],
        lambda y: np.pad(y, ((0, 0), (1, 2)))[:, 1:-2],
    ):
        views = view(query), view(points)
        assert_same_bits(gpu3d.knn(*views, 5), expected[0])
        assert_same_bits(gpu3d.radius_search(*views, 1.0), expected[1])
        got = gpu3d.chamfer_value_and_grad(*views)
        assert_same_bits((got.loss, *got.gradients), (loss, *gradients))
    assert (query.tobytes(), points.tobytes()) == before  # and none is written to


def check_library(convert, back, is_kind, dtype):
    query, points = pair("near", 60, 90, dtype=dtype)
    here = convert(query), convert(points)
    lengths = {"query_lengths": [20, 40], "lengths": [50, 40]}
    got = gpu3d.knn(*here, 4, **lengths), gpu3d.radius_search(*here, 2.0, **lengths)
    expected = gpu3d.knn(query, points, 4, **lengths), gpu3d.radius_search(query, points, 2.0, **lengths)
    for a, b in zip(got, expected, strict=True):
        assert type(a) is type(b) and all(map(is_kind, a))
        assert_same_bits([back(y) for y in a], b)
    indexed = gpu3d.knn(here[0], gpu3d.neighbor_index(here[1]), 4)
    assert all(map(is_kind, indexed))
    assert_same_bits([back(y) for y in indexed], gpu3d.knn(query, points, 4))
    for reduction in ("mean", "none"):
        loss, (dx, dy) = gpu3d.chamfer_value_and_grad(*here, reduction=reduction)
        exact, (ex, ey) = gpu3d.chamfer_value_and_grad(query, points, reduction=reduction)
        alone = gpu3d.chamfer(*here, reduction=reduction)
        assert all(map(is_kind, (loss, dx, dy, alone))) and dx.dtype == here[0].dtype
        assert_same_bits([back(y) for y in (loss, dx, dy, alone)], (exact, ex, ey, exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(dtype):
    torch = pytest.importorskip("torch")

    def tensor(y):
        return torch.from_numpy(y.astype(np.float64)).to(getattr(torch, y.dtype.name)).requires_grad_()

    def array(y):
        assert not y.requires_grad
        return y.view(torch.int16).numpy().view(_arrays.BFLOAT16) if y.dtype == torch.bfloat16 else y.numpy()

    check_library(tensor, array, lambda y: isinstance(y, torch.Tensor), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]

    def array(y):
        offsets = y.dtype == np.int32 and y.ndim == 1 and len(y) == 61  # JAX knows no int64 unless it is told to
        return np.asarray(y).astype(np.int64) if offsets else np.asarray(y)

    check_library(lambda y: jax.device_put(y, cpu), array, lambda y: isinstance(y, jax.Array), dtype)


def test_libraries_may_differ_on_the_cpu():
    """Results are of the kind of the first argument; each gradient of its own array's."""
    torch = pytest.importorskip("torch")
    query, points = pair("near", 60, 90)
    assert isinstance(gpu3d.knn(query, torch.from_numpy(points), 4).indices, np.ndarray)
    index = gpu3d.neighbor_index(points)
    assert isinstance(gpu3d.knn(torch.from_numpy(query), index, 4).indices, torch.Tensor)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(torch.from_numpy(query), index)
    assert isinstance(loss, torch.Tensor) and isinstance(dx, torch.Tensor) and isinstance(dy, np.ndarray)


# ---- bad input -----------------------------------------------------------------------------------------------------


def of(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


INDEX = object()  # stands for an index of the good points

# The call; what differs from a good one; what it raises.
BAD = [
    ("knn", {"k": 0}, ValueError, "k must be from 1 to 64, got 0"),
    ("knn", {"k": 65}, ValueError, "k must be from 1 to 64, got 65"),
    ("knn", {"k": -1}, ValueError, "k must be from 1 to 64, got -1"),
    ("knn", {"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
    ("knn", {"k": True}, TypeError, "k must be an integer, got True"),
    ("knn", {"k": None}, TypeError, "k must be an integer, got None"),
    ("knn", {"k": 29}, ValueError, "k must be no larger than a cloud, got k = 29 for the 28 points of cloud 1"),
    ("knn", {"points": of(0, 3), "lengths": [0, 0]}, ValueError, "got k = 3 for the 0 points of cloud 0"),
    ("knn", {"query": of(40, 2)}, ValueError, "query and points must have as many coordinates, got 2 and 3"),
    ("knn", {"query": of(40, 4)}, ValueError, r"query must have 2 or 3 coordinates .*\[40, 4\]: take query\[..., :3\]"),
    ("knn", {"query": of(40, 1)}, ValueError, "query must have 2 or 3 coordinates"),
    ("knn", {"query": of(40)}, ValueError, r"query must have shape \[N, 3\] \(or \[B, n, 3\]\), got \[40\]"),
    ("knn", {"query": of(1, 2, 20, 3)}, ValueError, "query must have shape"),
    ("knn", {"query": of(40, 3, dtype=np.int32)}, TypeError, "query must be float32, .* got int32: .*query.astype"),
    ("knn", {"query": [[0, 0, 0]]}, TypeError, "query must be an array"),
    ("knn", {"query": INDEX}, TypeError, "query must be an array, got NeighborIndex: an index stands in for points"),
    ("knn", {"points": of(128, 5)}, ValueError, "points must have 2 or 3 coordinates"),
    ("knn", {"points": of(128, 3, dtype=np.int64)}, TypeError, "points must be float32, .* got int64"),
    ("knn", {"points": None}, TypeError, "points must be an array"),
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
    ("radius", {"radius": "1"}, TypeError, "radius must be a number, got '1' of type str"),
    ("radius", {"radius": True}, TypeError, "radius must be a number, got True"),
    ("radius", {"radius": None}, TypeError, "radius must be a number, got None"),
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
    ("chamfer", {"x": of(40, 2)}, ValueError, "x and y must have as many coordinates, got 2 and 3"),
    ("chamfer", {"x": of(40, 3, dtype=np.complex64)}, TypeError, "x must be float32, .* got complex64"),
    ("chamfer", {"y": 3.0}, TypeError, "y must be an array"),
    ("chamfer", {"x_lengths": [40]}, ValueError, "x and y must have as many clouds, got 1 and 2"),
    ("chamfer", {"x_lengths": [39, 2]}, ValueError, "x_lengths must sum to the number of x, got a sum of 41 for 40 x"),
    ("chamfer", {"y_lengths": (1, 1)}, ValueError, "y_lengths must sum to the number of y"),
    ("chamfer", {"x": INDEX}, ValueError, "x is a NeighborIndex, which knows its lengths: leave x_lengths out"),
    ("chamfer", {"y": INDEX}, ValueError, "y is a NeighborIndex, which knows its lengths: leave y_lengths out"),
    ("chamfer", {"x_lengths": [40, 0]}, ValueError, "must not be empty, .* got cloud 1 of x with no point"),
    ("chamfer", {"y_lengths": [0, 128]}, ValueError, "must not be empty, .* got cloud 0 of y with no point"),
    ("chamfer", {"squared": 1}, TypeError, "squared must be True or False, got 1"),
    ("chamfer", {"squared": "no"}, TypeError, "squared must be True or False, got 'no'"),
    ("chamfer", {"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ("chamfer", {"reduction": None}, ValueError, "reduction must be one of .*, got None"),
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
    many = np.broadcast_to(np.zeros((1, 3), np.float32), (2**31, 3))  # one row of memory
    with pytest.raises(ValueError, match=r"points must be at most 2\*\*31 - 1, for indices are int32, got 2147483648"):
        gpu3d.neighbor_index(many)


def test_options_are_keywords():
    points = clouds.uniform(20)
    for function, arguments in (
        (gpu3d.knn, (3, [20])),
        (gpu3d.radius_search, (1.0, [20])),
        (gpu3d.chamfer, ([20],)),
        (gpu3d.chamfer_value_and_grad, ([20],)),
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
    batch = {"x_lengths": [], "y_lengths": []}
    for reduction, expected in (("none", []), ("sum", 0.0), ("mean", np.nan)):
        loss, gradients = gpu3d.chamfer_value_and_grad(none, none, reduction=reduction, **batch)
        assert_same_bits([back(loss)], [np.array(expected, np.float32)])
        assert all(tuple(g.shape) == (0, 3) for g in gradients)


def map_all(back, results):
    return [back(y) for y in results]


def test_empty():
    check_empty(np.asarray, np.asarray)


def test_one_point():
    point = np.array([[1, 2, 3]], np.float32)
    assert_same_bits(gpu3d.knn(point, point, 1), (np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32)))
    assert gpu3d.radius_search(point, point, 0).offsets.tolist() == [0, 1]
    assert gpu3d.chamfer(point, point + 2) == np.float32(2 * math.sqrt(12))


def test_a_huge_radius_is_refused_before_memory_is_taken():
    points = clouds.lidar_like(40_000)
    points[:16_000] = 0
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"finds 1600000000 neighbours, more than 64 \* \(N \+ M\) = 5120000"):
        gpu3d.radius_search(points, points, math.inf)
    with pytest.raises(ValueError, match=r"query row 0 alone has 16000"):
        gpu3d.radius_search(points, points, 0.0)
    offsets, indices, distances = gpu3d.radius_search(points, points, 1e30, max_entries=7)
    assert (offsets == -1600000000).all() and (indices == -1).all() and np.isnan(distances).all()
    assert len(indices) == len(distances) == 7
    assert time.perf_counter() - start < 30  # listing the pairs would take minutes and 30 GB


def test_crowded_places_take_no_longer():
    """40 % of the points at the origin: a tree that keeps them all looks at each of them for each of them."""
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
