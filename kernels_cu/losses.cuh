// SPDX-License-Identifier: Apache-2.0
// What the loss kernels share: the layout of a sort key.

#ifndef GPU3D_LOSSES_CUH
#define GPU3D_LOSSES_CUH

#include "types.cuh"

#define MOST_CLASSES 64  // mirrored by gpu3d/cuda/losses.py

// The key of point i and class c sorts by error, largest first. Its lowest bit, by which nothing is sorted, tells
// whether c is the point's label. Errors lie in 0..1, so as bits in 0..ERROR_ONE; a larger one, or NaN, counts as 1.
#define ERROR_ONE 0x3f800000u
#define KEY_IGNORED 0xffffffffu  // sorts behind all points that count

__device__ __forceinline__ u32 key_of(float error, bool is_label) {
    return ERROR_ONE - min(__float_as_uint(error), ERROR_ONE) << 1 | (u32)is_label;
}

#endif  // GPU3D_LOSSES_CUH
