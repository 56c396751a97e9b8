// SPDX-License-Identifier: Apache-2.0
// Bitonic sorting networks in the registers of a warp.

#ifndef GPU3D_SORT_CUH
#define GPU3D_SORT_CUH

#include "warp.cuh"

template <class Key>
__device__ __forceinline__ void order(Key &a, Key &b) {
    const Key small = min(a, b);
    b = max(a, b);
    a = small;
}

// Of two keys the smaller, or the larger.
template <class Key>
__device__ __forceinline__ Key chosen(Key mine, Key other, bool smaller) {
    return (mine < other) == smaller ? mine : other;
}

// Sorts 32 * N keys: element e of the result is key[e % N] of lane e / N. All merges ascend: the first step of a merge
// compares e with its mirror image, the others with e ^ step.
template <int N, class Key>
__device__ __forceinline__ void sort_warp(Key (&key)[N]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int size = 2; size <= 32 * N; size *= 2)
#pragma unroll
        for (int step = size / 2; step; step /= 2) {
            const int mask = step == size / 2 ? size - 1 : step;
            const bool low = (lane & step / N) == 0;  // of a pair of lanes
            Key other[N];                             // e ^ mask is in key[r ^ mask & N - 1], of this lane or another
#pragma unroll
            for (int r = 0; r < N && mask >= N; ++r) other[r] = __shfl_xor_sync(FULL, key[r ^ mask & N - 1], mask / N);
#pragma unroll
            for (int r = 0; r < N; ++r) {
                const int s = r ^ mask & N - 1;
                if (mask >= N) key[r] = chosen(key[r], other[r], low);
                else if (r < s) order(key[r], key[s]);
            }
        }
}

// Sorts 32 keys, one a lane, that rise and then fall.
template <class Key>
__device__ __forceinline__ Key merge_warp(Key key) {
#pragma unroll
    for (int step = 16; step; step /= 2) key = chosen(key, __shfl_xor_sync(FULL, key, step), (threadIdx.x & step) == 0);
    return key;
}

#endif  // GPU3D_SORT_CUH
