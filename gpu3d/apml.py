# SPDX-License-Identifier: Apache-2.0
"""The APML transport loss with its gradients and its plan, and the exact assignment to measure it by.

CUDA-APML (arXiv:2512.19743) evaluates every pair of points. What a row of its plan keeps is a ball around a point,
whose radius the two nearest decide: two exact searches find the same plan, in memory that grows with its entries.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays, _clouds, _cuda
from gpu3d.neighbors import (
    INDEX_FORMAT,
    NeighborIndex,
    Search,
    _check_no_empty_cloud,
    _check_pair,
    _checked_max_entries,
    _Entered,
    _entered,
    origins_cuda,
    pair_cuda,
)
from gpu3d.reference import apml as reference
from gpu3d.reference.neighbors import ENTRIES_A_POINT, REDUCTIONS

MAX_ASSIGNED = 8192  # points that emd takes: 512 MiB of distances


class ApmlGradients(NamedTuple):
    """The result of `apml_value_and_grad`."""

    loss: Any  # float32 [] or [B]
    gradients: tuple[Any, Any]  # of pred and of target, in their shapes and dtypes


class ApmlPlan(NamedTuple):
    """The transport plan in order of (row, col), after Sinkhorn; the result of `apml_plan`.

    The entries of pred row i are ``indptr[i]`` to ``indptr[i + 1]``.
    """

    rows: Any  # int32 [nnz], into the packed pred
    cols: Any  # int32 [nnz], into the packed target
    values: Any  # float32 [nnz]
    indptr: Any  # int64 [N + 1]; JAX makes them int32 unless jax_enable_x64 is set


def apml(
    pred: Any,
    target: Any,
    *,
    pred_lengths: Sequence[int] | None = None,
    target_lengths: Sequence[int] | None = None,
    p_min: float = 0.8,
    threshold: float = 1e-8,
    iterations: int = 20,
    symmetrize: str = "mean",
    reduction: str = "mean",
    max_entries: int | None = None,
) -> Any:
    """The APML loss: the cost of moving pred to target by a plan in which each point chooses its nearest softly.

    Parameters
    ----------
    pred, target : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16, on one device; NumPy, CuPy, torch, JAX or anything with
        ``__dlpack__``. As many clouds in both, none of them empty.
    pred_lengths, target_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud.
    p_min : float
        Between 0 and 1: the nearest gets at least this share of a choice, ties apart.
    threshold : float
        Between 0 and 1: of a choice, the entries below this share of its largest are left out.
    iterations : int
        Of Sinkhorn, at least 1.
    symmetrize : {"mean", "min"}
        The choices of pred and of target become one plan: their mean, or the smaller where both have chosen.
    reduction : {"mean", "sum", "none"}
        Over the clouds.
    max_entries : int, optional
        Room for the entries of all choices, of pred and of target together. Default: exactly as many as there are.

    Returns
    -------
    array float32 [], or [B] for reduction "none"
        Of the kind of pred. With max_entries, NaN if there is not room for all.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure. Without max_entries,
        also more than 64 * (N + M) entries: the message names the row that has most.

    Notes
    -----
    With distances C_ij, and of row i the two smallest d1 <= d2 over the M targets: T_i = ln((M - 1) / (1 - p_min)) /
    max(d2 - d1, 1e-8), and k_ij = exp(-(C_ij - d1) T_i), kept where k_ij > threshold, divided by the row's sum of what
    is kept. That is P1; P2 is the same over columns, and a single point has weight 1. "mean" is (P1 + P2) / 2, where
    what is not kept counts 0. "min" is the smaller of both where both are kept; a row without such an entry keeps its
    P1, a column its P2. Then `iterations` times: rows /= their sum + 1e-8, columns /= their sum + 1e-8. The loss of a
    cloud is the sum of P_ij C_ij. Columns are last, so it is not symmetric, and its mass is M.

    An entry is what P1 keeps or what P2 keeps; a pair that both keep counts twice. C and what is kept are decided in
    float64 of float32 coordinates, so CPU and GPU keep the same. Where target is float64, the minimum of the target's
    cloud is subtracted from both in float64 first, so that map coordinates keep their millimetres.

    A point with NaN or inf makes the loss of its cloud NaN.

    Without max_entries the number of entries is read by the host: it synchronizes. With max_entries it does not, and
    can be captured in a CUDA graph after a first call.

    References
    ----------
    From Theory to Throughput: CUDA-Optimized APML for Large-Batch 3D Learning, arXiv:2512.19743.

    Examples
    --------
    >>> target = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
    >>> pred = target + np.float32([0.01, 0, 0])
    >>> print(f"{gpu3d.apml(pred, target):.3f}")  # near 1000 * 0.01: it is a sum over points
    10.015
    """
    (loss,) = _apml(
        pred,
        target,
        pred_lengths,
        target_lengths,
        (p_min, threshold, iterations, symmetrize),
        reduction,
        max_entries,
        what="loss",
    )
    return loss


def apml_value_and_grad(
    pred: Any,
    target: Any,
    *,
    pred_lengths: Sequence[int] | None = None,
    target_lengths: Sequence[int] | None = None,
    p_min: float = 0.8,
    threshold: float = 1e-8,
    iterations: int = 20,
    symmetrize: str = "mean",
    reduction: str = "mean",
    max_entries: int | None = None,
) -> ApmlGradients:
    """The APML loss, and its gradients with respect to pred and target.

    Parameters
    ----------
    pred, target : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `apml`.
    pred_lengths, target_lengths : sequence of int, optional
        As in `apml`.
    p_min, threshold : float
        As in `apml`.
    iterations : int
        As in `apml`.
    symmetrize : {"mean", "min"}
        As in `apml`.
    reduction : {"mean", "sum", "none"}
        Over the clouds. With "none" each cloud's gradient is that of its own loss.
    max_entries : int, optional
        As in `apml`.

    Returns
    -------
    ApmlGradients
        ``loss`` as of `apml`, and ``gradients``: that of pred and that of target, each in the shape, dtype and kind of
        its array. With max_entries, all NaN if there is not room for all entries.

    Raises
    ------
    TypeError, ValueError
        As in `apml`.

    Notes
    -----
    The plan P is held constant, as published: the gradient of pred point i is the sum over j of
    P_ij (x_i - y_j) / C_ij, that of target point j minus the sum over i; where C_ij = 0 the term is 0. A point with NaN
    or inf has gradient NaN and no entry in the plan of the others. The same call gives the same bits. When it
    synchronizes is said at `apml`.

    Examples
    --------
    >>> pred = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> target = np.array([[0, 0, 2], [1, 0, 1]], np.float32)
    >>> loss, (dpred, dtarget) = gpu3d.apml_value_and_grad(pred, target)
    >>> print(f"{loss:.4f}")
    3.2009
    >>> print(np.round(dpred, 2))
    [[-0.22  0.   -0.91]
     [ 0.14  0.   -0.97]]
    """
    loss, dpred, dtarget = _apml(
        pred,
        target,
        pred_lengths,
        target_lengths,
        (p_min, threshold, iterations, symmetrize),
        reduction,
        max_entries,
        what="gradients",
    )
    return ApmlGradients(loss, (dpred, dtarget))


def apml_plan(
    pred: Any,
    target: Any,
    *,
    pred_lengths: Sequence[int] | None = None,
    target_lengths: Sequence[int] | None = None,
    p_min: float = 0.8,
    threshold: float = 1e-8,
    iterations: int = 20,
    symmetrize: str = "mean",
    max_entries: int | None = None,
) -> ApmlPlan:
    """The plan that the APML loss is the cost of.

    Parameters
    ----------
    pred, target : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `apml`.
    pred_lengths, target_lengths : sequence of int, optional
        As in `apml`.
    p_min, threshold : float
        As in `apml`.
    iterations : int
        As in `apml`.
    symmetrize : {"mean", "min"}
        As in `apml`.
    max_entries : int, optional
        As in `apml`; if there is not room for all entries, it is an error here.

    Returns
    -------
    ApmlPlan
        ``rows`` and ``cols`` int32 [nnz] into the packed arrays, ``values`` float32 [nnz], in order of (row, col), and
        ``indptr`` int64 [N + 1]: those of pred row i are ``indptr[i]`` to ``indptr[i + 1]``. Of the kind of pred.

    Raises
    ------
    TypeError, ValueError
        As in `apml`, and more than max_entries entries.

    Notes
    -----
    The pairs are the same on CPU and GPU. A point with NaN or inf has none. The number of entries is read by the host:
    it synchronizes.

    Examples
    --------
    >>> pred = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> target = np.array([[0, 0, 2], [1, 0, 1]], np.float32)
    >>> plan = gpu3d.apml_plan(pred, target)
    >>> plan.rows, plan.cols
    (array([0, 0, 1, 1], dtype=int32), array([0, 1, 0, 1], dtype=int32))
    >>> print(np.round(plan.values, 2))
    [0.69 0.31 0.31 0.69]
    """
    found = _apml(
        pred,
        target,
        pred_lengths,
        target_lengths,
        (p_min, threshold, iterations, symmetrize),
        "none",
        max_entries,
        what="plan",
    )
    return ApmlPlan(*found)


def emd(x: Any, y: Any) -> Any:
    """The earth mover's distance: the mean distance of the cheapest assignment of x to y, one to one.

    Parameters
    ----------
    x, y : array [n, 3] or [n, 2]
        Coordinates of one cloud each, as many points in both, 1 to 8192: float32, float64, float16 or bfloat16, on one
        device; NumPy, CuPy, torch, JAX or anything with ``__dlpack__``.

    Returns
    -------
    array float32 []
        Of the kind of x, in the unit of the points. NaN if a point has NaN or inf.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    It is there to measure by, and not fast: SciPy's ``linear_sum_assignment`` on the CPU, over all distances in
    float64. Arrays of a GPU are copied to the host: it synchronizes.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[1, 0, 0], [3, 0, 0]], np.float32)
    >>> gpu3d.emd(x, y)
    array(1.5, dtype=float32)
    """
    entered_x, entered_y = _entered_cloud(x, "x"), _entered_cloud(y, "y")
    _check_pair(entered_x, "x", entered_y, "y")
    n, m = entered_x.lengths[0], entered_y.lengths[0]
    if n != m:
        raise ValueError(f"x and y must have as many points, for they are assigned one to one, got {n} and {m}.")
    if n > MAX_ASSIGNED:
        raise ValueError(f"x and y must be at most {MAX_ASSIGNED} points, got {n}: take a sample, or apml.")
    origin = entered_x.origin
    with _arrays.on(origin):
        points = [entered.points for entered in (entered_x, entered_y)]
        if origin.device is None:
            return _arrays.leave(reference.emd(*points), origin)
        import cupy

        return _arrays.leave(cupy.asarray(reference.emd(*(p.get() for p in points))), origin)  # synchronizes


# ---- checks --------------------------------------------------------------------------------------------------------


def _entered_array(points: Any, lengths: Any, name: str, lengths_name: str) -> _Entered:
    """Clouds, none of them empty."""
    if isinstance(points, NeighborIndex):
        raise TypeError(f"{name} must be an array, got NeighborIndex: pass the points that it was made of.")
    entered = _entered(points, lengths, name, lengths_name)
    _check_no_empty_cloud(entered, name)
    return entered


def _entered_cloud(points: Any, name: str) -> _Entered:
    entered = _entered_array(points, None, name, "")
    if len(entered.shape) != 2:
        raise ValueError(f"{name} must be one cloud [n, 3], got shape {list(entered.shape)}: pass {name}[b].")
    return entered


def _checked_share(share: Any, name: str, cure: str = "") -> float:
    """A float between 0 and 1."""
    if isinstance(share, (bool, np.bool_)) or not isinstance(share, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {share!r} of type {type(share).__name__}.")
    if not 0 < float(share) < 1:
        raise ValueError(f"{name} must be between 0 and 1, neither of them included, got {share}{cure}.")
    return float(share)


def _checked_options(p_min: Any, threshold: Any, iterations: Any, symmetrize: Any) -> reference.Options:
    p_min = _checked_share(p_min, "p_min")
    threshold = _checked_share(threshold, "threshold", ": 0, all pairs, is gpu3d.reference.apml.dense")
    iterations = _arrays.check_integer(iterations, "iterations")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    _arrays.check_choice(symmetrize, reference.SYMMETRIZATIONS, "symmetrize")
    return reference.Options(p_min, threshold, iterations, symmetrize)


def _apml(
    pred: Any,
    target: Any,
    pred_lengths: Any,
    target_lengths: Any,
    options: tuple[Any, Any, Any, Any],
    reduction: Any,
    max_entries: Any,
    what: str,
) -> tuple[Any, ...]:
    """The loss; or the loss and the gradients of pred and target; or the arrays of the plan: `what` says."""
    x = _entered_array(pred, pred_lengths, "pred", "pred_lengths")
    y = _entered_array(target, target_lengths, "target", "target_lengths")
    _check_pair(x, "pred", y, "target")
    checked = _checked_options(*options)
    _arrays.check_choice(reduction, REDUCTIONS, "reduction")
    max_entries = _checked_max_entries(max_entries)
    clouds = x.points, x.lengths, y.points, y.lengths
    with _arrays.on(x.origin):
        if x.origin.device is not None:
            found = _apml_cuda(*clouds, checked, reduction, max_entries, what)
        elif what == "plan":
            found = reference.apml_plan(*clouds, checked, max_entries)
        else:
            found = reference.apml(*clouds, checked, reduction, max_entries, what == "gradients")
        if what == "plan":
            return tuple(_arrays.leave(array, x.origin) for array in found)
        loss, *gradients = found
        left = [
            _arrays.leave(gradient.reshape(side.shape), side.origin)
            for gradient, side in zip(gradients, (x, y)[: len(gradients)], strict=True)
        ]
        return _arrays.leave(loss, x.origin), *left


# ---- CUDA ----------------------------------------------------------------------------------------------------------

SEARCH_THREADS = 128
TRANSPORT_THREADS = 512  # mirrored by apml_transport.cu, as is the next
TRANSPORT_BLOCKS = 2  # a multiprocessor
TRANSPORT_SLOTS = 128  # a block at least, so that small clouds wait for few blocks
FIRST_ROOM = 6  # entries a point that there is room for before they are counted; measured clouds have 2.4 to 3.7
MOST_ENTRIES = 2**32 - 1

_FLOAT, _INT32, _INT64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
_SIDE = struct.Struct("<10Q")  # struct Side of apml_transport.cu
_PLAN = struct.Struct("<5Q")  # struct Plan of apml_transport.cu
_MASSES = struct.Struct(f"<Q{_clouds.INLINE_CLOUDS}d")  # struct Masses of apml_search.cu
_KEPT = struct.Struct("<d6Q")  # struct Kept of apml_search.cu

# The parameters of each kernel: formats of the module struct; c, x, m, k, s, p for struct Clouds, Index, Masses, Kept,
# Side and Plan.
_SIGNATURES = {"search_balls": "Qcixcmk", "transport": "ssccpQQQiQQQQQd"}
_FORMATS = {"c": _clouds.FORMAT, "x": INDEX_FORMAT} | {
    kind: f"{packed.size}s" for kind, packed in (("m", _MASSES), ("k", _KEPT), ("s", _SIDE), ("p", _PLAN))
}


def configurations() -> list[_cuda.Configuration]:
    """Every module this file can ask for."""
    plans = [_cuda.Configuration("apml_transport", (("MINIMUM", minimum),)) for minimum in range(2)]
    return [_cuda.Configuration("apml_search"), *plans]


@functools.lru_cache(maxsize=64)
def _kernel(device: int, function: str, macros: _cuda.Macros = (), **options: Any) -> _cuda.Kernel:
    """search_balls of apml_search.cu, or transport of apml_transport.cu; for the current device, which is `device`."""
    signature = "".join(_FORMATS.get(kind, kind) for kind in _SIGNATURES[function])
    return _cuda.kernel("apml_" + function.split("_")[0], function, signature, macros, **options)


@functools.lru_cache(maxsize=256)
def _masses(targets: tuple[int, ...], p_min: float) -> tuple[bytes, tuple[_clouds.Part, ...]]:
    """The struct Masses of clouds with so many targets; of many clouds nothing, but the parts of the table."""
    masses = [reference.log_mass(count, p_min) for count in targets]
    if len(masses) > _clouds.INLINE_CLOUDS:
        return b"", _clouds.parts_of(np.array(masses).tobytes())
    return _MASSES.pack(0, *masses, *[0.0] * (_clouds.INLINE_CLOUDS - len(masses))), ()


class _Kept(NamedTuple):
    """What both sides keep of each other, not yet a plan; addresses, and the memory that they lie in."""

    starts: tuple[int, int]  # of x and of y: uint32 [slots], where the entries of each begin
    counts: tuple[int, int]  # and how many they are
    total: int  # uint64 []
    arrived: int  # uint32 [2], 0
    cursors: int  # uint32 [slots of x], how many entries of y name each
    long_counts: tuple[int, int]  # of x and of y: uint32 [2], 0
    entries: int  # struct Entry [room]
    room: int
    held: tuple[Any, ...]


def _search(
    device: int, own: Search, other: Search, masses: tuple[bytes, tuple[_clouds.Part, ...]], *kept: float
) -> None:
    """Finds what each point of `own` keeps of `other`; `kept` are the fields of struct Kept."""
    packed, parts = masses
    table = None
    if parts:
        table = _clouds.store(parts)
        packed = _MASSES.pack(table.ptr, *[0.0] * _clouds.INLINE_CLOUDS)
    queries = own.own
    sides = queries.rows, queries.clouds, queries.layout.slots, other.packed, other.own.clouds
    args = *sides, packed, _KEPT.pack(*kept)
    grid = -(-queries.layout.slots // (SEARCH_THREADS // 32))
    _cuda.launch(_kernel(device, "search_balls"), grid=grid, block=SEARCH_THREADS, args=args)
    del table  # held until here


def _keep(
    device: int,
    x: Search,
    y: Search,
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    options: reference.Options,
    room: int,
) -> _Kept:
    """Launches both searches. If there is not room for all entries, they are counted all the same."""
    import cupy

    if room > MOST_ENTRIES:
        raise ValueError(
            f"a plan has at most 2**32 - 1 entries, got max_entries = {room}: pass fewer clouds at a time."
        )
    slots = x.own.layout.slots, y.own.layout.slots
    sizes = 4 * slots[0], 4 * slots[1]
    memory, (cursors, total, arrived, x_longs, y_longs, *places) = _cuda.workspace(sizes[0], 8, 8, 8, 8, *sizes, *sizes)
    _cuda.clear(memory, places[0] - memory.ptr)
    entries = cupy.cuda.alloc(8 * room)
    limit, starts, counts = reference.log_threshold(options.threshold), (places[0], places[1]), (places[2], places[3])
    for own, other, targets, start, count, named in (
        (x, y, lengths[1], starts[0], counts[0], 0),
        (y, x, lengths[0], starts[1], counts[1], cursors),
    ):
        masses = _masses(targets, options.p_min)
        _search(device, own, other, masses, limit, room, total, start, count, named, entries.ptr)
    return _Kept(starts, counts, total, arrived, cursors, (x_longs, y_longs), entries.ptr, room, (memory, entries))


def _array(address: int, shape: tuple[int, ...], dtype: Any, memory: Any) -> Any:
    """What lies at an address inside a memory."""
    import cupy

    return cupy.ndarray(shape, dtype, memory + (address - memory.ptr))


def _indices(side: Search) -> Any:
    """int32 [slots], the point of each slot, or -1: the last of the four words of a row."""
    return _array(side.own.rows, (side.own.layout.slots, 4), _INT32, side.own.held[0])[:, 3]


def _keep_counted(
    device: int,
    x: Search,
    y: Search,
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    options: reference.Options,
    max_entries: int | None,
) -> _Kept:
    """The same with exactly as much room as the entries take; an error if they are too many."""
    points = sum(map(sum, lengths))
    limit = ENTRIES_A_POINT * points if max_entries is None else max_entries
    room = min(limit, FIRST_ROOM * points)
    while True:
        kept = _keep(device, x, y, lengths, options, room)
        total = int(_array(kept.total, (), np.uint64, kept.held[0]))  # synchronizes
        if total <= room:
            return kept._replace(room=total)
        if total > limit:
            break
        room = total
    most = []
    for side, name, count in ((x, "pred", kept.counts[0]), (y, "target", kept.counts[1])):
        indices = _indices(side).get()
        counts = _array(count, indices.shape, np.uint32, kept.held[0]).get()
        order = np.lexsort((indices, -counts.astype(np.int64)))
        most.append((int(counts[order[0]]), name, int(indices[order[0]])))
    count, name, row = max(most, key=lambda candidate: candidate[0])
    raise reference.too_many_entries(total, limit, max_entries, name, row, count)


class _Plan(NamedTuple):
    """The plan in rows of slots, with gaps between them: column and value of its entries, and their rows."""

    entries: int  # struct Entry [room]: uint32 column, float32 value
    row: int  # uint32 [room], -1 in gaps; among the entries of what is kept
    held: Any  # the memory of the first


def _transport(
    device: int,
    x: Search,
    y: Search,
    kept: _Kept,
    options: reference.Options,
    gradients: list[Any],
    loss: Any,
    parts: int,
) -> _Plan:
    """Launches what makes the plan of what is kept: the losses [B] or [], over `parts`, and the gradients if any."""
    layouts, (x_slots, y_slots) = (x.own.layout, y.own.layout), (4 * (s.own.layout.slots + 1) for s in (x, y))
    multiprocessors, _ = _cuda.device_limits(device)
    most = max(layout.slots for layout in layouts)
    blocks = max(1, min(TRANSPORT_BLOCKS * multiprocessors, -(-most // TRANSPORT_SLOTS)))
    memory, (x_first, y_first, x_longs, y_longs, y_cursors, row_lengths, losses, *scales_and_sums, of_blocks) = (
        _cuda.workspace(
            *(x_slots, y_slots) * 2,
            y_slots,
            x_slots,
            2 * x_slots,
            2 * x_slots,
            2 * y_slots,
            *(8 * layout.nodes for layout in layouts),
            4 * blocks,
        )
    )
    x_scale, y_scale, x_sums, y_sums = scales_and_sums
    of_plan, (keys, entries) = _cuda.workspace(8 * kept.room, 8 * kept.room)
    place, row = kept.entries, kept.entries + 4 * kept.room  # once what is kept is keys
    x_to, y_to = [gradient.data.ptr for gradient in gradients] or (0, 0)
    of_x = kept.starts[0], kept.counts[0], kept.cursors, x_first, x_longs, kept.long_counts[0], x_scale, x_to, x_sums
    of_y = kept.starts[1], kept.counts[1], y_cursors, y_first, y_longs, kept.long_counts[1], y_scale, y_to, y_sums
    sides = _SIDE.pack(x.own.rows, *of_x), _SIDE.pack(y.own.rows, *of_y), x.own.clouds, y.own.clouds
    plan = _PLAN.pack(keys, entries, row_lengths, place, row)
    each, of_all = (0, loss.data.ptr) if loss.ndim == 0 else (loss.data.ptr, 0)
    counts = kept.entries, kept.total, kept.room, options.iterations
    args = *sides, plan, *counts, losses, of_blocks, kept.arrived, each, of_all, float(parts)
    macros = (("MINIMUM", int(options.symmetrize == "min")),)
    kernel = _kernel(device, "transport", macros, cooperative=True)
    _cuda.launch(kernel, grid=blocks, block=TRANSPORT_THREADS, args=args)
    del memory  # held until here
    return _Plan(entries, row, of_plan)


def _sorted_plan(x: Search, y: Search, kept: _Kept, plan: _Plan, points: int) -> tuple[Any, Any, Any, Any]:
    """The entries in order of (row, col) as pred's `points` and target's are packed, and where each row begins."""
    import cupy

    row = _array(plan.row, (kept.room,), _INT32, kept.held[1])
    there = row >= 0
    column, value = (
        _array(plan.entries, (kept.room, 2), dtype, plan.held)[:, i] for i, dtype in enumerate((_INT32, _FLOAT))
    )
    rows, columns = _indices(x)[row[there]], _indices(y)[column[there]]
    order = cupy.lexsort(cupy.stack((columns, rows)))
    rows = rows[order]
    indptr = cupy.searchsorted(rows, cupy.arange(points + 1, dtype=np.int32)).astype(_INT64)
    return rows, columns[order], value[there][order], indptr


def _apml_cuda(
    pred: Any,
    pred_lengths: tuple[int, ...],
    target: Any,
    target_lengths: tuple[int, ...],
    options: reference.Options,
    reduction: str,
    max_entries: int | None,
    what: str,
) -> tuple[Any, ...]:
    """What `what` says, of packed arrays [N or M, 2 or 3] of any strides and float dtype on the current device.

    "loss": float32 [] or [B]. "gradients": that, and those of pred and target as packed, in their dtypes. "plan": rows
    and cols int32 [nnz], values float32 [nnz], indptr int64 [N + 1].
    """
    import cupy

    device, clouds, lengths = cupy.cuda.runtime.getDevice(), len(pred_lengths), (pred_lengths, target_lengths)
    x, y = pair_cuda(pred, pred_lengths, target, target_lengths, origins_cuda(target, target_lengths))
    if max_entries is None or what == "plan":
        kept = _keep_counted(device, x, y, lengths, options, max_entries)
    else:
        kept = _keep(device, x, y, lengths, options, max_entries)
    loss = cupy.ndarray((clouds,) if reduction == "none" else (), _FLOAT)
    points = (pred, target) if what == "gradients" else ()
    gradients = [cupy.ndarray((side.shape[0], 3), _FLOAT) for side in points]
    plan = _transport(device, x, y, kept, options, gradients, loss, clouds if reduction == "mean" else 1)
    if what == "plan":
        return _sorted_plan(x, y, kept, plan, pred.shape[0])
    return loss, *(
        gradient[:, : side.shape[1]].astype(side.dtype, copy=False)
        for gradient, side in zip(gradients, points, strict=True)
    )
