// SPDX-License-Identifier: Apache-2.0
// The sums over the blocks of norm_backward (layers_norm.cu), in a fixed order: gradients of a norm's weight and bias.
//
// A block has 32 columns, and a warp each 32nd row.

#define SUM_THREADS 1024  // mirrored by gpu3d/cuda/layers.py

extern "C" __global__ __launch_bounds__(SUM_THREADS) void sum_partials(
    const float *__restrict__ partials,  // [count, 2, columns]
    int count,
    int columns,
    float *__restrict__ dweight,  // [columns]
    float *__restrict__ dbias     // [columns]
) {
    __shared__ float of_warp[32][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int all = 2 * columns;
    const int column = blockIdx.x * 32 + lane;  // may lie beyond the columns
    float sum = 0;
    if (column < all)
#pragma unroll 4
        for (int row = warp; row < count; row += 32) sum += partials[(long long)row * all + column];
    of_warp[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= all) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < 32; ++w) sum += of_warp[w][lane];
    if (column < columns) dweight[column] = sum;
    else dbias[column - columns] = sum;
}
