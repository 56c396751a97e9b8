// SPDX-License-Identifier: Apache-2.0
// LayerNorm over the columns of each row, forward and backward; GELU may follow it, and a residual connection with drop
// path (drop.cuh) may come before it.
//   norm_rows      x = base + keep y, if there is a y
//                  xhat = (x - mean(x)) rstd,  rstd = 1 / sqrt(variance(x) + epsilon), biased variance
//                  u = xhat weight + bias;  out = u, or GELU(u)
//   norm_backward  du = dout, or dout GELU'(u);  g = du weight
//                  dx = dres + rstd (g - mean(g) - xhat mean(g xhat))
//                  dy = keep dx, the gradient of y
//                  and a block's sums of du xhat and du over its rows, which sum_partials (layers_sums.cu) adds up to
//                  the gradients of weight and bias
// GELU is the tanh form of gelu.cuh.
//
// ROW_THREADS threads of a warp share a row and keep it in registers, so each tensor is read once and written once. x
// and dx are rounded to the type of the activations before they are used, so the bits are those of a norm and
// residual_rows one after the other. (Those take 8.3 us for 34,816 rows of 64 in bfloat16 on an H200, and norm_rows
// with y takes 6.1.) xhat and u are computed again in the backward, from x and the row's mean and rstd, with the same
// operations.
//
// Numerics: float32; sums of a row go over a lane's columns, then over lanes; the variance is that of differences from
// the mean. A row's result does not depend on other rows. norm_backward adds rows in an order that depends on the
// number of rows and blocks only.

#ifndef ROW_THREADS
#define ROW_THREADS 32  // threads a row: 4, 8, 16 or 32
#endif
#ifndef THREAD_WORDS
#define THREAD_WORDS 2  // words of 16 bytes a thread
#endif
#ifndef GELU
#define GELU 0  // 1: GELU follows
#endif
#define THREADS 256                                 // mirrored by gpu3d/cuda/layers.py
#define GROUPS (THREADS / ROW_THREADS)              // rows that a block takes at once
#define COLUMNS (ROW_THREADS * THREAD_WORDS * PER)  // an upper bound on the columns

#include "drop.cuh"
#include "early.cuh"
#include "gelu.cuh"
#include "layers.cuh"
#include "warp.cuh"

static_assert(
    ROW_THREADS <= 32 && (THREAD_WORDS == 1 || ROW_THREADS == 32),
    "a row belongs to one warp, and fills it before words repeat"
);

// The words of a row that a thread has, 0 beyond the row's end.
__device__ __forceinline__ void load_row(
    Floats z[THREAD_WORDS], const Word *x, long long first, int lane, int words, bool exists
) {
#pragma unroll
    for (int k = 0; k < THREAD_WORDS; ++k) {
        const int c = lane + k * ROW_THREADS;
        z[k] = exists && c < words ? widen(x[first + c]) : Floats{};
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void norm_rows(
    const Word *base,     // [rows, words]
    const Word *y,        // [rows, words], or null if x is base
    const float *weight,  // [words * PER]
    const float *bias,    // [words * PER]
    int rows,
    int words,  // words a row; at most ROW_THREADS * THREAD_WORDS
    float epsilon,
    const Drop drop,
    Word *__restrict__ x,            // [rows, words], written if there is a y
    Word *__restrict__ out,          // [rows, words]
    float2 *__restrict__ statistics  // [rows] mean and rstd, or null
) {
    start_early();
    const int lane = threadIdx.x % ROW_THREADS;                                        // ranges [0, ROW_THREADS)
    const long long row = (long long)blockIdx.x * GROUPS + threadIdx.x / ROW_THREADS;  // may lie beyond the rows
    const bool exists = row < rows;  // no thread leaves before the sums, because whole warps take part in them
    const float share = 1.0f / (words * PER);
    Floats z[THREAD_WORDS];
    load_row(z, base, row * words, lane, words, exists);
    if (y) {
        Floats branch[THREAD_WORDS];
        load_row(branch, y, row * words, lane, words, exists);
        const float factor = keep(drop, row);
#pragma unroll
        for (int k = 0; k < THREAD_WORDS; ++k) {
            const int c = lane + k * ROW_THREADS;
            const Word word = narrow(z[k] + kept(factor, branch[k]));
            if (exists && c < words) x[row * words + c] = word;
            z[k] = widen(word);
        }
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < THREAD_WORDS; ++k)
#pragma unroll
        for (int e = 0; e < PER; ++e) sum += z[k].x[e];
    const float mean = sum_of_lanes<ROW_THREADS>(sum) * share;
    float squares = 0;
#pragma unroll
    for (int k = 0; k < THREAD_WORDS; ++k)
#pragma unroll
        for (int e = 0; e < PER; ++e) {
            const float difference = z[k].x[e] - mean;
            if (lane + k * ROW_THREADS < words) squares += difference * difference;
        }
    const float rstd = rsqrtf(sum_of_lanes<ROW_THREADS>(squares) * share + epsilon);
    if (!exists) return;
    if (statistics && lane == 0) statistics[row] = {mean, rstd};
#pragma unroll
    for (int k = 0; k < THREAD_WORDS; ++k) {
        const int c = lane + k * ROW_THREADS;
        if (c >= words) continue;
        const Floats w = load_parameters(weight, c), b = load_parameters(bias, c);
        Floats u;
#pragma unroll
        for (int e = 0; e < PER; ++e) {
            u.x[e] = (z[k].x[e] - mean) * rstd * w.x[e] + b.x[e];
#if GELU
            u.x[e] = gelu(u.x[e]);
#endif
        }
        out[row * words + c] = narrow(u);
    }
}

// Adds up `mine`, a thread's sums over its rows, over all rows of the block, and writes them to `out` [words * PER].
__device__ __forceinline__ void write_sums(
    Floats mine[THREAD_WORDS], float (*of_warp)[COLUMNS], int lane, int words, float *out
) {
#pragma unroll
    for (int k = 0; k < THREAD_WORDS; ++k)
#pragma unroll
        for (int e = 0; e < PER; ++e) {
#pragma unroll
            for (int step = ROW_THREADS; step < 32; step *= 2)
                mine[k].x[e] += __shfl_xor_sync(FULL, mine[k].x[e], step);
            if ((threadIdx.x & 31) < ROW_THREADS)
                of_warp[threadIdx.x / 32][(lane + k * ROW_THREADS) * PER + e] = mine[k].x[e];
        }
    __syncthreads();
    for (int column = threadIdx.x; column < words * PER; column += THREADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) sum += of_warp[w][column];
        out[column] = sum;
    }
    __syncthreads();  // of_warp is used again
}

// dx may be dres: each element is read before it is written, by the same thread.
extern "C" __global__ __launch_bounds__(THREADS) void norm_backward(
    const Word *__restrict__ dout,          // [rows, words]
    const Word *__restrict__ x,             // [rows, words]
    const float2 *__restrict__ statistics,  // [rows] mean and rstd
    const float *__restrict__ weight,       // [words * PER]
    const float *__restrict__ bias,         // [words * PER] read for GELU only
    const Word *dres,                       // [rows, words] or null
    int rows,
    int words,  // words a row; at most ROW_THREADS * THREAD_WORDS
    const Drop drop,
    Word *dx,                     // [rows, words]
    Word *__restrict__ dy,        // [rows, words] or null
    float *__restrict__ partials  // [blocks, 2, words * PER] sums of du xhat, and of du
) {
    __shared__ float of_warp[THREADS / 32][COLUMNS];
    const int lane = threadIdx.x % ROW_THREADS;
    const float share = 1.0f / (words * PER);
    Floats dweight[THREAD_WORDS] = {}, dbias[THREAD_WORDS] = {};
    // All threads of a block go round together, because whole warps take part in the sums.
    for (long long base = (long long)blockIdx.x * GROUPS; base < rows; base += (long long)gridDim.x * GROUPS) {
        const long long row = base + threadIdx.x / ROW_THREADS, first = row * words;
        const bool exists = row < rows;
        Floats xhat[THREAD_WORDS], g[THREAD_WORDS];
        load_row(xhat, x, first, lane, words, exists);
        load_row(g, dout, first, lane, words, exists);
        const float factor = dy ? keep(drop, row) : 0.0f;
        const float2 moments = exists ? statistics[row] : float2{};
        const float mean = moments.x, rstd = moments.y;
        float sum = 0, product = 0;
#pragma unroll
        for (int k = 0; k < THREAD_WORDS; ++k) {
            const int c = lane + k * ROW_THREADS;
            if (!exists || c >= words) continue;
            const Floats w = load_parameters(weight, c);
#if GELU
            const Floats b = load_parameters(bias, c);
#endif
#pragma unroll
            for (int e = 0; e < PER; ++e) {
                const float hat = (xhat[k].x[e] - mean) * rstd;
                float du = g[k].x[e];
#if GELU
                du *= gelu_derivative(hat * w.x[e] + b.x[e]);
#endif
                dweight[k].x[e] += du * hat;
                dbias[k].x[e] += du;
                xhat[k].x[e] = hat;
                g[k].x[e] = du * w.x[e];
                sum += g[k].x[e];
                product += g[k].x[e] * hat;
            }
        }
        sum = sum_of_lanes<ROW_THREADS>(sum) * share;
        product = sum_of_lanes<ROW_THREADS>(product) * share;
#pragma unroll
        for (int k = 0; k < THREAD_WORDS; ++k) {
            const int c = lane + k * ROW_THREADS;
            if (!exists || c >= words) continue;
            Floats dz;
#pragma unroll
            for (int e = 0; e < PER; ++e) dz.x[e] = rstd * (g[k].x[e] - sum - xhat[k].x[e] * product);
            const Word word = narrow(dres ? widen(dres[first + c]) + dz : dz);
            dx[first + c] = word;
            if (dy) dy[first + c] = narrow(kept(factor, widen(word)));
        }
    }
    float *out = partials + (long long)blockIdx.x * 2 * words * PER;
    write_sums(dweight, of_warp, lane, words, out);
    write_sums(dbias, of_warp, lane, words, out + words * PER);
}
