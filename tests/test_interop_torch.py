# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.torch on the CPU: first the checks of every op in torch, then tests of single ops."""

from __future__ import annotations

import doctest
import functools
import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_docs
from test_flash3d import CONFIG

torch = pytest.importorskip("torch")
from torch.autograd import forward_ad  # noqa: E402
from torch_cases import (  # noqa: E402
    CASES,
    LENGTHS,
    POINTS,
    assert_same,
    expected,
    gradient_of,
    inputs_of,
    layout,
    native,
    normal,
    place,
    points,
    run,
    samples,
    tensor,
)

import gpu3d  # noqa: E402
from gpu3d import _arrays  # noqa: E402
from gpu3d.cuda import launcher  # noqa: E402
from gpu3d.cuda.plan import DEVICES  # noqa: E402
from gpu3d.interop import torch as g  # noqa: E402
from gpu3d.interop.torch import backbone, functions, modules, operators  # noqa: E402

MANY = tuple(range(1, 81))  # more clouds than are passed as integers
every = pytest.mark.parametrize("name", CASES)
# torch warns about its own modules while it compiles. Its warning about caches is about one of ours.
compiling = pytest.mark.filterwarnings("ignore", "error:.*lru_cache")


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def loss_of(name, device="cpu"):
    """A scalar function of the inputs of an op, and the inputs."""
    case, at = CASES[name], place(device=device)

    def loss(*inputs):
        return case.forward(at, *inputs)[0].nan_to_num().square().sum()

    return loss, inputs_of(case, at)


def detached(inputs):
    return tuple(x.detach() for x in inputs)


# ---- every op: values and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@every
def test_bits(name, dtype):
    """Results and gradients equal those of plain calls on NumPy arrays, with and without autograd."""
    case, at = CASES[name], place()
    inputs = inputs_of(case, at, dtype)
    wanted = expected(case, at, inputs)
    assert_same(run(case, at, inputs), wanted)
    with torch.no_grad():
        result = case.forward(at, *inputs)[0]
        assert not result.requires_grad
        assert_same([result], wanted[:1])
    assert_same([case.forward(at, *detached(inputs))[0]], wanted[:1])


@every
def test_many_clouds(name):
    """The lengths of many clouds are passed as a tensor."""
    case, at = CASES[name], place(16, MANY)
    inputs = inputs_of(case, at)
    assert_same(run(case, at, inputs), expected(case, at, inputs))


@every
def test_one_input_that_requires_grad(name):
    case, at = CASES[name], place()
    inputs = inputs_of(case, at)
    wanted = expected(case, at, inputs)
    for i in range(len(inputs)):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        result = case.forward(at, *alone)[0]
        assert_same(
            [result, *torch.autograd.grad(result, alone[i], gradient_of(result, torch.float32))],
            [wanted[0], wanted[1 + i]],
        )


@pytest.mark.parametrize("name", [name for name in CASES if "apml" not in name])  # its plan is held constant
def test_gradients_against_differences(name):
    """The derivative along a random direction."""
    case, at = CASES[name], place()
    inputs = detached(inputs_of(case, at, torch.float64))
    direction = [normal(*x.shape, dtype=torch.float64, seed=20 + i).detach() for i, x in enumerate(inputs)]
    weights = None

    def along(step):
        nonlocal weights
        result = case.forward(at, *[x + step * d for x, d in zip(inputs, direction, strict=True)])[0].nan_to_num()
        if weights is None:
            weights = normal(*result.shape, dtype=torch.float64, seed=5).detach()
        return (result * weights).sum()

    step = 1e-6
    difference = (along(step) - along(-step)) / (2 * step)
    leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(along(leaf), leaf)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6)
    assert slope != 0


@every
def test_second_derivatives(name):
    """Second derivatives that do not exist are refused, because torch would take them for zero."""
    case, (loss, inputs) = CASES[name], loss_of(name)
    found = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    again = sum(x.nan_to_num().square().sum() for x in found) + sum(x.nan_to_num().sum() for x in inputs)
    if case.twice:
        assert all(bool((x.nan_to_num() != 0).any()) for x in torch.autograd.grad(again, inputs))
        return
    with pytest.raises(RuntimeError, match=r"gpu3d has no second derivatives: torch asked for the gradient of \w+_"):
        again.backward()


# ---- every op: torch.func ------------------------------------------------------------------------------------------


@every
def test_torch_func(name):
    loss, inputs = loss_of(name)
    which = tuple(range(len(inputs)))
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    inputs = detached(inputs)
    assert_same(torch.func.grad(loss, which)(*inputs), wanted)
    _, pull = torch.func.vjp(loss, *inputs)
    assert_same(pull(torch.ones(())), wanted)
    assert_same(torch.func.jacrev(loss, which)(*inputs), wanted)
    batch = [torch.stack([x, x.roll(1, -1)]) for x in inputs]
    each = [torch.func.grad(loss, which)(*[x[i] for x in batch]) for i in range(2)]
    stacked = [torch.stack(pair) for pair in zip(*each, strict=True)]
    assert_same(torch.vmap(torch.func.grad(loss, which))(*batch), stacked)
    assert_same(torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), which)(*batch), stacked)
    with torch.no_grad():
        alone = torch.stack([loss(*[x[i] for x in batch]) for i in range(2)])
        torch.testing.assert_close(torch.vmap(loss)(*batch), alone)


@every
def test_jacrev_of_rows(name):
    """jacrev passes batched gradients."""
    case, at = CASES[name], place()
    inputs = detached(inputs_of(case, at))

    def some(x):
        return case.forward(at, x, *inputs[1:])[0].nan_to_num().reshape(-1)[:3]

    got = torch.func.jacrev(some)(inputs[0])
    leaf = inputs[0].clone().requires_grad_()
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in some(leaf)]
    assert_same([got], [torch.stack(rows)])


NO_FORWARD = r"gpu3d has no forward-mode derivatives, and an argument of \w+ has a tangent"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
@every
def test_forward_mode_is_refused(name):
    """It raises an error, instead of giving zero or None."""
    loss, inputs = loss_of(name)
    inputs = detached(inputs)
    functions = {
        "jvp": lambda: torch.func.jvp(loss, inputs, inputs),
        "jacfwd": lambda: torch.func.jacfwd(loss)(*[x[..., :8] for x in inputs]),
        "hessian": lambda: torch.func.hessian(loss)(*inputs),
        "jvp of grad": lambda: torch.func.jvp(torch.func.grad(loss), inputs, inputs),
        "jvp in vmap": lambda: torch.vmap(lambda *x: torch.func.jvp(loss, x, x))(*[x[None] for x in inputs]),
    }
    for way in functions.values():
        with pytest.raises(NotImplementedError, match=NO_FORWARD):
            way()
    with pytest.raises((NotImplementedError, ValueError, RuntimeError)):  # raised inside torch
        torch.func.jvp(lambda *x: torch.vmap(loss)(*x).sum(), *[tuple(x[None] for x in inputs)] * 2)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x) for x in inputs]
            with pytest.raises(NotImplementedError, match=NO_FORWARD):
                loss(*duals)
            with torch.no_grad(), pytest.raises(NotImplementedError, match=NO_FORWARD):
                loss(*duals)


# ---- every op: torch.compile, torch.jit, torch.export --------------------------------------------------------------


@compiling
@every
def test_compile(name):
    case, at = CASES[name], place()
    inputs = inputs_of(case, at)
    compiled = case._replace(forward=torch.compile(case.forward, fullgraph=True, backend="aot_eager"))
    assert_same(run(compiled, at, inputs), run(case, at, inputs))


@compiling
@every
def test_compile_around_torch_func(name):
    """The gradient is right or raises an error; it is never 0."""
    loss, inputs = loss_of(name)
    inputs = detached(inputs)
    wanted = torch.func.grad(loss)(*inputs)
    batch = [x[None] for x in inputs]
    for f, args, answer in (
        (torch.func.grad(loss), inputs, wanted),
        (torch.vmap(torch.func.grad(loss)), batch, wanted[None]),
        (lambda *x: torch.func.jvp(loss, x, x)[1], inputs, None),
    ):
        try:
            got = torch.compile(lambda *x, f=f: f(*x), backend="aot_eager")(*args)
        except Exception as error:
            assert "gpu3d" in str(error)
        else:
            assert answer is not None
            assert_same([got], [answer])
        torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns about Python values while it traces
@every
def test_jit_trace(name):
    """The trace has the operator with its gradient, and not the result of the example."""
    case, at = CASES[name], place()
    inputs, others = inputs_of(case, at), [x.detach().roll(1, -1) for x in inputs_of(case, at)]
    for x in (inputs, detached(inputs)):
        traced = torch.jit.trace(lambda *x: case.forward(at, *x)[0], tuple(x), check_trace=False)
        assert_same([traced(*others)], [case.forward(at, *others)[0]])
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    program = torch.jit.load(buffer)
    loaded = case._replace(forward=lambda at, *x: (program(*x), None))
    leaves = [x.clone().requires_grad_() for x in others]
    assert_same(run(loaded, at, leaves), run(case, at, leaves))


@compiling
@every
def test_export(name):
    case, at = CASES[name], place()

    class Module(torch.nn.Module):
        def forward(self, *x):
            return case.forward(at, *x)[0]

    inputs = detached(inputs_of(case, at))
    exported = torch.export.export(Module(), inputs, strict=False).module()
    others = [x.roll(1, -1) for x in inputs]
    assert_same([exported(*others)], [case.forward(at, *others)[0]])


# ---- every op: who intercepts operators ----------------------------------------------------------------------------


@every
def test_modes_and_the_profiler_see_the_operators(name):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.add(str(func).replace(".", "::", 1))
            return func(*args, **(kwargs or {}))

    case, at = CASES[name], place()
    inputs = inputs_of(case, at)
    op = "move_rows" if name in ("scatter", "gather") else name.partition("-")[0]
    back = op if op == "move_rows" else op + "_backward"
    wanted = run(case, at, inputs)
    for mode, seen in ((Dispatched(), {op, back}), (Called(), {op})):
        names = set()
        with mode:
            got = run(case, at, inputs)
        assert {f"gpu3d::{x}.eager" for x in seen} <= names
        assert_same(got, [x.detach() for x in wanted])
    with torch.profiler.profile() as profile:
        run(case, at, inputs)
    assert {f"gpu3d::{op}", f"gpu3d::{back}"} <= {event.key for event in profile.key_averages()}


@every
def test_subclasses_and_fake_tensors(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Subclass(torch.Tensor):
        pass

    case, at = CASES[name], place()
    inputs = inputs_of(case, at)
    result = case.forward(at, *detached(inputs))[0]
    assert isinstance(case.forward(at, *[x.detach().as_subclass(Subclass) for x in inputs])[0], Subclass)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = case.forward(at, *[mode.from_tensor(x) for x in inputs])[0]
    assert fake.shape == result.shape and fake.dtype == result.dtype


SAMPLES = list(samples())


def operator_of(sample):
    return next(op for op in vars(operators).values() if getattr(op, "default", None) is sample[0].default)


@compiling
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample[0].__name__)
def test_opcheck(sample):
    op, *args = sample
    torch.library.opcheck(op.default, tuple(args))
    args = [torch.tensor(x) if isinstance(x, tuple) else x for x in args]
    alike = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(op.eager, tuple(alike), test_utils="test_schema")


def test_every_operator_is_checked():
    defined = {op.name for op in vars(operators).values() if isinstance(op, operators.Operator)}
    assert defined == {op.__name__ for op, *_ in SAMPLES}


class OnGpu:
    """Stands in for a tensor on a GPU, of which an operator reads no value."""

    def __init__(self, x):
        self.shape, self.is_contiguous, self.stride = x.shape, x.is_contiguous, x.stride
        self.dtype = torch.float32 if x.dtype == torch.float64 else x.dtype  # most ops take no float64 on a GPU
        self.address = x.data_ptr()

    def data_ptr(self):
        return self.address

    def get_device(self):
        return 0

    @property
    def given(self):
        alike = self.shape, self.dtype, None if self.is_contiguous() else self.stride(), self.address
        return _arrays.tensor_alike("x", *alike, 0)


KEPT = [sample for sample in SAMPLES if operator_of(sample).call_of is not None]


@pytest.mark.parametrize("sample", KEPT, ids=lambda sample: sample[0].__name__)
def test_kept_calls(sample, monkeypatch):
    """What an operator keeps for tensors alike is what its kernel launches."""
    launched = []

    def launch_at(call, addresses, results, origin):
        launched.append((call.plan, call.numbers, addresses, results, origin))
        return [None] * len(results)

    op = operator_of(sample)
    monkeypatch.setattr(launcher, "device", lambda ordinal: DEVICES["sm_90a"])
    monkeypatch.setattr(launcher, "launch_at", launch_at)
    monkeypatch.setattr(_arrays, "require_cupy", lambda name: None)
    monkeypatch.setattr(op, "kept_call", functools.lru_cache(op.kept_call.__wrapped__))
    tensors, numbers = [OnGpu(x) for x in sample[1 : len(op.tensors) + 1]], sample[len(op.tensors) + 1 :]
    if op._run_kept(tensors, numbers) is None:
        assert op is operators.APML and numbers[-2] is None  # two calls
        return
    op.kernel(*[x.given for x in tensors], *numbers)
    kept, of_kernel = launched
    assert kept == of_kernel
    tensors[0].address += 4  # a misaligned tensor is not alike
    op._run_kept(tensors, numbers)
    op.kernel(*[x.given for x in tensors], *numbers)
    assert launched[2] == launched[3] and launched[2][2] != kept[2]
    op._run_kept(tensors, numbers)
    assert op.kept_call.cache_info()[:2] == (1, 2)  # hits and misses


def test_calls_that_are_not_kept(monkeypatch):
    """As keys scales of 0.0 and -0.0 are the same, lengths of many clouds are large, and a CPU has no plans."""
    q = torch.ones(16, 1, 8)
    args = (q, q, q, torch.zeros(1, 1, dtype=torch.int32), 16, (16,))
    alike = tuple([(x.shape, x.dtype, None, 0, 0) for x in args[:4]])
    with monkeypatch.context() as patch:
        patch.setattr(_arrays, "require_cupy", lambda name: None)
        assert operators.ATTENTION.kept_call(alike, *args[4:], -0.0) is None
    assert operators.ATTENTION._run_kept([OnGpu(x) for x in args[:4]], (16, (0,) * 65, None)) is None
    assert operators.ATTENTION._run_kept(args[:4], (*args[4:], None)) is None


@pytest.mark.parametrize("name", [name for name in g.__all__ if name[0].islower() and name != "use_torch_allocator"])
def test_plain_calls_come_here(name, monkeypatch):
    """A plain call on a tensor is the function of the same name in gpu3d.interop.torch."""
    buckets, scopes = layout()  # kept, so not through what is patched next
    x, pooled = points(), _pooled()
    here = getattr(g, name)
    seen = []
    monkeypatch.setattr(g, name, lambda *args, **kwargs: seen.append(here(*args, **kwargs)))
    calls = {
        "bucketize": lambda: gpu3d.bucketize(x, 16),
        "scopes": lambda: gpu3d.scopes(buckets),
        "scatter": lambda: buckets.scatter(x),
        "gather": lambda: buckets.gather(torch.ones(buckets.num_slots)),
        "bucket_attention": lambda: gpu3d.bucket_attention(*[torch.ones(buckets.num_slots, 1, 8)] * 3, buckets, scopes),
        "bucket_pool": lambda: gpu3d.bucket_pool(*[torch.ones(buckets.num_slots, 3)] * 2, buckets),
        "bucket_unpool": lambda: gpu3d.bucket_unpool(
            torch.ones(pooled.buckets.num_slots, 2), pooled, torch.ones(buckets.num_slots, 2)
        ),
        "chamfer": lambda: gpu3d.chamfer(x, x),
        "compare_clouds": lambda: gpu3d.compare_clouds(x, x),
        "apml": lambda: gpu3d.apml(x, x),
        "emd": lambda: gpu3d.emd(x[:20], x[:20]),
        "farthest_points": lambda: gpu3d.farthest_points(x, 2),
        "knn": lambda: gpu3d.knn(x, x, 2),
        "radius_search": lambda: gpu3d.radius_search(x, x, 0.1),
        "normals": lambda: gpu3d.normals(x),
    }
    calls[name]()
    assert len(seen) == 1


def _pooled():
    buckets, _ = layout()
    at = buckets.scatter(points())
    return gpu3d.bucket_pool(at, at, buckets)


# ---- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hash": "xor_mod", "balance": "probe", "seed": 3},
        {"voxel_size": 0.01},
        {"voxel_size": "per_axis"},
        {"bounds": "robust"},
        {"bounds": (0, [1, 2, 3])},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bucketize_and_scopes(dtype, options):
    x = points(dtype=dtype)
    got, wanted = (gpu3d.bucketize(z, 16, lengths=LENGTHS, **options) for z in (x, native(x)))
    for name in ("slot_to_point", "point_to_slot", "moved"):
        assert np.array_equal(native(getattr(got, name)), getattr(wanted, name)), name
    assert (got.lengths, got.bucket_offsets, got.bucket_size) == (wanted.lengths, wanted.bucket_offsets, 16)
    for size, shift, stride in itertools.product((1, 2, 3, 50), (0, 1, -2), (1, 2, 7)):
        a, b = (gpu3d.scopes(z, size, shift=shift, stride=stride) for z in (got, wanted))
        assert np.array_equal(native(a.table), b.table) and a.bucket_offsets == b.bucket_offsets
        arguments = got.slot_to_point, 16, list(LENGTHS), size, shift, stride
        assert operators.SCOPES._fake(*arguments).shape == b.table.shape


def test_bucketize_of_a_batch():
    x = points(120).reshape(4, 30, 3)
    got, wanted = g.bucketize(x, 16), gpu3d.bucketize(native(x), 16)
    assert got.lengths == (30,) * 4 and np.array_equal(native(got.slot_to_point), wanted.slot_to_point)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint8", "bool", "int64", "complex64"])
def test_scatter_of_any_dtype(name):
    buckets, _ = layout()
    x = (torch.arange(2 * POINTS).reshape(-1, 2) % 97).to(getattr(torch, name))
    for of in (buckets, native(buckets)):
        y = of.scatter(x)
        assert y.dtype == x.dtype and y.shape == (buckets.num_slots, 2)
        assert bool((of.gather(y).view(torch.uint8) == x.view(torch.uint8)).all())


def test_layouts_of_another_library():
    """Index arrays of another library become tensors that share their memory."""
    buckets, scopes = native(layout())
    x = normal(POINTS, 3)
    assert_same([buckets.scatter(x)], [layout()[0].scatter(x).detach()])
    assert functions._tensor(buckets.slot_to_point, "x").data_ptr() == buckets.slot_to_point.ctypes.data
    q = normal(buckets.num_slots, 1, 8)
    assert_same(
        [gpu3d.bucket_attention(q, q, q, buckets, scopes)], [gpu3d.bucket_attention(q, q, q, *layout()).detach()]
    )
    frozen = gpu3d.Buckets(**{**vars(buckets), "point_to_slot": buckets.point_to_slot.copy()})
    frozen.point_to_slot.flags.writeable = False
    assert_same([frozen.scatter(x)], [buckets.scatter(x).detach()])


def test_pytrees():
    pooled = _pooled()
    leaves, spec = torch.utils._pytree.tree_flatten((*layout(), pooled))
    assert sum(isinstance(x, torch.Tensor) for x in leaves) == 3 + 1 + 3 + 3 + 3
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert isinstance(again[2], gpu3d.Pooling) and again[2].buckets.lengths == pooled.buckets.lengths
    with torch.device("cpu"):
        moved = pooled.to("cpu") if hasattr(pooled, "to") else layout()[0].to("cpu")
    assert type(moved) in (gpu3d.Pooling, gpu3d.Buckets)


# ---- torch.compile of a backbone's stage ---------------------------------------------------------------------------


def stage(x, at, lengths, squared=False):
    """A stage of a backbone: it calls every function, and makes, uses and returns the layouts."""
    buckets = g.bucketize(at, 16, lengths=lengths)
    rows = g.scatter(x, buckets)
    q, k, v = rows.unflatten(1, (3, 2, 8)).unbind(1)
    attended = g.bucket_attention(q, k, v, buckets, g.scopes(buckets, 2, shift=1)).flatten(1)
    pooled = g.bucket_pool(attended, g.scatter(at, buckets), buckets, reduce="max")
    again = g.bucket_attention(
        *(pooled.features.unflatten(1, (2, 8)),) * 3, pooled.buckets, g.scopes(pooled.buckets, 2, stride=2)
    )
    out = g.gather(g.bucket_unpool(again.flatten(1), pooled, attended), buckets)
    return out, g.chamfer(out[:, :3], at, x_lengths=lengths, y_lengths=lengths, squared=squared), pooled


def check_compiled(backend, same):
    compiled = torch.compile(stage, fullgraph=True, backend=backend)
    batches = (150, 3, 33, 1), (150, 3, 33, 1), (90, 60, 37, 30), (17, 18, 19, 100), (40, 50, 60, 70), (5, 6, 7, 8)
    for lengths in batches:
        x, at = normal(sum(lengths), 48), points(sum(lengths))
        results = []
        for way in (stage, compiled):
            out, loss, pooled = way(x, at, lengths)
            (dx,) = torch.autograd.grad(out.square().sum() + loss, x)
            assert isinstance(pooled, gpu3d.Pooling) and isinstance(pooled.buckets, gpu3d.Buckets)
            assert all(type(n) is int for n in pooled.buckets.lengths + pooled.buckets.bucket_offsets)
            results.append((out, loss, dx, pooled.features, pooled.members, pooled.buckets.point_to_slot))
        for a, b in zip(*results, strict=True):
            same(a, b)
        assert pooled.buckets.lengths == tuple(-(-n // 2) for n in lengths)


@compiling
def test_compile_with_lengths_that_change():
    torch._dynamo.utils.counters.clear()

    def same(a, b):
        assert torch.equal(a, b)

    check_compiled("aot_eager", same)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= (2 if torch.__version__ >= "2.7" else 3)  # the last graph has symbols for lengths


@compiling
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler, which inductor needs")
def test_compile_with_inductor():
    check_compiled("inductor", functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5))


@compiling
def test_compile_of_a_module_with_structure_passed_in():
    block = g.BucketAttention(32, 4)
    x = g.scatter(normal(POINTS, 32).detach(), layout()[0])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same([compiled(x, *layout())], [block(x, *layout()).detach()])


@compiling
def test_compile_searches():
    """Results are the same with a symbolic number of entries; where entries cannot be counted there is a default."""

    def search(query, at):
        return *g.knn(query, at, 3), *g.radius_search(query, at, 20.0), g.apml(query, at)

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    for n in (30, 40, 55):
        query, at = points(n), points(n + 5, seed=1)
        wanted, got = search(query, at), compiled(query, at)
        count = len(wanted[3])
        assert_same([*got[:3], got[5]], [*wanted[:3], wanted[5]])
        assert torch.equal(got[3][:count], wanted[3]) and torch.equal(got[4][:count], wanted[4])
        assert len(got[3]) == n * (n + 5) and bool((got[3][count:] == -1).all())


@compiling
def test_gradients_of_searches():
    """Gradients equal autograd's on float64 differences of coordinates, for any max_entries and under torch.compile."""
    lengths = {"query_lengths": (20, 40), "lengths": (45, 5)}
    x, y = (normal(n, 3, dtype=torch.float64, seed=n) for n in (60, 50))

    def by_radius(x, y, **room):
        found = g.radius_search(x, y, 1.5, **lengths, **room)
        return found.distances.nan_to_num().square().sum(), found

    def by_number(x, y):
        found = g.knn(x, y, 4, **lengths)
        return found.distances.square().sum(), found

    for search in (by_number, by_radius):
        loss, found = search(x, y)
        rows = torch.arange(60)
        rows = rows.repeat_interleave(4 if search is by_number else found.offsets.diff())
        explicit = (x[rows] - y[found.indices.reshape(-1)]).square().sum()
        assert loss.dtype == found.distances.dtype == torch.float64
        torch.testing.assert_close(loss, explicit, rtol=1e-13, atol=0)
        got, wanted = torch.autograd.grad(loss, (x, y)), torch.autograd.grad(explicit, (x, y))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.autograd.gradcheck(lambda *z, f=search: f(*z)[1].distances.nan_to_num(), (x[:, :2] * 1.0, y[:, :2] * 1.0))
        compiled = torch.compile(lambda *z, f=search: f(*z)[0], fullgraph=True, backend="aot_eager")
        assert_same(torch.autograd.grad(compiled(x, y), (x, y)), got)
        assert_same(torch.func.grad(lambda *z, f=search: f(*z)[0], (0, 1))(*detached((x, y))), got)
    for room in (len(found.indices), len(found.indices) + 9):
        assert_same(torch.autograd.grad(by_radius(x, y, max_entries=room)[0], (x, y)), got)
    cut = torch.autograd.grad(by_radius(x, y, max_entries=len(found.indices) - 1)[0], (x, y))
    assert all(bool(z.isnan().all()) for z in cut)


@pytest.mark.parametrize("reduction", ["mean", "none", "points"])
@pytest.mark.parametrize("direction", ["both", "x_to_y"])
def test_gradcheck_of_chamfer(reduction, direction):
    """float64 clouds have float64 losses and gradients, also far from the origin."""
    x, y = ((normal(n, 3, dtype=torch.float64, seed=n).detach() + 4e6).requires_grad_() for n in (9, 7))
    options = {"x_lengths": (5, 4), "y_lengths": (3, 4), "reduction": reduction, "direction": direction}

    def loss(x, y, squared):
        found = g.chamfer(x, y, squared=squared, **options)
        return torch.cat([z for z in found if z is not None]) if reduction == "points" else found

    for squared in (False, True):
        assert loss(x, y, squared).dtype == torch.float64
        torch.autograd.gradcheck(lambda *z, squared=squared: loss(*z, squared), (x, y), eps=1e-3, atol=1e-4)


@compiling
@pytest.mark.parametrize("options", [{"max_neighbors": 6}, {"max_neighbors": 40}, {"max_entries": 900}], ids=str)
def test_radii(options):
    """One radius a query, and a point that is no neighbour of itself: as on NumPy arrays, and under torch.compile."""
    x, radii = normal(60, 3, seed=1), torch.linspace(0, 1.5, 60)
    lengths = {"query_lengths": (20, 40), "lengths": (20, 40)}

    def search(x, radii):
        return g.radius_search(x, x, radii, **lengths, **options, exclude_self=True)

    def total(x, radii):
        found = search(x, radii)
        return torch.where(found.indices < 0, 0, found.distances).sum()

    x_host, radii_host = x.detach().numpy(), radii.numpy()
    expected = gpu3d.radius_search(x_host, x_host, radii_host, **lengths, **options, exclude_self=True)
    assert_same(search(x, radii), [torch.from_numpy(z) for z in expected])
    (gradient,) = torch.autograd.grad(total(x, radii), x)
    assert bool((gradient != 0).any())
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert_same(torch.autograd.grad(compiled(x, radii), x), [gradient])
    assert_same([torch.func.grad(total)(x.detach(), radii)], [gradient])
    mixed = gpu3d.radius_search(x_host, x.detach(), radii, **lengths, **options, exclude_self=True)
    assert_same([torch.from_numpy(z) for z in mixed], [torch.from_numpy(z) for z in expected])
    with pytest.raises(
        TypeError, match=r"radius requires grad, and radius_search has no gradient for it: pass radius\.d"
    ):
        search(x, radii.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"radius must not be negative or NaN, got radius\[0\] = -1.0"):
        search(x, radii - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_of_searches(dtype):
    """Under autocast both clouds are cast to float32, as for losses."""
    x, y = normal(60, 3, dtype=dtype), normal(50, 3, seed=1)
    wide = x.detach().float().requires_grad_()
    for search in (lambda *z: g.knn(*z, 4).distances, lambda *z: g.radius_search(*z, 1.0).distances):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = search(x, y)
        wanted = search(wide, y)
        assert_same([found], [wanted])
        dx, dy = torch.autograd.grad(wanted.sum(), (wide, y))
        assert_same(torch.autograd.grad(found.sum(), (x, y)), [dx.to(dtype), dy])


# ---- autocast, checkpointing ---------------------------------------------------------------------------------------


@compiling
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, compiled):
    buckets, scopes = layout()

    def ops(x, at):
        q, k, v = x.unflatten(1, (3, 2, 8)).unbind(1)
        out = g.bucket_attention(q, k, v, buckets, scopes)
        pooled = g.bucket_pool(x, at, buckets)
        losses = g.chamfer(at.half(), at * 1.5), g.apml(at.half(), at * 1.5)
        return out, pooled.features, g.bucket_unpool(pooled.features, pooled, x), *losses

    x, at = normal(layout()[0].num_slots, 48), g.scatter(points(), layout()[0])
    with torch.autocast("cpu", dtype=dtype):
        ops = torch.compile(ops, fullgraph=True, backend="aot_eager") if compiled else ops
        out, features, back, near, moved = ops(x, at)
    assert out.dtype == dtype and {z.dtype for z in (features, back, near, moved)} == {torch.float32}
    q, k, v = x.to(dtype).unflatten(1, (3, 2, 8)).unbind(1)
    assert_same([out], [gpu3d.bucket_attention(q, k, v, *layout())])
    assert_same([near, moved], [loss(at.half().float(), at * 1.5) for loss in (gpu3d.chamfer, gpu3d.apml)])
    dout = gradient_of(out, out.dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    plain = [z.detach() for z in (q, k, v)]
    saved = gpu3d.bucket_attention(*plain, *layout(), return_lse=True)
    exact = gpu3d.bucket_attention_backward(dout, *plain, *saved, *layout())
    assert_same([dx], [torch.stack([z.float() for z in exact], 1).flatten(1)])
    with torch.autocast("cpu", dtype=dtype):
        assert g.bucket_attention(*(z.double() for z in (q, k, v)), *layout()).dtype == torch.float64


@compiling
@pytest.mark.parametrize("way", ["reentrant", "plain", "compiled"])
def test_activation_checkpointing(way):
    from torch.utils.checkpoint import checkpoint

    def rows(x, at):
        return stage(x, at, (150, 34))[0]

    def checkpointed(x, at):
        return checkpoint(rows, x, at, use_reentrant=way == "reentrant")

    if way == "compiled":
        checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    x, at = normal(POINTS, 48), points()
    checkpointed(x, at).square().sum().backward()
    assert_same([x.grad], torch.autograd.grad(rows(x, at).square().sum(), x))


# ---- modules -------------------------------------------------------------------------------------------------------


def test_bucket_attention_module():
    torch.manual_seed(0)
    block = g.BucketAttention(32, 2, scale=0.5)
    x = g.scatter(normal(POINTS, 32).detach(), layout()[0]).requires_grad_()
    q, k, v = block.qkv(x).view(-1, 3, 2, 16).unbind(1)
    expected = block.projection(gpu3d.bucket_attention(q, k, v, *layout(), scale=0.5).reshape(-1, 32))
    out = block(x, *layout())
    assert_same([out], [expected.detach()])
    out.square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any()) for p in (x, *block.parameters()))
    assert "heads=2, scale=0.5" in repr(block)
    assert g.BucketAttention(64, 4, bias=False, dtype=torch.float64).qkv.weight.dtype == torch.float64
    for channels, heads in ((32, 3), (32, 8), (1024, 4), (32, 0), (0, 2)):
        with pytest.raises(
            ValueError, match=f"at most 128 and divisible by 8, got {channels} channels for {heads} heads"
        ):
            g.BucketAttention(channels, heads)


def test_losses_as_modules():
    x, y = normal(2, 20, 3), normal(2, 30, 3, seed=1)
    loss = g.ChamferLoss(squared=True, reduction="sum")
    assert_same([loss(x, y)], [gpu3d.chamfer(x, y, squared=True, reduction="sum")])
    assert_same(
        [loss(x[0], y[0], [5, 15], [15, 15])],
        [gpu3d.chamfer(x[0], y[0], x_lengths=[5, 15], y_lengths=[15, 15], squared=True, reduction="sum")],
    )
    assert repr(loss) == "ChamferLoss(squared=True, reduction='sum', direction='both', empty='error')"
    loss = g.APMLLoss(iterations=5, symmetrize="min")
    assert_same([loss(x, y)], [gpu3d.apml(x, y, iterations=5, symmetrize="min")])
    assert "iterations=5, symmetrize='min', reduction='mean'" in repr(loss)


def test_training_with_a_block_learns():
    torch.manual_seed(0)
    buckets, scopes = layout()
    block = g.BucketAttention(16, 2)
    x, y = (g.scatter(normal(POINTS, 16, seed=seed).detach(), buckets) for seed in (0, 1))
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = g.gather(block(x, buckets, scopes) - y, buckets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_docstrings():
    names = {name: getattr(g, name) for name in g.__all__}
    finder, globs = doctest.DocTestFinder(), {"torch": torch, **names}
    tests = [test for module in (modules, backbone) for test in finder.find(module, globs=globs) if test.examples]
    assert len(tests) > 3
    for test in tests:
        test_docs.run(test)
    assert all(x.__doc__.strip() for x in names.values())


# ---- DDP -----------------------------------------------------------------------------------------------------------

WORLD = 2


def train_step(name, rank, store):
    """One process of DDP: a backward on its clouds. The first process reports the gradients."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    module = torch.nn.parallel.DistributedDataParallel(ddp_module(name))
    ddp_loss(module, rank).backward()
    if rank == 0:
        torch.save([p.grad for p in module.module.parameters()], store + ".gradients")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that torch leaves may abort the interpreter at exit


def ddp_module(name):
    torch.manual_seed(0)
    return g.Flash3D(CONFIG.replace(in_channels=16)).eval() if name == "backbone" else g.BucketAttention(16, 2)


def ddp_loss(module, rank):
    at, x = points(64 + 32 * rank, seed=rank), normal(64 + 32 * rank, 16, seed=rank).detach()
    if isinstance(getattr(module, "module", module), g.Flash3D):
        return module(at, x).square().mean()
    buckets = g.bucketize(at, 16)
    out = module(g.scatter(x, buckets), buckets, g.scopes(buckets, 2))
    return g.gather(out, buckets).square().mean()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", ["block", "backbone"])
def test_ddp(tmp_path, name):
    script = "import sys, test_interop_torch as t; t.train_step(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", script, name]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env) for rank in range(WORLD)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
    module = ddp_module(name)
    (sum(ddp_loss(module, rank) for rank in range(WORLD)) / WORLD).backward()
    for got, p in zip(torch.load(tmp_path / "store.gradients"), module.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-7)


def test_farthest_points_in_a_program_and_voxels_outside():
    x = points()

    def program(x):
        return gpu3d.farthest_points(x, 5, lengths=LENGTHS), x.sum()

    assert torch.equal(torch.compile(program, fullgraph=True, backend="aot_eager")(x)[0], program(x)[0])
    rows = torch.vmap(lambda x: gpu3d.farthest_points(x, 4))(x.reshape(2, -1, 3)) + torch.tensor([[0], [len(x) // 2]])
    assert torch.equal(rows.flatten().int(), gpu3d.farthest_points(x.reshape(2, -1, 3), 4))
    with pytest.raises(Exception, match=r"(?s)cannot be part of a compiled program: call it outside of torch\.compile"):
        torch.compile(lambda x: gpu3d.voxel_downsample(x, 0.1).points, fullgraph=True, backend="eager")(x)


# ---- memory and errors ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
@pytest.mark.parametrize(
    "call",
    [
        "bucketize",
        "bucket_pool",
        "farthest_points",
        "neighbor_index",
        "normals",
        "voxel_downsample",
        "value_and_grad",
        "backward",
    ],
)
def test_gradients_that_there_are_not(call):
    """Nothing is detached silently: a tensor that requires grad is an error, and the cure that it names works."""
    buckets, _ = layout()
    x, at = points().requires_grad_(), buckets.scatter(points()).requires_grad_()
    calls = {
        "bucketize": lambda x, at: gpu3d.bucketize(x, 16),
        "bucket_pool": lambda x, at: gpu3d.bucket_pool(at.detach(), at, buckets),
        "farthest_points": lambda x, at: gpu3d.farthest_points(x, 4),
        "neighbor_index": lambda x, at: gpu3d.neighbor_index(x),
        "voxel_downsample": lambda x, at: gpu3d.voxel_downsample(x.detach(), 0.1, x),
        "normals": lambda x, at: gpu3d.normals(x),
        "value_and_grad": lambda x, at: gpu3d.chamfer_value_and_grad(x.detach(), x),
        "backward": lambda x, at: gpu3d.bucket_unpool_backward(at, _pooled()),
    }
    names = {"value_and_grad": "y", "backward": "dout", "voxel_downsample": "features"}
    name = names.get(call, "points")
    with pytest.raises(
        TypeError, match=rf"{name} requires grad, and \w+ has no gradient for it: pass {name}\.detach\(\)"
    ):
        calls[call](x, at)
    calls[call](x.detach(), at.detach())
    with torch.no_grad():
        calls[call](x, at)
    with forward_ad.dual_level(), pytest.raises(TypeError, match=f"{name} has a tangent"):
        calls[call](*[forward_ad.make_dual(z.detach(), z.detach()) for z in (x, at)])


@compiling
def test_normals():
    """Compiled, under vmap and of any dtype: the bits of the plain call on NumPy arrays."""
    options = {"lengths": (60, 0, 40), "viewpoint": (0, -1, 5.0)}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = points(100, dtype=dtype)
        wanted = [tensor(z) for z in gpu3d.normals(native(x), 7, **options)]
        assert_same(gpu3d.normals(x, 7, **options), wanted)
        assert_same(gpu3d.normals(x.reshape(4, 25, 3)), [tensor(z) for z in gpu3d.normals(native(x).reshape(4, 25, 3))])
    x = points(100)
    compiled = torch.compile(g.normals, fullgraph=True)
    assert_same(compiled(x, 7, **options), gpu3d.normals(x, 7, **options))
    x = points(60).reshape(2, 30, 3)
    assert_same(torch.vmap(gpu3d.normals)(x), [torch.stack(z) for z in zip(*map(gpu3d.normals, x), strict=True)])


def test_another_library_beside_a_tensor_that_requires_grad():
    buckets, scopes = layout()
    q, x = normal(buckets.num_slots, 2, 8), normal(20, 3)
    with pytest.raises(
        TypeError, match="k is of type ndarray beside q, a tensor that requires grad: pass k as a tensor"
    ):
        gpu3d.bucket_attention(q, native(q), q, buckets, scopes)
    with pytest.raises(TypeError, match="x is of type ndarray beside y, a tensor that requires grad"):
        gpu3d.chamfer(native(x), x)
    with pytest.raises(TypeError, match=r"x requires grad, and chamfer with a NeighborIndex has no gradient for it"):
        gpu3d.chamfer(x, gpu3d.neighbor_index(x.detach()))
    for search in (lambda x, at: gpu3d.knn(x, at, 2), lambda x, at: gpu3d.radius_search(x, at, 0.5)):
        with pytest.raises(TypeError, match=r"query requires grad, and \w+ with a NeighborIndex has no gradient"):
            search(x, gpu3d.neighbor_index(x.detach()))
        search(x.detach(), gpu3d.neighbor_index(x.detach()))
    loss = gpu3d.chamfer(native(x), x.detach() + 1)
    assert isinstance(loss, np.ndarray) and loss == gpu3d.chamfer(native(x), native(x.detach() + 1))
    assert gpu3d.chamfer(x.detach(), gpu3d.neighbor_index(x.detach() + 1)) == torch.tensor(float(loss))


def test_bad_input():
    buckets, scopes = layout()
    q, x = normal(buckets.num_slots, 2, 8), normal(20, 3).detach()
    with pytest.raises(TypeError, match=r"buckets must be the Buckets that gpu3d\.bucketize returns, got int"):
        g.gather(x, 3)
    with pytest.raises(TypeError, match="pooled must be the Pooling"):
        g.bucket_unpool(x, buckets)
    with pytest.raises(ValueError, match="scopes were made for another layout"):
        g.bucket_attention(q, q, q, buckets, layout(32)[1])
    with pytest.raises(ValueError, match="q must have one row for each of the"):
        g.bucket_attention(q[1:], q[1:], q[1:], buckets, scopes)
    with pytest.raises(TypeError, match="k must have the dtype of q, got float16 for float32"):
        g.bucket_attention(q, q.half(), q, buckets, scopes)
    with pytest.raises(TypeError, match="skip must have the dtype of child_features"):
        g.bucket_unpool(_pooled().features, _pooled(), q.flatten(1)[:, :3].half())
    with pytest.raises(ValueError, match="y must have one row for each of the"):
        g.gather(x, buckets)
    with pytest.raises(ValueError, match="lengths must sum to the number of points, got a sum of 19 for 20"):
        g.bucketize(x, 16, lengths=[19])
    with pytest.raises(ValueError, match=r"x of shape .* already says its lengths"):
        g.chamfer(x[None], x[None], x_lengths=[20])
    with pytest.raises(ValueError, match=r"points must be finite, got 1 of 20"):
        g.bucketize(torch.where(torch.arange(60).reshape(20, 3) == 7, torch.nan, x))
    for bad, match in (
        ({"bucket_size": 17}, "multiple of 16"),
        ({"bucket_size": True}, "bucket_size must be an integer, got True of type bool"),
        ({"hash": "h"}, "hash must be one of"),
        ({"voxel_size": "x"}, "voxel_size must be a number"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            g.bucketize(x, **bad)
    with pytest.raises(ValueError, match="ratio must be 2, 4 or 8, got 0"):
        g.bucket_pool(q.flatten(1), q.flatten(1)[:, :3].detach(), buckets, ratio=0)
    with pytest.raises(TypeError, match="scale must be a finite number"):
        g.bucket_attention(q, q, q, buckets, scopes, scale="x")
    for _ in range(3):  # every call gives the same answer
        with pytest.raises(TypeError, match=r"iterations must be an integer, got 20\.0 of type float"):
            g.apml(x, x, iterations=20.0)
        assert g.apml(x, x + 1, iterations=np.int64(20)) == g.apml(x, x + 1)
    with pytest.raises(TypeError, match="fill must be a number, got 'a' of type str"):
        g.scatter(points(), buckets, fill="a")
    assert bool((g.scatter(points(), buckets, fill=np.float32(2)) == 2).any())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: x.to_sparse(), r"must be a dense tensor, got layout torch\.sparse_coo: call \w+\.to_dense\(\)"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), r"must not be quantized: call \w+\.dequantize"),
        (lambda x: x.to("meta"), "is on device meta; gpu3d runs on CPU and CUDA"),
        (lambda x: x.to(torch.complex64), "must be float32, float64, float16 or bfloat16, got complex64"),
        (lambda x: x.to(torch.float8_e4m3fn), "must be float32, float64, float16 or bfloat16, got float8_e4m3fn"),
    ],
    ids=["sparse", "quantized", "meta", "complex", "float8"],
)
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_tensors_that_are_refused(make, match):
    x = points(20)
    for call in (
        lambda x: gpu3d.bucketize(x, 16),
        lambda x: gpu3d.chamfer(x, x),
        lambda x: gpu3d.apml(x, x),
        lambda x: gpu3d.knn(x, x, 1),
        lambda x: gpu3d.normals(x),
    ):
        with pytest.raises(TypeError, match=match):
            call(make(x))


def test_operators_called_by_themselves():
    """Operators that are called directly check their arguments as the functions do."""
    buckets, scopes = layout()
    q = torch.ones(buckets.num_slots, 1, 8)
    ops = torch.ops.gpu3d
    with pytest.raises(ValueError, match="q must have one row for each of the"):
        ops.bucket_attention(q[1:], q[1:], q[1:], scopes.table, 16, LENGTHS, None)
    with pytest.raises(ValueError, match=r"lengths must not be negative, got lengths\[1\] = -1"):
        ops.bucket_attention(q, q, q, scopes.table, 16, [POINTS + 1, -1], None)
    with pytest.raises(ValueError, match="bucket_size must be a multiple of 16"):
        ops.scopes(buckets.slot_to_point, 0, LENGTHS, 2, 0, 1)
    with pytest.raises(RuntimeError, match="this overload of chamfer has no gradient: pass lengths as integers"):
        n = torch.tensor([20])
        ops.chamfer.eager(normal(20, 3), normal(20, 3), n, n, False, "mean", "both", "error")
    with pytest.raises(TypeError, match=r"index must be int32 \[n\], got int64"):
        ops.move_rows(points(), buckets.slot_to_point.long(), buckets.point_to_slot, 0, "x")


def test_apml_with_too_small_a_capacity():
    x, y = normal(60, 3), normal(50, 3, seed=1)
    loss = g.apml(x, y, max_entries=10)
    assert all(bool(torch.isnan(z).all()) for z in (loss, *torch.autograd.grad(loss, (x, y))))


def test_losses_of_batches():
    for d in (2, 3):
        x, y = normal(4, 20, d), normal(4, 30, d, seed=1).detach()
        for name in ("chamfer", "apml"):
            loss = getattr(g, name)(x, y)
            wanted, (dx, _) = getattr(gpu3d, f"{name}_value_and_grad")(x.detach(), y)
            assert_same([loss, *torch.autograd.grad(loss, x)], [wanted, dx])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a torch without CUDA")
def test_torch_without_cuda():
    with pytest.raises(RuntimeError, match="use_torch_allocator needs a torch with CUDA and a GPU"):
        g.use_torch_allocator()


def test_import_errors(tmp_path):
    """Without torch, and with an old torch, the error names the extra. gpu3d alone imports no framework."""
    for text, match in (
        ("raise ImportError", "needs torch: pip install"),
        ("__version__ = '2.5.1'", "needs torch >= 2.6, got 2.5.1"),
    ):
        (tmp_path / "torch.py").write_text(text)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(gpu3d.__file__).parent.parent)])}
        done = subprocess.run(
            [sys.executable, "-c", "import gpu3d.interop\nimport gpu3d.interop.torch"],
            env=env,
            capture_output=True,
            text=True,
        )
        assert match in done.stderr and 'gpu3d[torch]"' in done.stderr
