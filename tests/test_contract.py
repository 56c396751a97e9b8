# SPDX-License-Identifier: Apache-2.0
"""The checks of contract.py for every op, on the CPU."""

from __future__ import annotations

import concurrent.futures
import inspect

import contract
import ml_dtypes
import numpy as np
import pytest
from contract import OPS, assert_same, run, start

import gpu3d

every = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
NUMPY = contract.numpy()


@pytest.mark.parametrize("library", ["torch", "jax", "dlpack"])
@every
def test_the_same_kind_and_bits_in_every_library(op, library):
    library = getattr(contract, library)()
    for dtype in library.dtypes:
        expected = run(op, *start(op, NUMPY, dtype=dtype), NUMPY)
        expected = {name: library.back(library.array(x)) for name, x in expected.items()}  # JAX has no int64
        assert_same(run(op, *start(op, library, dtype=dtype), library), expected, dtype)


@every
def test_memory(op, monkeypatch):
    """Inputs are not changed; results have memory of their own, and all of it is written."""
    at, arrays = start(op, NUMPY)
    expected = run(op, at, arrays, NUMPY)
    contract.assert_alive(op.tidy(expected))
    for x in arrays.values():
        x.flags.writeable = False
    before = {name: x.tobytes() for name, x in arrays.items()}
    empty = np.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        if made.dtype != object:
            made.reshape(-1).view("u1").fill(0xCD)
        return made

    monkeypatch.setattr(np, "empty", poisoned)
    results = op.call(at, **arrays)
    monkeypatch.undo()
    assert_same(results, expected)
    assert not any(np.shares_memory(x, y) for x in results.values() for y in arrays.values())
    assert {name: x.tobytes() for name, x in arrays.items()} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every
def test_layouts(op, dtype):
    contract.check_layouts(op, NUMPY, dtype)


@every
def test_batches(op):
    contract.check_batch(op, NUMPY, contract.LENGTHS, contract.OTHERS, range(4))
    contract.check_batch(op, NUMPY, contract.MANY_LENGTHS, contract.MANY_OTHERS, (0, 35, 69), "float16")
    if op.empty_clouds:
        contract.check_batch(op, NUMPY, contract.EMPTY_LENGTHS, contract.EMPTY_OTHERS, range(5))
    contract.check_nothing(op, NUMPY)


@every
def test_threads(op):
    """Concurrent calls with different lengths give the same bits as calls one after another."""
    lengths = [contract.LENGTHS[i:] for i in range(4)]
    calls = [start(op, NUMPY, a, a[::-1], seed=i) for i, a in enumerate(lengths * 2)]
    expected = [run(op, *call, NUMPY) for call in calls]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            for got, wanted in zip(threads.map(lambda call: run(op, *call, NUMPY), calls), expected, strict=True):
                assert_same(got, wanted)


def as_tensor(how):
    torch = pytest.importorskip("torch")
    ways = {
        "sparse": lambda x: torch.from_numpy(x.reshape(-1)).to_sparse(),
        "quantized": lambda x: torch.quantize_per_tensor(torch.from_numpy(x), 0.1, 0, torch.qint8),
        "meta": lambda x: torch.from_numpy(x).to("meta"),
    }
    return ways[how]


BAD = {
    "list": (lambda x: x.tolist(), "must be an array (NumPy, CuPy, torch, JAX or anything with __dlpack__), got list"),
    "masked": (lambda x: np.ma.masked_array(x), "is a masked array"),
    "complex": (lambda x: x.astype(np.complex64), "complex64"),
    "float8": (lambda x: x.astype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
    "integers": (lambda x: x.astype(np.int32), "int32"),
    "sparse": (lambda x: as_tensor("sparse")(x), "dense"),
    "quantized": (lambda x: as_tensor("quantized")(x), "quantized"),
    "meta": (lambda x: as_tensor("meta")(x), "meta"),
}


@pytest.mark.filterwarnings("ignore:.*quantize")  # a warning of torch about itself
@pytest.mark.parametrize("how", BAD)
@every
def test_what_is_refused(op, how):
    at, arrays = start(op, NUMPY)
    if op.any_dtype and how in ("complex", "float8", "integers"):
        op.call(at, **{name: BAD[how][0](x) for name, x in arrays.items()})
    else:
        contract.check_refused(op, at, arrays, *BAD[how])


def test_every_op_is_in_the_contract():
    ops = {name for name in gpu3d.__all__ if inspect.isfunction(getattr(gpu3d, name))}
    ops -= {"bucket_quality", "precompile"}  # numbers on the host; no arrays
    ops -= {"emd", "emd_value_and_grad"}  # clouds of equal lengths
    ops -= {"read_cloud", "write_cloud"}  # files
    ops -= {"chamfer_value_and_grad", "apml_value_and_grad"}  # called by chamfer and apml
    assert ops == {name.partition("-")[0] for name in OPS} - {"scatter", "gather"}


def test_the_contract_can_fail(monkeypatch):
    """The checks notice ops that break the contract."""
    op = OPS["scatter"]

    def broken(change):
        return op._replace(call=lambda at, x: {"y": change(op.call(at, x)["y"], x)})

    total = broken(lambda y, x: y + np.asarray(x).sum())
    strided = broken(lambda y, x: y if x.flags.c_contiguous else y * 2)
    unwritten = broken(lambda y, x: np.empty_like(y, shape=(0, 5)))
    with pytest.raises(AssertionError, match="cloud 0 of 4"):
        contract.check_batch(total, NUMPY, contract.LENGTHS, contract.OTHERS, range(4))
    with pytest.raises(AssertionError, match="wide"):
        contract.check_layouts(strided, NUMPY, "float32")
    with pytest.raises(AssertionError, match="y"):
        contract.assert_alive(unwritten.call(*start(op, NUMPY)[:1], **start(op, NUMPY)[1]))
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        contract.check_refused(op, *start(op, NUMPY), lambda x: x, "")
