# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks [SUITE ...]``: runs the suites, prints one table, writes benchmarks/results/<gpu>.json.

Where several GPUs are visible, their number stands before the name: the suite `interop` has rows that take two.
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

from benchmarks import apml, attention, buckets, data, host, interop, neighbors, pooling, table, timing

SUITES: dict[str, Callable[[table.Setting], Iterator[table.Row]]] = {
    "buckets": buckets.run,
    "attention": attention.run,
    "pooling": pooling.run,
    "neighbors": neighbors.run,
    "apml": apml.run,
    "interop": interop.run,
    "host": host.run,
}
RESULTS = Path(__file__).resolve().parent / "results"

LEGEND = """\
medians of 30 (CPU 20, attention 10, the least of rounds where it takes turns). graph: 20 calls in one CUDA graph,
divided; L2-warm: inputs under 50 MB.
eager: device events around calls. stream: of many that wait for the device. host: the Python call alone, the least of
300 or more (suite host: the median of 1000). /must: ours / must. floor: see the suite's module."""


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
    suites = {name: _run(name, setting, environment) for name in arguments.suites}
    rows = [row for suite in suites.values() for row in suite["rows"]]
    print(f"\n{sum(row['verdict'] == 'MISSED' for row in rows)} of {len(rows)} rows MISSED")
    if arguments.quick:
        print("--quick leaves rows out: nothing is written")
    else:
        print(f"written: {_write(environment, suites)}")
    return int(any(not all(row["checks"].values()) for row in rows))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="real scans (default: $GPU3D_DATA, else ../shared/data)"
    )
    parser.add_argument("--quick", action="store_true", help="leave out what takes long; write no results")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there is {', '.join(SUITES)}")
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"--data: no folder {arguments.data}")
    arguments.suites = list(dict.fromkeys(arguments.suites)) or list(SUITES)
    return arguments


def _run(name: str, setting: table.Setting, environment: dict[str, Any]) -> dict[str, Any]:
    """One suite, printed as it goes; what the results file holds of it."""
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
    """Into the machine's file: these suites anew, the others as they were."""
    RESULTS.mkdir(exist_ok=True)
    count, name = environment["GPUs"], environment["gpu"]
    machine = f"{count}x-{name}" if count > 1 else name
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | suites, indent=1) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
