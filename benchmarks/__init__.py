# SPDX-License-Identifier: Apache-2.0
"""Speed on a GPU, compared with peers and lower bounds measured in the same run: ``python -m benchmarks``.

`timing` measures, `data` makes the clouds, and `table` prints the rows. Every suite is a module of its own.
"""
