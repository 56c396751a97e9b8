# SPDX-License-Identifier: Apache-2.0
"""Linear layers, y = x W^T + b, and their gradients, as steps of a plan.

x is [n, K], W is [N, K] as in torch.nn.Linear, y is [n, N]. A matrix may have gaps between its rows. Addresses, and the
bytes from a row to the next, must be multiples of 16. So K = 132 in bfloat16 needs rows 136 elements apart, and N = 19
rows 24 elements apart. What lies in the gaps is neither read nor written.

Sums are float32. Inputs are bfloat16 or float16, with results of the same dtype or float32, or they are float32 without
TF32. A bias has the dtype of y.

A row of y or of x's gradient has the same bits whatever other rows there are. The weights' gradient is a sum over rows:
it is the same each time for the same rows. (Both on one kind of GPU with one version of cuBLASLt.)
"""

from __future__ import annotations

from gpu3d.cuda.plan import Gemm, Matrix, Pointer, Steps


def forward(
    steps: Steps,
    x: Matrix,
    weight: Matrix,
    y: Matrix,
    *,
    bias: Pointer | None = None,
    gelu: bool = False,
    aux: Matrix | None = None,
    residual: Matrix | None = None,
) -> None:
    """Set y = x W^T + bias + residual, or y = gelu(x W^T + bias), where gelu is the tanh form.

    `aux` gets what gelu is applied to, for the backward; its rows must be a multiple of 8 elements apart. The residual
    may be y.
    """
    if (gelu and (bias is None or residual)) or (aux and not gelu):
        raise ValueError("gelu needs a bias and takes no residual; aux is what gelu is applied to.")
    epilogue = "DEFAULT" if bias is None else "BIAS" if not gelu else "GELU_BIAS" if aux is None else "GELU_AUX_BIAS"
    steps.gemm(Gemm(x, weight, y, transpose_b=True, c=residual, epilogue=epilogue, bias=bias, aux=aux))


def input_gradient(
    steps: Steps,
    dy: Matrix,
    weight: Matrix,
    dx: Matrix,
    *,
    added: Matrix | None = None,
) -> None:
    """Set dx = dy W + added. `added` may be dx."""
    steps.gemm(Gemm(dy, weight, dx, c=added))


def weight_gradient(steps: Steps, dy: Matrix, x: Matrix, dweight: Matrix) -> None:
    """Set dW = dy^T x. The gradient of the bias comes from `layers.add_column_sums`."""
    if dweight.stride != dweight.columns:
        raise ValueError(f"the rows of a weight's gradient must follow one another, got {dweight}.")
    if dy.rows:
        steps.gemm(Gemm(dy, x, dweight, transpose_a=True, pinned=False))
    else:
        steps.clear(dweight.pointer, dweight.rows * dweight.columns * dweight.dtype.itemsize)
