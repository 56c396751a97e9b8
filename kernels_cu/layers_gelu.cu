// SPDX-License-Identifier: Apache-2.0
// The backward of GELU: dx = dy GELU'(x), elementwise, with GELU in the tanh form of gelu.cuh. It also computes GELU(x)
// again, which the gradient of the next layer's weight reads. So a forward need not keep GELU(x), a quarter of all that
// a block would keep, for 3 us of some 20 that this kernel takes.
//
// cuBLASLt computes dx behind a product (DGELU), but then the product takes 2 to 4 times as long: 81 us in place of 22
// for [4608, 512] x [512, 2048] in bfloat16 on an H200, where this kernel moves 76 MB, most of them in L2.
//
// A thread has ITEMS words of 16 bytes, THREADS apart.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py
#define ITEMS 4      // likewise

#include "gelu.cuh"
#include "layers.cuh"

// dx may be dy.
extern "C" __global__ __launch_bounds__(THREADS) void gelu_backward(
    const Word *dy,              // [words]
    const Word *__restrict__ x,  // [words]
    long long words,
    Word *dx,                  // [words]
    Word *__restrict__ active  // [words] GELU(x)
) {
    const long long first = (long long)blockIdx.x * (THREADS * ITEMS) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const long long at = first + i * THREADS;
        if (at >= words) return;
        Floats d = widen(dy[at]), u = widen(x[at]);
#pragma unroll
        for (int e = 0; e < PER; ++e) {
            d.x[e] *= gelu_derivative(u.x[e]);
            u.x[e] = gelu(u.x[e]);
        }
        dx[at] = narrow(d);
        active[at] = narrow(u);
    }
}
