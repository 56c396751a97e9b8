// SPDX-License-Identifier: Apache-2.0
// Buckets of clouds of up to 128 tiles (524,288 points): one stable sort by hash key in four launches.
//
// bucketize(balance="spill") sorts each cloud stably by a 48-bit key and cuts it every bucket_size points. At these
// sizes launches and latency cost more than memory traffic, so this is a sample sort with regular sampling (Shi and
// Schaeffer 1992). Its partitions have a proven bound, so it needs no fallback: no data, not even duplicates, can
// unbalance it. If no cloud is larger than a tile, a single launch does everything: merge_clouds, one block a cloud.
//   1 bounds      a block a tile: partial bounds of its points; for robust bounds also a block a cloud
//   2 tiles       a block a tile: voxels, keys, sort in shared memory; one of every 32 keys is a sample
//   3 splitters   a block a tile: ranks its samples among all samples of the cloud; every SPAN-th is a splitter
//   4 partitions  a block a partition: finds its run in every tile, sorts the runs together, writes both permutations
// Launches 2 to 4 start early (early.cuh). Then the five sorts of the backbone's levels, of 34,688 points and fewer,
// take 97.1 us. They take 100.3 if none is early, and 104.3 if the first is too (H200, 2026-11-30).
//
// The bound: if a tile's samples are its elements 32 g + phase, and `a` of them lie before a splitter, then more than
// 32 (a - 1) + phase and at most 32 a + phase of its elements lie before the splitter. So two splitters SPAN samples
// apart enclose at most 32 SPAN + 31 tiles <= CAPACITY points. Each tile has its own phase. With a common phase the
// splitters of similar tiles would coincide, and a cloud's first and last partition would get up to 16 points too many
// from every tile.
//
// An element is a u64: key << 15 | position in its tile. It is unique in a tile, and tiles are ranges of the point
// order, so the order of (key, tile, position) is the stable order. There is no float arithmetic after the voxels.

#ifndef TILE
#define TILE 1024  // points a tile: 1024, 2048 or 4096
#endif
#define THREADS (TILE / 4)  // four elements a thread; mirrored by gpu3d/cuda/buckets.py, like the next three
#define RANK_THREADS 1024   // threads of merge_splitters
#define MAX_TILES 128       // most tiles of a cloud
#define SPAN (TILE / 64)    // samples a partition: half a tile of points on average
#define CAPACITY (32 * SPAN + 32 * MAX_TILES)  // most points of a partition
#define SAMPLES (TILE / 32)                    // samples a tile
#define PHASE(t) (((t) * 13 + 16) & 31)        // phase of a cloud's t-th tile: multiples of 13 go through all phases
#define POSITION_BITS 15
#define POSITION ((1ull << POSITION_BITS) - 1)

#include "buckets.cuh"
#include "clouds.cuh"
#include "early.cuh"
#include "sort.cuh"
#include "voxels.cuh"
#include "warp.cuh"

static_assert(TILE == 1024 || TILE == 2048 || TILE == 4096, "a block has 256 to 1024 threads");
static_assert(THREADS / 32 >= 6, "six warps find robust bounds");
static_assert(CAPACITY <= 1 << POSITION_BITS, "a position in a partition has 15 bits");

// ---- block-wide sort -----------------------------------------------------------------------------------------------

// Elements at..at + 3 of the merge of two sorted runs ("merge path", Odeh et al. 2012): a binary search finds how many
// elements before them come from each run, then four steps of the merge follow. Elements are distinct and below ~0.
__device__ __forceinline__ void merge_four(const u64 *a, int a_length, const u64 *b, int b_length, int at, u64 x[4]) {
    int low = max(0, at - b_length), high = min(at, a_length);  // how many of the first `at` outputs come from a
    while (low < high) {
        const int middle = (low + high) >> 1;
        if (a[middle] < b[at - 1 - middle]) low = middle + 1;
        else high = middle;
    }
    int i = low, j = at - low;
    u64 next_a = i < a_length ? a[i] : ~0ull, next_b = j < b_length ? b[j] : ~0ull;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const bool take_a = next_a < next_b;
        x[k] = take_a ? next_a : next_b;
        if (take_a) next_a = ++i < a_length ? a[i] : ~0ull;
        else next_b = ++j < b_length ? b[j] : ~0ull;
    }
}

// Sorts n <= 4 * GROUPS * THREADS distinct elements in shared memory: runs of 128 in registers, then merges of
// neighbouring runs.
template <int GROUPS>
__device__ void sort_shared(u64 *data, int n) {
    u64 x[GROUPS][4];
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int run = (g * THREADS + (threadIdx.x & ~31)) * 4;  // first of the warp's 128 elements
        if (run >= n) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = run + 32 * k + lane;
            x[g][k] = i < n ? data[i] : ~0ull;  // only the last run is short; its padding sorts behind n
        }
        sort_warp(x[g]);
        __syncwarp();  // only this warp reads and writes these 128 elements
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (run + 4 * lane + k < n) data[run + 4 * lane + k] = x[g][k];
    }
    for (int width = 128; width < n; width *= 2) {
        __syncthreads();
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int i = (g * THREADS + threadIdx.x) * 4, pair = i & -2 * width;
            if (i >= n) continue;
            const int a_length = min(width, n - pair), b_length = min(width, n - pair - a_length);
            merge_four(data + pair, a_length, data + pair + width, b_length, i - pair, x[g]);
        }
        __syncthreads();
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int i = (g * THREADS + threadIdx.x) * 4;
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (i + k < n) data[i + k] = x[g][k];
        }
    }
    __syncthreads();
}

// First index of sorted run[0..n) whose element is not below `bound`.
__device__ __forceinline__ int lower_bound(const u64 *run, int n, u64 bound) {
    int low = 0;
    while (n > 0) {
        const int half = n >> 1;
        if (run[low + half] < bound) {
            low += half + 1;
            n -= half + 1;
        } else n = half;
    }
    return low;
}

// ---- 1 bounds ------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void merge_bounds(
    const point_t *points,  // [N, 3]
    const __grid_constant__ Clouds clouds,
    const __grid_constant__ Span span,
    coord_t *__restrict__ bounds,  // [tiles, 6]
    coord_t *__restrict__ robust   // [clouds, 6] robust bounds, by the first blocks; null: not wanted
) {
    let_next_start();
    const int before = robust ? clouds.count : 0;  // blocks
    if ((int)blockIdx.x < before) {
        __shared__ coord_t sample[3 * SAMPLE];
        const Cloud cloud = rows_of(clouds)[blockIdx.x], next = rows_of(clouds)[blockIdx.x + 1];
        write_robust_bounds(points, cloud.point, next.point, sample, robust + 6 * (size_t)blockIdx.x);
        return;
    }
    const int tile = blockIdx.x - before;  // ranges [0, tiles)
    if (tile >= tiles_of(clouds)) return;
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.point + (tile - cloud.tile) * TILE;
    write_bounds(points, first, min(first + TILE, next.point), bounds + 6 * (size_t)tile);
}

// ---- 2 tiles -------------------------------------------------------------------------------------------------------

// Writes the elements of points first..first + n - 1. The whole block calls it. `frame` and `buckets` belong to their
// cloud.
#if KEY == KEY_GIVEN
__device__ __forceinline__ void load_elements(u64 *data, const int *given, int first, int n)
#else
__device__
__forceinline__ void load_elements(u64 *data, const point_t *points, const Frame &frame, u32 buckets, int first, int n)
#endif
{
#pragma unroll
    for (int i = threadIdx.x; i < TILE; i += THREADS)
        if (i < n) {
#if KEY == KEY_GIVEN
            const u64 key = given[first + i];
#else
            const u64 key = key_of_point(points, first + i, frame, buckets);
#endif
            data[i] = key << POSITION_BITS | i;
        }
    __syncthreads();
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void merge_tiles(
#if KEY == KEY_GIVEN
    const int *given,  // [N] bucket of each point, counted over the batch
#else
    const point_t *points,  // [N, 3]
    const coord_t *bounds,  // [tiles, 6]
    const coord_t *robust,  // [clouds, 6] or null
    float voxel_size,
    const __grid_constant__ Span span,
#endif
    const __grid_constant__ Clouds clouds,
    u64 *__restrict__ sorted,  // [tiles, TILE]
    u64 *__restrict__ samples  // [tiles, SAMPLES]
) {
    start_early();
    __shared__ u64 data[TILE];
    const int tile = blockIdx.x;  // ranges [0, tiles)
    if (tile >= tiles_of(clouds)) return;
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.point + (tile - cloud.tile) * TILE;
    const int n = min(TILE, next.point - first);
#if KEY == KEY_GIVEN
    load_elements(data, given, first, n);
#else
    const u32 buckets = (next.slot - cloud.slot) / clouds.bucket_size;
    const Frame frame = frame_from_rows(bounds, cloud.tile, next.tile, voxel_size, span, robust + 6 * (size_t)b);
    load_elements(data, points, frame, buckets, first, n);
#endif
    sort_shared<1>(data, n);
    for (int i = threadIdx.x; i < n; i += THREADS) {
        sorted[(size_t)tile * TILE + i] = data[i];
        if (i % 32 == PHASE(tile - cloud.tile)) samples[(size_t)tile * SAMPLES + i / 32] = data[i];
    }
}

// ---- 3 splitters ---------------------------------------------------------------------------------------------------

// The bound below which elements of tile `tile` come before the splitter `element` of tile `owner`.
__device__ __forceinline__ u64 bound_in_tile(u64 element, int owner, int tile) {
    if (tile == owner) return element;
    return tile < owner ? (element | POSITION) + 1 : element & ~POSITION;  // + 1 cannot overflow: keys have 48 bits
}

extern "C" __global__ __launch_bounds__(RANK_THREADS) void merge_splitters(
    const u64 *samples,  // [tiles, SAMPLES]
    const __grid_constant__ Clouds clouds,
    u64 *__restrict__ splitter,       // [partitions] first element of each; not read for a cloud's first partition
    int *__restrict__ splitter_tile,  // [partitions] the splitter's tile
    unsigned char *__restrict__ samples_below  // [partitions, MAX_TILES] each tile's samples before the splitter
) {
    start_early();
    __shared__ u64 lists[RANK_THREADS / 32][SAMPLES];
    __shared__ int rank[SAMPLES];
    const int tile = blockIdx.x;  // ranges [0, tiles)
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (tile >= tiles_of(clouds)) return;
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int tiles = next.tile - cloud.tile;  // at most MAX_TILES
    // The number of samples of the last tile.
    const int tail = (next.point - cloud.point - (tiles - 1) * TILE + 31 - PHASE(tiles - 1)) / 32;
    const int own = tile == next.tile - 1 ? tail : SAMPLES;

    for (int i = threadIdx.x; i < SAMPLES; i += RANK_THREADS) rank[i] = 0;
    __syncthreads();

    // A warp takes every 32nd tile's list; its lanes are this block's samples, so their searches mostly share
    // addresses.
    u64 mine[SAMPLES / 32], list[MAX_TILES / 32][SAMPLES / 32];
    int below[MAX_TILES / 32][SAMPLES / 32];  // how many samples of each list come before this lane's
#pragma unroll
    for (int g = 0; g < SAMPLES / 32; ++g) {
        mine[g] = g * 32 + lane < own ? samples[(size_t)tile * SAMPLES + g * 32 + lane] : 0;
#pragma unroll
        for (int k = 0; k < MAX_TILES / 32; ++k) {
            const int t = cloud.tile + warp + k * 32;
            const int length = t < next.tile - 1 ? SAMPLES : t < next.tile ? tail : 0;
            list[k][g] = g * 32 + lane < length ? samples[(size_t)t * SAMPLES + g * 32 + lane] : 0;
        }
    }
#pragma unroll
    for (int k = 0; k < MAX_TILES / 32; ++k) {
        const int t = cloud.tile + warp + k * 32;
        if (t >= next.tile) break;
        __syncwarp();
#pragma unroll
        for (int g = 0; g < SAMPLES / 32; ++g) lists[warp][g * 32 + lane] = list[k][g];
        __syncwarp();
        const int length = t == next.tile - 1 ? tail : SAMPLES;
#pragma unroll
        for (int g = 0; g < SAMPLES / 32; ++g) {
            below[k][g] = lower_bound(lists[warp], length, bound_in_tile(mine[g], tile, t));
            atomicAdd(&rank[g * 32 + lane], below[k][g]);  // integer sums are the same in any order
        }
    }
    __syncthreads();

#pragma unroll
    for (int g = 0; g < SAMPLES / 32; ++g) {
        const int i = g * 32 + lane;
        if (i >= own || rank[i] % SPAN != 0) continue;
        const int partition = cloud.group + rank[i] / SPAN;
#pragma unroll
        for (int k = 0; k < MAX_TILES / 32; ++k)
            if (warp + k * 32 < tiles) samples_below[(size_t)partition * MAX_TILES + warp + k * 32] = below[k][g];
        if (warp == 0) {
            splitter[partition] = mine[g];
            splitter_tile[partition] = tile;
        }
    }
}

// ---- 4 partitions --------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS, 1) void merge_partitions(
    const u64 *sorted,                   // [tiles, TILE]
    const u64 *splitter,                 // [partitions]
    const int *splitter_tile,            // [partitions]
    const unsigned char *samples_below,  // [partitions, MAX_TILES]
    const __grid_constant__ Clouds clouds,
    int *__restrict__ slot_to_point,  // [slots]
    int *__restrict__ point_to_slot,  // [N]
    int *__restrict__ moved           // [] set to 0, or null
) {
    start_early();
    extern __shared__ u64 data[];  // [CAPACITY] elements, then [CAPACITY] int32 point indices
    int *point = (int *)(data + CAPACITY);
    __shared__ int cut[2][MAX_TILES];  // where this partition begins and ends in each tile
    __shared__ int offset[MAX_TILES];  // where the tile's run begins in `data`
    __shared__ int total, before;      // points of this partition, and of the cloud's earlier partitions
    const int partition = blockIdx.x;  // ranges [0, partitions)
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (partition >= groups_of(clouds)) return;
    const int b = cloud_of<&Cloud::group>(clouds, partition);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int tiles = next.tile - cloud.tile;  // at most MAX_TILES
    const int points = next.point - cloud.point;

    if (moved && partition == 0 && threadIdx.x == 0) *moved = 0;
    static_assert(2 * MAX_TILES <= THREADS, "a thread a tile and side");
    if (threadIdx.x < 2 * MAX_TILES) {
        const int side = threadIdx.x / MAX_TILES, t = threadIdx.x % MAX_TILES;
        const int p = partition + side;
        int at = 0;
        if (t < tiles) {
            const int length = min(TILE, points - t * TILE);
            if (p == next.group) at = length;
            else if (p > cloud.group) {  // the partition begins between two samples
                const int to = 32 * samples_below[(size_t)p * MAX_TILES + t] + PHASE(t), from = max(0, to - 31);
                at = from
                     + lower_bound(
                         sorted + (size_t)(cloud.tile + t) * TILE + from, min(length, to) - from,
                         bound_in_tile(splitter[p], splitter_tile[p], cloud.tile + t)
                     );
            }
        }
        cut[side][t] = at;
    }
    __syncthreads();
    if (warp == 0) {  // exclusive prefix sums of the runs' lengths, four tiles a lane
        int length[MAX_TILES / 32], sum = 0, skipped = 0;
#pragma unroll
        for (int k = 0; k < MAX_TILES / 32; ++k) {
            const int t = lane * (MAX_TILES / 32) + k;
            length[k] = cut[1][t] - cut[0][t];
            sum += length[k];
            skipped += cut[0][t];
        }
        const int scan = scan_of_warp(sum);
        skipped = sum_of_warp(skipped);
        int at = scan - sum;
#pragma unroll
        for (int k = 0; k < MAX_TILES / 32; ++k) {
            offset[lane * (MAX_TILES / 32) + k] = at;
            at += length[k];
        }
        if (lane == 31) {
            total = scan;
            before = skipped;
        }
    }
    __syncthreads();

    const int n = total;  // at most CAPACITY
#pragma unroll 4
    for (int at = threadIdx.x; at < n; at += THREADS) {
        int t = 0;  // the tile whose run contains `at`
#pragma unroll
        for (int step = MAX_TILES / 2; step; step >>= 1)
            if (offset[t + step] <= at) t += step;
        const u64 element = sorted[(size_t)(cloud.tile + t) * TILE + cut[0][t] + at - offset[t]];
        data[at] = element & ~POSITION | at;  // runs lie in tile order, so `at` breaks ties like the point index
        point[at] = cloud.point + t * TILE + (int)(element & POSITION);
    }
    __syncthreads();
    if (n <= 4 * THREADS) sort_shared<1>(data, n);
    else if (n <= 8 * THREADS) sort_shared<2>(data, n);
    else sort_shared<(CAPACITY + 4 * THREADS - 1) / (4 * THREADS)>(data, n);

    for (int i = threadIdx.x; i < n; i += THREADS) {
        const int p = point[data[i] & POSITION];
        const int slot = cloud.slot + before + i;
        slot_to_point[slot] = p;
        point_to_slot[p] = slot;
    }
    if (partition == next.group - 1)  // padding is behind the cloud's points
        for (int slot = cloud.slot + points + threadIdx.x; slot < next.slot; slot += THREADS) slot_to_point[slot] = -1;
}

// ---- all in one launch ---------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS, 1) void merge_clouds(
#if KEY == KEY_GIVEN
    const int *given,  // [N] bucket of each point, counted over the batch
#else
    const point_t *points,  // [N, 3]
    float voxel_size,
    const __grid_constant__ Span span,
#endif
    const __grid_constant__ Clouds clouds,  // of at most TILE points each
    int *__restrict__ slot_to_point,        // [slots]
    int *__restrict__ point_to_slot,        // [N]
    int *__restrict__ moved                 // [] set to 0, or null
) {
    start_early();
#if KEY == KEY_GIVEN
    __shared__ u64 data[TILE];
#else
    constexpr int SAMPLED = 3 * SAMPLE * sizeof(coord_t) / sizeof(u64);
    __shared__ u64 data[TILE > SAMPLED ? TILE : SAMPLED];  // the sample for robust bounds, then the elements
#endif
    const int b = blockIdx.x;  // ranges [0, clouds)
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int n = next.point - cloud.point;
    if (moved && b == 0 && threadIdx.x == 0) *moved = 0;
#if KEY == KEY_GIVEN
    load_elements(data, given, cloud.point, n);
#else
    __shared__ coord_t bounds[6], robust[6];
    if (span.kind == ROBUST) write_robust_bounds(points, cloud.point, next.point, (coord_t *)data, robust);
    write_bounds(points, cloud.point, next.point, bounds);
    __syncthreads();
    const u32 buckets = (next.slot - cloud.slot) / clouds.bucket_size;
    const Frame frame = frame_from_rows(bounds, 0, 1, voxel_size, span, robust);
    load_elements(data, points, frame, buckets, cloud.point, n);
#endif
    sort_shared<1>(data, n);
    for (int slot = cloud.slot + threadIdx.x; slot < next.slot; slot += THREADS) {
        const int i = slot - cloud.slot, p = i < n ? cloud.point + (int)(data[i] & POSITION) : -1;
        slot_to_point[slot] = p;
        if (i < n) point_to_slot[p] = slot;
    }
}
