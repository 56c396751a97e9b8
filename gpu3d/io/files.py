# SPDX-License-Identifier: Apache-2.0
"""Reads and writes a file by the module of its format.

A format is a module with two functions, or one where a format is only read:

    read(source: Source) -> Cloud           raises ValueError if the file is broken; the message need not name it
    write(stream: BinaryIO, cloud: Cloud)   raises ValueError for what the format cannot hold, before it writes a byte;
                                            cloud.meta["format"] is the ending of the file

A number of the file decides no allocation and no loop before it is held against `source.size`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpu3d.io.cloud import Cloud

# The module of each ending. The first ending that fits is used, so .pcd.bin stands before .bin.
FORMATS = {
    ".pcd.bin": "rows",
    ".bin": "rows",
    ".label": "rows",
    ".npy": "arrays",
    ".npz": "arrays",
    ".ply": "ply",
    ".pcd": "pcd",
    ".las": "las",
    ".laz": "las",
    ".e57": "e57",
    ".xyz": "text",
    ".txt": "text",
    ".csv": "text",
}

# Those that stand for a scan in a folder: labels belong to a .bin, and text files may hold anything.
SCANS = tuple(ending for ending in FORMATS if ending not in (".label", ".txt", ".csv"))


class Source(NamedTuple):
    """A file to be read."""

    stream: BinaryIO  # open, at its beginning
    size: int  # bytes
    path: Path  # for libraries that open it themselves
    ending: str  # a key of FORMATS
    columns: int | None  # what the caller says


def read_cloud(path: str | os.PathLike[str], *, columns: int | None = None) -> Cloud:
    """Read a file of points with all its attributes.

    No point is dropped. NaN and infinite coordinates (missing returns, organised clouds) come back as they stand in the
    file; the caller filters them.

    Parameters
    ----------
    path : str or path-like
        The ending, in any case, chooses the format:

        - ``.bin``: raw float32 rows as in KITTI (x, y, z, intensity)
        - ``.pcd.bin``: the same as in nuScenes, with the ring as a fifth value
        - ``.label``: the labels of a SemanticKITTI sweep, for the ``.bin`` beside it
        - ``.npy``: a floating-point array [N, >=3]; a fourth column is the intensity if there are four
        - ``.npz``: ``points`` or ``xyz``, floating-point, or ``xyz_mm``, int32 [3, N] in millimetres, which come back
          as metres; every other array with a row a point is an attribute
        - ``.ply`` (as text it needs plyfile), ``.pcd`` (compressed it needs python-neo-lzf), ``.las`` and ``.laz``
          (need laspy and lazrs), ``.e57`` (needs pye57)
        - ``.xyz``, ``.txt``, ``.csv``: numbers in lines, separated by commas, semicolons or spaces, with or without a
          line of names
    columns : int, optional
        Values per point of a ``.bin`` file, beginning with x, y, z. Default: 4, or 5 for ``.pcd.bin``.

    Returns
    -------
    Cloud

    Raises
    ------
    OSError
        There is no such file, or it cannot be read.
    ValueError
        The ending is not one of the above, the file is truncated or corrupt, or it does not hold coordinates of this
        form.
    ImportError
        The package that reads this format is not installed.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from gpu3d.io import read_cloud
    >>> sweep = np.array([[1.0, 2.0, 3.0, 0.5], [4.0, 5.0, 6.0, 0.75]], dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sweep.tofile(f"{folder}/sweep.bin")
    ...     cloud = read_cloud(f"{folder}/sweep.bin")
    >>> cloud.points.shape, cloud.attributes["intensity"]
    ((2, 3), array([0.5 , 0.75], dtype=float32))
    """
    path = Path(path)
    ending = ending_of(path)
    if columns is not None:
        if not ending.endswith(".bin"):
            raise ValueError(f"columns is for .bin files only, got columns={columns} for {path}")
        if columns < 3:
            raise ValueError(f"columns must be at least 3 (x, y, z), got {columns}")
    with _opened(path) as stream, _named(f"cannot read {path}"):
        size = os.fstat(stream.fileno()).st_size
        cloud: Cloud = _module(ending).read(Source(stream, size, path, ending, columns))
        return Cloud(cloud.points, cloud.attributes, {"format": ending, **cloud.meta})


def read_points(path: str | os.PathLike[str], *, columns: int | None = None) -> np.ndarray:
    """Read the x, y, z of every point of a file, in the file's order and unit: the points of `read_cloud`.

    Parameters
    ----------
    path, columns
        As in `read_cloud`.

    Returns
    -------
    numpy.ndarray [N, 3]
        C-contiguous. float64 where float32 cannot hold the coordinates of the file: .las, .laz, .e57, text, and doubles
        or 32-bit integers in other formats. Otherwise float32. The unit is that of the file: mostly metres, feet in
        some surveys.

    Raises
    ------
    OSError, ValueError, ImportError
        As in `read_cloud`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from gpu3d.io import read_points
    >>> sweep = np.array([[1.0, 2.0, 3.0, 0.5], [4.0, 5.0, 6.0, 0.7]], dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sweep.tofile(f"{folder}/sweep.bin")
    ...     points = read_points(f"{folder}/sweep.bin")
    >>> points.shape, points.dtype
    ((2, 3), dtype('float32'))
    """
    return read_cloud(path, columns=columns).points


def write_cloud(path: str | os.PathLike[str], cloud: Cloud | np.ndarray) -> None:
    """Write points with all their attributes.

    The file is written beside its place and then renamed. So it is there whole or not at all, and an old file stays if
    the disk is full or the call is interrupted.

    Parameters
    ----------
    path : str or path-like
        The ending chooses the format, as in `read_cloud`. A ``.label`` holds the attribute ``label`` alone.
    cloud : Cloud or numpy.ndarray [N, 3]
        Points without attributes may be an array of float32 or float64.

    Raises
    ------
    OSError
        The file cannot be written.
    TypeError, ValueError
        The format cannot hold an attribute, which is named, or the points; or the ending is none of `read_cloud`'s.
    ImportError
        The package that writes this format is not installed.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from gpu3d.io import Cloud, read_cloud, write_cloud
    >>> points = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_cloud(f"{folder}/a.npz", Cloud(points, {"label": np.array([3, 7], np.uint8)}))
    ...     read_cloud(f"{folder}/a.npz").attributes["label"]
    array([3, 7], dtype=uint8)
    """
    path = Path(path)
    if not isinstance(cloud, Cloud):
        cloud = Cloud(cloud)
    ending = ending_of(path)
    cloud, module = Cloud(cloud.points, cloud.attributes, {**cloud.meta, "format": ending}), _module(ending)
    with replaced(path) as stream, _named(f"cannot write {path}"):
        module.write(stream, cloud)


def ending_of(path: Path) -> str:
    """The key of FORMATS that fits a file's name."""
    ending = next((ending for ending in FORMATS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise ValueError(f"cannot tell the format of {path}: the endings read are {', '.join(FORMATS)}")
    return ending


def optional(package: str, extra: str = "io") -> Any:
    """A package that a format needs, which an extra of gpu3d installs."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'this format needs {package}: pip install "gpu3d[{extra}]"') from error


def _module(ending: str) -> Any:
    return import_module(f"gpu3d.io.{FORMATS[ending]}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """An open file. A FIFO or a device would never end, or block, so it is refused before it is opened."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: name the files in it")
        raise ValueError(f"{path} is no file, but a pipe or a device: copy it to a file")
    with open(path, "rb") as stream:
        yield stream


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn what decoders raise on a broken file into a ValueError that names the file."""
    try:
        yield
    except (OSError, ImportError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # bindings of other languages raise exceptions that are no Exception
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside `path`, which takes its place at the end, and is removed after an error."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the caller knows no other name
    try:
        with open(descriptor, "wb") as stream:
            yield stream
        mode = os.umask(0)  # mkstemp's file is for its owner alone
        os.umask(mode)
        os.chmod(name, 0o666 & ~mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
