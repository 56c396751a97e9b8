// SPDX-License-Identifier: Apache-2.0
// The published rebalancing of Flash3D (section 9.1 of the paper), made deterministic: balance="probe".
//
// Rounds -1, 0, ..., 127. In round -1 every point proposes to its hash bucket. In round c each point that is still
// homeless proposes to the hash bucket of its voxel moved by candidate c. A bucket accepts the lowest point indices
// among its proposers, as many as it has free slots. Points left at the end fill the remaining free slots in (bucket,
// point index) order.
//
// One cooperative launch; a round needs one grid barrier. A block has a contiguous range of points.
//   propose  each homeless point adds to the bucket's count, both a total and one for each block
//   barrier
//   settle   total <= free slots: all proposers move in. Otherwise (at most once a bucket, since it is then full) the
//            counts of earlier blocks say how many proposers this block may place, and it ranks them in point order
// Every block updates its own copy of the free slots in the same way, so they need no barrier. Counts are
// triple-buffered: those of round c are cleared while round c + 1 settles, and used again in round c + 3.
//
// The slots inside a bucket (by point index) come from the sort that follows, with the buckets as given keys.

#define THREADS 1024  // mirrored by gpu3d/cuda/buckets.py
#define CANDIDATES 128

#include "buckets.cuh"
#include "clouds.cuh"
#include "grid.cuh"
#include "scan.cuh"
#include "voxels.cuh"

// Offsets of the candidates in steps, one packed word each: (x + 4) | (y + 4) << 4 | (z + 4) << 8.
struct Candidates {
    unsigned short packed[CANDIDATES];
};

// The hash bucket (numbered over the batch) of point i's voxel, moved by `step` times 4 * buckets.
__device__ __forceinline__ int bucket_moved(const Clouds &clouds, int i, u64 packed, const int step[3]) {
    const int b = cloud_of<&Cloud::point>(clouds, i);
    const int begin = rows_of(clouds)[b].tile, buckets = rows_of(clouds)[b + 1].tile - begin;
    int v[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        v[d] = min(max((int)(packed >> 16 * d & 65535) + 4 * buckets * step[d], 0), 65535);  // |12 buckets| < 2^31
    }
    return begin + (int)bucket_of_voxel(v[0], v[1], v[2], buckets);
}

extern "C" __global__ __launch_bounds__(THREADS, 1) void probe_buckets(
    const point_t *__restrict__ points,     // [N, 3]
    const Frame *__restrict__ frames,       // [clouds]
    const __grid_constant__ Clouds clouds,  // Cloud::tile is the cloud's first bucket
    const __grid_constant__ Candidates candidates,
    u32 *__restrict__ arrived,  // [1] starts at 0
    int *total_counts,          // [3, buckets] proposals of a round to each bucket; starts at 0
    int *block_counts,          // [3, buckets, blocks] the same for each block; starts at 0
    int *rooms,                 // [blocks, buckets] each block's copy of the free slots
    int *cursors,               // [blocks, buckets] proposals before the block's next one
    int *left,                  // [blocks] homeless points after the last round
    u64 *voxels,                // [N] voxel of each point, packed, 16 bits an axis
    int *proposal,              // [N] bucket proposed to in this round, or -1
    int *home,                  // [N] bucket of each point, numbered over the batch; -1 while homeless
    int *moved                  // [] points outside their hash bucket; starts at 0
) {
    __shared__ int list[THREADS], listed;  // contested buckets of a chunk: they cannot take all their proposers
    __shared__ u32 turns;                  // warps of a chunk with proposers to contested buckets
    const Cloud *rows = rows_of(clouds);
    const int size = clouds.bucket_size, blocks = gridDim.x, block = blockIdx.x;
    const int all_points = rows[clouds.count].point, all_buckets = rows[clouds.count].tile;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int chunks = (all_points + THREADS - 1) / THREADS;
    const int first = (int)((long long)chunks * block / blocks) * THREADS;  // this block's points
    const int last = min(all_points, (int)((long long)chunks * (block + 1) / blocks) * THREADS);
    int *room = rooms + (size_t)block * all_buckets, *cursor = cursors + (size_t)block * all_buckets;
    u32 awaited = 0;

    for (int b = 0; b < clouds.count; ++b) {  // every bucket has `size` slots except the cloud's last
        const int begin = rows[b].tile, end = rows[b + 1].tile;
        for (int c = begin + threadIdx.x; c < end; c += THREADS)
            room[c] = c < end - 1 ? size : rows[b + 1].point - rows[b].point - (end - 1 - begin) * size;
    }
    for (int i = first + threadIdx.x; i < last; i += THREADS) {
        const Frame frame = frames[cloud_of<&Cloud::point>(clouds, i)];
        u64 packed = 0;
#pragma unroll
        for (int d = 0; d < 3; ++d) packed |= (u64)voxel(widen(points[3 * (size_t)i + d]), frame, d) << 16 * d;
        voxels[i] = packed;
        home[i] = -1;
    }
    if (threadIdx.x == 0) listed = 0;
    bool homeless = true;  // there are free slots, so some points are homeless; the same in every block
    __syncthreads();

    for (int round = -1; round < CANDIDATES && homeless; ++round) {
        int *total = total_counts + (size_t)((round + 1) % 3) * all_buckets;
        int *count = block_counts + (size_t)((round + 1) % 3) * all_buckets * blocks;
        int step[3] = {0, 0, 0};
        if (round >= 0)
            for (int d = 0; d < 3; ++d) step[d] = (int)(candidates.packed[round] >> 4 * d & 15) - 4;

        // propose
        for (int i = first + threadIdx.x; i < last; i += THREADS) {
            if (home[i] >= 0) continue;
            const int c = bucket_moved(clouds, i, voxels[i], step);
            const bool open = room[c] > 0;
            proposal[i] = open ? c : -1;
            if (open) {  // consecutive points often propose to one bucket: one lane adds for all
                const u32 same = __match_any_sync(__activemask(), c);
                if (lane == __ffs(same) - 1) {
                    atomicAdd(&total[c], __popc(same));
                    atomicAdd(&count[(size_t)c * blocks + block], __popc(same));
                }
            }
        }
        wait_for_grid(arrived, awaited);

        // settle: how many proposals to each contested bucket come from earlier blocks
        int any = 0;
        for (int base = 0; base < all_buckets; base += THREADS) {
            const int c = base + threadIdx.x;
            const bool contested = c < all_buckets && __ldcg(&total[c]) > room[c];
            if (contested) list[atomicAdd(&listed, 1)] = c;  // in any order: buckets are independent
            if (!__syncthreads_or(contested)) continue;
            any = 1;
            for (int k = warp; k < listed; k += THREADS / 32) {
                int before = 0;
                for (int other = lane; other < block; other += 32)
                    before += __ldcg(&count[(size_t)list[k] * blocks + other]);
                before = sum_of_warp(before);
                if (lane == 0) cursor[list[k]] = before;
            }
            __syncthreads();
            if (threadIdx.x == 0) listed = 0;
            __syncthreads();
        }
        for (int base = first; base < last; base += THREADS) {
            const int i = base + threadIdx.x;
            const int c = i < last && home[i] < 0 ? proposal[i] : -1;
            const bool crowded = c >= 0 && __ldcg(&total[c]) > room[c];
            bool accepted = c >= 0 && !crowded;
            if (any) {  // proposers to contested buckets are ranked in point order, one warp after another
                if (threadIdx.x == 0) turns = 0;
                if (__syncthreads_or(crowded)) {
                    const u32 asking = __ballot_sync(FULL, crowded);
                    if (asking && lane == 0) atomicOr(&turns, 1u << warp);
                    __syncthreads();
                    for (u32 todo = turns; todo; todo &= todo - 1) {
                        if (warp == __ffs(todo) - 1 && crowded) {
                            const u32 same = __match_any_sync(asking, c);
                            const int rank = cursor[c] + rank_in(same, lane);
                            accepted = rank < room[c];
                            __syncwarp(asking);
                            if (lane == __ffs(same) - 1) cursor[c] = rank + __popc(same);
                        }
                        __syncthreads();
                    }
                }
            }
            if (accepted) home[i] = c;
        }
        __syncthreads();

        // Updates the free slots, the same in every block, and clears the previous round's counts for the round after
        // the next.
        int *old_total = total_counts + (size_t)((round + 3) % 3) * all_buckets;
        int *old_count = block_counts + (size_t)((round + 3) % 3) * all_buckets * blocks;
        bool open = false;
        for (int c = threadIdx.x; c < all_buckets; c += THREADS) {
            room[c] -= min(__ldcg(&total[c]), room[c]);
            open |= room[c] > 0;
            if (c % blocks == block) old_total[c] = 0;
            old_count[(size_t)c * blocks + block] = 0;
        }
        homeless = __syncthreads_or(open);
    }

    // The k-th homeless point of the batch takes the k-th free slot. Each cloud has as many free slots as homeless
    // points, and both are counted in cloud order, so no point leaves its cloud.
    if (homeless) {
        int mine = 0;  // homeless points of this block
        for (int i = first + threadIdx.x; i < last; i += THREADS) mine += home[i] < 0;
        mine = sum_of_block<THREADS / 32>(mine);
        if (threadIdx.x == 0) left[block] = mine;
        wait_for_grid(arrived, awaited);
        int before = 0;
        for (int k = threadIdx.x; k < block; k += THREADS) before += __ldcg(&left[k]);
        before = sum_of_block<THREADS / 32>(before);
        // room[c] becomes the number of free slots before bucket c.
        for (int base = 0, sum, free = 0; base < all_buckets; base += THREADS) {
            const int c = base + threadIdx.x;
            const int at = scan_of_block<THREADS / 32>(c < all_buckets ? room[c] : 0, sum);
            if (c < all_buckets) room[c] = free + at;
            free += sum;
        }
        __syncthreads();
        for (int base = first, sum; base < last; base += THREADS) {
            const int i = base + threadIdx.x;
            const bool waiting = i < last && home[i] < 0;
            const int k = before + scan_of_block<THREADS / 32>((int)waiting, sum);
            before += sum;
            if (!waiting) continue;
            int low = 0, high = all_buckets;  // the last bucket with room[low] <= k has the k-th free slot
            while (high - low > 1) {
                const int middle = (low + high) >> 1;
                if (room[middle] <= k) low = middle;
                else high = middle;
            }
            home[i] = low;
        }
    }

    int away = 0;
    const int nowhere[3] = {0, 0, 0};
    for (int i = first + threadIdx.x; i < last; i += THREADS)
        away += home[i] != bucket_moved(clouds, i, voxels[i], nowhere);
    away = sum_of_block<THREADS / 32>(away);
    if (threadIdx.x == 0 && away) atomicAdd(moved, away);  // integer sums are the same in any order
}
