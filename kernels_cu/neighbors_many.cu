// SPDX-License-Identifier: Apache-2.0
// The k nearest neighbours of each query within a radius, which may be infinite, for 32 < k <= 1024: exactly, ordered
// by (d2, index); see neighbors.cuh. For smaller k there is neighbors_knn.cu.
//
// A warp takes neighbouring queries one after another. In shared memory it has the best keys so far in order, and
// `found`, to which it appends keys that are closer than the worst of the best. When `found` holds as many keys as the
// best are, it is sorted in registers and merged with them. Keys of missing neighbours fill up what is missing.
//
// Of two queries q and r, the k-th neighbour of r is no farther than that of q plus |q - r|. So a search starts with a
// bound that is hardly too large, and finds few keys beyond the k nearest: most queries take two merges. Rounding, and
// a point that is excluded, may make the bound too small. Then it finds fewer than k, and runs again with the radius
// alone.

#ifndef LISTS
#define LISTS 4  // neighbours that a lane sorts, a power of two from 2 to 32: k <= 32 * LISTS
#endif

#include "clouds.cuh"
#include "neighbors.cuh"
#include "sort.cuh"

#if REAL                                              // keys of twice the size
#define THREADS (LISTS == 32 ? 64 : 128)              // mirrored by gpu3d/cuda/neighbors.py
#define BLOCKS (LISTS <= 4 ? 5 : LISTS == 8 ? 3 : 2)  // blocks a multiprocessor
#else
#define THREADS 128
#define BLOCKS (LISTS <= 4 ? 8 : LISTS == 8 ? 6 : LISTS == 16 ? 5 : 3)
#endif

#define MOST (32 * LISTS)  // neighbours
#define BEST (MOST + 32)   // keys: the best, with a gap a lane, so that banks differ
#define FOUND (MOST + 32)  // keys: the last tile may exceed MOST
#define SLACK_OF_GUESS ((real)1.00001)

struct Best {
    Key *sorted;  // [BEST] in shared memory: key e at place_of(e)
    Key *found;   // [FOUND] in shared memory, in the order of the traversal
    int count;    // of found
    Key worst;    // the k-th best key
};

__device__ __forceinline__ int place_of(int e) { return e + e / LISTS; }

// Sorts LISTS keys in the registers of a lane, which rise and then fall.
__device__ __forceinline__ void merge_lane(Key (&key)[LISTS]) {
#pragma unroll
    for (int step = LISTS / 2; step; step /= 2)
#pragma unroll
        for (int r = 0; r < LISTS; ++r)
            if (!(r & step)) order(key[r], key[r | step]);
}

// Sorts LISTS keys in the registers of a lane.
__device__ __forceinline__ void sort_lane(Key (&key)[LISTS]) {
#pragma unroll
    for (int size = 2; size <= LISTS; size *= 2)
#pragma unroll
        for (int step = size / 2; step; step /= 2)
#pragma unroll
            for (int r = 0; r < LISTS; ++r) {
                const int s = r ^ (step == size / 2 ? size - 1 : step);
                if (r < s) order(key[r], key[s]);
            }
}

// Merges the first MOST keys of `found` with the best. It is the sort of sort.cuh, in loops where sort_warp has them
// unrolled: its last merge is with the best instead of keys of other lanes.
__device__ __forceinline__ void merge(Best &best, int k) {
    const int lane = threadIdx.x & 31, count = min(best.count, MOST), rest = best.count - count;  // rest < 32
    Key key[LISTS];  // before the sort in any order, then key e is key[e % LISTS] of lane e / LISTS
    __syncwarp();
#pragma unroll
    for (int r = 0; r < LISTS; ++r) key[r] = 32 * r + lane < count ? best.found[32 * r + lane] : NOTHING;
    const Key kept = lane < rest ? best.found[MOST + lane] : NOTHING;
    __syncwarp();
    if (lane < rest) best.found[lane] = kept;
    best.count = rest;
    sort_lane(key);
#pragma unroll 1
    for (int lanes = 2; lanes <= 64; lanes *= 2) {  // keys of so many lanes become sorted
        if (lanes <= 32) {
            const bool low = (lane & lanes / 2) == 0;
#pragma unroll
            for (int r = 0; r < LISTS / 2; ++r) {
                Key &a = key[r], &b = key[LISTS - 1 - r];
                const Key of_b = __shfl_xor_sync(FULL, b, lanes - 1), of_a = __shfl_xor_sync(FULL, a, lanes - 1);
                a = chosen(a, of_b, low);
                b = chosen(b, of_a, low);
            }
        } else {
#pragma unroll
            for (int r = 0; r < LISTS; ++r)
                key[r] = min(key[r], best.sorted[(31 - lane) * (LISTS + 1) + LISTS - 1 - r]);
        }
#pragma unroll 1
        for (int step = lanes / 4; step; step /= 2) {
            const bool low = (lane & step) == 0;
#pragma unroll
            for (int r = 0; r < LISTS; ++r) key[r] = chosen(key[r], __shfl_xor_sync(FULL, key[r], step), low);
        }
        merge_lane(key);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < LISTS; ++r) best.sorted[lane * (LISTS + 1) + r] = key[r];
    __syncwarp();
    best.worst = best.sorted[place_of(k - 1)];
}

// Appends 32 keys, one a lane, as far as they are closer.
__device__ __forceinline__ void take(Best &best, Key key, int k) {
    const bool mine = key < best.worst;
    const u32 closer = __ballot_sync(FULL, mine);
    if (mine) best.found[best.count + rank_in(closer, threadIdx.x & 31)] = key;
    best.count += __popc(closer);
    if (best.count >= MOST) merge(best, k);
}

// The parameters are those of knn in neighbors_knn.cu.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void many_neighbors(
    const Row *__restrict__ queries,
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    int group,
    const __grid_constant__ Index index,
    const __grid_constant__ Clouds clouds,
    int k,
    int exclude,
    real radius2,
    const real *__restrict__ radii,
    real *__restrict__ distances,
    int *__restrict__ indices
) {
    extern __shared__ Key shared[];  // [warps, BEST + FOUND]
    const int warp = threadIdx.x >> 5, first = uniform((blockIdx.x * (THREADS / 32) + warp) * group),
              lane = threadIdx.x & 31;
    if (first >= query_slots) return;
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, first));
    Best best;
    best.sorted = shared + warp * (BEST + FOUND);
    best.found = best.sorted + BEST;
    Row before = {0, 0, 0, -1};  // the previous query, and the distance of its k-th neighbour
    real far = INFINITE;
    for (int number = 0; number < group; ++number) {
        const Row query = queries[first + number];
        if (__any_sync(FULL, query.index < 0)) continue;  // padding
        const bool usable = __any_sync(FULL, is_finite(query));
        const real reach2 = reach2_of(radius2, radii, query.index), moved = sqrt_rn(distance2(query, before)),
                   guess = (far + moved) * SLACK_OF_GUESS;
        real bound2 = usable ? min(reach2, guess * guess) : reach2;
        for (;;) {
            best.count = 0;
            best.worst = key_of(bound2, -1);
            __syncwarp();  // all lanes are done with what `sorted` held
            for (int i = lane; i < BEST; i += 32) best.sorted[i] = best.worst;
            __syncwarp();
            if (__any_sync(FULL, usable && reach2 >= 0)) {
                const auto bound = [&] { return best.worst; };
                walk_tiles(query, index, clouds, b, NearestFirst<decltype(bound)>{bound, {}}, [&](int tile) {
                    const Row point = index.rows[(size_t)tile * TILE + lane];
                    Key key = key_of(distance2(query, point), point.index);  // a NaN key is never taken
                    if (exclude && point.index == query.index) key = NOTHING;
                    take(best, key, k);
                });
                if (best.count) merge(best, k);
            }
            if (__any_sync(FULL, index_of(best.worst) >= 0 || !(bound2 < reach2))) break;
            bound2 = reach2;
        }
        if (usable) {
            before = query;
            far = index_of(best.worst) >= 0 ? sqrt_rn(distance2_of(best.worst)) : INFINITE;
        }
        const real missing = usable ? INFINITE : NAN_FLOAT;
        for (int e = lane; e < k; e += 32)
            write_neighbor(best.sorted[place_of(e)], (size_t)query.index * k + e, missing, false, distances, indices);
    }
}
