# SPDX-License-Identifier: Apache-2.0
"""Hashes of the bits of every op's results. They show whether a change of the library changes a result.

`python tests/result_hashes.py --write` stores them in tests/result_hashes.json. `--check` computes them again and
prints each hash that differs. Hashes of the CPU path are stored under "numpy", and those of a GPU under its
architecture. All libraries that run a case (CuPy, torch and JAX on a GPU; NumPy, torch and JAX on the CPU) must give
the same bits, so there is one hash for all of them. If they differ, each library has its own, and --write says so.

Under "numpy" are only results that are the same on every CPU. Those of attention depend on BLAS, and those of APML on
exp and log. Inputs are uniform numbers of PCG64 after additions and multiplications, which round alike on every
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import gpu3d

STORED = Path(__file__).resolve().parent / "result_hashes.json"

# ---- the table of cases --------------------------------------------------------------------------------------------

HASHES = ("zorder_div", "zorder_mod", "xor_div", "xor_mod")
BALANCES = ("spill", "probe")
DTYPES = ("float32", "float64", "float16", "bfloat16")
NARROW = ("float16", "bfloat16", "float32")  # the dtypes of features on a GPU
LAYOUTS = ("strided", "misaligned", "every second")
REDUCTIONS = ("mean", "sum", "none")
RAGGED = ("ragged", "hundred")  # batches with empty clouds
FILLED = ("filled", "filled hundred")  # batches without empty clouds, for losses
EVERY, PLAIN, GPU, TENSORS = "numpy cupy torch jax", "numpy cupy torch", "cupy torch jax", "cupy torch"

# Each entry has an op, its options and its libraries. A tuple lists several values of an option; the cases are all
# combinations.
TABLE: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("bucketize", {"hash": HASHES, "balance": BALANCES, "dtype": "float32", "cloud": RAGGED}, EVERY),
    ("bucketize", {"hash": HASHES, "balance": BALANCES, "dtype": DTYPES[1:], "cloud": "ragged"}, PLAIN),
    ("bucketize", {"balance": BALANCES, "dtype": ("float32", "float64"), "voxel_size": (0.5, "per_axis")}, EVERY),
    ("bucketize", {"hash": HASHES, "dtype": ("float32", "bfloat16"), "cloud": ("merge", "radix")}, PLAIN),
    ("bucketize", {"dtype": "float64", "cloud": ("far", "merge", "radix"), "voxel_size": (None, "per_axis")}, PLAIN),
    ("bucketize", {"balance": BALANCES, "hash": HASHES[::2], "cloud": ("nan", "equal", "lattice", "batch")}, PLAIN),
    ("bucketize", {"balance": "probe", "cloud": "merge", "seed": (0, 7)}, PLAIN),
    ("bucketize", {"balance": BALANCES, "size": (16, 512, 16384), "cloud": ("ragged", "merge")}, PLAIN),
    ("bucketize", {"dtype": DTYPES, "layout": LAYOUTS, "cloud": "tile"}, PLAIN),
    ("bucketize", {"cloud": ("no point", "no cloud")}, EVERY),
    ("bucket_quality", {"balance": BALANCES, "dtype": DTYPES, "cloud": "ragged"}, "cupy"),
    ("move", {"dtype": DTYPES, "shape": ((), (3,), (64,))}, PLAIN),
    ("move", {"dtype": DTYPES, "shape": (2, 5)}, EVERY),
    ("move", {"dtype": ("int8", "uint8", "int32", "int64", "bool", "complex64"), "shape": ((), (3,), (16,))}, PLAIN),
    ("move", {"dtype": ("float16", "int32"), "shape": ((3,), (0,)), "fill": (-1, 7), "cloud": RAGGED}, PLAIN),
    ("move", {"dtype": ("bfloat16", "float32"), "shape": (5,), "fill": (1.5, -0.0, float("nan"))}, EVERY),
    ("move", {"dtype": NARROW, "shape": (5,), "layout": LAYOUTS}, PLAIN),
    ("scopes", {"size": (1, 3, 8), "shift": (0, 2, -1), "stride": (1, 2), "cloud": RAGGED}, PLAIN),
    ("scopes", {"size": 4, "shift": (0, 1), "stride": (1, 3)}, EVERY),
    ("scopes", {"table": "reversed", "cloud": RAGGED}, "numpy cupy"),
    ("attention", {"dtype": NARROW, "width": (16, 24, 32, 64, 128), "lse": (True, False)}, TENSORS),
    ("attention", {"dtype": NARROW, "width": (16, 24, 64), "scale": (None, 0.3)}, GPU),
    ("attention", {"dtype": NARROW, "width": 32, "bucket": (16, 512), "window": (1, 4), "cloud": "batch"}, TENSORS),
    ("attention", {"dtype": NARROW, "width": (32, 128), "shift": (0, 1), "stride": (1, 2), "cloud": RAGGED}, TENSORS),
    ("attention", {"dtype": NARROW, "width": (24, 64), "layout": ("packed qkv", *LAYOUTS), "cloud": "tile"}, TENSORS),
    ("pool", {"reduce": ("mean", "sum", "min", "max"), "ratio": (2, 4, 8), "dtype": NARROW, "cloud": "ragged"}, PLAIN),
    ("pool", {"reduce": ("mean", "sum", "min", "max"), "ratio": (2, 8), "dtype": NARROW, "columns": 8}, EVERY),
    ("pool", {"reduce": ("mean", "max"), "dtype": NARROW, "points": DTYPES, "cloud": "hundred"}, PLAIN),
    ("pool", {"reduce": ("sum", "min"), "dtype": NARROW, "columns": (0, 1, 3, 64, 130), "cloud": "tile"}, PLAIN),
    ("pool", {"reduce": ("mean", "max"), "dtype": NARROW, "layout": LAYOUTS, "cloud": "tile"}, PLAIN),
    ("pool", {"reduce": ("mean", "max"), "bucket": (16, 2048), "cloud": ("ragged", "nan", "equal", "no point")}, PLAIN),
    ("pool", {"reduce": ("mean", "max"), "dtype": "float64"}, "numpy"),
    ("unpool", {"skip": (False, True), "ratio": (2, 4, 8), "dtype": NARROW, "cloud": RAGGED}, PLAIN),
    ("unpool", {"skip": (False, True), "dtype": NARROW, "columns": 8}, EVERY),
    ("unpool", {"skip": (False, True), "dtype": NARROW, "layout": LAYOUTS, "columns": (3, 64), "cloud": "tile"}, PLAIN),
    ("knn", {"k": (1, 2, 8, 40, 64), "dtype": "float32", "cloud": RAGGED}, PLAIN),
    ("knn", {"k": (1, 8), "dtype": DTYPES[1:], "cloud": ("ragged", "batch")}, PLAIN),
    ("knn", {"k": (2, 8), "dtype": ("float32+float64", "float64+float32", "float16+bfloat16"), "axes": (3, 2)}, PLAIN),
    ("knn", {"k": (1, 8), "dtype": ("float32", "float64"), "axes": 2, "cloud": RAGGED}, PLAIN),
    ("knn", {"k": (1, 40), "dtype": ("float32", "float64"), "cloud": ("nan", "equal", "lattice")}, PLAIN),
    ("knn", {"k": (1, 8), "dtype": ("float64", "float32+float64"), "cloud": "far", "axes": (3, 2)}, PLAIN),
    ("knn", {"k": (1, 8), "dtype": ("float32", "float64"), "cloud": ("merge", "radix")}, "cupy"),
    ("knn", {"k": 8, "dtype": DTYPES, "layout": LAYOUTS, "cloud": "tile"}, PLAIN),
    ("knn", {"k": (2, 64), "dtype": ("float32", "float64"), "of": ("itself", "index", "its index")}, "numpy cupy"),
    ("radius", {"room": (None, 60_000, 16), "dtype": DTYPES, "cloud": "ragged"}, PLAIN),
    ("radius", {"room": (None, 60_000), "dtype": ("float32", "float32+float64"), "axes": 2, "cloud": RAGGED}, PLAIN),
    ("radius", {"room": (None, 60_000), "dtype": "float64", "cloud": ("far", "nan"), "axes": (3, 2)}, PLAIN),
    ("radius", {"radius": (0, 0.125, 1e30), "room": (2_000_000, 16), "cloud": ("lattice", "equal", "nan")}, PLAIN),
    ("radius", {"radius": 0.4, "room": (None, 900_000), "dtype": ("float32", "float64"), "cloud": "merge"}, "cupy"),
    ("radius", {"room": None, "dtype": ("float32", "float64"), "layout": LAYOUTS, "cloud": "tile"}, PLAIN),
    ("radius", {"room": (None, 60_000), "of": ("itself", "index", "its index")}, "numpy cupy"),
    ("farthest", {"dtype": DTYPES, "cloud": ("ragged", "hundred", "lattice", "nan"), "axes": (3, 2)}, "numpy"),
    ("farthest", {"start": 3, "cloud": ("merge", "far", "equal", "batch")}, "numpy"),
    ("voxels", {"reduce": ("mean", "sum", "min", "max"), "dtype": DTYPES, "cloud": RAGGED}, "numpy"),
    ("voxels", {"size": (0.25, 100.0), "cloud": ("far", "nan", "lattice", "merge"), "dtype": DTYPES[:2]}, "numpy"),
    ("chamfer", {"squared": (False, True), "reduction": REDUCTIONS, "dtype": "float32", "cloud": "filled"}, EVERY),
    ("chamfer", {"reduction": REDUCTIONS, "dtype": DTYPES, "cloud": "filled hundred"}, PLAIN),
    ("chamfer", {"squared": (False, True), "reduction": REDUCTIONS, "dtype": DTYPES[1:], "cloud": "filled"}, PLAIN),
    ("chamfer", {"dtype": ("float32+float64", "float64+float32", "float16+bfloat16"), "axes": (3, 2)}, EVERY),
    ("chamfer", {"squared": (False, True), "dtype": DTYPES, "axes": 2, "cloud": FILLED}, PLAIN),
    ("chamfer", {"squared": (False, True), "dtype": "float64", "cloud": "far", "axes": (3, 2)}, EVERY),
    ("chamfer", {"squared": (False, True), "reduction": "none", "cloud": ("nan", "equal", "lattice", "batch")}, EVERY),
    ("chamfer", {"squared": (False, True), "dtype": ("float32", "float64"), "cloud": ("merge", "radix")}, TENSORS),
    ("chamfer", {"dtype": DTYPES, "layout": LAYOUTS, "cloud": "tile"}, PLAIN),
    ("chamfer", {"dtype": ("float32", "float64"), "of": ("index", "two indices"), "cloud": FILLED}, "numpy cupy"),
    ("chamfer", {"gradient": (True, False), "dtype": ("float32", "float64"), "cloud": "tile"}, EVERY),
    ("chamfer", {"weight": "torch", "reduction": REDUCTIONS, "dtype": DTYPES, "cloud": "filled"}, "torch"),
    ("chamfer", {"weight": "jax", "reduction": ("mean", "none"), "dtype": ("float32", "float16")}, "jax"),
    ("apml", {"symmetrize": ("mean", "min"), "reduction": REDUCTIONS, "room": (None, 90_000, 16)}, TENSORS),
    ("apml", {"symmetrize": ("mean", "min"), "room": 90_000, "dtype": DTYPES, "axes": (3, 2)}, GPU),
    ("apml", {"room": (None, 90_000), "dtype": DTYPES, "cloud": "filled hundred"}, TENSORS),
    ("apml", {"room": (None, 90_000), "dtype": ("float32+float64", "float64+float32", "float16+bfloat16")}, TENSORS),
    ("apml", {"room": (None, 90_000), "dtype": "float64", "cloud": "far", "axes": (3, 2)}, TENSORS),
    ("apml", {"room": 90_000, "reduction": "none", "cloud": ("nan", "lattice", "batch")}, TENSORS),
    ("apml", {"room": 90_000, "cloud": ("nan", "lattice", "batch"), "symmetrize": "min"}, TENSORS),
    ("apml", {"room": (None, 900_000), "dtype": ("float32", "float64"), "cloud": "merge"}, "cupy"),
    ("apml", {"room": (None, 90_000), "dtype": DTYPES, "layout": LAYOUTS, "cloud": "tile"}, TENSORS),
    ("apml", {"room": 90_000, "p_min": 0.5, "threshold": 1e-4, "iterations": (1, 7)}, GPU),
    ("apml", {"gradient": (True, False), "room": (None, 90_000, 16), "cloud": "tile"}, TENSORS),
    ("apml", {"weight": "torch", "room": 90_000, "reduction": REDUCTIONS, "dtype": DTYPES, "cloud": "filled"}, "torch"),
    ("apml", {"weight": "jax", "room": 90_000, "reduction": ("mean", "none"), "dtype": ("float32", "float16")}, "jax"),
    ("apml_plan", {"symmetrize": ("mean", "min"), "dtype": ("float32", "float64"), "cloud": (*FILLED, "nan")}, TENSORS),
    ("apml_plan", {"dtype": "float64", "cloud": "far", "axes": (3, 2)}, TENSORS),
    ("apml_plan", {"room": (None, 900_000), "cloud": "merge"}, "cupy"),
)


class Case(NamedTuple):
    name: str  # op/value/..., in the order of the table
    op: str
    options: dict[str, Any]
    libraries: tuple[str, ...]


def _cases() -> dict[str, Case]:
    cases = {}
    for op, options, libraries in TABLE:
        values = [_values(key, value) for key, value in options.items()]
        for combined in itertools.product(*values):
            chosen = dict(zip(options, combined, strict=True))
            parts = [value if isinstance(value, str) else f"{key}={value}" for key, value in chosen.items()]
            case = Case("/".join((op, *parts)), op, chosen, tuple(libraries.split()))
            assert case.name not in cases, f"two cases are called {case.name}"
            cases[case.name] = case
    return cases


def _values(key: str, value: Any) -> Sequence[Any]:
    """The values of an option in the table. A single `shape` is a tuple too."""
    listed = isinstance(value, tuple) and not (key == "shape" and value and isinstance(value[0], int))
    return value if listed else (value,)


# ---- inputs --------------------------------------------------------------------------------------------------------


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _hundred(least: int) -> tuple[int, ...]:
    return tuple(np.maximum((_generator(1).random(100) * 160 - 20).astype(int), least).tolist())


LENGTHS: dict[str, tuple[int, ...]] = {
    "tile": (3000,),
    "merge": (50_000,),
    "radix": (200_000,),
    "ragged": (700, 0, 1, 513, 1400),
    "hundred": _hundred(0),
    "filled": (700, 1, 513, 64, 1400),
    "filled hundred": _hundred(1),
    "far": (900, 1100),
    "nan": (900, 1100),
    "equal": (500, 300),
    "lattice": (900, 1100),
    "batch": (600,) * 4,  # as an array [4, 600, 3]
    "no point": (0,),
    "no cloud": (),
}


@functools.cache
def cloud(name: str, axes: int = 3, lengths: tuple[int, ...] | None = None, seed: int = 0) -> np.ndarray:
    """Points float64 [N, axes] on a hilly slab of uneven density. Default lengths are those of the cloud's name."""
    count = sum(LENGTHS[name] if lengths is None else lengths)
    u = _generator(2).random((count, 3))  # the same for every seed; the seed moves each point a little
    u += 0.003 * (_generator(3 + seed).random((count, 3)) - 0.5)
    x, y = 80 * u[:, 0] * u[:, 0] - 40, 60 * u[:, 1] - 30
    points = np.stack([x, y, 0.002 * (x * x - y * y) + u[:, 2]], 1)
    if name == "far":
        points += [5e6, -3e6, 2e3]
    elif name == "equal":
        points[:] = 1.5
    elif name == "lattice":
        points = np.floor(u * 9) / 8
    elif name == "nan":
        points[5::90, seed % 3], points[11::200, 1] = np.nan, np.inf
    return points[:, :axes]


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _numbers(shape: Sequence[int], dtype: str, seed: int = 9) -> np.ndarray:
    """Numbers around 0, no two rows equal; for an integer dtype over its whole range."""
    values = np.asarray(_generator(seed).random(tuple(shape))) * 4 - 2
    if dtype in ("int8", "int32", "int64"):
        values = np.floor(values * 2.0 ** (8 * _dtype(dtype).itemsize - 2))
    if dtype in ("uint8", "bool"):
        values = np.floor((values + 2) * (64 if dtype == "uint8" else 0.5))
    return np.asarray(values, _dtype(dtype))


# ---- libraries -----------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    """Runs the cases: gpu3d's functions on arrays of one library, on the CPU or on a GPU."""

    name: str
    gpu3d: Any  # the functions; scatter and gather take buckets as second argument
    array: Callable[[np.ndarray], Any]
    host: Callable[[Any], np.ndarray]
    run: Callable[..., Any]  # calls a function with arrays
    gradients: Callable[..., Any] | None  # of a function, its inputs and the gradient of its first result; None: plain


def _functions(*modules: Any) -> SimpleNamespace:
    """The plain functions, replaced by those of gpu3d.interop where it has them."""
    functions = {
        "scatter": lambda x, buckets, fill=0: buckets.scatter(x, fill),
        "gather": lambda y, buckets: buckets.gather(y),
    }
    for module in (gpu3d, *modules):
        functions.update({name: getattr(module, name) for name in module.__all__})
    return SimpleNamespace(**functions)


def _call(function: Callable[..., Any], *arrays: Any) -> Any:
    return function(*arrays)


def _numpy() -> Library:
    return Library("numpy", _functions(), np.copy, np.asarray, _call, None)


def _cupy() -> Library:
    import cupy

    return Library("cupy", _functions(), cupy.asarray, cupy.asnumpy, _call, None)


def _torch(device: str) -> Library:
    import torch

    from gpu3d.interop import torch as interop

    def array(x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(x.copy()).to(device)

    def host(x: Any) -> np.ndarray:
        x = x.detach().cpu()
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    def gradients(function: Callable[..., Any], inputs: Sequence[Any], gradient: Any) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        first, *others = function(*leaves)
        (first * gradient).sum().backward()
        return first, *others, *(x.grad for x in leaves)

    return Library("torch", _functions(interop), array, host, _call, gradients)


def _jax(device: str) -> Library:
    import jax

    from gpu3d.interop import jax as interop

    where = jax.devices(device)[0]

    def run(function: Callable[..., Any], *arrays: Any) -> Any:
        return jax.jit(function)(*arrays)

    def gradients(function: Callable[..., Any], inputs: Sequence[Any], gradient: Any) -> tuple[Any, ...]:
        def weighted(inputs: Sequence[Any], gradient: Any) -> Any:
            first, *others = function(*inputs)
            return (first * gradient).sum(), (first, *others)

        (_, results), pulled = jax.jit(jax.value_and_grad(weighted, has_aux=True))(tuple(inputs), gradient)
        return *results, *pulled

    return Library("jax", _functions(interop), lambda x: jax.device_put(x, where), np.asarray, run, gradients)


@contextlib.contextmanager
def _jax_with_float64(device: str) -> Iterator[Library]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the GPU's memory
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        with jax.default_device(jax.devices(device)[0]):
            yield _jax(device)
    finally:
        jax.config.update("jax_enable_x64", before)


def library(name: str, on_gpu: bool) -> contextlib.AbstractContextManager[Library]:
    """A context manager that gives the library of this name."""
    if name == "jax":
        return _jax_with_float64("gpu" if on_gpu else "cpu")
    if name == "torch":
        return contextlib.nullcontext(_torch("cuda" if on_gpu else "cpu"))
    return contextlib.nullcontext(_cupy() if name == "cupy" else _numpy())


def why_not(name: str, on_gpu: bool) -> str:
    """Why this library cannot run here; empty if it can."""
    try:
        module = importlib.import_module(name)
        if name == "cupy":
            module.cuda.runtime.getDeviceCount()
        if name == "torch" and on_gpu and not module.cuda.is_available():
            return "this torch finds no GPU"
        if name == "jax" and on_gpu:
            module.devices("gpu")
    except ImportError as error:
        return str(error)
    except RuntimeError as error:  # the driver errors of CuPy and JAX are subclasses
        return f"no usable GPU: {error}"
    return ""


# ---- ops -----------------------------------------------------------------------------------------------------------


def _placed(lib: Library, x: np.ndarray, layout: str = "") -> Any:
    """The array in the library, with the memory layout `layout`."""
    if layout == "strided":
        return lib.array(np.concatenate([x, x[..., :1]], -1))[..., :-1]
    if layout == "misaligned":
        return lib.array(np.append(x.reshape(-1)[:1], x))[1:].reshape(x.shape)
    if layout == "every second":
        return lib.array(np.repeat(x, 2, axis=0))[::2]
    return lib.array(x)


class _Clouds(NamedTuple):
    points: Any
    lengths: tuple[int, ...] | None  # None: they follow from the array's shape


def _clouds(
    lib: Library,
    name: str,
    dtype: str,
    layout: str = "",
    axes: int = 3,
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
) -> _Clouds:
    lengths = LENGTHS[name] if lengths is None else lengths
    points = cloud(name, axes, lengths, seed).astype(_dtype(dtype))
    if name == "batch":
        return _Clouds(_placed(lib, points.reshape(len(lengths), -1, axes), layout), None)
    return _Clouds(_placed(lib, points, layout), lengths)


def _layout(lib: Library, name: str, bucket: int = 64) -> tuple[Any, Any]:
    """Buckets of a float32 cloud, and its points in slot order."""
    points, lengths = _clouds(lib, "tile" if name == "batch" else name, "float32", lengths=LENGTHS[name])
    buckets = lib.gpu3d.bucketize(points, bucket, lengths=lengths, check_finite=False)
    return buckets, lib.gpu3d.scatter(points, buckets)


def _structure(buckets: Any) -> list[Any]:
    offsets = np.array(buckets.bucket_offsets)
    return [buckets.slot_to_point, buckets.point_to_slot, buckets.moved, offsets]


def bucketize(
    lib: Library, *, cloud: str = "ragged", dtype: str = "float32", layout: str = "", size: int = 64, **options: Any
) -> list[Any]:
    points, lengths = _clouds(lib, cloud, dtype, layout)
    call = functools.partial(lib.gpu3d.bucketize, bucket_size=size, lengths=lengths, check_finite=False, **options)
    return _structure(lib.run(call, points))


def bucket_quality(lib: Library, *, cloud: str, dtype: str, balance: str) -> list[Any]:
    points, lengths = _clouds(lib, cloud, dtype)
    buckets = gpu3d.bucketize(points, 64, lengths=lengths, balance=balance, check_finite=False)
    return [np.array(gpu3d.bucket_quality(points, buckets))]


def move(
    lib: Library, *, dtype: str, shape: tuple[int, ...], cloud: str = "ragged", fill: Any = 0, layout: str = ""
) -> list[Any]:
    buckets, _ = _layout(lib, cloud)
    x = _placed(lib, _numbers((sum(LENGTHS[cloud]), *shape), dtype), layout)
    y = _placed(lib, _numbers((buckets.num_slots, *shape), dtype, 10), layout)

    def scatter(x: Any) -> list[Any]:
        return [lib.gpu3d.scatter(x, buckets, fill)]

    def gather(y: Any) -> list[Any]:
        return [lib.gpu3d.gather(y, buckets)]

    if dtype not in DTYPES:
        return [*lib.run(scatter, x), *lib.run(gather, y)]
    if lib.gradients is None:  # scatter and gather are each the gradient of the other, with 0 in padding
        return [*scatter(x), *gather(y), *gather(y), lib.gpu3d.scatter(x, buckets)]
    scattered, dx = lib.gradients(scatter, [x], y)
    gathered, dy = lib.gradients(gather, [y], x)
    return [scattered, gathered, dx, dy]


def scopes(lib: Library, *, cloud: str = "ragged", table: str = "", **options: Any) -> list[Any]:
    buckets, _ = _layout(lib, cloud, 16)
    if table:  # each bucket is a scope of its own, in reverse order
        reversed_buckets = np.arange(buckets.num_buckets, dtype=np.int32)[::-1, None]
        return [lib.gpu3d.scopes(buckets, table=lib.array(reversed_buckets)).table]
    return [lib.gpu3d.scopes(buckets, **options).table]


def attention(
    lib: Library,
    *,
    dtype: str,
    width: int,
    cloud: str = "ragged",
    bucket: int = 64,
    window: int = 2,
    shift: int = 1,
    stride: int = 1,
    lse: bool = True,
    scale: float | None = None,
    layout: str = "",
) -> list[Any]:
    buckets, _ = _layout(lib, cloud, bucket)
    made = lib.gpu3d.scopes(buckets, window, shift=shift, stride=stride)
    shape = buckets.num_slots, 2, width
    if layout == "packed qkv":
        packed = lib.array(np.stack([_numbers(shape, dtype, seed) for seed in range(3)], 1))
        q, k, v = (packed[:, i] for i in range(3))
    else:
        q, k, v = (_placed(lib, _numbers(shape, dtype, seed), layout) for seed in range(3))
    dout = _placed(lib, _numbers(shape, dtype, 3), "" if layout == "packed qkv" else layout)
    call = functools.partial(lib.gpu3d.bucket_attention, buckets=buckets, scopes=made, scale=scale)
    if not lse:
        return [lib.run(call, q, k, v)]
    call = functools.partial(call, return_lse=True)
    if lib.gradients is not None:
        return lib.gradients(call, [q, k, v], dout)
    out, sums = call(q, k, v)
    return [out, sums, *gpu3d.bucket_attention_backward(dout, q, k, v, out, sums, buckets, made, scale=scale)]


def pool(
    lib: Library,
    *,
    reduce: str,
    ratio: int = 2,
    dtype: str = "float32",
    points: str = "float32",
    columns: int = 5,
    bucket: int = 64,
    cloud: str = "ragged",
    layout: str = "",
) -> list[Any]:
    buckets, _ = _layout(lib, cloud, bucket)
    host_points = _clouds(lib, cloud, points)
    slots = _in_layout(lib, lib.gpu3d.scatter(host_points.points, buckets), layout)
    features = _placed(lib, _numbers((buckets.num_slots, columns), dtype), layout)

    def call(features: Any) -> list[Any]:
        pooled = lib.gpu3d.bucket_pool(features, slots, buckets, ratio=ratio, reduce=reduce)
        argmember = [] if pooled.argmember is None else [pooled.argmember]
        return [pooled.features, pooled.points, pooled.members, *argmember, *_structure(pooled.buckets)]

    children = [-(-n // ratio) for n in buckets.lengths]
    child_slots = sum(-(-n // bucket) * bucket for n in children)
    dchild = _placed(lib, _numbers((child_slots, columns), dtype, 10), layout)
    if lib.gradients is not None:
        return lib.gradients(call, [features], dchild)
    pooled = gpu3d.bucket_pool(features, slots, buckets, ratio=ratio, reduce=reduce)
    return [*call(features), gpu3d.bucket_pool_backward(dchild, pooled)]


def _in_layout(lib: Library, x: Any, layout: str) -> Any:
    return _placed(lib, np.ascontiguousarray(lib.host(x)), layout) if layout else x


def unpool(
    lib: Library,
    *,
    skip: bool,
    dtype: str,
    ratio: int = 2,
    columns: int = 5,
    cloud: str = "ragged",
    layout: str = "",
) -> list[Any]:
    buckets, slots = _layout(lib, cloud)
    pooled = lib.gpu3d.bucket_pool(slots, slots, buckets, ratio=ratio)
    child = _placed(lib, _numbers((pooled.buckets.num_slots, columns), dtype), layout)
    rows = [_placed(lib, _numbers((buckets.num_slots, columns), dtype, seed), layout) for seed in (10, 11)]
    inputs, dout = ([child, rows[0]] if skip else [child]), rows[1]

    def call(child: Any, *skip: Any) -> list[Any]:
        return [lib.gpu3d.bucket_unpool(child, pooled, *skip)]

    if lib.gradients is not None:
        return lib.gradients(call, inputs, dout)
    return [*call(*inputs), *gpu3d.bucket_unpool_backward(dout, pooled)[: len(inputs)]]


def _search(
    lib: Library, cloud: str, dtype: str, axes: int, layout: str, of: str
) -> tuple[Any, Any, dict[str, Sequence[int] | None]]:
    """A query, the points to search, and their lengths, as knn and radius_search take them."""
    first, _, second = dtype.partition("+")
    query = _clouds(lib, cloud, first, layout, axes)
    if of in ("itself", "its index"):
        points = query
    else:
        lengths = tuple(n // 2 + 64 for n in LENGTHS[cloud])
        points = _clouds(lib, cloud, second or first, layout, axes, lengths, seed=1)
    if of.endswith("index"):
        index = gpu3d.neighbor_index(points.points, lengths=points.lengths)
        return query.points, index, {"query_lengths": query.lengths}
    return query.points, points.points, {"query_lengths": query.lengths, "lengths": points.lengths}


def knn(
    lib: Library,
    *,
    k: int,
    dtype: str = "float32",
    cloud: str = "filled",
    axes: int = 3,
    layout: str = "",
    of: str = "",
) -> list[Any]:
    query, points, lengths = _search(lib, "tile" if of else cloud, dtype, axes, layout, of)
    return lib.gpu3d.knn(query, points, k, **lengths)


def radius(
    lib: Library,
    *,
    room: int | None,
    radius: float = 1.5,
    dtype: str = "float32",
    cloud: str = "filled",
    axes: int = 3,
    layout: str = "",
    of: str = "",
) -> list[Any]:
    query, points, lengths = _search(lib, cloud, dtype, axes, layout, of)
    return lib.gpu3d.radius_search(query, points, radius, max_entries=room, **lengths)


def farthest(
    lib: Library, *, cloud: str = "ragged", dtype: str = "float32", axes: int = 3, start: int = 0, k: int = 40
) -> list[Any]:
    points, lengths = _clouds(lib, cloud, dtype, axes=axes)
    return [lib.run(functools.partial(lib.gpu3d.farthest_points, k=k, lengths=lengths, start=start), points)]


def voxels(
    lib: Library, *, cloud: str = "ragged", dtype: str = "float32", size: float = 4.0, reduce: str = "mean"
) -> list[Any]:
    points, lengths = _clouds(lib, cloud, dtype)
    features = lib.array(_numbers((sum(LENGTHS[cloud]), 5), dtype))
    found = lib.gpu3d.voxel_downsample(points, size, features, lengths=lengths, reduce=reduce)
    return [*found[:4], np.array(found.lengths)]


def _pair(lib: Library, cloud: str, dtype: str, axes: int, layout: str) -> tuple[_Clouds, _Clouds]:
    """Two batches of clouds that are close to each other; the second has fewer points."""
    first, _, second = dtype.partition("+")
    lengths = tuple(n * 3 // 4 + 1 for n in LENGTHS[cloud])
    x = _clouds(lib, cloud, first, layout, axes)
    return x, _clouds(lib, cloud, second or first, layout, axes, lengths, seed=1)


def _loss(lib: Library, name: str, x: _Clouds, y: _Clouds, gradient: bool, weight: str, **options: Any) -> list[Any]:
    """The loss and its gradients. With `weight` they are gradients of weighted losses, otherwise of their sum."""
    call = functools.partial(getattr(lib.gpu3d, name), **options)
    if not gradient:
        return [lib.run(call, x.points, y.points)]
    if lib.gradients is None:
        loss, gradients = getattr(gpu3d, f"{name}_value_and_grad")(x.points, y.points, **options)
        return [loss, *gradients]
    shape = (len(x.lengths or LENGTHS["batch"]),) if options.get("reduction") == "none" else ()
    weights = _numbers(shape, "float32", 12) if weight else np.ones(shape, np.float32)
    return lib.gradients(lambda x, y: [call(x, y)], [x.points, y.points], lib.array(weights))


def chamfer(
    lib: Library,
    *,
    cloud: str = "filled",
    dtype: str = "float32",
    axes: int = 3,
    layout: str = "",
    of: str = "",
    gradient: bool = True,
    weight: str = "",
    **options: Any,
) -> list[Any]:
    x, y = _pair(lib, cloud, dtype, axes, layout)
    if of:
        y = _Clouds(gpu3d.neighbor_index(y.points, lengths=y.lengths), None)
    if of == "two indices":
        x = _Clouds(gpu3d.neighbor_index(x.points, lengths=x.lengths), None)
    lengths = {"x_lengths": x.lengths, "y_lengths": y.lengths}
    return _loss(lib, "chamfer", x, y, gradient, weight, **lengths, **options)


def apml(
    lib: Library,
    *,
    room: int | None,
    cloud: str = "filled",
    dtype: str = "float32",
    axes: int = 3,
    layout: str = "",
    gradient: bool = True,
    weight: str = "",
    **options: Any,
) -> list[Any]:
    x, y = _pair(lib, cloud, dtype, axes, layout)
    lengths = {"pred_lengths": x.lengths, "target_lengths": y.lengths}
    return _loss(lib, "apml", x, y, gradient, weight, max_entries=room, **lengths, **options)


def apml_plan(
    lib: Library, *, cloud: str, dtype: str = "float32", axes: int = 3, room: int | None = None, **options: Any
) -> list[Any]:
    x, y = _pair(lib, cloud, dtype, axes, "")
    lengths = {"pred_lengths": x.lengths, "target_lengths": y.lengths}
    return gpu3d.apml_plan(x.points, y.points, **lengths, max_entries=room, **options)


CASES = _cases()
OPS = {name: globals()[name] for name in dict.fromkeys(case.op for case in CASES.values())}

# ---- hashes --------------------------------------------------------------------------------------------------------


def hashed(lib: Library, case: Case) -> str:
    """The first 16 hex digits of SHA-256 over dtypes, shapes and bits of all results. All NaN count as the same."""
    digest = hashlib.sha256()
    for result in OPS[case.op](lib, **case.options):
        x = np.ascontiguousarray(result if isinstance(result, np.ndarray) else lib.host(result))
        if x.dtype == ml_dtypes.bfloat16 or x.dtype.kind in "fc":
            x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
        digest.update(f"{x.dtype.name}{list(x.shape)}".encode() + x.tobytes())
    return digest.hexdigest()[:16]


def architecture() -> str:
    """The architecture that kernels are compiled for on the current GPU."""
    import cupy

    capability = cupy.cuda.Device().compute_capability
    return "sm_90a" if capability == "90" else f"sm_{capability}"


def libraries(op: str, on_gpu: bool) -> list[str]:
    """The libraries that run cases of this op. On the CPU torch and JAX run NumPy's cases and their own."""
    every = [name for case in CASES.values() if case.op == op for name in _of_case(case, on_gpu)]
    return list(dict.fromkeys(every))


def _of_case(case: Case, on_gpu: bool) -> list[str]:
    if not on_gpu and "numpy" not in case.libraries:
        return []
    return [name for name in case.libraries if name != ("numpy" if on_gpu else "cupy")]


def computed(name: str, on_gpu: bool, op: str) -> dict[str, str]:
    """The hash of every case of an op that this library runs, by the case's name."""
    with library(name, on_gpu) as lib:
        cases = [case for case in CASES.values() if case.op == op and name in _of_case(case, on_gpu)]
        return {case.name: hashed(lib, case) for case in cases}


def load() -> dict[str, Any]:
    """The stored hashes by "numpy" or architecture: `made_by`, and `hashes`, one per case or per case and library."""
    return json.loads(STORED.read_text()) if STORED.is_file() else {}


def differing(stored: dict[str, Any], name: str, hashes: dict[str, str]) -> list[str]:
    """One sentence for each of these hashes that differs from the stored one."""
    found = []
    for case, got in hashes.items():
        expected = stored.get(case, "none")
        expected = expected.get(name, "none") if isinstance(expected, dict) else expected
        if got != expected:
            found.append(f"{case} in {name}: {got}, stored is {expected}")
    return found


def _made_by(on_gpu: bool) -> dict[str, Any]:
    versions = {"numpy": np.__version__}
    for name in ("torch", "jax"):
        if not why_not(name, on_gpu):
            versions[name] = importlib.import_module(name).__version__
    if not on_gpu:
        return versions
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    nvrtc = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    gpu = {"gpu": properties["name"].decode(), "multiprocessors": properties["multiProcessorCount"]}
    return {**gpu, "nvrtc": nvrtc, "cupy": cupy.__version__, **versions}


def _everywhere(on_gpu: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield all hashes of each available library, and print how long they took."""
    for name in ("numpy", "cupy", "torch", "jax"):
        ops = [op for op in OPS if name in libraries(op, on_gpu)]
        if not ops:
            continue
        reason = why_not(name, on_gpu)
        if reason:
            print(f"{name} on the {'GPU' if on_gpu else 'CPU'}: left out, {reason}")
            continue
        begin, hashes = time.perf_counter(), {}
        for op in ops:
            hashes |= computed(name, on_gpu, op)
        seconds = time.perf_counter() - begin
        print(f"{name} on the {'GPU' if on_gpu else 'CPU'}: {len(hashes)} cases in {seconds:.1f} s", flush=True)
        yield name, hashes


def write() -> int:
    """Store all hashes that can be computed here; return how many cases differ between libraries."""
    stored, differ = load(), 0
    for on_gpu in (False, True):
        if on_gpu and why_not("cupy", True):
            print(f"no hashes of a GPU: {why_not('cupy', True)}")
            continue
        by_case: dict[str, dict[str, str]] = {}
        for name, hashes in _everywhere(on_gpu):
            for case, value in hashes.items():
                by_case.setdefault(case, {})[name] = value
        agreed = {case: next(iter(of.values())) if len(set(of.values())) == 1 else of for case, of in by_case.items()}
        for case, of in agreed.items():
            if isinstance(of, dict):
                print(f"not the same bits: {case}: {', '.join(f'{name} {value}' for name, value in of.items())}")
                differ += 1
        stored[architecture() if on_gpu else "numpy"] = {"made_by": _made_by(on_gpu), "hashes": agreed}
    STORED.write_text(json.dumps(stored, indent=0) + "\n")
    print(f"{STORED.name}: {sum(len(of['hashes']) for of in stored.values())} hashes, {differ} cases differ by library")
    return differ


def check() -> int:
    """Print every hash that differs from the stored one; return how many."""
    stored, wrong = load(), []
    for on_gpu in (False, True):
        if on_gpu and why_not("cupy", True):
            print(f"GPU not checked: {why_not('cupy', True)}")
            continue
        where = architecture() if on_gpu else "numpy"
        if where not in stored:
            print(f"{where} not checked: {STORED.name} holds hashes of {', '.join(stored) or 'nothing'}")
            continue
        for name, hashes in _everywhere(on_gpu):
            wrong += differing(stored[where]["hashes"], name, hashes)
    print("\n".join([*wrong, f"{len(wrong)} results differ from the stored ones"]))
    return len(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_const", const=write, dest="action", help="store all hashes")
    action.add_argument("--check", action="store_const", const=check, dest="action", help="compare with stored hashes")
    sys.exit(parser.parse_args().action() > 0)
