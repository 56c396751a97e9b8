# SPDX-License-Identifier: Apache-2.0
"""The foreign function that XLA calls: it runs a call of calls.py on XLA's buffers, device and stream.

XLA passes the address of a call frame. It has the buffers, and the text attribute `call` with everything static. The
checks, and the plan or the function of the CPU, follow from the text and from the buffers' shapes and dtypes. They are
prepared once and kept. After that, a call on a GPU only reads the frame and launches.

Results and workspace are XLA's memory, so XLA can record the launches in a command buffer and repeat them without this
function. Nothing is copied to the host, and nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
import threading
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import Given, Origin, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call
from gpu3d.interop.jax import xla_ffi
from gpu3d.interop.jax.calls import CALLS, Work

ALIGNMENT = 16  # bytes; plans assume this alignment of memory, unless a spec says otherwise


def attribute(name: str, options: dict[str, Any]) -> str:
    """The attribute `call` as text: a call of CALLS and its options, which a compiled or exported program carries."""
    return json.dumps([name, options], sort_keys=True, separators=(",", ":"))


# ---- what is kept --------------------------------------------------------------------------------------------------

MAX_KEPT, MAX_BYTES = 1024, 16 << 20  # limits of each cache


class _Cache(dict[Any, Any]):
    """A cache of values that have a size in bytes. If they are too many or too large, the oldest goes."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.lock = 0, threading.Lock()

    def keep(self, key: Any, value: Any) -> None:
        with self.lock:
            self.held += value.size - (self[key].size if key in self else 0)
            self[key] = value
            while len(self) > MAX_KEPT or (self.held > MAX_BYTES and len(self) > 1):
                self.held -= self.pop(next(iter(self))).size


# ---- reading a frame -----------------------------------------------------------------------------------------------


class _Frame(NamedTuple):
    """A call frame of XLA: views of its memory, and what they held when it was first seen.

    XLA uses a frame again for each run of a program, with new addresses of data. So a known frame is compared with its
    earlier contents, which is much faster than reading it again. `levels` are in the order in which they point to each
    other: the views of a level are valid memory only if the level before has not changed.
    """

    levels: tuple[tuple[list[Any], bytes], ...]
    data: list[Any]  # views of the words that hold the addresses of the buffers' data
    unpack: Callable[[bytes], tuple[int, ...]]
    text: bytes  # the attribute `call`
    inputs: int  # the number of buffers that are arguments; the others are results
    kinds: tuple[tuple[int, tuple[int, ...]], ...]  # XLA_FFI_DataType and shape of each buffer
    key: bytes  # text, inputs and kinds as one key
    size: int  # approximate bytes of this frame in the cache


def _view(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


def _words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", _view(address, 8 * count)) if count else ()


_FRAME = struct.Struct(f"<{ctypes.sizeof(xla_ffi.XLA_FFI_CallFrame) // 8}Q")  # the lower half of a word may be an int
_FRAME_VIEW = ctypes.c_char * _FRAME.size
_INT = 0xFFFFFFFF


def _word(field: str, inner: str = "") -> int:
    """The word of a frame at which a field is, or a field `inner` of that field."""
    offset = getattr(xla_ffi.XLA_FFI_CallFrame, field).offset
    if inner:
        offset += getattr(getattr(xla_ffi, f"XLA_FFI_{field.capitalize()}"), inner).offset
    return offset // 8


_EXTENSION, _API, _CONTEXT, _STAGE = map(_word, ("extension_start", "api", "ctx", "stage"))
_ARGS_SIZE, _ARGS = _word("args", "size"), _word("args", "args")
_RETS_SIZE, _RETS = _word("rets", "size"), _word("rets", "rets")
_ATTRS = _word("attrs", "attrs")

_frames = _Cache()  # keys are the addresses of the parts of a frame


def _read(words: tuple[int, ...]) -> tuple[_Frame, tuple[int, ...]]:
    """The frame, and the addresses of its buffers' data."""
    place = words[_ARGS_SIZE:]
    frame = _frames.get(place)
    if frame is None or not _unchanged(frame):
        frame = _look(words)
        _frames.keep(place, frame)
    return frame, frame.unpack(b"".join(frame.data))


def _unchanged(frame: _Frame) -> bool:
    for views, held in frame.levels:  # noqa: SIM110, a generator takes twice the time
        if b"".join(views) != held:
            return False
    return True


def _look(words: tuple[int, ...]) -> _Frame:
    """Read a frame that is not known."""
    inputs, results = words[_ARGS_SIZE], words[_RETS_SIZE]
    buffer, span = xla_ffi.XLA_FFI_Buffer, xla_ffi.XLA_FFI_ByteSpan
    lists = [_view(words[at], 8 * n) for at, n in ((_ARGS, inputs), (_RETS, results), (_ATTRS, 1)) if n]
    (attribute,) = _words(words[_ATTRS], 1)  # `call` is the only attribute
    text = span.from_address(attribute)
    heads, deep = [_view(attribute, ctypes.sizeof(span))], [_view(text.ptr, text.len)]
    data, kinds = [], []
    for at in _words(words[_ARGS], inputs) + _words(words[_RETS], results):
        found = buffer.from_address(at)
        heads += [_view(at + buffer.dtype.offset, 4), _view(at + buffer.rank.offset, 16)]  # rank, dims
        if found.rank:
            deep.append(_view(found.dims, 8 * found.rank))
        data.append(_view(at + buffer.data.offset, 8))
        kinds.append((found.dtype, _words(found.dims, found.rank)))
    levels = tuple([(views, b"".join(views)) for views in (lists, heads, deep)])
    held = deep[0].raw
    key = repr((inputs, kinds)).encode() + b"\0" + held
    unpack = struct.Struct(f"<{len(data)}Q").unpack
    return _Frame(levels, data, unpack, held, inputs, tuple(kinds), key, 8192 + 3 * len(held))


# ---- preparing -----------------------------------------------------------------------------------------------------

_DTYPES = {
    number: _arrays.BFLOAT16 if name == "bfloat16" else np.dtype(name)
    for name, number in xla_ffi.XLA_FFI_DataType.items()
}


class _Prepared(NamedTuple):
    """A call that is prepared for arrays with certain alignments."""

    work: Work
    inputs: list[Spec]
    call: Call | None  # what a GPU launches; None on the CPU
    workspace: int  # bytes of workspace from XLA
    apart: bool  # whether it needs other memory than XLA's buffers
    size: int  # approximate bytes in the cache


_prepared = _Cache()


def _prepare(frame: _Frame, addresses: tuple[int, ...], ordinal: int | None) -> _Prepared:
    """The prepared call of a frame, on GPU `ordinal` or on the CPU (None)."""
    odd = bytes([address % ALIGNMENT for address in addresses])
    key = ordinal, odd, frame.key
    found = _prepared.get(key)
    if found is None:
        found = _checked(frame, odd, ordinal)
        _prepared.keep(key, found)
    return found


def _checked(frame: _Frame, odd: bytes, ordinal: int | None) -> _Prepared:
    """The same, after checks of the buffers against the call, with the errors of the plain call."""
    name, options = json.loads(frame.text)
    if name not in CALLS:
        raise ValueError(f"this gpu3d has no foreign call {name!r}: the program was made by another version.")
    specs = [_spec(dtype, shape, at) for (dtype, shape), at in zip(frame.kinds, odd, strict=True)]
    inputs, given = specs[: frame.inputs], specs[frame.inputs :]
    static = {option: tuple(x) if isinstance(x, list) else x for option, x in options.items()}
    origin = Origin("jax", ordinal)  # for checks, because some dtypes are for the CPU only
    work = CALLS[name](*[Given(x.shape, x.dtype, None, 0, origin, None) for x in inputs], **static)
    results = len(work.results)
    announced, found = ([(list(x.shape), x.dtype.name) for x in side] for side in (work.results, given[:results]))
    if announced != found or len(given) > results + 1:
        raise ValueError(
            f"{name} of these arrays gives {announced}, and the program has room for {found}: it was not made by "
            "gpu3d, or by another version."
        )
    workspace = sum([x.nbytes for x in given[results:]])
    prepared = _Prepared(work, inputs, None, workspace, False, 4096 + 16 * len(frame.text))  # an estimate
    if ordinal is None:
        return prepared
    call = work.on_gpu(*inputs, launcher.device(ordinal))
    apart = call.plan.workspace > workspace or any([x.misalignment and x.nbytes for x in given])
    return prepared._replace(call=call, apart=apart)


def _spec(dtype: int, shape: tuple[int, ...], misalignment: int) -> Spec:
    if dtype not in _DTYPES:
        raise TypeError(f"gpu3d takes no array of XLA_FFI_DataType {dtype}.")
    return Spec(shape, _DTYPES[dtype], None, misalignment)


# ---- running -------------------------------------------------------------------------------------------------------

_HOST = Origin("numpy", None)


def _run_cpu(words: tuple[int, ...]) -> None:
    frame, addresses = _read(words)
    prepared = _prepare(frame, addresses, None)
    given = []
    for spec, address in zip(prepared.inputs, addresses, strict=False):
        array = _host_array(spec, address)
        array.flags.writeable = False
        given.append(Given(spec.shape, spec.dtype, None, 0, _HOST, array))
    places = addresses[len(given) :]  # results, then the workspace, which the CPU ignores
    for made, spec, place in zip(prepared.work.on_cpu(*given), prepared.work.results, places, strict=False):
        if made.shape != spec.shape or made.dtype != spec.dtype:
            raise RuntimeError(
                f"a result is {made.dtype} {list(made.shape)} where {spec.dtype} {list(spec.shape)} was announced: "
                "please report this to gpu3d."
            )
        _host_array(spec, place)[...] = made


def _host_array(spec: Spec, address: int) -> np.ndarray:
    if not spec.nbytes:
        return np.empty(spec.shape, spec.dtype)
    memory = memoryview((ctypes.c_char * spec.nbytes).from_address(address))
    return np.ndarray(spec.shape, spec.dtype, memory)


@functools.cache
def _runtime() -> Any:
    return _arrays.require_cupy("an array of this program").cuda.runtime


def _run_cuda(words: tuple[int, ...]) -> None:
    api, context = words[_API], words[_CONTEXT]
    ordinal = _ask(api, "XLA_FFI_DeviceOrdinal_Get", context).device_ordinal
    stream = _ask(api, "XLA_FFI_Stream_Get", context).stream or 0
    if _runtime().getDevice() != ordinal:  # rare, because XLA makes its device current before the call
        with _arrays.require_cupy("an array").cuda.Device(ordinal):
            _launch(words, ordinal, stream)
    else:
        _launch(words, ordinal, stream)


def _launch(words: tuple[int, ...], ordinal: int, stream: int) -> None:
    frame, addresses = _read(words)
    prepared = _prepare(frame, addresses, ordinal)
    if prepared.apart:
        _launch_apart(words, prepared, addresses, ordinal, stream)
    else:
        assert prepared.call is not None
        launcher.run(prepared.call, addresses, ordinal, stream)


def _launch_apart(
    words: tuple[int, ...], prepared: _Prepared, addresses: tuple[int, ...], ordinal: int, stream: int
) -> None:
    """Run a call whose results are misaligned, or that needs more workspace than XLA provides."""
    api, context, runtime = words[_API], words[_CONTEXT], _runtime()
    call, results = prepared.call, prepared.work.results
    assert call is not None
    if runtime.streamIsCapturing(stream):
        raise RuntimeError(  # a recording would repeat the launches in memory that is freed
            "this call cannot be recorded: its arrays lie at addresses that 16 does not divide, or the program was "
            "traced for another GPU. Trace it on this machine, or switch command buffers off: "
            "XLA_FLAGS=--xla_gpu_enable_command_buffer="
        )
    borrowed: list[tuple[int, int]] = []

    def borrow(size: int) -> int:
        borrowed.append((_ask(api, "XLA_FFI_DeviceMemory_Allocate", context, size, ALIGNMENT).data, size))
        return borrowed[-1][0]

    first, end = len(prepared.inputs), len(prepared.inputs) + len(results)
    places, workspace = addresses[first:end], list(addresses[end:])
    try:
        made = [borrow(x.nbytes) if x.nbytes and at % ALIGNMENT else at for x, at in zip(results, places, strict=True)]
        if call.plan.workspace > prepared.workspace or any([at % ALIGNMENT for at in workspace]):
            workspace = [borrow(call.plan.workspace)]
        launcher.run(call, [*addresses[:first], *made, *workspace], ordinal, stream)
        for spec, place, at in zip(results, places, made, strict=True):
            if at != place:
                runtime.memcpyAsync(place, at, spec.nbytes, runtime.memcpyDeviceToDevice, stream)
    finally:
        for address, size in borrowed:  # freed in stream order
            _ask(api, "XLA_FFI_DeviceMemory_Free", context, size, address)


# ---- XLA's functions -----------------------------------------------------------------------------------------------


@functools.cache
def _function(api: int, name: str) -> Any:
    """A function of an XLA_FFI_Api, the structure that it takes, and the size of the structure."""
    structure = getattr(xla_ffi, name + "_Args")
    # A function that only reads a value keeps the GIL. Others may wait for a thread that needs the GIL.
    prototype = ctypes.PYFUNCTYPE if name.endswith("_Get") else ctypes.CFUNCTYPE
    function = prototype(ctypes.c_void_p, ctypes.c_void_p)(getattr(xla_ffi.XLA_FFI_Api.from_address(api), name))
    return function, structure, xla_ffi.struct_size(structure)


def _call(api: int, name: str, *fields: Any) -> tuple[Any, int | None]:
    """Call a function of XLA; return its arguments, with what it wrote, and the error."""
    function, structure, size = _function(api, name)
    arguments = structure(size, None, *fields)
    return arguments, function(ctypes.addressof(arguments))


def _ask(api: int, name: str, *fields: Any) -> Any:
    """The same, but raise the error."""
    arguments, error = _call(api, name, *fields)
    if error is not None:
        message = _call(api, "XLA_FFI_Error_GetDetails", error)[0].message.decode(errors="replace")
        _call(api, "XLA_FFI_Error_Destroy", error)
        raise (MemoryError if name == "XLA_FFI_DeviceMemory_Allocate" else RuntimeError)(f"{name}: {message}")
    return arguments


def _tell(api: int, error: BaseException) -> int | None:
    """Make an error of XLA from an exception."""
    if isinstance(error, (TypeError, ValueError)):
        code, message = xla_ffi.XLA_FFI_Error_Code_INVALID_ARGUMENT, str(error)
    elif isinstance(error, MemoryError):
        code, message = xla_ffi.XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, str(error) or "out of memory"
    else:
        code, message = xla_ffi.XLA_FFI_Error_Code_INTERNAL, "".join(traceback.format_exception(error))
    return _call(api, "XLA_FFI_Error_Create", message.encode(), code)[1]


def _describe(extension: int, traits: int) -> bool:
    """Answer XLA's question for the version and traits of the handler, if it asks."""
    if xla_ffi.XLA_FFI_InternalExtension.from_address(extension).type != xla_ffi.XLA_FFI_Extension_Metadata:
        return False
    metadata = xla_ffi.XLA_FFI_Metadata_Extension.from_address(extension).metadata.contents
    metadata.api_version.major_version = xla_ffi.XLA_FFI_API_MAJOR
    metadata.api_version.minor_version = xla_ffi.XLA_FFI_API_MINOR
    metadata.traits = traits
    return True


@functools.cache
def handler(platform: str) -> Any:
    """The C function of a platform, "cpu" or "CUDA". XLA may call it at any time, so it is never freed."""
    run = {"cpu": _run_cpu, "CUDA": _run_cuda}[platform]
    traits = xla_ffi.XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE

    def handle(address: int) -> int | None:
        words = _FRAME.unpack(_FRAME_VIEW.from_address(address))
        if words[_EXTENSION] and _describe(words[_EXTENSION], traits):
            return None
        if words[_STAGE] & _INT != xla_ffi.XLA_FFI_ExecutionStage_EXECUTE:
            return None
        try:
            run(words)
        except BaseException as error:  # no exception may pass through XLA
            return _tell(words[_API], error)
        return None

    return xla_ffi.XLA_FFI_Handler(handle)
