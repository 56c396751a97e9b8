# SPDX-License-Identifier: Apache-2.0
"""Checks that the tests of several file formats share."""

from __future__ import annotations

import re
import time
import tracemalloc

import numpy as np
import pytest

from gpu3d.io import read_cloud


def assert_same(cloud, expected):
    """Assert that points and attributes are equal, with their names and dtypes."""
    assert cloud.points.dtype == expected.points.dtype
    np.testing.assert_array_equal(cloud.points, expected.points)
    assert sorted(cloud.attributes) == sorted(expected.attributes)
    for name, values in expected.attributes.items():
        assert cloud.attributes[name].dtype == values.dtype, name
        np.testing.assert_array_equal(cloud.attributes[name], values, err_msg=name)


def error_of_bytes(path, data):
    """The text of the ValueError for these bytes, which must name the file and come at once, without much memory."""
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(f"cannot read {path}: ")) as caught:
        read_cloud(path)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    return str(caught.value)
