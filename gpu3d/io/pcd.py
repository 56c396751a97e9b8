# SPDX-License-Identifier: Apache-2.0
"""Reads and writes .pcd, the format of PCL: a header, then the points as text, as records or as compressed columns.

https://pointclouds.org/documentation/tutorials/pcd_file_format.html
"""

from __future__ import annotations

import re
import struct
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpu3d.io.cloud import COLUMNS, XYZ, Cloud, attributes_of, points_of
from gpu3d.io.files import Source, optional

TYPES = {"I1", "I2", "I4", "I8", "U1", "U2", "U4", "U8", "F4", "F8"}  # TYPE and SIZE of a field
CURES = {"B1": "uint8", "F2": "float32"}
PADDING = "_"
# Fields of the four bytes blue, green, red and alpha, and the attributes in them. The last byte of rgb has no meaning.
PACKED = {"rgb": ("colors",), "rgba": ("colors", "alpha")}
MAX_FIELDS = 1000
MAX_COUNT = 1 << 16
LONGEST_HEADER = 1 << 20
DATA = re.compile(rb"^[ \t]*DATA[ \t]+(\w+)[ \t]*(?:\r?\n|\Z)", re.MULTILINE)
# LZF writes at most 264 bytes, a copy of earlier ones, for three that it reads.
LZF_EXPANSION = 264 // 3


class Header(NamedTuple):
    """What a header says. It agrees with itself, and has not been held against the size of the file."""

    names: list[str]  # of the fields, padding too, but none without values
    point: np.dtype  # its fields are called 0, 1, ..., because the names of padding repeat
    points: int
    meta: dict[str, Any]


def read(source: Source) -> Cloud:
    """Read all fields but padding."""
    head = source.stream.read(LONGEST_HEADER)
    end = DATA.search(head)
    if end is None:
        raise ValueError(f"no line DATA in the first {LONGEST_HEADER} bytes")
    header = _parsed(head[: end.start()])
    encoding = end[1].decode()
    if encoding not in ENCODINGS:
        raise ValueError(f"DATA is {encoding}, and must be one of {', '.join(ENCODINGS)}")
    source.stream.seek(end.end())
    columns = ENCODINGS[encoding](source.stream, header, source.size - end.end())

    fields = {name: values for name, values in zip(header.names, columns, strict=True) if name != PADDING}
    for name, parts in PACKED.items():
        values = fields.get(name)
        if values is not None and values.ndim == 1 and values.itemsize == 4 and fields.keys().isdisjoint(parts):
            packed = np.ascontiguousarray(fields.pop(name)).view(np.uint8).reshape(-1, 4)
            fields |= zip(parts, (packed[:, 2::-1], packed[:, 3]), strict=False)
    # Copied, because these share the memory of whole points and have the byte order of the file.
    attributes = {
        name: values.astype(values.dtype.newbyteorder("="), order="C") for name, values in attributes_of(fields).items()
    }
    return Cloud(points_of(fields), attributes, header.meta)


def _parsed(text: bytes) -> Header:
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, *values = line.decode(errors="replace").split() or [""]
        lines["FIELDS" if key == "COLUMNS" else key] = values

    names = lines.get("FIELDS", [])
    if not 0 < len(names) <= MAX_FIELDS:
        raise ValueError(f"the header has {len(names)} FIELDS, and must have 1 to {MAX_FIELDS}")
    lines.setdefault("COUNT", ["1"] * len(names))
    for key in ("SIZE", "TYPE", "COUNT"):
        if len(lines.get(key, [])) != len(names):
            raise ValueError(f"the header has {len(names)} FIELDS, and {len(lines.get(key, []))} values of {key}")
    found: list[str] = []
    columns: list[tuple[str, str, tuple[int, ...]]] = []
    for name, type_, size, count in zip(names, lines["TYPE"], lines["SIZE"], lines["COUNT"], strict=True):
        if type_ + size not in TYPES:
            raise ValueError(f"field {name} has TYPE {type_} and SIZE {size}, which .pcd does not have")
        if not 0 <= int(count) <= MAX_COUNT:
            raise ValueError(f"field {name} has COUNT {count}, and must have 0 to {MAX_COUNT}")
        if name in found and name != PADDING:
            raise ValueError(f"the header has two fields {name}")
        if int(count) > 0:
            columns.append((str(len(found)), f"<{type_.lower()}{size}", (int(count),) * (int(count) > 1)))
            found.append(name)
    if not found:
        raise ValueError("no field has a COUNT above 0")

    width, height = _number(lines, "WIDTH"), _number(lines, "HEIGHT", 1)
    points = _number(lines, "POINTS", width * height)
    if points != width * height:
        raise ValueError(f"the header has {points} POINTS, and WIDTH {width} times HEIGHT {height}")
    meta: dict[str, Any] = {"width": width, "height": height} if height > 1 else {}
    if "VIEWPOINT" in lines:
        meta["viewpoint"] = _viewpoint(lines["VIEWPOINT"])
    return Header(found, np.dtype(columns), points, meta)


def _number(lines: dict[str, list[str]], key: str, default: int | None = None) -> int:
    if key not in lines and default is not None:
        return default
    match lines.get(key):
        case [word] if int(word) >= 0:
            return int(word)
        case _:
            raise ValueError(f"the header must have one number {key}, of at least 0")


def _viewpoint(values: Any) -> tuple[float, ...]:
    if len(values) != 7:
        raise ValueError(f"a viewpoint is seven numbers (x, y, z and a quaternion), got {len(values)}")
    return tuple(float(value) for value in values)


# ---- the encodings: each returns the columns of the fields ----------------------------------------------------------


def _text(stream: BinaryIO, header: Header, size: int) -> list[np.ndarray]:
    values = sum(prod(header.point[i].shape) for i in range(len(header.names)))
    # A value is a digit and a space or newline at least, and the last line may have no newline.
    if 2 * values * header.points - 1 > size:
        raise ValueError(f"truncated: the header promises {header.points} points of {values} values in {size} bytes")
    records = np.empty(0, header.point)
    if header.points:
        records = np.loadtxt(stream, header.point, comments=None, ndmin=1)
    _check_count(len(records), header.points)
    return _columns(records)


def _binary(stream: BinaryIO, header: Header, size: int) -> list[np.ndarray]:
    _check_count(min(size // header.point.itemsize, header.points), header.points)
    return _columns(np.fromfile(stream, header.point, header.points))


def _compressed(stream: BinaryIO, header: Header, size: int) -> list[np.ndarray]:
    promised = header.points * header.point.itemsize
    data = b""
    if promised:
        if size < 8:
            raise ValueError("truncated: the file ends before the sizes of the compressed data")
        packed, unpacked = struct.unpack("<II", stream.read(8))
        if packed > size - 8:
            raise ValueError(f"truncated: the file promises {packed} bytes of compressed data, and holds {size - 8}")
        if unpacked != promised:
            raise ValueError(f"{header.points} points are {promised} bytes, and the compressed data {unpacked}")
        if unpacked > packed * LZF_EXPANSION:
            raise ValueError(f"{packed} bytes cannot be the compressed form of {unpacked}")
        data = optional("lzf").decompress(stream.read(packed), unpacked)
        if data is None or len(data) != unpacked:  # None stands for more
            raise ValueError(f"the compressed data is corrupt: it is not that of {unpacked} bytes")
    columns = []
    start = 0
    for i in range(len(header.names)):
        kind = header.point[i]
        values = np.frombuffer(data, kind.base, header.points * prod(kind.shape), start)
        columns.append(values.reshape(header.points, *kind.shape))
        start += values.nbytes
    return columns


ENCODINGS = {"ascii": _text, "binary": _binary, "binary_compressed": _compressed}


def _columns(records: np.ndarray) -> list[np.ndarray]:
    return [records[name] for name in records.dtype.names or ()]


def _check_count(found: int, promised: int) -> None:
    if found != promised:
        what = "truncated: " if found < promised else ""
        raise ValueError(f"{what}the header promises {promised} points, the file holds {found}")


# ---- writing --------------------------------------------------------------------------------------------------------


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write records (DATA binary). An attribute is a field, but PCL has other names for colors and normals."""
    fields = dict(zip(XYZ, cloud.points.T, strict=True))
    for name, values in cloud.attributes.items():
        for field, column in _fields(name, values).items():
            if field in fields:
                raise ValueError(f"attribute {name} cannot be written as field {field}, which there is: rename it")
            fields[field] = column
    if len(fields) > MAX_FIELDS:
        raise ValueError(f"the cloud has {len(fields)} fields, and a .pcd at most {MAX_FIELDS}: leave some out")
    records = np.empty(
        len(cloud), [(name, column.dtype.newbyteorder("<"), column.shape[1:]) for name, column in fields.items()]
    )
    for name, column in fields.items():
        records[name] = column

    width, height = cloud.meta.get("width", 0), cloud.meta.get("height", 0)
    if width * height != len(cloud):  # points were added or left out since they were read
        width, height = len(cloud), 1
    header = {
        "VERSION": ["0.7"],
        "FIELDS": fields,
        "SIZE": [column.itemsize for column in fields.values()],
        "TYPE": [column.dtype.kind.upper() for column in fields.values()],
        "COUNT": [prod(column.shape[1:]) for column in fields.values()],
        "WIDTH": [width],
        "HEIGHT": [height],
        "VIEWPOINT": _viewpoint(cloud.meta.get("viewpoint", (0, 0, 0, 1, 0, 0, 0))),
        "POINTS": [len(cloud)],
        "DATA": ["binary"],
    }
    stream.write("".join(f"{key} {' '.join(map(str, values))}\n" for key, values in header.items()).encode())
    stream.write(records.tobytes())


def _fields(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of an attribute."""
    type_ = f"{values.dtype.kind.upper()}{values.itemsize}"
    if type_ not in TYPES:
        cure = CURES.get(type_, "float64")
        raise ValueError(f"attribute {name} is {values.dtype}, which .pcd cannot hold: convert it to {cure}")
    if values.shape[1:] == (3,):
        if name == "normals":
            return dict(zip(COLUMNS[name][1], values.T, strict=True))
        if name == "colors" and values.dtype == np.uint8:
            packed = np.zeros((len(values), 4), np.uint8)
            packed[:, 2::-1] = values
            return {"rgb": packed.view("<f4")[:, 0]}
    if name.split() != [name] or name == PADDING or name in PACKED:
        raise ValueError(f"an attribute cannot be called {name!r} in a .pcd: rename it")
    if values.ndim == 2 and not 2 <= values.shape[1] <= MAX_COUNT:
        raise ValueError(
            f"attribute {name} has shape {list(values.shape)}, and a .pcd holds [N] or [N, 2] to [N, {MAX_COUNT}]"
        )
    return {name: values}
