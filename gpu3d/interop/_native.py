# SPDX-License-Identifier: Apache-2.0
"""play.c: compiled by the machine's C compiler in each process that has programs to play, in a tenth of a second.

Nothing is built when gpu3d is installed, and nothing has to be: without a compiler, or where what it made cannot be
loaded, Python launches what play.c would have launched. $CC names another compiler than cc. The library is kept in no
folder that others could write to, for it runs with the rights of who loads it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from gpu3d import _cuda

SOURCE = Path(__file__).with_name("play.c")
OPTIONS = "-O2", "-std=c11", "-shared", "-fPIC"
MOST_BYTES, MOST_PLACES = 4096, 64  # mirror play.c
DRIVER = "cuLaunchKernel", "cuLaunchCooperativeKernel", "cuMemsetD8Async", "cuCtxGetDevice"  # its Driver


class Known(ctypes.Structure):
    """A call that XLA's handler plays without Python."""

    _fields_ = [
        ("next", c_void_p),
        ("text", ctypes.c_char_p),
        ("length", c_uint64),
        ("device", c_int64),
        ("buffers", c_int64),
        ("program", c_void_p),
    ]


# ---- the library ---------------------------------------------------------------------------------------------------


def load(driver: Sequence[int]) -> ctypes.CDLL:
    """The library, which launches by these functions of the driver's. Raises OSError where it cannot be had.

    It is called without the GIL, for the driver waits where its queue is full.
    """
    with tempfile.TemporaryDirectory(prefix="gpu3d-") as folder:
        made = os.path.join(folder, "play.so")
        command = [*shlex.split(os.environ.get("CC") or "cc"), *OPTIONS, "-o", made, str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr}")
        library = ctypes.CDLL(made)
    library.play.argtypes = c_void_p, c_void_p, c_void_p
    library.handle.argtypes, library.handle.restype = (c_void_p,), c_void_p
    library.use_driver((c_void_p * len(DRIVER))(*driver))
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """play.c with CUDA's driver; None: Python does it."""
    try:
        return load([ctypes.cast(getattr(_cuda.driver(), name), c_void_p).value or 0 for name in DRIVER])
    except (OSError, AttributeError, ValueError):  # no driver, no compiler, or one that is not what $CC says
        return None


# ---- programs ------------------------------------------------------------------------------------------------------


def program(steps: Sequence[Any]) -> Any:
    """Steps of _replay as `play` takes them; None: Python plays them."""
    launches = [step for step in steps if hasattr(step, "kernel")]
    fits = all(len(step.arguments) <= MOST_BYTES and len(step.kernel.places) <= MOST_PLACES for step in launches)
    if not fits or library() is None:
        return None
    words = [len(steps), *(word for step in steps for word in step.words)]
    return (c_uint64 * len(words))(*words)


def play(program: Any, addresses: Sequence[int], stream: int) -> None:
    """Launches it on the current context."""
    native = library()
    assert native is not None
    status = native.play(program, struct.pack(f"={len(addresses)}Q", *addresses), stream)
    if status:
        from cupy.cuda import driver

        raise driver.CUDADriverError(status)


# ---- XLA's handler -------------------------------------------------------------------------------------------------

_keep: list[Any] = []  # what play.c knows of


def handler(python: Any) -> Any:
    """The C function that plays what is known and has `python`, another one, do the rest; `python` without play.c."""
    native = library()
    if native is None:
        return python
    native.use_python(ctypes.cast(python, c_void_p))
    _keep.append(python)
    return native.handle


def know(text: bytes, device: int, buffers: int, program: Any) -> None:
    """From now on, calls of this attribute are played on the device, where they have so many buffers."""
    native = library()
    if native is not None and program is not None:
        call = Known(None, text, len(text), device, buffers, ctypes.addressof(program))
        _keep.append((call, program))
        native.know(ctypes.byref(call))
