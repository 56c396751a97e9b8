# SPDX-License-Identifier: Apache-2.0
"""The command line on a machine without a GPU. If there is one, it is hidden."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec as real_find_spec
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import gpu3d
from gpu3d import cli
from gpu3d.cli import bench, devices, info
from gpu3d.io import Cloud, read_cloud, write_cloud


@pytest.fixture(autouse=True)
def no_gpu_in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "working_cupy", lambda: (None, "CuPy: a cure"))


def rows(output):
    return dict(line.split("  ", 1) for line in output.splitlines() if "  " in line)


def test_demo_on_the_packaged_scan(capsys, tmp_path):
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "no GPU: running on NumPy" in out
    table = {name: value.strip() for name, value in rows(out).items()}
    assert table["points"] == "106,169"
    assert table["buckets"] == "208 of 512 slots, 207 of them full"
    assert " ms a call" in table["time"]
    assert "CPU" in table["device"]
    assert table["picture"] == "gpu3d-demo.png"
    image = matplotlib.image.imread(tmp_path / "gpu3d-demo.png")[..., :3]
    assert (np.ptp(image, axis=-1) > 0.25).sum() > 10_000


def test_demo_buckets_are_far_smaller_than_random_ones(capsys):
    cli.main(["demo"])
    radius, random = rows(capsys.readouterr().out)["mean radius"].split("(")[0].split("; of random buckets ")
    assert 0 < 4 * float(radius) < float(random)


def test_demo_options_reach_bucketize(capsys, tmp_path):
    arguments = ["demo", "--bucket-size", "1024", "--hash", "xor_mod", "--balance", "probe", "-o", "my.png"]
    assert cli.main(arguments) == 0
    assert "104 of 1,024 slots" in capsys.readouterr().out
    assert (tmp_path / "my.png").is_file()
    assert not (tmp_path / "gpu3d-demo.png").exists()


def test_demo_drops_points_that_are_not_finite_and_says_how_many(capsys, tmp_path):
    points = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    points[[3, 500], 1] = np.nan, np.inf
    np.save("cloud.npy", points)
    assert cli.main(["demo", "cloud.npy"]) == 0
    assert "598 (2 non-finite dropped)" in capsys.readouterr().out
    assert (tmp_path / "gpu3d-demo-cloud.png").is_file()


def test_demo_of_fewer_points_than_a_bucket(capsys):
    np.save("few.npy", np.eye(3, dtype=np.float32))
    assert cli.main(["demo", "few.npy"]) == 0
    out = capsys.readouterr().out
    assert "1 of 512 slots, 0 of them full" in out
    assert "mean radius" not in out


def test_demo_goes_on_after_a_file_that_cannot_be_read(capsys, tmp_path):
    np.save("good.npy", np.random.default_rng(0).normal(size=(600, 3)))
    (tmp_path / "broken.bin").write_bytes(b"12345")
    assert cli.main(["demo", "absent.bin", "broken.bin", "scan.xyz", "good.npy"]) == 1
    out, err = capsys.readouterr()
    named = [line.split(":")[1].strip() for line in err.splitlines()]
    assert named == ["absent.bin", "broken.bin", "scan.xyz"]
    assert "Traceback" not in err
    assert rows(out)["picture"].strip() == "gpu3d-demo-good.png"


def test_demo_of_a_file_without_a_finite_point(capsys):
    np.save("nan.npy", np.full((7, 3), np.nan))
    assert cli.main(["demo", "nan.npy"]) == 1
    assert "no finite points (dropped 7)" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--bucket-size", "24"], ["--hash", "md5"], ["--balance", "luck"]])
def test_demo_with_a_bad_option(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *option])
    assert option[1] in capsys.readouterr().err


def test_demo_into_a_folder_that_does_not_exist(capsys):
    assert cli.main(["demo", "-o", "absent/picture.png"]) == 1
    assert "absent/picture.png" in capsys.readouterr().err


def test_equal_names_get_pictures_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(f"{folder}/scan.npy", np.random.default_rng(0).normal(size=(600, 3)))
    assert cli.main(["demo", "a/scan.npy", "b/scan.npy"]) == 0
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"gpu3d-demo-scan.png", "gpu3d-demo-scan-2.png"}


def test_one_picture_for_several_files_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "-o", "x.png", "a.bin", "b.bin"])
    assert "-o names one picture" in capsys.readouterr().err


def test_info_says_what_is_missing_and_the_cure(capsys, monkeypatch):
    monkeypatch.setattr(info, "find_spec", lambda name: None if name == "plyfile" else real_find_spec(name))
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"gpu3d         {gpu3d.__version__}" in out
    assert "CPU" in out
    assert "CuPy: a cure" in out
    assert 'plyfile, which reads .ply as text: pip install "gpu3d[io]"' in out
    assert "laspy" not in out or real_find_spec("laspy") is None


def test_info_counts_the_kernel_cache(capsys, tmp_path):
    cli.main(["info"])
    assert "cache (0 kernels, 0.0 MiB)" in capsys.readouterr().out
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "buckets-sm_90a-0.cubin").write_bytes(bytes(3 * 2**19))
    cli.main(["info"])
    assert "cache (1 kernels, 1.5 MiB)" in capsys.readouterr().out


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"gpu3d {gpu3d.__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


def test_without_cupy(monkeypatch, tmp_path):
    """Both commands work in a process that cannot import CuPy."""
    code = (
        "import sys; sys.modules['cupy'] = None\nfrom gpu3d.cli import main\nsys.exit(main(['info']) or main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'pip install "gpu3d[cuda13]"' in done.stdout
    assert "running on NumPy" in done.stdout


# ---- files ---------------------------------------------------------------------------------------------------------


def write_scans(folder):
    """Two sweeps and a damaged one in a tree, with a file that is no cloud."""
    rng = np.random.default_rng(0)
    for name in ("a/one.bin", "a/b/two words $x.bin"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng.random((300, 4), np.float32).tofile(path)
    (folder / "a" / "broken.bin").write_bytes(b"12345")
    (folder / "a" / "notes.md").write_text("no cloud")


def test_convert_mirrors_a_tree_and_keeps_attributes(capsys, tmp_path):
    write_scans(tmp_path)
    assert cli.main(["convert", "a", "--out", "out", "--to", ".npz", "--jobs", "1"]) == 1  # one is damaged
    out, err = capsys.readouterr()
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written == ["out/b/two words $x.npz", "out/one.npz"]
    assert {name: value.strip() for name, value in rows(out).items()}["done"] == "2"
    assert err.count("\n") == 1 and "gpu3d: a/broken.bin: 5 bytes are no whole number" in err
    before, after = read_cloud("a/one.bin"), read_cloud("out/one.npz")
    assert (before.points == after.points).all()
    assert (before.attributes["intensity"] == after.attributes["intensity"]).all()


def test_convert_goes_on_where_it_was(capsys, tmp_path):
    write_scans(tmp_path)
    command = ["convert", "a", "--out", "out", "--to", ".npz", "--jobs", "2", "--resume", "done.jsonl", "--json"]
    assert cli.main(command) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["skipped"], found["failed"]) == (2, 0, 1)
    assert found["failures"][0]["file"] == "a/broken.bin"
    np.ones((5, 4), np.float32).tofile("a/broken.bin")
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["skipped"], found["failed"]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.bin"], "name the file to write by -o, or a folder by --out"),
        (["one.bin", "-o", "x.npz", "--out", "y"], "name the file to write by -o"),
        (["one.bin", "two.bin", "-o", "x.npz"], "-o names one file"),
        (["a", "-o", "x.npz"], "-o names one file"),
        (["one.bin", "-o", "x.gif"], "the ending of x.gif is none of"),
        (["one.bin", "-o", "a/../one.bin"], "an input is never overwritten"),
        (["a", "--out", "a"], "an input is never overwritten"),
        (["one.bin", "a", "--out", "y"], "give one folder, or files"),
        (["one.bin", "one.ply", "--out", "y", "--to", ".npz"], "y/one.npz"),
        (["one.bin", "--out", "y", "--to", ".gif"], "--to is one of"),
    ],
)
def test_convert_refuses_before_it_writes(capsys, tmp_path, arguments, message):
    write_scans(tmp_path)
    for name in ("one.bin", "two.bin"):
        np.ones((5, 4), np.float32).tofile(name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", *arguments])
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_info_of_files(capsys, tmp_path):
    points = np.array([[1, 2, 3], [4, 5, np.nan]], np.float32)
    write_cloud("a.npz", Cloud(points, {"label": np.array([3, 7], np.uint8)}))
    assert cli.main(["info", "a.npz", "absent.bin"]) == 1
    out, err = capsys.readouterr()
    assert "2 float32" in out and "uint8, 3 to 7" in out and "absent.bin" in err
    assert cli.main(["info", "a.npz", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["points"], found["finite"], found["low"]) == (2, 1, [1, 2, 3])
    assert found["attributes"] == {"label": {"dtype": "uint8", "shape": [2], "low": 3, "high": 7}}
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"][0] == "CuPy: a cure"


def run_command(*arguments, shell=None, **options):
    """The command as a process of its own, on the CPU. `shell` follows it on the shell's line."""
    line = " ".join([sys.executable, "-m", "gpu3d", *map(shlex.quote, arguments)])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(gpu3d.__file__).parent.parent)}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} {shell or ''}"], capture_output=True, env=environment, **options
    )


def test_closed_pipes_and_full_disks():
    done = run_command("info", shell="| true")
    assert done.returncode in (0, 141) and not done.stderr  # 0: it had written all before the pipe was closed
    if os.path.exists("/dev/full"):
        done = run_command("info", shell="> /dev/full")
        assert done.returncode == 1
        assert done.stderr.decode() == "gpu3d: cannot write the output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_file_names_that_are_no_text(tmp_path):
    points = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    for name in (b"b\xff.npy", b"$x^{$.npy"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            np.save(file, points)
        done = run_command("demo", os.fsdecode(name), cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_an_interrupt_is_a_line():
    code = "from gpu3d import cli; cli._run = lambda argv: (_ for _ in ()).throw(KeyboardInterrupt); exit(cli.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"gpu3d: interrupted\n")


def test_an_input_is_never_overwritten(capsys, tmp_path):
    np.save("scan.npy", np.random.default_rng(0).normal(size=(600, 3)))
    before = (tmp_path / "scan.npy").read_bytes()
    for command in (["demo"], ["segment", "--weights", "w"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, "scan.npy", "-o", "scan.npy"])
        assert "an input is never overwritten" in capsys.readouterr().err
    assert (tmp_path / "scan.npy").read_bytes() == before


def test_a_picture_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path, capsys):
    (tmp_path / "old.png").write_bytes(b"precious")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo", "-o", "old.png"])
    assert (tmp_path / "old.png").read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


# ---- verbs on files ------------------------------------------------------------------------------------------------


@pytest.fixture
def scan(tmp_path):
    """scan.npz: 600 points with attributes of every kind, one of them not finite."""
    rng = np.random.default_rng(0)
    points = rng.random((600, 3), np.float32) * 10
    points[7, 1] = np.nan
    attributes = {
        "intensity": rng.integers(0, 60000, 600).astype(np.uint16),
        "label": rng.integers(0, 5, 600).astype(np.uint8),
        "colors": rng.integers(0, 256, (600, 3)).astype(np.uint8),
        "normals": np.tile(np.float32([0, 0, 1]), (600, 1)),
        "time": 4e8 + rng.random(600),
    }
    write_cloud("scan.npz", Cloud(points, attributes))
    return read_cloud("scan.npz")


def result(capsys, *arguments):
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def test_bucket_writes_the_bucket_of_every_point(capsys, scan):
    found = result(capsys, "bucket", "scan.npz", "--bucket-size", "64", "-o", "b.ply")
    kept = np.delete(scan.points, 7, axis=0)
    buckets = gpu3d.bucketize(kept, 64)
    assert (found["points"], found["dropped"], found["buckets"], found["full"]) == (600, 1, 10, 9)
    assert found["mean_radius"] == gpu3d.bucket_quality(kept, buckets).mean_radius
    written = read_cloud("b.ply").attributes
    assert written["bucket"][7] == -1 and (np.delete(written["bucket"], 7) == buckets.point_to_slot // 64).all()
    assert (written["label"] == scan.attributes["label"]).all()
    assert result(capsys, "bucket", "scan.npz", "--bucket-size", "1024")["mean_radius"] is None  # none is full


def test_neighbors_are_those_of_brute_force(capsys, scan):
    kept = np.delete(scan.points, 7, axis=0).astype(np.float64)
    distances = np.sort(np.linalg.norm(kept[:, None] - kept, axis=-1), axis=1)
    found = result(capsys, "neighbors", "scan.npz", "-k", "3", "-o", "n.npz")
    written = read_cloud("n.npz").attributes["neighbor_distance"]
    assert np.isnan(written[7])
    np.testing.assert_allclose(np.delete(written, 7), distances[:, 3], rtol=1e-5)
    np.testing.assert_allclose(
        [found[name] for name in ("mean", "min", "median", "percentile_95", "max")],
        [distances[:, 3].mean(), *np.percentile(distances[:, 3], (0, 50, 95, 100))],
        rtol=1e-5,
    )
    found = result(capsys, "neighbors", "scan.npz", "--radius", "1.5", "-o", "n.npz")
    counts = (distances <= 1.5).sum(axis=1) - 1
    written = read_cloud("n.npz").attributes["neighbor_count"]
    assert written[7] == -1 and (np.delete(written, 7) == counts).all() and counts.max() > 2
    assert found["max"] == counts.max()


def test_neighbors_of_a_cloud_with_too_few(capsys):
    np.save("two.npy", np.eye(3)[:2])
    found = result(capsys, "neighbors", "two.npy", "-k", "2")
    assert found["max"] is None and found["k"] == 2  # JSON has no infinity


@pytest.mark.parametrize("color", ["height", "bucket", "label", "intensity", "colors"])
def test_view_draws(scan, tmp_path, color):
    assert cli.main(["view", "scan.npz", "--color", color]) == 0
    image = matplotlib.image.imread(tmp_path / "gpu3d-view-scan.png")[..., :3]
    assert (np.ptp(image, axis=-1) > 0.25).sum() > 500


def test_view_of_what_is_not_there(scan, capsys, tmp_path):
    assert cli.main(["view", "scan.npz", "--color", "ring"]) == 1
    assert capsys.readouterr().err.startswith("gpu3d: scan.npz: it has no attribute ring: it has intensity, label")
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["view", "scan.npz", "-o", "scan.gif"])


def test_a_folder_through_a_verb(capsys, tmp_path):
    write_scans(tmp_path)
    assert cli.main(["view", "a", "--out", "pictures", "--jobs", "1"]) == 1
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pictures").rglob("*.png"))
    assert written == ["pictures/b/two words $x.png", "pictures/one.png"]
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "a/broken.bin" in err and "a/broken.bin" in out
    assert cli.main(["neighbors", "a", "--jobs", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["failed"]) == (2, 1)
    assert {entry["file"] for entry in found["files"]} == {"a/one.bin", "a/b/two words $x.bin"}
    assert found["failures"][0]["file"] == "a/broken.bin"
    assert cli.main(["neighbors", "a/one.bin", "a/broken.bin"]) == 1
    out, err = capsys.readouterr()
    assert "a/one.bin" in out and "a/broken.bin" in err


def test_a_folder_without_scans(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert cli.main(["info", "empty"]) == 1
    assert "gpu3d: empty: no file in this folder ends in .pcd.bin" in capsys.readouterr().err


def test_a_resume_file_that_cannot_be_written(capsys, tmp_path):
    write_scans(tmp_path)
    assert cli.main(["convert", "a", "--out", "out", "--resume", "no/x.jsonl", "--jobs", "1"]) == 1
    assert capsys.readouterr().err == "gpu3d: no/x.jsonl: No such file or directory\n"
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "a", "--out", "out", "--resume", "notes", "--jobs", "1"])
    assert "notes was not written by map_files" in capsys.readouterr().err and not list(tmp_path.glob("out/*"))


def test_a_file_that_cannot_be_written_is_said(capsys, scan, tmp_path):
    assert cli.main(["bucket", "scan.npz", "-o", "no/x.ply"]) == 1
    assert capsys.readouterr().err == "gpu3d: scan.npz: cannot write no/x.ply: No such file or directory\n"
    assert cli.main(["bucket", "absent.npz", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "gpu3d: absent.npz: No such file or directory\n"
    assert json.loads(out) == {"file": "absent.npz", "error": "No such file or directory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bucket", "scan.npz", "--device", "cuda"], "--device cuda needs CuPy: a cure"),
        (["bucket", "scan.npz", "--device", "tpu"], "a device is cpu, cuda or cuda:1, got tpu"),
        (["bucket", "scan.npz", "--to", ".ply"], "--to and --resume go with --out"),
        (["neighbors", "scan.npz", "-k", "0"], "a whole number from 1 to"),
        (["neighbors", "scan.npz", "--radius", "nan"], "a number above 0, got nan"),
        (["neighbors", "scan.npz", "--radius", "1", "-k", "2"], "not allowed with"),
        (["view", "scan.npz", "scan.npz"], "name the folder to write to by --out"),
        (["convert", "scan.npz", "--out", "x", "--jobs", "0"], "a whole number of at least 1, got 0"),
    ],
)
def test_mistakes_in_the_arguments(capsys, scan, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_bench(capsys, monkeypatch):
    monkeypatch.setattr(bench, "read_points", lambda path: np.random.default_rng(0).random((700, 3), np.float32))
    found = result(capsys, "bench")
    assert found["points"] == 700 and "CPU" in found["device"]
    assert found["chamfer"]["milliseconds"] > 0 and found["bucketize"]["calls"] > 1


@pytest.mark.parametrize(
    "verb", ["info", "demo", "convert", "downsample", "bucket", "neighbors", "compare", "segment", "view", "bench"]
)
def test_help_has_an_example_that_parses(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    example = shlex.split(words.rpartition("example: gpu3d ")[2])
    assert cli.parser().parse_args(example).command == verb


def test_completion_in_bash():
    """Words of verbs, options and choices; where there are none, files."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    script = run_command("completion", "bash").stdout.decode()
    for words, expected in [
        (["gpu3d", "bu"], ["bucket"]),
        (["gpu3d", "bucket", "--ba"], ["--balance"]),
        (["gpu3d", "bucket", "scan.bin", "--hash", "xor_m"], ["xor_mod"]),
        (["gpu3d", "completion", "z"], ["zsh"]),
        (["gpu3d", "info", "sc"], []),
    ]:
        line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _gpu3d; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected and not done.stderr, (words, done)
    assert "complete -c gpu3d" in run_command("completion", "fish").stdout.decode()


# ---- downsample and compare ----------------------------------------------------------------------------------------


def averaged(values, groups):
    """The mean of each group, in float64."""
    return np.stack([values[groups == group].mean(axis=0, dtype=np.float64) for group in range(groups.max() + 1)])


def test_downsample_by_voxels(capsys, scan):
    found = result(capsys, "downsample", "scan.npz", "--voxel", "2.5", "-o", "thin.ply")
    kept = np.delete(np.arange(600), 7)
    expected = gpu3d.voxel_downsample(scan.points[kept], 2.5)
    groups = expected.point_to_voxel
    assert (found["points"], found["dropped"], found["kept"]) == (600, 1, len(expected.points)) and groups.max() > 50
    thin = read_cloud("thin.ply")
    assert (thin.points == expected.points).all()
    first = kept[np.unique(groups, return_index=True)[1]]
    assert (thin.attributes["label"] == scan.attributes["label"][first]).all()
    for name in ("intensity", "colors"):
        assert thin.attributes[name].dtype == scan.attributes[name].dtype
        np.testing.assert_array_equal(thin.attributes[name], np.rint(averaged(scan.attributes[name][kept], groups)))
    assert (thin.attributes["normals"] == np.float32([0, 0, 1])).all()
    np.testing.assert_allclose(
        thin.attributes["time"] - 4e8, averaged(scan.attributes["time"][kept] - 4e8, groups), atol=2e-7
    )


@pytest.mark.parametrize("ratio", [2, 8])
def test_downsample_by_ratio(capsys, ratio):
    points = np.random.default_rng(0).random((1100, 3)) + 5e6
    write_cloud("scan.npz", Cloud(points, {"place": points[:, 1].copy(), "number": np.arange(1100)}))
    found = result(capsys, "downsample", "scan.npz", "--ratio", str(ratio), "-o", "thin.npz")
    thin = read_cloud("thin.npz")
    assert found["kept"] == len(thin) == -(-1100 // ratio)
    np.testing.assert_allclose(thin.attributes["place"], thin.points[:, 1], rtol=0, atol=1e-7)
    spread = np.linalg.norm(thin.points - points[thin.attributes["number"]], axis=1)
    assert len(np.unique(thin.attributes["number"])) == len(thin) and 0 < np.median(spread) < 0.15


def test_downsample_to_the_farthest(capsys, scan):
    found = result(capsys, "downsample", "scan.npz", "--farthest", "20", "-o", "thin.npz")
    thin, kept = read_cloud("thin.npz"), np.delete(np.arange(600), 7)
    rows = kept[gpu3d.farthest_points(scan.points[kept], 20)]
    assert found["kept"] == 20 and (thin.points == scan.points[rows]).all()
    for name, values in scan.attributes.items():
        assert (thin.attributes[name] == values[rows]).all()
    found = result(capsys, "downsample", "scan.npz", "--farthest", "1000", "-o", "thin.npz")
    assert found["kept"] == 599  # it has no more


def test_compare(capsys):
    rng = np.random.default_rng(0)
    a, b = rng.random((300, 3), np.float32), rng.random((300, 3), np.float32)
    np.save("a.npy", np.concatenate([a, [[0, 0, np.nan]]]).astype(np.float32))
    np.save("b.npy", b)
    found = result(capsys, "compare", "a.npy", "b.npy", "--thresholds", "0.05", "0.1")
    expected = gpu3d.compare_clouds(a, b, thresholds=(0.05, 0.1))
    for name, value in expected._asdict().items():
        assert found[name] == value[0].tolist(), name
    assert len(found["fscore"]) == 2 and (found["points"], found["dropped"], found["warnings"]) == (300, 1, [])
    assert found["apml"] == float(gpu3d.apml(a, b)) and found["emd"] == float(gpu3d.emd(a, b))
    np.save("b.npy", b[1:] + np.float32(5))
    assert cli.main(["compare", "a.npy", "b.npy"]) == 0
    out, err = capsys.readouterr()
    assert err == "gpu3d: a.npy: warning: its box does not overlap that of b.npy: are both in one frame and unit?\n"
    assert rows(out)["emd"].strip() == "none" and float(rows(out)["hausdorff"]) > 5


def test_compare_of_folders(capsys, tmp_path):
    for name in ("a/one.npy", "a/x/two.npy", "b/x/two.npy", "a/three.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(name, np.random.default_rng(len(name)).random((50, 3)))
    write_cloud("b/one.ply", read_cloud("a/one.npy"))
    assert cli.main(["compare", "a", "b", "--jobs", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    found = {entry["file"]: entry for entry in json.loads(out)["files"]}
    assert found["a/one.npy"]["other"] == "b/one.ply" and found["a/one.npy"]["hausdorff"] == 0
    assert found["a/x/two.npy"]["hausdorff"] == 0 and len(found) == 2
    assert err == "gpu3d: a/three.npy: there is no file three to compare with in b\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "a", "a/one.npy"])
