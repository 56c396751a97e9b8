// SPDX-License-Identifier: Apache-2.0
// Buckets of clouds beyond the reach of buckets_merge.cu: the same stable sort as six least-significant-digit passes.
//
// "Onesweep" (Adinets and Merrill 2022): each pass reads and writes every record once. A block ranks its tile by an 8-bit
// digit and learns where its digits go from the tiles before it, by looking back at what they published.
//   1 bounds      a block a group: partial bounds of its points
//   2 frames      a block a cloud: origin and cell of its voxels
//   3 histogram   a block a group: how often each digit of each pass occurs
//   4 pass 0..5   a block a tile: rank, look back, move; the last pass writes both permutations
//
// Bytes a point: the key is computed from the point in pass 0 and carried in 8 bytes from then on, since a digit that has
// been sorted by is dropped: 40 bits of key and 24 of point index. A cloud of more than 2^24 points ("wide") carries its
// 32-bit index alone through pass 0 and computes the key once more in pass 1, which leaves 32 bits of key.

#ifndef TILE
#define TILE 4096           // points a tile
#endif
#ifndef THREADS
#define THREADS 512
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
#define ITEMS (TILE / THREADS)
#define WARPS (THREADS / 32)
#define DIGITS 256
#define PASSES 6
#ifndef WINDOW
#define WINDOW 4            // tiles looked back at together: their loads overlap
#endif

#include "buckets.cuh"

static_assert(TILE % THREADS == 0 && THREADS >= DIGITS, "a thread a digit, and whole items a thread");

// What a tile says of each digit: nothing yet, its own count, or the count of its cloud up to and including itself.
#define COUNT_BITS 30
#define COUNT ((1u << COUNT_BITS) - 1)
#define STATE_OWN (1u << COUNT_BITS)
#define STATE_SUM (2u << COUNT_BITS)

// ---- 1 bounds ------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void radix_bounds(
    const point_t *__restrict__ points,         // [N, 3]
    const __grid_constant__ Clouds clouds,
    int group_points,                           // points a group
    coord_t *__restrict__ bounds)               // [groups, 6]
{
    const int group = blockIdx.x;               // ranges [0, groups)
    const int b = cloud_of<&Cloud::group>(clouds, group);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.point + (group - cloud.group) * group_points;
    write_bounds(points, first, min(next.point - first, group_points) + first, bounds + 6 * (size_t)group);
}

// ---- 2 frames ------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void radix_frames(
    const coord_t *__restrict__ bounds,         // [groups, 6]
    const __grid_constant__ Clouds clouds,
    float voxel_size,
    Frame *__restrict__ frames)                 // [clouds]
{
    const int b = blockIdx.x;                   // ranges [0, clouds)
    const Cloud *rows = rows_of(clouds);
    const Frame frame = frame_from_rows(bounds, rows[b].group, rows[b + 1].group, voxel_size);
    if (threadIdx.x == 0) frames[b] = frame;
}

// ---- keys: computed from the points, or given ----------------------------------------------------------------------

#if KEY == KEY_GIVEN
#define KEYS const int *__restrict__ given                                      // [N] bucket, counted over the batch
#define KEY_OF(i) ((u64)given[i])
#else
#define KEYS const point_t *__restrict__ points, const Frame *__restrict__ frames   // [N, 3], [clouds]
#define KEY_OF(i) key_of_point(points, i, frame, buckets)
#endif

// ---- 3 histogram ---------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void radix_histogram(
    KEYS,
    const __grid_constant__ Clouds clouds,
    int group_points,
    u32 *__restrict__ histogram)                // [clouds, PASSES, DIGITS], zero before
{
    __shared__ u32 count[PASSES * DIGITS];
    const int group = blockIdx.x;               // ranges [0, groups)
    const int b = cloud_of<&Cloud::group>(clouds, group);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.point + (group - cloud.group) * group_points;
    const int n = min(next.point - first, group_points);
#if KEY != KEY_GIVEN
    const u32 buckets = (next.slot - cloud.slot) / clouds.bucket_size;
    const Frame frame = frames[b];
#endif
    for (int i = threadIdx.x; i < PASSES * DIGITS; i += THREADS) count[i] = 0;
    __syncthreads();
    for (int base = 0; base < n; base += THREADS) {         // whole warps stay together for the vote
        const int i = base + threadIdx.x;
        const u64 key = i < n ? KEY_OF(first + i) : 0;
        const u32 active = __ballot_sync(FULL, i < n);
        if (i >= n) continue;
        // Where a warp agrees on a digit, its lanes' atomics on one address would go one by one: the leader adds for all.
        // High digits often agree, low ones only where points coincide.
        const int leader = __ffs(active) - 1;
        const bool leads = (threadIdx.x & 31) == leader;
        const u64 first_key = __shfl_sync(active, key, leader);
        const bool same_low = __all_sync(active, (u32)(key & 0xffffff) == (u32)(first_key & 0xffffff));
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const u32 digit = key >> 8 * pass & (DIGITS - 1);
            const bool same = pass < 3 ? same_low : __all_sync(active, digit == (u32)(first_key >> 8 * pass & (DIGITS - 1)));
            if (!same) atomicAdd(&count[pass * DIGITS + digit], 1);
            else if (leads) atomicAdd(&count[pass * DIGITS + digit], __popc(active));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < PASSES * DIGITS; i += THREADS)
        if (count[i]) atomicAdd(&histogram[(size_t)b * PASSES * DIGITS + i], count[i]);     // integers: any order, one sum
}

// ---- 4 pass --------------------------------------------------------------------------------------------------------

// Exclusive scan over the first DIGITS threads; every thread of the block must call it.
__device__ u32 scan_digits(u32 x, u32 *warp_sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 scan = x;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const u32 left = __shfl_up_sync(FULL, scan, step);
        if (lane >= step) scan += left;
    }
    __syncthreads();                            // warp_sums may still be read from the call before
    if (lane == 31) warp_sums[warp] = scan;
    __syncthreads();
    u32 before = 0;
    for (int w = 0; w < min(warp, DIGITS / 32); ++w) before += warp_sums[w];
    return before + scan - x;
}

// Lanes of the warp whose digit equals mine.
__device__ __forceinline__ u32 same_digit(u32 digit) {
    u32 same = FULL;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
        const u32 set = __ballot_sync(FULL, digit >> bit & 1);
        same &= digit >> bit & 1 ? set : ~set;
    }
    return same;
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void radix_pass(
    KEYS,
    const u64 *__restrict__ records_in,         // [N], unread in pass 0
    const u32 *__restrict__ histogram,          // [clouds, PASSES, DIGITS]
    const __grid_constant__ Clouds clouds,
    int pass,                                   // ranges [0, PASSES)
    int wide,                                   // 0: indices of 24 bits, 1: of 32
    u32 *__restrict__ ticket,                   // [PASSES], zero before
    u32 *__restrict__ published,                // [PASSES, tiles, DIGITS], zero before
    u64 *__restrict__ records_out,              // [N], unwritten in the last pass
    int *__restrict__ slot_to_point,            // [slots], written in the last pass
    int *__restrict__ point_to_slot,            // [N], written in the last pass
    int *__restrict__ moved)                    // [] set to 0 in the last pass, or null
{
    __shared__ u64 record[TILE];
    __shared__ unsigned char digit_of[TILE];
    __shared__ unsigned short count[WARPS][DIGITS];         // a warp's count of a digit, then what stands before it
    __shared__ u32 target[DIGITS];              // where the tile's first record of a digit goes, minus its place in the tile
    __shared__ u32 warp_sums[WARPS];
    __shared__ int drawn;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Tiles are drawn in order, so that every tile looked back at is running or done.
    if (threadIdx.x == 0) drawn = atomicAdd(&ticket[pass], 1);
    if (moved && pass == PASSES - 1 && blockIdx.x == 0 && threadIdx.x == 0) *moved = 0;
    for (int i = threadIdx.x; i < WARPS * DIGITS; i += THREADS) count[0][i] = 0;
    __syncthreads();
    const int tile = drawn;                     // ranges [0, tiles)
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = (tile - cloud.tile) * TILE;           // of the cloud's points
    const int n = min(TILE, next.point - cloud.point - first);
    const int index_bits = wide ? 32 : 24;
#if KEY != KEY_GIVEN
    const u32 buckets = (next.slot - cloud.slot) / clouds.bucket_size;
    const Frame frame = frames[b];
#endif

    // Load. Warp w holds records [w, w + 1) * 32 * ITEMS of the tile, item k of lane l the 32 k + l-th of them.
    u64 mine[ITEMS];
    u32 seat[ITEMS];                            // place among equal digits of the warp << 8 | digit
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = (warp * ITEMS + k) * 32 + lane;
        mine[k] = 0;
        if (i >= n) continue;
        if (pass == 0) mine[k] = first + i;
        else mine[k] = records_in[cloud.point + first + i];
    }
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = (warp * ITEMS + k) * 32 + lane;
        seat[k] = DIGITS - 1;                              // the padding of the last tile ranks behind its records
        if (i >= n) continue;
        if (pass <= wide) {                                 // the record is the index in its cloud
            const u64 key = KEY_OF(cloud.point + (int)mine[k]);
            seat[k] = key >> 8 * pass & (DIGITS - 1);
            if (pass == wide) mine[k] |= key >> 8 * (pass + 1) << index_bits;
        } else {
            seat[k] = mine[k] >> index_bits + 8 * (pass - wide - 1) & (DIGITS - 1);
        }
    }

    // Where the cloud's digits begin; its loads and barriers overlap the records' loads.
    const int d = threadIdx.x;
    volatile u32 *board = published + (size_t)pass * rows_of(clouds)[clouds.count].tile * DIGITS;
    const u32 bin = scan_digits(d < DIGITS ? histogram[((size_t)b * PASSES + pass) * DIGITS + d] : 0, warp_sums);

    // Rank inside the warp, in record order.
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const u32 digit = seat[k], same = same_digit(digit), earlier = count[warp][digit];
        __syncwarp();
        if (lane == __ffs(same) - 1) count[warp][digit] = earlier + __popc(same);
        __syncwarp();
        seat[k] |= earlier + __popc(same & (1u << lane) - 1) << 8;
    }
    __syncthreads();

    // A thread a digit: sum over the warps, publish, scan over the digits, look back.
    u32 own = 0, warp_count[WARPS];
    if (d < DIGITS) {
#pragma unroll
        for (int w = 0; w < WARPS; ++w) warp_count[w] = count[w][d];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) own += warp_count[w];
        if (d == DIGITS - 1) own -= TILE - n;               // the padding
        board[(size_t)tile * DIGITS + d] = (tile == cloud.tile ? STATE_SUM : STATE_OWN) | own;
    }
    const u32 place = scan_digits(d < DIGITS ? own : 0, warp_sums);
    if (d < DIGITS) {
        u32 at = place;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) { count[w][d] = at; at += warp_count[w]; }
        u32 before = 0;
        for (int t = tile - 1; t >= cloud.tile;) {
            u32 word[WINDOW];
#pragma unroll
            for (int k = 0; k < WINDOW; ++k) word[k] = t - k >= cloud.tile ? board[(size_t)(t - k) * DIGITS + d] : 0;
#pragma unroll
            for (int k = 0; k < WINDOW; ++k) {
                if (!(word[k] >> COUNT_BITS)) break;        // not published yet: ask again
                before += word[k] & COUNT;
                --t;
                if (word[k] & STATE_SUM) { t = -1; break; }
            }
        }
        if (tile != cloud.tile) board[(size_t)tile * DIGITS + d] = STATE_SUM | (before + own);
        target[d] = bin + before - place;
    }
    __syncthreads();

    // Gather the tile's records by digit in shared memory, so that equal digits leave side by side.
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if ((warp * ITEMS + k) * 32 + lane < n) {
            const u32 digit = seat[k] & (DIGITS - 1), place = (seat[k] >> 8) + count[warp][digit];
            record[place] = mine[k];
            digit_of[place] = digit;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const u32 at = i + target[digit_of[i]];             // ranges [0, points of the cloud)
        if (pass < PASSES - 1) {
            records_out[cloud.point + at] = record[i];
        } else {
            const int p = cloud.point + (int)(record[i] & ((1ull << index_bits) - 1));
            slot_to_point[cloud.slot + at] = p;
            point_to_slot[p] = cloud.slot + at;
        }
    }
    if (pass == PASSES - 1 && tile == next.tile - 1)        // padding stands at the end of the cloud's last bucket
        for (int slot = cloud.slot + next.point - cloud.point + threadIdx.x; slot < next.slot; slot += THREADS)
            slot_to_point[slot] = -1;
}
