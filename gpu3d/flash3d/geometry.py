# SPDX-License-Identifier: Apache-2.0
"""Where the points of each level lie, who attends to whom, and who is pooled into whom.

Two layouts stand beside each other in a level. The *local* layout keeps neighbours in one pooling tile: level 0 is
bucketized by zorder_div, and each further level is what pooling leaves. The *stage* layout is bucketized by the level's
own hash, and the features of a stage lie in its slots. Pooling takes place in the local layout. Its members are then
renumbered to stage slots, so that features move between stages by one gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu3d.buckets import Buckets, Scopes, bucketize, scopes
from gpu3d.flash3d.config import Config
from gpu3d.pooling import bucket_pool

LOCAL_HASH = "zorder_div"


class Level(NamedTuple):
    """One level in its stage layout. The arrays are of the library of the points."""

    buckets: Buckets  # the stage layout. Level 0 numbers the caller's points; others number the pooled points
    positions: Any  # float32 [num_slots, 3], 0 in padding
    scopes: tuple[Scopes, Scopes]  # of even blocks, and of odd ones, which are shifted and may be strided
    members: Any  # int32 [slots of the next level, ratio]: slots pooled into each, -1 where empty; None in the deepest


def geometry(points: Any, config: Config, lengths: Sequence[int] | None = None) -> tuple[Level, ...]:
    """The levels of a batch of clouds.

    Parameters
    ----------
    points : array float32 [N, 3]
        NumPy, CuPy, torch or JAX. Non-finite coordinates are not checked for: they count as the last voxel of their
        axis.
    config : Config
    lengths : sequence of int, optional
        Points of each cloud. Default: one cloud.

    Returns
    -------
    tuple of Level
        From level 0 down.

    Examples
    --------
    >>> from gpu3d import flash3d
    >>> from gpu3d.flash3d.geometry import geometry
    >>> points = np.random.default_rng(0).random((3000, 3), dtype=np.float32)
    >>> levels = geometry(points, flash3d.presets["tiny"])
    >>> [level.buckets.lengths for level in levels]
    [(3000,), (1500,), (750,), (375,)]
    """
    size = config.bucket_size
    local = bucketize(points, size, lengths=lengths, hash=LOCAL_HASH, check_finite=False)
    levels: list[Level] = []
    members = None  # local slots of the level above, by local slot
    to_stage = None  # the stage slot of each local slot of the level above
    for hash, stride in zip(config.hashes, config.strides, strict=True):
        if not levels and hash == LOCAL_HASH:
            stage = local
        else:
            stage = bucketize(points, size, lengths=local.lengths, hash=hash, check_finite=False)
        if levels:
            in_stage_order = stage.scatter(local.gather(members), fill=-1)
            levels[-1] = levels[-1]._replace(members=_renumber(in_stage_order, to_stage))
        windows = scopes(stage, config.scope), scopes(stage, config.scope, shift=config.scope // 2, stride=stride)
        levels.append(Level(stage, stage.scatter(points), windows, None))
        if len(levels) < config.levels:
            to_stage = local.scatter(stage.point_to_slot, fill=-1)
            in_slots = local.scatter(points)
            pooled = bucket_pool(in_slots[:, :0], in_slots, local, ratio=config.ratio)
            local, members = pooled.buckets, pooled.members
            points = local.gather(pooled.points)
    return tuple(levels)


def _renumber(slots: Any, new: Any) -> Any:
    """new[slots], and -1 where a slot is -1. Both are arrays of one library."""
    return (new[slots] + 1) * (slots >= 0) - 1  # in every library, traced by torch or JAX too
