// SPDX-License-Identifier: Apache-2.0
// Rows of activations in words of 16 bytes, which the layers_*.cu kernels share. All arithmetic is float32.

#ifndef GPU3D_LAYERS_CUH
#define GPU3D_LAYERS_CUH

#include "floats.cuh"

#ifndef ELEMENT
#define ELEMENT 3  // of activations: 0 float32, 2 float16, 3 bfloat16
#endif

#define PER (16 / (int)sizeof(Float<ELEMENT>::Stored))  // elements a word
#if ELEMENT == FLOAT32
struct __align__(16) Word {
    float x[PER];
};
#else
struct __align__(16) Word {
    u32 pair[PER / 2];
};
#endif
struct Floats {
    float x[PER];
};

// By value, so that a word of global memory is loaded at once. Two 16-bit elements are converted together: one by one
// they would be taken apart first, each in a register of its own.
__device__ __forceinline__ Floats widen(Word word) {
    Floats out;
#pragma unroll
#if ELEMENT == FLOAT32
    for (int e = 0; e < PER; ++e) out.x[e] = word.x[e];
#else
    for (int e = 0; e < PER; e += 2) {
        const float2 pair = Float<ELEMENT>::widen_pair(word.pair[e / 2]);
        out.x[e] = pair.x, out.x[e + 1] = pair.y;
    }
#endif
    return out;
}

__device__ __forceinline__ Word narrow(const Floats &values) {
    Word out;
#pragma unroll
#if ELEMENT == FLOAT32
    for (int e = 0; e < PER; ++e) out.x[e] = values.x[e];
#else
    for (int e = 0; e < PER; e += 2) out.pair[e / 2] = Float<ELEMENT>::narrow_pair(values.x[e], values.x[e + 1]);
#endif
    return out;
}

__device__ __forceinline__ Floats operator+(const Floats &a, const Floats &b) {
    Floats out;
#pragma unroll
    for (int e = 0; e < PER; ++e) out.x[e] = a.x[e] + b.x[e];
    return out;
}

// The float32 parameters of word `c` of a row.
__device__ __forceinline__ Floats load_parameters(const float *parameters, int c) {
    Floats out;
#pragma unroll
    for (int e = 0; e < PER; e += 4) {
        const float4 four = *(const float4 *)(parameters + c * PER + e);
        out.x[e] = four.x, out.x[e + 1] = four.y, out.x[e + 2] = four.z, out.x[e + 3] = four.w;
    }
    return out;
}

#endif  // GPU3D_LAYERS_CUH
