// SPDX-License-Identifier: Apache-2.0
// The Chamfer distance from nearest neighbours, and its gradient, as gpu3d/reference/neighbors.py defines them to the bit.
//
// Sums are float64, by halving tiles of SUM_TILE values until one is left. The gradient of a point is a term away from its own
// nearest neighbour, and one away from each point whose nearest it is. The latter are added as integers, multiples of a power
// of two: integers add up to the same in any order, so atomics are deterministic. On the way back nothing is needed but the
// points, whose nearest was which, and how far: neither buckets nor an index.

#define THREADS 256
#define SUM_TILE 1024  // mirrored by gpu3d/reference/neighbors.py; a node of the index: both have one table of clouds

#include "clouds.cuh"
#include "grid.cuh"
#include "neighbors.cuh"
#include "voxels.cuh"

// ---- the loss ------------------------------------------------------------------------------------------------------

// One of the two batches of clouds.
struct Summed {
    const float *d2;  // [points] the squared distance of the nearest in the other
    double *sums;     // [tiles] of distances
    u32 *most;        // [tiles] bits of the largest finite distance
    u32 *largest;     // [clouds] likewise
};

// The sum of the block's SUM_TILE values, one a thread, on every thread: the second half added to the first, and again.
__device__ double halved(double value) {
    __shared__ double sums[SUM_TILE];
    __syncthreads();
    sums[threadIdx.x] = value;
    for (int half = SUM_TILE / 2; half >= 32; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x < 32) {
        value = sums[threadIdx.x];
        value = sum_of_warp(value);
        if (threadIdx.x == 0) sums[0] = value;
    }
    __syncthreads();
    return sums[0];
}

// The largest of the block's values, on every thread.
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

// By the whole block, which is tile `tile` of a side; on every thread.
__device__ Tile summed(const Summed &side, const Clouds &clouds, int b, int tile, int squared) {
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int i = cloud.point + (tile - cloud.tile) * SUM_TILE + threadIdx.x;
    const float square = i < next.point ? side.d2[i] : 0, distance = __fsqrt_rn(square);
    return Tile{halved(squared ? square : distance), largest_of(is_finite(square) ? __float_as_uint(distance) : 0u)};
}

__device__ void sum_tile(const Summed &side, const Clouds &clouds, int tile, int squared) {
    const Tile of_tile = summed(side, clouds, cloud_of<&Cloud::tile>(clouds, tile), tile, squared);
    if (threadIdx.x) return;
    side.sums[tile] = of_tile.sum;
    side.most[tile] = of_tile.most;
}

// A block a tile of x, then of y: the sum of their distances, and the largest. Where no cloud has two, chamfer_losses does it.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_tiles(
    const __grid_constant__ Summed x,
    const __grid_constant__ Summed y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared  // 1: of their squares
) {
    const int tile = blockIdx.x, x_tiles = tiles_of(x_clouds);
    if (tile < x_tiles) sum_tile(x, x_clouds, tile, squared);
    else if (tile < x_tiles + tiles_of(y_clouds)) sum_tile(y, y_clouds, tile - x_tiles, squared);
}

// The sum of count values by halving tiles of them; by a whole block, which overwrites them.
__device__ double sum_of(double *values, int count) {
    while (count > 1) {
        const int tiles = (count + SUM_TILE - 1) / SUM_TILE;
        for (int tile = 0; tile < tiles; ++tile) {
            const int i = tile * SUM_TILE + threadIdx.x;
            const double sum = halved(i < count ? values[i] : 0);
            if (threadIdx.x == 0) values[tile] = sum;  // read by all in this turn or an earlier one
        }
        count = tiles;
        __syncthreads();
    }
    return count ? values[0] : 0;
}

// The mean distance of cloud b's points, on every thread of the block; the largest is written.
__device__ double mean_of(const Summed &side, const Clouds &clouds, int b, int tiled, int squared) {
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

// A block a cloud: its loss; and the block that comes last, that of all clouds. One block where there is no cloud.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_losses(
    const __grid_constant__ Summed x,
    const __grid_constant__ Summed y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    double *__restrict__ losses,  // [clouds]
    u32 *__restrict__ known,      // [] how many of them are, 0 at first
    float *__restrict__ each,     // [clouds], or null
    float *__restrict__ loss,     // [] the sum of all, over `parts`; or null
    int parts,
    int tiled,  // 1: by chamfer_tiles
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
struct Pulled {
    const point_t *points;  // [points, 3]
    const double *origins;  // [clouds, 3] that the search in this batch takes coordinates relative to; null: 0
    const int *nearest;     // [points] the index of the nearest in the other
    const float *d2;        // [points] and how far it is
    const u32 *largest;     // [clouds] bits of the largest finite distance
    u64 *given;             // [points, 3] what the points of the other give to it, zeros at first
    point_t *gradient;      // [points, 3]
};

// Terms of `count` points, none beyond what `largest` allows, times 2**shift_of fit a sum of 62 bits.
__device__ __forceinline__ int shift_of(int count, u32 largest, int squared) {
    const float most = __uint_as_float(largest);
    const int bound = !squared ? 1 : most > 0 ? 3 + ilogbf(most) : 2;
    return 62 - (32 - __clz(count)) - bound;
}

// The gradient of a distance that is found, of point i of cloud b, with respect to the point.
__device__ __forceinline__ void term_of(
    float term[3], const Pulled &side, const Pulled &other, int b, int i, int squared
) {
    const double *origin = other.origins ? other.origins + 3 * b : nullptr;
    const float d = __fsqrt_rn(side.d2[i]);
    const int nearest = side.nearest[i];
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const float v = __fsub_rn(coordinate(side.points, i, e, origin), coordinate(other.points, nearest, e, origin));
        term[e] = d == 0 ? 0.0f : squared ? __fmul_rn(2, v) : __fdiv_rn(v, d);
    }
}

__device__ __forceinline__ bool is_found(const Pulled &side, int i) {
    return side.nearest[i] >= 0 && is_finite(side.d2[i]);  // and not infinitely far
}

// What point i of a side gives to its nearest.
__device__ void give(const Pulled &side, const Clouds &clouds, const Pulled &other, int i, int squared) {
    if (!is_found(side, i)) return;
    const int b = cloud_of<&Cloud::point>(clouds, i);
    const int shift = shift_of(rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point, side.largest[b], squared);
    float term[3];
    term_of(term, side, other, b, i, squared);
    u64 *given = other.given + 3 * (size_t)side.nearest[i];
#pragma unroll
    for (int e = 0; e < 3; ++e) atomicAdd(&given[e], (u64)-llrint(scalbn((double)term[e], shift)));
}

// A thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_give(
    const __grid_constant__ Pulled x,
    const __grid_constant__ Pulled y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared
) {
    const int i = blockIdx.x * THREADS + threadIdx.x, in_x = points_of(x_clouds);
    if (i < in_x) give(x, x_clouds, y, i, squared);
    else if (i - in_x < points_of(y_clouds)) give(y, y_clouds, x, i - in_x, squared);
}

// What is asked of each cloud's loss, or of the one that all have.
struct Asked {
    const float *dloss;  // [clouds], or []; null: 1
    long long step;      // from one to the next; 0: there is one
    int parts;           // that the loss is the mean of, or 1
};

__device__ void write_gradient(
    const Pulled &side,
    const Clouds &clouds,
    const Pulled &other,
    const Clouds &other_clouds,
    int i,
    int squared,
    const Asked &asked
) {
    const int b = cloud_of<&Cloud::point>(clouds, i);
    const int count = rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point;
    const int other_count = rows_of(other_clouds)[b + 1].point - rows_of(other_clouds)[b].point;
    const int shift = shift_of(other_count, other.largest[b], squared);
    const float dloss = asked.dloss ? asked.dloss[b * asked.step] : 1;
    float own[3] = {NAN_FLOAT, NAN_FLOAT, NAN_FLOAT};
    if (is_found(side, i)) term_of(own, side, other, b, i, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const size_t at = 3 * (size_t)i + e;
        const double sum = own[e] / (double)count + scalbn((double)(long long)side.given[at], -shift) / other_count;
        side.gradient[at] = narrow(__fmul_rn((float)(sum / asked.parts), dloss));
    }
}

// A thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_gradient(
    const __grid_constant__ Pulled x,
    const __grid_constant__ Pulled y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared,
    const __grid_constant__ Asked asked
) {
    const int i = blockIdx.x * THREADS + threadIdx.x, in_x = points_of(x_clouds);
    if (i < in_x) write_gradient(x, x_clouds, y, y_clouds, i, squared, asked);
    else if (i - in_x < points_of(y_clouds)) write_gradient(y, y_clouds, x, x_clouds, i - in_x, squared, asked);
}
