// SPDX-License-Identifier: Apache-2.0
// Builds the index of neighbors.cuh from a bucket order: rows, and the boxes of tiles, nodes and branches.
//
// A piece of the bucket order's curve of 32 points is long, or even apart. So the points of a node are split again, in halves across
// the longest edge of their box, down to tiles. Counted on a sphere of 131,072 points: near queries must look at 1.8 tiles and not at
// 3.1, those around the centre at 87 and not at 230. Where every cloud is one node, no bucket order is needed before.

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
    const float x[3] = {point.x, point.y, point.z};
    float size = 0, reach = 0, scaled[3], sums[4];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        size = fmaxf(size, box.high[d] - box.low[d]);
        reach += fmaxf(fabsf(box.low[d]), fabsf(box.high[d]));
    }
    if (!(size > 0 && reach < 1e37f)) return;               // one point, or along_normal may overflow; alike on all threads
#pragma unroll
    for (int d = 0; d < 3; ++d) sums[d] = scaled[d] = finite ? (x[d] - 0.5f * (box.low[d] + box.high[d])) / size : 0;
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
    if (!(length > 0 && length < INFINITE)) return;         // collinear; alike on all threads
#pragma unroll
    for (int d = 0; d < 3; ++d) box.normal[d] = normal[d] / length * SHORTENED;
    const float s = along_normal(box, x[0], x[1], x[2]), slack = SLACK * (fabsf(x[0]) + fabsf(x[1]) + fabsf(x[2]));
    float low = finite ? s - slack : INFINITE, high = finite ? s + slack : -INFINITE;
    threads.bound(low, high);
    box.below = low;
    box.above = high;
}

#define PLACES (1u << 22)   // along an edge
static_assert(THREADS <= 1 << 10, "a place and a thread are one word");

struct Splitter {
    float x[3][THREADS];
    int index[THREADS];
    u32 keys[2][THREADS];
    float low[3][THREADS / 32], high[3][THREADS / 32];
};

// Each SIZE threads hold the points of the threads `from`. Exchanges them so that of the first and the second half one lies before the
// other along the longest edge of the box around both; then the same with the halves. `last` is the place of a point that is not
// finite, or of none, which come last; else 0.
//
// A half is sorted upwards, the other downwards; then the lower of each pair that is half a size apart are the lower half.
template <int SIZE>
__device__ __forceinline__ void split(Splitter &splitter, u32 &from, u32 &last, int buffer) {
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, warps = SIZE / 32, first = warp & -warps;
    float x[3], low[3], high[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        x[d] = splitter.x[d][from];
        low[d] = least(last ? INFINITE : x[d]);
        high[d] = most(last ? -INFINITE : x[d]);
        if (lane == 0) { splitter.low[d][warp] = low[d]; splitter.high[d][warp] = high[d]; }
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        low[d] = least(splitter.low[d][first + (lane & warps - 1)]);
        high[d] = most(splitter.high[d][first + (lane & warps - 1)]);
    }
    const bool y_longest = high[1] - low[1] > high[0] - low[0];
    const float xy = y_longest ? high[1] - low[1] : high[0] - low[0], edge = fmaxf(xy, high[2] - low[2]);
    const float at = edge > xy ? x[2] - low[2] : y_longest ? x[1] - low[1] : x[0] - low[0];
    const u32 place = last ? last : min((u32)(at / edge * PLACES), PLACES - 3);     // NaN, where all are one point, is 0
    u32 key = place << 10 | from;
#pragma unroll
    for (int sorted = 2; sorted <= SIZE; sorted *= 2)
#pragma unroll
        for (int step = sorted / 2; step; step /= 2) {
            if (sorted == SIZE && step < SIZE / 2) continue;
            u32 other;
            if (step < 32) other = __shfl_xor_sync(FULL, key, step);
            else {
                splitter.keys[buffer][thread] = key;
                __syncthreads();
                other = splitter.keys[buffer][thread ^ step];
                buffer ^= 1;
            }
            const bool upwards = sorted == SIZE || !(thread & sorted), lower = !(thread & step);
            key = upwards == lower ? min(key, other) : max(key, other);
        }
    from = key & THREADS - 1;
    last = key >> 10 < PLACES - 2 ? 0 : key >> 10;
    if constexpr (SIZE > 2 * TILE) split<SIZE / 2>(splitter, from, last, buffer);
}

// Two arrays, one behind the other.
extern "C" __global__ __launch_bounds__(THREADS) void index_join(
    const point_t *__restrict__ first,          // [count]
    long long count,
    const point_t *__restrict__ second,         // [all - count]
    long long all,
    point_t *__restrict__ joined)               // [all]
{
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < all) joined[i] = i < count ? first[i] : second[i - count];
}

// A block a node, a warp a tile. float64 coordinates are taken relative to `origins`, in float64, and then rounded.
extern "C" __global__ __launch_bounds__(THREADS) void index_nodes(
    const point_t *__restrict__ points,         // [points, 3]
    const point_t *__restrict__ others,         // those of a second batch, if there is one
    const int *__restrict__ slot_to_point,      // [slots] in bucket order, -1 in padding; null: as they come
    const __grid_constant__ Clouds clouds,      // of these points
    int second,                                 // cloud where a second batch begins, whose indices count from 0 again
    const double *__restrict__ origins,         // [clouds of a batch, 3] of the cloud that is searched; null: 0
    Row *__restrict__ rows,                     // [slots]
    Box *__restrict__ tiles,                    // [slots / TILE], or null: rows alone
    Box *__restrict__ nodes)                    // [nodes]
{
    const int b = cloud_of<&Cloud::tile>(clouds, blockIdx.x);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    __shared__ Splitter splitter;
    const int slot = cloud.slot + (blockIdx.x - cloud.tile) * THREADS + threadIdx.x;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float nan = __int_as_float(0x7fffffff);
    Row row = {nan, nan, nan, -1};
    if (slot < next.slot) {                     // by whole tiles
        const int place = cloud.point + slot - cloud.slot;
        const int i = slot_to_point ? slot_to_point[slot] : place < next.point ? place : -1;
        if (i >= 0) {
            const bool first = b < second;
            const double *origin = origins ? origins + 3 * (first ? b : b - second) : nullptr;
            row.index = first ? i : i - rows_of(clouds)[second].point;
            float x[3];
#pragma unroll
            for (int d = 0; d < 3; ++d) x[d] = coordinate(first ? points : others, row.index, d, origin);
            // Infinities become NaN: else one would be found, infinitely far, where nothing nearer is, or within an infinite radius.
            if (is_finite(x[0]) && is_finite(x[1]) && is_finite(x[2])) row = Row{x[0], x[1], x[2], row.index};
        }
    }
    if (tiles) {
        splitter.x[0][threadIdx.x] = row.x;
        splitter.x[1][threadIdx.x] = row.y;
        splitter.x[2][threadIdx.x] = row.z;
        splitter.index[threadIdx.x] = row.index;
        __syncthreads();
        u32 from = threadIdx.x, last = is_finite(row) ? 0 : row.index >= 0 ? PLACES - 2 : PLACES - 1;
        split<THREADS>(splitter, from, last, 0);
        row = Row{splitter.x[0][from], splitter.x[1][from], splitter.x[2][from], splitter.index[from]};
    }
    if (slot < next.slot) rows[slot] = row;
    if (!tiles) return;
    const bool finite = is_finite(row);
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
