# SPDX-License-Identifier: Apache-2.0
"""The GPU record: tests/gpu_record.json has a hash of the tree on which the whole GPU suite passed, and the GPU.

`python tests/gpu_record.py --check` prints whether that is the present tree. Docstrings, and lines that are a comment,
are not in the hash: a GPU need not run a tree again whose prose has changed.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "gpu_record.json"


# Files that launch nothing.
SKIPPED = {"io", "plot.py", "cli", "batch.py", "__main__.py", "data"}


def hashed_files() -> list[Path]:
    """The kernels, and every file of the package that may affect a launch."""
    files = [file for folder in ("kernels_cu", "gpu3d") for file in (ROOT / folder).rglob("*") if file.is_file()]
    return sorted(
        file
        for file in files
        if file.suffix in (".cu", ".cuh", ".py") and SKIPPED.isdisjoint(file.relative_to(ROOT).parts)
    )


def code(text: str, suffix: str) -> str:
    """A file without its docstrings and without lines that are a comment."""
    if suffix != ".py":
        return re.sub(r"^ *//.*\n", "", text, flags=re.MULTILINE)
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [""] * (docstring.end_lineno - docstring.lineno + 1)
    return re.sub(r"^ *#.*\n", "", "".join(lines), flags=re.MULTILINE)


def tree_hash() -> str:
    """The hash of the code of all `hashed_files`."""
    digest = hashlib.sha256()
    for file in hashed_files():
        text = code(file.read_text(encoding="utf-8"), file.suffix)
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0{text}\0".encode())
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
    """A sentence that says whether a GPU has run this tree."""
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
