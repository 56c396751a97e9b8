// SPDX-License-Identifier: Apache-2.0
// Sums over rows, in two stages and a fixed order: the gradients of biases, and of a norm's weight and bias.
//   bias_partials  a block sums some of the rows, for some of the columns
//   sum_partials   the sum over the blocks, also over those of norm_backward (layers_norm.cu)
//
// In bias_partials 1 << lane_bits neighbouring threads share a row, one word of 16 bytes each. Memory bandwidth limits
// it, so a thread loads ROWS rows at once. In sum_partials a block has 32 columns, and a warp each 32nd row.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py, like the next two
#define ROWS 4       // rows that a thread loads at once
#define SUM_THREADS 1024

#include "layers.cuh"
#include "warp.cuh"

extern "C" __global__ __launch_bounds__(THREADS) void bias_partials(
    const Word *__restrict__ dout,  // [rows, words]
    int rows,
    int words,
    int lane_bits,                // ranges [0, 5]
    int column_blocks,            // blocks side by side: ceil(words / (1 << lane_bits))
    float *__restrict__ partials  // [blocks / column_blocks, words * PER]
) {
    __shared__ Floats mine[THREADS];
    const int lanes = 1 << lane_bits, groups = THREADS >> lane_bits;
    const int part = blockIdx.x / column_blocks, parts = gridDim.x / column_blocks;
    const int first_word = (blockIdx.x - part * column_blocks) * lanes, word = first_word + (threadIdx.x & lanes - 1);
    const long long step = (long long)parts * groups;
    Floats sum = {};
    if (word < words)
        for (long long row = (long long)part * groups + (threadIdx.x >> lane_bits); row < rows; row += ROWS * step) {
            Word loaded[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (row + k * step < rows) loaded[k] = dout[(row + k * step) * words + word];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (row + k * step < rows) sum = sum + widen(loaded[k]);
        }
    mine[threadIdx.x] = sum;
    __syncthreads();
    const int columns = min(lanes, words - first_word) * PER;
    for (int c = threadIdx.x; c < columns; c += THREADS) {
        float total = 0;
        for (int g = 0; g < groups; ++g) total += mine[g * lanes + c / PER].x[c % PER];
        partials[((long long)part * words + first_word) * PER + c] = total;
    }
}

extern "C" __global__ __launch_bounds__(SUM_THREADS) void sum_partials(
    const float *__restrict__ partials,  // [count, 2, columns], or [count, columns] if `second` is null
    int count,
    int columns,
    float *__restrict__ first,  // [columns]
    float *__restrict__ second  // [columns] or null
) {
    __shared__ float of_warp[32][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int all = second ? 2 * columns : columns;
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
    if (column < columns) first[column] = sum;
    else second[column - columns] = sum;
}
