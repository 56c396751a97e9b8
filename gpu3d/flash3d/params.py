# SPDX-License-Identifier: Apache-2.0
"""The parameters of a Flash3D backbone: one float32 arena, and a nested dict of views into it.

The arena holds the weights of all linear layers first, and then biases and norms, so that weight decay ends at one
boundary. Each view starts at a multiple of 64 elements (256 bytes). The elements between views are 0.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gpu3d import _arrays
from gpu3d.flash3d.config import Config

ALIGNMENT = 64  # elements


class Parameter(NamedTuple):
    """A parameter's place in the arena."""

    path: str  # the keys of the nested dict, joined by dots
    shape: tuple[int, ...]
    offset: int  # elements
    decay: bool  # whether weight decay applies

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def layout(config: Config) -> tuple[Parameter, ...]:
    """Every parameter, in the order of the arena."""
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a flash3d.Config, got {_arrays.shown(config)} of type {type(config).__name__}: "
            "take one of flash3d.presets."
        )
    return _layout(config)


@functools.cache
def _layout(config: Config) -> tuple[Parameter, ...]:
    shapes = list(_shapes(config))
    found, offset = [], 0
    for decay in (True, False):
        for path, shape in shapes:
            if decay == (len(shape) == 2):  # the only matrices are weights of linear layers
                found.append(Parameter(path, shape, offset, decay))
                offset = _aligned(offset + math.prod(shape))
    return tuple(found)


@functools.cache
def by_path(config: Config) -> dict[str, Parameter]:
    """Every parameter by its path."""
    return {parameter.path: parameter for parameter in layout(config)}


def arena_size(config: Config) -> int:
    """Number of elements of the arena, a multiple of 64."""
    last = layout(config)[-1]
    return _aligned(last.offset + last.size)


def decayed_size(config: Config) -> int:
    """The first element of the arena without weight decay."""
    return next(parameter.offset for parameter in layout(config) if not parameter.decay)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def count(config: Config) -> int:
    """Number of parameters of a backbone.

    Parameters
    ----------
    config : Config

    Returns
    -------
    int

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> flash3d.count(flash3d.presets["flash3d_46m"])
    46275891
    """
    return sum(parameter.size for parameter in layout(config))


# ---- paths and shapes ----------------------------------------------------------------------------------------------


def _shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and shape of every parameter, in the order in which the forward uses them."""
    channels = config.channels
    yield from _linear("stem", channels[0], config.in_channels)
    for level, (c, depth) in enumerate(zip(channels, config.depths, strict=True)):
        stage = f"encoder.{level}"
        if level:
            yield from _projection(f"{stage}.down", c, channels[level - 1])
        for i in range(depth):
            yield from _block(f"{stage}.blocks.{i}", c, config.mlp)
    for level in reversed(range(config.levels - 1)):
        stage, (c, below) = f"decoder.{level}", config.ascending_channels[level : level + 2]
        yield from _projection(f"{stage}.up", c, below)
        yield from _projection(f"{stage}.skip", c, channels[level])
        for i in range(config.decoder_depths[level]):
            yield from _block(f"{stage}.blocks.{i}", c, config.mlp)
    yield from _norm("head.norm", config.ascending_channels[0])
    yield from _linear("head", config.classes, config.ascending_channels[0])


def _linear(path: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", (outputs, inputs)
    yield f"{path}.bias", (outputs,)


def _norm(path: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", (channels,)
    yield f"{path}.bias", (channels,)


def _projection(path: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear(path, outputs, inputs)
    yield from _norm(f"{path}.norm", outputs)


def _block(path: str, channels: int, mlp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{path}.norm1", channels)
    yield from _linear(f"{path}.qkv", 3 * channels, channels)
    yield from _linear(f"{path}.proj", channels, channels)
    yield from _norm(f"{path}.norm2", channels)
    yield from _linear(f"{path}.fc1", mlp * channels, channels)
    yield from _linear(f"{path}.fc2", channels, mlp * channels)


# ---- arena and dict ------------------------------------------------------------------------------------------------


def init(config: Config, seed: int = 0, device: int | None = None) -> dict[str, Any]:
    """New parameters.

    Weights of a linear layer with n inputs are normal with standard deviation 1 / sqrt(n), so that its results vary as
    much as its inputs; values beyond two standard deviations are drawn again. Biases are 0. Norms have weight 1 and
    bias 0.

    Parameters
    ----------
    config : Config
    seed : int
        The seed of NumPy's PCG64. The same seed gives the same bits on every device.
    device : int, optional
        The CUDA device of the parameters, which are CuPy arrays then. Default: NumPy arrays.

    Returns
    -------
    dict
        Nested dicts of float32 views into one arena, for example
        ``params["encoder"]["0"]["blocks"]["1"]["qkv"]["weight"]``, a [3 C, C] matrix.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> params = flash3d.init(flash3d.presets["tiny"], seed=1)
    >>> params["stem"]["weight"].shape
    (32, 4)
    """
    seed = _arrays.check_integer(seed, "seed")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    rng = np.random.Generator(np.random.PCG64(seed))
    arena = np.zeros(arena_size(config), np.float32)
    for parameter in layout(config):
        values = arena[parameter.offset :][: parameter.size]
        if parameter.decay:
            values[:] = _truncated_normal(rng, parameter.size) * np.float32(init_std(parameter.shape[1]))
        elif parameter.path.endswith(".weight"):  # of a norm
            values[:] = 1
    if device is not None:
        cupy = _arrays.require_cupy("device")
        with cupy.cuda.Device(device):
            arena = cupy.asarray(arena)
    return views(arena, config)


def init_std(inputs: int) -> float:
    """The standard deviation of new weights with this many inputs, before they are cut at two standard deviations.

    With 0.02 for all, as large language models have it, `tiny` takes longer to learn: two crops by heart have a loss of
    0.81 after 100 steps in place of 0.17, and 250 small steps on many sweeps one of 1.84 in place of 1.80.
    """
    return 1 / math.sqrt(inputs)


def _truncated_normal(rng: np.random.Generator, size: int) -> np.ndarray:
    values = rng.standard_normal(size, np.float32)
    while len(outside := np.flatnonzero(np.abs(values) > 2)):
        values[outside] = rng.standard_normal(len(outside), np.float32)
    return values


def views(arena: Any, config: Config) -> dict[str, Any]:
    """The nested dict of views into an arena, which is a one-dimensional NumPy or CuPy array."""
    if arena.shape != (arena_size(config),):
        raise ValueError(f"an arena of this config has shape [{arena_size(config)}], got {list(arena.shape)}.")
    params: dict[str, Any] = {}
    for parameter in layout(config):
        *keys, last = parameter.path.split(".")
        node = params
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = arena[parameter.offset :][: parameter.size].reshape(parameter.shape)
    return params


def flat(params: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a nested dict by path."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            found |= {f"{key}.{path}": array for path, array in flat(value).items()}
        else:
            found[key] = value
    return found


def check_params(params: Any, config: Config) -> dict[str, Any]:
    """The arrays by path, in the order of the arena, if they fit the config."""
    if not isinstance(params, dict):
        raise TypeError(f"params must be the nested dict that flash3d.init returns, got {type(params).__name__}.")
    arrays = flat(params)
    check_fit(arrays, config)
    return {parameter.path: arrays[parameter.path] for parameter in layout(config)}


def check_fit(arrays: dict[str, Any], config: Config) -> None:
    """Raise an error that names the first of the arrays, given by path, that does not fit the config."""
    for parameter in layout(config):
        shape = getattr(arrays.get(parameter.path), "shape", None)
        if shape != parameter.shape:
            raise ValueError(
                f"the config has {parameter.path} of shape {list(parameter.shape)}, but the params have "
                f"{'none' if shape is None else list(shape)}: params and config must belong together."
            )
    known = by_path(config)
    for path in arrays:
        if path not in known:
            raise ValueError(f"the config has no {path}, but the params do: params and config must belong together.")


def arena_of(arrays: dict[str, Any], config: Config) -> Any:
    """The CuPy arena of parameters, given by path: the one that they are views of, or a new one with their values."""
    cupy = sys.modules["cupy"]
    start = arrays[layout(config)[0].path].data.ptr
    arena = arrays[layout(config)[0].path].base
    if getattr(arena, "shape", None) == (arena_size(config),) and arena.dtype == np.float32:
        views_of_it = (arrays[p.path].data.ptr == start + 4 * p.offset for p in layout(config))
        if all(views_of_it) and all(array.flags.c_contiguous for array in arrays.values()):
            return arena
    arena = cupy.zeros(arena_size(config), np.float32)
    for path, view in flat(views(arena, config)).items():
        view[...] = arrays[path]
    return arena


def pack(arrays: dict[str, Any], config: Config, dtype: Any) -> dict[str, Any]:
    """Parameters, given by path, copied into a new NumPy arena."""
    return views(host_arena(arrays, config, dtype), config)


def host_arena(arrays: dict[str, Any], config: Config, dtype: Any) -> np.ndarray:
    """A new NumPy arena with a copy of parameters that are given by path."""
    arena = np.zeros(arena_size(config), dtype)
    for path, view in flat(views(arena, config)).items():
        view[...] = arrays[path]
    return arena
