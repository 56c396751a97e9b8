// SPDX-License-Identifier: Apache-2.0
// Brute force over all pairs of queries and points: the K nearest points of each query, and the number of points within
// a radius of it.
//
// The benchmarks check the bucketed search against it bit by bit, and time it as a peer. Each thread has one query. The
// threads of a block go through the points in order of index, one tile in shared memory at a time. A point replaces
// another only if its d2 is strictly smaller, so of equal distances the lowest index stays: the order is (d2, index).
//
// d2 = (dx*dx + dy*dy) + dz*dz of float32 differences, each operation rounded once.

#ifndef K
#define K 1
#endif
#define THREADS 256     // the same constant as in benchmarks/neighbors.py

__device__ __forceinline__ float squared_distance(float3 a, float4 b) {
    const float dx = __fsub_rn(a.x, b.x), dy = __fsub_rn(a.y, b.y), dz = __fsub_rn(a.z, b.z);
    return __fadd_rn(__fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy)), __fmul_rn(dz, dz));
}

__device__ __forceinline__ float3 row_of(const float *rows, long long row) {
    return make_float3(rows[3 * row], rows[3 * row + 1], rows[3 * row + 2]);
}

// Loads the next tile of points and returns its size. Every thread of the block must call this.
__device__ __forceinline__ int load_tile(float4 *tile, const float *points, int begin, int count) {
    __syncthreads();
    const int size = min(THREADS, count - begin);
    if (threadIdx.x < size) {
        const float3 point = row_of(points, begin + threadIdx.x);
        tile[threadIdx.x] = make_float4(point.x, point.y, point.z, 0.0f);
    }
    __syncthreads();
    return size;
}

extern "C" __global__ void __launch_bounds__(THREADS) nearest(
    const float *__restrict__ queries,  // [query_count, 3]
    const float *__restrict__ points,   // [point_count, 3]
    int query_count,
    int point_count,
    int first_point,                    // first row of the cloud, added to the indices
    float *__restrict__ distances,      // [query_count, K]
    int *__restrict__ indices           // [query_count, K]
) {
    __shared__ float4 tile[THREADS];
    const int query = blockIdx.x * THREADS + threadIdx.x;                       // may exceed query_count
    const float3 at = row_of(queries, min(query, query_count - 1));
    float best[K];                                                              // ascending
    int index[K];
    #pragma unroll
    for (int i = 0; i < K; ++i) {
        best[i] = __int_as_float(0x7f800000);
        index[i] = -1;
    }
    for (int begin = 0; begin < point_count; begin += THREADS) {
        const int size = load_tile(tile, points, begin, point_count);
        for (int j = 0; j < size; ++j) {
            const float d2 = squared_distance(at, tile[j]);
            if (d2 < best[K - 1]) {
                #pragma unroll
                for (int i = K - 1; i > 0; --i) {
                    if (d2 < best[i - 1]) {
                        best[i] = best[i - 1];
                        index[i] = index[i - 1];
                    } else if (d2 < best[i]) {
                        best[i] = d2;
                        index[i] = first_point + begin + j;
                    }
                }
                if (d2 < best[0]) {
                    best[0] = d2;
                    index[0] = first_point + begin + j;
                }
            }
        }
    }
    if (query >= query_count) return;
    for (int i = 0; i < K; ++i) {
        distances[(long long)query * K + i] = __fsqrt_rn(best[i]);
        indices[(long long)query * K + i] = index[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ball_counts(
    const float *__restrict__ queries,  // [query_count, 3]
    const float *__restrict__ points,   // [point_count, 3]
    int query_count,
    int point_count,
    float radius,
    long long *__restrict__ counts      // [query_count]
) {
    __shared__ float4 tile[THREADS];
    const int query = blockIdx.x * THREADS + threadIdx.x;                       // may exceed query_count
    const float3 at = row_of(queries, min(query, query_count - 1));
    const float limit = __fmul_rn(radius, radius);
    long long inside = 0;
    for (int begin = 0; begin < point_count; begin += THREADS) {
        const int size = load_tile(tile, points, begin, point_count);
        for (int j = 0; j < size; ++j) inside += squared_distance(at, tile[j]) <= limit;
    }
    if (query < query_count) counts[query] = inside;
}
