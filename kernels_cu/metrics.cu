// SPDX-License-Identifier: Apache-2.0
// Metrics of two batches of clouds, from the nearest neighbour of each point. gpu3d/reference/metrics.py defines them.
//
//   metrics_digits   counts how many points share a nearest point, and for the percentile how many distances have each
//                    value of a digit
//   metrics_tiles    the sums of a tile of points, its largest distance, and how many are within each threshold
//   metrics_clouds   adds up the tiles of a cloud and writes its metrics
//
// The percentile needs the distance of a given rank. Squared distances are not negative, so their bits are in their
// order. In a cloud of several tiles the rank is found digit by digit from the top, by a launch of metrics_digits for
// each: it counts the digits of those squares whose higher digits are known to be those of the rank. In a cloud of one
// tile metrics_tiles finds it bit by bit. All counts are integers, so their order does not matter; sums are taken in
// the order of ordered_sum.cuh.

#define BINS 256           // values of a digit; mirrored by gpu3d/cuda/metrics.py
#define MAX_THRESHOLDS 64  // mirrored by gpu3d/reference/metrics.py

#include "clouds.cuh"
#include "floats.cuh"
#include "ordered_sum.cuh"
#include "real.cuh"
#include "scan.cuh"

#define DIGITS ((int)sizeof(real))  // as many as bytes, which gpu3d/cuda/metrics.py counts on
#define BITS (8 * DIGITS - 1)       // of a number without its sign, which is always 0

// What is known of the square of the rank: its bits in the digits so far, and its rank among the squares with these.
struct Chosen {
    bits_t prefix;
    u32 rank;
};

// Starts at 0.
struct Ranked {
    bits_t largest;  // bits of the largest square; NaN is the largest
    bits_t low;      // bits of the square of the rank
    bits_t same;     // whether the square of the next rank is the same
    bits_t above;    // inverted bits of the least square above it; 0 if there is none
};

// One of the two batches of clouds.
struct Measured {
    const real *d2;      // [points] squared distance to the nearest point of the other batch
    const int *nearest;  // [points] its index, or -1
    u32 *shares;         // [points of the other batch] how many points of this batch it is nearest to; starts at 0
    Ranked *ranked;      // [clouds]
    u32 *within;         // [clouds, thresholds] number of points within each threshold; starts at 0
    u32 *digits;         // [tiles, DIGITS, BINS], of cloud b at its first tile minus b; starts at 0
    Chosen *chosen;      // [tiles, DIGITS], likewise
    double *sums;        // [3, tiles] of distances, of squares and of the terms of the density-aware distance
};

struct Thresholds {
    real value[MAX_THRESHOLDS];
};

// A tile of x or of y, whose points are the block's threads.
struct Tile {
    const Measured &side;
    const Clouds &clouds;
    int tile, b;       // `tile` is counted in its batch
    int first, tiles;  // of the cloud
    int count, i;      // points of the cloud; the thread's point
    bool inside;       // whether the thread has a point
    __device__ __forceinline__ bool is_first() const { return tile == first; }
    __device__ __forceinline__ size_t slot() const { return (size_t)(first - b); }
};

__device__ __forceinline__ Tile tile_of(const Measured &side, const Clouds &clouds, int tile) {
    const int b = cloud_of<&Cloud::tile>(clouds, tile);
    const Cloud cloud = rows_of(clouds)[b], next = rows_of(clouds)[b + 1];
    const int i = cloud.point + (tile - cloud.tile) * SUM_TILE + threadIdx.x;
    return Tile{side, clouds, tile, b, cloud.tile, next.tile - cloud.tile, next.point - cloud.point, i, i < next.point};
}

// The rank of the 95th percentile, rounded down, and the hundredths that it is rounded by.
__device__ __forceinline__ u32 rank_of(int count) { return (u32)(95ll * (count - 1) / 100); }
__device__ __forceinline__ int hundredths_of(int count) { return (int)(95ll * (count - 1) % 100); }

// The lowest bit of a digit. The last digit has 7 bits.
__device__ __forceinline__ int shift_of(int digit) { return digit < DIGITS - 1 ? BITS - 8 * (digit + 1) : 0; }
__device__ __forceinline__ u32 digit_of(bits_t bits, int digit) {
    return (u32)(bits >> shift_of(digit)) & (digit < DIGITS - 1 ? BINS - 1 : BINS / 2 - 1);
}

// What is known once the digits before `digit` have been counted; `equal` becomes the number of squares with these
// digits. The whole block calls it. `digit` is at least 1.
__device__ Chosen chosen_before(const Tile &at, int digit, u32 &equal) {
    __shared__ Chosen chosen;
    __shared__ u32 own_of_chosen;
    const size_t slot = at.slot() * DIGITS;
    const Chosen known = digit == 1 ? Chosen{0, rank_of(at.count)} : at.side.chosen[slot + digit - 2];
    const u32 own = threadIdx.x < BINS ? at.side.digits[(slot + digit - 1) * BINS + threadIdx.x] : 0;
    u32 all;
    const u32 before = scan_of_block<SUM_TILE / 32>(own, all);
    if (before <= known.rank && known.rank < before + own) {
        chosen = Chosen{known.prefix | (bits_t)threadIdx.x << shift_of(digit - 1), known.rank - before};
        own_of_chosen = own;
        if (at.is_first()) at.side.chosen[slot + digit - 1] = chosen;
    }
    __syncthreads();
    equal = own_of_chosen;
    return chosen;
}

// One block a tile of x, then of y; digits 0 to DIGITS - 1 in launches one after another. Clouds of one tile have no
// digits: then one launch is enough.
extern "C" __global__ __launch_bounds__(SUM_TILE) void metrics_digits(
    const __grid_constant__ Measured x,
    const __grid_constant__ Measured y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int digit
) {
    __shared__ u32 counts[BINS];
    const int x_tiles = tiles_of(x_clouds), block = blockIdx.x;
    if (block >= x_tiles + tiles_of(y_clouds)) return;
    const Tile at = block < x_tiles ? tile_of(x, x_clouds, block) : tile_of(y, y_clouds, block - x_tiles);
    if (digit == 0 && at.inside) {
        const int nearest = at.side.nearest[at.i];
        if (nearest >= 0) atomicAdd(&at.side.shares[nearest], 1);
    }
    if (at.tiles == 1) return;
    u32 equal;
    const bits_t prefix = digit ? chosen_before(at, digit, equal).prefix : 0;
    if (threadIdx.x < BINS) counts[threadIdx.x] = 0;
    __syncthreads();
    if (at.inside) {
        const bits_t bits = bits_of(at.side.d2[at.i]);
        if (!digit || (bits ^ prefix) >> shift_of(digit - 1) == 0) atomicAdd(&counts[digit_of(bits, digit)], 1);
    }
    __syncthreads();
    if (threadIdx.x < BINS && counts[threadIdx.x])
        atomicAdd(&at.side.digits[(at.slot() * DIGITS + digit) * BINS + threadIdx.x], counts[threadIdx.x]);
}

// The number of this rank among the block's, one a thread that has one. `same` becomes whether the next is the same.
__device__ bits_t ranked_in_block(bits_t bits, bool inside, u32 rank, bool &same) {
    bits_t found = 0;
    for (int bit = BITS - 1; bit >= 0; --bit) {
        const u32 zeros = __syncthreads_count(inside && bits >> bit == found >> bit);
        if (rank >= zeros) {
            rank -= zeros;
            found |= (bits_t)1 << bit;
        }
    }
    same = rank + 1 < (u32)__syncthreads_count(inside && bits == found);
    return found;
}

__device__ __forceinline__ int points_in(const Clouds &clouds, int b) {
    return rows_of(clouds)[b + 1].point - rows_of(clouds)[b].point;
}

// One block a tile of x, then of y.
extern "C" __global__ __launch_bounds__(SUM_TILE) void metrics_tiles(
    const __grid_constant__ Measured x,
    const __grid_constant__ Measured y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    const __grid_constant__ Thresholds thresholds,
    int count  // of thresholds
) {
    const int x_tiles = tiles_of(x_clouds), block = blockIdx.x;
    if (block >= x_tiles + tiles_of(y_clouds)) return;
    const bool of_x = block < x_tiles;
    const Tile at = of_x ? tile_of(x, x_clouds, block) : tile_of(y, y_clouds, block - x_tiles);
    const real d2 = at.inside ? at.side.d2[at.i] : 0, d = sqrt_rn(d2);
    const bits_t bits = bits_of(d2);

    double term = 0;
    if (at.inside) {
        const int nearest = at.side.nearest[at.i], other = points_in(of_x ? y_clouds : x_clouds, at.b);
        const u32 shares = nearest < 0 ? 1 : at.side.shares[nearest];
        term = 1 - exp(-1000.0 * d2) * ((double)at.count / other) / shares;
    }
    const double of_distances = halved(d), of_squares = halved(d2), of_terms = halved(term);

    bool same;
    bits_t low;
    if (at.tiles == 1) low = ranked_in_block(bits, at.inside, rank_of(at.count), same);
    else {
        u32 equal;
        const Chosen chosen = chosen_before(at, DIGITS, equal);
        low = chosen.prefix;
        same = chosen.rank + 1 < equal;
    }
    const bits_t largest = largest_of(at.inside ? bits : 0), above = largest_of(at.inside && bits > low ? ~bits : 0);
    if (threadIdx.x == 0) {
        const size_t stride = tiles_of(at.clouds);
        at.side.sums[at.tile] = of_distances;
        at.side.sums[stride + at.tile] = of_squares;
        at.side.sums[2 * stride + at.tile] = of_terms;
        Ranked &ranked = at.side.ranked[at.b];
        atomicMax(&ranked.largest, largest);
        atomicMax(&ranked.above, above);
        if (at.is_first()) {
            ranked.low = low;
            ranked.same = same;
        }
    }
    for (int t = 0; t < count; ++t) {
        const u32 within = __syncthreads_count(at.inside && d <= thresholds.value[t]);
        if (threadIdx.x == 0 && within) atomicAdd(&at.side.within[(size_t)at.b * count + t], within);
    }
}

struct Metrics {
    real *chamfer, *chamfer_squared, *hausdorff, *hausdorff_95;  // [clouds]
    real *precision, *recall, *fscore;                           // [clouds, thresholds]
    real *density_aware_chamfer;                                 // [clouds]
};

// Sum `which` of cloud b over its number of points, on every thread of the block.
__device__ double mean_of(const Measured &side, const Clouds &clouds, int b, int which) {
    const int tile = rows_of(clouds)[b].tile, tiles = rows_of(clouds)[b + 1].tile - tile;
    return sum_of(side.sums + (size_t)which * tiles_of(clouds) + tile, tiles) / points_in(clouds, b);
}

// The 95th percentile of the distances of a cloud of `count` points, between those of two ranks.
__device__ double percentile_of(const Ranked &ranked, int count) {
    const double low = sqrt_rn(number_of(ranked.low));
    const int hundredths = hundredths_of(count);
    if (!hundredths || ranked.same) return low;
    const double high = sqrt_rn(number_of(~ranked.above));
    return __dadd_rn(low, __dmul_rn(__dsub_rn(high, low), __ddiv_rn(hundredths, 100)));
}

// One block a cloud.
extern "C" __global__ __launch_bounds__(SUM_TILE) void metrics_clouds(
    const __grid_constant__ Measured x,
    const __grid_constant__ Measured y,
    const __grid_constant__ Clouds x_clouds,
    const __grid_constant__ Clouds y_clouds,
    int count,  // of thresholds
    const __grid_constant__ Metrics metrics
) {
    const int b = blockIdx.x, n = points_in(x_clouds, b), m = points_in(y_clouds, b);
    double means[3];
    for (int which = 0; which < 3; ++which)
        means[which] = mean_of(x, x_clouds, b, which) + mean_of(y, y_clouds, b, which);
    for (int t = threadIdx.x; t < count; t += SUM_TILE) {
        const size_t at = (size_t)b * count + t;
        const double precision = (double)x.within[at] / n, recall = (double)y.within[at] / m;
        const double both = __dadd_rn(precision, recall);
        metrics.precision[at] = (real)precision;
        metrics.recall[at] = (real)recall;
        metrics.fscore[at] = both > 0 ? (real)(__dmul_rn(__dmul_rn(2, precision), recall) / both) : 0;
    }
    if (threadIdx.x) return;
    const Ranked of_x = x.ranked[b], of_y = y.ranked[b];
    const real largest = number_of(max(of_x.largest, of_y.largest));
    const real percentile = (real)fmax(percentile_of(of_x, n), percentile_of(of_y, m));
    metrics.chamfer[b] = (real)means[0];
    metrics.chamfer_squared[b] = (real)means[1];
    metrics.hausdorff[b] = sqrt_rn(largest);
    metrics.hausdorff_95[b] = isnan(largest) ? NAN_FLOAT : percentile;
    metrics.density_aware_chamfer[b] = (real)(means[2] / 2);
}
