# SPDX-License-Identifier: Apache-2.0
"""NumPy's own files: .npy, one array of rows, and .npz, a zip archive of arrays with names."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any, BinaryIO

import numpy as np

from gpu3d.io.cloud import Cloud, attributes_of
from gpu3d.io.files import Source

HEADER = 10_240  # bytes; NumPy refuses longer headers of arrays
EXPANSION = 1032  # deflate writes at least 1 byte for this many
# Arrays of a .npz that hold for the whole file.
META: dict[str, tuple[int, ...]] = {"scale": (3,), "offset": (3,), "viewpoint": (7,), "crs": ()}


def read(source: Source) -> Cloud:
    """Read the points, and every array or column that has a row for each."""
    return _read_npz(source) if source.ending == ".npz" else _read_npy(source)


def _read_npy(source: Source) -> Cloud:
    shape, dtype, needed = _header_of(source.stream, source.size)
    if needed > source.size:
        raise ValueError(
            f"truncated: an array {_describe(shape, dtype)} needs {needed} bytes, the file has {source.size}"
        )
    _check_rows("the array", shape, dtype)
    source.stream.seek(0)
    return Cloud(*_columns_of(np.lib.format.read_array(source.stream, allow_pickle=False)))


def _read_npz(source: Source) -> Cloud:
    with zipfile.ZipFile(source.stream) as archive:
        headers = _headers_of(archive, source.size)

        def load(name: str) -> np.ndarray:
            with archive.open(f"{name}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)

        fields: dict[str, np.ndarray] = {}
        if "points" in headers:
            _check_rows("points", *headers["points"])
            key = "points"
            points, fields = _columns_of(load(key))
        elif "xyz" in headers:
            key = "xyz"
            shape, dtype = headers[key]
            turned = len(shape) == 2 and shape[0] == 3 != shape[1]
            _check_rows(key, shape[::-1] if turned else shape, dtype)
            points, fields = _columns_of(load(key).T if turned else load(key))
        elif "xyz_mm" in headers:
            key = "xyz_mm"
            shape, dtype = headers[key]
            if dtype != np.int32 or len(shape) != 2 or shape[0] != 3:
                raise ValueError(f"xyz_mm must be int32 [3, N], got {_describe(shape, dtype)}")
            points = np.ascontiguousarray((load(key).T / 1000).astype(np.float32))  # divided in float64, rounded once
        else:
            raise ValueError(f"expected an array points, xyz or xyz_mm, found {', '.join(headers) or 'none at all'}")

        meta: dict[str, Any] = {}
        for name, (shape, dtype) in headers.items():
            if name == key:
                continue
            if META.get(name) == shape and dtype.kind in ("U" if name == "crs" else "fiu"):
                meta[name] = str(load(name)) if name == "crs" else load(name)
            elif dtype.kind in "fiub" and len(shape) in (1, 2) and shape[0] == len(points):
                fields[name] = _native(load(name))
    return Cloud(points, attributes_of(fields), meta)


Header = tuple[tuple[int, ...], np.dtype]


def _headers_of(archive: zipfile.ZipFile, size: int) -> dict[str, Header]:
    """Shape and dtype of every array of an archive, each of which can hold what it promises."""
    members = archive.infolist()
    if sum(member.compress_size for member in members) > size:
        raise ValueError("its members are together larger than the file")
    headers: dict[str, Header] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            continue
        if name in headers:
            raise ValueError(f"it has two arrays {name}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"array {name} is compressed by a method other than deflate")
        if member.file_size > EXPANSION * member.compress_size:
            raise ValueError(f"{member.compress_size} bytes of array {name} cannot be {member.file_size} decompressed")
        with archive.open(member) as stream:
            shape, dtype, needed = _header_of(stream, member.file_size)
        if needed != member.file_size and not dtype.hasobject:
            raise ValueError(
                f"array {name} of {_describe(shape, dtype)} needs {needed} bytes, it has {member.file_size}"
            )
        headers[name] = shape, dtype
    return headers


def _header_of(stream: Any, size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and dtype of an array, and the bytes that its file must have."""
    head = io.BytesIO(stream.read(min(HEADER, size)))  # so that NumPy reads no further, whatever the length says
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"arrays of version {version[0]}.{version[1]} are not read")  # only records have others
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = parse(head)
    except MemoryError:  # Python's parser, of an expression that is too deep
        raise ValueError("the header of the array is no dictionary") from None
    # With a 0 among them, the product allows any number; these are too large for arrays that anyone writes.
    if any(not 0 <= count <= size for count in shape):
        raise ValueError(f"an array {_describe(shape, dtype)} cannot be in {size} bytes")
    return shape, dtype, head.tell() + math.prod(shape) * dtype.itemsize


def _check_rows(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not loaded (allow_pickle=False)")
    # Integers are refused because their unit is unknown: 5 mm in SemanticKITTI, millimetres in others.
    if dtype.kind != "f" or len(shape) != 2 or shape[1] < 3:
        raise ValueError(f"{name} must be floating-point [N, >=3], got {_describe(shape, dtype)}")


def _columns_of(rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The points and attributes of an array of rows."""
    # Chosen by dtype and not by values, so that all files of one writer come back with the same dtype.
    dtype = np.float32 if np.can_cast(rows.dtype, np.float32) else np.float64
    width = rows.shape[1]
    names = ["intensity"] if width == 4 else [f"column_{i}" for i in range(3, width)]
    attributes = {name: _native(rows[:, i]) for i, name in enumerate(names, start=3)}
    return np.ascontiguousarray(rows[:, :3], dtype=dtype), attributes


def _native(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{dtype} {list(shape)}"


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write an array of columns, or an archive with an array for each attribute."""
    if cloud.meta["format"] == ".npz":
        _write_npz(stream, cloud)
    else:
        _write_npy(stream, cloud)


def _write_npy(stream: BinaryIO, cloud: Cloud) -> None:
    columns = [cloud.points]
    for name, values in cloud.attributes.items():
        if name != "intensity" or values.dtype != cloud.points.dtype or values.ndim != 1:
            raise ValueError(
                f"a .npy file holds points and an intensity of their dtype {cloud.points.dtype}, and not the attribute "
                f"{name}, {_describe(values.shape, values.dtype)}: leave it out or write a .npz"
            )
        columns.append(values[:, None])
    np.lib.format.write_array(stream, np.concatenate(columns, axis=1), allow_pickle=False)


def _write_npz(stream: BinaryIO, cloud: Cloud) -> None:
    arrays = {"points": cloud.points}
    arrays |= {name: np.asarray(cloud.meta[name]) for name in META if name in cloud.meta}
    for name, array in arrays.items():
        if name in META and (array.shape != META[name] or array.dtype.kind not in ("U" if name == "crs" else "fiu")):
            raise ValueError(
                f"meta {name} must be {'text' if name == 'crs' else f'{META[name][0]} numbers'}, got {array}"
            )
    for name, values in cloud.attributes.items():
        if name in arrays or values.shape == META.get(name):
            raise ValueError(f"an attribute of a .npz file cannot be called {name}: rename it")
        arrays[name] = values
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
