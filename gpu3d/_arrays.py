# SPDX-License-Identifier: Apache-2.0
"""What comes in and what goes out: any library's arrays, and every check that several ops share.

`enter` turns the caller's array into a NumPy array (host) or a CuPy array (CUDA) without a copy and remembers where it
came from; `leave` turns a result back into the caller's kind. A framework is only looked for in `sys.modules`: whoever
hands in its array has imported it already. `on` makes the array's device and its framework's stream current for CuPy.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np

try:
    from ml_dtypes import bfloat16 as _bfloat16
except ImportError as error:  # pragma: no cover - a base dependency
    raise ImportError('gpu3d needs ml_dtypes for bfloat16: pip install "ml_dtypes"') from error

BFLOAT16 = np.dtype(_bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16)

DLPACK_CPU, DLPACK_CUDA, DLPACK_PINNED, DLPACK_MANAGED = 1, 2, 3, 13


class Origin(NamedTuple):
    """Where an array came from: the library that made it, and its CUDA device (None: the host)."""

    library: str
    device: int | None

    def __str__(self) -> str:
        return f"{self.library} on " + ("the CPU" if self.device is None else f"cuda:{self.device}")


_NUMPY = Origin("numpy", None)
_cupy_origin = functools.cache(functools.partial(Origin, "cupy"))
_torch_origin = functools.cache(functools.partial(Origin, "torch"))


# ---- in ------------------------------------------------------------------------------------------------------------


def enter(x: Any, name: str) -> tuple[Any, Origin]:
    """A NumPy or CuPy view of `x`, and its origin. Raises TypeError for what is no array, naming the argument."""
    if isinstance(x, np.ndarray):
        return x, _NUMPY
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return x, _cupy_origin(x.data.device_id)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _enter_torch(x, name, torch)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        return _enter_jax(x, name, jax)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        kind, device = x.__dlpack_device__()
        if kind in (DLPACK_CPU, DLPACK_PINNED):
            return np.from_dlpack(x), _NUMPY
        if kind in (DLPACK_CUDA, DLPACK_MANAGED):
            with require_cupy(name).cuda.Device(device):
                return require_cupy(name).from_dlpack(x), Origin("cupy", device)
        raise TypeError(
            f"{name} is on DLPack device type {int(kind)}; gpu3d reads CPU and CUDA memory. Copy it to one of them."
        )
    raise TypeError(
        f"{name} must be an array (NumPy, CuPy, torch, JAX or anything with __dlpack__), got {type(x).__name__}. "
        f"A list becomes one by numpy.asarray({name}, dtype=numpy.float32)."
    )


def require_cupy(name: str) -> Any:
    """CuPy, or an error that says why it is needed and how to get it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f'{name} is on a CUDA device, which needs CuPy: pip install "gpu3d[cuda13]" (or "gpu3d[cuda12]").'
        ) from error
    return cupy


def _enter_torch(x: Any, name: str, torch: Any) -> tuple[Any, Origin]:
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}: call {name}.to_dense().")
    if x.is_conj() or x.is_neg():  # views whose memory holds other values: z.conj(), z.conj().imag
        x = x.resolve_conj().resolve_neg()
    if x.is_cuda:
        cupy = require_cupy(name)
        dtype, origin = _numpy_dtype(x.dtype), _torch_origin(x.get_device())
        # From the pointer: cupy.from_dlpack costs 62 us a call (H100 host), this 2, and the stream is set by `on`.
        # Its owner is the storage: a tensor would keep its autograd graph alive, and could be given other memory.
        memory = cupy.cuda.UnownedMemory(x.data_ptr(), x.numel() * dtype.itemsize, x.untyped_storage(), origin.device)
        strides = None if x.is_contiguous() else tuple([step * dtype.itemsize for step in x.stride()])
        return cupy.ndarray(x.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides), origin
    if x.device.type != "cpu":
        raise TypeError(f"{name} is on device {x.device}; gpu3d runs on CPU and CUDA: move it by {name}.to('cuda').")
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(BFLOAT16), _torch_origin(None)
    return x.numpy(), _torch_origin(None)


@functools.cache
def _numpy_dtype(dtype: Any) -> np.dtype:
    """Of torch's dtype."""
    name = str(dtype).removeprefix("torch.")
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def _enter_jax(x: Any, name: str, jax: Any) -> tuple[Any, Origin]:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name} is a JAX tracer: plain gpu3d calls run outside of jax.jit, jax.grad and jax.vmap.")
    devices = x.devices()
    if len(devices) != 1:
        raise TypeError(f"{name} is sharded over {len(devices)} devices; gpu3d takes an array of one device.")
    (device,) = devices
    if device.platform == "cpu":
        return np.asarray(x), Origin("jax", None)
    if device.platform not in ("gpu", "cuda"):
        raise TypeError(f"{name} is on a JAX device of platform {device.platform!r}; gpu3d runs on CPU and CUDA.")
    cupy = require_cupy(name)
    ordinal = x.__dlpack_device__()[1]
    with cupy.cuda.Device(ordinal):
        return cupy.from_dlpack(x), Origin("jax", ordinal)


# ---- out -----------------------------------------------------------------------------------------------------------


def leave(array: Any, origin: Origin) -> Any:
    """The array as the kind that `origin` names; a copy only where the library keeps its own memory (JAX, CPU)."""
    if origin.library in ("numpy", "cupy"):
        return array
    if origin.library == "torch":
        torch = sys.modules["torch"]
        if origin.device is not None:
            owner = getattr(array.data.mem, "_owner", None)
            if isinstance(owner, torch.UntypedStorage):  # torch's own memory (interop.torch), not lent by DLPack
                return _tensor_of(owner, array, torch)
            return torch.from_dlpack(array)
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    jax = sys.modules["jax"]
    if origin.device is not None:
        return jax.dlpack.from_dlpack(array)
    return jax.device_put(array, jax.devices("cpu")[0])


def _tensor_of(storage: Any, array: Any, torch: Any) -> Any:
    """The CuPy array as a tensor of the memory that it lies in."""
    size = array.itemsize
    first = (array.data.ptr - storage.data_ptr()) // size
    out = torch.empty(0, dtype=_torch_dtype(array.dtype), device=storage.device)
    return out.set_(storage, first, array.shape, [step // size for step in array.strides])


@functools.cache
def _torch_dtype(dtype: np.dtype) -> Any:
    return getattr(sys.modules["torch"], dtype.name)


# ---- device and stream ---------------------------------------------------------------------------------------------


class ForeignStream:
    """A framework's stream for CuPy, by its address; torch.cuda.Stream says `__cuda_stream__` itself from 2.10 on."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


_NOTHING = nullcontext()


def on(origin: Origin) -> AbstractContextManager[Any]:
    """Makes the origin's device, and the stream its framework uses there, current for CuPy; no-op on the host."""
    if origin.device is None:
        return _NOTHING
    import cupy

    torch_stream = None
    if origin.library == "torch":
        # As torch's compiler asks for it: torch.cuda.current_stream makes an object, which takes ten times as long.
        torch_stream = sys.modules["torch"]._C._cuda_getCurrentRawStream(origin.device)
    same_device = cupy.cuda.runtime.getDevice() == origin.device
    if same_device and (torch_stream is None or torch_stream == cupy.cuda.get_current_stream().ptr):
        return _NOTHING
    stack = ExitStack()
    stack.enter_context(cupy.cuda.Device(origin.device))
    if torch_stream is not None:
        stack.enter_context(cupy.cuda.Stream.from_external(ForeignStream(torch_stream)))
    return stack


def check_same_device(**origins: Origin) -> None:
    """Every argument on one device, else a ValueError that lists where each one is."""
    if len({origin.device for origin in origins.values()}) > 1:
        received = ", ".join(f"{name} is {origin}" for name, origin in origins.items())
        raise ValueError(f"arguments must be on one device: {received}. Move them to the same one.")


# ---- checks --------------------------------------------------------------------------------------------------------


def check_choice(value: Any, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_integer(value: Any, name: str) -> int:
    """An int from anything that is one (numpy integers too, bool not)."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    return int(value)


def check_points(
    points: Any,
    lengths: Any,
    name: str = "points",
    lengths_name: str = "lengths",
    dimensions: tuple[int, ...] = (3,),
) -> tuple[Any, tuple[int, ...]]:
    """`pack_points` of a NumPy or CuPy array, whose dtype is checked.

    A float dtype is asked for: integer coordinates have lost their scale, and which voxel they fall into would depend
    on it.
    """
    packed, packed_lengths = pack_points(points, lengths, name, lengths_name, dimensions)
    if points.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, float64, float16 or bfloat16, got {points.dtype}: "
            f"convert by {name}.astype('float32')."
        )
    return packed, packed_lengths


def pack_points(
    points: Any,
    lengths: Any,
    name: str = "points",
    lengths_name: str = "lengths",
    dimensions: tuple[int, ...] = (3,),
) -> tuple[Any, tuple[int, ...]]:
    """Points of any library as [N, 3], and the cloud lengths as a tuple of ints that sum to N; or [N, d].

    d is one of `dimensions`. [B, n, 3] becomes [B * n, 3] with B equal lengths.
    """
    if points.ndim not in (2, 3):
        raise ValueError(f"{name} must have shape [N, 3] (or [B, n, 3]), got {list(points.shape)}.")
    if points.shape[-1] not in dimensions:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, dimensions))} coordinates in its last dimension, got shape "
            f"{list(points.shape)}: take {name}[..., :3]."
        )
    if points.ndim == 3:
        if lengths is not None:
            raise ValueError(
                f"{name} of shape {list(points.shape)} already says its lengths (B clouds of n points): "
                f"leave {lengths_name} out, or pack the points as [N, 3]."
            )
        clouds, each, coordinates = points.shape
        return points.reshape(clouds * each, coordinates), (each,) * clouds
    return points, check_lengths(lengths, points.shape[0], name, lengths_name)


def check_lengths(lengths: Any, total: int, name: str, lengths_name: str = "lengths") -> tuple[int, ...]:
    """Host integers >= 0 that sum to `total`; None means one cloud."""
    if lengths is None:
        return (total,)
    if not isinstance(lengths, (list, tuple, np.ndarray)):
        cure = "pass a list."
        if hasattr(lengths, "__dlpack__"):
            cure = f"output shapes follow from them without a device sync. Convert by {lengths_name}.tolist()."
        raise TypeError(
            f"{lengths_name} must be host integers, e.g. {lengths_name}=[{total}], got {type(lengths).__name__}: {cure}"
        )
    if set(map(type, lengths)) == {int} and min(lengths) >= 0 and sum(lengths) == total:
        return tuple(lengths)  # the rest is for what is rare, and takes ten times as long
    if isinstance(lengths, np.ndarray) and lengths.ndim != 1:
        raise ValueError(f"{lengths_name} must be one-dimensional, got shape {list(lengths.shape)}.")
    out = []
    for b, length in enumerate(lengths):
        if isinstance(length, (bool, np.bool_)) or not isinstance(length, (int, np.integer)):
            raise TypeError(
                f"{lengths_name} must be integers, got {lengths_name}[{b}] = {length!r} of type "
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


def check_finite(points: Any, name: str = "points") -> None:
    """A ValueError that counts the points with NaN or inf and names the first. Synchronizes on a GPU."""
    wide = points.astype(np.float32) if points.dtype == BFLOAT16 else points
    xp = np if isinstance(points, np.ndarray) else sys.modules["cupy"]
    finite = xp.isfinite(wide)
    if bool(finite.all()):  # synchronizes
        return
    bad = ~finite.all(axis=1)
    raise ValueError(
        f"{name} must be finite, got {int(bad.sum())} of {len(points)} with NaN or inf, the first at index "
        f"{int(bad.argmax())}. Drop them by {name}[isfinite({name}).all(axis=1)], or pass "
        "check_finite=False: a non-finite coordinate then counts as voxel 65535 and changes nothing for other points."
    )
