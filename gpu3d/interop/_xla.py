# SPDX-License-Identifier: Apache-2.0
"""A foreign function of XLA, written in Python: it runs plain gpu3d calls on XLA's buffers, device and stream.

XLA calls `handler("cpu")` and `handler("CUDA")` with the address of a call frame. They wrap its buffers, without a
copy, as NumPy or CuPy arrays, run the plain call that the attribute `call` names, and see to it that its results lie in
XLA's buffers. The structures are those of xla/ffi/api/c_api.h, which jaxlib carries; they grow only at their ends.

On CUDA a call that launches the same whatever its arrays hold is played (`_replay.rehearse`): what it launches is known
from its attribute, and only addresses are read from the frame. If there was a GPU when the program was traced, the
call's workspace is one more result, so that all it touches is XLA's for as long as XLA likes, and XLA may record the
launches in a command buffer and do them again without asking here. Else the workspace is allocated from XLA, and given
back in stream order. What has been played once here, and brings its workspace, is played by play.c from then on, which
is the handler that XLA calls (`_native`); it comes back here with whatever it does not know.

Another call runs as a plain one that allocates from XLA, on XLA's stream. What has the size of a result that is still
to come gets the memory of that result, so results are born where XLA wants them; `_land` looks whether they were, and
copies those that were not. Whatever else was allocated goes back to XLA when the handler returns, in stream order.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import traceback
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import numpy as np

import gpu3d
from gpu3d import _arrays
from gpu3d.interop import _layouts, _native, _replay

# ---- calls ---------------------------------------------------------------------------------------------------------


def _bucketize(points: Any, bucket_size: int, **options: Any) -> Sequence[Any]:
    made = gpu3d.bucketize(points, bucket_size, **options)
    return made.slot_to_point, made.point_to_slot, made.moved


def _attention(
    q: Any, k: Any, v: Any, table: Any, bucket_size: int, lengths: tuple[int, ...], scale: float | None
) -> Sequence[Any]:
    layout = _layouts.layout(lengths, bucket_size)
    scopes = _layouts.scopes_of(table, layout)
    return gpu3d.bucket_attention(q, k, v, layout, scopes, scale=scale, return_lse=True)


def _attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    table: Any,
    bucket_size: int,
    lengths: tuple[int, ...],
    scale: float | None,
) -> Sequence[Any]:
    layout = _layouts.layout(lengths, bucket_size)
    scopes = _layouts.scopes_of(table, layout)
    return gpu3d.bucket_attention_backward(dout, q, k, v, out, lse, layout, scopes, scale=scale)


def _pool(features: Any, points: Any, bucket_size: int, lengths: tuple[int, ...], **options: Any) -> Sequence[Any]:
    pooled = gpu3d.bucket_pool(features, points, _layouts.layout(lengths, bucket_size), **options)
    child = pooled.buckets
    structure = child.slot_to_point, child.point_to_slot, child.moved
    extremes = () if pooled.argmember is None else (pooled.argmember,)
    return pooled.features, pooled.points, pooled.members, *structure, *extremes


def _pool_backward(dchild: Any, members: Any, argmember: Any = None, **layout: Any) -> Sequence[Any]:
    return [gpu3d.bucket_pool_backward(dchild, _layouts.pooling(dchild, members, argmember, **layout))]


def _unpool(child: Any, members: Any, skip: Any = None, **layout: Any) -> Sequence[Any]:
    return [gpu3d.bucket_unpool(child, _layouts.pooling(None, members, None, reduce="sum", **layout), skip)]


def _unpool_backward(dout: Any, members: Any, **layout: Any) -> Sequence[Any]:
    return gpu3d.bucket_unpool_backward(dout, _layouts.pooling(None, members, None, reduce="sum", **layout))


def _loss(function: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    return lambda x, y, **options: [function(x, y, **options)]


def _loss_and_gradients(function: Callable[..., Any]) -> Callable[..., Sequence[Any]]:
    def call(x: Any, y: Any, **options: Any) -> Sequence[Any]:
        loss, gradients = function(x, y, **options)
        return loss, *gradients

    return call


CALLS: dict[str, Callable[..., Sequence[Any]]] = {
    "bucketize": _bucketize,
    "bucket_attention": _attention,
    "bucket_attention_backward": _attention_backward,
    "bucket_pool": _pool,
    "bucket_pool_backward": _pool_backward,
    "bucket_unpool": _unpool,
    "bucket_unpool_backward": _unpool_backward,
    "chamfer": _loss(gpu3d.chamfer),
    "chamfer_value_and_grad": _loss_and_gradients(gpu3d.chamfer_value_and_grad),
    "apml": _loss(gpu3d.apml),
    "apml_value_and_grad": _loss_and_gradients(gpu3d.apml_value_and_grad),
}


class _Kind(NamedTuple):
    """What a buffer of XLA's holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int  # bytes


class _Call(NamedTuple):
    """What the attribute `call` says."""

    name: str  # of CALLS
    options: tuple[tuple[str, Any], ...]
    args: tuple[_Kind, ...]
    rets: tuple[_Kind, ...]
    workspace: int | None  # bytes; a result behind `rets`, if it is not 0. None: what it needs is allocated

    @property
    def function(self) -> Callable[..., Sequence[Any]]:
        return functools.partial(CALLS[self.name], **dict(self.options))

    @property
    def fixed(self) -> bool:
        """It launches the same whatever its arrays hold: no error follows from values, and all sizes are known."""
        return not dict(self.options).get("check_finite")


def attribute(
    name: str, options: dict[str, Any], args: Sequence[Any], rets: Sequence[Any], workspace: int | None = None
) -> str:
    """The attribute `call`: all that is static, as text, so that a compiled or exported program carries it.

    That includes shapes and dtypes of `args` and `rets`, for XLA's own words for them take longer to read.
    """
    kinds = [[[x.dtype.name, list(x.shape)] for x in xs] for xs in (args, rets)]
    return json.dumps([name, options, *kinds, workspace], sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=1024)
def _parsed(call: bytes) -> _Call:
    name, options, *kinds, workspace = json.loads(call)
    static = [(key, tuple(value) if isinstance(value, list) else value) for key, value in options.items()]
    args, rets = (tuple(_kind(np.dtype(dtype), tuple(shape)) for dtype, shape in side) for side in kinds)
    return _Call(name, tuple(static), args, rets, workspace)


def _kind(dtype: np.dtype, shape: tuple[int, ...]) -> _Kind:
    return _Kind(shape, dtype, math.prod(shape) * dtype.itemsize)


# ---- programs ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _rehearsed(call: _Call, device: int, odd: tuple[int, ...]) -> _replay.Program | None:
    """What plays a call on a device, if its launches are always the same; `odd`: its arguments' addresses mod 16."""
    import cupy

    arrays = [_replay.Array(x.shape, x.dtype, at) for x, at in zip(call.args, odd, strict=True)]
    with cupy.cuda.Device(device):
        return _replay.rehearse(call.function, arrays, device) if call.fixed else None


def workspace(name: str, options: dict[str, Any], args: Sequence[Any], rets: Sequence[Any]) -> int | None:
    """Bytes of workspace that a call takes on CuPy's current device; None: it cannot be played."""
    try:
        import cupy
    except ImportError:  # an error when the call runs
        return None
    call = _parsed(attribute(name, options, args, rets).encode())
    program = _rehearsed(call, cupy.cuda.runtime.getDevice(), (0,) * len(call.args))
    return None if program is None else program.workspace


@functools.lru_cache(maxsize=1024)
def _played(text: bytes, device: int, *odd: int) -> tuple[_replay.Program | None, int]:
    """What plays a call whose arguments and results have these addresses mod 16, and the workspace to be allocated."""
    call = _parsed(text)
    program = _rehearsed(call._replace(workspace=None), device, odd[: len(call.args)])
    if program is None or any(odd[len(call.args) :]):
        return None, 0
    if call.workspace is None:
        return program, program.workspace
    if call.workspace < program.workspace:
        return None, 0
    if not any(odd):
        _native.know(text, device, len(odd), program.words)
    return program, 0


# ---- xla/ffi/api/c_api.h -------------------------------------------------------------------------------------------

API_VERSION = 0, 1  # the oldest that has all that is used here; XLA takes handlers of older ones
METADATA = 1  # XLA_FFI_Extension_Metadata
RECORDABLE = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, INTERNAL = 3, 8, 13  # of XLA_FFI_Error_Code
ALIGNMENT = 16  # of an allocation: the largest that XLA takes, and what kernels load at a time


class Extension(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p)]


class ApiVersion(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int)]


class Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("api_version", ApiVersion), ("traits", c_uint32)]


class MetadataExtension(ctypes.Structure):
    _fields_ = [("base", Extension), ("metadata", POINTER(Metadata))]


WORDS = POINTER(c_uint64)  # a structure whose fields are read by their places
DATA = 3  # of an XLA_FFI_Buffer: behind struct_size, extension_start and dtype
PTR, LEN = 0, 1  # of an XLA_FFI_ByteSpan


class Buffers(ctypes.Structure):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("items", POINTER(WORDS)),
    ]


class Attributes(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", c_void_p),
        ("items", POINTER(WORDS)),
    ]


class Api(ctypes.Structure):
    """The functions of XLA, which are called by `_ask`."""

    functions = (
        "Error_Create",
        "Error_GetMessage",
        "Error_Destroy",
        "Handler_Register",
        "Stream_Get",
        "Type_Register",
        "ExecutionContext_Get",
        "State_Set",
        "State_Get",
        "DeviceMemory_Allocate",
        "DeviceMemory_Free",
        "ThreadPool_Schedule",
        "ThreadPool_NumThreads",
        "Future_Create",
        "Future_SetAvailable",
        "Future_SetError",
        "RunId_Get",
        "DeviceOrdinal_Get",
    )
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("api_version", ApiVersion),
        ("internal_api", c_void_p),
        *((name, c_void_p) for name in functions),
    ]


class CallFrame(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("api", c_void_p),
        ("context", c_void_p),
        ("stage", c_int),
        ("args", Buffers),
        ("rets", Buffers),
        ("attrs", Attributes),
    ]


def _arguments(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """The structure that a function of XLA takes."""
    return type(name, (ctypes.Structure,), {"_fields_": [("struct_size", c_size_t), ("extension", c_void_p), *fields]})


ARGUMENTS = {
    "Error_Create": _arguments("Error_Create", ("message", c_char_p), ("code", c_int)),
    "Error_GetMessage": _arguments("Error_GetMessage", ("error", c_void_p), ("message", c_char_p)),
    "Error_Destroy": _arguments("Error_Destroy", ("error", c_void_p)),
    "Stream_Get": _arguments("Stream_Get", ("context", c_void_p), ("stream", c_void_p)),
    "DeviceOrdinal_Get": _arguments("DeviceOrdinal_Get", ("context", c_void_p), ("ordinal", c_int32)),
    "DeviceMemory_Allocate": _arguments(
        "DeviceMemory_Allocate", ("context", c_void_p), ("size", c_size_t), ("alignment", c_size_t), ("data", c_void_p)
    ),
    "DeviceMemory_Free": _arguments("DeviceMemory_Free", ("context", c_void_p), ("size", c_size_t), ("data", c_void_p)),
}


def size_of(structure: type[ctypes.Structure]) -> int:
    """What XLA calls the size of a structure: up to the end of its last field."""
    last = getattr(structure, structure._fields_[-1][0])
    return last.offset + last.size


SIZES = {name: size_of(structure) for name, structure in ARGUMENTS.items()}

# An error or null. The GIL is released meanwhile: XLA may wait for a thread that wants it.
FUNCTION = ctypes.CFUNCTYPE(c_void_p, c_void_p)


@functools.cache
def _function(api: int, name: str) -> Any:
    return FUNCTION(getattr(Api.from_address(api), name))


def _call(api: int, name: str, *fields: Any) -> tuple[Any, int | None]:
    """Calls a function of XLA: its arguments, with what it wrote, and what it returned."""
    arguments = ARGUMENTS[name](SIZES[name], None, *fields)
    return arguments, _function(api, name)(ctypes.addressof(arguments))


def _ask(api: int, name: str, *fields: Any) -> Any:
    """The same, an error raised."""
    arguments, error = _call(api, name, *fields)
    if error is not None:
        message = _call(api, "Error_GetMessage", error)[0].message.decode(errors="replace")
        _call(api, "Error_Destroy", error)
        raise (MemoryError if name == "DeviceMemory_Allocate" else RuntimeError)(f"XLA_FFI_{name}: {message}")
    return arguments


# ---- the handler ---------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A buffer of XLA's."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int  # bytes


def _addresses(buffers: Buffers) -> list[int]:
    """Where the buffers' data lie."""
    return [buffer[DATA] for buffer in buffers.items[: buffers.size]]


def _places(addresses: Sequence[int], kinds: Sequence[_Kind]) -> list[_Place]:
    """The first of the addresses; behind results a workspace may lie."""
    return [_Place(address, *kind) for address, kind in zip(addresses, kinds, strict=False)]


def _attribute_of(attrs: Attributes) -> bytes:
    span = attrs.items[0]  # `call` is the only attribute
    return ctypes.string_at(span[PTR], span[LEN])


def _check(result: Any, place: _Place) -> None:
    """What was promised to XLA when the program was traced."""
    if result.shape != place.shape or result.dtype != place.dtype:
        raise RuntimeError(
            f"a result is {result.dtype} {list(result.shape)} where {place.dtype} {list(place.shape)} was announced: "
            "please report this to gpu3d."
        )


def _host_array(place: _Place) -> np.ndarray:
    if not place.size:
        return np.empty(place.shape, place.dtype)
    memory = memoryview((ctypes.c_char * place.size).from_address(place.address))
    return np.ndarray(place.shape, place.dtype, memory)


def _run_cpu(frame: CallFrame) -> None:
    call = _parsed(_attribute_of(frame.attrs))
    arrays = [_host_array(place) for place in _places(_addresses(frame.args), call.args)]
    for array in arrays:
        array.flags.writeable = False
    results = call.function(*arrays)
    for result, place in zip(results, _places(_addresses(frame.rets), call.rets), strict=True):
        _check(result, place)
        _host_array(place)[...] = result


class _Allocator:
    """A CuPy allocator for one call: the buffers of results where the size fits, else XLA's memory until `free`."""

    apart = True  # results that are returned together have an allocation each, for XLA gave each a buffer

    def __init__(self, frame: CallFrame, device: int) -> None:
        self.api, self.context, self.device = frame.api, frame.context, device
        self.rets: list[_Place] = []  # not handed out yet
        self.blocks: list[tuple[int, int]] = []  # address and size

    def __call__(self, size: int) -> Any:
        import cupy

        memory = cupy.cuda.UnownedMemory(self.address(size), size, None, self.device)
        return cupy.cuda.MemoryPointer(memory, 0)

    def address(self, size: int) -> int:
        if size == 0:
            return 0
        for place in self.rets:
            if -place.size // 16 == -size // 16:  # results that share an allocation elsewhere begin at multiples of 16
                self.rets.remove(place)
                return place.address
        address = _ask(self.api, "DeviceMemory_Allocate", self.context, size, ALIGNMENT).data
        self.blocks.append((address, size))
        return address

    def free(self) -> None:
        for address, size in self.blocks:
            _ask(self.api, "DeviceMemory_Free", self.context, size, address)


def _land(results: Sequence[Any], places: Sequence[_Place], array_at: Callable[[_Place], Any]) -> None:
    """Copies each result that does not lie in its buffer there. `array_at` makes an array of a buffer."""
    strays = []
    for result, place in zip(results, places, strict=True):
        _check(result, place)
        at = result.data.ptr
        if place.size and not (at == place.address and result.flags.c_contiguous):
            in_a_buffer = any(other.address <= at < other.address + other.size for other in places)
            strays.append((result.copy() if in_a_buffer else result, place))  # out of the way, before that is written
    for result, place in strays:
        array_at(place)[...] = result


@functools.lru_cache(maxsize=64)
def _stream(pointer: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_arrays.ForeignStream(pointer))


def _run_cuda(frame: CallFrame) -> None:
    cupy = _arrays.require_cupy("an array")
    device = _ask(frame.api, "DeviceOrdinal_Get", frame.context).ordinal
    stream = _ask(frame.api, "Stream_Get", frame.context).stream or 0
    text, addresses = _attribute_of(frame.attrs), _addresses(frame.args) + _addresses(frame.rets)
    program, missing = _played(text, device, *[address % ALIGNMENT for address in addresses])
    with contextlib.nullcontext() if cupy.cuda.runtime.getDevice() == device else cupy.cuda.Device(device):
        if program is not None and not missing:
            _replay.play(program, addresses, stream)
            return
        allocator = _Allocator(frame, device)
        try:
            if program is None:
                _run_plain(_parsed(text), addresses, allocator, stream)
            else:
                _replay.play(program, [*addresses, allocator.address(missing)], stream)
        finally:
            allocator.free()


def _run_plain(call: _Call, addresses: Sequence[int], allocator: _Allocator, stream: int) -> None:
    import cupy

    if call.workspace is not None and cupy.cuda.runtime.streamIsCapturing(stream):
        raise RuntimeError(  # the launches would be done again in memory that was given back
            f"{call.name} cannot be recorded: its arrays lie at addresses that 16 does not divide, or this program was "
            "traced for another GPU. Trace it on this machine, or switch command buffers off: "
            "XLA_FLAGS=--xla_gpu_enable_command_buffer="
        )
    args, rets = _places(addresses, call.args), _places(addresses[len(call.args) :], call.rets)
    allocator.rets = list(rets)
    with _stream(stream), cupy.cuda.using_allocator(allocator):
        results = call.function(*[_array_at(place, allocator.device) for place in args])
        allocator.rets.clear()  # a copy that makes way must not take what is about to be written
        _land(results, rets, lambda place: _array_at(place, allocator.device))


def _array_at(place: _Place, device: int) -> Any:
    import cupy

    memory = cupy.cuda.UnownedMemory(place.address, place.size, None, device)
    return cupy.ndarray(place.shape, place.dtype, cupy.cuda.MemoryPointer(memory, 0))


def _metadata(extension: int, traits: int) -> None:
    """XLA asks what it deals with, once."""
    metadata = MetadataExtension.from_address(extension).metadata.contents
    metadata.api_version.major, metadata.api_version.minor = API_VERSION
    metadata.traits = traits


def _error(frame: CallFrame, error: BaseException) -> int | None:
    if isinstance(error, (TypeError, ValueError)):
        code, message = INVALID_ARGUMENT, str(error)
    elif isinstance(error, MemoryError):
        code, message = RESOURCE_EXHAUSTED, str(error) or "out of memory"
    else:
        code, message = INTERNAL, "".join(traceback.format_exception(error))
    return _call(frame.api, "Error_Create", message.encode(), code)[1]


@functools.cache
def handler(platform: str, recordable: bool = False) -> Any:
    """The C function of a platform, "cpu" or "CUDA", to be kept for as long as XLA may call it: for ever.

    XLA may put calls into its command buffers that go to a `recordable` one: those that bring their workspace.
    """
    run = {"cpu": _run_cpu, "CUDA": _run_cuda}[platform]
    traits = RECORDABLE if recordable else 0

    def handle(address: int) -> int | None:
        frame = CallFrame.from_address(address)
        if frame.extension and Extension.from_address(frame.extension).type == METADATA:
            _metadata(frame.extension, traits)
            return None
        if frame.stage != EXECUTE:
            return None
        try:
            run(frame)
        except BaseException as error:  # nothing may pass through XLA
            return _error(frame, error)
        return None

    return _native.handler(FUNCTION(handle)) if platform == "CUDA" and recordable else FUNCTION(handle)
