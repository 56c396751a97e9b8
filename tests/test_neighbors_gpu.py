# SPDX-License-Identifier: Apache-2.0
"""Neighbour search on the GPU gives the same bits as the reference, for every size and cloud."""

from __future__ import annotations

import math

import clouds
import numpy as np
import pytest
from conftest import poison
from test_neighbors import (
    BAD,
    DTYPES,
    KINDS,
    KS,
    RAGGED,
    STRAYS,
    assert_refused,
    assert_same_bits,
    check_empty,
    check_empty_gradients,
    gradients,
    pair,
    ragged,
    searches,
    special,
    surveyed,
    upstream,
)

import gpu3d
from gpu3d.reference import neighbors as reference

pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1025, 2049, 5000)


def to_host(results):
    """The arrays of a named tuple as flat NumPy arrays."""
    return [y.get() for part in results for y in (part if isinstance(part, tuple) else (part,))]


def check(cp, function, x, y, *arguments, note="", **options):
    """Check that GPU and CPU give the same bits, in poisoned memory. Returns the results of the CPU, flat."""
    device = [cp.asarray(z) if isinstance(z, np.ndarray) else z for z in (x, y, *arguments)]  # radii too
    poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
    got = function(*device, **options)
    expected = function(x, y, *arguments, **options)
    assert type(got) is type(expected) or isinstance(expected, np.ndarray)
    if isinstance(expected, np.ndarray):
        got, expected = (got,), (expected,)
    flat = [y for part in expected for y in (part if isinstance(part, tuple) else (part,))]
    assert_same_bits(to_host(got), flat, f"{function.__name__} {note} {x.shape} {y.shape} {x.dtype} {arguments}")
    return flat


def check_knn(cp, query, points, k, note="", **options):
    return check(cp, gpu3d.knn, query, points, k, note=note, **options)


def check_radius(cp, query, points, radius, note="", **options):
    """Check with the exact number of entries, with more, and with one too few, which is flagged."""
    found = abs(int(gpu3d.radius_search(query, points, radius, max_entries=0, **options).offsets[-1]))
    check(cp, gpu3d.radius_search, query, points, radius, note=note, **options)
    for max_entries in (found - 1, found, found + 100):
        if max_entries >= 0:
            check(cp, gpu3d.radius_search, query, points, radius, note=note, max_entries=max_entries, **options)
    return found


def check_nearest(cp, query, points, radius, k, note="", **options):
    """Check radius_search with max_neighbors."""
    return check(cp, gpu3d.radius_search, query, points, radius, note=note, max_neighbors=k, **options)


# ---- the same bits as the reference --------------------------------------------------------------------------------


def test_small_neighbors(cp):
    """For compute-sanitizer: short and full tiles, small and large k, a large batch, NaN, ties."""
    for kind in KINDS:
        query, points = pair(kind, 300, 700)
        for k in (1, 16, 33, 100, 700):
            check_knn(cp, query, points, k, kind)
        check_radius(cp, query, points, 2.0, kind)
        check_nearest(cp, query, points, 2.0, 40, kind)
    query, points = ragged([0, 40, 1, 100], [5, 64, 300, 65])
    lengths = {"query_lengths": [0, 40, 1, 100], "lengths": [5, 64, 300, 65]}
    for k in (20, 64, 1024):
        check_knn(cp, query, points, k, **lengths)
    check_radius(cp, query, points, 1.0, **lengths)
    query, points = ragged([10] * 70, [7] * 70, dtype="float64")
    check_knn(cp, query, points, 3, query_lengths=[10] * 70, lengths=[7] * 70)
    points = special(600)["spoiled"]
    check_knn(cp, points, points, 16, "spoiled")
    check_knn(cp, np.zeros((200, 3), np.float32), np.zeros((300, 3), np.float32), 64, "all equal")


def test_races_of_neighbors(cp):
    """For compute-sanitizer's racecheck, which is slow on the test above: every kind of list."""
    query, points = pair("near", 300, 280)
    for k in (2, 16, 40, 90, 200, 280, 600):
        check_knn(cp, query, points, k)
    check_radius(cp, query, points, 1.0)
    check_knn(cp, *pair("near", 1500, 1500), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", KS)
def test_every_k(cp, k, kind):
    for n, m in ((1, 64), (300, 1500), (400, 5000)):
        check_knn(cp, *pair(kind, n, m, seed=k), k, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_across_the_edges_of_tiles(cp, kind):
    for m in SIZES:
        for n in (1, 33, m):
            query, points = pair(kind, n, m, seed=m)
            for k in (1, 2, 16, 64):
                check_knn(cp, query, points, k, kind)
        check_radius(cp, query, points, 0.3, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20_000, 131_072, 131_073])
def test_large_clouds(cp, n, kind):
    query, points = pair(kind, n, n + 17)
    for k in (1, 2, 16, 64):
        check_knn(cp, query, points, k, kind)
    radius = float(np.quantile(gpu3d.knn(query[:500], points, 8).distances, 0.2))
    assert check_radius(cp, query[:5000], points, radius, kind) > 500


@pytest.mark.parametrize("n", [1_000_000, 1_000_003])
def test_a_million_points(cp, n):
    query, points = pair("near", n, n)
    check_knn(cp, query, points, 1)
    check_knn(cp, query[: n // 10], points, 16)


@pytest.mark.parametrize("n", [2**20 + 70_001, 2**25 + 70_001])
def test_levels_above_a_million_points(cp, n):
    """Coordinates are small integers: then brute force is exact however CuPy rounds, and there are many ties."""
    rng = cp.random.default_rng(0)
    points = rng.integers(0, 1500, (n, 3)).astype(cp.float32)
    points[:, 2] = cp.rint((points[:, 0] - 700) ** 2 / 1000)  # a surface
    points[n // 3] = 1e30
    query = cp.concatenate([points[:: n // 20][:20], rng.integers(-300, 1800, (20, 3)).astype(cp.float32)])
    index = gpu3d.neighbor_index(points)
    distances, indices = gpu3d.knn(query, index, 3)
    offsets, within, _ = gpu3d.radius_search(query, index, 30.0)
    for i, q in enumerate(query):
        d2 = ((points - q) ** 2).sum(axis=1)
        near = cp.flatnonzero(d2 <= cp.partition(d2, 2)[2])
        expected = near[cp.lexsort(cp.stack([near, d2[near]]))][:3]
        assert indices[i].tolist() == expected.tolist()
        assert cp.array_equal(distances[i], cp.sqrt(d2[expected]))
        begin, end = offsets[i : i + 2].tolist()
        assert cp.array_equal(within[begin:end], cp.flatnonzero(d2 <= 900))


def test_levels_of_two_batches(cp):
    """Chamfer and APML prepare both sides together: a cloud's levels then begin behind those of other clouds."""
    rng = cp.random.default_rng(0)
    lengths = (40_000, 2**20 + 9), (2**20 + 70_001, 50_000)
    x, y = (rng.random((sum(n), 3), dtype=cp.float32) * cp.asarray([9, 9, 1], cp.float32) for n in lengths)
    losses = gpu3d.chamfer(x, y, x_lengths=lengths[0], y_lengths=lengths[1], reduction="none")
    for b, (n, m) in enumerate(zip(*lengths, strict=True)):
        one, other = x[:n] if b == 0 else x[-n:], y[:m] if b == 0 else y[-m:]
        assert losses[b] == gpu3d.chamfer(one, other)
        means = [gpu3d.knn(p, q, 1).distances.mean(dtype=cp.float64) for p, q in ((one, other), (other, one))]
        np.testing.assert_allclose(float(losses[b]), float(sum(means)), rtol=1e-6)


@pytest.mark.parametrize("n", [900, 5000, 40_000])
@pytest.mark.parametrize("stray", STRAYS)
def test_float64_decides_wherever_a_stray_point_lies(cp, stray, n):
    """In one node, in several, and in several branches."""
    cloud, extra = surveyed(n), np.array(STRAYS[stray]).reshape(-1, 3)
    points = np.concatenate([cloud[: n // 2], extra, cloud[n // 2 :]])
    query = np.concatenate([points[-300:], points[n // 2 - 5 : n // 2 + 5], cloud[:: n // 50] + 0.01])
    for k in (1, 2, 16, 33, 300, 1024) if n < 40_000 else (1, 16, 65):
        check_knn(cp, query, points, k, note=stray)
    check_knn(cp, points[:3000], points[:3000], 5, note=stray, exclude_self=True)
    for radius in (0.1, 1.0) if n > 900 else (0.1, 1e29, 1e155, math.inf):
        check_radius(cp, query, points, radius, note=stray)
        check(cp, gpu3d.radius_search, query, points, radius, max_neighbors=20, note=stray)


def test_both_are_widened_if_one_is_float64(cp):
    query, points = pair("near", 3000, 7000)
    for x, y in ((query.astype(np.float64), points), (query, points.astype(np.float64))):
        check_knn(cp, x, y, 7)
        check_radius(cp, x, y, 0.3)
        wanted = gpu3d.knn(x, y, 7)
        index = gpu3d.neighbor_index(cp.asarray(y))
        assert_same_bits(to_host(gpu3d.knn(cp.asarray(x), index, 7)), wanted)
        assert_same_bits(to_host(gpu3d.radius_search(cp.asarray(x), index, 0.3)), gpu3d.radius_search(x, y, 0.3))
        assert_same_bits([gpu3d.chamfer(cp.asarray(x), index).get()], [gpu3d.chamfer(x, y)])


def test_a_far_point_costs_the_others_nothing(cp):
    """The index sorts by robust bounds: without them all points but the far ones would share a voxel."""
    points = cp.random.default_rng(0).random((300_000, 3), dtype=cp.float32)
    points[[5, 77_777]] = cp.asarray([[1e30, 0, 0], [0, -99999, 3]], cp.float32)

    def milliseconds():
        start, end = cp.cuda.Event(), cp.cuda.Event()
        for _ in range(2):  # the first call compiles
            start.record()
            gpu3d.knn(points, points, 8)
            end.record()
        end.synchronize()
        return cp.cuda.get_elapsed_time(start, end)

    with_far = milliseconds()
    points[[5, 77_777]] = 0.5
    assert with_far < 3 * milliseconds()


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(cp, name):
    points = special(5000)[name]
    query = np.concatenate([points[:1500], clouds.uniform(100)])
    for k in (1, 3, 16, 64):
        check_knn(cp, query, points, k, name)
        check_knn(cp, points, query, k, name)
    finite = points[np.isfinite(points).all(axis=1)].astype(float)
    extent = float(np.ptp(finite)) if len(finite) else 1.0
    for radius in (0.0, extent / 500, extent / 20, 0.125, math.inf):
        check_radius(cp, query[::4], points, radius, name)


def test_crowded_places(cp):
    """Clouds that break a search by cells: 3,469 equal points, and 40 % of a sweep at the origin."""
    sweep = clouds.lidar_like(120_000)
    sweep[np.random.default_rng(0).permutation(len(sweep))[:3469]] = 0
    for points in (sweep, clouds.degenerate(60_000)["40 % at the origin"]):
        for k in (1, 16, 64):
            check_knn(cp, points, points, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_lengths", "lengths"),
    [*RAGGED, ([2048] * 32, [2048] * 32), ([7] * 300, [9] * 300)],
    ids=lambda n: str(len(n)),
)
def test_ragged_batches(cp, query_lengths, lengths, dtype):
    query, points = ragged(query_lengths, lengths, dtype=dtype)
    options = {"query_lengths": query_lengths, "lengths": lengths}
    for k in (1, 3, 16, 64):
        check_knn(cp, query, points, k, **options)
    check_radius(cp, query, points, 0.2, **options)
    radii = np.random.default_rng(0).choice([0, 0.1, 0.3], len(query)).astype(query.dtype)
    check_radius(cp, query, points, radii, **options)
    for k in (1, 20, 70):
        check_nearest(cp, query, points, radii, k, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_dtypes_and_dimensions(cp, dimensions, dtype):
    query, points = (p[:, :dimensions] for p in pair("near", 2000, 3000, dtype=dtype))
    check_radius(cp, query, points, 0.5)
    for other in DTYPES.values():  # the dtype of the cloud decides what is subtracted
        for k in (1, 16):
            check_knn(cp, query.astype(other), points, k)


def test_map_coordinates(cp):
    query, points = (p + [5e6, 4.5e6, 300] for p in pair("near", 5000, 6000, dtype="float64"))
    points[::100, 0], points[50::100, 2] = np.nan, -np.inf  # not used for the minimum
    query[7, 1] = 1e300
    for k in (1, 16):
        check_knn(cp, query, points, k)
    check_radius(cp, query, points, 1.0)


def test_radius_at_the_distance_of_a_neighbour(cp):
    query, points = pair("near", 300, 5000)
    distances = gpu3d.knn(query, points, 8).distances
    for i in range(0, 300, 30):
        for radius in (distances[i, 7], np.nextafter(distances[i, 7], np.float32(0))):
            check_radius(cp, query, points, float(radius))


def test_too_many_entries(cp, monkeypatch):
    monkeypatch.setattr(reference, "MAX_PAIRS", 10**6)  # instead of 2**31 - 1, for a smaller cloud
    points = clouds.uniform(5000)
    message = r"radius = 1e\+30 finds 25000000 neighbours, more than 2\*\*31 - 1; query row 0 alone has 5000.*max_neigh"
    with pytest.raises(ValueError, match=message):
        gpu3d.radius_search(cp.asarray(points), cp.asarray(points), 1e30)
    points[100:] += 1000  # a crowd; the error names the row with most neighbours
    points[200:3000] = points[3000]
    with pytest.raises(ValueError) as on_cpu:
        gpu3d.radius_search(points, points, 0.5)
    with pytest.raises(ValueError) as on_gpu:
        gpu3d.radius_search(cp.asarray(points), cp.asarray(points), 0.5)
    assert str(on_gpu.value) == str(on_cpu.value) and "query row 200 alone" in str(on_cpu.value)


def test_as_many_entries_as_there_are(cp):
    """Results without max_entries have no limit that depends on the number of points."""
    points = np.random.default_rng(0).random((20_000, 3), dtype=np.float32)
    found = check(cp, gpu3d.radius_search, points, points, 0.15)
    assert len(found[1]) > 64 * 2 * len(points)


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_within_a_radius(cp, kind):
    query, points = pair(kind, 200, 6000)
    some = gpu3d.knn(query, points, 8).distances
    radii = np.random.default_rng(1).choice([*np.quantile(some, [0.01, 0.5, 0.99]), 0, 6e4, np.inf], 200)
    for radius in (0.0, float(some[3, 7]), math.inf, radii, radii.astype(np.float32), radii.astype(np.float16)):
        for k in (1, 32, 33, 1024):
            check_nearest(cp, query, points, radius, k, kind)
    check_radius(cp, query, points, np.minimum(radii, 5), kind)


@pytest.mark.parametrize("name", special(10))
def test_without_oneself(cp, name):
    """The points search themselves, as one array and as two; copies of a point are its neighbours."""
    points = special(3000)[name]
    for k in (1, 2, 20, 40, 300):
        check_knn(cp, points, points, k, name, exclude_self=True)
        itself = cp.asarray(points)
        got = gpu3d.knn(itself, itself, k, exclude_self=True)
        assert_same_bits(to_host(got), gpu3d.knn(points, points, k, exclude_self=True), name)
    finite = points[np.isfinite(points).all(axis=1)].astype(float)
    radius = float(np.ptp(finite)) / 50 if len(finite) else 1.0
    check_radius(cp, points[:500], points[:500], radius, name, exclude_self=True)
    check_nearest(cp, points, points, radius, 24, name, exclude_self=True)


def test_short_clouds_are_filled_up(cp):
    lengths = {"query_lengths": [3, 2, 0, 4, 500, 90], "lengths": [0, 1, 0, 70, 2000, 1030]}
    query, points = ragged(*lengths.values())
    for k in (1, 5, 32, 33, 64, 71, 256, 1000, 1024):
        check_knn(cp, query, points, k, **lengths)


def test_many_neighbours_of_large_clouds(cp):
    """The bound of a query comes from the one before; clusters far apart make it too large."""
    rng = np.random.default_rng(0)
    sweep = clouds.lidar_like(60_000)
    crowded = sweep.copy()
    crowded[rng.permutation(len(sweep))[:20_000]] = 0
    apart = sweep[:6000] + 1000 * rng.integers(0, 3, (6000, 3)).astype(np.float32)
    for points, queries in ((sweep, 1000), (crowded, 300), (apart, 1000)):
        query = points[rng.permutation(len(points))[:queries]]
        for k in (64, 65, 256, 1024):
            check_knn(cp, query, points, k, "many")


def test_bad_radii_on_a_gpu_find_nothing(cp):
    query, points = pair("near", 500, 700)
    radii = np.full(500, 2.0)
    radii[::3], radii[1::3] = -1, np.nan
    good = radii.copy()
    good[radii != 2] = 0
    query[radii != 2] += 1e6  # then a radius of 0 finds nothing either
    for k in (5, 50):
        got = gpu3d.radius_search(cp.asarray(query), cp.asarray(points), cp.asarray(radii), max_neighbors=k)
        assert_same_bits(to_host(got), gpu3d.radius_search(query, points, good, max_neighbors=k))
    got = gpu3d.radius_search(cp.asarray(query), cp.asarray(points), cp.asarray(radii))
    assert_same_bits(to_host(got), gpu3d.radius_search(query, points, good))
    with pytest.raises(ValueError, match=r"arguments must be on one device: .*radius is numpy"):
        gpu3d.radius_search(cp.asarray(query), cp.asarray(points), radii)


def test_real_sweeps(cp, data_dir):
    for name, points in clouds.real(data_dir):
        check_knn(cp, points, points, 16, name)


def test_brute_force(cp):
    """Compare with all pairs directly, in case k-d tree and kernel have the same error."""
    for kind in KINDS:
        query, points = pair(kind, 2000, 20_000)
        for k in (1, 16, 64, 300):
            expected = reference.brute_force_knn(query, [2000], points, [20_000], k)
            assert_same_bits(to_host(gpu3d.knn(cp.asarray(query), cp.asarray(points), k)), expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_100_runs_give_the_same_bits(cp, kind):
    x, y = (cp.asarray(p) for p in pair(kind, 20_000, 30_000))

    def run():
        found = gpu3d.knn(x, y, 16), gpu3d.radius_search(x[:2000], y, 0.2, max_entries=1 << 20)
        return [z.reshape(-1).view("u1") for z in (*found[0], *found[1])]

    expected = run()
    for _ in range(100):
        for number, (got, first) in enumerate(zip(run(), expected, strict=True)):
            assert bool((got == first).all()), number


# ---- views, the index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_views_of_every_dtype(cp, dtype, dimensions):
    """Strided, misaligned and three-dimensional arrays are copied, converted and padded by gpu3d's kernels."""
    query, points = (z[:, :dimensions].copy() for z in pair("near", 1200, 1500, dtype=dtype))
    expected = [gpu3d.knn(query, points, 3), gpu3d.radius_search(query, points, 0.3)]

    def misaligned(z):
        memory = cp.empty(z.nbytes + 1, "u1")
        memory[1:] = z.reshape(-1).view("u1")
        return memory[1:].view(z.dtype).reshape(z.shape)

    for view in (
        lambda z: cp.pad(z, ((0, 0), (1, 0)))[:, 1:],
        lambda z: cp.asfortranarray(z),
        lambda z: z[::-1].copy()[::-1],
        lambda z: z.reshape(2, -1, dimensions).transpose(1, 0, 2).copy().transpose(1, 0, 2),
        misaligned,
    ):
        a, b = view(cp.asarray(query)), view(cp.asarray(points))
        if a.ndim == 3:
            wanted = [gpu3d.knn(*(z.reshape(2, -1, dimensions) for z in (query, points)), 3)]
            got = [gpu3d.knn(a, b, 3)]
        else:
            wanted, got = expected, [gpu3d.knn(a, b, 3), gpu3d.radius_search(a, b, 0.3)]
        for found, exact in zip(got, wanted, strict=True):
            assert_same_bits(to_host(found), exact, dtype)


def test_one_plan_serves_many_lengths(cp):
    """Lengths that share a plan run with its grids and workspace, which fit the largest; larger lengths run first."""
    for n, m in ((1279, 2500), (1100, 2049), (40, 33), (33, 40), (1, 1), (30_000, 33_000), (29_000, 32_800)):
        query, points = pair("near", n, m)
        check_knn(cp, query, points, 1)
        check_radius(cp, query[:500], points, 0.3)


def test_an_index_stands_in_for_points(cp):
    query_lengths, lengths = [300, 40], [500, 70]
    query, points = ragged(query_lengths, lengths)
    index = gpu3d.neighbor_index(cp.asarray(points), lengths=lengths)
    options, both = {"query_lengths": query_lengths}, {"query_lengths": query_lengths, "lengths": lengths}
    for _ in range(2):
        poison(cp)
        for k in (1, 16):
            got = gpu3d.knn(cp.asarray(query), index, k, **options)
            assert_same_bits(to_host(got), gpu3d.knn(query, points, k, **both))
        got = gpu3d.radius_search(cp.asarray(query), index, 1.0, **options)
        assert_same_bits(to_host(got), gpu3d.radius_search(query, points, 1.0, **both))
        itself = gpu3d.knn(cp.asarray(points), index, 4, query_lengths=lengths)
        assert_same_bits(to_host(itself), gpu3d.knn(points, points, 4, query_lengths=lengths, lengths=lengths))


# ---- gradients -----------------------------------------------------------------------------------------------------


def check_gradients(cp, query, points, found, ddistances, note="", view=lambda x: x, **lengths):
    """Check that GPU and CPU give the same bits from the same results of a search, in poisoned memory."""
    expected = gradients(ddistances, query, points, found, **lengths)
    device = [view(cp.asarray(x)) for x in (ddistances, query, points)]
    there = type(found)(*map(cp.asarray, found))
    poison(cp, max(1 << 26, 300 * (query.nbytes + points.nbytes)))
    got = gradients(*device, there, **lengths)
    assert_same_bits([x.get() for x in got], expected, f"gradients {note} {query.shape} {points.shape} {query.dtype}")


def check_searches(cp, query, points, note="", **lengths):
    for found in searches(query, points, **lengths):
        check_gradients(cp, query, points, found, upstream(found), note, **lengths)


def test_small_gradients(cp):
    """For compute-sanitizer: few and many neighbours, a large batch, NaN, ties, a search over max_entries."""
    for kind in KINDS:
        check_searches(cp, *pair(kind, 300, 700), kind)
    lengths = {"query_lengths": [10] * 70, "lengths": [7] * 70}
    for dtype in ("float32", "float64"):
        check_searches(cp, *ragged(*lengths.values(), dtype=dtype), **lengths)
    points = special(600)["spoiled"]
    check_searches(cp, points, points, "spoiled")
    query, points = pair("near", 300, 400)
    found = gpu3d.radius_search(query, points, 2.0, max_entries=100)
    check_gradients(cp, query, points, found, upstream(found), "cut")


@pytest.mark.parametrize("k", KS)
def test_gradients_of_every_k(cp, k):
    """The number of lanes for a query depends on k."""
    for n, m in ((1, 64), (255, 64), (3001, 500)):
        query, points = pair("near", n, m, seed=k)
        found = gpu3d.knn(query, points, k)
        check_gradients(cp, query, points, found, upstream(found), k)


@pytest.mark.parametrize("m", SIZES)
def test_gradients_of_every_size(cp, m):
    for n in (1, 33, m, 5000):
        check_searches(cp, *pair("independent", n, m, seed=m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_of_every_dtype(cp, dimensions, dtype):
    lengths = {"query_lengths": [0, 700, 65], "lengths": [5, 640, 31]}
    for other in DTYPES:
        query, _ = ragged(*lengths.values(), dtype=dtype)
        _, points = ragged(*lengths.values(), dtype=other)
        check_searches(cp, query[:, :dimensions], points[:, :dimensions], other, **lengths)


@pytest.mark.parametrize("name", special(100))
def test_gradients_of_special_clouds(cp, name):
    points = special(2000)[name]
    query = np.concatenate([points[:700], clouds.uniform(100)])
    found = gpu3d.knn(query, points, 8)
    check_gradients(cp, query, points, found, upstream(found), name)


def test_gradients_of_one_point(cp):
    """Many queries share a point, with terms of all sizes, and infinite and NaN gradients."""
    query = np.random.default_rng(0).normal(size=(200_000, 3)).astype(np.float32)
    points = np.array([[0.1, 0.2, 0.3], [1e6, 0, 0]], np.float32)
    found = gpu3d.knn(query, points, 2)
    rng = np.random.default_rng(1)
    for scale in (1, 1e-38, 1e30, np.exp(rng.normal(0, 20, (len(query), 1)))):
        ddistances = (upstream(found) * scale).astype(np.float32)
        check_gradients(cp, query, points, found, ddistances, "one point")
    ddistances[rng.integers(0, len(query), 9), 0] = [np.nan, np.inf, -np.inf] * 3
    check_gradients(cp, query, points, found, ddistances, "not finite")


def test_gradients_of_large_clouds(cp):
    for dtype in ("float32", "float64"):
        query, points = pair("near", 200_000, 150_000, dtype=dtype)
        found = gpu3d.knn(query, points, 16)
        check_gradients(cp, query, points, found, upstream(found))


def test_gradients_of_views(cp):
    """Arrays of any strides and alignment; the gradient of a sum repeats one number."""
    query, points = pair("near", 1300, 1700)

    def misaligned(z):
        memory = cp.empty(z.nbytes + 1, "u1")
        memory[1:] = z.reshape(-1).view("u1")
        return memory[1:].view(z.dtype).reshape(z.shape)

    for found in searches(query, points):
        ddistances = upstream(found)
        for view in (misaligned, lambda z: cp.repeat(z, 2, axis=0)[::2], lambda z: z[::-1].copy()[::-1]):
            check_gradients(cp, query, points, found, ddistances, view=view)
        for dtype in DTYPES.values():
            check_gradients(cp, query, points, found, ddistances.astype(dtype), dtype)
        ones = cp.broadcast_to(cp.ones((), np.float32), ddistances.shape)
        got = gradients(ones, cp.asarray(query), cp.asarray(points), type(found)(*map(cp.asarray, found)))
        expected = gradients(np.ones_like(ddistances), query, points, found)
        assert_same_bits([x.get() for x in got], expected)


def test_100_runs_give_the_same_gradients(cp):
    query, points = pair("near", 20_000, 1000)
    for found in searches(query, points):
        there = type(found)(*map(cp.asarray, found))
        arrays = [cp.asarray(x) for x in (upstream(found), query, points)]
        first = gradients(*arrays, there)
        for _ in range(100):
            for got, expected in zip(gradients(*arrays, there), first, strict=True):
                assert bool((got.view("u4") == expected.view("u4")).all())


def test_empty_gradients(cp):
    check_empty_gradients(cp.asarray, lambda x: x.get())


def test_gradients_in_a_graph(cp):
    """There is no host sync, which a capture would refuse."""
    query, points = pair("near", 3000, 2000)
    for found in searches(query, points):
        there = type(found)(*map(cp.asarray, found))
        arrays = [cp.asarray(x) for x in (upstream(found), query, points)]
        stream = cp.cuda.Stream(non_blocking=True)
        cp.cuda.Device().synchronize()
        with stream:
            expected = [x.get() for x in gradients(*arrays, there)]
            stream.begin_capture()
            got = gradients(*arrays, there)
            graph = stream.end_capture()
            for x in got:
                x.fill(7)
            for _ in range(2):
                graph.launch(stream)
            stream.synchronize()
            assert_same_bits([x.get() for x in got], expected)


# ---- errors, streams, graphs, libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(cp, call, arguments, error, message):
    assert_refused(call, arguments, error, message, cp.asarray)


def test_empty(cp):
    check_empty(cp.asarray, lambda y: y.get())


def test_an_index_and_too_little_room_in_a_graph(cp):
    x, y, other = (cp.asarray(p) for p in (*pair("near", 3000, 3000), pair("near", 3000, 3000, seed=1)[0]))
    index, radii = gpu3d.neighbor_index(y), cp.linspace(0, 1, 3000)

    def run(query):
        nearest = gpu3d.radius_search(query, index, radii, max_neighbors=70)
        return [*gpu3d.knn(query, index, 2), *gpu3d.radius_search(query, index, 0.5, max_entries=1), *nearest]

    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        expected, expected_of_other = ([z.get() for z in run(query)] for query in (x, other))
        stream.begin_capture()
        got = run(x)
        graph = stream.end_capture()
        for wanted in (expected, expected_of_other):
            graph.launch(stream)
            assert_same_bits([z.get() for z in got], wanted)
            x[:] = other  # a replay reads the new contents
    assert expected[0].tobytes() != expected_of_other[0].tobytes() and expected[2][-1] < 0
