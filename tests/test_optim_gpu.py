# SPDX-License-Identifier: Apache-2.0
"""AdamW with one-cycle and clipping against float64, in poisoned memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from steps import assert_accurate, run

from gpu3d._arrays import BFLOAT16, FLOAT32, FLOATS
from gpu3d.cuda import optim

pytestmark = pytest.mark.gpu

COPIES = [FLOATS[0], FLOATS[2], BFLOAT16]
SIZES = (0, 4, 64, 2044, 2048, 2052, 100_000, 3_000_000)
RATE, DECAY, CLIP = 2e-3, 5e-3, 1.5


def name_of(dtype):
    return dtype.name


def one_cycle(step, steps, largest):
    """torch.optim.lr_scheduler.OneCycleLR: cosine annealing, pct_start 0.04, factors 10 and 100."""
    peak, last = 0.04 * steps - 1, steps - 1

    def anneal(start, end, part):
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    if step <= peak:
        return anneal(largest / 10, largest, step / peak)
    return anneal(largest, largest / 1000, (step - peak) / (last - peak))


class Training:
    """Parameters and moments after some steps."""

    def __init__(self, parameters, decayed):
        self.parameters, self.decayed = parameters, decayed
        self.m, self.v = np.zeros_like(parameters), np.zeros_like(parameters)

    def step(self, gradients, number, steps, rate=RATE, decay=DECAY, clip=CLIP):
        """torch.optim.AdamW behind torch.nn.utils.clip_grad_norm_, in the dtype of the parameters."""
        wide = self.parameters.dtype.type
        norm = np.sqrt((gradients.astype(np.float64) ** 2).sum())
        g = gradients.astype(wide) * wide(min(1, clip / (norm + 1e-6)))
        lr = one_cycle(number, steps, rate)
        self.parameters[: self.decayed] *= wide(1 - lr * decay)
        self.m += (g - self.m) * wide(1 - 0.9)
        self.v = self.v * wide(0.999) + g * g * wide(1 - 0.999)
        t = number + 1
        root = np.sqrt(self.v) / wide(math.sqrt(1 - 0.999**t)) + wide(1e-8)
        self.parameters -= wide(lr / (1 - 0.9**t)) * (self.m / root)
        return norm


def launch(cp, gradients, loss, state, parameters, m, v, decayed, copy_dtype, steps, clip=CLIP):
    """state, parameters, m, v, norm, copy after one step."""
    size = len(gradients)
    copied = copy_dtype != FLOAT32

    def add(steps, given, made):
        gradients, loss = given
        state, parameters, m, v, norm, *copy = made
        copy = copy[0] if copied else None
        options = {"size": size, "decayed": decayed, "copy": copy, "copy_dtype": copy_dtype}
        optim.add_adamw(steps, gradients, loss, state, parameters, m, v, norm, **options)

    made = [state, parameters, m, v, ((), FLOAT32)] + [((size,), copy_dtype)] * copied
    numbers = {"rate": RATE, "steps": steps, "decay": DECAY, "clip": clip}
    state, parameters, m, v, norm, *copy = run(cp, add, [gradients, np.float32(loss)], made, numbers)
    if copied and size and not state[1]:
        assert (copy[0] == parameters.astype(copy_dtype)).all()
    return state, parameters, m, v, norm


def gradients_of(size, number):
    scale = (0.0001, 1.0)[number % 2]  # below and above the clip
    return (np.random.default_rng(100 + number).normal(size=size) * scale).astype(np.float32)


def check(cp, size, copy_dtype, steps=50, count=4):
    decayed = size // 2 // 4 * 4
    start = np.random.default_rng(1).normal(size=size).astype(np.float32)
    exact, naive = Training(start.astype(np.float64), decayed), Training(start.copy(), decayed)
    state = np.zeros(2, np.uint32)
    parameters, m, v = start, np.zeros_like(start), np.zeros_like(start)
    for number in range(count):
        gradients = gradients_of(size, number)
        state, parameters, m, v, norm = launch(cp, gradients, 1.0, state, parameters, m, v, decayed, copy_dtype, steps)
        expected = exact.step(gradients, number, steps)
        naive.step(gradients, number, steps)
        assert list(state) == [number + 1, 0]
        assert abs(norm - expected) <= 1e-6 * expected
        for name in ("parameters", "m", "v") if size else ():
            values = {"parameters": parameters, "m": m, "v": v}[name]
            assert_accurate(values, getattr(naive, name), getattr(exact, name), f"{size} {name} step {number}")


def test_small_optim(cp):
    """For compute-sanitizer: several blocks of each kernel."""
    check(cp, 10_000, BFLOAT16)


@pytest.mark.parametrize("copy_dtype", COPIES, ids=name_of)
def test_sizes(cp, copy_dtype):
    for size in SIZES:
        check(cp, size, copy_dtype)


@pytest.mark.parametrize("steps", [1, 10, 25, 50, 100])
def test_one_cycle(cp, steps):
    """Without gradients only decay changes the parameters, so they tell the rate."""
    state, parameters = np.zeros(2, np.uint32), np.ones(64, np.float32)
    zeros = np.zeros(64, np.float32)
    expected = 1.0
    for number in range(steps + 2):
        state, parameters, *_ = launch(cp, zeros, 1.0, state, parameters, zeros, zeros, 64, FLOAT32, steps)
        at = min(number, steps - 1)  # after the last step the rate stays
        expected *= 1 - (RATE if 0.04 * steps - 1 == at == 0 else one_cycle(at, steps, RATE)) * DECAY
        assert abs(parameters - expected).max() < 1e-7 * (number + 1)


def test_clipping(cp):
    """The first step's m is a tenth of the clipped gradient."""
    gradients = gradients_of(1024, 1)
    norm = np.linalg.norm(gradients.astype(np.float64))
    zeros = np.zeros(1024, np.float32)
    for clip in (norm / 3, 2 * norm, math.inf):
        _, _, m, _, got = launch(cp, gradients, 1.0, np.zeros(2, np.uint32), zeros, zeros, zeros, 0, FLOAT32, 50, clip)
        factor = min(1, clip / (norm + 1e-6))
        np.testing.assert_allclose(m, 0.1 * factor * gradients, rtol=1e-6, atol=0)
        assert abs(got - norm) < 1e-6 * norm


@pytest.mark.parametrize("bad", ["loss", "loss inf", "first", "middle", "last", "inf"])
def test_a_step_that_is_not_finite_is_skipped(cp, bad):
    size = 30_000
    gradients, loss = gradients_of(size, 1), 1.0
    places = {"first": 0, "middle": 12_345, "last": size - 1, "inf": 77}
    if bad in places:
        gradients[places[bad]] = np.inf if bad == "inf" else np.nan
    else:
        loss = math.inf if bad == "loss inf" else math.nan
    rng = np.random.default_rng(2)
    before = [rng.random(size).astype(np.float32) for _ in range(3)]
    state = np.array([5, 2], np.uint32)
    state, *after, norm = launch(cp, gradients, loss, state, *before, size, FLOAT32, 50)
    assert list(state) == [5, 3]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(after, before, strict=True))
    assert bad.startswith("loss") == math.isfinite(norm)
    state, *after, _ = launch(cp, gradients_of(size, 1), 1.0, state, *after, size, BFLOAT16, 50)
    assert list(state) == [6, 3] and not any((a == b).all() for a, b in zip(after, before, strict=True))
