# SPDX-License-Identifier: Apache-2.0
"""The plan of compare_clouds: kernels_cu/metrics.cu, after the search of gpu3d.cuda.chamfer."""

from __future__ import annotations

import functools

from gpu3d._arrays import Spec
from gpu3d.cuda import chamfer, clouds, neighbors
from gpu3d.cuda.chamfer import Search
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Kernel, Number, Packed, Plan, Result, Steps
from gpu3d.reference.chamfer import SUM_TILE
from gpu3d.reference.metrics import MAX_THRESHOLDS, rounded

DIGITS, BINS = 4, 256  # the same constants as in metrics.cu

_MEASURED, _METRICS, _RANKED_BYTES, _CHOSEN_BYTES = "<QQQQQQQQ", "<QQQQQQQQ", 16, 8
_SIDES = f"64s64s{clouds.FORMAT}{clouds.FORMAT}"
_THRESHOLDS_BYTES = 4 * MAX_THRESHOLDS


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("metrics")]


def compare_clouds(
    x: Spec,
    x_lengths: tuple[int, ...],
    y: Spec,
    y_lengths: tuple[int, ...],
    thresholds: tuple[float, ...],
    device: Device,
    *,
    x_index: bool = False,
    y_index: bool = False,
) -> Call:
    """Inputs: x, y, and the memory of each index that is given. Results: the fields of CloudComparison."""
    search, numbers = chamfer.search(x_lengths, y_lengths, x, y, "both", device, x_index, y_index)
    values = rounded(thresholds).tobytes().ljust(_THRESHOLDS_BYTES, b"\0")
    return Call(_plan(search, len(thresholds)), {**numbers, "thresholds": values})


@functools.lru_cache(maxsize=256)
def _plan(search: Search, thresholds: int) -> Plan:
    steps = Steps(inputs=2 + search.x.indexed + search.y.indexed, results=8)
    layouts = search.x.layout, search.y.layout
    count, single = layouts[0].clouds, all([layout.single for layout in layouts])
    found = [[steps.workspace(name, 4 * layout.points) for name in ("d2", "nearest")] for layout in layouts]
    sizes = [
        (
            _RANKED_BYTES * count,
            4 * count * thresholds,
            4 * other.points,
            0 if single else 4 * DIGITS * BINS * layout.nodes,
        )
        for layout, other in zip(layouts, layouts[::-1], strict=True)
    ]
    integers, end = steps.workspace("integers", sum(map(sum, sizes))), 0
    steps.clear(integers, sum(map(sum, sizes)))
    sides = []
    for layout, of_found, of_side in zip(layouts, found, sizes, strict=True):
        parts = []
        for size in of_side:
            parts.append(integers + end if size else None)
            end += size
        ranked, within, shares, digits = parts
        chosen = None if single else steps.workspace("chosen", _CHOSEN_BYTES * DIGITS * layout.nodes)
        sums = steps.workspace("sums", 24 * layout.nodes)
        sides.append(Packed(_MEASURED, (*of_found, shares, ranked, within, digits, chosen, sums)))
    indices, queries = chamfer.add_search(steps, search)
    d2, nearest = zip(*found, strict=True)
    neighbors.add_knn_both(steps, ("x", "y"), queries, layouts, indices, d2, nearest, steps.workspace("known", 4))
    both = *sides, indices[0].clouds, indices[1].clouds
    launch = functools.partial(steps.launch, grid=layouts[0].nodes + layouts[1].nodes, block=SUM_TILE)
    for digit in range(1 if single else DIGITS):
        launch(Kernel("metrics", "metrics_digits", f"{_SIDES}i"), args=(*both, digit))
    kernel = Kernel("metrics", "metrics_tiles", f"{_SIDES}{_THRESHOLDS_BYTES}si")
    launch(kernel, args=(*both, Number("thresholds"), thresholds))
    kernel = Kernel("metrics", "metrics_clouds", f"{_SIDES}i64s")
    metrics = Packed(_METRICS, tuple([Result(i) for i in range(8)]))
    steps.launch(kernel, grid=count, block=SUM_TILE, args=(*both, thresholds, metrics))
    return steps.plan()
