// SPDX-License-Identifier: Apache-2.0
// Unsigned integers by their bits.

#ifndef GPU3D_TYPES_CUH
#define GPU3D_TYPES_CUH

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#endif  // GPU3D_TYPES_CUH
