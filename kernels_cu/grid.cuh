// SPDX-License-Identifier: Apache-2.0
// A barrier of a whole cooperative grid.

#ifndef GPU3D_GRID_CUH
#define GPU3D_GRID_CUH

#include "clouds.cuh"

// Waits until all blocks are here, and have written what they wrote. `arrived` is one word for all calls, 0 at first; `awaited` is
// each thread's own, 0 at first.
__device__ __forceinline__ void wait_for_grid(u32 *arrived, u32 &awaited) {
    awaited += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1);
        while (*(volatile u32 *)arrived < awaited) { }
        __threadfence();
    }
    __syncthreads();
}

#endif  // GPU3D_GRID_CUH
