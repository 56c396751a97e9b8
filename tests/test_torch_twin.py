# SPDX-License-Identifier: Apache-2.0
"""benchmarks/torch_twin.py at toy size on the CPU: the peers compute what they should, and learn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from test_flash3d import CONFIG, LENGTHS, labels_of, random_params, rows, scene

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks import torch_twin as twin  # noqa: E402
from gpu3d.flash3d.params import flat  # noqa: E402
from gpu3d.interop.torch import Flash3D  # noqa: E402
from gpu3d.reference import flash3d as reference  # noqa: E402


def tensors(lengths=LENGTHS):
    return tuple(map(torch.from_numpy, scene(lengths)))


# ---- on gpu3d's layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (100,), (0, 32)], ids=str)
def test_the_twin_is_the_backbone(lengths):
    points, features = tensors(lengths)
    state = {path: torch.from_numpy(array) for path, array in flat(random_params()).items()}
    ours, theirs = Flash3D(CONFIG).double().eval(), twin.Twin(CONFIG, torch.float64).eval()
    results = []
    for model, given in (
        (ours, (points, features, lengths)),
        (theirs, (twin.scene(points, CONFIG, lengths), features)),
    ):
        model.load_state_dict(state)
        logits = model(*given)
        logits.backward(torch.from_numpy(rows(len(points), CONFIG.classes)))
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_cloud_without_shift_needs_no_move():
    levels = twin.scene(tensors((100,))[0], CONFIG)
    assert [windows.layout is None for windows in levels[0].scopes] == [True, False]
    assert levels[0].scopes[0].groups == ((3, 32), (1, 4))


# ---- by serialization ----------------------------------------------------------------------------------------------


def test_curves():
    """Neighbours on the Hilbert curve are neighbours in space, and a coarser grid has a coarser code."""
    grid = torch.cartesian_prod(*[torch.arange(16)] * 3)
    for curve in (twin._zorder, twin._hilbert):
        code = curve(grid, 4)
        assert torch.equal(code.sort().values, torch.arange(16**3))
        assert torch.equal(curve(grid >> 1, 3), code >> 3)
    assert (grid[code.argsort()].diff(dim=0).abs().sum(1) == 1).all()


def test_patches():
    points, _ = tensors()
    levels = twin.serialize(points, 3, LENGTHS, patch=16)
    assert levels[0].scopes[0].groups == ((9, 16), (1, 1))
    cloud = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    for above, level in zip([None, *levels], levels, strict=False):
        if above is not None:
            count = len(level.positions)
            assert torch.equal(level.parent.unique(), torch.arange(count)) and count <= len(above.positions)
            cloud = torch.empty(count, dtype=cloud.dtype).scatter(0, level.parent, cloud)
        assert len(level.scopes) == 4
        for order, inverse, groups in level.scopes:
            assert torch.equal(order[inverse], torch.arange(len(level.positions)))
            for part, group in zip(order.split([n * size for n, size in groups]), groups, strict=True):
                clouds = cloud[part].reshape(group)
                assert (clouds == clouds[:, :1]).all()


def test_clouds_do_not_mix():
    points, features = tensors()
    model = twin.SerializedTwin(CONFIG, torch.float64).eval()
    features = features.double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(points, features, LENGTHS)[: LENGTHS[0]].square().sum(), features)
    assert gradient[: LENGTHS[0]].all() and not gradient[LENGTHS[0] :].any()


# ---- calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_loss(spread):
    logits, labels = spread * rows(40, 5), labels_of(np.zeros(40))
    labels[labels == 3] = 2  # class 3 is absent
    given = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss = twin.segmentation_loss(given, torch.from_numpy(labels))
    expected, gradient = reference.segmentation_loss(given.detach().numpy().astype(np.float64), labels, twin.IGNORE)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(given.grad.numpy(), gradient, rtol=1e-4, atol=1e-6)
    ignored = twin.segmentation_loss(given, torch.full((40,), twin.IGNORE))
    assert ignored.item() == 0 and not torch.autograd.grad(ignored, given)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["layouts", "serialized"])
def test_calls(kind, dtype):
    torch.manual_seed(0)
    points, features = tensors()
    labels = torch.from_numpy(labels_of(points))
    config = CONFIG.replace(drop_path=0.1)
    model = (twin.Twin if kind == "layouts" else twin.SerializedTwin)(config, dtype)
    inputs = (twin.scene(points, config, LENGTHS), features) if kind == "layouts" else (points, features, LENGTHS)
    logits = twin.inference(model, *inputs, compiled=False)()
    assert logits.shape == (len(points), CONFIG.classes) and logits.dtype == dtype and not logits.requires_grad
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    step = twin.training_step(model, labels, *inputs, compiled=False)
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.05
    for path, parameter in model.named_parameters():
        if dtype == torch.float32 or "norm" not in path:  # the step of a norm's weight is below bfloat16's resolution
            assert (parameter != before[path]).any(), path
