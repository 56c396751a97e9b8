# SPDX-License-Identifier: Apache-2.0
"""Raw rows without a header: .bin as in KITTI, .pcd.bin as in nuScenes, and the .label of SemanticKITTI."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpu3d.io.cloud import Cloud
from gpu3d.io.files import Source

WIDTHS = {".bin": 4, ".pcd.bin": 5}  # values of a point
NAMES = "x", "y", "z", "intensity", "ring"
SAMPLE = 10_000  # points that are looked at to tell 4 columns from 5


def read(source: Source) -> Cloud:
    """Read rows, or labels and the rows they belong to."""
    if source.ending == ".label":
        return _read_label(source)
    width = source.columns or WIDTHS[source.ending]
    if source.size % (4 * width):
        raise ValueError(
            f"{source.size} bytes are no whole number of points of {width} float32 values, {4 * width} bytes; "
            "the file is truncated, or pass the columns= that it has"
        )
    values = np.fromfile(source.stream, "<f4", source.size // 4)
    if source.columns is None:
        _warn_of_another_width(values, width)
    return _cloud_of(values.reshape(-1, width))


def _cloud_of(rows: np.ndarray) -> Cloud:
    names = [NAMES[i] if i < len(NAMES) else f"column_{i}" for i in range(rows.shape[1])]
    attributes = {name: rows[:, i].astype(np.float32) for i, name in enumerate(names) if i >= 3}
    return Cloud(rows[:, :3].astype(np.float32, order="C"), attributes)


def _warn_of_another_width(values: np.ndarray, width: int) -> None:
    """Rows of a wrong width are points too, but wrong ones. Only their values tell."""
    other = 9 - width
    if len(values) % other == 0 and not _plausible(values, width) and _plausible(values, other):
        warnings.warn(
            f"the values look like {other} columns, and were read as {width}: pass columns={other}, "
            f"or columns={width} to read them so without this warning",
            stacklevel=4,  # where read_cloud was called
        )


def _plausible(values: np.ndarray, width: int) -> bool:
    """Whether these could be rows of x, y, z, intensity and, if there are 5 columns, the ring."""
    rows = values[: SAMPLE * width].reshape(-1, width)
    intensity, rings = rows[:, 3], rows[:, 4:]
    near = np.count_nonzero(np.abs(rows[:, :3]) < 1e4) >= 0.9 * 3 * len(rows)  # some may be missing returns
    whole = (rings >= 0) & (rings <= 255) & (rings == np.floor(rings))
    return bool(near and not (intensity < 0).any() and whole.all())


def _read_label(source: Source) -> Cloud:
    if source.size % 4:
        raise ValueError(f"{source.size} bytes are no whole number of labels of 4 bytes; the file is truncated")
    path = _bin_of(source.path)
    if path.stat().st_size != 4 * source.size:
        raise ValueError(f"it holds {source.size // 4} labels, and {path} is {path.stat().st_size / 16:g} points")
    cloud = _cloud_of(np.fromfile(path, "<f4", source.size).reshape(-1, 4))
    labels = np.fromfile(source.stream, "<u4", source.size // 4)
    attributes = cloud.attributes | {"label": (labels & 0xFFFF).astype(np.uint16)}
    instance = (labels >> 16).astype(np.uint16)
    if instance.any():
        attributes["instance"] = instance
    return Cloud(cloud.points, attributes)


def _bin_of(path: Path) -> Path:
    """The points of a file of labels."""
    name = path.name[: -len(".label")] + ".bin"
    choices = path.absolute().parent.parent / "velodyne" / name, path.parent / name
    for choice in choices:
        if choice.is_file():
            return choice
    raise ValueError(f"the .bin file that has its points is neither {choices[0]} nor {choices[1]}")


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write rows, with 0 where an attribute is missing, or labels alone."""
    ending = cloud.meta["format"]
    if ending == ".label":
        label, instance = (_half(cloud, name) for name in ("label", "instance"))
        stream.write((label | instance << 16).data)
        return
    names = NAMES[3 : WIDTHS[ending]]
    if cloud.points.dtype != np.float32:
        raise ValueError(
            f"points are {cloud.points.dtype}, and a {ending} file holds float32: subtract an origin from large "
            "coordinates, then convert by points.astype(np.float32)"
        )
    rows = np.zeros((len(cloud), WIDTHS[ending]), "<f4")
    rows[:, :3] = cloud.points
    for name, values in cloud.attributes.items():
        if name not in names:
            raise ValueError(f"a {ending} file holds {' and '.join(names)}, and not the attribute {name}: leave it out")
        rows[:, NAMES.index(name)] = _exact(name, values)
    stream.write(rows.data)


def _half(cloud: Cloud, name: str) -> np.ndarray:
    """Half of the bits of the labels."""
    values = cloud.attributes.get(name)
    if values is None:
        if name == "label":
            raise ValueError("a .label file holds the attribute label, which this cloud does not have")
        return np.zeros(len(cloud), "<u4")
    if values.ndim != 1 or values.dtype.kind not in "iu" or ((values < 0) | (values > 0xFFFF)).any():
        raise ValueError(f"a .label file holds integers from 0 to 65535, and attribute {name} has others")
    return values.astype("<u4")


def _exact(name: str, values: np.ndarray) -> np.ndarray:
    """One float32 a point, equal to the values."""
    if values.ndim != 1:
        raise ValueError(f"attribute {name} has shape {list(values.shape)}, and this format holds one value a point")
    with np.errstate(over="ignore", invalid="ignore"):
        stored = values.astype(np.float32)
        if not np.array_equal(stored.astype(values.dtype), values, equal_nan=True):
            raise ValueError(f"float32 does not hold all values of attribute {name} ({values.dtype}) exactly")
    return stored
