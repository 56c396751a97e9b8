// SPDX-License-Identifier: Apache-2.0
// A step of AdamW (Loshchilov and Hutter 2019) with a one-cycle learning rate and clipping by the global norm, over
// parameters that lie in one arena. It equals torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR (cosine annealing,
// two phases) and torch.nn.utils.clip_grad_norm_.
//   1 sum_squares     a block's sum of the squares of its gradients
//   2 prepare_step    one block: the norm; whether the step counts; the learning rate; the state for the next step
//   3 adamw           m, v, parameters, and a copy of the parameters in the type of the activations
// If the norm or the loss is not finite, nothing changes except the count of skipped steps. (The norm is infinite too
// if a square overflows: from gradients of about 1e19 on.)
//
// Everything that differs between steps is in device memory, so one CUDA graph serves a whole training.
//
// Memory bandwidth limits 3: 28 bytes a parameter and 2 for a copy of 16 bits, after 4 in 1.
//
// Numerics: float32 for each parameter; what all parameters share is computed in float64. Squares are summed in float32
// by a thread, and in float64 from there on, in a fixed order.

#ifndef ELEMENT
#define ELEMENT 3  // of the copy: 0 none (float32), 2 float16, 3 bfloat16
#endif
#define THREADS 256  // mirrored by gpu3d/cuda/optim.py, like the next two
#define QUADS 2      // four parameters each, that a thread loads together
#define SUM_BLOCKS 1024

#include "floats.cuh"
#include "warp.cuh"

#define BETA1 0.9
#define BETA2 0.999
#define EPSILON 1e-8f
#define WARM_UP 0.04            // part of the steps in which the rate rises
#define FIRST_RATE (1 / 10.0)   // the first rate, as a part of the largest
#define LAST_RATE (1 / 1000.0)  // the last rate, likewise

struct State {
    u32 step;     // steps that counted; also what drop path counts by
    u32 skipped;  // steps that did not
};

// What prepare_step leaves for adamw.
struct Update {
    float clip;             // factor of the gradients
    float decay;            // factor of decayed parameters
    float step_size;        // rate / (1 - BETA1^step)
    float root_correction;  // sqrt(1 - BETA2^step)
    int skip;
};

// The sum over the block, on every thread.
__device__ __forceinline__ double sum_of_threads(double x) {
    __shared__ double of_warp[THREADS / 32];
    x = sum_of_warp(x);
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < THREADS / 32; ++w) sum += of_warp[w];
    return sum;
}

extern "C" __global__ __launch_bounds__(THREADS) void sum_squares(
    const float4 *__restrict__ gradients,  // [n / 4]
    long long n,
    double *__restrict__ partials  // [blocks]
) {
    float sum = 0;
    const long long step = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n / 4; i += 4 * step) {
        float4 g[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) g[k] = i + k * step < n / 4 ? gradients[i + k * step] : float4{};
#pragma unroll
        for (int k = 0; k < 4; ++k) sum += g[k].x * g[k].x + g[k].y * g[k].y + g[k].z * g[k].z + g[k].w * g[k].w;
    }
    const double all = sum_of_threads(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = all;
}

__device__ __forceinline__ double annealed(double from, double to, double part) {
    return to + (from - to) / 2 * (cospi(part) + 1);
}

// The rate of a step that counts from 0. Beyond the last step it stays that of the last.
__device__ double rate_of(u32 step, u32 steps, double largest) {
    // Rounded twice, as on the host: fused, 0.04 * 25 - 1 would be a little above 0, and the rate of step 0 the first.
    const double peak = __dadd_rn(__dmul_rn(WARM_UP, steps), -1.0);
    const double last = steps - 1.0, at = min((double)step, last);
    if (at <= peak) return annealed(largest * FIRST_RATE, largest, peak > 0 ? at / peak : 1);
    return annealed(largest, largest * LAST_RATE, (at - peak) / (last - peak));
}

extern "C" __global__ __launch_bounds__(THREADS) void prepare_step(
    const double *__restrict__ partials,  // [count]
    int count,
    const float *__restrict__ loss,  // []
    double largest_rate,
    u32 steps,  // of the whole training, at least 1
    double weight_decay,
    double clip,                 // the largest norm; infinite to leave gradients as they are
    State *__restrict__ state,   // []
    float *__restrict__ norm,    // [] of the gradients, before clipping
    Update *__restrict__ update  // []
) {
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += partials[i];
    sum = sum_of_threads(sum);
    if (threadIdx.x) return;
    const double length = sqrt(sum);
    *norm = (float)length;
    update->skip = !is_finite(*loss) || !is_finite(length);
    if (update->skip) {
        ++state->skipped;
        return;
    }
    const double rate = rate_of(state->step, steps, largest_rate);
    const double t = ++state->step;
    update->clip = (float)fmin(1.0, clip / (length + 1e-6));
    update->decay = (float)(1 - rate * weight_decay);
    update->step_size = (float)(rate / (1 - pow(BETA1, t)));
    update->root_correction = (float)sqrt(1 - pow(BETA2, t));
}

__device__ __forceinline__ void step_of_one(float &p, float &m, float &v, float g, float decay, const Update &to) {
    g *= to.clip;
    m += (g - m) * (float)(1 - BETA1);
    v = v * (float)BETA2 + g * g * (float)(1 - BETA2);
    p = p * decay - to.step_size * (m / (sqrtf(v) / to.root_correction + EPSILON));
}

extern "C" __global__ __launch_bounds__(THREADS) void adamw(
    const float4 *__restrict__ gradients,  // [n / 4]
    const Update *__restrict__ update,     // []
    long long n,                           // a multiple of 4
    long long decayed,                     // so many parameters decay, the first ones; a multiple of 4
    float4 *__restrict__ parameters,       // [n / 4]
    float4 *__restrict__ m,                // [n / 4]
    float4 *__restrict__ v,                // [n / 4]
    uint2 *__restrict__ copy               // [n / 4] four of ELEMENT each; null if ELEMENT is 0
) {
    const Update to = *update;
    if (to.skip) return;
    const long long first = (long long)blockIdx.x * THREADS * QUADS + threadIdx.x;
    float4 g4[QUADS], p4[QUADS], m4[QUADS], v4[QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const long long i = first + q * THREADS;
        if (i >= n / 4) continue;
        g4[q] = gradients[i];
        p4[q] = parameters[i];
        m4[q] = m[i];
        v4[q] = v[i];
    }
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const long long i = first + q * THREADS;
        if (i >= n / 4) continue;
        const float decay = 4 * i < decayed ? to.decay : 1;
        step_of_one(p4[q].x, m4[q].x, v4[q].x, g4[q].x, decay, to);
        step_of_one(p4[q].y, m4[q].y, v4[q].y, g4[q].y, decay, to);
        step_of_one(p4[q].z, m4[q].z, v4[q].z, g4[q].z, decay, to);
        step_of_one(p4[q].w, m4[q].w, v4[q].w, g4[q].w, decay, to);
        parameters[i] = p4[q];
        m[i] = m4[q];
        v[i] = v4[q];
#if ELEMENT
        typedef Float<ELEMENT> Half;
        copy[i] = {Half::narrow_pair(p4[q].x, p4[q].y), Half::narrow_pair(p4[q].z, p4[q].w)};
#endif
    }
}
