# SPDX-License-Identifier: Apache-2.0
"""The command line on a machine without a GPU. If there is one, it is hidden."""

import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec as real_find_spec
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import gpu3d
from gpu3d import cli
from gpu3d.io import Cloud, read_cloud, write_cloud


@pytest.fixture(autouse=True)
def no_gpu_in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPU3D_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "_working_cupy", lambda: (None, "CuPy: a cure"))


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
    assert cli.main(["demo", *option]) == 1
    out, err = capsys.readouterr()
    assert option[1] in err
    assert "Traceback" not in out + err


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
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "plyfile" else real_find_spec(name))
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
    assert found["attributes"] == {"label": {"dtype": "uint8", "shape": [2]}}
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
