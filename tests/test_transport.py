# SPDX-License-Identifier: Apache-2.0
"""apml and its plan on the CPU: definition, dense plan, laws, SciPy's assignment, ties, max_entries, bad input."""

from __future__ import annotations

import itertools
import math
import time
import types

import clouds
import contract
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_neighbors import DTYPES, INDEX, assert_same_bits, of, ragged

import gpu3d
from gpu3d import _arrays, transport
from gpu3d.reference import transport as reference

KINDS = clouds.TRANSPORTS
SYMMETRIZATIONS = ("mean", "min")
REDUCTIONS = ("mean", "sum", "none")
RAGGED = (([300], [200]), ([40, 1, 7, 90], [30, 5, 1, 60]), ([12] * 20, [9 + i for i in range(20)]), ([1, 1], [1, 2]))
DEFAULTS = {"p_min": 0.8, "threshold": 1e-8, "iterations": 20, "symmetrize": "mean"}
SETTINGS = (
    {},
    {"symmetrize": "min"},
    {"threshold": 0.3},  # keeps little more than the nearest points
    {"threshold": 1e-40, "p_min": 0.1},
    {"p_min": 0.9999999, "iterations": 1},
    {"symmetrize": "min", "threshold": 1e-3, "iterations": 3},
)
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # of gradients in these dtypes


# ---- what the results must be (test_apml_gpu.py too) ---------------------------------------------------------------


def same(y):
    return y


def options(**changes):
    return reference.Options(**{**DEFAULTS, **changes})


def relative(got, exact):
    norm = np.linalg.norm(exact)
    return np.linalg.norm(np.asarray(got, np.float64) - exact) / (norm if norm else 1)


def split(points, lengths):
    return np.split(points, np.cumsum(lengths)[:-1])


def count_entries(x, y, **changes):
    """The number of entries that max_entries counts, for one pair of clouds, from all pairs of points."""
    a, b = (reference.widened(points, reference.dtype_of(x, y)) for points in (x, y))
    c = reference._distances(a[:, None], b)
    return sum(int(reference._dense_side(side, options(**changes))[0].sum()) for side in (c, c.T))


def check(x, y, x_lengths=None, y_lengths=None, as_array=same, back=same, note="", **changes):
    """Check plan, losses and gradients against the dense definition in float64. Returns the plan in NumPy."""
    x_lengths, y_lengths = x_lengths or [len(x)], y_lengths or [len(y)]
    pairs = list(zip(split(x, x_lengths), split(y, y_lengths), strict=True))
    exact = [reference.dense(a, b, options(**changes)) for a, b in pairs]
    note = f"{note} {x.dtype} {x_lengths[:5]} {y_lengths[:5]} {changes}"
    device, lengths = (as_array(x), as_array(y)), {"pred_lengths": x_lengths, "target_lengths": y_lengths}
    room = sum(count_entries(*pair, **changes) for pair in pairs)
    none_if_allowed = None if room <= reference.default_limit(len(x) + len(y)) else room

    plan = gpu3d.apml_plan(*device, max_entries=none_if_allowed, **lengths, **changes)
    rows, cols, values, indptr = plan = gpu3d.ApmlPlan(*(back(part) for part in plan))
    assert [part.dtype for part in plan] == [np.int32, np.int32, np.float32, np.int64]
    np.testing.assert_array_equal(indptr, np.searchsorted(rows, np.arange(len(x) + 1)), note)
    row = column = 0
    for dense, (a, b) in zip(exact, pairs, strict=True):
        here = slice(indptr[row], indptr[row + len(a)])
        expected = np.nonzero(dense.support)
        np.testing.assert_array_equal(rows[here] - row, expected[0], note)
        np.testing.assert_array_equal(cols[here] - column, expected[1], note)
        np.testing.assert_allclose(values[here], dense.plan[expected], rtol=0, atol=1e-5, err_msg=note)
        row, column = row + len(a), column + len(b)
    assert len(rows) == sum(int(dense.support.sum()) for dense in exact)

    losses, dtype = np.array([dense.loss for dense in exact]), reference.dtype_of(x, y)
    for reduction in REDUCTIONS:
        given = {**lengths, **changes, "reduction": reduction}
        loss, gradients = gpu3d.apml_value_and_grad(*device, max_entries=room, **given)
        alone = gpu3d.apml(*device, max_entries=none_if_allowed, **given)
        assert_same_bits([back(alone)], [back(loss)], note)
        with np.errstate(over="ignore"):
            total = dtype.type({"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction])
        assert back(loss).dtype == dtype and back(loss).shape == total.shape
        np.testing.assert_allclose(back(loss), total, rtol=1e-5, err_msg=note)
        of_pred, of_target = [dense.dpred for dense in exact], [dense.dtarget for dense in exact]
        for got, expected, points in zip(map(back, gradients), (of_pred, of_target), (x, y), strict=True):
            assert got.dtype == points.dtype and got.shape == points.shape
            expected = np.concatenate(expected)[:, : points.shape[1]] / (len(exact) if reduction == "mean" else 1)
            assert relative(got, expected) <= 1e-4 + ROUNDING.get(points.dtype.name, 0), note
    return plan


def check_room(x, y, as_array=same, back=same, **changes):
    """Check max_entries that is exact, larger, and one too small, which gives NaN and never a partial result."""
    device, found = (as_array(x), as_array(y)), count_entries(x, y, **changes)
    expected = gpu3d.apml_value_and_grad(*device, max_entries=found, **changes)
    assert np.isfinite(back(expected.loss)) and all(np.abs(back(g)).sum() > 0 for g in expected.gradients)
    got = gpu3d.apml_value_and_grad(*device, max_entries=found + 1000, **changes)
    assert_same_bits(map_all(back, (got.loss, *got.gradients)), map_all(back, (expected.loss, *expected.gradients)))
    for short in (found - 1, found // 2, 0):
        for reduction in REDUCTIONS:
            given = {**changes, "reduction": reduction, "max_entries": short}
            loss, gradients = gpu3d.apml_value_and_grad(*device, **given)
            assert all(np.isnan(back(z)).all() for z in (loss, *gradients, gpu3d.apml(*device, **given)))
        with pytest.raises(ValueError, match=f"keep {found} entries, more than max_entries = {short}; row .*={found}"):
            gpu3d.apml_plan(*device, max_entries=short, **changes)


def outliers(n=1000, far=200):
    """A pred with `far` points that are nearest to one point of target, and all other points within twice the gap."""
    rng = np.random.default_rng(0)
    x, y = rng.random((n, 3)), rng.random((n, 3))
    x[7 : 7 + far] = [100, 0, 0] + 0.01 * rng.random((far, 3))
    y[3] = [50, 0, 0]
    return x.astype(np.float32), y.astype(np.float32)


def check_outliers(as_array=same):
    x, y = outliers()
    keeps = rf"keep {count_entries(x, y)} entries, more than max\(64 \* \(N \+ M\), 2\*\*24\) = 128000"
    message = keeps + "; row 7 of pred alone keeps 1000"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "default_limit", lambda points: 64 * points)  # without 2**24, which takes large clouds
        for function in (gpu3d.apml, gpu3d.apml_value_and_grad, gpu3d.apml_plan):
            with pytest.raises(ValueError, match=message + ".*pass max_entries="):
                function(as_array(x), as_array(y))
            with pytest.raises(ValueError, match="row 7 of target alone keeps 1000"):
                function(as_array(y), as_array(x))


def check_edge_of_the_ball(as_array=same, back=same):
    """Nine points at distance 4, where exp(-(C - d1) T) is a rounding from the threshold: all keep them, or none."""
    x = np.zeros((1, 3), np.float32)
    y = np.zeros((40, 3), np.float32)
    y[:, 0] = [1, 2, *[4] * 9, *range(10, 39)]
    at, kept = math.exp(-3 * reference.log_mass(40, 0.8)), set()
    for step in range(-8, 9):
        threshold = at * (1 + step * 2.0**-52)
        check(x, np.roll(y, step, axis=0), as_array=as_array, back=back, threshold=threshold)
        check_room(x, np.roll(y, step, axis=0), as_array=as_array, back=back, threshold=threshold)
        kept.add(count_entries(x, y, threshold=threshold))
    assert kept == {2 + 40, 11 + 40}


def map_all(back, results):
    return [back(y) for y in results]


# ---- the definition ------------------------------------------------------------------------------------------------


def plan_by_definition(x, y, p_min, threshold, iterations, symmetrize):
    """The plan as a dict of entries, computed one number at a time."""
    c = [[math.dist(a, b) for b in y.tolist()] for a in x.tolist()]

    def choices(costs):
        """For each row a dict {column: weight}."""
        for row in costs:
            d1, *others = sorted(row)
            temperature = math.log(len(others) / (1 - p_min)) / max(others[0] - d1, 1e-8) if others else 0
            k = {j: math.exp(-(d - d1) * temperature) for j, d in enumerate(row)}
            k = {j: weight for j, weight in k.items() if weight > threshold or threshold == 0}
            yield {j: weight / sum(k.values()) for j, weight in k.items()}

    p1 = {(i, j): weight for i, row in enumerate(choices(c)) for j, weight in row.items()}
    p2 = {(i, j): weight for j, row in enumerate(choices(zip(*c, strict=True))) for i, weight in row.items()}
    if symmetrize == "mean":
        plan = {pair: (p1.get(pair, 0) + p2.get(pair, 0)) / 2 for pair in {*p1, *p2}}
    else:
        plan = {pair: min(p1[pair], p2[pair]) for pair in {*p1} & {*p2}}
        rows, columns = {i for i, _ in plan}, {j for _, j in plan}
        plan |= {(i, j): weight for (i, j), weight in p1.items() if i not in rows}
        plan |= {(i, j): weight for (i, j), weight in p2.items() if j not in columns}
    for _ in range(iterations):
        for axis in (0, 1):
            sums = {}
            for pair, weight in plan.items():
                sums[pair[axis]] = sums.get(pair[axis], 0) + weight
            plan = {pair: weight / (sums[pair[axis]] + 1e-8) for pair, weight in plan.items()}
    return plan


@pytest.mark.parametrize("changes", [*SETTINGS, {"threshold": 0, "p_min": 0.1}, {"iterations": 0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_definition(kind, changes):
    changes = {**DEFAULTS, **changes}
    for n, m in ((1, 1), (1, 6), (6, 1), (2, 2), (2, 9), (12, 17), (30, 20)):
        x, y = clouds.transport(kind, n, m)
        expected = plan_by_definition(x, y, **changes)
        support, plan, loss, dpred, dtarget = reference.dense(x, y, options(**changes))
        assert {(int(i), int(j)) for i, j in np.argwhere(support)} == {*expected}
        assert math.isclose(plan.sum(), sum(expected.values()), rel_tol=1e-9)
        dx, dy, total = np.zeros((n, 3)), np.zeros((m, 3)), 0.0
        for (i, j), weight in expected.items():
            assert math.isclose(plan[i, j], weight, rel_tol=1e-6, abs_tol=1e-12)
            v = x[i].astype(float) - y[j]
            total += weight * math.hypot(*v)
            dx[i] += weight * v / math.hypot(*v)
            dy[j] -= weight * v / math.hypot(*v)
        assert math.isclose(loss, total, rel_tol=1e-6) and total > 0
        assert relative(dpred, dx) < 1e-6 and relative(dtarget, dy) < 1e-6
        assert dx.any(axis=1).all() and dy.any(axis=1).all()


def test_one_pair_of_pairs_by_hand():
    """Two points at distance 1 in both clouds: the second has (1 - p_min) / (M - 1) times the weight of the first."""
    x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    plan = gpu3d.apml_plan(x, x, p_min=0.8)
    np.testing.assert_allclose(plan.values, [1 / 1.2, 0.2 / 1.2, 0.2 / 1.2, 1 / 1.2], rtol=1e-6)
    loss, (dx, dy) = gpu3d.apml_value_and_grad(x, x, p_min=0.8)
    assert math.isclose(loss, 2 * 0.2 / 1.2, rel_tol=1e-6)
    np.testing.assert_allclose(dx, [[-0.2 / 1.2, 0, 0], [0.2 / 1.2, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(dy, dx, rtol=1e-6)


# ---- the sparse plan against the dense one -------------------------------------------------------------------------


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_clouds(kind, changes):
    for n, m in ((700, 600), (300, 800)):
        check(*clouds.transport(kind, n, m), note=kind, **changes)


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
def test_sizes(symmetrize):
    sizes = (1, 2, 3, 7, 8, 9, 33)
    for kind, n, m in itertools.product(("near", "independent"), sizes, sizes):
        check(*clouds.transport(kind, n, m, seed=n), note=kind, symmetrize=symmetrize)


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("name", clouds.degenerate(10))
def test_special_clouds(name, symmetrize):
    points = clouds.degenerate(250)[name]
    for other in (points[::-1].copy(), clouds.uniform(150), points[:100] * np.float32(1.01)):
        check(points, other, note=name, symmetrize=symmetrize)
        check(other, points, note=name, symmetrize=symmetrize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x_lengths", "y_lengths"), RAGGED)
def test_ragged_batches(x_lengths, y_lengths, dtype):
    for symmetrize in SYMMETRIZATIONS:
        check(*ragged(x_lengths, y_lengths, dtype=dtype), x_lengths, y_lengths, symmetrize=symmetrize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_dtypes_and_dimensions(dimensions, dtype):
    x, y = (p[:, :dimensions].astype(DTYPES[dtype]) for p in clouds.transport("shell", 150, 200))
    check(x, y)
    for other in DTYPES.values():
        check(x.astype(other), y)
    if dimensions == 2:
        flat = (np.concatenate([p, np.zeros((len(p), 1), p.dtype)], axis=1) for p in (x, y))
        loss, gradients = gpu3d.apml_value_and_grad(x, y)
        expected, (dx, dy) = gpu3d.apml_value_and_grad(*flat)
        assert_same_bits((loss, *gradients), (expected, dx[:, :2], dy[:, :2]))
        assert not dx[:, 2].any() and not dy[:, 2].any()


def check_map_coordinates(as_array=same, back=same):
    """A spacing of 1e-3 near 1e6, where float32 has steps of 6e-2."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 40, (300, 3)) / 1024 for _ in range(2))  # exact, also after the shift
    shift = np.array([1e6, 2e6, 300])
    moved = check(x + shift, y + shift, as_array=as_array, back=back)
    assert_same_bits(moved, check(x.astype(np.float32), y.astype(np.float32), as_array=as_array, back=back))
    single = ((p + shift).astype(np.float32) for p in (x, y))
    assert len(gpu3d.apml_plan(*map(as_array, single), max_entries=10**6).rows) != len(moved.rows)


def test_map_coordinates():
    check_map_coordinates()


def check_strays(as_array=same, back=same):
    """In float64 the plan is the dense one, wherever stray points lie, and the others keep the same points."""
    for stray in (0.0, -99999.0, 1e30):
        rng = np.random.default_rng(0)
        x, y = (rng.random((n, 3)) * [20, 20, 2] + [5e5, 4.2e6, 100] for n in (150, 120))
        alone = gpu3d.apml_plan(*map(as_array, (x, y)))
        x, y = np.append(x, np.full((1, 3), stray), 0), np.append(y, np.full((1, 3), stray) + 1, 0)
        given = {"note": f"stray {stray}", "as_array": as_array, "back": back}
        plan = check(x, y, **given)
        check(x, y, symmetrize="min", **given)
        check(x, y.astype(np.float32), **given)
        pairs = zip(plan.rows.tolist(), plan.cols.tolist(), strict=True)
        kept, near = {(i, j) for i, j in pairs if i < 150 and j < 120}, set(zip(*map(back, alone[:2]), strict=True))
        # T depends on the number of points, so a ball is a little smaller.
        assert kept <= near and len(kept) > 0.95 * len(near)


def test_strays_of_float64():
    check_strays()


def test_real_sweeps(data_dir):
    seen = 0
    for name, points in itertools.islice(clouds.real(data_dir), 6):
        points = points[np.isfinite(points).all(axis=1)][::17][:500]
        check(points[::2], points[1::2], note=name)
        seen += 1
    assert seen == 6


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
def test_a_vanishing_threshold_gives_the_dense_plan(symmetrize):
    x, y = clouds.transport("shell", 300, 250)
    exact = reference.dense(x, y, options(threshold=0, symmetrize=symmetrize))
    assert exact.support.all()
    found = []
    for threshold in (1e-1, 1e-2, 1e-4, 1e-8, 1e-14):
        plan = gpu3d.apml_plan(x, y, threshold=threshold, symmetrize=symmetrize, max_entries=10**6)
        error = np.abs(exact.plan)
        error[plan.rows, plan.cols] = np.abs(exact.plan[plan.rows, plan.cols] - plan.values)
        loss, (dx, _) = gpu3d.apml_value_and_grad(x, y, threshold=threshold, symmetrize=symmetrize, max_entries=10**6)
        found.append((error.sum() / 250, abs(loss / exact.loss - 1), relative(dx, exact.dpred)))
    for errors in zip(*found, strict=True):
        assert errors[0] > 1e-3 and errors[-1] < 1e-6, errors


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences_at_a_constant_plan(kind, symmetrize):
    x, y = (p.astype(np.float64) for p in clouds.transport(kind, 200, 150))
    plan = gpu3d.apml_plan(x, y, symmetrize=symmetrize)
    _, gradients = gpu3d.apml_value_and_grad(x, y, symmetrize=symmetrize)

    def loss(a, b):
        return (np.linalg.norm(a[plan.rows] - b[plan.cols], axis=1) * plan.values.astype(np.float64)).sum()

    h = 1e-6
    for side in (0, 1):
        norm = np.linalg.norm(gradients[side])
        for seed in range(3):
            direction = np.random.default_rng(seed).standard_normal((x, y)[side].shape)
            up, down = [x, y], [x, y]
            up[side], down[side] = (x, y)[side] + h * direction, (x, y)[side] - h * direction
            slope = (loss(*up) - loss(*down)) / (2 * h)
            assert abs(slope - (gradients[side] * direction).sum()) < 1e-4 * norm and norm > 1


def test_no_gradient_at_distance_0():
    x = np.array([[0, 0, 0], [3, 0, 0]], np.float32)
    loss, (dx, dy) = gpu3d.apml_value_and_grad(x[:1], x[:1])
    assert loss == 0 and not dx.any() and not dy.any()
    _, (dx, _) = gpu3d.apml_value_and_grad(x[:1], x)
    np.testing.assert_allclose(dx, [[-1, 0, 0]], rtol=1e-6)  # only from the second entry


@pytest.mark.parametrize("of_loss", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_each_cloud_times_that_of_its_loss(dtype, of_loss):
    """The product has the bits of torch's product of an array and a number, or a column of numbers."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    dpred, dtarget = (rng.normal(size=(n, d)).astype(DTYPES[dtype]) for n, d in ((12, 3), (9, 3)))
    lengths = (5, 0, 7), (3, 4, 2)
    given = [_arrays.read(x, "x") for x in (dpred, dtarget)]
    for shape in ((), (3,), (1,)):
        dloss = rng.normal(size=shape).astype(DTYPES[of_loss])
        of_clouds = [counts if shape != (1,) else (sum(counts),) for counts in lengths]
        found = transport.apml_backward_arrays(_arrays.read(np.asarray(dloss), "dloss"), *given, *of_clouds)
        specs = transport.apml_backward_results(*given)
        for got, gradient, counts, spec in zip(found, (dpred, dtarget), of_clouds, specs, strict=True):
            each = dloss if shape == () else np.repeat(dloss, counts)[:, None]
            tensors = [
                torch.from_numpy(z.astype(np.float64)).to(getattr(torch, z.dtype.name)) for z in (gradient, each)
            ]
            wide = torch.promote_types(*(z.dtype for z in tensors))
            if wide in (torch.float16, torch.bfloat16):
                wide = torch.float32
            exact = (tensors[0].to(wide) * tensors[1].to(wide)).to(tensors[0].dtype).double().numpy()
            assert got.dtype == gradient.dtype == spec.dtype and got.shape == spec.shape
            np.testing.assert_array_equal(got.astype(np.float64), exact)
            assert got.astype(np.float64).any()
    with pytest.raises(ValueError, match=r"dloss must have shape \[\] or \[3\], one for each cloud, got \[2\]"):
        transport.apml_backward_arrays(_arrays.read(np.ones(2, np.float32), "dloss"), *given, *lengths)
    with pytest.raises(TypeError, match=r"dloss must be float32, .* got int32"):
        transport.apml_backward_arrays(_arrays.read(np.ones(3, np.int32), "dloss"), *given, *lengths)


# ---- laws ----------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)
symmetrizations = st.sampled_from(SYMMETRIZATIONS)


def as_matrix(plan, n, m):
    matrix = np.zeros((n, m))
    matrix[plan.rows, plan.cols] = plan.values
    return matrix


@settings(max_examples=25, deadline=None)
@given(seeds, kinds, symmetrizations, st.integers(1, 150), st.integers(1, 150))
def test_permuting_the_points_permutes_the_plan(seed, kind, symmetrize, n, m):
    x, y = clouds.transport(kind, n, m, seed=seed)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(n), rng.permutation(m)
    given = {"symmetrize": symmetrize, "max_entries": 2 * n * m}
    one, two = gpu3d.apml_plan(x, y, **given), gpu3d.apml_plan(x[rows], y[columns], **given)
    assert len(one.rows) == len(two.rows)
    np.testing.assert_allclose(as_matrix(two, n, m), as_matrix(one, n, m)[rows][:, columns], rtol=0, atol=1e-6)
    loss, (dx, dy) = gpu3d.apml_value_and_grad(x, y, **given)
    again, (ex, ey) = gpu3d.apml_value_and_grad(x[rows], y[columns], **given)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert relative(ex, dx[rows].astype(float)) < 1e-5 and relative(ey, dy[columns].astype(float)) < 1e-5


@settings(max_examples=25, deadline=None)
@given(seeds, kinds, symmetrizations, st.integers(-3, 6))
def test_rigid_motion_and_scaling(seed, kind, symmetrize, exponent):
    """Coordinates on a grid, axes exchanged and mirrored, a scale that is a power of two: nothing is rounded."""
    x, y = (np.round(p.astype(np.float64) * 4096) / 4096 for p in clouds.transport(kind, 150, 120, seed=seed))
    rng, scale = np.random.default_rng(seed), 2.0**exponent
    turn = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    shift = rng.integers(-8, 8, 3)
    given = {"symmetrize": symmetrize, "max_entries": 150 * 120 * 2}
    loss, (dx, _) = gpu3d.apml_value_and_grad(x, y, **given)
    moved, (ex, _) = gpu3d.apml_value_and_grad(scale * x @ turn + shift, scale * y @ turn + shift, **given)
    np.testing.assert_allclose(moved, scale * loss, rtol=1e-6)
    assert relative(ex, dx @ turn) < 1e-5
    assert np.linalg.norm(dx) > 1


@settings(max_examples=25, deadline=None)
@given(seeds, kinds, symmetrizations, st.integers(1, 150), st.integers(1, 150))
def test_the_choices_exchange_when_the_arguments_do(seed, kind, symmetrize, n, m):
    """Exchanging the arguments transposes the plan before Sinkhorn, which is not symmetric: it divides columns last."""
    x, y = clouds.transport(kind, n, m, seed=seed)
    given = options(symmetrize=symmetrize, iterations=0)
    one, two = (
        reference.plan(*reference.located(a, [len(a)], b, [len(b)]), given, 2 * n * m) for a, b in ((x, y), (y, x))
    )
    order = np.lexsort((two.rows, two.columns))
    np.testing.assert_array_equal(one.rows, two.columns[order])
    np.testing.assert_array_equal(one.columns, two.rows[order])
    np.testing.assert_allclose(one.values, two.values[order], rtol=1e-12)
    np.testing.assert_array_equal(one.distances, two.distances[order])


def test_the_loss_is_not_symmetric():
    x, y = clouds.transport("independent", 200, 200)
    assert abs(gpu3d.apml(x, y) / gpu3d.apml(y, x) - 1) > 1e-4


@settings(max_examples=25, deadline=None)
@given(seeds, kinds, symmetrizations, st.integers(1, 300), st.integers(1, 300), st.integers(5, 40))
def test_columns_sum_to_one(seed, kind, symmetrize, n, m, iterations):
    x, y = clouds.transport(kind, n, m, seed=seed)
    plan = gpu3d.apml_plan(x, y, symmetrize=symmetrize, iterations=iterations, max_entries=2 * n * m)
    sums = np.bincount(plan.cols, plan.values.astype(np.float64), minlength=m)
    assert (plan.values >= 0).all() and sums.max() <= 1 + 1e-6
    # A column whose rows prefer many other columns has a sum close to 1e-8 before it is divided.
    few = kind in ("near", "shell", "independent") and symmetrize == "mean" and n >= m
    np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-6 if few else 1e-3)


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
def test_scipy_assigns_alike_where_the_plan_is_a_permutation(symmetrize):
    """With noise of 1 % of the spacing every second nearest point is far, so the plan is the cheapest assignment."""
    rng = np.random.default_rng(0)
    lattice = np.stack(np.meshgrid(*[np.arange(7.0)] * 3), axis=-1).reshape(-1, 3) * [1, 1.3, 1.7]
    y = lattice + rng.uniform(-0.1, 0.1, lattice.shape)
    order = rng.permutation(len(y))
    x = (y + rng.normal(0, 0.01, y.shape))[order]
    plan = gpu3d.apml_plan(x, y, symmetrize=symmetrize)
    matrix = as_matrix(plan, len(x), len(y))
    np.testing.assert_array_equal(matrix.argmax(axis=1), order)
    assert matrix.max(axis=1).min() > 0.99
    moved = np.linalg.norm(x - y[order], axis=1).mean()
    np.testing.assert_allclose(gpu3d.emd(x, y), moved, rtol=1e-5)
    np.testing.assert_allclose(gpu3d.apml(x, y, symmetrize=symmetrize) / len(x), moved, rtol=0.2)


# ---- ties, duplicates, numbers that are none -----------------------------------------------------------------------


def test_exact_ties_share_a_row():
    """Tied points share the row, and farther points get nothing. (As published, the whole row would be uniform.)"""
    x = np.array([[0, 0, 0]], np.float32)
    y = np.array([[1, 0, 0], [0, 2, 0], [-1, 0, 0], [0, 0, 1], [0, 1.5, 0]], np.float32)
    kept, weights = reference._dense_side(reference._distances(x[:, None], y), options())
    assert kept.tolist() == [[True, False, True, True, False]]
    np.testing.assert_allclose(weights, [[1 / 3, 0, 1 / 3, 1 / 3, 0]], rtol=1e-12)
    check(x, y)
    check(np.repeat(x, 20, axis=0), np.repeat(y, 9, axis=0))
    for symmetrize in SYMMETRIZATIONS:
        check(np.tile(y, (3, 1)), np.tile(y[::-1], (2, 1)), symmetrize=symmetrize)


def test_identical_clouds():
    for points in (clouds.uniform(200), clouds.lidar_like(300), np.tile(clouds.uniform(40), (3, 1))):
        check(points, points.copy())
    loss, gradients = gpu3d.apml_value_and_grad(points, points.copy())
    assert loss == 0 and not any(g.any() for g in gradients)  # every point occurs three times and matches its copies
    loss, gradients = gpu3d.apml_value_and_grad(clouds.uniform(200), clouds.uniform(200))
    assert loss > 1e-3 and all(np.isfinite(g).all() and g.any() for g in gradients)


def check_not_finite(as_array=same, back=same):
    """Check that the cloud's loss is NaN, and of gradients only that of the point, which has no entries."""
    x, y = ragged([100, 60, 30], [80, 70, 40])
    x[7, 1], y[3, 2], y[90, 0] = np.nan, np.inf, -np.inf
    lengths = {"pred_lengths": [100, 60, 30], "target_lengths": [80, 70, 40]}
    for symmetrize in SYMMETRIZATIONS:
        given = {**lengths, "symmetrize": symmetrize}
        loss, (dx, dy) = gpu3d.apml_value_and_grad(as_array(x), as_array(y), reduction="none", **given)
        plan = gpu3d.ApmlPlan(*map_all(back, gpu3d.apml_plan(as_array(x), as_array(y), **given)))
        assert np.isnan(back(loss)).tolist() == [True, True, False]
        assert np.isnan(back(gpu3d.apml(as_array(x), as_array(y), **given)))
        for got, bad in ((back(dx), [7]), (back(dy), [3, 90])):
            assert np.flatnonzero(np.isnan(got).any(axis=1)).tolist() == bad and np.isnan(got[bad]).all()
            assert np.delete(got, bad, axis=0).any(axis=1).all()
        assert sorted({*range(190)} - {*plan.rows.tolist()}) == [7]
        assert sorted({*range(190)} - {*plan.cols.tolist()}) == [3, 90]
        np.testing.assert_allclose(back(loss)[2], gpu3d.apml(x[160:], y[150:], symmetrize=symmetrize), rtol=1e-6)
        nothing = np.full((5, 3), np.nan, np.float32)
        for a, b in ((nothing, y[:9]), (y[:9], nothing), (nothing, nothing)):
            loss, gradients = gpu3d.apml_value_and_grad(as_array(a), as_array(b), symmetrize=symmetrize)
            assert np.isnan(back(loss))
            for got, points in zip(map(back, gradients), (a, b), strict=True):
                bad = ~np.isfinite(points).all(axis=1, keepdims=True)
                np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(bad, got.shape))
            assert len(back(gpu3d.apml_plan(as_array(a), as_array(b), symmetrize=symmetrize).rows)) == 0


def test_not_finite():
    check_not_finite()


def test_distances_too_large_for_float32():
    x, y = np.array([[3e38, 0, 0]], np.float32), np.array([[-3e38, 0, 0]], np.float32)
    loss, (dx, dy) = gpu3d.apml_value_and_grad(x, y)
    assert loss == math.inf and dx.tolist() == [[1, 0, 0]] and dy.tolist() == [[-1, 0, 0]]


# ---- room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_room(kind):
    for symmetrize in SYMMETRIZATIONS:
        check_room(*clouds.transport(kind, 300, 200), symmetrize=symmetrize)


def test_outliers_that_hold_the_whole_cloud():
    check_outliers()
    x, y = outliers()
    check_room(x, y)
    check(x, y)


def test_edge_of_the_ball():
    check_edge_of_the_ball()


def test_crowded_places_are_refused_before_memory_is_taken():
    points = clouds.degenerate(30_000)["40 % at the origin"]
    start = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"keep 288\d{6} entries.* of pred alone keeps 12\d{3}.* many points there are equal"
    ):
        gpu3d.apml(points, points)
    loss, (dx, dy) = gpu3d.apml_value_and_grad(points, points, max_entries=10**6)
    assert np.isnan(loss) and np.isnan(dx).all() and np.isnan(dy).all()
    assert time.perf_counter() - start < 10  # listing the pairs would take a minute and 20 GB


def test_8192_points_take_a_fraction_of_a_second():
    x, y = clouds.transport("near", 8192, 8192)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        gpu3d.apml_value_and_grad(x, y)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # 0.03 s on an idle core


# ---- views, libraries ----------------------------------------------------------------------------------------------


def test_batched_arrays():
    x, y = (np.random.default_rng(n).random((4, n, 3), dtype=np.float32) for n in (50, 70))
    packed, lengths = (x.reshape(-1, 3), y.reshape(-1, 3)), {"pred_lengths": [50] * 4, "target_lengths": [70] * 4}
    loss, (dx, dy) = gpu3d.apml_value_and_grad(x, y, reduction="none")
    expected, gradients = gpu3d.apml_value_and_grad(*packed, reduction="none", **lengths)
    assert dx.shape == x.shape and dy.shape == y.shape and loss.shape == (4,)
    assert_same_bits((loss, dx.reshape(-1, 3), dy.reshape(-1, 3)), (expected, *gradients))
    assert_same_bits(gpu3d.apml_plan(x, y), gpu3d.apml_plan(*packed, **lengths))


def test_losses_of_tensors_are_those_of_interop(monkeypatch):
    torch = pytest.importorskip("torch")
    seen = []
    interop = types.SimpleNamespace(apml=lambda *arrays, **options: seen.append((arrays, options)) or "a loss")
    monkeypatch.setattr(_arrays, "interop_of", lambda *arrays: interop if torch.is_tensor(arrays[0]) else None)
    x, y = torch.zeros(3, 3), np.ones((4, 3), np.float32)
    assert gpu3d.apml(x, y, threshold=0.5, max_entries=7) == "a loss"
    ((arrays, options),) = seen
    assert arrays == (x, y) and options.pop("threshold") == 0.5 and options.pop("max_entries") == 7
    assert options.pop("reduction") == "mean" and options.pop("pred_lengths") is options.pop("target_lengths") is None
    assert options == {name: value for name, value in DEFAULTS.items() if name != "threshold"}


def test_what_has_no_gradient_refuses_tensors_that_want_one():
    torch = pytest.importorskip("torch")
    x, y = torch.zeros(3, 3, requires_grad=True), torch.ones(3, 3)
    for function, names in (
        (gpu3d.apml_value_and_grad, ("pred", "target")),
        (gpu3d.apml_plan, ("pred", "target")),
        (gpu3d.emd_value_and_grad, ("x", "y")),
    ):
        for name, arguments in zip(names, ((x, y), (y, x)), strict=True):
            message = rf"{name} requires grad, and {function.__name__} has no gradient for it: pass {name}.detach\(\)"
            with pytest.raises(TypeError, match=message):
                function(*arguments)
            with torch.no_grad():
                function(*arguments)
            function(*(z.detach() for z in arguments))


def test_libraries_may_differ_on_the_cpu():
    """Loss and plan are arrays of pred's library, and each gradient of its own array's library."""
    torch = pytest.importorskip("torch")
    x, y = clouds.transport("shell", 60, 90)
    loss, (dx, dy) = gpu3d.apml_value_and_grad(torch.from_numpy(x), y)
    assert isinstance(loss, torch.Tensor) and isinstance(dx, torch.Tensor) and isinstance(dy, np.ndarray)
    assert isinstance(gpu3d.apml_plan(x, torch.from_numpy(y)).values, np.ndarray)


# ---- emd -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_emd_is_the_cheapest_of_all_assignments(dimensions, dtype):
    rng = np.random.default_rng(0)
    for n in (1, 2, 6):
        x, y = (rng.normal(size=(n, dimensions)).astype(DTYPES[dtype]) for _ in range(2))
        x64, y64 = x.astype(np.float64), y.astype(np.float64)
        costs = [np.linalg.norm(x64 - y64[list(p)], axis=1).mean() for p in itertools.permutations(range(n))]
        distance = gpu3d.emd(x, y)
        assert distance.dtype == reference.dtype_of(x) and distance.shape == ()
        np.testing.assert_allclose(distance, min(costs), rtol=1e-12 if distance.dtype == np.float64 else 1e-6)
        assert n < 6 or min(costs) < 0.9 * np.mean(costs)


def test_emd_laws():
    x, y = clouds.transport("independent", 200, 200)
    np.testing.assert_allclose(gpu3d.emd(x, y), gpu3d.emd(y, x[::-1]), rtol=1e-6)
    np.testing.assert_allclose(gpu3d.emd(x, x + np.float32([0.5, 0, 0])), 0.5, rtol=1e-5)
    assert gpu3d.emd(x, x[np.random.default_rng(0).permutation(200)]) == 0
    shift = np.array([1e6, 2e6, 300])
    np.testing.assert_allclose(gpu3d.emd(x + shift, y + shift), gpu3d.emd(x, y), rtol=1e-6)
    x[5, 1] = np.inf
    assert np.isnan(gpu3d.emd(x, y)) and np.isnan(gpu3d.emd(y, x))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_emd_of_a_batch_and_its_gradients(reduction):
    lengths = (30, 1, 20)
    x, y = (clouds.transport("independent", 51, 51)[side].astype(np.float64) for side in (0, 1))
    given = {"x_lengths": lengths, "y_lengths": lengths, "reduction": reduction}
    loss, (dx, dy) = gpu3d.emd_value_and_grad(x, y, **given)
    assert_same_bits([loss], [gpu3d.emd(x, y, **given)])
    ends = np.cumsum(lengths)[:-1]
    parts = [gpu3d.emd(a, b) for a, b in zip(np.split(x, ends), np.split(y, ends), strict=True)]
    total = {"mean": np.mean(parts), "sum": np.sum(parts), "none": parts}[reduction]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    step = np.random.default_rng(0).standard_normal(x.shape) * 1e-4  # changes no assignment
    for gradient, moved in ((dx, lambda h: (x + h, y)), (dy, lambda h: (x, y + h))):
        slope = (np.sum(gpu3d.emd(*moved(step), **given)) - np.sum(gpu3d.emd(*moved(-step), **given))) / 2
        np.testing.assert_allclose((gradient * step).sum(), slope, rtol=0.02)
    batched = gpu3d.emd_value_and_grad(x[:50].reshape(5, 10, 3), y[:50].reshape(5, 10, 3), reduction="none")
    assert batched.loss.shape == (5,) and batched.gradients[0].shape == (5, 10, 3)


def test_gradients_of_emd_at_0_and_of_nan():
    x = clouds.uniform(20)
    assert not any(g.any() for g in gpu3d.emd_value_and_grad(x, x[::-1]).gradients)
    y = x + np.float32(0.25)
    y[3, 1] = np.nan
    loss, gradients = gpu3d.emd_value_and_grad(x, y, x_lengths=[10, 10], y_lengths=[10, 10], reduction="none")
    assert np.isnan(loss).tolist() == [True, False]
    assert all(np.isnan(g[:10]).all() and not np.isnan(g[10:]).any() for g in gradients)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_emd_in_torch():
    """Eager calls have gradients. Compiled and traced ones raise an error that names the cure."""
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(z).requires_grad_() for z in clouds.transport("independent", 40, 40))
    given = {"x_lengths": (30, 10), "y_lengths": (30, 10), "reduction": "none"}
    weights = torch.tensor([2.0, -0.5])
    loss = gpu3d.emd(x, y, **given)
    got = torch.autograd.grad(loss, (x, y), weights)
    expected, gradients = gpu3d.emd_value_and_grad(x.detach().numpy(), y.detach().numpy(), **given)
    assert_same_bits([loss.detach().numpy()], [expected])
    factors = np.repeat(weights.numpy(), (30, 10))[:, None]
    assert_same_bits([g.numpy() for g in got], [g * factors for g in gradients])
    by_func = torch.func.grad(lambda x: (gpu3d.emd(x, y, **given) * weights).sum())(x.detach())
    assert torch.equal(by_func, got[0])
    x, y = x.detach(), y.detach()
    broken = torch.compile(lambda x, y: gpu3d.emd(x * 1, y) + 1, backend="eager")(x, y)
    assert torch.equal(broken, gpu3d.emd(x, y) + 1)
    with pytest.raises(Exception, match=r"emd assigns points on the host, .* compile without fullgraph=True"):
        torch.compile(lambda x, y: gpu3d.emd(x, y), backend="eager", fullgraph=True)(x, y)
    with pytest.raises(RuntimeError, match=r"emd assigns points on the host, .* can be compiled"):
        torch.jit.trace(lambda x, y: gpu3d.emd(x, y), (x, y))


@pytest.mark.parametrize("library", ["torch", "jax", "dlpack"])
def test_emd_in_every_library(library):
    library = getattr(contract, library)()
    x, y = clouds.transport("independent", 60, 60)
    distance = gpu3d.emd(library.array(x), library.array(y))
    assert isinstance(distance, library.kind)
    assert_same_bits([library.back(distance)], [gpu3d.emd(x, y)])


# ---- bad input -----------------------------------------------------------------------------------------------------

# Each row: the changes to a good call, and the error.
BAD = [
    ({"p_min": 0.0}, ValueError, "p_min must be between 0 and 1, neither of them included, got 0.0"),
    ({"p_min": 1}, ValueError, "p_min must be between 0 and 1, neither of them included, got 1"),
    ({"p_min": -0.5}, ValueError, "p_min must be between 0 and 1"),
    ({"p_min": math.nan}, ValueError, "p_min must be between 0 and 1, .* got nan"),
    ({"p_min": "0.8"}, TypeError, "p_min must be a number, got '0.8' of type str"),
    ({"p_min": True}, TypeError, "p_min must be a number, got True"),
    ({"p_min": 10**400}, ValueError, "p_min must fit a float, got an int of many digits"),
    ({"p_min": 10**30}, ValueError, "p_min must be between 0 and 1, .* got an int of many digits"),
    ({"p_min": [0.8] * 1000}, TypeError, "p_min must be a number, got list of length 1000 of type list"),
    ({"threshold": 0}, ValueError, "threshold must be between 0 and 1, .* got 0: 0, all pairs, is gpu3d.reference"),
    ({"threshold": 1.0}, ValueError, "threshold must be between 0 and 1, .* got 1.0"),
    ({"threshold": -1e-8}, ValueError, "threshold must be between 0 and 1, .* got -1e-08"),
    ({"threshold": math.inf}, ValueError, "threshold must be between 0 and 1, .* got inf"),
    ({"threshold": None}, TypeError, "threshold must be a number, got None of type NoneType"),
    ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
    ({"iterations": -3}, ValueError, "iterations must be at least 1, got -3"),
    ({"iterations": 20.0}, TypeError, "iterations must be an integer, got 20.0"),
    ({"iterations": True}, TypeError, "iterations must be an integer, got True"),
    ({"iterations": np.True_}, TypeError, "iterations must be an integer, got (np.)?True"),
    ({"iterations": np.float64(20)}, TypeError, "iterations must be an integer, got .*20.0"),
    ({"symmetrize": "max"}, ValueError, "symmetrize must be one of 'mean', 'min', got 'max'"),
    ({"symmetrize": None}, TypeError, "symmetrize must be one of 'mean', 'min', got None"),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ({"reduction": ["mean", "sum"]}, TypeError, r"reduction must be one of .*, got \['mean', 'sum'\]"),
    ({"max_entries": -1}, ValueError, "max_entries must not be negative, got -1"),
    ({"max_entries": 1e6}, TypeError, "max_entries must be an integer, got 1000000.0"),
    ({"pred_lengths": [40, 0]}, ValueError, "must not be empty, .* got cloud 1 of pred with no point. Leave it out"),
    ({"target_lengths": [0, 128]}, ValueError, "must not be empty, .* got cloud 0 of target with no point"),
    ({"pred": of(0, 3), "pred_lengths": None}, ValueError, "must not be empty, .* got cloud 0 of pred"),
    ({"pred": of(2, 0, 3), "pred_lengths": None}, ValueError, "must not be empty, .* got cloud 0 of pred"),
    ({"pred_lengths": [40]}, ValueError, "pred and target must have as many clouds, got 1 and 2: cloud b of one"),
    ({"target_lengths": None}, ValueError, "pred and target must have as many clouds, got 2 and 1"),
    ({"pred_lengths": [30, 9]}, ValueError, "pred_lengths must sum to the number of pred, got a sum of 39 for 40"),
    ({"pred_lengths": [41, -1]}, ValueError, r"must not be negative, got pred_lengths\[1\] = -1"),
    ({"target_lengths": [100.0, 28]}, TypeError, r"target_lengths must be integers, got target_lengths\[0\] = 100.0"),
    ({"pred": of(2, 20, 3)}, ValueError, "pred of shape .* says its lengths .*leave pred_lengths out"),
    ({"pred": of(40, 2)}, ValueError, "pred and target must have as many coordinates, got 2 and 3"),
    ({"pred": of(40, 4)}, ValueError, r"pred must have 2 or 3 coordinates .*\[40, 4\]: take pred\[..., :3\]"),
    ({"target": of(128, 1)}, ValueError, r"target must have 2 or 3 coordinates .*\[128, 1\]: pad the missing ones"),
    ({"target": of(128)}, ValueError, r"target must have shape \[N, 3\] \(or \[B, n, 3\]\), got \[128\]"),
    ({"target": of(128, 3, dtype=np.int32)}, TypeError, "target must be float32, .* got int32: .*target.astype"),
    ({"pred": INDEX}, TypeError, "pred must be an array, got NeighborIndex: pass the points"),
    ({"target": INDEX}, TypeError, "target must be an array, got NeighborIndex: pass the points"),
]  # fmt: skip


def assert_refused(arguments, error, message, as_array):
    pred, target = as_array(clouds.uniform(40)), as_array(clouds.uniform(128, 1))
    good = {"pred": pred, "target": target, "pred_lengths": [30, 10], "target_lengths": [100, 28]}
    bad = {name: as_array(y) if isinstance(y, np.ndarray) else y for name, y in arguments.items()}
    bad = {name: gpu3d.neighbor_index(target) if y is INDEX else y for name, y in bad.items()}
    for function in (gpu3d.apml, gpu3d.apml_value_and_grad, gpu3d.apml_plan):
        if function is gpu3d.apml_plan and "reduction" in arguments:
            continue  # apml_plan has no reduction
        with pytest.raises(error, match=message) as raised:
            function(**{**good, **bad})
        assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    assert_refused(arguments, error, message, np.asarray)


EMD_BAD = [
    ({"x": of(9, 3)}, ValueError, "must have as many points, .* assigned one to one, got 9 and 8 in cloud 0"),
    ({"x": of(8, 2)}, ValueError, "x and y must have as many coordinates, got 2 and 3"),
    ({"x": of(8, 6)}, ValueError, r"x must have 2 or 3 .*\[8, 6\]: .* torch.cdist or scipy.spatial.cKDTree"),
    ({"x_lengths": [5, 3]}, ValueError, "x and y must have as many clouds, got 2 and 1"),
    ({"x_lengths": [5, 3], "y_lengths": [3, 5]}, ValueError, "assigned one to one, got 5 and 3 in cloud 0"),
    ({"reduction": "points"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'points'"),
    ({"x": of(0, 3), "y": of(0, 3)}, ValueError, "must not be empty, .* got cloud 0 of x"),
    ({"x": of(8193, 3), "y": of(8193, 3)}, ValueError, "x and y must be at most 8192 points, got 8193 in cloud 0"),
    ({"y": of(8, 3, dtype=np.int64)}, TypeError, "y must be float32, .* got int64"),
    ({"y": 3.0}, TypeError, "y must be an array"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), EMD_BAD)
def test_bad_input_of_emd(arguments, error, message):
    good = {"x": clouds.uniform(8), "y": clouds.uniform(8, 1)}
    gpu3d.emd(**good)
    with pytest.raises(error, match=message):
        gpu3d.emd(**{**good, **arguments})


def test_numpy_numbers_are_numbers():
    x, y = clouds.transport("near", 40, 30)
    plain = {"p_min": 0.5, "threshold": 2.0**-20, "iterations": 5, "max_entries": 1000}
    types_ = {"p_min": np.float32, "threshold": np.float64, "iterations": np.uint8, "max_entries": np.int64}
    numpys = {name: types_[name](value) for name, value in plain.items()}
    for _ in range(3):
        expected, got = (gpu3d.apml_value_and_grad(x, y, **options) for options in (plain, numpys))
        assert_same_bits((got.loss, *got.gradients), (expected.loss, *expected.gradients))


def test_options_are_keywords():
    points = clouds.uniform(20)
    for function in (gpu3d.apml, gpu3d.apml_value_and_grad, gpu3d.apml_plan):
        with pytest.raises(TypeError, match="positional"):
            function(points, points, [20])


def check_no_clouds(as_array=same, back=same):
    none, lengths = as_array(of(0, 3)), {"pred_lengths": [], "target_lengths": []}
    for max_entries in (None, 0, 5):
        for reduction, expected in (("none", []), ("sum", 0.0), ("mean", np.nan)):
            given = {**lengths, "reduction": reduction, "max_entries": max_entries}
            loss, gradients = gpu3d.apml_value_and_grad(none, none, **given)
            assert_same_bits([back(loss)], [np.array(expected, np.float32)])
            assert all(tuple(g.shape) == (0, 3) for g in gradients)
        plan = gpu3d.apml_plan(none, none, max_entries=max_entries, **lengths)
        empty = (np.empty(0, dtype) for dtype in (np.int32, np.int32, np.float32))
        assert_same_bits(map_all(back, plan), [*empty, np.zeros(1, np.int64)])


def test_no_clouds():
    check_no_clouds()
