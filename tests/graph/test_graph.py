"""Graphs: what is accepted and refused, Laplacians and their largest eigenvalue, components, parts and order."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kantor._checks import host
from kantor.graph import Graph

F32, F64 = torch.float32, torch.float64


def graph_of(matrix: Tensor) -> Graph:
    rows, cols = matrix.nonzero(as_tuple=True)
    rowptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(rows, minlength=len(matrix)).cumsum(0)])
    return Graph(rowptr, cols, matrix[rows, cols])


def random_weights(n: int, density: float = 0.2, seed: int = 0, symmetric: bool = True) -> Tensor:
    """Dense non-negative weights with some self loops."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(n, n, dtype=F64, generator=generator)
    weight = torch.where(torch.rand(n, n, generator=generator) < density, weight, 0)
    return (weight + weight.T) / 2 if symmetric else weight


def build(rowptr: Any = (0, 1, 3, 4), col: Any = (1, 0, 2, 1), weight: Any = (1.0, 1.0, 2.0, 2.0)) -> Graph:
    return Graph(torch.tensor(rowptr, dtype=torch.int64), torch.tensor(col), torch.tensor(weight, dtype=F64))


PATH = torch.diag(torch.ones(9, dtype=F64), 1) + torch.diag(torch.ones(9, dtype=F64), -1)
STAR = torch.zeros(12, 12, dtype=F64)
STAR[0, 1:] = STAR[1:, 0] = 1
BIPARTITE = torch.zeros(13, 13, dtype=F64)
BIPARTITE[:5, 5:] = BIPARTITE[5:, :5] = 1


# --- what is kept ---


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_graph_is_its_matrix(dtype: torch.dtype, symmetric: bool) -> None:
    matrix = random_weights(20, symmetric=symmetric).to(dtype)
    matrix[3] = 0
    matrix[:, 3] = 0
    graph = graph_of(matrix)
    assert (graph.num_nodes, graph.num_edges) == (20, int((matrix > 0).sum()))
    assert (graph.dtype, graph.device.type, graph.symmetric) == (dtype, "cpu", symmetric)
    assert graph.rowptr.dtype is graph.col.dtype is torch.int32
    assert torch.equal(graph.dense(), matrix)
    assert torch.equal(graph.diagonal, matrix.diagonal())
    torch.testing.assert_close(graph.degree, matrix.sum(1))
    assert torch.equal(graph.T.dense(), matrix.T)
    assert torch.equal(graph.adjacency().dense(), matrix)
    assert torch.equal(graph.to_torch().to_dense(), matrix)
    np.testing.assert_array_equal(graph.to_scipy().toarray(), matrix.numpy())
    assert torch.equal(graph.rows, matrix.nonzero()[:, 0])
    assert (graph.transposed.col is graph.col) is symmetric  # read once where both are walked
    assert graph.transposed.rowptr.dtype is torch.int32


def test_rows_are_sorted_and_duplicates_summed() -> None:
    weight = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64, requires_grad=True)

    def dense(weight: Tensor) -> Tensor:
        return Graph(torch.tensor([0, 3, 4]), torch.tensor([1, 0, 1, 0]), weight).dense()

    assert dense(weight).tolist() == [[2.0, 5.0], [8.0, 0.0]]
    assert torch.autograd.gradcheck(dense, weight)


def test_no_nodes_and_no_edges() -> None:
    empty = Graph(torch.tensor([0]), torch.tensor([], dtype=torch.long), torch.tensor([]))
    lonely = Graph(torch.zeros(4, dtype=torch.long), torch.tensor([], dtype=torch.long), torch.tensor([]))
    for graph, n in ((empty, 0), (lonely, 3)):
        assert graph.num_nodes == n
        assert graph.symmetric
        assert graph.lambda_max() == graph.lambda_max_bound() == 0.0
        assert graph.components()[0] == n
        assert graph.laplacian().dense().shape == (n, n)
        for other in (graph.T, graph.normalized(), graph.symmetrized(), graph.subgraph(torch.arange(n))):
            assert other.dense().tolist() == graph.dense().tolist()
        assert graph.largest_component()[0].num_nodes == min(n, 1)
        assert graph.with_self_loops().dense().tolist() == torch.eye(n).tolist()
    assert repr(lonely) == "Graph(3 nodes, 0 edges, symmetric, 3 components, float32, cpu)"


def test_repr_says_what_is_known() -> None:
    graph = build()
    assert repr(graph) == "Graph(3 nodes, 4 edges, symmetric, weights 1 to 2, float64, cpu)"
    graph.components()
    graph.recall = 0.98765
    assert repr(graph).endswith("weights 1 to 2, 1 component, recall 0.988, float64, cpu)")
    assert "not symmetric" in repr(build(weight=(1.0, 3.0, 2.0, 2.0)))


def test_copies_and_conversions() -> None:
    graph = build()
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(other.dense(), graph.dense())
    assert graph.to(F64) is graph
    assert graph.to(F32).dtype is F32
    assert graph.to("cpu", F32).transposed is not None
    assert graph.to("meta").num_edges == 4
    with pytest.raises(TypeError, match=r"Graph.to: dtype: expected dtype float32 or float64, got float16"):
        graph.to(torch.float16)


def test_what_is_kept_follows_the_weights() -> None:
    """Nothing is kept of weights that are trained, and nothing survives that someone writes into them."""
    graph = build()
    assert graph.symmetric
    graph.weight[0] = 5.0
    assert not graph.symmetric
    weight = torch.ones(4, dtype=F64, requires_grad=True)
    trained = graph.with_weight(weight)
    assert trained.symmetric
    assert trained.transposed is graph.transposed
    for _ in range(2):
        (gradient,) = torch.autograd.grad(trained.degree.square().sum(), weight)
        assert gradient.tolist() == [2.0, 4.0, 4.0, 2.0]
    with torch.no_grad():
        weight[0] = 2.0
    assert not trained.symmetric
    with torch.inference_mode():
        assert build().symmetric


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rowptr": (0, 2, 1, 4)}, r"rowptr: must start at 0, never decrease and end at 4; it fails at row 1"),
        ({"rowptr": (1, 2, 3, 4)}, r"rowptr: must start at 0.*fails at row 0"),
        ({"rowptr": (0, 1, 3, 5)}, r"rowptr: must start at 0"),
        ({"rowptr": ()}, r"rowptr: expected n \+ 1 entries for n nodes, got none"),
        ({"rowptr": ((0, 1, 3, 4),)}, r"rowptr: expected one dimension, got shape \(1, 4\)"),
        ({"col": (1, 0, 3, 1)}, r"col: entry 2 is 3, outside 0\.\.2"),
        ({"col": (1, 0, -1, 1)}, r"col: entry 2 is -1, outside 0\.\.2"),
        ({"col": (1, 0, 2**40, 1)}, r"col: 1099511627776 is out of range"),
        ({"col": (1, 0, 2)}, r"col has 3 entries, weight 4; they must match"),
        ({"weight": (1.0, -0.5, 2.0, 2.0)}, r"weight: entry 1 is -0.5; expected weights that are not negative"),
        ({"weight": (1.0, float("nan"), 2.0, 2.0)}, r"weight: entry 1 is nan; expected finite weights"),
        ({"weight": (1.0, float("inf"), 2.0, 2.0)}, r"weight: entry 1 is inf; expected finite weights"),
    ],
    ids=str,
)
def test_corrupt_structure(changes: Any, match: str) -> None:
    with pytest.raises(ValueError, match=rf"^Graph: {match}"):
        build(**changes)


def test_negative_duplicates_do_not_hide() -> None:
    with pytest.raises(ValueError, match=r"weight: entry 0 is -1"):
        Graph(torch.tensor([0, 2, 2]), torch.tensor([1, 1]), torch.tensor([-1.0, 3.0]))


def test_wrong_types() -> None:
    rowptr, col, weight = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.ones(2)
    with pytest.raises(TypeError, match=r"Graph: rowptr: expected a torch.Tensor, got list"):
        Graph([0, 1, 2], col, weight)  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(TypeError, match=rf"Graph: col: expected int32 or int64, got {str(dtype)[6:]}"):
            Graph(rowptr, col.to(dtype), weight)
    for dtype in (torch.float16, torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=rf"Graph: weight: expected dtype float32 or float64, got {str(dtype)[6:]}"):
            Graph(rowptr, col, weight.to(dtype))
    with pytest.raises(ValueError, match=r"Graph: col is on meta, weight on cpu; move one"):
        Graph(rowptr, col.to("meta"), weight)
    many = torch.empty(2**31, device="meta")
    with pytest.raises(ValueError, match=r"Graph: col: expected fewer than 2\^31 entries, got 2147483648; split"):
        Graph(rowptr.to("meta"), many.to(torch.int32), many)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda g: g.with_weight(torch.ones(3, dtype=F64)), ValueError, r"with_weight: weight: expected shape \(4,\)"),
        (lambda g: g.with_weight(-torch.ones(4)), ValueError, r"with_weight: weight: entry 0 is -1.0; expected"),
        (lambda g: g.with_weight(torch.full((4,), torch.nan)), ValueError, r"with_weight: weight: expected finite"),
        (lambda g: g.with_weight(torch.ones(4, device="meta")), ValueError, r"weight is on meta, the graph on cpu"),
        (lambda g: g.with_weight(torch.ones(4, dtype=torch.int64)), TypeError, r"with_weight: weight: expected dtype"),
        (lambda g: g.symmetrized("sum"), ValueError, r"symmetrized: how: expected 'mean' or 'max', got 'sum'"),
        (lambda g: g.normalized("both"), ValueError, r"normalized: kind: expected 'sym' or 'row', got 'both'"),
        (lambda g: g.laplacian("signless"), ValueError, r"laplacian: kind: expected .* got 'signless'"),
        (lambda g: g.reorder("amd"), ValueError, r"reorder: method: expected 'rcm', got 'amd'"),
        (lambda g: g.subgraph(torch.tensor([0, 3])), ValueError, r"subgraph: nodes: expected 0\.\.2, got 3"),
        (lambda g: g.subgraph(torch.tensor([-1])), ValueError, r"subgraph: nodes: expected 0\.\.2, got -1"),
        (lambda g: g.subgraph(torch.tensor([1, 1])), ValueError, r"subgraph: nodes: node 1 appears more than once"),
        (lambda g: g.subgraph(torch.tensor([1.0])), TypeError, r"subgraph: nodes: expected node numbers \(m,\)"),
        (lambda g: g.subgraph(torch.ones(2, dtype=torch.bool)), TypeError, r"got bool of shape \(2,\)"),
        (lambda g: g.subgraph([0, 1]), TypeError, r"subgraph: nodes: expected a torch.Tensor, got list"),
        (lambda g: g.permute(torch.tensor([1, 0])), ValueError, r"permute: order: expected all 3 nodes, got 2"),
        (lambda g: Graph.block_diagonal([]), ValueError, r"block_diagonal: graphs: expected at least one graph"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(build())


# --- Laplacians and normalisation ---


@pytest.mark.parametrize("symmetric", [True, False])
def test_laplacians(symmetric: bool) -> None:
    matrix = random_weights(15, symmetric=symmetric)
    matrix[4] = 0
    matrix[:, 4] = 0
    matrix[5, 5] = 0.7  # some rows have a self loop, some have none
    degree = matrix.sum(1)
    root, inverse = (torch.where(degree > 0, degree.pow(power), 0) for power in (-0.5, -1.0))
    combinatorial = torch.diag(degree) - matrix
    graph = graph_of(matrix)
    for kind, expected in (
        ("combinatorial", combinatorial),
        ("normalized", root[:, None] * combinatorial * root),
        ("random_walk", inverse[:, None] * combinatorial),
    ):
        laplacian = graph.laplacian(kind)  # type: ignore[arg-type]
        torch.testing.assert_close(laplacian.dense(), expected)
        assert (laplacian.asymmetry()[0] < 1e-14) == (symmetric and kind != "random_walk")
    torch.testing.assert_close(graph.normalized("sym").dense(), root[:, None] * matrix * root)
    torch.testing.assert_close(graph.normalized("row").dense(), inverse[:, None] * matrix)
    assert torch.equal(graph.normalized("sym").dense().T, graph.normalized("sym").dense()) is symmetric


def test_laplacians_agree_with_networkx() -> None:
    nx = pytest.importorskip("networkx")
    G = nx.karate_club_graph()
    graph = graph_of(torch.from_numpy(nx.to_numpy_array(G)))
    np.testing.assert_allclose(graph.laplacian().dense(), nx.laplacian_matrix(G).toarray(), atol=1e-12)
    normalized = nx.normalized_laplacian_matrix(G).toarray()
    np.testing.assert_allclose(graph.laplacian("normalized").dense(), normalized, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["combinatorial", "normalized", "random_walk", "sym", "row", "mean", "max", "loops", "T"]
)
def test_derivatives_for_weights(kind: str) -> None:
    matrix = random_weights(7, 0.4, symmetric=False)
    matrix[2] = 0  # a row without weight: zero derivatives, not NaN
    graph = graph_of(matrix)

    def of(weight: Tensor) -> Tensor:
        other = graph.with_weight(weight)
        if kind in ("sym", "row"):
            return other.normalized(kind).dense()  # type: ignore[arg-type]
        if kind in ("mean", "max"):
            return other.symmetrized(kind).dense()  # type: ignore[arg-type]
        if kind in ("loops", "T"):
            return other.T.dense() if kind == "T" else other.with_self_loops(0.5).dense()
        return other.laplacian(kind).dense()  # type: ignore[arg-type]

    weight = graph.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(of, weight)
    assert torch.autograd.gradgradcheck(of, weight)


# --- the largest eigenvalue ---


@pytest.mark.parametrize(
    "matrix",
    [PATH, STAR, BIPARTITE, random_weights(40), random_weights(80, 0.05), torch.ones(6, 6, dtype=F64), torch.eye(4)],
    ids=["path", "star", "bipartite", "random", "several components", "complete", "self loops only"],
)
def test_lambda_max(matrix: Tensor) -> None:
    graph = graph_of(matrix)
    exact = float(torch.linalg.eigvalsh(torch.diag(matrix.sum(1)) - matrix)[-1])
    assert 0.99 * exact <= graph.lambda_max() <= exact * (1 + 1e-12) + 1e-12
    assert exact <= graph.lambda_max_bound() * (1 + 1e-12) + 1e-12
    assert graph.lambda_max_bound() <= 2 * float((matrix.sum(1) - matrix.diagonal()).max()) * (1 + 1e-12)
    assert graph_of(matrix).lambda_max() == graph.lambda_max()
    assert abs(graph.to(F32).lambda_max() - graph.lambda_max()) <= 1e-6 * exact


def test_lambda_max_of_long_paths_and_far_hubs() -> None:
    """A spectrum that is dense at its end, and an eigenvector that a random start hardly meets."""
    n = 5000
    i = torch.arange(n - 1)
    rows, cols = torch.cat([i, i + 1]), torch.cat([i + 1, i])
    hub = torch.randint(1, n, (100,), generator=torch.Generator().manual_seed(0)).unique()
    for extra, exact in ((hub[:0], 2 - 2 * np.cos(np.pi * (n - 1) / n)), (hub, None)):
        zero = torch.zeros_like(extra)
        key = (torch.cat([rows, zero, extra]) * n + torch.cat([cols, extra, zero])).unique()
        rowptr = torch.cat([key.new_zeros(1), torch.bincount(key // n, minlength=n).cumsum(0)])
        graph = Graph(rowptr, key % n, torch.ones(len(key)))
        if exact is None:
            from scipy.sparse.linalg import eigsh

            exact = float(eigsh(graph.laplacian().to_scipy().astype(np.float64), k=1, which="LA")[0][0])
        assert 0.99 * exact <= graph.lambda_max() <= exact * (1 + 1e-9)


def test_lambda_max_of_directed_graphs_is_the_bound() -> None:
    matrix = random_weights(30, symmetric=False)
    graph = graph_of(matrix)
    modulus = float(torch.linalg.eigvals(torch.diag(matrix.sum(1)) - matrix).abs().max())
    assert modulus <= graph.lambda_max() == graph.lambda_max_bound()


# --- symmetric parts ---


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_symmetrized(n: int, density: float, seed: int) -> None:
    matrix = random_weights(n, density, seed, symmetric=False)
    graph = graph_of(matrix)
    assert torch.equal(graph.symmetrized().dense(), (matrix + matrix.T) / 2)
    assert torch.equal(graph.symmetrized("max").dense(), torch.maximum(matrix, matrix.T))
    both = graph.symmetrized()
    assert torch.equal(both.dense(), both.dense().T)
    loops = graph.with_self_loops(3.0)
    assert torch.equal(loops.dense(), matrix + 3 * torch.diag((matrix.diagonal() == 0).double()))
    for other in (both, loops):
        assert torch.equal(Graph(other.rowptr, other.col, other.weight).col, other.col)  # sorted


# --- components, parts, order ---


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0, 0.1), st.integers(0, 2**31))
def test_components_agree_with_scipy(n: int, density: float, seed: int) -> None:
    csgraph = pytest.importorskip("scipy.sparse.csgraph")
    graph = graph_of(random_weights(n, density, seed, symmetric=False))
    count, labels = graph.components()
    expected, expected_labels = csgraph.connected_components(graph.to_scipy(), directed=False)
    assert count == expected
    assert labels.tolist() == expected_labels.tolist()
    largest, nodes = graph.largest_component()
    assert largest.num_nodes == len(nodes) == np.bincount(expected_labels).max()
    assert len(set(expected_labels[nodes.numpy()])) == 1
    assert largest.components()[0] == 1


@pytest.mark.parametrize("shuffled", [False, True])
def test_components_of_a_long_path(shuffled: bool) -> None:
    n = 20_000
    name = torch.randperm(n, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(n)
    path = Graph(torch.arange(n + 1).clamp(max=n - 1), torch.arange(1, n), torch.ones(n - 1)).permute(name)
    count, labels = path.components()
    assert count == 1
    assert not labels.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_subgraph_and_permute(n: int, seed: int) -> None:
    matrix = random_weights(n, 0.4, seed, symmetric=False)
    graph = graph_of(matrix)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    some = order[: (n + 1) // 2]
    for nodes, part in (
        (order, graph.permute(order)),
        (some, graph.subgraph(some)),
        (some, graph.subgraph(some.int())),
    ):
        assert torch.equal(part.dense(), matrix[nodes][:, nodes])
        assert torch.equal(Graph(part.rowptr, part.col, part.weight).col, part.col)  # sorted
    mask = torch.zeros(n, dtype=torch.bool).index_fill(0, some, True)
    assert torch.equal(graph.subgraph(mask).dense(), matrix[mask][:, mask])
    assert torch.equal(graph.permute(order).permute(order.argsort()).dense(), matrix)


def test_reorder_brings_neighbours_together() -> None:
    csgraph = pytest.importorskip("scipy.sparse.csgraph")
    n = 300
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    path = Graph(torch.arange(n + 1).clamp(max=n - 1), torch.arange(1, n), torch.ones(n - 1)).symmetrized()
    graph = path.permute(shuffled)
    ordered, order = graph.reorder()
    assert torch.equal(ordered.dense(), graph.dense()[order][:, order])
    assert int((ordered.rows - ordered.col).abs().max()) == 1
    assert order.tolist() == csgraph.reverse_cuthill_mckee(graph.to_scipy(), symmetric_mode=True).tolist()


def test_block_diagonal() -> None:
    parts = [random_weights(n, 0.5, n, symmetric=False) for n in (3, 1, 4)]
    together = Graph.block_diagonal([graph_of(part) for part in parts])
    assert torch.equal(together.dense(), torch.block_diag(*parts))


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scipy.sparse", "scipy.sparse.csgraph", "sklearn.manifold"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'Graph.to_scipy needs scipy: pip install "kantor\[graph\]"'):
        build().to_scipy()
    with pytest.raises(ImportError, match=r'Graph.reorder needs scipy: pip install "kantor\[graph\]"'):
        build().reorder()
    with pytest.raises(ImportError, match=r'Graph.plot: positions .* need scikit-learn: pip install "kantor\[demo\]"'):
        build().plot()


# --- pictures ---


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    graph = graph_of(random_weights(30))
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    ax = graph.plot(x, ["a", "b", None] * 10, edges=10)
    assert [len(lines.get_segments()) for lines in ax.collections[:1]] == [10]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["unknown", "a", "b"]
    assert sum(len(points.get_offsets()) for points in ax.collections[1:]) == 30
    assert graph.plot(x[:, :2], torch.arange(30) % 3 - 1, ax=ax) is ax
    np.testing.assert_allclose(graph.plot(x[:, :2]).collections[-1].get_offsets(), x[:, :2])
    with pytest.raises(ValueError, match=r"Graph.plot: positions: expected shape \(30, d\) with d >= 2, got \(30, 1\)"):
        graph.plot(x[:, :1])
    with pytest.raises(ValueError, match=r"Graph.plot: labels: expected 30 labels, one a node, got 3"):
        graph.plot(x, [1, 2, 3])


def test_plot_finds_places_of_its_own() -> None:
    pytest.importorskip("sklearn")
    for matrix in (random_weights(30), random_weights(12, 0.1, symmetric=False), torch.ones(3, 3), torch.ones(1, 1)):
        offsets = host(torch.as_tensor(np.asarray(graph_of(matrix).plot().collections[-1].get_offsets())))
        assert offsets.shape == (len(matrix), 2)
        assert bool(offsets.isfinite().all())
