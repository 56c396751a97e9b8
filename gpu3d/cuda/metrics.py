# SPDX-License-Identifier: Apache-2.0
"""The plan of compare_clouds: kernels_cu/metrics.cu, after the search of gpu3d.cuda.chamfer."""

from __future__ import annotations

import functools
from itertools import accumulate

from gpu3d._arrays import Spec
from gpu3d.cuda import chamfer, clouds, neighbors
from gpu3d.cuda.chamfer import Search
from gpu3d.cuda.compiler import Configuration
from gpu3d.cuda.plan import Call, Device, Kernel, Number, Packed, Plan, Result, Steps
from gpu3d.reference.chamfer import SUM_TILE
from gpu3d.reference.metrics import MAX_THRESHOLDS, rounded

BINS = 256  # the same constant as in metrics.cu; a number has as many digits as bytes

_MEASURED, _METRICS = "<QQQQQQQQ", "<QQQQQQQQ"
_SIDES = f"64s64s{clouds.FORMAT}{clouds.FORMAT}"
_RANKED, _CHOSEN = 4, 2  # numbers that struct Ranked and struct Chosen take the room of


def configurations() -> list[Configuration]:
    """Every module that this file uses."""
    return [Configuration("metrics", neighbors.of_real(wide)) for wide in (False, True)]


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
    values = rounded(thresholds, search.dtype).tobytes().ljust(search.dtype.itemsize * MAX_THRESHOLDS, b"\0")
    return Call(_plan(search, len(thresholds)), {**numbers, "thresholds": values})


@functools.lru_cache(maxsize=256)
def _plan(search: Search, thresholds: int) -> Plan:
    steps = Steps(inputs=2 + search.x.indexed + search.y.indexed, results=8)
    layouts = search.x.layout, search.y.layout
    count, single = layouts[0].clouds, all([layout.single for layout in layouts])
    size = digits = search.dtype.itemsize
    found = [
        [steps.workspace("d2", size * layout.points), steps.workspace("nearest", 4 * layout.points)]
        for layout in layouts
    ]
    sizes = [
        (
            size * _RANKED * count,
            4 * count * thresholds,
            4 * other.points,
            0 if single else 4 * digits * BINS * layout.nodes,
        )
        for layout, other in zip(layouts, layouts[::-1], strict=True)
    ]
    integers, end = steps.workspace("integers", sum(map(sum, sizes))), 0
    steps.clear(integers, sum(map(sum, sizes)))
    columns = []
    for needed in zip(*sizes, strict=True):  # those of x and of y; the widest numbers lie first
        starts = accumulate(needed, initial=end)
        columns.append([integers + start if n else None for start, n in zip(starts, needed, strict=False)])
        end += sum(needed)
    sides = []
    for layout, of_found, parts in zip(layouts, found, zip(*columns, strict=True), strict=True):
        ranked, within, shares, counts = parts
        chosen = None if single else steps.workspace("chosen", size * _CHOSEN * digits * layout.nodes)
        sums = steps.workspace("sums", 24 * layout.nodes)
        sides.append(Packed(_MEASURED, (*of_found, shares, ranked, within, counts, chosen, sums)))
    indices, queries = chamfer.add_search(steps, search)
    d2, nearest = zip(*found, strict=True)
    chamfer.add_nearest(steps, search, indices, queries, d2, nearest, steps.workspace("known", 4))
    both = *sides, indices[0].clouds, indices[1].clouds
    launch = functools.partial(steps.launch, grid=layouts[0].nodes + layouts[1].nodes, block=SUM_TILE)
    macros = neighbors.of_real(search.wide)
    for digit in range(1 if single else digits):
        launch(Kernel("metrics", "metrics_digits", f"{_SIDES}i", macros), args=(*both, digit))
    kernel = Kernel("metrics", "metrics_tiles", f"{_SIDES}{size * MAX_THRESHOLDS}si", macros)
    launch(kernel, args=(*both, Number("thresholds"), thresholds))
    kernel = Kernel("metrics", "metrics_clouds", f"{_SIDES}i64s", macros)
    metrics = Packed(_METRICS, tuple([Result(i) for i in range(8)]))
    steps.launch(kernel, grid=count, block=SUM_TILE, args=(*both, thresholds, metrics))
    return steps.plan()
