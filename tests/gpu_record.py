# SPDX-License-Identifier: Apache-2.0
"""What a GPU has run: tests/gpu_record.json names the tree on which the whole GPU suite passed, and where.

`python tests/gpu_record.py --check` says whether that is the tree at hand.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "gpu_record.json"


def tree_hash() -> str:
    """Hash of the kernels and of the modules that launch them."""
    package = ROOT / "gpu3d"
    folders = ROOT / "kernels_cu", package, package / "interop", package / "reference"  # which gives kernels constants
    files = sorted(
        file for folder in folders for file in folder.iterdir() if file.suffix in (".c", ".cu", ".cuh", ".py")
    )
    skipped = {"cli.py", "io.py", "plot.py"}  # they launch nothing
    digest = hashlib.sha256()
    for file in files:
        if file.name not in skipped:
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def write(counts: dict[str, int]) -> None:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    record = {
        "tree": tree_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": properties["name"].decode(),
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": list(cupy.cuda.nvrtc.getVersion()),
        "cupy": cupy.__version__,
        **counts,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def check() -> str:
    """One plain sentence."""
    if not RECORD.is_file():
        return "GPU record: none. No GPU has run these kernels."
    record = json.loads(RECORD.read_text())
    seen = f"{record['passed']} GPU tests passed on {record['gpu']} on {record['date']}"
    if record["tree"] == tree_hash():
        return f"GPU record: {seen}, at these kernels."
    return f"GPU record: STALE. {seen}, but kernels or launching modules have changed since: no GPU has run this tree."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", required=True)
    parser.parse_args()
    print(check())
