# SPDX-License-Identifier: Apache-2.0
"""compare_clouds on the GPU: the bits of the reference, and its density-aware distance to 1e-6."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from conftest import poison
from test_metrics import BAD, check_bad_input
from test_neighbors import KINDS, assert_same_bits, pair, ragged, special
from test_neighbors_gpu import to_host

import gpu3d

pytestmark = pytest.mark.gpu

THRESHOLDS = (0.0, 0.02, 0.1, 1e300)


def check_compare(cp, x, y, note="", thresholds=THRESHOLDS, **lengths):
    expected = gpu3d.compare_clouds(x, y, thresholds=thresholds, **lengths)
    poison(cp, max(1 << 26, 300 * (x.nbytes + y.nbytes)))
    found = gpu3d.compare_clouds(cp.asarray(x), cp.asarray(y), thresholds=thresholds, **lengths)
    *got, density = to_host(found)
    assert_same_bits(got, expected[:-1], f"compare_clouds {note} {x.shape} {y.shape} {x.dtype}")
    assert density.dtype == expected[-1].dtype
    np.testing.assert_allclose(density, expected[-1], rtol=1e-6, atol=1e-6, err_msg=note)
    return found


def test_small_compare(cp):
    """For compute-sanitizer: clouds of one tile, of several, both in a batch, a large batch, NaN, an index."""
    for n, m in ((1, 1), (2, 33), (1023, 1024), (1025, 21), (5000, 3000)):
        check_compare(cp, *pair("near", n, m))
    lengths = {"x_lengths": [10, 3000, 1, 1025], "y_lengths": [7, 1, 2100, 1024]}
    check_compare(cp, *ragged(*lengths.values()), **lengths)
    x, y = ragged([10] * 70, [7] * 70, dtype="float64")
    check_compare(cp, x, y, x_lengths=[10] * 70, y_lengths=[7] * 70)
    points = special(2600)["spoiled"]
    check_compare(cp, points[:, :2], points[::-1, :2], "spoiled", ())
    for dtype in ("float32", "float64"):
        x, y = pair("near", 1300, 900, dtype=dtype)
        expected = gpu3d.compare_clouds(x, y)
        indices = [gpu3d.neighbor_index(cp.asarray(z)) for z in (x, y)]
        assert_same_bits(to_host(gpu3d.compare_clouds(*indices))[:-1], expected[:-1])


@pytest.mark.parametrize("name", special(10))
def test_special_clouds(cp, name):
    points = special(5000)[name]
    check_compare(cp, np.concatenate([points[:1500], clouds.uniform(100)]), points, name)


@pytest.mark.parametrize("kind", KINDS)
def test_large_clouds(cp, kind):
    check_compare(cp, *pair(kind, 131_073, 40_000), kind, tuple(np.linspace(0, 1, 64)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_of_equal_and_of_close_distances(cp, dtype):
    """All distances equal, two different ones, and many that differ in the last digit only."""
    y, spacing = np.zeros((1, 3), dtype), np.finfo(dtype).epsneg
    for n in (20, 21, 1024, 1025, 5001):
        for share in (0.0, 0.04, 0.05, 0.06):
            x = np.ones((n, 3), dtype)
            x[: int(share * n)] = 2
            check_compare(cp, x, y, f"{n} {share}")
        x = np.ones((n, 3), dtype)
        x[:, 0] = np.nextafter(dtype(1), dtype(2)) - np.arange(n, dtype=dtype) % 7 * spacing
        check_compare(cp, x, y, f"{n} close")


@pytest.mark.parametrize("stray", [0.0, -99999.0, 1e30])
def test_map_coordinates_and_strays(cp, stray):
    rng = np.random.default_rng(0)
    for n, m in ((300, 200), (5000, 2500)):
        x, y = (rng.random((size, 3)) * [2, 2, 0.1] + [5e5, 4.2e6, 100] for size in (n, m))
        x[7] = stray
        check_compare(cp, x, y, f"stray {stray}")
        check_compare(cp, x.astype(np.float32), y, f"mixed, stray {stray}")


def test_100_runs_give_the_same_bits(cp):
    x, y = (cp.asarray(z) for z in pair("near", 20_000, 30_000))
    expected = to_host(gpu3d.compare_clouds(x, y, thresholds=(0.1,)))
    for _ in range(100):
        assert_same_bits(to_host(gpu3d.compare_clouds(x, y, thresholds=(0.1,))), expected)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(cp, arguments, error, message):
    check_bad_input(arguments, error, message, cp.asarray)
