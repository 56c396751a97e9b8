// SPDX-License-Identifier: Apache-2.0
// APML: what each point keeps of the other cloud, by an exact search of its two nearest and of a ball. A query is a warp.
//
//   T_i = L / max(d2 - d1, GAP),  L = ln((M - 1) / (1 - p_min)),  k_ij = exp(-(C_ij - d1) T_i) > threshold     (CUDA-APML, 3.2)
// What is kept lies in a ball whose radius follows from the two nearest. One walk finds both: it lists what is in the ball of the
// nearest so far, and if in the end it has passed over what may be in the last ball (of one query in a hundred), another walk does.
// That runs on float32 squares, and the ball is wide enough for their roundings. On the candidates, C, d1, d2 and T are float64,
// from the float32 coordinates, every operation rounded once, and
//   (C_ij - d1) * T_i < -ln(threshold)
// decides, without the exponential: the same entries on every device. See gpu3d/reference/apml.py.
//
// Most queries have at most 32 candidates, one a lane, and all that follows happens in registers. A warp reserves room for its
// entries by one atomic. Where rows come to lie differs from run to run, what is in them does not.

#define THREADS 128
#define BLOCKS 8    // a multiprocessor at least
#define LISTED 512  // candidates that a warp keeps; of more it repeats the search, three times

#include "apml.cuh"
#include "clouds.cuh"
#include "neighbors.cuh"

#define GAP 1e-8

// A double a cloud; few travel inside the kernel's arguments.
struct Masses {
    const double *table;  // [clouds] on the device, or null
    double inlined[INLINE_CLOUDS];
};

// d2 of the two nearest of what a warp has seen, alike on all lanes.
struct Two {
    float first, second;
};

// Takes in a d2 a lane; says whether one of the two is another now.
__device__ __forceinline__ bool take(Two &two, float d2) {
    bool changes = false;
    while (__any_sync(FULL, d2 < two.second)) {  // twice at most
        const Nearest nearest = nearest_of(__float_as_uint(d2));
        const float least = __uint_as_float(nearest.bits);
        two.second = fminf(two.second, fmaxf(two.first, least));
        two.first = fminf(two.first, least);
        if ((threadIdx.x & 31) == nearest.lane) d2 = INFINITE;
        changes = true;
    }
    return changes;
}

__device__ __forceinline__ double distance(const Row &a, const Row &b) {
    const double x = __dsub_rn(a.x, b.x), y = __dsub_rn(a.y, b.y), z = __dsub_rn(a.z, b.z);
    return __dsqrt_rn(__dadd_rn(__dadd_rn(__dmul_rn(x, x), __dmul_rn(y, y)), __dmul_rn(z, z)));
}

// The square of a radius that holds the two nearest and all that is kept, as float32 squares are rounded; infinite if there are
// fewer than two.
//
// With u = 2^-24, distances from those squares are off by less than 5 u, their gap by less than 10 u of the second, and what is
// made of them by less than 9 u (1 + ratio) (d2 + gap); the float32 squares of the points within are above the square by less than
// 5 u of it. WIDER is 12 u: where all of a cloud is about as far, each u makes more of it candidates.
#define WIDER 0x1.8p-21f
__device__ __forceinline__ float radius2_of(const Two &two, float ratio) {
    const float d1 = __fsqrt_rn(two.first), d2 = __fsqrt_rn(two.second), gap = fmaxf(d2 - d1, (float)GAP);
    const float radius = fmaxf(d1 + ratio * gap, d2) + WIDER * (1 + ratio) * (d2 + gap);
    return radius * radius * (1 + WIDER);
}

// What one side keeps.
struct Kept {
    double limit;          // -ln(threshold)
    u64 room;              // entries
    u64 *total;            // [] entries so far, room or not; 0 at first
    u32 *starts, *counts;  // [slots] where the entries of each query begin, and how many they are
    u32 *named;            // [other slots] entries that name each, zeros at first; or null
    Entry *entries;        // [room]; what has no room is counted, not written
};

// Of the candidates of the query in a slot, keeps what the definition does. candidates.each(visit) calls visit(is candidate, slot,
// distance) for all, 32 at a time.
template <class Candidates>
__device__ __forceinline__ void keep(const Kept &kept, int slot, double mass, const Candidates &candidates) {
    const int lane = threadIdx.x & 31;
    double least = INFINITE_DOUBLE, next = INFINITE_DOUBLE;  // the two nearest of a lane's
    candidates.each([&](bool is, int, double c) {
        if (!is) return;
        next = min(next, max(least, c));
        least = min(least, c);
    });
    // Their bits have the order of what is not negative.
    const u64 mine = __double_as_longlong(least), first = min_of_warp(mine);
    const bool has_first = lane == __ffs(__ballot_sync(FULL, mine == first)) - 1;
    const double d1 = __longlong_as_double(first);
    const double d2 = __longlong_as_double(min_of_warp(has_first ? __double_as_longlong(next) : mine));
    const double t = __ddiv_rn(mass, max(__dsub_rn(d2, d1), GAP));
    const auto exponent = [&](double c) { return __dmul_rn(__dsub_rn(c, d1), t); };

    int count = 0;
    double sum = 0;  // of the weights, a lane
    candidates.each([&](bool is, int, double c) {
        const double x = exponent(c);
        const bool stays = is && x < kept.limit;
        count += __popc(__ballot_sync(FULL, stays));
        if (stays) sum += (double)(float)exp(-x);
    });
    sum = sum_of_warp(sum);

    u64 start = 0;
    if (lane == 0) {
        start = atomicAdd(kept.total, (u64)count);
        kept.starts[slot] = (u32)start;
        kept.counts[slot] = count;
    }
    start = __shfl_sync(FULL, start, 0);
    if (__any_sync(FULL, start + count > kept.room)) return;
    Entry *to = kept.entries + start;
    candidates.each([&](bool is, int other, double c) {
        const double x = exponent(c);
        const bool stays = is && x < kept.limit;
        const u32 all = __ballot_sync(FULL, stays);
        if (stays) {
            to[rank_in(all, lane)] = Entry{(u32)other, (float)((double)(float)exp(-x) / sum)};
            if (kept.named) atomicAdd(&kept.named[other], 1);
        }
        __syncwarp();  // else the compiler takes the warp for apart, and asks before each vote
        to += __popc(all);
    });
}

// At most one a lane.
struct Few {
    bool is;
    int slot;
    double distance;

    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        visit(is, slot, distance);
    }
};

// On a list or, where there are even more, found again each time.
struct Many {
    const Row &query;
    const Index &index;
    const Clouds &clouds;
    int b;
    float radius2;
    int count;         // on the list, or above LISTED
    const int *slots;  // [LISTED] of a warp, in shared memory

    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        const int lane = threadIdx.x & 31;
        if (count <= LISTED)
            for (int base = 0; base < count; base += 32) {
                const int slot = slots[min(base + lane, count - 1)];
                visit(base + lane < count, slot, distance(query, index.rows[slot]));
            }
        else
            walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
                const int slot = tile * TILE + lane;
                const Row point = index.rows[slot];
                visit(distance2(query, point) <= radius2, slot, distance(query, point));
            });
    }
};

// Not inlined, so that what most queries run stays short.
__device__ __noinline__ void keep_of_many(const Kept &kept, int slot, double mass, const Many &many) {
    keep(kept, slot, mass, many);
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void search_balls(
    const Row *__restrict__ queries,  // [slots] of one side, in the order of its index
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,  // of the other side, from the same origins
    const __grid_constant__ Clouds clouds,
    const __grid_constant__ Masses masses,  // L of each cloud
    const __grid_constant__ Kept kept
) {
    __shared__ int listed[THREADS / 32][LISTED];
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, slot = blockIdx.x * (THREADS / 32) + warp;
    if (slot >= query_slots) return;
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, slot));
    const double mass = masses.table ? masses.table[b] : masses.inlined[b];
    const float ratio = __fdiv_ru(__double2float_ru(kept.limit), __double2float_rd(mass));
    int *slots = listed[warp];
    const Row query = queries[slot];
    if (__any_sync(FULL, query.index < 0 || !is_finite(query))) {
        if (lane == 0) kept.counts[slot] = 0;
        return;
    }
    int count = 0;
    const auto list = [&](int slot, bool is) {
        const u32 all = __ballot_sync(FULL, is);
        const int at = count + rank_in(all, lane);
        if (is && at < LISTED) slots[at] = slot;
        count = min(count + __popc(all), LISTED + 1);
    };
    // The ball of the two nearest so far shrinks as nearer ones are found, though not always.
    Two two = {INFINITE, INFINITE};
    float radius2 = INFINITE, passed2 = INFINITE;  // passed2: a lane's, the least d2 of what it has passed over
    const auto bound = [&] { return key_of(radius2, FULL); };
    const auto pass = [&](float d2) { passed2 = fminf(passed2, d2); };
    walk_tiles(query, index, clouds, b, NearestFirst<decltype(bound), decltype(pass)>{bound, pass}, [&](int tile) {
        const int slot = tile * TILE + lane;
        const float d2 = distance2(query, index.rows[slot]);  // NaN where there is no point, or it is not finite
        if (__any_sync(FULL, d2 <= radius2)) {
            if (take(two, d2)) radius2 = radius2_of(two, ratio);
            list(slot, d2 <= radius2);
        }
        if (!(d2 <= radius2)) pass(d2);
    });
    if (__any_sync(FULL, passed2 <= radius2) || count > LISTED) {
        count = 0;
        __syncwarp();  // then other lanes write where these have
        walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
            const int slot = tile * TILE + lane;
            list(slot, distance2(query, index.rows[slot]) <= radius2);
        });
    }
    __syncwarp();
    if (count > 32 && count <= LISTED) {  // without those that were listed before the ball was as small
        const int before = count;
        count = 0;
        for (int base = 0; base < before; base += 32) {
            const int slot = slots[min(base + lane, before - 1)];
            __syncwarp();
            list(slot, base + lane < before && distance2(query, index.rows[slot]) <= radius2);
        }
        __syncwarp();
    }
    if (count > 32) {
        keep_of_many(kept, slot, mass, Many{query, index, clouds, b, radius2, count, slots});
        return;
    }
    const int mine = lane < count ? slots[lane] : 0;
    keep(kept, slot, mass, Few{lane < count, mine, distance(query, index.rows[mine])});
}
