# SPDX-License-Identifier: Apache-2.0
"""benchmarks/segmentation.py at toy size on the CPU: its scores, its test, and that each side trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_examples import write_sweeps

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks import segmentation

example = segmentation.example


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of sweeps, and defaults of the example for them."""
    write_sweeps(tmp_path)
    options = {"config": "small", "steps": 2, "points": 200, "crops": 2}
    monkeypatch.setattr(example, "DEFAULTS", {"cpu": options, "gpu": options})
    monkeypatch.setattr(example, "array_library", lambda _: np)
    monkeypatch.setattr(segmentation, "TREES", 5)
    return tmp_path


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("side", ["flash3d", "twin", "floor"])
def test_a_side(side, small, capsys):
    pytest.importorskip({"flash3d": "numpy", "twin": "torch", "floor": "sklearn"}[side])
    segmentation.main([side, str(small), "--folds", "1", "0", "--seeds", "3"])
    found = lines(capsys)
    assert [(line["side"], line["fold"], line["seed"]) for line in found] == [(side, 1, 3), (side, 0, 3)]
    first = found[0]
    assert list(first["tables"]) == ["01", "05", "10"] and list(first["common"]) == ["fold", "01", "05", "10"]
    for name, table in first["tables"].items():
        sweep = example.prepare(example.read_sweeps(small)[name][0], np)
        counts = np.bincount(sweep.labels[sweep.labels != 255], minlength=19)
        assert (np.array(table).sum(axis=1) == counts).all()
    assert 0 <= first["present"]["fold"] <= 100
    if side == "floor":
        assert first["present"]["fold"] > 60  # what is above the median is a wall


def test_the_scores_are_those_of_the_example(small, capsys):
    segmentation.main(["flash3d", str(small), "--folds", "2", "--seeds", "1"])
    (line,) = lines(capsys)
    assert example.main(["--data", str(small), "--fold", "2", "--seed", "1", "--out", str(small / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {row[:18].strip(): row[18:].split() for row in printed}
    for title, classes in (("mean", "present"), ("mean of common", "common")):
        expected = [line[classes][name] for name in ("fold", "02", "03", "09")]
        assert list(map(float, rows[title])) == pytest.approx(expected, abs=0.06)  # both are rounded


def test_the_optimizer_of_the_twin():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_twin
    from gpu3d.flash3d import optim

    model = torch_twin.SerializedTwin(example.SMALL, torch.float32)
    optimizer, schedule = segmentation._adamw(model, 30)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (example.WEIGHT_DECAY, 0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    for step in range(30):
        expected = optim.one_cycle(step, 30, example.RATE)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2, rel=1e-9)
        optimizer.step()
        schedule.step()


# ---- scores --------------------------------------------------------------------------------------------------------


def test_sign_flip():
    assert segmentation.sign_flip([1.0] * 9) == 2 / 512
    assert segmentation.sign_flip([1.0, -1.0]) == 1
    assert segmentation.sign_flip([3.0, 1.0, -1.0]) == 6 / 8  # all but 3 - 1 - 1 and its opposite
    rng = np.random.default_rng(0)
    values = [segmentation.sign_flip(rng.standard_normal(6)) for _ in range(500)]
    assert np.mean(np.array(values) <= 0.25) == pytest.approx(0.25, abs=0.06)  # without a difference, p is uniform


def test_compare(tmp_path, capsys):
    rng, files = np.random.default_rng(0), []
    for side, right in (("ours", 30), ("theirs", 10)):
        file = tmp_path / f"{side}.jsonl"
        with file.open("w") as out:
            for seed in range(2):
                for fold, names in enumerate(example.FOLDS):
                    tables = {name: rng.integers(0, 5, (19, 19)) + right * np.eye(19, dtype=int) for name in names}
                    out.write(json.dumps(segmentation._line(side, fold, seed, tables, 1.0)) + "\n")
        files.append(file)
    segmentation.main(["compare", *map(str, files)])
    printed = capsys.readouterr().out
    ours = segmentation._read(files[0])
    pooled = segmentation.pooled(ours, example.CLASSES)
    table = sum(np.array(table) for line in ours[:3] for table in line["tables"].values())
    assert pooled[0] == pytest.approx(
        100 * np.mean(table.diagonal() / (table.sum(0) + table.sum(1) - table.diagonal()))
    )
    assert f"pooled, present   {np.mean(pooled):6.1f}  ({min(pooled):.1f} to {max(pooled):.1f})" in printed
    assert "ours: 6 trainings" in printed and "ours minus theirs, common, by sequence: +" in printed
    assert printed.count("p = 0.004") == 2
    segmentation.main(["compare", str(files[0])])
    assert "minus" not in capsys.readouterr().out
