# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop._replay: what two calls have in common, and the arguments with which it is launched again."""

import contextlib
import ctypes
import functools
import math
import struct
import sys
import threading
import types

import numpy as np
import pytest

from gpu3d import _cuda
from gpu3d.interop import _replay

PIECE, GAP = _replay.PIECE, _replay.GAP
FUNCTION = 4321
FORMATS = ("Q", "24s", "i", "Q")  # a pointer, a struct with one, a number, and a pointer that is null or not


def _kernel(launched):
    arguments = struct.Struct("<" + "".join(FORMATS))
    buffer = ctypes.create_string_buffer(arguments.size)
    offsets = [struct.calcsize("<" + "".join(FORMATS[:k])) for k in range(len(FORMATS))]
    places = tuple((at, struct.calcsize("<" + part)) for at, part in zip(offsets, FORMATS, strict=True))

    def start(*size_and_stream):
        launched.append((size_and_stream[:7], size_and_stream[7], arguments.unpack(buffer.raw[: arguments.size])))

    return _cuda.Kernel(arguments, buffer, places, 0, threading.Lock(), FUNCTION, start, (0,), None, ())


def _taken(kernel, base, number=7, grid=3, constant=2**40):
    """An input of 64 bytes, a workspace of 128 and of 40; a kernel over them, and a part that is cleared."""
    memories = [_replay.Memory(base, 64), _replay.Memory(base + 4096, 128), _replay.Memory(base + 8192, 40)]
    view = struct.pack("<QQQ", base + 4096 + 16, constant, base + 8192)
    steps = [
        _cuda.Cleared(base + 4096 + 32, 8),
        _cuda.Launched(kernel, grid, 128, 0, kernel.arguments.pack(base + 8, view, number, 0)),
    ]
    return _replay.Taken(memories, 1, steps)


@pytest.fixture
def runtime(monkeypatch):
    """The driver: what is cleared."""
    cleared = []
    fake = types.SimpleNamespace(memsetAsync=lambda *arguments: cleared.append(arguments))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=fake)))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(runtime=fake))
    monkeypatch.setattr(_cuda, "make_context_current", lambda: None)
    return cleared


def test_addresses_follow_their_memory(runtime):
    launched = []
    kernel = _kernel(launched)
    program = _replay.program_of(_taken(kernel, 10**12), _taken(kernel, 10**13 + 10**6))
    _replay.play(program, [1000, 5000], 77)
    ((size, stream, (pointer, view, number, null)),) = launched
    assert (size, stream, pointer, number, null) == ((3, 1, 1, 128, 1, 1, 0), 77, 1008, 7, 0)
    assert struct.unpack("<QQQ", view) == (5016, 2**40, 5000 + PIECE + GAP) and program.workspace == 2 * (PIECE + GAP)
    assert runtime == [(5032, 0, 8, 77)]


@pytest.mark.parametrize(
    "changes", [{"number": 8}, {"grid": 4}, {"constant": 2**41}], ids=["a number", "the grid", "a number in a struct"]
)
def test_calls_that_differ_in_more_have_no_program(runtime, changes):
    kernel = _kernel([])
    assert _replay.program_of(_taken(kernel, 10**12), _taken(kernel, 10**13)) is not None
    assert _replay.program_of(_taken(kernel, 10**12), _taken(kernel, 10**13, **changes)) is None


def test_another_kernel_other_memory_or_another_step_have_no_program(runtime):
    kernel = _kernel([])
    one, other = _taken(kernel, 10**12), _taken(kernel, 10**13)
    assert _replay.program_of(one, _taken(_kernel([]), 10**13)) is None
    assert _replay.program_of(one, other._replace(steps=other.steps[:1])) is None
    assert _replay.program_of(one, other._replace(memories=[_replay.Memory(10**13, 63), *other.memories[1:]])) is None
    foreign = other._replace(memories=[_replay.Memory(m.address + 2**20, m.size) for m in other.memories])
    assert _replay.program_of(one, foreign) is None  # addresses of memory that nobody knows of


# ---- dry runs ------------------------------------------------------------------------------------------------------


class FakeArray:
    """Of CuPy: an address, a shape, and memory from the current allocator."""

    allocator = None

    def __init__(self, shape, dtype, memory=None, strides=None):
        self.shape, self.dtype, self.size = shape, np.dtype(dtype), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.data = memory or FakeArray.allocator(self.nbytes)
        self.flags = types.SimpleNamespace(c_contiguous=True)


@pytest.fixture
def driver(monkeypatch):
    """A driver that captures; `nodes` is how many it captured, and the test says so."""
    state = types.SimpleNamespace(nodes=0, mode=0, captures=0, kernel=_kernel([]))

    @contextlib.contextmanager
    def using(allocator):
        FakeArray.allocator = allocator
        yield
        FakeArray.allocator = None

    def end_capture(stream):
        state.captures -= 1
        return 5

    def exchange(mode):
        state.mode, mode._obj.value = mode._obj.value, state.mode

    def get_nodes(graph, nodes, count):
        assert graph.value == 5 and nodes is None
        count._obj.value = state.nodes
        return 0

    runtime = types.SimpleNamespace(
        streamCaptureModeRelaxed=2,
        streamBeginCapture=lambda stream, mode: setattr(state, "captures", state.captures + 1),
        streamEndCapture=end_capture,
        graphDestroy=lambda graph: None,
        memsetAsync=lambda *arguments: None,
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        Stream=lambda non_blocking: contextlib.ExitStack(),
        UnownedMemory=lambda address, size, owner, device: types.SimpleNamespace(ptr=address, size=size),
        MemoryPointer=lambda memory, offset: memory,
        using_allocator=using,
        alloc=lambda size: FakeArray.allocator(size),
    )
    monkeypatch.setattr(contextlib.ExitStack, "ptr", 9, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, ndarray=FakeArray))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    names = {"cuThreadExchangeStreamCaptureMode": exchange, "cuGraphGetNodes": get_nodes}
    monkeypatch.setattr(_cuda, "driver", lambda: types.SimpleNamespace(**names))
    monkeypatch.setattr(_cuda, "make_context_current", lambda: None)
    return state


def _call(state, x):
    """A result, a workspace, and a second result; a part is cleared, and a kernel is over them all."""
    import cupy

    assert state.captures == 1 and state.mode == 2
    out, work, again = FakeArray((5,), "f4"), cupy.cuda.alloc(100), FakeArray((0,), "f4")
    _cuda.clear(types.SimpleNamespace(ptr=work.ptr + 64), 8)
    view = struct.pack("<QQQ", work.ptr, 2**40, out.data.ptr)
    _cuda.launch(state.kernel, grid=3, block=128, args=(x.data.ptr + 8, view, 7, again.data.ptr))
    return out, again


ARRAYS = [_replay.Array((4, 3), np.dtype(np.float32), 4)]


def test_the_extent_of_an_array():
    float32 = np.dtype(np.float32)
    for shape, strides, size in (((4, 3), None, 48), ((4, 3), (16, 4), 60), ((4, 3), (0, 4), 12), ((0, 3), (16, 4), 0)):
        assert _replay.Array(shape, float32, 0, strides).size == size


def test_a_dry_run_ends(driver):
    """What it would launch is taken down; behind it, launches are launches."""
    started = []
    kernel = _kernel(started)._replace(current_stream=lambda: types.SimpleNamespace(ptr=5))
    launch = functools.partial(_cuda.launch, kernel, block=64, args=(1, struct.pack("<QQQ", 1, 2, 3), 3, 4))
    with _cuda.dry_run() as steps:
        launch(grid=2)
        launch(grid=0)
    assert not started and [(step.grid, step.block) for step in steps] == [(2, 64)]
    launch(grid=1)
    assert len(started) == 1 and len(steps) == 1


def test_a_call_is_rehearsed(driver):
    """Nothing is launched, and the program is played on other memory."""
    started = []
    driver.kernel = _kernel(started)
    program = _replay.rehearse(lambda x: _call(driver, x), ARRAYS, 0)
    assert not started and driver.captures == 0 and driver.mode == 0 and _cuda._thread.steps is None
    assert program.workspace == PIECE + GAP
    assert program.results == (((5,), np.float32, 0, None), ((0,), np.float32, 0, None))
    _replay.play(program, [1004, 2000, 0, 3000], 77)
    ((_, stream, (pointer, view, number, null)),) = started
    assert (stream, pointer, number, null) == (77, 1012, 7, 0)
    assert struct.unpack("<QQQ", view) == (3000, 2**40, 2000)


def test_what_cannot_be_rehearsed(driver):
    """Kernels of CuPy's own, errors, results that are arguments or no arrays of their own: no program, and no trace."""

    def strange(x):
        driver.nodes = 1
        return _call(driver, x)

    def bad(x):
        raise TypeError("x must be something else.")

    def part(x):
        out, _ = _call(driver, x)
        return out, FakeArray((2,), "f4", types.SimpleNamespace(ptr=out.data.ptr))

    def wide(x):
        out, again = _call(driver, x)
        out.flags.c_contiguous = False
        return out, again

    for call in (strange, bad, lambda x: [x], part, wide):
        assert _replay.rehearse(call, ARRAYS, 0) is None
        assert driver.captures == 0 and driver.mode == 0 and _cuda._thread.steps is None
        driver.nodes = 0
    assert _replay.rehearse(lambda x: _call(driver, x), ARRAYS, 0) is not None
