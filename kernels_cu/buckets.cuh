// SPDX-License-Identifier: Apache-2.0
// What the bucket kernels share: voxels, hash keys, bounds and frames. Include clouds.cuh first.
//
// Definitions (Flash3D, section 4.1; hash and voxels as gpu3d.bucketize documents them):
//   voxel    v_d = clamp(floor((x_d - min_d) / cell_d), 0, 65535), every operation rounded once
//   Morton   bit 3b + d is bit b of axis d: 48 bits; m = Morton >> 32 its top 16
//   xor      x = vx ^ vy ^ vz
//   key      48 bits whose order is (hash bucket, full-resolution code); equal keys stay in point order
//
// Why 48 bits suffice for xor_*: inside one x the Morton digits (z, y, x) of a level are ordered by (z, y) alone,
// since the third bit follows from x. So (x, Morton) sorts as (x, interleave(vz, vy)): 16 + 32 bits.

#ifndef POINT
#define POINT 0             // coordinates: 0 float32, 1 float64, 2 float16, 3 bfloat16
#endif
#ifndef KEY
#define KEY 3               // 0 xor_mod, 1 xor_div, 2 zorder_mod, 3 zorder_div, 4 given: int32 keys instead of points
#endif

#define KEY_GIVEN 4

// ---- coordinates to voxels -----------------------------------------------------------------------------------------

#if POINT == 0
typedef float point_t;
typedef float coord_t;
__device__ __forceinline__ coord_t widen(point_t x) { return x; }
#elif POINT == 1
typedef double point_t;
typedef double coord_t;
__device__ __forceinline__ coord_t widen(point_t x) { return x; }
#elif POINT == 2
typedef unsigned short point_t;
typedef float coord_t;
__device__ __forceinline__ coord_t widen(point_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#else
typedef unsigned short point_t;
typedef float coord_t;
__device__ __forceinline__ coord_t widen(point_t x) { return __uint_as_float((u32)x << 16); }
#endif

#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ bool is_finite(coord_t x) { return x - x == 0; }     // inf - inf and NaN - NaN are NaN

// Where a cloud's voxel grid lies: the origin and the cell of each axis.
struct Frame {
    coord_t origin[3];
    float cell[3];          // 0: the axis has no extent, every finite coordinate is in voxel 0
    float inverse[3];       // 1 / cell, rounded; 0 where cell is 0; -1 where a quotient by it must be divided for
};

__device__ __forceinline__ float difference(coord_t a, coord_t b) {
#if POINT == 1
    return __double2float_rn(__dsub_rn(a, b));
#else
    return __fsub_rn(a, b);
#endif
}

// voxel_size > 0: that cell; 0: one cell for all axes, largest extent / 65536; -1: a cell an axis, extent / 65536.
__device__ Frame frame_from_bounds(const coord_t low[3], const coord_t high[3], float voxel_size) {
    Frame frame;
    float extent[3];
    for (int d = 0; d < 3; ++d) {
        const bool any = low[d] <= high[d];                 // false where no coordinate was finite
        frame.origin[d] = any ? low[d] : (coord_t)0;
        extent[d] = any ? difference(high[d], low[d]) : 0.0f;
    }
    const float largest = fmaxf(extent[0], fmaxf(extent[1], extent[2]));
    for (int d = 0; d < 3; ++d) {
        const float cell = voxel_size > 0 ? voxel_size : __fdiv_rn(voxel_size == 0 ? largest : extent[d], 65536.0f);
        frame.cell[d] = cell < 1.17549435e-38f ? 0.0f : cell;
        const bool usual = 0x1p-100f < cell && cell < 0x1p100f;
        frame.inverse[d] = frame.cell[d] == 0.0f ? 0.0f : usual ? __frcp_rn(cell) : -1.0f;
    }
    return frame;
}

// The correctly rounded quotient without a division: two corrections of t * (1 / cell). The first leaves less than one
// unit in the last place, and the second then rounds as a division does (Markstein 1990). Where the cell is neither tiny nor
// huge, the remainders are exact for every quotient whose floor can be seen; a non-finite t gives NaN.
__device__ __forceinline__ float quotient(float t, float cell, float inverse) {
    float q = __fmul_rn(t, inverse);
    q = __fmaf_rn(__fmaf_rn(-q, cell, t), inverse, q);
    return __fmaf_rn(__fmaf_rn(-q, cell, t), inverse, q);
}

__device__ __forceinline__ int voxel(coord_t x, const Frame &frame, int d) {
    const float t = difference(x, frame.origin[d]);         // not negative where x is finite
    const float q = frame.inverse[d] >= 0 ? quotient(t, frame.cell[d], frame.inverse[d])
                    : is_finite(x) ? __fdiv_rn(t, frame.cell[d]) : INFINITE;
    return (int)fminf(q, 65535.0f);                         // fminf(NaN, y) is y: NaN goes to 65535 too
}

// ---- voxels to keys ------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 spread_byte_by_3(u32 v) {    // bit b -> bit 3b, 8 bits
    v = (v | v << 8) & 0x00f00fu;
    v = (v | v << 4) & 0x0c30c3u;
    v = (v | v << 2) & 0x249249u;
    return v;
}

// The Morton code of one byte of each axis: 24 bits. Two of them make the 48-bit code in 32-bit operations.
__device__ __forceinline__ u32 morton_of_bytes(u32 x, u32 y, u32 z) {
    return spread_byte_by_3(z & 255) << 2 | spread_byte_by_3(y & 255) << 1 | spread_byte_by_3(x & 255);
}

__device__ __forceinline__ u32 spread_by_2(u32 v) {         // bit b -> bit 2b, 16 bits
    v = (v | v << 8) & 0x00ff00ffu;
    v = (v | v << 4) & 0x0f0f0f0fu;
    v = (v | v << 2) & 0x33333333u;
    v = (v | v << 1) & 0x55555555u;
    return v;
}

// h -> a permutation of 0..65535 that is ordered by (h mod buckets, h div buckets).
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
    const u32 top = high >> 8;                  // the top 16 of the 48 bits
    return (u64)(KEY == 2 ? order_by_mod(top, buckets) : top) << 32 | (high << 24 | low);
#endif
}

// The bucket that the hash alone names.
__device__ __forceinline__ u32 bucket_of_voxel(int vx, int vy, int vz, u32 buckets) {
    const u32 h = KEY <= 1 ? (u32)(vx ^ vy ^ vz) : morton_of_bytes(vx >> 8, vy >> 8, vz >> 8) >> 8;
    return KEY == 0 || KEY == 2 ? h % buckets : h / ((65536u + buckets - 1) / buckets);
}

__device__ __forceinline__ u64 key_of_point(const point_t *points, int i, const Frame &frame, u32 buckets) {
    const size_t at = 3 * (size_t)i;
    return key_of_voxel(voxel(widen(points[at]), frame, 0), voxel(widen(points[at + 1]), frame, 1),
                        voxel(widen(points[at + 2]), frame, 2), buckets);
}

// ---- block-wide bounds and frame -----------------------------------------------------------------------------------

// Joins the bounds of every thread of the block; all threads return the joined bounds. Up to 32 warps.
__device__ void join_bounds(coord_t low[3], coord_t high[3]) {
    __shared__ coord_t joined[32][6];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
    for (int d = 0; d < 3; ++d)
        for (int step = 16; step; step >>= 1) {
            low[d] = min(low[d], __shfl_xor_sync(FULL, low[d], step));
            high[d] = max(high[d], __shfl_xor_sync(FULL, high[d], step));
        }
    if (lane == 0)
        for (int d = 0; d < 3; ++d) { joined[warp][d] = low[d]; joined[warp][3 + d] = high[d]; }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        low[d] = lane < warps ? joined[lane][d] : (coord_t)INFINITE;
        high[d] = lane < warps ? joined[lane][3 + d] : (coord_t)-INFINITE;
        for (int step = 16; step; step >>= 1) {
            low[d] = min(low[d], __shfl_xor_sync(FULL, low[d], step));
            high[d] = max(high[d], __shfl_xor_sync(FULL, high[d], step));
        }
    }
}

// The frame of a cloud from its rows of partial bounds, by a whole block; every thread returns it.
__device__ Frame frame_from_rows(const coord_t *bounds, int first, int last, float voxel_size) {
    coord_t low[3] = {(coord_t)INFINITE, (coord_t)INFINITE, (coord_t)INFINITE};
    coord_t high[3] = {(coord_t)-INFINITE, (coord_t)-INFINITE, (coord_t)-INFINITE};
    for (int row = first + threadIdx.x; row < last; row += blockDim.x)
        for (int d = 0; d < 3; ++d) {
            low[d] = min(low[d], bounds[6 * (size_t)row + d]);
            high[d] = max(high[d], bounds[6 * (size_t)row + 3 + d]);
        }
    join_bounds(low, high);
    return frame_from_bounds(low, high, voxel_size);
}

// Partial bounds of points [first, last) by a whole block, non-finite coordinates ignored: one row of bounds.
__device__ void write_bounds(const point_t *points, int first, int last, coord_t *row) {
    coord_t low[3] = {(coord_t)INFINITE, (coord_t)INFINITE, (coord_t)INFINITE};
    coord_t high[3] = {(coord_t)-INFINITE, (coord_t)-INFINITE, (coord_t)-INFINITE};
    const auto join = [&](point_t word, int d) {
        const coord_t x = widen(word);
        if (is_finite(x)) { low[d] = min(low[d], x); high[d] = max(high[d], x); }
    };
    // VECTOR points are three 16-byte loads, from the first point on that begins at a multiple of 16 bytes: 3 is its own
    // inverse modulo 2, 4 and 8, so the head of -3 * (place of the first coordinate) points always leads there.
    constexpr int VECTOR = 16 / sizeof(point_t);
    const point_t *start = points + 3 * (size_t)first;
    const int n = last - first, head = min(n, (int)(VECTOR - 3 * ((size_t)start / sizeof(point_t) % VECTOR) & VECTOR - 1));
    const int vectors = (n - head) / VECTOR, tail = head + VECTOR * vectors;
    const uint4 *vector = (const uint4 *)(start + 3 * head);
    union Part { uint4 loaded[3]; point_t coordinate[3 * VECTOR]; } part, next;
    const auto load = [&](Part &into, int i) {
#pragma unroll
        for (int k = 0; k < 3; ++k) into.loaded[k] = vector[3 * (size_t)i + k];
    };
    if (threadIdx.x < vectors) load(part, threadIdx.x);
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {           // the next part is on its way
        if (i + (int)blockDim.x < vectors) load(next, i + blockDim.x);
#pragma unroll
        for (int k = 0; k < 3 * VECTOR; ++k) join(part.coordinate[k], k % 3);
        part = next;
    }
    for (int i = threadIdx.x; i < head + n - tail; i += blockDim.x)     // the few points around the vectors
#pragma unroll
        for (int d = 0; d < 3; ++d) join(start[3 * (size_t)(i < head ? i : tail + i - head) + d], d);
    join_bounds(low, high);
    if (threadIdx.x == 0)
        for (int d = 0; d < 3; ++d) { row[d] = low[d]; row[3 + d] = high[d]; }
}
