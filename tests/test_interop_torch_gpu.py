# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.torch on a GPU: the plain calls' bits, torch's memory and stream, CUDA graphs, compile, many steps."""

from __future__ import annotations

import gc

import clouds
import pytest

import gpu3d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # torch's own, of its compiler
]
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("this torch has no CUDA, or finds no GPU", allow_module_level=True)

from test_interop_torch import (  # noqa: E402
    LENGTHS,
    POINTS,
    assert_same,
    check_compiled,
    compiling,
    normal,
    points,
    samples,
    stage,
)

from gpu3d.interop import _native  # noqa: E402
from gpu3d.interop import torch as g  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def on_gpu(x):
    return x.detach().cuda().requires_grad_(x.requires_grad)


def layout(bucket_size=16, lengths=LENGTHS):
    buckets = g.bucketize(points(sum(lengths)).cuda(), bucket_size, lengths=lengths)
    return buckets, g.scopes(buckets, 2, shift=1)


def every_gradient(dtype, lengths, bucket_size, ratio=2, reduce="max", width=32):
    """The results of all functions and their gradients; and the same from plain calls, all with torch's tensors."""
    buckets, scopes = layout(bucket_size, lengths)
    at = points(sum(lengths)).cuda()
    packed = on_gpu(normal(buckets.num_slots, 3, 2, width, dtype=dtype))
    q, k, v = packed.unbind(1)
    out, lse = g.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    features = out.detach().flatten(1).requires_grad_()
    pooled = g.bucket_pool(features, g.scatter(at, buckets), buckets, ratio=ratio, reduce=reduce)
    child = pooled.features.detach().requires_grad_()
    back = g.bucket_unpool(child, pooled, features)
    rows = on_gpu(normal(sum(lengths), 5, dtype=dtype))
    moved = g.scatter(rows, buckets)
    results = [out, pooled.features, back, moved]
    douts = [on_gpu(normal(*x.shape, dtype=dtype, seed=s)).detach() for s, x in enumerate(results)]
    inputs = [(q, k, v), (features,), (child, features), (rows,)]
    got = [*results, lse, pooled.points, pooled.members, pooled.buckets.slot_to_point]
    for x, of, dout in zip(results, inputs, douts, strict=True):
        got += torch.autograd.grad(x, of, dout)

    plain = gpu3d.bucketize(at, bucket_size, lengths=lengths)
    window = plain, gpu3d.scopes(plain, 2, shift=1)
    saved = gpu3d.bucket_attention(q, k, v, *window, return_lse=True)
    children = gpu3d.bucket_pool(features, plain.scatter(at), plain, ratio=ratio, reduce=reduce)
    expected = [saved[0], children.features, gpu3d.bucket_unpool(child, children, features), plain.scatter(rows)]
    expected += [saved[1], children.points, children.members, children.buckets.slot_to_point]
    expected += gpu3d.bucket_attention_backward(douts[0], q, k, v, *saved, *window)
    expected += [gpu3d.bucket_pool_backward(douts[1], children)]
    expected += gpu3d.bucket_unpool_backward(douts[2], children)
    expected += [plain.gather(douts[3])]
    return got, expected


# ---- the plain calls' bits, in torch's memory ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients(cp, dtype):
    for lengths, bucket_size in ((LENGTHS, 16), ([3000, 1, 700], 512), ([40] * 80, 48)):
        for ratio, reduce in ((2, "max"), (4, "mean")):
            assert_same(*every_gradient(dtype, lengths, bucket_size, ratio, reduce))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("d", [2, 3])
def test_chamfer(cp, d, reduction):
    x, y = (on_gpu(normal(n, d, seed=n)) for n in (600, 500))
    options = {"x_lengths": [200, 400], "y_lengths": [450, 50], "reduction": reduction}
    loss = g.chamfer(x, y, **options)
    expected, gradients = gpu3d.chamfer_value_and_grad(x, y, **options)
    assert_same([loss, *torch.autograd.grad(loss.sum(), (x, y), retain_graph=True)], [expected, *gradients])
    asked = torch.tensor([4.0, 9, -0.5, 9], device="cuda")[::2] if reduction == "none" else torch.tensor(4.0).cuda()
    factors = [4.0, -0.5 if reduction == "none" else 4.0]
    pulled = [torch.cat([z[:n] * factors[0], z[n:] * factors[1]]) for z, n in zip(gradients, (200, 450), strict=True)]
    assert_same(torch.autograd.grad(loss, (x, y), asked), pulled)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_apml(cp, reduction):
    x, y = (on_gpu(normal(n, 3, seed=n)) for n in (600, 500))
    options = {"pred_lengths": [200, 400], "target_lengths": [450, 50], "reduction": reduction}
    expected, gradients = gpu3d.apml_value_and_grad(x, y, **options)
    for room in ({}, {"max_entries": 20_000}):
        loss = g.apml(x, y, **options, **room)
        assert_same([loss, *torch.autograd.grad(loss.sum(), (x, y))], [expected, *gradients])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        leaves = [z.detach().requires_grad_() for z in (x, y)]  # those above belong to the default stream
        loss = g.apml(*leaves, **options)  # with room for 16 entries a point
        captured = torch.autograd.grad(loss.sum(), leaves)
    graph.replay()
    torch.cuda.synchronize()
    assert_same([loss, *captured], [expected, *gradients])


def test_another_gpu_than_the_current_one(cp):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, y = (normal(n, 3).to("cuda:1") for n in (600, 500))
    for _ in range(6):  # the third would be played
        assert_same([g.chamfer(x, y)], [gpu3d.chamfer(x, y)])
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("by", ["play.c", "Python"])
def test_calls_that_are_played(cp, monkeypatch, by):
    """From the third call of a kind on, with other values each time; on a side stream and in a graph too."""
    if by == "Python":
        monkeypatch.setattr(_native, "program", lambda steps: None)
    elif _native.library() is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(g, "_kinds", {})
    sides = {"x_lengths": [200, 400], "y_lengths": [450, 50]}, {"pred_lengths": [600], "target_lengths": [500]}

    def losses(seed):
        x, y = (on_gpu(normal(n, 3, seed=n + seed)) for n in (600, 500))
        pulled = g.chamfer(x, y, **sides[0]), g.apml(x, y, max_entries=20_000, **sides[1])
        got = [z for loss in pulled for z in (loss, *torch.autograd.grad(loss, (x, y)))]
        with torch.no_grad():
            got += [g.chamfer(x, y, **sides[0]), g.apml(x, y, max_entries=20_000, **sides[1])]
        plain = gpu3d.chamfer_value_and_grad(x, y, **sides[0]), gpu3d.apml_value_and_grad(x, y, **sides[1])
        return got, [z for loss, gradients in plain for z in (loss, *gradients)] + [loss for loss, _ in plain]

    side = torch.cuda.Stream()
    for seed in range(6):
        at = points(POINTS, seed=seed).cuda()
        made, expected = g.bucketize(at, 16, lengths=LENGTHS), gpu3d.bucketize(at, 16, lengths=LENGTHS)
        assert torch.equal(made.slot_to_point, expected.slot_to_point) and torch.equal(made.moved, expected.moved)
        assert_same(*every_gradient(torch.float16, LENGTHS, 16))
        slow = torch.randn(2048, 2048, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(20):
                slow = slow @ slow
            assert_same(*losses(seed))
        side.synchronize()
    x, y = (normal(n, 3).cuda() for n in (600, 500))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        loss = g.chamfer(x, y, **sides[0])
    for seed in range(2):
        x.copy_(normal(600, 3, seed=seed))
        graph.replay()
        assert_same([loss], [gpu3d.chamfer(x, y, **sides[0])])
    played = {"bucketize", "move_rows", "chamfer", "chamfer_backward", "apml"} | {
        f"bucket_{name}{back}" for name in ("attention", "pool", "unpool") for back in ("", "_backward")
    }
    calls = [(key[0], kind.played) for key, kinds in g._kinds.items() for kind in kinds if kind.played is not None]
    assert played == {name for name, _ in calls}
    assert all((call.program.words is None) == (by == "Python") for _, call in calls)


def test_zeros_of_either_sign(cp):
    """0.0 and -0.0 are equal, and what is played for one must not be played for the other."""
    buckets, scopes = layout()
    q, k, v, dout = (on_gpu(normal(buckets.num_slots, 2, 16, seed=seed)).requires_grad_() for seed in range(4))
    for scale in (0.0, -0.0) * 4:
        out = g.bucket_attention(q, k, v, buckets, scopes, scale=scale)
        saved = gpu3d.bucket_attention(q, k, v, buckets, scopes, scale=scale, return_lse=True)
        expected = gpu3d.bucket_attention_backward(dout, q, k, v, *saved, buckets, scopes, scale=scale)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("balance", ["spill", "probe"])
def test_bucketize(cp, balance):
    for n, dtype in ((1000, torch.float32), (300_000, torch.float64), (700_000, torch.bfloat16)):
        at = torch.from_numpy(clouds.uniform(n)).to(dtype).cuda()
        got, expected = (m.bucketize(at, 512, balance=balance) for m in (g, gpu3d))
        assert torch.equal(got.slot_to_point, expected.slot_to_point)
        assert torch.equal(got.point_to_slot, expected.point_to_slot) and torch.equal(got.moved, expected.moved)


def test_nothing_of_cupys_pool(cp):
    """Results and workspaces are torch's: each result owns its memory, and CuPy's pool does not grow."""
    every_gradient(torch.float16, LENGTHS, 16)  # compiles
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    held = pool.total_bytes()
    buckets, scopes = layout()
    q = on_gpu(normal(buckets.num_slots, 2, 16, dtype=torch.float16))
    out, lse = g.bucket_attention(q, q, q, buckets, scopes, return_lse=True)
    gradients = torch.ops.gpu3d.bucket_attention_backward(
        out, q, q, q, out, lse, scopes.table, 16, buckets.lengths, None
    )
    pooled = torch.ops.gpu3d.bucket_pool(out.flatten(1), lse.new_zeros(len(q), 3), 16, buckets.lengths, 2, "max")
    loss = g.chamfer(*(on_gpu(normal(50, 3, seed=seed)) for seed in (0, 1)))
    loss.backward()
    assert pool.total_bytes() == held
    results = [buckets.slot_to_point, buckets.point_to_slot, buckets.moved, scopes.table, out, lse, *gradients, *pooled]
    assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)
    before = torch.cuda.memory_allocated()
    del results, gradients, pooled
    assert torch.cuda.memory_allocated() < before


@compiling
@pytest.mark.parametrize("sample", range(len(list(samples()))))
def test_opcheck(cp, sample):
    """float64 is for the CPU: float32 here."""

    def moved(x):
        if not isinstance(x, torch.Tensor):
            return x
        wide = x.dtype == torch.float64
        return on_gpu(x.detach().float().requires_grad_(x.requires_grad) if wide else x)

    op, *args = list(samples())[sample]
    torch.library.opcheck(op.default, tuple(moved(x) for x in args))


def test_autocast(cp):
    buckets, scopes = layout()
    x = on_gpu(normal(buckets.num_slots, 32))
    torch.manual_seed(0)
    block = g.BucketAttention(32, 2).cuda()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            out = block(x, buckets, scopes)
            loss = g.chamfer(x[:, :3].to(dtype), x[:, 3:6])
        assert out.dtype == dtype and loss.dtype == torch.float32
        (out.float().square().mean() + loss).backward()
        assert all(bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any()) for p in (x, *block.parameters()))


# ---- streams, graphs, compile ----------------------------------------------------------------------------------------


def test_the_current_stream(cp):
    """Inputs that a side stream is still writing: right only if the op runs behind it."""
    expected = every_gradient(torch.float16, LENGTHS, 16)[1]
    x = on_gpu(normal(POINTS, 64))
    buckets, _ = layout()
    exact = buckets.scatter(x)
    stream = torch.cuda.Stream()
    late = torch.full_like(x, torch.nan).detach()
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = slow @ slow
        late.copy_(x.detach())
        moved = g.scatter(late, buckets)
        got = every_gradient(torch.float16, LENGTHS, 16)[0]
    stream.synchronize()
    assert torch.equal(moved, exact.detach())
    assert_same(got, expected)


def test_cuda_graph(cp):
    """A whole training step in a graph; replayed with other inputs it gives what an eager step gives."""
    lengths = (700, 300)
    torch.manual_seed(0)
    block = g.BucketAttention(32, 2).cuda()
    at, x = points(1000).cuda(), normal(1000, 32).cuda().detach().requires_grad_()

    def step():
        buckets = g.bucketize(at, 64, lengths=lengths)
        rows = block(g.scatter(x, buckets), buckets, g.scopes(buckets, 2, shift=1))
        pooled = g.bucket_pool(rows, g.scatter(at, buckets), buckets, reduce="max")
        out = g.gather(g.bucket_unpool(pooled.features, pooled, rows), buckets)
        loss = (
            out.square().mean()
            + g.chamfer(out[:, :3], at, x_lengths=lengths, y_lengths=lengths, reduction="none").sum()
        )
        gradients = torch.autograd.grad(loss, (x, *block.parameters()))
        return loss.detach(), *gradients  # else what is captured keeps its graph, whose leaves are of another stream

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            at.copy_(points(1000, seed=seed))
            x.copy_(normal(1000, 32, seed=seed).detach())
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step(), strict=True):  # cuBLAS may take another algorithm in a graph
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert bool((a != 0).any())


def test_a_large_batch_in_a_graph(cp):
    """More clouds than travel in a kernel's arguments."""
    lengths = (20,) * 100
    at = points(2000).cuda()
    expected = g.bucketize(at, 16, lengths=lengths).slot_to_point.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buckets = g.bucketize(at, 16, lengths=lengths)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(buckets.slot_to_point, expected)


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(cp, backend, monkeypatch):
    import test_interop_torch as cpu

    monkeypatch.setattr(cpu, "normal", lambda *shape, **options: on_gpu(normal(*shape, **options)))
    monkeypatch.setattr(cpu, "points", lambda *n, **options: points(*n, **options).cuda())

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    check_compiled(backend, same)


@compiling
def test_compile_with_cuda_graphs(cp):
    """mode="reduce-overhead": torch captures the compiled function, and asks that results be its own memory."""
    compiled = torch.compile(
        lambda x, at: stage(x, at, LENGTHS[:1] + (34,))[:2], fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(4):
        x, at = on_gpu(normal(POINTS, 48, seed=seed)), points(seed=seed).cuda()
        results = []
        for run in (lambda x, at: stage(x, at, LENGTHS[:1] + (34,))[:2], compiled):
            out, loss = run(x, at)
            (dx,) = torch.autograd.grad(out.square().sum() + loss, x)
            results.append([z.detach().clone() for z in (out, loss, dx)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_thousand_steps(cp):
    torch.manual_seed(0)
    block = g.BucketAttention(32, 2).cuda()
    optimizer = torch.optim.SGD(block.parameters(), 1e-3)
    at, x = points(1000).cuda(), on_gpu(normal(1000, 32)).detach()

    def step():
        buckets = g.bucketize(at, 64)
        out = block(g.scatter(x, buckets), buckets, g.scopes(buckets, 2))
        pooled = g.bucket_pool(out, g.scatter(at, buckets), buckets)
        loss = pooled.features.square().mean() + g.chamfer(g.gather(out, buckets)[:, :3], at)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def held():
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved(), torch.cuda.memory_allocated(), cp.get_default_memory_pool().total_bytes()

    for _ in range(10):
        step()
    gc.collect()
    before = held()
    for _ in range(990):
        step()
    gc.collect()
    assert all(after <= was for after, was in zip(held(), before, strict=True))


def test_use_torch_allocator(cp):
    default = cp.get_default_memory_pool()
    before, reserved = default.total_bytes(), torch.cuda.memory_allocated()
    g.use_torch_allocator()
    try:
        a = cp.arange(1 << 20, dtype=cp.float32)
        assert torch.cuda.memory_allocated() >= reserved + a.nbytes and default.total_bytes() == before
        with cp.cuda.Stream(non_blocking=True):
            b = (cp.ones(1 << 20, cp.float32) * 2).sum()
        cp.cuda.Device().synchronize()
        assert float(b) == 2 << 20 and float(a[-1]) == (1 << 20) - 1
        assert cp.empty(0).size == 0
        buckets = gpu3d.bucketize(cp.asarray(clouds.uniform(1000)), 64)  # plain calls with CuPy arrays, too
        assert isinstance(buckets.slot_to_point, cp.ndarray) and int((buckets.slot_to_point >= 0).sum()) == 1000
        cp.zeros(8, cp.float32) + 3  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), cp.cuda.Stream.from_external(torch.cuda.current_stream()):
            c = cp.zeros(1 << 16, cp.float32) + 3
        graph.replay()
        torch.cuda.synchronize()
        assert float(c.sum()) == 3 << 16
        del a, b, c, buckets
    finally:
        cp.cuda.set_allocator(default.malloc)
    assert torch.cuda.memory_allocated() <= reserved + (1 << 20)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_mixed_devices(cp):
    buckets, scopes = layout()
    q = normal(buckets.num_slots, 2, 16)
    with pytest.raises(ValueError, match="arguments must be on one device"):
        g.bucket_attention(q, on_gpu(q), on_gpu(q), buckets, scopes)
    with pytest.raises(ValueError, match="arguments must be on one device"):
        g.scatter(normal(POINTS, 3), buckets)
    with pytest.raises(TypeError, match="q must be float16, bfloat16 or float32 on a GPU, got float64"):
        g.bucket_attention(*(on_gpu(q.double()) for _ in range(3)), buckets, scopes)
