# SPDX-License-Identifier: Apache-2.0
"""The kernels of arrays_*.cu against NumPy, in poisoned memory. No kernel writes past the end of an output."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_cuda_arrays import VIEWS, base

from gpu3d import _arrays
from gpu3d.cuda import arrays, launcher
from gpu3d.cuda.plan import Call, Kernel, Steps

pytestmark = pytest.mark.gpu

GUARD = 256  # bytes after an output that must not be written
SIGNATURES = {
    "copy_strided": f"Q{arrays.STRIDED_FORMAT}Q",
    "copy_transposed": f"Q{arrays.STRIDED_FORMAT}iQ",
    "convert_rows": "QqqqiiQ",
    "scan_offsets": "QqQQQ",
    "scan_flag": "QqqQ",
}
THREADS = {
    "copy": arrays.COPY_THREADS,
    "convert": arrays.CONVERT_THREADS,
    "scan": arrays.SCAN_THREADS,
}


def launch(function, grid, *args, **macros):
    """Launch a kernel of arrays_<prefix of its name>.cu on the current device and stream."""
    import cupy

    part, steps = function.split("_")[0], Steps(inputs=0, results=0)
    kernel = Kernel(f"arrays_{part}", function, SIGNATURES[function], tuple(macros.items()))
    steps.launch(kernel, grid=grid, block=THREADS[part], args=args)
    origin = _arrays.Origin("cupy", cupy.cuda.runtime.getDevice())
    launcher.run(Call(steps.plan(), {}), (), origin.device, _arrays.current_stream(origin))


def address(x):
    return x.data.ptr


def to_host(x):
    return x.get()


def poisoned(cp, size):
    """Poisoned memory for `size` bytes and the guard after them."""
    return cp.full(size + GUARD, 0xCD, np.uint8)


def written(memory, dtype, shape):
    """The output from poisoned memory, on the host; checks the guard."""
    x = to_host(memory)
    assert (x[-GUARD:] == 0xCD).all()
    return x[:-GUARD].view(dtype).reshape(shape)


def assert_same_numbers(got, expected, note=""):
    """Assert the same bits; all NaN count as equal."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, note
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan, err_msg=note)
    bits = f"u{got.itemsize}"
    np.testing.assert_array_equal(
        np.where(nan, 0, np.ascontiguousarray(got).view(bits)),
        np.where(nan, 0, np.ascontiguousarray(expected).view(bits)),
        err_msg=note,
    )


# ---- copy ----------------------------------------------------------------------------------------------------------


def copy(source, shape, strides, itemsize, out):
    """Launch the copy of an array that begins at the address `source`."""
    layout = arrays.strided_layout(shape, strides, itemsize, (source | out) % 16)
    if layout.fast is None:
        launch("copy_strided", layout.grid, source, layout.packed, out, WORD=layout.word)
    else:
        launch("copy_transposed", layout.grid, source, layout.packed, layout.fast, out, WORD=layout.word)
    return layout


@pytest.mark.parametrize("name", VIEWS)
def test_copy(cp, name):
    shape, dtype, view_of = VIEWS[name]
    x = base(shape, dtype)
    expected, view = view_of(x), view_of(cp.asarray(x))
    out = poisoned(cp, expected.nbytes)
    copy(address(view), view.shape, view.strides, view.itemsize, address(out))
    assert written(out, np.uint8, -1).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(4001,), (65, 40), (40, 65)])
def test_copy_from_and_to_any_address(cp, shape):
    """Elements of 4 bytes at addresses that are not multiples of 4, row by row and transposed."""
    n = 4 * int(np.prod(shape))
    x = base((n + 16,), "u1")
    source = cp.asarray(x)
    for a, b in itertools.product((0, 1, 2, 4, 8, 15), (0, 2, 3, 8)):
        view = x[a : a + n].view(np.uint32).reshape(shape).T
        out = poisoned(cp, n + b)
        copy(address(source) + a, view.shape, view.strides, 4, address(out) + b)
        got = written(out, np.uint8, -1)
        assert (got[:b] == 0xCD).all() and got[b:].tobytes() == view.tobytes(), (a, b)


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 2048, 100_003])
def test_copy_of_sizes_around_a_block(cp, n):
    x = base((n, 2), "f4")
    source, out = cp.asarray(x), poisoned(cp, 4 * n)
    copy(address(source) + 4, (n,), (8,), 4, address(out))
    np.testing.assert_array_equal(written(out, np.uint32, n), x[:, 1].view(np.uint32))


def many_bytes(cp, n):
    x = cp.empty(n, np.uint8)
    for first in range(0, n, 1 << 28):
        part = x[first : first + (1 << 28)]
        part[...] = cp.arange(first, first + len(part), dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    return x


def check_large_copy(cp, view):
    out = cp.full(view.size, 0xCD, np.uint8)
    layout = copy(address(view), view.shape, view.strides, 1, address(out))
    out = out.reshape(view.shape)
    for first in range(0, len(view), len(view) // 7):
        part = slice(first, first + len(view) // 7)
        assert bool((out[part] == view[part]).all()), part
    return layout


@pytest.mark.parametrize("words", [(1 << 31) - 1026, (1 << 31) - 1024, (1 << 31) + 76])
def test_copy_where_indices_need_64_bits(cp, large_memory, words):
    """Copies two of every three bytes."""
    view = many_bytes(cp, words // 2 * 3).reshape(-1, 3)[:, 1:]
    layout = check_large_copy(cp, view)
    assert layout.word == 1 and layout.fast is None


def test_copy_of_a_large_transposed_array(cp, large_memory):
    view = many_bytes(cp, 65_544 * 32_840).reshape(65_544, 32_840).T
    assert check_large_copy(cp, view).fast == 0 and view.size > 1 << 31


# ---- convert -------------------------------------------------------------------------------------------------------

CONVERSIONS = [
    tuple(dict(c.macros).values()) for c in arrays.configurations() if c.source == "arrays_convert"
]  # (FROM, TO)


def special_numbers(dtype):
    """Zeros, the limits of every type, subnormal numbers, ties in rounding and their neighbours, and NaN."""
    rng = np.random.default_rng(2)
    numbers = [0.0, 1.0, np.inf, np.nan, 2.0**-24, 2.0**-25, 2.0**-126, 2.0**-149, 2.0**-150, 5e-324, 65504.0, 65520.0]
    numbers += [2.0**128, float(np.finfo(np.float32).max), 3.3895e38, 3.3961e38, 1e-40, 1e-39]
    for bits in (7, 8, 10, 11, 23, 24):  # one bit more than bfloat16, float16 and float32 have
        for k in (1, 3, 5):
            tie = 1 + k * 2.0 ** -(bits + 1)
            numbers += [tie, tie + 2.0**-40, tie - 2.0**-40, tie + 2.0**-52, tie * 2.0**-14, tie * 2.0**-24]
    numbers += [*rng.standard_normal(500), *(rng.standard_normal(500) * 2.0 ** rng.integers(-160, 130, 500))]
    with np.errstate(over="ignore"):
        return np.concatenate([numbers, np.negative(numbers)]).astype(dtype)


def converted(cp, x, to, columns_out):
    """The output of convert_rows for x [n, columns], a view of any strides."""
    n, columns = x.shape
    dtype = _arrays.FLOATS[to]
    out = poisoned(cp, n * columns_out * dtype.itemsize)
    steps = [stride // x.itemsize for stride in x.strides]
    grid = -(-n // arrays.CONVERT_ROWS)
    macros = {"FROM": _arrays.FLOATS.index(x.dtype), "TO": to}
    launch("convert_rows", grid, address(x), *steps, n, columns, columns_out, address(out), **macros)
    return written(out, dtype, (n, columns_out))


@pytest.mark.parametrize(("source", "to"), CONVERSIONS)
def test_convert_special_numbers(cp, source, to):
    x = special_numbers(_arrays.FLOATS[source])[:, None]
    with np.errstate(over="ignore"):
        expected = x.astype(_arrays.FLOATS[to])
    got = converted(cp, cp.asarray(x), to, 1)
    assert_same_numbers(got, expected)
    if source == to:
        assert got.tobytes() == x.tobytes()  # NaN too, bit by bit


@pytest.mark.parametrize(("source", "to"), CONVERSIONS)
@pytest.mark.parametrize("n", [1, 2, 85, 86, 170, 171, 256, 341, 342, 511, 512, 513, 1025, 5000])
def test_convert_sizes_columns_and_strides(cp, source, to, n):
    dtype = _arrays.FLOATS[source]
    x = (np.random.default_rng(n).standard_normal((2 * n, 8)) * 100).astype(dtype)
    on_device = cp.asarray(x)
    transposed = cp.asarray(np.ascontiguousarray(x[:n, :3].T)).T
    views = [
        (on_device[:n, :3], x[:n, :3]),
        (on_device[::2, 1:4], x[::2, 1:4]),
        (on_device[n - 1 :: -1, 2::-1], x[n - 1 :: -1, 2::-1]),
        (transposed, x[:n, :3]),
        (on_device[:n, :2], x[:n, :2]),
        (on_device[:n, 3:4], x[:n, 3:4]),
    ]
    for view, expected in views:
        for columns_out in (1, 2, 3):
            padded = np.zeros((n, columns_out), _arrays.FLOATS[to])
            columns = min(columns_out, expected.shape[1])
            padded[:, :columns] = expected[:, :columns].astype(padded.dtype)
            assert_same_numbers(converted(cp, view, to, columns_out), padded, f"{view.strides} {columns_out}")


def test_convert_a_number_for_all_rows(cp):
    x = cp.asarray(np.array([1.5, -2.5], np.float32))
    out = converted(cp, cp.broadcast_to(x, (700, 2)), 1, 3)
    np.testing.assert_array_equal(out, np.broadcast_to([1.5, -2.5, 0.0], (700, 3)))


# ---- scan ----------------------------------------------------------------------------------------------------------

SCANNED = (0, 1, 2, 31, 32, 33, 255, 256, 257, 2047, 2048, 2049, 4096, 4097, 33 * 2048, 65 * 2048 + 1)


def scanned(cp, counts):
    """Offsets int64 [n + 1] and the total of counts on the device, from guarded, poisoned memory."""
    n = len(counts)
    tiles = max(1, -(-n // arrays.SCAN_TILE))
    state = cp.zeros(1 + tiles, np.uint64)
    offsets, total = poisoned(cp, 8 * (n + 1)), poisoned(cp, 8)
    launch("scan_offsets", tiles, address(counts), n, address(state), address(offsets), address(total))
    return offsets, total


def check_scan(cp, counts):
    offsets, total = scanned(cp, cp.asarray(counts))
    expected = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.testing.assert_array_equal(written(offsets, np.int64, -1), expected)
    assert written(total, np.int64, -1) == expected[-1:]


@pytest.mark.parametrize("n", SCANNED)
def test_scan(cp, n):
    rng = np.random.default_rng(n)
    check_scan(cp, rng.integers(0, 50, n))
    check_scan(cp, np.where(rng.random(n) < 0.01, 1 << 40, rng.integers(0, 3, n)))
    check_scan(cp, np.zeros(n, np.int64))
    check_scan(cp, np.full(n, ((1 << 62) - 1) // max(n, 1), np.int64))


@pytest.mark.parametrize("n", [1_000_003, 20_000_000])
def test_scan_of_many_tiles(cp, n):
    counts = np.random.default_rng(n).integers(0, 50, n)
    for _ in range(5):  # tiles may finish in a different order each time
        check_scan(cp, counts)


def test_scan_of_2_to_the_31_counts(cp, large_memory):
    """The sums of counts 0, 1, 2, 3, 0, ... are known."""
    n, part = 1 << 31, 1 << 26
    counts, offsets = cp.empty(n, np.int64), cp.empty(n + 1, np.int64)
    for first in range(0, n, part):
        counts[first : first + part] = cp.arange(part) % 4
    tiles = n // arrays.SCAN_TILE
    state, total = cp.zeros(1 + tiles, np.uint64), cp.empty(1, np.int64)
    launch("scan_offsets", tiles, address(counts), n, address(state), address(offsets), address(total))
    before = cp.asarray([0, 0, 1, 3])
    for first in range(0, n, part):
        i = cp.arange(first, first + part)
        assert bool((offsets[first : first + part] == i // 4 * 6 + before[i % 4]).all()), first
    assert int(offsets[n]) == int(total[0]) == n // 4 * 6


@pytest.mark.parametrize("n", SCANNED)
def test_flag(cp, n):
    counts = np.random.default_rng(n).integers(1, 50, n)
    expected = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    for capacity in (expected[-1] - 1, expected[-1], expected[-1] + 1):
        offsets, total = scanned(cp, cp.asarray(counts))
        grid = -(-(n + 1) // arrays.SCAN_TILE)
        launch("scan_flag", grid, address(total), int(capacity), n, address(offsets))
        flagged = expected if expected[-1] <= capacity else np.full_like(expected, -expected[-1])
        np.testing.assert_array_equal(written(offsets, np.int64, -1), flagged)
