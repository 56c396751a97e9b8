# SPDX-License-Identifier: Apache-2.0
"""Print device, versions, kernel cache, and how to install what is missing; or what is in files."""

from __future__ import annotations

import argparse
import functools
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import gpu3d
from gpu3d.cli import devices, files, tables
from gpu3d.cuda import compiler

EXAMPLE = "gpu3d info scan.laz --json"

# What reads them, and the extra that installs it.
_IO_PACKAGES = {
    "laspy": (".las and .laz", "io"),
    "lazrs": (".laz", "io"),
    "plyfile": (".ply as text", "io"),
    "lzf": ("compressed .pcd", "io"),
    "pye57": (".e57", "e57"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser, nargs="*")


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    if not arguments.inputs:
        return _installed(arguments.json)
    return files.over_files(arguments, stop, functools.partial(info, columns=arguments.columns), show=_rows)


def info(path: Path, target: None, *, columns: int | None) -> dict[str, Any]:
    """What is in a file."""
    cloud = files.read(path, columns)
    finite = cloud.points[np.isfinite(cloud.points).all(axis=1)]
    attributes = {
        name: {
            "dtype": str(values.dtype),
            "shape": list(values.shape),
            "low": values.min().item() if values.size else None,
            "high": values.max().item() if values.size else None,
        }
        for name, values in cloud.attributes.items()
    }
    return {
        "points": len(cloud),
        "finite": len(finite),
        "low": finite.min(axis=0).tolist() if len(finite) else None,
        "high": finite.max(axis=0).tolist() if len(finite) else None,
        "dtype": str(cloud.points.dtype),
        "attributes": attributes,
        "meta": cloud.meta,
    }


def _rows(found: dict[str, Any]) -> tables.Rows:
    rows = [("file", found["file"]), ("points", f"{found['points']:,} {found['dtype']}")]
    if found["finite"] < found["points"]:
        rows.append(("not finite", f"{found['points'] - found['finite']:,}"))
    if found["finite"]:
        pairs = zip("xyz", found["low"], found["high"], strict=True)
        rows += [(name, f"{low:.6g} to {high:.6g}") for name, low, high in pairs]
    for name, values in found["attributes"].items():
        shape = f" [N, {values['shape'][1]}]" if len(values["shape"]) == 2 else ""
        extent = "" if values["low"] is None else f", {values['low']:.6g} to {values['high']:.6g}"
        rows.append((name, f"{values['dtype']}{shape}{extent}"))
    return rows + [(name, str(value)) for name, value in found["meta"].items()]


def _installed(as_json: bool) -> int:
    cupy, why_not = devices.working_cupy()
    rows = [("gpu3d", gpu3d.__version__), ("Python", platform.python_version()), ("NumPy", np.__version__)]
    if cupy is None:
        rows.append(("device", devices.name_of(None)))
    else:
        driver = cupy.cuda.runtime.driverGetVersion()
        rows += [("device", devices.name_of(gpu)) for gpu in range(cupy.cuda.runtime.getDeviceCount())]
        rows += [
            ("CUDA", f"{driver // 1000}.{driver % 1000 // 10} (the newest version that the driver supports)"),
            ("CuPy", cupy.__version__),
            ("NVRTC", ".".join(map(str, compiler.nvrtc_version()))),
        ]
    rows.append(("kernel cache", _cache_shown(compiler.cache_dir())))
    if why_not:
        rows.append(("missing", why_not))
    for package, (formats, extra) in _IO_PACKAGES.items():
        if find_spec(package) is None:
            rows.append(("missing", f'{package}, which reads {formats}: pip install "gpu3d[{extra}]"'))
    if as_json:
        missing = [value for name, value in rows if name == "missing"]
        tables.print_json({**{name: value for name, value in rows if name != "missing"}, "missing": missing})
    else:
        tables.print_rows(rows)
    return 0


def _cache_shown(folder: Path | None) -> str:
    if folder is None:
        return "none, because this user has no home folder (set $GPU3D_CACHE_DIR to a folder)"
    sizes = [path.stat().st_size for path in folder.rglob("*.cubin") if path.is_file()]
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB)"
