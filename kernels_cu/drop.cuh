// SPDX-License-Identifier: Apache-2.0
// Drop path: keep(row) is 1 / (1 - p), or 0 with probability p.
//
// keep(row) is `scale` where the row's random word is at least `threshold` = floor(p 2^32). The word is the first of
// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011) with counter (row, layer, step, 0) and the seed as key. So forward
// and backward agree without a mask in memory, and a resumed training goes on with the same numbers.

#ifndef GPU3D_DROP_CUH
#define GPU3D_DROP_CUH

#include "layers.cuh"

struct Drop {  // mirrored by gpu3d/cuda/layers.py
    u32 threshold;
    float scale;
    u32 layer;
    u64 seed;
    const u32 *step;  // []
};

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

__device__ __forceinline__ float keep(const Drop &drop, long long row) {
    return random_word((u32)row, drop.layer, *drop.step, drop.seed) >= drop.threshold ? drop.scale : 0.0f;
}

// keep y, which is 0 for any y where the row is dropped. The product is rounded before anything is added to it.
__device__ __forceinline__ Floats kept(float keep, const Floats &y) {
    Floats out;
#pragma unroll
    for (int e = 0; e < PER; ++e) out.x[e] = keep == 0.0f ? 0.0f : __fmul_rn(keep, y.x[e]);
    return out;
}

#endif  // GPU3D_DROP_CUH
