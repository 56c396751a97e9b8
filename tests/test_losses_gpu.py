# SPDX-License-Identifier: Apache-2.0
"""The loss and its gradient against float64, in poisoned memory.

Where two errors of a class are nearly equal, float32 may order them otherwise than float64, and their gradients differ
then. So most tests take their points from a few patterns of logits: errors are equal, or clearly different.
"""

from __future__ import annotations

import numpy as np
import pytest
from steps import assert_accurate, run

from gpu3d._arrays import BFLOAT16, FLOAT32, FLOATS, INT32, UINT8
from gpu3d.cuda import losses

pytestmark = pytest.mark.gpu

DTYPES = [FLOATS[0], FLOATS[2], BFLOAT16]
LABELS = [UINT8, INT32]
IGNORE = 255
SIZES = (1, 31, 33, 127, 129, 1000, 4095, 4097, 8193)


def name_of(dtype):
    return dtype.name


def oracle(logits, labels, ignore=IGNORE):
    """The loss and its gradient, in the dtype of the logits: Berman, Triki and Blaschko 2018, Algorithm 1."""
    classes = logits.shape[1]
    labels = labels.astype(np.int64)
    valid = (labels >= 0) & (labels < classes) & (labels != ignore)
    gradient = np.zeros_like(logits)
    if not valid.any():
        return logits.dtype.type(0), gradient
    z, y = logits[valid], labels[valid]
    z = z - z.max(1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    is_label = y[:, None] == np.arange(classes)
    cross_entropy = (np.log(np.exp(z).sum(1)) - z[is_label]).mean()
    present = [c for c in range(classes) if is_label[:, c].any()]
    slopes, lovasz = np.zeros_like(p), logits.dtype.type(0)
    for c in present:
        errors = np.where(is_label[:, c], 1 - p[:, c], p[:, c])
        order = np.argsort(-errors, kind="stable")
        labels_so_far = is_label[order, c].cumsum()
        others_so_far = np.arange(1, len(y) + 1) - labels_so_far
        total = labels_so_far[-1]
        jaccard = (1 - (total - labels_so_far) / (total + others_so_far)).astype(p.dtype)
        steps = np.diff(jaccard, prepend=p.dtype.type(0))
        lovasz += errors[order] @ steps / len(present)
        slopes[order, c] = np.where(is_label[order, c], -steps, steps) / len(present)
    inner = (slopes * p).sum(1, keepdims=True)
    gradient[valid] = p * (slopes - inner) + (p - is_label) / p.dtype.type(len(y))
    return cross_entropy + lovasz, gradient


def patterns(classes, dtype, count=16):
    """Rows of logits with which a class's errors are equal, or differ by more than float32 may change them."""
    for seed in range(1000):
        rows = np.random.default_rng(seed).normal(size=(count, classes)).astype(dtype)
        p = np.exp(rows.astype(np.float64))
        p /= p.sum(1, keepdims=True)
        errors = np.sort(np.concatenate([p, 1 - p]), axis=0)
        if classes == 1 or (np.diff(errors, axis=0) > 2e-7 + 5e-6 * np.minimum(errors, 1 - errors)[1:]).all():
            return rows
    raise AssertionError("no patterns found")


def cases(n, classes, dtype, label_dtype, seed=0):
    rng = np.random.default_rng(seed)
    logits = patterns(classes, dtype)[rng.integers(0, 16, n)]
    likely = logits.astype(np.float64) + 2 * rng.normal(size=(n, classes))
    labels = likely.argmax(1)
    labels[rng.random(n) < 0.1] = IGNORE
    labels[rng.random(n) < 0.02] = classes + 3  # counts as ignored
    labels[labels == classes // 2] = 0  # a class that no label names
    labels[0] = 0
    return logits, labels.astype(label_dtype)


def compute(cp, logits, labels, *, point_to_slot=None, rows=None, pitch=None, ignore=IGNORE):
    """loss, dlogits. `logits` are those of the points; they are put into `rows` rows of `pitch` elements."""
    n, classes = logits.shape
    rows, pitch = n if rows is None else rows, classes if pitch is None else pitch
    given = np.full((rows, pitch), np.nan, logits.dtype)  # what belongs to no point is not read
    place = np.arange(n) if point_to_slot is None else point_to_slot
    given[place[:n][place[:n] >= 0], :classes] = logits[place[:n] >= 0]

    def add(steps, inputs, results):
        *both, places = inputs
        losses.add_loss(
            steps,
            *(*both, *results),
            points=len(place),
            rows=rows,
            classes=classes,
            dtype=given.dtype,
            label_dtype=labels.dtype,
            ignore=ignore,
            point_to_slot=places,
            pitch=pitch,
        )

    inputs = [given, labels, None if point_to_slot is None else point_to_slot.astype(np.int32)]
    dlogits, loss = run(cp, add, inputs, [((rows, pitch), logits.dtype), ((), FLOAT32)])
    return loss, dlogits


def check(cp, n, classes, dtype=BFLOAT16, label_dtype=UINT8, seed=0):
    logits, labels = cases(n, classes, dtype, label_dtype, seed)
    loss, dlogits = compute(cp, logits, labels)
    exact_loss, exact = oracle(logits.astype(np.float64), labels)
    naive_loss, naive = oracle(logits.astype(np.float32), labels)
    note = f"{n} x {classes} {dtype} {label_dtype}"
    if classes > 1:
        assert_accurate(loss, naive_loss, exact_loss, note + " loss")
        assert_accurate(dlogits, naive.astype(dtype), exact, note)
    else:
        assert loss == 0 and not dlogits.any()
    valid = (labels != IGNORE) & (labels < classes)
    assert not dlogits[~valid].any(), note


def test_small_losses(cp):
    """For compute-sanitizer: several tiles and blocks, few classes."""
    check(cp, 300, 5)
    check(cp, 4200, 3, FLOAT32, INT32)


@pytest.mark.parametrize("label_dtype", LABELS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sizes(cp, dtype, label_dtype):
    for n in SIZES:
        check(cp, n, 19, dtype, label_dtype, seed=n)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("classes", [1, 2, 3, 31, 32, 33, 63, 64])
def test_numbers_of_classes(cp, classes, dtype):
    check(cp, 3000, classes, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_sweep(cp, dtype):
    check(cp, 34_688, 19, dtype)


def test_a_million_points(cp):
    check(cp, 1_000_000, 19)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_random_logits(cp, dtype):
    """Points whose errors are nearly those of another point are left out of the comparison of gradients."""
    rng = np.random.default_rng(5)
    n, classes = 34_688, 5
    logits = rng.normal(size=(n, classes)).astype(dtype)
    labels = rng.integers(0, classes, n).astype(np.uint8)
    loss, dlogits = compute(cp, logits, labels)
    exact_loss, exact = oracle(logits.astype(np.float64), labels)
    naive_loss, naive = oracle(logits.astype(np.float32), labels)
    assert_accurate(loss, naive_loss, exact_loss)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    errors = np.where(labels[:, None] == np.arange(classes), 1 - p, p)
    clear = np.ones(n, bool)
    for c in range(classes):
        order = np.argsort(errors[:, c])
        close = np.diff(errors[order, c]) < 5e-7
        clear[order[1:][close]] = clear[order[:-1][close]] = False
    assert clear.sum() > n // 10
    assert_accurate(dlogits[clear], naive.astype(dtype)[clear], exact[clear])


@pytest.mark.parametrize("label_dtype", LABELS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_in_slots(cp, dtype, label_dtype):
    """Points lie in any rows of wider logits, and some have none; the last have no label either.

    The same gradients, and 0 everywhere else.
    """
    n, classes, rows, pitch = 5000, 19, 5632, 24
    logits, labels = cases(n, classes, dtype, label_dtype)
    place = np.random.default_rng(6).permutation(rows)[:n]
    place[::50] = -1
    longer = np.concatenate([place, np.full(700, -1)])
    loss, dlogits = compute(cp, logits, labels, point_to_slot=longer, rows=rows, pitch=pitch)
    counted = np.where(place >= 0, labels, IGNORE).astype(label_dtype)
    expected_loss, expected = compute(cp, logits, counted)
    assert loss == expected_loss
    assert (dlogits[place[place >= 0], :classes] == expected[place >= 0]).all() and expected.any()
    dlogits[place[place >= 0], :classes] = 0
    assert not dlogits.any()


def test_without_points(cp):
    loss, dlogits = compute(cp, np.zeros((0, 19), np.float32), np.zeros(0, np.uint8))
    assert loss == 0 and dlogits.shape == (0, 19)
    loss, dlogits = compute(cp, np.zeros((0, 3), np.float32), np.zeros(0, np.uint8), rows=16)
    assert loss == 0 and not dlogits.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_all_ignored(cp, dtype):
    logits, _ = cases(1000, 19, dtype, UINT8)
    logits[5] = np.nan
    for labels in (np.full(1000, IGNORE, np.uint8), np.full(1000, -7, np.int32), np.full(1000, 19, np.int32)):
        loss, dlogits = compute(cp, logits, labels)
        assert loss == 0 and not dlogits.any()


def test_ignore_may_be_a_class(cp):
    logits, labels = cases(1000, 19, FLOAT32, INT32)
    loss, dlogits = compute(cp, logits, labels, ignore=0)
    exact_loss, exact = oracle(logits.astype(np.float64), labels, 0)
    naive_loss, naive = oracle(logits, labels, 0)
    assert_accurate(loss, naive_loss, exact_loss)
    assert_accurate(dlogits, naive, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_and_infinity(cp, dtype):
    """NaN in a point that counts gives a loss that is NaN; in a point that does not, it changes nothing."""
    logits, labels = cases(1000, 19, dtype, UINT8)
    expected = compute(cp, logits, labels)
    labels[7] = IGNORE
    without = compute(cp, logits, labels)
    assert without[0] != expected[0]
    logits[7, 3] = np.nan
    loss, dlogits = compute(cp, logits, labels)
    assert loss == without[0] and dlogits.tobytes() == without[1].tobytes()
    labels[7] = 2
    loss, dlogits = compute(cp, logits, labels)
    assert np.isnan(loss) and np.isnan(dlogits[7].astype(np.float32)).all()
    logits[7, 3] = np.inf
    assert np.isnan(compute(cp, logits, labels)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_saturated_probabilities(cp, dtype):
    """Errors of exactly 0 and 1, and points that are all alike."""
    logits = np.zeros((500, 4), dtype)
    logits[:, 1] = 200
    labels = np.where(np.arange(500) < 400, 1, 2).astype(np.uint8)
    loss, dlogits = compute(cp, logits, labels)
    exact_loss, exact = oracle(logits.astype(np.float64), labels)
    naive_loss, naive = oracle(logits.astype(np.float32), labels)
    assert_accurate(loss, naive_loss, exact_loss)
    assert_accurate(dlogits, naive.astype(dtype), exact)
