// SPDX-License-Identifier: Apache-2.0
// Builds the index of neighbors.cuh from a bucket order: rows, and the boxes of tiles, nodes and branches.

#define THREADS 1024        // points of a node
#define BRANCH_THREADS 128

#include "clouds.cuh"
#include "voxels.cuh"
#include "neighbors.cuh"

// Floats as integers of the same order, for min and max in one instruction a warp.
__device__ __forceinline__ int ordered(float x) { const int i = __float_as_int(x); return i ^ (i >> 31 & 0x7fffffff); }
__device__ __forceinline__ float unordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }
__device__ __forceinline__ float least(float x) { return unordered(__reduce_min_sync(FULL, ordered(x))); }
__device__ __forceinline__ float most(float x) { return unordered(__reduce_max_sync(FULL, ordered(x))); }

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

// The box around what holds nothing.
__device__ __forceinline__ Box no_box() {
    return Box{{INFINITE, INFINITE, INFINITE}, -1, {-INFINITE, -INFINITE, -INFINITE}, 0, {0, 0, 0}, 0};
}

// The box around the boxes of a warp's lanes. It has no slab.
__device__ __forceinline__ Box joined(const Box &box) {
    Box all = no_box();
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        all.low[d] = least(box.low[d]);
        all.high[d] = most(box.high[d]);
    }
    all.first = (int)__reduce_min_sync(FULL, (u32)box.first);
    return all;
}

// The slab of a tile, a point a lane, into its box: the planes across the direction in which the points vary least.
//
// That is the eigenvector of their covariance's least eigenvalue, so the largest of its cofactors' matrix, to which the columns
// of a power of that matrix converge. Any direction is right, and only a good one is useful.
__device__ __forceinline__ void find_slab(Box &box, const Row &point, bool finite) {
    float from[3], extent[3], scaled[3], mean[3];
    from_middle(from, point, box);
#pragma unroll
    for (int d = 0; d < 3; ++d) extent[d] = box.high[d] - box.low[d];
    const float size = fmaxf(extent[0], fmaxf(extent[1], extent[2]));
    const float count = __popc(__ballot_sync(FULL, finite));
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        scaled[d] = finite && size > 0 ? from[d] / size : 0;
        mean[d] = sum_of_warp(scaled[d]) / count;
    }
#pragma unroll
    for (int d = 0; d < 3; ++d) scaled[d] = finite ? scaled[d] - mean[d] : 0;
    const float xx = sum_of_warp(scaled[0] * scaled[0]), xy = sum_of_warp(scaled[0] * scaled[1]);
    const float xz = sum_of_warp(scaled[0] * scaled[2]), yy = sum_of_warp(scaled[1] * scaled[1]);
    const float yz = sum_of_warp(scaled[1] * scaled[2]), zz = sum_of_warp(scaled[2] * scaled[2]);
    float m[6] = {yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy, xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy};
#pragma unroll
    for (int power = 0; power < 3; ++power) {               // xx xy xz yy yz zz of the cofactors, squared thrice
        const float scale = 1 / (m[0] + m[3] + m[5]);
#pragma unroll
        for (int i = 0; i < 6; ++i) m[i] *= scale;
        const float square[6] = {
            m[0] * m[0] + m[1] * m[1] + m[2] * m[2], m[0] * m[1] + m[1] * m[3] + m[2] * m[4],
            m[0] * m[2] + m[1] * m[4] + m[2] * m[5], m[1] * m[1] + m[3] * m[3] + m[4] * m[4],
            m[1] * m[2] + m[3] * m[4] + m[4] * m[5], m[2] * m[2] + m[4] * m[4] + m[5] * m[5]};
#pragma unroll
        for (int i = 0; i < 6; ++i) m[i] = square[i];
    }
    float normal[3] = {m[0], m[1], m[2]};                   // the longest column
    if (m[3] > m[0]) { normal[0] = m[1]; normal[1] = m[3]; normal[2] = m[4]; }
    if (m[5] > fmaxf(m[0], m[3])) { normal[0] = m[2]; normal[1] = m[4]; normal[2] = m[5]; }
    const float length = sqrtf(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]);
    if (!(length > 0 && length < INFINITE)) return;         // collinear, or one point
#pragma unroll
    for (int d = 0; d < 3; ++d) box.normal[d] = normal[d] / length * SHORTENED;
    const float s = along_normal(box, from), slack = SLACK * (extent[0] + extent[1] + extent[2]);
    box.below = least(finite ? s : INFINITE) - slack;
    box.above = most(finite ? s : -INFINITE) + slack;
}

// A block a node, a warp a tile. float64 coordinates are taken relative to `origins`, in float64, and then rounded.
extern "C" __global__ __launch_bounds__(THREADS) void index_nodes(
    const point_t *__restrict__ points,         // [points, 3]
    const int *__restrict__ slot_to_point,      // [slots] in bucket order, -1 in padding
    const __grid_constant__ Clouds clouds,      // of these points
    const double *__restrict__ origins,         // [clouds, 3] of the cloud that is searched; null: 0
    Row *__restrict__ rows,                     // [slots]
    Box *__restrict__ tiles,                    // [slots / TILE], or null: rows alone
    Box *__restrict__ nodes)                    // [nodes]
{
    const int b = cloud_of<&Cloud::tile>(clouds, blockIdx.x);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int slot = cloud.slot + (blockIdx.x - cloud.tile) * THREADS + threadIdx.x;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Box box = no_box();
    if (slot < next.slot) {                     // by whole tiles
        const int i = slot_to_point[slot];
        float x[3];
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
        // Infinities become NaN: else one would be found, infinitely far, where nothing nearer is, or within an infinite radius.
        const float nan = __int_as_float(0x7fffffff);
        const Row row = finite ? Row{x[0], x[1], x[2], i} : Row{nan, nan, nan, i};
        rows[slot] = row;
        if (!tiles) return;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            box.low[d] = finite ? x[d] : INFINITE;
            box.high[d] = finite ? x[d] : -INFINITE;
        }
        box.first = finite ? i : -1;
        box = joined(box);
        find_slab(box, row, finite);
        if (lane == 0) tiles[slot / TILE] = box;
    }
    if (!tiles) return;
    __shared__ Box boxes[THREADS / 32];
    if (lane == 0) boxes[warp] = box;
    __syncthreads();
    if (warp) return;
    box = joined(boxes[lane]);
    if (lane == 0) nodes[blockIdx.x] = box;
}

// A warp a branch: the box around up to 32 nodes.
extern "C" __global__ __launch_bounds__(BRANCH_THREADS) void index_branches(
    const Box *__restrict__ nodes,
    const __grid_constant__ Clouds clouds,
    int count,
    Box *__restrict__ branches)                 // [count]
{
    const int at = blockIdx.x * (BRANCH_THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (at >= count) return;
    const int b = cloud_of<&Cloud::group>(clouds, at);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int node = cloud.tile + (at - cloud.group) * 32 + lane;
    const Box box = joined(node < next.tile ? nodes[node] : no_box());
    if (lane == 0) branches[at] = box;
}
