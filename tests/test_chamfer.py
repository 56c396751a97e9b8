# SPDX-License-Identifier: Apache-2.0
"""chamfer and its gradients on the CPU: definition, laws, NaN, views, libraries, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial import cKDTree
from test_neighbors import (
    DTYPES,
    INDEX,
    assert_refused,
    assert_same_bits,
    neighbors_by_definition,
    of,
    pair,
    ragged,
)

import gpu3d
from gpu3d import _arrays
from gpu3d.chamfer import (
    chamfer_arrays,
    chamfer_backward_arrays,
    check_chamfer,
    check_chamfer_backward,
    check_points,
    check_points_backward,
    points_arrays,
    points_backward_arrays,
)
from gpu3d.reference import chamfer as reference

REDUCTIONS = ("mean", "sum", "none")


def with_residuals(x, y, **options):
    """The loss, and the residuals that the backward needs."""
    x, y = _arrays.read(x, "x"), _arrays.read(y, "y")
    return chamfer_arrays(x, y, *check_chamfer(x, y, **options))


def backward(dloss, x, y, residuals, **options):
    """The gradients of x and y."""
    given = [None if z is None else _arrays.read(z, "an array") for z in (dloss, x, y, residuals)]
    return chamfer_backward_arrays(*given, *check_chamfer_backward(*given, **options))


# ---- oracles: one pair of points at a time -------------------------------------------------------------------------


def sum_by_definition(values):
    """The ordered sum in float64: of each 1024 values, the upper half is added to the lower."""
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


def dtype_of(*arrays):
    """The dtype of distances and losses."""
    return np.dtype(np.float64 if any(z.dtype == np.float64 for z in arrays) else np.float32)


def widened(*clouds):
    """Clouds [n, 3] in the dtype of their distances."""
    return [np.pad(z.astype(dtype_of(*clouds)), ((0, 0), (0, 3 - z.shape[1]))) for z in clouds]


def chamfer_by_definition(x, y, squared, direction="both"):
    """The float64 loss of a pair of finite clouds, and the gradients in float64 before they are rounded."""
    loss, own, given = 0.0, [], []
    for (sources, targets), skipped in (((x, y), "y_to_x"), ((y, x), "x_to_y")):
        if direction == skipped:
            own.append(np.zeros((len(sources), 3)))
            given.append(np.zeros((len(targets), 3)))
            continue
        here, there = widened(sources, targets)
        nearest = [near[0] for near in neighbors_by_definition(here, there)]
        d = [np.sqrt(d2) for d2, _ in nearest]
        loss += sum_by_definition([d2 for d2, _ in nearest] if squared else d) / len(sources)
        bound = 1
        if squared:
            bound = 2 + math.frexp(max(map(float, d)))[1]
        shift = 62 - len(sources).bit_length() - bound
        terms, pulls = [], [[0, 0, 0] for _ in targets]
        for i, (_, j) in enumerate(nearest):
            v = [a - b for a, b in zip(here[i], there[j], strict=True)]
            scaled = [2 * c if squared else c / d[i] for c in v] if d[i] > 0 else [0.0] * 3
            terms.append([float(c) for c in scaled])
            for axis in range(3):
                pulls[j][axis] -= round(math.ldexp(terms[-1][axis], shift))  # Python integers never overflow
        own.append(np.array(terms) / len(sources))
        given.append(np.array([[math.ldexp(float(p), -shift) for p in row] for row in pulls]) / len(sources))
    return loss, (own[0] + given[1], own[1] + given[0])


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chamfer_is_the_definition(dtype, dimensions, squared):
    x, y = (p[:, :dimensions] for p in pair("near", 90, 130, dtype=dtype))
    x[4], x[5] = y[4], y[4]  # distance 0
    expected, gradients = chamfer_by_definition(x, y, squared)
    loss, got = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
    real = dtype_of(x, y).type
    assert loss.shape == () and loss.dtype == real and loss == real(expected) > 0
    assert_same_bits([gpu3d.chamfer(x, y, squared=squared)], [loss])
    for gradient, exact, side in zip(got, gradients, (x, y), strict=True):
        rounded = exact[:, :dimensions].astype(real).astype(side.dtype)
        assert_same_bits([gradient], [rounded])
        assert (gradient.astype(float) != 0).any(axis=1).mean() > 0.5


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chamfer_backward(dtype, reduction):
    """The gradients times the gradient of the loss, in the dtype of the loss, and then rounded."""
    lengths = {"x_lengths": (50, 1, 30), "y_lengths": (20, 64, 1)}
    x, y = ragged(*lengths.values(), dtype=dtype)
    options = {**lengths, "squared": True, "reduction": reduction, "direction": "both"}
    loss, residuals = with_residuals(x, y, **options)
    assert_same_bits([loss], [gpu3d.chamfer(x, y, **options)])
    dloss = np.random.default_rng(0).standard_normal(loss.shape).astype(loss.dtype)
    got = backward(dloss, x, y, residuals, **options)
    wide = (z.astype(loss.dtype) for z in (x, y))
    plain, expected = gpu3d.chamfer_value_and_grad(*wide, **options).gradients, []
    for gradient, of_clouds in zip(plain, lengths.values(), strict=True):
        factors = np.repeat(dloss, of_clouds) if reduction == "none" else np.full(sum(of_clouds), dloss)
        expected.append((gradient * factors[:, None]).astype(x.dtype))
    assert_same_bits(got, expected)
    assert_same_bits(backward(dloss.astype(np.float64), x, y, residuals, **options), expected)
    ones = backward(np.ones_like(dloss), x, y, residuals, **options)
    assert_same_bits(backward(None, x, y, residuals, **options), ones)


def test_bad_input_of_chamfer_backward():
    """Residuals are indices into memory, so they must fit the points."""
    (x, y), lengths = pair("near", 40, 50), {"x_lengths": (30, 10), "y_lengths": (20, 30)}
    options = {**lengths, "squared": False, "reduction": "none", "direction": "both"}
    loss, residuals = with_residuals(x, y, **options)
    for changes, message in (
        ({"residuals": residuals[:-1]}, r"residuals must be int32 \[184\], of the same clouds, got int32 \[183\]"),
        ({"residuals": residuals.view(np.float32)}, r"residuals must be int32 \[184\], .* got float32 \[184\]"),
        ({"x": x[1:]}, "x_lengths must sum to the number of x"),
        ({"dloss": loss[:1]}, r"dloss must have the loss's shape, got \[1\] for reduction 'none'"),
        ({"reduction": "sum"}, r"dloss must have the loss's shape, got \[2\] for reduction 'sum'"),
    ):
        good = {"dloss": loss, "x": x, "y": y, "residuals": residuals, **options}
        backward(**good)
        with pytest.raises(ValueError, match=message):
            backward(**{**good, **changes})
    with pytest.raises(TypeError, match=r"dloss must be float32, .* got int32"):
        backward(loss.astype(np.int32), x, y, residuals, **options)


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


DIRECTIONS = ("both", "x_to_y", "y_to_x")


@pytest.mark.parametrize("direction", DIRECTIONS[1:])
@pytest.mark.parametrize("squared", [False, True])
def test_one_direction_is_the_definition(squared, direction):
    x_lengths, y_lengths = [50, 1, 30], [20, 64, 1]
    x, y = ragged(x_lengths, y_lengths)
    options = {"x_lengths": x_lengths, "y_lengths": y_lengths, "squared": squared, "direction": direction}
    loss, got = gpu3d.chamfer_value_and_grad(x, y, **options, reduction="none")
    assert_same_bits([gpu3d.chamfer(x, y, **options, reduction="none")], [loss])
    parts = zip(*(np.split(p, np.cumsum(n)[:-1]) for p, n in ((x, x_lengths), (y, y_lengths))), strict=True)
    losses, gradients = zip(*(chamfer_by_definition(a, b, squared, direction) for a, b in parts), strict=True)
    assert_same_bits([loss], [np.array(losses, np.float32)])
    exact = [np.concatenate([g[side] for g in gradients]).astype(np.float32) for side in (0, 1)]
    assert_same_bits(got, exact)
    assert all(g.any() for g in exact)
    index, x_index = gpu3d.neighbor_index(y, lengths=y_lengths), gpu3d.neighbor_index(x, lengths=x_lengths)
    indexed = gpu3d.chamfer_value_and_grad(x_index, index, squared=squared, direction=direction, reduction="none")
    assert_same_bits((indexed.loss, *indexed.gradients), (loss, *exact))


def naive_points(x, y, squared):
    """Distances of x's points to the nearest of y, and the indices."""
    nearest = [near[0] for near in neighbors_by_definition(*widened(x, y))]
    d2, indices = (np.array(column) for column in zip(*nearest, strict=True))
    return (d2 if squared else np.sqrt(d2)).astype(dtype_of(x, y)), indices


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_points_are_the_definition(dtype, squared):
    x_lengths, y_lengths = (50, 1, 30), (20, 64, 1)
    x, y = ragged(x_lengths, y_lengths, dtype=dtype)
    options = {"x_lengths": x_lengths, "y_lengths": y_lengths, "squared": squared}
    got = gpu3d.chamfer(x, y, **options, reduction="points")
    parts = list(zip(*(np.split(p, np.cumsum(n)[:-1]) for p, n in ((x, x_lengths), (y, y_lengths))), strict=True))
    expected = [np.concatenate([naive_points(*pair[::step], squared)[0] for pair in parts]) for step in (1, -1)]
    assert_same_bits(got, expected)
    for direction, one, left_out in (("x_to_y", 0, 1), ("y_to_x", 1, 0)):
        alone = gpu3d.chamfer(x, y, **options, reduction="points", direction=direction)
        assert_same_bits([alone[one]], [expected[one]])
        assert alone[left_out] is None
    index = gpu3d.neighbor_index(y, lengths=y_lengths)
    assert_same_bits(gpu3d.chamfer(x, index, x_lengths=x_lengths, squared=squared, reduction="points"), expected)


def points_gradients(x, y, weights=None, dtype=np.float32, **options):
    """The distances of all points, and the gradients of x and y for weights of the distances."""
    given = [_arrays.read(z, "an array") for z in (x, y)]
    checked = check_points(*given, options.get("x_lengths"), options.get("y_lengths"), *options["how"], "zero")
    distances, nearest = points_arrays(*given, *checked)
    if weights is None:
        weights = np.random.default_rng(len(distances)).standard_normal(len(distances)).astype(dtype)
    saved = [_arrays.read(z, "an array") for z in (weights, x, y, distances, nearest)]
    checked = check_points_backward(*saved, *checked)
    return weights, distances, points_backward_arrays(*saved, *checked)


@pytest.mark.parametrize("how", [(False, "both"), (True, "both"), (True, "x_to_y"), (False, "y_to_x")])
def test_gradients_of_points(how):
    """They are sums of weight * (v / d), or of 2 * weight * v, over the pairs."""
    squared, direction = how
    x, y = pair("near", 300, 200)
    x[4] = y[4]  # distance 0: no gradient
    weights, _, got = points_gradients(x, y, how=how, x_lengths=[300], y_lengths=[200])
    exact, first = [np.zeros((300, 3)), np.zeros((200, 3))], 0
    for a, b, da, db, skipped in ((x, y, *exact, "y_to_x"), (y, x, *exact[::-1], "x_to_y")):
        if direction == skipped:
            continue
        _, j = naive_points(a, b, squared)
        v = a.astype(float) - b[j]
        length = np.linalg.norm(v, axis=1, keepdims=True)
        terms = weights[first : first + len(a), None] * (2 * v if squared else v / np.where(length > 0, length, 1))
        da += terms
        np.add.at(db, j, -terms)
        first += len(a)
    for gradient, wanted in zip(got, exact, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
        assert wanted.any(axis=1).mean() > 0.5


def test_gradients_of_points_where_weights_are_not_finite():
    x, y = pair("independent", 200, 100)
    x, y = x[:200], y[:100]
    x[7] = np.nan  # no distance, so no gradient, whatever its weight is
    weights = np.ones(200, np.float32)
    weights[[3, 7]] = np.nan, np.inf
    _, distances, (dx, dy) = points_gradients(x, y, weights, how=(False, "x_to_y"))
    _, j = naive_points(x[3:4], y, False)
    assert not np.isfinite(distances[7]) and not dx[7].any()
    assert np.flatnonzero(np.isnan(dx).any(axis=1)).tolist() == [3]
    assert np.flatnonzero(np.isnan(dy).any(axis=1)).tolist() == j.tolist()


def test_a_cloud_alone_has_the_gradients_of_a_batch():
    x_lengths, y_lengths = (50, 1, 30), (20, 64, 1)
    x, y = ragged(x_lengths, y_lengths)
    how = {"how": (False, "x_to_y")}
    weights, _, (dx, dy) = points_gradients(x, y, x_lengths=x_lengths, y_lengths=y_lengths, **how)
    _, _, alone = points_gradients(x[51:], y[84:], weights[51:], **how)
    assert_same_bits(alone, (dx[51:], dy[84:]))


@pytest.mark.parametrize("squared", [False, True])
def test_empty_clouds_count_as_zero(squared):
    """As PyTorch3D's chamfer_distance: such a pair has a loss of 0, and is one of the pairs of the mean."""
    x_lengths, y_lengths = [30, 0, 40, 0], [50, 20, 0, 0]
    x, y = ragged(x_lengths, y_lengths)
    options = {"x_lengths": x_lengths, "y_lengths": y_lengths, "squared": squared}
    expected, (ex, ey) = gpu3d.chamfer_value_and_grad(x[:30], y[:50], squared=squared)
    for function in (gpu3d.chamfer, gpu3d.chamfer_value_and_grad):
        with pytest.raises(ValueError, match=r"got cloud 1 of x with no point\. Leave it out, or pass empty='zero'"):
            function(x, y, **options)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, **options, reduction="none", empty="zero")
    assert_same_bits([loss], [np.array([expected, 0, 0, 0], np.float32)])
    assert_same_bits((dx[:30], dy[:50]), (ex, ey))
    assert not dx[30:].any() and not dy[50:].any()
    assert gpu3d.chamfer(x, y, **options, empty="zero") == expected / 4
    of_points = gpu3d.chamfer(x, y, **options, reduction="points", empty="zero")
    assert_same_bits(
        of_points,
        [np.append(of_points.x[:30], of(40, 1)[:, 0] * 0), np.append(of_points.y[:50], [0] * 20).astype("f4")],
    )
    _, _, gradients = points_gradients(x, y, x_lengths=x_lengths, y_lengths=y_lengths, how=(squared, "both"))
    assert gradients[0][:30].any() and not gradients[0][30:].any() and not gradients[1][50:].any()


def test_the_gradient_of_points_is_of_torch_and_jax():
    with pytest.raises(ValueError, match=r"reduction .points. is for chamfer only, .* differentiate chamfer in torch"):
        gpu3d.chamfer_value_and_grad(of(9, 3), of(9, 3), reduction="points")


@pytest.mark.parametrize("n", [0, 1, 2, 1023, 1024, 1025, 5000, 1024 * 1024 + 1])
def test_ordered_sum(n):
    values = np.random.default_rng(n).standard_normal(n) * 2.0 ** np.random.default_rng(n).integers(-30, 30, n)
    assert reference.ordered_sum(values) == sum_by_definition(values)
    assert math.isclose(reference.ordered_sum(values), math.fsum(values), rel_tol=1e-9)


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [False, True])
def test_chamfer_laws(squared):
    x, y = pair("near", 3000, 4000)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
    back, (ey, ex) = gpu3d.chamfer_value_and_grad(y, x, squared=squared)
    assert_same_bits((loss, dx, dy), (back, ex, ey))
    total = np.abs(dx).sum()
    assert np.abs(dx.astype(float).sum(0) + dy.astype(float).sum(0)).max() < 1e-5 * total  # moving both changes nothing
    same, gradients = gpu3d.chamfer_value_and_grad(x, x.copy(), squared=squared)
    assert same == 0 and not any(g.any() for g in gradients)
    expected = [cKDTree(b).query(a.astype(float))[0] ** (2 if squared else 1) for a, b in ((x, y), (y, x))]
    assert math.isclose(loss, expected[0].mean() + expected[1].mean(), rel_tol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_chamfer_gradients_are_finite_differences(squared):
    """Gradients equal differences of SciPy's loss in float64, along directions that change no nearest neighbour."""
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


def test_many_contributions_to_one_point():
    """All points of y have the same nearest neighbour. The sum is rounded once, as if it were exact."""
    rng = np.random.default_rng(0)
    x, y = np.zeros((1, 3), np.float32), (rng.random((50_000, 3)) + 1).astype(np.float32)
    for squared in (False, True):
        _, (dx, _) = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
        v = -y.astype(np.float64)
        terms = 2 * v if squared else v / np.linalg.norm(v, axis=1, keepdims=True)
        own = terms[np.linalg.norm(v, axis=1).argmin()]
        np.testing.assert_allclose(dx[0], own + terms.mean(axis=0), rtol=3e-7)


# ---- NaN, and numbers at the ends ----------------------------------------------------------------------------------


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
    np.testing.assert_allclose(np.delete(dx, 7, axis=0), ex, rtol=0.1, atol=0.01)  # one point fewer in the means
    assert np.isnan(gpu3d.chamfer(x, y, x_lengths=x_lengths, y_lengths=y_lengths))


def test_distances_too_large_for_float32():
    points = np.array([[3e38, 0, 0], [0, 0, 0]], np.float32)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(points[:1], points[1:])
    assert loss == math.inf and np.isnan(dx).all() and np.isnan(dy).all()


def test_map_coordinates_keep_their_millimetres():
    near = np.random.default_rng(0).integers(0, 2**16, (3000, 3)) / 1024.0  # exact, also after the shift
    shift = [5e6, 4.5e6, 300]
    query, points = near[:900], near[500:]
    assert_same_bits([gpu3d.chamfer(query + shift, points + shift)], [gpu3d.chamfer(query, points)])


def map_points(n, seed):
    """Points of a map, in metres."""
    return np.random.default_rng(seed).random((n, 3)) * [30, 30, 3] + [5e5, 4.2e6, 100]


@pytest.mark.parametrize("stray", [0.0, -99999.0, 1e30, 1e200])
def test_a_stray_point_changes_no_other_distance_of_float64(stray):
    x, y = map_points(400, 0), map_points(300, 1)
    distances = gpu3d.chamfer(x, y, reduction="points")
    exact = cKDTree(y - y[0]).query(x - y[0])[0]
    np.testing.assert_allclose(distances.x, exact, rtol=1e-8)
    _, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, reduction="sum")
    x, y = np.append(x, np.full((1, 3), stray), 0), np.append(y, np.full((1, 3), stray) + 1, 0)
    again = gpu3d.chamfer(x, y, reduction="points")
    assert_same_bits((again.x[:-1], again.y[:-1]), distances)
    loss, (ex, ey) = gpu3d.chamfer_value_and_grad(x, y, reduction="sum")
    assert loss.dtype == ex.dtype == ey.dtype == np.float64
    assert loss == pytest.approx(distances.x.sum() / 401 + distances.y.sum() / 301, abs=0.02)
    for a, b in ((dx, ex), (dy, ey)):  # each term is divided by the number of points, of which there is one more
        np.testing.assert_allclose(b[:-1], a, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("squared", [False, True])
def test_gradients_of_float64_are_within_their_bound(squared):
    """Of the sums of terms in float64: 2^-40 of the largest term of the cloud."""
    x, y = map_points(500, 2), map_points(30, 3)
    _, gradients = gpu3d.chamfer_value_and_grad(x, y, squared=squared)
    exact = [np.zeros(x.shape), np.zeros(y.shape)]
    largest = 0
    for a, b, da, db in ((x, y, *exact), (y, x, *exact[::-1])):
        d, j = cKDTree(b - y[0]).query(a - y[0])
        v = a - b[j]
        terms = 2 * v if squared else v / d[:, None]
        largest = max(largest, np.abs(terms).max())
        da += terms / len(a)
        np.add.at(db, j, -terms / len(a))
    for got, wanted in zip(gradients, exact, strict=True):
        assert np.abs(got - wanted).max() < 2.0**-40 * largest and got.any(axis=1).all()


def test_one_point():
    point = np.array([[1, 2, 3]], np.float32)
    assert gpu3d.chamfer(point, point + 2) == np.float32(2 * math.sqrt(12))


def check_empty(asarray, back):
    none = asarray(of(0, 3))
    for reduction, expected in (("none", []), ("sum", 0.0), ("mean", np.nan)):
        loss, gradients = gpu3d.chamfer_value_and_grad(none, none, reduction=reduction, x_lengths=[], y_lengths=[])
        assert_same_bits([back(loss)], [np.array(expected, np.float32)])
        assert all(tuple(g.shape) == (0, 3) for g in gradients)


def test_empty():
    check_empty(np.asarray, np.asarray)


# ---- the index, views, libraries -----------------------------------------------------------------------------------


def test_an_index_stands_in_for_points():
    x_lengths, y_lengths = [300, 40], [500, 70]
    x, y = ragged(x_lengths, y_lengths)
    loss, gradients = gpu3d.chamfer_value_and_grad(x, y, x_lengths=x_lengths, y_lengths=y_lengths)
    index, x_index = gpu3d.neighbor_index(y, lengths=y_lengths), gpu3d.neighbor_index(x, lengths=x_lengths)
    for sides, more in (((x, index), {"x_lengths": x_lengths}), ((x_index, index), {})):
        got = gpu3d.chamfer_value_and_grad(*sides, **more)
        assert_same_bits((got.loss, *got.gradients), (loss, *gradients))
        assert_same_bits([gpu3d.chamfer(*sides, **more)], [loss])


def test_batched_arrays():
    x, y = (np.random.default_rng(n).random((4, n, 3), dtype=np.float32) for n in (50, 70))
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, gpu3d.neighbor_index(y), reduction="none")
    lengths = {"x_lengths": [50] * 4, "y_lengths": [70] * 4}
    packed = x.reshape(-1, 3), y.reshape(-1, 3)
    expected, gradients = gpu3d.chamfer_value_and_grad(*packed, **lengths, reduction="none")
    assert dx.shape == x.shape and dy.shape == y.shape and loss.shape == (4,)
    assert_same_bits((loss, dx.reshape(-1, 3), dy.reshape(-1, 3)), (expected, *gradients))
    residuals = with_residuals(x, y, x_lengths=None, y_lengths=None, squared=False, reduction="none")[1]
    options = {"x_lengths": None, "y_lengths": None, "squared": False, "reduction": "none", "direction": "both"}
    assert_same_bits(backward(None, x, y, residuals, **options), (dx, dy))


def test_a_tensor_that_requires_grad_is_refused_where_it_would_be_cut_off():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(z) for z in pair("near", 60, 90))
    with pytest.raises(TypeError, match=r"y requires grad, and chamfer_value_and_grad has no .*y\.detach\(\)"):
        gpu3d.chamfer_value_and_grad(x, y.requires_grad_())
    with torch.no_grad():
        gpu3d.chamfer_value_and_grad(x, y)


def test_each_gradient_is_of_the_library_of_its_array():
    torch = pytest.importorskip("torch")
    x, y = pair("near", 60, 90)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(torch.from_numpy(x), gpu3d.neighbor_index(y))
    assert isinstance(loss, torch.Tensor) and isinstance(dx, torch.Tensor) and isinstance(dy, np.ndarray)


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD = [
    ("chamfer", {"x": of(40, 2)}, ValueError, "x and y must have as many coordinates, got 2 and 3"),
    ("chamfer", {"x": of(40, 1)}, ValueError, r"x must have 2 or 3 .*\[40, 1\]: pad the missing ones with zeros"),
    ("chamfer", {"x_lengths": [40]}, ValueError, "x and y must have as many clouds, got 1 and 2"),
    ("chamfer", {"x_lengths": [39, 2]}, ValueError, "x_lengths must sum to the number of x, got a sum of 41 for 40 x"),
    ("chamfer", {"y_lengths": (1, 1)}, ValueError, "y_lengths must sum to the number of y"),
    ("chamfer", {"x": INDEX}, ValueError, "x is a NeighborIndex, which knows its lengths: leave x_lengths out"),
    ("chamfer", {"y": INDEX}, ValueError, "y is a NeighborIndex, which knows its lengths: leave y_lengths out"),
    ("chamfer", {"x_lengths": [40, 0]}, ValueError, "must not be empty, .* got cloud 1 of x with no point"),
    ("chamfer", {"y_lengths": [0, 128]}, ValueError, "must not be empty, .* got cloud 0 of y with no point"),
    ("chamfer", {"squared": 1}, TypeError, "squared must be True or False, got 1"),
    ("chamfer", {"squared": "no"}, TypeError, "squared must be True or False, got 'no'"),
    ("chamfer", {"reduction": "max"}, ValueError, "reduction must be one of .* 'points', got 'max'"),
    ("chamfer", {"reduction": None}, TypeError, "reduction must be one of .*, got None"),
    ("chamfer", {"reduction": np.array(["mean", "sum"])}, TypeError, r"reduction .* ndarray of shape \[2\]"),
    ("chamfer", {"direction": "x"}, ValueError, "direction must be one of 'both', 'x_to_y', 'y_to_x', got 'x'"),
    ("chamfer", {"empty": "skip"}, ValueError, "empty must be one of 'error', 'zero', got 'skip'"),
    ("chamfer", {"empty": 0}, TypeError, "empty must be one of .*, got 0"),
    ("chamfer", {"x": of(40, 6)}, ValueError, r"x must have 2 or 3 .*\[40, 6\]: take x.* norms .*torch.cdist or scipy"),
    ("chamfer", {"squared": np.ones(1000)}, TypeError, r"squared must be True or False, got ndarray of shape \[1000\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(call, arguments, error, message):
    assert_refused(call, arguments, error, message, np.asarray)


def test_options_are_keywords():
    points = of(20, 3)
    for function in (gpu3d.chamfer, gpu3d.chamfer_value_and_grad):
        with pytest.raises(TypeError, match="positional"):
            function(points, points, [20])
