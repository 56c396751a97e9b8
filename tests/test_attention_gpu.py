# SPDX-License-Identifier: Apache-2.0
"""The attention kernels against float64, for every shape and dtype: at most twice the error of a plain program."""

from __future__ import annotations

import math

import clouds
import numpy as np
import pytest
from test_attention import (
    BAD,
    DTYPES,
    RESULTS,
    assert_accurate,
    assert_padding,
    assert_refused,
    attend,
    inputs,
    layout,
    nan_reaches,
    valid,
)

import gpu3d
from gpu3d.cuda import attention as cuda
from gpu3d.cuda import compiler

pytestmark = pytest.mark.gpu

DIMS = (8, 16, 24, 32, 40, 64, 80, 128)
EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 3000)  # around the tiles of rows and of keys
RAGGED = ([0, 700, 1, 16, 0, 333, 0], list(range(70)), [1024] * 15)


@pytest.fixture
def cp():
    """CuPy, with all free memory of its pool poisoned, so that an output that is not written is NaN."""
    import cupy

    pool = [cupy.full(size, 0xFF, np.uint8) for size in (1 << 10, 1 << 16, 1 << 22, 1 << 24, 1 << 26)]
    del pool
    return cupy


@pytest.fixture(params=["hopper", "mma"])
def either_path(cp, request, monkeypatch):
    """Run with the tilings for Hopper and with those for all other GPUs."""
    if request.param == "mma":
        monkeypatch.setattr(cuda, "HOPPER", cuda.MMA)
        monkeypatch.setattr(cuda, "HOPPER_SINGLE", cuda.SINGLE)
        monkeypatch.setattr(cuda, "ROLES", {})
        monkeypatch.setattr(cuda, "ONE_PASS", {})
    built = cuda._kernel, cuda._attention.kept, cuda._forward_plan, cuda._backward_plan
    for cached in built:
        cached.cache_clear()
    yield
    for cached in built:
        cached.cache_clear()


def on_device(cp, lengths, bucket_size, size, shift=0, stride=1):
    buckets = gpu3d.bucketize(cp.asarray(clouds.uniform(sum(lengths))), bucket_size, lengths=lengths)
    return buckets, gpu3d.scopes(buckets, size, shift=shift, stride=stride)


def to_host(results):
    return {name: x.get() for name, x in results.items()}


def check_on(cp, host, buckets, scopes, heads, dim, dtype, std=1.0, scale=None, seed=0):
    """Check forward and backward against float64, with NaN in padding."""
    arrays = inputs(host, heads, dim, dtype, std, seed)
    got = to_host(attend(*map(cp.asarray, arrays), buckets, scopes, scale=scale))
    assert_padding(got, host)
    assert_accurate(got, *arrays, host, scopes.table.get(), 1 / math.sqrt(dim) if scale is None else scale)


def check(cp, lengths, bucket_size, size, *, shift=0, stride=1, heads=1, dim=32, dtype="bfloat16", **options):
    buckets, scopes = on_device(cp, lengths, bucket_size, size, shift, stride)
    check_on(cp, layout(lengths, bucket_size), buckets, scopes, heads, dim, dtype, **options)


def assert_same_bits(got, expected, note=""):
    for name in RESULTS:
        a, b = (x if isinstance(x, np.ndarray) else x.get() for x in (got[name], expected[name]))
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes(), f"{name} {note}: {(a != b).sum()} of {a.size} differ"


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_path")
def test_small_attention(cp):
    """For compute-sanitizer: a scope of several tiles, short scopes, padding inside a scope, a single point."""
    lengths = [0, 200, 1, 70]
    buckets, scopes = on_device(cp, lengths, 16, 9, shift=2)
    for dim, dtype in ((24, "float16"), (64, "bfloat16"), (128, "float16"), (32, "float32"), (128, "float32")):
        check_on(cp, layout(lengths, 16), buckets, scopes, 2, dim, dtype)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_dtype_and_head_dimension(cp, dim, dtype):
    for std in (1.0, 8.0):
        check(cp, [1100, 300], 64, 8, shift=3, heads=2, dim=dim, dtype=dtype, std=std)


@pytest.mark.parametrize(("heads", "dtype"), [(1, "bfloat16"), (3, "float16"), (4, "float32")])
@pytest.mark.parametrize("bucket_size", [16, 48, 64, 512, 1024])
def test_every_bucket_size(cp, bucket_size, heads, dtype):
    check(cp, [1300, 200], bucket_size, max(1, 512 // bucket_size), shift=1, heads=heads, dim=16, dtype=dtype)
    check(cp, [1300], bucket_size, 2, stride=2, heads=heads, dim=64, dtype=dtype, std=8.0)
    check(cp, [2100, 700], bucket_size, 3, shift=1, heads=heads, dim=128, dtype=dtype)  # whole tiles of padding


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("n", EDGES)
def test_sizes_across_the_edges_of_tiles(cp, n, dim, dtype):
    for bucket_size, size in ((16, 1), (16, 5), (64, 3), (64, -(-n // 64)), (1024, 1)):
        check(cp, [n], bucket_size, size, heads=1 + (n < 200), dim=dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "stride"), [(0, 1), (3, 1), (-1, 2), (0, 3)])
@pytest.mark.parametrize("lengths", RAGGED, ids=lambda lengths: f"{len(lengths)} clouds")
def test_ragged_batches(cp, lengths, shift, stride, dtype):
    check(cp, lengths, 16, 12, shift=shift, stride=stride, dtype=dtype)
    check(cp, lengths, 64, 3, shift=shift, stride=stride, dtype=dtype, dim=64, std=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5, 16, 46, 47, 100])
def test_scopes_of_any_length(cp, size, dtype):
    """47 buckets, the last with one point, in scopes of one bucket, a short last scope, the whole cloud and more."""
    check(cp, [46 * 16 + 1], 16, size, heads=2, dtype=dtype)
    check(cp, [46 * 16 + 1], 16, size, stride=3, heads=2, dtype=dtype)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_anywhere_in_a_scope(cp, dtype):
    """The short bucket is first, in the middle and last in its scope, before and after the edge of a tile."""
    for bucket_size, points in ((16, 1), (16, 15), (48, 17), (80, 3)):
        for shift in range(7):
            lengths = [6 * bucket_size + points]
            check(cp, lengths, bucket_size, 7, shift=shift, dim=16, dtype=dtype, seed=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.01, 1e-3])
def test_scale(cp, scale, dtype):
    check(cp, [300, 130], 16, 10, heads=2, dtype=dtype, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_zero_is_the_mean(cp, dtype):
    host = layout([300], 16)
    q, k, v, dout = inputs(host, 2, 16, dtype)
    got = to_host(attend(*map(cp.asarray, (q, k, v, dout)), *on_device(cp, [300], 16, 19), scale=0.0))
    mean = v[:300].astype(np.float64).mean(0)
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-21}[dtype]
    np.testing.assert_allclose(got["out"][:300].astype(float), np.broadcast_to(mean, (300, 2, 16)), atol=rounding)
    np.testing.assert_allclose(got["lse"][:300], math.log(300), rtol=1e-6)
    assert (got["dq"] == 0).all() and (got["dk"] == 0).all() and (got["dv"][:300] != 0).all()
    assert_padding(got, host)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scores",
    [
        lambda j: j / 32,
        lambda j: j / 8,  # the maximum rises with each key
        lambda j: 34 - j / 8,  # ... and is the first
        lambda j: 3.0 * (j // 16),
        lambda j: 10.0 * (j // 16),
        lambda j: 5.5 * (j // 64),  # rises by a factor of 2**7.9 at a time
        lambda j: 20.0 * (j // 64),  # ... of 2**29
        lambda j: 30.0 * (j == 270),  # float16 cannot hold its exponential
        lambda j: 100.0 * (j == 270),  # nor can float32
        lambda j: 100.0 * (j == 0),
        lambda j: 1000.0 * (j >= 130),
        lambda j: 1000.0 + 4.0 * (j % 3),
    ],
    ids=[
        *("gentle", "steep", "falling", "steps", "high steps", "stairs", "high stairs"),
        *("last", "last by far", "first", "cliff", "far from 0"),
    ],
)
def test_scores_in_any_order(cp, scores, dtype):
    """The running maximum rises often or seldom, by little or much, or never. Scores are exact in every dtype."""
    n = 271
    host = layout([n], 16)
    _, _, v, dout = inputs(host, 2, 16, dtype)
    q, k = np.zeros((2, *v.shape), v.dtype)
    slot = np.arange(host.num_slots)
    k[:, :, 0] = scores(slot)[:, None]
    q[:, :, 0] = np.array([1, 0.5, 0.25])[slot % 3, None] * [1, -1]  # the second head has them with opposite sign
    q[n:], k[n:] = np.nan, np.nan
    buckets, scopes = on_device(cp, [n], 16, 17)
    got = to_host(attend(*map(cp.asarray, (q, k, v, dout)), buckets, scopes, scale=1.0))
    assert_padding(got, host)
    assert_accurate(got, q, k, v, dout, host, scopes.table.get(), 1.0, lucky=True)


def test_logits_beyond_what_exp_can_hold(cp):
    host = layout([500], 16)
    for dtype in DTYPES:
        q, k, v, dout = inputs(host, 1, 16, dtype)
        q *= np.array(1000, q.dtype)
        got = to_host(attend(*map(cp.asarray, (q, k, v, dout)), *on_device(cp, [500], 16, 32), scale=10.0))
        logits = 10 * q[:500, 0].astype(np.float64) @ k[:500, 0].astype(np.float64).T
        clear = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0] > 100
        assert clear.mean() > 0.9
        picked = v[logits.argmax(1)[clear], 0].astype(float)
        np.testing.assert_allclose(got["out"][:500, 0][clear].astype(float), picked, rtol=1e-6)
        np.testing.assert_allclose(got["lse"][:500, 0][clear], logits.max(1)[clear], rtol=1e-5)
        for name in ("out", "lse", "dq", "dv"):  # float16 cannot hold every dk, which is a sum of q
            assert np.isfinite(got[name][:500].astype(float)).all(), name


# ---- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bucket_size", [16, 80])
def test_padding_may_hold_anything(cp, bucket_size, dtype):
    lengths = [0, 370, 1, 16, 133]
    host = layout(lengths, bucket_size)
    arrays = inputs(host, 2, 24, dtype)
    buckets, scopes = on_device(cp, lengths, bucket_size, 4, shift=1)
    padding = ~valid(host)
    q, k, v, dout = map(cp.asarray, arrays)
    expected = attend(q, k, v, dout, buckets, scopes)
    got = to_host(expected)
    assert_padding(got, host)
    assert padding.any() and all(np.isfinite(x[~padding].astype(float)).all() for x in got.values())
    for filler in (0, np.inf, -np.inf, 1000):
        for x in arrays:
            x[padding] = filler
        assert_same_bits(attend(*map(cp.asarray, arrays), buckets, scopes), expected, filler)
    out, lse = got["out"].copy(), got["lse"].copy()
    out[padding], lse[padding] = np.nan, np.nan
    gradients = gpu3d.bucket_attention_backward(dout, q, k, v, cp.asarray(out), cp.asarray(lse), buckets, scopes)
    assert_same_bits({**expected, **dict(zip(RESULTS[2:], gradients, strict=True))}, expected, "NaN in out and lse")


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan(cp, where, dtype):
    lengths = [450, 160]
    host = layout(lengths, 16)
    arrays = inputs(host, 3, 64, dtype)
    arrays["qk".index(where)][37, 1, 5] = np.nan
    buckets, scopes = on_device(cp, lengths, 16, 9, shift=2)
    got = to_host(attend(*map(cp.asarray, arrays), buckets, scopes))
    reaches = nan_reaches(host, scopes.table.get(), where, 37, 1, 3)
    for name, reached in reaches.items():
        assert np.isnan(got[name][reached].astype(float)).all(), name
        elsewhere = got[name][~reached & valid(host)[:, None]]
        assert np.isfinite(elsewhere.astype(float)).all() and (elsewhere != 0).mean() > 0.99, name
    assert_padding(got, host)
    kept = valid(host)[:, None] & ~reaches["dk"]
    assert_accurate(got, *arrays, host, scopes.table.get(), 0.125, where=kept)
    if where == "q":  # the other rows of that scope keep their results
        rows = reaches["dk"] & ~reaches["out"]
        arrays[0][37, 1, 5] = 0
        clean = to_host(attend(*map(cp.asarray, arrays), buckets, scopes))
        rounding = 4 * {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-20}[dtype]
        for name in ("out", "lse", "dq"):
            a, b = (x[name][rows].astype(float) for x in (got, clean))
            np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding, err_msg=name)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64])
def test_views(cp, dim, dtype):
    """Memory layouts change no bit: packed, by head, spread, backwards, misaligned."""
    lengths = [300, 100]
    arrays = inputs(layout(lengths, 16), 3, dim, dtype)
    buckets, scopes = on_device(cp, lengths, 16, 8)
    shape = arrays[0].shape
    expected = attend(*map(cp.asarray, arrays), buckets, scopes)
    stacked = np.stack(arrays)
    packed = cp.asarray(np.ascontiguousarray(stacked.swapaxes(0, 1)))
    by_head = cp.asarray(np.ascontiguousarray(stacked.swapaxes(1, 2)))
    spread = cp.asarray(np.repeat(stacked, 2, axis=3))
    backwards = cp.asarray(np.ascontiguousarray(stacked[:, ::-1, ::-1]))
    wide = cp.asarray(np.pad(stacked, ((0, 0), (0, 0), (0, 0), (8, 0)), constant_values=np.nan))
    views = {
        "packed": [packed[:, i] for i in range(4)],
        "by head": list(by_head.swapaxes(1, 2)),
        "spread": list(spread[..., ::2]),
        "backwards": list(backwards[:, ::-1, ::-1]),
        "wide": list(wide[..., 8:]),
        "mixed": [packed[:, 0], by_head[1].swapaxes(0, 1), spread[2, ..., ::2], cp.asarray(arrays[3])],
    }
    for offset in (1, 2, 3, 5):  # in elements
        flat = cp.asarray(np.pad(stacked.reshape(4, -1), ((0, 0), (offset, 8 - offset))))
        views[f"offset {offset}"] = [row[offset : offset + stacked[0].size].reshape(shape) for row in flat]
    for name, (q, k, v, dout) in views.items():
        assert name.startswith("offset") or not v.flags.c_contiguous
        assert_same_bits(attend(q, k, v, dout, buckets, scopes), expected, name)
    q, k, v, dout = map(cp.asarray, arrays)
    saved = cp.asarray(np.pad(expected["out"].get(), ((0, 0), (0, 0), (1, dim - 1))))[..., 1 : dim + 1]
    lse = cp.asfortranarray(expected["lse"])
    gradients = gpu3d.bucket_attention_backward(dout, q, k, v, saved, lse, buckets, scopes)
    assert_same_bits({**expected, **dict(zip(RESULTS[2:], gradients, strict=True))}, expected, "views of out and lse")
    same = np.broadcast_to(arrays[3][0, 0], shape)  # like the gradient of a sum
    got = attend(q, k, v, cp.broadcast_to(dout[0, 0], shape), buckets, scopes)
    assert_same_bits(got, attend(q, k, v, cp.asarray(same.copy()), buckets, scopes), "broadcast")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 128])
def test_a_hundred_runs_give_the_same_bits(cp, dim, dtype):
    lengths = [3000, 500]
    arrays = [cp.asarray(x) for x in inputs(layout(lengths, 64), 4, dim, dtype)]
    buckets, scopes = on_device(cp, lengths, 64, 16, shift=5)
    expected = attend(*arrays, buckets, scopes)
    words = f"u{arrays[0].itemsize}"
    for _ in range(100):
        got = attend(*arrays, buckets, scopes)
        for name in RESULTS:
            word = "u4" if name == "lse" else words
            assert bool((got[name].view(word) == expected[name].view(word)).all()), name


@pytest.mark.parametrize("dim", [64, 128])
def test_any_number_of_blocks_gives_the_same_bits(cp, monkeypatch, dim):
    """A block waits for sums of earlier items only, so even one block alone comes to the end."""
    shape_of, lengths = cuda.shape_of, [5000, 0, 700]
    arrays = [cp.asarray(x) for x in inputs(layout(lengths, 64), 3, dim, "bfloat16")]
    buckets, scopes = on_device(cp, lengths, 64, 32, shift=7)
    expected = attend(*arrays, buckets, scopes)
    for count in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(cuda, "shape_of", lambda *args, n=count: shape_of(*args)._replace(multiprocessors=n))
        assert_same_bits(attend(*arrays, buckets, scopes), expected, f"{count} blocks")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "stride"), [(5, 1), (0, 2), (-1, 4)])
def test_shifted_and_strided_scopes_are_hand_made_tables(cp, shift, stride, dtype):
    buckets, scopes = on_device(cp, [700, 300], 16, 4, shift, stride)
    arrays = [cp.asarray(x) for x in inputs(layout([700, 300], 16), 2, 32, dtype)]
    expected = attend(*arrays, buckets, scopes)
    table = scopes.table.get()
    shuffled = table[np.random.default_rng(0).permutation(len(table))]
    assert (shuffled != table).any()
    assert_same_bits(attend(*arrays, buckets, gpu3d.scopes(buckets, table=shuffled)), expected)
    wider = np.pad(shuffled, ((0, 0), (0, 3)), constant_values=-1)
    assert_same_bits(attend(*arrays, buckets, gpu3d.scopes(buckets, table=wider)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "stride"), [(5, 1), (0, 2), (-1, 4)])
def test_a_shifted_or_strided_scope_is_a_plain_one_over_moved_buckets(cp, shift, stride, dtype):
    buckets, scopes = on_device(cp, [24 * 48], 48, 3, shift, stride)
    arrays = inputs(layout([24 * 48], 48), 2, 32, dtype)
    expected = to_host(attend(*map(cp.asarray, arrays), buckets, scopes))
    slots = (scopes.table.get().reshape(-1, 1) * 48 + np.arange(48)).reshape(-1)
    assert (slots != np.arange(len(slots))).any()
    got = attend(*(cp.asarray(x[slots]) for x in arrays), buckets, gpu3d.scopes(buckets, 3))
    assert_same_bits(got, {name: x[slots] for name, x in expected.items()})


def test_without_lse_only_out_is_returned(cp):
    buckets, scopes = on_device(cp, [500], 16, 8)
    q, k, v, _ = (cp.asarray(x) for x in inputs(layout([500], 16), 2, 32, "bfloat16"))
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    alone = gpu3d.bucket_attention(q, k, v, buckets, scopes)
    assert alone.get().tobytes() == out.get().tobytes() and lse.dtype == np.float32


# ---- registers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_registers_suffice(cp, dtype, dim):
    """The kernels that this GPU uses keep nothing in local memory."""
    arch, dtype = compiler.device_arch(cp.cuda.Device().id), DTYPES[dtype]
    hopper = arch == "sm_90a"
    if roles := cuda._roles(hopper, dtype, dim):
        kernels = [cuda._roles_kernel(roles, dtype, dim), *cuda._one_pass_kernels(dtype, dim)]
    else:
        kernels = [cuda._kernel(which, dtype, dim, hopper)[0] for which in cuda.MMA]
    for kernel in kernels:
        path = compiler.cubin_path(compiler.Configuration(kernel.source, kernel.macros), arch)
        assert cp.RawModule(path=str(path)).get_function(kernel.function).local_size_bytes == 0, kernel.function


# ---- offsets beyond 32 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64])
def test_rows_far_apart(cp, dim):
    """Rows are two megabytes apart, so the last of 2112 rows lie beyond 2**31 elements."""
    if cp.cuda.Device().mem_info[0] < 8 << 30:
        pytest.skip("needs 8 GiB of GPU memory")
    arrays = [cp.asarray(x) for x in inputs(layout([2100], 16), 2, dim, "float16")]
    buckets, scopes = on_device(cp, [2100], 16, 8)
    assert (buckets.num_slots - 1) << 20 > 2**31
    far = cp.empty((buckets.num_slots, 1 << 20), np.float16)
    views = []
    for i, x in enumerate(arrays):
        view = far[:, 256 * i : 256 * i + 2 * dim].reshape(buckets.num_slots, 2, dim)
        view[:] = x
        views.append(view)
        assert view.base is not None and view.strides[0] == 2 << 20
    assert_same_bits(attend(*views, buckets, scopes), attend(*arrays, buckets, scopes))
    del far, views, view
    cp.get_default_memory_pool().free_all_blocks()


@pytest.mark.usefixtures("large_memory")
def test_more_than_2_31_elements(cp):
    """Compare the last buckets, whose rows lie beyond 2**31 elements, with the same rows alone."""
    heads, dim, tail = 64, 128, 1500
    points = cp.asarray(clouds.uniform(2**18 + tail))
    buckets, last = gpu3d.bucketize(points, 512), gpu3d.bucketize(points[:tail], 512)
    scopes, last_scopes = gpu3d.scopes(buckets, 1), gpu3d.scopes(last, 1)
    block = cp.asarray(inputs(layout([125], 16), heads, dim, "float16")[0][:125])
    x = cp.empty((buckets.num_slots, heads, dim), np.float16)
    assert x.size > 2**31
    for start in range(0, len(x), len(block)):
        x[start : start + len(block)] = block[: len(x) - start]
    rows = x[2**18 :].copy()
    expected = attend(rows, rows, rows, rows, last, last_scopes)
    got = attend(x, x, x, x, buckets, scopes)
    assert_same_bits({name: y[2**18 :] for name, y in got.items()}, expected)
    assert all(bool(cp.isfinite(y[:tail]).all()) and bool(y[:tail].any()) for y in expected.values())


# ---- errors, streams, graphs, libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(cp, arguments, error, message):
    assert_refused(arguments, error, message, cp.asarray)


def test_float64_is_refused(cp):
    buckets, scopes = on_device(cp, [100], 16, 3)
    q, k, v, dout = (cp.asarray(x) for x in inputs(layout([100], 16), 2, 16, np.float64))
    message = r"q must be float16, bfloat16 or float32 on a GPU, got float64: .*astype\('float32'\)"
    with pytest.raises(TypeError, match=message):
        gpu3d.bucket_attention(q, k, v, buckets, scopes)
    with pytest.raises(TypeError, match=message):
        gpu3d.bucket_attention_backward(dout, q, k, v, q, q[:, :, 0].astype(np.float32), buckets, scopes)


def test_scopes_of_the_host_are_refused(cp):
    buckets, _ = on_device(cp, [100], 16, 3)
    q = cp.ones((buckets.num_slots, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"one device: .*scopes is numpy on the CPU"):
        gpu3d.bucket_attention(q, q, q, buckets, gpu3d.scopes(layout([100], 16), 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_point(cp, dtype):
    host = layout([1], 16)
    arrays = inputs(host, 3, 16, dtype)
    got = to_host(attend(*map(cp.asarray, arrays), *on_device(cp, [1], 16, 2)))
    assert_padding(got, host)
    np.testing.assert_allclose(got["out"][0].astype(float), arrays[2][0].astype(float), rtol=1e-6)
    np.testing.assert_allclose(got["dv"][0].astype(float), arrays[3][0].astype(float), rtol=1e-5)
    assert_accurate(got, *arrays, host, np.array([[0, -1]]), 0.25)
