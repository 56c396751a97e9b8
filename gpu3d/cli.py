# SPDX-License-Identifier: Apache-2.0
"""The command line.

``gpu3d demo`` buckets scans and draws them. ``gpu3d convert`` writes files in another format. ``gpu3d segment`` labels
the points of a scan. ``gpu3d info`` prints what is installed, or what is in files.

Results go to stdout, and errors to stderr, one line for each file that failed. A user's mistake never shows a
traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

import gpu3d
from gpu3d import batch, flash3d
from gpu3d.cuda import compiler
from gpu3d.io import Cloud, read_cloud, read_points, write_cloud
from gpu3d.io.files import FORMATS, ending_of, replaced
from gpu3d.plot import plot_buckets
from gpu3d.reference.buckets import bucket_radii

__all__ = ["main"]

_SCAN = "pandaset_002_00.npz"
_SCAN_TITLE = "PandaSet 002/00 (Hesai and Scale AI, CC BY 4.0)"
# What reads them, and the extra that installs it.
_IO_PACKAGES = {
    "laspy": (".las and .laz", "io"),
    "lazrs": (".laz", "io"),
    "plyfile": (".ply as text", "io"),
    "lzf": ("compressed .pcd", "io"),
    "pye57": (".e57", "e57"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Parameters
    ----------
    argv : list of str, optional
        The arguments after the program's name. Default: the arguments of the process.

    Returns
    -------
    int
        0; 1 if a file failed or the output cannot be written; 130 after Ctrl-C; 141 if a pipe was closed. A mistake in
        the arguments ends the process with 2.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text of any encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()  # a closed pipe and a full disk show here
        return code
    except KeyboardInterrupt:
        print("gpu3d: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:  # those of a file are caught with the file
        _discard_output()
        print(f"gpu3d: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def _discard_output() -> None:
    """Let what stdout still holds go nowhere; Python would try to write it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_FILES = "a point cloud: " + " ".join(FORMATS)


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="gpu3d", description="Point clouds in equal buckets.")
    parser.add_argument("--version", action="version", version=f"gpu3d {gpu3d.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="bucket a scan, print time and bucket radius, and draw it")
    demo.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        type=Path,
        help=f"{_FILES} (default: a LiDAR scan that comes with the package)",
    )
    demo.add_argument("--bucket-size", type=int, default=512, help="slots per bucket (default: %(default)s)")
    demo.add_argument(
        "--hash",
        default="zorder_div",
        help="xor_mod, xor_div, zorder_mod or zorder_div (default: %(default)s)",
    )
    demo.add_argument("--balance", default="spill", help="spill or probe (default: %(default)s)")
    demo.add_argument("-o", "--output", metavar="PNG", type=Path, help="the picture (default: ./gpu3d-demo*.png)")

    convert = commands.add_parser(
        "convert",
        help="write clouds in another format, with all their attributes",
        epilog="example: gpu3d convert scans --out ply --to .ply",
    )
    convert.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help=f"{_FILES}; or a folder of them")
    convert.add_argument("-o", "--output", metavar="FILE", type=Path, help="the file to write, for one input")
    convert.add_argument("--out", metavar="FOLDER", type=Path, help="where to write; it gets the tree of the inputs")
    convert.add_argument("--to", metavar="ENDING", help="the ending of the files in --out (default: that of the input)")
    convert.add_argument("--columns", metavar="N", type=int, help="values per point of .bin files (default: 4)")
    convert.add_argument("--jobs", metavar="N", type=int, help="processes for --out (default: one per CPU)")
    convert.add_argument("--resume", metavar="FILE", type=Path, help="notes what is done in --out, and leaves it out")
    convert.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")

    segment = commands.add_parser("segment", help="label the points of a scan by trained weights")
    segment.add_argument("scan", metavar="SCAN", type=Path, help=_FILES)
    segment.add_argument("--weights", metavar="FILE", type=Path, required=True, help="what flash3d.save wrote")
    segment.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the labels: .npy, or a cloud with an attribute label (default: ./gpu3d-segment-SCAN.npy)",
    )

    info = commands.add_parser(
        "info",
        help="print device, versions, kernel cache, and how to install what is missing; or what is in files",
        epilog="example: gpu3d info scan.laz --json",
    )
    info.add_argument("files", nargs="*", metavar="FILE", type=Path, help=_FILES)
    info.add_argument("--columns", metavar="N", type=int, help="values per point of .bin files (default: 4)")
    info.add_argument("--json", action="store_true", help="print one JSON object a line, and nothing else")

    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        if not arguments.files:
            return _info(arguments.json)
        return _each(arguments.files, lambda path: _print_file(path, arguments.columns, arguments.json))
    if arguments.command == "convert":
        return _convert_all(arguments, convert.error)
    if arguments.command == "segment":
        out = arguments.output or Path(f"gpu3d-segment-{arguments.scan.stem}.npy")
        if out.suffix.lower() != ".npy" and not out.name.lower().endswith(tuple(FORMATS)):
            segment.error(f"-o must end in .npy or in the ending of a cloud, got {out}")
        for given in (arguments.scan, arguments.weights):
            if _is_same_file(out, given):
                segment.error(f"-o is {given} itself, and an input is never overwritten")
        return _segment(arguments.scan, arguments.weights, out)
    if arguments.output and len(arguments.files) > 1:
        demo.error("-o names one picture, so it takes one FILE")
    if arguments.output and any(_is_same_file(arguments.output, path) for path in arguments.files):
        demo.error(f"-o is {arguments.output} itself, and an input is never overwritten")
    return _demo(arguments)


_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    ImportError,
    MemoryError,
)  # of a file, as the readers and functions raise them


def _each(paths: list[Path], work: Callable[[Path], None]) -> int:
    """Do the work for each file; returns the exit code. A failure is a line on stderr."""
    failed = 0
    for path in paths:
        try:
            work(path)
        except BrokenPipeError:
            raise
        except _FAILURES as error:
            failed += 1
            _print_failure(path, error)
    return int(failed > 0)


def _print_failure(path: Path, error: BaseException) -> None:
    name, text = str(path), str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        name, text = str(error.filename or path), error.strerror
    _print_line(name, text, path)


def _print_line(name: str | Path, text: str, path: Path) -> None:
    """Print what is wrong with a file, and the file's name once."""
    for what in ("read", "write"):
        text = text.removeprefix(f"cannot {what} {path}: ")
    print(f"gpu3d: {name}: {text}", file=sys.stderr)


def _is_same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them does not exist
        return False


# ---- convert -------------------------------------------------------------------------------------------------------


def _convert_all(arguments: argparse.Namespace, stop: Callable[[str], NoReturn]) -> int:
    """Convert the inputs. What would be written twice, or over an input, is a mistake in the arguments."""
    if (arguments.output is None) == (arguments.out is None):
        stop("name the file to write by -o, or a folder by --out")
    inputs = arguments.inputs
    if arguments.output is not None:
        if len(inputs) > 1 or inputs[0].is_dir():
            stop("-o names one file, so it takes one INPUT that is a file; use --out for more")
        if not arguments.output.name.lower().endswith(tuple(FORMATS)):
            stop(f"the ending of {arguments.output} is none of {' '.join(FORMATS)}")
        if _is_same_file(inputs[0], arguments.output):
            stop(f"{arguments.output} is the input itself, and an input is never overwritten")
        return _each(inputs, lambda path: _convert(path, arguments.output, arguments.columns))
    if arguments.to is not None and arguments.to.lower() not in FORMATS:
        stop(f"--to is one of {' '.join(FORMATS)}, got {arguments.to}")
    if len(inputs) > 1 and any(path.is_dir() for path in inputs):
        stop("give one folder, or files")
    try:
        report = batch.map_files(
            functools.partial(_convert, columns=arguments.columns),
            inputs[0] if inputs[0].is_dir() else inputs,
            out=arguments.out,
            to=arguments.to,
            jobs=arguments.jobs,
            resume=arguments.resume,
            progress=not arguments.json,
        )
    except (ValueError, OSError) as error:
        stop(str(error))
    for failure in report.failures:
        _print_line(failure.path, failure.error.removeprefix("ValueError: "), failure.path)
    counts = {"done": report.done, "skipped": report.skipped, "failed": len(report.failures)}
    if arguments.json:
        failures = [{"file": str(failure.path), "error": failure.error} for failure in report.failures]
        print(json.dumps({**counts, "seconds": round(report.seconds, 3), "failures": failures}))
    else:
        _print_rows([(name, f"{count:,}") for name, count in counts.items()] + [("folder", str(arguments.out))])
    return int(bool(report.failures))


def _convert(path: Path, target: Path, columns: int | None) -> None:
    columns = columns if ending_of(path).endswith(".bin") else None
    write_cloud(target, read_cloud(path, columns=columns))


# ---- demo ----------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    cupy, why_not = _working_cupy()
    if why_not:
        print("no GPU: running on NumPy (`gpu3d info` prints what is missing)")
    options = {"bucket_size": arguments.bucket_size, "hash": arguments.hash, "balance": arguments.balance}
    exit_code = 0
    for path, title, picture in _scans(arguments.files):
        try:
            rows = _demo_one(path, title, arguments.output or picture, options, cupy)
        except _FAILURES as error:
            _print_failure(path, error)
            exit_code = 1
        else:
            print()
            _print_rows(rows)
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
        title = os.fsencode(path.name).decode("utf-8", "replace")
        yield path, title, Path(f"gpu3d-demo-{path.stem}{number}.png")


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


# ---- segment -------------------------------------------------------------------------------------------------------


def _segment(scan: Path, weights: Path, out: Path) -> int:
    """Label a scan, print how many points each class has, and write the labels."""
    cupy, _ = _working_cupy()
    file = weights  # the one that an error is about
    try:
        params, config = flash3d.load(weights)
        task = flash3d.load_task(weights)
        file = scan
        cloud = read_cloud(scan)
        attributes = {}
        if any(name.startswith("intensity") for name in task.features) and "intensity" in cloud.attributes:
            attributes["intensity"] = cloud.attributes["intensity"]
        begin = time.perf_counter()
        labels = _predict(cloud.points, attributes, params, config, task, cupy)
        seconds = time.perf_counter() - begin
        file = out
        _write_labels(out, cloud, labels)
    except _FAILURES as error:
        _print_failure(file, error)
        return 1
    rows = [("scan", scan.name), ("points", f"{len(cloud):,}"), ("time", f"{seconds:.3f} s")]
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


def _write_labels(path: Path, cloud: Cloud, labels: np.ndarray) -> None:
    if path.suffix.lower() == ".npy":
        with replaced(path) as stream:
            np.save(stream, labels)
    else:
        write_cloud(path, Cloud(cloud.points, {**cloud.attributes, "label": labels}, cloud.meta))


# ---- info ----------------------------------------------------------------------------------------------------------


def _print_file(path: Path, columns: int | None, as_json: bool) -> None:
    """Print what is in a file."""
    cloud = read_cloud(path, columns=columns)
    finite = cloud.points[np.isfinite(cloud.points).all(axis=1)]
    low, high = (finite.min(axis=0).tolist(), finite.max(axis=0).tolist()) if len(finite) else (None, None)
    if as_json:
        attributes = {
            name: {"dtype": str(values.dtype), "shape": list(values.shape)} for name, values in cloud.attributes.items()
        }
        found = {"file": str(path), "points": len(cloud), "finite": len(finite), "low": low, "high": high}
        print(json.dumps({**found, "dtype": str(cloud.points.dtype), "attributes": attributes, "meta": cloud.meta}))
        return
    rows = [("file", str(path)), ("points", f"{len(cloud):,} {cloud.points.dtype}")]
    if len(finite) < len(cloud):
        rows.append(("not finite", f"{len(cloud) - len(finite):,}"))
    if low is not None and high is not None:
        rows += [(name, f"{a:.6g} to {b:.6g}") for name, a, b in zip("xyz", low, high, strict=True)]
    for name, values in cloud.attributes.items():
        shape = f" [N, {values.shape[1]}]" if values.ndim == 2 else ""
        extent = f", {values.min():.6g} to {values.max():.6g}" if values.size else ""
        rows.append((name, f"{values.dtype}{shape}{extent}"))
    rows += [(name, str(value)) for name, value in cloud.meta.items()]
    _print_rows(rows)
    print()


def _info(as_json: bool) -> int:
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
    for package, (formats, extra) in _IO_PACKAGES.items():
        if find_spec(package) is None:
            rows.append(("missing", f'{package}, which reads {formats}: pip install "gpu3d[{extra}]"'))
    if as_json:
        missing = [value for name, value in rows if name == "missing"]
        print(json.dumps({**{name: value for name, value in rows if name != "missing"}, "missing": missing}))
    else:
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
    sizes = [path.stat().st_size for path in folder.rglob("*.cubin") if path.is_file()]
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB)"


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
