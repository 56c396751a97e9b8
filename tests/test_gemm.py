# SPDX-License-Identifier: Apache-2.0
"""Products of matrices as steps of a plan, and what reaches cuBLASLt, read back from a stand-in for the library."""

from __future__ import annotations

import builtins
import ctypes
import threading

import ml_dtypes
import numpy as np
import plans
import pytest

from gpu3d._arrays import Spec
from gpu3d.cuda import cublaslt, launcher, linear
from gpu3d.cuda.plan import (
    DEVICES,
    GEMM_WORKSPACE,
    SMALL_GEMM_WORKSPACE,
    Call,
    Clear,
    Gemm,
    Input,
    Matrix,
    Result,
    Steps,
)

SM90 = DEVICES["sm_90a"]
BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype("f2"), np.dtype("f4")


def matrix(pointer, rows, columns, dtype=BFLOAT16, stride=None):
    return Matrix(pointer, rows, columns, dtype, columns if stride is None else stride)


def layer(n=512, columns=192, inner=64, dtype=BFLOAT16, inputs=6):
    """Steps, and x, weight and y of a layer: inputs 0 and 1, result 0."""
    x, weight = matrix(Input(0), n, inner, dtype), matrix(Input(1), columns, inner, dtype)
    return Steps(inputs=inputs, results=1), x, weight, matrix(Result(0), n, columns, dtype)


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epilogue"),
    [
        ({}, "DEFAULT"),
        ({"bias": Input(2)}, "BIAS"),
        ({"bias": Input(2), "gelu": True}, "GELU_BIAS"),
        ({"bias": Input(2), "gelu": True, "aux": matrix(Input(3), 512, 192)}, "GELU_AUX_BIAS"),
        ({"bias": Input(2), "residual": matrix(Input(3), 512, 192, stride=200)}, "BIAS"),
    ],
)
def test_forward_steps(options, epilogue):
    steps, x, weight, y = layer()
    linear.forward(steps, x, weight, y, **options)
    plan = steps.plan()
    (step,) = plan.steps
    assert step.epilogue == epilogue and step.pinned and step.transpose_b and not step.transpose_a
    assert step.c == options.get("residual") and step.aux == options.get("aux") and step.bias == options.get("bias")
    inputs = Spec((512, 64), BFLOAT16), Spec((192, 64), BFLOAT16), Spec((192,), BFLOAT16), Spec((512, 200), BFLOAT16)
    plans.check(Call(plan, {}), (*inputs, None, None), [Spec((512, 192), BFLOAT16)], SM90)


def test_gradient_steps():
    steps, x, weight, dy = layer(inputs=4)
    dy, dx, dweight = matrix(Input(2), 512, 192), matrix(Result(0), 512, 64), matrix(Input(3), 192, 64, FLOAT32)
    linear.input_gradient(steps, dy, weight, dx)
    linear.input_gradient(steps, dy, weight, dx, added=dx)
    linear.weight_gradient(steps, dy, x, dweight)
    plan = steps.plan()
    assert {step.epilogue for step in plan.steps} == {"DEFAULT"}
    assert [step.pinned for step in plan.steps] == [True, True, False]
    assert all(step.workspace is not None for step in plan.steps)
    assert [piece.size for piece in plan.pieces.values()] == [SMALL_GEMM_WORKSPACE, GEMM_WORKSPACE]  # shared
    shapes = ((512, 64), BFLOAT16), ((192, 64), BFLOAT16), ((512, 192), BFLOAT16), ((192, 64), FLOAT32)
    plans.check(Call(plan, {}), [Spec(*shape) for shape in shapes], [Spec((512, 64), BFLOAT16)], SM90)


def test_no_rows():
    """Nothing is computed of no rows; a sum over no rows is zero."""
    steps, x, weight, y = layer(n=0)
    linear.forward(steps, x, weight, y, bias=Input(2))
    linear.input_gradient(steps, y, weight, x)
    assert not steps.plan().steps
    linear.weight_gradient(steps, y, x, matrix(Input(3), 192, 64, FLOAT32))
    assert steps.plan().steps == (Clear(Input(3), 4 * 192 * 64),)


def test_errors():
    steps, x, weight, y = layer()
    bias = Input(2)
    with pytest.raises(ValueError, match=r"must fit together.*a is bfloat16 \[512, 64\] with rows 64 elements apart"):
        linear.forward(steps, x, weight, y._replace(rows=511))
    with pytest.raises(ValueError, match="must fit together"):
        linear.forward(steps, x, weight._replace(columns=56), y)
    with pytest.raises(ValueError, match="must fit together, with at least one product"):
        steps.gemm(Gemm(x._replace(columns=0), weight._replace(columns=0), y, transpose_b=True))
    with pytest.raises(ValueError, match="one dtype, d that dtype or float32"):
        linear.forward(steps, x, weight._replace(dtype=FLOAT16), y)
    with pytest.raises(ValueError, match="one dtype, d that dtype or float32"):
        linear.forward(steps, x._replace(dtype=FLOAT32), weight._replace(dtype=FLOAT32), y)
    with pytest.raises(ValueError, match="the shape and dtype of d"):
        linear.forward(steps, x, weight, y, residual=y._replace(dtype=FLOAT32))
    with pytest.raises(ValueError, match=r"the epilogue must be one of DEFAULT, .* with its bias and aux"):
        steps.gemm(Gemm(x, weight, y, transpose_b=True, epilogue="BIAS"))
    with pytest.raises(ValueError, match="cannot be pinned"):
        steps.gemm(Gemm(y, x, matrix(Input(3), 192, 64), transpose_a=True))
    with pytest.raises(ValueError, match="must not overlap"):
        linear.forward(steps, x._replace(stride=56), weight, y)
    with pytest.raises(
        ValueError, match=r"multiples of 16 bytes, got .* 132 elements apart .* a multiple of 8 elements"
    ):
        linear.forward(steps, matrix(Input(0), 512, 132), matrix(Input(1), 192, 132), y)
    with pytest.raises(ValueError, match="at byte 8: "):
        linear.forward(steps, x._replace(pointer=Input(0) + 8), weight, y)
    with pytest.raises(ValueError, match="a bias must begin at a multiple of 16 bytes, got byte 4"):
        linear.forward(steps, x, weight, y, bias=bias + 4)
    x4, weight4, y4 = (matrix(Input(i), *shape, FLOAT32, 68) for i, shape in enumerate([(8, 64), (60, 64), (8, 60)]))
    with pytest.raises(ValueError, match="rows of aux must be a multiple of 8 elements"):
        linear.forward(steps, x4, weight4, y4, bias=bias, gelu=True, aux=y4)
    with pytest.raises(ValueError, match="gelu needs a bias and takes no residual"):
        linear.forward(steps, x, weight, y, gelu=True)
    with pytest.raises(ValueError, match="aux is what gelu is applied to"):
        linear.forward(steps, x, weight, y, bias=bias, aux=y)
    with pytest.raises(ValueError, match="must follow one another"):
        linear.weight_gradient(steps, y, x, matrix(Input(3), 192, 64, FLOAT32, 68))


def test_rows_that_an_algorithm_is_chosen_for():
    """It depends on the layer and not on the number of its rows."""
    for columns, inner, rows in ((16, 64, 34816), (256, 64, 34816), (128, 512, 17408), (512, 2048, 4608)):
        assert cublaslt.canonical_rows(columns, inner) == rows


# ---- what reaches the library --------------------------------------------------------------------------------------


class Library:
    """Stands in for cuBLASLt. A descriptor is a number; what was set and what was asked is kept."""

    def __init__(self):
        self.made, self.attributes, self.destroyed = {}, {}, []
        self.asked, self.checked, self.done = [], [], []
        self.results, self.needs, self.status = 1, 0, 0

    def __getattr__(self, name):  # <kind>Create, <kind>Destroy, <kind>SetAttribute
        kind, _, action = name.removeprefix("cublasLt").partition("Create")
        if name.endswith("SetAttribute"):
            return self._set
        if name.endswith("Destroy"):
            return lambda descriptor: self.destroyed.append(descriptor.value)
        assert not action
        return lambda out, *args: self._create(kind, out, args)

    def _create(self, kind, out, args):
        number = 0x1000 + len(self.made)
        out._obj.value, self.made[number], self.attributes[number] = number, (kind, *args), {}

    def _set(self, descriptor, attribute, value, size):
        assert ctypes.sizeof(value._obj) == size
        self.attributes[descriptor._as_parameter_.value][attribute] = value._obj.value

    def cublasLtGetVersion(self):
        return 130000

    def _problem(self, descriptor, layouts):
        made = tuple(self.made[layout._as_parameter_.value][1:] for layout in layouts)
        return dict(self.attributes[descriptor._as_parameter_.value]), made

    def cublasLtMatmulAlgoGetHeuristic(self, handle, descriptor, a, b, c, d, preference, wanted, results, count):
        preferred = self.attributes[preference._as_parameter_.value]
        self.asked.append((*self._problem(descriptor, (a, b, c, d)), preferred))
        for i in range(self.results):
            results[i].state, results[i].algo.data[0] = (15 if i == 0 else 0), 7 + i
        count._obj.value = self.results

    def cublasLtMatmulAlgoCheck(self, handle, descriptor, a, b, c, d, algo, result):
        self.checked.append((*self._problem(descriptor, (a, b, c, d)), algo._obj.data[0]))
        result._obj.workspaceSize = self.needs
        if self.status:
            raise cublaslt.Error("no")

    def cublasLtMatmul(
        self, handle, descriptor, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, *rest
    ):
        algo, workspace, size, stream = rest
        addresses = [x.value for x in (a, b, c, d, workspace, stream)]
        scalars = alpha._obj.value, beta._obj.value
        problem = self._problem(descriptor, (a_layout, b_layout, c_layout, d_layout))
        self.done.append((addresses, scalars, problem, algo._obj.data[0], size))


@pytest.fixture
def library(monkeypatch):
    library = Library()
    library.results = 2
    monkeypatch.setattr(cublaslt, "library", lambda: library)
    monkeypatch.setattr(launcher, "_make_context_current", lambda: None)
    monkeypatch.setattr(launcher._thread, "has_context", True)
    for cache in (cublaslt.handle, cublaslt._best, cublaslt._asked, cublaslt._product, cublaslt._layout):
        cache.cache_clear()
    yield library
    for cache in (cublaslt.handle, cublaslt._best, cublaslt._asked, cublaslt._product, cublaslt._layout):
        cache.cache_clear()


def test_what_reaches_the_library(library):
    """The library's matrices are column-major: its A is W and its B is x, with rows and columns exchanged."""
    steps, x, weight, y = layer(n=512)
    x, aux = x._replace(pointer=Input(0) + 32, stride=72), matrix(Input(3), 512, 192)
    linear.forward(steps, x, weight, y, bias=Input(2) + 16, gelu=True, aux=aux)
    dweight, dy = matrix(Input(4), 192, 64, FLOAT32), matrix(Input(5), 512, 192)
    linear.weight_gradient(steps, dy, x, dweight)
    linear.input_gradient(steps, dy, weight, x, added=x)
    plan = steps.plan()
    assert plan.workspace >= GEMM_WORKSPACE
    memories = (1000, 2000, 3000, 4000, 5000, 6000, 7000, 1 << 40)
    launcher.run(Call(plan, {}), memories, 0, 77)
    forward, backward, added = library.done
    addresses, scalars, (attributes, layouts), algo, size = forward
    assert addresses == [2000, 1032, 7000, 7000, 1 << 40, 77] and scalars == (1.0, 0.0)
    assert (algo, size) == (8, SMALL_GEMM_WORKSPACE)
    assert attributes == {3: 1, 4: 0, 7: 164, 8: 3016, 11: 4000, 12: 192}
    assert layouts == ((14, 64, 192, 64), (14, 64, 512, 72), (14, 192, 512, 192), (14, 192, 512, 192))
    addresses, scalars, (attributes, layouts), algo, size = backward
    second = (1 << 40) + plan.pieces["cuBLASLt 2"].offset
    assert addresses == [1032, 6000, 5000, 5000, second, 77] and scalars == (1.0, 0.0)
    assert attributes == {3: 0, 4: 1, 7: 1} and size == GEMM_WORKSPACE
    assert layouts == ((14, 64, 512, 72), (14, 192, 512, 192), (0, 64, 192, 64), (0, 64, 192, 64))
    assert added[0] == [2000, 6000, 1032, 1032, 1 << 40, 77] and added[1] == (1.0, 1.0)


def test_how_algorithms_are_chosen(library):
    """A pinned one for a number of rows that depends on the layer alone; then it is checked for the real number."""
    for n in (512, 34816):
        steps, x, weight, y = layer(n)
        linear.forward(steps, x, weight, y, bias=Input(2))
        launcher.run(Call(steps.plan(), {}), (16, 32, 48, 64, 80, 96, 112, 512), 0, 1)
    ((attributes, layouts, preferred),) = library.asked  # once for both
    assert attributes[8] == 16 and [layout[2] for layout in layouts] == [192, 34816, 34816, 34816]
    assert preferred == {1: 0, 3: 0, 5: 16, 6: 16, 7: 16, 8: 16}
    assert [layouts[3][2] for _, layouts, _ in library.checked] == [512, 34816]
    assert {algo for *_, algo in library.checked} == {8}  # the first that the library does not rule out

    steps, x, weight, y = layer(512)
    linear.weight_gradient(steps, y, x, matrix(Input(3), 192, 64, FLOAT32))
    plan = steps.plan()
    launcher.run(Call(plan, {}), (16, 32, 48, 64, 80, 96, 112, 512), 0, 1)
    *_, (_, layouts, preferred) = library.asked
    assert [layout[2] for layout in layouts] == [512, 512, 192, 192] and len(library.checked) == 2
    assert preferred == {1: GEMM_WORKSPACE, 3: 2, 5: 16, 6: 16, 7: 16, 8: 16}


def test_addresses_change(library):
    """Bias and aux are attributes; each change of an address or the stream reaches the library."""
    steps, x, weight, y = layer()
    linear.forward(steps, x, weight, y, bias=Input(2))
    call = Call(steps.plan(), {})
    for bias, stream in ((3008, 7), (3008, 7), (3008, 8), (4000, 8)):
        launcher.run(call, (1008, 2000, bias, 16, 16, 16, 5008, 512), 0, stream)
        addresses, _, (attributes, _), *_ = library.done[-1]
        assert attributes[8] == bias and addresses == [2000, 1008, 5008, 5008, 512, stream]


def test_products_of_a_run_share_a_descriptor(library):
    """Each sets a bias of its own before it runs."""
    steps, x, weight, y = layer()
    for bias in (Input(2), Input(3)):
        linear.forward(steps, x, weight, y, bias=bias)
    launcher.run(Call(steps.plan(), {}), (1008, 2000, 3008, 4000, 16, 16, 5008, 512), 0, 7)
    assert [attributes[8] for _, _, (attributes, _), *_ in library.done] == [3008, 4000]
    assert [kind for kind, *_ in library.made.values()].count("MatmulDesc") == 2  # the other asks for the algorithm


def test_runs_share_no_descriptor(library):
    """A run during another one sets a bias of its own."""
    steps, x, weight, y = layer()
    linear.forward(steps, x, weight, y, bias=Input(2))
    plan, inner, started = steps.plan(), library.cublasLtMatmul, []

    def other():
        launcher._thread.has_context = True
        launcher.run(Call(plan, {}), (1008, 2000, 4000, 16, 16, 16, 5008, 512), 0, 8)

    def matmul(*args):
        if not started:
            started.append(1)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return inner(*args)

    library.__dict__["cublasLtMatmul"] = matmul
    launcher.run(Call(plan, {}), (1008, 2000, 3008, 16, 16, 16, 5008, 512), 0, 7)
    assert [(addresses[-1], problem[0][8]) for addresses, _, problem, *_ in library.done] == [(8, 4000), (7, 3008)]


def test_descriptors_are_destroyed(library):
    steps, x, weight, y = layer()
    linear.forward(steps, x, weight, y, bias=Input(2))
    plan = steps.plan()
    launcher.run(Call(plan, {}), (1008, 2000, 3008, 16, 16, 16, 5008, 512), 0, 7)
    plan.ready.clear()
    del plan
    for cache in (cublaslt._best, cublaslt._asked, cublaslt._product, cublaslt._layout):  # what products share
        cache.cache_clear()
    kept = [kind for number, (kind, *_) in library.made.items() if number not in library.destroyed]
    assert kept == [""]  # the handle lives on


def test_errors_name_the_product(library):
    def run():
        steps, x, weight, y = layer()
        linear.forward(steps, x, weight, y, bias=Input(2))
        launcher.run(Call(steps.plan(), {}), (1008, 2000, 3008, 16, 16, 16, 5008, 512), 0, 7)

    what = r"d = BIAS\(a b\^T\), a is bfloat16 \[.*, 64\] with rows 64 elements apart; b is bfloat16 \[192, 64\]"
    library.results = 1  # one that is ruled out
    with pytest.raises(cublaslt.Error, match=rf"cuBLASLt 130000 has no algorithm for this product on this GPU: {what}"):
        run()
    library.results, library.needs = 2, SMALL_GEMM_WORKSPACE + 1
    with pytest.raises(cublaslt.Error, match=rf"needs {SMALL_GEMM_WORKSPACE + 1} bytes of workspace: {what}"):
        run()
    library.status = 15
    with pytest.raises(cublaslt.Error, match=rf"for 34816 rows does not take this number of rows: {what}"):
        run()


def test_a_missing_library(monkeypatch):
    inner = builtins.__import__

    def no_pathfinder(name, *args, **kwargs):
        if name.startswith("cuda"):
            raise ImportError(name)
        return inner(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pathfinder)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    cublaslt.library.cache_clear()
    with pytest.raises(ImportError, match="cuBLASLt, and it was not found: pip install nvidia-cublas"):
        cublaslt.library()
