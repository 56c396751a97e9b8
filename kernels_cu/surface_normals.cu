// SPDX-License-Identifier: Apache-2.0
// Normals and curvature: the eigenvector of the smallest eigenvalue of the covariance of each point's k nearest points,
// and this eigenvalue's share of the sum of all three. gpu3d/reference/surface.py defines them.
//
// A thread takes a point. It follows a search by neighbors_knn.cu, and takes the points in the order of the search's
// rows, so that neighbouring threads read the same neighbours. Sums are taken in the order of the neighbours, so the
// same call gives the same bits.
//
// All is float64: differences from the point itself are then exact (of float32 coordinates), and the covariance is as
// good as that of the float64 definition also where the neighbours lie almost on a line. Jacobi's rotations find small
// eigenvalues as exactly as large ones; a closed form would lose them.

#define THREADS 128  // mirrored by gpu3d/cuda/surface.py
#define MIN_K 3      // fewer neighbours have no plane
#define SWEEPS 8     // of rotations at most; three or four suffice, since each squares what is left beside the diagonal
#define LEFT 0x1p-70  // what may be left, for a matrix of trace 1

#include "neighbors.cuh"
#include "voxels.cuh"

struct Viewpoint {
    double at[3];
    int given;  // 0: there is none
};

// A step of Jacobi's method: rotates the axes p and q of a symmetric matrix so that its element pq becomes 0. rp and rq
// are its elements with the third axis. vp and vq are the columns of the eigenvectors.
__device__ __forceinline__ void rotate(
    double &pp, double &qq, double &pq, double &rp, double &rq, double (&vp)[3], double (&vq)[3]
) {
    if (pq == 0) return;
    const double theta = (qq - pp) / (2 * pq);  // if it overflows, the angle is 0
    const double tangent = copysign(1 / (fabs(theta) + sqrt(theta * theta + 1)), theta);
    const double cosine = rsqrt(tangent * tangent + 1), sine = tangent * cosine;
    pp -= tangent * pq;
    qq += tangent * pq;
    pq = 0;
    const double old = rp;
    rp = cosine * old - sine * rq;
    rq = sine * old + cosine * rq;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        const double v = vp[d];
        vp[d] = cosine * v - sine * vq[d];
        vq[d] = sine * v + cosine * vq[d];
    }
}

// Normals and curvature have the type of the coordinates, float for the 16-bit ones.
extern "C" __global__ __launch_bounds__(THREADS) void normals_and_curvature(
    const Row *__restrict__ rows,  // [slots] of the search; only their indices are read
    int slots,
    const point_t *__restrict__ points,  // [points, 3]
    const int *__restrict__ indices,     // [points, k] rows of `points`, -1 where there is none, which comes last
    int k,
    const __grid_constant__ Viewpoint viewpoint,
    coord_t *__restrict__ normals,   // [points, 3]
    coord_t *__restrict__ curvature  // [points]
) {
    const u32 slot = blockIdx.x * THREADS + threadIdx.x;
    if (slot >= (u32)slots) return;
    const int i = rows[slot].index;
    if (i < 0) return;  // padding

    double own[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) own[d] = widen(points[3 * (size_t)i + d]);
    const int *mine = indices + (size_t)i * k;
    int count = 0;
    double sums[3] = {0, 0, 0}, xx = 0, xy = 0, xz = 0, yy = 0, yz = 0, zz = 0;
#pragma unroll 4
    for (int j = 0; j < k; ++j) {
        const int near = mine[j];
        // In place of a missing neighbour it takes the point itself, which adds 0.
        const point_t *at = points + 3 * (size_t)(near < 0 ? i : near);
        const double x = widen(at[0]) - own[0], y = widen(at[1]) - own[1], z = widen(at[2]) - own[2];
        count += near >= 0;
        sums[0] += x;
        sums[1] += y;
        sums[2] += z;
        xx += x * x;
        xy += x * y;
        xz += x * z;
        yy += y * y;
        yz += y * z;
        zz += z * z;
    }
    const double x = sums[0] / count, y = sums[1] / count, z = sums[2] / count;
    xx -= sums[0] * x;
    xy -= sums[0] * y;
    xz -= sums[0] * z;
    yy -= sums[1] * y;
    yz -= sums[1] * z;
    zz -= sums[2] * z;
    const double trace = xx + yy + zz;

    double normal[3] = {0, 0, 1}, least = 0;
    if (count < MIN_K || !is_finite(trace)) {
        normal[0] = normal[1] = normal[2] = least = NAN_DOUBLE;
    } else if (trace > 0) {
        // Divided by the trace, eigenvalues sum to 1, and nothing can overflow or underflow.
        xx /= trace;
        xy /= trace;
        xz /= trace;
        yy /= trace;
        yz /= trace;
        zz /= trace;
        double u[3] = {1, 0, 0}, v[3] = {0, 1, 0}, w[3] = {0, 0, 1};
        for (int sweep = 0; sweep < SWEEPS && fabs(xy) + fabs(xz) + fabs(yz) > LEFT; ++sweep) {
            rotate(xx, yy, xy, xz, yz, u, v);
            rotate(xx, zz, xz, xy, yz, u, w);
            rotate(yy, zz, yz, xy, xz, v, w);
        }
        least = fmin(fmin(xx, yy), zz);
#pragma unroll
        for (int d = 0; d < 3; ++d) normal[d] = zz == least ? w[d] : yy == least ? v[d] : u[d];
        least = fmax(least, 0);  // rounding can make it negative
    }

    coord_t out[3];
    double facing = 0;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
        out[d] = (coord_t)normal[d];
        facing += (viewpoint.at[d] - own[d]) * normal[d];
    }
    bool turned = out[2] < 0 || (out[2] == 0 && (out[1] < 0 || (out[1] == 0 && out[0] < 0)));
    if (viewpoint.given) turned = facing < 0 || (facing == 0 && turned);
#pragma unroll
    for (int d = 0; d < 3; ++d) normals[3 * (size_t)i + d] = turned ? 0 - out[d] : out[d];
    curvature[i] = (coord_t)least;
}
