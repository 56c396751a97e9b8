# SPDX-License-Identifier: Apache-2.0
"""gpu3d.io: round trips of every format, broken files, and the real files of the data folder."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from gpu3d.io import Cloud, cloud, files, read_cloud, read_points, write_cloud

# Columns, signs and magnitudes differ, so that a swapped axis or a lost row shows. Non-finite rows stay.
POINTS = np.array(
    [
        [1.5, -2.25, 3.125],
        [80.0, 2.0**-10, -1.75],
        [np.nan, 4.0, 5.0],
        [-0.0, 7.5, np.inf],
        [9.0, -10.5, 11.25],
    ],
    dtype=np.float32,
)
MAP_POINTS = np.array([[684766.39, 5017773.08, 0.01], [684993.29, 5018007.25, 29.97], [684800.0, 5017900.5, 12.34]])


def assert_same(points, expected, dtype):
    assert type(points) is np.ndarray
    assert points.dtype == dtype and points.dtype.isnative
    assert points.flags.c_contiguous and points.flags.writeable
    np.testing.assert_array_equal(points, expected)


def error_of(path, **options):
    """The text of the ValueError, which must name the file."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_points(path, **options)
    return str(caught.value)


def truncate(path, size):
    """Keep `size` bytes, or drop -size bytes from the end."""
    path.write_bytes(path.read_bytes()[:size])


# ---- .bin


@pytest.mark.parametrize(
    ("name", "written", "options"),
    [
        ("sweep.bin", 4, {}),
        ("SWEEP.BIN", 4, {}),
        ("sweep.pcd.bin", 5, {}),
        ("sweep.bin", 5, {"columns": 5}),
        ("sweep.pcd.bin", 4, {"columns": 4}),
        ("sweep.bin", 3, {"columns": 3}),
    ],
)
def test_bin(tmp_path, name, written, options):
    rows = np.full((len(POINTS), written), 77, dtype=np.float32)
    rows[:, :3] = POINTS
    rows.tofile(tmp_path / name)
    assert_same(read_points(tmp_path / name, **options), POINTS, np.float32)
    assert_same(read_points(str(tmp_path / name), **options), POINTS, np.float32)


def test_bin_without_points(tmp_path):
    (tmp_path / "empty.bin").touch()
    assert_same(read_points(tmp_path / "empty.bin"), np.empty((0, 3)), np.float32)


@pytest.mark.parametrize(("name", "columns"), [("sweep.bin", 4), ("sweep.pcd.bin", 5)])
def test_truncated_bin(tmp_path, name, columns):
    path = tmp_path / name
    np.ones((10, columns), dtype=np.float32).tofile(path)
    truncate(path, -4)
    message = error_of(path)
    size = 40 * columns - 4
    assert f"{size} bytes are no whole number of points of {columns} float32 values" in message
    assert "truncated, or pass the columns=" in message


def test_columns_must_hold_xyz(tmp_path):
    with pytest.raises(ValueError, match=r"columns must be at least 3 \(x, y, z\), got 2"):
        read_points(tmp_path / "sweep.bin", columns=2)


def test_columns_is_for_bin_only(tmp_path):
    assert "columns is for .bin files only, got columns=4" in error_of(tmp_path / "scan.npy", columns=4)


# ---- .npy, .npz


@pytest.mark.parametrize(
    ("stored", "returned"),
    [("<f2", np.float32), ("<f4", np.float32), (">f4", np.float32), ("<f8", np.float64), (">f8", np.float64)],
)
@pytest.mark.parametrize("columns", [3, 6])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path, stored, returned, columns, order):
    array = np.full((len(POINTS), columns), 77, dtype=stored, order=order)
    array[:, :3] = POINTS
    np.save(tmp_path / "scan.npy", array)
    assert_same(read_points(tmp_path / "scan.npy"), array[:, :3], returned)


@pytest.mark.parametrize(
    ("array", "described"),
    [
        (np.ones((4, 3), np.int16), "int16 [4, 3]"),
        (np.ones((4, 3), np.complex64), "complex64 [4, 3]"),
        (np.ones((4, 2), np.float32), "float32 [4, 2]"),
        (np.ones(12, np.float32), "float32 [12]"),
        (np.float32(1), "float32 []"),
        (np.ones((2, 4, 3), np.float32), "float32 [2, 4, 3]"),
    ],
)
def test_npy_of_another_kind(tmp_path, array, described):
    np.save(tmp_path / "scan.npy", array)
    assert f"the array must be floating-point [N, >=3], got {described}" in error_of(tmp_path / "scan.npy")


def test_pickles_are_not_loaded(tmp_path):
    objects = np.array([{}, [], ()], dtype=object)
    np.save(tmp_path / "scan.npy", objects)
    np.savez(tmp_path / "scan.npz", points=objects)
    for name in ("scan.npy", "scan.npz"):
        assert "allow_pickle=False" in error_of(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_keys_in_order(tmp_path, save):
    path = tmp_path / "scan.npz"
    wide = np.column_stack([POINTS, POINTS]).astype(np.float64)
    millimetres = np.array([[1, 2001, -3], [4, 5, 6000], [7, 8, 120_333], [1, 1, 1]], dtype=np.int32)

    save(path, xyz_mm=millimetres.T, xyz=POINTS.T, points=wide, label=np.arange(5))
    assert_same(read_points(path), POINTS, np.float64)
    save(path, xyz_mm=millimetres.T, xyz=POINTS.T)
    assert_same(read_points(path), POINTS, np.float32)
    save(path, xyz=POINTS)
    assert_same(read_points(path), POINTS, np.float32)
    save(path, xyz_mm=millimetres.T)
    assert_same(read_points(path), (millimetres / 1000).astype(np.float32), np.float32)
    save(path, xyz=POINTS[[0, 1, 4]])  # 3 x 3 is read as points in rows
    assert_same(read_points(path), POINTS[[0, 1, 4]], np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"xyz_f16": POINTS, "label": POINTS},
            "expected an array points, xyz or xyz_mm, found xyz_f16, label",
        ),
        ({}, "expected an array points, xyz or xyz_mm, found none at all"),
        ({"xyz": np.ones((9, 3), np.int16)}, "xyz must be floating-point [N, >=3], got int16 [9, 3]"),
        ({"points": np.ones((9, 2))}, "points must be floating-point [N, >=3], got float64 [9, 2]"),
        ({"xyz_mm": np.ones((9, 3), np.int32)}, "xyz_mm must be int32 [3, N], got int32 [9, 3]"),
        ({"xyz_mm": np.ones((3, 9), np.float32)}, "xyz_mm must be int32 [3, N], got float32 [3, 9]"),
    ],
)
def test_npz_without_coordinates(tmp_path, arrays, message):
    np.savez(tmp_path / "scan.npz", **arrays)
    assert message in error_of(tmp_path / "scan.npz")


# ---- .ply, .pcd, .las, .laz


def write_ply(path, points, *, text=False, byte_order="<"):
    plyfile = pytest.importorskip("plyfile")
    scalar = points.dtype.str[1:]
    vertex = np.empty(len(points), dtype=[("red", "u1"), ("x", scalar), ("y", scalar), ("z", scalar)])
    vertex["red"] = 200
    for i, axis in enumerate("xyz"):
        vertex[axis] = points[:, i]
    faces = np.array([([0, 1, 2],), ([2, 1, 0],)], dtype=[("vertex_indices", "O")])
    elements = [plyfile.PlyElement.describe(faces, "face"), plyfile.PlyElement.describe(vertex, "vertex")]
    plyfile.PlyData(elements, text=text, byte_order=byte_order).write(str(path))


@pytest.mark.parametrize("layout", [{"text": True}, {"byte_order": "<"}, {"byte_order": ">"}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ply(tmp_path, layout, dtype):
    points = np.concatenate([POINTS, MAP_POINTS]).astype(dtype)
    write_ply(tmp_path / "scan.ply", points, **layout)
    assert_same(read_points(tmp_path / "scan.ply"), points, dtype)


@pytest.mark.parametrize(("stored", "returned"), [("i2", np.float32), ("i4", np.float64)])
def test_ply_integers_keep_their_value(tmp_path, stored, returned):
    points = np.array([[1, -2, 3], [np.iinfo(stored).max, 5, 6]], dtype=stored)
    write_ply(tmp_path / "scan.ply", points)
    assert_same(read_points(tmp_path / "scan.ply"), points, returned)


def test_ply_without_vertices(tmp_path):
    plyfile = pytest.importorskip("plyfile")
    path = tmp_path / "scan.ply"
    nodes = plyfile.PlyElement.describe(np.ones(2, dtype=[("x", "f4"), ("y", "f4")]), "node")
    plyfile.PlyData([nodes]).write(str(path))
    assert "no element vertex, found node" in error_of(path)
    nodes = plyfile.PlyElement.describe(nodes.data, "vertex")
    plyfile.PlyData([nodes]).write(str(path))
    assert "expected fields x, y and z, found x, y" in error_of(path)


def write_pcd(path, points, encoding, fields=("label", "x", "y", "z")):
    pypcd4 = pytest.importorskip("pypcd4")
    columns = [np.arange(len(points), dtype=np.uint32), *points.T]
    cloud = pypcd4.PointCloud.from_points(columns, fields, [np.uint32] + [points.dtype.type] * 3)
    cloud.save(str(path), encoding=pypcd4.Encoding(encoding))


PCD_ENCODINGS = ["ascii", "binary", "binary_compressed"]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("encoding", PCD_ENCODINGS)
def test_pcd(tmp_path, encoding, dtype, count):
    points = POINTS[:count].astype(dtype)
    write_pcd(tmp_path / "scan.pcd", points, encoding)
    assert_same(read_points(tmp_path / "scan.pcd"), points, dtype)


def test_pcd_without_xyz(tmp_path):
    write_pcd(tmp_path / "scan.pcd", POINTS, "binary", fields=("label", "x", "y", "height"))
    assert "expected fields x, y and z, found label, x, y, height" in error_of(tmp_path / "scan.pcd")


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_pcd_that_ends_between_two_points(tmp_path, encoding):
    path = tmp_path / "scan.pcd"
    write_pcd(path, POINTS, encoding)
    last_row = path.read_bytes().splitlines(keepends=True)[-1]
    truncate(path, -16 if encoding == "binary" else -len(last_row))
    assert "truncated: the header promises 5 points, the file holds 4" in error_of(path)


def write_las(path, points, scale=0.01, intensity=0):
    laspy = pytest.importorskip("laspy")
    if path.suffix == ".laz":
        pytest.importorskip("lazrs")
    header = laspy.LasHeader(point_format=1, version="1.2")
    header.scales = np.full(3, scale)
    header.offsets = np.floor(points.min(axis=0))
    las = laspy.LasData(header)
    las.xyz = points
    las.intensity = np.broadcast_to(np.uint16(intensity), len(points))
    las.write(str(path))


@pytest.mark.parametrize("name", ["scan.las", "scan.laz"])
def test_las(tmp_path, name):
    write_las(tmp_path / name, MAP_POINTS)
    points = read_points(tmp_path / name)
    assert_same(points, points, np.float64)
    assert points.shape == MAP_POINTS.shape
    # The file stores exact hundredths. Scale and offset round once each, near 5e6: an error of two ulps.
    np.testing.assert_allclose(points, MAP_POINTS, rtol=0, atol=2 * np.spacing(5e6))


def test_las_that_ends_between_two_points(tmp_path):
    path = tmp_path / "scan.las"
    write_las(path, MAP_POINTS)
    truncate(path, -28)  # the size of a record of point format 1
    assert "truncated: the header promises 3 points" in error_of(path)


# ---- intensity

INTENSITY = np.array([3, 0, 200, 255, 17])


def write_with_intensity(path):
    """Five points with INTENSITY, in the dtype that the format has for it; return the dtype."""
    if path.suffix == ".bin":
        ring = [np.full(5, 99)] * path.name.endswith(".pcd.bin")
        np.column_stack([POINTS, INTENSITY, *ring]).astype("<f4").tofile(path)
        return np.float32
    if path.suffix == ".npy":
        np.save(path, np.column_stack([POINTS, INTENSITY]))
        return np.float64
    if path.suffix == ".npz":
        np.savez(path, points=POINTS, remission=INTENSITY.astype(np.uint8), label=np.zeros(5))
        return np.uint8
    if path.suffix == ".ply":
        plyfile = pytest.importorskip("plyfile")
        vertices = np.zeros(5, [("x", "f4"), ("y", "f4"), ("intensity", "u1"), ("z", "f4")])
        vertices["intensity"] = INTENSITY
        plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(str(path))
        return np.uint8
    if path.suffix == ".pcd":
        pypcd4 = pytest.importorskip("pypcd4")
        fields, dtypes = ("x", "y", "z", "intensity"), [np.float32] * 4
        pypcd4.PointCloud.from_points([*POINTS.T, INTENSITY.astype(np.float32)], fields, dtypes).save(str(path))
        return np.float32
    write_las(path, np.ones((5, 3)), intensity=INTENSITY)
    return np.uint16


@pytest.mark.parametrize("name", ["a.bin", "a.pcd.bin", "a.npy", "a.npz", "a.ply", "a.pcd", "a.las", "a.laz"])
def test_intensity(tmp_path, name):
    dtype = write_with_intensity(tmp_path / name)
    intensity = read_cloud(tmp_path / name).attributes["intensity"]
    assert intensity.dtype == dtype and intensity.tolist() == INTENSITY.tolist()
    assert len(read_points(tmp_path / name)) == 5


def test_files_without_intensity(tmp_path):
    POINTS.tofile(tmp_path / "sweep.bin")
    assert not read_cloud(tmp_path / "sweep.bin", columns=3).attributes
    np.save(tmp_path / "scan.npy", np.column_stack([POINTS, POINTS]))  # the fourth of six columns can be anything
    np.savez(tmp_path / "scan.npz", points=POINTS)
    for name in ("scan.npy", "scan.npz"):
        assert "intensity" not in read_cloud(tmp_path / name).attributes
    for name, write in (("scan.ply", write_ply), ("scan.pcd", lambda path, points: write_pcd(path, points, "binary"))):
        write(tmp_path / name, POINTS)
        assert "intensity" not in read_cloud(tmp_path / name).attributes


# ---- what goes wrong in any format


def write_any(path):
    finite = np.random.default_rng(0).uniform(-50, 50, (500, 3)).astype(np.float32)
    writers = {
        ".npy": lambda: np.save(path, finite),
        ".npz": lambda: np.savez_compressed(path, points=finite),
        ".ply": lambda: write_ply(path, finite),
        ".pcd": lambda: write_pcd(path, finite, "binary_compressed"),
        ".las": lambda: write_las(path, finite),
        ".laz": lambda: write_las(path, finite),
    }
    writers[path.suffix]()


SUFFIXES = [".npy", ".npz", ".ply", ".pcd", ".las", ".laz"]


@pytest.mark.parametrize("keep", ["nothing", "some", "half", "all but 4 bytes"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated(tmp_path, suffix, keep):
    path = tmp_path / f"scan{suffix}"
    write_any(path)
    assert len(read_points(path)) == 500
    truncate(path, {"nothing": 0, "some": 20, "half": path.stat().st_size // 2, "all but 4 bytes": -4}[keep])
    assert error_of(path).startswith("cannot read ")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_not_of_its_format(tmp_path, suffix):
    write_any(tmp_path / f"scan{suffix}")  # skips where the package is missing
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(np.random.default_rng(1).bytes(4000))
    assert error_of(path).startswith("cannot read ")


@pytest.mark.parametrize("error", [EOFError, type("PanicException", (BaseException,), {})])
def test_any_error_of_a_decoder_names_the_file(tmp_path, monkeypatch, error):
    """Bindings of other languages raise exceptions that are no Exception."""

    def fail(source):
        raise error

    monkeypatch.setattr("gpu3d.io.arrays.read", fail)
    (tmp_path / "scan.npy").touch()
    assert error_of(tmp_path / "scan.npy").endswith(f"scan.npy: {error.__name__}")


@pytest.mark.parametrize("name", ["scan.xyzw", "scan", "scan.bin.gz", "npy"])
def test_unknown_ending(tmp_path, name):
    message = error_of(tmp_path / name)
    assert "cannot tell the format of " in message
    assert "the endings read are .pcd.bin, .bin, .label, .npy, .npz" in message


@pytest.mark.parametrize("suffix", [".bin", *SUFFIXES])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        read_points(tmp_path / f"scan{suffix}")


@pytest.mark.parametrize(
    ("suffix", "package"), [(".ply", "plyfile"), (".pcd", "lzf"), (".las", "laspy"), (".laz", "lazrs")]
)
def test_missing_package(tmp_path, monkeypatch, suffix, package):
    path = tmp_path / f"scan{suffix}"
    if suffix == ".ply":
        write_ply(path, POINTS, text=True)  # binary vertices need no package
    elif suffix == ".pcd":
        write_pcd(path, np.zeros((500, 3), np.float32), "binary_compressed")  # and neither do other .pcd
    else:
        write_any(path)
    monkeypatch.setitem(sys.modules, package, None)  # makes `import package` fail
    with pytest.raises(ImportError, match=re.escape('pip install "gpu3d[io]"')):
        read_points(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")  # opening it would wait for a writer
    (tmp_path / "folder.ply").mkdir()
    (tmp_path / "link.npy").symlink_to("nowhere.npy")
    assert "a pipe or a device" in error_of(tmp_path / "pipe.bin")
    with pytest.raises(IsADirectoryError, match=r"folder\.ply is a folder: name the files in it"):
        read_points(tmp_path / "folder.ply")
    with pytest.raises(FileNotFoundError):
        read_points(tmp_path / "link.npy")


# ---- clouds and names


def test_names_are_there_after_import_gpu3d():
    code = """
import sys, gpu3d
assert not {"gpu3d.io", "gpu3d.plot", "gpu3d.flash3d", "matplotlib"} & set(sys.modules)
assert {"io", "plot", "interop", "batch", "flash3d", "Cloud", "read_cloud", "write_cloud"} <= set(dir(gpu3d))
assert gpu3d.Cloud is gpu3d.io.Cloud and gpu3d.read_cloud is gpu3d.io.read_cloud
assert gpu3d.plot.plot_buckets and gpu3d.interop.collate and gpu3d.batch.map_files and gpu3d.flash3d.Trainer
try:
    gpu3d.read_clouds
except AttributeError as error:
    assert str(error) == "module 'gpu3d' has no attribute 'read_clouds'"
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cloud_is_checked():
    points = np.zeros((3, 3), np.float32)
    for bad, error, message in [
        (lambda: Cloud([[0, 0, 0]]), TypeError, "NumPy array of float32 or float64, got list"),
        (lambda: Cloud(points.astype(np.float16)), TypeError, "got float16"),
        (lambda: Cloud(points[:, :2]), ValueError, r"shape \[N, 3\], got \[3, 2\]"),
        (lambda: Cloud(points, {"label": np.zeros(2)}), ValueError, r"label must have a row for each of the 3 points"),
        (lambda: Cloud(points, {"name": np.array(list("abc"))}), TypeError, "attribute name must be .* numbers"),
        (lambda: Cloud(points, {"": np.zeros(3)}), TypeError, "names of attributes must be strings"),
    ]:
        with pytest.raises(error, match=message):
            bad()


def test_names_are_the_same_in_every_format():
    fields = {name: np.zeros(2, np.uint8) for name in ("X", "y", "Z", "Red", "green", "blue", "Classification", "foo")}
    fields |= {
        "gps_time": np.zeros(2),
        "nx": np.zeros(2),
        "ny": np.zeros(2),
        "nz": np.zeros(2),
        "remission": np.ones(2),
    }
    found = cloud.attributes_of(fields)
    assert set(found) == {"colors", "normals", "label", "time", "intensity", "foo"}
    assert found["colors"].shape == (2, 3) and found["normals"].dtype == np.float64
    # A name that is taken stays as it is, and so do columns that do not fit each other.
    both = cloud.attributes_of(
        {"intensity": np.zeros(2), "reflectance": np.ones(2), "red": np.zeros(2), "green": np.ones(2)}
    )
    assert set(both) == {"intensity", "reflectance", "red", "green"}


def test_two_attributes_with_one_field_are_an_error():
    twice = Cloud(np.zeros((2, 3), np.float32), {"colors": np.zeros((2, 3), np.uint8), "red": np.zeros(2, np.uint8)})
    with pytest.raises(ValueError, match="colors and red"):
        cloud.fields_of(twice)


# ---- writing


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "scan.npz"
    path.write_bytes(b"precious")

    def fail(stream, cloud):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpu3d.io.arrays.write", fail)
    with pytest.raises(OSError, match="No space left"):
        write_cloud(path, POINTS)
    assert path.read_bytes() == b"precious" and [p.name for p in tmp_path.iterdir()] == ["scan.npz"]


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.scan.npz"):
        write_cloud(tmp_path / "absent" / "scan.npz", POINTS)
    with pytest.raises(ValueError, match="cannot tell the format of"):
        write_cloud(tmp_path / "scan.gif", POINTS)
    with pytest.raises(TypeError, match="points must be a NumPy array"):
        write_cloud(tmp_path / "scan.npz", POINTS.tolist())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_new_file_has_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try:
        write_cloud(tmp_path / "scan.npz", POINTS)
    finally:
        os.umask(before)
    assert (tmp_path / "scan.npz").stat().st_mode & 0o777 == 0o640


KEPT = [ending for ending in files.FORMATS if ending not in (".label", ".e57")]


@pytest.mark.parametrize("ending", KEPT)
def test_points_alone_in_every_format(tmp_path, ending):
    """What was written is read again; .las and .laz round to their scale."""
    points = np.random.default_rng(0).uniform(-50, 50, (40, 3)).astype(np.float32)
    try:
        write_cloud(tmp_path / f"scan{ending}", points)
    except ImportError as error:
        pytest.skip(str(error))
    again = read_cloud(tmp_path / f"scan{ending}")
    assert again.meta["format"] == ending
    np.testing.assert_allclose(again.points, points, rtol=0, atol=0.0006 if ending in (".las", ".laz") else 0)


# ---- real files


@pytest.mark.parametrize(
    ("name", "package", "dtype", "count", "finite_count", "low", "high"),
    [
        # HDL-64 and VLP-32 sweeps in metres. The bounds are those of the files, rounded to the digits here.
        ("file_formats/kitti_training_000005.bin", None, np.float32, 125_086, 125_086,
         (-79.800, -40.111, -2.760), (79.275, 22.436, 2.887)),
        ("lidar_raw/nuscenes_n015_1532402927647951.pcd.bin", None, np.float32, 34_688, 34_688,
         (-57.996, -96.290, -3.417), (96.853, 98.592, 19.028)),
        ("file_formats/3dmatch_redkitchen_000.ply", "plyfile", np.float32, 258_342, 258_342,
         (-1.350, -1.446, 0.800), (1.494, 0.690, 3.494)),
        # 640 x 480 organised: 40 % of the pixels have no depth and are NaN.
        ("file_formats/pcl_mOSD_learn0.pcd", "pypcd4", np.float32, 307_200, 182_292,
         (-0.750, -0.206, 0.578), (0.633, 0.294, 1.301)),
        # UTM metres, and Oregon state plane feet.
        ("file_formats/lidR_Megaplot.laz", "lazrs", np.float64, 81_590, 81_590,
         (684_766.39, 5_017_773.08, 0.0), (684_993.29, 5_018_007.25, 29.97)),
        ("file_formats/pdal_autzen_trim.laz", "lazrs", np.float64, 110_000, 110_000,
         (636_001.76, 848_935.20, 406.26), (637_179.22, 849_497.90, 520.51)),
    ],
    ids=lambda value: value.split("/")[-1] if isinstance(value, str) and "/" in value else "",
)  # fmt: skip
def test_real_file(data_dir, name, package, dtype, count, finite_count, low, high):
    if package:
        pytest.importorskip(package)
    points = read_points(data_dir / name)
    assert points.shape == (count, 3) and points.dtype == dtype
    finite = points[np.isfinite(points).all(axis=1)]
    assert len(finite) == finite_count
    np.testing.assert_allclose(finite.min(axis=0), low, rtol=0, atol=0.00051)
    np.testing.assert_allclose(finite.max(axis=0), high, rtol=0, atol=0.00051)


def test_real_nuscenes_duplicates(data_dir):
    # Returns from the car itself, which are equal. With a wrong number of columns no two rows would be equal.
    points = read_points(data_dir / "lidar_raw/nuscenes_n015_1532402927647951.pcd.bin")
    spots, counts = np.unique(points, axis=0, return_counts=True)
    assert len(points) - len(spots) == 3_469
    assert np.linalg.norm(spots[counts > 1], axis=1).max() < 0.5


@pytest.mark.parametrize("name", ["lidR_Megaplot", "pdal_autzen_trim"])
def test_real_laz_is_the_npz(data_dir, name):
    pytest.importorskip("laspy")
    pytest.importorskip("lazrs")
    points = read_points(data_dir / f"file_formats/{name}.laz")
    with np.load(data_dir / f"aerial/{name}.npz", allow_pickle=False) as z:
        expected = z["xyz_int"].T * z["scale"] + z["offset"]
    np.testing.assert_allclose(points, expected, rtol=0, atol=2 * np.spacing(5e6))


def test_real_ply_is_the_npz(data_dir):
    pytest.importorskip("plyfile")
    points = read_points(data_dir / "file_formats/3dmatch_redkitchen_000.ply")
    millimetres = read_points(data_dir / "indoor_3dmatch/redkitchen_000.npz")
    np.testing.assert_allclose(points, millimetres, rtol=0, atol=0.0005)
