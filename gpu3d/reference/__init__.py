# SPDX-License-Identifier: Apache-2.0
"""The same ops in NumPy and SciPy: what runs on the CPU, and the oracle of every test."""
