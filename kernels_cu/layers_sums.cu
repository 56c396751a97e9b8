// SPDX-License-Identifier: Apache-2.0
// Gradients of vectors of parameters: the sums over the blocks of norm_backward (layers_norm.cu) and column_sums
// (layers_columns.cu), in a fixed order. One launch does it for many vectors, at the end of the backward, because
// nothing waits for them: 0.04 ms for 226 vectors on an H200, where a launch for each norm took 3.5 us.
//
// A block has 32 columns of a vector, and a warp each 32nd row.

#define SUM_THREADS 1024  // mirrored by gpu3d/cuda/layers.py
#define MOST_VECTORS 120  // likewise; kernels have up to 4096 bytes of parameters

struct Vector {
    const float *partials;  // [count, columns], rows `pitch` apart
    float *out;             // [columns]
    int count;
    int columns;
    int pitch;
    int first;  // the first block of this vector
};
struct Vectors {
    Vector of[MOST_VECTORS];
};

extern "C" __global__ __launch_bounds__(SUM_THREADS) void sum_partials(
    const __grid_constant__ Vectors vectors, int many
) {
    __shared__ float of_warp[32][32];
    int number = 0;  // the last vector that begins at or before this block
#pragma unroll
    for (int step = 64; step; step /= 2)
        if (number + step < many && vectors.of[number + step].first <= blockIdx.x) number += step;
    const Vector &vector = vectors.of[number];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int column = (blockIdx.x - vector.first) * 32 + lane;  // may lie beyond the columns
    float sum = 0;
    if (column < vector.columns)
#pragma unroll 4
        for (int row = warp; row < vector.count; row += 32)
            sum += vector.partials[(long long)row * vector.pitch + column];
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= vector.columns) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < 32; ++w) sum += of_warp[w][lane];
    vector.out[column] = sum;
}
