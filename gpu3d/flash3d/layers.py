# SPDX-License-Identifier: Apache-2.0
"""The layers of the backbone on a GPU and their backwards, as steps of a plan.

Rows of activations are slots of a stage layout, in the config's dtype. Sums, statistics, parameters and their gradients
are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, Spec
from gpu3d.cuda import arrays, attention, buckets, layers, linear
from gpu3d.cuda.plan import Device, Matrix, Number, Pointer, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.levels import Level
from gpu3d.flash3d.params import by_path, layout
from gpu3d.reference.flash3d import drop_rate

COLUMNS = 8  # rows of matrices begin at multiples of this many elements


def _row(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


# ---- what a backward reads -----------------------------------------------------------------------------------------


class Projected(NamedTuple):
    """What the backward of GELU(norm(linear(x))) reads."""

    x: Matrix
    linear: Matrix
    statistics: Any


class Block(NamedTuple):
    """What the backward of a block reads."""

    path: str
    number: int  # counts blocks in the order in which they run
    odd: int  # which scopes
    heads: int
    x: Matrix
    statistics: tuple[Any, Any]
    normed: tuple[Matrix, Matrix]
    qkv: Matrix
    attended: Matrix
    lse: Any
    middle: Matrix
    hidden: Matrix | None  # before GELU


class Sum(NamedTuple):
    """x + keep(row) y, which the next norm computes and writes."""

    x: Matrix
    y: Matrix
    drop: layers.Drop


# ---- the layers ----------------------------------------------------------------------------------------------------


@functools.cache
def _places(config: Config, arena: Pointer, itemsize: int) -> dict[str, Pointer]:
    """Where the parameters lie in an arena, by path."""
    return {parameter.path: arena + itemsize * parameter.offset for parameter in layout(config)}


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
    recompute : bool
        Whether a backward computes what is inside a block again, from its input. A step takes about a
        quarter of the memory then. The same launches compute it, so the bits are the same.
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
        recompute: bool = False,
    ) -> None:
        self.steps, self.config, self.device, self.recompute = steps, config, device, recompute
        self.dtype = np.dtype(config.dtype)
        self.masters, self.weights = _places(config, masters, 4), _places(config, weights, self.dtype.itemsize)
        self.gradients, self.step = gradients and _places(config, gradients, 4), step
        self.parameters = by_path(config)
        self.partials: list[layers.Partials] = []

    # -- where things lie --

    def master(self, path: str) -> Pointer:
        """A parameter in float32."""
        return self.masters[path]

    def gradient(self, path: str) -> Pointer:
        """The gradient of a parameter."""
        assert self.gradients is not None
        return self.gradients[path]

    def bias(self, path: str) -> Pointer:
        """The bias of a linear layer."""
        return self.weights[f"{path}.bias"]

    def weight(self, path: str) -> Matrix:
        """The weight of a linear layer."""
        rows, columns = self.parameters[f"{path}.weight"].shape
        return Matrix(self.weights[f"{path}.weight"], rows, columns, self.dtype, columns)

    def rows(self, name: str, rows: int, columns: int, dtype: np.dtype | None = None) -> Matrix:
        """New rows in the workspace."""
        dtype, stride = dtype or self.dtype, _row(columns)
        return Matrix(self.steps.workspace(name, rows * stride * dtype.itemsize), rows, columns, dtype, stride)

    # -- linear --

    def linear(self, x: Matrix, path: str, residual: Matrix | None = None) -> Matrix:
        """The linear layer, plus the residual."""
        weight = self.weight(path)
        y = self.rows(path, x.rows, weight.rows)
        linear.forward(self.steps, x, weight, y, bias=self.bias(path), residual=residual)
        return y

    def linear_gelu(self, x: Matrix, path: str) -> tuple[Matrix, Matrix | None]:
        """GELU(linear(x)), and what GELU is applied to, if a backward needs it."""
        weight = self.weight(path)
        y = self.rows(f"{path} gelu", x.rows, weight.rows)
        hidden = self.rows(path, x.rows, weight.rows) if self.gradients is not None else None
        linear.forward(self.steps, x, weight, y, bias=self.bias(path), gelu=True, aux=hidden)
        return y, hidden

    def linear_gradients(self, dy: Matrix, x: Matrix, path: str) -> None:
        """The gradients of weight and bias."""
        rows, columns = self.parameters[f"{path}.weight"].shape
        dweight = Matrix(self.gradient(f"{path}.weight"), rows, columns, FLOAT32, columns)
        with self.steps.beside():  # nothing waits for them
            linear.weight_gradient(self.steps, dy, x, dweight)
            self.bias_gradient(dy, path)

    def bias_gradient(self, dy: Matrix, path: str) -> None:
        """The gradient of a linear layer's bias, which `sums` writes."""
        self.partials.append(layers.add_column_sums(self.steps, dy, self.gradient(f"{path}.bias")))

    def sums(self) -> None:
        """The gradients of all vectors of parameters: those of norms, and biases."""
        layers.add_sums(self.steps, self.partials)

    def linear_backward(self, dy: Matrix, path: str, added: Matrix | None = None) -> Matrix:
        """The gradient of x, plus `added`."""
        weight = self.weight(path)
        dx = self.rows(f"d {path}", dy.rows, weight.columns)
        linear.input_gradient(self.steps, dy, weight, dx, added=added)
        return dx

    def gelu_linear_backward(self, dy: Matrix, hidden: Matrix | None, path: str) -> Matrix:
        """The gradient of `hidden` in linear(GELU(hidden)); those of the parameters are written."""
        assert hidden is not None
        d = self.linear_backward(dy, path)
        active = self.rows(f"{path} active", d.rows, d.columns)
        pointers = d.pointer, hidden.pointer, d.pointer, active.pointer
        layers.add_gelu_backward(self.steps, *pointers, rows=d.rows, columns=d.columns, dtype=self.dtype)
        self.linear_gradients(dy, active, path)
        return d

    # -- norm --

    def norm(self, x: Matrix | Sum, path: str, gelu: bool = False) -> tuple[Matrix, Matrix, Pointer | None]:
        """x, which is written here if it is a sum; its norm; and the statistics that a backward reads.

        The norm is LayerNorm, and with `gelu` there is a GELU behind it.
        """
        base, y, drop = x if isinstance(x, Sum) else (x, None, None)
        out = self.rows(path, base.rows, base.columns)
        total = base if y is None else self.rows(f"{path} x", base.rows, base.columns)
        statistics = None if self.gradients is None else self.steps.workspace(f"{path} statistics", 8 * base.rows)
        layers.add_norm(
            self.steps,
            base.pointer,
            self.master(f"{path}.weight"),
            self.master(f"{path}.bias"),
            out.pointer,
            rows=base.rows,
            columns=base.columns,
            dtype=self.dtype,
            epsilon=self.config.epsilon,
            gelu=gelu,
            statistics=statistics,
            y=y and y.pointer,
            drop=drop,
            total=y and total.pointer,
        )
        return total, out, statistics

    def norm_backward(
        self,
        dy: Matrix,
        x: Matrix,
        statistics: Pointer | None,
        path: str,
        *,
        gelu: bool = False,
        added: Matrix | None = None,
        drop: layers.Drop | None = None,
    ) -> tuple[Matrix, Matrix]:
        """The gradient dx of x, with `added` in it; and keep(row) dx, which is dx without drop path."""
        assert statistics is not None
        dx = self.rows(f"d {path}", x.rows, x.columns)
        kept = dx if drop is None else self.rows(f"d {path} kept", x.rows, x.columns)
        self.partials += layers.add_norm_backward(
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
            dres=added and added.pointer,
            dy=drop and kept.pointer,
            drop=drop,
        )
        return dx, kept

    # -- GELU(norm(linear(x))) --

    def project(self, x: Matrix, path: str) -> tuple[Matrix, Projected]:
        """GELU(norm(linear(x)))."""
        y = self.linear(x, path)
        _, out, statistics = self.norm(y, f"{path}.norm", gelu=True)
        return out, Projected(x, y, statistics)

    def project_backward(self, dout: Matrix, tape: Projected, path: str) -> Matrix:
        """The gradient of the linear layer's result; those of the parameters are written."""
        dy, _ = self.norm_backward(dout, tape.linear, tape.statistics, f"{path}.norm", gelu=True)
        self.linear_gradients(dy, tape.x, path)
        return dy

    # -- stem --

    def stem(self, level: Level, features: Pointer, dtype: np.dtype) -> tuple[Matrix, Matrix]:
        """The first rows, and the features in slots. `features` are contiguous rows of points, of this dtype.

        Rows of features and of the weights are filled up with zeros, so that they are aligned.
        """
        rows, channels = self.parameters["stem.weight"].shape
        columns = _row(channels)
        how = arrays.rows(Spec((level.slots, channels), dtype), self.dtype, columns)
        by_point = arrays.add_rows(self.steps, features, how, number=Number("points"))
        x = self.rows("features", level.slots, columns)
        buckets.add_move(
            self.steps,
            by_point,
            level.slot_to_point,
            x.pointer,
            rows=level.slots,
            most=level.slots,
            row_bytes=columns * self.dtype.itemsize,
            word=16 if how else self.dtype.itemsize,  # the caller's rows may begin anywhere
            fill=bytes(buckets.PATTERN_BYTES),
        )
        how = arrays.rows(Spec((rows, channels), FLOAT32), self.dtype, columns)
        weight = Matrix(
            arrays.add_rows(self.steps, self.master("stem.weight"), how), rows, columns, self.dtype, columns
        )
        y = self.rows("stem", level.slots, rows)
        linear.forward(self.steps, x, weight, y, bias=self.bias("stem"))
        return y, x

    def stem_gradient(self, dy: Matrix, x: Matrix) -> None:
        """The gradient of the stem's weight, whose rows need not be aligned."""
        rows, channels = self.parameters["stem.weight"].shape
        dweight = self.rows("d stem", rows, x.columns, FLOAT32)
        linear.weight_gradient(self.steps, dy, x, dweight)
        spec = Spec((rows, channels), FLOAT32, (4 * dweight.stride, 4))
        how = arrays.rows(spec, FLOAT32, channels)
        arrays.add_rows(self.steps, dweight.pointer, how, out=self.gradient("stem.weight"))

    # -- block --

    def attention(self, level: Level, heads: int, odd: int, columns: int) -> attention.Shape:
        """What the attention of a block depends on."""
        sizes, config = level.sizes, self.config
        q, table = (level.slots, heads, columns // heads), (sizes.scopes[odd], config.scope)
        clouds = sizes.clouds, sizes.largest
        return attention.shape_of(*clouds, config.bucket_size, q, self.dtype, table, self.device)

    def rotate(self, qkv: Matrix, level: Level, heads: int, back: bool = False) -> None:
        """Turn q and k, in place, by the positions of their rows; or turn their gradients back."""
        dim = qkv.columns // (3 * heads)
        layers.add_rotate(
            self.steps,
            qkv.pointer,
            level.points,
            level.slot_to_point,
            rows=qkv.rows,
            heads=heads,
            dim=dim,
            dtype=self.dtype,
            wavelengths=self.config.wavelengths,
            back=back,
        )

    def drop(self, number: int, which: int) -> layers.Drop | None:
        """The drop path of a branch of a block: 0 is attention, 1 is the MLP. None if no row is dropped."""
        rate = drop_rate(number, self.config)
        if self.step is None or not rate:
            return None
        return layers.Drop(rate, 2 * number + which, self.step, Number("seed"))

    def branch(self, x: Matrix, path: str, residual: Matrix, drop: layers.Drop | None) -> Matrix | Sum:
        """The residual plus the linear layer, some of whose rows are dropped in training."""
        if drop is None:
            return self.linear(x, path, residual)
        return Sum(residual, self.linear(x, path), drop)

    def written(self, x: Matrix | Sum) -> Matrix:
        """The rows of a sum that no norm computes."""
        if not isinstance(x, Sum):
            return x
        out = self.rows("sum", x.x.rows, x.x.columns)
        self._drop(x.x.pointer, x.y, out, x.drop)
        return out

    def kept(self, d: Matrix, drop: layers.Drop | None) -> Matrix:
        """keep(row) d, where d is a gradient that no norm's backward computes."""
        if drop is None:
            return d
        out = self.rows("d kept", d.rows, d.columns)
        self._drop(None, d, out, drop)
        return out

    def _drop(self, x: Pointer | None, y: Matrix, out: Matrix, drop: layers.Drop) -> None:
        sizes = {"rows": y.rows, "columns": y.columns}
        layers.add_residual(self.steps, x, y.pointer, out.pointer, **sizes, dtype=self.dtype, drop=drop)

    def blocks(
        self, x: Matrix, path: str, level: Level, heads: int, numbers: Iterable[int]
    ) -> tuple[Matrix | Sum, list[Block]]:
        """The blocks of a stage: even and odd ones by turns, from an even one on."""
        out: Matrix | Sum = x
        tapes = []
        for i, number in enumerate(numbers):
            out, tape = self.block(out, f"{path}.blocks.{i}", level, heads, i % 2, number)
            tapes.append(tape)
        return out, tapes

    def block(
        self, x: Matrix | Sum, path: str, level: Level, heads: int, odd: int, number: int
    ) -> tuple[Matrix | Sum, Block]:
        """Attention and MLP, each behind a norm and beside the identity."""
        active, tape = self.inside(x, path, level, heads, odd, number)
        return self.branch(active, f"{path}.fc2", tape.middle, self.drop(number, 1)), tape

    def inside(
        self, start: Matrix | Sum, path: str, level: Level, heads: int, odd: int, number: int
    ) -> tuple[Matrix, Block]:
        """The input of a block's last linear layer."""
        x, normed, first = self.norm(start, f"{path}.norm1")
        qkv = self.linear(normed, f"{path}.qkv")
        self.rotate(qkv, level, heads)
        attended = self.rows(f"{path} attended", x.rows, x.columns)
        lse = None if self.gradients is None else self.steps.workspace(f"{path} lse", 4 * x.rows * heads)
        shape = self.attention(level, heads, odd, x.columns)
        scale = shape.dim**-0.5
        attention.add_packed(
            self.steps, shape, qkv.pointer, level.tables[odd], level.batch, scale, attended.pointer, lse
        )
        total = self.branch(attended, f"{path}.proj", x, self.drop(number, 0))
        middle, again, second = self.norm(total, f"{path}.norm2")
        active, hidden = self.linear_gelu(again, f"{path}.fc1")
        kept = qkv, attended, lse, middle, hidden
        return active, Block(path, number, odd, heads, x, (first, second), (normed, again), *kept)

    def blocks_backward(self, dout: Matrix, dy: Matrix, blocks: list[Block], level: Level) -> Matrix:
        """The gradient of the input of a stage.

        dout is the gradient of its output, and dy is keep(row) dout of the last block.
        """
        for block, before in zip(reversed(blocks), [*reversed(blocks[:-1]), None], strict=True):
            drop = before and self.drop(before.number, 1)
            dout, dy = self.block_backward(dout, dy, block, level, drop)
        return dout

    def block_backward(
        self, dout: Matrix, dy: Matrix, tape: Block, level: Level, drop: layers.Drop | None
    ) -> tuple[Matrix, Matrix]:
        """The gradient dx of x, and keep(row) dx. dy is keep(row) dout.

        The former belongs to the MLP of the block before, whose drop path is `drop`; the latter to this block's MLP.
        """
        path = tape.path
        if self.recompute:
            _, tape = self.inside(tape.x, path, level, tape.heads, tape.odd, tape.number)
        dhidden = self.gelu_linear_backward(dy, tape.hidden, f"{path}.fc2")
        self.linear_gradients(dhidden, tape.normed[1], f"{path}.fc1")
        dnormed = self.linear_backward(dhidden, f"{path}.fc1")
        where = dnormed, tape.middle, tape.statistics[1], f"{path}.norm2"
        dmiddle, dy = self.norm_backward(*where, added=dout, drop=self.drop(tape.number, 0))
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
            level.slots,
            shape.dim**-0.5,
            dqkv.pointer,
        )
        self.rotate(dqkv, level, tape.heads, back=True)
        # What the gradients of weights have read so far need not be kept any longer. They ran beside the attention, so
        # this waits for none of them.
        self.steps.join()
        self.linear_gradients(dqkv, tape.normed[0], f"{path}.qkv")
        dnormed = self.linear_backward(dqkv, f"{path}.qkv")
        where = dnormed, tape.x, tape.statistics[0], f"{path}.norm1"
        return self.norm_backward(*where, added=dmiddle, drop=drop)
