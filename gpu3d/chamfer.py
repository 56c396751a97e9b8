# SPDX-License-Identifier: Apache-2.0
"""The Chamfer distance between point clouds, and its gradients.

It is exact: the nearest neighbours are those of brute force, and the same call gives the same bits on CPU and GPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT64, INT32, Given, Spec
from gpu3d.cuda import chamfer as cuda
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call
from gpu3d.neighbors import (
    Clouds,
    NeighborIndex,
    check_clouds,
    check_no_empty_cloud,
    check_pair,
    distance_dtype,
    packed,
    read_points,
    trees,
)
from gpu3d.reference import chamfer as reference
from gpu3d.reference.neighbors import in_parallel, nearest

EMPTY = ("error", "zero")
ZERO = ", or pass empty='zero' for a loss of 0"  # the cure for an empty cloud


class ChamferGradients(NamedTuple):
    """The result of `chamfer_value_and_grad`."""

    loss: Any  # float32 or float64 [] or [B]
    gradients: tuple[Any, Any]  # the gradients of x and y, in their shapes and dtypes


class ChamferDistances(NamedTuple):
    """The result of `chamfer` with reduction "points"."""

    x: Any  # float32 or float64 [N], from each point of x to the nearest of y; None for direction "y_to_x"
    y: Any  # float32 or float64 [M], from each point of y to the nearest of x; None for direction "x_to_y"


def chamfer(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
    direction: str = "both",
    empty: str = "error",
) -> Any:
    """The Chamfer distance: mean distance from x to its nearest in y, plus mean distance from y to its nearest in x.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        Coordinates: float32, float64, float16 or bfloat16, on one device. Both have the same number of clouds.
    x_lengths, y_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud. With a NeighborIndex they are left out.
    squared : bool
        Whether to take squared distances.
    reduction : {"mean", "sum", "none", "points"}
        How the losses of the clouds are combined. "none" is the loss of each cloud, and "points" the distance of each
        point.
    direction : {"both", "x_to_y", "y_to_x"}
        Which of the two means to take. Only their points search, so one of them takes half the time of both.
    empty : {"error", "zero"}
        What a cloud without points is, in x or in y: an error, or a pair of clouds whose loss and distances are 0.

    Returns
    -------
    array [], or [B] for reduction "none"
        An array of the library of x: float64 if x or y is float64, and float32 otherwise. The same call gives the same
        bits on CPU and GPU.
    ChamferDistances
        For reduction "points": ``x`` [N] and ``y`` [M], in the same dtype. The direction that is left out is None.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Distances are those of `knn`, summed in float64 in a fixed order. If x or y is float64, both are converted to
    float64, and all of the search is in float64: map coordinates keep their digits, and a stray point far away changes
    no other distance. Else it is in float32. A point with NaN or inf that searches makes the loss NaN. The mean over no
    clouds is NaN. A call never waits for the GPU. After a first call it can be captured in a CUDA graph.

    Distances are Euclidean, in two or three dimensions. For other norms, and for features, take ``torch.cdist`` or
    ``scipy.spatial.cKDTree``.

    ``empty="zero"`` is what PyTorch3D's ``chamfer_distance`` does: an empty cloud counts as one of the clouds of
    reduction "mean", with a loss of 0.

    torch tensors and JAX tracers are passed on to `gpu3d.interop.torch.chamfer` and `gpu3d.interop.jax.chamfer`, which
    are differentiable for every reduction.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[0, 0, 2]], np.float32)
    >>> gpu3d.chamfer(x, y, squared=True)
    array(8.5, dtype=float32)
    >>> gpu3d.chamfer(x, y, squared=True, direction="x_to_y")
    array(4.5, dtype=float32)
    >>> gpu3d.chamfer(x, y, squared=True, reduction="points").x
    array([4., 5.], dtype=float32)
    """
    if (interop := _arrays.interop_of(x, y)) is not None:
        lengths: dict[str, Any] = {"x_lengths": x_lengths, "y_lengths": y_lengths}
        options: dict[str, Any] = {"reduction": reduction, "direction": direction, "empty": empty}
        return interop.chamfer(x, y, squared=squared, **options, **lengths)
    return plain_chamfer(x, y, x_lengths, y_lengths, squared, reduction, direction, empty)


def chamfer_value_and_grad(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
    direction: str = "both",
    empty: str = "error",
) -> ChamferGradients:
    """The Chamfer distance, and its gradients with respect to x and y.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        As in `chamfer`.
    x_lengths, y_lengths : sequence of int, optional
        As in `chamfer`.
    squared : bool
        As in `chamfer`.
    reduction : {"mean", "sum", "none"}
        As in `chamfer`. With "none" the gradient of a cloud is that of its own loss.
    direction : {"both", "x_to_y", "y_to_x"}
        As in `chamfer`. Both x and y have gradients in every direction.
    empty : {"error", "zero"}
        As in `chamfer`. Points that face an empty cloud have gradient 0.

    Returns
    -------
    ChamferGradients
        ``loss`` as in `chamfer`, and ``gradients`` of x and of y, each in the shape, dtype and library of its array.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    If several points are nearest, the one with the lowest index gets the gradient. At distance 0 the gradient is 0. A
    point with NaN or inf that searches has gradient NaN and changes no other gradient. The same call gives the same
    bits: the contributions to a point are added as integer multiples of a power of two, so their order does not matter.
    For clouds of fewer than 2^20 points that costs less than 2^-40 of the cloud's largest contribution, which float64
    gradients may show: with squared=True a stray point's contribution is twice its distance.
    Tensors that require grad are refused: use `chamfer` for them. A call never waits for the GPU. After a first call it
    can be captured in a CUDA graph.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[0, 0, 2]], np.float32)
    >>> loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, squared=True)
    >>> dx
    array([[ 0.,  0., -6.],
           [ 1.,  0., -2.]], dtype=float32)
    >>> dy
    array([[-1.,  0.,  8.]], dtype=float32)
    """
    _arrays.refuse_gradients("chamfer_value_and_grad", x=x, y=y)
    given_x, given_y = read_points(x, "x"), read_points(y, "y")
    checked = check_chamfer(given_x, given_y, x_lengths, y_lengths, squared, reduction, direction, empty)
    loss, dx, dy = _value_and_gradients(given_x, given_y, *checked)
    return ChamferGradients(loss, (dx, dy))


def plain_chamfer(
    x: Any, y: Any, x_lengths: Any, y_lengths: Any, squared: Any, reduction: Any, direction: Any, empty: Any
) -> Any:
    """`chamfer` without gradients, of arrays and indices of any library."""
    given_x, given_y = read_points(x, "x"), read_points(y, "y")
    if is_points(reduction):
        of_points = check_points(given_x, given_y, x_lengths, y_lengths, squared, direction, empty)
        distances, _ = points_arrays(given_x, given_y, *of_points)
        with _arrays.on(given_x.origin):  # JAX makes the device of an array that it cuts current
            return distances_of(distances, sum(of_points.x_lengths), direction)
    checked = check_chamfer(given_x, given_y, x_lengths, y_lengths, squared, reduction, direction, empty)
    return chamfer_arrays(given_x, given_y, *checked)[0]


# ---- checks --------------------------------------------------------------------------------------------------------


class Chamfer(NamedTuple):
    """The checked options of `chamfer`."""

    x_lengths: tuple[int, ...]
    y_lengths: tuple[int, ...]
    squared: bool
    reduction: str
    direction: str


class Points(NamedTuple):
    """The checked options of `chamfer` with reduction "points"."""

    x_lengths: tuple[int, ...]
    y_lengths: tuple[int, ...]
    squared: bool
    direction: str


def is_points(reduction: Any) -> bool:
    """Whether the reduction is "points"."""
    return isinstance(reduction, str) and reduction == reference.POINTS


def check_points(
    x: Clouds, y: Clouds, x_lengths: Any, y_lengths: Any, squared: Any, direction: Any, empty: Any
) -> Points:
    """The options of `chamfer`, except for the reduction, checked against the shapes and dtypes of the arrays."""
    x_lengths = check_clouds(x, x_lengths, "x", "x_lengths")
    y_lengths = check_clouds(y, y_lengths, "y", "y_lengths")
    check_pair(x, "x", x_lengths, y, "y", y_lengths)
    squared = _arrays.check_flag(squared, "squared")
    _arrays.check_choice(direction, tuple(reference.DIRECTIONS), "direction")
    _arrays.check_choice(empty, EMPTY, "empty")
    if empty == "error":
        check_no_empty_cloud(x_lengths, "x", ZERO)
        check_no_empty_cloud(y_lengths, "y", ZERO)
    return Points(x_lengths, y_lengths, squared, direction)


def check_chamfer(
    x: Clouds,
    y: Clouds,
    x_lengths: Any,
    y_lengths: Any,
    squared: Any,
    reduction: Any,
    direction: Any = "both",
    empty: Any = "error",
) -> Chamfer:
    """The options of `chamfer` with a loss, checked against the shapes and dtypes of the arrays."""
    checked = check_points(x, y, x_lengths, y_lengths, squared, direction, empty)
    _arrays.check_choice(reduction, (*reference.REDUCTIONS, reference.POINTS), "reduction")
    if is_points(reduction):
        raise ValueError(
            "reduction 'points' is for chamfer only, because it gives many distances and not a loss, got it for a "
            "gradient of the loss: take 'none' for the loss of each cloud, or differentiate chamfer in torch or JAX."
        )
    return Chamfer(*checked[:3], reduction, direction)


def check_chamfer_backward(
    dloss: Given | Spec | None,
    x: Given | Spec,
    y: Given | Spec,
    residuals: Given | Spec,
    x_lengths: Any,
    y_lengths: Any,
    squared: Any,
    reduction: Any,
    direction: Any,
) -> Chamfer:
    """Check the arguments of the gradients as `check_chamfer` does, and that residuals and dloss fit them."""
    checked = check_chamfer(x, y, x_lengths, y_lengths, squared, reduction, direction, "zero")
    sizes = sum(checked.x_lengths), sum(checked.y_lengths), len(checked.x_lengths)
    loss, made = chamfer_results(*sizes, reduction, direction, distance_dtype(x, y))
    _check_saved("residuals", residuals, made)
    if dloss is not None:
        if dloss.shape != loss.shape:
            raise ValueError(f"dloss must have the loss's shape, got {list(dloss.shape)} for reduction {reduction!r}.")
        _arrays.check_floats(dloss, "dloss")
    _check_devices(x=x, y=y, dloss=dloss, residuals=residuals)
    return checked


def check_points_backward(
    ddistances: Given | Spec,
    x: Given | Spec,
    y: Given | Spec,
    distances: Given | Spec,
    nearest: Given | Spec,
    x_lengths: Any,
    y_lengths: Any,
    squared: Any,
    direction: Any,
) -> Points:
    """Check the arguments of the gradients as `check_points` does, and that the saved arrays and ddistances fit."""
    checked = check_points(x, y, x_lengths, y_lengths, squared, direction, "zero")
    sizes = sum(checked.x_lengths), sum(checked.y_lengths)
    of_distances, of_nearest = points_results(*sizes, direction, distance_dtype(x, y))
    _check_saved("distances", distances, of_distances)
    _check_saved("nearest", nearest, of_nearest)
    if ddistances.shape != of_distances.shape:
        raise ValueError(
            f"ddistances must have the shape of distances, {list(distances.shape)}, got {list(ddistances.shape)}."
        )
    _arrays.check_floats(ddistances, "ddistances")
    _check_devices(x=x, y=y, ddistances=ddistances, distances=distances, nearest=nearest)
    return checked


def _check_saved(name: str, saved: Given | Spec, made: Spec) -> None:
    """Check that an array can be what the forward call saved."""
    if saved.shape != made.shape or saved.dtype != made.dtype:
        raise ValueError(
            f"{name} must be {made.dtype} {list(made.shape)}, of the same clouds, got {saved.dtype} "
            f"{list(saved.shape)}."
        )


def _check_devices(**given: Given | Spec | None) -> None:
    _arrays.check_same_device(**{name: z.origin for name, z in given.items() if isinstance(z, Given)})


# ---- arrays --------------------------------------------------------------------------------------------------------


def chamfer_results(n: Any, m: Any, clouds: int, reduction: str, direction: str, dtype: np.dtype) -> tuple[Spec, Spec]:
    """The specs of loss and residuals, for n and m points in `clouds` clouds; n and m may be symbols.

    `dtype` is what distances and the loss are in, from `distance_dtype`.
    """
    of_number = dtype.itemsize // 4
    words = sum([(of_number + 1) * points + of_number * clouds for points in _searching(n, m, direction)])
    return Spec((clouds,) if reduction == "none" else (), dtype), Spec((words,), INT32)


def points_results(n: Any, m: Any, direction: str, dtype: np.dtype) -> tuple[Spec, Spec]:
    """The specs of distances in this dtype and nearest indices, for n and m points, which may be symbols."""
    points = sum(_searching(n, m, direction))
    return Spec((points,), dtype), Spec((points,), INT32)


def _searching(n: Any, m: Any, direction: str) -> list[Any]:
    """The numbers of points of the sides that search."""
    return list(itertools.compress((n, m), reference.DIRECTIONS[direction]))


_kept_results = functools.lru_cache(maxsize=256)(chamfer_results)  # for numbers of points that are ints


def chamfer_arrays(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
) -> list[Any]:
    """The loss, and the residuals that `chamfer_backward_arrays` needs, as arrays of x's library."""
    origin = x.origin
    if origin.device is None:
        arrays = _on_the_host(x, y, x_lengths, y_lengths, squared, reduction, direction)
        return [_arrays.leave(array, origin) for array in arrays]
    sizes = sum(x_lengths), sum(y_lengths), len(x_lengths)
    specs = _kept_results(*sizes, reduction, direction, distance_dtype(x, y))
    return _launch(x, y, x_lengths, y_lengths, squared, reduction, direction, specs, gradients=False)


def chamfer_call(
    x: Given,
    y: Given,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `chamfer_arrays` of two arrays, and the specs of its results."""
    options = squared, reduction, direction, launcher.device(x.origin.device)
    call = cuda.chamfer(x.spec, x_lengths, y.spec, y_lengths, *options)
    sizes = sum(x_lengths), sum(y_lengths), len(x_lengths)
    return call, _kept_results(*sizes, reduction, direction, distance_dtype(x, y))


def chamfer_backward_results(x: Given | Spec, y: Given | Spec) -> tuple[Spec, Spec]:
    """The specs of the gradients of x and y."""
    return Spec(x.shape, x.dtype), Spec(y.shape, y.dtype)


def chamfer_backward_arrays(
    dloss: Given | None,
    x: Given,
    y: Given,
    residuals: Given,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
) -> list[Any]:
    """The gradients of x and y, each of its array's library. dloss is the gradient of the loss; None means 1."""
    options = x_lengths, y_lengths, squared, reduction, direction
    if x.origin.device is None:
        asked = None if dloss is None else dloss.array.astype(distance_dtype(x, y), copy=False)
        arrays = reference.chamfer_backward(asked, packed(x), packed(y), residuals.array, *options)
        return [_arrays.leave(dz.reshape(z.shape), z.origin) for dz, z in zip(arrays, (x, y), strict=True)]
    call, results = chamfer_backward_call(dloss, x, y, residuals, *options)
    dx, dy = launcher.launch(call, (dloss, x, y, residuals), results, x.origin)
    return [dx, _arrays.passed_on(dy, x.origin.library, y.origin)]


def chamfer_backward_call(
    dloss: Given | None, x: Given, y: Given, residuals: Given, *options: Any
) -> tuple[Call, tuple[Spec, ...]]:
    """What a GPU runs for `chamfer_backward_arrays` with these options, and the specs of its results."""
    call = cuda.chamfer_backward(None if dloss is None else dloss.spec, x.spec, y.spec, residuals.spec, *options)
    return call, chamfer_backward_results(x, y)


def _value_and_gradients(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
) -> list[Any]:
    """The loss, of x's library, and the gradients of x and y, each of its array's library."""
    origin, options = x.origin, (x_lengths, y_lengths, squared, reduction, direction)
    if origin.device is None:
        loss, residuals = _on_the_host(x, y, *options)
        sides = [z.given if isinstance(z, NeighborIndex) else z for z in (x, y)]
        gradients = reference.chamfer_backward(None, packed(sides[0]), packed(sides[1]), residuals, *options)
        made = [_arrays.leave(dz.reshape(z.shape), z.origin) for dz, z in zip(gradients, sides, strict=True)]
        return [_arrays.leave(loss, origin), *made]
    loss_spec, _ = _kept_results(0, 0, len(x_lengths), reduction, direction, distance_dtype(x, y))
    specs = loss_spec, _arrays.kept_spec(x.shape, x.dtype), _arrays.kept_spec(y.shape, y.dtype)
    loss, dx, dy = _launch(x, y, *options, specs, gradients=True)
    return [loss, dx, _arrays.passed_on(dy, x.origin.library, y.origin)]


def _on_the_host(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
) -> tuple[Any, Any]:
    """The loss and the residuals in NumPy."""
    of_x, of_y = nearest_on_the_host(x, y, x_lengths, y_lengths, direction)
    return reference.chamfer(of_x, x_lengths, of_y, y_lengths, squared, reduction)


def nearest_on_the_host(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    direction: str,
) -> list[reference.Found]:
    """Squared distances and indices of the nearest points, for x and y; None for a side that does not search."""
    wide = distance_dtype(x, y) == FLOAT64
    sides, others = ((x, x_lengths), (y, y_lengths)), ((y, y_lengths, wide), (x, x_lengths, wide))
    searching = [i for i, searches in enumerate(reference.DIRECTIONS[direction]) if searches]
    found: list[reference.Found] = [None, None]
    for i, clouds in zip(searching, in_parallel(trees, [others[i] for i in searching]), strict=True):
        z, lengths = sides[i]
        d2, indices = nearest(packed(z.given if isinstance(z, NeighborIndex) else z, wide), lengths, clouds, 1)
        found[i] = d2[:, 0], indices[:, 0]
    return found


def _launch(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    direction: str,
    specs: Sequence[Spec],
    *,
    gradients: bool,
) -> list[Any]:
    """Launch the call whose first result is the loss; returns all results."""
    (of_x, of_y), inputs, indexed = inputs_of(x, y)
    options = squared, reduction, direction, launcher.device(of_x.origin.device)
    call = cuda.chamfer(of_x.spec, x_lengths, of_y.spec, y_lengths, *options, **indexed, gradients=gradients)
    return launcher.launch(call, inputs, specs)


def inputs_of(
    x: Given | NeighborIndex, y: Given | NeighborIndex
) -> tuple[tuple[Given, Given], list[Given], dict[str, Any]]:
    """The points of both sides, the inputs of a call on a GPU, and which sides are indices."""
    of_x, of_y = (z.given if isinstance(z, NeighborIndex) else z for z in (x, y))
    # An index of float64 points is for searches in float64, and others for those in float32.
    wide = distance_dtype(x, y) == FLOAT64
    x_index, y_index = (isinstance(z, NeighborIndex) and (z.dtype == FLOAT64) == wide for z in (x, y))
    indices = [z.search for z, used in ((x, x_index), (y, y_index)) if isinstance(z, NeighborIndex) and used]
    return (of_x, of_y), [of_x, of_y, *indices], {"x_index": x_index, "y_index": y_index}


# ---- the distance of each point ------------------------------------------------------------------------------------


def distances_of(distances: Any, n: int, direction: str) -> ChamferDistances:
    """The distances of the points of x and y, from those of `points_arrays`; x has n points."""
    if direction == "both":
        return ChamferDistances(distances[:n], distances[n:])
    return ChamferDistances(distances, None) if direction == "x_to_y" else ChamferDistances(None, distances)


def points_arrays(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    direction: str,
) -> list[Any]:
    """The distances of the points that search, x's first, and the indices of their nearest, of x's library."""
    origin = x.origin
    if origin.device is None:
        found = nearest_on_the_host(x, y, x_lengths, y_lengths, direction)
        made = reference.points(found[0], x_lengths, found[1], y_lengths, squared)
        return [_arrays.leave(z, origin) for z in made]
    (of_x, of_y), inputs, indexed = inputs_of(x, y)
    options = squared, direction, launcher.device(origin.device)
    call = cuda.points(of_x.spec, x_lengths, of_y.spec, y_lengths, *options, **indexed)
    sizes = sum(x_lengths), sum(y_lengths)
    return launcher.launch(call, inputs, points_results(*sizes, direction, distance_dtype(x, y)))


def points_backward_arrays(
    ddistances: Given,
    x: Given,
    y: Given,
    distances: Given,
    nearest: Given,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    direction: str,
) -> list[Any]:
    """The gradients of x and y, each of its array's library. ddistances is the gradient of the distances."""
    options = x_lengths, y_lengths, squared, direction
    if x.origin.device is None:
        given = ddistances.array.astype(distances.dtype, copy=False)
        arrays = given, packed(x), packed(y), distances.array, nearest.array
        made = reference.points_backward(*arrays, *options)
        return [_arrays.leave(dz.reshape(z.shape), z.origin) for dz, z in zip(made, (x, y), strict=True)]
    call = cuda.points_backward(ddistances.spec, x.spec, y.spec, distances.spec, nearest.spec, *options)
    inputs = ddistances, x, y, distances, nearest
    dx, dy = launcher.launch(call, inputs, chamfer_backward_results(x, y), x.origin)
    return [dx, _arrays.passed_on(dy, x.origin.library, y.origin)]
