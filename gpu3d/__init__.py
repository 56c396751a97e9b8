# SPDX-License-Identifier: Apache-2.0
"""gpu3d: 3-D point clouds on GPUs. Put the points into equal buckets once; run everything over buckets.

Functions take NumPy, CuPy, torch or JAX arrays and return the same kind. For CUDA arrays they launch hand-written
kernels on the caller's device and stream. For CPU arrays they run the NumPy reference.

`gpu3d.io`, `gpu3d.plot`, `gpu3d.batch`, `gpu3d.flash3d` and `gpu3d.interop` are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpu3d._kernels import precompile
from gpu3d.attention import bucket_attention, bucket_attention_backward
from gpu3d.buckets import BucketQuality, Buckets, Scopes, bucket_quality, bucketize, scopes
from gpu3d.chamfer import ChamferDistances, ChamferGradients, chamfer, chamfer_value_and_grad
from gpu3d.metrics import CloudComparison, compare_clouds
from gpu3d.neighbors import NeighborIndex, Neighbors, RadiusNeighbors, knn, neighbor_index, radius_search
from gpu3d.pooling import Pooling, bucket_pool, bucket_pool_backward, bucket_unpool, bucket_unpool_backward
from gpu3d.sampling import VoxelPoints, farthest_points, voxel_downsample
from gpu3d.surface import Normals, normals
from gpu3d.transport import (
    ApmlGradients,
    ApmlPlan,
    EmdGradients,
    apml,
    apml_plan,
    apml_value_and_grad,
    emd,
    emd_value_and_grad,
)

if TYPE_CHECKING:
    from gpu3d import batch as batch
    from gpu3d import flash3d as flash3d
    from gpu3d import interop as interop
    from gpu3d import io as io
    from gpu3d import plot as plot
    from gpu3d.io import Cloud, read_cloud, write_cloud

__version__ = "0.1.0"

__all__ = [
    "ApmlGradients",
    "ApmlPlan",
    "BucketQuality",
    "Buckets",
    "ChamferDistances",
    "ChamferGradients",
    "Cloud",
    "CloudComparison",
    "EmdGradients",
    "NeighborIndex",
    "Neighbors",
    "Normals",
    "Pooling",
    "RadiusNeighbors",
    "Scopes",
    "VoxelPoints",
    "apml",
    "apml_plan",
    "apml_value_and_grad",
    "bucket_attention",
    "bucket_attention_backward",
    "bucket_pool",
    "bucket_pool_backward",
    "bucket_quality",
    "bucket_unpool",
    "bucket_unpool_backward",
    "bucketize",
    "chamfer",
    "chamfer_value_and_grad",
    "compare_clouds",
    "emd",
    "emd_value_and_grad",
    "farthest_points",
    "knn",
    "neighbor_index",
    "normals",
    "precompile",
    "radius_search",
    "read_cloud",
    "scopes",
    "voxel_downsample",
    "write_cloud",
]

_MODULES = "batch", "flash3d", "interop", "io", "plot"
_OF_IO = "Cloud", "read_cloud", "write_cloud"

if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"gpu3d.{name}")
        if name in _OF_IO:
            return getattr(import_module("gpu3d.io"), name)
        raise AttributeError(f"module 'gpu3d' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES, *_OF_IO})
