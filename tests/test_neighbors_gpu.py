# SPDX-License-Identifier: Apache-2.0
"""Neighbour search on the GPU against the reference: the same bits in every result, at every size, on every cloud."""

from __future__ import annotations

import math

import clouds
import numpy as np
import pytest
from conftest import poison
from test_neighbors import (
    BAD,
    DTYPES,
    KINDS,
    KS,
    RAGGED,
    REDUCTIONS,
    assert_refused,
    assert_same_bits,
    check_empty,
    pair,
    ragged,
    special,
)

import gpu3d
from gpu3d import neighbors
from gpu3d.reference import neighbors as reference

pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1023, 1025, 2049, 5000)


def to_host(results):
    """NumPy arrays of a named tuple, flat."""
    return [y.get() for part in results for y in (part if isinstance(part, tuple) else (part,))]


def check(cp, function, x, y, *arguments, note="", **options):
    """GPU and CPU agree bit for bit; memory is poisoned before the call. Returns what the CPU gives, flat."""
    device = cp.asarray(x), cp.asarray(y)
    poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
    got = function(*device, *arguments, **options)
    expected = function(x, y, *arguments, **options)
    assert type(got) is type(expected) or isinstance(expected, np.ndarray)
    if isinstance(expected, np.ndarray):
        got, expected = (got,), (expected,)
    flat = [y for part in expected for y in (part if isinstance(part, tuple) else (part,))]
    assert_same_bits(to_host(got), flat, f"{function.__name__} {note} {x.shape} {y.shape} {x.dtype} {arguments}")
    return flat


def check_knn(cp, query, points, k, note="", **options):
    return check(cp, gpu3d.knn, query, points, k, note=note, **options)


def check_radius(cp, query, points, radius, note="", **options):
    """With exact room, with room to spare, and with one entry too few, which is flagged."""
    limit = 64 * (len(query) + len(points))
    found = abs(int(gpu3d.radius_search(query, points, radius, max_entries=0, **options).offsets[-1]))
    if found <= limit:
        check(cp, gpu3d.radius_search, query, points, radius, note=note, **options)
    for max_entries in (found - 1, found, found + 100):
        if max_entries >= 0:
            check(cp, gpu3d.radius_search, query, points, radius, note=note, max_entries=max_entries, **options)
    return found


def check_chamfer(cp, x, y, note="", **options):
    for squared in (False, True):
        loss = check(cp, gpu3d.chamfer, x, y, note=note, squared=squared, **options)
        both = check(cp, gpu3d.chamfer_value_and_grad, x, y, note=note, squared=squared, **options)
        assert_same_bits(both[:1], loss)
    check_chamfer_backward(cp, x, y, note, **options)


def check_chamfer_backward(cp, x, y, note, x_lengths=None, y_lengths=None, reduction="mean"):
    """What was found, and the gradients times what is asked of the losses, which are every other number of an array."""
    shared = {"squared": True, "reduction": reduction}
    lengths = {"x_lengths": tuple(x_lengths or [len(x)]), "y_lengths": tuple(y_lengths or [len(y)])}
    numbers = np.random.default_rng(len(x)).standard_normal((len(lengths["x_lengths"]), 2), np.float32)
    found, gradients = [], []
    for asarray in (np.asarray, cp.asarray):
        arrays, dloss = (asarray(x), asarray(y)), asarray(numbers)[:, 0]
        dloss = dloss if reduction == "none" else dloss[:1].reshape(())
        poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
        found.append(neighbors.chamfer_found(*arrays, **lengths, **shared)[1])
        gradients.append(neighbors.chamfer_backward(dloss, *arrays, found[-1], **lengths, **shared))
    on_cpu, on_gpu = (np.split(cp.asnumpy(z), reference.found_parts(*lengths.values())[1:-1]) for z in found)
    for number, (a, b) in enumerate(zip(on_gpu, on_cpu, strict=True)):
        dtype = np.float32 if number % 3 else np.int32
        assert_same_bits([a.view(dtype)], [b.view(dtype)], f"part {number} of what was found, {note}")
    assert_same_bits([z.get() for z in gradients[1]], gradients[0], f"backward {note}")


# ---- the same bits as the reference --------------------------------------------------------------------------------


def test_small_neighbors(cp):
    """What compute-sanitizer runs: every op; short and full tiles, small and large k, a large batch, 2-D, NaN, ties."""
    for kind in KINDS:
        query, points = pair(kind, 300, 700)
        for k in (1, 16, 33, 64):
            check_knn(cp, query, points, k, kind)
        check_radius(cp, query, points, 2.0, kind)
        check_chamfer(cp, query, points, kind)
    query, points = ragged([0, 40, 1, 100], [5, 64, 300, 65])
    lengths = {"query_lengths": [0, 40, 1, 100], "lengths": [5, 64, 300, 65]}
    check_knn(cp, query, points, 64, **lengths)
    check_radius(cp, query, points, 1.0, **lengths)
    query, points = ragged([10] * 70, [7] * 70, dtype="float64")
    check_knn(cp, query, points, 3, query_lengths=[10] * 70, lengths=[7] * 70)
    check_chamfer(cp, query, points, x_lengths=[10] * 70, y_lengths=[7] * 70, reduction="none")
    points = special(600)["spoiled"]
    check_knn(cp, points, points, 16, "spoiled")
    check_chamfer(cp, points[:, :2], points[::-1, :2], "spoiled")
    check_knn(cp, np.zeros((200, 3), np.float32), np.zeros((300, 3), np.float32), 64, "all equal")


def test_races_of_neighbors(cp):
    """What compute-sanitizer's racecheck runs, under which the test above takes long: every kind of list, every op."""
    query, points = pair("near", 300, 280)
    for k in (2, 16, 40):
        check_knn(cp, query, points, k)
    check_radius(cp, query, points, 1.0)
    check_chamfer(cp, query, points)
    query, points = pair("near", 1500, 1500)
    check_knn(cp, query, points, 1)
    check_chamfer(cp, query, points)  # of more than one tile a cloud


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", KS)
def test_every_k(cp, k, kind):
    for n, m in ((1, 64), (1000, 1500), (3000, 5000)):
        check_knn(cp, *pair(kind, n, m, seed=k), k, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_across_the_edges_of_tiles(cp, kind):
    for m in SIZES:
        for n in (1, 33, m):
            query, points = pair(kind, n, m, seed=m)
            for k in {1, min(2, m), min(16, m), min(64, m)}:
                check_knn(cp, query, points, k, kind)
        check_radius(cp, query, points, 0.3, kind)
        check_chamfer(cp, query, points, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [20_000, 131_072, 131_073])
def test_large_clouds(cp, n, kind):
    query, points = pair(kind, n, n + 17)
    for k in (1, 2, 16, 64):
        check_knn(cp, query, points, k, kind)
    check_chamfer(cp, query, points, kind)
    radius = float(np.quantile(gpu3d.knn(query[:500], points, 8).distances, 0.2))
    assert check_radius(cp, query[:5000], points, radius, kind) > 500


@pytest.mark.parametrize("n", [1_000_000, 1_000_003])
def test_a_million_points(cp, n):
    query, points = pair("near", n, n)
    check_knn(cp, query, points, 1)
    check_knn(cp, query[: n // 10], points, 16)
    check_chamfer(cp, query, points)


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(cp, name):
    points = special(5000)[name]
    query = np.concatenate([points[:1500], clouds.uniform(100)])
    for k in (1, 3, 16, 64):
        check_knn(cp, query, points, k, name)
        check_knn(cp, points, query, k, name)
    check_chamfer(cp, query, points, name)
    finite = points[np.isfinite(points).all(axis=1)].astype(float)
    extent = float(np.ptp(finite)) if len(finite) else 1.0
    for radius in (0.0, extent / 500, extent / 20, 0.125, math.inf):
        check_radius(cp, query[::4], points, radius, name)


def test_crowded_places(cp):
    """What breaks a search by cells: a place of 3,469 points, and 40 % of a sweep at the origin."""
    sweep = clouds.lidar_like(120_000)
    sweep[np.random.default_rng(0).permutation(len(sweep))[:3469]] = 0
    for points in (sweep, clouds.degenerate(60_000)["40 % at the origin"]):
        for k in (1, 16, 64):
            check_knn(cp, points, points, k)
        check_chamfer(cp, points, points[: len(points) // 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query_lengths", "lengths"),
    [*RAGGED, ([2048] * 32, [2048] * 32), ([7] * 300, [9] * 300)],
    ids=lambda n: str(len(n)),
)
def test_ragged_batches(cp, query_lengths, lengths, dtype):
    query, points = ragged(query_lengths, lengths, dtype=dtype)
    options = {"query_lengths": query_lengths, "lengths": lengths}
    for k in (1, 3, 16, 64):
        if k <= min(m for n, m in zip(query_lengths, lengths, strict=True) if n):
            check_knn(cp, query, points, k, **options)
    check_radius(cp, query, points, 0.2, **options)
    if min(query_lengths + lengths) > 0:
        for reduction in REDUCTIONS:
            check_chamfer(cp, query, points, x_lengths=query_lengths, y_lengths=lengths, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_dtypes_and_dimensions(cp, dimensions, dtype):
    query, points = (p[:, :dimensions] for p in pair("near", 2000, 3000, dtype=dtype))
    check_radius(cp, query, points, 0.5)
    check_chamfer(cp, query, points)
    for other in DTYPES.values():  # the cloud's dtype says where coordinates count from
        for k in (1, 16):
            check_knn(cp, query.astype(other), points, k)


def test_map_coordinates(cp):
    query, points = (p + [5e6, 4.5e6, 300] for p in pair("near", 5000, 6000, dtype="float64"))
    points[::100, 0], points[50::100, 2] = np.nan, -np.inf  # no part of the minimum
    query[7, 1] = 1e300
    for k in (1, 16):
        check_knn(cp, query, points, k)
    check_radius(cp, query, points, 1.0)
    check_chamfer(cp, np.delete(query, 7, axis=0), points)


def test_radius_at_the_distance_of_a_neighbour(cp):
    query, points = pair("near", 300, 5000)
    distances = gpu3d.knn(query, points, 8).distances
    for i in range(0, 300, 30):
        for radius in (distances[i, 7], np.nextafter(distances[i, 7], np.float32(0))):
            check_radius(cp, query, points, float(radius))


def test_too_many_entries(cp):
    points = clouds.uniform(5000)
    message = r"radius = 1e\+30 finds 25000000 neighbours, more than 64 .* = 640000; query row 0 alone has 5000.*max_en"
    with pytest.raises(ValueError, match=message):
        gpu3d.radius_search(cp.asarray(points), cp.asarray(points), 1e30)
    points[100:] += 1000  # a crowd, and the row that has most of it is named
    points[200:3000] = points[3000]
    with pytest.raises(ValueError) as on_cpu:
        gpu3d.radius_search(points, points, 0.5)
    with pytest.raises(ValueError) as on_gpu:
        gpu3d.radius_search(cp.asarray(points), cp.asarray(points), 0.5)
    assert str(on_gpu.value) == str(on_cpu.value) and "query row 200 alone" in str(on_cpu.value)


def test_real_sweeps(cp, data_dir):
    for name, points in clouds.real(data_dir):
        check_knn(cp, points, points, 16, name)
        other = points[::-3] + points.dtype.type(0.25)
        check_chamfer(cp, points, other, name)


def test_brute_force(cp):
    """Straight against all pairs, should the k-d tree err like the kernel."""
    for kind in KINDS:
        query, points = pair(kind, 2000, 20_000)
        for k in (1, 16, 64):
            expected = reference.brute_force_knn(query, [2000], points, [20_000], k)
            assert_same_bits(to_host(gpu3d.knn(cp.asarray(query), cp.asarray(points), k)), expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_100_runs_give_the_same_bits(cp, kind):
    x, y = (cp.asarray(p) for p in pair(kind, 20_000, 30_000))

    def run():
        found = gpu3d.knn(x, y, 16), gpu3d.radius_search(x[:2000], y, 0.2, max_entries=1 << 20)
        loss, gradients = gpu3d.chamfer_value_and_grad(x, y)
        return [z.reshape(-1).view("u1") for z in (*found[0], *found[1], loss, *gradients)]

    expected = run()
    for _ in range(100):
        for number, (got, first) in enumerate(zip(run(), expected, strict=True)):
            assert bool((got == first).all()), number


# ---- views, the index ----------------------------------------------------------------------------------------------


def test_views(cp):
    """Where the rows lie in memory changes no bit; and they are left as they are."""
    x, y = pair("near", 1300, 1700)
    device = cp.asarray(x), cp.asarray(y)

    def run(a, b):
        found = *gpu3d.knn(a, b, 5), *gpu3d.radius_search(a, b, 0.3)
        loss, gradients = gpu3d.chamfer_value_and_grad(a, b)
        return [*found, loss, *gradients]

    expected = run(x, y)

    def shifted(z):
        flat = cp.empty(z.size + 1, z.dtype)
        flat[1:] = z.reshape(-1)
        return flat[1:].reshape(z.shape)

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
        got = run(*views)
        assert_same_bits([z.get() for z in got], expected)
        assert not any(cp.may_share_memory(z, v) for z in got for v in (*device, *views))
    assert_same_bits([z.get() for z in device], (x, y))


def test_an_index_stands_in_for_points(cp):
    query_lengths, lengths = [300, 40], [500, 70]
    query, points = ragged(query_lengths, lengths)
    index = gpu3d.neighbor_index(cp.asarray(points), lengths=lengths)
    query_index = gpu3d.neighbor_index(cp.asarray(query), lengths=query_lengths)
    options, both = {"query_lengths": query_lengths}, {"query_lengths": query_lengths, "lengths": lengths}
    for _ in range(2):
        poison(cp)
        for k in (1, 16):
            got = gpu3d.knn(cp.asarray(query), index, k, **options)
            assert_same_bits(to_host(got), gpu3d.knn(query, points, k, **both))
        got = gpu3d.radius_search(cp.asarray(query), index, 1.0, **options)
        assert_same_bits(to_host(got), gpu3d.radius_search(query, points, 1.0, **both))
        loss, gradients = gpu3d.chamfer_value_and_grad(query, points, x_lengths=query_lengths, y_lengths=lengths)
        got = gpu3d.chamfer_value_and_grad(query_index, index)
        assert_same_bits(to_host(got), (loss, *gradients))
        got = gpu3d.chamfer_value_and_grad(cp.asarray(query), index, x_lengths=query_lengths)
        assert_same_bits(to_host(got), (loss, *gradients))
        itself = gpu3d.knn(cp.asarray(points), index, 4, query_lengths=lengths)
        assert_same_bits(to_host(itself), gpu3d.knn(points, points, 4, query_lengths=lengths, lengths=lengths))


# ---- errors, streams, graphs, libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "arguments", "error", "message"), BAD)
def test_bad_input(cp, call, arguments, error, message):
    assert_refused(call, arguments, error, message, cp.asarray)


def test_empty(cp):
    check_empty(cp.asarray, lambda y: y.get())


def test_host_and_device_do_not_mix(cp):
    points = clouds.uniform(100)
    device, here, there = cp.asarray(points), "numpy on the CPU", "cupy on cuda:0"
    with pytest.raises(ValueError, match=f"one device: query is {there}, points is {here}"):
        gpu3d.knn(device, points, 3)
    with pytest.raises(ValueError, match=f"one device: query is {here}, points is {there}"):
        gpu3d.knn(points, gpu3d.neighbor_index(device), 3)
    with pytest.raises(ValueError, match=f"one device: query is {here}, points is {there}"):
        gpu3d.radius_search(points, device, 1.0)
    with pytest.raises(ValueError, match=f"one device: x is {there}, y is {here}"):
        gpu3d.chamfer(device, points)


def run_captured(x, y, index, lengths):
    """Every call that needs no sync."""
    options = {"query_lengths": lengths, "lengths": lengths}
    indexed = gpu3d.knn(x, index, 2, query_lengths=lengths)
    found = gpu3d.radius_search(x, y, 0.5, max_entries=1 << 18, **options)
    flagged = gpu3d.radius_search(x, y, 0.5, max_entries=1, **options)
    loss, gradients = gpu3d.chamfer_value_and_grad(x, y, x_lengths=lengths, y_lengths=lengths)
    alone = gpu3d.chamfer(x, y, x_lengths=lengths, y_lengths=lengths, reduction="none")
    return [*gpu3d.knn(x, y, 16, **options), *indexed, *found, *flagged, loss, *gradients, alone]


@pytest.mark.parametrize("lengths", [[3000], [40] * 75, [30_000]], ids=["1 cloud", "75 clouds", "a large cloud"])
def test_captured_in_a_graph(cp, lengths):
    """No host sync, no copy from host memory: a capture would refuse the one and freeze the other."""
    n = sum(lengths)
    first, other = (tuple(cp.asarray(p) for p in pair("near", n, n, seed=seed)) for seed in (0, 1))
    index = gpu3d.neighbor_index(first[1].copy(), lengths=lengths)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        expected, expected_of_other = ([z.get() for z in run_captured(*p, index, lengths)] for p in (first, other))
        stream.synchronize()
        stream.begin_capture()
        got = run_captured(*first, index, lengths)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits([z.get() for z in got], expected)
        for a, b in zip(first, other, strict=True):
            a[:] = b  # a replay reads what the buffers hold then
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits([z.get() for z in got], expected_of_other)
    assert expected[0].tobytes() != expected_of_other[0].tobytes() and expected[-1].all()


def test_the_current_stream_is_used(cp):
    """Work waits behind what the caller's stream still does: a wrong stream would read the old rows."""
    first, other = (tuple(cp.asarray(p) for p in pair("near", 30_000, 30_000, seed=seed)) for seed in (0, 1))
    index = gpu3d.neighbor_index(first[1].copy())
    expected = [z.get() for z in run_captured(*other, index, [30_000])]
    slow = cp.zeros((4096, 4096), np.float32)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            slow = slow @ slow
        for a, b in zip(first, other, strict=True):
            a[:] = b
        got = run_captured(*first, index, [30_000])
    stream.synchronize()
    assert_same_bits([z.get() for z in got], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_and_out(cp, dtype):
    torch = pytest.importorskip("torch")
    x, y = pair("near", 600, 900, dtype=dtype)

    def tensor(z):
        return torch.from_numpy(z.astype(np.float64)).to(getattr(torch, z.dtype.name)).cuda().requires_grad_()

    def run(a, b):
        loss, gradients = gpu3d.chamfer_value_and_grad(a, b)
        index = gpu3d.neighbor_index(b)
        return [*gpu3d.knn(a, b, 4), *gpu3d.knn(a, index, 1), *gpu3d.radius_search(a, b, 1.0), loss, *gradients]

    expected = run(x, y)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = run(tensor(x), tensor(y))
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
    x, y = pair("near", 600, 900, dtype=dtype)
    here = [jax.device_put(z, gpus[0]) for z in (x, y)]
    loss, gradients = gpu3d.chamfer_value_and_grad(*here)
    exact, expected = gpu3d.chamfer_value_and_grad(x, y)
    got = [*gpu3d.knn(*here, 4), loss, *gradients]
    assert all(isinstance(z, jax.Array) for z in got)
    assert_same_bits(got, [*gpu3d.knn(x, y, 4), exact, *expected])
