// SPDX-License-Identifier: Apache-2.0
// Farthest point sampling of large clouds: sampling_farthest.cu over buckets, most of which a new point cannot change
// (QuickFPS: Han et al. 2023). Exact, index for index.
//
// The points are in bucket order. A block takes a cloud and cuts it into up to BUCKETS buckets of equally many points.
// Thread t owns bucket t: it holds the box of its finite points, and its farthest point so far. A point that is taken
// changes a bucket only if the box is nearer than that: rounding is monotone, so a box's d2 by the same expression is
// never larger than that of a point inside. Each round has three steps, with a barrier behind each:
//   1 every thread compares its box, and queues its bucket if the box is near enough
//   2 the warps take buckets from the queue, update the smallest d2 of their points and find the farthest
//   3 every thread offers its bucket's farthest; a warp finds the farthest of its lanes, and then of all warps
// The queue's order differs from run to run, but nothing depends on it.
//
// A new point changes a few buckets once many points are taken, so the time is the latency of a round. On a simulated
// sweep of 120,000 points it is 9 of 938 on average over 4096 rounds, fewer than there are warps. With float64 up to 24
// bytes of registers spill, because 1024 threads have 64 registers each.

#define THREADS 1024  // mirrored by gpu3d/cuda/sampling.py, as is BUCKETS
#define BUCKETS 1024
#define WARPS (THREADS / 32)

#include "clouds.cuh"
#include "sampling.cuh"

#define ITEMS (POINT == FLOAT64 ? 2 : 4)  // points that a lane loads together

static_assert(BUCKETS == THREADS, "a thread owns a bucket");
static_assert(WARPS == 32, "a lane reads the result of each warp");

// A point in bucket order.
struct alignas(4 * sizeof(coord_t)) Row {
    coord_t x, y, z;
    int index;  // counted in the cloud
};

struct Box {
    coord_t low[3], high[3];
};

__device__ __forceinline__ coord_t outside(coord_t x, coord_t low, coord_t high) {
    return max((coord_t)0, max(minus(low, x), minus(x, high)));
}

// Writes the points of a bucket in bucket order, its box, and the place of the point `start` if it is one of them, by a
// warp.
__device__ void write_rows(
    const coord_t *points,
    const int *order,
    int first,  // point of the cloud
    int begin,
    int count,
    int start,
    Row *rows,
    coord_t *nearest,
    Box *box,
    int *start_place
) {
    const int lane = threadIdx.x & 31;
    coord_t low[3] = {UNREACHED, UNREACHED, UNREACHED}, high[3] = {-UNREACHED, -UNREACHED, -UNREACHED};
    for (int i = begin + lane; i < begin + count; i += 32) {
        const int p = order[i];
        const coord_t x[3] = {points[3 * (size_t)p], points[3 * (size_t)p + 1], points[3 * (size_t)p + 2]};
        const bool finite = is_finite(x[0]) && is_finite(x[1]) && is_finite(x[2]);
        rows[i] = {x[0], x[1], x[2], p - first};
        if (p - first == start) *start_place = i;
        nearest[i] = finite ? UNREACHED : TAKEN;
#pragma unroll
        for (int d = 0; d < 3; ++d)
            if (finite) {
                low[d] = min(low[d], x[d]);
                high[d] = max(high[d], x[d]);
            }
    }
#pragma unroll
    for (int d = 0; d < 3; ++d)
#pragma unroll
        for (int step = 16; step; step >>= 1) {
            low[d] = min(low[d], __shfl_xor_sync(FULL, low[d], step));
            high[d] = max(high[d], __shfl_xor_sync(FULL, high[d], step));
        }
    if (lane == 0) *box = {{low[0], low[1], low[2]}, {high[0], high[1], high[2]}};
}

// Updates the points of a bucket by the point taken last, by a warp. Writes which is farthest now: the point, its d2
// (TAKEN if there is no point to take), and its place in bucket order.
__device__ void update_bucket(
    const Row *rows,
    coord_t *nearest,
    int begin,
    int count,
    const Row &sample,
    int place,  // of the sample
    Row *farthest,
    coord_t *reach,
    int *farthest_place
) {
    const int lane = threadIdx.x & 31;
    coord_t largest = TAKEN;
    u32 index = FULL;
    int best_place = begin;
    for (int base = begin + lane; base < begin + count; base += 32 * ITEMS) {
        Row row[ITEMS];
        coord_t before[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {  // all loads first, so that they overlap
            const bool inside = base + 32 * i < begin + count;
            before[i] = inside ? nearest[base + 32 * i] : TAKEN;
            if (inside) row[i] = rows[base + 32 * i];
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int at = base + 32 * i;
            if (before[i] < 0) continue;
            coord_t d2 = squared_norm(minus(row[i].x, sample.x), minus(row[i].y, sample.y), minus(row[i].z, sample.z));
            d2 = at == place ? TAKEN : min(before[i], d2);
            if (d2 < before[i]) nearest[at] = d2;
            if (d2 > largest || (d2 == largest && (u32)row[i].index < index)) {
                largest = d2;
                index = row[i].index;
                best_place = at;
            }
        }
    }
    const Farthest top = farthest_of_warp({signed_bits_of(largest), index});
    // Indices differ, so this is one lane; it is lane 0 if no lane has a point to take.
    const u32 holders = __ballot_sync(FULL, signed_bits_of(largest) == top.d2 && index == top.index);
    if (lane == __ffs(holders) - 1) {
        *farthest = rows[best_place];
        *reach = largest;
        *farthest_place = best_place;
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void pruned_points(
    const coord_t *__restrict__ points,  // [N, 3]
    const int *__restrict__ order,       // [slots] the points of each cloud in bucket order; padding is behind them
    const __grid_constant__ Clouds clouds,
    int k,
    int start,
    Row *rows,             // [N] in bucket order, as the next
    coord_t *nearest,      // [N] the smallest d2 to the points taken
    Box *boxes,            // [clouds, BUCKETS]
    int *__restrict__ out  // [clouds, k]
) {
    __shared__ Row farthest[BUCKETS];
    __shared__ coord_t reaches[BUCKETS];
    __shared__ int places[BUCKETS];
    __shared__ u16 queue[BUCKETS];
    __shared__ int queued[2], start_place;
    __shared__ struct {
        Farthest top;
        int bucket;
    } found[WARPS];
    const Cloud cloud = rows_of(clouds)[blockIdx.x];
    const int n = rows_of(clouds)[blockIdx.x + 1].point - cloud.point;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    out += (size_t)blockIdx.x * k;
    rows += cloud.point;
    nearest += cloud.point;
    boxes += (size_t)blockIdx.x * BUCKETS;
    const int share = n ? 32 * ((n - 1) / (32 * BUCKETS) + 1) : 32;  // points of a bucket
    const int buckets = n ? (n - 1) / share + 1 : 0;                 // ranges [0, BUCKETS]

    if (t < 2) queued[t] = 0;
    for (int b = warp; b < buckets; b += WARPS)
        write_rows(
            points, order + cloud.slot, cloud.point, b * share, min(share, n - b * share), start, rows, nearest,
            &boxes[b], &start_place
        );
    __syncthreads();

    int taken = 0;
    if (start < n && nearest[start_place] > 0) {  // a finite point
        Box box = {};
        if (t < buckets) box = boxes[t];
        Farthest mine = {signed_bits_of(TAKEN), FULL};  // of the own bucket
        coord_t reach = TAKEN;                          // its d2
        int place = start_place, own = place / share;
        Row sample = rows[place];
        while (true) {
            if (t == 0) out[taken] = cloud.point + sample.index;
            if (++taken == k) break;
            int *count = &queued[taken & 1];
            bool changes = t < buckets;
            if (changes && taken > 1 && t != own)
                changes = squared_norm(
                              outside(sample.x, box.low[0], box.high[0]), outside(sample.y, box.low[1], box.high[1]),
                              outside(sample.z, box.low[2], box.high[2])
                          )
                          < reach;
            const u32 changing = __ballot_sync(FULL, changes);
            if (changing) {
                int at = 0;
                if (lane == 0) at = atomicAdd(count, __popc(changing));
                at = __shfl_sync(FULL, at, 0) + rank_in(changing, lane);
                if (changes) queue[at] = t;
            }
            __syncthreads();
            const int all = *count;
            if (t == 0) queued[~taken & 1] = 0;  // for the next round; the last one is done with it
            for (int e = warp; e < all; e += WARPS) {
                const int b = queue[e];
                update_bucket(
                    rows, nearest, b * share, min(share, n - b * share), sample, place, &farthest[b], &reaches[b],
                    &places[b]
                );
            }
            __syncthreads();
            if (changes) {
                reach = reaches[t];
                mine = {signed_bits_of(reach), (u32)farthest[t].index};
            }
            const Farthest top = farthest_of_warp(mine);
            const u32 holders = __ballot_sync(FULL, mine.d2 == top.d2 && mine.index == top.index);
            if (lane == __ffs(holders) - 1) {
                found[warp].top = top;
                found[warp].bucket = t;
            }
            __syncthreads();
            const Farthest other = found[lane].top, next = farthest_of_warp(other);
            if (next.d2 < 0) break;  // every point is taken
            const u32 winner = __ballot_sync(FULL, other.d2 == next.d2 && other.index == next.index);
            own = found[__ffs(winner) - 1].bucket;
            sample = farthest[own];
            place = places[own];
        }
    }
    for (int i = taken + t; i < k; i += THREADS) out[i] = -1;
}
