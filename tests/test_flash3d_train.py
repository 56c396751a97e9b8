# SPDX-License-Identifier: Apache-2.0
"""Training on the CPU: the trainer and its file, the preparation of scans, and the command that labels a scan."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
from types import SimpleNamespace

import clouds
import numpy as np
import pytest

from gpu3d import cli, flash3d
from gpu3d._arrays import FLOAT32, Spec
from gpu3d.cli import devices
from gpu3d.flash3d import checkpoint, graphs, model, optim, train
from gpu3d.flash3d.params import flat

CONFIG = flash3d.Config(
    channels=(8, 16),
    depths=(2, 1),
    decoder_channels=(8,),
    decoder_depths=(1,),
    heads=(1, 1),
    decoder_heads=(1,),
    hashes=("zorder_div", "xor_div"),
    strides=(2, 1),
    in_channels=4,
    classes=3,
    bucket_size=16,
    scope=2,
    mlp=1,
    drop_path=0.3,
)
STEPS = 6


def batch(step=0, lengths=(70, 0, 1, 40)):
    """Points, features, labels and lengths of a step. The label is the height, in three classes."""
    rng = np.random.default_rng([7, step])
    points = clouds.uniform(sum(lengths), step)
    features = np.concatenate([points / points.std(axis=0), rng.random((len(points), 1))], axis=1).astype(np.float32)
    labels = np.digitize(points[:, 2], np.quantile(points[:, 2], [0.3, 0.6]))
    labels[::9] = 255
    return points, features, labels, lengths


def trainer(**options):
    return flash3d.Trainer(CONFIG, flash3d.init(CONFIG), **({"steps": STEPS, "lr": 1e-2, "seed": 3} | options))


def everything(of):
    """The whole state of a trainer, as bytes."""
    state = of._state
    return b"".join(x.tobytes() for x in (state.masters, state.first, state.second, state.counts))


def run(of, until=STEPS):
    """The losses of the steps up to one."""
    return [of.step(*batch(step)) for step in range(of.done_steps, until)]


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_two_trainings_give_the_same_bits():
    one, two, other = trainer(), trainer(), trainer(seed=4)
    assert run(one) == run(two)
    assert everything(one) == everything(two)
    assert run(other) != run(two) and everything(other) != everything(two)  # drop path depends on the seed
    assert (one.done_steps, one.skipped) == (STEPS, 0)


def test_a_step_by_its_parts():
    ours, (points, features, labels, lengths) = trainer(weight_decay=0.2, clip=0.5), batch()
    arena = ours._state.masters.copy()
    params = flash3d.params.views(arena, CONFIG)
    moments = optim.State(np.zeros_like(arena), np.zeros_like(arena))
    for step in range(3):
        loss, gradient = model.loss_and_gradient(
            flat(params), flash3d.Batch(points, features, lengths), labels, CONFIG, 255, train.Training(3, step)
        )
        assert ours.step(points, features, labels, lengths) == loss
        decayed = next(p.offset for p in flash3d.params.layout(CONFIG) if not p.decay)
        lr = optim.one_cycle(step, STEPS, 1e-2)
        optim.update(arena, gradient, loss, moments, lr=lr, weight_decay=0.2, decayed=decayed, clip=0.5)
    assert ours._state.masters.tobytes() == arena.tobytes()
    assert ours._state.second.tobytes() == moments.second.tobytes()


def test_the_loss_is_a_number_of_its_batch():
    loss = trainer().step(*batch())
    assert loss.shape == () and loss.dtype == np.float32
    plain, _ = flash3d.loss_and_grad(flash3d.init(CONFIG), flash3d.Batch(*batch()[:2], batch()[3]), batch()[2], CONFIG)
    assert loss != plain  # there is drop path
    config = CONFIG.replace(drop_path=0.0)
    assert flash3d.Trainer(config, flash3d.init(config), steps=1).step(*batch()) == plain


def test_the_params_of_the_caller_stay_as_they_are():
    params = flash3d.init(CONFIG)
    ours = flash3d.Trainer(CONFIG, params, steps=1)
    run(ours, 1)
    fresh, trained = flat(flash3d.init(CONFIG)), flat(ours.params)
    assert all((array == fresh[path]).all() for path, array in flat(params).items())
    assert (trained["head.weight"] != fresh["head.weight"]).all()


def test_50_steps_lower_the_loss():
    points, features, labels, lengths = batch(lengths=(100, 30))
    ours = trainer(steps=50)
    losses = [float(ours.step(points, features, labels, lengths)) for _ in range(50)]
    assert losses[0] > 1.5 and np.mean(losses[-5:]) < 0.5 * losses[0]
    logits = flash3d.forward(ours.params, flash3d.Batch(points, features, lengths), CONFIG)
    known = labels != 255
    assert (logits.argmax(axis=1) == labels)[known].mean() > 0.8


@pytest.mark.parametrize("where", ["features", "points"])
def test_a_step_that_is_not_finite_is_skipped(where):
    ours, unspoiled = trainer(), trainer()
    run(ours, 2)
    before = ours._state
    spoiled = [x.copy() if isinstance(x, np.ndarray) else x for x in batch(2)]
    spoiled[where == "features"][5, 1] = np.nan
    assert np.isnan(ours.step(*spoiled))
    after = ours._state
    for name in ("masters", "first", "second"):
        assert getattr(after, name).tobytes() == getattr(before, name).tobytes()
    assert (ours.done_steps, ours.skipped) == (3, 1)
    assert np.isfinite(ours.step(*batch(2)))
    run(unspoiled, 3)  # neither drop path nor the learning rate moved on
    assert ours._state.masters.tobytes() == unspoiled._state.masters.tobytes()


def test_all_steps_are_done():
    ours = trainer(steps=2)
    run(ours, 2)
    with pytest.raises(ValueError, match=r"all 2 steps are done.*start a new Trainer with its params"):
        ours.step(*batch())
    assert ours.done_steps == 2


def test_all_ignored():
    ours = trainer()
    points, features, labels, lengths = batch()
    assert ours.step(points, features, np.full_like(labels, 255), lengths) == 0
    assert ours.skipped == 0 and np.isfinite(ours._state.masters).all()


BAD_OPTIONS = [
    ({"steps": 0}, ValueError, "steps must be from 1 to 4294967295, got 0"),
    ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
    ({"lr": -1e-3}, ValueError, "lr must be 0 or positive and finite, got -0.001"),
    ({"lr": float("inf")}, ValueError, "lr must be .* got inf"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay must be .* got nan"),
    ({"weight_decay": "none"}, TypeError, "weight_decay must be a number, got 'none'"),
    ({"clip": -1.0}, ValueError, "clip must be 0 or positive, got -1.0"),
    ({"seed": -1}, ValueError, "seed must be from 0 to 18446744073709551615, got -1"),
    ({"ignore": None}, TypeError, "ignore must be an integer, got None"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        trainer(**options)


def test_bad_params():
    with pytest.raises(ValueError, match=r"the config has head.weight of shape \[4, 8\], but the params have \[3, 8\]"):
        flash3d.Trainer(CONFIG.replace(classes=4), flash3d.init(CONFIG), steps=1)


def test_params_of_torch():
    torch = pytest.importorskip("torch")
    params = flash3d.init(CONFIG)
    params["head"]["bias"] = torch.zeros(3)
    with pytest.raises(TypeError, match=r"params must be NumPy or CuPy arrays, got torch on the CPU for head.bias"):
        flash3d.Trainer(CONFIG, params, steps=1)


def test_errors_of_a_batch_change_nothing():
    ours = trainer(steps=2)
    before = everything(ours)
    points, features, labels, lengths = batch()
    wrong = labels.copy()
    wrong[4] = 3
    for arguments, message in [
        ((points, features, wrong, lengths), "0..2 or ignore=255, got 1 others, the first 3 at index 4"),
        ((points, features[:, :3], labels, lengths), "features must have the 4 channels of config.in_channels, got 3"),
        ((points[:0], features[:0], labels[:0], (0, 0)), "a step needs at least one point, got none in all clouds"),
        ((points, features, labels[1:], lengths), r"labels must have shape \[111\]"),
        ((points, features, labels, (5,)), "lengths must sum to the number of points"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.step(*arguments)
        assert everything(ours) == before
    run(ours, 2)  # errors do not count as steps


# ---- interrupts ----------------------------------------------------------------------------------------------------


def interrupted(call, line):
    """Make a call, with a KeyboardInterrupt before the given line of train.py and optim.py; whether it got there."""
    files, left = {train.__file__, optim.__file__}, line

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


def test_an_interrupt_at_any_line_of_a_step():
    ours, small = trainer(), batch(lengths=(20,))
    ours.step(*small)
    start = ours._state
    before = everything(ours)
    ours.step(*small)
    after = everything(ours)
    seen, line = [], 0
    while True:
        ours._state, ours._started = start, 1  # so that every turn has the same lines
        if not interrupted(lambda: ours.step(*small), line):
            break
        seen.append(everything(ours))
        assert seen[-1] in (before, after)
        if seen[-1] == before:
            ours.step(*small)
        assert everything(ours) == after
        line += 1
    assert before in seen and after in seen and line > 30


@pytest.mark.parametrize("phase", ["geometry", "forward", "segmentation_loss", "backward"])
def test_an_interrupt_in_a_phase_of_a_step(phase, monkeypatch):
    ours, unbroken = trainer(steps=2), trainer(steps=2)
    run(ours, 1)
    before = everything(ours)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model if phase == "geometry" else model.reference, phase, stop)
        with pytest.raises(KeyboardInterrupt):
            ours.step(*batch(1))
    assert everything(ours) == before
    run(ours, 2)
    run(unbroken, 2)
    assert everything(ours) == everything(unbroken)


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, which a shell turns off for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_until_all_is_launched(interrupts):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with graphs.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="own"), graphs.uninterrupted():
        raise ValueError("own")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Array:
    """A fake array of CuPy that logs when its memory is freed."""

    def __init__(self, shape, log):
        self.shape, self.dtype, self.size = shape, FLOAT32, int(np.prod(shape))
        self.nbytes = 4 * self.size
        self.data = SimpleNamespace(ptr=0, device_id=0, copy_from_device_async=lambda source, size: None)
        self.log = log

    def __len__(self):
        return self.shape[0]

    def copy(self):
        return Array(self.shape, [])

    def __del__(self):
        self.log.append(f"free {self.size}")


def test_memory_is_freed_after_the_last_run(monkeypatch):
    """Before a graph or a workspace is freed the host waits, since the pool may give its memory to another stream."""
    log, made = [], []
    event = SimpleNamespace(synchronize=lambda: log.append("wait"))
    stream = SimpleNamespace(
        ptr=0,
        wait_event=lambda event: None,
        record=lambda: event,
        begin_capture=lambda: None,
        end_capture=lambda: SimpleNamespace(launch=lambda: log.append("replay")),
    )
    cuda = SimpleNamespace(
        Device=lambda ordinal: contextlib.nullcontext(),
        Stream=lambda non_blocking: stream,
        get_current_stream=lambda: stream,
    )
    cupy = SimpleNamespace(cuda=cuda, empty=lambda shape, dtype: Array(shape, log))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(graphs.launcher, "run", lambda *launch: None)
    monkeypatch.setattr(graphs, "write_tables", lambda *tables: Array(0, []))
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    of = graphs.Graphs([Array(0, [])])

    def run(key, workspace):
        log.clear()
        call, layout = SimpleNamespace(plan=SimpleNamespace(workspace=workspace)), SimpleNamespace(slots=16)
        made.append(of.run(key, lambda points: call, [Array((4, 3), [])], layout, [Spec((16, 3), FLOAT32)]))
        return log

    of.reserve(100)
    assert run("first", 100) == [] and run("first", 100) == ["replay"]  # launched, then captured
    assert run("second", 100) == [] and run("second", 100) == ["wait", "free 48", "free 48", "replay"]
    assert run("third", 200) == ["wait", "free 48", "free 48", "free 100", "free 0"]


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, STEPS])
def test_a_resumed_training_equals_an_unbroken_one(at, tmp_path):
    unbroken, first = trainer(clip=float("inf")), trainer(clip=float("inf"))
    losses = run(unbroken)
    begun = run(first, at)
    first.save(tmp_path / "trainer.safetensors")
    resumed = flash3d.Trainer.resume(str(tmp_path / "trainer.safetensors"))
    assert everything(resumed) == everything(first)
    assert (resumed.options, resumed.config) == (first.options, CONFIG)
    assert begun + run(resumed) == losses  # drop path and learning rate go on from there
    assert everything(resumed) == everything(unbroken)
    with pytest.raises(ValueError, match="all 6 steps are done"):
        resumed.step(*batch())


def test_skipped_steps_are_saved(tmp_path):
    ours = trainer()
    points, features, labels, lengths = batch()
    ours.step(points, features * np.float32(np.nan), labels, lengths)
    ours.save(tmp_path / "trainer.safetensors")
    resumed = flash3d.Trainer.resume(tmp_path / "trainer.safetensors")
    assert (resumed.done_steps, resumed.skipped) == (1, 1)


def test_weights_of_a_trainers_file(tmp_path):
    ours, path = trainer(), tmp_path / "trainer.safetensors"
    run(ours, 2)
    ours.save(path)
    loaded, config = flash3d.load(path)
    assert config == CONFIG
    for name, array in flat(ours.params).items():
        assert (flat(loaded)[name] == array).all()
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = safetensors.load_file(path)
    assert len(arrays) == 3 * len(flat(loaded))
    assert (arrays["optimizer.second.head.weight"] > 0).all()


def test_files_that_no_trainer_wrote(tmp_path):
    path = tmp_path / "weights.safetensors"
    flash3d.save(path, flash3d.init(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"cannot load .*weights.safetensors: it holds parameters only.*flash3d.load"):
        flash3d.Trainer.resume(path)
    trainer().save(path)
    content = path.read_bytes()
    for size in (7, 400, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cannot load .*weights.safetensors: it is"):
            flash3d.Trainer.resume(path)
    with pytest.raises(FileNotFoundError):
        flash3d.Trainer.resume(tmp_path / "absent")
    path.write_bytes(content.replace(b"optimizer.first.stem.bias", b"optimizer.third.stem.bias"))
    with pytest.raises(ValueError, match=r"cannot load .*the config has no optimizer.third.stem.bias"):
        flash3d.Trainer.resume(path)


def test_a_full_disk_leaves_the_old_file_and_the_trainer(tmp_path, monkeypatch):
    ours, path = trainer(), tmp_path / "trainer.safetensors"
    ours.save(path)
    content = path.read_bytes()
    run(ours, 2)
    before = everything(ours)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ours.save(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert everything(ours) == before
    ours.save(path)
    assert flash3d.Trainer.resume(path).done_steps == 2


def test_an_interrupt_while_saving(tmp_path, monkeypatch):
    ours, path = trainer(), tmp_path / "trainer.safetensors"
    ours.save(path)
    content = path.read_bytes()
    run(ours, 1)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        ours.save(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


# ---- data ----------------------------------------------------------------------------------------------------------


def test_crop():
    points = clouds.lidar_like(3000)
    rows = flash3d.crop(points, 512, np.random.default_rng(5))
    assert len(rows) == 512 and (np.diff(rows) > 0).all()
    middle = points[np.random.default_rng(5).integers(3000), :2]
    distances = np.linalg.norm(points[:, :2] - middle, axis=1)
    outside = np.setdiff1d(np.arange(3000), rows)
    assert distances[rows].min() == 0 and distances[rows].max() <= distances[outside].min()
    assert (flash3d.crop(points, 512, np.random.default_rng(5)) == rows).all()
    assert (flash3d.crop(points, 512, np.random.default_rng(6)) != rows).any()
    for size in (3000, 4000):
        assert (flash3d.crop(points, size, np.random.default_rng(0)) == np.arange(3000)).all()
    assert len(flash3d.crop(points[:0], 5, np.random.default_rng(0))) == 0
    same = flash3d.crop(np.ones((50, 3)), 7, np.random.default_rng(0))
    assert (same == np.arange(7)).all()  # ties go to the lowest rows
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        flash3d.crop(points, 0, np.random.default_rng(0))


def test_augment_keeps_the_geometry():
    points = clouds.lidar_like(400)
    kept = points.copy()
    angles, scales, mirrors = [], [], []
    for seed in range(30):
        moved = flash3d.augment(points, np.random.default_rng(seed))
        assert moved.dtype == np.float32 and moved.shape == points.shape
        fit = np.linalg.lstsq(points.astype(float), moved.astype(float), rcond=None)[0]
        scale = np.abs(np.linalg.det(fit)) ** (1 / 3)
        np.testing.assert_allclose(fit @ fit.T, scale**2 * np.eye(3), atol=5e-3)  # a turn and a scale
        np.testing.assert_allclose(fit[2], [0, 0, scale], atol=5e-3)  # about z
        residuals = moved - points @ fit
        assert np.abs(residuals).max() < 0.055 and 0.008 < residuals.std() < 0.012
        angles.append(np.arctan2(fit[0, 1], fit[0, 0]))
        scales.append(scale)
        mirrors.append(np.linalg.det(fit) < 0)
    assert min(scales) > 0.945 and max(scales) < 1.055 and np.ptp(scales) > 0.06
    assert 5 < sum(mirrors) < 25 and len(np.unique(np.digitize(angles, [-2, -1, 0, 1, 2]))) == 6
    again = flash3d.augment(points, np.random.default_rng(29))
    assert again.tobytes() == moved.tobytes() and (points == kept).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_voxel_subset(dtype):
    points = clouds.lidar_like(5000).astype(dtype)
    rows, parents = flash3d.voxel_subset(points, 2.0)
    cells = np.floor((points.astype(np.float64) - points.min(axis=0)) / 2.0)
    first = {}
    for row, cell in enumerate(map(tuple, cells)):
        first.setdefault(cell, row)
    assert 50 < len(rows) < 4000
    assert rows.tolist() == sorted(first.values())
    assert rows[parents].tolist() == [first[tuple(cell)] for cell in cells]


def test_voxel_subsets_of_few_points():
    for points, expected in ((np.zeros((0, 3)), []), (np.full((1, 3), 5.0), [0]), (np.full((9, 3), -5.0), [0])):
        rows, parents = flash3d.voxel_subset(points, 0.1)
        assert rows.tolist() == expected and parents.tolist() == [0] * len(points)
    for points, message in (
        (np.array([[0.0, 0, 0], [1e9, 0, 0]]), "got a width of 1e.09 voxels: raise size"),
        (np.array([[0.0, 0, np.nan]]), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            flash3d.voxel_subset(points, 1.0)
    with pytest.raises(ValueError, match="size must be positive and finite, got 0"):
        flash3d.voxel_subset(points, 0)


def test_features():
    points = clouds.uniform(20)
    reflected = np.arange(20, dtype=np.uint16) * 1000
    got = flash3d.features(points, {"intensity": reflected, "time": points[:, 0] * 2}, ("time", "z", "intensity"))
    expected = np.stack([points[:, 0] * 2, points[:, 2], reflected / np.float32(65535)], axis=1)
    assert got.dtype == np.float32 and (got == expected).all()
    with pytest.raises(
        ValueError, match=r"'ring' is needed \(x, ring in all\), and the points have only x, y, z, time"
    ):
        flash3d.features(points, {"time": reflected}, ("x", "ring"))


def principal(points):
    """Standard deviations along the principal axes, the largest first, and the third axis."""
    variances, axes = np.linalg.eigh(np.cov(points.astype(float).T, bias=True))
    return np.sqrt(np.maximum(variances[::-1], 0)), axes[:, 0]


def test_local_features():
    points, rng = clouds.lidar_like(500), np.random.default_rng(1)
    intensity = rng.integers(0, 256, 500).astype(np.uint8)
    names = [f"{name}_{count}" for name in flash3d.data.SHAPE for count in (6, 20)]
    names += ["intensity_mean_20", "z", "intensity_std_6"]
    got = dict(zip(names, flash3d.features(points, {"intensity": intensity}, names).T, strict=True))
    assert (got["z"] == points[:, 2]).all()
    order = np.linalg.norm(points[:, None] - points, axis=2).argsort(axis=1, kind="stable")
    for row in range(0, 500, 7):
        for count in (6, 20):
            near = order[row, :count]
            (first, second, third), normal = principal(points[near])
            heights = points[near, 2].astype(float)
            expected = {
                "linearity": (first - second) / first,
                "planarity": (second - third) / first,
                "verticality": 1 - abs(normal[2]),
                "size": first,
                "extent": np.ptp(heights),
                "rise": points[row, 2] - heights.mean(),
            }
            for name, value in expected.items():
                assert got[f"{name}_{count}"][row] == pytest.approx(value, abs=2e-5), name
        share = intensity[order[row]] / 255
        assert got["intensity_mean_20"][row] == pytest.approx(share[:20].mean(), abs=1e-6)
        assert got["intensity_std_6"][row] == pytest.approx(share[:6].std(), abs=1e-6)


def test_local_features_of_plain_shapes():
    rng, names = np.random.default_rng(0), [f"{name}_30" for name in flash3d.data.SHAPE]
    pole = np.outer(np.linspace(0, 10, 200), (0, 0, 1))
    ground, wall = rng.random((400, 3)) * (5, 5, 0), rng.random((400, 3)) * (5, 0, 5)
    for points, planar, verticality in ((pole, False, None), (ground, True, 0), (wall, True, 1)):
        got = flash3d.features(points, {}, names).T
        # A variance of 0 has an error of 1e-8 of the largest, so its root has one of 1e-4.
        assert (got[0] + got[1] > 1 - 2e-4).all() and (got[1].max() > 0.5) == planar
        if verticality is not None:
            assert abs(got[2] - verticality).max() < 1e-5
    points = clouds.lidar_like(300)
    turned = points @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(flash3d.features(turned, {}, names), flash3d.features(points, {}, names), atol=2e-5)


def test_local_features_of_few_points():
    names = [*(f"{name}_32" for name in flash3d.data.SHAPE), "time_mean_8", "x"]
    for points in (np.zeros((0, 3)), np.ones((1, 3)), np.ones((40, 3), np.float32), clouds.uniform(5)):
        got = flash3d.features(points, {"time": points[:, 0] * 2}, names)
        assert got.shape == (len(points), 8) and np.isfinite(got).all()
        if len(points) != 5:
            assert not got[:, :6].any() or (got[:, 2] == 1).all()
    own = {"size_8": np.arange(5.0)}  # the attributes of the points come first
    assert (flash3d.features(clouds.uniform(5), own, ["size_8"])[:, 0] == np.arange(5)).all()
    for name in ("size", "size_0", "size_100", "width_8", "time_mean_8", "time_mean"):
        with pytest.raises(ValueError, match=f"the feature '{name}' is needed"):
            flash3d.features(clouds.uniform(5), {}, [name])


def test_mix():
    points, other = clouds.lidar_like(3000), clouds.lidar_like(2000, 1)
    shares = []
    for seed in range(20):
        rows = flash3d.mix(points, other, np.random.default_rng(seed))
        assert (np.diff(rows) > 0).all()
        mine, theirs = points[rows[rows < 3000]], other[rows[rows >= 3000] - 3000]
        angles = [np.sort(np.arctan2(part[:, 1], part[:, 0])) for part in (mine, theirs)]
        gaps = [np.diff(a, append=a[:1] + 2 * np.pi) for a in angles]
        widest = gaps[0].max()  # the sector that the first cloud leaves
        assert np.pi / 4 - 0.01 < widest < np.pi + 0.1 and np.sort(gaps[0])[-2] < 0.1
        assert widest + gaps[1].max() > 2 * np.pi - 0.2  # the other cloud has that sector, and nothing else
        begin = angles[0][gaps[0].argmax()]
        assert ((angles[1] - begin) % (2 * np.pi) < widest).all()
        shares.append(len(theirs) / 2000)
    assert np.ptp(shares) > 0.2
    assert (flash3d.mix(points, other, np.random.default_rng(19)) == rows).all()
    none = points[:0]
    assert len(flash3d.mix(none, none, np.random.default_rng(0))) == 0


def test_task(tmp_path):
    path = tmp_path / "weights.safetensors"
    task = flash3d.Task(features=["x", "y", "z", "intensity"], classes=("ground", "tree", "car"), voxel=0.5)
    flash3d.save(path, flash3d.init(CONFIG), CONFIG, task=task)
    assert flash3d.load_task(path) == task and flash3d.load(path)[1] == CONFIG
    flash3d.save(path, flash3d.init(CONFIG), CONFIG)
    assert flash3d.load_task(path) == flash3d.Task(features=("x", "y", "z", "intensity"), classes=("0", "1", "2"))
    with pytest.raises(ValueError, match=r"the task must have 3 classes, as config.classes says, got 1"):
        flash3d.save(path, flash3d.init(CONFIG), CONFIG, task=flash3d.Task(features=task.features, classes=("all",)))
    wider = CONFIG.replace(in_channels=5)
    flash3d.save(path, flash3d.init(wider), wider)
    with pytest.raises(ValueError, match=r"does not say what its 5 input features are: pass task= to flash3d.save"):
        flash3d.load_task(path)
    for changes, error in (({"voxel": -1}, ValueError), ({"voxel": "no"}, TypeError), ({"classes": "abc"}, TypeError)):
        with pytest.raises(error, match=next(iter(changes))):
            flash3d.Task(**{"features": ("x",), "classes": ("a",)} | changes)


# ---- gpu3d segment -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_a_folder(monkeypatch, tmp_path):
    """An empty folder with weights.safetensors and sweep.bin, in which the command runs without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "working_cupy", lambda: (None, "CuPy: a cure"))
    rng = np.random.default_rng(0)
    params = flash3d.init(CONFIG)
    for array in flat(params).values():
        array += 0.3 * rng.standard_normal(array.shape, np.float32)  # so that every class occurs
    task = flash3d.Task(features=("x", "y", "z", "intensity"), classes=("ground", "tree", "car"), voxel=4.0)
    flash3d.save("weights.safetensors", params, CONFIG, task=task)
    sweep = np.concatenate([clouds.uniform(300), rng.random((300, 1))], axis=1).astype(np.float32)
    sweep[7, 2] = np.nan
    sweep.tofile("sweep.bin")
    return tmp_path, params, task, sweep


def test_segment(in_a_folder, capsys):
    folder, params, task, sweep = in_a_folder
    assert cli.main(["segment", "sweep.bin", "--weights", "weights.safetensors"]) == 0
    labels = np.load(folder / "gpu3d-segment-sweep.npy")
    kept = np.delete(np.arange(300), 7)
    rows, parents = flash3d.voxel_subset(sweep[kept, :3], 4.0)
    thin = sweep[kept][rows]
    expected = flash3d.forward(params, flash3d.Batch(thin[:, :3], thin), CONFIG).argmax(axis=1)[parents]
    assert labels.dtype == np.int32 and labels[7] == -1 and (labels[kept] == expected).all()
    assert 100 < len(rows) < 290 and len(np.unique(expected)) > 1
    out = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    table = {name: value.strip() for name, value in out.items()}
    for number, name in enumerate(task.classes):
        assert table.get(name, "0") == str((labels == number).sum())
    assert table["points"] == "300" and table["not finite"] == "1 (label -1)" and "CPU" in table["device"]


def test_segment_computes_local_features_of_the_thinned_scan(in_a_folder):
    folder, params, _, sweep = in_a_folder
    names = "z", "size_8", "intensity_mean_8", "verticality_16"
    task = flash3d.Task(features=names, classes=("ground", "tree", "car"), voxel=4.0)
    flash3d.save("local.safetensors", params, CONFIG, task=task)
    sweep[11, 3] = np.nan
    sweep.tofile("sweep.bin")
    assert cli.main(["segment", "sweep.bin", "--weights", "local.safetensors"]) == 0
    labels = np.load(folder / "gpu3d-segment-sweep.npy")
    kept = np.delete(np.arange(300), (7, 11))
    rows, parents = flash3d.voxel_subset(sweep[kept, :3], 4.0)
    points, intensity = sweep[kept][rows, :3], sweep[kept][rows, 3]
    features = flash3d.features(points, {"intensity": intensity}, names)
    expected = flash3d.forward(params, flash3d.Batch(points, features), CONFIG).argmax(axis=1)[parents]
    assert (labels[[7, 11]] == -1).all() and (labels[kept] == expected).all() and len(np.unique(expected)) > 1


def test_segment_writes_ply(in_a_folder):
    plyfile = pytest.importorskip("plyfile")
    folder, _, _, sweep = in_a_folder
    for out in ("labels.npy", "labels.ply"):
        assert cli.main(["segment", "sweep.bin", "--weights", "weights.safetensors", "-o", out]) == 0
    vertices = plyfile.PlyData.read(str(folder / "labels.ply"))["vertex"]
    assert (vertices["label"] == np.load(folder / "labels.npy")).all()
    np.testing.assert_array_equal(np.stack([vertices[name] for name in "xyz"], axis=1), sweep[:, :3])


def test_segment_of_weights_without_a_task_or_of_a_trainer(in_a_folder):
    folder, params, _, sweep = in_a_folder
    flash3d.Trainer(CONFIG, params, steps=1).save("trainer.safetensors")
    assert cli.main(["segment", "sweep.bin", "--weights", "trainer.safetensors"]) == 0
    kept = np.delete(sweep, 7, axis=0)
    expected = flash3d.forward(params, flash3d.Batch(kept[:, :3], kept), CONFIG).argmax(axis=1)
    assert (np.delete(np.load(folder / "gpu3d-segment-sweep.npy"), 7) == expected).all()


def test_segment_of_a_scan_without_a_finite_point(in_a_folder, capsys):
    np.full((5, 4), np.nan, np.float32).tofile("nan.bin")
    assert cli.main(["segment", "nan.bin", "--weights", "weights.safetensors"]) == 0
    assert (np.load("gpu3d-segment-nan.npy") == -1).all()
    assert "5 (label -1)" in capsys.readouterr().out


def test_segment_errors(in_a_folder, capsys):
    folder, *_ = in_a_folder
    np.save("bare.npy", clouds.uniform(20))
    (folder / "short.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:-5])
    np.savez("uneven.npz", points=clouds.uniform(20), intensity=np.zeros(19))
    for arguments, message in [
        (["absent.bin", "--weights", "weights.safetensors"], r"gpu3d: absent.bin: .*No such file"),
        (["sweep.bin", "--weights", "absent"], "gpu3d: absent: .*No such file"),
        (["sweep.bin", "--weights", "short.safetensors"], "gpu3d: short.safetensors: .*it is truncated"),
        (["sweep.bin", "--weights", "sweep.bin"], "gpu3d: sweep.bin: .*it is no safetensors file"),
        (["weights.safetensors", "--weights", "weights.safetensors"], "cannot tell the format"),
        (["bare.npy", "--weights", "weights.safetensors"], "gpu3d: bare.npy: the feature 'intensity' is needed .*only"),
        (["uneven.npz", "--weights", "weights.safetensors"], "feature .intensity. is needed"),
        (
            ["sweep.bin", "--weights", "weights.safetensors", "-o", "no/x.npy"],
            "sweep.bin: cannot write no/x.npy: No such",
        ),
    ]:
        assert cli.main(["segment", *arguments]) == 1
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert not out and re.search(message, err), err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["segment", "sweep.bin", "--weights", "weights.safetensors", "-o", "labels.gif"])
    assert "the ending of labels.gif is none of" in capsys.readouterr().err
    assert not list(folder.glob("gpu3d-segment*"))


def test_the_task_of_a_later_release(in_a_folder, capsys):
    folder, *_ = in_a_folder
    content = (folder / "weights.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"][checkpoint.TASK] = json.dumps({"features": ["x"], "sensor": "HDL-64"})
    text = json.dumps(header).encode()
    (folder / "weights.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[begin:])
    assert cli.main(["segment", "sweep.bin", "--weights", "weights.safetensors"]) == 1
    assert "sensor" in capsys.readouterr().err
