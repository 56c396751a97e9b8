// SPDX-License-Identifier: Apache-2.0
// Blocks that wait for each other: a barrier of a whole cooperative grid, and the block that comes last.

#ifndef GPU3D_GRID_CUH
#define GPU3D_GRID_CUH

#include "types.cuh"

// Waits until all blocks are here, and have written what they wrote. `arrived` is one word for all calls, 0 at first; `awaited` is
// each thread's own, 0 at first.
__device__ __forceinline__ void wait_for_grid(u32 *arrived, u32 &awaited) {
    awaited += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1);
        while (*(volatile u32 *)arrived < awaited) {}
        __threadfence();
    }
    __syncthreads();
}

// Whether this block is the last of `blocks` to come here; it then sees what the others wrote before. The whole block calls it.
// `arrived` is 0 at first.
__device__ __forceinline__ bool is_last_block(u32 *arrived, u32 blocks) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

#endif  // GPU3D_GRID_CUH
