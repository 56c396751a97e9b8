// SPDX-License-Identifier: Apache-2.0
// A residual connection with drop path (drop.cuh): out = x + keep(row) y, and without x its backward, dy = keep(row)
// dout. Where a norm follows, norm_rows and norm_backward (layers_norm.cu) do this themselves.
//
// 1 << lane_bits neighbouring threads share a row, one word of 16 bytes at a time.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py

#include "drop.cuh"
#include "layers.cuh"

// out may be x or y: each word is read before it is written, by the same thread.
extern "C" __global__ __launch_bounds__(THREADS) void residual_rows(
    const Word *x,  // [rows, words] or null for 0
    const Word *y,  // [rows, words]
    int rows,
    int words,
    int lane_bits,  // ranges [0, 8]
    const Drop drop,
    Word *out  // [rows, words]
) {
    const long long row = (long long)blockIdx.x * (THREADS >> lane_bits) + (threadIdx.x >> lane_bits);
    if (row >= rows) return;
    const float factor = keep(drop, row);
    for (int c = threadIdx.x & (1 << lane_bits) - 1; c < words; c += 1 << lane_bits) {
        const Floats sum = kept(factor, widen(y[row * words + c]));
        out[row * words + c] = narrow(x ? widen(x[row * words + c]) + sum : sum);
    }
}
