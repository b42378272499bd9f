"""Nearest-neighbour graphs against dense formulas; duplicates, ties, approximate search, and all that is refused."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.graph import Graph, _approximate, knn_graph

knn_module: Any = sys.modules["kantor.graph.knn_graph"]
F32, F64 = torch.float32, torch.float64


def points(n: int, d: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distances(x: Tensor) -> Tensor:
    return (x.double()[:, None] - x.double()).square().sum(-1).sqrt()


# --- the formulas of the papers, dense ---


def dense_self_tuning(x: Tensor, n_top: int, sigma: int) -> Tensor:
    """Weights of the few-shot experiments: strict truncation, row scale, normalised by row sums, made symmetric."""
    d = distances(x)
    ascending = d.sort(1).values
    t, s = ascending[:, n_top - 1], ascending[:, sigma - 1]
    s = s.clamp(min=(1e-6 if x.dtype is F64 else 1e-4) * float(d[d > 0].median()))
    w = torch.where(d < t[:, None], torch.exp(-((d / s[:, None]) ** 2)), 0)
    r = w.sum(1)
    scale = torch.where(r > 0, r.pow(-0.5), 0)
    W = scale[:, None] * w * scale
    return (W + W.T) / 2


def dense_gaussian(x: Tensor, n_top: int, sigma: float) -> Tensor:
    """Weights of the synthetic experiments: the n_top largest of a row, over their sum."""
    w = torch.exp(-((distances(x) / sigma) ** 2))
    w = torch.where(w >= w.sort(1, descending=True).values[:, n_top - 1 : n_top], w, 0)
    return w / w.sum(1, keepdim=True)


@pytest.mark.parametrize(("n", "d", "k", "bandwidth_k"), [(60, 3, 7, 4), (50, 1, 4, 2), (80, 40, 7, 12), (9, 2, 8, 9)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_self_tuning(n: int, d: int, k: int, bandwidth_k: int, dtype: torch.dtype) -> None:
    x = points(n, d, dtype)
    graph = knn_graph(x, k, bandwidth_k=bandwidth_k)
    assert graph.symmetric
    assert graph.dtype is dtype
    assert graph.recall is None
    tolerance = 1e-12 if dtype is F64 else 1e-6
    expected = dense_self_tuning(x, k + 1, bandwidth_k)
    torch.testing.assert_close(graph.dense().double(), expected, rtol=0, atol=tolerance)
    one_sided = knn_graph(x, k, bandwidth_k=bandwidth_k, symmetrize="none", normalize=None)
    assert one_sided.rowptr.diff().tolist() == [k] * n  # k entries, the point itself among them
    assert one_sided.diagonal.tolist() == [1.0] * n


@pytest.mark.parametrize(("n", "d", "k", "sigma"), [(60, 3, 7, 0.5), (50, 1, 1, 0.1), (40, 2, 39, 3.0)])
def test_gaussian(n: int, d: int, k: int, sigma: float) -> None:
    x = points(n, d)
    graph = knn_graph(x, k, weights="gaussian", sigma=sigma)
    torch.testing.assert_close(graph.dense(), dense_gaussian(x, k, sigma), rtol=0, atol=1e-14)
    torch.testing.assert_close(graph.degree, torch.ones(n, dtype=F64))
    spelled = knn_graph(x, k, weights="gaussian", sigma=sigma, symmetrize="none", normalize="row")
    assert torch.equal(spelled.dense(), graph.dense())
    plain = dense_gaussian(x, k, sigma)
    plain = plain / plain.diagonal()[:, None]  # the self loops had the weight one
    both = knn_graph(x, k, weights="gaussian", sigma=sigma, symmetrize="mean", normalize=None)
    torch.testing.assert_close(both.dense(), (plain + plain.T) / 2)
    unit = knn_graph(x, k, weights="gaussian", sigma=sigma, symmetrize="mean", normalize="row")
    torch.testing.assert_close(unit.degree, torch.ones(n, dtype=F64))


def test_gaussian_finds_a_width() -> None:
    x = points(41, 3)
    sigma = float(distances(x).sort(1).values[:, 3].median())
    graph = knn_graph(x, 5, weights="gaussian", bandwidth_k=4)
    torch.testing.assert_close(graph.dense(), dense_gaussian(x, 5, sigma))


@pytest.mark.parametrize("symmetrize", ["none", "max", "mean"])
def test_binary_and_distance_agree_with_sklearn(symmetrize: Any) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, k = points(50, 4), 6
    plain: dict[str, Any] = {"symmetrize": symmetrize, "normalize": None}
    for weights, mode, include_self in (("binary", "connectivity", True), ("distance", "distance", False)):
        expected = neighbors.kneighbors_graph(x.numpy(), k, mode=mode, include_self=include_self).toarray()
        if symmetrize != "none":
            expected = np.maximum(expected, expected.T) if symmetrize == "max" else (expected + expected.T) / 2
        graph = knn_graph(x, k, weights=weights, **plain)  # type: ignore[arg-type]
        np.testing.assert_allclose(graph.dense(), expected, rtol=1e-12)
    A = knn_graph(x, k, weights="binary", symmetrize="max", normalize=None)
    assert torch.equal(knn_graph(x, k, weights="binary").dense(), A.normalized("sym").dense())
    assert knn_graph(x, k, weights="distance").symmetric


def test_permutation_equivariance() -> None:
    x = points(40, 3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for weights in ("self_tuning", "gaussian", "binary", "distance"):
        graph, permuted = knn_graph(x, weights=weights), knn_graph(x[order], weights=weights)  # type: ignore[arg-type]
        torch.testing.assert_close(permuted.dense(), graph.dense()[order][:, order], rtol=1e-13, atol=0)


def test_far_clusters_do_not_connect() -> None:
    x = torch.cat([points(20, 2), points(20, 2, seed=1) + 1e4])
    count, labels = knn_graph(x).components()
    assert count >= 2
    assert not set(labels[:20].tolist()) & set(labels[20:].tolist())


def test_no_derivative_reaches_the_points() -> None:
    assert not knn_graph(points(20, 2).requires_grad_()).weight.requires_grad


# --- duplicates and ties ---


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_ties_are_truncated_strictly(dtype: torch.dtype) -> None:
    line = torch.arange(8, dtype=dtype)[:, None]  # inner points have two neighbours at each distance
    graph = knn_graph(line, 2, bandwidth_k=2, symmetrize="none", normalize=None)
    expected = torch.eye(8, dtype=dtype)
    expected[0, 1] = expected[7, 6] = torch.exp(torch.tensor(-1.0, dtype=dtype))
    assert torch.equal(graph.dense(), expected)
    torch.testing.assert_close(
        knn_graph(line, 3, bandwidth_k=3).dense().double(), dense_self_tuning(line, 4, 3), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("weights", ["self_tuning", "gaussian", "binary", "distance"])
def test_duplicates(dtype: torch.dtype, weights: Any) -> None:
    x = points(30, 3, dtype)
    x[1:5] = x[0]  # enough for a scale of zero, too few for an empty row
    graph = knn_graph(x, 7, weights=weights, sigma=0.5)
    assert bool(graph.weight.isfinite().all())
    if weights == "self_tuning":
        expected = dense_self_tuning(x, 8, 4)
        torch.testing.assert_close(graph.dense().double(), expected, rtol=0, atol=1e-6 if dtype is F32 else 1e-12)
        assert float(graph.degree.min()) > 0


def test_rows_of_many_duplicates_stay_empty(caplog: pytest.LogCaptureFixture) -> None:
    x = points(20, 2)
    x[:6] = 0.0
    graph = knn_graph(x, 4, bandwidth_k=3)
    assert graph.degree[:6].tolist() == [0.0] * 6
    torch.testing.assert_close(graph.dense(), dense_self_tuning(x, 5, 3), rtol=0, atol=1e-12)
    assert "6 points have k = 4 duplicates or more: their rows of the graph are empty; raise k" in caplog.text
    same = torch.zeros(9, 2)
    for weights in ("self_tuning", "gaussian", "binary", "distance"):
        every = knn_graph(same, 3, weights=weights)  # type: ignore[arg-type]
        assert bool(every.weight.isfinite().all())


# --- approximate search ---


def test_approximate_search(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With a stand-in for the library: candidates that are shuffled, incomplete and hold the point itself."""
    x = points(300, 5)
    true = distances(x).sort(1).indices[:, :30]

    def descend(x: Tensor, candidates: int, progress: bool) -> Any:
        order = torch.rand(300, min(candidates, 30), generator=torch.Generator().manual_seed(0)).argsort(1)
        found = true[:, : order.shape[1]].gather(1, order)
        found[7] = -1  # a point for which the search found nothing
        if candidates < 30:  # a poor search: the half of all points is cut off from its neighbours
            found[150:] = true[150:, 29:30]
        return found.numpy()

    monkeypatch.setattr(_approximate, "_descend", descend)
    exact = knn_graph(x, 9)
    with caplog.at_level(logging.INFO, "kantor"):
        graph = knn_graph(x, 9, method="approximate")
    assert graph.recall == 1.0
    assert "recall 1.000" in repr(graph)
    assert "with 20 candidates a point" in caplog.text  # then it was repeated with more
    assert torch.equal(graph.col, exact.col)
    torch.testing.assert_close(graph.weight, exact.weight)

    monkeypatch.setattr(_approximate, "_REPEATS", 0)
    poor = knn_graph(x, 9, method="approximate")
    assert poor.recall is not None
    assert 0.4 < poor.recall < 0.6
    assert "recall 0.5" in caplog.text
    assert 'only, after 1 searches; pass method="exact"' in caplog.text


def test_many_points_are_searched_approximately(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, calls = points(50, 2), []
    monkeypatch.setattr(knn_module, "_MANY", 50)
    monkeypatch.setattr(knn_module, "_MANY_COORDINATES", 100)
    monkeypatch.setattr(
        _approximate, "_descend", lambda x, *_: calls.append(1) or np.tile(np.arange(len(x)), (len(x), 1))
    )
    monkeypatch.setattr(_approximate, "available", lambda: True)
    assert knn_graph(x).recall == 1.0
    assert knn_graph(x, method="exact").recall is None
    assert knn_graph(x[:49]).recall is None
    assert len(calls) == 1
    monkeypatch.setattr(_approximate, "available", lambda: False)
    assert knn_graph(x).recall is None
    assert "50 points are searched exactly" in caplog.text
    assert 'pip install "kantor[graph]"' in caplog.text


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynndescent", None)
    with pytest.raises(
        ImportError, match=r'knn_graph: method="approximate" needs pynndescent: pip install "kantor\[gra'
    ):
        knn_graph(points(20, 2), method="approximate")


@pytest.mark.slow
def test_pynndescent(size: str) -> None:
    pytest.importorskip("pynndescent")
    if size == "small":
        pytest.skip("the library compiles itself for longer than all other tests of graphs take: --size full")
    x = points(20_000, 64, F32)
    graph = knn_graph(x, 10, method="approximate")
    assert graph.recall is not None
    assert graph.recall >= 0.95
    assert torch.equal(knn_graph(x, 10, method="approximate").weight, graph.weight)


# --- what is refused ---


@pytest.mark.parametrize(
    ("x", "options", "error", "match"),
    [
        ([[1.0]], {}, TypeError, r"x: expected a torch.Tensor, got list"),
        (torch.ones(9, 2, dtype=torch.int64), {}, TypeError, r"x: expected dtype float32 or float64, got int64"),
        (torch.ones(9), {}, ValueError, r"x: expected shape \(n, d\), a row a point, d >= 1, got \(9,\)"),
        (torch.ones(2, 9, 2), {}, ValueError, r"x: expected shape \(n, d\)"),
        (torch.ones(9, 0), {}, ValueError, r"x: expected shape \(n, d\), a row a point, d >= 1, got \(9, 0\)"),
        (3e38 * torch.eye(9), {}, ValueError, r"x: expected distances within the range of float32; scale"),
        (torch.full((9, 2), torch.nan), {}, ValueError, r"x: expected finite values, got nan at \(0, 0\)"),
        (torch.full((9, 2), torch.inf), {}, ValueError, r"x: expected finite values, got inf"),
        (torch.ones(9, 2), {"k": 0}, ValueError, r"k: expected an integer >= 1, got 0"),
        (torch.ones(9, 2), {"k": 2.5}, ValueError, r"k: expected an integer >= 1, got 2.5"),
        (torch.ones(9, 2), {"k": 9}, ValueError, r"k: expected 1\.\.8, fewer than the 9 points, got 9"),
        (torch.ones(0, 2), {}, ValueError, r"k: expected 1\.\.-1, fewer than the 0 points, got 7"),
        (torch.ones(9, 2), {"bandwidth_k": 0}, ValueError, r"bandwidth_k: expected an integer >= 1, got 0"),
        (torch.ones(9, 2), {"bandwidth_k": 10}, ValueError, r"bandwidth_k: expected 1\.\.9, at most the number of"),
        (torch.ones(9, 2), {"sigma": 0.0}, ValueError, r"sigma: expected a positive number, got 0.0"),
        (torch.ones(9, 2), {"sigma": float("nan")}, ValueError, r"sigma: expected a positive number, got nan"),
        (
            torch.ones(9, 2),
            {"weights": "cosine"},
            ValueError,
            r"weights: expected one of 'self_tuning', .* got 'cosine'",
        ),
        (torch.ones(9, 2), {"symmetrize": "min"}, ValueError, r"symmetrize: expected one of .* got 'min'"),
        (torch.ones(9, 2), {"normalize": "col"}, ValueError, r"normalize: expected one of .* got 'col'"),
        (torch.ones(9, 2), {"method": "fast"}, ValueError, r"method: expected one of .* got 'fast'"),
    ],
    ids=str,
)
def test_wrong_arguments(x: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=rf"^knn_graph: {match}"):
        knn_graph(x, **options)


def test_result_is_a_graph() -> None:
    graph = knn_graph(points(30, 2, F32))
    assert isinstance(graph, Graph)
    again = Graph(graph.rowptr, graph.col, graph.weight)  # all that the constructor checks holds
    assert torch.equal(again.col, graph.col)
