# SPDX-License-Identifier: Apache-2.0
"""gpu3d.io of .xyz, .txt and .csv: round trips, the dialects of other programs, and broken lines."""

import numpy as np
import pytest
from cloud_files import assert_same

from gpu3d.io import Cloud, read_cloud, write_cloud

RNG = np.random.default_rng(0)
# The last but one rounds twice if its shortest text is read as float64; 0.1 and 1/3 have no short binary form.
VALUES = [0.1, 1 / 3, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4028235e38, 7.038531e-26, 16777216.0]
ROUNDED_TWICE = np.array([0x15AE43FD, 0x95AE43FD], np.uint32).view(np.float32)
LIMITS = {
    dtype: np.resize(np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, 0], dtype), 10)
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
}
ATTRIBUTES = {
    "intensity": np.array([*VALUES[:8], *ROUNDED_TWICE], np.float32),
    "time": RNG.normal(1e9, 1, 10),
    "half": np.array(VALUES[:7] + [1, 2, 3]).astype(np.float16),
    "flag": np.arange(10) % 2 == 0,
    "colors": RNG.integers(0, 256, (10, 3)).astype(np.uint8),
    "normals": RNG.random((10, 3), np.float32),
    **{f"a_{dtype}": values for dtype, values in LIMITS.items()},
}
ENDINGS = [".xyz", ".txt", ".csv"]


@pytest.fixture
def parse(tmp_path):
    def parsed(text, ending=".xyz"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_cloud(path)

    return parsed


# ---- round trips


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 10])
def test_round_trip(tmp_path, ending, dtype, count):
    points = np.column_stack([VALUES, VALUES[::-1], RNG.normal(0, 1e7, 10)]).astype(dtype)[:count]
    cloud = Cloud(points, {name: values[:count] for name, values in ATTRIBUTES.items()})
    write_cloud(tmp_path / f"a{ending}", cloud)
    assert_same(read_cloud(tmp_path / f"a{ending}"), cloud)


def test_many_lines(tmp_path):
    cloud = Cloud(RNG.normal(0, 30, (250_001, 3)).astype(np.float32), {"label": RNG.integers(0, 9, 250_001)})
    write_cloud(tmp_path / "a.xyz", cloud)
    assert_same(read_cloud(tmp_path / "a.xyz"), cloud)


def test_what_is_written(tmp_path):
    cloud = Cloud(np.array([[0.1, -2, 3e20]], np.float32), {"label": np.array([7], np.uint8)})
    for ending, text in (
        (".xyz", "# x y z label\n# dtypes: float32 float32 float32 uint8\n0.1 -2.0 3e+20 7\n"),
        (".csv", "x,y,z,label\n# dtypes: float32 float32 float32 uint8\n0.1,-2.0,3e+20,7\n"),
    ):
        write_cloud(tmp_path / f"a{ending}", cloud)
        assert (tmp_path / f"a{ending}").read_text() == text
    table = np.loadtxt(tmp_path / "a.csv", np.float32, delimiter=",", skiprows=1)
    np.testing.assert_array_equal(table[:3], cloud.points[0])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"a b": np.ones(2)}, "'a b' has a separator or a quote"),
        ({"a,b": np.ones(2)}, "'a,b' has a separator or a quote"),
        ({"features": np.ones((2, 5))}, r"attribute features has shape \[2, 5\]"),
        ({"long": np.ones(2, np.longdouble)}, "text does not hold attribute long"),
    ],
)
def test_what_text_cannot_hold(tmp_path, attributes, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / "a.csv", Cloud(np.ones((2, 3)), attributes))
    assert not list(tmp_path.iterdir())


# ---- files of others

COLORS = np.array([[255, 0, 7], [1, 2, 3]], np.uint8)
POINTS = np.array([[1.5, 2, 3], [-4, 5e3, 6]])


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("1.5 2 3\n-4 5e3 6", {}),
        ("1.5,2,3\r\n-4,5e3,6\r\n", {}),
        ("1.5\t2\t3\r-4\t5e3\t6", {}),
        ("  1.5;  2;3;\n\n-4 ;5e3;6;\n\n", {}),
        ("# a scan\n1.5 2 3\n// between\n  # and\n-4 5e3 6\n#", {}),
        ("2\n1.5 2 3\n-4 5e3 6\n", {}),
        ("# of x y z\n# x y z points in metres\n1.5 2 3\n-4 5e3 6\n", {}),
        ("1.5 2 3 9\n-4 5e3 6 8\n", {"intensity": np.array([9, 8])}),
        ("1.5 2 3 0.5\n-4 5e3 6 8\n", {"intensity": np.array([0.5, 8])}),
        ("1.5 2 3 255 0 7\n-4 5e3 6 1 2 3\n", {"colors": COLORS}),
        ("1.5 2 3 256 0 7\n-4 5e3 6 1 2 3\n", {"normals": np.array([[256.0, 0, 7], [1, 2, 3]])}),
        ("1.5 2 3 -99 255 0 7\n-4 5e3 6 4 1 2 3\n", {"intensity": np.array([-99, 4]), "colors": COLORS}),
        ("1.5 2 3 1 2 3 0.5\n-4 5e3 6 1 2 3 0.5", {f"column_{i}": np.full(2, i - 2) for i in (3, 4, 5)}
         | {"column_6": np.full(2, 0.5)}),
        ("1.5 2 3 1 2\n-4 5e3 6 1 2", {"column_3": np.array([1, 1]), "column_4": np.array([2, 2])}),
        ("//X Y Z R G B Intensity\n2\n1.5 2 3 255 0 7 9\n-4 5e3 6 1 2 3 8", {
            "colors": COLORS, "intensity": np.array([9, 8])}),
        ('"Z","X","Y","Classification"\n3,1.5,2,4\n6,-4,5e3,5', {"label": np.array([4, 5])}),
        ("\ufeffx;y;z;Nx;ny;NZ\n1.5;2;3;0;0;1\n-4;5e3;6;0;0;1", {"normals": np.array([[0.0, 0, 1]] * 2)}),
        ("x y z red green blue\n1.5 2 3 0.5 0 1\n-4 5e3 6 0 0 1", {"colors": np.array([[0.5, 0, 1], [0, 0, 1]])}),
        ("x y z t id\n1.5 2 3 1532402927647951001 18446744073709551615\n-4 5e3 6 1532402927647951002 5",
         {"time": np.array([1532402927647951001, 1532402927647951002]), "id": np.array([2**64 - 1, 5], np.uint64)}),
        ("x y z t\n1.5 2 3 1e18\n-4 5e3 6 1e300", {"time": np.array([1e18, 1e300])}),
        ("# dtypes: float32 of course\n1.5 2 3\n-4 5e3 6", {}),
        ("# dtypes: uint8 uint8\n1.5 2 3\n-4 5e3 6", {}),
    ],
)  # fmt: skip
def test_dialects(parse, text, attributes):
    for ending in ENDINGS:
        assert_same(parse(text, ending), Cloud(POINTS, attributes))


@pytest.mark.parametrize("text", ["x y z label\n", "# x y z label"])
def test_names_without_points(parse, text):
    cloud = parse(text)
    assert len(cloud) == 0 and list(cloud.attributes) == ["label"]


# ---- broken files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 holds 0 values, expected 3 to 1000"),
        ("1", "line 2 holds 0 values"),
        ("1 2\n", "line 1 holds 2 values"),
        ("1 " * 1001, "line 1 holds 1001 values"),
        ("# c\n\n1 2 3\n4 5 6\n4 5\n", "line 5 holds 2 values, expected 3"),
        ("x y z\n1 2 3\n// c\n4 5 six\n", "line 4 holds what is no number: '4 5 six'"),
        ("1 2 3\n1 0x10 3\n", "line 2 holds what is no number"),
        ("1 2 3\n1-2 3 4\n", "line 2 holds what is no number"),
        ("1 2 3\n1 2\x003 4\n", "line 2 holds what is no number"),
        ("1 2 3 # good\n", "line 1 is neither numbers nor names"),
        ("1,2,3\n1,,3\n", "line 2 has an empty field"),
        ("1,5;2,5;3,5\n", "write decimal points"),
        ("a b c\n1 2 3\n", "line 1 is neither numbers nor names with x, y and z: 'a b c'"),
        ("x y z a\n1 2 3\n", "line 2 holds 3 values, expected the 4 of x y z a"),
        ("x y z X\n1 2 3 4\n", "two columns have one name: x y z x"),
        ("3\n1 2 3\n4 5 6\n", "truncated: the header promises 3 points, the file holds 2"),
        ("9" * 5000 + "\n1 2 3\n", "Exceeds the limit|truncated"),
        ("# dtypes: float32 float32 uint8\n1 2 300\n", "300"),
        ("# dtypes: float32 float32 uint8\n1 2 0.5\n", "0.5"),
    ],
)
def test_messages(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("ending", ENDINGS)
def test_noise(parse, ending):
    for data in (b"\xff", b"\x00", RNG.bytes(4000), bytes(4000), "1 2 3\n".encode("utf-16")):
        with pytest.raises(ValueError, match="cannot read"):
            parse(data, ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated(tmp_path, parse, ending):
    path = tmp_path / f"whole{ending}"
    write_cloud(path, Cloud(RNG.normal(0, 30, (10, 3)), ATTRIBUTES))
    data = path.read_bytes()
    names = data.index(b"\n# dtypes")
    for size in range(0, len(data), 7):
        try:
            cloud = parse(data[:size], ending)
        except ValueError:
            continue
        assert len(cloud) == max(0, data[:size].rstrip(b"\n").count(b"\n") - 1) and size >= min(names, 5)
