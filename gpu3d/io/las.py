# SPDX-License-Identifier: Apache-2.0
"""Reads and writes .las and .laz: versions 1.0 to 1.4, point formats 0 to 10, extra bytes.

laspy has the tables of the point formats, and writes. lazrs packs and unpacks .laz, the latter in another process
(`gpu3d.io.helper`). The header is read here, because laspy does as it says.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpu3d.io import helper
from gpu3d.io.cloud import XYZ, Cloud, attributes_of
from gpu3d.io.files import Source, optional

# Version, size of the header, start of the points, number of records, point format, size and number of points, three
# scales, three offsets. Version 1.4 goes on with the start and the number of extended records, and the points' number.
HEADER = struct.Struct("<4s20xBB68xHIIBHI20x6d48x")
HEADER_4 = struct.Struct("<8xQIQ120x")
HEADER_SIZES = 227, 227, 227, 235, 375  # by the minor version
RECORD = struct.Struct("<2x16sHH32x")  # user, number, bytes of data
EXTENDED_RECORD = struct.Struct("<2x16sHQ32x")
LASZIP = struct.Struct("<H10xI16xH")  # compressor, points in a chunk, number of items
ITEM = struct.Struct("<2xH2x")  # bytes in a point

Records = dict[tuple[bytes, int], bytes]
WKT = b"LASF_Projection", 2112
EXTRA_BYTES = b"LASF_Spec", 4
PACKING = b"laszip encoded", 22204

NAMES = {"classification": "label", "gps_time": "time"}  # what attributes are called here
COLORS = "red", "green", "blue"
BLOCK = 1 << 15  # points that are taken apart at a time, while they are in the cache
INT32_MAX = 2**31 - 1


class Header(NamedTuple):
    """What a file says about its points."""

    version: str
    point_format: int
    packed: bool
    start: int
    end: int  # points are not behind it
    size: int  # of a point
    number: int  # of points
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    records: Records


class Part(NamedTuple):
    """Where a point has an attribute, or one column of it."""

    attribute: str
    column: int | None
    field: str
    mask: int | None  # of its bits, if it shares the field

    @property
    def shift(self) -> int:
        """The place of its lowest bit."""
        return (self.mask & -self.mask).bit_length() - 1 if self.mask else 0


class Extra(NamedTuple):
    """An attribute in the extra bytes of a point."""

    name: str
    dtype: np.dtype
    scale: list[float]  # empty if values are stored as they are
    offset: list[float]


def _parts(point_format: int) -> list[Part]:
    """All attributes of a point format."""
    dims = optional("laspy").point.dims
    parts = []
    for field in dims.POINT_FORMAT_DIMENSIONS[point_format]:
        for name, mask in dims.COMPOSED_FIELDS[point_format].get(field, [(field, None)]):
            if name in COLORS:
                parts.append(Part("colors", COLORS.index(name), field, None))
            elif name not in ("X", "Y", "Z"):
                parts.append(Part(NAMES.get(name, name), None, field, mask))
    return parts


# ---- reading -------------------------------------------------------------------------------------------------------


def read(source: Source) -> Cloud:
    """Read the points, and every attribute that the point format and the extra bytes have."""
    header = _header(source)
    extras = _extras(header)
    layout = _layout(header, extras)
    blocks = _unpacked(source, header, layout) if header.packed else _blocks(source, header, layout)

    points = np.empty((header.number, 3))
    standard: dict[str, np.ndarray] = {}
    added = [
        np.empty((header.number, *extra.dtype.shape), "f8" if extra.scale else extra.dtype.base) for extra in extras
    ]
    # How a field of a block comes into its array.
    moves: list[tuple[str, np.ndarray, Callable[[np.ndarray, np.ndarray], Any]]] = []
    for axis in range(3):
        moves.append(("XYZ"[axis], points[:, axis], partial(_scaled, header.scale[axis], header.offset[axis])))
    for part in _parts(header.point_format):
        if part.attribute not in standard:
            shape = (header.number,) if part.column is None else (header.number, 3)
            standard[part.attribute] = np.empty(shape, layout[part.field])
        values = standard[part.attribute]
        moves.append(
            (
                part.field,
                values if part.column is None else values[:, part.column],
                partial(_bits, part.mask, part.shift) if part.mask else np.copyto,
            )
        )
    for i, (extra, values) in enumerate(zip(extras, added, strict=True)):
        moves.append((f"extra {i}", values, partial(_scaled, extra.scale, extra.offset) if extra.scale else np.copyto))

    first = 0
    with np.errstate(over="ignore", invalid="ignore"):  # the scale of an extra attribute may be anything
        for block in blocks:
            rows = slice(first, first + len(block))
            for field, values, move in moves:
                move(values[rows], block[field])
            first += len(block)

    names = [extra.name for extra in extras]
    meta: dict[str, Any] = {"scale": list(header.scale), "offset": list(header.offset)}
    crs = header.records.get(WKT, b"").split(b"\0")[0].decode(errors="replace")
    if crs:
        meta["crs"] = crs
    meta |= {"point_format": header.point_format, "version": header.version}
    return Cloud(points, attributes_of(_joined(standard, names, added)), meta)


def _scaled(scale: Any, offset: Any, out: np.ndarray, values: np.ndarray) -> None:
    np.multiply(values, scale, out=out)
    out += offset


def _bits(mask: int, shift: int, out: np.ndarray, values: np.ndarray) -> None:
    np.bitwise_and(values, mask, out=out)
    if shift:
        out >>= shift


def _joined(standard: dict[str, np.ndarray], names: list[str], added: list[np.ndarray]) -> dict[str, np.ndarray]:
    """All attributes. Of two with the same name the extra one stands in for the standard one if that is not used.

    `write` calls an extra attribute "scalar_..." where the point format has one of its name, but of another dtype.
    """
    joined = dict(standard)
    for name, values in zip(names, added, strict=True):
        name = name.lower()
        base = name.removeprefix("scalar_")
        if base not in standard:
            joined[name] = values
        elif standard[base].any():
            joined[f"scalar_{base}"] = values
        else:
            joined[base] = values
    return joined


def _header(source: Source) -> Header:
    """Read the header. Nothing that it says about sizes and places goes beyond the end of the file."""
    stream, size = source.stream, source.size
    data = stream.read(HEADER.size)
    if data[:4] != b"LASF":
        raise ValueError("not a LAS file: it does not begin with LASF")
    if len(data) < HEADER.size:
        raise ValueError("truncated in the header")
    _, major, minor, header_size, start, number, point_format, point_size, count, *grid = HEADER.unpack(data)
    if major != 1 or minor >= len(HEADER_SIZES):
        raise ValueError(f"LAS version {major}.{minor}, expected 1.0 to 1.4")
    if not HEADER_SIZES[minor] <= header_size <= start <= size:
        raise ValueError(f"a header of {header_size} bytes and points from byte {start} on, in a file of {size}")
    packed, point_format = divmod(point_format, 128)
    if point_format > 10:
        raise ValueError(f"point format {point_format}, expected 0 to 10")
    if any(not math.isfinite(INT32_MAX * scale) or scale == 0 for scale in grid[:3]) or not all(
        math.isfinite(offset) for offset in grid[3:]
    ):
        raise ValueError(f"scale {grid[:3]} and offset {grid[3:]} must be finite, and the scale not 0")
    records: Records = {}
    end = size
    if minor == 4:
        first, extended, large_count = HEADER_4.unpack(stream.read(HEADER_4.size))
        count = large_count or count
        if extended:
            end = first
            _read_records(stream, EXTENDED_RECORD, first, size, extended, records)
    _read_records(stream, RECORD, header_size, start, number, records)
    if not packed and count * point_size > end - start:
        raise ValueError(
            f"truncated: the header promises {count} points of {point_size} bytes, the file holds {end - start} bytes"
        )
    return Header(
        f"{major}.{minor}",
        point_format,
        bool(packed),
        start,
        end,
        point_size,
        count,
        tuple(grid[:3]),
        tuple(grid[3:]),
        records,
    )


def _read_records(stream: BinaryIO, head: struct.Struct, place: int, end: int, number: int, records: Records) -> None:
    """Add those that are used of the records between two places of the file."""
    if number * head.size > end - place:
        raise ValueError(f"{number} records do not fit between bytes {place} and {end}")
    for _ in range(number):
        stream.seek(place)
        data = stream.read(head.size)
        place += head.size
        if place > end:
            raise ValueError(f"a record ends behind byte {end}")
        user, record, size = head.unpack(data)
        if size > end - place:
            raise ValueError(f"a record of {size} bytes at byte {place} ends behind byte {end}")
        key = user.split(b"\0")[0], record
        if key in (WKT, EXTRA_BYTES, PACKING):
            records[key] = stream.read(size)
        place += size


def _extras(header: Header) -> list[Extra]:
    """What the extra bytes of a point are. Those that are not described, or not rightly, are left out."""
    vlr = optional("laspy").vlrs.known.ExtraBytesVlr()
    vlr.parse_record_data(header.records.get(EXTRA_BYTES, b""))
    extras = []
    for i, item in enumerate(vlr.extra_bytes_structs):
        if item.data_type > 30:
            raise ValueError(f"extra bytes of type {item.data_type}, expected 0 to 30")
        name = item.name.decode(errors="replace") or f"extra_{i}"
        scale: list[float] = []
        offset: list[float] = []
        if item.data_type and (item.scale is not None or item.offset is not None):  # type 0 are bytes
            scale = list(item.scale or [1.0] * item.num_elements())
            offset = list(item.offset or [0.0] * item.num_elements())
        extras.append(Extra(name, item.dtype(), scale, offset))
    standard = optional("laspy").point.dims.POINT_FORMATS_DTYPE[header.point_format].itemsize
    return extras if sum(extra.dtype.itemsize for extra in extras) == header.size - standard else []


def _layout(header: Header, extras: list[Extra]) -> np.dtype:
    """The dtype of a point."""
    standard = optional("laspy").point.dims.POINT_FORMATS_DTYPE[header.point_format]
    if header.size < standard.itemsize:
        raise ValueError(
            f"points of {header.size} bytes, and point format {header.point_format} has {standard.itemsize}"
        )
    fields = standard.descr + [(f"extra {i}", extra.dtype) for i, extra in enumerate(extras)]
    left = header.size - standard.itemsize if not extras else 0
    return np.dtype(fields + [("left", f"V{left}")] if left else fields)


def _blocks(source: Source, header: Header, layout: np.dtype) -> Iterator[np.ndarray]:
    """The points of a .las."""
    source.stream.seek(header.start)
    for first in range(0, header.number, BLOCK):
        yield np.fromfile(source.stream, layout, min(BLOCK, header.number - first))


def _unpacked(source: Source, header: Header, layout: np.dtype) -> Iterator[np.ndarray]:
    """The points of a .laz, which all are decoded when this returns."""
    optional("lazrs")  # without it the helper would blame the file
    packing = header.records.get(PACKING, b"")
    if len(packing) < LASZIP.size:
        raise ValueError("no laszip record, which says how the points are packed")
    compressor, _, items = LASZIP.unpack_from(packing)
    if len(packing) < LASZIP.size + items * ITEM.size:
        raise ValueError("the laszip record is truncated")
    if sum(ITEM.unpack_from(packing, LASZIP.size + i * ITEM.size)[0] for i in range(items)) != header.size:
        raise ValueError(f"the laszip record is not for points of {header.size} bytes")
    if not header.number:
        return iter(())

    table = None  # there is one chunk
    start, end = header.start, header.end
    if compressor != 1:
        start += 8
        table = end = _table(source, start, header.size)
    if header.number > helper.POINTS_IN_A_BYTE * (end - start):
        raise ValueError(f"truncated: {end - start} bytes cannot hold the {header.number} points of the header")
    path = os.path.abspath(source.path)
    pieces = helper.decode(
        "laz", path=path, start=start, table=table, count=header.number, size=header.size, vlr=packing.hex()
    )

    def blocks() -> Iterator[np.ndarray]:
        while pieces:
            piece = np.frombuffer(pieces.pop(0)[1], layout)  # popped, so that its memory is free early
            for first in range(0, len(piece), BLOCK):
                yield piece[first : first + BLOCK]

    return blocks()


def _table(source: Source, start: int, point_size: int) -> int:
    """The place of the table of chunks, which stands before the points, or at the end of a file written to a pipe."""
    stream = source.stream
    for place in start - 8, source.size - 8:
        stream.seek(place)
        table = int.from_bytes(stream.read(8), "little", signed=True)
        if table > 0:
            break
    if not start <= table <= source.size - 8:
        raise ValueError(f"truncated: the table of chunks is at byte {table} of a file of {source.size}")
    stream.seek(table + 4)
    chunks = int.from_bytes(stream.read(4), "little")
    if chunks * point_size > table - start:  # a chunk begins with a point as it is
        raise ValueError(f"{chunks} chunks of points do not fit in {table - start} bytes")
    return table


# ---- writing -------------------------------------------------------------------------------------------------------


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write LAS 1.4.

    Coordinates are rounded to a scale, so they are within half of it. It is that of ``meta``, with its offset, if all
    points are multiples of it, as those of a .las are. Otherwise it is 1e-7 for an axis within +-180, which may be
    degrees, and 0.001 for others.

    An attribute with a name and the dtype of the point format goes there. Others become extra bytes. The point format
    is that of ``meta`` unless another one holds more attributes: the first of 6, 7 and 8 that holds the most.
    """
    laspy = optional("laspy")
    packed = cloud.meta.get("format") == ".laz"
    if packed:
        optional("lazrs")
    scale, offset, steps = _grid(cloud)
    point_format, held = _point_format(cloud)
    parts = _parts(point_format)
    if packed and point_format >= 9 and "scanner_channel" in held and np.ptp(cloud.attributes["scanner_channel"]):
        raise ValueError(
            "lazrs 0.8 damages wave packets of more than one scanner_channel when it packs them: write a .las"
        )

    header = laspy.LasHeader(version="1.4", point_format=point_format)
    header.scales, header.offsets = scale, offset
    fields = {}
    for name, values in cloud.attributes.items():
        if name not in held:
            fields[name] = _extra_name(name, parts)
            header.add_extra_dim(laspy.ExtraBytesParams(fields[name], _extra_dtype(name, values)))
    evlrs = laspy.vlrs.vlrlist.VLRList()
    if cloud.meta.get("crs"):
        crs = laspy.vlrs.known.WktCoordinateSystemVlr(cloud.meta["crs"])
        (header.vlrs if len(crs.record_data_bytes()) < 2**16 else evlrs).append(crs)
    header.global_encoding.wkt = bool(cloud.meta.get("crs")) or point_format >= 6

    points = np.zeros(len(cloud), header.point_format.dtype())
    for axis in range(3):
        points["XYZ"[axis]] = steps[:, axis]
    for part in parts:
        if part.attribute in held:
            values = cloud.attributes[part.attribute]
            if part.mask:
                points[part.field] |= values << part.shift
            else:
                points[part.field] = values if part.column is None else values[:, part.column]
    for name, field in fields.items():
        points[field] = cloud.attributes[name]

    backend = laspy.LazBackend.LazrsParallel if packed else None
    writer = laspy.LasWriter(stream, header, do_compress=packed, laz_backend=backend, closefd=False)
    writer.write_points(laspy.PackedPointRecord(points, header.point_format))
    writer.write_evlrs(evlrs)
    writer.close()


def _grid(cloud: Cloud) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scale and the offset, and the coordinates as multiples of the scale."""
    points = cloud.points.astype(np.float64, copy=False)
    if not np.isfinite(points).all():
        raise ValueError("points have NaN or infinite coordinates, and a .las file holds integers: leave them out")
    if {"scale", "offset"} <= cloud.meta.keys():
        scale, offset = (np.asarray(cloud.meta[name], np.float64) for name in ("scale", "offset"))
        if scale.shape != (3,) or offset.shape != (3,) or not np.isfinite([scale, offset]).all() or not scale.all():
            raise ValueError(f"scale and offset in meta must be 3 numbers each, and scale not 0, got {scale}, {offset}")
        with np.errstate(over="ignore", invalid="ignore"):
            steps = np.rint((points - offset) / scale)
            if (steps * scale + offset == points).all() and (abs(steps) <= INT32_MAX).all():
                return scale, offset, steps
    low, high = (points.min(axis=0), points.max(axis=0)) if len(points) else (np.zeros(3), np.zeros(3))
    scale = np.where((low >= -180) & (high <= 180), 1e-7, 0.001)
    offset = np.rint(low / 2 + high / 2) + 0.0  # no -0
    steps = np.rint((points - offset) / scale)
    if (abs(steps) > INT32_MAX).any():
        raise ValueError(
            f"coordinates from {low.tolist()} to {high.tolist()} are too far apart for 32-bit integers with a scale of "
            f"{scale.tolist()}: write parts of the points, or round them to a larger scale and give it, and an offset, "
            "as meta"
        )
    return scale, offset, steps


def _point_format(cloud: Cloud) -> tuple[int, set[str]]:
    """The point format to be written, and the attributes that it holds."""
    best = max((6, 7, 8), key=lambda point_format: len(_held(cloud, point_format)))
    old = cloud.meta.get("point_format", best)
    if old in range(11) and _held(cloud, best) <= _held(cloud, old):
        best = old
    return best, _held(cloud, best)


def _held(cloud: Cloud, point_format: int) -> set[str]:
    """The attributes that a point format holds with their dtypes and values."""
    layout = optional("laspy").point.dims.POINT_FORMATS_DTYPE[point_format]
    held = set()
    for part in _parts(point_format):
        values = cloud.attributes.get(part.attribute)
        if values is not None and values.dtype == layout[part.field]:
            shape = (len(cloud),) if part.column is None else (len(cloud), 3)
            if values.shape == shape and (not part.mask or (values <= part.mask >> part.shift).all()):
                held.add(part.attribute)
    return held


def _extra_name(name: str, parts: list[Part]) -> str:
    """What an attribute is called in the extra bytes."""
    if name.lower() in (*XYZ, *COLORS, *NAMES, *(part.field for part in parts if part.mask)):
        raise ValueError(f"attribute {name} has a name that .las files use for something else: rename it")
    extra = f"scalar_{name}" if name in {part.attribute for part in parts} else name
    if len(extra.encode()) > 32 or "\0" in extra:
        raise ValueError(f"the name of attribute {name} has no place in the 32 bytes of a .las file: rename it")
    return extra


def _extra_dtype(name: str, values: np.ndarray) -> np.dtype:
    if values.dtype.kind not in "iuf" or values.dtype.itemsize not in (1, 2, 4, 8) or values.dtype == np.float16:
        raise ValueError(
            f"attribute {name} is {values.dtype}, and extra bytes of a .las file are integers, float32 or float64: "
            "convert it by astype"
        )
    if values.ndim == 2 and values.shape[1] not in (2, 3):
        raise ValueError(
            f"attribute {name} has shape {list(values.shape)}, and extra bytes have up to 3 values a point"
        )
    return np.dtype((values.dtype.newbyteorder("="), values.shape[1:]))
