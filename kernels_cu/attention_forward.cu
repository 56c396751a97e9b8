// SPDX-License-Identifier: Apache-2.0
// Bucket attention, forward: out = softmax(scale * q k^T) v within each scope and head, and lse (Flash3D, section 4.2).
//
// One pass with an online softmax. A block owns OWN query rows of one scope and head, a warp 16 * OWN_TILES of them; keys and
// values visit, CHUNK at a time: scores, exponentials, out += weights * v.
//
// `top` is what the exponent of a row is taken relative to. Weights need no maximum to be right, only to be in range: so a
// chunk is worked through with the top of the chunks before, and only if a weight has outgrown its range once more, after
// raising the top MARGIN above the maximum and rescaling what was summed. Most chunks then cost no comparison a score, no lane
// waits for another's maximum, and nothing branches between a chunk's exponentials.
//
// Who adds up a row's weights: one more product, by a column of ones beside the values, or the lanes. Beside warpgroup products,
// which keep the tensor cores busy for long, a small product would wait. There LIMIT is asked of the lanes' sums. Else the bits of
// the packed weights tell, long before a product's result is there: the highest bit of an exponent is set from 2 on.
#define SUM_BY_MMA (!WGMMA)
#if SUM_BY_MMA
// Weights of float16 reach down to 2^-24; exponents of float32 would be rounded at the margin's size.
#define MARGIN (ELEMENT == 3 ? 8.0f : ELEMENT == 2 ? 4.0f : 0.0f)
#else
#define MARGIN 0.0f
#define LIMIT (ELEMENT == 2 ? 32768.0f : 0x1p60f)  // float16 holds 65504; a row has less than 2^31 weights
#endif

#include "attention.cuh"
#include "clouds.cuh"

// Raises the top of a row above its maximum in the chunk; the factor that brings older weights to the new top.
__device__ __forceinline__ float raise_top(float &top, const float score[CHUNK / 8][4], int half, float slope) {
    float low = INFINITE, high = -INFINITE;  // by a negative slope the lowest score is the maximum
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
        low = fminf(fminf(low, score[n][2 * half]), score[n][2 * half + 1]);
        high = fmaxf(fmaxf(high, score[n][2 * half]), score[n][2 * half + 1]);
    }
    float x = fmaxf(low * slope, high * slope);
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 2));
    x = fmaxf(x + MARGIN, top);
    const float shrink = exponential(top, 1, x);
    top = x;
    return shrink;
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attention_forward(
    const __grid_constant__ View q,         // [slots, heads, D]
    const __grid_constant__ View k,         // [slots, heads, D]
    const __grid_constant__ View v,         // [slots, heads, D]
    const __grid_constant__ Clouds clouds,  // tiles are buckets
    const int *__restrict__ table,          // [scopes, width]
    int width,
    const __grid_constant__ Divisors divisors,
    float slope,             // scale * UNIT, not 0
    void *__restrict__ out,  // [slots, heads, D]
    float *__restrict__ lse  // [slots, heads] natural logarithm, or null
) {
    extern __shared__ __align__(1024) u16 stages[];  // stages of visiting rows, then owned rows
    Scope scope;
    int head, first;
    if (!block_owns(scope, head, first, clouds, table, width, divisors)) return;
    const int heads = divisors.heads.by;
    int slots[OWN_TILES];
    owned_slots(slots, scope, first);

    OWNED_ROWS(query, 0);
    load_owned(query, at_head(q, head), scope, slots, first);
    Tile score;
    Weights weights[1 + LAZY];
    Sums sums;
    clear(sums);
    const u32 ones[2] = {pack(1, 1), pack(1, 1) + (width < 0)};  // not known to be alike: they stay a pair of registers
    bool fresh = true;                                           // before the first chunk: no top is known
    float total[OWN_TILES][4], top[OWN_TILES][2];  // elements 0 and 2 of a total: the weights of both rows
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m) {
        total[m][0] = total[m][1] = total[m][2] = total[m][3] = 0;
        top[m][0] = top[m][1] = -1e30f;  // finite: -inf of a masked key minus it is -inf
    }

    // The chunk's weights by the tops as they stand, and a lane's sums of them where it adds them up; whether one is out of range.
    const auto weigh_chunk = [&](Weights weights, float row[OWN_TILES][2]) {
        u32 bits = 0;
        bool in_range = true;
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m) {
            row[m][0] = row[m][1] = 0;
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float one = exponential(score[m][n][2 * half], slope, top[m][half]);
                    const float other = exponential(score[m][n][2 * half + 1], slope, top[m][half]);
                    set_weights(weights, m, n, half, one, other);
                    bits |= weights[0][m][n / 2][n % 2 * 2 + half];
                    row[m][half] += one + other;
                }
#if !SUM_BY_MMA
            in_range &= row[m][0] <= LIMIT && row[m][1] <= LIMIT;  // false for NaN, as bits are set in it
#endif
        }
        if (SUM_BY_MMA) in_range = !(bits & 0x40004000);
        return __builtin_expect(__any_sync(FULL, !in_range), 0);
    };
    const auto raise_tops = [&] {
        wait_for_products<0>();  // of sums
        settle(sums);
#pragma unroll
        for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shrink = raise_top(top[m][half], score[m], half, slope);
                total[m][2 * half] *= shrink;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    sums[m][n][2 * half] *= shrink;
                    sums[m][n][2 * half + 1] *= shrink;
                }
            }
    };
    const auto begin = [&](const u16 *keys) { products<true>(score, query, keys); };
    const auto sum = [&](const u16 *keys, int now) {
#if SUM_BY_MMA
        __syncwarp();  // else the compiler begins the sums before the next products
        add_rows(total, weights[now], ones);
#endif
        accumulate(sums, weights[now], keys + TENSOR);
    };
    const auto weigh = [&](int position, bool whole, int, int chunk, int now) {
        settle(score);
        if (__builtin_expect(!whole, 0)) mask(score, scope, position, slope);
        float row[OWN_TILES][2];  // of a lane
        if (chunk == 0 && fresh) raise_tops();
        fresh = false;
        for (bool raised = false; weigh_chunk(weights[now], row) && !raised; raised = true) raise_tops();
#pragma unroll
        for (int m = 0; m < OWN_TILES && !SUM_BY_MMA; ++m) {
            total[m][0] += row[m][0];
            total[m][2] += row[m][1];
        }
    };
    visit(
        stages, at_head(k, head), at_head(v, head), scope, [] {}, begin, weigh, sum, [](int) { return float2{}; },
        [](int, float2) {}
    );
    settle(sums);

    first = first_owned(divisors);  // again: kept through the visit these take registers that it needs
    owned_slots(slots, scope, first);
    const auto finish = [&](int m, int half, bool inside, bool holds, int slot) {
        float x = total[m][2 * half];
        if (!SUM_BY_MMA) {  // a lane's share
            x += __shfl_xor_sync(FULL, x, 1);
            x += __shfl_xor_sync(FULL, x, 2);
        }
        if (lse && inside && (threadIdx.x & 3) == 0)
            lse[(long long)slot * heads + head] = holds ? fmaf(top[m][half], 1 / UNIT, log2f(x) * LN2) : -INFINITE;
        return __fdividef(1, x);
    };
    store_owned(at_head({out, q.dim, heads * q.dim, q.dim}, head), sums, finish, scope, slots, first);
}
