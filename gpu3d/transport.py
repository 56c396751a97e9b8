# SPDX-License-Identifier: Apache-2.0
"""The APML transport loss with its gradients and its plan, and the exact assignment to measure it by.

CUDA-APML (arXiv:2512.19743) evaluates every pair of points. But what a row of its plan keeps are the points in a ball,
whose radius follows from the two nearest points. So two exact searches find the same plan, and memory grows only with
its entries.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, INT32, INT64, Given, Origin, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda import transport as cuda
from gpu3d.cuda.plan import Call
from gpu3d.neighbors import (
    NeighborIndex,
    check_clouds,
    check_no_empty_cloud,
    check_pair,
    distance_dtype,
    packed,
    working_origin,
)
from gpu3d.reference import transport as reference
from gpu3d.reference.chamfer import REDUCTIONS
from gpu3d.reference.transport import Options

MAX_ASSIGNED = 8192  # points of a cloud for emd, whose distances then take 512 MiB
FIRST_ROOM = 6  # capacity per point of the first search, before entries are counted; measured clouds need 2.4 to 3.7


class ApmlGradients(NamedTuple):
    """The result of `apml_value_and_grad`."""

    loss: Any  # float32 or float64 [] or [B]
    gradients: tuple[Any, Any]  # the gradients of pred and target, in their shapes and dtypes


class EmdGradients(NamedTuple):
    """The result of `emd_value_and_grad`."""

    loss: Any  # float32 or float64 [] or [B]
    gradients: tuple[Any, Any]  # the gradients of x and y, in their shapes and dtypes


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
    """The APML loss: the cost of a transport plan in which every point shares its mass among its nearest points.

    Parameters
    ----------
    pred, target : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16, on one device; NumPy, CuPy, torch, JAX or anything with
        ``__dlpack__``. Both have the same number of clouds, and no cloud is empty.
    pred_lengths, target_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud.
    p_min : float
        The least share of its mass that a point gives to its nearest point, if no other is as near. Between 0 and 1.
    threshold : float
        Entries below this fraction of the largest entry of their row or column are left out. Between 0 and 1.
    iterations : int
        Iterations of Sinkhorn's algorithm, at least 1.
    symmetrize : {"mean", "min"}
        How two plans become one: that of the rows, in which the points of pred share their mass, and that of the
        columns, in which the points of target do. "mean" takes their mean, "min" the smaller entry where both have one.
    reduction : {"mean", "sum", "none"}
        How the losses of the clouds are combined.
    max_entries : int, optional
        Capacity for the entries of rows and columns together. Default: entries are counted, and all of them fit.

    Returns
    -------
    array [], or [B] for reduction "none"
        An array of pred's library: float64 if pred or target is float64, and float32 otherwise. NaN if there are more
        entries than max_entries.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure. Without max_entries,
        also if there are more than max(64 * (N + M), 2**24) entries: the message names the row that has most.

    Notes
    -----
    C_ij is the distance of pred point i and target point j. Let d1 <= d2 be the two smallest distances of row i, over
    the M targets, and T_i = ln((M - 1) / (1 - p_min)) / max(d2 - d1, 1e-8). The weights of the row are
    k_ij = exp(-(C_ij - d1) T_i). Those above threshold are kept and divided by their sum: this is P1. P2 is the same
    over columns. A single point has weight 1.

    "mean" is (P1 + P2) / 2, where an entry that is not kept counts as 0. "min" is the smaller entry where both are
    kept; a row without such an entry keeps its P1, and a column its P2. Then, `iterations` times, rows are divided by
    their sum + 1e-8, and columns by their sum + 1e-8. The loss of a cloud is the sum of P_ij C_ij. It is not symmetric,
    because columns are divided last, and the mass of the plan is M.

    An entry is what P1 keeps or what P2 keeps; a pair that both keep counts twice. C is computed in float64, so CPU and
    GPU keep the same entries. If pred or target is float64, both are converted to float64, so that map coordinates keep
    their digits. Else they are converted to float32. The plan's values are float32 always.

    A point with NaN or inf makes the loss of its cloud NaN.

    Without max_entries the call synchronizes, because the host reads the number of entries. With max_entries it never
    waits for the GPU, and after a first call it can be captured in a CUDA graph.

    torch tensors and JAX tracers are passed on to `gpu3d.interop.torch.apml` and `gpu3d.interop.jax.apml`, which are
    differentiable.

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
    if (interop := _arrays.interop_of(pred, target)) is not None:
        return interop.apml(
            pred,
            target,
            pred_lengths=pred_lengths,
            target_lengths=target_lengths,
            p_min=p_min,
            threshold=threshold,
            iterations=iterations,
            symmetrize=symmetrize,
            reduction=reduction,
            max_entries=max_entries,
        )
    x, y = _read(pred, "pred"), _read(target, "target")
    options = p_min, threshold, iterations, symmetrize
    checked = check_apml(x, y, pred_lengths, target_lengths, *options, reduction, max_entries)
    loss, _, _ = apml_arrays(x, checked.pred_lengths, y, *checked[1:], with_grad=False)
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
        As in `apml`. With "none" the gradient of a cloud is that of its own loss.
    max_entries : int, optional
        As in `apml`.

    Returns
    -------
    ApmlGradients
        ``loss`` as in `apml`, and ``gradients`` of pred and of target, each in the shape, dtype and library of its
        array. All are NaN if there are more entries than max_entries.

    Raises
    ------
    TypeError, ValueError
        As in `apml`. A tensor that requires grad is a TypeError too, because these gradients are not differentiable.

    Notes
    -----
    The plan P is held constant, as published. The gradient of pred point i is the sum over j of the terms
    P_ij (x_i - y_j) / C_ij, and the gradient of target point j is minus the sum over i. Where C_ij = 0 the term is 0. A
    point with NaN or inf has gradient NaN and no entry in the plan. The same call gives the same bits. It synchronizes
    as `apml` does.

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
    _arrays.refuse_gradients("apml_value_and_grad", pred=pred, target=target)
    x, y = _read(pred, "pred"), _read(target, "target")
    options = p_min, threshold, iterations, symmetrize
    checked = check_apml(x, y, pred_lengths, target_lengths, *options, reduction, max_entries)
    loss, dpred, dtarget = apml_arrays(x, checked.pred_lengths, y, *checked[1:], with_grad=True)
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
    """The transport plan whose cost is the APML loss.

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
        As in `apml`, but more entries than max_entries are an error.

    Returns
    -------
    ApmlPlan
        ``rows`` and ``cols`` int32 [nnz] into the packed arrays, ``values`` float32 [nnz], in order of (row, col), and
        ``indptr`` int64 [N + 1]: the entries of pred row i are ``indptr[i]`` to ``indptr[i + 1]``. They are arrays of
        pred's library.

    Raises
    ------
    TypeError, ValueError
        As in `apml`; also for more entries than max_entries, and for a tensor that requires grad.

    Notes
    -----
    The pairs are the same on CPU and GPU. A point with NaN or inf has none. The call synchronizes, because the host
    reads the number of entries.

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
    _arrays.refuse_gradients("apml_plan", pred=pred, target=target)
    x, y = _read(pred, "pred"), _read(target, "target")
    options = p_min, threshold, iterations, symmetrize
    checked = check_apml(x, y, pred_lengths, target_lengths, *options, "none", max_entries)
    lengths = checked.pred_lengths, checked.target_lengths
    return ApmlPlan(*_plan_arrays(x, lengths[0], y, lengths[1], checked.options, checked.max_entries))


def emd(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    reduction: str = "mean",
) -> Any:
    """The earth mover's distance: the mean distance of the cheapest assignment of x to y, one to one.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        Coordinates: float32, float64, float16 or bfloat16, on one device; NumPy, CuPy, torch, JAX or anything with
        ``__dlpack__``. Each cloud of x has as many points as that of y, 1 to 8192.
    x_lengths, y_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud.
    reduction : {"mean", "sum", "none"}
        How the distances of the clouds are combined.

    Returns
    -------
    array [], or [B] for reduction "none"
        An array of x's library, in the unit of the points: float64 if x or y is float64, and float32 otherwise. NaN for
        a pair of clouds with a point that has NaN or inf.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.
    RuntimeError
        It is called under jax.jit, torch.compile(fullgraph=True) or while a CUDA graph is captured.

    Notes
    -----
    It is for evaluation and small clouds, and slow: it runs SciPy's ``linear_sum_assignment`` on the CPU, over all
    distances of a pair of clouds in float64. GPU arrays are copied to the host, so the call synchronizes.

    torch tensors are passed on to `gpu3d.interop.torch.emd`, which is differentiable. In JAX, `emd_value_and_grad`
    gives the gradients, outside of programs.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[1, 0, 0], [3, 0, 0]], np.float32)
    >>> gpu3d.emd(x, y)
    array(1.5, dtype=float32)
    """
    _refuse_tracers("emd", x=x, y=y)
    if (interop := _arrays.interop_of(x, y)) is not None:
        return interop.emd(x, y, x_lengths=x_lengths, y_lengths=y_lengths, reduction=reduction)
    given_x, given_y = _read(x, "x"), _read(y, "y")
    checked = check_emd(given_x, given_y, x_lengths, y_lengths, reduction)
    return emd_arrays(given_x, given_y, *checked, with_grad=False)[0]


def emd_value_and_grad(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    reduction: str = "mean",
) -> EmdGradients:
    """The earth mover's distance, and its gradients with respect to x and y.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `emd`.
    x_lengths, y_lengths : sequence of int, optional
        As in `emd`.
    reduction : {"mean", "sum", "none"}
        As in `emd`. With "none" the gradient of a cloud is that of its own distance.

    Returns
    -------
    EmdGradients
        ``loss`` as in `emd`, and ``gradients`` of x and of y, each in the shape, dtype and library of its array.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As in `emd`. A tensor that requires grad is a TypeError too, because these gradients are not differentiable.

    Notes
    -----
    The assignment is held constant. The gradient of x_i that is assigned to y_j is (x_i - y_j) / (n d), for a distance
    d and n points in the cloud, and that of y_j is minus it. It is 0 if d is 0, and NaN for all points of a pair of
    clouds with a point that has NaN or inf.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[1, 0, 1], [0, 0, 2]], np.float32)
    >>> loss, (dx, dy) = gpu3d.emd_value_and_grad(x, y)
    >>> loss, dx
    (array(1.5, dtype=float32), array([[ 0. ,  0. , -0.5],
           [ 0. ,  0. , -0.5]], dtype=float32))
    """
    _refuse_tracers("emd_value_and_grad", x=x, y=y)
    _arrays.refuse_gradients("emd_value_and_grad", x=x, y=y)
    given_x, given_y = _read(x, "x"), _read(y, "y")
    checked = check_emd(given_x, given_y, x_lengths, y_lengths, reduction)
    loss, dx, dy = emd_arrays(given_x, given_y, *checked, with_grad=True)
    return EmdGradients(loss, (dx, dy))


# ---- checks --------------------------------------------------------------------------------------------------------


class Apml(NamedTuple):
    """The checked options of `apml`."""

    pred_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    options: Options
    reduction: str
    max_entries: int | None


def check_apml(
    pred: Given | Spec,
    target: Given | Spec,
    pred_lengths: Any,
    target_lengths: Any,
    p_min: Any,
    threshold: Any,
    iterations: Any,
    symmetrize: Any,
    reduction: Any,
    max_entries: Any,
) -> Apml:
    """The options of `apml`, checked against the shapes and dtypes of pred and target."""
    pred_lengths = _check_clouds(pred, pred_lengths, "pred", "pred_lengths")
    target_lengths = _check_clouds(target, target_lengths, "target", "target_lengths")
    check_pair(pred, "pred", pred_lengths, target, "target", target_lengths)
    p_min = _check_share(p_min, "p_min")
    threshold = _check_share(threshold, "threshold", ": 0, all pairs, is gpu3d.reference.transport.dense")
    iterations = _arrays.check_integer(iterations, "iterations")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    _arrays.check_choice(symmetrize, reference.SYMMETRIZATIONS, "symmetrize")
    _arrays.check_choice(reduction, REDUCTIONS, "reduction")
    if max_entries is not None and (max_entries := _arrays.check_integer(max_entries, "max_entries")) < 0:
        raise ValueError(f"max_entries must not be negative, got {max_entries}.")
    options = Options(p_min, threshold, iterations, symmetrize)
    return Apml(pred_lengths, target_lengths, options, reduction, max_entries)


class Emd(NamedTuple):
    """The checked options of `emd`."""

    x_lengths: tuple[int, ...]
    y_lengths: tuple[int, ...]
    reduction: str


def check_emd(x: Given | Spec, y: Given | Spec, x_lengths: Any, y_lengths: Any, reduction: Any) -> Emd:
    """The options of `emd`. Each cloud of x must have as many points as that of y, and not too many."""
    x_lengths = _check_clouds(x, x_lengths, "x", "x_lengths")
    y_lengths = _check_clouds(y, y_lengths, "y", "y_lengths")
    check_pair(x, "x", x_lengths, y, "y", y_lengths)
    _arrays.check_choice(reduction, REDUCTIONS, "reduction")
    for b, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        if n != m:
            raise ValueError(
                f"x and y must have as many points, because they are assigned one to one, got {n} and {m} in cloud {b}."
            )
        if n > MAX_ASSIGNED:
            raise ValueError(
                f"x and y must be at most {MAX_ASSIGNED} points, got {n} in cloud {b}: take a sample, or apml."
            )
    return Emd(x_lengths, y_lengths, reduction)


def _refuse_tracers(function: str, **named: Any) -> None:
    """Raise an error for JAX tracers: their points cannot be copied to the host."""
    jax = sys.modules.get("jax")
    for name, x in named.items():
        if jax is not None and isinstance(x, jax.core.Tracer):
            raise RuntimeError(
                f"{name} is a JAX tracer, and {function} assigns points on the host: call it outside of jax.jit, "
                "jax.grad and jax.vmap. Gradients come from gpu3d.emd_value_and_grad; apml and chamfer can be traced."
            )


def _read(points: Any, name: str) -> Given:
    if isinstance(points, NeighborIndex):
        raise TypeError(f"{name} must be an array, got NeighborIndex: pass the points that it was made of.")
    return _arrays.read(points, name)


def _check_clouds(points: Given | Spec, lengths: Any, name: str, lengths_name: str) -> tuple[int, ...]:
    """The lengths of the clouds, of which none may be empty."""
    checked = check_clouds(points, lengths, name, lengths_name)
    check_no_empty_cloud(checked, name)
    return checked


def _check_share(share: Any, name: str, cure: str = "") -> float:
    """The share as a float, if it is between 0 and 1."""
    checked = _arrays.check_number(share, name)
    if not 0 < checked < 1:
        received = _arrays.shown(share)
        raise ValueError(f"{name} must be between 0 and 1, neither of them included, got {received}{cure}.")
    return checked


# ---- losses and gradients ------------------------------------------------------------------------------------------


def apml_results(
    pred: Given | Spec, target: Given | Spec, clouds: Any, reduction: str, with_grad: bool
) -> tuple[Spec, Spec, Spec]:
    """The specs of the loss and of both gradients, which have no elements if not asked for; sizes may be symbols."""
    loss = Spec((clouds,) if reduction == "none" else (), distance_dtype(pred, target))
    if with_grad:
        return loss, Spec(pred.shape, pred.dtype), Spec(target.shape, target.dtype)
    return loss, Spec((0,), pred.dtype), Spec((0,), target.dtype)


_kept_results = functools.lru_cache(maxsize=256)(apml_results)  # for sizes that are ints


def apml_arrays(
    pred: Given,
    pred_lengths: tuple[int, ...],
    target: Given,
    target_lengths: tuple[int, ...],
    options: Options,
    reduction: str,
    max_entries: int | None,
    with_grad: bool,
) -> list[Any]:
    """The loss, of pred's library, and the gradients of pred and target, each of its array's library."""
    ordinal = pred.origin.device
    if ordinal is not None and max_entries is not None:
        call, results = apml_call(
            pred, pred_lengths, target, target_lengths, options, reduction, max_entries, with_grad
        )
        loss, dpred, dtarget = launcher.launch(call, (pred, target), results)
        return [loss, dpred, _arrays.passed_on(dtarget, pred.origin.library, target.origin)]
    of_pred, of_target = pred.spec, target.spec
    results = _kept_results(of_pred, of_target, len(pred_lengths), reduction, with_grad)
    if ordinal is None:
        clouds = packed(pred), pred_lengths, packed(target), target_lengths
        arrays = reference.apml(*clouds, options, reduction, max_entries, with_grad)
        if not with_grad:
            arrays = *arrays, np.empty(0, pred.dtype), np.empty(0, target.dtype)
        origins = pred.origin, pred.origin, target.origin
        return [
            _arrays.leave(x.reshape(spec.shape), origin)
            for x, spec, origin in zip(arrays, results, origins, strict=True)
        ]
    pair = cuda.pair(of_pred, pred_lengths, of_target, target_lengths, launcher.device(ordinal))
    found, total = _found(pred, target, pair, options, None)
    call = cuda.transport(pair, options, reduction, with_grad, total)
    made = launcher.launch(call, found, results, pred.origin)
    loss, dpred, dtarget = made
    return [loss, dpred, _arrays.passed_on(dtarget, pred.origin.library, target.origin)]


def apml_call(
    pred: Given,
    pred_lengths: tuple[int, ...],
    target: Given,
    target_lengths: tuple[int, ...],
    options: Options,
    reduction: str,
    max_entries: int,
    with_grad: bool,
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `apml_arrays` with max_entries, and the specs of its results."""
    of_pred, of_target, device = pred.spec, target.spec, launcher.device(pred.origin.device)
    both = of_pred, pred_lengths, of_target, target_lengths
    call = cuda.apml(*both, options, reduction, max_entries, with_grad, device)
    return call, _kept_results(of_pred, of_target, len(pred_lengths), reduction, with_grad)


def _found(
    pred: Given, target: Given, pair: cuda.Pair, options: Options, max_entries: int | None
) -> tuple[list[Given], int]:
    """The results of `cuda.search`, which are the entries of both sides, and their number. Too many are an error."""
    points = sum(map(sum, pair.lengths))
    limit = reference.default_limit(points) if max_entries is None else max_entries
    room = cuda.capacity(min(limit, FIRST_ROOM * points))
    origin = working_origin(pred.origin)
    while True:
        results = cuda.search_results(pair, room)
        made = launcher.launch(cuda.search(pair, options, room), (pred, target), results, origin)
        found = [_arrays.read(x, "entries") for x in made]
        with _arrays.on(origin):
            total = int(made[1][0])  # synchronizes
        if total > limit:
            raise _too_many_entries(found[0], found[1], pair, total, limit, max_entries)
        if total <= room:
            return found, total
        room = cuda.capacity(total)


def _too_many_entries(
    index: Given, kept: Given, pair: cuda.Pair, total: int, limit: int, max_entries: int | None
) -> Exception:
    """The error for too many entries; it names the point that keeps most."""
    layouts = pair.batches.layouts
    rows = _arrays.download(index).view(np.int32)
    counts = _arrays.download(kept).view(np.uint8)
    sides = zip(("pred", "target"), cuda.points_of_slots(pair), cuda.kept_offsets(layouts).counts, strict=True)
    most = []
    for name, points, at in sides:
        indices = rows[points]
        of_slots = counts[at : at + 4 * len(indices)].view(np.uint32)
        slot = np.lexsort((indices, -of_slots.astype(np.int64)))[0]
        most.append((int(of_slots[slot]), name, int(indices[slot])))
    count, name, row = max(most, key=lambda candidate: candidate[0])
    return reference.too_many_entries(total, limit, max_entries, name, row, count)


# ---- the way back --------------------------------------------------------------------------------------------------


def apml_backward_results(dpred: Given | Spec, dtarget: Given | Spec) -> tuple[Spec, Spec]:
    """The specs of the gradients of pred and target; sizes may be symbols."""
    return Spec(dpred.shape, dpred.dtype), Spec(dtarget.shape, dtarget.dtype)


def apml_backward_arrays(
    dloss: Given, dpred: Given, dtarget: Given, pred_lengths: tuple[int, ...], target_lengths: tuple[int, ...]
) -> list[Any]:
    """The gradients of `apml_arrays` times dloss []; if dloss is [B], those of each cloud times its own."""
    check_apml_backward(dloss, dpred, dtarget, pred_lengths)
    origin = dpred.origin
    if origin.device is None:
        sides = (dpred.array, pred_lengths), (dtarget.array, target_lengths)
        return [_arrays.leave(reference.apml_backward(dloss.array, *side), origin) for side in sides]
    call, results = apml_backward_call(dloss, dpred, dtarget, pred_lengths, target_lengths)
    return launcher.launch(call, (dloss, dpred, dtarget), results, origin)


def check_apml_backward(dloss: Given, dpred: Given, dtarget: Given, pred_lengths: tuple[int, ...]) -> None:
    """Check that dloss fits the loss, and that all are on one device."""
    if dloss.ndim and dloss.shape != (len(pred_lengths),):
        raise ValueError(
            f"dloss must have shape [] or [{len(pred_lengths)}], one for each cloud, got {list(dloss.shape)}."
        )
    _arrays.check_floats(dloss, "dloss")
    _arrays.check_same_device(dloss=dloss.origin, dpred=dpred.origin, dtarget=dtarget.origin)


def apml_backward_call(
    dloss: Given, dpred: Given, dtarget: Given, pred_lengths: tuple[int, ...], target_lengths: tuple[int, ...]
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `apml_backward_arrays`, and the specs of its results."""
    # torch multiplies a tensor and a 0-d tensor in the dtype of the former.
    rounded = dloss.ndim == 0 and dpred.origin.library == "torch"
    call = cuda.apml_backward(dloss.spec, dpred.spec, dtarget.spec, pred_lengths, target_lengths, rounded)
    return call, apml_backward_results(dpred, dtarget)


# ---- the assignment ------------------------------------------------------------------------------------------------


def emd_arrays(
    x: Given, y: Given, x_lengths: tuple[int, ...], y_lengths: tuple[int, ...], reduction: str, with_grad: bool
) -> list[Any]:
    """The loss, of x's library, and if with_grad the gradients of x and y, each of its array's library."""
    _refuse_capture(x.origin)
    points = [_arrays.download(side).reshape(-1, side.shape[-1]) for side in (x, y)]  # synchronizes
    loss, *gradients = reference.emd(points[0], x_lengths, points[1], y_lengths, reduction, with_grad)
    made = [(loss, x.origin)]
    made += [(dz.reshape(z.shape), z.origin) for dz, z in zip(gradients, (x, y), strict=False)]
    return [_uploaded(array, origin) for array, origin in made]


def _refuse_capture(origin: Origin) -> None:
    """Raise an error while a CUDA graph is captured on the current stream."""
    if origin.device is None:
        return
    with _arrays.on(origin):
        if sys.modules["cupy"].cuda.get_current_stream().is_capturing():
            raise RuntimeError(
                "emd assigns points on the host, which a CUDA graph cannot do: call it outside of the capture, or "
                "capture apml or chamfer."
            )


def _uploaded(array: np.ndarray, origin: Origin) -> Any:
    """A host array in the origin's library and on its device."""
    if origin.library == "torch" and origin.device is not None:
        return _arrays.leave(array, Origin("torch", None)).cuda(origin.device)
    return _arrays.upload(array, origin)


# ---- the plan ------------------------------------------------------------------------------------------------------


def _plan_arrays(
    pred: Given,
    pred_lengths: tuple[int, ...],
    target: Given,
    target_lengths: tuple[int, ...],
    options: Options,
    max_entries: int | None,
) -> list[Any]:
    """The arrays rows, cols, values and indptr, of pred's library."""
    origin = pred.origin
    if origin.device is None:
        clouds = packed(pred), pred_lengths, packed(target), target_lengths
        return [_arrays.leave(x, origin) for x in reference.apml_plan(*clouds, options, max_entries)]
    pair = cuda.pair(pred.spec, pred_lengths, target.spec, target_lengths, launcher.device(origin.device))
    found, total = _found(pred, target, pair, options, max_entries)
    index = found[0]
    call, results = cuda.entries(pair, options, total), cuda.entries_results(total)
    made = [_arrays.read(x, "entries") for x in launcher.launch(call, found, results, index.origin)]
    with _arrays.on(origin):
        entries, row = (_arrays.as_cupy(x) for x in made)
        points = [_arrays.as_cupy(index).view(INT32)[place] for place in cuda.points_of_slots(pair)]
        plan = _sorted(points, entries[:total], row[:total], sum(pred_lengths))
        return [_arrays.leave(x, origin) for x in plan]


def _sorted(points: Sequence[Any], entries: Any, row: Any, count: int) -> tuple[Any, Any, Any, Any]:
    """The plan sorted by (row, col) with CuPy, from the `points` of both sides' slots. pred has `count` points."""
    import cupy

    there = row >= 0
    rows, columns = points[0][row[there]], points[1][entries[:, 0][there]]
    values = entries[:, 1].view(FLOAT32)[there]
    order = cupy.lexsort(cupy.stack((columns, rows)))
    rows = rows[order]
    indptr = cupy.searchsorted(rows, cupy.arange(count + 1, dtype=INT32)).astype(INT64)
    return rows, columns[order], values[order], indptr
