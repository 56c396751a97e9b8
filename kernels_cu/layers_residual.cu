// SPDX-License-Identifier: Apache-2.0
// A residual connection with drop path: out = x + keep(row) y, and without x its backward, dy = keep(row) dout.
//
// keep(row) is `scale` = 1 / (1 - p) where the row's random word is at least `threshold` = floor(p 2^32), otherwise 0.
// The word is the first of Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011) with counter (row, layer, step, 0) and
// the seed as key. So forward and backward agree without a mask in memory, and a resumed training goes on with the
// same numbers. y is not read where a row is dropped.
//
// 1 << lane_bits neighbouring threads share a row, one word of 16 bytes at a time.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py

#include "layers.cuh"

__device__ __forceinline__ u32 random_word(u32 row, u32 layer, u32 step, u64 seed) {
    u32 c0 = row, c1 = layer, c2 = step, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 a = 0xd2511f53ull * c0, b = 0xcd9e8d57ull * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c0;
}

// out may be x or y: each word is read before it is written, by the same thread.
extern "C" __global__ __launch_bounds__(THREADS) void residual_rows(
    const Word *x,  // [rows, words] or null for 0
    const Word *y,  // [rows, words]
    int rows,
    int words,
    int lane_bits,  // ranges [0, 8]
    u32 threshold,
    float scale,
    u32 layer,
    u64 seed,
    const u32 *__restrict__ step,  // []
    Word *out                      // [rows, words]
) {
    const long long row = (long long)blockIdx.x * (THREADS >> lane_bits) + (threadIdx.x >> lane_bits);
    if (row >= rows) return;
    const bool kept = random_word((u32)row, layer, *step, seed) >= threshold;
    for (int c = threadIdx.x & (1 << lane_bits) - 1; c < words; c += 1 << lane_bits) {
        Floats sum = {};
        if (kept) {
            sum = widen(y[row * words + c]);
#pragma unroll
            for (int e = 0; e < PER; ++e) sum.x[e] *= scale;
        }
        if (x) sum = widen(x[row * words + c]) + sum;
        out[row * words + c] = narrow(sum);
    }
}
