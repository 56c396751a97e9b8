// SPDX-License-Identifier: Apache-2.0
// The loop of attention kernels over a scope's rows, with its loads and tensor-core products.
//
// A block keeps OWN rows of one scope and head on chip: the stationary rows. All rows of the scope are streamed past
// them, VISIT rows (a tile) at a time, and a tile is worked through in chunks of CHUNK rows:
//   forward  stationary Q, streamed K and V      dq  stationary Q and dO, streamed K and V
//   dkdv     stationary K and V, streamed Q and dO
//
// Products are mma.sync m16n8k16 with float32 accumulation or, on Hopper, warpgroup products (wgmma). Both lay out
// their results alike, and only this file knows which is used: a lane holds row lane / 4 (and that + 8) and columns 2 *
// (lane % 4) + {0, 1} of each 16 x 8 tile.
// float32 operands are split into three bfloat16 planes of 8 bits each, x = x0 + x1 + x2 (exact except for the lowest
// bits of tiny x). A product sums the six pairs of planes i + j < 3; what is left out is below 2^-23 of |a| |b|. So
// float32 runs through the same code at a sixth of the rate. Where registers cannot hold the planes of the stationary
// rows (D = 128), these rows stay in shared memory as floats and are split for each product.
//
// The limit at D = 16 is the exponential unit: on an H100 it is busy 83 % of the cycles in scopes of 4096, and 75 % in
// scopes of 1024. The rest is latency, so more warps help more than more rows a warp. At D = 16 two blocks share a
// multiprocessor. A block alone reaches only 57 % of the exponential rate, and it is alone while the other starts or
// ends. Starting and ending took 11,000 cycles, mostly divisions, addresses and branches; now 5,500.
//
// Milliseconds gained in the forward pass at D = 16 (from 3.16 to 2.57; H100):
//   no branch between the exponentials of a chunk          0.3
//   tiles of 256 rows                                      0.08
//   range checked on bits, row sums by a column of ones    0.11
//   next S begun before O += P V                           0.01
//   blocks that start and end faster                       0.09 (scopes of 1024: 6 %)
// Tried and not better (2.71 ms then): 2^x by a cubic on the FMA units for 1/8, 2/8 or 3/8 of P (2.80, 3.0, 3.2 ms, and
// an error of 7.5e-5); ex2 on pairs of halves (same rate); scale and row maximum folded into the products, as two
// planes of scale * q and sums that start from -m (32 operations a chunk less, 8 products more: 2.76 became 2.93); row
// sums by additions (2.80); O += P V begun only beside the next exponentials (2.85).
//
// At D = 32, and at D = 64 and 128 before attention_forward_roles.cu, these gained: warpgroup products; 12 or 16 warps
// that share a tile; tiles loaded two ahead; O += P V beside the next exponentials (LAZY). Not better: P truncated
// instead of rounded; the next chunk's S begun before this one's exponentials; two stages; chunks of 128.

#ifndef GPU3D_ATTENTION_STREAM_CUH
#define GPU3D_ATTENTION_STREAM_CUH

#include "attention.cuh"
#if WGMMA
#include "wgmma.cuh"
#endif

#ifndef WARPS
#define WARPS 4       // a block
#define OWN_TILES 2   // tiles of 16 stationary rows a warp
#define CHUNK 16      // streamed rows a product takes
#define BLOCKS 1      // blocks that must fit on a multiprocessor: limits registers
#define OWN_SHARED 0  // 1: stationary rows lie in shared memory, which frees registers (float32)
#define PAIRED 0      // 1: two warps share the stationary rows, each computes one of two gradients (dkdv, float32)
#define LAZY 0        // 1: a chunk's second product overlaps the next chunk's exponentials (WGMMA)
#endif

#define THREADS (32 * WARPS)
#define OWN (16 * WARPS / (1 + PAIRED) * OWN_TILES)  // stationary rows a block
#if WGMMA
#define ROW D               // 16-bit words a row in shared memory
#define TENSOR (VISIT * D)  // ... of one streamed tile
#else
#define ROW (D + 8)  // the padding puts 8 rows into different banks
#define TENSOR (PLANES * VISIT * ROW)
#endif
#define PARTS (THREADS / VISIT)  // threads that load one streamed row
#define STAGES (PLANES == 1 ? 3 : 1)

static_assert(!OWN_SHARED || PLANES > 1, "floats");
static_assert(!WGMMA || D == 32, "larger heads have kernels of their own");
static_assert(D % 16 == 0, "a row is whole k-steps of the first product");
static_assert(CHUNK % 16 == 0, "a chunk is whole k-steps of the second product");
static_assert(VISIT % CHUNK == 0 && (PLANES > 1 || VISIT > CHUNK), "a tile's copies arrive during a chunk");
static_assert(!LAZY || VISIT / CHUNK % 2 == 0, "chunks alternate between two operands");
static_assert(!PAIRED || (PLANES > 1 && OWN_SHARED && WARPS % 2 == 0), "pairs of warps that finish a chunk together");
static_assert(THREADS % VISIT == 0 && (PARTS & PARTS - 1) == 0, "each thread loads a part of one row");

// The position of this block's first stationary row.
__device__ __forceinline__ int first_stationary(const Divisors &divisors) {
    return (blockIdx.x - divide(blockIdx.x, divisors.tiles) * divisors.tiles.by) * OWN;
}

// Finds the block's scope, head and first stationary position; false past the end of a short scope.
__device__ __forceinline__ bool locate_block(
    Scope &scope, int &head, int &first, const Clouds &clouds, const int *table, int width, const Divisors &divisors
) {
    const int item = divide(blockIdx.x, divisors.tiles), index = divide(item, divisors.heads);
    head = item - index * divisors.heads.by;
    first = first_stationary(divisors);
    scope = scope_at(clouds, table, width, index, divisors.size);
    return first < scope.end;
}

// ---- tensor cores --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma(float c[4], const u32 a[4], u32 b0, u32 b1) {
#if ELEMENT == 2
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit words; `row` is the address of this lane's row.
__device__ __forceinline__ void load_matrices(u32 b[4], const u16 *row) {
    const u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at));
}

__device__ __forceinline__ void load_matrices_transposed(u32 b[4], const u16 *row) {
    const u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at));
}

// The stationary rows, left operand of `products`.
#if !OWN_SHARED
typedef u32 Rows[PLANES][OWN_TILES][D / 16][4];
#define STATIONARY_ROWS(name, i) Rows name
#else
typedef float2 *Rows;  // tensor i of them lies behind the streamed planes and floats
#define STATIONARY_ROWS(name, i) const Rows name = (Rows)(stages + 2 * TENSOR) + VISIT * D + (i) * (OWN * D / 2)
// Where a lane keeps the two columns that make word i of the left operand of step k. Only this lane reads them.
__device__ __forceinline__ int stationary_pair(int m, int k, int i) {
    return ((m * (D / 16) + k) * 4 + i) * THREADS + threadIdx.x;
}
#endif
typedef float Product[OWN_TILES][CHUNK / 8][4];         // S or dP: stationary rows by a chunk of streamed ones
typedef u32 Operand[PLANES][OWN_TILES][CHUNK / 16][4];  // P or dS, of the same shape, as left operand of `accumulate`
typedef float Accumulator[OWN_TILES][D / 8][4];         // O, dQ, dK or dV: stationary rows by columns

#if !WGMMA

// sum += a * b over all planes. Tensor cores truncate what they add, always towards zero, so a sum of six products a
// step over all keys would drift. With planes each step therefore starts from zero, sums the small planes apart, and is
// added with ordinary rounding, one part after the other: their sum would need registers.
// The outer loop runs over the planes of the keys, whether these are stationary or streamed. So q k^T has the same bits
// in every kernel, and exp(q k^T - lse) of the backward pass sees no difference between them.
template <bool KEYS_STREAMED>
__device__ __forceinline__ void mma_planes(float sum[4], const u32 (*a)[4], int stride, const u32 b[PLANES][2]) {
#if PLANES == 1
    mma(sum, a[0], b[0][0], b[0][1]);
#else
    float high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
    mma(high, a[0], b[0][0], b[0][1]);
#pragma unroll
    for (int outer = 0; outer < PLANES; ++outer)
#pragma unroll
        for (int inner = 0; inner < PLANES - outer; ++inner) {
            const int i = KEYS_STREAMED ? inner : outer, j = KEYS_STREAMED ? outer : inner;
            if (i + j) mma(low, a[i * stride], b[j][0], b[j][1]);
        }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = (sum[e] + high[e]) + low[e];
#endif
}

// The right operands of two neighbouring tiles in all planes. `at` is this lane's row in the first plane.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_planes(u32 one[PLANES][2], u32 other[PLANES][2], const u16 *at) {
#pragma unroll
    for (int j = 0; j < PLANES; ++j) {
        u32 b[4];
        if (TRANSPOSED) load_matrices_transposed(b, at + j * VISIT * ROW);
        else load_matrices(b, at + j * VISIT * ROW);
        one[j][0] = b[0];
        one[j][1] = b[1];
        other[j][0] = b[2];
        other[j][1] = b[3];
    }
}

// The left operand of step k of stationary tile m.
__device__ __forceinline__ void stationary_operand(u32 left[PLANES][4], const Rows stationary, int m, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 planes[PLANES];
#if OWN_SHARED
        const float2 pair = stationary[stationary_pair(m, k, i)];
        split(pair.x, pair.y, planes);
#else
#pragma unroll
        for (int j = 0; j < PLANES; ++j) planes[j] = stationary[j][m][k][i];
#endif
#pragma unroll
        for (int j = 0; j < PLANES; ++j) left[j][i] = planes[j];
    }
}

// tile = stationary * streamed^T, for the chunk of streamed rows that begins at `streamed`.
template <bool KEYS_STREAMED>
__device__ __forceinline__ void products(Product tile, const Rows stationary, const u16 *streamed) {
    constexpr int UNROLLED = OWN_SHARED ? D / 32 : D / 16;  // unrolling all steps would need too many registers
    const int lane = threadIdx.x & 31;
    streamed += ((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 8;
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) tile[m][n][0] = tile[m][n][1] = tile[m][n][2] = tile[m][n][3] = 0;
#pragma unroll
    for (int n = 0; n < CHUNK / 16; ++n)
#pragma unroll UNROLLED
        for (int k = 0; k < D / 16; ++k) {
            u32 one[PLANES][2], other[PLANES][2];  // of eight streamed rows each
            load_planes<false>(one, other, streamed + n * 16 * ROW + k * 16);
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m) {
                u32 left[PLANES][4];
                stationary_operand(left, stationary, m, k);
                mma_planes<KEYS_STREAMED>(tile[m][2 * n], left, 1, one);
                mma_planes<KEYS_STREAMED>(tile[m][2 * n + 1], left, 1, other);
            }
        }
}

// sums += left * streamed, for the chunk of streamed rows that begins at `streamed`.
__device__ __forceinline__ void accumulate(Accumulator sums, const Operand left, const u16 *streamed) {
    const int lane = threadIdx.x & 31;
    streamed += (lane & 15) * ROW + (lane >> 4) * 8;
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k)
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            u32 one[PLANES][2], other[PLANES][2];  // of eight columns each
            if (PLANES > 1) __syncwarp();
            load_planes<true>(one, other, streamed + k * 16 * ROW + n * 16);
#pragma unroll
            for (int m = 0; m < OWN_TILES; ++m) {
                mma_planes<true>(sums[m][2 * n], &left[0][m][k], OWN_TILES * (CHUNK / 16), one);
                mma_planes<true>(sums[m][2 * n + 1], &left[0][m][k], OWN_TILES * (CHUNK / 16), other);
            }
        }
}

// Adds up each row of P: sums += P * 1. `ones` holds pairs of ones.
__device__ __forceinline__ void add_rows(float row[OWN_TILES][4], const Operand P, const u32 ones[2]) {
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
        for (int k = 0; k < CHUNK / 16; ++k) {
#if PLANES == 1
            mma(row[m], P[0][m][k], ones[0], ones[1]);
#else
            float step[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < PLANES; ++i) mma(step, P[i][m][k], ones[0], ones[1]);
#pragma unroll
            for (int e = 0; e < 4; ++e) row[m][e] += step[e];
#endif
        }
}

__device__ __forceinline__ void begin_products() {}
__device__ __forceinline__ void commit_products() {}
template <int LEFT>
__device__ __forceinline__ void wait_for_products() {}

#else

// Hopper: a warpgroup of four warps has 64 stationary rows. Both products read the streamed rows straight from shared
// memory: S takes a tile K-major, and the sums take it MN-major.
static_assert(OWN_TILES == 1 && WARPS % 4 == 0 && PLANES == 1, "a warpgroup has 64 stationary rows");

// tile = stationary * streamed^T, for the chunk of streamed rows that begins at `streamed`.
template <bool KEYS_STREAMED>
__device__ __forceinline__ void products(Product tile, const Rows stationary, const u16 *streamed) {
    const u64 first = operand<ROW>(streamed, VISIT);  // addresses in it count units of 16 bytes: eight words
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        wgmma<0>(*(float (*)[CHUNK / 8][4]) tile[0], stationary[0][0][k], first + k * 16 / 8, k > 0);
}

// sums += left * streamed, for the chunk of streamed rows that begins at `streamed`.
__device__ __forceinline__ void accumulate(Accumulator sums, const Operand left, const u16 *streamed) {
    const u64 first = operand<ROW>(streamed, VISIT);
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k)
        wgmma<1>(*(float (*)[D / 8][4]) sums[0], left[0][0][k], first + k * 16 * ROW / 8, 1);
}

#endif

// The same for a product of this file; other products are there when they return.
template <int TILES>
__device__ __forceinline__ void fence_product(float (&tile)[OWN_TILES][TILES][4]) {
#if WGMMA
    fence_product(tile[0]);
#endif
}

// Sets two columns of P or dS, of row 8 * half + lane / 4 of tile m. A product's result has the layout that the left
// operand of the next product needs; values are only rounded and packed.
__device__ __forceinline__ void set_operand(Operand left, int m, int n, int half, float low, float high) {
    u32 planes[PLANES];
    split(low, high, planes);
#pragma unroll
    for (int i = 0; i < PLANES; ++i) left[i][m][n / 2][n % 2 * 2 + half] = planes[i];
}

__device__ __forceinline__ void clear(Accumulator sums) {
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0;
}

// ---- stationary rows -----------------------------------------------------------------------------------------------

// The position of this lane's first row in stationary tile m, if the block's first position is `first`. The lane's
// other row is 8 positions and 8 slots further: both lie in one bucket, since its size and `first` are multiples of 16.
__device__ __forceinline__ int stationary_position(int first, int m) {
    return first + ((threadIdx.x >> 5 + PAIRED) * OWN_TILES + m) * 16 + (threadIdx.x >> 2 & 7);
}

// The slots of the lane's first rows.
__device__ __forceinline__ void stationary_slots(int slots[OWN_TILES], const Scope &scope, int first) {
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m) {
        const int position = stationary_position(first, m);
        slots[m] = slot_at(scope, min(position, scope.end - 1));
    }
}

// Rows that hold no point become zeros. This starts before the copies of streamed rows, and is done when the first of
// these arrive.
__device__ __forceinline__ void load_stationary(
    Rows rows, const View &view, const Scope &scope, const int slots[OWN_TILES], int first
) {
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m) {
        const int position = stationary_position(first, m);
        const long long from = row_of(view, slots[m]) + (threadIdx.x & 3) * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool has_point = has_point_at(scope, position + 8 * half);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const long long at = from + 8ll * half * view.row + n * 8;
                const bool loads = has_point & (n == 0 || n * 8 < view.dim);
                const int i = n % 2 * 2 + half;
#if OWN_SHARED
                copy_8_bytes(rows + stationary_pair(m, n / 2, i), (const float *)view.data + at, loads);
#else
                u32 planes[PLANES] = {0};
#if ELEMENT == 0
                const float2 x = loads ? load_pair(view, at) : float2{0, 0};
                split(x.x, x.y, planes);
#else
                if (loads)
                    asm volatile("ld.global.b32 %0, [%1];"
                                 : "=r"(planes[0])
                                 : "l"((const u16 *)view.data + at)
                                 : "memory");
#endif
#pragma unroll
                for (int j = 0; j < PLANES; ++j) rows[j][m][n / 2][i] = planes[j];
#endif
            }
        }
    }
    __syncwarp();  // without this the compiler delays some of the loads
}

// The dot products of the stationary rows of two tensors in float32, on all four lanes of a row.
__device__ __forceinline__ void dot_stationary(
    float dot[OWN_TILES][2],
    const View &one,
    const View &other,
    const Scope &scope,
    const int slots[OWN_TILES],
    int first
) {
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m) {
        const int position = stationary_position(first, m), column = (threadIdx.x & 3) * 2;
        const long long of_one = row_of(one, slots[m]) + column, of_other = row_of(other, slots[m]) + column;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool has_point = has_point_at(scope, position + 8 * half);
            float x = 0;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                if (!has_point || n * 8 >= one.dim) break;
                const float2 a = load_pair(one, of_one + 8ll * half * one.row + n * 8);
                const float2 b = load_pair(other, of_other + 8ll * half * other.row + n * 8);
                x += a.x * b.x + a.y * b.y;
            }
            x += __shfl_xor_sync(FULL, x, 1);
            dot[m][half] = x + __shfl_xor_sync(FULL, x, 2);
        }
    }
}

// Writes factor(m, half, inside the scope, holds a point, slot) * sums to the stationary rows, and 0 to padding. Every
// slot of a layout is stationary in exactly one block.
template <class Factor>
__device__ __forceinline__ void store_stationary(
    const View &view, const Accumulator sums, Factor factor, const Scope &scope, const int slots[OWN_TILES], int first
) {
#pragma unroll
    for (int m = 0; m < OWN_TILES; ++m) {
        const int position = stationary_position(first, m);
        const long long to = row_of(view, slots[m]) + (threadIdx.x & 3) * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool inside = position + 8 * half < scope.end, has_point = has_point_at(scope, position + 8 * half);
            const float x = factor(m, half, inside, has_point, slots[m] + 8 * half);
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                if (inside & (n == 0 || n * 8 < view.dim))
                    store_pair(
                        view, to + 8ll * half * view.row + n * 8, has_point ? x * sums[m][n][2 * half] : 0,
                        has_point ? x * sums[m][n][2 * half + 1] : 0
                    );
        }
    }
}

// ---- streamed rows -------------------------------------------------------------------------------------------------

// The slot of this thread's row of the streamed tile, row threadIdx.x / PARTS; -1 if it holds no point.
__device__ __forceinline__ int streamed_slot(const Scope &scope, int first) {
    const int position = first + threadIdx.x / PARTS;
    return has_point_at(scope, position) ? slot_at(scope, position) : -1;
}

#if PLANES == 1

// Starts to copy this thread's part of row `slot` of both tensors into a stage [2, VISIT, ROW] of shared memory; writes
// zeros if slot is -1.
__device__ __forceinline__ void load_streamed(u16 *stage, const View &one, const View &other, int slot) {
    const int row = threadIdx.x / PARTS, first = threadIdx.x % PARTS * 8;
    const int swizzle = WGMMA ? (row >> 1 & 3) * 8 : 0;
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
        const View &view = tensor ? other : one;
        const long long from = row_of(view, max(slot, 0)) + first;
        u16 *to = stage + tensor * TENSOR + row * ROW;
#pragma unroll
        for (int c = 0; c < D; c += 8 * PARTS) {
            if (8 * PARTS > D && first >= D) continue;
            const bool loads = (slot >= 0) & (c + first == 0 || c + first < view.dim);
            copy_16_bytes(to + (c + first ^ swizzle), (const u16 *)view.data + from + c, loads);
        }
    }
}

#else

static_assert(8 * PARTS <= D, "each thread loads a part of a row");

// The same for float32: the floats go behind the stage, as [2, D / 4 / PARTS, THREADS] vectors of 16 bytes. A thread
// later reads only the vectors that it copied.
__device__ __forceinline__ void load_streamed(u16 *stage, const View &one, const View &other, int slot) {
    const int first = threadIdx.x % PARTS * 8;
    float4 *to = (float4 *)(stage + 2 * TENSOR) + threadIdx.x;
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
        const View &view = tensor ? other : one;
        const float *from = (const float *)view.data + row_of(view, max(slot, 0)) + first;
#pragma unroll
        for (int c = 0; c < D; c += 8 * PARTS) {
            const bool loads = (slot >= 0) & (c + first == 0 || c + first < view.dim);
#pragma unroll
            for (int half = 0; half < 2; ++half, to += THREADS) copy_16_bytes(to, from + c + 4 * half, loads);
        }
    }
}

// Splits them into the stage's planes [2, PLANES, VISIT, ROW].
__device__ __forceinline__ void split_streamed(u16 *stage) {
    const float4 *from = (const float4 *)(stage + 2 * TENSOR) + threadIdx.x;
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
        u16 *to = stage + tensor * TENSOR + threadIdx.x / PARTS * ROW + threadIdx.x % PARTS * 8;
#pragma unroll 1
        for (int c = 0; c < D; c += 8 * PARTS, from += 2 * THREADS) {
            const float4 low = from[0], high = from[THREADS];
            u32 word[4][PLANES];
            split(low.x, low.y, word[0]);
            split(low.z, low.w, word[1]);
            split(high.x, high.y, word[2]);
            split(high.z, high.w, word[3]);
#pragma unroll
            for (int i = 0; i < PLANES; ++i)
                *(uint4 *)(to + c + i * VISIT * ROW) = {word[0][i], word[1][i], word[2][i], word[3][i]};
        }
    }
}

#endif

// ---- the loop over a scope's rows ----------------------------------------------------------------------------------

// Streams all rows of the scope, CHUNK at a time, and calls for each chunk
//   first_product(rows)         starts S (and dP). The chunk's rows of tensor `one` begin at `rows`, those of `other`
//                               TENSOR words later
//   pointwise(position, whole, stage, chunk, now)
//                               computes P (or dS) from the finished products into operand `now`; LAZY alternates
//                               between two operands. `whole`: no row of the tile is padding
//   second_product(rows, now)   starts O += P V, or the same for dQ, dK and dV
// It also calls
//   prepare()                   once, while the first tiles arrive
//   fetch(slot) -> float2       for each row: other values that a thread loads with it, and
//   put(stage, value)           stores a tile later
#if PLANES == 1

// Three stages: one holds the tile in work, one the next tile, and the third receives the tile after that as soon as
// all warps are done with the tile that was there.
template <class Prepare, class FirstProduct, class Pointwise, class SecondProduct, class Fetch, class Put>
__device__ __forceinline__ void stream_rows(
    u16 *stages,
    const View &one,
    const View &other,
    const Scope &scope,
    Prepare prepare,
    FirstProduct first_product,
    Pointwise pointwise,
    SecondProduct second_product,
    Fetch fetch,
    Put put
) {
    __shared__ u64 barriers[2];  // each has a phase a tile: the next tile has arrived; the last is free
    const u32 arrived = (u32)__cvta_generic_to_shared(barriers), released = arrived + 8;
    if (threadIdx.x == 0)
        for (int i = 0; i < 2; ++i)
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(arrived + 8 * i), "r"(THREADS) : "memory");
    int tile = first_tile(scope), loading = tile;
    int slot = streamed_slot(scope, tile);
    float2 fetched;
    const auto load = [&](int stage) {  // the tile at `loading`, whose slot was found earlier
        load_streamed(stages + stage * 2 * TENSOR, one, other, slot);
        commit_copies();
        fetched = fetch(slot);
        loading = next_tile(scope, loading);
        slot = streamed_slot(scope, loading);
    };
    load(0);
    put(0, fetched);
    load(1);
    prepare();
    wait_for_copies<1>();
    __syncthreads();  // the first tile has arrived and the barriers are initialized
    begin_products();
    first_product(stages);
    commit_products();
    wait_for_products<0>();

    for (int stage = 0, parity = 0; tile < scope.end; parity ^= 1) {
        const int next_stage = stage == 2 ? 0 : stage + 1, free_stage = stage == 0 ? 2 : stage - 1;
        const u16 *rows = stages + stage * 2 * TENSOR;
        const bool whole = whole_tile(scope, tile);
#pragma unroll
        for (int chunk = 0; chunk < VISIT; chunk += CHUNK) {
            const bool second = chunk == CHUNK, last = chunk + CHUNK == VISIT;
            const int now = LAZY ? chunk / CHUNK % 2 : 0;
            if (second) put(next_stage, fetched);
            if (last) {                                  // arrive now, wait later
                wait_for_copies<(VISIT > 2 * CHUNK)>();  // of the next tile; those of the tile after it continue
                arrive(arrived);
            }
            pointwise(tile + chunk, whole, stage, chunk, now);
            if (second) wait(released, parity);
            if (last) wait(arrived, parity);
            begin_products();
            // After the last tile this product is not used.
            first_product(last ? stages + next_stage * 2 * TENSOR : rows + (chunk + CHUNK) * ROW);
            if (LAZY) commit_products();
            second_product(rows + chunk * ROW, now);
            commit_products();
            if (second) load(free_stage);  // while the products run
            wait_for_products<LAZY>();
            if (chunk == 0) arrive(released);  // done with the tile before
        }
        tile = next_tile(scope, tile);
        stage = next_stage;
    }
    wait_for_products<0>();
}

#else

// One stage: while a tile is in work, the floats of the next arrive. They are split when all warps are done with the
// tile.
template <class Prepare, class FirstProduct, class Pointwise, class SecondProduct, class Fetch, class Put>
__device__ __forceinline__ void stream_rows(
    u16 *stages,
    const View &one,
    const View &other,
    const Scope &scope,
    Prepare prepare,
    FirstProduct first_product,
    Pointwise pointwise,
    SecondProduct second_product,
    Fetch fetch,
    Put put
) {
    float2 fetched;
    int tile = first_tile(scope), loading = tile;
    const auto load = [&] {
        const int slot = streamed_slot(scope, loading);
        load_streamed(stages, one, other, slot);
        commit_copies();
        fetched = fetch(slot);
        loading = next_tile(scope, loading);
    };
    load();
    prepare();
    for (; tile < scope.end; tile = next_tile(scope, tile)) {
        wait_for_copies<0>();
        __syncthreads();  // all warps are done with the tile before
        split_streamed(stages);
        put(0, fetched);
        __syncthreads();
        load();
        const bool whole = whole_tile(scope, tile);
#pragma unroll 1
        for (int chunk = 0; chunk < VISIT; chunk += CHUNK) {
            const u16 *rows = stages + chunk * ROW;
            first_product(rows);
            pointwise(tile + chunk, whole, 0, chunk, 0);
            second_product(rows, 0);
        }
    }
}

#endif

#endif  // GPU3D_ATTENTION_STREAM_CUH
