# SPDX-License-Identifier: Apache-2.0
"""gpu3d for JAX: the same functions under jax.jit, jax.grad, jax.vmap, jax.lax.scan and jax.shard_map.

A plain gpu3d call on an array that JAX traces runs the function of the same name here, so most programs need not import
this module. The functions are foreign functions of XLA (`jax.ffi`), on the CPU and on CUDA. They run the plans of plain
calls and give the same bits. Nothing is copied to the host, and nothing waits for the GPU.

`Buckets`, `Scopes` and `Pooling` are pytrees: arrays are leaves, and lengths and sizes are static. jit compiles a
function again for other lengths. scatter, gather and scopes are gathers and constants of JAX, which XLA can fuse with
other operations. `flash3d` is the Flash3D backbone.

vmap runs the other functions once for each element, in a loop on the device. Many clouds are faster as one batch, with
`lengths` or as [B, n, 3]. In a program over several devices, wrap the functions in shard_map, like any foreign
function. Each device then has its own clouds, and all devices have the same lengths.

XLA may record the functions in command buffers (CUDA graphs). By default it does so if at least five operations of a
program can be recorded. jax.jit(..., compiler_options={"xla_gpu_graph_min_graph_size": 1}) lets it record fewer.
"""

from __future__ import annotations

try:
    import jax
except ImportError as error:
    raise ImportError('gpu3d.interop.jax needs jax: pip install "gpu3d[jax]".') from error

if jax.__version_info__ < (0, 6):
    raise ImportError(f'gpu3d.interop.jax needs jax >= 0.6, got {jax.__version__}: pip install --upgrade "gpu3d[jax]".')

from gpu3d.buckets import Buckets, Scopes
from gpu3d.interop.jax import program
from gpu3d.interop.jax.backbone import flash3d
from gpu3d.interop.jax.functions import (
    apml,
    bucket_attention,
    bucket_pool,
    bucket_unpool,
    bucketize,
    chamfer,
    compare_clouds,
    farthest_points,
    gather,
    knn,
    normals,
    radius_search,
    scatter,
    scopes,
)
from gpu3d.pooling import Pooling

__all__ = [
    "apml",
    "bucket_attention",
    "bucket_pool",
    "bucket_unpool",
    "bucketize",
    "chamfer",
    "compare_clouds",
    "farthest_points",
    "flash3d",
    "gather",
    "knn",
    "normals",
    "radius_search",
    "scatter",
    "scopes",
]

for _class, _arrays, _static in (
    (Buckets, ("slot_to_point", "point_to_slot", "moved"), ("bucket_size", "lengths", "bucket_offsets")),
    (Scopes, ("table",), ("size", "shift", "stride", "bucket_size", "bucket_offsets")),
    (Pooling, ("features", "points", "buckets", "members", "argmember", "parent"), ("ratio", "reduce")),
):
    jax.tree_util.register_dataclass(_class, data_fields=_arrays, meta_fields=_static)

program.register()
