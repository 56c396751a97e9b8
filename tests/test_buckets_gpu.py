# SPDX-License-Identifier: Apache-2.0
"""The bucket kernels against the reference: the same bits, at every size, on every cloud."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from test_buckets import BAD, DTYPES, assert_perfect, features
from test_neighbors import assert_same_bits

import gpu3d
from gpu3d import buckets as buckets_module
from gpu3d.reference import buckets as reference

pytestmark = pytest.mark.gpu

# Around a warp, a tile and a block; then the first size of each tile of the merge sort, and of the radix sort.
EDGES = (1, 2, 31, 32, 33, 1023, 1024, 1025, 2047, 4096, 4097, 30_000)
LARGE = (131_072, 131_073, 262_144, 262_145, 524_288, 524_289, 700_001, 1_500_000)


@pytest.fixture
def cp():
    """CuPy, with every free byte of its pool poisoned: an output that is not written shows."""
    import cupy

    pool = [cupy.full(size, 0xCD, np.uint8) for size in (1 << 10, 1 << 16, 1 << 22, 1 << 24, 1 << 26)]
    del pool
    return cupy


def assert_same(cp, points, *args, **kwargs):
    """GPU and CPU agree bit for bit."""
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


@pytest.mark.parametrize("balance", reference.BALANCES)
@pytest.mark.parametrize("sort", ["merge", *buckets_module.RADIX_TILES])
def test_small_clouds_by_either_sort(cp, monkeypatch, request, sort, balance):
    """What compute-sanitizer runs: both sorts, a batch that travels in the arguments and one that does not."""
    if sort != "merge":
        monkeypatch.setattr(buckets_module, "MERGE_MAX_TILES", 0)
        monkeypatch.setattr(buckets_module, "RADIX_TILES", (sort,))
        buckets_module._radix_tile.cache_clear()
        request.addfinalizer(buckets_module._radix_tile.cache_clear)
    for n in (1, 33, 1025, 9000, 20_000):
        got = assert_same(cp, clouds.lidar_like(n), 64, balance=balance, hash="xor_div")
        assert gpu3d.scopes(got, 4, stride=2).table.shape[1] == 4
        x = cp.asarray(features(n, (5,), "float16"))
        assert bool((got.gather(got.scatter(x)) == x).all())
    points = clouds.uniform(3000, dtype=np.float64)
    assert_same(cp, points, 16, balance=balance, lengths=[0, 2000, 37, 963])
    assert_same(cp, points, 16, balance=balance, lengths=[40] * 75, hash="zorder_mod", voxel_size="per_axis")


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
        list(range(70)),  # more clouds than travel in a kernel's arguments
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
    """Strided rows, and rows that begin at any coordinate; the bounds may come from the first or the last point."""
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
    """Coordinates a few units in the last place around whole cells: a quotient rounded otherwise changes the voxel."""
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


def test_scatter_of_views(cp):
    buckets = gpu3d.bucketize(cp.asarray(clouds.uniform(500)), 64)
    x = cp.asarray(features(501, (9,), "float16"))
    for view in (x[1:], x[:500, ::2], x[:500][::-1], cp.asfortranarray(x[:500])):
        np.testing.assert_array_equal(buckets.gather(buckets.scatter(view)).get(), view.get())


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


def test_empty(cp):
    buckets = gpu3d.bucketize(cp.zeros((0, 3), np.float32))
    assert buckets.slot_to_point.shape == buckets.point_to_slot.shape == (0,) and int(buckets.moved) == 0
    assert buckets.scatter(cp.zeros((0, 4))).shape == (0, 4)
    assert gpu3d.bucketize(cp.zeros((0, 3), np.float32), lengths=[0, 0], balance="probe").num_buckets == 0


def test_host_and_device_do_not_mix(cp):
    points = clouds.uniform(100)
    buckets = gpu3d.bucketize(cp.asarray(points), 64)
    with pytest.raises(ValueError, match="one device: x is numpy on the CPU, buckets is cupy on cuda:0"):
        buckets.scatter(points)


@pytest.mark.parametrize("n", [120_000, 600_000])
@pytest.mark.parametrize("balance", reference.BALANCES)
def test_captured_in_a_graph(cp, n, balance):
    """No host sync, no copy from host memory: a capture would refuse the one and freeze the other."""
    lengths = [n // 100] * 100  # more clouds than travel in a kernel's arguments
    options = {"balance": balance}, {"lengths": lengths}

    def run(points, **options):
        buckets = gpu3d.bucketize(points, **options)
        return buckets.slot_to_point, gpu3d.scopes(buckets, 4, shift=1).table, buckets.scatter(points)

    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        first, other = (cp.asarray(clouds.lidar_like(n, seed=seed)) for seed in (0, 9))
        for option in options:
            points = first.copy()
            expected, expected_of_other = ([z.get() for z in run(x, **option)] for x in (first, other))
            stream.begin_capture()
            got = run(points, **option)
            graph = stream.end_capture()
            graph.launch(stream)
            assert_same_bits([z.get() for z in got], expected)
            points[:] = other  # a replay reads what the buffers hold then
            graph.launch(stream)
            assert_same_bits([z.get() for z in got], expected_of_other)
            assert expected[0].tobytes() != expected_of_other[0].tobytes()


def test_the_current_stream_is_used(cp):
    """Work waits behind what the caller's stream still does: a wrong stream would read the old points."""
    points = cp.asarray(clouds.lidar_like(100_000))
    other = cp.asarray(clouds.lidar_like(100_000, seed=3))
    expected = gpu3d.bucketize(other).slot_to_point
    slow = cp.zeros((4096, 4096), np.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            slow = slow @ slow
        points[:] = other
        got = gpu3d.bucketize(points).slot_to_point
        same = got == expected
    stream.synchronize()
    assert bool(same.all())


def test_torch_and_jax_in_and_out(cp):
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    points = clouds.lidar_like(3000)
    expected = gpu3d.bucketize(points, 64)
    x = features(3000, (8,), "bfloat16")
    tensor = torch.from_numpy(points).cuda().requires_grad_()
    with torch.cuda.stream(torch.cuda.Stream()):
        buckets = gpu3d.bucketize(tensor, 64)
        assert isinstance(buckets.slot_to_point, torch.Tensor) and buckets.slot_to_point.is_cuda
        rows = torch.from_numpy(x.astype(np.float32)).cuda().to(torch.bfloat16)
        slots = buckets.scatter(rows)
        assert slots.dtype == torch.bfloat16 and gpu3d.scopes(buckets, 4).table.is_cuda
        torch.cuda.current_stream().synchronize()
        np.testing.assert_array_equal(buckets.slot_to_point.cpu().numpy(), expected.slot_to_point)
        np.testing.assert_array_equal(slots.float().cpu().numpy(), expected.scatter(x).astype(np.float32))
    strided = torch.zeros(3000, 5, device="cuda")
    strided[:, 1:4] = tensor.detach()
    np.testing.assert_array_equal(gpu3d.bucketize(strided[:, 1:4], 64).slot_to_point.cpu(), expected.slot_to_point)
    gpus = [d for d in jax.devices() if d.platform != "cpu"]
    if not gpus:
        pytest.skip("this JAX has no CUDA plugin")
    array = jax.device_put(points, gpus[0])
    buckets = gpu3d.bucketize(array, 64)
    assert isinstance(buckets.slot_to_point, jax.Array)
    np.testing.assert_array_equal(np.asarray(buckets.slot_to_point), expected.slot_to_point)
    np.testing.assert_array_equal(np.asarray(buckets.gather(buckets.scatter(array))), points)
