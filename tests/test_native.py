# SPDX-License-Identifier: Apache-2.0
"""play.c: it launches what Python launches, and answers XLA as Python does. CUDA's driver is a stand-in that notes."""

import ctypes
import os
import shutil
import struct
import sys
import tempfile
import types

import pytest
from test_replay import FUNCTION, _kernel, _taken

from gpu3d import _cuda
from gpu3d.interop import _native, _replay

LAUNCH = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]


class Driver:
    """What was launched and cleared, in order; `status` is what it returns."""

    def __init__(self):
        self.steps, self.status, self.device = [], 0, 0
        launch = ctypes.CFUNCTYPE(ctypes.c_int, *LAUNCH, ctypes.c_void_p)(self.launch)
        cooperative = ctypes.CFUNCTYPE(ctypes.c_int, *LAUNCH)(lambda *args: self.launch(*args, "cooperatively"))
        clear = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
        clear = ctypes.CFUNCTYPE(ctypes.c_int, *clear)(self.clear)
        current = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))(self.current)
        self.functions = launch, cooperative, clear, current

    def launch(self, function, *size_and_rest):
        *size, stream, parameters, extra = size_and_rest
        sizes = 8, 24, 4, 8  # of test_replay's kernel
        values = [ctypes.string_at(parameters[i], n) for i, n in enumerate(sizes)]
        self.steps.append((function, tuple(size), stream, b"".join(values), extra))
        return self.status

    def clear(self, *args):
        self.steps.append(args)
        return self.status

    def current(self, device):
        device[0] = self.device
        return 0


def stand_in(monkeypatch):
    """A library of the test's own, whose driver it is."""
    driver = Driver()
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in driver.functions]
    if shutil.which(os.environ.get("CC") or "cc") is None:
        pytest.skip("there is no C compiler")
    driver.library = _native.load(addresses)
    monkeypatch.setattr(_native, "library", lambda: driver.library)
    monkeypatch.setattr(_cuda, "make_context_current", lambda: None)
    return driver


@pytest.fixture
def driver(monkeypatch):
    fake = types.SimpleNamespace(runtime=types.SimpleNamespace(memsetAsync=None))
    fake.driver = types.SimpleNamespace(CUDADriverError=RuntimeError)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=fake))
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake)
    return stand_in(monkeypatch)


def test_a_program_is_played(driver):
    kernel = _kernel([])
    program = _replay.program_of(_taken(kernel, 10**12), _taken(kernel, 10**13 + 10**6))
    assert program.words is not None
    for base in (1000, 9000):
        _replay.play(program, [base, 5000], 77)
        cleared, launched = driver.steps
        view = struct.pack("<QQQ", 5016, 2**40, 5000 + _replay.PIECE + _replay.GAP)
        assert cleared == (5032, 0, 8, 77)
        assert launched == (FUNCTION, (3, 1, 1, 128, 1, 1, 0), 77, struct.pack("<Q24siQ", base + 8, view, 7, 0), None)
        driver.steps.clear()


def test_a_cooperative_launch(driver):
    kernel = _kernel([])._replace(extra=())
    _replay.play(_replay.program_of(_taken(kernel, 10**12), _taken(kernel, 10**13)), [1000, 5000], 77)
    assert driver.steps[1][-1] == "cooperatively"


def test_an_error_of_the_driver(driver):
    """Steps behind the one that fails are not done."""
    kernel = _kernel([])
    program = _replay.program_of(_taken(kernel, 10**12), _taken(kernel, 10**13))
    driver.status = 700
    with pytest.raises(RuntimeError, match="700"):
        _replay.play(program, [1000, 5000], 77)
    assert len(driver.steps) == 1


def test_a_kernel_of_more_arguments_is_pythons(driver, monkeypatch):
    kernel = _kernel([])
    one, other = _taken(kernel, 10**12), _taken(kernel, 10**13)
    assert _replay.program_of(one, other).words is not None
    monkeypatch.setattr(_native, "MOST_PLACES", len(kernel.places) - 1)
    assert _replay.program_of(one, other).words is None


def test_where_it_cannot_be_had(monkeypatch):
    """No compiler, one that fails, or no driver: None, and no error."""
    functions = types.SimpleNamespace(**dict.fromkeys(_native.DRIVER, ctypes.CFUNCTYPE(None)(lambda: None)))
    library = _native.library.__wrapped__
    for compiler in ("no-such-compiler", "false", "sh -c 'exit 3'", "cc 'an open quote"):
        monkeypatch.setattr(_cuda, "driver", lambda: functions)
        monkeypatch.setenv("CC", compiler)
        assert library() is None
        with pytest.raises((OSError, ValueError)):
            _native.load([0] * len(_native.DRIVER))

    def no_driver():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(_cuda, "driver", no_driver)
    assert library() is None
    monkeypatch.setattr(_native, "library", lambda: None)
    assert _native.handler("Python's") == "Python's" and _native.program([]) is None
    _native.know(b"a call", 0, 3, None)


def test_nothing_is_left_behind(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _native.load([0] * len(_native.DRIVER))
    assert not list(tmp_path.iterdir())
