// SPDX-License-Identifier: Apache-2.0
// In-bucket pooling, first half: which points form a child (Flash3D, sections 4.2 and 9.4).
//
// A block takes a tile: TILE consecutive slots, counted from the cloud's first. It orders their points by Morton code,
// ties by slot, and cuts this order into groups of `ratio`. Each group is a child; only a cloud's last may be smaller.
// The block writes the children's layout and points, which are means. pooling_rows.cu then moves features along
// `members`.
//
// The sort, on chip: each warp sorts 32 items by a bitonic network in registers. Then runs are merged pairwise: each
// thread finds its item's rank in the other run by bisection. Items contain their slot, so no two are equal.

#define TILE 1024    // slots; mirrored by gpu3d/cuda/pooling.py, like the next
#define VOXELS 1024  // an axis of a tile

#include "clouds.cuh"
#include "sort.cuh"
#include "voxels.cuh"

// Sorts the items of the block's TILE threads: thread t gets the item of rank t.
__device__ __forceinline__ u64 sorted(u64 item, u64 *before, u64 *after) {
    const int t = threadIdx.x;
    u64 its[1] = {item};
    sort_warp(its);
    item = its[0];
    for (int run = 32; run < TILE; run *= 2) {
        before[t] = item;
        __syncthreads();
        const u64 *other = before + ((t ^ run) & -run);
        int rank = 0;  // items of the other run that are smaller
        for (int step = run / 2; step; step /= 2)
            if (other[rank + step - 1] < item) rank += step;
        if (other[rank] < item) ++rank;
        after[(t & -2 * run) + (t & run - 1) + rank] = item;
        __syncthreads();
        item = after[t];
    }
    return item;
}

__device__ __forceinline__ point_t mean(coord_t sum, int count) {
#if POINT == FLOAT64
    return __ddiv_rn(sum, count);
#else
    return narrow(__fdiv_rn(sum, count));
#endif
}

extern "C" __global__ __launch_bounds__(TILE) void pool_groups(
    const point_t *__restrict__ points,  // [parent slots, 3]
    const __grid_constant__ Clouds parents,
    const __grid_constant__ Clouds children,  // its points are the children
    int ratio,                                // 2, 4 or 8
    int *__restrict__ members,                // [child slots, ratio] parent slots; -1 for a missing member
    point_t *__restrict__ child_points,       // [child slots, 3]
    int *__restrict__ slot_to_point,          // [child slots]
    int *__restrict__ point_to_slot,          // [children]
    int *__restrict__ moved                   // []
) {
    __shared__ u64 before[TILE], after[TILE];
    __shared__ coord_t coordinates[3][TILE];
    if ((int)blockIdx.x >= rows_of(parents)[parents.count].tile) return;  // the grid is an upper bound
    const int t = threadIdx.x, b = cloud_of<&Cloud::tile>(parents, blockIdx.x);
    const Cloud parent = rows_of(parents)[b], next_parent = rows_of(parents)[b + 1];
    const Cloud child = rows_of(children)[b], next_child = rows_of(children)[b + 1];
    const int first = (blockIdx.x - parent.tile) * TILE;  // counted in the cloud's points, and so in its slots
    const int left = next_parent.point - parent.point - first, count = min(left, TILE);
    const bool holds = t < count;

    coord_t x[3], low[3], high[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        x[d] = holds ? widen(points[3 * ((size_t)parent.slot + first + t) + d]) : (coord_t)INFINITE;
        coordinates[d][t] = x[d];
        low[d] = is_finite(x[d]) ? x[d] : (coord_t)INFINITE;
        high[d] = is_finite(x[d]) ? x[d] : (coord_t)-INFINITE;
    }
    join_bounds(low, high);
    const Frame frame = frame_from_bounds(low, high, 0);
    const u32 vx = voxel(x[0], frame, 0), vy = voxel(x[1], frame, 1), vz = voxel(x[2], frame, 2);
    const u32 code = morton_of_bytes(vx >> 8, vy >> 8, vz >> 8) << 24 | morton_of_bytes(vx, vy, vz);
    // The slot of rank t in the tile.
    const int slot = sorted((u64)(holds ? code : 1u << 30) << 10 | t, before, after) & TILE - 1;

    int *its_members = members + (size_t)child.slot * ratio + first;
    if (holds) its_members[t] = parent.slot + first + slot;
    int *order = (int *)before;  // `before` is not read any more
    order[t] = slot;
    __syncthreads();

    const int first_child = first / ratio;
    if (t * ratio < count) {
        const int group = min(ratio, count - t * ratio);
        const size_t at = (size_t)child.slot + first_child + t;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
            coord_t sum = coordinates[d][order[t * ratio]];
            for (int m = 1; m < group; ++m) sum += coordinates[d][order[t * ratio + m]];
            child_points[3 * at + d] = mean(sum, group);
        }
        slot_to_point[at] = child.point + first_child + t;
        point_to_slot[child.point + first_child + t] = at;
    }
    if (blockIdx.x == 0 && t == 0) *moved = 0;
    if (left > TILE) return;
    // The cloud's last tile writes its padding.
    const int end = next_child.slot - child.slot, children_here = next_child.point - child.point;
    for (long long i = (long long)first + count + t; i < (long long)end * ratio; i += TILE)
        members[(size_t)child.slot * ratio + i] = -1;
    for (int i = children_here + t; i < end; i += TILE) {
        const size_t at = (size_t)child.slot + i;
        slot_to_point[at] = -1;
        for (int d = 0; d < 3; ++d) child_points[3 * at + d] = 0;
    }
}
