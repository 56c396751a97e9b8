// SPDX-License-Identifier: Apache-2.0
// What the two APML files share.

#ifndef GPU3D_APML_CUH
#define GPU3D_APML_CUH

#include "types.cuh"

// A weight of a point's row of P1, or of P2, and the slot of the other side that it goes to.
struct __align__(8) Entry {
    u32 other;
    float weight;
};

#endif  // GPU3D_APML_CUH
