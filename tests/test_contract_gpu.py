# SPDX-License-Identifier: Apache-2.0
"""The checks of contract.py for every op on a GPU: any stream, device and thread, CUDA graphs, every library."""

from __future__ import annotations

import concurrent.futures
import itertools

import contract
import numpy as np
import pytest
from conftest import poison
from contract import OPS, assert_same, inputs_of, run, start

pytestmark = pytest.mark.gpu

CUPY = contract.cupy
every = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
capturable = pytest.mark.parametrize(
    "op", [op for op in OPS.values() if op.capturable], ids=[name for name, op in OPS.items() if op.capturable]
)


def sizes(op):
    """One cloud, more clouds than fit into a kernel's arguments, and a cloud that is large for the op."""
    return (3000,), (40,) * 75, (op.large,)


def dtypes(op):
    return [dtype for dtype in contract.DTYPES if dtype != "float64" or op.float64_on_gpu]


def on_host(results):
    return {name: CUPY().back(x) for name, x in results.items()}


def copy_into(arrays, others):
    for name, x in arrays.items():
        x[:] = others[name]


def keep_busy(cp):
    """Enqueue about 50 ms of work on the current stream."""
    slow = cp.zeros((4096, 4096), np.float32)
    for _ in range(20):
        slow = slow @ slow


def gpu_library(name, cp):
    """Arrays of a library on CuPy's current device."""
    device = cp.cuda.Device().id
    if name == "torch":
        return contract.torch(f"cuda:{device}")
    if name == "jax":
        jax = pytest.importorskip("jax")
        found = [d for d in jax.devices() if d.platform != "cpu"]
        if not found:
            pytest.skip("this JAX has no CUDA plugin")
        return contract.jax(found[device])
    if name == "dlpack":
        known = ("float32", "float64", "float16")
        return contract.Library(
            lambda x: contract.Bare(cp.asarray(x)), lambda x: cp.from_dlpack(x).get(), cp.ndarray, known
        )
    return CUPY()


# ---- libraries, memory, layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["torch", "jax", "dlpack"])
@every
def test_the_same_kind_and_bits_in_every_library(cp, op, library):
    library = gpu_library(library, cp)
    for dtype in dtypes(op):
        if dtype in library.dtypes:
            expected = run(op, *start(op, CUPY(), dtype=dtype), CUPY())
            expected = {name: library.back(library.array(x)) for name, x in expected.items()}
            assert_same(run(op, *start(op, library, dtype=dtype), library), expected, dtype)


@every
def test_memory(cp, op):
    """Inputs are not changed; results have memory of their own, all of it is written, and no other memory is kept."""
    at, arrays = start(op, CUPY())
    expected = run(op, at, arrays, CUPY())
    contract.assert_alive(op.tidy(expected))
    before = on_host(arrays)
    for byte in (0xCD, 0xFF):  # 0xCD: not a valid index, and unlike the numbers of the tests; 0xFF: NaN
        poison(cp, byte=byte)
        results = op.call(at, **arrays)
        assert_same(on_host(results), expected)
        assert not any(cp.may_share_memory(x, y) for x in results.values() for y in arrays.values())
    assert_same(on_host(arrays), before)
    pool = cp.get_default_memory_pool()
    del results
    used = pool.used_bytes()
    for _ in range(20):
        results = op.call(at, **arrays)
        assert pool.used_bytes() - used <= sum(-(-x.nbytes // 512) * 512 for x in results.values())
        del results
    assert pool.used_bytes() == used


@every
def test_layouts(cp, op):
    for dtype in dtypes(op):
        contract.check_layouts(op, CUPY(), dtype, prepare=lambda: poison(cp))


@every
def test_batches(cp, op):
    contract.check_batch(op, CUPY(), contract.LENGTHS, contract.OTHERS, range(4))
    contract.check_batch(op, CUPY(), contract.MANY_LENGTHS, contract.MANY_OTHERS, range(70))
    for dtype in dtypes(op):
        contract.check_batch(op, CUPY(), contract.MANY_LENGTHS, contract.MANY_OTHERS, range(0, 70, 23), dtype)
    if op.empty_clouds:
        contract.check_batch(op, CUPY(), contract.EMPTY_LENGTHS, contract.EMPTY_OTHERS, range(5))
    contract.check_nothing(op, CUPY())


# ---- streams, graphs, threads, devices -----------------------------------------------------------------------------


@capturable
def test_captured_in_a_graph(cp, op):
    """An op makes no host sync, which a capture refuses, and no copy from host memory, which it would freeze."""
    stream = cp.cuda.Stream(non_blocking=True)
    for lengths, dtype in itertools.product(sizes(op), dtypes(op)):
        cp.cuda.Device().synchronize()
        with stream:
            at, arrays = start(op, CUPY(), lengths, lengths, dtype)
            other = {name: cp.asarray(x) for name, x in inputs_of(op, lengths, lengths, dtype, seed=1).items()}
            expected, expected_of_other = (run(op, at, x, CUPY()) for x in (arrays, other))
            contract.assert_alive(op.tidy(expected))
            stream.begin_capture()
            results = op.call(at, **arrays)
            graph = stream.end_capture()
            graph.launch(stream)
            assert_same(on_host(results), expected, (lengths[:2], dtype))
            copy_into(arrays, other)  # a replay reads the new contents
            graph.launch(stream)
            assert_same(on_host(results), expected_of_other, (lengths[:2], dtype))
            if arrays:
                assert any(x.tobytes() != expected_of_other[name].tobytes() for name, x in expected.items())


@every
def test_the_current_stream(cp, op):
    """Work runs after earlier work of the stream, otherwise it would read old rows; and the host does not wait."""
    for lengths in sizes(op):
        at, arrays = start(op, CUPY(), lengths, lengths)
        other = {name: cp.asarray(x) for name, x in inputs_of(op, lengths, lengths, seed=1).items()}
        expected = run(op, at, other, CUPY())
        stream = cp.cuda.Stream(non_blocking=True)
        cp.cuda.Device().synchronize()
        with stream:
            keep_busy(cp)
            copy_into(arrays, other)
            results = op.call(at, **arrays)
            assert not op.capturable or not stream.done
            stream.synchronize()
        assert_same(on_host(results), expected, lengths[:2])


@every
def test_threads(cp, op):
    """Concurrent calls, each with its own stream and lengths, give the same bits as calls one after another."""
    calls = [start(op, CUPY(), (n, 40, 17), (33, n, 9), seed=n) for n in (300, 700, 301, 1100)] * 2
    expected = [run(op, *call, CUPY()) for call in calls]
    device = cp.cuda.Device()
    device.synchronize()

    def work(call):
        with device, cp.cuda.Stream(non_blocking=True) as stream:
            for _ in range(5):
                results = op.call(call[0], **call[1])
            stream.synchronize()
            return on_host(results)

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as threads:
        for got, wanted in zip(threads.map(work, calls), expected, strict=True):
            assert_same(got, wanted)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # a new thread, whose first use of the device is a launch
        results = thread.submit(op.call, calls[0][0], **calls[0][1]).result()
        assert_same(on_host(results), expected[0])


@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
@every
def test_another_device_than_the_current_one(cp, op, library):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    here = cp.cuda.Device().id
    expected = run(op, *start(op, CUPY()), CUPY())
    with cp.cuda.Device((here + 1) % cp.cuda.runtime.getDeviceCount()) as there:
        library = gpu_library(library, cp)
        at, arrays = start(op, library)
        there.synchronize()
    results = op.call(at, **arrays)
    assert {x.__dlpack_device__()[1] for x in results.values()} == {there.id} and cp.cuda.Device().id == here
    with there:
        there.synchronize()
        got = {name: library.back(x) for name, x in results.items()}
        expected = {name: library.back(library.array(x)) for name, x in expected.items()}
    assert_same(got, expected)


# ---- errors --------------------------------------------------------------------------------------------------------


@every
def test_what_is_refused(cp, op):
    at, arrays = start(op, CUPY())
    here, there = "numpy on the CPU", f"cupy on cuda:{cp.cuda.Device().id}"
    for message in (here, there) if not op.alone else ():  # the message names both
        contract.check_refused(op, at, arrays, CUPY().back, message)
    contract.check_refused(op, at, arrays, lambda x: CUPY().back(x).tolist(), "must be an array")
    if not op.any_dtype:
        contract.check_refused(op, at, arrays, lambda x: x.astype(np.complex64), "complex64")
        contract.check_refused(op, at, arrays, lambda x: x.astype(np.int32), "int32")


def test_another_gpus_array_is_refused(cp):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    here = cp.cuda.Device().id
    there = (here + 1) % cp.cuda.runtime.getDeviceCount()

    def elsewhere(x):
        with cp.cuda.Device(there):
            return cp.asarray(CUPY().back(x))

    for op in OPS.values():
        at, arrays = start(op, CUPY())
        if not op.alone:
            contract.check_refused(op, at, arrays, elsewhere, f"cupy on cuda:{there}")
