# SPDX-License-Identifier: Apache-2.0
"""The Chamfer distance between point clouds, and its gradients.

It is exact: the nearest neighbours are those of brute force, and the same call gives the same bits on CPU and GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, INT32, Given, Spec
from gpu3d.cuda import chamfer as cuda
from gpu3d.cuda import launcher
from gpu3d.neighbors import (
    Clouds,
    NeighborIndex,
    check_clouds,
    check_no_empty_cloud,
    check_pair,
    packed,
    read_points,
    trees,
)
from gpu3d.reference import chamfer as reference


class ChamferGradients(NamedTuple):
    """The result of `chamfer_value_and_grad`."""

    loss: Any  # float32 [] or [B]
    gradients: tuple[Any, Any]  # the gradients of x and y, in their shapes and dtypes


def chamfer(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
) -> Any:
    """The Chamfer distance: mean distance from x to its nearest in y, plus mean distance from y to its nearest in x.

    Parameters
    ----------
    x, y : array [N, 3], [N, 2], [B, n, 3] or [B, n, 2], or NeighborIndex
        Coordinates: float32, float64, float16 or bfloat16, on one device. Both have the same number of clouds, and no
        cloud is empty.
    x_lengths, y_lengths : sequence of int, optional
        Points of each cloud, host integers. Default: one cloud. With a NeighborIndex they are left out.
    squared : bool
        Whether to take squared distances.
    reduction : {"mean", "sum", "none"}
        How the losses of the clouds are combined.

    Returns
    -------
    array float32 [], or [B] for reduction "none"
        An array of the library of x. The same call gives the same bits on CPU and GPU.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Distances are those of `knn`, summed in float64 in a fixed order. A point with NaN or inf makes the loss NaN. The
    mean over no clouds is NaN. A call never waits for the GPU. After a first call it can be captured in a CUDA graph.

    Examples
    --------
    >>> x = np.array([[0, 0, 0], [1, 0, 0]], np.float32)
    >>> y = np.array([[0, 0, 2]], np.float32)
    >>> gpu3d.chamfer(x, y, squared=True)
    array(8.5, dtype=float32)
    """
    if (interop := _arrays.interop_of(x, y)) is not None:
        options: dict[str, Any] = {"x_lengths": x_lengths, "y_lengths": y_lengths}
        return interop.chamfer(x, y, squared=squared, reduction=reduction, **options)
    given_x, given_y = read_points(x, "x"), read_points(y, "y")
    checked = check_chamfer(given_x, given_y, x_lengths, y_lengths, squared, reduction)
    return chamfer_arrays(given_x, given_y, *checked)[0]


def chamfer_value_and_grad(
    x: Any,
    y: Any,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
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
    point with NaN or inf has gradient NaN and changes no other gradient. The same call gives the same bits: the
    contributions to a point are added as integer multiples of a power of two, so their order does not matter. Tensors
    that require grad are refused: use `chamfer` for them. A call never waits for the GPU. After a first call it can be
    captured in a CUDA graph.

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
    checked = check_chamfer(given_x, given_y, x_lengths, y_lengths, squared, reduction)
    loss, dx, dy = _value_and_gradients(given_x, given_y, *checked)
    return ChamferGradients(loss, (dx, dy))


# ---- checks --------------------------------------------------------------------------------------------------------


class Chamfer(NamedTuple):
    """The checked options of `chamfer`."""

    x_lengths: tuple[int, ...]
    y_lengths: tuple[int, ...]
    squared: bool
    reduction: str


def check_chamfer(x: Clouds, y: Clouds, x_lengths: Any, y_lengths: Any, squared: Any, reduction: Any) -> Chamfer:
    """The options of `chamfer`, checked against the shapes and dtypes of the arrays."""
    x_lengths = check_clouds(x, x_lengths, "x", "x_lengths")
    y_lengths = check_clouds(y, y_lengths, "y", "y_lengths")
    check_pair(x, "x", x_lengths, y, "y", y_lengths)
    squared = _arrays.check_flag(squared, "squared")
    _arrays.check_choice(reduction, reference.REDUCTIONS, "reduction")
    check_no_empty_cloud(x_lengths, "x")
    check_no_empty_cloud(y_lengths, "y")
    return Chamfer(x_lengths, y_lengths, squared, reduction)


def check_chamfer_backward(
    dloss: Given | Spec | None,
    x: Given | Spec,
    y: Given | Spec,
    residuals: Given | Spec,
    x_lengths: Any,
    y_lengths: Any,
    squared: Any,
    reduction: Any,
) -> Chamfer:
    """Check the arguments of the gradients as `check_chamfer` does, and that residuals and dloss fit them."""
    checked = check_chamfer(x, y, x_lengths, y_lengths, squared, reduction)
    loss, made = chamfer_results(sum(checked.x_lengths), sum(checked.y_lengths), len(checked.x_lengths), reduction)
    if residuals.shape != made.shape or residuals.dtype != INT32:
        raise ValueError(
            f"residuals must be int32 {list(made.shape)}, of the same clouds, got {residuals.dtype} "
            f"{list(residuals.shape)}."
        )
    if dloss is not None:
        if dloss.shape != loss.shape:
            raise ValueError(f"dloss must have the loss's shape, got {list(dloss.shape)} for reduction {reduction!r}.")
        _arrays.check_floats(dloss, "dloss")
    given = {"x": x, "dloss": dloss, "residuals": residuals}
    _arrays.check_same_device(**{name: z.origin for name, z in given.items() if isinstance(z, Given)})
    return checked


# ---- arrays --------------------------------------------------------------------------------------------------------


def chamfer_results(n: Any, m: Any, clouds: int, reduction: str) -> tuple[Spec, Spec]:
    """The specs of loss and residuals, for n and m points in `clouds` clouds; n and m may be symbols."""
    return Spec((clouds,) if reduction == "none" else (), FLOAT32), Spec((2 * (n + m + clouds),), INT32)


_kept_results = functools.lru_cache(maxsize=256)(chamfer_results)  # for numbers of points that are ints


def chamfer_arrays(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
) -> list[Any]:
    """The loss, and the residuals that `chamfer_backward_arrays` needs, as arrays of x's library."""
    origin = x.origin
    if origin.device is None:
        arrays = _on_the_host(x, y, x_lengths, y_lengths, squared, reduction)
        return [_arrays.leave(array, origin) for array in arrays]
    specs = _kept_results(sum(x_lengths), sum(y_lengths), len(x_lengths), reduction)
    return _launch(x, y, x_lengths, y_lengths, squared, reduction, specs, gradients=False)


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
) -> list[Any]:
    """The gradients of x and y, each of its array's library. dloss is the gradient of the loss; None means 1."""
    options = x_lengths, y_lengths, squared, reduction
    if x.origin.device is None:
        asked = None if dloss is None else dloss.array.astype(FLOAT32, copy=False)
        arrays = reference.chamfer_backward(asked, packed(x), packed(y), residuals.array, *options)
        return [_arrays.leave(dz.reshape(z.shape), z.origin) for dz, z in zip(arrays, (x, y), strict=True)]
    call = cuda.chamfer_backward(None if dloss is None else dloss.spec, x.spec, y.spec, residuals.spec, *options)
    dx, dy = launcher.launch(call, (dloss, x, y, residuals), chamfer_backward_results(x, y), x.origin)
    return [dx, _arrays.passed_on(dy, x.origin.library, y.origin)]


def _value_and_gradients(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
) -> list[Any]:
    """The loss, of x's library, and the gradients of x and y, each of its array's library."""
    origin, options = x.origin, (x_lengths, y_lengths, squared, reduction)
    if origin.device is None:
        loss, residuals = _on_the_host(x, y, *options)
        sides = [z.given if isinstance(z, NeighborIndex) else z for z in (x, y)]
        gradients = reference.chamfer_backward(None, packed(sides[0]), packed(sides[1]), residuals, *options)
        made = [_arrays.leave(dz.reshape(z.shape), z.origin) for dz, z in zip(gradients, sides, strict=True)]
        return [_arrays.leave(loss, origin), *made]
    loss_spec, _ = _kept_results(0, 0, len(x_lengths), reduction)
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
) -> tuple[Any, Any]:
    """The loss and the residuals in NumPy."""
    points = [packed(z.given if isinstance(z, NeighborIndex) else z) for z in (x, y)]
    return reference.chamfer(points[0], trees(x, x_lengths), points[1], trees(y, y_lengths), squared, reduction)


def _launch(
    x: Given | NeighborIndex,
    y: Given | NeighborIndex,
    x_lengths: tuple[int, ...],
    y_lengths: tuple[int, ...],
    squared: bool,
    reduction: str,
    specs: Sequence[Spec],
    *,
    gradients: bool,
) -> list[Any]:
    """Launch the call whose first result is the loss; returns all results."""
    of_x, of_y, indices = x, y, []
    if x_index := isinstance(x, NeighborIndex):
        of_x = x.given
        indices.append(x.search)
    if y_index := isinstance(y, NeighborIndex):
        of_y = y.given
        indices.append(y.search)
    assert isinstance(of_x, Given) and isinstance(of_y, Given) and of_x.origin.device is not None
    call = cuda.chamfer(
        of_x.spec,
        x_lengths,
        of_y.spec,
        y_lengths,
        squared,
        reduction,
        launcher.device(of_x.origin.device),
        x_index=x_index,
        y_index=y_index,
        gradients=gradients,
    )
    return launcher.launch(call, [of_x, of_y, *indices], specs)
