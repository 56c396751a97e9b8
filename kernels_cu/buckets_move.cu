// SPDX-License-Identifier: Apache-2.0
// Moves rows between point order and slot order, and writes the tables of attention scopes.
//   move_rows      Buckets.scatter and .gather: out[r] = rows[index[r]], or the fill pattern if index[r] is -1
//   move_scopes    scopes(): which buckets each attention scope reads

#ifndef WORD
#define WORD 16  // bytes a load: the largest power of two up to 16 that divides a row and its addresses
#endif
#define THREADS 256
#define ROWS_A_THREAD 4  // so many loads are in flight; mirrored by gpu3d/cuda/buckets.py

#include "clouds.cuh"
#include "early.cuh"

#if WORD == 16
typedef uint4 word_t;
#elif WORD == 8
typedef u64 word_t;
#elif WORD == 4
typedef u32 word_t;
#elif WORD == 2
typedef unsigned short word_t;
#else
typedef unsigned char word_t;
#endif

struct Pattern {
    alignas(16) unsigned char bytes[16];
};  // the fill value, repeated

// A block moves ROWS_A_THREAD * (THREADS >> lane_bits) rows; 1 << lane_bits neighbouring threads share a row.
extern "C" __global__ __launch_bounds__(THREADS) void move_rows(
    const word_t *rows,  // [R, words], rows `pitch` words apart
    const int *index,    // [out_rows], ranges [-1, R)
    long long out_rows,
    long long words,  // words a row
    long long pitch,  // at least `words`
    int lane_bits,    // ranges [0, 8]
    const __grid_constant__ Pattern fill,
    word_t *__restrict__ out  // [out_rows, words]
) {
    start_early();
    const int rows_a_step = THREADS >> lane_bits;
    const long long first = (long long)blockIdx.x * rows_a_step * ROWS_A_THREAD + (threadIdx.x >> lane_bits);
    const long long column = threadIdx.x & (1 << lane_bits) - 1;
    const word_t pattern = *(const word_t *)fill.bytes;
    int source[ROWS_A_THREAD];
#pragma unroll
    for (int k = 0; k < ROWS_A_THREAD; ++k) {
        const long long r = first + k * rows_a_step;
        source[k] = r < out_rows ? index[r] : -1;
    }
    for (long long c = column; c < words; c += 1ll << lane_bits) {
        word_t value[ROWS_A_THREAD];
#pragma unroll
        for (int k = 0; k < ROWS_A_THREAD; ++k) value[k] = source[k] < 0 ? pattern : rows[source[k] * pitch + c];
#pragma unroll
        for (int k = 0; k < ROWS_A_THREAD; ++k) {
            const long long r = first + k * rows_a_step;
            if (r < out_rows) out[r * words + c] = value[k];
        }
    }
}

// Position p of a cloud stands for bucket (p + shift) mod buckets. A chunk of size * stride positions contains `stride`
// scopes; scope j of it takes positions j, j + stride, j + 2 * stride, ...
extern "C" __global__ __launch_bounds__(THREADS) void move_scopes(
    const __grid_constant__ Clouds clouds,  // Cloud::group is the cloud's first scope
    long long entries,                      // scopes * size
    int size,
    long long shift,
    long long stride,
    int *__restrict__ table  // [scopes, size]
) {
    start_early();
    const long long entry = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (entry >= entries) return;
    const int scope = (int)(entry / size), place = (int)(entry % size);
    const int b = cloud_of<&Cloud::group>(clouds, scope);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const long long begin = cloud.slot / clouds.bucket_size, buckets = next.slot / clouds.bucket_size - begin;
    const long long chunk = (scope - cloud.group) / stride * stride * size;
    const long long position = chunk + (scope - cloud.group) % stride + place * stride;
    const bool inside = position < min(chunk + stride * size, buckets);
    table[entry] = inside ? (int)(begin + ((position + shift) % buckets + buckets) % buckets) : -1;
}
