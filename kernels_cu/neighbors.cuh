// SPDX-License-Identifier: Apache-2.0
// The index of the neighbour search, and the walk through it that skips what is too far. Include clouds.cuh first.
//
// A cloud in bucket order is cut into tiles of 32 points; 32 tiles make a node, 32 nodes a branch, none across clouds. Each has
// a box. A query is a warp, and reads 32 points, or 32 boxes, at a time, one a lane. Of the boxes it takes the nearest first
// and passes over those that are strictly farther than what it has found, so every answer is that of brute force:
//   d2 = (dx * dx + dy * dy) + dz * dz      every operation rounded once
// is monotone in |dx|, |dy|, |dz|, so that of a box is never above that of a point in it.
// At worst no box is passed over, and the walk is brute force, 32 pairs a step.
//
// In the index's table of clouds, Cloud::slot / 32 is the cloud's first tile, Cloud::tile its first node, Cloud::group its first
// branch.

#define TILE 32             // points; mirrored by gpu3d/neighbors.py
#define NOTHING 0x7f800000ffffffffull                       // the key of no neighbour: infinitely far, index -1

// A point: coordinates relative to the origin of the cloud that is searched, NaN where one of them is not finite, and its
// index in the caller's array; -1 in padding.
struct __align__(16) Row {
    float x, y, z;
    int index;
};

struct __align__(16) Box {
    float low[3], high[3];  // low > high where no point is finite
    float unused[2];
};

struct Index {
    const Row *rows;        // [tiles * TILE]
    const Box *tiles, *nodes, *branches;
};

// (d2, index) as one number of the same order: d2 is not negative. A NaN comes after everything.
__device__ __forceinline__ u64 key_of(float d2, int index) { return (u64)__float_as_uint(d2) << 32 | (u32)index; }
__device__ __forceinline__ float distance2_of(u64 key) { return __uint_as_float(key >> 32); }

__device__ __forceinline__ float norm2(float x, float y, float z) {
    return __fadd_rn(__fadd_rn(__fmul_rn(x, x), __fmul_rn(y, y)), __fmul_rn(z, z));
}

__device__ __forceinline__ bool is_finite(const Row &row) { return (row.x - row.x) + (row.y - row.y) + (row.z - row.z) == 0; }

__device__ __forceinline__ float distance2(const Row &query, const Row &point) {
    return norm2(__fsub_rn(query.x, point.x), __fsub_rn(query.y, point.y), __fsub_rn(query.z, point.z));
}

__device__ __forceinline__ float outside(float x, float low, float high) {
    return fmaxf(fmaxf(__fsub_rn(low, x), __fsub_rn(x, high)), 0);
}

__device__ __forceinline__ float distance2(const Row &query, const Box &box) {
    return norm2(outside(query.x, box.low[0], box.high[0]), outside(query.y, box.low[1], box.high[1]),
                 outside(query.z, box.low[2], box.high[2]));
}

// Of lanes that hold distances d2 as bits, one with the least; all ones where none is left.
struct Nearest {
    u32 bits;
    int lane;
};

__device__ __forceinline__ Nearest nearest_of(u32 bits) {
    const u32 least = __reduce_min_sync(FULL, bits);
    return {least, __ffs(__ballot_sync(FULL, bits == least)) - 1};
}

// Calls visit(i) for each box i of [first, end) that is not farther than bound(), which shrinks meanwhile: of each 32 the
// nearest first.
template <class Bound, class Visit>
__device__ __forceinline__ void walk_boxes(const Row &query, const Box *boxes, int first, int end, Bound bound, Visit visit) {
    for (int base = first; base < end; base += 32) {
        const int mine = base + (threadIdx.x & 31);
        u32 bits = mine < end ? __float_as_uint(distance2(query, boxes[mine])) : FULL;
        for (Nearest next = nearest_of(bits); next.bits <= __float_as_uint(bound()); next = nearest_of(bits)) {
            visit(base + next.lane);
            if (mine == base + next.lane) bits = FULL;
        }
    }
}

// Calls visit(tile) for each tile of cloud b that may hold a point not farther than bound(). The index's batch is `clouds`.
template <class Bound, class Visit>
__device__ __forceinline__ void walk_tiles(
    const Row &query, const Index &index, const Clouds &clouds, int b, Bound bound, Visit visit)
{
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int tiles = cloud.slot / TILE, tiles_end = next.slot / TILE;
    walk_boxes(query, index.branches, cloud.group, next.group, bound, [&](int branch) {
        const int nodes = cloud.tile + (branch - cloud.group) * 32;
        walk_boxes(query, index.nodes, nodes, min(nodes + 32, next.tile), bound, [&](int node) {
            const int first = tiles + (node - cloud.tile) * 32;
            walk_boxes(query, index.tiles, first, min(first + 32, tiles_end), bound, visit);
        });
    });
}
