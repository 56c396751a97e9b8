# SPDX-License-Identifier: Apache-2.0
"""What a call launches on a GPU: the ops' plans, and the compiler and launcher that run them.

A call goes op module -> `gpu3d.cuda.<op>` (which kernels, in which order, with which arguments: a `plan.Plan`)
-> `launcher` -> the driver. Building a plan needs no GPU and no CuPy.
"""
