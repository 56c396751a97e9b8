# SPDX-License-Identifier: Apache-2.0
"""The command line: a verb, a module of this package.

A verb's module has ``add(parser)``, which adds its options, ``run(arguments, stop)``, which returns the exit code, and
``EXAMPLE``, a line for its help. Its docstring is the help's text. Verbs on files go through `files.over_files`.

Results go to stdout, and errors to stderr, one line for each file that failed. A user's mistake never shows a
traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys

import gpu3d
from gpu3d.cli import bench, bucket, compare, completion, convert, demo, downsample, info, neighbors, segment, view

__all__ = ["main"]

_VERBS = info, demo, convert, downsample, bucket, neighbors, compare, segment, view, bench, completion


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


def _run(argv: list[str] | None) -> int:
    arguments = parser().parse_args(argv)
    return int(arguments.run(arguments))


def parser() -> argparse.ArgumentParser:
    """The parser of the command, which `completion` reads too."""
    whole = argparse.ArgumentParser(prog="gpu3d", description="Point clouds on GPUs and CPUs, from the command line.")
    whole.add_argument("--version", action="version", version=f"gpu3d {gpu3d.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in _VERBS:
        text = (verb.__doc__ or "").strip()
        notes = getattr(verb, "NOTES", None)
        one = commands.add_parser(
            verb.__name__.rpartition(".")[2],
            help=text[:1].lower() + text[1:].rstrip("."),
            description=text if notes is None else f"{text} {notes}",
            epilog=f"example: {verb.EXAMPLE}",
        )
        verb.add(one)
        one.set_defaults(run=functools.partial(verb.run, stop=one.error))
    return whole
