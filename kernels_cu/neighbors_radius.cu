// SPDX-License-Identifier: Apache-2.0
// All points within a radius of each query, exactly, ordered by (query, index): counts them, writes them, sorts them.
// What is sorted are words of an index and the float d2, or with REAL of an index and the place where the double d2 is.

#define THREADS 128  // mirrored by gpu3d/cuda/neighbors.py
#define ROW 512      // most neighbours that a warp sorts

#include "clouds.cuh"
#include "neighbors.cuh"
#include "sort_rows.cuh"

// Calls found(hits, hit, index, d2) for each tile that may hold points within the radius, other than point `excluded`:
// `hit` tells whether the lane's point is one, and `hits` has a bit for each lane.
template <class Found>
__device__ __forceinline__ void walk_ball(
    const Row &query, const Index &index, const Clouds &clouds, int b, real radius2, int excluded, Found found
) {
    walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + (threadIdx.x & 31)];
        const real d2 = distance2(query, point);
        const bool hit = d2 <= radius2 && point.index != excluded;  // padding and non-finite points: their d2 is NaN
        found(__ballot_sync(FULL, hit), hit, point.index, d2);
    });
}

// One warp a query.
extern "C" __global__ __launch_bounds__(THREADS) void radius_count(
    const Row *__restrict__ queries,  // [query slots] in bucket order, relative to the target cloud's origin
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    int exclude,                     // 1: point i is no neighbour of query i
    real radius2,                    // of each query, if there are no `radii`
    const real *__restrict__ radii,  // [queries] or null
    long long *__restrict__ counts   // [queries]
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
            [&](u32 hits, bool, int, real) { count += __popc(hits); }
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
    real radius2,
    const real *__restrict__ radii,
    const long long *__restrict__ offsets,  // [all queries + 1]
    int all,                                // queries
    long long capacity,                     // in entries
#if REAL
    double *__restrict__ squares,  // [capacity] d2 in the order of the traversal
#endif
    u64 *__restrict__ entries  // [capacity] in this order: index << 32 | d2, or the number of the query's entry if REAL
) {
    const int slot = uniform(blockIdx.x * WARPS + (threadIdx.x >> 5)), lane = threadIdx.x & 31;
    if (slot >= query_slots || offsets[all] > capacity) return;
    const Row query = queries[slot];
    if (__any_sync(FULL, query.index < 0 || !is_finite(query))) return;
    const long long first = offsets[query.index];
    u32 count = 0;
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, slot));
    const real reach2 = reach2_of(radius2, radii, query.index);
    walk_ball(query, index, clouds, b, reach2, exclude ? query.index : -1, [&](u32 hits, bool hit, int index, real d2) {
        const u32 at = count + rank_in(hits, lane);
#if REAL
        if (hit) squares[first + at] = d2;
        const u32 word = at;
#else
        const u32 word = bits_of(d2);
#endif
        if (hit) entries[first + at] = (u64)(u32)index << 32 | word;
        count += __popc(hits);
    });
}

// One warp a query, and one block for a query that has many neighbours.
extern "C" __global__ __launch_bounds__(THREADS) void radius_sort(
    const long long *__restrict__ offsets,  // [all + 1]
    int all,                                // queries
    long long capacity,
#if REAL
    const double *__restrict__ squares,  // [capacity]
#endif
    u64 *__restrict__ entries,    // [capacity]
    u64 *__restrict__ spare,      // [capacity]
    int *__restrict__ indices,    // [capacity] -1 behind the last entry; -1 everywhere if the capacity is exceeded
    real *__restrict__ distances  // [capacity] NaN where indices are -1
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
#if REAL
            distances[first + e] = sqrt_rn(squares[first + (u32)key]);
#else
            distances[first + e] = sqrt_rn(number_of((u32)key));
#endif
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
