// SPDX-License-Identifier: Apache-2.0
// APML: what each point keeps of the other cloud, by two exact searches (two nearest, then a ball). A query is a warp.
//
//   T_i = L / max(d2 - d1, GAP),  L = ln((M - 1) / (1 - p_min)),  k_ij = exp(-(C_ij - d1) T_i) > threshold     (CUDA-APML, 3.2)
// The searches run on float32 squares, and the ball is wide enough for their roundings. On the candidates that they find, C, d1,
// d2 and T are float64, from the float32 coordinates, every operation rounded once, and
//   (C_ij - d1) * T_i < -ln(threshold)
// decides, without the exponential: the same entries on every device. See gpu3d/reference/apml.py.
//
// A warp reserves room for its entries by one atomic. Where rows come to lie differs from run to run, what is in them does not.

#define THREADS 128
#define BLOCKS 8            // a multiprocessor at least
#define LISTED 96           // candidates that a warp keeps; of more it repeats the search

#include "clouds.cuh"
#include "neighbors.cuh"
#include "apml.cuh"

#define GAP 1e-8

// A double a cloud; few travel inside the kernel's arguments.
struct Masses {
    const double *table;    // [clouds] on the device, or null
    double inlined[INLINE_CLOUDS];
};

// The two nearest of what a warp has seen, alike on all lanes.
struct Two {
    u64 first, second;
};

__device__ __forceinline__ u64 least_of(u64 key) {
    const u32 high = __reduce_min_sync(FULL, (u32)(key >> 32));
    return (u64)high << 32 | __reduce_min_sync(FULL, (u32)(key >> 32) == high ? (u32)key : FULL);
}

__device__ __forceinline__ void take(Two &two, u64 key) {
    while (__any_sync(FULL, key < two.second)) {            // twice at most
        const u64 least = least_of(key);
        two.second = min(two.second, max(two.first, least));
        two.first = min(two.first, least);
        if (key == least) key = NOTHING;
    }
}

__device__ __forceinline__ double distance(const Row &a, const Row &b) {
    const double x = __dsub_rn(a.x, b.x), y = __dsub_rn(a.y, b.y), z = __dsub_rn(a.z, b.z);
    return __dsqrt_rn(__dadd_rn(__dadd_rn(__dmul_rn(x, x), __dmul_rn(y, y)), __dmul_rn(z, z)));
}

// The square of a radius that holds the two nearest and all that is kept, as float32 squares are rounded.
//
// With u = 2^-24, those are off by less than 4 u of a distance each, the gap by less than 8 u; WIDER is 16 u, and the float32
// squares of the points within are above the square by less than 8 u of it.
__device__ __forceinline__ float radius2_of(const Two &two, double mass, double limit) {
    const double wider = 0x1p-20, infinite = __longlong_as_double(0x7ff0000000000000ll);
    if (two.second == NOTHING) return __int_as_float(0x7f800000);              // fewer than two: all
    const double d1 = sqrt((double)distance2_of(two.first)), d2 = sqrt((double)distance2_of(two.second));
    const double gap = max(d2 - d1, GAP), ratio = limit / mass;
    const double radius = max(d1 + ratio * gap, d2) + wider * (1 + ratio) * (d2 + gap);
    return __double2float_ru(radius <= infinite ? radius * radius * (1 + wider) : infinite);
}

// The candidates of a query, on a list or, where they are many, found again each time.
struct Candidates {
    const Row &query;
    const Index &index;
    const Clouds &clouds;
    int b;
    float radius2;
    int count;              // on the list, or above LISTED
    const int *slots;       // [LISTED] of a warp, in shared memory
    const double *distances;

    // Calls visit(is candidate, slot, distance) for all, 32 at a time.
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        const int lane = threadIdx.x & 31;
        if (count <= LISTED) {
            for (int base = 0; base < count; base += 32) {
                const int i = min(base + lane, count - 1);
                visit(base + lane < count, slots[i], distances[i]);
            }
        } else {
            walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
                const int slot = tile * TILE + lane;
                const Row point = index.rows[slot];
                visit(point.index >= 0 && distance2(query, point) <= radius2, slot, distance(query, point));
            });
        }
    }
};

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
    __shared__ int listed_slots[THREADS / 32][LISTED];
    __shared__ double listed_distances[THREADS / 32][LISTED];
    const int slot = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (slot >= query_slots) return;
    const Row query = queries[slot];
    if (query.index < 0 || !is_finite(query)) {
        if (lane == 0) counts[slot] = 0;
        return;
    }
    const int b = cloud_of<&Cloud::slot>(query_clouds, slot);
    const double mass = masses.table ? masses.table[b] : masses.inlined[b];

    Two two = {NOTHING, NOTHING};
    const auto bound = [&] { return two.second; };
    walk_tiles(query, index, clouds, b, NearestFirst<decltype(bound)>{bound}, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + lane];
        take(two, point.index < 0 ? NOTHING : key_of(distance2(query, point), point.index));
    });

    int *slots = listed_slots[threadIdx.x >> 5];
    double *distances = listed_distances[threadIdx.x >> 5];
    Candidates candidates = {query, index, clouds, b, radius2_of(two, mass, limit), 0, slots, distances};
    walk_tiles(query, index, clouds, b, Within{candidates.radius2}, [&](int tile) {
        const Row point = index.rows[(size_t)tile * TILE + lane];
        const bool hit = point.index >= 0 && distance2(query, point) <= candidates.radius2;
        const u32 hits = __ballot_sync(FULL, hit);
        const int at = candidates.count + __popc(hits & (1u << lane) - 1);
        if (hit && at < LISTED) {
            slots[at] = tile * TILE + lane;
            distances[at] = distance(query, point);
        }
        candidates.count = min(candidates.count + __popc(hits), LISTED + 1);
    });
    __syncwarp();

    const double infinite = __longlong_as_double(0x7ff0000000000000ll);
    double d1 = infinite, d2 = infinite;
    candidates.each([&](bool is, int, double c) {
        if (!is) return;
        d2 = min(d2, max(d1, c));
        d1 = min(d1, c);
    });
#pragma unroll
    for (int step = 16; step; step /= 2) {
        const double other1 = __shfl_xor_sync(FULL, d1, step), other2 = __shfl_xor_sync(FULL, d2, step);
        d2 = min(max(d1, other1), min(d2, other2));
        d1 = min(d1, other1);
    }
    const double t = __ddiv_rn(mass, max(__dsub_rn(d2, d1), GAP));
    const auto exponent = [&](double c) { return __dmul_rn(__dsub_rn(c, d1), t); };

    int count = 0;
    double sum = 0;                             // of the weights, a lane
    candidates.each([&](bool is, int, double c) {
        const double x = exponent(c);
        const bool kept = is && x < limit;
        count += __popc(__ballot_sync(FULL, kept));
        if (kept) sum += (double)(float)exp(-x);
    });
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(FULL, sum, step);

    u64 start = 0;
    if (lane == 0) {
        start = atomicAdd(total, (u64)count);
        starts[slot] = (u32)start;
        counts[slot] = count;
    }
    start = __shfl_sync(FULL, start, 0);
    if (start + count > room) return;
    Entry *to = entries + start;
    candidates.each([&](bool is, int other, double c) {
        const double x = exponent(c);
        const bool kept = is && x < limit;
        const u32 all = __ballot_sync(FULL, kept);
        if (kept) {
            to[__popc(all & (1u << lane) - 1)] = Entry{(u32)other, (float)((double)(float)exp(-x) / sum)};
            if (named) atomicAdd(&named[other], 1);
        }
        to += __popc(all);
    });
}
