# SPDX-License-Identifier: Apache-2.0
"""The command line.

``gpu3d demo`` buckets scans and draws them. ``gpu3d segment`` labels the points of a scan. ``gpu3d info`` prints what
is installed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import gpu3d
from gpu3d import flash3d
from gpu3d.cuda import compiler
from gpu3d.io import read_intensity, read_points
from gpu3d.plot import plot_buckets
from gpu3d.reference.buckets import bucket_radii

__all__ = ["main"]

_SCAN = "pandaset_002_00.npz"
_SCAN_TITLE = "PandaSet 002/00 (Hesai and Scale AI, CC BY 4.0)"
_IO_PACKAGES = {"laspy": ".las and .laz", "lazrs": ".laz", "plyfile": ".ply", "pypcd4": ".pcd"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Parameters
    ----------
    argv : list of str, optional
        The arguments after the program's name. Default: the arguments of the process.

    Returns
    -------
    int
        0, or 1 if a file failed.
    """
    parser = argparse.ArgumentParser(prog="gpu3d", description="Point clouds in equal buckets.")
    parser.add_argument("--version", action="version", version=f"gpu3d {gpu3d.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="bucket a scan, print time and bucket radius, and draw it")
    demo.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        type=Path,
        help=".bin .npy .npz .ply .pcd .las .laz (default: a LiDAR scan that comes with the package)",
    )
    demo.add_argument("--bucket-size", type=int, default=512, help="slots per bucket (default: %(default)s)")
    demo.add_argument(
        "--hash",
        default="zorder_div",
        help="xor_mod, xor_div, zorder_mod or zorder_div (default: %(default)s)",
    )
    demo.add_argument("--balance", default="spill", help="spill or probe (default: %(default)s)")
    demo.add_argument("-o", "--output", metavar="PNG", type=Path, help="the picture (default: ./gpu3d-demo*.png)")
    segment = commands.add_parser("segment", help="label the points of a scan by trained weights")
    segment.add_argument("scan", metavar="SCAN", type=Path, help=".bin .npy .npz .ply .pcd .las .laz")
    segment.add_argument("--weights", metavar="FILE", type=Path, required=True, help="what flash3d.save wrote")
    segment.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        help="the labels: .npy, or .ply with the points (default: ./gpu3d-segment-SCAN.npy)",
    )
    commands.add_parser("info", help="print device, versions, kernel cache, and how to install what is missing")

    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info()
    if arguments.command == "segment":
        out = arguments.out or Path(f"gpu3d-segment-{arguments.scan.stem}.npy")
        if out.suffix.lower() not in (".npy", ".ply"):
            segment.error(f"--out must end in .npy or .ply, got {out}")
        return _segment(arguments.scan, arguments.weights, out)
    if arguments.output and len(arguments.files) > 1:
        demo.error("-o names one picture, so it takes one FILE")
    return _demo(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    cupy, why_not = _working_cupy()
    if why_not:
        print("no GPU: running on NumPy (`gpu3d info` prints what is missing)")
    options = {"bucket_size": arguments.bucket_size, "hash": arguments.hash, "balance": arguments.balance}
    exit_code = 0
    for path, title, picture in _scans(arguments.files):
        try:
            rows = _demo_one(path, title, arguments.output or picture, options, cupy)
            print()
            _print_rows(rows)
        except (OSError, ValueError, ImportError, MemoryError) as error:
            print(f"gpu3d: {path}: {error or type(error).__name__}", file=sys.stderr)
            exit_code = 1
    return exit_code


def _scans(files: list[Path]) -> Iterator[tuple[Path, str, Path]]:
    """Yield (file, title, default picture) for each scan; pictures of equal file names are numbered."""
    if not files:
        with resources.as_file(resources.files(gpu3d) / "data" / _SCAN) as path:
            yield path, _SCAN_TITLE, Path("gpu3d-demo.png")
    taken: dict[str, int] = {}
    for path in files:
        taken[path.stem] = taken.get(path.stem, 0) + 1
        number = f"-{taken[path.stem]}" if taken[path.stem] > 1 else ""
        yield path, path.name, Path(f"gpu3d-demo-{path.stem}{number}.png")


def _demo_one(
    path: Path, title: str, picture: Path, options: dict[str, Any], cupy: ModuleType | None
) -> list[tuple[str, str]]:
    """Put one scan into buckets, draw it, and return the rows of its table."""
    points = read_points(path)
    finite = np.isfinite(points).all(axis=1)
    dropped = len(points) - int(np.count_nonzero(finite))
    if dropped:
        points = points[finite]
    if not len(points):
        raise ValueError(f"the scan has no finite points (dropped {dropped:,})")

    on_device = points if cupy is None else cupy.asarray(points)

    def bucketize() -> gpu3d.Buckets:
        return gpu3d.bucketize(on_device, check_finite=False, **options)

    buckets = bucketize()  # compiles the kernels, so the timed calls do not
    milliseconds, calls = _time_on_cpu(bucketize) if cupy is None else _time_on_gpu(bucketize, cupy)
    slots = buckets.slot_to_point.reshape(buckets.num_buckets, buckets.bucket_size)
    full = int((slots >= 0).all(axis=1).sum())
    plot_buckets(points, buckets, picture, title=title)

    rows = [
        ("scan", title),
        ("points", f"{len(points):,}" + (f" ({dropped:,} non-finite dropped)" if dropped else "")),
        ("buckets", f"{buckets.num_buckets:,} of {buckets.bucket_size:,} slots, {full:,} of them full"),
        ("time", f"{milliseconds:.3f} ms a call (median of {calls})"),
    ]
    if len(points) >= buckets.bucket_size:
        radius = float(gpu3d.bucket_quality(on_device, buckets).mean_radius)
        shuffled = _random_order_radius(points, buckets.bucket_size)
        rows.append(("mean radius", f"{radius:.3f}; of random buckets {shuffled:.3f} (in the scan's unit)"))
    rows += [("device", _cpu_name() if cupy is None else _gpu_name(cupy)), ("picture", str(picture))]
    return rows


def _time_on_cpu(call: Callable[[], object], calls: int = 5) -> tuple[float, int]:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), calls


def _time_on_gpu(call: Callable[[], object], cupy: ModuleType, calls: int = 30) -> tuple[float, int]:
    call()
    milliseconds = []
    for _ in range(calls):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(milliseconds), calls


def _random_order_radius(points: np.ndarray, bucket_size: int) -> float:
    """The mean radius of full buckets when the points are shuffled."""
    order = np.random.default_rng(0).permutation(len(points))[: len(points) // bucket_size * bucket_size]
    return float(bucket_radii(points, order, bucket_size).mean())


def _segment(scan: Path, weights: Path, out: Path) -> int:
    """Label a scan, print how many points each class has, and write the labels."""
    cupy, _ = _working_cupy()
    file = weights  # the one that an error is about
    try:
        params, config = flash3d.load(weights)
        task = flash3d.load_task(weights)
        file = scan
        points = read_points(scan)
        attributes = {}
        needed = any(name.startswith("intensity") for name in task.features)
        if needed and (intensity := read_intensity(scan)) is not None:
            if len(intensity) != len(points):
                raise ValueError(f"{len(points)} points have {len(intensity)} intensities: the file is inconsistent")
            attributes["intensity"] = intensity
        begin = time.perf_counter()
        labels = _predict(points, attributes, params, config, task, cupy)
        seconds = time.perf_counter() - begin
        file = out
        _write_labels(out, points, labels)
    except (OSError, ValueError, ImportError, MemoryError) as error:
        print(f"gpu3d: {file}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    rows = [("scan", scan.name), ("points", f"{len(points):,}"), ("time", f"{seconds:.3f} s")]
    counts = np.bincount(labels[labels >= 0], minlength=config.classes)
    rows += [(name, f"{count:,}") for name, count in zip(task.classes, counts, strict=True) if count]
    if unlabelled := int((labels < 0).sum()):
        rows.append(("not finite", f"{unlabelled:,} (label -1)"))
    rows += [("device", _cpu_name() if cupy is None else _gpu_name(cupy)), ("labels", str(out))]
    _print_rows(rows)
    return 0


def _predict(
    points: np.ndarray,
    attributes: dict[str, np.ndarray],
    params: dict[str, Any],
    config: flash3d.Config,
    task: flash3d.Task,
    cupy: ModuleType | None,
) -> np.ndarray:
    """The class of every point, int32; -1 where a coordinate or a feature is not finite."""
    labels = np.full(len(points), -1, np.int32)
    finite = np.isfinite(points).all(axis=1)
    for values in attributes.values():
        finite &= np.isfinite(values)
    kept = np.flatnonzero(finite)
    rows, parents = np.arange(len(kept)), np.arange(len(kept))
    if task.voxel:
        rows, parents = flash3d.voxel_subset(points[kept], task.voxel)
    rows = kept[rows]
    place = np.asarray if cupy is None else cupy.asarray
    thinned, known = place(points[rows]), {name: place(values[rows]) for name, values in attributes.items()}
    features = flash3d.features(thinned, known, task.features)
    if not len(kept):
        return labels
    if cupy is None:
        found = flash3d.compile(params, config)(thinned, features)
    else:
        found = flash3d.compile(_on_gpu(params, cupy), config)(thinned, features).get()
    labels[kept] = found[parents]
    return labels


def _on_gpu(params: dict[str, Any], cupy: ModuleType) -> dict[str, Any]:
    return {key: _on_gpu(x, cupy) if isinstance(x, dict) else cupy.asarray(x) for key, x in params.items()}


def _write_labels(path: Path, points: np.ndarray, labels: np.ndarray) -> None:
    if path.suffix.lower() == ".npy":
        with open(path, "wb") as file:  # np.save would add an ending to a name in capitals
            np.save(file, labels)
        return
    try:
        plyfile = import_module("plyfile")
    except ImportError as error:
        raise ImportError('writing a .ply needs plyfile: pip install "gpu3d[io]"') from error
    columns = [(name, points.dtype) for name in "xyz"] + [("label", labels.dtype)]
    vertices = np.empty(len(points), columns)
    for name, values in zip("xyz", points.T, strict=True):
        vertices[name] = values
    vertices["label"] = labels
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")]).write(str(path))


def _info() -> int:
    cupy, why_not = _working_cupy()
    rows = [("gpu3d", gpu3d.__version__), ("Python", platform.python_version()), ("NumPy", np.__version__)]
    if cupy is None:
        rows.append(("device", _cpu_name()))
    else:
        driver = cupy.cuda.runtime.driverGetVersion()
        rows += [
            ("device", _gpu_name(cupy)),
            ("CUDA", f"{driver // 1000}.{driver % 1000 // 10} (the newest version that the driver supports)"),
            ("CuPy", cupy.__version__),
            ("NVRTC", ".".join(map(str, compiler.nvrtc_version()))),
        ]
    rows.append(("kernel cache", _describe_cache(compiler.cache_dir())))
    if why_not:
        rows.append(("missing", why_not))
    for package, formats in _IO_PACKAGES.items():
        if find_spec(package) is None:
            rows.append(("missing", f'{package}, which reads {formats}: pip install "gpu3d[io]"'))
    _print_rows(rows)
    return 0


def _working_cupy() -> tuple[ModuleType | None, str]:
    """CuPy if it can compile and run kernels; otherwise None, and a text that names what is missing and the cure."""
    cure = 'pip install "gpu3d[cuda13]", or "gpu3d[cuda12]" for a driver older than 580'
    if find_spec("cupy") is None:
        return None, f"CuPy: {cure}"
    # A broken installation raises errors of many kinds. Each means the same here: this part does not work.
    try:
        cupy = import_module("cupy")
    except Exception as error:
        return None, f"a CuPy that can be imported ({error}): {cure}"
    try:
        cupy.zeros(1)
    except Exception as error:
        return None, f"an NVIDIA GPU and driver that CuPy {cupy.__version__} can use ({error})"
    try:
        compiler.nvrtc_version()
    except Exception as error:
        return None, f"NVRTC, which compiles the kernels ({error}): {cure}"
    return cupy, ""


def _gpu_name(cupy: ModuleType) -> str:
    device = cupy.cuda.Device()
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    major, minor = device.compute_capability[:-1], device.compute_capability[-1]
    return f"{name}, compute capability {major}.{minor}"


def _cpu_name() -> str:
    return f"CPU ({platform.machine()}), NumPy {np.__version__}"


def _describe_cache(folder: Path | None) -> str:
    if folder is None:
        return "none, because this user has no home folder (set $GPU3D_CACHE_DIR to a folder)"
    files = list(folder.rglob("*.cubin"))
    return f"{folder} ({len(files)} kernels, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB)"


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
