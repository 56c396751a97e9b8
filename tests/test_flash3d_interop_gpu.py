# SPDX-License-Identifier: Apache-2.0
"""The backbone of torch and of JAX on a GPU beside the hand-written one, and 50 steps of training beside the twin's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_flash3d_gpu import LENGTHS, SMALL, expected_gradients, expected_logits, given, relative

from gpu3d import flash3d
from gpu3d.flash3d.params import decayed_size, flat, layout

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

pytestmark = pytest.mark.gpu

SINGLE = SMALL.replace(dtype="float32")
STEPS = 50


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(cp, lengths):
    """Parameters on the host; points, features and labels as tensors on the GPU."""
    params, batch, labels = given(cp, SINGLE, lengths, device=False)
    return params, *(torch.from_numpy(x).cuda() for x in (batch.points, batch.features, labels.astype(np.int64)))


def model_of(kind, params, points, lengths, dtype=torch.float32):
    """A module with these parameters, and its inputs but the features."""
    from benchmarks import torch_twin
    from gpu3d.interop.torch import Flash3D

    model, inputs = (Flash3D(SINGLE), points) if kind == "operators" else (torch_twin.Twin(SINGLE, dtype), None)
    model.load_state_dict({path: torch.from_numpy(array) for path, array in flat(params).items()})
    return model.cuda(), torch_twin.scene(points, SINGLE, lengths) if inputs is None else inputs


def logits_of(kind, model, inputs, features, lengths):
    return model(inputs, features, lengths) if kind == "operators" else model(inputs, features)


@pytest.mark.parametrize("kind", ["operators", "twin"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
def test_autograd_gives_the_hand_written_gradients(cp, lengths, kind):
    from benchmarks.torch_twin import segmentation_loss

    params, points, features, labels = on_gpu(cp, lengths)
    model, inputs = model_of(kind, params, points, lengths)
    loss = segmentation_loss(logits_of(kind, model.eval(), inputs, features, lengths), labels)
    loss.backward()
    expected_loss, expected = flash3d.loss_and_grad(*given(cp, SINGLE, lengths), SINGLE)
    assert loss.item() == pytest.approx(float(expected_loss), rel=1e-5)
    for path, parameter in model.named_parameters():
        got, want = parameter.grad.cpu().numpy(), flat(expected)[path].get()
        assert relative(got, want) < 1e-4, path


def test_bfloat16_is_as_accurate_as_that_of_torch(cp):
    """The error of the logits is at most twice that of the twin, all of whose tensors are bfloat16."""
    lengths = LENGTHS[1]
    params, points, features, _ = on_gpu(cp, lengths)
    model, inputs = model_of("twin", params, points, lengths, torch.bfloat16)
    with torch.no_grad():
        naive = logits_of("twin", model.eval(), inputs, features, lengths).float().cpu().numpy()
    ours = flash3d.forward(*given(cp, SMALL, lengths)[:2], SMALL).get()
    expected = expected_logits(lengths)
    assert relative(ours, expected) <= 2 * relative(naive, expected)


def test_jax(cp):
    jax = pytest.importorskip("jax")
    from gpu3d.interop.jax import flash3d as backbone
    from gpu3d.reference.flash3d import segmentation_loss

    lengths = LENGTHS[1]
    params, batch, labels = given(cp, SINGLE, lengths, device=False)

    @jax.jit
    def logits_and_grads(params, points, features, dlogits):
        logits, backward = jax.vjp(lambda params: backbone(params, points, features, SINGLE, lengths=lengths), params)
        return logits, backward(dlogits)[0]

    exact = expected_logits(lengths)
    _, dlogits = segmentation_loss(exact.astype(np.float64), labels.astype(np.int64), 255)
    with jax.default_matmul_precision("highest"):
        gpu = jax.devices("gpu")[0]
        arrays = jax.device_put((params, batch.points, batch.features, dlogits.astype(np.float32)), gpu)
        logits, grads = logits_and_grads(*arrays)
    assert relative(logits, exact) < 1e-4
    _, expected = expected_gradients(lengths)
    for path, got in flat(grads).items():
        assert relative(np.asarray(got), expected[path]) < 1e-3, path


# ---- training ------------------------------------------------------------------------------------------------------


def losses_of_twin(params, points, features, labels, lengths, noise=None):
    """The losses of 50 steps by torch: AdamW without decay of norms and biases, clipping, and a one-cycle schedule."""
    from benchmarks.torch_twin import segmentation_loss

    model, inputs = model_of("twin", params, points, lengths)
    if noise is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 6e-8 * torch.randn(parameter.shape, generator=noise).cuda())
    decayed = [p.path for p in layout(SINGLE) if p.offset < decayed_size(SINGLE)]
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[path] for path in decayed], "weight_decay": 5e-3},
        {"params": [x for path, x in named.items() if path not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, STEPS, pct_start=0.04, div_factor=10, final_div_factor=100, cycle_momentum=False
    )
    losses = []
    for _ in range(STEPS):
        loss = segmentation_loss(logits_of("twin", model, inputs, features, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        losses.append(loss.item())
    return np.array(losses)


def test_50_steps_follow_the_twin(cp):
    """They stay as close to the twin's as a twin does whose first parameters were rounded differently."""
    lengths = LENGTHS[0]
    params, points, features, labels = on_gpu(cp, lengths)
    twin = losses_of_twin(params, points, features, labels, lengths)
    others = [
        losses_of_twin(params, points, features, labels, lengths, torch.Generator().manual_seed(seed))
        for seed in range(4)
    ]
    apart = np.maximum.accumulate(np.max([np.abs(other - twin) for other in others], axis=0))
    on_device, batch, own_labels = given(cp, SINGLE, lengths)
    trainer = flash3d.Trainer(SINGLE, on_device, steps=STEPS, lr=2e-3, weight_decay=5e-3, clip=1.0)
    losses = np.array([float(trainer.step(batch.points, batch.features, own_labels, lengths)) for _ in range(STEPS)])
    assert losses[-1] < 0.9 * losses[0]
    assert (np.abs(losses - twin) <= 4 * apart + 1e-6 * twin).all(), (losses - twin, apart)


# ---- two GPUs ------------------------------------------------------------------------------------------------------


def ddp_gradients(rank, world, store):
    """One process of DDP: a backward of its own clouds. The first process writes the gradients."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world)
    from gpu3d.interop.torch import Flash3D

    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Flash3D(SINGLE).cuda().eval(), device_ids=[rank])
    ddp_loss(model, rank).backward()
    if rank == 0:
        torch.save([p.grad.cpu() for p in model.module.parameters()], store + ".gradients")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ddp_loss(model, rank):
    rng = np.random.default_rng(rank)
    n = 900 + 200 * rank
    points, features = rng.uniform(-20, 20, (n, 3)), rng.standard_normal((n, SINGLE.in_channels))
    device = next(model.parameters()).device
    return model(*(torch.tensor(x, dtype=torch.float32, device=device) for x in (points, features))).square().mean()


def test_ddp(cp, tmp_path):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    from gpu3d.interop.torch import Flash3D

    script = "import sys, test_flash3d_interop_gpu as t; t.ddp_gradients(int(sys.argv[1]), 2, sys.argv[2])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env) for rank in range(2)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    torch.manual_seed(0)
    model = Flash3D(SINGLE).cuda().eval()
    (sum(ddp_loss(model, rank) for rank in range(2)) / 2).backward()
    for got, p in zip(torch.load(tmp_path / "store.gradients"), model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad.cpu(), rtol=1e-4, atol=1e-6)
