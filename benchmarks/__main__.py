# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks [SUITE ...]``: runs the suites, prints one table, writes benchmarks/results/<gpu>.json.

If several GPUs are visible, the name of the results file begins with their number. Some rows of the suite `interop` use
two GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    attention,
    buckets,
    data,
    flash3d,
    host,
    interop,
    neighbors,
    pooling,
    sampling,
    table,
    timing,
    transport,
)

SUITES: dict[str, Callable[[table.Setting], Iterator[table.Row]]] = {
    "buckets": buckets.run,
    "attention": attention.run,
    "pooling": pooling.run,
    "neighbors": neighbors.run,
    "sampling": sampling.run,
    "transport": transport.run,
    "interop": interop.run,
    "host": host.run,
    "flash3d": flash3d.run,
}
RESULTS = Path(__file__).resolve().parent / "results"

LEGEND = """\
Times are medians of 30 (CPU: 20; attention: 10; where two calls take turns: the least of several rounds).
graph: 20 calls in one CUDA graph, the time divided by 20. L2-warm: inputs under 50 MB. eager: device events around
calls. host: the Python call alone, the least of 300 or more (suites host and interop: the median of 1000).
ratio: ours / target. stretch: stretch target. floor: a lower bound, see the module of the suite."""


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    why_not = timing.why_no_gpu()
    if why_not:
        raise SystemExit(f"benchmarks need an NVIDIA GPU: {why_not}")
    setting = table.Setting(data.find_folder(arguments.data), arguments.quick, timing.ceilings())
    environment = _environment(setting)
    for name, value in environment.items():
        print(f"{name:<10} {value}")
    print(f"{LEGEND}\n\n{table.head()}", flush=True)
    rows, written = [], "--quick leaves rows out, so no results file is written"
    for name in arguments.suites:
        suite = _run(name, setting, environment)
        rows += suite["rows"]
        if not arguments.quick:  # now, so that a later suite that is cut off takes nothing along
            written = f"written: {_write(environment, {name: suite})}"
    print(f"\n{sum(row['verdict'] == 'MISSED' for row in rows)} of {len(rows)} rows MISSED\n{written}")
    return int(any(not all(row["checks"].values()) for row in rows))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="real scans (default: $GPU3D_DATA, else ../shared/data)"
    )
    parser.add_argument("--quick", action="store_true", help="leave out slow rows; write no results")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; the suites are {', '.join(SUITES)}")
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"--data: there is no folder {arguments.data}")
    arguments.suites = list(dict.fromkeys(arguments.suites)) or list(SUITES)
    return arguments


def _run(name: str, setting: table.Setting, environment: dict[str, Any]) -> dict[str, Any]:
    """Run one suite and print its rows; returns its entry of the results file."""
    begin = time.perf_counter()
    rows = []
    for row in SUITES[name](setting):
        print(table.lines(row), flush=True)
        rows.append(table.as_json(row))
    return {**environment, "seconds": round(time.perf_counter() - begin, 1), "rows": rows}


def _environment(setting: table.Setting) -> dict[str, Any]:
    import cupy

    runtime = cupy.cuda.runtime
    return {
        "gpu": runtime.getDeviceProperties(runtime.getDevice())["name"].decode(),
        "GPUs": runtime.getDeviceCount(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "driver": f"{_driver()} (CUDA {_cuda_version(runtime.driverGetVersion())})",
        "CUDA": _cuda_version(runtime.runtimeGetVersion()),
        "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "CuPy": cupy.__version__,
        "torch": _version("torch"),
        "JAX": _version("jax"),
        "NumPy": np.__version__,
        "CPU": _cpu(),
        "data": data.describe(setting.folder),
        "ceilings": {name: round(value, 3) for name, value in setting.ceilings._asdict().items()},
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _write(environment: dict[str, Any], suites: dict[str, Any]) -> Path:
    """Write these suites to the file of this machine, and keep its other suites."""
    RESULTS.mkdir(exist_ok=True)
    count, name = environment["GPUs"], environment["gpu"]
    machine = f"{count}x-{name}" if count > 1 else name
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | suites, indent=1) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
