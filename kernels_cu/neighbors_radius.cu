// SPDX-License-Identifier: Apache-2.0
// All points within a radius of each query, exactly, by (query, index): counted, then written, then sorted.

#define THREADS 128
#define WARPS (THREADS / 32)    // mirrored by gpu3d/neighbors.py, as is THREADS
#define ROW 512                 // neighbours of a query that a warp sorts, in registers
#define BLOCK_ROW 1088          // that a block sorts in shared memory

#include "clouds.cuh"
#include "neighbors.cuh"

// Calls found(hits, hit, key) for the points of each tile within the radius: a bit and a truth a lane, keys by index.
template <class Found>
__device__ __forceinline__ void walk_ball(
    const Row &query, const Index &index, const Clouds &clouds, int b, float radius2, Found found)
{
    walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + (threadIdx.x & 31)];
        const float d2 = distance2(query, point);
        const bool hit = point.index >= 0 && d2 <= radius2;
        const u32 hits = __ballot_sync(FULL, hit);
        found(hits, hit, (u64)(u32)point.index << 32 | __float_as_uint(d2));
    });
}

// A warp a query.
extern "C" __global__ __launch_bounds__(THREADS) void radius_count(
    const Row *__restrict__ queries,            // [query slots] in bucket order, relative to the target cloud's origin
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    float radius2,
    long long *__restrict__ counts)             // [queries]
{
    const int slot = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (slot >= query_slots) return;
    const Row query = queries[slot];
    if (query.index < 0) return;                // padding
    long long count = 0;
    if (is_finite(query))
        walk_ball(query, index, clouds, cloud_of<&Cloud::slot>(query_clouds, slot), radius2,
                  [&](u32 hits, bool, u64) { count += __popc(hits); });
    if ((threadIdx.x & 31) == 0) counts[query.index] = count;
}

// A warp a query. Writes nothing where the entries of all queries are more than there is room for.
extern "C" __global__ __launch_bounds__(THREADS) void radius_fill(
    const Row *__restrict__ queries,
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    float radius2,
    const long long *__restrict__ offsets,      // [all queries + 1]
    int all,                                    // queries
    long long room,                             // entries
    u64 *__restrict__ entries)                  // [room] index << 32 | d2, in the order of the walk
{
    const int slot = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (slot >= query_slots || offsets[all] > room) return;
    const Row query = queries[slot];
    if (query.index < 0 || !is_finite(query)) return;
    u64 *to = entries + offsets[query.index];
    walk_ball(query, index, clouds, cloud_of<&Cloud::slot>(query_clouds, slot), radius2, [&](u32 hits, bool hit, u64 key) {
        if (hit) to[__popc(hits & (1u << lane) - 1)] = key;
        to += __popc(hits);
    });
}

// ---- sort ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void order(u64 &a, u64 &b) {
    const u64 small = min(a, b);
    b = max(a, b);
    a = small;
}

// Sorts 32 * N keys: element e of the result is key[e % N] of lane e / N. All merges ascend: the first step of a merge
// compares e with its mirror image, the others with e ^ step.
template <int N>
__device__ __forceinline__ void sort_warp(u64 (&key)[N]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int size = 2; size <= 32 * N; size *= 2)
#pragma unroll
        for (int step = size / 2; step; step /= 2) {
            const int mask = step == size / 2 ? size - 1 : step;
            const bool low = (lane & step / N) == 0;        // of a pair of lanes
#pragma unroll
            for (int r = 0; r < N; ++r) {
                const int s = r ^ mask & N - 1;             // e ^ mask is in key[s], of this lane or another
                if (mask < N) {
                    if (r < s) order(key[r], key[s]);
                } else if (r <= s) {
                    const u64 to_r = __shfl_xor_sync(FULL, key[s], mask / N), to_s = __shfl_xor_sync(FULL, key[r], mask / N);
                    key[r] = (key[r] < to_r) == low ? key[r] : to_r;
                    if (r < s) key[s] = (key[s] < to_s) == low ? key[s] : to_s;
                }
            }
        }
}

__device__ __forceinline__ void write_entry(u64 key, long long at, int *indices, float *distances) {
    indices[at] = (int)(key >> 32);
    distances[at] = __fsqrt_rn(__uint_as_float((u32)key));
}

// A warp's row of at most 32 * N entries; `staged` is its own memory of 32 * (N + 1) keys.
template <int N>
__device__ __forceinline__ void sort_row(
    const u64 *entries, long long first, int count, u64 *staged, int *indices, float *distances)
{
    const int lane = threadIdx.x & 31;
    u64 key[N];
#pragma unroll
    for (int r = 0; r < N; ++r) key[r] = 32 * r + lane < count ? entries[first + 32 * r + lane] : ~0ull;
    sort_warp(key);
#pragma unroll
    for (int r = 0; r < N; ++r) staged[(N + 1) * lane + r] = key[r];        // a gap a lane, so that banks differ
    __syncwarp();
    for (int e = lane; e < count; e += 32) write_entry(staged[e + e / N], first + e, indices, distances);
}

// Sorts count keys by the whole block; returns where they lie then: in `keys` or in `other`.
__device__ u64 *sort_by_block(u64 *keys, u64 *other, int count) {
    for (int base = threadIdx.x & ~31; base < count; base += THREADS) {     // runs of 32
        const int i = base + (threadIdx.x & 31);
        u64 key[1] = {i < count ? keys[i] : ~0ull};
        sort_warp(key);
        if (i < count) keys[i] = key[0];
    }
    for (int run = 32; run < count; run *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            const u64 key = keys[i];
            const int begin = i & -2 * run, first = (i ^ run) & -run;       // of both runs, of the other
            int low = 0, high = max(0, min(run, count - first));            // its keys that are smaller
            while (low < high) {
                const int middle = (low + high) / 2;
                if (keys[first + middle] < key) low = middle + 1; else high = middle;
            }
            other[begin + (i & run - 1) + low] = key;
        }
        u64 *swapped = keys;
        keys = other;
        other = swapped;
    }
    __syncthreads();
    return keys;
}

// A warp a query, and a block for those that have many neighbours.
extern "C" __global__ __launch_bounds__(THREADS) void radius_sort(
    const long long *__restrict__ offsets,      // [all + 1]
    int all,                                    // queries
    long long room,
    u64 *__restrict__ entries,                  // [room]
    u64 *__restrict__ spare,                    // [room]
    int *__restrict__ indices,                  // [room] -1 behind the last entry, and everywhere if there is no room for all
    float *__restrict__ distances)              // [room] and there NaN
{
    static_assert(2 * BLOCK_ROW == WARPS * (ROW + 32), "rows of warps and of the block share their memory");
    __shared__ u64 shared[2 * BLOCK_ROW];
    const long long total = offsets[all], end = total <= room ? total : 0;
    for (long long i = end + blockIdx.x * THREADS + threadIdx.x; i < room; i += (long long)gridDim.x * THREADS) {
        indices[i] = -1;
        distances[i] = __int_as_float(0x7fffffff);
    }
    if (end == 0) return;
    const int begin = blockIdx.x * WARPS, warp = threadIdx.x >> 5;
    if (begin + warp < all) {
        const long long first = offsets[begin + warp];
        const int count = (int)(offsets[begin + warp + 1] - first);
        u64 *staged = shared + warp * (ROW + 32);
        if (count <= 32) sort_row<1>(entries, first, count, staged, indices, distances);
        else if (count <= 64) sort_row<2>(entries, first, count, staged, indices, distances);
        else if (count <= 128) sort_row<4>(entries, first, count, staged, indices, distances);
        else if (count <= 256) sort_row<8>(entries, first, count, staged, indices, distances);
        else if (count <= ROW) sort_row<16>(entries, first, count, staged, indices, distances);
    }
    for (int query = begin; query < min(begin + WARPS, all); ++query) {
        const long long first = offsets[query];
        const int count = (int)(offsets[query + 1] - first);
        if (count <= ROW) continue;
        __syncthreads();                        // the memory was a warp's, or an earlier row's
        u64 *keys = entries + first, *other = spare + first;
        if (count <= BLOCK_ROW) {
            for (int i = threadIdx.x; i < count; i += THREADS) shared[i] = keys[i];
            keys = shared;
            other = shared + BLOCK_ROW;
            __syncthreads();
        }
        keys = sort_by_block(keys, other, count);
        for (int i = threadIdx.x; i < count; i += THREADS) write_entry(keys[i], first + i, indices, distances);
    }
}
