// SPDX-License-Identifier: Apache-2.0
// The k nearest neighbours of each query within a radius, which may be infinite, for k <= 32: exactly, ordered by
// (d2, index); see neighbors.cuh. For larger k there is neighbors_many.cu.
//
// A warp takes neighbouring queries one after another. Each query starts in the tile that held the nearest neighbour of
// the one before, so distant boxes are skipped from the start. How many queries a warp takes changes no result: k = 16
// of a sweep of 122,880 points took 0.56 ms with one and 0.36 ms with eight (H100).
//
// The best keys so far lie in ascending order across the lanes. At first all are the key of a missing neighbour at the
// radius, so no point beyond it gets in. If few points of a tile are closer than the worst of the best, they are
// inserted one at a time; if many are, the tile is sorted and merged.

#ifndef LISTS
#define LISTS 1  // neighbours that a lane keeps; 0 if k is 1
#endif
#define THREADS 128
#define BLOCKS 8  // blocks a multiprocessor; without it, ptxas spills registers to fit more
#define MANY 12   // number of closer points from which sorting is cheaper

#include "clouds.cuh"
#include "neighbors.cuh"
#include "sort.cuh"

struct Best {
#if LISTS
    Key key;  // neighbour i is on lane i
#endif
    Key worst;  // the k-th best key; for k = 1 the only one
};

#if LISTS

__device__ __forceinline__ Key reversed(const Key &key) { return __shfl_xor_sync(FULL, key, 31); }

__device__ __forceinline__ void set_worst(Best &best, int k) { best.worst = __shfl_sync(FULL, best.key, k - 1); }

// Inserts one key, which is the same on every lane.
__device__ __forceinline__ void insert(Best &best, const Key &key, int k) {
    const int lane = threadIdx.x & 31, place = __popc(__ballot_sync(FULL, best.key < key));
    const Key before = __shfl_up_sync(FULL, best.key, 1);
    if (lane >= place) best.key = lane == place ? key : before;
    set_worst(best, k);
}

// Inserts 32 keys, one a lane.
__device__ __forceinline__ void merge(Best &best, const Key &key, int k) {
    Key keys[1] = {key};
    sort_warp(keys);
    best.key = merge_warp(min(best.key, reversed(keys[0])));
    set_worst(best, k);
}

#endif

// Inserts 32 keys, one a lane, as far as they are closer, except that of point `excluded`. Returns whether the nearest
// neighbour changed.
__device__ __forceinline__ bool take(Best &best, Key key, int k, bool exclude, int excluded) {
    u32 closer = __ballot_sync(FULL, key < best.worst);
    if (!closer) return false;
    if (exclude) {
        if (index_of(key) == excluded) key = NOTHING;
        closer = __ballot_sync(FULL, key < best.worst);
        if (!closer) return false;
    }
#if LISTS == 0
    best.worst = min(best.worst, min_of_warp(key));
    return true;
#else
    const Key nearest = best.key;
    if (__popc(closer) >= MANY) merge(best, key, k);
    else
        for (; closer; closer = __ballot_sync(FULL, key < best.worst)) {
            const int from = __ffs(closer) - 1;
            const Key next = __shfl_sync(FULL, key, from);
            if ((threadIdx.x & 31) == from) key = NOTHING;
            insert(best, next, k);
        }
    return __shfl_sync(FULL, best.key < nearest, 0);
#endif
}

// Block `block` of a search with knn's arguments.
__device__ __forceinline__ void search(
    int block,
    const Row *__restrict__ queries,
    const Clouds &query_clouds,
    int query_slots,
    int group,
    const Index &index,
    const Clouds &clouds,
    int k,
    int squared,
    int exclude,
    real radius2,
    const real *__restrict__ radii,
    real *__restrict__ distances,
    int *__restrict__ indices
) {
    const int first = uniform((block * (THREADS / 32) + (threadIdx.x >> 5)) * group), lane = threadIdx.x & 31;
    if (first >= query_slots) return;
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, first));
    int near = -1;  // the tile of the previous query's nearest neighbour
    for (int number = 0; number < group; ++number) {
        const Row query = queries[first + number];
        if (__any_sync(FULL, query.index < 0)) continue;  // padding
        const bool usable = __any_sync(FULL, is_finite(query));
        const real reach2 = reach2_of(radius2, radii, query.index);
        Best best;
        best.worst = key_of(reach2, -1);
#if LISTS
        best.key = best.worst;
#endif
        // A vote of a warp that agrees: so the compiler knows that it stays together.
        if (__any_sync(FULL, usable && reach2 >= 0)) {
            const int begin = near;
            const auto bound = [&] { return best.worst; };
            const auto look = [&](int tile) {
                const Row point = index.rows[(size_t)tile * TILE + lane];
                // A NaN key is never taken.
                if (take(best, key_of(distance2(query, point), point.index), k, exclude, query.index)) near = tile;
            };
            if (begin >= 0) look(begin);
            walk_tiles(query, index, clouds, b, NearestFirst<decltype(bound)>{bound, {}}, [&](int tile) {
                if (tile != begin) look(tile);
            });
        }
        const real missing = usable && !squared ? INFINITE : NAN_FLOAT;
        const size_t row = (size_t)query.index * k;
#if LISTS
        if (lane < k) write_neighbor(best.key, row + lane, missing, squared, distances, indices);
#else
        if (lane == 0) write_neighbor(best.worst, row, missing, squared, distances, indices);
#endif
        __syncwarp();
    }
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void knn(
    const Row *__restrict__ queries,  // [query slots] in bucket order
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    int group,  // queries a warp, a power of two up to TILE
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    int k,
    int squared,                     // 1: write d2, and NaN for every missing neighbour
    int exclude,                     // 1: point i is no neighbour of query i
    real radius2,                    // of each query, if there are no `radii`
    const real *__restrict__ radii,  // [queries] or null
    real *__restrict__ distances,    // [queries, k]; inf for a missing neighbour, NaN if the query is not finite
    int *__restrict__ indices        // [queries, k]; -1 for a missing neighbour
) {
    // Blocks begin at both ends of the order and meet in its middle. Stray points are often near the ends. A query that
    // is far from all points looks at most of them, and that takes 0.1 ms and more: it must not begin last.
    const int half = blockIdx.x >> 1, block = blockIdx.x & 1 ? gridDim.x - 1 - half : half;
    search(
        block, queries, query_clouds, query_slots, group, index, clouds, k, squared, exclude, radius2, radii, distances,
        indices
    );
}

#if LISTS == 0

// Nearest neighbours of x's points in y, and of y's points in x. The blocks of the second search follow those of the
// first.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void knn_both(
    const Row *__restrict__ x_queries,
    const __grid_constant__ Clouds x_clouds,
    int x_slots,
    int x_group,
    const __grid_constant__ Index x_index,
    real *__restrict__ x_d2,      // [points of x]; NaN for a missing neighbour
    int *__restrict__ x_nearest,  // [points of x] indices of y's
    const Row *__restrict__ y_queries,
    const __grid_constant__ Clouds y_clouds,
    int y_slots,
    int y_group,
    const __grid_constant__ Index y_index,
    real *__restrict__ y_d2,
    int *__restrict__ y_nearest,
    u32 *__restrict__ known  // [] set to 0 for chamfer_losses
) {
    const int x_block = THREADS / 32 * x_group, x_blocks = (x_slots + x_block - 1) / x_block, block = blockIdx.x;
    if (block == 0 && threadIdx.x == 0) *known = 0;
    if (block < x_blocks)
        search(
            block, x_queries, x_clouds, x_slots, x_group, y_index, y_clouds, 1, 1, 0, INFINITE, nullptr, x_d2, x_nearest
        );
    else
        search(
            block - x_blocks, y_queries, y_clouds, y_slots, y_group, x_index, x_clouds, 1, 1, 0, INFINITE, nullptr,
            y_d2, y_nearest
        );
}

#endif
