# SPDX-License-Identifier: Apache-2.0
"""The launcher without a GPU: what it passes to the driver, read back from the driver's structures."""

from __future__ import annotations

import ctypes
import struct
import threading
import types

import numpy as np
import pytest

from gpu3d import _arrays
from gpu3d.cuda import buckets, clouds, compiler, launcher
from gpu3d.cuda.plan import DEVICES, Call, Input, Kernel, Number, Packed, Result, Steps

SM90 = DEVICES["sm_90a"]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


class Driver:
    """Stands in for CUDA's driver: records each launch and each clear."""

    def __init__(self):
        self.done = []
        self.version = 12030
        self.signatures = {}
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self.launch)
        self.cuMemsetD8Async = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p
        )(self.clear)

    def load(self, kernel, ordinal):
        handle = 0x1000 + len(self.signatures)
        self.signatures[handle] = kernel
        return handle, None

    def launch(self, config, function, parameters, extra):
        config = Config.from_address(config)
        kernel = self.signatures[function]
        pointers = (ctypes.c_void_p * 64).from_address(parameters)
        args = []
        places, _ = launcher.parameters(kernel.signature)
        for i, place in enumerate(places):
            (value,) = place.format.unpack(ctypes.string_at(pointers[i], place.size))
            args.append(value)
        size = ctypes.sizeof(Attribute)
        attributes = [Attribute.from_address(config.attributes + i * size) for i in range(config.count)]
        found = [(a.id, a.value[0]) for a in attributes]
        assert all(a.value[1] == a.value[2] == (a.id == 4) and not any(a.value[3:]) for a in attributes)
        shape = config.grid[0], config.block[0], config.shared_mem
        self.done.append((kernel.function, shape, config.stream, tuple(args), found))
        assert list(config.grid)[1:] == list(config.block)[1:] == [1, 1] and extra is None
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0

    def cuTensorMapEncodeTiled(self, made, kind, rank, address, sizes, strides, box, steps, *options):
        """A map that begins with the address, the sizes and strides, and the box."""
        assert made.value % 64 == 0 and (kind, rank, list(steps), *options[::3]) == (1, 3, [1, 1, 1], 0, 0)
        fields = struct.pack("<6Q3IQ", address.value, *sizes, *strides, *box, options[1])
        ctypes.memmove(made.value, fields.ljust(128, b"\0"), 128)
        return 0

    def clear(self, address, value, size, stream):
        assert value == 0
        self.done.append(("clear", address, size, stream))
        return 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(launcher, "driver", lambda: driver)
    monkeypatch.setattr(compiler, "load", driver.load)
    monkeypatch.setattr(launcher, "device", lambda ordinal: SM90)
    monkeypatch.setattr(launcher._thread, "has_context", True)
    kept = launcher._starts_early, launcher._writers
    for function in kept:
        function.cache_clear()
    yield driver
    for function in kept:
        function.cache_clear()


def a_plan():
    steps = Steps(inputs=2, results=1)
    first, second = steps.workspace("first", 100), steps.workspace("second", 24)
    steps.clear(second + 8, 16)
    kernel = Kernel("pooling_rows", "pool", "QiqfdQ24s16s", shared_mem=4096, cooperative=True)
    packed = Packed("<Qii8x", (Input(1) + 4, 7, 8))
    args = Input(0) + 16, 5, -6, 0.5, Number("scale"), None, packed, Number("bytes")
    steps.launch(kernel, grid=3, block=64, args=args, cluster=2)
    steps.launch(Kernel("pooling_rows", "other", "QQ"), grid=1, block=32, args=(Result(0), first + 1))
    steps.launch(Kernel("pooling_rows", "nothing", "Q"), grid=0, block=32, args=(first,))
    return steps.plan()


def test_what_reaches_the_driver(driver):
    plan = a_plan()
    numbers = {"scale": 0.25, "bytes": bytes(range(16))}
    launcher.run(Call(plan, numbers), (1000, 2000, 3000, 1 << 40), 0, 77)
    clear, first, second = driver.done
    at = {name: (1 << 40) + piece.offset for name, piece in plan.pieces.items()}
    assert clear == ("clear", at["second"] + 8, 16, 77)
    packed = struct.pack("<Qii8x", 2004, 7, 8)
    args = 1016, 5, -6, 0.5, 0.25, 0, packed, bytes(range(16))
    assert first == ("pool", (3, 64, 4096), 77, args, [(2, 1), (4, 2)])
    assert second == ("other", (1, 32, 0), 77, (3000, at["first"] + 1), [])


@pytest.mark.parametrize(
    ("arch", "version", "attributes"),
    [("sm_80", 13000, []), ("sm_90a", 12020, []), ("sm_90a", 12030, [(6, 1)]), ("sm_120", 13000, [])],
)
def test_early_kernels_start_early_where_they_can(driver, monkeypatch, arch, version, attributes):
    driver.version = version
    monkeypatch.setattr(launcher, "device", lambda ordinal: DEVICES[arch])
    steps = Steps(inputs=1, results=0)
    for early in (True, False):
        steps.launch(Kernel("pooling_rows", "f", "Q", early=early), grid=1, block=32, args=(Input(0),))
    launcher.run(Call(steps.plan(), {}), (1000,), 0, 7)
    assert [found for *_, found in driver.done] == [attributes, []]


def test_an_address_may_have_a_number_added(driver):
    steps = Steps(inputs=1, results=1)
    args = Input(0) + 16 + Number("bytes"), Packed("<QQ", (Result(0) + Number("bytes"), Result(0)))
    steps.launch(Kernel("pooling_rows", "f", "Q16s"), grid=1, block=32, args=args)
    plan = steps.plan()
    for number in (4, 1 << 33):
        launcher.run(Call(plan, {"bytes": number}), (1000, 2000), 0, 7)
        assert driver.done[-1][3] == (1016 + number, struct.pack("<QQ", 2000 + number, 2000))


def test_what_changes_from_run_to_run(driver):
    """A run writes only what differs from the run before: each kind of change alone reaches the driver."""
    steps = Steps(inputs=2, results=1)
    args = Input(0), Input(1) + 16 + Number("bytes"), Result(0), Number("scale"), steps.workspace("piece", 8)
    steps.launch(Kernel("pooling_rows", "f", "QQQfQ"), grid=1, block=32, args=args)
    plan, numbers = steps.plan(), {"bytes": 4, "scale": 0.5}
    runs = [
        (numbers, (1000, 2000, 3000, 4000), 7),
        (numbers, (1000, 2000, 3000, 4000), 7),
        (numbers, (1000, 2000, 3000, 4000), 8),
        (numbers, (1000, 2000, 3000, 5000), 8),
        (numbers, (1000, 2500, 3000, 5000), 8),
        (numbers, (1500, 2500, 3000, 5000), 0),
        ({"bytes": 8, "scale": 0.5}, (1500, 2500, 3000, 5000), 0),
        ({"bytes": 8, "scale": 0.25}, (1500, 2500, 3500, 5000), 0),
    ]
    for given, memories, stream in runs:
        launcher.run(Call(plan, given), memories, 0, stream)
        x, y, result, piece = memories
        expected = x, y + 16 + given["bytes"], result, given["scale"], piece
        assert driver.done[-1][2:4] == (stream or None, expected)


def test_memories_with_many_pointers(driver):
    """Pointers of memories that have many are written if that memory has moved, beside those of memories with few."""
    steps = Steps(inputs=2, results=1)
    pieces = [steps.workspace(f"piece {i}", 8) for i in range(launcher.FEW + 1)]
    for i, piece in enumerate(pieces):
        steps.launch(Kernel("pooling_rows", "f", "QQQ"), grid=1, block=32, args=(Input(i % 2) + i, Result(0), piece))
    plan = steps.plan()
    offsets = [plan.pieces[f"piece {i}"].offset for i in range(len(pieces))]
    for memories in [(1000, 2000, 3000, 4000), (1000, 2000, 3000, 9000), (1500, 2000, 3500, 9000)]:
        driver.done.clear()
        launcher.run(Call(plan, {}), memories, 0, 7)
        expected = [(memories[i % 2] + i, memories[2], memories[3] + offset) for i, offset in enumerate(offsets)]
        assert [args for _, _, _, args, _ in driver.done] == expected


def test_empty_pieces_need_no_workspace(driver):
    """A plan whose pieces are all empty gets no workspace; pointers to them are null."""
    steps = Steps(inputs=1, results=0)
    piece = steps.workspace("nothing", 0)
    steps.launch(Kernel("pooling_rows", "f", "QQ"), grid=1, block=32, args=(Input(0), piece))
    plan = steps.plan()
    assert plan.workspace == 0
    launcher.run(Call(plan, {}), [1000], 0, 7)
    assert driver.done[-1][3] == (1000, 0)


def test_runs_share_no_memory(driver):
    """A run that starts during another one does not change the arguments of the other."""
    plan, runs = a_plan(), []
    inner = driver.launch

    def launch(config, function, parameters, extra):
        if not runs:
            runs.append(1)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return inner(config, function, parameters, extra)

    def other():
        launcher._thread.has_context = True
        launcher.run(Call(plan, {"scale": 2.0, "bytes": bytes(16)}), (1, 2, 3, 4096), 0, 5)

    driver.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(launch)
    launcher.run(Call(plan, {"scale": 1.0, "bytes": bytes(16)}), (1000, 2000, 3000, 8192), 0, 6)
    scales = [(stream, args[4]) for name, _, stream, args, *_ in (d for d in driver.done if d[0] == "pool")]
    assert scales == [(5, 2.0), (6, 1.0)]


def test_an_error_of_the_driver_is_raised(driver, monkeypatch):
    class Failed(Exception):
        pass

    def fail(status):
        raise Failed(status)

    monkeypatch.setattr(launcher, "_raise", fail)
    driver.cuMemsetD8Async = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p
    )(lambda *args: 719)
    with pytest.raises(Failed, match="719"):
        launcher.run(Call(a_plan(), {"scale": 1.0, "bytes": bytes(16)}), (1, 2, 3, 4096), 0, 5)


@pytest.mark.parametrize("count", [1, 64, 65, 239, 240, 1000, 64 * 240 - 1, 64 * 240, 20_000])
def test_the_table_of_a_batch(driver, count):
    lengths = tuple(np.random.default_rng(0).integers(0, 50, count).tolist())
    points = _arrays.Spec((sum(lengths), 3), np.dtype("f4"))
    buckets._spill_plan.cache_clear()
    call = buckets.bucketize(points, lengths, 16, "zorder_div", "spill", None, 0, None, SM90)
    launcher.run(call, (16, 32, 48, 64, 1 << 40)[: 4 + (call.plan.workspace > 0)], 0, 1)
    rows = np.zeros((count + 1, 4), np.int32)
    rows[1:, 0] = np.cumsum(lengths)
    rows[1:, 3] = np.cumsum([-(-n // 16) * 16 for n in lengths])
    *writes, (function, shape, _, args, _) = driver.done
    assert function == "merge_clouds" and shape[0] == count
    table, clouds_count, bucket_size = struct.unpack_from("<Qii", args[3])
    assert (clouds_count, bucket_size) == (count, 16) and args[0] == 16 and args[4:] == (32, 48, 64)
    if count <= clouds.INLINE_CLOUDS:
        assert table == 0 and not writes
        found = np.frombuffer(args[3], np.int32, 4 * (count + 1), 16).reshape(-1, 4)
    else:
        assert table == 1 << 40
        found = np.zeros((count + 1, 4), np.int32)
        for name, _, _, (part, first, n, address), _ in writes:
            assert name == "write_clouds"
            first += (address - table) // clouds.ROW_BYTES
            found[first : first + n] = np.frombuffer(part, np.int32).reshape(-1, 4)[:n]
    np.testing.assert_array_equal(found, rows)


def test_tables_are_written_one_after_another(driver):
    """Launches that were prepared for a table write others: of other sizes, to other addresses and on other streams."""
    rng, a_run = np.random.default_rng(0), clouds.WRITES * clouds.CLOUDS_A_LAUNCH
    for rows, start, stream in ((300, 1 << 40, 1), (a_run + 1, 1 << 41, 7), (240, 4096, 0), (1, 8192, 7), (0, 16, 1)):
        table, memory = rng.bytes(16 * rows), bytearray(16 * rows)
        driver.done.clear()
        launcher.write_table(table, start, 0, stream)
        for name, shape, at, (part, first, n, address), _ in driver.done:
            assert (name, shape, at) == ("write_clouds", (1, clouds.CLOUDS_THREADS, 0), stream or None)
            begin = address - start + 16 * first
            memory[begin : begin + 16 * n] = part[: 16 * n]
        assert memory == table and len(driver.done) == -(-rows // clouds.CLOUDS_A_LAUNCH)
    assert len(launcher._writers(0)) == 1


def test_a_prepared_copy_is_used_again(driver):
    call = Call(a_plan(), {"scale": 1.0, "bytes": bytes(16)})
    for _ in range(3):
        launcher.run(call, (1, 2, 3, 4096), 0, 5)
    assert len(call.plan.ready[0].spare) == 1 and len(driver.signatures) == 2


def test_a_long_plan_is_prepared_in_parts(driver, monkeypatch):
    """Earlier parts are launched before later ones are prepared, and no part ends while branch 1 runs."""

    class Cuda:
        Stream = staticmethod(lambda **_: types.SimpleNamespace(ptr=9))
        Event = staticmethod(lambda **_: types.SimpleNamespace(ptr=11))

    monkeypatch.setattr(launcher, "_cupy_cuda", lambda: Cuda)
    for function in ("cuEventRecord", "cuStreamWaitEvent"):
        setattr(driver, function, lambda *args: 0)
    loaded = []
    monkeypatch.setattr(compiler, "load", lambda *args: loaded.append(len(driver.done)) or driver.load(*args))
    monkeypatch.setattr(launcher, "PART", 3)
    steps = Steps(inputs=1, results=0)
    piece = steps.workspace("piece", 64)

    def launch(number):
        steps.launch(Kernel("pooling_rows", f"f{number}", "QQ"), grid=1, block=32, args=(Input(0) + number, piece))

    for number in range(4):
        launch(number)
    with steps.beside():
        launch(4)
    for number in range(5, 8):
        launch(number)
    steps.join()
    launch(8)
    call = Call(steps.plan(), {})
    expected = [(f"f{number}", 9 if number == 4 else 7, (1000 + number, 1 << 40)) for number in range(9)]
    for run in range(2):
        launcher.run(call, (1000, 1 << 40), 0, 7)
        found = [(name, stream, args) for name, _, stream, args, _ in driver.done[9 * run :]]
        assert found == expected
    assert loaded == [0, 0, 0, 3, 3, 3, 3, 3, 8]
