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

Besides kernels of ours, a step can be a product of matrices by cuBLASLt (`Gemm`).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32

Macros = tuple[tuple[str, int], ...]

# Pieces of a workspace begin at multiples of PIECE bytes, with gaps of GAP bytes. If pieces are powers of two apart,
# APML takes up to 5 % longer (H200), and if they are at multiples of 16 only, another 1 %.
PIECE, GAP = 512, 4608

# Bytes that cuBLASLt may use beside the matrices: for products whose sums it may split, of which NVIDIA recommends 32
# MiB on Hopper and Blackwell, and for others. Products of a branch share them, since they run one after another.
GEMM_WORKSPACE, SMALL_GEMM_WORKSPACE = 32 << 20, 1 << 20
ALIGNMENT = 16  # bytes: what matrices of a Gemm, and their rows, begin at multiples of


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
        memory, index, before, number = self
        if isinstance(offset, Number):
            return Pointer(memory, index, before, offset.name)
        return Pointer(memory, index, before + offset, number)


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


class TensorMap(NamedTuple):
    """A CUtensorMap by value, for Hopper's copies of boxes: of an array [rows, slices, columns] of 16-bit words.

    A box has `box` rows of one slice, and `width` columns of them. In shared memory its rows are swizzled over their
    bytes, and columns past the last are zero. Nobody checks the number of rows.
    """

    pointer: Pointer  # a multiple of 16
    slices: int
    columns: int
    row: int  # bytes from one row to the next, a multiple of 16
    slice: int
    width: int  # 16, 32 or 64
    box: int


# ---- steps ---------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """The kernel `function` of kernels_cu/<source>.cu, compiled with `macros`.

    `signature` has a format of the module struct for each parameter: Q is a pointer or u64, i an int, q a long long, f
    a float, d a double, and 16s a struct of 16 bytes.

    An `early` kernel may start while the launch ahead of it in the stream still runs. It promises to wait for the end
    of that launch before it touches memory or returns, as kernels_cu/early.cuh says; it is never cooperative.
    """

    source: str
    function: str
    signature: str
    macros: Macros = ()
    shared_mem: int = 0  # bytes of dynamic shared memory
    cooperative: bool = False
    early: bool = False


class Launch(NamedTuple):
    """One launch: `grid` blocks of `block` threads, in clusters of `cluster` blocks."""

    kernel: Kernel
    grid: int
    block: int
    args: tuple[Any, ...]
    cluster: int = 1


class Clear(NamedTuple):
    """A step that sets each byte of some memory to a value."""

    pointer: Pointer
    size: int  # bytes
    value: int = 0


class Table(NamedTuple):
    """A step that writes the table `Number(name)` of a large batch to device memory, see gpu3d.cuda.clouds."""

    name: str
    pointer: Pointer
    rows: int


class Matrix(NamedTuple):
    """A row-major matrix in memory."""

    pointer: Pointer
    rows: int
    columns: int
    dtype: np.dtype  # float32, float16 or bfloat16
    stride: int  # elements from a row to the next

    def __str__(self) -> str:
        return f"{self.dtype} [{self.rows}, {self.columns}] with rows {self.stride} elements apart"


class Gemm(NamedTuple):
    """A product of matrices by cuBLASLt: d = epilogue(a b + c), where a, b or both may be transposed.

    `epilogue` is a name of cublasLtEpilogue_t: DEFAULT, BIAS, GELU_BIAS or GELU_AUX_BIAS. `bias` has the dtype of d and
    an element for each column of d. `aux` has the shape and dtype of d.

    If a product is `pinned`, its algorithm does not depend on the number of rows of d, and no sum is split. So a row
    of d has the same bits whatever other rows there are.
    """

    a: Matrix
    b: Matrix
    d: Matrix
    transpose_a: bool = False
    transpose_b: bool = False
    c: Matrix | None = None
    epilogue: str = "DEFAULT"
    bias: Pointer | None = None
    aux: Matrix | None = None
    pinned: bool = True
    workspace: Pointer | None = None

    def __str__(self) -> str:
        names = ("a", self.a), ("b", self.b), ("c", self.c), ("d", self.d), ("aux", self.aux)
        ops = f"d = {self.epilogue}(a{'^T' * self.transpose_a} b{'^T' * self.transpose_b}{' + c' * bool(self.c)}), "
        return ops + "; ".join(f"{name} is {matrix}" for name, matrix in names if matrix)

    @property
    def pointers(self) -> tuple[Pointer | None, ...]:
        """The addresses that cuBLASLt needs, in the order in which `cublaslt.calls` takes them."""
        a, b, d, _, _, c, _, bias, aux, _, workspace = self
        c = d if c is None else c
        return b.pointer, a.pointer, c.pointer, d.pointer, workspace, bias, aux and aux.pointer


class Branch(NamedTuple):
    """The steps that follow run on this branch: 0 is the caller's stream, and 1 is a stream beside it."""

    number: int


class Wait(NamedTuple):
    """The steps that follow on this branch wait for all steps so far of the other one."""


Step = Launch | Clear | Table | Gemm | Branch | Wait


class Piece(NamedTuple):
    """A part of the workspace."""

    offset: int
    size: int


class Plan:
    """The steps of a call, and the workspace that they share. Made by `Steps.plan`; never changed.

    Attributes
    ----------
    steps : tuple of Launch, Clear, Table, Gemm, Branch and Wait
    inputs, results : int
        How many memories of each kind there are.
    pieces : dict of str to Piece
        The parts of the workspace by name.
    workspace : int
        Bytes of workspace, in one allocation.
    ready : dict
        What `launcher` has prepared for each device: the first steps and, behind them, a plan of the others.
    """

    __slots__ = ("inputs", "pieces", "ready", "results", "steps", "workspace")

    def __init__(
        self,
        steps: tuple[Step, ...],
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
        self._steps: list[Step] = []
        self._sizes: dict[str, int] = {}  # of the pieces of the workspace
        self._branch = 0
        self._gemm_workspaces: dict[tuple[int, int], Pointer] = {}

    def workspace(self, name: str, size: int) -> Pointer:
        """Add a piece of the workspace. If the name is taken, a number is appended."""
        if name in self._sizes:
            name = next(f"{name} {i}" for i in range(2, 1000) if f"{name} {i}" not in self._sizes)
        self._sizes[name] = size
        return Pointer("workspace", name)

    def launch(self, kernel: Kernel, *, grid: int, block: int, args: tuple[Any, ...], cluster: int = 1) -> None:
        """Add a launch, or nothing if the grid is 0."""
        if grid > 0x7FFFFFFF:
            raise ValueError(f"a launch has at most 2**31 - 1 blocks, got {grid}: pass fewer points at a time.")
        if grid:
            self._steps.append(Launch(kernel, grid, block, args, cluster))

    def clear(self, pointer: Pointer, size: int, value: int = 0) -> None:
        """Add a step that sets `size` bytes at a pointer to zero, or to a value."""
        if size:
            self._steps.append(Clear(pointer, size, value))

    def table(self, name: str, rows: int, row_bytes: int) -> Pointer:
        """Add a step that writes the table `Number(name)`; returns its device memory."""
        pointer = self.workspace(name, rows * row_bytes)
        self._steps.append(Table(name, pointer, rows))
        return pointer

    def gemm(self, gemm: Gemm) -> None:
        """Add a product of matrices, or nothing if its result has no elements. The workspace is put in here."""
        _check_gemm(gemm)
        if gemm.d.rows and gemm.d.columns:
            size = SMALL_GEMM_WORKSPACE if gemm.pinned else GEMM_WORKSPACE
            key = self._branch, size
            if key not in self._gemm_workspaces:
                self._gemm_workspaces[key] = self.workspace("cuBLASLt", size)
            self._steps.append(Gemm(*gemm[:-1], self._gemm_workspaces[key]))

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Steps that are added in this context may run beside later ones, until the next `join`."""
        before, self._branch = self._branch, 1
        if not before:
            self._steps += [Branch(1), Wait()]
        yield
        if not before:
            self._branch = 0
            self._steps.append(Branch(0))

    def join(self) -> None:
        """Let the following steps wait for all that were added `beside`."""
        self._steps.append(Wait())

    def plan(self, *, share: bool = False) -> Plan:
        """The plan of the collected steps.

        With `share`, pieces of the workspace that are not needed at the same time may share memory. A step then finds
        in its pieces what earlier steps of the plan wrote, and nothing from before.
        """
        pieces, end = _shared(self._sizes, _spans(self._steps)) if share else _apart(self._sizes)
        return Plan(tuple(self._steps), self.inputs, self.results, pieces, end)


# Whether an epilogue has a bias (or a bias gradient), and whether it has aux.
EPILOGUES = {
    "DEFAULT": (False, False),
    "BIAS": (True, False),
    "GELU_BIAS": (True, False),
    "GELU_AUX_BIAS": (True, True),
}


def _check_gemm(gemm: Gemm) -> None:
    a, b, d = gemm.a, gemm.b, gemm.d
    rows, inner = (a.columns, a.rows) if gemm.transpose_a else (a.rows, a.columns)
    depth, columns = (b.columns, b.rows) if gemm.transpose_b else (b.rows, b.columns)
    others = [matrix for matrix in (gemm.c, gemm.aux) if matrix is not None]
    if (d.rows, d.columns) != (rows, columns) or inner != depth or not inner:
        raise ValueError(f"the shapes of a product must fit together, with at least one product in a sum, got {gemm}.")
    if any(x[1:4] != d[1:4] for x in others) or a.dtype != b.dtype or d.dtype not in (a.dtype, FLOAT32):
        raise ValueError(
            f"a and b must have one dtype, d that dtype or float32, c and aux the shape and dtype of d, got {gemm}."
        )
    if (gemm.bias is not None, gemm.aux is not None) != EPILOGUES.get(gemm.epilogue):
        raise ValueError(f"the epilogue must be one of {', '.join(EPILOGUES)}, with its bias and aux, got {gemm}.")
    if gemm.pinned and gemm.transpose_a:
        raise ValueError("a product with a transposed cannot be pinned: its sums are over rows.")
    for matrix in (a, b, d, *others):
        pointer, _, columns, dtype, stride = matrix
        if stride < columns:
            raise ValueError(f"the rows of a matrix must not overlap, got {matrix}.")
        if stride * dtype.itemsize % ALIGNMENT or pointer.offset % ALIGNMENT:
            raise ValueError(
                f"matrices of a product, and their rows, must begin at multiples of {ALIGNMENT} bytes, got {matrix} at "
                f"byte {pointer.offset}: put the rows a multiple of {ALIGNMENT // dtype.itemsize} "
                "elements apart."
            )
    if gemm.bias is not None and gemm.bias.offset % ALIGNMENT:
        raise ValueError(f"a bias must begin at a multiple of {ALIGNMENT} bytes, got byte {gemm.bias.offset}.")
    if gemm.aux is not None and gemm.aux.stride % 8:
        raise ValueError(f"the rows of aux must be a multiple of 8 elements apart, got {gemm.aux}.")


# ---- the workspace -------------------------------------------------------------------------------------------------


def _room(size: int) -> int:
    """Bytes from the beginning of a piece to that of the next."""
    return -(-size // PIECE) * PIECE + GAP


def _apart(sizes: dict[str, int]) -> tuple[dict[str, Piece], int]:
    """Places for pieces, one behind another. Also the end."""
    placed: dict[str, Piece] = {}
    end = 0
    for name, size in sizes.items():
        placed[name] = Piece(end, size)
        if size:
            end += _room(size)
    return placed, end


def _pieces(values: Iterable[Any]) -> list[str]:
    """The pieces of the workspace that are among the arguments of a step."""
    found = []
    for value in values:
        what = type(value)
        if what is Pointer:
            if value.memory == "workspace":
                found.append(value.index)
        elif what is Packed:
            found += _pieces(value.fields)
    return found


def _spans(steps: list[Step]) -> dict[str, tuple[int, int]]:
    """The first and the last step during which each piece of the workspace is used.

    A step of branch 1 may run at any time between the last wait there, and the next one on branch 0.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    beside: set[str] = set()  # pieces that branch 1 uses
    branch = fork = 0
    for number, step in enumerate(steps):
        values: tuple[Any, ...] = ()
        if isinstance(step, Launch):
            values = step.args
        elif isinstance(step, Gemm):
            values = step.pointers
        elif isinstance(step, Branch):
            branch = step.number
        elif not isinstance(step, Wait):
            values = (step.pointer,)
        elif branch:
            fork = number
        else:
            last |= dict.fromkeys(beside, number)
            beside.clear()
        for name in _pieces(values):
            last[name] = number
            if branch:
                first[name] = min(fork, first.get(name, fork))
                beside.add(name)
            elif name not in first:
                first[name] = number
    return {name: (number, last[name]) for name, number in first.items()}


def _shared(sizes: dict[str, int], spans: dict[str, tuple[int, int]]) -> tuple[dict[str, Piece], int]:
    """Places for pieces, the largest first: each at the lowest offset that is free while it is used. Also the end."""
    placed: dict[str, Piece] = {}
    taken: list[tuple[int, int, int, int]] = []  # offset, end, first step, last step; by offset
    most = 0
    for name in sorted(spans, key=sizes.__getitem__, reverse=True):
        size, (first, last) = sizes[name], spans[name]
        room = _room(size)
        offset = 0
        for start, end, since, until in taken:
            if since <= last and until >= first and end > offset:
                if start - offset >= room:
                    break
                offset = end
        placed[name] = Piece(offset, size)
        if size:
            bisect.insort(taken, (offset, offset + room, first, last))
            most = max(most, offset + room)
    return placed, most


# ---- signatures ----------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """The place of a kernel's parameter among the arguments of a launch, or of a field in a struct."""

    offset: int  # bytes; a multiple of 8 for a parameter
    size: int
    format: struct.Struct
    zero: int | bytes  # what the format packs to bytes that are 0


@functools.cache
def parameters(signature: str) -> tuple[tuple[Parameter, ...], struct.Struct]:
    """The parameters of a signature, and a struct of all of them. They begin at multiples of 8 bytes."""
    found = re.findall(r"\d*[QqiIfds]", signature)
    if "".join(found) != signature:
        raise ValueError(f"signature must hold formats Q, q, i, I, f, d and s, got {signature!r}.")
    return fields("".join([f"{text}{-struct.calcsize('<' + text) % 8}x" for text in found]))


@functools.cache
def fields(text: str) -> tuple[tuple[Parameter, ...], struct.Struct]:
    """The places of the fields of a `Packed`, and a struct of all of them."""
    found, at = [], 0
    for part in re.findall(r"\d*[QqiIfdsx]", text):
        packer = struct.Struct("<" + part)
        if not part.endswith("x"):
            found.append(Parameter(at, packer.size, packer, b"" if part.endswith("s") else 0))
        at += packer.size
    return tuple(found), struct.Struct("<" + text.removeprefix("<"))
