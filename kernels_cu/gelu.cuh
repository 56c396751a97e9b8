// SPDX-License-Identifier: Apache-2.0
// GELU in its tanh form, 0.5 u (1 + tanh(t)) with t = sqrt(2 / pi) (u + 0.044715 u^3), and its derivative, in float32.

#ifndef GPU3D_GELU_CUH
#define GPU3D_GELU_CUH

#define T_SLOPE 0.7978845608028654f  // sqrt(2 / pi)
#define T_CUBIC 0.044715f

// GELU(u) = u s with s = 0.5 (1 + tanh(t)) = 1 / (1 + exp(-2 t)). E = exp(-2 |t|) gives s and 1 - s without
// cancellation.
struct Gate {
    float s, product;  // product = s (1 - s)
};

__device__ __forceinline__ Gate gate(float u) {
    const float t = T_SLOPE * (u + T_CUBIC * u * u * u), E = expf(-2.0f * fabsf(t)), r = __fdividef(1.0f, 1.0f + E);
    return {t < 0 ? E * r : r, E * r * r};
}

__device__ __forceinline__ float gelu(float u) { return u * gate(u).s; }

__device__ __forceinline__ float gelu_derivative(float u) {
    const Gate g = gate(u);
    return g.s + u * g.product * (2.0f * T_SLOPE) * (1.0f + 3.0f * T_CUBIC * u * u);
}

#endif  // GPU3D_GELU_CUH
