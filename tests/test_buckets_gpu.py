# SPDX-License-Identifier: Apache-2.0
"""The bucket kernels give the same bits as the reference, for every size and cloud."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from test_buckets import BAD, DTYPES, assert_perfect, features, strays

import gpu3d
from gpu3d.cuda import buckets as cuda_buckets
from gpu3d.reference import buckets as reference

pytestmark = pytest.mark.gpu

# Around a warp, a tile and a block; then the first size of each tile of the merge sort, and of the radix sort.
EDGES = (1, 2, 31, 32, 33, 1023, 1024, 1025, 2047, 4096, 4097, 30_000)
LARGE = (131_072, 131_073, 262_144, 262_145, 524_288, 524_289, 700_001, 1_500_000)


@pytest.fixture
def cp():
    """CuPy, with all free memory of its pool poisoned, so that an output that is not written shows."""
    import cupy

    pool = [cupy.full(size, 0xCD, np.uint8) for size in (1 << 10, 1 << 16, 1 << 22, 1 << 24, 1 << 26)]
    del pool
    return cupy


def assert_same(cp, points, *args, **kwargs):
    """Assert that GPU and CPU give the same bits."""
    expected = gpu3d.bucketize(points, *args, **kwargs)
    got = gpu3d.bucketize(cp.asarray(points), *args, **kwargs)
    note = f"{points.shape} {points.dtype} {args} {kwargs}"
    np.testing.assert_array_equal(got.slot_to_point.get(), expected.slot_to_point, err_msg=note)
    np.testing.assert_array_equal(got.point_to_slot.get(), expected.point_to_slot, err_msg=note)
    assert got.moved.dtype == np.int32 and got.moved.shape == () and int(got.moved) == int(expected.moved), note
    assert (got.lengths, got.bucket_offsets) == (expected.lengths, expected.bucket_offsets)
    return got


@pytest.mark.parametrize("balance", reference.BALANCES)
@pytest.mark.parametrize("hash", reference.HASHES)
def test_equals_the_reference(cp, hash, balance):
    for n in EDGES:
        assert_same(cp, clouds.lidar_like(n), 64, hash=hash, balance=balance)
    for points in clouds.degenerate(9000).values():
        assert_same(cp, points, 128, hash=hash, balance=balance)


@pytest.mark.parametrize("hash", reference.HASHES)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("voxel_size", [None, "per_axis", 0.25])
def test_every_dtype_and_voxel_size(cp, hash, dtype, voxel_size):
    import ml_dtypes

    points = clouds.uniform(5000, dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert_same(cp, points, 64, hash=hash, voxel_size=voxel_size)
    assert_same(cp, points, 64, hash=hash, voxel_size=voxel_size, balance="probe")


@pytest.mark.parametrize("bounds", ["robust", (-20, (30, 4000, 1))], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_bounds(cp, dtype, bounds):
    """By every sort: of one block, of tiles, and by radix."""
    for n in (1, 99, 1025, 4097, 20_000):
        with np.errstate(over="ignore"):  # float16 has no such strays
            points = strays(n).astype(dtype)
        assert_same(cp, points, 64, bounds=bounds, check_finite=False)
        points[n // 3, 0] = np.nan
        options = {"balance": "probe", "voxel_size": "per_axis"} if n < 20_000 else {"voxel_size": 0.3}
        assert_same(cp, points, 64, bounds=bounds, hash="xor_div", check_finite=False, **options)
    for lengths in ([0, 9000, 0, 999], [9000, *[0, 13] * 60, 219], [600_000, 0, 5]):
        with np.errstate(over="ignore"):
            points = strays(sum(lengths)).astype(dtype)
        assert_same(cp, points, 64, bounds=bounds, lengths=lengths, check_finite=False)
    nothing = np.full((5000, 3), np.nan, np.float32).astype(dtype)
    nothing[:, 2] = np.arange(5000)
    assert_same(cp, nothing, 64, bounds=bounds, check_finite=False)


SORTS = ("merge", *cuda_buckets.RADIX_TILES)


def sort_by(monkeypatch, sort):
    if sort != "merge":
        monkeypatch.setattr(cuda_buckets, "MERGE_MAX_TILES", 0)
        monkeypatch.setattr(cuda_buckets, "RADIX_TILES", (sort,))
        monkeypatch.setattr(cuda_buckets, "_bucketize", cuda_buckets._bucketize.__wrapped__)  # remembers nothing


@pytest.mark.parametrize("balance", reference.BALANCES)
@pytest.mark.parametrize("sort", SORTS)
def test_small_clouds_by_either_sort(cp, monkeypatch, sort, balance):
    """For compute-sanitizer: both sorts, and batches whose table is in the kernel's arguments or in memory."""
    sort_by(monkeypatch, sort)
    for n in (1, 33, 1025, 9000, 20_000):
        got = assert_same(cp, clouds.lidar_like(n), 64, balance=balance, hash="xor_div")
        assert gpu3d.scopes(got, 4, stride=2).table.shape[1] == 4
        x = cp.asarray(features(n, (5,), "float16"))
        assert bool((got.gather(got.scatter(x)) == x).all())
    points = clouds.uniform(3000, dtype=np.float64)
    assert_same(cp, points, 16, balance=balance, lengths=[0, 2000, 37, 963])
    assert_same(cp, points, 16, balance=balance, lengths=[40] * 75, hash="zorder_mod", voxel_size="per_axis")


@pytest.mark.parametrize("sort", SORTS)
def test_races_of_buckets(cp, monkeypatch, sort):
    """For compute-sanitizer's racecheck, which is slow on the test above: one block, and a few tiles."""
    sort_by(monkeypatch, sort)
    for n in (33, 1025, 3000):
        assert_same(cp, clouds.lidar_like(n), 64, hash="xor_div")
    assert_same(cp, clouds.uniform(600), 16, lengths=[0, 300, 37, 263])


@pytest.mark.parametrize("n", LARGE)
def test_large_clouds(cp, n):
    assert_same(cp, clouds.lidar_like(n))
    assert_same(cp, clouds.uniform(n), 2048, hash="xor_mod")


@pytest.mark.parametrize("n", [200_000, 600_000])
def test_large_degenerate_clouds(cp, n):
    for points in clouds.degenerate(n).values():
        assert_same(cp, points)


def test_large_clouds_of_float64_and_probe(cp):
    assert_same(cp, clouds.uniform(600_000, dtype=np.float64) + [5e6, 4e6, 0])
    assert_same(cp, clouds.lidar_like(600_000), 4096, balance="probe")
    assert_same(cp, clouds.lidar_like(300_000), 16, balance="probe", hash="xor_div")


def test_a_cloud_beyond_24_bit_indices(cp):
    n = 2**24 + 12_345
    points = cp.random.default_rng(0).random((n, 3), dtype=np.float32)
    points[: n // 3] = cp.round(points[: n // 3], 2)  # many ties
    buckets = gpu3d.bucketize(points)
    host = points.get()
    codes = reference.morton(reference.voxelize(host))
    order = buckets.slot_to_point.get()[:n]
    sorted_codes = codes[order]
    assert (sorted_codes[1:] >= sorted_codes[:-1]).all()
    assert ((sorted_codes[1:] > sorted_codes[:-1]) | (order[1:] > order[:-1])).all()
    np.testing.assert_array_equal(order[buckets.point_to_slot.get()], np.arange(n))


@pytest.mark.parametrize("balance", reference.BALANCES)
@pytest.mark.parametrize(
    "lengths",
    [
        [0, 700, 1, 16, 0, 3333, 0],
        [1024] * 15,
        [1024] * 32,
        [1024] * 65,
        [4096, 4095, 0, 1, 2049],
        list(range(70)),  # more clouds than fit into a kernel's arguments
        [37] * 1000,
        [600_000, 0, 5, 40_000],
        [530_000, *range(100, 120)],
    ],
    ids=lambda lengths: f"{len(lengths)} clouds",
)
def test_ragged_batches(cp, lengths, balance):
    points = clouds.lidar_like(sum(lengths))
    assert_perfect_gpu(assert_same(cp, points, 32, lengths=lengths, balance=balance, hash="zorder_mod"), lengths)


def assert_perfect_gpu(buckets, lengths):
    host = gpu3d.Buckets(
        *(x.get() for x in (buckets.slot_to_point, buckets.point_to_slot, buckets.moved)),
        buckets.bucket_size,
        buckets.lengths,
        buckets.bucket_offsets,
    )
    assert_perfect(host, lengths)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_views(cp, dtype):
    """Strided and misaligned rows; the bounds come from the first or the last point."""
    for n in (1, 7, 40, 3001, 530_000):
        flat = clouds.uniform(n + 3, dtype=dtype).reshape(-1)
        for offset in range(9):
            points = flat[offset : offset + 3 * n].reshape(n, 3)
            points[-1 if offset % 2 else 0] = 2
            on_device = cp.asarray(flat)[offset : offset + 3 * n].reshape(n, 3)
            got = gpu3d.bucketize(on_device, 64).slot_to_point
            np.testing.assert_array_equal(got.get(), gpu3d.bucketize(points, 64).slot_to_point)
            if n > 100_000:
                break
        wide = cp.asarray(np.repeat(points, 2, axis=1)[::-1])
        got = gpu3d.bucketize(wide[::-1, ::2], 64).slot_to_point
        np.testing.assert_array_equal(got.get(), gpu3d.bucketize(points, 64).slot_to_point)


@pytest.mark.parametrize("cell", [0.1, 1 / 3, float(np.float32(2) - np.float32(2**-23)), 7e-6, 1e-33, 3e-38, 1e32])
def test_voxels_at_their_edges(cp, cell):
    """Coordinates within a few ulps of whole cells, where a quotient that is rounded otherwise changes the voxel."""
    cell = np.float32(cell)
    rng = np.random.default_rng(3)
    points = np.zeros((20_000, 3), np.float32)
    points[1:] = rng.integers(0, 65536, (len(points) - 1, 3)) * np.float64(cell)
    points.view(np.int32)[1:] += rng.integers(-2, 3, (len(points) - 1, 3)).astype(np.int32)
    points = np.maximum(np.nan_to_num(points), 0)
    for hash in ("zorder_div", "xor_mod"):
        assert_same(cp, points, 16, hash=hash, voxel_size=cell)
    assert_same(cp, points, 16, balance="probe", voxel_size=cell)


def test_non_finite_points(cp):
    points, _ = clouds.spoiled(50_000)
    for balance in reference.BALANCES:
        assert_same(cp, points, 64, check_finite=False, balance=balance)
    unchecked = gpu3d.bucketize(cp.asarray(points), 64)  # a GPU array is not checked by default
    with pytest.raises(ValueError, match=r"got \d+ of 50000 with NaN or inf, the first at index"):
        gpu3d.bucketize(cp.asarray(points), 64, check_finite=True)
    assert int((unchecked.slot_to_point >= 0).sum()) == 50_000


def test_real_sweeps(cp, data_dir):
    for _, points in clouds.real(data_dir):
        assert_same(cp, points, check_finite=False)
        assert_same(cp, points, hash="xor_div", check_finite=False)


@pytest.mark.parametrize("n", [120_000, 700_000])
def test_a_hundred_runs_give_the_same_bits(cp, n):
    points = cp.asarray(clouds.lidar_like(n))
    for balance in reference.BALANCES:
        first = gpu3d.bucketize(points, balance=balance)
        for _ in range(100 if balance == "spill" or n < 200_000 else 10):
            again = gpu3d.bucketize(points, balance=balance)
            assert bool((again.slot_to_point == first.slot_to_point).all()) and again.moved == first.moved
            assert bool((again.point_to_slot == first.point_to_slot).all())


# ---- scatter, gather, scopes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trailing", [(), (1,), (3,), (7,), (2, 5), (64,), (0,), (1000,), (4099,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_and_gather(cp, dtype, trailing):
    points = clouds.uniform(1500)
    buckets = gpu3d.bucketize(cp.asarray(points), 64, lengths=[1450, 50])
    host = gpu3d.bucketize(points, 64, lengths=[1450, 50])
    x = features(1500, trailing, dtype)
    slots = buckets.scatter(cp.asarray(x), fill=1)
    assert slots.dtype == x.dtype
    np.testing.assert_array_equal(slots.get(), host.scatter(x, fill=1))
    np.testing.assert_array_equal(buckets.gather(slots).get(), x)


@pytest.mark.parametrize("stride", [1, 3, 10**6])
@pytest.mark.parametrize("shift", [0, 5, -2])
@pytest.mark.parametrize("lengths", [[16 * 13, 0, 5, 16 * 4], [33] * 50, []])
def test_scopes(cp, lengths, shift, stride):
    points = clouds.uniform(sum(lengths))
    host = gpu3d.scopes(gpu3d.bucketize(points, 16, lengths=lengths), 3, shift=shift, stride=stride)
    buckets = gpu3d.bucketize(cp.asarray(points), 16, lengths=lengths)
    scopes = gpu3d.scopes(buckets, 3, shift=shift, stride=stride)
    np.testing.assert_array_equal(scopes.table.get(), host.table)
    if lengths:
        np.testing.assert_array_equal(gpu3d.scopes(buckets, table=scopes.table).table.get(), host.table)


def test_quality(cp):
    points = clouds.lidar_like(5000)
    for balance in reference.BALANCES:
        host = gpu3d.bucket_quality(points, gpu3d.bucketize(points, 64, balance=balance))
        device = gpu3d.bucket_quality(cp.asarray(points), gpu3d.bucketize(cp.asarray(points), 64, balance=balance))
        assert host == device


# ---- errors, streams, graphs, devices ------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(cp, arguments, error, message):
    arguments = {"points": clouds.uniform(100), **arguments}
    arguments["points"] = cp.asarray(arguments["points"])
    with pytest.raises(error, match=message):
        gpu3d.bucketize(**arguments)


def test_device_lengths_are_refused(cp):
    points = cp.asarray(clouds.uniform(100))
    with pytest.raises(TypeError, match="lengths must be host integers"):
        gpu3d.bucketize(points, lengths=cp.asarray([100]))
