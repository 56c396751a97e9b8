// SPDX-License-Identifier: Apache-2.0
// Bucket attention, backward to keys and values; runs after attention_dq.cu.
//
//   P = exp(scale Q K^T - lse)    dV = P^T dO    dS = P * (dO V^T - delta)    dK = scale * dS^T Q
//
// A block has OWN key rows of one scope and head with their values; queries and dO are streamed, with their lse and
// delta. The block computes the transposes P^T and dS^T (named P and dS here), so the stationary rows stay the left
// operands, and one warp sums each row of dK and dV in the order of the scope: nothing is shared, so nothing is atomic.
// Streamed padding is zero (Q, dO, lse and delta): its P is 1 and adds P * 0.
//
// Where registers cannot hold both sums (float32, D = 128), two warps share the same keys (PAIRED): one computes P and
// dV, the other takes P from it and computes dS and dK.

#include "attention_stream.cuh"
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
    float scale_log2,  // scale * EXPONENT_UNIT, not 0
    float scale,
    const __grid_constant__ View dk,  // [slots, heads, D]
    void *__restrict__ dv             // [slots, heads, D], with the strides of dk
) {
    extern __shared__ __align__(1024) u16 stages[];  // stages of streamed rows, then stationary rows
    __shared__ float stats[STAGES][2][VISIT];        // of each stage: lse * EXPONENT_UNIT, and delta
    Scope scope;
    int head, first;
    if (!locate_block(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    stationary_slots(slots, scope, first);

#if PAIRED
    __shared__ float4 exchanged[OWN_TILES][CHUNK / 8][THREADS / 2];  // P of each pair of warps
    const bool for_dv = uniform(threadIdx.x >> 5 & 1);               // this warp computes P and dV, else dS and dK
    STATIONARY_ROWS(rows, 0);                                        // keys or values
    load_stationary(rows, for_dv ? at_head(k, head) : at_head(v, head), scope, slots, first);
    Product product;
    Operand left;
    Accumulator sums;
    clear(sums);

    const auto first_product = [&](const u16 *queries) {
        products<false>(product, rows, queries + (for_dv ? 0 : TENSOR));
    };
    const auto second_product = [&](const u16 *queries, int) {
        accumulate(sums, left, queries + (for_dv ? TENSOR : 0));
    };
    const auto pointwise = [&](int, bool, int stage, int chunk, int) {
        const auto both_warps = [] { asm volatile("bar.sync %0, 64;" ::"r"(1 + (threadIdx.x >> 6)) : "memory"); };
        const int column = chunk + (threadIdx.x & 3) * 2, place = (threadIdx.x >> 6) * 32 + (threadIdx.x & 31);
        both_warps();  // P of the chunk before has been read
        if (for_dv)
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const float2 lse_pair = *(const float2 *)&stats[stage][0][column + n * 8];
#pragma unroll
                for (int m = 0; m < OWN_TILES; ++m) {
                    float *const x = product[m][n];
#pragma unroll
                    for (int e = 0; e < 4; ++e) x[e] = exponential(x[e], scale_log2, e % 2 ? lse_pair.y : lse_pair.x);
                    exchanged[m][n][place] = {x[0], x[1], x[2], x[3]};
                }
            }
        both_warps();
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) {
            const float2 delta_pair = *(const float2 *)&stats[stage][1][column + n * 8];
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m) {
                float *const x = product[m][n];
                if (!for_dv) {
                    const float4 p = exchanged[m][n][place];
                    x[0] = p.x * (x[0] - delta_pair.x);
                    x[1] = p.y * (x[1] - delta_pair.y);
                    x[2] = p.z * (x[2] - delta_pair.x);
                    x[3] = p.w * (x[3] - delta_pair.y);
                }
                set_operand(left, m, n, 0, x[0], x[1]);
                set_operand(left, m, n, 1, x[2], x[3]);
            }
        }
    };
#else
    STATIONARY_ROWS(key, 0);
    STATIONARY_ROWS(value, 1);
    load_stationary(key, at_head(k, head), scope, slots, first);
    load_stationary(value, at_head(v, head), scope, slots, first);
    Product S, dP;
    Operand P[1 + LAZY], dS[1 + LAZY];
    Accumulator dK, dV;
    clear(dK);
    clear(dV);

    const auto first_product = [&](const u16 *queries) {
        products<false>(S, key, queries);
        // Without this the compiler interleaves the two products, which needs too many registers.
        if (!WGMMA && D == 128) __syncwarp();
        products<false>(dP, value, queries + TENSOR);
    };
    const auto second_product = [&](const u16 *queries, int now) {
        accumulate(dV, P[now], queries + TENSOR);
        accumulate(dK, dS[now], queries);
    };
    const auto pointwise = [&](int, bool, int stage, int chunk, int now) {
        fence_product(S);
        fence_product(dP);
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) {
            const int column = chunk + n * 8 + (threadIdx.x & 3) * 2;
            const float2 lse_pair = *(const float2 *)&stats[stage][0][column];
            const float2 delta_pair = *(const float2 *)&stats[stage][1][column];
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float one = exponential(S[m][n][2 * half], scale_log2, lse_pair.x);
                    const float other = exponential(S[m][n][2 * half + 1], scale_log2, lse_pair.y);
                    set_operand(P[now], m, n, half, one, other);
                    set_operand(
                        dS[now], m, n, half, one * (dP[m][n][2 * half] - delta_pair.x),
                        other * (dP[m][n][2 * half + 1] - delta_pair.y)
                    );
                }
        }
    };
#endif
    // The first thread of a row loads its lse and delta.
    const bool fetches = threadIdx.x % PARTS == 0;
    const auto fetch = [&](int slot) {
        const long long at = (long long)slot * heads + head;
        return fetches && slot >= 0 ? float2{lse[at], delta[at]} : float2{0, 0};
    };
    const auto put = [&](int stage, float2 value) {
        if (!fetches) return;
        stats[stage][0][threadIdx.x / PARTS] = value.x * EXPONENT_UNIT;
        stats[stage][1][threadIdx.x / PARTS] = value.y;
    };
    stream_rows(
        stages, at_head(q, head), at_head(dout, head), scope, [] {}, first_product, pointwise, second_product, fetch,
        put
    );

    first = first_stationary(divisors);  // computed again, to free registers during the loop
    stationary_slots(slots, scope, first);
    // q.dim equals dk.dim, and costs no register more.
    const auto store = [&](void *gradient, const Accumulator &from, float factor) {
        const auto constant = [=](int, int, bool, bool, int) { return factor; };
        store_stationary(at_head({gradient, dk.head, dk.row, q.dim}, head), from, constant, scope, slots, first);
    };
#if PAIRED
    store(for_dv ? dv : dk.data, sums, for_dv ? 1 : scale);
#else
    fence_product(dK);
    fence_product(dV);
    store(dk.data, dK, scale);
    store(dv, dV, 1);
#endif
}
