// SPDX-License-Identifier: Apache-2.0
// APML: what each point keeps of the other cloud, by two exact searches: the two nearest, then a ball. A query is a lane.
//
//   T_i = L / max(d2 - d1, GAP),  L = ln((M - 1) / (1 - p_min)),  k_ij = exp(-(C_ij - d1) T_i) > threshold     (CUDA-APML, 3.2)
// The searches run on float32 squares, and the ball is wide enough for their roundings. On the candidates that they find, C, d1,
// d2 and T are float64, from the float32 coordinates, every operation rounded once, and
//   (C_ij - d1) * T_i < -ln(threshold)
// decides, without the exponential: the same entries on every device. See gpu3d/reference/apml.py.
//
// A lane lists its candidates; where they are more than LISTED, the whole warp searches the ball again whenever they are needed.
// A warp reserves room for its entries by one atomic. Where rows come to lie differs from run to run, what is in them does not.

#define THREADS 128
#define BLOCKS 5            // a multiprocessor at least
#define WARPS (THREADS / 32)
#define LISTED 12           // candidates of a query; counted, p_min 0.8 and threshold 1e-8: 0 to 8 % of all queries have more of
                            // 2048 points, and 0 to 4 % of 131,072

#include "clouds.cuh"
#include "neighbors.cuh"
#include "apml.cuh"

#define GAP 1e-8
#define INFINITE_DOUBLE __longlong_as_double(0x7ff0000000000000ll)

// A double a cloud; few travel inside the kernel's arguments.
struct Masses {
    const double *table;    // [clouds] on the device, or null
    double inlined[INLINE_CLOUDS];
};

__device__ __forceinline__ double distance(const Row &a, const Row &b) {
    const double x = __dsub_rn(a.x, b.x), y = __dsub_rn(a.y, b.y), z = __dsub_rn(a.z, b.z);
    return __dsqrt_rn(__dadd_rn(__dadd_rn(__dmul_rn(x, x), __dmul_rn(y, y)), __dmul_rn(z, z)));
}

// The square of a radius that holds the two nearest and all that is kept, as float32 squares are rounded.
//
// With u = 2^-24, those are off by less than 4 u of a distance each, the gap by less than 8 u; WIDER is 16 u, and the float32
// squares of the points within are above the square by less than 8 u of it.
#define WIDER 0x1p-20
__device__ __forceinline__ float radius2_of(const u64 (&nearest)[2], double mass, double limit) {
    if (nearest[1] == NOTHING) return __int_as_float(0x7f800000);              // fewer than two: all
    const double d1 = sqrt((double)distance2_of(nearest[0])), d2 = sqrt((double)distance2_of(nearest[1]));
    const double gap = max(d2 - d1, GAP), ratio = limit / mass;
    const double radius = max(d1 + ratio * gap, d2) + WIDER * (1 + ratio) * (d2 + gap);
    return __double2float_ru(radius <= INFINITE_DOUBLE ? radius * radius * (1 + WIDER) : INFINITE_DOUBLE);
}

// What decides about a candidate, and what the kept ones amount to.
struct Choice {
    double d1, d2, t, limit, sum;
    u32 count;

    __device__ __forceinline__ void start(double of_limit) {
        d1 = d2 = INFINITE_DOUBLE;
        limit = of_limit;
        sum = 0;
        count = 0;
    }
    __device__ __forceinline__ void see(double c) {
        d2 = min(d2, max(d1, c));
        d1 = min(d1, c);
    }
    __device__ __forceinline__ void settle(double mass) { t = __ddiv_rn(mass, max(__dsub_rn(d2, d1), GAP)); }
    __device__ __forceinline__ double exponent(double c) const { return __dmul_rn(__dsub_rn(c, d1), t); }
    __device__ __forceinline__ bool keeps(double c) const { return exponent(c) < limit; }
    __device__ __forceinline__ double weight(double c) const { return (float)exp(-exponent(c)); }
};

// Calls visit(is candidate, slot, distance) for the points of a query's ball, 32 at a time, one a lane; a query on all lanes.
template <class Visit>
__device__ __forceinline__ void each_in_ball(
    const Row &query, float radius2, const Index &index, const Clouds &clouds, int b, Visit visit)
{
    walk_tiles(query, index, clouds, b, Within{radius2}, Always(), [&](int tile) {
        const int slot = tile * TILE + (threadIdx.x & 31);
        const Row point = index.rows[slot];
        visit(distance2(query, point) <= radius2, slot, distance(query, point));
    });
}

__device__ __forceinline__ Row row_of_lane(const Row &row, int lane) {
    return {__shfl_sync(FULL, row.x, lane), __shfl_sync(FULL, row.y, lane), __shfl_sync(FULL, row.z, lane), 0};
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void search_balls(
    const Row *__restrict__ queries,            // [slots] of one side, in bucket order
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,        // of the other side, from the same origins
    const __grid_constant__ Clouds clouds,
    const __grid_constant__ Masses masses,      // L of each cloud
    double limit,                               // -ln(threshold)
    u64 room,                                   // entries
    u64 *__restrict__ total,                    // [] entries so far, room or not; 0 at first
    u32 *__restrict__ starts,                   // [slots] where the entries of each query begin
    u32 *__restrict__ counts,                   // [slots] and how many they are
    u32 *__restrict__ named,                    // [other slots] entries that name each, zeros at first; or null
    Entry *__restrict__ entries)                // [room]; what has no room is counted, not written
{
    __shared__ int listed_slots[WARPS][LISTED][32];
    __shared__ double listed_distances[WARPS][LISTED][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slot = blockIdx.x * THREADS + threadIdx.x;
    if (slot >= query_slots) return;            // slots come in whole tiles
    const Row query = queries[slot];
    const bool searches = query.index >= 0 && is_finite(query);
    const int b = cloud_of<&Cloud::slot>(query_clouds, slot);
    const double mass = masses.table ? masses.table[b] : masses.inlined[b];

    u64 nearest[2];
    find_nearest(nearest, query, searches, index, clouds, b);
    const float radius2 = searches ? radius2_of(nearest, mass, limit) : -1;     // no square is below 0
    int listed = 0;                             // or more than LISTED
    const auto reaches = [&](const Box &box) { return (bool)__any_sync(FULL, bound2<true>(query, box) <= radius2); };
    walk_tiles(box_of(query, searches), index, clouds, b, Within{most(radius2)}, reaches, [&](int tile) {
        each_point(index, tile, [&](const Row &point, int at) {
            if (!(distance2(query, point) <= radius2)) return;                  // NaN: not a point
            if (listed < LISTED) {
                listed_slots[warp][listed][lane] = at;
                listed_distances[warp][listed][lane] = distance(query, point);
            }
            ++listed;
        });
    });
    const bool is_wide = listed > LISTED;
    const u32 wides = __ballot_sync(FULL, is_wide);

    Choice choice;
    choice.start(limit);
    if (!is_wide)
        for (int i = 0; i < listed; ++i) choice.see(listed_distances[warp][i][lane]);
    for (u32 left = wides; left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        Choice wide;
        wide.start(limit);
        each_in_ball(row_of_lane(query, from), __shfl_sync(FULL, radius2, from), index, clouds, b,
                     [&](bool is, int, double c) { if (is) wide.see(c); });
#pragma unroll
        for (int step = 16; step; step /= 2) {
            const double d1 = __shfl_xor_sync(FULL, wide.d1, step), d2 = __shfl_xor_sync(FULL, wide.d2, step);
            wide.d2 = min(max(wide.d1, d1), min(wide.d2, d2));
            wide.d1 = min(wide.d1, d1);
        }
        if (lane == from) choice = wide;
    }
    choice.settle(mass);

    if (!is_wide)
        for (int i = 0; i < listed; ++i) {
            const double c = listed_distances[warp][i][lane];
            if (!choice.keeps(c)) continue;
            choice.sum += choice.weight(c);
            ++choice.count;
        }
    for (u32 left = wides; left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        Choice wide;
        wide.start(limit);
        wide.d1 = __shfl_sync(FULL, choice.d1, from);
        wide.t = __shfl_sync(FULL, choice.t, from);
        each_in_ball(row_of_lane(query, from), __shfl_sync(FULL, radius2, from), index, clouds, b, [&](bool is, int, double c) {
            const bool kept = is && wide.keeps(c);
            wide.count += __popc(__ballot_sync(FULL, kept));
            if (kept) wide.sum += wide.weight(c);
        });
#pragma unroll
        for (int step = 16; step; step /= 2) wide.sum += __shfl_xor_sync(FULL, wide.sum, step);
        if (lane == from) { choice.sum = wide.sum; choice.count = wide.count; }
    }

    u32 scan = choice.count;                    // the entries of the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u32 left = __shfl_up_sync(FULL, scan, step);
        if (lane >= step) scan += left;
    }
    u64 start = 0;
    if (lane == 31) start = atomicAdd(total, (u64)scan);
    start = __shfl_sync(FULL, start, 31);
    const u64 end = start + __shfl_sync(FULL, scan, 31);
    start += scan - choice.count;
    starts[slot] = (u32)start;
    counts[slot] = choice.count;
    if (end > room) return;
    Entry *to = entries + start;
    if (!is_wide)
        for (int i = 0; i < listed; ++i) {
            const double c = listed_distances[warp][i][lane];
            if (!choice.keeps(c)) continue;
            const int other = listed_slots[warp][i][lane];
            *to++ = Entry{(u32)other, (float)(choice.weight(c) / choice.sum)};
            if (named) atomicAdd(&named[other], 1u);
        }
    for (u32 left = wides; left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        Choice wide;
        wide.limit = limit;
        wide.d1 = __shfl_sync(FULL, choice.d1, from);
        wide.t = __shfl_sync(FULL, choice.t, from);
        const double sum = __shfl_sync(FULL, choice.sum, from);
        Entry *wide_to = entries + __shfl_sync(FULL, start, from);
        const auto write = [&](bool is, int other, double c) {
            const bool kept = is && wide.keeps(c);
            const u32 all = __ballot_sync(FULL, kept);
            if (kept) {
                wide_to[__popc(all & (1u << lane) - 1)] = Entry{(u32)other, (float)(wide.weight(c) / sum)};
                if (named) atomicAdd(&named[other], 1u);
            }
            wide_to += __popc(all);
        };
        each_in_ball(row_of_lane(query, from), __shfl_sync(FULL, radius2, from), index, clouds, b, write);
    }
}
