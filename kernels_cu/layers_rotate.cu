// SPDX-License-Identifier: Apache-2.0
// Rotary position codes: turns pairs of elements of q and k, in place, by angles that are linear in the coordinates.
//   (x, y) = (x cos a - y sin a, x sin a + y cos a) for elements 2 p and 2 p + 1 of a head, a = pi coordinate turns[p]
// The first third of the pairs belongs to axis x, the second to y, the third to z. The backward turns the other way.
//
// A thread has one word of 16 bytes in each of up to HEADS heads of q and of k, because their angles are the same.
// Neighbouring threads have neighbouring words. All words are loaded before the first is stored: they are in flight
// while the sines are computed.
//
// Numerics: an angle in half turns is a float32 product, which sincospif reduces exactly.

#define THREADS 256  // mirrored by gpu3d/cuda/layers.py, as are the next two
#define PAIRS 64     // of a head at most
#define HEADS 2      // a thread, of q and of k

#include "early.cuh"
#include "layers.cuh"

struct Turns {
    float of[PAIRS];  // half turns a unit of the coordinate; 0 for pairs that stay as they are
};

extern "C" __global__ __launch_bounds__(THREADS) void rotate_rows(
    const float *points,  // [N, 3]
    const int *index,     // [rows] ranges [-1, N)
    const __grid_constant__ Turns turns,
    int axis_pairs,  // pairs of an axis
    int rows,
    int heads,
    int words,        // of a head
    int groups,       // of heads: a thread has every groups-th head
    float direction,  // 1 or -1
    Word *qkv         // [rows, 3, heads, words]
) {
    start_early();
    const int threads = words * groups;  // of a row
    const int row = blockIdx.x * (THREADS / threads) + threadIdx.x / threads;
    if (threadIdx.x >= THREADS / threads * threads || row >= rows) return;
    const int word = threadIdx.x % words, group = threadIdx.x % threads / words;
    Word *at = qkv + 3ll * row * heads * words + word;  // the heads of k lie behind those of q
    Word x[2 * HEADS];
#pragma unroll
    for (int i = 0; i < 2 * HEADS; ++i) {
        if (group + i * groups < 2 * heads) x[i] = at[(group + i * groups) * words];
    }
    const int point = index[row];
    if (point < 0) return;
    float sine[PER / 2], cosine[PER / 2];
#pragma unroll
    for (int p = 0; p < PER / 2; ++p) {
        const int pair = word * (PER / 2) + p, axis = (pair >= axis_pairs) + (pair >= 2 * axis_pairs);
        sincospif(__fmul_rn(points[3ll * point + axis], direction * turns.of[pair]), &sine[p], &cosine[p]);
    }
#pragma unroll
    for (int i = 0; i < 2 * HEADS; ++i) {
        Floats y = widen(x[i]);
#pragma unroll
        for (int p = 0; p < PER / 2; ++p) {
            const float even = y.x[2 * p], odd = y.x[2 * p + 1];
            y.x[2 * p] = even * cosine[p] - odd * sine[p];
            y.x[2 * p + 1] = even * sine[p] + odd * cosine[p];
        }
        if (group + i * groups < 2 * heads) at[(group + i * groups) * words] = narrow(y);
    }
}
