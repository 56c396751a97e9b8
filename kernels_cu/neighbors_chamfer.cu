// SPDX-License-Identifier: Apache-2.0
// The Chamfer distance from nearest neighbours, and its gradient, as gpu3d/reference/neighbors.py defines them to the bit.
//
// Sums are float64, by halving tiles of SUM_TILE values until one is left. The gradient of a point is a term away from its own
// nearest neighbour, and one away from each point whose nearest it is. The latter are added as integers, multiples of a power
// of two: integers add up to the same in any order, so atomics are deterministic.

#define THREADS 256
#define SUM_TILE 1024       // mirrored by gpu3d/reference/neighbors.py; a node of the index, so that they share a table of clouds

#include "clouds.cuh"
#include "neighbors.cuh"

// One of the two batches of clouds, and what was found for its points in the other.
struct Side {
    const Row *queries;     // [slots] relative to the origins of the other
    const Row *rows;        // [slots] relative to its own
    const int *slot_of;     // [points]
    const int *nearest;     // [points] the index of the nearest of the other
    const float *d2;        // [points] and how far it is
    u32 *largest;           // [tiles] bits of the largest finite distance; once the loss is known, a cloud's in its first
    double *sums;           // [tiles] of distances
    float *gradient;        // [points, 3]
    u64 *given;             // [points, 3] what the points of the other give to it, zeros at first
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
        for (int half = 16; half; half /= 2) value += __shfl_xor_sync(FULL, value, half);
        if (threadIdx.x == 0) sums[0] = value;
    }
    __syncthreads();
    return sums[0];
}

__device__ void sum_tile(const Side &side, const Clouds &clouds, int tile, int squared) {
    __shared__ u32 largest;
    if (threadIdx.x == 0) largest = 0;
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int i = cloud.point + (tile - cloud.tile) * SUM_TILE + threadIdx.x;
    const float square = i < next.point ? side.d2[i] : 0, distance = __fsqrt_rn(square);
    const double sum = halved(squared ? square : distance);
    const u32 most = __reduce_max_sync(FULL, square - square == 0 ? __float_as_uint(distance) : 0u);
    if ((threadIdx.x & 31) == 0) atomicMax(&largest, most);
    __syncthreads();
    if (threadIdx.x) return;
    side.sums[tile] = sum;
    side.largest[tile] = largest;
}

// A block a tile of x, then of y: the sum of their distances, and the largest. Where no cloud has two, chamfer_losses does it.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_tiles(
    const __grid_constant__ Side x,
    const __grid_constant__ Side y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared)                                // 1: of their squares
{
    const int tile = blockIdx.x, x_tiles = nodes_of(x_clouds);
    if (tile < x_tiles) sum_tile(x, x_clouds, tile, squared);
    else if (tile < x_tiles + nodes_of(y_clouds)) sum_tile(y, y_clouds, tile - x_tiles, squared);
}

// The sum of count values by halving tiles of them; by a whole block, which overwrites them.
__device__ double sum_of(double *values, int count) {
    while (count > 1) {
        const int tiles = (count + SUM_TILE - 1) / SUM_TILE;
        for (int tile = 0; tile < tiles; ++tile) {
            const int i = tile * SUM_TILE + threadIdx.x;
            const double sum = halved(i < count ? values[i] : 0);
            if (threadIdx.x == 0) values[tile] = sum;       // read by all in this turn or an earlier one
        }
        count = tiles;
        __syncthreads();
    }
    return count ? values[0] : 0;
}

// The mean distance of a cloud's points, by a whole block; the largest of all goes into the cloud's first tile.
__device__ double mean_of(const Side &side, const Clouds &clouds, int b) {
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    u32 most = 0;
    for (int tile = cloud.tile + threadIdx.x; tile < next.tile; tile += SUM_TILE) most = max(most, side.largest[tile]);
    most = __reduce_max_sync(FULL, most);
    __syncthreads();
    if ((threadIdx.x & 31) == 0 && most) atomicMax(&side.largest[cloud.tile], most);
    return sum_of(side.sums + cloud.tile, next.tile - cloud.tile) / (next.point - cloud.point);
}

// A block a cloud: its loss; and the block that comes last, that of all clouds. One block where there is no cloud.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_losses(
    const __grid_constant__ Side x,
    const __grid_constant__ Side y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    double *__restrict__ losses,                // [clouds]
    u32 *__restrict__ known,                    // [] how many of them are, 0 at first
    float *__restrict__ each,                   // [clouds], or null
    float *__restrict__ loss,                   // [] the sum of all, over `parts`; or null
    int parts,
    int tiled,                                  // 1: by chamfer_tiles
    int squared)
{
    __shared__ bool last;
    const int b = blockIdx.x;
    if (b < x_clouds.count) {
        if (!tiled) {
            sum_tile(x, x_clouds, rows_of(x_clouds)[b].tile, squared);
            sum_tile(y, y_clouds, rows_of(y_clouds)[b].tile, squared);
            __syncthreads();
        }
        const double of_x = mean_of(x, x_clouds, b), of_y = mean_of(y, y_clouds, b);
        if (threadIdx.x == 0) {
            losses[b] = of_x + of_y;
            if (each) each[b] = (float)(of_x + of_y);
        }
    }
    if (!loss) return;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(known, 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    const double sum = sum_of(losses, x_clouds.count);
    if (threadIdx.x == 0) *loss = (float)(sum / parts);
}

// Terms of `count` points, none beyond what `largest` allows, times 2**shift_of fit a sum of 62 bits.
__device__ __forceinline__ int shift_of(int count, u32 largest, int squared) {
    const float most = __uint_as_float(largest);
    const int bound = !squared ? 1 : most > 0 ? 3 + ilogbf(most) : 2;
    return 62 - (32 - __clz(count)) - bound;
}

// The gradient of one distance with respect to its first point.
__device__ __forceinline__ void term_of(float term[3], const Row &x, const Row &y, float d2, int squared) {
    const float v[3] = {__fsub_rn(x.x, y.x), __fsub_rn(x.y, y.y), __fsub_rn(x.z, y.z)}, d = __fsqrt_rn(d2);
#pragma unroll
    for (int e = 0; e < 3; ++e) term[e] = d == 0 ? 0.0f : squared ? __fmul_rn(2, v[e]) : __fdiv_rn(v[e], d);
}

// What point `slot` of a side gives to its nearest.
__device__ void give(const Side &side, const Clouds &clouds, const Side &other, int slot, int squared) {
    const Row point = side.queries[slot];
    if (point.index < 0 || side.nearest[point.index] < 0) return;
    const float square = side.d2[point.index];
    if (square - square != 0) return;           // infinitely far
    const int nearest = side.nearest[point.index], b = cloud_of<&Cloud::slot>(clouds, slot);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int shift = shift_of(next.point - cloud.point, side.largest[cloud.tile], squared);
    float term[3];
    term_of(term, point, other.rows[other.slot_of[nearest]], square, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e)
        atomicAdd(&other.given[3 * (size_t)nearest + e], (u64)-llrint(scalbn((double)term[e], shift)));
}

// A thread a slot of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_give(
    const __grid_constant__ Side x,
    const __grid_constant__ Side y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared)
{
    const int slot = blockIdx.x * THREADS + threadIdx.x, x_slots = slots_of(x_clouds);
    if (slot < x_slots) give(x, x_clouds, y, slot, squared);
    else if (slot < x_slots + slots_of(y_clouds)) give(y, y_clouds, x, slot - x_slots, squared);
}

// The gradient of point `slot` of a side.
__device__ void write_gradient(
    const Side &side, const Clouds &clouds, const Side &other, const Clouds &other_clouds, int slot, int squared, int parts)
{
    const Row point = side.queries[slot];
    if (point.index < 0) return;
    const int b = cloud_of<&Cloud::slot>(clouds, slot), nearest = side.nearest[point.index];
    const int count = rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point;
    const Cloud cloud = rows_of(other_clouds)[b];
    const int other_count = rows_of(other_clouds)[b + 1].point - cloud.point;
    const int shift = shift_of(other_count, other.largest[cloud.tile], squared);
    const float square = side.d2[point.index];
    float own[3] = {square - square, square - square, square - square};         // NaN where infinitely far
    if (own[0] == 0 && nearest >= 0) term_of(own, point, other.rows[other.slot_of[nearest]], square, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const size_t at = 3 * (size_t)point.index + e;
        const double sum = own[e] / (double)count + scalbn((double)(long long)side.given[at], -shift) / other_count;
        side.gradient[at] = (float)(sum / parts);
    }
}

// A thread a slot of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_gradient(
    const __grid_constant__ Side x,
    const __grid_constant__ Side y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared,
    int parts)                                  // that the loss is the mean of, or 1
{
    const int slot = blockIdx.x * THREADS + threadIdx.x, x_slots = slots_of(x_clouds);
    if (slot < x_slots) write_gradient(x, x_clouds, y, y_clouds, slot, squared, parts);
    else if (slot < x_slots + slots_of(y_clouds)) write_gradient(y, y_clouds, x, x_clouds, slot - x_slots, squared, parts);
}
