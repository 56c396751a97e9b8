// SPDX-License-Identifier: Apache-2.0
// Voxel downsampling, first half: which voxel each point is in, and the points of each voxel.
//
//   voxel v_d = floor((x_d - min_d) / size) on each axis, rounded as in voxels.cuh, but not clamped
//   1 grids    a block a group of GROUP points: bounds; a cloud's last block joins them to the cloud's grid
//   2 insert   a thread a point: its voxel's entry in a hash table, which collects the lowest point and the number
//   3 flags    a thread a point: whether it is the first of its voxel, and of how many
//   4          prefix sums of the flags (arrays_scan.cu): voxels, in the order of their first points, and where their
//              points are listed
//   5 lists    a thread a point: the number of its voxel, and its place in the voxel's list
// The order inside of a list differs from run to run; sampling_reduce.cu sorts it. Nothing else depends on the order in
// which points arrive.
//
// A cloud of n points has 2 n entries of the table, so half of them stay empty and chains of collisions are short. All
// bytes of the table are 255 at first: an entry without a voxel, the largest index, and a number that is one too small.

#define THREADS 256       // mirrored by gpu3d/cuda/sampling.py, as are the next two
#define GRID_THREADS 512  // threads of voxels_grids
#define GROUP 4096        // points whose bounds a block finds

#include "buckets.cuh"
#include "clouds.cuh"
#include "grid.cuh"
#include "voxels.cuh"

#define NOWHERE FULL  // instead of an entry of the table: the point is in no voxel
#define EMPTY (~0ull)
#define LISTED 31  // bits of the number of points in a flag, below its number of voxels
#define MOST 0x1p63f

// The grid of a cloud. Voxels are numbered below 2^63: x + cells[0] * (y + cells[1] * z).
struct Grid {
    coord_t origin[3];
    u64 cells[2];
    bool fits;  // false if 2^63 voxels are not enough
};

__device__ __forceinline__ float steps_of(float t, float size) { return floorf(__fdiv_rn(t, size)); }

// ---- 1 grids -------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(GRID_THREADS) void voxels_grids(
    const point_t *__restrict__ points,  // [N, 3]
    const __grid_constant__ Clouds clouds,
    float size,
    u32 *__restrict__ arrived,  // [clouds] groups whose bounds are written; starts at 0
    coord_t *bounds,            // [groups, 6]
    Grid *__restrict__ grids    // [clouds] not written if the cloud is empty
) {
    const int group = blockIdx.x;  // ranges [0, groups)
    if (group >= groups_of(clouds)) return;
    const int b = cloud_of<&Cloud::group>(clouds, group);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int first = cloud.point + (group - cloud.group) * GROUP;
    write_bounds(points, first, min(next.point - first, GROUP) + first, bounds + 6 * (size_t)group);
    if (!is_last_block(&arrived[b], next.group - cloud.group)) return;
    coord_t low[3] = {(coord_t)INFINITE, (coord_t)INFINITE, (coord_t)INFINITE};
    coord_t high[3] = {(coord_t)-INFINITE, (coord_t)-INFINITE, (coord_t)-INFINITE};
    for (int row = cloud.group + threadIdx.x; row < next.group; row += GRID_THREADS)
        for (int d = 0; d < 3; ++d) {
            low[d] = min(low[d], bounds[6 * (size_t)row + d]);
            high[d] = max(high[d], bounds[6 * (size_t)row + 3 + d]);
        }
    join_bounds(low, high);
    if (threadIdx.x != 0) return;
    Grid grid = {};
    u64 cells[3];
    grid.fits = true;
    for (int d = 0; d < 3; ++d) {
        const bool any = low[d] <= high[d];  // false where no coordinate was finite
        grid.origin[d] = any ? low[d] : (coord_t)0;
        const float steps = any ? steps_of(difference(high[d], low[d]), size) : 0.0f;
        grid.fits = grid.fits && steps < MOST;
        cells[d] = steps < MOST ? (u64)steps + 1 : 1;
    }
    const u64 plane = cells[0] * cells[1], all = plane * cells[2];
    grid.fits = grid.fits && !__umul64hi(cells[0], cells[1]) && !__umul64hi(plane, cells[2]) && all <= 1ull << 63;
    grid.cells[0] = cells[0];
    grid.cells[1] = cells[1];
    grids[b] = grid;
}

// ---- 2 insert ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u64 mixed(u64 x) {  // the finalizer of MurmurHash3
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

extern "C" __global__ __launch_bounds__(THREADS) void voxels_insert(
    const point_t *__restrict__ points,  // [N, 3]
    const __grid_constant__ Clouds clouds,
    float size,
    const Grid *__restrict__ grids,  // [clouds]
    u64 *voxels,                     // [2 N] of the table: the voxel, EMPTY at first
    u32 *first,                      // [2 N] the lowest point of the voxel
    u32 *number,                     // [2 N] the number of its points, minus 1
    u32 *__restrict__ entry,         // [N] of each point
    u32 *__restrict__ arrival        // [N] how many points of its voxel came before
) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= points_of(clouds)) return;
    const int p = (int)i, b = cloud_of<&Cloud::point>(clouds, p);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const Grid grid = grids[b];
    u64 voxel[3];
    bool inside = grid.fits;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        const coord_t x = widen(points[3 * (size_t)p + d]);
        inside = inside && is_finite(x);
        voxel[d] = inside ? (u64)steps_of(difference(x, grid.origin[d]), size) : 0;
    }
    entry[p] = NOWHERE;
    if (!inside) return;
    const u64 key = voxel[0] + grid.cells[0] * (voxel[1] + grid.cells[1] * voxel[2]);
    const u32 entries = 2 * (u32)(next.point - cloud.point);
    const size_t base = 2 * (size_t)cloud.point;
    u32 at = (u32)__umul64hi(mixed(key), entries);
    while (true) {
        u64 seen = *(volatile u64 *)&voxels[base + at];  // an entry is written once, so reading first saves atomics
        if (seen == EMPTY) seen = atomicCAS(&voxels[base + at], EMPTY, key);
        if (seen == EMPTY || seen == key) break;
        at = at + 1 == entries ? 0 : at + 1;
    }
    if (*(volatile u32 *)&first[base + at] > p) atomicMin(&first[base + at], (u32)p);
    arrival[p] = atomicAdd(&number[base + at], 1u) + 1;
    entry[p] = (u32)(base + at);
}

// ---- 3 flags -------------------------------------------------------------------------------------------------------

// Sums of flags have the voxels before in their high bits, and the points of these voxels in their low bits.
extern "C" __global__ __launch_bounds__(THREADS) void voxels_flags(
    long long n,
    const u32 *__restrict__ entry,   // [N]
    const u32 *__restrict__ first,   // [2 N]
    const u32 *__restrict__ number,  // [2 N]
    long long *__restrict__ flags    // [N] 0 if the point is not the first of a voxel
) {
    const long long p = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (p >= n) return;
    const u32 at = entry[p];
    flags[p] = at != NOWHERE && first[at] == p ? (1ll << LISTED) + (number[at] + 1u) : 0;
}

// ---- 5 lists -------------------------------------------------------------------------------------------------------

extern "C" __global__ __launch_bounds__(THREADS) void voxels_lists(
    const __grid_constant__ Clouds clouds,
    const Grid *__restrict__ grids,        // [clouds]
    const u32 *__restrict__ entry,         // [N]
    const u32 *__restrict__ first,         // [2 N]
    const u32 *__restrict__ arrival,       // [N]
    const long long *__restrict__ sums,    // [N + 1] of the flags before each point
    int *__restrict__ point_to_voxel,      // [N] -1 if a coordinate is not finite
    u32 *__restrict__ members,             // [N] the points of voxel 0, of voxel 1, ..., each in any order
    int *__restrict__ starts,              // [N + 1] where the points of each voxel begin, and the end of the last
    long long *__restrict__ voxels_before  // [clouds] voxels up to the end of each cloud; -1 if its grid does not fit
) {
    const long long p = (long long)blockIdx.x * THREADS + threadIdx.x;
    const Cloud *rows = rows_of(clouds);
    const int n = rows[clouds.count].point;
    const int listed = (1u << LISTED) - 1;
    if (p < clouds.count) {
        const bool fits = rows[p].point == rows[p + 1].point || grids[p].fits;
        voxels_before[p] = fits ? sums[rows[p + 1].point] >> LISTED : -1;
    }
    if (p == 0) starts[sums[n] >> LISTED] = (int)(sums[n] & listed);
    if (p >= n) return;
    const u32 at = entry[p];
    point_to_voxel[p] = -1;
    if (at == NOWHERE) return;
    const long long sum = sums[first[at]];
    const int voxel = (int)(sum >> LISTED), start = (int)(sum & listed);
    point_to_voxel[p] = voxel;
    members[start + arrival[p]] = (u32)p;
    if (first[at] == p) starts[voxel] = start;
}
