// SPDX-License-Identifier: Apache-2.0
// Sorts many short rows of keys: a warp sorts a row of up to ROW keys in registers, a block sorts a longer one.
// The file that includes this defines THREADS, and ROW as 256 or 512.

#ifndef GPU3D_SORT_ROWS_CUH
#define GPU3D_SORT_ROWS_CUH

#include "sort.cuh"

#ifndef THREADS
#define THREADS 128
#endif
#ifndef ROW
#define ROW 512
#endif
#define WARPS (THREADS / 32)
#define STAGED (ROW + 32)               // shared memory of a warp, in keys
#define BLOCK_ROW (WARPS * STAGED / 2)  // keys that a block sorts in the shared memory of its warps

template <int N, class Key, class Write>
__device__ __forceinline__ void sort_by_warp(const Key *row, int count, Key *staged, Write write) {
    const int lane = threadIdx.x & 31;
    Key key[N];
#pragma unroll
    for (int r = 0; r < N; ++r) key[r] = 32 * r + lane < count ? row[32 * r + lane] : ~(Key)0;
    sort_warp(key);
#pragma unroll
    for (int r = 0; r < N; ++r) staged[(N + 1) * lane + r] = key[r];  // a gap a lane, so that banks differ
    __syncwarp();
    for (int e = lane; e < count; e += 32) write(e, staged[e + e / N]);
    __syncwarp();  // then `staged` may hold other keys
}

// Calls write(e, key) for the row's keys in ascending order, by a warp; count <= ROW, and `staged` is STAGED keys of
// its own.
template <class Key, class Write>
__device__ __forceinline__ void sort_short(const Key *row, int count, Key *staged, Write write) {
    if (count <= 32) sort_by_warp<1>(row, count, staged, write);
    else if (count <= 64) sort_by_warp<2>(row, count, staged, write);
    else if (count <= 128) sort_by_warp<4>(row, count, staged, write);
    else if (ROW == 256 || count <= 256) sort_by_warp<8>(row, count, staged, write);
    else sort_by_warp<ROW / 32>(row, count, staged, write);
}

// Calls write(e, key) for the row's keys in ascending order, by the whole block. `spare` is as long as the row, which
// is overwritten; `shared` is 2 * BLOCK_ROW keys.
template <class Key, class Write>
__device__ void sort_long(Key *row, Key *spare, Key *shared, int count, Write write) {
    Key *keys = row, *other = spare;
    if (count <= BLOCK_ROW) {
        keys = shared;
        other = shared + BLOCK_ROW;
        for (int i = threadIdx.x; i < count; i += THREADS) keys[i] = row[i];
        __syncthreads();
    }
    for (int base = threadIdx.x & ~31; base < count; base += THREADS) {  // runs of 32
        const int i = base + (threadIdx.x & 31);
        Key key[1] = {i < count ? keys[i] : ~(Key)0};
        sort_warp(key);
        if (i < count) keys[i] = key[0];
    }
    for (int run = 32; run < count; run *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            const Key key = keys[i];
            const int begin = i & -2 * run, first = (i ^ run) & -run;  // of both runs, of the other
            int low = 0, high = max(0, min(run, count - first));       // its keys that are smaller
            while (low < high) {
                const int middle = (low + high) / 2;
                if (keys[first + middle] < key) low = middle + 1;
                else high = middle;
            }
            other[begin + (i & run - 1) + low] = key;
        }
        Key *swapped = keys;
        keys = other;
        other = swapped;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) write(i, keys[i]);
    __syncthreads();  // then `shared` may hold other keys
}

#endif  // GPU3D_SORT_ROWS_CUH
