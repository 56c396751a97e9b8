# SPDX-License-Identifier: Apache-2.0
"""gpu3d: 3-D point clouds on GPUs. Put the points into equal buckets once; run everything over buckets.

Functions take NumPy, CuPy, torch or JAX arrays and return the same kind. CUDA arrays run hand-written kernels on the
caller's device and stream, CPU arrays the NumPy reference.
"""

from gpu3d._kernels import precompile
from gpu3d.apml import ApmlGradients, ApmlPlan, apml, apml_plan, apml_value_and_grad, emd
from gpu3d.attention import bucket_attention, bucket_attention_backward
from gpu3d.buckets import BucketQuality, Buckets, Scopes, bucket_quality, bucketize, scopes
from gpu3d.neighbors import (
    ChamferGradients,
    NeighborIndex,
    Neighbors,
    RadiusNeighbors,
    chamfer,
    chamfer_value_and_grad,
    knn,
    neighbor_index,
    radius_search,
)
from gpu3d.pooling import Pooling, bucket_pool, bucket_pool_backward, bucket_unpool, bucket_unpool_backward

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
