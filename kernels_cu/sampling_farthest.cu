// SPDX-License-Identifier: Apache-2.0
// Farthest point sampling of small clouds (Eldar et al. 1997; PointNet++): each new point is the one whose smallest d2
// to the points taken so far is largest, ties to the lowest index. Exact, index for index.
//
// A block takes a cloud. Its points and their smallest d2 stay in registers, ITEMS points a thread: item i of thread t
// is point i * THREADS + t. A round updates them by the point taken last, and finds the farthest: by warp, and then
// every warp for itself among the results of all warps. These alternate between two places in shared memory, so a round
// has one barrier.
//
// The rounds follow one another, so the time is the latency of a round: about 100 instructions a warp, four reductions
// of a warp, and the barrier. Clouds of more than MOST points are for sampling_pruned.cu.

#ifndef THREADS
#define THREADS 1024  // 128, 256, 512 or 1024
#endif

#include "clouds.cuh"
#include "sampling.cuh"

#define ITEMS (POINT == FLOAT64 ? 4 : 8)  // mirrored by gpu3d/cuda/sampling.py; with more, registers would spill
#define WARPS (THREADS / 32)

static_assert(WARPS <= 32, "a lane reads the result of each warp");

extern "C" __global__ __launch_bounds__(THREADS) void farthest_points(
    const coord_t *__restrict__ points,  // [N, 3]
    const __grid_constant__ Clouds clouds,
    int k,
    int start,
    int *__restrict__ out  // [clouds, k]
) {
    __shared__ Farthest found[2][WARPS];
    const Cloud cloud = rows_of(clouds)[blockIdx.x];
    const int n = rows_of(clouds)[blockIdx.x + 1].point - cloud.point;  // ranges [0, ITEMS * THREADS]
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    points += 3 * (size_t)cloud.point;
    out += (size_t)blockIdx.x * k;

    coord_t x[ITEMS], y[ITEMS], z[ITEMS], nearest[ITEMS];  // nearest: the smallest d2 to the points taken
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int p = i * THREADS + t;
        x[i] = p < n ? points[3 * p] : 0;
        y[i] = p < n ? points[3 * p + 1] : 0;
        z[i] = p < n ? points[3 * p + 2] : 0;
        nearest[i] = p < n && is_finite(x[i]) && is_finite(y[i]) && is_finite(z[i]) ? UNREACHED : TAKEN;
    }

    int taken = 0, sample = start;  // the same in all threads
    if (start < n && is_finite(points[3 * start]) && is_finite(points[3 * start + 1])
        && is_finite(points[3 * start + 2]))
        while (true) {
            if (t == 0) out[taken] = cloud.point + sample;
            if (++taken == k) break;
            const coord_t sx = points[3 * sample], sy = points[3 * sample + 1], sz = points[3 * sample + 2];
            const int own = sample % THREADS == t ? sample / THREADS : -1;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) nearest[i] = i == own ? TAKEN : nearest[i];
            coord_t largest = TAKEN;
            int item = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                nearest[i] = min(nearest[i], squared_norm(minus(x[i], sx), minus(y[i], sy), minus(z[i], sz)));
                if (nearest[i] > largest) {
                    largest = nearest[i];
                    item = i;
                }
            }
            const Farthest mine = farthest_of_warp({signed_bits_of(largest), (u32)(item * THREADS + t)});
            if (lane == 0) found[taken & 1][warp] = mine;
            __syncthreads();
            Farthest other = {signed_bits_of(TAKEN), FULL};
            if (lane < WARPS) other = found[taken & 1][lane];
            const Farthest next = farthest_of_warp(other);
            if (next.d2 < 0) break;  // every point is taken
            sample = next.index;
        }
    for (int i = taken + t; i < k; i += THREADS) out[i] = -1;
}
