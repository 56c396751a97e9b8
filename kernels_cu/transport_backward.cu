// SPDX-License-Identifier: Apache-2.0
// APML: the gradient of each cloud times what comes back for its loss, dL/dx_i = dloss_b * dx_i.
//
// Numerics: the product is rounded to the wider of both types, which is float32 at least, and then to the gradient's.
// PyTorch rounds a dloss that has no dimension to the gradient's type first: `rounded` says so.
//
// A thread takes a number: of pred's gradient, or of target's behind it.

#ifndef GRADIENT
#define GRADIENT 0  // 0 float32, 1 float64, 2 float16, 3 bfloat16
#endif
#define THREADS 256  // mirrored by gpu3d/cuda/transport.py

#include "clouds.cuh"
#include "floats.cuh"

typedef Float<GRADIENT> Gradient;

// The number at a place among those of a type. All of them are float64 numbers too.
__device__ __forceinline__ double load(const void *numbers, int type, long long at) {
    switch (type) {
    case FLOAT32:
        return ((const float *)numbers)[at];
    case FLOAT64:
        return ((const double *)numbers)[at];
    case FLOAT16:
        return Float<FLOAT16>::widen(((const u16 *)numbers)[at]);
    default:
        return Float<BFLOAT16>::widen(((const u16 *)numbers)[at]);
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void transport_backward(
    const Gradient::Stored *__restrict__ x,  // [N, columns] of pred
    Gradient::Stored *__restrict__ x_out,    // likewise
    long long x_size,                        // N * columns
    const Gradient::Stored *__restrict__ y,  // [M, columns] of target
    Gradient::Stored *__restrict__ y_out,
    long long y_size,
    const __grid_constant__ Clouds x_clouds,  // of no clouds where there is one dloss for all
    const __grid_constant__ Clouds y_clouds,
    int columns,                     // 2 or 3
    const void *__restrict__ dloss,  // [clouds] or []
    int type,                        // of dloss, as GRADIENT
    long long stride,                // of dloss, in elements
    int rounded                      // dloss is rounded to the gradient's type first
) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= x_size + y_size) return;
    const bool of_x = i < x_size;
    const long long at = of_x ? i : i - x_size;
    const Clouds &clouds = of_x ? x_clouds : y_clouds;
    const int row = (int)(columns == 2 ? (u64)at / 2 : (u64)at / 3);
    const int b = clouds.count ? cloud_of<&Cloud::point>(clouds, row) : 0;
    double of_loss = load(dloss, type, b * stride);
    if (rounded) of_loss = Gradient::widen(Gradient::narrow((Gradient::Wide)of_loss));
    const Gradient::Wide gradient = Gradient::widen((of_x ? x : y)[at]);
    Gradient::Wide product;
    if (type == FLOAT64 && !rounded) product = (Gradient::Wide)(gradient * of_loss);
    else product = gradient * (Gradient::Wide)of_loss;
    (of_x ? x_out : y_out)[at] = Gradient::narrow(product);
}
