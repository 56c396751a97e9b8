# SPDX-License-Identifier: Apache-2.0
"""The pooling kernels give the same bits as the reference, for every size and cloud."""

from __future__ import annotations

import dataclasses
import math

import clouds
import numpy as np
import pytest
from conftest import poison
from test_attention import assert_accurate, attend, layout
from test_attention import assert_padding as assert_attention_padding
from test_attention import inputs as attention_inputs
from test_pooling import (
    BAD,
    BUCKET_SIZES,
    EDGES,
    RAGGED,
    RATIOS,
    REDUCTIONS,
    Inputs,
    assert_padding,
    assert_refused,
    assert_same_bits,
    child_layout,
    degenerate,
    inputs,
    run,
    valid,
)

import gpu3d

pytestmark = pytest.mark.gpu

DTYPES = ("float16", "bfloat16", "float32")
WIDTHS = (1, 2, 3, 5, 8, 24, 64, 100, 256, 1000)


def on_device(cp, host):
    """The same layout with its arrays on the GPU."""
    arrays = {name: cp.asarray(getattr(host, name)) for name in ("slot_to_point", "point_to_slot", "moved")}
    return dataclasses.replace(host, **arrays)


def to_device(cp, x):
    return Inputs(*map(cp.asarray, x))


def to_host(results):
    return {name: x.get() for name, x in results.items()}


def check_on(cp, x, host, ratio, reduce, note=""):
    """Check that all results of GPU and CPU have the same bits, in poisoned memory."""
    device, buckets = to_device(cp, x), on_device(cp, host)
    poison(cp, max(1 << 26, 16 * x.features.nbytes))
    got = to_host(run(device, buckets, ratio, reduce))
    note = f"{note} {x.features.shape} {x.features.dtype} {x.points.dtype} ratio {ratio} {reduce}"
    assert_same_bits(got, run(x, host, ratio, reduce), note)
    assert_padding(got, host, child_layout(host, ratio))


def check(cp, lengths, bucket_size, *, ratio=2, reduce="mean", channels=8, dtype="bfloat16", **options):
    """Make `inputs` with these options and check all results."""
    host = layout(lengths, bucket_size)
    x = inputs(host, ratio, channels, dtype, **options)
    check_on(cp, x, host, ratio, reduce, f"{lengths} of {bucket_size}")


# ---- the same bits as the reference --------------------------------------------------------------------------------


def test_small_pooling(cp):
    """For compute-sanitizer: short and full tiles, short groups, a large batch, each ratio and reduction."""
    for dtype, channels in (("bfloat16", 8), ("float16", 3), ("float32", 24)):
        for ratio, reduce in ((2, "mean"), (4, "max"), (8, "min"), (8, "sum")):
            check(cp, [0, 200, 1, 1030, 3], 16, ratio=ratio, reduce=reduce, channels=channels, dtype=dtype)
    check(cp, [37] * 70, 48, ratio=4, reduce="max")
    check(cp, [300], 16, channels=0)
    check(cp, [1100], 16, points=clouds.uniform(1100, dtype=np.float64))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_ratio_reduction_and_width(cp, dtype, ratio, reduce):
    for channels in WIDTHS:
        check(cp, [2100, 0, 301], 64, ratio=ratio, reduce=reduce, channels=channels, dtype=dtype)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bucket_size", BUCKET_SIZES)
def test_sizes_across_the_edges_of_tiles(cp, bucket_size, ratio):
    for n in EDGES:
        for dtype, reduce, channels in (("bfloat16", "mean", 8), ("float16", "max", 3), ("float32", "sum", 20)):
            check(cp, [n], bucket_size, ratio=ratio, reduce=reduce, channels=channels, dtype=dtype)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("lengths", [*RAGGED, [1024] * 15, [100] * 200], ids=lambda n: f"{len(n)} clouds")
def test_ragged_batches(cp, lengths, reduce):
    for bucket_size in (16, 48, 1040):
        for ratio in RATIOS:
            check(cp, lengths, bucket_size, ratio=ratio, reduce=reduce, channels=16)
            check(cp, lengths, bucket_size, ratio=ratio, reduce=reduce, channels=3, dtype="float32")


@pytest.mark.parametrize(
    ("n", "channels", "dtype", "ratio", "reduce"),
    [
        (122_880, 64, "bfloat16", 2, "mean"),
        (122_880, 256, "bfloat16", 2, "mean"),
        (122_880, 64, "bfloat16", 4, "max"),
        (122_881, 64, "float16", 8, "min"),
        (122_879, 100, "float32", 8, "sum"),
        (1_000_000, 32, "bfloat16", 2, "max"),
        (1_000_001, 3, "float32", 4, "mean"),
    ],
)
def test_large_clouds(cp, n, channels, dtype, ratio, reduce):
    points = clouds.lidar_like(n)
    host = gpu3d.bucketize(points)
    check_on(cp, inputs(host, ratio, channels, dtype, points), host, ratio, reduce)
    lengths = [n // 3, 0, n - n // 3 - 5000, 5000]
    check(cp, lengths, 512, ratio=ratio, reduce=reduce, channels=channels, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_degenerate_clouds_in_every_dtype_of_points(cp, ratio, dtype):
    for name, points in degenerate(3000, dtype).items():
        host = gpu3d.bucketize(points, 48, check_finite=False)
        check_on(cp, inputs(host, ratio, 4, points=points), host, ratio, "mean", name)


def test_map_coordinates(cp):
    points = clouds.uniform(5000, dtype=np.float64) + [5e6, 4.5e6, 300]
    host = gpu3d.bucketize(points, 64)
    for ratio in RATIOS:
        check_on(cp, inputs(host, ratio, 4, points=points), host, ratio, "mean")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cell", [0.1, 1 / 3, float(np.float32(2) - np.float32(2**-23)), 7e-6, 1e-33, 3e-38, 1e32])
def test_voxels_at_their_edges(cp, cell, dtype):
    """Coordinates within a few ulps of whole cells, where a quotient that is rounded otherwise changes the voxel."""
    cell, n = dtype(np.float32(cell)), 20 * 1024
    rng = np.random.default_rng(3)
    points = rng.integers(0, 1025, (n, 3)).astype(dtype) * cell
    bits = points.view(np.int32 if dtype is np.float32 else np.int64)
    bits += (rng.integers(-2, 3, bits.shape) * (points > 0)).astype(bits.dtype)
    points = np.minimum(points, 1024 * cell)
    points[::1024], points[1::1024] = 0, 1024 * cell  # the bounds of each tile
    host = layout([n], 512)
    shifted = points + dtype(37) * cell
    for in_slots in (points, shifted, -points):
        x = inputs(host, 2, 1)._replace(points=in_slots)
        check_on(cp, x, host, 2, "mean", cell)


def test_real_sweeps(cp, data_dir):
    for name, points in clouds.real(data_dir):
        host = gpu3d.bucketize(points)
        check_on(cp, inputs(host, 2, 4, "bfloat16", points), host, 2, "mean", name)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(cp, dtype, reduce):
    """NaN, infinities, zeros of both signs, subnormal numbers, sums that overflow the dtype, ties."""
    host = layout([2500, 7], 16)
    largest = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.4e38}[dtype]
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}[dtype]
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, largest, -largest, smallest, -smallest, 3 * smallest, 1.0, -1.0]
    for ratio in RATIOS:
        x = inputs(host, ratio, 12, dtype)
        rng = np.random.default_rng(ratio)
        for y in x:
            if y is not x.points:
                y[:] = rng.choice(special[rng.integers(0, 2) :], y.shape)  # half of them without NaN
                y[:, ::3] = rng.choice(special[3:5], y[:, ::3].shape)
        check_on(cp, x, host, ratio, reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_may_hold_anything(cp, dtype, reduce):
    host = layout([0, 370, 1, 16, 1133], 80)
    x = inputs(host, 4, 8, dtype)
    buckets, child = on_device(cp, host), child_layout(host, 4)
    expected = to_host(run(to_device(cp, x), buckets, 4, reduce))
    assert_padding(expected, host, child)
    assert all(np.isfinite(y.astype(float)).all() for y in expected.values())
    for filler in (0, np.inf, -np.inf, 1000):
        for y in x:
            y[~valid(host if len(y) == host.num_slots else child)] = filler
        assert_same_bits(to_host(run(to_device(cp, x), buckets, 4, reduce)), expected, filler)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 8, 64])
def test_views(cp, channels, dtype, reduce):
    """Memory layouts change no bit: wide, transposed, spread, backwards, misaligned."""
    host = layout([1300, 100], 16)
    x = inputs(host, 4, channels, dtype)
    device, buckets = to_device(cp, x), on_device(cp, host)
    expected = run(x, host, 4, reduce)
    views = {
        "wide": lambda y: cp.pad(y, ((0, 0), (8, 16)))[:, 8:-16],
        "oddly wide": lambda y: cp.pad(y, ((0, 0), (1, 2)))[:, 1:-2],
        "transposed": cp.asfortranarray,
        "spread": lambda y: cp.repeat(y, 2, axis=1)[:, ::2],
        "every other row": lambda y: cp.repeat(y, 2, axis=0)[::2],
        "backwards": lambda y: cp.ascontiguousarray(y[::-1, ::-1])[::-1, ::-1],
    }

    def shifted(offset):
        def view(y):
            flat = cp.empty(y.size + offset, y.dtype)
            flat[offset:] = y.reshape(-1)
            return flat[offset:].reshape(y.shape)

        return view

    views |= {f"offset {offset}": shifted(offset) for offset in (1, 2, 3, 4, 5, 8)}  # in elements
    for name, view in views.items():
        viewed = Inputs(*map(view, device))
        assert name.startswith("offset") or not viewed.features.flags.c_contiguous
        poison(cp)
        assert_same_bits(to_host(run(viewed, buckets, 4, reduce)), expected, name)
    for one in Inputs._fields:  # and each argument by itself
        viewed = device._replace(**{one: views["oddly wide"](getattr(device, one))})
        assert_same_bits(to_host(run(viewed, buckets, 4, reduce)), expected, one)
    rows = {name: np.broadcast_to(getattr(x, name)[0], getattr(x, name).shape) for name in ("dpooled", "dout")}
    broadcast = {name: cp.broadcast_to(getattr(device, name)[0], row.shape) for name, row in rows.items()}
    got = run(device._replace(**broadcast), buckets, 4, reduce)  # like the gradient of a sum
    assert_same_bits(to_host(got), run(x._replace(**rows), host, 4, reduce), "broadcast")


def test_views_of_what_pooling_saved(cp):
    """The arrays of a Pooling may be copied to any address: the backward needs no alignment."""
    host = layout([1300, 100], 16)
    x = inputs(host, 4, 5, "float16")
    device, buckets = to_device(cp, x), on_device(cp, host)
    pooled = gpu3d.bucket_pool(device.features, device.points, buckets, ratio=4, reduce="max")
    expected = gpu3d.bucket_pool_backward(device.dpooled, pooled), gpu3d.bucket_unpool(device.child, pooled)

    def moved(y):
        flat = cp.empty(y.size + 1, y.dtype)
        flat[1:] = y.reshape(-1)
        return flat[1:].reshape(y.shape)

    for copy in (moved, cp.asfortranarray):
        again = dataclasses.replace(pooled, members=copy(pooled.members), argmember=copy(pooled.argmember))
        got = gpu3d.bucket_pool_backward(device.dpooled, again), gpu3d.bucket_unpool(device.child, again)
        for a, b in zip(got, expected, strict=True):
            assert a.get().tobytes() == b.get().tobytes()


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_runs_give_the_same_bits(cp, dtype, reduce):
    points = clouds.lidar_like(30_000)
    host = gpu3d.bucketize(points, 512, lengths=[29_000, 1000])
    x = to_device(cp, inputs(host, 4, 24, dtype, points))
    buckets = on_device(cp, host)
    expected = {name: y.view("u1") if y.ndim else y for name, y in run(x, buckets, 4, reduce).items()}
    for _ in range(100):
        for name, y in run(x, buckets, 4, reduce).items():
            assert bool(((y.view("u1") if y.ndim else y) == expected[name]).all()), name


# ---- the child is a full citizen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("bucket_size", [16, 512, 1040])
def test_pooling_down_and_up_again(cp, bucket_size, reduce):
    """Three levels of pooling, and back by unpooling with skips."""

    def levels(x, buckets):
        features, points, poolings = x.features, x.points, []
        for ratio in (2, 4, 8):
            poolings.append(gpu3d.bucket_pool(features, points, buckets, ratio=ratio, reduce=reduce))
            features, points, buckets = poolings[-1].features, poolings[-1].points, poolings[-1].buckets
        skips = [x.skip, *(pooled.features for pooled in poolings[:-1])]
        gradient = features
        for pooled, skip in zip(poolings[::-1], skips[::-1], strict=True):
            features = gpu3d.bucket_unpool(features, pooled, skip=skip)
            gradient = gpu3d.bucket_pool_backward(gradient, pooled)
        return {
            "features": features,
            "gradient": gradient,
            **{f"members {p.ratio}": p.members for p in poolings},
            **{f"points {p.ratio}": p.points for p in poolings},
        }

    host = layout([0, 9000, 9, 700], bucket_size)
    x = inputs(host, 2, 8, "bfloat16")
    got = levels(to_device(cp, x), on_device(cp, host))
    assert_same_bits(to_host(got), levels(x, host))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_the_child(cp, dtype):
    host = layout([2000, 0, 130], 16)
    x = to_device(cp, inputs(host, 2, 8, dtype))
    child = gpu3d.bucket_pool(x.features, x.points, on_device(cp, host)).buckets
    scopes = gpu3d.scopes(child, 8, shift=1)
    arrays = attention_inputs(child_layout(host, 2), 2, 32, dtype)
    got = to_host(attend(*map(cp.asarray, arrays), child, scopes))
    assert_attention_padding(got, child_layout(host, 2))
    assert_accurate(got, *arrays, child_layout(host, 2), scopes.table.get(), 1 / math.sqrt(32))


def test_scatter_and_gather_of_the_child(cp):
    host = layout([2000, 0, 130], 48)
    x = to_device(cp, inputs(host, 4))
    pooled = gpu3d.bucket_pool(x.features, x.points, on_device(cp, host), ratio=4)
    packed = pooled.buckets.gather(pooled.points)
    assert packed.shape == (500 + 33, 3)
    assert bool((pooled.buckets.scatter(packed) == pooled.points).all()) and bool(packed.any(1).all())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("bucket_size", [64, 2064])
def test_blocks_without_work_return(cp, bucket_size, reduce):
    """Grids are made for full buckets. With one point in each cloud's last bucket, most blocks have no work."""
    for buckets in ((3, 1, 0, 2), (1,) * 70):
        for spare in (0, 1, bucket_size - 1):
            check(cp, [max(0, n * bucket_size - spare) for n in buckets], bucket_size, ratio=4, reduce=reduce)


# ---- offsets beyond 32 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.usefixtures("large_memory")
def test_more_than_2_31_elements(cp, reduce):
    """Compare the last cloud, whose rows lie beyond 2**31 elements, with the same cloud alone."""
    many, tail, channels = 2**19 + 1024, 3000, 4096
    assert many * channels > 2**31 and many % 1024 == 0  # whole buckets, for the children too
    last = layout([tail], 512)
    x = to_device(cp, inputs(last, 2, channels, "float16"))
    expected = to_host(run(x, on_device(cp, last), 2, reduce))
    first, first_child = many, many // 2  # slots of the last cloud
    long = gpu3d.bucketize(np.zeros((many + tail, 3), np.float32), 512, lengths=[many, tail])
    buckets = on_device(cp, long)

    def lengthened(y):
        rows = cp.zeros((len(y) + (first if len(y) == last.num_slots else first_child), y.shape[1]), y.dtype)
        rows[-len(y) :] = y
        return rows

    pooled = gpu3d.bucket_pool(lengthened(x.features), lengthened(x.points), buckets, reduce=reduce)
    got = {"features": pooled.features[first_child:].get(), "members": pooled.members[first_child:].get()}
    got["members"][got["members"] >= 0] -= first
    got["dfeatures"] = gpu3d.bucket_pool_backward(lengthened(x.dpooled), pooled)[first:].get()
    got["out with skip"] = gpu3d.bucket_unpool(lengthened(x.child), pooled, skip=lengthened(x.skip))[first:].get()
    dchild, dskip = gpu3d.bucket_unpool_backward(lengthened(x.dout), pooled)
    got["dchild"], got["dskip"] = dchild[first_child:].get(), dskip[first:].get()
    assert_same_bits(got, {name: expected[name] for name in got})
    assert all(y[:1000].any() for y in got.values())
    del pooled, dchild, dskip
    cp.get_default_memory_pool().free_all_blocks()


# ---- errors, streams, graphs, libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(cp, call, arguments, error, message):
    assert_refused(call, arguments, error, message, cp.asarray)


def test_float64_features_are_refused(cp):
    host = layout([100], 16)
    x, wide = (to_device(cp, inputs(host, 2, dtype=dtype)) for dtype in ("float32", "float64"))
    pooled = gpu3d.bucket_pool(x.features, x.points, on_device(cp, host))
    message = r"must be float16, bfloat16 or float32 on a GPU, got float64: .*astype\('float32'\)"
    with pytest.raises(TypeError, match=f"features {message}"):
        gpu3d.bucket_pool(wide.features, x.points, on_device(cp, host))
    with pytest.raises(TypeError, match=f"dchild_features {message}"):
        gpu3d.bucket_pool_backward(wide.dpooled, pooled)
    with pytest.raises(TypeError, match=f"child_features {message}"):
        gpu3d.bucket_unpool(wide.child, pooled)
    with pytest.raises(TypeError, match=f"skip {message}"):
        gpu3d.bucket_unpool(x.child, pooled, skip=wide.skip)
    with pytest.raises(TypeError, match=f"dout {message}"):
        gpu3d.bucket_unpool_backward(wide.dout, pooled)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [1, 0, 1]])
def test_empty_clouds_and_single_points(cp, lengths, reduce):
    for dtype in DTYPES:
        for ratio in RATIOS:
            check(cp, lengths, 16, ratio=ratio, reduce=reduce, dtype=dtype)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_no_features(cp, reduce):
    for lengths in ([], [1500, 3]):
        check(cp, lengths, 16, ratio=4, reduce=reduce, channels=0)
