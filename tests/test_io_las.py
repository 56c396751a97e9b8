# SPDX-License-Identifier: Apache-2.0
"""gpu3d.io: .las and .laz. Files are made and compared by laspy. A broken one must give a ValueError."""

import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

laspy = pytest.importorskip("laspy")
pytest.importorskip("lazrs")

from gpu3d.io import Cloud, helper, read_cloud, write_cloud  # noqa: E402

ENDINGS = ".las", ".laz"
NAMES = {"classification": "label", "gps_time": "time"}
COLORS = "red", "green", "blue"


def laspy_file(path, point_format=3, version=None, count=150, extra=()):
    """A file with random values in all dimensions, as laspy writes it."""
    rng = np.random.default_rng(0)
    header = laspy.LasHeader(point_format=point_format, version=version)
    header.scales, header.offsets = [0.01, 0.001, 0.5], [1000, -50, 0.25]
    for name, dtype, options in extra:
        header.add_extra_dim(laspy.ExtraBytesParams(name, dtype, **options))
    las = laspy.LasData(header, laspy.ScaleAwarePointRecord.zeros(count, header=header))
    for field in las.points.array.dtype.names:
        values = las.points.array[field]
        values[...] = rng.integers(0, 100, values.shape)
    if point_format >= 9:
        las.scanner_channel[:] = 1  # lazrs 0.8 damages wave packets of several ones
    las.write(str(path))
    return las


def damaged(path, at, form, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


def error_of(path):
    """The text of the ValueError, which must name the file, and come soon."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_cloud(path)
    assert time.perf_counter() - start < 5
    return str(caught.value)


def assert_same(cloud, expected):
    np.testing.assert_array_equal(cloud.points, expected.points)
    for name, values in expected.attributes.items():
        assert cloud.attributes[name].dtype == values.dtype
        np.testing.assert_array_equal(cloud.attributes[name], values)


# ---- reading


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("point_format", "version"),
    [(0, "1.1"), (1, "1.1"), (2, "1.2"), (3, "1.2"), (4, "1.3"), (5, "1.3")]
    + [(point_format, "1.4") for point_format in range(11)],
)
def test_all_that_a_point_format_has(tmp_path, ending, point_format, version):
    path = tmp_path / f"scan{ending}"
    las = laspy_file(path, point_format, version)
    cloud = read_cloud(path)
    np.testing.assert_array_equal(cloud.points, np.asarray(las.xyz))
    assert cloud.points.dtype == np.float64
    assert cloud.meta == {
        "format": ending,
        "scale": [0.01, 0.001, 0.5],
        "offset": [1000, -50, 0.25],
        "point_format": point_format,
        "version": version,
    }
    names = [name for name in las.point_format.dimension_names if name not in (*"XYZ", *COLORS)]
    assert cloud.attributes.keys() == {NAMES.get(name, name) for name in names} | (
        {"colors"} if point_format in (2, 3, 5, 7, 8, 10) else set()
    )
    for name in names:
        values = cloud.attributes[NAMES.get(name, name)]
        np.testing.assert_array_equal(values, np.asarray(las[name]))
        assert values.dtype == np.asarray(las[name]).dtype
    if "colors" in cloud.attributes:
        np.testing.assert_array_equal(cloud.attributes["colors"].T, [np.asarray(las[name]) for name in COLORS])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("point_format", [1, 7])
def test_extra_bytes(tmp_path, ending, point_format):
    path = tmp_path / f"scan{ending}"
    extra = [
        ("Amplitude", "f4", {}),
        ("height", "i4", {"scales": [0.25], "offsets": [10.0]}),
        ("pair", "2u2", {"scales": [0.5, 2.0], "offsets": [0.0, 1.0]}),
        ("flow", "3f8", {}),
        ("id", "u8", {}),
    ]
    las = laspy_file(path, point_format, "1.4", extra=extra)
    attributes = read_cloud(path).attributes
    for name, dtype in ("Amplitude", "f4"), ("height", "f8"), ("pair", "f8"), ("flow", "f8"), ("id", "u8"):
        assert attributes[name.lower()].dtype == dtype
        np.testing.assert_array_equal(attributes[name.lower()], np.asarray(las[name]))
    assert attributes["flow"].shape == (150, 3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_extra_bytes_that_are_not_described_are_left_out(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    las = laspy_file(path, 1, extra=[("a", "u4", {}), ("b", "u1", {})])
    described = path.read_bytes().find(b"LASF_Spec") + 52  # the first type
    damaged(path, described + 2, "<B", 1)  # now one byte, so that the sum is wrong
    cloud = read_cloud(path)
    np.testing.assert_array_equal(cloud.points, np.asarray(las.xyz))
    assert "a" not in cloud.attributes and "intensity" in cloud.attributes


@pytest.mark.parametrize(("legacy", "large", "found"), [(150, 0, 150), (0, 150, 150), (7, 150, 150), (7, 0, 7)])
def test_counts_of_version_4(tmp_path, legacy, large, found):
    path = tmp_path / "scan.las"
    laspy_file(path, 3, "1.4")
    damaged(path, 107, "<I", legacy)
    damaged(path, 247, "<Q", large)
    assert len(read_cloud(path)) == found


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", [0, 1, 50_000, 120_001])
def test_number_of_points(tmp_path, ending, count):
    path = tmp_path / f"scan{ending}"
    las = laspy_file(path, 6, count=count)
    np.testing.assert_array_equal(read_cloud(path).points, np.asarray(las.xyz).reshape(-1, 3))


def test_a_packed_file_is_read_by_its_header_and_not_its_ending(tmp_path):
    las = laspy_file(tmp_path / "scan.laz")
    os.rename(tmp_path / "scan.laz", tmp_path / "scan.las")
    np.testing.assert_array_equal(read_cloud(tmp_path / "scan.las").points, np.asarray(las.xyz))


def test_chunks_of_any_size(tmp_path):
    import lazrs

    path = tmp_path / "scan.laz"
    las = laspy_file(path, 3, count=1000)
    data = path.read_bytes()
    start = struct.unpack_from("<I", data, 96)[0]
    record = data.find(b"laszip encoded") - 2 + 54
    vlr = bytearray(data[record:start])
    struct.pack_into("<I", vlr, 12, 2**32 - 1)
    with open(path, "wb") as stream:
        stream.write(data[:record] + vlr)
        packer = lazrs.ParLasZipCompressor(stream, lazrs.LazVlr(bytes(vlr)))
        packer.compress_chunks([las.points.array[a:b].tobytes() for a, b in ((0, 10), (10, 700), (700, 1000))])
        packer.done()
    np.testing.assert_array_equal(read_cloud(path).points, np.asarray(las.xyz))


def test_a_laz_in_one_piece(tmp_path):
    """The oldest packing has neither chunks nor a table."""
    path = tmp_path / "scan.laz"
    las = laspy_file(path, 1)
    data = path.read_bytes()
    start = struct.unpack_from("<I", data, 96)[0]
    table = struct.unpack_from("<q", data, start)[0]
    path.write_bytes(data[:start] + data[start + 8 : table])
    damaged(path, data.find(b"laszip encoded") - 2 + 54, "<H", 1)
    np.testing.assert_array_equal(read_cloud(path).points, np.asarray(las.xyz))


def test_a_laz_written_to_a_pipe_has_the_place_of_the_table_at_its_end(tmp_path):
    path = tmp_path / "scan.laz"
    las = laspy_file(path)
    data = path.read_bytes()
    start = struct.unpack_from("<I", data, 96)[0]
    path.write_bytes(data + data[start : start + 8])
    damaged(path, start, "<q", -1)
    np.testing.assert_array_equal(read_cloud(path).points, np.asarray(las.xyz))


# ---- writing


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("point_format", range(11))
def test_a_file_that_was_read_is_written_the_same(tmp_path, ending, point_format):
    laspy_file(tmp_path / f"a{ending}", point_format, "1.4", extra=[("flow", "3f4", {}), ("id", "u8", {})])
    cloud = read_cloud(tmp_path / f"a{ending}")
    write_cloud(tmp_path / f"b{ending}", cloud)
    again = read_cloud(tmp_path / f"b{ending}")
    assert_same(again, cloud)
    assert again.attributes.keys() == cloud.attributes.keys() and again.meta == cloud.meta
    first, second = (laspy.read(str(tmp_path / f"{name}{ending}")) for name in "ab")
    np.testing.assert_array_equal(first.points.array, second.points.array)


@pytest.mark.parametrize("ending", ENDINGS)
def test_attributes_come_back_with_their_dtypes(tmp_path, ending):
    rng = np.random.default_rng(1)
    points = (rng.normal(size=(1000, 3)) * 1e5).astype(np.float32)
    attributes = {
        "intensity": rng.random(1000).astype(np.float32),  # the point format has uint16
        "label": rng.integers(-5, 1000, 1000).astype(np.int32),
        "time": rng.random(1000),
        "ring": rng.integers(0, 64, 1000).astype(np.uint8),
        "return_number": np.full(1000, 200, np.uint8),  # it has 4 bits
        "colors": rng.integers(0, 2**16, (1000, 3)).astype(np.uint16),
        "normals": rng.normal(size=(1000, 3)).astype(np.float32),
        "offset2": rng.normal(size=(1000, 2)),
        "big": rng.integers(0, 2**63, 1000).astype(np.uint64),
        "swapped": rng.integers(0, 99, 1000).astype(">i8"),
        "höhe": rng.random(1000),
    }
    path = tmp_path / f"scan{ending}"
    write_cloud(path, Cloud(points, attributes, {"format": ending, "crs": 'GEOGCS["x"]'}))
    cloud = read_cloud(path)
    for name, values in attributes.items():
        assert cloud.attributes[name].dtype == values.dtype.newbyteorder("=")
        np.testing.assert_array_equal(cloud.attributes[name], values)
    assert cloud.meta["crs"] == 'GEOGCS["x"]' and cloud.meta["point_format"] == 7 and cloud.meta["version"] == "1.4"
    assert (abs(cloud.points - points) <= 0.5001 * np.array(cloud.meta["scale"])).all()
    assert len(laspy.read(str(path)).points) == 1000


@pytest.mark.parametrize(
    ("attributes", "point_format"),
    [({}, 6), ({"colors": np.zeros((5, 3), np.uint16)}, 7), ({"nir": np.zeros(5, np.uint16)}, 8)],
)
def test_smallest_point_format(tmp_path, attributes, point_format):
    write_cloud(tmp_path / "a.las", Cloud(np.zeros((5, 3)), attributes))
    assert read_cloud(tmp_path / "a.las").meta["point_format"] == point_format


def test_point_format_of_the_file_unless_another_holds_more(tmp_path):
    laspy_file(tmp_path / "a.las", 1)
    cloud = read_cloud(tmp_path / "a.las")
    cloud.attributes["colors"] = np.ones((150, 3), np.uint16)
    write_cloud(tmp_path / "b.las", cloud)
    again = read_cloud(tmp_path / "b.las")
    assert again.meta["point_format"] == 7
    assert_same(again, cloud)


def test_an_extra_attribute_does_not_hide_a_standard_one(tmp_path):
    path = tmp_path / "scan.las"
    las = laspy_file(path, 1, extra=[("scalar_Intensity", "f4", {})])
    attributes = read_cloud(path).attributes
    np.testing.assert_array_equal(attributes["intensity"], las.intensity)
    np.testing.assert_array_equal(attributes["scalar_intensity"], las["scalar_Intensity"])


def test_wave_packets_that_lazrs_would_damage(tmp_path):
    laspy_file(tmp_path / "a.las", 9)
    cloud = read_cloud(tmp_path / "a.las")
    cloud.attributes["scanner_channel"][7] = 2
    write_cloud(tmp_path / "b.las", cloud)
    assert_same(read_cloud(tmp_path / "b.las"), cloud)
    cloud.meta["format"] = ".laz"
    with pytest.raises(ValueError, match=r"write a \.las"):
        write_cloud(tmp_path / "b.laz", cloud)


def test_degrees(tmp_path):
    points = np.array([[-180.0, -90.0, 8848.12], [180.0, 90.0, -400.5], [8.1234567, 47.7654321, 0.0]])
    write_cloud(tmp_path / "a.las", points)
    cloud = read_cloud(tmp_path / "a.las")
    assert cloud.meta["scale"] == [1e-7, 1e-7, 0.001]
    np.testing.assert_allclose(cloud.points, points, rtol=0, atol=1e-9)


def test_a_crs_too_long_for_a_record_goes_behind_the_points(tmp_path):
    crs = "x" * 70_000
    for ending in ENDINGS:
        write_cloud(tmp_path / f"a{ending}", Cloud(np.ones((5, 3)), {}, {"crs": crs, "format": ending}))
        cloud = read_cloud(tmp_path / f"a{ending}")
        assert cloud.meta["crs"] == crs and len(cloud) == 5


@pytest.mark.parametrize(
    ("points", "attributes", "meta", "message"),
    [
        ([[np.nan, 0, 0]], {}, {}, "NaN or infinite"),
        ([[0, 0, 0], [1e7, 0, 0]], {}, {}, "too far apart"),
        ([[0, 0, 0]], {}, {"scale": [0, 1, 1], "offset": [0, 0, 0]}, "scale and offset in meta"),
        ([[0, 0, 0]], {"half": np.zeros(1, np.float16)}, {}, "attribute half is float16"),
        ([[0, 0, 0]], {"flag": np.zeros(1, bool)}, {}, "attribute flag is bool"),
        ([[0, 0, 0]], {"wide": np.zeros((1, 4))}, {}, "attribute wide has shape"),
        ([[0, 0, 0]], {"n" * 33: np.zeros(1)}, {}, "32 bytes"),
        ([[0, 0, 0]], {"X": np.zeros(1)}, {}, "attribute X"),
        ([[0, 0, 0]], {"red": np.zeros(1)}, {}, "attribute red"),
    ],
)
def test_what_a_las_cannot_hold(tmp_path, points, attributes, meta, message):
    with pytest.raises(ValueError, match=message):
        write_cloud(tmp_path / "a.las", Cloud(np.array(points, float), attributes, meta))
    assert not list(tmp_path.iterdir())


# ---- broken files


@pytest.mark.parametrize("ending", ENDINGS)
def test_more_records_than_the_file_has_room_for(tmp_path, ending):
    path = tmp_path / f"scan{ending}"
    laspy_file(path, 6)
    good = path.read_bytes()
    for number in 1_000_000, 2**32 - 1:
        for at in 100, 243:  # records before and behind the points
            path.write_bytes(good)
            damaged(path, at, "<I", number)
            assert "records do not fit" in error_of(path)


@pytest.mark.parametrize("point_format", [3, 6])
def test_damaged_table_of_chunks(tmp_path, point_format):
    path = tmp_path / "scan.laz"
    laspy_file(path, point_format)
    good = path.read_bytes()
    start = struct.unpack_from("<I", good, 96)[0]
    table = struct.unpack_from("<q", good, start)[0]
    packing = good.find(b"laszip encoded") - 2 + 54
    for at, value in (
        [(table + 4, value) for value in (0, 2, 10**9, 2**32 - 1)]
        + [(packing + 12, value) for value in (1, 2, 149, 0)]
        + [(start, value) for value in (1, start, 2**31)]
    ):
        path.write_bytes(good)
        damaged(path, at, "<I", value)
        error_of(path)
    path.write_bytes(good)
    assert len(read_cloud(path)) == 150


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("point_format", "version"), [(3, "1.2"), (7, "1.4")])
def test_truncated_anywhere(tmp_path, ending, point_format, version):
    path = tmp_path / f"scan{ending}"
    laspy_file(path, point_format, version, count=40, extra=[("id", "u4", {})])
    good = path.read_bytes()
    for size in range(0, len(good), 7):
        path.write_bytes(good[:size])
        # The last byte of a table is padding, which a decoder need not read.
        if size < len(good) - 4:
            error_of(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_extreme_header_fields(tmp_path, ending):
    """Every 4 and 8 bytes of the header: a ValueError or a cloud, soon."""
    path = tmp_path / f"scan{ending}"
    laspy_file(path, 7, count=40)
    good = path.read_bytes()
    for at in range(90, 375, 2):
        for form, value in (
            ("<I", 0),
            ("<I", 2**32 - 1),
            ("<I", 2**31),
            ("<Q", 2**64 - 1),
            ("<d", np.nan),
            ("<d", 1e308),
        ):
            if at + struct.calcsize(form) <= 375:
                path.write_bytes(good)
                damaged(path, at, form, value)
                try:
                    assert len(read_cloud(path)) <= 40
                except ValueError as error:
                    assert str(path) in str(error)


# ---- the helper


def test_helper_that_was_killed_between_two_files(tmp_path):
    laspy_file(tmp_path / "scan.laz")
    assert len(read_cloud(tmp_path / "scan.laz")) == 150
    first = helper._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(read_cloud(tmp_path / "scan.laz")) == 150
    second = helper._process
    assert len(read_cloud(tmp_path / "scan.laz")) == 150
    assert helper._process is second is not first


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops the helper by a signal")
def test_helper_that_dies_meanwhile(tmp_path):
    path = tmp_path / "scan.laz"
    laspy_file(path)
    read_cloud(path)
    process = helper._process
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.3, process.kill).start()
    assert "died of SIGKILL" in error_of(path)
    assert len(read_cloud(path)) == 150


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="interrupts by a signal")
def test_interrupt_leaves_the_helper_usable(tmp_path):
    path = tmp_path / "scan.laz"
    laspy_file(path)
    read_cloud(path)
    os.kill(helper._process.pid, signal.SIGSTOP)  # it answers nothing, so that the interrupt comes first
    threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        read_cloud(path)
    assert len(read_cloud(path)) == 150


def test_threads(tmp_path):
    files = {}
    for count in 100, 60_000:
        files[tmp_path / f"{count}.laz"] = np.asarray(laspy_file(tmp_path / f"{count}.laz", count=count).xyz)
    wrong = []

    def work():
        for _ in range(5):
            for path, points in files.items():
                if not np.array_equal(read_cloud(path).points, points):
                    wrong.append(path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forked_processes_have_helpers_of_their_own(tmp_path):
    laspy_file(tmp_path / "scan.laz")
    done = run(
        """if True:
        import os, sys, warnings
        from gpu3d.io import helper, read_cloud
        warnings.simplefilter("error")
        read_cloud(sys.argv[1])
        first = helper._process.pid
        child = os.fork()
        assert len(read_cloud(sys.argv[1])) == 150
        assert (helper._process.pid == first) == bool(child)
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert len(read_cloud(sys.argv[1])) == 150
        """,
        tmp_path / "scan.laz",
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for the process in /proc")
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_helper_ends_with_its_caller(tmp_path, end):
    laspy_file(tmp_path / "scan.laz")
    code = "import os, sys; from gpu3d.io import *; from gpu3d.io import helper; read_cloud(sys.argv[1]);"
    done = run(f"{code} print(helper._process.pid, flush=True); {end}", tmp_path / "scan.laz")
    for _ in range(100):
        try:
            with open(f"/proc/{int(done.stdout)}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail("the helper is still there")


# ---- real files


@pytest.mark.parametrize(("name", "count"), [("lidR_Megaplot", 81_590), ("pdal_autzen_trim", 110_000)])
def test_real_laz(data_dir, tmp_path, name, count):
    path = data_dir / f"file_formats/{name}.laz"
    cloud = read_cloud(path)
    las = laspy.read(str(path))
    assert len(cloud) == count
    np.testing.assert_array_equal(cloud.points, np.asarray(las.xyz))
    for dimension in las.point_format.dimension_names:
        if dimension not in (*"XYZ", *COLORS):
            np.testing.assert_array_equal(cloud.attributes[NAMES.get(dimension, dimension.lower())], las[dimension])
    for ending in ENDINGS:
        write_cloud(tmp_path / f"a{ending}", Cloud(cloud.points, cloud.attributes, {**cloud.meta, "format": ending}))
        assert_same(read_cloud(tmp_path / f"a{ending}"), cloud)
