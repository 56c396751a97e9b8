// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup products (wgmma): 64 rows by N columns, which run asynchronously between begin_products and
// wait_for_products. The left operand is in registers or in shared memory, the right one in shared memory. The same
// swizzled tile of shared memory is a "K-major" operand (each row runs along the sum) or an "MN-major" one (each row is
// a step of the sum).

#ifndef GPU3D_WGMMA_CUH
#define GPU3D_WGMMA_CUH

#include "types.cuh"

// clang-format off
#if ELEMENT == 2
#define WGMMA_OF(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 "
#else
#define WGMMA_OF(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 "
#endif
#define QUAD(c, i) c(d[i][0]), c(d[i][1]), c(d[i][2]), c(d[i][3])
#define QUADS_4(c) QUAD(c, 0), QUAD(c, 1), QUAD(c, 2), QUAD(c, 3)
#define QUADS_8(c) QUADS_4(c), QUAD(c, 4), QUAD(c, 5), QUAD(c, 6), QUAD(c, 7)
#define QUADS_16(c) QUADS_8(c), QUAD(c, 8), QUAD(c, 9), QUAD(c, 10), QUAD(c, 11), QUAD(c, 12), QUAD(c, 13), QUAD(c, 14), QUAD(c, 15)
#define ADDS(x) "+f"(x)
#define SETS(x) "=f"(x)
#define LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_32 LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64 LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a * b, or d += a * b if `adds`: 64 x 16 times 16 x N, with a in registers or in shared memory. MN_B: b is
// MN-major; MN_A: a is. wgmma_new is d = a * b; the compiler then knows that nothing reads the registers of d before.
#define DEFINE_WGMMA(N, TILES, LIST, A0, A1, A2, A3, B, P, T)                                                        \
    template <int MN_B>                                                                                              \
    __device__ __forceinline__ void wgmma(float (&d)[TILES][4], const u32 a[4], u64 b, int adds) {                   \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                   \
                     WGMMA_OF(N) "{" LIST "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #T ";}" \
                     : QUADS_##TILES(ADDS)                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(MN_B));                    \
    }                                                                                                                \
    template <int MN_B, int MN_A = 0>                                                                                \
    __device__ __forceinline__ void wgmma(float (&d)[TILES][4], u64 a, u64 b, int adds) {                            \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #A2 ", 0;\n"                                                  \
                     WGMMA_OF(N) "{" LIST "}, %" #A0 ", %" #A1 ", p, 1, 1, %" #A3 ", %" #B ";}"                      \
                     : QUADS_##TILES(ADDS) : "l"(a), "l"(b), "r"(adds), "n"(MN_A), "n"(MN_B));                       \
    }                                                                                                                \
    template <int MN_B, int MN_A = 0>                                                                                \
    __device__ __forceinline__ void wgmma_new(float (&d)[TILES][4], u64 a, u64 b) {                                  \
        asm volatile("{.reg .pred p; setp.ne.b32 p, 0, 0;\n"                                                         \
                     WGMMA_OF(N) "{" LIST "}, %" #A0 ", %" #A1 ", p, 1, 1, %" #A2 ", %" #A3 ";}"                     \
                     : QUADS_##TILES(SETS) : "l"(a), "l"(b), "n"(MN_A), "n"(MN_B));                                  \
    }
DEFINE_WGMMA(32, 4, LIST_16, 16, 17, 18, 19, 20, 21, 22)
DEFINE_WGMMA(64, 8, LIST_32, 32, 33, 34, 35, 36, 37, 38)
DEFINE_WGMMA(128, 16, LIST_64, 64, 65, 66, 67, 68, 69, 70)
// clang-format on

// Step i of d = a * b, of which step 0 is the first.
template <int MN_B, int MN_A, int TILES>
__device__ __forceinline__ void multiply_step(float (&d)[TILES][4], int i, u64 a, u64 b) {
    if (i == 0) wgmma_new<MN_B, MN_A>(d, a, b);
    else wgmma<MN_B, MN_A>(d, a, b, 1);
}

// The descriptor of an operand that begins at `start`, in a tile of `rows` rows of WORDS 16-bit words (16, 32 or 64),
// which are swizzled over their 2 * WORDS bytes. Groups of eight rows follow each other; words 64 to 127 of the rows
// lie in a tile of their own behind it.
template <int WORDS>
__device__ __forceinline__ u64 operand(const u16 *start, int rows) {
    const u64 at = (u32)__cvta_generic_to_shared(start);
    const u64 columns = rows * WORDS * 2, group = 8 * WORDS * 2, swizzle = WORDS == 64 ? 1 : WORDS == 32 ? 2 : 3;
    return at >> 4 | columns >> 4 << 16 | group >> 4 << 32 | swizzle << 62;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from reading an asynchronous product before this line: it does not know when the product arrives.
template <int TILES>
__device__ __forceinline__ void fence_product(float (&tile)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
        asm volatile("" : "+f"(tile[n][0]), "+f"(tile[n][1]), "+f"(tile[n][2]), "+f"(tile[n][3])::"memory");
}

#endif  // GPU3D_WGMMA_CUH
