# SPDX-License-Identifier: Apache-2.0
"""Where verbs run: `--device`, and what this machine has."""

from __future__ import annotations

import argparse
import contextlib
import functools
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from gpu3d.cuda import compiler


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option `--device`."""
    parser.add_argument(
        "--device",
        metavar="cpu|cuda[:I]",
        type=_device,
        help="where it runs; cuda is all GPUs for many files, cuda:1 the second (default: cuda where a GPU works)",
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", text):
        raise argparse.ArgumentTypeError(f"a device is cpu, cuda or cuda:1, got {text}")
    return text


def gpus(device: str | None, stop: Callable[[str], NoReturn]) -> list[int]:
    """The GPUs that `--device` means, by number; none for the CPU."""
    if device == "cpu":
        return []
    cupy, why_not = working_cupy()
    if cupy is None:
        if device is not None:
            stop(f"--device {device} needs {why_not}")
        return []
    count = cupy.cuda.runtime.getDeviceCount()
    if device is None or device == "cuda":
        return list(range(count))
    number = int(device.removeprefix("cuda:"))
    if number >= count:
        stop(f"--device {device} does not exist: this process sees {count} GPU{'s' if count > 1 else ''}")
    return [number]


@contextlib.contextmanager
def on(gpu: int | None) -> Iterator[Callable[[np.ndarray], Any]]:
    """Within the block, what it yields puts an array on the GPU; None is the CPU."""
    if gpu is None:
        yield lambda array: array
    else:
        cupy = import_module("cupy")
        with cupy.cuda.Device(gpu):
            yield cupy.asarray


def fetch(array: Any) -> np.ndarray:
    """The array in host memory."""
    return np.asarray(array if isinstance(array, np.ndarray | np.generic) else array.get())


def milliseconds(call: Callable[[], object], gpu: int | None, calls: int) -> float:
    """The median time of a call. The caller has called it once before."""
    return (_on_cpu if gpu is None else _on_gpu)(call, calls)


def _on_cpu(call: Callable[[], object], calls: int) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _on_gpu(call: Callable[[], object], calls: int) -> float:
    cupy = import_module("cupy")
    call()
    times = []
    for _ in range(calls):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


@functools.cache
def working_cupy() -> tuple[ModuleType | None, str]:
    """CuPy if it can compile and run kernels; otherwise None, and a text that names what is missing and the cure."""
    cure = 'pip install "gpu3d[cuda13]", or "gpu3d[cuda12]" for a driver older than 580'
    if find_spec("cupy") is None:
        return None, f"CuPy: {cure}"
    # A broken installation raises errors of many kinds. Each means the same here: this part does not work.
    try:
        cupy = import_module("cupy")
    except Exception as error:
        return None, f"a CuPy that can be imported ({error}): {cure}"
    try:
        cupy.zeros(1)
    except Exception as error:
        return None, f"an NVIDIA GPU and driver that CuPy {cupy.__version__} can use ({error})"
    try:
        compiler.nvrtc_version()
    except Exception as error:
        return None, f"NVRTC, which compiles the kernels ({error}): {cure}"
    return cupy, ""


def name_of(gpu: int | None) -> str:
    """What a result says about the device that it ran on."""
    if gpu is None:
        return f"CPU ({platform.machine()}), NumPy {np.__version__}"
    cupy = import_module("cupy")
    name = cupy.cuda.runtime.getDeviceProperties(gpu)["name"].decode()
    capability = cupy.cuda.Device(gpu).compute_capability
    return f"{name}, compute capability {capability[:-1]}.{capability[-1]}"
