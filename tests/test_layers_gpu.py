# SPDX-License-Identifier: Apache-2.0
"""The kernels of layers_*.cu against float64, in poisoned memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from steps import assert_accurate, run

from gpu3d._arrays import BFLOAT16, FLOAT32, FLOATS, INT32
from gpu3d.cuda import clouds, layers
from gpu3d.cuda.plan import Matrix
from gpu3d.reference import flash3d as reference

pytestmark = pytest.mark.gpu

DTYPES = [FLOATS[0], FLOATS[2], BFLOAT16]
ROWS = (0, 1, 31, 33, 1000)
COLUMNS = (8, 32, 40, 64, 192, 256, 384, 512, 768, 1000, 1536)
EPSILON = 1e-5
WAVELENGTHS = (0.2, 200.0)


def name_of(dtype):
    return dtype.name


def random(shape, dtype, seed=0, scale=1.0, offset=0.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale + offset).astype(dtype)


# ---- norm ----------------------------------------------------------------------------------------------------------


def gelu(u):
    return u * (u.dtype.type(0.5) * (1 + np.tanh(_inner(u))))


def gelu_derivative(u):
    one = u.dtype.type
    t = np.tanh(_inner(u))
    return one(0.5) * (1 + t) + one(0.5) * u * (1 - t * t) * one(np.sqrt(2 / np.pi)) * (1 + one(3 * 0.044715) * u * u)


def _inner(u):
    one = u.dtype.type
    return one(np.sqrt(2 / np.pi)) * (u + one(0.044715) * u * u * u)


def norm(x, weight, bias, with_gelu, wide):
    """LayerNorm in the dtype `wide`; returns the output, xhat, u, mean and rstd."""
    x = x.astype(wide)
    mean = x.mean(1, keepdims=True)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + wide(EPSILON))
    hat = (x - mean) * rstd
    u = hat * weight.astype(wide) + bias.astype(wide)
    return (gelu(u) if with_gelu else u), hat, u, mean, rstd


def norm_backward(dout, x, weight, bias, dres, with_gelu, wide):
    _, hat, u, _, rstd = norm(x, weight, bias, with_gelu, wide)
    du = dout.astype(wide) * (gelu_derivative(u) if with_gelu else 1)
    g = du * weight.astype(wide)
    dz = rstd * (g - g.mean(1, keepdims=True) - hat * (g * hat).mean(1, keepdims=True))
    return dz if dres is None else dres.astype(wide) + dz, (du * hat).sum(0), du.sum(0)


def norm_inputs(rows, columns, dtype):
    return random((rows, columns), dtype, 1, 2, 0.5), random(columns, FLOAT32, 3, 1, 1), random(columns, FLOAT32, 4)


def check_norm(cp, rows, columns, dtype, with_gelu):
    x, weight, bias = norm_inputs(rows, columns, dtype)

    def add(steps, given, made):
        sizes = {"rows": rows, "columns": columns, "dtype": dtype}
        out, statistics = made
        layers.add_norm(steps, *given, out, **sizes, epsilon=EPSILON, gelu=with_gelu, statistics=statistics)

    made = [((rows, columns), dtype), ((rows, 2), FLOAT32)]
    got, statistics = run(cp, add, [x, weight, bias], made)
    exact, _, _, mean, rstd = norm(x, weight, bias, with_gelu, np.float64)
    naive, _, _, *naive_moments = norm(x, weight, bias, with_gelu, np.float32)
    note = f"{rows} x {columns} {dtype} gelu {with_gelu}"
    assert_accurate(got, naive.astype(dtype), exact, note)
    assert_accurate(statistics[:, :1], naive_moments[0], mean, note + " mean")
    assert_accurate(statistics[:, 1:], naive_moments[1], rstd, note + " rstd")


def check_norm_backward(cp, rows, columns, dtype, with_gelu, with_dres):
    x, weight, bias = norm_inputs(rows, columns, dtype)
    dout = random((rows, columns), dtype, 5)
    dout[3::7] = 0  # as in padding
    dres = random((rows, columns), dtype, 6) if with_dres else None
    if with_dres:
        dres[3::7] = 0
    _, _, _, mean, rstd = norm(x, weight, bias, with_gelu, np.float64)
    statistics = np.concatenate([mean, rstd], 1).astype(np.float32)

    def add(steps, given, made):
        sizes = {"rows": rows, "columns": columns, "dtype": dtype}
        options = {"gelu": with_gelu, "dres": made[0] if with_dres else None}
        layers.add_sums(steps, layers.add_norm_backward(steps, *given, *made, **sizes, **options))

    made = [dres if with_dres else ((rows, columns), dtype), *[((columns,), FLOAT32)] * 2]
    dx, dweight, dbias = run(cp, add, [dout, x, statistics, weight, bias], made)
    args = dout, x, weight, bias, dres, with_gelu
    exact, naive = norm_backward(*args, np.float64), norm_backward(*args, np.float32)
    note = f"{rows} x {columns} {dtype} gelu {with_gelu} dres {with_dres}"
    assert not dx[3::7].any(), note
    assert_accurate(dx, naive[0].astype(dtype), exact[0], note)
    if rows == 0:
        assert not dweight.any() and not dbias.any()
    else:
        assert_accurate(dweight, naive[1], exact[1], note + " dweight")
        assert_accurate(dbias, naive[2], exact[2], note + " dbias")


SEED = 0x123456789ABCDEF0


def check_fused(cp, rows, columns, dtype, with_gelu):
    """A norm with drop path before it has the bits of both, one after the other; so has its backward."""
    x, weight, bias = norm_inputs(rows, columns, dtype)
    y, dout, dres = (random((rows, columns), dtype, seed) for seed in (8, 9, 10))
    sizes = {"rows": rows, "columns": columns, "dtype": dtype}
    note = f"{rows} x {columns} {dtype} gelu {with_gelu}"
    matrix, step = ((rows, columns), dtype), np.array([17], np.uint32)

    def add(steps, given, made):
        x, y, weight, bias, step = given
        drop = layers.Drop(0.3, 3, step, SEED)
        options = {"epsilon": EPSILON, "gelu": with_gelu}
        for fused in (True, False):
            total, out, statistics = made[:3] if fused else made[3:]
            own = {"statistics": statistics, **options, **sizes}
            if fused:
                layers.add_norm(steps, x, weight, bias, out, y=y, drop=drop, total=total, **own)
            else:
                layers.add_residual(steps, x, y, total, drop=drop, **sizes)
                layers.add_norm(steps, total, weight, bias, out, **own)

    made = [matrix, matrix, ((rows, 2), FLOAT32)]
    got = run(cp, add, [x, y, weight, bias, step], made * 2)
    assert [a.tobytes() for a in got[:3]] == [a.tobytes() for a in got[3:]], note

    def add_backward(steps, given, made):
        dout, x, statistics, weight, bias, dres, step = given
        drop = layers.Drop(0.3, 3, step, SEED)
        sums = []
        for fused in (True, False):
            dx, dy, dweight, dbias = made[:4] if fused else made[4:]
            own = {"dy": dy, "drop": drop} if fused else {}
            args = dout, x, statistics, weight, bias, dx, dweight, dbias
            sums += layers.add_norm_backward(steps, *args, gelu=with_gelu, dres=dres, **own, **sizes)
            if not fused:
                layers.add_residual(steps, None, dx, dy, drop=drop, **sizes)
        layers.add_sums(steps, sums)

    made = [matrix, matrix, *[((columns,), FLOAT32)] * 2]
    inputs = [dout, got[0], got[2], weight, bias, dres, step]
    got = run(cp, add_backward, inputs, made * 2)
    assert [a.tobytes() for a in got[:4]] == [a.tobytes() for a in got[4:]], note


def test_small_layers(cp):
    """For compute-sanitizer: every kernel, with few rows."""
    for dtype, columns in itertools.product((FLOAT32, BFLOAT16), (32, 72, 1536)):
        check_norm(cp, 33, columns, dtype, True)
        check_norm_backward(cp, 33, columns, dtype, True, True)
        check_fused(cp, 33, columns, dtype, False)
    check_residual(cp, 40, 64, BFLOAT16, 0.3, True)
    check_gelu_backward(cp, 40, 64, BFLOAT16, True)
    check_column_sums(cp, 40, 24, BFLOAT16, 24)
    check_rotate(cp, 40, 3, 32, BFLOAT16)
    check_compose(cp, (5, 0, 40), 16, 2)


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_norm(cp, dtype, with_gelu):
    for rows, columns in itertools.product(ROWS, COLUMNS):
        check_norm(cp, rows, columns, dtype, with_gelu)
    check_norm(cp, 34_688, 64, dtype, with_gelu)


@pytest.mark.parametrize("with_dres", [False, True])
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_norm_backward(cp, dtype, with_gelu, with_dres):
    for rows, columns in itertools.product(ROWS, COLUMNS):
        check_norm_backward(cp, rows, columns, dtype, with_gelu, with_dres)
    check_norm_backward(cp, 34_688, 64, dtype, with_gelu, with_dres)
    check_norm_backward(cp, 5000, 768, dtype, with_gelu, with_dres)


@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_fused(cp, dtype, with_gelu):
    for rows, columns in itertools.product(ROWS, COLUMNS):
        check_fused(cp, rows, columns, dtype, with_gelu)
    check_fused(cp, 34_688, 64, dtype, with_gelu)


def test_a_row_of_equal_numbers(cp):
    """The variance is 0, and the output is the bias."""
    x, bias = np.full((3, 64), 7, BFLOAT16), random(64, FLOAT32)
    sizes = {"rows": 3, "columns": 64, "dtype": BFLOAT16, "epsilon": EPSILON}

    def add(steps, given, made):
        layers.add_norm(steps, *given, *made, **sizes)

    (got,) = run(cp, add, [x, np.ones(64, np.float32), bias], [((3, 64), BFLOAT16)])
    assert (got == bias.astype(BFLOAT16)).all()


# ---- sums over rows ------------------------------------------------------------------------------------------------


def check_column_sums(cp, rows, columns, dtype, stride):
    """Columns between the rows are not summed: they are NaN."""
    x = random((rows, stride), dtype, 20, 1, 0.3)
    x[:, columns:] = np.nan

    def add(steps, given, made):
        matrix = Matrix(*given, rows, columns, dtype, stride)
        layers.add_sums(steps, [layers.add_column_sums(steps, matrix, *made)])

    (got,) = run(cp, add, [x], [((columns,), FLOAT32)])
    whole = x[:, :columns]
    if rows == 0:
        assert not got.any()
    else:
        naive = whole.astype(np.float32).sum(0)
        assert_accurate(got, naive, whole.astype(np.float64).sum(0), f"{rows} x {columns} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_column_sums(cp, dtype):
    for rows, columns in itertools.product(ROWS, (*COLUMNS, 3, 19, 2304, 6144)):
        check_column_sums(cp, rows, columns, dtype, -(-columns // 8) * 8)
    check_column_sums(cp, 1000, 64, dtype, 192)
    check_column_sums(cp, 34_688, 64, dtype, 64)
    check_column_sums(cp, 34_688, 256, dtype, 256)


def test_sums_of_many_vectors(cp):
    """More than one launch takes: each is what it is alone."""
    columns = [1 + i * i % 300 for i in range(2 * layers.MOST_VECTORS + 1)]
    x = random((1000, 304), BFLOAT16, 21)

    def sums(which):
        def add(steps, given, made):
            matrices = [Matrix(*given, 1 + 3 * columns[i], columns[i], BFLOAT16, 304) for i in which]
            vectors = [layers.add_column_sums(steps, *each) for each in zip(matrices, made, strict=True)]
            layers.add_sums(steps, vectors)

        return run(cp, add, [x], [((columns[i],), FLOAT32) for i in which])

    together = sums(range(len(columns)))
    for i in (0, 1, 63, 64, 119, 120, 121, 239, 240):
        assert sums([i])[0].tobytes() == together[i].tobytes()


# ---- residual ------------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011), element by element."""
    c, k, low = [np.asarray(x, np.uint64) for x in counter], list(key), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high = np.uint64(32)
        c = [(b >> high) ^ c[1] ^ np.uint64(k[0]), b & low, (a >> high) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_oracle():
    """The vectors of the authors' library Random123."""
    ones = 0xFFFFFFFF
    assert [int(x) for x in philox([0] * 4, [0] * 2)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(x) for x in philox([ones] * 4, [ones] * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert [int(x) for x in philox(*pi)] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def check_residual(cp, rows, columns, dtype, rate, forward, layer=3, step=17, seed=SEED):
    x, y = random((rows, columns), dtype, 9), random((rows, columns), dtype, 10)

    def add(steps, given, made):
        x, y, step = given
        drop = layers.Drop(rate, layer, step, seed)
        layers.add_residual(steps, x, y, *made, rows=rows, columns=columns, dtype=dtype, drop=drop)

    inputs = [x if forward else None, y, np.array([step], np.uint32)]
    (got,) = run(cp, add, inputs, [((rows, columns), dtype)])
    word = philox([np.arange(rows), layer, step, 0], [seed & 0xFFFFFFFF, seed >> 32])[0]
    kept = (word >= int(rate * 2**32))[:, None]
    base = x.astype(np.float64) if forward else 0
    exact = base + kept * y.astype(np.float64) / (1 - rate)
    scaled = y.astype(np.float32) * np.float32(1 / (1 - rate))
    naive = np.where(kept, scaled, 0) + (x.astype(np.float32) if forward else 0)
    dropped = ~kept[:, 0]
    assert (got[dropped] == (x[dropped] if forward else 0)).all()
    if exact.any():
        assert_accurate(got, naive.astype(dtype), exact, f"{rows} x {columns} {dtype} rate {rate}")
    if rows > 500:
        assert abs(dropped.mean() - rate) < 0.1


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_residual(cp, dtype, forward):
    for rows, columns, rate in itertools.product((*ROWS, 34_688), (8, 64, 768, 1536), (0.0, 0.3)):
        if rows < 2000 or columns == 64:
            check_residual(cp, rows, columns, dtype, rate, forward)


def check_gelu_backward(cp, rows, columns, dtype, in_place):
    dy, x = random((rows, columns), dtype, 21), random((rows, columns), dtype, 22, 2.0)

    def add(steps, given, made):
        sizes = {"rows": rows, "columns": columns, "dtype": dtype}
        layers.add_gelu_backward(steps, made[0] if in_place else given[0], given[1], *made, **sizes)

    dx, active = run(cp, add, [dy, x], [dy if in_place else (dy.shape, dtype), (dy.shape, dtype)])
    wide, single = (dy.astype(np.float64), x.astype(np.float64)), (dy.astype(np.float32), x.astype(np.float32))
    exact, naive = reference.gelu_backward(*wide), reference.gelu_backward(*single).astype(dtype)
    assert_accurate(dx, naive, exact, f"{rows} x {columns}")
    assert_accurate(active, gelu(single[1]).astype(dtype), gelu(wide[1]), f"GELU of {rows} x {columns}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("in_place", [False, True])
def test_gelu_backward(cp, dtype, in_place):
    for rows, columns in (*itertools.product(ROWS, (8, 256)), (1000, 1536)):
        check_gelu_backward(cp, rows, columns, dtype, in_place)


def test_drop_path_depends_on_layer_step_and_seed(cp):
    for change in ({"layer": 4}, {"step": 18}, {"seed": 1}, {"seed": 1 << 40}):
        check_residual(cp, 1000, 64, BFLOAT16, 0.3, True, **change)


# ---- rotary position codes -----------------------------------------------------------------------------------------


def check_rotate(cp, rows, heads, dim, dtype, back=False, scale=50.0):
    count = max(1, rows // 2)
    points, qkv = random((count, 3), FLOAT32, 11, scale), random((rows, 3, heads, dim), dtype, 12)
    index = np.random.default_rng(13).integers(-1, count, rows).astype(np.int32)

    def add(steps, given, made):
        sizes = {"rows": rows, "heads": heads, "dim": dim, "dtype": dtype}
        layers.add_rotate(steps, *made, *given, **sizes, wavelengths=WAVELENGTHS, back=back)

    (got,) = run(cp, add, [points, index], [qkv])
    positions = np.where(index[:, None] < 0, np.float32(0), points[index]) * np.float32(-1 if back else 1)
    packed = qkv.astype(np.float64).reshape(rows, 3 * heads * dim)
    exact = reference.rotate(packed, positions, heads, WAVELENGTHS).reshape(qkv.shape)
    assert got[:, 2].tobytes() == qkv[:, 2].tobytes()  # v stays
    assert got[index < 0].tobytes() == qkv[index < 0].tobytes()  # and so does padding
    turned = 6 * (dim // 6)
    assert got[..., turned:].tobytes() == qkv[..., turned:].tobytes()
    assert_accurate(got, exact.astype(np.float32).astype(dtype), exact, f"{rows} x {heads} x {dim} {dtype}")


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rotate(cp, dtype, back):
    for rows, (heads, dim) in itertools.product((*ROWS, 34_688), ((1, 8), (2, 32), (3, 24), (5, 64), (1, 128))):
        check_rotate(cp, rows, heads, dim, dtype, back)
    check_rotate(cp, 1000, 24, 64, dtype, back)
    check_rotate(cp, 1000, 192, 8, dtype, back)
    check_rotate(cp, 1000, 2, 32, dtype, back, scale=5e6)


# ---- geometry ------------------------------------------------------------------------------------------------------


class Layout:
    """The slots of clouds, and a random order of each cloud's points in them."""

    def __init__(self, lengths, bucket_size, seed):
        self.lengths, self.bucket_size = lengths, bucket_size
        slots = [-(-n // bucket_size) * bucket_size for n in lengths]
        self.slots = sum(slots)
        self.point_of = np.cumsum([0, *lengths])  # the first point of each cloud, and the first slot
        self.slot_of = np.cumsum([0, *slots])
        self.slot_to_point = np.full(self.slots, -1, np.int32)
        self.point_to_slot = np.zeros(sum(lengths), np.int32)
        rng = np.random.default_rng(seed)
        for b, n in enumerate(lengths):
            order = self.point_of[b] + rng.permutation(n)
            self.slot_to_point[self.slot_of[b] : self.slot_of[b] + n] = order
            self.point_to_slot[order] = self.slot_of[b] + np.arange(n)

    def table(self):
        return clouds.table(self.lengths, self.bucket_size, None, None)

    def argument(self, steps, name):
        return clouds.argument(steps, name, len(self.lengths), self.bucket_size)


def check_compose(cp, lengths, bucket_size, ratio):
    parents = Layout(lengths, bucket_size, 15)
    children = Layout([-(-n // ratio) for n in lengths], bucket_size, 16)
    members = np.full((children.slots, ratio), -1, np.int32)
    expected = members.copy()
    rng = np.random.default_rng(17)
    for b, n in enumerate(lengths):
        groups = np.full((children.lengths[b], ratio), -1, np.int32)
        groups.reshape(-1)[:n] = parents.slot_of[b] + rng.permutation(n)
        members[children.slot_of[b] :][: len(groups)] = groups
        for i, group in enumerate(groups):
            row = children.point_to_slot[children.point_of[b] + i]
            for j, slot in enumerate(group):
                if slot >= 0:
                    expected[row, j] = parents.point_to_slot[parents.point_of[b] + slot - parents.slot_of[b]]

    def add(steps, given, made):
        tables = parents.argument(steps, "parents"), children.argument(steps, "children")
        layers.add_compose(steps, *given, *tables, *made, slots=children.slots, ratio=ratio)

    inputs = [members, children.slot_to_point, parents.point_to_slot]
    numbers = {"parents": parents.table(), "children": children.table()}
    (got,) = run(cp, add, inputs, [((children.slots, ratio), INT32)], numbers)
    np.testing.assert_array_equal(got, expected)

    positions = random((parents.slots, 3), FLOAT32, 18)
    first = np.concatenate([parents.slot_of[b] + np.arange(n) for b, n in enumerate(lengths)]).astype(int)

    def add_pack(steps, given, made):
        layers.add_pack(steps, *given, parents.argument(steps, "parents"), *made, slots=parents.slots)

    made = [((sum(lengths), 3), FLOAT32)]
    (packed,) = run(cp, add_pack, [positions], made, {"parents": parents.table()})
    assert packed.tobytes() == positions[first].tobytes()


@pytest.mark.parametrize("ratio", layers.RATIOS)
@pytest.mark.parametrize(
    "lengths", [(1,), (0,), (1000,), (0, 700, 1, 0, 33), (40,) * 64, (40,) * 65, (34_688,)], ids=len
)
def test_compose(cp, lengths, ratio):
    check_compose(cp, lengths, 16, ratio)
    check_compose(cp, lengths, 512, ratio)
