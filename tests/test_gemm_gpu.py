# SPDX-License-Identifier: Apache-2.0
"""Linear layers by cuBLASLt against float64: accuracy, bits that do not depend on other rows, CUDA graphs."""

from __future__ import annotations

import ctypes
import functools
import math
import threading

import ml_dtypes
import numpy as np
import pytest

from gpu3d.cuda import cublaslt, launcher, linear
from gpu3d.cuda.plan import Call, Gemm, Input, Matrix, Steps

pytestmark = pytest.mark.gpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype("f2"), "float32": np.dtype("f4")}
ROWS = (0, 1, 31, 512, 34816)
# (N, K) of layers of flash3d_46m: qkv, fc1 and fc2 of the first and the last level, the stem and the head
LAYERS = [(192, 64), (256, 64), (64, 256), (2304, 768), (3072, 768), (768, 3072), (64, 132), (19, 64)]


# ---- matrices on the device ----------------------------------------------------------------------------------------
# Values are float64 arrays of CuPy that a dtype holds exactly. They lie in rows `stride` elements apart, and every byte
# between the rows is 0xFF, which is a NaN if it is read.


def rounded(cp, x, dtype):
    """The nearest values of a dtype."""
    if dtype != BFLOAT16:
        return x.astype(dtype).astype("f8")
    bits = x.astype("f4").view("u4")
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & cp.uint32(0xFFFF0000)).view("f4").astype("f8")


def stride_of(columns):
    """Elements from a row to the next: more than needed, and as aligned as they must be, even of aux."""
    return (columns // 8 + 1) * 8


class Array:
    """A matrix, or a vector as one row, on the device."""

    def __init__(self, cp, rows, columns, dtype, values=None, stride=None):
        self.cp, self.rows, self.columns, self.dtype = cp, rows, columns, dtype
        self.stride = columns if stride is None else stride
        kind = "u2" if dtype == BFLOAT16 else dtype
        self.memory = cp.full(max(1, rows) * self.stride * dtype.itemsize, 0xFF, "u1")
        self.all = self.memory.view(kind).reshape(-1, self.stride)[:rows]
        if values is not None:
            self.put(values)

    def put(self, values):
        values = values.reshape(self.rows, self.columns)
        if self.dtype == BFLOAT16:
            values = (values.astype("f4").view("u4") >> 16).astype("u2")
        self.all[:, : self.columns] = values.astype(self.all.dtype)

    def bits(self):
        return self.cp.ascontiguousarray(self.all[:, : self.columns]).view(f"u{self.dtype.itemsize}")

    def values(self):
        """The values as float64; nothing was written between the rows."""
        assert bool(
            (self.all[:, self.columns :].view(f"u{self.dtype.itemsize}") == ~0 % 256**self.dtype.itemsize).all()
        )
        if self.dtype != BFLOAT16:
            return self.all[:, : self.columns].astype("f8")
        return (self.bits().astype("u4") << 16).view("f4").astype("f8")

    def matrix(self, number):
        return Matrix(Input(number), self.rows, self.columns, self.dtype, self.stride)


def call_of(function, arrays, **options):
    """A call of a function of `linear` on arrays by name; biases are passed as pointers."""
    steps = Steps(inputs=len(arrays), results=0)
    given = {name: array.matrix(i) for i, (name, array) in enumerate(arrays.items())}
    given |= {name: matrix.pointer for name, matrix in given.items() if name.startswith("bias")}
    function(steps, **given, **options)
    return Call(steps.plan(), {})


def run(cp, function, arrays, **options):
    launch(cp, call_of(function, arrays, **options), arrays.values())


@functools.cache
def workspace(size, thread):
    """Memory that graphs may hold. Two threads must not share it."""
    import cupy

    return cupy.full(max(1, size), 0xFF, "u1")


def launch(cp, call, arrays):
    memories = [array.memory.data.ptr for array in arrays]
    memories.append(workspace(call.plan.workspace, threading.get_ident()).data.ptr)
    launcher.run(call, memories, cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream().ptr)


def normal(cp, rows, columns, dtype, scale=1.0, seed=0):
    """Nearly normal values: sums of four uniform ones, from the bits of splitmix64."""
    z = (cp.arange(rows * columns, dtype="u8") + np.uint64(seed << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    total = sum(((z >> np.uint64(shift)) & np.uint64(0xFFFF)).astype("f8") for shift in (0, 16, 32, 48))
    return rounded(cp, (total - 2 * 65535) * (scale * 3**0.5 / 65536), dtype).reshape(rows, columns)


def product(cp, a, b):
    return a @ b if a.size and b.size else cp.zeros((a.shape[0], b.shape[1]), a.dtype)


# ---- definitions ---------------------------------------------------------------------------------------------------


def gelu(cp, x):
    return 0.5 * x * (1 + cp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def assert_close(cp, got, expected, naive, dtype, inputs, note, slack=0.0):
    """Errors are at most twice those of the same arithmetic in float32, rounded to the dtype of the result.

    By chance these may be far below one rounding, so one rounding of the largest result is allowed too; for a float32
    result what up to 3072 sums one after another lose, or of 16-bit inputs what tensor cores lose, which do not round
    float32 sums but cut them off.
    """
    got = got.values()
    assert got.shape == expected.shape, note
    if not got.size:
        return
    one = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19 if inputs == dtype else 2.0**-12}[dtype.name]
    largest = float(cp.abs(expected).max())
    allowed = 2 * max(float(cp.abs(rounded(cp, naive, dtype) - expected).max()), one * largest) + slack * largest
    error = float(cp.abs(got - expected).max())  # NaN fails
    assert error <= allowed, f"{note}: error {error:.3g}, allowed {allowed:.3g}, largest {largest:.3g}"


def forward(cp, n, columns, inner, dtype, kind, out=None, seed=0, stride=stride_of):
    """Arrays of a layer, its options, and what it should give, in float64 and in float32."""
    out = out or dtype
    x, weight = normal(cp, n, inner, dtype, seed=seed), normal(cp, columns, inner, dtype, inner**-0.5, seed + 1)
    bias, residual = normal(cp, 1, columns, out, seed=seed + 2), normal(cp, n, columns, out, seed=seed + 3)

    def define(kind_of_float):
        y = product(cp, x.astype(kind_of_float), weight.astype(kind_of_float).T)
        pre = y if kind == "plain" else y + bias.astype(kind_of_float)
        if kind == "residual":
            pre = pre + residual.astype(kind_of_float)
        return (gelu(cp, pre) if "gelu" in kind else pre), pre

    arrays = {
        "x": Array(cp, n, inner, dtype, x, stride(inner)),
        "weight": Array(cp, columns, inner, dtype, weight, stride(inner)),
        "y": Array(cp, n, columns, out, stride=stride(columns)),
    }
    if kind != "plain":
        arrays["bias"] = Array(cp, 1, columns, out, bias)
    if kind == "residual":
        arrays["residual"] = Array(cp, n, columns, out, residual, stride(columns))
    if kind == "gelu_aux":
        arrays["aux"] = Array(cp, n, columns, out, stride=stride(columns))
    return arrays, {"gelu": "gelu" in kind}, define


def check_forward(cp, n, columns, inner, dtype, kind, out=None):
    arrays, options, define = forward(cp, n, columns, inner, dtype, kind, out)
    run(cp, linear.forward, arrays, **options)
    (y, pre), (naive_y, naive_pre) = define("f8"), define("f4")
    note, out = f"{kind} of {n} rows, N = {columns}, K = {inner}", out or dtype
    slack = 2.0**-10 if "gelu" in kind else 0.0  # the hardware's tanh has a relative error of 2**-11
    assert_close(cp, arrays["y"], y, naive_y, out, dtype, note, slack)
    if kind == "gelu_aux":
        assert_close(cp, arrays["aux"], pre, naive_pre, out, dtype, f"aux of {note}")


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "bias", "residual", "gelu", "gelu_aux"])
@pytest.mark.parametrize(("columns", "inner"), LAYERS)
def test_forward(cp, columns, inner, kind, dtype):
    for n in ROWS:
        check_forward(cp, n, columns, inner, DTYPES[dtype], kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["plain", "bias", "residual"])
def test_forward_to_float32(cp, kind, dtype):
    for n in ROWS:
        check_forward(cp, n, 192, 64, DTYPES[dtype], kind, DTYPES["float32"])
        check_forward(cp, n, 19, 64, DTYPES[dtype], kind, DTYPES["float32"])


def input_gradient(cp, n, columns, inner, dtype, kind, seed=0, stride=stride_of):
    """As `forward`, for the gradient of a layer's input."""
    dy, weight = normal(cp, n, columns, dtype, seed=seed), normal(cp, columns, inner, dtype, columns**-0.5, seed + 1)
    added = normal(cp, n, inner, dtype, seed=seed + 2)

    def define(kind_of_float):
        dx = product(cp, dy.astype(kind_of_float), weight.astype(kind_of_float))
        if kind == "added":
            dx = dx + added.astype(kind_of_float)
        return dx

    arrays = {
        "dy": Array(cp, n, columns, dtype, dy, stride(columns)),
        "weight": Array(cp, columns, inner, dtype, weight, stride(inner)),
        "dx": Array(cp, n, inner, dtype, stride=stride(inner)),
    }
    if kind == "added":
        arrays["added"] = Array(cp, n, inner, dtype, added, stride(inner))
    return arrays, {}, define


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "added"])
@pytest.mark.parametrize(("columns", "inner"), LAYERS)
def test_input_gradient(cp, columns, inner, kind, dtype):
    for n in ROWS:
        arrays, options, define = input_gradient(cp, n, columns, inner, DTYPES[dtype], kind)
        run(cp, linear.input_gradient, arrays, **options)
        note = f"{kind} of {n} rows, N = {columns}, K = {inner}"
        assert_close(cp, arrays["dx"], define("f8"), define("f4"), DTYPES[dtype], DTYPES[dtype], note)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "inner"), LAYERS)
def test_weight_gradient(cp, columns, inner, dtype):
    dtype, float32 = DTYPES[dtype], DTYPES["float32"]
    for n in ROWS:
        dy, x = normal(cp, n, columns, dtype, seed=0), normal(cp, n, inner, dtype, seed=1)
        arrays = {
            "dy": Array(cp, n, columns, dtype, dy, stride_of(columns)),
            "x": Array(cp, n, inner, dtype, x, stride_of(inner)),
            "dweight": Array(cp, columns, inner, float32),
        }
        run(cp, linear.weight_gradient, arrays)
        note = f"{n} rows, N = {columns}, K = {inner}"
        expected, naive = (product(cp, dy.astype(kind).T, x.astype(kind)) for kind in ("f8", "f4"))
        # One long sum loses more in float32 than the parts of a split sum do.
        assert_close(cp, arrays["dweight"], expected, naive, float32, dtype, note, 2.0**-17)


def test_gelu_is_the_tanh_form(cp):
    """Errors do not follow the difference to the form with erf."""
    from cupyx.scipy.special import erf

    for dtype in ("bfloat16", "float16"):
        arrays, options, define = forward(cp, 8192, 256, 64, DTYPES[dtype], "gelu_aux")
        run(cp, linear.forward, arrays, **options)
        y, pre = define("f8")
        difference = 0.5 * pre * (1 + erf(pre / math.sqrt(2))) - y
        share = float(((arrays["y"].values() - y) * difference).sum() / (difference**2).sum())
        assert abs(share) < 0.3, f"{dtype}: 0 is tanh, 1 is erf, got {share:.3f}"


def test_parts_of_a_matrix(cp):
    """The columns of q, k and v in [n, 3 C] are matrices too, as inputs and as results."""
    n, c, dtype = 512, 64, BFLOAT16
    x, weight = normal(cp, n, c, dtype), normal(cp, 3 * c, c, dtype, c**-0.5, 1)
    whole = Array(cp, n, 3 * c, dtype)
    steps, arrays = Steps(inputs=3, results=0), (Array(cp, n, c, dtype, x), Array(cp, 3 * c, c, dtype, weight), whole)
    a, b, d = (array.matrix(i) for i, array in enumerate(arrays))
    for part in range(3):
        rows = b._replace(pointer=b.pointer + 2 * part * c * c, rows=c)
        linear.forward(steps, a, rows, d._replace(pointer=d.pointer + 2 * part * c, columns=c))
    launch(cp, Call(steps.plan(), {}), arrays)
    expected, naive = (x.astype(kind) @ weight.astype(kind).T for kind in ("f8", "f4"))
    assert_close(cp, whole, expected, naive, dtype, dtype, "q, k and v")

    dx, y = Array(cp, n, c, dtype), whole.values()
    steps, arrays = Steps(inputs=3, results=0), (whole, arrays[1], dx)
    a, b, d = (array.matrix(i) for i, array in enumerate(arrays))
    for part in range(3):
        rows = b._replace(pointer=b.pointer + 2 * part * c * c, rows=c)
        gradient = a._replace(pointer=a.pointer + 2 * part * c, columns=c)
        linear.input_gradient(steps, gradient, rows, d, added=d if part else None)
    launch(cp, Call(steps.plan(), {}), arrays)
    total = naive = 0
    for part in range(3):
        columns = slice(part * c, part * c + c)
        total = total + y[:, columns] @ weight[columns]
        naive = rounded(cp, naive + y[:, columns].astype("f4") @ weight[columns].astype("f4"), dtype)
    assert_close(cp, dx, total, naive, dtype, dtype, "sum of the gradients of q, k and v")


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("make", "kind"),
    [(forward, kind) for kind in ("plain", "bias", "residual", "gelu", "gelu_aux")]
    + [(input_gradient, kind) for kind in ("plain", "added")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
@pytest.mark.parametrize(("columns", "inner"), LAYERS)
def test_a_row_has_the_same_bits_whatever_other_rows_there_are(cp, columns, inner, make, kind, dtype):
    many = 34816 if columns * inner < 1 << 20 else 8704
    arrays, options, _ = make(cp, many, columns, inner, DTYPES[dtype], kind)
    function, result = (linear.forward, "y") if make is forward else (linear.input_gradient, "dx")
    run(cp, function, arrays, **options)
    expected = arrays[result].bits()
    run(cp, function, arrays, **options)
    assert bool((arrays[result].bits() == expected).all()), "a second run"
    for first, n in ((0, 1), (33, 31), (1000, 512), (77, 2560)):
        part = {}
        for name, array in arrays.items():
            whole = name == "weight" or name.startswith("bias")
            values = array.values() if whole else array.values()[first : first + n]
            part[name] = Array(cp, *values.shape, array.dtype, values, array.stride)
        run(cp, function, part, **options)
        differ = int((part[result].bits() != expected[first : first + n]).sum())
        assert not differ, f"{differ} elements of rows {first} to {first + n} differ"


@pytest.mark.parametrize(("columns", "inner"), LAYERS)
def test_gradients_have_the_same_bits_twice(cp, columns, inner):
    n, float32 = 34816, DTYPES["float32"]
    dy, x = normal(cp, n, columns, BFLOAT16), normal(cp, n, inner, BFLOAT16, seed=1)
    arrays = {
        "dy": Array(cp, n, columns, BFLOAT16, dy, stride_of(columns)),
        "x": Array(cp, n, inner, BFLOAT16, x, stride_of(inner)),
        "dweight": Array(cp, columns, inner, float32),
    }
    gradient, _, _ = input_gradient(cp, n, columns, inner, BFLOAT16, "added")
    seen = set()
    for _ in range(5):
        run(cp, linear.weight_gradient, arrays)
        run(cp, linear.input_gradient, gradient)
        results = arrays["dweight"], gradient["dx"]
        seen.add(tuple(hash(array.bits().get().tobytes()) for array in results))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "inner"), LAYERS)
def test_no_sum_of_a_pinned_product_is_split(cp, columns, inner, dtype):
    """What the library says about the algorithm: SPLITK_NUM (2) is at most 1, REDUCTION_SCHEME (3) is NONE."""
    get = cublaslt.library().cublasLtMatmulAlgoConfigGetAttribute
    get.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for make, kind in ((forward, "gelu_aux"), (forward, "residual"), (input_gradient, "added")):
        arrays, options, _ = make(cp, 31, columns, inner, DTYPES[dtype], kind)
        call = call_of(linear.forward if make is forward else linear.input_gradient, arrays, **options)
        (gemm,) = call.plan.steps
        algo, found, written = cublaslt.product(gemm, cp.cuda.runtime.getDevice()).algorithm, [], ctypes.c_size_t()
        for attribute in (2, 3):
            value = ctypes.c_int32()
            assert get(ctypes.byref(algo), attribute, ctypes.byref(value), 4, ctypes.byref(written)) == 0
            found.append(value.value)
        assert found[0] <= 1 and found[1] == 0, (kind, found)


# ---- graphs, addresses, threads ------------------------------------------------------------------------------------


def two_layers(cp, n, seed):
    """fc1 and fc2 of a block as one plan: its arrays, and the result in float64."""
    c, dtype = 64, BFLOAT16
    shapes = [(n, c), (4 * c, c), (1, 4 * c), (c, 4 * c), (1, c)]
    scales = [1, c**-0.5, 1, (4 * c) ** -0.5, 1]
    values = [
        normal(cp, *shape, dtype, scale, seed + i) for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]
    x, w1, b1, w2, b2 = values
    arrays = [Array(cp, *shape, dtype, value) for shape, value in zip(shapes, values, strict=True)]
    arrays += [Array(cp, n, 4 * c, dtype), Array(cp, n, 4 * c, dtype), Array(cp, n, c, dtype)]
    hidden = rounded(cp, gelu(cp, x @ w1.T + b1), dtype)
    return arrays, x + hidden @ w2.T + b2


@functools.cache
def two_layers_plan(n):
    c, steps = 64, Steps(inputs=8, results=0)
    shapes = (n, c), (4 * c, c), (1, 4 * c), (c, 4 * c), (1, c), (n, 4 * c), (n, 4 * c), (n, c)
    x, w1, b1, w2, b2, hidden, aux, y = (Matrix(Input(i), *shape, BFLOAT16, shape[1]) for i, shape in enumerate(shapes))
    linear.forward(steps, x, w1, hidden, bias=b1.pointer, gelu=True, aux=aux)
    linear.forward(steps, hidden, w2, y, bias=b2.pointer, residual=x)
    return steps.plan()


def assert_two_layers(cp, arrays, expected):
    assert_close(cp, arrays[-1], expected, expected, BFLOAT16, BFLOAT16, "two layers", 2.0**-7)


def test_in_a_graph(cp):
    stream, call = cp.cuda.Stream(non_blocking=True), Call(two_layers_plan(512), {})
    arrays, expected = two_layers(cp, 512, 0)
    others, other_expected = two_layers(cp, 512, 10)
    cp.cuda.Device().synchronize()
    with stream:
        launch(cp, call, arrays)  # before a capture: kernels are loaded
        plain = arrays[-1].bits()
        arrays[-1].memory.fill(0xFF)
        stream.begin_capture()
        launch(cp, call, arrays)
        graph = stream.end_capture()
        launch(cp, call, others)  # the captured addresses of biases stay
        graph.launch(stream)
        stream.synchronize()
        assert bool((arrays[-1].bits() == plain).all())
        assert_two_layers(cp, arrays, expected)
        for array, other in zip(arrays[:5], others, strict=False):
            array.memory[...] = other.memory
        graph.launch(stream)
        stream.synchronize()
        assert_two_layers(cp, arrays, other_expected)


def test_addresses_change_from_run_to_run(cp):
    """Bias and aux are attributes of a descriptor, and everything else is an argument."""
    call = Call(two_layers_plan(512), {})
    sets = [two_layers(cp, 512, seed) for seed in (0, 10)]
    for arrays, expected in sets * 2:
        arrays[-1].memory.fill(0xFF)
        launch(cp, call, arrays)
        assert_two_layers(cp, arrays, expected)


def test_threads(cp):
    """Runs of one plan on several threads and streams, each with biases of its own."""
    call, sets = Call(two_layers_plan(512), {}), [two_layers(cp, 512, 10 * seed) for seed in range(4)]
    cp.cuda.Device().synchronize()
    errors = []

    def work(arrays):
        try:
            with cp.cuda.Stream(non_blocking=True) as stream:
                for _ in range(50):
                    launch(cp, call, arrays)
                stream.synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(arrays,)) for arrays, _ in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for arrays, expected in sets:
        assert_two_layers(cp, arrays, expected)


def test_a_product_that_the_library_does_not_have(cp):
    x = Array(cp, 64, 64, BFLOAT16).matrix(0)
    with pytest.raises(cublaslt.Error, match=r"has no algorithm for this product on this GPU: d = DEFAULT\(a b\)"):
        cublaslt.product(Gemm(x, x, x._replace(dtype=np.dtype("f2"))), cp.cuda.runtime.getDevice())
