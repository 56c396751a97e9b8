# SPDX-License-Identifier: Apache-2.0
"""What the hash of the GPU record is of."""

from __future__ import annotations

from gpu_record import code, hashed_files

PYTHON = '''"""A module."""

# A comment.
x = "# no comment"  # and why


def f():
    """Several
    lines."""
    return """no docstring"""
'''


def test_prose_is_not_hashed():
    left = '\n\nx = "# no comment"  # and why\n\n\ndef f():\n    return """no docstring"""\n'
    assert code(PYTHON, ".py").lstrip("\n") == left.lstrip("\n")
    assert code(PYTHON.replace("Several", "A few"), ".py") == code(PYTHON, ".py")
    assert code(PYTHON.replace("no docstring", "another"), ".py") != code(PYTHON, ".py")
    assert code("// A kernel.\n    // Why.\nint x = 1;  // 1\n", ".cu") == "int x = 1;  // 1\n"


def test_kernels_and_launching_modules_are_hashed():
    names = {file.name for file in hashed_files()}
    assert {"buckets_merge.cu", "early.cuh", "launcher.py", "network.py", "backbone.py"} <= names
    assert not {"las.py", "plot.py", "convert.py"} & names
