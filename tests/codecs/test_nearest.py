"""The search by boxes finds what comparing every vector with every point finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from waterfill.codecs import nearest
from waterfill.codecs.grids import available, grid
from waterfill.codecs.nearest import IntervalSearch, NearestSearch

REACH = nearest.REACH

Shipped = tuple[torch.Tensor, NearestSearch]


def squared_distances(vectors: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """float64 `[N, n]`, from the differences themselves."""
    x, c = vectors.numpy().astype(np.float64), points.numpy().astype(np.float64)
    return sum(np.square(x[:, a, None] - c[:, a]) for a in range(c.shape[1]))


def check(vectors: torch.Tensor, points: torch.Tensor, search: NearestSearch) -> None:
    """Same indices as brute force; where two points are equally near but for rounding, either will do."""
    found = search.search(vectors).numpy()
    distances = squared_distances(vectors, points)
    chosen = distances[np.arange(len(found)), found]
    tie = 1e-14 * (vectors.double().square().sum(1).numpy() + 1)
    wrong = np.flatnonzero(chosen > distances.min(axis=1) + tie)
    assert not len(wrong), f"{vectors[wrong[0]]}: {found[wrong[0]]} instead of {distances[wrong[0]].argmin()}"


def sample_grids() -> list[tuple[int, int]]:
    """Of every dimension the smallest grid, the largest, and one between."""
    sizes = {p: [n for q, n in available() if q == p] for p, _ in available() if p > 1}
    return [(p, n) for p, ns in sizes.items() for n in sorted({ns[0], ns[len(ns) // 2], ns[-1]})]


@pytest.fixture(scope="module", params=sample_grids(), ids=lambda pn: f"p{pn[0]}-n{pn[1]}")
def shipped(request: pytest.FixtureRequest) -> Shipped:
    points = grid(*request.param).points
    return points, NearestSearch(points)


def test_gaussian_vectors(shipped: Shipped) -> None:
    check(torch.randn(1000, shipped[0].shape[1]), *shipped)


def test_vectors_far_out(shipped: Shipped) -> None:
    p = shipped[0].shape[1]
    heavy_tailed = torch.randn(500, p) / torch.rand(500, 1).square()
    check(torch.cat([heavy_tailed, torch.full((1, p), -1e18)]), *shipped)


def test_vectors_between_points(shipped: Shipped) -> None:
    """As close as float32 comes to the borders between cells, where any mistake in ruling out points would show."""
    points, search = shipped
    first = torch.randint(len(points), (300,))
    neighbours = np.argsort(squared_distances(points[first], points), axis=1)[:, 1:4]
    for k in range(neighbours.shape[1]):
        check((points[first] + points[neighbours[:, k]]) / 2, points, search)


def test_vectors_on_edges_of_boxes(shipped: Shipped) -> None:
    points, search = shipped
    p = points.shape[1]
    edges = torch.from_numpy(nearest._edges(points.double().numpy(), round(nearest.BOXES ** (1 / p)))).float()
    on_edges = torch.stack([edges[torch.randint(len(edges), (300,)), a] for a in range(p)], dim=1)
    for towards in (-torch.inf, 0.0, torch.inf):
        check(torch.nextafter(on_edges, torch.tensor(towards)), points, search)


def test_points_find_themselves(shipped: Shipped) -> None:
    points, search = shipped
    assert torch.equal(search.search(points), torch.arange(len(points)))


@settings(max_examples=20)
@given(data=st.data(), p=st.integers(2, 4), n=st.integers(1, 20))
def test_any_points(data: st.DataObject, p: int, n: int) -> None:
    """Also points that coincide, lie on a line or outside all boxes: few distinct values make all of these likely."""
    value = st.sampled_from([-9.0, -REACH, -1.5, -0.3, 0.0, 2.0**-20, 0.3, 1.0, REACH, 6.0])
    points = torch.from_numpy(data.draw(arrays(np.float32, (n, p), elements=value)))
    vectors = torch.from_numpy(data.draw(arrays(np.float32, (30, p), elements=value)))
    check(torch.cat([vectors, vectors + torch.randn(30, p) / 8]), points, NearestSearch(points))


def test_first_of_equals_wins() -> None:
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert NearestSearch(points).search(torch.tensor([[0.0, 3.0], [2.0, 0.0], [-9.0, 1.0]])).tolist() == [0, 0, 1]


def test_number_of_vectors_is_free() -> None:
    search = NearestSearch(grid(2, 16).points)
    vectors = torch.randn(3000, 2)
    assert search.search(vectors[:0]).tolist() == []
    assert torch.equal(search.search(vectors[:1]), search.search(vectors)[:1])
    crowd = vectors[:1].expand(300_000, 2).contiguous()  # more than is compared at a time
    assert search.search(crowd).unique().tolist() == search.search(vectors[:1]).tolist()


@pytest.mark.parametrize("n", [2, 3, 16, 64, 255, 256])
def test_intervals_on_a_line(n: int) -> None:
    """Bounds themselves, their neighbours and what lies far outside, against torch."""
    points = grid(1, n).points[:, 0]
    bounds = (points[1:] + points[:-1]) / 2
    near = [torch.nextafter(bounds, torch.tensor(side)) for side in (-9.0, 9.0)]
    odd = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf])
    values = torch.cat([torch.randn(10_000), bounds, *near, odd])
    assert torch.equal(IntervalSearch(bounds.numpy()).search(values), torch.bucketize(values, bounds))


def test_intervals_closer_than_the_steps_of_the_table() -> None:
    bounds, values = torch.randn(5000).mul(0.1).sort().values, torch.randn(100, 30)
    assert torch.equal(IntervalSearch(bounds.numpy()).search(values), torch.bucketize(values, bounds))
