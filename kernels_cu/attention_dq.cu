// SPDX-License-Identifier: Apache-2.0
// Bucket attention, backward to the queries, and delta, which attention_dkdv.cu needs. attention_backward.cu does the
// work of both where it is faster.
//
//   delta = sum(dO * dQ)    P = exp(scale Q K^T - lse)    dS = P * (dO V^T - delta)    dQ = scale * dS K
//
// A block has OWN query rows of one scope and head with their dO, as in attention_forward.cu; keys and values are
// streamed. One warp sums each row of dQ, in the order of the scope: nothing is shared, so nothing is atomic.

#include "attention_stream.cuh"
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
    float scale_log2,  // scale * EXPONENT_UNIT, not 0
    float scale,
    const __grid_constant__ View dq,  // [slots, heads, D]
    float *__restrict__ delta         // [slots, heads]
) {
    extern __shared__ __align__(1024) u16 stages[];  // stages of streamed rows, then stationary rows
    Scope scope;
    int head, first;
    if (!locate_block(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    stationary_slots(slots, scope, first);

    STATIONARY_ROWS(query, 0);
    STATIONARY_ROWS(dout_rows, 1);
    load_stationary(query, at_head(q, head), scope, slots, first);
    load_stationary(dout_rows, at_head(dout, head), scope, slots, first);
    float row_delta[OWN_TILES][2], row_lse[OWN_TILES][2];
    Product S, dP;
    Operand dS[1 + LAZY];
    Accumulator dQ;
    clear(dQ);

    const auto prepare = [&] {
        dot_stationary(row_delta, at_head(dout, head), at_head(out, head), scope, slots, first);
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m) {
            const int position = stationary_position(first, m), slot = slots[m];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const bool inside = position + 8 * half < scope.end;
                const long long at = inside ? (long long)(slot + 8 * half) * heads + head : 0;
                row_lse[m][half] = lse[at] * EXPONENT_UNIT;
                if (inside && (threadIdx.x & 3) == 0) delta[at] = row_delta[m][half];
            }
        }
    };
    const auto first_product = [&](const u16 *keys) {
        products<true>(S, query, keys);
        products<true>(dP, dout_rows, keys + TENSOR);
    };
    const auto second_product = [&](const u16 *keys, int now) { accumulate(dQ, dS[now], keys); };
    const auto pointwise = [&](int position, bool whole, int, int, int now) {
        fence_product(S);
        fence_product(dP);
        if (!whole)
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m) mask(S[m], scope, position, scale_log2);
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float dS_pair[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        dS_pair[e] = exponential(S[m][n][2 * half + e], scale_log2, row_lse[m][half])
                                     * (dP[m][n][2 * half + e] - row_delta[m][half]);
                    set_operand(dS[now], m, n, half, dS_pair[0], dS_pair[1]);
                }
    };
    stream_rows(
        stages, at_head(k, head), at_head(v, head), scope, prepare, first_product, pointwise, second_product,
        [](int) { return float2{}; }, [](int, float2) {}
    );
    fence_product(dQ);

    first = first_stationary(divisors);  // computed again, to free registers during the loop
    stationary_slots(slots, scope, first);
    const auto scaled = [=](int, int, bool, bool, int) { return scale; };
    store_stationary(at_head(dq, head), dQ, scaled, scope, slots, first);
}
