// SPDX-License-Identifier: Apache-2.0
// Builds the index of neighbors.cuh from a bucket order: rows, and the boxes of tiles, nodes and the levels above.
//
// 32 consecutive points of the bucket order's curve form a long shape, sometimes in two parts. So the points of a node
// are split again: in halves across the longest edge of their box, down to tiles. On a sphere of 131,072 points,
// queries near the surface then look at 1.8 tiles instead of 3.1, those around the centre at 87 instead of 230. If
// every cloud is one node, no bucket order is needed.
//
// A thread has four consecutive points of the node's order. Of the 150 compare-exchange steps that split a node, 65
// stay within a thread, and all but seven of the others within a warp. Two nodes take 10.4 us and 1024 nodes 52 us;
// with one point a thread they took 19.3 and 132 us (H200).

#define POINTS 1024              // a node
#define EACH 4                   // points a thread
#define THREADS (POINTS / EACH)  // mirrored by gpu3d/cuda/neighbors.py, like the next
#define LEVEL_THREADS 128

#include "clouds.cuh"
#include "neighbors.cuh"
#include "sort.cuh"
#include "voxels.cuh"

#define OF_TILE (TILE / EACH)  // lanes a tile
#define WARPS (THREADS / 32)

static_assert(EACH == 4, "a sort does its first two merges in registers");

// Floats as integers of the same order, so that one instruction finds the minimum or maximum of a warp.
__device__ __forceinline__ int ordered(float x) {
    const int i = __float_as_int(x);
    return i ^ (i >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float unordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }
__device__ __forceinline__ float least(float x) { return unordered(__reduce_min_sync(FULL, ordered(x))); }
__device__ __forceinline__ float most(float x) { return unordered(__reduce_max_sync(FULL, ordered(x))); }
__device__ __forceinline__ double least(double x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x = min(x, __shfl_xor_sync(FULL, x, step));
    return x;
}
__device__ __forceinline__ double most(double x) { return -least(-x); }

// Lanes and Block: sums of N numbers, minimum and maximum over LANES lanes, or over the block. Every thread gets them.
template <int LANES>
struct Lanes {
    template <int N>
    __device__ __forceinline__ void add(float (&x)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = sum_of_lanes<LANES>(x[i]);
    }
    __device__ __forceinline__ void bound(real &low, real &high) const {
        if constexpr (LANES == 32) {
            low = least(low);
            high = most(high);
        } else
#pragma unroll
            for (int step = LANES / 2; step; step /= 2) {
                low = min(low, __shfl_xor_sync(FULL, low, step));
                high = max(high, __shfl_xor_sync(FULL, high, step));
            }
    }
};

struct Block {
    real (*shared)[WARPS];  // [6]
    template <int N>
    __device__ __forceinline__ void add(float (&x)[N]) const {
        const int lane = threadIdx.x & 31;
        Lanes<32>().add(x);
        __syncthreads();
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < N; ++i) shared[i][threadIdx.x >> 5] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = (float)shared[i][lane % WARPS];
        Lanes<WARPS>().add(x);
    }
    __device__ __forceinline__ void bound(real &low, real &high) const {
        const int lane = threadIdx.x & 31;
        Lanes<32>().bound(low, high);
        __syncthreads();
        if (lane == 0) {
            shared[0][threadIdx.x >> 5] = low;
            shared[1][threadIdx.x >> 5] = high;
        }
        __syncthreads();
        low = shared[0][lane % WARPS];
        high = shared[1][lane % WARPS];
        Lanes<WARPS>().bound(low, high);
    }
};

// The box around no point.
__device__ __forceinline__ Box no_box() {
    return Box{{INFINITE, INFINITE, INFINITE}, -1, {-INFINITE, -INFINITE, -INFINITE}, 0, {0, 0, 0}, 0};
}

// The box around the boxes of the lanes that differ in the bits STEP, 2 STEP, ... LANES / 2. It has no slab.
template <int STEP, int LANES>
__device__ __forceinline__ Box joined(const Box &box) {
    Box all = no_box();
    u32 first = box.first;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        all.low[d] = box.low[d];
        all.high[d] = box.high[d];
    }
#pragma unroll
    for (int step = STEP; step < LANES; step *= 2) {
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            all.low[d] = min(all.low[d], __shfl_xor_sync(FULL, all.low[d], step));
            all.high[d] = max(all.high[d], __shfl_xor_sync(FULL, all.high[d], step));
        }
        first = min(first, __shfl_xor_sync(FULL, first, step));
    }
    all.first = (int)first;
    return all;
}

// Sets the slab of a box from its points, on every thread that has some of them: two planes across the direction in
// which the points vary least.
//
// This direction is the eigenvector of their covariance matrix with the smallest eigenvalue, and so that of the
// cofactor matrix with the largest. The columns of a power of the cofactor matrix converge to it. Any direction gives a
// correct slab; a good one gives a useful slab.
template <class Threads>
__device__ __forceinline__ void find_slab(Box &box, const Row (&points)[EACH], const Threads &threads) {
    real size = 0, reach = 0;
    float scaled[EACH][3], sums[4] = {}, moments[6] = {};
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        size = max(size, box.high[d] - box.low[d]);
        reach += max(fabs(box.low[d]), fabs(box.high[d]));
    }
    // Infinite for a single point: all that follows is NaN, and there is no slab.
    const float scale = __fdividef(1, (float)size);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const real x[3] = {points[k].x, points[k].y, points[k].z};
        const bool finite = is_finite(points[k]);
#pragma unroll
        for (int d = 0; d < 3; ++d)
            sums[d] += scaled[k][d] = finite ? (float)(x[d] - (real)0.5 * (box.low[d] + box.high[d])) * scale : 0;
        sums[3] += finite;
    }
    threads.add(sums);
    const float of_one = __fdividef(1, sums[3]);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const bool finite = is_finite(points[k]);
        float v[3];
#pragma unroll
        for (int d = 0; d < 3; ++d) v[d] = finite ? scaled[k][d] - sums[d] * of_one : 0;
        const float products[6] = {v[0] * v[0], v[0] * v[1], v[0] * v[2], v[1] * v[1], v[1] * v[2], v[2] * v[2]};
#pragma unroll
        for (int i = 0; i < 6; ++i) moments[i] += products[i];
    }
    threads.add(moments);
    const float xx = moments[0], xy = moments[1], xz = moments[2], yy = moments[3], yz = moments[4], zz = moments[5];
    float m[6] = {yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy,
                  xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy};
#pragma unroll
    for (int power = 0; power < 3; ++power) {  // squares the cofactor matrix (xx xy xz yy yz zz)
        const float scale = __fdividef(1, m[0] + m[3] + m[5]);
#pragma unroll
        for (int i = 0; i < 6; ++i) m[i] *= scale;
        const float square[6] = {m[0] * m[0] + m[1] * m[1] + m[2] * m[2], m[0] * m[1] + m[1] * m[3] + m[2] * m[4],
                                 m[0] * m[2] + m[1] * m[4] + m[2] * m[5], m[1] * m[1] + m[3] * m[3] + m[4] * m[4],
                                 m[1] * m[2] + m[3] * m[4] + m[4] * m[5], m[2] * m[2] + m[4] * m[4] + m[5] * m[5]};
#pragma unroll
        for (int i = 0; i < 6; ++i) m[i] = square[i];
    }
    float normal[3] = {m[0], m[1], m[2]};  // the longest column
    if (m[3] > m[0]) {
        normal[0] = m[1];
        normal[1] = m[3];
        normal[2] = m[4];
    }
    if (m[5] > fmaxf(m[0], m[3])) {
        normal[0] = m[2];
        normal[1] = m[4];
        normal[2] = m[5];
    }
    const float shorter = SHORTENED * rsqrtf(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]);
    // No slab if all points coincide or lie on a line, nor if along_normal may overflow.
    const bool usable = shorter > 0 && shorter < INFINITE && reach < (REAL ? (real)1e300 : (real)1e37f);
#pragma unroll
    for (int d = 0; d < 3; ++d) box.normal[d] = usable ? normal[d] * shorter : 0;
    real low = INFINITE, high = -INFINITE;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const Row &point = points[k];
        const real s = along_normal(box, point.x, point.y, point.z);
        const real slack = SLACK * (fabs(point.x) + fabs(point.y) + fabs(point.z));
        low = min(low, s - slack);  // min and max ignore the NaN of non-finite points
        high = max(high, s + slack);
    }
    threads.bound(low, high);
    box.below = usable ? low : 0;
    box.above = usable ? high : 0;
}

#define PLACES (1u << 22)  // resolution along the split edge
static_assert(POINTS <= 1 << 10, "a place and a point share a word");

struct __align__(16) Splitter {
    real x[3][POINTS];
    int index[POINTS];
    u32 keys[2][POINTS];
    real low[3][WARPS], high[3][WARPS];
};

// Compares this thread's keys with those of the thread whose number differs in the bits of MASK. Keeps the smaller keys
// if `lower`, else the larger. REVERSED: compares the first key with the other thread's last.
template <int MASK, bool REVERSED>
__device__ __forceinline__ void exchange(Splitter &splitter, u32 (&key)[EACH], int &buffer, bool lower) {
    u32 others[EACH];
    if constexpr (MASK < 32) {
#pragma unroll
        for (int k = 0; k < EACH; ++k) others[k] = __shfl_xor_sync(FULL, key[k], MASK);
    } else {
        uint4 *keys = (uint4 *)splitter.keys[buffer];
        keys[threadIdx.x] = make_uint4(key[0], key[1], key[2], key[3]);
        __syncthreads();
        const uint4 four = keys[threadIdx.x ^ MASK];
        others[0] = four.x;
        others[1] = four.y;
        others[2] = four.z;
        others[3] = four.w;
        buffer ^= 1;
    }
    u32 kept[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const u32 other = others[REVERSED ? EACH - 1 - k : k];
        kept[k] = lower ? min(key[k], other) : max(key[k], other);
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) key[k] = kept[k];
}

// Bitonic merge: compares threads that are STEP apart, then STEP / 2, ..., then a thread's own keys.
template <int STEP>
__device__ __forceinline__ void merge(Splitter &splitter, u32 (&key)[EACH], int &buffer) {
    if constexpr (STEP > 0) {
        exchange<STEP, false>(splitter, key, buffer, !(threadIdx.x & STEP));
        merge<STEP / 2>(splitter, key, buffer);
    } else {
        order(key[0], key[2]);
        order(key[1], key[3]);
        order(key[0], key[1]);
        order(key[2], key[3]);
    }
}

// Sorts SIZE keys without the final merge, after which the lower half holds the smaller keys in some order.
template <int SIZE, int SORTED = 2 * EACH>
__device__ __forceinline__ void halve(Splitter &splitter, u32 (&key)[EACH], int &buffer) {
    if constexpr (SORTED == 2 * EACH) {
        order(key[0], key[1]);
        order(key[2], key[3]);
        order(key[0], key[3]);
        order(key[1], key[2]);
        order(key[0], key[1]);
        order(key[2], key[3]);
    }
    constexpr int LANES = SORTED / EACH;
    exchange<LANES - 1, true>(splitter, key, buffer, !(threadIdx.x & LANES / 2));
    if constexpr (SORTED < SIZE) {
        merge<LANES / 4>(splitter, key, buffer);
        halve<SIZE, 2 * SORTED>(splitter, key, buffer);
    }
}

// The low bits of the keys of SIZE / EACH threads are numbers of points. Splits these points across the longest edge of
// their box: the first half of the threads gets those before the cut, the second half those behind. Then splits each
// half, down to tiles. Non-finite points come last, followed by places that hold no point.
template <int SIZE>
__device__ __forceinline__ void split(Splitter &splitter, u32 (&key)[EACH], int buffer) {
    constexpr int LANES = SIZE / EACH < 32 ? SIZE / EACH : 32, OF_SIZE = SIZE / EACH / LANES;  // in warps
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    real x[EACH][3], low[3] = {INFINITE, INFINITE, INFINITE}, high[3] = {-INFINITE, -INFINITE, -INFINITE};
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        key[k] &= POINTS - 1;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            x[k][d] = splitter.x[d][key[k]];
            low[d] = min(low[d], x[k][d]);  // min and max ignore NaN
            high[d] = max(high[d], x[k][d]);
        }
    }
#pragma unroll
    for (int d = 0; d < 3; ++d) Lanes<LANES>().bound(low[d], high[d]);
    if constexpr (OF_SIZE > 1) {
        if (lane == 0)
#pragma unroll
            for (int d = 0; d < 3; ++d) {
                splitter.low[d][warp] = low[d];
                splitter.high[d][warp] = high[d];
            }
        __syncthreads();
        const int at = warp / OF_SIZE * OF_SIZE + lane % OF_SIZE;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            low[d] = splitter.low[d][at];
            high[d] = splitter.high[d][at];
            Lanes<OF_SIZE>().bound(low[d], high[d]);
        }
    }
    const bool y_longest = high[1] - low[1] > high[0] - low[0];
    const real xy = y_longest ? high[1] - low[1] : high[0] - low[0], edge = max(xy, high[2] - low[2]);
    const bool z_longest = edge > xy;
    const real from = z_longest ? low[2] : y_longest ? low[1] : low[0];
    const float scale = __fdividef(PLACES, (float)edge);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const float at = (float)((z_longest ? x[k][2] : y_longest ? x[k][1] : x[k][0]) - from) * scale;
        u32 place = min((u32)at, PLACES - 3);  // 0 for NaN, if all points coincide
        if (x[k][0] != x[k][0]) place = splitter.index[key[k]] >= 0 ? PLACES - 2 : PLACES - 1;
        key[k] |= place << 10;
    }
    halve<SIZE>(splitter, key, buffer);
    if constexpr (SIZE > 2 * TILE) split<SIZE / 2>(splitter, key, buffer);
}

// Concatenates two arrays.
extern "C" __global__ __launch_bounds__(THREADS) void index_join(
    const point_t *__restrict__ first,  // [count]
    long long count,
    const point_t *__restrict__ second,  // [all - count]
    long long all,
    point_t *__restrict__ joined  // [all]
) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < all) joined[i] = i < count ? first[i] : second[i - count];
}

// One block a node.
extern "C" __global__ __launch_bounds__(THREADS) void index_nodes(
    const point_t *__restrict__ points,     // [points, 3]
    const point_t *__restrict__ others,     // [points, 3] of a second batch, if there is one
    const int *__restrict__ slot_to_point,  // [slots] bucket order, -1 in padding; null: points in their own order
    const __grid_constant__ Clouds clouds,  // of these points
    int second,                             // the second batch's first cloud; its indices start at 0 again
    Row *__restrict__ rows,                 // [slots]
    Box *__restrict__ tiles,                // [slots / TILE]; null: write rows only, in bucket order if it is given
    Box *__restrict__ nodes                 // [nodes]
) {
    __shared__ Splitter splitter;
    if ((int)blockIdx.x >= tiles_of(clouds)) return;  // the grid is an upper bound
    const int b = cloud_of<&Cloud::tile>(clouds, blockIdx.x);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.slot + (blockIdx.x - cloud.tile) * POINTS;
    const bool in_first = b < second, in_order = slot_to_point && !tiles;
    const int base = in_first ? 0 : rows_of(clouds)[second].point;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int at = k * THREADS + threadIdx.x, slot = first + at, place = cloud.point + slot - cloud.slot;
        Row row = {NAN_FLOAT, NAN_FLOAT, NAN_FLOAT, -1};
        if (slot < next.slot) {  // the same for a whole tile
            const int i = slot_to_point ? slot_to_point[slot] : place < next.point ? place : -1;
            if (i >= 0) {
                row.index = i - base;
                real x[3];
#pragma unroll
                for (int d = 0; d < 3; ++d) x[d] = widen((in_first ? points : others)[3 * (size_t)row.index + d]);
                // Infinities become NaN. Otherwise such a point could be found at infinite distance, or within an
                // infinite radius.
                if (is_finite(x[0]) && is_finite(x[1]) && is_finite(x[2])) row = Row{x[0], x[1], x[2], row.index};
            }
            if (in_order) rows[slot] = row;
        }
        splitter.x[0][at] = row.x;
        splitter.x[1][at] = row.y;
        splitter.x[2][at] = row.z;
        splitter.index[at] = row.index;
    }
    if (in_order) return;
    __syncthreads();

    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, slot = first + EACH * thread;
    u32 key[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) key[k] = EACH * thread + k;
    split<POINTS>(splitter, key, 0);
    Row row[EACH];
    Box box = no_box();
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int from = key[k] & POINTS - 1;
        const real x[3] = {splitter.x[0][from], splitter.x[1][from], splitter.x[2][from]};
        row[k] = Row{x[0], x[1], x[2], splitter.index[from]};
        if (slot < next.slot) rows[slot + k] = row[k];
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            box.low[d] = min(box.low[d], x[d]);  // min and max ignore NaN
            box.high[d] = max(box.high[d], x[d]);
        }
        if (is_finite(row[k])) box.first = (int)min((u32)box.first, (u32)row[k].index);
    }
    if (!tiles) return;
    box = joined<1, OF_TILE>(box);
    find_slab(box, row, Lanes<OF_TILE>());
    if (lane % OF_TILE == 0 && slot < next.slot) tiles[slot / TILE] = box;
    __shared__ Box boxes[WARPS];
    __shared__ real sums[6][WARPS];
    box = joined<OF_TILE, 32>(box);
    if (lane == 0) boxes[warp] = box;
    __syncthreads();
    box = joined<1, WARPS>(boxes[lane % WARPS]);
    find_slab(box, row, Block{sums});
    if (thread == 0) nodes[blockIdx.x] = box;
}

// One warp a box of a level above the nodes: the box around up to 32 boxes of the level below.
extern "C" __global__ __launch_bounds__(LEVEL_THREADS) void index_level(
    const Box *__restrict__ below,  // nodes for level 0
    const __grid_constant__ Clouds clouds,
    int level,
    int room,                // boxes in `boxes`
    Box *__restrict__ boxes  // [room] those between the clouds' are not written
) {
    const int at = blockIdx.x * (LEVEL_THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (at >= room) return;
    const Cloud *rows = rows_of(clouds);
    int b = 0;  // the last cloud that begins at or before `at`
    for (int high = clouds.count; high - b > 1;) {
        const int middle = (b + high) >> 1;
        if (first_of_level(rows[middle].group, middle, level) <= at) b = middle;
        else high = middle;
    }
    const Cloud cloud = rows[b], next = rows[b + 1];
    const int branches = next.group - cloud.group, of_cloud = at - first_of_level(cloud.group, b, level);
    if (of_cloud >= boxes_of_level(branches, level)) return;
    const int first = level ? first_of_level(cloud.group, b, level - 1) : cloud.tile;
    const int end = level ? first + boxes_of_level(branches, level - 1) : next.tile,
              mine = first + 32 * of_cloud + lane;
    const Box box = joined<1, 32>(mine < end ? below[mine] : no_box());
    if (lane == 0) boxes[at] = box;
}
