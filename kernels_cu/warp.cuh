// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp work out together: sums, scans, minima and ranks. All 32 lanes must call these functions.

#ifndef GPU3D_WARP_CUH
#define GPU3D_WARP_CUH

#include "types.cuh"

#define FULL 0xffffffffu  // the mask of all lanes

// Returns x and asserts that it is the same on all lanes, so that the compiler emits no convergence checks before votes
// and shuffles behind a branch on it. A __syncwarp() behind a branch in a loop has the same effect.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(FULL, x); }

// The sum over each group of LANES neighbouring lanes, on every lane.
template <int LANES, class T>
__device__ __forceinline__ T sum_of_lanes(T x) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T x) {
    return sum_of_lanes<32>(x);
}

// The sum over this lane and those before it.
template <class T>
__device__ __forceinline__ T scan_of_warp(T x) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const T left = __shfl_up_sync(FULL, x, step);
        if (lane >= step) x += left;
    }
    return x;
}

__device__ __forceinline__ u64 min_of_warp(u64 x) {
    const u32 high = (u32)(x >> 32), least = __reduce_min_sync(FULL, high);
    return (u64)least << 32 | __reduce_min_sync(FULL, high == least ? (u32)x : FULL);
}

__device__ __forceinline__ u32 min_of_warp(u32 x) { return __reduce_min_sync(FULL, x); }

__device__ __forceinline__ u64 max_of_warp(u64 x) { return ~min_of_warp(~x); }

__device__ __forceinline__ u32 max_of_warp(u32 x) { return __reduce_max_sync(FULL, x); }

// How many lanes of `mask` come before `lane`.
__device__ __forceinline__ int rank_in(u32 mask, int lane) { return __popc(mask & (1u << lane) - 1); }

#endif  // GPU3D_WARP_CUH
