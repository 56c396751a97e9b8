// SPDX-License-Identifier: Apache-2.0
// The gradients of knn and radius_search with respect to both clouds. gpu3d/reference/neighbors.py defines them to the
// bit.
//
// An entry is a query, one of its neighbours, and their distance d. The gradient of d with respect to the query is
// (query - point) / d, and minus that with respect to the point. A term is this vector times the gradient of d that the
// caller gives. So an entry adds a term to its query and one to its point. Terms are added as integers, multiples of a
// power of two that is chosen for each sum, so the sums are the same in any order. The three kernels, in order:
//
//   backward_largest    finds the largest gradient among each point's entries, from which its power of two follows
//   backward_queries    adds the terms; a few lanes take a query, and its sum stays among them
//   backward_points     turns the points' sums into floats

#define THREADS 256  // mirrored by gpu3d/cuda/neighbors.py

#include "voxels.cuh"

#define REAL (POINT == FLOAT64)
#include "real.cuh"

// Entries lie one behind the other, query by query.
struct Entries {
    const real *ddistances;    // [entries] the gradient of each distance
    const real *distances;     // [entries]
    const int *indices;        // [entries] the point, or -1
    const long long *offsets;  // [queries + 1] where each query's begin; null: each has `width`
    long long count;
    int queries, width;
};

// Whether an entry has a gradient: not where there is no neighbour, where d is infinite, or where d is 0.
__device__ __forceinline__ bool is_found(const Entries &entries, long long entry) {
    const real d = entries.distances[entry];
    return entries.indices[entry] >= 0 && is_finite(d) && d > 0;
}

// A search that found more than it had room for: then every gradient is NaN.
__device__ __forceinline__ bool is_cut(const Entries &entries) { return entries.offsets && entries.offsets[0] < 0; }

// The bits of |x|, which are in the order of |x|; those of NaN come last.
__device__ __forceinline__ bits_t magnitude(real x) { return bits_of(fabs(x)); }

// One thread an entry.
extern "C" __global__ __launch_bounds__(THREADS) void backward_largest(
    const __grid_constant__ Entries entries,
    bits_t *largest  // [points] magnitude of the largest gradient among its entries; starts at 0
) {
    const long long entry = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (entry >= entries.count || !is_found(entries, entry)) return;
    bits_t *of_point = &largest[entries.indices[entry]];
    const bits_t mine = magnitude(entries.ddistances[entry]);
    if (mine > *(volatile bits_t *)of_point) atomicMax(of_point, mine);  // rarely, where many queries share the point
}

// The scale of a sum of up to `count` terms whose gradients are at most `largest`, which is finite and not 0.
struct Scale {
    int shift;
    __device__ __forceinline__ Scale(long long count, bits_t largest)
        : shift(60 - (64 - __clzll(count)) - ilogb(number_of(largest))) {}
    static __device__ __forceinline__ double scaled(double x, int e) {
#if POINT == FLOAT64
        return scalbn(x, e);
#else
        return x * __longlong_as_double((long long)(1023 + e) << 52);
#endif
    }
    // A vector of an entry has components below 2, so `count` integers are below 2^62 together.
    __device__ __forceinline__ u64 integer(double term) const { return (u64)llrint(scaled(term, shift)); }
    __device__ __forceinline__ real number(u64 sum) const { return (real)scaled((double)(long long)sum, -shift); }
};

// Whether a sum has terms that are numbers, and not all 0.
__device__ __forceinline__ bool has_terms(bits_t largest) { return largest && is_finite(number_of(largest)); }

__device__ __forceinline__ real gradient_of(u64 sum, long long count, bits_t largest) {
    return has_terms(largest) ? Scale(count, largest).number(sum) : largest ? (real)NAN_FLOAT : (real)0;
}

// `lanes` neighbouring lanes take a query, a power of two of at most 32.
extern "C" __global__ __launch_bounds__(THREADS) void backward_queries(
    const __grid_constant__ Entries entries,
    const point_t *__restrict__ query,   // [queries, 3]
    const point_t *__restrict__ points,  // [points, 3]
    int lanes,
    const bits_t *__restrict__ largest,  // [points]
    u64 *__restrict__ sums,              // [points, 3] start at 0
    real *__restrict__ gradient          // [queries, 3]
) {
    const long long thread = (long long)blockIdx.x * THREADS + threadIdx.x, i = thread / lanes;
    const int lane = (int)(thread & (lanes - 1));
    long long first = 0, end = 0;
    const bool cut = is_cut(entries);
    if (i < entries.queries && !cut) {
        first = entries.offsets ? entries.offsets[i] : i * entries.width;
        end = entries.offsets ? entries.offsets[i + 1] : first + entries.width;
    }
    bits_t most = 0;
    for (long long entry = first + lane; entry < end; entry += lanes)
        if (is_found(entries, entry)) most = max(most, magnitude(entries.ddistances[entry]));
    for (int step = lanes / 2; step; step /= 2) most = max(most, __shfl_xor_sync(FULL, most, step));

    u64 own[3] = {0, 0, 0};
    for (long long entry = first + lane; entry < end; entry += lanes) {
        if (!is_found(entries, entry)) continue;
        const int j = entries.indices[entry];
        const bits_t most_of_point = largest[j];
        const double given = entries.ddistances[entry];
        const real d = entries.distances[entry];
#pragma unroll
        for (int e = 0; e < 3; ++e) {
            const real v = sub_rn(widen(query[3 * i + e]), widen(points[3 * (size_t)j + e]));
            const double term = __dmul_rn(given, div_rn(v, d));  // exact if real is float
            if (has_terms(most)) own[e] += Scale(end - first, most).integer(term);
            if (has_terms(most_of_point))
                atomicAdd(&sums[3 * (size_t)j + e], Scale(entries.queries, most_of_point).integer(-term));
        }
    }
#pragma unroll
    for (int e = 0; e < 3; ++e) {
        for (int step = lanes / 2; step; step /= 2) own[e] += __shfl_xor_sync(FULL, own[e], step);
        if (lane == 0 && i < entries.queries)
            gradient[3 * i + e] = cut ? (real)NAN_FLOAT : gradient_of(own[e], end - first, most);
    }
}

// One thread a point.
extern "C" __global__ __launch_bounds__(THREADS) void backward_points(
    const __grid_constant__ Entries entries,
    int count,  // of points
    const bits_t *__restrict__ largest,
    const u64 *__restrict__ sums,
    real *__restrict__ gradient  // [points, 3]
) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= (u32)count) return;
#pragma unroll
    for (size_t at = 3 * (size_t)i; at < 3 * (size_t)i + 3; ++at)
        gradient[at] = is_cut(entries) ? (real)NAN_FLOAT : gradient_of(sums[at], entries.queries, largest[i]);
}
