# SPDX-License-Identifier: Apache-2.0
"""A plan is what a call launches, as data: kernels, grids, arguments and the bytes of a workspace.

A plan is a pure function of dtypes, strides, options, sizes and the kind of device, and never of addresses or values.
An argument that is known only when the call runs has a placeholder: `Input(0) + 16` is the address 16 bytes after the
start of the first input, and `Number("radius")` is a number that changes no grid and no size. `launcher.run` puts in
the real values and launches.

    steps = Steps(inputs=1, results=0)
    sums = steps.workspace("sums", 4 * blocks)
    steps.clear(sums, 4 * blocks)
    steps.launch(Kernel("pooling_rows", "pool_sums", "QqQ"), grid=blocks, block=256, args=(Input(0), Number("n"), sums))
    plan = steps.plan()
"""

from __future__ import annotations

import functools
import re
import struct
from typing import Any, NamedTuple

Macros = tuple[tuple[str, int], ...]

# Pieces of a workspace begin at multiples of PIECE bytes, with gaps of GAP bytes. If pieces are powers of two apart,
# APML takes up to 5 % longer (H200), and if they are at multiples of 16 only, another 1 %.
PIECE, GAP = 512, 4608


class Device(NamedTuple):
    """The properties of a GPU that plans depend on."""

    arch: str  # the target that kernels are compiled for: "sm_90a"
    multiprocessors: int
    shared_mem: int  # bytes that a block can have


# A GPU of each architecture, for building plans on a machine that has none.
DEVICES = {
    device.arch: device
    for device in (
        Device("sm_80", 108, 166912),
        Device("sm_86", 84, 101376),
        Device("sm_89", 128, 101376),
        Device("sm_90a", 132, 232448),
        Device("sm_100", 148, 232448),
        Device("sm_120", 170, 101376),
    )
}


# ---- placeholders --------------------------------------------------------------------------------------------------


class Pointer(NamedTuple):
    """An address that is known when the plan runs: the start of a memory, plus `offset`, plus the number `number`."""

    memory: str  # "input", "result" or "workspace"
    index: Any  # the number of an input or result, or the name of a piece of the workspace
    offset: int = 0
    number: str | None = None  # the name of a number, if one is added

    def __add__(self, offset: int | Number) -> Pointer:  # type: ignore[override]
        if isinstance(offset, Number):
            return self._replace(number=offset.name)
        return self._replace(offset=self.offset + offset)


@functools.cache
def Input(index: int) -> Pointer:
    """The start of an input."""
    return Pointer("input", index)


@functools.cache
def Result(index: int) -> Pointer:
    """The start of a result."""
    return Pointer("result", index)


class Number(NamedTuple):
    """A number, or the bytes of a struct, that is known when the plan runs."""

    name: str


class Packed(NamedTuple):
    """A struct by value: its fields in the format of the module struct. Pointers among them are at multiples of 8."""

    format: str
    fields: tuple[Any, ...]


# ---- steps ---------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """The kernel `function` of kernels_cu/<source>.cu, compiled with `macros`.

    `signature` has a format of the module struct for each parameter: Q is a pointer or u64, i an int, q a long long, f
    a float, d a double, and 16s a struct of 16 bytes.
    """

    source: str
    function: str
    signature: str
    macros: Macros = ()
    shared_mem: int = 0  # bytes of dynamic shared memory
    cooperative: bool = False


class Launch(NamedTuple):
    """One launch: `grid` blocks of `block` threads, in clusters of `cluster` blocks."""

    kernel: Kernel
    grid: int
    block: int
    args: tuple[Any, ...]
    cluster: int = 1


class Clear(NamedTuple):
    """A step that sets memory to zero."""

    pointer: Pointer
    size: int  # bytes


class Table(NamedTuple):
    """A step that writes the table `Number(name)` of a large batch to device memory, see gpu3d.cuda.clouds."""

    name: str
    pointer: Pointer
    rows: int


class Piece(NamedTuple):
    """A part of the workspace."""

    offset: int
    size: int


class Plan:
    """The steps of a call, and the workspace that they share. Made by `Steps.plan`; never changed.

    Attributes
    ----------
    steps : tuple of Launch, Clear and Table
    inputs, results : int
        How many memories of each kind there are.
    pieces : dict of str to Piece
        The parts of the workspace by name.
    workspace : int
        Bytes of workspace, in one allocation.
    ready : dict
        What `launcher` has prepared for each device.
    """

    __slots__ = ("inputs", "pieces", "ready", "results", "steps", "workspace")

    def __init__(
        self,
        steps: tuple[Launch | Clear | Table, ...],
        inputs: int,
        results: int,
        pieces: dict[str, Piece],
        workspace: int,
    ) -> None:
        self.steps, self.inputs, self.results = steps, inputs, results
        self.pieces, self.workspace = pieces, workspace
        self.ready: dict[int, Any] = {}


class Call(NamedTuple):
    """A plan with the numbers of one call. Memory is passed in the order inputs, results, workspace."""

    plan: Plan
    numbers: dict[str, Any]


class Steps:
    """Collects the steps of a plan in order."""

    def __init__(self, inputs: int, results: int) -> None:
        self.inputs, self.results = inputs, results
        self._steps: list[Launch | Clear | Table] = []
        self._pieces: dict[str, Piece] = {}
        self._end = 0

    def workspace(self, name: str, size: int) -> Pointer:
        """Add a piece of the workspace. If the name is taken, a number is appended."""
        if name in self._pieces:
            name = next(f"{name} {i}" for i in range(2, 1000) if f"{name} {i}" not in self._pieces)
        self._pieces[name] = Piece(self._end, size)
        if size:
            self._end += -(-size // PIECE) * PIECE + GAP
        return Pointer("workspace", name)

    def launch(self, kernel: Kernel, *, grid: int, block: int, args: tuple[Any, ...], cluster: int = 1) -> None:
        """Add a launch, or nothing if the grid is 0."""
        if grid > 0x7FFFFFFF:
            raise ValueError(f"a launch has at most 2**31 - 1 blocks, got {grid}: pass fewer points at a time.")
        if grid:
            self._steps.append(Launch(kernel, grid, block, args, cluster))

    def clear(self, pointer: Pointer, size: int) -> None:
        """Add a step that sets `size` bytes at a pointer to zero."""
        if size:
            self._steps.append(Clear(pointer, size))

    def table(self, name: str, rows: int, row_bytes: int) -> Pointer:
        """Add a step that writes the table `Number(name)`; returns its device memory."""
        pointer = self.workspace(name, rows * row_bytes)
        self._steps.append(Table(name, pointer, rows))
        return pointer

    def plan(self) -> Plan:
        """The plan of the collected steps."""
        return Plan(tuple(self._steps), self.inputs, self.results, self._pieces, self._end)


# ---- signatures ----------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """The place of a kernel's parameter among the arguments of a launch."""

    offset: int  # bytes, a multiple of 8
    size: int
    format: struct.Struct


@functools.cache
def parameters(signature: str) -> tuple[tuple[Parameter, ...], int]:
    """The parameters of a signature, and their size in bytes."""
    found, end = [], 0
    for text in re.findall(r"\d*[QqiIfds]", signature):
        packer = struct.Struct("<" + text)
        found.append(Parameter(end, packer.size, packer))
        end += -(-packer.size // 8) * 8
    if "".join(parameter.format.format[1:] for parameter in found) != signature:
        raise ValueError(f"signature must hold formats Q, q, i, I, f, d and s, got {signature!r}.")
    return tuple(found), end


@functools.cache
def fields(text: str) -> tuple[Parameter, ...]:
    """The places of the fields of a `Packed`."""
    found, at = [], 0
    for part in re.findall(r"\d*[QqiIfdsx]", text):
        packer = struct.Struct("<" + part)
        if not part.endswith("x"):
            found.append(Parameter(at, packer.size, packer))
        at += packer.size
    return tuple(found)
