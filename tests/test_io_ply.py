# SPDX-License-Identifier: Apache-2.0
""".ply: layouts, round trips, headers that promise too much, and a real file."""

import re
import sys
import time

import numpy as np
import pytest
from cloud_files import error_of_bytes

from gpu3d.io import Cloud, read_cloud, read_points, write_cloud

plyfile = pytest.importorskip("plyfile")

# Columns, signs and magnitudes differ, so that a swapped axis or a lost row shows.
POINTS = np.array([[1.5, -2.25, 3.125], [80.0, 2.0**-10, -1.75], [np.nan, 4.0, 5.0], [-0.0, 7.5, np.inf]], np.float32)
COLORS = np.array([[255, 0, 7], [1, 2, 3], [4, 5, 6], [254, 128, 9]], np.uint8)
LAYOUTS = "ascii", "binary_little_endian", "binary_big_endian"
XYZ = [("float", "x"), ("float", "y"), ("float", "z")]
CODES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"}
CODES |= {"double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
CODES |= {"float32": "f4", "float64": "f8"}


def ply(layout, *elements, extra=(), newline=b"\n"):
    """The bytes of a file. An element is a name, properties (types and a name) and rows; a list is a value of a row."""
    lines = [b"ply", b"format " + layout.encode() + b" 1.0", *extra]
    data = b""
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[layout]
    for name, properties, rows in elements:
        lines.append(f"element {name} {len(rows)}".encode())
        lines += [f"property {types} {name}".encode() for types, name in properties]
        for row in rows:
            words = []
            for (types, _), value in zip(properties, row, strict=True):
                if types.startswith("list"):
                    length, kind = types.split()[1:]
                    words += [(length, len(value)), *((kind, one) for one in value)]
                else:
                    words.append((types, value))
            if order:
                data += b"".join(np.array(value, order + CODES[kind]).tobytes() for kind, value in words)
            else:
                data += " ".join(str(value) for _, value in words).encode() + b"\n"
    return newline.join([*lines, b"end_header", b""]) + data


def read_bytes(tmp_path, data):
    path = tmp_path / "a.ply"
    path.write_bytes(data)
    return read_cloud(path)


def error_of(tmp_path, data):
    return error_of_bytes(tmp_path / "a.ply", data)


def assert_same(cloud, points, attributes=None):
    np.testing.assert_array_equal(cloud.points, points)
    assert cloud.points.dtype == points.dtype
    assert list(cloud.attributes) == list(attributes or {})
    for name, values in (attributes or {}).items():
        np.testing.assert_array_equal(cloud.attributes[name], values, strict=True)
    for values in (cloud.points, *cloud.attributes.values()):
        assert values.dtype.isnative and values.flags.c_contiguous and values.flags.writeable


# ---- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scalar", ["float", "float32", "double", "float64"])
def test_points_alone(tmp_path, layout, scalar):
    dtype = np.dtype(CODES[scalar])
    data = ply(layout, ("vertex", [(scalar, axis) for axis in "xyz"], POINTS.astype(dtype)))
    assert_same(read_bytes(tmp_path, data), POINTS.astype(dtype))


@pytest.mark.parametrize(("scalar", "dtype"), [("char", "f4"), ("ushort", "f4"), ("int", "f8"), ("uint32", "f8")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integer_points_keep_their_value(tmp_path, layout, scalar, dtype):
    points = np.array([[1, 2, 3], [np.iinfo(CODES[scalar]).max, 5, 6]])
    data = ply(layout, ("vertex", [(scalar, axis) for axis in "xyz"], points))
    assert_same(read_bytes(tmp_path, data), points.astype(dtype))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_properties_in_any_order_are_attributes(tmp_path, layout, count, newline):
    properties = [("uint8", "blue"), ("short", "Ring"), ("float", "z"), ("uchar", "red"), ("float", "y")]
    properties += [("double", "scalar_GPSTime"), ("uchar", "green"), ("float", "x"), ("ushort", "höhe")]
    times = np.arange(4) + 1e9 / 7
    rows = [
        (b, -300, z, r, y, t, g, x, 60000)
        for (x, y, z), (r, g, b), t in zip(POINTS.tolist(), COLORS.tolist(), times.tolist(), strict=True)
    ]
    cloud = read_bytes(tmp_path, ply(layout, ("vertex", properties, rows[:count]), newline=newline))
    expected = {
        "colors": COLORS[:count],
        "ring": np.full(count, -300, np.int16),
        "höhe": np.full(count, 60000, np.uint16),
        "time": times[:count],
    }
    assert_same(cloud, POINTS[:count], {name: expected[name] for name in cloud.attributes})
    assert cloud.attributes.keys() == expected.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_elements_and_lists_are_left_out(tmp_path, layout):
    faces = [("list uchar int", "vertex_indices"), ("uchar", "flag"), ("list ushort double", "weights")]
    face = ("face", faces, [([0, 1, 2], 9, [0.5]), ([2, 1, 0, 3, 3], 8, [1.5, 2.5])])
    camera = ("camera", [("float", "x"), ("int", "id")], [(1, 2), (3, 4)])
    cloud = read_bytes(tmp_path, ply(layout, camera, face, ("vertex", XYZ, POINTS), ("after", camera[1], [(5, 6)])))
    assert_same(cloud, POINTS)
    rows = [(row[0], [7] * (i + 1), row[1], row[2], i) for i, row in enumerate(POINTS.tolist())]
    properties = [XYZ[0], ("list uint short", "seen_by"), *XYZ[1:], ("uchar", "label")]
    cloud = read_bytes(tmp_path, ply(layout, face, ("vertex", properties, rows), camera))
    assert_same(cloud, POINTS, {"label": np.arange(4, dtype=np.uint8)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comments_may_hold_any_bytes(tmp_path, layout):
    comments = [
        *(
            f"{key} D:/données/Straße".encode(coding)
            for key in ("comment", "obj_info")
            for coding in ("utf8", "latin1")
        ),
        b"comment",
        b"comment " + bytes(set(range(256)) - {10}),
        b"comment end_header",
        b"",
    ]
    assert_same(read_bytes(tmp_path, ply(layout, ("vertex", XYZ, POINTS), extra=comments)), POINTS)


def test_files_of_plyfile(tmp_path):
    vertices = np.zeros(4, [("x", "f8"), ("y", "f8"), ("z", "f8"), ("nx", "f4"), ("ny", "f4"), ("nz", "f4")])
    vertices["x"], vertices["nz"] = POINTS[:, 0], POINTS[:, 2]
    faces = np.array([([0, 1, 2],), ([2, 1, 0],)], [("vertex_indices", "O")])
    elements = [plyfile.PlyElement.describe(faces, "face"), plyfile.PlyElement.describe(vertices, "vertex")]
    for layout in ({"text": True}, {"byte_order": "<"}, {"byte_order": ">"}):
        plyfile.PlyData(elements, **layout).write(str(tmp_path / "b.ply"))
        cloud = read_cloud(tmp_path / "b.ply")
        normals = np.stack([vertices["nx"], vertices["ny"], vertices["nz"]], axis=1)
        assert_same(cloud, np.stack([vertices["x"], vertices["y"], vertices["z"]], axis=1), {"normals": normals})


def test_only_text_and_lists_need_plyfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plyfile", None)  # makes `import plyfile` fail
    face = ("face", [("list uchar int", "vertex_indices")], [([0, 1, 2],)])
    assert_same(read_bytes(tmp_path, ply("binary_big_endian", face, ("vertex", XYZ, POINTS))), POINTS)
    with pytest.raises(ImportError, match="needs plyfile"):
        read_bytes(tmp_path, ply("ascii", ("vertex", XYZ, POINTS)))


# ---- round trips


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_round_trip(tmp_path, dtype, count):
    attributes = {"colors": COLORS, "normals": POINTS[:, ::-1].astype(np.float64)}
    for code in ("i1", "u1", "i2", "u2", "i4", "u4"):
        limits = np.iinfo(code)
        attributes[f"of_{code}"] = np.array([limits.min, limits.max, 1, 2], code)
    attributes |= {"of_f4": POINTS[:, 0], "of_f8": np.arange(4) / 7, "intensity": np.arange(4, dtype=np.uint16)}
    attributes = {name: values[:count] for name, values in attributes.items()}
    write_cloud(tmp_path / "a.ply", Cloud(POINTS[:count].astype(dtype), attributes))
    cloud = read_cloud(tmp_path / "a.ply")
    assert_same(cloud, POINTS[:count].astype(dtype), attributes)
    assert cloud.meta == {"format": ".ply"}


def test_round_trip_of_foreign_byte_order_and_names(tmp_path):
    attributes = {"höhe": np.arange(4, dtype=">i2"), "colors": COLORS.astype(">f4")}
    write_cloud(tmp_path / "a.ply", Cloud(POINTS, attributes))
    cloud = read_cloud(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert cloud.attributes["höhe"].tolist() == [0, 1, 2, 3] and cloud.attributes["höhe"].dtype == np.int16
    assert cloud.attributes["colors"].tolist() == COLORS.tolist() and cloud.attributes["colors"].dtype == np.float32


def test_plyfile_reads_what_is_written(tmp_path):
    write_cloud(tmp_path / "a.ply", Cloud(POINTS, {"colors": COLORS, "label": np.arange(4, dtype=np.uint32)}))
    vertices = plyfile.PlyData.read(str(tmp_path / "a.ply"))["vertex"].data
    assert vertices.dtype.names == ("x", "y", "z", "red", "green", "blue", "label")
    np.testing.assert_array_equal(vertices["z"], POINTS[:, 2])
    np.testing.assert_array_equal(vertices["green"], COLORS[:, 1])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("valid", np.ones(4, bool), "attribute valid is bool, which .ply cannot hold: convert it to uint8"),
        ("time", np.ones(4, np.int64), "attribute time is int64, .* convert it to int32 or float64"),
        ("time", np.ones(4, np.uint64), "attribute time is uint64, .* convert it to uint32 or float64"),
        ("normals", np.ones((4, 3), np.float16), "attribute normals is float16, .* convert it to float32"),
        ("two words", np.ones(4, np.int8), "attribute 'two words' has a space"),
        ("line\nend_header", np.ones(4, np.int8), "has a space in its name"),
        ("features", np.ones((4, 2), np.float32), "attribute features has shape"),
        ("x", np.ones(4, np.float32), "an attribute cannot be called x"),
    ],
)
def test_what_ply_cannot_hold(tmp_path, name, values, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / "a.ply", Cloud(POINTS, {name: values}))
    assert not list(tmp_path.iterdir())


# ---- broken files

FACE = ("face", [("list uchar int", "vertex_indices")], [([0, 1, 2],), ([2, 1, 0],)])
VERTEX = ("vertex", [*XYZ, ("uchar", "label")], [(*row, 7) for row in POINTS.tolist()])


@pytest.mark.parametrize("count", [-1, 100, 2**31 - 1, 2**32 - 1, 10**18, 10**30])
@pytest.mark.parametrize("element", ["vertex", "face", "node"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_that_the_file_does_not_hold(tmp_path, layout, element, count):
    node = ("node", [("double", "value")], [(0.5,), (1.5,)])
    for elements in ([node, FACE, VERTEX], [VERTEX, node, FACE]):
        data = ply(layout, *elements)
        data = re.sub(rb"element %s \d+" % element.encode(), b"element %s %d" % (element.encode(), count), data)
        error_of(tmp_path, data)


def test_vertices_of_count_0(tmp_path):
    data = ply("binary_little_endian", VERTEX).replace(b"vertex 4", b"vertex 0")
    assert len(read_bytes(tmp_path, data)) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elements", [[VERTEX], [FACE, VERTEX]], ids=["vertex", "face"])
def test_truncated_anywhere(tmp_path, layout, elements):
    data = ply(layout, *elements, extra=[b"comment a"])
    end = len(data) - (2 if layout == "ascii" else 1)  # text may lack its last newline
    for size in range(0, end, 7):
        error_of(tmp_path, data[:size])
    error_of(tmp_path, data[:end])


def test_noise(tmp_path):
    noise = np.random.default_rng(0).bytes(4000)
    for data in (b"", b"p", b"ply", b"ply\n", noise, b"ply\n" + noise, b"ply\n" + noise + b"\nend_header\n" + noise):
        error_of(tmp_path, data)
    for layout in LAYOUTS:
        header = ply(layout, FACE, ("vertex", VERTEX[1], []))
        header = header[: header.index(b"end_header")].replace(b"vertex 0", b"vertex 200") + b"end_header\n"
        error_of(tmp_path, header + noise[:3000])


@pytest.mark.parametrize("length", ["char", "int"])
def test_lists_of_negative_length(tmp_path, length):
    face = ("face", [(f"list {length} int", "vertex_indices")], [([],)] * 3)
    data = bytearray(ply("binary_little_endian", face, VERTEX))
    start = data.index(b"end_header\n") + 11
    data[start : start + 4] = b"\xff" * 4
    assert "a list of -1 values" in error_of(tmp_path, bytes(data))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"format binary_little_endian 1.0\n", b"", "the header has no line format"),
        (b"binary_little_endian", b"binary", "this line of the header is none of .ply"),
        (b"1.0", b"2.0", "this line of the header is none of .ply"),
        (b"float x", b"half x", "this line of the header is none of .ply"),
        (b"float x", b"list float int x", "this line of the header is none of .ply"),
        (b"float x", b"float", "this line of the header is none of .ply"),
        (b"vertex 4", b"vertex four", "invalid literal"),
        (b"vertex 4", b"vertex", "this line of the header is none of .ply"),
        (b"element vertex 4\n", b"", "this line of the header is none of .ply"),
        (b"element vertex 4\n", b"element vertex 4\nelement vertex 4\n", "or repeats a name"),
        (b"element vertex 4\n", b"element face 4\nelement vertex 4\n", "element face has no properties"),
        (b"float x", b"float y", "or repeats a name"),
        (b"float x", b"float a", "expected fields x, y and z, found a, y, z, label"),
        (b"element vertex", b"element node", "no element vertex, found node"),
        (b"end_header\n", b"", "no line end_header in the first 1048576 bytes"),
        (b"end_header\n", b"comment " + b"a" * (1 << 20) + b"\nend_header\n", "no line end_header in the first"),
        (b"ply\n", b"obj\n", "the first line is not ply"),
    ],
)
def test_headers_that_are_none(tmp_path, old, new, message):
    data = ply("binary_little_endian", VERTEX)
    assert old in data
    assert message in error_of(tmp_path, data.replace(old, new, 1))


@pytest.mark.parametrize("line", [b"element e%d 0\n", b"comment %d\n", b"\n"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_header(tmp_path, layout, line):
    lines = b"".join(line % i if b"%" in line else line for i in range(40_000))
    data = ply(layout, VERTEX).replace(b"element vertex", lines + b"element vertex")
    start = time.perf_counter()
    assert len(read_bytes(tmp_path, data)) == 4
    assert time.perf_counter() - start < 2


# ---- a real file


def test_real_file(data_dir):
    # A kitchen of 3DMatch in metres. The bounds are those of the file, rounded to the digits here.
    points = read_points(data_dir / "file_formats/3dmatch_redkitchen_000.ply")
    assert points.shape == (258_342, 3) and points.dtype == np.float32
    np.testing.assert_allclose(points.min(axis=0), (-1.350, -1.446, 0.800), rtol=0, atol=0.00051)
    np.testing.assert_allclose(points.max(axis=0), (1.494, 0.690, 3.494), rtol=0, atol=0.00051)
    with np.load(data_dir / "indoor_3dmatch/redkitchen_000.npz") as arrays:
        np.testing.assert_allclose(points, arrays["xyz_mm"].T / 1000, rtol=0, atol=0.0005)
