# SPDX-License-Identifier: Apache-2.0
"""The only module that touches NVRTC and RawModule: find a source, specialise it, compile, cache, launch.

A kernel file is specialised late, by a few -D macros, and compiled for the device at hand the first time it is asked
for. The cubin is cached on disk under a hash of everything that went into it: the text with its headers inlined,
the options and the version of NVRTC. So an edited header is noticed, and two machines may share a folder. Compiling
itself needs no GPU and no CuPy, which is how `make kernels` checks every kernel on any machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

Macros = tuple[tuple[str, int], ...]


class Configuration(NamedTuple):
    """One module to compile: a file of kernels_cu and the macros that specialise it."""

    source: str
    macros: Macros = ()
    only: str | None = None  # the one target it compiles for, if it uses what others lack

    def __str__(self) -> str:
        return " ".join([self.source, *(f"-D{name}={value}" for name, value in self.macros)])


# ---- sources -------------------------------------------------------------------------------------------------------


def source_dir() -> Path:
    """The folder of the CUDA files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"gpu3d's CUDA sources are missing: no folder kernels_cu in {package} or beside it. Reinstall gpu3d."
    )


@functools.cache
def source_text(name: str) -> str:
    """The text of kernels_cu/<name>.cu or of header <name>, with what it includes in its place, each header once."""
    inlined = set()

    def inline(file: str) -> str:
        if file in inlined:
            return ""
        inlined.add(file)
        text = (source_dir() / file).read_text(encoding="utf-8")
        return re.sub(r'^#include "(\w+\.cuh)"$', lambda match: inline(match[1]), text, flags=re.MULTILINE)

    return inline(name if name.endswith(".cuh") else f"{name}.cu")


# ---- NVRTC ---------------------------------------------------------------------------------------------------------


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC, wherever pip, conda or a CUDA toolkit put it."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except (ImportError, RuntimeError) as error:  # pathfinder's DynamicLibNotFoundError is a RuntimeError
        raise ImportError(
            'compiling kernels needs cuda-pathfinder and NVRTC: pip install "gpu3d[cuda13]" (with a GPU) '
            'or "gpu3d[kernels]".'
        ) from error
    return ctypes.CDLL(path)


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_source(text: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Cubin and log of one CUDA source. Raises RuntimeError with the compiler's log."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        log = _nvrtc_string(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if status != 0:
            raise RuntimeError(f"NVRTC {nvrtc_version()} could not compile {name} with {' '.join(options)}:\n{log}")
        return _nvrtc_string(program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_string(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(_nvrtc(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def compile_options(configuration: Configuration, arch: str) -> list[str]:
    # No fast math and no flushing of denormals: voxels are defined by correctly rounded float32.
    return [f"-arch={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in configuration.macros)]


# ---- disk cache ----------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where cubins are kept: $GPU3D_CACHE_DIR, else gpu3d in the user's cache folder."""
    if folder := os.environ.get("GPU3D_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu3d"


@functools.cache
def _process_dir() -> tempfile.TemporaryDirectory[str]:
    """Where cubins go in this process when the cache folder cannot be written."""
    return tempfile.TemporaryDirectory(prefix="gpu3d-")


_locks: dict[str, threading.Lock] = {}
_in_process_dir: dict[str, Path] = {}


def cubin_path(configuration: Configuration, arch: str) -> Path:
    """The compiled module as a file, compiled now if no process has done it yet."""
    text, options = source_text(configuration.source), compile_options(configuration, arch)
    key = hashlib.sha256("\0".join([text, *options, repr(nvrtc_version())]).encode()).hexdigest()[:32]
    name = f"{configuration.source}-{arch}-{key}.cubin"
    with _locks.setdefault(name, threading.Lock()):  # two threads: one compiles, the other waits
        path = _in_process_dir.get(name) or cache_dir() / name
        if os.access(path, os.R_OK):  # not Path.is_file: that raises where a parent may not be searched
            return path
        cubin, _ = compile_source(text, f"{configuration.source}.cu", options)
        try:
            return _write(cache_dir() / name, cubin)
        except OSError:  # a read-only or full cache folder costs a compilation a process, nothing else
            with _locks.setdefault("process dir", threading.Lock()):
                folder = Path(_process_dir().name)
            _in_process_dir[name] = _write(folder / name, cubin)
            return _in_process_dir[name]


def _write(path: Path, content: bytes) -> Path:
    """Whole or not at all: two processes that compile the same kernel both succeed, and no reader sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a shared folder is for every user
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


# ---- kernels -------------------------------------------------------------------------------------------------------


@functools.cache
def device_arch(device: int) -> str:
    """The target to compile for: sm_90a on Hopper, whose wgmma and setmaxnreg plain sm_90 lacks."""
    import cupy

    capability = cupy.cuda.Device(device).compute_capability
    return "sm_90a" if capability == "90" else f"sm_{capability}"


@functools.cache
def device_limits(device: int) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a block may ask for)."""
    import cupy

    attributes = cupy.cuda.Device(device).attributes
    return attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"]


class Kernel(NamedTuple):
    """A loaded kernel and the buffer that its arguments are packed into."""

    arguments: struct.Struct
    buffer: Any
    places: tuple[tuple[int, int], ...]  # where each argument lies in `buffer`, and its bytes
    parameters: int  # address of the array that says so to the driver
    lock: threading.Lock  # two threads must not pack at once
    function: int  # the driver's handle
    start: Callable[..., None]  # cuLaunchKernel or cuLaunchCooperativeKernel, of this function
    extra: tuple[int, ...]  # cuLaunchKernel's last argument, which the cooperative launch does not have
    current_stream: Callable[[], Any]
    keep: tuple[Any, ...]  # the RawKernel, which keeps the module loaded, and the array of parameters


class Launched(NamedTuple):
    """A launch of a dry run."""

    kernel: Kernel
    grid: int
    block: int
    shared_mem: int
    arguments: bytes


class Cleared(NamedTuple):
    """Memory that was set to zeros, likewise."""

    address: int
    size: int


class _Thread(threading.local):
    """What a thread that launches knows of itself."""

    has_context = False
    steps: list[Launched | Cleared] | None = None  # in a dry run: what it would launch and clear


_kernels: dict[tuple[Any, ...], Kernel] = {}
_thread = _Thread()


def make_context_current() -> None:
    """The driver launches on the calling thread's context, which a new thread (torch's backward) has none of yet."""
    if not _thread.has_context:
        from cupy.cuda import runtime

        runtime.setDevice(runtime.getDevice())
        _thread.has_context = True


class NotDryError(RuntimeError):
    """A dry run came upon work that it cannot take down."""


@contextlib.contextmanager
def dry_run() -> Iterator[list[Launched | Cleared]]:
    """What this thread launches and clears in here, in order; none of it is done, so it may be of no memory at all.

    CuPy's own kernels and copies are captured into a CUDA graph that is never launched; where there were any, this
    raises NotDryError. What would have the host wait raises an error of CuPy's: a stream that is captured cannot.
    """
    from cupy.cuda import Stream, runtime

    steps: list[Launched | Cleared] = []
    stream, mode, nodes = Stream(non_blocking=True), ctypes.c_int(runtime.streamCaptureModeRelaxed), ctypes.c_size_t()
    exchange = driver().cuThreadExchangeStreamCaptureMode  # this thread may be capturing, and would not load kernels
    exchange(ctypes.byref(mode))
    try:
        runtime.streamBeginCapture(stream.ptr, runtime.streamCaptureModeRelaxed)
        try:
            _thread.steps = steps
            with stream:
                yield steps
        finally:
            _thread.steps = None
            graph = runtime.streamEndCapture(stream.ptr)
            status = driver().cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(nodes))
            runtime.graphDestroy(graph)
    finally:
        exchange(ctypes.byref(mode))
    if status or nodes.value:
        raise NotDryError(f"{nodes.value} kernels or copies of CuPy's own stand in a call, or none could be counted.")


@functools.cache
def driver() -> ctypes.CDLL:
    """CUDA's driver, for what CuPy has no name for."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def kernel(
    source: str, function: str, signature: str, macros: Macros = (), *, shared_mem: int = 0, cooperative: bool = False
) -> Kernel:
    """The kernel `function` of kernels_cu/<source>.cu for the current device, compiled and loaded once.

    `signature` has a format of the module `struct` for each parameter: Q a pointer or u64, i an int, q a long long,
    f a float, d a double, 16s a struct of 16 bytes. `shared_mem` is the dynamic shared memory in bytes that
    launches may use.
    """
    import cupy
    from cupy_backends.cuda.api import driver as launcher

    device = cupy.cuda.runtime.getDevice()
    key = (device, source, function, macros, shared_mem)
    found = _kernels.get(key)
    if found is None:
        if shared_mem > device_limits(device)[1]:
            raise RuntimeError(
                f"{function} needs {shared_mem} bytes of shared memory a block; "
                f"cuda:{device} offers {device_limits(device)[1]}."
            )
        path = cubin_path(Configuration(source, macros), device_arch(device))
        raw = cupy.RawModule(path=str(path), enable_cooperative_groups=cooperative).get_function(function)
        if shared_mem:
            raw.max_dynamic_shared_size_bytes = shared_mem
        formats = re.findall(r"\d*[Qiqfds]", signature)
        arguments = struct.Struct("<" + signature)
        buffer = ctypes.create_string_buffer(arguments.size)
        offsets = [struct.calcsize("<" + "".join(formats[:k])) for k in range(len(formats))]
        places = tuple(zip(offsets, (struct.calcsize("<" + part) for part in formats), strict=True))
        pointers = (ctypes.c_void_p * len(formats))(*(ctypes.addressof(buffer) + offset for offset in offsets))
        start, extra = (launcher.launchCooperativeKernel, ()) if cooperative else (launcher.launchKernel, (0,))
        found = Kernel(
            arguments,
            buffer,
            places,
            ctypes.addressof(pointers),
            threading.Lock(),
            raw.kernel.ptr,
            functools.partial(start, raw.kernel.ptr),
            extra,
            cupy.cuda.get_current_stream,
            (raw, pointers),
        )
        _kernels[key] = found
    return found


def launch(
    kernel: Kernel, *, grid: int, block: int, shared_mem: int = 0, args: tuple[int | float | bytes, ...]
) -> None:
    """Launches `kernel` on the current device and stream, `grid` blocks of `block` threads. A grid of 0 is no launch.

    `args` are numbers, addresses (`array.data.ptr`; 0 is null) and structs as bytes. They are cast as the kernel's
    signature declares them, which raises struct.error for what does not fit. They are packed here and not by
    RawKernel's call, which costs 12 us where this costs 4 (H100 host).
    """
    if not 0 < grid <= 0x7FFFFFFF:
        if grid == 0:
            return
        raise ValueError(f"a launch has at most 2**31 - 1 blocks, got {grid}.")
    make_context_current()
    if _thread.steps is not None:
        _thread.steps.append(Launched(kernel, grid, block, shared_mem, kernel.arguments.pack(*args)))
        return
    stream = kernel.current_stream().ptr
    with kernel.lock:
        kernel.arguments.pack_into(kernel.buffer, 0, *args)
        kernel.start(grid, 1, 1, block, 1, 1, shared_mem, stream, kernel.parameters, *kernel.extra)


def clear(memory: Any, size: int) -> None:
    """Sets `size` bytes from a cupy.cuda.MemoryPointer on to zeros, on the current stream."""
    if _thread.steps is not None:
        _thread.steps.append(Cleared(memory.ptr, size))
        return
    memory.memset_async(0, size)


# ---- workspaces ------------------------------------------------------------------------------------------------------


def ends(*sizes: int) -> tuple[int, ...]:
    """Where arrays of so many bytes begin in one allocation, and where the last ends."""
    return tuple(itertools.accumulate(((size + 15) // 16 * 16 for size in sizes), initial=0))


def allocate(offsets: tuple[int, ...]) -> tuple[Any, list[int]]:
    """One allocation for several arrays: the memory, and their addresses."""
    import cupy

    memory = cupy.cuda.alloc(offsets[-1])
    address = memory.ptr
    return memory, [address + end for end in offsets[:-1]]


def workspace(*sizes: int) -> tuple[Any, list[int]]:
    """The same from the arrays' bytes."""
    return allocate(ends(*sizes))


def results(offsets: tuple[int, ...]) -> list[Any]:
    """Memory for several arrays that are returned: one allocation, or one for each where the allocator is `apart`.

    A framework's tensors each own their memory (interop.torch); for CuPy's arrays one allocation costs less time.
    """
    import cupy

    if getattr(cupy.cuda.get_allocator(), "apart", False):
        return [cupy.cuda.alloc(end - begin) for begin, end in itertools.pairwise(offsets)]
    memory = cupy.cuda.alloc(offsets[-1])
    return [memory + end for end in offsets[:-1]]


# ---- ahead of time ---------------------------------------------------------------------------------------------------


def precompile(configurations: Iterable[Configuration], *, progress: bool = True) -> int:
    """Compiles every configuration for the current device into the cache; returns how many there are."""
    import cupy
    from tqdm import tqdm

    arch = device_arch(cupy.cuda.runtime.getDevice())
    todo = [configuration for configuration in configurations if configuration.only in (None, arch)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda c: cubin_path(c, arch), todo)
        for _ in tqdm(done, total=len(todo), desc=f"gpu3d kernels for {arch}", disable=not progress):
            pass
    return len(todo)
