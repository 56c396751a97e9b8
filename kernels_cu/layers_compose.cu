// SPDX-License-Identifier: Apache-2.0
// The geometry between two levels of the backbone. The slots of a level's local layout hold its points in the order
// that pooling made; a stage layout holds the same points, put into buckets by the stage's own hash.
//   pack_positions   the points of the local slots without the padding: what the stage layout is computed from
//   compose_members  members of pooling, from local slots to stage slots on both sides, so that features are pooled and
//                    unpooled between stage layouts, and no features move between local and stage order
// Point i of a cloud lies in its local slot i, because a cloud fills its slots without a gap. But the first level has
// the caller's points, whose local layout is a permutation of them: local_points.

#ifndef RATIO
#define RATIO 2  // members of a child: 2, 4 or 8
#endif
#define THREADS 256  // mirrored by gpu3d/cuda/layers.py

#include "clouds.cuh"

extern "C" __global__ __launch_bounds__(THREADS) void pack_positions(
    const float *__restrict__ positions,  // [slots, 3]
    const __grid_constant__ Clouds clouds,
    float *__restrict__ points  // [N, 3]
) {
    const int point = blockIdx.x * THREADS + threadIdx.x;
    if (point >= points_of(clouds)) return;  // the grid is an upper bound
    const Cloud cloud = rows_of(clouds)[cloud_of<&Cloud::point>(clouds, point)];
    const long long slot = cloud.slot + (point - cloud.point);
#pragma unroll
    for (int d = 0; d < 3; ++d) points[3ll * point + d] = positions[3 * slot + d];
}

struct __align__(RATIO < 4 ? 8 : 16) Members {
    int slot[RATIO];
};

extern "C" __global__ __launch_bounds__(THREADS) void compose_members(
    const Members *__restrict__ members,    // [child slots] local slots of the parents; -1 for a missing member
    const int *__restrict__ slot_to_point,  // [child slots] of the children's stage layout; -1 in padding
    const int *__restrict__ point_to_slot,  // [parents] of the parents' stage layout
    const int *__restrict__ local_points,   // [parent slots] the parents' points in local order; NULL: 0, 1, 2, ...
    const __grid_constant__ Clouds parents,
    const __grid_constant__ Clouds children,
    Members *__restrict__ composed  // [child slots] in the order of the children's stage layout
) {
    const int row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= slots_of(children)) return;
    const int point = slot_to_point[row];
    Members out;
#pragma unroll
    for (int j = 0; j < RATIO; ++j) out.slot[j] = -1;
    if (point >= 0) {
        const int b = cloud_of<&Cloud::slot>(children, row);
        const Cloud child = rows_of(children)[b], parent = rows_of(parents)[b];
        const Members local = members[child.slot + (point - child.point)];
#pragma unroll
        for (int j = 0; j < RATIO; ++j)
            if (local.slot[j] >= 0) {
                const int next = parent.point + (local.slot[j] - parent.slot);
                out.slot[j] = point_to_slot[local_points ? local_points[local.slot[j]] : next];
            }
    }
    composed[row] = out;
}
