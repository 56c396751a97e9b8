# SPDX-License-Identifier: Apache-2.0
"""The command on a GPU finds what it finds on the CPU."""

import json

import numpy as np
import pytest

from gpu3d import cli
from gpu3d.io import Cloud, read_cloud, write_cloud

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def scans(monkeypatch, tmp_path):
    """Two scans in a folder, one with a point that is not finite."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    for seed in range(2):
        rng = np.random.default_rng(seed)
        points = rng.random((3000, 3), np.float32) * 10
        points[11 * seed, 0] = np.nan
        write_cloud(f"scans/{seed}.npz", Cloud(points, {"label": rng.integers(0, 9, 3000).astype(np.uint8)}))


def run(capsys, *arguments):
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def same(a, b):
    assert a.attributes.keys() == b.attributes.keys()
    np.testing.assert_array_equal(a.points, b.points)
    for name, values in a.attributes.items():
        np.testing.assert_array_equal(values, b.attributes[name])


@pytest.mark.parametrize(
    "verb",
    [
        ("bucket", "--bucket-size", "128"),
        ("neighbors", "-k", "5"),
        ("neighbors", "--radius", "0.8"),
        ("downsample", "--voxel", "0.7"),
        ("downsample", "--ratio", "4"),
        ("downsample", "--farthest", "100"),
    ],
    ids=" ".join,
)
def test_devices_agree(capsys, verb):
    found = {}
    for device in ("cpu", "cuda:0"):
        name, *options = verb
        output = f"{device[:3]}.npz"
        found[device] = run(capsys, name, "scans/1.npz", *options, "--device", device, "-o", output)
        del found[device]["written"]
    assert found["cpu"] == found["cuda:0"]
    same(read_cloud("cpu.npz"), read_cloud("cud.npz"))


def test_compare_agrees(capsys):
    found = [
        run(capsys, "compare", "scans/0.npz", "scans/1.npz", "--thresholds", "0.3", "--device", device)
        for device in ("cpu", "cuda:0")
    ]
    for name, value in found[0].items():
        if name in ("apml", "density_aware_chamfer", "emd"):  # not the same bits on every device
            assert found[1][name] == pytest.approx(value, rel=1e-4)
        else:
            assert found[1][name] == value, name


def test_a_folder_on_workers(capsys):
    for device, jobs in (("cpu", "1"), ("cuda", "2")):
        report = run(capsys, "neighbors", "scans", "--device", device, "--jobs", jobs, "--out", device, "--to", ".npz")
        assert (report["done"], report["failed"]) == (2, 0)
    for name in ("0.npz", "1.npz"):
        same(read_cloud(f"cpu/{name}"), read_cloud(f"cuda/{name}"))


def test_bench_and_a_device_that_is_not_there(capsys):
    found = run(capsys, "bench")
    assert "compute capability" in found["device"] and 0 < found["bucketize"]["milliseconds"] < 10
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--device", "cuda:99"])
    assert "--device cuda:99 does not exist" in capsys.readouterr().err
