# SPDX-License-Identifier: Apache-2.0
"""The plans of the backbone as data: every address lies in its memory, and what shares memory is not needed at once."""

from __future__ import annotations

import numpy as np
import plans
import pytest
from ml_dtypes import bfloat16

from gpu3d import flash3d
from gpu3d._arrays import FLOAT32, UINT8, Spec
from gpu3d.cuda import buckets, clouds
from gpu3d.cuda.plan import DEVICES, Call, Gemm, Launch, Packed, Steps
from gpu3d.cuda.pooling import GROUP_TILE
from gpu3d.flash3d import network
from gpu3d.flash3d.levels import EVEN, KINDS, ODD, POOL, SORT, Layout, layout_of, rounded_up
from gpu3d.flash3d.params import arena_size
from gpu3d.flash3d.params import layout as layout_of_parameters

CONFIGS = {
    "tiny": flash3d.presets["tiny"],
    "46m": flash3d.presets["flash3d_46m"],
    "129m, other hashes": flash3d.presets["flash3d_129m"].replace(hashes=("xor_mod",) * 5, in_channels=1, classes=7),
}
LENGTHS = {"one sweep": (34_688,), "ragged": (700, 0, 1, 5000), "many": (30,) * 70, "large": (300_000,)}
HOPPER = DEVICES["sm_90a"]
OPTIONS = {"seed": 1, "rate": 1e-3, "steps": 10, "decay": 0.0, "clip": 1.0}


def given_of(config, lengths, device=HOPPER):
    """The layout, and the specs of points, features, labels, tables, masters and weights."""
    layout = layout_of(lengths, config, device)
    n, arena = sum(lengths), (arena_size(config),)
    rows = Spec((n, 3), FLOAT32), Spec((n, config.in_channels), FLOAT32), Spec((n,), UINT8)
    tables = Spec((layout.rows, clouds.ROW_BYTES), UINT8)
    return layout, (*rows, tables, Spec(arena, FLOAT32), Spec(arena, np.dtype(bfloat16)))


def step_of(config, lengths, recompute=False):
    """The call of a training step, and the specs of its inputs."""
    layout, given = given_of(config, lengths)
    plan = network.step_plan(config, layout.sizes, FLOAT32, UINT8, 255, HOPPER, recompute)
    arena = given[4]
    return Call(plan, {**OPTIONS, "points": sum(lengths)}), (
        *given,
        arena,
        arena,
        arena,
        Spec((2,), np.dtype(np.uint32)),
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward(config, lengths, arch):
    device = DEVICES[arch]
    layout, (points, features, _, *rest) = given_of(config, lengths, device)
    call = Call(network.forward_plan(config, layout.sizes, FLOAT32, device), {"points": sum(lengths)})
    results = [Spec((layout.slots, config.classes), FLOAT32)]
    assert not plans.check(call, (points, features, *rest), results, device, shared=True)


@pytest.mark.parametrize("lengths", list(LENGTHS.values())[:3], ids=list(LENGTHS)[:3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_step(config, lengths):
    call, given = step_of(config, lengths)
    assert not plans.check(call, given, [Spec((), FLOAT32)] * 2, HOPPER, shared=True)


def test_features_of_another_dtype():
    config, lengths = CONFIGS["tiny"], (700, 0, 1, 5000)
    layout, (points, features, _, *rest) = given_of(config, lengths)
    call = Call(network.forward_plan(config, layout.sizes, np.dtype(np.float16), HOPPER), {"points": sum(lengths)})
    results = [Spec((layout.slots, config.classes), FLOAT32)]
    given = points, features._replace(dtype=np.dtype(np.float16)), *rest
    assert not plans.check(call, given, results, HOPPER, shared=True)


def test_recompute():
    """A step of eight sweeps fits 12 GB beside the parameters; or a third, with each attention launched twice."""
    config, lengths = CONFIGS["46m"], (34_688,) * 8
    (first, _), (second, given) = (step_of(config, lengths, recompute) for recompute in (False, True))
    calls = first, second
    once, twice = (
        [step.kernel.function for step in call.plan.steps if isinstance(step, Launch)].count("attention_forward")
        for call in calls
    )
    assert (once, twice) == (22, 44)
    assert 3 * calls[1].plan.workspace < calls[0].plan.workspace < 12e9
    assert not plans.check(second, given, [Spec((), FLOAT32)] * 2, HOPPER, shared=True)


def test_gradients_are_each_written_once():
    """Every parameter has one place that writes its gradient, and no two places overlap."""
    config, lengths = CONFIGS["129m, other hashes"], (700, 0, 1, 5000)
    layout, given = given_of(config, lengths)
    plan = network.gradient_plan(config, layout.sizes, FLOAT32, UINT8, 255, HOPPER)
    results = Spec((), FLOAT32), given[4]
    call = Call(plan, {"points": sum(lengths)})
    assert not plans.check(call, given, results, HOPPER, shared=True)
    written = []
    for step in plan.steps:
        pointers = [step.d.pointer, step.bias] if isinstance(step, Gemm) else []
        if isinstance(step, Launch):
            pointers = [p for arg in step.args for p in (arg.fields if isinstance(arg, Packed) else [arg])]
        written += [p.offset for p in pointers if getattr(p, "memory", None) == "result" and p.index == 1]
    assert sorted(written) == sorted(4 * parameter.offset for parameter in layout_of_parameters(config))


def test_no_points():
    config = CONFIGS["tiny"]
    layout, _ = given_of(config, (0, 0))
    assert layout == Layout((), b"") and layout.slots == 0
    assert not network.forward_plan(config, (), FLOAT32, HOPPER).steps
    plan = network.gradient_plan(config, (), FLOAT32, UINT8, 255, HOPPER)
    assert [step.size for step in plan.steps] == [4 * arena_size(config), 4]


# ---- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 34, 63, 65, 1000, 2**20 + 1])
def test_counts_are_rounded_up(count):
    rounded = rounded_up(count)
    assert count <= rounded <= count + count // 16 and rounded_up(rounded) == rounded


def test_batches_of_nearly_the_same_size_share_a_plan():
    config = CONFIGS["46m"]
    layouts = [layout_of(lengths, config, HOPPER) for lengths in ((32_800,), (34_688,), (33_500,), (34_820,))]
    plan, same, less, other = (network.forward_plan(config, x.sizes, FLOAT32, HOPPER) for x in layouts)
    assert plan is same is less is not other
    assert layouts[0].tables != layouts[1].tables
    # A stream of sweeps needs few plans.
    assert len({layout_of((n,), config, HOPPER).sizes for n in range(30_000, 40_000, 7)}) == 7


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("seed", range(30))
def test_tables(seed, arch):
    """Each level's tables cover its slots, and bounds hold what the clouds need."""
    rng, device = np.random.default_rng(seed), DEVICES[arch]
    config = CONFIGS["46m"].replace(bucket_size=int(rng.choice([16, 64, 512])), scope=int(rng.choice([1, 2, 8])))
    largest = [40, 3000, 200_000, 800_000][seed % 4]
    lengths = tuple(int(n) for n in rng.integers(0, largest, rng.integers(1, 90 if seed % 4 < 2 else 4)))
    layout, size = layout_of(lengths, config, device), config.bucket_size
    if not sum(lengths):
        return
    tables = np.frombuffer(layout.tables, np.int32).reshape(config.levels, len(KINDS), -1, 4)
    n = np.array(lengths)
    for depth, (own, table) in enumerate(zip(layout.sizes, tables, strict=True)):
        counts = np.diff(table, axis=1)
        assert (table[:, 0] == 0).all() and (counts >= 0).all() and own.clouds == counts.shape[1]
        assert (counts[:, : len(n), 0] == n).all() and (counts[:, len(n) :, 0] == 0).all()
        held = counts[EVEN, :, 1]
        assert (counts[:, :, 3] == held * size).all() and (held[: len(n)] == -(-n // size)).all()
        assert (held[len(n) : -1] == 0).all()
        assert table[EVEN, -1, 3] == own.sort.slots == rounded_up(int((-(-n // size)).sum())) * size
        ends = table[:, -1, 1:3]
        assert ends[SORT, 0] <= own.sort.tiles and ends[SORT, 1] <= own.sort.groups
        assert ends[EVEN, 1] <= own.scopes[0] and ends[ODD, 1] <= own.scopes[1]
        for kind, stride in ((EVEN, 1), (ODD, config.strides[depth])):
            expected = [buckets.scopes_of([int(count)], size, config.scope, stride).groups for count in held]
            assert (counts[kind, :, 2] == expected).all()
        if own.sort.method != "cloud":
            tiles, groups = buckets.parts(own.sort, n)
            assert (counts[SORT, : len(n), 1] == tiles).all() and (counts[SORT, : len(n), 2] == groups).all()
            assert (counts[SORT, -1, 1:3] == 1).all()
        if depth + 1 < config.levels:
            shape, pooled = layout.sizes[depth + 1].pooled, counts[POOL]
            assert ends[POOL, 0] <= shape.tiles and ends[POOL, 1] <= shape.padding
            assert (pooled[:, 2] == held * size - counts[EVEN, :, 0]).all()
            assert (pooled[: len(n), 1] == -(-n // GROUP_TILE)).all() and pooled[-1, 1] == 1
            assert shape.slots == layout.sizes[depth + 1].sort.slots
        n = -(-n // config.ratio)


# ---- sharing memory ------------------------------------------------------------------------------------------------


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
