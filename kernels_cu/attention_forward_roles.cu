// SPDX-License-Identifier: Apache-2.0
// Bucket attention, forward, for Hopper and 16-bit dtypes: what attention_forward.cu computes, by blocks that stay and
// warps that have roles.
//
// An item of work is up to OWN queries of a scope and head, 64 for each warpgroup of workers. All keys and values of
// the scope are streamed past them, a tile of VISIT rows at a time: S, P, O += P V. The items of a scope share its
// queries evenly. What a row sums, and in which order, depends on its scope alone.
//
// As in attention_forward.cu, a tile first uses the m of the tiles before. The lanes add up P, and check their sums
// against LIMIT. Only if one is beyond, m rises to the row's maximum, O and l are rescaled, and P is computed again.
//
// A block takes one item after another: the first by its index, others from a counter. One warp, the loader, is ahead
// of the workers by STAGES tiles, also into the next item, so no item begins with an empty pipeline. The TMA unit
// copies. While one warpgroup computes exponentials, others multiply.
//
// Milliseconds on an H200, bfloat16, 122,880 slots in scopes of 4096 and of 1024. In brackets: cuDNN, and what
// attention_forward.cu took before, in the same runs.
//   8 heads of D = 64    1.94, 0.58 (2.25, 0.61; 2.05, 0.64)
//   4 heads of D = 128   1.60, 0.47 (1.60, 0.45; 1.73, 0.62)
// At D = 32 this takes 1.50 and 0.46 ms instead of 1.52 and 0.49, but a training step of flash3d_46m takes 0.5 ms more:
// most of its layers have 352 items of 192 rows, 2.7 a multiprocessor. Blocks of 256 rows are 1.9 a multiprocessor.
//
// How D = 128 came about (scopes of 4096), each line with those above it:
//   four warps copy, 16 bytes a lane; tiles of 64                                        3.3
//   fewer instructions for a copy: there were 28                                         1.9
//   fences of copies in the loaders instead of the workers                               1.9
//   one warp and the TMA unit, boxes of 16 rows: issuing one takes up to 160 cycles      2.2
//   boxes as large as a bucket allows; tiles of 128; eight warps instead of twelve       1.6
// Tried and not better: warpgroups that take turns at the tensor cores (1.6); O += P V beside the next tile's
// exponentials (2.2); twelve warps and tiles of 64 (1.77); tiles of 96 (2.07 on a GPU where this took 1.70); queries in
// registers.

// gpu3d/cuda/attention.py passes all of these. The values here are for compiling the file by hand.
#ifndef D
#define D 64        // head dimension, padded with zeros on load: 64 or 128
#define ELEMENT 3   // 2 float16, 3 bfloat16
#define WGMMA 1     // always
#define VISIT 128   // keys and values in a tile
#define WORKERS 12  // warps
#define STAGES 3    // tiles of keys, and as many of values, in shared memory
#endif

#include "attention_roles.cuh"
#include "clouds.cuh"
#include "early.cuh"

#define LIMIT (ELEMENT == 2 ? 32768.0f : 0x1p60f)  // float16 holds 65504; a row has fewer than 2^31 keys
#define THREADS (128 + 32 * WORKERS)               // registers are divided by warpgroups, so the loader has one
#define OWN (16 * WORKERS)                         // queries of an item, at most
#define TILE (VISIT * D)                           // words

static_assert(VISIT % GROUP == 0 && (WORKERS == 8 || WORKERS == 12), "whole groups; registers are known for these");

struct Item {
    int scope;                // a row of the table; -1: nothing is left
    int head, first, last;    // positions of its queries
    int end, hole, hole_end;  // of struct Scope
};

struct Barriers {
    u64 item_ready[2], item_read[2];
    u64 queries_full[2], queries_empty[2];
    u64 keys_full[STAGES], keys_empty[STAGES];
    u64 values_full[STAGES], values_empty[STAGES];
};

// Takes the block's next item. A warp's lanes must all call this.
__device__ __forceinline__ Item take_item(
    bool first_one, int items, u32 *counter, const Clouds &clouds, const int *table, int width, const Divisors &divisors
) {
    for (;; first_one = false) {
        int ticket = blockIdx.x;
        if (!first_one) {
            if (items <= gridDim.x) return {-1};
            if ((threadIdx.x & 31) == 0) ticket = gridDim.x + atomicAdd(counter, 1);
            ticket = __shfl_sync(FULL, ticket, 0);
        }
        if (ticket >= items) return {-1};
        const int pair = divide(ticket, divisors.tiles), nth = ticket - pair * divisors.tiles.by;
        const int index = divide(pair, divisors.heads);
        const Scope scope = scope_at(clouds, table, width, index, divisors.size);
        const int tiles = (scope.end + 63) / 64, count = (tiles + OWN / 64 - 1) / (OWN / 64);
        if (nth >= count) continue;
        const int least = tiles / count, longer = tiles % count;  // so many items have one tile more
        return {
            index,
            pair - index * divisors.heads.by,
            (nth * least + min(nth, longer)) * 64,
            ((nth + 1) * least + min(nth + 1, longer)) * 64,
            scope.end,
            scope.hole,
            scope.hole_end
        };
    }
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_forward_roles(
    const __grid_constant__ Source q,       // [slots, heads, D]
    const __grid_constant__ Source k,       // [slots, heads, D]
    const __grid_constant__ Source v,       // [slots, heads, D]
    const __grid_constant__ Clouds clouds,  // tiles are buckets
    const int *table,                       // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,  // tiles: items of each scope and head
    int items,
    u32 *counter,            // 0; not used if there is a block for each item
    float scale_log2,        // scale * EXPONENT_UNIT, not 0
    void *__restrict__ out,  // [slots, heads, D]
    float *__restrict__ lse  // [slots, heads] natural logarithm, or null
) {
    start_early();
    extern __shared__ __align__(1024) u16 tiles[];  // STAGES of keys and values, then queries of two items
    __shared__ Barriers barriers;
    __shared__ Item taken[2];
    u16 *const queries = tiles + STAGES * 2 * TILE;
    const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x >> 5);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            initialize(barriers.item_ready[i], 1);
            initialize(barriers.item_read[i], WORKERS);
            initialize(barriers.queries_full[i], 1);
            initialize(barriers.queries_empty[i], WORKERS);
        }
        for (int i = 0; i < STAGES; ++i) {
            initialize(barriers.keys_full[i], 1);
            initialize(barriers.keys_empty[i], WORKERS);
            initialize(barriers.values_full[i], 1);
            initialize(barriers.values_empty[i], WORKERS);
        }
        fence_initialized();
    }
    __syncthreads();

    if (warp < 4) {  // ---- loader
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WORKERS == 8 ? 40 : 32));
        if (warp > 0) return;
        const auto take = [&](int nth) {
            const Item item = take_item(nth == 0, items, counter, clouds, table, width, divisors);
            wait(barriers.item_read[nth & 1], nth >> 1 & 1 ^ 1);
            if (lane == 0) taken[nth & 1] = item;
            arrive_as_warp(barriers.item_ready[nth & 1]);
        };
        take(0);
        int step = 0;
        for (int nth = 0;; ++nth) {
            const Item item = taken[nth & 1];
            if (item.scope < 0) return;
            const Scope scope = scope_of(item, table, width, divisors.size);
            const int rows = item.last - item.first;
            Groups groups = groups_from(scope, item.first, rows);
            wait(barriers.queries_empty[nth & 1], nth >> 1 & 1 ^ 1);
            load_rows(
                queries + (nth & 1) * OWN * D, OWN, q, item.head, groups, rows / GROUP, barriers.queries_full[nth & 1]
            );
            int tile = first_tile(scope);
            if (tile >= scope.end) take(nth + 1);
            while (tile < scope.end) {
                const int stage = step % STAGES, parity = step / STAGES & 1 ^ 1;
                u16 *const to = tiles + stage * 2 * TILE;
                groups = groups_from(scope, tile, VISIT);
                tile = next_tile(scope, tile);
                if (tile >= scope.end) take(nth + 1);  // while the workers still have enough to do
                wait(barriers.keys_empty[stage], parity);
                load_rows(to, VISIT, k, item.head, groups, VISIT / GROUP, barriers.keys_full[stage]);
                wait(barriers.values_empty[stage], parity);
                load_rows(to + TILE, VISIT, v, item.head, groups, VISIT / GROUP, barriers.values_full[stage]);
                ++step;
            }
        }
    }

    // ---- workers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WORKERS == 8 ? 232 : 160));
    const int warpgroup = uniform(threadIdx.x / 128 - 1), heads = divisors.heads.by;
    int step = 0;
    for (int nth = 0;; ++nth) {
        const Item item = read_item(taken, barriers.item_ready, barriers.item_read, nth);
        if (item.scope < 0) break;
        const Scope scope = scope_of(item, table, width, divisors.size);
        const int first = first_tile(scope);
        int tile = first;
        wait(barriers.queries_full[nth & 1], nth >> 1 & 1);
        if (item.first + warpgroup * 64 >= item.last) {  // no queries for this warpgroup
            for (; tile < scope.end; tile = next_tile(scope, tile), ++step) {
                const int stage = step % STAGES, parity = step / STAGES & 1;
                wait(barriers.keys_full[stage], parity);
                arrive_as_warp(barriers.keys_empty[stage]);
                wait(barriers.values_full[stage], parity);
                arrive_as_warp(barriers.values_empty[stage]);
            }
            arrive_as_warp(barriers.queries_empty[nth & 1]);
            continue;
        }
        const u64 own = operand<ROW>(queries + (nth & 1) * OWN * D + warpgroup * 64 * ROW, OWN);
        float S[VISIT / 8][4], O[D / 8][4];
        u32 P[VISIT / 16][4];
        float row_sum[2] = {0, 0}, row_max[2] = {-1e30f, -1e30f};  // finite, so that -inf minus it is -inf
#pragma unroll
        for (int n = 0; n < D / 8; ++n) O[n][0] = O[n][1] = O[n][2] = O[n][3] = 0;

        // Starts S of the tile in a stage.
        const auto multiply = [&](int stage) {
            const u64 keys = operand<ROW>(tiles + stage * 2 * TILE, VISIT);
            begin_products();
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
                multiply_step<0, 0>(
                    S, i, own + (i / 4 * OWN * ROW + i % 4 * 16) / 8, keys + (i / 4 * VISIT * ROW + i % 4 * 16) / 8
                );
            commit_products();
        };
        // Starts O += P V.
        const auto accumulate = [&](int stage) {
            const u64 values = operand<ROW>(tiles + stage * 2 * TILE + TILE, VISIT);
            begin_products();
#pragma unroll
            for (int i = 0; i < VISIT / 16; ++i) wgmma<1>(O, P[i], values + i * 16 * ROW / 8, 1);
            commit_products();
        };
        const auto raise_row_maxima = [&] {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float factor = raise_row_max(row_max[half], S, half, scale_log2, 0);
                row_sum[half] *= factor;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    O[n][2 * half] *= factor;
                    O[n][2 * half + 1] *= factor;
                }
            }
        };
        // Computes P with the present m, and the lane's sums of it. Returns whether one is out of range.
        const auto exponentiate = [&](float sum[2]) {
            sum[0] = sum[1] = 0;
#pragma unroll
            for (int n = 0; n < VISIT / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float one = exponential(S[n][2 * half], scale_log2, row_max[half]);
                    const float other = exponential(S[n][2 * half + 1], scale_log2, row_max[half]);
                    P[n / 2][n % 2 * 2 + half] = pack(one, other);
                    sum[half] += one + other;
                }
            const bool in_range = sum[0] <= LIMIT && sum[1] <= LIMIT;  // false for NaN
            return __builtin_expect(__any_sync(FULL, !in_range), 0);
        };
        if (tile < scope.end) {
            wait(barriers.keys_full[step % STAGES], step / STAGES & 1);
            multiply(step % STAGES);
            wait_for_products<0>();
            arrive_as_warp(barriers.keys_empty[step % STAGES]);
        }
        while (tile < scope.end) {  // S of the tile is there
            fence_product(S);
            fence_product(O);
            if (__builtin_expect(!whole_tile(scope, tile), 0)) mask(S, scope, tile, scale_log2);
            if (tile == first) raise_row_maxima();
            float sum[2];
            for (bool raised = false; exponentiate(sum) && !raised; raised = true) raise_row_maxima();
            row_sum[0] += sum[0];
            row_sum[1] += sum[1];
            const int stage = step % STAGES, parity = step / STAGES & 1;
            ++step;
            tile = next_tile(scope, tile);
            if (tile < scope.end) {
                const int next = step % STAGES;
                wait(barriers.keys_full[next], step / STAGES & 1);
                wait(barriers.values_full[stage], parity);
                multiply(next);
                accumulate(stage);
                wait_for_products<0>();
                arrive_as_warp(barriers.keys_empty[next]);
            } else {
                wait(barriers.values_full[stage], parity);
                accumulate(stage);
                wait_for_products<0>();
            }
            arrive_as_warp(barriers.values_empty[stage]);
        }
        arrive_as_warp(barriers.queries_empty[nth & 1]);
        fence_product(O);

        const int group = item.first + warpgroup * 64 + (warp & 3) * 16, position = group + lane / 4;
        const int slot = group < scope.end ? slot_at(scope, group) + lane / 4 : -1;
        bool has_point[2];
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_lanes<4>(row_sum[half]);
            has_point[half] = has_point_at(scope, position + 8 * half);
            factor[half] = __fdividef(1, sum);
            if (lse && slot >= 0 && (lane & 3) == 0)
                lse[(long long)(slot + 8 * half) * heads + item.head] =
                    has_point[half] ? fmaf(row_max[half], 1 / EXPONENT_UNIT, log2f(sum) * LN2) : -INFINITE;
        }
        const int dim = q.view.dim;
        store_rows({out, dim, heads * dim, dim}, item.head, slot, [&](int n, int i) {
            return has_point[i] ? pack(factor[i] * O[n][2 * i], factor[i] * O[n][2 * i + 1]) : 0;
        });
    }
}
