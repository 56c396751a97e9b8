# SPDX-License-Identifier: Apache-2.0
"""Training: the state of a network in training, the step that changes it, and the file that holds it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d._arrays import FLOAT32, Spec
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call
from gpu3d.flash3d import checkpoint, network, optim
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.graphs import Graphs
from gpu3d.flash3d.levels import layout_of
from gpu3d.flash3d.losses import check_device_labels
from gpu3d.flash3d.model import Batch, check_call, loss_and_gradient
from gpu3d.flash3d.params import check_fit, check_params, decayed_size, flat, host_arena, views
from gpu3d.reference.flash3d import Training

TRAINING = "gpu3d.flash3d.training"  # the metadata's key for options and counts
FIRST, SECOND = f"{checkpoint.OPTIMIZER}first.", f"{checkpoint.OPTIMIZER}second."


class Options(NamedTuple):
    """What stays the same during a training; see `Trainer`."""

    steps: int
    lr: float
    weight_decay: float
    clip: float
    seed: int
    ignore: int
    recompute: bool


class TrainingState(NamedTuple):
    """What a training step changes, and what a file keeps. All arrays are on one device.

    A step on the host returns a new state. A step on a GPU changes the arrays in place: they are the same memory as
    long as the trainer lives, because its CUDA graphs hold their addresses.
    """

    masters: Any  # float32, an arena of parameters
    first: Any  # float32, like it: AdamW's running mean of the gradient
    second: Any  # and of its square
    counts: Any  # uint32 [2]: steps that counted, and steps that were skipped, as in kernels_cu/optim_adamw.cu


class Trainer:
    """A network in training: AdamW with a one-cycle learning rate, clipped gradients, and drop path.

    The learning rate rises from lr / 10 to lr in the first 4 % of the steps and then falls to lr / 1000, as in torch's
    OneCycleLR. Biases and norms have no weight decay. A step whose loss or gradient is not finite changes no weights
    and is counted in `skipped`; neither the learning rate nor drop path moves on.

    The same calls give the same bits, and so does a training that was saved and resumed. An exception in a step, also
    a KeyboardInterrupt, leaves the trainer as it was before the step or as it is after it.

    Parameters
    ----------
    config : Config
    params : dict
        The parameters to start from, which are copied. Their device is that of the training.
    steps : int
        Planned number of steps, over which the learning rate rises and falls.
    lr : float
        The largest learning rate.
    weight_decay : float
    clip : float
        The largest norm of all gradients together. inf leaves them as they are.
    seed : int
        Of drop path, from 0 to 2**64 - 1. Its random numbers depend on seed, step, layer and row only.
    ignore : int
        The label of points that do not count.
    recompute : bool
        Whether a step on a GPU computes the inside of each block a second time in its backward, in place of keeping it.
        The bits are the same. A step takes less memory and more time.

    Attributes
    ----------
    config : Config
    options : Options
        The other arguments, checked.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> rng = np.random.default_rng(0)
    >>> config = flash3d.presets["tiny"].replace(in_channels=1, classes=2, bucket_size=16)
    >>> trainer = flash3d.Trainer(config, flash3d.init(config), steps=100)
    >>> points = rng.random((60, 3)) * 20
    >>> loss = trainer.step(points, rng.random((60, 1)), (points[:, 2] > 9).astype(int))
    >>> bool(1 < loss < 2), trainer.done_steps, trainer.skipped
    (True, 1, 0)
    """

    def __init__(
        self,
        config: Config,
        params: dict[str, Any],
        *,
        steps: int,
        lr: float = 2e-3,
        weight_decay: float = 5e-3,
        clip: float = 1.0,
        seed: int = 0,
        ignore: int = 255,
        recompute: bool = False,
    ) -> None:
        self.options = Options(
            _integer(steps, "steps", 1, 2**32 - 1),
            _number(lr, "lr"),
            _number(weight_decay, "weight_decay"),
            _number(clip, "clip", math.inf),
            _integer(seed, "seed", 0, 2**64 - 1),
            _arrays.check_integer(ignore, "ignore"),
            _arrays.check_flag(recompute, "recompute"),
        )
        self.config = config
        given = {path: _arrays.read(array, path) for path, array in check_params(params, config).items()}
        for path, array in given.items():
            if array.origin.library not in ("numpy", "cupy"):
                raise TypeError(f"params must be NumPy or CuPy arrays, got {array.origin} for {path}.")
        _arrays.check_same_device(**{path: array.origin for path, array in given.items()})
        arena = host_arena({path: _arrays.download(array) for path, array in given.items()}, config, np.float32)
        origin = next(iter(given.values())).origin
        self._set_state(arena, np.zeros_like(arena), np.zeros_like(arena), (0, 0), origin)

    def _set_state(
        self, arena: np.ndarray, first: np.ndarray, second: np.ndarray, counts: Any, origin: _arrays.Origin
    ) -> None:
        arrays = arena, first, second, np.array(counts, np.uint32)
        self._state = TrainingState(*(_arrays.upload(array, origin) for array in arrays))
        self._graphs = None if origin.device is None else _graphs(self._state, arena.astype(self.config.dtype), origin)
        self._started = sum(counts)  # known without a sync; see `step`

    @property
    def params(self) -> dict[str, Any]:
        """The parameters after the steps so far, like those of `init`. Read them again after a step."""
        return views(self._state.masters, self.config)

    @property
    def done_steps(self) -> int:
        """How many steps were done, the skipped ones included. Synchronizes on a GPU."""
        return int(sum(self._counts()))

    @property
    def skipped(self) -> int:
        """How many steps were skipped because the loss or a gradient was not finite. Synchronizes on a GPU."""
        return self._counts()[1]

    def _counts(self) -> list[int]:
        return _host(self._state.counts).tolist()

    def step(self, points: Any, features: Any, labels: Any, lengths: Any = None) -> Any:
        """Train on one batch.

        Parameters
        ----------
        points, features, lengths
            As in `Batch`, on the device of the parameters. At least one point.
        labels : array int [N]
            The class of each point, 0 to classes - 1, or `ignore`. On a GPU they are uint8 or int32, and those outside
            of this range count as ignored, because an error would have to wait for the GPU.

        Returns
        -------
        array float32 []
            The loss of this batch before the step, with drop path. On a GPU the call does not wait for it.

        Raises
        ------
        TypeError, ValueError
            An argument is not what is listed above, or all steps are done; the message says what was received and the
            cure.
        """
        batch = Batch(points, features, lengths)
        if not len(batch.points):
            raise ValueError("a step needs at least one point, got none in all clouds: skip this batch.")
        masters, places = self._state.masters, _arrays.read(batch.points, "points").origin
        _arrays.check_same_device(params=_arrays.read(masters, "params").origin, points=places)
        params = check_call(self.params, batch, self.config)
        if self._started >= self.options.steps:
            self._started = self.done_steps  # an exception may have left it too high
        if self._started >= self.options.steps:
            raise ValueError(
                f"all {self.options.steps} steps are done, and the learning rate has reached its end: start a new "
                "Trainer with its params for more."
            )
        self._started += 1
        if self._graphs is not None:
            return _step_on_gpu(self._graphs, self.config, self.options, batch, labels)
        loss, self._state = _step_on_host(self._state, params, self.config, self.options, batch, labels)
        return loss

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that `resume` needs to a file, from which `load` also reads the parameters.

        The file is written as by `flash3d.save`: `path` holds the old file until the new one is whole. Synchronizes on
        a GPU.

        Parameters
        ----------
        path : str or path-like
            A file of this name is replaced.

        Raises
        ------
        OSError
            The file cannot be written.

        Examples
        --------
        >>> import tempfile
        >>> from gpu3d import flash3d
        >>> config = flash3d.presets["tiny"]
        >>> trainer = flash3d.Trainer(config, flash3d.init(config), steps=100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save(f"{folder}/trainer.safetensors")
        ...     resumed = flash3d.Trainer.resume(f"{folder}/trainer.safetensors")
        >>> resumed.options == trainer.options
        True
        """
        state = self._state
        arrays: dict[str, np.ndarray] = {}
        for prefix, arena in (("", state.masters), (FIRST, state.first), (SECOND, state.second)):
            arrays |= {f"{prefix}{path}": view for path, view in flat(views(_host(arena), self.config)).items()}
        metadata = {
            checkpoint.CONFIG: json.dumps(dataclasses.asdict(self.config)),
            TRAINING: json.dumps({"options": self.options._asdict(), "counts": self._counts()}),
        }
        checkpoint.write(path, arrays, metadata)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], device: int | None = None) -> Trainer:
        """The trainer that was saved to a file.

        Parameters
        ----------
        path : str or path-like
        device : int, optional
            The CUDA device on which to go on. Default: the host.

        Returns
        -------
        Trainer
            Its next steps give the same bits as those of the saved one, if the device is of the same kind.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is truncated, or `Trainer.save` did not write it.
        """
        with checkpoint.reading(path) as (arrays, metadata):
            config = checkpoint.config_of(metadata)
            if TRAINING not in metadata:
                raise ValueError(
                    "it holds parameters only, without the state of a training: pass those of flash3d.load to a new "
                    "Trainer."
                )
            saved = json.loads(metadata[TRAINING])
            parts: dict[str, dict[str, np.ndarray]] = {"": {}, FIRST: {}, SECOND: {}}
            for name, array in arrays.items():
                prefix = next((p for p in (FIRST, SECOND) if name.startswith(p)), "")
                parts[prefix][name.removeprefix(prefix)] = array
            for part in parts.values():
                check_fit(part, config)
            masters, first, second = (host_arena(part, config, np.float32) for part in parts.values())
            trainer = cls(config, views(masters, config), **saved["options"])
        origin = _arrays.Origin("numpy", None) if device is None else _arrays.Origin("cupy", device)
        trainer._set_state(masters, first, second, saved["counts"], origin)
        return trainer


def _step_on_host(
    state: TrainingState, params: dict[str, Any], config: Config, options: Options, batch: Batch, labels: Any
) -> tuple[np.float32, TrainingState]:
    """The loss and the next state. The given one stays as it is, so an interrupt cannot leave half a step."""
    taken, skipped = state.counts.tolist()
    training = Training(options.seed, taken)
    loss, gradient = loss_and_gradient(params, batch, labels, config, options.ignore, training)
    arena, moments = state.masters.copy(), optim.State(state.first.copy(), state.second.copy(), taken, skipped)
    optim.update(
        arena,
        gradient,
        float(loss),
        moments,
        lr=optim.one_cycle(taken, options.steps, options.lr),
        weight_decay=options.weight_decay,
        decayed=decayed_size(config),
        clip=options.clip,
    )
    counts = np.array([moments.steps, moments.skipped], np.uint32)
    return loss, TrainingState(arena, moments.first, moments.second, counts)


def _graphs(state: TrainingState, weights: np.ndarray, origin: _arrays.Origin) -> Graphs:
    """The graphs of steps, with the last inputs of `network.step_plan`. Weights are masters in the config's dtype."""
    of_step = state.masters if weights.dtype == FLOAT32 else _arrays.upload(weights, origin)
    gradients = _arrays.upload(np.zeros(weights.shape, np.float32), origin)
    return Graphs([state.masters, of_step, state.first, state.second, gradients, state.counts])


def _step_on_gpu(graphs: Graphs, config: Config, options: Options, batch: Batch, labels: Any) -> Any:
    """Enqueue a step on the current stream, and return its loss."""
    given = check_device_labels(labels, len(batch.points))
    points = _arrays.read(batch.points, "points")
    _arrays.check_same_device(points=points.origin, labels=given.origin)
    device = launcher.device(points.device)
    layout = layout_of(batch.lengths, config, device)
    what = config, layout.sizes, batch.features.dtype, given.dtype, options.ignore, device, options.recompute

    def make(points: int) -> Call:
        numbers = {"seed": options.seed, "rate": options.lr, "steps": options.steps}
        numbers |= {"decay": options.weight_decay, "clip": options.clip}
        return Call(network.step_plan(*what), {"points": points, **numbers})

    inputs = batch.points, batch.features, given.array
    loss, _ = graphs.run(what, make, inputs, layout, [Spec((), FLOAT32)] * 2)
    return loss


def _host(array: Any) -> np.ndarray:
    return _arrays.download(_arrays.read(array, "state"))  # synchronizes


def _integer(value: Any, name: str, low: int, high: int) -> int:
    value = _arrays.check_integer(value, name)
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}.")
    return value


def _number(value: Any, name: str, high: float = math.nextafter(math.inf, 0)) -> float:
    value = _arrays.check_number(value, name)
    if not 0 <= value <= high:
        raise ValueError(f"{name} must be 0 or positive{' and finite' if high < math.inf else ''}, got {value}.")
    return value
