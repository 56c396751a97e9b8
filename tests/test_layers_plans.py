# SPDX-License-Identifier: Apache-2.0
"""The steps of the backbone's layers, loss and optimizer as data, without a GPU."""

from __future__ import annotations

import itertools

import numpy as np
import plans
import pytest

from gpu3d import _kernels
from gpu3d._arrays import BFLOAT16, FLOAT32, FLOAT64, FLOATS, INT32, UINT8, Spec
from gpu3d.cuda import clouds, layers, losses, optim
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import DEVICES, Call, Clear, Input, Launch, Matrix, Result, Steps
from gpu3d.reference.flash3d import half_turns

DTYPES = [dtype for dtype in FLOATS if dtype != FLOAT64]
ROWS = (0, 1, 33, 34_688, 2**24)
COLUMNS = (8, 32, 64, 192, 768, 1536)
DEVICE = DEVICES["sm_80"]  # the plans do not depend on it
KNOWN = set(_kernels.configurations())


def check(add, inputs, results, numbers=None):
    """Check the plan of the steps that `add(steps, inputs, results)` adds, and return its steps."""
    steps = Steps(len(inputs), len(results))
    pointers = [None if spec is None else Input(i) for i, spec in enumerate(inputs)]
    add(steps, pointers, [Result(i) for i in range(len(results))])
    plan = steps.plan()
    assert not plans.check(Call(plan, numbers or {}), inputs, results, DEVICE)
    launches = [step for step in plan.steps if isinstance(step, Launch)]
    assert {Configuration(step.kernel.source, step.kernel.macros) for step in launches} <= KNOWN
    return plan.steps


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_norm(dtype):
    for rows, columns, gelu in itertools.product(ROWS, COLUMNS, (False, True)):
        x, row, moments = Spec((rows, columns), dtype), Spec((columns,), FLOAT32), Spec((rows, 2), FLOAT32)
        step = Spec((1,), np.dtype(np.uint32))
        sizes = {"rows": rows, "columns": columns, "dtype": dtype, "gelu": gelu}

        def add(steps, given, made, sizes=sizes):
            x, weight, bias, y, step = given
            out, statistics, total = made
            options = {"epsilon": 1e-5, "statistics": statistics}
            drop = {"y": y, "drop": layers.Drop(0.3, 7, step, 2**64 - 1), "total": total}
            layers.add_norm(steps, x, weight, bias, out, **sizes, **options, **drop)

        forward = check(add, [x, row, row, x, step], [x, moments, x])
        assert len(forward) == (rows > 0)

        def add_backward(steps, given, made, sizes=sizes):
            *given, dres, step = given
            dx, dweight, dbias, dy = made
            drop = {"dy": dy, "drop": layers.Drop(0.3, 7, step, 2**64 - 1)}
            sums = layers.add_norm_backward(steps, *given, dx, dweight, dbias, **sizes, dres=dres, **drop)
            layers.add_sums(steps, sums)

        check(add_backward, [x, x, moments, row, row, x, step], [x, row, row, x])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_grids_cover_the_rows(dtype):
    """Every row and column has a thread, whatever their numbers."""
    for columns in range(8, layers.MOST_COLUMNS + 1, 8):
        lanes, words = layers._shape(dtype, columns)
        assert lanes * words * 16 >= columns * dtype.itemsize and (words == 1 or lanes == 32)
        assert lanes * words * 16 // dtype.itemsize * 8 * 4 <= 48 << 10  # shared memory of norm_backward


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_residual_gelu_and_rotate(dtype):
    for rows, columns in itertools.product(ROWS, (*COLUMNS, 6144)):
        x = Spec((rows, columns), dtype)
        sizes = {"rows": rows, "columns": columns, "dtype": dtype}

        def add_residual(steps, given, made, sizes=sizes):
            x, y, step = given
            layers.add_residual(steps, x, y, *made, **sizes, drop=layers.Drop(0.3, 7, step, 2**64 - 1))

        check(add_residual, [x, x, Spec((1,), np.dtype(np.uint32))], [x])
        check(add_residual, [None, x, Spec((1,), np.dtype(np.uint32))], [x])

        def add_gelu(steps, given, made, sizes=sizes):
            layers.add_gelu_backward(steps, *given, *made, **sizes)

        check(add_gelu, [x, x], [x, x])

        def add_column_sums(steps, given, made, rows=rows, columns=columns):
            matrix = Matrix(*given, rows, columns, dtype, columns)
            layers.add_sums(steps, [layers.add_column_sums(steps, matrix, *made)])

        check(add_column_sums, [x], [Spec((columns,), FLOAT32)])
    for rows, (heads, dim) in itertools.product(ROWS, ((1, 8), (2, 32), (12, 128), (192, 8))):

        def add_rotate(steps, given, made, rows=rows, heads=heads, dim=dim):
            sizes = {"rows": rows, "heads": heads, "dim": dim, "dtype": dtype}
            layers.add_rotate(steps, *made, *given, **sizes, wavelengths=(0.5, 60.0))

        inputs = [Spec((100, 3), FLOAT32), Spec((rows,), INT32)]
        check(add_rotate, inputs, [Spec((rows, 3, heads, dim), dtype)])


def test_half_turns():
    turns = half_turns(32, (0.5, 60.0))
    assert turns.shape == (3, 5) and turns.dtype == np.float32 and (turns == turns[0]).all()
    lengths = 2 / turns[0].astype(np.float64)
    np.testing.assert_allclose(lengths[[0, -1]], [0.5, 60], rtol=1e-6)
    np.testing.assert_allclose(lengths[1:] / lengths[:-1], 120**0.25, rtol=1e-6)
    assert half_turns(8, (0.5, 60.0)).shape == (3, 1) and half_turns(128, (0.5, 60.0)).shape == (3, 21)


@pytest.mark.parametrize("lengths", [(1,), (700, 1, 0, 16), (40,) * 64, (40,) * 65], ids=len)
def test_geometry(lengths):
    for size, ratio in itertools.product((16, 512), layers.RATIOS):
        child_lengths = [-(-n // ratio) for n in lengths]
        slots, child_slots = (sum(-(-n // size) * size for n in ns) for ns in (lengths, child_lengths))

        def add(steps, given, made, slots=child_slots, size=size, ratio=ratio):
            tables = [clouds.argument(steps, name, len(lengths), size) for name in ("parents", "children")]
            layers.add_compose(steps, *given, *tables, *made, slots=slots, ratio=ratio)

        members = Spec((child_slots, ratio), INT32)
        tables = {"parents": clouds.table(lengths, size, None, None)}
        inputs = [members, Spec((child_slots,), INT32), Spec((sum(lengths),), INT32)]
        check(add, inputs, [members], tables | {"children": clouds.table(child_lengths, size, None, None)})

        def add_pack(steps, given, made, slots=slots, size=size):
            layers.add_pack(steps, *given, clouds.argument(steps, "parents", len(lengths), size), *made, slots=slots)

        check(add_pack, [Spec((slots, 3), FLOAT32)], [Spec((sum(lengths), 3), FLOAT32)], tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("label_dtype", [UINT8, INT32], ids=lambda dtype: dtype.name)
def test_loss(dtype, label_dtype):
    for points, classes in itertools.product((0, 1, 4096, 4097, 34_688, 1_000_000), (1, 19, 64)):
        rows, pitch = points + 40, classes + 5

        def add(steps, given, made, points=points, classes=classes):
            logits, labels, point_to_slot = given
            options = {"point_to_slot": point_to_slot, "pitch": classes + 5, "ignore": -1}
            sizes = {"points": points, "rows": points + 40, "classes": classes}
            types = {"dtype": dtype, "label_dtype": label_dtype}
            losses.add_loss(steps, logits, labels, *made, **sizes, **types, **options)

        inputs = [Spec((rows, pitch), dtype), Spec((points,), label_dtype), Spec((points,), INT32)]
        found = check(add, inputs, [Spec((rows, pitch), dtype), Spec((), FLOAT32)])
        assert sum(isinstance(step, Launch) for step in found) == (9 if points else 0)
        assert all(step.kernel.shared_mem < 48 << 10 for step in found if not isinstance(step, Clear))


@pytest.mark.parametrize("copy_dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_optimizer(copy_dtype):
    numbers = {"rate": 2e-3, "steps": 100, "decay": 5e-3, "clip": float("inf")}
    for size in (0, 4, 64, 46_208_832):
        arena, scalar = Spec((size,), FLOAT32), Spec((), FLOAT32)

        def add(steps, given, made, size=size):
            state, *rest, copy = made
            options = {"copy": None if copy_dtype == FLOAT32 else copy, "copy_dtype": copy_dtype}
            optim.add_adamw(steps, *given, state, *rest, size=size, decayed=size // 8 * 4, **options)

        copy = Spec((0,) if copy_dtype == FLOAT32 else (size,), copy_dtype)
        made = [Spec((2,), np.dtype(np.uint32)), arena, arena, arena, scalar, copy]
        check(add, [arena, scalar], made, numbers)


def test_what_does_not_fit_is_an_error():
    steps, x = Steps(1, 1), Input(0)
    sizes = {"rows": 1, "dtype": BFLOAT16}
    for columns, message in ((12, "multiple of 8, got 12"), (0, "got 0"), (1544, "at most 1536 columns, got 1544")):
        with pytest.raises(ValueError, match=message):
            layers.add_norm(steps, x, x, x, x, columns=columns, epsilon=1e-5, **sizes)
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        layers.add_residual(steps, x, x, x, columns=8, drop=layers.Drop(1.0, 0, x, 0), **sizes)
    for classes, points in ((0, 1), (65, 1), (3, 2**30)):
        with pytest.raises(ValueError, match="got " + str(points if points > 1 else classes)):
            sizes = {"points": points, "rows": 1, "classes": classes, "ignore": 255}
            losses.add_loss(steps, x, x, x, x, **sizes, dtype=FLOAT32, label_dtype=UINT8)
    with pytest.raises(ValueError, match="multiples of 4, got 6 and 2"):
        optim.add_adamw(steps, x, x, x, x, x, x, x, size=6, decayed=2)
