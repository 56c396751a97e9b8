// SPDX-License-Identifier: Apache-2.0
// The k nearest neighbours of each query, exactly, by (d2, index); see neighbors.cuh. For k <= 2 a query is a lane: 32 neighbouring
// queries look at much the same tiles, and share their boxes. For more a query is a warp, and the best keys so far lie ascending
// across the lanes. A tile of which few points are closer is taken a point at a time, one of which many are is sorted and merged.
// Counted on a sweep of 122,880 points, k = 16: a query looks at 10 x 32 boxes and about 20 tiles, of which 175 points are closer
// than what was found before them. k = 2, near clouds of 131,072 points: 32 queries together look at 4 nodes, 16 tiles and the
// points of 9, where each of them alone needs 2 nodes and the points of 3.

#ifndef NEAREST
#define NEAREST 32          // neighbours that there is room for: 1, 2, 32 or 64
#endif
#define LISTS (NEAREST / 32)    // neighbours a lane keeps of a query that is a warp
#define QUERIES (NEAREST <= 2 ? 32 : 1)     // a warp; mirrored by gpu3d/neighbors.py, as is the next
#define THREADS 128
#define BLOCKS 8            // a multiprocessor at least: without it, ptxas spills for the sake of more
#define MANY 12             // closer points from which sorting costs less

#include "clouds.cuh"
#include "neighbors.cuh"

#if LISTS

struct Best {
    u64 key[LISTS];         // number i in list i / 32 of lane i % 32
    u64 worst;              // of the k that are asked for
};

// The smaller of this lane's and another's key for the lane that takes the smaller, else the larger.
__device__ __forceinline__ u64 exchanged(u64 key, int step, bool smaller) {
    const u64 other = __shfl_xor_sync(FULL, key, step);
    return smaller == (key < other) ? key : other;
}

// Ascending from any order, and from rising then falling.
__device__ __forceinline__ u64 sorted(u64 key) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int size = 2; size <= 32; size *= 2)
#pragma unroll
        for (int step = size / 2; step; step /= 2) key = exchanged(key, step, ((lane & step) == 0) == ((lane & size & 31) == 0));
    return key;
}

__device__ __forceinline__ u64 merged(u64 key) {
#pragma unroll
    for (int step = 16; step; step /= 2) key = exchanged(key, step, (threadIdx.x & step) == 0);
    return key;
}

__device__ __forceinline__ u64 reversed(u64 key) { return __shfl_xor_sync(FULL, key, 31); }

__device__ __forceinline__ void set_worst(Best &best, int k) {
    best.worst = __shfl_sync(FULL, k > 32 ? best.key[LISTS - 1] : best.key[0], (k - 1) % 32);
}

// Takes in one key, the same on every lane.
__device__ __forceinline__ void insert(Best &best, u64 key, int k) {
    const int lane = threadIdx.x & 31;
    int place = 0;
#pragma unroll
    for (int i = 0; i < LISTS; ++i) place += __popc(__ballot_sync(FULL, best.key[i] < key));
    u64 carried = 0;
#pragma unroll
    for (int i = 0; i < LISTS; ++i) {
        const u64 before = __shfl_up_sync(FULL, best.key[i], 1), last = __shfl_sync(FULL, best.key[i], 31);
        const int at = i * 32 + lane;
        if (at >= place) best.key[i] = at == place ? key : lane ? before : carried;
        carried = last;
    }
    set_worst(best, k);
}

// Takes in a key a lane: against the last list, what stays is merged downwards.
__device__ __forceinline__ void merge(Best &best, u64 key, int k) {
    key = reversed(sorted(key));
#pragma unroll
    for (int i = LISTS - 1; i >= 0; --i) {
        const u64 mine = best.key[i];
        const u64 smaller = mine < key ? mine : key, larger = mine < key ? key : mine;
        if (i < LISTS - 1) best.key[i + 1] = merged(larger);
        best.key[i] = merged(smaller);
        if (i) key = reversed(best.key[i]);
    }
    set_worst(best, k);
}

// Takes in a key a lane.
__device__ __forceinline__ void take(Best &best, u64 key, int k) {
    u32 closer = __ballot_sync(FULL, key < best.worst);
    if (__popc(closer) >= MANY) { merge(best, key, k); return; }
    for (; closer; closer = __ballot_sync(FULL, key < best.worst)) {
        const int from = __ffs(closer) - 1;
        const u64 next = __shfl_sync(FULL, key, from);
        if ((threadIdx.x & 31) == from) key = NOTHING;
        insert(best, next, k);
    }
}

#endif

__device__ __forceinline__ void write(u64 key, size_t at, int squared, float *distances, int *indices) {
    const int found = (int)(u32)key;
    indices[at] = found;
    distances[at] = found < 0 ? __int_as_float(0x7fffffff) : squared ? distance2_of(key) : __fsqrt_rn(distance2_of(key));
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void knn(
    const Row *__restrict__ queries,            // [query slots] in bucket order, relative to the target cloud's origin
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    int k,
    int squared,                                // 1: write d2
    float *__restrict__ distances,              // [queries, k]; NaN where there is no neighbour
    int *__restrict__ indices)                  // [queries, k]
{
    const int lane = threadIdx.x & 31, warp = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    const int slot = warp * QUERIES + (QUERIES > 1 ? lane : 0);
    if (slot >= query_slots) return;            // slots come in whole tiles
    const Row query = queries[slot];
    const int b = cloud_of<&Cloud::slot>(query_clouds, slot);
#if LISTS
    if (query.index < 0) return;                // padding
    Best best;
#pragma unroll
    for (int i = 0; i < LISTS; ++i) best.key[i] = NOTHING;
    best.worst = NOTHING;
    if (is_finite(query)) {
        const auto bound = [&] { return best.worst; };
        walk_tiles(query, index, clouds, b, NearestFirst<decltype(bound)>{bound}, Always(), [&](int tile) {
            const Row point = index.rows[(size_t)tile * TILE + lane];
            take(best, point.index < 0 ? NOTHING : key_of(distance2(query, point), point.index), k);
        });
    }
    const size_t row = (size_t)query.index * k;
#pragma unroll
    for (int i = 0; i < LISTS; ++i)
        if (i * 32 + lane < k) write(best.key[i], row + i * 32 + lane, squared, distances, indices);
#else
    u64 best[NEAREST];
    find_nearest(best, query, query.index >= 0 && is_finite(query), index, clouds, b);
    if (query.index < 0) return;                // padding
#pragma unroll
    for (int i = 0; i < NEAREST; ++i) write(best[i], (size_t)query.index * NEAREST + i, squared, distances, indices);
#endif
}
