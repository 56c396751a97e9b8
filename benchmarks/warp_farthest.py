# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Farthest point sampling in Warp, as a peer: two kernels a round, in one CUDA graph.

Annotations are types of Warp that its compiler reads, so this file does without `from __future__ import annotations`.
"""

import warp as wp


@wp.kernel
def _update(
    points: wp.array(dtype=wp.vec3),
    taken: wp.array2d(dtype=wp.int32),
    i: int,
    n: int,
    nearest: wp.array(dtype=float),
    largest: wp.array2d(dtype=float),
):
    p = wp.tid()
    b = p / n
    d = points[p] - points[taken[b, i - 1]]
    nearest[p] = wp.min(nearest[p], wp.dot(d, d))
    wp.atomic_max(largest, b, i, nearest[p])


@wp.kernel
def _choose(
    nearest: wp.array(dtype=float),
    largest: wp.array2d(dtype=float),
    i: int,
    n: int,
    taken: wp.array2d(dtype=wp.int32),
):
    p = wp.tid()
    b = p / n
    if nearest[p] == largest[b, i]:
        wp.atomic_min(taken, b, i, p)


def farthest_points(points, clouds, k, device="cuda"):
    """A function that samples k points of each of the clouds, which have equally many `points` [N, 3]."""
    points = wp.array(points, dtype=wp.vec3, device=device)
    n = len(points) // clouds
    nearest = wp.empty(len(points), dtype=float, device=device)
    largest, taken = (wp.empty((clouds, k), dtype=kind, device=device) for kind in (float, wp.int32))
    first = wp.array([[b * n] + [len(points)] * (k - 1) for b in range(clouds)], dtype=wp.int32, device=device)

    def sample():
        nearest.fill_(float("inf"))
        largest.zero_()
        wp.copy(taken, first)
        for i in range(1, k):
            wp.launch(_update, dim=len(points), inputs=[points, taken, i, n, nearest, largest], device=device)
            wp.launch(_choose, dim=len(points), inputs=[nearest, largest, i, n, taken], device=device)
        return taken

    if device == "cpu":
        return sample
    sample()  # compiles the kernels
    with wp.ScopedCapture(device=device) as capture:
        sample()

    def call():
        wp.capture_launch(capture.graph)
        return taken

    return call
