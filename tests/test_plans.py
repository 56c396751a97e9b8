# SPDX-License-Identifier: Apache-2.0
"""Plans as data, without a GPU: arguments fit their signatures, and pointers stay in their memories."""

from __future__ import annotations

import gc
import itertools
import struct
import tracemalloc

import numpy as np
import plans
import pytest

import gpu3d
from gpu3d import _arrays, buckets, surface, transport
from gpu3d import neighbors as op_neighbors
from gpu3d import pooling as op_pooling
from gpu3d._arrays import FLOATS, INT32, INT64, Given, Origin, Spec
from gpu3d.chamfer import chamfer_backward_results, chamfer_results, points_results
from gpu3d.cuda import attention, chamfer, clouds, launcher, metrics, neighbors, pooling
from gpu3d.cuda import buckets as cuda_buckets
from gpu3d.cuda import surface as cuda_surface
from gpu3d.cuda import transport as cuda_transport
from gpu3d.cuda.plan import DEVICES, Call, Input, Kernel, Number, Result, Steps, parameters
from gpu3d.metrics import compare_clouds_results
from gpu3d.reference.buckets import BALANCES, HASHES

LENGTHS = {
    "empty": (0,),
    "one point": (1,),
    "a tile": (3000,),
    "merged": (120_000, 0, 7),
    "radix": (600_000, 5),
    "wide": (2**24 + 1,),
    "many": tuple(range(100)),
    "many, merged": (*range(100), 9000),
}


def strided(shape, dtype):
    """A view of every other row of a wider array."""
    size = np.dtype(dtype).itemsize
    strides = tuple(size * int(np.prod(shape[d + 1 :])) * (2 if d == 0 else 1) for d in range(len(shape)))
    return Spec(shape, np.dtype(dtype), strides, 4)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_bucketize(lengths, arch):
    device, n = DEVICES[arch], sum(lengths)
    for dtype, hash, balance in itertools.product(FLOATS, HASHES, BALANCES):
        for points in (Spec((n, 3), dtype), strided((n, 3), dtype)):
            for voxel_size, bounds in ((None, None), (0.5, "robust"), ("per_axis", ((0.0,) * 3, (1.0,) * 3))):
                call = cuda_buckets.bucketize(points, lengths, 64, hash, balance, voxel_size, 3, bounds, device)
                unused = plans.check(call, [points], buckets.bucketize_results(lengths, 64, n), device)
                assert unused <= {"cell", "span"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_grids_cover_the_work(arch):
    """One plan serves all lengths with the same number of buckets. Its grids and workspace fit the longest of them."""
    device, size = DEVICES[arch], 512
    for n in (2000, 60_001, 524_200, 700_000, 3_000_000):
        most = -(-n // size) * size
        calls = [
            cuda_buckets.bucketize(Spec((m, 3), FLOATS[0]), (m,), size, "zorder_div", balance, None, 0, bounds, device)
            for m in (n, most)
            for balance, bounds in itertools.product(BALANCES, (None, "robust"))
        ]
        for call in calls:
            table = call.numbers["clouds"]
            grids = {step.kernel.function: step.grid for step in call.plan.steps if hasattr(step, "kernel")}
            for name, grid in grids.items():
                if name in ("merge_bounds", "merge_tiles", "merge_splitters", "radix_pass", "radix_last"):
                    assert grid >= table.tiles
                if name in ("merge_partitions", "radix_keys"):
                    assert grid >= table.groups
        assert all(one.plan is other.plan for one, other in zip(calls[:4], calls[4:], strict=True))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "complex128", "float8_e5m2"])
@pytest.mark.parametrize("trailing", [(), (3,), (4, 16), (0,), (257,)], ids=str)
def test_moves(dtype, trailing):
    dtype = _arrays.numpy_dtype(dtype) if dtype.startswith("float8") else np.dtype(dtype)
    device = DEVICES["sm_90a"]
    for rows, index in ((1000, 1024), (1024, 1000), (0, 0)):
        for misalignment in (0, 4, 1):
            for x in (Spec((rows, *trailing), dtype, None, misalignment), strided((rows, *trailing), dtype)):
                pattern = cuda_buckets.fill_pattern(np.zeros((), dtype))
                call = cuda_buckets.move_rows(x, Spec((index,), INT32), pattern)
                out = Spec((index, *trailing), dtype)
                plans.check(call, [x, Spec((index,), INT32)], [out], device)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_scopes(lengths):
    offsets = buckets.bucket_offsets(lengths, 64)
    for size, shift, stride in ((8, 0, 1), (1, -3, 1), (4, 2, 3), (1000, 0, 2**31 - 1)):
        counts = np.diff(offsets).tolist()
        rows = buckets.num_scopes(counts, size, stride)
        call = cuda_buckets.scopes(offsets, 64, size, shift, stride)
        assert call.numbers["clouds"].groups == rows
        plans.check(call, [], [Spec((rows, size), INT32)], DEVICES["sm_90a"])


def test_many_clouds_have_the_scopes_of_each():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 2000, 300)
    offsets = buckets.bucket_offsets(lengths.tolist(), 64)
    for size, stride in ((1, 1), (8, 1), (2, 5), (4, 2**31 - 1)):
        call = cuda_buckets.scopes(offsets, 64, size, 0, stride)
        assert call == cuda_buckets.scopes(np.array(offsets), 64, size, 0, stride)
        counts = np.diff(offsets).tolist()
        rows = np.diff(np.frombuffer(call.numbers["clouds"].rows, np.int32).reshape(-1, 4), axis=0)
        assert rows[:, 2].tolist() == [buckets.num_scopes([count], size, stride) for count in counts]
        assert rows[:, 3].tolist() == rows[:, 0].tolist() == [64 * count for count in counts]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_moves_and_scopes_of_two_levels(lengths):
    """Steps of one plan, whose numbers have names of the caller's."""
    steps, inputs, results, numbers = Steps(4, 6), [], [], {}
    for level, bucket_size in enumerate((64, 16)):
        offsets = buckets.bucket_offsets(lengths, bucket_size)
        counts, n, slots = np.diff(offsets).tolist(), sum(lengths), offsets[-1] * bucket_size
        table = cuda_buckets.scopes_of(counts, bucket_size, 8, 2)
        assert table.groups == buckets.num_scopes(counts, 8, 2)
        names = [f"{name} {level}" for name in ("clouds", "shift", "points")]
        numbers |= zip(names, (table, 4, n), strict=True)
        batch = clouds.argument(steps, names[0], len(lengths), bucket_size)
        for shift in (0, Number(names[1])):
            cuda_buckets.add_scopes(steps, batch, table.groups, 8, shift, 2, Result(len(results)))
            results.append(Spec((table.groups, 8), INT32))
        x, index = Input(len(inputs)), Input(len(inputs) + 1)
        inputs += Spec((slots, 3), FLOATS[0]), Spec((n,), INT32)
        sizes = {"rows": Number(names[2]), "most": slots, "row_bytes": 12, "word": 4}
        cuda_buckets.add_move(steps, x, index, Result(len(results)), **sizes, fill=bytes(cuda_buckets.PATTERN_BYTES))
        results.append(Spec((n, 3), FLOATS[0]))
    unused = plans.check(Call(steps.plan(), numbers), inputs, results, DEVICES["sm_90a"])
    assert not (unused and any(lengths))


def test_an_argument_that_does_not_fit_is_seen():
    def call_of(*args, signature="Qi"):
        steps = Steps(inputs=1, results=1)
        steps.launch(Kernel("clouds", "f", signature), grid=1, block=32, args=args)
        return steps.plan(), {}

    spec, device = Spec((4,), INT32), DEVICES["sm_90a"]
    plans.check(call_of(Result(0) + 12, 3), [spec], [spec], device)
    for wrong in ((Result(0) + 16, 3), (Result(0), 2**31), (Result(0),), (Input(0), 3), (Result(0), Input(0))):
        with pytest.raises((AssertionError, KeyError, ValueError, struct.error)):
            plans.check(call_of(*wrong), [spec], [spec], device)


def test_signatures():
    places, packer = parameters("Qif16s")
    assert [(place.offset, place.size) for place in places] == [(0, 8), (8, 4), (16, 4), (24, 16)]
    assert packer.pack(1, 2, 0.5, b"3") == struct.pack("<Qi4xf4x16s", 1, 2, 0.5, b"3")
    with pytest.raises(ValueError, match="signature must hold"):
        parameters("Qz")


def test_a_launch_of_nothing_and_of_too_much():
    steps = Steps(inputs=0, results=0)
    steps.launch(Kernel("clouds", "f", "i"), grid=0, block=32, args=(1,))
    assert steps.plan().steps == ()
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 blocks, got 2147483648"):
        steps.launch(Kernel("clouds", "f", "i"), grid=2**31, block=32, args=(1,))


# ---- neighbours and Chamfer ----------------------------------------------------------------------------------------

CLOUDS = {
    "a point": ((1,), (1,)),
    "nodes": ((1000,), (1024,)),
    "sorted": ((3000,), (5000,)),
    "branches": ((40_000, 10), (7, 70_000)),
    "levels": ((1_100_000, 5, 2**25 + 1), (70_000, 2**20 + 1, 0)),
    "radix": ((600_000,), (5,)),
    "ragged": ((5, 7, 100), (3, 2000, 50)),
    "a full table": ((30,) * 64, (40,) * 64),
    "many": (tuple(range(1, 101)), tuple(range(101, 1, -1))),
    "many, sorted": ((*range(1, 101), 9000), (*range(101, 1, -1), 1)),
    "no cloud": ((), ()),
}


GPUS = DEVICES["sm_80"], DEVICES["sm_90a"]


def test_levels_of_an_index():
    """Where a level begins for a cloud follows from its first branch. Clouds do not overlap, and all fit the memory."""
    rng = np.random.default_rng(0)
    batches = [(2**30 - 1,), (2**25 + 1, 2**20, 0, 1), (2**15,), (2**15 + 1,) * 70]
    batches += [tuple(2 ** int(e) + int(d) for e, d in rng.integers(-1, 25, (9, 2)).clip(0)) for _ in range(20)]
    for lengths in batches:
        made, _ = neighbors.layout(lengths, None)
        assert (made.levels == ()) == (max(lengths) <= 32**3)
        branches = [-(-n // 32**3) for n in lengths]
        first = np.concatenate([[0], np.cumsum(branches)])[:-1]
        for level, room in enumerate(made.levels):
            if level:
                first = first // 32 + np.arange(len(lengths))
            end = first + [(count - 1 >> 5 * level) + 1 for count in branches]
            assert (end[:-1] <= first[1:]).all() and end.max() <= room
        if made.levels:
            assert max((count - 1 >> 5 * level) + 1 for count in branches) <= 32


def arrays_of(n, dtype):
    """Forms of points: packed, misaligned, 2-D, strided, three-dimensional."""
    size = dtype.itemsize
    yield Spec((n, 3), dtype)
    yield Spec((n, 3), dtype, None, 12 if size == 4 else size)
    yield Spec((n, 3), dtype, None, 1)
    yield Spec((n, 2), dtype)
    yield Spec((n, 2), dtype, (8 * size, 2 * size), 0)
    yield Spec((1, n, 3), dtype, (7, 4 * size, size), 0)
    yield Spec((n, 3), dtype, (size + 1, size), 1)


def pairs_of(lengths):
    """Pairs of arrays of every dtype, the second contiguous."""
    n, m = map(sum, lengths)
    for a, b in itertools.product(FLOATS, FLOATS):
        for x in arrays_of(n, a) if a == b or b == FLOATS[0] else [Spec((n, 3), a)]:
            yield x, Spec((m, x.shape[-1]), b)


@pytest.mark.parametrize("lengths", CLOUDS.values(), ids=CLOUDS)
def test_searches(lengths):
    turns = itertools.count()
    for device, (x, y) in zip(itertools.cycle(GPUS), pairs_of(lengths), strict=False):
        memory = neighbors.index_memory(y, lengths[1])
        plans.check(neighbors.neighbor_index(y, lengths[1], device), [y], [memory], device)
        for index, same in ((False, False), (True, False), (False, True), (True, True)):
            if same and x.dtype != y.dtype:
                continue
            if index and neighbors.is_wide(x) > neighbors.is_wide(y):  # then the index is of no use
                continue
            dtype = op_neighbors.distance_dtype(x, y)
            queries, query_lengths = (y, lengths[1]) if same else (x, lengths[0])
            n, inputs = sum(query_lengths), [queries, memory if index else y]
            how = {"index": index, "same": same}
            arguments = queries, query_lengths, y, lengths[1]
            for k in (1, 2, 32, 33, 1024):
                call = neighbors.knn(*arguments, k, device, **how)
                plans.check(call, inputs, op_neighbors.knn_results(n, k, dtype), device)
            radii = (Spec((n,), FLOATS[0]), Spec((n,), FLOATS[1]), Spec((n,), FLOATS[2], (6,)))[n % 3]
            kinds = neighbors.Limits(0.5), neighbors.Limits(1e30, None, same), neighbors.Limits(radii=radii)
            limits = kinds[next(turns) % 3]
            own = [] if limits.radii is None else [radii]
            for k in (1, 16, 65):
                call = neighbors.knn(*arguments, k, device, limits=limits, **how)
                plans.check(call, inputs + own, op_neighbors.knn_results(n, k, dtype), device)
            for most in (0, 1, 1000):
                call = neighbors.radius(*arguments, limits, most, device, **how)
                plans.check(call, inputs + own, op_neighbors.radius_results(n, most, dtype), device)
            call, kept = neighbors.radius_count(*arguments, limits, device, **how)
            offsets, total = Spec((n + 1,), INT64), Spec((1,), INT64)
            plans.check(call, inputs + own, [offsets, total, *kept], device)
            call = neighbors.radius_fill(query_lengths, dtype == FLOATS[1], lengths[1], limits, 77)
            searched = memory if index else kept[-1]
            ready = [offsets, searched if same else kept[0], searched, *own]
            plans.check(call, ready, op_neighbors.radius_results(n, 77, dtype)[1:], device)


@pytest.mark.parametrize("lengths", [lengths for lengths, _ in CLOUDS.values()], ids=CLOUDS)
def test_normals(lengths):
    n = sum(lengths)
    for device, dtype in itertools.product(GPUS, FLOATS):
        for points in arrays_of(n, dtype):
            if points.shape[-1] == 3:
                for k, viewpoint in ((3, None), (64, (0.0, 1.0, -2.5))):
                    call = cuda_surface.normals(points, lengths, k, viewpoint, device)
                    plans.check(call, [points], surface.normals_results(points, n), device)
    seen, again = (cuda_surface.normals(points, lengths, 16, at, device) for at in ((0.0, 0.0, 1.0), None))
    assert seen.plan is again.plan and seen.numbers["viewpoint"] != again.numbers["viewpoint"]


@pytest.mark.parametrize("lengths", CLOUDS.values(), ids=CLOUDS)
def test_gradients_of_searches(lengths):
    n, device = sum(lengths[0]), DEVICES["sm_90a"]
    for x, y in pairs_of(lengths):
        for k, room in ((1, 0), (3, 1), (64, 1000)):
            dtype = op_neighbors.distance_dtype(x, y)
            distances, indices = op_neighbors.knn_results(n, k, dtype)
            views = strided((n, k), "f4"), Spec((n, k), FLOATS[2]), Spec((n, k), FLOATS[0], (0, 0)), distances
            for given, saved in itertools.product(views, (distances, distances._replace(strides=(16 * k, 16)))):
                inputs = [given, x, y, saved, indices]
                call = neighbors.knn_backward(*inputs)
                plans.check(call, inputs, op_neighbors.backward_results(x, y), device)
            offsets, indices, distances = op_neighbors.radius_results(n, room, dtype)
            views = strided((room,), "f4"), Spec((room,), FLOATS[1]), Spec((room,), FLOATS[0], (0,)), distances
            for given, saved in itertools.product(views, (offsets, offsets._replace(misalignment=4))):
                inputs = [given, x, y, saved, indices, distances]
                call = neighbors.radius_backward(*inputs)
                plans.check(call, inputs, op_neighbors.backward_results(x, y), device)


def test_grids_of_gradients():
    """One plan serves all smaller lengths. Its grids cover all their entries, queries and points."""
    for n, m, k in ((1, 1, 1), (1000, 3000, 5), (1023, 3071, 5), (70_000, 9, 64)):
        for dtype in (FLOATS[0], FLOATS[1]):
            x, y = Spec((n, 3), dtype), Spec((m, 3), dtype)
            distances, indices = op_neighbors.knn_results(n, k, dtype)
            call = neighbors.knn_backward(distances, x, y, distances, indices)
            launches = {step.kernel.function: step for step in call.plan.steps if hasattr(step, "kernel")}
            threads = {name: step.grid * step.block for name, step in launches.items()}
            lanes = launches["backward_queries"].args[3]
            assert lanes & (lanes - 1) == 0 and min(k, 32) <= lanes <= 32
            assert threads["backward_largest"] >= n * k and threads["backward_points"] >= m
            assert threads["backward_queries"] >= n * lanes
    calls = [
        neighbors.knn_backward(distances, Spec((n, 3), dtype), y, distances, indices).plan
        for n in range(1000, 5000)
        for distances, indices in [op_neighbors.knn_results(n, 4, dtype)]
    ]
    assert len(set(calls)) < 15


def usable_indices(points, lengths, indexed):
    """The memories of those indices that are in the dtype of the search, and the options that name them."""
    used = [
        given and neighbors.is_wide(z) == neighbors.is_wide(*points) for z, given in zip(points, indexed, strict=True)
    ]
    memories = [neighbors.index_memory(z, of) for z, of, given in zip(points, lengths, used, strict=True) if given]
    return memories, {"x_index": used[0], "y_index": used[1]}


@pytest.mark.parametrize("lengths", CLOUDS.values(), ids=CLOUDS)
def test_chamfer(lengths):
    (n, m), count = map(sum, lengths), len(lengths[0])
    directions = itertools.cycle(("both", "x_to_y", "y_to_x"))
    for device, (x, y) in zip(itertools.cycle(GPUS), pairs_of(lengths), strict=False):
        for (reduction, squared), direction in zip((("mean", False), ("none", True)), directions, strict=False):
            loss, residuals = chamfer_results(n, m, count, reduction, direction, op_neighbors.distance_dtype(x, y))
            gradients = chamfer_backward_results(x, y)
            arguments = x, lengths[0], y, lengths[1], squared, reduction, direction
            searched = points_results(n, m, direction, op_neighbors.distance_dtype(x, y))
            for indexed in itertools.product((False, True), repeat=2):
                memories, options = usable_indices((x, y), lengths, indexed)
                call = chamfer.chamfer(*arguments, device, **options)
                plans.check(call, [x, y, *memories], [loss, residuals], device)
                call = chamfer.chamfer(*arguments, device, gradients=True, **options)
                plans.check(call, [x, y, *memories], [loss, *gradients], device)
                call = chamfer.points(*arguments[:5], direction, device, **options)
                plans.check(call, [x, y, *memories], searched, device)
            views = [strided(loss.shape, "f4"), strided(loss.shape, "f8")] if loss.shape else []
            for dloss in (None, loss, Spec(loss.shape, FLOATS[2]), Spec(loss.shape, FLOATS[0], None, 2), *views):
                for saved in (residuals, residuals._replace(strides=(8,))):
                    call = chamfer.chamfer_backward(dloss, x, y, saved, *lengths, squared, reduction, direction)
                    plans.check(call, [dloss, x, y, saved], gradients, device)
            distances, nearest = searched
            spread = nearest._replace(strides=(8,))
            for given, saved in (
                (distances, nearest),
                (strided(distances.shape, "f4"), spread),
                (Spec(distances.shape, FLOATS[2]), nearest),
                (Spec(distances.shape, FLOATS[0], (0,)), spread),
            ):
                inputs = [given, x, y, distances, saved]
                call = chamfer.points_backward(*inputs, *lengths, squared, direction)
                plans.check(call, inputs, gradients, device)


@pytest.mark.parametrize("lengths", CLOUDS.values(), ids=CLOUDS)
def test_compare_clouds(lengths):
    limits = (), (0.5,), (0.1, 1e300), (0.0,) * 64
    for device, (x, y) in zip(itertools.cycle(GPUS), pairs_of(lengths), strict=False):
        for indexed, thresholds in zip(itertools.product((False, True), repeat=2), limits, strict=True):
            memories, options = usable_indices((x, y), lengths, indexed)
            call = metrics.compare_clouds(x, lengths[0], y, lengths[1], thresholds, device, **options)
            results = compare_clouds_results(len(lengths[0]), len(thresholds), op_neighbors.distance_dtype(x, y))
            plans.check(call, [x, y, *memories], results, device)


def test_one_plan_serves_many_lengths():
    device, dtype = DEVICES["sm_90a"], FLOATS[0]
    seen = set()
    for n in range(1000, 5000):
        spec = Spec((n, 3), dtype)
        call = chamfer.chamfer(spec, (n,), spec, (n,), False, "mean", "both", device)
        seen.add(call.plan)
    assert len(seen) < 15
    assert chamfer.chamfer(spec, (n,), spec, (n,), False, "mean", "both", device) is call
    rooms = [
        neighbors.radius(spec, (n,), spec, (n,), neighbors.Limits(0.5), most, device).plan
        for most in (65, 100, 128, 129)
    ]
    assert rooms[0] is rooms[1] is rooms[2] is not rooms[3]


# ---- what is kept --------------------------------------------------------------------------------------------------

SIZE = 16  # bucket_size


def rows(n, *columns, dtype=FLOATS[0]):
    return Spec((n, *columns), dtype)


def points_and_slots(lengths):
    """Arrays over points, over slots, and over the slots of children."""
    children = tuple(-(-n // 2) for n in lengths)
    return sum(lengths), buckets.num_slots(lengths, SIZE), buckets.num_slots(children, SIZE)


def _attention(lengths, device):
    slots = points_and_slots(lengths)[1]
    q, table = rows(slots, 2, 16), Spec((slots // SIZE, 4), INT32)
    attention.attention(q, q, q, table, lengths, SIZE, 0.1, True, device)
    attention.attention_backward(q, q, q, q, q, rows(slots, 2), table, lengths, SIZE, 0.1, device)


def _pooling(lengths, device):
    _, slots, children = points_and_slots(lengths)
    x, child, members = rows(slots, 8), rows(children, 8), Spec((children, 2), INT32)
    pooling.pool(x, rows(slots, 3), lengths, SIZE, 2, "mean")
    pooling.pool_backward(child, members, None, lengths, SIZE, 2, "mean")
    pooling.unpool(child, members, x, lengths, SIZE, 2)
    pooling.unpool_backward(x, members, lengths, SIZE, 2)


def _buckets(lengths, device):
    points = rows(sum(lengths), 3)
    for balance in BALANCES:
        cuda_buckets.bucketize(points, lengths, SIZE, "zorder_div", balance, None, 0, None, device)
    cuda_buckets.scopes(buckets.bucket_offsets(lengths, SIZE), SIZE, 4, 1, 1)


def _searches(lengths, device):
    points = rows(sum(lengths), 3)
    neighbors.knn(points, lengths, points, lengths, 8, device)
    neighbors.radius(points, lengths, points, lengths, neighbors.Limits(0.5), 1000, device)
    cuda_surface.normals(points, lengths, 16, None, device)


def _losses(lengths, device):
    points, options = rows(sum(lengths), 3), transport.Options(0.8, 1e-8, 20, "mean")
    chamfer.chamfer(points, lengths, points, lengths, False, "mean", "both", device, gradients=True)
    cuda_transport.apml(points, lengths, points, lengths, options, "mean", 1000, True, device)


BUILDERS = {f.__name__: f for f in (_buckets, _attention, _pooling, _searches, _losses)}


def kept_by(build, batches):
    """Bytes that stay allocated after plans were built."""
    device = DEVICES["sm_90a"]
    gc.collect()
    tracemalloc.start()
    for lengths in batches:
        build(lengths, device)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_lengths_of_wide_batches_are_not_kept(build):
    """Otherwise caches grow: 1,100 batches of 20,000 clouds once kept 943 MB."""
    rng = np.random.default_rng(0)
    batches = [tuple(rng.multinomial(10_000, np.full(3000, 1 / 3000)).tolist()) for _ in range(30)]
    build(batches[0], DEVICES["sm_90a"])
    kept = kept_by(build, batches)
    assert kept < 30 * 8 * 3000 / 2, f"{kept / 1e6:.1f} MB"  # half of the tuples of lengths alone


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_what_is_kept_of_many_batches_is_bounded(build):
    """Caches are full after some hundred different lengths. All together hold less than 32 MB."""
    rng = np.random.default_rng(0)
    kept = kept_by(build, (tuple(rng.integers(1, 5000, 1 + i % 3).tolist()) for i in range(1500)))
    assert kept < 32e6 / len(BUILDERS), f"{kept / 1e6:.1f} MB"


# ---- calls that are kept by the options that were passed -------------------------------------------------------------


class Launches:
    """Stands in for a GPU: arrays are read as if they were on one, and what a plain call launches is recorded."""

    def __init__(self, monkeypatch):
        self.done = []
        monkeypatch.setattr(_arrays, "read", self.read)
        monkeypatch.setattr(launcher, "device", lambda ordinal: DEVICES["sm_90a"])
        monkeypatch.setattr(launcher, "launch", self.launch)

    def read(self, x, name):
        return Given(x.shape, x.dtype, None, 64, Origin("cupy", 0), x)

    def launch(self, call, inputs, results, origin=None):
        made = [None if spec is None else np.zeros(spec.shape, spec.dtype) for spec in results]
        elements = [(x.shape, x.dtype) for x in made if x is not None and x.size]
        self.done.append((call.plan, call.numbers, [given.address for given in inputs], elements, origin))
        return made


LAYOUT = gpu3d.bucketize(np.zeros((100, 3), np.float32), 64)
ROWS = np.zeros((128, 8), np.float32)
PLAIN = {
    "bucketize": (
        buckets,
        lambda **options: gpu3d.bucketize(np.zeros((100, 3), np.float32), **{"bucket_size": 64, **options}),
        {"bucket_size": 32, "hash": "xor_mod", "balance": "probe", "voxel_size": 0.5, "seed": 1},
        {"bucket_size": True, "hash": ["xor_mod"], "balance": b"probe", "voxel_size": True, "seed": True},
    ),
    "bucket_pool": (
        op_pooling,
        lambda **options: gpu3d.bucket_pool(ROWS, ROWS[:, :3], LAYOUT, **options),
        {"ratio": np.int8(4), "reduce": "max"},
        {"ratio": np.array(4), "reduce": ["max"]},
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_calls_kept_as_passed(name, monkeypatch):
    """A call that is kept launches and returns what a call with checks does, and no wrong option is taken for it."""
    module, call, others, wrong = PLAIN[name]
    launches, kept = Launches(monkeypatch), module._kept_call
    kept.kept.cache_clear()
    for options in ({}, others, *[{option: value} for option, value in others.items()]):
        results = [call(**options), call(**options)]
        monkeypatch.setattr(module, "_kept_call", lambda *args: None)
        results.append(call(**options))
        monkeypatch.setattr(module, "_kept_call", kept)
        assert launches.done[-3] == launches.done[-2] == launches.done[-1]
        settings = [{key: x for key, x in vars(made).items() if isinstance(x, (int, str, tuple))} for made in results]
        assert settings[0] == settings[1] == settings[2] and settings[0]
    assert kept.kept.cache_info().hits == kept.kept.cache_info().misses == 2 + len(others)
    for option, value in wrong.items():
        with pytest.raises(TypeError, match=f"{option} must"):
            call(**{option: value})
    kept.kept.cache_clear()


def test_many_clouds_are_not_kept_as_passed(monkeypatch):
    launches = Launches(monkeypatch)
    buckets._kept_call.kept.cache_clear()
    gpu3d.bucketize(np.zeros((100, 20, 3), np.float32), 16)
    gpu3d.bucketize(np.zeros((2000, 3), np.float32), 16, lengths=[20] * 100)
    assert launches.done[0] == launches.done[1] and not buckets._kept_call.kept.cache_info().currsize
