# SPDX-License-Identifier: Apache-2.0
"""gpu3d for torch: the same calls as functions with gradients, as registered operators, and as modules.

Each operator `torch.ops.gpu3d.*` is a plain call of gpu3d: the same kernels and the same bits, on torch's current
stream. Its outputs and workspaces are torch's own memory. torch.library knows its shapes (torch.compile), its gradient,
which is the hand-written backward, and what autocast does to it.

Operators take tensors and numbers only, so a layout travels as its tensors and its lengths. The functions here take
`Buckets`, `Scopes` and `Pooling` apart and put them together again, which torch.compile traces through: they may be
made inside a compiled function, passed into it and returned from it. Lengths are host integers: torch.compile takes
those of another batch as symbols, and the number of clouds as fixed.

On the current GPU calls are played from the third of a kind on (the same shapes, strides, dtypes and numbers): see
`_replay`. Calls in which one tensor comes twice (q, k and v in one, x beside itself) are not. Through autograd goes the
first result alone, and with it what its gradient takes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

try:
    import torch
except ImportError as error:
    raise ImportError('gpu3d.interop.torch needs torch: pip install "gpu3d[torch]".') from error

import gpu3d
from gpu3d import _arrays, attention, neighbors, pooling
from gpu3d import buckets as layouts
from gpu3d.buckets import Buckets, Scopes
from gpu3d.interop import _layouts, _replay
from gpu3d.pooling import Pooling

__all__ = [
    "APMLLoss",
    "BucketAttention",
    "ChamferLoss",
    "apml",
    "bucket_attention",
    "bucket_pool",
    "bucket_unpool",
    "bucketize",
    "chamfer",
    "gather",
    "scatter",
    "scopes",
    "use_torch_allocator",
]

if torch.__version__ < "2.6":  # a TorchVersion, which compares as versions do
    raise ImportError(
        f'gpu3d.interop.torch needs torch >= 2.6, got {torch.__version__}: pip install --upgrade "gpu3d[torch]".'
    )


# ---- memory --------------------------------------------------------------------------------------------------------


class _Allocator:
    """A CuPy allocator: torch's memory, of torch's current stream. Each allocation is a storage."""

    apart = True  # results that are returned together have an allocation each, for tensors own their memory

    def __call__(self, size: int) -> Any:
        import cupy

        tensor = torch.empty(size, dtype=torch.uint8, device="cuda")  # CuPy and torch have one current device: CUDA's
        memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), size, tensor.untyped_storage(), tensor.get_device())
        return cupy.cuda.MemoryPointer(memory, 0)


class _StreamAllocator(_Allocator):
    """The same of CuPy's current stream, which need not be torch's where somebody mixes both."""

    def __call__(self, size: int) -> Any:
        import cupy

        stream = cupy.cuda.get_current_stream().ptr
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=torch.cuda.current_device())):
            return super().__call__(size)


_allocator = _Allocator()


def use_torch_allocator() -> None:
    """Let CuPy allocate from torch's caching allocator, from now on, in every thread.

    For programs that use CuPy and torch by hand: the two libraries then share one pool, and CuPy's arrays can be made
    while torch captures a CUDA graph. The functions of this module do so by themselves, and need no call of this one.

    Notes
    -----
    Memory belongs to the stream that is CuPy's current one when it is allocated, as in CuPy's own pool. Arrays made
    before keep theirs; ``cupy.get_default_memory_pool().free_all_blocks()`` gives back what that pool holds. The way
    back is ``cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)``.

    Raises
    ------
    ImportError
        CuPy is not installed.
    RuntimeError
        This torch has no CUDA.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"use_torch_allocator needs a torch with CUDA and a GPU, got torch {torch.__version__} that finds none."
        )
    _arrays.require_cupy("what use_torch_allocator allocates").cuda.set_allocator(_StreamAllocator())


def _from_torch(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """What gpu3d allocates in here, beside x, is torch's."""
    if not x.is_cuda:
        return contextlib.nullcontext()
    return _arrays.require_cupy("a tensor").cuda.using_allocator(_allocator)


# ---- calls that are played again -----------------------------------------------------------------------------------

# What torch's compiler allocates by, on the current device, in a third of torch.empty's time; and what it tells by, in
# one call, that tensors are as others were.
_guards: Any = torch._C._dynamo.guards
_empty = _guards._empty_strided_cuda


class _Played(NamedTuple):
    """A program, and what tensors it makes."""

    program: _replay.Program
    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # shape, strides and dtype

    def __call__(self, addresses: list[int], device: int) -> list[torch.Tensor]:
        """The results of inputs at these addresses, on `device`, which is the current one."""
        results = [_empty(*result) for result in self.results]
        addresses += [x.data_ptr() for x in results]
        if self.program.workspace:
            workspace = _empty((self.program.workspace,), (1,), torch.uint8)
            addresses.append(workspace.data_ptr())
        _replay.play(self.program, addresses, torch._C._cuda_getCurrentRawStream(device))
        return results


@dataclass
class _Kind:
    """Calls of an operator that launch the same, but for where their tensors lie."""

    holds: Any  # whether tensors are of these types, dtypes, devices, shapes and strides, and torch in the same modes
    played: _Played | None = None
    rehearsed: bool = False  # and not to be played, if `played` is None


KINDS = 1024  # that are kept
_kinds: dict[Any, list[_Kind]] = {}  # by all that is not a tensor


def _kind(op: _Operator, tensors: Sequence[torch.Tensor], numbers: tuple[Any, ...], odd: Any) -> _Kind | None:
    """What is known of such a call; None: too little. `odd`: its addresses mod 16, if one is not 0."""
    kinds = _kinds.get((op.name, numbers, odd))
    if kinds is None:  # batches of ever other lengths are not worth a look at their tensors
        if len(_kinds) >= KINDS:
            _kinds.clear()
        _kinds[op.name, numbers, odd] = []
        return None
    for kind in kinds:
        if kind.holds(*tensors):
            return kind
    if len(set(map(id, tensors))) == len(tensors):  # it tells nothing of one that comes twice
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        guards = _guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if len(kinds) >= KINDS:
            kinds.clear()
        kinds.append(_Kind(guards.check))
    return None


def _play(op: _Operator, tensors: Sequence[torch.Tensor], numbers: tuple[Any, ...]) -> Any:
    """The call: by a program, from the third of its kind on; by gpu3d's Python before.

    Programs are launched on the current device: calls on another one are not played.
    """
    device = tensors[0].get_device()
    if torch._C._cuda_getDevice() == device:
        addresses = [x.data_ptr() for x in tensors]
        odd = [address % 16 for address in addresses]
        kind = _kind(op, tensors, numbers, tuple(odd) if any(odd) else None)
        if kind is not None:
            if not kind.rehearsed and not torch.cuda.is_current_stream_capturing():
                kind.played, kind.rehearsed = _rehearsed(op, tensors, numbers, device), True
            if kind.played is not None:
                results = kind.played(addresses, device)
                return results[0] if op.single else tuple(results)
    return op.plain(tensors, numbers)


def _rehearsed(op: _Operator, tensors: Sequence[torch.Tensor], numbers: tuple[Any, ...], device: int) -> _Played | None:
    """What plays such calls; None: they cannot be played."""

    def call(*arrays: Any) -> Sequence[Any]:
        results = op.function(*arrays, *numbers)
        return (results,) if op.single else results

    if any(x.is_neg() for x in tensors):  # views whose memory holds other values
        return None
    try:
        program = _replay.rehearse(call, [_array_of(x) for x in tensors], device)
    except TypeError:  # of a dtype that CuPy does not have, as the call will say
        return None
    if program is None:
        return None
    results = [(x.shape, _strides(x.shape), _arrays._torch_dtype(x.dtype)) for x in program.results]
    return _Played(program, tuple(results))


def _array_of(x: torch.Tensor) -> _replay.Array:
    dtype = _arrays._numpy_dtype(x.dtype)
    strides = tuple([step * dtype.itemsize for step in x.stride()])
    return _replay.Array(tuple(x.shape), dtype, x.data_ptr() % 16, strides)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple([math.prod([max(n, 1) for n in shape[axis + 1 :]]) for axis in range(len(shape))])


# ---- operators -----------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("gpu3d", "DEF")
_OPS = torch.ops.gpu3d


@dataclass
class _Operator:
    """An operator outside of torch's dispatcher: of tensors, and of the arguments behind them."""

    name: str
    function: Callable[..., Any]  # of both, in a row
    single: bool  # its result is a tensor, and no tuple
    fixed: Callable[..., bool] | None  # see `_operator`, and so the next
    in_torch: bool
    apply: Any = None  # of the torch.autograd.Function of its kernel and its gradient
    cast: Callable[..., Any] | None = None  # its tensors under autocast

    def dispatched(self, *args: Any) -> Any:
        return getattr(_OPS, self.name)(*args)

    def plain(self, tensors: Sequence[torch.Tensor], numbers: tuple[Any, ...]) -> Any:
        if self.in_torch:
            return self.function(*tensors, *numbers)
        with _from_torch(tensors[0]):
            return self.function(*tensors, *numbers)

    def kernel(self, tensors: Sequence[torch.Tensor], numbers: tuple[Any, ...]) -> Any:
        if self.fixed is not None and tensors[0].is_cuda and self.fixed(*numbers):
            return _play(self, tensors, numbers)
        return self.plain(tensors, numbers)


_OPERATORS: dict[str, _Operator] = {}
_TENSORS = {torch.Tensor, torch.nn.Parameter}  # other subclasses may have a say in what is done to them


def _run(name: str, tensors: tuple[torch.Tensor, ...], numbers: tuple[Any, ...]) -> Any:
    """The operator `name`; where nobody looks on, without the dispatcher, which takes longer than our kernels' launch.

    Those who do are torch.compile, torch.func, dispatch modes and subclasses of tensors. What there is to do here is
    what the dispatcher would do for them otherwise: autocast, autograd, and the kernel.
    """
    op = _OPERATORS[name]
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return op.dispatched(*tensors, *numbers)
    device = "cuda" if tensors[0].is_cuda else "cpu" if tensors[0].is_cpu else "another"
    if device == "another" or not _TENSORS.issuperset(map(type, tensors)):
        return op.dispatched(*tensors, *numbers)
    if op.cast is not None and torch.is_autocast_enabled(device):
        tensors = op.cast(device, tensors)
    if not (torch.is_grad_enabled() and any([x.requires_grad for x in tensors])):
        return op.kernel(tensors, numbers)
    if op.apply is None:
        return op.dispatched(*tensors, *numbers)
    others: list[torch.Tensor] = []
    first = op.apply(numbers, others, *tensors)
    return first if op.single else (first, *others)


def _split(args: Sequence[Any]) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """An operator's arguments: tensors, which come first, and the others. None is of the others."""
    count = next((i for i, x in enumerate(args) if not isinstance(x, torch.Tensor)), len(args))
    return tuple(args[:count]), tuple([tuple(x) if isinstance(x, list) else x for x in args[count:]])


def _always(*args: Any) -> bool:
    return True


def _but_for_zero(*args: Any) -> bool:
    """The last argument is a number: -0.0 would be taken for 0.0, and signs of zeros be wrong."""
    return args[-1] != 0


def _nothing(x: Any, shape: tuple[int, ...] = (0,), dtype: str | None = None) -> Any:
    """An array without elements: a tensor as x, or of CuPy, whose arrays stand for tensors in a rehearsal."""
    if isinstance(x, torch.Tensor):
        return x.new_empty(shape, dtype=getattr(torch, dtype) if dtype else x.dtype)
    return _arrays.require_cupy("x").empty(shape, dtype or x.dtype)


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, torch.Tensor) else _arrays.require_cupy("x").ascontiguousarray(x)


def _operator(
    schema: str, fake: Callable[..., Any], fixed: Callable[..., bool] | None = None, *, in_torch: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines ``gpu3d::<schema>`` with the decorated function as its kernel on CPU and CUDA.

    `fake` makes empty results from the same arguments; lengths are symbols in it where torch.compile says so. `fixed`
    says of the arguments behind the tensors whether the call launches the same whatever the values of its tensors are.
    `in_torch`: the function is one of torch's operators, and CuPy has no part in it.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        op = _OPERATORS[name] = _Operator(name, function, schema.endswith("-> Tensor"), fixed, in_torch)

        @functools.wraps(function)
        def kernel(*args: Any) -> Any:
            return op.kernel(*_split(args))

        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)
        torch.library.register_fake(f"gpu3d::{name}", fake, lib=_LIBRARY)
        return function

    return register


def _gradient(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """`backward` takes the gradient of the operator's first result; the others are not differentiable.

    It returns the gradients of the first tensors. `save` is told the context, the tensors, the arguments behind them,
    and the result.
    """
    op = _OPERATORS[name]

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)  # else torch fills zeros for every other result
        ctx.arguments = len(inputs)
        if not op.single:
            ctx.mark_non_differentiable(*output[1:])
        save(ctx, *_split(inputs), output)

    def backward_of_first(ctx: Any, gradient: Any, *others: None) -> Any:
        gradients = () if gradient is None else backward(ctx, gradient)
        return *gradients, *[None] * (ctx.arguments - len(gradients))

    torch.library.register_autograd(f"gpu3d::{name}", backward_of_first, setup_context=setup_context, lib=_LIBRARY)

    def forward(ctx: Any, numbers: tuple[Any, ...], others: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """The first result. The others go past autograd, which would take longer over each than a launch does."""
        output = op.kernel(tensors, numbers)
        ctx.arguments = 2 + len(tensors)
        save(ctx, tensors, numbers, output)
        if op.single:
            return output
        first, *rest = output
        others += rest
        return first

    def backward_of_single(ctx: Any, gradient: torch.Tensor) -> Any:
        gradients = backward(ctx, gradient)
        return None, None, *gradients, *[None] * (ctx.arguments - 2 - len(gradients))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_single)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    op.apply = super(torch.autograd.Function, function).apply  # without what Function.apply does for torch.func's sake


def _no_second_derivative(name: str) -> None:
    """The backward of a backward is an error: without one, torch would take second derivatives for zero."""

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"gpu3d has no second derivatives: torch asked for the gradient of {name}, which is one already. "
            "Call backward or torch.autograd.grad without create_graph."
        )

    torch.library.register_autograd(f"gpu3d::{name}", backward, lib=_LIBRARY)


def _autocast(name: str, tensors: int, dtype: torch.dtype | None) -> None:
    """Under autocast the first arguments, so many tensors, are cast to `dtype`, or to autocast's own where it is None.

    float64 stays, as in torch's operators. (torch.library.register_autocast is of 2.7, and knows fixed dtypes only.)
    """

    def cast(device_type: str, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        to = dtype or torch.get_autocast_dtype(device_type)
        cast = [x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x for x in xs[:tensors]]
        return *cast, *xs[tensors:]

    op = _OPERATORS[name]

    def register(device_type: str, key: str) -> None:
        def kernel(*args: Any) -> Any:
            with torch.autocast(device_type, enabled=False):
                return op.dispatched(*cast(device_type, args[:tensors]), *args[tensors:])

        _LIBRARY.impl(name, kernel, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")
    op.cast = cast


# ---- operators: buckets --------------------------------------------------------------------------------------------


def _bucketize_fake(points: torch.Tensor, bucket_size: int, lengths: Sequence[int], *options: Any) -> Any:
    shapes = (_layouts.num_slots(lengths, bucket_size),), (points.shape[0],), ()
    return tuple([points.new_empty(shape, dtype=torch.int32) for shape in shapes])


@_operator(
    "bucketize(Tensor points, int bucket_size, SymInt[] lengths, str hash, str balance, float? voxel_size, "
    "bool per_axis, int seed, bool? check_finite) -> (Tensor, Tensor, Tensor)",
    _bucketize_fake,
    lambda *args: not args[-1],  # check_finite: else an error follows from values
)
def _bucketize(
    points: torch.Tensor,
    bucket_size: int,
    lengths: Sequence[int],
    hash: str,
    balance: str,
    voxel_size: float | None,
    per_axis: bool,
    seed: int,
    check_finite: bool | None,
) -> Any:
    made = gpu3d.bucketize(
        points,
        bucket_size,
        lengths=lengths,
        hash=hash,
        balance=balance,
        voxel_size="per_axis" if per_axis else voxel_size,
        seed=seed,
        check_finite=check_finite,
    )
    return made.slot_to_point, made.point_to_slot, made.moved


def _scopes_fake(
    slot_to_point: torch.Tensor, bucket_size: int, lengths: Sequence[int], size: int, shift: int, stride: int
) -> torch.Tensor:
    counts, chunk = [(n + bucket_size - 1) // bucket_size for n in lengths], size * stride
    # How many chunks have a scope j, for each j: with a minimum in it torch 2.6 would compile anew for each outcome.
    rows = sum((buckets + chunk - 1 - j) // chunk for buckets in counts for j in range(stride))
    return slot_to_point.new_empty((rows, size))


@_operator(
    "scopes(Tensor slot_to_point, int bucket_size, SymInt[] lengths, int size, int shift, int stride) -> Tensor",
    _scopes_fake,
)
def _scopes(
    slot_to_point: torch.Tensor, bucket_size: int, lengths: Sequence[int], size: int, shift: int, stride: int
) -> torch.Tensor:
    layout = _layouts.layout(lengths, bucket_size)
    buckets = Buckets(slot_to_point, None, None, bucket_size, layout.lengths, layout.bucket_offsets)
    return gpu3d.scopes(buckets, size, shift=shift, stride=stride).table


def _move_rows_fake(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, fill: Any, name: str) -> torch.Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))


@_operator(
    "move_rows(Tensor x, Tensor index, Tensor inverse, Scalar fill, str name) -> Tensor",
    _move_rows_fake,
    lambda *args: isinstance(args[-2], int),  # fill: -0.0 would be taken for 0.0
)
def _move_rows(x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, fill: Any, name: str) -> torch.Tensor:
    """Rows x[index], `fill` where the index is -1; `inverse` is where each row of x goes, or -1."""
    return layouts._move(x, inverse.shape[0], name, index, fill)


def _save_move(ctx: Any, tensors: Any, numbers: Any, output: Any) -> None:
    _, index, inverse = tensors
    ctx.save_for_backward(index, inverse)
    ctx.name = numbers[-1]


def _move_backward(ctx: Any, dout: torch.Tensor) -> Any:
    index, inverse = ctx.saved_tensors  # every row goes to one place, so the way back is a move too
    return (_run("move_rows", (dout, inverse, index), (0, f"d{ctx.name}")),)


_gradient("move_rows", _move_backward, _save_move)


# ---- operators: attention ------------------------------------------------------------------------------------------


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attention_fake(q: torch.Tensor, *args: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_lse_dtype(q))


@_operator(
    "bucket_attention(Tensor q, Tensor k, Tensor v, Tensor table, int bucket_size, SymInt[] lengths, float? scale) "
    "-> (Tensor, Tensor)",
    _attention_fake,
    _but_for_zero,
)
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    bucket_size: int,
    lengths: Sequence[int],
    scale: float | None,
) -> Any:
    layout = _layouts.layout(lengths, bucket_size)
    return gpu3d.bucket_attention(q, k, v, layout, _layouts.scopes_of(table, layout), scale=scale, return_lse=True)


def _attention_backward_fake(dout: torch.Tensor, q: torch.Tensor, *args: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@_operator(
    "bucket_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor table, "
    "int bucket_size, SymInt[] lengths, float? scale) -> (Tensor, Tensor, Tensor)",
    _attention_backward_fake,
    _but_for_zero,
)
def _attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: torch.Tensor,
    bucket_size: int,
    lengths: Sequence[int],
    scale: float | None,
) -> Any:
    layout = _layouts.layout(lengths, bucket_size)
    return gpu3d.bucket_attention_backward(
        dout, q, k, v, out, lse, layout, _layouts.scopes_of(table, layout), scale=scale
    )


def _save_attention(ctx: Any, tensors: Any, numbers: Any, output: Any) -> None:
    q, k, v, table = tensors
    ctx.save_for_backward(q, k, v, *output, table)
    ctx.layout = numbers


def _backward_of_attention(ctx: Any, dout: torch.Tensor) -> Any:
    return _run("bucket_attention_backward", (dout, *ctx.saved_tensors), ctx.layout)


_gradient("bucket_attention", _backward_of_attention, _save_attention)
_no_second_derivative("bucket_attention_backward")
_autocast("bucket_attention", 3, None)


# ---- operators: pooling --------------------------------------------------------------------------------------------


def _pool_fake(
    features: torch.Tensor, points: torch.Tensor, bucket_size: int, lengths: Sequence[int], ratio: int, reduce: str
) -> Any:
    children, columns = _layouts.children(lengths, ratio), features.shape[1]
    slots = _layouts.num_slots(children, bucket_size)

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return features.new_empty(shape, dtype=dtype)

    extremes = reduce in ("min", "max")
    return (
        features.new_empty((slots, columns)),
        points.new_empty((slots, 3)),
        integers(slots, ratio),
        integers(slots if extremes else 0, columns, dtype=torch.uint8),
        integers(slots),
        integers(sum(children)),
        integers(),
    )


@_operator(
    "bucket_pool(Tensor features, Tensor points, int bucket_size, SymInt[] lengths, int ratio, str reduce) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pool_fake,
    _always,
)
def _pool(
    features: torch.Tensor, points: torch.Tensor, bucket_size: int, lengths: Sequence[int], ratio: int, reduce: str
) -> Any:
    pooled = gpu3d.bucket_pool(features, points, _layouts.layout(lengths, bucket_size), ratio=ratio, reduce=reduce)
    argmember, child = pooled.argmember, pooled.buckets
    if argmember is None:  # an operator's result cannot be None
        argmember = _nothing(features, (0, features.shape[1]), "uint8")
    structure = child.slot_to_point, child.point_to_slot, child.moved
    return pooled.features, pooled.points, pooled.members, argmember, *structure


def _pool_backward_fake(
    dchild: torch.Tensor, members: torch.Tensor, argmember: Any, bucket_size: int, lengths: Sequence[int], *rest: Any
) -> torch.Tensor:
    return dchild.new_empty((_layouts.num_slots(lengths, bucket_size), dchild.shape[1]))


@_operator(
    "bucket_pool_backward(Tensor dchild, Tensor members, Tensor argmember, int bucket_size, SymInt[] lengths, "
    "int ratio, str reduce) -> Tensor",
    _pool_backward_fake,
    _always,
)
def _pool_backward(
    dchild: torch.Tensor,
    members: torch.Tensor,
    argmember: torch.Tensor,
    bucket_size: int,
    lengths: Sequence[int],
    ratio: int,
    reduce: str,
) -> torch.Tensor:
    first = argmember if reduce in ("min", "max") else None
    pooled = _layouts.pooling(dchild, members, first, bucket_size, lengths, ratio, reduce)
    return gpu3d.bucket_pool_backward(dchild, pooled)


def _save_pool(ctx: Any, tensors: Any, numbers: Any, output: Any) -> None:
    _, _, members, argmember, *_ = output
    ctx.save_for_backward(members, argmember)
    ctx.layout = numbers


def _backward_of_pool(ctx: Any, dchild: torch.Tensor) -> Any:
    return (_run("bucket_pool_backward", (dchild, *ctx.saved_tensors), ctx.layout),)


_gradient("bucket_pool", _backward_of_pool, _save_pool)
_no_second_derivative("bucket_pool_backward")


def _unpool_fake(
    child: torch.Tensor, members: torch.Tensor, skip: Any, bucket_size: int, lengths: Sequence[int], ratio: int
) -> torch.Tensor:
    return child.new_empty((_layouts.num_slots(lengths, bucket_size), child.shape[1]))


@_operator(
    "bucket_unpool(Tensor child, Tensor members, Tensor? skip, int bucket_size, SymInt[] lengths, int ratio) -> Tensor",
    _unpool_fake,
    _always,
)
def _unpool(
    child: torch.Tensor, members: torch.Tensor, skip: Any, bucket_size: int, lengths: Sequence[int], ratio: int
) -> torch.Tensor:
    return gpu3d.bucket_unpool(child, _layouts.pooling(None, members, None, bucket_size, lengths, ratio, "sum"), skip)


def _unpool_backward_fake(dout: torch.Tensor, members: torch.Tensor, *rest: Any) -> Any:
    return dout.new_empty((members.shape[0], dout.shape[1])), dout.new_empty(dout.shape)


@_operator(
    "bucket_unpool_backward(Tensor dout, Tensor members, int bucket_size, SymInt[] lengths, int ratio) "
    "-> (Tensor, Tensor)",
    _unpool_backward_fake,
    _always,
)
def _unpool_backward(
    dout: torch.Tensor, members: torch.Tensor, bucket_size: int, lengths: Sequence[int], ratio: int
) -> Any:
    return gpu3d.bucket_unpool_backward(dout, _layouts.pooling(None, members, None, bucket_size, lengths, ratio, "sum"))


def _save_unpool(ctx: Any, tensors: Any, numbers: Any, output: Any) -> None:
    _, members, *skip = tensors
    ctx.save_for_backward(members)
    ctx.skip, ctx.layout = bool(skip), numbers[-3:]


def _backward_of_unpool(ctx: Any, dout: torch.Tensor) -> Any:
    dchild, dskip = _run("bucket_unpool_backward", (dout, *ctx.saved_tensors), ctx.layout)
    return (dchild, None, dskip) if ctx.skip else (dchild,)


_gradient("bucket_unpool", _backward_of_unpool, _save_unpool)
_no_second_derivative("bucket_unpool_backward")


# ---- operators: losses ---------------------------------------------------------------------------------------------


def _loss_fake(x: torch.Tensor, x_lengths: Sequence[int], reduction: str) -> torch.Tensor:
    return x.new_empty((len(x_lengths),) if reduction == "none" else (), dtype=torch.float32)


def _chamfer_fake(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
) -> Any:
    words = 2 * (x.shape[0] + y.shape[0] + len(x_lengths))
    return _loss_fake(x, x_lengths, reduction), x.new_empty((words,), dtype=torch.int32)


@_operator(
    "chamfer(Tensor x, Tensor y, SymInt[] x_lengths, SymInt[] y_lengths, bool squared, str reduction) "
    "-> (Tensor, Tensor)",
    _chamfer_fake,
    _always,
)
def _chamfer(
    x: torch.Tensor,
    y: torch.Tensor,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
) -> Any:
    """The loss, and what the search found on the way, for its gradient."""
    return neighbors.chamfer_found(x, y, x_lengths=x_lengths, y_lengths=y_lengths, squared=squared, reduction=reduction)


def _chamfer_backward_fake(dloss: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *rest: Any) -> Any:
    return x.new_empty(x.shape), y.new_empty(y.shape)


@_operator(
    "chamfer_backward(Tensor dloss, Tensor x, Tensor y, Tensor found, SymInt[] x_lengths, SymInt[] y_lengths, "
    "bool squared, str reduction) -> (Tensor, Tensor)",
    _chamfer_backward_fake,
    _always,
)
def _chamfer_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    found: torch.Tensor,
    x_lengths: Sequence[int],
    y_lengths: Sequence[int],
    squared: bool,
    reduction: str,
) -> Any:
    options: dict[str, Any] = {"squared": squared, "reduction": reduction}
    gradients = neighbors.chamfer_backward(dloss, x, y, found, x_lengths=x_lengths, y_lengths=y_lengths, **options)
    return tuple(map(_contiguous, gradients))


def _save_chamfer(ctx: Any, tensors: Any, numbers: Any, output: Any) -> None:
    ctx.save_for_backward(*tensors, output[1])
    ctx.numbers = numbers


def _backward_of_chamfer(ctx: Any, dloss: torch.Tensor) -> Any:
    return _run("chamfer_backward", (dloss, *ctx.saved_tensors), ctx.numbers)


_gradient("chamfer", _backward_of_chamfer, _save_chamfer)
_no_second_derivative("chamfer_backward")
_autocast("chamfer", 2, torch.float32)


def _apml_fake(
    pred: torch.Tensor,
    target: torch.Tensor,
    pred_lengths: Sequence[int],
    target_lengths: Sequence[int],
    p_min: float,
    threshold: float,
    iterations: int,
    symmetrize: str,
    reduction: str,
    max_entries: int | None,
    with_grad: bool,
) -> Any:
    dpred, dtarget = (z.new_empty(z.shape if with_grad else (0,)) for z in (pred, target))
    return _loss_fake(pred, pred_lengths, reduction), dpred, dtarget


@_operator(
    "apml(Tensor pred, Tensor target, SymInt[] pred_lengths, SymInt[] target_lengths, float p_min, float threshold, "
    "int iterations, str symmetrize, str reduction, SymInt? max_entries, bool with_grad) -> (Tensor, Tensor, Tensor)",
    _apml_fake,
    lambda *args: args[-2] is not None,  # max_entries: else the host asks how many entries there are
)
def _apml(
    pred: torch.Tensor,
    target: torch.Tensor,
    pred_lengths: Sequence[int],
    target_lengths: Sequence[int],
    p_min: float,
    threshold: float,
    iterations: int,
    symmetrize: str,
    reduction: str,
    max_entries: int | None,
    with_grad: bool,
) -> Any:
    """The loss and, with_grad, its gradients of pred and target: one plan gives both."""
    options: dict[str, Any] = {
        "pred_lengths": pred_lengths,
        "target_lengths": target_lengths,
        "p_min": p_min,
        "threshold": threshold,
        "iterations": iterations,
        "symmetrize": symmetrize,
        "reduction": reduction,
        "max_entries": max_entries,
    }
    if not with_grad:
        return gpu3d.apml(pred, target, **options), _nothing(pred), _nothing(target)
    loss, (dpred, dtarget) = gpu3d.apml_value_and_grad(pred, target, **options)
    return loss, _contiguous(dpred), _contiguous(dtarget)


def _apml_backward_fake(dloss: torch.Tensor, dpred: torch.Tensor, dtarget: torch.Tensor, *rest: Any) -> Any:
    return dpred.new_empty(dpred.shape), dtarget.new_empty(dtarget.shape)


# pred and target stand here so that torch knows what the result depends on: a second derivative is refused, not taken
# for 0.
@_operator(
    "apml_backward(Tensor dloss, Tensor dpred, Tensor dtarget, Tensor pred, Tensor target, SymInt[] pred_lengths, "
    "SymInt[] target_lengths) -> (Tensor, Tensor)",
    _apml_backward_fake,
    in_torch=True,
)
def _apml_backward(
    dloss: torch.Tensor,
    dpred: torch.Tensor,
    dtarget: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    pred_lengths: Sequence[int],
    target_lengths: Sequence[int],
) -> Any:
    if dloss.ndim == 0 and dpred.dtype == dtarget.dtype == dloss.dtype:
        return tuple(torch._foreach_mul([dpred, dtarget], dloss))  # in one launch
    return _pulled(dpred, dloss, pred_lengths), _pulled(dtarget, dloss, target_lengths)


def _pulled(gradient: torch.Tensor, dloss: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The gradient of each cloud times that of its loss."""
    if dloss.ndim and lengths:  # no repeat_interleave: its counts would have to come from the host
        dloss = torch.cat([part.expand(n, 1) for part, n in zip(dloss, lengths, strict=True)])
    return (gradient * dloss).to(gradient.dtype)


def _save_apml(ctx: Any, tensors: Any, numbers: Any, output: Any) -> None:
    _, dpred, dtarget = output
    ctx.save_for_backward(dpred, dtarget, *tensors)
    ctx.lengths = numbers[:2]


def _backward_of_apml(ctx: Any, dloss: torch.Tensor) -> Any:
    return _run("apml_backward", (dloss, *ctx.saved_tensors), ctx.lengths)


_gradient("apml", _backward_of_apml, _save_apml)
_no_second_derivative("apml_backward")
_autocast("apml", 2, torch.float32)


# ---- functions -----------------------------------------------------------------------------------------------------


def _check_tensors(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name} must be a torch tensor, got {type(x).__name__}: convert it, or call the gpu3d function of the "
                "same name, which takes arrays of any library."
            )


def _buckets(structure: Sequence[torch.Tensor], bucket_size: int, lengths: tuple[int, ...]) -> Buckets:
    slot_to_point, point_to_slot, moved = structure
    # torch.compile warns of every cache that it sees and goes past.
    offsets = layouts._bucket_offsets.__wrapped__ if torch.compiler.is_compiling() else layouts._bucket_offsets
    return Buckets(slot_to_point, point_to_slot, moved, bucket_size, lengths, offsets(lengths, bucket_size))


def bucketize(
    points: torch.Tensor,
    bucket_size: int = 512,
    *,
    lengths: Sequence[int] | None = None,
    hash: str = "zorder_div",
    balance: str = "spill",
    voxel_size: float | str | None = None,
    seed: int = 0,
    check_finite: bool | None = None,
) -> Buckets:
    """`gpu3d.bucketize` under torch.compile too. Not differentiable: no gradient flows to `points`.

    Parameters
    ----------
    points : Tensor [N, 3] or [B, n, 3]
        As in `gpu3d.bucketize`, and so are the options.
    bucket_size, lengths, hash, balance, voxel_size, seed, check_finite
        As in `gpu3d.bucketize`.

    Returns
    -------
    Buckets
        Its arrays are tensors. Its methods scatter and gather are the plain ones, without gradients: use `scatter` and
        `gather` of this module.
    """
    _check_tensors(points=points)
    bucket_size = layouts._checked_bucket_size(bucket_size)
    packed, lengths = _arrays.pack_points(points.detach(), lengths)
    per_axis = isinstance(voxel_size, str) and voxel_size == "per_axis"
    if not per_axis:
        layouts._check_voxel_size(voxel_size)
    options = hash, balance, None if per_axis else voxel_size, per_axis, seed, check_finite
    return _buckets(_run("bucketize", (packed,), (bucket_size, lengths, *options)), bucket_size, lengths)


def scopes(buckets: Buckets, size: int = 8, *, shift: int = 0, stride: int = 1) -> Scopes:
    """`gpu3d.scopes` under torch.compile too. A hand-made table is checked on the host: make that by `gpu3d.scopes`.

    Parameters
    ----------
    buckets : Buckets
        With tensors.
    size, shift, stride : int
        As in `gpu3d.scopes`.

    Returns
    -------
    Scopes
        Its table is a tensor.
    """
    pooling._check_buckets(buckets)
    _check_tensors(buckets=buckets.slot_to_point)
    layout = buckets.bucket_size, buckets.lengths
    table = _run("scopes", (buckets.slot_to_point,), (*layout, size, shift, stride))
    return Scopes(table, size, shift, stride, buckets.bucket_size, buckets.bucket_offsets)


def scatter(x: torch.Tensor, buckets: Buckets, fill: float = 0) -> torch.Tensor:
    """Rows of points into slots, as `Buckets.scatter`, with a gradient: `gather` of the result's.

    Parameters
    ----------
    x : Tensor [N, ...]
        One row a point.
    buckets : Buckets
        With tensors on x's device.
    fill : scalar
        What padding holds.

    Returns
    -------
    Tensor [num_slots, ...]
    """
    pooling._check_buckets(buckets)
    _check_tensors(x=x, buckets=buckets.slot_to_point)
    return _run("move_rows", (x, buckets.slot_to_point, buckets.point_to_slot), (fill, "x"))


def gather(y: torch.Tensor, buckets: Buckets) -> torch.Tensor:
    """Rows of slots back to points, as `Buckets.gather`, with a gradient: `scatter` of the result's, 0 in padding.

    Parameters
    ----------
    y : Tensor [num_slots, ...]
        One row a slot.
    buckets : Buckets
        With tensors on y's device.

    Returns
    -------
    Tensor [N, ...]
    """
    pooling._check_buckets(buckets)
    _check_tensors(y=y, buckets=buckets.slot_to_point)
    return _run("move_rows", (y, buckets.point_to_slot, buckets.slot_to_point), (0, "y"))


def bucket_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    buckets: Buckets,
    scopes: Scopes,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`gpu3d.bucket_attention` with gradients. Under autocast q, k and v are cast to its dtype.

    Parameters
    ----------
    q, k, v : Tensor [num_slots, H, D]
        As in `gpu3d.bucket_attention`: any strides, so the parts of a packed projection are not copied.
    buckets : Buckets
        The layout of the slots.
    scopes : Scopes
        Which buckets attend to each other, with a tensor as table.
    scale, return_lse
        As in `gpu3d.bucket_attention`.

    Returns
    -------
    out : Tensor [num_slots, H, D]
    lse : Tensor float32 [num_slots, H]
        Only with return_lse. Not differentiated.
    """
    attention._check_layout(buckets, scopes)
    _check_tensors(q=q, k=k, v=v, scopes=scopes.table)
    if scale is not None:
        scale = attention._checked_scale(scale, q.shape[-1])
    out, lse = _run("bucket_attention", (q, k, v, scopes.table), (buckets.bucket_size, buckets.lengths, scale))
    return (out, lse) if return_lse else out


def bucket_pool(
    features: torch.Tensor, points: torch.Tensor, buckets: Buckets, *, ratio: int = 2, reduce: str = "mean"
) -> Pooling:
    """`gpu3d.bucket_pool` with the gradient of `features`; points are not differentiated. Autocast changes no dtype.

    Parameters
    ----------
    features : Tensor [num_slots, C]
        As in `gpu3d.bucket_pool`.
    points : Tensor [num_slots, 3]
    buckets : Buckets
        The layout of the slots.
    ratio, reduce
        As in `gpu3d.bucket_pool`.

    Returns
    -------
    Pooling
        Its arrays are tensors.
    """
    _check_tensors(features=features, points=points)
    pooling._check_buckets(buckets)
    ratio = pooling._checked_ratio(ratio)
    layout = buckets.bucket_size, buckets.lengths
    pooled, pooled_points, members, argmember, *structure = _run(
        "bucket_pool", (features, points.detach()), (*layout, ratio, reduce)
    )
    child = _buckets(structure, buckets.bucket_size, _layouts.children(buckets.lengths, ratio))
    first = argmember if reduce in ("min", "max") else None
    return Pooling(pooled, pooled_points, child, members, ratio, reduce, first, buckets)


def bucket_unpool(child_features: torch.Tensor, pooled: Pooling, skip: torch.Tensor | None = None) -> torch.Tensor:
    """`gpu3d.bucket_unpool` with the gradients of child_features and skip. Autocast changes no dtype.

    Parameters
    ----------
    child_features : Tensor [child slots, C]
        As in `gpu3d.bucket_unpool`.
    pooled : Pooling
        Which slots became which child.
    skip : Tensor [num_slots, C], optional
        Rows of the parent's slots, of child_features' dtype, that are added.

    Returns
    -------
    Tensor [num_slots, C]
    """
    _check_tensors(child_features=child_features)
    pooling._check_pooling(pooled)
    _check_tensors(pooled=pooled.members)
    if skip is not None:
        _check_tensors(skip=skip)
    layout = pooled.parent.bucket_size, pooled.parent.lengths, pooled.ratio
    tensors = child_features, pooled.members
    return _run("bucket_unpool", *((tensors, (None, *layout)) if skip is None else ((*tensors, skip), layout)))


def chamfer(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    x_lengths: Sequence[int] | None = None,
    y_lengths: Sequence[int] | None = None,
    squared: bool = False,
    reduction: str = "mean",
) -> torch.Tensor:
    """`gpu3d.chamfer` with the gradients of x and y. Under autocast both are cast to float32.

    Parameters
    ----------
    x, y : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.chamfer`; tensors, not a NeighborIndex.
    x_lengths, y_lengths, squared, reduction
        As in `gpu3d.chamfer`.

    Returns
    -------
    Tensor float32 [], or [B] for reduction "none"
    """
    _check_tensors(x=x, y=y)
    packed_x, x_lengths = _arrays.pack_points(x, x_lengths, "x", "x_lengths", dimensions=(2, 3))
    packed_y, y_lengths = _arrays.pack_points(y, y_lengths, "y", "y_lengths", dimensions=(2, 3))
    loss, _ = _run("chamfer", (packed_x, packed_y), (x_lengths, y_lengths, squared, reduction))
    return loss


def apml(
    pred: torch.Tensor,
    target: torch.Tensor,
    *,
    pred_lengths: Sequence[int] | None = None,
    target_lengths: Sequence[int] | None = None,
    p_min: float = 0.8,
    threshold: float = 1e-8,
    iterations: int = 20,
    symmetrize: str = "mean",
    reduction: str = "mean",
    max_entries: int | None = None,
) -> torch.Tensor:
    """`gpu3d.apml` with the gradients of pred and target, the plan held constant. Under autocast both are float32.

    Parameters
    ----------
    pred, target : Tensor [N, 3], [N, 2], [B, n, 3] or [B, n, 2]
        As in `gpu3d.apml`.
    pred_lengths, target_lengths, p_min, threshold, iterations, symmetrize, reduction
        As in `gpu3d.apml`.
    max_entries : int, optional
        As in `gpu3d.apml`; under torch.compile and while a CUDA graph is captured the default is 16 * (N + M), for the
        entries cannot be counted there.

    Returns
    -------
    Tensor float32 [], or [B] for reduction "none"
    """
    _check_tensors(pred=pred, target=target)
    dimensions = (2, 3)
    packed_pred, pred_lengths = _arrays.pack_points(pred, pred_lengths, "pred", "pred_lengths", dimensions)
    packed_target, target_lengths = _arrays.pack_points(target, target_lengths, "target", "target_lengths", dimensions)
    if max_entries is None and (torch.compiler.is_compiling() or _capturing(pred)):
        max_entries = 16 * (packed_pred.shape[0] + packed_target.shape[0])
    with_grad = torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)
    lengths = pred_lengths, target_lengths
    options = p_min, threshold, iterations, symmetrize, reduction, max_entries
    loss, _, _ = _run("apml", (packed_pred, packed_target), (*lengths, *options, with_grad))
    return loss


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- modules -------------------------------------------------------------------------------------------------------


class BucketAttention(torch.nn.Module):
    """Multi-head attention within scopes of buckets: a projection to q, k and v, attention, and a projection back.

    Parameters
    ----------
    channels : int
        Of the rows in and out.
    heads : int
        channels / heads, the head dimension, is at most 128 and divisible by 8.
    bias : bool
        Of both projections.
    scale : float, optional
        Factor of the scores. Default: 1 / sqrt(channels / heads).
    device, dtype
        Of the parameters, as in torch.nn.Linear.

    Notes
    -----
    q, k and v are views of one packed projection [num_slots, 3, heads, channels / heads]; nothing is copied. Padding
    rows must be finite, as those of `scatter` are: the gradient of a weight is a sum over all rows.

    Examples
    --------
    >>> buckets = bucketize(torch.rand(1000, 3), 64)
    >>> block = BucketAttention(channels=32, heads=4)
    >>> x = scatter(torch.rand(1000, 32), buckets)
    >>> block(x, buckets, scopes(buckets, 4, shift=2)).shape
    torch.Size([1024, 32])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        bias: bool = True,
        scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads or channels // heads % 8 or not 0 < channels // heads <= 128:
            raise ValueError(
                f"channels / heads, the head dimension, must be at most 128 and divisible by 8, got {channels} "
                f"channels for {heads} heads."
            )
        self.heads, self.scale = heads, scale
        self.qkv = torch.nn.Linear(channels, 3 * channels, bias=bias, device=device, dtype=dtype)
        self.projection = torch.nn.Linear(channels, channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, buckets: Buckets, scopes: Scopes) -> torch.Tensor:
        """Rows [num_slots, channels] in slot order to rows of the same shape."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        return self.projection(bucket_attention(q, k, v, buckets, scopes, scale=self.scale).flatten(1))

    def extra_repr(self) -> str:
        """What print shows beside the projections."""
        return f"heads={self.heads}, scale={self.scale}"


class ChamferLoss(torch.nn.Module):
    """The Chamfer distance as a module: `chamfer` with its options kept.

    Parameters
    ----------
    squared, reduction
        As in `chamfer`.

    Examples
    --------
    >>> x = torch.rand(2, 100, 3, requires_grad=True)
    >>> ChamferLoss(squared=True)(x, torch.rand(2, 80, 3)).backward()
    >>> x.grad.shape
    torch.Size([2, 100, 3])
    """

    def __init__(self, *, squared: bool = False, reduction: str = "mean") -> None:
        super().__init__()
        self.squared, self.reduction = squared, reduction

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        x_lengths: Sequence[int] | None = None,
        y_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The loss of x and y, which are packed as in `chamfer`."""
        options: dict[str, Any] = {"squared": self.squared, "reduction": self.reduction}
        return chamfer(x, y, x_lengths=x_lengths, y_lengths=y_lengths, **options)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"squared={self.squared}, reduction={self.reduction!r}"


class APMLLoss(torch.nn.Module):
    """The APML loss as a module: `apml` with its options kept.

    Parameters
    ----------
    p_min, threshold, iterations, symmetrize, reduction, max_entries
        As in `apml`.

    Examples
    --------
    >>> pred = torch.rand(2, 100, 3, requires_grad=True)
    >>> APMLLoss(iterations=10)(pred, torch.rand(2, 100, 3)).backward()
    >>> pred.grad.shape
    torch.Size([2, 100, 3])
    """

    def __init__(
        self,
        *,
        p_min: float = 0.8,
        threshold: float = 1e-8,
        iterations: int = 20,
        symmetrize: str = "mean",
        reduction: str = "mean",
        max_entries: int | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "p_min": p_min,
            "threshold": threshold,
            "iterations": iterations,
            "symmetrize": symmetrize,
            "reduction": reduction,
            "max_entries": max_entries,
        }

    def forward(
        self,
        pred: torch.Tensor,
        target: torch.Tensor,
        pred_lengths: Sequence[int] | None = None,
        target_lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The loss of pred and target, which are packed as in `apml`."""
        return apml(pred, target, pred_lengths=pred_lengths, target_lengths=target_lengths, **self.options)

    def extra_repr(self) -> str:
        """What print shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
