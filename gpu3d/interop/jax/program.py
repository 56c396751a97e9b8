# SPDX-License-Identifier: Apache-2.0
"""Puts calls of calls.py into JAX programs: `jax.ffi.ffi_call` with a text attribute, results and a workspace.

The workspace is one more result, so XLA owns all memory that a call uses. It is large enough for each GPU of this
machine. On a machine without a GPU it is large enough for each architecture, because a program may be exported there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax

from gpu3d._arrays import UINT8, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import DEVICES, Device
from gpu3d.interop.jax import handler
from gpu3d.interop.jax.calls import CALLS, Work

TARGET = "gpu3d"
MAX_TEXT = 4096  # results are cached for attributes of up to this many bytes; those of many clouds are longer

Options = tuple[tuple[str, Any], ...]  # static arguments, hashable for JAX


def register() -> None:
    """Register the foreign function with XLA."""
    for platform in ("cpu", "CUDA"):
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler.handler(platform)), platform=platform)


def options(**static: Any) -> Options:
    """The options of a call in canonical order."""
    return tuple(sorted(static.items()))


def spec(x: Any) -> Spec:
    """The spec of a JAX array or tracer."""
    return Spec(tuple(x.shape), x.dtype)


def call(name: str, static: Options, *arrays: jax.Array) -> tuple[Any, ...]:
    """The results of a call of CALLS."""
    text = handler.attribute(name, dict(static))
    look_up = _results if len(text) <= MAX_TEXT else _results.__wrapped__
    results, workspace = look_up(name, static, tuple(map(spec, arrays)))
    made = [*results, Spec((workspace,), UINT8)]
    manual = {}
    if arrays and varying(arrays[0]):  # then all arrays do, see `alike`
        of = jax.typeof(arrays[0])
        sharding = jax.sharding.NamedSharding(of.sharding.mesh, jax.sharding.PartitionSpec())
        manual = {"sharding": sharding, _MANUAL: getattr(of, _MANUAL)}
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, **manual) for x in made]
    _finish_at_exit()
    run = jax.ffi.ffi_call(TARGET, structs, vmap_method="sequential")
    return tuple(run(*arrays, call=text)[: len(results)])


@functools.lru_cache(maxsize=1024)
def _results(name: str, static: Options, specs: tuple[Spec, ...]) -> tuple[Sequence[Spec], int]:
    """The specs of a call's results, and the bytes of workspace that suffice on every device."""
    work = CALLS[name](*specs, **dict(static))
    return work.results, max([_workspace(work, specs, device) for device in devices()])


def _workspace(work: Work, specs: Sequence[Spec], device: Device) -> int:
    try:
        return work.on_gpu(*specs, device).plan.workspace
    except (TypeError, ValueError):  # this device cannot run the call; the error comes at run time
        return 0


@functools.cache
def devices() -> tuple[Device, ...]:
    """The GPUs of this machine, or one of each architecture if there are none."""
    try:
        import cupy

        here = [launcher.device(ordinal) for ordinal in range(cupy.cuda.runtime.getDeviceCount())]
    except (ImportError, RuntimeError):  # no CuPy, no driver or no GPU
        here = []
    return tuple(dict.fromkeys(here)) or tuple(DEVICES.values())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def last_call(name: str, static: Options, *arrays: jax.Array) -> Any:
    """`call` inside a gradient, where a further derivative is an error."""
    return call(name, static, *arrays)


@last_call.defjvp
def _no_second_derivative(name: str, static: Options, primals: Any, tangents: Any) -> Any:
    raise RuntimeError(
        f"gpu3d has no second derivatives: jax asked for the derivative of {name} inside of a gradient. Apply "
        "jax.lax.stop_gradient to what the inner gradient is taken at, or do without the outer one."
    )


# ---- shard_map -----------------------------------------------------------------------------------------------------

# JAX releases have different names for the axes along which an array varies (in its type), and for adding such axes.
_MANUAL = "manual_axis_type" if hasattr(jax.typeof(0), "manual_axis_type") else "vma"  # from 0.10 on
_vary: Any = (
    functools.partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else getattr(jax.lax, "pvary", None)
)


def varying(x: Any) -> frozenset[Any]:
    """The axes of a mesh along which an array varies."""
    manual = getattr(jax.typeof(x), _MANUAL)
    return getattr(manual, "varying", manual)


def alike(*arrays: Any) -> list[Any]:
    """The arrays of one call. Inside shard_map all are made to vary along the same axes.

    The gradient of an array that did not vary is then a sum. JAX does the same for its own operations.
    """
    every: frozenset[Any] = frozenset().union(*map(varying, arrays))
    cast = [(x, tuple(every - varying(x))) for x in arrays]
    return [_vary(x, missing) if missing else x for x, missing in cast]


# ---- the interpreter's end -----------------------------------------------------------------------------------------


def _finish() -> None:
    """Wait for programs that still run, because no thread can call Python once the interpreter is ending.

    JAX would wait for such a call forever. Live arrays tell when they are ready. A program whose results nobody holds
    ends before a later program of its thread.
    """
    static = options(
        lengths=(0,),
        bucket_size=16,
        hash="zorder_div",
        balance="spill",
        voxel_size=None,
        seed=0,
        bounds=None,
        check_finite=False,
    )
    with contextlib.suppress(Exception):  # errors of a program are for those who read its results
        call("bucketize", static, jax.numpy.zeros((0, 3)))[0].block_until_ready()
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):
            array.block_until_ready()


@functools.cache
def _finish_at_exit() -> None:
    """Register `_finish` at the first call, so that programs without calls do not wait."""
    atexit.register(_finish)
