// SPDX-License-Identifier: Apache-2.0
// Fourier features of points, optionally behind their input features: the input of the stem and of the position MLPs.
//   row = [features, 64 sines, 64 cosines, zeros] of point index[row]
// Wave w belongs to axis x (w < 21), y (w < 42) or z. Its argument is the float32 product coordinate * frequency[w].
//
// A warp takes a row at a time. A lane has the waves `lane` and `lane` + 32, whose frequencies stay in registers.
// Neighbouring lanes store neighbouring columns. Stores are as narrow as an element, because the columns of the waves
// begin behind any number of features; the sines and cosines take longer.
//
// Numerics: sincosf with full range reduction (2 ulp), because 2 pi times a coordinate over the shortest wavelength
// reaches thousands. A row with index -1 is padding: its point is the origin and its features are 0.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py, as is ROWS
#define ROWS 4       // rows a warp
#define WAVES 64
#define AXIS_WAVES 21  // waves of x, and of y

#include "layers.cuh"

struct Waves {
    float frequency[WAVES];  // 2 pi / wavelength
};

extern "C" __global__ __launch_bounds__(THREADS) void fourier_rows(
    const float *__restrict__ points,    // [N, 3]
    const float *__restrict__ features,  // [N, channels]
    const int *__restrict__ index,       // [rows] ranges [-1, N); null if row i is point i
    const __grid_constant__ Waves waves,
    int rows,
    int channels,                // 0 without features
    int columns,                 // at least channels + 2 * WAVES
    element_t *__restrict__ out  // [rows, columns]
) {
    const int lane = threadIdx.x & 31;
    const float low = waves.frequency[lane], high = waves.frequency[lane + 32];
    const int low_axis = lane < AXIS_WAVES ? 0 : 1, high_axis = lane + 32 < 2 * AXIS_WAVES ? 1 : 2;
    const long long first = ((long long)blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * ROWS;
#pragma unroll 1
    for (long long row = first; row < min(first + ROWS, (long long)rows); ++row) {
        const long long point = index ? index[row] : row;
        element_t *at = out + row * columns;
        for (int c = lane; c < channels; c += 32) at[c] = narrow(point < 0 ? 0.0f : features[point * channels + c]);
        at += channels;
        float sine, cosine;
        sincosf(__fmul_rn(point < 0 ? 0.0f : points[3 * point + low_axis], low), &sine, &cosine);
        at[lane] = narrow(sine);
        at[WAVES + lane] = narrow(cosine);
        sincosf(__fmul_rn(point < 0 ? 0.0f : points[3 * point + high_axis], high), &sine, &cosine);
        at[32 + lane] = narrow(sine);
        at[WAVES + 32 + lane] = narrow(cosine);
        for (int c = 2 * WAVES + lane; c < columns - channels; c += 32) at[c] = narrow(0.0f);
    }
}
