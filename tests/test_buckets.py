# SPDX-License-Identifier: Apache-2.0
"""bucketize, Buckets, scopes and bucket_quality on the CPU: definitions, laws and errors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle

import clouds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu3d
from gpu3d.reference import buckets as reference

SIZES = (1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 1000)


def assert_perfect(buckets, lengths):
    """Assert that the layout is a bijection of each cloud in which every bucket except the cloud's last is full."""
    slot_to_point, point_to_slot = np.asarray(buckets.slot_to_point), np.asarray(buckets.point_to_slot)
    assert slot_to_point.dtype == point_to_slot.dtype == np.int32
    assert slot_to_point.shape == (buckets.num_slots,) and point_to_slot.shape == (sum(lengths),)
    np.testing.assert_array_equal(slot_to_point[point_to_slot], np.arange(sum(lengths)))
    point = slot = 0
    for n in lengths:
        num = -(-n // buckets.bucket_size) * buckets.bucket_size
        np.testing.assert_array_equal(np.sort(slot_to_point[slot : slot + n]), np.arange(point, point + n))
        assert (slot_to_point[slot + n : slot + num] == -1).all()
        point, slot = point + n, slot + num
    assert slot == buckets.num_slots == buckets.num_buckets * buckets.bucket_size


# ---- an oracle in plain Python integers ----------------------------------------------------------------------------


def morton_by_bits(v):
    return sum(((int(v[d]) >> b) & 1) << (3 * b + d) for b in range(16) for d in range(3))


def bucket_by_definition(v, hash, nb):
    h = int(v[0]) ^ int(v[1]) ^ int(v[2]) if hash.startswith("xor") else morton_by_bits(v) >> 32
    return h % nb if hash.endswith("mod") else h // math.ceil(65536 / nb)


def order_by_definition(points, nb, hash, voxel_size=None):
    keys = []
    for i, v in enumerate(reference.voxelize(points, voxel_size)):
        code = morton_by_bits(v)
        full = (int(v[0]) ^ int(v[1]) ^ int(v[2]), code) if hash.startswith("xor") else (code,)
        keys.append((bucket_by_definition(v, hash, nb), *full, i))
    return [key[-1] for key in sorted(keys)]


def probe_by_definition(points, size, hash, seed=0):
    """The definition of "probe" as a sequential program: round by round, and in a round by point index."""
    nb = math.ceil(len(points) / size)
    voxels = reference.voxelize(points)
    room = [size] * (nb - 1) + [len(points) - (nb - 1) * size]
    home = [-1] * len(points)
    offsets = [(0, 0, 0)] + [tuple(o) for o in reference.candidates(seed)]
    for offset in offsets:
        for i, v in enumerate(voxels):
            if home[i] >= 0:
                continue
            c = bucket_by_definition(
                [min(max(int(x) + 4 * nb * o, 0), 65535) for x, o in zip(v, offset, strict=True)], hash, nb
            )
            if room[c]:
                home[i], room[c] = c, room[c] - 1
    free = iter([c for c in range(nb) for _ in range(room[c])])
    home = [next(free) if h < 0 else h for h in home]
    away = sum(h != bucket_by_definition(v, hash, nb) for h, v in zip(home, voxels, strict=True))
    return sorted(range(len(points)), key=lambda i: (home[i], i)), away


# ---- definitions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash", reference.HASHES)
def test_spill_is_the_definition(hash):
    for name, points in {"uniform": clouds.uniform(600), **clouds.degenerate(600)}.items():
        buckets = gpu3d.bucketize(points, 16, hash=hash)
        assert buckets.slot_to_point[:600].tolist() == order_by_definition(points, 38, hash), name
        assert buckets.moved == 0


def bounds_by_definition(points):
    """The robust bounds of one cloud, one axis at a time."""
    n, f = len(points), points.dtype.type
    found = []
    for x in points.T:
        s = sorted(v for v in (x[j * n // min(n, 1024)] for j in range(min(n, 1024))) if np.isfinite(v))
        q1, q99 = (s[len(s) // 100], s[len(s) - 1 - len(s) // 100]) if s else (f(0), f(0))
        finite = x[np.isfinite(x)]
        least, most = (finite.min(), finite.max()) if len(finite) else (f(0), f(0))
        cut = [min(max(v, least), most) for v in (q1 - f(4) * (q99 - q1), q99 + f(4) * (q99 - q1))]
        found.append(cut)
    return tuple(zip(*found, strict=True))


def strays(n, dtype=np.float32, seed=0):
    """A flat scan with a few returns far away in every direction."""
    rng = np.random.default_rng(seed)
    points = rng.normal(0, (30, 20, 1), (n, 3)).astype(dtype) + np.array([5e2, 4e3, 0], dtype)
    far = rng.choice(n, max(1, n // 200), replace=False)
    points[far, rng.integers(0, 3, len(far))] = rng.choice([0, -99999, 1e30, -1e30], len(far)).astype(dtype)
    return points


@pytest.mark.parametrize("n", [1, 2, 99, 100, 1023, 1025, 3000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_robust_bounds(n, dtype):
    points = strays(n, dtype)
    points[n // 2, 1] = np.nan
    with np.errstate(over="ignore"):
        robust = bounds_by_definition(points)
    for voxel_size in (None, "per_axis", 0.5):
        wanted = reference.voxelize(points, voxel_size, bounds=robust)
        np.testing.assert_array_equal(reference.voxelize(points, voxel_size, bounds="robust"), wanted)
    for balance in reference.BALANCES:
        a, b = (
            gpu3d.bucketize(points, 64, balance=balance, bounds=bounds, check_finite=False)
            for bounds in ("robust", robust)
        )
        np.testing.assert_array_equal(a.slot_to_point, b.slot_to_point)


@pytest.mark.parametrize("voxel_size", [None, "per_axis", 0.5])
def test_points_beyond_the_bounds_have_the_voxel_of_the_bound(voxel_size):
    points = np.random.default_rng(0).normal(0, 100, (500, 3)).astype(np.float32)
    low, high = np.float32([-50, -40, 7]), np.float32([90, 200, 7])
    ends = np.stack([low, high])  # so that the clipped cloud spans the bounds
    clipped = np.concatenate([np.clip(points, low, high), ends])
    got = reference.voxelize(np.concatenate([points, ends]), voxel_size, bounds=(low, high))
    np.testing.assert_array_equal(got, reference.voxelize(clipped, voxel_size))
    assert len(np.unique(got[:, 0])) > 100


def test_a_far_point_does_not_spoil_the_others_buckets():
    """Each bucket of the others is about as small as without the far point."""
    scan = np.random.default_rng(0).uniform(-50, 50, (20_000, 3)).astype(np.float32)

    def radius(points, **options):
        layout = gpu3d.bucketize(points, 64, **options)
        radii = reference.bucket_radii(points, layout.slot_to_point, 64)
        return np.median(radii)

    clean = radius(scan)
    for far in (1e5, -1e7, 1e20):
        points = scan.copy()
        points[7] = far
        assert radius(points, bounds="robust") < 1.2 * clean
        assert radius(points, bounds=(-50, [50, 50, 50])) < 1.2 * clean
    assert radius(points) > 3 * clean


def test_zorder_div_is_the_stable_sort_of_the_codes():
    points = clouds.lidar_like(20_000)
    codes = reference.morton(reference.voxelize(points))
    np.testing.assert_array_equal(gpu3d.bucketize(points).slot_to_point[:20_000], np.argsort(codes, kind="stable"))


@pytest.mark.parametrize("hash", reference.HASHES)
@pytest.mark.parametrize("seed", [0, 5])
def test_probe_is_the_definition(hash, seed):
    for name, points in {"lidar": clouds.lidar_like(500), **clouds.degenerate(400)}.items():
        buckets = gpu3d.bucketize(points, 16, hash=hash, balance="probe", seed=seed)
        order, away = probe_by_definition(points, 16, hash, seed)
        assert buckets.slot_to_point[: len(points)].tolist() == order, name
        assert buckets.moved == away


def test_candidates_are_the_published_offsets_permuted_by_the_seed():
    offsets = reference.candidates(3)
    expected = {o for o in itertools.product(range(-2, 3), repeat=3) if any(o)} | {
        (3, 3, 3),
        (3, -3, 3),
        (-3, 3, -3),
        (-3, -3, -3),
    }
    assert {tuple(o) for o in offsets.tolist()} == expected and len(offsets) == 128
    assert (offsets != reference.candidates(4)).any()


def test_voxels_are_rounded_as_defined():
    f = np.float32
    points = np.array([[0, 0, 0], [1, 2, 4], [f(1) / f(3), f(2) / f(3), f(1) / f(7)]], f)
    cell = f(4) / f(65536)
    expected = [[min(int(np.floor(f(x) / cell)), 65535) for x in p] for p in points]
    np.testing.assert_array_equal(reference.voxelize(points), expected)
    assert reference.voxelize(points, "per_axis")[1].tolist() == [65535] * 3
    assert reference.voxelize(points, 0.5)[1].tolist() == [2, 4, 8]
    assert reference.voxelize(np.full((2, 3), 7, f)).tolist() == [[0] * 3] * 2
    assert reference.voxelize(np.array([[0, np.nan, 1], [1, 2, np.inf]], f)).tolist() == [
        [0, 65535, 0],
        [65535, 0, 65535],
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_floats_are_widened(dtype):
    import ml_dtypes

    points = clouds.uniform(700).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    same = gpu3d.bucketize(points.astype(np.float32), 64)
    np.testing.assert_array_equal(gpu3d.bucketize(points, 64).slot_to_point, same.slot_to_point)


def test_map_coordinates_keep_their_millimetres():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 2**20, (4000, 3)) / 1024.0  # exact, also after the shift
    moved = points + [5e6, 4.5e6, 300]
    expected = gpu3d.bucketize(points, 64).slot_to_point
    np.testing.assert_array_equal(gpu3d.bucketize(moved, 64).slot_to_point, expected)
    assert (gpu3d.bucketize(moved.astype(np.float32), 64).slot_to_point != expected).any()  # float32 loses them


@pytest.mark.parametrize("voxel_size", [None, "per_axis", 0.3, 1000])
@pytest.mark.parametrize("hash", reference.HASHES)
def test_voxel_size(hash, voxel_size):
    points = clouds.uniform(400)
    buckets = gpu3d.bucketize(points, 32, hash=hash, voxel_size=voxel_size)
    assert buckets.slot_to_point[:400].tolist() == order_by_definition(points, 13, hash, voxel_size)


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", reference.BALANCES)
@pytest.mark.parametrize("hash", reference.HASHES)
def test_perfect_at_every_size(hash, balance):
    for n in SIZES:
        for name, points in {"lidar": clouds.lidar_like(n), **clouds.degenerate(max(n, 10))}.items():
            buckets = gpu3d.bucketize(points, 16, hash=hash, balance=balance)
            assert_perfect(buckets, [len(points)]), name


@pytest.mark.parametrize("balance", reference.BALANCES)
def test_ragged_batches(balance):
    lengths = [0, 700, 1, 16, 0, 333, 0]
    buckets = gpu3d.bucketize(clouds.lidar_like(sum(lengths)), 32, lengths=lengths, balance=balance, hash="zorder_mod")
    assert_perfect(buckets, lengths)
    assert buckets.bucket_offsets == (0, 0, 22, 23, 24, 24, 35, 35)
    none = gpu3d.bucketize(np.zeros((0, 3), np.float32), lengths=[], balance=balance)
    assert none.num_buckets == none.num_slots == 0 and none.bucket_offsets == (0,)


def test_tuples_of_many_clouds_are_made_when_they_are_read():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 40, 200)
    points = rng.random((lengths.sum(), 3), np.float32)
    counts = lengths.tolist()
    offsets = tuple(itertools.accumulate([-(-n // 16) for n in counts], initial=0))
    for passed in (list(counts), tuple(counts), lengths.copy(), lengths.astype(np.uint8)):
        buckets = gpu3d.bucketize(points, 16, lengths=passed)
        if not isinstance(passed, tuple):
            passed[:] = [0] * 200  # what the caller does with its lengths later changes nothing
        assert buckets.num_buckets == offsets[-1] and buckets.num_slots == 16 * offsets[-1]
        np.testing.assert_array_equal(buckets.gather(buckets.scatter(points)), points)
        assert {"lengths", "bucket_offsets"}.isdisjoint(vars(buckets))
        copies = copy.copy(buckets), pickle.loads(pickle.dumps(buckets)), dataclasses.replace(buckets), buckets
        for made in copies:
            assert made.bucket_offsets == offsets and made.lengths == tuple(counts)
            assert {type(n) for n in made.lengths + made.bucket_offsets} == {int}
            assert made.lengths is made.lengths and made.num_buckets == offsets[-1]
    pooled = gpu3d.bucket_pool(buckets.scatter(points), buckets.scatter(points), buckets)
    assert_perfect(buckets, counts)
    assert_perfect(pooled.buckets, [-(-n // 2) for n in counts])
    with pytest.raises(AttributeError, match="lengths"):
        object.__new__(gpu3d.Buckets).lengths  # noqa: B018


def test_equal_clouds_may_be_three_dimensional():
    points = clouds.lidar_like(600).reshape(3, 200, 3)
    buckets = gpu3d.bucketize(points, 64)
    assert buckets.lengths == (200, 200, 200)
    packed = gpu3d.bucketize(points.reshape(-1, 3), 64, lengths=[200] * 3)
    np.testing.assert_array_equal(buckets.slot_to_point, packed.slot_to_point)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.sampled_from(reference.HASHES))
def test_point_order_only_breaks_ties(n, seed, hash):
    rng = np.random.default_rng(seed)
    points = np.unique(rng.random((n, 3)).astype(np.float32), axis=0)
    shuffle = rng.permutation(len(points))
    a = gpu3d.bucketize(points, 16, hash=hash).slot_to_point[: len(points)]
    b = gpu3d.bucketize(points[shuffle], 16, hash=hash).slot_to_point[: len(points)]
    voxels = reference.voxelize(points)
    np.testing.assert_array_equal(voxels[a], voxels[shuffle[b]])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(-30, 30), st.integers(-8, 8))
def test_scaling_and_moving_by_powers_of_two_change_nothing(n, seed, scale, move):
    points = np.random.default_rng(seed).integers(0, 1024, (n, 3)).astype(np.float32)
    other = (points + np.float32(2.0**move)) if move >= 0 else points
    other = other * np.float32(2.0**scale)
    np.testing.assert_array_equal(gpu3d.bucketize(points, 16).slot_to_point, gpu3d.bucketize(other, 16).slot_to_point)


def test_non_finite_points_harm_nobody_else():
    points, good = clouds.spoiled()
    buckets = gpu3d.bucketize(points, 64, check_finite=False)
    assert_perfect(buckets, [len(points)])
    kept = [p for p in buckets.slot_to_point.tolist() if p >= 0 and good[p]]
    alone = gpu3d.bucketize(points[good], 64).slot_to_point
    np.testing.assert_array_equal(kept, np.flatnonzero(good)[alone[alone >= 0]])


def test_real_sweeps_are_perfect_and_tight(data_dir):
    seen = 0
    for name, points in clouds.real(data_dir):
        buckets = gpu3d.bucketize(points)
        assert_perfect(buckets, [len(points)])
        codes = reference.morton(reference.voxelize(points))
        np.testing.assert_array_equal(
            buckets.slot_to_point[: len(points)], np.argsort(codes, kind="stable"), err_msg=name
        )
        shuffled = np.random.default_rng(0).permutation(len(points))
        random_order = reference.bucket_radii(points, shuffled[: len(points) // 512 * 512], 512).mean()
        assert gpu3d.bucket_quality(points, buckets).mean_radius < 0.5 * random_order, name
        seen += 1
    assert seen > 10


# ---- scatter and gather --------------------------------------------------------------------------------------------

DTYPES = ["bool", "int8", "uint16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex128"]


def features(n, trailing, dtype, seed=0):
    import ml_dtypes

    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, *trailing)) * 9).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("trailing", [(), (1,), (3,), (7,), (2, 5), (0,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_and_gather(dtype, trailing):
    points = clouds.uniform(200)
    buckets = gpu3d.bucketize(points, 64, lengths=[150, 50])
    x = features(200, trailing, dtype)
    slots = buckets.scatter(x, fill=1)
    assert slots.shape == (256, *trailing) and slots.dtype == x.dtype
    for slot, point in enumerate(buckets.slot_to_point):
        np.testing.assert_array_equal(slots[slot], x[point] if point >= 0 else np.ones(trailing, x.dtype))
    back = buckets.gather(slots)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)


def test_scatter_checks_the_rows():
    buckets = gpu3d.bucketize(clouds.uniform(100), 64)
    with pytest.raises(ValueError, match=r"x must have one row for each of the 100 points, got shape \[99, 2\]"):
        buckets.scatter(np.zeros((99, 2)))
    with pytest.raises(ValueError, match=r"y must have one row for each of the 128 slots, got shape \[100\]"):
        buckets.gather(np.zeros(100))
    with pytest.raises(TypeError, match="x must be an array"):
        buckets.scatter([1, 2])


def test_fill_is_a_number_that_fits():
    buckets = gpu3d.bucketize(clouds.uniform(100), 64)
    for x, fill, error, message in (
        (np.ones(100, np.uint8), 300, ValueError, "fill must fit uint8, got 300"),
        (np.ones(100, np.float32), "x", TypeError, "fill must be a number, got 'x' of type str"),
        (np.ones(100, np.int32), [1] * 1000, TypeError, "fill must be a number, got list of length 1000"),
    ):
        with pytest.raises(error, match=message):
            buckets.scatter(x, fill)


# ---- scopes --------------------------------------------------------------------------------------------------------


def scopes_by_definition(counts, size, shift, stride):
    rows, begin = [], 0
    for nb in counts:
        for base in range(0, nb, size * stride):
            m = min(size * stride, nb - base)
            for j in range(stride):
                row = [begin + (base + p + shift) % nb for p in range(j, m, stride)]
                if row:
                    rows.append(row + [-1] * (size - len(row)))
        begin += nb
    return rows


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("shift", [0, 1, 4, -3, 100])
@pytest.mark.parametrize("stride", [1, 2, 5, 1000])
def test_scopes_are_the_definition(size, shift, stride):
    lengths = [16 * 13, 0, 5, 16 * 4]
    buckets = gpu3d.bucketize(clouds.uniform(sum(lengths)), 16, lengths=lengths)
    scopes = gpu3d.scopes(buckets, size, shift=shift, stride=stride)
    assert scopes.table.tolist() == scopes_by_definition([13, 0, 1, 4], size, shift, stride)
    assert scopes.table.dtype == np.int32 and (scopes.size, scopes.shift, scopes.stride) == (size, shift, stride)
    assert sorted(scopes.table[scopes.table >= 0]) == list(range(18))
    assert gpu3d.scopes(buckets, table=scopes.table).table.tolist() == scopes.table.tolist()


def test_scopes_of_nothing():
    buckets = gpu3d.bucketize(np.zeros((0, 3), np.float32), 16)
    assert gpu3d.scopes(buckets, 4).table.shape == (0, 4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1], [2, 2]], r"each of the 4 buckets exactly once, got 4 entries of which 3"),
        ([[0, 1], [2, 3], [4, -1]], "exactly once"),
        ([[0, -1], [-1, 1], [2, 3]], "only at the end of a row"),
        ([[0, 1], [-1, -1], [2, 3]], "no empty row"),
        ([[0, 2], [1, 3]], "must not cross clouds: row 0"),
        ([0, 1, 2, 3], r"shape \[num_scopes, size\], got int64 \[4\]"),
        ([[0.0, 1.0], [2.0, 3.0]], "must hold integers"),
    ],
)
def test_hand_made_tables_are_checked(table, message):
    buckets = gpu3d.bucketize(clouds.uniform(64), 16, lengths=[32, 32])
    with pytest.raises(ValueError, match=message):
        gpu3d.scopes(buckets, table=np.array(table))


def test_a_hand_made_table_is_copied():
    """Otherwise the caller could change it after the check."""
    buckets = gpu3d.bucketize(clouds.uniform(64), 16)
    table = np.array([[0, 1], [2, 3]], np.int32)
    scopes = gpu3d.scopes(buckets, table=table)
    table[:] = 0
    assert scopes.table.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"size": 2.0}, TypeError, "size must be an integer, got 2.0"),
        ({"shift": True}, TypeError, "shift must be an integer"),
        ({"table": np.zeros((1, 1), np.int32), "shift": 1}, ValueError, "leave size, shift and stride out"),
    ],
)
def test_scopes_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        gpu3d.scopes(gpu3d.bucketize(clouds.uniform(64), 16), **arguments)
    with pytest.raises(TypeError, match="buckets must be the Buckets"):
        gpu3d.scopes([0, 1])


# ---- quality -------------------------------------------------------------------------------------------------------


def test_quality():
    points = clouds.uniform(1000)
    buckets = gpu3d.bucketize(points, 256, balance="probe")
    quality = gpu3d.bucket_quality(points, buckets)
    radii = []
    for b in range(3):
        members = points[buckets.slot_to_point[b * 256 : b * 256 + 256]].astype(float)
        radii.append(max(np.linalg.norm(m - members.mean(0)) for m in members))
    assert quality.mean_radius == pytest.approx(np.mean(radii)) and quality.max_radius == pytest.approx(max(radii))
    assert quality.moved_share == buckets.moved / 1000 > 0
    assert math.isnan(gpu3d.bucket_quality(points[:5], gpu3d.bucketize(points[:5])).mean_radius)
    with pytest.raises(ValueError, match="points must be those of the layout"):
        gpu3d.bucket_quality(points.reshape(2, 500, 3), buckets)
    for wrong in (None, points):
        with pytest.raises(TypeError, match=f"buckets must be the Buckets .* got {type(wrong).__name__}"):
            gpu3d.bucket_quality(points, wrong)


# ---- bad input -----------------------------------------------------------------------------------------------------

GOOD = clouds.uniform(100)

BAD = [
    ({"points": GOOD[0]}, ValueError, r"points must have shape \[N, 3\] \(or \[B, n, 3\]\), got \[3\]"),
    ({"points": GOOD[:, :2]}, ValueError, r"3 coordinates in its last dimension, got shape \[100, 2\]: pad"),
    ({"points": GOOD.astype(np.int32)}, TypeError, "must be float32, float64, float16 or bfloat16, got int32"),
    ({"bucket_size": 0}, ValueError, "multiple of 16 from 16 to 16384, got 0"),
    ({"bucket_size": 24}, ValueError, "multiple of 16 from 16 to 16384, got 24"),
    ({"bucket_size": 32768}, ValueError, "got 32768"),
    ({"bucket_size": 512.0}, TypeError, "bucket_size must be an integer, got 512.0"),
    ({"hash": "morton"}, ValueError, "hash must be one of 'xor_mod', .*'zorder_div', got 'morton'"),
    ({"hash": np.array("zorder_div")}, TypeError, "hash must be one of .*, got array"),
    ({"balance": "none"}, ValueError, "balance must be one of 'spill', 'probe', got 'none'"),
    ({"voxel_size": 0}, ValueError, "voxel_size must be a positive float32 number, got 0"),
    ({"voxel_size": -1.0}, ValueError, "voxel_size must be a positive"),
    ({"voxel_size": math.nan}, ValueError, "voxel_size must be a positive"),
    ({"voxel_size": "cell"}, TypeError, 'voxel_size must be a number, None or "per_axis"'),
    ({"bounds": "tight"}, ValueError, "bounds must be None, \"robust\" or .*, got 'tight'"),
    ({"bounds": 3.0}, TypeError, "bounds must be None, .*, got 3.0"),
    ({"bounds": (0, 1, 2)}, ValueError, "bounds must be None, .*each a number or one number an axis"),
    ({"bounds": (0, [1, 2])}, ValueError, "bounds must be None, "),
    ({"bounds": (0, [1, 2, -1])}, ValueError, "bounds must be finite, and none above the other, got .*-1.0"),
    ({"bounds": (0, math.nan)}, ValueError, "bounds must be finite"),
    ({"seed": -1}, ValueError, "seed must not be negative"),
    ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ({"lengths": [50, 49]}, ValueError, "lengths must sum to the number of points, got a sum of 99 for 100 points"),
    ({"lengths": [150, -50]}, ValueError, r"must not be negative, got lengths\[1\] = -50"),
    ({"lengths": [50.0, 50.0]}, TypeError, r"must be integers, got lengths\[0\] = 50.0"),
    ({"lengths": [True] * 100}, TypeError, "must be integers"),
    ({"lengths": 100}, TypeError, "lengths must be host integers"),
    ({"lengths": np.array([[100]])}, ValueError, "lengths must be one-dimensional"),
    ({"lengths": np.array(100)}, ValueError, r"lengths must be one-dimensional, got shape \[\]"),
    ({"points": GOOD[None], "lengths": [100]}, ValueError, "already says its lengths"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gpu3d.bucketize(**{"points": GOOD, **arguments})


def test_non_finite_points_are_named():
    points = GOOD.copy()
    points[7, 1], points[60, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="got 2 of 100 with NaN or inf, the first at index 7"):
        gpu3d.bucketize(points)


def test_too_many_slots():
    points = np.broadcast_to(np.float32(0), (2**31, 3))  # all rows share one number
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 slots"):
        gpu3d.bucketize(points, check_finite=False)
