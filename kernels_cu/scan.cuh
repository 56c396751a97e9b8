// SPDX-License-Identifier: Apache-2.0
// Sums and prefix sums over a block of 32 * BLOCK_WARPS threads, one number a thread. All its threads must call these
// functions.

#ifndef GPU3D_SCAN_CUH
#define GPU3D_SCAN_CUH

#include "warp.cuh"

// The sum, on every thread.
template <int BLOCK_WARPS, class T>
__device__ T sum_of_block(T x) {
    static_assert(BLOCK_WARPS == 32, "a lane reads the sum of each warp");
    __shared__ T sums[BLOCK_WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = sum_of_warp(x);
    __syncthreads();
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return sum_of_warp(sums[lane]);
}

// The sum over the threads before this one; `sum` becomes that over all.
template <int BLOCK_WARPS, class T>
__device__ T scan_of_block(T x, T &sum) {
    __shared__ T sums[BLOCK_WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const T scan = scan_of_warp(x);
    __syncthreads();
    if (lane == 31) sums[warp] = scan;
    __syncthreads();
    T before = 0, all = 0;
    for (int w = 0; w < BLOCK_WARPS; ++w) {
        if (w == warp) before = all;
        all += sums[w];
    }
    sum = all;
    return before + scan - x;
}

#endif  // GPU3D_SCAN_CUH
