// SPDX-License-Identifier: Apache-2.0
// Buckets of clouds too large for buckets_merge.cu: the same stable sort as six least-significant-digit passes.
//
// "Onesweep" (Adinets and Merrill 2022): each pass reads and writes every record once. A block ranks its tile by an
// 8-bit digit. It learns where its digits go by looking back at the counts that earlier tiles have published.
//   1 frames      a block a group: bounds of its points; a cloud's last block joins them to the frame of its voxels.
//   For
//                 robust bounds each cloud has one more block, which finds their quantiles
//   2 keys        a block a group: key of each point, and how often each digit of each pass occurs
//   3 first, pass (four times), last: a block a tile: count, look back, rank, move; the last writes both permutations
//
// A record has 8 bytes, since digits that have been sorted by are dropped: pass 0 reads the keys and writes 40 bits of
// key and 24 bits of point index. For a cloud of more than 2^24 points ("wide") pass 0 writes only the 32-bit index,
// and pass 1 reads the key once more, of which 32 bits are left to carry.
//
// Limits on an H100: waiting at barriers and for the look-back. So a tile publishes its counts before it ranks, and
// tiles are large. Of two tile sizes, the one whose waves of blocks take less time for the batch is chosen: at 4M
// points (392 us) tiles of 10240 gain 4 %, since their third and last wave is nearly full; at 1M points, one wave for
// either size, they would lose 16 %. Kernels of their own for the first and last pass, instead of branches, gained 5 %.
// Tried at 4M points with tiles of 8192 (422 us then): tiles of 4096 with 512 threads and two blocks a multiprocessor,
// 437 us; tiles of 6144 with 1024 threads, 430 us; of 12288, 432 us. With tiles of 4096 and 512 threads: ballots
// instead of words in shared memory, 537 us against 490; look-back after the ranking, 490 against 469; look-back
// windows of 4 or 16 tiles, the same. Persistent blocks that load the next tile while they write one gain 2 % in passes
// 0 to 4 and lose 7 % in the last. The last pass is limited by its scattered 4-byte stores to point_to_slot, 60 a ns
// (59 us at 4M); keeping windows of it in L2 did not help.

#ifndef TILE
#define TILE 8192  // points a tile: 8192 or 10240; mirrored by gpu3d/cuda/buckets.py, like the next two
#endif
#define THREADS 1024
#define FRAME_THREADS 512  // threads of radix_frames: joining the bounds of more warps costs more than loading
#define ITEMS (TILE / THREADS)
#define WARPS (THREADS / 32)
#define PASSES 6
#define POSITION_BITS 16

#include "buckets.cuh"
#include "clouds.cuh"
#include "digits.cuh"
#include "grid.cuh"
#include "voxels.cuh"
#include "warp.cuh"

static_assert(TILE % THREADS == 0 && THREADS >= DIGITS, "one thread a digit, whole items a thread");
static_assert(TILE <= 1 << POSITION_BITS, "pass 0 packs a position in the tile with 48 bits of key");
static_assert(WARPS * DIGITS <= TILE, "the words of the ranking use the records' memory");

// ---- 1 frames ------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(FRAME_THREADS) void radix_frames(
    const point_t *__restrict__ points,  // [N, 3]
    const __grid_constant__ Clouds clouds,
    int group_points,  // points a group
    float voxel_size,
    const __grid_constant__ Span span,
    u32 *__restrict__ arrived,  // [clouds] blocks that have written their bounds; starts at 0
    coord_t *bounds,            // [groups, 6]
    coord_t *robust,            // [clouds, 6] robust bounds, by the first blocks; null: not wanted
    Frame *__restrict__ frames  // [clouds] not written if the cloud is empty
) {
    __shared__ coord_t sample[3 * SAMPLE];
    const int before = robust ? clouds.count : 0;  // blocks
    const bool samples = (int)blockIdx.x < before;
    const int group = blockIdx.x - before;  // ranges [0, groups), if the block does not sample
    if (group >= groups_of(clouds)) return;
    const int b = samples ? blockIdx.x : cloud_of<&Cloud::group>(clouds, group);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    coord_t *of_cloud = robust + 6 * (size_t)b;
    if (samples) {
        write_robust_bounds(points, cloud.point, next.point, sample, of_cloud);
    } else {
        const int first = cloud.point + (group - cloud.group) * group_points;
        write_bounds(points, first, min(next.point - first, group_points) + first, bounds + 6 * (size_t)group);
    }
    if (!is_last_block(&arrived[b], next.group - cloud.group + (before > 0))) return;
    const Frame frame = frame_from_rows(bounds, cloud.group, next.group, voxel_size, span, of_cloud);
    if (threadIdx.x == 0) frames[b] = frame;
}

// ---- 2 keys --------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void radix_keys(
#if KEY == KEY_GIVEN
    const int *__restrict__ given,  // [N] bucket of each point, counted over the batch
#else
    const point_t *__restrict__ points,  // [N, 3]
    const Frame *__restrict__ frames,    // [clouds]
#endif
    const __grid_constant__ Clouds clouds,
    int group_points,
    u64 *__restrict__ keys,      // [N]
    u32 *__restrict__ histogram  // [clouds, PASSES, DIGITS] starts at 0
) {
    __shared__ u32 count[PASSES * DIGITS];
    const int group = blockIdx.x;  // ranges [0, groups)
    if (group >= groups_of(clouds)) return;
    const int b = cloud_of<&Cloud::group>(clouds, group);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.point + (group - cloud.group) * group_points;
    const int n = min(next.point - first, group_points);
#if KEY != KEY_GIVEN
    const u32 buckets = (next.slot - cloud.slot) / clouds.bucket_size;
    const Frame frame = frames[b];
#endif
    for (int i = threadIdx.x; i < PASSES * DIGITS; i += THREADS) count[i] = 0;
    __syncthreads();
    for (int base = 0; base < n; base += THREADS) {  // whole warps take part in the vote
        const int i = base + threadIdx.x;
#if KEY == KEY_GIVEN
        const u64 key = i < n ? given[first + i] : 0;
#else
        const u64 key = i < n ? key_of_point(points, first + i, frame, buckets) : 0;
#endif
        const u32 active = __ballot_sync(FULL, i < n);
        if (i >= n) continue;
        keys[first + i] = key;
        // If all lanes have the same digit, their atomics on one address would run one after another: the leader adds
        // for all. That is common for the highest digit, and for all digits where points coincide.
        const int leader = __ffs(active) - 1;
        const bool leads = (threadIdx.x & 31) == leader;
        const u64 first_key = __shfl_sync(active, key, leader);
        const bool same_key = __all_sync(active, key == first_key);
        const bool same_top = __all_sync(active, key >> 8 * (PASSES - 1) == first_key >> 8 * (PASSES - 1));
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const u32 digit = key >> 8 * pass & (DIGITS - 1);
            if (!(pass == PASSES - 1 ? same_top : same_key)) atomicAdd(&count[pass * DIGITS + digit], 1);
            else if (leads) atomicAdd(&count[pass * DIGITS + digit], __popc(active));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < PASSES * DIGITS; i += THREADS)
        // Integer sums are the same in any order.
        if (count[i]) atomicAdd(&histogram[(size_t)b * PASSES * DIGITS + i], count[i]);
}

// ---- 3 first, pass, last --------------------------------------------------------------------------------------------

// Exclusive prefix sums over the first DIGITS threads. Every thread of the block must call it.
__device__ u32 scan_digits(u32 x, u32 *warp_sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 scan = scan_of_warp(x);
    __syncthreads();  // the previous call may still read warp_sums
    if (lane == 31) warp_sums[warp] = scan;
    __syncthreads();
    u32 before = 0;
    for (int w = 0; w < min(warp, DIGITS / 32); ++w) before += warp_sums[w];
    return before + scan - x;
}

// One pass over the tile that the block draws. The three kernels below describe the parameters.
enum Role { FIRST, MIDDLE, LAST };

template <Role ROLE>
__device__ __forceinline__ void move_tile(
    const u64 *__restrict__ keys,
    const u64 *__restrict__ records_in,
    const u32 *__restrict__ histogram,
    const Clouds &clouds,
    int pass,
    int wide,
    u32 *__restrict__ ticket,
    u32 *__restrict__ published,
    u64 *__restrict__ records_out,
    int *__restrict__ slot_to_point,
    int *__restrict__ point_to_slot
) {
    extern __shared__ u64 record[];  // [TILE], followed by the two arrays below
    unsigned short (*start)[DIGITS] =
        (unsigned short (*)[DIGITS])(record + TILE);             // [WARPS, DIGITS] positions in the tile
    unsigned char *digit_of = (unsigned char *)(start + WARPS);  // [TILE] used only in pass 1 of wide clouds
    __shared__ u32 target[DIGITS];  // records of a digit; later the first one's target minus its position in the tile
    __shared__ u32 warp_sums[WARPS];
    __shared__ int drawn;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Tiles are drawn in order, so every tile that the look-back waits for is running or done.
    if (threadIdx.x == 0) drawn = atomicAdd(&ticket[pass], 1);
    for (int i = threadIdx.x; i < WARPS * DIGITS; i += THREADS) record[i] = 0;
    for (int i = threadIdx.x; i < DIGITS; i += THREADS) target[i] = 0;
    __syncthreads();
    const int tile = drawn;  // ranges [0, tiles)
    if (tile >= tiles_of(clouds)) return;
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = (tile - cloud.tile) * TILE;  // of the cloud's points
    const int n = min(TILE, next.point - cloud.point - first);
    const int index_bits = wide ? 32 : 24, digit_shift = index_bits + 8 * (pass - wide - 1);  // POSITION_BITS in pass 0
    const bool refetch = ROLE == MIDDLE && wide && pass == 1;

    // Load. Warp w has records [w, w + 1) * 32 * ITEMS of the tile; item k of lane l is number 32 k + l of these.
    const int mine_first = warp * ITEMS * 32 + lane, mine_left = n - mine_first;  // item k exists if 32 k < mine_left
    const u64 *in = (ROLE == FIRST ? keys : records_in) + cloud.point + first + mine_first;
    u64 mine[ITEMS];
    u32 seat[ITEMS];  // rank among the warp's equal digits << 8 | digit
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) mine[k] = 32 * k < mine_left ? in[32 * k] : 0;
    // Where each digit of the cloud begins. These loads and barriers overlap the records' loads.
    const int d = threadIdx.x;
    volatile u32 *board = published + (size_t)pass * tiles_of(clouds) * DIGITS;
    const u32 bin = scan_digits(d < DIGITS ? histogram[((size_t)b * PASSES + pass) * DIGITS + d] : 0, warp_sums);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        seat[k] = DIGITS - 1;  // the padding of the last tile ranks behind its records
        if (32 * k >= mine_left) continue;
        if (ROLE == FIRST) mine[k] = mine[k] << POSITION_BITS | mine_first + 32 * k;
        seat[k] = mine[k] >> digit_shift & (DIGITS - 1);
        if (refetch) {
            const u64 key = keys[cloud.point + (int)mine[k]];
            seat[k] = key >> 8 & (DIGITS - 1);
            mine[k] = key >> 16 << 32 | mine[k];
        }
    }

    // Count, publish, look back, one thread a digit. This comes before the ranking, so that later tiles seldom wait.
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (32 * k < mine_left) atomicAdd(&target[seat[k]], 1);
    __syncthreads();
    const u32 own = d < DIGITS ? target[d] : 0;
    if (d < DIGITS) board[(size_t)tile * DIGITS + d] = (tile == cloud.tile ? STATE_SUM : STATE_OWN) | own;
    const u32 place = scan_digits(own, warp_sums);
    u32 before = 0;
    if (d < DIGITS && tile != cloud.tile) {
        before = look_back(board, cloud.tile, tile, d);
        board[(size_t)tile * DIGITS + d] = STATE_SUM | (before + own);
    }

    rank_digits(record + warp * DIGITS, seat, lane);  // the words use the records' memory
    __syncthreads();
    if (d < DIGITS) {
        start_of_warps<WARPS>(record, start, d, place);
        target[d] = bin + before - place;
    }
    __syncthreads();

    // Collect the tile's records by digit in shared memory, so that equal digits are written side by side.
#pragma unroll
    for (int k = 0; k < ITEMS; ++k)
        if (32 * k < mine_left) {
            const u32 digit = seat[k] & (DIGITS - 1), place = (seat[k] >> 8) + start[warp][digit];
            record[place] = mine[k];
            if (refetch) digit_of[place] = digit;
        }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = k * THREADS + threadIdx.x;
        if (i >= n) continue;
        u64 moving = record[i];
        const u32 digit = refetch ? digit_of[i] : moving >> digit_shift & (DIGITS - 1);
        if (ROLE == FIRST) {  // from key and position to what the next pass reads
            const int index = first + (int)(moving & ((1 << POSITION_BITS) - 1));  // counted in the cloud
            moving = wide ? index : moving >> (POSITION_BITS + 8) << index_bits | index;
        }
        const u32 at = i + target[digit];  // ranges [0, points of the cloud)
        if (ROLE != LAST) {
            records_out[cloud.point + at] = moving;
        } else {
            const int p = cloud.point + (int)(moving & ((1ull << index_bits) - 1));
            slot_to_point[cloud.slot + at] = p;
            point_to_slot[p] = cloud.slot + at;
        }
    }
    if (ROLE == LAST && tile == next.tile - 1)  // padding is behind the cloud's points
        for (int slot = cloud.slot + next.point - cloud.point + threadIdx.x; slot < next.slot; slot += THREADS)
            slot_to_point[slot] = -1;
}

extern "C" __global__ __launch_bounds__(THREADS) void radix_first(
    const u64 *__restrict__ keys,       // [N]
    const u32 *__restrict__ histogram,  // [clouds, PASSES, DIGITS]
    const __grid_constant__ Clouds clouds,
    int wide,                     // 0: indices of 24 bits, 1: of 32
    u32 *__restrict__ ticket,     // [PASSES] starts at 0
    u32 *__restrict__ published,  // [PASSES, tiles, DIGITS] starts at 0
    u64 *__restrict__ records     // [N]
) {
    move_tile<FIRST>(keys, nullptr, histogram, clouds, 0, wide, ticket, published, records, nullptr, nullptr);
}

extern "C" __global__ __launch_bounds__(THREADS) void radix_pass(
    const u64 *__restrict__ keys,        // [N] read in pass 1 of wide clouds
    const u64 *__restrict__ records_in,  // [N]
    const u32 *__restrict__ histogram,   // [clouds, PASSES, DIGITS]
    const __grid_constant__ Clouds clouds,
    int pass,  // ranges [1, PASSES - 1)
    int wide,
    u32 *__restrict__ ticket,      // [PASSES] starts at 0
    u32 *__restrict__ published,   // [PASSES, tiles, DIGITS] starts at 0
    u64 *__restrict__ records_out  // [N]
) {
    move_tile<MIDDLE>(
        keys, records_in, histogram, clouds, pass, wide, ticket, published, records_out, nullptr, nullptr
    );
}

extern "C" __global__ __launch_bounds__(THREADS) void radix_last(
    const u64 *__restrict__ records,    // [N]
    const u32 *__restrict__ histogram,  // [clouds, PASSES, DIGITS]
    const __grid_constant__ Clouds clouds,
    int wide,
    u32 *__restrict__ ticket,         // [PASSES] starts at 0
    u32 *__restrict__ published,      // [PASSES, tiles, DIGITS] starts at 0
    int *__restrict__ slot_to_point,  // [slots]
    int *__restrict__ point_to_slot,  // [N]
    int *__restrict__ moved           // [] set to 0, or null
) {
    if (moved && blockIdx.x == 0 && threadIdx.x == 0) *moved = 0;
    move_tile<LAST>(
        nullptr, records, histogram, clouds, PASSES - 1, wide, ticket, published, nullptr, slot_to_point, point_to_slot
    );
}
