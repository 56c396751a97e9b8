# SPDX-License-Identifier: Apache-2.0
"""A process that decodes .laz and .e57, because a broken file can make lazrs and libE57 abort the process they run in.

It starts with the first such file, stays for the next ones, and ends with this process, however this one ends. It runs
this file as a script, without gpu3d, so that it starts within 0.1 s.

A request is a line of JSON. The answer is a sequence of frames, each with a head (JSON) and bytes. The head of the last
one has `error`: null, or the reason why there is no more.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

FRAME = struct.Struct("<IQ")  # the bytes of the head and those after it
GIGABYTE = 1 << 30
# A .laz has no more. Each point costs one of 64 or more symbols. The decoder counts about 2^15 of them, and no symbol
# less than once. So a point costs at least -log2(1 - 63 / 2^15) = 0.0028 bit.
POINTS_IN_A_BYTE = 4096

# The layers of the items in point formats 6 to 10: points, colors, colors with near infrared, wave packets. Each extra
# byte of item 14 is a layer.
LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}

# ---- the caller's side ---------------------------------------------------------------------------------------------

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


def decode(format: str, **request: Any) -> list[tuple[dict[str, Any], bytearray]]:
    """The frames with which the helper answers, by `laz` or `e57` below. What goes wrong there is a ValueError here."""
    with _lock:
        process = _started()
        try:
            assert process.stdin is not None and process.stdout is not None
            _write(process.stdin, json.dumps({"format": format, **request}).encode() + b"\n")
            frames = []
            while True:
                head_size, size = FRAME.unpack(_filled(process.stdout, FRAME.size))
                head = json.loads(_filled(process.stdout, head_size))
                if "error" in head:
                    break
                frames.append((head, _filled(process.stdout, size)))
        except (EOFError, BrokenPipeError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            raise ValueError(f"the decoder {_stop()}: the file is corrupt, or memory ran out") from error
        except BaseException:  # the rest of an answer must not be taken for the next one
            _stop()
            raise
    if head["error"] is not None:
        raise ValueError(head["error"])
    return frames


def _started() -> subprocess.Popen[bytes]:
    global _process
    if _process is not None and _process.poll() is not None:
        _stop()
    if _process is None:
        # -I: the folder of this file, with modules called text and arrays, must not be searched for imports.
        _process = subprocess.Popen(
            [sys.executable, "-I", __file__, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a buffer has a lock, which another thread may hold when this process forks
        )
    return _process


def _stop() -> str:
    """End the helper, and say how it ended."""
    global _process
    process, _process = _process, None
    if process is None:
        return "did not start"
    _close(process)
    process.kill()  # no effect on one that has ended
    code = process.wait()
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _forget() -> None:
    """After a fork the helper is the parent's. It sees that the parent has ended only if nobody else has its pipes."""
    global _lock, _process
    _lock = threading.Lock()
    process, _process = _process, None
    if process is not None:
        _close(process)
        process.returncode = 0  # nothing to wait for


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in process.stdin, process.stdout:
        assert stream is not None
        stream.close()


def _filled(stream: Any, size: int) -> bytearray:
    """The next `size` bytes of a stream without buffer."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        read = stream.readinto(view)
        if not read:
            raise EOFError
        view = view[read:]
    return data


def _write(stream: Any, data: Any) -> None:
    """Write all of the data to a stream without buffer, which a signal makes write a part."""
    view = memoryview(data).cast("B")
    while view:
        view = view[stream.write(view) :]


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

# ---- the helper's side ---------------------------------------------------------------------------------------------

Frames = Iterator[tuple[dict[str, Any], Any]]


def serve() -> None:
    """Answer requests until the caller has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, and a terminal sends it to all
    sys.path[:] = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        error = None
        try:
            for head, data in FORMATS[request.pop("format")](**request):
                _send(answers, head, data)
        except BrokenPipeError:
            return
        except BaseException as caught:  # a panic of lazrs is no Exception
            error = str(caught).partition("\n")[0] or type(caught).__name__
        _send(answers, {"error": error}, b"")


def _send(stream: Any, head: dict[str, Any], data: Any) -> None:
    text = json.dumps(head).encode()
    _write(stream, FRAME.pack(len(text), memoryview(data).nbytes) + text)
    _write(stream, data)


def _limit_memory(size: int) -> None:
    """Let this process have `size` bytes, besides what Python, its libraries and a thread for each core take."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = size + GIGABYTE + (os.cpu_count() or 1) * (80 << 20)  # the stack and the heap that a thread reserves
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def laz(path: str, start: int, table: int | None, count: int, size: int, vlr: str) -> Frames:
    """The `count` records of `size` bytes, in pieces.

    Of the file: `start` is where compressed points begin, `table` where the table of chunks is and they end; None if
    they are one chunk without a table. `vlr` is the data of the laszip record.
    """
    import lazrs

    _limit_memory(0)
    data = bytes.fromhex(vlr)
    with open(path, "rb") as stream:
        if table is None:
            stream.seek(start)
            decoder = lazrs.LasZipDecompressor(stream, data)
            for first in range(0, count, 1 << 18):
                piece = bytearray(min(1 << 18, count - first) * size)
                decoder.decompress_many(piece)
                yield {}, piece
            return
        chunks = _chunks(stream, table, table - start, count, lazrs.LazVlr(data))
        stream.seek(start)
        step = 4 * (os.cpu_count() or 1)  # some chunks for each core, which decode at the same time
        for first in range(0, len(chunks), step):
            group = chunks[first : first + step]
            piece_size = sum(points for points, _ in group) * size
            _limit_memory(piece_size)
            piece = bytearray(piece_size)
            compressed = stream.read(sum(packed for _, packed in group))
            _check_layers(compressed, group, size, data)
            lazrs.decompress_points_with_chunk_table(compressed, data, piece, group)
            yield {}, piece


def _chunks(stream: Any, table: int, available: int, count: int, vlr: Any) -> list[tuple[int, int]]:
    """The points and the bytes of each chunk, when they agree with the number of points and the size of the file."""
    import lazrs

    stream.seek(table)
    chunks = [chunk for chunk in lazrs.read_chunk_table_only(stream, vlr) if chunk != (0, 0)]
    if not vlr.uses_variable_size_chunks():
        full = vlr.chunk_size()
        chunks = [(min(full, count - i * full), packed) for i, (_, packed) in enumerate(chunks)]
    if sum(points for points, _ in chunks) != count or any(points <= 0 for points, _ in chunks):
        raise ValueError(f"the table of chunks does not fit the header, which promises {count} points")
    if sum(packed for _, packed in chunks) > available:
        raise ValueError("the chunks are longer than the file")
    if any(points > POINTS_IN_A_BYTE * packed for points, packed in chunks):
        raise ValueError("a chunk is too short for its points")
    return chunks


def _check_layers(compressed: bytes, chunks: list[tuple[int, int]], size: int, vlr: bytes) -> None:
    """Check the number of points and the bytes of the layers that chunks of point formats 6 to 10 begin with."""
    items = struct.iter_unpack("<HHH", vlr[34 : 34 + 6 * int.from_bytes(vlr[32:34], "little")])
    layers = sum(LAYERS.get(item, 0) if item != 14 else item_size for item, item_size, _ in items)
    first = 0
    for points, packed in chunks:
        if layers:
            number, *sizes = struct.unpack_from(f"<{1 + layers}I", compressed, first + size)
            if number != points or size + 4 * (1 + layers) + sum(sizes) > packed:
                raise ValueError(
                    f"a chunk of {points} points and {packed} bytes promises {number} points and more bytes"
                )
        first += packed


def e57(path: str, size: int) -> Frames:
    """The fields of all scans, in pieces of points. The head has the number of the scan, its pose, and the field."""
    import numpy as np
    from pye57 import libe57

    _limit_memory(size)
    image = libe57.ImageFile(path, "r")
    scans = image.root()["data3D"]
    for scan in range(len(scans)):
        points = scans[scan]["points"]
        count = points.childCount()
        prototype = libe57.StructureNode(points.prototype())
        nodes = [prototype[prototype.get(i).elementName()] for i in range(prototype.childCount())]
        fields = [field for field in map(_e57_number, nodes) if field is not None]
        bits = sum(bits for _, _, bits in fields)  # 0 if all points are the same, which is not believed
        if count * max(bits, 1) > 8 * size:
            raise ValueError(f"truncated: scan {scan} promises {count} points, the file has {size} bytes")
        head = {"scan": scan, **_e57_pose(scans[scan])}
        if not count:
            for name, dtype, _ in fields:
                yield {**head, "field": name, "dtype": dtype}, b""
            continue  # libE57 does not read a scan without points
        capacity = min(count, 1 << 18)
        # Of the integers of NumPy, libE57 knows this one on all systems.
        arrays = [np.empty(capacity, np.longlong if dtype[0] in "iu" else dtype) for _, dtype, _ in fields]
        buffers = libe57.VectorSourceDestBuffer()
        for (name, _, _), array in zip(fields, arrays, strict=True):
            buffers.append(libe57.SourceDestBuffer(image, name, array, capacity, True, True))
        reader = points.reader(buffers)
        left = count
        while left:
            read = reader.read()
            if not 0 < read <= left:
                raise ValueError(f"truncated: {left} of {count} points of scan {scan} are missing")
            left -= read
            for (name, dtype, _), array in zip(fields, arrays, strict=True):
                yield {**head, "field": name, "dtype": dtype}, array[:read].astype(dtype)
        reader.close()
    image.close()


def _e57_number(node: Any) -> tuple[str, str, int] | None:
    """The name of a field, the dtype that holds its values, and the bits that one takes. None for texts."""
    import numpy as np
    from pye57 import libe57

    name = node.elementName()
    if isinstance(node, libe57.FloatNode):
        return (name, "<f4", 32) if node.precision() == libe57.E57_SINGLE else (name, "<f8", 64)
    if not isinstance(node, (libe57.IntegerNode, libe57.ScaledIntegerNode)):
        return None
    low, high = node.minimum(), node.maximum()
    bits = (high - low).bit_length()
    if isinstance(node, libe57.ScaledIntegerNode):
        return name, "<f8", bits
    types = [np.dtype(name) for name in ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<i8")]
    return name, next(t.str for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max), bits


def _e57_pose(scan: Any) -> dict[str, list[float]]:
    """The rotation, a quaternion, and the translation of a scan."""
    pose = {"rotation": [1.0, 0.0, 0.0, 0.0], "translation": [0.0, 0.0, 0.0]}
    if scan.isDefined("pose"):
        for name, parts in ("rotation", "wxyz"), ("translation", "xyz"):
            if scan["pose"].isDefined(name):
                pose[name] = [float(scan["pose"][name][part].value()) for part in parts]
    return pose


FORMATS: dict[str, Callable[..., Frames]] = {"laz": laz, "e57": e57}

if __name__ == "__main__":
    serve()
