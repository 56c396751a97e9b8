# SPDX-License-Identifier: Apache-2.0
"""gpu3d for torch: the same functions with gradients, as registered operators, and modules built from them.

A plain `gpu3d` call on tensors comes here, so both names do the same. Each function is an operator of
`torch.ops.gpu3d` (`operators.py`). It runs the kernels of the plain call on torch's current stream with torch's memory.
torch.compile, torch.export, the profiler and modes that intercept operators know it. `functions.py` checks arguments
and wraps results, `modules.py` has an attention block and two losses, `backbone.py` has the Flash3D backbone, and
`memory.py` is for programs that also use CuPy.

Only reverse mode is supported: `backward`, `torch.autograd.grad`, `torch.func.grad`, `vjp` and `jacrev`, also under
`torch.vmap`. Second derivatives and forward mode (`jvp`, `jacfwd`, dual tensors) raise an error. An operator that is
called directly, like `torch.ops.gpu3d.chamfer(...)`, loses tangents inside torch, so call the functions. torch.compile
treats lengths as symbols and the number of clouds as a constant. torch.jit.trace records lengths as constants.
"""

from __future__ import annotations

import warnings
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError('gpu3d.interop.torch needs torch: pip install "gpu3d[torch]".') from error

if torch.__version__ < "2.6":  # a TorchVersion, which compares like a version
    raise ImportError(
        f'gpu3d.interop.torch needs torch >= 2.6, got {torch.__version__}: pip install --upgrade "gpu3d[torch]".'
    )

import torch.export

from gpu3d.buckets import Buckets, Scopes
from gpu3d.interop.torch.functions import (
    apml,
    bucket_attention,
    bucket_pool,
    bucket_unpool,
    bucketize,
    chamfer,
    compare_clouds,
    emd,
    farthest_points,
    gather,
    knn,
    normals,
    radius_search,
    scatter,
    scopes,
)
from gpu3d.interop.torch.memory import use_torch_allocator
from gpu3d.interop.torch.modules import APMLLoss, BucketAttention, ChamferLoss
from gpu3d.pooling import Pooling

__all__ = [
    "APMLLoss",
    "BucketAttention",
    "ChamferLoss",
    "Flash3D",
    "apml",
    "bucket_attention",
    "bucket_pool",
    "bucket_unpool",
    "bucketize",
    "chamfer",
    "compare_clouds",
    "emd",
    "farthest_points",
    "gather",
    "knn",
    "normals",
    "radius_search",
    "scatter",
    "scopes",
    "use_torch_allocator",
]


def __getattr__(name: str) -> Any:
    """Import the backbone when it is asked for: it makes up a quarter of the time of this import."""
    if name == "Flash3D":
        from gpu3d.interop.torch.backbone import Flash3D

        return Flash3D
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# torch.export, torch.compile and torch.func look inside these.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 warns about its own call
    for _layout in (Buckets, Scopes, Pooling):
        torch.export.register_dataclass(_layout)
