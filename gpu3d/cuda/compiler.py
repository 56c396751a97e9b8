# SPDX-License-Identifier: Apache-2.0
"""The only module that touches NVRTC and RawModule: find a source, specialise it, compile, cache, load.

A kernel file is specialised by a few -D macros and compiled for the device at its first use. The cubin is cached on
disk under a hash of everything that affects it: the text with its headers inlined, the options, and the version of
NVRTC. So an edited header is noticed, and machines can share a folder. Compiling needs no GPU and no CuPy, so
`make kernels` can check every kernel on any machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gpu3d.cuda.plan import Kernel, Macros


class Configuration(NamedTuple):
    """One module to compile: a file of kernels_cu and the macros that specialise it."""

    source: str
    macros: Macros = ()
    only: str | None = None  # the only target that it compiles for, if it uses features of that target

    def __str__(self) -> str:
        return " ".join([self.source, *(f"-D{name}={value}" for name, value in self.macros)])


# ---- sources -------------------------------------------------------------------------------------------------------


def source_dir() -> Path:
    """The folder of the CUDA files: inside an installed package, or next to the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"gpu3d's CUDA sources are missing: no folder kernels_cu in {package} or beside it. Reinstall gpu3d."
    )


@functools.cache
def source_text(name: str) -> str:
    """The text of kernels_cu/<name>.cu or of header <name>, with its includes inlined, each header once."""
    inlined: set[str] = set()

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
    """The NVRTC library, from pip, conda or a CUDA toolkit."""
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
    """The version (major, minor) of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_source(text: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile a CUDA source; return cubin and log. Raises RuntimeError with the compiler's log."""
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
    """The options for NVRTC."""
    # No fast math and no flushing of subnormals, because voxels are defined by correctly rounded float32.
    return [f"-arch={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in configuration.macros)]


# ---- disk cache ----------------------------------------------------------------------------------------------------
#
# A cubin is stored as <source>-<arch>-<key>-<hash of its content>.cubin. The key is a hash of everything that affects
# it. The hash of the content shows whether a file is damaged. If the cache folder cannot be written or cannot be
# trusted, a process compiles into a folder of its own. Otherwise another user who can write the file could run code
# here.


def cache_dir() -> Path | None:
    """The folder of cubins: $GPU3D_CACHE_DIR, or gpu3d in the user's cache folder. None if the user has no home."""
    if folder := os.environ.get("GPU3D_CACHE_DIR"):
        return Path(folder)
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(folder):  # the XDG specification says to ignore relative paths
        return Path(folder) / "gpu3d"
    try:
        return Path.home() / ".cache" / "gpu3d"
    except RuntimeError:
        return None


@functools.cache
def _process_dir() -> tempfile.TemporaryDirectory[str]:
    """A folder for the cubins of this process, for when the cache folder cannot be used."""
    return tempfile.TemporaryDirectory(prefix="gpu3d-")


_locks: dict[str, threading.Lock] = {}
_in_process_dir: dict[str, Path] = {}


def cubin_path(configuration: Configuration, arch: str) -> Path:
    """The file of the compiled module. It is compiled now if no process has done so."""
    text, options = source_text(configuration.source), compile_options(configuration, arch)
    key = hashlib.sha256("\0".join([text, *options, repr(nvrtc_version())]).encode()).hexdigest()[:32]
    name = f"{configuration.source}-{arch}-{key}"
    with _locks.setdefault(name, threading.Lock()):  # of two threads one compiles and the other waits
        folder = cache_dir()
        found = _in_process_dir.get(name) or (folder and _kept(folder, name))
        if found:
            return found
        cubin, _ = compile_source(text, f"{configuration.source}.cu", options)
        file = f"{name}-{_content_hash(cubin)}.cubin"
        with contextlib.suppress(OSError):
            if folder and (not folder.exists() or _trusted(folder)):
                return _write(folder / file, cubin)
        # With a read-only, full or untrusted cache folder, each process compiles for itself.
        with _locks.setdefault("process dir", threading.Lock()):
            folder = Path(_process_dir().name)
        _in_process_dir[name] = _write(folder / file, cubin)
        return _in_process_dir[name]


def _content_hash(cubin: bytes) -> str:
    return hashlib.sha256(cubin).hexdigest()[:16]


def _kept(folder: Path, name: str) -> Path | None:
    """The file in the cache with this cubin, if it is complete and can be trusted."""
    try:
        candidates = sorted(folder.glob(f"{name}-*.cubin")) if _trusted(folder) else []
    except OSError:
        return None
    for path in candidates:
        with contextlib.suppress(OSError):
            if _trusted(path, folder) and path.stem.endswith("-" + _content_hash(path.read_bytes())):
                return path
    return None


def _trusted(path: Path, folder: Path | None = None) -> bool:
    """Whether only this user, root or the folder's owner can have written the file, and nobody else the folder."""
    try:
        status = path.stat()
        if os.name == "nt":
            return True
        owners = {0, os.getuid()} | ({folder.stat().st_uid} if folder else {status.st_uid})
    except OSError:
        return False
    return status.st_uid in owners and not status.st_mode & 0o002


def _write(path: Path, content: bytes) -> Path:
    """Write a file atomically: two processes may write the same kernel, and no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes the file private, but a shared folder is for all users
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


# ---- kernels -------------------------------------------------------------------------------------------------------


OLDEST = 80  # compute capability, times 10


@functools.cache
def device_arch(device: int) -> str:
    """The target to compile for. On Hopper sm_90a, because plain sm_90 lacks wgmma and setmaxnreg."""
    import cupy

    capability = cupy.cuda.Device(device).compute_capability
    if int(capability) < OLDEST:
        raise RuntimeError(
            f"gpu3d needs a GPU of compute capability {OLDEST / 10} or newer (Ampere, with bfloat16), and "
            f"cuda:{device} has {int(capability) / 10}: pass NumPy arrays, which run on the CPU."
        )
    return "sm_90a" if capability == "90" else f"sm_{capability}"


_loaded: dict[tuple[Kernel, int], tuple[int, Any]] = {}


def load(kernel: Kernel, device: int) -> tuple[int, Any]:
    """The driver's handle of a kernel on the current device, which is `device`, and an object that keeps it loaded.

    A kernel is compiled at its first use on this machine, and loaded at its first use on this device.
    """
    found = _loaded.get((kernel, device))
    if found is None:
        import cupy

        offered = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]
        if kernel.shared_mem > offered:
            raise RuntimeError(
                f"{kernel.function} needs {kernel.shared_mem} bytes of shared memory a block; "
                f"cuda:{device} offers {offered}."
            )
        path = cubin_path(Configuration(kernel.source, kernel.macros), device_arch(device))
        raw = cupy.RawModule(path=str(path)).get_function(kernel.function)
        if kernel.shared_mem > raw.max_dynamic_shared_size_bytes:  # another plan may use this function with more
            raw.max_dynamic_shared_size_bytes = kernel.shared_mem
        found = _loaded[kernel, device] = raw.kernel.ptr, raw
    return found


# ---- ahead of time ---------------------------------------------------------------------------------------------------


def precompile(configurations: Iterable[Configuration], *, progress: bool = True) -> int:
    """Compile every configuration for the current device into the cache; return their number."""
    import cupy
    from tqdm import tqdm

    arch = device_arch(cupy.cuda.runtime.getDevice())
    todo = [configuration for configuration in configurations if configuration.only in (None, arch)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda c: cubin_path(c, arch), todo)
        for _ in tqdm(done, total=len(todo), desc=f"gpu3d kernels for {arch}", disable=not progress):
            pass
    return len(todo)
