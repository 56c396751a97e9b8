// SPDX-License-Identifier: Apache-2.0
// The Chamfer loss from nearest neighbours, and its gradient. gpu3d/reference/chamfer.py defines both to the bit.
//
// Distances, losses and gradients are float64 if POINT is, and float32 otherwise. Losses are summed in float64: tiles
// of SUM_TILE values are halved until one value is left. The gradient of a point has a term for its own nearest
// neighbour and one for each point whose nearest neighbour it is. The latter are added by atomics, as integer multiples
// of a power of two: integer sums are the same in any order, so the result is deterministic. The backward pass needs
// only the points, the index of each nearest neighbour and its distance, neither buckets nor an index.

#define THREADS 256

#include "clouds.cuh"
#include "grid.cuh"
#include "ordered_sum.cuh"
#include "voxels.cuh"

#define REAL (POINT == FLOAT64)
#include "real.cuh"

// ---- the loss ------------------------------------------------------------------------------------------------------

// One of the two batches of clouds. All pointers are null if the direction from it to the other is left out.
struct Losses {
    const real *d2;   // [points] squared distance to the nearest point of the other batch
    double *sums;     // [tiles] of distances
    bits_t *most;     // [tiles] bits of the largest finite distance
    bits_t *largest;  // [clouds] bits of the largest finite distance
};

struct Tile {
    double sum;   // of distances
    bits_t most;  // bits of the largest finite distance
};

// The sums of tile `tile` of a side, by a whole block, on every thread.
__device__ Tile summed(const Losses &side, const Clouds &clouds, int b, int tile, int squared) {
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int i = cloud.point + (tile - cloud.tile) * SUM_TILE + threadIdx.x;
    const real square = i < next.point ? side.d2[i] : 0, distance = sqrt_rn(square);
    return Tile{halved(squared ? square : distance), largest_of(is_finite(square) ? bits_of(distance) : (bits_t)0)};
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
    const int tile = blockIdx.x, x_tiles = x.d2 ? tiles_of(x_clouds) : 0;
    if (tile < x_tiles) sum_tile(x, x_clouds, tile, squared);
    else if (y.d2 && tile < x_tiles + tiles_of(y_clouds)) sum_tile(y, y_clouds, tile - x_tiles, squared);
}

__device__ __forceinline__ int points_in(const Clouds &clouds, int b) {
    return rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point;
}

// The mean distance of cloud b's points, on every thread of the block. It is 0 if the direction is left out, and if the
// cloud is empty on either side. Writes the largest.
__device__ double mean_of(
    const Losses &side, const Clouds &clouds, const Clouds &other_clouds, int b, int tiled, int squared
) {
    if (!side.d2) return 0;
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int count = next.point - cloud.point;
    const bool filled = count && points_in(other_clouds, b);
    Tile all{0, 0};
    if (filled && tiled) {
        bits_t most = 0;
        for (int tile = cloud.tile + threadIdx.x; tile < next.tile; tile += SUM_TILE) most = max(most, side.most[tile]);
        all = Tile{sum_of(side.sums + cloud.tile, next.tile - cloud.tile), largest_of(most)};
    } else if (filled) all = summed(side, clouds, b, cloud.tile, squared);
    if (threadIdx.x == 0) side.largest[b] = all.most;
    return filled ? all.sum / count : 0;
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
    real *__restrict__ each,      // [clouds], or null
    real *__restrict__ loss,      // [] the sum of all losses / parts, or null
    int parts,
    int tiled,  // 1: chamfer_tiles has run
    int squared
) {
    const int b = blockIdx.x;
    if (b < x_clouds.count) {
        const double of_x = mean_of(x, x_clouds, y_clouds, b, tiled, squared),
                     of_y = mean_of(y, y_clouds, x_clouds, b, tiled, squared);
        if (threadIdx.x == 0) {
            losses[b] = of_x + of_y;
            if (each) each[b] = (real)(of_x + of_y);
        }
    }
    if (!loss) return;
    if (gridDim.x > 1 && !is_last_block(known, gridDim.x)) return;
    __syncthreads();
    const double sum = sum_of(losses, x_clouds.count);
    if (threadIdx.x == 0) *loss = (real)(sum / parts);
}

// ---- the gradient --------------------------------------------------------------------------------------------------

// One of the two batches of clouds. What a direction that is left out would need is null.
struct Side {
    const point_t *points;  // [points, 3]
    const int *nearest;     // [points] index of the nearest point of the other batch
    const real *d2;         // [points] squared distance to it
    const bits_t *largest;  // [clouds] bits of the largest finite distance
    u64 *contributions;     // [points, 3] gradient contributions from the other batch, as integers; starts at 0
    point_t *gradient;      // [points, 3]
};

// The shift for which a sum of `count` terms, each at most what `largest` allows, fits into 62 bits after scaling by
// 2**shift.
__device__ __forceinline__ int shift_of(int count, bits_t largest, int squared) {
    const real most = number_of(largest);
    const int bound = !squared ? 1 : most > 0 ? 3 + ilogb(most) : 2;
    return 62 - (32 - __clz(count)) - bound;
}

// Coordinate e of point i minus that of its nearest neighbour.
template <class SIDE>
__device__ __forceinline__ real offset_of(const SIDE &side, const SIDE &other, int i, int e) {
    return sub_rn(widen(side.points[3 * (size_t)i + e]), widen(other.points[3 * (size_t)side.nearest[i] + e]));
}

// The gradient of point i's distance with respect to the point, which has a nearest neighbour.
__device__ __forceinline__ void term_of(real term[3], const Side &side, const Side &other, int i, int squared) {
    const real d = sqrt_rn(side.d2[i]);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const real v = offset_of(side, other, i, e);
        term[e] = d == 0 ? 0 : squared ? 2 * v : div_rn(v, d);
    }
}

__device__ __forceinline__ bool is_found(const Side &side, int i) {
    return side.nearest && side.nearest[i] >= 0 && is_finite(side.d2[i]);  // the distance is finite
}

// Adds the gradient contribution of point i to its nearest neighbour.
__device__ void contribute(const Side &side, const Clouds &clouds, const Side &other, int i, int squared) {
    if (!is_found(side, i)) return;
    const int b = cloud_of<&Cloud::point>(clouds, i);
    const int shift = shift_of(points_in(clouds, b), side.largest[b], squared);
    real term[3];
    term_of(term, side, other, i, squared);
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
    const real *dloss;  // [clouds] or []; null: 1
    long long step;     // stride of dloss; 0 if it is one value
    int parts;          // number of losses that the loss is the mean of, or 1
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
    const int count = points_in(clouds, b), other_count = points_in(other_clouds, b);
    const int shift = other.nearest ? shift_of(other_count, other.largest[b], squared) : 0;
    const real dloss = upstream.dloss ? upstream.dloss[b * upstream.step] : 1;
    const real missing = side.nearest && other_count ? NAN_FLOAT : 0;
    real own[3] = {missing, missing, missing};
    if (is_found(side, i)) term_of(own, side, other, i, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const size_t at = 3 * (size_t)i + e;
        double given = 0;  // if other_count is 0, there is none
        if (other.nearest && other_count)
            given = scalbn((double)(long long)side.contributions[at], -shift) / other_count;
        const double sum = own[e] / (double)count + given;
        side.gradient[at] = narrow(mul_rn((real)(sum / upstream.parts), dloss));
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

// ---- the distance of each point, and its gradient ------------------------------------------------------------------

// One of the two batches of clouds. Both pointers are null if its direction is left out.
struct Distances {
    real *distances;     // [points] squared before the kernel
    const int *nearest;  // [points] -1 where there is no nearest neighbour
};

__device__ void finish(const Distances &side, const Clouds &clouds, const Clouds &other_clouds, int i, int squared) {
    const real d2 = side.distances[i];
    if (side.nearest[i] < 0 && !points_in(other_clouds, cloud_of<&Cloud::point>(clouds, i))) side.distances[i] = 0;
    else if (!squared) side.distances[i] = sqrt_rn(d2);
}

// One thread a point of x, then of y: its distance from its squared distance. To an empty cloud it is 0.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_distances(
    const __grid_constant__ Distances x,
    const __grid_constant__ Distances y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared  // 1: squared distances stay
) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x, in_x = x.distances ? points_of(x_clouds) : 0;
    if (i < in_x) finish(x, x_clouds, y_clouds, i, squared);
    else if (y.distances && i - in_x < (u32)points_of(y_clouds)) finish(y, y_clouds, x_clouds, i - in_x, squared);
}

// One of the two batches of clouds. What a direction that is left out would need is null.
struct Weighted {
    const point_t *points;   // [points, 3]
    const real *ddistances;  // [points] the gradient of each distance
    const real *distances;   // [points] to the nearest point of the other batch
    const int *nearest;      // [points] the index of that point
    bits_t *largest;     // [points] magnitude of the largest factor of the points that it is nearest to; starts at 0
    u64 *contributions;  // [points, 3] their gradient contributions, as integers; start at 0
    point_t *gradient;   // [points, 3]
};

// A thread's point: of x, or of y behind it.
struct Mine {
    const Weighted &side, &other;  // the batch of the point, and the one that it searches
    const Clouds &clouds, &other_clouds;
    int i;  // in its batch; -1 if the thread has no point
};

__device__ __forceinline__ Mine
mine_of(const Weighted &x, const Weighted &y, const Clouds &x_clouds, const Clouds &y_clouds) {
    const u32 thread = blockIdx.x * THREADS + threadIdx.x, in_x = points_of(x_clouds);
    if (thread < in_x) return {x, y, x_clouds, y_clouds, (int)thread};
    const u32 i = thread - in_x;
    return {y, x, y_clouds, x_clouds, i < (u32)points_of(y_clouds) ? (int)i : -1};
}

// Where it is 0 or not finite, a distance has no gradient.
__device__ __forceinline__ bool has_gradient(const Weighted &side, int i) {
    if (!side.nearest || side.nearest[i] < 0) return false;
    const real distance = side.distances[i];
    return is_finite(distance) && distance > 0;
}

// The gradient of the distance d, also where its square is given, for point i.
__device__ __forceinline__ real factor_of(const Weighted &side, int i, int squared) {
    const real given = side.ddistances[i];
    return squared ? mul_rn(2 * given, sqrt_rn(side.distances[i])) : given;
}

// What point i adds to coordinate e of its own gradient. The product is exact if real is float.
__device__ __forceinline__ double weighted_term(
    const Weighted &side, const Weighted &other, int i, int e, real factor, int squared
) {
    const real distance = side.distances[i], d = squared ? sqrt_rn(distance) : distance;
    return mul_rn((double)factor, (double)div_rn(offset_of(side, other, i, e), d));
}

// The bits of |x|, which are in the order of |x|; those of NaN come last.
__device__ __forceinline__ bits_t magnitude(real x) { return bits_of(fabs(x)); }

// Whether a sum has terms that are numbers, and not all 0.
__device__ __forceinline__ bool has_terms(bits_t largest) { return largest && is_finite(number_of(largest)); }

// The shift for which `count` terms with factors up to `largest` fit into 62 bits after scaling by 2**shift: a term is
// less than twice its factor.
__device__ __forceinline__ int weighted_shift(int count, bits_t largest) {
    return 60 - (32 - __clz(count)) - ilogb(number_of(largest));
}

// Finds the largest factor among the points that share a nearest point. One thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_weighted_largest(
    const __grid_constant__ Weighted x,
    const __grid_constant__ Weighted y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared
) {
    const Mine mine = mine_of(x, y, x_clouds, y_clouds);
    const Weighted &side = mine.side, &other = mine.other;
    const int i = mine.i;
    if (i < 0 || !has_gradient(side, i)) return;
    bits_t *largest = &other.largest[side.nearest[i]];
    const bits_t factor = magnitude(factor_of(side, i, squared));
    if (factor > *(volatile bits_t *)largest)
        atomicMax(largest, factor);  // rarely, where many points share the nearest
}

// Adds the gradient contribution of each point to its nearest. One thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_weighted_give(
    const __grid_constant__ Weighted x,
    const __grid_constant__ Weighted y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared
) {
    const Mine mine = mine_of(x, y, x_clouds, y_clouds);
    const Weighted &side = mine.side, &other = mine.other;
    const int i = mine.i;
    if (i < 0 || !has_gradient(side, i)) return;
    const int nearest = side.nearest[i], b = cloud_of<&Cloud::point>(mine.clouds, i);
    const bits_t largest = other.largest[nearest];
    if (!has_terms(largest)) return;
    const int shift = weighted_shift(points_in(mine.clouds, b), largest);
    const real factor = factor_of(side, i, squared);
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const double term = weighted_term(side, other, i, e, factor, squared);
        atomicAdd(&other.contributions[3 * (size_t)nearest + e], (u64)-llrint(scalbn(term, shift)));
    }
}

// Writes the gradients: each point's own term plus its contributions. One thread a point of x, then of y.
extern "C" __global__ __launch_bounds__(THREADS) void chamfer_weighted_gradient(
    const __grid_constant__ Weighted x,
    const __grid_constant__ Weighted y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int squared
) {
    const Mine mine = mine_of(x, y, x_clouds, y_clouds);
    const Weighted &side = mine.side, &other = mine.other;
    const int i = mine.i;
    if (i < 0) return;
    const int b = cloud_of<&Cloud::point>(mine.clouds, i);
    const bool own = has_gradient(side, i);
    const real factor = own ? factor_of(side, i, squared) : 0;
    const bits_t largest = side.largest ? side.largest[i] : 0;  // not 0 only if there are contributions
    const int shift = has_terms(largest) ? weighted_shift(points_in(mine.other_clouds, b), largest) : 0;
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        const size_t at = 3 * (size_t)i + e;
        double sum = 0;
        if (own) sum += weighted_term(side, other, i, e, factor, squared);  // 0 + -0 is 0
        if (has_terms(largest)) sum += scalbn((double)(long long)side.contributions[at], -shift);
        if (!is_finite(factor) || (largest && !has_terms(largest))) sum = NAN_DOUBLE;
        side.gradient[at] = narrow((real)sum);
    }
}
