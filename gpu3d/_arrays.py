# SPDX-License-Identifier: Apache-2.0
"""Arrays of any library as inputs and results, and the checks that several ops share.

`read` describes the caller's array (`Given`) without a copy, and where it came from (`Origin`). `empty` makes a result
of the caller's library, and `leave` converts a result of the CPU path to it. Frameworks are only looked up in
`sys.modules`, because a caller who passes an array of a framework has imported it already. `interop_of` finds the
module of gpu3d.interop whose functions take over a call, if there is one.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np

try:
    import ml_dtypes
except ImportError as error:  # pragma: no cover - a base dependency
    raise ImportError('gpu3d needs ml_dtypes for bfloat16: pip install "ml_dtypes"') from error

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16)
FLOAT_DTYPES = frozenset(FLOATS)  # `in` takes less time than with FLOATS, which kernels number by their order
INT32, INT64, UINT8 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint8)
FLOAT32, FLOAT64 = FLOATS[:2]

DLPACK_CPU, DLPACK_CUDA, DLPACK_PINNED, DLPACK_MANAGED = 1, 2, 3, 13


class Origin(NamedTuple):
    """Where an array came from: its library, and its CUDA device or None for the host."""

    library: str
    device: int | None
    place: Any = None  # the jax.Device of a host array of JAX
    lent: bool = False  # GPU memory of a library that may reuse it before the current stream has read it

    def __str__(self) -> str:
        return f"{self.library} on " + ("the CPU" if self.device is None else f"cuda:{self.device}")


class Spec(NamedTuple):
    """An array without its memory. Checks read it, plans depend on it, and it describes results."""

    shape: tuple[Any, ...]  # ints, or symbols of torch.compile for a result
    dtype: np.dtype
    strides: tuple[int, ...] | None = None  # bytes; None if it is C-contiguous
    misalignment: int = 0  # its address modulo 16

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Total bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Given(NamedTuple):
    """An array of the caller."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None  # bytes; None where it is C-contiguous
    address: int  # address of its first element on a GPU; 0 on the host
    origin: Origin
    array: Any  # the NumPy array on the host; on a GPU an object that keeps the memory alive

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def device(self) -> int | None:
        """The CUDA device, or None for the host."""
        return self.origin.device

    @property
    def misalignment(self) -> int:
        """The address modulo 16."""
        return self.address % 16

    @property
    def spec(self) -> Spec:
        """The array without its memory, as a cache key."""
        shape, dtype, strides, address, _, _ = self
        return _new(Spec, (shape, dtype, strides, address % 16))


# Of a result whose sizes are ints. Finding it takes half the time of making it.
kept_spec = functools.lru_cache(maxsize=1024)(Spec)
_new = tuple.__new__
_NUMPY = Origin("numpy", None)
_cupy_origin = functools.cache(functools.partial(Origin, "cupy"))
torch_origin = functools.cache(functools.partial(Origin, "torch"))  # for the number of a CUDA device, or None
_jax_origin = functools.cache(functools.partial(Origin, "jax", lent=True))
_foreign_origin = functools.cache(functools.partial(Origin, "cupy", lent=True))


def on_gpu(x: Given | Spec) -> bool:
    """Whether this is an array on a GPU."""
    return isinstance(x, Given) and x.origin.device is not None


# ---- which function takes a call -----------------------------------------------------------------------------------


def interop_of(*arrays: Any, layout: Any = None) -> Any:
    """gpu3d.interop.torch if one of the arrays is a tensor, gpu3d.interop.jax if one is a tracer, otherwise None.

    `layout` is an array of a Buckets, Scopes or Pooling that the call reads. Only tracers count there.
    """
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None:
        for x in arrays:
            if isinstance(x, torch.Tensor):
                from gpu3d.interop import torch as for_torch  # a statement, because torch.compile can trace it

                return for_torch
    if jax is not None:
        for x in (*arrays, layout):
            if isinstance(x, jax.core.Tracer):
                from gpu3d.interop import jax as for_jax

                return for_jax
    return None


def refuse_gradients(function: str, **named: Any) -> None:
    """Raise a TypeError for tensors that take part in differentiation, and for tracers: `function` has no gradient."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    for name, x in named.items():
        if torch is not None and isinstance(x, torch.Tensor):
            refuse_torch_gradient(function, name, x)
        elif jax is not None and isinstance(x, jax.core.Tracer):
            raise TypeError(
                f"{name} is a JAX tracer, and {function} runs outside of jax.jit, jax.grad and jax.vmap. Call it on "
                "the array itself; what is not differentiated goes in by jax.lax.stop_gradient."
            )


def refuse_torch_gradient(function: str, name: str, x: Any) -> None:
    """Raise a TypeError if torch expects a gradient or a tangent for a tensor, because `function` has none."""
    torch = sys.modules["torch"]
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, and {function} has no gradient for it: pass {name}.detach(), or call it under "
            "torch.no_grad()."
        )
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(f"{name} has a tangent, and {function} has no derivative for it: pass {name}.detach().")


def refuse_programs(function: str) -> None:
    """Raise a TypeError while torch.compile or torch.export traces `function`, which reads a number on the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        raise TypeError(
            f"{function} reads on the host how many rows its results have, so it cannot be part of a compiled program: "
            "call it outside of torch.compile, or in a function under torch.compiler.disable without fullgraph=True."
        )


# ---- in ------------------------------------------------------------------------------------------------------------


def read(x: Any, name: str) -> Given:
    """Describe an array. Raises a TypeError that names the argument if x is not an array."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _given(x)
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a masked array, and gpu3d knows no masks: drop the masked rows by "
                f"numpy.ma.compress_rows({name}), or fill what is masked by {name}.filled()."
            )
        x = x.view(np.ndarray) if type(x) is not np.ndarray else x  # slices of numpy.matrix differ
        return Given(x.shape, x.dtype, None, 0, _NUMPY, x)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return read_tensor(x, name)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        return _read_jax(x, name, jax)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        kind, device = x.__dlpack_device__()
        if kind in (DLPACK_CPU, DLPACK_PINNED):
            return read(_host_dlpack(x, name), name)
        if kind in (DLPACK_CUDA, DLPACK_MANAGED):
            with require_cupy(name).cuda.Device(device):
                return _given(require_cupy(name).from_dlpack(x), _foreign_origin(device))
        raise TypeError(
            f"{name} is on DLPack device type {int(kind)}; gpu3d reads CPU and CUDA memory. Copy it to one of them."
        )
    if type(x).__module__.startswith("dask."):
        raise TypeError(
            f"{name} is a Dask collection, which has no memory yet: pass {name}.compute(), or call gpu3d on each block "
            "or cloud by map_blocks or map."
        )
    raise TypeError(
        f"{name} must be an array (NumPy, CuPy, torch, JAX or anything with __dlpack__), got {type(x).__name__}. "
        f"A list becomes one by numpy.asarray({name}, dtype=numpy.float32)."
    )


def _given(x: Any, origin: Origin | None = None) -> Given:
    """Of a CuPy array; `origin` says where it came from, if that is not CuPy."""
    data = x.data
    strides = None if x.flags.c_contiguous else x.strides
    # Every call reads some arrays, and the constructor of a NamedTuple takes twice as long.
    return _new(Given, (x.shape, x.dtype, strides, data.ptr, origin or _cupy_origin(data.device_id), x))


def _host_dlpack(x: Any, name: str) -> np.ndarray:
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:  # NumPy's DLPack does not support bfloat16
        torch = sys.modules.get("torch")
        if torch is not None:
            return read_tensor(torch.from_dlpack(x), name).array
        raise TypeError(
            f"{name} cannot be read through DLPack by NumPy ({error}): convert it to float32, or pass a NumPy array of "
            "ml_dtypes.bfloat16."
        ) from error


def require_cupy(name: str) -> Any:
    """CuPy, or an error that says why it is needed and how to get it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f'{name} is on a CUDA device, which needs CuPy: pip install "gpu3d[cuda13]" (or "gpu3d[cuda12]").'
        ) from error
    return cupy


def read_tensor(x: Any, name: str) -> Given:
    """Describe a torch tensor, as `read` does."""
    torch = sys.modules["torch"]
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}: call {name}.to_dense().")
    if x.is_quantized:
        raise TypeError(f"{name} must not be quantized: call {name}.dequantize().")
    if x.is_conj() or x.is_neg():  # views whose memory holds other values, like z.conj()
        x = x.resolve_conj().resolve_neg()
    if not (x.is_cuda or x.is_cpu):
        raise TypeError(f"{name} is on device {x.device}; gpu3d runs on CPU and CUDA: move it by {name}.to('cuda').")
    return read_dense(x, name)


def read_dense(x: Any, name: str) -> Given:
    """Describe a torch tensor as the kernel of an operator gets it: dense, on the CPU or a GPU, and no lazy view."""
    dtype = numpy_dtype(x.dtype)
    if x.is_cuda:
        if "cupy" not in sys.modules:
            require_cupy(name)
        strides = None
        if not x.is_contiguous():
            strides = tuple([step * dtype.itemsize for step in x.stride()])
        return _new(Given, (tuple(x.shape), dtype, strides, x.data_ptr(), torch_origin(x.get_device()), x))
    array = _numpy_of(x.detach(), dtype, sys.modules["torch"])
    return _new(Given, (array.shape, dtype, None, 0, torch_origin(None), array))


def tensor_alike(
    name: str, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, misalignment: int, device: int
) -> Given:
    """A tensor as `read_dense` describes it, but without memory, for checks and plans.

    Strides are in elements, and None where the tensor is contiguous. The device is -1 for the CPU.
    """
    if device >= 0:
        require_cupy(name)
    of_numpy = numpy_dtype(dtype)
    steps = None if strides is None else tuple([step * of_numpy.itemsize for step in strides])
    return Given(tuple(shape), of_numpy, steps, misalignment, torch_origin(device if device >= 0 else None), None)


def _numpy_of(x: Any, dtype: np.dtype, torch: Any) -> np.ndarray:
    """A CPU tensor as a NumPy array that shares its memory. Dtypes that NumPy lacks come from ml_dtypes."""
    if dtype.isbuiltin == 1:
        return x.numpy()
    return x.view(torch.int16 if dtype.itemsize == 2 else torch.uint8).numpy().view(dtype)


@functools.cache
def numpy_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype for a torch dtype."""
    name = str(dtype).removeprefix("torch.")
    found = getattr(np, name, None) or getattr(ml_dtypes, name, None)
    if found is None:
        raise TypeError(f"dtype {dtype} has no NumPy counterpart: convert by .float().")
    return np.dtype(found)


@functools.cache
def torch_dtype(dtype: np.dtype) -> Any:
    """The torch dtype for a NumPy dtype."""
    return getattr(sys.modules["torch"], dtype.name)


def _read_jax(x: Any, name: str, jax: Any) -> Given:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name} is a JAX tracer: this gpu3d call runs outside of jax.jit, jax.grad and jax.vmap.")
    devices = x.devices()
    if len(devices) != 1:
        raise TypeError(f"{name} is sharded over {len(devices)} devices; gpu3d takes an array of one device.")
    (device,) = devices
    if device.platform == "cpu":
        array = np.asarray(x)
        return Given(array.shape, array.dtype, None, 0, Origin("jax", None, device), array)
    if device.platform not in ("gpu", "cuda"):
        raise TypeError(f"{name} is on a JAX device of platform {device.platform!r}; gpu3d runs on CPU and CUDA.")
    cupy = require_cupy(name)
    ordinal = x.__dlpack_device__()[1]
    with cupy.cuda.Device(ordinal):
        return _given(cupy.from_dlpack(x), _jax_origin(ordinal))


# ---- out -----------------------------------------------------------------------------------------------------------


def leave(array: Any, origin: Origin) -> Any:
    """The array in the library of `origin`; a copy only for JAX on the CPU, which has memory of its own."""
    if origin.library in ("numpy", "cupy"):
        return array
    if origin.library == "torch":
        torch = sys.modules["torch"]
        if origin.device is not None:
            return torch.from_dlpack(array)
        if array.dtype.isbuiltin == 1:
            return torch.from_numpy(array)
        plain = torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.uint8))
        return plain.view(torch_dtype(array.dtype))
    jax = sys.modules["jax"]
    if origin.device is not None:
        with on(origin):  # JAX makes the array's device current
            return jax.dlpack.from_dlpack(array)
    return jax.device_put(array, origin.place or jax.devices("cpu")[0])


def passed_on(array: Any, library: str, origin: Origin) -> Any:
    """An array of `library` as one of the origin's library, on the same device; a copy only where `leave` copies."""
    if library == origin.library:
        return array
    given = read(array, "the array")
    return leave(given.array if given.device is None else as_cupy(given), origin)


@functools.cache
def _torch_device(ordinal: int | None) -> Any:
    return sys.modules["torch"].device("cuda", ordinal)


def empty(specs: Sequence[Spec | None], size: int, origin: Origin, addresses: list[int]) -> tuple[list[Any], Any]:
    """New arrays and `size` bytes of workspace on the origin's GPU, which is the current device.

    They are torch tensors for torch, and otherwise CuPy arrays, which `leave` converts for JAX. Their addresses are
    appended to `addresses`, that of the workspace last. The workspace must stay alive until the launches that use it
    are enqueued. A spec that is None stands for a result that the call does not write: None, at address 0.
    """
    workspace = None
    made: list[Any] = []
    if origin.library == "torch":
        torch = sys.modules["torch"]
        device = _torch_device(origin.device)
        for spec in specs:
            if spec is None:
                made.append(None)
                addresses.append(0)
                continue
            array = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
            made.append(array)
            addresses.append(array.data_ptr())
        if size:
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            addresses.append(workspace.data_ptr())
    else:
        cupy = sys.modules["cupy"]
        new = cupy.ndarray
        for spec in specs:
            if spec is None:
                made.append(None)
                addresses.append(0)
                continue
            array = new(spec.shape, spec.dtype)
            made.append(array)
            addresses.append(array.data.ptr)
        if size:
            workspace = cupy.cuda.alloc(size)
            addresses.append(workspace.ptr)
    return made, workspace


def current_stream(origin: Origin) -> int:
    """The handle of the current stream of the origin's library on its GPU, which is the current device."""
    if origin.library == "torch":
        return sys.modules["torch"].cuda.current_stream(origin.device).cuda_stream
    return sys.modules["cupy"].cuda.get_current_stream().ptr


# ---- device and stream ---------------------------------------------------------------------------------------------


class ForeignStream:
    """A framework's stream for CuPy, by its address. torch.cuda.Stream has `__cuda_stream__` itself since 2.10."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


_NOTHING = nullcontext()


def on(origin: Origin) -> AbstractContextManager[Any]:
    """A context in which CuPy uses the origin's device and its library's stream. On the host it does nothing."""
    if origin.device is None:
        return _NOTHING
    import cupy

    torch_stream = current_stream(origin) if origin.library == "torch" else None
    same_device = cupy.cuda.runtime.getDevice() == origin.device
    if same_device and (torch_stream is None or torch_stream == cupy.cuda.get_current_stream().ptr):
        return _NOTHING
    stack = ExitStack()
    stack.enter_context(cupy.cuda.Device(origin.device))
    if torch_stream is not None:
        stack.enter_context(cupy.cuda.Stream.from_external(ForeignStream(torch_stream)))
    return stack


def download(given: Given) -> np.ndarray:
    """Copy the array to the host, after the work on its stream."""
    if given.origin.device is None:
        return given.array
    with on(given.origin):
        return as_cupy(given).get()  # synchronizes


def as_cupy(given: Given) -> Any:
    """A CuPy array that shares the memory, on the current device; the array itself if it is a CuPy array."""
    import cupy

    if isinstance(given.array, cupy.ndarray):
        return given.array
    memory = cupy.cuda.UnownedMemory(given.address, span(given), given.array, given.origin.device)
    return cupy.ndarray(given.shape, given.dtype, cupy.cuda.MemoryPointer(memory, 0), given.strides)


def span(given: Given | Spec) -> int:
    """Bytes from an array's first element to the end of its last. Strides must not be negative."""
    if given.strides is None or 0 in given.shape:
        return math.prod(given.shape) * given.dtype.itemsize
    return sum([(n - 1) * step for n, step in zip(given.shape, given.strides, strict=True)]) + given.dtype.itemsize


def upload(array: np.ndarray, origin: Origin) -> Any:
    """Copy a host array to the origin's library and device."""
    if origin.device is None:
        return leave(array, origin)
    with on(origin):
        return leave(require_cupy("the array").asarray(array), origin)


def to_device(x: Any, device: Any) -> Any:
    """The array on another device of its library; None stays None."""
    if x is None:
        return None
    library = read(x, "the array").origin.library
    if library == "torch":
        return x.to(device)
    if library == "jax":
        return sys.modules["jax"].device_put(x, device)
    if library == "cupy":
        cupy = sys.modules["cupy"]
        if isinstance(device, str):
            raise ValueError(f"device must be a number or a cupy.cuda.Device for CuPy arrays, got {device!r}.")
        with cupy.cuda.Device(device):
            return cupy.asarray(x)
    return x.to_device(device)


def check_same_device(**origins: Origin) -> None:
    """Raise a ValueError that lists the devices, unless all arguments are on one device."""
    if len({origin.device for origin in origins.values()}) > 1:
        received = ", ".join(f"{name} is {origin}" for name, origin in origins.items())
        raise ValueError(f"arguments must be on one device: {received}. Move them to the same one.")


# ---- checks --------------------------------------------------------------------------------------------------------

MOST_CHARACTERS = 60  # the longest value that an error shows in full


def shown(value: Any) -> str:
    """A value as an error shows it, in one line. Long values are described instead."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape != ():
        return f"{type(value).__name__} of shape {list(shape)}"
    if isinstance(value, (list, tuple, set, dict)) and len(value) > 4:
        return f"{type(value).__name__} of length {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an int of many digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def check_choice(value: Any, choices: Sequence[str], name: str) -> None:
    """Raise an error unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")


def check_integer(value: Any, name: str) -> int:
    """The value as an int; NumPy integers are accepted, and bools are not."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {shown(value)} of type {type(value).__name__}.")
    return int(value)


def check_number(value: Any, name: str, also: str = "") -> float:
    """The value as a float; bools are not accepted. `also` names other accepted values in the error."""
    if type(value) is float:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number{also}, got {shown(value)} of type {type(value).__name__}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got {shown(value)}.") from None


def check_flag(value: Any, name: str) -> bool:
    """The value as a bool; only True, False and NumPy bools are accepted."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}.")
    return bool(value)


def check_points(
    points: Given | Spec,
    lengths: Any,
    name: str = "points",
    lengths_name: str = "lengths",
    dimensions: tuple[int, ...] = (3,),
) -> tuple[int, ...]:
    """Check shape and dtype of points [N, d] or [B, n, d], and return the lengths of their clouds.

    The dtype must be a float: integer coordinates have an unknown scale, on which their voxels would depend.
    """
    found = cloud_lengths(points.shape, lengths, name, lengths_name, dimensions)
    check_floats(points, name)
    return found


def check_floats(x: Given | Spec, name: str) -> None:
    """Raise a TypeError unless the elements of x are floats that every op takes."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}: convert by {name}.astype('float32')."
        )


def cloud_lengths(
    shape: tuple[int, ...],
    lengths: Any,
    name: str = "points",
    lengths_name: str = "lengths",
    dimensions: tuple[int, ...] = (3,),
) -> tuple[int, ...]:
    """The lengths of the clouds in an array of this shape, [N, d] or [B, n, d], where d is one of `dimensions`."""
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} must have shape [N, 3] (or [B, n, 3]), got {list(shape)}.")
    if shape[-1] not in dimensions:
        cure = f"take {name}[..., :3]" if shape[-1] > 3 else "pad the missing ones with zeros"
        if shape[-1] > 3 and 2 in dimensions:
            cure += ". Distances of features, and norms other than L2, are for torch.cdist or scipy.spatial.cKDTree"
        raise ValueError(
            f"{name} must have {' or '.join(map(str, dimensions))} coordinates in its last dimension, got shape "
            f"{list(shape)}: {cure}."
        )
    if len(shape) == 3:
        if lengths is not None:
            raise ValueError(
                f"{name} of shape {list(shape)} already says its lengths (B clouds of n points): leave {lengths_name} "
                f"out. If the clouds are padded, pack them first: {name}, {lengths_name} = gpu3d.interop.pack({name}, "
                f"{lengths_name})."
            )
        return (shape[1],) * shape[0]
    if lengths is None:
        return (shape[0],)
    return check_lengths(lengths, shape[0], name, lengths_name)


FEW_LENGTHS = 64  # for more, NumPy takes less time than a list


def many_lengths(lengths: Any) -> np.ndarray | None:
    """More than FEW_LENGTHS ints as an int64 array. None for fewer, and for what `check_lengths` has to judge."""
    if isinstance(lengths, np.ndarray):
        return lengths if lengths.dtype == INT64 and lengths.ndim == 1 and lengths.size > FEW_LENGTHS else None
    if not isinstance(lengths, (list, tuple)) or len(lengths) <= FEW_LENGTHS:
        return None
    try:
        array = int64_array(lengths)
    except struct.error:  # not an integer, or beyond 64 bits
        return None
    for i in np.flatnonzero(array <= 1).tolist():
        if type(lengths[i]) is bool:  # packed as 0 or 1, and yet no length; nearly all lengths are larger
            return None
    return array


def sums_to(lengths: np.ndarray, total: int) -> bool:
    """Whether lengths, none of them negative, have this sum."""
    if lengths.min() < 0 or lengths.max() > total or len(lengths) * total >= 2**63:
        return False  # or unknown, because the sum may overflow
    return int(lengths.sum(dtype=np.int64)) == total


def int64_array(numbers: Sequence[int]) -> np.ndarray:
    """Integers as an int64 array, three times as fast as np.array."""
    return np.frombuffer(struct.pack(f"{len(numbers)}q", *numbers), np.int64)


def int_tuple(numbers: np.ndarray) -> tuple[int, ...]:
    """The elements of an array of integers that fit an int64, faster than by a list."""
    return struct.unpack(f"{len(numbers)}q", np.ascontiguousarray(numbers, np.int64).data)


def check_lengths(lengths: Any, total: int, name: str, lengths_name: str = "lengths") -> tuple[int, ...]:
    """The lengths as ints, which must be >= 0 and sum to `total`. None means one cloud."""
    if lengths is None:
        return (total,)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(lengths, torch.Tensor) and lengths.device.type == "cpu":
        lengths = lengths.detach().numpy()
    if not isinstance(lengths, (list, tuple, np.ndarray)):
        cure = "pass a list."
        if hasattr(lengths, "__dlpack__"):
            cure = f"output shapes follow from them without a device sync. Convert by {lengths_name}.tolist()."
        raise TypeError(
            f"{lengths_name} must be host integers, e.g. {lengths_name}=[{total}], got {type(lengths).__name__}: {cure}"
        )
    if isinstance(lengths, np.ndarray):
        if lengths.ndim != 1:
            raise ValueError(f"{lengths_name} must be one-dimensional, got shape {list(lengths.shape)}.")
        if lengths.dtype.kind in "iu":
            if len(lengths) > FEW_LENGTHS and sums_to(lengths, total):
                return int_tuple(lengths)
            lengths = lengths.tolist()
    # What follows this is for what is rare, and takes ten times as long.
    if (
        list(map(type, lengths)).count(int) == len(lengths)
        and sum(lengths) == total
        and (not lengths or min(lengths) >= 0)
    ):
        return tuple(lengths)
    out = []
    for b, length in enumerate(lengths):
        if isinstance(length, (bool, np.bool_)) or not isinstance(length, (int, np.integer)):
            raise TypeError(
                f"{lengths_name} must be integers, got {lengths_name}[{b}] = {shown(length)} of type "
                f"{type(length).__name__}."
            )
        if length < 0:
            raise ValueError(f"{lengths_name} must not be negative, got {lengths_name}[{b}] = {length}.")
        out.append(int(length))
    if sum(out) != total:
        raise ValueError(
            f"{lengths_name} must sum to the number of {name}, got a sum of {sum(out)} for {total} {name}."
        )
    return tuple(out)


def check_finite(points: Given, name: str = "points") -> None:
    """Raise a ValueError that counts the points with NaN or inf and names the first. Synchronizes on a GPU."""
    array = points.array if points.device is None else as_cupy(points)
    array = array.reshape(-1, points.shape[-1])
    xp = np if points.device is None else sys.modules["cupy"]
    finite = xp.isfinite(array.astype(np.float32) if points.dtype == BFLOAT16 else array)
    if bool(finite.all()):  # synchronizes
        return
    bad = ~finite.all(axis=1)
    raise ValueError(
        f"{name} must be finite, got {int(bad.sum())} of {len(array)} with NaN or inf, the first at index "
        f"{int(bad.argmax())}. Drop them by {name}[isfinite({name}).all(axis=1)], or pass "
        "check_finite=False: a non-finite coordinate then counts as voxel 65535 and changes nothing for other points."
    )
