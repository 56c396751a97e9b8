# SPDX-License-Identifier: Apache-2.0
"""gpu3d: 3-D point clouds on GPUs. Put the points into equal buckets once; run everything over buckets.

Functions take NumPy, CuPy, torch or JAX arrays and return the same kind. For CUDA arrays they launch hand-written
kernels on the caller's device and stream. For CPU arrays they run the NumPy reference.
"""

from gpu3d._kernels import precompile
from gpu3d.attention import bucket_attention, bucket_attention_backward
from gpu3d.buckets import BucketQuality, Buckets, Scopes, bucket_quality, bucketize, scopes
from gpu3d.chamfer import ChamferGradients, chamfer, chamfer_value_and_grad
from gpu3d.neighbors import NeighborIndex, Neighbors, RadiusNeighbors, knn, neighbor_index, radius_search
from gpu3d.pooling import Pooling, bucket_pool, bucket_pool_backward, bucket_unpool, bucket_unpool_backward
from gpu3d.transport import ApmlGradients, ApmlPlan, apml, apml_plan, apml_value_and_grad, emd

__version__ = "0.1.0"

__all__ = [
    "ApmlGradients",
    "ApmlPlan",
    "BucketQuality",
    "Buckets",
    "ChamferGradients",
    "NeighborIndex",
    "Neighbors",
    "Pooling",
    "RadiusNeighbors",
    "Scopes",
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
    "emd",
    "knn",
    "neighbor_index",
    "precompile",
    "radius_search",
    "scopes",
]
