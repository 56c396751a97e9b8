// SPDX-License-Identifier: Apache-2.0
// All points within a radius of each query, exactly, ordered by (query, index): counts them, writes them, sorts them.

#define THREADS 128  // mirrored by gpu3d/cuda/neighbors.py
#define ROW 512      // most neighbours that a warp sorts

#include "clouds.cuh"
#include "neighbors.cuh"
#include "sort_rows.cuh"

// Calls found(hits, hit, key) for each tile that may hold points within the radius, other than point `excluded`: `hit`
// tells whether the lane's point is one, `hits` has a bit for each lane, and keys order by index.
template <class Found>
__device__ __forceinline__ void walk_ball(
    const Row &query, const Index &index, const Clouds &clouds, int b, float radius2, int excluded, Found found
) {
    walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + (threadIdx.x & 31)];
        const float d2 = distance2(query, point);
        const bool hit = d2 <= radius2 && point.index != excluded;  // padding and non-finite points: their d2 is NaN
        found(__ballot_sync(FULL, hit), hit, (u64)(u32)point.index << 32 | __float_as_uint(d2));
    });
}

// One warp a query.
extern "C" __global__ __launch_bounds__(THREADS) void radius_count(
    const Row *__restrict__ queries,  // [query slots] in bucket order, relative to the target cloud's origin
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    int exclude,                      // 1: point i is no neighbour of query i
    float radius2,                    // of each query, if there are no `radii`
    const float *__restrict__ radii,  // [queries] or null
    long long *__restrict__ counts    // [queries]
) {
    const int slot = uniform(blockIdx.x * WARPS + (threadIdx.x >> 5));
    if (slot >= query_slots) return;
    const Row query = queries[slot];
    if (__any_sync(FULL, query.index < 0)) return;  // padding
    long long count = 0;
    if (__any_sync(FULL, is_finite(query)))
        walk_ball(
            query, index, clouds, uniform(cloud_of<&Cloud::slot>(query_clouds, slot)),
            reach2_of(radius2, radii, query.index), exclude ? query.index : -1,
            [&](u32 hits, bool, u64) { count += __popc(hits); }
        );
    if ((threadIdx.x & 31) == 0) counts[query.index] = count;
}

// One warp a query. Writes nothing if the entries of all queries exceed the capacity.
extern "C" __global__ __launch_bounds__(THREADS) void radius_fill(
    const Row *__restrict__ queries,
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    int exclude,
    float radius2,
    const float *__restrict__ radii,
    const long long *__restrict__ offsets,  // [all queries + 1]
    int all,                                // queries
    long long capacity,                     // in entries
    u64 *__restrict__ entries               // [capacity] index << 32 | d2, in the order of the traversal
) {
    const int slot = uniform(blockIdx.x * WARPS + (threadIdx.x >> 5)), lane = threadIdx.x & 31;
    if (slot >= query_slots || offsets[all] > capacity) return;
    const Row query = queries[slot];
    if (__any_sync(FULL, query.index < 0 || !is_finite(query))) return;
    u64 *to = entries + offsets[query.index];
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, slot));
    const float reach2 = reach2_of(radius2, radii, query.index);
    walk_ball(query, index, clouds, b, reach2, exclude ? query.index : -1, [&](u32 hits, bool hit, u64 key) {
        if (hit) to[rank_in(hits, lane)] = key;
        to += __popc(hits);
    });
}

// One warp a query, and one block for a query that has many neighbours.
extern "C" __global__ __launch_bounds__(THREADS) void radius_sort(
    const long long *__restrict__ offsets,  // [all + 1]
    int all,                                // queries
    long long capacity,
    u64 *__restrict__ entries,     // [capacity]
    u64 *__restrict__ spare,       // [capacity]
    int *__restrict__ indices,     // [capacity] -1 behind the last entry; -1 everywhere if the capacity is exceeded
    float *__restrict__ distances  // [capacity] NaN where indices are -1
) {
    __shared__ u64 shared[WARPS * STAGED];
    const long long total = offsets[all], end = total <= capacity ? total : 0;
    for (long long i = end + blockIdx.x * THREADS + threadIdx.x; i < capacity; i += (long long)gridDim.x * THREADS) {
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
    __syncthreads();  // the warps are done with `shared`
    for (int query = begin; query < min(begin + WARPS, all); ++query) {
        const long long first = offsets[query];
        const int count = (int)(offsets[query + 1] - first);
        if (count > ROW) sort_long(entries + first, spare + first, shared, count, writer(first));
    }
}
