# SPDX-License-Identifier: Apache-2.0
"""Calls of a network that come again are replayed as CUDA graphs, over one workspace.

A network has hundreds of launches, and a graph of them costs the host one. A call is captured at its second run: the
first one loads its kernels, and most calls with lengths of their own never come again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from gpu3d._arrays import Spec
from gpu3d.cuda import launcher
from gpu3d.cuda.plan import Call

MOST_GRAPHS = 16
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
        self._kept: OrderedDict[Hashable, tuple[Any, list[Any], list[Any]]] = OrderedDict()
        self._done: Any = None  # an event behind the last run

    def run(self, key: Hashable, make: Callable[[], Call], inputs: Sequence[Any], results: Sequence[Spec]) -> list[Any]:
        """Run the call `make()` on the current stream; returns new arrays.

        Runs with equal keys have the same call, and inputs of the same shapes and dtypes. Inputs are contiguous.
        """
        cuda = self._cupy.cuda
        with cuda.Device(self._ordinal):
            stream = cuda.get_current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            if key in self._kept:
                made = self._replay(key, inputs)
            elif key in self._seen:
                made = self._capture(key, make(), inputs, results)
            else:
                self._remember(key)
                made = [self._cupy.empty(spec.shape, spec.dtype) for spec in results]
                self._launch(make(), inputs, made, stream)
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

    def _launch(self, call: Call, inputs: Sequence[Any], results: Sequence[Any], stream: Any) -> None:
        self.reserve(call.plan.workspace)
        arrays = *inputs, *self._fixed, *results, self._workspace
        with uninterrupted():  # half of a training step would change half of the weights
            launcher.run(call, [array.data.ptr for array in arrays], self._ordinal, stream.ptr)

    def _capture(self, key: Hashable, call: Call, inputs: Sequence[Any], results: Sequence[Spec]) -> list[Any]:
        own = [self._cupy.empty_like(array) for array in inputs]
        made = [self._cupy.empty(spec.shape, spec.dtype) for spec in results]
        stream = self._cupy.cuda.Stream(non_blocking=True)
        stream.begin_capture()
        try:
            self._launch(call, own, made, stream)
        finally:
            graph = stream.end_capture()
        self._kept[key] = graph, own, made
        while len(self._kept) > 1 and (len(self._kept) > MOST_GRAPHS or self._bytes() > MOST_BYTES):
            self._kept.popitem(last=False)
        return self._replay(key, inputs)

    def _bytes(self) -> int:
        return sum([array.nbytes for _, own, made in self._kept.values() for array in (*own, *made)])

    def _replay(self, key: Hashable, inputs: Sequence[Any]) -> list[Any]:
        self._kept.move_to_end(key)
        graph, own, made = self._kept[key]
        for buffer, array in zip(own, inputs, strict=True):
            buffer.data.copy_from_device_async(array.data, array.nbytes)
        graph.launch()
        return [array.copy() for array in made]
