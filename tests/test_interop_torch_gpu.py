# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.torch on a GPU: bits of plain calls, torch's memory and stream, CUDA graphs, compile, many steps."""

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

from test_interop_torch import MANY, check_compiled, compiling, every, loss_of, stage  # noqa: E402
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
)

from gpu3d.interop import torch as g  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def on_gpu(x):
    return x.detach().cuda().requires_grad_(x.requires_grad)


# ---- every op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every
def test_bits(cp, name, dtype):
    """Results and gradients equal those of plain calls on CuPy arrays."""
    case = CASES[name]
    for bucket_size, lengths in ((16, LENGTHS), (512, (3000, 1, 700)), (16, MANY)):
        at = place(bucket_size, lengths, "cuda")
        inputs = inputs_of(case, at, dtype)
        for _ in range(3):
            assert_same(run(case, at, inputs), expected(case, at, inputs))


@every
def test_strided_inputs(cp, name):
    """Inputs are every other row and column of larger tensors, at addresses that are not multiples of 16."""
    case, at = CASES[name], place(device="cuda")
    inputs = inputs_of(case, at)
    wide = []
    for x in inputs:
        larger = torch.zeros(*[2 * n + 1 for n in x.shape], device="cuda")
        part = larger[tuple([slice(1, None, 2)] * x.ndim)]
        part.copy_(x.detach())
        wide.append(part.requires_grad_())
    assert_same(run(case, at, wide), [x.detach() for x in run(case, at, inputs)])


@every
def test_torch_func(cp, name):
    loss, inputs = loss_of(name, "cuda")
    which = tuple(range(len(inputs)))
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    inputs = [x.detach() for x in inputs]
    assert_same(torch.func.grad(loss, which)(*inputs), wanted)
    batch = [torch.stack([x, x]) for x in inputs]
    for x, y in zip(torch.vmap(torch.func.grad(loss, which))(*batch), wanted, strict=True):
        assert_same([x], [torch.stack([y, y])])


@compiling
@pytest.mark.parametrize("sample", range(len(list(samples()))))
def test_opcheck(cp, sample):
    op, *args = list(samples("cuda"))[sample]
    torch.library.opcheck(op.default, tuple(args))


@every
def test_the_current_stream(cp, name):
    """A side stream still writes the inputs. Results are right only if the op and its gradient run after it."""
    case, at = CASES[name], place(device="cuda")
    inputs = inputs_of(case, at)
    wanted = run(case, at, inputs)
    late = [torch.full_like(x, torch.nan) for x in inputs]
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = slow @ slow
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y.detach())
        got = run(case, at, [x.requires_grad_() for x in late])
    stream.synchronize()
    assert_same(got, [x.detach() for x in wanted])


@every
def test_cuda_graph(cp, name):
    """A call and its gradient in a graph. A replay with other inputs gives the results of an eager call."""
    case, at = CASES[name], place(device="cuda")
    inputs = inputs_of(case, at)
    result, *_ = run(case, at, inputs)  # compiles
    dout = gradient_of(result, torch.float32)  # made on the host, so before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        leaves = [x.detach().requires_grad_() for x in inputs]  # the tensors above belong to the default stream
        captured = run(case, at, leaves, dout)
    for _ in range(2):
        with torch.no_grad():
            for x in inputs:
                x.copy_(x.roll(1, -1))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, [x.detach() for x in run(case, at, inputs)])


@every
def test_memory_is_torchs(cp, name):
    """Results and workspaces come from torch's allocator, so CuPy's pool does not grow."""
    case, at = CASES[name], place(device="cuda")
    inputs = inputs_of(case, at)
    run(case, at, inputs)  # compiles
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    held = pool.total_bytes()
    results = run(case, at, inputs)
    assert pool.total_bytes() == held
    assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)


@every
def test_another_gpu_than_the_current_one(cp, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case, here = CASES[name], torch.cuda.current_device()
    there = (here + 1) % torch.cuda.device_count()
    places = [place(device=f"cuda:{device}") for device in (here, there)]
    results = [run(case, at, inputs_of(case, at)) for at in places]
    assert all(x.device.index == there for x in results[1]) and torch.cuda.current_device() == here
    assert_same([x.cpu() for x in results[1]], [x.detach().cpu() for x in results[0]])


# ---- capacities ------------------------------------------------------------------------------------------------------


def test_defaults_of_capacities_in_a_graph(cp):
    """In a graph the host cannot count entries, so max_entries has a default; outside of graphs they are counted."""
    x, y = (on_gpu(normal(n, 3, seed=n)).detach() for n in (600, 500))
    loss, found = g.apml(x, y), g.radius_search(x, y, 0.3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, search = g.apml(x, y), g.radius_search(x, y, 0.3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, loss) and torch.equal(search.offsets, found.offsets)
    count = len(found.indices)
    assert torch.equal(search.indices[:count], found.indices) and bool((search.indices[count:] == -1).all())


@pytest.mark.parametrize("balance", ["spill", "probe"])
def test_bucketize(cp, balance):
    for n, dtype in ((1000, torch.float32), (300_000, torch.float64), (700_000, torch.bfloat16)):
        at = torch.from_numpy(clouds.uniform(n)).to(dtype).cuda()
        got, wanted = (gpu3d.bucketize(x, 512, balance=balance) for x in (at, native(at)))
        for name in ("slot_to_point", "point_to_slot", "moved"):
            assert bool((native(getattr(got, name)) == getattr(wanted, name)).all()), name


def test_autocast(cp):
    buckets, scopes = layout(device="cuda")
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


# ---- a training step: graphs, compile, memory ------------------------------------------------------------------------


def test_a_training_step_in_a_graph(cp):
    """A whole training step in a graph. A replay with other inputs gives the results of an eager step."""
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
        return loss.detach(), *gradients  # an autograd graph would keep leaves of another stream

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
        for a, b in zip(captured, step(), strict=True):  # cuBLAS may use another algorithm in a graph
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert bool((a != 0).any())


def test_a_large_batch_in_a_graph(cp):
    """More clouds than fit into a kernel's arguments."""
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
    """With mode="reduce-overhead" torch captures the compiled function and requires that results are its own memory."""
    compiled = torch.compile(
        lambda x, at: stage(x, at, LENGTHS[:1] + (34,))[:2], fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(4):
        x, at = on_gpu(normal(POINTS, 48, seed=seed)), points(seed=seed).cuda()
        results = []
        for way in (lambda x, at: stage(x, at, LENGTHS[:1] + (34,))[:2], compiled):
            out, loss = way(x, at)
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
        buckets = gpu3d.bucketize(cp.asarray(clouds.uniform(1000)), 64)  # a plain call with a CuPy array
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
    buckets, scopes = layout(device="cuda")
    q = normal(buckets.num_slots, 2, 16)
    with pytest.raises(ValueError, match="arguments must be on one device"):
        g.bucket_attention(q, on_gpu(q), on_gpu(q), buckets, scopes)
    with pytest.raises(ValueError, match="arguments must be on one device"):
        g.scatter(normal(POINTS, 3), buckets)
    with pytest.raises(TypeError, match="q must be float16, bfloat16 or float32 on a GPU, got float64"):
        g.bucket_attention(*(on_gpu(q.double()) for _ in range(3)), buckets, scopes)
