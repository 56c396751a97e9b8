// SPDX-License-Identifier: Apache-2.0
// The Lovasz extension of the Jaccard index (Berman, Triki and Blaschko 2018, Algorithm 1), for each class that a
// label names: the errors in descending order, ties by point index, and the derivative of the class's loss with
// respect to each of them.
//   1 lovasz_histogram                                how often each digit of each pass occurs in a class
//   2 lovasz_first, lovasz_pass (twice), lovasz_last  a stable radix sort of each class's keys (losses.cuh), 8 bits a
//                                                     pass; the last writes [is label << 31 | point]
//   3 lovasz_count                                    labels in each tile of the sorted points
//   4 lovasz_jaccard                                  the derivatives, back at their points
// A tile is TILE points of one class. Classes without a label are skipped: blocks of their tiles return.
//
// Let a class have G labels, and let I of them and B other points stand before or at a place of the order. The Jaccard
// loss of these is 1 - (G - I) / (G + B). Its difference between neighbouring places is 1 / (G + B) at a label, and
// (G - I) / ((G + B - 1) (G + B)) elsewhere: so it is computed, because the difference of two rounded losses would
// cancel.
//
// The sort is "onesweep" (Adinets and Merrill 2022), as in buckets_radix.cu: a block counts the digits of its tile,
// publishes the counts, looks back at what earlier tiles of the class have published, ranks its records and moves them.
// A record has 8 bytes: the key in its high half, and the point in its low half.

#define THREADS 512  // mirrored by gpu3d/cuda/losses.py, like the next
#define TILE 4096    // points a tile
#define ITEMS (TILE / THREADS)
#define WARPS (THREADS / 32)
#define PASSES 4  // mirrored by gpu3d/cuda/losses.py

#include "digits.cuh"
#include "losses.cuh"
#include "scan.cuh"
#include "warp.cuh"

static_assert(THREADS >= DIGITS, "one thread a digit");
static_assert(WARPS * DIGITS <= TILE, "the words of the ranking use the records' memory");

#define LABEL_BIT 0x80000000u

// The digit of a pass. The lowest bit of a key is not sorted by.
__device__ __forceinline__ u32 digit_of(u32 key, int pass) { return key >> 1 >> 8 * pass & (DIGITS - 1); }

// ---- 1 histogram ---------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void lovasz_histogram(
    const u32 *__restrict__ keys,    // [classes, points]
    const u32 *__restrict__ counts,  // [classes] labels
    int points,
    int tiles,                   // a class
    u32 *__restrict__ histogram  // [classes, PASSES, DIGITS] starts at 0
) {
    __shared__ u32 count[PASSES * DIGITS];
    const int c = blockIdx.x / tiles, first = (blockIdx.x - c * tiles) * TILE;
    if (!counts[c]) return;
    for (int i = threadIdx.x; i < PASSES * DIGITS; i += THREADS) count[i] = 0;
    __syncthreads();
    keys += (long long)c * points;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = first + k * THREADS + threadIdx.x;
        if (i >= points) continue;
        const u32 key = keys[i];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) atomicAdd(&count[pass * DIGITS + digit_of(key, pass)], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < PASSES * DIGITS; i += THREADS)
        // Integer sums are the same in any order.
        if (count[i]) atomicAdd(&histogram[(long long)c * PASSES * DIGITS + i], count[i]);
}

// ---- 2 first, pass, last -------------------------------------------------------------------------------------------

// One pass over the tile that the block draws. The three kernels below describe the parameters.
enum Role { FIRST, MIDDLE, LAST };

template <Role ROLE>
__device__ __forceinline__ void move_tile(
    const u32 *__restrict__ keys,
    const u64 *__restrict__ records_in,
    const u32 *__restrict__ histogram,
    const u32 *__restrict__ counts,
    int points,
    int tiles,
    int pass,
    u32 *__restrict__ ticket,
    u32 *__restrict__ published,
    u64 *__restrict__ records_out,
    u32 *__restrict__ sorted
) {
    __shared__ u64 record[TILE];
    __shared__ unsigned short start[WARPS][DIGITS];  // positions in the tile
    __shared__ u32 target[DIGITS];  // records of a digit; later the first one's target minus its position in the tile
    __shared__ int drawn;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Tiles are drawn in order, so every tile that the look-back waits for is running or done.
    if (threadIdx.x == 0) drawn = atomicAdd(&ticket[pass], 1);
    for (int i = threadIdx.x; i < WARPS * DIGITS; i += THREADS) record[i] = 0;
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) target[i] = 0;
    __syncthreads();
    const int c = drawn / tiles, tile = drawn - c * tiles;  // ranges [0, classes) and [0, tiles)
    if (!counts[c]) return;
    const long long plane = (long long)c * points;  // where the class's arrays begin
    const int first = tile * TILE, n = min(TILE, points - first);

    // Load. Warp w has records [w, w + 1) * 32 * ITEMS of the tile; item k of lane l is number 32 k + l of these.
    const int mine_first = warp * ITEMS * 32 + lane, mine_left = n - mine_first;  // item k exists if 32 k < mine_left
    u64 mine[ITEMS];
    u32 seat[ITEMS];  // rank among the warp's equal digits << 8 | digit
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        mine[k] = 0;
        if (32 * k >= mine_left) continue;
        const int at = first + mine_first + 32 * k;
        mine[k] = ROLE == FIRST ? (u64)keys[plane + at] << 32 | at : records_in[plane + at];
    }
    // Where each digit of the class begins. These loads and barriers overlap the records' loads.
    const int d = threadIdx.x;
    u32 unused;
    const u32 bin =
        scan_of_block<WARPS>(d < DIGITS ? histogram[((long long)c * PASSES + pass) * DIGITS + d] : 0, unused);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)  // the padding of the last tile ranks behind its records
        seat[k] = 32 * k < mine_left ? digit_of((u32)(mine[k] >> 32), pass) : DIGITS - 1;

    // Count, publish, look back, one thread a digit. This comes before the ranking, so that later tiles seldom wait.
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (32 * k < mine_left) atomicAdd(&target[seat[k]], 1);
    __syncthreads();
    volatile u32 *board = published + ((long long)pass * gridDim.x + (long long)c * tiles) * DIGITS;  // [tiles, DIGITS]
    const u32 own = d < DIGITS ? target[d] : 0;
    if (d < DIGITS) board[(long long)tile * DIGITS + d] = (tile == 0 ? STATE_SUM : STATE_OWN) | own;
    const u32 place = scan_of_block<WARPS>(own, unused);
    u32 before = 0;
    if (d < DIGITS && tile > 0) {
        before = look_back(board, 0, tile, d);
        board[(long long)tile * DIGITS + d] = STATE_SUM | (before + own);
    }

    rank_digits(record + warp * DIGITS, seat, lane);  // the words use the records' memory
    __syncthreads();
    if (d < DIGITS) {
        start_of_warps<WARPS>(record, start, d, place);
        target[d] = bin + before - place;
    }
    __syncthreads();

    // Collect the tile's records by digit in shared memory, so that equal digits are written side by side.
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (32 * k < mine_left) record[(seat[k] >> 8) + start[warp][seat[k] & (DIGITS - 1)]] = mine[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = k * THREADS + threadIdx.x;
        if (i >= n) continue;
        const u64 moving = record[i];
        const u32 key = (u32)(moving >> 32), at = i + target[digit_of(key, pass)];  // ranges [0, points)
        if (ROLE == LAST) sorted[plane + at] = (key & 1 ? LABEL_BIT : 0) | (u32)moving;
        else records_out[plane + at] = moving;
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void lovasz_first(
    const u32 *__restrict__ keys,       // [classes, points]
    const u32 *__restrict__ histogram,  // [classes, PASSES, DIGITS]
    const u32 *__restrict__ counts,     // [classes] labels
    int points,
    int tiles,                    // a class; the grid is classes * tiles
    u32 *__restrict__ ticket,     // [PASSES] starts at 0
    u32 *__restrict__ published,  // [PASSES, classes * tiles, DIGITS] starts at 0
    u64 *__restrict__ records     // [classes, points]
) {
    move_tile<FIRST>(keys, nullptr, histogram, counts, points, tiles, 0, ticket, published, records, nullptr);
}

extern "C" __global__ __launch_bounds__(THREADS) void lovasz_pass(
    const u64 *__restrict__ records_in,  // [classes, points]
    const u32 *__restrict__ histogram,   // [classes, PASSES, DIGITS]
    const u32 *__restrict__ counts,      // [classes] labels
    int points,
    int tiles,                     // a class
    int pass,                      // ranges [1, PASSES - 1)
    u32 *__restrict__ ticket,      // [PASSES] starts at 0
    u32 *__restrict__ published,   // [PASSES, classes * tiles, DIGITS] starts at 0
    u64 *__restrict__ records_out  // [classes, points]
) {
    move_tile<MIDDLE>(
        nullptr, records_in, histogram, counts, points, tiles, pass, ticket, published, records_out, nullptr
    );
}

extern "C" __global__ __launch_bounds__(THREADS) void lovasz_last(
    const u64 *__restrict__ records,    // [classes, points]
    const u32 *__restrict__ histogram,  // [classes, PASSES, DIGITS]
    const u32 *__restrict__ counts,     // [classes] labels
    int points,
    int tiles,                    // a class
    u32 *__restrict__ ticket,     // [PASSES] starts at 0
    u32 *__restrict__ published,  // [PASSES, classes * tiles, DIGITS] starts at 0
    u32 *__restrict__ sorted      // [classes, points]
) {
    move_tile<LAST>(nullptr, records, histogram, counts, points, tiles, PASSES - 1, ticket, published, nullptr, sorted);
}

// ---- 3 count, 4 jaccard --------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void lovasz_count(
    const u32 *__restrict__ sorted,  // [classes, points]
    const u32 *__restrict__ counts,  // [classes] labels
    int points,
    int tiles,                // a class
    u32 *__restrict__ labels  // [classes, tiles] labels among the points of a tile
) {
    const int c = blockIdx.x / tiles, first = (blockIdx.x - c * tiles) * TILE;
    if (!counts[c]) return;
    sorted += (long long)c * points;
    u32 word[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = first + k * THREADS + threadIdx.x;
        word[k] = i < points ? sorted[i] : 0;
    }
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) sum += word[k] >> 31;
    u32 all;
    scan_of_block<WARPS>(sum, all);
    if (threadIdx.x == 0) labels[blockIdx.x] = all;
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void lovasz_jaccard(
    const u32 *__restrict__ sorted,  // [classes, points]
    const u32 *__restrict__ counts,  // [classes] labels
    const u32 *__restrict__ labels,  // [classes, tiles]
    int points,
    int classes,
    int tiles,                   // a class
    float *__restrict__ jaccard  // [classes, points] written for the points that count
) {
    const int c = blockIdx.x / tiles, tile = blockIdx.x - c * tiles;
    const u32 G = counts[c];
    if (!G) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 valid = 0;
    for (int k = 0; k < classes; ++k) valid += counts[k];
    sorted += (long long)c * points;
    jaccard += (long long)c * points;

    // Warp w has places [w, w + 1) * 32 * ITEMS of the tile; item k of lane l is number 32 k + l of these.
    const int first = tile * TILE + warp * ITEMS * 32 + lane;
    u32 word[ITEMS], inside[ITEMS], sum = 0;  // labels of the warp up to and including this place
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) word[k] = first + 32 * k < points ? sorted[first + 32 * k] : 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const u32 mask = __ballot_sync(FULL, word[k] >> 31);
        inside[k] = sum + rank_in(mask, lane) + (word[k] >> 31);
        sum += __popc(mask);
    }
    u32 earlier = 0, of_tiles, of_tile;
    for (int t = threadIdx.x; t < tile; t += THREADS) earlier += labels[c * tiles + t];
    scan_of_block<WARPS>(earlier, of_tiles);
    // Lane 0 brings the warp's labels, so what comes before lane 0 are the labels of earlier warps.
    const u32 of_warps = __shfl_sync(FULL, scan_of_block<WARPS>(lane == 0 ? sum : 0, of_tile), 0);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const u32 place = first + 32 * k;
        if (place >= valid) continue;  // ignored points stand behind the others
        const u32 I = of_tiles + of_warps + inside[k];
        const float whole = (float)(G + (place + 1 - I));
        const bool is_label = word[k] & LABEL_BIT;
        jaccard[word[k] & ~LABEL_BIT] = is_label ? 1.0f / whole : (float)(G - I) / (whole - 1) / whole;
    }
}
