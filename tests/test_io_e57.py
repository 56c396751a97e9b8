# SPDX-License-Identifier: Apache-2.0
"""gpu3d.io: .e57. Files of several scans are made by pye57."""

import re
import struct

import numpy as np
import pytest

pye57 = pytest.importorskip("pye57")

from gpu3d.io import Cloud, read_cloud, write_cloud  # noqa: E402

RNG = np.random.default_rng(0)


def error_of(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_cloud(path)
    return str(caught.value)


def page_checksum(page):
    """CRC-32C."""
    checksum = 0xFFFFFFFF
    for byte in page:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    return struct.pack(">I", checksum ^ 0xFFFFFFFF)


def with_text(path, old, new):
    """Replace text in the XML by text of the same length, and correct the checksums."""
    assert len(old) == len(new)
    data = path.read_bytes()
    pages = [data[i : i + 1020] for i in range(0, len(data), 1024)]
    text = b"".join(pages)
    assert old in text
    text = text.replace(old, new)
    pages = [text[i : i + 1020] for i in range(0, len(text), 1020)]
    path.write_bytes(b"".join(page + page_checksum(page) for page in pages))


@pytest.mark.parametrize("count", [0, 1, 1000, 300_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(tmp_path, count, dtype):
    points = (RNG.normal(size=(count, 3)) * 1e6).astype(dtype)
    attributes = {
        "intensity": RNG.random(count).astype(np.float32),
        "colors": RNG.integers(0, 2**16, (count, 3)).astype(np.uint16),
    }
    write_cloud(tmp_path / "a.e57", Cloud(points, attributes))
    cloud = read_cloud(tmp_path / "a.e57")
    assert cloud.points.dtype == np.float64 and cloud.meta == {"format": ".e57"}
    np.testing.assert_array_equal(cloud.points, points)
    assert cloud.attributes.keys() == attributes.keys()
    for name, values in attributes.items():
        assert cloud.attributes[name].dtype == values.dtype
        np.testing.assert_array_equal(cloud.attributes[name], values)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i1", "i2", "f4", "f8"])
def test_dtypes_of_intensity(tmp_path, dtype):
    values = np.array([0, 1, 100], dtype)
    write_cloud(tmp_path / "a.e57", Cloud(np.ones((3, 3)), {"intensity": values}))
    found = read_cloud(tmp_path / "a.e57").attributes["intensity"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_points_that_are_not_finite_become_nan(tmp_path):
    points = np.array([[1.0, 2, 3], [np.nan, 2, 3], [1, np.inf, 3]])
    write_cloud(tmp_path / "a.e57", points)
    cloud = read_cloud(tmp_path / "a.e57")
    np.testing.assert_array_equal(cloud.points, [[1, 2, 3], [np.nan] * 3, [np.nan] * 3])
    assert not cloud.attributes
    assert len(pye57.E57(str(tmp_path / "a.e57")).read_scan(0)["cartesianX"]) == 1


def test_scans_are_joined_with_their_poses(tmp_path):
    path = tmp_path / "a.e57"
    rotation = np.array([0.5, 0.5, 0.5, -0.5])
    with pye57.E57(str(path), "w") as file:
        for i in range(2):
            scan = {name: RNG.normal(size=50) for name in ("cartesianX", "cartesianY", "cartesianZ")}
            scan |= {"rowIndex": np.arange(50) % 7, "columnIndex": np.arange(50) % 5}
            scan["cartesianInvalidState"] = (np.arange(50) % 10 == 0).astype(np.int8)
            if i:
                scan["intensity"] = RNG.random(50).astype(np.float32)
            file.write_scan_raw(scan, rotation=rotation, translation=np.array([100.0, i, 3]))
    cloud = read_cloud(path)
    assert set(cloud.attributes) == {"intensity", "rowindex", "columnindex", "scan"}
    np.testing.assert_array_equal(cloud.attributes["scan"], np.repeat([0, 1], 50))
    np.testing.assert_array_equal(cloud.attributes["rowindex"], np.tile(np.arange(50) % 7, 2))
    assert np.isnan(cloud.attributes["intensity"][:50]).all()
    file = pye57.E57(str(path))
    for i in range(2):
        scan = file.read_scan(i)
        points = cloud.points[cloud.attributes["scan"] == i]
        assert np.isnan(points[::10]).all()
        expected = np.stack([scan["cartesianX"], scan["cartesianY"], scan["cartesianZ"]], axis=1)
        np.testing.assert_allclose(np.delete(points, np.s_[::10], axis=0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"label": np.zeros(2, np.uint8)}, "attribute label"),
        ({"intensity": np.zeros(2, np.int64)}, "attribute intensity is int64"),
        ({"intensity": np.array([np.nan, 1])}, "attribute intensity has NaN"),
        ({"colors": np.zeros((2, 3), np.float32)}, "attribute colors is float32"),
    ],
)
def test_what_an_e57_is_not_written_with(tmp_path, attributes, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / "a.e57", Cloud(np.zeros((2, 3)), attributes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [b"4", b"9"])
def test_more_points_than_there_are(tmp_path, count):
    path = tmp_path / "a.e57"
    write_cloud(path, np.ones((300, 3)))
    with_text(path, b'recordCount="300"', b'recordCount="' + count + b'00"')
    assert "truncated" in error_of(path)


def test_entities_are_not_expanded(tmp_path):
    path = tmp_path / "a.e57"
    write_cloud(path, np.ones((3, 3)))
    with_text(path, b"<formatName ty", b"<!DOCTYPE x []")
    assert "XML" in error_of(path)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "a.e57"
    write_cloud(path, np.ones((30, 3)))
    good = path.read_bytes()
    for size in range(0, len(good), 97):
        path.write_bytes(good[:size])
        error_of(path)


def test_damaged_anywhere(tmp_path):
    """Pages have checksums, so every change of a byte is seen."""
    path = tmp_path / "a.e57"
    write_cloud(path, np.ones((30, 3)))
    good = path.read_bytes()
    for at in range(0, len(good), 61):
        data = bytearray(good)
        data[at] ^= 0x55
        path.write_bytes(data)
        error_of(path)
