# SPDX-License-Identifier: Apache-2.0
"""The ops that gpu3d.interop.torch differentiates, as data for the tests of both devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import clouds
import numpy as np
import torch

import gpu3d
from gpu3d import _arrays, neighbors
from gpu3d.chamfer import points_arrays, points_backward_arrays

LENGTHS = (150, 0, 33, 1)  # clouds in buckets
POINTS = sum(LENGTHS)
X_LENGTHS, Y_LENGTHS = (20, 40), (45, 5)  # clouds of searches and losses


def normal(*shape: int, dtype: Any = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    x = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(x).to(dtype).to(device).requires_grad_(dtype.is_floating_point)


def points(n: int = POINTS, dtype: Any = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.from_numpy(clouds.uniform(n, seed=seed).copy()).to(dtype).to(device)


def native(x: Any) -> Any:
    """Convert a tensor, or an object with tensors, to NumPy or on a GPU to CuPy."""
    if isinstance(x, torch.Tensor):
        given = _arrays.read(x.detach(), "x")
        return given.array if given.device is None else _arrays.as_cupy(given).copy()
    if isinstance(x, (gpu3d.Buckets, gpu3d.Scopes)):
        arrays = {name: native(y) for name, y in vars(x).items() if isinstance(y, torch.Tensor)}
        return type(x)(**{**vars(x), **arrays})
    return tuple(map(native, x)) if isinstance(x, (tuple, list)) else x


def tensor(x: Any) -> torch.Tensor:
    """Convert an array of another library to a tensor."""
    if isinstance(x, torch.Tensor):
        return x
    given = _arrays.read(x, "x")
    return _arrays.leave(given.array, _arrays.Origin("torch", given.device))


@functools.cache
def layout(bucket_size: int = 16, lengths: tuple[int, ...] = LENGTHS, device: str = "cpu") -> Any:
    buckets = gpu3d.bucketize(points(sum(lengths), device=device), bucket_size, lengths=lengths)
    return buckets, gpu3d.scopes(buckets, 2, shift=1)


def place(bucket_size: int = 16, lengths: tuple[int, ...] = LENGTHS, device: str = "cpu") -> Any:
    """The layout of a case: buckets, scopes, and the points in slot order."""
    buckets, scopes = layout(bucket_size, lengths, device)
    return buckets, scopes, buckets.scatter(points(sum(lengths), device=device))


class Case(NamedTuple):
    """A differentiable op. Its functions take arrays and a layout of any one library."""

    shapes: Callable[[Any], Sequence[tuple[int, ...]]]  # layout -> shapes of the inputs
    forward: Callable[..., tuple[Any, Any]]  # layout, inputs -> the differentiable result, the whole result
    backward: Callable[..., Sequence[Any]]  # layout, gradient of the result, whole result, inputs -> gradients
    padded: bool = False  # inputs are in slot order
    twice: bool = False  # it has second derivatives


def _pool(reduce: str, ratio: int) -> Case:
    def forward(at: Any, x: Any) -> Any:
        pooled = gpu3d.bucket_pool(x, at[2], at[0], ratio=ratio, reduce=reduce)
        return pooled.features, pooled

    def backward(at: Any, dout: Any, pooled: Any, x: Any) -> Any:
        return (gpu3d.bucket_pool_backward(dout, pooled),)

    return Case(lambda at: [(at[0].num_slots, 5)], forward, backward, padded=True)


def _unpool(at: Any, child: Any, skip: Any) -> Any:
    pooled = gpu3d.bucket_pool(at[2], at[2], at[0], ratio=4)
    return gpu3d.bucket_unpool(child, pooled, skip), pooled


def _child_slots(at: Any) -> int:
    size = at[0].bucket_size
    return sum(-(-n // (4 * size)) * size for n in at[0].lengths)


def _attend(at: Any, q: Any, k: Any, v: Any) -> Any:
    both = gpu3d.bucket_attention(q, k, v, *at[:2], scale=0.3, return_lse=True)
    return both[0], both


def _attend_backward(at: Any, dout: Any, both: Any, q: Any, k: Any, v: Any) -> Any:
    return gpu3d.bucket_attention_backward(dout, q, k, v, *both, *at[:2], scale=0.3)


def _loss(name: str, **options: Any) -> Case:
    lengths = ("pred_lengths", "target_lengths") if name == "apml" else ("x_lengths", "y_lengths")

    def clouds_of(at: Any, x: Any) -> dict[str, Any]:
        """The lengths above, or those of the layout if it has many clouds."""
        many = len(at[0].lengths) > 64
        return dict(zip(lengths, (at[0].lengths,) * 2 if many else (X_LENGTHS, Y_LENGTHS), strict=True))

    def forward(at: Any, x: Any, y: Any) -> Any:
        loss = getattr(gpu3d, name)(x, y, **clouds_of(at, x), **options)
        return loss, None

    def backward(at: Any, dout: Any, whole: Any, x: Any, y: Any) -> Any:
        _, gradients = getattr(gpu3d, f"{name}_value_and_grad")(x, y, **clouds_of(at, x), **options)
        return [scaled(z, dout, n) for z, n in zip(gradients, clouds_of(at, x).values(), strict=True)]

    def scaled(z: Any, dout: Any, n: Sequence[int]) -> Any:
        """The gradient times the gradient of the loss, computed in the loss's dtype."""
        factor = (
            tensor(dout).repeat_interleave(torch.tensor(n, device=tensor(dout).device)) if dout.ndim else tensor(dout)
        )
        return (tensor(z).to(factor.dtype) * factor.reshape(-1, 1)).to(tensor(z).dtype)

    def shapes(at: Any) -> Any:
        if len(at[0].lengths) > 64:
            return [(sum(at[0].lengths), 3)] * 2
        return [(sum(X_LENGTHS), 3), (sum(Y_LENGTHS), 3)]

    return Case(shapes, forward, backward)


def _points(direction: str, **options: Any) -> Case:
    """The distances of the points of one side of chamfer."""

    def forward(at: Any, x: Any, y: Any) -> Any:
        lengths = dict(zip(("x_lengths", "y_lengths"), _clouds_of_search(at), strict=True))
        found = gpu3d.chamfer(x, y, reduction="points", direction=direction, **options, **lengths)
        return (found.x if found.y is None else found.y), None

    def backward(at: Any, dout: Any, whole: Any, x: Any, y: Any) -> Any:
        checked = *map(tuple, _clouds_of_search(at)), options.get("squared", False), direction
        saved = points_arrays(*[_arrays.read(z, "an array") for z in (x, y)], *checked)
        arrays = [_arrays.read(z, "an array") for z in (dout, x, y, *saved)]
        return points_backward_arrays(*arrays, *checked)

    return Case(lambda at: [(sum(n), 3) for n in _clouds_of_search(at)], forward, backward)


def _clouds_of_search(at: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The lengths of queries and points: those of the layout where it is one of many clouds."""
    return (at[0].lengths,) * 2 if len(at[0].lengths) > 64 else (X_LENGTHS, Y_LENGTHS)


def _search(name: str, **options: Any) -> Case:
    """knn or radius_search: the distances and their gradients."""
    backward_arrays = {"knn": neighbors.knn_backward_arrays, "radius_search": neighbors.radius_backward_arrays}[name]

    def forward(at: Any, x: Any, y: Any) -> Any:
        lengths = dict(zip(("query_lengths", "lengths"), _clouds_of_search(at), strict=True))
        given = {key: value(at) if callable(value) else value for key, value in options.items()}
        found = getattr(gpu3d, name)(x, y, **given, **lengths)
        return found.distances, found

    def backward(at: Any, dout: Any, found: Any, x: Any, y: Any) -> Any:
        arrays = [_arrays.read(z, "an array") for z in (dout, x, y, *found)]
        return backward_arrays(*arrays)

    return Case(lambda at: [(sum(n), 3) for n in _clouds_of_search(at)], forward, backward)


def inputs_of(case: Case, at: Any, dtype: Any = torch.float32) -> list[torch.Tensor]:
    """Inputs that require grad. Those in slot order have NaN in padding."""
    device = at[0].slot_to_point.device
    made = []
    for seed, shape in enumerate(case.shapes(at)):
        x = normal(*shape, dtype=dtype, seed=seed, device=device).detach()
        if case.padded and shape[0] == at[0].num_slots:
            x[at[0].slot_to_point < 0] = torch.nan
        made.append(x.requires_grad_())
    return made


def gradient_of(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Powers of two, so that products are exact; only 1 if gradients of float16 inputs would be rounded twice."""
    rounded = dtype == torch.float16 and result.dtype != dtype
    factors = np.random.default_rng(9).choice([1] if rounded else [4, 2, -0.5, 1, -1], size=tuple(result.shape))
    return torch.from_numpy(np.asarray(factors)).to(result)


def run(case: Case, at: Any, inputs: Sequence[torch.Tensor], dout: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The result and its gradients, for the result's gradient `dout` or that of `gradient_of`."""
    result, _ = case.forward(at, *inputs)
    dout = gradient_of(result, inputs[0].dtype) if dout is None else dout
    return [result, *torch.autograd.grad(result, inputs, dout)]


def expected(case: Case, at: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same from plain calls on arrays of another library."""
    at, arrays = native(at), [native(x) for x in inputs]
    result, whole = case.forward(at, *arrays)
    dout = gradient_of(tensor(result), inputs[0].dtype)
    gradients = case.backward(at, native(dout), whole, *arrays)
    return [tensor(x) for x in (result, *gradients)]


def assert_same(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    """The same bits, which are not all zero."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        assert torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
        assert torch.equal(a.isnan(), b.isnan()) and (a.numel() < 2 or bool((a != 0).any()))


CASES = {
    "scatter": Case(
        lambda at: [(sum(at[0].lengths), 5)],
        lambda at, x: (at[0].scatter(x, 7.5), None),
        lambda at, dout, whole, x: (at[0].gather(dout),),
        twice=True,
    ),
    "gather": Case(
        lambda at: [(at[0].num_slots, 2, 3)],
        lambda at, y: (at[0].gather(y), None),
        lambda at, dout, whole, y: (at[0].scatter(dout),),
        padded=True,
        twice=True,
    ),
    "bucket_attention": Case(lambda at: [(at[0].num_slots, 2, 8)] * 3, _attend, _attend_backward, padded=True),
    "bucket_pool-mean": _pool("mean", 2),
    "bucket_pool-max": _pool("max", 4),
    "bucket_unpool": Case(
        lambda at: [(_child_slots(at), 5), (at[0].num_slots, 5)],
        _unpool,
        lambda at, dout, pooled, child, skip: gpu3d.bucket_unpool_backward(dout, pooled),
        padded=True,
    ),
    "knn": _search("knn", k=lambda at: min(5, *_clouds_of_search(at)[1])),
    "radius_search": _search("radius_search", radius=1.0, max_entries=20_000),
    "chamfer": _loss("chamfer"),
    "chamfer-none": _loss("chamfer", reduction="none", squared=True),
    "chamfer-one": _loss("chamfer", reduction="sum", direction="y_to_x"),
    "chamfer_points": _points("x_to_y"),
    "chamfer_points-squared": _points("y_to_x", squared=True),
    "apml": _loss("apml", max_entries=50_000),
    "apml-none": _loss("apml", reduction="none", symmetrize="min", max_entries=50_000),
}


def samples(device: str = "cpu") -> Any:
    """Arguments of every operator."""
    ops = torch.ops.gpu3d
    at = place(device=device)
    buckets, scopes, coordinates = at
    shape = 16, LENGTHS
    wide = torch.float64 if device == "cpu" else torch.float32  # attention is float32 at most on a GPU
    numbers = functools.partial(normal, device=device)
    q, k, v = (x.detach() for x in inputs_of(CASES["bucket_attention"], at, wide))
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    window = scopes.table, *shape, None
    yield ops.bucketize, points(device=device), *shape, "zorder_div", "spill", 0.01, False, 0, False, None, None
    yield ops.scopes, buckets.slot_to_point, *shape, 2, 1, 3
    yield ops.move_rows, numbers(POINTS, 5), buckets.slot_to_point, buckets.point_to_slot, 0, "x"
    yield ops.bucket_attention, *(z.clone().requires_grad_() for z in (q, k, v)), *window
    yield ops.bucket_attention_backward, q.flip(1), q, k, v, out, lse, *window
    for reduce in ("mean", "max"):
        (features,) = inputs_of(CASES["bucket_pool-max"], at)
        args = features, coordinates, *shape, 2, reduce
        child, _, members, argmember, *_ = ops.bucket_pool(*args)
        child = child.detach().requires_grad_()
        yield ops.bucket_pool, *args
        yield ops.bucket_pool_backward, child.detach(), members, argmember, *shape, 2, reduce
    for skip in (None, features):
        yield ops.bucket_unpool, child, members, skip, *shape, 2
    yield ops.bucket_unpool_backward, features.detach(), members, *shape, 2
    x, y, lengths = numbers(40, 3), numbers(30, 3, seed=1), ((30, 10), (10, 20))
    for reduction in ("mean", "none"):
        yield ops.chamfer, x, y, *lengths, False, reduction, "both", "error"
        loss, residuals = ops.chamfer(x.detach(), y.detach(), *lengths, True, reduction, "y_to_x", "zero")
        saved = torch.rand(loss.shape, device=device), x.detach(), y.detach(), residuals
        yield ops.chamfer_backward, *saved, *lengths, True, reduction, "y_to_x"
    yield ops.chamfer, x.detach(), y.detach(), *lengths, True, "sum", "x_to_y", "error"
    for direction in ("both", "x_to_y"):
        yield ops.chamfer_points, x, y, *lengths, True, direction, "error"
        distances, nearest = ops.chamfer_points(x.detach(), y.detach(), *lengths, False, direction, "error")
        saved = distances.flip(0), x.detach(), y.detach(), distances, nearest
        yield ops.chamfer_points_backward, *saved, *lengths, False, direction
    yield ops.compare_clouds, x.detach(), y.detach(), *lengths, [0.1, 0.5]
    yield ops.compare_clouds, x.detach(), y.detach(), *lengths, []
    yield ops.apml, x, y, *lengths, 0.8, 1e-8, 20, "mean", "none", 5000, True
    yield ops.apml, x.detach(), y.detach(), *lengths, 0.8, 1e-8, 20, "min", "sum", None, False
    _, dx, dy = ops.apml(x, y, *lengths, 0.8, 1e-8, 20, "mean", "none", 5000, True)
    yield ops.apml_backward, torch.rand(2, device=device), dx, dy, x.detach(), y.detach(), *lengths
    yield ops.emd, x, y.detach()[:40].repeat(2, 1)[:40], (30, 10), (30, 10), "none"
    yield ops.normals, x.detach(), lengths[0], 8, None
    yield ops.normals, x.detach(), lengths[0], 3, [0.0, 0.5, -2.0]
    yield ops.knn, x, y, None, *lengths, 3, math.inf, False
    yield ops.knn, x, x, torch.rand(40, device=device), *lengths[:1] * 2, 40, math.inf, True
    distances, indices = ops.knn(x.detach(), y.detach(), None, *lengths, 3, math.inf, False)
    yield ops.knn_backward, distances.flip(0), x.detach(), y.detach(), distances, indices, *lengths
    offsets, indices, distances = ops.radius_search(x.detach(), y.detach(), None, *lengths, 0.5, None, False)
    # No gradient here, since opcheck would add the distances to the sum of the offsets, in place.
    yield ops.radius_search, x.detach(), y.detach(), None, *lengths, 0.5, len(indices), False
    within = x.detach(), x.detach(), torch.rand(40, device=device), *lengths[:1] * 2, math.inf
    yield ops.radius_search, *within, len(ops.radius_search(*within, None, True)[1]), True
    found = offsets, indices, distances
    yield ops.radius_search_backward, distances.flip(0), x.detach(), y.detach(), *found, *lengths
    yield ops.farthest_points, x.detach(), lengths[0], 5, 1
