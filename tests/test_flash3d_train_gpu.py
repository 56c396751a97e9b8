# SPDX-License-Identifier: Apache-2.0
"""Training on a GPU: against the host, the same bits again, the file, and the preparation of scans with CuPy."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from test_flash3d_train import CONFIG

from gpu3d import flash3d
from gpu3d.flash3d.params import flat

pytestmark = pytest.mark.gpu

# The shapes of the products on a GPU are wider than those of the tests on the host.
WIDE = CONFIG.replace(channels=(32, 64), decoder_channels=(32,), heads=(1, 2), bucket_size=32)
STEPS = 6


def batch(step=0, lengths=(700, 0, 1, 400)):
    """Points, features, labels and lengths of a step, on the host. The label is the height, in three classes."""
    rng = np.random.default_rng([7, step])
    points = clouds.uniform(sum(lengths), step)
    features = np.concatenate([points / points.std(axis=0), rng.random((len(points), 1))], axis=1).astype(np.float32)
    labels = np.digitize(points[:, 2], np.quantile(points[:, 2], [0.3, 0.6])).astype(np.uint8)
    labels[::9] = 255
    return points, features, labels, lengths


def on_gpu(cp, step, **options):
    points, features, labels, lengths = batch(step, **options)
    return cp.asarray(points), cp.asarray(features), cp.asarray(labels), lengths


def trainer(config=WIDE, device=0, **options):
    return flash3d.Trainer(
        config, flash3d.init(config, device=device), **({"steps": STEPS, "lr": 1e-2, "seed": 3} | options)
    )


def everything(of):
    """The whole state of a trainer, as bytes."""
    return b"".join(array.get().tobytes() for array in of._state)


def run(cp, of, until=STEPS):
    """The losses of the steps up to one. From the second step on they are replayed from a graph."""
    losses = [of.step(*on_gpu(cp, step)) for step in range(of.done_steps, until)]
    return [float(loss) for loss in losses]


def test_steps_are_those_of_the_host(cp):
    config = WIDE.replace(dtype="float32")
    ours, expected = trainer(config), trainer(config, device=None)
    losses = run(cp, ours)
    np.testing.assert_allclose(losses, [float(expected.step(*batch(step))) for step in range(STEPS)], rtol=2e-3)
    fresh = flat(flash3d.init(config))
    for path, array in flat(ours.params).items():
        if path.endswith("weight") and array.ndim == 2:
            moved, wanted = array.get() - fresh[path], flat(expected.params)[path] - fresh[path]
            assert np.linalg.norm(moved - wanted) < 0.1 * np.linalg.norm(wanted), path


def test_two_trainings_and_a_resumed_one_give_the_same_bits(cp, tmp_path):
    one, two = trainer(), trainer()
    losses = run(cp, one)
    begun = run(cp, two, 3)
    two.save(tmp_path / "trainer.safetensors")
    two = flash3d.Trainer.resume(tmp_path / "trainer.safetensors", device=0)
    assert begun + run(cp, two) == losses
    assert everything(one) == everything(two)
    assert everything(trainer(seed=4)) != everything(one)
    again = trainer(recompute=True)
    assert run(cp, again) == losses and everything(again) == everything(one)
    with pytest.raises(ValueError, match="all 6 steps are done"):
        two.step(*on_gpu(cp, 0))


def test_a_training_moves_to_the_host(cp, tmp_path):
    ours = trainer()
    run(cp, ours, 2)
    ours.save(tmp_path / "trainer.safetensors")
    on_host = flash3d.Trainer.resume(tmp_path / "trainer.safetensors")
    assert b"".join(array.tobytes() for array in on_host._state) == everything(ours)
    assert np.isfinite(on_host.step(*batch(2)))


@pytest.mark.parametrize("step", [0, 3])  # launched, and replayed
def test_a_step_that_is_not_finite_is_skipped(cp, step):
    ours = trainer()
    run(cp, ours, step)
    before = [array.get() for array in ours._state[:3]]
    points, features, labels, lengths = on_gpu(cp, step)
    features[5, 1] = np.nan
    assert np.isnan(float(ours.step(points, features, labels, lengths)))
    assert all((array.get() == kept).all() for array, kept in zip(ours._state[:3], before, strict=True))
    assert (ours.done_steps, ours.skipped) == (step + 1, 1)
    assert np.isfinite(float(ours.step(*on_gpu(cp, step))))
    assert (ours._state.masters.get() != before[0]).any()


def test_a_training_with_ragged_batches(cp):
    """Launched and replayed steps give the same bits: two trainings, of which one captures its graphs earlier."""
    lengths = [(1200, 0, 1, 400), (1180, 3, 5, 390), (700, 600), (1201, 9, 1, 380), (1190, 1, 1, 385)]
    one, two = trainer(steps=20), trainer(steps=20)
    for some in lengths:
        points, features, *rest = on_gpu(cp, 0, lengths=some)
        two.step(points, features * np.float32(np.nan), *rest)
    assert two.skipped == len(lengths)
    for step in range(10):
        losses = [float(of.step(*on_gpu(cp, step, lengths=lengths[step % 5]))) for of in (one, two)]
        assert np.isfinite(losses[0]) and losses[0] == losses[1]
    for got, expected in zip(one._state[:3], two._state[:3], strict=True):
        assert (got == expected).all()


def test_the_loss_of_a_step_outlives_the_next(cp):
    ours = trainer(steps=50)
    losses = [ours.step(*on_gpu(cp, 0)) for _ in range(50)]
    assert len({float(loss) for loss in losses}) > 40
    assert np.mean([float(loss) for loss in losses[-5:]]) < 0.6 * float(losses[0])


def test_labels_beyond_the_classes_count_as_ignored(cp):
    points, features, labels, lengths = on_gpu(cp, 0)
    other = cp.where(labels == 255, cp.uint8(77), labels)
    assert float(trainer().step(points, features, labels, lengths)) == float(
        trainer().step(points, features, other, lengths)
    )


def test_bad_batches(cp):
    ours, (points, features, labels, lengths) = trainer(), on_gpu(cp, 0)
    for arguments, error, message in [
        (batch(), ValueError, "arguments must be on one device"),
        ((points, features, labels.get(), lengths), ValueError, "arguments must be on one device"),
        ((points, features, labels.astype(np.int64), lengths), TypeError, "labels on a GPU must be uint8 or int32"),
        ((points, features[:, :3], labels, lengths), ValueError, "features must have the 4 channels"),
    ]:
        with pytest.raises(error, match=message):
            ours.step(*arguments)
    assert ours.done_steps == 0


# ---- data ----------------------------------------------------------------------------------------------------------


def test_preparation_is_that_of_numpy(cp):
    points = clouds.lidar_like(5000)
    there = cp.asarray(points)
    for size in (512, 6000):
        rows = flash3d.crop(there, size, np.random.default_rng(1))
        assert (rows.get() == flash3d.crop(points, size, np.random.default_rng(1))).all()
    for got, expected in zip(flash3d.voxel_subset(there, 2.0), flash3d.voxel_subset(points, 2.0), strict=True):
        assert (got.get() == expected).all()
    reflected = np.arange(5000, dtype=np.uint16)
    got = flash3d.features(there, {"intensity": cp.asarray(reflected)}, ("z", "intensity")).get()
    assert (got == flash3d.features(points, {"intensity": reflected}, ("z", "intensity"))).all()
    names = [*(f"{name}_{count}" for name in flash3d.data.SHAPE for count in (8, 32)), "intensity_std_32"]
    got = flash3d.features(there, {"intensity": cp.asarray(reflected)}, names).get()
    np.testing.assert_allclose(got, flash3d.features(points, {"intensity": reflected}, names), atol=1e-5)
    other = clouds.lidar_like(4000, 1)
    rows = flash3d.mix(there, cp.asarray(other), np.random.default_rng(1)).get()
    expected = flash3d.mix(points, other, np.random.default_rng(1))
    assert len(np.setxor1d(rows, expected)) <= 2  # of the points on the edge of the sector


def test_augment(cp):
    points = clouds.lidar_like(4000)
    moved, again = (flash3d.augment(cp.asarray(points), np.random.default_rng(2)).get() for _ in range(2))
    assert moved.dtype == np.float32 and (moved == again).all()
    difference = moved - flash3d.augment(points, np.random.default_rng(2))  # of two jitters
    assert np.abs(difference).max() < 0.101 and 0.013 < difference.std() < 0.015
