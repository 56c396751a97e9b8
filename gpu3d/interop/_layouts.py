# SPDX-License-Identifier: Apache-2.0
"""Layouts as an operator sees them: a bucket size and lengths, from which everything but the permutations follows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from gpu3d import buckets as layouts
from gpu3d.buckets import Buckets, Scopes
from gpu3d.pooling import Pooling


def num_slots(lengths: Sequence[int], bucket_size: int) -> int:
    return sum((n + bucket_size - 1) // bucket_size for n in lengths) * bucket_size


@functools.lru_cache(maxsize=1024)
def _cached_layout(lengths: tuple[int, ...], bucket_size: int) -> Buckets:
    return Buckets(None, None, None, bucket_size, lengths, layouts._bucket_offsets(lengths, bucket_size))


def layout(lengths: Sequence[int], bucket_size: int) -> Buckets:
    """What ops other than scatter and gather need of a Buckets: all but its arrays."""
    return _cached_layout(tuple(lengths), bucket_size)


def children(lengths: Sequence[int], ratio: int) -> tuple[int, ...]:
    return tuple([(n + ratio - 1) // ratio for n in lengths])


def scopes_of(table: Any, layout: Buckets) -> Scopes:
    return Scopes(table, table.shape[1], 0, 1, layout.bucket_size, layout.bucket_offsets)


def pooling(
    features: Any, members: Any, argmember: Any, bucket_size: int, lengths: Sequence[int], ratio: int, reduce: str
) -> Pooling:
    """What the backwards and unpooling need of a Pooling."""
    parent, child = layout(lengths, bucket_size), layout(children(lengths, ratio), bucket_size)
    return Pooling(features, None, child, members, ratio, reduce, argmember, parent)
