# SPDX-License-Identifier: Apache-2.0
"""The plans of farthest_points and voxel_downsample, without a GPU."""

from __future__ import annotations

import numpy as np
import plans
import pytest
from test_plans import LENGTHS, strided

from gpu3d import sampling as op
from gpu3d._arrays import FLOATS, INT32, INT64, Spec
from gpu3d.cuda import sampling
from gpu3d.cuda.plan import DEVICES


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), (), (8192, 5), (8193,), (4097, 0)], ids=str)
def test_farthest_points(lengths, arch):
    device, n = DEVICES[arch], sum(lengths)
    for dtype in FLOATS:
        for points in (Spec((n, 3), dtype), Spec((n, 2), dtype), strided((n, 3), dtype)):
            call = sampling.farthest_points(points, lengths, 100, 0, device)
            plans.check(call, [points], op.farthest_results(len(lengths), 100), device)


def test_the_largest_cloud_decides_which_kernel_runs():
    def kernels(dtype, *lengths):
        call = sampling.farthest_points(Spec((sum(lengths), 3), np.dtype(dtype)), lengths, 5, 0, DEVICES["sm_90a"])
        return [(step.kernel.function, step.block) for step in call.plan.steps if hasattr(step, "kernel")]

    assert kernels("float32", 1024) == [("farthest_points", 128)]
    assert kernels("float32", 1025, 3) == [("farthest_points", 256)]
    assert kernels("float32", 8192) == kernels("float64", 4096) == [("farthest_points", 1024)]
    for large in (kernels("float32", 7, 8193), kernels("float64", 4097)):
        assert large[-1] == ("pruned_points", 1024) and len(large) == 5
    assert [function for function, _ in kernels("float16", 8192)] == ["convert_rows", "farthest_points"]


@pytest.mark.parametrize("lengths", [*LENGTHS.values(), (), (0, 0)], ids=str)
def test_voxel_downsample(lengths):
    device, n = DEVICES["sm_90a"], sum(lengths)
    results = Spec((n,), INT32), Spec((n,), INT32), Spec((n + 1,), INT32), Spec((len(lengths),), INT64)
    for dtype in FLOATS:
        for points in (Spec((n, 3), dtype), Spec((n, 2), dtype), strided((n, 3), dtype)):
            plans.check(sampling.voxels(points, lengths, 0.1), [points], results, device)
            _, members, starts, _ = results
            for voxels in {0, min(n, 1), n}:
                made = [*op.voxel_results(points, voxels)]
                plans.check(sampling.voxel_rows(points, None, voxels, "mean"), [points, members, starts], made, device)
                for features in (Spec((n, 64), FLOATS[3]), Spec((n,), FLOATS[0]), strided((n, 2, 0), FLOATS[1])):
                    call = sampling.voxel_rows(points, features, voxels, "max")
                    made[2:] = [Spec((voxels, *features.shape[1:]), features.dtype)]
                    plans.check(call, [points, members, starts, features], made, device)


def test_one_plan_serves_clouds_of_nearly_the_same_size():
    device = DEVICES["sm_90a"]
    for n, m in ((3000, 3050), (120_000, 121_000)):
        one, other = (Spec((count, 3), FLOATS[0]) for count in (n, m))
        calls = [sampling.farthest_points(one, (n,), k, 3, device).plan for k in (10, 20)]
        assert calls[0] is calls[1] is sampling.farthest_points(other, (m,), 10, 0, device).plan
        assert sampling.voxels(one, (n,), 0.1).plan is sampling.voxels(other, (m,), 0.5).plan
        rows = [sampling.voxel_rows(x, None, v, "mean").plan for x, v in ((one, 900), (other, 1000))]
        assert rows[0] is rows[1]
