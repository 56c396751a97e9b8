# SPDX-License-Identifier: Apache-2.0
"""Runs plans: puts addresses and numbers into the arguments of their launches, and passes them to CUDA's driver.

At its first run on a device a plan is prepared: the handles of its kernels, the bytes of its arguments, and the places
of pointers and numbers in them. This is kept with the plan. A long plan is prepared in parts, so that the GPU runs the
first ones while the others are prepared. Each run uses prepared copies of its own, so calls of several threads do not
share memory. The driver is called through ctypes, which releases the GIL, because the driver waits when its queue is
full.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import struct
import threading
from collections.abc import ItemsView, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d.cuda import clouds, compiler, cublaslt
from gpu3d.cuda.plan import (
    Branch,
    Call,
    Device,
    Gemm,
    Launch,
    Number,
    Packed,
    Parameter,
    Plan,
    Pointer,
    Table,
    TensorMap,
    Wait,
    fields,
    parameters,
)

# ---- the driver ----------------------------------------------------------------------------------------------------


@functools.cache
def driver() -> ctypes.CDLL:
    """CUDA's driver."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


# CUlaunchConfig: gridDimX, .., blockDimZ, sharedMemBytes; CUstream; CUlaunchAttribute *, and how many
_CONFIG, _STREAM, _ATTRIBUTES = struct.Struct("<7I4xQQI4x"), 32, 40
# CUlaunchAttribute: CUlaunchAttributeID, and of the 64 bytes of the value those that are used
_ATTRIBUTE = struct.Struct("<I4x3I52x")
_CLUSTER, _COOPERATIVE, _EARLY = 4, 2, 6  # CUlaunchAttributeID; the last: PROGRAMMATIC_STREAM_SERIALIZATION


class _Thread(threading.local):
    has_context = False


_thread = _Thread()


def _make_context_current() -> None:
    """Give the calling thread a context to launch on. A new thread, such as torch's for the backward, has none."""
    from cupy.cuda import runtime

    runtime.setDevice(runtime.getDevice())
    _thread.has_context = True


@functools.cache
def device(ordinal: int) -> Device:
    """The description of a GPU of this machine that plans depend on."""
    import cupy

    attributes = cupy.cuda.Device(ordinal).attributes
    arch = compiler.device_arch(ordinal)
    return Device(arch, attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


@functools.cache
def _starts_early(ordinal: int) -> bool:
    """Whether early kernels start early: on Hopper, where it was measured, if the driver can capture such launches."""
    version = ctypes.c_int()
    driver().cuDriverGetVersion(ctypes.byref(version))
    return device(ordinal).arch == "sm_90a" and version.value >= 12030


# ---- preparing -----------------------------------------------------------------------------------------------------


FEW = 8  # pointers to one memory that are written together with those to other memories
PART = 64  # steps that are prepared at a time: at least so many, and until nothing runs on branch 1


class _Template(NamedTuple):
    """The first part of a plan prepared for a device: the bytes of its arguments, and what goes where."""

    buffer: bytes
    memories: int
    # Pointers of memories that have few, which are written whenever a memory has moved: word of the buffer, memory,
    # offset. That takes less time than to find out which memories have moved.
    few: tuple[tuple[int, int, int], ...]
    # Memories that have many pointers, each with (word of the buffer, offset) of its pointers. Items of a dict, because
    # a tuple for each of a thousand pointers would set off Python's garbage collector.
    many: tuple[tuple[int, ItemsView[int, int]], ...]
    moved: tuple[tuple[int, int, int, str], ...]  # word, memory, offset, and the name of the number to add
    maps: tuple[tuple[int, int, int, TensorMap], ...]  # byte of the buffer, memory, offset
    numbers: tuple[tuple[str, Any, int], ...]  # name, packer (None for a table of clouds), byte of the buffer
    streams: tuple[tuple[int, ...], tuple[int, ...]]  # 8-byte words of the buffer that hold each branch's stream
    own: np.ndarray  # words that hold places in the buffer itself, counted from its start
    # What is called, and where in the buffer. A function of ours: the bytes of its config and of its table of
    # parameters. Others: the word of an address, with the stream behind it; of the addresses of a product; and of the
    # streams of a Wait, first that of its own branch.
    launches: tuple[tuple[Any, int, int], ...]
    modules: tuple[Any, ...]  # keeps the kernels loaded
    large: bool  # whether the plan writes the table of a large batch
    rest: Plan | None  # the other parts
    spare: list[_Ready]  # copies that no run uses now


class _Ready:
    """A copy of a template's buffer for one run at a time. A run writes only what differs from the run before.

    Attributes
    ----------
    buffer, words, bytes
        The copy, and views of it as 8-byte words and as bytes.
    calls : list of (function, arguments) and (None, Table and the word of its address)
    kept : list
        The stream of branch 1, and the events that branches wait for.
    memories, stream, numbers
        The values of the run before.
    """

    __slots__ = ("buffer", "bytes", "calls", "kept", "memories", "numbers", "stream", "words")

    def __init__(self, buffer: bytearray, memories: int) -> None:
        self.buffer, self.bytes = buffer, memoryview(buffer)
        self.words = self.bytes.cast("Q")
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.kept: list[Any] = []
        self.memories: Sequence[Any] = [None] * memories
        self.stream: int | None = None
        self.numbers: dict[str, Any] | None = None


class _Argument(ctypes.c_void_p):
    """A word of a buffer, which a call reads when it is made. Elements of an array of c_void_p itself would be ints."""


def _template(plan: Plan, ordinal: int) -> _Template:
    first, workspace, pieces = {"input": 0, "result": plan.inputs}, plan.inputs + plan.results, plan.pieces
    buffer = bytearray()
    pointers: tuple[dict[int, int], ...] = tuple([{} for _ in range(workspace + 1)])
    moved: list[tuple[int, int, int, str]] = []
    numbers: list[tuple[str, Any, int]] = []
    maps: list[tuple[int, int, int, TensorMap]] = []
    streams: tuple[list[int], list[int]] = [], []
    branch, joined = 0, True
    own: list[int] = []
    launches: list[tuple[Any, int, int]] = []
    modules: list[Any] = []

    def place_of(pointer: Pointer) -> tuple[int, int]:
        """The memory of a pointer, and the offset in it."""
        kind, index, offset, _ = pointer
        if kind == "workspace":
            return workspace, pieces[index].offset + offset
        return first[kind] + index, offset

    def packed(values: Sequence[Any], form: tuple[Sequence[Parameter], struct.Struct], at: int) -> bytes:
        """The values as bytes for byte `at` of the buffer, with 0 for pointers and numbers, which are noted."""
        places, packer = form
        found: list[Any] = []
        for value, place in zip(values, places, strict=True):
            what = type(value)
            if what is Pointer:
                memory, offset = place_of(value)
                word = (at + place.offset) // 8
                if value.number is None:
                    pointers[memory][word] = offset
                else:
                    moved.append((word, memory, offset, value.number))
                found.append(0)
            elif what is TensorMap:
                maps.append((at + place.offset, *place_of(value.pointer), value))
                found.append(b"")
            elif what is Packed:
                found.append(packed(value.fields, fields(value.format), at + place.offset))
            elif what is Number:
                packs = None if place.format.format == clouds.STRUCT else place.format
                numbers.append((value.name, packs, at + place.offset))
                found.append(place.zero)
            else:
                found.append(0 if value is None else value)
        return packer.pack(*found)

    def add(values: Sequence[Any], signature: str) -> int:
        """Add values to the buffer; returns where they begin, a multiple of 8 bytes."""
        at = len(buffer)
        buffer.extend(packed(values, parameters(signature), at))
        return at

    if any(isinstance(step, Gemm) for step in plan.steps):
        _make_context_current()  # for cuBLASLt's handle
    large = any(isinstance(step, Table) for step in plan.steps)
    rest = None
    for number, step in enumerate(plan.steps):
        if number >= PART and joined and not large:
            rest = Plan(plan.steps[number:], plan.inputs, plan.results, pieces, plan.workspace)
            break
        if isinstance(step, Launch):
            kernel = step.kernel
            function, module = compiler.load(kernel, ordinal)
            modules.append(module)
            args = add(step.args, kernel.signature)
            places, _ = parameters(kernel.signature)
            table = len(buffer)
            buffer.extend(struct.pack(f"{len(places)}Q", *[args + place.offset for place in places]))
            config = len(buffer)
            attributes = []
            if kernel.cooperative:
                attributes.append(_ATTRIBUTE.pack(_COOPERATIVE, 1, 0, 0))
            if kernel.early and _starts_early(ordinal):
                attributes.append(_ATTRIBUTE.pack(_EARLY, 1, 0, 0))
            if step.cluster > 1:
                attributes.append(_ATTRIBUTE.pack(_CLUSTER, step.cluster, 1, 1))
            sizes = step.grid, 1, 1, step.block, 1, 1, kernel.shared_mem
            buffer.extend(_CONFIG.pack(*sizes, 0, config + _CONFIG.size, len(attributes)) + b"".join(attributes))
            own += [*range(table // 8, config // 8), (config + _ATTRIBUTES) // 8]
            streams[branch].append((config + _STREAM) // 8)
            launches.append((ctypes.c_void_p(function), config, table))
        elif isinstance(step, Branch):
            branch, joined = step.number, False
        elif isinstance(step, Wait):
            at = add((0, 0), "QQ") // 8
            streams[branch].append(at)
            streams[1 - branch].append(at + 1)
            launches.append((step, at, 0))
            joined = not branch
        elif isinstance(step, Gemm):
            at = add((*step.pointers, 0), "Q" * cublaslt.WORDS) // 8
            streams[branch].append(at + cublaslt.WORDS - 1)
            launches.append((cublaslt.product(step, ordinal), at, 0))
        else:  # Clear or Table
            at = add((step.pointer, 0), "QQ") // 8
            streams[branch].append(at + 1)
            launches.append((step, at, 0))
    if not plan.workspace:  # there is none, and its pieces are empty
        pointers[workspace].clear()
    few = [(i, places) for i, places in enumerate(pointers) if len(places) <= FEW]
    return _Template(
        buffer=bytes(buffer),
        memories=len(pointers),
        few=tuple([(word, i, places[word]) for i, places in few for word in places]),
        many=tuple([(i, places.items()) for i, places in enumerate(pointers) if len(places) > FEW]),
        moved=tuple(moved),
        maps=tuple(maps),
        numbers=tuple(numbers),
        streams=(tuple(streams[0]), tuple(streams[1])),
        own=np.array(own, np.intp),
        launches=tuple(launches),
        modules=tuple(modules),
        large=large,
        rest=rest,
        spare=[],
    )


def _ready(template: _Template) -> _Ready:
    """A new copy, with the addresses of its own parts in it."""
    ready = _Ready(bytearray(template.buffer), template.memories)
    words = (_Argument * len(ready.words)).from_buffer(ready.buffer)
    np.asarray(ready.words)[template.own] += ctypes.addressof(words)
    if template.streams[1]:
        beside = _cupy_cuda().Stream(non_blocking=True)
        ready.kept.append(beside)
        for word in template.streams[1]:
            ready.words[word] = beside.ptr
    descriptor = functools.cache(cublaslt.descriptor)  # those of this copy
    for what, at, table in template.launches:
        if isinstance(what, ctypes.c_void_p):
            config, parameters = ctypes.byref(words, at), ctypes.byref(words, table)
            ready.calls.append((driver().cuLaunchKernelEx, (config, what, parameters, None)))
        elif isinstance(what, cublaslt.Product):
            ready.calls += cublaslt.calls(what, descriptor(what.operation), words[at : at + cublaslt.WORDS])
        elif isinstance(what, Table):
            ready.calls.append((None, (what, at)))
        elif isinstance(what, Wait):
            event = _cupy_cuda().Event(disable_timing=True)
            ready.kept.append(event)
            waiting, other = words[at : at + 2]
            ready.calls.append((driver().cuEventRecord, (ctypes.c_void_p(event.ptr), other)))
            ready.calls.append((driver().cuStreamWaitEvent, (waiting, ctypes.c_void_p(event.ptr), 0)))
        else:
            address, stream = words[at : at + 2]
            value, size = ctypes.c_ubyte(what.value), ctypes.c_size_t(what.size)
            ready.calls.append((driver().cuMemsetD8Async, (address, value, size, stream)))
    return ready


# ---- running -------------------------------------------------------------------------------------------------------


def run(call: Call, memories: Sequence[int], ordinal: int, stream: int) -> None:
    """Launch a call's plan on a stream of the current device, which is `ordinal`.

    `memories` are the addresses of inputs, results and, if the plan has one, workspace, in this order.
    """
    plan, numbers = call
    template = plan.ready.get(ordinal)
    if template is None:
        template = plan.ready[ordinal] = _template(plan, ordinal)
    if not _thread.has_context:
        _make_context_current()
    try:
        ready = template.spare.pop()
    except IndexError:
        ready = _ready(template)
    # The same call again usually gets the same memory, and one comparison of lists takes less than one for each memory.
    if memories != ready.memories or numbers is not ready.numbers or stream != ready.stream:
        _fill(template, ready, numbers, memories, stream)
    for function, args in ready.calls:
        if function is None:
            table, word = args
            write_table(numbers[table.name].rows, ready.words[word], ordinal, ready.words[word + 1])
        elif status := function(*args):
            _raise(status)
    template.spare.append(ready)
    if template.rest is not None:
        run(Call(template.rest, numbers), memories, ordinal, stream)


def _fill(template: _Template, ready: _Ready, numbers: dict[str, Any], memories: Sequence[int], stream: int) -> None:
    """Write what differs from the run before: addresses, numbers and the stream."""
    words, others, moved = ready.words, numbers is not ready.numbers, memories != ready.memories
    if moved:
        for word, memory, offset in template.few:
            words[word] = memories[memory] + offset
        for memory, places in template.many:
            address = memories[memory]
            if address != ready.memories[memory]:
                for word, offset in places:
                    words[word] = address + offset
        for at, memory, offset, what in template.maps:
            ready.bytes[at : at + 128] = _tensor_map(memories[memory] + offset, what)
        ready.memories = memories[:]
    if stream != ready.stream:
        ready.stream = stream
        for word in template.streams[0]:
            words[word] = stream
    if moved or others:
        for word, memory, offset, name in template.moved:
            words[word] = memories[memory] + offset + numbers[name]
    if others:
        for name, packer, at in template.numbers:
            if packer is None:
                inlined = numbers[name].inlined
                ready.bytes[at : at + len(inlined)] = inlined
            else:
                packer.pack_into(ready.buffer, at, numbers[name])
        if not template.large:  # a large table is not kept, because it takes megabytes
            ready.numbers = numbers


@functools.lru_cache(maxsize=256)
def _tensor_map(address: int, what: TensorMap) -> bytes:
    """The CUtensorMap of an array at an address."""
    room = (ctypes.c_uint64 * 24)()
    at = -ctypes.addressof(room) % 64  # the driver wants it at a multiple of 64
    words, ints = ctypes.c_uint64, ctypes.c_uint32
    swizzle = {16: 1, 32: 2, 64: 3}[what.width]  # CUtensorMapSwizzle, by columns
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + at),
        1,  # CU_TENSOR_MAP_DATA_TYPE_UINT16
        3,
        ctypes.c_void_p(address),
        (words * 3)(what.columns, what.slices, 2**31),
        (words * 2)(what.slice, what.row),
        (ints * 3)(what.width, 1, what.box),
        (ints * 3)(1, 1, 1),
        0,  # CU_TENSOR_MAP_INTERLEAVE_NONE
        swizzle,
        3,  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
        0,  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: zeros
    )
    if status:
        _raise(status)
    return bytes(room)[at : at + 128]


class _Writer:
    """Prepared launches of `clouds.write` for one table at a time, whose arguments are filled together."""

    def __init__(self, ordinal: int) -> None:
        template = _template(clouds.write, ordinal)
        ready = _ready(template)
        self.calls, self.stream, self.modules = ready.calls, ready.stream, template.modules
        self.words, self.streams = np.asarray(ready.words), np.array(template.streams[0])
        places = template.numbers[: len(template.numbers) // clouds.WRITES]  # of the first launch
        formats = (np.uint8, (clouds.PART_BYTES,)), "<i4", "<i4", "<u8"
        layout = {
            "names": [name for name, _, _ in places],
            "formats": formats,
            "offsets": [at for _, _, at in places],
            "itemsize": len(template.buffer) // clouds.WRITES,
        }
        arguments: Any = np.frombuffer(ready.buffer, np.dtype(layout))  # type: ignore[call-overload]
        arguments["first"] = np.arange(clouds.WRITES) * clouds.CLOUDS_A_LAUNCH
        self.part, self.rows, self.table = (arguments[name] for name in ("part", "rows", "table"))

    def write(self, rows: np.ndarray, address: int, stream: int) -> None:
        """Write the bytes of at most WRITES parts to an address."""
        whole, rest = divmod(len(rows), clouds.PART_BYTES)
        launches = whole + bool(rest)
        if whole:
            self.part[:whole] = rows[: whole * clouds.PART_BYTES].reshape(whole, clouds.PART_BYTES)
            self.rows[:whole] = clouds.CLOUDS_A_LAUNCH
        if rest:
            self.part[whole, :rest] = rows[whole * clouds.PART_BYTES :]
            self.rows[whole] = rest // clouds.ROW_BYTES
        self.table[:launches] = address
        if stream != self.stream:
            self.words[self.streams] = self.stream = stream
        for function, args in self.calls[:launches]:
            if status := function(*args):
                _raise(status)


@functools.cache
def _writers(ordinal: int) -> list[_Writer]:
    """Those of a device that no thread uses now."""
    return []


def write_table(table: bytes, address: int, ordinal: int, stream: int) -> None:
    """Write the rows of a table to an address of the current device, which is `ordinal`."""
    if not _thread.has_context:
        _make_context_current()
    spare = _writers(ordinal)
    try:
        writer = spare.pop()
    except IndexError:
        writer = _Writer(ordinal)
    rows, most = np.frombuffer(table, np.uint8), clouds.WRITES * clouds.PART_BYTES
    for first in range(0, len(rows), most):
        writer.write(rows[first : first + most], address + first, stream)
    spare.append(writer)


def _raise(status: int) -> None:
    from cupy.cuda import driver as errors

    raise errors.CUDADriverError(status)


def launch(
    call: Call,
    inputs: Sequence[_arrays.Given | None],
    results: Sequence[_arrays.Spec | None],
    origin: _arrays.Origin | None = None,
) -> list[Any]:
    """Run a call on the GPU of the first input, or of `origin`, and on the current stream of that library.

    Results and workspace are memory of that library. A result whose spec is None is not made.
    """
    if origin is None:
        origin = inputs[0].origin  # type: ignore[union-attr]
    addresses: list[int] = []
    lent: list[Any] = []
    for given in inputs:
        if given is None:
            addresses.append(0)
        else:
            addresses.append(given.address)
            if given.origin.lent:
                lent.append(given.array)
    made = launch_at(call, addresses, results, origin)
    if lent:
        with _cupy_cuda().Device(origin.device):
            _keep(lent, _arrays.current_stream(origin))
    if origin.library == "jax":
        return [None if array is None else _arrays.leave(array, origin) for array in made]
    return made


def launch_at(
    call: Call, addresses: list[int], results: Sequence[_arrays.Spec | None], origin: _arrays.Origin
) -> list[Any]:
    """`launch` for the addresses of inputs. Results are torch's tensors for torch, otherwise CuPy's arrays."""
    ordinal: Any = origin.device
    cuda = _cupy_cuda()
    if cuda.runtime.getDevice() != ordinal:
        with cuda.Device(ordinal):
            return launch_at(call, addresses, results, origin)
    made, _workspace = _arrays.empty(results, call.plan.workspace, origin, addresses)
    run(call, addresses, ordinal, _arrays.current_stream(origin))
    return made


def refuse_capture(function: str, origin: _arrays.Origin) -> None:
    """Raise an error if the current stream is captured, because `function` reads a number on the host."""
    cuda = _cupy_cuda()
    with cuda.Device(origin.device):
        if cuda.runtime.streamIsCapturing(_arrays.current_stream(origin)):
            raise RuntimeError(
                f"{function} reads on the host how many rows its results have, so it cannot be captured in a CUDA "
                "graph: call it before the capture."
            )


@functools.cache
def _cupy_cuda() -> Any:
    import cupy

    return cupy.cuda


# ---- memory that other libraries lend ------------------------------------------------------------------------------


def _keep(arrays: list[Any], stream: int) -> None:
    """Keep arrays until the GPU has done what is in the stream now.

    JAX counts on the host who uses an array, and orders only its own streams. An array that the caller drops after a
    call would be overwritten before the GPU has read it.
    """
    cuda = _cupy_cuda()
    if not cuda.runtime.streamIsCapturing(stream):  # whoever runs a graph keeps its inputs
        event = cuda.Event(block=True, disable_timing=True)
        cuda.runtime.eventRecord(event.ptr, stream)
        _kept().put((event, arrays))


@functools.cache
def _kept() -> queue.SimpleQueue[Any]:
    """The arrays that `_keep` keeps, with their events. A thread waits for the events and lets go of the arrays."""
    kept: queue.SimpleQueue[Any] = queue.SimpleQueue()
    failed = _cupy_cuda().runtime.CUDARuntimeError

    def let_go() -> None:
        while True:
            event, arrays = kept.get()
            with contextlib.suppress(failed):  # the caller meets the same error at its next call
                event.synchronize()
            del event, arrays

    threading.Thread(target=let_go, name="gpu3d: inputs of other libraries", daemon=True).start()
    return kept
