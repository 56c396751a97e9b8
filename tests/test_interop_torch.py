# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.torch on the CPU: operators, gradients, compile, autocast, checkpointing, DDP, modules, bad input."""

from __future__ import annotations

import doctest
import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import clouds
import numpy as np
import pytest
import test_docs

import gpu3d
from gpu3d import _arrays

torch = pytest.importorskip("torch")
from gpu3d.interop import torch as g  # noqa: E402

OPS = torch.ops.gpu3d
LENGTHS = (150, 0, 33, 1)
POINTS = sum(LENGTHS)
# What torch's own modules say while they compile is not ours; but of a cache it warns because there is one of ours.
compiling = pytest.mark.filterwarnings("ignore", "error:.*lru_cache")


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def normal(*shape, dtype=torch.float32, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(x).to(dtype).requires_grad_(dtype.is_floating_point)


def points(n=POINTS, dtype=torch.float32, seed=0):
    return torch.from_numpy(clouds.uniform(n, seed=seed).copy()).to(dtype)


@functools.cache
def layout(bucket_size=16, lengths=LENGTHS):
    buckets = g.bucketize(points(sum(lengths)), bucket_size, lengths=lengths)
    return buckets, g.scopes(buckets, 2, shift=1)


def in_slots(*shape, **options):
    """Numbers in slot order, NaN in padding."""
    buckets, _ = layout()
    x = normal(buckets.num_slots, *shape, **options).detach()
    x[buckets.slot_to_point < 0] = torch.nan
    return x.requires_grad_()


def gradients(result, inputs, seed=9):
    """Of inputs, from a random gradient of the result, which is returned too. NaN in padding of `result` is no sum."""
    dout = normal(*result.shape, dtype=result.dtype, seed=seed).detach()
    return dout, torch.autograd.grad(result, inputs, dout)


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.detach(), b) and (a.numel() < 2 or bool((a != 0).any()))


# ---- the plain calls' bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"hash": "xor_mod", "balance": "probe", "seed": 3}, {"voxel_size": 0.01}, {"voxel_size": "per_axis"}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bucketize_and_scopes(dtype, options):
    x = points(dtype=dtype)
    got, expected = (m.bucketize(x, 16, lengths=LENGTHS, **options) for m in (g, gpu3d))
    for name in ("slot_to_point", "point_to_slot", "moved"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert (got.lengths, got.bucket_offsets, got.bucket_size) == (expected.lengths, expected.bucket_offsets, 16)
    for size, shift, stride in itertools.product((1, 2, 3, 50), (0, 1, -2), (1, 2, 7)):
        a, b = (m.scopes(got, size, shift=shift, stride=stride) for m in (g, gpu3d))
        assert torch.equal(a.table, b.table) and a.bucket_offsets == b.bucket_offsets
        assert g._scopes_fake(got.slot_to_point, 16, LENGTHS, size, shift, stride).shape == b.table.shape


def test_bucketize_of_a_batch():
    x = points(120).reshape(4, 30, 3)
    got, expected = g.bucketize(x, 16), gpu3d.bucketize(x, 16)
    assert got.lengths == (30,) * 4 and torch.equal(got.slot_to_point, expected.slot_to_point)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_scatter_and_gather(shape):
    buckets, _ = layout()
    x = normal(POINTS, *shape)
    y = g.scatter(x, buckets, fill=7.5)
    assert_same([y], [buckets.scatter(x, 7.5)])
    assert_same([g.gather(y, buckets)], [x.detach()])
    dy, (dx,) = gradients(y, [x])
    assert_same([dx], [buckets.gather(dy)])
    y = in_slots(*shape)
    dx, (dy,) = gradients(g.gather(y, buckets), [y])
    assert_same([dy], [buckets.scatter(dx)])
    integers = torch.arange(POINTS) + 2**40
    assert torch.equal(g.gather(g.scatter(integers, buckets, fill=-1), buckets), integers)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bucket_attention(dtype, scale):
    packed = in_slots(3, 2, 8, dtype=dtype)
    q, k, v = packed.unbind(1)
    out, lse = g.bucket_attention(q, k, v, *layout(), scale=scale, return_lse=True)
    expected = gpu3d.bucket_attention(q, k, v, *layout(), scale=scale, return_lse=True)
    assert_same((out, lse), expected)
    assert out.requires_grad and not lse.requires_grad
    dout, got = gradients(out, (q, k, v))
    assert_same(got, gpu3d.bucket_attention_backward(dout, q, k, v, *expected, *layout(), scale=scale))
    (dpacked,) = torch.autograd.grad(g.bucket_attention(*packed.unbind(1), *layout(), scale=scale), packed, dout)
    assert_same([dpacked], [torch.stack(got, 1)])


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bucket_pool_and_unpool(dtype, ratio, reduce):
    buckets, _ = layout()
    features, at = in_slots(5, dtype=dtype), g.scatter(points(), buckets).requires_grad_()
    pooled = g.bucket_pool(features, at, buckets, ratio=ratio, reduce=reduce)
    expected = gpu3d.bucket_pool(features, at, buckets, ratio=ratio, reduce=reduce)
    assert_same([pooled.features], [expected.features])
    for name in ("points", "members", "argmember"):
        a, b = getattr(pooled, name), getattr(expected, name)
        assert (a is None and b is None) or (torch.equal(a, b) and not a.requires_grad), name
    for name in ("slot_to_point", "point_to_slot", "moved"):
        assert torch.equal(getattr(pooled.buckets, name), getattr(expected.buckets, name)), name
    assert pooled.buckets.lengths == expected.buckets.lengths and pooled.parent is buckets
    dpooled, got = gradients(pooled.features, [features])
    assert_same(got, [gpu3d.bucket_pool_backward(dpooled, expected)])

    child = normal(*pooled.features.shape, dtype=dtype, seed=3)
    for skip in (None, in_slots(5, dtype=dtype, seed=4)):
        out = g.bucket_unpool(child, pooled, skip)
        assert_same([out], [gpu3d.bucket_unpool(child, expected, skip)])
        inputs = [child] if skip is None else [child, skip]
        dout, got = gradients(out, inputs)
        assert_same(got, gpu3d.bucket_unpool_backward(dout, expected)[: len(inputs)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
def test_chamfer(dtype, squared, reduction):
    x, y = normal(60, 3, dtype=dtype), normal(50, 3, dtype=dtype, seed=1)
    options = {"x_lengths": [20, 40], "y_lengths": [45, 5], "squared": squared, "reduction": reduction}
    loss = g.chamfer(x, y, **options)
    expected, plain = gpu3d.chamfer_value_and_grad(x, y, **options)
    assert_same([loss], [expected])
    assert_same(torch.autograd.grad(loss.sum(), (x, y), retain_graph=True), plain)
    if reduction == "none":
        dx, dy = torch.autograd.grad(loss, (x, y), torch.tensor([2.0, -0.5]))  # exact factors
        assert_same([dx, dy], [torch.cat([z[:n] * 2, z[n:] * -0.5]) for z, n in zip(plain, (20, 45), strict=True)])
    else:
        assert_same(torch.autograd.grad(loss, (x, y), torch.tensor(4.0)), [4 * z for z in plain])
    assert_same([g.chamfer(x.detach(), y.detach(), **options)], [expected])  # which asks for no gradient
    with torch.no_grad():
        assert not g.chamfer(x, y, **options).requires_grad


@pytest.mark.parametrize("options", [{}, {"reduction": "none", "symmetrize": "min"}, {"iterations": 3, "p_min": 0.5}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_apml(dtype, options):
    x, y = normal(60, 3, dtype=dtype), normal(50, 3, dtype=dtype, seed=1)
    options = {"pred_lengths": [20, 40], "target_lengths": [45, 5], **options}
    loss = g.apml(x, y, **options)
    expected, plain = gpu3d.apml_value_and_grad(x, y, **options)
    assert_same([loss, *torch.autograd.grad(loss.sum(), (x, y), retain_graph=True)], [expected, *plain])
    first, second = (2.0, -0.5) if loss.ndim else (4.0, 4.0)  # exact factors
    asked = torch.tensor([first, second] if loss.ndim else first)
    pulled = [torch.cat([z[:n] * first, z[n:] * second]) for z, n in zip(plain, (20, 45), strict=True)]
    assert_same(torch.autograd.grad(loss, (x, y), asked), pulled)
    assert_same([g.apml(x.detach(), y.detach(), **options)], [expected])
    too_small = g.apml(x, y, **options, max_entries=10)
    assert bool(torch.isnan(too_small).all())
    assert all(bool(torch.isnan(z).all()) for z in torch.autograd.grad(too_small.sum(), (x, y)))


@compiling
def test_apml_compiled():
    compiled = torch.compile(g.apml, fullgraph=True, backend="aot_eager")
    for n in (20, 30, 50):
        x, y = normal(3, n, 3), normal(3, n + 2, 3, seed=1)
        results = [(loss, *torch.autograd.grad(loss, (x, y))) for loss in (g.apml(x, y), compiled(x, y))]
        assert_same(results[1], [z.detach() for z in results[0]])


@pytest.mark.parametrize("d", [2, 3])
def test_chamfer_of_a_batch_and_of_one_side(d):
    x, y = normal(4, 20, d), normal(4, 30, d, seed=1).detach()
    loss = g.chamfer(x, y)
    expected, (dx, _) = gpu3d.chamfer_value_and_grad(x, y)
    assert_same([loss, *torch.autograd.grad(loss, x)], [expected, dx])


# ---- torch's own checks --------------------------------------------------------------------------------------------


def samples():
    """Arguments of every operator."""
    buckets, scopes = layout()
    shape = 16, LENGTHS
    q, k, v = in_slots(3, 2, 8, dtype=torch.float64).detach().unbind(1)
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    window = scopes.table, *shape, None
    yield OPS.bucketize, points(), *shape, "zorder_div", "spill", 0.01, False, 0, None
    yield OPS.scopes, buckets.slot_to_point, *shape, 2, 1, 3
    yield OPS.move_rows, normal(POINTS, 5), buckets.slot_to_point, buckets.point_to_slot, 0, "x"
    yield OPS.bucket_attention, *(z.clone().requires_grad_() for z in (q, k, v)), *window
    yield OPS.bucket_attention_backward, in_slots(2, 8, dtype=torch.float64).detach(), q, k, v, out, lse, *window
    for reduce in ("mean", "max"):
        features, options = in_slots(3), (*shape, 2, reduce)
        args = features, g.scatter(points(), buckets), *options
        child, _, members, argmember, *_ = OPS.bucket_pool(*args)
        child = child.detach().requires_grad_()
        yield OPS.bucket_pool, *args
        yield OPS.bucket_pool_backward, child.detach(), members, argmember, *options
    for skip in (None, features):
        yield OPS.bucket_unpool, child, members, skip, *shape, 2
    yield OPS.bucket_unpool_backward, features.detach(), members, *shape, 2
    x, y, lengths = normal(40, 3), normal(30, 3, seed=1), ((30, 10), (10, 20))
    for reduction in ("mean", "none"):
        yield OPS.chamfer, x, y, *lengths, False, reduction
        loss, found = OPS.chamfer(x.detach(), y.detach(), *lengths, True, reduction)
        yield OPS.chamfer_backward, torch.rand(loss.shape), x.detach(), y.detach(), found, *lengths, True, reduction
    yield OPS.chamfer, x.detach(), y.detach(), *lengths, True, "sum"
    yield OPS.apml, x, y, *lengths, 0.8, 1e-8, 20, "mean", "none", 5000, True
    yield OPS.apml, x.detach(), y.detach(), *lengths, 0.8, 1e-8, 20, "min", "sum", None, False
    _, dx, dy = OPS.apml(x, y, *lengths, 0.8, 1e-8, 20, "mean", "none", 5000, True)
    yield OPS.apml_backward, torch.rand(2), dx, dy, x.detach(), y.detach(), *lengths


@compiling
@pytest.mark.parametrize("sample", list(samples()), ids=lambda sample: sample[0].__name__)
def test_opcheck(sample):
    op, *args = sample
    torch.library.opcheck(op.default, tuple(args))


def test_every_operator_is_checked():
    defined = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gpu3d::")}
    assert defined == {op.__name__ for op, *_ in samples()}


def test_gradcheck():
    buckets, scopes = layout(16, (20, 5))
    wide = functools.partial(normal, dtype=torch.float64)
    q, k, v = (wide(buckets.num_slots, 1, 8, seed=seed) for seed in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v: g.bucket_attention(q, k, v, buckets, scopes), (q, k, v))
    features, at = wide(buckets.num_slots, 2), g.scatter(points(25), buckets)
    for reduce in ("sum", "mean", "min", "max"):
        pool = functools.partial(g.bucket_pool, points=at, buckets=buckets, ratio=4, reduce=reduce)
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool(x).features, (features,))
    pooled = g.bucket_pool(features, at, buckets, ratio=4)
    child = wide(*pooled.features.shape, seed=5)
    assert torch.autograd.gradcheck(lambda c, s: g.bucket_unpool(c, pooled, s), (child, features))
    x = wide(25, 2)
    assert torch.autograd.gradcheck(lambda x: g.scatter(x, buckets), (x,))
    assert torch.autograd.gradgradcheck(lambda x: g.gather(g.scatter(x, buckets) ** 2, buckets), (x,))


def test_chamfer_against_differences():
    """The loss is float32, so gradcheck has no room: one direction, a long step, on separate clouds."""
    x, y = normal(30, 3), normal(40, 3, seed=1)
    step = 1e-3 * normal(30, 3, seed=2).detach()
    loss = g.chamfer(x, y, squared=True)
    (dx,) = torch.autograd.grad(loss, x)
    difference = (g.chamfer(x + step, y, squared=True) - g.chamfer(x - step, y, squared=True)) / 2
    slope, difference = float((dx * step).sum()), float(difference.detach())
    assert abs(slope - difference) < 0.02 * abs(difference)


# ---- torch.compile -------------------------------------------------------------------------------------------------


def stage(x, at, lengths, squared=False):
    """What a stage of a backbone does: every function, with the structure made, used and returned."""
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
        for run in (stage, compiled):
            out, loss, pooled = run(x, at, lengths)
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
    assert graphs <= (2 if torch.__version__ >= "2.7" else 3)  # the last has symbols for lengths


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


# ---- autocast, checkpointing, second derivatives -------------------------------------------------------------------


@compiling
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, compiled):
    buckets, scopes = layout()

    def run(x, at):
        q, k, v = x.unflatten(1, (3, 2, 8)).unbind(1)
        out = g.bucket_attention(q, k, v, buckets, scopes)
        pooled = g.bucket_pool(x, at, buckets)
        losses = g.chamfer(at.half(), at * 1.5), g.apml(at.half(), at * 1.5)
        return out, pooled.features, g.bucket_unpool(pooled.features, pooled, x), *losses

    x, at = normal(layout()[0].num_slots, 48), g.scatter(points(), layout()[0])
    with torch.autocast("cpu", dtype=dtype):
        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        out, features, back, near, moved = run(x, at)
    assert out.dtype == dtype and {z.dtype for z in (features, back, near, moved)} == {torch.float32}
    q, k, v = x.to(dtype).unflatten(1, (3, 2, 8)).unbind(1)
    assert_same([out], [gpu3d.bucket_attention(q, k, v, *layout())])
    assert_same([near, moved], [loss(at.half().float(), at * 1.5) for loss in (gpu3d.chamfer, gpu3d.apml)])
    dout, (dx,) = gradients(out, [x])
    saved = gpu3d.bucket_attention(q, k, v, *layout(), return_lse=True)
    exact = gpu3d.bucket_attention_backward(dout, q, k, v, *saved, *layout())
    assert_same([dx], [torch.stack([z.float() for z in exact], 1).flatten(1)])
    with torch.autocast("cpu", dtype=dtype):
        assert g.bucket_attention(*(z.double() for z in (q, k, v)), *layout()).dtype == torch.float64


@compiling
@pytest.mark.parametrize("way", ["reentrant", "plain", "compiled"])
def test_activation_checkpointing(way):
    from torch.utils.checkpoint import checkpoint

    def run(x, at):
        return stage(x, at, (150, 34))[0]

    def checkpointed(x, at):
        return checkpoint(run, x, at, use_reentrant=way == "reentrant")

    if way == "compiled":
        checkpointed = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    x, at = normal(POINTS, 48), points()
    checkpointed(x, at).square().sum().backward()
    assert_same([x.grad], torch.autograd.grad(run(x, at).square().sum(), x))


def test_second_derivatives_are_refused():
    buckets, scopes = layout()
    q, x = normal(buckets.num_slots, 2, 8), normal(40, 3)
    features = normal(buckets.num_slots, 3)
    pooled = gpu3d.bucket_pool(features, g.scatter(points(), buckets), buckets)
    child = normal(*pooled.features.shape)
    losses = (
        (q, g.bucket_attention(q, q, q, buckets, scopes)),
        (features, g.bucket_pool(features, pooled.points.new_zeros(buckets.num_slots, 3), buckets).features),
        (child, g.bucket_unpool(child, pooled)),
        (x, g.chamfer(x, x.detach() + 1)),
        (x, g.apml(x, x.detach() + 1)),
    )
    for z, result in losses:
        (dz,) = torch.autograd.grad(result.square().sum(), z, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"gpu3d has no second derivatives: torch asked for the gradient of \w+_"
        ):
            (dz.sum() + z.sum()).backward()


# ---- with and without the dispatcher -------------------------------------------------------------------------------


def test_who_looks_on_sees_the_operators():
    """A mode and a subclass get operators; without them the kernels run by themselves, to the same bits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    def attend(q):
        return g.bucket_attention(q, q, q, *layout())

    def results():
        out = attend(q)
        return out, *torch.autograd.grad(out.square().sum(), q)

    q, names = normal(layout()[0].num_slots, 2, 8), []
    with Seen():
        seen = results()
    assert {"gpu3d::bucket_attention", "gpu3d::bucket_attention_backward"} <= set(names)
    assert_same(results(), [z.detach() for z in seen])
    assert isinstance(attend(q.detach().as_subclass(Subclass)), Subclass)
    assert attend(q.detach().to("meta")).device.type == "meta"
    with torch.profiler.profile() as profile:
        attend(q.detach())
    assert not any("gpu3d::" in event.key for event in profile.key_averages())


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
    assert repr(loss) == "ChamferLoss(squared=True, reduction='sum')"
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
    tests = [test for test in doctest.DocTestFinder().find(g, globs={"torch": torch, **names}) if test.examples]
    assert tests
    for test in tests:
        test_docs.run(test)
    assert all(x.__doc__.strip() for x in names.values())


# ---- DDP -----------------------------------------------------------------------------------------------------------

WORLD = 2


def train_step(rank, store):
    """One process: its clouds, a backward under DDP; the first says what the gradients are."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    block = torch.nn.parallel.DistributedDataParallel(g.BucketAttention(16, 2))
    loss_of(block, rank).backward()
    if rank == 0:
        torch.save([p.grad for p in block.module.parameters()], store + ".gradients")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch leaves threads of gloo behind that may abort an interpreter as it ends


def loss_of(block, rank):
    at, x = points(64 + 32 * rank, seed=rank), normal(64 + 32 * rank, 16, seed=rank).detach()
    buckets = g.bucketize(at, 16)
    out = block(g.scatter(x, buckets), buckets, g.scopes(buckets, 2))
    return g.gather(out, buckets).square().mean()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp(tmp_path):
    script = "import sys, test_interop_torch as t; t.train_step(int(sys.argv[1]), sys.argv[2])"
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env) for rank in range(WORLD)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
    torch.manual_seed(0)
    block = g.BucketAttention(16, 2)
    (sum(loss_of(block, rank) for rank in range(WORLD)) / WORLD).backward()
    for got, p in zip(torch.load(tmp_path / "store.gradients"), block.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-7)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input():
    buckets, scopes = layout()
    q, x = normal(buckets.num_slots, 2, 8), normal(20, 3)
    plain = gpu3d.bucketize(clouds.uniform(POINTS), 16, lengths=LENGTHS)
    with pytest.raises(TypeError, match=r"q must be a torch tensor, got ndarray: convert it, or call the gpu3d func"):
        g.bucket_attention(q.detach().numpy(), q, q, buckets, scopes)
    with pytest.raises(TypeError, match="scopes must be a torch tensor, got ndarray"):
        g.bucket_attention(q, q, q, plain, gpu3d.scopes(plain))
    with pytest.raises(TypeError, match="buckets must be a torch tensor, got ndarray"):
        g.scatter(normal(POINTS, 3), plain)
    with pytest.raises(TypeError, match="x must be a torch tensor, got NeighborIndex"):
        g.chamfer(gpu3d.neighbor_index(x), x)
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
        pooled = g.bucket_pool(q.flatten(1), g.scatter(points(), buckets), buckets)
        g.bucket_unpool(pooled.features, pooled, q.flatten(1).half())
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
        ({"hash": "h"}, "hash must be one of"),
        ({"voxel_size": "x"}, "voxel_size must be a number"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            g.bucketize(x, **bad)
    with pytest.raises(ValueError, match="ratio must be 2, 4 or 8, got 0"):
        g.bucket_pool(q.flatten(1), q.flatten(1)[:, :3], buckets, ratio=0)
    with pytest.raises(TypeError, match="scale must be a finite number"):
        g.bucket_attention(q, q, q, buckets, scopes, scale="x")


def test_coordinates_take_no_gradient():
    at = points().requires_grad_()
    buckets = g.bucketize(at * 2, 16, lengths=LENGTHS)
    pooled = g.bucket_pool(in_slots(3), g.scatter(at, buckets), buckets)
    assert not pooled.points.requires_grad and pooled.features.requires_grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a torch without CUDA")
def test_torch_without_cuda():
    with pytest.raises(RuntimeError, match="use_torch_allocator needs a torch with CUDA and a GPU"):
        g.use_torch_allocator()


def test_results_in_torchs_memory():
    """`_arrays.leave` makes a tensor of the allocation that an array lies in, whatever part of it."""
    memory = torch.arange(96, dtype=torch.uint8)

    def array(offset, dtype, shape, strides):
        mem = SimpleNamespace(_owner=memory.untyped_storage())
        data = SimpleNamespace(mem=mem, ptr=memory.data_ptr() + offset)
        dtype = np.dtype(dtype)
        return SimpleNamespace(data=data, dtype=dtype, itemsize=dtype.itemsize, shape=shape, strides=strides)

    for dtype, torch_dtype in (
        (np.float32, torch.float32),
        (_arrays.BFLOAT16, torch.bfloat16),
        (np.int32, torch.int32),
    ):
        size = np.dtype(dtype).itemsize
        whole = memory[16:64].view(torch_dtype).reshape(-1, 3)
        got = _arrays.leave(array(16, dtype, (4, 2), (3 * size, size)), _arrays.Origin("torch", 0))
        assert torch.equal(got.view(torch.uint8), whole[:4, :2].view(torch.uint8)) and got.dtype == torch_dtype
        assert got.data_ptr() == memory.data_ptr() + 16 and got.untyped_storage().data_ptr() == memory.data_ptr()


def an_operator(name="call"):
    return g._Operator(name, lambda *args: "run", single=True, fixed=None, in_torch=True)


def test_a_call_on_another_gpu_than_the_current_one_is_not_played(monkeypatch):
    """Programs are launched on the current device. The GPUs are stood for by numbers."""
    rehearsed = []
    monkeypatch.setattr(g, "_kinds", {})
    monkeypatch.setattr(g, "_rehearsed", lambda op, tensors, numbers, device: rehearsed.append(tensors))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = torch.zeros(3)  # of device -1
    for current, expected in ((0, 0), (-1, 1)):
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda current=current: current, raising=False)
        for _ in range(5):
            assert g._play(an_operator(), (x,), ()) == "run"
        assert len(rehearsed) == expected  # once


def test_kinds_of_calls(monkeypatch):
    """All that a launch depends on tells them apart; what lies elsewhere, or holds other values, is of one kind."""
    monkeypatch.setattr(g, "_kinds", {})
    x, y = torch.zeros(4, 6), torch.zeros(4, 6)
    calls = {
        "it": lambda: (an_operator(), (x, y), (1,), None),
        "another operator": lambda: (an_operator("other"), (x, y), (1,), None),
        "numbers": lambda: (an_operator(), (x, y), (2,), None),
        "addresses": lambda: (an_operator(), (x, y), (1,), (4, 0)),
        "a dtype": lambda: (an_operator(), (x, y.int()), (1,), None),
        "a shape": lambda: (an_operator(), (x[1:], y), (1,), None),
        "strides": lambda: (an_operator(), (x, torch.zeros(6, 4).t()), (1,), None),
        "a negative": lambda: (an_operator(), (x, torch._neg_view(y)), (1,), None),
        "a parameter": lambda: (an_operator(), (torch.nn.Parameter(x), y), (1,), None),
    }
    kinds = {}
    for name, call in calls.items():
        first, _, kinds[name] = [g._kind(*call()) for _ in range(3)]
        assert first is None and kinds[name] is not None, name
    found = list(map(id, kinds.values()))
    assert len(set(found)) == len(calls)
    assert g._kind(an_operator(), (torch.ones(4, 6), torch.rand(4, 6)), (1,), None) is kinds["it"]
    for _ in range(4):
        assert g._kind(an_operator(), (x, x), (1,), None) is None  # one that comes twice is not told
    for number in range(2 * g.KINDS):
        g._kind(an_operator(), (x,), ("number", number), None)
        g._kind(an_operator(), (torch.zeros(number % 50, number),), (), None)
    assert len(g._kinds) <= g.KINDS and all(len(kinds) <= g.KINDS for kinds in g._kinds.values())


def test_import_errors(tmp_path):
    """Without torch, and with an old one, the error names the extra; gpu3d alone imports neither."""
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
