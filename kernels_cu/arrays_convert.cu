// SPDX-License-Identifier: Apache-2.0
// Converts rows of floats to another float type, and to another number of columns: 2-D clouds become 3-D ones with
// z = 0, gradients [N, 3] become [N, 2]. Rows and columns of the input may have any strides.
//
// Numerics: round to nearest, ties to even, and keep subnormal numbers, as numpy.ndarray.astype does. (CuPy's astype
// differs in that: its kernels are compiled with -ftz=true and turn subnormal float32 numbers into 0 on the way to and
// from float64.) Where both types are the same the bits are copied, those of a NaN too.
//
// A block converts ROWS rows; neighbouring threads write neighbouring numbers. It is meant for few columns.

#ifndef FROM
#define FROM 0  // 0 float32, 1 float64, 2 float16, 3 bfloat16
#endif
#ifndef TO
#define TO 0  // likewise
#endif
#define THREADS 256  // mirrored by gpu3d/cuda/arrays.py, as is ROWS
#define ROWS 512
#define ITEMS 4  // numbers that a thread loads together

#include "floats.cuh"

typedef Float<FROM>::Stored from_t;
typedef Float<TO>::Stored to_t;

__device__ __forceinline__ to_t convert(from_t x) {
    if constexpr (FROM == TO) return x;
    else return Float<TO>::narrow(Float<FROM>::widen(x));
}

extern "C" __global__ __launch_bounds__(THREADS) void convert_rows(
    const from_t *__restrict__ rows,  // [n, columns_in] with the strides below
    long long row_stride,             // in elements, as the next
    long long column_stride,
    long long n,
    int columns_in,
    int columns_out,        // below 2^22; columns beyond columns_in become 0
    to_t *__restrict__ out  // [n, columns_out]
) {
    const long long first = (long long)blockIdx.x * ROWS;
    if (first >= n) return;  // the grid is an upper bound
    const u32 count = (u32)min((long long)ROWS, n - first) * columns_out;
    rows += first * row_stride;
    out += first * columns_out;
    for (u32 base = threadIdx.x; base < count; base += ITEMS * THREADS) {
        from_t x[ITEMS];
        bool given[ITEMS];  // the input has this column
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {  // all loads first, so that they overlap
            const u32 i = base + k * THREADS, row = i / columns_out, column = i - row * columns_out;
            given[k] = i < count && column < columns_in;
            if (given[k]) x[k] = rows[row * row_stride + column * column_stride];
        }
#pragma unroll
        for (int k = 0; k < ITEMS; ++k)
            if (base + k * THREADS < count) out[base + k * THREADS] = given[k] ? convert(x[k]) : to_t(0);
    }
}
