// SPDX-License-Identifier: Apache-2.0
// The Chamfer loss from nearest neighbours, and its gradient. gpu3d/reference/chamfer.py defines both to the bit.
//
// Losses are summed in float64: tiles of SUM_TILE values are halved until one value is left. The gradient of a point
// has a term for its own nearest neighbour and one for each point whose nearest neighbour it is. The latter are added
// by atomics, as integer multiples of a power of two: integer sums are the same in any order, so the result is
// deterministic. The backward pass needs only the points, the index of each nearest neighbour and its distance, neither
// buckets nor an index.

#define THREADS 256
#define SUM_TILE 1024  // mirrored by gpu3d/reference/chamfer.py; a node of the index, so both use one table of clouds

#include "clouds.cuh"
#include "grid.cuh"
#include "neighbors.cuh"
#include "voxels.cuh"

// ---- the loss ------------------------------------------------------------------------------------------------------

// One of the two batches of clouds.
struct Losses {
    const float *d2;  // [points] squared distance to the nearest point of the other batch
    double *sums;     // [tiles] of distances
    u32 *most;        // [tiles] bits of the largest finite distance
    u32 *largest;     // [clouds] bits of the largest finite distance
};

// The sum of the block's SUM_TILE values, one a thread, on every thread. Adds the second half to the first, again and
// again.
__device__ double halved(double value) {
    __shared__ double sums[SUM_TILE];
    __syncthreads();
    sums[threadIdx.x] = value;
    for (int half = SUM_TILE / 2; half >= 32; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x < 32) {
        value = sum_of_warp(sums[threadIdx.x]);
        if (threadIdx.x == 0) sums[0] = value;
    }
    __syncthreads();
    return sums[0];
}

// The largest value of the block, on every thread.
__device__ u32 largest_of(u32 value) {
    __shared__ u32 largest;
    __syncthreads();
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    value = __reduce_max_sync(FULL, value);
    if ((threadIdx.x & 31) == 0 && value) atomicMax(&largest, value);
    __syncthreads();
    return largest;
}

struct Tile {
    double sum;  // of distances
    u32 most;    // bits of the largest finite distance
};

// The sums of tile `tile` of a side, by a whole block, on every thread.
__device__ Tile summed(const Losses &side, const Clouds &clouds, int b, int tile, int squared) {
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int i = cloud.point + (tile - cloud.tile) * SUM_TILE + threadIdx.x;
    const float square = i < next.point ? side.d2[i] : 0, distance = __fsqrt_rn(square);
    return Tile{halved(squared ? square : distance), largest_of(is_finite(square) ? __float_as_uint(distance) : 0u)};
}

__device__ void sum_tile(const Losses &side, const Clouds &clouds, int tile, int squared) {
    const Tile of_tile = summed(side, clouds, cloud_of<&Cloud::tile>(clouds, tile), tile, squared);
    if (threadIdx.x) return;
    side.sums[tile] = of_tile.sum;
    side.most[tile] = of_tile.most;
}

// One block a tile of x, then of y: the sum of the distances and the largest. If no cloud has two tiles, chamfer_losses
// does this.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_tiles(
    const __grid_constant__ Losses x,
    const __grid_constant__ Losses y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared  // 1: sum squared distances
) {
    const int tile = blockIdx.x, x_tiles = tiles_of(x_clouds);
    if (tile < x_tiles) sum_tile(x, x_clouds, tile, squared);
    else if (tile < x_tiles + tiles_of(y_clouds)) sum_tile(y, y_clouds, tile - x_tiles, squared);
}

// The sum of `count` values by halving tiles of them. The whole block calls it; the values are overwritten.
__device__ double sum_of(double *values, int count) {
    while (count > 1) {
        const int tiles = (count + SUM_TILE - 1) / SUM_TILE;
        for (int tile = 0; tile < tiles; ++tile) {
            const int i = tile * SUM_TILE + threadIdx.x;
            const double sum = halved(i < count ? values[i] : 0);
            if (threadIdx.x == 0) values[tile] = sum;  // all threads have read values[tile], now or earlier
        }
        count = tiles;
        __syncthreads();
    }
    return count ? values[0] : 0;
}

// The mean distance of cloud b's points, on every thread of the block. Writes the largest.
__device__ double mean_of(const Losses &side, const Clouds &clouds, int b, int tiled, int squared) {
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    Tile all;
    if (tiled) {
        u32 most = 0;
        for (int tile = cloud.tile + threadIdx.x; tile < next.tile; tile += SUM_TILE) most = max(most, side.most[tile]);
        all = Tile{sum_of(side.sums + cloud.tile, next.tile - cloud.tile), largest_of(most)};
    } else all = summed(side, clouds, b, cloud.tile, squared);
    if (threadIdx.x == 0) side.largest[b] = all.most;
    return all.sum / (next.point - cloud.point);
}

// One block a cloud computes its loss; the block that finishes last computes the loss of the batch. One block if there
// is no cloud.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_losses(
    const __grid_constant__ Losses x,
    const __grid_constant__ Losses y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    double *__restrict__ losses,  // [clouds]
    u32 *__restrict__ known,      // [] number of losses computed so far; starts at 0
    float *__restrict__ each,     // [clouds], or null
    float *__restrict__ loss,     // [] the sum of all losses / parts, or null
    int parts,
    int tiled,  // 1: chamfer_tiles has run
    int squared
) {
    const int b = blockIdx.x;
    if (b < x_clouds.count) {
        const double of_x = mean_of(x, x_clouds, b, tiled, squared), of_y = mean_of(y, y_clouds, b, tiled, squared);
        if (threadIdx.x == 0) {
            losses[b] = of_x + of_y;
            if (each) each[b] = (float)(of_x + of_y);
        }
    }
    if (!loss) return;
    if (gridDim.x > 1 && !is_last_block(known, gridDim.x)) return;
    __syncthreads();
    const double sum = sum_of(losses, x_clouds.count);
    if (threadIdx.x == 0) *loss = (float)(sum / parts);
}

// ---- the gradient --------------------------------------------------------------------------------------------------

// One of the two batches of clouds.
struct Side {
    const point_t *points;  // [points, 3]
    const double *origins;  // [clouds, 3] origins of the search in this batch; null: 0
    const int *nearest;     // [points] index of the nearest point of the other batch
    const float *d2;        // [points] squared distance to it
    const u32 *largest;     // [clouds] bits of the largest finite distance
    u64 *contributions;     // [points, 3] gradient contributions from the other batch, as integers; starts at 0
    point_t *gradient;      // [points, 3]
};

// The shift for which a sum of `count` terms, each at most what `largest` allows, fits into 62 bits after scaling by
// 2**shift.
__device__ __forceinline__ int shift_of(int count, u32 largest, int squared) {
    const float most = __uint_as_float(largest);
    const int bound = !squared ? 1 : most > 0 ? 3 + ilogbf(most) : 2;
    return 62 - (32 - __clz(count)) - bound;
}

// The gradient of point i's distance with respect to the point, which is in cloud b and has a nearest neighbour.
__device__ __forceinline__ void term_of(float term[3], const Side &side, const Side &other, int b, int i, int squared) {
    const double *origin = other.origins ? other.origins + 3 * b : nullptr;
    const float d = __fsqrt_rn(side.d2[i]);
    const int nearest = side.nearest[i];
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const float v = __fsub_rn(coordinate(side.points, i, e, origin), coordinate(other.points, nearest, e, origin));
        term[e] = d == 0 ? 0.0f : squared ? __fmul_rn(2, v) : __fdiv_rn(v, d);
    }
}

__device__ __forceinline__ bool is_found(const Side &side, int i) {
    return side.nearest[i] >= 0 && is_finite(side.d2[i]);  // the distance is finite
}

// Adds the gradient contribution of point i to its nearest neighbour.
__device__ void contribute(const Side &side, const Clouds &clouds, const Side &other, int i, int squared) {
    if (!is_found(side, i)) return;
    const int b = cloud_of<&Cloud::point>(clouds, i);
    const int shift = shift_of(rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point, side.largest[b], squared);
    float term[3];
    term_of(term, side, other, b, i, squared);
    u64 *contributions = other.contributions + 3 * (size_t)side.nearest[i];
#pragma unroll
    for (int e = 0; e < 3; ++e) atomicAdd(&contributions[e], (u64)-llrint(scalbn((double)term[e], shift)));
}

// One thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_give(
    const __grid_constant__ Side x,
    const __grid_constant__ Side y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared
) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x, in_x = points_of(x_clouds);
    if (i < in_x) contribute(x, x_clouds, y, i, squared);
    else if (i - in_x < (u32)points_of(y_clouds)) contribute(y, y_clouds, x, i - in_x, squared);
}

// The upstream gradient: one for each cloud, or one for all.
struct Upstream {
    const float *dloss;  // [clouds] or []; null: 1
    long long step;      // stride of dloss; 0 if it is one value
    int parts;           // number of losses that the loss is the mean of, or 1
};

__device__ void write_gradient(
    const Side &side,
    const Clouds &clouds,
    const Side &other,
    const Clouds &other_clouds,
    int i,
    int squared,
    const Upstream &upstream
) {
    const int b = cloud_of<&Cloud::point>(clouds, i);
    const int count = rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point;
    const int other_count = rows_of(other_clouds)[b + 1].point - rows_of(other_clouds)[b].point;
    const int shift = shift_of(other_count, other.largest[b], squared);
    const float dloss = upstream.dloss ? upstream.dloss[b * upstream.step] : 1;
    float own[3] = {NAN_FLOAT, NAN_FLOAT, NAN_FLOAT};
    if (is_found(side, i)) term_of(own, side, other, b, i, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const size_t at = 3 * (size_t)i + e;
        const double sum =
            own[e] / (double)count + scalbn((double)(long long)side.contributions[at], -shift) / other_count;
        side.gradient[at] = narrow(__fmul_rn((float)(sum / upstream.parts), dloss));
    }
}

// One thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_gradient(
    const __grid_constant__ Side x,
    const __grid_constant__ Side y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared,
    const __grid_constant__ Upstream upstream
) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x, in_x = points_of(x_clouds);
    if (i < in_x) write_gradient(x, x_clouds, y, y_clouds, i, squared, upstream);
    else if (i - in_x < (u32)points_of(y_clouds)) write_gradient(y, y_clouds, x, x_clouds, i - in_x, squared, upstream);
}
