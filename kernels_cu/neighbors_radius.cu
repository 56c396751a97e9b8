// SPDX-License-Identifier: Apache-2.0
// All points within a radius of each query, exactly, by (query, index): counted, then written, then sorted.

#define THREADS 128  // mirrored by gpu3d/neighbors.py
#define ROW 512      // neighbours of a query that a warp sorts

#include "clouds.cuh"
#include "neighbors.cuh"
#include "sort_rows.cuh"

// Calls found(hits, hit, key) for the points of each tile within the radius: a bit and a truth a lane, keys by index.
template <class Found>
__device__ __forceinline__ void walk_ball(
    const Row &query, const Index &index, const Clouds &clouds, int b, float radius2, Found found
) {
    walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + (threadIdx.x & 31)];
        const float d2 = distance2(query, point);
        const bool hit = d2 <= radius2;  // not where there is no point, or it is not finite
        found(__ballot_sync(FULL, hit), hit, (u64)(u32)point.index << 32 | __float_as_uint(d2));
    });
}

// A warp a query.
extern "C" __global__ __launch_bounds__(THREADS) void radius_count(
    const Row *__restrict__ queries,  // [query slots] in bucket order, relative to the target cloud's origin
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    float radius2,
    long long *__restrict__ counts  // [queries]
) {
    const int slot = uniform(blockIdx.x * WARPS + (threadIdx.x >> 5));
    if (slot >= query_slots) return;
    const Row query = queries[slot];
    if (__any_sync(FULL, query.index < 0)) return;  // padding
    long long count = 0;
    if (__any_sync(FULL, is_finite(query)))
        walk_ball(
            query, index, clouds, uniform(cloud_of<&Cloud::slot>(query_clouds, slot)), radius2,
            [&](u32 hits, bool, u64) { count += __popc(hits); }
        );
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
    const long long *__restrict__ offsets,  // [all queries + 1]
    int all,                                // queries
    long long room,                         // entries
    u64 *__restrict__ entries               // [room] index << 32 | d2, in the order of the walk
) {
    const int slot = uniform(blockIdx.x * WARPS + (threadIdx.x >> 5)), lane = threadIdx.x & 31;
    if (slot >= query_slots || offsets[all] > room) return;
    const Row query = queries[slot];
    if (__any_sync(FULL, query.index < 0 || !is_finite(query))) return;
    u64 *to = entries + offsets[query.index];
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, slot));
    walk_ball(query, index, clouds, b, radius2, [&](u32 hits, bool hit, u64 key) {
        if (hit) to[rank_in(hits, lane)] = key;
        to += __popc(hits);
    });
}

// A warp a query, and a block for those that have many neighbours.
extern "C" __global__ __launch_bounds__(THREADS) void radius_sort(
    const long long *__restrict__ offsets,  // [all + 1]
    int all,                                // queries
    long long room,
    u64 *__restrict__ entries,     // [room]
    u64 *__restrict__ spare,       // [room]
    int *__restrict__ indices,     // [room] -1 behind the last entry, and everywhere if there is no room for all
    float *__restrict__ distances  // [room] and there NaN
) {
    __shared__ u64 shared[WARPS * STAGED];
    const long long total = offsets[all], end = total <= room ? total : 0;
    for (long long i = end + blockIdx.x * THREADS + threadIdx.x; i < room; i += (long long)gridDim.x * THREADS) {
        indices[i] = -1;
        distances[i] = NAN_FLOAT;
    }
    if (end == 0) return;
    const auto writer = [=](long long first) {
        return [=](int e, u64 key) {
            indices[first + e] = (int)(key >> 32);
            distances[first + e] = __fsqrt_rn(__uint_as_float((u32)key));
        };
    };
    const int begin = blockIdx.x * WARPS, warp = uniform(threadIdx.x >> 5);
    if (begin + warp < all) {
        const long long first = offsets[begin + warp];
        const int count = uniform((int)(offsets[begin + warp + 1] - first));
        if (count <= ROW) sort_short(entries + first, count, shared + warp * STAGED, writer(first));
    }
    __syncthreads();  // the warps have read what they staged
    for (int query = begin; query < min(begin + WARPS, all); ++query) {
        const long long first = offsets[query];
        const int count = (int)(offsets[query + 1] - first);
        if (count > ROW) sort_long(entries + first, spare + first, shared, count, writer(first));
    }
}
