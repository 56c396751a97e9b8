# SPDX-License-Identifier: Apache-2.0
"""What the backbone launches on a GPU: geometry, forward, loss, backward and optimizer, as the steps of one plan.

A plan is of the lengths of a batch. Rows of activations are slots of a stage layout, in the config's dtype. Sums,
statistics, parameters and their gradients are float32. The workspace holds everything that is not an input or a result;
pieces that are not needed at the same time share memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, FLOATS, Spec
from gpu3d.cuda import arrays, attention, buckets, clouds, layers, linear, losses, optim, pooling
from gpu3d.cuda.plan import Call, Device, Input, Matrix, Number, Pointer, Result, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.geometry import LOCAL_HASH
from gpu3d.flash3d.params import ALIGNMENT, Parameter, arena_size, decayed_size, layout
from gpu3d.reference.flash3d import POSITION_FEATURES, drop_rate

COLUMNS = 8  # rows of matrices begin at multiples of this many elements


def _row(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


# ---- geometry ------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """Where a level's arrays lie, and what its launches depend on. Its layout is that of its stage."""

    lengths: tuple[int, ...]
    slots: int
    points: Pointer  # float32 [N, 3], which slot_to_point numbers
    slot_to_point: Pointer  # int32 [slots]
    point_to_slot: Pointer  # int32 [N]
    batch: Any  # the struct Clouds, with buckets as tiles
    tables: tuple[Pointer, Pointer]  # scopes of even and of odd blocks
    scopes: tuple[int, int]  # how many each table has
    shape: Any = None  # what pooling to the next level depends on; None in the deepest
    parents: Any = None  # the struct Clouds for pooling
    members: Pointer | None = None  # int32 [slots of the next level, ratio]


class _Local(NamedTuple):
    """A level's local layout. Its slots hold the points in order, except in level 0."""

    positions: Pointer  # float32 [slots, 3]
    slot_to_point: Pointer | None  # in level 0
    members: Pointer | None  # of the level above, by local slots of both


def add_geometry(
    steps: Steps, config: Config, lengths: tuple[int, ...], points: Pointer, device: Device
) -> tuple[list[Level], dict[str, Any]]:
    """Add everything that depends on the points alone; returns the levels, and the numbers of the steps."""
    numbers: dict[str, Any] = {}
    levels: list[Level] = []
    size, n = config.bucket_size, lengths
    for depth, hash in enumerate(config.hashes):
        name = f"level {depth}"

        def batch_of(table: clouds.Table, which: str, count: int = len(n), name: str = name) -> Any:
            numbers[f"{name} {which}"] = table
            return clouds.argument(steps, f"{name} {which}", count, size)

        sort, numbers[f"{name} sort"] = buckets.sorting(n, size, device)
        layout = functools.partial(_add_layout, steps, sort, name, points)
        if depth == 0:
            stage = first = layout(LOCAL_HASH)
            positions = steps.workspace("positions", 12 * sort.slots)
            rows = {"rows": sort.slots, "most": sort.slots, "row_bytes": 12, "word": 4, "fill": bytes(16)}
            buckets.add_move(steps, points, first[0], positions, **rows)
            local = _Local(positions, first[0], None)
        if depth or hash != LOCAL_HASH:
            stage = layout(hash)
        batch = batch_of(attention.layout_of(n, size)[0], "buckets")
        tables, scopes = zip(*_add_scopes(steps, config, depth, n, batch_of), strict=True)
        if depth:
            above = levels[-1]
            members = steps.workspace(f"{name} members", 4 * config.ratio * sort.slots)
            where = local.members, stage[0], above.point_to_slot, above.parents, batch, members
            sizes = {"slots": sort.slots, "ratio": config.ratio}
            layers.add_compose(steps, *where, **sizes, local_points=first[0] if depth == 1 else None)
            levels[-1] = above._replace(members=members)
        level = Level(n, sort.slots, points, *stage, batch, tables, scopes)
        if depth + 1 < config.levels:
            pooled = pooling.layout_of(n, size, config.ratio)
            parents, children = batch_of(pooled.parents, "parents"), batch_of(pooled.children, "children")
            numbers[f"{name} padding"] = pooled.parents.groups
            level = level._replace(shape=pooled.shape, parents=parents)
            local, points = _add_pooling(steps, pooled.shape, name, local, parents, children)
            n = tuple([-(-x // config.ratio) for x in n])
        levels.append(level)
    return levels, numbers


def _add_layout(steps: Steps, sort: buckets.Sort, name: str, points: Pointer, hash: str) -> tuple[Pointer, Pointer]:
    """Add a bucket layout: slot_to_point and point_to_slot."""
    slots, back, moved = (steps.workspace(f"{name} {which}", 4 * sort.slots) for which in ("slots", "points", "moved"))
    macros = ("POINT", FLOATS.index(FLOAT32)), ("KEY", buckets.HASHES.index(hash))
    buckets.add_sort(steps, sort, points, macros, 0.0, slots, back, moved, table=f"{name} sort")
    return slots, back


def _add_scopes(steps: Steps, config: Config, depth: int, lengths: tuple[int, ...], batch_of: Any) -> Any:
    """Add the scopes of even and of odd blocks; returns the table and the number of scopes of each."""
    counts = [-(-n // config.bucket_size) for n in lengths]
    for shift, stride, which in ((0, 1, "even"), (config.scope // 2, config.strides[depth], "odd")):
        found = buckets.scopes_of(counts, config.bucket_size, config.scope, stride)
        table = steps.workspace(f"level {depth} {which} scopes", 4 * found.groups * config.scope)
        batch = batch_of(found, f"{which} scopes")
        buckets.add_scopes(steps, batch, found.groups, config.scope, shift, stride, table)
        yield table, found.groups


def _add_pooling(
    steps: Steps, shape: pooling.Shape, name: str, local: _Local, parents: Any, children: Any
) -> tuple[_Local, Pointer]:
    """Add the pooling of a level's positions; returns the next level's local layout and its packed points."""
    sizes = {"members": 4 * shape.ratio, "child positions": 12, "child slots": 4, "child points": 4, "child moved": 4}
    made = tuple([steps.workspace(f"{name} {which}", size * shape.slots) for which, size in sizes.items()])
    pooling.add_groups(steps, shape, local.positions, FLOAT32, parents, children, made)
    members, positions = made[:2]
    packed = steps.workspace(f"{name} packed", 12 * shape.slots)
    layers.add_pack(steps, positions, children, packed, slots=shape.slots)
    return _Local(positions, None, members), packed


# ---- layers --------------------------------------------------------------------------------------------------------


class _Projected(NamedTuple):
    """What the backward of GELU(norm(linear(x))) reads."""

    x: Matrix
    linear: Matrix
    statistics: Pointer | None


class _Coded(NamedTuple):
    """What the backward of a level's position code reads."""

    waves: Matrix
    active: Matrix
    hidden: Matrix | None


class _Block(NamedTuple):
    """What the backward of a block reads."""

    path: str
    number: int  # counts blocks in the order in which they run
    odd: int  # which scopes
    heads: int
    x: Matrix
    statistics: tuple[Pointer | None, Pointer | None]
    normed: tuple[Matrix, Matrix]
    qkv: Matrix
    attended: Matrix
    lse: Pointer | None
    middle: Matrix
    hidden: Matrix | None  # before GELU
    active: Matrix


class Network:
    """Adds the steps of the network; knows where its parameters and gradients lie.

    Parameters
    ----------
    steps : Steps
    config : Config
    device : Device
    masters : Pointer
        The arena of the parameters, float32.
    weights : Pointer
        The same arena in the config's dtype.
    gradients : Pointer, optional
        The arena of the gradients, float32. Without it, nothing is kept for a backward.
    step : Pointer, optional
        uint32: the number of the training step, for drop path. Without it, no row is dropped.
    """

    def __init__(
        self,
        steps: Steps,
        config: Config,
        device: Device,
        masters: Pointer,
        weights: Pointer,
        gradients: Pointer | None = None,
        step: Pointer | None = None,
    ) -> None:
        self.steps, self.config, self.device = steps, config, device
        self.dtype = np.dtype(config.dtype)
        self.masters, self.weights, self.gradients, self.step = masters, weights, gradients, step
        self.places: dict[str, Parameter] = {parameter.path: parameter for parameter in layout(config)}

    # -- where things lie --

    def master(self, path: str) -> Pointer:
        return self.masters + 4 * self.places[path].offset

    def gradient(self, path: str) -> Pointer:
        assert self.gradients is not None
        return self.gradients + 4 * self.places[path].offset

    def bias(self, path: str) -> Pointer:
        return self.weights + self.dtype.itemsize * self.places[f"{path}.bias"].offset

    def weight(self, path: str) -> Matrix:
        place = self.places[f"{path}.weight"]
        rows, columns = place.shape
        return Matrix(self.weights + self.dtype.itemsize * place.offset, rows, columns, self.dtype, columns)

    def rows(self, name: str, rows: int, columns: int, dtype: np.dtype | None = None) -> Matrix:
        """New rows in the workspace."""
        dtype, stride = dtype or self.dtype, _row(columns)
        return Matrix(self.steps.workspace(name, rows * stride * dtype.itemsize), rows, columns, dtype, stride)

    # -- linear --

    def linear(self, x: Matrix, path: str, residual: Matrix | None = None) -> Matrix:
        y = self.rows(path, x.rows, self.weight(path).rows)
        linear.forward(self.steps, x, self.weight(path), y, bias=self.bias(path), residual=residual)
        return y

    def linear_gelu(self, x: Matrix, path: str) -> tuple[Matrix, Matrix | None]:
        """GELU(linear(x)), and what GELU is applied to, if a backward needs it."""
        columns = self.weight(path).rows
        y = self.rows(f"{path} gelu", x.rows, columns)
        hidden = self.rows(path, x.rows, columns) if self.gradients is not None else None
        linear.forward(self.steps, x, self.weight(path), y, bias=self.bias(path), gelu=True, aux=hidden)
        return y, hidden

    def linear_gradients(self, dy: Matrix, x: Matrix, path: str) -> None:
        """The gradients of weight and bias."""
        weight = self.places[f"{path}.weight"]
        dweight = Matrix(self.gradient(f"{path}.weight"), *weight.shape, FLOAT32, weight.shape[1])
        linear.weight_gradient(self.steps, dy, x, dweight, bias_gradient=self.gradient(f"{path}.bias"))

    def linear_backward(self, dy: Matrix, path: str, aux: Matrix | None = None, added: Matrix | None = None) -> Matrix:
        """The gradient of x, through GELU where `aux` is given, plus `added`."""
        dx = self.rows(f"d {path}", dy.rows, self.weight(path).columns)
        linear.input_gradient(self.steps, dy, self.weight(path), dx, aux=aux, added=added)
        return dx

    # -- norm --

    def norm(
        self, x: Matrix, path: str, gelu: bool = False, code: Matrix | None = None
    ) -> tuple[Matrix, Pointer | None]:
        y = self.rows(path, x.rows, x.columns)
        statistics = None if self.gradients is None else self.steps.workspace(f"{path} statistics", 8 * x.rows)
        layers.add_norm(
            self.steps,
            x.pointer,
            self.master(f"{path}.weight"),
            self.master(f"{path}.bias"),
            y.pointer,
            rows=x.rows,
            columns=x.columns,
            dtype=self.dtype,
            epsilon=self.config.epsilon,
            gelu=gelu,
            pos=code and code.pointer,
            statistics=statistics,
        )
        return y, statistics

    def norm_backward(
        self,
        dy: Matrix,
        x: Matrix,
        statistics: Pointer | None,
        path: str,
        *,
        gelu: bool = False,
        added: Matrix | None = None,
        code: Matrix | None = None,
        dcode: Matrix | None = None,
        first: bool = False,
    ) -> Matrix:
        """The gradient of x, plus `added`. The gradient of the code is added to dcode, or written if it is the first."""
        assert statistics is not None
        dx = self.rows(f"d {path}", x.rows, x.columns)
        layers.add_norm_backward(
            self.steps,
            dy.pointer,
            x.pointer,
            statistics,
            self.master(f"{path}.weight"),
            self.master(f"{path}.bias"),
            dx.pointer,
            self.gradient(f"{path}.weight"),
            self.gradient(f"{path}.bias"),
            rows=x.rows,
            columns=x.columns,
            dtype=self.dtype,
            gelu=gelu,
            pos=code and code.pointer,
            dres=added and added.pointer,
            dpos=dcode and dcode.pointer,
            dpos_before=None if first or dcode is None else dcode.pointer,
        )
        return dx

    # -- GELU(norm(linear(x))) --

    def project(self, x: Matrix, path: str) -> tuple[Matrix, _Projected]:
        y = self.linear(x, path)
        out, statistics = self.norm(y, f"{path}.norm", gelu=True)
        return out, _Projected(x, y, statistics)

    def project_backward(self, dout: Matrix, tape: _Projected, path: str) -> Matrix:
        """The gradient of the linear layer's result; those of the parameters are written."""
        dy = self.norm_backward(dout, tape.linear, tape.statistics, f"{path}.norm", gelu=True)
        self.linear_gradients(dy, tape.x, path)
        return dy

    # -- position code --

    def waves(self, level: Level, features: Pointer | None = None) -> Matrix:
        """The Fourier features of a level's positions, behind the input features if they are given."""
        channels = self.config.in_channels if features is not None else 0
        out = self.rows("waves", level.slots, channels + POSITION_FEATURES)
        layers.add_fourier(
            self.steps,
            level.points,
            out.pointer,
            rows=level.slots,
            dtype=self.dtype,
            wavelengths=self.config.wavelengths,
            index=level.slot_to_point,
            features=features,
            channels=channels,
            columns=out.stride,
        )
        return out

    def code(self, level: Level, path: str) -> tuple[Matrix, _Coded]:
        waves = self.waves(level)
        active, hidden = self.linear_gelu(waves, f"{path}.0")
        return self.linear(active, f"{path}.1"), _Coded(waves, active, hidden)

    def code_backward(self, dcode: Matrix, tape: _Coded, path: str) -> None:
        self.linear_gradients(dcode, tape.active, f"{path}.1")
        self.linear_gradients(self.linear_backward(dcode, f"{path}.1", aux=tape.hidden), tape.waves, f"{path}.0")

    # -- stem --

    def stem(self, level: Level, features: Pointer) -> tuple[Matrix, Matrix]:
        """The first rows, and what they are made of. The weights are copied to rows that are aligned."""
        rows, columns = self.places["stem.weight"].shape
        x = self.waves(level, features)
        how = arrays.rows(Spec((rows, columns), FLOAT32), self.dtype, x.stride)
        weight = Matrix(
            arrays.add_rows(self.steps, self.master("stem.weight"), how), rows, columns, self.dtype, x.stride
        )
        y = self.rows("stem", level.slots, rows)
        linear.forward(self.steps, x, weight, y, bias=self.bias("stem"))
        return y, x

    def stem_gradients(self, dy: Matrix, x: Matrix) -> None:
        """The gradients of the stem's weight, whose rows need not be aligned, and of its bias."""
        rows, columns = self.places["stem.weight"].shape
        whole = x._replace(columns=x.stride)  # what is behind the columns is 0
        dweight = self.rows("d stem", rows, x.stride, FLOAT32)
        linear.weight_gradient(self.steps, dy, whole, dweight, bias_gradient=self.gradient("stem.bias"))
        spec = Spec((rows, columns), FLOAT32, (4 * x.stride, 4))
        arrays.add_rows(
            self.steps, dweight.pointer, arrays.rows(spec, FLOAT32, columns), out=self.gradient("stem.weight")
        )

    # -- block --

    def attention(self, level: Level, heads: int, odd: int, columns: int) -> attention.Shape:
        slots, config = (level.slots, heads, columns // heads), self.config
        table = level.scopes[odd], config.scope
        return attention.shape_of(level.lengths, config.bucket_size, slots, self.dtype, table, self.device)[0]

    def branch(self, x: Matrix, path: str, residual: Matrix, number: int, which: int) -> Matrix:
        """residual + drop(linear(x))."""
        rate = drop_rate(number, self.config)
        if self.step is None or not rate:
            return self.linear(x, path, residual)
        y, out = self.linear(x, path), self.rows(f"{path} kept", x.rows, residual.columns)
        self._drop(residual.pointer, y, out, rate, 2 * number + which)
        return out

    def branch_backward(self, dout: Matrix, number: int, which: int) -> Matrix:
        """The gradient of the branch's linear layer's result."""
        rate = drop_rate(number, self.config)
        if self.step is None or not rate:
            return dout
        dy = self.rows("d kept", dout.rows, dout.columns)
        self._drop(None, dout, dy, rate, 2 * number + which)
        return dy

    def _drop(self, x: Pointer | None, y: Matrix, out: Matrix, rate: float, layer: int) -> None:
        assert self.step is not None
        options = {"rate": rate, "layer": layer, "step": self.step, "seed": Number("seed")}
        sizes = {"rows": y.rows, "columns": y.columns, "dtype": self.dtype}
        layers.add_residual(self.steps, x, y.pointer, out.pointer, **sizes, **options)

    def block(
        self, x: Matrix, code: Matrix, path: str, level: Level, heads: int, odd: int, number: int
    ) -> tuple[Matrix, _Block]:
        normed, first = self.norm(x, f"{path}.norm1", code=code)
        qkv = self.linear(normed, f"{path}.qkv")
        attended = self.rows(f"{path} attended", x.rows, x.columns)
        lse = None if self.gradients is None else self.steps.workspace(f"{path} lse", 4 * x.rows * heads)
        shape = self.attention(level, heads, odd, x.columns)
        scale = shape.dim**-0.5
        attention.add_packed(
            self.steps, shape, qkv.pointer, level.tables[odd], level.batch, scale, attended.pointer, lse
        )
        middle = self.branch(attended, f"{path}.proj", x, number, 0)
        again, second = self.norm(middle, f"{path}.norm2")
        active, hidden = self.linear_gelu(again, f"{path}.fc1")
        out = self.branch(active, f"{path}.fc2", middle, number, 1)
        kept = qkv, attended, lse, middle, hidden, active
        return out, _Block(path, number, odd, heads, x, (first, second), (normed, again), *kept)

    def block_backward(
        self, dout: Matrix, tape: _Block, code: Matrix, dcode: Matrix, first: bool, level: Level
    ) -> Matrix:
        """The gradient of x; that of the code is added to dcode, or written if it is the first."""
        path = tape.path
        dy = self.branch_backward(dout, tape.number, 1)
        self.linear_gradients(dy, tape.active, f"{path}.fc2")
        dhidden = self.linear_backward(dy, f"{path}.fc2", aux=tape.hidden)
        self.linear_gradients(dhidden, tape.normed[1], f"{path}.fc1")
        dnormed = self.linear_backward(dhidden, f"{path}.fc1")
        dmiddle = self.norm_backward(dnormed, tape.middle, tape.statistics[1], f"{path}.norm2", added=dout)
        dy = self.branch_backward(dmiddle, tape.number, 0)
        self.linear_gradients(dy, tape.attended, f"{path}.proj")
        dattended = self.linear_backward(dy, f"{path}.proj")
        dqkv = self.rows(f"d {path} qkv", dout.rows, 3 * dout.columns)
        shape = self.attention(level, tape.heads, tape.odd, dout.columns)
        attention.add_packed_backward(
            self.steps,
            shape,
            dattended.pointer,
            tape.qkv.pointer,
            tape.attended.pointer,
            tape.lse,
            level.tables[tape.odd],
            level.batch,
            shape.dim**-0.5,
            dqkv.pointer,
        )
        self.linear_gradients(dqkv, tape.normed[0], f"{path}.qkv")
        dnormed = self.linear_backward(dqkv, f"{path}.qkv")
        options = {"code": code, "dcode": dcode, "first": first}
        return self.norm_backward(dnormed, tape.x, tape.statistics[0], f"{path}.norm1", added=dmiddle, **options)


# ---- the whole -----------------------------------------------------------------------------------------------------


class _Tape(NamedTuple):
    """What the backward of the network reads."""

    stem: Matrix
    codes: list[tuple[Matrix, _Coded]]  # by level
    encoder: list[list[_Block]]
    decoder: list[list[_Block]]
    down: list[_Projected | None]
    up: list[_Projected | None]
    skip: list[_Projected | None]
    last: Matrix
    statistics: Pointer | None
    normed: Matrix


def add_forward(net: Network, levels: list[Level], features: Pointer) -> tuple[Matrix, _Tape]:
    """Add the network without the last linear layer; returns its input and what a backward reads."""
    config, steps = net.config, net.steps
    numbers = iter(range(sum(config.depths) + sum(config.decoder_depths)))
    codes, encoder, down, skips = [], [], [], []
    x, stem = net.stem(levels[0], features)
    for number, level in enumerate(levels):
        path = f"encoder.{number}"
        if number:
            above = levels[number - 1]
            pooled = net.rows(f"{path} pooled", level.slots, x.columns)
            pooling.add_pool(
                steps, above.shape, x.pointer, above.members, pooled.pointer, columns=x.columns, dtype=net.dtype
            )
            x, tape = net.project(pooled, f"{path}.down")
        down.append(tape if number else None)
        codes.append(net.code(level, f"{path}.position"))
        blocks = []
        for i in range(config.depths[number]):
            where = f"{path}.blocks.{i}", level, config.heads[number], i % 2
            x, block = net.block(x, codes[-1][0], *where, next(numbers))
            blocks.append(block)
        encoder.append(blocks)
        skips.append(x)
    ups, skipped, decoder = ([None] * (config.levels - 1) for _ in range(3))
    for number in reversed(range(config.levels - 1)):
        path, level = f"decoder.{number}", levels[number]
        child, ups[number] = net.project(x, f"{path}.up")
        skip, skipped[number] = net.project(skips[number], f"{path}.skip")
        x = net.rows(f"{path} joined", level.slots, child.columns)
        pooling.add_unpool(
            steps,
            level.shape,
            child.pointer,
            level.members,
            skip.pointer,
            level.parents,
            Number(f"level {number} padding"),
            x.pointer,
            columns=x.columns,
            dtype=net.dtype,
        )
        blocks = []
        for i in range(config.decoder_depths[number]):
            where = f"{path}.blocks.{i}", level, config.decoder_heads[number], i % 2
            x, block = net.block(x, codes[number][0], *where, next(numbers))
            blocks.append(block)
        decoder[number] = blocks
    normed, statistics = net.norm(x, "head.norm")
    return normed, _Tape(stem, codes, encoder, decoder, down, ups, skipped, x, statistics, normed)


def add_backward(net: Network, levels: list[Level], dlogits: Matrix, tape: _Tape) -> None:
    """Add the backward of the network: every gradient of the parameters is written."""
    config, steps = net.config, net.steps
    dcodes = [net.rows(f"d code {i}", level.slots, config.channels[i]) for i, level in enumerate(levels)]
    started = [False] * config.levels

    def blocks_backward(d: Matrix, blocks: list[_Block], number: int) -> Matrix:
        for block in reversed(blocks):
            d = net.block_backward(d, block, tape.codes[number][0], dcodes[number], not started[number], levels[number])
            started[number] = True
        return d

    net.linear_gradients(dlogits, tape.normed, "head")
    d = net.norm_backward(net.linear_backward(dlogits, "head"), tape.last, tape.statistics, "head.norm")
    skipped = []
    for number in range(config.levels - 1):
        path, level = f"decoder.{number}", levels[number]
        d = blocks_backward(d, tape.decoder[number], number)
        skipped.append(net.project_backward(d, tape.skip[number], f"{path}.skip"))
        dchild = net.rows(f"d {path} child", levels[number + 1].slots, d.columns)
        pooling.add_unpool_backward(
            steps, level.shape, d.pointer, level.members, dchild.pointer, columns=d.columns, dtype=net.dtype
        )
        dy = net.project_backward(dchild, tape.up[number], f"{path}.up")
        d = net.linear_backward(dy, f"{path}.up")
    for number in reversed(range(config.levels)):
        path = f"encoder.{number}"
        d = blocks_backward(d, tape.encoder[number], number)
        net.code_backward(dcodes[number], tape.codes[number][1], f"{path}.position")
        if number:
            dy = net.project_backward(d, tape.down[number], f"{path}.down")
            dpooled, above = net.linear_backward(dy, f"{path}.down"), levels[number - 1]
            d = net.rows(f"d {path} pooled", above.slots, dpooled.columns)
            pooling.add_pool_backward(
                steps,
                above.shape,
                dpooled.pointer,
                above.members,
                above.parents,
                Number(f"level {number - 1} padding"),
                d.pointer,
                columns=d.columns,
                dtype=net.dtype,
            )
            d = net.linear_backward(skipped[number - 1], f"decoder.{number - 1}.skip", added=d)
    net.stem_gradients(d, tape.stem)


# ---- plans ---------------------------------------------------------------------------------------------------------


@functools.cache
def cast_call(config: Config) -> Call:
    """Input: the arena of parameters. Result: the same in the config's dtype, which is not float32."""
    steps = Steps(inputs=1, results=1)
    spec = Spec((arena_size(config) // ALIGNMENT, ALIGNMENT), FLOAT32)
    arrays.add_rows(steps, Input(0), arrays.rows(spec, np.dtype(config.dtype), ALIGNMENT), out=Result(0))
    return Call(steps.plan(), {})


def _features(steps: Steps, features: Spec) -> Pointer:
    """Input 1 as contiguous float32."""
    return arrays.add_rows(steps, Input(1), arrays.rows(features, FLOAT32, features.shape[1]))


@functools.lru_cache(maxsize=8)
def forward_call(config: Config, lengths: tuple[int, ...], features: Spec, device: Device) -> Call:
    """Inputs: points float32, features, the arena of parameters, the same in the config's dtype. Result: logits."""
    steps = Steps(inputs=4, results=1)
    if not sum(lengths):
        return Call(steps.plan(), {})
    points, _, masters, weights = map(Input, range(4))
    levels, numbers = add_geometry(steps, config, lengths, points, device)
    net = Network(steps, config, device, masters, weights)
    normed, _ = add_forward(net, levels, _features(steps, features))
    slots, classes = levels[0].slots, config.classes
    logits = net.rows("logits", slots, classes, FLOAT32)
    linear.forward(steps, normed, net.weight("head"), logits, bias=net.master("head.bias"))
    rows = arrays.strided_layout((slots, classes), (4 * logits.stride, 4), 4) if logits.stride > classes else None
    packed = arrays.add_copy(steps, logits.pointer, rows)
    buckets.add_move(
        steps,
        packed,
        levels[0].point_to_slot,
        Result(0),
        rows=sum(lengths),
        most=slots,
        row_bytes=4 * classes,
        word=4,
        fill=bytes(buckets.PATTERN_BYTES),
    )
    return Call(steps.plan(share=True), numbers)


@functools.lru_cache(maxsize=8)
def gradient_call(
    config: Config, lengths: tuple[int, ...], features: Spec, label_dtype: np.dtype, ignore: int, device: Device
) -> Call:
    """Inputs: those of `forward_call`, with labels behind the features. Results: loss, the arena of gradients."""
    steps = Steps(inputs=5, results=2)
    steps.clear(Result(1), 4 * arena_size(config))  # between the gradients
    if not sum(lengths):
        steps.clear(Result(0), 4)
        return Call(steps.plan(), {})
    points, _, labels, masters, weights = map(Input, range(5))
    inputs = points, _features(steps, features), labels, masters, weights
    options = label_dtype, ignore, Result(0), Result(1)
    numbers = _add_gradients(steps, config, lengths, device, inputs, *options, step=None)
    return Call(steps.plan(share=True), numbers)


@functools.lru_cache(maxsize=8)
def step_call(
    config: Config, lengths: tuple[int, ...], features: Spec, label_dtype: np.dtype, ignore: int, device: Device
) -> Call:
    """A training step. Inputs: points, features, labels, then what it changes; results: loss, norm of the gradients.

    It changes the parameters, their copy in the config's dtype, AdamW's m and v, the gradients (0 at the beginning),
    and the state of `optim.add_adamw`. Numbers that the caller adds: seed, rate, steps, decay, clip.
    """
    steps = Steps(inputs=9, results=2)
    points, _, labels, masters, weights, m, v, gradients, state = map(Input, range(9))
    inputs = points, _features(steps, features), labels, masters, weights
    options = label_dtype, ignore, Result(0), gradients
    numbers = _add_gradients(steps, config, lengths, device, inputs, *options, step=state)
    optim.add_adamw(
        steps,
        gradients,
        Result(0),
        state,
        masters,
        m,
        v,
        Result(1),
        size=arena_size(config),
        decayed=decayed_size(config),
        copy=None if config.dtype == "float32" else weights,
        copy_dtype=np.dtype(config.dtype),
    )
    return Call(steps.plan(share=True), numbers)


def _add_gradients(
    steps: Steps,
    config: Config,
    lengths: tuple[int, ...],
    device: Device,
    inputs: tuple[Pointer, ...],
    label_dtype: np.dtype,
    ignore: int,
    loss: Pointer,
    gradients: Pointer,
    step: Pointer | None,
) -> dict[str, Any]:
    """Add forward, loss and backward; returns the numbers. Inputs: points, features, labels, parameters, their copy."""
    points, features, labels, masters, weights = inputs
    levels, numbers = add_geometry(steps, config, lengths, points, device)
    net = Network(steps, config, device, masters, weights, gradients, step)
    normed, tape = add_forward(net, levels, features)
    logits = net.linear(normed, "head")
    dlogits = net.rows("d logits", logits.rows, logits.columns)
    losses.add_loss(
        steps,
        logits.pointer,
        labels,
        dlogits.pointer,
        loss,
        points=sum(lengths),
        rows=logits.rows,
        classes=config.classes,
        dtype=net.dtype,
        label_dtype=label_dtype,
        ignore=ignore,
        point_to_slot=levels[0].point_to_slot,
        pitch=logits.stride,
    )
    add_backward(net, levels, dlogits, tape)
    return numbers
