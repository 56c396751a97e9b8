# SPDX-License-Identifier: Apache-2.0
"""What a call launched, taken down, to be launched again on other memory.

Between Python's call and the GPU stand checks, wrapped arrays and layouts, which depend on shapes, dtypes, strides and
numbers alone, and are the same in every step of a training. So a call is taken down twice, on two sets of memory: what
differs in the arguments of its kernels is an address, and says of what. `play` packs other addresses in and launches,
by play.c where the machine has a C compiler, in some 3 us beside the driver's; Python takes that for each launch.

A program holds for calls that launch the same whatever the values of their arrays are. `rehearse` takes a call down
without doing it, on memory that does not exist. There a value that the host wants to read is an error, and work that is
not of `_cuda.launch` does not pass unnoticed: what it lets pass is the whole of what the call does.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _cuda
from gpu3d.interop import _native

PIECE = 512  # bytes: pieces of a workspace begin at multiples, as in CuPy's pool; at those of 16 APML takes 1 % longer
GAP = 4608  # bytes between them: pieces that lie powers of two apart cost APML up to 5 % (H200)


class Memory(NamedTuple):
    """A piece of device memory: an input, a result, or what was allocated on the way."""

    address: int
    size: int  # bytes


class Taken(NamedTuple):
    """A call taken down: its memory, and what it launched and cleared."""

    memories: Sequence[Memory]
    given: int  # the first so many are inputs and results; the others are a workspace
    steps: Sequence[_cuda.Launched | _cuda.Cleared]
    results: tuple[Array, ...] = ()


class _Move(NamedTuple):
    """Where an address lies in a kernel's arguments, and of which memory it is."""

    at: int  # bytes from the arguments' beginning
    memory: int
    offset: int  # from the memory's beginning


class _Launch(NamedTuple):
    kernel: _cuda.Kernel
    grid: int
    block: int
    shared_mem: int
    arguments: bytes
    moves: tuple[_Move, ...]

    @property
    def words(self) -> list[int]:
        """As play.c reads it."""
        kernel, bytes = self.kernel, self.arguments + b"\0" * (-len(self.arguments) % 8)
        launch = [kernel.function, not kernel.extra, self.grid, self.block, self.shared_mem]
        counts = [len(self.arguments), len(kernel.places), len(self.moves)]
        places, moves = [at for at, _ in kernel.places], [word for move in self.moves for word in move]
        return [*launch, *counts, *places, *moves, *struct.unpack(f"={len(bytes) // 8}Q", bytes)]


class _Clear(NamedTuple):
    memory: int
    offset: int
    size: int
    start: Callable[..., None]  # cudaMemsetAsync

    @property
    def words(self) -> list[int]:
        return [0, self.memory, self.offset, self.size]


class Program(NamedTuple):
    """What a call does to memory that is named when it is played."""

    steps: tuple[_Launch | _Clear, ...]
    workspace: int  # bytes, in one piece
    results: tuple[Array, ...] = ()
    words: Any = None  # the steps as play.c reads them; None: Python plays it


# ---- dry runs ------------------------------------------------------------------------------------------------------

NOWHERE = 1 << 44, 3 << 44  # where the memory of two dry runs would begin: what differs is an address
APART = 1 << 10  # bytes, at least, from one piece of it to the next, which begins at a multiple of them


class Array(NamedTuple):
    """What of an array in device memory a call's launches depend on."""

    shape: tuple[int, ...]
    dtype: np.dtype
    odd: int = 0  # its address mod 16
    strides: tuple[int, ...] | None = None  # bytes, none negative; None: it is contiguous

    @property
    def size(self) -> int:
        """Bytes from its first element to the end of its last."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape) * self.dtype.itemsize
        return sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)) + self.dtype.itemsize


class _Nowhere:
    """A CuPy allocator of memory that does not exist, for a dry run."""

    apart = True  # results that are returned together have an allocation each, as where the program is played

    def __init__(self, begin: int, device: int) -> None:
        self.end, self.device = begin, device
        self.memories: list[Memory] = []

    def __call__(self, size: int, odd: int = 0) -> Any:
        import cupy

        address = self.end + odd if size else 0
        self.memories.append(Memory(address, size))
        self.end += (odd + size + APART) // APART * APART
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, size, None, self.device), 0)


def rehearse(call: Callable[..., Sequence[Any]], arrays: Sequence[Array], device: int) -> Program | None:
    """The program of a call of CuPy arrays, found out without doing it, on the current device, which is `device`.

    Its memories are the arrays, the results in order, and a workspace. None: it does not launch the same always, or a
    result shares its memory; or it raises an error, which it will again where it is done.
    """
    try:
        one, other = [_rehearsed(call, arrays, _Nowhere(begin, device)) for begin in NOWHERE]
    except Exception:
        return None
    return None if one is None or other is None else program_of(one, other)


def _rehearsed(call: Callable[..., Sequence[Any]], arrays: Sequence[Array], allocator: _Nowhere) -> Taken | None:
    import cupy

    inputs = [cupy.ndarray(x.shape, x.dtype, allocator(x.size, x.odd), x.strides) for x in arrays]
    given = list(allocator.memories)
    with cupy.cuda.using_allocator(allocator), _cuda.dry_run() as steps:
        results = call(*inputs)
    allocated = {memory.address: memory for memory in allocator.memories[len(given) :]}
    for result in results:
        memory = allocated.pop(result.data.ptr, None) if result.size else Memory(0, 0)
        if memory is None or not result.flags.c_contiguous or memory.size - result.nbytes >= 16:
            return None
        given.append(memory)
    made = tuple([Array(result.shape, result.dtype) for result in results])
    return Taken([*given, *allocated.values()], len(given), steps, made)


# ---- programs ------------------------------------------------------------------------------------------------------


def program_of(one: Taken, other: Taken) -> Program | None:
    """What both did; None where they differ in more than where their memories lie."""
    sizes = [[memory.size for memory in taken.memories] for taken in (one, other)]
    if sizes[0] != sizes[1] or len(one.steps) != len(other.steps):
        return None
    from cupy.cuda import runtime

    pieces = ((size + PIECE - 1) // PIECE * PIECE + GAP if size else 0 for size in sizes[0][one.given :])
    offsets = list(itertools.accumulate(pieces, initial=0))

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
    return Program(tuple(steps), offsets[-1], one.results, _native.program(steps))


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
            moves.append(_Move(position, *found))
        tail = slice(at + size // 8 * 8, at + size)
        if a.arguments[end:at] != b.arguments[end:at] or a.arguments[tail] != b.arguments[tail]:
            return None
        end = at + size
    return _Launch(*a[:5], tuple(moves))


def play(program: Program, addresses: Sequence[int], stream: int) -> None:
    """Launches it on the current device; `addresses` are those of inputs, results and workspace, if it takes one."""
    _cuda.make_context_current()
    if program.words is not None:
        _native.play(program.words, addresses, stream)
        return
    for step in program.steps:
        if isinstance(step, _Clear):
            step.start(addresses[step.memory] + step.offset, 0, step.size, stream)
            continue
        kernel, size = step.kernel, (step.grid, 1, 1, step.block, 1, 1, step.shared_mem)
        with kernel.lock:
            ctypes.memmove(kernel.buffer, step.arguments, len(step.arguments))
            for at, memory, offset in step.moves:
                struct.pack_into("=Q", kernel.buffer, at, addresses[memory] + offset)
            kernel.start(*size, stream, kernel.parameters, *kernel.extra)
