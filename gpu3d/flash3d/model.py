# SPDX-License-Identifier: Apache-2.0
"""The backbone as users call it: logits of a batch of clouds, and the gradients of its segmentation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, Given, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call
from gpu3d.flash3d import network
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import geometry
from gpu3d.flash3d.graphs import Graphs
from gpu3d.flash3d.levels import Layout, layout_of, write_tables
from gpu3d.flash3d.losses import check_device_labels, check_labels
from gpu3d.flash3d.params import arena_of, arena_size, check_params, flat, host_arena, pack, views
from gpu3d.reference import flash3d as reference


@dataclass(frozen=True, eq=False, init=False)
class Batch:
    """A batch of clouds with their features, checked and packed.

    Attributes
    ----------
    points : array [N, 3] or [B, n, 3]
        Coordinates of any float dtype, NumPy or CuPy. They are stored packed, as float32 [N, 3]: subtract an origin
        from float64 coordinates that are large. A non-finite coordinate makes the logits of its scope NaN.
    features : array [N, C] or [B, n, C]
        Input features of any float dtype, for the same points and of the same library. Stored packed.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N. Default: one cloud. Stored as a tuple.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rng = np.random.default_rng(0)
    >>> batch = flash3d.Batch(rng.random((100, 3)), rng.random((100, 4)), lengths=[60, 40])
    >>> batch.points.shape, batch.points.dtype, batch.lengths
    ((100, 3), dtype('float32'), (60, 40))
    """

    points: Any
    features: Any
    lengths: tuple[int, ...]

    def __init__(self, points: Any, features: Any, lengths: Sequence[int] | None = None) -> None:
        points, features = _arrays.read(points, "points"), _arrays.read(features, "features")
        for name, given in (("points", points), ("features", features)):
            if given.origin.library not in ("numpy", "cupy"):
                raise TypeError(
                    f"{name} must be a NumPy or CuPy array, got {given.origin}: convert by numpy.asarray({name}) or "
                    f"cupy.from_dlpack({name})."
                )
        checked = _arrays.check_points(points, lengths)
        if features.shape[:-1] != points.shape[:-1]:
            raise ValueError(
                f"features must have a row of channels for each point, got shape {list(features.shape)} for points of "
                f"shape {list(points.shape)}."
            )
        _arrays.check_floats(features, "features")
        _arrays.check_same_device(points=points.origin, features=features.origin)
        for name, array in (
            ("points", points.array.reshape(-1, 3).astype(np.float32, copy=False)),
            ("features", features.array.reshape(-1, features.shape[-1])),
        ):
            object.__setattr__(self, name, array if array.flags.c_contiguous else array.copy())
        object.__setattr__(self, "lengths", checked)


def forward(params: dict[str, Any], batch: Batch, config: Config) -> Any:
    """The logits of every point.

    Parameters
    ----------
    params : dict
        As `init` or `load` returns them, on the batch's device.
    batch : Batch
        Clouds may be empty or smaller than a bucket.
    config : Config
        The config of the params.

    Returns
    -------
    array float32 [N, classes]
        In the order of the points. The same call gives the same bits.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    The CPU path computes in float64 and rounds the logits once.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rng = np.random.default_rng(0)
    >>> config = flash3d.presets["tiny"].replace(bucket_size=64)
    >>> batch = flash3d.Batch(rng.random((300, 3)) * 20, rng.random((300, 4)))
    >>> flash3d.forward(flash3d.init(config), batch, config).shape
    (300, 19)
    """
    given = check_call(params, batch, config)
    if not isinstance(batch.points, np.ndarray):
        return _forward_on_gpu(given, batch, config)
    exact = pack(given, config, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller's rows may hold NaN and inf
        levels = geometry(batch.points, config, batch.lengths)
        logits, _ = reference.forward(exact, levels, batch.features, config)
        return logits.astype(np.float32)


def loss_and_grad(
    params: dict[str, Any], batch: Batch, labels: Any, config: Config, ignore: int = 255
) -> tuple[Any, dict[str, Any]]:
    """The segmentation loss and its gradients with respect to all parameters.

    The loss is the mean cross-entropy plus the Lovasz-softmax loss, over the points whose label is not `ignore`.

    Parameters
    ----------
    params, batch, config
        As in `forward`.
    labels : array int [N]
        The class of each point, 0 to classes - 1, or `ignore`.
    ignore : int
        The label of points that do not count.

    Returns
    -------
    loss : array float32 []
        0 if all points are ignored. NaN if a feature or coordinate that reaches a counted point is not finite.
    grads : dict
        Like `params`, with an arena of their own.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    There is no drop path here, so the loss is a function of the arguments alone. The CPU path computes in float64 and
    rounds the results once.

    References
    ----------
    The Lovasz-Softmax loss: a tractable surrogate for the optimization of the intersection-over-union measure in neural
    networks, Berman et al., 2018.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rng = np.random.default_rng(0)
    >>> config = flash3d.presets["tiny"].replace(classes=2, bucket_size=64)
    >>> points = rng.random((300, 3)) * 20
    >>> batch = flash3d.Batch(points, rng.random((300, 4)))
    >>> loss, grads = flash3d.loss_and_grad(flash3d.init(config), batch, (points[:, 2] > 9).astype(int), config)
    >>> grads["head"]["weight"].shape, bool(1 < loss < 1.5)
    ((2, 32), True)
    """
    given = check_call(params, batch, config)
    if not isinstance(batch.points, np.ndarray):
        return _loss_and_grad_on_gpu(given, batch, labels, config, ignore)
    loss, gradient = loss_and_gradient(given, batch, labels, config, ignore)
    return loss, views(gradient, config)


def loss_and_gradient(
    params: dict[str, Any],
    batch: Batch,
    labels: Any,
    config: Config,
    ignore: int,
    training: reference.Training | None = None,
) -> tuple[np.float32, np.ndarray]:
    """What `loss_and_grad` returns on the host, with the gradients as an arena. With `training` there is drop path.

    The parameters are given by path, as `check_call` returns them.
    """
    exact = pack(params, config, np.float64)
    checked = check_labels(labels, len(batch.points), config.classes, ignore)
    with np.errstate(over="ignore", invalid="ignore"):
        levels = geometry(batch.points, config, batch.lengths)
        logits, tape = reference.forward(exact, levels, batch.features, config, training)
        loss, dlogits = reference.segmentation_loss(logits, checked, ignore)
        _, exact_grads = reference.backward(dlogits, tape, exact, levels, config)
        return np.float32(loss), host_arena(flat(exact_grads), config, np.float32)


def check_call(params: Any, batch: Any, config: Any) -> dict[str, Any]:
    """The parameters by path, with all arguments checked."""
    if not isinstance(batch, Batch):
        raise TypeError(
            f"batch must be a flash3d.Batch, got {type(batch).__name__}: make it by flash3d.Batch(points, features)."
        )
    given = check_params(params, config)
    _check_batch(given, batch, config)
    return given


def _check_batch(given: dict[str, Any], batch: Batch, config: Config) -> None:
    """Raise an error if a batch does not fit the config, or parameters that fit it."""
    width = batch.features.shape[1]
    if width != config.in_channels:
        raise ValueError(f"features must have the {config.in_channels} channels of config.in_channels, got {width}.")
    kind = type(batch.points)
    for path, array in given.items():
        if type(array) is not kind:
            raise TypeError(
                f"params must be of the batch's library, got {type(array).__module__}.{type(array).__name__} for "
                f"{path} beside points of {kind.__module__}.{kind.__name__}."
            )


def compile(params: dict[str, Any], config: Config, max_points: int = 40_000) -> Callable[..., Any]:
    """A function that predicts the class of every point.

    On a GPU it keeps a copy of the parameters in the config's dtype, and one workspace. The second batch of about the
    same size runs as one CUDA graph, and so do all later ones, whatever their lengths.

    Parameters
    ----------
    params, config
        As in `forward`. Later changes of the parameters have no effect.
    max_points : int
        The workspace for a cloud of this size is allocated at once. A larger batch allocates a larger one.

    Returns
    -------
    callable
        ``predict(points, features, lengths=None)`` takes what `Batch` takes, on the device of the parameters, and
        returns the classes of the points, int32 [N].

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rng = np.random.default_rng(0)
    >>> config = flash3d.presets["tiny"].replace(bucket_size=64)
    >>> predict = flash3d.compile(flash3d.init(config), config)
    >>> predict(rng.random((300, 3)) * 20, rng.random((300, 4))).shape
    (300,)
    """
    given = check_params(params, config)
    max_points = _arrays.check_integer(max_points, "max_points")
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}.")
    if all(isinstance(array, np.ndarray) for array in given.values()):
        kept = pack(given, config, np.float32)

        def predict_on_host(points: Any, features: Any, lengths: Sequence[int] | None = None) -> Any:
            return forward(kept, Batch(points, features, lengths), config).argmax(axis=1).astype(np.int32)

        return predict_on_host

    masters = arena_of(given, config).copy()
    own, origin = flat(views(masters, config)), _arrays.read(masters, "params").origin
    device = launcher.device(origin.device)
    graphs = Graphs([masters, _weights(_arrays.read(masters, "params"), config).array])
    sizes = layout_of((max_points,), config, device).sizes
    graphs.reserve(network.forward_plan(config, sizes, FLOAT32, device).workspace)

    def predict_on_gpu(points: Any, features: Any, lengths: Sequence[int] | None = None) -> Any:
        batch = Batch(points, features, lengths)
        _check_batch(own, batch, config)
        layout, dtype = layout_of(batch.lengths, config, device), batch.features.dtype

        def make(points: int) -> Call:
            return Call(network.forward_plan(config, layout.sizes, dtype, device), {"points": points})

        results = [Spec((layout.slots, config.classes), FLOAT32)]
        (logits,) = graphs.run((layout.sizes, dtype), make, (batch.points, batch.features), layout, results)
        with _arrays.on(origin):
            return logits[: len(batch.points)].argmax(axis=1).astype(np.int32)

    return predict_on_gpu


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def _forward_on_gpu(params: dict[str, Any], batch: Batch, config: Config) -> Any:
    points, features = _arrays.read(batch.points, "points"), _arrays.read(batch.features, "features")
    masters = _arrays.read(arena_of(params, config), "params")
    _arrays.check_same_device(points=points.origin, params=masters.origin)
    device = launcher.device(points.device)
    layout = layout_of(batch.lengths, config, device)
    call = Call(network.forward_plan(config, layout.sizes, features.dtype, device), {"points": len(batch.points)})
    inputs = points, features, _tables(layout, points.origin), masters, _weights(masters, config)
    (logits,) = launcher.launch(call, inputs, (Spec((layout.slots, config.classes), FLOAT32),))
    return logits[: len(batch.points)]


def _loss_and_grad_on_gpu(
    params: dict[str, Any], batch: Batch, labels: Any, config: Config, ignore: int
) -> tuple[Any, dict[str, Any]]:
    given = check_device_labels(labels, len(batch.points))
    points, features = _arrays.read(batch.points, "points"), _arrays.read(batch.features, "features")
    masters = _arrays.read(arena_of(params, config), "params")
    _arrays.check_same_device(points=points.origin, params=masters.origin, labels=given.origin)
    device = launcher.device(points.device)
    results = Spec((), FLOAT32), Spec((arena_size(config),), FLOAT32)
    layout = layout_of(batch.lengths, config, device)
    plan = network.gradient_plan(config, layout.sizes, features.dtype, given.dtype, ignore, device)
    call = Call(plan, {"points": len(batch.points)})
    inputs = points, features, given, _tables(layout, points.origin), masters, _weights(masters, config)
    loss, gradients = launcher.launch(call, inputs, results)
    return loss, views(gradients, config)


def _tables(layout: Layout, origin: _arrays.Origin) -> Given:
    """The layout's tables on the origin's GPU."""
    with _arrays.on(origin):
        return _arrays.read(write_tables(layout), "tables")


def _weights(masters: Given, config: Config) -> Given:
    """The arena of the parameters in the config's dtype."""
    if config.dtype == "float32":
        return masters
    results = (Spec((arena_size(config),), np.dtype(config.dtype)),)
    return _arrays.read(launcher.launch(network.cast_call(config), (masters,), results)[0], "weights")
