// SPDX-License-Identifier: Apache-2.0
// The index of the neighbour search, and the traversal that skips what is too far.
//
// A cloud in bucket order is cut into nodes of 1024 points and these into tiles of 32 (neighbors_index.cu reorders the
// points of a node for that). 32 nodes form a branch, 32 branches a box of the level above, and so on up to a level of
// at most 32 boxes: the cost of a search grows as the logarithm of the cloud. No box spans two clouds. All have a
// bounding box; tiles and nodes also have a slab: two parallel planes along the surface that the points lie on, which a
// box cannot follow.
//
// A warp takes a query. It reads 32 points or 32 boxes at a time, one a lane, visits the nearest boxes first, and skips
// those that hold nothing better than what it has found. The answer is that of brute force, because
//   d2 = (dx * dx + dy * dy) + dz * dz      every operation rounded once
// is monotone in |dx|, |dy| and |dz|: the d2 of a box never exceeds that of a point in it. Slabs allow for rounding. In
// the worst case nothing is skipped, and the traversal is brute force, 32 pairs a step.
//
// What slabs gain: queries within 0.05 of the centre of a sphere of 131,072 points see all tiles about equally
// far, and the boxes of slanted tiles reach far inwards. k = 2 took 19.9 ms without slabs, 4.3 ms with them, and 2.4 ms
// with slabs tested before boxes and compact tiles (neighbors_index.cu; H100).
//
// With REAL all of this is in double, for float64 clouds: the same search, exact for any extent, and no coordinate is
// rounded. An index then takes twice the memory.
//
// In the index's table of clouds, Cloud::slot / 32 is the cloud's first tile, Cloud::tile its first node and
// Cloud::group its first branch.

#ifndef GPU3D_NEIGHBORS_CUH
#define GPU3D_NEIGHBORS_CUH

#include "clouds.cuh"
#include "floats.cuh"
#include "real.cuh"
#include "warp.cuh"

#define TILE 32  // points a tile; mirrored by gpu3d/cuda/neighbors.py

// A point: its coordinates (all NaN if one is not finite) and its index in the caller's array, -1 in padding.
struct __align__(16) Row {
    real x, y, z;
    int index;
};

struct __align__(16) Box {
    real low[3];  // low > high if no point is finite
    int first;    // the lowest index of a finite point, -1 if there is none
    real high[3];
    real below;      // below <= normal . point <= above, up to the rounding that slab_distance2 allows for
    real normal[3];  // |normal| < 1; 0 above the nodes, and if the points have no plane
    real above;
};

// Levels of boxes above the nodes, the lowest of branches: enough for 2^30 points. Mirrored by gpu3d/cuda/neighbors.py.
#define LEVELS 3

struct Index {
    const Row *rows;  // [tiles * TILE]
    const Box *tiles, *nodes;
    const Box *levels[LEVELS];  // null if no cloud needs them
    int groups, clouds;         // how many branches and clouds lie before these in `levels`
};

// How many boxes of a level a cloud has, and where they begin in the level. `group` is its first branch and b its
// number. A cloud of n boxes has ceil(n / 32) on the next level, and from group / 32 + b on there is room for
// floor(n / 32) + 1. So no table is needed.
__device__ __forceinline__ int boxes_of_level(int branches, int level) {
    return (branches - 1 >> 5 * level) + 1;  // 0 if there are no branches
}
__device__ __forceinline__ int first_of_level(int group, int b, int level) {
    int first = group;
    for (; level > 0; --level) first = first / 32 + b;
    return first;
}

// (d2, index) in this order; d2 is not negative, and NaN comes last. Of floats it is one integer.
#if REAL
struct __align__(16) Key {
    u64 d2;
    u32 index;
};
__device__ __forceinline__ Key key_of(real d2, int index) { return {bits_of(d2), (u32)index}; }
__device__ __forceinline__ real distance2_of(const Key &key) { return number_of(key.d2); }
__device__ __forceinline__ int index_of(const Key &key) { return (int)key.index; }
__device__ __forceinline__ bool operator<(const Key &a, const Key &b) {
    return a.d2 < b.d2 || (a.d2 == b.d2 && a.index < b.index);
}
__device__ __forceinline__ Key min(const Key &a, const Key &b) { return b < a ? b : a; }
__device__ __forceinline__ Key max(const Key &a, const Key &b) { return b < a ? a : b; }
__device__ __forceinline__ Key __shfl_sync(u32 mask, const Key &key, int lane) {
    return {__shfl_sync(mask, key.d2, lane), __shfl_sync(mask, key.index, lane)};
}
__device__ __forceinline__ Key __shfl_up_sync(u32 mask, const Key &key, int step) {
    return {__shfl_up_sync(mask, key.d2, step), __shfl_up_sync(mask, key.index, step)};
}
__device__ __forceinline__ Key __shfl_xor_sync(u32 mask, const Key &key, int lanes) {
    return {__shfl_xor_sync(mask, key.d2, lanes), __shfl_xor_sync(mask, key.index, lanes)};
}
__device__ __forceinline__ Key min_of_warp(const Key &key) {
    const u64 least = min_of_warp(key.d2);
    return {least, __reduce_min_sync(FULL, key.d2 == least ? key.index : FULL)};
}
#else
typedef u64 Key;
__device__ __forceinline__ Key key_of(real d2, int index) { return (u64)bits_of(d2) << 32 | (u32)index; }
__device__ __forceinline__ real distance2_of(Key key) { return number_of((u32)(key >> 32)); }
__device__ __forceinline__ int index_of(Key key) { return (int)(u32)key; }
#endif
#define NOTHING key_of(INFINITE, -1)  // the key of a missing neighbour: infinitely far, index -1

// Writes a neighbour, or index -1 and distance `missing` if the key is that of a missing one.
__device__ __forceinline__ void write_neighbor(
    const Key &key, size_t at, real missing, bool squared, real *distances, int *indices
) {
    const int found = index_of(key);
    indices[at] = found;
    distances[at] = found < 0 ? missing : squared ? distance2_of(key) : sqrt_rn(distance2_of(key));
}

__device__ __forceinline__ real norm2(real x, real y, real z) {
    return add_rn(add_rn(mul_rn(x, x), mul_rn(y, y)), mul_rn(z, z));
}

__device__ __forceinline__ bool is_finite(const Row &row) {
    return (row.x - row.x) + (row.y - row.y) + (row.z - row.z) == 0;
}

__device__ __forceinline__ real distance2(const Row &query, const Row &point) {
    return norm2(sub_rn(query.x, point.x), sub_rn(query.y, point.y), sub_rn(query.z, point.z));
}

__device__ __forceinline__ real outside(real x, real low, real high) {
    return max(max(sub_rn(low, x), sub_rn(x, high)), (real)0);
}

__device__ __forceinline__ real distance2(const Row &query, const Box &box) {
    return norm2(
        outside(query.x, box.low[0], box.high[0]), outside(query.y, box.low[1], box.high[1]),
        outside(query.z, box.low[2], box.high[2])
    );
}

__device__ __forceinline__ real along_normal(const Box &box, real x, real y, real z) {
    return fma_rn(box.normal[0], x, fma_rn(box.normal[1], y, mul_rn(box.normal[2], z)));
}

// A lower bound of the rounded d2 of the points between the planes.
//
// With u = 2^-24, or 2^-53 for double, along_normal has an error below 4 u (|x| + |y| + |z|). SLACK is 8 u; the query's
// is subtracted here, the points' is part of the planes. Normals, which are computed as floats, are shortened by 2^-19,
// so their square by 2^-18, which covers the 5 u of d2.
#define SLACK (REAL ? (real)0x1p-50 : (real)0x1p-21)
#define SHORTENED 0x1.ffffcp-1f
__device__ __forceinline__ real slab_distance2(const Row &query, const Box &box) {
    const real s = along_normal(box, query.x, query.y, query.z),
               slack = SLACK * (fabs(query.x) + fabs(query.y) + fabs(query.z));
    const real gap = max(max(box.below - s, s - box.above) - slack, (real)0);
    return gap * gap;
}

// The square of the radius of a query: `radius2`, or that of its own of `radii` if they are not null. A negative or NaN
// radius finds nothing: then it is negative.
__device__ __forceinline__ real reach2_of(real radius2, const real *radii, int query) {
    if (!radii) return radius2;
    const real radius = radii[query];
    return radius >= 0 ? mul_rn(radius, radius) : -1;
}

// The least of the lanes' d2, as bits, and one lane that has it. Lanes pass NO_BITS to take no part; it is left if none
// does.
#define NO_BITS (~(bits_t)0)
struct Nearest {
    bits_t bits;
    int lane;
};

__device__ __forceinline__ Nearest nearest_of(bits_t bits) {
    const bits_t least = min_of_warp(bits);
    return {least, __ffs(__ballot_sync(FULL, bits == least)) - 1};
}

// Returns whether the box of some lane may hold a point within `reach2`. If so, d2 is the lower bound for the lane's
// own box, and infinite on lanes past `end`. Slabs are cheaper, and rule most boxes out where all are about equally
// far.
template <bool SLABS>
__device__ __forceinline__ bool bounds(real &d2, const Row &query, const Box *boxes, int mine, int end, real reach2) {
    const Box &box = boxes[min(mine, end - 1)];
    if (SLABS) {
        d2 = slab_distance2(query, box);
        if (!__any_sync(FULL, d2 <= reach2)) return false;
        d2 = max(d2, distance2(query, box));
    } else d2 = distance2(query, box);
    if (mine >= end) d2 = INFINITE;
    return true;
}

struct Ignore {
    __device__ __forceinline__ void operator()(real) const {}
};

// An order of up to 32 boxes [first, end), one a lane: open() returns whether there is something to visit, and each
// lane has a Left, what is left. next() returns whether there is a next box to visit, and finds its lane. What they
// return comes straight from a vote or a reduction: so the compiler knows that the whole warp branches alike.

// Boxes that may hold a key below bound(), the nearest first; bound() shrinks meanwhile. Calls pass(d2) for boxes that
// are skipped: none of their points is nearer than d2.
template <class Bound, class Pass = Ignore>
struct NearestFirst {
    typedef Key Left;
    Bound bound;
    Pass pass;
    template <bool SLABS>
    __device__ __forceinline__ bool open(Left &left, const Row &query, const Box *boxes, int first, int end) const {
        const int mine = first + (threadIdx.x & 31);
        real d2;
        if (!bounds<SLABS>(d2, query, boxes, mine, end, distance2_of(bound()))) {
            pass(d2);
            return false;
        }
        left = mine < end ? key_of(d2, boxes[mine].first) : NOTHING;
        return true;
    }
    __device__ __forceinline__ bool next(Left &left, int &lane) const {
        const Nearest nearest = nearest_of(left < bound() ? bits_of(distance2_of(left)) : NO_BITS);
        lane = nearest.lane;
        if (nearest.bits == NO_BITS) pass(distance2_of(left));
        else if ((threadIdx.x & 31) == lane) left = NOTHING;
        return nearest.bits != NO_BITS;
    }
};

// Boxes that may hold a point within a radius.
struct Within {
    typedef u32 Left;
    real radius2;
    template <bool SLABS>
    __device__ __forceinline__ bool open(Left &left, const Row &query, const Box *boxes, int first, int end) const {
        const int mine = first + (threadIdx.x & 31);
        real d2;
        if (!bounds<SLABS>(d2, query, boxes, mine, end, radius2)) return false;
        left = __ballot_sync(FULL, mine < end && d2 <= radius2);
        return true;
    }
    __device__ __forceinline__ bool next(Left &left, int &lane) const {
        const bool found = left != 0;
        lane = __ffs(left) - 1;
        left &= left - 1;
        return found;
    }
};

// Calls visit(i) for boxes i of [first, end), at most 32, which have slabs.
template <class Order, class Visit>
__device__ __forceinline__ void walk(
    const Row &query, const Box *boxes, int first, int end, const Order &order, Visit visit
) {
    typename Order::Left left;
    if (!order.template open<true>(left, query, boxes, first, end)) return;
    for (int lane; order.next(left, lane);) visit(first + lane);
}

// Calls visit(i) for boxes i of level LEVEL of cloud b, counted from the cloud's first, of its 32 from `from` on; of a
// level that the cloud does not need, for the one box that all would have as their parent.
template <int LEVEL, class Order, class Visit>
__device__ __forceinline__ void walk_level(
    const Row &query, const Index &index, int group, int count, int b, int from, const Order &order, Visit visit
) {
    const int boxes = boxes_of_level(count, LEVEL);
    const bool needed = LEVEL == 0 || boxes > 1;
    typename Order::Left left;
    const Box *level = index.levels[LEVEL] + first_of_level(index.groups + group, index.clouds + b, LEVEL);
    if (needed) order.template open<false>(left, query, level, from, min(from + 32, boxes));
    int lane = 0;
    do {
        if (needed && !order.next(left, lane)) return;
        visit(from + lane);
    } while (needed);
}

// Calls visit(i) for branches i of cloud b, counted from its first, by way of the levels above them.
template <class Order, class Visit>
__device__ __forceinline__ void walk_branches(
    const Row &query, const Index &index, int group, int count, int b, const Order &order, Visit visit
) {
    static_assert(LEVELS == 3, "a loop for each level");
    walk_level<2>(query, index, group, count, b, 0, order, [&](int above) {
        walk_level<1>(query, index, group, count, b, 32 * above, order, [&](int box) {
            walk_level<0>(query, index, group, count, b, 32 * box, order, visit);
        });
    });
}

// Calls visit(tile) for tiles of cloud b. `order`, a NearestFirst or a Within, says which and in which order. `clouds`
// is the index's batch.
template <class Order, class Visit>
__device__ __forceinline__ void walk_tiles(
    const Row &query, const Index &index, const Clouds &clouds, int b, const Order &order, Visit visit
) {
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int tiles = uniform(cloud.slot) / TILE, tiles_end = uniform(next.slot) / TILE;
    const int first_node = uniform(cloud.tile), nodes_end = uniform(next.tile);
    const auto walk_nodes = [&](int nodes, int end) {
        walk(query, index.nodes, nodes, end, order, [&](int node) {
            const int first = tiles + (node - first_node) * 32;
            walk(query, index.tiles, first, min(first + 32, tiles_end), order, visit);
        });
    };
    if (nodes_end - first_node <= 32) {
        if (first_node < nodes_end) walk_nodes(first_node, nodes_end);
        return;
    }
    const int group = uniform(cloud.group), count = uniform(next.group) - group;
    walk_branches(query, index, group, count, b, order, [&](int branch) {
        const int nodes = first_node + branch * 32;
        walk_nodes(nodes, min(nodes + 32, nodes_end));
    });
}

#endif  // GPU3D_NEIGHBORS_CUH
