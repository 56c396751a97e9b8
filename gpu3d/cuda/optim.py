# SPDX-License-Identifier: Apache-2.0
"""Steps of the optimizer over a flat arena of parameters: kernels_cu/optim_adamw.cu."""

from __future__ import annotations

import numpy as np

from gpu3d._arrays import FLOAT32, FLOAT64, FLOATS
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Kernel, Number, Pointer, Steps

ADAMW_THREADS = 256
ADAMW_QUADS = 2
ADAMW_SUM_BLOCKS = 1024

_UPDATE_BYTES = 20  # struct Update
_SIGNATURES = {"sum_squares": "QqQ", "prepare_step": "QiQdIddQQQ", "adamw": "QQqqQQQQ"}


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("optim_adamw", (("ELEMENT", FLOATS.index(dtype)),)) for dtype in FLOATS if dtype != FLOAT64]


def add_adamw(
    steps: Steps,
    gradients: Pointer,
    loss: Pointer,
    state: Pointer,
    parameters: Pointer,
    m: Pointer,
    v: Pointer,
    norm: Pointer,
    *,
    size: int,
    decayed: int,
    copy: Pointer | None = None,
    copy_dtype: np.dtype = FLOAT32,
) -> None:
    """Add a step of AdamW with a one-cycle learning rate and clipping by the global norm.

    `gradients`, `parameters`, `m` and `v` are float32 [size], of which the first `decayed` decay. `copy` receives the
    parameters in `copy_dtype`, if that is not float32. `norm` float32 [] receives the norm of the gradients. `state` is
    uint32 [2]: steps that counted, and steps that were skipped because the loss or the norm was not finite.

    Numbers of the call: "rate" (the largest), "steps" (of the whole training), "decay", and "clip" (the largest norm,
    or inf).
    """
    if size % 4 or decayed % 4:
        raise ValueError(f"size and decayed must be multiples of 4, got {size} and {decayed}.")
    blocks = min(ADAMW_SUM_BLOCKS, -(-size // (16 * ADAMW_THREADS)))
    partials = steps.workspace("squares", 8 * blocks)
    update = steps.workspace("update", _UPDATE_BYTES)
    macros = (("ELEMENT", FLOATS.index(copy_dtype)),)

    def launch(function: str, grid: int, *args: object) -> None:
        kernel = Kernel("optim_adamw", function, _SIGNATURES[function], macros)
        steps.launch(kernel, grid=grid, block=ADAMW_THREADS, args=args)

    launch("sum_squares", blocks, gradients, size, partials)
    numbers = Number("rate"), Number("steps"), Number("decay"), Number("clip")
    launch("prepare_step", 1, partials, blocks, loss, *numbers, state, norm, update)
    grid = -(-size // (4 * ADAMW_QUADS * ADAMW_THREADS))
    launch("adamw", grid, gradients, update, size, decayed, parameters, m, v, copy)
