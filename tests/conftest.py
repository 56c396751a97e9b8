# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures; GPU tests are skipped where there is no GPU, and leave their record where there is one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import gpu_record
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes three quarters of the GPU's memory


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
    """The folder of real clouds, which their licences keep out of the repository: $GPU3D_DATA or ../shared/data."""
    folder = Path(os.environ.get("GPU3D_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real clouds: {folder} is absent (set GPU3D_DATA)")
    return folder


def poison(cupy, size: int = 1 << 26) -> None:
    """Fills the free memory of CuPy's pool, which is `size` bytes then: an output that is not written shows."""
    cupy.get_default_memory_pool().free_all_blocks()
    block = cupy.full(size, 0xCD, "u1")  # no index, no member and hardly ever a number of the tests
    del block


@pytest.fixture
def cp():
    """CuPy, its free memory poisoned."""
    import cupy

    poison(cupy)
    return cupy


@pytest.fixture
def large_memory(cp):
    """40 GiB of the GPU's memory, where they are free; one test at a time has them, of all processes."""
    import fcntl  # not on Windows, whose CPU tests need this file

    pool = cp.get_default_memory_pool()
    with open(Path(tempfile.gettempdir()) / "gpu3d-large-memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pool.free_all_blocks()  # what earlier tests left there counts as taken
        if cp.cuda.Device().mem_info[0] < 40 << 30:
            pytest.skip("needs 40 GiB of GPU memory")
        yield
        pool.free_all_blocks()


def pytest_collection_modifyitems(items):
    if NO_GPU:
        skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU: {NO_GPU}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_sessionfinish(session, exitstatus):
    """A whole `pytest -m gpu` run that passed is written down; CI compares the record with the tree."""
    options = session.config.option
    whole = (
        not hasattr(session.config, "workerinput")  # of pytest-xdist, one of many processes
        and options.markexpr == "gpu"
        and not options.keyword
        and session.config.args in ([], ["tests"], [str(ROOT / "tests")])
    )
    if NO_GPU is None and whole and exitstatus == 0:
        reports = session.config.pluginmanager.get_plugin("terminalreporter").stats
        gpu_record.write({outcome: len(reports.get(outcome, [])) for outcome in ("passed", "skipped")})
