# SPDX-License-Identifier: Apache-2.0
"""Runs plans: puts addresses and numbers into the arguments of their launches, and passes them to CUDA's driver.

At its first run on a device a plan is prepared: the handles of its kernels, the bytes of its arguments, and the places
of pointers and numbers in them. This is kept with the plan. Each run uses a prepared copy of its own, so calls of
several threads do not share memory. The driver is called through ctypes, which releases the GIL, because the driver
waits when its queue is full.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu3d import _arrays
from gpu3d.cuda import clouds, compiler, cublaslt
from gpu3d.cuda.plan import (
    Branch,
    Call,
    Clear,
    Device,
    Gemm,
    Launch,
    Number,
    Packed,
    Plan,
    Pointer,
    Table,
    Wait,
    fields,
    parameters,
)

# ---- the driver ----------------------------------------------------------------------------------------------------


@functools.cache
def driver() -> ctypes.CDLL:
    """CUDA's driver."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: {CUlaunchAttributeID id; char pad[4]; CUlaunchAttributeValue value;}, 72 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig: {unsigned gridDimX, .., blockDimZ, sharedMemBytes; CUstream; CUlaunchAttribute *; unsigned}."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


_CLUSTER, _COOPERATIVE = 4, 2  # CUlaunchAttributeID
_STREAM = _Config.stream.offset


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


# ---- preparing -----------------------------------------------------------------------------------------------------


class _Template(NamedTuple):
    """A plan prepared for a device: the bytes of its arguments, and what goes where."""

    buffer: bytes
    pointers: tuple[tuple[tuple[int, int], ...], ...]  # per memory: (word of the buffer, offset) of its pointers
    moved: tuple[tuple[int, int, int, str], ...]  # word, memory, offset, and the name of the number to add
    numbers: tuple[tuple[str, Any, int], ...]  # name, packer (None for a table of clouds), byte of the buffer
    streams: tuple[tuple[int, ...], tuple[int, ...]]  # 8-byte words of the buffer that hold each branch's stream
    # (config, function, parameter table), (address, Clear), (Table, address), (Matmul, address), and
    # (Wait, a word with the stream of this branch, and one with that of the other)
    launches: tuple[Any, ...]
    tables: tuple[tuple[int, tuple[int, ...]], ...]  # word of a table of parameters, and words of its arguments
    modules: tuple[Any, ...]  # keeps the kernels loaded
    large: bool  # whether the plan writes the table of a large batch
    spare: list[_Ready]  # copies that no run uses now


class _Ready:
    """A copy of a template's buffer for one run at a time. A run writes only what differs from the run before.

    Attributes
    ----------
    buffer, words, bytes
        The copy, and views of it as 8-byte words and as bytes.
    calls : list of (function of the driver, arguments) and (None, Table and the byte where its address lies)
    kept : list
        The stream of branch 1, and the events that branches wait for.
    changes : list of (function, arguments)
        What a product of matrices needs after addresses were changed.
    memories, stream, numbers
        The values of the run before.
    """

    __slots__ = ("buffer", "bytes", "calls", "changes", "kept", "memories", "numbers", "stream", "words")

    def __init__(self, buffer: Any, size: int, memories: int) -> None:
        self.buffer, self.bytes = buffer, memoryview(buffer).cast("B")
        self.words = self.bytes[:size].cast("Q")
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.kept: list[Any] = []
        self.changes: list[tuple[Any, tuple[Any, ...]]] = []
        self.memories: Sequence[Any] = [None] * memories
        self.stream: int | None = None
        self.numbers: dict[str, Any] | None = None


def _template(plan: Plan, ordinal: int) -> _Template:
    first = {"input": 0, "result": plan.inputs}
    buffer = bytearray()
    pointers: list[list[tuple[int, int]]] = [[] for _ in range(plan.inputs + plan.results + 1)]
    moved: list[tuple[int, int, int, str]] = []
    numbers: list[tuple[str, Any, int]] = []
    streams: tuple[list[int], list[int]] = [], []
    branch = 0
    launches: list[Any] = []
    tables: list[tuple[int, tuple[int, ...]]] = []
    modules: list[Any] = []

    def put_pointer(pointer: Pointer, at: int) -> None:
        if pointer.memory == "workspace":
            memory, offset = plan.inputs + plan.results, plan.pieces[pointer.index].offset + pointer.offset
        else:
            memory, offset = first[pointer.memory] + pointer.index, pointer.offset
        if pointer.number is None:
            pointers[memory].append((at // 8, offset))
        else:
            moved.append((at // 8, memory, offset, pointer.number))

    def put(value: Any, packer: Any, at: int) -> None:
        if isinstance(value, Pointer):
            put_pointer(value, at)
        elif isinstance(value, Packed):
            for field, place in zip(value.fields, fields(value.format), strict=True):
                put(field, place.format, at + place.offset)
        elif isinstance(value, Number):
            numbers.append((value.name, None if packer.format == clouds.STRUCT else packer, at))
        else:
            packer.pack_into(buffer, at, 0 if value is None else value)

    def grow(size: int) -> int:
        at = len(buffer)
        buffer.extend(bytes(-(-size // 8) * 8))
        return at

    for step in plan.steps:
        if isinstance(step, Launch):
            kernel = step.kernel
            handle, module = compiler.load(kernel, ordinal)
            modules.append(module)
            parts, size = parameters(kernel.signature)
            start = grow(size)
            for value, place in zip(step.args, parts, strict=True):
                put(value, place.format, start + place.offset)
            tables.append((grow(8 * len(parts)), tuple([start + place.offset for place in parts])))
            attributes = []
            if kernel.cooperative:
                attributes.append(_Attribute(_COOPERATIVE, b"", (ctypes.c_uint * 16)(1)))
            if step.cluster > 1:
                attributes.append(_Attribute(_CLUSTER, b"", (ctypes.c_uint * 16)(step.cluster, 1, 1)))
            config = _Config((step.grid, 1, 1), (step.block, 1, 1), kernel.shared_mem, None, None, len(attributes))
            at = grow(ctypes.sizeof(_Config))
            buffer[at : at + ctypes.sizeof(_Config)] = bytes(config)
            streams[branch].append((at + _STREAM) // 8)
            for attribute in attributes:
                extra = grow(ctypes.sizeof(_Attribute))
                buffer[extra : extra + ctypes.sizeof(_Attribute)] = bytes(attribute)
            launches.append((at, handle, tables[-1][0]))
        elif isinstance(step, Clear):
            at = grow(16)
            put_pointer(step.pointer, at)
            streams[branch].append(at // 8 + 1)
            launches.append((at, step))
        elif isinstance(step, Gemm):
            _make_context_current()
            at = grow(8 * cublaslt.WORDS)
            for i, address in enumerate(cublaslt.pointers(step)):
                if address is not None:
                    put_pointer(address, at + 8 * i)
            streams[branch].append(at // 8 + cublaslt.WORDS - 1)
            launches.append((cublaslt.Matmul(step, ordinal), at))
        elif isinstance(step, Branch):
            branch = step.number
        elif isinstance(step, Wait):
            at = grow(16)
            for i, number in enumerate((branch, 1 - branch)):
                streams[number].append(at // 8 + i)
            launches.append((step, at))
        else:
            at = grow(16)
            put_pointer(step.pointer, at)
            streams[branch].append(at // 8 + 1)
            launches.append((step, at))
    large = any(isinstance(step, Table) for step in plan.steps)
    places = tuple(map(tuple, pointers)), tuple(moved), tuple(numbers), (tuple(streams[0]), tuple(streams[1]))
    return _Template(bytes(buffer), *places, tuple(launches), tuple(tables), tuple(modules), large, [])


def _ready(template: _Template) -> _Ready:
    """A new copy, with the addresses of its own arguments in it."""
    size = len(template.buffer)
    ready = _Ready(ctypes.create_string_buffer(template.buffer, max(1, size)), size, len(template.pointers))
    buffer, base = ready.buffer, ctypes.addressof(ready.buffer)
    if template.streams[1]:
        beside = _cupy_cuda().Stream(non_blocking=True)
        ready.kept.append(beside)
        for word in template.streams[1]:
            ready.words[word] = beside.ptr
    for table, places in template.tables:
        for i, place in enumerate(places):
            ready.words[table // 8 + i] = base + place
    for launch in template.launches:
        if isinstance(launch[0], Table):
            ready.calls.append((None, launch))
        elif isinstance(launch[0], Wait):
            event = _cupy_cuda().Event(disable_timing=True)
            ready.kept.append(event)
            waiting, other = (ctypes.c_void_p.from_buffer(buffer, launch[1] + 8 * i) for i in range(2))
            ready.calls.append((driver().cuEventRecord, (ctypes.c_void_p(event.ptr), other)))
            ready.calls.append((driver().cuStreamWaitEvent, (waiting, ctypes.c_void_p(event.ptr), 0)))
        elif isinstance(launch[0], cublaslt.Matmul):
            changes, call = launch[0].calls(buffer, launch[1])
            ready.changes += changes
            ready.calls.append(call)
        elif len(launch) == 2:
            at, clear = launch
            address = ctypes.c_uint64.from_buffer(buffer, at)
            stream = ctypes.c_void_p.from_buffer(buffer, at + 8)
            args = address, ctypes.c_ubyte(clear.value), ctypes.c_size_t(clear.size), stream
            ready.calls.append((driver().cuMemsetD8Async, args))
        else:
            at, function, table = launch
            count = _Config.from_buffer(buffer, at).count
            if count:
                attributes = (at + ctypes.sizeof(_Config) + 7) // 8 * 8
                _Config.from_buffer(buffer, at).attributes = base + attributes
            pointers = [ctypes.c_void_p(value) for value in (base + at, function, base + table)]
            ready.calls.append((driver().cuLaunchKernelEx, (*pointers, None)))
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
            table, at = args
            write_table(numbers[table.name].parts, ready.words[at // 8], ordinal, ready.words[at // 8 + 1])
        elif status := function(*args):
            _raise(status)
    template.spare.append(ready)


def _fill(template: _Template, ready: _Ready, numbers: dict[str, Any], memories: Sequence[int], stream: int) -> None:
    """Write what differs from the run before: addresses, numbers and the stream."""
    words, others, moved = ready.words, numbers is not ready.numbers, memories != ready.memories
    if moved:
        for address, before, places in zip(memories, ready.memories, template.pointers, strict=False):
            if address != before:
                for word, offset in places:
                    words[word] = address + offset
        ready.memories = memories[:]
    if stream != ready.stream:
        ready.stream = stream
        for word in template.streams[0]:
            words[word] = stream
    if moved or others:
        for word, memory, offset, name in template.moved:
            words[word] = memories[memory] + offset + numbers[name]
        for function, args in ready.changes:
            function(*args)
    if others:
        for name, packer, at in template.numbers:
            if packer is None:
                inlined = numbers[name].inlined
                ready.bytes[at : at + len(inlined)] = inlined
            else:
                packer.pack_into(ready.buffer, at, numbers[name])
        if not template.large:  # a large table is not kept, because it takes megabytes
            ready.numbers = numbers


def write_table(parts: Sequence[tuple[bytes, int, int]], address: int, ordinal: int, stream: int) -> None:
    """Write the parts of `clouds.parts_of` to an address of the current device, which is `ordinal`."""
    for part, first, rows in parts:
        run(Call(clouds.write, {"part": part, "first": first, "rows": rows}), (address,), ordinal, stream)


def _raise(status: int) -> None:
    from cupy.cuda import driver as errors

    raise errors.CUDADriverError(status)


def launch(
    call: Call,
    inputs: Sequence[_arrays.Given | None],
    results: Sequence[_arrays.Spec],
    origin: _arrays.Origin | None = None,
) -> list[Any]:
    """Run a call on the GPU of the first input, or of `origin`, and on the current stream of that library.

    Results and workspace are memory of that library.
    """
    if origin is None:
        origin = inputs[0].origin  # type: ignore[union-attr]
    ordinal: Any = origin.device
    cuda = _cupy_cuda()
    if cuda.runtime.getDevice() != ordinal:
        with cuda.Device(ordinal):
            return launch(call, inputs, results, origin)
    memories: list[int] = []
    lent: list[Any] = []
    for given in inputs:
        if given is None:
            memories.append(0)
        else:
            memories.append(given.address)
            if given.origin.lent:
                lent.append(given.array)
    made, _workspace = _arrays.empty(results, call.plan.workspace, origin, memories)
    stream = _arrays.current_stream(origin)
    run(call, memories, ordinal, stream)
    if lent:
        _keep(lent, stream)
    if origin.library == "jax":
        return [_arrays.leave(array, origin) for array in made]
    return made


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
