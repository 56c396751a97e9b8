# SPDX-License-Identifier: Apache-2.0
"""What verbs print: tables and JSON on stdout, a line for each failure on stderr."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

# What readers and functions raise for a file.
FAILURES = (OSError, ValueError, TypeError, ImportError, MemoryError)

Rows = list[tuple[str, str]]


def print_rows(rows: Rows, end: str = "\n") -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    # A progress bar may be drawn on stderr: tqdm moves it out of the way.
    tqdm.write("\n".join(f"{name:<{width}}  {value}" for name, value in rows), file=sys.stdout, end=end)


def print_json(result: dict[str, Any]) -> None:
    """Print one object. JSON has no infinity and no NaN: they become null."""
    print(json.dumps(_plain(result), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows_of(result: dict[str, Any]) -> Rows:
    """The rows of a result: its fields that are not empty, with readable names and numbers."""
    return [(name.replace("_", " "), shown(value)) for name, value in result.items() if value != []]


def shown(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def text_of(error: BaseException, path: Path) -> str:
    """What is wrong with a file, without the file's name where that is `path`."""
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and str(error.filename) != str(path)
        return f"{error.filename}: {error.strerror}" if other else error.strerror
    text = str(error) or type(error).__name__
    for what in ("read", "write"):
        text = text.removeprefix(f"cannot {what} {path}: ")
    return text


def print_line(name: str | Path, text: str) -> None:
    """Print a failure or a warning."""
    tqdm.write(f"gpu3d: {name}: {text}", file=sys.stderr)
