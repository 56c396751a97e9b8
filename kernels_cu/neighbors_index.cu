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

// What N numbers of all points add up to, of a warp or of the block; and the least and the most. On every thread.
struct Warp {
    template <int N>
    __device__ __forceinline__ void add(float (&x)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int step = 16; step; step /= 2) x[i] += __shfl_xor_sync(FULL, x[i], step);
    }
    __device__ __forceinline__ void bound(float &low, float &high) const { low = least(low); high = most(high); }
};

struct Block {
    float (*shared)[THREADS / 32];              // [6]
    template <int N>
    __device__ __forceinline__ void add(float (&x)[N]) const {
        const int lane = threadIdx.x & 31;
        Warp().add(x);
        __syncthreads();
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < N; ++i) shared[i][threadIdx.x >> 5] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = shared[i][lane];
        Warp().add(x);
    }
    __device__ __forceinline__ void bound(float &low, float &high) const {
        const int lane = threadIdx.x & 31;
        Warp().bound(low, high);
        __syncthreads();
        if (lane == 0) { shared[0][threadIdx.x >> 5] = low; shared[1][threadIdx.x >> 5] = high; }
        __syncthreads();
        low = shared[0][lane];
        high = shared[1][lane];
        Warp().bound(low, high);
    }
};

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

// The slab of the points in a box, a point a thread, into the box: the planes across the direction in which they vary least.
//
// That is the eigenvector of their covariance's least eigenvalue, so the largest of its cofactors' matrix, to which the columns
// of a power of that matrix converge. Any direction is right, and only a good one is useful.
template <class Threads>
__device__ __forceinline__ void find_slab(Box &box, const Row &point, bool finite, const Threads &threads) {
    float from[3], extent[3], scaled[3], sums[4];
    from_middle(from, point, box);
#pragma unroll
    for (int d = 0; d < 3; ++d) extent[d] = box.high[d] - box.low[d];
    const float size = fmaxf(extent[0], fmaxf(extent[1], extent[2]));
#pragma unroll
    for (int d = 0; d < 3; ++d) sums[d] = scaled[d] = finite && size > 0 ? from[d] / size : 0;
    sums[3] = finite;
    threads.add(sums);
#pragma unroll
    for (int d = 0; d < 3; ++d) scaled[d] = finite ? scaled[d] - sums[d] / sums[3] : 0;
    float moments[6] = {scaled[0] * scaled[0], scaled[0] * scaled[1], scaled[0] * scaled[2],
                        scaled[1] * scaled[1], scaled[1] * scaled[2], scaled[2] * scaled[2]};
    threads.add(moments);
    const float xx = moments[0], xy = moments[1], xz = moments[2], yy = moments[3], yz = moments[4], zz = moments[5];
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
    if (!(length > 0 && length < INFINITE)) return;         // collinear, or one point; alike on all threads
#pragma unroll
    for (int d = 0; d < 3; ++d) box.normal[d] = normal[d] / length * SHORTENED;
    const float s = along_normal(box, from), slack = SLACK * (extent[0] + extent[1] + extent[2]);
    float low = finite ? s : INFINITE, high = finite ? s : -INFINITE;
    threads.bound(low, high);
    box.below = low - slack;
    box.above = high + slack;
}

// A block a node, a warp a tile. float64 coordinates are taken relative to `origins`, in float64, and then rounded.
extern "C" __global__ __launch_bounds__(THREADS) void index_nodes(
    const point_t *__restrict__ points,         // [points, 3]
    const int *__restrict__ slot_to_point,      // [slots] in bucket order, -1 in padding
    const __grid_constant__ Clouds clouds,      // of these points
    int second,                                 // cloud where a second batch begins, whose indices count from 0 again
    const double *__restrict__ origins,         // [clouds, 3] of the cloud that is searched; null: 0
    Row *__restrict__ rows,                     // [slots]
    Box *__restrict__ tiles,                    // [slots / TILE], or null: rows alone
    Box *__restrict__ nodes)                    // [nodes]
{
    const int b = cloud_of<&Cloud::tile>(clouds, blockIdx.x);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int slot = cloud.slot + (blockIdx.x - cloud.tile) * THREADS + threadIdx.x;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float nan = __int_as_float(0x7fffffff);
    Row row = {nan, nan, nan, -1};
    bool finite = false;
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
        // Infinities become NaN: else one would be found, infinitely far, where nothing nearer is, or within an infinite radius.
        finite = i >= 0 && is_finite(x[0]) && is_finite(x[1]) && is_finite(x[2]);
        const int index = i >= 0 && b >= second ? i - rows_of(clouds)[second].point : i;
        row = finite ? Row{x[0], x[1], x[2], index} : Row{nan, nan, nan, index};
        rows[slot] = row;
    }
    if (!tiles) return;
    Box box = no_box();
    if (finite) box = Box{{row.x, row.y, row.z}, row.index, {row.x, row.y, row.z}, 0, {0, 0, 0}, 0};
    box = joined(box);
    find_slab(box, row, finite, Warp());
    if (lane == 0 && slot < next.slot) tiles[slot / TILE] = box;
    __shared__ Box boxes[THREADS / 32];
    __shared__ float sums[6][THREADS / 32];
    if (lane == 0) boxes[warp] = box;
    __syncthreads();
    box = joined(boxes[lane]);
    find_slab(box, row, finite, Block{sums});
    if (threadIdx.x == 0) nodes[blockIdx.x] = box;
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
