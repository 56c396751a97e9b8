# SPDX-License-Identifier: Apache-2.0
"""Write clouds in another format, with all their attributes."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from gpu3d.cli import files
from gpu3d.io import write_cloud

EXAMPLE = "gpu3d convert scans --out ply --to .ply"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    files.add_inputs(parser)
    files.add_outputs(parser, "the file to write, for one input")


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    work = functools.partial(convert, columns=arguments.columns)
    return files.over_files(arguments, stop, work, must_write=True)


def convert(path: Path, target: Path, *, columns: int | None) -> dict[str, Any]:
    """Write a file in the format of the target's ending."""
    cloud = files.read(path, columns)
    write_cloud(target, cloud)
    return {"points": len(cloud), "attributes": list(cloud.attributes)}
