# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop.torch.Flash3D on the CPU: the backbone of gpu3d.flash3d, its gradients by autograd, and its files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from test_flash3d import CONFIG, LENGTHS, local_chain, random_params, rows, scene

torch = pytest.importorskip("torch")

import gpu3d  # noqa: E402
from gpu3d import flash3d  # noqa: E402
from gpu3d.flash3d.geometry import geometry  # noqa: E402
from gpu3d.flash3d.params import flat, layout, pack  # noqa: E402
from gpu3d.interop.torch import Flash3D  # noqa: E402
from gpu3d.interop.torch import backbone as of_torch  # noqa: E402
from gpu3d.reference import flash3d as reference  # noqa: E402

# torch warns about its own modules while it compiles. Its warning about caches is about one of ours.
compiling = pytest.mark.filterwarnings("ignore", "error:.*lru_cache")


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def tensors(lengths=LENGTHS, seed=0):
    return tuple(map(torch.from_numpy, scene(lengths, seed)))


def model_of(params, config=CONFIG):
    """A module in float64 with exactly these parameters."""
    model = Flash3D(config).double()
    model.load_state_dict({path: torch.from_numpy(array) for path, array in flat(params).items()})
    return model


def by_reference(params, lengths=LENGTHS, config=CONFIG):
    """Logits, a gradient of them, and the gradients of the parameters by path."""
    points, features = scene(lengths)
    levels, dlogits = geometry(points, config, lengths), rows(len(points), config.classes)
    logits, tape = reference.forward(params, levels, features, config)
    return logits, dlogits, flat(reference.backward(dlogits, tape, params, levels, config)[1])


def assert_is_reference(model, call, params, lengths=LENGTHS, tolerance=1e-10):
    logits, dlogits, grads = by_reference(params, lengths, model.config)
    model.zero_grad()
    out = call(*tensors(lengths), lengths)
    np.testing.assert_allclose(out.detach().numpy(), logits, rtol=tolerance, atol=tolerance)
    out.backward(torch.from_numpy(dlogits).to(out.dtype))
    found = dict(model.named_parameters())
    assert found.keys() == grads.keys()
    for path, gradient in grads.items():  # every parameter has one, so DDP finds none unused
        error = np.linalg.norm(found[path].grad.numpy() - gradient)
        assert error <= tolerance * np.linalg.norm(gradient), path


# ---- parameters and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "flash3d_46m", "tiny"])
def test_paths_and_shapes(name):
    config = {"toy": CONFIG, **flash3d.presets}[name]
    with torch.device("meta"):
        state = Flash3D(config).state_dict()
    assert {path: tuple(x.shape) for path, x in state.items()} == {p.path: p.shape for p in layout(config)}


def test_init():
    torch.manual_seed(0)
    state = Flash3D(flash3d.presets["tiny"]).state_dict()
    for path, array in flat(flash3d.init(flash3d.presets["tiny"])).items():
        x = state[path]
        if array.ndim == 1:
            assert x.tolist() == array.tolist(), path
        else:
            assert x.abs().max() <= 2.001 * x.shape[1] ** -0.5 and abs(x.mean()) < 0.2 * x.shape[1] ** -0.5, path
    weight = state["encoder.3.blocks.0.fc1.weight"]
    assert 16 * weight.abs().max() > 1.95 and weight.std().item() == pytest.approx(0.8796 / 16, rel=0.01)


def test_one_file_for_all(tmp_path):
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    params = pack(flat(random_params()), CONFIG, np.float32)
    flash3d.save(path, params, CONFIG)
    model = Flash3D.from_params(*flash3d.load(path)).eval()
    expected = flash3d.forward(params, flash3d.Batch(*scene(), LENGTHS), CONFIG)
    np.testing.assert_allclose(model(*tensors(), LENGTHS).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    flash3d.save(again, model.state_dict(), CONFIG)
    assert again.read_bytes() == path.read_bytes()
    model.stem.weight.data.zero_()
    assert params["stem"]["weight"].any()  # from_params copies


def test_a_file_is_a_state_dict(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    params = flash3d.init(CONFIG)
    flash3d.save(tmp_path / "model.safetensors", params, CONFIG)
    model = Flash3D(CONFIG)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all((model.state_dict()[path].numpy() == array).all() for path, array in flat(params).items())


# ---- logits and gradients ------------------------------------------------------------------------------------------

DECODERLESS = CONFIG.replace(
    channels=(8,),
    depths=(1,),
    heads=(1,),
    hashes=("xor_mod",),
    strides=(1,),
    decoder_channels=(),
    decoder_depths=(),
    decoder_heads=(),
)


@pytest.mark.parametrize(
    ("config", "lengths"),
    [(CONFIG, LENGTHS), (CONFIG, (1,)), (CONFIG.replace(ratio=4), LENGTHS), (DECODERLESS, LENGTHS)],
    ids=["ragged", "one point", "ratio 4", "no decoder"],
)
def test_autograd_is_the_reference(config, lengths):
    params = random_params(config)
    model = model_of(params, config).eval()
    assert_is_reference(model, model, params, lengths)


def test_float32():
    params = random_params()
    model = Flash3D.from_params(params, CONFIG).eval()
    assert_is_reference(model, model, params, tolerance=1e-4)


def test_no_points():
    model = Flash3D(CONFIG).eval()
    for lengths in ((0,), (0, 0)):
        assert model(torch.empty(0, 3), torch.empty(0, 3), lengths).shape == (0, CONFIG.classes)


@compiling
def test_compile_in_one_graph():
    params = random_params()
    model = model_of(params).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (40, 1, 0, 64, 25)):
        assert_is_reference(model, compiled, params, lengths)


def test_autocast():
    params = random_params(seed=2)
    logits, dlogits, grads = by_reference(params)
    model = Flash3D.from_params(params, CONFIG).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*tensors(), LENGTHS)
    assert out.dtype == torch.bfloat16
    assert np.linalg.norm(out.detach().float().numpy() - logits) < 0.03 * np.linalg.norm(logits)
    out.backward(torch.from_numpy(dlogits).to(out.dtype))
    for path, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert np.linalg.norm(parameter.grad.numpy() - grads[path]) < 0.1 * np.linalg.norm(grads[path]), path


def test_half_and_bfloat16_keep_the_wavelengths():
    """All parameters are rounded, and so are the features, but not what the angles are made of."""
    params = random_params(seed=2)
    logits, _, _ = by_reference(params)
    points, features = tensors()
    for dtype in (torch.float16, torch.bfloat16):
        model = Flash3D.from_params(params, CONFIG).eval().to(dtype)
        out = model(points, features, LENGTHS)
        assert out.dtype == dtype
        error = np.linalg.norm(out.detach().double().numpy() - logits) / np.linalg.norm(logits)
        assert error < 6 * torch.finfo(dtype).eps, dtype


def test_batches_of_equal_clouds_and_float_dtypes():
    points, features = tensors((20, 20))
    model = Flash3D(CONFIG).eval()
    expected = model(points, features, [20, 20])
    assert torch.equal(model(points.reshape(2, 20, 3), features.reshape(2, 20, 3)), expected)
    assert torch.equal(model(points.double(), features.double(), [20, 20]), expected)
    half = model(points, features.bfloat16(), [20, 20])
    assert torch.equal(half, model(points, features.bfloat16().float(), [20, 20]))


def test_nan_stays_in_its_cloud():
    points, features = tensors()
    features[3, 1] = torch.nan
    logits = Flash3D(CONFIG).eval()(points, features, LENGTHS)
    assert logits[3].isnan().all() and logits[LENGTHS[0] :].isfinite().all()


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_pooling_is_that_of_local_order(ratio):
    config = CONFIG.replace(ratio=ratio)
    points, _ = tensors()
    levels = geometry(points, config, LENGTHS)
    layouts, packed, poolings = local_chain(points, config, LENGTHS)
    for l in range(config.levels - 1):
        above, below = levels[l], levels[l + 1]
        at = layouts[l].scatter(packed[l])
        x = torch.from_numpy(rows(above.buckets.num_slots, 6)).float().requires_grad_()
        in_local = layouts[l].scatter(above.buckets.gather(x))
        pooled = gpu3d.bucket_pool(in_local, at, layouts[l], ratio=ratio).features
        expected = below.buckets.scatter(layouts[l + 1].gather(pooled))
        got = of_torch.pool(x, above.members)
        dout = torch.from_numpy(rows(len(got), 6, seed=1)).float()
        if ratio == 2:
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(y, x, dout)[0] for y in (got, expected)]
        assert torch.equal(*gradients)

        child = layouts[l + 1].scatter(below.buckets.gather(dout))
        unpooled = layouts[l].gather(gpu3d.bucket_unpool(child, poolings[l]))
        skip = above.buckets.scatter(above.buckets.gather(x))
        assert torch.equal(of_torch.unpool(dout, above, below, skip), above.buckets.scatter(unpooled) + skip)


# ---- training ------------------------------------------------------------------------------------------------------


def test_drop_path():
    torch.manual_seed(0)
    drop, x = of_torch.DropPath(0.3), torch.rand(20_000, 3) + 1
    y = drop(x)
    dropped = y[:, 0] == 0
    torch.testing.assert_close(y, torch.where(dropped[:, None], 0, x / 0.7))
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert drop.eval()(x) is x and of_torch.DropPath(0.0)(x) is x


def test_drop_rates_grow_over_all_blocks():
    model = Flash3D(CONFIG)
    stages = [*model.encoder, *reversed(model.decoder)]
    rates = [block.drop.rate for stage in stages for block in stage.blocks]
    assert rates == [reference.drop_rate(k, CONFIG) for k in range(len(rates))]
    assert rates[0] == 0 and rates[-1] == CONFIG.drop_path


def test_training_mode():
    """Each branch draws its own numbers from torch's generator. Without them, training mode changes nothing."""
    points, features = tensors()
    model = Flash3D.from_params(random_params(), CONFIG)
    torch.manual_seed(1)
    first, second = model(points, features, LENGTHS), model(points, features, LENGTHS)
    torch.manual_seed(1)
    assert torch.equal(model(points, features, LENGTHS), first) and not torch.equal(first, second)
    steady = Flash3D.from_params(random_params(), CONFIG.replace(drop_path=0.0))
    assert torch.equal(steady(points, features, LENGTHS), model.eval()(points, features, LENGTHS))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiling)])
def test_training_lowers_the_loss(compiled):
    torch.manual_seed(0)
    points, features = tensors()
    labels, model = (points[:, 0] > 0).long(), Flash3D(CONFIG.replace(drop_path=0.1))
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(call(points, features, LENGTHS), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.3 and losses[-1] < 0.5 * losses[0]


# ---- errors and imports --------------------------------------------------------------------------------------------

POINTS, FEATURES = torch.rand(20, 3), torch.rand(20, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((POINTS.numpy(), FEATURES), TypeError, r"points must be a tensor, got ndarray: convert by torch.as_tensor"),
        ((POINTS, [1.0]), TypeError, "features must be a tensor, got list"),
        ((POINTS.long(), FEATURES), TypeError, r"points must have a float dtype, got torch.int64: .* points.float\(\)"),
        ((POINTS, FEATURES.int()), TypeError, "features must have a float dtype, got torch.int32"),
        ((POINTS, FEATURES[:, :2]), ValueError, r"a row of 3 channels .* got shape \[20, 2\] for .*\[20, 3\]"),
        ((POINTS, FEATURES[:19]), ValueError, r"for each point, got shape \[19, 3\]"),
        ((POINTS[:, :2], FEATURES), ValueError, r"points must have 3 coordinates .* got shape \[20, 2\]"),
        ((POINTS, FEATURES, [5, 5]), ValueError, "lengths .* 10"),
        ((POINTS.clone().requires_grad_(), FEATURES), TypeError, r"points requires grad, .* points.detach\(\)"),
    ],
)
def test_bad_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        Flash3D(CONFIG)(*arguments)


def test_bad_parameters():
    with pytest.raises(TypeError, match=r"config must be a flash3d.Config, got 'tiny' of type str"):
        Flash3D("tiny")
    with pytest.raises(ValueError, match=r"head.weight of shape \[5, 16\], but the params have \[4, 16\]"):
        Flash3D.from_params(flash3d.init(CONFIG.replace(classes=4)), CONFIG)


def test_the_backbone_is_imported_when_it_is_used():
    code = "import sys, gpu3d.interop.torch as g; assert 'gpu3d.flash3d' not in sys.modules; g.Flash3D"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match=r"module 'gpu3d.interop.torch' has no attribute 'Flash4D'"):
        gpu3d.interop.torch.Flash4D  # noqa: B018
