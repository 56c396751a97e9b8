# SPDX-License-Identifier: Apache-2.0
"""gpu3d.io of .bin, .pcd.bin and .label: round trips, the warning of a wrong number of columns, broken files."""

import warnings

import numpy as np
import pytest

from gpu3d.io import Cloud, read_cloud, write_cloud

POINTS = np.array([[1.5, -2.25, np.nan], [80.0, 2.0**-10, -np.inf], [-0.0, 7.5, 1e38]], np.float32)
INTENSITY = np.array([0.5, 0.1, 0], np.float32)
RING = np.array([31, 0, 7], np.uint8)


def assert_cloud(cloud, points, **attributes):
    np.testing.assert_array_equal(cloud.points, points)
    assert cloud.points.dtype == np.float32
    assert list(cloud.attributes) == list(attributes)
    for name, values in attributes.items():
        np.testing.assert_array_equal(cloud.attributes[name], values)
        assert cloud.attributes[name].dtype == values.dtype and cloud.attributes[name].flags.c_contiguous


def sweep(count, *, ring):
    """Rows with values as a sensor gives them."""
    rng = np.random.default_rng(count)
    columns = [rng.normal(0, 30, (count, 3)), rng.integers(0, 256, (count, 1))]
    if ring:
        columns.append(np.arange(count)[:, None] % 32)
    return np.concatenate(columns, axis=1).astype(np.float32)


def test_round_trip(tmp_path):
    write_cloud(tmp_path / "a.bin", Cloud(POINTS, {"intensity": INTENSITY}))
    assert_cloud(read_cloud(tmp_path / "a.bin"), POINTS, intensity=INTENSITY)
    write_cloud(tmp_path / "a.pcd.bin", Cloud(POINTS, {"ring": RING, "intensity": INTENSITY}))
    assert_cloud(read_cloud(tmp_path / "a.pcd.bin"), POINTS, intensity=INTENSITY, ring=RING.astype(np.float32))


def test_what_is_missing_is_zero(tmp_path):
    zeros = np.zeros(3, np.float32)
    for name, expected in (("a.bin", {"intensity": zeros}), ("a.pcd.bin", {"intensity": zeros, "ring": zeros})):
        write_cloud(tmp_path / name, POINTS)
        assert_cloud(read_cloud(tmp_path / name), POINTS, **expected)


def test_no_points(tmp_path):
    write_cloud(tmp_path / "a.bin", np.empty((0, 3), np.float32))
    assert (tmp_path / "a.bin").stat().st_size == len(read_cloud(tmp_path / "a.bin")) == 0


def test_columns(tmp_path):
    rows = np.arange(21, dtype=np.float32).reshape(3, 7)
    rows.tofile(tmp_path / "a.bin")
    cloud = read_cloud(tmp_path / "a.bin", columns=7)
    assert_cloud(cloud, rows[:, :3], intensity=rows[:, 3], ring=rows[:, 4], column_5=rows[:, 5], column_6=rows[:, 6])
    assert_cloud(read_cloud(tmp_path / "a.bin", columns=3), rows.reshape(-1, 3))


@pytest.mark.parametrize(
    ("name", "cloud", "message"),
    [
        ("a.bin", Cloud(POINTS.astype(np.float64)), "subtract an origin .* then convert by points.astype"),
        ("a.bin", Cloud(POINTS, {"ring": RING}), "holds intensity, and not the attribute ring"),
        ("a.pcd.bin", Cloud(POINTS, {"time": INTENSITY}), "holds intensity and ring, and not the attribute time"),
        ("a.bin", Cloud(POINTS, {"intensity": np.full(3, 2**24 + 1)}), "float32 does not hold .* intensity"),
        ("a.bin", Cloud(POINTS, {"intensity": np.full(3, 0.1)}), "float32 does not hold .* intensity .float64"),
        ("a.bin", Cloud(POINTS, {"intensity": np.full(3, 1e300)}), "float32 does not hold .* intensity"),
        ("a.bin", Cloud(POINTS, {"intensity": INTENSITY[:, None]}), r"intensity has shape \[3, 1\]"),
        ("a.label", Cloud(POINTS), "holds the attribute label, which this cloud does not have"),
        ("a.label", Cloud(POINTS, {"label": INTENSITY}), "integers from 0 to 65535, and attribute label"),
        ("a.label", Cloud(POINTS, {"label": np.full(3, 2**16)}), "integers from 0 to 65535, and attribute label"),
        ("a.label", Cloud(POINTS, {"label": RING, "instance": np.full(3, -1)}), "and attribute instance"),
    ],
)
def test_what_rows_cannot_hold(tmp_path, name, cloud, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / name, cloud)
    assert not list(tmp_path.iterdir())


# ---- the number of columns


@pytest.mark.parametrize(("name", "width"), [("a.bin", 5), ("a.pcd.bin", 4)])
def test_another_number_of_columns_warns(tmp_path, name, width):
    rows = sweep(400, ring=width == 5)
    rows.tofile(tmp_path / name)
    with pytest.warns(UserWarning, match=f"pass columns={width}") as caught:
        read_cloud(tmp_path / name)
    assert caught[0].filename == __file__
    assert len(read_cloud(tmp_path / name, columns=9 - width)) != 400  # the caller says so: no warning
    assert_cloud(
        read_cloud(tmp_path / name, columns=width),
        rows[:, :3],
        **{key: rows[:, i] for key, i in (("intensity", 3), ("ring", 4)) if i < width},
    )


@pytest.mark.parametrize("rows", [sweep(400, ring=False), np.zeros((400, 4), np.float32), sweep(400, ring=False) - 500])
def test_plausible_and_doubtful_files_do_not_warn(tmp_path, rows):
    rows[::3, :3] = np.nan
    rows.astype(np.float32).tofile(tmp_path / "a.bin")
    assert len(read_cloud(tmp_path / "a.bin")) == 400


def test_real_sweeps_do_not_warn(data_dir):
    for name in ("file_formats/kitti_training_000005.bin", "lidar_raw/nuscenes_n015_1532402927647951.pcd.bin"):
        read_cloud(data_dir / name)


# ---- .label


@pytest.mark.parametrize("place", ["velodyne", "labels"])
def test_label(tmp_path, monkeypatch, place):
    for folder in ("velodyne", "labels"):
        (tmp_path / folder).mkdir()
    write_cloud(tmp_path / place / "000.bin", Cloud(POINTS, {"intensity": INTENSITY}))
    path = tmp_path / "labels/000.label"
    label, instance = np.array([0, 65535, 40], np.uint16), np.array([3, 0, 65535], np.uint16)

    write_cloud(path, Cloud(POINTS, {"label": label.astype(np.int64), "instance": instance}))
    assert path.read_bytes() == np.array([3 << 16, 65535, 65535 << 16 | 40], "<u4").tobytes()
    assert_cloud(read_cloud(path), POINTS, intensity=INTENSITY, label=label, instance=instance)
    write_cloud(path, Cloud(POINTS, {"label": label}))
    assert_cloud(read_cloud(path), POINTS, intensity=INTENSITY, label=label)
    monkeypatch.chdir(path.parent)
    assert_cloud(read_cloud("000.label"), POINTS, intensity=INTENSITY, label=label)


def test_label_without_its_points(tmp_path):
    (tmp_path / "a.label").write_bytes(bytes(12))
    with pytest.raises(ValueError, match=r"is neither .*velodyne.a.bin nor .*a.bin"):
        read_cloud(tmp_path / "a.label")
    (tmp_path / "a.bin").write_bytes(bytes(32))
    with pytest.raises(ValueError, match=r"holds 3 labels, and .*a.bin is 2 points"):
        read_cloud(tmp_path / "a.label")
    (tmp_path / "a.label").write_bytes(bytes(13))
    with pytest.raises(ValueError, match="13 bytes are no whole number of labels"):
        read_cloud(tmp_path / "a.label")


# ---- broken files


@pytest.mark.parametrize(("name", "width"), [("a.bin", 4), ("a.pcd.bin", 5)])
def test_truncated(tmp_path, name, width):
    data = sweep(10, ring=width == 5).tobytes()
    for size in range(0, len(data), 7):
        (tmp_path / name).write_bytes(data[:size])
        if size % (4 * width):
            with pytest.raises(ValueError, match=f"no whole number of points of {width} float32 values.*columns="):
                read_cloud(tmp_path / name)
        else:
            assert len(read_cloud(tmp_path / name)) == size // (4 * width)


@pytest.mark.parametrize("name", ["a.bin", "a.pcd.bin"])
def test_random_bytes_are_points(tmp_path, name):
    data = np.random.default_rng(0).bytes(4000)
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of signalling NaN
        assert (
            read_cloud(tmp_path / name).points.tobytes()
            == np.frombuffer(data, "<f4").reshape(-1, 4 if name == "a.bin" else 5)[:, :3].tobytes()
        )
