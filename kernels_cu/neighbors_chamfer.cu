// SPDX-License-Identifier: Apache-2.0
// The Chamfer distance from nearest neighbours, and its gradient, as gpu3d/reference/neighbors.py defines them to the bit.
//
// Sums are float64, by halving tiles of SUM_TILE values until one is left. The gradient of a point is a term away from its own
// nearest neighbour, and one away from each point whose nearest it is. The latter are added as integers, multiples of a power
// of two: integers add up to the same in any order, so atomics are deterministic.

#define THREADS 256
#define SUM_TILE 1024       // mirrored by gpu3d/reference/neighbors.py

#include "clouds.cuh"
#include "voxels.cuh"
#include "neighbors.cuh"

// The sum of the block's SUM_TILE values, one a thread, on every thread: the second half added to the first, and again.
__device__ double halved(double value) {
    __shared__ double sums[SUM_TILE];
    __syncthreads();
    sums[threadIdx.x] = value;
    for (int half = SUM_TILE / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[0];
}

// A block a tile of a cloud's points: the sum of their distances, and into `largest` the largest finite one of the cloud.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_tiles(
    const float *__restrict__ d2,               // [points]
    const __grid_constant__ Clouds clouds,      // in tiles of SUM_TILE points
    int squared,                                // 1: of their squares
    double *__restrict__ sums,                  // [tiles]
    u32 *__restrict__ largest)                  // [clouds] bits of a distance, zeros at first
{
    const int b = cloud_of<&Cloud::tile>(clouds, blockIdx.x);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int i = cloud.point + (blockIdx.x - cloud.tile) * SUM_TILE + threadIdx.x;
    const float square = i < next.point ? d2[i] : 0, distance = __fsqrt_rn(square);
    const double sum = halved(squared ? square : distance);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
    const u32 most = __reduce_max_sync(FULL, square - square == 0 ? __float_as_uint(distance) : 0u);
    if ((threadIdx.x & 31) == 0) atomicMax(&largest[b], most);
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
    return values[0];
}

// A block a cloud: its loss.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_losses(
    double *__restrict__ x_sums,                // [tiles of x]
    double *__restrict__ y_sums,                // [tiles of y]
    const __grid_constant__ Clouds x_clouds,    // in tiles of SUM_TILE points, as the next
    const __grid_constant__ Clouds y_clouds,
    double *__restrict__ losses,                // [clouds]
    float *__restrict__ loss)                   // [clouds], or null
{
    const int b = blockIdx.x;
    const Cloud x = rows_of(x_clouds)[b], next_x = rows_of(x_clouds)[b + 1];
    const Cloud y = rows_of(y_clouds)[b], next_y = rows_of(y_clouds)[b + 1];
    const double of_x = sum_of(x_sums + x.tile, next_x.tile - x.tile) / (next_x.point - x.point);
    const double of_y = sum_of(y_sums + y.tile, next_y.tile - y.tile) / (next_y.point - y.point);
    if (threadIdx.x) return;
    losses[b] = of_x + of_y;
    if (loss) loss[b] = (float)losses[b];
}

// One block: the loss of all clouds.
extern "C" __global__ __launch_bounds__(SUM_TILE) void chamfer_loss(
    double *__restrict__ losses,                // [clouds]
    int clouds,
    int mean,
    float *__restrict__ loss)                   // []
{
    const double sum = sum_of(losses, clouds);
    if (threadIdx.x == 0) *loss = (float)(mean ? sum / clouds : sum);
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

// Adds what the points of one side give to their nearest on the other.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_give(
    const Row *__restrict__ points,             // [slots]
    const __grid_constant__ Clouds clouds,      // theirs
    int slots,
    const Row *__restrict__ others,             // [other slots]
    const int *__restrict__ slot_of_other,      // [others]
    const int *__restrict__ nearest,            // [points]
    const float *__restrict__ d2,               // [points]
    const u32 *__restrict__ largest,            // [clouds] of these distances
    int squared,
    u64 *__restrict__ given)                    // [others, 3], zeros at first
{
    const int slot = blockIdx.x * THREADS + threadIdx.x;
    if (slot >= slots) return;
    const Row point = points[slot];
    if (point.index < 0 || nearest[point.index] < 0) return;
    const float square = d2[point.index];
    if (square - square != 0) return;           // infinitely far
    const int other = nearest[point.index], b = cloud_of<&Cloud::slot>(clouds, slot);
    const int shift = shift_of(rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point, largest[b], squared);
    float term[3];
    term_of(term, point, others[slot_of_other[other]], square, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) atomicAdd(&given[3 * (size_t)other + e], (u64)-llrint(scalbn((double)term[e], shift)));
}

extern "C" __global__ __launch_bounds__(THREADS) void chamfer_gradient(
    const Row *__restrict__ points,             // [slots]
    const __grid_constant__ Clouds clouds,      // theirs
    int slots,
    const Row *__restrict__ others,             // [other slots]
    const __grid_constant__ Clouds other_clouds,
    const int *__restrict__ slot_of_other,      // [others]
    const int *__restrict__ nearest,            // [points]
    const float *__restrict__ d2,               // [points]
    const long long *__restrict__ given,        // [points, 3] by the others
    const u32 *__restrict__ other_largest,      // [clouds] of the others' distances
    int squared,
    int parts,                                  // that the loss is the mean of, or 1
    point_t *__restrict__ gradient)             // [points, 3]
{
    const int slot = blockIdx.x * THREADS + threadIdx.x;
    if (slot >= slots) return;
    const Row point = points[slot];
    if (point.index < 0) return;
    const int b = cloud_of<&Cloud::slot>(clouds, slot);
    const int count = rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point;
    const int other_count = rows_of(other_clouds)[b + 1].point - rows_of(other_clouds)[b].point;
    const int shift = shift_of(other_count, other_largest[b], squared), other = nearest[point.index];
    const float square = d2[point.index];
    float own[3] = {square - square, square - square, square - square};         // NaN where infinitely far
    if (own[0] == 0 && other >= 0) term_of(own, point, others[slot_of_other[other]], square, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const size_t at = 3 * (size_t)point.index + e;
        const double sum = own[e] / (double)count + scalbn((double)given[at], -shift) / other_count;
        gradient[at] = narrow((float)(sum / parts));
    }
}
