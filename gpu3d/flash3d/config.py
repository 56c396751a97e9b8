# SPDX-License-Identifier: Apache-2.0
"""The sizes of a Flash3D backbone, and the presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gpu3d import _arrays
from gpu3d.buckets import check_bucket_size
from gpu3d.cuda.attention import HEAD_DIMS
from gpu3d.reference.buckets import HASHES
from gpu3d.reference.pooling import RATIOS


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of a Flash3D backbone: an encoder of L levels, and a decoder of L - 1.

    Level 0 has all points. Each further level has 1 / ratio of the points of the level above. Sequences have one entry
    per level, from level 0 down; those of the decoder leave the deepest level out.

    Attributes
    ----------
    channels : tuple of int
        Channels of each level.
    depths : tuple of int
        Blocks of each encoder level, at least 1.
    decoder_channels : tuple of int
        Channels of each decoder level.
    decoder_depths : tuple of int
        Blocks of each decoder level, at least 1.
    heads, decoder_heads : tuple of int
        Attention heads of each level. A head has channels / heads channels: a multiple of 8, at most 128.
    hashes : tuple of str
        The hash of `gpu3d.bucketize` that leads each level.
    strides : tuple of int
        The stride of the scopes in every second block of a level. The other blocks have stride 1.
    in_channels : int
        Input features of a point, beside its position.
    classes : int
        Logits of a point.
    bucket_size : int
        Slots in a bucket: a multiple of 16 from 16 to 16384.
    scope : int
        Buckets in an attention scope. Every second block shifts its scopes by half of them.
    ratio : {2, 4, 8}
        Points that are pooled into one between levels.
    mlp : int
        Hidden channels of a block's MLP, as a multiple of its channels.
    drop_path : float
        In training, the rate at which a row skips a branch of the last block, from 0 to below 1. The rate grows
        linearly from 0 in the first block.
    wavelengths : tuple of two floats
        The shortest and the longest wavelength of the rotary position codes, in the unit of the points.
    epsilon : float
        Added to the variance in LayerNorm.
    dtype : {"bfloat16", "float16", "float32"}
        The dtype of activations on a GPU. Sums are float32 in each. The CPU path computes in float64.

    Raises
    ------
    TypeError, ValueError
        A field is not what is listed above; the message says what was received and the cure.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> config = flash3d.presets["tiny"].replace(in_channels=2, classes=5)
    >>> config.levels, config.channels, config.classes
    (4, (32, 64, 128, 256), 5)
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    heads: tuple[int, ...]
    decoder_heads: tuple[int, ...]
    hashes: tuple[str, ...]
    strides: tuple[int, ...]
    in_channels: int = 4
    classes: int = 19
    bucket_size: int = 512
    scope: int = 8
    ratio: int = 2
    mlp: int = 4
    drop_path: float = 0.3
    wavelengths: tuple[float, float] = (0.5, 60.0)
    epsilon: float = 1e-5
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        levels = len(self._set_sequence("channels", None, _at_least_1))
        self._set_sequence("depths", levels, _at_least_1)
        self._set_sequence("decoder_channels", levels - 1, _at_least_1)
        self._set_sequence("decoder_depths", levels - 1, _at_least_1)
        self._set_sequence("heads", levels, _at_least_1)
        self._set_sequence("decoder_heads", levels - 1, _at_least_1)
        self._set_sequence("hashes", levels, _hash)
        self._set_sequence("strides", levels, _at_least_1)
        self._set_sequence("wavelengths", 2, _positive, per="the shortest and the longest")
        for name in ("in_channels", "classes", "scope", "mlp"):
            self._set(name, _at_least_1(getattr(self, name), name))
        self._set("bucket_size", check_bucket_size(self.bucket_size))
        self._set("ratio", _arrays.check_integer(self.ratio, "ratio"))
        self._set("drop_path", _arrays.check_number(self.drop_path, "drop_path"))
        self._set("epsilon", _positive(self.epsilon, "epsilon"))
        _arrays.check_choice(self.dtype, DTYPES, "dtype")
        if self.ratio not in RATIOS:
            raise ValueError(f"ratio must be 2, 4 or 8, got {_arrays.shown(self.ratio)}.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}.")
        if self.wavelengths[0] > self.wavelengths[1]:
            raise ValueError(f"wavelengths must be (shortest, longest), got {self.wavelengths}: exchange the two.")
        _check_heads("channels", self.channels, "heads", self.heads)
        _check_heads("decoder_channels", self.decoder_channels, "decoder_heads", self.decoder_heads)

    @property
    def levels(self) -> int:
        """Number of levels of the encoder."""
        return len(self.channels)

    @property
    def ascending_channels(self) -> tuple[int, ...]:
        """Channels of each level on the way up: those of the decoder, and below them those of the deepest level."""
        return (*self.decoder_channels, self.channels[-1])

    def replace(self, **changes: Any) -> Config:
        """The same sizes with some fields changed."""
        return replace(self, **changes)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _set_sequence(
        self, name: str, length: int | None, check: Callable[[Any, str], Any], per: str = "one per level"
    ) -> tuple[Any, ...]:
        """Check a field that is a sequence of `length` entries, or of 1 or more, and store it as a tuple."""
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                f"{name} must be a tuple, {per}, got {_arrays.shown(value)} of type {type(value).__name__}."
            )
        if length is None and not value:
            raise ValueError(f"{name} must have at least one entry, {per}, got none.")
        if length is not None and len(value) != length:
            raise ValueError(f"{name} must have {length} entries, {per}, got {len(value)}: {_arrays.shown(value)}.")
        checked = tuple(check(entry, f"{name}[{i}]") for i, entry in enumerate(value))
        self._set(name, checked)
        return checked


def _at_least_1(value: Any, name: str) -> int:
    value = _arrays.check_integer(value, name)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def _positive(value: Any, name: str) -> float:
    value = _arrays.check_number(value, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    return value


def _hash(value: Any, name: str) -> str:
    _arrays.check_choice(value, HASHES, name)
    return value


def _check_heads(name: str, channels: tuple[int, ...], heads_name: str, heads: tuple[int, ...]) -> None:
    for level, (c, h) in enumerate(zip(channels, heads, strict=True)):
        if c % (8 * h) or c // h > HEAD_DIMS[-1]:
            raise ValueError(
                f"{name}[{level}] / {heads_name}[{level}] must be a multiple of 8 and at most {HEAD_DIMS[-1]}, got "
                f"{c} / {h}: change one of them."
            )


DTYPES = ("bfloat16", "float16", "float32")
_HASHES = ("zorder_div", "xor_div", "zorder_mod", "xor_mod", "zorder_div")
_STRIDES = (2, 2, 2, 1, 1)  # a stride of 2 needs 16 buckets, which the deeper levels of one sweep do not have

# One level is a head wider than the row suggests, so that there are as many parameters as in the paper.
presets: dict[str, Config] = {
    "flash3d_46m": Config(
        channels=(64, 128, 256, 512, 800),
        depths=(2, 2, 2, 6, 2),
        decoder_channels=(64, 128, 256, 512),
        decoder_depths=(2, 2, 2, 2),
        heads=(2, 4, 8, 16, 25),
        decoder_heads=(2, 4, 8, 16),
        hashes=_HASHES,
        strides=_STRIDES,
    ),
    "flash3d_129m": Config(
        channels=(64, 192, 384, 768, 1536),
        depths=(2, 2, 2, 6, 2),
        decoder_channels=(64, 192, 384, 832),
        decoder_depths=(2, 2, 2, 2),
        heads=(2, 3, 6, 12, 24),
        decoder_heads=(2, 3, 6, 13),
        hashes=_HASHES,
        strides=_STRIDES,
    ),
    "tiny": Config(
        channels=(32, 64, 128, 256),
        depths=(2, 2, 4, 2),
        decoder_channels=(32, 64, 128),
        decoder_depths=(1, 1, 1),
        heads=(1, 2, 4, 8),
        decoder_heads=(1, 2, 4),
        hashes=_HASHES[:4],
        strides=_STRIDES[:4],
        drop_path=0.1,
    ),
}
