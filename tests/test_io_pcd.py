# SPDX-License-Identifier: Apache-2.0
""".pcd: encodings, headers as others write them, round trips, headers that promise too much, and a real file."""

import re
import struct
import sys

import numpy as np
import pytest
from cloud_files import error_of_bytes

from gpu3d.io import Cloud, read_cloud, read_points, write_cloud

lzf = pytest.importorskip("lzf")

# Columns, signs and magnitudes differ, so that a swapped axis or a lost row shows.
POINTS = np.array([[1.5, -2.25, 3.125], [80.0, 2.0**-10, -1.75], [np.nan, 4.0, 5.0], [-0.0, 7.5, np.inf]], np.float32)
COLORS = np.array([[255, 0, 7], [1, 2, 3], [4, 5, 6], [254, 128, 9]], np.uint8)
ALPHA = np.array([255, 0, 127, 1], np.uint8)
ENCODINGS = "ascii", "binary", "binary_compressed"
XYZ = [("x", POINTS[:, 0]), ("y", POINTS[:, 1]), ("z", POINTS[:, 2])]


def pcd(encoding, fields, **header):
    """The bytes of a file. A field is a name and its values, [N] or [N, k]; lines of the header can be given."""
    arrays = [values for _, values in fields]
    count = len(arrays[0])
    lines = {
        "# .PCD v0.7 - Point Cloud Data file format": "",
        "VERSION": "0.7",
        "FIELDS": " ".join(name for name, _ in fields),
        "SIZE": " ".join(str(values.itemsize) for values in arrays),
        "TYPE": " ".join(values.dtype.kind.upper() for values in arrays),
        "COUNT": " ".join(str(values[:1].size if values.ndim > 1 else 1) for values in arrays),
        "WIDTH": count,
        "HEIGHT": 1,
        "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": count,
        "DATA": encoding,
    }
    head = "".join(f"{key} {value}\n" for key, value in (lines | header).items() if value is not None).encode()
    if encoding == "ascii":
        rows = [" ".join(str(value) for values in arrays for value in values[i : i + 1].ravel()) for i in range(count)]
        return head + "".join(f"{row}\n" for row in rows).encode()
    if encoding == "binary":
        return head + b"".join(values[i : i + 1].tobytes() for i in range(count) for values in arrays)
    columns = b"".join(values.tobytes() for values in arrays)
    return head + packed(columns)


def packed(columns):
    """Compressed, or as LZF's runs of at most 32 bytes, each after its length less one."""
    data = (columns and lzf.compress(columns)) or b"".join(
        bytes([len(columns[i : i + 32]) - 1]) + columns[i : i + 32] for i in range(0, len(columns), 32)
    )
    return struct.pack("<II", len(data), len(columns)) + data


def read_bytes(tmp_path, data):
    path = tmp_path / "a.pcd"
    path.write_bytes(data)
    return read_cloud(path)


def error_of(tmp_path, data):
    return error_of_bytes(tmp_path / "a.pcd", data)


def assert_same(cloud, points, attributes=None):
    np.testing.assert_array_equal(cloud.points, points, strict=True)
    assert set(cloud.attributes) == set(attributes or {})
    for name, values in (attributes or {}).items():
        np.testing.assert_array_equal(cloud.attributes[name], values, strict=True)
    for values in (cloud.points, *cloud.attributes.values()):
        assert values.dtype.isnative and values.flags.c_contiguous and values.flags.writeable


def bits(colors, alpha):
    """The bytes blue, green, red and alpha as a uint32."""
    return np.column_stack([colors[:, ::-1], alpha]).view("<u4")[:, 0]


# ---- encodings and fields


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_points_alone(tmp_path, encoding, dtype, count):
    points = POINTS[:count].astype(dtype)
    cloud = read_bytes(tmp_path, pcd(encoding, [(name, values[:count].astype(dtype)) for name, values in XYZ]))
    assert_same(cloud, points)
    assert cloud.meta == {"format": ".pcd", "viewpoint": (0, 0, 0, 1, 0, 0, 0)}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fields_of_every_type_are_attributes(tmp_path, encoding):
    attributes = {f"of_{code}": np.array([1, 0, 3, np.iinfo(code).max], code) for code in ("i1", "i2", "i4", "i8")}
    attributes |= {f"of_{code}": np.array([1, 0, 3, np.iinfo(code).max], code) for code in ("u1", "u2", "u4", "u8")}
    attributes |= {"of_f8": np.array([0.1, np.nan, -np.inf, 1e300])}
    normals = [(f"normal_{axis}", values) for axis, values in zip("xyz", POINTS[::-1].T, strict=True)]
    seconds = np.arange(4, dtype=np.uint32)
    fields = [*attributes.items(), *normals, *reversed(XYZ), ("Timestamp", seconds)]
    cloud = read_bytes(tmp_path, pcd(encoding, [(name, np.ascontiguousarray(values)) for name, values in fields]))
    assert_same(cloud, POINTS, attributes | {"normals": POINTS[::-1], "time": seconds})


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["f4", "u4", "i4"])
def test_packed_colors(tmp_path, encoding, kind):
    alpha = ALPHA if kind != "f4" else np.zeros(4, np.uint8)  # floats with some alphas are NaN, which text cannot hold
    for name, attributes in (("rgb", {"colors": COLORS}), ("rgba", {"colors": COLORS, "alpha": alpha})):
        cloud = read_bytes(tmp_path, pcd(encoding, [*XYZ, (name, bits(COLORS, alpha).view(kind))]))
        assert_same(cloud, POINTS, attributes)


def test_colors_that_are_not_packed(tmp_path):
    values = np.arange(4, dtype=np.float64)
    assert_same(read_bytes(tmp_path, pcd("binary", [*XYZ, ("rgb", values)])), POINTS, {"rgb": values})
    both = [*XYZ, ("rgb", bits(COLORS, ALPHA)), ("rgba", bits(COLORS[::-1], ALPHA))]
    expected = {"colors": COLORS, "rgba": bits(COLORS[::-1], ALPHA)}
    assert_same(read_bytes(tmp_path, pcd("binary", both)), POINTS, expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fields_with_several_values_and_padding(tmp_path, encoding):
    histogram = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
    label = np.arange(4, dtype=np.uint16)
    pad = [("_", np.full((4, 5), 9, np.uint8)), ("_", np.full(4, 9, np.int16))]
    fields = [XYZ[0], pad[0], *XYZ[1:], ("histogram", histogram), pad[1], ("label", label)]
    fields += [("noise", np.zeros((4, 0), np.uint8)), ("_", np.zeros((4, 0), np.uint8))]  # COUNT 0
    assert_same(read_bytes(tmp_path, pcd(encoding, fields)), POINTS, {"histogram": histogram, "label": label})


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "header",
    [
        {"COUNT": None},
        {"POINTS": None},
        {"HEIGHT": None},
        {"VERSION": None, "VIEWPOINT": None, "COUNT": None, "POINTS": None},
        {"VERSION": ".5"},
    ],
    ids=str,
)
def test_lines_that_may_be_absent(tmp_path, encoding, header):
    assert_same(read_bytes(tmp_path, pcd(encoding, XYZ, **header)), POINTS)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line", ["# Büro", "# DATA ascii", "", "SOMETHING else", "COLUMNS x y z"])
def test_other_lines(tmp_path, encoding, line):
    data = pcd(encoding, XYZ, FIELDS=None if line.startswith("COLUMNS") else "x y z")
    for coding in ("utf-8", "latin-1"):
        assert_same(read_bytes(tmp_path, data.replace(b"SIZE", f"{line}\nSIZE".encode(coding), 1)), POINTS)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_crlf(tmp_path, encoding):
    head, data = re.fullmatch(rb"(.*DATA \w+\n)(.*)", pcd(encoding, XYZ), re.DOTALL).groups()
    assert_same(read_bytes(tmp_path, head.replace(b"\n", b"\r\n") + data), POINTS)


def test_text_with_spaces_and_no_last_newline(tmp_path):
    head = pcd("ascii", XYZ).partition(b"ascii\n")[0] + b"ascii\n"
    cloud = read_bytes(tmp_path, head + b"1.5 -2.25 3.125\r\n\n  80\t0.0009765625   -1.75 \nnan 4 5\n-0 7.5 inf")
    assert_same(cloud, POINTS)


def test_meta(tmp_path):
    data = pcd("binary", XYZ, WIDTH=2, HEIGHT=2, VIEWPOINT="1 2.5 -3e1 0 0 1 0")
    meta = {"format": ".pcd", "width": 2, "height": 2, "viewpoint": (1, 2.5, -30, 0, 0, 1, 0)}
    assert read_bytes(tmp_path, data).meta == meta
    assert read_bytes(tmp_path, pcd("binary", XYZ, VIEWPOINT=None)).meta == {"format": ".pcd"}


def test_only_compressed_files_need_lzf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzf", None)  # makes `import lzf` fail
    for encoding in ("ascii", "binary"):
        assert_same(read_bytes(tmp_path, pcd(encoding, XYZ)), POINTS)
    with pytest.raises(ImportError, match="needs lzf"):
        read_bytes(tmp_path, pcd("binary_compressed", XYZ))


def test_compression(tmp_path):
    points = np.zeros((100_000, 3), np.float32)
    points[::1000] = 1
    data = pcd("binary_compressed", [(axis, values.copy()) for axis, values in zip("xyz", points.T, strict=True)])
    assert len(data) < 50_000
    assert_same(read_bytes(tmp_path, data), points)


# ---- round trips


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_round_trip(tmp_path, dtype, count):
    attributes = {"colors": COLORS, "normals": POINTS[:, ::-1], "alpha": ALPHA}
    for code in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        attributes[f"of_{code}"] = np.array([np.iinfo(code).min, np.iinfo(code).max, 1, 2], code)
    attributes |= {"of_f4": POINTS[:, 0], "of_f8": np.arange(4) / 7, "features": np.arange(8).reshape(4, 2)}
    attributes = {name: values[:count] for name, values in attributes.items()}
    write_cloud(tmp_path / "a.pcd", Cloud(POINTS[:count].astype(dtype), attributes))
    assert_same(read_cloud(tmp_path / "a.pcd"), POINTS[:count].astype(dtype), attributes)


@pytest.mark.parametrize("values", [COLORS.astype(np.float32), COLORS.astype(np.uint16), COLORS[:, :2].copy(), ALPHA])
def test_round_trip_of_other_colors_and_normals(tmp_path, values):
    attributes = {"colors": values, "normals": values}
    write_cloud(tmp_path / "a.pcd", Cloud(POINTS, attributes))
    assert_same(read_cloud(tmp_path / "a.pcd"), POINTS, attributes)


def test_round_trip_of_meta(tmp_path):
    meta = {"width": 2, "height": 2, "viewpoint": (0.1, 2.5, -3e-7, 0.5, 0.5, 0.5, 0.5)}
    write_cloud(tmp_path / "a.pcd", Cloud(POINTS, {}, meta))
    assert read_cloud(tmp_path / "a.pcd").meta == {"format": ".pcd", **meta}
    write_cloud(tmp_path / "a.pcd", Cloud(POINTS[:3], {}, meta))  # with a point less there is no grid
    cloud = read_cloud(tmp_path / "a.pcd")
    assert len(cloud) == 3 and cloud.meta == {"format": ".pcd", "viewpoint": meta["viewpoint"]}
    with pytest.raises(ValueError, match="a viewpoint is seven numbers"):
        write_cloud(tmp_path / "a.pcd", Cloud(POINTS, {}, {"viewpoint": (1, 2, 3)}))


def test_header_as_written(tmp_path):
    attributes = {"colors": COLORS, "normals": POINTS, "ring": np.arange(4, dtype=">u2"), "f": np.zeros((4, 2), "i1")}
    write_cloud(tmp_path / "a.pcd", Cloud(POINTS, attributes))
    data = (tmp_path / "a.pcd").read_bytes()
    assert data.startswith(
        b"VERSION 0.7\nFIELDS x y z rgb normal_x normal_y normal_z ring f\nSIZE 4 4 4 4 4 4 4 2 1\n"
        b"TYPE F F F F F F F U I\nCOUNT 1 1 1 1 1 1 1 1 2\nWIDTH 4\nHEIGHT 1\nVIEWPOINT 0.0 0.0 0.0 1.0 0.0 0.0 0.0\n"
        b"POINTS 4\nDATA binary\n"
    )
    first = data.partition(b"binary\n")[2]
    assert first[12:16] == bytes([7, 0, 255, 0])  # blue, green, red


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pypcd4(tmp_path, encoding):
    pypcd4 = pytest.importorskip("pypcd4")
    labels = np.arange(4, dtype=np.uint32)
    types = [np.float32, np.float32, np.float32, np.uint32]
    cloud = pypcd4.PointCloud.from_points([*POINTS.T, labels], ("x", "y", "z", "label"), types)
    cloud.save(str(tmp_path / "b.pcd"), encoding=pypcd4.Encoding(encoding))
    assert_same(read_cloud(tmp_path / "b.pcd"), POINTS, {"label": labels})

    write_cloud(tmp_path / "a.pcd", Cloud(POINTS, {"label": labels, "normals": POINTS}))
    records = pypcd4.PointCloud.from_path(tmp_path / "a.pcd").pc_data
    np.testing.assert_array_equal(records["z"], POINTS[:, 2])
    np.testing.assert_array_equal(records["normal_y"], POINTS[:, 1])
    np.testing.assert_array_equal(records["label"], labels)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("valid", np.ones(4, bool), "attribute valid is bool, which .pcd cannot hold: convert it to uint8"),
        ("normals", np.ones((4, 3), np.float16), "attribute normals is float16, .* convert it to float32"),
        ("features", np.ones((4, 1), np.float32), "attribute features has shape"),
        ("features", np.ones((4, 0), np.float32), "attribute features has shape"),
        ("features", np.ones((4, 65537), np.int8), "attribute features has shape"),
        ("two words", np.ones(4, np.int8), "cannot be called 'two words'"),
        ("a\nDATA ascii", np.ones(4, np.int8), "an attribute cannot be called"),
        ("_", np.ones(4, np.int8), "cannot be called '_'"),
        ("rgb", np.ones(4, np.float32), "cannot be called 'rgb'"),
        ("y", np.ones(4, np.int8), "attribute y cannot be written as field y, which there is"),
    ],
)
def test_what_pcd_cannot_hold(tmp_path, name, values, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / "a.pcd", Cloud(POINTS, {name: values}))
    assert not list(tmp_path.iterdir())


def test_two_attributes_with_one_field(tmp_path):
    with pytest.raises(ValueError, match="attribute normals cannot be written as field normal_x"):
        write_cloud(tmp_path / "a.pcd", Cloud(POINTS, {"normal_x": POINTS[:, 0], "normals": POINTS}))


# ---- broken files

LABELLED = [*XYZ, ("label", np.full(4, 7, np.uint8))]
HOSTILE = [-1, 2**31 - 1, 2**32 - 1, 10**18, 10**30]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [0, *HOSTILE])
@pytest.mark.parametrize("key", ["WIDTH", "HEIGHT", "POINTS", "all"])
def test_numbers_of_points(tmp_path, encoding, key, count):
    if key != "all":
        error_of(tmp_path, pcd(encoding, LABELLED, **{key: count}))
        error_of(tmp_path, pcd(encoding, LABELLED, **{key: "", "VERSION": count}))
    elif count:
        error_of(tmp_path, pcd(encoding, LABELLED, WIDTH=count, POINTS=count))
        error_of(tmp_path, pcd(encoding, LABELLED, WIDTH=count, POINTS=None))
        error_of(tmp_path, pcd(encoding, LABELLED, WIDTH=count, HEIGHT=count, POINTS=None))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("count", [0, 65536, 65537, *HOSTILE])
@pytest.mark.parametrize("key", ["COUNT", "SIZE"])
def test_numbers_of_fields(tmp_path, encoding, key, count):
    for place in range(4):
        words = ["4", "4", "4", "1"] if key == "SIZE" else ["1"] * 4
        words[place] = str(count)
        if (key, count, place) == ("COUNT", 0, 3) and encoding == "binary":
            continue  # points of 12 bytes, with some bytes left at the end
        error_of(tmp_path, pcd(encoding, LABELLED, **{key: " ".join(words)}))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_very_many_fields(tmp_path, encoding):
    names = [f"f{i}" for i in range(100_000)]
    ones = " ".join("1" for _ in names)
    header = {"FIELDS": " ".join(names), "SIZE": None, "TYPE": None, "COUNT": None}
    assert "100000 FIELDS, and must have 1 to 1000" in error_of(tmp_path, pcd(encoding, XYZ, **header))
    header = {"FIELDS": "x y z", "SIZE": ones, "TYPE": "F F F", "COUNT": "1 1 1"}
    assert "3 FIELDS, and 100000 values of SIZE" in error_of(tmp_path, pcd(encoding, XYZ, **header))
    names = " ".join(["x y z", *("_" for _ in range(997))])
    header = {"FIELDS": names, "SIZE": "4 " * 1000, "TYPE": "F " * 1000, "COUNT": "65536 " * 1000}
    error_of(tmp_path, pcd(encoding, XYZ, **header))


@pytest.mark.parametrize(("place", "name"), [(0, "compressed"), (4, "uncompressed")])
@pytest.mark.parametrize("count", [0, 1, 51, 53, 2**31 - 1, 2**32 - 1])
def test_sizes_of_compressed_data(tmp_path, place, name, count):
    data = bytearray(pcd("binary_compressed", LABELLED))
    start = data.index(b"compressed\n") + 11 + place
    assert struct.unpack("<I", data[start : start + 4]) == ((54,) if place == 0 else (52,))
    data[start : start + 4] = struct.pack("<I", count)
    error_of(tmp_path, bytes(data))


def test_a_bomb(tmp_path):
    # 100 million points in 8 bytes of data. LZF makes 88 bytes of one at most.
    fields = pcd("binary", XYZ, WIDTH=10**8, POINTS=10**8, DATA="binary_compressed").partition(b"compressed\n")
    for size in (1_200_000_000, 1_200_000_000 & 0xFFFF):
        error_of(tmp_path, fields[0] + fields[1] + struct.pack("<II", 8, size) + b"\xff" * 8)
    # The most that three bytes can hold is read: a byte, and a copy of 264.
    fields = [(axis, np.full(265, 0x61, np.uint8)) for axis in "xyz"]
    data = pcd("binary", fields, DATA="binary_compressed").partition(b"compressed\n")
    tightest = b"\x00a" + b"\xe0\xff\x00" * 3 + b"\x01aa"
    cloud = read_bytes(tmp_path, data[0] + data[1] + struct.pack("<II", len(tightest), 795) + tightest)
    assert (cloud.points == 0x61).all() and len(cloud) == 265


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_truncated_anywhere(tmp_path, encoding):
    data = pcd(encoding, LABELLED)
    end = len(data) - (2 if encoding == "ascii" else 1)  # text may lack its last newline
    for size in [*range(0, end, 7), end]:
        error_of(tmp_path, data[:size])


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_that_ends_between_two_points(tmp_path, encoding):
    data = pcd(encoding, LABELLED)
    data = data[:-13] if encoding == "binary" else data[: data.rindex(b"\n", 0, -1) + 1]
    assert "truncated: the header promises 4 points, the file holds 3" in error_of(tmp_path, data)


def test_text_with_more_points_or_values(tmp_path):
    data = pcd("ascii", LABELLED)
    message = error_of(tmp_path, data + b"1 2 3 4\n")
    assert message.endswith("a.pcd: the header promises 4 points, the file holds 5")
    for line in (b"1 2 3 4 5\n", b"1 2 3\n", b"1 2 3 300\n", b"1 2 3 4.5\n", b"1 2 3 four\n", b"1,2,3,4\n", b"\xff\n"):
        error_of(tmp_path, data + line)


def test_noise(tmp_path):
    noise = np.random.default_rng(0).bytes(4000)
    for data in (b"", b"V", b"DATA ascii\n", noise, b"VERSION 0.7\n" + noise, noise + b"\nDATA binary\n" + noise):
        error_of(tmp_path, data)
    for encoding in ("ascii", "binary_compressed"):
        head = pcd("binary", LABELLED, DATA=encoding).partition(b"DATA")[0]
        error_of(tmp_path, head + f"DATA {encoding}\n".encode() + noise)
    # Random codes of LZF that claim to be of the right size.
    for i in range(300):
        error_of(tmp_path, head + b"DATA binary_compressed\n" + struct.pack("<II", 40, 52) + noise[i : i + 40])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"FIELDS": None}, "the header has 0 FIELDS"),
        ({"FIELDS": "x y z"}, "the header has 3 FIELDS, and 4 values of SIZE"),
        ({"FIELDS": "x y z z"}, "the header has two fields z"),
        ({"FIELDS": "x y height label"}, "expected fields x, y and z, found x, y, height, label"),
        ({"SIZE": None}, "the header has 4 FIELDS, and 0 values of SIZE"),
        ({"TYPE": "F F F"}, "the header has 4 FIELDS, and 3 values of TYPE"),
        ({"COUNT": "1"}, "the header has 4 FIELDS, and 1 values of COUNT"),
        ({"TYPE": "F F F F"}, "field label has TYPE F and SIZE 1"),
        ({"TYPE": "F F F X"}, "field label has TYPE X and SIZE 1"),
        ({"COUNT": "1 1 1 one"}, "invalid literal"),
        ({"COUNT": "0 0 0 0"}, "no field has a COUNT above 0"),
        ({"WIDTH": None}, "the header must have one number WIDTH"),
        ({"WIDTH": 3}, "the header has 4 POINTS, and WIDTH 3 times HEIGHT 1"),
        ({"WIDTH": -2, "HEIGHT": -2}, "the header must have one number WIDTH, of at least 0"),
        ({"VIEWPOINT": "0 0 0"}, "a viewpoint is seven numbers"),
        ({"VIEWPOINT": "a b c d e f g"}, "could not convert"),
        ({"DATA": "binary_packed"}, "DATA is binary_packed, and must be one of ascii, binary, binary_compressed"),
        ({"DATA": None}, "no line DATA in the first 1048576 bytes"),
        ({"VERSION": "1" * (1 << 20)}, "no line DATA in the first 1048576 bytes"),
    ],
)
def test_headers_that_are_none(tmp_path, header, message):
    assert message in error_of(tmp_path, pcd("binary", LABELLED, **header))


# ---- a real file


def test_real_file(data_dir):
    # 640 x 480 organised, in metres: 40 % of the pixels have no depth and are NaN.
    path = data_dir / "file_formats/pcl_mOSD_learn0.pcd"
    cloud = read_cloud(path)
    assert cloud.points.shape == (307_200, 3) and cloud.points.dtype == np.float32
    finite = cloud.points[np.isfinite(cloud.points).all(axis=1)]
    assert len(finite) == 182_292
    np.testing.assert_allclose(finite.min(axis=0), (-0.750, -0.206, 0.578), rtol=0, atol=0.00051)
    np.testing.assert_allclose(finite.max(axis=0), (0.633, 0.294, 1.301), rtol=0, atol=0.00051)
    assert {name: (values.dtype.str, values.shape[1:]) for name, values in cloud.attributes.items()} == {
        "label": ("<u4", ()),
        "colors": ("|u1", (3,)),
        "alpha": ("|u1", ()),
    }
    assert cloud.meta["width"] == 640 and cloud.meta["height"] == 480
    np.testing.assert_array_equal(read_points(path), cloud.points)
