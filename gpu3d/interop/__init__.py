# SPDX-License-Identifier: Apache-2.0
"""gpu3d in frameworks: `gpu3d.interop.torch`, `gpu3d.interop.jax`, and converters between batch formats.

Importing this package imports no framework.
"""

from gpu3d.interop.batches import (
    batch_from_lengths,
    collate,
    cu_seqlens_from_lengths,
    lengths_from_batch,
    lengths_from_cu_seqlens,
    lengths_from_offset,
    offset_from_lengths,
    pack,
    pad,
)

__all__ = [
    "batch_from_lengths",
    "collate",
    "cu_seqlens_from_lengths",
    "lengths_from_batch",
    "lengths_from_cu_seqlens",
    "lengths_from_offset",
    "offset_from_lengths",
    "pack",
    "pad",
]
