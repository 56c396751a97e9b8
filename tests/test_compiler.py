# SPDX-License-Identifier: Apache-2.0
"""The compiler: sources, keys, and the disk cache with threads, processes and broken folders. Most use a fake NVRTC."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compile_kernels
import pytest

import gpu3d
from gpu3d import _kernels
from gpu3d.cuda import compiler as nvrtc_compiler
from gpu3d.cuda.plan import Kernel

MERGE = nvrtc_compiler.Configuration("buckets_merge", (("POINT", 0), ("KEY", 3), ("TILE", 1024)))
MOVE = nvrtc_compiler.Configuration("buckets_move", (("WORD", 16),))


def clear_caches():
    if nvrtc_compiler._process_dir.cache_info().currsize:
        nvrtc_compiler._process_dir().cleanup()
    for cached in (nvrtc_compiler.source_text, nvrtc_compiler._process_dir):
        cached.cache_clear()
    nvrtc_compiler._in_process_dir.clear()


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of kernels_cu that may be edited."""
    folder = tmp_path / "kernels_cu"
    shutil.copytree(nvrtc_compiler.source_dir(), folder)
    monkeypatch.setattr(nvrtc_compiler, "source_dir", lambda: folder)
    clear_caches()
    yield folder
    clear_caches()


class FakeCompiler:
    """Stands in for NVRTC: records its calls and takes a moment for each."""

    def __init__(self):
        self.calls = []

    def __call__(self, text, name, options):
        self.calls.append((text, name, tuple(options)))
        time.sleep(0.02)
        return f"cubin of {name} {' '.join(options)}".encode(), ""


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A fake compiler and an empty cache folder."""
    fake = FakeCompiler()
    monkeypatch.setattr(nvrtc_compiler, "compile_source", fake)
    monkeypatch.setattr(nvrtc_compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path / "cache"))
    clear_caches()
    yield fake
    clear_caches()


@pytest.fixture
def nvrtc():
    try:
        return nvrtc_compiler.nvrtc_version()
    except ImportError as error:
        pytest.skip(f"no NVRTC: {error}")


# ---- sources -------------------------------------------------------------------------------------------------------


def test_headers_are_inlined_once(sources):
    (sources / "a.cuh").write_text("// a.cuh\n")
    (sources / "b.cuh").write_text('#include "a.cuh"\n// b.cuh\n')
    (sources / "c.cu").write_text('#include "b.cuh"\n#include "a.cuh"\n// c.cu\n')
    assert nvrtc_compiler.source_text("c").split() == ["//", "a.cuh", "//", "b.cuh", "//", "c.cu"]
    assert nvrtc_compiler.source_text("b.cuh").split() == ["//", "a.cuh", "//", "b.cuh"]


def test_every_header_has_a_guard():
    for file in nvrtc_compiler.source_dir().glob("*.cuh"):
        guard = f"GPU3D_{file.stem.upper()}_CUH"
        lines = [line for line in file.read_text().split("\n") if line and not line.startswith("//")]
        assert lines[:2] == [f"#ifndef {guard}", f"#define {guard}"] and lines[-1] == f"#endif  // {guard}", file.name


def test_every_configuration_has_a_file_and_every_file_a_configuration():
    configurations = _kernels.configurations()
    assert len(set(configurations)) == len(configurations)
    assert {c.source for c in configurations} == {file.stem for file in nvrtc_compiler.source_dir().glob("*.cu")}


def test_every_macro_has_a_default():
    for configuration in _kernels.configurations():
        for name, _ in configuration.macros:
            assert re.search(rf"^#define {name}\b", nvrtc_compiler.source_text(configuration.source), re.M), str(
                configuration
            )


def test_constants_agree_with_python():
    """A `#define NAME 12` of buckets_merge.cu is MERGE_NAME in gpu3d/cuda/buckets.py, one of buckets.cuh is NAME."""
    common = {}
    for file in nvrtc_compiler.source_dir().glob("*.cu*"):
        module, _, part = file.stem.partition("_")
        owner = f"gpu3d.cuda.{module}"
        constants = (
            vars(importlib.import_module(owner)) if importlib.util.find_spec(owner) else {}
        )  # voxels.cuh has none
        defined: dict[str, int] = {}
        for name, text in re.findall(r"^#define (\w+) +(\d+\b|\([\w /*+-]+\))", file.read_text(), re.MULTILINE):
            if {*re.findall(r"\b[A-Za-z_]\w*", text)} <= {*defined}:  # a number, or made of earlier constants
                defined[name] = eval(text.replace("/", "//"), {}, defined)
        for name, value in defined.items():
            name = f"{part}_{name}".upper() if part else name
            if isinstance(constants.get(name), int):
                common[name] = value, constants[name]
    assert len(common) > 3 and "INDEX_THREADS" in common, common
    assert all(cuda == python for cuda, python in common.values()), common


# ---- the key -------------------------------------------------------------------------------------------------------


def test_the_key_knows_everything_that_goes_in(compiler, sources, monkeypatch):
    seen = [nvrtc_compiler.cubin_path(MERGE, "sm_80")]

    def expect_another(configuration=MERGE, arch="sm_80"):
        nvrtc_compiler.source_text.cache_clear()  # like another process
        path = nvrtc_compiler.cubin_path(configuration, arch)
        assert path not in seen and path.is_file()
        seen.append(path)

    expect_another(arch="sm_90a")
    expect_another(MERGE._replace(macros=(("POINT", 1), *MERGE.macros[1:])))
    for name in ("buckets_merge.cu", "buckets.cuh"):
        with open(sources / name, "a") as file:
            file.write("// edited\n")
        expect_another()
    monkeypatch.setattr(nvrtc_compiler, "nvrtc_version", lambda: (13, 1))
    expect_another()
    assert len(compiler.calls) == len(seen) == 6
    assert nvrtc_compiler.cubin_path(MERGE, "sm_80") == seen[-1] and len(compiler.calls) == 6
    with open(sources / "buckets_move.cu", "a") as file:
        file.write("// edited\n")
    nvrtc_compiler.source_text.cache_clear()
    assert nvrtc_compiler.cubin_path(MERGE, "sm_80") == seen[-1] and len(compiler.calls) == 6  # not one of its files


def test_what_the_compiler_is_given(compiler):
    path = nvrtc_compiler.cubin_path(MERGE, "sm_90a")
    [(text, name, options)] = compiler.calls
    assert text == nvrtc_compiler.source_text("buckets_merge") and name == "buckets_merge.cu"
    assert options == ("-arch=sm_90a", "-std=c++17", "-DPOINT=0", "-DKEY=3", "-DTILE=1024")
    assert path.read_bytes() == b"cubin of buckets_merge.cu " + " ".join(options).encode()
    assert str(MERGE) == "buckets_merge -DPOINT=0 -DKEY=3 -DTILE=1024"


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path / "mine"))
    assert nvrtc_compiler.cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("GPU3D_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert nvrtc_compiler.cache_dir() == tmp_path / "xdg" / "gpu3d"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nvrtc_compiler.cache_dir() == tmp_path / ".cache" / "gpu3d"


def test_the_cache_is_used_and_readable_by_all(compiler, tmp_path):
    path = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    assert path.parent == tmp_path / "cache" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o444 == 0o444
    assert nvrtc_compiler.cubin_path(MOVE, "sm_80") == path and len(compiler.calls) == 1
    assert not nvrtc_compiler._process_dir.cache_info().currsize  # no temporary folder is made if none is needed


def deny(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def parent_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path / "file" / "cache"))


def impossible_name(monkeypatch, tmp_path):
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path / ("x" * 1000)))


def nothing_can_be_created(monkeypatch, tmp_path):
    real, cache = tempfile.mkstemp, tmp_path / "cache"
    monkeypatch.setattr(
        tempfile, "mkstemp", lambda dir, prefix: deny() if Path(dir) == cache else real(dir=dir, prefix=prefix)
    )


def nothing_can_be_renamed(monkeypatch, tmp_path):
    real, cache = os.replace, tmp_path / "cache"
    monkeypatch.setattr(os, "replace", lambda a, b: deny() if Path(b).parent == cache else real(a, b))


@pytest.mark.parametrize(
    "broken",
    [parent_is_a_file, impossible_name, nothing_can_be_created, nothing_can_be_renamed],
    ids=lambda f: f.__name__,
)
def test_a_folder_that_cannot_be_written(compiler, monkeypatch, tmp_path, broken):
    broken(monkeypatch, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        paths = list(
            pool.map(lambda arch: nvrtc_compiler.cubin_path(MOVE, arch), ("sm_80", "sm_86", "sm_89", "sm_90a"))
        )
    assert len(compiler.calls) == 4
    for path, arch in zip(paths, ("sm_80", "sm_86", "sm_89", "sm_90a"), strict=True):
        assert path.parent == Path(nvrtc_compiler._process_dir().name) and arch.encode() in path.read_bytes()
        assert nvrtc_compiler.cubin_path(MOVE, arch) == path
    assert len(compiler.calls) == 4  # once per process
    assert not list(tmp_path.rglob("*.cubin*"))  # and nothing is left in the folder


def test_a_ready_cache_needs_no_place_for_temporary_files(compiler, monkeypatch):
    path = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", deny)
    monkeypatch.setattr(tempfile, "mkstemp", deny)
    assert nvrtc_compiler.cubin_path(MOVE, "sm_80") == path


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_damaged_file_is_compiled_again(compiler, damage):
    """An empty file, a file with other content, and a folder with this name."""
    path = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    good = path.read_bytes()
    if damage is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damage)
    again = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    assert again.is_file() and again.read_bytes() == good and len(compiler.calls) == 2


@pytest.mark.skipif(os.name == "nt", reason="modes of files are POSIX")
def test_what_others_may_have_written_is_not_believed(compiler, tmp_path):
    path = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    path.parent.chmod(0o777)  # anybody can put a file there, and its hash can be computed from public text
    again = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    assert again.parent != path.parent and len(compiler.calls) == 2
    clear_caches()
    path.parent.chmod(0o755)
    assert nvrtc_compiler.cubin_path(MOVE, "sm_80") == path and len(compiler.calls) == 2
    path.chmod(0o666)
    assert nvrtc_compiler.cubin_path(MOVE, "sm_80").stat().st_mode & 0o002 == 0 and len(compiler.calls) == 3


@pytest.mark.skipif(not hasattr(os, "chown") or os.getuid() != 0, reason="only root may give files away")
def test_a_file_of_another_user_is_not_believed(compiler):
    path = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    os.chown(path, 12345, 12345)
    nvrtc_compiler.cubin_path(MOVE, "sm_80")
    assert len(compiler.calls) == 2
    os.chown(path, 12345, 12345)
    os.chown(path.parent, 12345, 12345)  # a shared folder of another user
    assert nvrtc_compiler.cubin_path(MOVE, "sm_80") == path and len(compiler.calls) == 2


def test_a_user_without_a_home(compiler, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GPU3D_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG specification says to ignore
    monkeypatch.setattr(Path, "home", no_home)
    assert nvrtc_compiler.cache_dir() is None
    path = nvrtc_compiler.cubin_path(MOVE, "sm_80")
    assert path.parent == Path(nvrtc_compiler._process_dir().name) and path.is_file()


# ---- at once -------------------------------------------------------------------------------------------------------


def test_two_threads_compile_once(compiler):
    barrier = threading.Barrier(4)

    def ask(_):
        barrier.wait()
        return nvrtc_compiler.cubin_path(MERGE, "sm_80"), nvrtc_compiler.cubin_path(MOVE, "sm_80")

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(ask, range(4)))
    assert len(found) == 1 and len(compiler.calls) == 2


def spawn(code, **environment):
    """A fresh interpreter that imports this gpu3d."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(gpu3d.__file__).parents[1]), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out.strip()


def test_two_processes_compile_at_once(tmp_path):
    """Each waits inside the compiler until the other is there too; then both write the same file."""
    code = """if True:
        from gpu3d.cuda import compiler as nvrtc_compiler
        def compile_source(text, name, options):
            print("compiling", flush=True)
            input()
            return b"cubin" * 2_000_000, ""
        nvrtc_compiler.compile_source, nvrtc_compiler.nvrtc_version = compile_source, lambda: (13, 0)
        path = nvrtc_compiler.cubin_path(nvrtc_compiler.Configuration("buckets_move", (("WORD", 16),)), "sm_80")
        assert path.read_bytes() == b"cubin" * 2_000_000
        print(path)
    """
    processes = [spawn(code, GPU3D_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "compiling\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    first, second = (result_of(process) for process in processes)
    assert first == second and [str(file) for file in tmp_path.iterdir()] == [first]
    assert Path(first).stat().st_size == 10_000_000


# ---- the real compiler ---------------------------------------------------------------------------------------------


def test_a_kernel_compiles_for_any_architecture(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path))
    for arch in ("sm_80", "sm_90a"):
        assert nvrtc_compiler.cubin_path(MOVE, arch).read_bytes().startswith(b"\x7fELF")


def test_an_error_carries_the_log(nvrtc):
    with pytest.raises(
        RuntimeError, match=r"could not compile wrong\.cu with -arch=sm_80(.|\n)*nowhere.* is undefined"
    ):
        nvrtc_compiler.compile_source("__global__ void f(int *x) { *x = nowhere; }", "wrong.cu", ["-arch=sm_80"])


def test_a_failed_compilation_leaves_nothing_and_is_tried_again(compiler, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("could not compile buckets_move.cu")

    with monkeypatch.context() as patch:
        patch.setattr(nvrtc_compiler, "compile_source", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"buckets_move\.cu"):
                nvrtc_compiler.cubin_path(MOVE, "sm_80")
    assert not list(tmp_path.rglob("*.cubin*"))
    assert nvrtc_compiler.cubin_path(MOVE, "sm_80").is_file()


def test_no_nvrtc_says_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(ImportError, match=r'pip install "gpu3d\[cuda13\]"'):
        nvrtc_compiler._nvrtc.__wrapped__()


# ---- make kernels --------------------------------------------------------------------------------------------------

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'wide' for 'sm_90a'
ptxas info    : Function properties for wide
ptxas         .     96 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 79 registers, used 1 barriers, 96 bytes cumulative stack size, {shared} bytes smem
ptxas info    : Compiling entry function 'narrow' for 'sm_90a'
ptxas info    : Function properties for narrow
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 400 bytes cmem[0]
"""


def test_the_compiler_log_is_read():
    kernels = compile_kernels.parse(LOG.format(shared=42020))
    assert kernels == {"wide": (79, 8, 16, 42020, 96), "narrow": (12, 0, 0, 0, 0)}
    with pytest.raises(RuntimeError, match="no registers reported"):
        compile_kernels.parse("ptxas info    : 0 bytes gmem")


@pytest.mark.parametrize(("capability", "arch"), [("75", None), ("80", "sm_80"), ("90", "sm_90a"), ("120", "sm_120")])
def test_the_target_of_a_device(monkeypatch, capability, arch):
    device = types.SimpleNamespace(compute_capability=capability)
    cuda = types.SimpleNamespace(Device=lambda ordinal: device)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    if arch:
        assert nvrtc_compiler.device_arch.__wrapped__(0) == arch
    else:
        message = r"needs a GPU of compute capability 8\.0 or newer .*, and cuda:0 has 7\.5: pass NumPy arrays"
        with pytest.raises(RuntimeError, match=message):
            nvrtc_compiler.device_arch.__wrapped__(0)


def test_make_kernels(compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile_kernels, "CACHE", tmp_path / ".cache" / "kernels.json")
    shared = 100

    def compile_source(text, name, options):
        compiler(text, name, options)
        if shared is None and "-arch=sm_120" in options:
            raise RuntimeError("no such architecture")
        return b"", LOG.format(shared=shared)

    monkeypatch.setattr(nvrtc_compiler, "compile_source", compile_source)
    monkeypatch.setattr(_kernels, "configurations", lambda: [MERGE, MOVE, MOVE._replace(macros=(("WORD", 4),))])
    jobs = 3 + 5 * 2 + 1 + len(list(nvrtc_compiler.source_dir().glob("*.cu*")))
    assert compile_kernels.main() == 0
    out = capsys.readouterr().out
    assert f"{jobs} compiled, 0 from the cache, 0 failed" in out
    assert re.search(r"^wide +3 +79 +24 +100 +96 +24$", out, re.MULTILINE)
    assert compile_kernels.main() == 0
    assert f"0 compiled, {jobs} from the cache, 0 failed" in capsys.readouterr().out and len(compiler.calls) == jobs

    compile_kernels.CACHE.unlink()
    shared = 49153
    assert compile_kernels.main() == 1
    assert "wide has 49153 bytes of static shared memory" in capsys.readouterr().out
    compile_kernels.CACHE.unlink()
    shared = None
    assert compile_kernels.main() == 1
    assert "buckets_move -DWORD=4 for sm_120: no such architecture" in capsys.readouterr().out


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_precompile(cp, monkeypatch):
    count = gpu3d.precompile(progress=False)
    arch = nvrtc_compiler.device_arch(cp.cuda.Device().id)
    assert count == sum(configuration.only in (None, arch) for configuration in _kernels.configurations())
    monkeypatch.setattr(nvrtc_compiler, "compile_source", None)  # all are there
    assert gpu3d.precompile(progress=False) == count


@pytest.mark.gpu
def test_too_much_shared_memory(monkeypatch):
    monkeypatch.setattr(nvrtc_compiler, "_loaded", {})  # as if it were not loaded yet
    with pytest.raises(
        RuntimeError, match=r"move_rows needs 1000000 bytes of shared memory a block; cuda:0 offers \d+"
    ):
        nvrtc_compiler.load(Kernel("buckets_move", "move_rows", "", (("WORD", 16),), shared_mem=1_000_000), 0)


@pytest.mark.gpu
def test_a_second_process_compiles_nothing(tmp_path):
    code = """if True:
        import json, sys
        import cupy
        import numpy as np
        import gpu3d
        from gpu3d.cuda import compiler as nvrtc_compiler
        def refuse(text, name, options):
            raise AssertionError(f"{name} was compiled")
        if sys.stdin.readline() == "refuse\\n":
            nvrtc_compiler.compile_source = refuse
        points = cupy.asarray(np.random.default_rng(0).random((3000, 3), dtype=np.float32))
        buckets = gpu3d.bucketize(points, 64)
        assert (buckets.gather(buckets.scatter(points)) == points).all()
        print(json.dumps(buckets.slot_to_point.tolist()))
    """
    results = []
    for order in ("compile\n", "refuse\n"):
        process = spawn(code, GPU3D_CACHE_DIR=str(tmp_path))
        process.stdin.write(order)
        results.append(json.loads(result_of(process)))
    assert results[0] == results[1] and sorted(results[0])[-3000:] == list(range(3000))
    assert list(tmp_path.glob("*.cubin"))
