# SPDX-License-Identifier: Apache-2.0
"""Steps of the segmentation loss and its gradient: kernels_cu/losses_*.cu."""

from __future__ import annotations

import functools

import numpy as np

from gpu3d._arrays import FLOAT64, FLOATS, INT32, UINT8
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Kernel, Macros, Packed, Pointer, Steps

MOST_CLASSES = 64
MOST_POINTS = 2**30 - 1  # their counts have 30 bits
CROSS_ENTROPY_THREADS = 128
LOVASZ_THREADS = 512
LOVASZ_TILE = 4096
LOVASZ_PASSES, LOVASZ_DIGITS = 4, 256
LABELS = (UINT8, INT32)

_LOGITS = "<QQQqiii4x"  # struct Logits
_SIGNATURES = {
    "loss_errors": "48sQQ",
    "loss_gradient": "48sQQQQQqQ",
    "lovasz_histogram": "QQiiQ",
    "lovasz_first": "QQQiiQQQ",
    "lovasz_pass": "QQQiiiQQQ",
    "lovasz_last": "QQQiiQQQ",
    "lovasz_count": "QQiiQ",
    "lovasz_jaccard": "QQQiiiQ",
}


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    types = [dtype for dtype in FLOATS if dtype != FLOAT64]
    found = [Configuration("losses_cross_entropy", _macros(dtype, label)) for dtype in types for label in LABELS]
    return [*found, Configuration("losses_lovasz")]


def _macros(dtype: np.dtype, labels: np.dtype) -> Macros:
    return ("ELEMENT", FLOATS.index(dtype)), ("LABEL", LABELS.index(labels))


@functools.cache
def _lovasz(function: str) -> Kernel:
    return Kernel("losses_lovasz", function, _SIGNATURES[function])


def add_loss(
    steps: Steps,
    logits: Pointer,
    labels: Pointer,
    dlogits: Pointer,
    loss: Pointer,
    *,
    points: int,
    rows: int,
    classes: int,
    dtype: np.dtype,
    label_dtype: np.dtype,
    ignore: int,
    point_to_slot: Pointer | None = None,
    pitch: int | None = None,
) -> None:
    """Add cross-entropy plus Lovasz-softmax, float32 [], and its gradient.

    `logits` and `dlogits` have `rows` rows, `pitch` elements apart (default: `classes`). `labels` uint8 or int32 belong
    to the points; point i has row point_to_slot[i] (int32), or row i. A point does not count if its label is `ignore`
    or not among the classes, or if its row is -1. `dlogits` is 0 in rows of points that do not count, in rows of no
    point, and between `classes` and `pitch`.
    """
    if not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes must be 1 to {MOST_CLASSES}, got {classes}.")
    if points > MOST_POINTS:
        raise ValueError(f"a loss takes at most {MOST_POINTS} points, got {points}: pass fewer points at a time.")
    pitch = classes if pitch is None else pitch
    steps.clear(dlogits, rows * pitch * dtype.itemsize)
    if not points:
        steps.clear(loss, 4)
        return
    tiles = -(-points // LOVASZ_TILE)
    blocks = -(-points // CROSS_ENTROPY_THREADS)
    # What starts at 0: labels of each class, tickets, blocks that have arrived, histograms, and what tiles publish.
    digits = LOVASZ_PASSES * LOVASZ_DIGITS
    zeros = steps.workspace("loss zeros", 512 + 4 * classes * digits * (1 + tiles))
    counts, tickets, arrived = zeros, zeros + 4 * MOST_CLASSES, zeros + 4 * (MOST_CLASSES + LOVASZ_PASSES)
    histogram, published = zeros + 512, zeros + 512 + 4 * classes * digits
    steps.clear(zeros, 512 + 4 * classes * digits * (1 + tiles))
    size = 4 * classes * points
    keys = steps.workspace("loss keys", size)
    records = [steps.workspace("loss records", 2 * size) for _ in range(2)]
    in_tiles = steps.workspace("loss labels", 4 * classes * tiles)
    partials = steps.workspace("loss sums", 8 * blocks)

    struct = Packed(_LOGITS, (logits, labels, point_to_slot, pitch, points, classes, ignore))
    shared_mem = 4 * CROSS_ENTROPY_THREADS * (classes | 1)

    def launch(function: str, *args: object) -> None:
        kernel = Kernel(
            "losses_cross_entropy", function, _SIGNATURES[function], _macros(dtype, label_dtype), shared_mem
        )
        steps.launch(kernel, grid=blocks, block=CROSS_ENTROPY_THREADS, args=(struct, *args))

    def launch_tiles(function: str, *args: object) -> None:
        steps.launch(_lovasz(function), grid=classes * tiles, block=LOVASZ_THREADS, args=args)

    launch("loss_errors", counts, keys)
    launch_tiles("lovasz_histogram", keys, counts, points, tiles, histogram)
    board = tickets, published
    launch_tiles("lovasz_first", keys, histogram, counts, points, tiles, *board, records[0])
    launch_tiles("lovasz_pass", records[0], histogram, counts, points, tiles, 1, *board, records[1])
    launch_tiles("lovasz_pass", records[1], histogram, counts, points, tiles, 2, *board, records[0])
    sorted_points, jaccard = keys, records[1]  # memory that nothing reads any more
    launch_tiles("lovasz_last", records[0], histogram, counts, points, tiles, *board, sorted_points)
    launch_tiles("lovasz_count", sorted_points, counts, points, tiles, in_tiles)
    launch_tiles("lovasz_jaccard", sorted_points, counts, in_tiles, points, classes, tiles, jaccard)
    launch("loss_gradient", counts, jaccard, arrived, partials, dlogits, pitch, loss)
