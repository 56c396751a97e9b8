# SPDX-License-Identifier: Apache-2.0
"""Peers of the Flash3D backbone: two torch models with the same layers, channels, depths, heads and parameters.

- `Twin` has gpu3d's layouts and pooling, and torch's scaled_dot_product_attention over ready-made windows. `scene`
  computes the geometry and the windows, before anything is timed. Windows with the same number of points are one call
  without a mask. A step has no shape that depends on data, so it can be compiled and captured in a CUDA graph.
- `SerializedTwin` is like Point Transformer V3 (Wu et al., 2024) and does everything by itself: it sorts the points
  along four curves (z, Hilbert, and both with x and y exchanged), shuffles them, cuts each into patches, the last of
  which is filled up with points of the patch before, and pools the points of each voxel into their maximum, with voxels
  that double from level to level. PTv3's sparse convolutions, two thirds of its parameters, are left out in its favour;
  the rotary position codes of Flash3D stand in for them. torch.unique has a result whose size depends on data, so a
  step cannot be captured.

Drop path is on in training. Parameters are bfloat16, without float32 masters, which is faster than autocast. But steps
of norms are then lost in rounding, so for a training whose accuracy counts take dtype=torch.float32 and autocast. The
loss is that of gpu3d, cross-entropy plus Lovasz-softmax, and the optimizer is torch's fused AdamW.

`inference` and `training_step` return calls for `timing`. This module imports torch, so import it when it is needed.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from gpu3d import Buckets, Scopes
from gpu3d.flash3d import Config
from gpu3d.flash3d.geometry import Level, geometry
from gpu3d.interop.torch import Flash3D, gather, scatter

PATCH = 1024  # points
VOXEL = 0.05  # m; PTv3's for nuScenes
IGNORE = 255
RATE, WEIGHT_DECAY = 2e-3, 5e-3  # of AdamW
# The fastest first. cuDNN's is the fastest on Hopper, where torch has it.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


# ---- calls ---------------------------------------------------------------------------------------------------------


def inference(model: Flash3D, *inputs: Any, compiled: bool = True) -> timing.Call:
    """A call of the model, which returns logits."""
    model.eval()
    run = torch.compile(model) if compiled else model

    def call() -> torch.Tensor:
        with torch.no_grad(), _backends():
            return run(*inputs)

    return call


def training_step(model: Flash3D, labels: torch.Tensor, *inputs: Any, compiled: bool = True) -> timing.Call:
    """A call of one training step: forward, loss, backward and AdamW. It returns the loss."""
    model.train()
    run = torch.compile(model) if compiled else model  # not the loss: torch 2.11 cannot compile its cumsum on a GPU
    options = {"fused": True, "capturable": labels.is_cuda}
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY, **options)

    def call() -> torch.Tensor:
        with _backends():
            loss = segmentation_loss(run(*inputs), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return call


@contextlib.contextmanager
def _backends() -> Iterator[None]:
    with sdpa_kernel(BACKENDS, set_priority=True):
        yield


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, ignore: int = IGNORE) -> torch.Tensor:
    """Cross-entropy plus Lovasz-softmax in float32. No shape depends on the labels, and nothing waits for the GPU."""
    logits, valid = logits.float(), labels != ignore
    labels = torch.where(valid, labels, 0)
    cross_entropy = (functional.cross_entropy(logits, labels, reduction="none") * valid).sum() / valid.sum().clamp(1)
    # A class is a row: torch sums a column with one thread.
    truth = (functional.one_hot(labels, logits.shape[1]) * valid[:, None]).T.contiguous()
    errors = (truth - logits.softmax(1).T).abs()
    # Ignored points come last and have error 0.
    ranked, order = torch.where(valid, errors, -1.0).sort(dim=1, descending=True, stable=True)
    foreground, present, count = truth.gather(1, order), truth.any(1), truth.sum(1, keepdim=True)
    intersection = count - foreground.cumsum(1)
    union = count + (1 - foreground).cumsum(1)
    jaccard = 1 - intersection / union
    slopes = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    losses = (ranked.clamp(min=0) * slopes).sum(1)
    return cross_entropy + torch.where(present, losses, 0).sum() / present.sum().clamp(1)


# ---- attention by torch --------------------------------------------------------------------------------------------


def _attend(qkv: torch.Tensor, groups: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Attention of rows [n, 3, H, D] that lie window by window. A group is (windows, rows of each window)."""
    found = []
    for rows, group in zip(qkv.split([count * size for count, size in groups]), groups, strict=True):
        q, k, v = rows.unflatten(0, group).permute(2, 0, 3, 1, 4)
        found.append(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _grouped(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """The rows of all windows, with windows of one size side by side, and the groups."""
    by_size = defaultdict(list)
    for window in windows:
        by_size[len(window)].append(window)
    groups = tuple((len(found), size) for size, found in by_size.items())
    return np.concatenate([row for found in by_size.values() for row in found]), groups


# ---- on gpu3d's layouts --------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """The points of each scope, in the place of a Scopes."""

    layout: Buckets | None  # moves slots to the order of the windows; None if they lie in that order, padding last
    groups: tuple[tuple[int, int], ...]


class WindowAttention(torch.nn.Module):
    """In the place of gpu3d's attention, over Windows."""

    def forward(self, qkv: torch.Tensor, buckets: Buckets, windows: Windows) -> torch.Tensor:
        if windows.layout is not None:
            return gather(_attend(scatter(qkv, windows.layout), windows.groups), windows.layout)
        points = sum(buckets.lengths)
        return functional.pad(_attend(qkv[:points], windows.groups), (0, 0, 0, 0, 0, len(qkv) - points))


class Twin(Flash3D):
    """Takes the result of `scene`."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(config)
        _prepare(self, WindowAttention, dtype)

    def forward(self, levels: Sequence[Level], features: torch.Tensor) -> torch.Tensor:
        return self.logits(levels, features.to(self.stem.weight.dtype))


def _prepare(model: Flash3D, attention: Any, dtype: torch.dtype) -> None:
    """Replace the attention of all blocks, and convert the parameters. Wave numbers stay float32."""
    for stage in (*model.encoder, *model.decoder):
        for block in stage.blocks:
            block.attention = attention()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def scene(points: torch.Tensor, config: Config, lengths: Sequence[int] | None = None) -> tuple[Level, ...]:
    """The levels of a batch of clouds, with Windows in the place of Scopes."""
    levels = geometry(points.float(), config, lengths)
    return tuple(
        level._replace(scopes=tuple(_windows(scopes, level.buckets) for scopes in level.scopes)) for level in levels
    )


def _windows(scopes: Scopes, buckets: Buckets) -> Windows:
    slot_to_point = buckets.slot_to_point.cpu().numpy()
    slots = np.arange(buckets.num_slots).reshape(-1, buckets.bucket_size)
    rows = [slots[table[table >= 0]].reshape(-1) for table in scopes.table.cpu().numpy()]
    order, groups = _grouped([row[slot_to_point[row] >= 0] for row in rows] or [np.arange(0)])
    if (order == np.arange(len(order))).all():
        return Windows(None, groups)
    inverse = np.full(buckets.num_slots, -1)
    inverse[order] = np.arange(len(order))
    arrays = [torch.tensor(x, dtype=torch.int32, device=buckets.moved.device) for x in (order, inverse, 0)]
    # Here a slot of gpu3d's layout is a "point", and its place in the windows is its "slot".
    return Windows(Buckets(*arrays, len(order), (buckets.num_slots,), (0, 1)), groups)


# ---- by serialization ----------------------------------------------------------------------------------------------


class Patches(NamedTuple):
    """The points of each patch along one curve."""

    order: torch.Tensor  # the point at each place of the patches; some points have several places
    inverse: torch.Tensor  # the place of each point
    groups: tuple[tuple[int, int], ...]


class Cells(NamedTuple):
    """A level of `SerializedTwin`."""

    positions: torch.Tensor
    scopes: tuple[Patches, ...]  # one per curve, for the blocks in turn
    parent: torch.Tensor | None  # the point of this level that each point above is pooled into
    buckets: None = None


class PatchAttention(torch.nn.Module):
    """In the place of gpu3d's attention, over Patches."""

    def forward(self, qkv: torch.Tensor, buckets: None, patches: Patches) -> torch.Tensor:
        return _attend(qkv[patches.order], patches.groups)[patches.inverse]


class SerializedTwin(Flash3D):
    """Takes points, features and lengths.

    `voxel` is the side of the voxels of level 0 in metres, and `patch` how many points attend to each other.
    """

    def __init__(
        self, config: Config, dtype: torch.dtype = torch.bfloat16, voxel: float = VOXEL, patch: int = PATCH
    ) -> None:
        super().__init__(config)
        self.voxel, self.patch = voxel, patch
        _prepare(self, PatchAttention, dtype)

    def forward(
        self, points: torch.Tensor, features: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        levels = serialize(points, self.config.levels, lengths or [len(points)], self.voxel, self.patch)
        x = self.stem(features.to(self.stem.weight.dtype))
        skips = []
        for level, stage in zip(levels, self.encoder, strict=True):
            if level.parent is not None:
                x = stage.down(_maximum(x, level.parent, len(level.positions)))
            x = stage.blocks(x, level)
            skips.append(x)
        for i in reversed(range(len(self.decoder))):
            stage = self.decoder[i]
            x = stage.up(x)[levels[i + 1].parent] + stage.skip(skips[i])
            x = stage.blocks(x, levels[i])
        return self.head(x)


def _maximum(x: torch.Tensor, parent: torch.Tensor, count: int) -> torch.Tensor:
    index = parent[:, None].expand_as(x)
    return x.new_zeros(count, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)


@torch.compiler.disable  # it reads numbers of points on the host
def serialize(
    points: torch.Tensor, levels: int, lengths: Sequence[int], voxel: float = VOXEL, patch: int = PATCH
) -> list[Cells]:
    """The levels of a batch of clouds, from level 0 down."""
    grid = ((points - points.amin(0)) / voxel).long()
    bits = int(grid.max()).bit_length()
    exchanged = grid[:, [1, 0, 2]]
    cloud = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(points.device)
    curves = [curve(x, bits) for curve in (_zorder, _hilbert) for x in (grid, exchanged)]
    codes = torch.stack([cloud << 3 * bits | curve for curve in curves])
    found = [Cells(points, _patches(codes, lengths, patch), None)]
    for _ in range(1, levels):
        bits, codes = max(bits - 1, 0), codes >> 3 if bits else codes
        cells, parent, counts = torch.unique(codes[0], return_inverse=True, return_counts=True)
        sums = points.new_zeros(len(cells), 3).index_add(0, parent, points)
        points = sums / counts[:, None]
        lengths = torch.bincount(cells >> 3 * bits, minlength=len(lengths)).tolist()
        # All points of a cell have the same codes, so it does not matter whose are kept.
        codes = codes.new_empty(4, len(cells)).scatter(1, parent.expand(4, -1), codes)
        found.append(Cells(points, _patches(codes, lengths, patch), parent))
    return found


def _patches(codes: torch.Tensor, lengths: Sequence[int], patch: int) -> tuple[Patches, ...]:
    """The patches of each curve, in random order."""
    places, groups = _grouped(_patch_rows(lengths, patch))
    places = torch.from_numpy(places).to(codes.device)
    found = []
    for i in torch.randperm(len(codes)).tolist():
        order = codes[i].argsort()[places]
        inverse = torch.empty_like(codes[i]).scatter_(0, order, torch.arange(len(order), device=order.device))
        found.append(Patches(order, inverse, groups))
    return tuple(found)


def _patch_rows(lengths: Sequence[int], patch: int) -> list[np.ndarray]:
    """Which points of sorted clouds make up each patch. A last patch that is short begins in the one before."""
    rows, first = [], 0
    for n in lengths:
        size = min(n, patch)
        for begin in range(0, n, patch):
            begin = min(begin, n - size)
            rows.append(np.arange(first + begin, first + begin + size))
        first += n
    return rows


def _zorder(grid: torch.Tensor, bits: int) -> torch.Tensor:
    """The Morton code: the bits of x, y and z in turn, x first."""
    code = torch.zeros_like(grid[:, 0])
    for bit in reversed(range(bits)):
        for x in grid.unbind(1):
            code = code << 1 | x >> bit & 1
    return code


def _hilbert(grid: torch.Tensor, bits: int) -> torch.Tensor:
    """The place along the Hilbert curve (Skilling, 2004)."""
    x = list(grid.unbind(1))
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for i in range(3):
            is_set = x[i] >> bit & 1 == 1
            swap = torch.where(is_set, 0, (x[0] ^ x[i]) & below)
            x[0] = torch.where(is_set, x[0] ^ below, x[0] ^ swap)
            x[i] = x[i] ^ swap if i else x[0]
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    flips = torch.zeros_like(x[2])
    for bit in range(1, bits):
        flips = flips ^ torch.where(x[2] >> bit & 1 == 1, (1 << bit) - 1, 0)
    return _zorder(torch.stack([y ^ flips for y in x], 1), bits)
