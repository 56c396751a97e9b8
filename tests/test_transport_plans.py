# SPDX-License-Identifier: Apache-2.0
"""APML's plans as data, without a GPU: for every kind of input, arguments fit and pointers stay in their memories."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import plans
import pytest
from test_launcher import Driver

from gpu3d import _arrays, transport
from gpu3d._arrays import FLOATS, INT64, Spec
from gpu3d.cuda import clouds, launcher
from gpu3d.cuda import transport as cuda
from gpu3d.cuda.plan import DEVICES, Launch, Packed, Pointer, Table
from gpu3d.reference.transport import log_mass, log_threshold

ARCHS = "sm_80", "sm_90a"
LENGTHS = {
    "no clouds": ((), ()),
    "one cloud": ((1000,), (700,)),
    "a point each": ((1,), (1,)),
    "several nodes": ((3000, 5, 1), (700, 9000, 2)),
    "several branches": ((40_000,), (70_000,)),
    "64 clouds": ((20,) * 64, tuple(range(1, 65))),
    "65 clouds": ((20,) * 65, tuple(range(1, 66))),
    "many, some of several nodes": ((*range(1, 100), 5000), (40,) * 100),
}
OPTIONS = transport.Options(0.8, 1e-8, 20, "mean")
SEARCHES = {"pred masses", "target masses", "limit"}
TABLES = {"pred", "target", "both"}


def layouts(shape, dtype):
    """Memory layouts that need different steps."""
    size, width = dtype.itemsize, shape[-1]
    yield Spec(shape, dtype)
    yield Spec(shape, dtype, None, 4)
    yield Spec(shape, dtype, (2 * width * size, size))
    yield Spec(shape, dtype, (size, shape[0] * size))
    yield Spec(shape, dtype, (width * size + 1, size), 1)


ALIKE = [(dtype, dtype) for dtype in FLOATS]
MIXED = [(FLOATS[0], FLOATS[1]), (FLOATS[1], FLOATS[0]), (FLOATS[2], FLOATS[3])]


def cases(lengths, dtypes=ALIKE, dimensions=(2, 3)):
    """The first four arguments of a call: shapes, dtypes and strides of pred and of target."""
    for (x_type, y_type), d in itertools.product(dtypes, dimensions):
        x_shape, y_shape = ((sum(counts), d) for counts in lengths)
        for x, y in zip(layouts(x_shape, x_type), layouts(y_shape, y_type), strict=True):
            yield x, lengths[0], y, lengths[1]


def details(pair):
    """The numbers of the clouds besides their tables. Each plan uses some of them."""
    return {*pair.tables} - TABLES


def functions(call):
    return [step.kernel.function for step in call.plan.steps if isinstance(step, Launch)]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_one_plan(lengths, arch):
    device = DEVICES[arch]
    for case in (*cases(lengths), *cases(lengths, MIXED, (3,))):
        x, _, y, _ = case
        for reduction, room, with_grad in (("mean", 1001, True), ("none", 0, True), ("sum", 4096, False)):
            call = cuda.apml(*case, OPTIONS, reduction, room, with_grad, device)
            results = transport.apml_results(x, y, len(lengths[0]), reduction, with_grad)
            unused = plans.check(call, (x, y), results, device) - details(cuda.pair(*case, device))
            assert unused == (set() if lengths[0] else {*SEARCHES, "both"})
            assert functions(call).count("transport_search") == 2 * bool(lengths[0])
            assert functions(call).count("transport_plan") == 1
            assert call.plan.workspace >= 24 * room


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_two_plans(lengths, arch):
    """The inputs of the second plan are the results of the first, whatever its capacity was."""
    device = DEVICES[arch]
    for case in cases(lengths):
        x, x_lengths, y, y_lengths = case
        pair = cuda.pair(x, x_lengths, y, y_lengths, device)
        room, total = cuda.capacity(6 * (x.shape[0] + y.shape[0])), 3 * (x.shape[0] + y.shape[0])
        found = cuda.search_results(pair, room)
        unused = plans.check(cuda.search(pair, OPTIONS, room), (x, y), found, device) - details(pair)
        assert unused == (set() if lengths[0] else {*SEARCHES, *TABLES, "room"})
        for with_grad, reduction in ((True, "none"), (False, "mean")):
            call = cuda.transport(pair, OPTIONS, reduction, with_grad, total)
            results = transport.apml_results(x, y, len(x_lengths), reduction, with_grad)
            assert plans.check(call, found, results, device) - details(pair) == {"both"}
            assert functions(call)[-1] == "transport_plan" or with_grad
        call = cuda.entries(pair, OPTIONS, total)
        assert plans.check(call, found, cuda.entries_results(total), device) - details(pair) == {"both"}


def flat(plan):
    """Each launch as kernel, grid and arguments, with the fields of structs one by one."""
    for step in plan.steps:
        if isinstance(step, Launch):
            fields = [field for arg in step.args for field in (arg.fields if isinstance(arg, Packed) else (arg,))]
            yield (step.kernel, step.grid, step.block), fields


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_two_plans_launch_what_one_does(lengths):
    """Two plans launch what one plan does, on other memory: addresses correspond one to one."""
    room, names = 4096, {}
    for case in cases(lengths, MIXED):
        pair = cuda.pair(*case, DEVICES["sm_90a"])
        whole = cuda.apml(*case, OPTIONS, "sum", room, True, DEVICES["sm_90a"]).plan
        first = cuda.search(pair, OPTIONS, room).plan
        second = cuda.transport(pair, OPTIONS, "sum", True, room).plan
        parts = [*flat(first), *flat(second)]
        assert len(parts) == len(list(flat(whole)))
        names.clear()
        for number, ((kernel, fields), (part, of_part)) in enumerate(zip(flat(whole), parts, strict=True)):
            which = "first" if number < len(list(flat(first))) else "second"
            assert kernel == part and len(fields) == len(of_part)
            for field, other in zip(fields, of_part, strict=True):
                if not isinstance(field, Pointer):
                    assert field == other
                    continue
                # The second plan's inputs are the first's results.
                place = which, other
                if which == "second" and other.memory == "input":
                    place = "first", other._replace(memory="result")
                assert names.setdefault(place, field) == field
        # Each of the two plans writes its own tables of a large batch.
        assert len(names) - len(set(names.values())) == (2 if len(lengths[0]) > clouds.INLINE_CLOUDS else 0)


def test_lengths_that_are_about_as_large_share_plans():
    calls = []
    for n in (9900, 9901, 10_000, 10_200):
        x = Spec((n, 3), FLOATS[2])
        pair = cuda.pair(x, (n - 5, 5), x, (6, n - 6), DEVICES["sm_90a"])
        second = cuda.transport(pair, OPTIONS, "mean", True, 20_000)
        whole = cuda.apml(x, (n - 5, 5), x, (6, n - 6), OPTIONS, "mean", 777, True, DEVICES["sm_90a"])
        calls.append((cuda.search(pair, OPTIONS, 64), second, whole))
    for same in zip(*calls, strict=True):
        assert len({id(call.plan) for call in same}) == 1
        assert len({call.numbers["pred points"] for call in same}) == len(same)
    gradients = [Spec((n, 3), FLOATS[0]) for n in (900, 1000)]
    backwards = [cuda.apml_backward(Spec((), FLOATS[0]), x, x, (x.shape[0],), (x.shape[0],)) for x in gradients]
    assert backwards[0].plan is backwards[1].plan and backwards[1].numbers["pred elements"] == 3000


def test_counted_entries_are_no_key():
    """Calls with different numbers of entries share a plan, up to the next power of two."""
    x, y = Spec((1000, 3), FLOATS[0]), Spec((900, 3), FLOATS[0])
    pair = cuda.pair(x, (1000,), y, (900,), DEVICES["sm_90a"])
    calls = [cuda.transport(pair, OPTIONS, "mean", True, total) for total in (4097, 5000, 8192, 8193)]
    assert calls[0].plan is calls[1].plan is calls[2].plan is not calls[3].plan
    assert [call.numbers["room"] for call in calls] == [4097, 5000, 8192, 8193]
    plans_ = {cuda.search(pair, OPTIONS._replace(p_min=p), 1 << n).plan for p in (0.5, 0.8) for n in (12, 13)}
    assert len(plans_) == 1


@pytest.mark.parametrize("entries", [0, 1, 2, 3, 4, 5, 1000, 1024, 1025, 2**31, 2**31 + 1, 2**32 - 1])
def test_capacities(entries):
    room = cuda.capacity(entries)
    assert entries <= room < max(1, 2 * entries)
    assert room in (0, 2**32 - 1) or math.log2(room).is_integer()


def test_too_many_entries_and_points():
    message = r"a plan has at most 2\*\*32 - 1 entries, got max_entries = 4294967296: pass fewer clouds at a time"
    x, device = Spec((8, 3), FLOATS[0]), DEVICES["sm_90a"]
    with pytest.raises(ValueError, match=message):
        cuda.apml(x, (8,), x, (8,), OPTIONS, "mean", 2**32, True, device)
    with pytest.raises(ValueError, match=message):
        cuda.capacity(2**32)
    many = Spec((2**30, 3), FLOATS[0])
    with pytest.raises(ValueError, match=r"must be at most .* points together, got 1073741824 and 1073741824"):
        cuda.pair(many, (2**30,), many, (2**30,), device)


def test_the_grid_waits_for_itself_so_all_of_it_runs_at_once():
    for device in DEVICES.values():
        for n in (1, 100, 10_000, 1_000_000):
            x = Spec((n, 3), FLOATS[0])
            *_, step = cuda.apml(x, (n,), x, (n,), OPTIONS, "mean", 64, True, device).plan.steps
            assert step.kernel.cooperative and step.grid <= cuda.PLAN_BLOCKS * device.multiprocessors
            enough = min(2 * device.multiprocessors, -(-n // 128))
            assert enough <= step.grid <= 1.25 * enough


def test_what_is_0_at_first_is_cleared_and_lies_apart():
    """Blocks wait for each other at one word, so nothing else that they read is near it."""
    x = Spec((3000, 3), FLOATS[0])
    pair = cuda.pair(x, (3000,), x, (3000,), DEVICES["sm_90a"])
    kept = cuda.kept_offsets(pair.batches.layouts)
    parts = kept.total, kept.arrived, *kept.longs, kept.cursors, *kept.starts, *kept.counts
    sizes = 8, 8, 8, 8, *[4 * pair.batches.layouts[side].slots for side in (0, 0, 1, 0, 1)]
    assert all(part % 512 == 0 for part in parts) and kept.total == 0
    for part, size, following in zip(parts, sizes, (*parts[1:], cuda.kept_bytes(pair.batches.layouts)), strict=True):
        assert following - part - size >= 4608
    (clear,) = [step for step in cuda.search(pair, OPTIONS, 64).plan.steps if not isinstance(step, Launch)]
    assert (clear.pointer.memory, clear.pointer.index, clear.pointer.offset) == ("result", 1, 0)
    assert kept.cursors + 4 * pair.batches.layouts[0].slots <= clear.size <= kept.starts[0]


@pytest.mark.parametrize("count", [3, 64, 65, 1000])
def test_numbers(count):
    """The masses count the points to choose among, which are those of the other side."""
    rng = np.random.default_rng(0)
    lengths = [tuple(rng.integers(1, 30, count).tolist()) for _ in range(2)]
    x, y = (Spec((sum(counts), 3), FLOATS[0]) for counts in lengths)
    options = transport.Options(0.7, 1e-3, 7, "min")
    call = cuda.apml(x, lengths[0], y, lengths[1], options, "mean", 123, True, DEVICES["sm_90a"])
    numbers = call.numbers
    assert (numbers["limit"], numbers["room"], numbers["iterations"]) == (log_threshold(1e-3), 123, 7)
    assert numbers["parts"] == count
    for name, counts in zip(("pred masses", "target masses"), lengths[::-1], strict=True):
        expected = [log_mass(n, 0.7) for n in counts]
        if count <= clouds.INLINE_CLOUDS:
            found = np.frombuffer(numbers[name], np.float64)[1 : 1 + count]
        else:
            found = np.frombuffer(numbers[name].rows, np.float64)[:count]
            tables = [step for step in call.plan.steps if isinstance(step, Table) and step.name == name]
            assert [step.rows for step in tables] == [-(-count // 2)]
        assert found.tolist() == expected


def test_calls_of_large_batches_are_not_kept():
    lengths = (3,) * 65
    x = Spec((195, 3), FLOATS[0])
    before = cuda._apml.kept.cache_info().currsize, cuda._small_masses.cache_info().currsize
    calls = [cuda.apml(x, lengths, x, lengths, OPTIONS, "mean", 999, True, DEVICES["sm_90a"]) for _ in range(2)]
    assert calls[0] is not calls[1] and calls[0].plan is calls[1].plan
    assert before == (cuda._apml.kept.cache_info().currsize, cuda._small_masses.cache_info().currsize)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_backward(lengths, arch):
    device, count = DEVICES[arch], len(lengths[0])
    for case in (*cases(lengths), *cases(lengths, MIXED, (3,))):
        dx, _, dy, _ = case
        for dtype in FLOATS:
            size = dtype.itemsize
            strided = [Spec((count,), dtype, (stride,)) for stride in (0, 3 * size)]
            for dloss in (Spec((), dtype), Spec((count,), dtype), *strided, Spec((count,), dtype, (size + 1,), 1)):
                call = cuda.apml_backward(dloss, dx, dy, *lengths, dloss.ndim == 0)
                results = transport.apml_backward_results(dx, dy)
                unused = plans.check(call, (dloss, dx, dy), results, device)
                assert not unused or not count
                launches = 1 if dx.dtype == dy.dtype else 2
                assert functions(call).count("transport_backward") == launches * bool(count)


def test_backward_of_strided_losses(monkeypatch):
    """The stride is in elements, and a single loss for all clouds has none."""
    driver = Driver()
    monkeypatch.setattr(launcher, "driver", lambda: driver)
    monkeypatch.setattr(launcher.compiler, "load", driver.load)
    monkeypatch.setattr(launcher._thread, "has_context", True)
    dx, dy = Spec((7, 3), FLOATS[2]), Spec((5, 3), FLOATS[2])
    for dloss, stride, rounded in (
        (Spec((2,), FLOATS[0], (40,)), 10, False),
        (Spec((2,), FLOATS[0]), 1, False),
        (Spec((), FLOATS[1]), 0, True),
    ):
        call = cuda.apml_backward(dloss, dx, dy, (3, 4), (1, 4), rounded)
        launcher.run(call, (1, 2, 3, 4, 5), 0, 9)
        name, shape, stream, args, _ = driver.done.pop()
        of_x, of_y, tables, rest = args[:3], args[3:6], args[6:8], args[8:]
        assert (name, shape, stream) == ("transport_backward", (1, 256, 0), 9)
        assert (of_x, of_y) == ((2, 4, 21), (3, 5, 15))
        assert rest == (3, 1, FLOATS.index(dloss.dtype), stride, rounded)
        rows = [np.frombuffer(table[16:64], np.int32).reshape(-1, 4)[:, 0].tolist() for table in tables]
        assert rows == ([[0, 3, 7], [0, 1, 5]] if dloss.ndim else [[0, 0, 0]] * 2)


def test_results_take_symbols():
    class Symbol:
        """A size that torch.compile does not know."""

    n = Symbol()
    loss, dx, dy = transport.apml_results(Spec((n, 3), FLOATS[2]), Spec((n, 3), FLOATS[0]), n, "none", True)
    assert (loss.shape, dx.shape, dy.shape) == ((n,), (n, 3), (n, 3))
    assert (loss.dtype, dx.dtype, dy.dtype) == (FLOATS[0], FLOATS[2], FLOATS[0])
    assert [spec.shape for spec in transport.apml_results(dx, dy, n, "sum", False)] == [(), (0,), (0,)]


def test_results_of_a_search_are_whole_words():
    x = Spec((77, 2), FLOATS[3])
    pair = cuda.pair(x, (77,), x, (77,), DEVICES["sm_80"])
    index, kept, entries = cuda.search_results(pair, 64)
    assert all(spec.dtype == INT64 for spec in (index, kept, entries)) and entries.nbytes == 512
    assert kept.nbytes == cuda.kept_bytes(pair.batches.layouts) and index.nbytes >= 2 * 16 * 96


# ---- what the host makes of results --------------------------------------------------------------------------------


def an_index(rng, points, slots):
    """The point of each slot or -1, int32 [slots], and the slots of the points."""
    of_slots = np.full(slots, -1, np.int32)
    places = rng.permutation(slots)[:points]
    of_slots[places] = np.arange(points)
    return of_slots, places


def packed_index(*batches, wide=False):
    rows = np.zeros((sum(map(len, batches)) + 100, 8 if wide else 4), np.int32)  # boxes come after the rows
    rows[: sum(map(len, batches)), 6 if wide else 3] = np.concatenate(batches)
    return rows.reshape(-1).view(np.int64)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_entries_in_rows_of_slots_become_a_plan(monkeypatch, dtype):
    monkeypatch.setitem(sys.modules, "cupy", np)
    rng = np.random.default_rng(0)
    n, m, slots = 50, 40, (64, 64)
    (of_x, x_slots), (of_y, y_slots) = an_index(rng, n, slots[0]), an_index(rng, m, slots[1])
    pairs = rng.permutation(n * m)[:300]
    rows, cols, values = pairs // m, pairs % m, rng.random(300, dtype=np.float32)
    entries, row = np.zeros((400, 2), np.int32), np.full(400, -1, np.int32)
    places = np.sort(rng.permutation(400)[:300])
    row[places] = x_slots[rows]
    entries[places] = np.stack((y_slots[cols], values.view(np.int32)), axis=1)
    pair = cuda.pair(Spec((n, 3), dtype), (n,), Spec((m, 3), dtype), (m,), DEVICES["sm_90a"])
    assert pair.slots == slots
    index = packed_index(of_x, of_y, wide=pair.batches.wide).view(np.int32)
    found = transport._sorted([index[place] for place in cuda.points_of_slots(pair)], entries, row, n)
    order = np.lexsort((cols, rows))
    indptr = np.searchsorted(rows[order], np.arange(n + 1))
    for got, expected in zip(found, (rows[order], cols[order], values[order], indptr), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert [part.dtype for part in found] == [np.int32, np.int32, np.float32, np.int64]


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("name", ["pred", "target"])
def test_the_row_of_most_entries_is_named(name, dtype):
    rng = np.random.default_rng(0)
    x, y = Spec((3000, 3), dtype), Spec((900, 3), FLOATS[0])
    pair = cuda.pair(x, (3000,), y, (900,), DEVICES["sm_90a"])
    assert pair.slots != tuple(layout.slots for layout in pair.batches.layouts)  # the plan has a larger capacity
    batches = [an_index(rng, points, slots) for points, slots in zip((3000, 900), pair.slots, strict=True)]
    kept = np.full(cuda.kept_bytes(pair.batches.layouts), 0xFF, np.uint8)
    for side, (at, slots) in enumerate(zip(cuda.kept_offsets(pair.batches.layouts).counts, pair.slots, strict=True)):
        counts = rng.integers(0, 50, slots).astype(np.uint32) * (batches[side][0] >= 0)
        if ("pred", "target")[side] == name:
            counts[batches[side][1][[700, 77]]] = 1234  # if several, the first is named
        kept[at : at + 4 * slots] = counts.astype(np.uint32).view(np.uint8)
    arrays = packed_index(*(of_slots for of_slots, _ in batches), wide=pair.batches.wide), kept.view(np.int64)
    index, found = (_arrays.read(array, "an array") for array in arrays)
    error = transport._too_many_entries(index, found, pair, 10**6, 64 * 3900, None)
    assert str(error).startswith("pred and target keep 1000000 entries, more than max(64 * (N + M), 2**24) = 249600; ")
    assert f"; row 77 of {name} alone keeps 1234. " in str(error)
