// SPDX-License-Identifier: Apache-2.0
// Bucket attention, backward in one pass, for Hopper and 16-bit dtypes: five products instead of the seven of
// attention_dq.cu and attention_dkdv.cu, and every exponential once. The order of all sums is fixed.
//
//   delta = sum(dO * O)    P = exp(scale Q K^T - lse)    dS = P * (dO V^T - delta)
//   dV = P^T dO            dK = scale * dS^T Q           dQ = scale * dS K
//
// A pair is a scope and a head. An item of work is KEYS keys of a pair: all queries of the scope are streamed past
// them, a tile of VISIT queries at a time. Sums of dK and dV stay in registers. A tile's part of dQ is added by bulk
// reductions to float32 sums in global memory. Few pairs are worked on at a time, so their sums stay in L2.
//
// An item waits with a tile until the item of the keys before it has added to that tile. So the items of a pair follow
// each other through its tiles, and a row of dQ is summed in the order of the keys. Blocks take items in ascending
// order from a counter, so an item waits only for items that were taken earlier: blocks cannot wait in a circle,
// however few of them run at a time. What a row sums, and in which order, depends on its scope alone.
//
// The warps of a block have three roles:
// - Eight workers compute all products, in two halves of four warps, each with half of the keys. Registers hold S and
//   dP transposed: a row is a key. So P^T and dS^T are left operands as they are. dS also goes to shared memory,
//   because a row of dQ is a sum over the keys of both halves. dQ follows one tile later, so the halves need not run in
//   step.
// - An adder waits for the item's turn and adds a tile of dQ.
// - A loader takes the block's next item, and loads its keys and values and, two ahead, tiles of queries. A second one
//   loads lse and delta.
//
// attention_delta runs before: delta, and zeros for the counters. attention_round runs after: dQ from its sums.
//
// Milliseconds of all three on an H200, bfloat16, 122,880 slots in scopes of 4096 and of 1024. In brackets: the two
// kernels with seven products, in the same runs.
//   8 heads of D = 64   5.5, 1.69 (7.7, 2.40)        4 heads of D = 128   5.4, 1.56 (6.8, 2.25)
// D = 32 gains 2 and 11 %, but a training step of flash3d_46m with 34,688 points takes 17.0 instead of 15.0 ms: there
// are too few items of 128 keys, and they follow each other. At D = 16 two blocks would have to share a multiprocessor,
// and their registers do not suffice.
//
// How this came about (D = 64 | 128, scopes of 4096), each line with those above it:
//   dQ of a tile in the same step as its dS; items pair by pair             7.2 | 6.4
//   dQ one tile later                                                      7.4 | 7.1
//   several pairs side by side: items no longer wait for their turns       5.7 | 6.2   (without any order: 5.6 | 6.2)
//   slots looked up before a stage is free; dQ rounded without conflicts   5.6 | 5.8
//   loaders with fewer instructions; fences in loaders, not in workers     5.6 | 5.4   (as fast: the TMA unit instead)
// A step of D = 128 takes twice as long as its products or its shared memory need (1.8 GHz).
// Tried and not better: halves that take turns at the tensor cores (6.1 | 6.6); a start of the second half after the
// first; S of the next tile begun before this one ends, for which ptxas runs out of registers or serializes all
// products; for D = 128 tiles of 80 queries, with which registers spill (5.7, but 1.68 in scopes of 1024).

// gpu3d/cuda/attention.py passes all of these. The values here are for compiling the file by hand.
#ifndef D
#define D 64       // head dimension, padded with zeros on load: 64 or 128
#define ELEMENT 3  // 2 float16, 3 bfloat16
#define WGMMA 1    // always
#define VISIT 128  // queries in a tile
#endif

#include "attention_roles.cuh"
#include "clouds.cuh"

#define KEYS 128   // keys of an item; mirrored by gpu3d/cuda/attention.py, like THREADS, GROUP and those of delta
#define STAGES 2   // tiles of queries in shared memory
#define WORKERS 8  // warps
#define THREADS 384

static_assert(VISIT % GROUP == 0 && (D == 128 || (D == 64 && VISIT == 128)), "a half has 64 rows or columns of dQ");

// Shared memory, in 16-bit words. It holds the keys of two items, the values of one, STAGES tiles of Q and of dO, dS of
// two tiles, and a tile of dQ: _one_pass_kernels in gpu3d/cuda/attention.py counts the same.
#define ALL_KEYS (KEYS * D)
#define TILE (VISIT * D)
#define DS_WORDS (VISIT * KEYS)

// The order of items: `side` pairs of a scope and a head are worked on side by side. If a pair's items were all taken
// at once, most would wait: each can begin only a little later than the one before.
struct Schedule {
    int pairs;
    Divisor side;
    Divisor set;  // items of `side` pairs
};

struct Item {
    int scope;  // a row of the table; -1: nothing is left
    int head, first;
    int end, hole, hole_end;  // of struct Scope
    int number;               // of the item: where its progress is
    int before;               // the number of the item that adds to dQ before this one, or -1
    bool empty;               // all keys are padding
};

struct Barriers {
    u64 item_ready[2], item_read[2];
    u64 full[STAGES], empty[STAGES];  // tiles of queries
    u64 keys_full[2], keys_empty[2];
    u64 values_full, values_empty;
    u64 ds_full[2], ds_empty[2];
    u64 dq_full, dq_empty;
};

// ---- items ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_empty(const Scope &scope, int first) {
    return first >= scope.hole && min(first + KEYS, scope.end) <= scope.hole_end;
}

// Takes the next item. A warp's lanes must all call this.
__device__ __forceinline__ Item take_item(
    u32 *counter, const Schedule &schedule, const Clouds &clouds, const int *table, int width, const Divisors &divisors
) {
    for (;;) {
        int ticket = 0;
        if ((threadIdx.x & 31) == 0) ticket = atomicAdd(counter, 1);
        ticket = __shfl_sync(FULL, ticket, 0);
        const int set = divide(ticket, schedule.set), of_set = ticket - set * schedule.set.by;
        const int nth = divide(of_set, schedule.side), pair = set * schedule.side.by + of_set - nth * schedule.side.by;
        if (set * schedule.side.by >= schedule.pairs) return {-1};
        if (pair >= schedule.pairs) continue;
        const int index = divide(pair, divisors.heads), first = nth * KEYS;
        const Scope scope = scope_at(clouds, table, width, index, divisors.size);
        if (first >= scope.end) continue;
        int before = nth - 1;
        if (before >= 0 && is_empty(scope, before * KEYS)) before = (scope.hole - 1) / KEYS;
        const int of_pair = pair * divisors.tiles.by;
        return {
            index,
            pair - index * divisors.heads.by,
            first,
            scope.end,
            scope.hole,
            scope.hole_end,
            of_pair + nth,
            before < 0 ? -1 : of_pair + before,
            is_empty(scope, first)
        };
    }
}

// ---- loaders -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_4_bytes(void *to, const void *from, bool loads) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(address(to)), "l"(from), "r"(loads ? 4 : 0)
                 : "memory");
}

// ---- workers -------------------------------------------------------------------------------------------------------

// Transposes an 8 x 8 matrix of 16-bit numbers, of which a lane has row lane / 4 and columns 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ u32 transposed(u32 word) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(word));
    return word;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS, 1) void attention_backward(
    const __grid_constant__ Source dout,    // [slots, heads, D]
    const __grid_constant__ Source q,       // [slots, heads, D]
    const __grid_constant__ Source k,       // [slots, heads, D]
    const __grid_constant__ Source v,       // [slots, heads, D]
    const float *__restrict__ lse,          // [slots, heads]
    const float *__restrict__ delta,        // [slots, heads]
    const __grid_constant__ Clouds clouds,  // tiles are buckets
    const int *__restrict__ table,          // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,  // tiles: items of each scope and head
    const __grid_constant__ Schedule schedule,
    float scale_log2,  // scale * EXPONENT_UNIT, not 0
    float scale,
    u32 *counters,                    // [1 + items]: the next item, and the tiles of dQ that each item has added to
    float *dq_sums,                   // [slots / GROUP, heads, GROUP * D], as attention_round reads them
    const __grid_constant__ View dk,  // [slots, heads, D]
    void *__restrict__ dv             // [slots, heads, D], with the strides of dk
) {
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ __align__(16) float stats[STAGES][2][VISIT];  // lse and delta
    __shared__ Barriers barriers;
    __shared__ Item taken[2];
    u16 *const keys = shared, *const values = keys + 2 * ALL_KEYS,
               *const tiles = values + ALL_KEYS;  // Q, dO of each stage
    u16 *const ds_tile = tiles + STAGES * 2 * TILE;
    float4 *const dq_tile = (float4 *)(ds_tile + 2 * DS_WORDS);
    const int heads = divisors.heads.by, lane = threadIdx.x & 31, warp = uniform(threadIdx.x >> 5);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            initialize(barriers.item_ready[i], 1);
            initialize(barriers.item_read[i], 1 + 1 + WORKERS);  // the other loader, the adder, the workers
        }
        for (int i = 0; i < STAGES; ++i) {
            initialize(barriers.full[i], 3);  // queries, dO, lse and delta
            initialize(barriers.empty[i], WORKERS);
        }
        for (int i = 0; i < 2; ++i) {
            initialize(barriers.keys_full[i], 1);
            initialize(barriers.keys_empty[i], WORKERS);
            initialize(barriers.ds_full[i], WORKERS);
            initialize(barriers.ds_empty[i], WORKERS);
        }
        initialize(barriers.values_full, 1);
        initialize(barriers.values_empty, WORKERS);
        initialize(barriers.dq_full, WORKERS);
        initialize(barriers.dq_empty, 1);
        fence_initialized();
    }
    __syncthreads();

    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 1) {  // ---- loader
            int step = 0, loaded = 0;
            for (int nth = 0;; ++nth) {
                const Item item = take_item(counters, schedule, clouds, table, width, divisors);
                wait(barriers.item_read[nth & 1], nth >> 1 & 1 ^ 1);
                if (lane == 0) taken[nth & 1] = item;
                arrive_as_warp(barriers.item_ready[nth & 1]);
                if (item.scope < 0) break;
                const Scope scope = scope_of(item, table, width, divisors.size);
                const int first = item.empty ? scope.end : first_tile(scope);
                for (int tile = first; tile < scope.end; tile = next_tile(scope, tile), ++step) {
                    const int stage = step % STAGES;
                    const Groups groups = groups_from(scope, tile, VISIT);
                    u16 *const to = tiles + stage * 2 * TILE;
                    wait(barriers.empty[stage], step / STAGES & 1 ^ 1);
                    load_rows(to, VISIT, q, item.head, groups, VISIT / GROUP, barriers.full[stage]);
                    load_rows(to + TILE, VISIT, dout, item.head, groups, VISIT / GROUP, barriers.full[stage]);
                    if (tile != first) continue;
                    const Groups own = groups_from(scope, item.first, KEYS);
                    wait(barriers.keys_empty[loaded % 2], loaded / 2 & 1 ^ 1);
                    load_rows(
                        keys + loaded % 2 * ALL_KEYS, KEYS, k, item.head, own, KEYS / GROUP,
                        barriers.keys_full[loaded % 2]
                    );
                    wait(barriers.values_empty, loaded & 1 ^ 1);
                    load_rows(values, KEYS, v, item.head, own, KEYS / GROUP, barriers.values_full);
                    ++loaded;
                }
            }
        } else if (warp == 2) {  // ---- loader of lse and delta
            // compute-sanitizer's racecheck reports these words: it counts a barrier for the one lane that arrives, and
            // not for the others, which __syncwarp has ordered before it.
            int step = 0;
            for (int nth = 0;; ++nth) {
                const Item item = read_item(taken, barriers.item_ready, barriers.item_read, nth);
                if (item.scope < 0) break;
                const Scope scope = scope_of(item, table, width, divisors.size);
                for (int tile = item.empty ? scope.end : first_tile(scope); tile < scope.end;
                     tile = next_tile(scope, tile), ++step) {
                    const int stage = step % STAGES;
                    const Groups groups = groups_from(scope, tile, VISIT);
                    wait(barriers.empty[stage], step / STAGES & 1 ^ 1);
#pragma unroll
                    for (int row = lane; row < VISIT; row += 32) {
                        const Groups group = {
                            __shfl_sync(FULL, groups.slot, row / GROUP), __shfl_sync(FULL, groups.points, row / GROUP)
                        };
                        const int r = row % GROUP;
                        const long long at = (long long)(group.slot + r) * heads + item.head;
                        copy_4_bytes(&stats[stage][0][row], lse + at, group.points >> r & 1);
                        copy_4_bytes(&stats[stage][1][row], delta + at, group.points >> r & 1);
                    }
                    finish_copies();
                    arrive_as_warp(barriers.full[stage]);
                }
            }
        } else if (warp == 0) {  // ---- adder
            int step = 0;
            for (int nth = 0;; ++nth) {
                const Item item = read_item(taken, barriers.item_ready, barriers.item_read, nth);
                if (item.scope < 0) break;
                const Scope scope = scope_of(item, table, width, divisors.size);
                u32 done = 0, seen = 0;
                for (int tile = item.empty ? scope.end : first_tile(scope); tile < scope.end;
                     tile = next_tile(scope, tile), ++step) {
                    const int position = tile + lane * GROUP;
                    const bool adds = lane < VISIT / GROUP && position < scope.end;
                    const int slot = adds ? slot_at(scope, position) : 0;
                    float *const to = dq_sums + ((size_t)(slot / GROUP) * heads + item.head) * (GROUP * D);
                    const u32 from = address(dq_tile + lane * (GROUP * D / 4));
                    while (item.before >= 0 && seen <= done)
                        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                                     : "=r"(seen)
                                     : "l"(counters + 1 + item.before)
                                     : "memory");
                    wait(barriers.dq_full, step & 1);
                    fence_all();
                    if (adds) {
                        if (item.before < 0)
                            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                                         "r"(from), "n"(GROUP * D * 4)
                                         : "memory");
                        else
                            asm volatile(
                                "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                                "r"(from), "n"(GROUP * D * 4)
                                : "memory"
                            );
                    }
                    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
                    arrive_as_warp(barriers.dq_empty);
                    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
                    fence_all();
                    __syncwarp();
                    ++done;
                    if (lane == 0)
                        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counters + 1 + item.number), "r"(done)
                                     : "memory");
                }
            }
        }
        return;
    }

    // ---- workers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int worker = threadIdx.x - 128, half = uniform(worker / 128), warp_of_half = warp & 3;
    // Where this lane's row of the four 8 x 8 matrices goes that hold dS of 16 keys and queries.
    const int ds_row = (lane >> 4) * 8 + (lane & 7), ds_part = warp_of_half * 2 + (lane >> 3 & 1);
    const u32 ds_to = address(ds_tile + half * VISIT * 64 + ds_row * 64 + (ds_part ^ lane & 7) * 8);
    const u64 own_values = operand<ROW>(values + half * 64 * ROW, KEYS);
    int step = 0, loaded = 0;

    // Starts X = own rows * tile^T: S^T or dP^T.
    const auto multiply = [&](float (&X)[VISIT / 8][4], u64 own, const u16 *tile) {
        const u64 right = operand<ROW>(tile, VISIT);
        begin_products();
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
            multiply_step<0, 0>(
                X, i, own + (i / 4 * KEYS * ROW + i % 4 * 16) / 8, right + (i / 4 * VISIT * ROW + i % 4 * 16) / 8
            );
        commit_products();
    };
    // Starts sums += left * tile: dV or dK.
    const auto accumulate = [&](float (&sums)[D / 8][4], const u32(&left)[VISIT / 16][4], const u16 *tile) {
        const u64 right = operand<ROW>(tile, VISIT);
#pragma unroll
        for (int i = 0; i < VISIT / 16; ++i) wgmma<1>(sums, left[i], right + i * 16 * ROW / 8, 1);
    };

    for (int nth = 0;; ++nth) {
        const Item &item = taken[nth & 1];  // in shared memory, to spare registers
        wait(barriers.item_ready[nth & 1], nth >> 1 & 1);
        if (item.scope < 0) break;
        const auto scope = [&] { return scope_of(item, table, width, divisors.size); };
        const auto own_position = [&] { return item.first + half * 64 + warp_of_half * 16 + lane / 4; };
        const auto store = [&](void *gradient, const float (&sums)[D / 8][4], float factor) {
            const int position = own_position(), group = position - lane / 4;
            const int slot = group < item.end ? slot_at(scope(), group) + lane / 4 : -1;
            const bool has_point[2] = {has_point_at(scope(), position), has_point_at(scope(), position + 8)};
            store_rows({gradient, dk.head, dk.row, q.view.dim}, item.head, slot, [&](int n, int i) {
                return has_point[i] ? pack(factor * sums[n][2 * i], factor * sums[n][2 * i + 1]) : 0;
            });
        };
        if (item.empty) {
            const float nothing[D / 8][4] = {};
            store(dk.data, nothing, 0);
            store(dv, nothing, 0);
            arrive_as_warp(barriers.item_read[nth & 1]);
            continue;
        }
        const bool has_key[2] = {has_point_at(scope(), own_position()), has_point_at(scope(), own_position() + 8)};
        const bool all_keys = __all_sync(FULL, has_key[0] & has_key[1]);
        float S[VISIT / 8][4], dP[VISIT / 8][4], dK[D / 8][4], dV[D / 8][4];
#if D == 128
        float dQ[VISIT / 8][4];  // transposed: a half has 64 of its columns
#else
        float dQ[D / 8][4];  // a half has 64 of its rows
#endif
        u32 P[VISIT / 16][4], dS[VISIT / 16][4];
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dK[n][e] = dV[n][e] = 0;
        const u16 *const item_keys = keys + loaded % 2 * ALL_KEYS;
        const u64 own_keys = operand<ROW>(item_keys + half * 64 * ROW, KEYS);
        // Starts dQ of the tile that was step `step`.
        const auto multiply_dq = [&](int step) {
            const u16 *const ds = ds_tile + (step & 1) * DS_WORDS;
            begin_products();
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i) {
#if D == 128
                multiply_step<0, 1>(
                    dQ, i, operand<64>(item_keys + half * KEYS * 64, KEYS) + i * 16 * 64 / 8,
                    operand<64>(ds, VISIT) + (i / 4 * VISIT * 64 + i % 4 * 16) / 8
                );
#else
                multiply_step<1, 0>(
                    dQ, i, operand<64>(ds + half * 64 * 64, VISIT) + (i / 4 * VISIT * 64 + i % 4 * 16) / 8,
                    operand<ROW>(item_keys, KEYS) + i * 16 * ROW / 8
                );
#endif
            }
            commit_products();
        };
        const auto store_dq = [&](int step) {
            fence_product(dQ);
            arrive_as_warp(barriers.ds_empty[step & 1]);
            wait(barriers.dq_empty, step & 1 ^ 1);
#if D == 128
            float4 *const to = dq_tile + worker;
            constexpr int STRIDE = 256;
#else
            float4 *const to = dq_tile + (half * 4 + warp_of_half) * (D / 8 * 32) + lane;
            constexpr int STRIDE = 32;
#endif
#pragma unroll
            for (int n = 0; n < sizeof(dQ) / 16; ++n) to[n * STRIDE] = {dQ[n][0], dQ[n][1], dQ[n][2], dQ[n][3]};
            fence_shared();
            arrive_as_warp(barriers.dq_full);
        };
        wait(barriers.keys_full[loaded % 2], loaded / 2 & 1);
        wait(barriers.values_full, loaded & 1);
        const int first = first_tile(scope());
        for (int tile = first; tile < item.end; tile = next_tile(scope(), tile), ++step) {
            const int stage = step % STAGES;
            const u16 *const queries = tiles + stage * 2 * TILE, *const douts = queries + TILE;
            wait(barriers.full[stage], step / STAGES & 1);
            multiply(S, own_keys, queries);
            multiply(dP, own_values, douts);
            wait_for_products<1>();
            fence_product(S);
#pragma unroll
            for (int n = 0; n < VISIT / 8; ++n) {
                const float2 shift = *(const float2 *)&stats[stage][0][n * 8 + (lane & 3) * 2];
                const float shifts[2] = {shift.x * EXPONENT_UNIT, shift.y * EXPONENT_UNIT};
#pragma unroll
                for (int e = 0; e < 4; ++e) S[n][e] = exponential(S[n][e], scale_log2, shifts[e % 2]);
            }
            if (!all_keys)
#pragma unroll
                for (int n = 0; n < VISIT / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        if (!has_key[e / 2]) S[n][e] = 0;
            wait_for_products<0>();
            fence_product(dP);
#pragma unroll
            for (int n = 0; n < VISIT / 8; ++n) {
                const float2 shift = *(const float2 *)&stats[stage][1][n * 8 + (lane & 3) * 2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    P[n / 2][n % 2 * 2 + i] = pack(S[n][2 * i], S[n][2 * i + 1]);
                    dS[n / 2][n % 2 * 2 + i] =
                        pack(S[n][2 * i] * (dP[n][2 * i] - shift.x), S[n][2 * i + 1] * (dP[n][2 * i + 1] - shift.y));
                }
            }
            begin_products();
            accumulate(dV, P, douts);
            accumulate(dK, dS, queries);
            commit_products();
            wait(barriers.ds_empty[step & 1], step >> 1 & 1 ^ 1);
#pragma unroll
            for (int i = 0; i < VISIT / 16; ++i)
                asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                                 ds_to + (step & 1) * DS_WORDS * 2 + i * 16 * 128
                             ),
                             "r"(dS[i][0]), "r"(dS[i][1]), "r"(dS[i][2]), "r"(dS[i][3])
                             : "memory");
            fence_shared();
            arrive_as_warp(barriers.ds_full[step & 1]);
            // dQ of the tile before. At the first tile there is none: the product then reads whatever is there, without
            // waiting, and is thrown away. A branch around it would make ptxas serialize all products.
            if (tile != first) wait(barriers.ds_full[step - 1 & 1], step - 1 >> 1 & 1);
            multiply_dq(step - 1);
            wait_for_products<1>();
            arrive_as_warp(barriers.empty[stage]);
            wait_for_products<0>();
            if (tile != first) store_dq(step - 1);
        }
        arrive_as_warp(barriers.values_empty);
        wait(barriers.ds_full[step - 1 & 1], step - 1 >> 1 & 1);
        multiply_dq(step - 1);
        wait_for_products<0>();
        arrive_as_warp(barriers.keys_empty[loaded++ % 2]);
        store_dq(step - 1);
        fence_product(dK);
        fence_product(dV);
        store(dk.data, dK, scale);
        store(dv, dV, 1);
        arrive_as_warp(barriers.item_read[nth & 1]);
    }
}

// delta of every row, and zeros for the counters. Nobody reads delta of padding. D / 8 threads have a row, and each
// thread DELTA_ROWS of them.
#define DELTA_THREADS 256
#define DELTA_ROWS 4
extern "C" __global__ __launch_bounds__(DELTA_THREADS) void attention_delta(
    const __grid_constant__ View dout,
    const __grid_constant__ View out,
    const __grid_constant__ Clouds clouds,
    const __grid_constant__ Divisors divisors,
    int counts,
    u32 *__restrict__ counters,  // [counts]
    float *__restrict__ delta    // [slots, heads]
) {
    for (u32 i = blockIdx.x * DELTA_THREADS + threadIdx.x; i < (u32)counts; i += gridDim.x * DELTA_THREADS)
        counters[i] = 0;
    constexpr int ROWS = DELTA_THREADS / (D / 8);  // at a time
    const int first = blockIdx.x * (ROWS * DELTA_ROWS) + threadIdx.x / (D / 8), part = threadIdx.x % (D / 8);
    const int end = slots_of(clouds) * divisors.heads.by;
    uint4 words[DELTA_ROWS][2];
#pragma unroll
    for (int i = 0; i < DELTA_ROWS; ++i) {
        const int row = first + i * ROWS, slot = divide(row, divisors.heads);
        const int head = row - slot * divisors.heads.by;
        const auto load = [&](const View &view) {
            const u16 *from = (const u16 *)view.data + head * view.head + row_of(view, slot) + part * 8;
            return row < end && part * 8 < view.dim ? *(const uint4 *)from : uint4{0, 0, 0, 0};
        };
        words[i][0] = load(dout);
        words[i][1] = load(out);
    }
#pragma unroll
    for (int i = 0; i < DELTA_ROWS; ++i) {
        float sum = 0;
        const auto add = [&](u32 one, u32 other) {
            const float2 x = unpack(one), y = unpack(other);
            sum += x.x * y.x + x.y * y.y;
        };
        add(words[i][0].x, words[i][1].x);
        add(words[i][0].y, words[i][1].y);
        add(words[i][0].z, words[i][1].z);
        add(words[i][0].w, words[i][1].w);
        sum = sum_of_lanes<D / 8>(sum);
        const int row = first + i * ROWS;
        if (row < end && part == 0) delta[row] = sum;
    }
}

// dQ = scale * its sums, and 0 in padding. A warp has 8 (D = 128) or 16 rows of one head.
#define ROUND_PARTS (D == 128 ? 2 : 1)  // warps for the GROUP rows of a head
extern "C" __global__ __launch_bounds__(128) void attention_round(
    const float4 *__restrict__ dq_sums,  // [slots / GROUP, heads, GROUP * D / 4]
    const __grid_constant__ Clouds clouds,
    const __grid_constant__ Divisors divisors,
    float scale,
    const __grid_constant__ View dq  // [slots, heads, D]
) {
    const int warp = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x & 31;
    const int block = warp / ROUND_PARTS, part = warp % ROUND_PARTS;
    const int group = divide(block, divisors.heads), head = block - group * divisors.heads.by;
    if (group * GROUP >= slots_of(clouds)) return;
    const float4 *const sums = dq_sums + (size_t)block * (GROUP * D / 4) + lane;
    float4 x[8 / ROUND_PARTS * D / 64];
#pragma unroll
    for (int n = 0; n < sizeof(x) / 16; ++n) x[n] = sums[part * 256 + n * 32];
    const Cloud *rows = rows_of(clouds);
    const int b = cloud_of<&Cloud::slot>(clouds, group * GROUP);
    const int left = rows[b + 1].point - rows[b].point - (group * GROUP - rows[b].slot);  // rows that hold a point
    const auto store = [&](int row, int column, u32 words[4]) {  // words of eight columns from `column` + 8 (lane % 4)
        exchange(words);
        column += (lane & 3) * 8;
        if (column >= dq.dim) return;
        *(uint4 *)((u16 *)dq.data + row_of(dq, group * GROUP + row) + head * dq.head + column) =
            row < left ? uint4{words[0], words[1], words[2], words[3]} : uint4{0, 0, 0, 0};
    };
#if D == 128  // [8 queries][8 warps][32 lanes]: lanes are columns, of each warp 16, and neighbouring sums are queries
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 &y = x[n + i / 2];
            words[i] = transposed(i % 2 ? pack(scale * y.z, scale * y.w) : pack(scale * y.x, scale * y.y));
        }
        store(part * 8 + lane / 4, n * 16, words);
    }
#else  // [8 columns][32 lanes]: lanes are queries, and neighbouring sums are columns
#pragma unroll
    for (int n = 0; n < D / 8; n += 4)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 &y = x[n + i];
                words[i] = half ? pack(scale * y.z, scale * y.w) : pack(scale * y.x, scale * y.y);
            }
            store(half * 8 + lane / 4, n * 8, words);
        }
#endif
}
