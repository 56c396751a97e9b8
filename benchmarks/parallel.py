# SPDX-License-Identifier: Apache-2.0
"""Training on one GPU and on several. The suite `interop` runs this module in new processes and reads what it prints.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.parallel ddp
    python -m benchmarks.parallel shards
    python -m benchmarks.parallel shards-gradients

- ddp: the training step of examples/torch_segmentation_block.py, one process per GPU.
- shards, shards-gradients: a layer of attention and pooling in JAX, on the first GPU and on the first two. shard_map
  distributes the clouds. One process prints rates, the other the gradient error.

A rate is the points per second of all GPUs together, the median of several rounds. Each GPU has a batch of the same
size. A gradient error compares one step with the same step of one GPU on the joined batch: the norm of the difference
divided by the norm of the gradient, for the worst parameter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS, ROUNDS = 10, 7  # steps in a round, and rounds; the first round does not count
# The batch sizes of the example on a GPU and on a CPU. With the smaller one, for a CPU, the GPU waits for its host.
BATCHES = {"its batch": "cuda", "a CPU's batch": "cpu"}

CLOUDS, POINTS = 8, 16_384  # clouds per GPU, points per cloud
HEADS, DIM = 8, 32
EXACT_CLOUDS, EXACT_POINTS = 2, 2048  # for the comparison of gradients, in float32


def main() -> None:
    {"ddp": _ddp, "shards": _shards, "shards-gradients": _shards_gradients}[sys.argv[1]]()


# ---- torch ---------------------------------------------------------------------------------------------------------


def _ddp() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
    import torch_segmentation_block as example

    training, _, _ = example.load(None, voxel=0.3)
    with example.joined("auto") as group:
        weights = example.class_weights(training).to(group.device)
        rates = {name: _rate(example, training, weights, group, device) for name, device in BATCHES.items()}
        error = _ddp_error(example, training, weights, group)
        group.print(json.dumps({"rates": rates, "error": error}))


def _arguments(example: Any, device: str) -> argparse.Namespace:
    """The options of the example on this kind of device."""
    options = {"channels": 32, "rate": 1e-2, "seed": 0, "crops": 24, "bfloat16": False, "compile": False}
    return argparse.Namespace(**example.DEFAULTS[device], **options)


def _rate(example: Any, training: Any, weights: Any, group: Any, device: str) -> float:
    arguments = _arguments(example, device)
    of = example.start(arguments, group, True, STEPS * ROUNDS)
    batches = list(example.epoch_of(training, 0, STEPS, arguments, group))
    rates = [example.train(of, batches, weights, arguments, group)[1] for _ in range(ROUNDS)]
    return statistics.median(rates[1:])


def _ddp_error(example: Any, training: Any, weights: Any, group: Any) -> float:
    """Compare the gradients of a distributed step with those of the joined batch, which every process computes too."""
    import torch

    arguments, alone = _arguments(example, "cpu"), group._replace(rank=0, count=1)
    parts = [
        next(example.epoch_of(training, 0, 1, arguments, group._replace(rank=rank))) for rank in range(group.count)
    ]
    points, features, lengths, labels = zip(*parts, strict=True)
    joined = example.Batch(torch.cat(points), torch.cat(features), sum(lengths, ()), torch.cat(labels))
    gradients = []
    for where, batch in ((group, parts[group.rank]), (alone, joined)):
        of = example.start(arguments, where, True, STEPS)
        example.train(of, [batch], weights, arguments, where)
        gradients.append([p.grad for p in of.network.parameters()])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))


# ---- JAX -----------------------------------------------------------------------------------------------------------


def _shards() -> None:
    """Each GPU runs alone first: loading a kernel may wait for its GPU, which then must not wait for another GPU."""
    import jax

    devices = jax.devices()[:2]
    rates = [_sharded_rate([device]) for device in devices]
    print(json.dumps({"one": rates[0], "two": _sharded_rate(devices)}))


def _shards_gradients() -> None:
    import jax

    print(json.dumps({"error": _shards_error(jax.devices()[:2])}))


def _step(devices: list[Any], dtype: str) -> Any:
    """A function of weights and x [B, n, 3] to the loss and its gradients, with the clouds spread over `devices`."""
    import jax
    from jax import numpy as jnp
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    from gpu3d.interop import jax as g

    def loss(weights: Any, x: Any) -> Any:
        project, head = weights
        points = x.reshape(-1, 3)
        buckets = g.bucketize(x, 512)
        q, k, v = jnp.moveaxis(g.scatter(points @ project, buckets).reshape(-1, 3, HEADS, DIM), 1, 0).astype(dtype)
        rows = g.bucket_attention(q, k, v, buckets, g.scopes(buckets, 8)).reshape(-1, HEADS * DIM)
        pooled = g.bucket_pool(rows, g.scatter(points, buckets), buckets, ratio=4)
        back = g.gather(g.bucket_unpool(pooled.features, pooled, rows), buckets)
        moved = x + (back.astype("float32") @ head).reshape(x.shape)
        return jax.lax.psum(g.chamfer(moved, x, reduction="none").sum(), "clouds")

    mesh = Mesh(np.array(devices), ("clouds",))
    return jax.jit(jax.value_and_grad(jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("clouds")), out_specs=P())))


def _inputs(devices: list[Any], clouds: int, points: int) -> tuple[Any, Any]:
    """Weights copied to every device, and clouds spread over them."""
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    rng = np.random.default_rng(0)
    shapes = (3, 3 * HEADS * DIM), (HEADS * DIM, 3)
    weights = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    mesh = Mesh(np.array(devices), ("clouds",))
    x = rng.random((clouds, points, 3), np.float32)
    return jax.device_put(weights, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("clouds")))


def _sharded_rate(devices: list[Any]) -> float:
    import jax

    step, clouds = _step(devices, "bfloat16"), CLOUDS * len(devices)
    inputs = _inputs(devices, clouds, POINTS)
    rates = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(STEPS):
            result = step(*inputs)
        jax.block_until_ready(result)
        rates.append(STEPS * clouds * POINTS / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def _shards_error(devices: list[Any]) -> float:
    """Compares in float32. JAX's default, TF32, would round products of different sizes differently."""
    import jax

    gradients = []
    with jax.default_matmul_precision("highest"):
        for some in ([device] for device in devices):  # see `_shards`
            result = _step(some, "float32")(*_inputs(some, EXACT_CLOUDS * len(devices), EXACT_POINTS))
            jax.block_until_ready(result)
        for some in (devices, devices[:1]):
            _, found = _step(some, "float32")(*_inputs(some, EXACT_CLOUDS * len(devices), EXACT_POINTS))
            gradients.append([np.asarray(x, np.float64) for x in found])
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(*gradients, strict=True))


if __name__ == "__main__":
    main()
