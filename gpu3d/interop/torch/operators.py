# SPDX-License-Identifier: Apache-2.0
"""The registered operators `torch.ops.gpu3d.*`, their gradients, and `run`, with which the functions call them.

An operator takes tensors first, then numbers. Its kernel reads the tensors, checks all arguments, and calls the op
module's `*_arrays`. So it launches the plan of a plain call, on torch's current stream, with results and workspace in
torch's memory. On a GPU the operators of a training step keep what they launch (`call_of`): for tensors alike and the
same numbers, checks and plans would be the same. An operator is registered in three ways, which differ in how lengths
and gradients go in:

- `gpu3d::chamfer`: lengths are `SymInt[]`, and torch.library knows the gradient. It is for torch.compile, torch.export,
  and programs that call the operator itself.
- `gpu3d::chamfer.eager`: lengths are int64 tensors on the CPU, because torch spends 0.2 us on every integer of a list.
  It has no gradient; the torch.autograd.Function around it has one. A gradient of torch.library would cost 5 us per
  call, and does not work with the transforms of torch.func.
- `gpu3d::chamfer_traced`: lengths are `int[]`. It is for torch.jit.trace, which cannot record `SymInt[]`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from gpu3d import _arrays, attention, metrics, neighbors, pooling, sampling, surface, transport
from gpu3d import buckets as layouts
from gpu3d._arrays import Spec
from gpu3d.chamfer import (  # a from-import, because gpu3d.chamfer is the function
    chamfer_arrays,
    chamfer_backward_arrays,
    chamfer_backward_call,
    chamfer_backward_results,
    chamfer_call,
    chamfer_results,
    check_chamfer,
    check_chamfer_backward,
    check_points,
    check_points_backward,
    points_arrays,
    points_backward_arrays,
    points_results,
)
from gpu3d.cuda import clouds, launcher

NO_FORWARD_MODE = (
    "gpu3d has no forward-mode derivatives, and an argument of {} has a tangent (torch.func.jvp, jacfwd, or a dual "
    "tensor). Use reverse mode: torch.func.vjp, jacrev, or backward."
)

_LIBRARY = torch.library.Library("gpu3d", "DEF")


class Operator:
    """An operator, and the torch.autograd.Function around it.

    Parameters
    ----------
    schema : str
        A schema for torch.library, with tensors first.
    kernel : callable
        A function of the tensors, as `Given`, and of the numbers. It returns the results as a list of tensors.
    results : callable
        A function of the tensors, as `Spec`, and of the numbers. It returns the specs of the results. Sizes and lengths
        may be symbols.
    call_of : callable, optional
        For tensors on a GPU: a function like `kernel` that checks all arguments and launches nothing. It returns the
        `Call` and the specs of its results, and None if they must not be kept.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        results: Callable[..., Any],
        call_of: Callable[..., Any] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.tensors = re.findall(r"Tensor\?? (\w+)", schema.partition("->")[0])
        self.single = schema.endswith("-> Tensor")
        self.kernel, self.results = kernel, results
        self.call_of = call_of
        self.kept_call = functools.lru_cache(maxsize=256)(self._checked_call)
        # The apply of two torch.autograd.Functions. The transforms of torch.func need one whose setup_context is apart
        # from its forward. torch binds that one's arguments to its signature, which takes 5 us per call.
        self.apply: Callable[..., Any] | None = None
        self.apply_apart: Callable[..., Any] | None = None
        self.may_be_dual: int | None = None  # how many of the first tensors may have tangents; None means all
        self.cast: tuple[int, Callable[[str], torch.dtype]] | None = None  # see `autocast`
        numbers = schema[: schema.index(")")].split(", ")[len(self.tensors) :]
        self.lengths = [i for i, text in enumerate(numbers) if "SymInt[]" in text]  # which numbers are lengths
        self.default = self._register(schema)
        self.eager = self._register(schema.replace("SymInt[]", "Tensor").replace("(", ".eager(", 1))
        self.traced = self.default
        if self.lengths and "_backward" not in self.name:  # in traced programs, gradients call the default overload
            self.traced = self._register(schema.replace("SymInt[]", "int[]").replace("(", "_traced(", 1))

    def _register(self, schema: str) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._run, key)
        torch.library.register_fake(f"gpu3d::{name}", self._fake, lib=_LIBRARY)
        torch.library.register_vmap(f"gpu3d::{name}", self._vmap, lib=_LIBRARY)
        packet, _, overload = name.partition(".")
        return getattr(getattr(torch.ops.gpu3d, packet), overload or "default")

    def _numbers(self, args: Sequence[Any]) -> list[Any]:
        """The arguments after the tensors, with lengths as tuples."""
        numbers = list(args[len(self.tensors) :])
        for i in self.lengths:
            numbers[i] = tuple(numbers[i].tolist() if isinstance(numbers[i], torch.Tensor) else numbers[i])
        return numbers

    def _run(self, *args: Any) -> Any:
        """Run the kernel: the reference on the CPU, a plan on a GPU."""
        tensors = args[: len(self.tensors)]
        if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors]):
            raise RuntimeError(f"this overload of {self.name} has no gradient: pass lengths as integers.")
        numbers = self._numbers(args)
        results = self._run_kept(tensors, numbers)
        if results is None:
            given = [
                None if x is None else _arrays.read_dense(x, name)
                for x, name in zip(tensors, self.tensors, strict=True)
            ]
            results = self.kernel(*given, *numbers)
        return results[0] if self.single else tuple(results)

    def _checked_call(self, alike: Sequence[tuple[Any, ...]], *numbers: Any) -> Any:
        """What `call_of` returns for tensors that are described as in `_run_kept`."""
        given = [_arrays.tensor_alike(name, *x) for name, x in zip(self.tensors, alike, strict=True)]
        return self.call_of(*given, *numbers)  # type: ignore[misc]

    def _run_kept(self, tensors: Sequence[Any], numbers: Sequence[Any]) -> list[Any] | None:
        """Launch what is kept for tensors alike and the same numbers, or return None."""
        device = tensors[0].get_device()
        if self.call_of is None or device < 0 or len(numbers[self.lengths[0]]) > clouds.INLINE_CLOUDS:
            return None
        alike, addresses = [], []
        for x in tensors:
            address = x.data_ptr()
            strides = None if x.is_contiguous() else x.stride()
            alike.append((x.shape, x.dtype, strides, address % 16, x.get_device()))
            addresses.append(address)
        kept = self.kept_call(tuple(alike), *numbers)
        if kept is None:
            return None
        call, specs = kept
        return launcher.launch_at(call, addresses[: call.plan.inputs], specs, _arrays.torch_origin(device))

    def _fake(self, *args: Any) -> Any:
        """The results without values, for fake tensors."""
        tensors = args[: len(self.tensors)]
        specs = [None if x is None else Spec(tuple(x.shape), _arrays.numpy_dtype(x.dtype)) for x in tensors]
        made = [
            tensors[0].new_empty(spec.shape, dtype=_arrays.torch_dtype(spec.dtype))
            for spec in self.results(*specs, *self._numbers(args))
        ]
        return made[0] if self.single else tuple(made)

    def _vmap(self, info: Any, in_dims: Any, *args: Any) -> Any:
        """Under vmap, make one call for each element of the batch."""
        count = len(self.tensors)
        rows = []
        for i in range(info.batch_size):
            tensors = [
                x if dim is None else x.select(dim, i) for x, dim in zip(args[:count], in_dims[:count], strict=True)
            ]
            rows.append(self.call(tensors, args[count:]))
        if self.single:
            return torch.stack(rows), 0
        results = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return tuple(results), (0,) * len(results)

    def autocast(self, count: int, dtype: Callable[[str], torch.dtype]) -> None:
        """Register that autocast casts the first `count` tensors to the dtype for a device type. float64 stays."""
        self.cast = count, dtype

    def differentiate(self, save: Callable[..., Any], backward: Callable[..., Any], result: int = 0) -> None:
        """Register the gradient of one result. The other results are not differentiable.

        Parameters
        ----------
        save : callable
            A function of the operator's tensors and of its results. It returns the tensors that the gradient needs.
        backward : callable
            A function of the result's gradient, of the saved tensors and of the numbers. It returns the gradients of
            the first tensors, or None for a tensor that has no gradient.
        result : int
            The differentiable result.
        """
        count = len(self.tensors)

        def remember(ctx: Any, tensors: Sequence[Any], numbers: Sequence[Any], output: Any) -> None:
            # Otherwise torch fills zeros for every other result. But torch 2.6 needs them under vmap.
            ctx.set_materialize_grads(_is_of_torch_func(tensors[0]))
            if not self.single:
                ctx.mark_non_differentiable(*output[:result], *output[result + 1 :])
            ctx.save_for_backward(*save(tensors, (output,) if self.single else output))
            ctx.numbers = numbers

        def gradients(ctx: Any, given: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
            if given[result] is None:
                return [None] * count
            found = backward(given[result], ctx.saved_tensors, ctx.numbers)
            found = [x if asked else None for x, asked in zip(found, needed, strict=False)]
            return [*found, *[None] * (count - len(found))]

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            remember(ctx, inputs[:count], tuple(inputs[count:]), output)

        def backward_of_arguments(ctx: Any, *given: Any) -> Any:
            return *gradients(ctx, given, ctx.needs_input_grad), *[None] * len(ctx.numbers)

        def remember_for_function(ctx: Any, numbers: Any, tensors: Any, output: Any) -> None:
            remember(ctx, tensors, numbers, output)

        def backward_of_function(ctx: Any, *given: Any) -> Any:
            return None, *gradients(ctx, given, ctx.needs_input_grad[1:])

        self._autograd(setup_context, backward_of_arguments, remember_for_function, backward_of_function)

    def refuse_second_derivative(self) -> None:
        """For an operator that is a gradient: raise an error for its own gradient, which torch would take for zero."""
        # Its first tensor is the gradient of a result. The others are saved ones of a forward, which refused tangents.
        self.may_be_dual = 1

        def nothing(ctx: Any, *given: Any) -> None:
            pass

        def backward(ctx: Any, *given: Any) -> None:
            raise RuntimeError(
                f"gpu3d has no second derivatives: torch asked for the gradient of {self.name}, which is one already. "
                "Call backward or torch.autograd.grad without create_graph."
            )

        self._autograd(lambda ctx, inputs, output: None, backward, nothing, backward)

    def _autograd(self, setup_context: Any, backward: Any, remember: Any, backward_of_function: Any) -> None:
        for overload in {self.default, self.traced}:
            name = overload.name().removesuffix(".default")
            torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)

        def forward(ctx: Any, numbers: tuple[Any, ...], *tensors: Any) -> Any:
            output = self.call(tensors, numbers)
            remember(ctx, numbers, tensors, output)
            return output

        def jvp(ctx: Any, *tangents: Any) -> None:
            raise NotImplementedError(NO_FORWARD_MODE.format(self.name))

        def forward_apart(numbers: tuple[Any, ...], *tensors: Any) -> Any:
            return self.call(tensors, numbers)

        def setup_apart(ctx: Any, inputs: Any, output: Any) -> None:
            remember(ctx, inputs[0], inputs[1:], output)

        forward_apart.__signature__ = inspect.signature(forward_apart)  # type: ignore[attr-defined]  # or at every call
        common = {"backward": staticmethod(backward_of_function), "jvp": staticmethod(jvp)}
        plain = {**common, "forward": staticmethod(forward)}
        apart = {
            **common,
            "generate_vmap_rule": True,
            "forward": staticmethod(forward_apart),
            "setup_context": staticmethod(setup_apart),
        }
        bases = (torch.autograd.Function,)
        self.apply = type(self.name, bases, plain).apply  # type: ignore[attr-defined]
        self.apply_apart = type(self.name, bases, apart).apply  # type: ignore[attr-defined]

    def call(self, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
        """Call the operator outside of torch.compile, with the overload that takes lengths of this type."""
        if self.lengths and not isinstance(numbers[self.lengths[0]], torch.Tensor):
            return self.default(*tensors, *numbers)
        return self.eager(*tensors, *numbers)

    def with_tensors(self, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        """The numbers with lengths as the `eager` overload takes them."""
        made = list(numbers)
        for i in self.lengths:
            if isinstance(numbers[i], tuple):  # a list comes from a gradient of the default overload
                made[i] = torch.from_numpy(_array(numbers[i]))
                if type(made[i]) is not torch.Tensor:  # under a mode without values, such as FakeTensorMode
                    return numbers
        return tuple(made)


@clouds.remembered
def _array(lengths: tuple[int, ...]) -> np.ndarray:
    return _arrays.int64_array(lengths).copy()  # torch warns about memory that is not writable


def run(op: Operator, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
    """Call an operator so that torch's transforms work or raise an error: gradients, autocast, forward mode."""
    if op.cast is not None and torch.is_autocast_enabled(device := "cuda" if tensors[0].is_cuda else "cpu"):
        count, dtype = op.cast[0], op.cast[1](device)
        cast = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors[:count]]
        tensors = (*cast, *tensors[count:])
    if torch.compiler.is_compiling():
        _refuse_tangents(op, tensors)
        return op.default(*tensors, *numbers)
    if torch.jit.is_tracing():
        _refuse_tangents(op, tensors)
        return op.traced(*tensors, *[[int(n) for n in x] if isinstance(x, tuple) else x for x in numbers])
    numbers = op.with_tensors(numbers)
    if op.apply is not None and torch.is_grad_enabled():
        if any(map(_is_of_torch_func, tensors)):  # around a tensor that may require grad
            return op.apply_apart(numbers, *tensors)  # type: ignore[misc]
        if any([x is not None and x.requires_grad for x in tensors]):
            return op.apply(numbers, *tensors)
    _refuse_tangents(op, tensors)
    return op.call(tensors, numbers)


def _refuse_tangents(op: Operator, tensors: Sequence[Any]) -> None:
    for x in tensors[: op.may_be_dual]:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(NO_FORWARD_MODE.format(op.name))


def may_need_gradient(x: torch.Tensor) -> bool:
    """Whether x requires grad, or is a wrapper of torch.func, around which another tensor may require it."""
    return x.requires_grad or (not torch.compiler.is_compiling() and _is_of_torch_func(x))


def _is_of_torch_func(x: torch.Tensor | None) -> bool:
    """Whether x is a wrapper that the transforms of torch.func pass to a function. Wrappers have no memory."""
    if x is None:
        return False
    try:
        x.untyped_storage()
    except NotImplementedError:
        return True
    return False


# ---- buckets -------------------------------------------------------------------------------------------------------


def _bucketize(
    points: Any,
    bucket_size: int,
    lengths: tuple[int, ...],
    hash: str,
    balance: str,
    voxel_size: float | None,
    per_axis: bool,
    seed: int,
    robust: bool,
    ends: Sequence[float] | None,
    check_finite: bool | None,
) -> list[Any]:
    voxel = "per_axis" if per_axis else voxel_size
    bounds = "robust" if robust else (ends[:3], ends[3:]) if ends else None
    checked = layouts.check_bucketize(points, bucket_size, lengths, hash, balance, voxel, seed, bounds)
    return layouts.bucketize_arrays(points, checked, check_finite)


BUCKETIZE = Operator(
    "bucketize(Tensor points, int bucket_size, SymInt[] lengths, str hash, str balance, float? voxel_size, "
    "bool per_axis, int seed, bool robust, float[]? ends, bool? check_finite) -> (Tensor, Tensor, Tensor)",
    _bucketize,
    lambda points, bucket_size, lengths, *options: layouts.bucketize_results(lengths, bucket_size, points.shape[0]),
)


def _scopes(slot_to_point: Any, bucket_size: int, lengths: tuple[int, ...], *options: int) -> list[Any]:
    layout = layouts.checked_layout(lengths, bucket_size)
    return [layouts.scope_table(slot_to_point.origin, layout, *layouts.check_scopes(*options))]


def _scopes_results(
    slot_to_point: Spec, bucket_size: int, lengths: tuple[Any, ...], size: int, shift: int, stride: int
) -> list[Spec]:
    counts = [(n + bucket_size - 1) // bucket_size for n in lengths]
    return [Spec((layouts.num_scopes(counts, size, stride), size), _arrays.INT32)]


SCOPES = Operator(
    "scopes(Tensor slot_to_point, int bucket_size, SymInt[] lengths, int size, int shift, int stride) -> Tensor",
    _scopes,
    _scopes_results,
)


def _move_rows(x: Any, index: Any, inverse: Any, fill: Any, name: str) -> list[Any]:
    """Rows x[index], with `fill` where the index is -1. `inverse` is the place that each row of x moves to, or -1."""
    if index.dtype != _arrays.INT32 or index.ndim != 1:
        raise TypeError(f"index must be int32 [n], got {index.dtype} {list(index.shape)}: pass arrays of Buckets.")
    return [layouts.move(x, name, index, inverse.shape[0], fill)]


def _move_backward(dout: torch.Tensor, saved: Any, numbers: Any) -> Any:
    index, inverse = saved  # every row moves to one place, so the gradient is a move too
    return (run(MOVE_ROWS, (dout, inverse, index), (0, f"d{numbers[-1]}")),)


MOVE_ROWS = Operator(
    "move_rows(Tensor x, Tensor index, Tensor inverse, Scalar fill, str name) -> Tensor",
    _move_rows,
    lambda x, index, *rest: [Spec((index.shape[0], *x.shape[1:]), x.dtype)],
)
MOVE_ROWS.differentiate(lambda tensors, outputs: tensors[1:], _move_backward)


# ---- attention -----------------------------------------------------------------------------------------------------


def _check_attention(
    q: Any, k: Any, v: Any, table: Any, bucket_size: int, lengths: tuple[int, ...], scale: Any
) -> tuple[Any, ...]:
    slots = layouts.checked_layout(lengths, bucket_size).num_slots
    scale = attention.check_attention(q, k, v, table, slots, None, scale)
    return q, k, v, table, lengths, bucket_size, scale, True  # the gradient needs lse


def _check_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    table: Any,
    bucket_size: int,
    lengths: tuple[int, ...],
    scale: Any,
) -> tuple[Any, ...]:
    given = dout, q, k, v, out, lse, table
    slots = layouts.checked_layout(lengths, bucket_size).num_slots
    scale = attention.check_attention_backward(*given, slots, None, scale)
    return *given, lengths, bucket_size, scale


def _unless_zero(call_of: Callable[..., Any]) -> Callable[..., Any]:
    """The calls of attention that are kept. As keys scales of 0.0 and -0.0 were the same."""
    return lambda *args: None if args[-1] == 0 else call_of(*args)


ATTENTION = Operator(
    "bucket_attention(Tensor q, Tensor k, Tensor v, Tensor table, int bucket_size, SymInt[] lengths, float? scale) "
    "-> (Tensor, Tensor)",
    lambda *args: attention.attention_arrays(*_check_attention(*args)),
    lambda q, *rest: attention.attention_results(q),
    _unless_zero(lambda *args: attention.attention_call(*_check_attention(*args))),
)
ATTENTION_BACKWARD = Operator(
    "bucket_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor table, "
    "int bucket_size, SymInt[] lengths, float? scale) -> (Tensor, Tensor, Tensor)",
    lambda *args: attention.attention_backward_arrays(*_check_attention_backward(*args)),
    lambda dout, q, *rest: attention.attention_backward_results(q),
    _unless_zero(lambda *args: attention.attention_backward_call(*_check_attention_backward(*args))),
)
ATTENTION_BACKWARD.refuse_second_derivative()


def _save_attention(tensors: Any, results: Any) -> Any:
    q, k, v, table = tensors
    return q, k, v, *results, table


ATTENTION.differentiate(_save_attention, lambda dout, saved, numbers: run(ATTENTION_BACKWARD, (dout, *saved), numbers))
ATTENTION.autocast(3, torch.get_autocast_dtype)


# ---- pooling -------------------------------------------------------------------------------------------------------


def _check_pool(
    features: Any, points: Any, bucket_size: int, lengths: tuple[int, ...], ratio: int, reduce: str
) -> tuple[Any, ...]:
    layouts.checked_layout(lengths, bucket_size)
    pooling.check_pool(features, points, lengths, bucket_size, ratio, reduce)
    return features, points, lengths, bucket_size, ratio, reduce


def _check_pool_backward(
    dchild: Any, members: Any, argmember: Any, bucket_size: int, lengths: tuple[int, ...], ratio: int, reduce: str
) -> tuple[Any, ...]:
    layouts.checked_layout(lengths, bucket_size)
    pooling.check_pool_backward(dchild, dchild, lengths, bucket_size, ratio)
    return dchild, members, argmember, lengths, bucket_size, ratio, reduce


POOL = Operator(
    "bucket_pool(Tensor features, Tensor points, int bucket_size, SymInt[] lengths, int ratio, str reduce) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: pooling.pool_arrays(*_check_pool(*args)),
    lambda features, points, bucket_size, lengths, *options: pooling.pool_results(
        features, points, lengths, bucket_size, *options
    ),
    lambda *args: pooling.pool_call(*_check_pool(*args)),
)
POOL_BACKWARD = Operator(
    "bucket_pool_backward(Tensor dchild, Tensor members, Tensor argmember, int bucket_size, SymInt[] lengths, "
    "int ratio, str reduce) -> Tensor",
    lambda *args: pooling.pool_backward_arrays(*_check_pool_backward(*args)),
    lambda dchild, members, argmember, bucket_size, lengths, *options: pooling.pool_backward_results(
        dchild, lengths, bucket_size
    ),
    lambda *args: pooling.pool_backward_call(*_check_pool_backward(*args)),
)
POOL_BACKWARD.refuse_second_derivative()
POOL.differentiate(
    lambda tensors, results: results[2:4],  # members and argmember
    lambda dchild, saved, numbers: (run(POOL_BACKWARD, (dchild, *saved), numbers),),
)


def _unpool(child: Any, members: Any, skip: Any, bucket_size: int, lengths: tuple[int, ...], ratio: int) -> list[Any]:
    layouts.checked_layout(lengths, bucket_size)
    pooling.check_unpool(child, skip, lengths, bucket_size, ratio)
    return pooling.unpool_arrays(child, members, skip, lengths, bucket_size, ratio)


def _unpool_backward(dout: Any, members: Any, bucket_size: int, lengths: tuple[int, ...], ratio: int) -> list[Any]:
    layouts.checked_layout(lengths, bucket_size)
    pooling.check_unpool_backward(dout, lengths, bucket_size)
    return pooling.unpool_backward_arrays(dout, members, lengths, bucket_size, ratio)


UNPOOL = Operator(
    "bucket_unpool(Tensor child, Tensor members, Tensor? skip, int bucket_size, SymInt[] lengths, int ratio) -> Tensor",
    _unpool,
    lambda child, members, skip, bucket_size, lengths, ratio: pooling.unpool_results(child, lengths, bucket_size),
)
UNPOOL_BACKWARD = Operator(
    "bucket_unpool_backward(Tensor dout, Tensor members, int bucket_size, SymInt[] lengths, int ratio) "
    "-> (Tensor, Tensor)",
    _unpool_backward,
    lambda dout, members, bucket_size, lengths, ratio: pooling.unpool_backward_results(
        dout, lengths, bucket_size, ratio
    ),
)
UNPOOL_BACKWARD.refuse_second_derivative()


def _backward_of_unpool(dout: torch.Tensor, saved: Any, numbers: Any) -> Any:
    dchild, dskip = run(UNPOOL_BACKWARD, (dout, *saved), numbers)
    return dchild, None, dskip


UNPOOL.differentiate(lambda tensors, results: tensors[1:2], _backward_of_unpool)


# ---- neighbours ----------------------------------------------------------------------------------------------------


def _knn(
    query: Any,
    points: Any,
    radii: Any,
    query_lengths: tuple[int, ...],
    lengths: tuple[int, ...],
    k: int,
    radius: float,
    exclude_self: bool,
) -> list[Any]:
    """`knn`, whose radius is inf, and `radius_search` with max_neighbors."""
    options = k, query_lengths, lengths, exclude_self, radius if radii is None else radii
    return neighbors.knn_arrays(query, points, radii, neighbors.check_knn(query, points, *options))


KNN = Operator(
    "knn(Tensor query, Tensor points, Tensor? radii, SymInt[] query_lengths, SymInt[] lengths, int k, float radius, "
    "bool exclude_self) -> (Tensor, Tensor)",
    _knn,
    lambda query, points, radii, query_lengths, lengths, k, *rest: neighbors.knn_results(
        query.shape[0], k, neighbors.distance_dtype(query, points)
    ),
)


def _knn_backward(ddistances: Any, query: Any, points: Any, distances: Any, indices: Any, *lengths: Any) -> list[Any]:
    given = ddistances, query, points, distances, indices
    neighbors.check_knn_backward(*given, *lengths)
    return neighbors.knn_backward_arrays(*given)


KNN_BACKWARD = Operator(
    "knn_backward(Tensor ddistances, Tensor query, Tensor points, Tensor distances, Tensor indices, "
    "SymInt[] query_lengths, SymInt[] lengths) -> (Tensor, Tensor)",
    _knn_backward,
    lambda ddistances, query, points, *rest: neighbors.backward_results(query, points),
)
KNN_BACKWARD.refuse_second_derivative()
KNN.differentiate(
    lambda tensors, results: (*tensors[:2], *results),
    lambda ddistances, saved, numbers: run(KNN_BACKWARD, (ddistances, *saved), numbers[:2]),
)
KNN.autocast(2, lambda device: torch.float32)


def _radius_search(
    query: Any,
    points: Any,
    radii: Any,
    query_lengths: tuple[int, ...],
    lengths: tuple[int, ...],
    radius: float,
    max_entries: int | None,
    exclude_self: bool,
) -> list[Any]:
    options = radius if radii is None else radii, query_lengths, lengths, max_entries, exclude_self
    return neighbors.radius_arrays(query, points, radii, neighbors.check_radius(query, points, *options))


def _radius_results(query: Spec, points: Spec, *rest: Any) -> Any:
    max_entries = rest[-2]
    entries = torch.library.get_ctx().new_dynamic_size() if max_entries is None else max_entries
    return neighbors.radius_results(query.shape[0], entries, neighbors.distance_dtype(query, points))


RADIUS_SEARCH = Operator(
    "radius_search(Tensor query, Tensor points, Tensor? radii, SymInt[] query_lengths, SymInt[] lengths, float radius, "
    "SymInt? max_entries, bool exclude_self) -> (Tensor, Tensor, Tensor)",
    _radius_search,
    _radius_results,
)


def _radius_backward(
    ddistances: Any, query: Any, points: Any, offsets: Any, indices: Any, distances: Any, *lengths: Any
) -> list[Any]:
    given = ddistances, query, points, offsets, indices, distances
    neighbors.check_radius_backward(*given, *lengths)
    return neighbors.radius_backward_arrays(*given)


RADIUS_SEARCH_BACKWARD = Operator(
    "radius_search_backward(Tensor ddistances, Tensor query, Tensor points, Tensor offsets, Tensor indices, "
    "Tensor distances, SymInt[] query_lengths, SymInt[] lengths) -> (Tensor, Tensor)",
    _radius_backward,
    lambda ddistances, query, points, *rest: neighbors.backward_results(query, points),
)
RADIUS_SEARCH_BACKWARD.refuse_second_derivative()
RADIUS_SEARCH.differentiate(
    lambda tensors, results: (*tensors[:2], *results),
    lambda ddistances, saved, numbers: run(RADIUS_SEARCH_BACKWARD, (ddistances, *saved), numbers[:2]),
    result=2,
)
RADIUS_SEARCH.autocast(2, lambda device: torch.float32)


# ---- sampling ------------------------------------------------------------------------------------------------------


def _farthest_points(points: Any, lengths: tuple[int, ...], k: int, start: int) -> list[Any]:
    return sampling.farthest_arrays(points, *sampling.check_farthest(points, k, lengths, start))


FARTHEST_POINTS = Operator(
    "farthest_points(Tensor points, SymInt[] lengths, SymInt k, SymInt start) -> Tensor",
    _farthest_points,
    lambda points, lengths, k, start: sampling.farthest_results(len(lengths), k),
)


# ---- surfaces ------------------------------------------------------------------------------------------------------


def _normals(points: Any, lengths: tuple[int, ...], k: int, viewpoint: list[float] | None) -> list[Any]:
    return surface.normals_arrays(points, *surface.check_normals(points, k, lengths, viewpoint))


NORMALS = Operator(
    "normals(Tensor points, SymInt[] lengths, int k, float[]? viewpoint) -> (Tensor, Tensor)",
    _normals,
    lambda points, lengths, k, viewpoint: surface.normals_results(points, points.shape[0]),
)


# ---- losses --------------------------------------------------------------------------------------------------------


def _check_chamfer(x: Any, y: Any, *numbers: Any) -> tuple[Any, ...]:
    return x, y, *check_chamfer(x, y, *numbers)


def _check_chamfer_backward(dloss: Any, x: Any, y: Any, residuals: Any, *numbers: Any) -> tuple[Any, ...]:
    return dloss, x, y, residuals, *check_chamfer_backward(dloss, x, y, residuals, *numbers)


CHAMFER = Operator(
    "chamfer(Tensor x, Tensor y, SymInt[] x_lengths, SymInt[] y_lengths, bool squared, str reduction, str direction, "
    "str empty) -> (Tensor, Tensor)",
    lambda *args: chamfer_arrays(*_check_chamfer(*args)),  # the loss, and the residuals that its gradient needs
    lambda x, y, x_lengths, y_lengths, squared, reduction, direction, empty: chamfer_results(
        x.shape[0], y.shape[0], len(x_lengths), reduction, direction, neighbors.distance_dtype(x, y)
    ),
    lambda *args: chamfer_call(*_check_chamfer(*args)),
)
CHAMFER_BACKWARD = Operator(
    "chamfer_backward(Tensor dloss, Tensor x, Tensor y, Tensor residuals, SymInt[] x_lengths, SymInt[] y_lengths, "
    "bool squared, str reduction, str direction) -> (Tensor, Tensor)",
    lambda *args: chamfer_backward_arrays(*_check_chamfer_backward(*args)),
    lambda dloss, x, y, *rest: chamfer_backward_results(x, y),
    lambda *args: chamfer_backward_call(*_check_chamfer_backward(*args)),
)
CHAMFER_BACKWARD.refuse_second_derivative()
CHAMFER.differentiate(
    lambda tensors, results: (*tensors, results[1]),
    lambda dloss, saved, numbers: run(CHAMFER_BACKWARD, (dloss, *saved), numbers[:-1]),
)
CHAMFER.autocast(2, lambda device: torch.float32)


def _points(x: Any, y: Any, *numbers: Any) -> list[Any]:
    """The distances of the points of x and then of y, and their nearest, which the gradient needs."""
    return points_arrays(x, y, *check_points(x, y, *numbers))


def _points_backward(ddistances: Any, x: Any, y: Any, distances: Any, nearest: Any, *numbers: Any) -> list[Any]:
    given = ddistances, x, y, distances, nearest
    return points_backward_arrays(*given, *check_points_backward(*given, *numbers))


CHAMFER_POINTS = Operator(
    "chamfer_points(Tensor x, Tensor y, SymInt[] x_lengths, SymInt[] y_lengths, bool squared, str direction, "
    "str empty) -> (Tensor, Tensor)",
    _points,
    lambda x, y, x_lengths, y_lengths, squared, direction, empty: points_results(
        x.shape[0], y.shape[0], direction, neighbors.distance_dtype(x, y)
    ),
)
CHAMFER_POINTS_BACKWARD = Operator(
    "chamfer_points_backward(Tensor ddistances, Tensor x, Tensor y, Tensor distances, Tensor nearest, "
    "SymInt[] x_lengths, SymInt[] y_lengths, bool squared, str direction) -> (Tensor, Tensor)",
    _points_backward,
    lambda ddistances, x, y, *rest: chamfer_backward_results(x, y),
)
CHAMFER_POINTS_BACKWARD.refuse_second_derivative()
CHAMFER_POINTS.differentiate(
    lambda tensors, results: (*tensors, *results),
    lambda ddistances, saved, numbers: run(CHAMFER_POINTS_BACKWARD, (ddistances, *saved), numbers[:-1]),
)
CHAMFER_POINTS.autocast(2, lambda device: torch.float32)


def _compare_clouds(x: Any, y: Any, *numbers: Any) -> list[Any]:
    return metrics.compare_clouds_arrays(x, y, *metrics.check_compare_clouds(x, y, *numbers))


COMPARE_CLOUDS = Operator(
    "compare_clouds(Tensor x, Tensor y, SymInt[] x_lengths, SymInt[] y_lengths, float[] thresholds) -> (Tensor, "
    "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compare_clouds,
    lambda x, y, x_lengths, y_lengths, thresholds: metrics.compare_clouds_results(
        len(x_lengths), len(thresholds), neighbors.distance_dtype(x, y)
    ),
)
COMPARE_CLOUDS.autocast(2, lambda device: torch.float32)


def _check_apml(
    pred: Any,
    target: Any,
    pred_lengths: tuple[int, ...],
    target_lengths: tuple[int, ...],
    p_min: float,
    threshold: float,
    iterations: int,
    symmetrize: str,
    reduction: str,
    max_entries: int | None,
    with_grad: bool,
) -> tuple[Any, ...]:
    options = p_min, threshold, iterations, symmetrize, reduction, max_entries
    checked = transport.check_apml(pred, target, pred_lengths, target_lengths, *options)
    return pred, pred_lengths, target, target_lengths, *checked[2:], with_grad


def _apml_call(*args: Any) -> Any:
    """The call, if max_entries is given; otherwise there are two."""
    checked = _check_apml(*args)
    return None if args[-2] is None else transport.apml_call(*checked)


def _apml_results(
    pred: Spec, target: Spec, pred_lengths: Any, target_lengths: Any, p: Any, t: Any, i: Any, s: Any, *options: Any
) -> Any:
    reduction, _, with_grad = options
    return transport.apml_results(pred, target, len(pred_lengths), reduction, with_grad)


def _apml_backward(dloss: Any, dpred: Any, dtarget: Any, pred: Any, target: Any, *lengths: Any) -> list[Any]:
    return transport.apml_backward_arrays(dloss, dpred, dtarget, *lengths)


def _apml_backward_call(dloss: Any, dpred: Any, dtarget: Any, pred: Any, target: Any, *lengths: Any) -> Any:
    transport.check_apml_backward(dloss, dpred, dtarget, lengths[0])
    return transport.apml_backward_call(dloss, dpred, dtarget, *lengths)


APML = Operator(
    "apml(Tensor pred, Tensor target, SymInt[] pred_lengths, SymInt[] target_lengths, float p_min, float threshold, "
    "int iterations, str symmetrize, str reduction, SymInt? max_entries, bool with_grad) -> (Tensor, Tensor, Tensor)",
    lambda *args: transport.apml_arrays(*_check_apml(*args)),  # the loss and, if with_grad, both gradients
    _apml_results,
    _apml_call,
)
# pred and target are arguments so that torch knows that the result depends on them. Then a second derivative is refused
# and not taken for 0.
APML_BACKWARD = Operator(
    "apml_backward(Tensor dloss, Tensor dpred, Tensor dtarget, Tensor pred, Tensor target, SymInt[] pred_lengths, "
    "SymInt[] target_lengths) -> (Tensor, Tensor)",
    _apml_backward,
    lambda dloss, dpred, dtarget, *rest: transport.apml_backward_results(dpred, dtarget),
    _apml_backward_call,
)
APML_BACKWARD.refuse_second_derivative()


def _backward_of_apml(dloss: torch.Tensor, saved: Any, numbers: Any) -> Any:
    if not numbers[-1]:
        raise RuntimeError("apml was called with with_grad=False, and so there is no gradient: pass True.")
    return run(APML_BACKWARD, (dloss, *saved), numbers[:2])


APML.differentiate(lambda tensors, results: (*results[1:], *tensors), _backward_of_apml)
APML.autocast(2, lambda device: torch.float32)


def _emd(x: Any, y: Any, x_lengths: tuple[int, ...], y_lengths: tuple[int, ...], reduction: str) -> list[Any]:
    """The loss and the gradients of x and y, which come with the assignment."""
    checked = transport.check_emd(x, y, x_lengths, y_lengths, reduction)
    return transport.emd_arrays(x, y, *checked, with_grad=True)


EMD = Operator(
    "emd(Tensor x, Tensor y, SymInt[] x_lengths, SymInt[] y_lengths, str reduction) -> (Tensor, Tensor, Tensor)",
    _emd,
    lambda x, y, x_lengths, y_lengths, reduction: transport.apml_results(x, y, len(x_lengths), reduction, True),
)
EMD.differentiate(
    lambda tensors, results: (*results[1:], *tensors),
    lambda dloss, saved, numbers: run(APML_BACKWARD, (dloss, *saved), numbers[:2]),
)
EMD.autocast(2, lambda device: torch.float32)
