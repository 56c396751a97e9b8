# SPDX-License-Identifier: Apache-2.0
"""Numbers in lines: .xyz, .txt and .csv, with or without a line of names.

Text has no dtypes. So `write` puts them in a comment, `# dtypes: float32 float32 float32 uint8`, which `read` follows.
"""

from __future__ import annotations

import io
import re
from typing import BinaryIO, NamedTuple

import numpy as np

from gpu3d.io.cloud import XYZ, Cloud, attributes_of, fields_of, points_of
from gpu3d.io.files import Source

LINES = 100_000  # that are written at once
WIDEST = 1000  # more values in a line are no attributes of a point
DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
}
SEPARATOR = re.compile(r"[\s,;]+")
TO_SPACES = bytes.maketrans(b",;", b"  ")
COMMENT = re.compile(rb"^[ \t]*(#|//).*$", re.MULTILINE)
# The one float32 whose shortest text is the neighbour of it if it is read as float64 and then rounded (all were tried).
ROUNDED_TWICE = np.uint32(0x15AE43FD).view(np.float32)


# ---- read ----------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """What stands above the numbers."""

    names: list[str]  # of the columns; empty if there is no such line
    comments: list[list[str]]  # words of comments that could be names
    dtypes: list[str]  # of the columns, in files that we wrote
    promised: int | None  # points, where a line holds their number alone
    start: int  # the byte at which the numbers begin
    line: int  # and its line, from 1


def read(source: Source) -> Cloud:
    """Read columns, by the names in the file or by how many there are."""
    text = source.stream.read().removeprefix(b"\xef\xbb\xbf")  # the byte order mark of UTF-8
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    head = _head_of(text)
    body = _body_of(text, head)
    width = len(body[: body.index(b"\n")].split())
    names = head.names or next((words for words in head.comments if len(words) == width or not width), [])
    width = width or len(names)
    if not 3 <= width <= WIDEST:
        raise ValueError(f"line {head.line} holds {width} values, expected 3 to {WIDEST}")
    if names and len(names) != width:
        raise ValueError(f"line {head.line} holds {width} values, expected the {len(names)} of {' '.join(names)[:100]}")
    dtypes = head.dtypes if len(head.dtypes) == width else []

    columns = _columns_of(body, dtypes or ["float64"] * width, head.line)
    if head.promised not in (None, len(columns[0])):
        raise ValueError(f"truncated: the header promises {head.promised} points, the file holds {len(columns[0])}")
    names = names or _names_of(columns)
    if len(set(names)) != width:
        raise ValueError(f"two columns have one name: {' '.join(names)}")
    fields = dict(zip(names, columns, strict=True))
    if dtypes:
        return Cloud(points_of(fields), attributes_of(fields))
    points = points_of(fields)
    fields |= _large_integers(body, fields)
    return Cloud(points, {name: _narrow(name, values) for name, values in attributes_of(fields).items()})


def _head_of(text: bytes) -> Head:
    names: list[str] = []
    comments: list[list[str]] = []
    dtypes: list[str] = []
    promised: int | None = None
    start, line = 0, 1
    while start < len(text):
        end = text.find(b"\n", start)
        end = len(text) if end < 0 else end
        content = text[start:end].decode("utf-8", "replace").strip()
        words = [word.strip("\"'") for word in SEPARATOR.split(content.lstrip("#/ \t").lower()) if word]
        if content.startswith(("#", "//")):
            if words[:1] == ["dtypes:"] and DTYPES.issuperset(words[1:]):
                dtypes = words[1:]
            elif words[:3] == [*XYZ]:
                comments.append(words)
        elif len(words) == 1 and words[0].isdecimal() and promised is None:
            promised = int(words[0])
        elif words and not _are_numbers(words) and not names:
            if not set(XYZ) <= set(words):
                raise ValueError(f"line {line} is neither numbers nor names with x, y and z: {content[:60]!r}")
            names = words
        elif words:
            break
        start, line = end + 1, line + 1
    return Head(names, comments, dtypes, promised, start, line)


def _are_numbers(words: list[str]) -> bool:
    try:
        for word in words:
            float(word)
    except ValueError:
        return False
    return True


def _body_of(text: bytes, head: Head) -> bytes:
    """The lines of numbers with spaces between them, one for each line of the file, so that errors can count them."""
    body = text[head.start :]
    if b"#" in body or b"//" in body:
        body = COMMENT.sub(b"", body)
    if b"," in body and b";" in body:
        raise ValueError("it has both commas and semicolons: write decimal points, and one separator")
    for separators in (b",,", b";;"):
        if separators in body:
            line = head.line + body.count(b"\n", 0, body.index(separators))
            raise ValueError(f"line {line} has an empty field: every point needs all values")
    return body.translate(TO_SPACES) + b"\n"


def _columns_of(body: bytes, dtypes: list[str], line: int) -> list[np.ndarray]:
    names = [f"column_{i}" for i in range(len(dtypes))]
    rows = np.dtype(list(zip(names, dtypes, strict=True)))
    if body.isspace():  # of which NumPy warns
        table = np.empty(0, rows)
    else:
        try:
            table = np.loadtxt(io.BytesIO(body), rows, comments=None, ndmin=1)
        except ValueError as error:
            raise ValueError(_complaint(body, len(dtypes), line) or str(error)) from None
    return [np.ascontiguousarray(table[name]) for name in names]


def _complaint(body: bytes, width: int, line: int) -> str | None:
    """What is wrong, and in which line of the file."""
    for number, content in enumerate(body.decode("latin1").split("\n"), start=line):
        words = content.split()
        if words and len(words) != width:
            return f"line {number} holds {len(words)} values, expected {width}"
        if not _are_numbers(words):
            return f"line {number} holds what is no number: {content.strip()[:60]!r}"
    return None


def _names_of(columns: list[np.ndarray]) -> list[str]:
    """Names of the columns of a file that does not have them."""
    rest = [f"column_{i}" for i in range(3, len(columns))]
    if len(columns) == 4:
        rest = ["intensity"]
    if len(columns) in (6, 7):
        colors = all(np.all((c >= 0) & (c <= 255) & (c == np.floor(c))) for c in columns[-3:])
        if colors:
            rest = ["intensity"][: len(columns) - 6] + ["r", "g", "b"]
        elif len(columns) == 6:
            rest = ["nx", "ny", "nz"]
    return [*XYZ, *rest]


def _large_integers(body: bytes, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of integers that float64 cannot hold, such as times in nanoseconds, read again."""
    large = {}
    for name, values in fields.items():
        if name not in XYZ and _are_integers(values) and 2**53 <= np.abs(values).max() <= 2**64:
            large[name] = np.uint64 if values.min() >= 0 and values.max() >= 2**63 else np.int64
    if not large:
        return {}
    positions = [i for i, name in enumerate(fields) if name in large]
    try:
        table = np.loadtxt(io.BytesIO(body), np.dtype(list(large.items())), comments=None, usecols=positions, ndmin=1)
    except ValueError:  # they stand there as 1e18, for example
        return {}
    return {name: np.ascontiguousarray(table[name]) for name in large}


def _narrow(name: str, values: np.ndarray) -> np.ndarray:
    """Integers where every value is one."""
    if name == "normals" or not _are_integers(values) or np.abs(values).max() >= 2**53:
        return values
    if name == "colors" and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)
    return values.astype(np.int64)


def _are_integers(values: np.ndarray) -> bool:
    return bool(values.dtype.kind == "f" and values.size and np.isfinite(values).all() and (values % 1 == 0).all())


# ---- write ---------------------------------------------------------------------------------------------------------


def write(stream: BinaryIO, cloud: Cloud) -> None:
    """Write names, dtypes, and a line for each point."""
    fields = fields_of(cloud)
    for name, values in fields.items():
        if SEPARATOR.search(name) or name.strip("\"'") != name:
            raise ValueError(f"attribute {name!r} has a separator or a quote in its name: rename it")
        if values.dtype.name not in DTYPES:
            raise ValueError(f"text does not hold attribute {name} of {values.dtype}: convert it by astype")
    table = cloud.meta["format"] == ".csv"
    separator = "," if table else " "
    names = separator.join(fields)
    dtypes = " ".join(values.dtype.name for values in fields.values())
    # Programs expect the names of a table in its first line, and of other text none but in a comment.
    stream.write(f"{'' if table else '# '}{names}\n# dtypes: {dtypes}\n".encode())
    for start in range(0, len(cloud), LINES):
        columns = [_texts(values[start : start + LINES]) for values in fields.values()]
        stream.write(b"\n".join(map(separator.encode().join, zip(*columns, strict=True))) + b"\n")


def _texts(values: np.ndarray) -> list[bytes]:
    """The shortest text of each value that is read as the same value."""
    if values.dtype == bool:
        values = values.view(np.uint8)
    texts = values.astype("S")
    if values.dtype == np.float32:
        for i in np.flatnonzero(np.abs(values) == ROUNDED_TWICE):
            texts[i] = b"%.9g" % values[i]
    return texts.tolist()
