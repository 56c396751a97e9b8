# SPDX-License-Identifier: Apache-2.0
"""Every op as data, and the checks that all ops must pass. test_contract.py and test_contract_gpu.py run them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import gpu3d
from gpu3d.buckets import num_scopes
from gpu3d.pooling import child_lengths

BUCKET_SIZE, SCOPE_SIZE, RATIO, SAMPLES = 16, 3, 4, 20
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
LENGTHS, OTHERS = (150, 40, 17, 16), (60, 170, 2, 33)  # points of the clouds, and of those they are compared with
EMPTY_LENGTHS, EMPTY_OTHERS = (150, 0, 17, 1, 0), (60, 0, 0, 33, 5)
MANY_LENGTHS = tuple(16 + 7 * b % 40 for b in range(70))  # more clouds than fit into a kernel's arguments
MANY_OTHERS = MANY_LENGTHS[::-1]


# ---- the ops -------------------------------------------------------------------------------------------------------


class Input(NamedTuple):
    """An array that an op takes, under the name of its argument."""

    rows: str  # what a row stands for, a key of `rows_of`
    columns: tuple[int, ...]
    dtype: str | None = None  # None: any of DTYPES; "sums": the dtype of sums of that dtype


class Op(NamedTuple):
    """A function of a place (lengths and layouts) and of named arrays, with named arrays as results."""

    inputs: dict[str, Input]
    call: Callable[..., dict[str, Any]]
    results: dict[str, tuple[str, str | None]]  # what a row stands for, and for indices what they count
    tidy: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict  # host results with one row for each
    capturable: bool = True  # a CUDA graph can capture it, because it reads nothing on the host
    empty_clouds: bool = True
    any_dtype: bool = False  # it moves rows without computing
    float64_on_gpu: bool = True
    alone: bool = False  # its only argument is one array
    large: int = 30_000  # this number of points takes other kernels than a few thousand


class Place(NamedTuple):
    """The lengths and layouts that an op runs with."""

    lengths: tuple[int, ...]
    others: tuple[int, ...]
    buckets: Any
    scopes: Any
    pooled: Any


def rows_of(n: int, m: int) -> dict[str, int]:
    """For each kind of array, its rows for a cloud of n points and one of m points to compare with."""
    buckets = -(-n // BUCKET_SIZE)
    children = child_lengths((n,), RATIO)[0]
    return {
        "point": n,
        "other": m,
        "cloud": 1,
        "bucket": buckets,
        "slot": buckets * BUCKET_SIZE,
        "scope": num_scopes((buckets,), SCOPE_SIZE, 1),
        "child": children,
        "child slot": -(-children // BUCKET_SIZE) * BUCKET_SIZE,
        "sample": SAMPLES,
    }


def spans(kind: str, lengths: Sequence[int], others: Sequence[int]) -> list[slice]:
    """The rows of each cloud in an array of this kind."""
    ends = np.cumsum([0] + [rows_of(n, m)[kind] for n, m in zip(lengths, others, strict=True)]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _bucketize(at: Place, points: Any, **options: Any) -> dict[str, Any]:
    made = gpu3d.bucketize(points, BUCKET_SIZE, lengths=at.lengths, **options)
    return {"slot_to_point": made.slot_to_point, "point_to_slot": made.point_to_slot}


def _attention(at: Place, q: Any, k: Any, v: Any) -> dict[str, Any]:
    out, lse = gpu3d.bucket_attention(q, k, v, at.buckets, at.scopes, return_lse=True)
    return {"out": out, "lse": lse, "alone": gpu3d.bucket_attention(q, k, v, at.buckets, at.scopes)}


def _attention_backward(at: Place, **arrays: Any) -> dict[str, Any]:
    gradients = gpu3d.bucket_attention_backward(**arrays, buckets=at.buckets, scopes=at.scopes)
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def _pool(at: Place, features: Any, points: Any, reduce: str) -> dict[str, Any]:
    pooled = gpu3d.bucket_pool(features, points, at.buckets, ratio=RATIO, reduce=reduce)
    made = {"features": pooled.features, "points": pooled.points, "members": pooled.members}
    if pooled.argmember is not None:
        made["argmember"] = pooled.argmember
    return {**made, "slot_to_child": pooled.buckets.slot_to_point, "child_to_slot": pooled.buckets.point_to_slot}


POOLED = {
    "features": ("child slot", None),
    "points": ("child slot", None),
    "members": ("child slot", "slot"),
    "slot_to_child": ("child slot", "child"),
    "child_to_slot": ("child", "child slot"),
}


def _unpool_backward(at: Place, dout: Any) -> dict[str, Any]:
    return dict(zip(("dchild", "dskip"), gpu3d.bucket_unpool_backward(dout, at.pooled), strict=True))


def _radius(at: Place, query: Any, points: Any, counted: bool) -> dict[str, Any]:
    room = None if counted else 40 * (len(query) + len(points))
    radius = 0.2 if max(at.lengths, default=0) < 1000 else 0.04
    found = gpu3d.radius_search(query, points, radius, query_lengths=at.others, lengths=at.lengths, max_entries=room)
    return found._asdict()


def _filled(results: dict[str, np.ndarray], offsets: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Cut arrays of entries at `offsets` into rows of 300, filled up with -1."""
    index = offsets[:-1, None] + np.arange(300)
    inside = index < offsets[1:, None]
    rows = {name: np.full(index.shape, -1, results[name].dtype) for name in names}
    for name, full in rows.items():
        full[inside] = results[name][index[inside]]
    return rows


def _tidy_radius(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One row of neighbours for each query, filled up with -1."""
    offsets = results["offsets"]
    assert (np.diff(offsets) >= 0).all(), "max_entries was too small"
    return {"count": np.diff(offsets), **_filled(results, offsets, ("indices", "distances"))}


def _both(at: Place, first: str, second: str) -> dict[str, Any]:
    return {f"{first}_lengths": at.lengths, f"{second}_lengths": at.others}


def _chamfer(at: Place, x: Any, y: Any) -> dict[str, Any]:
    given = {**_both(at, "x", "y"), "reduction": "none"}
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, **given)
    return {"loss": loss, "dx": dx, "dy": dy, "alone": gpu3d.chamfer(x, y, squared=True, **given)}


def _directions(at: Place, x: Any, y: Any) -> dict[str, Any]:
    given = _both(at, "x", "y")
    loss, (dx, dy) = gpu3d.chamfer_value_and_grad(x, y, **given, reduction="none", direction="x_to_y")
    far = gpu3d.chamfer(x, y, **given, reduction="points", squared=True)
    return {"loss": loss, "dx": dx, "dy": dy, "of_x": far.x, "of_y": far.y}


def _compare(at: Place, x: Any, y: Any) -> dict[str, Any]:
    return gpu3d.compare_clouds(x, y, **_both(at, "x", "y"), thresholds=(0.1, 0.3))._asdict()


def _apml(at: Place, pred: Any, target: Any, counted: bool) -> dict[str, Any]:
    room = None if counted else 64 * (len(pred) + len(target))
    given = {**_both(at, "pred", "target"), "reduction": "none", "max_entries": room}
    loss, (dx, dy) = gpu3d.apml_value_and_grad(pred, target, **given)
    return {"loss": loss, "dpred": dx, "dtarget": dy, "alone": gpu3d.apml(pred, target, symmetrize="min", **given)}


def _plan(at: Place, pred: Any, target: Any) -> dict[str, Any]:
    plan = gpu3d.apml_plan(pred, target, **_both(at, "pred", "target"))
    return plan._asdict()


def _tidy_plan(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One row of entries for each point of pred, filled up with -1."""
    return {"count": np.diff(results["indptr"]), **_filled(results, results["indptr"], ("cols", "values"))}


def _indexed(at: Place, query: Any, points: Any) -> dict[str, Any]:
    index = gpu3d.neighbor_index(points, lengths=at.lengths)
    return gpu3d.knn(query, index, 1, query_lengths=at.others)._asdict()


def _voxels(at: Place, points: Any, features: Any) -> dict[str, Any]:
    found = gpu3d.voxel_downsample(points, 0.3, features, lengths=at.lengths)
    return {name: x for name, x in found._asdict().items() if name != "lengths"}


def _tidy_voxels(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The row of its voxel for each point, and the first point of the voxel."""
    voxel = results["point_to_voxel"]
    first = np.full(len(results["counts"]), len(voxel), np.int32)
    np.minimum.at(first, voxel, np.arange(len(voxel), dtype=np.int32))
    return {"first": first[voxel], **{name: results[name][voxel] for name in ("points", "features", "counts")}}


SLOTS, HEADS = Input("slot", (5,)), Input("slot", (2, 8))
POINTS, OTHER_POINTS = Input("point", (3,)), Input("other", (3,))
SEARCHED = {"query": OTHER_POINTS, "points": POINTS}
BUCKETED = {"slot_to_point": ("slot", "point"), "point_to_slot": ("point", "slot")}
NEIGHBOURS = {"distances": ("other", None), "indices": ("other", "point")}
TRANSPORTED = {"loss": ("cloud", None), "dpred": ("point", None), "dtarget": ("other", None), "alone": ("cloud", None)}

OPS = {
    "bucketize": Op({"points": POINTS}, _bucketize, BUCKETED, large=600_000, alone=True),
    "bucketize-probe": Op(
        {"points": POINTS}, functools.partial(_bucketize, balance="probe"), BUCKETED, large=200_000, alone=True
    ),
    "scopes": Op(
        {},
        lambda at: {"table": gpu3d.scopes(at.buckets, SCOPE_SIZE, shift=1).table},
        {"table": ("scope", "bucket")},
    ),
    "scatter": Op(
        {"x": Input("point", (5,))}, lambda at, x: {"y": at.buckets.scatter(x)}, {"y": ("slot", None)}, any_dtype=True
    ),
    "gather": Op({"y": SLOTS}, lambda at, y: {"x": at.buckets.gather(y)}, {"x": ("point", None)}, any_dtype=True),
    "bucket_attention": Op(
        dict.fromkeys("qkv", HEADS),
        _attention,
        {"out": ("slot", None), "lse": ("slot", None), "alone": ("slot", None)},
        float64_on_gpu=False,
    ),
    "bucket_attention_backward": Op(
        {**dict.fromkeys(("dout", "q", "k", "v", "out"), HEADS), "lse": Input("slot", (2,), "sums")},
        _attention_backward,
        {"dq": ("slot", None), "dk": ("slot", None), "dv": ("slot", None)},
        float64_on_gpu=False,
    ),
    "bucket_pool-mean": Op(
        {"features": SLOTS, "points": Input("slot", (3,))},
        functools.partial(_pool, reduce="mean"),
        POOLED,
        float64_on_gpu=False,
    ),
    "bucket_pool-max": Op(
        {"features": SLOTS, "points": Input("slot", (3,))},
        functools.partial(_pool, reduce="max"),
        {**POOLED, "argmember": ("child slot", None)},
        float64_on_gpu=False,
    ),
    "bucket_pool_backward": Op(
        {"dchild_features": Input("child slot", (5,))},
        lambda at, **x: {"dfeatures": gpu3d.bucket_pool_backward(**x, pooled=at.pooled)},
        {"dfeatures": ("slot", None)},
        float64_on_gpu=False,
    ),
    "bucket_unpool": Op(
        {"child_features": Input("child slot", (5,)), "skip": SLOTS},
        lambda at, **x: {"out": gpu3d.bucket_unpool(**x, pooled=at.pooled)},
        {"out": ("slot", None)},
        float64_on_gpu=False,
    ),
    "bucket_unpool_backward": Op(
        {"dout": SLOTS},
        _unpool_backward,
        {"dchild": ("child slot", None), "dskip": ("slot", None)},
        float64_on_gpu=False,
    ),
    "knn": Op(
        SEARCHED,
        lambda at, query, points: gpu3d.knn(query, points, 16, query_lengths=at.others, lengths=at.lengths)._asdict(),
        NEIGHBOURS,
    ),
    "knn-others": Op(
        {"query": POINTS, "points": POINTS},
        lambda at, query, points: gpu3d.knn(
            query, points, 40, query_lengths=at.lengths, lengths=at.lengths, exclude_self=True
        )._asdict(),
        {"distances": ("point", None), "indices": ("point", "point")},
    ),
    "neighbor_index": Op(SEARCHED, _indexed, NEIGHBOURS),
    "normals": Op(
        {"points": POINTS},
        lambda at, points: gpu3d.normals(points, 8, lengths=at.lengths)._asdict(),
        {"normals": ("point", None), "curvature": ("point", None)},
        alone=True,
    ),
    "radius_search-nearest": Op(
        SEARCHED,
        lambda at, query, points: gpu3d.radius_search(
            query, points, 0.3, query_lengths=at.others, lengths=at.lengths, max_neighbors=9
        )._asdict(),
        NEIGHBOURS,
    ),
    "radius_search": Op(
        SEARCHED,
        functools.partial(_radius, counted=False),
        {**NEIGHBOURS, "count": ("other", None)},
        _tidy_radius,
    ),
    "radius_search-counted": Op(
        SEARCHED,
        functools.partial(_radius, counted=True),
        {**NEIGHBOURS, "count": ("other", None)},
        _tidy_radius,
        capturable=False,
    ),
    "farthest_points": Op(
        {"points": POINTS},
        lambda at, points: {"indices": gpu3d.farthest_points(points, SAMPLES, lengths=at.lengths)},
        {"indices": ("sample", "point")},
        alone=True,
    ),
    "voxel_downsample": Op(
        {"points": POINTS, "features": Input("point", (5,))},
        _voxels,
        {"first": ("point", "point"), **dict.fromkeys(("points", "features", "counts"), ("point", None))},
        _tidy_voxels,
        capturable=False,
    ),
    "chamfer": Op(
        {"x": POINTS, "y": OTHER_POINTS},
        _chamfer,
        {"loss": ("cloud", None), "dx": ("point", None), "dy": ("other", None), "alone": ("cloud", None)},
        empty_clouds=False,
    ),
    "chamfer-directions": Op(
        {"x": POINTS, "y": OTHER_POINTS},
        _directions,
        {
            "loss": ("cloud", None),
            "dx": ("point", None),
            "dy": ("other", None),
            "of_x": ("point", None),
            "of_y": ("other", None),
        },
        empty_clouds=False,
    ),
    "compare_clouds": Op(
        {"x": POINTS, "y": OTHER_POINTS},
        _compare,
        dict.fromkeys(gpu3d.CloudComparison._fields, ("cloud", None)),
        empty_clouds=False,
    ),
    "apml": Op(
        {"pred": POINTS, "target": OTHER_POINTS},
        functools.partial(_apml, counted=False),
        TRANSPORTED,
        empty_clouds=False,
    ),
    "apml_plan": Op(
        {"pred": POINTS, "target": OTHER_POINTS},
        _plan,
        {"count": ("point", None), "cols": ("point", "other"), "values": ("point", None)},
        _tidy_plan,
        empty_clouds=False,
        capturable=False,
    ),
    "apml-counted": Op(
        {"pred": POINTS, "target": OTHER_POINTS},
        functools.partial(_apml, counted=True),
        TRANSPORTED,
        empty_clouds=False,
        capturable=False,
    ),
}


# ---- arrays --------------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    """Converts NumPy arrays to arrays of a library and back."""

    array: Callable[[np.ndarray], Any]
    back: Callable[[Any], np.ndarray]
    kind: type  # the type of results
    dtypes: Sequence[str] = tuple(DTYPES)  # the dtypes that it supports


class Bare:
    """An array with DLPack, of a library that gpu3d does not know."""

    def __init__(self, array: Any) -> None:
        self.array, self.__dlpack_device__ = array, array.__dlpack_device__

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __len__(self) -> int:
        return len(self.array)


def numpy() -> Library:
    return Library(np.copy, np.asarray, np.ndarray)


def dlpack() -> Library:
    return Library(lambda x: Bare(x.copy()), np.from_dlpack, np.ndarray, ("float32", "float64", "float16"))


def torch(device: Any = "cpu") -> Library:
    torch = pytest.importorskip("torch")

    def array(x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(x.copy()).to(device)

    def back(x: Any) -> np.ndarray:
        x = x.cpu()
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    return Library(array, back, torch.Tensor)


def jax(device: Any = None) -> Library:
    jax = pytest.importorskip("jax")
    device = device or jax.devices("cpu")[0]
    return Library(lambda x: jax.device_put(x, device), np.asarray, jax.Array, ("float32", "float16", "bfloat16"))


def cupy() -> Library:
    import cupy

    return Library(cupy.asarray, lambda x: x.get(), cupy.ndarray)


def inputs_of(
    op: Op, lengths: Sequence[int], others: Sequence[int], dtype: str = "float32", seed: int = 0
) -> dict[str, np.ndarray]:
    """The inputs of an op, on the host."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, given in op.inputs.items():
        rows = sum(rows_of(n, m)[given.rows] for n, m in zip(lengths, others, strict=True))
        sums = "float64" if dtype == "float64" else "float32"
        as_given = {None: dtype, "sums": sums}.get(given.dtype, given.dtype)
        made[name] = rng.random((rows, *given.columns)).astype(DTYPES[as_given])
    return made


def scenery(lengths: Sequence[int], others: Sequence[int], dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays from which a place is made."""
    rng = np.random.default_rng(7)
    slots = sum(rows_of(n, m)["slot"] for n, m in zip(lengths, others, strict=True))
    points = rng.random((sum(lengths), 3)).astype(np.float32)
    features = rng.random((slots, 5)).astype(DTYPES[dtype])
    return {"points": points, "features": features, "slot_points": rng.random((slots, 3)).astype(np.float32)}


def place(
    lengths: Sequence[int],
    others: Sequence[int],
    library: Library,
    dtype: str = "float32",
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Place:
    """Buckets, scopes and a pooling in arrays of a library, made from the `arrays` of `scenery`."""
    arrays = {name: library.array(x) for name, x in (arrays or scenery(lengths, others, dtype)).items()}
    buckets = gpu3d.bucketize(arrays["points"], BUCKET_SIZE, lengths=tuple(lengths))
    pooled = gpu3d.bucket_pool(arrays["features"], arrays["slot_points"], buckets, ratio=RATIO, reduce="max")
    scopes = gpu3d.scopes(buckets, SCOPE_SIZE, shift=1)
    return Place(tuple(lengths), tuple(others), buckets, scopes, pooled)


def run(op: Op, at: Place, arrays: Mapping[str, Any], library: Library) -> dict[str, np.ndarray]:
    """Call an op, check the type of its results, and return them on the host."""
    results = op.call(at, **arrays)
    assert all(isinstance(x, library.kind) for x in results.values()), {name: type(x) for name, x in results.items()}
    return {name: library.back(x) for name, x in results.items()}


def features_of(op: Op, dtype: str) -> str:
    """The dtype of the place's features for an op with arrays of `dtype`."""
    return "float32" if op.float64_on_gpu else dtype


def start(
    op: Op,
    library: Library,
    lengths: Sequence[int] = LENGTHS,
    others: Sequence[int] = OTHERS,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[Place, dict[str, Any]]:
    """A place and the inputs of an op."""
    made = inputs_of(op, lengths, others, dtype, seed)
    return place(lengths, others, library, features_of(op, dtype)), {name: library.array(x) for name, x in made.items()}


def assert_same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], note: Any = "") -> None:
    """Assert that all arrays have the same bits."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        y = expected[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), (name, note)
        assert x.tobytes() == y.tobytes(), f"{name} {note}: {(x != y).sum()} of {x.size} differ"


def assert_alive(results: Mapping[str, np.ndarray]) -> None:
    """Assert that the results are not trivial, so that comparing them means something."""
    for name, x in results.items():
        assert x.size and x.any(), name
        assert name in ("indices", "distances") or x.dtype.kind == "i" or not np.isnan(x.astype(float)).all(), name


# ---- what every op must do -----------------------------------------------------------------------------------------


def check_batch(
    op: Op,
    library: Library,
    lengths: Sequence[int],
    others: Sequence[int],
    which: Sequence[int],
    dtype: str = "float32",
) -> None:
    """Check that a cloud in a batch has the same results, bit by bit, as alone."""
    made, background = inputs_of(op, lengths, others, dtype), scenery(lengths, others, features_of(op, dtype))
    arrays = {name: library.array(x) for name, x in made.items()}
    together = op.tidy(run(op, place(lengths, others, library, arrays=background), arrays, library))
    assert together.keys() == op.results.keys()
    assert_alive(together)
    kinds = {"points": "point", "features": "slot", "slot_points": "slot"}
    for b in which:
        own = {kind: spans(kind, lengths, others)[b] for kind in rows_of(1, 1)}
        at = place(
            lengths[b : b + 1], others[b : b + 1], library, arrays={n: x[own[kinds[n]]] for n, x in background.items()}
        )
        arrays = {name: library.array(x[own[op.inputs[name].rows]]) for name, x in made.items()}
        alone = op.tidy(run(op, at, arrays, library))
        for name, (rows, counted) in op.results.items():
            part = together[name][own[rows]]
            if counted is not None:
                part = np.where(part < 0, part, part - own[counted].start).astype(part.dtype)
            assert_same({name: alone[name]}, {name: part}, f"cloud {b} of {len(lengths)}")


def check_nothing(op: Op, library: Library) -> None:
    """Check batches without clouds and clouds without points: results have no rows, and the same dtype and columns."""
    expected = op.tidy(run(op, *start(op, library), library))
    for lengths in ((), (0, 0)) if op.empty_clouds else ((),):
        got = op.tidy(run(op, *start(op, library, lengths, lengths), library))
        for name, x in got.items():
            rows = sum(rows_of(n, n)[op.results[name][0]] for n in lengths)
            assert (x.shape, x.dtype) == ((rows, *expected[name].shape[1:]), expected[name].dtype), (name, lengths)


VIEWS = {  # how an array is stored in memory, and the view of it that has the original values
    "wide": (lambda x: _padded(x, 2, 3), lambda x: x[..., 2:-3]),
    "wide by 16 bytes": (lambda x: _padded(x, 16 // x.itemsize, 16 // x.itemsize), lambda x: _cut(x)),
    "transposed": (lambda x: np.ascontiguousarray(x.T), lambda x: x.T),
    "spread": (lambda x: np.repeat(x, 2, axis=-1), lambda x: x[..., ::2]),
    "every other row": (lambda x: np.repeat(x, 2, axis=0), lambda x: x[::2]),
    "backwards": (lambda x: np.ascontiguousarray(x[::-1, ::-1]), lambda x: x[::-1, ::-1]),
}


def _padded(x: np.ndarray, before: int, after: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def _cut(x: Any) -> Any:
    return x[..., 16 // x.itemsize : -16 // x.itemsize]


def check_layouts(op: Op, library: Library, dtype: str, prepare: Callable[[], Any] = lambda: None) -> None:
    """Check that memory layouts change no bit: of all arrays together, and of each alone."""
    made = inputs_of(op, LENGTHS, OTHERS, dtype)
    at, arrays = start(op, library, dtype=dtype)
    expected = run(op, at, arrays, library)
    for note, (lay, view) in VIEWS.items():
        viewed = {name: view(library.array(lay(x))) for name, x in made.items()}
        assert not any(x.flags.c_contiguous for x in viewed.values()), note
        prepare()
        assert_same(run(op, at, viewed, library), expected, note)
        for name in made if note == "wide" and len(made) > 1 else ():
            assert_same(run(op, at, {**arrays, name: viewed[name]}, library), expected, f"{note} {name}")
    for offset in (1, 2, 3, 5):  # elements
        shifted = {}
        for name, x in made.items():
            flat = library.array(np.concatenate([np.zeros(offset, x.dtype), x.reshape(-1)]))
            shifted[name] = flat[offset:].reshape(x.shape)
        prepare()
        assert_same(run(op, at, shifted, library), expected, f"offset {offset}")


def check_refused(op: Op, at: Place, arrays: Mapping[str, Any], bad: Callable[[Any], Any], message: str) -> None:
    """Check that a bad form of each array, one at a time, raises an error that names the array."""
    for name, x in arrays.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            op.call(at, **{**arrays, name: bad(x)})
        said = str(caught.value)
        assert name in said.split() or f"{name}:" in said or f"{name}." in said, said
        assert message in said and "\n" not in said and len(said) < 500, said
