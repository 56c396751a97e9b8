# SPDX-License-Identifier: Apache-2.0
"""The functions of `gpu3d.interop.torch` as modules: an attention block with its projections, and two losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu3d.buckets import Buckets, Scopes
from gpu3d.interop.torch.functions import apml, bucket_attention, chamfer


class BucketAttention(torch.nn.Module):
    """Multi-head attention within scopes of buckets: a projection to q, k and v, attention, and a projection back.

    Parameters
    ----------
    channels : int
        Channels of the input and output rows.
    heads : int
        Number of heads. The head dimension, channels / heads, is at most 128 and divisible by 8.
    bias : bool
        Whether both projections have a bias.
    scale : float, optional
        The factor of the scores. Default: 1 / sqrt(channels / heads).
    device, dtype
        The device and dtype of the parameters, as in torch.nn.Linear.

    Notes
    -----
    q, k and v are views of one packed projection [num_slots, 3, heads, channels / heads]; nothing is copied. Padding
    rows must be finite, as they are after `scatter`, because the gradient of a weight is a sum over all rows.

    Examples
    --------
    >>> buckets = bucketize(torch.rand(1000, 3), 64)
    >>> block = BucketAttention(channels=32, heads=4)
    >>> x = scatter(torch.rand(1000, 32), buckets)
    >>> block(x, buckets, scopes(buckets, 4, shift=2)).shape
    torch.Size([1024, 32])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        bias: bool = True,
        scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads or channels // heads % 8 or not 0 < channels // heads <= 128:
            raise ValueError(
                f"channels / heads, the head dimension, must be at most 128 and divisible by 8, got {channels} "
                f"channels for {heads} heads."
            )
        self.heads, self.scale = heads, scale
        self.qkv = torch.nn.Linear(channels, 3 * channels, bias=bias, device=device, dtype=dtype)
        self.projection = torch.nn.Linear(channels, channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, buckets: Buckets, scopes: Scopes) -> torch.Tensor:
        """Map rows [num_slots, channels] in slot order to rows of the same shape."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        return self.projection(bucket_attention(q, k, v, buckets, scopes, scale=self.scale).flatten(1))

    def extra_repr(self) -> str:
        """What print shows besides the projections."""
        return f"heads={self.heads}, scale={self.scale}"


class ChamferLoss(torch.nn.Module):
    """The Chamfer distance as a module: `chamfer` with fixed options.

    Parameters
    ----------
    squared, reduction, direction, empty
        As in `chamfer`.

    Examples
    --------
    >>> x = torch.rand(2, 100, 3, requires_grad=True)
    >>> ChamferLoss(squared=True)(x, torch.rand(2, 80, 3)).backward()
    >>> x.grad.shape
    torch.Size([2, 100, 3])
    """

    def __init__(
        self, *, squared: bool = False, reduction: str = "mean", direction: str = "both", empty: str = "error"
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "squared": squared,
            "reduction": reduction,
            "direction": direction,
            "empty": empty,
        }

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        x_lengths: Sequence[int] | None = None,
        y_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the loss of x and y, which are packed as in `chamfer`."""
        return chamfer(x, y, x_lengths=x_lengths, y_lengths=y_lengths, **self.options)

    def extra_repr(self) -> str:
        """What print shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class APMLLoss(torch.nn.Module):
    """The APML loss as a module: `apml` with fixed options.

    Parameters
    ----------
    p_min, threshold, iterations, symmetrize, reduction, max_entries
        As in `apml`.

    Examples
    --------
    >>> pred = torch.rand(2, 100, 3, requires_grad=True)
    >>> APMLLoss(iterations=10)(pred, torch.rand(2, 100, 3)).backward()
    >>> pred.grad.shape
    torch.Size([2, 100, 3])
    """

    def __init__(
        self,
        *,
        p_min: float = 0.8,
        threshold: float = 1e-8,
        iterations: int = 20,
        symmetrize: str = "mean",
        reduction: str = "mean",
        max_entries: int | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "p_min": p_min,
            "threshold": threshold,
            "iterations": iterations,
            "symmetrize": symmetrize,
            "reduction": reduction,
            "max_entries": max_entries,
        }

    def forward(
        self,
        pred: torch.Tensor,
        target: torch.Tensor,
        pred_lengths: Sequence[int] | None = None,
        target_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the loss of pred and target, which are packed as in `apml`."""
        return apml(pred, target, pred_lengths=pred_lengths, target_lengths=target_lengths, **self.options)

    def extra_repr(self) -> str:
        """What print shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
