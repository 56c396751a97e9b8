# SPDX-License-Identifier: Apache-2.0
"""Speed on a GPU, beside peers and floors measured in the same run: ``python -m benchmarks``.

`timing` measures, `data` makes the clouds, `table` holds a row and prints it; every suite is a module of its own.
"""
