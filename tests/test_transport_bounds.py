# SPDX-License-Identifier: Apache-2.0
"""The bounds of docs/apml.md on the dropped share and on the errors of plan, loss and gradients."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
from test_transport import options

from gpu3d.reference import transport as reference

KINDS = clouds.TRANSPORTS
THRESHOLDS = (1e-1, 1e-3, 1e-5, 1e-8, 1e-12)


class Dropped:
    """What a threshold drops of the plan of two clouds before Sinkhorn, and the terms of the bounds."""

    def __init__(self, x, y, threshold, iterations):
        c = reference._distances(x[:, None], y)
        p1, p2 = reference._dense_side(c, options(threshold=0))[1], reference._dense_side(c.T, options(threshold=0))[1]
        kept = [reference._dense_side(side, options(threshold=threshold))[0] for side in (c, c.T)]
        self.shares = [np.where(k, 0, p).sum(axis=1) for k, p in zip(kept, (p1, p2), strict=True)]
        self.counts = [(~k).sum(axis=1) for k in kept]
        dense = (p1 + p2.T) / 2
        self.dropped = (np.where(kept[0], 0, p1) + np.where(kept[1], 0, p2).T) / 2
        delta = max(share.max() for share in self.shares)
        u, v, self.grown = np.ones(len(x)), np.ones(len(y)), 0.0
        for _ in range(iterations):
            for one, of, lost in ((u, dense, self.dropped), (v, dense.T, self.dropped.T)):
                other = v if one is u else u
                sums = of @ other
                share = max(delta, (lost @ other / sums).max())
                self.grown -= 2 * np.log1p(-min(share, 1 - 1e-12))
                one /= one * sums + reference.EPSILON
        self.lost = u[:, None] * self.dropped * v  # the dropped part of the plan after Sinkhorn
        self.diameter = c.max()


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_drops_no_more_than_its_bound(kind, threshold):
    x, y = clouds.transport(kind, 150, 120)
    found = Dropped(x, y, threshold, 0)
    for shares, counts in zip(found.shares, found.counts, strict=True):
        assert (shares <= counts * threshold).all() and shares.max() > 0
    dense, sparse = (reference.dense(x, y, options(threshold=at, iterations=0)).plan for at in (0, threshold))
    total = sum(shares.sum() for shares in found.shares)
    assert 0 < np.abs(sparse - dense).sum() <= total * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_plan_loss_and_gradients_stay_within_their_bounds(kind, threshold, iterations):
    x, y = clouds.transport(kind, 150, 120)
    found = Dropped(x, y, threshold, iterations)
    if found.grown > 50:
        return  # the bound is useless here, see docs/apml.md
    dense, sparse = (reference.dense(x, y, options(threshold=at, iterations=iterations)) for at in (0, threshold))
    np.testing.assert_array_less(sparse.plan, dense.plan * np.exp(found.grown) * (1 + 1e-9) + 1e-300)
    rest = np.maximum(dense.plan - found.lost, 0)
    assert (sparse.plan >= rest * np.exp(-found.grown) * (1 - 1e-9) - 1e-15).all()
    factor = np.expm1(found.grown)
    apart = np.abs(sparse.plan - dense.plan)
    for axis in (0, 1):
        limit = factor * dense.plan.sum(axis=axis) + found.lost.sum(axis=axis)
        assert (apart.sum(axis=axis) <= limit * (1 + 1e-9) + 1e-12).all()
    limit = factor * dense.loss + found.lost.sum() * found.diameter
    assert abs(sparse.loss - dense.loss) <= limit * (1 + 1e-9) + 1e-12
    for got, exact, axis in ((sparse.dpred, dense.dpred, 1), (sparse.dtarget, dense.dtarget, 0)):
        limit = factor * dense.plan.sum(axis=axis) + found.lost.sum(axis=axis)
        assert (np.linalg.norm(got - exact, axis=1) <= limit * (1 + 1e-9) + 1e-12).all()


def test_the_bounds_say_something():
    """If each point has a partner, a threshold of 1e-8 changes no plan by 1e-4, and the bound is as small."""
    y = clouds.transport("near", 150, 150)[1]
    x = (y + np.random.default_rng(0).normal(0, 0.01, y.shape)).astype(np.float32)
    found = Dropped(x, y, 1e-8, 20)
    assert 0 < np.expm1(found.grown) + found.lost.sum() / 150 < 1e-4


def test_sinkhorn_enlarges_what_was_dropped():
    """For two samples of a surface, 20 iterations enlarge the dropped share a million times."""
    x, y = clouds.transport("independent", 300, 300)
    errors = []
    for iterations in (0, 20):
        dense, sparse = (reference.dense(x, y, options(threshold=at, iterations=iterations)).plan for at in (0, 1e-8))
        errors.append(np.abs(sparse - dense).sum() / dense.sum())
    assert errors[0] < 1e-7 and errors[1] > 1e-3
