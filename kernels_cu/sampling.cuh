// SPDX-License-Identifier: Apache-2.0
// What the kernels of farthest point sampling share: squared distances, and which point is farthest.
//
//   d2   (dx*dx + dy*dy) + dz*dz, every operation rounded once, in the type of the coordinates
//
// Squared distances that are not negative are in the order of their bits as signed integers. A point that cannot be
// taken has the distance TAKEN, whose bits are a negative integer.

#ifndef GPU3D_SAMPLING_CUH
#define GPU3D_SAMPLING_CUH

#include "floats.cuh"
#include "warp.cuh"

#ifndef POINT
#define POINT 0  // coordinates: 0 float32, 1 float64
#endif

static_assert(POINT == FLOAT32 || POINT == FLOAT64, "16-bit coordinates are converted to float32 before");

#define TAKEN ((coord_t) - 1)

#if POINT == FLOAT64
typedef double coord_t;
typedef long long bits_t;
#define UNREACHED INFINITE_DOUBLE
__device__ __forceinline__ bits_t signed_bits_of(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ double minus(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double squared_norm(double x, double y, double z) {
    return __dadd_rn(__dadd_rn(__dmul_rn(x, x), __dmul_rn(y, y)), __dmul_rn(z, z));
}
__device__ __forceinline__ bits_t max_of_warp(bits_t x) {
    const int high = __reduce_max_sync(FULL, (int)(x >> 32));
    const u32 low = __reduce_max_sync(FULL, (int)(x >> 32) == high ? (u32)x : 0u);
    return (bits_t)((u64)(u32)high << 32 | low);
}
#else
typedef float coord_t;
typedef int bits_t;
#define UNREACHED INFINITE
__device__ __forceinline__ bits_t signed_bits_of(float x) { return __float_as_int(x); }
__device__ __forceinline__ float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float squared_norm(float x, float y, float z) {
    return __fadd_rn(__fadd_rn(__fmul_rn(x, x), __fmul_rn(y, y)), __fmul_rn(z, z));
}
__device__ __forceinline__ bits_t max_of_warp(bits_t x) { return __reduce_max_sync(FULL, x); }
#endif

// The farthest point that some threads know of: the largest d2 and, among equal ones, the lowest index.
struct Farthest {
    bits_t d2;  // negative if there is no point to take
    u32 index;
};

// The farthest of all lanes, on every lane.
__device__ __forceinline__ Farthest farthest_of_warp(Farthest mine) {
    const bits_t d2 = max_of_warp(mine.d2);
    return {d2, __reduce_min_sync(FULL, mine.d2 == d2 ? mine.index : FULL)};
}

#endif  // GPU3D_SAMPLING_CUH
