# SPDX-License-Identifier: Apache-2.0
"""The examples run as a new user would run them: in a process of their own, in an empty folder, on the CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from clouds import lidar_like
from scipy.spatial import KDTree

from gpu3d import flash3d

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, folder, *arguments):
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def clouds():
    """A sweep of several scopes, a single point, and points that are equal, far from the origin or not finite."""
    spoiled = lidar_like(1300)
    spoiled[[3, 700], 1] = np.nan, np.inf
    return {
        "sweep": lidar_like(20_000),
        "point": lidar_like(1),
        "equal": np.full((600, 3), 3.5, np.float32),
        "far": lidar_like(1300).astype(np.float64) + [4e5, 5e6, 100],
        "spoiled": spoiled,
    }


@pytest.mark.parametrize("name", clouds())
def test_bucket_attention(name, tmp_path):
    points = clouds()[name]
    np.save(tmp_path / f"{name}.npy", points)
    done = run("bucket_attention.py", tmp_path, f"{name}.npy", "--out", "picture.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    finite = int(np.isfinite(points).all(axis=1).sum())
    assert f"{finite:,} points in {-(-finite // 512):,} buckets of 512" in done.stdout
    rows = re.findall(
        r"^(plain|shift 4|stride 4) +\d+ of 8 buckets +[\d.]+ ms +([\d.]+) +([\d.]+) +([\d,]+)$", done.stdout, re.M
    )
    assert [row[0] for row in rows] == ["plain", "shift 4", "stride 4"]
    for _, total, reach, count in rows:
        assert float(total) == pytest.approx(1, abs=1e-5)
        assert (float(reach) > 0) == (name not in ("point", "equal"))
        assert 1 <= int(count.replace(",", "")) <= min(finite, 8 * 512)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npy", "picture.png"}
    image = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    if name == "sweep":  # each panel shows weights, in colour
        for panel in np.array_split(image[100:600], 3, axis=1):
            assert (np.ptp(panel, axis=-1) > 0.25).sum() > 1000


def test_bucket_attention_of_no_scan(tmp_path):
    np.save(tmp_path / "nan.npy", np.full((7, 3), np.nan))
    for arguments, why in ((["absent.npy"], "absent.npy"), (["nan.npy"], "nan.npy holds no finite points")):
        done = run("bucket_attention.py", tmp_path, *arguments, "--device", "cpu")
        assert done.returncode == 1
        assert why in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name, ratio", [*((name, 4) for name in clouds()), ("sweep", 2), ("sweep", 8)])
def test_pooling_levels(name, ratio, tmp_path):
    points = clouds()[name]
    np.save(tmp_path / f"{name}.npy", points)
    options = "--ratio", str(ratio), "--out", "picture.png", "--device", "cpu"
    done = run("pooling_levels.py", tmp_path, f"{name}.npy", *options)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(scan|\d) +([\d,]+) +([\d.]+|-)(?: +([\d.]+|-) +([\d.]+ x|-) +[\d.]+ ms)?$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["scan", "1", "2", "3"]
    points = points[np.isfinite(points).all(axis=1)].astype(np.float64)
    n = len(points)
    for _, count, spacing, _, _ in rows:
        assert int(count.replace(",", "")) == n
        assert (spacing == "-") == (n == 1)
        n = -(-n // ratio)
    for _, _, spacing, apart, times in rows[:3]:
        if name in ("point", "equal"):
            assert (apart, times) == ("-" if name == "point" else "0.000", "-")
        else:
            assert float(apart) > float(spacing) > 0
            assert float(times.removesuffix(" x")) == pytest.approx(float(apart) / float(spacing), abs=0.06)
    assert rows[3][3] == ""  # nothing is pooled after the last level
    if name != "point":
        assert float(rows[0][2]) == pytest.approx(KDTree(points).query(points, k=2)[0][:, 1].mean(), abs=6e-4)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npy", "picture.png"}
    if name == "sweep":  # each panel shows points and each close-up groups, in colour
        image = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
        for row in (image[115:600], image[650:1130]):
            for panel in np.array_split(row, 3, axis=1):
                assert (np.ptp(panel, axis=-1) > 0.25).sum() > 1000


def test_pooling_levels_of_no_scan(tmp_path):
    np.save(tmp_path / "nan.npy", np.full((7, 3), np.nan))
    done = run("pooling_levels.py", tmp_path, "nan.npy", "--device", "cpu")
    assert done.returncode == 1
    assert "nan.npy holds no finite points" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name, given", [*((name, 1) for name in clouds()), ("sweep", 2), ("spoiled", 2)])
def test_compare_scans(name, given, tmp_path):
    points = clouds()[name]
    files = [f"{name}.npy", "other.npy"][:given]
    for file, moved in zip(files, (points, points + np.float32([0.3, 0, 0])), strict=False):
        np.save(tmp_path / file, moved)
    done = run("compare_scans.py", tmp_path, *files, "--out", "picture.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(first|second) to (first|second) +([\d,]+)((?: +\d+\.\d{3}){5}) +[\d.]+ ms$", done.stdout, re.M
    )
    assert [row[:2] for row in rows] == [("first", "second"), ("second", "first")]
    points = points[np.isfinite(points).all(axis=1)]
    n = len(points)
    assert [int(row[2].replace(",", "")) for row in rows] == [n, n if given == 2 else -(-n // 2)]
    means, *percentiles = np.array([row[3].split() for row in rows], float).T
    assert (np.diff(percentiles, axis=0) >= 0).all()
    assert (means > 0).all() == (name not in ("point", "equal"))
    chamfer = float(
        re.search(r"^Chamfer distance, the sum of both means: ([\d.]+), by itself in", done.stdout, re.M)[1]
    )
    assert chamfer == pytest.approx(sum(means), abs=1.1e-3)
    if given == 2:
        moved = points + np.float32([0.3, 0, 0])
        pairs = [(points, moved), (moved, points)]
        assert means == pytest.approx([KDTree(to).query(at)[0].mean() for at, to in pairs], abs=6e-4)
    assert {path.name for path in tmp_path.iterdir()} == {*files, "picture.png"}
    if name == "sweep":  # the view, both close-ups and the histogram show distances, in colour
        image = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
        for place in (
            image[350:1000, 20:1180],
            image[100:540, 1220:1770],
            image[580:1010, 1220:1770],
            image[100:240, 20:380],
        ):
            assert (np.ptp(place, axis=-1) > 0.25).sum() > 500


def test_compare_scans_of_no_scan(tmp_path):
    np.save(tmp_path / "good.npy", lidar_like(100))
    np.save(tmp_path / "nan.npy", np.full((7, 3), np.nan))
    for files in (["nan.npy"], ["good.npy", "nan.npy"]):
        done = run("compare_scans.py", tmp_path, *files, "--device", "cpu")
        assert done.returncode == 1
        assert "nan.npy holds no finite points" in done.stderr
        assert "Traceback" not in done.stderr


def test_surface_normals(tmp_path):
    """Every point of a level ground and a wall is of the right kind, and the picture shows both."""
    ground = np.random.default_rng(0).random((3000, 3)) * [20, 20, 0.01]
    wall = ground[:1000][:, [0, 2, 1]] * [1, 1, 0.2] + [0, 20, 0]
    np.save(tmp_path / "scan.npy", np.concatenate([ground, wall]))
    viewpoint = "--viewpoint", "10", "10", "2"
    done = run("surface_normals.py", tmp_path, "scan.npy", *viewpoint, "--out", "picture.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"^(level|slanted|upright|no surface) +([\d,]+) +[\d.]+%$", done.stdout, re.M))
    level, slanted, upright, none = (int(counts[name].replace(",", "")) for name in counts)
    assert 2900 <= level <= 3000 and 900 <= upright <= 1000 and level + slanted + upright + none == 4000
    assert "4,000 normals from 16 points each" in done.stdout
    image = matplotlib.image.imread(tmp_path / "picture.png")[100:1000, 20:1780, :3]
    assert (np.ptp(image, axis=2) > 0.4).sum() > 500 < (image.min(axis=2) > 0.7).sum()
    assert run("surface_normals.py", tmp_path, "scan.npy", "--k", "2", "--device", "cpu").returncode == 1


def test_fewer_points(tmp_path):
    """All ways keep as many points, and farthest points leave the smallest gap."""
    points = np.random.default_rng(0).normal(size=(3000, 3)) * [9, 9, 1]
    np.save(tmp_path / "scan.npy", points)
    done = run("fewer_points.py", tmp_path, "scan.npy", "--voxel", "2", "--out", "picture.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    row = r"^(at random|one per voxel|farthest points) +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+)%"
    names, counts, mean, largest, near = zip(*re.findall(row, done.stdout, re.M), strict=True)
    assert len(names) == 3 and len(set(counts)) == 1 and 300 < int(counts[0].replace(",", "")) < 2000
    assert float(largest[2]) == min(map(float, largest)) < 2 and 0 < float(mean[1]) < float(mean[0])
    assert float(near[1]) > float(near[0])
    image = matplotlib.image.imread(tmp_path / "picture.png")[:, :, :3]
    assert (image.max(axis=2) - image.min(axis=2) > 0.4).sum() > 2000  # the points that are kept
    assert run("fewer_points.py", tmp_path, "scan.npy", "--voxel", "0", "--device", "cpu").returncode == 1


NUMBER = r" +[\d.]+e[+-]\d+"


@pytest.mark.parametrize("name", clouds())
def test_threshold_study(name, tmp_path):
    np.save(tmp_path / f"{name}.npy", clouds()[name])
    options = "--points", "150", "--out", "picture.png", "--device", "cpu"
    done = run("threshold_study.py", tmp_path, f"{name}.npy", *options)
    if name in ("point", "equal"):
        assert done.returncode == 1
        assert "two samples need at least 16 different points, got 1" in done.stderr
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    studies = re.split(r"\n(?=.*: samples of 150 points, [\d.e+-]+ apart\n)", done.stdout)[1:]
    assert [study.partition(":")[0] for study in studies] == ["sphere", "torus", "terrain", f"{name}.npy"]
    for study in studies:
        rows = re.findall(rf"^ {{16}} +(1e-\d\d) +([\d.]+) +([\d,]+)((?:{NUMBER}){{6}})$", study, re.M)
        assert [row[0] for row in rows] == 2 * [f"1e-{power:02}" for power in range(2, 15, 2)]
        pairs = np.array([row[1] for row in rows], float).reshape(2, 7)
        assert (np.diff(pairs, axis=1) >= 0).all() and (pairs[:, 0] < 3).all() and (pairs[:, -1] > 5).all()
        errors = np.array([row[3].split() for row in rows], float).reshape(2, 7, 6)
        for found in errors:
            dropped, dropped_bound, plan, plan_bound, loss, gradient = found.T
            assert (dropped <= dropped_bound).all() and (plan <= 1.01 * plan_bound + 1e-7).all()
            for of_one in (plan, loss, gradient):
                assert of_one[0] > 1e-4 and of_one[-1] < 0.1 * of_one[0] + 1e-6
        assert (
            len(
                re.findall(
                    rf"gradient at 1e-08 by (?:iterations|spacing):(?: [\d.e+-]+:{NUMBER},?){{4,7}}$", study, re.M
                )
            )
            == 4
        )
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.npy", "picture.png"}
    if name == "sweep":  # each cloud and each plot shows something, in colour
        image = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
        for strip in (image[100:390], image[470:790], image[890:1210]):
            for panel in np.array_split(strip[:, 20:1780], 4, axis=1):
                assert (np.ptp(panel, axis=-1) > 0.25).sum() > 500


SMALL = "--epochs", "2", "--crops", "1", "--points", "128", "--voxel", "1.5", "--channels", "16", "--device", "cpu"
EPOCH = r"^(\d) +([\d.]+) +([\d.]+) +[\d,]+ +([\d.]+) +([\d.]+) +[\d,]+$"


def test_torch_segmentation_block(tmp_path):
    pytest.importorskip("torch")
    runs = [run("torch_segmentation_block.py", tmp_path, *SMALL, "--batch", "6") for _ in range(2)]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    assert "made-up streets" in runs[0].stdout
    first, again = (np.array(re.findall(EPOCH, done.stdout, re.M), float) for done in runs)
    assert first[:, 0].tolist() == [1, 2]
    assert (first == again).all()
    assert (first[1, [1, 3]] < first[0, [1, 3]]).all()  # it learns
    assert ((first[:, [2, 4]] > 0) & (first[:, [2, 4]] < 1)).all()
    assert not list(tmp_path.iterdir())


def test_torch_segmentation_block_in_two_processes(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    alone = run("torch_segmentation_block.py", tmp_path, *SMALL, "--batch", "6")
    torchrun = "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"
    command = [sys.executable, "-m", *torchrun, str(EXAMPLES / "torch_segmentation_block.py"), *SMALL, "--batch", "3"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    both = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    # Threads of gloo that DDP leaves may abort the interpreter at exit (torch 2.13), after everything is printed.
    assert both.returncode == 0 or "terminate called without an active exception" in both.stderr, both.stderr
    assert "2 processes" in both.stdout
    one, two = (np.array(re.findall(EPOCH, done.stdout, re.M), float) for done in (alone, both))
    assert two == pytest.approx(one, rel=5e-3)  # crops and gradients are the same, but sums are taken in another order


def test_torch_segmentation_block_without_sweeps(tmp_path):
    pytest.importorskip("torch")
    done = run("torch_segmentation_block.py", tmp_path, *SMALL, "--data", "nothing")
    assert done.returncode == 1
    assert "semantickitti must hold sweeps" in done.stderr
    assert "Traceback" not in done.stderr


FEW = {  # the fields of a small network
    "channels": [8, 16],
    "depths": [1, 1],
    "decoder_channels": [8],
    "decoder_depths": [1],
    "heads": [1, 1],
    "decoder_heads": [1],
    "hashes": ["zorder_div", "xor_div"],
    "strides": [1, 1],
    "bucket_size": 32,
    "scope": 2,
    "mlp": 1,
}
SEQUENCES = "00", "01", "02", "03", "04", "05", "07", "09", "10"


def write_sweeps(folder, sequences=SEQUENCES):
    """Sweeps in the form of SemanticKITTI's: ground, walls, and some points without a class."""
    (folder / "semantickitti").mkdir()
    for seed, name in enumerate(sequences):
        points, rng = lidar_like(800, seed), np.random.default_rng(seed)
        labels = np.where(points[:, 2] < np.median(points[:, 2]), 8, 12).astype(np.uint8)
        labels[::20] = 255
        arrays = {"xyz": (points / 0.005).astype(np.int16), "remission": rng.integers(0, 256, 800, np.uint8)}
        np.savez(folder / "semantickitti" / f"{name}_000000.npz", **arrays, label=labels)


def test_train_segmentation(tmp_path):
    write_sweeps(tmp_path)
    (tmp_path / "few.json").write_text(json.dumps(FEW))
    small = "--steps", "2", "--points", "200", "--config", "few.json", "--device", "cpu", "--fold", "1"
    done = run("train_segmentation.py", tmp_path, *small, "--data", ".", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "training: 6 sweeps of sequences 00 02 03 04 07 09; unseen: 01 05 10" in done.stdout
    assert "2 steps of 1 x 200 points" in done.stdout
    rows = re.findall(r"^([a-z ]+?) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    table = {name: np.array(values, float) for name, *values in rows}
    assert list(table) == ["road", "building", "mean", "mean of common"]  # the classes that occur
    assert np.abs(table["mean"] - (table["road"] + table["building"]) / 2).max() < 0.11
    assert 0 < table["mean"].max() <= 100
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights.safetensors", "picture.png"}
    _, config = flash3d.load(tmp_path / "out" / "weights.safetensors")
    assert (config.channels, config.in_channels, config.classes) == ((8, 16), 16, 19)
    task = flash3d.load_task(tmp_path / "out" / "weights.safetensors")
    assert task.voxel == 0.2 and task.classes[8] == "road" and task.features[1:3] == ("intensity", "linearity_8")
    image = matplotlib.image.imread(tmp_path / "out" / "picture.png")[..., :3]
    truth, prediction = np.array_split(image[110:880], 2, axis=1)
    assert (np.ptp(truth, axis=-1) > 0.25).sum() > 500
    assert (prediction.max(axis=-1) > 0.4).sum() > 500  # two steps may call everything vegetation, which is grey


def test_train_segmentation_continues_after_an_interrupt(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train_segmentation")
    write_sweeps(tmp_path)
    (tmp_path / "few.json").write_text(json.dumps(FEW))

    def main(out, *more):
        options = "--steps", "4", "--points", "100", "--config", str(tmp_path / "few.json"), "--device", "cpu"
        return example.main([*options, "--data", str(tmp_path), "--out", str(tmp_path / out), *more])

    assert main("unbroken") == 0
    step = flash3d.Trainer.step

    def interrupted(trainer, *batch):
        if trainer.done_steps == 2:
            raise KeyboardInterrupt
        return step(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(flash3d.Trainer, "step", interrupted)
        assert main("broken") == 130
    assert "interrupted after 2 steps; the same command continues" in capsys.readouterr().err
    assert main("broken", "--seed", "1") == 1
    assert "another --config, --steps or --seed" in capsys.readouterr().err
    assert main("broken") == 0
    assert "continues after 2 steps" in capsys.readouterr().out
    weights = [(tmp_path / out / "weights.safetensors").read_bytes() for out in ("unbroken", "broken")]
    assert weights[0] == weights[1]
    assert len(list((tmp_path / "broken").iterdir())) == 2
    assert main("other", "--seed", "1") == 0
    assert (tmp_path / "other" / "weights.safetensors").read_bytes() != weights[0]


def test_train_segmentation_on_made_up_streets(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("train_segmentation")
    monkeypatch.setattr(example, "VOXEL", 1.5)  # fewer points
    (tmp_path / "few.json").write_text(json.dumps(FEW))
    small = "--steps", "1", "--points", "100", "--config", str(tmp_path / "few.json"), "--device", "cpu"
    assert example.main([*small, "--out", str(tmp_path / "out")]) == 0
    assert "made-up streets, because there is no --data, on the CPU" in capsys.readouterr().out


def test_train_segmentation_without_sweeps(tmp_path):
    write_sweeps(tmp_path, SEQUENCES[:-1])
    done = run("train_segmentation.py", tmp_path, "--data", ".", "--device", "cpu")
    assert done.returncode == 1
    assert "must hold sweeps SS_FFFFFF.npz of the sequences 00 01 02 03 04 05 07 09 10, got none of 10" in done.stderr
    done = run("train_segmentation.py", tmp_path, "--config", "huge", "--device", "cpu")
    assert done.returncode == 1
    assert "huge" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_completion(library, tmp_path):
    pytest.importorskip(library)
    if importlib.util.find_spec(f"gpu3d.interop.{library}") is None:
        pytest.skip(f"no gpu3d.interop.{library} yet")
    small = "--steps", "25", "--batch", "4", "--points", "64", "--seeds", "1", "--device", "cpu", "--out", "picture.png"
    done = run("completion.py", tmp_path, "--library", library, *small)
    assert done.returncode == 0, done.stderr
    assert "made-up boxes and rings" in done.stdout
    rows = re.findall(r"^0 +(APML|Chamfer) +([\d.]+) +([\d.]+) +[\d.]+ ms$", done.stdout, re.M)
    assert [row[0] for row in rows] == ["APML", "Chamfer"]
    distances = np.array([row[1:] for row in rows], float)
    assert (distances[0] != distances[1]).all() and ((distances > 0.05) & (distances < 0.5)).all()
    change = float(re.search(r"^EMD with APML: ([+-][\d.]+) %", done.stdout, re.M)[1])
    assert change == pytest.approx(100 * (distances[0, 0] / distances[1, 0] - 1), abs=0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"picture.png"}
    image = matplotlib.image.imread(tmp_path / "picture.png")[..., :3]
    for row in range(4):  # the seen half is grey, the others are in colour
        for panel in np.array_split(image[115 + 276 * row : 350 + 276 * row], 4, axis=1)[1:]:
            assert (np.ptp(panel, axis=-1) > 0.25).sum() > 500


def test_completion_in_torch_without_shapes(tmp_path):
    pytest.importorskip("torch")
    done = run("completion.py", tmp_path, "--data", "nothing")
    assert done.returncode == 1
    assert "modelnet10_vox32_train.npz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sweep", "far", "spoiled"])
def test_cupy_torch_jax(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    np.save(tmp_path / f"{name}.npy", clouds()[name])
    done = run("cupy_torch_jax.py", tmp_path, f"{name}.npy", "--points", "700", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +\[(\d+), 3\] +(0x[0-9a-f]+) +(\w+) +the same$", done.stdout, re.M)
    assert [row[0] for row in rows] == [row[3] for row in rows] == ["numpy", "torch", "jax"]
    assert len({row[1:3] for row in rows}) == 1
    end = re.search(r"^the end +([\d.]+), by JAX; by torch ([\d.]+)$", done.stdout, re.M)
    assert float(end[1]) == pytest.approx(float(end[2]), abs=2e-5)
    first = float(re.search(r"^1 +([\d.]+)$", done.stdout, re.M)[1])
    assert float(end[1]) < 0.9 * first
