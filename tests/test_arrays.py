# SPDX-License-Identifier: Apache-2.0
"""gpu3d._arrays on the CPU: arrays of any library in and out, without copies and imports, and the wording of errors."""

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
    """The least that gpu3d accepts as an array: DLPack without the keywords of its later versions."""

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
    given = _arrays.read(x, "x")
    assert (
        given.array is x and _arrays.leave(given.array, given.origin) is x and str(given.origin) == "numpy on the CPU"
    )
    assert (given.shape, given.dtype, given.ndim, given.size, given.device) == (x.shape, x.dtype, 2, 15, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(dtype):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(numbers("float64")).to(getattr(torch, dtype))
    given = _arrays.read(x, "x")
    native, origin = given.array, given.origin
    assert given.dtype == native.dtype == numbers(dtype).dtype and native.shape == given.shape == (5, 3)
    assert str(origin) == "torch on the CPU"
    np.testing.assert_array_equal(native.astype(complex), x.to(torch.complex128).numpy())
    assert native.ctypes.data == x.data_ptr()  # no copy in
    back = _arrays.leave(native, origin)
    assert isinstance(back, torch.Tensor) and back.dtype == x.dtype and torch.equal(back, x)
    assert back.data_ptr() == x.data_ptr()  # none out


def test_torch_views():
    torch = pytest.importorskip("torch")
    wide = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    for view in (wide[:, 1:4], wide.T, wide[::2], wide[:1].expand(4, 6), wide[:, 1:4].to(torch.bfloat16).T, wide[:0]):
        native = _arrays.read(view, "x").array
        np.testing.assert_array_equal(native.astype(np.float32), view.float().numpy())
        assert native.size == 0 or native.ctypes.data == view.data_ptr()
    z = torch.tensor([1 + 2j, 3 - 4j]).conj()  # views whose memory holds other values
    assert _arrays.read(z, "x").array.tolist() == [1 - 2j, 3 + 4j]
    assert _arrays.read(z.imag, "x").array.tolist() == [-2, 4]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "uint16", "bool"])
def test_any_dtype_moves(name):
    torch = pytest.importorskip("torch")
    buckets = gpu3d.bucketize(clouds.uniform(100), 32)
    x = (torch.rand(100, 2) * 4).to(getattr(torch, name))
    back = buckets.gather(buckets.scatter(x))
    assert back.dtype == x.dtype and torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_subclasses():
    matrix = np.asmatrix(clouds.uniform(100).astype(np.float64))
    distances, _ = gpu3d.knn(clouds.uniform(100), matrix, 1)
    np.testing.assert_array_equal(distances, gpu3d.knn(clouds.uniform(100), np.asarray(matrix), 1).distances)
    masked = np.ma.masked_array(clouds.uniform(100), mask=np.zeros((100, 3), bool))
    calls = gpu3d.bucketize, lambda x: gpu3d.knn(x, x, 1), lambda x: gpu3d.bucketize(clouds.uniform(100)).scatter(x)
    for call in calls:
        with pytest.raises(TypeError, match=r"masked array, and gpu3d knows no masks: .*\.filled\(\)"):
            call(masked)
        call(np.ma.compress_rows(masked))  # the cures
        call(masked.filled())


def test_bfloat16_through_dlpack():
    torch = pytest.importorskip("torch")
    x = torch.rand(20, 3).bfloat16()
    assert _arrays.read(Minimal(x), "x").dtype == _arrays.BFLOAT16


def test_jax_keeps_the_device():
    code = """if True:
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        import jax, gpu3d
        x = jax.device_put(jax.numpy.ones((64, 3)), jax.devices()[2])
        buckets = gpu3d.bucketize(x, 16)
        assert buckets.slot_to_point.devices() == gpu3d.knn(x, x, 2).indices.devices() == x.devices()
        x[buckets.slot_to_point]
    """
    pytest.importorskip("jax")
    environment = {**os.environ, "PYTHONPATH": str(Path(gpu3d.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# JAX without x64 has no 64-bit types.
@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.endswith("64") or d == "complex64"])
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    x = jax.device_put(numbers(dtype), jax.devices("cpu")[0])
    given = _arrays.read(x, "x")
    native, origin = given.array, given.origin
    assert type(native) is np.ndarray and native.dtype == x.dtype and str(origin) == "jax on the CPU"
    assert native.ctypes.data == x.unsafe_buffer_pointer()  # no copy in
    back = _arrays.leave(np.array(native), origin)
    assert isinstance(back, jax.Array) and back.dtype == x.dtype and back.devices() == x.devices()
    np.testing.assert_array_equal(np.asarray(back), numbers(dtype))


def test_anything_with_dlpack():
    x = numbers("float32")
    given = _arrays.read(Minimal(x), "x")
    assert given.origin == _arrays.Origin("numpy", None) and np.shares_memory(given.array, x)
    np.testing.assert_array_equal(given.array, x)
    assert _arrays.read(Minimal(x, device=(3, 0)), "x").device is None  # pinned host memory


def converter(kind):
    """A function from NumPy arrays to arrays of a library, and the expected type of results."""
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
    assert isinstance(buckets.scatter(x), np.ndarray)  # the kind of x, not of the buckets


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


@pytest.mark.filterwarnings("ignore:.*quantiz")  # torch's own
def test_torch_errors():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match=r"points must be a dense tensor, got layout torch\.sparse_coo: call points\.to_de"
    ):
        gpu3d.bucketize(torch.ones(4, 3).to_sparse())
    with pytest.raises(TypeError, match=r"points is on device meta; gpu3d runs on CPU and CUDA: move it by points\.to"):
        gpu3d.bucketize(torch.ones(4, 3, device="meta"))
    with pytest.raises(TypeError, match=r"points must not be quantized: call points\.dequantize\(\)"):
        gpu3d.bucketize(torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.quint8))
    with pytest.raises(TypeError, match=r"points must be float32.*got complex64"):
        gpu3d.bucketize(torch.ones(4, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"points must be float32.*got float8_e4m3fn"):
        gpu3d.bucketize(torch.ones(4, 3).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"got Tensor: output shapes follow .* Convert by lengths\.tolist\(\)"):
        _arrays.check_lengths(torch.tensor([4], device="meta"), 4, "points")


def test_other_devices(monkeypatch):
    with pytest.raises(TypeError, match="x is on DLPack device type 10; gpu3d reads CPU and CUDA memory"):
        _arrays.read(Minimal(numbers("float32"), device=(10, 0)), "x")
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'x is on a CUDA device, which needs CuPy: pip install "gpu3d\[cuda13\]"'):
        _arrays.read(Minimal(numbers("float32"), device=(2, 0)), "x")


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


def given(x):
    return _arrays.read(x, "x")


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: _arrays.check_choice("a", ("b", "c"), "hash"), ValueError, "hash must be one of 'b', 'c', got 'a'."),
        (lambda: _arrays.check_integer(2.0, "k"), TypeError, "k must be an integer, got 2.0 of type float."),
        (lambda: _arrays.check_integer(True, "k"), TypeError, "k must be an integer, got True of type bool."),
        (
            lambda: _arrays.check_points(given(P[0]), None, "q"),
            ValueError,
            "q must have shape [N, 3] (or [B, n, 3]), got [3].",
        ),
        (
            lambda: _arrays.check_points(given(P[:, :2]), None, "q"),
            ValueError,
            "[4, 2]: pad the missing ones with zeros.",
        ),
        (lambda: _arrays.check_points(given(np.ones((4, 5))), None, "q"), ValueError, "[4, 5]: take q[..., :3]."),
        (
            lambda: _arrays.check_points(given(P.astype(int)), None, "q"),
            TypeError,
            "got int64: convert by q.astype('float32').",
        ),
        (
            lambda: _arrays.check_points(given(P[None]), [4], "q"),
            ValueError,
            "q of shape [1, 4, 3] already says its lengths",
        ),
        (lambda: _arrays.check_lengths(4, 4, "q"), TypeError, "host integers, e.g. lengths=[4], got int: pass a list."),
        (lambda: _arrays.check_lengths([3], 4, "q"), ValueError, "sum to the number of q, got a sum of 3 for 4 q."),
        (lambda: _arrays.check_lengths([5, -1], 4, "q"), ValueError, "must not be negative, got lengths[1] = -1."),
        (lambda: _arrays.check_lengths([4.0], 4, "q"), TypeError, "got lengths[0] = 4.0 of type float."),
        (lambda: _arrays.check_lengths(np.array([[4]]), 4, "q"), ValueError, "one-dimensional, got shape [1, 1]."),
        (lambda: _arrays.check_lengths(np.array(4), 4, "q"), ValueError, "one-dimensional, got shape []."),
        (
            lambda: _arrays.check_choice(np.array("b"), ("b",), "hash"),
            TypeError,
            "hash must be one of 'b', got array('b'",
        ),
        (
            lambda: _arrays.check_integer([3] * 9, "k"),
            TypeError,
            "k must be an integer, got list of length 9 of type list.",
        ),
        (lambda: _arrays.check_number(10**400, "r"), ValueError, "r must fit a float, got an int of many digits."),
        (
            lambda: _arrays.check_number(P, "r"),
            TypeError,
            "r must be a number, got ndarray of shape [4, 3] of type ndarr",
        ),
        (lambda: _arrays.check_number(True, "r"), TypeError, "r must be a number, got True of type bool."),
        (lambda: _arrays.check_flag(1, "flag"), TypeError, "flag must be True or False, got 1."),
        (
            lambda: _arrays.check_finite(given(P / 0), "q"),
            ValueError,
            "q must be finite, got 4 of 4 with NaN or inf, the first",
        ),
    ],
)
def test_wording(check, error, message):
    with np.errstate(invalid="ignore"), pytest.raises(error) as caught:
        check()
    assert message in str(caught.value)


def test_many_lengths():
    """Many ints become an array; what is no length, or only few, is left to `check_lengths`."""
    rng = np.random.default_rng(0)
    ints = [*rng.integers(0, 1000, 100).tolist(), 0, 1]
    for lengths in (ints, tuple(ints), [*ints[:-1], np.int8(1)], np.array(ints)):
        array = _arrays.many_lengths(lengths)
        assert array.dtype == np.int64 and array.tolist() == ints
        assert _arrays.check_lengths(array, sum(ints), "q") == tuple(ints)
    for wrong in (True, False, np.True_, 1.0, "1", None, 2**70):
        assert _arrays.many_lengths([*ints, wrong]) is None
    for lengths in (ints[:64], np.array(ints, np.int32), np.array(ints)[:64], np.array([ints]), None, 5):
        assert _arrays.many_lengths(lengths) is None


def test_what_passes():
    assert type(_arrays.check_integer(np.int8(3), "k")) is int
    assert _arrays.check_lengths(None, 4, "q") == (4,)
    for lengths in ([1, 0, 3], (1, 0, 3), np.array([1, 0, 3], np.uint8)):
        passed = _arrays.check_lengths(lengths, 4, "q")
        assert passed == (1, 0, 3) and all(type(n) is int for n in passed)
    assert _arrays.check_points(given(P.reshape(2, 2, 3)), None) == (2, 2)
    for dtype in _arrays.FLOATS:
        assert _arrays.check_points(given(P.astype(dtype)), [4]) == (4,)
        _arrays.check_finite(given(P.astype(dtype)))
    torch = sys.modules.get("torch")
    if torch is not None:
        assert _arrays.check_lengths(torch.tensor([1, 3]), 4, "q") == (1, 3)


@pytest.mark.parametrize("dtype", _arrays.FLOATS, ids=str)
def test_the_first_non_finite_point_is_named(dtype):
    points = np.ones((6, 3), dtype)
    points[2, 1] = points[5, 0] = points[5, 2] = np.nan
    points[4, 2] = -np.inf
    with pytest.raises(ValueError, match="got 3 of 6 with NaN or inf, the first at index 2"):
        _arrays.check_finite(given(points))
