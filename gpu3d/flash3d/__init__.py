# SPDX-License-Identifier: Apache-2.0
"""The Flash3D backbone: a point transformer over buckets, with hand-written gradients and no framework.

Examples
--------
>>> from gpu3d import flash3d
>>> config = flash3d.presets["tiny"].replace(in_channels=1, classes=3, bucket_size=64)
>>> params = flash3d.init(config, seed=0)
>>> rng = np.random.default_rng(0)
>>> batch = flash3d.Batch(rng.random((500, 3)) * 20, rng.random((500, 1)), lengths=[300, 200])
>>> flash3d.forward(params, batch, config).shape
(500, 3)
"""

from gpu3d.flash3d.checkpoint import load, load_task, save
from gpu3d.flash3d.config import Config, presets
from gpu3d.flash3d.data import Task, augment, crop, features, mix, voxel_subset
from gpu3d.flash3d.model import Batch, compile, forward, loss_and_grad
from gpu3d.flash3d.params import count, init
from gpu3d.flash3d.train import Trainer

__all__ = [
    "Batch",
    "Config",
    "Task",
    "Trainer",
    "augment",
    "compile",
    "count",
    "crop",
    "features",
    "forward",
    "init",
    "load",
    "load_task",
    "loss_and_grad",
    "mix",
    "presets",
    "save",
    "voxel_subset",
]
