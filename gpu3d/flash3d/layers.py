# SPDX-License-Identifier: Apache-2.0
"""The layers of the backbone on a GPU and their backwards, as steps of a plan.

Rows of activations are slots of a stage layout, in the config's dtype. Sums, statistics, parameters and their gradients
are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpu3d._arrays import FLOAT32, Spec
from gpu3d.cuda import arrays, attention, layers, linear
from gpu3d.cuda.plan import Device, Matrix, Number, Pointer, Steps
from gpu3d.flash3d.config import Config
from gpu3d.flash3d.levels import Level
from gpu3d.flash3d.params import Parameter, layout
from gpu3d.reference.flash3d import POSITION_FEATURES, drop_rate

COLUMNS = 8  # rows of matrices begin at multiples of this many elements


def _row(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


# ---- what a backward reads -----------------------------------------------------------------------------------------


class Projected(NamedTuple):
    """What the backward of GELU(norm(linear(x))) reads."""

    x: Matrix
    linear: Matrix
    statistics: Any


class Coded(NamedTuple):
    """What the backward of a level's position code reads."""

    waves: Matrix
    active: Matrix
    hidden: Matrix | None


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
    active: Matrix


# ---- the layers ----------------------------------------------------------------------------------------------------


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
        Whether a backward computes what is inside a block again, from its input. What is kept takes an eighth of the
        memory then. The same launches compute it, so the bits are the same.
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
        self.masters, self.weights, self.gradients, self.step = masters, weights, gradients, step
        self.places: dict[str, Parameter] = {parameter.path: parameter for parameter in layout(config)}

    # -- where things lie --

    def master(self, path: str) -> Pointer:
        """A parameter in float32."""
        return self.masters + 4 * self.places[path].offset

    def gradient(self, path: str) -> Pointer:
        """The gradient of a parameter."""
        assert self.gradients is not None
        return self.gradients + 4 * self.places[path].offset

    def bias(self, path: str) -> Pointer:
        """The bias of a linear layer."""
        return self.weights + self.dtype.itemsize * self.places[f"{path}.bias"].offset

    def weight(self, path: str) -> Matrix:
        """The weight of a linear layer."""
        place = self.places[f"{path}.weight"]
        rows, columns = place.shape
        return Matrix(self.weights + self.dtype.itemsize * place.offset, rows, columns, self.dtype, columns)

    def rows(self, name: str, rows: int, columns: int, dtype: np.dtype | None = None) -> Matrix:
        """New rows in the workspace."""
        dtype, stride = dtype or self.dtype, _row(columns)
        return Matrix(self.steps.workspace(name, rows * stride * dtype.itemsize), rows, columns, dtype, stride)

    # -- linear --

    def linear(self, x: Matrix, path: str, residual: Matrix | None = None) -> Matrix:
        """The linear layer, plus the residual."""
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
        rows, columns = self.places[f"{path}.weight"].shape
        dweight = Matrix(self.gradient(f"{path}.weight"), rows, columns, FLOAT32, columns)
        with self.steps.beside():  # nothing waits for them
            linear.weight_gradient(self.steps, dy, x, dweight, bias_gradient=self.gradient(f"{path}.bias"))

    def linear_backward(self, dy: Matrix, path: str, aux: Matrix | None = None, added: Matrix | None = None) -> Matrix:
        """The gradient of x, through GELU where `aux` is given, plus `added`."""
        dx = self.rows(f"d {path}", dy.rows, self.weight(path).columns)
        linear.input_gradient(self.steps, dy, self.weight(path), dx, added=added)
        if aux is not None:
            sizes = {"rows": dx.rows, "columns": dx.columns}
            layers.add_gelu_backward(self.steps, dx.pointer, aux.pointer, dx.pointer, **sizes, dtype=self.dtype)
        return dx

    # -- norm --

    def norm(
        self, x: Matrix, path: str, gelu: bool = False, code: Matrix | None = None
    ) -> tuple[Matrix, Pointer | None]:
        """LayerNorm of x, or of x plus the code, and GELU behind it; and the statistics that a backward reads."""
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
        """The gradient of x, plus `added`. That of the code is added to dcode, or written if it is the first."""
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

    def project(self, x: Matrix, path: str) -> tuple[Matrix, Projected]:
        """GELU(norm(linear(x)))."""
        y = self.linear(x, path)
        out, statistics = self.norm(y, f"{path}.norm", gelu=True)
        return out, Projected(x, y, statistics)

    def project_backward(self, dout: Matrix, tape: Projected, path: str) -> Matrix:
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

    def code(self, level: Level, path: str) -> tuple[Matrix, Coded]:
        """The position code of a level."""
        waves = self.waves(level)
        active, hidden = self.linear_gelu(waves, f"{path}.0")
        return self.linear(active, f"{path}.1"), Coded(waves, active, hidden)

    def code_backward(self, dcode: Matrix, tape: Coded, path: str) -> None:
        """The gradients of the parameters of `code`."""
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
        """What the attention of a block depends on."""
        sizes, config = level.sizes, self.config
        q, table = (level.slots, heads, columns // heads), (sizes.scopes[odd], config.scope)
        clouds = sizes.clouds, sizes.largest
        return attention.shape_of(*clouds, config.bucket_size, q, self.dtype, table, self.device)

    def branch(self, x: Matrix, path: str, residual: Matrix, number: int, which: int) -> Matrix:
        """The residual plus the linear layer, some of whose rows are dropped in training."""
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
        layers.add_residual(
            self.steps,
            x,
            y.pointer,
            out.pointer,
            rows=y.rows,
            columns=y.columns,
            dtype=self.dtype,
            rate=rate,
            layer=layer,
            step=self.step,
            seed=Number("seed"),
        )

    def block(
        self, x: Matrix, code: Matrix, path: str, level: Level, heads: int, odd: int, number: int
    ) -> tuple[Matrix, Block]:
        """Attention and MLP, each behind a norm and beside the identity."""
        tape = self.inside(x, code, path, level, heads, odd, number)
        return self.branch(tape.active, f"{path}.fc2", tape.middle, number, 1), tape

    def inside(self, x: Matrix, code: Matrix, path: str, level: Level, heads: int, odd: int, number: int) -> Block:
        """A block without its last linear layer."""
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
        kept = qkv, attended, lse, middle, hidden, active
        return Block(path, number, odd, heads, x, (first, second), (normed, again), *kept)

    def block_backward(
        self, dout: Matrix, tape: Block, code: Matrix, dcode: Matrix, first: bool, level: Level
    ) -> Matrix:
        """The gradient of x; that of the code is added to dcode, or written if it is the first."""
        path = tape.path
        self.steps.join()  # so that what the gradients of the block before read need not be kept
        if self.recompute:
            tape = self.inside(tape.x, code, path, level, tape.heads, tape.odd, tape.number)
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
        where = dnormed, tape.x, tape.statistics[0], f"{path}.norm1"
        return self.norm_backward(*where, added=dmiddle, code=code, dcode=dcode, first=first)
