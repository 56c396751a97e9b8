# SPDX-License-Identifier: Apache-2.0
"""bucket_pool, bucket_unpool and their backwards on the CPU: definition, laws, rounding, bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import clouds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import assert_padding as assert_attention_padding
from test_attention import attend, layout
from test_attention import inputs as attention_inputs
from test_buckets import assert_perfect

import gpu3d
from gpu3d import _arrays

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": _arrays.BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}  # half an ulp of 1
RATIOS = (2, 4, 8)
REDUCTIONS = ("sum", "mean", "min", "max")
BUCKET_SIZES = (16, 48, 512, 1040, 2048)  # smaller and larger than a tile, divisors of it and not
EDGES = (1, 2, 3, 7, 8, 9, 1022, 1023, 1024, 1025, 1026, 2047, 2048, 2049, 3000)
RAGGED = ([0, 700, 1, 16, 0, 2100, 3, 0], list(range(70)), [1024, 1025, 1023, 5])


# ---- inputs, and the ops as the tests call them (test_pooling_gpu.py too) ------------------------------------------


class Inputs(NamedTuple):
    """The inputs of the four calls, in slot order."""

    features: np.ndarray  # [num_slots, C]
    points: np.ndarray  # [num_slots, 3]
    dpooled: np.ndarray  # [child slots, C]
    child: np.ndarray  # [child slots, C]
    skip: np.ndarray  # [num_slots, C]
    dout: np.ndarray  # [num_slots, C]


def valid(buckets):
    return np.asarray(buckets.slot_to_point) >= 0


def child_layout(buckets, ratio):
    return layout([-(-n // ratio) for n in buckets.lengths], buckets.bucket_size)


def inputs(buckets, ratio, channels=3, dtype="float32", points=None, seed=0):
    """Normal random numbers and a slab of points, or the given `points` [N, 3], with NaN in padding."""
    rng, child = np.random.default_rng(seed), child_layout(buckets, ratio)
    if points is None:
        points = clouds.uniform(sum(buckets.lengths), seed)

    def rows(of):
        x = rng.standard_normal((of.num_slots, channels))
        x[~valid(of)] = np.nan
        return x.astype(DTYPES[dtype])

    in_slots = buckets.scatter(points, fill=np.nan)
    return Inputs(rows(buckets), in_slots, rows(child), rows(child), rows(buckets), rows(buckets))


def degenerate(n, dtype):
    """Named clouds that break careless voxels: those of `clouds`, and clouds with non-finite coordinates."""
    equal = np.full((n, 3), 1.5, np.float32)
    equal[::7, 1] = np.nan
    named = {**clouds.degenerate(n), "slab": clouds.uniform(n), "spoiled": clouds.spoiled(n)[0], "equal or NaN": equal}
    with np.errstate(over="ignore"):  # "huge" becomes inf in float16
        return {name: points.astype(DTYPES[dtype]) for name, points in named.items()}


def run(x, buckets, ratio, reduce):
    """All results of the public calls, by name."""
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=ratio, reduce=reduce)
    assert (pooled.ratio, pooled.reduce, pooled.parent) == (ratio, reduce, buckets)
    assert (pooled.argmember is not None) == (reduce in ("min", "max"))
    results = {name: getattr(pooled, name) for name in ("features", "points", "members")}
    results |= {name: getattr(pooled.buckets, name) for name in ("slot_to_point", "point_to_slot", "moved")}
    if pooled.argmember is not None:
        results["argmember"] = pooled.argmember
    results["dfeatures"] = gpu3d.bucket_pool_backward(x.dpooled, pooled)
    results["out"] = gpu3d.bucket_unpool(x.child, pooled)
    results["out with skip"] = gpu3d.bucket_unpool(x.child, pooled, skip=x.skip)
    results["dchild"], results["dskip"] = gpu3d.bucket_unpool_backward(x.dout, pooled)
    return results


def assert_same_bits(got, expected, note=""):
    """Assert the same names, dtypes, shapes and bits; all NaN count as equal."""
    assert got.keys() == expected.keys()
    for name in got:
        a, b = got[name].copy(), expected[name].copy()
        assert a.dtype == b.dtype and a.shape == b.shape, f"{name} {note}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        nan = np.isnan(b)
        np.testing.assert_array_equal(np.isnan(a), nan, err_msg=f"NaN of {name} {note}")
        a[nan] = b[nan] = 0
        assert a.tobytes() == b.tobytes(), f"{name} {note}: {(a != b).sum()} of {a.size} differ"


def assert_padding(results, buckets, child):
    """Assert that padding holds -1 or 0, whatever the padding of the inputs held."""
    for name, x in results.items():
        if name in ("point_to_slot", "moved"):
            continue
        of = buckets if name in ("dfeatures", "out", "out with skip", "dskip") else child
        padding = x[~valid(of)]
        assert (padding == (-1 if name in ("members", "slot_to_point") else 0)).all(), name


# ---- oracles: one tile, point and member at a time -----------------------------------------------------------------


def voxels_by_definition(tile):
    """Voxels [n][3] of one tile, computed one number at a time."""
    exact = np.float64 if tile.dtype == np.float64 else np.float32
    rows = [[exact(x) for x in row] for row in tile]
    low, extent = [], []
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for d in range(3):
            finite = [row[d] for row in rows if math.isfinite(row[d])] or [exact(0)]
            low.append(min(finite))
            extent.append(np.float32(max(finite) - min(finite)))
        cell = max(extent) / np.float32(1024)

        def voxel(x, d):
            if not math.isfinite(x):
                return 1023
            if cell < 2.0**-126:
                return 0
            steps = np.float32(x - low[d]) / cell
            return 1023 if math.isnan(steps) else int(min(math.floor(steps), 1023))

        return [[voxel(row[d], d) for d in range(3)] for row in rows]


def order_by_definition(points, buckets):
    """For each cloud the slots of its points, ordered by tile, by the Morton code of the voxel, and by slot."""
    clouds_of_slots = []
    for n, bucket in zip(buckets.lengths, buckets.bucket_offsets[:-1], strict=True):
        order, first = [], bucket * buckets.bucket_size
        for tile in range(first, first + n, 1024):
            slots = range(tile, min(tile + 1024, first + n))
            keys = []
            for slot, voxel in zip(slots, voxels_by_definition(points[slots.start : slots.stop]), strict=True):
                bits = [voxel[d] >> b & 1 for b in reversed(range(10)) for d in reversed(range(3))]
                keys.append((bits, slot))
            order += [slot for _, slot in sorted(keys)]
        clouds_of_slots.append(order)
    return clouds_of_slots


def members_by_definition(order, bucket_size, ratio):
    """The member slots of each child slot; none for padding."""
    members = []
    for slots in order:
        groups = [slots[i : i + ratio] for i in range(0, len(slots), ratio)]
        members += groups + [[]] * (-len(groups) % bucket_size)
    return members


def reduced_by_definition(values, reduce):
    """The reduction of one group's values in float64, and which value is the minimum or maximum."""
    values = [float(v) for v in values]
    if reduce == "sum":
        return math.fsum(values), None
    if reduce == "mean":
        return math.fsum(values) / len(values), None
    best = min(values) if reduce == "min" else max(values)
    return best, values.index(best)


def assert_is_the_definition(buckets, x, ratio, reduce, dtype):
    """Assert that results are within the roundings of sum, division and dtype of the float64 definition."""
    results = run(x, buckets, ratio, reduce)
    members = members_by_definition(order_by_definition(x.points, buckets), buckets.bucket_size, ratio)
    assert results["members"].tolist() == [group + [-1] * (ratio - len(group)) for group in members]
    child, channels = child_layout(buckets, ratio), x.features.shape[1]
    assert_padding(results, buckets, child)
    exact = {name: np.zeros(y.shape) for name, y in results.items() if name not in ("moved", "point_to_slot")}
    size = {name: np.zeros(y.shape) for name, y in exact.items()}  # sums of absolute terms
    for c, group in enumerate(members):
        for d in range(3 if group else 0):
            exact["points"][c, d], _ = reduced_by_definition(x.points[group, d], "mean")
            size["points"][c, d] = np.abs(x.points[group, d].astype(float)).sum()
        for f in range(channels if group else 0):
            exact["features"][c, f], best = reduced_by_definition(x.features[group, f], reduce)
            size["features"][c, f] = np.abs(x.features[group, f].astype(float)).sum()
            exact["dchild"][c, f], _ = reduced_by_definition(x.dout[group, f], "sum")
            size["dchild"][c, f] = np.abs(x.dout[group, f].astype(float)).sum()
            if best is not None:
                assert results["argmember"][c, f] == best
            for m, slot in enumerate(group):
                whole = float(x.dpooled[c, f])
                exact["dfeatures"][slot, f] = whole / len(group) if reduce == "mean" else whole * (best in (None, m))
                exact["out"][slot, f] = x.child[c, f]
                exact["out with skip"][slot, f] = float(x.child[c, f]) + float(x.skip[slot, f])
                exact["dskip"][slot, f] = x.dout[slot, f]
    for name in ("features", "points", "dfeatures", "out", "out with skip", "dchild", "dskip"):
        of = x.points.dtype.name if name == "points" else dtype
        assert results[name].dtype == DTYPES[of], name
        copied = name in ("out", "dskip") or (reduce in ("min", "max") and name in ("features", "dfeatures"))
        adding = ratio * (2.0**-53 if of == "float64" else 2.0**-24)  # ratio - 1 additions and a division
        tiny = 2.0**-25 if of == "float16" else 2.0**-140  # half of the smallest subnormal number, or more
        bound = 0 if copied else UNIT[of] * np.abs(exact[name]) * (1 + adding) + adding * size[name] + tiny
        error = np.abs(results[name].astype(float) - exact[name])
        assert (error <= bound).all(), f"{name}: error {error.max():.3g}"
        filled = valid(child if name in ("features", "points", "dchild") else buckets)
        if not (name == "dfeatures" and reduce in ("min", "max")):
            cancelled = (exact[name][filled] == 0).sum()  # a few sums of bfloat16 are 0
            assert cancelled <= exact[name][filled].size / 50, name


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_size", BUCKET_SIZES)
def test_groups_are_the_definition_at_every_size(bucket_size):
    for lengths in ([], [0], [0, 0], *([n] for n in EDGES), *RAGGED):
        buckets = layout(lengths, bucket_size)
        points = inputs(buckets, 2).points
        order = order_by_definition(points, buckets)
        for ratio in RATIOS:
            pooled = gpu3d.bucket_pool(np.zeros((len(points), 1), np.float32), points, buckets, ratio=ratio)
            expected = members_by_definition(order, bucket_size, ratio)
            assert pooled.members.dtype == np.int32 and pooled.members.shape == (len(expected), ratio)
            assert pooled.members.tolist() == [group + [-1] * (ratio - len(group)) for group in expected]
            child = pooled.buckets
            assert child.lengths == tuple(-(-n // ratio) for n in lengths) and child.bucket_size == bucket_size
            assert_perfect(child, child.lengths)
            np.testing.assert_array_equal(child.slot_to_point[valid(child)], np.arange(sum(child.lengths)))
            assert child.moved.dtype == np.int32 and child.moved.shape == () and child.moved == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_degenerate_clouds_are_the_definition(dtype):
    for name, points in degenerate(1300, dtype).items():
        buckets = gpu3d.bucketize(points, 48, check_finite=False)
        x = inputs(buckets, 2, points=points)
        expected = members_by_definition(order_by_definition(x.points, buckets), 48, 2)
        got = gpu3d.bucket_pool(x.features, x.points, buckets).members
        assert got.tolist() == [group + [-1] * (2 - len(group)) for group in expected], name


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_definition(dtype, ratio, reduce):
    buckets = layout([0, 301, 1, 1030, ratio - 1], 48)
    assert_is_the_definition(buckets, inputs(buckets, ratio, 2, dtype), ratio, reduce, dtype)


@pytest.mark.parametrize("point_dtype", DTYPES)
def test_any_dtype_of_points(point_dtype):
    points = clouds.uniform(700, dtype=DTYPES[point_dtype])
    buckets = gpu3d.bucketize(points, 16)
    x = inputs(buckets, 4, points=points)
    assert_is_the_definition(buckets, x, 4, "mean", "float32")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=5),
    st.sampled_from([16, 32, 48, 1040]),
    st.sampled_from(RATIOS),
    st.sampled_from(REDUCTIONS),
    st.integers(0, 2**32 - 1),
)
def test_any_batch(lengths, bucket_size, ratio, reduce, seed):
    buckets = layout(lengths, bucket_size)
    assert_is_the_definition(buckets, inputs(buckets, ratio, 1, seed=seed), ratio, reduce, "float32")


def line(n, bucket_size=16):
    """A layout of points in a line, so that members are consecutive slots."""
    points = np.zeros((-(-n // bucket_size) * bucket_size, 3), np.float32)
    points[:, 0] = np.arange(len(points))
    return layout([n], bucket_size), points


def pool_row(values, reduce, ratio=4, dtype="float32"):
    """Pool `values`, one feature of consecutive members; returns the first child and the pooling."""
    buckets, points = line(len(values))
    features = np.full((buckets.num_slots, 1), np.nan, DTYPES[dtype])
    features[: len(values), 0] = np.array(values, DTYPES[dtype])
    pooled = gpu3d.bucket_pool(features, points, buckets, ratio=ratio, reduce=reduce)
    assert pooled.members[0].tolist() == [*range(min(ratio, len(values))), *[-1] * (ratio - len(values))]
    return pooled.features[0, 0], pooled


def test_sums_are_float32_in_the_order_of_members_and_rounded_once():
    one, half_ulp = 1.0, 2.0**-24
    assert pool_row([one, half_ulp, half_ulp], "sum")[0] == 1  # each addend is lost
    assert pool_row([half_ulp, half_ulp, one], "sum")[0] == 1 + 2 * half_ulp
    assert pool_row([one, half_ulp, half_ulp], "sum", dtype="float64")[0] == 1 + 2 * half_ulp
    assert pool_row([65504, 65504, 65504, 65504], "mean", dtype="float16")[0] == 65504  # a float16 sum would be inf
    assert np.isposinf(pool_row([65504, 65504], "sum", dtype="float16")[0])
    assert pool_row([2048, 1, 1, 1], "sum", dtype="float16")[0] == 2052  # 2051 to even; float16 would lose each 1
    assert pool_row([256, 1, 1, 1], "sum", dtype="bfloat16")[0] == 260  # 259 rounds to even
    assert np.signbit(pool_row([-0.0, -0.0], "sum")[0]) and np.signbit(pool_row([-0.0], "mean")[0])  # no +0 is added


def test_the_mean_is_divided_and_not_multiplied():
    """For some numbers x / 3 differs from x times the rounded third."""
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    thirds = values / np.float32(3)
    assert (thirds != values * (np.float32(1) / np.float32(3))).any()
    for value, third in zip(values[:50], thirds, strict=False):
        mean, pooled = pool_row([value, 0, 0], "mean")
        assert mean == third
        dpooled = np.full_like(pooled.features, value)
        np.testing.assert_array_equal(gpu3d.bucket_pool_backward(dpooled, pooled)[:3, 0], third)
        buckets, points = line(3)
        points[:3] = [[0, 0, 0], [0, 0, value], [0, 0, 0]]
        assert gpu3d.bucket_pool(points, points, buckets, ratio=4).points[0, 2] == third


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_skip_is_added_in_float32_and_rounded_once(dtype):
    buckets, points = line(16)
    x = inputs(buckets, 2, 8, dtype)
    pooled = gpu3d.bucket_pool(x.features, points, buckets)
    out = gpu3d.bucket_unpool(x.child, pooled, skip=x.skip)
    wide = np.repeat(x.child[:8], 2, 0).astype(np.float32) + x.skip.astype(np.float32)
    np.testing.assert_array_equal(out, wide.astype(DTYPES[dtype]))


def test_map_coordinates_keep_their_millimetres():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 2**16, (3000, 3)) / 1024.0  # exact, also after the shift
    moved = points + [5e6, 4.5e6, 300]
    buckets = gpu3d.bucketize(points, 64)
    features = np.zeros((buckets.num_slots, 1), np.float32)
    near, far = (gpu3d.bucket_pool(features, buckets.scatter(p), buckets, ratio=8) for p in (points, moved))
    np.testing.assert_array_equal(far.members, near.members)
    means = far.points[valid(far.buckets)]
    assert means.dtype == np.float64
    np.testing.assert_allclose(means - [5e6, 4.5e6, 300], near.points[valid(near.buckets)], rtol=0, atol=1e-8)
    single = gpu3d.bucket_pool(features, buckets.scatter(moved.astype(np.float32)), buckets, ratio=8)
    assert (single.members != near.members).any()  # float32 loses them


def test_all_points_equal_are_grouped_by_slot():
    buckets = layout([1500], 16)
    points = np.full((buckets.num_slots, 3), 7.25, np.float32)
    pooled = gpu3d.bucket_pool(points, points, buckets, ratio=4)
    np.testing.assert_array_equal(pooled.members[:375].reshape(-1), np.arange(1500))
    assert (pooled.points[:375] == 7.25).all()


def test_groups_are_tight():
    """Pairs are close even with a hash that scatters points, because each tile is sorted again."""
    points = clouds.lidar_like(20_000)
    buckets = gpu3d.bucketize(points, 512, hash="xor_mod")
    in_slots = buckets.scatter(points)
    members = gpu3d.bucket_pool(in_slots, in_slots, buckets).members
    pairs = in_slots[members[valid(child_layout(buckets, 2))]]
    apart = np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1).mean()
    in_slot_order = np.linalg.norm(in_slots[0:20_000:2] - in_slots[1:20_000:2], axis=1).mean()
    assert 0 < apart < in_slot_order / 3


def test_real_sweeps(data_dir):
    """Every point is in exactly one group. The mean distance of a pair is below a tenth of the mean width of a tile."""
    seen = 0
    for name, points in clouds.real(data_dir):
        buckets = gpu3d.bucketize(points)
        in_slots = buckets.scatter(points)
        members = gpu3d.bucket_pool(in_slots[:, :1], in_slots, buckets).members
        np.testing.assert_array_equal(np.sort(members[members >= 0]), np.arange(len(points)), err_msg=name)
        whole = len(points) // 1024 * 1024
        extent = np.ptp(in_slots[:whole].reshape(-1, 1024, 3), axis=1).max(axis=1).mean()
        pairs = in_slots[members[: whole // 2]]
        assert np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1).mean() < extent / 10, name
        seen += 1
    assert seen > 10


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bucket_size", BUCKET_SIZES)
def test_every_point_is_in_exactly_one_group(bucket_size, ratio):
    for lengths in RAGGED:
        buckets = layout(lengths, bucket_size)
        x = inputs(buckets, ratio)
        members = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=ratio).members
        np.testing.assert_array_equal(np.sort(members[members >= 0]), np.flatnonzero(valid(buckets)))
        count = (members >= 0).sum(1)
        assert ((members >= 0) == (np.arange(ratio) < count[:, None])).all()  # -1 only at the end of a row
        child = child_layout(buckets, ratio)
        short = (count < ratio) & valid(child)
        last = np.array(child.bucket_offsets[:-1]) * bucket_size + np.array(child.lengths) - 1
        assert set(np.flatnonzero(short)) <= set(last)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_may_hold_anything(dtype, reduce):
    buckets = layout([0, 70, 1, 16, 33], 16)
    x = inputs(buckets, 4, 3, dtype)
    padding, child_padding = ~valid(buckets), ~valid(child_layout(buckets, 4))
    assert padding.sum() == 10 + 15 + 15 and child_padding.sum() == 14 + 15 + 12 + 7
    got = run(x, buckets, 4, reduce)
    assert_padding(got, buckets, child_layout(buckets, 4))
    assert all(np.isfinite(y.astype(float)).all() for y in got.values())
    for filler in (0, np.inf, -np.inf, 1000):
        for y in x:
            y[padding if len(y) == buckets.num_slots else child_padding] = filler
        assert_same_bits(run(x, buckets, 4, reduce), got, filler)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 2**32 - 1), st.integers(-30, 30), st.integers(-8, 8))
def test_scaling_and_moving_by_powers_of_two_change_no_group(n, seed, scale, move):
    points = np.random.default_rng(seed).integers(0, 1024, (n, 3)).astype(np.float32)
    other = (points + np.float32(2.0**move)) if move >= 0 else points
    other = other * np.float32(2.0**scale)
    buckets = gpu3d.bucketize(points, 32)
    features = np.zeros((buckets.num_slots, 1), np.float32)
    one, two = (gpu3d.bucket_pool(features, buckets.scatter(p), buckets, ratio=8) for p in (points, other))
    np.testing.assert_array_equal(one.members, two.members)


def test_the_features_and_their_width_change_no_group():
    buckets = layout([1500], 16)
    x = inputs(buckets, 2, 5)
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets)
    for column in range(5):
        alone = gpu3d.bucket_pool(x.features[:, column : column + 1], x.points, buckets)
        np.testing.assert_array_equal(alone.members, pooled.members)
        np.testing.assert_array_equal(alone.features[:, 0], pooled.features[:, column])


@pytest.mark.parametrize("ratio", RATIOS)
def test_unpooling_is_the_adjoint_of_the_sum(ratio):
    """Both move the same rows, so the forward of one has the bits of the backward of the other."""
    buckets = layout([1100, 5], 16)
    x = inputs(buckets, ratio, 4)
    pooled = gpu3d.bucket_pool(x.dout, x.points, buckets, ratio=ratio, reduce="sum")
    dchild, dskip = gpu3d.bucket_unpool_backward(x.dout, pooled)
    np.testing.assert_array_equal(dchild, pooled.features)
    np.testing.assert_array_equal(dskip[valid(buckets)], x.dout[valid(buckets)])
    backward = gpu3d.bucket_pool_backward(x.child, pooled)
    np.testing.assert_array_equal(backward, gpu3d.bucket_unpool(x.child, pooled))
    assert (backward[valid(buckets)] != 0).all()


@pytest.mark.parametrize("reduce", ["mean", "min", "max"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_pooling_undoes_unpooling(ratio, reduce):
    buckets = layout([1100, 5, 1], 16)
    x = inputs(buckets, ratio, 4)
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=ratio)
    back = gpu3d.bucket_pool(gpu3d.bucket_unpool(x.child, pooled), x.points, buckets, ratio=ratio, reduce=reduce)
    children = valid(pooled.buckets)
    if reduce == "mean":
        np.testing.assert_allclose(back.features, np.where(children[:, None], x.child, 0), rtol=1e-6)
    else:
        np.testing.assert_array_equal(back.features, np.where(children[:, None], x.child, 0))
        assert (back.argmember == 0).all()  # all members have the extreme, so the first one


@pytest.mark.parametrize("ratio", RATIOS)
def test_reductions_agree_with_each_other(ratio):
    buckets = layout([1100, 5], 16)
    x = inputs(buckets, ratio, 4, "float64")
    pooled = {r: gpu3d.bucket_pool(x.features, x.points, buckets, ratio=ratio, reduce=r) for r in REDUCTIONS}
    total, mean, low, high = (pooled[r].features for r in REDUCTIONS)
    count = np.maximum((pooled["sum"].members >= 0).sum(1, keepdims=True), 1)
    np.testing.assert_array_equal(mean, total / count)
    assert (
        (low <= mean + 1e-12).all()
        and (mean <= high + 1e-12).all()
        and (low[count[:, 0] > 1] < high[count[:, 0] > 1]).all()
    )
    negated = gpu3d.bucket_pool(-x.features, x.points, buckets, ratio=ratio, reduce="max")
    np.testing.assert_array_equal(low, -negated.features)
    np.testing.assert_array_equal(pooled["min"].argmember, negated.argmember)
    for r in ("min", "max"):
        members, arg = pooled[r].members[valid(pooled[r].buckets)], pooled[r].argmember[valid(pooled[r].buckets)]
        picked = x.features[np.take_along_axis(members, arg.astype(int), 1), np.arange(4)]
        np.testing.assert_array_equal(picked, pooled[r].features[valid(pooled[r].buckets)])


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_pool_backward_is_finite_differences(ratio, reduce):
    """Pooling is linear if a step changes no order of members, so central differences are exact except for rounding."""
    buckets = layout([1100, 0, 5], 16)
    x = Inputs(*map(np.nan_to_num, inputs(buckets, ratio, 3, "float64")))
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=ratio, reduce=reduce)
    gradient = gpu3d.bucket_pool_backward(x.dpooled, pooled)
    h = 1e-7
    for seed in range(3):
        direction = np.random.default_rng(seed).standard_normal(x.features.shape)

        def loss(step, direction=direction):
            moved = gpu3d.bucket_pool(x.features + step * direction, x.points, buckets, ratio=ratio, reduce=reduce)
            if reduce in ("min", "max"):
                np.testing.assert_array_equal(moved.argmember, pooled.argmember)
            return math.fsum((x.dpooled * moved.features)[valid(pooled.buckets)].reshape(-1))

        slope = (loss(h) - loss(-h)) / (2 * h)
        assert abs(slope - (gradient * direction).sum()) < 1e-6 * np.linalg.norm(gradient)
    rows = gradient[valid(buckets)]
    if reduce in ("sum", "mean"):
        assert (rows != 0).all()
    else:
        assert (rows != 0).sum() == 3 * sum(pooled.buckets.lengths)  # one member for each child and feature


@pytest.mark.parametrize("ratio", RATIOS)
def test_unpool_backward_is_finite_differences(ratio):
    buckets = layout([1100, 0, 5], 16)
    x = Inputs(*map(np.nan_to_num, inputs(buckets, ratio, 3, "float64")))
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=ratio)
    gradients = gpu3d.bucket_unpool_backward(x.dout, pooled)
    h = 1e-7
    for which, gradient in enumerate(gradients):
        direction = np.random.default_rng(which).standard_normal(gradient.shape)

        def loss(step, which=which, direction=direction):
            moved = [x.child, x.skip]
            moved[which] = moved[which] + step * direction
            return math.fsum((x.dout * gpu3d.bucket_unpool(moved[0], pooled, skip=moved[1])).reshape(-1))

        slope = (loss(h) - loss(-h)) / (2 * h)
        assert abs(slope - (gradient * direction).sum()) < 1e-6 * np.linalg.norm(gradient)
        assert (gradient[valid(buckets if which else pooled.buckets)] != 0).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_adjoint(ratio, reduce):
    """<pool(x), y> = <x, pool_backward(y)>, and the same for unpooling: each pass is linear in its input."""
    buckets = layout([1100, 0, 5, 1], 48)
    x = Inputs(*map(np.nan_to_num, inputs(buckets, ratio, 3, "float64")))
    got = run(x, buckets, ratio, reduce)
    pairs = [((got["features"], x.dpooled), (x.features, got["dfeatures"]))]
    pairs += [((got["out"], x.dout), (x.child, got["dchild"]))]
    pairs += [((got["out with skip"] - got["out"], x.dout), (x.skip, got["dskip"]))]
    for left, right in pairs:
        one, two = (math.fsum((a * b).reshape(-1)) for a, b in (left, right))
        assert abs(one) > 1e-3 and abs(one - two) < 1e-10 * np.linalg.norm(left[0]) * np.linalg.norm(left[1])


# ---- NaN and inf ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_nan_reaches_its_own_child_and_feature(ratio, dtype, reduce):
    buckets = layout([150, 60], 16)
    x = inputs(buckets, ratio, 3, dtype)
    clean = run(x, buckets, ratio, reduce)
    x.features[21, 1] = x.dpooled[3, 2] = x.child[4, 0] = x.skip[9, 1] = x.dout[11, 2] = np.nan
    got = run(x, buckets, ratio, reduce)
    members = got["members"]
    child_of = {slot: c for c, group in enumerate(members) for slot in group if slot >= 0}
    expected = {name: np.zeros(y.shape, bool) for name, y in clean.items()}
    expected["features"][child_of[21], 1] = True
    if reduce in ("min", "max"):
        expected["dfeatures"][members[3, got["argmember"][3, 2]], 2] = True
        assert members[child_of[21], got["argmember"][child_of[21], 1]] == 21
    else:
        expected["dfeatures"][members[3], 2] = True
    expected["out"][members[4], 0] = expected["out with skip"][members[4], 0] = expected["out with skip"][9, 1] = True
    expected["dchild"][child_of[11], 2] = expected["dskip"][11, 2] = True
    for name, reached in expected.items():
        np.testing.assert_array_equal(np.isnan(got[name]), reached, err_msg=name)
        if name not in ("argmember", "dfeatures"):  # without the NaN, another member may be the extreme
            np.testing.assert_array_equal(got[name][~reached], clean[name][~reached], err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([np.nan, 1, 2, 3], 0, 0),
        ([1, np.nan, 2, 3], 1, 1),
        ([3, 1, 2, np.nan], 3, 3),
        ([1, np.nan, np.inf, np.nan], 1, 1),  # the first of two NaN
        ([-np.inf, np.nan, np.nan, 7], 1, 1),
        ([np.nan] * 4, 0, 0),
        ([np.inf, -np.inf, 0, 1], 1, 0),
        ([2, 5, 5, 2], 0, 1),  # the first of equal values
        ([0.0, -0.0, 0.0, -0.0], 0, 0),  # 0.0 and -0.0 are equal
        ([-0.0, 0.0, -0.0], 0, 0),
        ([1], 0, 0),
    ],
    ids=str,
)
def test_extremes(values, low, high, dtype):
    for reduce, first in (("min", low), ("max", high)):
        value, pooled = pool_row(values, reduce, dtype=dtype)
        assert pooled.argmember[0, 0] == first and pooled.argmember.dtype == np.uint8
        np.testing.assert_array_equal(float(value), values[first])
        assert np.signbit(value) == np.signbit(np.float64(values[first])) or np.isnan(value)
        gradient = gpu3d.bucket_pool_backward(np.full_like(pooled.features, 3), pooled)
        np.testing.assert_array_equal(np.flatnonzero(gradient[: len(values), 0]), [first])
        assert gradient[first, 0] == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_in_sums(dtype):
    for reduce in ("sum", "mean"):
        assert np.isposinf(float(pool_row([1, np.inf, 2, 3], reduce, dtype=dtype)[0]))
        assert np.isnan(float(pool_row([1, np.inf, -np.inf, 3], reduce, dtype=dtype)[0]))
        assert np.isnan(float(pool_row([1, 2, 3, np.nan], reduce, dtype=dtype)[0]))


def test_non_finite_points():
    """Non-finite points are last on their axis and change only the means of their groups. Others keep their order."""
    n = 900
    points = clouds.lidar_like(n)
    bad = np.random.default_rng(0).permutation(n)[:90]
    points[bad] = np.random.default_rng(1).choice([np.nan, np.inf, -np.inf], (90, 3))
    buckets = layout([n], 16)
    in_slots = np.concatenate([points, np.full((buckets.num_slots - n, 3), np.nan, np.float32)])
    pooled = gpu3d.bucket_pool(in_slots, in_slots, buckets)
    order = pooled.members[pooled.members >= 0]
    np.testing.assert_array_equal(order[-90:], np.sort(bad))  # all in the last voxel, by slot
    good = np.delete(np.arange(n), bad)
    alone_layout = layout([n - 90], 16)
    alone = np.zeros((alone_layout.num_slots, 3), np.float32)
    alone[: n - 90] = points[good]
    members = gpu3d.bucket_pool(alone, alone, alone_layout).members
    last = (np.array(voxels_by_definition(points[good])) == 1023).all(1)
    assert not last.any()  # otherwise a finite point could tie with the others
    np.testing.assert_array_equal(order[: n - 90], good[members[members >= 0]])
    finite = np.isfinite(pooled.points[valid(pooled.buckets)]).all(1)
    assert finite[: (n - 90) // 2].all() and not finite[(n - 90) // 2 :].any()


# ---- the child is a full citizen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_size", [16, 48, 1040])
def test_pooling_twice(bucket_size):
    """The points of a child, taken as a new cloud, pool to the same bits."""
    buckets = layout([0, 5000, 9, 700], bucket_size)
    x = inputs(buckets, 2, 4)
    once = gpu3d.bucket_pool(x.features, x.points, buckets, reduce="max")
    twice = gpu3d.bucket_pool(once.features, once.points, once.buckets, ratio=4, reduce="sum")
    assert twice.buckets.lengths == (0, 625, 2, 88) and twice.parent is once.buckets
    expected = members_by_definition(order_by_definition(once.points, once.buckets), bucket_size, 4)
    assert twice.members.tolist() == [group + [-1] * (4 - len(group)) for group in expected]
    gradient = gpu3d.bucket_pool_backward(gpu3d.bucket_pool_backward(np.ones_like(twice.features), twice), once)
    assert (gradient.sum(0) == sum(once.buckets.lengths)).all()  # the 1 of a grandchild reaches each child once
    back = gpu3d.bucket_unpool(gpu3d.bucket_unpool(twice.features, twice), once)
    assert (back[valid(buckets)] != 0).all() and back.shape == x.features.shape


def test_attention_on_the_child():
    buckets = layout([1000, 0, 130], 16)
    x = inputs(buckets, 2)
    child = gpu3d.bucket_pool(x.features, x.points, buckets).buckets
    same = layout([500, 0, 65], 16)
    arrays = attention_inputs(same, 2, 8)
    got = attend(*arrays, child, gpu3d.scopes(child, 3, shift=1))
    assert_attention_padding(got, child)
    for name, y in attend(*arrays, same, gpu3d.scopes(same, 3, shift=1)).items():
        np.testing.assert_array_equal(got[name], y, err_msg=name)


def test_scatter_gather_and_quality_of_the_child():
    buckets = layout([1000, 0, 130], 48)
    x = inputs(buckets, 4)
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=4)
    packed = pooled.buckets.gather(pooled.points)
    assert packed.shape == (250 + 33, 3)
    np.testing.assert_array_equal(pooled.buckets.scatter(packed), pooled.points)
    radius = gpu3d.bucket_quality(packed, pooled.buckets).mean_radius
    shuffled = np.random.default_rng(0).permutation(packed)
    assert 0 < radius < gpu3d.bucket_quality(shuffled, pooled.buckets).mean_radius


def test_a_pooling_is_frozen():
    buckets, points = line(20)
    pooled = gpu3d.bucket_pool(points, points, buckets)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pooled.ratio = 4


# ---- layouts in memory, libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_gradient_of_a_sum(reduce):
    """The gradient of a sum is one broadcast row."""
    buckets = layout([1100, 30], 16)
    x = inputs(buckets, 4, 6)
    got = run(x._replace(dout=np.broadcast_to(x.dout[0], x.dout.shape)), buckets, 4, reduce)
    assert (got["dskip"][valid(buckets)] == x.dout[0]).all()


def test_libraries_may_differ_on_the_cpu():
    """Results are arrays of the first argument's library."""
    torch = pytest.importorskip("torch")
    buckets = layout([200], 16)
    x = inputs(buckets, 2)
    pooled = gpu3d.bucket_pool(torch.from_numpy(x.features), x.points, buckets, reduce="max")
    arrays = pooled.features, pooled.points, pooled.members, pooled.argmember, pooled.buckets.slot_to_point
    assert all(isinstance(y, torch.Tensor) for y in arrays)
    assert isinstance(gpu3d.bucket_pool_backward(x.dpooled, pooled), np.ndarray)
    assert isinstance(gpu3d.bucket_unpool(x.child, pooled, skip=torch.from_numpy(x.skip)), np.ndarray)
    assert all(isinstance(y, np.ndarray) for y in gpu3d.bucket_unpool_backward(x.dout, pooled))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_on_another_device(reduce):
    """A pooling is moved to a device and used there. NumPy's only device is the CPU."""
    buckets = layout([200, 30], 16)
    x = inputs(buckets, 4, 6)
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets, ratio=4, reduce=reduce)
    moved = pooled.to("cpu")
    assert type(moved) is gpu3d.Pooling and (moved.argmember is None) == (reduce == "mean")
    for name in ("features", "points", "members", "argmember"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(pooled, name))
    assert (moved.buckets.lengths, moved.parent.lengths) == (pooled.buckets.lengths, buckets.lengths)
    np.testing.assert_array_equal(gpu3d.bucket_unpool(x.child, moved), gpu3d.bucket_unpool(x.child, pooled))


def test_a_backward_does_not_cut_gradients_in_silence():
    torch = pytest.importorskip("torch")
    buckets = layout([200], 16)
    x = inputs(buckets, 2)
    pooled = gpu3d.bucket_pool(x.features, x.points, buckets)
    for function, array in ((gpu3d.bucket_pool_backward, x.dpooled), (gpu3d.bucket_unpool_backward, x.dout)):
        tensor = torch.from_numpy(array).requires_grad_()
        with pytest.raises(TypeError, match=r"requires grad.*\.detach\(\)"):
            function(tensor, pooled)
        got, expected = function(tensor.detach(), pooled), function(array, pooled)
        for y, z in zip(*((y,) if not isinstance(y, tuple) else y for y in (got, expected)), strict=True):
            np.testing.assert_array_equal(y.numpy(), z)


# ---- bad input -----------------------------------------------------------------------------------------------------

GOOD_LENGTHS = [100, 28]
SLOTS = 9 * 16
CHILD_SLOTS = 5 * 16


def of(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


NARROW = of(SLOTS, 8, dtype=np.float16)
DTYPE = r"must be float16, bfloat16(, float32 or float64| or float32 on a GPU), got"

# Each row: the call, the changes to a good call, and the error.
BAD = [
    ("pool", {"ratio": 3}, ValueError, "ratio must be 2, 4 or 8, got 3"),
    ("pool", {"ratio": 16}, ValueError, "ratio must be 2, 4 or 8, got 16: pool several times"),
    ("pool", {"ratio": 1}, ValueError, "ratio must be 2, 4 or 8, got 1"),
    ("pool", {"ratio": -2}, ValueError, "ratio must be 2, 4 or 8, got -2"),
    ("pool", {"ratio": 2.0}, TypeError, "ratio must be an integer, got 2.0"),
    ("pool", {"ratio": True}, TypeError, "ratio must be an integer, got True"),
    ("pool", {"ratio": None}, TypeError, "ratio must be an integer, got None"),
    ("pool", {"reduce": "prod"}, ValueError, "reduce must be one of 'sum', 'mean', 'min', 'max', got 'prod'"),
    ("pool", {"reduce": None}, TypeError, "reduce must be one of .*, got None"),
    ("pool", {"reduce": np.array(["sum", "mean"])}, TypeError, r"reduce must be one of .*, got ndarray of shape \[2\]"),
    ("pool", {"ratio": 10**400}, ValueError, "ratio must be 2, 4 or 8, got an int of many digits"),
    ("pool", {"ratio": [2] * 100_000}, TypeError, "ratio must be an integer, got list of length 100000 of type list"),
    ("pool", {"features": of(SLOTS - 16, 8)}, ValueError,
     rf"features must have one row for each of the {SLOTS} slots of buckets, got shape \[128, 8\]: .*buckets.scatter"),
    ("pool", {"features": of(SLOTS)}, ValueError, rf"features must have shape \[num_slots, C\], got \[{SLOTS}\]"),
    ("pool", {"features": of(SLOTS, 2, 4)}, ValueError, rf"got \[{SLOTS}, 2, 4\]: reshape by features.reshape"),
    ("pool", {"features": of(SLOTS, 8, dtype=np.int32)}, TypeError, f"features {DTYPE} int32.*astype"),
    ("pool", {"features": of(SLOTS, 8, dtype=np.uint8)}, TypeError, f"features {DTYPE} uint8"),
    ("pool", {"features": of(SLOTS, 8, dtype=np.bool_)}, TypeError, f"features {DTYPE} bool"),
    ("pool", {"points": of(128, 3)}, ValueError,
     rf"points must have one row for each of the {SLOTS} slots of buckets, got shape \[128, 3\]: .*buckets.scatter"),
    ("pool", {"points": of(SLOTS, 4)}, ValueError, rf"points must have shape \[num_slots, 3\], got \[{SLOTS}, 4\]"),
    ("pool", {"points": of(3, SLOTS, 3)}, ValueError, r"points must have shape \[num_slots, 3\]"),
    ("pool", {"points": of(SLOTS)}, ValueError, r"points must have shape \[num_slots, 3\]"),
    ("pool", {"points": of(SLOTS, 3, dtype=np.int32)}, TypeError, "points must be float32, .*, got int32.*astype"),
    ("pool", {"buckets": [0, 1]}, TypeError, "buckets must be the Buckets that gpu3d.bucketize returns, got list"),
    ("pool_backward", {"pooled": None}, TypeError, "pooled must be the Pooling that .*bucket_pool returns, got None"),
    ("pool_backward", {"dchild_features": of(CHILD_SLOTS, 7)}, ValueError,
     rf"the shape of pooled.features, got \[{CHILD_SLOTS}, 7\] for \[{CHILD_SLOTS}, 8\]"),
    ("pool_backward", {"dchild_features": of(SLOTS, 8)}, ValueError,
     rf"dchild_features must have one row for each of the {CHILD_SLOTS} slots of pooled.buckets, got .*\[{SLOTS}, 8\]"),
    ("pool_backward", {"dchild_features": of(CHILD_SLOTS)}, ValueError, "dchild_features must have shape"),
    ("pool_backward", {"dchild_features": of(CHILD_SLOTS, 8, dtype=np.float16)}, TypeError,
     r"dchild_features must have the dtype of pooled.features, got float16 for float32: .*astype\('float32'\)"),
    ("pool_backward", {"dchild_features": of(CHILD_SLOTS, 8, dtype=np.int64)}, TypeError, f"{DTYPE} int64"),
    ("unpool", {"pooled": of(2)}, TypeError, "pooled must be the Pooling"),
    ("unpool", {"child_features": of(SLOTS, 8)}, ValueError,
     rf"child_features must have one row for each of the {CHILD_SLOTS} slots of pooled.buckets"),
    ("unpool", {"child_features": of(CHILD_SLOTS)}, ValueError, "child_features must have shape"),
    ("unpool", {"child_features": of(CHILD_SLOTS, 8, dtype=np.int8)}, TypeError, f"child_features {DTYPE} int8"),
    ("unpool", {"skip": of(CHILD_SLOTS, 8)}, ValueError,
     rf"skip must have one row for each of the {SLOTS} slots of pooled.parent, got shape \[{CHILD_SLOTS}, 8\]"),
    ("unpool", {"skip": of(SLOTS, 7)}, ValueError,
     rf"skip must have the 8 columns of child_features, got shape \[{SLOTS}, 7\]"),
    ("unpool", {"skip": of(SLOTS)}, ValueError, "skip must have shape"),
    ("unpool", {"skip": NARROW}, TypeError, "skip must have the dtype of child_features, got float16 for float32"),
    ("unpool", {"skip": of(SLOTS, 8, dtype=np.int32)}, TypeError, f"skip {DTYPE} int32"),
    ("unpool_backward", {"pooled": "x"}, TypeError, "pooled must be the Pooling .*, got str"),
    ("unpool_backward", {"dout": of(CHILD_SLOTS, 8)}, ValueError,
     rf"dout must have one row for each of the {SLOTS} slots of pooled.parent, got shape \[{CHILD_SLOTS}, 8\]"),
    ("unpool_backward", {"dout": of(SLOTS)}, ValueError, "dout must have shape"),
    ("unpool_backward", {"dout": of(SLOTS, 8, dtype=np.int32)}, TypeError, f"dout {DTYPE} int32"),
]  # fmt: skip


def good_calls(asarray):
    """The arguments of a good call of each function."""
    buckets = gpu3d.bucketize(asarray(clouds.uniform(128)), 16, lengths=GOOD_LENGTHS)
    pool = {"features": asarray(of(SLOTS, 8)), "points": asarray(of(SLOTS, 3)), "buckets": buckets}
    pooled = gpu3d.bucket_pool(**pool)
    assert tuple(pooled.features.shape) == (CHILD_SLOTS, 8)
    child = asarray(of(CHILD_SLOTS, 8))
    return {
        "pool": pool,
        "pool_backward": {"dchild_features": child, "pooled": pooled},
        "unpool": {"child_features": child, "pooled": pooled, "skip": asarray(of(SLOTS, 8))},
        "unpool_backward": {"dout": asarray(of(SLOTS, 8)), "pooled": pooled},
    }


def assert_refused(call, arguments, error, message, asarray):
    good = good_calls(asarray)[call]
    function = getattr(gpu3d, f"bucket_{call}")
    function(**good)
    numbers = {name: y for name, y in arguments.items() if isinstance(y, np.ndarray) and y.dtype.kind != "U"}
    bad = arguments | {name: asarray(y) for name, y in numbers.items()}
    with pytest.raises(error, match=message):
        function(**{**good, **bad})


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(call, arguments, error, message):
    assert_refused(call, arguments, error, message, np.asarray)


def test_points_in_their_own_order_are_seen():
    points = clouds.uniform(100)
    buckets = gpu3d.bucketize(points, 64)
    with pytest.raises(ValueError, match=r"features must have one row for each of the 128 slots.*buckets.scatter"):
        gpu3d.bucket_pool(points, points, buckets)
    with pytest.raises(ValueError, match=r"points must have one row for each of the 128 slots.*buckets.scatter"):
        gpu3d.bucket_pool(buckets.scatter(points), points, buckets)


def test_ratio_and_reduce_are_keywords():
    buckets, points = line(20)
    with pytest.raises(TypeError, match="positional"):
        gpu3d.bucket_pool(points, points, buckets, 4)
    assert gpu3d.bucket_pool(points, points, buckets, ratio=np.int64(4)).members.shape == (16, 4)


def test_no_features():
    buckets = layout([50], 16)
    for reduce in REDUCTIONS:
        x = inputs(buckets, 4, 0)
        got = run(x, buckets, 4, reduce)
        assert got["features"].shape == got["dchild"].shape == (16, 0) and got["out"].shape == (64, 0)
        expected = run(inputs(buckets, 4, 2), buckets, 4, reduce)
        for name in ("points", "members"):
            np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_point(dtype):
    buckets = layout([1], 16)
    for reduce in REDUCTIONS:
        x = inputs(buckets, 8, 2, dtype)
        got = run(x, buckets, 8, reduce)
        assert got["members"][0].tolist() == [0] + [-1] * 7
        np.testing.assert_array_equal(got["features"][0], x.features[0])
        np.testing.assert_array_equal(got["points"][0], x.points[0])
        np.testing.assert_array_equal(got["dfeatures"][0], x.dpooled[0])
        np.testing.assert_array_equal(got["out"][0], x.child[0])
        np.testing.assert_array_equal(got["dchild"][0], x.dout[0])
        assert_padding(got, buckets, layout([1], 16))
