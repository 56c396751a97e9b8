# SPDX-License-Identifier: Apache-2.0
"""A cloud as files hold it: points, attributes and what is true of the file as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points with named attributes, as a file holds them.

    Attributes
    ----------
    points : numpy.ndarray [N, 3]
        float32, or float64 where float32 cannot hold the coordinates of the file. C-contiguous, in the file's order and
        unit. NaN and infinite coordinates stand as they are in the file.
    attributes : dict of numpy.ndarray
        One row a point, [N] or [N, k], with the dtype of the file. These have the same name in every format:
        ``intensity``, ``ring``, ``time``, ``label``, ``colors`` [N, 3] and ``normals`` [N, 3]. Others have their own
        name in lower case.
    meta : dict
        What is true of the whole file: ``format`` (its ending, such as ``".las"``), and where there is one, ``scale``
        and ``offset`` [3] of integer coordinates, ``crs`` (a WKT string), ``viewpoint`` (7 numbers of a .pcd).

    Raises
    ------
    TypeError, ValueError
        An argument is not what is listed above; the message says what was received and the cure.

    Examples
    --------
    >>> import numpy as np
    >>> from gpu3d.io import Cloud
    >>> cloud = Cloud(np.zeros((2, 3), np.float32), {"intensity": np.array([0.5, 0.7], np.float32)})
    >>> len(cloud), sorted(cloud.attributes)
    (2, ['intensity'])
    """

    points: np.ndarray
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        points = self.points
        if not isinstance(points, np.ndarray) or points.dtype not in (np.float32, np.float64):
            what = points.dtype if isinstance(points, np.ndarray) else type(points).__name__
            raise TypeError(f"points must be a NumPy array of float32 or float64, got {what}: convert by np.asarray.")
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"points must have shape [N, 3], got {list(points.shape)}.")
        object.__setattr__(self, "points", np.ascontiguousarray(points))
        for name, values in self.attributes.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"names of attributes must be strings that are not empty, got {name!r}.")
            if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
                what = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
                raise TypeError(f"attribute {name} must be a NumPy array of numbers, got {what}.")
            if values.ndim not in (1, 2) or len(values) != len(points):
                raise ValueError(
                    f"attribute {name} must have a row for each of the {len(points)} points, got shape "
                    f"{list(values.shape)}."
                )

    def __len__(self) -> int:
        return len(self.points)


# ---- names ---------------------------------------------------------------------------------------------------------

# What other programs call these attributes.
ALIASES = {
    "intensity": ("remission", "reflectance", "scalar_intensity"),
    "ring": ("laser", "laser_id", "channel", "scalar_ring"),
    "time": ("timestamp", "t", "gps_time", "gpstime", "scalar_gpstime", "scalar_time"),
    "label": ("classification", "class", "category", "semantic", "scalar_label", "scalar_classification"),
}
# Fields that are the columns of one attribute.
COLUMNS = {
    "colors": (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")),
    "normals": (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")),
}
XYZ = "x", "y", "z"


def points_of(fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """The points of fields x, y and z: float32 where it holds all values of their dtypes, otherwise float64."""
    missing = [name for name in XYZ if name not in fields]
    if missing:
        raise ValueError(f"expected fields x, y and z, found {', '.join(fields) or 'none'}")
    columns = [fields[name] for name in XYZ]
    # Chosen by dtype and not by values, so that all files of one writer come back with the same dtype.
    small = all(np.can_cast(column.dtype, np.float32) for column in columns)
    return np.stack(columns, axis=1).astype(np.float32 if small else np.float64, copy=False)


def attributes_of(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The attributes of all fields but x, y and z, by the names of `Cloud`."""
    left = {name.lower(): values for name, values in fields.items() if name.lower() not in XYZ}
    found: dict[str, np.ndarray] = {}
    for name, choices in COLUMNS.items():
        for columns in choices:
            if name not in left and name not in found and all(column in left for column in columns):
                parts = [left[column] for column in columns]
                if len({part.dtype for part in parts}) == 1 and all(part.ndim == 1 for part in parts):
                    found[name] = np.stack(parts, axis=1)
                    for column in columns:
                        del left[column]
    for name, aliases in ALIASES.items():
        alias = next((alias for alias in aliases if alias in left), None)
        if name not in left and alias is not None:
            left[name] = left.pop(alias)
    return found | left


def fields_of(cloud: Cloud, columns: Iterable[str] = ("colors", "normals")) -> dict[str, np.ndarray]:
    """The fields of a file with one value each: x, y, z, and those of the attributes. The inverse of the two above.

    Of attributes with several columns only `columns` have fields; another one is an error that names it.
    """
    fields = dict(zip(XYZ, cloud.points.T, strict=True))
    for name, values in cloud.attributes.items():
        if name in XYZ:
            raise ValueError(f"an attribute cannot be called {name}: rename it")
        if values.ndim == 1:
            fields[name] = values
        elif name in columns and values.shape[1] == 3:
            for column, part in zip(COLUMNS[name][0], values.T, strict=True):
                if column in cloud.attributes:
                    raise ValueError(f"{name} and {column} would be the same field: leave one of them out")
                fields[column] = part
        else:
            raise ValueError(
                f"attribute {name} has shape {list(values.shape)}, and this format holds one value a point"
            )
    return fields
