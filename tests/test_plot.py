# SPDX-License-Identifier: Apache-2.0
"""The picture is a PNG, coloured by bucket, also for degenerate clouds."""

import matplotlib.image
import numpy as np
import pytest

import gpu3d
from gpu3d.plot import plot_buckets, plot_points


def draw(points, path, bucket_size=16, **options):
    plot_buckets(points, gpu3d.bucketize(points, bucket_size), path, **options)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(path)[..., :3]


def hues(image):
    """How many of 36 hues occur clearly in the picture."""
    red, green, blue = image[np.ptp(image, axis=-1) > 0.25].astype(np.float64).T
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    return len(np.unique(np.floor(angle * 18 / np.pi)))


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)


def test_many_buckets_have_many_colours(points, tmp_path):
    assert hues(draw(points, tmp_path / "many.png")) > 20


def test_one_bucket_has_one_hue(points, tmp_path):
    assert 1 <= hues(draw(points, tmp_path / "one.png", bucket_size=2048)) <= 4


def test_both_panels_show_points(points, tmp_path):
    image = draw(points, tmp_path / "panels.png")
    coloured = np.ptp(image, axis=-1) > 0.25
    half = image.shape[1] // 2
    assert coloured[:, :half].sum() > 1000
    assert coloured[:, half:].sum() > 1000


def test_title_is_drawn(points, tmp_path):
    plain = draw(points, tmp_path / "plain.png")
    titled = draw(points, tmp_path / "titled.png", title="a title")
    height = plain.shape[0] // 14
    assert (plain[:height] != titled[:height]).any()
    np.testing.assert_array_equal(plain[height:], titled[height:])


def test_far_from_the_origin_looks_the_same(tmp_path):
    points = np.random.default_rng(0).integers(-4096, 4096, size=(2000, 3)) / 64  # exact, also after the shift
    here = draw(points, tmp_path / "here.png")
    there = draw(points + np.array([5e6, 5e6, 0.0]), tmp_path / "there.png")
    assert (here != there).any(axis=-1).mean() < 1e-3


def test_an_outlier_does_not_shrink_the_cloud(points, tmp_path):
    points[0] = 1e6
    image = draw(points, tmp_path / "outlier.png")
    half = image.shape[1] // 2
    assert (np.ptp(image[:, :half], axis=-1) > 0.25).sum() > 1000


@pytest.mark.parametrize("count", [0, 1, 17])
def test_few_points_and_coinciding_points(count, tmp_path):
    draw(np.full((count, 3), 3.5, dtype=np.float32), tmp_path / "few.png")


def test_matplotlib_global_state_is_left_alone(points, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(points, tmp_path / "state.png")
    assert dict(matplotlib.rcParams) == before


def test_points_by_an_attribute(points, tmp_path):
    def drawn(color, name):
        plot_points(points, tmp_path / name, color=color)
        return matplotlib.image.imread(tmp_path / name)[..., :3]

    labels = (np.arange(len(points)) % 2).astype(np.uint8)
    assert hues(drawn(None, "height.png")) > 8
    assert 2 <= hues(drawn(labels, "labels.png")) <= 8
    red = np.tile(np.uint8([255, 0, 0]), (len(points), 1))
    assert 1 <= hues(drawn(red, "red.png")) <= 2
    gaps = points[:, 0].copy()
    gaps[::3] = np.nan
    assert hues(drawn(gaps, "gaps.png")) > 8
    assert np.array_equal(drawn(red.astype(np.uint16) * 257, "deep.png"), drawn(red, "red.png"))


def test_points_with_a_colour_of_another_shape(points, tmp_path):
    with pytest.raises(ValueError, match=r"color must have shape \[N\] or \[N, 3\] for 2000 points, got \[5\]"):
        plot_points(points, tmp_path / "x.png", color=np.zeros(5))
    assert not list(tmp_path.iterdir())
