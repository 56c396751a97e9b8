// SPDX-License-Identifier: Apache-2.0
// Cross-entropy plus Lovasz-softmax (Berman, Triki and Blaschko 2018): what is done a point at a time. The ranking of
// errors is in losses_lovasz.cu.
//   loss_errors     p = softmax(logits);  error of class c = 1 - p_c if c is the label, otherwise p_c;  keys of errors,
//                   and how many points have each label
//   (losses_lovasz.cu: jaccard[c, i], the derivative of class c's loss with respect to the error of point i)
//   loss_gradient   v_c = jaccard[c, i], negative if c is the label: the derivative with respect to p_c
//                   dlogits_c = p_c (v_c - sum_k v_k p_k) / present + (p_c - [c is the label]) / valid
//                   loss = sum_i -log p_label / valid + sum_ic error jaccard / present
// `valid` counts the points with a label from 0 to classes - 1 other than `ignore`, `present` the classes that one of
// them has. Other points get no gradient: dlogits is 0 before. Without any valid point the loss is 0.
//
// A warp takes 32 points. It loads their rows of logits together into shared memory, where each lane then works on a
// row of its own. Rows are an odd number of words apart, so that lanes use different banks.
//
// Numerics: float32; the sums over points are float32 in a block, and float64 over blocks, by the last block to finish.
// Both have a fixed order. A logit that is NaN makes the loss NaN, if its point counts.

#ifndef ELEMENT
#define ELEMENT 3  // of logits and dlogits: 0 float32, 2 float16, 3 bfloat16
#endif
#ifndef LABEL
#define LABEL 0  // 0: labels are uint8, 1: int32
#endif
#define THREADS 128  // mirrored by gpu3d/cuda/losses.py
#define WARPS (THREADS / 32)
#define TOGETHER 8  // rows that a warp loads at once

#include "floats.cuh"
#include "grid.cuh"
#include "losses.cuh"
#include "warp.cuh"

typedef Float<ELEMENT>::Stored element_t;
#if LABEL
typedef int label_t;
#else
typedef u8 label_t;
#endif

// What both kernels read.
struct Logits {
    const element_t *logits;   // [rows, classes], rows `pitch` elements apart
    const label_t *labels;     // [points] of those with a row
    const int *point_to_slot;  // [points] row of each point, or -1 to ignore it; null if point i has row i
    long long pitch;
    int points;
    int classes;  // ranges [1, MOST_CLASSES]
    int ignore;
};

// A lane's point.
struct Point {
    int index;      // may lie beyond the points
    int label;      // -1 if the point does not count
    long long row;  // of logits
    float *p;       // [classes] in shared memory: the probabilities
    float loss;     // -log p[label]
};

__device__ __forceinline__ Point load_point(const Logits &in) {
    extern __shared__ float rows[];  // [THREADS, classes | 1]
    const int lane = threadIdx.x & 31, width = in.classes | 1;
    float *tile = rows + (threadIdx.x & ~31) * width;  // the warp's
    Point point = {(int)(blockIdx.x * THREADS + threadIdx.x), -1, 0, tile + lane * width, 0};
    if (point.index < in.points) {
        point.row = in.point_to_slot ? in.point_to_slot[point.index] : point.index;
        if (point.row >= 0) {  // otherwise there may be no label
            const int label = in.labels[point.index];
            if (label >= 0 && label < in.classes && label != in.ignore) point.label = label;
        }
    }
    const u32 counting = __ballot_sync(FULL, point.label >= 0);
    for (int base = 0; base < 32; base += TOGETHER) {
        element_t loaded[TOGETHER][MOST_CLASSES / 32];  // all loads first, so that they overlap
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
            const long long row = __shfl_sync(FULL, point.row, base + k);
#pragma unroll
            for (int j = 0; j < MOST_CLASSES / 32; ++j)
                if ((counting >> base + k & 1) && lane + 32 * j < in.classes)
                    loaded[k][j] = in.logits[row * in.pitch + lane + 32 * j];
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k)
#pragma unroll
            for (int j = 0; j < MOST_CLASSES / 32; ++j)
                if ((counting >> base + k & 1) && lane + 32 * j < in.classes)
                    tile[(base + k) * width + lane + 32 * j] = Float<ELEMENT>::widen(loaded[k][j]);
    }
    __syncwarp();
    if (point.label < 0) return point;
    float most = point.p[0], sum = 0;
    for (int c = 1; c < in.classes; ++c) most = fmaxf(most, point.p[c]);
    const float at_label = point.p[point.label] - most;
    for (int c = 0; c < in.classes; ++c) {
        point.p[c] = expf(point.p[c] - most);
        sum += point.p[c];
    }
    for (int c = 0; c < in.classes; ++c) point.p[c] /= sum;
    point.loss = logf(sum) - at_label;
    return point;
}

extern "C" __global__ __launch_bounds__(THREADS) void loss_errors(
    const __grid_constant__ Logits in,
    u32 *__restrict__ counts,  // [classes] points with each label; starts at 0
    u32 *__restrict__ keys     // [classes, points]
) {
    __shared__ u32 of_block[MOST_CLASSES];
    for (int c = threadIdx.x; c < in.classes; c += THREADS) of_block[c] = 0;
    __syncthreads();
    const Point point = load_point(in);
    if (point.label >= 0) atomicAdd(&of_block[point.label], 1);
    if (point.index < in.points)
        for (int c = 0; c < in.classes; ++c) {
            u32 key = KEY_IGNORED;
            if (point.label >= 0) key = key_of(c == point.label ? 1 - point.p[c] : point.p[c], c == point.label);
            keys[(long long)c * in.points + point.index] = key;
        }
    __syncthreads();
    for (int c = threadIdx.x; c < in.classes; c += THREADS)
        if (of_block[c]) atomicAdd(&counts[c], of_block[c]);  // integer sums are the same in any order
}

extern "C" __global__ __launch_bounds__(THREADS) void loss_gradient(
    const __grid_constant__ Logits in,
    const u32 *__restrict__ counts,     // [classes]
    const float *__restrict__ jaccard,  // [classes, points] written for classes that are present
    u32 *__restrict__ arrived,          // [] starts at 0
    float2 *partials,                   // [blocks] sums of both losses
    element_t *__restrict__ dlogits,    // [rows, classes], rows `dpitch` elements apart; starts at 0
    long long dpitch,
    float *__restrict__ loss  // []
) {
    __shared__ float2 of_warp[WARPS];
    __shared__ double2 of_thread[THREADS];
    const int lane = threadIdx.x & 31;
    u32 valid = 0, present = 0;
    for (int c = 0; c < in.classes; ++c) {
        valid += counts[c];
        present += counts[c] > 0;
    }
    const Point point = load_point(in);
    float lovasz = 0, inner = 0;
    if (point.label >= 0) {
        const float of_class = 1.0f / present, of_point = 1.0f / valid;
        for (int c = 0; c < in.classes; ++c) {
            if (!counts[c]) continue;
            const float p = point.p[c], g = jaccard[(long long)c * in.points + point.index];
            lovasz += (c == point.label ? 1 - p : p) * g;
            inner += (c == point.label ? -g : g) * p;
        }
        for (int c = 0; c < in.classes; ++c) {
            const float p = point.p[c];
            const float g = counts[c] ? jaccard[(long long)c * in.points + point.index] : 0;
            const float own = c == point.label ? 1 : 0;
            point.p[c] = p * ((own ? -g : g) - inner) * of_class + (p - own) * of_point;
        }
    }
    __syncwarp();
    const u32 counting = __ballot_sync(FULL, point.label >= 0);
    for (int k = 0; k < 32; ++k) {
        const long long row = __shfl_sync(FULL, point.row, k);
        if (counting >> k & 1)
            for (int c = lane; c < in.classes; c += 32)
                dlogits[row * dpitch + c] = Float<ELEMENT>::narrow(point.p[(k - lane) * (in.classes | 1) + c]);
    }

    const float2 sums = {sum_of_warp(point.loss), sum_of_warp(lovasz)};
    if (lane == 0) of_warp[threadIdx.x / 32] = sums;
    __syncthreads();
    if (threadIdx.x == 0) {
        float2 sum = {};
        for (int w = 0; w < WARPS; ++w) sum.x += of_warp[w].x, sum.y += of_warp[w].y;
        partials[blockIdx.x] = sum;
    }
    if (!is_last_block(arrived, gridDim.x)) return;
    double2 total = {};
    for (u32 i = threadIdx.x; i < gridDim.x; i += THREADS) total.x += partials[i].x, total.y += partials[i].y;
    of_thread[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x) return;
    total = {};
    for (int t = 0; t < THREADS; ++t) total.x += of_thread[t].x, total.y += of_thread[t].y;
    *loss = valid ? (float)(total.x / valid + total.y / present) : 0.0f;
}
