# SPDX-License-Identifier: Apache-2.0
"""The Flash3D backbone as a pure function of its parameters. Gradients are those of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from gpu3d import _arrays
from gpu3d.buckets import Buckets
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import Level, geometry
from gpu3d.flash3d.params import check_params
from gpu3d.interop.jax.functions import bucket_attention, bucket_unpool, gather, scatter
from gpu3d.pooling import Pooling
from gpu3d.reference.flash3d import half_turns

Params = dict[str, Any]


def flash3d(
    params: Params, points: jax.Array, features: jax.Array, config: Config, *, lengths: Sequence[int] | None = None
) -> jax.Array:
    """Compute the logits of every point of a batch of clouds, by the Flash3D backbone.

    The network and its parameters are those of `gpu3d.flash3d`. There is no drop path.

    Parameters
    ----------
    params : dict
        As `gpu3d.flash3d.init` or `gpu3d.flash3d.load` returns them, of NumPy or JAX. The layers compute in their
        dtype.
    points : Array [N, 3] or [B, n, 3]
        Coordinates of any float dtype. They are used as float32: subtract an origin from float64 coordinates that are
        large. Not differentiated: the gradient stops here.
    features : Array [N, C] or [B, n, C]
        Input features of any float dtype.
    config : gpu3d.flash3d.Config
        The config of the params; static under jax.jit.
    lengths : sequence of int, optional
        Points of each cloud, host integers that sum to N; static under jax.jit. Clouds may be empty. Default: one
        cloud.

    Returns
    -------
    Array [N, classes]
        In the order of the points, in the dtype of the parameters.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Notes
    -----
    Pooling first moves the members of each child side by side, and then takes the mean of `ratio` rows. So its gradient
    is a move too, without atomic additions. Unpooling is `bucket_unpool`.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024.

    Examples
    --------
    >>> from gpu3d import flash3d as backbone
    >>> config = backbone.presets["tiny"].replace(in_channels=1, classes=3, depths=(1, 1, 1, 1), bucket_size=64)
    >>> params = backbone.init(config)
    >>> points, features = jax.random.uniform(jax.random.key(0), (500, 3)) * 20, jax.numpy.ones((500, 1))
    >>> def loss(params, points, features, config, lengths):
    ...     return flash3d(params, points, features, config, lengths=lengths).var()
    >>> step = jax.jit(jax.value_and_grad(loss), static_argnames=("config", "lengths"))
    >>> value, grads = step(params, points, features, config=config, lengths=(300, 200))
    >>> grads["head"]["weight"].shape
    (3, 32)
    """
    check_params(params, config)
    params = jax.tree.map(jnp.asarray, params)
    dtype = params["stem"]["weight"].dtype
    points, features, lengths = _checked(points, features, lengths, config)
    levels, epsilon = geometry(points, config, lengths), config.epsilon
    top = levels[0].buckets
    x = _linear(scatter(features.astype(dtype), top), params["stem"])
    skips = []
    for i, level in enumerate(levels):
        part = params["encoder"][str(i)]
        if i:
            x = _project(pool(x, levels[i - 1].members), part["down"], epsilon)
        x = _blocks(x, part["blocks"], level, config.heads[i], config)
        skips.append(x)
    for i in reversed(range(config.levels - 1)):
        part = params["decoder"][str(i)]
        child, skip = _project(x, part["up"], epsilon), _project(skips[i], part["skip"], epsilon)
        x = unpool(child, levels[i], levels[i + 1], skip)
        x = _blocks(x, part["blocks"], levels[i], config.decoder_heads[i], config)
    head = params["head"]
    return gather(_linear(_layer_norm(x, head["norm"], epsilon), head), top)


def _checked(points: Any, features: Any, lengths: Any, config: Config) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """Points as float32 [N, 3] without a gradient, features [N, C], and the lengths of the clouds."""
    for name, x in (("points", points), ("features", features)):
        if not isinstance(x, jax.Array):
            raise TypeError(f"{name} must be a JAX array, got {type(x).__name__}: convert it by jax.numpy.asarray.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a float dtype, got {x.dtype}: convert by {name}.astype('float32').")
    lengths = _arrays.cloud_lengths(tuple(points.shape), lengths, "points", "lengths", (3,))
    if features.shape[:-1] != points.shape[:-1] or features.shape[-1] != config.in_channels:
        raise ValueError(
            f"features must have a row of {config.in_channels} channels (config.in_channels) for each point, got shape "
            f"{list(features.shape)} for points of shape {list(points.shape)}."
        )
    packed = jax.lax.stop_gradient(points).reshape(-1, 3).astype(jnp.float32)
    return packed, features.reshape(-1, config.in_channels), lengths


# ---- layers --------------------------------------------------------------------------------------------------------


def _linear(x: jax.Array, params: Params) -> jax.Array:
    return x @ params["weight"].T + params["bias"]


def _layer_norm(x: jax.Array, params: Params, epsilon: float) -> jax.Array:
    """LayerNorm. It is rounded once: between its steps it has at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=1, keepdims=True)
    variance = (centred * centred).mean(axis=1, keepdims=True)
    normalized = centred * jax.lax.rsqrt(variance + epsilon)
    return (normalized * params["weight"] + params["bias"]).astype(x.dtype)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _project(x: jax.Array, params: Params, epsilon: float) -> jax.Array:
    return _gelu(_layer_norm(_linear(x, params), params["norm"], epsilon))


def _rotate(qkv: jax.Array, positions: jax.Array, wavelengths: tuple[float, float]) -> jax.Array:
    """Turn q and k in qkv [num_slots, 3, heads, D] by rotary position codes. Half turns are products in float32."""
    turns = half_turns(qkv.shape[3], wavelengths)
    half = (positions[:, :, None] * turns).reshape(len(qkv), 1, 1, turns.size)
    angles = np.pi * half.astype(jnp.promote_types(jnp.float32, qkv.dtype))
    cosine, sine, turned = jnp.cos(angles), jnp.sin(angles), 2 * turns.size
    even, odd = qkv[:, :2, :, 0:turned:2], qkv[:, :2, :, 1:turned:2]
    pairs = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=4)
    return qkv.at[:, :2, :, :turned].set(pairs.reshape(*pairs.shape[:3], turned).astype(qkv.dtype))


def _blocks(x: jax.Array, params: Params, level: Level, heads: int, config: Config) -> jax.Array:
    """Attention and MLP, each behind a norm and beside the identity, as often as the stage has blocks."""
    epsilon = config.epsilon
    for i in range(len(params)):
        block = params[str(i)]
        qkv = _linear(_layer_norm(x, block["norm1"], epsilon), block["qkv"])
        qkv = _rotate(qkv.reshape(len(x), 3, heads, x.shape[1] // heads), level.positions, config.wavelengths)
        q, k, v = jnp.moveaxis(qkv, 1, 0)
        attended = bucket_attention(q, k, v, level.buckets, level.scopes[i % 2])
        x = x + _linear(attended.reshape(x.shape), block["proj"])
        hidden = _gelu(_linear(_layer_norm(x, block["norm2"], epsilon), block["fc1"]))
        x = x + _linear(hidden, block["fc2"])
    return x


def pool(x: jax.Array, members: jax.Array) -> jax.Array:
    """The mean over each child's members: rows [num_slots, C] to [child slots, C]. Children in padding get 0."""
    slots, (children, ratio) = x.shape[0], members.shape
    order = members.reshape(-1)
    # The place of each slot in that order. What is behind -1 has no place.
    target = jnp.where(order < 0, slots, order)
    places = jnp.arange(children * ratio, dtype=jnp.int32)
    inverse = jnp.full(slots, -1, jnp.int32).at[target].set(places, mode="drop")
    # `scatter` moves rows by these two arrays, and moves gradients back by the same.
    side_by_side = Buckets(order, inverse, jnp.int32(0), ratio, (slots,), (0, children))
    sums = scatter(x, side_by_side).reshape(children, ratio, x.shape[1]).sum(axis=1)
    return sums / jnp.maximum((members >= 0).sum(axis=1, keepdims=True), 1).astype(x.dtype)


def unpool(child: jax.Array, level: Level, below: Level, skip: jax.Array) -> jax.Array:
    """Rows of the children, of level `below`, at their members, plus `skip`: [num_slots, C]."""
    ratio = level.members.shape[1]
    pooled = Pooling(child, below.positions, below.buckets, level.members, ratio, "mean", None, level.buckets)
    return bucket_unpool(child, pooled, skip)
