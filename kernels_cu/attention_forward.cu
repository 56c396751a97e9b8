// SPDX-License-Identifier: Apache-2.0
// Bucket attention, forward: O = softmax(scale * Q K^T) V within each scope and head, and lse (Flash3D, section 4.2).
// On Hopper, D = 64 and 128 in 16-bit dtypes have attention_forward_roles.cu.
//
// One pass with an online softmax; letters and names as in attention.cuh. A block has OWN query rows of one scope and
// head, a warp 16 * OWN_TILES of them. Keys and values are streamed, CHUNK rows at a time: S, P, O += P V.
//
// P = exp(scale S - m) is right for any m; m only has to keep P in range. So a chunk first uses the m of the chunks
// before. Only if some P leaves its range, m rises to MARGIN above the row's maximum, O and l are rescaled, and P is
// computed again. Most chunks then need no comparison for each score and no exchange of maxima between lanes, and
// nothing branches between their exponentials.
//
// The row sums l come from one more product, P times a column of ones, or from additions on the lanes. Warpgroup
// products keep the tensor cores busy for long, so a small product would have to wait: there the lanes add, and check
// their sums against LIMIT. Otherwise the bits of packed P show whether it is in range, long before a product would:
// from 2 on, the highest bit of the exponent is set.
#define SUM_BY_MMA (!WGMMA)
#if SUM_BY_MMA
// P of float16 reaches down to 2^-24. Exponents of float32 would be rounded at the size of the margin.
#define MARGIN (ELEMENT == 3 ? 8.0f : ELEMENT == 2 ? 4.0f : 0.0f)
#else
#define MARGIN 0.0f
#define LIMIT (ELEMENT == 2 ? 32768.0f : 0x1p60f)  // float16 holds 65504; a row has fewer than 2^31 keys
#endif

#include "attention_stream.cuh"
#include "clouds.cuh"
#include "early.cuh"

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attention_forward(
    const __grid_constant__ View q,         // [slots, heads, D]
    const __grid_constant__ View k,         // [slots, heads, D]
    const __grid_constant__ View v,         // [slots, heads, D]
    const __grid_constant__ Clouds clouds,  // tiles are buckets
    const int *table,                       // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,
    float scale_log2,        // scale * EXPONENT_UNIT, not 0
    void *__restrict__ out,  // [slots, heads, D]
    float *__restrict__ lse  // [slots, heads] natural logarithm, or null
) {
    start_early();
    extern __shared__ __align__(1024) u16 stages[];  // stages of streamed rows, then stationary rows
    Scope scope;
    int head, first;
    if (!locate_block(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    stationary_slots(slots, scope, first);

    STATIONARY_ROWS(query, 0);
    load_stationary(query, at_head(q, head), scope, slots, first);
    Product S;
    Operand P[1 + LAZY];
    Accumulator O;
    clear(O);
    // The compiler cannot tell that these are equal, so it keeps a pair of registers.
    const u32 ones[2] = {pack(1, 1), pack(1, 1) + (width < 0)};
    bool first_chunk = true;                             // m is not known yet
    float row_sum[OWN_TILES][4], row_max[OWN_TILES][2];  // elements 0 and 2 of row_sum: l of both rows
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m) {
        row_sum[m][0] = row_sum[m][1] = row_sum[m][2] = row_sum[m][3] = 0;
        row_max[m][0] = row_max[m][1] = -1e30f;  // finite, so that a masked key's -inf minus it is -inf
    }

    // Computes the chunk's P with the present m, and the lane's sums of it. Returns whether some P is out of range.
    const auto exponentiate = [&](Operand P, float row[OWN_TILES][2]) {
        u32 bits = 0;
        bool in_range = true;
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m) {
            row[m][0] = row[m][1] = 0;
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float one = exponential(S[m][n][2 * half], scale_log2, row_max[m][half]);
                    const float other = exponential(S[m][n][2 * half + 1], scale_log2, row_max[m][half]);
                    set_operand(P, m, n, half, one, other);
                    bits |= P[0][m][n / 2][n % 2 * 2 + half];
                    row[m][half] += one + other;
                }
#if !SUM_BY_MMA
            in_range &= row[m][0] <= LIMIT && row[m][1] <= LIMIT;  // false for NaN, in which the tested bit is set too
#endif
        }
        if (SUM_BY_MMA) in_range = !(bits & 0x40004000);
        return __builtin_expect(__any_sync(FULL, !in_range), 0);
    };
    const auto raise_row_maxima = [&] {
        wait_for_products<0>();  // O
        fence_product(O);
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float factor = raise_row_max(row_max[m][half], S[m], half, scale_log2, MARGIN);
                row_sum[m][2 * half] *= factor;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    O[m][n][2 * half] *= factor;
                    O[m][n][2 * half + 1] *= factor;
                }
            }
    };
    const auto first_product = [&](const u16 *keys) { products<true>(S, query, keys); };
    const auto second_product = [&](const u16 *keys, int now) {
#if SUM_BY_MMA
        __syncwarp();  // without this the compiler starts O += P V before the next S
        add_rows(row_sum, P[now], ones);
#endif
        accumulate(O, P[now], keys + TENSOR);
    };
    const auto pointwise = [&](int position, bool whole, int, int chunk, int now) {
        fence_product(S);
        if (__builtin_expect(!whole, 0))
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m) mask(S[m], scope, position, scale_log2);
        float row[OWN_TILES][2];  // the lane's part of l
        if (chunk == 0 && first_chunk) raise_row_maxima();
        first_chunk = false;
        for (bool raised = false; exponentiate(P[now], row) && !raised; raised = true) raise_row_maxima();
#pragma unroll
        for (int m = 0; m < OWN_TILES && !SUM_BY_MMA; ++m) {
            row_sum[m][0] += row[m][0];
            row_sum[m][2] += row[m][1];
        }
    };
    stream_rows(
        stages, at_head(k, head), at_head(v, head), scope, [] {}, first_product, pointwise, second_product,
        [](int) { return float2{}; }, [](int, float2) {}
    );
    fence_product(O);

    first = first_stationary(divisors);  // computed again, to free registers during the loop
    stationary_slots(slots, scope, first);
    const auto normalize = [&](int m, int half, bool inside, bool has_point, int slot) {
        float x = row_sum[m][2 * half];
        if (!SUM_BY_MMA) {  // it holds the lane's part
            x += __shfl_xor_sync(FULL, x, 1);
            x += __shfl_xor_sync(FULL, x, 2);
        }
        if (lse && inside && (threadIdx.x & 3) == 0)
            lse[(long long)slot * heads + head] =
                has_point ? fmaf(row_max[m][half], 1 / EXPONENT_UNIT, log2f(x) * LN2) : -INFINITE;
        return __fdividef(1, x);
    };
    store_stationary(at_head({out, q.dim, heads * q.dim, q.dim}, head), O, normalize, scope, slots, first);
}
