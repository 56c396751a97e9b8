# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop._replay: what two calls have in common, and the arguments with which it is launched again."""

import contextlib
import ctypes
import struct
import sys
import threading
import types

import pytest

from gpu3d import _cuda
from gpu3d.interop import _replay

FORMATS = ("Q", "24s", "i", "Q")  # a pointer, a struct with one, a number, and a pointer that is null or not


def _kernel(launched):
    arguments = struct.Struct("<" + "".join(FORMATS))
    buffer = ctypes.create_string_buffer(arguments.size)
    offsets = [struct.calcsize("<" + "".join(FORMATS[:k])) for k in range(len(FORMATS))]
    places = tuple((at, struct.calcsize("<" + part)) for at, part in zip(offsets, FORMATS, strict=True))

    def start(*size_and_stream):
        launched.append((size_and_stream[:7], size_and_stream[7], arguments.unpack(buffer.raw[: arguments.size])))

    return _cuda.Kernel(arguments, buffer, places, 0, threading.Lock(), start, (), None, ())


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
    assert struct.unpack("<QQQ", view) == (5016, 2**40, 5128) and program.workspace == 128 + 48
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


def test_launches_are_taken_down_where_asked_for(monkeypatch, runtime):
    launched = []
    kernel = _kernel(launched)._replace(current_stream=lambda: types.SimpleNamespace(ptr=5))
    view = struct.pack("<QQQ", 1, 2, 3)
    with _cuda.taking_down() as steps, contextlib.suppress(struct.error):
        _cuda.launch(kernel, grid=2, block=64, args=(1, view, 3, 4))
        _cuda.launch(kernel, grid=0, block=64, args=(1, view, 3, 4))
    _cuda.launch(kernel, grid=1, block=64, args=(1, view, 3, 4))
    assert [(step.grid, step.block) for step in steps] == [(2, 64)]
    assert len(launched) == 2


def test_what_a_call_is_learnt_from():
    """The third of a kind, once, and not of large ones; a book holds so many."""
    book = _replay.Book()
    assert [book.is_due("a", 10) for _ in range(2)] == [False, False] and not book.is_due("b", 10)
    assert not any(book.is_due("large", _replay.LARGEST + 1) for _ in range(5))
    assert book.is_due("a", 10)
    known = [None, None, True]
    book.write("a", "a program", lambda: known.pop(0))
    for _ in range(2):
        assert not book.is_due("a", 10) and "a" not in book.played  # the GPU is still at it
    assert not book.is_due("a", 10) and book.played == {"a": "a program"}
    book.write("b", "another", lambda: False)
    assert not any(book.is_due("b", 10) for _ in range(5)) and book.played["b"] is None  # and it is not tried again
    for kind in range(2 * _replay.KINDS):
        book.write(kind, "a program", lambda: True)
        assert not book.is_due(kind, 10)
    assert len(book.played) <= _replay.KINDS
