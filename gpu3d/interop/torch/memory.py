# SPDX-License-Identifier: Apache-2.0
"""CuPy's memory from torch's allocator, for programs that use both libraries by hand."""

from __future__ import annotations

from typing import Any

import torch

from gpu3d import _arrays


def use_torch_allocator() -> None:
    """Let CuPy allocate from torch's caching allocator, from now on and in every thread.

    This is for programs that call CuPy and torch themselves. The two libraries then share one pool, and CuPy arrays can
    be made while torch captures a CUDA graph. The functions of `gpu3d.interop.torch` do not need it, because their
    results and workspaces are torch's memory.

    Notes
    -----
    As in CuPy's own pool, memory belongs to the stream that is current in CuPy when it is allocated. Existing arrays
    keep their memory. ``cupy.get_default_memory_pool().free_all_blocks()`` frees what the old pool holds. To undo this,
    call ``cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)``.

    Raises
    ------
    ImportError
        CuPy is not installed.
    RuntimeError
        This torch has no CUDA.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"use_torch_allocator needs a torch with CUDA and a GPU, got torch {torch.__version__} that finds none."
        )
    _arrays.require_cupy("what use_torch_allocator allocates").cuda.set_allocator(_allocate)


def _allocate(size: int) -> Any:
    """A CuPy allocator: memory from torch, for CuPy's current stream, on the current device of both libraries."""
    import cupy

    stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr, device=torch.cuda.current_device())
    with torch.cuda.stream(stream):
        tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), size, tensor, tensor.get_device())
    return cupy.cuda.MemoryPointer(memory, 0)
