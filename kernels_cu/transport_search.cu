// SPDX-License-Identifier: Apache-2.0
// APML: which points of the other cloud each point keeps, by an exact search of the two nearest and of a ball
// (CUDA-APML, section 3.2). One warp a query.
//
//   T_i = L / max(d2 - d1, GAP),  L = ln((M - 1) / (1 - p_min)),  k_ij = exp(-(C_ij - d1) T_i) > threshold
//
// The kept points lie in a ball whose radius follows from the two nearest distances d1 and d2. One traversal finds
// both: it lists the points in the ball of the two nearest so far. If it has skipped boxes that reach into the final
// ball, which happens to one query in a hundred, a second traversal follows.
// The traversal uses squares of distances in float32, and the ball is wide enough for their rounding. For the listed
// candidates C, d1, d2 and T are float64, computed from the coordinates, every operation rounded once, and
//   (C_ij - d1) * T_i < -ln(threshold)
// decides without the exponential, so that every device keeps the same entries. See gpu3d/reference/transport.py.
// With REAL, coordinates and the squares of the traversal are doubles too.
//
// Most queries have at most 32 candidates: one a lane, and everything stays in registers. A warp reserves memory for
// its entries by one atomic. So the place of a row differs from run to run, but not its content.

#define THREADS 128
#define BLOCKS 8    // blocks a multiprocessor
#define LISTED 512  // candidates that a warp lists; if there are more, it repeats the search three times

#include "clouds.cuh"
#include "neighbors.cuh"
#include "transport.cuh"

#define GAP 1e-8

// One double for each cloud. A small batch's lie in the kernel's arguments.
struct Masses {
    const double *table;  // [clouds] on the device, or null
    double inlined[INLINE_CLOUDS];
};

// The two smallest d2 that a warp has seen, on all lanes.
struct Two {
    real first, second;
};

// Takes one d2 from each lane. Returns whether one of the two changed.
__device__ __forceinline__ bool take(Two &two, real d2) {
    bool changes = false;
    while (__any_sync(FULL, d2 < two.second)) {  // at most twice
        const Nearest nearest = nearest_of(bits_of(d2));
        const real least = number_of(nearest.bits);
        two.second = min(two.second, max(two.first, least));
        two.first = min(two.first, least);
        if ((threadIdx.x & 31) == nearest.lane) d2 = INFINITE;
        changes = true;
    }
    return changes;
}

__device__ __forceinline__ double distance(const Row &a, const Row &b) {
    const double x = __dsub_rn(a.x, b.x), y = __dsub_rn(a.y, b.y), z = __dsub_rn(a.z, b.z);
    return __dsqrt_rn(__dadd_rn(__dadd_rn(__dmul_rn(x, x), __dmul_rn(y, y)), __dmul_rn(z, z)));
}

// The squared radius of a ball that holds the two nearest points and all kept points, allowing for the rounding of
// squares. Infinite if there are fewer than two points.
//
// With u = 2^-24, or 2^-53 for double: distances computed from these squares have an error below 5 u, their gap one
// below 10 u of the second distance, and the radius one below 9 u (1 + ratio) (d2 + gap). The squares of points inside
// exceed the exact ones by less than 5 u. WIDER is 12 u and no more, because where a whole cloud is about equally far,
// each u adds candidates.
#define WIDER (REAL ? (real)0x1.8p-50 : (real)0x1.8p-21)
__device__ __forceinline__ real radius2_of(const Two &two, real ratio) {
    const real d1 = sqrt_rn(two.first), d2 = sqrt_rn(two.second), gap = max(d2 - d1, (real)GAP);
    const real radius = max(d1 + ratio * gap, d2) + WIDER * (1 + ratio) * (d2 + gap);
    return radius * radius * (1 + WIDER);
}

// limit / mass, rounded up.
__device__ __forceinline__ real ratio_of(double limit, double mass) {
#if REAL
    return __ddiv_ru(limit, mass);
#else
    return __fdiv_ru(__double2float_ru(limit), __double2float_rd(mass));
#endif
}

// The entries that one side keeps.
struct Kept {
    double limit;          // -ln(threshold)
    u64 capacity;          // in entries
    u64 *total;            // [] entries so far, also those beyond the capacity; starts at 0
    u32 *starts, *counts;  // [slots] first entry and number of entries of each query
    u32 *named;            // [other slots] number of entries for each slot, starts at 0; or null
    Entry *entries;        // [capacity]; entries beyond it are counted, not written
};

// Keeps those candidates of a query that the definition keeps. candidates.each(visit) calls visit(is candidate, slot,
// distance) for all candidates, 32 at a time.
template <class Candidates>
__device__ __forceinline__ void keep(const Kept &kept, int slot, double mass, const Candidates &candidates) {
    const int lane = threadIdx.x & 31;
    double least = INFINITE_DOUBLE, next = INFINITE_DOUBLE;  // the lane's two nearest
    candidates.each([&](bool is, int, double c) {
        if (!is) return;
        next = min(next, max(least, c));
        least = min(least, c);
    });
    // Bits of doubles that are not negative have the order of the doubles.
    const u64 mine = __double_as_longlong(least), first = min_of_warp(mine);
    const bool has_first = lane == __ffs(__ballot_sync(FULL, mine == first)) - 1;
    const double d1 = __longlong_as_double(first);
    const double d2 = __longlong_as_double(min_of_warp(has_first ? __double_as_longlong(next) : mine));
    const double t = __ddiv_rn(mass, max(__dsub_rn(d2, d1), GAP));
    const auto exponent = [&](double c) { return __dmul_rn(__dsub_rn(c, d1), t); };

    int count = 0;
    double sum = 0;  // the lane's part of the sum of weights
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
    if (__any_sync(FULL, start + count > kept.capacity)) return;
    Entry *to = kept.entries + start;
    candidates.each([&](bool is, int other, double c) {
        const double x = exponent(c);
        const bool stays = is && x < kept.limit;
        const u32 all = __ballot_sync(FULL, stays);
        if (stays) {
            to[rank_in(all, lane)] = Entry{(u32)other, (float)((double)(float)exp(-x) / sum)};
            if (kept.named) atomicAdd(&kept.named[other], 1);
        }
        __syncwarp();  // without this the compiler emits a convergence check before each vote
        to += __popc(all);
    });
}

// At most one candidate a lane.
struct Few {
    bool is;
    int slot;
    double distance;

    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        visit(is, slot, distance);
    }
};

// More candidates: on a list or, if there are too many for it, found again each time.
struct Many {
    const Row &query;
    const Index &index;
    const Clouds &clouds;
    int b;
    real radius2;
    int count;         // number on the list; above LISTED: there is no list
    const int *slots;  // [LISTED] the warp's list, in shared memory

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

// Not inlined, so that the code for most queries stays short.
__device__ __noinline__ void keep_of_many(const Kept &kept, int slot, double mass, const Many &many) {
    keep(kept, slot, mass, many);
}

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void transport_search(
    const Row *__restrict__ queries,  // [slots] of one side, in the order of its index
    const __grid_constant__ Clouds query_clouds,
    int query_slots,
    const __grid_constant__ Index index,  // of the other side
    const __grid_constant__ Clouds clouds,
    const __grid_constant__ Masses masses,  // L of each cloud
    const __grid_constant__ Kept kept
) {
    __shared__ int listed[THREADS / 32][LISTED];
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, slot = blockIdx.x * (THREADS / 32) + warp;
    if (slot >= query_slots) return;
    const int b = uniform(cloud_of<&Cloud::slot>(query_clouds, slot));
    const double mass = masses.table ? masses.table[b] : masses.inlined[b];
    const real ratio = ratio_of(kept.limit, mass);
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
    // The ball of the two nearest so far mostly shrinks when nearer points are found, but it can grow.
    Two two = {INFINITE, INFINITE};
    real radius2 = INFINITE, passed2 = INFINITE;  // passed2: the smallest d2 that this lane has skipped
    const auto bound = [&] { return key_of(radius2, FULL); };
    const auto pass = [&](real d2) { passed2 = min(passed2, d2); };
    walk_tiles(query, index, clouds, b, NearestFirst<decltype(bound), decltype(pass)>{bound, pass}, [&](int tile) {
        const int slot = tile * TILE + lane;
        const real d2 = distance2(query, index.rows[slot]);  // NaN for padding and non-finite points
        if (__any_sync(FULL, d2 <= radius2)) {
            if (take(two, d2)) radius2 = radius2_of(two, ratio);
            list(slot, d2 <= radius2);
        }
        if (!(d2 <= radius2)) pass(d2);
    });
    if (__any_sync(FULL, passed2 <= radius2) || count > LISTED) {
        count = 0;
        __syncwarp();  // the list is written again
        walk_tiles(query, index, clouds, b, Within{radius2}, [&](int tile) {
            const int slot = tile * TILE + lane;
            list(slot, distance2(query, index.rows[slot]) <= radius2);
        });
    }
    __syncwarp();
    if (count > 32 && count <= LISTED) {  // drop those listed when the ball was larger
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
