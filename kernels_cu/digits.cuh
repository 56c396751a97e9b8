// SPDX-License-Identifier: Apache-2.0
// A pass of a stable radix sort over tiles, "onesweep" (Adinets and Merrill 2022): what a block does between counting
// the digits of its tile and moving its records. Digits have 8 bits, and thread d of a block stands for digit d.

#ifndef GPU3D_DIGITS_CUH
#define GPU3D_DIGITS_CUH

#include "warp.cuh"

#define DIGITS 256
#define WINDOW 8  // tiles that the look-back reads at once

// What a tile publishes for each digit: 0 at first, then its own count, then the count of all tiles of its sort up to
// and including itself.
#define COUNT_BITS 30
#define COUNT ((1u << COUNT_BITS) - 1)
#define STATE_OWN (1u << COUNT_BITS)
#define STATE_SUM (2u << COUNT_BITS)

// How often digit d occurs in the tiles [start, tile) of a sort. Waits until they have published their counts.
__device__ __forceinline__ u32 look_back(volatile u32 *board, int start, int tile, int d) {  // board [tiles, DIGITS]
    u32 before = 0;
    for (int t = tile - 1; t >= 0;) {
        u32 word[WINDOW];
#pragma unroll
        for (int k = 0; k < WINDOW; ++k) word[k] = board[(size_t)max(t - k, start) * DIGITS + d];
#pragma unroll
        for (int k = 0; k < WINDOW; ++k) {
            if (!(word[k] >> COUNT_BITS)) break;  // not published yet: read again
            before += word[k] & COUNT;
            --t;
            if (word[k] & STATE_SUM) {  // true for the sort's first tile
                t = -1;
                break;
            }
        }
    }
    return before;
}

// Adds to the digits of a warp's records, in record order, their rank among equal ones << 8. Lanes with equal digits
// find each other through a word of shared memory for each digit, 0 at first: each lane sets its bit in the low half,
// and the high half counts earlier items, and at the end all.
template <int N>
__device__ __forceinline__ void rank_digits(u64 *words, u32 (&seat)[N], int lane) {  // words [DIGITS]
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const u32 digit = seat[k];
        atomicOr((u32 *)&words[digit], 1u << lane);
        __syncwarp();
        const u64 word = words[digit];
        const u32 same = (u32)word, earlier = (u32)(word >> 32);
        __syncwarp();
        // The last lane counts for the next item.
        if (same >> lane == 1) words[digit] = (u64)(earlier + __popc(same)) << 32;
        __syncwarp();
        seat[k] |= earlier + rank_in(same, lane) << 8;
    }
}

// Where each warp's records of digit d begin in the tile; those of the first warp begin at `at`.
template <int W>
__device__ __forceinline__ void start_of_warps(
    const u64 *words, unsigned short (*start)[DIGITS], int d, u32 at  // words [warps, DIGITS] of rank_digits
) {
    static_assert(W % 8 == 0, "the counts of the warps are summed eight at a time");
    for (int w = 0; w < W; w += 8) {  // eight loads in flight
        u32 warp_count[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) warp_count[k] = (u32)(words[(w + k) * DIGITS + d] >> 32);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            start[w + k][d] = at;
            at += warp_count[k];
        }
    }
}

#endif  // GPU3D_DIGITS_CUH
