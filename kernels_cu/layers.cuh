// SPDX-License-Identifier: Apache-2.0
// Rows of activations in words of 16 bytes, which the layers_*.cu kernels share. All arithmetic is float32.

#ifndef GPU3D_LAYERS_CUH
#define GPU3D_LAYERS_CUH

#include "floats.cuh"

#ifndef ELEMENT
#define ELEMENT 3  // of activations: 0 float32, 2 float16, 3 bfloat16
#endif

typedef Float<ELEMENT>::Stored element_t;
__device__ __forceinline__ float widen(element_t x) { return Float<ELEMENT>::widen(x); }
__device__ __forceinline__ element_t narrow(float x) { return Float<ELEMENT>::narrow(x); }

#define PER (16 / (int)sizeof(element_t))  // elements a word
struct __align__(16) Word {
    element_t x[PER];
};
struct Floats {
    float x[PER];
};

// By value, so that a word of global memory is loaded at once.
__device__ __forceinline__ Floats widen(Word word) {
    Floats out;
#pragma unroll
    for (int e = 0; e < PER; ++e) out.x[e] = widen(word.x[e]);
    return out;
}

__device__ __forceinline__ Word narrow(const Floats &values) {
    Word out;
#pragma unroll
    for (int e = 0; e < PER; ++e) out.x[e] = narrow(values.x[e]);
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
