// SPDX-License-Identifier: Apache-2.0
// All points within a radius of each query, exactly, by (query, index): counted, then written, then sorted.

#define THREADS 128
#define SHARED 1024         // entries of a query that are sorted in shared memory

#include "clouds.cuh"
#include "neighbors.cuh"

// Calls found(hits, hit, key) for the points of each tile within the radius: a bit and a truth a lane, keys by index.
template <class Found>
__device__ __forceinline__ void walk_ball(
    const Row &query, const Index &index, const Clouds &clouds, int b, float radius2, Found found)
{
    walk_tiles(query, index, clouds, b, [=] { return radius2; }, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + (threadIdx.x & 31)];
        const float d2 = distance2(query, point);
        const bool hit = point.index >= 0 && d2 <= radius2;
        const u32 hits = __ballot_sync(FULL, hit);
        if (hits) found(hits, hit, (u64)(u32)point.index << 32 | __float_as_uint(d2));
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
    const int slot = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
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
    const int slot = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (slot >= query_slots || offsets[all] > room) return;
    const Row query = queries[slot];
    if (query.index < 0 || !is_finite(query)) return;
    long long at = offsets[query.index];
    walk_ball(query, index, clouds, cloud_of<&Cloud::slot>(query_clouds, slot), radius2, [&](u32 hits, bool hit, u64 key) {
        if (hit) entries[at + __popc(hits & (1u << lane) - 1)] = key;
        at += __popc(hits);
    });
}

// Sorts count keys by the whole block; returns where they lie then: in `keys` or in `other`.
__device__ u64 *sort_by_block(u64 *keys, u64 *other, int count) {
    for (int base = threadIdx.x & ~31; base < count; base += THREADS) {         // runs of 32 in registers
        const int i = base + (threadIdx.x & 31);
        u64 key = i < count ? keys[i] : ~0ull;
#pragma unroll
        for (int size = 2; size <= 32; size *= 2)
#pragma unroll
            for (int step = size / 2; step; step /= 2) {
                const u64 its = __shfl_xor_sync(FULL, key, step);
                const bool smaller = (i & step) == 0, ascends = (i & size & 31) == 0;
                key = smaller == ascends ? min(key, its) : max(key, its);
            }
        if (i < count) keys[i] = key;
    }
    for (int run = 32; run < count; run *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            const u64 key = keys[i];
            const int begin = i & -2 * run, first = (i ^ run) & -run;           // of both runs, of the other
            int low = 0, high = max(0, min(run, count - first));                // its keys that are smaller
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

// A block a query.
extern "C" __global__ __launch_bounds__(THREADS) void radius_sort(
    const long long *__restrict__ offsets,      // [all + 1]
    int all,
    long long room,
    u64 *__restrict__ entries,                  // [room]
    u64 *__restrict__ spare,                    // [room]
    int *__restrict__ indices,                  // [room]
    float *__restrict__ distances)              // [room]
{
    __shared__ u64 shared[2][SHARED];
    if (offsets[all] > room) return;
    const long long first = offsets[blockIdx.x];
    const int count = (int)(offsets[blockIdx.x + 1] - first);
    u64 *keys = entries + first, *other = spare + first;
    if (count <= SHARED) {
        for (int i = threadIdx.x; i < count; i += THREADS) shared[0][i] = keys[i];
        keys = shared[0];
        other = shared[1];
        __syncthreads();
    }
    keys = sort_by_block(keys, other, count);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        indices[first + i] = (int)(keys[i] >> 32);
        distances[first + i] = __fsqrt_rn(__uint_as_float((u32)keys[i]));
    }
}
