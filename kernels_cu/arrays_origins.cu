// SPDX-License-Identifier: Apache-2.0
// The origin of each float64 cloud: on each axis the minimum of its finite coordinates, and 0 where there is none. The
// neighbour search subtracts it in float64, so that map coordinates keep their millimetres as float32.
//
// A warp reads one node of NODE points. It writes the origin of a cloud of one node itself. Nodes of a larger cloud
// are joined by atomicMax on integer keys, and the warp that arrives last turns the keys into the origin. The maximum
// of integers does not depend on their order, so the result is the same on every run. -0 counts as smaller than +0.
//
// The table of clouds: a tile is a node of NODE points.

#define THREADS 256  // mirrored by gpu3d/cuda/arrays.py
#define NODE 1024    // mirrored by gpu3d/cuda/neighbors.py
#define WARPS (THREADS / 32)
#define ITEMS 4  // points that a lane loads together
#define WORDS 4  // of a cloud in `joined`

#include "clouds.cuh"
#include "warp.cuh"

#define MAGNITUDE 0x7fffffffffffffffull
#define NOTHING __longlong_as_double(0x7fffffffffffffffll)  // a NaN

// Larger keys are smaller numbers, and every finite number has a key above 0. Others have key 0.
__device__ __forceinline__ u64 key_of(double x) {
    const u64 bits = __double_as_longlong(x);
    if ((bits & MAGNITUDE) >= 0x7ff0000000000000ull) return 0;
    return bits >> 63 ? bits : bits ^ MAGNITUDE;
}

__device__ __forceinline__ double number_of(u64 key) {
    if (key == 0) return 0;
    return __longlong_as_double(key >> 63 ? key : key ^ MAGNITUDE);
}

extern "C" __global__ __launch_bounds__(THREADS) void origins_minimum(
    const double *__restrict__ points,  // [N, columns] with the strides below
    long long row_stride,               // in elements, as the next
    long long column_stride,
    int columns,  // 2 or 3
    const __grid_constant__ Clouds clouds,
    u64 *joined,                  // [clouds, WORDS], zero before: keys of x, y, z; number of nodes done.
                                  // May be null where no cloud has two nodes.
    double *__restrict__ origins  // [clouds, 3]
) {
    const Cloud *rows = rows_of(clouds);
    const int thread = blockIdx.x * THREADS + threadIdx.x, lane = threadIdx.x & 31;
    if (thread < clouds.count && rows[thread].point == rows[thread + 1].point)  // an empty cloud has no node
        for (int d = 0; d < 3; ++d) origins[3 * (size_t)thread + d] = 0;
    const int node = blockIdx.x * WARPS + threadIdx.x / 32;
    if (node >= rows[clouds.count].tile) return;
    const int b = cloud_of<&Cloud::tile>(clouds, node);
    const Cloud cloud = rows[b], next = rows[b + 1];
    const int nodes = next.tile - cloud.tile, first = (node - cloud.tile) * NODE;  // of the cloud's points
    const int n = min(NODE, next.point - cloud.point - first);

    u64 key[3] = {0, 0, 0};
    const double *point = points + (cloud.point + (long long)first + lane) * row_stride;
    for (int i = lane; i < n; i += 32 * ITEMS) {
        double x[ITEMS][3];  // all loads first, so that they overlap
#pragma unroll
        for (int k = 0; k < ITEMS; ++k, point += 32 * row_stride)
#pragma unroll
            for (int d = 0; d < 3; ++d) x[k][d] = i + 32 * k < n && d < columns ? point[d * column_stride] : NOTHING;
#pragma unroll
        for (int k = 0; k < ITEMS; ++k)
#pragma unroll
            for (int d = 0; d < 3; ++d) key[d] = max(key[d], key_of(x[k][d]));
    }
#pragma unroll
    for (int d = 0; d < 3; ++d)
#pragma unroll
        for (int step = 16; step; step >>= 1) key[d] = max(key[d], __shfl_xor_sync(FULL, key[d], step));
    u64 mine = lane == 0 ? key[0] : lane == 1 ? key[1] : key[2];  // lane d has axis d

    if (nodes > 1) {
        u64 *of_cloud = joined + WORDS * (size_t)b;
        // A key only grows, so an old one that is as large is reason enough not to write.
        if (lane < 3 && mine > __ldcg(&of_cloud[lane])) atomicMax(&of_cloud[lane], mine);
        __syncwarp();
        bool last = false;
        if (lane == 0) {
            __threadfence();  // the keys are seen before the arrival
            last = atomicAdd(&of_cloud[3], 1ull) == nodes - 1;
            __threadfence();
        }
        __syncwarp();
        if (!__shfl_sync(FULL, last, 0)) return;
        if (lane < 3) mine = __ldcg(&of_cloud[lane]);
    }
    if (lane < 3) origins[3 * (size_t)b + lane] = number_of(mine);
}
