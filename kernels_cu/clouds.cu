// SPDX-License-Identifier: Apache-2.0
// Stores the table of clouds of a large batch in device memory. Its rows lie in the arguments of these launches, so no
// host memory must stay alive, and a CUDA graph can hold them. One thread a row.

#define THREADS 256  // mirrored by gpu3d/cuda/clouds.py, like the next
#define ROWS_A_LAUNCH 240

#include "clouds.cuh"

static_assert(ROWS_A_LAUNCH <= THREADS, "a thread a row");

struct CloudRows {
    Cloud rows[ROWS_A_LAUNCH];
};

extern "C" __global__ __launch_bounds__(THREADS) void write_clouds(
    const __grid_constant__ CloudRows part,
    int first,
    int n,                     // rows of this launch
    Cloud *__restrict__ table  // [clouds + 1]
) {
    if ((int)threadIdx.x < n) table[first + threadIdx.x] = part.rows[threadIdx.x];
}
