# SPDX-License-Identifier: Apache-2.0
"""gpu3d.io of .npy and .npz: round trips of every dtype, and headers that promise what the file cannot hold."""

import io
import struct
import zipfile

import numpy as np
import pytest
from cloud_files import assert_same

from gpu3d.io import Cloud, read_cloud, write_cloud

RNG = np.random.default_rng(0)
POINTS = RNG.normal(0, 30, (5, 3))
POINTS[1] = np.nan, np.inf, -0.0
DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
ATTRIBUTES = {f"a_{dtype.strip('?') or 'bool'}": RNG.integers(0, 2**7, 5).astype(dtype) for dtype in DTYPES} | {
    "intensity": RNG.random(5, np.float32),
    "colors": RNG.integers(0, 256, (5, 3)).astype(np.uint8),
    "normals": RNG.random((5, 3)),
    "features": RNG.random((5, 16), np.float32),
    "file": np.arange(5),  # an argument of np.savez has this name
}


def error_of(path):
    with pytest.raises(ValueError, match="cannot read") as caught:
        read_cloud(path)
    return str(caught.value)


# ---- round trips


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_npz(tmp_path, dtype, count):
    cloud = Cloud(POINTS[:count].astype(dtype), {name: values[:count] for name, values in ATTRIBUTES.items()})
    write_cloud(tmp_path / "a.npz", cloud)
    assert_same(read_cloud(tmp_path / "a.npz"), cloud)
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays) == sorted(["points", *ATTRIBUTES])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npy(tmp_path, dtype):
    points = POINTS.astype(dtype)
    for cloud in (Cloud(points), Cloud(points, {"intensity": np.arange(5, dtype=dtype)}), Cloud(points[:0])):
        write_cloud(tmp_path / "a.npy", cloud)
        assert_same(read_cloud(tmp_path / "a.npy"), cloud)


@pytest.mark.parametrize("count", [3, 5])
def test_meta(tmp_path, count):
    meta = {"scale": np.full(3, 0.001), "offset": [1, 2, 3], "crs": 'GEOGCS["Zürich"]', "viewpoint": np.arange(7.0)}
    write_cloud(tmp_path / "a.npz", Cloud(POINTS[:count], {}, meta | {"format": ".las", "other": object()}))
    cloud = read_cloud(tmp_path / "a.npz")
    assert not cloud.attributes and sorted(cloud.meta) == sorted(["format", *meta])
    for name, value in meta.items():
        np.testing.assert_array_equal(cloud.meta[name], value)
    assert type(cloud.meta["crs"]) is str and cloud.meta["format"] == ".npz"


@pytest.mark.parametrize(
    ("name", "cloud", "message"),
    [
        ("a.npy", Cloud(POINTS, {"intensity": np.ones(5, np.float32)}), r"not the attribute intensity, float32 \[5\]"),
        ("a.npy", Cloud(POINTS, {"label": np.ones(5)}), "not the attribute label"),
        ("a.npy", Cloud(POINTS, {"intensity": np.ones((5, 1))}), "not the attribute intensity"),
        ("a.npz", Cloud(POINTS, {"points": np.ones(5)}), "cannot be called points"),
        ("a.npz", Cloud(POINTS, {"scale": np.ones(5)}, {"scale": np.ones(3)}), "cannot be called scale"),
        ("a.npz", Cloud(POINTS[:3], {"scale": np.ones(3)}), "cannot be called scale"),
        ("a.npz", Cloud(POINTS, {}, {"offset": "here"}), "meta offset must be 3 numbers"),
        ("a.npz", Cloud(POINTS, {}, {"crs": 4326}), "meta crs must be text"),
    ],
)
def test_what_arrays_cannot_hold(tmp_path, name, cloud, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / name, cloud)
    assert not list(tmp_path.iterdir())


# ---- files of others


def test_columns_of_npy(tmp_path):
    rows = RNG.random((7, 6)).astype(">f4")
    np.save(tmp_path / "a.npy", np.asfortranarray(rows))
    columns = {f"column_{i}": rows[:, i].astype(np.float32) for i in (3, 4, 5)}
    assert_same(read_cloud(tmp_path / "a.npy"), Cloud(rows[:, :3].astype(np.float32), columns))
    np.save(tmp_path / "a.npy", rows[:, :4].astype(np.float16))
    cloud = read_cloud(tmp_path / "a.npy")
    assert cloud.points.dtype == np.float32 and cloud.attributes["intensity"].dtype == np.float16


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_npz(tmp_path, save):
    millimetres = RNG.integers(-9999, 9999, (3, 7)).astype(np.int32)
    save(
        tmp_path / "a.npz",
        xyz_mm=millimetres,
        remission=np.arange(7, dtype=">u2"),
        Classification=np.arange(7),
        scale=np.ones((7, 3)),  # one for each point, as of Gaussians
        pose=np.eye(4),
        names=np.array(list("abcdefg")),
        wave=np.ones(7, complex),
    )
    expected = {"intensity": np.arange(7, dtype=np.uint16), "label": np.arange(7), "scale": np.ones((7, 3))}
    cloud = read_cloud(tmp_path / "a.npz")
    assert_same(cloud, Cloud((millimetres.T / 1000).astype(np.float32), expected))
    assert cloud.attributes["intensity"].dtype.isnative


def test_xyz_in_rows_or_columns(tmp_path):
    for stored in (POINTS, POINTS.T):
        np.savez(tmp_path / "a.npz", xyz=stored, label=np.arange(5))
        assert_same(read_cloud(tmp_path / "a.npz"), Cloud(POINTS, {"label": np.arange(5)}))


# ---- broken files


def npy(shape, descr="<f4", data=b"", version=1, length=None):
    """A .npy with any header."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


HOSTILE = {
    "count": npy("(1000000000000, 3)"),
    "count of any size": npy(f"({10**40}, 3)"),
    "negative": npy("(-4, -3)", data=bytes(48)),
    "columns of no rows": npy("(0, 1000000000000)"),
    "rows of nothing": npy("(1000000000000, 0)"),
    "item": npy("(0, 3)", descr="|V2147483647"),
    "text": npy("(1, 3)", descr="<U500000000"),
    "objects": npy("(1, 3)", descr="|O", data=bytes(24)),
    "one short": npy("(2, 3)", data=bytes(23)),
    "length of the header": npy("(2, 3)", data=bytes(24), version=2, length=2**32 - 1),
    "version": npy("(2, 3)", data=bytes(24), version=9),
    "deep": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9900) + b"-" * 9899 + b"1",
    "dots": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9900) + b"[" * 9900,
    "empty": b"",
    "one byte": b"\x93",
    "noise": RNG.bytes(4000),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("key", ["points", "label"])
def test_hostile_headers(tmp_path, what, key):
    (tmp_path / "a.npy").write_bytes(HOSTILE[what])
    error_of(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        if key == "label":
            archive.writestr("points.npy", npy("(2, 3)", data=bytes(24)))
        archive.writestr(f"{key}.npy", HOSTILE[what])
    if what in ("objects", "item") and key == "label":
        assert not read_cloud(tmp_path / "a.npz").attributes  # no numbers, so not loaded
    else:
        error_of(tmp_path / "a.npz")


def test_messages(tmp_path):
    (tmp_path / "a.npy").write_bytes(HOSTILE["one short"])
    assert "truncated: an array float32 [2, 3] needs " in error_of(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(HOSTILE["count"])
    assert "an array float32 [1000000000000, 3] cannot be in " in error_of(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(HOSTILE["objects"])
    assert "Python objects, which are not loaded (allow_pickle=False)" in error_of(tmp_path / "a.npy")


def archive_of(*members, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return bytearray(stream.getvalue())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name(tmp_path):
    points = "points.npy", npy("(2, 3)", data=bytes(24))
    (tmp_path / "a.npz").write_bytes(archive_of(points, points))
    assert "it has two arrays points" in error_of(tmp_path / "a.npz")


def test_sizes_of_members(tmp_path):
    intact = archive_of(("points.npy", npy("(2, 3)", data=bytes(24))))
    entry = intact.rindex(b"PK\x01\x02")
    for offset, value, message in (
        (24, 2**31, " cannot be 2147483648 decompressed"),
        (24, 2000, "needs .* bytes, it has 2000"),
        (20, 2**31, "its members are together larger than the file"),
    ):
        data = intact.copy()
        struct.pack_into("<I", data, entry + offset, value)
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_cloud(tmp_path / "a.npz")


def test_other_compression(tmp_path):
    data = archive_of(("points.npy", npy("(2, 3)", data=bytes(24))), method=zipfile.ZIP_BZIP2)
    (tmp_path / "a.npz").write_bytes(data)
    assert "array points is compressed by a method other than deflate" in error_of(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_truncated(tmp_path, name):
    path = tmp_path / name
    write_cloud(path, Cloud(POINTS) if name == "a.npy" else Cloud(POINTS, ATTRIBUTES))
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        error_of(path)
