# SPDX-License-Identifier: Apache-2.0
"""The Chamfer distance and its gradients on the GPU give the same bits as the reference."""

from __future__ import annotations

import itertools

import clouds
import numpy as np
import pytest
from conftest import poison
from test_chamfer import (
    BAD,
    DIRECTIONS,
    REDUCTIONS,
    backward,
    check_empty,
    dtype_of,
    map_points,
    points_gradients,
    with_residuals,
)
from test_neighbors import DTYPES, KINDS, RAGGED, assert_refused, assert_same_bits, pair, ragged, special
from test_neighbors_gpu import SIZES, check, to_host

import gpu3d
from gpu3d.reference import chamfer as reference

pytestmark = pytest.mark.gpu


def check_chamfer(cp, x, y, note="", **options):
    for squared in (False, True):
        loss = check(cp, gpu3d.chamfer, x, y, note=note, squared=squared, **options)
        both = check(cp, gpu3d.chamfer_value_and_grad, x, y, note=note, squared=squared, **options)
        assert_same_bits(both[:1], loss)
    check_chamfer_backward(cp, x, y, note, **options)


def check_chamfer_backward(cp, x, y, note, x_lengths=None, y_lengths=None, reduction="mean"):
    """Check residuals and gradients; the gradient of the losses is a strided array."""
    shared = {"squared": True, "reduction": reduction, "direction": "both"}
    lengths = {"x_lengths": tuple(x_lengths or [len(x)]), "y_lengths": tuple(y_lengths or [len(y)])}
    numbers = np.random.default_rng(len(x)).standard_normal((len(lengths["x_lengths"]), 2), np.float32)
    residuals, gradients = [], []
    for asarray in (np.asarray, cp.asarray):
        arrays, dloss = (asarray(x), asarray(y)), asarray(numbers)[:, 0]
        dloss = dloss if reduction == "none" else dloss[:1].reshape(())
        poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
        residuals.append(with_residuals(*arrays, **lengths, **shared)[1])
        gradients.append(backward(dloss, *arrays, residuals[-1], **lengths, **shared))
    dtype = dtype_of(x, y)
    cuts = reference.residual_parts(*lengths.values(), "both", dtype)[1:-1]
    on_cpu, on_gpu = (np.split(cp.asnumpy(z), cuts) for z in residuals)
    for number, (a, b) in enumerate(zip(on_gpu, on_cpu, strict=True)):
        of_part = dtype if number < 4 else np.int32
        assert_same_bits([a.view(of_part)], [b.view(of_part)], f"part {number} of the residuals, {note}")
    assert_same_bits([z.get() for z in gradients[1]], gradients[0], f"backward {note}")


def check_directions(cp, x, y, note="", **options):
    """Check losses and gradients of one direction, and the distance of each point and its gradients."""
    for direction in DIRECTIONS[1:]:
        check(cp, gpu3d.chamfer, x, y, note=note, direction=direction, **options)
        check(cp, gpu3d.chamfer_value_and_grad, x, y, note=note, direction=direction, squared=True, **options)
    lengths = {name: options[name] for name in ("x_lengths", "y_lengths") if name in options}
    for direction, squared in itertools.product(DIRECTIONS, (False, True)):
        how, made = (squared, direction), []
        weights, *_ = points_gradients(x, y, how=how, **lengths)
        for asarray in (np.asarray, cp.asarray):
            poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
            _, distances, gradients = points_gradients(asarray(x), asarray(y), asarray(weights), how=how, **lengths)
            made.append([distances, *gradients])
        assert_same_bits(to_host(made[1]), made[0], f"points {how} {note}")


# ---- the same bits as the reference --------------------------------------------------------------------------------


def test_small_chamfer(cp):
    """For compute-sanitizer: clouds of one tile and of two, a large batch, 2-D, NaN."""
    for kind in KINDS:
        check_chamfer(cp, *pair(kind, 300, 700), kind)
    check_chamfer(cp, *pair("near", 1500, 1500))
    query, points = ragged([10] * 70, [7] * 70, dtype="float64")
    check_chamfer(cp, query, points, x_lengths=[10] * 70, y_lengths=[7] * 70, reduction="none")
    points = special(600)["spoiled"]
    check_chamfer(cp, points[:, :2], points[::-1, :2], "spoiled")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_small_directions(cp, dtype):
    """For compute-sanitizer: one direction and points, of one tile and of more, empty clouds, a large batch, NaN."""
    x, y = pair("near", 300, 2500, dtype=dtype)
    check_directions(cp, x, y)
    x[3], y[5] = np.nan, np.inf
    check_directions(cp, x[:, :2], y[:, :2], "spoiled")
    lengths = {"x_lengths": [30, 0, 40, 0] * 20, "y_lengths": [50, 20, 0, 0] * 20}
    x, y = ragged(*lengths.values(), dtype=dtype)
    check_directions(cp, x, y, "empty", **lengths, empty="zero")
    check(cp, gpu3d.chamfer_value_and_grad, x, y, **lengths, empty="zero", reduction="none")


@pytest.mark.parametrize("kind", KINDS)
def test_directions_of_large_clouds(cp, kind):
    check_directions(cp, *pair(kind, 20_000, 33_000), kind)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float32"), ("float64", "float64")], ids=str)
def test_directions_of_an_index(cp, dtypes):
    x, y = (z.astype(dtype) for z, dtype in zip(pair("near", 1500, 2300), dtypes, strict=True))
    indices = [gpu3d.neighbor_index(cp.asarray(z)) for z in (x, y)]
    for direction in DIRECTIONS:
        loss, gradients = gpu3d.chamfer_value_and_grad(x, y, direction=direction)
        of_points = [z for z in gpu3d.chamfer(x, y, direction=direction, reduction="points") if z is not None]
        for sides in (indices, (cp.asarray(x), indices[1]), (indices[0], cp.asarray(y))):
            poison(cp)
            got = gpu3d.chamfer_value_and_grad(*sides, direction=direction)
            assert_same_bits(to_host((got.loss, *got.gradients)), (loss, *gradients))
            found = gpu3d.chamfer(*sides, direction=direction, reduction="points")
            assert_same_bits(to_host([z for z in found if z is not None]), of_points)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_across_the_edges_of_tiles(cp, kind):
    for m in SIZES:
        for n in (1, 33, m):
            check_chamfer(cp, *pair(kind, n, m, seed=m), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20_000, 131_072, 131_073])
def test_large_clouds(cp, n, kind):
    check_chamfer(cp, *pair(kind, n, n + 17), kind)


@pytest.mark.parametrize("n", [1_000_000, 1_000_003])
def test_a_million_points(cp, n):
    check_chamfer(cp, *pair("near", n, n))


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(cp, name):
    points = special(5000)[name]
    check_chamfer(cp, np.concatenate([points[:1500], clouds.uniform(100)]), points, name)


def test_crowded_places(cp):
    """Clouds that break a search by cells: 3,469 equal points, and 40 % of a sweep at the origin."""
    sweep = clouds.lidar_like(120_000)
    sweep[np.random.default_rng(0).permutation(len(sweep))[:3469]] = 0
    for points in (sweep, clouds.degenerate(60_000)["40 % at the origin"]):
        check_chamfer(cp, points, points[: len(points) // 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x_lengths", "y_lengths"),
    [RAGGED[1], RAGGED[2], ([2048] * 32, [2048] * 32), ([7] * 300, [9] * 300)],
    ids=lambda n: str(len(n)),
)
def test_ragged_batches(cp, x_lengths, y_lengths, dtype):
    x, y = ragged(x_lengths, y_lengths, dtype=dtype)
    for reduction in REDUCTIONS:
        check_chamfer(cp, x, y, x_lengths=x_lengths, y_lengths=y_lengths, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_dtypes_and_dimensions(cp, dimensions, dtype):
    x, y = (p[:, :dimensions] for p in pair("near", 2000, 3000, dtype=dtype))
    check_chamfer(cp, x, y)
    for other in DTYPES.values():  # mixed dtypes are widened to float32, or to float64 if one of them is float64
        check_chamfer(cp, x, y.astype(other))


def test_map_coordinates(cp):
    x, y = (p + [5e6, 4.5e6, 300] for p in pair("near", 5000, 6000, dtype="float64"))
    y[::100, 0], y[50::100, 2] = np.nan, -np.inf  # not used for the minimum
    check_chamfer(cp, x, y)


@pytest.mark.parametrize("sizes", [(400, 300), (5000, 6000)], ids=str)
def test_strays_of_float64(cp, sizes):
    """The bits of the reference, and of the others those without the stray points; clouds of one node and of more."""
    strays = np.array([0.0, -99999.0, 1e30, 1e200])[:, None] + np.zeros((1, 3))
    x, y = map_points(sizes[0], 0), map_points(sizes[1], 1)
    alone = to_host(gpu3d.chamfer(cp.asarray(x), cp.asarray(y), reduction="points"))
    x, y = np.append(x, strays, 0), np.append(y, strays + 1, 0)
    check_chamfer(cp, x, y, "strays")
    check_directions(cp, x, y, "strays")
    check_chamfer(cp, x[:-1].astype(np.float32), y, "mixed")
    both = to_host(gpu3d.chamfer(cp.asarray(x), cp.asarray(y), reduction="points"))
    assert_same_bits([z[:-4] for z in both], alone)


def test_real_sweeps(cp, data_dir):
    for name, points in clouds.real(data_dir):
        check_chamfer(cp, points, points[::-3] + points.dtype.type(0.25), name)


def test_one_plan_serves_many_lengths(cp):
    """Lengths that share a plan run with its grids and workspace, which fit the largest; larger lengths run first."""
    for n, m in ((1279, 2500), (1100, 2049), (40, 33), (33, 40), (1, 1), (30_000, 33_000), (29_000, 32_800)):
        check_chamfer(cp, *pair("near", n, m))


@pytest.mark.parametrize("kind", KINDS)
def test_100_runs_give_the_same_bits(cp, kind):
    x, y = (cp.asarray(p) for p in pair(kind, 20_000, 30_000))

    def run():
        loss, gradients = gpu3d.chamfer_value_and_grad(x, y)
        return [z.reshape(-1).view("u1") for z in (loss, *gradients)]

    expected = run()
    for _ in range(100):
        for number, (got, first) in enumerate(zip(run(), expected, strict=True)):
            assert bool((got == first).all()), number


# ---- views, the index ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_views(cp, dtype, dimensions):
    """Memory layouts change no bit. Inputs are not changed, and no result shares their memory."""
    x, y = (z[:, :dimensions].copy() for z in pair("near", 1300, 1700, dtype=dtype))
    device, expected = (cp.asarray(x), cp.asarray(y)), gpu3d.chamfer_value_and_grad(x, y)

    def shifted(z):
        memory = cp.empty(z.nbytes + 1, "u1")
        memory[1:] = z.reshape(-1).view("u1")
        return memory[1:].view(z.dtype).reshape(z.shape)

    for view in (
        cp.asfortranarray,
        lambda z: cp.repeat(z, 2, axis=1)[:, ::2],
        lambda z: cp.repeat(z, 2, axis=0)[::2],
        lambda z: cp.ascontiguousarray(z[::-1, ::-1])[::-1, ::-1],
        lambda z: cp.pad(z, ((0, 0), (1, 2)))[:, 1:-2],
        shifted,
    ):
        views = tuple(map(view, device))
        poison(cp)
        loss, gradients = gpu3d.chamfer_value_and_grad(*views)
        assert_same_bits(to_host((loss, *gradients)), (expected.loss, *expected.gradients))
        assert not any(cp.may_share_memory(z, v) for z in (loss, *gradients) for v in (*device, *views))
        options = {"x_lengths": None, "y_lengths": None, "squared": False, "reduction": "mean", "direction": "both"}
        residuals = with_residuals(*views, **options)[1]
        gradients = backward(None, *views, cp.repeat(residuals, 2)[::2], **options)
        assert_same_bits(to_host(gradients), expected.gradients)
    assert_same_bits([z.get() for z in device], (x, y))


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float32"), ("float64", "float64")], ids=str)
def test_an_index_stands_in_for_points(cp, dtypes):
    x_lengths, y_lengths = [300, 4000], [1500, 70]
    x, y = (z.astype(dtype) for z, dtype in zip(ragged(x_lengths, y_lengths), dtypes, strict=True))
    indices = [gpu3d.neighbor_index(cp.asarray(z), lengths=n) for z, n in ((x, x_lengths), (y, y_lengths))]
    loss, gradients = gpu3d.chamfer_value_and_grad(x, y, x_lengths=x_lengths, y_lengths=y_lengths)
    for sides, more in (
        (indices, {}),
        ((cp.asarray(x), indices[1]), {"x_lengths": x_lengths}),
        ((indices[0], cp.asarray(y)), {"y_lengths": y_lengths}),
    ):
        poison(cp)
        assert_same_bits(to_host(gpu3d.chamfer_value_and_grad(*sides, **more)), (loss, *gradients))
        assert_same_bits(to_host([gpu3d.chamfer(*sides, **more)]), [loss])


# ---- errors, streams, graphs, libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(cp, call, arguments, error, message):
    def asarray(y):
        return y if y.shape == (2,) or y.ndim == 1 else cp.asarray(y)  # these are not points

    assert_refused(call, arguments, error, message, asarray)


def test_empty(cp):
    check_empty(cp.asarray, lambda y: y.get())


def test_each_gradient_is_of_the_library_of_its_array(cp):
    torch = pytest.importorskip("torch")
    x, y = pair("near", 600, 900)
    expected = gpu3d.chamfer_value_and_grad(x, y).gradients
    here, index = torch.from_numpy(x).cuda(), gpu3d.neighbor_index(cp.asarray(y))
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(here, index)
    assert isinstance(loss, torch.Tensor) and isinstance(dx, torch.Tensor) and isinstance(dy, cp.ndarray)
    assert_same_bits((dx.cpu().numpy(), dy.get()), expected)
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(cp.asarray(x), gpu3d.neighbor_index(torch.from_numpy(y).cuda()))
    assert isinstance(loss, cp.ndarray) and isinstance(dx, cp.ndarray) and isinstance(dy, torch.Tensor)
    assert_same_bits((dx.get(), dy.cpu().numpy()), expected)
