# SPDX-License-Identifier: Apache-2.0
"""_arrays on the CPU: any library's arrays in, the same kind out, no copy, no import, and the wording of errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import clouds
import numpy as np
import pytest

import gpu3d
from gpu3d import _arrays

DTYPES = ["bool", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64"]


class Minimal:
    """The least that counts as an array: DLPack, without the keywords that its later versions brought."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.device


def numbers(dtype, shape=(5, 3)):
    values = np.random.default_rng(0).standard_normal(shape) * 9
    return values.astype(_arrays.BFLOAT16 if dtype == "bfloat16" else dtype)


# ---- in and out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy(dtype):
    x = numbers(dtype)
    native, origin = _arrays.enter(x, "x")
    assert native is x and _arrays.leave(native, origin) is x and str(origin) == "numpy on the CPU"


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(dtype):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(numbers("float64")).to(getattr(torch, dtype))
    native, origin = _arrays.enter(x, "x")
    assert native.dtype == numbers(dtype).dtype and native.shape == (5, 3) and str(origin) == "torch on the CPU"
    np.testing.assert_array_equal(native.astype(complex), x.to(torch.complex128).numpy())
    assert native.ctypes.data == x.data_ptr()  # no copy in
    back = _arrays.leave(native, origin)
    assert isinstance(back, torch.Tensor) and back.dtype == x.dtype and torch.equal(back, x)
    assert back.data_ptr() == x.data_ptr()  # none out


def test_torch_views():
    torch = pytest.importorskip("torch")
    wide = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    for view in (wide[:, 1:4], wide.T, wide[::2], wide[:1].expand(4, 6), wide[:, 1:4].to(torch.bfloat16).T, wide[:0]):
        native, _ = _arrays.enter(view, "x")
        np.testing.assert_array_equal(native.astype(np.float32), view.float().numpy())
        assert native.size == 0 or native.ctypes.data == view.data_ptr()
    z = torch.tensor([1 + 2j, 3 - 4j]).conj()  # the memory of these two holds other values
    assert _arrays.enter(z, "x")[0].tolist() == [1 - 2j, 3 + 4j]
    assert _arrays.enter(z.imag, "x")[0].tolist() == [-2, 4]


def test_torch_with_gradients():
    torch = pytest.importorskip("torch")
    points = torch.from_numpy(clouds.uniform(100)).requires_grad_()
    buckets = gpu3d.bucketize(points * 2, 64)
    np.testing.assert_array_equal(buckets.slot_to_point.numpy(), gpu3d.bucketize(clouds.uniform(100), 64).slot_to_point)
    assert not buckets.scatter(points).requires_grad and points.requires_grad


# JAX without x64 has no 64-bit types.
@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.endswith("64") or d == "complex64"])
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    x = jax.device_put(numbers(dtype), jax.devices("cpu")[0])
    native, origin = _arrays.enter(x, "x")
    assert type(native) is np.ndarray and native.dtype == x.dtype and str(origin) == "jax on the CPU"
    assert native.ctypes.data == x.unsafe_buffer_pointer()  # no copy in
    back = _arrays.leave(np.array(native), origin)
    assert isinstance(back, jax.Array) and back.dtype == x.dtype and back.devices() == x.devices()
    np.testing.assert_array_equal(np.asarray(back), numbers(dtype))


def test_anything_with_dlpack():
    x = numbers("float32")
    native, origin = _arrays.enter(Minimal(x), "x")
    assert origin == _arrays.Origin("numpy", None) and np.shares_memory(native, x)
    np.testing.assert_array_equal(native, x)
    assert _arrays.enter(Minimal(x, device=(3, 0)), "x")[1].device is None  # pinned host memory


def converter(kind):
    """The way from NumPy to a library's arrays, and the type of what should come back."""
    if kind == "numpy":
        return np.asarray, np.ndarray
    if kind == "dlpack":
        return Minimal, np.ndarray
    library = pytest.importorskip(kind)
    if kind == "torch":
        return library.from_numpy, library.Tensor
    return lambda x: library.device_put(x, library.devices("cpu")[0]), library.Array


@pytest.mark.parametrize("kind", ["numpy", "dlpack", "torch", "jax"])
def test_the_same_kind_comes_out(kind):
    convert, array_type = converter(kind)
    points, x = clouds.uniform(300), numbers("int32", (300, 2))
    expected = gpu3d.bucketize(points, 64)
    buckets = gpu3d.bucketize(convert(points), 64)
    results = {
        "slot_to_point": (buckets.slot_to_point, expected.slot_to_point),
        "point_to_slot": (buckets.point_to_slot, expected.point_to_slot),
        "moved": (buckets.moved, expected.moved),
        "table": (gpu3d.scopes(buckets, 2).table, gpu3d.scopes(expected, 2).table),
        "scatter": (buckets.scatter(convert(x)), expected.scatter(x)),
        "gather": (buckets.gather(convert(expected.scatter(x))), x),
    }
    for name, (got, right) in results.items():
        assert isinstance(got, array_type) and got.shape == right.shape, name
        np.testing.assert_array_equal(np.asarray(got), right, err_msg=name)
    assert isinstance(buckets.scatter(x), np.ndarray)  # x's kind, not the buckets'


# ---- nobody else is imported ---------------------------------------------------------------------------------------

FRESH = """
import json, sys, time
import numpy as np, ml_dtypes
start = time.process_time()
import gpu3d
seconds = time.process_time() - start
points = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
buckets = gpu3d.bucketize(points, 64)
buckets.gather(buckets.scatter(points)), gpu3d.scopes(buckets)
try:
    gpu3d.bucketize([[0.0, 0.0, 0.0]])
except TypeError:
    pass
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_importing_is_light():
    environment = {**os.environ, "PYTHONPATH": str(Path(gpu3d.__file__).parents[1])}
    runs = [
        json.loads(
            subprocess.run([sys.executable, "-c", FRESH], env=environment, check=True, capture_output=True).stdout
        )
        for _ in range(2)
    ]
    _, modules = runs[0]
    assert "gpu3d" in modules and "numpy" in modules
    assert not {"cupy", "torch", "jax", "matplotlib", "scipy", "cuda", "tqdm", "laspy"} & set(modules)
    assert min(seconds for seconds, _ in runs) < 0.5  # processor time, beyond NumPy's


# ---- errors: what is no array --------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [[[0.0, 0.0, 0.0]], (1.0,), 3, 3.5, None, "points", np.float32(3)])
def test_no_array(x):
    message = rf"points must be an array \(NumPy, .*\), got {type(x).__name__}\..*numpy\.asarray\(points"
    with pytest.raises(TypeError, match=message):
        gpu3d.bucketize(x)


def test_torch_errors():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match=r"points must be a dense tensor, got layout torch\.sparse_coo: call points\.to_de"
    ):
        gpu3d.bucketize(torch.ones(4, 3).to_sparse())
    with pytest.raises(TypeError, match=r"points is on device meta; gpu3d runs on CPU and CUDA: move it by points\.to"):
        gpu3d.bucketize(torch.ones(4, 3, device="meta"))
    with pytest.raises(TypeError, match=r"got Tensor: output shapes follow .* Convert by lengths\.tolist\(\)"):
        gpu3d.bucketize(torch.ones(4, 3), lengths=torch.tensor([4]))


def test_jax_tracers():
    jax = pytest.importorskip("jax")
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match=r"points is a JAX tracer: plain gpu3d calls run outside of jax\.jit"):
            transform(gpu3d.bucketize)(jax.numpy.ones((2, 4, 3)))


def test_other_devices(monkeypatch):
    with pytest.raises(TypeError, match="x is on DLPack device type 10; gpu3d reads CPU and CUDA memory"):
        _arrays.enter(Minimal(numbers("float32"), device=(10, 0)), "x")
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'x is on a CUDA device, which needs CuPy: pip install "gpu3d\[cuda13\]"'):
        _arrays.enter(Minimal(numbers("float32"), device=(2, 0)), "x")


def test_same_device():
    numpy, first, second = (_arrays.Origin(*o) for o in (("numpy", None), ("torch", 0), ("jax", 1)))
    _arrays.check_same_device(q=first, k=_arrays.Origin("cupy", 0))
    with pytest.raises(ValueError, match="one device: q is torch on cuda:0, k is jax on cuda:1, v is numpy on the CPU"):
        _arrays.check_same_device(q=first, k=second, v=numpy)


def test_the_host_needs_no_stream():
    with _arrays.on(_arrays.Origin("torch", None)) as context:
        assert context is None


# ---- errors: the shared checks -------------------------------------------------------------------------------------

P = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: _arrays.check_choice("a", ("b", "c"), "hash"), ValueError, "hash must be one of 'b', 'c', got 'a'."),
        (lambda: _arrays.check_integer(2.0, "k"), TypeError, "k must be an integer, got 2.0 of type float."),
        (lambda: _arrays.check_integer(True, "k"), TypeError, "k must be an integer, got True of type bool."),
        (
            lambda: _arrays.check_points(P[0], None, "q"),
            ValueError,
            "q must have shape [N, 3] (or [B, n, 3]), got [3].",
        ),
        (lambda: _arrays.check_points(P[:, :2], None, "q"), ValueError, "got shape [4, 2]: take q[..., :3]."),
        (
            lambda: _arrays.check_points(P.astype(int), None, "q"),
            TypeError,
            "got int64: convert by q.astype('float32').",
        ),
        (lambda: _arrays.check_points(P[None], [4], "q"), ValueError, "q of shape [1, 4, 3] already says its lengths"),
        (lambda: _arrays.check_lengths(4, 4, "q"), TypeError, "host integers, e.g. lengths=[4], got int: pass a list."),
        (lambda: _arrays.check_lengths([3], 4, "q"), ValueError, "sum to the number of q, got a sum of 3 for 4 q."),
        (lambda: _arrays.check_lengths([5, -1], 4, "q"), ValueError, "must not be negative, got lengths[1] = -1."),
        (lambda: _arrays.check_lengths([4.0], 4, "q"), TypeError, "got lengths[0] = 4.0 of type float."),
        (lambda: _arrays.check_lengths(np.array([[4]]), 4, "q"), ValueError, "one-dimensional, got shape [1, 1]."),
        (
            lambda: _arrays.check_finite(P / 0, "q"),
            ValueError,
            "q must be finite, got 4 of 4 with NaN or inf, the first",
        ),
    ],
)
def test_wording(check, error, message):
    with np.errstate(invalid="ignore"), pytest.raises(error) as caught:
        check()
    assert message in str(caught.value)


def test_what_passes():
    assert type(_arrays.check_integer(np.int8(3), "k")) is int
    assert _arrays.check_lengths(None, 4, "q") == (4,)
    for lengths in ([1, 0, 3], (1, 0, 3), np.array([1, 0, 3], np.uint8)):
        passed = _arrays.check_lengths(lengths, 4, "q")
        assert passed == (1, 0, 3) and all(type(n) is int for n in passed)
    packed, lengths = _arrays.check_points(P.reshape(2, 2, 3), None)
    assert packed.shape == (4, 3) and lengths == (2, 2) and np.shares_memory(packed, P)
    for dtype in _arrays.FLOATS:
        _arrays.check_finite(_arrays.check_points(P.astype(dtype), [4])[0])


@pytest.mark.parametrize("dtype", _arrays.FLOATS, ids=str)
def test_the_first_non_finite_point_is_named(dtype):
    points = np.ones((6, 3), dtype)
    points[2, 1] = points[5, 0] = points[5, 2] = np.nan
    points[4, 2] = -np.inf
    with pytest.raises(ValueError, match="got 3 of 6 with NaN or inf, the first at index 2"):
        _arrays.check_finite(points)
