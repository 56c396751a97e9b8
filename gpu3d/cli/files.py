# SPDX-License-Identifier: Apache-2.0
"""A verb on a file, on many, or on a folder: the one way that all verbs go.

A verb has a function ``work(path, target, **options)`` at the top level of its module, because worker processes import
it. It reads `path`, writes `target` if that is not None, and returns what it found as a dict that JSON can hold.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gpu3d import batch
from gpu3d.cli import devices, tables
from gpu3d.io import Cloud, read_cloud
from gpu3d.io.files import FORMATS, SCANS, ending_of

Stop = Callable[[str], NoReturn]  # ends the process with a mistake in the arguments

FILES = "a point cloud: " + " ".join(FORMATS)
_FEW = 8  # fewer files than this are done before worker processes have started


def add_inputs(parser: argparse.ArgumentParser, *, nargs: str = "+") -> None:
    """Add what every verb on files takes, but its outputs."""
    parser.add_argument("inputs", nargs=nargs, metavar="INPUT", type=Path, help=f"{FILES}; or a folder of them")
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how files are read and what is printed."""
    parser.add_argument("--columns", metavar="N", type=whole(3), help="values per point of .bin files (default: 4)")
    parser.add_argument(
        "--jobs", metavar="N", type=whole(1), help="processes for many files (default: one per CPU, or per GPU)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")


def add_outputs(parser: argparse.ArgumentParser, output: str, to: str = "that of the input") -> None:
    """Add the options that say what is written; `output` explains -o and `to` is the default ending."""
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help=output)
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where to write many; it gets the tree of the inputs"
    )
    parser.add_argument("--to", metavar="ENDING", type=str.lower, help=f"the ending of files in --out (default: {to})")
    parser.add_argument("--resume", metavar="FILE", type=Path, help="notes what is done in --out, and leaves it out")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least or (most is not None and int(text) > most):
            limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"it takes a whole number {limits}, got {text}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """The type of an option that is a length."""
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError(f"it takes a number above 0, got {text}")
    return value


def bucket_size(text: str) -> int:
    """The type of ``--bucket-size``."""
    if not text.isascii() or not text.isdigit() or not 16 <= int(text) <= 16384 or int(text) % 16:
        raise argparse.ArgumentTypeError(f"it takes a multiple of 16 from 16 to 16384, got {text}")
    return int(text)


# ---- what a verb reads -----------------------------------------------------------------------------------------------


def read(path: Path, columns: int | None) -> Cloud:
    """The cloud of a file. `columns` is for the .bin files among many."""
    return read_cloud(path, columns=columns if ending_of(path).endswith(".bin") else None)


def finite_rows(cloud: Cloud) -> np.ndarray:
    """The indices of the points whose coordinates are finite; none at all is an error."""
    rows = np.flatnonzero(np.isfinite(cloud.points).all(axis=1))
    if not len(rows):
        raise ValueError(
            f"the scan has no finite points (dropped {len(cloud):,})" if len(cloud) else "it has no points"
        )
    return rows


# ---- over files ------------------------------------------------------------------------------------------------------


def over_files(
    arguments: argparse.Namespace,
    stop: Stop,
    work: Callable[..., dict[str, Any]],
    *,
    show: Callable[[dict[str, Any]], tables.Rows] = tables.rows_of,
    writes: tuple[str, ...] = tuple(FORMATS),
    to: str | None = None,
    default: str | None = None,
    must_write: bool = False,
    ready: Callable[[], bool] = lambda: True,
) -> int:
    """Run a verb over its inputs, print what it returned, and return the exit code.

    Mistakes in the arguments stop before anything is read.

    Parameters
    ----------
    arguments
        With the options of `add_inputs`; those of `add_outputs` and ``--device`` where the verb has them.
    stop
        Prints a mistake in the arguments and exits with 2.
    work
        The function of the verb, with its options but ``device``.
    show
        The rows that are printed for what `work` returned.
    writes
        The endings that it can write.
    to
        The ending of files in ``--out`` if ``--to`` is not given. Default: that of the input.
    default
        The name of the output of one file if neither -o nor --out is given; ``{stem}`` is the input's.
    must_write
        Without -o, --out and `default` there is nothing to do.
    ready
        Asked after the checks of the arguments; False ends the run before the first file.
    """
    inputs: list[Path] = arguments.inputs
    out, output = getattr(arguments, "out", None), getattr(arguments, "output", None)
    single = len(inputs) == 1 and not inputs[0].is_dir()
    if len(inputs) > 1 and any(path.is_dir() for path in inputs):
        stop("give one folder, or files")
    if output is not None and out is not None:
        stop("name the file to write by -o, or a folder by --out, and not both")
    if output is not None and not single:
        stop("-o names one file, so it takes one INPUT that is a file; use --out for more")
    if output is None and out is None:
        if default is not None and single:
            output = Path(default.format(stem=inputs[0].stem))
        elif default is not None:
            stop("name the folder to write to by --out")
        elif must_write:
            stop("name the file to write by -o, or a folder by --out")
    if out is None and (getattr(arguments, "to", None) or getattr(arguments, "resume", None)):
        stop("--to and --resume go with --out")
    if output is not None:
        if not output.name.lower().endswith(writes):
            stop(f"the ending of {output} is none of {' '.join(writes)}")
        if is_same_file(inputs[0], output):
            stop(f"{output} is the input itself, and an input is never overwritten")
    if out is not None:
        to = arguments.to or to
        if to is not None and to not in writes:
            stop(f"--to is one of {' '.join(writes)}, got {to}")
    if not ready():
        return 1

    few = single or 1 < len(inputs) < _FEW
    jobs = arguments.jobs or (1 if few else None)
    pool: list[int] | None = None
    if hasattr(arguments, "device"):
        gpus = devices.gpus(arguments.device, stop)
        if gpus and jobs == 1:
            work = functools.partial(work, gpu=gpus[0])
        elif gpus:
            pool = gpus
            work = functools.partial(work, gpu=0)  # each worker sees its own alone
        else:
            work = functools.partial(work, gpu=None)

    found: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def each(outcome: batch.Done | batch.Failed) -> None:
        if isinstance(outcome, batch.Failed):
            error = re.sub(r"^\w*(Error|Failure): (\[Errno \d+\] )?", "", outcome.error)
            error = error.removesuffix(f": {str(outcome.path)!r}")
            tables.print_line(outcome.path, error)
            failed.append({"file": str(outcome.path), "error": error})
            return
        result = outcome.value
        for warning in result.get("warnings", ()):
            tables.print_line(outcome.path, f"warning: {warning}")
        target = outcome.target or output
        result = {"file": str(outcome.path), **result, **({} if target is None else {"written": str(target)})}
        if arguments.json:
            found.append(result)
        elif out is None:
            rows = show({name: value for name, value in result.items() if name != "warnings"})
            tables.print_rows(rows, end="\n" if single else "\n\n")

    try:
        report = batch.map_files(
            functools.partial(_attempt, work, output),
            inputs if len(inputs) > 1 or single else inputs[0],
            out=out,
            to=to if out is not None else None,
            jobs=jobs,
            devices=pool,
            resume=getattr(arguments, "resume", None),
            each=each,
            progress=not single,
        )
    except ValueError as error:
        stop(str(error))
    except OSError as error:  # of the folder or the file of --resume; without a name it is the output's
        if error.filename is None:
            raise
        tables.print_line(error.filename, tables.text_of(error, Path(error.filename)))
        return 1
    except RuntimeError as error:  # a worker could not start
        tables.print_line(inputs[0], str(error))
        return 1
    nothing = not (report.done or report.skipped or failed)
    if nothing:
        tables.print_line(inputs[0], f"no file in this folder ends in {' '.join(SCANS)}")
    if arguments.json:
        counts = {"done": report.done, "skipped": report.skipped, "failed": len(failed)}
        summary = {**counts, "seconds": round(report.seconds, 3), "failures": failed, "files": found}
        tables.print_json((found + failed)[0] if single and out is None else summary)
    elif not single or out is not None:
        rows = [("done", f"{report.done:,}"), ("skipped", f"{report.skipped:,}"), ("failed", f"{len(failed):,}")]
        rows += [("", failure["file"]) for failure in failed]
        tables.print_rows(rows if out is None else [*rows, ("folder", str(out))])
    return int(bool(failed) or nothing)


class _Failure(Exception):
    """What failed for a file, as it is printed after the file's name."""


def _attempt(
    work: Callable[..., dict[str, Any]], output: Path | None, path: Path, target: Path | None = None
) -> dict[str, Any]:
    target = target or output
    try:
        return work(path, target)
    except tables.FAILURES as error:
        text = tables.text_of(error, path)
        if isinstance(error, OSError) and target is not None and error.filename == str(target):
            text = f"cannot write {output or f'into {target.parent}'}: {error.strerror}"
        raise _Failure(text) from error


def is_same_file(a: Path, b: Path) -> bool:
    """Whether two names lead to one file."""
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them does not exist
        return False


def label_of(path: Path) -> str:
    """A file's name as a picture can show it."""
    return os.fsencode(path.name).decode("utf-8", "replace")
