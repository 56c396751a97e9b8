// SPDX-License-Identifier: Apache-2.0
// What all attention kernels share: views, scopes and their positions, numbers, and copies into shared memory.
//
// Letters, in Flash3D (section 4.2) and FlashAttention's notation, for one scope and head:
//   Q, K, V, O, dO, dQ, dK, dV    rows of the inputs, of the output and of their gradients
//   S = Q K^T                     scores; dP = dO V^T
//   P = exp(scale S - lse)        probabilities; the forward pass uses exp(scale S - m) until it knows lse
//   m, l                          a row's maximum and sum so far: row_max, row_sum; lse = m + ln(l)
//   delta                         a row's sum of dO * O;  dS = P * (dP - delta)
//   scale_log2                    scale * EXPONENT_UNIT: scores times this are exponents of 2 (of e for float32)
//
// A position counts the slots of a scope: position p is slot p % bucket_size of the scope's bucket p / bucket_size.
// Only a cloud's last bucket has padding, so the positions of a scope have at most one hole. But a cloud without points
// may have buckets, which are all padding.

#ifndef GPU3D_ATTENTION_CUH
#define GPU3D_ATTENTION_CUH

#include "clouds.cuh"
#include "floats.cuh"
#include "warp.cuh"

// gpu3d/cuda/attention.py passes all of these. The values here are for compiling the file by hand.
#ifndef D
#define D 64       // head dimension, padded with zeros on load: 16, 32, 64 or 128
#define ELEMENT 3  // 0 float32, 2 float16, 3 bfloat16
#define WGMMA 0    // 1: Hopper's warpgroup products (sm_90a, not for float32); 0: mma.sync (sm_80 and up)
#define VISIT 64   // rows of a streamed tile
#endif

#define PLANES (ELEMENT == 0 ? 3 : 1)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// One of q, k, v, ...: [slots, heads, D]. `head` and `row` are the strides of heads and slots, in elements.
struct View {
    void *data;  // 16-byte aligned, as is each row
    long long head;
    int row;
    int dim;  // D before padding: a multiple of 8
};

// The view of one head.
__device__ __forceinline__ View at_head(const View &view, int head) {
    return {(char *)view.data + head * view.head * (ELEMENT == 0 ? 4 : 2), view.head, view.row, view.dim};
}

__device__ __forceinline__ long long row_of(const View &view, int slot) { return (long long)slot * view.row; }

// A divisor that the host knows, as a multiplication: integer division on the GPU uses the unit that other blocks need
// for exponentials, and the start of a block is a chain of divisions and loads.
struct Divisor {
    int by;
    u32 factor;  // 2^shift / by, rounded up: exact for 0 <= x < 2^31
    int shift;   // 31 + ceil(log2(by))
};

struct Divisors {
    Divisor size;  // slots a bucket
    Divisor heads;
    Divisor tiles;  // blocks for each scope and head
};

__device__ __forceinline__ int divide(int x, const Divisor &divisor) {
    return (u64)(u32)x * divisor.factor >> divisor.shift;
}

// ---- scopes --------------------------------------------------------------------------------------------------------

struct Scope {
    const int *buckets;  // the scope's row of the table
    Divisor size;        // slots a bucket
    int end;             // positions
    int hole, hole_end;  // the positions that are padding
};

__device__ __forceinline__ Scope
scope_at(const Clouds &clouds, const int *table, int width, int index, const Divisor &size) {
    Scope scope = {table + (size_t)index * width, size, 0, 0, 0};
    const Cloud *rows = rows_of(clouds);
    const int lane = threadIdx.x & 31;
    int count = 0, points = 0, last = 0, filled = 0;  // points of the scope's cloud; its last bucket, and its points
    for (int base = 0; base < width; base += 32) {
        const int bucket = base + lane < width ? scope.buckets[base + lane] : -1;
        if (base == 0) {
            const int b = cloud_of<&Cloud::tile>(clouds, __shfl_sync(FULL, bucket, 0));  // tiles are buckets here
            last = rows[b + 1].tile - 1;
            points = rows[b + 1].point - rows[b].point;
            filled = points - (last - rows[b].tile) * size.by;
        }
        const u32 listed = __ballot_sync(FULL, bucket >= 0), short_one = __ballot_sync(FULL, bucket == last);
        count += __popc(listed);
        if (short_one) {
            scope.hole_end = (base + __ffs(short_one)) * size.by;
            scope.hole = scope.hole_end - size.by + filled;
        }
        if (listed != FULL) break;
    }
    scope.end = count * size.by;
    if (!points) {
        scope.hole = 0;
        scope.hole_end = scope.end;
    }
    return scope;
}

__device__ __forceinline__ bool has_point_at(const Scope &scope, int position) {
    return (position < scope.end) & ((position < scope.hole) | (position >= scope.hole_end));  // no branches
}

// Bit i tells whether position + i holds a point, for i < 32.
__device__ __forceinline__ u32 points_from(const Scope &scope, int position) {
    const auto below = [](int count) { return count <= 0 ? 0 : FULL >> (32 - min(count, 32)); };
    return below(scope.end - position) & ~(below(scope.hole_end - position) & ~below(scope.hole - position));
}

__device__ __forceinline__ int slot_at(const Scope &scope, int position) {
    const int bucket = divide(position, scope.size);
    return position + (scope.buckets[bucket] - bucket) * scope.size.by;
}

// The position of the streamed tile after the one at `first`. A tile of padding alone is skipped.
__device__ __forceinline__ int next_tile(const Scope &scope, int first) {
    first += VISIT;
    return first >= scope.hole && first + VISIT <= scope.hole_end ? scope.hole_end / VISIT * VISIT : first;
}

__device__ __forceinline__ int first_tile(const Scope &scope) { return next_tile(scope, -VISIT); }

__device__ __forceinline__ bool whole_tile(const Scope &scope, int first) {
    return first + VISIT <= scope.end && (first + VISIT <= scope.hole || first >= scope.hole_end);
}

// ---- numbers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// exp(score * scale - shift). Exponents count powers of 2, so that one fused operation computes them. For float32 they
// count powers of e: converting the shift would round it once more, at the size of the largest scores.
#define EXPONENT_UNIT (PLANES == 1 ? LOG2E : 1.0f)  // of scale_log2 and of shift
__device__ __forceinline__ float exponential(float S, float scale_log2, float shift) {
    const float x = fmaf(S, scale_log2, -shift);
    return exp2_fast(PLANES == 1 ? x : x * LOG2E);
}

// Pairs of values, packed into a word. The planes of float32 are bfloat16.
typedef Float<ELEMENT == FLOAT16 ? FLOAT16 : BFLOAT16> Half;
__device__ __forceinline__ u32 pack(float low, float high) { return Half::narrow_pair(low, high); }
__device__ __forceinline__ float2 unpack(u32 word) { return Half::widen_pair(word); }

// The bfloat16 planes of two floats; if PLANES is 1, the two rounded floats.
__device__ __forceinline__ void split(float low, float high, u32 planes[PLANES]) {
#pragma unroll
    for (int i = 0; i < PLANES; ++i) {
        planes[i] = pack(low, high);
        low -= __uint_as_float(planes[i] << 16);  // exact; not needed after the last plane
        high -= __uint_as_float(planes[i] & 0xffff0000u);
    }
}

// Two neighbouring columns, as floats.
__device__ __forceinline__ float2 load_pair(const View &view, long long at) {
#if ELEMENT == 0
    return *(const float2 *)((const float *)view.data + at);
#else
    return unpack(*(const u32 *)((const u16 *)view.data + at));
#endif
}

__device__ __forceinline__ void store_pair(const View &view, long long at, float low, float high) {
#if ELEMENT == 0
    *(float2 *)((float *)view.data + at) = {low, high};
#else
    *(u32 *)((u16 *)view.data + at) = pack(low, high);
#endif
}

// ---- scores --------------------------------------------------------------------------------------------------------

// Makes the score of each key that holds no point -inf, after multiplication by scale_log2. The keys of S begin at
// `position`.
template <int TILES>
__device__ __forceinline__ void mask(float (&S)[TILES][4], const Scope &scope, int position, float scale_log2) {
#pragma unroll
    for (int first = 0; first < TILES; first += 4) {
        const u32 has_point = points_from(scope, position + first * 8) >> (threadIdx.x & 3) * 2;
#pragma unroll
        for (int n = first; n < first + 4 && n < TILES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (!(has_point >> (n - first) * 8 + e & 1))
                    S[n][e] = S[n][2 + e] = scale_log2 < 0 ? INFINITE : -INFINITE;
    }
}

// Raises m of a row to `margin` above its maximum in S. Returns the factor that brings earlier sums to the new m.
template <int TILES>
__device__ __forceinline__ float raise_row_max(
    float &row_max, const float (&S)[TILES][4], int half, float scale_log2, float margin
) {
    float low = INFINITE, high = -INFINITE;  // with a negative scale the lowest score is the maximum
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        low = fminf(fminf(low, S[n][2 * half]), S[n][2 * half + 1]);
        high = fmaxf(fmaxf(high, S[n][2 * half]), S[n][2 * half + 1]);
    }
    float x = fmaxf(low * scale_log2, high * scale_log2);
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 2));
    x = fmaxf(x + margin, row_max);
    const float factor = exponential(row_max, 1, x);
    row_max = x;
    return factor;
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// Starts to copy 16 bytes into shared memory; writes zeros if not `loads`.
__device__ __forceinline__ void copy_16_bytes(void *to, const void *from, bool loads) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(loads ? 16 : 0)
                 : "memory");
}

// The same for 8 bytes.
__device__ __forceinline__ void copy_8_bytes(void *to, const void *from, bool loads) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :
                 : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(loads ? 8 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until this thread's copies have arrived, except those of the last LEFT commits; warpgroup products may then
// read them.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A split barrier: a thread arrives long before it waits, so that warps need not run in step.
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, int parity) {
    asm volatile("{.reg .pred p; again: mbarrier.test_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
                 :
                 : "r"(barrier), "r"(parity)
                 : "memory");
}

#endif  // GPU3D_ATTENTION_CUH
