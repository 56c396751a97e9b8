# SPDX-License-Identifier: Apache-2.0
"""The Flash3D backbone as a module: torch's layers around the functions of gpu3d, open to be edited.

Names and shapes of the parameters are those of `gpu3d.flash3d`, so both read and write the same files. Gradients are
those of autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from gpu3d import _arrays
from gpu3d.buckets import Buckets, Scopes
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import Level, geometry
from gpu3d.flash3d.params import check_params, init_std, layout
from gpu3d.interop.torch.functions import bucket_attention, bucket_unpool, gather, scatter
from gpu3d.pooling import Pooling
from gpu3d.reference.flash3d import drop_rate, half_turns


class Flash3D(torch.nn.Module):
    """The Flash3D backbone: logits of every point of a batch of clouds.

    The network and the names of its parameters are those of `gpu3d.flash3d`. New weights have the distribution of
    `gpu3d.flash3d.init`; they and the drop path come from torch's random numbers. In training mode, a row skips a
    branch of a block with the block's rate; in evaluation mode there is no drop path.

    Parameters
    ----------
    config : gpu3d.flash3d.Config
        The sizes.

    Notes
    -----
    Angles of the rotary position codes are computed from float32 coordinates, whatever the dtype of the parameters. For
    bfloat16 use torch.autocast.

    Pooling first moves the members of each child side by side, by the operator of `scatter`, and then takes the mean of
    `ratio` rows. So its gradient is a move too, without atomic additions. Beside one fused kernel, this writes and
    reads a copy of the features once per level. Unpooling is `bucket_unpool`.

    References
    ----------
    Flash3D: Super-scaling Point Transformers through Joint Hardware-Geometry Locality, 2024.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> config = flash3d.presets["tiny"].replace(in_channels=1, classes=3, bucket_size=64)
    >>> model = Flash3D(config)
    >>> points, features = torch.rand(500, 3) * 20, torch.rand(500, 1)
    >>> model(points, features, lengths=[300, 200]).shape
    torch.Size([500, 3])

    Weights go to a file and back. `gpu3d.flash3d` reads the same file:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flash3d.save(f"{folder}/tiny.safetensors", model.state_dict(), config)
    ...     again = Flash3D.from_params(*flash3d.load(f"{folder}/tiny.safetensors"))
    >>> torch.equal(again.stem.weight, model.stem.weight)
    True
    """

    encoder: Any  # one ModuleDict per level. torch's types do not know its entries
    decoder: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        layout(config)  # checks the type
        self.config = config
        channels, ascending, epsilon = config.channels, config.ascending_channels, config.epsilon
        numbers = itertools.count()  # of the blocks, in the order in which they run

        def blocks(c: int, depth: int, heads: int) -> Blocks:
            rates = [drop_rate(next(numbers), config) for _ in range(depth)]
            return Blocks(
                [Block(c, heads, config.mlp, rate, epsilon) for rate in rates],
                half_turns(c // heads, config.wavelengths),
            )

        self.stem = torch.nn.Linear(config.in_channels, channels[0])
        self.encoder = torch.nn.ModuleList()
        for level, (c, depth, heads) in enumerate(zip(channels, config.depths, config.heads, strict=True)):
            parts: dict[str, torch.nn.Module] = {"blocks": blocks(c, depth, heads)}
            if level:
                parts["down"] = Projection(channels[level - 1], c, epsilon)
            self.encoder.append(torch.nn.ModuleDict(parts))
        decoder = []
        for level in reversed(range(config.levels - 1)):
            parts = {
                "up": Projection(ascending[level + 1], ascending[level], epsilon),
                "skip": Projection(channels[level], ascending[level], epsilon),
                "blocks": blocks(ascending[level], config.decoder_depths[level], config.decoder_heads[level]),
            }
            decoder.append(torch.nn.ModuleDict(parts))
        self.decoder = torch.nn.ModuleList(reversed(decoder))  # from level 0 down, like the encoder
        self.head = Head(ascending[0], config.classes, epsilon)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                std = init_std(module.in_features)
                torch.nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                torch.nn.init.zeros_(module.bias)

    @classmethod
    def from_params(cls, params: dict[str, Any], config: Config) -> Flash3D:
        """A module with a copy of parameters.

        Parameters
        ----------
        params : dict
            As `gpu3d.flash3d.init` or `gpu3d.flash3d.load` returns them, of NumPy or CuPy.
        config : gpu3d.flash3d.Config
            The config of the params.

        Returns
        -------
        Flash3D
            On the CPU, in float32.

        Raises
        ------
        TypeError, ValueError
            The params do not fit the config; the first mismatch is named.
        """
        arrays = check_params(params, config)
        module = cls(config)
        native = {path: _arrays.download(_arrays.read(array, path)) for path, array in arrays.items()}
        module.load_state_dict({path: torch.tensor(array) for path, array in native.items()})
        return module

    def forward(
        self, points: torch.Tensor, features: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Compute the logits of every point.

        Parameters
        ----------
        points : Tensor [N, 3] or [B, n, 3]
            Coordinates of any float dtype, without a gradient. They are used as float32: subtract an origin from
            float64 coordinates that are large.
        features : Tensor [N, C] or [B, n, C]
            Input features of any float dtype.
        lengths : sequence of int, optional
            Points of each cloud, host integers that sum to N. Clouds may be empty. Default: one cloud.

        Returns
        -------
        Tensor [N, classes]
            In the order of the points, in the dtype of the parameters, or in autocast's.

        Raises
        ------
        TypeError, ValueError
            An argument is not what is listed above; the message says what was received and the cure.
        """
        points, features, lengths = self._checked(points, features, lengths)
        return self.logits(geometry(points, self.config, lengths), features)

    def logits(self, levels: Sequence[Level], features: torch.Tensor) -> torch.Tensor:
        """Compute the logits of points whose levels are known; `forward` without the geometry.

        Parameters
        ----------
        levels : sequence of Level
            As `gpu3d.flash3d.geometry.geometry` returns them, of tensors.
        features : Tensor [N, C]
            Input features in the dtype of the parameters.

        Returns
        -------
        Tensor [N, classes]
        """
        top = levels[0].buckets
        x = self.stem(scatter(features, top))
        skips = []
        for i, (level, stage) in enumerate(zip(levels, self.encoder, strict=True)):
            if i:
                x = stage.down(pool(x, levels[i - 1].members))
            x = stage.blocks(x, level)
            skips.append(x)
        for i in reversed(range(len(self.decoder))):
            stage = self.decoder[i]
            x = unpool(stage.up(x), levels[i], levels[i + 1], stage.skip(skips[i]))
            x = stage.blocks(x, levels[i])
        return gather(self.head(x), top)

    def extra_repr(self) -> str:
        """What print shows besides the layers."""
        return f"config={self.config}"

    def _checked(self, points: Any, features: Any, lengths: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """Points as float32 [N, 3], features in the parameters' dtype, and the lengths of the clouds."""
        for name, x in (("points", points), ("features", features)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: convert by torch.as_tensor({name}).")
            if not x.is_floating_point():
                raise TypeError(f"{name} must have a float dtype, got {x.dtype}: convert by {name}.float().")
        lengths = _arrays.cloud_lengths(tuple(points.shape), lengths, "points", "lengths", (3,))
        if features.shape[:-1] != points.shape[:-1] or features.shape[-1] != self.config.in_channels:
            raise ValueError(
                f"features must have a row of {self.config.in_channels} channels (config.in_channels) for each point, "
                f"got shape {list(features.shape)} for points of shape {list(points.shape)}."
            )
        features = features.reshape(-1, self.config.in_channels).to(self.stem.weight.dtype)
        return points.reshape(-1, 3).float(), features, lengths


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in the form with tanh."""
    return functional.gelu(x, approximate="tanh")


class Projection(torch.nn.Linear):
    """A linear layer, LayerNorm and GELU, which lead from one level to another."""

    def __init__(self, inputs: int, outputs: int, epsilon: float) -> None:
        super().__init__(inputs, outputs)
        self.norm = torch.nn.LayerNorm(outputs, epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map rows."""
        return gelu(self.norm(super().forward(x)))


class Head(torch.nn.Linear):
    """LayerNorm, and a linear layer to the logits."""

    def __init__(self, channels: int, classes: int, epsilon: float) -> None:
        super().__init__(channels, classes)
        self.norm = torch.nn.LayerNorm(channels, epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map rows."""
        return super().forward(self.norm(x))


class DropPath(torch.nn.Module):
    """In training, set rows to 0 at a rate, and divide the others by 1 - rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map rows."""
        if not self.training or self.rate == 0:
            return x
        return x * functional.dropout(x.new_ones(x.shape[0], 1), self.rate)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"rate={self.rate}"


class Attention(torch.nn.Module):
    """`bucket_attention` of a packed projection. It has no parameters. To try another one, replace it in the blocks."""

    def forward(self, qkv: torch.Tensor, buckets: Buckets, scopes: Scopes) -> torch.Tensor:
        """Map [num_slots, 3, heads, D] to [num_slots, heads, D]."""
        q, k, v = qkv.unbind(1)
        return bucket_attention(q, k, v, buckets, scopes)


class Block(torch.nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside the identity. Positions turn queries and keys."""

    def __init__(self, channels: int, heads: int, mlp: int, rate: float, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.LayerNorm(channels, epsilon)
        self.qkv = torch.nn.Linear(channels, 3 * channels)
        self.attention = Attention()
        self.proj = torch.nn.Linear(channels, channels)
        self.norm2 = torch.nn.LayerNorm(channels, epsilon)
        self.fc1 = torch.nn.Linear(channels, mlp * channels)
        self.fc2 = torch.nn.Linear(mlp * channels, channels)
        self.drop = DropPath(rate)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, buckets: Buckets, scopes: Scopes) -> torch.Tensor:
        """Map rows [num_slots, C] in slot order. `angles` are those of `Blocks.angles` for these rows."""
        qkv = rotate(self.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)), angles)
        x = x + self.drop(self.proj(self.attention(qkv, buckets, scopes).flatten(1)))
        return x + self.drop(self.fc2(gelu(self.fc1(self.norm2(x)))))


class Blocks(torch.nn.ModuleList):
    """The blocks of a stage, one after another. Even and odd ones have different scopes.

    `turns` are the `half_turns` of the blocks' heads.
    """

    turns: torch.Tensor

    def __init__(self, blocks: Sequence[Block], turns: np.ndarray) -> None:
        super().__init__(blocks)
        # No parameter, so not in files. As int32, so that half() and bfloat16() leave it as it is.
        self.register_buffer("turns", torch.from_numpy(turns.view(np.int32)), persistent=False)

    def forward(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Map rows [num_slots, C] in slot order."""
        angles = self.angles(level.positions, x.dtype)
        for i, block in enumerate(self):
            x = block(x, angles, level.buckets, level.scopes[i % 2])
        return x

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The angles [num_slots, pairs] by which pairs of q and k turn. Half turns are products in float32."""
        turns = (positions.unsqueeze(2) * self.turns.view(torch.float32)).flatten(1)
        return math.pi * turns.to(torch.promote_types(turns.dtype, dtype))


def rotate(qkv: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn q and k in qkv [num_slots, 3, heads, D]: elements 2 p and 2 p + 1 by angle p. Pairs without one stay."""
    turned = 2 * angles.shape[1]
    even, odd = qkv[:, :2, :, :turned].unflatten(3, (-1, 2)).unbind(4)
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    qk = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=4).flatten(3).to(qkv.dtype)
    return torch.cat([torch.cat([qk, qkv[:, :2, :, turned:]], dim=3), qkv[:, 2:]], dim=1)


def pool(x: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """The mean over each child's members: rows [num_slots, C] to [child slots, C]. Children in padding get 0."""
    slots, (children, ratio) = x.shape[0], members.shape
    order = members.flatten()
    # The place of each slot in that order. What is behind -1 goes to one more row, which is cut off.
    target = torch.where(order < 0, slots, order).long()
    places = torch.arange(children * ratio, dtype=torch.int32, device=order.device)
    inverse = order.new_full((slots + 1,), -1).scatter(0, target, places)[:slots]
    # `scatter` moves rows by these two arrays, and moves gradients back by the same.
    side_by_side = Buckets(order, inverse, inverse.new_zeros(()), ratio, (slots,), (0, children))
    sums = scatter(x, side_by_side).unflatten(0, (children, ratio)).sum(dim=1)
    return sums / (members >= 0).sum(dim=1, keepdim=True).clamp(min=1)


def unpool(child: torch.Tensor, level: Level, below: Level, skip: torch.Tensor) -> torch.Tensor:
    """Rows of the children, of level `below`, at their members, plus `skip`: [num_slots, C]."""
    ratio = level.members.shape[1]
    pooled = Pooling(child, below.positions, below.buckets, level.members, ratio, "mean", None, level.buckets)
    return bucket_unpool(child, pooled, skip)
