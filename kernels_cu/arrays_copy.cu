// SPDX-License-Identifier: Apache-2.0
// Copies a strided array into a contiguous one (row-major, the last dimension fastest). Strides are in bytes and may be
// negative or 0. gpu3d/cuda/arrays.py describes the array by struct Strided: it merges dimensions that lie behind one
// another, and takes the largest word that divides every stride, the contiguous run and both addresses.
//
//   copy_strided     a thread copies ITEMS words; neighbouring threads write neighbouring words
//   copy_transposed  a block copies a tile of TILE x TILE words of two dimensions: the last one, and `fast`, whose
//                    words lie closest in the source. It reads along `fast` and writes along the last, so that both
//                    sides are coalesced; in between the tile is in shared memory.
//
// copy_strided reads whole sectors where the last dimension is contiguous, and also where it is so short that a block
// uses all of each sector it reads (points [3, N] read as [N, 3]). Other transposed arrays need tiles.
//
// Indices below 2^31 are split into coordinates by multiplication, larger ones by 64-bit division, which is slower.

#ifndef WORD
#define WORD 4  // bytes: 1, 2, 4, 8 or 16
#endif
#define THREADS 256  // mirrored by gpu3d/cuda/arrays.py, as are ITEMS, DIMENSIONS and TILE
#define ITEMS 4
#define DIMENSIONS 8
#if WORD <= 2
#define TILE 64  // a row of a tile fills whole sectors of 32 bytes
#else
#define TILE 32
#endif
#define PADDING (WORD < 4 ? 4 / WORD : 1)  // words behind a row of the tile: a column then lies in different banks

#include "types.cuh"

#if WORD == 1
typedef u8 word_t;
#elif WORD == 2
typedef u16 word_t;
#elif WORD == 4
typedef u32 word_t;
#elif WORD == 8
typedef u64 word_t;
#else
typedef uint4 word_t;
#endif

static_assert(sizeof(word_t) == WORD, "WORD is 1, 2, 4, 8 or 16");
static_assert(THREADS % TILE == 0, "a block reads and writes whole rows of a tile");

// Dimensions [0, dimensions), the outermost first. All sizes are positive.
struct Strided {
    u64 count;                     // words in all: the product of the sizes
    u64 size[DIMENSIONS];          // words
    long long stride[DIMENSIONS];  // bytes from a word to the next in the source
    u32 magic[DIMENSIONS];         // x / size == __umulhi(x, magic) >> shift for 0 <= x < 2^31; read where size > 1
    u32 shift[DIMENSIONS];
    u32 dimensions;
};
static_assert(sizeof(Strided) == 208, "as gpu3d/cuda/arrays.py packs it");

// Splits each of the indices into coordinates, and returns the words' offsets in the source, in bytes.
template <class Index>
__device__ __forceinline__ void offsets_of(const Strided &from, Index (&index)[ITEMS], long long (&offset)[ITEMS]) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) offset[k] = 0;
#pragma unroll 1
    for (int d = from.dimensions - 1; d > 0; --d) {
        const long long stride = from.stride[d];
        const Index size = (Index)from.size[d];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            Index outer;
            if (sizeof(Index) == 4) outer = __umulhi((u32)index[k], from.magic[d]) >> from.shift[d];
            else outer = index[k] / size;
            offset[k] += (long long)(index[k] - outer * size) * stride;
            index[k] = outer;
        }
    }
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) offset[k] += (long long)index[k] * from.stride[0];
}

template <class Index>
__device__ __forceinline__ void gather(const char *__restrict__ source, const Strided &from, word_t *__restrict__ out) {
    const u64 first = (u64)blockIdx.x * (THREADS * ITEMS) + threadIdx.x;
    Index index[ITEMS];
    long long offset[ITEMS];
    word_t word[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) index[k] = (Index)(first + k * THREADS);
    offsets_of(from, index, offset);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (first + k * THREADS < from.count) word[k] = *(const word_t *)(source + offset[k]);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (first + k * THREADS < from.count) out[first + k * THREADS] = word[k];
}

extern "C" __global__ __launch_bounds__(THREADS) void copy_strided(
    const char *__restrict__ source,  // where the element with all coordinates 0 lies
    const __grid_constant__ Strided from,
    word_t *__restrict__ out  // [from.count]
) {
    // Indices of the last block's idle items also stay below 2^31 in the narrow case.
    if (from.count <= 0x7fffffffull - THREADS * ITEMS) gather<u32>(source, from, out);
    else gather<u64>(source, from, out);
}

extern "C" __global__ __launch_bounds__(THREADS) void copy_transposed(
    const char *__restrict__ source,  // where the element with all coordinates 0 lies
    const __grid_constant__ Strided from,
    int fast,                 // the dimension to read along, ranges [0, dimensions - 1)
    word_t *__restrict__ out  // [from.count]
) {
    __shared__ word_t tile[TILE][TILE + PADDING];  // [last, fast]
    const int last = from.dimensions - 1;
    const u64 fasts = from.size[fast], lasts = from.size[last];
    // Which tile: blockIdx.x counts tiles of the last dimension first, then those of `fast`, then the other dimensions.
    u32 rest = blockIdx.x;
    const u32 last_tiles = (u32)((lasts + TILE - 1) / TILE), fast_tiles = (u32)((fasts + TILE - 1) / TILE);
    const u64 first_last = (u64)(rest % last_tiles) * TILE;
    rest /= last_tiles;
    const u64 first_fast = (u64)(rest % fast_tiles) * TILE;
    rest /= fast_tiles;
    u64 place = first_last, fast_step = 0, step = lasts;  // in `out`: of the tile, between rows, of dimension d
#pragma unroll 1
    for (int d = last - 1; d >= 0; --d) {
        if (d == fast) {
            fast_step = step;
            place += first_fast * step;
        } else {
            const u32 size = (u32)from.size[d], outer = rest / size, coordinate = rest - outer * size;
            source += (long long)coordinate * from.stride[d];
            place += coordinate * step;
            rest = outer;
        }
        step *= from.size[d];
    }
    source += (long long)first_last * from.stride[last] + (long long)first_fast * from.stride[fast];
    const int rows_last = (int)min((u64)TILE, lasts - first_last), rows_fast = (int)min((u64)TILE, fasts - first_fast);
    const int x = threadIdx.x % TILE, y = threadIdx.x / TILE;

    word_t word[TILE * TILE / THREADS];
    source += x * from.stride[fast];
#pragma unroll
    for (int k = 0; k < TILE * TILE / THREADS; ++k) {  // all loads first, so that they overlap
        const int row = y + k * (THREADS / TILE);
        if (x < rows_fast && row < rows_last) word[k] = *(const word_t *)(source + row * from.stride[last]);
    }
#pragma unroll
    for (int k = 0; k < TILE * TILE / THREADS; ++k) tile[y + k * (THREADS / TILE)][x] = word[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < TILE * TILE / THREADS; ++k) {
        const int row = y + k * (THREADS / TILE);
        if (x < rows_last && row < rows_fast) out[place + row * fast_step + x] = tile[x][row];
    }
}
