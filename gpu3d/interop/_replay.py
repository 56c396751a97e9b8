# SPDX-License-Identifier: Apache-2.0
"""What a call launched, taken down, to be launched again on other memory.

Between Python's call and the GPU stand checks, wrapped arrays and layouts, which depend on shapes, dtypes, strides and
numbers alone, and are the same in every step of a training. So a call is taken down twice, on two sets of memory: what
differs in the arguments of its kernels is an address, and says of what. `play` packs other addresses in and launches.

A program holds for calls that launch the same whatever the values of their arrays are: `Taken` cannot see what was read
from the device, nor kernels that are not of `_cuda.launch`. Who plays programs compares the results of one with the
call's own, in memory that held something else, before relying on it; the host does not wait for that.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpu3d import _cuda

LEARNED_AT = 3  # calls of a kind: batches of ever other lengths are not worth what learning takes
KINDS = 1024  # that are kept
LARGEST = 1 << 26  # bytes of inputs: over more of them the GPU takes longer than the host, and copies are not small


class Book:
    """How calls of the kinds that came often are played; None: they cannot be."""

    def __init__(self) -> None:
        self.played: dict[Any, Any] = {}
        self._calls: dict[Any, int] = {}
        self._tried: dict[Any, tuple[Any, Callable[[], bool | None]]] = {}

    def is_due(self, kind: Any, size: int) -> bool:
        """Whether this call of a kind that is not played, with `size` bytes of inputs, is the one to learn from.

        Where one was learnt from, it is asked whether what was tried is known to be right, and played from then on.
        """
        if size > LARGEST or kind in self.played:
            return False
        if kind in self._tried:
            self._settle(kind)
            return False
        if len(self._calls) > KINDS:
            self._calls.clear()
        count = self._calls[kind] = self._calls.get(kind, 0) + 1
        return count == LEARNED_AT

    def write(self, kind: Any, played: Any, alike: Callable[[], bool | None]) -> None:
        """From when `alike` says that what was tried gave the call's results; None: the GPU is still at it."""
        if len(self._tried) >= KINDS:
            self._tried.clear()
        self._tried[kind] = played, alike
        self._calls.pop(kind, None)

    def _settle(self, kind: Any) -> None:
        played, alike = self._tried[kind]
        outcome = alike()
        if outcome is None:
            return
        if len(self.played) >= KINDS:
            self.played.clear()
        self.played[kind] = played if outcome else None
        self._tried.pop(kind, None)


class Memory(NamedTuple):
    """A piece of device memory: an input, a result, or what was allocated on the way."""

    address: int
    size: int  # bytes


class Taken(NamedTuple):
    """A call taken down: its memory, and what it launched and cleared."""

    memories: Sequence[Memory]
    given: int  # the first so many are inputs and results; the others are a workspace
    steps: Sequence[_cuda.Launched | _cuda.Cleared]


class _Move(NamedTuple):
    """Where an address lies in a kernel's arguments, and of which memory it is."""

    at: Any  # ctypes.c_uint64 in the kernel's buffer
    memory: int
    offset: int  # from the memory's beginning


class _Launch(NamedTuple):
    kernel: _cuda.Kernel
    size: tuple[int, ...]  # of the launch, as the driver takes it
    arguments: bytes
    moves: tuple[_Move, ...]


class _Clear(NamedTuple):
    memory: int
    offset: int
    size: int
    start: Callable[..., None]  # cudaMemsetAsync


class Program(NamedTuple):
    """What a call does to memory that is named when it is played."""

    steps: tuple[_Launch | _Clear, ...]
    workspace: int  # bytes, in one piece


def program_of(one: Taken, other: Taken) -> Program | None:
    """What both did; None where they differ in more than where their memories lie."""
    sizes = [[memory.size for memory in taken.memories] for taken in (one, other)]
    if sizes[0] != sizes[1] or len(one.steps) != len(other.steps):
        return None
    from cupy.cuda import runtime

    offsets = _cuda.ends(*sizes[0][one.given :])

    def place(a: int, b: int) -> tuple[int, int] | None:
        """The memory that address a is of in one call and b in the other, and its offset."""
        for i, (before, after) in enumerate(zip(one.memories, other.memories, strict=True)):
            offset = b - after.address
            if 0 <= offset < after.size and a - before.address == offset:
                return (i, offset) if i < one.given else (one.given, offsets[i - one.given] + offset)
        return None

    steps: list[_Launch | _Clear] = []
    for a, b in zip(one.steps, other.steps, strict=True):
        step: _Launch | _Clear | None = None
        if isinstance(a, _cuda.Cleared) and isinstance(b, _cuda.Cleared):
            at = place(a.address, b.address)
            step = _Clear(*at, a.size, runtime.memsetAsync) if at is not None and a.size == b.size else None
        elif isinstance(a, _cuda.Launched) and isinstance(b, _cuda.Launched):
            step = _launch(a, b, place)
        if step is None:
            return None
        steps.append(step)
    return Program(tuple(steps), offsets[-1])


def _launch(
    a: _cuda.Launched, b: _cuda.Launched, place: Callable[[int, int], tuple[int, int] | None]
) -> _Launch | None:
    """What both launched, if all that differs is addresses that `place` knows."""
    if a.kernel is not b.kernel or (a.grid, a.block, a.shared_mem) != (b.grid, b.block, b.shared_mem):
        return None
    moves, end = [], 0
    for at, size in a.kernel.places:
        for position in range(at, at + size - 7, 8):
            before, after = (struct.unpack_from("<Q", launched.arguments, position)[0] for launched in (a, b))
            if before == after:
                continue
            found = place(before, after)
            if found is None:
                return None
            moves.append(_Move(ctypes.c_uint64.from_buffer(a.kernel.buffer, position), *found))
        tail = slice(at + size // 8 * 8, at + size)
        if a.arguments[end:at] != b.arguments[end:at] or a.arguments[tail] != b.arguments[tail]:
            return None
        end = at + size
    return _Launch(a.kernel, (a.grid, 1, 1, a.block, 1, 1, a.shared_mem), a.arguments, tuple(moves))


def play(program: Program, addresses: Sequence[int], stream: int) -> None:
    """Launches it on the current device; `addresses` are those of inputs, results and workspace, if it takes one."""
    _cuda.make_context_current()
    for step in program.steps:
        if isinstance(step, _Clear):
            step.start(addresses[step.memory] + step.offset, 0, step.size, stream)
            continue
        kernel = step.kernel
        with kernel.lock:
            ctypes.memmove(kernel.buffer, step.arguments, len(step.arguments))
            for at, memory, offset in step.moves:
                at.value = addresses[memory] + offset
            kernel.start(*step.size, stream, kernel.parameters, *kernel.extra)
