// SPDX-License-Identifier: Apache-2.0
// Where each query's entries begin: exclusive prefix sums of counts, in one pass over memory (decoupled look-back,
// Merrill and Garland 2016). Sums of integers are exact, so any order gives the same result.
//
//   scan_offsets  a block sums a tile of counts, publishes the sum, adds what the tiles before it published, and writes
//   scan_flag     replaces every offset by minus the total where that is more than there is capacity for
//
// In scan_offsets warp w has counts [w, w + 1) * 32 * ITEMS of the tile; item k of lane l is the (32 k + l)-th of them.

#define THREADS 256  // mirrored by gpu3d/cuda/arrays.py, as are ITEMS and TILE
#define ITEMS 8
#define TILE (THREADS * ITEMS)
#define WARPS (THREADS / 32)

#include "warp.cuh"

// What a tile has published: nothing yet (0), the sum of its own counts, or the sum of all counts up to its end.
#define STATE_OWN (1ull << 62)
#define STATE_SUM (2ull << 62)
#define SUM (STATE_OWN - 1)

// The sum of all counts before `tile`, by a whole warp. Every tile before it is running or done, for tiles are drawn in
// order: so each of them publishes without waiting for this one.
__device__ u64 look_back(const volatile u64 *published, int tile) {
    const int lane = threadIdx.x & 31;
    u64 before = 0;
    for (int nearest = tile - 1; nearest >= 0; nearest -= 32) {  // lane l asks tile nearest - l
        u64 word;
        do word = nearest >= lane ? published[nearest - lane] : STATE_SUM;
        while (__any_sync(FULL, word == 0));
        const u32 sums = __ballot_sync(FULL, (word & STATE_SUM) != 0);
        before +=
            sum_of_warp(lane < __ffs(sums) || !sums ? word & SUM : 0);  // up to the nearest that knows all before it
        if (sums) break;
    }
    return before;
}

extern "C" __global__ __launch_bounds__(THREADS) void scan_offsets(
    const long long *__restrict__ counts,  // [n], none of them negative, with a sum below 2^62
    long long n,                           // 0 to 2^31
    u64 *state,                            // [1 + tiles], zero before: tiles drawn, then what each has published
    long long *__restrict__ offsets,       // [n + 1]
    long long *__restrict__ total          // []
) {
    __shared__ u64 warp_sum[WARPS];
    __shared__ u64 before_tile;
    __shared__ int drawn;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (threadIdx.x == 0) drawn = (int)atomicAdd(&state[0], 1ull);
    __syncthreads();
    const int tile = drawn;  // ranges [0, tiles)
    volatile u64 *published = state + 1;
    const long long first = (long long)tile * TILE + warp * ITEMS * 32 + lane;

    u64 mine[ITEMS], sum = 0;  // sums of the warp's counts before item k; of all its counts
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) mine[k] = first + 32 * k < n ? counts[first + 32 * k] : 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const u64 inclusive = scan_of_warp(mine[k]);
        mine[k] = sum + inclusive - mine[k];
        sum += __shfl_sync(FULL, inclusive, 31);
    }
    if (lane == 0) warp_sum[warp] = sum;
    __syncthreads();

    u64 before_warp = 0, of_tile = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before_warp += warp_sum[w];
        of_tile += warp_sum[w];
    }
    if (warp == 0) {
        if (lane == 0 && tile > 0) published[tile] = STATE_OWN | of_tile;
        const u64 before = look_back(published, tile);
        if (lane == 0) {
            published[tile] = STATE_SUM | (before + of_tile);
            before_tile = before;
        }
    }
    __syncthreads();
    const u64 before = before_tile;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (first + 32 * k < n) offsets[first + 32 * k] = before + before_warp + mine[k];
    if (threadIdx.x == 0 && ((long long)tile + 1) * TILE >= n) *total = offsets[n] = before + of_tile;
}

extern "C" __global__ __launch_bounds__(THREADS) void scan_flag(
    const long long *__restrict__ total,  // []; not offsets[n], which this kernel writes
    long long capacity,
    long long n,
    long long *__restrict__ offsets  // [n + 1], left as they are where total <= capacity
) {
    if (*total <= capacity) return;
    const long long first = (long long)blockIdx.x * TILE + threadIdx.x;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (first + k * THREADS <= n) offsets[first + k * THREADS] = -*total;
}
