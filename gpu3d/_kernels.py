# SPDX-License-Identifier: Apache-2.0
"""Every kernel that gpu3d may launch, and how to compile them all ahead of time."""

from __future__ import annotations

from gpu3d import _clouds, _cuda, attention, buckets, neighbors, pooling
from gpu3d.apml import configurations as apml_configurations  # gpu3d.apml is the function


def configurations() -> list[_cuda.Configuration]:
    """Every module the ops can ask for; `make kernels` and the tests compile these."""
    modules = _clouds, buckets, attention, pooling, neighbors
    return [*(configuration for module in modules for configuration in module.configurations()), *apml_configurations()]


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
    gpu3d kernels for sm_90a: 100%|██████████| 217/217
    217
    """
    return _cuda.precompile(configurations(), progress=progress)
