# SPDX-License-Identifier: Apache-2.0
"""Reads and writes .ply: points and the scalar properties of the element vertex.

Binary vertices are records, which NumPy reads. Text, and vertices with lists, are decoded by plyfile. Every header is
read here, because plyfile refuses comments that are not ASCII and allocates what a header says.
"""

from __future__ import annotations

import io
import re
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from gpu3d.io.cloud import XYZ, Cloud, attributes_of, fields_of, points_of
from gpu3d.io.files import Source, optional

# NumPy's types, and their names as written. Both these and int8, uint8, ..., float64 are read.
NAMES = {
    "i1": "char",
    "u1": "uchar",
    "i2": "short",
    "u2": "ushort",
    "i4": "int",
    "u4": "uint",
    "f4": "float",
    "f8": "double",
}
TYPES = {name: code for code, name in NAMES.items()} | {np.dtype(code).name: code for code in NAMES}
CURES = {"b1": "uint8", "f2": "float32", "i8": "int32 or float64", "u8": "uint32 or float64"}

BYTE_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
LONGEST_HEADER = 1 << 20
# All lines end as the first does: by LF, CRLF or CR.
HEADER = re.compile(rb"ply[ \t]*(\r\n|\n|\r)(.*?)(?<=[\r\n])end_header[ \t]*\1", re.DOTALL)


class Element(NamedTuple):
    """Rows of properties, one element after another in the file."""

    name: str
    rows: int
    properties: dict[str, tuple[str, ...]]  # the type of a scalar, or the types of a list's length and values

    @property
    def has_lists(self) -> bool:
        """Whether the sizes of rows differ."""
        return any(len(types) > 1 for types in self.properties.values())

    def least_size(self, text: bool) -> int:
        """Bytes with empty lists. A value of text is a digit and a space or newline at least."""
        return self.rows * sum(2 if text else int(first[1]) for first, *_ in self.properties.values())


def read(source: Source) -> Cloud:
    """Read the vertices. Lists and other elements are left out."""
    head = source.stream.read(LONGEST_HEADER)
    if not head.startswith(b"ply"):
        raise ValueError("the first line is not ply")
    header = HEADER.match(head)
    if header is None:
        raise ValueError(f"no line end_header in the first {LONGEST_HEADER} bytes")
    layout, elements = _parsed(header[2].split(header[1]))
    text = layout == "ascii"
    least = sum(element.least_size(text) for element in elements) - text  # the last line may have no newline
    left = source.size - header.end()
    if least > left:
        raise ValueError(f"truncated: the header promises at least {least} bytes of data, the file holds {left}")

    names = [element.name for element in elements]
    if "vertex" not in names:
        raise ValueError(f"no element vertex, found {', '.join(names) or 'none at all'}")
    elements = elements[: names.index("vertex") + 1]
    vertex = elements[-1]
    source.stream.seek(header.end())
    if text or vertex.has_lists:
        records = _decoded(layout, elements, source.stream.read())
    else:
        for element in elements[:-1]:
            _skip(source.stream, element, BYTE_ORDERS[layout])
        dtype = [(name, BYTE_ORDERS[layout] + code) for name, (code,) in vertex.properties.items()]
        records = np.fromfile(source.stream, dtype, vertex.rows)
        if len(records) < vertex.rows:
            raise ValueError(f"truncated: the header promises {vertex.rows} points, the file holds {len(records)}")

    columns = zip(vertex.properties.items(), records.dtype.names or (), strict=True)
    fields = {name: records[column] for (name, types), column in columns if len(types) == 1}
    attributes = {  # not as views of the records, nor in the byte order of the file
        name: np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        for name, values in attributes_of(fields).items()
    }
    return Cloud(_points(records, fields), attributes)


def _parsed(lines: list[bytes]) -> tuple[str, list[Element]]:
    """The layout and the elements that a header describes."""
    layout = None
    elements: dict[str, Element] = {}
    properties: dict[str, tuple[str, ...]] = {}  # of the last element
    for line in lines:
        match [word.decode(errors="replace") for word in line.split()]:
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", name, "1.0"] if name in BYTE_ORDERS:
                layout = name
            case ["element", name, count] if name not in elements and int(count) >= 0:
                properties = {}
                elements[name] = Element(name, int(count), properties)
            case ["property", kind, name] if elements and kind in TYPES and name not in properties:
                properties[name] = (TYPES[kind],)
            case ["property", "list", length, kind, name] if (
                elements and length in TYPES and TYPES[length][0] != "f" and kind in TYPES and name not in properties
            ):
                properties[name] = (TYPES[length], TYPES[kind])
            case _:
                raise ValueError(f"this line of the header is none of .ply, or repeats a name: {line[:100]!r}")
    if layout is None:
        raise ValueError("the header has no line format")
    for element in elements.values():
        if element.rows and not element.properties:
            raise ValueError(f"element {element.name} has no properties")
    return layout, list(elements.values())


def _skip(stream: BinaryIO, element: Element, byte_order: str) -> None:
    """Move past a binary element."""
    if not element.has_lists:
        stream.seek(element.least_size(text=False), io.SEEK_CUR)
        return
    order: Literal["little", "big"] = "little" if byte_order == "<" else "big"
    sizes = [
        (int(first[1]), first[0] == "i", int(values[0][1]) if values else 0)
        for first, *values in element.properties.values()
    ]
    for _ in range(element.rows):
        for size, signed, value_size in sizes:
            word = stream.read(size)
            if len(word) < size:
                raise ValueError(f"truncated: element {element.name} ends early")
            if value_size:
                length = int.from_bytes(word, order, signed=signed)
                if length < 0:
                    raise ValueError(f"element {element.name} has a list of {length} values")
                stream.seek(length * value_size, io.SEEK_CUR)


def _decoded(layout: str, elements: list[Element], data: bytes) -> np.ndarray:
    """The records of the last of these elements, by plyfile.

    plyfile gets a header that it can read: with no comments, no elements after the vertices, and ASCII names.
    """
    lines = ["ply", f"format {layout} 1.0"]
    for element in elements:
        lines.append(f"element {element.name} {element.rows}")
        for name, types in element.properties.items():
            lines.append(f"property {'list ' * (len(types) - 1)}{' '.join(NAMES[code] for code in types)} {name}")
    header = "\n".join([*lines, "end_header\n"]).encode("ascii", "backslashreplace")
    return optional("plyfile").PlyData.read(io.BytesIO(header + data))["vertex"].data


def _points(records: np.ndarray, fields: dict[str, np.ndarray]) -> np.ndarray:
    """The points. x, y and z in a row are copied as one: NumPy stacks columns slowly that are not aligned."""
    names = records.dtype.names or ()
    start = names.index("x") if "x" in names else 0
    kinds = {records.dtype[name] for name in names[start : start + 3]}
    if names[start : start + 3] != XYZ or len(kinds) > 1 or kinds.pop().kind != "f" or records.dtype.hasobject:
        return points_of(fields)
    kind, offset, *_ = records.dtype.fields["x"]  # type: ignore[index]
    points = records.getfield(f"V{3 * kind.itemsize}", offset).copy().view(kind).reshape(-1, 3)
    return points.astype(kind.newbyteorder("="), copy=False)


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write a binary file with one element, vertex."""
    for name, values in cloud.attributes.items():
        if values.dtype.str[1:] not in NAMES:
            cure = CURES.get(values.dtype.str[1:], "float64")
            raise ValueError(f"attribute {name} is {values.dtype}, which .ply cannot hold: convert it to {cure}")
        if name.split() != [name]:
            raise ValueError(f"attribute {name!r} has a space in its name, which .ply cannot hold: rename it")
    fields = fields_of(cloud)
    records = np.empty(len(cloud), [(name, "<" + values.dtype.str[1:]) for name, values in fields.items()])
    for name, values in fields.items():
        records[name] = values
    properties = [f"property {NAMES[values.dtype.str[1:]]} {name}" for name, values in fields.items()]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}", *properties, "end_header\n"]
    stream.write("\n".join(lines).encode())
    stream.write(records.tobytes())
