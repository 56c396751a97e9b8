// SPDX-License-Identifier: Apache-2.0
// Kernels that start early: from Hopper on, the GPU may put their blocks on free multiprocessors while the launch ahead
// of them in the stream still runs (CUDA calls this programmatic dependent launch). The blocks then wait for its end,
// but what starting costs is already paid.
//
// A kernel with `early=True` in gpu3d/cuda/plan.py calls start_early() in its first statement, with all threads:
//   - No thread reads or writes memory before. What the launch ahead writes is not there yet, and what it reads must
//     stay as it is.
//   - No thread returns before. A launch behind waits for this one only. If this one could end before the launch ahead,
//     the launch behind would run too early.
//   - No pointer is `const __restrict__` if an earlier launch may have written what it points to, as with all inputs.
//     The compiler takes such memory for constant, and may read it before start_early(). Pointers to results may be
//     `__restrict__`.
// Without the launch attribute, start_early() does not wait, because the launch ahead has ended.

#ifndef GPU3D_EARLY_CUH
#define GPU3D_EARLY_CUH

// Lets the launch behind start early when all blocks of this one have come here. A kernel that is not early may call
// it.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Lets the next start, then waits for the end of the launches ahead, after which all that they wrote can be read.
__device__ __forceinline__ void start_early() {
    let_next_start();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif  // GPU3D_EARLY_CUH
