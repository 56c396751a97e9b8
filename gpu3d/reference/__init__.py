# SPDX-License-Identifier: Apache-2.0
"""The same ops in NumPy and SciPy. They run for CPU arrays, and every test compares the GPU with them."""
