// SPDX-License-Identifier: Apache-2.0
// Bucket attention, backward to keys and values, after attention_dq.cu.
//
//   P = exp(scale q k^T - lse)    dv = P^T dout    dS = P * (dout v^T - delta)    dk = scale * dS^T q
//
// A block owns OWN key rows of one scope and head, with their values; queries and dout visit, with their lse and delta. It
// works on transposes, P^T and dS^T, so that the owned rows stay the left operands and each row of dk and dv is summed by
// one warp in the order of the scope: nothing is shared, so nothing is atomic. Visiting padding is zeros (q, dout, lse,
// delta): its P is 1 and adds P * 0.

#include "clouds.cuh"
#include "attention.cuh"

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attention_dkdv(
    const __grid_constant__ View dout,          // [slots, heads, D]
    const __grid_constant__ View q,             // [slots, heads, D]
    const __grid_constant__ View k,             // [slots, heads, D]
    const __grid_constant__ View v,             // [slots, heads, D]
    const float *__restrict__ lse,              // [slots, heads]
    const float *__restrict__ delta,            // [slots, heads]
    const __grid_constant__ Clouds clouds,      // tiles are buckets
    const int *__restrict__ table,              // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,
    float slope,                                // scale * UNIT, not 0
    float scale,
    void *__restrict__ dk,                      // [slots, heads, D]
    void *__restrict__ dv)                      // [slots, heads, D]
{
    extern __shared__ __align__(1024) u16 stages[];          // stages of visiting rows, then owned rows
    __shared__ float stats[STAGES][2][VISIT];   // of each stage: lse * UNIT, and delta
    Scope scope;
    int head, first;
    if (!block_owns(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    owned_slots(slots, scope, first);

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
                    set_weights(dscores[now], m, n, half, one * (dweight[m][n][2 * half] - its_delta.x),
                                other * (dweight[m][n][2 * half + 1] - its_delta.y));
                }
        }
    };
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
    settle(dkey);
    settle(dvalue);

    first = first_owned(divisors);              // again: kept through the visit these take registers that it needs
    owned_slots(slots, scope, first);
    const auto scaled = [=](int, int, bool, bool, int) { return scale; };
    const auto as_is = [](int, int, bool, bool, int) { return 1.0f; };
    store_owned(at_head({dk, q.dim, heads * q.dim, q.dim}, head), dkey, scaled, scope, slots, first);
    store_owned(at_head({dv, q.dim, heads * q.dim, q.dim}, head), dvalue, as_is, scope, slots, first);
}
