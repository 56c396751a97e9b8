# SPDX-License-Identifier: Apache-2.0
"""Every kernel that gpu3d may launch, and how to compile them all ahead of time."""

from __future__ import annotations

import importlib
import pkgutil

from gpu3d import cuda
from gpu3d.cuda import compiler


def configurations() -> list[compiler.Configuration]:
    """Every module that the ops can ask for; `make kernels` and the tests compile these."""
    modules = [importlib.import_module(f"gpu3d.cuda.{module.name}") for module in pkgutil.iter_modules(cuda.__path__)]
    return [found for module in modules if hasattr(module, "configurations") for found in module.configurations()]


def precompile(*, progress: bool = True) -> int:
    """Compile every kernel for the current CUDA device, so that no later call waits for the compiler.

    Parameters
    ----------
    progress : bool
        Show a progress bar.

    Returns
    -------
    int
        The number of kernel modules now in the cache (`gpu3d info` shows where).

    Raises
    ------
    ImportError
        CuPy is not installed.

    Examples
    --------
    >>> gpu3d.precompile()  # doctest: +SKIP
    gpu3d kernels for sm_90a: 100%|██████████| 246/246
    246
    """
    return compiler.precompile(configurations(), progress=progress)
