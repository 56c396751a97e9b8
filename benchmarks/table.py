# SPDX-License-Identifier: Apache-2.0
"""A row of results and its lines in the table. Columns have fixed widths, so rows are printed one by one."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.timing import Ceilings

# column: width; negative widths are left-aligned
COLUMNS = {
    "what": -48,
    "timed": -14,
    "unit": -4,
    "ours": 7,
    "target": 9,
    "stretch": 7,
    "floor": 7,
    "ratio": 6,
    "": -6,
}
WIDTH = 150
WHY_WIDTH = 44  # the results file has the full text


class Setting(NamedTuple):
    """The settings that every suite gets."""

    folder: Path | None  # the folder of real scans
    quick: bool
    ceilings: Ceilings


class Peer(NamedTuple):
    """Another implementation of the same, in the unit of its row."""

    name: str
    timed: str
    value: float | None  # measured in this run; None if it did not run
    why_skipped: str = ""
    earlier: float | None = None  # published, or from another run; printed apart
    earlier_note: str = ""


NOT_INSTALLABLE = "in no registry"


def measured_peer(name: str, timed: str, measure: Callable[[], float], earlier: float | None = None) -> Peer:
    """A peer that is measured now, or the reason why it could not run."""
    try:
        return Peer(name, timed, measure(), earlier=earlier)
    except Exception as error:  # no error of a peer may end the run
        why = str(error).strip().splitlines() or [type(error).__name__]
        return Peer(name, timed, None, why[0][:200], earlier)


def graph_peer(call: timing.Call) -> Peer:
    """Our call in a CUDA graph: the device time without gaps between kernels."""
    return measured_peer("ours", "graph", lambda: timing.graph_time(call, calls=5))


def absent_peer(name: str, timed: str, earlier: float | None, note: str = "") -> Peer:
    """A peer that cannot be installed here, with an earlier figure."""
    return Peer(name, timed, None, NOT_INSTALLABLE, earlier, note)


class Row(NamedTuple):
    """One figure. `must` is its target and `aim` its stretch target: upper bounds, or lower bounds with `at_least`."""

    what: str
    timed: str  # "graph, L2-warm", "graph", "eager", "host", "CPU" or "check"
    unit: str
    ours: float | None  # None: skipped, `note` has the reason
    must: float | None = None
    aim: float | None = None
    at_least: bool = False
    floor: float | None = None
    peers: tuple[Peer, ...] = ()
    checks: dict[str, bool] = {}  # noqa: RUF012 - never changed
    note: str = ""


def wrong(row: Row) -> bool:
    """Whether a check failed, whatever the speed."""
    return not all(row.checks.values())


def missed(row: Row) -> bool:
    if row.ours is None or wrong(row):
        return wrong(row)
    return row.must is not None and not (row.ours >= row.must if row.at_least else row.ours <= row.must)


def verdict(row: Row) -> str:
    if missed(row):
        return "MISSED"
    return "ok" if row.ours is not None and (row.must is not None or row.checks) else ""


def as_json(row: Row) -> dict[str, Any]:
    return row._asdict() | {"verdict": verdict(row), "peers": [peer._asdict() for peer in row.peers]}


# ---- text ----------------------------------------------------------------------------------------------------------


def head() -> str:
    line = _line({column: column for column in COLUMNS})
    return f"{line}\n{'-' * len(line)}"


def lines(row: Row) -> str:
    """The line of the row, and below it its checks, peers and note."""
    sign = ">=" if row.at_least else "<="
    cells = {
        "what": row.what,
        "timed": row.timed,
        "unit": row.unit,
        "ours": "skipped" if row.ours is None else number(row.ours),
        "target": "" if row.must is None else f"{sign} {number(row.must)}",
        "stretch": number(row.aim),
        "floor": number(row.floor),
        "ratio": number(row.ours / row.must) if row.ours is not None and row.must else "",
        "": verdict(row),
    }
    remarks = [name if good else f"NOT: {name}" for name, good in row.checks.items()]
    parts = [_line(cells)]
    parts += textwrap.wrap("; ".join(remarks), WIDTH, initial_indent="    checked: ", subsequent_indent="    ")
    parts += [_peer_line(peer, row) for peer in row.peers]
    parts += textwrap.wrap(row.note, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(parts)


def _peer_line(peer: Peer, row: Row) -> str:
    cells = {
        "what": f"    {peer.name}",
        "timed": peer.timed,
        "unit": row.unit,
        "ours": "skipped" if peer.value is None else number(peer.value),
    }
    if peer.value is None:
        remarks = [f"skipped: {peer.why_skipped}"[:WHY_WIDTH]]
    else:
        remarks = [f"this run, {number(peer.value / row.ours)} x ours" if row.ours else "this run"]
    if peer.earlier is not None:
        remarks.append(f"published/earlier {number(peer.earlier)}{peer.earlier_note and ' ' + peer.earlier_note}")
    return f"{_line(cells)}  {'; '.join(remarks)}"


def _line(cells: dict[str, str]) -> str:
    """A line of the table, up to the last column in `cells`."""
    return "  ".join(
        cells[column].ljust(-width) if width < 0 else cells[column].rjust(width)
        for column, width in COLUMNS.items()
        if column in cells
    ).rstrip()


def number(value: float | None) -> str:
    """A number with three digits or more."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    digits = 4 if abs(value) < 0.1 else 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"
