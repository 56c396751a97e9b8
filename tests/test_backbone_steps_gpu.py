# SPDX-License-Identifier: Apache-2.0
"""Attention, pooling, scopes and moves as steps of a longer plan: the same numbers as the ops, in poisoned memory."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
from steps import assert_accurate, run
from test_attention import inputs, layout, valid
from test_buckets import scopes_by_definition
from test_layers_gpu import Layout, random

import gpu3d
from gpu3d import _arrays
from gpu3d._arrays import INT32, Spec
from gpu3d.attention import attention_backward_results, attention_results
from gpu3d.cuda import attention, buckets, clouds, launcher, pooling
from gpu3d.cuda.plan import Number
from gpu3d.reference import pooling as reference

pytestmark = pytest.mark.gpu

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = _arrays.FLOATS
DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
RAGGED = (0, 700, 1, 16, 0, 333, 0)
LENGTHS = (RAGGED, (2100, 5), tuple(range(70)))  # the table of 70 clouds lies in device memory


def name_of(dtype):
    return dtype.name


# ---- attention -----------------------------------------------------------------------------------------------------


def launched(cp, call, arrays, results):
    """The results of a plan of the op, on the host."""
    given = [_arrays.read(cp.asarray(x), "an input") for x in arrays]
    return [x.get() for x in launcher.launch(call, given, results)]


def check_packed(cp, lengths, bucket_size, window, dim, dtype, device, heads=3):
    """The steps give the bits of the op. Rows are NaN in padding."""
    host = layout(lengths, bucket_size)
    q, k, v, dout = inputs(host, heads, dim, dtype)
    size, shift, stride = window
    table = gpu3d.scopes(host, size, shift=shift, stride=stride).table
    scale = dim**-0.5
    spec, of_lse, of_table = Spec(q.shape, dtype), Spec(q.shape[:2], FLOAT32), Spec(table.shape, INT32)
    options = host.lengths, bucket_size, scale

    call = attention.attention(spec, spec, spec, of_table, *options, True, device)
    out, lse = launched(cp, call, (q, k, v, table), attention_results(spec))
    call = attention.attention_backward(*[spec] * 5, of_lse, of_table, *options, device)
    gradients = launched(cp, call, (dout, q, k, v, out, lse, table), attention_backward_results(spec))

    batch, largest = attention.layout_of(host.lengths, bucket_size)
    count = len(host.lengths)
    shape = attention.shape_of(count, largest, bucket_size, q.shape, dtype, table.shape, device)
    numbers, qkv = {"level 2": batch}, np.stack([q, k, v], 1)

    def add(steps, given, made):
        argument = clouds.argument(steps, "level 2", shape.clouds, bucket_size)
        attention.add_packed(steps, shape, *given, argument, scale, *made)

    got = run(cp, add, [qkv, table], [(q.shape, dtype), (lse.shape, FLOAT32)], numbers)
    for name, a, b in zip(("out", "lse"), got, (out, lse), strict=True):
        assert a.tobytes() == b.tobytes(), f"{name} {lengths}"

    def add_backward(steps, given, made):
        argument = clouds.argument(steps, "level 2", shape.clouds, bucket_size)
        attention.add_packed_backward(steps, shape, *given, argument, len(q), scale, *made)

    (dqkv,) = run(cp, add_backward, [dout, qkv, out, lse, table], [(qkv.shape, dtype)], numbers)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert dqkv[:, i].tobytes() == gradients[i].tobytes(), f"{name} {lengths}"
    assert not dqkv[~valid(host)].view(np.uint8).any()


WINDOWS = ((9, 2, 1), (4, -1, 2))  # size, shift, stride


@pytest.mark.parametrize("arch", [None, "sm_80"], ids=["tilings of the GPU", "tilings of other GPUs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
def test_packed_attention(cp, dim, dtype, arch):
    device = launcher.device(cp.cuda.Device().id)
    device = device._replace(arch=arch or device.arch)
    for lengths, bucket_size, window in itertools.product(LENGTHS, (16, 64), WINDOWS):
        check_packed(cp, lengths, bucket_size, window, dim, dtype, device)
    check_packed(cp, RAGGED, 16, WINDOWS[0], dim - 8, dtype, device)  # columns that the kernel pads
    check_packed(cp, (0, 0), 16, WINDOWS[0], dim, dtype, device)


def test_small_steps(cp):
    """For compute-sanitizer: every step, with few rows."""
    device = launcher.device(cp.cuda.Device().id)
    for dim, dtype in ((24, FLOAT16), (64, BFLOAT16), (32, FLOAT32), (128, FLOAT32)):
        check_packed(cp, (0, 200, 1, 70), 16, (9, 2, 1), dim, dtype, device, 2)
    check_pooling(cp, (0, 200, 1, 70), 16, 2, 24, BFLOAT16)
    check_groups(cp, (0, 200, 1, 70), 16, 2, FLOAT32)
    check_scopes(cp, (0, 200, 1, 70), 16, 3, 1, 2)
    check_move(cp, random((90, 3), FLOAT32), 100, 7.5)


# ---- pooling -------------------------------------------------------------------------------------------------------


def composed_members(parents, children, ratio):
    """Members between layouts of any order: children in random slots, each with random slots of its cloud's parents.

    One child of each cloud may have fewer than the others.
    """
    members = np.full((children.slots, ratio), -1, np.int32)
    rng = np.random.default_rng(19)
    for b, n in enumerate(parents.lengths):
        groups = np.full((children.lengths[b], ratio), -1, np.int32)
        groups.reshape(-1)[:n] = parents.slot_of[b] + rng.permutation(n)
        members[children.point_to_slot[children.point_of[b] :][: len(groups)]] = groups
    return members


def sums_of(x, members):
    return reference.bucket_unpool_backward(x, members)[0]


def means_of(x, members):
    """Sum and division in float32, or in float64 if x is float64; then one rounding to x's dtype."""
    wide = x.astype(FLOAT64 if x.dtype == FLOAT64 else FLOAT32)
    counts = np.maximum((members >= 0).sum(1, keepdims=True), 1)
    return (sums_of(wide, members) / counts.astype(wide.dtype)).astype(x.dtype)


def assert_is(got, function, x, *rest):
    """Assert that `got` has the bits of the reference on x, and is accurate beside the reference in float64."""
    expected = function(x, *rest)
    wide = [y.astype(FLOAT64) if isinstance(y, np.ndarray) and y.dtype in DTYPES else y for y in (x, *rest)]
    assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes(), function.__name__
    if got.size and np.abs(expected.astype(FLOAT64)).max() > 0:
        assert_accurate(got, expected, function(*wide), function.__name__)


class Pooled:
    """Two stage layouts in random order, the members between them, and random rows with NaN in padding."""

    def __init__(self, lengths, bucket_size, ratio, columns, dtype, seed=20):
        self.parents = Layout(lengths, bucket_size, seed)
        self.children = Layout([-(-n // ratio) for n in lengths], bucket_size, seed + 1)
        self.members = composed_members(self.parents, self.children, ratio)
        self.layout = pooling.layout_of(tuple(lengths), bucket_size, ratio)
        self.dtype, self.columns, self.sizes = dtype, columns, {"columns": columns, "dtype": dtype}
        assert self.layout.shape.slots == self.children.slots

    def rows(self, of, seed):
        x = random((of.slots, self.columns), self.dtype, seed)
        x[of.slot_to_point < 0] = np.nan
        return x

    def made(self, of):
        return (of.slots, self.columns), self.dtype

    def numbers(self, level):
        return {f"parents {level}": self.layout.parents}

    def batch_of_parents(self, steps, level):
        """The struct Clouds of the parents."""
        shape = self.layout.shape
        return clouds.argument(steps, f"parents {level}", shape.clouds, shape.bucket_size)


def check_pooling(cp, lengths, bucket_size, ratio, columns, dtype):
    """All four steps. The reference gives the bits, and in float64 the exact numbers."""
    case = Pooled(lengths, bucket_size, ratio, columns, dtype)
    shape, members, slots = case.layout.shape, case.members, case.parents.slots
    features, skip, dout = (case.rows(case.parents, seed) for seed in (22, 23, 24))
    child = case.rows(case.children, 25)
    numbers = case.numbers(0)
    for mean, function in ((False, sums_of), (True, means_of)):

        def add_pool(steps, given, made, mean=mean):
            pooling.add_pool(steps, shape, *given, *made, **case.sizes, mean=mean)

        def add_pool_backward(steps, given, made, mean=mean):
            args = *given, case.batch_of_parents(steps, 0), *made
            pooling.add_pool_backward(steps, shape, *args, **case.sizes, mean=mean)

        (got,) = run(cp, add_pool, [features, members], [case.made(case.children)])
        assert_is(got, function, features, members)
        (got,) = run(cp, add_pool_backward, [child, members], [case.made(case.parents)], numbers)
        assert_is(got, reference.bucket_pool_backward, child, members, None, slots, "mean" if mean else "sum")
        assert not got[case.parents.slot_to_point < 0].view(np.uint8).any()

    def add_unpool(steps, given, made):
        pooling.add_unpool(steps, shape, *given, case.batch_of_parents(steps, 0), *made, **case.sizes)

    for skipped in (None, skip):
        (got,) = run(cp, add_unpool, [child, members, skipped], [case.made(case.parents)], numbers)
        assert_is(got, reference.bucket_unpool, child, members, skipped, slots)
        assert not got[case.parents.slot_to_point < 0].view(np.uint8).any()

    def add_unpool_backward(steps, given, made):
        pooling.add_unpool_backward(steps, shape, *given, *made, **case.sizes)

    (got,) = run(cp, add_unpool_backward, [dout, members], [case.made(case.children)])
    assert_is(got, sums_of, dout, members)


@pytest.mark.parametrize("ratio", reference.RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pooling(cp, dtype, ratio):
    for lengths, bucket_size in itertools.product((*LENGTHS, (0, 0)), (16, 512)):
        for columns in (3, 64):
            check_pooling(cp, lengths, bucket_size, ratio, columns, dtype)
    check_pooling(cp, (34_688,), 512, ratio, 256, dtype)


def check_levels(cp, lengths, ratio, columns, dtype):
    """Down two levels and up again. The tables of both levels stand in one plan."""
    upper = Pooled(lengths, 16, ratio, columns, dtype)
    lower = Pooled(upper.children.lengths, 16, ratio, columns, dtype, 30)
    features = upper.rows(upper.parents, 26)

    def add(steps, given, made):
        features, *members = given
        layouts = upper.children, lower.children, lower.parents
        first, second, up = (steps.workspace("rows", of.slots * columns * dtype.itemsize) for of in layouts)
        for case, source, its, out in ((upper, features, members[0], first), (lower, first, members[1], second)):
            pooling.add_pool(steps, case.layout.shape, source, its, out, **case.sizes)
        args = lower.layout.shape, second, members[1], first, lower.batch_of_parents(steps, 1), up
        pooling.add_unpool(steps, *args, **lower.sizes)
        args = upper.layout.shape, up, members[0], features, upper.batch_of_parents(steps, 0), *made
        pooling.add_unpool(steps, *args, **upper.sizes)

    numbers = {**upper.numbers(0), **lower.numbers(1)}
    (got,) = run(cp, add, [features, upper.members, lower.members], [upper.made(upper.parents)], numbers)
    first = means_of(features, upper.members)
    second = means_of(first, lower.members)
    up = reference.bucket_unpool(second, lower.members, first, lower.parents.slots)
    assert got.tobytes() == reference.bucket_unpool(up, upper.members, features, upper.parents.slots).tobytes()


def test_levels_in_one_plan(cp):
    for lengths in LENGTHS:
        check_levels(cp, lengths, 2, 64, BFLOAT16)


def check_groups(cp, lengths, bucket_size, ratio, dtype):
    """Children, members and the children's layout are those of bucket_pool."""
    parents = Layout(lengths, bucket_size, 27)
    points = random((parents.slots, 3), dtype, 28, 10.0)
    points[parents.slot_to_point < 0] = np.nan
    found = pooling.layout_of(tuple(lengths), bucket_size, ratio)
    shape = found.shape

    def add(steps, given, made):
        of_parents, of_children = (
            clouds.argument(steps, name, shape.clouds, bucket_size) for name in ("level 3", "level 4")
        )
        pooling.add_groups(steps, shape, *given, dtype, of_parents, of_children, made)

    no_features = np.zeros((parents.slots, 0), FLOAT32)
    _, child_points, members, _, *rest = reference.bucket_pool(no_features, points, bucket_size, lengths, ratio, "sum")
    expected = members, child_points, *rest
    made = [(x.shape, x.dtype) for x in expected]
    numbers = {"level 3": found.parents, "level 4": found.children}
    for got, right in zip(run(cp, add, [points], made, numbers), expected, strict=True):
        assert got.tobytes() == right.tobytes()


@pytest.mark.parametrize("ratio", reference.RATIOS)
@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT64], ids=name_of)
def test_groups(cp, dtype, ratio):
    for lengths, bucket_size in itertools.product(LENGTHS, (16, 512)):
        check_groups(cp, lengths, bucket_size, ratio, dtype)


# ---- scopes and moves ----------------------------------------------------------------------------------------------


def check_scopes(cp, lengths, bucket_size, size, shift, stride):
    counts = [-(-n // bucket_size) for n in lengths]
    expected = np.array(scopes_by_definition(counts, size, shift, stride), np.int32).reshape(-1, size)
    table = buckets.scopes_of(counts, bucket_size, size, stride)
    assert table.groups == len(expected)

    def add(steps, given, made, shift=shift):
        batch = clouds.argument(steps, "level 5", len(lengths), bucket_size)
        buckets.add_scopes(steps, batch, table.groups, size, shift, stride, *made)

    (got,) = run(cp, add, [], [(expected.shape, INT32)], {"level 5": table})
    np.testing.assert_array_equal(got, expected)
    numbers = {"level 5": table, "shift 5": shift}
    (got,) = run(cp, partial(add, shift=Number("shift 5")), [], [(expected.shape, INT32)], numbers)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("shift", [0, 4, -3, 100])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_scopes(cp, size, shift, stride):
    for lengths, bucket_size in itertools.product(LENGTHS, (16, 64)):
        check_scopes(cp, lengths, bucket_size, size, shift, stride)


def check_move(cp, source, count, fill):
    """The rows of a random index with gaps. The number of rows is known when the plan runs."""
    index = np.random.default_rng(29).integers(-1, len(source), count).astype(np.int32)
    pattern, row_bytes = buckets.fill_pattern(np.array(fill, source.dtype)), source[0].nbytes
    expected = np.where(index.reshape(-1, *[1] * (source.ndim - 1)) < 0, np.array(fill, source.dtype), source[index])

    def add(steps, given, made):
        sizes = {"rows": Number("rows 6"), "most": count + 1000, "row_bytes": row_bytes}
        buckets.add_move(steps, *given, *made, **sizes, word=math.gcd(16, row_bytes), fill=pattern)

    (got,) = run(cp, add, [source, index], [(expected.shape, source.dtype)], {"rows 6": count})
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("fill", [0, -1])
@pytest.mark.parametrize("columns", [1, 3, 4, 24, 64, 1000])
@pytest.mark.parametrize("dtype", [*DTYPES, INT32], ids=name_of)
def test_moves(cp, dtype, columns, fill):
    for rows, count in itertools.product((1, 100, 3000), (1, 33, 5000)):
        check_move(cp, random((rows, columns), dtype, 31, 100.0), count, fill)
