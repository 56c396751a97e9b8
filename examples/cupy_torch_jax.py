# SPDX-License-Identifier: Apache-2.0
"""One array, three libraries, no copy: CuPy, torch and JAX share memory, and gpu3d takes arrays of each.

Without a GPU, NumPy takes the place of CuPy. A scan is read once and passed on by DLPack. The table shows that all
libraries report the same address, and that gpu3d returns to each an array of its own kind. Then the libraries work
together: torch computes gradients, CuPy moves the points in place, and JAX computes the final distance.

Do not write to shared memory while JAX uses it: JAX assumes that its arrays never change.

    python examples/cupy_torch_jax.py                         # the scan that comes with the package
    python examples/cupy_torch_jax.py scan.pcd --device gpu
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take 3/4 of the GPU's memory

import jax
import torch
from bucket_attention import array_library, device_name, load, spread

import gpu3d
from gpu3d.interop.torch import chamfer

TURN = np.radians(0.5)
STEPS, RATE = 5, 0.02  # a step moves a point by at most 0.02 m for each direction of the Chamfer distance


def main(argv: list[str] | None = None) -> int:
    """Share the scan, print the addresses, and move the copy back; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "file", nargs="?", metavar="FILE", type=Path, help="a scan (default: a LiDAR scan that comes with gpu3d)"
    )
    parser.add_argument("--points", metavar="N", type=int, default=8192, help="points to use (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: the GPU if there is one"
    )
    arguments = parser.parse_args(argv)
    try:
        xp = array_library(arguments.device)
        check_devices(xp)
        points, title, _ = load(arguments.file)
        print(f"{title}, on {device_name(xp)}, torch {torch.__version__}, JAX {jax.__version__}")
        middle, _ = spread(points)
        shared = aligned(points[:: -(-len(points) // arguments.points)] - middle, xp)
        share(shared, xp)
        job(shared, xp)
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def check_devices(xp: Any) -> None:
    """Raise an error unless all three libraries can use the same device."""
    if xp is np:
        return
    if not torch.cuda.is_available():
        raise ImportError(f"CuPy finds a GPU and torch {torch.__version__} does not: pass --device cpu")
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise ImportError(f"CuPy finds a GPU and JAX does not: pass --device cpu ({error})") from error


def aligned(points: np.ndarray, xp: Any) -> Any:
    """The points float32 [n, 3] on the device. Their address is a multiple of 64, so XLA takes it without a copy."""
    array = xp.empty(points.size + 15, np.float32)
    skip = -address(array) % 64 // 4
    array = array[skip : skip + points.size].reshape(points.shape)
    array[...] = xp.asarray(points, np.float32)
    return array


def address(array: Any) -> int:
    """The address of an array."""
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    if isinstance(array, torch.Tensor):
        return array.data_ptr()
    if isinstance(array, jax.Array):
        return array.unsafe_buffer_pointer()
    return array.data.ptr


def kind(array: Any) -> str:
    """The name of an array's library."""
    return type(array).__module__.partition(".")[0].removesuffix("lib")


def share(shared: Any, xp: Any) -> None:
    """Print address and buckets of the same points in every library."""
    arrays = [shared, torch.from_dlpack(shared), jax.dlpack.from_dlpack(shared)]
    print(f"\n{'library':<10}{'points':>16}{'address':>20}    {'buckets come as':<22}{'and are'}")
    first = None
    for array in arrays:
        if address(array) != address(shared):
            raise ValueError(f"{kind(array)} copied: {address(array):#x} is not {address(shared):#x}")
        buckets = gpu3d.bucketize(array, 64).slot_to_point
        order = xp.from_dlpack(buckets)
        first = order if first is None else first
        same = "the same" if bool((order == first).all()) else "others"
        print(f"{kind(array):<10}{list(array.shape)!s:>16}{address(array):>#20x}    {kind(buckets):<22}{same}")


def job(shared: Any, xp: Any) -> None:
    """Move a turned copy back: torch computes gradients, CuPy (or NumPy) takes the steps, JAX checks the end."""
    turn = np.array([[np.cos(TURN), np.sin(TURN), 0], [-np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]], np.float32)
    moved = aligned(shared @ xp.asarray(turn), xp)
    target, pred = torch.from_dlpack(shared), torch.from_dlpack(moved).requires_grad_()
    print(f"\n{'step':<10}{'Chamfer distance, by torch':>28}")
    for step in range(STEPS):
        loss = chamfer(pred, target)
        (gradient,) = torch.autograd.grad(loss, pred)
        moved -= RATE * len(moved) * xp.from_dlpack(gradient)  # pred shares this memory, so torch sees the step
        print(f"{step + 1:<10}{loss.item():>28.5f}")
    if address(pred) != address(moved):
        raise ValueError("torch copied")
    end = gpu3d.chamfer(*(jax.dlpack.from_dlpack(array) for array in (moved, shared)))  # nothing writes after this
    print(f"{'the end':<10}{float(end):>28.5f}, by JAX; by torch {chamfer(pred, target).item():.5f}")


if __name__ == "__main__":
    raise SystemExit(main())
