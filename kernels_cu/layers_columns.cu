// SPDX-License-Identifier: Apache-2.0
// Sums of the columns of a matrix over the rows of each block, which sum_partials (layers_sums.cu) adds up: the
// gradient of a linear layer's bias.
//
// cuBLASLt computes it behind a product (BGRADB), but in a kernel of its own that takes 20 us for 34,816 rows of
// bfloat16 on an H200, however few their columns are. Reading 64 columns from memory takes 1 us, and 256 take 4.
//
// 1 << lane_bits neighbouring threads share a row: one word of 16 bytes each, of the block's tile of the row. A block
// takes some rows at once, and `parts` blocks take turns. A thread loads ROWS rows before it adds them.
//
// Numerics: float32, in an order that depends on the number of rows and blocks only.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py
#define ROWS 8       // loads that a thread has under way

#include "layers.cuh"

extern "C" __global__ __launch_bounds__(THREADS) void column_sums(
    const Word *__restrict__ x,  // [rows, words], rows `pitch` words apart
    int rows,
    int words,
    int pitch,
    int lane_bits,                // ranges [0, 5]
    int tiles,                    // blocks that share a row
    float *__restrict__ partials  // [parts, words * PER]
) {
    __shared__ Floats of_thread[THREADS];
    const int tile = blockIdx.x % tiles, part = blockIdx.x / tiles, parts = gridDim.x / tiles;
    const int group = threadIdx.x >> lane_bits, groups = THREADS >> lane_bits;
    const int first = tile << lane_bits, c = first + (threadIdx.x & (1 << lane_bits) - 1);
    const long long stride = (long long)parts * groups;
    Floats sum = {};
    for (long long row = part * groups + group; c < words && row < rows; row += ROWS * stride) {
        Word loaded[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
            if (row + k * stride < rows) loaded[k] = x[(row + k * stride) * pitch + c];
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
            if (row + k * stride < rows) sum = sum + widen(loaded[k]);
    }
    of_thread[threadIdx.x] = sum;
    __syncthreads();
    const int i = threadIdx.x;  // an element of the tile; there are at most THREADS
    if (i >= PER << lane_bits || first * PER + i >= words * PER) return;
    float total = 0;
    for (int g = 0; g < groups; ++g) total += of_thread[(g << lane_bits) + i / PER].x[i % PER];
    partials[((long long)part * words + first) * PER + i] = total;
}
