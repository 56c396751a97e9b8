# SPDX-License-Identifier: Apache-2.0
"""APML on the GPU: the pairs of the dense definition and its numbers; of large clouds, those of the CPU.

CPU and GPU keep the same pairs, to the last. Values need not agree to the bit: the CPU balances the plan in float64.
"""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from conftest import poison
from test_apml import (
    BAD,
    KINDS,
    RAGGED,
    REDUCTIONS,
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
    map_all,
    outliers,
    relative,
)
from test_neighbors import DTYPES, assert_same_bits, ragged

import gpu3d

pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 511, 513, 1023, 1025)


def to_host(y):
    return y.get()


def on_gpu(cp):
    """What the checks of test_apml.py take to run here."""
    return {"as_array": cp.asarray, "back": to_host}


def flat(x, y, **given):
    """Plan, loss and gradients as CuPy arrays."""
    loss, gradients = gpu3d.apml_value_and_grad(x, y, **given)
    given.pop("reduction", None)
    return [*gpu3d.apml_plan(x, y, **given), loss, *gradients]


def check_against_cpu(cp, x, y, note="", **given):
    """For what is too large for all pairs."""
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
    """Sinkhorn runs in shared memory, and in global memory beside a cloud that does not fit there: the same bits."""
    crowd = cp.ones((400, 3), np.float32)  # each keeps all of the others
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
    """What compute-sanitizer runs: every kind, both plans, batches large and small, 2-D, float64, NaN, no room."""
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
    """What compute-sanitizer's racecheck runs, under which the test above takes long: both plans, and long rows."""
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


def test_edge_of_the_ball(cp):
    check_edge_of_the_ball(**on_gpu(cp))


def test_not_finite(cp):
    check_not_finite(**on_gpu(cp))


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
        points = points[np.unique(points, axis=0, return_index=True)[1]]  # a crowd of equal points is refused
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


def test_outliers_that_hold_the_whole_cloud(cp):
    check_outliers(cp.asarray)
    check_room(*outliers(), **on_gpu(cp))
    check(*outliers(), **on_gpu(cp))
    x, y = outliers()
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


def test_host_and_device_do_not_mix(cp):
    points = clouds.uniform(100)
    with pytest.raises(ValueError, match="one device: pred is cupy on cuda:0, target is numpy on the CPU"):
        gpu3d.apml(cp.asarray(points), points)
    with pytest.raises(ValueError, match="one device: x is numpy on the CPU, y is cupy on cuda:0"):
        gpu3d.emd(points, cp.asarray(points))


def test_emd(cp):
    x, y = clouds.transport("independent", 200, 200)
    distance = gpu3d.emd(cp.asarray(x), cp.asarray(y))
    assert isinstance(distance, cp.ndarray)
    assert_same_bits([to_host(distance)], [gpu3d.emd(x, y)])


# ---- views, streams, graphs, libraries -----------------------------------------------------------------------------


def test_views(cp):
    """Where the rows lie in memory changes no bit; and they are left as they are."""
    x, y = clouds.transport("shell", 1300, 1700)
    device = cp.asarray(x), cp.asarray(y)
    expected = map_all(to_host, flat(*device))
    for view in (
        cp.asfortranarray,
        lambda z: cp.repeat(z, 2, axis=1)[:, ::2],
        lambda z: cp.repeat(z, 2, axis=0)[::2],
        lambda z: cp.ascontiguousarray(z[::-1, ::-1])[::-1, ::-1],
        lambda z: cp.pad(z, ((0, 0), (1, 2)))[:, 1:-2],
    ):
        views = tuple(map(view, device))
        poison(cp)
        got = flat(*views)
        assert_same_bits(map_all(to_host, got), expected)
        assert not any(cp.may_share_memory(z, v) for z in got for v in (*device, *views))
    assert_same_bits(map_all(to_host, device), (x, y))


def run_captured(x, y, lengths):
    """Every call that needs no sync; of the last there is not room for all."""
    given = {"pred_lengths": lengths, "target_lengths": lengths}
    loss, gradients = gpu3d.apml_value_and_grad(x, y, max_entries=1 << 19, **given)
    of_each = gpu3d.apml(x, y, max_entries=1 << 19, symmetrize="min", reduction="none", **given)
    short, cut = gpu3d.apml_value_and_grad(x, y, max_entries=100, **given)
    return [loss, *gradients, of_each, short, *cut]


@pytest.mark.parametrize("lengths", [[3000], [40] * 75, [30_000]], ids=["1 cloud", "75 clouds", "a large cloud"])
def test_captured_in_a_graph(cp, lengths):
    """No host sync, no copy from host memory: a capture would refuse the one and freeze the other."""
    n = sum(lengths)
    first, other = (tuple(cp.asarray(p) for p in clouds.transport("shell", n, n, seed=seed)) for seed in (0, 1))
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        expected, expected_of_other = (map_all(to_host, run_captured(*p, lengths)) for p in (first, other))
        stream.synchronize()
        stream.begin_capture()
        got = run_captured(*first, lengths)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits(map_all(to_host, got), expected)
        for a, b in zip(first, other, strict=True):
            a[:] = b  # a replay reads what the buffers hold then
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits(map_all(to_host, got), expected_of_other)
    assert expected[0] != expected_of_other[0] and expected[3].all()
    assert all(np.isnan(z).all() for z in expected[4:])


def test_the_current_stream_is_used(cp):
    """Work waits behind what the caller's stream still does: a wrong stream would read the old rows."""
    first, other = (tuple(cp.asarray(p) for p in clouds.transport("shell", 9000, 9000, seed=s)) for s in (0, 1))
    expected = map_all(to_host, run_captured(*other, [9000]))
    slow = cp.zeros((4096, 4096), np.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            slow = slow @ slow
        for a, b in zip(first, other, strict=True):
            a[:] = b
        got = run_captured(*first, [9000])
    stream.synchronize()
    assert_same_bits(map_all(to_host, got), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_and_out(cp, dtype):
    torch = pytest.importorskip("torch")
    x, y = (p.astype(DTYPES[dtype]) for p in clouds.transport("shell", 600, 900))

    def tensor(z):
        return torch.from_numpy(z.astype(np.float64)).to(getattr(torch, z.dtype.name)).cuda().requires_grad_()

    expected = map_all(to_host, flat(cp.asarray(x), cp.asarray(y)))
    with torch.cuda.stream(torch.cuda.Stream()):
        got = flat(tensor(x), tensor(y))
        torch.cuda.current_stream().synchronize()
        for number, (z, exact) in enumerate(zip(got, expected, strict=True)):
            assert isinstance(z, torch.Tensor) and z.is_cuda and not z.requires_grad, number
            assert str(z.dtype) == f"torch.{exact.dtype.name}" and tuple(z.shape) == exact.shape, number
            np.testing.assert_array_equal(z.cpu().double().numpy(), exact.astype(np.float64), str(number))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax_in_and_out(cp, dtype):
    jax = pytest.importorskip("jax")
    gpus = [d for d in jax.devices() if d.platform != "cpu"]
    if not gpus:
        pytest.skip("this JAX has no CUDA plugin")
    x, y = (p.astype(DTYPES[dtype]) for p in clouds.transport("shell", 600, 900))
    here = [jax.device_put(z, gpus[0]) for z in (x, y)]
    for reduction in REDUCTIONS:
        loss, gradients = gpu3d.apml_value_and_grad(*here, reduction=reduction)
        exact, expected = gpu3d.apml_value_and_grad(cp.asarray(x), cp.asarray(y), reduction=reduction)
        got = [loss, *gradients]
        assert all(isinstance(z, jax.Array) for z in got)
        assert_same_bits(got, map_all(to_host, [exact, *expected]))
