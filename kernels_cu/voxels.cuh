// SPDX-License-Identifier: Apache-2.0
// Points in a voxel grid: coordinates, bounds, the grid's frame, voxels and Morton codes.
//
//   voxel    v_d = clamp(floor((x_d - low_d) / cell_d), 0, VOXELS - 1), every operation rounded once; points beyond
//            the bounds low and high, which are mostly the minimum and maximum, are in the voxel of the bound
//   Morton   bit 3b + d is bit b of axis d

#ifndef GPU3D_VOXELS_CUH
#define GPU3D_VOXELS_CUH

#include "floats.cuh"
#include "warp.cuh"

#ifndef POINT
#define POINT 0  // coordinates: 0 float32, 1 float64, 2 float16, 3 bfloat16
#endif
#ifndef VOXELS
#define VOXELS 65536  // an axis
#endif

typedef Float<POINT>::Stored point_t;
typedef Float<POINT>::Wide coord_t;
__device__ __forceinline__ coord_t widen(point_t x) { return Float<POINT>::widen(x); }
__device__ __forceinline__ point_t narrow(coord_t x) { return Float<POINT>::narrow(x); }

// Where a cloud's voxel grid lies: the origin and the cell of each axis.
struct Frame {
    coord_t origin[3];
    float extent[3];   // from the origin to the upper bound
    float cell[3];     // 0 if the axis has no extent: then every finite coordinate is in voxel 0
    float inverse[3];  // 1 / cell, rounded; 0 if cell is 0; -1 if quotients by it need a true division
};

__device__ __forceinline__ float difference(coord_t a, coord_t b) {
#if POINT == FLOAT64
    return __double2float_rn(__dsub_rn(a, b));
#else
    return __fsub_rn(a, b);
#endif
}

// voxel_size > 0: that cell. 0: one cell for all axes, largest extent / VOXELS. -1: a cell for each axis, extent /
// VOXELS.
__device__ Frame frame_from_bounds(const coord_t low[3], const coord_t high[3], float voxel_size) {
    Frame frame;
    for (int d = 0; d < 3; ++d) {
        const bool any = low[d] <= high[d];  // false where no coordinate was finite
        frame.origin[d] = any ? low[d] : (coord_t)0;
        frame.extent[d] = any ? difference(high[d], low[d]) : 0.0f;
    }
    const float largest = fmaxf(frame.extent[0], fmaxf(frame.extent[1], frame.extent[2]));
    for (int d = 0; d < 3; ++d) {
        const float cell =
            voxel_size > 0 ? voxel_size : __fdiv_rn(voxel_size == 0 ? largest : frame.extent[d], (float)VOXELS);
        frame.cell[d] = cell < 1.17549435e-38f ? 0.0f : cell;
        const bool usual = 0x1p-100f < cell && cell < 0x1p100f;
        frame.inverse[d] = frame.cell[d] == 0.0f ? 0.0f : usual ? __frcp_rn(cell) : -1.0f;
    }
    return frame;
}

// The correctly rounded quotient t / cell without a division: two corrections of t * (1 / cell). The first leaves an
// error of less than one unit in the last place, and the second then rounds as a division does (Markstein 1990). If the
// cell is neither tiny nor huge, the remainders are exact for every quotient whose floor matters. A non-finite t gives
// NaN.
__device__ __forceinline__ float quotient(float t, float cell, float inverse) {
    float q = __fmul_rn(t, inverse);
    q = __fmaf_rn(__fmaf_rn(-q, cell, t), inverse, q);
    return __fmaf_rn(__fmaf_rn(-q, cell, t), inverse, q);
}

__device__ __forceinline__ int voxel(coord_t x, const Frame &frame, int d) {
    float t = difference(x, frame.origin[d]);
    if (!(t >= 0 && t <= frame.extent[d])) t = !is_finite(x) ? INFINITE : t < 0 ? 0 : frame.extent[d];
    const float q = frame.inverse[d] >= 0 ? quotient(t, frame.cell[d], frame.inverse[d])
                    : is_finite(x)        ? __fdiv_rn(t, frame.cell[d])
                                          : INFINITE;
    return (int)fminf(q, VOXELS - 1.0f);  // fminf(NaN, y) is y: NaN goes to the last voxel too
}

__device__ __forceinline__ u32 spread_byte_by_3(u32 v) {  // bit b -> bit 3b, 8 bits
    v = (v | v << 8) & 0x00f00fu;
    v = (v | v << 4) & 0x0c30c3u;
    v = (v | v << 2) & 0x249249u;
    return v;
}

// The Morton code of one byte of each axis: 24 bits. Two of them make the 48-bit code in 32-bit operations.
__device__ __forceinline__ u32 morton_of_bytes(u32 x, u32 y, u32 z) {
    return spread_byte_by_3(z & 255) << 2 | spread_byte_by_3(y & 255) << 1 | spread_byte_by_3(x & 255);
}

// Joins the bounds of all threads of a block of up to 32 warps. Every thread gets the joined bounds.
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
        for (int d = 0; d < 3; ++d) {
            joined[warp][d] = low[d];
            joined[warp][3 + d] = high[d];
        }
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

#endif  // GPU3D_VOXELS_CUH
