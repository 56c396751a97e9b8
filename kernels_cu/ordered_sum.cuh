// SPDX-License-Identifier: Apache-2.0
// Float64 sums over a block of SUM_TILE threads in the order that gpu3d/reference/chamfer.py defines, and the largest
// value of a block. All threads of the block must call these functions.

#ifndef GPU3D_ORDERED_SUM_CUH
#define GPU3D_ORDERED_SUM_CUH

#include "warp.cuh"

#define SUM_TILE 1024  // mirrored by gpu3d/reference/chamfer.py; a node of the index, so both use one table of clouds

// The sum of the block's SUM_TILE values, one a thread, on every thread. Adds the second half to the first, again and
// again.
__device__ double halved(double value) {
    __shared__ double sums[SUM_TILE];
    __syncthreads();
    sums[threadIdx.x] = value;
    for (int half = SUM_TILE / 2; half >= 32; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x < 32) {
        value = sum_of_warp(sums[threadIdx.x]);
        if (threadIdx.x == 0) sums[0] = value;
    }
    __syncthreads();
    return sums[0];
}

// The largest value of the block, a u32 or a u64, on every thread.
template <class T>
__device__ T largest_of(T value) {
    __shared__ T largest;
    __syncthreads();
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    value = max_of_warp(value);
    if ((threadIdx.x & 31) == 0 && value) atomicMax(&largest, value);
    __syncthreads();
    return largest;
}

// The sum of `count` values by halving tiles of them. The whole block calls it; the values are overwritten.
__device__ double sum_of(double *values, int count) {
    while (count > 1) {
        const int tiles = (count + SUM_TILE - 1) / SUM_TILE;
        for (int tile = 0; tile < tiles; ++tile) {
            const int i = tile * SUM_TILE + threadIdx.x;
            const double sum = halved(i < count ? values[i] : 0);
            if (threadIdx.x == 0) values[tile] = sum;  // all threads have read values[tile], now or earlier
        }
        count = tiles;
        __syncthreads();
    }
    return count ? values[0] : 0;
}

#endif  // GPU3D_ORDERED_SUM_CUH
