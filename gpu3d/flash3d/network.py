# SPDX-License-Identifier: Apache-2.0
"""What the backbone launches on a GPU, as plans: geometry, forward, loss, backward and optimizer.

The workspace holds everything that is not an input or a result, and pieces that are not needed at the same time share
memory. Batches of nearly the same size share a plan.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, Spec
from gpu3d.cuda import arrays, buckets, linear, losses, optim, pooling
from gpu3d.cuda.plan import Call, Device, Input, Matrix, Plan, Pointer, Result, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.layers import Block, Network
from gpu3d.flash3d.levels import Level, Sizes, add_geometry
from gpu3d.flash3d.params import ALIGNMENT, arena_size, decayed_size

# ---- forward and backward ------------------------------------------------------------------------------------------


class _Tape(NamedTuple):
    """What the backward of the network reads."""

    stem: Matrix
    encoder: list[list[Block]]
    decoder: list[list[Block]]
    down: list[Any]
    up: list[Any]
    skip: list[Any]
    last: Matrix
    statistics: Any
    normed: Matrix


def add_forward(net: Network, levels: list[Level], features: Pointer, dtype: np.dtype) -> tuple[Matrix, _Tape]:
    """Add the network without the last linear layer; returns its input and what a backward reads.

    `dtype` is that of the features.
    """
    config, steps = net.config, net.steps
    numbers = iter(range(sum(config.depths) + sum(config.decoder_depths)))
    encoder = []
    down: list[Any] = []
    skips: list[Any] = []
    skipped: list[Any] = []
    x, stem = net.stem(levels[0], features, dtype)
    for number, level in enumerate(levels):
        path = f"encoder.{number}"
        if number:
            above = levels[number - 1]
            pooled = net.rows(f"{path} pooled", level.slots, x.columns)
            pooling.add_pool(
                steps, above.shape, x.pointer, above.members, pooled.pointer, columns=x.columns, dtype=net.dtype
            )
            x, tape = net.project(pooled, f"{path}.down")
        down.append(tape if number else None)
        own = itertools.islice(numbers, config.depths[number])
        total, blocks = net.blocks(x, path, level, config.heads[number], own)
        encoder.append(blocks)
        x = net.written(total)
        if number < config.levels - 1:
            if not number:
                steps.join()  # with the geometry of the other levels
            with steps.beside():  # the levels below do not fill the GPU
                skip, projected = net.project(x, f"decoder.{number}.skip")
            skips.append(skip)
            skipped.append(projected)
    steps.join()
    total = x
    ups: list[Any] = [None] * (config.levels - 1)
    decoder: list[Any] = [None] * (config.levels - 1)
    for number in reversed(range(config.levels - 1)):
        path, level = f"decoder.{number}", levels[number]
        child, ups[number] = net.project(net.written(total), f"{path}.up")
        x = net.rows(f"{path} joined", level.slots, child.columns)
        pooling.add_unpool(
            steps,
            level.shape,
            child.pointer,
            level.members,
            skips[number].pointer,
            level.parents,
            x.pointer,
            columns=x.columns,
            dtype=net.dtype,
        )
        own = itertools.islice(numbers, config.decoder_depths[number])
        total, decoder[number] = net.blocks(x, path, level, config.decoder_heads[number], own)
    last, normed, statistics = net.norm(total, "head.norm")
    return normed, _Tape(stem, encoder, decoder, down, ups, skipped, last, statistics, normed)


def add_backward(net: Network, levels: list[Level], dlogits: Matrix, tape: _Tape) -> None:
    """Add the backward of the network: every gradient of the parameters is written."""
    config, steps = net.config, net.steps

    def blocks_backward(d: Matrix, blocks: list[Block], number: int, dy: Matrix | None = None) -> Matrix:
        dy = net.kept(d, net.drop(blocks[-1].number, 1)) if dy is None else dy
        return net.blocks_backward(d, dy, blocks, levels[number])

    net.linear_gradients(dlogits, tape.normed, "head")
    where = net.linear_backward(dlogits, "head"), tape.last, tape.statistics, "head.norm"
    d, dy = net.norm_backward(*where, drop=net.drop(tape.decoder[0][-1].number, 1))
    skipped = []
    for number in range(config.levels - 1):
        path, level = f"decoder.{number}", levels[number]
        d = blocks_backward(d, tape.decoder[number], number, None if number else dy)
        with steps.beside():  # the encoder waits for it
            skipped.append(net.project_backward(d, tape.skip[number], f"{path}.skip"))
        dchild = net.rows(f"d {path} child", levels[number + 1].slots, d.columns)
        pooling.add_unpool_backward(
            steps, level.shape, d.pointer, level.members, dchild.pointer, columns=d.columns, dtype=net.dtype
        )
        dy = net.project_backward(dchild, tape.up[number], f"{path}.up")
        d = net.linear_backward(dy, f"{path}.up")
    for number in reversed(range(config.levels)):
        path = f"encoder.{number}"
        d = blocks_backward(d, tape.encoder[number], number)
        if number:
            dy = net.project_backward(d, tape.down[number], f"{path}.down")
            dpooled, above = net.linear_backward(dy, f"{path}.down"), levels[number - 1]
            d = net.rows(f"d {path} pooled", above.slots, dpooled.columns)
            pooling.add_pool_backward(
                steps,
                above.shape,
                dpooled.pointer,
                above.members,
                above.parents,
                d.pointer,
                columns=d.columns,
                dtype=net.dtype,
            )
            d = net.linear_backward(skipped[number - 1], f"decoder.{number - 1}.skip", added=d)
    net.bias_gradient(d, "stem")
    with steps.beside():
        net.sums()
    net.stem_gradient(d, tape.stem)
    steps.join()


# ---- plans ---------------------------------------------------------------------------------------------------------
#
# Plans depend on the sizes of a batch's Layout, see levels.py. Points, features and labels have as many rows as the
# number "points" says, and so have logits, in memory for as many rows as level 0 has slots. Without any point, sizes
# is ().


@functools.cache
def cast_call(config: Config) -> Call:
    """Input: the arena of parameters. Result: the same in the config's dtype, which is not float32."""
    steps = Steps(inputs=1, results=1)
    spec = Spec((arena_size(config) // ALIGNMENT, ALIGNMENT), FLOAT32)
    arrays.add_rows(steps, Input(0), arrays.rows(spec, np.dtype(config.dtype), ALIGNMENT), out=Result(0))
    return Call(steps.plan(), {})


@functools.lru_cache(maxsize=32)
def forward_plan(config: Config, sizes: tuple[Sizes, ...], dtype: np.dtype, device: Device) -> Plan:
    """Inputs: points float32, features, tables of clouds, the parameters, their copy. Result: logits.

    `dtype` is that of the features.
    """
    steps = Steps(inputs=5, results=1)
    points, features, tables, masters, weights = map(Input, range(5))
    if not sizes:
        return steps.plan()
    levels = add_geometry(steps, config, sizes, points, tables)
    net = Network(steps, config, device, masters, weights)
    normed, _ = add_forward(net, levels, features, dtype)
    slots, classes = levels[0].slots, config.classes
    logits = net.rows("logits", slots, classes, FLOAT32)
    linear.forward(steps, normed, net.weight("head"), logits, bias=net.master("head.bias"))
    buckets.add_move(
        steps,
        logits.pointer,
        levels[0].point_to_slot,
        Result(0),
        rows=slots,
        most=slots,
        row_bytes=4 * classes,
        word=4,
        fill=bytes(buckets.PATTERN_BYTES),
        pitch=4 * logits.stride,
    )
    return steps.plan(share=True)


@functools.lru_cache(maxsize=8)
def gradient_plan(
    config: Config, sizes: tuple[Sizes, ...], dtype: np.dtype, label_dtype: np.dtype, ignore: int, device: Device
) -> Plan:
    """Inputs: those of `forward_plan`, with labels behind the features. Results: loss, the arena of gradients."""
    steps = Steps(inputs=6, results=2)
    steps.clear(Result(1), 4 * arena_size(config))  # between the gradients
    if not sizes:
        steps.clear(Result(0), 4)
        return steps.plan()
    inputs, options = tuple(map(Input, range(6))), (dtype, label_dtype, ignore, Result(0), Result(1))
    _add_gradients(steps, config, sizes, device, inputs, *options, step=None)
    return steps.plan(share=True)


@functools.lru_cache(maxsize=8)
def step_plan(
    config: Config,
    sizes: tuple[Sizes, ...],
    dtype: np.dtype,
    label_dtype: np.dtype,
    ignore: int,
    device: Device,
    recompute: bool = False,
) -> Plan:
    """A training step of a batch that has points.

    Inputs: points, features, labels, tables, then what it changes; results: loss, norm of the gradients. It changes the
    parameters, their copy in the config's dtype, AdamW's m and v, the gradients (0 at the beginning), and the state of
    `optim.add_adamw`. Numbers that the caller adds: seed, rate, steps, decay, clip.
    """
    steps = Steps(inputs=10, results=2)
    *inputs, m, v, gradients, state = map(Input, range(10))
    masters, weights = inputs[4:]
    options = dtype, label_dtype, ignore, Result(0), gradients
    _add_gradients(steps, config, sizes, device, tuple(inputs), *options, step=state, recompute=recompute)
    optim.add_adamw(
        steps,
        gradients,
        Result(0),
        state,
        masters,
        m,
        v,
        Result(1),
        size=arena_size(config),
        decayed=decayed_size(config),
        copy=None if config.dtype == "float32" else weights,
        copy_dtype=np.dtype(config.dtype),
    )
    return steps.plan(share=True)


def _add_gradients(
    steps: Steps,
    config: Config,
    sizes: tuple[Sizes, ...],
    device: Device,
    inputs: tuple[Pointer, ...],
    dtype: np.dtype,
    label_dtype: np.dtype,
    ignore: int,
    loss: Pointer,
    gradients: Pointer,
    step: Pointer | None,
    recompute: bool = False,
) -> None:
    """Add forward, loss and backward. Inputs: points, features, labels, tables, parameters, their copy."""
    points, features, labels, tables, masters, weights = inputs
    levels = add_geometry(steps, config, sizes, points, tables)
    net = Network(steps, config, device, masters, weights, gradients, step, recompute)
    normed, tape = add_forward(net, levels, features, dtype)
    logits = net.linear(normed, "head")
    dlogits = net.rows("d logits", logits.rows, logits.columns)
    losses.add_loss(
        steps,
        logits.pointer,
        labels,
        dlogits.pointer,
        loss,
        points=logits.rows,  # those behind the last one have no row
        rows=logits.rows,
        classes=config.classes,
        dtype=net.dtype,
        label_dtype=label_dtype,
        ignore=ignore,
        point_to_slot=levels[0].point_to_slot,
        pitch=logits.stride,
    )
    add_backward(net, levels, dlogits, tape)
