# SPDX-License-Identifier: Apache-2.0
"""Read and write point-cloud files: coordinates and every attribute that a file has.

A format is a module of this package, chosen by the ending of the file's name (`files.FORMATS`). plyfile, pypcd4, laspy
and pye57 are imported only by the formats that need them, so a base installation has .bin, .npy, .npz and text.
"""

from gpu3d.io.cloud import Cloud
from gpu3d.io.files import read_cloud, read_points, write_cloud

__all__ = ["Cloud", "read_cloud", "read_points", "write_cloud"]
