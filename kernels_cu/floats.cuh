// SPDX-License-Identifier: Apache-2.0
// Floating-point types by the numbers that gpu3d passes for them: how values are stored and what they are computed in.

#ifndef GPU3D_FLOATS_CUH
#define GPU3D_FLOATS_CUH

#include "types.cuh"

#define FLOAT32 0
#define FLOAT64 1
#define FLOAT16 2
#define BFLOAT16 3

#define INFINITE __int_as_float(0x7f800000)
#define INFINITE_DOUBLE __longlong_as_double(0x7ff0000000000000ll)
#define NAN_FLOAT __int_as_float(0x7fffffff)
#define NAN_DOUBLE __longlong_as_double(0x7fffffffffffffffll)

// False for infinities and NaN: inf - inf and NaN - NaN are NaN.
__device__ __forceinline__ bool is_finite(float x) { return x - x == 0; }
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0; }

// Operations that are rounded once and never contracted.
__device__ __forceinline__ float add_rn(float x, float y) { return __fadd_rn(x, y); }
__device__ __forceinline__ float sub_rn(float x, float y) { return __fsub_rn(x, y); }
__device__ __forceinline__ float mul_rn(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double add_rn(double x, double y) { return __dadd_rn(x, y); }
__device__ __forceinline__ double sub_rn(double x, double y) { return __dsub_rn(x, y); }
__device__ __forceinline__ double mul_rn(double x, double y) { return __dmul_rn(x, y); }
__device__ __forceinline__ float div_rn(float x, float y) { return __fdiv_rn(x, y); }
__device__ __forceinline__ double div_rn(double x, double y) { return __ddiv_rn(x, y); }
__device__ __forceinline__ float fma_rn(float x, float y, float z) { return __fmaf_rn(x, y, z); }
__device__ __forceinline__ double fma_rn(double x, double y, double z) { return __fma_rn(x, y, z); }
__device__ __forceinline__ float sqrt_rn(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double sqrt_rn(double x) { return __dsqrt_rn(x); }

// Bits of numbers that are not negative have the order of the numbers.
__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u64 bits_of(double x) { return (u64)__double_as_longlong(x); }
__device__ __forceinline__ float number_of(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double number_of(u64 bits) { return __longlong_as_double((long long)bits); }

// Float<TYPE>: values lie in memory as Stored and are computed with as Wide. widen is exact, narrow rounds to the
// nearest. A double becomes float16 in one rounding, but bfloat16 by way of float, in two: ml_dtypes on the CPU and
// CuPy do the same.
template <int TYPE>
struct Float;

template <>
struct Float<FLOAT32> {
    typedef float Stored;
    typedef float Wide;
    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
    static __device__ __forceinline__ float narrow(double x) { return __double2float_rn(x); }
};

template <>
struct Float<FLOAT64> {
    typedef double Stored;
    typedef double Wide;
    static __device__ __forceinline__ double widen(double x) { return x; }
    static __device__ __forceinline__ double narrow(double x) { return x; }
};

// The 16-bit types also convert two values at once, in one word: `low` lies in its low half.
template <>
struct Float<FLOAT16> {
    typedef u16 Stored;
    typedef float Wide;
    static __device__ __forceinline__ float widen(u16 x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static __device__ __forceinline__ u16 narrow(float x) {
        u16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    static __device__ __forceinline__ u16 narrow(double x) {
        u16 y;
        asm("cvt.rn.f16.f64 %0, %1;" : "=h"(y) : "d"(x));
        return y;
    }
    static __device__ __forceinline__ float2 widen_pair(u32 word) {
        float2 x;
        asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
            : "=f"(x.x), "=f"(x.y)
            : "r"(word));
        return x;
    }
    static __device__ __forceinline__ u32 narrow_pair(float low, float high) {
        u32 word;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
};

template <>
struct Float<BFLOAT16> {
    typedef u16 Stored;
    typedef float Wide;
    static __device__ __forceinline__ float widen(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u16 narrow(float x) {
        u16 y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    static __device__ __forceinline__ u16 narrow(double x) { return narrow(__double2float_rn(x)); }
    static __device__ __forceinline__ float2 widen_pair(u32 word) {
        return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    }
    static __device__ __forceinline__ u32 narrow_pair(float low, float high) {
        u32 word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
        return word;
    }
};

#endif  // GPU3D_FLOATS_CUH
