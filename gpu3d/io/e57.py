# SPDX-License-Identifier: Apache-2.0
"""Reads and writes .e57 (ASTM E2807) by pye57, which decodes in another process (`gpu3d.io.helper`).

All scans of a file are read as one cloud, in the coordinates of the file. One scan is written.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpu3d.io import helper
from gpu3d.io.cloud import Cloud, attributes_of
from gpu3d.io.files import Source, optional

HEADER = struct.Struct("<8sII4Q")  # signature, version, bytes of the file, place and bytes of the XML, bytes of a page
PAGE, CHECKSUM = 1024, 4  # each page ends with a checksum
CARTESIAN = "cartesianX", "cartesianY", "cartesianZ"
SPHERICAL = "sphericalRange", "sphericalAzimuth", "sphericalElevation"
INVALID = "cartesianInvalidState", "sphericalInvalidState"
COLORS = "colorRed", "colorGreen", "colorBlue"


# ---- reading -------------------------------------------------------------------------------------------------------


def read(source: Source) -> Cloud:
    """Read all scans, with their poses applied.

    Every field of numbers is an attribute. A file with several scans has the attribute ``scan``, the index of the scan.
    Where a scan lacks an attribute that another one has, it is NaN, or 0 if it is an integer. Points that the file
    marks as invalid are NaN.
    """
    optional("pye57")
    _check(source)
    scans: dict[int, dict[str, list[np.ndarray]]] = {}
    poses = {}
    for head, data in helper.decode("e57", path=os.path.abspath(source.path), size=source.size):
        values = np.frombuffer(data, head["dtype"])
        scans.setdefault(head["scan"], {}).setdefault(head["field"], []).append(values)
        poses[head["scan"]] = head["rotation"], head["translation"]
    clouds = []
    for scan, pieces in scans.items():
        fields = {name: np.concatenate(arrays) for name, arrays in pieces.items()}
        points = _posed(_points(fields), *poses[scan])
        colors = [fields.pop(name) for name in COLORS] if set(COLORS) <= fields.keys() else None
        attributes = attributes_of({name.split(":")[-1]: values for name, values in fields.items()})
        if colors:
            attributes["colors"] = np.stack(colors, axis=1)
        if max(scans) > 0:
            attributes["scan"] = np.full(len(points), scan, np.int32)
        clouds.append(Cloud(points, attributes))
    if not clouds:
        return Cloud(np.empty((0, 3)))
    models = {name: values for cloud in clouds for name, values in cloud.attributes.items()}
    joined = {name: np.concatenate([_attribute(cloud, name, models[name]) for cloud in clouds]) for name in models}
    return Cloud(np.concatenate([cloud.points for cloud in clouds]), joined)


def _check(source: Source) -> None:
    """Check the places in the header, and that the XML does not declare entities, which can grow without limit."""
    data = source.stream.read(HEADER.size)
    if data[:8] != b"ASTM-E57":
        raise ValueError("not an E57 file: it does not begin with ASTM-E57")
    if len(data) < HEADER.size:
        raise ValueError("truncated in the header")
    _, _, _, size, place, length, page = HEADER.unpack(data)
    if page != PAGE or size != source.size or size % PAGE:
        raise ValueError(f"truncated: pages of {page} bytes and {size} bytes in the header, the file has {source.size}")
    # Places count checksums, lengths do not.
    pages, rest = divmod(place % PAGE + length, PAGE - CHECKSUM)
    if place // PAGE * PAGE + (pages + (rest > 0)) * PAGE > size or place % PAGE >= PAGE - CHECKSUM:
        raise ValueError(f"the XML of {length} bytes at byte {place} is not in the file of {size}")
    source.stream.seek(place // PAGE * PAGE)
    raw = np.frombuffer(source.stream.read((pages + (rest > 0)) * PAGE), np.uint8)
    xml = raw.reshape(-1, PAGE)[:, : PAGE - CHECKSUM].tobytes()[place % PAGE :][:length]
    if not xml.removeprefix(b"\xef\xbb\xbf").startswith(b"<?xml") or b"\0" in xml or b"<!DOCTYPE" in xml:
        raise ValueError("the XML is not that of an E57 file")


def _points(fields: dict[str, np.ndarray]) -> np.ndarray:
    """Take the coordinates and the marks of invalid points out of the fields."""
    marks = [fields.pop(name, None) for name in INVALID]
    cartesian = set(CARTESIAN) <= fields.keys()
    if not cartesian and not set(SPHERICAL) <= fields.keys():
        raise ValueError(f"expected cartesian or spherical coordinates, found {', '.join(fields) or 'none'}")
    points = np.stack([fields.pop(name) for name in (CARTESIAN if cartesian else SPHERICAL)], axis=1, dtype=np.float64)
    if not cartesian:
        radius, azimuth, elevation = points.T
        level = radius * np.cos(elevation)
        points = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), radius * np.sin(elevation)], axis=1)
    invalid = marks[0 if cartesian else 1]
    if invalid is not None:
        points[invalid != 0] = np.nan
    return points


def _posed(points: np.ndarray, rotation: list[float], translation: list[float]) -> np.ndarray:
    """Points after a rotation, a quaternion of any length but 0, and a translation."""
    if not np.isfinite([*rotation, *translation]).all() or not any(rotation):
        raise ValueError(f"a pose of rotation {rotation} and translation {translation}")
    w, x, y, z = np.asarray(rotation) / np.linalg.norm(rotation)
    if (w, x, y, z) != (1, 0, 0, 0):
        matrix = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        points = points @ np.transpose(matrix)
    return points + translation if any(translation) else points


def _attribute(cloud: Cloud, name: str, model: np.ndarray) -> np.ndarray:
    if name in cloud.attributes:
        return cloud.attributes[name]
    return np.full((len(cloud), *model.shape[1:]), np.nan if model.dtype.kind == "f" else 0, model.dtype)


# ---- writing -------------------------------------------------------------------------------------------------------


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write one scan, with ``intensity`` and ``colors``, uint8 or uint16. Points that are not finite become invalid."""
    libe57 = optional("pye57.libe57")
    fields = _fields(cloud)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.e57"  # libE57 opens its files itself
        image = libe57.ImageFile(str(path), "w")
        try:
            _write_scan(libe57, image, len(cloud), fields)
        finally:
            image.close()
        with open(path, "rb") as written:
            shutil.copyfileobj(written, stream)


def _fields(cloud: Cloud) -> dict[str, np.ndarray]:
    """The fields of a file, with dtypes that libE57 knows."""
    for name, values in cloud.attributes.items():
        if name not in ("intensity", "colors"):
            raise ValueError(
                f"an .e57 is written with intensity and colors, and not the attribute {name}: leave it out"
            )
        dtypes = ("u1", "u2") if name == "colors" else ("u1", "u2", "i1", "i2", "f4", "f8")
        if values.dtype not in dtypes or values.shape[1:] != ((3,) if name == "colors" else ()):
            raise ValueError(
                f"attribute {name} is {values.dtype} of shape {list(values.shape)}, and an .e57 is written with "
                f"{', '.join(str(np.dtype(dtype)) for dtype in dtypes)}, {'[N, 3]' if name == 'colors' else '[N]'}"
            )
    finite = np.isfinite(cloud.points).all(axis=1)
    fields = dict(zip(CARTESIAN, np.where(finite[:, None], cloud.points, 0).T, strict=True))
    if not finite.all():
        fields["cartesianInvalidState"] = np.where(finite, 0, 2).astype(np.uint8)
    if "intensity" in cloud.attributes:
        fields["intensity"] = cloud.attributes["intensity"]
        if not np.isfinite(fields["intensity"]).all():
            raise ValueError(
                "attribute intensity has NaN or infinite values, which an .e57 does not hold: replace them"
            )
    if "colors" in cloud.attributes:
        fields |= zip(COLORS, cloud.attributes["colors"].T, strict=True)
    return {name: np.ascontiguousarray(values, values.dtype.newbyteorder("=")) for name, values in fields.items()}


def _write_scan(libe57: Any, image: Any, count: int, fields: dict[str, np.ndarray]) -> None:
    image.extensionsAdd("", libe57.E57_V1_0_URI)
    root, scan, prototype = image.root(), libe57.StructureNode(image), libe57.StructureNode(image)
    scans = libe57.VectorNode(image, True)
    root.set("formatName", libe57.StringNode(image, "ASTM E57 3D Imaging Data File"))
    root.set("guid", libe57.StringNode(image, f"{{{uuid.uuid4()}}}"))
    root.set("versionMajor", libe57.IntegerNode(image, libe57.E57_FORMAT_MAJOR))
    root.set("versionMinor", libe57.IntegerNode(image, libe57.E57_FORMAT_MINOR))
    root.set("e57LibraryVersion", libe57.StringNode(image, libe57.E57_LIBRARY_ID))
    root.set("coordinateMetadata", libe57.StringNode(image, ""))
    root.set("data3D", scans)
    root.set("images2D", libe57.VectorNode(image, True))
    scan.set("guid", libe57.StringNode(image, f"{{{uuid.uuid4()}}}"))
    for name, values in fields.items():
        if values.dtype.kind == "f":
            single = values.dtype == np.float32
            node = libe57.FloatNode(image, 0.0, libe57.E57_SINGLE if single else libe57.E57_DOUBLE)
        else:
            limits = np.iinfo(values.dtype)
            node = libe57.IntegerNode(image, 0, limits.min, limits.max)
        prototype.set(name, node)
    points = libe57.CompressedVectorNode(image, prototype, libe57.VectorNode(image, True))
    scan.set("points", points)
    scans.append(scan)
    buffers = libe57.VectorSourceDestBuffer()
    for name, values in fields.items():
        buffers.append(libe57.SourceDestBuffer(image, name, values, count, True, False))
    writer = points.writer(buffers)
    if count:
        writer.write(count)
    writer.close()
