# SPDX-License-Identifier: Apache-2.0
"""The plans of the backbone as data: every address lies in its memory, and what shares memory is not needed at once."""

from __future__ import annotations

import numpy as np
import plans
import pytest
from ml_dtypes import bfloat16

from gpu3d import flash3d
from gpu3d._arrays import FLOAT32, UINT8, Spec
from gpu3d.cuda.plan import DEVICES, Call, Gemm, Launch, Packed, Steps
from gpu3d.flash3d import network
from gpu3d.flash3d.params import arena_size, layout

CONFIGS = {
    "tiny": flash3d.presets["tiny"],
    "46m": flash3d.presets["flash3d_46m"],
    "129m, other hashes": flash3d.presets["flash3d_129m"].replace(hashes=("xor_mod",) * 5, in_channels=1, classes=7),
}
LENGTHS = {"one sweep": (34_688,), "ragged": (700, 0, 1, 5000), "many": (30,) * 70, "large": (300_000,)}
OPTIONS = {"seed": 1, "rate": 1e-3, "steps": 10, "decay": 0.0, "clip": 1.0}


def specs_of(config, lengths):
    """Points, features, labels, masters, weights."""
    n, arena = sum(lengths), (arena_size(config),)
    rows = Spec((n, 3), FLOAT32), Spec((n, config.in_channels), FLOAT32), Spec((n,), UINT8)
    return *rows, Spec(arena, FLOAT32), Spec(arena, np.dtype(bfloat16))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward(config, lengths, arch):
    points, features, _, masters, weights = specs_of(config, lengths)
    call = network.forward_call(config, lengths, features, DEVICES[arch])
    results = [Spec((sum(lengths), config.classes), FLOAT32)]
    unused = plans.check(call, (points, features, masters, weights), results, DEVICES[arch], shared=True)
    assert not unused


@pytest.mark.parametrize("lengths", list(LENGTHS.values())[:3], ids=list(LENGTHS)[:3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_step(config, lengths):
    given = specs_of(config, lengths)
    scalar, arena = Spec((), FLOAT32), given[3]
    call = network.step_call(config, lengths, given[1], UINT8, 255, DEVICES["sm_90a"])
    changed = arena, arena, arena, Spec((2,), np.dtype(np.uint32))
    call = Call(call.plan, {**call.numbers, **OPTIONS})
    assert not plans.check(call, (*given, *changed), [scalar, scalar], DEVICES["sm_90a"], shared=True)


def test_recompute():
    """A step of eight sweeps fits 12 GB beside the parameters; or a third, with each attention launched twice."""
    config, lengths = CONFIGS["46m"], (34_688,) * 8
    given = specs_of(config, lengths)
    calls = [
        network.step_call(config, lengths, given[1], UINT8, 255, DEVICES["sm_90a"], recompute)
        for recompute in (False, True)
    ]
    once, twice = (
        [step.kernel.function for step in call.plan.steps if isinstance(step, Launch)].count("attention_forward")
        for call in calls
    )
    assert (once, twice) == (22, 44)
    assert 3 * calls[1].plan.workspace < calls[0].plan.workspace < 12e9
    scalar, arena = Spec((), FLOAT32), given[3]
    changed = arena, arena, arena, Spec((2,), np.dtype(np.uint32))
    call = Call(calls[1].plan, {**calls[1].numbers, **OPTIONS})
    assert not plans.check(call, (*given, *changed), [scalar, scalar], DEVICES["sm_90a"], shared=True)


def test_gradients_are_each_written_once():
    """Every parameter has one place that writes its gradient, and no two places overlap."""
    config, lengths = CONFIGS["129m, other hashes"], (700, 0, 1, 5000)
    given = specs_of(config, lengths)
    call = network.gradient_call(config, lengths, given[1], UINT8, 255, DEVICES["sm_90a"])
    results = Spec((), FLOAT32), given[3]
    assert not plans.check(call, given, results, DEVICES["sm_90a"], shared=True)
    written = []
    for step in call.plan.steps:
        pointers = [step.d.pointer, step.bias] if isinstance(step, Gemm) else []
        if isinstance(step, Launch):
            pointers = [p for arg in step.args for p in (arg.fields if isinstance(arg, Packed) else [arg])]
        written += [p.offset for p in pointers if getattr(p, "memory", None) == "result" and p.index == 1]
    assert sorted(written) == sorted(4 * parameter.offset for parameter in layout(config))


def test_batches_with_as_many_buckets_share_a_plan():
    config, device = CONFIGS["46m"], DEVICES["sm_90a"]
    calls = [
        network.forward_call(config, (n, 70), Spec((n + 70, 4), FLOAT32), device) for n in (34_600, 34_688, 30_000)
    ]
    assert calls[0].plan is calls[1].plan is not calls[2].plan
    assert calls[0].numbers["points"] == 34_670 != calls[1].numbers["points"]
    strided = Spec((34_670, 4), FLOAT32, (32, 4))
    assert network.forward_call(config, (34_600, 70), strided, device).plan is not calls[0].plan


def test_no_points():
    config = CONFIGS["tiny"]
    features = specs_of(config, (0, 0))[1]
    call = network.forward_call(config, (0, 0), features, DEVICES["sm_90a"])
    assert not call.plan.steps
    call = network.gradient_call(config, (0, 0), features, UINT8, 255, DEVICES["sm_90a"])
    assert [step.size for step in call.plan.steps] == [4 * arena_size(config), 4]


def test_pieces_share_memory_only_if_they_are_not_needed_at_once():
    steps = Steps(inputs=0, results=0)
    a, b, c, empty = (steps.workspace(name, size) for name, size in (("a", 1000), ("b", 3000), ("c", 900), ("d", 0)))
    for pointer in (a, b, a, c, empty):  # c begins when a and b have ended
        steps.clear(pointer, 8)
    plan = steps.plan(share=True)
    places = {name: (piece.offset, piece.offset + piece.size) for name, piece in plan.pieces.items()}
    assert places["a"][1] <= places["b"][0] or places["b"][1] <= places["a"][0]
    assert places["c"][0] in (places["a"][0], places["b"][0])
    assert plan.workspace < steps.plan().workspace
