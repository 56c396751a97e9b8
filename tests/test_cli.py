# SPDX-License-Identifier: Apache-2.0
"""The command line on a machine without a GPU. If there is one, it is hidden."""

import subprocess
import sys
from importlib.util import find_spec as real_find_spec

import matplotlib.image
import numpy as np
import pytest

import gpu3d
from gpu3d import cli


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
    assert 'plyfile, which reads .ply: pip install "gpu3d[io]"' in out
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
