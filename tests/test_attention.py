# SPDX-License-Identifier: Apache-2.0
"""bucket_attention and its backward on the CPU: definition, laws, error in each dtype, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math

import clouds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buckets import scopes_by_definition

import gpu3d
from gpu3d import _arrays
from gpu3d.cuda import attention as cuda
from gpu3d.reference import attention as reference

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": _arrays.BFLOAT16, "float32": np.dtype(np.float32)}
RESULTS = ("out", "lse", "dq", "dk", "dv")

# lengths, bucket_size, size, shift, stride
CASES = [
    ([700], 64, 4, 0, 1),  # a short last scope, whose last bucket is short too
    ([700], 64, 4, 3, 1),  # the short bucket inside a scope
    ([700], 64, 3, 0, 2),
    ([700], 16, 8, -5, 3),
    ([0, 700, 1, 16, 0, 333, 0], 16, 4, 1, 2),
    (list(range(40)), 16, 2, 0, 1),
    ([150] * 20, 48, 3, 1, 1),
    ([1000], 16, 63, 7, 1),  # the whole cloud
    ([1000], 1024, 1, 0, 1),
    ([2500, 1030], 1024, 2, 0, 1),
    ([1200], 512, 5, 2, 1),  # a row longer than the cloud
    ([1], 16, 1, 0, 1),
    ([1, 1, 1], 64, 4, 0, 2),
]


# ---- inputs, and the op as the tests call it (test_attention_gpu.py too) -------------------------------------------


def layout(lengths, bucket_size):
    return gpu3d.bucketize(clouds.uniform(sum(lengths)), bucket_size, lengths=lengths)


def inputs(buckets, heads, dim, dtype="float32", std=1.0, seed=0):
    """q, k, v, dout [num_slots, heads, dim] with NaN in padding; logits have standard deviation `std`."""
    x = np.random.default_rng(seed).standard_normal((4, buckets.num_slots, heads, dim))
    x[:2] *= math.sqrt(std)
    x[:, np.asarray(buckets.slot_to_point) < 0] = np.nan
    return tuple(x.astype(DTYPES.get(dtype, dtype)))


def attend(q, k, v, dout, buckets, scopes, **options):
    """The results of forward and backward, by name."""
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True, **options)
    gradients = gpu3d.bucket_attention_backward(dout, q, k, v, out, lse, buckets, scopes, **options)
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def valid(buckets):
    return np.asarray(buckets.slot_to_point) >= 0


def assert_padding(results, buckets):
    """Assert that in padding out is 0, lse is -inf and gradients are 0."""
    for name, x in results.items():
        assert (x[~valid(buckets)] == (-np.inf if name == "lse" else 0)).all(), name


# ---- oracles -------------------------------------------------------------------------------------------------------


def scope_of_slot(buckets, rows):
    """The scope of each slot, -1 in padding."""
    scope = np.full(buckets.num_buckets, -1)
    for number, row in enumerate(rows):
        scope[[b for b in row if b >= 0]] = number
    return np.where(valid(buckets), np.repeat(scope, buckets.bucket_size), -1)


def dense(q, k, v, dout, buckets, rows, scale):
    """The definition: for each cloud and head a dense float64 softmax over all pairs, with other scopes masked."""
    scope = scope_of_slot(buckets, rows)
    results = {name: np.zeros(q.shape) for name in ("out", "dq", "dk", "dv")}
    results["lse"] = np.full(q.shape[:2], -np.inf)
    for begin, end in itertools.pairwise(np.array(buckets.bucket_offsets) * buckets.bucket_size):
        slots = np.arange(begin, end)[scope[begin:end] >= 0]
        seen = scope[slots, None] == scope[None, slots]
        for h in range(q.shape[1]):
            queries, keys, values, douts = (x[slots, h].astype(np.float64) for x in (q, k, v, dout))
            weights = np.where(seen, np.exp(scale * (queries @ keys.T)), 0)  # float64 can hold exp of the logits here
            total = weights.sum(1)
            weights /= total[:, None]
            dweights = douts @ values.T
            dscores = weights * (dweights - (weights * dweights).sum(1)[:, None])
            results["out"][slots, h] = weights @ values
            results["lse"][slots, h] = np.log(total)
            results["dq"][slots, h] = scale * dscores @ keys
            results["dk"][slots, h] = scale * dscores.T @ queries
            results["dv"][slots, h] = weights.T @ douts
    return results


def oracle(q, k, v, dout, buckets, table, scale):
    """The reference in float64; `table` on the host."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    scopes = table, buckets.bucket_size, buckets.bucket_offsets, buckets.lengths
    out, lse = reference.bucket_attention(q, k, v, *scopes, scale)
    gradients = reference.bucket_attention_backward(dout, q, k, v, out, lse, *scopes, scale)
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def naive(q, k, v, dout, buckets, table, scale):
    """Attention as a plain array program: each array operation rounds its result to q's dtype.

    A matrix product or a sum is one operation, computed in float32. Totals and lse are float32.
    """

    def rounded(x):
        return x.astype(q.dtype).astype(np.float32)

    results = {name: np.zeros(q.shape, np.float32) for name in ("out", "dq", "dk", "dv")}
    results["lse"] = np.full(q.shape[:2], -np.inf, np.float32)
    scale, scope = np.float32(scale), scope_of_slot(buckets, table)
    by_scope = np.argsort(scope, kind="stable")
    for slots in np.split(by_scope, np.searchsorted(scope[by_scope], np.arange(len(table))))[1:]:
        queries, keys, values, douts = (np.moveaxis(x[slots].astype(np.float32), 1, 0) for x in (q, k, v, dout))
        scores = rounded(rounded(queries @ keys.swapaxes(1, 2)) * scale)
        largest = scores.max(2, keepdims=True)
        weights = rounded(np.exp(scores - largest))
        total = weights.sum(2, keepdims=True)
        out = rounded(rounded(weights / total) @ values)
        lse = largest + np.log(total)
        weights = rounded(np.exp(scores - lse))
        delta = rounded(rounded(douts * out).sum(2, keepdims=True))
        dweights = rounded(douts @ values.swapaxes(1, 2))
        dscores = rounded(weights * rounded(dweights - delta))
        dq, dk = rounded(rounded(dscores @ keys) * scale), rounded(rounded(dscores.swapaxes(1, 2) @ queries) * scale)
        dv = rounded(weights.swapaxes(1, 2) @ douts)
        for name, x in zip(RESULTS, (out, lse[:, :, 0], dq, dk, dv), strict=True):
            results[name][slots] = np.moveaxis(x, 0, 1)
    return results


UNIT = {DTYPES["float16"]: 2.0**-11, DTYPES["bfloat16"]: 2.0**-8, DTYPES["float32"]: 2.0**-24}


def least_errors(q, k, v, dout, exact, scale, lucky):
    """The least error to allow: four float32 roundings of the summed terms, and if `lucky` one of q's dtype.

    The error of the naive program may be 0 by luck if it computes few numbers, or if one key has weight 1 exactly.
    """
    norm_q, norm_k, norm_v, norm_dout = (np.linalg.norm(x.astype(np.float64), axis=2).max() for x in (q, k, v, dout))
    logits = 1 + abs(scale) * norm_q * norm_k  # an error of a logit is a relative error of its weight
    unit = 4 * 2.0**-24 * logits + (UNIT[q.dtype] if lucky else 0)
    dscores = abs(scale) * norm_dout * norm_v
    sizes = norm_v, 1, dscores * norm_k, dscores * norm_q, norm_dout
    return {name: unit * max(size, np.abs(exact[name]).max()) for name, size in zip(RESULTS, sizes, strict=True)}


def assert_accurate(results, q, k, v, dout, buckets, table, scale, where=None, lucky=False):
    """Assert that largest and root mean square error against float64 are at most twice those of the naive program.

    `where` [num_slots, heads] selects what is compared. On `lucky` inputs the naive program rounds little. It may also
    be lucky if it computes few numbers.
    """
    kept = np.broadcast_to(valid(buckets)[:, None], q.shape[:2]) if where is None else where
    counts = np.bincount(scope_of_slot(buckets, table)[valid(buckets)])
    exact = oracle(q, k, v, dout, buckets, table, scale)
    plain = naive(q, k, v, dout, buckets, table, scale)
    kept_inputs = (np.where(kept[:, :, None], x, 0) for x in (q, k, v, dout))
    least = least_errors(*kept_inputs, {name: x[kept] for name, x in exact.items()}, scale, lucky)
    for name in RESULTS:
        assert results[name].dtype == (np.float32 if name == "lse" else q.dtype), name
        assert results[name].shape == exact[name].shape, name
        error, allowed = (np.abs(x[name][kept] - exact[name][kept]) for x in (results, plain))
        assert np.isfinite(error).all(), f"{name}: {(~np.isfinite(error)).sum()} not finite"
        for kind, measure in (("largest", np.max), ("rms", lambda x: np.sqrt(np.square(x, dtype=np.float64).mean()))):
            bound = 2 * measure(allowed)
            if lucky or counts.min() < 64 or kept.sum() < 1000:
                bound = max(bound, least[name])
            else:  # a bound that a wrong result would exceed
                assert bound < measure(np.abs(exact[name][kept])) / 2, (name, kind, bound)
            assert measure(error) <= bound, f"{name}: {kind} error {measure(error):.3g}, at most {bound:.3g} allowed"


# ---- the definition ------------------------------------------------------------------------------------------------


def assert_equal_to_dense(lengths, bucket_size, size, shift, stride, heads, dim):
    buckets = layout(lengths, bucket_size)
    scopes = gpu3d.scopes(buckets, size, shift=shift, stride=stride)
    arrays = inputs(buckets, heads, dim, np.float64)
    got = attend(*arrays, buckets, scopes)
    rows = scopes_by_definition(np.diff(buckets.bucket_offsets).tolist(), size, shift, stride)
    expected = dense(*arrays, buckets, rows, 1 / math.sqrt(dim))
    scope = scope_of_slot(buckets, rows)
    alone = np.bincount(scope + 1)[scope + 1] == 1  # a point alone in its scope has weight 1 and no gradient
    alone |= ~valid(buckets)
    for name in RESULTS:
        assert got[name].dtype == np.float64 and got[name].shape == expected[name].shape
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-11, atol=1e-13, err_msg=name)
        assert (got[name][~alone if name in ("dq", "dk") else valid(buckets)] != 0).all(), name
    assert_padding(got, buckets)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case):
    assert_equal_to_dense(*case, heads=2, dim=8)


@pytest.mark.parametrize("dim", [8, 24, 64, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_any_heads_and_head_dimension(heads, dim):
    assert_equal_to_dense([300, 50], 16, 4, 1, 1, heads, dim)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 150), max_size=5).filter(any),
    st.sampled_from([16, 32, 48]),
    st.integers(1, 6),
    st.integers(-3, 9),
    st.integers(1, 4),
)
def test_any_scopes(lengths, bucket_size, size, shift, stride):
    assert_equal_to_dense(lengths, bucket_size, size, shift, stride, heads=1, dim=8)


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0, 2, np.float32(0.25), np.float64(0.1), np.int64(1)], ids=repr)
def test_scale(scale):
    buckets = layout([200, 30], 16)
    scopes = gpu3d.scopes(buckets, 3)
    q, k, v, dout = inputs(buckets, 2, 8, np.float64)
    got = attend(q, k, v, dout, buckets, scopes, scale=scale)
    expected = dense(q, k, v, dout, buckets, scopes.table.tolist(), float(scale))
    for name in RESULTS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-11, atol=1e-13, err_msg=name)
    negated = attend(-q, k, v, dout, buckets, scopes, scale=-scale)
    for name in RESULTS:  # no sum changes its order, so the bits are the same
        np.testing.assert_array_equal(got[name], -negated[name] if name == "dq" else negated[name], err_msg=name)
    assert scale == 0 or (attend(q, k, v, dout, buckets, scopes)["out"] != got["out"])[valid(buckets)].all()


def test_scale_zero_is_the_mean():
    buckets = layout([50], 16)
    q, k, v, dout = inputs(buckets, 2, 8)
    got = attend(q, k, v, dout, buckets, gpu3d.scopes(buckets, 4), scale=0.0)
    np.testing.assert_allclose(got["out"][:50], np.broadcast_to(v[:50].mean(0), (50, 2, 8)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["lse"][:50], math.log(50), rtol=1e-6)
    assert (got["dq"] == 0).all() and (got["dk"] == 0).all() and (got["dv"][:50] != 0).all()


def test_a_long_scope_goes_through_in_blocks(monkeypatch):
    buckets = layout([1000], 64)
    scopes, arrays = gpu3d.scopes(buckets, 16), inputs(buckets, 2, 8, np.float64)
    whole = attend(*arrays, buckets, scopes)
    assert len(list(reference._blocks(2, 1000))) == 1
    monkeypatch.setattr(reference, "SCORES", 77 * 2 * 1000)
    assert len(list(reference._blocks(2, 1000))) == 13
    for name, x in attend(*arrays, buckets, scopes).items():
        np.testing.assert_allclose(x, whole[name], rtol=1e-12, atol=1e-14, err_msg=name)
    monkeypatch.setattr(reference, "SCORES", 1)
    assert len(list(reference._blocks(2, 1000))) == 1000


@pytest.mark.parametrize("std", [1.0, 8.0])
def test_gradients_are_finite_differences(std):
    """Fourth-order central differences of sum(dout * out) along random directions.

    Their error is about h**4 / 30 times the fifth derivative, and 1e-15 |L| / h. A unit step moves a logit by up to
    10, so at h = 1e-4 the first is some 1e-12, and the second 1e-10 for an L near 10.
    """
    buckets = layout([90, 1, 37], 16)
    scopes = gpu3d.scopes(buckets, 3, shift=1)
    q, k, v, dout = (np.nan_to_num(x) for x in inputs(buckets, 2, 8, np.float64, std))
    gradients = attend(q, k, v, dout, buckets, scopes)
    h = 1e-4
    for name, i in (("dq", 0), ("dk", 1), ("dv", 2)):
        for seed in range(3):
            direction = np.random.default_rng(seed).standard_normal(q.shape)

            def loss(step, i=i, direction=direction):
                moved = [q, k, v]
                moved[i] = moved[i] + step * direction
                return (dout * gpu3d.bucket_attention(*moved, buckets, scopes)).sum()

            slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
            expected = (gradients[name] * direction).sum()
            spread = np.linalg.norm(gradients[name])  # the typical derivative along such a direction
            assert spread > 1 and abs(slope - expected) < 1e-9 * spread, (name, slope, expected)


# ---- laws ----------------------------------------------------------------------------------------------------------


def test_the_order_of_scopes_and_of_their_buckets_changes_nothing():
    buckets = layout([700], 16)
    scopes, arrays = gpu3d.scopes(buckets, 4, shift=3, stride=2), inputs(buckets, 2, 16, np.float64)
    expected = attend(*arrays, buckets, scopes)
    rng = np.random.default_rng(0)
    shuffled = scopes.table[rng.permutation(len(scopes.table))]
    for name, x in attend(*arrays, buckets, gpu3d.scopes(buckets, table=shuffled)).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    turned = np.array([[*row[row >= 0][::-1], *row[row < 0]] for row in shuffled])
    for name, x in attend(*arrays, buckets, gpu3d.scopes(buckets, table=turned)).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(("shift", "stride"), [(5, 1), (0, 2), (-1, 4)])
def test_a_shifted_or_strided_scope_is_a_plain_one_over_moved_buckets(shift, stride):
    buckets = layout([24 * 16], 16)
    scopes = gpu3d.scopes(buckets, 3, shift=shift, stride=stride)
    arrays = inputs(buckets, 2, 8)
    expected = attend(*arrays, buckets, scopes)
    slots = (scopes.table.reshape(-1, 1) * 16 + np.arange(16)).reshape(-1)
    assert (slots != np.arange(len(slots))).any()
    got = attend(*(x[slots] for x in arrays), buckets, gpu3d.scopes(buckets, 3))
    for name in RESULTS:
        np.testing.assert_array_equal(got[name], expected[name][slots], err_msg=name)


def test_weights_sum_to_one_and_ignore_what_all_keys_share():
    buckets = layout([300], 16)
    scopes = gpu3d.scopes(buckets, 5)
    q, k, v, dout = inputs(buckets, 2, 8, np.float64)
    expected = attend(q, k, v, dout, buckets, scopes)
    added = np.arange(16.0).reshape(2, 8)
    got = attend(q, k, v + added, dout, buckets, scopes)
    np.testing.assert_allclose(got["out"][:300], expected["out"][:300] + added, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got["dq"], expected["dq"], rtol=1e-9, atol=1e-12)
    got = attend(q, k + added, v, dout, buckets, scopes)
    np.testing.assert_allclose(got["out"], expected["out"], rtol=1e-9, atol=1e-12)
    lse = expected["lse"] + (q * added).sum(2) / math.sqrt(8)
    np.testing.assert_allclose(got["lse"][:300], lse[:300], rtol=1e-12)
    np.testing.assert_allclose(np.add.reduceat(expected["dk"], range(0, 304, 80)), 0, atol=1e-11)


# ---- what padding and NaN do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_padding_may_hold_anything(dtype):
    buckets = layout([0, 70, 1, 16, 33], 16)
    scopes = gpu3d.scopes(buckets, 2, shift=1)
    arrays = inputs(buckets, 2, 8, dtype)
    padding = ~valid(buckets)
    assert padding.sum() == 10 + 15 + 15 and all(np.isnan(x[padding].astype(float)).all() for x in arrays)
    got = attend(*arrays, buckets, scopes)
    assert_padding(got, buckets)
    assert all(np.isfinite(x[~padding].astype(float)).all() for x in got.values())
    for filler in (0, np.inf, -np.inf, 1000):
        for x in arrays:
            x[padding] = filler
        for name, x in attend(*arrays, buckets, scopes).items():
            np.testing.assert_array_equal(x, got[name], err_msg=f"{name} {filler}")
    out, lse = got["out"].copy(), got["lse"].copy()
    out[padding], lse[padding] = np.nan, np.nan  # the padding that the backward gets may hold NaN too
    gradients = gpu3d.bucket_attention_backward(arrays[3], *arrays[:3], out, lse, buckets, scopes)
    for name, x in zip(RESULTS[2:], gradients, strict=True):
        np.testing.assert_array_equal(x, got[name], err_msg=name)


def nan_reaches(buckets, table, where, slot, head, heads):
    """The rows that a NaN in q or k at (slot, head) reaches: bool [num_slots, heads] for each result."""
    scope = scope_of_slot(buckets, table)
    own = np.zeros((buckets.num_slots, heads), bool)
    own[slot, head] = True
    shared = np.zeros_like(own)
    shared[scope == scope[slot], head] = True
    return {name: own if where == "q" and name in ("out", "lse", "dq") else shared for name in RESULTS}


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_nan(dtype, value, where):
    buckets = layout([150, 60], 16)
    scopes = gpu3d.scopes(buckets, 4, shift=2)
    arrays = inputs(buckets, 3, 8, dtype)
    clean = attend(*arrays, buckets, scopes)
    arrays["qk".index(where)][21, 1, 5] = value
    got = attend(*arrays, buckets, scopes)
    for name, reached in nan_reaches(buckets, scopes.table, where, 21, 1, 3).items():
        assert 0 < reached.sum() < reached.size / 4
        if where == "q" or np.isnan(value):  # with k inf, a score of -inf gives weight 0
            assert np.isnan(got[name][reached].astype(float)).all(), name
        np.testing.assert_array_equal(got[name][~reached], clean[name][~reached], err_msg=name)


# ---- dtypes, layouts in memory, libraries --------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 32, 128])
def test_error_is_that_of_the_dtype(dtype, dim, std):
    buckets = layout([600, 300], 16)
    scopes = gpu3d.scopes(buckets, 12, shift=1)
    arrays = inputs(buckets, 2, dim, dtype, std)
    got = attend(*arrays, buckets, scopes)
    assert_accurate(got, *arrays, buckets, scopes.table, 1 / math.sqrt(dim))
    assert_padding(got, buckets)


def test_a_wrong_result_is_not_accurate():
    """assert_accurate notices a missing row of gradients, one key too many, and float16 instead of float32."""
    buckets = layout([600], 64)
    scopes, arrays = gpu3d.scopes(buckets, 5), inputs(buckets, 2, 16, "float32")
    good = attend(*arrays, buckets, scopes)
    assert_accurate(good, *arrays, buckets, scopes.table, 0.25)
    for name in RESULTS:
        for wrong in (
            good[name] * (np.arange(640) != 77).reshape(-1, *[1] * (good[name].ndim - 1)),
            good[name] * 1.001,
        ):
            with pytest.raises(AssertionError, match=f"{name}: largest error"):
                assert_accurate({**good, name: wrong.astype(np.float32)}, *arrays, buckets, scopes.table, 0.25)
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_accurate(attend(*arrays, buckets, gpu3d.scopes(buckets, 6)), *arrays, buckets, scopes.table, 0.25)
    half = [x.astype(np.float16) for x in arrays]
    rounded = {name: x.astype(np.float32) for name, x in attend(*half, buckets, scopes).items()}
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_accurate(rounded, *arrays, buckets, scopes.table, 0.25)


def test_logits_beyond_what_exp_can_hold():
    buckets = layout([100], 16)
    scopes = gpu3d.scopes(buckets, 7)
    q, k, v, dout = inputs(buckets, 1, 8)
    q *= 1000
    got = attend(q, k, v, dout, buckets, scopes, scale=10.0)
    picked = (q[:100, 0].astype(float) @ k[:100, 0].T.astype(float)).argmax(1)
    np.testing.assert_allclose(got["out"][:100, 0], v[picked, 0], rtol=1e-4, atol=1e-5)
    assert got["lse"][:100].max() > 1e4 and all(np.isfinite(x[:100]).all() for x in got.values())


def test_without_lse_only_out_is_returned():
    buckets = layout([100], 16)
    scopes, (q, k, v, _) = gpu3d.scopes(buckets, 3), inputs(buckets, 1, 8)
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    alone = gpu3d.bucket_attention(q, k, v, buckets, scopes)
    assert isinstance(alone, np.ndarray) and lse.dtype == np.float32
    np.testing.assert_array_equal(alone, out)


def test_libraries_may_differ_on_the_cpu():
    torch = pytest.importorskip("torch")
    buckets = layout([200], 16)
    scopes, (q, k, v, dout) = gpu3d.scopes(buckets, 4), inputs(buckets, 2, 8)
    expected = attend(q, k, v, dout, buckets, scopes)
    got = attend(q, torch.from_numpy(k), v, torch.from_numpy(dout), buckets, scopes)
    for name in RESULTS:
        np.testing.assert_array_equal(np.asarray(got[name]), expected[name], err_msg=name)
    assert isinstance(got["out"], np.ndarray)  # q's kind


def test_a_backward_does_not_cut_gradients_in_silence():
    torch = pytest.importorskip("torch")
    buckets = layout([200], 16)
    scopes, (q, k, v, dout) = gpu3d.scopes(buckets, 4), inputs(buckets, 2, 8)
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    tensor = torch.from_numpy(k).requires_grad_()
    with pytest.raises(TypeError, match=r"k requires grad.*k\.detach\(\)"):
        gpu3d.bucket_attention_backward(dout, q, tensor, v, out, lse, buckets, scopes)
    got = gpu3d.bucket_attention_backward(dout, q, tensor.detach(), v, out, lse, buckets, scopes)
    expected = gpu3d.bucket_attention_backward(dout, q, k, v, out, lse, buckets, scopes)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


# ---- bad input -----------------------------------------------------------------------------------------------------

GOOD_LENGTHS = [100, 28]
GOOD = dict(zip(("q", "k", "v", "dout"), inputs(layout(GOOD_LENGTHS, 16), 2, 16), strict=True))
SLOTS = 9 * 16


def other_scopes(bucket_size, lengths):
    """Make scopes of another layout when called, from points of that library."""
    points = clouds.uniform(sum(lengths))
    return lambda asarray: gpu3d.scopes(gpu3d.bucketize(asarray(points), bucket_size, lengths=lengths), 2)


def qkv(x):
    return {"q": x, "k": x, "v": x}


def of(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


LAYOUT = ValueError, "scopes were made for another layout"
DTYPE = TypeError, r"q must be float16, bfloat16(,| or) float32.*, got int32"

# Each row: the changes to a good call, and the error.
BAD = [
    (qkv(of(SLOTS, 2, 12)), ValueError, "head dimension D must be at most 128 and divisible by 8, got 12"),
    (qkv(of(SLOTS, 2, 136)), ValueError, "head dimension D must be at most 128 and divisible by 8, got 136"),
    (qkv(of(SLOTS, 2, 0)), ValueError, "head dimension D must be .*, got 0"),
    (qkv(of(SLOTS, 0, 16)), ValueError, rf"q must have at least one head.*\[{SLOTS}, 0, 16\]"),
    (qkv(of(SLOTS, 16)), ValueError, rf"q must have shape \[num_slots, H, D\].*\[{SLOTS}, 16\]"),
    (qkv(of(1, SLOTS, 2, 16)), ValueError, rf"q must have shape \[num_slots, H, D\].*\[1, {SLOTS}, 2, 16\]"),
    (qkv(of(128, 2, 16)), ValueError, rf"one row for each of the {SLOTS} slots.*\[128, 2, 16\]"),
    ({"k": of(SLOTS, 2, 8)}, ValueError, rf"k must have the shape of q.*\[{SLOTS}, 2, 8\]"),
    ({"k": of(SLOTS, 1, 16)}, ValueError, "k must have the shape of q"),
    ({"v": of(SLOTS - 16, 2, 16)}, ValueError, "v must have the shape of q"),
    ({"k": of(SLOTS, 2, 16, dtype=np.float16)}, TypeError, "k must have the dtype of q.*float16"),
    ({"v": of(SLOTS, 2, 16, dtype=_arrays.BFLOAT16)}, TypeError, "v must have the dtype of q.*bfloat16"),
    (qkv(of(SLOTS, 2, 16, dtype=np.int32)), *DTYPE),
    ({"buckets": [0, 1]}, TypeError, "buckets must be the Buckets"),
    ({"scopes": of(5, 2, dtype=np.int32)}, TypeError, "scopes must be the Scopes"),
    ({"scopes": other_scopes(32, GOOD_LENGTHS)}, *LAYOUT),
    ({"scopes": other_scopes(16, [28, 100])}, *LAYOUT),
    ({"scopes": other_scopes(16, [128])}, *LAYOUT),
    ({"scale": "1"}, TypeError, "scale must be a finite number.*'1'"),
    ({"scale": True}, TypeError, "scale must be a finite number.*True"),
    ({"scale": 1j}, TypeError, "scale must be a finite number"),
    ({"scale": math.nan}, ValueError, "scale must be a finite number.*nan"),
    ({"scale": math.inf}, ValueError, "scale must be a finite number.*inf"),
    ({"scale": 10**400}, ValueError, "scale must fit a float, got an int of many digits"),
    ({"scale": [0.1] * 100_000}, TypeError, "scale must be a finite number or None, got list of length 100000"),
    ({"scale": np.ones(1000)}, TypeError, r"scale must be a finite number or None, got ndarray of shape \[1000\]"),
    ({"scale": -math.inf}, ValueError, "scale must be a finite number.*-inf"),
    ({"dout": of(SLOTS, 2, 8)}, ValueError, rf"dout must have the shape of .*\[{SLOTS}, 2, 8\]"),
    ({"dout": of(SLOTS, 2, 16, dtype=np.float16)}, TypeError, "dout must have the dtype of .*float16"),
    ({"out": of(SLOTS, 1, 16)}, ValueError, "out must have the shape of "),
    ({"out": of(SLOTS, 2, 16, dtype=np.float16)}, TypeError, "out must have the dtype of .*float16"),
    ({"lse": of(SLOTS, 1)}, ValueError, rf"lse must be float32 of shape.*\[{SLOTS}, 2\].*\[{SLOTS}, 1\]"),
    ({"lse": of(SLOTS, 2, 1)}, ValueError, "lse must be float32 of shape"),
    ({"lse": of(SLOTS, 2, dtype=np.float64)}, ValueError, "lse must be float32 of shape.*float64"),
    ({"lse": of(SLOTS, 2, dtype=np.float16)}, ValueError, "lse must be float32 of shape.*float16"),
]  # fmt: skip


def assert_refused(arguments, error, message, asarray):
    """Assert that forward and backward raise the error; only the backward, if it is about one of its own arguments."""
    buckets = gpu3d.bucketize(asarray(clouds.uniform(128)), 16, lengths=GOOD_LENGTHS)
    good = {name: asarray(x) for name, x in GOOD.items()}
    good.update(buckets=buckets, scopes=gpu3d.scopes(buckets, 2), scale=None)
    forward = ("q", "k", "v", "buckets", "scopes", "scale")
    good["out"], good["lse"] = gpu3d.bucket_attention(**{name: good[name] for name in forward}, return_lse=True)
    gpu3d.bucket_attention_backward(**good)
    bad = {**good}
    for name, x in arguments.items():
        bad[name] = asarray(x) if isinstance(x, np.ndarray) else x(asarray) if callable(x) else x
    if set(arguments) <= set(forward):
        with pytest.raises(error, match=message):
            gpu3d.bucket_attention(**{name: bad[name] for name in forward})
    with pytest.raises(error, match=message):
        gpu3d.bucket_attention_backward(**bad)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    assert_refused(arguments, error, message, np.asarray)


def test_a_scopes_with_another_table():
    buckets = layout([100], 16)
    scopes, (q, k, v, _) = gpu3d.scopes(buckets, 3), inputs(buckets, 1, 8)
    for table in (scopes.table.astype(np.int64), scopes.table[:, :2], scopes.table[0]):
        with pytest.raises(ValueError, match=r"scopes.table must be int32 of shape \[num_scopes, 3\], got int"):
            gpu3d.bucket_attention(q, k, v, buckets, dataclasses.replace(scopes, table=table))


def test_lse_of_float64_is_float64():
    buckets = layout([100], 16)
    scopes, (q, k, v, dout) = gpu3d.scopes(buckets, 3), inputs(buckets, 1, 8, np.float64)
    out, lse = gpu3d.bucket_attention(q, k, v, buckets, scopes, return_lse=True)
    assert out.dtype == lse.dtype == np.float64
    with pytest.raises(ValueError, match="lse must be float64 of shape"):
        gpu3d.bucket_attention_backward(dout, q, k, v, out, lse.astype(np.float32), buckets, scopes)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_one_point(dtype):
    buckets = layout([1], 16)
    q, k, v, dout = inputs(buckets, 2, 8, dtype)
    got = attend(q, k, v, dout, buckets, gpu3d.scopes(buckets, 3))
    np.testing.assert_array_equal(got["out"][0], v[0])
    np.testing.assert_array_equal(got["dv"][0], dout[0])
    scores = (q[0].astype(float) * k[0].astype(float)).sum(1) / math.sqrt(8)
    np.testing.assert_allclose(got["lse"][0], scores, rtol=1e-5, atol=1e-6)
    for name in ("dq", "dk"):
        np.testing.assert_allclose(got[name][0].astype(float), 0, atol=1e-5)
    assert_padding(got, buckets)


def test_the_kernels_divisions():
    """Multiplication and shift equal the division for all numbers that can occur."""
    rng = np.random.default_rng(0)
    for by in (1, 2, 3, 5, 16, 48, 96, 65535, 65537, 2**30 - 1, *map(int, rng.integers(1, 2**24, 50))):
        same, factor, shift = cuda._divisor(by)
        assert same == by and factor < 2**32
        last = (2**31 - 1) // by * by  # the largest multiple
        for x in (0, by - 1, by, last - 1, last, 2**31 - 1, *map(int, rng.integers(0, 2**31, 20))):
            assert x * factor >> shift == x // by
