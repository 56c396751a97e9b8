// SPDX-License-Identifier: Apache-2.0
// What the bucket kernels share: hash keys, bounds and frames.
//
// Definitions (Flash3D, section 4.1; gpu3d.bucketize documents hash functions and voxels):
//   m        the top 16 of the 48 bits of a Morton code
//   xor      x = vx ^ vy ^ vz
//   key      48 bits in the order of (hash bucket, full-resolution code); points with equal keys stay in point order
//
// Why 48 bits suffice for xor_*: for a given x, the third bit of each level of the Morton code (z, y, x) follows from
// the other two, so (z, y) alone gives the order. So (x, Morton) sorts like (x, interleave(vz, vy)), which has 16 + 32
// bits.

#ifndef GPU3D_BUCKETS_CUH
#define GPU3D_BUCKETS_CUH

#include "clouds.cuh"
#include "voxels.cuh"

#ifndef KEY
#define KEY 3  // 0 xor_mod, 1 xor_div, 2 zorder_mod, 3 zorder_div, 4 given: int32 keys instead of points
#endif

#define KEY_GIVEN 4

// ---- voxels to keys ------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 spread_by_2(u32 v) {  // bit b -> bit 2b, 16 bits
    v = (v | v << 8) & 0x00ff00ffu;
    v = (v | v << 4) & 0x0f0f0f0fu;
    v = (v | v << 2) & 0x33333333u;
    v = (v | v << 1) & 0x55555555u;
    return v;
}

// The rank of h among 0..65535, when ordered by (h mod buckets, h div buckets).
__device__ __forceinline__ u32 order_by_mod(u32 h, u32 buckets) {
    const u32 remainder = h % buckets;
    return remainder * (65536u / buckets) + min(remainder, 65536u % buckets) + h / buckets;
}

__device__ __forceinline__ u64 key_of_voxel(int vx, int vy, int vz, u32 buckets) {
#if KEY <= 1
    const u32 x = vx ^ vy ^ vz;
    const u32 code = spread_by_2(vz) << 1 | spread_by_2(vy);
    return (u64)(KEY == 0 ? order_by_mod(x, buckets) : x) << 32 | code;
#else
    const u32 high = morton_of_bytes(vx >> 8, vy >> 8, vz >> 8), low = morton_of_bytes(vx, vy, vz);
    const u32 top = high >> 8;  // the top 16 of the 48 bits
    return (u64)(KEY == 2 ? order_by_mod(top, buckets) : top) << 32 | (high << 24 | low);
#endif
}

// The bucket that the hash alone gives.
__device__ __forceinline__ u32 bucket_of_voxel(int vx, int vy, int vz, u32 buckets) {
    const u32 h = KEY <= 1 ? (u32)(vx ^ vy ^ vz) : morton_of_bytes(vx >> 8, vy >> 8, vz >> 8) >> 8;
    return KEY == 0 || KEY == 2 ? h % buckets : h / ((65536u + buckets - 1) / buckets);
}

__device__ __forceinline__ u64 key_of_point(const point_t *points, int i, const Frame &frame, u32 buckets) {
    const size_t at = 3 * (size_t)i;
    return key_of_voxel(
        voxel(widen(points[at]), frame, 0), voxel(widen(points[at + 1]), frame, 1),
        voxel(widen(points[at + 2]), frame, 2), buckets
    );
}

// ---- block-wide bounds and frame -----------------------------------------------------------------------------------

// What the voxels of a cloud span.
enum SpanKind { EXTREMES, ROBUST, GIVEN };  // mirrored by gpu3d/cuda/buckets.py, like the struct
struct Span {
    double low[3], high[3];  // if they are given
    int kind;
};

#define SAMPLE 1024  // most points of a cloud whose quantiles make robust bounds

// The quantiles of robust bounds: the rank-th smallest of the sample's numbers on an axis, counted from 0, where rank
// is a hundredth of their number. UPPER: the rank-th largest. 0 if there are none. A warp calls it; NaN takes no part.
template <bool UPPER>
__device__ coord_t quantile(const coord_t *sample, int n) {
    const int lane = threadIdx.x & 31;
    int numbers = 0;
    for (int i = lane; i < n; i += 32) numbers += sample[i] == sample[i];
    numbers = sum_of_warp(numbers);
    if (numbers == 0) return 0;
    coord_t found = (coord_t)-INFINITE;
    for (int below = 0; below <= numbers / 100;) {  // takes the smallest number above `found`; at most eleven times
        coord_t next = (coord_t)INFINITE;
        int count = 0;  // how many of the lane's numbers are `next`
        for (int i = lane; i < n; i += 32) {
            const coord_t x = UPPER ? -sample[i] : sample[i];
            if (!(x > found && x <= next)) continue;
            count = x == next ? count + 1 : 1;
            next = x;
        }
        found = next;
        for (int step = 16; step; step >>= 1) found = min(found, __shfl_xor_sync(FULL, found, step));
        below += sum_of_warp(next == found ? count : 0);
    }
    return UPPER ? -found : found;
}

// Writes the robust bounds of points [first, last), before they are cut to the extremes of the cloud: a row of lower,
// then of upper bounds. The whole block calls it; it has at least six warps, and thread 0 writes.
__device__ void write_robust_bounds(
    const point_t *points,
    int first,
    int last,
    coord_t *sample,  // [3, SAMPLE] in shared memory
    coord_t *row      // [6]
) {
    __shared__ coord_t quantiles[2][3];
    const int n = last - first, m = min(n, SAMPLE), warp = threadIdx.x >> 5;
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
        const size_t i = first + (n <= SAMPLE ? j : (size_t)j * n / SAMPLE);
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            const coord_t x = widen(points[3 * i + d]);
            sample[d * SAMPLE + j] = is_finite(x) ? x : (coord_t)NAN_FLOAT;
        }
    }
    __syncthreads();
    if (warp < 6) {
        const int d = warp % 3;
        const coord_t q = warp < 3 ? quantile<false>(sample + d * SAMPLE, m) : quantile<true>(sample + d * SAMPLE, m);
        if ((threadIdx.x & 31) == 0) quantiles[warp / 3][d] = q;
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int d = 0; d < 3; ++d) {
            const coord_t low = quantiles[0][d], high = quantiles[1][d];
            const coord_t margin = mul_rn((coord_t)4, sub_rn(high, low));
            row[d] = sub_rn(low, margin);
            row[3 + d] = add_rn(high, margin);
        }
}

// The frame of a cloud from its rows of partial bounds. `robust` is the row of its robust bounds, if the span is that.
// The whole block calls it, and every thread gets the frame.
__device__ Frame
frame_from_rows(const coord_t *bounds, int first, int last, float voxel_size, const Span &span, const coord_t *robust) {
    coord_t low[3] = {(coord_t)INFINITE, (coord_t)INFINITE, (coord_t)INFINITE};
    coord_t high[3] = {(coord_t)-INFINITE, (coord_t)-INFINITE, (coord_t)-INFINITE};
    for (int row = first + threadIdx.x; row < last; row += blockDim.x)
        for (int d = 0; d < 3; ++d) {
            low[d] = min(low[d], bounds[6 * (size_t)row + d]);
            high[d] = max(high[d], bounds[6 * (size_t)row + 3 + d]);
        }
    join_bounds(low, high);
    if (span.kind != EXTREMES)
        for (int d = 0; d < 3; ++d) {
            const coord_t least = low[d], most = high[d];
            if (span.kind == GIVEN) {
                low[d] = (coord_t)span.low[d];
                high[d] = (coord_t)span.high[d];
            } else if (least <= most) {  // some coordinate is finite
                low[d] = min(max(robust[d], least), most);
                high[d] = min(max(robust[3 + d], least), most);
            }
        }
    return frame_from_bounds(low, high, voxel_size);
}

// Writes a row of partial bounds, those of points [first, last) without non-finite coordinates. The whole block calls
// it.
__device__ void write_bounds(const point_t *points, int first, int last, coord_t *row) {
    coord_t low[3] = {(coord_t)INFINITE, (coord_t)INFINITE, (coord_t)INFINITE};
    coord_t high[3] = {(coord_t)-INFINITE, (coord_t)-INFINITE, (coord_t)-INFINITE};
    const auto join = [&](point_t word, int d) {
        const coord_t x = widen(word);
        if (is_finite(x)) {
            low[d] = min(low[d], x);
            high[d] = max(high[d], x);
        }
    };
    // VECTOR points are three 16-byte loads, from the first point on that begins at a multiple of 16 bytes: 3 is its
    // own inverse modulo 2, 4 and 8, so the head of -3 * (place of the first coordinate) points always leads there.
    constexpr int VECTOR = 16 / sizeof(point_t);
    const point_t *start = points + 3 * (size_t)first;
    const int n = last - first,
              head = min(n, (int)(VECTOR - 3 * ((size_t)start / sizeof(point_t) % VECTOR) & VECTOR - 1));
    const int vectors = (n - head) / VECTOR, tail = head + VECTOR * vectors;
    const uint4 *vector = (const uint4 *)(start + 3 * head);
    union Part {
        uint4 loaded[3];
        point_t coordinate[3 * VECTOR];
    } part, next;
    const auto load = [&](Part &into, int i) {
#pragma unroll
        for (int k = 0; k < 3; ++k) into.loaded[k] = vector[3 * (size_t)i + k];
    };
    if (threadIdx.x < vectors) load(part, threadIdx.x);
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {  // the next part is loaded meanwhile
        if (i + (int)blockDim.x < vectors) load(next, i + blockDim.x);
#pragma unroll
        for (int k = 0; k < 3 * VECTOR; ++k) join(part.coordinate[k], k % 3);
        part = next;
    }
    for (int i = threadIdx.x; i < head + n - tail; i += blockDim.x)  // the few points before and after the vectors
#pragma unroll
        for (int d = 0; d < 3; ++d) join(start[3 * (size_t)(i < head ? i : tail + i - head) + d], d);
    join_bounds(low, high);
    if (threadIdx.x == 0)
        for (int d = 0; d < 3; ++d) {
            row[d] = low[d];
            row[3 + d] = high[d];
        }
}

#endif  // GPU3D_BUCKETS_CUH
