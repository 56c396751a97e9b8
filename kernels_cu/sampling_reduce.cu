// SPDX-License-Identifier: Apache-2.0
// Voxel downsampling, second half: the point and the features of each voxel.
//
//   points    the voxel's first point plus the mean of the differences from it
//   features  sum, mean, minimum or maximum; a NaN wins over every number
// A warp takes a voxel and goes through its points in ascending order, so sums have a fixed order: float64 for float64,
// otherwise float32, every operation rounded once.
//
// Most voxels have few points. Up to 32 indices lie one in each lane, and the smallest that is left comes next. Longer
// lists are sorted in memory first, up to ROW by a warp, others by the block.

#ifndef ELEMENT
#define ELEMENT 0  // points or features: 0 float32, 1 float64, 2 float16, 3 bfloat16
#endif
#define THREADS 128  // mirrored by gpu3d/cuda/sampling.py
#define ROW 512
#define COLUMNS 4  // of features that a lane reduces together

#include "floats.cuh"
#include "sort_rows.cuh"
#include "warp.cuh"

#define SUM 0  // mirrored by gpu3d/cuda/sampling.py, as are the next three
#define MEAN 1
#define MIN 2
#define MAX 3

typedef Float<ELEMENT>::Stored stored_t;
typedef Float<ELEMENT>::Wide wide_t;

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float over(float a, int n) { return __fdiv_rn(a, __int2float_rn(n)); }
__device__ __forceinline__ double over(double a, int n) { return __ddiv_rn(a, (double)n); }

// Calls visit(point, whether it is the first) for the points of a voxel in ascending order, by a warp. Lists of more
// than 32 are sorted.
template <class Visit>
__device__ __forceinline__ void visit_members(const u32 *members, int count, Visit visit) {
    const int lane = threadIdx.x & 31;
    for (int base = 0; base < count; base += 32) {
        u32 mine = base + lane < count ? members[base + lane] : FULL;
        for (int j = 0; j < min(32, count - base); ++j) {
            const u32 p = count <= 32 ? __reduce_min_sync(FULL, mine) : __shfl_sync(FULL, mine, j);
            if (count <= 32 && mine == p) mine = FULL;
            visit(p, base + j == 0);
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void reduce_points(
    const stored_t *__restrict__ points,  // [N, 3]
    int columns,                          // 2 or 3 of the result
    const int *__restrict__ starts,       // [voxels + 1]
    int voxels,
    u32 *members,                // [N] points of each voxel; what is longer than 32 is sorted here
    u32 *spare,                  // [N]
    stored_t *__restrict__ out,  // [voxels, columns]
    int *__restrict__ counts     // [voxels]
) {
    __shared__ u32 shared[WARPS * STAGED];
    const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x >> 5);
    const int begin = blockIdx.x * WARPS, voxel = begin + warp;
    const int first = voxel < voxels ? starts[voxel] : 0;
    const int count = uniform(voxel < voxels ? starts[voxel + 1] - first : 0);
    if (__syncthreads_or(count > 32)) {
        const auto writer = [=](u32 *row) { return [=](int e, u32 p) { row[e] = p; }; };
        if (count > 32 && count <= ROW)
            sort_short(members + first, count, shared + warp * STAGED, writer(members + first));
        __syncthreads();  // the warps are done with `shared`
        for (int v = begin; v < min(begin + WARPS, voxels); ++v) {
            const int at = starts[v], n = starts[v + 1] - at;
            if (n > ROW) sort_long(members + at, spare + at, shared, n, writer(members + at));
        }
    }
    if (voxel >= voxels) return;
    const int d = min(lane, 2);
    wide_t origin = 0, sum = 0;
    visit_members(members + first, count, [&](u32 p, bool is_first) {
        const wide_t x = Float<ELEMENT>::widen(points[3 * (size_t)p + d]);
        if (is_first) origin = x;
        sum = add(sum, add(x, -origin));
    });
    if (lane < columns) out[(size_t)voxel * columns + lane] = Float<ELEMENT>::narrow(add(origin, over(sum, count)));
    if (lane == 0) counts[voxel] = count;
}

extern "C" __global__ __launch_bounds__(THREADS) void reduce_features(
    const stored_t *__restrict__ features,  // [N, columns]
    long long columns,
    int reduction,                   // SUM, MEAN, MIN or MAX
    const int *__restrict__ starts,  // [voxels + 1]
    int voxels,
    const u32 *__restrict__ members,  // [N] as reduce_points leaves them
    stored_t *__restrict__ out        // [voxels, columns]
) {
    const int lane = threadIdx.x & 31, voxel = uniform(blockIdx.x * WARPS + (threadIdx.x >> 5));
    if (voxel >= voxels) return;
    const int first = starts[voxel], count = uniform(starts[voxel + 1] - first);
    for (long long column = lane; column - lane < columns; column += 32 * COLUMNS) {
        wide_t found[COLUMNS] = {};
        visit_members(members + first, count, [&](u32 p, bool is_first) {
            wide_t x[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                x[c] = column + 32 * c < columns ? Float<ELEMENT>::widen(features[p * columns + column + 32 * c]) : 0;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const bool held = reduction == MIN ? found[c] <= x[c] : found[c] >= x[c];
                if (is_first) found[c] = x[c];
                else if (reduction <= MEAN) found[c] = add(found[c], x[c]);
                else if (!held && found[c] == found[c]) found[c] = x[c];
            }
        });
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (column + 32 * c < columns)
                out[voxel * columns + column + 32 * c] =
                    Float<ELEMENT>::narrow(reduction == MEAN ? over(found[c], count) : found[c]);
    }
}
