# SPDX-License-Identifier: Apache-2.0
"""Runs steps on a GPU that no public function has for itself: the parts of a backbone."""

from __future__ import annotations

import numpy as np

from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call, Input, Result, Steps

GUARD = 256  # bytes after a result that must not be written


def run(cp, add, inputs, results, numbers=None):
    """The results, on the host, of the steps that `add(steps, inputs, results)` adds.

    Inputs are NumPy arrays, or None where one is left out. A result is (shape, dtype), or an array whose values are
    there before. Memory is poisoned. The steps run twice, on memory of their own, and must give the same bits. They
    must leave inputs alone and write nothing past the end of a result.
    """
    steps = Steps(len(inputs), len(results))
    pointers = [None if x is None else Input(i) for i, x in enumerate(inputs)]
    add(steps, pointers, [Result(i) for i in range(len(results))])
    call = Call(steps.plan(), numbers or {})
    first, second = (_run_once(cp, call, inputs, results) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()
    return first


def _run_once(cp, call, inputs, results):
    given = [cp.asarray(np.zeros(0, np.uint8) if x is None else _bytes(x)) for x in inputs]
    made = []
    for result in results:
        size = result.nbytes if isinstance(result, np.ndarray) else int(np.prod(result[0])) * result[1].itemsize
        host = np.full(size + GUARD, 0xCD, np.uint8)
        if isinstance(result, np.ndarray):
            host[:size] = _bytes(result)
        made.append(cp.asarray(host))
    workspace = cp.asarray(np.full(max(1, call.plan.workspace), 0xCD, np.uint8))
    memories = [x.data.ptr for x in (*given, *made, workspace)]
    launcher.run(call, memories, cp.cuda.runtime.getDevice(), cp.cuda.get_current_stream().ptr)
    for x, before in zip(given, inputs, strict=True):
        assert before is None or x.get().tobytes() == before.tobytes(), "an input was written"
    out = []
    for memory, result in zip(made, results, strict=True):
        shape, dtype = (result.shape, result.dtype) if isinstance(result, np.ndarray) else result
        host = memory.get()
        assert (host[-GUARD:] == 0xCD).all(), "memory past the end of a result was written"
        out.append(host[:-GUARD].view(dtype).reshape(shape))
    return out


def _bytes(x):
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def assert_accurate(got, naive, exact, note=""):
    """Assert that the error of `got` is at most twice that of the same maths done naively, both against float64.

    Few naive numbers may be rounded luckily. So their error counts as four roundings of float32 at least.
    """
    got, naive, exact = (np.asarray(x, np.float64) for x in (got, naive, exact))
    assert got.shape == naive.shape == exact.shape, note
    if not exact.size:
        return
    assert np.isfinite(got).all() and np.abs(exact).max() > 0, note
    error, least = np.abs(got - exact).max(), 2.0**-22 * np.abs(exact).max()
    bound = 2 * max(least, np.abs(naive - exact).max())
    assert error <= bound, f"{note}: error {error:.3g}, bound {bound:.3g}"
