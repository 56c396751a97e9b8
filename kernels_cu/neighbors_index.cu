// SPDX-License-Identifier: Apache-2.0
// Builds the index of neighbors.cuh from a bucket order: rows, and the boxes of tiles, nodes and branches.

#define THREADS 128

#include "clouds.cuh"
#include "voxels.cuh"
#include "neighbors.cuh"

// Floats as integers of the same order, for min and max in one instruction a warp.
__device__ __forceinline__ int ordered(float x) { const int i = __float_as_int(x); return i ^ (i >> 31 & 0x7fffffff); }
__device__ __forceinline__ float unordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }

// The box around the boxes of a warp's lanes, written by its first lane.
__device__ __forceinline__ void write_box(Box *out, const float low[3], const float high[3]) {
    Box box = {};
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        box.low[d] = unordered(__reduce_min_sync(FULL, ordered(low[d])));
        box.high[d] = unordered(__reduce_max_sync(FULL, ordered(high[d])));
    }
    if ((threadIdx.x & 31) == 0) *out = box;
}

// A warp a tile. float64 coordinates are taken relative to `origins`, in float64, and then rounded.
extern "C" __global__ __launch_bounds__(THREADS) void index_rows(
    const point_t *__restrict__ points,         // [points, 3]
    const int *__restrict__ slot_to_point,      // [slots] in bucket order, -1 in padding
    int slots,                                  // a multiple of TILE
    const __grid_constant__ Clouds clouds,      // of these points
    const double *__restrict__ origins,         // [clouds, 3] of the cloud that is searched; null: 0
    Row *__restrict__ rows,                     // [slots]
    Box *__restrict__ tiles)                    // [slots / TILE], or null
{
    const int slot = blockIdx.x * THREADS + threadIdx.x;
    if (slot >= slots) return;
    const int i = slot_to_point[slot];
    const int b = origins ? cloud_of<&Cloud::slot>(clouds, slot) : 0;
    float x[3], low[3], high[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        coord_t value = i >= 0 ? widen(points[3 * (size_t)i + d]) : (coord_t)0;
#if POINT == 1
        if (origins) value = __dsub_rn(value, origins[3 * b + d]);
        x[d] = __double2float_rn(value);
#else
        x[d] = value;
#endif
    }
    const bool finite = i >= 0 && is_finite(x[0]) && is_finite(x[1]) && is_finite(x[2]);
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        low[d] = finite ? x[d] : INFINITE;
        high[d] = finite ? x[d] : -INFINITE;
    }
    // Infinities become NaN: else one would be found, infinitely far, where nothing nearer is, or within an infinite radius.
    const float nan = __int_as_float(0x7fffffff);
    rows[slot] = finite ? Row{x[0], x[1], x[2], i} : Row{nan, nan, nan, i};
    if (tiles) write_box(tiles + slot / TILE, low, high);
}

// A warp a box: the box around up to 32 boxes of the level below.
extern "C" __global__ __launch_bounds__(THREADS) void index_boxes(
    const Box *__restrict__ below,
    const __grid_constant__ Clouds clouds,
    int branches,                               // 1: boxes are branches and those below nodes; 0: nodes and tiles
    int count,
    Box *__restrict__ boxes)                    // [count]
{
    const int at = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (at >= count) return;
    const int b = branches ? cloud_of<&Cloud::group>(clouds, at) : cloud_of<&Cloud::tile>(clouds, at);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = branches ? cloud.tile + (at - cloud.group) * 32 : cloud.slot / TILE + (at - cloud.tile) * 32;
    const int end = min(first + 32, branches ? next.tile : next.slot / TILE);
    float low[3] = {INFINITE, INFINITE, INFINITE}, high[3] = {-INFINITE, -INFINITE, -INFINITE};
    if (first + lane < end) {
        const Box box = below[first + lane];
#pragma unroll
        for (int d = 0; d < 3; ++d) { low[d] = box.low[d]; high[d] = box.high[d]; }
    }
    write_box(boxes + at, low, high);
}
