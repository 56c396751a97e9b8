# SPDX-License-Identifier: Apache-2.0
"""AdamW over a flat arena of parameters, clipped by the global norm, and the one-cycle learning rate.

Parameters, gradients and moments are stored in float32. Each step computes in float64 and rounds the stored values
once. The definitions are those of torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ and
torch.optim.lr_scheduler.OneCycleLR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BETAS = 0.9, 0.999
EPSILON = 1e-8  # added to the root of the second moment
CLIP_EPSILON = 1e-6  # added to the norm by which gradients are clipped
WARMUP, DIVISOR, FINAL_DIVISOR = 0.04, 10.0, 100.0  # share of the steps; first and last rate, see one_cycle


def one_cycle(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step, 0 to steps - 1.

    It rises by a half cosine from peak / 10 to the peak in the first 4 % of the steps, and falls by a half cosine to
    peak / 1000.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be from 0 to {steps - 1}, below the planned number of steps, got {step}.")
    top = WARMUP * steps - 1  # the step of the peak, which is no integer in general
    first = peak / DIVISOR
    if step <= top:
        return _cosine(first, peak, step / top if top else 1.0)
    return _cosine(peak, first / FINAL_DIVISOR, (step - top) / (steps - 1 - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


@dataclass
class State:
    """What AdamW keeps between steps."""

    first: np.ndarray  # float32, like the arena: running mean of the gradient
    second: np.ndarray  # and of its square
    steps: int = 0  # taken
    skipped: int = 0  # because the loss or the norm was not finite


def global_norm(gradient: np.ndarray) -> float:
    """The Euclidean norm of a flat gradient; the same bits for the same gradient."""
    return math.sqrt(np.square(gradient, dtype=np.float64).sum())  # np.dot's order depends on the number of threads


def update(
    arena: np.ndarray,
    gradient: np.ndarray,
    loss: float,
    state: State,
    *,
    lr: float,
    weight_decay: float,
    decayed: int,
    clip: float,
) -> bool:
    """One step in place. Returns whether it was taken: a step whose loss or norm is not finite changes nothing.

    The first `decayed` elements have weight decay. Gradients are scaled down to the norm `clip` if theirs is larger.
    """
    norm = global_norm(gradient)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state.skipped += 1
        return False
    state.steps += 1
    g = gradient * np.float64(min(1.0, clip / (norm + CLIP_EPSILON)))
    beta1, beta2 = BETAS
    first = beta1 * state.first.astype(np.float64) + (1 - beta1) * g
    second = beta2 * state.second.astype(np.float64) + (1 - beta2) * g * g
    state.first[:], state.second[:] = first, second
    new = arena.astype(np.float64)
    new[:decayed] *= 1 - lr * weight_decay
    root = np.sqrt(second / (1 - beta2**state.steps)) + EPSILON
    arena[:] = new - lr / (1 - beta1**state.steps) * first / root
    return True
