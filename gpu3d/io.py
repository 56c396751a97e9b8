# SPDX-License-Identifier: Apache-2.0
"""Read the coordinates of a point-cloud file, and the intensity of its points.

`read_points` and `read_intensity` choose a reader by the ending of the file's name. A reader takes an open binary
stream. If it raises an exception, the caller gets a ValueError that names the file. plyfile, pypcd4 and laspy are
imported only by the readers that need them, so a base installation reads .bin, .npy and .npz.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["read_intensity", "read_points"]


def read_points(path: str | os.PathLike[str], *, columns: int | None = None) -> np.ndarray:
    """Read the x, y, z of every point of a file, in the file's order and unit.

    No point is dropped. NaN and infinite coordinates (missing returns, organised clouds) come back as they stand in the
    file; the caller filters them.

    Parameters
    ----------
    path : str or path-like
        The ending, in any case, chooses the format:

        - ``.bin``: raw float32 rows as in KITTI (x, y, z, intensity)
        - ``.pcd.bin``: the same as in nuScenes, with the ring number as a fifth value
        - ``.npy``: a floating-point array [N, >=3]; the first three columns are read
        - ``.npz``: the first of these arrays that the file has: ``points``, floating-point [N, >=3]; ``xyz``,
          floating-point [N, 3] or [3, N] (3 x 3 is read as [N, 3]); ``xyz_mm``, int32 [3, N] in millimetres, which
          come back as metres
        - ``.ply``: properties x, y, z of the element ``vertex`` (needs plyfile)
        - ``.pcd``: fields x, y, z; ascii, binary or binary_compressed (needs pypcd4)
        - ``.las``, ``.laz``: scaled integers (needs laspy, and lazrs for .laz)
    columns : int, optional
        Values per point of a ``.bin`` file, beginning with x, y, z. Default: 4, or 5 for ``.pcd.bin``.

    Returns
    -------
    numpy.ndarray [N, 3]
        C-contiguous. float64 where float32 cannot hold the coordinates of the file: .las, .laz, and doubles or
        32-bit integers in other formats. Otherwise float32. The unit is that of the file: mostly metres, feet in some
        surveys.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The ending is not one of the above, the file is truncated or corrupt, or it does not hold coordinates of this
        form.
    ImportError
        The package that reads this format is not installed.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> sweep = np.array([[1.0, 2.0, 3.0, 0.5], [4.0, 5.0, 6.0, 0.7]], dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sweep.tofile(f"{folder}/sweep.bin")
    ...     points = read_points(f"{folder}/sweep.bin")
    >>> points.shape, points.dtype
    ((2, 3), dtype('float32'))
    """
    points = _read(Path(path), _READERS, "points", columns)
    # Chosen by dtype and not by values, so that all files of one writer come back with the same dtype.
    dtype = np.float32 if np.can_cast(points.dtype, np.float32) else np.float64
    return np.ascontiguousarray(points, dtype=dtype)


def read_intensity(path: str | os.PathLike[str], *, columns: int | None = None) -> np.ndarray | None:
    """Read the intensity of every point of a file, as it stands in the file.

    Parameters
    ----------
    path : str or path-like
        The ending chooses the format, as in `read_points`. Intensity is the fourth value of a ``.bin`` and of a
        ``.npy`` with four columns, the array ``intensity`` or ``remission`` of a ``.npz``, and the property, field or
        dimension ``intensity`` of ``.ply``, ``.pcd``, ``.las`` and ``.laz``.
    columns : int, optional
        As in `read_points`.

    Returns
    -------
    numpy.ndarray [N] or None
        None if the file has no intensity. The range is that of the sensor: 0 to 1 in KITTI, 0 to 255 in nuScenes.

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
        As in `read_points`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> sweep = np.array([[1.0, 2.0, 3.0, 0.5], [4.0, 5.0, 6.0, 0.75]], dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sweep.tofile(f"{folder}/sweep.bin")
    ...     read_intensity(f"{folder}/sweep.bin")
    array([0.5 , 0.75], dtype=float32)
    """
    return _read(Path(path), _INTENSITY_READERS, "intensity", columns)


def _read(path: Path, readers: dict[str, Callable[..., Any]], what: str, columns: int | None) -> Any:
    ending = next((e for e in readers if path.name.lower().endswith(e)), None)
    if ending is None:
        raise ValueError(f"cannot tell the format of {path}: the endings read are {', '.join(readers)}")
    options = {}
    if columns is not None:
        if not ending.endswith(".bin"):
            raise ValueError(f"columns is for .bin files only, got columns={columns} for {path}")
        if columns < 3:
            raise ValueError(f"columns must be at least 3 (x, y, z), got {columns}")
        options["columns"] = columns

    with open(path, "rb") as stream:
        try:
            return readers[ending](stream, **options)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # decoders raise many kinds of error on a broken file
            reason = str(error) or type(error).__name__
            raise ValueError(f"cannot read {what} from {path}: {reason}") from error


def _read_rows(stream: BinaryIO, columns: int) -> np.ndarray:
    size = os.fstat(stream.fileno()).st_size
    if size % (4 * columns):
        raise ValueError(
            f"{size} bytes are no whole number of points of {columns} float32 values, {4 * columns} bytes; "
            "the file is truncated, or pass the columns= that it has"
        )
    return np.fromfile(stream, dtype="<f4").reshape(-1, columns)


def _read_bin(stream: BinaryIO, columns: int) -> np.ndarray:
    return _read_rows(stream, columns)[:, :3]


def _read_npy(stream: BinaryIO) -> np.ndarray:
    return _first_three_columns("the array", np.lib.format.read_array(stream, allow_pickle=False))


def _read_npz(stream: BinaryIO) -> np.ndarray:
    with np.lib.npyio.NpzFile(stream, allow_pickle=False) as arrays:
        if "points" in arrays:
            return _first_three_columns("points", arrays["points"])
        if "xyz" in arrays:
            xyz = arrays["xyz"]
            return _first_three_columns("xyz", xyz.T if xyz.shape[0] == 3 != xyz.shape[-1] else xyz)
        if "xyz_mm" in arrays:
            millimetres = arrays["xyz_mm"]
            if millimetres.dtype != np.int32 or millimetres.ndim != 2 or len(millimetres) != 3:
                raise ValueError(f"xyz_mm must be int32 [3, N], got {_describe(millimetres)}")
            return (millimetres.T / 1000).astype(np.float32)  # divided in float64, rounded once
        raise ValueError(f"expected an array points, xyz or xyz_mm, found {', '.join(arrays) or 'none at all'}")


def _read_ply(stream: BinaryIO) -> np.ndarray:
    return _stack_xyz(_ply_vertices(stream))


def _ply_vertices(stream: BinaryIO) -> np.ndarray:
    # By name: plyfile leaves a text wrapper open around a stream that it did not open itself (ResourceWarning).
    ply = _optional("plyfile").PlyData.read(stream.name)
    if "vertex" not in ply:
        raise ValueError(f"no element vertex, found {', '.join(e.name for e in ply) or 'none at all'}")
    return ply["vertex"].data


def _read_pcd(stream: BinaryIO) -> np.ndarray:
    return _stack_xyz(_pcd_records(stream))


def _pcd_records(stream: BinaryIO) -> np.ndarray:
    cloud = _optional("pypcd4").PointCloud.from_fileobj(stream)
    records = np.atleast_1d(cloud.pc_data)  # pypcd4 returns a single ascii point as a 0-d record
    _check_count(len(records), cloud.metadata.points)
    return records


def _read_las(stream: BinaryIO) -> np.ndarray:
    return np.asarray(_las(stream).xyz)


def _las(stream: BinaryIO) -> Any:
    las = _optional("laspy").read(stream)
    _check_count(len(las.points), las.header.point_count)  # if a file ends early, laspy only logs it
    return las


def _read_laz(stream: BinaryIO) -> np.ndarray:
    return np.asarray(_laz(stream).xyz)


def _laz(stream: BinaryIO) -> Any:
    _optional("lazrs")  # without lazrs, laspy would blame the file and not the installation
    return _las(stream)


# The first ending that fits is used, so .pcd.bin stands before .bin.
_READERS: dict[str, Callable[..., np.ndarray]] = {
    ".pcd.bin": partial(_read_bin, columns=5),
    ".bin": partial(_read_bin, columns=4),
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".ply": _read_ply,
    ".pcd": _read_pcd,
    ".las": _read_las,
    ".laz": _read_laz,
}


def _intensity_of_rows(rows: np.ndarray) -> np.ndarray | None:
    return rows[:, 3].copy() if rows.ndim == 2 and rows.shape[1] > 3 else None


def _intensity_of_npy(stream: BinaryIO) -> np.ndarray | None:
    rows = np.lib.format.read_array(stream, allow_pickle=False)
    return _intensity_of_rows(rows) if rows.shape[1:] == (4,) else None  # the columns of a wider one could be anything


def _intensity_of_npz(stream: BinaryIO) -> np.ndarray | None:
    with np.lib.npyio.NpzFile(stream, allow_pickle=False) as arrays:
        return next((arrays[name] for name in ("intensity", "remission") if name in arrays), None)


def _intensity_of_records(records: np.ndarray) -> np.ndarray | None:
    return np.ascontiguousarray(records["intensity"]) if "intensity" in (records.dtype.names or ()) else None


_INTENSITY_READERS: dict[str, Callable[..., np.ndarray | None]] = {
    ".pcd.bin": lambda stream, columns=5: _intensity_of_rows(_read_rows(stream, columns)),
    ".bin": lambda stream, columns=4: _intensity_of_rows(_read_rows(stream, columns)),
    ".npy": _intensity_of_npy,
    ".npz": _intensity_of_npz,
    ".ply": lambda stream: _intensity_of_records(_ply_vertices(stream)),
    ".pcd": lambda stream: _intensity_of_records(_pcd_records(stream)),
    ".las": lambda stream: np.asarray(_las(stream).intensity),
    ".laz": lambda stream: np.asarray(_laz(stream).intensity),
}


def _optional(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'reading this file needs {package}: pip install "gpu3d[io]"') from error


def _first_three_columns(name: str, array: np.ndarray) -> np.ndarray:
    # Integers are refused because their unit is unknown: 5 mm in SemanticKITTI, millimetres in others.
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] < 3:
        raise ValueError(f"{name} must be floating-point [N, >=3], got {_describe(array)}")
    return array[:, :3]


def _stack_xyz(records: np.ndarray) -> np.ndarray:
    names = records.dtype.names or ()
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"expected fields x, y and z, found {', '.join(names)}")
    return np.stack([records["x"], records["y"], records["z"]], axis=1)


def _check_count(found: int, promised: int) -> None:
    if found != promised:
        raise ValueError(f"truncated: the header promises {promised} points, the file holds {found}")


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
