# SPDX-License-Identifier: Apache-2.0
"""Peers of the losses between two batches of clouds: Chamfer distances, APML as published, entropic transport.

Each `Prepare` imports what it needs and returns a function of two torch tensors [B, n, 3] that returns a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks import data, timing

Loss = Callable[[Any, Any], Any]
Prepare = Callable[[], Loss]

# Times in ms (forward, forward+backward) by (clouds, points per cloud), from an earlier run on an H100 80GB (driver
# 580, CUDA 13.0, torch 2.11, 2026-11-22). Tables mark them as earlier. y is on a surface, x is y with noise of 0.02.
CDIST_EARLIER = {(32, 2048): (1.44, 4.37), (8, 8192): (5.45, 16.8), (1, 65_536): (41.6, 152.0)}
DENSE_EARLIER = {
    (8, 2048): (13.3, 14.0),
    (32, 2048): (49.5, 51.6),
    (8, 8192): (168.0, 178.0),
    (1, 16_384): (83.0, 89.0),
}
FLASH_SINKHORN_EARLIER = {(8, 8192): (26.6, 29.9), (1, 131_072): (185.0, 251.0)}


def call(loss: Loss, x: Any, y: Any, clouds: int, both: bool) -> timing.Call:
    """A call of `loss` on packed CuPy arrays [B * n, 3]: its value, or if `both` its gradients by autograd."""
    import torch

    inputs = [data.to_torch(rows).view(clouds, -1, 3).requires_grad_(both) for rows in (x, y)]
    return (lambda: torch.autograd.grad(loss(*inputs), inputs)) if both else lambda: loss(*inputs)


# ---- Chamfer -------------------------------------------------------------------------------------------------------


def cdist_chamfer() -> Loss:
    import torch

    def chamfer(x: Any, y: Any) -> Any:
        distances = torch.cdist(x, y)
        return distances.min(2).values.mean() + distances.min(1).values.mean()

    return chamfer


def pytorch3d_chamfer() -> Loss:
    from pytorch3d.loss import chamfer_distance

    return lambda x, y: chamfer_distance(x, y)[0]


# ---- APML ----------------------------------------------------------------------------------------------------------


def dense_apml(p_min: float, threshold: float, iterations: int) -> Prepare:
    """APML as published (arXiv:2512.19743), over all pairs. The gradient flows through the cost and not the plan."""

    def prepare() -> Loss:
        import torch

        def choices(cost: Any) -> Any:
            nearest = cost.topk(2, dim=2, largest=False).values
            gap = (nearest[..., 1:] - nearest[..., :1]).clamp(min=1e-8)
            k = torch.exp((nearest[..., :1] - cost) * (math.log((cost.shape[2] - 1) / (1 - p_min)) / gap))
            k = torch.where(k > threshold, k, 0)
            return k / k.sum(dim=2, keepdim=True)

        def apml(x: Any, y: Any) -> Any:
            cost = torch.cdist(x, y)
            with torch.no_grad():
                plan = (choices(cost) + choices(cost.mT).mT) / 2
                for _ in range(iterations):
                    plan = plan / (plan.sum(dim=2, keepdim=True) + 1e-8)
                    plan = plan / (plan.sum(dim=1, keepdim=True) + 1e-8)
            return (plan * cost).sum(dim=(1, 2)).mean()

        return apml

    return prepare


# ---- entropic transport: another loss, here for scale only ---------------------------------------------------------

BLUR = 0.05


def flash_sinkhorn() -> Loss:
    from flash_sinkhorn import SamplesLoss

    loss = SamplesLoss("sinkhorn", blur=BLUR, debias=False)
    return lambda x, y: loss(x, y).mean()


def geomloss_keops() -> Loss:
    import pykeops  # noqa: F401 - says clearly when it is missing, which backend="online" does not
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=BLUR, debias=False, backend="online")
    return lambda x, y: loss(x, y).mean()
