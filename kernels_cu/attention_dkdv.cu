// SPDX-License-Identifier: Apache-2.0
// Bucket attention, backward to keys and values, after attention_dq.cu.
//
//   P = exp(scale q k^T - lse)    dv = P^T dout    dS = P * (dout v^T - delta)    dk = scale * dS^T q
//
// A block owns OWN key rows of one scope and head, with their values; queries and dout visit, with their lse and delta. It
// works on transposes, P^T and dS^T, so that the owned rows stay the left operands and each row of dk and dv is summed by
// one warp in the order of the scope: nothing is shared, so nothing is atomic. Visiting padding is zeros (q, dout, lse,
// delta): its P is 1 and adds P * 0.
//
// Where the sums of both do not fit in registers beside the rest (float32, D = 128), two warps own the same keys (PAIRED): one
// makes P and dv, the other takes P from it and makes dS and dk.

#include "attention.cuh"
#include "clouds.cuh"

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attention_dkdv(
    const __grid_constant__ View dout,      // [slots, heads, D]
    const __grid_constant__ View q,         // [slots, heads, D]
    const __grid_constant__ View k,         // [slots, heads, D]
    const __grid_constant__ View v,         // [slots, heads, D]
    const float *__restrict__ lse,          // [slots, heads]
    const float *__restrict__ delta,        // [slots, heads]
    const __grid_constant__ Clouds clouds,  // tiles are buckets
    const int *__restrict__ table,          // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,
    float slope,  // scale * UNIT, not 0
    float scale,
    void *__restrict__ dk,  // [slots, heads, D]
    void *__restrict__ dv   // [slots, heads, D]
) {
    extern __shared__ __align__(1024) u16 stages[];  // stages of visiting rows, then owned rows
    __shared__ float stats[STAGES][2][VISIT];        // of each stage: lse * UNIT, and delta
    Scope scope;
    int head, first;
    if (!block_owns(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    owned_slots(slots, scope, first);

#if PAIRED
    __shared__ float4 handed[OWN_TILES][CHUNK / 8][THREADS / 2];  // P of each pair of warps
    const bool of_values = uniform(threadIdx.x >> 5 & 1);         // this warp makes P and dv
    OWNED_ROWS(rows, 0);                                          // its keys, or values
    load_owned(rows, of_values ? at_head(k, head) : at_head(v, head), scope, slots, first);
    Tile tile;
    Weights weights;
    Sums sums;
    clear(sums);

    const auto begin = [&](const u16 *queries) { products<false>(tile, rows, queries + (of_values ? 0 : TENSOR)); };
    const auto sum = [&](const u16 *queries, int) { accumulate(sums, weights, queries + (of_values ? TENSOR : 0)); };
    const auto weigh = [&](int, bool, int stage, int chunk, int) {
        const auto both_warps = [] { asm volatile("bar.sync %0, 64;" ::"r"(1 + (threadIdx.x >> 6)) : "memory"); };
        const int column = chunk + (threadIdx.x & 3) * 2, place = (threadIdx.x >> 6) * 32 + (threadIdx.x & 31);
        both_warps();  // P of the chunk before has been taken
        if (of_values)
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const float2 its_lse = *(const float2 *)&stats[stage][0][column + n * 8];
#pragma unroll
                for (int m = 0; m < OWN_TILES; ++m) {
                    float *const score = tile[m][n];
#pragma unroll
                    for (int e = 0; e < 4; ++e) score[e] = exponential(score[e], slope, e % 2 ? its_lse.y : its_lse.x);
                    handed[m][n][place] = {score[0], score[1], score[2], score[3]};
                }
            }
        both_warps();
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) {
            const float2 its_delta = *(const float2 *)&stats[stage][1][column + n * 8];
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m) {
                float *const weight = tile[m][n];
                if (!of_values) {
                    const float4 p = handed[m][n][place];
                    weight[0] = p.x * (weight[0] - its_delta.x);
                    weight[1] = p.y * (weight[1] - its_delta.y);
                    weight[2] = p.z * (weight[2] - its_delta.x);
                    weight[3] = p.w * (weight[3] - its_delta.y);
                }
                set_weights(weights, m, n, 0, weight[0], weight[1]);
                set_weights(weights, m, n, 1, weight[2], weight[3]);
            }
        }
    };
#else
    OWNED_ROWS(key, 0);
    OWNED_ROWS(value, 1);
    load_owned(key, at_head(k, head), scope, slots, first);
    load_owned(value, at_head(v, head), scope, slots, first);
    Tile weight, dweight;
    Weights weights[1 + LAZY], dscores[1 + LAZY];
    Sums dkey, dvalue;
    clear(dkey);
    clear(dvalue);

    const auto begin = [&](const u16 *queries) {
        products<false>(weight, key, queries);
        // Else the compiler begins both at once, for which registers do not suffice.
        if (!WGMMA && D == 128) __syncwarp();
        products<false>(dweight, value, queries + TENSOR);
    };
    const auto sum = [&](const u16 *queries, int now) {
        accumulate(dvalue, weights[now], queries + TENSOR);
        accumulate(dkey, dscores[now], queries);
    };
    const auto weigh = [&](int, bool, int stage, int chunk, int now) {
        settle(weight);
        settle(dweight);
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) {
            const int column = chunk + n * 8 + (threadIdx.x & 3) * 2;
            const float2 its_lse = *(const float2 *)&stats[stage][0][column];
            const float2 its_delta = *(const float2 *)&stats[stage][1][column];
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float one = exponential(weight[m][n][2 * half], slope, its_lse.x);
                    const float other = exponential(weight[m][n][2 * half + 1], slope, its_lse.y);
                    set_weights(weights[now], m, n, half, one, other);
                    set_weights(
                        dscores[now], m, n, half, one * (dweight[m][n][2 * half] - its_delta.x),
                        other * (dweight[m][n][2 * half + 1] - its_delta.y)
                    );
                }
        }
    };
#endif
    // The first thread of a row brings its lse and delta.
    const bool brings = threadIdx.x % PARTS == 0;
    const auto fetch = [&](int slot) {
        const long long at = (long long)slot * heads + head;
        return brings && slot >= 0 ? float2{lse[at], delta[at]} : float2{0, 0};
    };
    const auto put = [&](int stage, float2 value) {
        if (!brings) return;
        stats[stage][0][threadIdx.x / PARTS] = value.x * UNIT;
        stats[stage][1][threadIdx.x / PARTS] = value.y;
    };
    visit(stages, at_head(q, head), at_head(dout, head), scope, [] {}, begin, weigh, sum, fetch, put);

    first = first_owned(divisors);  // again: kept through the visit these take registers that it needs
    owned_slots(slots, scope, first);
    const auto store = [&](void *gradient, const Sums &from, float factor) {
        const auto constant = [=](int, int, bool, bool, int) { return factor; };
        store_owned(at_head({gradient, q.dim, heads * q.dim, q.dim}, head), from, constant, scope, slots, first);
    };
#if PAIRED
    store(of_values ? dv : dk, sums, of_values ? 1 : scale);
#else
    settle(dkey);
    settle(dvalue);
    store(dk, dkey, scale);
    store(dv, dvalue, 1);
#endif
}
