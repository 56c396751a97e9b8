// SPDX-License-Identifier: Apache-2.0
// Bucket attention, backward to the queries, and the row sums that attention_dkdv.cu needs.
//
//   delta = sum(dout * out)    P = exp(scale q k^T - lse)    dS = P * (dout v^T - delta)    dq = scale * dS k
//
// A block owns OWN query rows of one scope and head, with their dout, as in attention_forward.cu; keys and values visit.
// Each row of dq is summed by one warp in the order of the scope: nothing is shared, so nothing is atomic.

#include "attention.cuh"
#include "clouds.cuh"

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attention_dq(
    const __grid_constant__ View dout,      // [slots, heads, D]
    const __grid_constant__ View q,         // [slots, heads, D]
    const __grid_constant__ View k,         // [slots, heads, D]
    const __grid_constant__ View v,         // [slots, heads, D]
    const __grid_constant__ View out,       // [slots, heads, D]
    const float *__restrict__ lse,          // [slots, heads]
    const __grid_constant__ Clouds clouds,  // tiles are buckets
    const int *__restrict__ table,          // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,
    float slope,  // scale * UNIT, not 0
    float scale,
    void *__restrict__ dq,     // [slots, heads, D]
    float *__restrict__ delta  // [slots, heads]
) {
    extern __shared__ __align__(1024) u16 stages[];  // stages of visiting rows, then owned rows
    Scope scope;
    int head, first;
    if (!block_owns(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    owned_slots(slots, scope, first);

    OWNED_ROWS(query, 0);
    OWNED_ROWS(dout_rows, 1);
    load_owned(query, at_head(q, head), scope, slots, first);
    load_owned(dout_rows, at_head(dout, head), scope, slots, first);
    float own_delta[OWN_TILES][2], own_lse[OWN_TILES][2];
    Tile score, dweight;
    Weights dscores[1 + LAZY];
    Sums sums;
    clear(sums);

    const auto prepare = [&] {
        dot_owned(own_delta, at_head(dout, head), at_head(out, head), scope, slots, first);
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m) {
            const int position = owned_position(first, m), slot = slots[m];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool inside = position + 8 * half < scope.end;
                const long long at = inside ? (long long)(slot + 8 * half) * heads + head : 0;
                own_lse[m][half] = lse[at] * UNIT;
                if (inside && (threadIdx.x & 3) == 0) delta[at] = own_delta[m][half];
            }
        }
    };
    const auto begin = [&](const u16 *keys) {
        products<true>(score, query, keys);
        products<true>(dweight, dout_rows, keys + TENSOR);
    };
    const auto sum = [&](const u16 *keys, int now) { accumulate(sums, dscores[now], keys); };
    const auto weigh = [&](int position, bool whole, int, int, int now) {
        settle(score);
        settle(dweight);
        if (!whole) mask(score, scope, position, slope);
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float dscore[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        dscore[e] = exponential(score[m][n][2 * half + e], slope, own_lse[m][half])
                                    * (dweight[m][n][2 * half + e] - own_delta[m][half]);
                    set_weights(dscores[now], m, n, half, dscore[0], dscore[1]);
                }
    };
    visit(
        stages, at_head(k, head), at_head(v, head), scope, prepare, begin, weigh, sum, [](int) { return float2{}; },
        [](int, float2) {}
    );
    settle(sums);

    first = first_owned(divisors);  // again: kept through the visit these take registers that it needs
    owned_slots(slots, scope, first);
    const auto scaled = [=](int, int, bool, bool, int) { return scale; };
    store_owned(at_head({dq, q.dim, heads * q.dim, q.dim}, head), sums, scaled, scope, slots, first);
}
