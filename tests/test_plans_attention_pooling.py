# SPDX-License-Identifier: Apache-2.0
"""The plans of attention and pooling as data, without a GPU."""

from __future__ import annotations

import functools
import itertools
import re
import struct

import numpy as np
import plans
import pytest
from test_launcher import Driver

from gpu3d import _arrays, attention, pooling
from gpu3d._arrays import INT32, UINT8, Spec
from gpu3d.buckets import bucket_offsets, num_scopes, num_slots
from gpu3d.cuda import arrays, clouds, compiler, launcher
from gpu3d.cuda import attention as cuda_attention
from gpu3d.cuda import pooling as cuda_pooling
from gpu3d.cuda.plan import DEVICES, Call, Clear, Input, Launch, Number, Packed, Pointer, Result, Steps

DTYPES = [dtype for dtype in _arrays.FLOATS if dtype != np.float64]
ARCHES = ("sm_80", "sm_89", "sm_90a")
RATIOS, REDUCTIONS = (2, 4, 8), ("sum", "mean", "min", "max")
LENGTHS = [(1,), (700, 1, 0, 16), (5000,), (3000, 2047, 1024), tuple(range(70)), (0,) * 70 + (5,)]
BUCKET_SIZES = (16, 64, 1040)
EMPTY = [(), (0, 0), (0,) * 70]


def name_of(dtype):
    return dtype.name


# ---- a call with what it reads and writes --------------------------------------------------------------------------


def packed(shape, dtype):
    """A part of an array [rows, 3, ...], whose rows are three times as far apart."""
    row, *rest = np.empty((1, *shape[1:]), dtype).strides
    return Spec(shape, dtype, (3 * row, *rest))


def transposed(shape, dtype):
    """The last axis has the longest stride, so no kernel can read the array in place."""
    return Spec(shape, dtype, np.empty(shape[::-1], dtype).T.strides)


def off_by_one(shape, dtype):
    """Contiguous, at an address one element after a multiple of 16 bytes."""
    return Spec(shape, dtype, None, dtype.itemsize)


LAYOUTS = (Spec, packed, transposed, off_by_one)


def table_of(lengths, bucket_size, size=4):
    offsets = bucket_offsets(lengths, bucket_size)
    return Spec((num_scopes([end - begin for begin, end in itertools.pairwise(offsets)], size, 1), size), INT32)


def attention_call(lengths, bucket_size, dtype, arch, heads=3, dim=40, make=Spec, return_lse=True, scale=0.3):
    shape = num_slots(lengths, bucket_size), heads, dim
    inputs = [make(shape, dtype) for _ in range(3)] + [table_of(lengths, bucket_size)]
    call = cuda_attention.attention(*inputs, lengths, bucket_size, scale, return_lse, DEVICES[arch])
    return call, inputs, attention.attention_results(inputs[0])[: 1 + return_lse]


def attention_backward_call(lengths, bucket_size, dtype, arch, heads=3, dim=40, make=Spec, scale=0.3):
    shape = num_slots(lengths, bucket_size), heads, dim
    inputs = [make(shape, dtype) for _ in range(5)]
    inputs += [Spec(shape[:2], _arrays.FLOAT32), table_of(lengths, bucket_size)]
    call = cuda_attention.attention_backward(*inputs, lengths, bucket_size, scale, DEVICES[arch])
    return call, inputs, attention.attention_backward_results(inputs[1])


def pool_calls(lengths, bucket_size, dtype, ratio, reduce, columns=24, make=Spec, points=_arrays.FLOAT32):
    """The calls of all four ops."""
    layout = lengths, bucket_size, ratio
    slots, children = num_slots(lengths, bucket_size), num_slots(pooling.child_lengths(lengths, ratio), bucket_size)
    parent, child = make((slots, columns), dtype), make((children, columns), dtype)
    points = make((slots, 3), points)
    results = pooling.pool_results(parent, points, *layout, reduce)
    yield cuda_pooling.pool(parent, points, *layout, reduce), [parent, points], results
    members = Spec((children, ratio), INT32)
    argmember = Spec((children, columns), UINT8) if reduce in ("min", "max") else None
    call = cuda_pooling.pool_backward(child, members, argmember, *layout, reduce)
    yield call, [child, members, argmember], pooling.pool_backward_results(child, lengths, bucket_size)
    for skip in (None, parent):
        call = cuda_pooling.unpool(child, members, skip, *layout)
        yield call, [child, members, skip], pooling.unpool_results(child, lengths, bucket_size)
    results = pooling.unpool_backward_results(parent, *layout)
    yield cuda_pooling.unpool_backward(parent, members, *layout), [parent, members], results


# ---- what holds for every plan -------------------------------------------------------------------------------------


@functools.cache
def declared(source, function):
    """The formats of a kernel's parameters as its CUDA source declares them. A struct is s."""
    text = re.sub(r"//.*", "", compiler.source_text(source))
    found = re.search(rf"\b{function}\((.*?)\)\s*\{{", text, re.DOTALL)
    known = (("*", "Q"), ("__grid_constant__", "s"), ("long long", "q"), ("int", "i"), ("float", "f"))
    return "".join(next(letter for part, letter in known if part in line) for line in found[1].split(","))


@functools.cache
def asked_for():
    modules = arrays, cuda_attention, cuda_pooling
    return {(c.source, c.macros) for module in modules for c in module.configurations()}


def assert_sound(call, inputs, results, arch="sm_80"):
    """Assert `plans.check`, that all numbers are used if anything is launched, and that signatures match kernels."""
    unused = plans.check(call, inputs, results, DEVICES[arch])
    assert not (unused and launches(call))
    for step in call.plan.steps:
        if isinstance(step, Launch):
            kernel = step.kernel
            assert re.sub(r"\d+s", "s", kernel.signature) == declared(kernel.source, kernel.function)
            assert (kernel.source, kernel.macros) in asked_for()


def launches(call, source=""):
    return [s for s in call.plan.steps if isinstance(s, Launch) and s.kernel.source.startswith(source)]


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attention(dtype, arch):
    for lengths, bucket_size, dim in itertools.product(LENGTHS, BUCKET_SIZES, (8, 40, 64, 128)):
        # float32 with D over 64 needs more shared memory than sm_89 has. The first call raises that error.
        known = "sm_80" if dtype == np.float32 and dim > 64 and arch == "sm_89" else arch
        for make in (attention_call, attention_backward_call):
            call, inputs, results = make(lengths, bucket_size, dtype, arch, dim=dim)
            assert_sound(call, inputs, results, known)
            found = launches(call)
            assert len(found) == (1 if make is attention_call else 3 if in_one_pass(arch, dtype, dim) else 2)
            for step in found:
                check_attention_grid(step, lengths, bucket_size, dtype, arch, dim)


def in_one_pass(arch, dtype, dim):
    return arch == "sm_90a" and dtype != np.float32 and dim > 32


def check_attention_grid(step, lengths, bucket_size, dtype, arch, dim):
    """Check that there is a block for each tile of rows of the longest scope, each scope and each head.

    Kernels whose warps have roles have at most a block a multiprocessor. The other two of the backward in one pass have
    enough threads for all rows.
    """
    function, scopes = step.kernel.function, table_of(lengths, bucket_size).shape[0]
    longest = min(4, max(-(-n // bucket_size) for n in lengths)) * bucket_size
    if function == "attention_forward_roles":
        workers = 8 if dim > 64 else 12
        assert step.grid == min(scopes * 3 * -(-longest // (16 * workers)), DEVICES[arch].multiprocessors)
        assert step.block == 128 + 32 * workers
        return
    if step.kernel.source == "attention_backward":
        if function == "attention_backward":
            assert step.grid == min(scopes * 3 * -(-longest // 128), DEVICES[arch].multiprocessors)
        else:
            threads = (128 if dim > 64 else 64) // 8  # for each row and head, or for each GROUP rows and head
            of_block = 1024 if function == "attention_delta" else 512
            assert step.grid == -(-num_slots(lengths, bucket_size) * 3 * threads // of_block)
        return
    which = function.removeprefix("attention_")
    tiling = cuda_attention._tiling(arch == "sm_90a", which, dtype, dim)
    own = 16 * tiling.warps * tiling.own_tiles // (1 + tiling.paired)
    assert step.grid == scopes * 3 * -(-longest // own)
    assert step.block == 32 * tiling.warps


def views_of(step):
    """The fields of each struct View among the arguments: those that the kernel reads, and those that it writes."""
    packed = [arg for arg in step.args if isinstance(arg, Packed)]
    sources = [arg.fields[1:5] for arg in packed if arg.format == cuda_attention._SOURCE_FORMAT]
    views = [arg for arg in packed if arg.format == cuda_attention.VIEW_FORMAT]
    written = [view.fields for view in views if view in step.args[-3:]]
    return sources + [view.fields for view in views[: len(views) - len(written)]], written


# How many views each kernel reads.
VIEWS = {
    "attention_forward": 3,
    "attention_forward_roles": 3,
    "attention_dq": 5,
    "attention_dkdv": 4,
    "attention_delta": 2,
    "attention_backward": 4,
    "attention_round": 0,
}


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_attention_reads_in_place_what_it_can(dtype, make):
    for call, inputs, results in (
        attention_call((700, 90), 64, dtype, "sm_90a", make=make),
        attention_backward_call((700, 90), 64, dtype, "sm_90a", make=make),
    ):
        assert_sound(call, inputs, results, "sm_90a")
        copies, read = launches(call, "arrays_copy"), [x for x in inputs if x.ndim == 3 and x.shape[2] == 40]
        assert len(copies) == (len(read) if make in (transposed, off_by_one) else 0)
        row = 3 * 40 * (3 if make is packed else 1)
        for step in launches(call, "attention"):
            viewed, written = views_of(step)
            assert len(viewed) == VIEWS[step.kernel.function]
            for source, *numbers in viewed:
                assert source.memory == ("workspace" if copies else "input") and numbers == [40, row, 40]
            for source, *numbers in written:
                assert source.memory == "result" and numbers == [40, 3 * 40, 40]


def reversed_heads(shape, dtype):
    row, head, last = np.empty(shape, dtype).strides
    return Spec(shape, dtype, (row, -head, last))


def one_head_for_all(shape, dtype):
    return Spec(shape, dtype, (shape[2] * dtype.itemsize, 0, dtype.itemsize))


@pytest.mark.parametrize("make", [reversed_heads, one_head_for_all])
def test_strides_that_tensor_maps_cannot_have(make):
    for arch, copies in ("sm_80", 0), ("sm_90a", 3):
        call, *_ = attention_call((700, 90), 64, DTYPES[1], arch, dim=64, make=make)
        assert len(launches(call, "arrays_copy")) == copies


def test_boxes_lie_in_buckets():
    for bucket_size, boxes in (16, [16] * 3), (48, [16] * 3), (96, [32] * 3), (512, [64, 128, 128]):
        for make in (Spec, packed):
            call, *_ = attention_call((3000, 90), bucket_size, DTYPES[1], "sm_90a", dim=72, make=make)
            (step,) = launches(call, "attention")
            found = [source.fields[0] for source in step.args[:3]]
            row = 3 * 72 * 2 * (3 if make is packed else 1)
            assert [what.box for what in found] == boxes
            assert found == [(Input(i), 3, 72, row, 2 * 72, 64, boxes[i]) for i in range(3)]


def test_as_many_pairs_side_by_side_as_there_are():
    """Of small clouds all pairs of a scope and a head are worked on at once, and no ticket is without a pair."""
    call, *_ = attention_backward_call((100, 90), 64, DTYPES[1], "sm_90a", dim=64)
    step = next(step for step in launches(call) if step.kernel.function == "attention_backward")
    pairs, side = struct.unpack("<ii", step.args[10][:8])
    assert pairs == side == 2 * 3


def test_too_many_scopes_at_once():
    lengths, table = (2**21 * 512,), Spec((2**17 + 1, 4096), INT32)
    rows = Spec((lengths[0], 1, 64), DTYPES[1])
    inputs = [rows] * 5 + [Spec(rows.shape[:2], _arrays.FLOAT32), table]
    device = DEVICES["sm_90a"]
    with pytest.raises(ValueError, match=r"at most \d+ parts of work, got 2147500033 for 131073 scopes.*fewer clouds"):
        cuda_attention.attention_backward(*inputs, lengths, 512, 0.3, device)
    rows = Spec((lengths[0], 2, 64), DTYPES[1])
    with pytest.raises(ValueError, match=r"at most \d+ parts of work, got 2863420758 for 131073 scopes.*fewer clouds"):
        cuda_attention.attention(*[rows] * 3, table, lengths, 512, 0.3, True, device)


def test_attention_of_float64_is_refused():
    with pytest.raises(TypeError, match="attention on a GPU takes float16, bfloat16 and float32, got float64"):
        attention_call((100,), 16, np.dtype(np.float64), "sm_80")


def test_the_scale_and_the_lengths_are_no_part_of_an_attention_plan():
    calls = [
        make((n, 30), 64, DTYPES[0], "sm_80", scale=scale)[0]
        for make in (attention_call, attention_backward_call)
        for n in (129, 192)
        for scale in (1.0, -0.5)
    ]
    forward, backward = {id(call.plan) for call in calls[:4]}, {id(call.plan) for call in calls[4:]}
    assert len(forward) == len(backward) == 1
    assert [call.numbers["scale_log2"] for call in calls[:2]] == [1.0, -0.5]
    assert calls[0].numbers["clouds"].inlined != calls[2].numbers["clouds"].inlined
    assert attention_call((193, 30), 64, DTYPES[0], "sm_80")[0].plan is not calls[0].plan


@pytest.mark.parametrize("lengths", EMPTY)
def test_nothing_is_launched_for_no_slots(lengths):
    for make in (attention_call, attention_backward_call):
        call, inputs, results = make(lengths, 16, DTYPES[0], "sm_90a")
        assert_sound(call, inputs, results)
        assert call.plan.steps == () and call.plan.workspace == 0


# ---- pooling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pooling(dtype, reduce):
    for lengths, bucket_size, ratio in itertools.product(LENGTHS, BUCKET_SIZES, RATIOS):
        for columns, points in ((1, _arrays.BFLOAT16), (8, _arrays.FLOAT32), (1000, _arrays.FLOAT64)):
            for call, inputs, results in pool_calls(lengths, bucket_size, dtype, ratio, reduce, columns, points=points):
                assert_sound(call, inputs, results)
                assert call.plan.workspace == 0 or len(lengths) > clouds.INLINE_CLOUDS
                for step in launches(call):
                    check_pooling_grid(step, lengths, bucket_size, ratio, columns * dtype.itemsize)


def check_pooling_grid(step, lengths, bucket_size, ratio, row_bytes):
    """Check that there are enough blocks for all lengths with the same numbers of buckets, and no more."""
    most = [-(-n // bucket_size) * bucket_size for n in lengths]
    if step.kernel.function == "pool_groups":
        assert step.grid == sum(-(-n // 1024) for n in most) >= sum(-(-n // 1024) for n in lengths)
        return
    rows = num_slots(pooling.child_lengths(lengths, ratio), bucket_size)
    assert rows == num_slots(pooling.child_lengths(most, ratio), bucket_size)
    if step.kernel.function.startswith(("spread", "unpool")):
        padding = sum(-n % bucket_size for n in lengths)
        bound = sum(n > 0 for n in lengths) * (bucket_size - 1)
        assert padding <= bound
        rows += bound
    words = row_bytes // dict(step.kernel.macros)["WORD"]
    a_row = next(threads for threads in (1, 2, 4, 8, 16, 32, 64, 128, 256) if threads >= min(words, 256))
    assert step.grid == -(-rows // (256 // a_row * (8 // ratio)))


@pytest.mark.parametrize("ratio", (2, 4, 8))
def test_many_clouds_as_an_array(ratio):
    """Plans, results and children of lengths in an array are those of the same lengths in a tuple."""
    lengths = np.random.default_rng(ratio).integers(0, 1000, 200)
    counts = tuple(lengths.tolist())
    slots = num_slots(counts, 48)
    assert num_slots(lengths, 48) == slots
    specs = Spec((slots, 6), np.dtype(np.float32)), Spec((slots, 3), np.dtype(np.float32))
    assert cuda_pooling.pool(*specs, lengths, 48, ratio, "max") == cuda_pooling.pool(*specs, counts, 48, ratio, "max")
    found, expected = (pooling.pool_results(*specs, n, 48, ratio, "max") for n in (lengths, counts))
    assert found == expected and type(found[5].shape[0]) is int
    (children, offsets), expected = (pooling.children_of(n, 48, ratio) for n in (lengths, counts))
    assert tuple(children.tolist()) == expected[0] and offsets is None


def test_padding_is_counted_at_run_time():
    lengths, bucket_size = (700, 1, 0, 16), 64
    for call, *_ in list(pool_calls(lengths, bucket_size, DTYPES[0], 2, "sum"))[1:]:
        assert call.numbers["parents"].groups == sum(-n % bucket_size for n in lengths)
        assert Number("parents") in launches(call)[0].args


def test_one_plan_serves_all_lengths_of_the_same_buckets():
    for ratio, reduce, many in itertools.product(RATIOS, REDUCTIONS, (1, 70)):
        some, others = ([length for _ in range(many) for length in pair] for pair in ((65, 1), (128, 64)))
        for one, other in zip(
            *(pool_calls(tuple(n), 64, DTYPES[0], ratio, reduce) for n in (some, others)), strict=True
        ):
            assert one[0].plan is other[0].plan
            assert one[0].numbers["parents"] != other[0].numbers["parents"]


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pooling_reads_in_place_what_it_can(dtype, make):
    for reduce, columns in itertools.product(("mean", "max"), (3, 24)):
        for call, inputs, results in pool_calls((700, 90), 64, dtype, 4, reduce, columns, make):
            assert_sound(call, inputs, results)
            copies = [step.args[0] for step in launches(call, "arrays_copy")]
            strided = [Pointer("input", i) for i, x in enumerate(inputs) if x is not None and x.strides is not None]
            points = [Pointer("input", 1)] if len(results) == 7 else []  # pool reads contiguous points in place
            expected = {transposed: strided, packed: points}.get(make, [])
            assert sorted(copies) == sorted(expected)
            for step in launches(call, "pooling_rows"):
                word, row = dict(step.kernel.macros)["WORD"], columns * dtype.itemsize
                assert row % word == 0 and word >= dtype.itemsize
                if make is off_by_one:
                    assert word == dtype.itemsize


def test_members_that_no_load_can_take_are_copied():
    child, members = Spec((64, 8), DTYPES[0]), Spec((64, 4), INT32, None, 4)
    call = cuda_pooling.unpool(child, members, None, (200,), 16, 4)
    assert_sound(call, [child, members, None], pooling.unpool_results(child, (200,), 16))
    (copy,) = launches(call, "arrays_copy")
    assert copy.args[0] == Pointer("input", 1)


@pytest.mark.parametrize("lengths", EMPTY)
def test_no_slots_or_no_columns(lengths):
    for pooled in ((lengths, 24), ((700,), 0)):
        first, *rest = pool_calls(pooled[0], 16, DTYPES[0], 4, "max", pooled[1])
        assert_sound(*first)
        kinds = [type(step) for step in first[0].plan.steps]
        assert kinds == ([Launch] if pooled[1] == 0 else [Clear])
        for call, inputs, results in rest:
            assert_sound(call, inputs, results)
            assert call.plan.steps == ()


def test_pooling_of_float64_is_refused():
    with pytest.raises(TypeError, match="features of float16, bfloat16 and float32, got float64"):
        next(pool_calls((100,), 16, np.dtype(np.float64), 2, "sum"))


# ---- steps of a longer plan ----------------------------------------------------------------------------------------


def packed_calls(lengths, bucket_size, dtype, arch, dim, heads=3):
    """Attention of q, k and v side by side, and its backward, each as a plan of its own."""
    slots, table = num_slots(lengths, bucket_size), table_of(lengths, bucket_size)
    batch, largest = cuda_attention.layout_of(lengths, bucket_size)
    q, device = (slots, heads, dim), DEVICES[arch]
    shape = cuda_attention.shape_of(len(lengths), largest, bucket_size, q, dtype, table.shape, device)
    rows, packed_rows = Spec((slots, heads, dim), dtype), Spec((slots, 3, heads, dim), dtype)
    lse = Spec((slots, heads), _arrays.FLOAT32)

    def call_of(add, inputs, results, *numbers):
        steps = Steps(len(inputs), len(results))
        argument = clouds.argument(steps, "level 1", shape.clouds, bucket_size)
        given, made = [Input(i) for i in range(len(inputs))], [Result(i) for i in range(len(results))]
        add(steps, shape, *given, argument, *numbers, 0.3, *made)
        return Call(steps.plan(), {"level 1": batch}), inputs, results

    yield call_of(cuda_attention.add_packed, [packed_rows, table], [rows, lse])
    inputs = [rows, packed_rows, rows, lse, table]
    yield call_of(cuda_attention.add_packed_backward, inputs, [packed_rows], slots)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed_attention(dtype, arch):
    for lengths, bucket_size, dim in itertools.product(LENGTHS, BUCKET_SIZES, (8, 64, 128)):
        known = "sm_80" if dtype == np.float32 and dim > 64 and arch == "sm_89" else arch  # as in test_attention
        row, part = 3 * dim, 3 * dim * dtype.itemsize
        apart = [(offset, dim, 3 * row, dim) for offset in (0, part, 2 * part)]  # q, k and v, or their gradients
        alone = [(0, dim, row, dim)]
        viewed, written = [], []
        for call, inputs, results in packed_calls(lengths, bucket_size, dtype, arch, dim):
            assert_sound(call, inputs, results, known)
            of_dv = launches(call)[1 if in_one_pass(arch, dtype, dim) else -1] if len(results) == 1 else None
            for step in launches(call):
                check_attention_grid(step, lengths, bucket_size, dtype, arch, dim)
                for found, views in zip((viewed, written), views_of(step), strict=True):
                    found.append([(source.offset, *strides) for source, *strides in views])
        if in_one_pass(arch, dtype, dim):
            assert viewed == [apart, [*alone, *alone], [*alone, *apart], []]
            assert written == [[], [], apart[1:2], apart[:1]]
        else:
            assert viewed == [apart, [*alone, *apart, *alone], [*alone, *apart]]
            assert written == [[], apart[:1], apart[1:2]]
        assert of_dv.args[-1] == Result(0) + 2 * part  # dv has the strides of dk


@pytest.mark.parametrize("lengths", EMPTY)
def test_packed_attention_of_no_slots(lengths):
    for call, inputs, results in packed_calls(lengths, 16, DTYPES[0], "sm_90a", 32):
        assert_sound(call, inputs, results)
        assert not launches(call)


def levels_call(lengths, bucket_size, dtype, ratio, columns, skipped):
    """Pooling and unpooling, forward and backward, of two levels, whose tables stand in one plan."""
    steps, inputs, results, numbers = Steps(8, 18), [], [], {}
    sizes = {"columns": columns, "dtype": dtype}
    for level in range(2):
        layout, slots = cuda_pooling.layout_of(lengths, bucket_size, ratio), num_slots(lengths, bucket_size)
        shape = layout.shape
        numbers |= {f"parents {level}": layout.parents, f"children {level}": layout.children}
        lengths = pooling.child_lengths(lengths, ratio)
        children = num_slots(lengths, bucket_size)
        assert children == shape.slots
        parents, of_children = (
            clouds.argument(steps, f"{name} {level}", shape.clouds, bucket_size) for name in ("parents", "children")
        )
        parent, child, points, members = (Input(len(inputs) + i) for i in range(4))
        pooled, dchild, dparent, out, *groups = (Result(len(results) + i) for i in range(9))
        rows, child_rows = Spec((slots, columns), dtype), Spec((children, columns), dtype)
        inputs += rows, child_rows, Spec((slots, 3), _arrays.FLOAT32), Spec((children, ratio), INT32)
        results += (
            child_rows,
            child_rows,
            rows,
            rows,
            Spec((children, ratio), INT32),
            Spec((children, 3), _arrays.FLOAT32),
        )
        results += [Spec(shape, INT32) for shape in ((children,), (sum(lengths),), ())]
        cuda_pooling.add_groups(steps, shape, points, _arrays.FLOAT32, parents, of_children, tuple(groups))
        cuda_pooling.add_pool(steps, shape, parent, members, pooled, **sizes)
        cuda_pooling.add_pool_backward(steps, shape, child, members, parents, dparent, **sizes, mean=False)
        skip = parent if skipped else None
        cuda_pooling.add_unpool(steps, shape, child, members, skip, parents, out, **sizes)
        cuda_pooling.add_unpool_backward(steps, shape, parent, members, dchild, **sizes)
    return Call(steps.plan(), numbers), inputs, results


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pooling_of_two_levels(dtype, ratio):
    for lengths, bucket_size, columns in itertools.product(LENGTHS, BUCKET_SIZES, (1, 24, 1000)):
        for skipped in (False, True):
            call, inputs, results = levels_call(lengths, bucket_size, dtype, ratio, columns, skipped)
            assert_sound(call, inputs, results)
            steps = launches(call)
            assert len(steps) == 10
            for step, of in zip(steps, [lengths] * 5 + [pooling.child_lengths(lengths, ratio)] * 5, strict=True):
                check_pooling_grid(step, of, bucket_size, ratio, columns * dtype.itemsize)


@pytest.mark.parametrize("lengths", EMPTY)
def test_pooling_of_two_empty_levels(lengths):
    call, *_ = levels_call(lengths, 16, DTYPES[0], 2, 24, True)
    assert not launches(call)


# ---- through the launcher ------------------------------------------------------------------------------------------


def test_arguments_reach_the_driver(monkeypatch):
    """The arguments of a backward as the driver gets them, with addresses in place."""
    driver = Driver()
    monkeypatch.setattr(launcher, "driver", lambda: driver)
    monkeypatch.setattr(compiler, "load", driver.load)
    monkeypatch.setattr(launcher._thread, "has_context", True)
    cuda_attention._backward_plan.cache_clear()
    call, *_ = attention_backward_call((100, 30), 16, DTYPES[0], "sm_80", make=packed, scale=0.25)
    launcher.run(call, (*range(1 << 20, 10 + (1 << 20)), 1 << 40), 0, 7)
    (_, shape, stream, dq, _), (_, _, _, dkdv, _) = driver.done
    assert stream == 7 and shape[:2] == (launches(call)[0].grid, launches(call)[0].block)
    of_dout, q, k, v, out = ((1 << 20) + i for i in range(5))
    views = [struct.unpack("<Qqii", bytes_) for bytes_ in dq[:5]]
    assert views == [(address, 40, 360, 40) for address in (of_dout, q, k, v, out)]
    assert dq[5] == (1 << 20) + 5 and dq[7:9] == ((1 << 20) + 6, 4)
    assert struct.unpack("<" + 3 * "iIi", dq[9])[::3] == (16, 3, shape[0] // (3 * table_of((100, 30), 16).shape[0]))
    assert dq[10:12] == (0.25, 0.25) and dq[13] == 1 << 40
    assert dkdv[:4] == dq[:4] and dkdv[4:6] == ((1 << 20) + 5, 1 << 40)
    assert dkdv[11] == 0.25 and dkdv[13] == (1 << 20) + 9
    written = [struct.unpack("<Qqii", bytes_) for bytes_ in (dq[12], dkdv[12])]
    assert written == [((1 << 20) + 7, 40, 120, 40), ((1 << 20) + 8, 40, 120, 40)]
    point, tile, group, slot = np.frombuffer(dq[6], np.int32, 12, 16).reshape(3, 4).T
    assert (point.tolist(), tile.tolist(), slot.tolist()) == ([0, 100, 130], [0, 7, 9], [0, 112, 144])
    assert not group.any()


def test_tensor_maps_reach_the_driver(monkeypatch):
    """Maps are made of the addresses of a run, and made again when the memory has moved."""
    driver = Driver()
    monkeypatch.setattr(launcher, "driver", lambda: driver)
    monkeypatch.setattr(launcher, "_starts_early", lambda ordinal: False)
    monkeypatch.setattr(compiler, "load", driver.load)
    monkeypatch.setattr(launcher._thread, "has_context", True)
    cuda_attention._forward_plan.cache_clear()
    launcher._tensor_map.cache_clear()
    call, *_ = attention_call((100, 30), 96, DTYPES[1], "sm_90a", dim=72, make=packed, return_lse=False)
    for base in (1 << 20, 1 << 30):
        addresses = [base + 4096 * i for i in range(5 + (call.plan.workspace > 0))]
        launcher.run(call, addresses, 0, 7)
        *_, args, _ = driver.done[-1]
        for i, source in enumerate(args[:3]):
            address, *sizes = struct.unpack("<6Q3IQ", source[:68])
            assert address == base + 4096 * i and sizes == [72, 3, 2**31, 144, 3 * 3 * 144, 64, 1, 32, 3]
            assert struct.unpack("<Qqiii", source[128:156]) == (address, 72, 3 * 3 * 72, 72, 32)
    launcher._tensor_map.cache_clear()
