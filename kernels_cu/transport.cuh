// SPDX-License-Identifier: Apache-2.0
// What the files of APML's plan share: an entry of the sparse transport plan.

#ifndef GPU3D_TRANSPORT_CUH
#define GPU3D_TRANSPORT_CUH

#include "types.cuh"

// A weight of P1 or P2 in a point's row, and the slot of the other cloud's point.
struct __align__(8) Entry {
    u32 other;
    float weight;
};

#endif  // GPU3D_TRANSPORT_CUH
