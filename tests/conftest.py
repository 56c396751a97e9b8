# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures. Without a GPU, GPU tests are left out; with one, a passed suite writes the GPU record."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import gpu_record
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take 3/4 of the GPU's memory
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. With a thread for each core in each of them, torch's threads mostly wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _why_no_gpu() -> str | None:
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return "no CuPy"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU: {error}"
    return None


NO_GPU = _why_no_gpu()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real scans, whose licences keep them out of the repository: $GPU3D_DATA or ../shared/data."""
    folder = Path(os.environ.get("GPU3D_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real clouds: {folder} is absent (set GPU3D_DATA)")
    return folder


def poison(cupy, size: int = 1 << 26, byte: int = 0xCD) -> None:
    """Fill `size` bytes of free memory in CuPy's pool with `byte`, so that an output that is not written shows."""
    cupy.get_default_memory_pool().free_all_blocks()
    block = cupy.full(size, byte, "u1")  # 0xCD...: not a valid index or member, and unlike the numbers of the tests
    del block


@pytest.fixture
def cp():
    """CuPy, with its free memory poisoned."""
    import cupy

    poison(cupy)
    return cupy


@pytest.fixture
def large_memory(cp):
    """Reserve 40 GiB of GPU memory for one test at a time, of all processes; skip if they are not free."""
    import fcntl  # not available on Windows, where the CPU tests import this file

    pool = cp.get_default_memory_pool()
    with open(Path(tempfile.gettempdir()) / "gpu3d-large-memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pool.free_all_blocks()  # memory that earlier tests left in the pool counts as used
        if cp.cuda.Device().mem_info[0] < 40 << 30:
            pytest.skip("needs 40 GiB of GPU memory")
        yield
        pool.free_all_blocks()


def pytest_collection_modifyitems(config, items):
    if NO_GPU:
        left_out = [item for item in items if "gpu" in item.keywords]
        items[:] = [item for item in items if "gpu" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter):
    if NO_GPU:
        terminalreporter.write_line(f"GPU tests were left out: {NO_GPU}")


def pytest_sessionfinish(session, exitstatus):
    """Record a whole `pytest -m gpu` run that passed. CI compares the record with the tree."""
    options = session.config.option
    whole = (
        not hasattr(session.config, "workerinput")  # one of the worker processes of pytest-xdist
        and options.markexpr == "gpu"
        and not options.keyword
        and session.config.args in ([], ["tests"], [str(ROOT / "tests")])
    )
    if NO_GPU is None and whole and exitstatus == 0:
        reports = session.config.pluginmanager.get_plugin("terminalreporter").stats
        gpu_record.write({outcome: len(reports.get(outcome, [])) for outcome in ("passed", "skipped")})
