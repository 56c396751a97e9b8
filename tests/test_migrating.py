# SPDX-License-Identifier: Apache-2.0
"""Both sides of every row of docs/migrating.md run and give the same.

The left sides call SciPy, or transcripts of what the documentation of the other libraries says: naive, in NumPy.
"""

from __future__ import annotations

import doctest
import functools
import re
from types import SimpleNamespace

import clouds
import numpy as np
import pytest
import test_docs
from scipy.sparse import csr_array  # noqa: F401 - a row uses it
from scipy.spatial import cKDTree

import gpu3d
from gpu3d.reference import transport

PAGE = test_docs.ROOT / "docs" / "migrating.md"
TEXT = PAGE.read_text(encoding="utf-8")


def squared(x, y):
    """All squared distances in float64."""
    return ((x[:, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(axis=2)


# ---- PyTorch3D -----------------------------------------------------------------------------------------------------


def knn_points(p1, p2, lengths1, lengths2, K=1, return_nn=False):
    """Squared distances and indices in the cloud, nearest first, padded with 0."""
    dists, idx = np.zeros((*p1.shape[:2], K)), np.zeros((*p1.shape[:2], K), int)
    for b, (n, m) in enumerate(zip(lengths1, lengths2, strict=True)):
        d2 = squared(p1[b, :n], p2[b, :m])
        order = np.argsort(d2, axis=1, kind="stable")[:, :K]
        idx[b, :n, : order.shape[1]] = order
        dists[b, :n, : order.shape[1]] = np.take_along_axis(d2, order, axis=1)
    nn = np.stack([p2[b][idx[b]] for b in range(len(p1))]) if return_nn else None
    return SimpleNamespace(dists=dists, idx=idx, knn=nn)


def ball_query(p1, p2, lengths1, lengths2, K=500, radius=0.2):
    """The first K of the points within the radius by index; padded with 0 and -1."""
    dists, idx = np.zeros((*p1.shape[:2], K)), np.full((*p1.shape[:2], K), -1)
    for b, (n, m) in enumerate(zip(lengths1, lengths2, strict=True)):
        for i, row in enumerate(squared(p1[b, :n], p2[b, :m])):
            (found,) = (row < radius**2).nonzero()
            idx[b, i, : len(found[:K])], dists[b, i, : len(found[:K])] = found[:K], row[found[:K]]
    return SimpleNamespace(dists=dists, idx=idx)


def farthest(points, k, start=0):
    """Farthest point sampling: the naive loop."""
    taken, closest = [start], np.full(len(points), np.inf)
    while len(taken) < min(k, len(points)):
        closest = np.minimum(closest, squared(points[taken[-1:]], points)[0])
        taken.append(int(closest.argmax()))
    return np.array(taken)


def sample_farthest_points(points, lengths, K=50):
    idx = np.full((len(points), K), -1)
    for b, n in enumerate(lengths):
        found = farthest(points[b, :n], K)
        idx[b, : len(found)] = found
    return np.stack([points[b][idx[b]] for b in range(len(points))]), idx


def chamfer_distance(
    x,
    y,
    x_lengths,
    y_lengths,
    weights=None,
    batch_reduction="mean",
    point_reduction="mean",
    single_directional=False,
):
    """Squared distances; a cloud without points has none and counts as one of one point."""
    sides = []
    for a, b, n, m in ((x, y, x_lengths, y_lengths), (y, x, y_lengths, x_lengths)):
        dists = knn_points(a, b, n, m).dists[..., 0]
        if weights is not None:
            dists = dists * weights[:, None]
        if point_reduction is not None:
            dists = dists.sum(axis=1)
        if point_reduction == "mean":
            dists = dists / np.maximum(n, 1)
        sides.append(dists)
    if point_reduction is None:
        return tuple(sides), None
    total = sides[0] if single_directional else sides[0] + sides[1]
    if batch_reduction is not None:
        total = total.sum()
    if batch_reduction == "mean":
        total = total / (len(x) if weights is None else weights.sum())
    return total, None


# ---- torch_cluster -------------------------------------------------------------------------------------------------


def knn(x, y, k, batch_x, batch_y):
    """Edges [2, E]: points of y, and the nearest of x in the same cloud."""
    d2 = np.where(batch_y[:, None] == batch_x, squared(y, x), np.inf)
    order = np.argsort(d2, axis=1, kind="stable")[:, :k]
    rows, columns = np.isfinite(np.take_along_axis(d2, order, axis=1)).nonzero()
    return np.stack([rows, order[rows, columns]])


def knn_graph(x, k, batch):
    """Edges from the neighbours to the points, without loops."""
    row, col = knn(x, x, k + 1, batch, batch)
    return np.stack([col, row])[:, row != col]


def radius(x, y, r, batch_x, batch_y, max_num_neighbors=32):
    near = np.where(batch_y[:, None] == batch_x, squared(y, x), np.inf) < r * r
    near &= near.cumsum(axis=1) <= max_num_neighbors
    return np.stack(near.nonzero())


def radius_graph(x, r, batch, max_num_neighbors=32):
    row, col = radius(x, x, r, batch, batch, max_num_neighbors + 1)
    return np.stack([col, row])[:, row != col]


def nearest(x, y, batch_x, batch_y):
    return knn(y, x, 1, batch_y, batch_x)[1]


def fps(x, batch=None, ratio=0.5, random_start=True):
    assert not random_start
    batch = np.zeros(len(x), int) if batch is None else batch
    parts = [np.flatnonzero(batch == b) for b in np.unique(batch)]
    return np.concatenate([part[farthest(x[part], int(np.ceil(ratio * len(part))))] for part in parts])


def grid_cluster(pos, size):
    """The number of each point's voxel, by its place in the grid that begins at the minimum."""
    voxel = ((pos - pos.min(axis=0)) / np.float32(size)).astype(int)
    counts = ((pos.max(axis=0) - pos.min(axis=0)) / np.float32(size)).astype(int) + 1
    return voxel @ [1, counts[0], counts[0] * counts[1]]


# ---- Open3D --------------------------------------------------------------------------------------------------------


def voxel_means(points, size, low):
    """The mean of the points of each voxel of a grid that begins at `low`, in no order."""
    _, inverse = np.unique(np.floor((points - low) / size), axis=0, return_inverse=True)
    return np.stack([points[inverse.reshape(-1) == i].mean(axis=0) for i in range(inverse.max() + 1)])


class PointCloud:
    def __init__(self, points):
        self.points = np.asarray(points, np.float64)

    def voxel_down_sample(self, size):
        return PointCloud(voxel_means(self.points, size, self.points.min(axis=0) - size / 2))

    def estimate_normals(self, count):
        near = np.argsort(squared(self.points, self.points), axis=1)[:, :count]
        self.normals = np.stack([np.linalg.eigh(np.cov(self.points[row].T))[1][:, 0] for row in near])

    def orient_normals_to_align_with_direction(self, direction=(0, 0, 1)):
        self.normals *= np.where(self.normals @ direction < 0, -1, 1)[:, None]

    def orient_normals_towards_camera_location(self, camera):
        towards = ((camera - self.points) * self.normals).sum(axis=1)
        self.normals *= np.where(towards < 0, -1, 1)[:, None]

    def compute_point_cloud_distance(self, target):
        return np.sqrt(squared(self.points, target.points).min(axis=1))

    def farthest_point_down_sample(self, count):
        return PointCloud(self.points[farthest(self.points, count)])


class KDTreeFlann:
    def __init__(self, cloud):
        self.points = cloud.points

    def _found(self, query, radius, count):
        d2 = squared(query[None], self.points)[0]
        order = np.argsort(d2)
        order = order[d2[order] < radius**2][:count]
        return len(order), order, d2[order]

    def search_knn_vector_3d(self, query, knn):
        return self._found(query, np.inf, knn)

    def search_radius_vector_3d(self, query, radius):
        return self._found(query, radius, None)

    def search_hybrid_vector_3d(self, query, radius, max_nn):
        return self._found(query, radius, max_nn)


# ---- PTv3, GeomLoss, APML ------------------------------------------------------------------------------------------


def grid_coord(points, batch, size):
    """Voxels from the minimum of each cloud."""
    low = np.stack([points[batch == b].min(axis=0) for b in range(batch.max() + 1)])
    return np.floor((points - low[batch]) / np.float32(size)).astype(int)


def encode(grid, batch, depth=16, order="z"):
    x, y, z = grid[:, [1, 0, 2] if order == "z-trans" else [0, 1, 2]].T
    key = np.zeros(len(grid), int)
    for i in range(depth):
        for place, axis in enumerate((z, y, x)):
            key |= (axis >> i & 1) << (3 * i + place)
    return batch << depth * 3 | key


def sinkhorn(cost, blur):
    """Entropic transport between uniform weights, in the log domain, the blur decreasing from the largest cost."""
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    soft = lambda eps, h: -eps * np.logaddexp.reduce(h, axis=1)  # noqa: E731
    for eps in [*np.geomspace(cost.max(), blur, 40), *[blur] * 100]:
        f = soft(eps, (g - cost) / eps - np.log(m))
        g = soft(eps, (f - cost.T) / eps - np.log(n))
    return f.mean() + g.mean()


class SamplesLoss:
    def __init__(self, loss, p, blur):
        assert loss == "sinkhorn" and p == 1
        self.blur = blur

    def __call__(self, x, y):
        """Debiased, one value a cloud of a batch."""
        if x.ndim == 3:
            return np.array([self(*clouds) for clouds in zip(x, y, strict=True)])
        xy, xx, yy = (sinkhorn(np.sqrt(squared(*pair)), self.blur) for pair in ((x, y), (x, x), (y, y)))
        return xy - (xx + yy) / 2


def weights(cost, p_min=0.8):
    """The rows' weights of the dense definition. If the two nearest tie, all weights of the row are equal."""
    low = np.sort(cost, axis=1)[:, :2]
    gap = low[:, 1:] - low[:, :1]
    sharp = np.log((cost.shape[1] - 1) / (1 - p_min)) / np.maximum(gap, 1e-8)
    k = np.where(gap == 0, 1, np.exp(-(cost - low[:, :1]) * sharp))
    return k / k.sum(axis=1, keepdims=True)


def transported(plan, cost, iterations=20):
    """The loss of a plan after Sinkhorn, and the plan."""
    for _ in range(iterations):
        plan = plan / (plan.sum(axis=1, keepdims=True) + 1e-8)
        plan = plan / (plan.sum(axis=0) + 1e-8)
    return (plan * cost).sum(), plan


def dense_plan(cost):
    return (weights(cost) + weights(cost.T).T) / 2


def sparse_plan(cost):
    """Each side keeps what is above the threshold; an entry is divided by the number of sides that keep it."""
    options = transport.Options(0.8, 1e-8, 20, "mean")
    (rows, p1), (columns, p2) = (transport._dense_side(c, options) for c in (cost, cost.T))
    return (p1 + p2.T) / np.maximum(rows.astype(int) + columns.T, 1)


def costs(x, y):
    return [np.sqrt(squared(*pair)) for pair in zip(x, y, strict=True)]


class AdaptiveProbabilisticMatchingLoss:
    def __call__(self, x, y):
        return np.mean([transported(dense_plan(cost), cost)[0] for cost in costs(x, y)])


def apml_sparse(x, y):
    return sum(transported(sparse_plan(cost), cost)[0] for cost in costs(x, y))


# ---- the rows ------------------------------------------------------------------------------------------------------


@functools.cache
def namespace():
    """What the rows use: the transcripts, and what the code blocks of the page make."""
    made = {**globals(), "argsort": functools.partial(np.argsort, kind="stable"), "KDTreeSearchParamKNN": int}
    for example in doctest.DocTestParser().get_examples(TEXT):
        if example.exc_msg is None:
            exec(example.source, made)
    rng = np.random.default_rng(1)
    made |= {"tree": cKDTree(made["p"]), "pcd": PointCloud(made["p"]), "target": PointCloud(made["q"])}
    made |= {"tree3d": KDTreeFlann(made["pcd"]), "camera": np.array([0.5, 0.5, 3]), "w": np.array([0.25, 2])}
    x = rng.random((2, 40, 3))
    return made | {"x": x.astype(np.float32), "y": (x + rng.normal(0, 0.05, x.shape)).astype(np.float32)}


def run(code):
    """The value of the last of the statements."""
    *statements, last = code.split("; ")
    made = dict(namespace())
    for statement in statements:
        exec(statement, made)
    return eval(last, made)


ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| ?(.*) ?\|$", TEXT, re.MULTILINE)


def packed(there, here):
    """Results of PyTorch3D without their padding."""
    return gpu3d.interop.pack(there, namespace()["n1"])[0] if np.shape(there)[:2] == (2, 60) else there


def close(there, here):
    np.testing.assert_allclose(here, there, rtol=2e-5, atol=1e-7)


def same(there, here):
    np.testing.assert_array_equal(here, there)


def same_sets(there, here):
    """The same neighbours in every row; indices may count in the cloud there."""
    if np.asarray(here).dtype.kind == "i":
        here = np.where(here < 0, here, here - namespace()["first"])
        same(np.sort(there, axis=1), np.sort(here, axis=1))
    else:
        close(np.sort(there, axis=1), np.sort(here, axis=1))


def same_columns(there, here):
    same(*(x[:, np.lexsort(x)] for x in (np.asarray(there), np.asarray(here))))


def same_rows(there, here):
    same_columns(np.transpose(there), np.transpose(here))


def same_lists(there, here):
    assert [list(x) for x in there] == [list(x) for x in here] and max(map(len, there)) > 1


def same_numbers(there, here):
    same(np.sort(there), np.sort(here))


def same_parts(there, here):
    """The same points are together."""
    same(there[:, None] == there, here[:, None] == here)
    assert here.max() > 3 and list(dict.fromkeys(here)) == list(range(here.max() + 1))


def same_but_for_sign(there, here):
    close(np.abs((there * here).sum(axis=1)), np.ones(len(here)))
    assert (there != here).any()


def another_grid(there, here):
    """The means of the voxels are those of a grid that begins at the minimum, and not those of Open3D's."""
    p = namespace()["p"].astype(np.float64)
    means = voxel_means(p, 0.25, p.min(axis=0))
    close(means[np.lexsort(means.T)], here[np.lexsort(here.T)])
    assert there.shape != here.shape or not np.allclose(there[np.lexsort(there.T)], here[np.lexsort(here.T)])


def within(share):
    def compare(there, here):
        np.testing.assert_allclose(here, there, rtol=share)

    return compare


def higher(there, here):
    assert 1.001 < there / here < 1.2


COMPARED = {  # rows whose sides are not simply close or, for integers, equal
    "ball_query(": same_sets,
    "radius(": same_columns,
    "radius_graph(": same_columns,
    "knn_graph(": same_columns,
    "grid_cluster(": same_parts,
    "tree.query_ball_point(q, 0.3, return_sorted": same_lists,
    "tree.query_ball_point(q, radii": same_lists,
    "tree.query_pairs(": same_rows,
    "pcd.voxel_down_sample(": another_grid,
    "pcd.estimate_normals(KDTreeSearchParamKNN(16)); pcd.normals": same_but_for_sign,
    "tree3d.search_radius": same_numbers,
    "SamplesLoss(": within(0.02),
    "AdaptiveProbabilisticMatchingLoss(": within(1e-3),
    "apml_sparse(": higher,
}


@pytest.mark.parametrize(("left", "right"), [row[:2] for row in ROWS], ids=[row[0] for row in ROWS])
def test_row(left, right):
    there, here = run(left), run(right)
    compare = [function for start, function in COMPARED.items() if left.startswith(start)]
    if not compare:
        compare = [same if np.asarray(here).dtype.kind in "iu" else close]
    there = packed(there, here)
    if "sample_farthest_points" in left and np.ndim(there) == 3:
        there = there.reshape(-1, 3)
    compare[0](there, here)


def test_every_row_is_run():
    tables = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(tables) == len(ROWS) > 40
    for start in COMPARED:
        assert any(left.startswith(start) for left, *_ in ROWS), start


def test_the_numbers_of_apml():
    x, y = clouds.transport("near", 400, 400)
    (cost,) = costs(x[None], y[None])
    (loss, plan), (of_sparse, sparse) = (transported(of(cost), cost) for of in (dense_plan, sparse_plan))
    gradient, off = (((p / cost)[..., None] * (x[:, None] - y)).sum(axis=1) for p in (plan, sparse - plan))
    assert round(100 * (of_sparse / loss - 1), 1) == 0.3
    assert round(100 * np.linalg.norm(off) / np.linalg.norm(gradient), 1) == 2.3
    middle = np.arange(10)[:, None] * np.float32([10, 0, 0])
    around = (middle[:, None] + np.float32([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])).reshape(-1, 3)
    (cost,) = costs(middle[None], around[None])
    losses = *(transported(of(cost), cost)[0] for of in (dense_plan, sparse_plan)), gpu3d.apml(middle, around)
    assert [f"{value:.3g}" for value in losses] == ["307", "58.8", "49.7"]
    for number in ("0.3 %", "2.3 %", "307", "58.8", "49.7"):
        assert number in TEXT


def test_lengths_on_the_cpu_are_taken():
    """From a CPU tensor; one on a GPU is an error that names tolist."""
    torch = pytest.importorskip("torch")
    made = namespace()
    tensor = {"query_lengths": torch.tensor(made["n1"]), "lengths": torch.tensor(made["n2"])}
    same(
        gpu3d.knn(made["a"], made["b"], 8, **made["search"]).indices,
        gpu3d.knn(made["a"], made["b"], 8, **tensor).indices,
    )
    padded = torch.from_numpy(made["p1"])
    kept, lengths = gpu3d.interop.pack(padded, torch.tensor(made["n1"]))
    assert isinstance(kept, torch.Tensor) and lengths == made["n"]
    with pytest.raises(ValueError, match=r"pack them first: x, x_lengths = gpu3d\.interop\.pack\(x, x_lengths\)"):
        gpu3d.chamfer(padded, padded, x_lengths=torch.tensor(made["n1"]))
