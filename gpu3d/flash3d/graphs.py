# SPDX-License-Identifier: Apache-2.0
"""Calls of a network that come again are replayed as CUDA graphs, over one workspace.

A network has hundreds of launches, and a graph of them costs the host one. A graph serves all batches whose layouts
have the same sizes. It is captured when they come for the second time: the first time loads the kernels, and some sizes
never come again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from gpu3d._arrays import Spec
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call
from gpu3d.flash3d.levels import Layout, write_tables

MOST_GRAPHS = 32
MOST_BYTES = 1 << 30  # of their inputs and results together


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the end of this context. Python interrupts the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])


class _Kept(NamedTuple):
    """A graph and its memory."""

    graph: Any
    inputs: list[Any]  # with a row for each slot
    tables: Any
    results: list[Any]

    @property
    def nbytes(self) -> int:
        return sum([array.nbytes for array in (*self.inputs, self.tables, *self.results)])


class Graphs:
    """The graphs of one network on one GPU. The least recently used are dropped, by number and by bytes.

    Only one run is in flight at a time: runs follow each other on the caller's streams, since they share a workspace.

    Parameters
    ----------
    fixed : sequence of CuPy arrays
        The last inputs of every call. They are the same memory in each run.
    """

    def __init__(self, fixed: Sequence[Any]) -> None:
        import cupy

        self._cupy, self._fixed = cupy, list(fixed)
        self._ordinal = self._fixed[0].data.device_id
        self._workspace = cupy.empty(0, "u1")
        self._seen: set[Hashable] = set()
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._done: Any = None  # an event behind the last run

    def run(
        self,
        key: Hashable,
        make: Callable[[int], Call],
        inputs: Sequence[Any],
        layout: Layout,
        results: Sequence[Spec],
    ) -> list[Any]:
        """Run the call `make(points)` on the current stream; returns new arrays.

        Inputs are contiguous, and their rows are points. The call's next inputs are the tables of the layout and the
        fixed ones. Calls with equal keys differ in their numbers of points only. Results that have rows have one for
        each slot.
        """
        cuda = self._cupy.cuda
        with cuda.Device(self._ordinal):
            stream = cuda.get_current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            if key in self._seen and key not in self._kept:
                self._capture(key, make(layout.slots), inputs, layout, results)
            if key in self._kept:
                made = self._replay(key, inputs, layout)
            else:
                self._remember(key)
                made = [self._cupy.empty(spec.shape, spec.dtype) for spec in results]
                self._launch(make(len(inputs[0])), [*inputs, write_tables(layout)], made, stream)
            self._done = stream.record()
            return made

    def _remember(self, key: Hashable) -> None:
        if len(self._seen) >= 64 * MOST_GRAPHS:
            self._seen.clear()
        self._seen.add(key)

    def reserve(self, size: int) -> None:
        """Make the workspace at least `size` bytes.

        Raises
        ------
        MemoryError
            The GPU does not have them. What is kept stays as it is, except for a smaller workspace and its graphs.
        """
        if size > self._workspace.size:
            self._wait()
            self._kept.clear()  # these graphs hold the old workspace
            self._workspace = self._cupy.empty(0, "u1")
            with self._cupy.cuda.Device(self._ordinal):
                try:
                    self._workspace = self._cupy.empty(size, "u1")
                except MemoryError as error:
                    raise MemoryError(
                        f"this batch needs {size / 1e9:.2f} GB of workspace, which cuda:{self._ordinal} does not have: "
                        "pass fewer points at a time, or take a config with fewer channels or blocks."
                    ) from error

    def _wait(self) -> None:
        """Wait for the last run before its memory is freed: the pool may give that to another stream at once."""
        if self._done is not None:
            self._done.synchronize()

    def _launch(self, call: Call, inputs: Sequence[Any], results: Sequence[Any], stream: Any) -> None:
        self.reserve(call.plan.workspace)
        arrays = *inputs, *self._fixed, *results, self._workspace
        with uninterrupted():  # half of a training step would change half of the weights
            launcher.run(call, [array.data.ptr for array in arrays], self._ordinal, stream.ptr)

    def _capture(
        self, key: Hashable, call: Call, inputs: Sequence[Any], layout: Layout, results: Sequence[Spec]
    ) -> None:
        empty = self._cupy.empty
        own = [empty((layout.slots, *array.shape[1:]), array.dtype) for array in inputs]
        tables, made = write_tables(layout), [empty(spec.shape, spec.dtype) for spec in results]
        self.reserve(call.plan.workspace)  # before the capture, in which no memory can be allocated
        stream = self._cupy.cuda.Stream(non_blocking=True)
        stream.begin_capture()
        try:
            self._launch(call, [*own, tables], made, stream)
        finally:
            graph = stream.end_capture()
        self._kept[key] = _Kept(graph, own, tables, made)
        while len(self._kept) > 1 and (len(self._kept) > MOST_GRAPHS or self._bytes() > MOST_BYTES):
            self._wait()
            self._kept.popitem(last=False)

    def _bytes(self) -> int:
        return sum([kept.nbytes for kept in self._kept.values()])

    def _replay(self, key: Hashable, inputs: Sequence[Any], layout: Layout) -> list[Any]:
        self._kept.move_to_end(key)
        kept = self._kept[key]
        for buffer, array in zip(kept.inputs, inputs, strict=True):
            buffer.data.copy_from_device_async(array.data, array.nbytes)
        write_tables(layout, kept.tables)
        kept.graph.launch()
        return [array.copy() for array in kept.results]
