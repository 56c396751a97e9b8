# SPDX-License-Identifier: Apache-2.0
"""gpu3d.interop: conversions of batches in both directions, for every library."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu3d import interop

LENGTHS = (3, 0, 4, 1, 0)


def array_of(library, x):
    if library == "numpy":
        return x
    module = pytest.importorskip(library)
    return module.from_numpy(x) if library == "torch" else module.numpy.asarray(x)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_each_way(library):
    like = array_of(library, np.zeros(1, np.float32))
    for name, expected in (
        ("offset", [3, 3, 7, 8, 8]),
        ("batch", [0, 0, 0, 2, 2, 2, 2, 3]),
        ("cu_seqlens", [0, 3, 3, 7, 8, 8]),
    ):
        made = getattr(interop, f"{name}_from_lengths")(LENGTHS, like)
        assert type(made) is type(like) and np.asarray(made).tolist() == expected, name
        back = getattr(interop, f"lengths_from_{name}")
        options = {"clouds": 5} if name == "batch" else {}
        for x in (made, np.asarray(made), expected, tuple(expected), np.asarray(made, np.uint8)):
            lengths = back(x, **options)
            assert lengths == LENGTHS and all(type(n) is int for n in lengths), name


def test_dtypes():
    assert interop.offset_from_lengths([1]).dtype == interop.batch_from_lengths([1]).dtype == np.int64
    assert interop.cu_seqlens_from_lengths([1]).dtype == np.int32  # the dtype that flash_attn_varlen_func takes


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 3))
def test_any_lengths(lengths, extra):
    for name in ("offset", "cu_seqlens"):
        made = getattr(interop, f"{name}_from_lengths")(lengths)
        assert getattr(interop, f"lengths_from_{name}")(made) == tuple(lengths)
    batch = interop.batch_from_lengths(lengths)
    assert interop.lengths_from_batch(batch, clouds=len(lengths)) == tuple(lengths)
    least = interop.lengths_from_batch(batch)
    assert least + (0,) * (len(lengths) - len(least)) == tuple(lengths)

    packed = np.random.default_rng(0).standard_normal((sum(lengths), 3)).astype(np.float32)
    padded = interop.pad(packed, lengths, fill=np.nan)
    assert padded.shape == (len(lengths), max(lengths, default=0), 3) and padded.dtype == np.float32
    assert np.isnan(padded).sum() == 3 * (padded.shape[0] * padded.shape[1] - len(packed))
    wider = np.pad(padded, [(0, 0), (0, extra), (0, 0)], constant_values=np.nan)
    again, kept = interop.pack(wider, np.array(lengths, np.int64))
    assert np.array_equal(again, packed) and kept == tuple(lengths)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_pack_and_pad(library, shape):
    host = np.random.default_rng(0).standard_normal((sum(LENGTHS), *shape)).astype(np.float32)
    packed = array_of(library, host)
    padded = interop.pad(packed, LENGTHS, fill=7)
    assert type(padded) is type(packed) and tuple(padded.shape) == (5, 4, *shape)
    expected = np.full((5, 4, *shape), 7, np.float32)
    for b, (n, end) in enumerate(zip(LENGTHS, np.cumsum(LENGTHS), strict=True)):
        expected[b, :n] = host[end - n : end]
    assert np.array_equal(np.asarray(padded), expected)
    again, lengths = interop.pack(padded, array_of(library, np.array(LENGTHS)))
    assert type(again) is type(packed) and np.array_equal(np.asarray(again), host) and lengths == LENGTHS


def test_gradients_in_torch():
    torch = pytest.importorskip("torch")
    x = torch.arange(24.0).reshape(2, 4, 3).requires_grad_()
    packed, lengths = interop.pack(x, torch.tensor([1, 3]))
    (interop.pad(packed, lengths) * 2).sum().backward()
    assert x.grad[:, :, 0].tolist() == [[2, 0, 0, 0], [2, 2, 2, 0]]


def test_gradients_in_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(24.0).reshape(2, 4, 3)
    gradient = jax.jit(jax.grad(lambda x: (interop.pad(*interop.pack(x, [1, 3])) * 2).sum()))(x)
    assert gradient[:, :, 0].tolist() == [[2, 0, 0, 0], [2, 2, 2, 0]]


SIZES = (5, 0, 3, 7)


class Clouds:
    """A data set of clouds of different sizes. Each sample is a dict."""

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, i):
        n = SIZES[i]
        points = np.full((n, 3), i, np.float32)
        return {"points": points, "labels": np.arange(n), "name": f"cloud {i}", "scale": 0.5}


def test_collate():
    torch = pytest.importorskip("torch")
    clouds = Clouds()
    batch = interop.collate([clouds[i] for i in range(4)])
    assert (
        batch["lengths"] == SIZES and batch["name"] == [f"cloud {i}" for i in range(4)] and batch["scale"] == [0.5] * 4
    )
    assert batch["points"].shape == (15, 3) and batch["points"].dtype == torch.float32
    assert batch["points"][:, 0].tolist() == [0] * 5 + [2] * 3 + [3] * 7
    assert batch["labels"].tolist() == [*range(5), *range(3), *range(7)]
    pairs = [(torch.from_numpy(clouds[i]["points"]), clouds[i]["labels"]) for i in range(4)]
    points, labels, lengths = interop.collate(pairs)
    assert torch.equal(points, batch["points"]) and torch.equal(labels, batch["labels"]) and lengths == SIZES
    points, lengths = interop.collate([points for points, _ in pairs])
    assert torch.equal(points, batch["points"]) and lengths == SIZES


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # torch warns about it without a GPU
@pytest.mark.parametrize("workers", [0, 2])
def test_collate_in_a_data_loader(workers):
    torch = pytest.importorskip("torch")
    import gpu3d

    options = {"num_workers": workers, "pin_memory": True, "collate_fn": interop.collate}
    options["multiprocessing_context"] = "spawn" if workers else None  # no fork: JAX may have threads
    batches = list(torch.utils.data.DataLoader(Clouds(), batch_size=2, **options))
    assert [tuple(batch["lengths"]) for batch in batches] == [SIZES[:2], SIZES[2:]]
    for batch in batches:
        assert batch["points"].is_pinned() == torch.cuda.is_available()
        buckets = gpu3d.bucketize(batch["points"], 16, lengths=batch["lengths"])
        assert torch.equal(buckets.gather(buckets.scatter(batch["labels"])), batch["labels"])


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([], "samples must hold at least one cloud, got none"),
        ([np.zeros((2, 3)), (np.zeros((2, 3)),)], "must all be arrays, all tuples or all dicts, got ndarray and tuple"),
        ([{"points": np.zeros((2, 3))}, {"xyz": np.zeros((2, 3))}], r"must have the same keys, .* got \['points'\]"),
        ([{"lengths": np.zeros((2, 3))}], "none named 'lengths'"),
        ([(np.zeros((2, 3)),), (np.zeros((2, 3)), np.zeros(2))], r"tuples of one size, got \[1, 2\]"),
        ([(np.zeros((2, 3)), np.zeros(4))], "got 4 rows in 'part 1' of sample 0 and 2 in 'part 0'"),
        (["cloud.ply"], "must hold tensors or NumPy arrays .* got 'cloud': str"),
    ],
)
def test_collate_of_bad_samples(samples, match):
    pytest.importorskip("torch")
    with pytest.raises((TypeError, ValueError), match=match):
        interop.collate(samples)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: interop.lengths_from_offset([3, 2]), "offset must be a running sum, .* got 3 before 2"),
        (lambda: interop.lengths_from_offset([-1, 2]), "offset must be a running sum, .* got 0 before -1"),
        (lambda: interop.lengths_from_offset([0.5]), r"offset must be integers of one dimension, got float64 \[1\]"),
        (lambda: interop.lengths_from_offset([[1]]), r"offset must be integers of one dimension, got int64 \[1, 1\]"),
        (lambda: interop.lengths_from_cu_seqlens([3, 7]), r"must begin with 0, got \[3\]: .* for lengths_from_offset"),
        (lambda: interop.lengths_from_cu_seqlens([]), r"must begin with 0, got \[\]"),
        (lambda: interop.lengths_from_batch([0, 2, 1]), "batch must be sorted, .* got 2 before 1 at index 1"),
        (lambda: interop.lengths_from_batch([-1, 2]), "batch must not be negative, got -1"),
        (lambda: interop.lengths_from_batch([0, 2], clouds=2), "clouds must be more than the last .* got 2 for 2"),
        (lambda: interop.batch_from_lengths([1, -2]), r"lengths must not be negative, got lengths\[1\] = -2"),
        (lambda: interop.cu_seqlens_from_lengths([2**31]), r"must sum to less than 2\*\*31, got 2147483648"),
        (lambda: interop.pack(np.zeros((2, 3)), [1]), "up to 3 for each of the 2 clouds of padded, got 1 numbers"),
        (lambda: interop.pack(np.zeros((2, 3)), [1, 4]), "up to 3 for each of the 2 clouds .* got 2 numbers up to 4"),
        (lambda: interop.pack(np.zeros(2), [1, 4]), r"padded must have shape \[B, n, ...\], got \[2\]"),
        (lambda: interop.pad(np.zeros((2, 3)), [1]), "lengths must sum to the number of packed points, got a sum of 1"),
        (lambda: interop.pad(np.zeros(()), []), "got a scalar"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
