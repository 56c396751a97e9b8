// SPDX-License-Identifier: Apache-2.0
// Blocks that wait for each other: a barrier of a whole cooperative grid, and the block that comes last.

#ifndef GPU3D_GRID_CUH
#define GPU3D_GRID_CUH

#include "types.cuh"

// Waits until all blocks of a cooperative launch call this; then each sees what the others wrote before. `arrived` is
// one word of global memory for all calls and `awaited` a variable of each thread; both start at 0.
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

// Whether this block is the last of `blocks` to call this; it then sees what the others wrote before. All threads of
// the block call it. `arrived` starts at 0.
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
