# SPDX-License-Identifier: Apache-2.0
"""APML on the GPU against the dense definition, and for large clouds against the CPU.

CPU and GPU keep exactly the same pairs. Values may differ in their bits, because the CPU balances the plan in float64.
"""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from conftest import poison
from test_neighbors import DTYPES, assert_same_bits, ragged
from test_transport import (
    BAD,
    KINDS,
    RAGGED,
    SETTINGS,
    SYMMETRIZATIONS,
    assert_refused,
    check,
    check_edge_of_the_ball,
    check_map_coordinates,
    check_no_clouds,
    check_not_finite,
    check_outliers,
    check_room,
    check_strays,
    map_all,
    outliers,
    relative,
)

import gpu3d
from gpu3d import _arrays, transport
from gpu3d.reference import transport as reference

pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1023, 1025)


def to_host(y):
    return y.get()


def on_gpu(cp):
    """The options with which the checks of test_transport.py run here."""
    return {"as_array": cp.asarray, "back": to_host}


def flat(x, y, **given):
    """Plan, loss and gradients as a list of CuPy arrays."""
    loss, gradients = gpu3d.apml_value_and_grad(x, y, **given)
    given.pop("reduction", None)
    return [*gpu3d.apml_plan(x, y, **given), loss, *gradients]


def check_against_cpu(cp, x, y, note="", **given):
    """Compare with the CPU, for clouds that are too large for all pairs."""
    device = cp.asarray(x), cp.asarray(y)
    poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
    rows, cols, values, indptr, loss, dx, dy = map_all(to_host, flat(*device, **given))
    plan = gpu3d.apml_plan(x, y, **given)
    assert_same_bits((rows, cols, indptr), (plan.rows, plan.cols, plan.indptr), note)
    np.testing.assert_allclose(values, plan.values, rtol=0, atol=1e-5, err_msg=note)
    exact, gradients = gpu3d.apml_value_and_grad(x, y, **given)
    np.testing.assert_allclose(loss, exact, rtol=1e-5, err_msg=note)
    for got, expected in zip((dx, dy), gradients, strict=True):
        assert relative(got, expected.astype(np.float64)) < 1e-4 and expected.any(), note


def test_alone_and_beside_a_crowd(cp):
    """Sinkhorn runs in shared memory, or in global memory if another cloud does not fit; both give the same bits."""
    crowd = cp.ones((400, 3), np.float32)  # each point keeps all others
    for kind, n, symmetrize in (("near", 2000, "mean"), ("far", 700, "mean"), ("collapsed", 1500, "min")):
        x, y = map(cp.asarray, clouds.transport(kind, n, n + 100, seed=n))
        options = {"symmetrize": symmetrize, "reduction": "none", "max_entries": 500_000}
        alone, gradients = gpu3d.apml_value_and_grad(x, y, **options)
        lengths = {"pred_lengths": [n, 400], "target_lengths": [n + 100, 400]}
        beside = gpu3d.apml_value_and_grad(cp.concatenate((x, crowd)), cp.concatenate((y, crowd)), **lengths, **options)
        got = beside.loss[:1], beside.gradients[0][:n], beside.gradients[1][: n + 100]
        assert_same_bits(map_all(to_host, got), map_all(to_host, (alone, *gradients)), f"{kind} {symmetrize}")
        assert all(bool((z != 0).any()) for z in got)


# ---- the dense definition ------------------------------------------------------------------------------------------


def test_small_apml(cp):
    """For compute-sanitizer: every kind, one plan and two, small and large batches, 2-D, float64, NaN, overflow."""
    for kind in KINDS:
        for symmetrize in SYMMETRIZATIONS:
            check(*clouds.transport(kind, 300, 200), note=kind, symmetrize=symmetrize, iterations=3, **on_gpu(cp))
    for x_lengths, y_lengths in (*RAGGED, ([3] * 70, [4] * 70)):
        check(*ragged(x_lengths, y_lengths, dtype="float64"), x_lengths, y_lengths, **on_gpu(cp))
    check(*(p[:, :2] for p in clouds.transport("shell", 100, 70)), **on_gpu(cp))
    check(clouds.degenerate(200)["coincident"], clouds.uniform(100), **on_gpu(cp))
    check_room(*clouds.transport("near", 300, 200), **on_gpu(cp))
    check_not_finite(**on_gpu(cp))


def test_races_of_apml(cp):
    """For compute-sanitizer's racecheck, which is slow on the test above: one plan and two, and long rows."""
    check(*clouds.transport("near", 300, 280), iterations=2, **on_gpu(cp))
    check(*clouds.transport("shell", 64, 64), iterations=1, symmetrize="min", **on_gpu(cp))
    same = np.ones((270, 3), np.float32)
    check(same, same, iterations=1, **on_gpu(cp))


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_clouds(cp, kind, changes):
    for n, m in ((700, 600), (300, 800), (2048, 2048)):
        check(*clouds.transport(kind, n, m), note=kind, **changes, **on_gpu(cp))


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_across_the_edges_of_tiles(cp, kind, symmetrize):
    for n in SIZES:
        for m in (1, 2, 33, n):
            check(*clouds.transport(kind, n, m, seed=n), note=kind, symmetrize=symmetrize, **on_gpu(cp))


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("name", clouds.degenerate(10))
def test_special_clouds(cp, name, symmetrize):
    points = clouds.degenerate(250)[name]
    for other in (points[::-1].copy(), clouds.uniform(150), points[:100] * np.float32(1.01)):
        check(points, other, note=name, symmetrize=symmetrize, **on_gpu(cp))
        check(other, points, note=name, symmetrize=symmetrize, **on_gpu(cp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x_lengths", "y_lengths"),
    [*RAGGED, ([5] * 300, [7] * 300), ([700, 3, 90], [20, 500, 90])],
    ids=lambda n: str(len(n)),
)
def test_ragged_batches(cp, x_lengths, y_lengths, dtype):
    for symmetrize in SYMMETRIZATIONS:
        check(*ragged(x_lengths, y_lengths, dtype=dtype), x_lengths, y_lengths, symmetrize=symmetrize, **on_gpu(cp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_dtypes_and_dimensions(cp, dimensions, dtype):
    x, y = (p[:, :dimensions].astype(DTYPES[dtype]) for p in clouds.transport("shell", 150, 200))
    for other in DTYPES.values():
        check(x.astype(other), y, **on_gpu(cp))


def test_map_coordinates(cp):
    check_map_coordinates(**on_gpu(cp))


def test_strays_of_float64(cp):
    check_strays(**on_gpu(cp))
    x, y = (np.random.default_rng(n).random((n, 3)) * [90, 90, 5] + [5e5, 4.2e6, 100] for n in (5000, 6000))
    x[7], y[9] = 0, 1e30
    check_against_cpu(cp, x, y, "stray", max_entries=200_000)


def test_edge_of_the_ball(cp):
    check_edge_of_the_ball(**on_gpu(cp))


def test_not_finite(cp):
    check_not_finite(**on_gpu(cp))


@pytest.mark.parametrize("of_loss", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_each_cloud_times_that_of_its_loss(cp, dtype, of_loss):
    """The bits equal the CPU's, and for tensors those of torch's product."""
    rng = np.random.default_rng(0)
    lengths = (500, 0, 700), (300, 401, 2)
    dx, dy = (rng.normal(size=(sum(counts), 4)).astype(DTYPES[dtype]) for counts in lengths)
    losses = rng.normal(size=(3, 5)).astype(DTYPES[of_loss])
    another = DTYPES["bfloat16" if dtype == "float16" else "float16"]

    def arrays(xp, of_losses, of_rows, other):
        """dloss and both gradients, on the host and on the GPU."""
        z, x, y = map(xp.asarray, (losses, dx, dy.astype(other)))
        return [_arrays.read(given, "an array") for given in (of_losses(xp, z), of_rows(xp, x), of_rows(xp, y))]

    for of_losses in (
        lambda xp, z: z[1, :1].reshape(()),
        lambda xp, z: z[:, 2],
        lambda xp, z: z[::-1, 2],
        lambda xp, z: z[1, :3],
        lambda xp, z: xp.broadcast_to(z[1, :1], (3,)),
    ):
        for of_rows in (lambda xp, z: z[:, :3], lambda xp, z: z[:, 2:], lambda xp, z: xp.ascontiguousarray(z[:, :3])):
            for other in (DTYPES[dtype], another):
                poison(cp)
                got = transport.apml_backward_arrays(*arrays(cp, of_losses, of_rows, other), *lengths)
                exact = transport.apml_backward_arrays(*arrays(np, of_losses, of_rows, other), *lengths)
                assert_same_bits(map_all(to_host, got), exact)
                assert all(bool((z != 0).any()) for z in got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_times_a_tensor_is_rounded_as_torch_does(cp, dtype):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    dx, dy = (torch.randn(n, 3, device="cuda").to(kind) for n in (700, 500))
    for dloss in (
        torch.tensor(0.3, device="cuda"),
        torch.randn(2, device="cuda"),
        torch.rand((), device="cuda") * 70_000,
    ):
        lengths = (300, 400), (100, 400)
        got = transport.apml_backward_arrays(*(_arrays.read(z, "z") for z in (dloss, dx, dy)), *lengths)
        for z, gradient, counts in zip(got, (dx, dy), lengths, strict=True):
            each = dloss if dloss.ndim == 0 else torch.cat([dloss[b].expand(n, 1) for b, n in enumerate(counts)])
            assert torch.equal(z.nan_to_num(), (gradient * each).to(kind).nan_to_num()) and z.dtype == kind


# ---- the CPU, where all pairs are too many -------------------------------------------------------------------------


@pytest.mark.parametrize("symmetrize", SYMMETRIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4095, 4097, 8192, 30_000])
def test_large_clouds(cp, n, kind, symmetrize):
    check_against_cpu(cp, *clouds.transport(kind, n, n - 17), note=kind, symmetrize=symmetrize)


@pytest.mark.parametrize("kind", ["near", "independent"])
def test_many_large_clouds(cp, kind):
    pairs = [clouds.transport(kind, 2048 + b, 2048 - b, seed=b) for b in range(32)]
    x, y = (np.concatenate(side) for side in zip(*pairs, strict=True))
    lengths = {"pred_lengths": [2048 + b for b in range(32)], "target_lengths": [2048 - b for b in range(32)]}
    for reduction in ("mean", "none"):
        loss, gradients = gpu3d.apml_value_and_grad(cp.asarray(x), cp.asarray(y), reduction=reduction, **lengths)
        exact, expected = gpu3d.apml_value_and_grad(x, y, reduction=reduction, **lengths)
        np.testing.assert_allclose(to_host(loss), exact, rtol=1e-5)
        for got, close in zip(map_all(to_host, gradients), expected, strict=True):
            assert relative(got, close.astype(np.float64)) < 1e-4 and close.any()
    check_against_cpu(cp, x, y, **lengths)


@pytest.mark.parametrize("kind", ["near", "shell"])
def test_a_million_points(cp, kind):
    check_against_cpu(cp, *clouds.transport(kind, 1_000_003, 1_000_000))


def test_real_sweeps(cp, data_dir):
    for name, points in clouds.real(data_dir):
        points = points[np.isfinite(points).all(axis=1)]
        points = points[np.unique(points, axis=0, return_index=True)[1]]  # many equal points are refused
        check_against_cpu(cp, points[::3], points[1::3], note=name)


@pytest.mark.parametrize("kind", KINDS)
def test_100_runs_give_the_same_bits(cp, kind):
    x, y = (cp.asarray(p) for p in clouds.transport(kind, 20_000, 20_000))
    small = [cp.asarray(p) for p in clouds.transport(kind, 2000, 2000)]

    def run():
        return [z.reshape(-1).view("u1") for pair in ((x, y), small) for z in flat(*pair, max_entries=1 << 21)]

    expected = run()
    for _ in range(100):
        for number, (got, first) in enumerate(zip(run(), expected, strict=True)):
            assert bool((got == first).all()), number


# ---- room, errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [300, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_room(cp, kind, n):
    for symmetrize in SYMMETRIZATIONS:
        check_room(*clouds.transport(kind, n, n - 100), symmetrize=symmetrize, **on_gpu(cp))


@pytest.mark.parametrize("n", [40, 1000, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_how_much_room_there_is_changes_no_bit(cp, kind, n):
    """Entries are counted on the host, in two plans, or given: exactly enough, a power of two, and more."""
    x, y = map(cp.asarray, clouds.transport(kind, n, n + 11))
    for symmetrize in SYMMETRIZATIONS:
        found = len(gpu3d.apml_plan(x, y, symmetrize=symmetrize, max_entries=40 * n).rows)
        assert found > n
        results = [
            gpu3d.apml_value_and_grad(x, y, symmetrize=symmetrize, max_entries=room)
            for room in (None, 1 << (40 * n).bit_length(), 40 * n, 64 * n)
        ]
        first, *others = [map_all(to_host, (loss, *gradients)) for loss, gradients in results]
        for other in others:
            assert_same_bits(other, first)
        assert all(np.isfinite(z).all() and z.any() for z in first)


def test_outliers_that_hold_the_whole_cloud(cp, monkeypatch):
    check_outliers(cp.asarray)
    check_room(*outliers(), **on_gpu(cp))
    check(*outliers(), **on_gpu(cp))
    x, y = outliers()
    monkeypatch.setattr(reference, "default_limit", lambda points: 64 * points)
    with pytest.raises(ValueError) as on_cpu:
        gpu3d.apml(x, y)
    with pytest.raises(ValueError) as here:
        gpu3d.apml(cp.asarray(x), cp.asarray(y))
    assert str(here.value) == str(on_cpu.value)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(cp, arguments, error, message):
    assert_refused(arguments, error, message, cp.asarray)


def test_no_clouds(cp):
    check_no_clouds(**on_gpu(cp))


def test_emd(cp):
    x, y = clouds.transport("independent", 200, 200)
    distance = gpu3d.emd(cp.asarray(x), cp.asarray(y))
    assert isinstance(distance, cp.ndarray)
    assert_same_bits([to_host(distance)], [gpu3d.emd(x, y)])
    with pytest.raises(ValueError, match=f"one device: x is numpy on the CPU, y is cupy on cuda:{cp.cuda.Device().id}"):
        gpu3d.emd(x, cp.asarray(y))


def test_emd_of_a_batch(cp):
    x, y = clouds.transport("independent", 60, 60)
    given = {"x_lengths": (40, 20), "y_lengths": (40, 20), "reduction": "none"}
    loss, gradients = gpu3d.emd_value_and_grad(cp.asarray(x), cp.asarray(y), **given)
    expected = gpu3d.emd_value_and_grad(x, y, **given)
    assert_same_bits([z.get() for z in (loss, *gradients)], [expected.loss, *expected.gradients])
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        here = [torch.from_numpy(z).to("cuda", dtype).requires_grad_() for z in (x, y)]
        loss = gpu3d.emd(*here, **given)
        loss.sum().backward()
        assert loss.is_cuda and all(z.grad.is_cuda and z.grad.dtype == dtype and bool(z.grad.any()) for z in here)


def test_emd_is_not_captured(cp):
    x, y = (cp.asarray(z) for z in clouds.transport("independent", 60, 60))
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="call it outside of the capture, or capture apml or chamfer"):
            gpu3d.emd(x, y)
        stream.end_capture()


# ---- views, streams, graphs, libraries -----------------------------------------------------------------------------
