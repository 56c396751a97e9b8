// SPDX-License-Identifier: Apache-2.0
// What a search computes in, and its distances and losses: float, or double for float64 coordinates.

#ifndef GPU3D_REAL_CUH
#define GPU3D_REAL_CUH

#include "types.cuh"

#ifndef REAL
#define REAL 0  // 0 float, 1 double
#endif

#if REAL
typedef double real;
typedef u64 bits_t;  // the bits of a number, see bits_of in floats.cuh
#else
typedef float real;
typedef u32 bits_t;
#endif

#endif  // GPU3D_REAL_CUH
